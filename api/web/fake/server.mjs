/**
 * A server that speaks as rank 0 does, for looking at the page without a ring: `npm run build && npm run fake`, port 8000.
 *
 * What is said decides what comes: "slow", "error", "full" (429), "drop" (cut off after some words), "none" (dropped
 * before any), anything else a text with Markdown. Environment: PORT, KEY (asks for it), BASE=1 (no chat template),
 * RANKS, AWAY=1 (the iPad is away), WAIT_MS between tokens.
 */
import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const { PORT = "8000", KEY = "", BASE = "", RANKS = "3", AWAY = "", WAIT_MS = "30" } = process.env;
const PAGE = fileURLToPath(new URL("../../mpgpt_api/page/", import.meta.url));
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".webmanifest": "application/manifest+json" };
const POLICY =
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; " +
  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; manifest-src 'self'";
const MODEL = BASE ? "gpt2" : "HuggingFaceTB/SmolLM2-135M-Instruct";
const ANSWER = `The sky is blue because of **Rayleigh scattering**: air scatters short waves more than long ones.

1. Sunlight has all colours.
2. Blue is scattered about \`(700/450)^4 = 5.9\` times as much as red.

\`\`\`python
def scattered(wavelength_nm: float) -> float:
    """Relative to 700 nm."""
    return (700 / wavelength_nm) ** 4
\`\`\`

| colour | wavelength | scattered |
|---|---|---|
| red | 700 nm | 1.0 |
| blue | 450 nm | 5.9 |

More at [a page](https://example.org/sky). <b>No HTML</b>, and no [scripts](javascript:alert(1)).
`;
const STORY = ", there was a small computer that could hold only four layers of a very large model. It was not sad about it, for it had friends.";
let running = 0;
let tokens = 0;

const state = (rank) => (AWAY && rank === 2 ? "away" : "ok");
const kind = (rank) => (rank === 2 ? "ipad" : "cpu");

function cluster() {
  const count = Number(RANKS);
  const ranks = Array.from({ length: count }, (_, rank) => ({
    rank, host: ["mini1.local", "pi5", "ipad-proxy", "laptop", "spare-machine-with-a-long-name"][rank] ?? `host${rank}`, kind: kind(rank),
    layers: rank === 4 ? null : [rank * 10, rank * 10 + 9], memory: 8e9, slice_bytes: rank === 4 ? 0 : 145e6, kv_bytes: rank === 4 ? 0 : 9.4e6,
    peak_rss: 6e8, threads: 4, state: state(rank), steps: running ? 40 : 0, tokens: running ? 120 : 0,
    ...(running ? { compute: 0.58, wait: 0.31, send: 0.06, other: 0.05 } : { compute: 0, wait: 1, send: 0, other: 0 }),
    device: kind(rank) === "ipad"
      ? { requests: 812, compute_s: 3, network_s: 1, sent: 1e6, received: 1e6, falls: AWAY ? 4 : 0, away_s: AWAY ? 12 : 0, thermal: "fair" } : null,
  }));
  return { model: MODEL, dtype: "bfloat16", layers: 30, slots: 8, context: 2048, running, waiting: 0, queue: 64,
    tokens_per_second: running ? 27.4 : 0, window_s: 5, ranks };
}

const answers = {
  "/health": () => ({ status: AWAY ? "degraded" : running ? "busy" : "ok", healthy: true, model: MODEL,
    ranks: cluster().ranks.map(({ rank, kind, state }) => ({ rank, kind, state })) }),
  "/config": () => ({ model: MODEL, strategy: "top_p", parameters: { temperature: 0.7, top_k: 0, top_p: 0.9, min_p: 0, repetition_penalty: 1 },
    max_new_tokens: 256, context: 2048, chat: !BASE, system: null, nodes: Number(RANKS), version: "0.0.0", dtype: "bfloat16" }),
  "/cluster": cluster,
  "/reconnect": () => ({ success: !AWAY, message: AWAY ? "the iPad is still away" : "the ring is whole", did: ["asked every rank for a sign of life"] }),
};

const json = (response, status, value, headers = {}) => {
  response.writeHead(status, { "content-type": "application/json", ...headers });
  response.end(JSON.stringify(value));
};

async function chat(request, response) {
  let text = "";
  for await (const piece of request) text += piece;
  const asked = JSON.parse(text);
  const said = asked.text ?? asked.messages.at(-1).content;
  if (/full/.test(said)) return json(response, 429, { error: "the queue is full" }, { "retry-after": "7" });
  if (/none/.test(said)) return request.socket.destroy();
  response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-cache" });
  const send = (value) => response.write(`data: ${JSON.stringify(value)}\n\n`);
  const words = (asked.raw ? STORY : ANSWER).match(/\s*\S+|\s+$/g);
  let gone = false;
  response.on("close", () => (gone = true));
  const begun = Date.now();
  const pause = Number(WAIT_MS) * (/slow/.test(said) ? 8 : 1);
  running += 1;
  try {
    for (const [at, token] of words.entries()) {
      await new Promise((done) => setTimeout(done, pause));
      if (gone) return;
      if (/drop/.test(said) && at === 12) return request.socket.destroy();
      if (/error/.test(said) && at === 8) return void (send({ error: "a rank was lost and nobody can take its layers", done: true }), response.end());
      send({ token, done: false });
      tokens += 1;
    }
    const total = Date.now() - begun;
    const done = { done: true, full_text: words.join(""), finish_reason: asked.max_tokens ? "length" : "stop", total_time_ms: total,
      time_to_first_token_ms: pause, tokens_per_second: (1000 * words.length) / total, num_tokens: words.length, prompt_tokens: 12 };
    response.end(`data: ${JSON.stringify(done).slice(0, -1)},"seed":${asked.seed ?? "7340921873409218734"}}\n\n`);
  } finally {
    running -= 1;
  }
}

createServer((request, response) => {
  const path = new URL(request.url, "http://fake").pathname;
  response.setHeader("content-security-policy", POLICY);
  const isApi = path === "/chat" || path in answers;
  if (isApi && KEY && path !== "/health" && request.headers.authorization !== `Bearer ${KEY}`) return json(response, 401, { error: "this server wants a key" });
  if (path === "/chat") return void chat(request, response);
  if (path in answers) return json(response, 200, answers[path]());
  const file = join(PAGE, normalize(path === "/" ? "/index.html" : path));
  if (!file.startsWith(PAGE) || !existsSync(file) || !statSync(file).isFile()) return json(response, 404, { error: "there is nothing here" });
  response.writeHead(200, { "content-type": TYPES[extname(file)] ?? "application/octet-stream" });
  createReadStream(file).pipe(response);
}).listen(Number(PORT), "127.0.0.1", () => console.log(`http://127.0.0.1:${PORT}`));
