/** A request as code: Python with klein_client, and curl. */

/** @import { Entry, Models } from "./types.d.ts" */

import { byId, press } from "./dom.js";

/**
 * Opens the dialog with an entry's code.
 * @param {Entry} entry
 * @param {number} index of its pictures
 * @param {Models} models
 */
export function showCode(entry, index, models) {
  const dialog = byId("code-dialog", HTMLDialogElement);
  const code = byId("code", HTMLTextAreaElement);
  const python = byId("code-python", HTMLButtonElement);
  const curl = byId("code-curl", HTMLButtonElement);
  const status = byId("copy-status", HTMLElement);
  const files = fileNames(entry);
  byId("code-note", HTMLElement).textContent = files.length
    ? `It reads ${files.join(", ")}: save the pictures that the request uses under these names.`
    : "";
  /** @param {HTMLButtonElement} pressed */
  const choose = (pressed) => {
    press([python, curl], pressed);
    code.value = pressed === python ? pythonCode(entry, index, models.target) : curlCode(entry, index);
    code.scrollTop = 0;
    status.textContent = "";
  };
  python.onclick = () => choose(python);
  curl.onclick = () => choose(curl);
  byId("copy-code", HTMLButtonElement).onclick = async () => {
    try {
      await navigator.clipboard.writeText(code.value);
      status.textContent = "Copied.";
    } catch {
      // Browsers keep the clipboard from pages without TLS.
      code.select();
      status.textContent = "Marked; press Ctrl+C to copy.";
    }
  };
  choose(python);
  dialog.showModal();
}

/** @param {Entry} entry */
function fileNames({ inputs }) {
  const names = inputs.references.map((blob, index) => `reference-${index + 1}.${extensionOf(blob)}`);
  if (inputs.initial_image) names.push(`initial.${extensionOf(inputs.initial_image)}`);
  if (inputs.mask) names.push("mask.png");
  return names;
}

/** @param {Blob} blob */
const extensionOf = (blob) => (blob.type.split("/")[1] ?? "png").replace("jpeg", "jpg");

/** The name of the file into which a picture is saved. @param {Entry} entry @param {number} index */
export function fileName(entry, index) {
  const picture = entry.pictures[index];
  const words = entry.settings.prompt.toLowerCase().match(/[a-z0-9]+/g) ?? ["picture"];
  const format = (picture?.format ?? "png").replace("jpeg", "jpg");
  return `${words.join("-").slice(0, 48)}-${picture?.seed ?? ""}.${format}`;
}

/**
 * Returns a program that makes a picture again.
 * @param {Entry} entry
 * @param {number} index
 * @param {string} target
 */
function pythonCode(entry, index, target) {
  const { settings, inputs } = entry;
  const references = inputs.references.map((blob, number) => `"reference-${number + 1}.${extensionOf(blob)}"`);
  const adapters = settings.adapters.map(({ name, scale }) => `${JSON.stringify(name)}: ${scale}`);
  /** @type {[string, string | number | null][]} */
  const options = [
    ["model", JSON.stringify(entry.summary.model)],
    ["negative_prompt", settings.negative_prompt && JSON.stringify(settings.negative_prompt)],
    ["references", references.length ? `[${references.join(", ")}]` : null],
    ["initial_image", inputs.initial_image && `"initial.${extensionOf(inputs.initial_image)}"`],
    ["mask", inputs.mask && '"mask.png"'],
    ["mask_padding", settings.mask_padding_px],
    ["strength", settings.strength],
    ["width", settings.width_px],
    ["height", settings.height_px],
    ["steps", settings.step_count],
    ["guidance_scale", settings.guidance_scale],
    ["seed", entry.pictures[index]?.seed ?? settings.seed],
    ["format", settings.format === "png" ? null : JSON.stringify(settings.format)],
    ["quality", settings.quality],
    ["adapters", adapters.length ? `{${adapters.join(", ")}}` : null],
  ];
  const given = options.filter(([, value]) => value !== null).map(([name, value]) => `        ${name}=${value},`);
  return [
    "from klein_client import Client",
    "",
    `with Client(${JSON.stringify(target)}) as client:`,
    "    result = client.generate(",
    `        ${JSON.stringify(settings.prompt)},`,
    ...given,
    "    )",
    `result.image.save(${JSON.stringify(fileName(entry, index))})`,
    "",
  ].join("\n");
}

/**
 * Returns a command that makes a picture again.
 * @param {Entry} entry
 * @param {number} index
 */
function curlCode(entry, index) {
  const { settings, inputs } = entry;
  const sent = { ...settings, model: entry.summary.model, seed: entry.pictures[index]?.seed ?? settings.seed, image_count: 1 };
  const given = Object.fromEntries(
    Object.entries(sent).filter(([, value]) => value !== null && !(Array.isArray(value) && !value.length)),
  );
  const parts = [["settings", JSON.stringify(given)]];
  inputs.references.forEach((blob, number) => parts.push(["references", `@reference-${number + 1}.${extensionOf(blob)}`]));
  if (inputs.initial_image) parts.push(["initial_image", `@initial.${extensionOf(inputs.initial_image)}`]);
  if (inputs.mask) parts.push(["mask", "@mask.png"]);
  return [
    `curl -sN ${quoted(new URL("page/api/generate", location.href).href)} \\`,
    ...parts.map(([name, value]) => `  ${name === "settings" ? "--form-string" : "-F"} ${quoted(`${name}=${value}`)} \\`),
    `  | sed -n '/^event: image$/{n;s/^data: //p;}' | jq -r .data | base64 -d > ${quoted(fileName(entry, index))}`,
    "",
  ].join("\n");
}

/** @param {string} text */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
