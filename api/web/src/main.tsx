/**
 * Where the parts are put together: the store, the server, the chat, and the page that shows them.
 */
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { App } from "./App";
import { storageOf, tabName } from "./browser";
import { Chat } from "./chat";
import { Server } from "./server";
import { Store } from "./store";
import { applyTheme, themeChosen } from "./theme";
import "./styles/base.css";
import "./styles/layout.css";
import "./styles/chat.css";
import "./styles/markdown.css";
import "./styles/panels.css";
import "./styles/cluster.css";

applyTheme(themeChosen());
const store = new Store(storageOf("localStorage"), tabName());
const server = new Server();
const chat = new Chat(store, server);
window.addEventListener("storage", store.hear);
window.addEventListener("pagehide", () => store.flush());
document.addEventListener("visibilitychange", () => store.flush());

const root = document.getElementById("root");
if (!root) throw new Error("index.html has no #root");
createRoot(root).render(
  <StrictMode>
    <App store={store} server={server} chat={chat} />
  </StrictMode>,
);
