/**
 * What stands under an answer: how it ended, its figures, and what can be done with it.
 *
 * Knows: the states of an answer, in words. Must not know: how anything is sent.
 */
import type { ReactNode } from "react";
import type { Figures } from "./api";
import type { Answer } from "./conversations";
import { CopyButton } from "./CopyButton";
import { Icon } from "./Icon";

export interface Deeds {
  onAgain: () => void;
  onGoOn: () => void;
}

interface Props extends Deeds {
  answer: Answer;
  /** What is copied: the answer, or in raw completion all of the text. */
  copied: string;
  isLast: boolean;
  isRaw: boolean;
  isMine: boolean;
  isAway: boolean;
  /** More that can be done. */
  children?: ReactNode;
}

export function Foot({ answer, copied, isLast, isRaw, isMine, isAway, onAgain, onGoOn, children }: Props) {
  const { state, text, figures } = answer;
  const isOpen = state === "waiting" || state === "streaming";
  const canGoOn = state === "cut" || (isRaw && text !== "" && (state === "done" || state === "stopped"));
  return (
    <div className="foot">
      <State answer={answer} isMine={isMine} isAway={isAway} />
      {figures && <FiguresLine figures={figures} />}
      {!isOpen && (
        <div className="deeds">
          {copied !== "" && <CopyButton name="Copy answer" text={() => copied} />}
          {isLast && (state === "done" || state === "stopped") && (
            <button type="button" className="quiet" aria-label="Regenerate" title="Regenerate" onClick={onAgain}>
              <Icon name="again" />
            </button>
          )}
          {isLast && state === "failed" && (
            <button type="button" className="small" onClick={onAgain}>
              <Icon name="again" /> Try again
            </button>
          )}
          {isLast && canGoOn && (
            <button type="button" className="small" onClick={onGoOn}>
              <Icon name="further" /> Continue
            </button>
          )}
          {children}
        </div>
      )}
    </div>
  );
}

function State({ answer, isMine, isAway }: { answer: Answer; isMine: boolean; isAway: boolean }) {
  const { state, text, problem, resent } = answer;
  if ((state === "waiting" || state === "streaming") && !isMine) return <p className="mark">Being answered in another tab.</p>;
  if (state === "waiting" && isAway) {
    if (!resent) return <p className="mark">Will be sent when the server is back.</p>;
    return <p className="mark">The connection was lost. It will be sent again when the server is back.</p>;
  }
  if (state === "waiting" || (state === "streaming" && text === "")) {
    return (
      <p className="mark awaited">
        <span className="dots" aria-hidden="true">
          <i />
          <i />
          <i />
        </span>
        Waiting for the first token
      </p>
    );
  }
  if (state === "failed") return <p className="problem">{problem?.sentence ?? "No answer came."}</p>;
  if (state === "cut") return <p className="mark cut">{text === "" ? "Cut off before anything came." : "Cut off: the connection was lost."}</p>;
  if (state === "stopped") return <p className="mark">{text === "" ? "Stopped before anything came." : "Stopped."}</p>;
  return null;
}

function FiguresLine({ figures }: { figures: Figures }) {
  const { firstMs, perSecond, tokens, finish, seed } = figures;
  return (
    <p className="figures" data-testid="figures">
      <span>{seconds(firstMs)} to the first token</span>
      <span>{perSecond.toFixed(1)} tokens/s</span>
      <span>{tokens === 1 ? "1 token" : `${tokens} tokens`}</span>
      {finish === "length" && <span>ended by length: the most tokens were reached</span>}
      {seed !== null && <span>seed {seed}</span>}
    </p>
  );
}

const seconds = (ms: number): string => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`);
