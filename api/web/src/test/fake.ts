/**
 * A server in place of fetch, which tests steer: what it is, whether it is there, and what each answer's stream brings.
 */
import { vi } from "vitest";
import type { Cluster, Config, Health, Rank } from "../api";

export const CONFIG: Config = {
  model: "org/tiny-chat",
  strategy: "top_p",
  parameters: { temperature: 0.7, top_k: 0, top_p: 0.9, min_p: 0, repetition_penalty: 1 },
  max_new_tokens: 64,
  context: 512,
  chat: true,
  system: null,
  nodes: 3,
  version: "0",
  dtype: "float32",
};

export const rank = (number: number, change: Partial<Rank> = {}): Rank => ({
  rank: number,
  host: `host${number}`,
  kind: "cpu",
  layers: [number * 4, number * 4 + 3],
  memory: 8e9,
  slice_bytes: 120e6,
  kv_bytes: 4e6,
  peak_rss: 5e8,
  threads: 2,
  state: "ok",
  steps: 10,
  tokens: 30,
  compute: 0.5,
  wait: 0.3,
  send: 0.1,
  other: 0.1,
  device: null,
  ...change,
});

export const cluster = (ranks: Rank[], change: Partial<Cluster> = {}): Cluster => ({
  model: "org/tiny-chat",
  dtype: "float32",
  layers: 12,
  slots: 4,
  context: 512,
  running: 0,
  waiting: 0,
  queue: 16,
  tokens_per_second: 0,
  window_s: 5,
  ranks,
  ...change,
});

export const DONE = {
  done: true,
  finish_reason: "stop",
  total_time_ms: 900,
  time_to_first_token_ms: 120,
  tokens_per_second: 12.5,
  num_tokens: 3,
  prompt_tokens: 7,
};

/** One request to /chat: what was asked, and what it is answered with, bit by bit. */
export class Asked {
  #out!: ReadableStreamDefaultController<Uint8Array>;
  readonly stream = new ReadableStream<Uint8Array>({ start: (out) => void (this.#out = out) });
  aborted = false;

  constructor(
    readonly body: Record<string, unknown>,
    readonly text: string,
    signal: AbortSignal | null | undefined,
  ) {
    signal?.addEventListener("abort", () => {
      this.aborted = true;
      this.drop();
    });
  }

  write(text: string): void {
    this.#out.enqueue(new TextEncoder().encode(text));
  }
  tokens(...tokens: string[]): void {
    for (const token of tokens) this.write(`data: ${JSON.stringify({ token, done: false })}\n\n`);
  }
  finish(full: string, change: Record<string, unknown> = {}, seed = "9007199254740993"): void {
    this.write(`data: ${JSON.stringify({ ...DONE, full_text: full, ...change }).slice(0, -1)},"seed":${seed}}\n\n`);
    this.#out.close();
  }
  fail(sentence: string): void {
    this.write(`data: ${JSON.stringify({ error: sentence, done: true })}\n\n`);
    this.#out.close();
  }
  end(): void {
    this.#out.close();
  }
  drop(): void {
    try {
      this.#out.error(new TypeError("network error"));
    } catch {
      // It had ended.
    }
  }
}

export class FakeServer {
  isHere = true;
  key = "";
  config: Config = CONFIG;
  health: Health = { status: "ok", healthy: true, model: CONFIG.model, ranks: [] };
  cluster: Cluster = cluster([rank(0), rank(1), rank(2)]);
  asked: Asked[] = [];
  paths: string[] = [];
  /** The next request to /chat is answered with this instead of a stream. */
  refusal: Response | "drop" | null = null;

  constructor() {
    vi.stubGlobal("fetch", (path: string, init?: RequestInit) => this.#answer(path, init));
  }

  get last(): Asked {
    const last = this.asked.at(-1);
    if (!last) throw new Error("nothing was asked");
    return last;
  }

  async #answer(path: string, init: RequestInit = {}): Promise<Response> {
    this.paths.push(path);
    if (!this.isHere) throw new TypeError("Failed to fetch");
    const isLocked = this.key !== "" && new Headers(init.headers).get("authorization") !== `Bearer ${this.key}`;
    if (isLocked && path !== "/health") return Response.json({ error: "this server wants a key" }, { status: 401 });
    if (path === "/health") return Response.json(this.health);
    if (path === "/config") return Response.json(this.config);
    if (path === "/cluster") return Response.json(this.cluster);
    if (path === "/reconnect") return Response.json({ success: true, message: "the iPad is back", did: ["dialled again"] });
    const text = String(init.body);
    const asked = new Asked(JSON.parse(text) as Record<string, unknown>, text, init.signal);
    this.asked.push(asked);
    const { refusal } = this;
    this.refusal = null;
    if (refusal === "drop") throw new TypeError("network error");
    return refusal ?? new Response(asked.stream, { headers: { "content-type": "text/event-stream" } });
  }
}

/** A storage in memory, which may be made too small. */
export class FakeStorage implements Storage {
  kept = new Map<string, string>();
  room = Infinity;

  get length(): number {
    return this.kept.size;
  }
  clear = (): void => this.kept.clear();
  key = (at: number): string | null => [...this.kept.keys()][at] ?? null;
  getItem = (name: string): string | null => this.kept.get(name) ?? null;
  removeItem = (name: string): void => void this.kept.delete(name);
  setItem = (name: string, value: string): void => {
    const others = [...this.kept].filter(([other]) => other !== name).reduce((sum, [, { length }]) => sum + length, 0);
    if (others + value.length > this.room) throw new DOMException("full", "QuotaExceededError");
    this.kept.set(name, value);
  };
}
