// The page as a whole: which chat is open, what runs, and what each part does when the others need it.

import { Answer } from "./answer.js";
import * as api from "./api.js";
import { hideError, showError } from "./banner.js";
import * as chats from "./chat.js";
import * as composer from "./composer.js";
import { announce, byId, confirmed, download } from "./dom.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";

const LOOK_AGAIN = 3000; // milliseconds until the server is asked again for a model
const NO_KEY = "invalid_api_key";

let served = []; // all models, those that only read texts included
let models = [];
let entries = [];
let chat = null; // the open one; null until the first message of a new one is sent
let defaults = { model: "", system: "", sampling: {} }; // what a new chat begins with
let problem = null; // the error that was met when the server was last asked for its models
let timer = 0;

const running = new Map(); // chat id -> the Answer that is being written there
const deleted = new Set(); // ids of chats that must not be written again by an answer that ends late

const thread = new Thread({
  scroller: byId("scroller"),
  list: byId("messages"),
  jump: byId("jump"),
  welcome: byId("welcome"),
  actions: {
    send: idle((node) => answer(chat, chats.add(chat, node.id, "assistant", ""))),
    regenerate: idle((node) => answer(chat, chats.add(chat, node.parent, "assistant", ""))),
    resume: idle((node) => answer(chat, node)),
    edit: idle((node, text) => say(text, node.parent)),
    select: idle((node) => {
      chats.show(chat, node);
      refresh();
      save(chat);
    }),
  },
});

// ------------------------------------------------------------------------------------------------------- talking

/** An action that changes which messages there are; not while one of them is being written. */
function idle(act) {
  return (...given) => {
    if (!running.has(chat.id)) act(...given);
  };
}

function say(text, parent = chat?.leaf ?? null) {
  if (!chat) {
    chat = chats.newChat(defaults);
    history.pushState(null, "", `#${chat.id}`);
  }
  const asked = chats.add(chat, parent, "user", text);
  answer(chat, chats.add(chat, asked.id, "assistant", ""));
}

/** Let the model write `node`; what it holds already is continued. */
async function answer(where, node) {
  if (running.has(where.id)) return;
  const resumed = node.text !== "";
  const request = {
    model: where.model,
    messages: chats.messages(where, resumed ? node : chats.nodeOf(where, node.parent)),
    ...where.sampling,
    ...(resumed && { continue_final_message: true, add_generation_prompt: false }),
  };
  const draw = () => {
    const view = where === chat && thread.view(node);
    if (!view) return;
    view.drawText(true);
    view.drawStats();
  };
  const run = new Answer({ chat: where, node, request, draw, save: () => save(where) });
  running.set(where.id, run);
  hideError();
  refresh();
  thread.follow();
  announce("The model is answering");
  save(where);
  try {
    await run.run();
    announce(node.finish === "stopped" ? "Stopped" : "The answer is complete");
  } catch (error) {
    failed(where, node, error);
  }
  running.delete(where.id);
  if (!node.text && ["broken", "stopped"].includes(node.finish)) chats.dropLeaf(where, node);
  if (where === chat) refresh();
  save(where);
}

function stop() {
  if (chat) running.get(chat.id)?.stop();
}

function failed(where, node, error) {
  const again = () => {
    if (where !== chat) return;
    if (node.text) answer(where, node);
    else answer(where, chats.add(where, node.parent, "assistant", ""));
  };
  const actions = [[node.text ? "Continue" : "Try again", again]];
  if (error.code === NO_KEY) actions.unshift(["Enter key", () => settings.open("api-key")]);
  else if (error.param && error.param in where.sampling) actions.unshift(["Settings", () => settings.open()]);
  else if (error.code === "model_not_found") lookForModels();
  showError(where === chat ? error.message : `${where.title}: ${error.message}`, actions);
}

// --------------------------------------------------------------------------------------------------------- chats

/** Draw what is open. */
function refresh() {
  const run = chat && running.get(chat.id);
  thread.show(chat, run?.node);
  composer.setState({ ready: models.length > 0, running: Boolean(run) });
  sidebar.show(entries, chat?.id);
  document.title = chat?.title ? `${chat.title} · Headrace` : "Headrace";
}

async function save(where) {
  if (deleted.has(where.id)) return;
  try {
    await store.save(where);
    await list();
  } catch (error) {
    showError(`This browser could not keep the chat (${error.message}). Export it if you need it.`, [
      ["Export", () => download("headrace-chat.json", chats.exported([where]))],
    ]);
  }
}

async function list() {
  entries = await store.list();
  sidebar.show(entries, chat?.id);
}

function shown() {
  hideError();
  settings.write(chat ?? defaults);
  offerModels();
  refresh();
  thread.follow();
  composer.focus();
}

/** Open the chat that the address names; a new one if it names none. */
async function openNamed() {
  const id = location.hash.slice(1);
  if (chat?.id === id) return;
  const found = id ? (running.get(id)?.chat ?? (await store.load(id))) : null;
  if (location.hash.slice(1) !== id) return; // another one was chosen meanwhile
  chat = found;
  for (const node of chat?.nodes ?? []) {
    // The page was closed while this was written.
    if (node.finish === null && running.get(id)?.node !== node) node.finish = "broken";
  }
  shown();
}

function open(id) {
  if (location.hash.slice(1) === id) composer.focus();
  else history.pushState(null, "", id ? `#${id}` : location.pathname);
  openNamed();
}

async function rename(entry, title) {
  for (const each of [chat, running.get(entry.id)?.chat]) {
    if (each?.id === entry.id) each.title = title;
  }
  await store.rename(entry.id, title);
  await list();
  refresh();
}

async function remove(gone) {
  for (const { id } of gone) {
    running.get(id)?.stop();
    deleted.add(id);
    await store.remove(id);
    if (chat?.id === id) open("");
  }
  await list();
}

async function exportChats(wanted) {
  const found = await Promise.all(wanted.map(({ id }) => running.get(id)?.chat ?? store.load(id)));
  const one = wanted.length === 1 ? `-${wanted[0].title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}` : "s";
  download(`headrace-chat${one}.json`, chats.exported(found.filter(Boolean)));
}

// -------------------------------------------------------------------------------------------------------- models

/** Ask for the models until there are some; what is wrong is told once, and again if a person asked. */
async function lookForModels(byItself = false) {
  clearTimeout(timer);
  try {
    served = await api.models();
    models = served.filter((model) => model.tasks.includes("generate"));
    if (problem) hideError();
    problem = null;
  } catch (error) {
    served = models = [];
    const known = byItself && error.message === problem?.message;
    problem = error;
    if (!known) {
      const key = ["Enter key", () => settings.open("api-key")];
      showError(error.message, [error.code === NO_KEY ? key : ["Try again", () => lookForModels()]]);
    }
  }
  offerModels();
  refresh();
  if (!models.length && problem?.code !== NO_KEY) timer = setTimeout(() => lookForModels(true), LOOK_AGAIN);
}

/** Fill the picker, and see to it that the chat's model is one that is served. */
function offerModels() {
  const picker = byId("model");
  const names = models.map((model) => model.id);
  const owner = chat ?? defaults;
  if (names.length && !names.includes(owner.model)) owner.model = names[0];
  const locked = problem?.code === NO_KEY;
  const none = locked ? "Locked" : served.length ? "No chat model" : "Waiting for a model …";
  picker.replaceChildren(...(names.length ? names : [none]).map((name) => new Option(name, name)));
  picker.disabled = !names.length;
  if (names.length) picker.value = owner.model;
  const model = models.find(({ id }) => id === owner.model);
  settings.setModel(model);
  byId("welcome-note").textContent = model
    ? settings.summary(model)
    : locked
      ? "This server asks for an API key."
      : served.length
        ? "The model that is served reads texts and does not write any; programs ask it at /v1/embeddings."
        : "No model is ready yet; this page looks again every few seconds.";
}

/** Settings belong to the open chat, and are what the next new one begins with. */
function change(values) {
  Object.assign(defaults, values);
  if (chat) {
    Object.assign(chat, values);
    save(chat);
  }
  store.keepSetting("defaults", defaults);
}

// --------------------------------------------------------------------------------------------------------- start

function listen() {
  composer.start({ onSend: (text) => say(text), onStop: stop });
  settings.start({
    changed: change,
    key: (key) => {
      api.setKey(key);
      lookForModels();
    },
    exportAll: () => exportChats(entries),
    deleteAll: async () => {
      if (await confirmed("Delete all chats?", `${entries.length} chats will be gone for good.`)) await remove(entries);
    },
  });
  byId("model").addEventListener("change", (event) => {
    change({ model: event.target.value });
    offerModels();
  });
  for (const button of byId("suggestions").querySelectorAll("button")) {
    button.addEventListener("click", () => {
      composer.setText(button.textContent);
      byId("prompt").focus();
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) stop();
  });
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address names a chat
    byId("prompt").focus();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) list(); // another tab may have written
  });
  addEventListener("popstate", openNamed);
  addEventListener("hashchange", openNamed);
}

async function start() {
  await store.open();
  defaults = { ...defaults, ...(await store.setting("defaults", {})) };
  sidebar.start(
    {
      create: () => open(""),
      open: (entry) => open(entry.id),
      rename,
      export: (entry) => exportChats([entry]),
      remove: (entry) => remove([entry]),
      toggled: (closed) => store.keepSetting("side-closed", closed),
    },
    await store.setting("side-closed", false),
  );
  listen();
  await list();
  await openNamed();
  lookForModels();
  byId("version").textContent = `Headrace ${await api.version().catch(() => "")}`;
}

start();
