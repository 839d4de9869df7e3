"""A real browser on the page, as a person would sit before it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from scripts.build_page import ROOT, WEB

SCREENS = ROOT / "build" / "screens"
"""Where screenshots are left, for whoever looks after the tests."""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)
AXE = WEB / "node_modules" / "axe-core" / "axe.min.js"


def need(what: str) -> None:
    """Without a browser or npm there is nothing to test with; who wants to be sure says so in the environment."""
    if os.environ.get("MPGPT_TEST_PAGE") == "required":
        pytest.fail(what)
    pytest.skip(what)


@contextmanager
def browsing() -> Iterator[Browser]:
    found = [path for name in CHROMIUM if (path := shutil.which(name))]
    if not found:
        need("there is no Chromium: apt-get install chromium, or another of " + ", ".join(CHROMIUM))
    with sync_playwright() as playwright:
        # As root, which containers are, Chromium runs without its sandbox only.
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass(slots=True)
class Tab:
    """A tab on the page. What the browser complains of is kept, and fails the test at its end."""

    page: Page
    url: str
    complaints: list[str]

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def message(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message")

    @property
    def answers(self) -> Locator:
        return self.page.get_by_role("article", name="Answer")

    @property
    def questions(self) -> Locator:
        return self.page.get_by_role("article", name="You")

    @property
    def figures(self) -> Locator:
        return self.page.get_by_test_id("figures")

    def say(self, text: str) -> None:
        self.message.fill(text)
        self.button("Send").click()

    def ask(self, text: str) -> None:
        """Say it, and wait for the whole answer."""
        before = self.figures.count()
        self.say(text)
        self.figures.nth(before).wait_for()

    def shoot(self, name: str) -> None:
        SCREENS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENS / f"{name}.png")

    def faults(self) -> list[str]:
        """Serious and critical ones that axe finds on what is shown now."""
        self.page.evaluate(AXE.read_text(encoding="utf-8") + "; null")
        found: Any = self.page.evaluate("axe.run()")
        return [
            f"{one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes']]}"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]

    @property
    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        wide: int = self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        return wide


@contextmanager
def tab(browser: Browser, url: str, *, expected: str | None = None, **more: Any) -> Iterator[Tab]:
    """A tab in a browser that knows nothing yet. It may complain of what is ``expected``, and of nothing else."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **more})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    opened = Tab(page, url, [])
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    page.on(
        "console",
        lambda said: opened.complaints.append(said.text) if said.type in ("error", "warning") else None,
    )
    page.goto(url)
    page.get_by_role("textbox", name="Message").wait_for()
    try:
        yield opened
    finally:
        context.close()
    complaints = [one for one in opened.complaints if expected is None or expected not in one]
    assert not complaints, complaints


def downloaded(opened: Tab, button: str) -> str:
    with opened.page.expect_download() as download:
        opened.button(button).click()
    return Path(download.value.path()).read_text(encoding="utf-8")
