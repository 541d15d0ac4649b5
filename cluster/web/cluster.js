// The cluster as administrators see it: how full its tiers are, its replicas, and who waits.

import { byId, el, setText, show } from "./dom.js";
import { bytes, count, plural, seconds, TIERS, tierLetter, tierName } from "./format.js";

/** Shows a view of /reprise/v1/cluster. */
export function showCluster(view) {
  const tiers = [...view.tiers].sort((a, b) => TIERS.indexOf(a.tier) - TIERS.indexOf(b.tier));
  refill(byId("tiers"), tiers, tierRow);
  refill(byId("replicas"), view.replicas, replicaRow, "No replica is ready.");
  refill(byId("waiting"), view.waiting, waitingRow, "Nobody waits.");
  setText(byId("num-waiting"), view.num_waiting ? count(view.num_waiting) : "");
  const parts = [
    `${plural(view.fetches_in_flight ?? 0, "prefetch", "prefetches")} in flight`,
    `${plural(view.sessions_expected ?? 0, "conversation")} expected`,
  ];
  setText(byId("in-flight"), parts.join(", "));
}

/** Rows are kept and updated: what a reader has focused or selected stays. */
function refill(node, items, row, otherwise = "") {
  if (!items.length) {
    if (!node.querySelector(".empty")) show(node, el(node.tagName === "UL" ? "li" : "p", { class: "note empty" }, otherwise));
    return;
  }
  const drawing = JSON.stringify(items);
  if (node.dataset.drawn === drawing && !node.querySelector(".empty")) return;
  node.dataset.drawn = drawing;
  show(node, items.map(row));
}

function tierRow({ tier, node_id: nodeId, used_bytes: used, budget_bytes: budget }) {
  const name = tierName(tier);
  const amount = budget ? `${bytes(used)} of ${bytes(budget)}` : bytes(used);
  return el(
    "div",
    { class: "tier" },
    el("span", { class: "swatch", "data-tier": tier, "aria-hidden": "true" }, tierLetter(tier)),
    el("span", { title: nodeId || null }, name, nodeId ? el("span", { class: "node" }, ` ${shortened(nodeId)}`) : null),
    el("span", { class: "figures" }, amount),
    el("progress", { max: budget || 1, value: Math.min(used, budget || 1), "aria-label": `${name} ${nodeId}: ${amount}` }),
  );
}

function replicaRow({ replica_id: id, running, capacity_turns: turns, tokens, capacity_tokens: capacity, closing }) {
  const state = closing ? " (closing)" : "";
  return el(
    "li",
    {},
    el("span", { title: id }, `${shortened(id)}${state}`),
    el("span", { class: "figures" }, `${count(running)} of ${plural(turns, "turn")}`),
    el("span", { class: "figures" }, `${count(tokens)} of ${plural(capacity, "token")}`),
  );
}

function waitingRow({ session_id: id, waiting_s: waiting, prompt_tokens: prompt, fetching }) {
  const fetches = typeof fetching === "number" ? fetching : fetching ? 1 : 0;
  return el(
    "li",
    {},
    el("span", { title: id }, shortened(String(id).split("/").at(-1))),
    el("span", { class: "figures" }, `${plural(prompt, "token")}${fetches ? ", being fetched" : ""}`),
    el("span", { class: "figures" }, seconds(waiting)),
  );
}

function shortened(id) {
  return id.length > 14 ? `${id.slice(0, 8)}…` : id;
}
