// @vitest-environment node
import { describe, expect, test } from "vitest";
import { EMPTY, inOrder, lastAnswer, reduce, titleOf, type Action, type Book } from "../conversations";
import { exportJson, exportMarkdown, fileName, readBook, readExport, writeBook } from "../reading";

const by = (answerId: string, now = 10) => ({ now, owner: "tab", answerId });
const play = (...actions: Action[]): Book => actions.reduce(reduce, EMPTY);
const CREATE: Action = { type: "create", id: "c", now: 1 };
const SAY: Action = { type: "say", id: "c", by: by("a1"), questionId: "q1", text: "Why is the sky blue, and not green?" };
const DONE: Action = { type: "answered", id: "c", now: 11, answerId: "a1", change: { state: "done", text: "Because.", owner: null } };
const only = (book: Book) => book.conversations[0]!;

describe("reduce", () => {
  test("a question waits for its answer, and gives the conversation its name", () => {
    const { title, messages, changed } = only(play(CREATE, SAY));
    expect(title).toBe("Why is the sky blue, and not green?");
    expect(changed).toBe(10);
    expect(messages).toMatchObject([{ role: "user", id: "q1" }, { id: "a1", state: "waiting", owner: "tab", text: "" }]);
  });

  test("again takes the last answer away, and only that", () => {
    const { messages } = only(play(CREATE, SAY, DONE, { type: "again", id: "c", by: by("a2", 12) }));
    expect(messages).toMatchObject([{ id: "q1" }, { id: "a2", state: "waiting" }]);
  });

  test("an edited question loses what followed; the first one names the conversation", () => {
    const { messages, title } = only(play(CREATE, SAY, DONE, { type: "edit", id: "c", by: by("a2", 12), text: "And green?" }));
    expect(messages).toMatchObject([{ id: "q1", text: "And green?" }, { id: "a2", state: "waiting" }]);
    expect(title).toBe("And green?");
  });

  test("extend adds an answer to an answer", () => {
    const { messages } = only(play(CREATE, SAY, DONE, { type: "extend", id: "c", by: by("a2", 12) }));
    expect(messages.map(({ id }) => id)).toEqual(["q1", "a1", "a2"]);
  });

  test("a new question settles an answer that is still open", () => {
    const { messages } = only(play(CREATE, SAY, { type: "say", id: "c", by: by("a2"), questionId: "q2", text: "x" }));
    expect(messages[1]).toMatchObject({ state: "cut", owner: null });
  });

  test("a new conversation begins with the last parameters and mode", () => {
    const book = play(
      CREATE,
      { type: "parameters", id: "c", now: 2, parameters: { temperature: 0 } },
      { type: "raw", id: "c", now: 3, raw: true },
      { type: "create", id: "d", now: 4 },
    );
    expect(inOrder(book)[0]).toMatchObject({ id: "d", raw: true, parameters: { temperature: 0 } });
  });

  test("deleted and restored, what was open is cut off", () => {
    const before = play(CREATE, SAY);
    const after = [{ type: "delete", id: "c" } as const, { type: "restore", conversation: only(before), now: 20 } as const].reduce<Book>(reduce, before);
    expect(lastAnswer(only(after))).toMatchObject({ state: "cut", owner: null });
  });

  test("every change is later than the one before, whatever the clock says", () => {
    const one = only(play(CREATE, SAY, { type: "rename", id: "c", now: 1, title: " Sky " }));
    expect(one).toMatchObject({ title: "Sky", changed: 11 });
  });
});

test("names are short, and of whole words where there are any", () => {
  expect(titleOf("  one\n two ")).toBe("one two");
  expect(titleOf("a ".repeat(30))).toBe("a a a a a a a a");
  expect(titleOf("x".repeat(60))).toBe(`${"x".repeat(43)}…`);
});

describe("reading", () => {
  const book = play(CREATE, { type: "parameters", id: "c", now: 2, parameters: { seed: "5" } }, SAY, DONE);

  test("what is written is read", () => {
    expect(readBook(writeBook(book))).toEqual({ book, bad: 0 });
    expect(readExport(exportJson(book.conversations))).toEqual(book.conversations);
  });

  test("one damaged conversation does not take the others along", () => {
    const text = JSON.stringify({ version: 1, conversations: [only(book), { id: "x" }, 3] });
    expect(readBook(text)).toMatchObject({ bad: 2, book: { conversations: [{ id: "c" }] } });
  });

  test.each([
    ["", /empty/],
    ["{", /not JSON/],
    ["[]", /no conversations of mpgpt/],
    ['{"conversations": 1}', /no conversations of mpgpt/],
    ['{"version": 9, "conversations": []}', /version 9; this page reads version 1/],
    ['{"version": 1, "conversations": [{"id": "a b"}]}', /Conversation 1 in the file is damaged: it has no id/],
    ['{"version": 1, "conversations": [{"id": "a", "title": "", "created": 1, "changed": 1, "messages": [{"role": "system"}]}]}', /message 1/],
  ])("a bad file is refused in a sentence: %s", (text, sentence) => {
    expect(() => readExport(text)).toThrow(sentence);
  });

  test("an exported answer is not waiting for anything", () => {
    expect(lastAnswer(readExport(exportJson(play(CREATE, SAY).conversations))[0]!)?.state).toBe("cut");
  });

  test("as Markdown, and a name for the file", () => {
    expect(exportMarkdown(only(book))).toBe("# Why is the sky blue, and not green?\n\n## You\n\nWhy is the sky blue, and not green?\n\n## Answer\n\nBecause.\n");
    expect(fileName(only(book), "md")).toBe("mpgpt-why-is-the-sky-blue-and-not-green.md");
    expect(fileName(null, "json")).toBe("mpgpt-conversations.json");
  });
});
