// The messages on the page, one view each, and what can be done with them.

import { Calls } from "./calls.js";
import { link, sources } from "./citations.js";
import { button, copyButton, el, textNodes } from "./dom.js";
import { errorCard } from "./errors.js";
import { Markdown } from "./markdown.js";
import { digits, readings, trace } from "./measure.js";

const LONG = 3_000; // characters of a question: more scrolls in a box of its own

class Question {
  constructor(message, edit) {
    this.message = message;
    this.node = el("article", { class: "message question" });
    this.edit = edit;
    this.#show();
  }

  #show() {
    const { content } = this.message;
    const long = content.length > LONG ? { tabindex: "0", role: "region", "aria-label": "Your message" } : {};
    const text = el("div", { class: `said${content.length > LONG ? " long" : ""}`, dir: "auto", ...long });
    text.append(...textNodes(content));
    this.editButton = button("Edit", { name: "edit", press: () => this.open() });
    this.editButton.hidden = true;
    const actions = el("div", { class: "actions" }, copyButton("Copy", () => content), this.editButton);
    this.node.replaceChildren(el("div", { class: "line" }, el("h2", { class: "who" }, "You"), actions), text);
  }

  setLast(last) {
    this.editButton.hidden = !last;
  }

  /** Turns the message into a field: Enter sends it anew, Escape leaves it as it was. */
  open() {
    const field = el("textarea", { class: "edit", rows: "3", "aria-label": "Edit your message" });
    field.value = this.message.content;
    const cancel = () => {
      this.#show();
      this.setLast(true);
      this.editButton.focus();
    };
    const send = () => field.value.trim() && this.edit(field.value.trim());
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation(); // here it does not stop an answer
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    const buttons = [
      button("Send again", { kind: "primary", press: send }),
      button("Cancel", { kind: "bordered", press: cancel }),
    ];
    const line = el("div", { class: "line" }, el("h2", { class: "who" }, "You"));
    this.node.replaceChildren(line, field, el("div", { class: "row" }, buttons));
    field.focus();
  }
}

const NOTES = {
  stopped: "You stopped this answer.",
  broken: "The answer broke off here.",
  length: "The answer reached its limit of tokens and was cut.",
  content_filter: "The server cut this answer.",
};

const RATE_MS = 500; // between two readings: a number that changes at every frame cannot be read

class Answer {
  #prose = el("div", { class: "prose" });
  #status = el("span", { class: "status" });
  #foot = el("div", { class: "foot" });
  #markdown = new Markdown(this.#prose);
  #calls;
  #nextRate = 0;

  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.#calls = new Calls(message, actions);
    const who = el("h2", { class: "who" }, el("span", { dir: "ltr" }, textNodes(message.model)), this.#status);
    this.node = el("article", { class: "message answer live" }, who, this.#prose, this.#calls.node, this.#foot);
    this.#status.textContent = "waits for the first token";
  }

  text(piece) {
    this.#markdown.append(piece);
  }

  /** Shows the message's text from its beginning: it is another now. */
  rewrite() {
    this.#prose.replaceChildren();
    this.#markdown = new Markdown(this.#prose);
    this.#markdown.append(this.message.content);
  }

  draw() {
    this.#markdown.draw();
    this.#calls.draw();
    if (this.message.state === "streaming") this.#showRate();
  }

  #showRate() {
    const now = performance.now();
    if (now < this.#nextRate) return;
    this.#nextRate = now + RATE_MS;
    const { rate } = this.message.measure;
    this.#status.textContent = rate === null ? "answers" : `answers, ≈ ${digits(rate)} tokens/s`;
  }

  end() {
    const { message } = this;
    this.#markdown.end();
    this.#calls.end(message.state === "done");
    this.node.classList.remove("live");
    this.#status.textContent = "";
    const empty = message.state === "done" && !message.content && !message.calls.length;
    this.#showSources();
    const note = NOTES[message.state] ?? NOTES[message.finish] ?? (empty ? "The model answered nothing." : null);
    if (note) this.#foot.append(el("p", { class: "note" }, note));
    if (message.measure?.pieces.length) this.#foot.append(numbers(message.measure));
    this.againButton = button("Regenerate", { name: "again", press: this.actions.regenerate });
    this.againButton.hidden = true;
    const copy = message.content ? copyButton("Copy", () => message.content) : null;
    this.#foot.append(el("div", { class: "actions" }, copy, this.againButton));
  }

  #showSources() {
    const { documents } = this.message;
    if (!documents) return;
    const open = (citation) => this.actions.source(citation, documents.knowledge);
    link(this.#prose, documents.citations, open);
    const list = this.message.state === "done" ? sources(documents, open) : null;
    if (list) this.#foot.append(list);
  }

  setLast(last) {
    if (this.againButton) this.againButton.hidden = !last;
  }

  focusCalls() {
    this.#calls.focus();
  }
}

function numbers(measure) {
  const pairs = readings(measure).map(([value, of]) => el("span", {}, el("b", {}, value), ` ${of}`));
  return el("p", { class: "numbers" }, [trace(measure), ...pairs]);
}

/**
 * Draws messages into `root`. `actions`: edit(index, text), regenerate(), results(), retry(), source(citation,
 * knowledge), and ready(): whether a request can be sent now.
 */
export class Transcript {
  #views = [];
  #error = null;

  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
  }

  add(message) {
    const index = this.#views.length;
    const edit = (text) => this.actions.ready() && this.actions.edit(index, text);
    const view = message.role === "user" ? new Question(message, edit) : new Answer(message, this.actions);
    this.#views.push(view);
    this.root.append(view.node);
    return view;
  }

  /** Adds a message that is already whole. */
  addWhole(message) {
    const view = this.add(message);
    if (message.role === "user") return;
    view.text(message.content);
    view.end();
  }

  truncate(length) {
    for (const view of this.#views.splice(length)) view.node.remove();
  }

  /** Shows what may be done now: nothing while an answer comes, else with the last question and the last answer. */
  setIdle(idle) {
    const questions = this.#views.filter((view) => view instanceof Question);
    this.#views.forEach((view, at) => {
      const last = view instanceof Question ? view === questions.at(-1) : at === this.#views.length - 1;
      view.setLast(idle && last);
    });
  }

  editLast() {
    this.#views.findLast((view) => view instanceof Question)?.open();
  }

  focusCalls() {
    this.#views.at(-1)?.focusCalls?.();
  }

  showError(error, actions) {
    this.clearError();
    this.#error = errorCard(error, { retry: this.actions.retry, ...actions });
    this.root.append(this.#error);
  }

  clearError() {
    this.#error?.remove();
    this.#error = null;
  }
}
