/**
 * A message of a chat: a question that can be edited, or an answer. And the text of a raw completion.
 *
 * Must not know: how anything is sent or kept.
 */
import { memo, useState, type KeyboardEvent } from "react";
import type { Answer, Message, Question } from "./conversations";
import { Foot, type Deeds } from "./Foot";
import { Icon } from "./Icon";
import { Markdown } from "./Markdown";

interface EditDeeds {
  canEdit: boolean;
  onEdit: (text: string) => void;
}

export function Said({ question, canEdit, onEdit }: EditDeeds & { question: Question }) {
  const [isOpen, setOpen] = useState(false);
  if (isOpen) {
    return (
      <article aria-label="You" className="you editing">
        <Editor text={question.text} onDone={(text) => (setOpen(false), text !== null && onEdit(text))} />
      </article>
    );
  }
  return (
    <article aria-label="You" className="you">
      <div className="bubble">{question.text}</div>
      {canEdit && <EditButton onPress={() => setOpen(true)} />}
    </article>
  );
}

interface AnswerProps extends Deeds {
  answer: Answer;
  isLast: boolean;
  isMine: boolean;
  isAway: boolean;
}

export const Answered = memo(
  function Answered({ answer, ...rest }: AnswerProps) {
    return (
      <article aria-label="Answer" className="answer" aria-busy={answer.state === "streaming"}>
        {answer.text !== "" && <Markdown text={answer.text} />}
        <Foot answer={answer} copied={answer.text} isRaw={false} {...rest} />
      </article>
    );
  },
  (a, b) => a.answer === b.answer && a.isLast === b.isLast && a.isAway === b.isAway && a.isMine === b.isMine,
);

/** Prompts and completions as one text, with what can be done under it. */
export function Running({ messages, isMine, isAway, canEdit, onEdit, ...deeds }: Deeds & EditDeeds & {
  messages: readonly Message[];
  isMine: boolean;
  isAway: boolean;
}) {
  const [isOpen, setOpen] = useState(false);
  const last = messages.at(-1);
  const asked = messages.findLast((message) => message.role === "user");
  if (isOpen && asked) return <Editor text={asked.text} onDone={(text) => (setOpen(false), text !== null && onEdit(text))} />;
  return (
    <div className="running">
      <div className="text">
        {messages.map(({ id, role, text }) => (
          <article key={id} aria-label={role === "user" ? "You" : "Answer"} className={role}>
            {text}
          </article>
        ))}
      </div>
      {last?.role === "assistant" && (
        <Foot answer={last} copied={last.text} isLast isRaw isMine={isMine} isAway={isAway} {...deeds}>
          {canEdit && asked && <EditButton onPress={() => setOpen(true)} />}
        </Foot>
      )}
    </div>
  );
}

function EditButton({ onPress }: { onPress: () => void }) {
  return (
    <button type="button" className="quiet" aria-label="Edit message" title="Edit message" onClick={onPress}>
      <Icon name="pen" />
    </button>
  );
}

function Editor({ text, onDone }: { text: string; onDone: (text: string | null) => void }) {
  const [typed, setTyped] = useState(text);
  const onKeyDown = (event: KeyboardEvent): void => {
    if (event.key === "Escape") {
      event.stopPropagation();
      onDone(null);
    } else if (event.key === "Enter" && !event.shiftKey && !event.nativeEvent.isComposing && typed.trim() !== "") {
      event.preventDefault();
      onDone(typed);
    }
  };
  return (
    <form className="editor" onSubmit={(event) => (event.preventDefault(), onDone(typed))}>
      <textarea
        aria-label="Edited text"
        value={typed}
        rows={3}
        autoFocus
        onChange={(event) => setTyped(event.target.value)}
        onKeyDown={onKeyDown}
      />
      <div className="deeds">
        <button type="submit" className="main small" disabled={typed.trim() === ""}>
          Ask again
        </button>
        <button type="button" className="small" onClick={() => onDone(null)}>
          Cancel
        </button>
      </div>
    </form>
  );
}
