// The settings dialog: what is told to the model, how it chooses its words, and the key. Empty means the server's value.

import { byId, element } from "./dom.js";

// What the server does where neither the person nor the model's card says anything.
const FIELDS = [
  { name: "temperature", label: "Temperature", help: "0 always takes the likeliest word", usual: 1, min: 0, max: 100, step: 0.1 },
  { name: "max_tokens", label: "Most tokens", help: "Length of an answer", usual: "as many as fit", min: 1, step: 1 },
  { name: "top_p", label: "Top p", help: "Likeliest words up to this sum", usual: 1, min: 0, max: 1, step: 0.05 },
  { name: "top_k", label: "Top k", help: "Only the k likeliest; 0 is all", usual: 0, min: 0, step: 1 },
  { name: "min_p", label: "Min p", help: "At least this part of the likeliest", usual: 0, min: 0, max: 1, step: 0.01 },
  { name: "repetition_penalty", label: "Repetition penalty", help: "Above 1 discourages repeats", usual: 1, min: 0, max: 100, step: 0.05 },
  { name: "presence_penalty", label: "Presence penalty", help: "Against words used before", usual: 0, min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency penalty", help: "Grows with each use", usual: 0, min: -2, max: 2, step: 0.1 },
  { name: "seed", label: "Seed", help: "The same seed repeats an answer", usual: "random", min: 0, step: 1 },
];

const dialog = byId("settings");
const stop = byId("s-stop");
const system = byId("system-prompt");
const inputs = {};

let changed = () => {};

/** Build the dialog; `on` has changed({system, sampling}), key(text), exportAll and deleteAll. */
export function start(on) {
  changed = () => {
    mark();
    on.changed(read());
  };
  for (const field of FIELDS) byId("sampling").append(row(field));
  for (const box of [system, stop, ...Object.values(inputs)]) box.addEventListener("change", changed);
  byId("reset-sampling").addEventListener("click", () => {
    write({ system: system.value, sampling: {} });
    changed();
  });
  byId("open-settings").addEventListener("click", () => open());
  byId("close-settings").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
  byId("api-key").addEventListener("change", (event) => on.key(event.target.value));
  byId("export-all").addEventListener("click", on.exportAll);
  byId("delete-all").addEventListener("click", on.deleteAll);
}

function row({ name, label, help, min, max, step }) {
  const id = `s-${name.replaceAll("_", "-")}`;
  const input = element("input", { type: "number", id, min, max, step: "any", inputmode: step === 1 ? "numeric" : "decimal", "aria-describedby": `${id}-help` });
  input.addEventListener("input", () => input.setAttribute("aria-invalid", String(!input.validity.valid)));
  input.addEventListener("keydown", (event) => {
    // The arrows' step is for the hand; any value in the range may be typed.
    if (event.key !== "ArrowUp" && event.key !== "ArrowDown") return;
    event.preventDefault();
    const from = Number(input.value || input.placeholder) || 0;
    const to = from + (event.key === "ArrowUp" ? step : -step);
    input.value = Number(Math.min(max ?? Infinity, Math.max(min, to)).toFixed(4));
    input.dispatchEvent(new Event("change"));
  });
  inputs[name] = input;
  return element("div", {}, element("label", { for: id }, label), input, element("p", { class: "help", id: `${id}-help` }, help));
}

/** Open the dialog, at the API key if that is what is missing. */
export function open(id) {
  if (!dialog.open) dialog.showModal();
  if (id) byId(id).focus();
}

/** The settings as they stand; values out of range are left out. */
function read() {
  const sampling = {};
  for (const [name, input] of Object.entries(inputs)) {
    if (input.value !== "" && input.validity.valid) sampling[name] = Number(input.value);
  }
  const stops = stop.value.split("\n").filter(Boolean);
  if (stops.length) sampling.stop = stops;
  return { system: system.value, sampling };
}

/** Show the settings of a chat. */
export function write({ system: text, sampling }) {
  system.value = text;
  for (const [name, input] of Object.entries(inputs)) {
    input.value = sampling[name] ?? "";
    input.setAttribute("aria-invalid", "false");
  }
  stop.value = (sampling.stop ?? []).join("\n");
  mark();
}

function mark() {
  const { system: text, sampling } = read();
  byId("open-settings").classList.toggle("changed", Boolean(text.trim()) || Object.keys(sampling).length > 0);
}

/** A model in one line. */
export function summary(model) {
  const size = model.num_parameters ? `${inWords(model.num_parameters)} parameters, ` : "";
  return `${model.id} · ${size}${model.max_model_len.toLocaleString("en")} tokens of context`;
}

/** Show what the server does by itself with this model, and what is known of it. */
export function setModel(model) {
  for (const { name, usual } of FIELDS) {
    inputs[name].placeholder = String(model?.sampling_defaults?.[name] ?? usual);
  }
  const facts = !model
    ? [["Name", "none is ready"]]
    : [
        ["Name", model.id],
        ["Parameters", model.num_parameters ? inWords(model.num_parameters) : "not told"],
        ["Context", `${model.max_model_len.toLocaleString("en")} tokens`],
        ["Weights", model.quantization ? `${model.quantization}, else ${model.dtype}` : model.dtype],
        ["Architecture", model.architecture],
      ];
  byId("model-facts").replaceChildren(
    ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]),
  );
}

function inWords(count) {
  if (count >= 1e9) return `${(count / 1e9).toFixed(1)} billion`;
  if (count >= 1e6) return `${Math.round(count / 1e6)} million`;
  return count.toLocaleString("en");
}
