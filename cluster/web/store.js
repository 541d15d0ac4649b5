// Conversations and preferences, kept in localStorage: one item each, so that one that is damaged costs no other.
// What cannot be stored stays in memory until the page is left.

import * as tree from "./tree.js";

const PREFIX = "reprise.conversation.";
const OPEN = "reprise.open";
const DEFAULTS = "reprise.settings";
const TITLE_CHARS = 60;

/** Fires "change" when a conversation or the list of them has changed, "full" when something could not be stored. */
export class Store extends EventTarget {
  #conversations = new Map();
  #openId;

  constructor() {
    super();
    for (const key of storedKeys()) {
      const conversation = key.startsWith(PREFIX) ? revive(read(key)) : null;
      if (conversation) this.#conversations.set(conversation.id, conversation);
    }
    const open = read(OPEN);
    this.#openId = this.#conversations.has(open) ? open : (this.list()[0]?.id ?? this.#create().id);
    addEventListener("storage", (event) => this.#onOtherTab(event));
  }

  /** Newest first. Ones without a message are not listed. */
  list() {
    const all = [...this.#conversations.values()].filter((conversation) => conversation.nodes.length);
    return all.sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.#conversations.get(id);
  }

  get open() {
    return this.#conversations.get(this.#openId);
  }

  select(id) {
    this.#openId = id;
    write(OPEN, id);
    this.#changed();
  }

  /** Opens a new conversation, or one that is still empty. */
  startNew() {
    const empty = [...this.#conversations.values()].find((conversation) => !conversation.nodes.length);
    this.select((empty ?? this.#create()).id);
  }

  /** A message on the open branch of a conversation, below `parent`. */
  addMessage(id, parent, fields) {
    const conversation = this.get(id);
    const node = tree.add(conversation, parent, { at: Date.now(), ...fields });
    if (!conversation.title && node.role === "user") conversation.title = titleOf(node.content);
    conversation.updated = Date.now();
    this.save(conversation);
    return node;
  }

  openBranch(id, node) {
    tree.open(this.get(id), node);
    this.save(this.get(id));
  }

  rename(id, title) {
    this.get(id).title = title.trim().slice(0, 200) || this.get(id).title;
    this.save(this.get(id));
  }

  /** Of this conversation, and of ones that are new after it. */
  setSettings(id, settings) {
    this.get(id).settings = settings;
    write(DEFAULTS, settings);
    this.save(this.get(id));
  }

  save(conversation) {
    if (conversation.nodes.length && !write(PREFIX + conversation.id, conversation)) {
      this.dispatchEvent(new Event("full"));
    }
    this.#changed();
  }

  remove(id) {
    this.#conversations.delete(id);
    erase(PREFIX + id);
    if (this.#openId === id) {
      const next = this.list()[0];
      if (next) this.select(next.id);
      else this.startNew();
    } else this.#changed();
  }

  #create() {
    const conversation = {
      id: uuid(),
      title: "",
      created: Date.now(),
      updated: Date.now(),
      nodes: [],
      leaf: null,
      settings: reviveSettings(read(DEFAULTS)),
    };
    this.#conversations.set(conversation.id, conversation);
    return conversation;
  }

  #onOtherTab({ key }) {
    if (!key?.startsWith(PREFIX)) return;
    const id = key.slice(PREFIX.length);
    const conversation = revive(read(key));
    if (conversation) this.#conversations.set(id, conversation);
    else if (id !== this.#openId) this.#conversations.delete(id);
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

/** A random UUID. `crypto.randomUUID` exists on https and localhost only. */
export function uuid() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > TITLE_CHARS ? `${line.slice(0, TITLE_CHARS - 1).trimEnd()}…` : line;
}

// --- what comes from storage may be anything ---------------------------------------------------------------------------

/** A conversation, or null for what is none. */
export function revive(raw) {
  if (!raw || typeof raw !== "object" || typeof raw.id !== "string" || !raw.id || !Array.isArray(raw.nodes)) return null;
  const nodes = [];
  const known = new Set([null]);
  for (const node of raw.nodes) {
    if (!isNode(node) || known.has(node.id) || !known.has(node.parent)) continue;
    known.add(node.id);
    nodes.push(node);
  }
  if (!nodes.length) return null;
  return {
    id: raw.id,
    title: typeof raw.title === "string" ? raw.title : "",
    created: Number(raw.created) || 0,
    updated: Number(raw.updated) || 0,
    nodes,
    leaf: known.has(raw.leaf) && raw.leaf !== null ? raw.leaf : nodes.at(-1).id,
    settings: reviveSettings(raw.settings),
  };
}

function isNode(node) {
  return (
    node && Number.isInteger(node.id) && typeof node.content === "string" && ["user", "assistant"].includes(node.role)
  );
}

function reviveSettings(raw) {
  const numeric = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
  return {
    temperature: numeric(raw?.temperature),
    maxTokens: numeric(raw?.maxTokens),
    system: typeof raw?.system === "string" ? raw.system : "",
  };
}

// --- localStorage may be full, forbidden or damaged --------------------------------------------------------------------

function storedKeys() {
  try {
    return Object.keys(localStorage);
  } catch {
    return [];
  }
}

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function erase(key) {
  try {
    localStorage.removeItem(key);
  } catch {
    // There was nothing, then.
  }
}
