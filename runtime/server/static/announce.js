// Says an answer to a screen reader as it comes, a sentence at a time: the transcript itself changes with every token,
// and read out at that rate it would be noise.

import { el } from "./dom.js";

const SENTENCE = /[.!?…。！？]["'”’)\]]*\s|\n/g;
const PAUSE_MS = 700; // between two additions: what comes in it is said together
const KEPT = 20; // additions that stay in the region: readers need only the new ones
const LONGEST = 2_000; // characters said at once: nobody listens to a megabyte of digits

export class Announcer {
  #region;
  #rest = "";
  #waiting = "";
  #timer = null;

  constructor(region) {
    this.#region = region;
  }

  /** Adds streamed text; whole sentences of it are said soon. */
  push(text) {
    this.#rest += text;
    let end = 0;
    for (const found of this.#rest.matchAll(SENTENCE)) end = found.index + found[0].length;
    if (!end && this.#rest.length < LONGEST) return;
    const whole = end || this.#rest.length;
    this.#waiting = (this.#waiting + this.#rest.slice(0, whole)).slice(0, LONGEST);
    this.#rest = this.#rest.slice(whole);
    this.#timer ??= setTimeout(() => this.#flush(), PAUSE_MS);
  }

  /** Says what is left of the answer, and then `closing`. */
  end(closing) {
    this.#waiting += this.#rest.slice(0, LONGEST);
    this.#rest = "";
    this.#flush();
    this.say(closing);
  }

  say(text) {
    // Marks of Markdown are for eyes.
    const plain = text.replace(/[*`#]+/g, "").trim();
    if (!plain) return;
    this.#region.append(el("p", {}, plain));
    while (this.#region.childElementCount > KEPT) this.#region.firstElementChild.remove();
  }

  #flush() {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.say(this.#waiting);
    this.#waiting = "";
  }
}
