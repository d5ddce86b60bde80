// A failed request on the page: the server's own words, and what can be done about it.

import { button, el, textNodes } from "./dom.js";

/** The card of a failed request; `actions` are its buttons. */
export function errorCard(error, { retry, show = null }) {
  const status = error.status >= 400 ? error.status : null; // 200: it began well
  const details = [status, error.type, error.code, error.param].filter(Boolean).join(", ");
  const said = el("div", { role: "alert" });
  const again = button("Try again", { name: "again", kind: "bordered", press: retry });
  const more = show ? button(show.words, { name: "settings", kind: "bordered", press: show.press }) : null;
  const card = el("section", { class: "error", "aria-label": "Error" }, said, el("div", { class: "row" }, again, more));
  said.append(el("h3", {}, title(error)), el("p", { dir: "auto" }, textNodes(error.message)));
  if (details) card.insertBefore(el("p", { class: "details" }, details), card.lastChild);
  countDown(again, error.retryAfter ?? 0);
  return card;
}

function title({ status }) {
  if (status === 0) return "The answer did not arrive";
  if (status < 300) return "The answer broke off";
  if (status === 401 || status === 403) return "The server did not let you in";
  if (status === 429) return "The server is busy";
  return status < 500 ? "The server refused the request" : "The server failed";
}

/** Keeps a button from being pressed for as long as the server asked to wait, and shows how long that is. */
function countDown(node, wait) {
  const words = node.querySelector(".words");
  const until = performance.now() + wait * 1000;
  const tick = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    node.disabled = left > 0;
    words.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left > 0) setTimeout(tick, 250);
  };
  tick();
}
