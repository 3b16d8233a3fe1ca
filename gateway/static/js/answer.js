// One answer being written: the request, the text as it comes, and how often the page is drawn meanwhile.

import { streamChat } from "./api.js";

const LEAST_PAUSE = 40; // milliseconds between two drawings, and at least twice what the last one took
const SAVE_EVERY = 1000;

/**
 * Writes into `node` until the answer ends.
 *
 *   chat     where it belongs
 *   node     where text, finish and stats go
 *   request  the body for the server
 *   draw     called with the node when there is something new to see
 *   save     called now and then, so that little is lost if the tab is closed
 */
export class Answer {
  #controller = new AbortController();
  #drawn = 0; // when the next drawing may be
  #pending = false;
  #saved = performance.now();
  #began = performance.now();
  #first = null; // when the first token of this request came
  #before;

  constructor({ chat, node, request, draw, save }) {
    this.chat = chat;
    this.node = node;
    this.request = request;
    this.draw = draw;
    this.save = save;
    this.#before = node.stats ?? { prompt: 0, cached: 0, tokens: 0, first: 0, time: 0 };
  }

  /** End it here; the server hears of it at once. */
  stop() {
    this.#controller.abort();
  }

  /** Resolves when it has ended; rejects with an ApiError if it did not end well. */
  async run() {
    const { node } = this;
    node.finish = null;
    try {
      await streamChat(this.request, { signal: this.#controller.signal, onChunk: (chunk) => this.#take(chunk) });
      node.finish ??= "broken";
    } catch (error) {
      node.finish = error.name === "AbortError" ? "stopped" : "broken";
      if (error.name !== "AbortError") throw error;
    }
  }

  #take(chunk) {
    const [choice] = chunk.choices;
    if (choice?.delta.content) {
      this.#first ??= performance.now();
      this.node.text += choice.delta.content;
    }
    if (choice?.finish_reason) this.node.finish = choice.finish_reason;
    if (chunk.usage) this.#count(chunk.usage);
    this.#soon();
    if (performance.now() - this.#saved > SAVE_EVERY) {
      this.#saved = performance.now();
      this.save();
    }
  }

  /** A continued answer adds to what its first part took. */
  #count(usage) {
    const before = this.#before;
    const now = performance.now();
    this.node.stats = {
      prompt: usage.prompt_tokens,
      cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
      tokens: before.tokens + usage.completion_tokens,
      first: before.first || (this.#first === null ? 0 : this.#first - this.#began),
      time: before.time + (this.#first === null ? 0 : now - this.#first),
    };
  }

  #soon() {
    if (this.#pending) return;
    this.#pending = true;
    requestAnimationFrame((time) => this.#frame(time));
  }

  #frame(time) {
    if (time < this.#drawn) {
      requestAnimationFrame((later) => this.#frame(later));
      return;
    }
    this.#pending = false;
    const start = performance.now();
    this.draw(this.node);
    this.#drawn = time + Math.max(LEAST_PAUSE, 2 * (performance.now() - start));
  }
}
