/**
 * The panel of the cluster: asks for it once a second while somebody can see it, and shows it drawn and as a table.
 *
 * Must not know: conversations.
 */
import { useEffect, useLayoutEffect, useRef, useState } from "react";
import { Away, getCluster, reconnect, Refusal, type Cluster, type Rank } from "./api";
import { useIsVisible, useMedia, useSaid } from "./hooks";
import { Ring, SHARES } from "./Ring";
import { bytes, kindInWords, layersInWords, percent } from "./ring";
import type { Server } from "./server";

const POLL_MS = 1000;

export function ClusterPanel({ server, isHere }: { server: Server; isHere: boolean }) {
  const { cluster, problem } = useCluster(server, isHere);
  const isStill = useMedia("(prefers-reduced-motion: reduce)");
  const [box, width] = useWidth();
  if (!cluster) {
    return (
      <div className="cluster-body">
        <p className="hint">{problem ?? (isHere ? "Asking the ring…" : "The ring is shown when the server is here.")}</p>
      </div>
    );
  }
  const isWhole = cluster.ranks.every(({ state }) => state === "ok");
  return (
    <div className="cluster-body">
      <Facts cluster={cluster} isHere={isHere} />
      <div className="ring-box" ref={box}>
        <Ring cluster={isHere ? cluster : { ...cluster, running: 0, tokens_per_second: 0 }} width={width} isStill={isStill} />
      </div>
      <Legend hasRing={cluster.ranks.filter(({ layers }) => layers).length > 1} />
      {!isWhole && <Reconnect server={server} cluster={cluster} />}
      <details onToggle={(event) => event.currentTarget.open && event.currentTarget.scrollIntoView({ block: "nearest" })}>
        <summary>As a table</summary>
        <Table cluster={cluster} />
      </details>
    </div>
  );
}

function useCluster(server: Server, isHere: boolean): { cluster: Cluster | null; problem: string | null } {
  const [known, setKnown] = useState<{ cluster: Cluster | null; problem: string | null }>({ cluster: null, problem: null });
  const isOn = useIsVisible() && isHere;
  useEffect(() => {
    if (!isOn) return;
    let timer: ReturnType<typeof setTimeout>;
    let isOver = false;
    const look = async (): Promise<void> => {
      try {
        const cluster = await getCluster(server.key);
        if (!isOver) setKnown({ cluster, problem: null });
      } catch (error) {
        if (isOver) return;
        if (error instanceof Away) server.tryNow();
        else if (error instanceof Refusal) setKnown(({ cluster }) => ({ cluster, problem: error.message }));
        else throw error;
      }
      if (!isOver) timer = setTimeout(() => void look(), POLL_MS);
    };
    void look();
    return () => {
      isOver = true;
      clearTimeout(timer);
    };
  }, [isOn, server]);
  return known;
}

function useWidth(): [(element: HTMLElement | null) => void, number] {
  const [element, setElement] = useState<HTMLElement | null>(null);
  const [width, setWidth] = useState(720);
  const last = useRef(width);
  useLayoutEffect(() => {
    if (!element || typeof ResizeObserver === "undefined") return;
    const measure = (): void => {
      const next = Math.floor(element.clientWidth);
      if (next > 0 && next !== last.current) setWidth((last.current = next));
    };
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(element);
    return () => observer.disconnect();
  }, [element]);
  return [setElement, width];
}

function Facts({ cluster, isHere }: { cluster: Cluster; isHere: boolean }) {
  const { running, waiting, tokens_per_second: speed, layers, dtype, slots } = cluster;
  return (
    <p className="facts">
      <span>
        <strong>{running}</strong> of {slots} running
      </span>
      <span>
        <strong>{waiting}</strong> waiting
      </span>
      <span>
        <strong>{speed.toFixed(1)}</strong> tokens/s
      </span>
      <span>
        {layers} layers, {dtype}
      </span>
      {!isHere && <span>as it was when the server was last here</span>}
    </p>
  );
}

function Legend({ hasRing }: { hasRing: boolean }) {
  return (
    <p className="legend" aria-hidden="true">
      {hasRing && <span className="key-states">hidden states</span>}
      {hasRing && <span className="key-ids">token ids</span>}
      {SHARES.map(([name, word]) => (
        <span key={name} className={`key-${name}`}>
          {word}
        </span>
      ))}
    </p>
  );
}

function Reconnect({ server, cluster }: { server: Server; cluster: Cluster }) {
  const [isTrying, setTrying] = useState(false);
  const [said, say] = useSaid(15_000);
  const press = async (): Promise<void> => {
    setTrying(true);
    say(null);
    try {
      const { message, did } = await reconnect(server.key);
      say([message, ...did].map(sentence).join(" "));
    } catch (error) {
      say(error instanceof Refusal ? sentence(error.message) : "The server did not answer.");
    } finally {
      setTrying(false);
    }
  };
  const names = cluster.ranks.filter(({ state }) => state !== "ok").map(({ rank, host, state }) => `Rank ${rank} (${host}) is ${state}.`);
  return (
    <div className="reconnect">
      <p>{names.join(" ")}</p>
      <button type="button" className="small" disabled={isTrying} onClick={() => void press()}>
        Reconnect
      </button>
      <p role="status">{isTrying ? "Trying…" : said}</p>
    </div>
  );
}

const sentence = (text: string): string => `${text[0]?.toUpperCase() ?? ""}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

const COLUMNS = ["Rank", "Host", "Kind", "State", "Layers", "Weights", "KV cache", "Memory", "Computing", "Waiting", "Sending", "Steps"];

function Table({ cluster }: { cluster: Cluster }) {
  return (
    <div className="wide" role="region" aria-label="The ranks" tabIndex={0}>
      <table>
        <thead>
          <tr>
            {COLUMNS.map((name) => (
              <th key={name} scope="col">
                {name}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {cluster.ranks.map((rank) => (
            <Row key={rank.rank} rank={rank} />
          ))}
        </tbody>
      </table>
      {cluster.ranks.map((rank) => rank.device && <p key={rank.rank}>{deviceInWords(rank)}</p>)}
    </div>
  );
}

function Row({ rank }: { rank: Rank }) {
  const cells = [
    rank.host,
    kindInWords(rank),
    rank.state,
    layersInWords(rank.layers).replace(/^layers? /, ""),
    bytes(rank.slice_bytes),
    bytes(rank.kv_bytes),
    bytes(rank.memory),
    percent(rank.compute),
    percent(rank.wait),
    percent(rank.send),
    String(rank.steps),
  ];
  return (
    <tr>
      <th scope="row">{rank.rank}</th>
      {cells.map((cell, at) => (
        <td key={COLUMNS[at + 1]}>{cell}</td>
      ))}
    </tr>
  );
}

function deviceInWords({ rank, device }: Rank): string {
  if (!device) return "";
  const { requests, falls, away_s: away, thermal } = device;
  const heat = thermal === "unknown" ? "" : ` Its thermal state is ${thermal}.`;
  return `Rank ${rank}'s iPad: ${requests} requests, ${falls} computed in its stead, away for ${away.toFixed(0)} s.${heat}`;
}
