// The page: makes its parts and lets them know of each other.

import { Api } from "./api.js";
import { Composer } from "./composer.js";
import { Conversations } from "./conversations.js";
import { askForKey, askForSettings, askForTitle, askToDelete } from "./dialogs.js";
import { byId, setText } from "./dom.js";
import { count } from "./format.js";
import { Memory } from "./memory.js";
import { Messages } from "./messages.js";
import { Store } from "./store.js";
import * as tree from "./tree.js";
import { Turns } from "./turns.js";

const api = new Api(askForKey);
const store = new Store();
const turns = new Turns(api, store);

const composer = new Composer(store, turns, api, (text) => ask(tree.end(store.open), text));
const messages = new Messages(store, turns, {
  edit: (node, text) => ask(node.parent, text),
  retry,
  open: (node) => store.openBranch(store.open.id, node),
});
const conversations = new Conversations(store, turns, { open, rename, remove });
const memory = new Memory(api, store, turns);

// --- what the user does --------------------------------------------------------------------------------------------------

function ask(parent, text) {
  const { id } = store.open;
  store.addMessage(id, parent, { role: "user", content: text });
  turns.start(id);
  messages.scrollToEnd();
  composer.focus();
}

/** Another answer to the same question. */
function retry(node) {
  const { id, nodes } = store.open;
  const question = node.role === "user" ? node : nodes.find((other) => other.id === node.parent);
  store.open.leaf = question.id;
  turns.start(id);
  messages.scrollToEnd();
  composer.focus();
}

function open(id) {
  store.select(id);
  toggleList(false);
  composer.focus();
}

async function rename(id) {
  const title = await askForTitle(store.get(id).title);
  if (title !== null) store.rename(id, title);
}

async function remove(id) {
  const { title, nodes } = store.get(id);
  const wasAnswered = nodes.some((node) => node.role === "assistant");
  const shallGo = await askToDelete(title || "Untitled", async () => {
    turns.stop(id);
    memory.leave(id);
    if (wasAnswered) await api.remove(id).catch((error) => error.status === 404 || Promise.reject(error));
  });
  if (shallGo) store.remove(id);
  memory.leave(null);
  byId("new-conversation").focus();
}

// --- the frame -----------------------------------------------------------------------------------------------------------

function update() {
  const title = store.open.title || "New conversation";
  setText(byId("title"), title);
  document.title = store.open.title ? `${title} – Reprise` : "Reprise";
  conversations.update();
  messages.update();
  composer.update();
  memory.update();
}

/** The list of conversations lies over the chat where there is no room for both. */
function toggleList(isOpen) {
  document.body.toggleAttribute("data-list", isOpen);
  byId("open-conversations").setAttribute("aria-expanded", String(isOpen));
}

function say(words) {
  setText(byId("notice"), words);
  byId("notice").hidden = !words;
}

async function readInfo() {
  try {
    const info = await api.info();
    setText(byId("model"), `${info.model} · up to ${count(info.max_turn_tokens)} tokens a turn`);
    if (info.auth_required && !api.hasKey) await api.unlock();
  } catch (error) {
    say(error.message);
  }
}

byId("new-conversation").addEventListener("click", () => {
  store.startNew();
  toggleList(false);
  composer.focus();
});
byId("open-conversations").addEventListener("click", () => {
  toggleList(true);
  byId("new-conversation").focus();
});
byId("close-conversations").addEventListener("click", () => {
  toggleList(false);
  byId("open-conversations").focus();
});
byId("chat").addEventListener("pointerdown", () => toggleList(false));
byId("conversations").addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !document.body.hasAttribute("data-list")) return;
  toggleList(false);
  byId("open-conversations").focus();
});
byId("open-settings").addEventListener("click", async () => {
  const { id, settings } = store.open;
  const changed = await askForSettings(settings);
  if (changed) store.setSettings(id, changed);
});

store.addEventListener("change", update);
store.addEventListener("full", () =>
  say("This browser's storage is full: what is new is lost when you leave. Delete old conversations to make room."),
);
turns.addEventListener("begin", () => (say(""), update()));
turns.addEventListener("end", update);

update();
await readInfo();
memory.start();
if (!matchMedia("(pointer: coarse)").matches) composer.focus();
