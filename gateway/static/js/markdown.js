// Markdown to elements, whole or while it grows. Two walls stand between a model's text and the page: HTML in it is
// shown as text, and what marked makes is passed through DOMPurify with a short list of what may stay. A third, the
// page's policy, forbids scripts, styles and requests that got past both.

import { Marked } from "../vendor/marked.esm.js";
import "../vendor/purify.min.js";
import { copy, element, icon } from "./dom.js";
import { highlight } from "./highlight.js";

const PURE = {
  ALLOWED_TAGS:
    "a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i input kbd li ol p pre s strong sub sup table tbody td th thead tr ul".split(
      " ",
    ),
  ALLOWED_ATTR: ["align", "checked", "class", "disabled", "href", "start", "title", "type"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const SAFE_LINK = /^(?:https?:\/\/|mailto:)/i;
const PLAIN_HTML = /^<\/?(?:br|kbd|sub|sup)\s*\/?>$/i;

const escape = (text) =>
  text.replace(/[&<>"']/g, (letter) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[letter]);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html({ text, block }) {
      if (PLAIN_HTML.test(text.trim())) return text;
      return block ? `<p>${escape(text.trim()).replaceAll("\n", "<br>")}</p>` : escape(text);
    },
    // An image would be a request to wherever the model says, so it becomes a link that a person may follow.
    image({ href, text }) {
      return `<a href="${escape(href)}">${escape(text || href)}</a>`;
    },
  },
});

function elements(tokens) {
  const fragment = globalThis.DOMPurify.sanitize(marked.parser(tokens), PURE);
  for (const link of fragment.querySelectorAll("a")) finishLink(link);
  for (const box of fragment.querySelectorAll("input")) {
    if (box.type === "checkbox") box.disabled = true;
    else box.remove();
  }
  for (const code of fragment.querySelectorAll("pre > code")) finishCode(code);
  for (const table of fragment.querySelectorAll("table")) {
    const frame = element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

function finishLink(link) {
  const href = link.getAttribute("href") ?? "";
  if (!SAFE_LINK.test(href)) {
    link.replaceWith(...link.childNodes);
    return;
  }
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
}

/** A frame around a block of code, with the language's name and a button that copies it. */
function finishCode(code) {
  const language = (code.className.match(/^language-(\S+)/)?.[1] ?? "").toLowerCase();
  const button = element("button", { type: "button", "aria-label": "Copy code" }, icon("copy"), "Copy");
  button.addEventListener("click", () => copy(code.textContent, button));
  const pre = code.parentElement;
  const frame = element("div", { class: "code" });
  pre.replaceWith(frame);
  pre.tabIndex = 0; // wide code is scrolled with the keyboard, too
  code.removeAttribute("class");
  code.dataset.language = language;
  code.replaceChildren(...highlight(code.textContent, language));
  frame.append(element("div", { class: "code-head" }, element("span", {}, language || "text"), button), pre);
}

/**
 * Markdown that grows. Blocks that nothing can change any more are made once; only the last one is made again when text
 * is added, so a long answer costs no more per update than a short one.
 */
export class Markdown {
  constructor(root) {
    this.root = root;
    root.classList.add("markdown");
    this.#restart();
  }

  #restart() {
    this.source = "";
    this.settled = 0; // characters whose elements are final
    this.final = false;
    this.links = {};
    this.tail = [];
    this.root.replaceChildren();
  }

  /** Show `source`; `final` says that nothing will be added. */
  update(source, final = false) {
    source = source.replace(/\r\n?/g, "\n");
    if (source === this.source && final === this.final) return;
    if (this.final || !source.startsWith(this.source)) this.#restart();
    this.source = source;
    this.final = final;
    let tokens = this.#lex();
    if (final && this.settled && Object.keys(this.links).length) {
      // A link's address may stand at the end, after the text that uses it.
      this.#restart();
      Object.assign(this, { source, final });
      tokens = this.#lex();
    }
    this.#draw(tokens, final);
  }

  #lex() {
    const lexer = new marked.Lexer(marked.defaults);
    Object.assign(lexer.tokens.links, this.links);
    const tokens = lexer.lex(this.source.slice(this.settled));
    Object.assign(this.links, tokens.links);
    return tokens;
  }

  #draw(tokens, final) {
    const settled = tokens.slice(0, final ? tokens.length : this.#certain(tokens));
    const open = tokens.slice(settled.length);
    if (settled.length === 0 && this.#growCode(open)) return;
    for (const old of this.tail) old.remove();
    this.root.append(elements(settled));
    this.settled += settled.reduce((sum, token) => sum + token.raw.length, 0);
    const fragment = elements(open);
    this.tail = [...fragment.childNodes];
    this.root.append(fragment);
  }

  /**
   * How many tokens nothing can change any more: those before the last one that has a whole line. A line that is not
   * complete tells nothing: the 2 of "2. more" looks like a paragraph after a list, and is its next item.
   */
  #certain(tokens) {
    const whole = this.source.lastIndexOf("\n") + 1 - this.settled;
    let certain = 0;
    let at = 0;
    for (const [index, token] of tokens.entries()) {
      if (token.type !== "space" && at < whole) certain = index;
      at += token.raw.length;
    }
    return certain;
  }

  /** Code that only became longer keeps its frame, and with it the place it was scrolled to. */
  #growCode(open) {
    const token = open[0];
    const frames = this.tail.filter((node) => node.className === "code");
    if (token?.type !== "code" || frames.length !== 1) return false;
    const code = frames[0].querySelector("code");
    const language = (token.lang ?? "").match(/^\S*/)[0].toLowerCase();
    if (code.dataset.language !== language) return false;
    code.replaceChildren(...highlight(`${token.text}\n`, language));
    return true;
  }
}
