/**
 * What stands around the conversation: the drawer of narrow screens, and the sentences that come and go.
 */
import { useEffect, useRef, type ReactNode } from "react";
import type { Conversation } from "./conversations";
import { Icon } from "./Icon";

const UNDO_MS = 9000;

export function Drawer({ isOpen, onClose, children }: { isOpen: boolean; onClose: () => void; children: ReactNode }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const element = dialog.current;
    if (!element || element.open === isOpen) return;
    if (isOpen) element.showModal();
    else element.close();
  }, [isOpen]);
  return (
    <dialog
      ref={dialog}
      className="drawer"
      aria-label="All conversations"
      onClose={onClose}
      onClick={(event) => event.target === dialog.current && dialog.current?.close()}
    >
      <div className="sidebar">
        <button type="button" className="quiet close" aria-label="Close" onClick={() => dialog.current?.close()}>
          <Icon name="close" />
        </button>
        {children}
      </div>
    </dialog>
  );
}

interface Props {
  notice: string | null;
  said: string | null;
  deleted: Conversation | null;
  onDismiss: () => void;
  onUndo: () => void;
  onForget: () => void;
}

export function Notices({ notice, said, deleted, onDismiss, onUndo, onForget }: Props) {
  const forget = useRef(onForget);
  forget.current = onForget;
  useEffect(() => {
    if (!deleted) return;
    const timer = setTimeout(() => forget.current(), UNDO_MS);
    return () => clearTimeout(timer);
  }, [deleted]);
  return (
    <div className="notices" aria-live="polite">
      {notice && (
        <div className="notice warn" data-testid="notice">
          <p>{notice}</p>
          <button type="button" className="small" onClick={onDismiss}>
            Dismiss
          </button>
        </div>
      )}
      {said && (
        <div className="notice">
          <p>{said}</p>
        </div>
      )}
      {deleted && (
        <div className="notice">
          <p>Deleted “{deleted.title || "Untitled"}”.</p>
          <button type="button" className="small" onClick={onUndo}>
            Undo
          </button>
        </div>
      )}
    </div>
  );
}
