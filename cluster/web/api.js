// The server's HTTP interface: OpenAI's chat, and what Reprise tells of its memory. Knows no elements.

import { events } from "./sse.js";

const KEY = "reprise.key";

/** What a person is told when a request fails. `status` is 0 where no server answered. */
export class ApiError extends Error {
  constructor(status, message, retryAfterS = null) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** Fires "key" when the user has given one. */
export class Api extends EventTarget {
  #askForKey;
  #asking = null;
  #key = readKey();

  /** `askForKey(wasRefused)` resolves to a key, or to null if there is none. */
  constructor(askForKey) {
    super();
    this.#askForKey = askForKey;
  }

  get hasKey() {
    return this.#key !== null;
  }

  /** Asks the user for a key, once however many requests want one. Whether there is one now. */
  async unlock() {
    this.#asking ??= this.#askForKey(this.hasKey).finally(() => (this.#asking = null));
    const key = await this.#asking;
    if (key) {
      this.#key = key;
      writeKey(key);
      this.dispatchEvent(new Event("key"));
    }
    return Boolean(key);
  }

  info() {
    return this.#json("reprise/v1/info");
  }

  conversation(id, signal) {
    return this.#about(id, "", { signal });
  }

  advise(id) {
    return this.#about(id, "/advise", { method: "POST" });
  }

  pin(id, seconds) {
    return this.#about(id, "/pin", { method: "POST", body: { seconds }, mayAsk: true });
  }

  expire(id) {
    return this.#about(id, "/expire", { method: "POST", mayAsk: true });
  }

  remove(id) {
    return this.#about(id, "", { method: "DELETE", mayAsk: true });
  }

  cluster(signal) {
    return this.#json("reprise/v1/cluster", { signal });
  }

  /** The cluster's view, once a second. */
  async *live(signal) {
    const response = await this.#request("reprise/v1/live", { signal });
    for await (const data of events(response)) yield JSON.parse(data);
  }

  /** Yields `{text}`, `{finish}` and `{usage}` as they come. ApiError for whatever else ends the answer. */
  async *chat(sessionId, body, signal) {
    const response = await this.#request("v1/chat/completions", {
      method: "POST",
      body: { ...body, stream: true, stream_options: { include_usage: true } },
      headers: { "x-session-id": sessionId },
      signal,
      mayAsk: true,
    });
    try {
      for await (const data of events(response)) {
        if (data === "[DONE]") return;
        yield* pieces(JSON.parse(data));
      }
    } catch (error) {
      throw error instanceof ApiError || signal.aborted ? error : interrupted();
    }
    throw interrupted();
  }

  #about(id, verb, options) {
    const path = `reprise/v1/conversations/${encodeURIComponent(id)}${verb}`;
    return this.#json(path, { ...options, headers: { "x-session-id": id } });
  }

  async #json(path, options) {
    return (await this.#request(path, options)).json();
  }

  /** A response that is fine. `mayAsk`: the user waits for this, and may be asked for a key. */
  async #request(path, { method = "GET", body, headers = {}, signal, mayAsk = false } = {}) {
    for (;;) {
      const response = await this.#fetch(path, { method, body, headers, signal });
      if (response.ok) return response;
      const error = await errorOf(response);
      if (response.status !== 401 || !mayAsk || !(await this.unlock())) throw error;
    }
  }

  async #fetch(path, { method, body, headers, signal }) {
    const all = { ...headers };
    if (this.#key) all.authorization = `Bearer ${this.#key}`;
    if (body !== undefined) all["content-type"] = "application/json";
    try {
      return await fetch(path, { method, headers: all, body: body && JSON.stringify(body), signal, cache: "no-store" });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError(0, "The server cannot be reached. Is it running?");
    }
  }
}

function* pieces(chunk) {
  if (chunk.error) throw new ApiError(200, sentence(chunk.error.message));
  const choice = chunk.choices?.[0];
  if (choice?.delta?.content) yield { text: choice.delta.content };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (chunk.usage) yield { usage: chunk.usage };
}

async function errorOf(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not ours: a proxy's page, or nothing.
  }
  const words = message || `the server answered ${response.status} ${response.statusText}`.trim();
  return new ApiError(response.status, sentence(words), Number(response.headers.get("retry-after")) || null);
}

function interrupted() {
  return new ApiError(0, "The connection ended before the answer did.");
}

function sentence(words) {
  const text = String(words || "something went wrong").trim();
  const end = /[.!?]$/.test(text) ? "" : ".";
  return text[0].toUpperCase() + text.slice(1) + end;
}

function readKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function writeKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // It is remembered until the page is left.
  }
}
