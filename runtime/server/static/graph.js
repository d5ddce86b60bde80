// An explorable picture of the documents' graph: documents and the entities that they name. d3-force places the nodes;
// everything in the picture can also be reached in the list beside it, and by keyboard.

import "./vendor/d3-dispatch.min.js";
import "./vendor/d3-quadtree.min.js";
import "./vendor/d3-timer.min.js";
import "./vendor/d3-force.min.js";

import { button, el, shown, svg, textNodes } from "./dom.js";
import { count } from "./measure.js";
import { graph } from "./rag.js";

const { forceCollide, forceLink, forceManyBody, forceSimulation, forceX, forceY } = globalThis.d3;

const AT_ONCE = 30; // nodes that one answer of the server holds
const MOST = 250; // nodes in the picture: with more, one sees nothing
const LABEL = 24; // characters
const LONG_LIST = 200; // neighbours in the list
const SCALE = { least: 0.2, most: 5, step: 1.3 };
const MOVED = 4; // pixels from which on a press is a drag
const STEPS = 250; // of the layout, where motion is not wanted

const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const still = matchMedia("(prefers-reduced-motion: reduce)");

const shortened = (text) => (text.length > LABEL ? `${text.slice(0, LABEL - 1).trimEnd()}…` : text);

/** `actions`: knowledge(), options() for requests, open({document, title}). */
export class Graph {
  #parts;
  #nodes = new Map(); // id → {id, kind, label, x, y, drawn, expanded}
  #edges = new Map(); // "a\0b" → {source, target, kind, line}
  #selected = null;
  #view = { x: 0, y: 0, k: 1 };
  #free = true; // the view follows the layout until somebody moves it
  #frame = null;
  #coming = null;
  #simulation;
  #layer = svg("g", {});
  #lines = svg("g", { class: "edges" });
  #marks = svg("g", {});

  constructor(parts, actions) {
    this.#parts = parts;
    this.actions = actions;
    this.#layer.append(this.#lines, this.#marks);
    parts.picture.append(this.#layer);
    this.#simulation = forceSimulation([])
      .force("link", forceLink([]).id((node) => node.id).distance(70).strength(0.4))
      .force("apart", forceManyBody().strength(-220).distanceMax(500))
      .force("collide", forceCollide(22))
      .force("x", forceX(0).strength(0.05))
      .force("y", forceY(0).strength(0.05))
      .stop();
    parts.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.begin(parts.form.elements.focus.value.trim());
    });
    for (const [node, factor] of [[parts.closer, SCALE.step], [parts.farther, 1 / SCALE.step]]) {
      node.addEventListener("click", () => this.#zoom(factor));
    }
    parts.fit.addEventListener("click", () => this.#fit());
    parts.picture.addEventListener("keydown", (event) => this.#keys(event));
    new Pointers(parts.picture, {
      move: (dx, dy) => this.#move(dx, dy),
      zoom: (factor, at) => this.#zoom(factor, at),
      drag: (id, at) => this.#drag(id, at),
      drop: (id) => this.#drop(id),
      press: (id) => this.select(id, { expand: true }),
    });
    new ResizeObserver(() => this.#free && this.#fit()).observe(parts.picture);
  }

  get empty() {
    return !this.#nodes.size;
  }

  /** The picture of what is around `focus`; without one, of what most is around. */
  async begin(focus = "") {
    this.#parts.form.elements.focus.value = focus;
    const found = await this.#read(focus);
    if (!found) return;
    this.#clear();
    this.#merge(found, null);
    const first = found.nodes.find((node) => node.id === focus || node.label === focus) ?? found.nodes[0];
    if (focus && first) this.#nodes.get(first.id).expanded = true;
    this.#free = true;
    if (first) this.select(first.id);
    this.#run();
    if (!first) this.#say("There is no graph yet: no document names anything.");
  }

  /** Forgets the picture: the documents are others now. */
  forget() {
    this.#coming?.abort();
    this.#clear();
  }

  async #read(focus) {
    this.#coming?.abort();
    const coming = (this.#coming = new AbortController());
    this.#say("Loads …");
    try {
      const asked = { knowledge: this.actions.knowledge(), focus, limit: AT_ONCE };
      const found = await graph(asked, { ...this.actions.options(), signal: coming.signal });
      return coming.signal.aborted ? null : found;
    } catch (error) {
      if (error.name !== "AbortError") this.#say(error.message, true);
      return null;
    }
  }

  #say(text, wrong = false) {
    this.#parts.state.replaceChildren(...textNodes(text));
    this.#parts.state.classList.toggle("wrong", wrong);
  }

  #clear() {
    cancelAnimationFrame(this.#frame);
    this.#frame = null;
    this.#nodes.clear();
    this.#edges.clear();
    this.#selected = null;
    this.#lines.replaceChildren();
    this.#marks.replaceChildren();
    this.#parts.list.replaceChildren();
    this.#say("");
  }

  /** Adds nodes and edges; new nodes appear around `from`. */
  #merge({ nodes, edges }, from) {
    for (const { id, kind, label, document } of nodes) {
      if (this.#nodes.has(id)) continue;
      const at = from ? { x: from.x + 10 * Math.cos(this.#nodes.size), y: from.y + 10 * Math.sin(this.#nodes.size) } : {};
      const node = { id, kind, label, document: document ?? null, expanded: false, ...at };
      node.drawn = drawnNode(node);
      this.#nodes.set(id, node);
      this.#marks.append(node.drawn);
    }
    for (const { source, target, kind } of edges) {
      const key = source < target ? `${source}\0${target}` : `${target}\0${source}`;
      if (this.#edges.has(key) || !this.#nodes.has(source) || !this.#nodes.has(target)) continue;
      const line = svg("line", { class: `edge edge-${kind.replace(/\W/g, "")}` });
      this.#edges.set(key, { source, target, kind, line });
      this.#lines.append(line);
    }
    for (const node of this.#nodes.values()) node.edges = 0;
    const edgesNow = [...this.#edges.values()];
    for (const { source, target } of edgesNow) {
      for (const end of [source, target]) (end.id ? end : this.#nodes.get(end)).edges++;
    }
    this.#simulation.nodes([...this.#nodes.values()]);
    this.#simulation.force("link").links(edgesNow);
  }

  // Selecting -----------------------------------------------------------------------------------------------

  /** Selects a node and shows it in the list; `expand`: loads what is around it, once. */
  async select(id, { expand = false } = {}) {
    const node = this.#nodes.get(id);
    if (!node) return;
    this.#selected = id;
    this.#showSelection();
    if (!expand || node.expanded) return;
    const found = await this.#read(id);
    if (!found || this.#nodes.get(id) !== node) return;
    if (this.#nodes.size + found.nodes.length > MOST) return this.begin(id); // full: anew from here
    const before = this.#nodes.size;
    this.#merge(found, node);
    node.expanded = true;
    if (this.#selected === id) this.#showSelection();
    const more = this.#nodes.size - before;
    this.#say(more ? `${count(more)} more, ${count(this.#nodes.size)} in the picture` : "Nothing more is around it.");
    this.#run();
  }

  #neighbours(id) {
    const found = [];
    for (const { source, target, kind } of this.#edges.values()) {
      if (source.id === id) found.push([target, kind]);
      else if (target.id === id) found.push([source, kind]);
    }
    return found.sort(([a], [b]) => (a.label < b.label ? -1 : 1));
  }

  #showSelection() {
    const node = this.#nodes.get(this.#selected);
    const near = this.#neighbours(node.id);
    const close = new Set([node.id, ...near.map(([one]) => one.id)]);
    for (const one of this.#nodes.values()) {
      one.drawn.classList.toggle("selected", one === node);
      one.drawn.classList.toggle("near", close.has(one.id));
    }
    this.#marks.append(node.drawn); // above the others
    for (const { source, target, line } of this.#edges.values()) {
      line.classList.toggle("near", source === node || target === node);
    }
    this.#say(`${node.label}, ${kindOf(node)}, ${count(near.length)} beside it`);
    this.#label(this.#view.k);
    this.#showList(node, near);
  }

  #showList(node, near) {
    const inList = this.#parts.list.contains(document.activeElement);
    const more = node.expanded ? null : button("Show what is around it", { kind: "bordered", press: () => this.#choose(node.id) });
    const open = node.kind === "document" ? button("Open the document", { name: "open", kind: "bordered", press: () => this.#open(node) }) : null;
    const title = el("h3", { dir: "auto", tabindex: "-1" }, textNodes(node.label));
    const items = near.slice(0, LONG_LIST).map(([one]) => {
      const press = () => this.#choose(one.id);
      const name = el("button", { type: "button", class: "neighbour", dir: "auto", on: { click: press } }, textNodes(one.label));
      name.append(el("span", { class: "help" }, ` ${kindOf(one)}`));
      return el("li", {}, name);
    });
    const list = el("ul", { class: "neighbours", "aria-label": "Beside it" }, items);
    this.#parts.list.replaceChildren(title, el("p", { class: "help" }, kindOf(node)), el("div", { class: "row" }, more, open), list);
    if (inList) title.focus();
  }

  #choose(id) {
    return this.select(id, { expand: true });
  }

  #open(node) {
    this.actions.open({ document: node.document ?? node.id, title: node.label });
  }

  #keys(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const { key } = event;
    if (WAYS[key]) this.#step(WAYS[key]);
    else if (key === "Enter" || key === " ") this.#selected !== null && this.#choose(this.#selected);
    else if (key === "+" || key === "=") this.#zoom(SCALE.step);
    else if (key === "-") this.#zoom(1 / SCALE.step);
    else if (key === "0") this.#fit();
    else if (key === "o" && this.#nodes.get(this.#selected)?.kind === "document") this.#open(this.#nodes.get(this.#selected));
    else return;
    event.preventDefault();
  }

  /** Goes to the node that lies next in a direction: the nearest, where straight ahead counts as nearer. */
  #step([dx, dy]) {
    const from = this.#nodes.get(this.#selected) ?? { x: 0, y: 0 };
    let best = null;
    for (const node of this.#nodes.values()) {
      const [along, across] = [(node.x - from.x) * dx + (node.y - from.y) * dy, (node.x - from.x) * dy - (node.y - from.y) * dx];
      const cost = along + 2 * Math.abs(across);
      if (node !== from && along > Math.abs(across) / 2 && (!best || cost < best.cost)) best = { node, cost };
    }
    if (!best) return;
    this.select(best.node.id);
    this.#reveal(best.node);
  }

  // The layout and the view ---------------------------------------------------------------------------------

  #run() {
    this.#simulation.alpha(0.9);
    if (still.matches) {
      this.#simulation.tick(STEPS);
      this.#simulation.alpha(0);
      this.#draw();
    } else this.#frame ??= requestAnimationFrame(() => this.#tick());
  }

  #tick() {
    this.#frame = null;
    this.#simulation.tick(2);
    this.#draw();
    if (this.#simulation.alpha() > 0.02) this.#frame = requestAnimationFrame(() => this.#tick());
  }

  #draw() {
    const at = (value) => (Math.round(value * 10) / 10).toString();
    for (const { source, target, line } of this.#edges.values()) {
      for (const [name, value] of [["x1", source.x], ["y1", source.y], ["x2", target.x], ["y2", target.y]]) {
        line.setAttribute(name, at(value));
      }
    }
    for (const node of this.#nodes.values()) node.drawn.setAttribute("transform", `translate(${at(node.x)} ${at(node.y)})`);
    if (this.#free) this.#fit();
    else this.#place();
  }

  #place() {
    const { x, y, k } = this.#view;
    this.#layer.setAttribute("transform", `translate(${x} ${y}) scale(${k})`);
    this.#layer.style.setProperty("--k", k); // labels keep their size
    this.#label(k);
  }

  /** Shows the labels that have room: those of the selected and its neighbours first, then by number of edges. */
  #label(k) {
    const rank = (node) => (node.id === this.#selected ? 2e6 : node.drawn.classList.contains("near") ? 1e6 : 0) + node.edges;
    const taken = [];
    for (const node of [...this.#nodes.values()].sort((a, b) => rank(b) - rank(a))) {
      const [half, x, y] = [(3.2 * Math.min(node.label.length, LABEL)) / k, node.x, node.y + 20];
      const height = 13 / k;
      const crowded = taken.some((one) => Math.abs(one.x - x) < one.half + half && Math.abs(one.y - y) < height);
      node.drawn.classList.toggle("crowded", crowded);
      if (!crowded) taken.push({ x, y, half });
    }
  }

  /** Shows all of it. */
  #fit() {
    const { clientWidth: width, clientHeight: height } = this.#parts.picture;
    if (!this.#nodes.size || !width) return;
    const all = [...this.#nodes.values()];
    const [xs, ys] = [all.map((node) => node.x ?? 0), all.map((node) => node.y ?? 0)];
    const [left, right, top, bottom] = [Math.min(...xs) - 60, Math.max(...xs) + 60, Math.min(...ys) - 30, Math.max(...ys) + 40];
    const k = Math.min(1.5, Math.max(SCALE.least, Math.min(width / (right - left), height / (bottom - top))));
    this.#view = { k, x: width / 2 - (k * (left + right)) / 2, y: height / 2 - (k * (top + bottom)) / 2 };
    this.#free = true;
    this.#place();
  }

  #move(dx, dy) {
    this.#free = false;
    this.#view.x += dx;
    this.#view.y += dy;
    this.#place();
  }

  /** Zooms by a factor, so that what is at a place (the middle, where none is given) stays there. */
  #zoom(factor, at = null) {
    const { picture } = this.#parts;
    const [px, py] = at ?? [picture.clientWidth / 2, picture.clientHeight / 2];
    const { x, y, k } = this.#view;
    const next = Math.min(SCALE.most, Math.max(SCALE.least, k * factor));
    this.#view = { k: next, x: px - ((px - x) * next) / k, y: py - ((py - y) * next) / k };
    this.#free = false;
    this.#place();
  }

  /** Moves the view so that a node can be seen. */
  #reveal(node) {
    const { clientWidth: width, clientHeight: height } = this.#parts.picture;
    const { x, y, k } = this.#view;
    const [px, py] = [x + k * node.x, y + k * node.y];
    const into = (value, size) => Math.min(size - 40, Math.max(40, value)) - value;
    const [dx, dy] = [into(px, width), into(py, height)];
    if (dx || dy) this.#move(dx, dy);
  }

  #drag(id, [px, py]) {
    const node = this.#nodes.get(id);
    if (!node) return;
    this.#free = false;
    [node.fx, node.fy] = [(px - this.#view.x) / this.#view.k, (py - this.#view.y) / this.#view.k];
    [node.x, node.y] = [node.fx, node.fy];
    this.#simulation.alpha(Math.max(0.3, this.#simulation.alpha()));
    if (still.matches) this.#draw();
    else this.#frame ??= requestAnimationFrame(() => this.#tick());
  }

  #drop(id) {
    const node = this.#nodes.get(id);
    if (node) [node.fx, node.fy] = [null, null];
  }
}

const kindOf = ({ kind }) => (kind === "document" ? "document" : kind || "entity");

function drawnNode({ id, kind, label }) {
  const round = kind !== "document";
  const shape = round ? svg("circle", { r: 7 }) : svg("rect", { x: -8, y: -6, width: 16, height: 12, rx: 2.5 });
  const words = svg("text", { y: round ? 20 : 19, "text-anchor": "middle" });
  words.append(shown(shortened(label)));
  const title = svg("title");
  title.append(shown(label));
  const node = svg("g", { class: `node ${round ? "entity" : "document"}` }, title, svg("circle", { class: "halo", r: 16 }), shape, words);
  node.dataset.id = id;
  return node;
}

/** What mouse, fingers and wheel do to the picture, in its own pixels. */
class Pointers {
  #down = new Map(); // pointer → [x, y]
  #held = null; // {id, start, moved}: what the first pointer holds

  constructor(picture, actions) {
    [this.picture, this.actions] = [picture, actions];
    const wheel = (event) => {
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 16 : 1;
      actions.zoom(Math.exp(-0.0015 * lines * event.deltaY), this.#at(event));
    };
    picture.addEventListener("wheel", wheel, { passive: false });
    picture.addEventListener("pointerdown", (event) => this.#press(event));
    picture.addEventListener("pointermove", (event) => this.#moved(event));
    for (const name of ["pointerup", "pointercancel"]) picture.addEventListener(name, (event) => this.#release(event));
  }

  #at(event) {
    const box = this.picture.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  #press(event) {
    if (event.button !== 0) return;
    const at = this.#at(event);
    this.picture.setPointerCapture(event.pointerId);
    this.#down.set(event.pointerId, at);
    const id = event.target.closest?.(".node")?.dataset.id ?? null;
    this.#held = this.#down.size === 1 ? { id, start: at, moved: false } : null;
  }

  #moved(event) {
    const before = this.#down.get(event.pointerId);
    if (!before) return;
    const at = this.#at(event);
    const others = [...this.#down].filter(([pointer]) => pointer !== event.pointerId).map(([, place]) => place);
    if (others.length) this.#pinch(before, at, others[0]);
    else if (this.#held) {
      this.#held.moved ||= Math.hypot(at[0] - this.#held.start[0], at[1] - this.#held.start[1]) > MOVED;
      if (this.#held.moved && this.#held.id !== null) this.actions.drag(this.#held.id, at);
      else if (this.#held.moved) this.actions.move(at[0] - before[0], at[1] - before[1]);
    }
    if (!this.#held || this.#held.moved) this.#down.set(event.pointerId, at);
  }

  #pinch(before, at, other) {
    const apart = (one) => Math.max(10, Math.hypot(one[0] - other[0], one[1] - other[1]));
    this.actions.zoom(apart(at) / apart(before), [(at[0] + other[0]) / 2, (at[1] + other[1]) / 2]);
    this.actions.move((at[0] - before[0]) / 2, (at[1] - before[1]) / 2);
  }

  #release(event) {
    this.#down.delete(event.pointerId);
    const held = this.#held;
    this.#held = null;
    if (!held || held.id === null) return;
    if (held.moved) this.actions.drop(held.id);
    else if (event.type === "pointerup") this.actions.press(held.id);
  }
}
