/** Short ways to find and make elements. */

/**
 * Returns the element with an id, checked to be of a kind.
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} kind
 * @returns {T}
 */
export function byId(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`The page has no ${kind.name} #${id}.`);
  return found;
}

/**
 * Makes an element. Texts become text nodes, never markup.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, string | boolean | ((event: Event) => void)>} [attributes] a function listens to an event
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/**
 * Presses one of a group of buttons and releases the others.
 * @param {Iterable<Element>} group
 * @param {Element | null} pressed
 */
export function press(group, pressed) {
  for (const each of group) each.setAttribute("aria-pressed", String(each === pressed));
}

/** Object URLs of blobs; each is made once and lives as long as the page needs its blob. */
const urls = new WeakMap();

/**
 * Returns an address of a blob for images and links.
 * @param {Blob} blob
 * @returns {string}
 */
export function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

/**
 * Ends a blob's address; images that show it must be gone.
 * @param {Blob} blob
 */
export function releaseUrl(blob) {
  const url = urls.get(blob);
  if (url) URL.revokeObjectURL(url);
  urls.delete(blob);
}

/**
 * Returns a duration for people.
 * @param {number | null | undefined} seconds
 * @returns {string}
 */
export function durationText(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 60 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds / 60)} min`;
}
