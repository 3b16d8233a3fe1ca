// A chat as data, without a page: a tree of messages, of which one path from the root to the `leaf` is shown.
// Editing a message or answering it again adds a sibling; nothing that was written is lost.
//
// chat     { id, title, created, updated, model, system, sampling, leaf, nodes }
// node     { id, parent, role, text, created, model?, finish?, stats? }
// finish   stop, length; stopped (by the reader), broken (by an error); null while it is written
// stats    { prompt, cached, tokens, first, time }: token counts, milliseconds to the first token and for the rest

/** A random id; `crypto.randomUUID` exists only on localhost and over https. */
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newChat({ model, system, sampling }) {
  const now = Date.now();
  return {
    id: newId(),
    title: "",
    created: now,
    updated: now,
    model,
    system,
    sampling: { ...sampling },
    leaf: null,
    nodes: [],
  };
}

export const nodeOf = (chat, id) => chat.nodes.find((node) => node.id === id);

/** The messages shown, first to last. */
export function path(chat) {
  const found = [];
  for (let node = nodeOf(chat, chat.leaf); node; node = nodeOf(chat, node.parent)) found.unshift(node);
  return found;
}

/** Add a message after `parent` (null: the first) and show it. */
export function add(chat, parent, role, text) {
  const node = { id: newId(), parent, role, text, created: Date.now() };
  if (role === "assistant") Object.assign(node, { model: chat.model, finish: null, stats: null });
  chat.nodes.push(node);
  chat.leaf = node.id;
  chat.updated = node.created;
  if (!chat.title && role === "user") chat.title = titleOf(text);
  return node;
}

/** Take away a message that nothing follows. */
export function dropLeaf(chat, node) {
  chat.nodes = chat.nodes.filter((other) => other !== node);
  if (chat.leaf === node.id) chat.leaf = node.parent;
}

/** All versions of a message, oldest first, itself among them. */
export const versions = (chat, node) => chat.nodes.filter((other) => other.parent === node.parent);

/** Show the latest that was written below a message. */
export function show(chat, node) {
  let last = node;
  for (;;) {
    const next = chat.nodes.findLast((other) => other.parent === last.id);
    if (!next) break;
    last = next;
  }
  chat.leaf = last.id;
}

/** What the server is asked to answer, up to and including `node`. */
export function messages(chat, node) {
  const shown = path(chat);
  const upTo = shown.slice(0, shown.indexOf(node) + 1).filter((each) => each.text || each.role === "user");
  const system = chat.system.trim() ? [{ role: "system", content: chat.system.trim() }] : [];
  return [...system, ...upTo.map(({ role, text }) => ({ role, content: text }))];
}

export function titleOf(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 57).trimEnd()}…` : line || "New chat";
}

/** Chats as they are exported. */
export function exported(chats) {
  return { format: "headrace-chats", version: 1, exported: new Date().toISOString(), chats };
}
