import { render, screen } from "@testing-library/react";
import userEvent from "@testing-library/user-event";
import { expect, test } from "vitest";
import { Markdown, safeAddress } from "../Markdown";

const shown = (text: string): HTMLElement => render(<Markdown text={text} />).container;

test("what a model writes is never HTML", () => {
  const page = shown('<script>alert(1)</script>\n\n<img src=x onerror="alert(1)">\n\nin <b onclick="x()">line</b> <iframe src="//x"></iframe>');
  expect(page.querySelector("script, img, b, iframe, [onclick], [onerror]")).toBeNull();
  expect(page.textContent).toContain('<b onclick="x()">line</b>');
});

test.each(["javascript:alert(1)", "JaVaScRiPt:alert(1)", " javascript:x", "data:text/html,x", "vbscript:x", "file:///etc", "//host/x", "/chat", "#x", "java\nscript:x"])(
  "no link to %s",
  (address) => expect(safeAddress(address)).toBe(""),
);

test("links to http, https and mailto, without a way back", () => {
  const page = shown("[a](https://x.org) [b](mailto:a@x.org) [c](javascript:alert(1)) <javascript:alert(1)> www.x.org");
  const links = [...page.querySelectorAll("a")];
  expect(links.map(({ href }) => href)).toEqual(["https://x.org/", "mailto:a@x.org", "http://www.x.org/"]);
  for (const link of links) expect([link.rel, link.target]).toEqual(["noreferrer noopener", "_blank"]);
});

test("images are not loaded: their text stands for them", () => {
  const page = shown("![a cat](https://x.org/cat.png) ![][r]\n\n[r]: https://x.org/r.png");
  expect(page.querySelector("img")).toBeNull();
  expect(page.textContent).toContain("a cat");
});

test("code has its language's name, and is copied as it is", async () => {
  const user = userEvent.setup();
  shown("```python\nif a < b:\n    print('&')\n```");
  expect(screen.getByText("python")).toBeTruthy();
  await user.click(screen.getByRole("button", { name: "Copy code" }));
  expect(await navigator.clipboard.readText()).toBe("if a < b:\n    print('&')");
  expect(screen.getByText("Copied")).toBeTruthy();
});

test("tables, tasks and headings below the page's own", () => {
  const page = shown("# One\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- [x] done\n- [ ] open");
  expect(screen.getByRole("heading", { level: 3, name: "One" })).toBeTruthy();
  expect(page.querySelectorAll("td")).toHaveLength(2);
  expect(screen.getByRole("img", { name: "done" })).toBeTruthy();
  expect(page.querySelector("input")).toBeNull();
});
