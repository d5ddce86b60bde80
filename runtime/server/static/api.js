// What this page asks of the server, always of its own origin: models, and answers as they come. Documents: rag.js.

import { events } from "./sse.js";

/**
 * A refusal or a break, in the server's own words where it gave any. `status` is 0 where no answer came;
 * `retryAfter` is in seconds, null where the server named none; `param` names the field that is wrong.
 */
export class ApiError extends Error {
  constructor(message, { status = 0, type = null, param = null, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, type, param, code, retryAfter });
  }
}

const LONGEST_WAIT_S = 3600;

/** Seconds of a Retry-After header, which is a number or a date (RFC 9110, 10.2.3). */
export function retryAfter(header, now = Date.now()) {
  if (!header) return null;
  const seconds = /^\s*\d+\s*$/.test(header) ? Number(header) : (Date.parse(header) - now) / 1000;
  return Number.isFinite(seconds) ? Math.min(Math.max(Math.ceil(seconds), 0), LONGEST_WAIT_S) : null;
}

const text = (value) => (typeof value === "string" && value ? value : null);

/** An error from the body {"error": {message, type, param, code}}, or from the status alone. */
export function errorFrom(body, details) {
  const error = body && typeof body.error === "object" && body.error !== null ? body.error : {};
  const { status } = details;
  const message = text(error.message) ?? `The server answered with status ${status} and gave no reason.`;
  const code = text(error.code) ?? (typeof error.code === "number" ? String(error.code) : null);
  return new ApiError(message, { ...details, type: text(error.type), param: text(error.param), code });
}

export async function request(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "same-origin", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server did not answer. It may have stopped, or the network is down.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const details = { status: response.status, retryAfter: retryAfter(response.headers.get("Retry-After")) };
  throw errorFrom(body, details);
}

/** The models that the server offers: objects of /v1/models. Those that say that they cannot chat are left out. */
export async function listModels(key) {
  const response = await request("v1/models", key);
  const body = await response.json().catch(() => null);
  if (!Array.isArray(body?.data)) throw new ApiError("The server's list of models could not be read.");
  return body.data.filter((model) => typeof model?.id === "string" && model.llmc?.chat !== false);
}

/** Chunks of a streamed chat completion (objects of type chat.completion.chunk), the one with `usage` included. */
export function streamChat(body, options) {
  return streamChunks("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, options);
}

/**
 * The events of a streamed answer. Throws ApiError where the server refuses, breaks in the middle, or ends without
 * saying why; AbortError where `signal` fired.
 */
export async function* streamChunks(path, body, { key, signal }) {
  const headers = { "Content-Type": "application/json" };
  const response = await request(path, key, { method: "POST", signal, headers, body: JSON.stringify(body) });
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = parseChunk(data);
      if (chunk.error) throw errorFrom(chunk, { status: response.status });
      finished ||= Boolean(chunk.choices?.[0]?.finish_reason);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke before the answer was complete.", { status: response.status });
  }
  if (!finished) {
    throw new ApiError("The connection closed before the answer was complete.", { status: response.status });
  }
}

function parseChunk(data) {
  try {
    const chunk = JSON.parse(data);
    if (chunk && typeof chunk === "object") return chunk;
  } catch {
    // said below
  }
  throw new ApiError("The server sent an event that is not a JSON object.", { status: 200 });
}
