// A small markdown: paragraphs, headings, lists, quotes, rules, tables and code blocks. Makes nodes, never HTML.

import { copyText, el } from "./dom.js";
import { inline } from "./inline.js";

const MAX_DEPTH = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]{0,100})$/;
const HEADING = /^ {0,3}(#{1,6}) +(\S.*)$/;
const RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const TABLE_LINE = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** Renders a whole text. */
export function render(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text).map((block) => block.make()));
  return fragment;
}

/** Renders a text that grows: blocks that are complete keep their nodes, and with them selections and focus. */
export class Growing {
  #parent;
  #sources = [];

  constructor(parent) {
    this.#parent = parent;
  }

  /** Shows the text. Returns the sources of blocks that it has completed. */
  update(text) {
    const found = blocks(text);
    let same = 0;
    while (same < found.length && found[same].source === this.#sources[same]) same += 1;
    const completed = found.slice(Math.max(0, this.#sources.length - 1), -1).map((block) => block.source);
    while (this.#parent.childNodes.length > same) this.#parent.lastChild.remove();
    this.#parent.append(...found.slice(same).map((block) => block.make()));
    this.#sources = found.map((block) => block.source);
    return completed;
  }

  /** The block that may still grow. */
  get last() {
    return this.#sources.at(-1) ?? "";
  }
}

/** The blocks of a text: `source`, the lines that a block was made of, and `make()`, its node. */
export function blocks(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").replaceAll("\t", "    ").split("\n");
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const { end, make } = block(lines, at, depth);
    found.push({ source: lines.slice(at, end).join("\n"), make });
    at = end;
  }
  return found;
}

function block(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return codeBlock(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return { end: at + 1, make: () => headingOf(heading[1].length, heading[2]) };
  if (RULE.test(line)) return { end: at + 1, make: () => el("hr") };
  if (QUOTE.test(line) && depth < MAX_DEPTH) return quote(lines, at, depth);
  if (ITEM.test(line) && depth < MAX_DEPTH) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at, depth);
}

/** The page has headings of its own above an answer's. */
function headingOf(level, text) {
  return el(`h${Math.min(6, level + 2)}`, {}, inline(text.trimEnd().replace(/ #+$/, "")));
}

function codeBlock(lines, at, [, fence, language]) {
  const close = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  return { end: Math.min(end + 1, lines.length), make: () => codeFigure(code, language.trim().split(/\s/)[0]) };
}

function codeFigure(code, language) {
  const copy = el("button", { type: "button", class: "quiet" }, "Copy");
  copy.addEventListener("click", async () => {
    copy.textContent = (await copyText(code)) ? "Copied" : "Not copied";
    setTimeout(() => (copy.textContent = "Copy"), 2000);
  });
  const label = language ? `Code, ${language}` : "Code";
  return el(
    "figure",
    { class: "code" },
    el("figcaption", {}, el("span", {}, language || "code"), copy),
    el("pre", { tabindex: "0", "aria-label": label, role: "region" }, el("code", {}, code)),
  );
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n");
  return { end, make: () => el("blockquote", {}, made(inner, depth)) };
}

/** Items are as deep as their text is indented; an item's lines less that are blocks of their own. */
function list(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = itemAt(lines[end], indent.length, mark);
    if (!item) break;
    const inner = [lines[end].slice(item.width)];
    for (end += 1; end < lines.length && belongs(lines, end, item.width, indent.length); end += 1) {
      inner.push(lines[end].slice(Math.min(item.width, leading(lines[end]))));
    }
    while (inner.length > 1 && !inner.at(-1).trim()) inner.pop();
    items.push(inner.join("\n"));
  }
  const isOrdered = /\d/.test(mark);
  const start = isOrdered ? Number.parseInt(mark, 10) : 1;
  const make = () =>
    el(
      isOrdered ? "ol" : "ul",
      { start: start !== 1 ? start : null },
      items.map((item) => el("li", {}, tight(made(item, depth)))),
    );
  return { end, make };
}

function itemAt(line, indent, mark) {
  const found = ITEM.exec(line);
  if (!found || RULE.test(line)) return null;
  const isSame = /\d/.test(mark) ? /\d/.test(found[2]) && found[2].at(-1) === mark.at(-1) : found[2] === mark;
  if (!isSame || Math.abs(found[1].length - indent) > 1) return null;
  return { width: found[1].length + found[2].length + Math.min(4, Math.max(1, found[3].length)) };
}

function belongs(lines, at, width, indent) {
  const line = lines[at];
  if (!line.trim()) {
    let after = at + 1;
    while (after < lines.length && !lines[after].trim()) after += 1;
    const next = lines[after];
    return next !== undefined && (leading(next) >= Math.min(width, indent + 2) || isSibling(next, indent));
  }
  if (leading(line) >= Math.min(width, indent + 2)) return true;
  return Boolean(lines[at - 1].trim()) && !startsBlock(lines, at);
}

function isSibling(line, indent) {
  const found = ITEM.exec(line);
  return Boolean(found) && Math.abs(found[1].length - indent) <= 1;
}

function isTable(lines, at) {
  const next = lines[at + 1];
  if (next === undefined || !lines[at].includes("|") || !next.includes("-") || !TABLE_LINE.test(next)) return false;
  return cells(lines[at]).length === cells(next).length;
}

function table(lines, at) {
  const aligns = cells(lines[at + 1]).map(alignOf);
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end += 1;
  const row = (tag, line) => {
    const texts = cells(line);
    return el("tr", {}, aligns.map((align, i) => el(tag, { "data-align": align }, inline(texts[i] ?? ""))));
  };
  const make = () => {
    const head = el("thead", {}, row("th", lines[at]));
    const body = el("tbody", {}, lines.slice(at + 2, end).map((line) => row("td", line)));
    const frame = { class: "table", tabindex: "0", role: "region", "aria-label": "Table" };
    return el("div", frame, el("table", {}, head, body));
  };
  return { end, make };
}

function alignOf(rule) {
  if (!rule.endsWith(":")) return null;
  return rule.startsWith(":") ? "center" : "right";
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !(depth < MAX_DEPTH && startsBlock(lines, end))) end += 1;
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return { end, make: () => el("p", {}, inline(text)) };
}

function startsBlock(lines, at) {
  const line = lines[at];
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((form) => form.test(line)) || isTable(lines, at);
}

function made(text, depth) {
  return blocks(text, depth + 1).map((inner) => inner.make());
}

/** An item of one line is no paragraph. */
function tight(nodes) {
  return nodes.length && nodes[0].tagName === "P" ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
}

function leading(line) {
  return line.length - line.trimStart().length;
}
