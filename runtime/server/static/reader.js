// A document in a dialog of its own, opened at the place that a passage or a citation came from.

import { button, el, textNodes } from "./dom.js";
import { marked, part, points } from "./marks.js";
import { bytes } from "./measure.js";
import { readDocument } from "./rag.js";

const AT_ONCE = 40; // chunks

/** `options()` gives {key, signal} of requests. */
export class Reader {
  #dialog;
  #text;
  #title;
  #facts;
  #asked = null; // what is open: {knowledge, document, chunk, span}
  #pieces = []; // [{ordinal, span, node}] in order
  #coming = null; // AbortController
  #more = false;

  constructor(dialog, options) {
    this.#dialog = dialog;
    this.options = options;
    this.#title = el("h2", { id: "reader-title", dir: "auto" });
    this.#facts = el("p", { class: "help", dir: "auto" });
    this.#text = el("div", { class: "reader-text", tabindex: "0", role: "region", "aria-labelledby": "reader-title" });
    const close = button("Close", { name: "close", press: () => this.close() });
    const head = el("div", { class: "reader-head" }, el("div", { class: "grow" }, this.#title, this.#facts), close);
    dialog.replaceChildren(head, this.#text);
    dialog.addEventListener("close", () => this.#coming?.abort());
    dialog.addEventListener("click", (event) => event.target === dialog && this.close());
  }

  close() {
    this.#dialog.close();
  }

  /** Shows a document; `span` are the characters to mark and go to, `chunk` the chunk that they are in. */
  async open({ knowledge, document, chunk = "", span = null, title = "" }) {
    this.#asked = { knowledge, document, chunk, span };
    this.#pieces = [];
    this.#title.replaceChildren(...textNodes(title || document));
    this.#facts.replaceChildren(...textNodes(document));
    this.#text.replaceChildren(el("p", { class: "help" }, "Opening …"));
    if (!this.#dialog.open) this.#dialog.showModal();
    const found = await this.#read({ chunk });
    if (!found) return;
    this.#more = found.more;
    const words = [found.path, found.type, found.bytes === null ? "" : bytes(found.bytes)];
    this.#title.replaceChildren(...textNodes(found.title || document));
    this.#facts.replaceChildren(...textNodes(words.filter(Boolean).join(" · ")));
    this.#text.replaceChildren();
    this.#add(found.chunks);
    this.#offerMore();
    const target = this.#text.querySelector(".cited");
    this.#text.focus({ preventScroll: true });
    if (target) target.scrollIntoView({ block: "center" });
    else this.#text.scrollTop = 0;
  }

  /** Chunks of the open document; null where they did not come, which the page then says. */
  async #read(which) {
    this.#coming?.abort();
    const coming = (this.#coming = new AbortController());
    const { knowledge, document } = this.#asked;
    try {
      const options = { ...this.options(), signal: coming.signal };
      const found = await readDocument({ knowledge, id: document, limit: AT_ONCE, ...which }, options);
      return coming.signal.aborted ? null : found;
    } catch (error) {
      if (error.name !== "AbortError") {
        this.#text.append(el("p", { class: "wrong", role: "alert", dir: "auto" }, textNodes(error.message)));
      }
      return null;
    }
  }

  /** Adds chunks after those that are shown, or before them. Where two overlap, the text is shown once. */
  #add(chunks, before = false) {
    const next = before ? this.#pieces[0] : null;
    const made = [];
    let end = before ? 0 : (this.#pieces.at(-1)?.span[1] ?? 0);
    let heading = before ? null : this.#pieces.at(-1)?.heading;
    let page = before ? null : this.#pieces.at(-1)?.page;
    for (const chunk of chunks) {
      const node = el("div", { class: `reader-piece${chunk.span[0] > end ? " apart" : ""}` });
      if (chunk.page !== null && chunk.page !== page) node.append(el("p", { class: "reader-page" }, `Page ${chunk.page}`));
      if (chunk.heading && chunk.heading !== heading) {
        node.append(el("h3", { dir: "auto" }, textNodes(chunk.heading)));
      }
      const from = Math.max(chunk.span[0], end);
      node.append(this.#body(part(chunk.text, from - chunk.span[0]), from));
      made.push({ ...chunk, span: [from, chunk.span[1]], node });
      [end, heading, page] = [Math.max(end, chunk.span[1]), chunk.heading, chunk.page];
    }
    if (before) {
      this.#pieces.unshift(...made);
      for (const { node } of made) this.#text.insertBefore(node, next?.node ?? null);
    } else {
      this.#pieces.push(...made);
      this.#text.append(...made.map(({ node }) => node));
    }
  }

  #body(text, start) {
    const { span } = this.#asked;
    const node = el("p", { class: "reader-chunk", dir: "auto" });
    const end = start + points(text);
    const inside = span && span[0] < end && span[1] > start;
    const marks = inside ? [[Math.max(span[0], start) - start, Math.min(span[1], end) - start]] : [];
    node.append(...marked(text, marks, () => el("mark", { class: "cited" })));
    return node;
  }

  /** Buttons for what is not shown yet. */
  #offerMore() {
    for (const node of this.#text.querySelectorAll(":scope > .button")) node.remove();
    const first = this.#pieces[0]?.ordinal ?? 0;
    if (first > 0) this.#text.prepend(this.#moreButton("Earlier text", () => this.#earlier(first)));
    if (this.#more) this.#text.append(this.#moreButton("Further text", () => this.#later()));
    if (!this.#pieces.length) this.#text.append(el("p", { class: "help" }, "There is no text in this document."));
  }

  #moreButton(words, press) {
    return button(words, { kind: "bordered", press });
  }

  async #earlier(first) {
    const from = Math.max(0, first - AT_ONCE);
    const found = await this.#read({ first: from, limit: first - from });
    if (!found) return;
    const anchor = this.#pieces[0].node;
    const before = anchor.getBoundingClientRect().top;
    this.#add(found.chunks, true);
    this.#offerMore();
    this.#text.scrollTop += anchor.getBoundingClientRect().top - before; // what was read stays where it is
    this.#text.focus({ preventScroll: true });
  }

  async #later() {
    const found = await this.#read({ first: this.#pieces.at(-1).ordinal + 1 });
    if (!found) return;
    this.#more = found.more;
    this.#add(found.chunks);
    this.#offerMore();
    this.#text.focus({ preventScroll: true });
  }
}
