/** Errors for people: the field, the reason, and the next thing to do. */

import { ApiError, ConnectionLost } from "./api.js";
import { byId, element } from "./dom.js";
import { sentence } from "./form.js";

/**
 * Shows an error above the picture.
 * @param {unknown} error
 * @param {() => void} onRetry
 */
export function showProblem(error, onRetry) {
  const { title, lines, next, canRetry } = explain(error);
  const box = byId("problem", HTMLElement);
  box.replaceChildren(
    element("p", { class: "title" }, title),
    ...(lines.length ? [element("ul", {}, ...lines.map((line) => element("li", {}, line)))] : []),
    element("p", {}, next),
    ...(canRetry ? [element("button", { type: "button", click: onRetry }, "Try again")] : []),
  );
  box.hidden = false;
}

export function hideProblem() {
  byId("problem", HTMLElement).hidden = true;
}

/**
 * Returns an error's text and the next thing to do.
 * @param {unknown} error
 * @returns {{title: string, lines: string[], next: string, canRetry: boolean}}
 */
function explain(error) {
  if (error instanceof ConnectionLost) {
    return {
      title: error.message,
      lines: [],
      next: "Check that the suite runs (klein up) and that this computer reaches it.",
      canRetry: true,
    };
  }
  if (!(error instanceof ApiError)) {
    return { title: "The page failed.", lines: [String(error)], next: "Reload it.", canRetry: false };
  }
  const lines = error.violations.map(sentence);
  const title = lines.length ? "The request cannot be carried out." : capital(error.message);
  const wait = error.retryAfterSeconds;
  const [next, canRetry] =
    error.status === 401
      ? ["Enter a token of this suite at the top.", false]
      : error.status === 403
        ? [error.code === "content_denied" ? "Change the prompt or the pictures." : "Choose another model, or use another token.", false]
        : error.status === 429
          ? [wait ? `Try again in ${Math.ceil(wait)} s.` : "Ask for fewer or smaller pictures, or try again later.", true]
          : error.status === 503
            ? ["The tab Suite shows which part is missing. Try again when it serves.", true]
            : error.status === 504
              ? ["Ask for fewer steps or smaller pictures.", true]
              : error.status >= 500
                ? ["Try again; if it stays, give the message to the operator.", true]
                : [lines.length ? "Correct the marked fields and generate again." : "Correct the request and generate again.", false];
  return { title, lines, next, canRetry };
}

/** @param {string} text */
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/\.?$/, ".");
