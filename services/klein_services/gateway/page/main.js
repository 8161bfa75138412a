/** The page: connects form, pictures, requests, history and tabs. */

/** @import { Entry, GenerationEvent, ImageEvent, Picture, Summary } from "./types.d.ts" */

import { ApiError, fetchModels, storedToken, storeToken } from "./api.js";
import { Board } from "./board.js";
import { byId, durationText, element, releaseUrl, urlOf } from "./dom.js";
import { Form } from "./form.js";
import { blobOf, randomKey, run } from "./generation.js";
import { HistoryStore } from "./history_store.js";
import { showHistory } from "./history_view.js";
import { InputTray } from "./inputs.js";
import { hideProblem, showProblem } from "./problem.js";
import { fileName, showCode } from "./snippets.js";
import { SuiteView } from "./suite.js";
import { startTabs } from "./tabs.js";
import { showWords } from "./words.js";

const HEALTH_MS = 5000;
const TYPING_MS = 180;
const MOST_COMPARED = 8;

const button = (/** @type {string} */ id) => byId(id, HTMLButtonElement);
const status = (/** @type {string} */ text) => (byId("status", HTMLElement).textContent = text);

const store = await HistoryStore.open();
const board = new Board();
const form = new Form(() => {
  const { model } = form;
  tray.model = model;
  if (model) showWords(model);
});
const tray = new InputTray(() => {
  form.hasReferences = tray.value.references.length > 0;
  form.hasInitialImage = tray.value.initial_image !== null;
  form.showLimits();
});
const suite = new SuiteView(noticeToken);

/** The request in progress. @type {AbortController | null} */
let running = null;
/** What the board shows, kept in the history or not. @type {Entry | null} */
let shown = null;
let shownIndex = 0;
/** @type {ReturnType<typeof setTimeout> | undefined} */
let typing;

// --- requests

/**
 * Makes the pictures that the form describes; ends the request before it.
 * @param {{follows: boolean}} options whether the request follows the prompt while it is typed
 */
async function start({ follows }) {
  const abort = new AbortController();
  running?.abort();
  running = abort;
  clearTimeout(typing);
  form.clearErrors();
  hideProblem();
  if (!form.isSeedLocked) form.newSeed();
  const settings = { ...form.settings(), ...(follows ? { image_count: 1 } : {}) };
  const inputs = { ...tray.value, references: [...tray.value.references] };
  /** @type {Picture[]} */
  const pictures = [];
  setBusy(true, follows);
  status("Sent.");
  if (!follows && matchMedia("(max-width: 900px)").matches) byId("board", HTMLElement).scrollIntoView({ block: "nearest" });
  try {
    for await (const event of run(settings, inputs, abort.signal, (reason) => status(`${reason} Waiting for the suite.`))) {
      if (abort.signal.aborted) return;
      const summary = follow(event, pictures);
      if (summary) await finish({ id: randomKey(), at: Date.now(), settings, inputs, pictures, summary }, follows);
    }
  } catch (error) {
    if (abort.signal.aborted) return;
    fail(error);
  } finally {
    if (running === abort) {
      running = null;
      setBusy(false, false);
    }
  }
}

/**
 * Shows an event of the request in progress; returns its summary when that is it.
 * @param {GenerationEvent} event
 * @param {Picture[]} pictures
 * @returns {Summary | null}
 */
function follow(event, pictures) {
  const progress = byId("progress", HTMLProgressElement);
  if (event.type === "queued") {
    const wait = event.estimated_wait_seconds === null ? "" : `, about ${durationText(event.estimated_wait_seconds)}`;
    if (event.position) status(`Waiting: ${event.position} ahead${wait}.`);
  } else if (event.type === "step") {
    progress.max = event.step_count;
    progress.value = event.step;
    status(`Step ${event.step} of ${event.step_count}`);
  } else if (event.type === "preview") {
    board.showPreview(blobOf(event.data, event.format), event.step);
  } else if (event.type === "image") {
    const picture = pictureOf(event);
    pictures[event.index] = picture;
    if (event.index === 0) board.showPicture(picture.blob, "The finished picture");
  } else {
    return event;
  }
  return null;
}

/** @param {ImageEvent} event @returns {Picture} */
const pictureOf = ({ data, seed, width_px, height_px, format }) => ({
  blob: blobOf(data, format),
  seed,
  width_px,
  height_px,
  format,
});

/**
 * Shows a finished request; one that followed the typing is kept only when that is asked for.
 * @param {Entry} entry
 * @param {boolean} follows
 */
async function finish(entry, follows) {
  const count = entry.pictures.length;
  const forget = shown && !store.entries.includes(shown) ? shown : null;
  show(entry, 0);
  if (forget) release(forget);
  status(`${count === 1 ? "Done" : `${count} pictures done`} in ${durationText(entry.summary.total_seconds)}.`);
  if (!follows) await keep(entry);
}

/** @param {unknown} error */
function fail(error) {
  status("");
  noticeToken(error);
  showProblem(error, () => start({ follows: false }));
  if (error instanceof ApiError) form.showViolations(error.violations);
  if (shown) show(shown, shownIndex);
  else board.clear();
}

function cancel() {
  if (!running) return;
  running.abort();
  running = null;
  setBusy(false, false);
  status("Cancelled.");
  if (shown) show(shown, shownIndex);
  else board.clear();
}

/** @param {boolean} busy @param {boolean} follows */
function setBusy(busy, follows) {
  const hadFocus = document.activeElement === button("cancel");
  button("cancel").hidden = !busy;
  if (hadFocus && !busy) button("generate").focus();
  byId("progress", HTMLProgressElement).hidden = !busy;
  byId("progress", HTMLProgressElement).value = 0;
  board.setBusy(busy);
  if (busy && !follows) board.compareWith(null, "");
}

// --- what the board shows

/** @param {Entry} entry @param {number} index */
function show(entry, index) {
  const picture = entry.pictures[index];
  if (!picture) return;
  shown = entry;
  shownIndex = index;
  board.showPicture(picture.blob, entry.settings.prompt || "The picture");
  const isKept = store.entries.includes(entry);
  byId("toolbar", HTMLElement).hidden = false;
  button("keep").hidden = isKept;
  button("delete").hidden = !isKept;
  const download = byId("download", HTMLAnchorElement);
  download.href = urlOf(picture.blob);
  download.download = fileName(entry, index);
  byId("facts", HTMLElement).textContent =
    `${picture.width_px} × ${picture.height_px} · seed ${picture.seed} · ${entry.summary.step_count} steps · ${entry.summary.model}`;
  byId("warnings", HTMLElement).textContent = entry.summary.warnings.join(" ");
  const batch = byId("batch", HTMLUListElement);
  batch.hidden = entry.pictures.length < 2;
  batch.replaceChildren(
    ...(batch.hidden ? [] : entry.pictures).map((each, number) =>
      element(
        "li",
        {},
        element(
          "button",
          { type: "button", "aria-current": String(number === index), "aria-label": `Picture ${number + 1}, seed ${each.seed}`, click: () => show(entry, number) },
          element("img", { src: urlOf(each.blob), alt: "" }),
        ),
      ),
    ),
  );
  showCompared();
  refreshHistory();
}

/** Offers what the picture can be compared with: its own inputs, then other pictures. */
function showCompared() {
  if (!shown) return;
  const { inputs } = shown;
  /** @type {[string, Blob][]} */
  const choices = inputs.references.map((blob, index) => [`Reference ${index + 1}`, blob]);
  if (inputs.initial_image) choices.unshift(["Picture before", inputs.initial_image]);
  for (const other of store.entries.filter((each) => each !== shown).slice(0, MOST_COMPARED)) {
    const picture = other.pictures[0];
    if (picture) choices.push([`${other.settings.prompt.slice(0, 40) || "no prompt"}`, picture.blob]);
  }
  const select = byId("compare", HTMLSelectElement);
  byId("compare-field", HTMLElement).hidden = !choices.length;
  select.replaceChildren(
    element("option", { value: "" }, "nothing"),
    ...choices.map(([name], index) => element("option", { value: String(index) }, name)),
  );
  select.onchange = () => {
    const [name, blob] = choices[Number(select.value)] ?? [];
    board.compareWith(select.value && blob ? blob : null, name ?? "");
  };
}

// --- history

/** @param {Entry} entry */
async function keep(entry) {
  for (const each of await store.add(entry)) release(each);
  if (shown === entry) show(entry, shownIndex);
  else refreshHistory();
}

const refreshHistory = () => showHistory(store.entries, shown, store.isKept, (entry) => show(entry, 0));

/** Frees the pictures of an entry that nothing shows any more. @param {Entry} entry */
function release(entry) {
  const used = new Set([...store.entries, ...(shown ? [shown] : [])].flatMap(({ pictures }) => pictures.map(({ blob }) => blob)));
  const inUse = [...tray.value.references, tray.value.initial_image];
  for (const { blob } of entry.pictures) if (!used.has(blob) && !inUse.includes(blob)) releaseUrl(blob);
}

async function deleteShown() {
  if (!shown) return;
  const entry = shown;
  await store.remove(entry);
  const next = store.entries[0] ?? null;
  if (next) show(next, 0);
  else clearBoard();
  release(entry);
  status("Deleted.");
}

function clearBoard() {
  shown = null;
  board.clear();
  byId("toolbar", HTMLElement).hidden = true;
  byId("batch", HTMLUListElement).hidden = true;
  byId("facts", HTMLElement).textContent = byId("warnings", HTMLElement).textContent = "";
  refreshHistory();
}

// --- state of the suite

async function readHealth() {
  const dot = document.querySelector("#health .dot");
  const text = byId("health-text", HTMLElement);
  let state = "serving";
  let words = "";
  try {
    form.setModels(await fetchModels());
    byId("token-form", HTMLFormElement).hidden = true;
    const { model } = form;
    const problem = model?.stages.find((stage) => stage.problem)?.problem;
    if (!model) [state, words] = ["gone", "no model"];
    else if (!model.serving) [state, words] = ["loading", `${model.name}: ${problem || "not ready"}`];
    else words = `${model.name} is ready`;
  } catch (error) {
    noticeToken(error);
    state = "gone";
    words = error instanceof ApiError && error.status === 401 ? "token needed" : "the suite does not answer";
  }
  if (dot instanceof HTMLElement) dot.dataset.state = state;
  if (text.textContent !== words) text.textContent = words;
}

async function followHealth() {
  if (!document.hidden) await readHealth();
  setTimeout(followHealth, HEALTH_MS);
}

/** Shows the field for a token when the suite asks for one. @param {unknown} error */
function noticeToken(error) {
  if (!(error instanceof ApiError) || error.status !== 401) return;
  const tokenForm = byId("token-form", HTMLFormElement);
  byId("token-hint", HTMLElement).textContent = storedToken()
    ? "The suite does not take this token. Enter another one."
    : "This suite asks for one. It stays in this tab and is forgotten when the tab closes.";
  if (!tokenForm.hidden) return;
  tokenForm.hidden = false;
  byId("token", HTMLInputElement).focus();
}

// --- events

byId("form", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  start({ follows: false });
});
byId("prompt", HTMLTextAreaElement).addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  start({ follows: false });
});
byId("form", HTMLFormElement).addEventListener("input", (event) => {
  const scrub = byId("scrub", HTMLInputElement);
  if (event.target === scrub && scrub.checked) form.lockSeed(true);
  if (!scrub.checked || (event.target === scrub && !form.settings().prompt)) return;
  clearTimeout(typing);
  typing = setTimeout(() => start({ follows: true }), TYPING_MS);
});
button("cancel").addEventListener("click", cancel);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) cancel();
});
button("as-reference").addEventListener("click", () => {
  const picture = shown?.pictures[shownIndex];
  if (picture) tray.add([picture.blob]);
  status("The picture is a reference now. Describe the change in the prompt.");
});
button("as-initial").addEventListener("click", () => {
  const picture = shown?.pictures[shownIndex];
  if (picture) tray.paint(picture.blob);
});
button("use-settings").addEventListener("click", () => {
  if (!shown) return;
  tray.set(shown.inputs);
  form.fill(shown.settings);
  status("The form has the settings of this picture.");
});
button("show-code").addEventListener("click", () => {
  if (shown) showCode(shown, shownIndex, form.models);
});
button("keep").addEventListener("click", () => {
  if (shown) keep(shown);
});
button("delete").addEventListener("click", deleteShown);
button("clear-history").addEventListener("click", async () => {
  if (!confirm("Delete all pictures of the history?")) return;
  const entries = store.entries;
  await store.clear();
  clearBoard();
  entries.forEach(release);
});
byId("token-form", HTMLFormElement).addEventListener("submit", async (event) => {
  event.preventDefault();
  storeToken(byId("token", HTMLInputElement).value.trim());
  byId("token", HTMLInputElement).value = "";
  await readHealth();
});

startTabs((name) => suite.follow(name === "suite"));
refreshHistory();
const newest = store.entries[0];
if (newest) show(newest, 0);
followHealth();
