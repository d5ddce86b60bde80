// Searching in the documents: a question, and the passages that answer it.

import { button, el, textNodes } from "./dom.js";
import { marked } from "./marks.js";
import { digits } from "./measure.js";
import { search } from "./rag.js";

/** `actions`: knowledge(), options() for requests, open(passage), show(document) in the picture, ask(question). */
export class Search {
  #form;
  #state;
  #results;
  #coming = null;

  constructor({ form, state, results }, actions) {
    [this.#form, this.#state, this.#results] = [form, state, results];
    this.actions = actions;
    form.addEventListener("submit", (event) => (event.preventDefault(), this.run()));
  }

  /** Forgets what was found: the documents are others now. */
  clear() {
    this.#coming?.abort();
    this.#results.replaceChildren();
    this.#say("");
  }

  async run() {
    const query = this.#form.elements.query.value.trim();
    if (!query) return this.#form.elements.query.focus();
    this.clear();
    const coming = (this.#coming = new AbortController());
    const body = {
      query,
      mode: this.#form.elements.mode.value,
      top: Number(this.#form.elements.top.value),
      knowledge: this.actions.knowledge(),
      explain: true,
    };
    this.#say("Searches …");
    try {
      const found = await search(body, { ...this.actions.options(), signal: coming.signal });
      this.#show(found);
    } catch (error) {
      if (error.name !== "AbortError") this.#say(error.message, true);
    }
  }

  #say(text, wrong = false) {
    this.#state.replaceChildren(...textNodes(text));
    this.#state.classList.toggle("wrong", wrong);
  }

  #show(found) {
    this.#say(found.length === 1 ? "1 passage" : found.length ? `${found.length} passages` : "Nothing was found.");
    this.#results.replaceChildren(...found.map((one) => this.#card(one)));
  }

  #card(passage) {
    const title = el("h3", { dir: "auto" }, textNodes(passage.title || passage.document));
    const excerpt = el("p", { class: "excerpt", dir: "auto" }, marked(passage.text, passage.matches));
    const open = button("Open", { name: "open", press: () => this.actions.open(passage) });
    const picture = button("In the graph", { name: "graph", press: () => this.actions.show(passage.document) });
    const named = ` ${passage.title || passage.document}`;
    for (const node of [open, picture]) node.append(el("span", { class: "visually-hidden" }, textNodes(named)));
    const actions = el("div", { class: "actions" }, open, picture, scores(passage));
    return el("li", { class: "passage" }, title, el("p", { class: "where", dir: "auto" }, where(passage)), excerpt, actions);
  }
}

/** Where a passage stands, in words. */
export function where(passage) {
  const parts = [passage.document, passage.heading, passage.page === null ? "" : `page ${passage.page}`];
  parts.push(`characters ${passage.span[0]}–${passage.span[1]}`);
  return textNodes(parts.filter(Boolean).join(" · "));
}

function scores(passage) {
  const pairs = Object.entries(passage.scores ?? {}).filter(([, value]) => Number.isFinite(value));
  if (!pairs.length) return null;
  const shown = pairs.map(([name, value]) => {
    const words = `${value < 0 ? "−" : ""}${digits(Math.abs(value))}`;
    return el("div", {}, el("dt", {}, textNodes(name)), el("dd", {}, words));
  });
  return el("details", { class: "scores" }, el("summary", {}, "Why it was found"), el("dl", { class: "facts" }, shown));
}
