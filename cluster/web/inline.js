// Markdown within a line: code, emphasis, links. Makes nodes, never HTML; what is not understood stays as it was written.

import { el } from "./dom.js";

const MAX_DEPTH = 8;
const MAX_LINK_TEXT = 1000;
const ELEMENTS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };
const ESCAPABLE = /[\\`*_{}[\]()#+\-.!|~<>]/;
const BARE_URL = /https?:\/\/[^\s<>"`]+/y;
const WORD = /[\p{L}\p{N}]/u;

/** The text as nodes; line ends become breaks. */
export function inline(text, depth = 0, inLink = false) {
  const scan = { text, depth, inLink, missing: new Set() };
  const nodes = [];
  let plain = "";
  for (let at = 0; at < text.length; ) {
    const found = special(scan, at);
    if (!found) {
      plain += text[at];
      at += 1;
      continue;
    }
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(found.node);
    at = found.end;
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** The address if it is one that a link may lead to, else null. */
export function safeUrl(address) {
  if (!/^https?:\/\//i.test(address)) return null;
  try {
    const url = new URL(address);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

/** `{node, end}` for what begins at `at`, or null for plain text. */
function special(scan, at) {
  const { text, depth, inLink } = scan;
  const sign = text[at];
  if (sign === "\n") return { node: el("br"), end: at + 1 };
  if (sign === "\\" && ESCAPABLE.test(text[at + 1] ?? "")) return { node: text[at + 1], end: at + 2 };
  if (sign === "`") return code(scan, at);
  if (depth >= MAX_DEPTH) return null;
  if (sign === "*" || sign === "_" || sign === "~") return emphasis(scan, at);
  if (inLink) return null;
  if (sign === "h" && !WORD.test(text[at - 1] ?? "")) return bareUrl(text, at);
  if (sign === "[") return link(scan, at, at);
  if (sign === "!" && text[at + 1] === "[") return link(scan, at, at + 1);
  if (sign === "<") return enclosedUrl(text, at);
  return null;
}

function code({ text, missing }, at) {
  const fence = run(text, at);
  const begin = at + fence.length;
  if (missing.has(fence)) return { node: fence, end: begin };
  let close = text.indexOf(fence, begin);
  while (close >= 0 && run(text, close).length !== fence.length) {
    close = text.indexOf(fence, close + run(text, close).length);
  }
  if (close < 0) {
    missing.add(fence);
    return { node: fence, end: begin };
  }
  const inner = text.slice(begin, close).replaceAll("\n", " ");
  const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
  return { node: el("code", {}, padded ? inner.slice(1, -1) : inner), end: close + fence.length };
}

function emphasis(scan, at) {
  const { text, depth, inLink } = scan;
  const signs = run(text, at);
  const sign = signs[0];
  if (signs.length > 3) return { node: signs, end: at + signs.length };
  for (const size of [signs.length, signs.length - 1]) {
    const mark = sign.repeat(size);
    if (size === 0 || (sign === "~" && size !== 2)) continue;
    const close = closing(scan, at, mark);
    if (close < 0) continue;
    const inner = inline(text.slice(at + size, close), depth + 1, inLink);
    const node = size === 3 ? el("strong", {}, el("em", {}, inner)) : el(ELEMENTS[mark], {}, inner);
    return { node, end: close + size };
  }
  return null;
}

/** Where the emphasis that opens at `at` closes, or -1. */
function closing({ text, missing }, at, mark) {
  const begin = at + mark.length;
  if (missing.has(mark) || !/\S/.test(text[begin] ?? "")) return -1;
  if (mark[0] === "_" && WORD.test(text[at - 1] ?? "")) return -1; // snake_case
  for (let close = text.indexOf(mark, begin + 1); close >= 0; close = text.indexOf(mark, close + 1)) {
    const signs = run(text, close).length;
    if (mark.length === 1 && signs === 2) {
      close += 1; // strong within this one
      continue;
    }
    const end = close + signs - mark.length; // of a longer run the last signs close
    const fits = /\S/.test(text[close - 1]) && !(mark[0] === "_" && WORD.test(text[end + mark.length] ?? ""));
    if (fits) return end;
    close = end;
  }
  missing.add(mark);
  return -1;
}

/** `[text](address "title")`. An image becomes a link: the page loads nothing from elsewhere. */
function link({ text, depth }, at, bracket) {
  const close = matching(text, bracket, "[", "]");
  if (close < 0 || text[close + 1] !== "(") return null;
  const end = matching(text, close + 1, "(", ")");
  if (end < 0) return null;
  const url = safeUrl(text.slice(close + 2, end).trim().split(/\s/)[0].replace(/^<|>$/g, ""));
  if (!url) return null;
  const words = text.slice(bracket + 1, close);
  return { node: anchor(url, words.trim() ? inline(words, depth + 1, true) : url), end: end + 1 };
}

function bareUrl(text, at) {
  BARE_URL.lastIndex = at;
  const found = withoutEnd(BARE_URL.exec(text)?.[0] ?? "");
  const url = safeUrl(found);
  return url ? { node: anchor(url, found), end: at + found.length } : null;
}

/** Less what ends the sentence, most likely: punctuation, and brackets that were opened before. */
function withoutEnd(address) {
  let end = address.length;
  let open = address.split("(").length - address.split(")").length;
  for (; end > 0 && ".,;:!?'*_~])".includes(address[end - 1]); end -= 1) {
    if (address[end - 1] !== ")") continue;
    if (open >= 0) break;
    open += 1;
  }
  return address.slice(0, end);
}

function enclosedUrl(text, at) {
  const end = text.indexOf(">", at);
  const inner = end > 0 && end - at < MAX_LINK_TEXT ? text.slice(at + 1, end) : "";
  const url = /\s/.test(inner) ? null : safeUrl(inner);
  return url ? { node: anchor(url, inner), end: end + 1 } : null;
}

function anchor(url, words) {
  return el("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, words);
}

function matching(text, at, opens, closes) {
  let open = 0;
  for (let i = at; i < text.length && i - at < MAX_LINK_TEXT; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === opens) open += 1;
    else if (text[i] === closes && --open === 0) return i;
  }
  return -1;
}

function run(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return text.slice(at, end);
}
