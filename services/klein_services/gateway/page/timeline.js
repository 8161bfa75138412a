/** The last requests as bars from their arrival to their end: wait, encode, denoise, decode. */

/** @import { RecentRequest } from "./types.d.ts" */

import { byId, durationText, element } from "./dom.js";

/** @param {RecentRequest[]} requests newest first */
export function showTimeline(requests) {
  const longest = Math.max(...requests.map(({ total_seconds }) => total_seconds), 0.001);
  byId("timeline", HTMLElement).replaceChildren(
    ...requests.map((request) => {
      const bar = element("div", { class: "bar", "aria-hidden": "true" });
      for (const { phase, start_seconds, end_seconds } of request.phases) {
        const part = element("span", { "data-phase": phase });
        part.style.left = `${(start_seconds / longest) * 100}%`;
        part.style.width = `${(Math.max(end_seconds - start_seconds, 0) / longest) * 100}%`;
        bar.append(part);
      }
      for (const at of request.steps) {
        const mark = element("i", {});
        mark.style.left = `${(at / longest) * 100}%`;
        bar.append(mark);
      }
      const parts = request.phases
        .map(({ phase, start_seconds, end_seconds }) => `${phase} ${durationText(end_seconds - start_seconds)}`)
        .join(", ");
      const isGood = request.outcome === "succeeded";
      return element(
        "li",
        { "data-outcome": request.outcome },
        element("span", { class: "when" }, `${durationText(request.age_seconds)} ago`),
        element("span", { class: "flow" }, isGood ? request.flow : `${request.flow || request.model} ${request.outcome}`),
        bar,
        element("span", { class: "took" }, durationText(request.total_seconds)),
        element("span", { class: "hidden-title" }, `: ${parts}`),
      );
    }),
  );
  byId("timeline-hint", HTMLElement).textContent = requests.length
    ? `Your requests through this gateway; the longest bar is ${durationText(longest)}. Marks are steps.`
    : "Requests through this gateway appear here once there are some.";
}
