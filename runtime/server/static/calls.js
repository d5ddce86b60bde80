// Tool calls of an answer: their arguments as they stream, and the fields into which the user puts what the tools
// answered. The page runs no tool.

import { el, textNodes } from "./dom.js";

/** The string that begins at `at`, its quotes included. */
function stringAt(text, at) {
  let end = at + 1;
  while (end < text.length && text[end] !== '"') end += text[end] === "\\" ? 2 : 1;
  return text.slice(at, end + 1);
}

/**
 * JSON with a line for each member; null where it is no JSON. It is laid out as text: parsed and printed, 2^53 + 1
 * would be another number, and of two members with one name the first would be gone.
 */
export function pretty(text) {
  try {
    JSON.parse(text);
  } catch {
    return null;
  }
  const out = [];
  let depth = 0;
  const newline = () => out.push("\n", "  ".repeat(Math.min(depth, 40)));
  const tokens = /\s+|"|[[{]\s*[\]}]|[[\]{},:]|[^\s"[\]{},:]+/g;
  for (let found = tokens.exec(text); found; found = tokens.exec(text)) {
    let [token] = found;
    if (token === '"') {
      token = stringAt(text, found.index);
      tokens.lastIndex = found.index + token.length;
      out.push(token);
    } else if (token === "{" || token === "[") (out.push(token), depth++, newline());
    else if (token === "}" || token === "]") (depth--, newline(), out.push(token));
    else if (token === ",") (out.push(token), newline());
    else if (token === ":") out.push(": ");
    else if (token.trim()) out.push(token.replace(/\s+/g, ""));
  }
  return out.join("");
}

let made = 0; // for ids, which tie labels to fields

class CallCard {
  constructor(call) {
    this.call = call;
    this.shown = 0; // characters of the arguments that are on the page
    this.name = el("code", { class: "call-name", dir: "ltr" });
    this.state = el("span", { class: "call-state" });
    this.args = el("code", { dir: "ltr" });
    this.answer = el("div", { class: "call-answer" });
    const head = el("h3", { class: "call-head" }, el("span", {}, "Tool call"), this.name, this.state);
    const region = { class: "call-args", tabindex: "0", role: "region", "aria-label": "Arguments" };
    this.node = el("section", { class: "call" }, head, el("pre", region, this.args), this.answer);
  }

  draw() {
    this.name.replaceChildren(...textNodes(this.call.name));
    this.args.append(...textNodes(this.call.args.slice(this.shown)));
    this.shown = this.call.args.length;
    this.state.textContent = "arguments arrive";
  }

  /** After the last piece; `complete` where the answer was not cut. */
  end(complete) {
    this.draw();
    const laid = pretty(this.call.args);
    if (laid !== null) this.args.replaceChildren(...textNodes(laid));
    this.state.textContent = !complete ? "incomplete" : laid === null ? "arguments are not JSON" : "";
    if (complete) this.#showAnswer();
  }

  #showAnswer() {
    const { call } = this;
    if (call.result !== null) {
      const region = { tabindex: "0", role: "region", "aria-label": `Result of ${call.name}` };
      const title = el("p", { class: "label" }, "Result, as you gave it");
      this.answer.replaceChildren(title, el("pre", region, el("code", { dir: "ltr" }, textNodes(call.result))));
      this.field = null;
      return;
    }
    const id = `result-${made++}`;
    const words = el("label", { for: id }, "Result of ", textNodes(call.name));
    const placeholder = "Paste what the tool answered";
    this.field = el("textarea", { id, class: "mono", rows: "2", required: true, spellcheck: "false", placeholder });
    this.answer.replaceChildren(words, this.field);
  }
}

/** All calls of an answer. Once each has its result and `ready()` is true, `results()` runs. */
export class Calls {
  #cards = [];
  #message;
  #submit = el("button", { type: "submit", class: "button primary" });
  #send = el("div", { class: "row send" }, this.#submit, el("p", { class: "hint" }, "Ctrl + Enter sends too"));

  constructor(message, { ready, results }) {
    this.#message = message;
    this.node = el("form", { class: "calls", hidden: true });
    this.node.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!ready()) return;
      for (const card of this.#open) card.call.result = card.field.value;
      for (const card of this.#cards) card.end(true);
      this.#send.remove();
      results();
    });
    this.node.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || !this.#open.length) return;
      event.preventDefault();
      this.node.requestSubmit();
    });
  }

  get #open() {
    return this.#cards.filter((card) => card.field);
  }

  draw() {
    const { calls } = this.#message;
    for (const call of calls.slice(this.#cards.length)) {
      const card = new CallCard(call);
      this.#cards.push(card);
      this.node.append(card.node);
    }
    this.node.hidden = !calls.length;
    for (const card of this.#cards) card.draw();
  }

  end(complete) {
    this.draw();
    for (const card of this.#cards) card.end(complete);
    if (!this.#open.length) return;
    this.#submit.textContent = this.#open.length > 1 ? "Send results" : "Send result";
    this.node.append(this.#send);
  }

  focus() {
    this.#open[0]?.field.focus();
  }
}
