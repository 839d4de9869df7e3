import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { Chat } from "../chat";
import { lastAnswer } from "../conversations";
import { Server } from "../server";
import { Store } from "../store";
import { FakeServer, FakeStorage } from "./fake";

let fake: FakeServer;
let store: Store;
let server: Server;
let chat: Chat;
let ends: (() => void)[];
const id = () => store.get().book.conversations[0]!.id;
const answer = () => lastAnswer(store.find(id())!)!;
const settle = (ms = 100) => vi.advanceTimersByTimeAsync(ms);

beforeEach(async () => {
  vi.useFakeTimers();
  fake = new FakeServer();
  store = new Store(new FakeStorage(), "t1");
  server = new Server();
  chat = new Chat(store, server);
  ends = [server.start(), chat.start()];
  await settle();
});
afterEach(() => {
  for (const end of ends) end();
  vi.useRealTimers();
});

test("streams an answer, and ends with its figures", async () => {
  chat.send(id(), "  hello \n");
  await settle();
  expect(fake.last.body).toEqual({ messages: [{ role: "user", content: "hello" }] });
  expect(answer()).toMatchObject({ state: "streaming", text: "" });
  fake.last.tokens("Good", " day");
  await settle();
  expect(answer()).toMatchObject({ state: "streaming", text: "Good day" });
  fake.last.write(": waiting\n\n");
  fake.last.finish("Good day.");
  await settle();
  expect(answer()).toMatchObject({ state: "done", text: "Good day.", owner: null, figures: { tokens: 3, perSecond: 12.5, seed: "9007199254740993" } });
});

test("stop ends the request and keeps what came", async () => {
  chat.send(id(), "hello");
  await settle();
  fake.last.tokens("Good", " day");
  await settle();
  chat.stop(id());
  await settle();
  expect(fake.last.aborted).toBe(true);
  expect(answer()).toMatchObject({ state: "stopped", text: "Good day" });
  expect(server.get().phase).toBe("here");
  expect(fake.asked).toHaveLength(1);
});

test("regenerating while it streams ends the old request, and begins a new one", async () => {
  chat.send(id(), "hello");
  await settle();
  const old = fake.last;
  chat.again(id());
  await settle();
  expect(old.aborted).toBe(true);
  expect(fake.asked).toHaveLength(2);
  fake.last.finish("new");
  await settle();
  expect(answer()).toMatchObject({ state: "done", text: "new" });
});

test("a conversation that is deleted is not answered any further", async () => {
  chat.send(id(), "hello");
  await settle();
  store.dispatch({ type: "delete", id: id() });
  await settle();
  expect(fake.last.aborted).toBe(true);
});

test("an error event is a sentence in place of the rest", async () => {
  chat.send(id(), "hello");
  await settle();
  fake.last.tokens("Good");
  fake.last.fail("a rank was lost");
  await settle();
  expect(answer()).toMatchObject({ state: "failed", text: "Good", problem: { sentence: "a rank was lost" } });
  chat.again(id());
  await settle();
  expect(fake.asked).toHaveLength(2);
});

test("a full queue says when to try again", async () => {
  fake.refusal = Response.json({ error: "full" }, { status: 429, headers: { "retry-after": "6.5" } });
  chat.send(id(), "hello");
  await settle();
  expect(answer()).toMatchObject({ state: "failed", problem: { status: 429, sentence: "The server's queue is full. Try again in 7 s." } });
});

test("any other refusal is the server's own sentence", async () => {
  fake.refusal = Response.json({ error: "the prompt has 600 tokens, the context 512" }, { status: 400 });
  chat.send(id(), "hello");
  await settle();
  expect(answer().problem).toEqual({ sentence: "the prompt has 600 tokens, the context 512", status: 400 });
});

test("a lost key locks", async () => {
  fake.key = "secret";
  chat.send(id(), "hello");
  await settle();
  expect(server.get()).toMatchObject({ phase: "locked", asked: 1 });
  expect(answer()).toMatchObject({ state: "failed", problem: { status: 401 } });
  server.setKey("secret", false);
  await settle();
  expect(server.get().phase).toBe("here");
  chat.again(id());
  await settle();
  fake.last.finish("ok");
  await settle();
  expect(answer().state).toBe("done");
});

test.each(["drop", "end"] as const)("what was cut off stays, marked, and is not sent again by itself: %s", async (how) => {
  chat.send(id(), "hello");
  await settle();
  fake.last.tokens("Good");
  await settle();
  fake.last[how]();
  await settle(20_000);
  expect(answer()).toMatchObject({ state: "cut", text: "Good", owner: null });
  expect(fake.asked).toHaveLength(1);
  chat.goOn(id());
  await settle();
  expect(fake.last.body).toEqual({ messages: [{ role: "user", content: "hello" }] });
});

test("what nothing came of is sent again when the server is back, once", async () => {
  chat.send(id(), "hello");
  await settle();
  fake.isHere = false;
  fake.last.drop();
  await settle();
  expect(server.get().phase).toBe("away");
  expect(answer()).toMatchObject({ state: "waiting", resent: true });
  await settle(3000);
  expect(fake.asked).toHaveLength(1);
  fake.isHere = true;
  await settle(10_000);
  expect(fake.asked).toHaveLength(2);
  fake.last.drop();
  await settle(20_000);
  expect(fake.asked).toHaveLength(2);
  expect(answer()).toMatchObject({ state: "failed", problem: { sentence: "The connection was lost twice before anything came." } });
});

test("what is said while the server is away waits, and is sent when it is back", async () => {
  fake.isHere = false;
  server.lost();
  await settle();
  chat.send(id(), "hello");
  await settle(2000);
  expect(answer()).toMatchObject({ state: "waiting", resent: false });
  expect(fake.asked).toHaveLength(0);
  fake.isHere = true;
  await settle(10_000);
  fake.last.finish("here I am");
  await settle();
  expect(answer()).toMatchObject({ state: "done", text: "here I am" });
});

test("a connection that is silent for long is taken for lost", async () => {
  chat.send(id(), "hello");
  await settle();
  fake.last.tokens("Good");
  await settle(60_000);
  expect(answer()).toMatchObject({ state: "cut", text: "Good" });
});

test("signs of life keep a silent one alive", async () => {
  chat.send(id(), "hello");
  for (let n = 0; n < 5; n++) {
    await settle(15_000);
    fake.last.write(": waiting\n\n");
  }
  await settle();
  expect(answer().state).toBe("streaming");
});

test("raw completion sends the text as it stands, and goes on from all there is", async () => {
  store.dispatch({ type: "raw", id: id(), now: 1, raw: true });
  chat.send(id(), "Once ");
  await settle();
  expect(fake.last.body).toEqual({ text: "Once ", raw: true });
  fake.last.finish("upon a");
  await settle();
  chat.goOn(id());
  await settle();
  expect(fake.last.body).toEqual({ text: "Once upon a", raw: true });
  fake.last.finish(" time");
  await settle();
  chat.send(id(), "\nThe end");
  await settle();
  expect(fake.last.body).toEqual({ text: "Once upon a time\nThe end", raw: true });
});

test("a model without a chat template is never sent messages", async () => {
  fake.config = { ...fake.config, chat: false, model: "base" };
  fake.health = { ...fake.health, model: "base" };
  await settle(6000);
  chat.send(id(), "Once");
  await settle();
  expect(fake.last.body).toEqual({ text: "Once", raw: true });
});

test("two conversations are answered at once, each its own", async () => {
  const a = id();
  store.dispatch({ type: "create", id: "b", now: Date.now() });
  chat.send(a, "one");
  chat.send("b", "two");
  await settle();
  fake.asked[1]!.finish("2");
  fake.asked[0]!.finish("1");
  await settle();
  expect(lastAnswer(store.find(a)!)?.text).toBe("1");
  expect(lastAnswer(store.find("b")!)?.text).toBe("2");
});
