/**
 * Server-sent events: bytes to the data of each event (WHATWG HTML, "Server-sent events").
 *
 * Knows: lines, in any of their three endings and cut anywhere, also inside a character; fields; comments.
 * Must not know: fetch, JSON, or what the events mean.
 */
export class EventParser {
  #decoder = new TextDecoder();
  #line = "";
  #data: string[] = [];
  #afterReturn = false;

  /** The data of the events that these bytes complete. */
  push(bytes: Uint8Array): string[] {
    let text = this.#decoder.decode(bytes, { stream: true });
    if (text === "") return [];
    if (this.#afterReturn && text.startsWith("\n")) text = text.slice(1); // the other half of a CRLF that was cut
    this.#afterReturn = text.endsWith("\r");
    const lines = (this.#line + text).split(/\r\n|\r|\n/);
    this.#line = lines.pop() ?? "";
    return lines.map((line) => this.#take(line)).filter((data) => data !== null);
  }

  #take(line: string): string | null {
    if (line !== "") {
      const [, field, value] = /^([^:]*):? ?([^]*)$/.exec(line) ?? [];
      if (field === "data") this.#data.push(value ?? "");
      return null;
    }
    if (this.#data.length === 0) return null;
    const data = this.#data.join("\n");
    this.#data = [];
    return data;
  }
}
