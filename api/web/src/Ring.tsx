/**
 * The ring, drawn: a box a rank, and what travels between them.
 *
 * Must not know: the server, or how often this is drawn.
 */
import type { Cluster, Rank } from "./api";
import { BOX_HEIGHT, bytes, kindInWords, layersInWords, layout, percent, ringInWords, secondsPerHop, type Box } from "./ring";

export const SHARES = [
  ["compute", "computing"],
  ["wait", "waiting"],
  ["send", "sending"],
  ["other", "other"],
] as const;

/** Pixels a character. */
const [BOLD, PLAIN, SMALL] = [8.2, 7.1, 6.9];

interface Props {
  cluster: Cluster;
  width: number;
  isStill: boolean;
}

export function Ring({ cluster, width, isStill }: Props) {
  const { boxes, boxWidth, hops, back, ...size } = layout(cluster.ranks, width);
  const isBusy = cluster.running > 0 && !isStill;
  const seconds = secondsPerHop(cluster.tokens_per_second);
  const dots = Math.min(3, Math.max(1, cluster.running));
  return (
    <svg
      className={`ring${cluster.running > 0 ? " busy" : ""}`}
      role="img"
      aria-label={ringInWords(cluster)}
      viewBox={`0 0 ${size.width} ${size.height}`}
      width={size.width}
      height={size.height}
    >
      <defs>
        <Head id="head-states" />
        <Head id="head-ids" />
      </defs>
      {hops.map((path) => (
        <g key={path} className="states">
          <path d={path} markerEnd="url(#head-states)" />
          {isBusy && <Dots path={path} seconds={seconds} count={dots} radius={4.5} />}
        </g>
      ))}
      {back && (
        <g className="ids">
          <path d={back} markerEnd="url(#head-ids)" />
          {isBusy && <Dots path={back} seconds={seconds * 1.6} count={dots} radius={3} />}
        </g>
      )}
      {boxes.map((box) => (
        <RankBox key={box.rank.rank} box={box} width={boxWidth} />
      ))}
    </svg>
  );
}

function Head({ id }: { id: string }) {
  return (
    <marker id={id} className={id} viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" orient="auto">
      <path d="M0 0 10 5 0 10z" />
    </marker>
  );
}

function Dots({ path, seconds, count, radius }: { path: string; seconds: number; count: number; radius: number }) {
  return Array.from({ length: count }, (_, at) => (
    <circle key={`${at}/${count}/${seconds}`} className="dot" r={radius}>
      <animateMotion path={path} dur={`${seconds}s`} begin={`${(-at * seconds) / count}s`} repeatCount="indefinite" />
    </circle>
  ));
}

function RankBox({ box: { rank, x, y }, width }: { box: Box; width: number }) {
  const inner = width - 24;
  const isIdle = rank.layers === null;
  const state = rank.state === "ok" ? null : rank.state;
  const kind = kindInWords(rank);
  const [slice, kv] = [bytes(rank.slice_bytes), bytes(rank.kv_bytes)];
  const glyph = rank.kind === "ipad" ? 18 : 0;
  return (
    <g
      className={["rank", rank.kind, rank.state, isIdle ? "idle" : ""].join(" ").trim()}
      transform={`translate(${x} ${y})`}
      data-testid={`rank-${rank.rank}`}
    >
      <rect className="box" width={width} height={BOX_HEIGHT} rx="10" />
      <text className="name" x="12" y="23">
        {fit(inner - (state ? 62 : 0), BOLD, `${rank.rank} · ${rank.host}`)}
      </text>
      {state && (
        <g className="badge" transform={`translate(${width - 66} 9)`}>
          <rect width="56" height="19" rx="9.5" />
          <text x="28" y="13.5" textAnchor="middle">
            {state}
          </text>
        </g>
      )}
      {rank.kind === "ipad" && <Tablet />}
      <text className="kind" x={12 + glyph} y="44">
        {fit(inner - glyph, PLAIN, `${kind} · ${layersInWords(rank.layers)}`)}
      </text>
      <text className="note" x="12" y="63">
        {isIdle ? "not in the ring" : fit(inner, SMALL, `${slice} of weights · ${kv} KV`, `${slice} · ${kv} KV`)}
      </text>
      {!isIdle && <Shares rank={rank} width={inner} />}
    </g>
  );
}

/** A bar of what the window's time went to, and its largest part in words. */
function Shares({ rank, width }: { rank: Rank; width: number }) {
  const total = rank.compute + rank.wait + rank.send + rank.other;
  const computing = `${percent(rank.compute)} computing`;
  let x = 0;
  return (
    <g className="shares" transform="translate(12 76)">
      <rect className="empty" width={width} height="8" rx="4" />
      {total > 0 &&
        SHARES.map(([name]) => {
          const part = (rank[name] / total) * width;
          const from = x;
          x += part;
          return part < 0.5 ? null : <rect key={name} className={name} x={from} width={Math.max(part - 1, 0.5)} height="8" rx="2" />;
        })}
      <rect className="frame" width={width} height="8" rx="3" />
      <text className="note" y="25">
        {total > 0 ? fit(width, SMALL, `${computing}, ${percent(rank.wait)} waiting`, computing) : "nothing known yet"}
      </text>
    </g>
  );
}

function Tablet() {
  return (
    <g className="tablet" transform="translate(12 32)">
      <rect x="0.75" y="0.75" width="11" height="14" rx="2.2" />
      <path d="M4.800 12.200h3" />
    </g>
  );
}

/** The first text that fits, else as much as does of the last. Widths are those of wide letters: fonts differ. */
function fit(width: number, perCharacter: number, ...texts: string[]): string {
  const most = Math.max(4, Math.floor(width / perCharacter));
  const last = texts.at(-1) ?? "";
  return texts.find((text) => text.length <= most) ?? `${last.slice(0, most - 1)}…`;
}
