/**
 * What is to be known of the server: that it is away and when it is tried again; and the key that it wants.
 *
 * Must not know: conversations.
 */
import { useEffect, useRef, useState } from "react";
import { useClock } from "./hooks";
import type { Phase, View } from "./server";

export function Banner({ view, onTry }: { view: View; onTry: () => void }) {
  const { phase, nextTry } = view;
  const isAway = phase === "away";
  const now = useClock(isAway);
  const seconds = nextTry === null ? 0 : Math.max(0, Math.ceil((nextTry - now) / 1000));
  return (
    <div className="banner" role="status" data-testid="connection" data-phase={phase}>
      {isAway && (
        <p>
          <strong>The server is away;</strong>{" "}
          {/* A number that counts down is not for reading aloud each time. */}
          <span aria-hidden="true">{seconds > 0 ? `trying again in ${seconds} s` : "trying again"}</span>
          <span className="hidden">it is tried again by itself.</span>
        </p>
      )}
      {isAway && (
        <button type="button" className="small" onClick={onTry}>
          Try now
        </button>
      )}
    </div>
  );
}

const WORDS = { ok: "Ready", busy: "Busy", stalled: "The ring stalled", degraded: "A rank is away", stopping: "Stopping" } as const;

/** The server's state in a word or two, for the header. */
export function stateInWords({ phase, health }: View): string {
  const phases: Record<Phase, string> = { starting: "Connecting", away: "Away", locked: "Locked", here: "Ready" };
  return phase === "here" && health ? WORDS[health.status] : phases[phase];
}

interface KeyProps {
  isOpen: boolean;
  isWanted: boolean;
  isRefused: boolean;
  known: string;
  isKept: boolean;
  onKey: (key: string, remember: boolean) => void;
  onClose: () => void;
}

export function KeyDialog({ isOpen, isWanted, isRefused, known, isKept, onKey, onClose }: KeyProps) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [key, setKey] = useState(known);
  const [remember, setRemember] = useState(isKept);
  useEffect(() => {
    const element = dialog.current;
    if (!element || element.open === isOpen) return;
    if (isOpen) element.showModal();
    else element.close();
  }, [isOpen]);
  const title = isWanted ? "The server wants a key" : "The server's key";
  return (
    <dialog ref={dialog} className="dialog" aria-label={title} onClose={onClose}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          onKey(key, remember);
        }}
      >
        <h2>{title}</h2>
        <p>Whoever started the server has it: it is in the file that was given as its key file.</p>
        <div className="parameter">
          <label htmlFor="key">API key</label>
          <input
            id="key"
            type="password"
            autoComplete="off"
            spellCheck={false}
            value={key}
            aria-invalid={isRefused}
            aria-describedby={isRefused ? "key-note" : undefined}
            onChange={(event) => setKey(event.target.value)}
          />
          {isRefused && (
            <p id="key-note" className="problem">
              The server does not take this key.
            </p>
          )}
        </div>
        <label className="switch">
          <input type="checkbox" checked={remember} onChange={(event) => setRemember(event.target.checked)} />
          <span>Remember on this device</span>
        </label>
        <div className="deeds">
          <button type="submit" className="main small">
            Use this key
          </button>
          <button type="button" className="small" onClick={() => dialog.current?.close()}>
            Close
          </button>
        </div>
      </form>
    </dialog>
  );
}
