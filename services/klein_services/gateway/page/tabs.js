/** Tabs with the keyboard's arrows, Home and End. */

import { byId } from "./dom.js";

const NAMES = /** @type {const} */ (["create", "suite"]);

/** @typedef {typeof NAMES[number]} TabName */

/**
 * Makes the tabs work and shows the one that the address names.
 * @param {(name: TabName) => void} onShow
 */
export function startTabs(onShow) {
  const tab = (/** @type {TabName} */ name) => byId(`tab-${name}`, HTMLButtonElement);
  /** @param {TabName} name */
  const show = (name) => {
    for (const each of NAMES) {
      const isChosen = each === name;
      tab(each).setAttribute("aria-selected", String(isChosen));
      tab(each).tabIndex = isChosen ? 0 : -1;
      byId(`view-${each}`, HTMLElement).hidden = !isChosen;
    }
    history.replaceState(null, "", name === "create" ? location.pathname : `#${name}`);
    onShow(name);
  };
  NAMES.forEach((name, index) => {
    tab(name).addEventListener("click", () => show(name));
    tab(name).addEventListener("keydown", (event) => {
      const moves = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: NAMES.length - 1 };
      const to = moves[/** @type {keyof typeof moves} */ (event.key)];
      if (to === undefined) return;
      event.preventDefault();
      const next = NAMES[(to + NAMES.length) % NAMES.length] ?? name;
      show(next);
      tab(next).focus();
    });
  });
  show(NAMES.find((name) => location.hash === `#${name}`) ?? "create");
}
