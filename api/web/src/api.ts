/**
 * What rank 0 speaks: the shapes of its answers, and a function for each endpoint.
 *
 * Knows: paths, the Authorization header, how a refusal looks, and the events of /chat.
 * Must not know: React, conversations, when to ask again, or where the key is kept.
 */
import { EventParser } from "./sse";

export type Strategy = "greedy" | "sampling" | "top_k" | "top_p";
export type RankState = "ok" | "stalled" | "away";
export type Kind = "cpu" | "ipad";

export interface Config {
  model: string;
  strategy: Strategy;
  parameters: { temperature: number; top_k: number; top_p: number; min_p: number; repetition_penalty: number };
  max_new_tokens: number;
  context: number;
  chat: boolean;
  system: string | null;
  nodes: number;
  version: string;
  dtype: string;
}

export interface Health {
  status: "ok" | "busy" | "stalled" | "degraded" | "stopping";
  healthy: boolean;
  model: string;
  ranks: { rank: number; kind: Kind; state: RankState }[];
}

export interface Device {
  requests: number;
  compute_s: number;
  network_s: number;
  sent: number;
  received: number;
  falls: number;
  away_s: number;
  thermal: "unknown" | "nominal" | "fair" | "serious" | "critical";
}

/** Bytes are bytes; `layers` is inclusive; the four shares are of the window and sum to 1, or are all 0. */
export interface Rank {
  rank: number;
  host: string;
  kind: Kind;
  layers: [number, number] | null;
  memory: number;
  slice_bytes: number;
  kv_bytes: number;
  peak_rss: number;
  threads: number;
  state: RankState;
  steps: number;
  tokens: number;
  compute: number;
  wait: number;
  send: number;
  other: number;
  device: Device | null;
}

export interface Cluster {
  model: string;
  dtype: string;
  layers: number;
  slots: number;
  context: number;
  running: number;
  waiting: number;
  queue: number;
  tokens_per_second: number;
  window_s: number;
  ranks: Rank[];
}

export interface Reconnected {
  success: boolean;
  message: string;
  did: string[];
}

/** What an answer cost. `seed` is text: it has up to 63 bits, and a number of JavaScript's only 53. */
export interface Figures {
  firstMs: number;
  totalMs: number;
  perSecond: number;
  tokens: number;
  promptTokens: number;
  finish: "stop" | "length";
  seed: string | null;
}

export type ChatEvent =
  | { kind: "token"; text: string }
  | { kind: "done"; text: string; figures: Figures }
  | { kind: "error"; sentence: string };

/** The server has answered, and it is no. */
export class Refusal extends Error {
  constructor(
    readonly status: number,
    sentence: string,
    readonly retryAfterS: number | null,
  ) {
    super(sentence);
  }
}

/** Nobody answered, or the answer broke off, or what answered is not mpgpt. */
export class Away extends Error {}

const PATIENCE_MS = 5000;

export const getHealth = (): Promise<Health> => brief<Health>("/health", "");
export const getConfig = (key: string): Promise<Config> => brief<Config>("/config", key);
export const getCluster = (key: string): Promise<Cluster> => brief<Cluster>("/cluster", key);

/** Takes as long as it takes: an iPad that comes back has to prove that it still has its layers. */
export async function reconnect(key: string): Promise<Reconnected> {
  return json<Reconnected>(await ask("/reconnect", key, { method: "POST" }));
}

/** The events of an answer, those of each piece that comes together; an empty list is a sign of life. */
export async function* chat(body: string, key: string, signal: AbortSignal): AsyncGenerator<ChatEvent[]> {
  const headers = { "content-type": "application/json", accept: "text/event-stream" };
  const response = await ask("/chat", key, { method: "POST", body, headers, signal });
  const reader = response.body?.getReader();
  if (!reader) throw new Away("the answer has no body");
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error: unknown) => {
        throw new Away(String(error));
      });
      if (done) return;
      yield parser.push(value).map(readEvent);
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}

/** One event's data. What is no JSON of ours is an error to show, not one to throw. */
export function readEvent(data: string): ChatEvent {
  let event: Record<string, unknown>;
  try {
    event = JSON.parse(data) as Record<string, unknown>;
  } catch {
    return { kind: "error", sentence: "The server sent an event that is not JSON." };
  }
  const sentence = sentenceOf(event);
  if (sentence !== null) return { kind: "error", sentence };
  if (event["done"] !== true) return { kind: "token", text: String(event["token"] ?? "") };
  const number = (name: string): number => (typeof event[name] === "number" ? event[name] : 0);
  const figures: Figures = {
    firstMs: number("time_to_first_token_ms"),
    totalMs: number("total_time_ms"),
    perSecond: number("tokens_per_second"),
    tokens: number("num_tokens"),
    promptTokens: number("prompt_tokens"),
    finish: event["finish_reason"] === "length" ? "length" : "stop",
    // Inside a string of JSON the quote before the colon is escaped, so this finds the field and no text.
    seed: /"seed"\s*:\s*(\d+)/.exec(data)?.[1] ?? null,
  };
  return { kind: "done", text: String(event["full_text"] ?? ""), figures };
}

async function brief<T>(path: string, key: string): Promise<T> {
  const abort = new AbortController();
  const timer = setTimeout(() => abort.abort(), PATIENCE_MS);
  try {
    return await json<T>(await ask(path, key, { signal: abort.signal }));
  } finally {
    clearTimeout(timer);
  }
}

async function ask(path: string, key: string, init: RequestInit): Promise<Response> {
  const headers = new Headers(init.headers);
  if (key !== "") headers.set("authorization", `Bearer ${key}`);
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    throw new Away(String(error));
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const sentence = sentenceOf(said);
  if (sentence === null && response.status >= 500) throw new Away(`status ${response.status}`); // a proxy's, not ours
  const after = Number.parseFloat(response.headers.get("retry-after") ?? "");
  throw new Refusal(
    response.status,
    sentence ?? `The server answered with status ${response.status}.`,
    Number.isFinite(after) ? after : null,
  );
}

async function json<T>(response: Response): Promise<T> {
  try {
    return (await response.json()) as T;
  } catch (error) {
    throw new Away(String(error));
  }
}

function sentenceOf(said: unknown): string | null {
  if (typeof said !== "object" || said === null || !("error" in said)) return null;
  const { error } = said;
  if (typeof error === "string") return error;
  if (typeof error === "object" && error !== null && "message" in error) return String(error.message);
  return null;
}
