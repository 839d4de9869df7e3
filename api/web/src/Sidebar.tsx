/**
 * The list of conversations, and what can be done with them and with the page.
 *
 * Must not know: storage, files, the server.
 */
import { useRef, useState, type KeyboardEvent } from "react";
import type { Conversation } from "./conversations";
import { Icon } from "./Icon";
import { chooseTheme, themeChosen, THEMES, type Theme } from "./theme";

export interface SidebarDeeds {
  onOpen: (id: string) => void;
  onNew: () => void;
  onRename: (id: string, title: string) => void;
  onDelete: (conversation: Conversation) => void;
  onExport: (conversation: Conversation) => void;
  onMarkdown: (conversation: Conversation) => void;
  onExportAll: () => void;
  onImport: (file: File) => void;
  onKey: () => void;
}

interface Props extends SidebarDeeds {
  conversations: readonly Conversation[];
  activeId: string;
}

export function Sidebar({ conversations, activeId, ...deeds }: Props) {
  const [renamed, setRenamed] = useState<string | null>(null);
  return (
    <>
      <button type="button" className="new" onClick={deeds.onNew}>
        <Icon name="plus" /> New conversation
      </button>
      <ul className="conversations">
        {conversations.map((conversation) => {
          const isActive = conversation.id === activeId;
          return (
            <li key={conversation.id} className={isActive ? "active" : ""}>
              {renamed === conversation.id ? (
                <Renaming
                  title={conversation.title}
                  onDone={(title) => {
                    setRenamed(null);
                    if (title) deeds.onRename(conversation.id, title);
                  }}
                />
              ) : (
                <button type="button" className="title" aria-current={isActive} onClick={() => deeds.onOpen(conversation.id)}>
                  {conversation.title || "Untitled"}
                </button>
              )}
              {isActive && renamed !== conversation.id && (
                <Actions conversation={conversation} onRenaming={() => setRenamed(conversation.id)} {...deeds} />
              )}
            </li>
          );
        })}
      </ul>
      <Bottom {...deeds} />
    </>
  );
}

type ActionsProps = SidebarDeeds & { conversation: Conversation; onRenaming: () => void };

function Actions({ conversation, onRenaming, onExport, onMarkdown, onDelete }: ActionsProps) {
  const has = conversation.messages.length > 0;
  return (
    <div className="deeds">
      <Deed name="Rename conversation" icon="pen" onPress={onRenaming} />
      {has && <Deed name="Export conversation" icon="out" onPress={() => onExport(conversation)} />}
      {has && <Deed name="Export as Markdown" icon="page" onPress={() => onMarkdown(conversation)} />}
      <Deed name="Delete conversation" icon="bin" onPress={() => onDelete(conversation)} />
    </div>
  );
}

function Deed({ name, icon, onPress }: { name: string; icon: "pen" | "out" | "page" | "bin"; onPress: () => void }) {
  return (
    <button type="button" className="quiet" aria-label={name} title={name} onClick={onPress}>
      <Icon name={icon} />
    </button>
  );
}

function Renaming({ title, onDone }: { title: string; onDone: (title: string | null) => void }) {
  const [typed, setTyped] = useState(title);
  const onKeyDown = (event: KeyboardEvent): void => {
    if (event.key === "Enter") onDone(typed.trim());
    if (event.key !== "Escape") return;
    event.preventDefault(); // the drawer stays
    event.stopPropagation();
    onDone(null);
  };
  return (
    <input
      className="title"
      aria-label="Name"
      value={typed}
      maxLength={200}
      autoFocus
      onFocus={(event) => event.target.select()}
      onChange={(event) => setTyped(event.target.value)}
      onKeyDown={onKeyDown}
      onBlur={() => onDone(typed.trim())}
    />
  );
}

function Bottom({ onExportAll, onImport, onKey }: SidebarDeeds) {
  const file = useRef<HTMLInputElement>(null);
  const [theme, setTheme] = useState(themeChosen);
  const choose = (chosen: Theme): void => {
    setTheme(chosen);
    chooseTheme(chosen);
  };
  return (
    <div className="bottom">
      <div className="pair">
        <button type="button" className="small" onClick={onExportAll}>
          <Icon name="out" /> Export all
        </button>
        <button type="button" className="small" onClick={() => file.current?.click()}>
          <Icon name="into" /> Import
        </button>
        <input
          ref={file}
          type="file"
          accept=".json,application/json"
          hidden
          data-testid="file"
          onChange={(event) => {
            const chosen = event.target.files?.[0];
            event.target.value = "";
            if (chosen) onImport(chosen);
          }}
        />
      </div>
      <div className="pair">
        <label className="theme">
          <span>Theme</span>
          <select value={theme} onChange={(event) => choose(event.target.value as Theme)}>
            {THEMES.map((name) => (
              <option key={name} value={name}>
                {name[0]?.toUpperCase() + name.slice(1)}
              </option>
            ))}
          </select>
        </label>
        <button type="button" className="small" onClick={onKey}>
          <Icon name="key" /> Key
        </button>
      </div>
    </div>
  );
}
