/**
 * Sends what waits, receives what comes, and says how it ended.
 *
 * Knows: one request a conversation; stopping; that a request which nothing came of is sent again, once; that what is
 * said while the server is away waits until it is back.
 * Must not know: React, storage, how an answer is shown.
 *
 * An answer that is `waiting` and this tab's is sent as soon as the server is there. So there is one way for what was
 * just typed, for what was said while the server was away, and for what a reload interrupted before it was sent.
 */
import { Away, chat, Refusal, type ChatEvent } from "./api";
import { newId } from "./browser";
import { isOpen, lastAnswer, type Answer, type By, type Conversation } from "./conversations";
import { requestBody } from "./parameters";
import type { Server } from "./server";
import type { Store } from "./store";

const SHOW_MS = 60;
/** The server sends a sign of life every 15 s. */
const SILENCE_MS = 40_000;

interface Run {
  conversation: string;
  answer: Answer;
  abort: AbortController;
  text: string;
  heard: number;
  timer: ReturnType<typeof setTimeout> | null;
}

export class Chat {
  #runs = new Map<string, Run>();

  constructor(
    readonly store: Store,
    readonly server: Server,
  ) {}

  start(): () => void {
    const ends = [this.store.subscribe(this.#pump), this.server.subscribe(this.#pump)];
    const watch = setInterval(() => this.#endSilent(), 5000);
    this.#pump();
    return () => {
      clearInterval(watch);
      for (const end of ends) end();
    };
  }

  /** Chat templates want no white space around what is said; text that is to be continued is taken as it stands. */
  send(id: string, text: string): void {
    const conversation = this.store.find(id);
    if (!conversation || this.isBusy(conversation)) return;
    const said = this.isRaw(conversation) ? text : text.trim();
    if (said !== "") this.store.dispatch({ type: "say", id, by: this.#by(), questionId: newId(), text: said });
  }

  /** Answers the last question anew. */
  again = (id: string): void => this.store.dispatch({ type: "again", id, by: this.#by() });

  edit = (id: string, text: string): void => this.store.dispatch({ type: "edit", id, by: this.#by(), text });

  /** Goes on where the text ends: in raw completion from all that is there, in a chat with the answer anew. */
  goOn(id: string): void {
    const conversation = this.store.find(id);
    if (!conversation) return;
    const isText = this.isRaw(conversation) && lastAnswer(conversation)?.text !== "";
    if (isText) this.store.dispatch({ type: "extend", id, by: this.#by() });
    else this.again(id);
  }

  stop(id: string): void {
    const conversation = this.store.find(id);
    const answer = conversation && lastAnswer(conversation);
    if (!answer || !isOpen(answer)) return;
    const run = this.#runs.get(id);
    this.#end(id, answer.id, { state: "stopped", text: run?.text ?? answer.text });
    run?.abort.abort();
  }

  isRaw = (conversation: Conversation): boolean => conversation.raw || this.server.get().config?.chat === false;

  /** Whether an answer of this tab is on its way. */
  isBusy(conversation: Conversation): boolean {
    const answer = lastAnswer(conversation);
    return answer !== null && isOpen(answer) && answer.owner === this.store.tab;
  }

  #by = (): By => ({ now: this.store.now(), owner: this.store.tab, answerId: newId() });

  #pump = (): void => {
    for (const run of this.#runs.values()) {
      const conversation = this.store.find(run.conversation);
      const wanted = conversation && lastAnswer(conversation);
      if (wanted?.id !== run.answer.id || !isOpen(wanted)) run.abort.abort();
    }
    const { phase } = this.server.get();
    if (phase !== "here" && phase !== "locked") return; // one that is locked says so, and the key is asked for
    for (const conversation of this.store.get().book.conversations) {
      const answer = lastAnswer(conversation);
      const isDue = answer?.state === "waiting" && answer.owner === this.store.tab && !this.#runs.has(conversation.id);
      if (isDue) void this.#run(conversation, answer);
    }
  };

  async #run(conversation: Conversation, answer: Answer): Promise<void> {
    const abort = new AbortController();
    const run: Run = { conversation: conversation.id, answer, abort, text: "", heard: Date.now(), timer: null };
    this.#runs.set(conversation.id, run);
    this.#tell(run, { state: "streaming" });
    const body = requestBody(conversation, conversation.messages.slice(0, -1), this.isRaw(conversation));
    try {
      for await (const events of chat(body, this.server.key, abort.signal)) {
        run.heard = Date.now();
        if (events.some((event) => this.#take(run, event))) return;
        if (events.length > 0) this.#showSoon(run);
      }
      this.#lose(run); // it ended without saying so
    } catch (error) {
      if (error instanceof Refusal) this.#refuse(run, error);
      else if (error instanceof Away) this.#lose(run);
      else throw error;
    } finally {
      if (run.timer !== null) clearTimeout(run.timer);
      this.#runs.delete(conversation.id);
      this.#pump();
    }
  }

  /** Whether it was the last event. */
  #take(run: Run, event: ChatEvent): boolean {
    if (event.kind === "token") run.text += event.text;
    else if (event.kind === "done") this.#finish(run, { state: "done", text: event.text, figures: event.figures });
    else this.#finish(run, { state: "failed", text: run.text, problem: { sentence: event.sentence, status: null } });
    return event.kind !== "token";
  }

  #refuse(run: Run, refusal: Refusal): void {
    const { status, message, retryAfterS } = refusal;
    if (status === 401) this.server.lock();
    let sentence = message;
    if (status === 401) sentence = "The server wants a key. Give it one, and try again.";
    if (status === 429) sentence = `The server's queue is full. Try again in ${Math.ceil(retryAfterS ?? 1)} s.`;
    this.#finish(run, { state: "failed", problem: { sentence, status } });
  }

  /** What had come is kept. If nothing had, it is sent again by itself, but only once. */
  #lose(run: Run): void {
    const { answer, text } = run;
    if (run.abort.signal.aborted && !this.#isSilent(run)) return; // stopped, or not wanted any more
    this.server.lost();
    if (text !== "") this.#finish(run, { state: "cut", text });
    else if (!answer.resent) this.#tell(run, { state: "waiting", resent: true });
    else {
      const sentence = "The connection was lost twice before anything came.";
      this.#finish(run, { state: "failed", problem: { sentence, status: null } });
    }
  }

  #isSilent = (run: Run): boolean => Date.now() - run.heard > SILENCE_MS;

  #endSilent(): void {
    for (const run of this.#runs.values()) if (this.#isSilent(run)) run.abort.abort();
  }

  #showSoon(run: Run): void {
    run.timer ??= setTimeout(() => {
      run.timer = null;
      this.#tell(run, { text: run.text });
    }, SHOW_MS);
  }

  #finish(run: Run, change: Partial<Answer>): void {
    if (run.timer !== null) clearTimeout(run.timer);
    run.timer = null;
    this.#end(run.conversation, run.answer.id, change);
  }

  #end(id: string, answerId: string, change: Partial<Answer>): void {
    this.store.dispatch({ type: "answered", id, now: this.store.now(), answerId, change: { ...change, owner: null } });
  }

  #tell(run: Run, change: Partial<Answer>): void {
    this.store.dispatch({ type: "answered", id: run.conversation, now: this.store.now(), answerId: run.answer.id, change });
  }
}
