/**
 * The parameters of an answer: their bounds, and the body of the request that they make.
 *
 * Knows: what the server takes, and that only what the user changed is sent.
 * Must not know: React, fetch, or where they are kept.
 */
import type { Config, Strategy } from "./api";
import type { Conversation, Message } from "./conversations";

/** What the user changed. What is not there is the server's default. `seed` is text, for it may have 63 bits. */
export interface Changed {
  max_tokens?: number;
  temperature?: number;
  top_p?: number;
  top_k?: number;
  decoding_strategy?: Strategy;
  seed?: string;
  system?: string;
}

export type Field = keyof Changed;
export type Checked = { value: Changed[Field] | undefined; problem: null } | { value: undefined; problem: string };

export const STRATEGIES: readonly Strategy[] = ["greedy", "sampling", "top_k", "top_p"];
const MOST_TOKENS = 1_000_000;
const MOST_TOP_K = 2 ** 31 - 1;
const MOST_SEED = 2n ** 63n - 1n;

/** What was typed in a field, as a value or as the sentence that says what is wrong. Nothing typed is the default. */
export function check(field: Field, typed: string, config: Config | null): Checked {
  const text = typed.trim();
  if (text === "") return { value: undefined, problem: null };
  switch (field) {
    case "max_tokens":
      return whole(text, 1, config?.context ?? MOST_TOKENS, config ? "the model's context" : null);
    case "top_k":
      return whole(text, 0, MOST_TOP_K, null);
    case "temperature":
      return decimal(text, (value) => value >= 0 && value <= 100, "from 0 to 100");
    case "top_p":
      return decimal(text, (value) => value > 0 && value <= 1, "above 0 and at most 1");
    case "seed":
      if (/^\d{1,19}$/.test(text) && BigInt(text) <= MOST_SEED) return { value: String(BigInt(text)), problem: null };
      return no("The seed is a whole number from 0 to 2^63 - 1.");
    case "decoding_strategy": {
      const value = STRATEGIES.find((strategy) => strategy === text);
      return value ? { value, problem: null } : no(`${text} is none of ${STRATEGIES.join(", ")}.`);
    }
    case "system":
      return { value: typed, problem: null };
  }
}

/** Parameters from a file or from storage: what is right of them; the rest is left out. */
export function readChanged(value: unknown): Changed {
  if (typeof value !== "object" || value === null) return {};
  let changed: Changed = {};
  for (const field of ["max_tokens", "temperature", "top_p", "top_k", "decoding_strategy", "seed", "system"] as const) {
    const one = (value as Record<string, unknown>)[field];
    if (typeof one !== "string" && typeof one !== "number") continue;
    changed = withField(changed, field, check(field, String(one), null).value);
  }
  return changed;
}

export function withField(changed: Changed, field: Field, value: Changed[Field] | undefined): Changed {
  const { [field]: _, ...rest } = changed;
  return value === undefined ? rest : { ...rest, [field]: value };
}

/** The body of POST /chat for the answer that is to follow `before`. */
export function requestBody(conversation: Conversation, before: readonly Message[], raw: boolean): string {
  const { seed, system, ...rest } = conversation.parameters;
  const what = raw
    ? { text: before.map((message) => message.text).join(""), raw: true }
    : { messages: [...(system ? [{ role: "system", content: system }] : []), ...turns(before)] };
  const body = JSON.stringify({ ...what, ...rest });
  return seed === undefined ? body : `${body.slice(0, -1)},"seed":${seed}}`; // a number could not hold its 63 bits
}

/** Questions and answers by turns, as chat templates want them: no empty answers, and no two questions in a row. */
function turns(messages: readonly Message[]): { role: string; content: string }[] {
  const said: { role: string; content: string }[] = [];
  for (const { role, text } of messages) {
    const last = said.at(-1);
    if (text.trim() === "") continue;
    if (last?.role === role) last.content += `\n\n${text}`;
    else said.push({ role, content: text });
  }
  return said;
}

function whole(text: string, least: number, most: number, because: string | null): Checked {
  const value = Number(text);
  if (/^\d+$/.test(text) && value >= least && value <= most) return { value, problem: null };
  return no(`A whole number from ${least} to ${most}${because ? `, ${because}` : ""}.`);
}

function decimal(text: string, within: (value: number) => boolean, bounds: string): Checked {
  const value = Number(text.replace(",", "."));
  return /^[\d.,e+-]+$/i.test(text) && within(value) ? { value, problem: null } : no(`A number ${bounds}.`);
}

const no = (problem: string): Checked => ({ value: undefined, problem });
