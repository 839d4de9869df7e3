import { render, screen } from "@testing-library/react";
import userEvent from "@testing-library/user-event";
import { useState } from "react";
import { describe, expect, test } from "vitest";
import type { Conversation, Message } from "../conversations";
import { check, readChanged, requestBody, type Changed } from "../parameters";
import { Parameters } from "../Parameters";
import { CONFIG } from "./fake";

const conversation = (parameters: Changed): Conversation => ({
  id: "c", title: "", created: 0, changed: 0, raw: false, parameters, messages: [],
});
const said = (role: "user" | "assistant", text: string): Message =>
  role === "user"
    ? { role, id: text, text }
    : { role, id: text, text, state: "done", owner: null, resent: false, figures: null, problem: null };

describe("check", () => {
  test.each([
    ["max_tokens", "64", 64],
    ["max_tokens", " 512 ", 512],
    ["temperature", "0", 0],
    ["temperature", "0,5", 0.5],
    ["top_p", "1", 1],
    ["top_k", "0", 0],
    ["seed", "9223372036854775807", "9223372036854775807"],
    ["seed", "007", "7"],
    ["decoding_strategy", "greedy", "greedy"],
  ] as const)("%s takes %s", (field, typed, value) => {
    expect(check(field, typed, CONFIG)).toEqual({ value, problem: null });
  });

  test.each([
    ["max_tokens", "0", /from 1 to 512, the model's context/],
    ["max_tokens", "513", /from 1 to 512/],
    ["max_tokens", "1.5", /whole number/],
    ["temperature", "-1", /from 0 to 100/],
    ["temperature", "hot", /A number/],
    ["temperature", "Infinity", /A number/],
    ["top_p", "0", /above 0/],
    ["top_p", "1.1", /at most 1/],
    ["top_k", "-3", /whole number/],
    ["seed", "9223372036854775808", /2\^63/],
    ["seed", "-1", /whole number/],
    ["decoding_strategy", "beam", /none of/],
  ] as const)("%s does not take %s", (field, typed, sentence) => {
    expect(check(field, typed, CONFIG).problem).toMatch(sentence);
  });

  test("nothing typed is the server's default", () => {
    expect(check("temperature", "  ", CONFIG)).toEqual({ value: undefined, problem: null });
  });
});

test("from a file comes what is right, and the rest is left out", () => {
  expect(readChanged({ temperature: 2, top_p: 7, seed: 5, system: "Be brief.", other: 1, top_k: null })).toEqual({
    temperature: 2, seed: "5", system: "Be brief.",
  });
  expect(readChanged("x")).toEqual({});
});

describe("the request", () => {
  const talk = [said("user", "a"), said("assistant", "b"), said("user", "c")];

  test("sends only what was changed", () => {
    expect(JSON.parse(requestBody(conversation({}), talk, false))).toEqual({
      messages: [{ role: "user", content: "a" }, { role: "assistant", content: "b" }, { role: "user", content: "c" }],
    });
    expect(JSON.parse(requestBody(conversation({ temperature: 0, system: "S" }), talk.slice(0, 1), false))).toEqual({
      messages: [{ role: "system", content: "S" }, { role: "user", content: "a" }], temperature: 0,
    });
  });

  test("writes all digits of a seed", () => {
    expect(requestBody(conversation({ seed: "9223372036854775807" }), talk, false)).toContain('"seed":9223372036854775807}');
  });

  test("leaves out empty answers, and joins questions that follow one another", () => {
    const failed = [said("user", "a"), said("assistant", ""), said("user", "c")];
    expect(JSON.parse(requestBody(conversation({}), failed, false))).toEqual({ messages: [{ role: "user", content: "a\n\nc" }] });
  });

  test("raw is all of the text, as it stands, and no system prompt", () => {
    const text = [said("user", "Once "), said("assistant", "upon "), said("user", "a\n")];
    expect(JSON.parse(requestBody(conversation({ system: "S" }), text, true))).toEqual({ text: "Once upon a\n", raw: true });
  });
});

test("the panel says what is wrong beside the field, keeps the last right value, and resets", async () => {
  let now: Changed = {};
  const Panel = () => {
    const [changed, set] = useState<Changed>({});
    now = changed;
    return <Parameters changed={changed} config={CONFIG} isRaw={false} onChange={set} />;
  };
  const user = userEvent.setup();
  render(<Panel />);
  const field = screen.getByLabelText("Max tokens") as HTMLInputElement;
  expect(field.placeholder).toBe("64");
  await user.type(field, "51");
  expect(now).toEqual({ max_tokens: 51 });
  await user.type(field, "3");
  expect(field.getAttribute("aria-invalid")).toBe("true");
  expect(document.getElementById(field.getAttribute("aria-describedby") ?? "")?.textContent).toMatch(/from 1 to 512/);
  expect(now).toEqual({ max_tokens: 51 });
  await user.selectOptions(screen.getByLabelText("Strategy"), "greedy");
  await user.type(screen.getByLabelText("System prompt"), "Be brief.");
  expect(now).toEqual({ max_tokens: 51, decoding_strategy: "greedy", system: "Be brief." });
  await user.click(screen.getByRole("button", { name: "Reset parameters" }));
  expect(now).toEqual({});
  expect((screen.getByLabelText("Max tokens") as HTMLInputElement).value).toBe("");
});
