// Markdown inside a line: code, emphasis, links, line breaks. Every node is made with dom.js; what is not
// understood stays the text that it is.

import { el, textNodes } from "./dom.js";

const DEEPEST = 6; // emphasis in emphasis: beyond this it is text

// Where something other than text may begin.
const MARK = /`+|\*\*|__|~~|\*|_|!?\[|<https?:|https?:\/\/|\\[!-/:-@[-`{-~]|\n/gi;
const LINK = /!?\[([^\[\]\n]{0,500})\]\(\s*<?([^\s()<>]{1,2000}(?:\([^\s()<>]{0,500}\)[^\s()<>]{0,2000})?)>?(?:\s+"[^"\n]{0,500}")?\s*\)/y;
const ANGLE = /<(https?:[^\s<>]{1,2000})>/iy;
const BARE = /https?:\/\/[^\s<>"'`|\\^{}]{1,2000}/iy;
const EMPHASIS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };

/** The address as the browser understands it, where it is one of the web; null for javascript:, data:, files… */
export function webAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

/** A link never hides where it leads: the address stands beside its text unless it is the text. */
function link(words, address) {
  const attributes = { href: address, target: "_blank", rel: "noopener noreferrer nofollow" };
  const anchor = el("a", attributes, textNodes(words || address));
  if (!words || words === address || `${words}/` === address) return [anchor];
  return [anchor, el("span", { class: "address" }, " (", textNodes(address), ")")];
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** What begins at `at` with `mark`: {nodes, end}, or null where it is only text. */
function construct(text, mark, at, depth, missing) {
  if (mark === "\n") return { nodes: [el("br")], end: at + 1 };
  if (mark[0] === "\\") return { nodes: textNodes(mark[1]), end: at + 2 };
  if (mark[0] === "`") return codeSpan(text, mark, at, missing);
  if (mark.endsWith("[")) return namedLink(text, at);
  if (mark[0] === "<") return addressLink(ANGLE, text, at);
  if (mark[0].toLowerCase() === "h") return addressLink(BARE, text, at);
  return emphasis(text, mark, at, depth, missing);
}

function codeSpan(text, fence, at, missing) {
  const from = at + fence.length;
  if (missing.has(fence)) return null;
  let end = text.indexOf(fence, from);
  while (end >= 0 && text[end + fence.length] === "`") {
    while (text[end] === "`") end++; // a longer run is not this one's end
    end = text.indexOf(fence, end);
  }
  if (end < 0) {
    missing.add(fence);
    return null;
  }
  let code = text.slice(from, end).replaceAll("\n", " ");
  if (code.trim() && code.startsWith(" ") && code.endsWith(" ")) code = code.slice(1, -1);
  return { nodes: [el("code", { dir: "ltr" }, textNodes(code))], end: end + fence.length };
}

function namedLink(text, at) {
  const found = match(LINK, text, at);
  const address = found && webAddress(found[2]);
  // An image is a link too: a picture that an answer names would be a request to whoever it names.
  return address ? { nodes: link(found[1], address), end: at + found[0].length } : null;
}

function addressLink(pattern, text, at) {
  const found = match(pattern, text, at);
  if (!found) return null;
  const written = found[1] ?? found[0].replace(/[.,;:!?)\]*_~]+$/, ""); // a sentence's end is not the address's
  const address = webAddress(written);
  if (!address) return null;
  return { nodes: link(written, address), end: at + (found[1] ? found[0].length : written.length) };
}

const WORD = /[\p{L}\p{N}]/u;
const SPACE = /\s/;

function emphasis(text, mark, at, depth, missing) {
  const from = at + mark.length;
  const inWord = mark[0] === "_" && WORD.test(text[at - 1] ?? "");
  if (depth >= DEEPEST || inWord || missing.has(mark) || SPACE.test(text[from] ?? " ")) return null;
  for (let end = text.indexOf(mark, from + 1); ; end = text.indexOf(mark, end + mark.length)) {
    if (end < 0) {
      missing.add(mark); // nor is there one for any later mark: searched once, however many there are
      return null;
    }
    if (mark.length === 1 && text[end + 1] === mark) {
      end++; // a double mark is not a single one's end
      continue;
    }
    while (mark.length === 2 && text[end + 2] === mark[0]) end++; // ***both***: the outer mark ends last
    if (SPACE.test(text[end - 1]) || (mark[0] === "_" && WORD.test(text[end + mark.length] ?? ""))) continue;
    const node = el(EMPHASIS[mark], {});
    inline(node, text.slice(from, end), depth + 1);
    return { nodes: [node], end: end + mark.length };
  }
}

/** Appends `text` to `parent`, with its marks understood. */
export function inline(parent, text, depth = 0) {
  const missing = new Set(); // marks that have no end from here on
  let shown = 0;
  for (let found = match(MARK, text, 0); found; ) {
    const made = construct(text, found[0], found.index, depth, missing);
    if (made) {
      parent.append(...textNodes(text.slice(shown, found.index)), ...made.nodes);
      shown = made.end;
    }
    found = match(MARK, text, made?.end ?? found.index + found[0].length);
  }
  parent.append(...textNodes(text.slice(shown)));
}
