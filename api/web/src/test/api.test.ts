// @vitest-environment node
import { expect, test, vi } from "vitest";
import { Away, getConfig, readEvent, Refusal } from "../api";

const answer = (make: () => Response | Promise<Response>): void => void vi.stubGlobal("fetch", async () => make());

test("a token, an end with its figures, an error", () => {
  expect(readEvent('{"token":" a","done":false}')).toEqual({ kind: "token", text: " a" });
  expect(readEvent('{"error":"no","done":true}')).toEqual({ kind: "error", sentence: "no" });
  expect(readEvent('{"error":{"message":"no"},"done":true}')).toEqual({ kind: "error", sentence: "no" });
  expect(readEvent('{"done":true,"full_text":"ab","finish_reason":"length","num_tokens":2,"time_to_first_token_ms":5,"tokens_per_second":3}')).toEqual({
    kind: "done",
    text: "ab",
    figures: { firstMs: 5, totalMs: 0, perSecond: 3, tokens: 2, promptTokens: 0, finish: "length", seed: null },
  });
});

test("a seed keeps all of its 63 bits, and text that looks like one is none", () => {
  const event = readEvent('{"done":true,"full_text":"{\\"seed\\": 5}","seed":9223372036854775807}');
  expect(event.kind === "done" && event.figures.seed).toBe("9223372036854775807");
});

test("what is not JSON is an error in a sentence", () => {
  expect(readEvent("<html>")).toEqual({ kind: "error", sentence: "The server sent an event that is not JSON." });
});

test("refusals carry the server's sentence, in both of its forms, and when to come again", async () => {
  answer(() => Response.json({ error: "the queue is full" }, { status: 429, headers: { "retry-after": "7" } }));
  await expect(getConfig("")).rejects.toMatchObject({ status: 429, message: "the queue is full", retryAfterS: 7 });
  answer(() => Response.json({ error: { message: "wrong", type: "x", param: null, code: null } }, { status: 400 }));
  await expect(getConfig("")).rejects.toMatchObject({ status: 400, message: "wrong", retryAfterS: null });
  answer(() => new Response("not here", { status: 404 }));
  await expect(getConfig("")).rejects.toThrow("The server answered with status 404.");
});

test("nobody there, a proxy's 502 and another's page are all: away", async () => {
  answer(() => Promise.reject(new TypeError("Failed to fetch")));
  await expect(getConfig("")).rejects.toBeInstanceOf(Away);
  answer(() => new Response("bad gateway", { status: 502 }));
  await expect(getConfig("")).rejects.toBeInstanceOf(Away);
  answer(() => new Response("<html>", { status: 200 }));
  await expect(getConfig("")).rejects.toBeInstanceOf(Away);
  answer(() => Response.json({ error: "stopping" }, { status: 503 }));
  await expect(getConfig("")).rejects.toBeInstanceOf(Refusal);
});
