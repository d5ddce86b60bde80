// Sources of an answer from documents: marks [1] in its text that open the passage, and a list beneath it.

import { el, shown, textNodes } from "./dom.js";
import { where } from "./search.js";

const MARK = /\[(\d{1,3})\]/;
const OUTSIDE = "pre, code, a, button";

/** Turns each [n] that has a citation into a button. `open(citation)` shows its passage. */
export function link(root, citations, open) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) {
    const { currentNode: node } = walker;
    if (MARK.test(node.data) && !node.parentElement.closest(OUTSIDE)) texts.push(node);
  }
  for (const node of texts) {
    const parts = node.data.split(new RegExp(MARK, "g"));
    // Every second part is the number of a mark.
    const nodes = parts.flatMap((part, at) => (at % 2 ? [mark(Number(part), parts[at - 1], citations, open)] : part));
    node.replaceWith(...nodes.filter((one) => one !== ""));
  }
}

const wordsOf = (text) => new Set(text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? []);

/** Of several places in a source the one that shares most words with what the answer says. */
function closest(places, said) {
  const words = wordsOf(said.slice(-300).split(/[.!?]\s/).at(-1));
  const shared = ({ quote }) => [...wordsOf(quote)].filter((word) => words.has(word)).length;
  return places.reduce((best, one) => (shared(one) > shared(best) ? one : best));
}

function mark(number, said, citations, open) {
  const places = citations.filter((one) => one.number === number);
  if (!places.length) return `[${number}]`;
  const citation = closest(places, said);
  const label = shown(`Source ${number}: ${citation.title || citation.document}`);
  const press = () => open(citation);
  return el("button", { type: "button", class: "citation", "aria-label": label, title: label, on: { click: press } }, String(number));
}

/** The list of sources; what was read and not cited is folded away. Null where nothing was read. */
export function sources({ citations, passages, found }, open) {
  const cited = new Set(citations.map((one) => one.number));
  const others = passages.filter((one) => !cited.has(one.number));
  if (!citations.length && !others.length) return null;
  const node = el("section", { class: "sources", "aria-label": "Sources" });
  if (citations.length) {
    const items = citations.map((one) => source(one, one.quote, open));
    node.append(el("h3", {}, citations.length === 1 ? "Source" : "Sources"), el("ol", {}, items));
  } else if (found) {
    node.append(el("p", { class: "wrong" }, "No passage was found that says this. Check it before you rely on it."));
  }
  if (others.length) {
    const words = `Read, not cited (${others.length})`;
    const items = others.map((one) => source(one, "", open));
    node.append(el("details", {}, el("summary", {}, words), el("ol", {}, items)));
  }
  return node;
}

function source(one, quote, open) {
  const title = el("button", { type: "button", class: "source-title", dir: "auto", on: { click: () => open(one) } });
  title.append(el("span", { class: "number" }, `${one.number} `), ...textNodes(one.title || one.document));
  const said = quote ? el("blockquote", { dir: "auto" }, textNodes(quote)) : null;
  return el("li", {}, title, el("p", { class: "where", dir: "auto" }, where(one)), said);
}
