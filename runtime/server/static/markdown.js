// Markdown as language models write it, shown while it is being written. A line is read once: blocks that have ended
// are left alone, and only the open one is drawn again, so that an answer of a megabyte costs no more a line than a
// short one.

import { copyButton, el, textNodes } from "./dom.js";
import { inline } from "./inline.js";

// An open block is drawn again with each piece that comes. No prose needs this many characters in one paragraph.
const LONGEST_BLOCK = 16_000;
// Lines of code are laid out in pieces: the browser then lays out the last piece again, not all of it.
const LONGEST_PIECE = 4_000;

// Patterns go over a line once, whatever stands in it: no two repeats that could share characters follow each other.
const FENCE = /^(\s*)(`{3,}|~{3,})([^`]*)$/;
const PART_OF_FENCE = /^\s*(`+|~+)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+(.*)|)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const ROW = /\|/;
const DELIMITER = /^:?-+:?$/;

/** A fenced block: a bar with its language and a button, and the code, to which lines are added. */
class CodeBlock {
  constructor(language) {
    this.parts = [];
    this.code = el("code", { dir: "ltr" });
    this.piece = null;
    const name = language || "text";
    const bar = el("div", { class: "bar" }, el("span", { class: "language" }, textNodes(name)));
    bar.append(copyButton("Copy", () => this.parts.join("").replace(/\n$/, "")));
    const region = { tabindex: "0", role: "region", "aria-label": `Code, ${name}` };
    this.node = el("div", { class: "code" }, bar, el("pre", region, this.code));
  }

  add(text) {
    this.parts.push(text);
    if (!this.piece || this.piece.length > LONGEST_PIECE) {
      this.piece = { node: el("span", { class: "piece" }), length: 0 };
      this.code.append(this.piece.node);
    }
    this.piece.length += text.length;
    this.piece.node.append(...textNodes(text));
  }
}

/** Draws Markdown into an element: `append` pieces of text, `draw` when the screen is due, `end` after the last. */
export class Markdown {
  #parent;
  #rest = ""; // the line that has begun
  #kind = null; // of the open block: paragraph, list, quote, table
  #lines = []; // of the open block
  #size = 0; // characters in it
  #fence = null; // {mark, indent, block} while code is open
  #provisional = []; // nodes that the next drawing replaces

  constructor(parent) {
    this.#parent = parent;
  }

  append(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    if (lines.length) this.#clear();
    for (const line of lines) this.#read(line.endsWith("\r") ? line.slice(0, -1) : line);
    // A line without an end is cut where a paragraph would be.
    while (this.#rest.length > LONGEST_BLOCK) {
      this.#clear();
      this.#readLong();
    }
  }

  draw() {
    this.#clear();
    // What may become a fence is shown when it is known whether it does.
    const rest = PART_OF_FENCE.test(this.#rest) || (!this.#fence && FENCE.test(this.#rest)) ? "" : this.#rest;
    if (this.#fence) {
      if (rest) this.#keep(el("span", { class: "piece" }, textNodes(rest)), this.#fence.block.code);
    } else if (rest && startsBlock(rest, this.#kind)) {
      this.#keep(block(this.#kind, this.#lines));
      this.#keep(block(kindOf(rest), [rest]));
    } else {
      const lines = [...this.#lines, ...(rest ? [rest] : [])];
      if (lines.length) this.#keep(block(this.#kind ?? kindOf(lines[0]), lines));
    }
  }

  end() {
    this.#clear();
    if (this.#rest) this.#read(this.#rest);
    this.#rest = "";
    this.#close();
    this.#fence = null;
  }

  #keep(node, parent = this.#parent) {
    if (!node) return;
    parent.append(node);
    this.#provisional.push(node);
  }

  #clear() {
    for (const node of this.#provisional) node.remove();
    this.#provisional = [];
  }

  #close() {
    const node = this.#lines.length ? block(this.#kind, this.#lines) : null;
    if (node) this.#parent.append(node);
    [this.#kind, this.#lines, this.#size] = [null, [], 0];
  }

  #readLong() {
    const piece = this.#rest.slice(0, LONGEST_BLOCK);
    this.#rest = this.#rest.slice(LONGEST_BLOCK);
    if (this.#fence) this.#fence.block.add(piece);
    else {
      this.#read(piece);
      this.#close();
    }
  }

  #read(line) {
    if (this.#fence) return this.#readCode(line);
    const fence = FENCE.exec(line);
    if (fence) return this.#openCode(fence);
    if (this.#size > LONGEST_BLOCK || startsBlock(line, this.#kind)) this.#close();
    const blank = !line.trim();
    if (blank && this.#kind !== "list") return this.#close();
    this.#kind ??= kindOf(line);
    if (this.#kind === "paragraph" && this.#lines.length === 1 && isTable(this.#lines[0], line)) this.#kind = "table";
    this.#lines.push(line);
    this.#size += line.length + 1;
    if (this.#kind === "heading" || this.#kind === "rule") this.#close();
  }

  #openCode([, indent, mark, info]) {
    this.#close();
    const opened = new CodeBlock(info.trim().split(/\s/)[0]);
    this.#parent.append(opened.node);
    this.#fence = { mark, indent: indent.length, block: opened };
  }

  #readCode(line) {
    const { mark, indent, block: open } = this.#fence;
    const bare = line.trim();
    if (bare.length >= mark.length && bare === mark[0].repeat(bare.length)) {
      this.#fence = null;
      return;
    }
    // A fence in a list is indented, and its lines with it.
    const spaces = line.length - line.trimStart().length;
    open.add(`${line.slice(Math.min(spaces, indent))}\n`);
  }
}

function kindOf(line) {
  if (RULE.test(line)) return "rule";
  if (HEADING.test(line)) return "heading";
  if (ITEM.test(line)) return "list";
  if (QUOTE.test(line)) return "quote";
  return "paragraph";
}

const isTable = (head, line) =>
  ROW.test(head) && ROW.test(line) && cells(line).every((cell) => DELIMITER.test(cell));

/** Whether `line` ends the open block of `kind`, and begins another. */
function startsBlock(line, kind) {
  if (kind === null) return false;
  const next = kindOf(line);
  if (kind === "list") return next !== "list" && Boolean(line.trim()) && !/^\s/.test(line);
  if (kind === "quote") return next !== "quote";
  if (kind === "table") return !ROW.test(line);
  return next !== "paragraph";
}

function block(kind, lines) {
  switch (kind) {
    case "rule":
      return el("hr");
    case "heading":
      return heading(lines[0]);
    case "list":
      return list(lines.map(item));
    case "quote":
      return quote(lines);
    case "table":
      return table(lines);
    default:
      return withInline("p", lines.join("\n").trim());
  }
}

function withInline(tag, text, attributes = {}) {
  const node = el(tag, { dir: "auto", ...attributes });
  inline(node, text);
  return node;
}

function heading(line) {
  const [, marks, written] = HEADING.exec(line);
  let text = written.trimEnd();
  while (text.endsWith("#")) text = text.slice(0, -1);
  // The page's own headings are levels 1 and 2.
  return withInline(`h${Math.min(marks.length + 2, 6)}`, text, { class: `level-${marks.length}` });
}

function quote(lines) {
  const node = el("blockquote");
  const inner = new Markdown(node);
  // What is quoted is Markdown too; a quote in a quote is enough.
  inner.append(lines.map((line) => (QUOTE.exec(line)?.[1] ?? line).replace(/^(>\s?)+/, "")).join("\n"));
  inner.end();
  return node;
}

/** One line of a list: its depth in spaces, its bullet or number, its text. */
function item(line) {
  const found = ITEM.exec(line);
  if (!found) return { text: line.trim() };
  return { depth: found[1].replaceAll("\t", "    ").length, mark: found[2], text: found[3] ?? "" };
}

const DEEPEST_LIST = 8;

function list(items) {
  const root = el("div", { class: "list" });
  const open = []; // lists that are open, outermost first: {depth, node, last}
  for (const one of items) {
    if (one.mark === undefined) {
      continueItem(open, one.text);
      continue;
    }
    while (open.length && one.depth < open.at(-1).depth) open.pop();
    const ordered = /\d/.test(one.mark);
    const inner = !open.length || one.depth >= open.at(-1).depth + 2;
    if (inner && open.length < DEEPEST_LIST) open.push(newList(root, open.at(-1), one, ordered));
    else if (open.at(-1).ordered !== ordered) {
      open.pop(); // bullets and numbers are two lists
      open.push(newList(root, open.at(-1), one, ordered));
    }
    const entry = withInline("li", one.text);
    open.at(-1).node.append(entry);
    open.at(-1).last = entry;
  }
  return root;
}

function newList(root, outer, one, ordered) {
  const start = ordered ? parseInt(one.mark, 10) : null;
  const node = el(ordered ? "ol" : "ul", { start: start !== null && start !== 1 ? start : null });
  (outer?.last ?? root).append(node);
  return { depth: one.depth, node, last: null, ordered };
}

/** A line without a bullet of its own goes on with the item before it. */
function continueItem(open, text) {
  const last = open.at(-1)?.last;
  if (!last || !text) return;
  last.append(el("br"));
  inline(last, text);
}

function cells(line) {
  const bare = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return bare.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines) {
  const [head, delimiters, ...rows] = lines.map(cells);
  const sides = delimiters.map((cell) => (/^:?-+:$/.test(cell) ? (cell[0] === ":" ? "center" : "end") : null));
  const cell = (tag, text, side) =>
    withInline(tag, text ?? "", { class: side && `to-${side}`, scope: tag === "th" ? "col" : null });
  const row = (tag, texts) => el("tr", {}, head.map((_, at) => cell(tag, texts[at], sides[at])));
  const body = el("tbody", {}, rows.map((texts) => row("td", texts)));
  const node = el("table", {}, el("thead", {}, row("th", head)), body);
  return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, node);
}
