/**
 * The conversation, and where the reader is in it: it follows the text only while the reader is at its end.
 *
 * Must not know: how anything is sent or kept.
 */
import { useEffect, useLayoutEffect, useRef, useState } from "react";
import { isOpen, lastAnswer, type Conversation } from "./conversations";
import type { Deeds } from "./Foot";
import { Icon } from "./Icon";
import { Answered, Running, Said } from "./Message";
import { Welcome } from "./Welcome";

const NEAR_PX = 56;
/** Once it has been told it goes, so that who reads on does not meet the answer twice. */
const SAID_MS = 2000;

interface Props extends Deeds {
  conversation: Conversation;
  model: string | null;
  isRaw: boolean;
  isAway: boolean;
  tab: string;
  onEdit: (text: string) => void;
  onIdea: (text: string) => void;
}

export function Transcript({ conversation, model, isRaw, isAway, tab, onEdit, onIdea, ...deeds }: Props) {
  const { messages } = conversation;
  const box = useRef<HTMLDivElement>(null);
  const [isAtEnd, setAtEnd] = useState(true);
  const follows = useRef(true);
  const top = useRef(0);

  const toEnd = (): void => {
    const element = box.current;
    if (element) element.scrollTop = element.scrollHeight;
    follows.current = true;
    setAtEnd(true);
  };
  const onScroll = (): void => {
    const element = box.current;
    if (!element) return;
    const isNear = element.scrollHeight - element.scrollTop - element.clientHeight < NEAR_PX;
    if (isNear) follows.current = true;
    else if (element.scrollTop < top.current) follows.current = false; // up: the reader's doing, not the text's
    top.current = element.scrollTop;
    setAtEnd(follows.current);
  };
  useLayoutEffect(toEnd, [conversation.id, messages.length]); // another conversation, or something was said
  useLayoutEffect(() => {
    if (follows.current) toEnd();
  }, [messages]);
  useEffect(() => {
    const element = box.current;
    if (!element || typeof ResizeObserver === "undefined") return;
    const observer = new ResizeObserver(() => follows.current && toEnd()); // the composer grew, a panel opened
    observer.observe(element);
    return () => observer.disconnect();
  }, []);

  const answer = lastAnswer(conversation);
  const canEdit = messages.length > 0 && !(answer && isOpen(answer));
  const lastQuestion = messages.findLast(({ role }) => role === "user");
  const isMine = answer?.owner === tab;
  return (
    <div className="transcript-box">
      <div className="transcript" role="log" aria-label="Conversation" aria-live="off" tabIndex={0} ref={box} onScroll={onScroll}>
        <div className="column">
          {messages.length === 0 && <Welcome model={model} isRaw={isRaw} onIdea={onIdea} />}
          {messages.length > 0 && isRaw && (
            <Running key={conversation.id} {...{ messages, isMine, isAway, canEdit, onEdit }} {...deeds} />
          )}
          {!isRaw &&
            messages.map((message) =>
              message.role === "user" ? (
                <Said key={message.id} question={message} canEdit={canEdit && message === lastQuestion} onEdit={onEdit} />
              ) : (
                <Answered key={message.id} answer={message} isLast={message === answer} {...{ isMine, isAway }} {...deeds} />
              ),
            )}
        </div>
      </div>
      {!isAtEnd && (
        <button type="button" className="jump" onClick={toEnd}>
          <Icon name="down" /> Jump to the latest
        </button>
      )}
      <Finished key={conversation.id} conversation={conversation} />
    </div>
  );
}

/** Tells screen readers an answer when it is whole, not token by token. */
function Finished({ conversation }: { conversation: Conversation }) {
  const answer = lastAnswer(conversation);
  const open = useRef<string | null>(null);
  const [said, say] = useState("");
  useEffect(() => {
    if (answer && isOpen(answer)) open.current = answer.id;
    else if (answer && open.current === answer.id) {
      open.current = null;
      say(answer.state === "failed" ? `No answer: ${answer.problem?.sentence ?? ""}` : `Answer: ${answer.text}`);
    }
  }, [answer]);
  useEffect(() => {
    const timer = setTimeout(() => say(""), SAID_MS);
    return () => clearTimeout(timer);
  }, [said]);
  return (
    <div className="hidden" aria-live="polite" data-testid="announced">
      {said}
    </div>
  );
}
