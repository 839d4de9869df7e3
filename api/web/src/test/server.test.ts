import { afterEach, beforeEach, expect, test, vi } from "vitest";
import { BACK_OFF_MS, Server } from "../server";
import { FakeServer } from "./fake";

let end: () => void = () => undefined;
beforeEach(() => void vi.useFakeTimers());
afterEach(() => {
  end();
  vi.useRealTimers();
});

test("tries again after 0.5 s, and ever later up to 10 s; then it is here, with its config", async () => {
  const fake = new FakeServer();
  fake.isHere = false;
  const server = new Server();
  end = server.start();
  await vi.advanceTimersByTimeAsync(0);
  for (const [at, pause] of [...BACK_OFF_MS, 10_000].entries()) {
    expect(fake.paths).toHaveLength(at + 1);
    expect(server.get()).toMatchObject({ phase: "away", nextTry: Date.now() + pause });
    await vi.advanceTimersByTimeAsync(pause);
  }
  fake.isHere = true;
  server.tryNow();
  await vi.advanceTimersByTimeAsync(0);
  expect(server.get()).toMatchObject({ phase: "here", nextTry: null, config: { model: "org/tiny-chat" } });
  fake.isHere = false;
  await vi.advanceTimersByTimeAsync(5000);
  expect(server.get()).toMatchObject({ phase: "away", nextTry: Date.now() + 500 });
});

test("another model behind the same address is noticed", async () => {
  const fake = new FakeServer();
  const server = new Server();
  end = server.start();
  await vi.advanceTimersByTimeAsync(0);
  fake.config = { ...fake.config, model: "other" };
  fake.health = { ...fake.health, model: "other" };
  await vi.advanceTimersByTimeAsync(5000);
  expect(server.get().config?.model).toBe("other");
});

test("a hidden page does not ask while the server is here", async () => {
  const fake = new FakeServer();
  const server = new Server();
  end = server.start();
  await vi.advanceTimersByTimeAsync(0);
  const asked = fake.paths.length;
  const hidden = vi.spyOn(document, "hidden", "get").mockReturnValue(true);
  await vi.advanceTimersByTimeAsync(60_000);
  expect(fake.paths).toHaveLength(asked);
  hidden.mockReturnValue(false);
  document.dispatchEvent(new Event("visibilitychange"));
  await vi.advanceTimersByTimeAsync(0);
  expect(fake.paths).toHaveLength(asked + 1);
});

test("a key: asked for, refused, taken; kept for the tab, or for the device", async () => {
  const fake = new FakeServer();
  fake.key = "secret";
  const server = new Server();
  end = server.start();
  await vi.advanceTimersByTimeAsync(0);
  expect(server.get()).toMatchObject({ phase: "locked", refused: false });
  server.setKey("wrong", false);
  await vi.advanceTimersByTimeAsync(0);
  expect(server.get()).toMatchObject({ phase: "locked", refused: true });
  server.setKey(" secret ", false);
  await vi.advanceTimersByTimeAsync(0);
  expect(server.get()).toMatchObject({ phase: "here", refused: false });
  expect(sessionStorage.getItem("mpgpt.key")).toBe("secret");
  expect(localStorage.getItem("mpgpt.key")).toBeNull();
  server.setKey("secret", true);
  expect(localStorage.getItem("mpgpt.key")).toBe("secret");
  expect(new Server().key).toBe("secret");
});
