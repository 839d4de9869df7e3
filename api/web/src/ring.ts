/**
 * Where the ranks stand in the drawing, and how the arrows between them run. Pure.
 *
 * Knows: boxes in rows that turn at the end, so that neighbours in the ring are neighbours on the page.
 * Must not know: React, colours, or what is written in a box.
 */
import type { Cluster, Rank } from "./api";

export interface Box {
  rank: Rank;
  x: number;
  y: number;
}

/** `hops` carry hidden states from box to box, `back` token ids from the last to the first; null where there is but one. */
export interface Layout {
  boxes: Box[];
  boxWidth: number;
  width: number;
  height: number;
  hops: string[];
  back: string | null;
}

export const BOX_HEIGHT = 116;
const WIDEST = 296;
const NARROWEST = 176;
const GAP_X = 48;
const GAP_Y = 38;
const EDGE = 4;
const MARGIN = 26;
/** Room for the way back, under one row and under several. */
const BELOW = [44, 28] as const;

export function layout(ranks: readonly Rank[], width: number): Layout {
  const working = ranks.filter(({ layers }) => layers !== null);
  const ordered = [...working, ...ranks.filter(({ layers }) => layers === null)]; // who has no layers is not in the ring
  const count = Math.max(ordered.length, 1);
  const fits = (margin: number): number => Math.max(1, Math.floor((width - 2 * EDGE - margin + GAP_X) / (NARROWEST + GAP_X)));
  const isOneRow = fits(0) >= count;
  const left = EDGE + (isOneRow || working.length < 2 ? 0 : MARGIN);
  const columns = isOneRow ? count : Math.ceil(count / Math.ceil(count / fits(MARGIN)));
  const boxWidth = Math.min(WIDEST, (width - left - EDGE - (columns - 1) * GAP_X) / columns);
  const boxes = ordered.map((rank, at): Box => {
    const row = Math.floor(at / columns);
    const column = row % 2 === 0 ? at % columns : columns - 1 - (at % columns);
    return { rank, x: left + column * (boxWidth + GAP_X), y: EDGE + row * (BOX_HEIGHT + GAP_Y) };
  });
  const ring = boxes.slice(0, working.length);
  const rows = Math.ceil(count / columns);
  return {
    boxes,
    boxWidth,
    width: left + columns * (boxWidth + GAP_X) - GAP_X + EDGE,
    height: 2 * EDGE + rows * (BOX_HEIGHT + GAP_Y) - GAP_Y + (ring.length > 1 ? BELOW[isOneRow ? 0 : 1] : 0),
    hops: ring.slice(1).map((box, at) => hop(ring[at] ?? box, box, boxWidth)),
    back: back(ring, boxWidth, rows === 1),
  };
}

function hop(from: Box, to: Box, boxWidth: number): string {
  const middle = BOX_HEIGHT / 2;
  if (from.y !== to.y) return `M${from.x + boxWidth / 2} ${from.y + BOX_HEIGHT + 3}V${to.y - 5}`;
  return from.x < to.x
    ? `M${from.x + boxWidth + 3} ${from.y + middle}H${to.x - 5}`
    : `M${from.x - 3} ${from.y + middle}H${to.x + boxWidth + 5}`;
}

/** Under the last box, then to the first: from below where there is one row, else up along the left edge. */
function back(ring: readonly Box[], boxWidth: number, isOneRow: boolean): string | null {
  const [first, last] = [ring[0], ring.at(-1)];
  if (!first || !last || ring.length < 2) return null;
  const [from, bottom] = [last.x + boxWidth / 2, last.y + BOX_HEIGHT];
  if (isOneRow) {
    const to = first.x + boxWidth / 2;
    return `M${from} ${bottom + 3}Q${from} ${bottom + 28} ${from - 28} ${bottom + 28}H${to + 28}Q${to} ${bottom + 28} ${to} ${bottom + 6}`;
  }
  const [edge, level, target] = [EDGE + 4, bottom + 20, first.y + BOX_HEIGHT / 2];
  return `M${from} ${bottom + 3}V${level - 8}Q${from} ${level} ${from - 8} ${level}H${edge + 8}Q${edge} ${level} ${edge} ${level - 8}V${target + 8}Q${edge} ${target} ${edge + 8} ${target}H${first.x - 5}`;
}

/** Seconds for one dot over one arrow. In few steps, so that a dot is not thrown back whenever the speed changes a little. */
export function secondsPerHop(tokensPerSecond: number): number {
  const step = Math.min(5, Math.max(0, Math.round(Math.log2(Math.max(tokensPerSecond, 1)))));
  return [2.8, 2.2, 1.7, 1.3, 0.95, 0.7][step] ?? 0.7;
}

export function bytes(count: number): string {
  if (count < 1e6) return `${Math.round(count / 1e3)} kB`;
  if (count < 1e9) return `${(count / 1e6).toFixed(count < 1e7 ? 1 : 0)} MB`;
  return `${(count / 1e9).toFixed(1)} GB`;
}

export const percent = (share: number): string => `${Math.round(share * 100)}%`;

export function layersInWords(layers: Rank["layers"]): string {
  if (layers === null) return "no layers";
  return layers[0] === layers[1] ? `layer ${layers[0]}` : `layers ${layers[0]}-${layers[1]}`;
}

export const kindInWords = ({ kind }: Rank): string => (kind === "ipad" ? "iPad" : "CPU");

/** What the drawing says to who cannot see it. */
export function ringInWords(cluster: Cluster): string {
  const { ranks, running, waiting, tokens_per_second: speed } = cluster;
  const each = ranks.map((rank) => {
    const state = rank.state === "ok" ? "" : `, ${rank.state}`;
    return `rank ${rank.rank} on ${rank.host}, ${kindInWords(rank)}, ${layersInWords(rank.layers)}${state}`;
  });
  return `The ring: ${each.join("; ")}. ${running} running, ${waiting} waiting, ${speed.toFixed(1)} tokens/s.`;
}
