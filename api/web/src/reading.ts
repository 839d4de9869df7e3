/**
 * Conversations from text that may be anything: this browser's storage, or a file that somebody imports. And back.
 *
 * Knows: the form that is stored and exported, its version, and what to say of what does not have it.
 * Must not know: React, where the text is from, or the state of the page.
 */
import { EMPTY, isOpen, settled, type Answer, type AnswerState, type Book, type Conversation, type Message } from "./conversations";
import { readChanged } from "./parameters";

export const VERSION = 1;
const STATES: readonly AnswerState[] = ["waiting", "streaming", "done", "stopped", "cut", "failed"];

/** What was wrong with what was read, as a sentence. */
export class Unreadable extends Error {}

type Fields = Record<string, unknown>;

export const writeBook = (book: Book): string => JSON.stringify({ version: VERSION, ...book });

/** What is stored. `bad` is how many conversations could not be read; the others are there. */
export function readBook(text: string): { book: Book; bad: number } {
  const value = parse(text);
  if (!isFields(value) || !Array.isArray(value["conversations"])) throw new Unreadable("It holds no conversations.");
  if (value["version"] !== VERSION) throw new Unreadable(`Its version is ${String(value["version"])}, not ${VERSION}.`);
  const read = value["conversations"].map(tryConversation);
  const conversations = read.filter((one) => typeof one !== "string");
  const last = isFields(value["last"]) ? value["last"] : {};
  return {
    book: { ...EMPTY, conversations, last: { raw: last["raw"] === true, parameters: readChanged(last["parameters"]) } },
    bad: read.length - conversations.length,
  };
}

export const exportJson = (conversations: readonly Conversation[]): string =>
  `${JSON.stringify({ format: "mpgpt.conversations", version: VERSION, conversations: conversations.map(closed) }, null, 2)}\n`;

/** The conversations of an exported file: all of them, or `Unreadable` with the reason. */
export function readExport(text: string): Conversation[] {
  const value = parse(text);
  if (!isFields(value) || !Array.isArray(value["conversations"])) {
    throw new Unreadable("The file is JSON, but it holds no conversations of mpgpt.");
  }
  if (value["version"] !== VERSION) {
    throw new Unreadable(`The file has version ${String(value["version"])}; this page reads version ${VERSION}.`);
  }
  return value["conversations"].map((one, at) => {
    const read = tryConversation(one);
    if (typeof read === "string") throw new Unreadable(`Conversation ${at + 1} in the file is damaged: ${read}`);
    return closed(read);
  });
}

export function exportMarkdown(conversation: Conversation): string {
  const title = `# ${conversation.title || "Untitled"}\n`;
  if (conversation.raw) return `${title}\n${conversation.messages.map(({ text }) => text).join("")}\n`;
  const said = conversation.messages.map(({ role, text }) => `\n## ${role === "user" ? "You" : "Answer"}\n\n${text.trim()}\n`);
  const { system } = conversation.parameters;
  return `${title}${system ? `\n> ${system.trim().replaceAll("\n", "\n> ")}\n` : ""}${said.join("")}`;
}

export function fileName(conversation: Conversation | null, ending: string): string {
  const words = (conversation?.title ?? "conversations").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-");
  return `mpgpt-${words.replace(/^-|-$/g, "").slice(0, 48) || "conversation"}.${ending}`;
}

const closed = (conversation: Conversation): Conversation => ({ ...conversation, messages: conversation.messages.map(settled) });

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    throw new Unreadable(text.trim() === "" ? "The file is empty." : "The file is not JSON.");
  }
}

/** A conversation, or what is wrong with it. */
function tryConversation(value: unknown): Conversation | string {
  if (!isFields(value)) return "it is not an object.";
  const { id, title, created, changed, raw, messages } = value;
  if (typeof id !== "string" || !/^[\w-]{1,64}$/.test(id)) return "it has no id.";
  if (typeof title !== "string") return "it has no title.";
  if (!Number.isFinite(created) || !Number.isFinite(changed)) return "it has no dates.";
  if (!Array.isArray(messages)) return "it has no list of messages.";
  const read = messages.map(readMessage);
  const wrong = read.indexOf(null);
  if (wrong >= 0) return `message ${wrong + 1} has no role, id or text.`;
  return {
    id,
    title,
    created: created as number,
    changed: changed as number,
    raw: raw === true,
    parameters: readChanged(value["parameters"]),
    messages: read.filter((message) => message !== null),
  };
}

function readMessage(value: unknown): Message | null {
  if (!isFields(value) || typeof value["id"] !== "string" || typeof value["text"] !== "string") return null;
  const { id, text, role } = value;
  if (role === "user") return { role, id, text };
  if (role !== "assistant") return null;
  const answer: Answer = {
    role,
    id,
    text,
    state: STATES.find((state) => state === value["state"]) ?? "done",
    owner: typeof value["owner"] === "string" ? value["owner"] : null,
    resent: value["resent"] === true,
    figures: readFigures(value["figures"]),
    problem: readProblem(value["problem"]),
  };
  return isOpen(answer) ? answer : { ...answer, owner: null };
}

function readFigures(value: unknown): Answer["figures"] {
  if (!isFields(value)) return null;
  const number = (name: string): number => (typeof value[name] === "number" ? value[name] : 0);
  return {
    firstMs: number("firstMs"),
    totalMs: number("totalMs"),
    perSecond: number("perSecond"),
    tokens: number("tokens"),
    promptTokens: number("promptTokens"),
    finish: value["finish"] === "length" ? "length" : "stop",
    seed: typeof value["seed"] === "string" ? value["seed"] : null,
  };
}

function readProblem(value: unknown): Answer["problem"] {
  if (!isFields(value) || typeof value["sentence"] !== "string") return null;
  return { sentence: value["sentence"], status: typeof value["status"] === "number" ? value["status"] : null };
}

const isFields = (value: unknown): value is Fields => typeof value === "object" && value !== null && !Array.isArray(value);
