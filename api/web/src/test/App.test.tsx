import { act, fireEvent, render, screen, waitFor, within } from "@testing-library/react";
import userEvent from "@testing-library/user-event";
import { beforeEach, expect, test, vi } from "vitest";
import { App } from "../App";
import { tabName } from "../browser";
import { Chat } from "../chat";
import { exportJson } from "../reading";
import { Server } from "../server";
import { Store } from "../store";
import { cluster, FakeServer, rank } from "./fake";

let fake: FakeServer;
let page: ReturnType<typeof render>;
const user = userEvent.setup();

beforeEach(() => {
  fake = new FakeServer();
});

async function open(): Promise<Store> {
  const store = new Store(localStorage, tabName());
  const server = new Server();
  page = render(<App store={store} server={server} chat={new Chat(store, server)} />);
  await waitFor(() => expect(screen.getByTestId("state").textContent).not.toBe("Connecting"));
  return store;
}
async function reload(): Promise<Store> {
  page.unmount();
  return open();
}
const button = (name: string) => screen.getByRole("button", { name });
const box = () => screen.getByRole("textbox", { name: "Message" }) as HTMLTextAreaElement;
const answers = () => screen.getAllByRole("article", { name: "Answer" });
async function say(text: string): Promise<void> {
  const before = fake.asked.length;
  await user.type(box(), `${text}{Enter}`);
  await waitFor(() => expect(fake.asked.length).toBe(before + 1));
}
async function finish(text: string, change = {}): Promise<void> {
  const before = screen.queryAllByTestId("figures").length;
  act(() => fake.last.finish(text, change));
  await waitFor(() => expect(screen.queryAllByTestId("figures").length).toBe(before + 1));
}

test("send, stream, figures, announced when whole; then regenerate", async () => {
  await open();
  expect(screen.getByTestId("model").textContent).toBe("org/tiny-chat");
  expect(button("Send")).toHaveProperty("disabled", true);
  await say("Hello{Shift>}{Enter}{/Shift}there");
  expect(fake.last.body).toEqual({ messages: [{ role: "user", content: "Hello\nthere" }] });
  expect(box().value).toBe("");
  act(() => fake.last.tokens("Good **day**"));
  await screen.findByText("day");
  expect(screen.getByTestId("announced").textContent).toBe("");
  expect(screen.getByRole("log", { name: "Conversation" }).getAttribute("aria-live")).toBe("off");
  button("Stop");
  await finish("Good **day**.", { finish_reason: "length" });
  expect(screen.getByTestId("figures").textContent).toMatch(/120 ms to the first token.*12\.5 tokens\/s.*3 tokens.*length.*seed 9007199254740993/);
  expect(screen.getByTestId("announced").textContent).toBe("Answer: Good **day**.");
  await user.click(button("Regenerate"));
  await waitFor(() => expect(fake.asked).toHaveLength(2));
  expect(fake.asked[1]!.body).toEqual(fake.asked[0]!.body);
  await finish("Another.");
  expect(answers()).toHaveLength(1);
  expect(answers()[0]!.textContent).toContain("Another.");
});

test("Escape stops; what came stays, is marked, and can be copied", async () => {
  await open();
  await say("Hi");
  act(() => fake.last.tokens("Some words"));
  await screen.findByText("Some words");
  await user.keyboard("{Escape}");
  await screen.findByText("Stopped.");
  expect(fake.last.aborted).toBe(true);
  await user.click(button("Copy answer"));
  expect(await navigator.clipboard.readText()).toBe("Some words");
});

test("an edited message is sent again", async () => {
  await open();
  await say("Hi");
  await finish("Hello.");
  await user.click(button("Edit message"));
  const editor = screen.getByRole("textbox", { name: "Edited text" });
  await user.clear(editor);
  await user.type(editor, "Bye{Enter}");
  await waitFor(() => expect(fake.asked).toHaveLength(2));
  expect(fake.last.body).toEqual({ messages: [{ role: "user", content: "Bye" }] });
  expect(screen.getAllByRole("article", { name: "You" })).toHaveLength(1);
});

test("a reload keeps the history, and the draft of each conversation", async () => {
  await open();
  await say("First question");
  await finish("First answer.");
  await user.type(box(), "half a thought");
  await user.click(button("New conversation"));
  await user.type(box(), "another draft");
  await reload();
  expect(box().value).toBe("another draft");
  await user.click(button("First question"));
  expect(box().value).toBe("half a thought");
  expect(answers()[0]!.textContent).toContain("First answer.");
});

test("a server that goes away: said, waited for, and sent when it is back", async () => {
  await open();
  fake.isHere = false;
  await user.type(box(), "Are you there?");
  await user.keyboard("{Enter}");
  const banner = screen.getByTestId("connection");
  await waitFor(() => expect(banner.textContent).toMatch(/The server is away; trying again/));
  expect(screen.getByText(/sent again when the server is back|Will be sent when the server is back/)).toBeTruthy();
  expect(box().disabled).toBe(false);
  await user.type(box(), "still typing");
  fake.isHere = true;
  await user.click(button("Try now"));
  await waitFor(() => expect(fake.asked.length).toBeGreaterThan(0));
  await finish("Yes.");
  expect(banner.textContent).toBe("");
  expect(box().value).toBe("still typing");
});

test("cut off: what had come is shown, and Continue asks anew", async () => {
  await open();
  await say("Hi");
  act(() => fake.last.tokens("Half an"));
  await screen.findByText("Half an");
  act(() => fake.last.drop());
  await screen.findByText(/Cut off/);
  await user.click(button("Continue"));
  await waitFor(() => expect(fake.asked).toHaveLength(2));
});

test("an error has a sentence and Try again", async () => {
  await open();
  fake.refusal = Response.json({ error: "no" }, { status: 429, headers: { "retry-after": "3" } });
  await say("Hi");
  await screen.findByText("The server's queue is full. Try again in 3 s.");
  await user.click(button("Try again"));
  await waitFor(() => expect(fake.asked).toHaveLength(2));
});

test("a key is asked for, and what was refused for want of it is sent", async () => {
  fake.key = "secret";
  await open();
  const field = await screen.findByLabelText("API key");
  await user.type(field, "wrong{Enter}");
  await screen.findByText("The server does not take this key.");
  await user.clear(screen.getByLabelText("API key"));
  await user.type(screen.getByLabelText("API key"), "secret{Enter}");
  await waitFor(() => expect(screen.getByTestId("state").textContent).toBe("Ready"));
  await say("Hi");
  await finish("Hello.");
});

test("raw completion: running text that goes on", async () => {
  await open();
  await user.click(screen.getByRole("switch", { name: "Raw completion" }));
  await say("Once *upon*");
  expect(fake.last.body).toEqual({ text: "Once *upon*", raw: true });
  await finish(" a time");
  expect(screen.getByRole("log").querySelector("em")).toBeNull();
  await user.click(button("Continue"));
  await waitFor(() => expect(fake.last.body).toEqual({ text: "Once *upon* a time", raw: true }));
});

test("a base model offers nothing else than raw completion", async () => {
  fake.config = { ...fake.config, chat: false };
  await open();
  const toggle = await screen.findByRole("switch", { name: "Raw completion" });
  await waitFor(() => expect(toggle).toHaveProperty("checked", true));
  expect(toggle).toHaveProperty("disabled", true);
});

test("parameters are sent when they are changed, and begin the next conversation", async () => {
  await open();
  await user.click(button("Parameters"));
  expect(button("Parameters").getAttribute("aria-expanded")).toBe("true");
  await user.type(screen.getByLabelText("Seed"), "7");
  await user.type(screen.getByLabelText("System prompt"), "Be brief.");
  await say("Hi");
  expect(fake.last.body).toEqual({ messages: [{ role: "system", content: "Be brief." }, { role: "user", content: "Hi" }], seed: 7 });
  await finish("Ho.");
  await user.click(button("New conversation"));
  expect(screen.getByLabelText("Seed")).toHaveProperty("value", "7");
});

test("rename, delete, undo", async () => {
  await open();
  await say("Hi");
  await finish("Ho.");
  await user.click(button("Rename conversation"));
  await user.clear(screen.getByLabelText("Name"));
  await user.type(screen.getByLabelText("Name"), "Greeting{Enter}");
  button("Greeting");
  await user.click(button("Delete conversation"));
  expect(screen.queryByRole("button", { name: "Greeting" })).toBeNull();
  await user.click(button("Undo"));
  button("Greeting");
  expect(answers()).toHaveLength(1);
});

test("export and import; a bad file changes nothing and says why", async () => {
  const saved: Blob[] = [];
  URL.createObjectURL = (blob) => (saved.push(blob as Blob), "blob:x");
  URL.revokeObjectURL = () => undefined;
  vi.spyOn(HTMLAnchorElement.prototype, "click").mockImplementation(() => undefined);
  const store = await open();
  await say("Hi");
  await finish("Ho.");
  for (const name of ["Export conversation", "Export as Markdown", "Export all"]) await user.click(button(name));
  expect(saved.map(({ type }) => type)).toEqual(["application/json", "text/markdown", "application/json"]);
  const text = exportJson(store.get().book.conversations);
  const file = (content: string) => new File([content], "x.json", { type: "application/json" });
  fireEvent.change(screen.getByTestId("file"), { target: { files: [file("{}")] } });
  await screen.findByText(/Nothing was imported\. The file is JSON, but/);
  expect(store.get().book.conversations).toHaveLength(1);
  fireEvent.change(screen.getByTestId("file"), { target: { files: [file(text)] } });
  await screen.findByText("Imported 0 conversations. 1 was here already.");
  fireEvent.change(screen.getByTestId("file"), { target: { files: [file(text.replace(/"changed": \d+/, '"changed": 1'))] } });
  await screen.findByText("Imported 1 conversation.");
  expect(store.get().book.conversations).toHaveLength(2); // an older state of the same one does not replace it
});

test("the cluster, its table, and Reconnect where a rank is away", async () => {
  fake.cluster = cluster([rank(0), rank(1, { kind: "ipad", state: "away", host: "ipad" })]);
  await open();
  const toggle = button("Cluster");
  if (toggle.getAttribute("aria-expanded") === "false") await user.click(toggle);
  await screen.findByTestId("rank-1");
  expect(screen.getByRole("img", { name: /^The ring: / })).toBeTruthy();
  const table = within(screen.getByRole("table", { hidden: true }));
  expect(table.getAllByRole("row", { hidden: true })).toHaveLength(3);
  screen.getByText("Rank 1 (ipad) is away.");
  await user.click(button("Reconnect"));
  await screen.findByText("The iPad is back. Dialled again.");
});

test("the theme is chosen and kept", async () => {
  await open();
  await user.selectOptions(screen.getByLabelText("Theme"), "dark");
  expect(document.documentElement.dataset["theme"]).toBe("dark");
  await reload();
  expect(screen.getByLabelText("Theme")).toHaveProperty("value", "dark");
  await user.selectOptions(screen.getByLabelText("Theme"), "system");
  expect(document.documentElement.dataset["theme"]).toBeUndefined();
});
