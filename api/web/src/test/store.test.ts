// @vitest-environment node
import { expect, test, vi } from "vitest";
import { lastAnswer } from "../conversations";
import { readBook } from "../reading";
import { ASIDE, BOOK, Store } from "../store";
import { FakeStorage } from "./fake";

const by = (answerId: string, owner: string) => ({ now: Date.now(), owner, answerId });
const first = (store: Store) => store.get().book.conversations[0]!;
const stored = (storage: FakeStorage) => readBook(storage.getItem(BOOK) ?? "").book;
const say = (store: Store, text: string, id = first(store).id) =>
  store.dispatch({ type: "say", id, by: by(`a-${text}`, store.tab), questionId: `q-${text}`, text });

test("there is always a conversation, and it is kept", () => {
  const storage = new FakeStorage();
  const store = new Store(storage, "t1");
  say(store, "hello");
  const again = new Store(storage, "t1");
  expect(first(again).messages[0]).toMatchObject({ text: "hello" });
  again.dispatch({ type: "delete", id: first(again).id });
  expect(again.get().book.conversations).toHaveLength(1);
  expect(first(again).messages).toEqual([]);
});

test("what is damaged is put aside, not deleted, and the user is told", () => {
  for (const text of ["{", '{"version": 2, "conversations": []}', "[]"]) {
    const storage = new FakeStorage();
    storage.setItem(BOOK, text);
    const store = new Store(storage, "t1", () => 5);
    expect(storage.getItem(`${ASIDE}5`)).toBe(text);
    expect(store.get().notice).toContain(`${ASIDE}5`);
    expect(stored(storage).conversations).toHaveLength(1);
  }
});

test("of partly damaged ones the good stay", () => {
  const storage = new FakeStorage();
  say(new Store(storage, "t1"), "good");
  const value = JSON.parse(storage.getItem(BOOK)!) as { conversations: unknown[] };
  value.conversations.push({ id: 7 });
  storage.setItem(BOOK, JSON.stringify(value));
  const store = new Store(storage, "t1");
  expect(first(store).title).toBe("good");
  expect(store.get().notice).toMatch(/1 of the stored conversations could not be read/);
  say(store, "more");
  expect(stored(storage).conversations[0]?.messages).toHaveLength(4);
});

test("where there is no room to put it aside, nothing is written over it", () => {
  const storage = new FakeStorage();
  storage.setItem(BOOK, "damaged");
  storage.room = 10;
  const store = new Store(storage, "t1");
  say(store, "hello");
  expect(storage.getItem(BOOK)).toBe("damaged");
  expect(store.get().notice).toMatch(/no room to put them aside/);
  expect(first(store).messages).toHaveLength(2);
});

test("a full storage is told in a sentence; what is on the screen stays, and is written when there is room", () => {
  const storage = new FakeStorage();
  const store = new Store(storage, "t1");
  storage.room = 400;
  say(store, "x".repeat(500));
  expect(store.get().notice).toMatch(/storage is full/);
  expect(first(store).messages[0]?.text).toHaveLength(500);
  storage.room = Infinity;
  store.dispatch({ type: "rename", id: first(store).id, now: Date.now(), title: "n" });
  expect(store.get().notice).toBeNull();
  expect(stored(storage).conversations[0]?.messages[0]?.text).toHaveLength(500);
});

test("without any storage all works, and the user knows", () => {
  const store = new Store(null, "t1");
  say(store, "hello");
  expect(store.get().notice).toMatch(/lets the page store nothing/);
  expect(first(store).messages).toHaveLength(2);
});

test("streamed text is written now and then, the end at once", () => {
  vi.useFakeTimers();
  const storage = new FakeStorage();
  const store = new Store(storage, "t1");
  say(store, "hello");
  const id = first(store).id;
  const kept = () => stored(storage).conversations[0]?.messages[1]?.text;
  store.dispatch({ type: "answered", id, now: 1, answerId: "a-hello", change: { text: "ab" } });
  expect(kept()).toBe("");
  vi.advanceTimersByTime(500);
  expect(kept()).toBe("ab");
  store.dispatch({ type: "answered", id, now: 1, answerId: "a-hello", change: { text: "abc", state: "done" } });
  expect(kept()).toBe("abc");
  vi.useRealTimers();
});

test("after a reload what streamed is cut off, and what waited still waits", () => {
  const storage = new FakeStorage();
  const store = new Store(storage, "t1");
  say(store, "waits");
  expect(lastAnswer(first(new Store(storage, "t1")))).toMatchObject({ state: "waiting", owner: "t1" });
  store.dispatch({ type: "answered", id: first(store).id, now: 1, answerId: "a-waits", change: { state: "streaming", text: "so far" } });
  expect(lastAnswer(first(new Store(storage, "t1")))).toMatchObject({ state: "cut", text: "so far", owner: null });
  expect(lastAnswer(first(new Store(storage, "t2")))).toMatchObject({ state: "streaming", owner: "t1" });
  expect(lastAnswer(first(new Store(storage, "t2", () => Date.now() + 90_000)))).toMatchObject({ state: "cut" });
});

test("two tabs: each keeps what the other wrote, and sees it", () => {
  const storage = new FakeStorage();
  const one = new Store(storage, "t1");
  const two = new Store(storage, "t2");
  const wrote = (to: Store) => to.hear({ key: BOOK, newValue: storage.getItem(BOOK) });
  two.dispatch({ type: "create", id: "second", now: Date.now() + 1 });
  say(one, "from one"); // without having heard of the second
  expect(stored(storage).conversations.map(({ id }) => id)).toContain("second");
  wrote(two);
  expect(two.find(first(one).id)?.title).toBe("from one");
  two.dispatch({ type: "delete", id: "second" });
  wrote(one);
  expect(one.find("second")).toBeUndefined();
  say(one, "more");
  expect(stored(storage).conversations).toHaveLength(1);
});

test("what this tab is receiving is not taken from it by a tab that holds it for dead", () => {
  const storage = new FakeStorage();
  const one = new Store(storage, "t1");
  say(one, "slow");
  const two = new Store(storage, "t2", () => Date.now() + 90_000);
  two.dispatch({ type: "rename", id: first(two).id, now: Date.now(), title: "n" });
  one.hear({ key: BOOK, newValue: storage.getItem(BOOK) });
  expect(lastAnswer(first(one))).toMatchObject({ state: "waiting", owner: "t1" });
});
