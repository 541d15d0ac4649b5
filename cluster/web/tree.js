// A conversation's messages are a tree: a message that is edited, or answered again, gets a sibling and keeps its own
// branch. `leaf` is where the open branch ends. Nodes stand in the order they were added, parents first.
//
//     system prompt ── u1 ── a1 ── u2  ── a2
//                                └ u2' ── a2'   <- leaf

/** The open branch, first message first. */
export function path(conversation) {
  const nodes = new Map(conversation.nodes.map((node) => [node.id, node]));
  const branch = [];
  for (let node = nodes.get(conversation.leaf); node; node = nodes.get(node.parent)) branch.unshift(node);
  return branch;
}

/** The node and the ones it is an alternative to, oldest first. */
export function siblings(conversation, node) {
  return conversation.nodes.filter((other) => other.parent === node.parent);
}

/** Adds a message and opens its branch. */
export function add(conversation, parent, fields) {
  const id = conversation.nodes.reduce((last, node) => Math.max(last, node.id), 0) + 1;
  const node = { id, parent, ...fields };
  conversation.nodes.push(node);
  conversation.leaf = id;
  return node;
}

/** Opens the branch that `node` is on, down to its newest end. */
export function open(conversation, node) {
  let leaf = node;
  for (let next = node; next; next = conversation.nodes.findLast((other) => other.parent === leaf.id)) leaf = next;
  conversation.leaf = leaf.id;
}

/** Under which message a new question of the user goes: one that was never answered is replaced, not continued. */
export function end(conversation) {
  const last = path(conversation).at(-1);
  if (!last) return null;
  return last.role === "user" ? last.parent : last.id;
}
