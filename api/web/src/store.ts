/**
 * The conversations of this browser: kept in localStorage, shared between its tabs.
 *
 * Knows: when to write, that another tab may have written since, and what to do when storage is damaged, full or forbidden.
 * Must not know: React, the server, or what the changes mean (`conversations.ts` does).
 *
 * A tab writes only the conversations that it changed, into what is stored at that moment; so two tabs with a
 * conversation each do not undo one another. Of one that both changed, the one that is written last stays.
 */
import { newId } from "./browser";
import { EMPTY, isOpen, reduce, settled, type Action, type Book, type Conversation } from "./conversations";
import { readBook, Unreadable, writeBook } from "./reading";

export const BOOK = "mpgpt.conversations.v1";
export const ASIDE = "mpgpt.conversations.aside.";
const PAUSE_MS = 400;
const DEAD_MS = 60_000;

export interface Kept {
  book: Book;
  /** What the user must know of the storage, as a sentence. */
  notice: string | null;
}

export class Store {
  #kept: Kept = { book: EMPTY, notice: null };
  /** What is known to be stored; whatever is not the same object has been changed here. */
  #stored: Book = EMPTY;
  #readOnly = false;
  #timer: ReturnType<typeof setTimeout> | null = null;
  #listeners = new Set<() => void>();

  constructor(
    readonly storage: Storage | null,
    readonly tab: string,
    readonly now: () => number = Date.now,
  ) {
    this.#load();
    if (this.#kept.book.conversations.length === 0) this.dispatch({ type: "create", id: newId(), now: now() });
  }

  get = (): Kept => this.#kept;

  subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  find(id: string): Conversation | undefined {
    return this.#kept.book.conversations.find((conversation) => conversation.id === id);
  }

  /** There is always a conversation. What streams is written now and then, all else at once. */
  dispatch(action: Action): void {
    let book = reduce(this.#kept.book, action);
    if (book.conversations.length === 0) book = reduce(book, { type: "create", id: newId(), now: this.now() });
    this.#show({ ...this.#kept, book });
    if (action.type === "answered" && action.change.state === undefined) {
      this.#timer ??= setTimeout(() => this.flush(), PAUSE_MS);
    } else this.flush();
  }

  dismiss(): void {
    this.#show({ ...this.#kept, notice: null });
  }

  /** Writes what was changed. Whatever goes wrong, nothing that is on the screen is lost. */
  flush(): void {
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
    if (this.#readOnly || this.#kept.book === this.#stored) return;
    if (this.storage === null) return this.#warn("This browser lets the page store nothing: what you see is gone with this tab.");
    try {
      const text = this.storage.getItem(BOOK);
      const book = text === null ? this.#kept.book : this.#merged(readBook(text).book);
      this.storage.setItem(BOOK, writeBook(book));
      this.#stored = book;
      this.#show({ book, notice: this.#kept.notice === FULL ? null : this.#kept.notice });
    } catch (error) {
      if (error instanceof Unreadable) return this.#putAside(this.storage, error);
      this.#warn(FULL);
    }
  }

  /** Another tab has written. */
  hear = (event: { key: string | null; newValue: string | null }): void => {
    if (event.key !== BOOK || event.newValue === null) return;
    try {
      const mine = new Set(this.#kept.book.conversations.filter(this.#isChanged));
      const book = this.#merged(readBook(event.newValue).book);
      this.#stored = mine.size === 0 ? book : { ...book, conversations: book.conversations.filter((one) => !mine.has(one)) };
      this.#show({ ...this.#kept, book });
    } catch {
      // What it wrote is damaged; it will be put aside when this tab writes.
    }
  };

  #load(): void {
    let text: string | null;
    try {
      text = this.storage?.getItem(BOOK) ?? null;
    } catch {
      text = null;
    }
    if (text === null) return;
    try {
      const { book, bad } = readBook(text);
      if (bad > 0) this.#setAside(text, `${bad} of the stored conversations could not be read.`);
      this.#stored = book;
      const conversations = book.conversations.map((conversation) => this.#woken(conversation));
      this.#show({ ...this.#kept, book: { ...book, conversations } });
    } catch {
      this.#setAside(text, "The stored conversations could not be read.");
    }
  }

  /** What this tab was receiving when it was reloaded is cut off; so is what a tab left that is no more. */
  #woken(conversation: Conversation): Conversation {
    const dead = conversation.changed < this.now() - DEAD_MS;
    const gone = conversation.messages.map((message) =>
      message.role === "assistant" && isOpen(message) && (message.owner === this.tab ? message.state === "streaming" : dead)
        ? settled(message)
        : message,
    );
    const same = gone.every((message, at) => message === conversation.messages[at]);
    return same ? conversation : { ...conversation, messages: gone, changed: conversation.changed + 1 };
  }

  #isChanged = (conversation: Conversation): boolean => !this.#stored.conversations.includes(conversation);

  #isReceiving({ messages }: Conversation): boolean {
    return messages.some((message) => isOpen(message) && message.role === "assistant" && message.owner === this.tab);
  }

  /** What is stored, with this tab's changes; what has not changed stays the same object. */
  #merged(theirs: Book): Book {
    const mine = new Map(this.#kept.book.conversations.map((conversation) => [conversation.id, conversation]));
    const known = new Set(this.#stored.conversations.map(({ id }) => id));
    const conversations = theirs.conversations.flatMap((their) => {
      const my = mine.get(their.id);
      mine.delete(their.id);
      if (my === undefined) return known.has(their.id) ? [] : [their]; // deleted here, or made there
      return [this.#isChanged(my) || this.#isReceiving(my) || my.changed === their.changed ? my : their];
    });
    const made = [...mine.values()].filter((my) => this.#isChanged(my)); // the others were deleted there
    const last = this.#kept.book.last === this.#stored.last ? theirs.last : this.#kept.book.last;
    return { conversations: [...conversations, ...made], last };
  }

  #putAside(storage: Storage, error: Unreadable): void {
    const text = storage.getItem(BOOK) ?? "";
    this.#setAside(text, `The stored conversations could not be read. ${error.message}`);
    if (this.#readOnly) return;
    storage.removeItem(BOOK);
    this.flush();
  }

  /** Damaged storage is kept under another name. Where there is no room for that, nothing is written over it. */
  #setAside(text: string, sentence: string): void {
    const name = `${ASIDE}${this.now()}`;
    try {
      this.storage?.setItem(name, text);
      this.#warn(`${sentence} They have been put aside in this browser's storage as ${name}.`);
      this.storage?.removeItem(BOOK);
    } catch {
      this.#readOnly = true;
      this.#warn(`${sentence} There is no room to put them aside, so nothing new is stored: export what you want to keep.`);
    }
  }

  #warn(notice: string): void {
    if (this.#kept.notice !== notice) this.#show({ ...this.#kept, notice });
  }

  #show(kept: Kept): void {
    this.#kept = kept;
    for (const listener of this.#listeners) listener();
  }
}

const FULL =
  "This browser's storage is full. What is new is shown here but is gone after a reload: export or delete conversations to make room.";
