// A conversation's chunks as a strip of cells: one cell a chunk, coloured and lettered by its fastest tier, with a dot
// for each slower tier that has it too. Neighbours that are alike share a cell where there are too many.

import { byId, el, setText, show } from "./dom.js";
import { bytes, count, listed, plural, TIERS, tierLetter, tierName } from "./format.js";

const MAX_CELLS = 160;

export class Strip {
  #strip = byId("strip");
  #legend = byId("legend");
  #detail = byId("strip-detail");
  #cells = [];
  #at = 0;
  #drawn = "";

  constructor() {
    this.#strip.addEventListener("keydown", (event) => this.#onKey(event));
    this.#strip.addEventListener("focusin", (event) => this.#choose(this.#strip.querySelectorAll("button"), event.target));
    this.#strip.addEventListener("pointerover", (event) => this.#describe(event.target));
    this.#strip.addEventListener("pointerleave", () => this.#describe(null));
  }

  /** Chunks as the server tells them: start, end, bytes, tiers. */
  update(chunks) {
    const drawing = JSON.stringify(chunks);
    if (drawing === this.#drawn) return;
    this.#drawn = drawing;
    const hadFocus = this.#strip.contains(document.activeElement);
    this.#cells = chunks.length > MAX_CELLS ? merged(chunks) : chunks.map((chunk) => ({ ...chunk, chunks: 1 }));
    this.#at = Math.min(this.#at, Math.max(0, this.#cells.length - 1));
    show(this.#strip, this.#cells.map((cell, i) => button(cell, i === this.#at)));
    this.#showLegend(chunks);
    this.#describe(null);
    if (hadFocus) this.#strip.children[this.#at]?.focus();
  }

  #showLegend(chunks) {
    const tokens = Object.fromEntries([...TIERS, "none"].map((tier) => [tier, 0]));
    for (const chunk of chunks) tokens[fastest(chunk)] += chunk.end - chunk.start;
    const items = Object.entries(tokens).map(([tier, number]) =>
      el(
        "li",
        { "data-empty": number === 0 },
        el("span", { class: "swatch", "data-tier": tier, "aria-hidden": "true" }, tierLetter(tier)),
        `${tierName(tier)} `,
        el("span", { class: "figures" }, count(number)),
      ),
    );
    show(this.#legend, items);
  }

  #describe(target) {
    const at = [...this.#strip.children].indexOf(target?.closest?.("button"));
    const all = this.#cells;
    if (at >= 0) setText(this.#detail, words(all[at]));
    else {
      const chunks = all.reduce((total, cell) => total + cell.chunks, 0);
      const size = all.reduce((total, cell) => total + (cell.tiers.length ? cell.bytes : 0), 0);
      setText(this.#detail, `${plural(all.at(-1)?.end ?? 0, "token")} in ${plural(chunks, "chunk")}, ${bytes(size)}`);
    }
  }

  #onKey(event) {
    const cells = this.#strip.querySelectorAll("button");
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -cells.length, End: cells.length };
    const step = steps[event.key];
    if (step === undefined || !cells.length) return;
    event.preventDefault();
    cells[Math.max(0, Math.min(cells.length - 1, this.#at + step))].focus();
  }

  /** One tab stop for all cells: the one that was looked at last. */
  #choose(cells, target) {
    const at = [...cells].indexOf(target);
    if (at < 0) return;
    cells[this.#at]?.setAttribute("tabindex", "-1");
    this.#at = at;
    cells[at].setAttribute("tabindex", "0");
    this.#describe(target);
  }
}

function button(cell, isStop) {
  const text = words(cell);
  const tier = fastest(cell);
  const slower = cell.tiers.slice(1).map(() => el("i"));
  return el(
    "button",
    { type: "button", "data-tier": tier, "aria-label": text, title: text, tabindex: isStop ? 0 : -1 },
    el("span", {}, cell.chunks > 1 ? `${tierLetter(tier)}×${cell.chunks}` : tierLetter(tier)),
    el("span", { class: "copies" }, slower),
  );
}

function words({ start, end, bytes: size, tiers, chunks }) {
  const where = tiers.length ? `in ${listed(tiers.map(tierName))}` : "nowhere: would be computed again";
  const many = chunks > 1 ? ` (${plural(chunks, "chunk")})` : "";
  return `Tokens ${count(start)} to ${count(end)}${many}, ${bytes(size)}, ${where}`;
}

function fastest(chunk) {
  return chunk.tiers[0] ?? "none";
}

function merged(chunks) {
  const cells = [];
  for (const chunk of chunks) {
    const last = cells.at(-1);
    if (last && last.tiers.join() === chunk.tiers.join()) {
      last.end = chunk.end;
      last.bytes += chunk.bytes;
      last.chunks += 1;
    } else cells.push({ ...chunk, chunks: 1 });
  }
  return cells;
}
