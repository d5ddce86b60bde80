// What this page asks of the server about documents. An id goes into an address as one piece: a "/" or ".." in it is
// part of the name there, and never a step to another address.

import { ApiError, errorFrom, request, retryAfter, streamChunks } from "./api.js";

const address = (id) => `v1/rag/documents/${encodeURIComponent(id)}`;

/** "?a=1&b=2" of what is not null or empty. */
function query(fields) {
  const given = Object.entries(fields).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return text && `?${text}`;
}

async function read(path, key, options) {
  const response = await request(path, key, options);
  const body = await response.json().catch(() => null);
  if (!body || typeof body !== "object") throw new ApiError("The server's answer could not be read.");
  return body;
}

const list = (value) => (Array.isArray(value) ? value.filter((one) => one && typeof one === "object") : []);
const text = (value) => (typeof value === "string" ? value : "");
const number = (value) => (Number.isFinite(value) ? value : null);
const span = (value) =>
  Array.isArray(value) && Number.isInteger(value[0]) && Number.isInteger(value[1]) ? [value[0], value[1]] : null;

function post(path, body, { key, signal }) {
  const headers = { "Content-Type": "application/json" };
  return read(path, key, { method: "POST", headers, signal, body: JSON.stringify(body) });
}

/** {bases, writable, most}: knowledge bases; none where the server knows nothing of documents. */
export async function listKnowledge(key) {
  try {
    const body = await read("v1/rag/knowledge", key);
    const bases = list(body.data).filter((base) => typeof base.id === "string");
    return { bases, writable: body.writable === true, most: number(body.max_upload_bytes) ?? Infinity };
  } catch (error) {
    if (error.status === 404) return { bases: [], writable: false, most: 0 };
    throw error;
  }
}

export async function listDocuments({ knowledge, after = "", limit = 100 }, { key, signal }) {
  const body = await read(`v1/rag/documents${query({ knowledge, after, limit })}`, key, { signal });
  const documents = list(body.data).filter((one) => typeof one.id === "string" && one.id);
  return { documents, more: body.has_more === true, total: number(body.total) ?? documents.length };
}

/** A document's chunks from number `first` on, or those around `chunk`. */
export async function readDocument({ knowledge, id, chunk, first, limit = 40 }, { key, signal }) {
  const body = await read(`${address(id)}${query({ knowledge, chunk, first, limit })}`, key, { signal });
  const chunks = list(body.chunks).map((one) => ({
    ordinal: number(one.ordinal) ?? 0,
    heading: text(one.heading),
    page: number(one.page),
    span: span(one.span) ?? [0, 0],
    text: text(one.text),
  }));
  const facts = { title: text(body.title), path: text(body.path), bytes: number(body.bytes) };
  return { ...facts, type: text(body.media_type), first: number(body.first) ?? 0, more: body.has_more === true, chunks };
}

export function deleteDocument({ knowledge, id }, { key }) {
  return read(`${address(id)}${query({ knowledge })}`, key, { method: "DELETE" });
}

export async function search(body, options) {
  return list((await post("v1/rag/search", body, options)).data).map(passage);
}

/** A passage or a citation, with every field checked. */
export function passage(given) {
  const matches = Array.isArray(given.matches) ? given.matches.map(span).filter(Boolean) : [];
  return {
    number: Number.isInteger(given.number) ? given.number : null,
    chunk: text(given.chunk),
    document: text(given.document),
    title: text(given.title),
    heading: text(given.heading),
    page: number(given.page),
    span: span(given.span) ?? [0, 0],
    text: text(given.text),
    quote: text(given.quote),
    scores: given.scores && typeof given.scores === "object" ? given.scores : null,
    score: number(given.score),
    matches,
  };
}

export async function graph({ knowledge, focus, limit }, { key, signal }) {
  const body = await read(`v1/rag/graph${query({ knowledge, focus, limit })}`, key, { signal });
  const nodes = list(body.nodes).filter((node) => typeof node.id === "string");
  const edges = list(body.edges).filter((edge) => typeof edge.source === "string" && typeof edge.target === "string");
  return {
    nodes: nodes.map((node) => ({ ...node, kind: text(node.kind), label: text(node.label) || node.id })),
    edges: edges.map((edge) => ({ source: edge.source, target: edge.target, kind: text(edge.kind) })),
  };
}

/** Events of an answer from documents: the passages first, then its text, last what became of the citations. */
export function streamAnswer(body, options) {
  return streamChunks("v1/rag/answer", { ...body, stream: true }, options);
}

/**
 * Sends a file. `progress` gets the share that is sent, 0 to 1: the reason for XMLHttpRequest, as fetch does not tell.
 */
export function upload(file, { knowledge, name, replace = false, key, signal, progress }) {
  const sender = new XMLHttpRequest();
  return new Promise((resolve, reject) => {
    sender.open("POST", `v1/rag/documents${query({ knowledge, name, replace: replace || null })}`);
    sender.setRequestHeader("Content-Type", "application/octet-stream");
    if (key) sender.setRequestHeader("Authorization", `Bearer ${key}`);
    sender.upload.addEventListener("progress", (event) => event.total && progress(event.loaded / event.total));
    sender.addEventListener("load", () => {
      const body = parsed(sender.responseText);
      if (sender.status >= 200 && sender.status < 300) return resolve(body ?? {});
      const wait = retryAfter(sender.getResponseHeader("Retry-After"));
      reject(errorFrom(body, { status: sender.status, retryAfter: wait }));
    });
    sender.addEventListener("error", () => reject(new ApiError("The server did not answer.")));
    sender.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    signal?.addEventListener("abort", () => sender.abort());
    sender.send(file);
  });
}

function parsed(body) {
  try {
    return JSON.parse(body);
  } catch {
    return null;
  }
}
