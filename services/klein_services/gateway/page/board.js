/** Board: the picture that takes shape, the finished one, and the divider between two of them. */

import { byId, releaseUrl, urlOf } from "./dom.js";

const picture = () => byId("picture", HTMLImageElement);
const compared = () => byId("compared", HTMLImageElement);
const divider = () => byId("divider", HTMLInputElement);

export class Board {
  constructor() {
    /** @type {Blob | null} */
    this.preview = null;
    divider().addEventListener("input", () => this.divide());
  }

  /**
   * Shows a picture while it is made.
   * @param {Blob} blob
   * @param {number} step
   */
  showPreview(blob, step) {
    this.compareWith(null, "");
    this.show(blob, `The picture after step ${step}`);
    if (this.preview) releaseUrl(this.preview);
    this.preview = blob;
    picture().dataset.state = "preview";
  }

  /**
   * Shows a finished picture.
   * @param {Blob} blob
   * @param {string} text its description
   */
  showPicture(blob, text) {
    this.compareWith(null, "");
    this.show(blob, text);
    if (this.preview) releaseUrl(this.preview);
    this.preview = null;
    picture().dataset.state = "finished";
  }

  /** Shows that there is no picture. */
  clear() {
    this.compareWith(null, "");
    byId("shown", HTMLElement).hidden = true;
    byId("empty", HTMLElement).hidden = false;
  }

  /**
   * Lays another picture over the left part of the one that is shown; `null` removes it.
   * @param {Blob | null} blob
   * @param {string} text its description
   */
  compareWith(blob, text) {
    for (const each of [compared(), divider(), byId("divider-line", HTMLElement)]) each.hidden = !blob;
    if (!blob) return;
    compared().src = urlOf(blob);
    compared().alt = text;
    divider().value = "50";
    this.divide();
  }

  /** @param {boolean} busy */
  setBusy(busy) {
    byId("board", HTMLElement).setAttribute("aria-busy", String(busy));
  }

  /** @param {Blob} blob @param {string} text */
  show(blob, text) {
    picture().src = urlOf(blob);
    picture().alt = text;
    byId("shown", HTMLElement).hidden = false;
    byId("empty", HTMLElement).hidden = true;
  }

  divide() {
    const share = `${divider().value}%`;
    byId("shown", HTMLElement).style.setProperty("--divider", share);
    divider().setAttribute("aria-valuetext", `${share} of the width shows the other picture`);
  }
}
