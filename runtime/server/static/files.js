// The documents as a list: adding files by button or by dropping them, and deleting.

import { button, el, icon, textNodes } from "./dom.js";
import { bytes, count } from "./measure.js";
import { deleteDocument, listDocuments, upload } from "./rag.js";

const AT_ONCE = 100; // documents of the list
const MOST_FILES = 10_000; // dropped at once
const DEEPEST = 32; // folders in folders
const MANY = 20; // lines of files: with more, those that went well go by themselves

/** `actions`: knowledge(), writable(), most() bytes, options(), open(document), changed(), confirm(words) → Promise. */
export class Files {
  #parts;
  #after = "";
  #coming = null;
  #queue = [];
  #sending = false;

  constructor(parts, actions) {
    this.#parts = parts;
    this.actions = actions;
    const { drop, input, choose, more, filter } = parts;
    choose.addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      this.add([...input.files].map((file) => ({ file, name: file.webkitRelativePath || file.name })));
      input.value = ""; // the same file can be chosen again
    });
    more.addEventListener("click", () => this.#next());
    filter.addEventListener("input", () => this.#filter());
    for (const name of ["dragenter", "dragover"]) drop.addEventListener(name, (event) => this.#over(event));
    for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => this.#dropped(event));
  }

  // The list ------------------------------------------------------------------------------------------------

  async load() {
    this.#parts.drop.hidden = !this.actions.writable();
    this.#after = "";
    this.#parts.list.replaceChildren();
    await this.#next();
  }

  async #next() {
    this.#coming?.abort();
    const coming = (this.#coming = new AbortController());
    const { list, state, more } = this.#parts;
    more.hidden = true;
    try {
      const asked = { knowledge: this.actions.knowledge(), after: this.#after, limit: AT_ONCE };
      const found = await listDocuments(asked, { ...this.actions.options(), signal: coming.signal });
      if (coming.signal.aborted) return;
      list.append(...found.documents.map((one) => this.#row(one)));
      this.#after = found.documents.at(-1)?.id ?? this.#after;
      more.hidden = !found.more;
      this.#total = found.total;
      this.#filter();
    } catch (error) {
      if (error.name !== "AbortError") say(state, error.message, true);
    }
  }

  #total = 0;

  /** Shows the rows whose name or title has the filter's words. */
  #filter() {
    const words = this.#parts.filter.value.trim().toLowerCase();
    const rows = [...this.#parts.list.children];
    for (const row of rows) row.hidden = words !== "" && !row.textContent.toLowerCase().includes(words);
    const shown = rows.filter((row) => !row.hidden).length;
    const all = this.#total === 1 ? "1 document" : `${count(this.#total)} documents`;
    const filtered = words || shown < this.#total;
    say(this.#parts.state, this.#total === 0 ? "There are no documents yet." : filtered ? `${count(shown)} of ${all}` : all);
  }

  #row(one) {
    const press = () => this.actions.open({ document: one.id, title: one.title });
    const name = el("button", { type: "button", class: "file-name", dir: "auto", on: { click: press } }, textNodes(one.title || one.id));
    const size = Number.isFinite(one.bytes) ? bytes(one.bytes) : "";
    const day = Number.isFinite(one.modified) ? new Date(one.modified * 1000).toISOString().slice(0, 10) : "";
    const facts = [one.title && one.title !== one.id ? one.id : "", size, day].filter(Boolean).join(" · ");
    const row = el("li", { class: "file" }, el("div", { class: "grow" }, name, el("p", { class: "help", dir: "auto" }, textNodes(facts))));
    if (!this.actions.writable()) return row;
    const remove = button("Delete", { name: "delete", press: () => this.#delete(one, row) });
    remove.append(el("span", { class: "visually-hidden" }, textNodes(` ${one.id}`)));
    row.append(remove);
    return row;
  }

  async #delete(one, row) {
    if (!(await this.actions.confirm(`Delete ${one.id}?`, "It will be found no more. The file itself stays where it is."))) return;
    try {
      await deleteDocument({ knowledge: this.actions.knowledge(), id: one.id }, this.actions.options());
    } catch (error) {
      if (error.status !== 404) return say(this.#parts.state, error.message, true);
    }
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    (next?.querySelector(".file-name") ?? this.#parts.choose).focus();
    this.#total = Math.max(0, this.#total - 1);
    this.#filter();
    this.actions.changed();
  }

  // Adding --------------------------------------------------------------------------------------------------

  #over(event) {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    this.#parts.drop.classList.add("over");
  }

  async #dropped(event) {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    this.add(await droppedFiles(event.dataTransfer));
  }

  /** Sends files one after the other; each has a line that says how it goes. */
  add(files) {
    if (!this.actions.writable()) return;
    if (files.length >= MOST_FILES) say(this.#parts.state, `Only ${count(MOST_FILES)} files are taken at once.`, true);
    for (const { file, name } of files.slice(0, MOST_FILES)) {
      const line = new Line(file, name, {
        stop: () => this.#stop(line),
        replace: () => this.#again(line, true),
        retry: () => this.#again(line, false),
      });
      this.#parts.uploads.append(line.node);
      this.#queue.push(line);
    }
    this.#send();
  }

  #again(line, replace) {
    line.replace = replace;
    line.wait();
    this.#queue.push(line);
    this.#send();
  }

  #stop(line) {
    line.sender?.abort();
    this.#queue = this.#queue.filter((one) => one !== line);
    line.node.remove();
  }

  async #send() {
    if (this.#sending) return;
    this.#sending = true;
    let any = false;
    for (let line; (line = this.#queue.shift()); ) any = (await this.#sendOne(line)) || any;
    this.#sending = false;
    if (!any) return;
    await this.load();
    this.actions.changed();
  }

  async #sendOne(line) {
    if (line.file.size > this.actions.most()) {
      line.fail(`It has ${bytes(line.file.size)}; the server takes ${bytes(this.actions.most())} at most.`);
      return false;
    }
    line.sender = new AbortController();
    try {
      const { key } = this.actions.options();
      const fields = { knowledge: this.actions.knowledge(), name: line.name, replace: line.replace, key };
      const signal = line.sender.signal;
      const done = await upload(line.file, { ...fields, signal, progress: (share) => line.progress(share) });
      line.done(done);
      if (this.#parts.uploads.childElementCount > MANY) line.node.remove();
      return true;
    } catch (error) {
      if (error.name === "AbortError") return true; // the server may have been done with it
      line.fail(error.message, { exists: error.code === "document_exists" });
      return false;
    }
  }
}

/** One file on its way. */
class Line {
  sender = null;
  replace = false;
  #bar = el("progress", { max: "1", "aria-label": "Sent" });
  #words = el("p", { class: "help", role: "status", dir: "auto" });
  #buttons = el("div", { class: "actions" });

  constructor(file, name, actions) {
    [this.file, this.name, this.actions] = [file, name, actions];
    const title = el("p", { class: "file-sent", dir: "auto" }, textNodes(name));
    this.node = el("li", { class: "upload" }, title, this.#bar, this.#words, this.#buttons);
    this.wait();
  }

  wait() {
    this.node.classList.remove("failed");
    this.#bar.hidden = false;
    this.#bar.value = 0;
    this.#words.textContent = `waits, ${bytes(this.file.size)}`;
    this.#buttons.replaceChildren(button("Stop", { name: "close", press: this.actions.stop }));
  }

  progress(share) {
    if (share < 1) {
      this.#bar.value = share;
      this.#words.textContent = `${Math.round(100 * share)} % sent`;
    } else {
      this.#bar.removeAttribute("value"); // nobody knows how long it takes
      this.#words.textContent = "sent; the server reads it";
    }
  }

  done(answer) {
    const total = Number.isInteger(answer.total) ? answer.total : 1;
    const failed = Array.isArray(answer.failed) ? answer.failed : [];
    this.#bar.hidden = true;
    this.#words.replaceChildren(icon("done"), total === 1 ? " added" : ` added, ${count(total)} documents`);
    if (failed.length) {
      const reason = String(failed[0]?.reason ?? "");
      this.#words.append(`; ${count(failed.length)} could not be read: `, ...textNodes(reason));
    }
    this.#buttons.replaceChildren(button("Dismiss", { name: "close", press: this.actions.stop }));
  }

  fail(reason, { exists = false } = {}) {
    this.node.classList.add("failed");
    this.#bar.hidden = true;
    this.#words.replaceChildren(...textNodes(reason));
    const again = exists
      ? button("Replace it", { kind: "bordered", press: this.actions.replace })
      : button("Try again", { name: "again", kind: "bordered", press: this.actions.retry });
    this.#buttons.replaceChildren(again, button("Dismiss", { name: "close", press: this.actions.stop }));
  }
}

function say(node, text, wrong = false) {
  node.replaceChildren(...textNodes(text));
  node.classList.toggle("wrong", wrong);
}

/** The files of a drop, those in folders too, with their paths. */
async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ file, name: file.name }));
  const found = [];
  for (const entry of entries) await walk(entry, "", 0, found);
  return found;
}

async function walk(entry, below, depth, found) {
  if (found.length >= MOST_FILES || depth > DEEPEST || (depth && entry.name.startsWith("."))) return;
  const name = below + entry.name;
  if (entry.isFile) {
    const file = await new Promise((resolve) => entry.file(resolve, () => resolve(null)));
    if (file) found.push({ file, name });
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([])));
    if (!some.length) return;
    for (const one of some) await walk(one, `${name}/`, depth + 1, found);
  }
}
