/** Editor of a mask: brush, eraser, rectangle by numbers, undo. White pixels of the mask are made anew. */

import { byId, press } from "./dom.js";

const MOST_SIDE_PX = 4096;
const MOST_OPERATIONS = 500;
const TINT = "rgb(232 62 140 / 55%)";

/**
 * One change of the mask; sizes are pixels of the picture.
 * @typedef {{kind: "stroke", erases: boolean, width: number, points: [number, number][]}
 *   | {kind: "rectangle", erases: boolean, x: number, y: number, width: number, height: number}
 *   | {kind: "invert"} | {kind: "clear"}} Operation
 */

/**
 * Opens the editor. Returns the mask as a PNG file, `null` as a mask for the whole picture, and nothing when it is closed.
 * @param {Blob} picture
 * @param {Blob | null} mask the mask to begin with
 * @returns {Promise<{mask: Blob | null} | null>}
 */
export async function paintMask(picture, mask) {
  const dialog = byId("mask-dialog", HTMLDialogElement);
  const editor = new MaskEditor(await createImageBitmap(picture), mask ? await createImageBitmap(mask) : null);
  const listening = new AbortController();
  return new Promise((resolve) => {
    /** @param {{mask: Blob | null} | null} result */
    const finish = (result) => {
      listening.abort();
      dialog.close();
      resolve(result);
    };
    editor.listen(listening.signal);
    /** @param {string} id @param {() => void} action */
    const on = (id, action) =>
      byId(id, HTMLButtonElement).addEventListener("click", action, { signal: listening.signal });
    on("mask-close", () => finish(null));
    on("mask-remove", () => finish({ mask: null }));
    on("mask-use", async () => {
      if (editor.isEmpty) editor.report("Nothing is marked yet: paint, or draw a rectangle.");
      else finish({ mask: await editor.file() });
    });
    dialog.addEventListener("cancel", () => finish(null), { signal: listening.signal });
    dialog.showModal();
  });
}

class MaskEditor {
  /**
   * @param {ImageBitmap} picture
   * @param {ImageBitmap | null} mask
   */
  constructor(picture, mask) {
    const scale = Math.min(1, MOST_SIDE_PX / Math.max(picture.width, picture.height));
    this.picture = picture;
    this.first = mask;
    this.canvas = byId("mask-canvas", HTMLCanvasElement);
    this.canvas.width = Math.round(picture.width * scale);
    this.canvas.height = Math.round(picture.height * scale);
    this.canvas.style.aspectRatio = `${this.canvas.width} / ${this.canvas.height}`;
    this.mask = new OffscreenCanvas(this.canvas.width, this.canvas.height);
    /** @type {Operation[]} */
    this.operations = [];
    this.erases = false;
    byId("mask-x", HTMLInputElement).value = byId("mask-y", HTMLInputElement).value = "0";
    byId("mask-w", HTMLInputElement).value = String(Math.round(this.canvas.width / 2));
    byId("mask-h", HTMLInputElement).value = String(this.canvas.height);
    this.selectTool(false);
    this.report("");
    this.draw();
  }

  get isEmpty() {
    const { data } = context(this.mask).getImageData(0, 0, this.mask.width, this.mask.height);
    for (let index = 3; index < data.length; index += 4) if (data[index]) return false;
    return true;
  }

  /** @param {AbortSignal} signal */
  listen(signal) {
    /** @param {string} id @param {() => void} action */
    const on = (id, action) => byId(id, HTMLButtonElement).addEventListener("click", action, { signal });
    on("mask-brush", () => this.selectTool(false));
    on("mask-eraser", () => this.selectTool(true));
    on("mask-undo", () => this.undo());
    on("mask-invert", () => this.apply({ kind: "invert" }));
    on("mask-clear", () => this.apply({ kind: "clear" }));
    on("mask-rectangle", () => this.rectangle());
    byId("mask-dialog", HTMLDialogElement).addEventListener(
      "keydown",
      (event) => {
        if (!(event.ctrlKey || event.metaKey) || event.key !== "z") return;
        event.preventDefault();
        this.undo();
      },
      { signal },
    );
    this.canvas.addEventListener("pointerdown", (event) => this.beginStroke(event), { signal });
    this.canvas.addEventListener("pointermove", (event) => this.continueStroke(event), { signal });
  }

  /** @param {boolean} erases */
  selectTool(erases) {
    this.erases = erases;
    const brush = byId("mask-brush", HTMLButtonElement);
    const eraser = byId("mask-eraser", HTMLButtonElement);
    press([brush, eraser], erases ? eraser : brush);
  }

  /** @param {PointerEvent} event */
  beginStroke(event) {
    if (event.button) return;
    this.canvas.setPointerCapture(event.pointerId);
    const percent = byId("mask-size", HTMLInputElement).valueAsNumber;
    const width = (Math.min(this.canvas.width, this.canvas.height) * percent) / 100;
    this.apply({ kind: "stroke", erases: this.erases, width, points: [this.position(event)] });
  }

  /** @param {PointerEvent} event */
  continueStroke(event) {
    const stroke = this.operations.at(-1);
    if (!event.buttons || stroke?.kind !== "stroke" || !this.canvas.hasPointerCapture(event.pointerId)) return;
    stroke.points.push(this.position(event));
    paint(this.mask, stroke, stroke.points.slice(-2));
    this.show();
  }

  /**
   * @param {PointerEvent} event
   * @returns {[number, number]}
   */
  position(event) {
    const box = this.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.canvas.width,
      ((event.clientY - box.top) / box.height) * this.canvas.height,
    ];
  }

  rectangle() {
    const [x, y, width, height] = ["x", "y", "w", "h"].map((name) => byId(`mask-${name}`, HTMLInputElement).valueAsNumber);
    if (x === undefined || y === undefined || !(width && width > 0) || !(height && height > 0)) {
      this.report("A rectangle needs four whole numbers; width and height are at least 1.");
    } else if (!(x >= 0 && y >= 0 && x < this.canvas.width && y < this.canvas.height)) {
      this.report(`The rectangle is outside the picture, which has ${this.canvas.width} × ${this.canvas.height} pixels.`);
    } else {
      this.apply({ kind: "rectangle", erases: this.erases, x, y, width, height });
      this.report(`Rectangle ${this.erases ? "erased" : "drawn"}: ${width} × ${height} pixels at ${x}, ${y}.`);
    }
  }

  /** @param {Operation} operation */
  apply(operation) {
    if (this.operations.length >= MOST_OPERATIONS) {
      this.report(`A mask takes at most ${MOST_OPERATIONS} strokes. Undo or clear some.`);
      return;
    }
    this.operations.push(operation);
    paint(this.mask, operation);
    this.show();
  }

  undo() {
    if (!this.operations.pop()) this.report("There is nothing to undo.");
    this.draw();
  }

  /** @param {string} text */
  report(text) {
    byId("mask-status", HTMLElement).textContent = text;
  }

  /** Draws the mask from its beginning. */
  draw() {
    const target = context(this.mask);
    target.clearRect(0, 0, this.mask.width, this.mask.height);
    if (this.first) {
      target.drawImage(this.first, 0, 0, this.mask.width, this.mask.height);
      // Masks are black and white; the editor keeps them as white and transparent.
      const pixels = target.getImageData(0, 0, this.mask.width, this.mask.height);
      for (let index = 0; index < pixels.data.length; index += 4) pixels.data[index + 3] = pixels.data[index] ?? 0;
      target.putImageData(pixels, 0, 0);
    }
    for (const operation of this.operations) paint(this.mask, operation);
    this.show();
  }

  /** Shows the picture with the mask as a tint. */
  show() {
    const tint = new OffscreenCanvas(this.mask.width, this.mask.height);
    const tinted = context(tint);
    tinted.drawImage(this.mask, 0, 0);
    tinted.globalCompositeOperation = "source-in";
    tinted.fillStyle = TINT;
    tinted.fillRect(0, 0, tint.width, tint.height);
    const target = context(this.canvas);
    target.drawImage(this.picture, 0, 0, this.canvas.width, this.canvas.height);
    target.drawImage(tint, 0, 0);
  }

  /** Returns the mask as a PNG file of the picture's size, white on black. */
  async file() {
    const flat = new OffscreenCanvas(this.picture.width, this.picture.height);
    const target = context(flat);
    target.fillStyle = "black";
    target.fillRect(0, 0, flat.width, flat.height);
    target.drawImage(this.mask, 0, 0, flat.width, flat.height);
    return flat.convertToBlob({ type: "image/png" });
  }
}

/**
 * @param {HTMLCanvasElement | OffscreenCanvas} canvas
 * @returns {CanvasRenderingContext2D | OffscreenCanvasRenderingContext2D}
 */
function context(canvas) {
  const found = canvas.getContext("2d", { willReadFrequently: true });
  if (!found) throw new Error("This browser cannot draw.");
  return /** @type {CanvasRenderingContext2D} */ (found);
}

/**
 * Carries out an operation on a mask; of a stroke, some of its points.
 * @param {OffscreenCanvas} mask
 * @param {Operation} operation
 * @param {[number, number][]} [points]
 */
function paint(mask, operation, points) {
  const target = context(mask);
  target.save();
  target.fillStyle = target.strokeStyle = "white";
  if (operation.kind === "clear") {
    target.clearRect(0, 0, mask.width, mask.height);
  } else if (operation.kind === "invert") {
    target.globalCompositeOperation = "source-out";
    target.fillRect(0, 0, mask.width, mask.height);
  } else {
    if (operation.erases) target.globalCompositeOperation = "destination-out";
    if (operation.kind === "rectangle") {
      target.fillRect(operation.x, operation.y, operation.width, operation.height);
    } else {
      const path = points ?? operation.points;
      target.lineWidth = operation.width;
      target.lineCap = target.lineJoin = "round";
      target.beginPath();
      path.forEach(([x, y], index) => (index ? target.lineTo(x, y) : target.moveTo(x, y)));
      // A line of no length has round ends, too: a click makes a dot.
      if (path.length === 1 && path[0]) target.lineTo(...path[0]);
      target.stroke();
    }
  }
  target.restore();
}
