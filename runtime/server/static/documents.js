// The view of the documents: which knowledge base, and its three parts: searching, the list of files, the picture of
// the graph. It is there only where the server offers documents.

import { el, textNodes } from "./dom.js";
import { Files } from "./files.js";
import { count } from "./measure.js";
import { listKnowledge } from "./rag.js";
import { Reader } from "./reader.js";
import { Search } from "./search.js";

const $ = (id) => document.getElementById(id);

const TABS = ["search", "files", "graph"];

export class Documents {
  #bases = [];
  #writable = false;
  #most = Infinity;
  #tab = "search";
  #graph = null; // made when it is first looked at
  #fresh = new Set(); // parts that show the documents as they are

  /** `options()` gives {key} of requests; `changed()` is called when there are documents, or none any more. */
  constructor({ options, changed }) {
    this.options = options;
    this.changed = changed;
    this.reader = new Reader($("reader"), options);
    const shared = { knowledge: () => this.knowledge, options, open: (passage) => this.open(passage) };
    this.search = new Search(
      { form: $("search-form"), state: $("search-state"), results: $("passages") },
      { ...shared, show: (document) => this.showInGraph(document) },
    );
    const parts = { drop: $("drop"), input: $("file-input"), choose: $("choose"), uploads: $("uploads"), list: $("files") };
    this.files = new Files(
      { ...parts, state: $("files-state"), more: $("files-more"), filter: $("files-filter") },
      {
        ...shared,
        writable: () => this.#writable,
        most: () => this.#most,
        changed: () => this.#stale(),
        confirm: (title, words) => confirmed(title, words),
      },
    );
    this.shared = shared;
    $("knowledge").addEventListener("change", () => (this.#stale(), this.#show(this.#tab), this.changed()));
    for (const tab of TABS) {
      $(`tab-${tab}`).addEventListener("click", () => this.#show(tab));
      $(`tab-${tab}`).addEventListener("keydown", (event) => this.#keys(event, tab));
    }
  }

  /** The name of the knowledge base that is chosen; null where there is none. */
  get knowledge() {
    return $("knowledge").value || null;
  }

  /** Asks the server what there is. What fails is shown where models fail too: nothing is said here. */
  async load() {
    let found = { bases: [], writable: false, most: 0 };
    try {
      found = await listKnowledge(this.options().key);
    } catch {
      // The chat says what is wrong with the server; without a key, documents come when it is given.
    }
    const before = this.knowledge;
    this.#bases = found.bases;
    [this.#writable, this.#most] = [found.writable, found.most];
    $("knowledge").replaceChildren(...found.bases.map(({ id }) => el("option", { value: id }, id)));
    if (found.bases.some(({ id }) => id === before)) $("knowledge").value = before;
    $("knowledge").closest("label").hidden = found.bases.length < 2;
    this.#facts();
    this.changed();
  }

  get any() {
    return this.#bases.length > 0;
  }

  /** The documents in words: by name where there are several knowledge bases. */
  get words() {
    return this.#bases.length > 1 ? this.knowledge : "documents";
  }

  #facts() {
    const base = this.#bases.find(({ id }) => id === this.knowledge);
    const words = base
      ? [base.id, Number.isFinite(base.documents) ? `${count(base.documents)} documents` : "", base.embedder ?? "words alone"]
      : [];
    $("library-facts").replaceChildren(...textNodes(words.filter((one) => typeof one === "string" && one).join(" · ")));
  }

  /** The documents are others than those that are shown. */
  #stale() {
    this.#fresh.clear();
    this.search.clear();
    this.#graph?.forget();
    this.load();
  }

  /** The view has been opened. */
  enter() {
    this.#show(this.#tab);
    if (this.#tab === "search") $("query").focus();
    else $(`tab-${this.#tab}`).focus();
  }

  async #show(tab) {
    this.#tab = tab;
    for (const one of TABS) {
      const button = $(`tab-${one}`);
      button.setAttribute("aria-selected", String(one === tab));
      button.tabIndex = one === tab ? 0 : -1;
      $(`view-${one}`).hidden = one !== tab;
    }
    this.#facts();
    if (tab === "graph") await this.#makeGraph();
    if (this.#fresh.has(tab)) return;
    this.#fresh.add(tab);
    if (tab === "files") await this.files.load();
    if (tab === "graph" && this.#graph?.empty) await this.#graph.begin();
  }

  #keys(event, tab) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = TABS.at((TABS.indexOf(tab) + step) % TABS.length);
    $(`tab-${next}`).focus();
    this.#show(next);
  }

  async #makeGraph() {
    if (this.#graph) return;
    const { Graph } = await import("./graph.js");
    const parts = { form: $("graph-form"), picture: $("picture"), list: $("graph-list"), state: $("graph-state") };
    this.#graph ??= new Graph({ ...parts, closer: $("closer"), farther: $("farther"), fit: $("fit") }, this.shared);
  }

  async showInGraph(document) {
    this.#fresh.add("graph");
    await this.#show("graph");
    await this.#graph.begin(document);
    $("picture").focus();
  }

  /** Opens a passage, or a citation, in its document. `knowledge`: where it came from. */
  open(passage, knowledge = this.knowledge) {
    const { document, chunk = "", span = null, title = "" } = passage;
    return this.reader.open({ knowledge, document, chunk, span, title });
  }
}

/** Asks in a dialog of the page; whether the answer was yes. */
function confirmed(title, words) {
  const dialog = $("confirm");
  $("confirm-title").replaceChildren(...textNodes(title));
  $("confirm-words").replaceChildren(...textNodes(words));
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
