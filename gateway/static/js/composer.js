// The box in which messages are written: grows with its text, Enter sends, and its button becomes a stop button.

import { byId, fit } from "./dom.js";

const box = byId("prompt");
const send = byId("send");
const stop = byId("stop");

// On a phone's keyboard Enter is the only way to a new line, and the button is at hand.
const touch = matchMedia("(hover: none) and (pointer: coarse)");

let ready = false;
let running = false;

function refresh() {
  send.hidden = running;
  stop.hidden = !running;
  send.disabled = !ready || !box.value.trim();
  fit(box);
}

/** Set up the box; `onSend` gets the text, `onStop` nothing. */
export function start({ onSend, onStop }) {
  const submit = () => {
    const text = box.value.trim();
    if (!text || !ready || running) return;
    box.value = "";
    refresh();
    onSend(text);
  };
  box.addEventListener("input", refresh);
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch.matches) return;
    event.preventDefault();
    submit();
  });
  send.addEventListener("click", submit);
  stop.addEventListener("click", onStop);
  addEventListener("resize", refresh);
  refresh();
}

/** Whether a message can be sent, and whether an answer is being written. */
export function setState(state) {
  const hadFocus = document.activeElement === stop || document.activeElement === send;
  ({ ready = ready, running = running } = state);
  refresh();
  if (hadFocus) (running ? stop : box).focus(); // the button that had the focus is hidden now
}

export function setText(text) {
  box.value = text;
  refresh();
}

export function focus() {
  if (!touch.matches) box.focus();
}
