/**
 * The page: which conversation is open, which panels are, and what each control does.
 *
 * Knows: all the parts. Must not know: how any of them does its work.
 */
import { useEffect, useRef, useState, useSyncExternalStore } from "react";
import { keep, newId, recall, save } from "./browser";
import type { Chat } from "./chat";
import { ClusterPanel } from "./Cluster";
import { Composer, draftName } from "./Composer";
import { Banner, KeyDialog } from "./Connection";
import { inOrder, lastAnswer, type Conversation } from "./conversations";
import { Header } from "./Header";
import { useKept, useMedia, useSaid } from "./hooks";
import { Parameters } from "./Parameters";
import { exportJson, exportMarkdown, fileName, readExport, Unreadable } from "./reading";
import type { Server, View } from "./server";
import { Sidebar } from "./Sidebar";
import type { Store } from "./store";
import { Drawer, Notices } from "./Surroundings";
import { Transcript } from "./Transcript";

const ACTIVE = "mpgpt.active";
const LARGEST_FILE = 50e6;
const isRoomy = (): boolean => window.matchMedia("(min-width: 900px) and (min-height: 800px)").matches;

export function App({ store, server, chat }: { store: Store; server: Server; chat: Chat }) {
  const { book, notice } = useSyncExternalStore(store.subscribe, store.get);
  const view = useSyncExternalStore(server.subscribe, server.get);
  const [chosen, setChosen] = useState(() => recall(ACTIVE, "sessionStorage"));
  const [deleted, setDeleted] = useState<Conversation | null>(null);
  const [said, say] = useSaid();
  const [idea, setIdea] = useState({ text: "", count: 0 });
  const [isKeyOpen, setKeyOpen] = useState(false);
  const [isDrawerOpen, setDrawerOpen] = useState(false);
  const [isClusterOpen, setClusterOpen] = useKept("mpgpt.cluster", isRoomy);
  const [isParametersOpen, setParametersOpen] = useKept("mpgpt.parameters", () => false);
  const isNarrow = useMedia("(max-width: 800px)");
  const toParameters = useRef<HTMLButtonElement>(null);

  const conversations = inOrder(book);
  const active = conversations.find(({ id }) => id === chosen) ?? (conversations[0] as Conversation); // there is always one
  const isBusy = chat.isBusy(active);
  const isRaw = chat.isRaw(active);
  const isAway = view.phase === "away";
  const { config } = view;

  useEffect(() => server.start(), [server]);
  useEffect(() => chat.start(), [chat]);
  useEffect(() => void keep(ACTIVE, active.id, "sessionStorage"), [active.id]);
  useLockedUntilKey(view, setKeyOpen, () => {
    if (lastAnswer(active)?.problem?.status === 401) chat.again(active.id);
  });
  useEffect(() => {
    const onKeyDown = (event: KeyboardEvent): void => {
      if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
      chat.stop(active.id);
    };
    window.addEventListener("keydown", onKeyDown);
    return () => window.removeEventListener("keydown", onKeyDown);
  }, [chat, active.id]);

  const open = (id: string): void => {
    setChosen(id);
    setDrawerOpen(false);
  };
  /** An empty one is there for use: no second one is made. */
  const begin = (raw?: boolean): string => {
    const empty = conversations.find(({ messages }) => messages.length === 0);
    const id = empty?.id ?? newId();
    if (!empty) store.dispatch({ type: "create", id, now: Date.now(), ...(raw === undefined ? {} : { raw }) });
    else if (raw !== undefined && empty.raw !== raw) store.dispatch({ type: "raw", id, now: Date.now(), raw });
    open(id);
    return id;
  };
  /** A chat is no text to continue, nor the other way round: what has begun stays what it is. */
  const setRaw = (raw: boolean): void => {
    const draft = recall(draftName(active.id));
    const id = begin(raw);
    if (id === active.id || draft === null || recall(draftName(id)) !== null) return;
    keep(draftName(id), draft);
    keep(draftName(active.id), null);
  };
  const remove = (conversation: Conversation): void => {
    chat.stop(conversation.id);
    setDeleted(store.find(conversation.id) ?? conversation);
    store.dispatch({ type: "delete", id: conversation.id });
  };
  const restore = (): void => {
    if (deleted) {
      store.dispatch({ type: "restore", conversation: deleted, now: Date.now() });
      open(deleted.id);
    }
    setDeleted(null);
  };
  const load = async (file: File): Promise<void> => {
    try {
      if (file.size > LARGEST_FILE) throw new Unreadable("The file is larger than 50 MB.");
      const read = readExport(await file.text());
      const here = new Map(conversations.map((one) => [one.id, one.changed]));
      const made = read.filter(({ id, changed }) => here.get(id) !== changed); // the others are here already
      const renamed = made.map((one) => (here.has(one.id) ? { ...one, id: newId() } : one));
      store.dispatch({ type: "import", conversations: renamed });
      say(importedInWords(made.length, read.length - made.length));
      if (renamed[0]) open(renamed[0].id);
    } catch (error) {
      say(`Nothing was imported. ${error instanceof Unreadable ? error.message : "The file could not be read."}`);
    }
  };

  const sidebar = (
    <Sidebar
      conversations={conversations}
      activeId={active.id}
      onOpen={open}
      onNew={() => {
        begin();
        document.getElementById("message")?.focus();
      }}
      onRename={(id, title) => store.dispatch({ type: "rename", id, now: Date.now(), title })}
      onDelete={remove}
      onExport={(one) => save(fileName(one, "json"), exportJson([one]), "application/json")}
      onMarkdown={(one) => save(fileName(one, "md"), exportMarkdown(one), "text/markdown")}
      onExportAll={() => save(fileName(null, "json"), exportJson(conversations), "application/json")}
      onImport={(file) => void load(file)}
      onKey={() => setKeyOpen(true)}
    />
  );
  return (
    <>
      <a className="skip" href="#message">
        Skip to the text box
      </a>
      <div className={`app${isParametersOpen ? " with-parameters" : ""}`}>
        <Header
          view={view}
          onDrawer={isNarrow ? () => setDrawerOpen(true) : null}
          isDrawerOpen={isDrawerOpen}
          isClusterOpen={isClusterOpen}
          onCluster={setClusterOpen}
          isParametersOpen={isParametersOpen}
          onParameters={setParametersOpen}
          parametersButton={toParameters}
        />
        {isNarrow ? (
          <Drawer isOpen={isDrawerOpen} onClose={() => setDrawerOpen(false)}>
            {sidebar}
          </Drawer>
        ) : (
          <nav className="sidebar" aria-label="All conversations">
            {sidebar}
          </nav>
        )}
        <main>
          <Banner view={view} onTry={server.tryNow} />
          <section id="cluster" className="cluster" aria-label="The cluster" hidden={!isClusterOpen}>
            {isClusterOpen && <ClusterPanel server={server} isHere={view.phase === "here"} />}
          </section>
          <Transcript
            conversation={active}
            model={config?.model ?? null}
            isRaw={isRaw}
            isAway={isAway}
            tab={store.tab}
            onAgain={() => chat.again(active.id)}
            onGoOn={() => chat.goOn(active.id)}
            onEdit={(text) => chat.edit(active.id, text)}
            onIdea={(text) => setIdea({ text, count: idea.count + 1 })}
          />
          <Notices
            notice={notice}
            said={said}
            deleted={deleted}
            onDismiss={() => store.dismiss()}
            onUndo={restore}
            onForget={() => {
              if (deleted && !store.find(deleted.id)) keep(draftName(deleted.id), null);
              setDeleted(null);
            }}
          />
          <Composer
            key={active.id}
            conversationId={active.id}
            isBusy={isBusy}
            isAway={isAway}
            isRaw={isRaw}
            isRawForced={config?.chat === false}
            idea={idea}
            onSend={(text) => chat.send(active.id, text)}
            onStop={() => chat.stop(active.id)}
            onRaw={setRaw}
          />
        </main>
        <aside
          id="parameters"
          className="side"
          aria-label="Settings of this conversation"
          hidden={!isParametersOpen}
          onKeyDown={(event) => {
            if (event.key !== "Escape") return;
            event.preventDefault();
            setParametersOpen(false);
            toParameters.current?.focus();
          }}
        >
          {isParametersOpen && (
            <Parameters
              key={active.id}
              changed={active.parameters}
              config={config}
              isRaw={isRaw}
              onChange={(parameters) => store.dispatch({ type: "parameters", id: active.id, now: Date.now(), parameters })}
            />
          )}
        </aside>
      </div>
      <KeyDialog
        key={String(isKeyOpen)}
        isOpen={isKeyOpen}
        isWanted={view.phase === "locked"}
        isRefused={view.refused}
        known={server.key}
        isKept={server.isKeyKept}
        onKey={(key, remember) => {
          server.setKey(key, remember);
          if (view.phase !== "locked") setKeyOpen(false);
        }}
        onClose={() => setKeyOpen(false)}
      />
    </>
  );
}

function importedInWords(made: number, known: number): string {
  const imported = made === 1 ? "Imported 1 conversation." : `Imported ${made} conversations.`;
  if (known === 0) return imported;
  return `${imported} ${known === 1 ? "1 was" : `${known} were`} here already.`;
}

/** Asks for the key when the server wants one; when it has taken it, goes on. */
function useLockedUntilKey({ phase, asked }: View, setOpen: (isOpen: boolean) => void, onUnlocked: () => void): void {
  const before = useRef(phase);
  useEffect(() => {
    if (phase === "locked") setOpen(true);
    else if (before.current === "locked" && phase === "here") {
      setOpen(false);
      onUnlocked();
    }
    before.current = phase;
  }, [phase, asked]); // only a change of phase counts
}
