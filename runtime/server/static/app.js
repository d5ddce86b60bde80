// The page: chat with the models of the server that it came from. This file ties the parts together; what they are:
//
//   api.js, sse.js            requests and the stream of an answer
//   conversation.js           messages as data
//   transcript.js, calls.js   messages on the page; errors.js, measure.js beside them
//   markdown.js, inline.js    an answer's text as nodes, all made by dom.js, never as markup
//   settings.js, storage.js   what is asked besides the messages, what the browser keeps
//   announce.js               what a screen reader says
//   documents.js              the documents: search.js, files.js, graph.js, reader.js; rag.js asks the server for them
//   citations.js, marks.js    sources in an answer, marked places of a text

import { Announcer } from "./announce.js";
import { listModels, streamChat } from "./api.js";
import { Conversation, apply } from "./conversation.js";
import { Documents } from "./documents.js";
import { el, icon, textNodes } from "./dom.js";
import { errorCard } from "./errors.js";
import { brief, count, factList, facts } from "./measure.js";
import { streamAnswer } from "./rag.js";
import { SettingError, Settings } from "./settings.js";
import { forget, keepKey, load, loadKey, save } from "./storage.js";
import { Transcript } from "./transcript.js";

const $ = (id) => document.getElementById(id);

const EXAMPLES = [
  "Explain what a mutex is, in three sentences.",
  "Write a Python function that tells whether a text is a palindrome.",
  "Turn this into JSON: Ada Lovelace, born in London in 1815.",
];

const NAMES = ["model", "system", "temperature", "top_p", "max_tokens", "seed", "tools", "tool_choice", "key"];
const settings = new Settings(Object.fromEntries(NAMES.map((name) => [name, $(name)])));
const conversation = new Conversation();
const announcer = new Announcer($("spoken"));
const transcript = new Transcript($("transcript"), {
  ready: () => !running && request() !== null,
  edit: (index, text) => (conversation.truncate(index), transcript.truncate(index), ask(text)),
  regenerate: () => answer({ replace: true }),
  results: () => (touch.matches || $("prompt").focus(), answer()),
  retry: () => answer({ replace: conversation.last?.state === "broken" }),
  source: (citation, knowledge) => documents.open(citation, knowledge),
});
const documents = new Documents({ options: () => ({ key: settings.key }), changed: showDocuments });

let models = [];
let running = null; // AbortController of the answer that comes
let pinned = true; // whether the end of the conversation is to stay in sight

// The conversation ------------------------------------------------------------------------------------------

/** Sends what stands in the message field. */
function submit() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  if (conversation.openCalls.length) {
    refuse("The model waits for the result of its call. Give it above, or edit your last message.");
    transcript.focusCalls();
    return;
  }
  if (!request()) return; // a wrong setting: the text stays in its field
  $("prompt").value = "";
  grow();
  ask(text);
}

function ask(text) {
  conversation.say(text);
  transcript.add(conversation.last);
  keep();
  answer();
}

/** The request's fields but its messages; null, with the reason on the page, where they cannot be sent. */
function request() {
  refuse(null);
  try {
    if (!settings.model) throw new Error("There is no model to ask. See the message above.");
    return settings.request();
  } catch (error) {
    if (error instanceof SettingError) {
      openPanel();
      settings.mark(error.field, error.message);
    } else refuse(error.message);
    return null;
  }
}

/** Asks for the next answer. `replace`: in place of the last one. */
async function answer({ replace = false } = {}) {
  const fields = request();
  if (running || !fields) return;
  if (replace && conversation.last?.role === "assistant") {
    conversation.truncate(conversation.messages.length - 1);
    transcript.truncate(conversation.messages.length);
  }
  const stream = fromDocuments() ? askDocuments(fields) : askModel(fields);
  const message = conversation.begin(fields.model, fromDocuments() ? documents.knowledge : null);
  const view = transcript.add(message);
  transcript.clearError();
  running = new AbortController();
  showState();
  scrollToEnd();
  const error = await receive(message, view, stream, running.signal);
  running = null;
  finish(message, view, error);
}

const askModel = (fields) => {
  const body = { ...fields, messages: conversation.toApi(settings.system) };
  return (options) => streamChat(body, options);
};

const fromDocuments = () => $("from-documents").checked && documents.any;

/** The last question goes alone: what was said before is no document. */
function askDocuments({ model, max_tokens }) {
  const question = conversation.messages[conversation.lastUser].content;
  const body = { question, model, knowledge: documents.knowledge, ...(max_tokens ? { max_tokens } : {}) };
  return (options) => streamAnswer(body, options);
}

/** Reads the stream into a message and its view. Returns the error that ended it; null where none did. */
async function receive(message, view, stream, signal) {
  const screen = painter(() => {
    view.draw();
    if (pinned) toEnd();
  });
  try {
    for await (const chunk of stream({ key: settings.key, signal })) {
      const text = apply(message, chunk);
      view.text(text);
      if (typeof chunk.content === "string") view.rewrite(); // citations were checked: the text is another
      announcer.push(text);
      screen.request();
    }
    message.state = "done";
    return null;
  } catch (error) {
    message.state = error.name === "AbortError" ? "stopped" : "broken";
    return message.state === "broken" ? error : null;
  } finally {
    screen.cancel();
  }
}

function finish(message, view, error) {
  if (conversation.last !== message) return showState(); // another conversation has begun
  view.end();
  if (error && !message.content && !message.calls.length) {
    conversation.truncate(conversation.messages.length - 1);
    transcript.truncate(conversation.messages.length);
  }
  if (error) transcript.showError(error, { show: remedy(error) });
  const ending = { stopped: "Stopped.", broken: "", done: message.calls.length ? "Tool call." : "End of the answer." };
  announcer.end(ending[message.state]);
  showContext(message);
  showState();
  keep();
  if (pinned) toEnd();
  if (conversation.openCalls.length && document.activeElement === $("prompt") && !$("prompt").value) {
    transcript.focusCalls();
  }
}

/** A button that leads to the setting which an error is about; null where there is none. */
function remedy(error) {
  const name = error.status === 401 || error.status === 403 ? "key" : settings.fieldOf(error.param);
  if (!name) return null;
  const press = () => {
    if (name !== "model") openPanel();
    settings.mark(name, error.message);
  };
  return { words: name === "key" ? "Enter a key" : "Show the setting", press };
}

/**
 * Runs `draw` when the screen is due, but never for more than about a fifth of the time: drawing a very long block
 * must leave the page usable.
 */
function painter(draw) {
  let [frame, timer, free] = [null, null, 0];
  const paint = () => {
    frame = null;
    const begun = performance.now();
    draw();
    const ended = performance.now();
    free = ended + 4 * (ended - begun);
  };
  const request = () => {
    if (frame !== null || timer !== null) return;
    const wait = free - performance.now();
    if (wait <= 0) frame = requestAnimationFrame(paint);
    else timer = setTimeout(() => ((timer = null), (frame = requestAnimationFrame(paint))), wait);
  };
  const cancel = () => {
    cancelAnimationFrame(frame);
    clearTimeout(timer);
  };
  return { request, cancel };
}

function stop() {
  running?.abort();
}

function startAnew() {
  stop();
  conversation.truncate(0);
  transcript.truncate(0);
  transcript.clearError();
  $("context").hidden = true;
  refuse(null);
  showState();
  keep();
  $("prompt").focus();
}

function exportConversation() {
  const now = new Date();
  const record = {
    exported: now.toISOString(),
    request: { ...safely(() => settings.request()), messages: conversation.toApi(settings.system) },
    answers: conversation.records(),
  };
  const blob = new Blob([JSON.stringify(record, null, 2), "\n"], { type: "application/json" });
  const url = URL.createObjectURL(blob);
  const name = `conversation-${now.toISOString().slice(0, 19).replaceAll(":", "")}.json`;
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Settings that cannot be sent now are no reason to lose a conversation. */
function safely(read) {
  try {
    return read();
  } catch {
    return { model: settings.model };
  }
}

// What is shown ---------------------------------------------------------------------------------------------

const current = () => models.find((model) => model.id === settings.model);

/** Buttons and regions as the state wants them. */
function showState() {
  const [busy, any] = [running !== null, conversation.messages.length > 0];
  const focused = document.activeElement;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (focused === $("send") && busy) $("stop").focus();
  if (focused === $("stop") && !busy) $("prompt").focus();
  $("empty").hidden = any;
  $("new").disabled = $("export").disabled = !any;
  $("hint").textContent = busy ? "Esc stops" : hint();
  document.body.classList.toggle("busy", busy);
  transcript.setIdle(!busy);
}

function hint() {
  if (fromDocuments()) return "Each question is answered from the documents alone.";
  return touch.matches ? "" : "Enter sends, Shift + Enter makes a line";
}

/** What of the page is about documents, where there are any. */
function showDocuments() {
  for (const id of ["documents", "from-documents-label"]) $(id).hidden = !documents.any;
  $("from-documents-words").replaceChildren(...textNodes(`Answer from ${documents.words}`));
  if (!documents.any && !$("library").hidden) showLibrary(false);
  showState();
}

/** The documents in place of the conversation, or the conversation again. */
function showLibrary(open) {
  $("library").hidden = !open;
  $("main").hidden = open;
  $("documents").setAttribute("aria-pressed", String(open));
  if (open) documents.enter();
  else $("documents").focus();
}

function refuse(message) {
  $("refusal").textContent = message ?? "";
  $("refusal").hidden = !message;
}

/** How much of the model's context the conversation fills, as the server counted it. */
function showContext(message) {
  const usage = message.measure?.usage;
  const length = current()?.llmc?.context_length;
  const used = (usage?.prompt_tokens ?? 0) + (usage?.completion_tokens ?? 0);
  $("context").hidden = !used || !length;
  if (!used || !length) return;
  $("gauge").style.inlineSize = `${Math.min(100, (100 * used) / length)}%`;
  $("context-words").textContent = `${count(used)} of ${count(length)} tokens`;
}

function showModel() {
  const model = current();
  document.title = model ? `${model.id} – llmc` : "llmc";
  $("brief").textContent = brief(model);
  const none = el("p", { class: "help" }, model ? "The server says nothing about it." : "No model yet.");
  $("about").replaceChildren(facts(model).length ? factList(model) : none);
  if (model) showWelcome(model);
}

function showWelcome(model) {
  const prompts = EXAMPLES.map((text) => {
    const press = () => !running && request() && ask(text);
    return el("li", {}, el("button", { type: "button", class: "example", on: { click: press } }, text, icon("ask")));
  });
  $("empty").replaceChildren(
    el("h2", { id: "empty-name", dir: "ltr" }, textNodes(model.id)),
    factList(model),
    el("p", { class: "label", id: "try" }, "Try one of these, or write your own"),
    el("ul", { class: "examples", "aria-labelledby": "try" }, prompts),
  );
}

function showNoModels(error) {
  const actions = { retry: loadModels, show: remedy(error) };
  if (conversation.messages.length) return transcript.showError(error, actions);
  $("empty").replaceChildren(el("h2", { id: "empty-name" }, "No model to talk to"), errorCard(error, actions));
}

async function loadModels() {
  try {
    models = await listModels(settings.key);
  } catch (error) {
    return showNoModels(error);
  }
  const wanted = settings.model || load()?.settings?.model;
  $("model").replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
  $("model").disabled = !models.length;
  if (models.some(({ id }) => id === wanted)) $("model").value = wanted;
  showModel();
  settings.unmark("key");
  transcript.clearError();
  refuse(null);
  if (!models.length) showNoModels({ status: 404, message: "The server offers no model that can chat." });
}

const toEnd = () => ($("scroll").scrollTop = $("scroll").scrollHeight);

function scrollToEnd() {
  pinned = true;
  toEnd();
}

const NEAR = 64; // pixels from the end that still count as the end

function watchScroll() {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  pinned = scrollHeight - scrollTop - clientHeight < NEAR;
  $("latest").hidden = pinned;
}

// The panel: beside the conversation where there is room, over it elsewhere ----------------------------------

const roomy = matchMedia("(min-width: 66rem)");
const touch = matchMedia("(hover: none) and (pointer: coarse)");

function setPanel(open) {
  const over = open && !roomy.matches;
  document.body.classList.toggle("panel-open", open);
  $("toggle").setAttribute("aria-expanded", String(open));
  $("panel").inert = !open;
  $("shade").hidden = !over;
  for (const node of [document.querySelector(".top"), $("main"), $("library")]) node.inert = over;
}

const panelIsOver = () => document.body.classList.contains("panel-open") && !roomy.matches;

function openPanel() {
  setPanel(true);
}

function closePanel() {
  setPanel(false);
  $("toggle").focus();
}

function togglePanel() {
  const open = !document.body.classList.contains("panel-open");
  setPanel(open);
  if (panelIsOver()) $("close").focus();
}

// What is kept ----------------------------------------------------------------------------------------------

function keep() {
  if (!$("remember").checked) return;
  const state = { settings: settings.save(), messages: conversation.save(), documents: $("from-documents").checked };
  const kept = save(state);
  if (!kept) refuse("This browser keeps no more: its storage is full or switched off.");
}

function keepOrForgetKey() {
  keepKey($("keep-key").checked ? settings.key : null);
}

function restore() {
  const kept = load();
  const key = loadKey();
  $("remember").checked = kept !== null;
  $("keep-key").checked = key !== null;
  if (key !== null) settings.key = key;
  if (!kept) return;
  settings.restore(kept.settings);
  $("from-documents").checked = kept.documents === true;
  conversation.restore(kept.messages);
  for (const message of conversation.messages) transcript.addWhole(message);
}

// Keys and clicks -------------------------------------------------------------------------------------------

function promptKeys(event) {
  if (event.isComposing) return; // Enter ends a word of an input method
  if (event.key === "Enter" && !event.shiftKey && !touch.matches) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !$("prompt").value && !running) {
    event.preventDefault();
    transcript.editLast();
  }
}

/** Makes the message field as high as its text, in browsers whose style sheets cannot (field-sizing). */
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  const field = $("prompt");
  field.style.blockSize = "auto"; // else it only grows
  field.style.blockSize = `${field.scrollHeight}px`;
}

function pageKeys(event) {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (panelIsOver()) closePanel();
  else stop();
}

const press = (id, action) => $(id).addEventListener("click", action);

function listen() {
  $("composer").addEventListener("submit", (event) => (event.preventDefault(), submit()));
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("settings").addEventListener("change", keep);
  $("prompt").addEventListener("keydown", promptKeys);
  $("prompt").addEventListener("input", grow);
  document.addEventListener("keydown", pageKeys);
  $("scroll").addEventListener("scroll", watchScroll, { passive: true });
  $("model").addEventListener("change", () => (settings.unmark("model"), showModel(), keep()));
  $("remember").addEventListener("change", () => ($("remember").checked ? keep() : forget()));
  $("keep-key").addEventListener("change", keepOrForgetKey);
  $("key").addEventListener("change", () => (keepOrForgetKey(), models.length || loadModels(), documents.load()));
  $("from-documents").addEventListener("change", () => (showState(), keep()));
  press("documents", () => showLibrary($("library").hidden));
  press("leave", () => showLibrary(false));
  for (const [id, action] of [["stop", stop], ["new", startAnew], ["export", exportConversation]]) press(id, action);
  for (const [id, action] of [["toggle", togglePanel], ["close", closePanel], ["shade", closePanel]]) press(id, action);
  press("latest", scrollToEnd);
  roomy.addEventListener("change", () => setPanel(roomy.matches));
}

function start() {
  restore();
  listen();
  setPanel(roomy.matches);
  showState();
  showModel();
  if (!touch.matches) $("prompt").focus();
  scrollToEnd();
  loadModels();
  documents.load();
}

start();
