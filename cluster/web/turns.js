// Runs turns: asks the server, gathers the answer, keeps it. Several conversations may be answered at a time.

import { path } from "./tree.js";

/** Fires "begin", "progress" and "end" with `detail`, the conversation's id. */
export class Turns extends EventTarget {
  #api;
  #store;
  #running = new Map();
  #failures = new Map();

  constructor(api, store) {
    super();
    this.#api = api;
    this.#store = store;
    addEventListener("pagehide", () => this.#keepAll());
  }

  /** `{text, question}` of the answer that is coming, or undefined. */
  running(id) {
    return this.#running.get(id);
  }

  /** `{question, message}`: why the last turn brought no answer, or only a part of one. */
  failure(id) {
    return this.#failures.get(id);
  }

  /** Answers the message that the open branch of the conversation ends with. */
  async start(id) {
    if (this.#running.has(id)) return;
    const conversation = this.#store.get(id);
    const question = path(conversation).at(-1);
    const run = { question: question.id, text: "", controller: new AbortController(), extra: {} };
    this.#running.set(id, run);
    this.#failures.delete(id);
    this.#fire("begin", id);
    try {
      await this.#read(id, run, bodyOf(conversation));
    } catch (error) {
      const stopped = run.controller.signal.aborted;
      run.extra.finish = stopped ? "stopped" : "error";
      if (!stopped) this.#failures.set(id, { question: run.question, message: wordsOf(error) });
    }
    this.#running.delete(id);
    const isAnswer = run.text || run.extra.finish === "stop" || run.extra.finish === "length";
    if (isAnswer && !run.isKept && this.#store.get(id)) this.#keep(id, run);
    this.#fire("end", id);
  }

  stop(id) {
    this.#running.get(id)?.controller.abort();
  }

  async #read(id, run, body) {
    for await (const piece of this.#api.chat(id, body, run.controller.signal)) {
      if (piece.text) {
        run.text += piece.text;
        this.#fire("progress", id);
      }
      if (piece.finish) run.extra.finish = piece.finish;
      if (piece.usage) run.extra.figures = figuresOf(piece.usage);
    }
  }

  #keep(id, run) {
    const conversation = this.#store.get(id);
    const leaf = conversation.leaf;
    this.#store.addMessage(id, run.question, { role: "assistant", content: run.text, ...run.extra });
    if (leaf !== run.question) {
      conversation.leaf = leaf; // meanwhile the user went to another branch
      this.#store.save(conversation);
    }
  }

  /** The page is being left: what has come so far is kept. */
  #keepAll() {
    for (const [id, run] of this.#running) {
      if (!run.text || run.isKept || !this.#store.get(id)) continue;
      run.isKept = true;
      this.#keep(id, { ...run, extra: { finish: "stopped" } });
    }
  }

  #fire(type, id) {
    this.dispatchEvent(new CustomEvent(type, { detail: id }));
  }
}

function bodyOf(conversation) {
  const { temperature, maxTokens, system } = conversation.settings;
  const messages = path(conversation).map(({ role, content }) => ({ role, content }));
  if (system.trim()) messages.unshift({ role: "system", content: system });
  const body = { messages };
  if (temperature !== null) body.temperature = temperature;
  if (maxTokens !== null) body.max_tokens = maxTokens;
  return body;
}

function figuresOf(usage) {
  return { prompt_tokens: usage.prompt_tokens, completion_tokens: usage.completion_tokens, ...usage.reprise };
}

function wordsOf(error) {
  const wait = error.retryAfterS ? ` Try again in ${error.retryAfterS} s.` : "";
  return `${error.message || "Something went wrong."}${wait}`;
}
