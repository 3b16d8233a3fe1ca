// Chats in the browser's IndexedDB: a small entry of each for the list, its messages beside it, and the last settings.
// Where the browser allows no database (private windows of some), all of it lives until the tab is closed.

const NAME = "headrace";
const VERSION = 1;
const STORES = ["entries", "bodies", "settings"];

let database = null;
const memory = Object.fromEntries(STORES.map((name) => [name, new Map()]));

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Open the database; false if chats will not outlive this tab. */
export async function open() {
  try {
    const request = indexedDB.open(NAME, VERSION);
    request.onupgradeneeded = () => STORES.forEach((name) => request.result.createObjectStore(name));
    database = await done(request);
    database.onversionchange = () => database.close(); // another tab has a newer page
  } catch {
    database = null;
  }
  return database !== null;
}

async function get(store, id) {
  if (!database) return structuredClone(memory[store].get(id));
  return done(database.transaction(store).objectStore(store).get(id));
}

async function all(store) {
  if (!database) return [...memory[store].values()];
  return done(database.transaction(store).objectStore(store).getAll());
}

/** Write or delete (undefined) several values at once: all of them or none. */
async function change(values) {
  if (!database) {
    for (const [store, id, value] of values) {
      if (value === undefined) memory[store].delete(id);
      else memory[store].set(id, structuredClone(value));
    }
    return;
  }
  const stores = [...new Set(values.map(([store]) => store))];
  const transaction = database.transaction(stores, "readwrite");
  for (const [store, id, value] of values) {
    if (value === undefined) transaction.objectStore(store).delete(id);
    else transaction.objectStore(store).put(value, id);
  }
  await new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
  });
}

/** The list of chats: id, title and times, the latest first. */
export async function list() {
  return (await all("entries")).sort((a, b) => b.updated - a.updated);
}

export async function load(id) {
  const [entry, body] = await Promise.all([get("entries", id), get("bodies", id)]);
  return entry && body ? { ...entry, ...body } : null;
}

export async function save(chat) {
  const { id, title, created, updated, ...body } = chat;
  await change([
    ["entries", id, { id, title, created, updated }],
    ["bodies", id, body],
  ]);
}

/** Change only the title; the messages may be open elsewhere. */
export async function rename(id, title) {
  const entry = await get("entries", id);
  if (entry) await change([["entries", id, { ...entry, title }]]);
}

export async function remove(id) {
  await change([
    ["entries", id, undefined],
    ["bodies", id, undefined],
  ]);
}

export async function setting(name, otherwise) {
  return (await get("settings", name)) ?? otherwise;
}

export async function keepSetting(name, value) {
  await change([["settings", name, value]]);
}
