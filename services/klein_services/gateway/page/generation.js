/** Life of a request in the page: sent, followed, repeated when the suite comes back. */

/** @import { GenerationEvent, Inputs, Settings } from "./types.d.ts" */

import { ApiError, ConnectionLost, fetchModels, generate } from "./api.js";

const MOST_REPETITIONS = 2;
const WAIT_MS = 5 * 60_000;
const POLL_MS = 1000;
/** Codes of errors of a stage or an orchestrator that is gone and may come back. */
const LOSSES = ["stage_unavailable", "unavailable", "cancelled"];

/**
 * Yields the events of a request. When the gateway or a stage is lost, waits until the model serves again and sends the
 * same request once more: the same seed makes the same picture.
 * @param {Settings} settings
 * @param {Inputs} inputs
 * @param {AbortSignal} signal
 * @param {(reason: string) => void} onWait called when a wait begins
 * @returns {AsyncGenerator<GenerationEvent>}
 */
export async function* run(settings, inputs, signal, onWait) {
  const key = randomKey();
  for (let repetition = 0; ; repetition++) {
    try {
      yield* generate(settings, inputs, key, signal);
      return;
    } catch (error) {
      if (!isLoss(error) || repetition >= MOST_REPETITIONS) throw error;
      onWait(error.message);
      if (!(await serves(settings.model, signal))) throw error;
    }
  }
}

/**
 * @param {unknown} error
 * @returns {error is ApiError | ConnectionLost}
 */
const isLoss = (error) =>
  error instanceof ConnectionLost || (error instanceof ApiError && LOSSES.includes(error.code));

/**
 * Waits until a model serves; returns whether it does.
 * @param {string} model
 * @param {AbortSignal} signal
 */
async function serves(model, signal) {
  const end = Date.now() + WAIT_MS;
  while (Date.now() < end) {
    await new Promise((resolve) => {
      setTimeout(resolve, POLL_MS);
      signal.addEventListener("abort", resolve, { once: true });
    });
    signal.throwIfAborted();
    try {
      const { models, default_model } = await fetchModels();
      if (models.some(({ name, serving }) => serving && name === (model || default_model))) return true;
    } catch (error) {
      if (!(error instanceof ConnectionLost) && !(error instanceof ApiError && error.status >= 500)) throw error;
    }
  }
  return false;
}

/** Returns 128 random bits; `crypto.randomUUID` is missing on pages without TLS. */
export function randomKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Returns the file that base64 stands for.
 * @param {string} data
 * @param {string} format
 */
export function blobOf(data, format) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format}` });
}
