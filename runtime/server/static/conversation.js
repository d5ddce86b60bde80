// The conversation as data: what was said, what is sent to the server, what is kept. Nothing here knows of the page.
//
// A message of the user is {role: "user", content}. One of the model is {role: "assistant", content, model, calls,
// state, finish, measure}; `state` is "waiting", "streaming", "done", "stopped" or "broken"; a call is {id, name,
// args, result}, `result` null until the user gives it. An answer from documents has `documents`: {knowledge, citations,
// passages, found}, null in any other.

import { Measure } from "./measure.js";
import { passage } from "./rag.js";

const ENDED = new Set(["done", "stopped", "broken"]);

const string = (value) => (typeof value === "string" ? value : "");

/** Whether an answer holds something that the next request can repeat. */
const repeatable = (message) => Boolean(message.content) || message.state === "done";

export class Conversation {
  messages = [];

  get last() {
    return this.messages.at(-1) ?? null;
  }

  say(content) {
    this.messages.push({ role: "user", content });
  }

  begin(model, knowledge = null) {
    const message = { role: "assistant", content: "", model, calls: [], state: "waiting", finish: null };
    const documents = knowledge === null ? null : { knowledge, citations: [], passages: [], found: true };
    this.messages.push({ ...message, documents, measure: new Measure() });
    return this.last;
  }

  /** Keeps the first `length` messages. */
  truncate(length) {
    this.messages.length = Math.min(length, this.messages.length);
  }

  /** Calls of the last answer whose results the model waits for. */
  get openCalls() {
    const { last } = this;
    const waits = last?.role === "assistant" && last.state === "done";
    return waits ? last.calls.filter((call) => call.result === null) : [];
  }

  get lastUser() {
    return this.messages.findLastIndex((message) => message.role === "user");
  }

  /** Messages as the API takes them. Answers that broke before they said anything are left out. */
  toApi(system = "") {
    const out = system ? [{ role: "system", content: system }] : [];
    for (const message of this.messages) {
      if (message.role === "assistant") out.push(...answerToApi(message));
      // Templates insist that roles take turns: a question whose answer never came is joined with the next.
      else if (out.at(-1)?.role === "user") out.at(-1).content += `\n\n${message.content}`;
      else out.push({ role: "user", content: message.content });
    }
    return out;
  }

  /** What an export holds besides the messages: how each answer came, by its place among the answers. */
  records() {
    const answers = this.messages.filter((message) => message.role === "assistant");
    return answers.map(({ model, state, finish, measure, documents }) => {
      const measured = measure ? measure.record() : {};
      const cited = documents ? { documents: citedDocuments(documents) } : {};
      return { model, state, finish_reason: finish, ...cited, ...measured };
    });
  }

  /** Plain data from which `restore` makes the same conversation, its measurements aside. */
  save() {
    return this.messages.map(({ measure, ...message }) => {
      if (message.role === "user") return message;
      const state = ENDED.has(message.state) ? message.state : "stopped";
      return { ...message, state, documents: message.documents && savedDocuments(message.documents) };
    });
  }

  /** Takes what `save` gave. It comes from the browser's storage, so everything in it is checked. */
  restore(saved) {
    if (!Array.isArray(saved)) return;
    this.messages = saved.filter((message) => message && typeof message === "object").map(restored);
  }
}

/** What an export tells of an answer's sources. */
function citedDocuments({ knowledge, found, citations }) {
  const cited = citations.map((one) => ({ number: one.number, document: one.document, span: one.span, quote: one.quote }));
  return { knowledge, found, citations: cited };
}

/** Sources without the passages' texts, which are the server's to keep. */
function savedDocuments(documents) {
  return { ...documents, passages: documents.passages.map((one) => ({ ...one, text: "", matches: [], scores: null })) };
}

const passages = (given) => (Array.isArray(given) ? given.filter((one) => one && typeof one === "object").map(passage) : []);

function restoredDocuments(given) {
  if (!given || typeof given !== "object" || typeof given.knowledge !== "string") return null;
  const { knowledge, citations, found } = given;
  return { knowledge, citations: passages(citations), passages: passages(given.passages), found: found !== false };
}

function restored(message) {
  const content = string(message.content);
  if (message.role !== "assistant") return { role: "user", content };
  const given = Array.isArray(message.calls) ? message.calls.filter((call) => call && typeof call === "object") : [];
  const calls = given.map((call) => ({
    id: string(call.id),
    name: string(call.name),
    args: string(call.args),
    result: typeof call.result === "string" ? call.result : null,
  }));
  const state = ENDED.has(message.state) ? message.state : "stopped";
  const finish = string(message.finish) || null;
  const documents = restoredDocuments(message.documents);
  return { role: "assistant", content, model: string(message.model), calls, state, finish, documents, measure: null };
}

function answerToApi(message) {
  const { content, calls } = message;
  // A call without its result is no valid history: the answer stands without it.
  if (!calls.length || calls.some((call) => call.result === null)) {
    return repeatable(message) && (content || !calls.length) ? [{ role: "assistant", content }] : [];
  }
  const tool_calls = calls.map(({ id, name, args }) => ({ id, type: "function", function: { name, arguments: args } }));
  const results = calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: call.result }));
  return [{ role: "assistant", content, tool_calls }, ...results];
}

/** Adds a streamed chunk to an answer. Returns the text that it brought. */
export function apply(message, chunk) {
  if (chunk.usage && typeof chunk.usage === "object") message.measure.usage = chunk.usage;
  if (message.documents) applyDocuments(message, chunk);
  const choice = chunk.choices?.[0];
  if (!choice) return "";
  if (choice.finish_reason) message.finish = string(choice.finish_reason);
  const delta = choice.delta ?? {};
  const text = string(delta.content);
  const calls = Array.isArray(delta.tool_calls) ? delta.tool_calls : [];
  if (text || calls.length) {
    message.measure.piece();
    message.state = "streaming";
  }
  message.content += text;
  for (const part of calls) applyCall(message.calls, part);
  return text;
}

/** What an event of an answer from documents says besides its text. `content` takes the place of what was streamed. */
function applyDocuments(message, chunk) {
  const { documents } = message;
  if (Array.isArray(chunk.passages)) documents.passages = passages(chunk.passages);
  if (Array.isArray(chunk.citations)) documents.citations = passages(chunk.citations);
  if (chunk.found === false) documents.found = false;
  if (typeof chunk.content === "string") message.content = chunk.content;
}

const MOST_CALLS = 128; // as many as one answer may hold here; `index` comes from outside

function applyCall(calls, part) {
  if (!part || typeof part !== "object") return;
  const index = part.index ?? calls.length;
  if (!Number.isInteger(index) || index < 0 || index > calls.length || index >= MOST_CALLS) return;
  calls[index] ??= { id: "", name: "", args: "", result: null };
  const call = calls[index];
  call.id ||= string(part.id);
  call.name ||= string(part.function?.name);
  call.args += string(part.function?.arguments);
}
