/** The model's description, as words that a click adds to the prompt. */

/** @import { Model } from "./types.d.ts" */

import { byId, element } from "./dom.js";

const MOST_SUBJECTS = 24;
const LIST = /^([A-Z][a-z ]+): (.+)$/;

/**
 * Returns the lists in a description: sentences of the form "Shapes: circle, square, star." Longer items are prose.
 * @param {Model} model
 * @returns {{groups: {title: string, words: string[]}[], text: string}}
 */
export function wordsOf(model) {
  const groups = [];
  const text = [];
  for (const sentence of model.description.split(/(?<=\.)\s+/)) {
    const [, title, list] = LIST.exec(sentence.replace(/\.$/, "")) ?? [];
    const words = list?.split(", ") ?? [];
    if (title && words.length > 2 && words.every((word) => word.split(" ").length <= 2)) groups.push({ title, words });
    else text.push(sentence);
  }
  if (!groups.length && model.subject_words.length) {
    groups.push({ title: "Subjects", words: model.subject_words.slice(0, MOST_SUBJECTS) });
  }
  return { groups, text: text.join(" ") };
}

/**
 * Shows the words of a model; hides the section when it has none.
 * @param {Model} model
 */
export function showWords(model) {
  const { groups, text } = wordsOf(model);
  byId("words", HTMLDetailsElement).hidden = !groups.length && !text;
  byId("words-title", HTMLElement).textContent = `Words that ${model.name} knows`;
  byId("about", HTMLDetailsElement).hidden = !text;
  byId("description", HTMLElement).textContent = text;
  byId("word-groups", HTMLElement).replaceChildren(
    ...groups.map(({ title, words }) =>
      element(
        "div",
        { class: "word-group" },
        element("h3", {}, title),
        element(
          "div",
          { class: "chips", role: "group", "aria-label": title },
          ...words.map((word) => element("button", { type: "button", click: () => insertWord(word) }, word)),
        ),
      ),
    ),
  );
}

/**
 * Puts a word at the caret of the prompt, with spaces around it.
 * @param {string} word
 */
function insertWord(word) {
  const prompt = byId("prompt", HTMLTextAreaElement);
  const before = prompt.value.slice(0, prompt.selectionStart);
  const after = prompt.value.slice(prompt.selectionEnd);
  const text = `${before && !/\s$/.test(before) ? " " : ""}${word}${after && !/^[\s.,]/.test(after) ? " " : ""}`;
  prompt.setRangeText(text, prompt.selectionStart, prompt.selectionEnd, "end");
  prompt.dispatchEvent(new Event("input", { bubbles: true }));
}
