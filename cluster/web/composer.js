// The message box: sends, stops, and tells the server that the user is about to speak.

import { byId } from "./dom.js";

const ADVICE_EVERY_MS = 20_000;
const MAX_HEIGHT_PX = 240;

export class Composer {
  #store;
  #turns;
  #api;
  #area = byId("message");
  #send = byId("send");
  #stop = byId("stop");
  #drafts = new Map();
  #advised = new Map();
  #shown = null;

  /** `onSend(text)`. */
  constructor(store, turns, api, onSend) {
    this.#store = store;
    this.#turns = turns;
    this.#api = api;
    const send = () => {
      const text = this.#area.value.trim();
      if (!text || turns.running(store.open.id)) return;
      this.#area.value = "";
      this.#fit();
      onSend(text);
    };
    byId("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
    this.#stop.addEventListener("click", () => turns.stop(store.open.id));
    this.#area.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouched()) return;
      event.preventDefault();
      send();
    });
    this.#area.addEventListener("input", () => {
      this.#fit();
      this.#advise();
    });
    this.#area.addEventListener("focus", () => this.#advise());
  }

  update() {
    const { id } = this.#store.open;
    if (this.#shown !== id) {
      this.#drafts.set(this.#shown, this.#area.value);
      this.#area.value = this.#drafts.get(id) ?? "";
      this.#shown = id;
      this.#fit();
    }
    const isRunning = Boolean(this.#turns.running(id));
    const hadFocus = document.activeElement === this.#stop || document.activeElement === this.#send;
    this.#stop.hidden = !isRunning;
    this.#send.hidden = isRunning;
    if (hadFocus) (isRunning ? this.#stop : this.#area).focus();
  }

  focus() {
    this.#area.focus();
  }

  /** Its KV is brought near while the user types. The server knows conversations that it has answered. */
  #advise() {
    const conversation = this.#store.open;
    const last = this.#advised.get(conversation.id) ?? -Infinity;
    const isKnown = conversation.nodes.some((node) => node.figures);
    if (!isKnown || this.#turns.running(conversation.id) || performance.now() - last < ADVICE_EVERY_MS) return;
    this.#advised.set(conversation.id, performance.now());
    this.#api.advise(conversation.id).catch(() => {}); // advice only
  }

  #fit() {
    this.#area.style.height = "auto";
    this.#area.style.height = `${Math.min(this.#area.scrollHeight + 2, MAX_HEIGHT_PX)}px`;
  }
}

/** On a touch keyboard Enter makes a new line. */
function isTouched() {
  return matchMedia("(pointer: coarse)").matches;
}
