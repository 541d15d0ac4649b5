// The list of conversations: open, new, rename, delete.

import { byId, el, show } from "./dom.js";

export class Conversations {
  #store;
  #turns;
  #actions;
  #list = byId("conversation-list");

  /** `actions`: open(id), rename(id), remove(id). */
  constructor(store, turns, actions) {
    this.#store = store;
    this.#turns = turns;
    this.#actions = actions;
  }

  update() {
    const focused = document.activeElement?.closest("#conversation-list [data-id]")?.dataset.id;
    const all = this.#store.list();
    show(this.#list, all.map((conversation) => this.#item(conversation)));
    byId("no-conversations").hidden = all.length > 0;
    if (focused) this.#list.querySelector(`[data-id="${CSS.escape(focused)}"] .open`)?.focus();
  }

  #item({ id, title }) {
    const isOpen = id === this.#store.open.id;
    const name = title || "Untitled";
    const running = this.#turns.running(id) ? el("span", { class: "visually-hidden" }, " (answering)") : null;
    return el(
      "li",
      { "data-id": id, "data-open": isOpen, "data-running": Boolean(running) },
      el(
        "button",
        { type: "button", class: "open", "aria-current": isOpen ? "true" : null, onclick: () => this.#actions.open(id) },
        name,
        running,
      ),
      icon(`Rename “${name}”`, "✎", () => this.#actions.rename(id)),
      icon(`Delete “${name}”`, "×", () => this.#actions.remove(id)),
    );
  }
}

function icon(label, sign, onclick) {
  return el("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick }, sign);
}
