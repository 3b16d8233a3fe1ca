// The list of chats: open, rename, export, delete, search; beside the page, or over it on a phone.

import { byId, confirmed, element, iconButton } from "./dom.js";

const bar = byId("sidebar");
const list = byId("chats");
const search = byId("search");
const scrim = byId("scrim");
const phone = matchMedia("(max-width: 48rem)");

let handlers = {};
let entries = [];
let current = null;

/** Set up; `on` has create, open, rename, export and remove, which take an entry (create takes nothing). */
export function start(on, closed) {
  handlers = on;
  toggle(phone.matches ? false : !closed);
  byId("close-sidebar").addEventListener("click", () => toggle(false, true));
  byId("open-sidebar").addEventListener("click", () => toggle(true, true));
  scrim.addEventListener("click", () => toggle(false));
  phone.addEventListener("change", () => toggle(!phone.matches));
  bar.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && phone.matches) toggle(false, true);
  });
  for (const id of ["new-chat", "new-chat-top"]) {
    byId(id).addEventListener("click", () => {
      closeOnPhone();
      handlers.create();
    });
  }
  search.addEventListener("input", draw);
}

function toggle(open, byHand = false) {
  document.body.classList.toggle("side-closed", !open);
  scrim.hidden = !(open && phone.matches);
  byId("main").inert = open && phone.matches;
  if (!byHand) return;
  byId(open ? "close-sidebar" : "open-sidebar").focus();
  if (!phone.matches) handlers.toggled(!open);
}

function closeOnPhone() {
  if (phone.matches) toggle(false);
}

/** Show these entries, and which of them is open. */
export function show(all, id) {
  entries = all;
  current = id;
  draw();
}

function draw() {
  const wanted = search.value.trim().toLowerCase();
  const found = entries.filter((entry) => entry.title.toLowerCase().includes(wanted));
  list.replaceChildren(...found.map(item));
  search.hidden = entries.length < 2;
  const note = byId("no-chats");
  note.hidden = found.length > 0;
  note.textContent = entries.length ? "No chat has this in its title." : "Chats are kept in this browser only.";
}

function item(entry) {
  const open = element(
    "button",
    {
      type: "button",
      class: "open",
      title: entry.title,
      "aria-current": entry.id === current ? "true" : null,
      onclick: () => {
        closeOnPhone();
        handlers.open(entry);
      },
    },
    entry.title,
  );
  const row = element(
    "li",
    { class: entry.id === current ? "current" : null, "data-id": entry.id },
    open,
    element(
      "span",
      { class: "tools" },
      iconButton("edit", "Rename chat", () => rename(row, entry)),
      iconButton("download", "Export chat as JSON", () => handlers.export(entry)),
      iconButton("trash", "Delete chat", () => remove(entry)),
    ),
  );
  return row;
}

function rename(row, entry) {
  const box = element("input", { type: "text", "aria-label": "Name of the chat", maxlength: "200" });
  box.value = entry.title;
  let open = true;
  const end = (keep) => {
    if (!open) return; // taking the box away makes it lose the focus, too
    open = false;
    const title = box.value.trim();
    if (keep && title && title !== entry.title) handlers.rename(entry, title);
    else draw();
  };
  box.addEventListener("blur", () => end(true));
  box.addEventListener("keydown", (event) => {
    if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
    event.stopPropagation();
    end(event.key === "Enter");
  });
  row.replaceChildren(box);
  box.select();
}

async function remove(entry) {
  if (await confirmed("Delete this chat?", `“${entry.title}” will be gone for good.`)) handlers.remove(entry);
}
