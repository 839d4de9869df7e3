/**
 * Whether the server is there: asks now and then, and more often the shorter it has been away.
 *
 * Knows: the phases, the back-off, the key, and when the page is hidden.
 * Must not know: React, conversations, or what is to be sent when the server is back.
 */
import { Away, getConfig, getHealth, Refusal, type Config, type Health } from "./api";
import { keep, recall } from "./browser";

/** `locked`: it is there, and wants a key that we do not have. */
export type Phase = "starting" | "here" | "away" | "locked";

export interface View {
  phase: Phase;
  config: Config | null;
  health: Health | null;
  /** When it is tried again, in milliseconds of the clock; null while it is being tried. */
  nextTry: number | null;
  /** Whether the key that it has been given is wrong. */
  refused: boolean;
  /** How often it has asked for one. */
  asked: number;
}

const POLL_MS = 5000;
export const BACK_OFF_MS: readonly number[] = [500, 1000, 2000, 4000, 8000, 10_000];
const KEY = "mpgpt.key";

export class Server {
  #view: View = { phase: "starting", config: null, health: null, nextTry: null, refused: false, asked: 0 };
  #key = recall(KEY, "sessionStorage") ?? recall(KEY) ?? "";
  #failures = 0;
  #timer: ReturnType<typeof setTimeout> | null = null;
  #checking = false;
  #listeners = new Set<() => void>();

  get = (): View => this.#view;

  get key(): string {
    return this.#key;
  }

  get isKeyKept(): boolean {
    return recall(KEY) !== null;
  }

  subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  start(): () => void {
    const look = (): void => {
      if (!document.hidden) this.tryNow();
    };
    document.addEventListener("visibilitychange", look);
    window.addEventListener("online", look);
    this.tryNow();
    return () => {
      document.removeEventListener("visibilitychange", look);
      window.removeEventListener("online", look);
      this.#wait(null);
    };
  }

  tryNow = (): void => void this.#check();

  /** A request found nobody: it is away until it answers again. */
  lost(): void {
    if (this.#view.phase !== "away") this.#show({ phase: "away" });
    this.tryNow();
  }

  /** A request was refused for want of a key. */
  lock(): void {
    this.#wait(null);
    this.#show({ phase: "locked", refused: this.#key !== "", nextTry: null, asked: this.#view.asked + 1 });
  }

  setKey(key: string, remember: boolean): void {
    this.#key = key.trim();
    keep(KEY, this.#key === "" ? null : this.#key, "sessionStorage");
    keep(KEY, remember && this.#key !== "" ? this.#key : null);
    this.#show({ config: null });
    this.tryNow();
  }

  async #check(): Promise<void> {
    if (this.#checking) return;
    this.#checking = true;
    this.#wait(null);
    const key = this.#key;
    try {
      const health = await getHealth();
      const { config, phase } = this.#view;
      const stale = config === null || phase !== "here" || config.model !== health.model;
      const fresh = stale ? await getConfig(key) : config;
      this.#failures = 0;
      this.#show({ phase: "here", health, config: fresh, refused: false, nextTry: null });
      this.#wait(POLL_MS);
    } catch (error) {
      if (error instanceof Refusal && error.status === 401) this.lock();
      else if (error instanceof Away || error instanceof Refusal) this.#fail();
      else throw error;
    } finally {
      this.#checking = false;
    }
    if (key !== this.#key) this.tryNow(); // it was given while we asked
  }

  #fail(): void {
    const pause = BACK_OFF_MS[Math.min(this.#failures++, BACK_OFF_MS.length - 1)] ?? POLL_MS;
    this.#show({ phase: "away", nextTry: Date.now() + pause });
    this.#wait(pause);
  }

  #wait(pause: number | null): void {
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = pause === null ? null : setTimeout(() => this.#tick(), pause);
  }

  /** A hidden page does not ask, unless something may be waiting for the server to come back. */
  #tick(): void {
    if (document.hidden && this.#view.phase === "here") this.#wait(POLL_MS);
    else this.tryNow();
  }

  #show(change: Partial<View>): void {
    const next = { ...this.#view, ...change };
    if (JSON.stringify(next) === JSON.stringify(this.#view)) return;
    this.#view = next;
    for (const listener of this.#listeners) listener();
  }
}
