// The figures of a turn: what was reused and what was not, and what that did to the time to the first word.

import { el, show, svg } from "./dom.js";
import { causeName, count, milliseconds, sum, TIERS, tierLetter, tierName, times } from "./format.js";

/** Shows a turn's figures, as the server's usage or its description of a session tells them. */
export function showFigures(node, figures) {
  const reused = Object.entries(figures.reused ?? {}).filter(([, number]) => number);
  reused.sort(([a], [b]) => TIERS.indexOf(a) - TIERS.indexOf(b));
  const recomputed = Object.entries(figures.recomputed ?? {}).filter(([, number]) => number);
  show(node, speed(figures), bar(reused, sum(figures.recomputed)), origins(reused, recomputed), aside(figures));
}

/** "312 of 340 tokens reused", for where there is room for one line. */
export function summary(figures) {
  const reused = sum(figures.reused);
  return `${count(reused)} of ${count(reused + sum(figures.recomputed))} tokens reused`;
}

function speed({ reused, ttft_ms: real, ttft_without_reuse_ms: without }) {
  if (typeof real !== "number") return el("p", { class: "note" }, "No first word was timed.");
  if (typeof without !== "number" || !sum(reused)) {
    return el("p", { class: "headline figures" }, "First word after ", el("strong", {}, milliseconds(real)));
  }
  const longest = Math.max(real, without, 0.001);
  return el(
    "div",
    { class: "speed" },
    el("p", { class: "headline figures" }, headline(without / Math.max(real, 0.001))),
    compared("First word after", real, longest, true),
    compared("Without reuse, about", without, longest, false),
  );
}

function headline(ratio) {
  if (ratio >= 1.05) return [el("strong", {}, `${times(ratio)}×`), " sooner"];
  if (ratio > 0.95) return [el("strong", {}, "As soon"), " as without reuse"];
  return [el("strong", {}, `${times(1 / ratio)}×`), " later than without reuse"];
}

function compared(label, value, longest, isOurs) {
  const width = Math.max(1, (100 * value) / longest);
  return el(
    "div",
    { class: "compared" },
    el("span", {}, label),
    el("span", { class: "figures" }, milliseconds(value)),
    graph([svg("rect", { class: isOurs ? "ours" : "other", x: 0, y: 0, width, height: 4, rx: 0.5 })]),
  );
}

function bar(reused, computed) {
  const total = sum(Object.fromEntries(reused)) + computed;
  if (!total) return null;
  const parts = computed ? [...reused, ["none", computed]] : reused;
  let x = 0;
  const rects = parts.map(([tier, number]) => {
    const width = (100 * number) / total;
    const rect = svg("rect", { "data-tier": tier, x, y: 0, width, height: 4 });
    x += width;
    return rect;
  });
  return el("div", { class: "origins-bar" }, graph(rects));
}

function graph(rects) {
  const box = { class: "bar", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true", focusable: "false" };
  return svg("svg", box, rects);
}

function origins(reused, recomputed) {
  const row = (tier, words, number) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, el("span", { class: "swatch", "data-tier": tier, "aria-hidden": "true" }, tierLetter(tier)), words),
      el("td", { class: "figures" }, count(number)),
    );
  return el(
    "table",
    { class: "origins" },
    el("caption", {}, "Tokens of the prompt"),
    el(
      "tbody",
      {},
      reused.map(([tier, number]) => row(tier, `reused from ${tierName(tier)}`, number)),
      recomputed.map(([cause, number]) => row("none", `computed: ${causeName(cause)}`, number)),
    ),
  );
}

function aside({ queue_ms: queue, restore_ms: restore, drift_at: drift, completion_tokens: answer }) {
  const pairs = [["Queue", milliseconds(queue)], ["Restore", milliseconds(restore)]];
  if (typeof answer === "number") pairs.push(["Answer", `${count(answer)} tokens`]);
  if (typeof drift === "number") pairs.push(["Template drift", `at token ${count(drift)}`]);
  return el("dl", { class: "aside figures" }, pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}
