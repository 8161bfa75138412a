/** Calls of the gateway's endpoints for this page. */

/** @import { GenerationEvent, Inputs, Models, Settings, SuiteState, Violation } from "./types.d.ts" */

const TOKEN_KEY = "klein-token";
const ANSWER_MS = 15_000;

/** An error that a server answered; the fields that it is about, and what it asks for. */
export class ApiError extends Error {
  /** @param {{status: number, code: string, message: string, violations?: Violation[], retry_after_seconds?: number | null}} answer */
  constructor(answer) {
    super(answer.message);
    /** An HTTP status, also where the error came after the stream's begin. */
    this.status = answer.status;
    this.code = answer.code;
    this.violations = answer.violations ?? [];
    this.retryAfterSeconds = answer.retry_after_seconds ?? null;
  }
}

/** The connection ended before an answer was complete. */
export class ConnectionLost extends Error {}

/** @returns {string} */
export const storedToken = () => sessionStorage.getItem(TOKEN_KEY) ?? "";

/** @param {string} token */
export function storeToken(token) {
  if (token) sessionStorage.setItem(TOKEN_KEY, token);
  else sessionStorage.removeItem(TOKEN_KEY);
}

/** @returns {Promise<Models>} */
export const fetchModels = () => fetchJson("page/api/models");

/** @returns {Promise<SuiteState>} */
export const fetchSuite = () => fetchJson("page/api/suite");

/**
 * Sends a request for pictures and yields its events.
 * @param {Settings} settings
 * @param {Inputs} inputs
 * @param {string} key repetitions with the same key are not carried out twice
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<GenerationEvent>}
 */
export async function* generate(settings, inputs, key, signal) {
  const body = new FormData();
  body.append("settings", JSON.stringify(settings));
  inputs.references.forEach((blob, index) => body.append("references", blob, `reference-${index + 1}`));
  if (inputs.initial_image) body.append("initial_image", inputs.initial_image, "initial");
  if (inputs.initial_image && inputs.mask) body.append("mask", inputs.mask, "mask.png");
  const response = await answered("page/api/generate", {
    method: "POST",
    body,
    headers: { ...headers(), "Idempotency-Key": key },
    signal,
  });
  for await (const { type, data } of serverSentEvents(response)) {
    if (type === "error") throw new ApiError(data);
    yield { type, ...data };
    if (type === "summary") return;
  }
  throw new ConnectionLost("The answer ended before its last picture.");
}

/** @returns {Record<string, string>} */
function headers() {
  const token = storedToken();
  return token ? { Authorization: `Bearer ${token}` } : {};
}

/**
 * @param {string} path
 * @returns {Promise<any>}
 */
async function fetchJson(path) {
  const response = await answered(path, { headers: headers(), signal: AbortSignal.timeout(ANSWER_MS) });
  return response.json();
}

/**
 * Returns a response of status 200.
 * @param {string} path
 * @param {RequestInit} options
 * @returns {Promise<Response>}
 */
async function answered(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted && options.signal.reason?.name !== "TimeoutError") throw error;
    throw new ConnectionLost("The gateway does not answer.", { cause: error });
  }
  if (response.ok) return response;
  let answer = null;
  try {
    answer = (await response.json()).error;
  } catch {
    // A proxy in between answers in its own form; the status is all that is known.
  }
  const { status } = response;
  throw new ApiError({ code: "unknown", message: `The gateway answers with HTTP status ${status}.`, ...answer, status });
}

/**
 * Yields the events of a stream, with their data as objects.
 * @param {Response} response
 * @returns {AsyncGenerator<{type: any, data: any}>}
 */
async function* serverSentEvents(response) {
  if (!response.body) throw new ConnectionLost("The answer is empty.");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new ConnectionLost("The connection to the gateway was lost.", { cause: error });
      });
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop() ?? "";
      for (const part of parts) {
        const type = /^event: (.+)$/m.exec(part)?.[1];
        const data = /^data: (.+)$/m.exec(part)?.[1];
        if (type && data) yield { type, data: JSON.parse(data) };
      }
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}
