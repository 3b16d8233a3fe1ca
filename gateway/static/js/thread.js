// The conversation on the page: its messages, and a view that follows the text until the reader scrolls away.

import { path } from "./chat.js";
import { Message } from "./message.js";

const NEAR = 48; // pixels from the end that still count as being there

export class Thread {
  constructor({ scroller, list, jump, welcome, actions }) {
    this.scroller = scroller;
    this.list = list;
    this.jump = jump;
    this.welcome = welcome;
    this.actions = actions;
    this.views = new Map();
    this.following = true;
    this.lastTop = 0;
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    jump.addEventListener("click", () => this.follow());
    const observer = new ResizeObserver(() => this.#grown());
    observer.observe(list);
    observer.observe(scroller);
  }

  /** Show a chat, or the welcome for none; `running` is the node that is being written. */
  show(chat, running) {
    const shown = chat ? path(chat) : [];
    const views = new Map();
    for (const node of shown) {
      const known = this.views.get(node.id);
      views.set(node.id, known?.node === node ? known : new Message(chat, node, this.actions));
    }
    this.views = views;
    this.list.replaceChildren(...[...views.values()].map((view) => view.element));
    shown.forEach((node, index) => views.get(node.id).draw({ running: node === running, last: index === shown.length - 1 }));
    this.list.setAttribute("aria-busy", String(Boolean(running)));
    this.welcome.hidden = shown.length > 0;
  }

  view(node) {
    return this.views.get(node.id);
  }

  /** Go to the end and stay there. */
  follow() {
    this.following = true;
    this.jump.hidden = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  #distance() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    return scrollHeight - clientHeight - scrollTop;
  }

  /** Only the reader makes the position smaller; growing text does not. */
  #scrolled() {
    const { scrollTop } = this.scroller;
    const away = this.#distance();
    if (away < NEAR) this.following = true;
    else if (scrollTop < this.lastTop) this.following = false;
    this.lastTop = scrollTop;
    this.jump.hidden = this.following || away < NEAR;
  }

  #grown() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.jump.hidden = this.#distance() < NEAR;
    this.lastTop = this.scroller.scrollTop;
  }
}
