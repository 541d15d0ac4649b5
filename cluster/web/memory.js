// The memory of the open conversation, and of the cluster. Asks again while somebody looks: often after something has
// happened, then less often.

import { byId, setText } from "./dom.js";
import { clock } from "./format.js";
import { showCluster } from "./cluster.js";
import { showFigures, summary } from "./figures.js";
import { Live } from "./live.js";
import { Strip } from "./strip.js";
import { path } from "./tree.js";

const FIRST_LOOK_MS = 300; // the server notes a turn just after its answer has ended
const BUSY_MS = 2000;
const IDLE_MS = 10_000;
const BUSY_LOOKS = 8;
const PATIENT_LOOKS = 3; // a busy server may note a turn late
const PIN_S = 600;

export class Memory {
  #api;
  #store;
  #turns;
  #strip = new Strip();
  #live;
  #body = byId("memory-body");
  #toggle = byId("memory-toggle");
  #narrow = matchMedia("(max-width: 700px)");
  #shown = null;
  #session = null;
  #drawnFigures = "";
  #leaving = null;
  #timer = 0;
  #looks = 0;
  #controller = null;
  #isStarted = false;

  constructor(api, store, turns) {
    this.#api = api;
    this.#store = store;
    this.#turns = turns;
    const refused = () => (byId("cluster").hidden = true);
    this.#live = new Live(api, { show: (view) => this.#showCluster(view), refused });
    this.#toggle.addEventListener("click", () => this.#open(this.#toggle.getAttribute("aria-expanded") !== "true"));
    this.#narrow.addEventListener("change", () => this.#open(false));
    document.addEventListener("visibilitychange", () => this.#soon(0));
    turns.addEventListener("end", ({ detail }) => detail === this.#shown && this.#soon(FIRST_LOOK_MS));
    byId("pin").addEventListener("click", () => this.#steer((id) => this.#api.pin(id, this.#isPinned ? 0 : PIN_S)));
    byId("expire").addEventListener("click", () => this.#steer((id) => this.#api.expire(id), "It is the first to go now."));
    this.#body.hidden = this.#narrow.matches;
  }

  /** Asks nothing before: the server may want a key. */
  start() {
    this.#isStarted = true;
    this.#open(false);
    this.#api.addEventListener("key", () => {
      this.#live.again();
      this.#soon(0);
    });
  }

  /** After the open conversation, or what it is, has changed. */
  update() {
    const { id } = this.#store.open;
    if (this.#shown !== id) {
      this.#shown = id;
      this.#showSession(null);
      this.#soon(0);
    }
    this.#showFigures();
  }

  /** Asks nothing of this conversation: it is being deleted. null: of any again. */
  leave(id) {
    this.#leaving = id;
    if (id !== null) this.#controller?.abort();
    else this.#soon(0);
  }

  // --- whether anybody looks ------------------------------------------------------------------------------------------

  get #isSeen() {
    return this.#isStarted && !document.hidden && (!this.#narrow.matches || this.#toggle.getAttribute("aria-expanded") === "true");
  }

  /** On a narrow screen the panel is opened and closed; on others it is there. */
  #open(isOpen) {
    this.#toggle.setAttribute("aria-expanded", String(isOpen));
    this.#body.hidden = this.#narrow.matches && !isOpen;
    this.#live.want(this.#isSeen);
    this.#soon(0);
  }

  // --- the conversation -----------------------------------------------------------------------------------------------

  #soon(milliseconds) {
    clearTimeout(this.#timer);
    this.#looks = 0;
    this.#timer = setTimeout(() => this.#look(), milliseconds);
  }

  async #look() {
    const conversation = this.#store.open;
    const isKnown = conversation.nodes.some((node) => node.figures);
    if (!this.#isSeen || !isKnown || conversation.id === this.#leaving) return;
    this.#controller?.abort();
    this.#controller = new AbortController();
    const { signal } = this.#controller;
    try {
      const session = await this.#api.conversation(conversation.id, signal);
      if (!signal.aborted && conversation.id === this.#shown) this.#showSession(session);
    } catch (error) {
      if (signal.aborted) return;
      const isUnknown = error.status === 404 && this.#looks >= PATIENT_LOOKS;
      if (isUnknown) this.#showSession(null, "The server no longer knows this conversation.");
      if (isUnknown || error.status === 401 || error.status === 403) return; // until the next turn
    }
    this.#looks += 1;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#look(), this.#looks < BUSY_LOOKS ? BUSY_MS : IDLE_MS);
  }

  #showSession(session, otherwise = "Nothing is kept yet.") {
    const chunks = session?.chunks ?? [];
    this.#session = session;
    byId("strip-view").hidden = chunks.length === 0;
    byId("strip-empty").hidden = chunks.length > 0;
    setText(byId("strip-empty"), otherwise);
    this.#strip.update(chunks);
    setText(byId("pin"), this.#isPinned ? `Kept until ${clock(session.pinned_until)}: let go` : "Keep for 10 minutes");
    this.#showFigures();
  }

  get #isPinned() {
    return (this.#session?.pinned_until ?? 0) * 1000 > Date.now();
  }

  async #steer(ask, done = "") {
    const status = byId("strip-status");
    try {
      await ask(this.#shown);
      setText(status, done);
    } catch (error) {
      setText(status, error.message);
    }
    this.#soon(0);
  }

  // --- figures --------------------------------------------------------------------------------------------------------

  /** Of the last answer on the open branch; of the session's last turn where the browser has none. */
  #showFigures() {
    const answers = path(this.#store.open).filter((node) => node.role === "assistant");
    const figures = answers.at(-1)?.figures ?? (answers.length ? this.#session?.last : null);
    byId("last-turn").hidden = !figures;
    setText(byId("memory-summary"), figures ? summary(figures) : "");
    const drawing = JSON.stringify(figures);
    if (figures && drawing !== this.#drawnFigures) showFigures(byId("last-figures"), figures);
    this.#drawnFigures = drawing;
  }

  #showCluster(view) {
    byId("cluster").hidden = false;
    showCluster(view);
  }
}
