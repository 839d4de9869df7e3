/**
 * Conversations as values: what is in one, and every change that can be made to them.
 *
 * Knows: messages, the states of an answer, and how a conversation gets its name.
 * Must not know: React, storage, the server. Everything here is pure; ids and times come from outside.
 */
import type { Figures } from "./api";
import type { Changed } from "./parameters";

/** `waiting`: not sent yet, or to be sent again. `cut`: the connection was lost when some of it had come. */
export type AnswerState = "waiting" | "streaming" | "done" | "stopped" | "cut" | "failed";

export interface Question {
  role: "user";
  id: string;
  text: string;
}

export interface Answer {
  role: "assistant";
  id: string;
  text: string;
  state: AnswerState;
  /** The tab that sends and receives it, as long as it is waiting or streaming. */
  owner: string | null;
  /** Whether it has been sent a second time by itself. */
  resent: boolean;
  figures: Figures | null;
  problem: { sentence: string; status: number | null } | null;
}

export type Message = Question | Answer;

export interface Conversation {
  id: string;
  /** "" until there is a first message to take it from. */
  title: string;
  created: number;
  /** Milliseconds; grows with every change, so that of two tabs' versions the later one is known. */
  changed: number;
  raw: boolean;
  parameters: Changed;
  messages: Message[];
}

/** All of them, and what the next new one begins with. */
export interface Book {
  conversations: Conversation[];
  last: { raw: boolean; parameters: Changed };
}

export interface By {
  now: number;
  owner: string;
  answerId: string;
}

export type Action =
  | { type: "create"; id: string; now: number; raw?: boolean }
  | { type: "rename"; id: string; now: number; title: string }
  | { type: "delete"; id: string }
  | { type: "restore"; conversation: Conversation; now: number }
  | { type: "import"; conversations: Conversation[] }
  | { type: "raw"; id: string; now: number; raw: boolean }
  | { type: "parameters"; id: string; now: number; parameters: Changed }
  | { type: "say"; id: string; by: By; questionId: string; text: string }
  | { type: "extend"; id: string; by: By }
  | { type: "again"; id: string; by: By }
  | { type: "edit"; id: string; by: By; text: string }
  | { type: "answered"; id: string; now: number; answerId: string; change: Partial<Answer> }
  | { type: "adopt"; book: Book };

export const EMPTY: Book = { conversations: [], last: { raw: false, parameters: {} } };

export function reduce(book: Book, action: Action): Book {
  switch (action.type) {
    case "create":
      return with_(book, [...book.conversations, fresh(book, action)]);
    case "delete":
      return with_(book, book.conversations.filter(({ id }) => id !== action.id));
    case "restore":
      return with_(book, [
        ...book.conversations.filter(({ id }) => id !== action.conversation.id),
        { ...action.conversation, messages: action.conversation.messages.map(settled), changed: action.now },
      ]);
    case "import": {
      const ids = new Set(action.conversations.map(({ id }) => id));
      return with_(book, [...book.conversations.filter(({ id }) => !ids.has(id)), ...action.conversations]);
    }
    case "adopt":
      return action.book;
    case "rename":
      return change(book, action, action.now, { title: action.title.trim().slice(0, 200) });
    case "raw":
      return remember(change(book, action, action.now, { raw: action.raw }), { raw: action.raw });
    case "parameters": {
      const { parameters } = action;
      return remember(change(book, action, action.now, { parameters }), { parameters });
    }
    case "answered":
      return change(book, action, action.now, ({ messages }) => ({
        messages: messages.map((message) =>
          message.role === "assistant" && message.id === action.answerId ? { ...message, ...action.change } : message,
        ),
      }));
    case "say":
      return change(book, action, action.by.now, ({ title, messages }) => ({
        title: title || titleOf(action.text),
        messages: [
          ...messages.map(settled),
          { role: "user", id: action.questionId, text: action.text },
          awaited(action.by),
        ],
      }));
    case "extend":
      return change(book, action, action.by.now, ({ messages }) => ({
        messages: [...messages.map(settled), awaited(action.by)],
      }));
    case "again":
      return change(book, action, action.by.now, ({ messages }) => ({
        messages: [...(messages.at(-1)?.role === "assistant" ? messages.slice(0, -1) : messages), awaited(action.by)],
      }));
    case "edit":
      return change(book, action, action.by.now, ({ messages }) => edited(messages, action.text, action.by));
  }
}

/** The first words of what was said first. */
export function titleOf(text: string): string {
  const words = text.trim().split(/\s+/).slice(0, 8);
  while (words.length > 1 && words.join(" ").length > 44) words.pop();
  const title = words.join(" ");
  return title.length > 44 ? `${title.slice(0, 43)}…` : title;
}

export const isOpen = (message: Message): boolean =>
  message.role === "assistant" && (message.state === "waiting" || message.state === "streaming");

/** The last answer, when it is the last thing in the conversation. */
export function lastAnswer(conversation: Conversation): Answer | null {
  const last = conversation.messages.at(-1);
  return last?.role === "assistant" ? last : null;
}

/** A message of whose answer nothing more will come: it keeps what had come. */
export function settled<T extends Message>(message: T): T {
  return isOpen(message) ? { ...message, state: "cut", owner: null } : message;
}

/** Latest first. */
export const inOrder = (book: Book): Conversation[] => [...book.conversations].sort((a, b) => b.changed - a.changed);

function fresh(book: Book, { id, now, raw }: { id: string; now: number; raw?: boolean }): Conversation {
  const { parameters } = book.last;
  return { id, title: "", created: now, changed: now, raw: raw ?? book.last.raw, parameters, messages: [] };
}

function awaited(by: By): Answer {
  const { answerId: id, owner } = by;
  return { role: "assistant", id, text: "", state: "waiting", owner, resent: false, figures: null, problem: null };
}

function edited(messages: Message[], text: string, by: By): Partial<Conversation> {
  const at = messages.findLastIndex(({ role }) => role === "user");
  const question = messages[at];
  if (question?.role !== "user") return {};
  const title = at === 0 ? { title: titleOf(text) } : {};
  return { ...title, messages: [...messages.slice(0, at), { ...question, text }, awaited(by)] };
}

type Change = Partial<Conversation> | ((conversation: Conversation) => Partial<Conversation>);

function change(book: Book, { id }: { id: string }, now: number, made: Change): Book {
  const one = (conversation: Conversation): Conversation => ({
    ...conversation,
    ...(typeof made === "function" ? made(conversation) : made),
    changed: Math.max(now, conversation.changed + 1),
  });
  return with_(book, book.conversations.map((conversation) => (conversation.id === id ? one(conversation) : conversation)));
}

const with_ = (book: Book, conversations: Conversation[]): Book => ({ ...book, conversations });
const remember = (book: Book, last: Partial<Book["last"]>): Book => ({ ...book, last: { ...book.last, ...last } });
