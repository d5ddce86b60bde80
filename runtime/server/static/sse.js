// Server-sent events read from a fetch (EventSource can only GET).
// Format: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream

/** Text in, data of whole events out, wherever the text was cut: in a line, between \r and \n, in a field's name. */
export class EventParser {
  #line = ""; // the line that has begun
  #data = []; // `data` lines of the event that has begun
  #afterReturn = false; // the last character was \r: a \n that follows belongs to it
  #first = true; // a byte order mark may open the stream

  /** The `data` of each event that `text` completes. Events without data (comments, keep-alives) give nothing. */
  push(text) {
    if (this.#first && text) {
      this.#first = false;
      if (text.startsWith("\ufeff")) text = text.slice(1);
    }
    const events = [];
    let from = 0;
    for (let at = 0; at < text.length; at++) {
      const code = text.charCodeAt(at);
      const joined = this.#afterReturn && code === 10;
      this.#afterReturn = code === 13;
      if (joined) from = at + 1;
      else if (code === 10 || code === 13) {
        this.#endLine(this.#line + text.slice(from, at), events);
        this.#line = "";
        from = at + 1;
      }
    }
    this.#line += text.slice(from);
    return events;
  }

  #endLine(line, events) {
    if (line === "") {
      if (this.#data.length) events.push(this.#data.join("\n"));
      this.#data = [];
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    if (field !== "data") return; // event, id, retry and comments: nothing that this page uses
    const value = colon < 0 ? "" : line.slice(colon + 1);
    this.#data.push(value.startsWith(" ") ? value.slice(1) : value);
  }
}

/** The `data` of each event of a response's body, as they come. Closing the generator cancels the request. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // keeps a character that was cut between two reads
  const parser = new EventParser();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // already closed, or aborted: nothing is left to cancel
  }
}
