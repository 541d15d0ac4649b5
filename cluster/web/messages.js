// The messages of the open conversation, and the answer that is coming.

import { announce, byId, copyText, el, setText, show } from "./dom.js";
import { Growing, render } from "./markdown.js";
import { path, siblings } from "./tree.js";

const NEAR_PX = 80;

export class Messages {
  #store;
  #turns;
  #actions;
  #list = byId("messages");
  #scroller = byId("scroller");
  #bodies = new Map(); // of answers, by their node: rendered once
  #shown = null;
  #drawn = "";
  #editing = null; // {node, form}
  #growing = null;
  #frame = 0;
  #stays = true; // at the end, however the room for the messages changes

  /** `actions`: edit(node, text), retry(node), open(node). */
  constructor(store, turns, actions) {
    this.#store = store;
    this.#turns = turns;
    this.#actions = actions;
    turns.addEventListener("progress", ({ detail }) => this.#onProgress(detail));
    turns.addEventListener("end", ({ detail }) => this.#onEnd(detail));
    byId("to-end").addEventListener("click", () => this.scrollToEnd());
    this.#scroller.addEventListener("scroll", () => this.#onScroll(), { passive: true });
    new ResizeObserver(() => this.#stays && this.scrollToEnd()).observe(this.#scroller);
  }

  /** Shows the open conversation as it is now. */
  update() {
    const conversation = this.#store.open;
    const isOther = this.#shown !== conversation.id;
    if (isOther) {
      this.#bodies.clear();
      this.#editing = null;
      this.#shown = conversation.id;
      this.#drawn = "";
    }
    const stays = isOther || this.#stays;
    const branch = path(conversation);
    const run = this.#turns.running(conversation.id);
    const failure = this.#turns.failure(conversation.id);
    const running = run && branch.at(-1)?.id === run.question ? this.#answering(run) : null;
    if (!this.#hasChanged(conversation, run, failure)) return;
    const failed = failure && branch.slice(-2).some((node) => node.id === failure.question);
    const isUnanswered = branch.at(-1)?.role === "user";
    const restore = this.#rememberFocus();
    show(
      this.#list,
      branch.map((node) => this.#article(conversation, node, node === branch.at(-1), Boolean(run))),
      running,
      run ? null : failed ? this.#failure(branch.at(-1), failure.message, "alert") : null,
      run || failed || !isUnanswered ? null : this.#failure(branch.at(-1), "No answer yet.", "status"),
    );
    restore();
    byId("welcome").hidden = branch.length > 0;
    if (stays) this.scrollToEnd();
    byId("to-end").hidden = this.#isAtEnd;
  }

  scrollToEnd() {
    this.#stays = true;
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }

  /** Other conversations change too: what a reader has selected or typed here stays then. */
  #hasChanged({ id, leaf, nodes }, run, failure) {
    const drawing = JSON.stringify([id, leaf, nodes.length, run?.question, failure?.message, this.#editing?.node]);
    const hasChanged = drawing !== this.#drawn;
    this.#drawn = drawing;
    return hasChanged;
  }

  /** Returns what brings the focus back to the button that had it, in the message as it is drawn then. */
  #rememberFocus() {
    const focused = document.activeElement;
    const node = this.#list.contains(focused) ? focused.closest("[data-node]")?.dataset.node : undefined;
    return () => {
      if (node === undefined || focused.isConnected) return;
      const buttons = [...this.#list.querySelectorAll(`[data-node="${node}"] .tools button`)];
      (buttons.find((button) => button.textContent === focused.textContent) ?? this.#scroller).focus();
    };
  }

  // --- one message ----------------------------------------------------------------------------------------------------

  #article(conversation, node, isLast, isRunning) {
    const isUser = node.role === "user";
    const name = isUser ? "You" : "Answer";
    if (this.#editing?.node === node.id) return this.#editing.form;
    const tools = el("div", { class: "tools" }, this.#branches(conversation, node, isRunning));
    if (isUser) tools.append(tool("Edit", isRunning, () => this.#edit(node)));
    else tools.append(copyTool(node.content));
    if (!isUser && isLast) tools.append(tool("Retry", isRunning, () => this.#actions.retry(node)));
    return el(
      "article",
      { class: `message ${node.role}`, "data-node": node.id, "aria-label": name },
      isUser ? el("div", { class: "body" }, node.content) : this.#body(node),
      node.finish && node.finish !== "stop" ? el("p", { class: "note" }, endings[node.finish] ?? node.finish) : null,
      tools,
    );
  }

  #body(node) {
    if (!this.#bodies.has(node.id)) {
      const text = node.content.trim() ? render(node.content) : el("p", { class: "note" }, "An empty answer.");
      this.#bodies.set(node.id, el("div", { class: "body prose" }, text));
    }
    return this.#bodies.get(node.id);
  }

  #branches(conversation, node, isRunning) {
    const all = siblings(conversation, node);
    if (all.length < 2) return null;
    const at = all.indexOf(node);
    const step = (label, sign, to) =>
      el(
        "button",
        {
          type: "button",
          class: "quiet",
          "aria-label": label,
          disabled: !all[to] || isRunning,
          onclick: () => this.#actions.open(all[to]),
        },
        sign,
      );
    return el(
      "span",
      { class: "branches", role: "group", "aria-label": "Versions of this message" },
      step("Earlier version", "‹", at - 1),
      el("span", { class: "figures" }, `${at + 1}/${all.length}`),
      step("Later version", "›", at + 1),
    );
  }

  // --- editing --------------------------------------------------------------------------------------------------------

  #edit(node) {
    this.#editing = { node: node.id, form: this.#editor(node) };
    this.update();
    this.#list.querySelector("form textarea")?.focus();
  }

  #editor(node) {
    const area = el("textarea", { "aria-label": "Your message", rows: Math.min(12, node.content.split("\n").length + 1) });
    area.value = node.content;
    const close = () => {
      this.#editing = null;
      this.update();
      this.#list.querySelector(`[data-node="${node.id}"] .tools button:last-child`)?.focus();
    };
    const send = () => {
      if (!area.value.trim()) return;
      this.#editing = null;
      this.#actions.edit(node, area.value.trim());
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    return el(
      "form",
      { class: "message user editing", onsubmit: (event) => (event.preventDefault(), send()) },
      area,
      el(
        "div",
        { class: "tools" },
        el("button", { type: "submit", class: "primary" }, "Send"),
        el("button", { type: "button", class: "quiet", onclick: close }, "Cancel"),
        el("span", { class: "note" }, "The earlier version stays."),
      ),
    );
  }

  // --- the answer that is coming --------------------------------------------------------------------------------------

  #answering(run) {
    const body = el("div", { class: "body prose" });
    this.#growing = new Growing(body);
    this.#growing.update(run.text);
    const waiting = run.text ? null : el("p", { class: "note waiting" }, "Waiting for the first word…");
    return el("article", { class: "message assistant running", "aria-label": "Answer", "aria-busy": "true" }, waiting, body);
  }

  #onProgress(id) {
    if (id !== this.#shown || this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      const run = this.#turns.running(this.#shown);
      if (!run || !this.#growing) return;
      this.#list.querySelector(".waiting")?.remove();
      for (const source of this.#growing.update(run.text)) announce(source);
      if (this.#stays) this.scrollToEnd();
      byId("to-end").hidden = this.#isAtEnd;
    });
  }

  #onEnd(id) {
    if (id !== this.#shown) return;
    const last = path(this.#store.open).at(-1);
    if (last?.role === "assistant" && this.#growing) {
      for (const source of this.#growing.update(last.content)) announce(source);
      announce(`${this.#growing.last} (end of the answer)`);
    }
    this.#growing = null;
  }

  #failure(last, message, role) {
    const again = () => this.#actions.retry(last);
    const button = last.role === "user" ? el("button", { type: "button", onclick: again }, "Try again") : null;
    return el("div", { class: "failure", role }, el("p", {}, message), button);
  }

  // --- scrolling ------------------------------------------------------------------------------------------------------

  get #isAtEnd() {
    return this.#scroller.scrollHeight - this.#scroller.scrollTop - this.#scroller.clientHeight < NEAR_PX;
  }

  #onScroll() {
    this.#stays = this.#isAtEnd;
    byId("to-end").hidden = this.#stays;
  }
}

const endings = {
  length: "Ended at the limit of tokens.",
  stopped: "Stopped here.",
  error: "Ended early.",
};

function tool(label, disabled, onclick) {
  return el("button", { type: "button", class: "quiet", disabled, onclick }, label);
}

function copyTool(text) {
  const button = tool("Copy", false, async () => {
    setText(button, (await copyText(text)) ? "Copied" : "Not copied");
    setTimeout(() => setText(button, "Copy"), 2000);
  });
  return button;
}
