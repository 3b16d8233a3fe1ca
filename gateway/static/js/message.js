// One message on the page: its text, and below it what can be done with it and how it was made.

import { versions } from "./chat.js";
import { copy, element, fit, iconButton } from "./dom.js";
import { Markdown } from "./markdown.js";

const ENDS = {
  length: "Stopped at the token limit",
  stopped: "Stopped",
  broken: "Interrupted",
};

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** How an answer was made, in words. */
export function statsText(stats) {
  if (!stats) return "";
  const parts = [`${number.format(stats.tokens)} ${stats.tokens === 1 ? "token" : "tokens"}`];
  // The first token's time is the prompt's; the speed is that of the others.
  if (stats.tokens > 1 && stats.time > 0) parts.push(`${number.format(((stats.tokens - 1) * 1000) / stats.time)} tok/s`);
  if (stats.first) parts.push(`first in ${(stats.first / 1000).toFixed(2)} s`);
  if (stats.prompt) {
    const cached = stats.cached ? ` (${number.format(stats.cached)} cached)` : "";
    parts.push(`prompt ${number.format(stats.prompt)}${cached}`);
  }
  return parts.join(" · ");
}

/** The reasoning that some models write before their answer, apart from it. */
function split(text) {
  const found = text.match(/^\s*<think>([\s\S]*?)(?:<\/think>\s*|$)/);
  if (!found) return { thinking: "", answer: text, thought: true };
  return { thinking: found[1].trim(), answer: text.slice(found[0].length), thought: found[0].includes("</think>") };
}

/**
 * Args: the chat and the node; `actions` are regenerate, resume, edit, send, select (all take the node).
 */
export class Message {
  constructor(chat, node, actions) {
    this.chat = chat;
    this.node = node;
    this.actions = actions;
    this.user = node.role === "user";
    this.body = element("div", { class: "body" });
    this.foot = element("div", { class: "foot" });
    this.element = element(
      "article",
      { class: `message ${this.user ? "user" : "assistant"}`, "data-role": node.role, "data-id": node.id },
      element("span", { class: "unseen" }, this.user ? "You said:" : "The model answered:"),
      this.body,
      this.foot,
    );
    if (!this.user) this.markdown = new Markdown(element("div", { class: "answer" }));
  }

  /** Draw all of it; `running` while the answer is written, `last` if nothing follows it. */
  draw({ running, last }) {
    this.element.setAttribute("aria-busy", String(running));
    if (this.user) this.#drawUser(last && !running);
    else this.drawText(running);
    this.foot.replaceChildren(...this.#notes(running), ...this.#versions(running), ...this.#tools(running, last));
  }

  /** Draw only the text; called many times a second. */
  drawText(running) {
    const { thinking, answer, thought } = split(this.node.text);
    if (this.markdown.root.parentElement !== this.body) this.body.replaceChildren(this.markdown.root);
    this.#drawThinking(thinking, !thought && running);
    this.markdown.update(answer, !running);
    this.#drawWaiting(running && !answer && !thinking);
  }

  drawStats() {
    const shown = this.foot.querySelector(".stats");
    if (shown) shown.textContent = statsText(this.node.stats);
  }

  #drawThinking(text, open) {
    if (!text) {
      this.thinking?.remove();
      this.thinking = null;
      return;
    }
    if (!this.thinking) {
      const root = element("div");
      this.thoughts = new Markdown(root);
      this.thinking = element("details", { class: "thinking" }, element("summary"), root);
      this.body.prepend(this.thinking);
    }
    this.thinking.firstChild.textContent = open ? "Thinking …" : "Thoughts";
    this.thoughts.update(text, !open);
  }

  #drawWaiting(waiting) {
    if (!waiting) {
      this.dots?.remove();
      this.dots = null;
    } else if (!this.dots) {
      const dot = () => element("i");
      this.dots = element("span", { class: "waiting" }, element("span", { class: "unseen" }, "Waiting for the first word"), dot(), dot(), dot());
      this.body.append(this.dots);
    }
  }

  #drawUser() {
    this.element.classList.remove("editing");
    this.body.textContent = this.node.text;
  }

  #tools(running, last) {
    if (running) return [];
    const { node, actions } = this;
    const button = iconButton("copy", this.user ? "Copy message" : "Copy answer", () => copy(node.text, button));
    const tools = [button];
    if (this.user) {
      tools.push(iconButton("edit", "Edit and send again", () => this.edit()));
      if (last) tools.push(iconButton("retry", "Send again", () => actions.send(node)));
    } else {
      tools.push(iconButton("retry", "Answer again", () => actions.regenerate(node)));
      if (last && node.finish !== "stop") tools.push(iconButton("continue", "Continue", () => actions.resume(node)));
    }
    return [element("div", { class: "tools" }, ...tools)];
  }

  #versions(running) {
    const all = versions(this.chat, this.node);
    if (running || all.length < 2) return [];
    const at = all.indexOf(this.node);
    const step = (name, label, to) => {
      const button = iconButton(name, label, () => this.actions.select(all[to]));
      button.disabled = !all[to];
      return button;
    };
    return [
      element(
        "div",
        { class: "versions", role: "group", "aria-label": "Versions" },
        step("left", "Earlier version", at - 1),
        element("span", {}, `${at + 1} / ${all.length}`),
        step("right", "Later version", at + 1),
      ),
    ];
  }

  #notes(running) {
    if (this.user) return [];
    const end = running ? "" : (ENDS[this.node.finish] ?? (this.node.text ? "" : "The model said nothing"));
    return [
      end ? element("span", { class: "end" }, end) : null,
      element("span", { class: "stats" }, statsText(this.node.stats)),
    ].filter(Boolean);
  }

  /** Turn a message of the user into a box to change it in. */
  edit() {
    const box = element("textarea", { "aria-label": "Edit message" });
    const close = () => {
      this.#drawUser();
      this.element.querySelector(".tools button")?.focus();
    };
    const send = () => {
      if (box.value.trim()) this.actions.edit(this.node, box.value.trim());
    };
    box.value = this.node.text;
    box.addEventListener("input", () => fit(box));
    box.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
    });
    this.element.classList.add("editing");
    this.body.replaceChildren(
      box,
      element(
        "div",
        { class: "row end" },
        element("button", { type: "button", class: "button", onclick: close }, "Cancel"),
        element("button", { type: "button", class: "button main", onclick: send }, "Send"),
      ),
    );
    fit(box);
    box.focus();
  }
}
