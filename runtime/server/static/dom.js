// Making DOM nodes. Everything shown on this page passes through here: text becomes text nodes and nothing
// else, so that no answer, tool call or message of the server can become markup.

/**
 * An element with attributes and children. `on` holds event listeners; a value of null, undefined or false leaves
 * the attribute away; strings among the children become text nodes.
 */
export function el(tag, { on = {}, ...attributes } = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const [name, listener] of Object.entries(on)) node.addEventListener(name, listener);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element; decoration only, hence hidden from screen readers. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

/** One of the icons that index.html defines. */
export function icon(name) {
  const use = svg("use", { href: `#icon-${name}` });
  return svg("svg", { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true" }, use);
}

/** A button with an icon and its words. */
export function button(words, { name = null, kind = "quiet", press, ...attributes }) {
  const label = el("span", { class: "words" }, words);
  const parts = name ? [icon(name), label] : [label];
  return el("button", { type: "button", class: `button ${kind}`, on: { click: press }, ...attributes }, parts);
}

// Embeddings, overrides and isolates of writing direction. They can make a line read as other than it is, in code
// above all (CVE-2021-42574), so they are shown as what they are.
const DIRECTION = /[\u202a-\u202e\u2066-\u2069]/;

/** Text as nodes, in which characters that reorder their neighbours are made visible. */
export function textNodes(text) {
  if (!DIRECTION.test(text)) return text ? [document.createTextNode(text)] : [];
  const nodes = [];
  for (const part of text.split(/([\u202a-\u202e\u2066-\u2069])/)) {
    if (!part) continue;
    if (!DIRECTION.test(part)) nodes.push(document.createTextNode(part));
    else {
      const code = `U+${part.codePointAt(0).toString(16).toUpperCase()}`;
      nodes.push(el("span", { class: "control", title: "A character that changes the writing direction" }, code));
    }
  }
  return nodes;
}

/** Text for an attribute, where nodes cannot show what reorders their neighbours. */
export const shown = (text) => textNodes(text).map((node) => node.textContent).join("");

/** Copies text. Where the page came over plain HTTP there is no clipboard API, and the older way is left. */
async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const before = document.activeElement;
  const field = el("textarea", { class: "visually-hidden", "aria-hidden": "true", tabindex: "-1" });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  before?.focus();
  if (!done) throw new Error("the browser refused");
}

const FLASH_MS = 1600;

/** A button that copies what `read()` gives, and says for a moment that it did. */
export function copyButton(words, read) {
  const node = button(words, {
    name: "copy",
    press: async () => {
      const label = node.querySelector(".words");
      try {
        await copy(read());
        label.textContent = "Copied";
      } catch {
        label.textContent = "Could not copy";
      }
      setTimeout(() => (label.textContent = words), FLASH_MS);
    },
  });
  node.querySelector(".words").setAttribute("aria-live", "polite");
  return node;
}
