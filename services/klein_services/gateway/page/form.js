/** Form of a request: settings in and out, the limits of the chosen model, errors at their fields. */

/** @import { Model, Models, Settings, Violation } from "./types.d.ts" */

import { byId, element, press } from "./dom.js";

const NUMBERS = /** @type {const} */ ([
  "width_px",
  "height_px",
  "step_count",
  "guidance_scale",
  "quality",
  "strength",
  "mask_padding_px",
]);
/** Proportions of width and height, with about the same number of pixels. */
const ASPECTS = /** @type {[string, number, number][]} */ ([
  ["Square", 1, 1],
  ["Landscape", 1.25, 0.75],
  ["Portrait", 0.75, 1.25],
]);
const MULTIPLE_PX = 16;

const field = (/** @type {string} */ name) => byId(name, HTMLInputElement);
const select = (/** @type {string} */ name) => byId(name, HTMLSelectElement);
const prompt = () => byId("prompt", HTMLTextAreaElement);

export class Form {
  /** @param {() => void} onModel called when another model is chosen */
  constructor(onModel) {
    /** @type {Models} */
    this.models = { models: [], default_model: "", target: "" };
    this.hasReferences = false;
    this.hasInitialImage = false;
    this.onModel = onModel;
    select("model").addEventListener("change", () => this.showModel());
    select("format").addEventListener("change", () => this.showLimits());
    byId("dice", HTMLButtonElement).addEventListener("click", () => this.newSeed());
    byId("lock", HTMLButtonElement).addEventListener("click", () => this.lockSeed(!this.isSeedLocked));
    field("seed").addEventListener("input", () => this.lockSeed(field("seed").value !== ""));
    byId("aspects", HTMLElement).replaceChildren(
      ...ASPECTS.map(([name, width, height]) =>
        element("button", { type: "button", "aria-pressed": "false", click: () => this.setAspect(width, height) }, name),
      ),
    );
    for (const name of /** @type {const} */ (["width_px", "height_px"])) {
      field(name).addEventListener("input", () => this.showAspect());
    }
    this.newSeed();
  }

  /** @returns {Model | null} */
  get model() {
    const name = select("model").value;
    return this.models.models.find((each) => each.name === name) ?? null;
  }

  get isSeedLocked() {
    return byId("lock", HTMLButtonElement).getAttribute("aria-pressed") === "true";
  }

  /** @param {boolean} locked */
  lockSeed(locked) {
    byId("lock", HTMLButtonElement).setAttribute("aria-pressed", String(locked));
  }

  newSeed() {
    field("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  }

  /** Shows the models; keeps the one that is chosen. @param {Models} models */
  setModels(models) {
    const before = this.model;
    this.models = models;
    const chosen = models.models.some(({ name }) => name === before?.name) ? before?.name : models.default_model;
    select("model").replaceChildren(
      ...models.models.map(({ name }) => element("option", { value: name, selected: name === chosen }, name)),
    );
    if (JSON.stringify(before) !== JSON.stringify(this.model)) this.showModel();
  }

  showModel() {
    const { model } = this;
    if (!model) return;
    const chosen = new Map(this.adapters().map(({ name, scale }) => [name, scale]));
    byId("adapters", HTMLFieldSetElement).hidden = !model.adapters.length;
    byId("adapter-list", HTMLElement).replaceChildren(
      ...model.adapters.map((adapter) => {
        const scale = element("input", {
          type: "number",
          min: "-10",
          max: "10",
          step: "0.1",
          value: String(chosen.get(adapter.name) ?? 1),
          "aria-label": `Scale of ${adapter.name}`,
          "data-scale": adapter.name,
        });
        const use = element("input", {
          type: "checkbox",
          "data-adapter": adapter.name,
          checked: chosen.has(adapter.name),
          disabled: Boolean(adapter.problem),
        });
        const about = adapter.problem || `${adapter.kind}, rank ${adapter.rank}`;
        return element(
          "div",
          { class: "adapter" },
          element("label", { class: "inline" }, use, ` ${adapter.name} `, element("span", { class: "hint" }, about)),
          scale,
        );
      }),
    );
    this.showLimits();
    this.onModel();
  }

  /** Shows defaults and limits that depend on the model, the format and the pictures. */
  showLimits() {
    const { model } = this;
    if (!model) return;
    const { limits } = model;
    const side = String(limits.default_size_px);
    for (const name of /** @type {const} */ (["width_px", "height_px"])) {
      field(name).disabled = this.hasInitialImage;
      field(name).placeholder = this.hasInitialImage || this.hasReferences ? "as picture" : side;
    }
    field("step_count").placeholder = String(model.default_step_count);
    field("step_count").max = String(limits.step_count);
    field("guidance_scale").placeholder = String(model.default_guidance_scale);
    field("image_count").max = String(limits.image_count);
    for (const each of document.querySelectorAll(".guided")) /** @type {HTMLElement} */ (each).hidden = model.distilled;
    for (const each of document.querySelectorAll(".masked")) {
      /** @type {HTMLElement} */ (each).hidden = !this.hasInitialImage;
    }
    const isLossy = select("format").value !== "png";
    for (const each of document.querySelectorAll(".lossy")) /** @type {HTMLElement} */ (each).hidden = !isLossy;
    byId("aspects", HTMLElement).hidden = this.hasInitialImage;
    byId("size-hint", HTMLElement).textContent = this.hasInitialImage
      ? "The picture that is painted over decides the size."
      : `At most ${limits.pixel_count.toLocaleString("en")} pixels`;
    this.showAspect();
  }

  /** @param {number} width @param {number} height shares of the default side */
  setAspect(width, height) {
    const side = this.model?.limits.default_size_px ?? 1024;
    const rounded = (/** @type {number} */ share) => String(Math.round((side * share) / MULTIPLE_PX) * MULTIPLE_PX);
    field("width_px").value = rounded(width);
    field("height_px").value = rounded(height);
    this.showAspect();
    byId("form", HTMLFormElement).dispatchEvent(new Event("input"));
  }

  showAspect() {
    const side = this.model?.limits.default_size_px ?? 0;
    const width = field("width_px").valueAsNumber || (this.hasReferences ? 0 : side);
    const height = field("height_px").valueAsNumber || (this.hasReferences ? 0 : side);
    const index = ASPECTS.findIndex(([, wide, high]) => width * height > 0 && Math.abs(width / height - wide / high) < 0.08);
    const buttons = byId("aspects", HTMLElement).children;
    press(buttons, buttons[index] ?? null);
  }

  adapters() {
    return [...document.querySelectorAll("[data-adapter]")].flatMap((box) => {
      if (!(box instanceof HTMLInputElement) || !box.checked) return [];
      const name = box.dataset.adapter ?? "";
      const scale = document.querySelector(`[data-scale="${CSS.escape(name)}"]`);
      return [{ name, scale: scale instanceof HTMLInputElement ? scale.valueAsNumber : 1 }];
    });
  }

  /** @returns {Settings} */
  settings() {
    const number = (/** @type {string} */ name) => {
      const input = field(name);
      const isShown = !input.closest("[hidden]") && !input.disabled;
      return !isShown || input.value === "" ? null : input.valueAsNumber;
    };
    return {
      model: select("model").value,
      prompt: prompt().value,
      negative_prompt: this.model?.distilled ? null : field("negative_prompt").value || null,
      width_px: number("width_px"),
      height_px: number("height_px"),
      step_count: number("step_count"),
      guidance_scale: number("guidance_scale"),
      seed: field("seed").value.trim(),
      image_count: field("image_count").value === "" ? 1 : field("image_count").valueAsNumber,
      format: /** @type {Settings["format"]} */ (select("format").value),
      quality: number("quality"),
      adapters: this.adapters(),
      strength: number("strength"),
      mask_padding_px: number("mask_padding_px"),
    };
  }

  /**
   * Fills the form; the seed is locked, so that the request makes the same pictures again.
   * @param {Settings} settings
   */
  fill(settings) {
    prompt().value = settings.prompt;
    if (this.models.models.some(({ name }) => name === settings.model)) select("model").value = settings.model;
    field("negative_prompt").value = settings.negative_prompt ?? "";
    for (const name of NUMBERS) field(name).value = settings[name]?.toString() ?? "";
    field("seed").value = settings.seed;
    field("image_count").value = String(settings.image_count);
    select("format").value = settings.format;
    this.lockSeed(true);
    this.showModel();
    for (const box of document.querySelectorAll("[data-adapter]")) {
      if (!(box instanceof HTMLInputElement)) continue;
      const used = settings.adapters.find(({ name }) => name === box.dataset.adapter);
      box.checked = used !== undefined;
      const scale = document.querySelector(`[data-scale="${CSS.escape(box.dataset.adapter ?? "")}"]`);
      if (used && scale instanceof HTMLInputElement) scale.value = String(used.scale);
    }
    this.clearErrors();
  }

  clearErrors() {
    for (const each of document.querySelectorAll("#form .error")) each.textContent = "";
    for (const each of document.querySelectorAll("#form [aria-invalid]")) each.removeAttribute("aria-invalid");
  }

  /**
   * Shows the reasons at their fields, opens what hides them, and moves the focus to the first.
   * @param {Violation[]} violations
   */
  showViolations(violations) {
    let first = null;
    for (const violation of violations) {
      const name = controlOf(violation.field);
      const place = document.getElementById(`${name}-error`);
      if (!place) continue;
      place.textContent = sentence(violation);
      const control = document.getElementById(name);
      control?.setAttribute("aria-invalid", "true");
      place.closest("details")?.setAttribute("open", "");
      first ??= control ?? byId("add-files", HTMLButtonElement);
    }
    first?.focus();
  }
}

/** Name of a control in words, as its label has it. @param {string} name */
export function labelOf(name) {
  const indexed = /^(references|adapters)\[(\d+)\]/.exec(name);
  if (indexed) return `${indexed[1] === "references" ? "Reference" : "Adapter"} ${Number(indexed[2]) + 1}`;
  const label = document.querySelector(`label[for="${CSS.escape(controlOf(name))}"]`)?.textContent;
  return label ?? { initial_image: "The picture that is painted over", mask: "The mask" }[name] ?? name;
}

/** @param {Violation} violation */
export const sentence = ({ field: name, description }) => `${labelOf(name)} ${description.replace(/\.?$/, ".")}`;

/** @param {string} name field of the API, for example `spec.references[1]` */
const controlOf = (name) => name.replace(/^spec\./, "").replace(/[[.].*$/, "");
