/** Row of finished requests: one thumbnail each, newest first. */

/** @import { Entry } from "./types.d.ts" */

import { byId, element, urlOf } from "./dom.js";

/**
 * Shows the entries and marks the one that is on the board.
 * @param {Entry[]} entries
 * @param {Entry | null} shown
 * @param {boolean} isKept whether entries outlive the page
 * @param {(entry: Entry) => void} onChoose
 */
export function showHistory(entries, shown, isKept, onChoose) {
  const list = byId("history", HTMLUListElement);
  const focused = document.activeElement?.closest("#history li")?.getAttribute("data-id");
  list.replaceChildren(
    ...entries.map((entry) => {
      const picture = entry.pictures[0];
      const prompt = entry.settings.prompt || "no prompt";
      return element(
        "li",
        { "data-id": entry.id },
        element(
          "button",
          {
            type: "button",
            "aria-current": String(entry === shown),
            "aria-label": `Show “${prompt}”, ${new Date(entry.at).toLocaleString()}`,
            title: prompt,
            click: () => onChoose(entry),
          },
          ...(picture ? [element("img", { src: urlOf(picture.blob), alt: "", loading: "lazy" })] : []),
          ...(entry.pictures.length > 1 ? [element("span", { class: "badge" }, String(entry.pictures.length))] : []),
        ),
      );
    }),
  );
  if (focused) /** @type {HTMLElement | null} */ (list.querySelector(`[data-id="${focused}"] button`))?.focus();
  byId("clear-history", HTMLButtonElement).hidden = !entries.length;
  byId("history-hint", HTMLElement).textContent = isKept
    ? "Pictures that you make are kept in this browser, with everything that makes them again."
    : "This browser keeps no pictures: they are gone when the page closes.";
}
