import { render, screen, within } from "@testing-library/react";
import { describe, expect, test } from "vitest";
import { Ring } from "../Ring";
import { bytes, layout, secondsPerHop } from "../ring";
import { cluster, rank } from "./fake";

const IPAD = rank(1, { host: "ipad-proxy", kind: "ipad", state: "away" });
const IDLE = rank(2, { host: "spare", layers: null, compute: 0, wait: 0, send: 0, other: 0 });

describe("the drawing", () => {
  test("says what it shows", () => {
    render(<Ring cluster={cluster([rank(0), IPAD, IDLE], { running: 2, tokens_per_second: 31.25 })} width={800} isStill={false} />);
    const name = screen.getByRole("img").getAttribute("aria-label");
    expect(name).toMatch(/^The ring: rank 0 on host0, CPU, layers 0-3; rank 1 on ipad-proxy, iPad, layers 4-7, away; rank 2 on spare, CPU, no layers\./);
    expect(name).toContain("2 running, 0 waiting, 31.3 tokens/s");
  });

  test("has a box a rank: state in words, kind, layers, memory, shares", () => {
    render(<Ring cluster={cluster([rank(0), IPAD, IDLE])} width={800} isStill={false} />);
    const first = within(screen.getByTestId("rank-0"));
    for (const words of ["0 · host0", "CPU · layers 0-3", "120 MB of weights · 4.0 MB KV", "50% computing, 30% waiting"]) first.getByText(words);
    const ipad = screen.getByTestId("rank-1");
    within(ipad).getByText("away");
    within(ipad).getByText("iPad · layers 4-7");
    expect(ipad.querySelector(".tablet")).not.toBeNull();
    within(screen.getByTestId("rank-2")).getByText("not in the ring");
    expect(screen.getByTestId("rank-0").querySelectorAll(".shares rect:not(.empty, .frame)")).toHaveLength(4);
  });

  test("dots travel while the ring is busy, unless the reader wants no motion", () => {
    const dots = (running: number, isStill: boolean): number =>
      render(<Ring cluster={cluster([rank(0), rank(1)], { running })} width={800} isStill={isStill} />).container.querySelectorAll("animateMotion").length;
    expect(dots(0, false)).toBe(0);
    expect(dots(1, true)).toBe(0);
    expect(dots(2, false)).toBe(4); // two on the arrow there, two on the way back
  });
});

describe("the layout", () => {
  const many = (count: number) => Array.from({ length: count }, (_, n) => rank(n));

  test("one row where there is room, one column on a phone, rows that turn between", () => {
    const wide = layout(many(3), 900);
    expect(new Set(wide.boxes.map(({ y }) => y)).size).toBe(1);
    const phone = layout(many(3), 290);
    expect(new Set(phone.boxes.map(({ x }) => x)).size).toBe(1);
    const { boxes } = layout(many(8), 900);
    expect(boxes[3]!.x).toBe(boxes[4]!.x); // the second row begins under the end of the first
    expect(boxes[4]!.x).toBeGreaterThan(boxes[5]!.x);
  });

  test.each([1, 2, 3, 5, 8, 13, 32])("%i ranks: no box outside the drawing or on another", (count) => {
    for (const width of [250, 375, 640, 984]) {
      const { boxes, boxWidth, hops, back, ...size } = layout(many(count), width);
      expect(size.width).toBeLessThanOrEqual(width);
      for (const { x, y } of boxes) {
        expect(x).toBeGreaterThanOrEqual(0);
        expect(x + boxWidth).toBeLessThanOrEqual(size.width);
        expect(y + 116).toBeLessThanOrEqual(size.height);
      }
      expect(new Set(boxes.map(({ x, y }) => `${x},${y}`)).size).toBe(count);
      expect(hops).toHaveLength(count - 1);
      expect(back === null).toBe(count === 1);
    }
  });

  test("who has no layers stands last, and no arrow leads there", () => {
    const { boxes, hops } = layout([rank(0), { ...IDLE, rank: 1 }, rank(2)], 900);
    expect(boxes.map((box) => box.rank.rank)).toEqual([0, 2, 1]);
    expect(hops).toHaveLength(1);
  });

  test("faster is faster, within bounds", () => {
    expect(secondsPerHop(0)).toBe(2.8);
    expect(secondsPerHop(1000)).toBe(0.7);
    expect(secondsPerHop(8)).toBeLessThan(secondsPerHop(2));
  });

  test("bytes in words", () => expect([512, 9.4e6, 145e6, 8e9].map(bytes)).toEqual(["1 kB", "9.4 MB", "145 MB", "8.0 GB"]));
});
