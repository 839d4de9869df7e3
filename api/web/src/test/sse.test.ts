// @vitest-environment node
import { expect, test } from "vitest";
import { EventParser } from "../sse";

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);
const all = (...pieces: Uint8Array[]): string[] => {
  const parser = new EventParser();
  return pieces.flatMap((piece) => parser.push(piece));
};

const STREAM = ': alive\r\n\r\ndata: {"token":"é"}\r\n\r\ndata: two\rdata:lines 漢\r\rid: 7\nevent: x\ndata\n\n: alive\n\nretry: 1\ndata:  😀\n\n';
const EVENTS = ['{"token":"é"}', "two\nlines 漢", "", " 😀"];

test("events in all three line endings, with comments and other fields", () => {
  expect(all(bytes(STREAM))).toEqual(EVENTS);
});

test("the same events wherever the stream is cut, also inside a character and a CRLF", () => {
  const whole = bytes(STREAM);
  for (let at = 0; at <= whole.length; at++) {
    expect(all(whole.slice(0, at), whole.slice(at))).toEqual(EVENTS);
  }
  for (let step = 1; step < 5; step++) {
    const pieces = Array.from({ length: Math.ceil(whole.length / step) }, (_, n) => whole.slice(n * step, (n + 1) * step));
    expect(all(...pieces)).toEqual(EVENTS);
  }
});

test("an event that is not finished is none", () => {
  expect(all(bytes("data: half"))).toEqual([]);
  expect(all(bytes("data: half\n"))).toEqual([]);
});

test("a byte order mark at the beginning is no part of the first field", () => {
  expect(all(bytes("\uFEFFdata: x\n\n"))).toEqual(["x"]);
});

test("a value may hold colons, and data need not be JSON", () => {
  expect(all(bytes("data: a: b:c\n\n"))).toEqual(["a: b:c"]);
});
