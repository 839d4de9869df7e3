/**
 * Where a message is typed. What was typed survives a reload, and stays with its conversation.
 *
 * Knows: Enter, Shift+Enter, and when there is something to stop. Must not know: how anything is sent.
 */
import { useEffect, useLayoutEffect, useRef, useState, type KeyboardEvent } from "react";
import { keep, recall } from "./browser";
import { Icon } from "./Icon";

interface Props {
  conversationId: string;
  isBusy: boolean;
  isAway: boolean;
  isRaw: boolean;
  /** The model has no chat template: there is nothing to choose. */
  isRawForced: boolean;
  /** Text to put in from outside; each has a number, so that the same can be put in twice. */
  idea: { text: string; count: number };
  onSend: (text: string) => void;
  onStop: () => void;
  onRaw: (raw: boolean) => void;
}

export const draftName = (conversationId: string): string => `mpgpt.draft.v1.${conversationId}`;

export function Composer({ conversationId, isBusy, isAway, isRaw, isRawForced, idea, onSend, onStop, onRaw }: Props) {
  const [text, setText] = useState(() => recall(draftName(conversationId)) ?? "");
  const area = useRef<HTMLTextAreaElement>(null);
  const type = (typed: string): void => {
    setText(typed);
    keep(draftName(conversationId), typed === "" ? null : typed);
  };
  useEffect(() => {
    if (idea.text === "") return;
    type(idea.text);
    area.current?.focus();
    // eslint-disable-next-line react-hooks/exhaustive-deps -- a new idea, not a new conversation
  }, [idea]);
  useLayoutEffect(() => {
    const element = area.current;
    if (!element) return;
    element.style.height = "auto";
    element.style.height = `${element.scrollHeight + 2}px`;
  }, [text]);

  const send = (): void => {
    if (isBusy || text.trim() === "") return;
    onSend(text);
    type("");
    area.current?.focus();
  };
  const onKeyDown = (event: KeyboardEvent): void => {
    if (event.key !== "Enter" || event.shiftKey || event.nativeEvent.isComposing) return;
    event.preventDefault();
    send();
  };
  return (
    <form className="composer" onSubmit={(event) => (event.preventDefault(), send())}>
      <div className="column">
        <div className="field">
          <textarea
            id="message"
            ref={area}
            aria-label="Message"
            aria-describedby="message-hint"
            placeholder={isRaw ? "Text to be continued" : "Ask something"}
            rows={1}
            value={text}
            enterKeyHint="send"
            onChange={(event) => type(event.target.value)}
            onKeyDown={onKeyDown}
          />
          {isBusy ? (
            <button type="button" className="round" aria-label="Stop" title="Stop (Escape)" onClick={onStop}>
              <Icon name="stop" />
            </button>
          ) : (
            <button type="submit" className="round main" aria-label="Send" title="Send (Enter)" disabled={text.trim() === ""}>
              <Icon name="send" />
            </button>
          )}
        </div>
        <div className="under">
          <label className="switch">
            <input type="checkbox" role="switch" checked={isRaw} disabled={isRawForced || isBusy} onChange={(event) => onRaw(event.target.checked)} />
            <span>Raw completion</span>
          </label>
          <span id="message-hint" className="hint">
            {hint(isAway, isRawForced)}
          </span>
        </div>
      </div>
    </form>
  );
}

function hint(isAway: boolean, isRawForced: boolean): string {
  if (isAway) return "What you send now goes out when the server is back.";
  if (isRawForced) return "This model has no chat template: it continues text.";
  return "Enter sends, Shift+Enter breaks the line.";
}
