// Making elements. Text only ever enters as text nodes: no HTML is parsed anywhere on this page.

const SVG = "http://www.w3.org/2000/svg";

/** The element of `index.html` with this id. */
export function byId(id) {
  const node = document.getElementById(id);
  if (!node) throw new Error(`index.html has no #${id}`);
  return node;
}

/** A new element. `properties`: attributes; `onclick` and the like are listeners; null and false are left out. */
export function el(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG, whose sizes are attributes: a strict CSP allows no style attributes. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

/** Replaces `node`'s children; null ones are left out. */
export function show(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

/** Sets a text if it is another one: screen readers and selections are not disturbed without need. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Makes a text known to screen readers. */
export function announce(text) {
  const region = byId("announcer");
  while (region.childElementCount > 20) region.firstElementChild.remove();
  region.append(el("p", {}, text));
}

/** Whether it worked. `navigator.clipboard` exists on https and localhost only. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const before = document.activeElement;
    const area = el("textarea", { class: "visually-hidden", "aria-hidden": "true", tabindex: "-1" });
    area.value = text;
    document.body.append(area);
    area.select();
    const worked = document.execCommand("copy");
    area.remove();
    before?.focus?.();
    return worked;
  }
}

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
