/** Tab "Suite": processes, totals, caches and the last requests, read every other second while it is shown. */

/** @import { ProcessLoad, SuiteState } from "./types.d.ts" */

import { fetchSuite } from "./api.js";
import { byId, durationText, element } from "./dom.js";
import { sparkline } from "./sparkline.js";
import { showTimeline } from "./timeline.js";

const INTERVAL_MS = 2000;
const MOST_SAMPLES = 60;

export class SuiteView {
  /** @param {(error: unknown) => void} onError */
  constructor(onError) {
    this.onError = onError;
    /** Step times and queue lengths by metrics address, oldest first. @type {Map<string, {steps: number[], queue: number[]}>} */
    this.samples = new Map();
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined;
    document.addEventListener("visibilitychange", () => this.follow(this.isShown));
    this.isShown = false;
  }

  /** Begins or ends to read the state. @param {boolean} shown */
  follow(shown) {
    this.isShown = shown;
    clearTimeout(this.timer);
    if (shown && !document.hidden) this.read();
  }

  async read() {
    const problem = byId("suite-problem", HTMLElement);
    try {
      this.show(await fetchSuite());
      problem.hidden = true;
    } catch (error) {
      problem.textContent = `${error instanceof Error ? error.message : error} Trying again.`;
      problem.hidden = false;
      this.onError(error);
    }
    clearTimeout(this.timer);
    if (this.isShown && !document.hidden) this.timer = setTimeout(() => this.read(), INTERVAL_MS);
  }

  /** @param {SuiteState} state */
  show(state) {
    const totals = {
      "Requests in progress": count(state.in_progress),
      "Images/s": rate(state.images_per_second),
      "Megapixels/s": rate(state.megapixels_per_second),
      "Median time": durationText(state.median_seconds),
      "95 of 100 within": durationText(state.p95_seconds),
      "Cache hits": percent(state.cache_hit_ratio),
    };
    byId("totals", HTMLElement).replaceChildren(
      ...Object.entries(totals).map(([name, value]) =>
        element("div", {}, element("dt", {}, name), element("dd", {}, value)),
      ),
    );
    const addresses = new Set(state.processes.map(({ target }) => target));
    for (const target of this.samples.keys()) if (!addresses.has(target)) this.samples.delete(target);
    byId("processes", HTMLElement).replaceChildren(...state.processes.map((process) => this.process(process)));
    const problem = byId("suite-problem", HTMLElement);
    problem.textContent = state.models_problem;
    problem.hidden = !state.models_problem;
    const rows = byId("caches", HTMLTableElement).tBodies[0];
    rows?.replaceChildren(
      ...state.caches.map((cache) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, cache.kind.replaceAll("_", " ")),
          ...[
            cache.process,
            count(cache.hits),
            count(cache.lookups),
            cache.lookups ? percent(cache.hits / cache.lookups) : "–",
            bytesText(cache.bytes),
            count(cache.evictions),
          ].map((text) => element("td", {}, text)),
        ),
      ),
    );
    showTimeline(state.requests);
  }

  /** @param {ProcessLoad} process */
  process(process) {
    const name = process.stage ?? process.target;
    const state = process.problem ? "gone" : process.serving ? "serving" : "loading";
    const word = { gone: "not reachable", serving: "serving", loading: "not ready" }[state];
    const samples = this.sample(process);
    const isDenoiser = process.stage === "denoiser";
    const values = {
      ...(process.queued === null ? {} : { Queue: count(process.queued) }),
      Running: count(process.running),
      ...(process.busy_ratio === null ? {} : { Busy: percent(process.busy_ratio) }),
      "Requests/s": rate(process.requests_per_second),
      ...(isDenoiser ? { Step: durationText(process.step_seconds) } : {}),
      ...(process.queue_wait_seconds === null ? {} : { Wait: durationText(process.queue_wait_seconds) }),
      ...(process.memory_bytes ? { Memory: bytesText(process.memory_bytes) } : {}),
    };
    return element(
      "li",
      { class: "process", "data-state": state },
      element(
        "div",
        { class: "row between" },
        element("h3", {}, name),
        element("span", { class: "state" }, element("span", { class: "dot", "data-state": state }), word),
      ),
      element(
        "p",
        { class: "hint" },
        process.problem
          ? `${process.target}: ${process.problem}`
          : [process.model, process.device, process.target].filter(Boolean).join(" · "),
      ),
      ...(process.problem
        ? []
        : [
            element(
              "dl",
              {},
              ...Object.entries(values).map(([key, value]) =>
                element("div", {}, element("dt", {}, key), element("dd", {}, value)),
              ),
            ),
            isDenoiser
              ? sparkline(samples.steps, `Time of a step, last ${samples.steps.length} readings`)
              : sparkline(samples.queue, `Requests that wait or run, last ${samples.queue.length} readings`),
          ]),
    );
  }

  /** Adds a reading of a process to its samples. @param {ProcessLoad} process */
  sample(process) {
    const samples = this.samples.get(process.target) ?? { steps: [], queue: [] };
    this.samples.set(process.target, samples);
    if (process.step_seconds !== null) samples.steps.push(process.step_seconds);
    samples.queue.push((process.queued ?? 0) + (process.running ?? 0));
    for (const each of [samples.steps, samples.queue]) if (each.length > MOST_SAMPLES) each.shift();
    return samples;
  }
}

/** @param {number | null} value */
const count = (value) => (value === null ? "–" : value.toLocaleString("en", { maximumFractionDigits: 0 }));
/** @param {number | null} value */
const rate = (value) => (value === null ? "–" : value ? value.toFixed(value < 0.1 ? 3 : 2) : "0");
/** @param {number | null} value */
const percent = (value) => (value === null ? "–" : `${Math.round(value * 100)} %`);
/** @param {number | null} value */
const bytesText = (value) => (value === null ? "–" : `${(value / 1024 / 1024).toFixed(1)} MiB`);
