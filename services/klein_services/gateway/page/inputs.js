/** Pictures that a request uses: references, and one that is painted over. Dropped, pasted or chosen. */

/** @import { Inputs, Model } from "./types.d.ts" */

import { byId, element, urlOf } from "./dom.js";
import { paintMask } from "./mask_editor.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

export class InputTray {
  /** @param {() => void} onChange */
  constructor(onChange) {
    /** @type {Inputs} */
    this.value = { references: [], initial_image: null, mask: null };
    this.onChange = onChange;
    /** @type {Model | null} */
    this.model = null;
    this.drop = byId("drop", HTMLElement);
    this.list = byId("inputs", HTMLUListElement);
    const files = byId("files", HTMLInputElement);
    byId("add-files", HTMLButtonElement).addEventListener("click", () => files.click());
    files.addEventListener("change", () => {
      this.add([...(files.files ?? [])]);
      files.value = "";
    });
    document.addEventListener("paste", (event) => {
      const pasted = [...(event.clipboardData?.files ?? [])];
      if (!pasted.length || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      this.add(pasted);
    });
    document.addEventListener("dragover", (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      this.drop.classList.add("over");
    });
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) this.drop.classList.remove("over");
    });
    document.addEventListener("drop", (event) => {
      this.drop.classList.remove("over");
      if (!event.dataTransfer?.types.includes("Files")) return;
      // Without this the browser would leave the page to show the file, wherever it falls.
      event.preventDefault();
      this.add([...event.dataTransfer.files]);
    });
  }

  /** @param {Inputs} inputs */
  set(inputs) {
    this.value = { ...inputs, references: [...inputs.references] };
    this.changed();
  }

  /**
   * Adds references, as far as the model takes them.
   * @param {Blob[]} blobs
   */
  add(blobs) {
    const problems = [];
    for (const blob of blobs) {
      const name = blob instanceof File ? blob.name : "The picture";
      const limits = this.model?.limits;
      if (!TYPES.includes(blob.type)) {
        problems.push(`${name} is no PNG, JPEG, WebP, GIF or BMP file.`);
      } else if (limits && blob.size > limits.reference_bytes) {
        problems.push(`${name} has ${megabytes(blob.size)}; at most ${megabytes(limits.reference_bytes)} are taken.`);
      } else if (limits && this.value.references.length >= limits.reference_count) {
        problems.push(`${this.model?.name} takes at most ${limits.reference_count} references. Remove one first.`);
        break;
      } else {
        this.value.references.push(blob);
      }
    }
    this.changed();
    byId("references-error", HTMLElement).textContent = problems.join(" ");
  }

  /**
   * Makes a picture the one that is painted over, and opens the editor of its mask.
   * @param {Blob} blob
   */
  async paint(blob) {
    const isSame = this.value.initial_image === blob;
    const result = await paintMask(blob, isSame ? this.value.mask : null);
    if (!result) return;
    this.value.references = this.value.references.filter((each) => each !== blob);
    if (!isSame && this.value.initial_image) this.value.references.push(this.value.initial_image);
    this.value.initial_image = blob;
    this.value.mask = result.mask;
    this.changed();
    this.list.querySelector("button")?.focus();
  }

  changed() {
    const { initial_image, mask, references } = this.value;
    for (const field of ["references", "initial_image", "mask"]) byId(`${field}-error`, HTMLElement).textContent = "";
    const cards = references.map((blob, index) => this.reference(blob, index));
    if (initial_image) cards.unshift(this.initial(initial_image, mask));
    this.list.replaceChildren(...cards);
    this.onChange();
  }

  /**
   * @param {Blob} blob
   * @param {number} index
   */
  reference(blob, index) {
    const name = `Reference ${index + 1}`;
    const { references } = this.value;
    return element(
      "li",
      {},
      element("img", { src: urlOf(blob), alt: name }),
      element("span", { class: "badge", "aria-hidden": "true" }, String(index + 1)),
      element(
        "div",
        { class: "thumb-actions" },
        button("Mask", `Paint a mask on ${name}`, () => this.paint(blob)),
        ...(index
          ? [
              button("◀", `Move ${name} forward`, () => {
                references.splice(index - 1, 0, ...references.splice(index, 1));
                this.changed();
              }),
            ]
          : []),
        button("✕", `Remove ${name}`, () => {
          references.splice(index, 1);
          this.changed();
          byId("add-files", HTMLButtonElement).focus();
        }),
      ),
    );
  }

  /**
   * @param {Blob} blob
   * @param {Blob | null} mask
   */
  initial(blob, mask) {
    const pictures = [element("img", { src: urlOf(blob), alt: "Picture that is painted over" })];
    if (mask) pictures.push(element("img", { src: urlOf(mask), alt: "Its mask", class: "mask-overlay" }));
    return element(
      "li",
      { class: "initial" },
      ...pictures,
      element("span", { class: "badge" }, mask ? "masked" : "whole"),
      element(
        "div",
        { class: "thumb-actions" },
        button("Mask", "Change the mask", () => this.paint(blob)),
        button("✕", "Remove the picture that is painted over", () => {
          this.set({ ...this.value, initial_image: null, mask: null });
          byId("add-files", HTMLButtonElement).focus();
        }),
      ),
    );
  }
}

/**
 * @param {string} text
 * @param {string} label
 * @param {() => void} click
 */
const button = (text, label, click) => element("button", { type: "button", "aria-label": label, title: label, click }, text);

/** @param {number} bytes */
const megabytes = (bytes) => `${(bytes / 1024 / 1024).toFixed(1)} MiB`;
