// How fast an answer came, by this page's clock, and numbers and facts as people read them.

import { el, svg } from "./dom.js";

const whole = new Intl.NumberFormat("en");

export const count = (value) => whole.format(value);

/** 3 significant digits where that is shorter: 0.214, 38.2, 1,204. */
export const digits = (value) => (value >= 100 ? count(Math.round(value)) : String(Number(value.toPrecision(3))));

export const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)}\u00a0ms` : `${digits(ms / 1000)}\u00a0s`);

/** Bytes as disks count them: powers of 1,000. */
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (value >= 1000 && at < units.length - 1) [value, at] = [value / 1000, at + 1];
  return `${digits(value)}\u00a0${units[at]}`;
}

const SHORTEST_MS = 20; // what the network gave at once says nothing of the model's speed

/** Times of one answer: `piece()` at each piece of text, `usage` when the server counts. */
export class Measure {
  constructor(now = performance.now()) {
    this.begun = now;
    this.pieces = []; // ms since the request
    this.usage = null;
  }

  piece(now = performance.now()) {
    this.pieces.push(now - this.begun);
  }

  /** ms until the first piece of text; null while there is none. */
  get first() {
    return this.pieces[0] ?? null;
  }

  get last() {
    return this.pieces.at(-1) ?? 0;
  }

  /** Tokens as the server counted them, else pieces: the server sends about one token a piece. */
  get tokens() {
    return this.usage?.completion_tokens ?? this.pieces.length;
  }

  /** Tokens a second after the first, which the prompt's time is in; null where too little came to tell. */
  get rate() {
    const time = this.last - (this.first ?? 0);
    return this.tokens > 1 && time >= SHORTEST_MS ? ((this.tokens - 1) * 1000) / time : null;
  }

  /** What was measured, for an export: plain numbers. */
  record() {
    const round = (value) => (value === null ? null : Number(value.toPrecision(4)));
    return { first_token_ms: round(this.first), tokens_per_second: round(this.rate), usage: this.usage };
  }
}

/** [value, what it is] of one answer, in the order in which they are read. */
export function readings(measure) {
  const about = measure.usage ? "" : "≈ ";
  const out = [];
  if (measure.rate !== null) out.push([about + digits(measure.rate), "tokens/s"]);
  if (measure.first !== null) out.push([seconds(measure.first), "to first token"]);
  out.push([about + count(measure.tokens), measure.tokens === 1 ? "token" : "tokens"]);
  const prompt = measure.usage?.prompt_tokens;
  if (typeof prompt === "number") {
    const cached = measure.usage.prompt_tokens_details?.cached_tokens;
    out.push([count(prompt), cached ? `in the prompt, ${count(cached)} of them cached` : "in the prompt"]);
  }
  return out;
}

const [WIDTH, HEIGHT] = [108, 14];
const [FEWEST, MOST] = [9, 36]; // slices

/**
 * The answer over time: a bar a slice, as high as tokens came in it. What is empty before is the wait. null where there
 * is too little of it to draw.
 */
export function trace(measure) {
  if (measure.pieces.length < FEWEST) return null;
  const slices = Math.min(Math.max(Math.floor(measure.pieces.length / 2), FEWEST), MOST);
  const held = new Array(slices).fill(0);
  const end = Math.max(measure.last, 1);
  for (const at of measure.pieces) held[Math.min(Math.floor((at / end) * slices), slices - 1)]++;
  const most = Math.max(...held);
  const step = WIDTH / slices;
  const bars = held.map((tokens, at) => {
    const height = tokens ? Math.max((tokens / most) * HEIGHT, 2) : 1;
    const place = { x: at * step, y: HEIGHT - height, width: step - 1, height };
    return svg("rect", { class: tokens ? "some" : "none", ...place });
  });
  const box = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT };
  return svg("svg", { class: "trace", "aria-hidden": "true", ...box }, ...bars);
}

const number = (value) => typeof value === "number" && Number.isFinite(value);

const text = (value) => (typeof value === "string" && value ? value : null);

/** What was lost by quantizing, from quality.json: nothing where nothing was measured. */
function losses(quality) {
  const { ppl_increase_percent: more, kl, top1_agreement: same } = quality ?? {};
  return [
    ["Perplexity", number(more) ? `${more < 0 ? "−" : "+"}${digits(Math.abs(more))}\u00a0%` : null],
    ["KL to source", number(kl) ? digits(kl) : null],
    ["Same top token", number(same) ? `${digits(100 * same)}\u00a0%` : null],
  ];
}

/** [name, value] of what a model object of /v1/models says about its artifact; what it leaves out is left out. */
export function facts(model) {
  const { llmc } = model ?? {};
  if (!llmc || typeof llmc !== "object") return [];
  return [
    ["Quantization", text(llmc.quantization)],
    ["Bits a weight", number(llmc.bits_per_weight) ? String(Number(llmc.bits_per_weight.toFixed(3))) : null],
    ["Weights", number(llmc.weight_bytes) ? bytes(llmc.weight_bytes) : null],
    ["Context", number(llmc.context_length) ? `${count(llmc.context_length)}\u00a0tokens` : null],
    ["Compiled for", [text(llmc.target), text(llmc.isa)].filter(Boolean).join(", ") || null],
    ...losses(llmc.quality),
  ].filter(([, value]) => value);
}

const IN_BRIEF = new Set(["Quantization", "Weights", "Context"]);

/** The facts that tell one artifact from another, in a line. */
export function brief(model) {
  const told = facts(model).filter(([name]) => IN_BRIEF.has(name));
  return told.map(([, value]) => value).join(", ");
}

export function factList(model) {
  const pairs = facts(model).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)));
  return el("dl", { class: "facts" }, pairs);
}
