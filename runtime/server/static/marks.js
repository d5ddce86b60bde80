// Parts of a text made visible: words of a question, the characters that an answer cites. The server counts
// characters as code points, the browser in units of UTF-16; here is where one becomes the other.

import { el, textNodes } from "./dom.js";

const WIDE = /[\ud800-\udbff][\udc00-\udfff]/;

/** Turns places in code points, ascending, into places of the string. */
export function places(text, points) {
  if (!WIDE.test(text)) return points.map((point) => Math.min(Math.max(point, 0), text.length));
  const out = [];
  let [at, passed] = [0, 0];
  for (const point of points) {
    for (; passed < point && at < text.length; passed++) at += text.codePointAt(at) > 0xffff ? 2 : 1;
    out.push(at);
  }
  return out;
}

/** How many code points a text has. */
export const points = (text) => (WIDE.test(text) ? [...text].length : text.length);

/** The text from one code point to another. */
export function part(text, from, to = Infinity) {
  const [begin, end] = places(text, [from, to]);
  return text.slice(begin, end);
}

/** Nodes of a text in which the spans [[start, end], …] are marked; ascending, those that overlap are left out. */
export function marked(text, spans, make = () => el("mark", {})) {
  const apart = [];
  for (const [start, end] of spans) if (start >= (apart.at(-1)?.[1] ?? 0) && end > start) apart.push([start, end]);
  const at = places(text, apart.flat());
  const nodes = [];
  let shown = 0;
  for (let i = 0; i < at.length; i += 2) {
    nodes.push(...textNodes(text.slice(shown, at[i])));
    const mark = make();
    mark.append(...textNodes(text.slice(at[i], at[i + 1])));
    nodes.push(mark);
    shown = at[i + 1];
  }
  nodes.push(...textNodes(text.slice(shown)));
  return nodes;
}
