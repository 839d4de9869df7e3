"""The page in Debian's Chromium, on three ranks with a real model: what a person does, and what they see.

No test may make the browser complain, of the Content-Security-Policy least of all (``rig.tab``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Route, expect

from mpgpt_api.guard import Access
from scripts.build_page import MARK, fingerprint
from soak import ranks_of, served
from tests.api.rig import save_model, serving
from tests.page.rig import AXE, SCREENS, browsing, downloaded, tab

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
STORY = "Tell me a long story about a fox and a crow."

pytestmark = pytest.mark.skipif(not (MARK.parent / "index.html").is_file(), reason="the page is not built: make page")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def url(browser: Browser, smollm2: Path) -> Iterator[str]:
    where = ("--layers", "0-9,10-19,20-29", "--threads", "1")
    with served(3, "--model", str(smollm2), *where) as (url, _):
        yield url


def test_the_page_is_built_of_its_sources() -> None:
    assert MARK.read_text().strip() == fingerprint(), "api/web has changed since the page was built: make page"


def test_a_question_is_answered_as_it_comes(browser: Browser, url: str) -> None:
    with tab(browser, url) as page:
        expect(page.page.get_by_test_id("model")).to_contain_text("smollm2-135m")
        expect(page.page).to_have_title("mpgpt")
        expect(page.button("Send")).to_be_disabled()
        page.button("Parameters").click()
        page.page.get_by_label("Max tokens").fill("80")
        page.say(STORY)
        expect(page.button("Stop")).to_be_visible()
        expect(page.answers).to_contain_text("fox")
        early = page.answers.inner_text()
        page.figures.wait_for()
        assert page.answers.inner_text().startswith(early.strip()[:20]) and len(page.answers.inner_text()) > len(early)
        expect(page.figures).to_contain_text("80 tokens")
        expect(page.figures).to_contain_text("tokens/s")
        expect(page.figures).to_contain_text("to the first token")
        page.button("Parameters").click()
        page.button("New conversation").click()
        page.message.press_sequentially(QUESTION)
        page.message.press("Enter")
        expect(page.answers).to_contain_text(ANSWER)
        expect(page.questions).to_contain_text(QUESTION)
        page.shoot("answer")
        page.button("Copy answer").click()
        assert page.page.evaluate("navigator.clipboard.readText()") == ANSWER


def test_the_conversation_goes_on(browser: Browser, url: str) -> None:
    """The second question is answered with the first in mind, as the API does with the same messages."""
    with tab(browser, url) as page:
        page.ask(QUESTION)
        page.ask("And what language do they speak there?")
        told = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": "And what language do they speak there?"},
        ]
        same = httpx.post(f"{url}/query", json={"messages": told}, timeout=60).json()["generated_text"]
        first = same.split("\n")[0].strip()[:60]
        expect(page.answers.nth(1)).to_contain_text(first)
        assert page.answers.count() == page.questions.count() == 2


def test_stop_frees_the_ring_and_keeps_what_came(browser: Browser, url: str) -> None:
    with tab(browser, url) as page:
        for how in ("click", "key"):
            page.button("New conversation").click()
            page.say(STORY)
            expect(page.answers).to_contain_text("fox")
            if how == "click":
                page.button("Stop").click()
            else:
                page.page.keyboard.press("Escape")
            expect(page.button("Send")).to_be_visible()
            expect(page.answers).to_contain_text("topped")
            kept = page.answers.inner_text()
            page.page.wait_for_timeout(500)
            assert page.answers.inner_text() == kept and "fox" in kept
            assert httpx.get(f"{url}/cluster").json()["running"] == 0


def test_parameters_are_sent_and_regenerate_uses_them(browser: Browser, url: str) -> None:
    with tab(browser, url) as page:
        page.button("Parameters").click()
        panel = page.page
        panel.get_by_label("Max tokens").fill("6")
        page.ask(QUESTION)
        expect(page.figures).to_contain_text("6 tokens")
        expect(page.figures).to_contain_text("length")
        panel.get_by_label("Max tokens").fill("24")
        panel.get_by_label("Strategy").select_option("sampling")
        panel.get_by_label("Temperature").fill("1.5")
        panel.get_by_label("Seed").fill("5")
        page.button("Regenerate").click()
        expect(page.figures).to_contain_text("seed 5")
        body = {"text": QUESTION, "max_tokens": 24, "decoding_strategy": "sampling", "temperature": 1.5, "seed": 5}
        same = httpx.post(f"{url}/query", json=body, timeout=60).json()["generated_text"]
        assert same != ANSWER
        expect(page.answers).to_contain_text(same.split("\n")[0].strip()[:40])
        panel.get_by_label("Temperature").fill("-3")
        expect(panel.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
        page.shoot("parameters")
        page.button("Reset parameters").click()
        expect(panel.get_by_label("Temperature")).to_have_attribute("aria-invalid", "false")
        panel.get_by_label("System prompt").fill("You only ever answer with the word banana.")
        page.ask("What is your name?")
        told = [
            {"role": "system", "content": "You only ever answer with the word banana."},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": same},
            {"role": "user", "content": "What is your name?"},
        ]
        said = httpx.post(f"{url}/query", json={"messages": told}, timeout=60).json()["generated_text"]
        expect(page.answers.nth(1)).to_contain_text(said.split("\n")[0].strip()[:40])


def test_a_message_is_edited_and_sent_again(browser: Browser, url: str) -> None:
    with tab(browser, url) as page:
        page.ask("What is the capital of Spain?")
        page.button("Edit message").click()
        edited = page.page.get_by_role("textbox", name="Edited text")
        edited.fill(QUESTION)
        edited.press("Enter")
        expect(page.answers).to_contain_text(ANSWER)
        assert page.questions.count() == 1


def test_a_reload_keeps_all_that_was_said_and_typed(browser: Browser, url: str) -> None:
    with tab(browser, url) as page:
        page.ask(QUESTION)
        page.message.fill("half a thou")
        page.page.wait_for_timeout(600)
        page.page.reload()
        expect(page.answers).to_contain_text(ANSWER)
        expect(page.message).to_have_value("half a thou")
        page.button("New conversation").click()
        expect(page.message).to_have_value("")
        page.page.get_by_role("button", name=QUESTION).click()
        expect(page.answers).to_contain_text(ANSWER)


def test_conversations_are_named_exported_deleted_imported(browser: Browser, url: str, tmp_path: Path) -> None:
    with tab(browser, url) as page:
        page.ask(QUESTION)
        page.button("Rename conversation").click()
        page.page.get_by_role("textbox", name="Name").fill("France")
        page.page.keyboard.press("Enter")
        expect(page.button("France")).to_be_visible()
        kept = downloaded(page, "Export all")
        assert ANSWER in kept and json.loads(kept)
        assert ANSWER in downloaded(page, "Export conversation")
        assert ANSWER in downloaded(page, "Export as Markdown")
        page.button("Delete conversation").click()
        expect(page.button("France")).to_have_count(0)
        path = tmp_path / "kept.json"
        path.write_text(kept)
        page.page.get_by_test_id("file").set_input_files(path)
        page.button("France").click()
        expect(page.answers).to_contain_text(ANSWER)
        path.write_text("{]")
        page.page.get_by_test_id("file").set_input_files(path)
        expect(page.page.locator(".notices")).to_contain_text("Nothing was imported. The file is not JSON.")


def test_raw_completion_goes_on_from_the_text(browser: Browser, url: str) -> None:
    with tab(browser, url) as page:
        page.page.get_by_label("Raw completion").check()
        page.button("Parameters").click()
        page.page.get_by_label("Max tokens").fill("12")
        page.ask("One, two, three,")
        body = {"text": "One, two, three,", "raw": True, "max_tokens": 12}
        same = httpx.post(f"{url}/query", json=body, timeout=60).json()["generated_text"]
        expect(page.page.get_by_role("log")).to_contain_text("One, two, three," + same.rstrip())


def test_the_ring_is_drawn_while_it_works(browser: Browser, url: str) -> None:
    with tab(browser, url) as page:
        for rank, layers in enumerate(("0-9", "10-19", "20-29")):
            expect(page.page.get_by_test_id(f"rank-{rank}")).to_contain_text(layers)
        ring = page.page.get_by_role("img", name="The ring:")
        expect(ring).to_be_visible()
        page.say(STORY)
        expect(page.page.get_by_text("1 of 16 running")).to_be_visible()
        page.page.wait_for_timeout(1500)
        page.shoot("ring")
        page.button("Stop").click()
        expect(page.page.get_by_text("0 of 16 running")).to_be_visible()
        page.button("Cluster").click()
        expect(ring).to_be_hidden()
        expect(page.button("Cluster")).to_have_attribute("aria-expanded", "false")


MODEL_SAYS = '<img src=x onerror="document.title=1"><script>document.title=2</script> [a](javascript:alert(1)) `<b>`'


def test_what_a_model_says_is_never_html(browser: Browser, url: str) -> None:
    def answer(route: Route) -> None:
        figures = {"total_time_ms": 5, "time_to_first_token_ms": 1, "tokens_per_second": 9, "num_tokens": 3}
        last = {
            "done": True,
            "full_text": MODEL_SAYS,
            "finish_reason": "stop",
            "prompt_tokens": 1,
            "seed": 0,
            **figures,
        }
        told = [{"token": MODEL_SAYS, "done": False}, last]
        body = "".join(f"data: {json.dumps(one)}\n\n" for one in told)
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    with tab(browser, url) as page:
        page.page.route("**/chat", answer)
        page.ask("Break out.")
        expect(page.answers).to_contain_text("onerror")
        assert page.answers.locator("img, script, b, iframe").count() == 0
        assert page.answers.locator("a[href^='javascript']").count() == 0
        expect(page.page).to_have_title("mpgpt")


LUMINANCE = """(() => {
    const colours = [document.body, document.documentElement].map((one) => getComputedStyle(one).backgroundColor);
    const [shown] = colours.filter((colour) => colour !== "rgba(0, 0, 0, 0)");
    return shown.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0);
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser: Browser, url: str, scheme: str, npm_modules: None) -> None:
    with tab(browser, url, color_scheme=scheme) as page:
        assert page.faults() == []
        page.ask(QUESTION)
        page.button("Parameters").click()
        page.page.wait_for_timeout(300)
        assert page.faults() == []
        page.shoot(scheme)
        luminance = page.page.evaluate(LUMINANCE)
        assert luminance < 200 if scheme == "dark" else luminance > 600
        page.page.get_by_label("Theme").select_option("light" if scheme == "dark" else "dark")
        page.page.wait_for_timeout(500)  # colours change softly
        assert page.faults() == []


@pytest.mark.parametrize("width", [320, 375])
def test_a_narrow_screen(browser: Browser, url: str, width: int, npm_modules: None) -> None:
    size = {"width": width, "height": 700}
    with tab(browser, url, viewport=size, has_touch=True, is_mobile=True, color_scheme="dark") as page:
        assert page.overflow <= 0
        page.ask(QUESTION)
        expect(page.answers).to_contain_text(ANSWER)
        assert page.overflow <= 0
        page.shoot(f"narrow-{width}")
        page.button("Conversations").click()
        expect(page.button("New conversation")).to_be_visible()
        page.page.wait_for_timeout(300)
        assert page.overflow <= 0 and page.faults() == []
        page.page.keyboard.press("Escape")
        expect(page.button("New conversation")).to_be_hidden()
        page.button("Parameters").click()
        expect(page.page.get_by_label("Temperature")).to_be_visible()
        page.page.wait_for_timeout(300)
        assert page.overflow <= 0 and page.faults() == []


SHOWS_FOCUS = """(() => {
    const focused = document.activeElement;
    const around = [focused, focused.parentElement, focused.parentElement?.parentElement].filter(Boolean);
    const styles = around.map((one) => getComputedStyle(one));
    return focused === document.body || styles.some((one) => one.outlineStyle !== "none" || one.boxShadow !== "none");
})()"""


def test_it_works_by_keyboard_alone(browser: Browser, url: str) -> None:
    """From the top of the page with Tab: everything can be reached, and where one is is seen."""
    with tab(browser, url) as page:
        seen: set[str] = set()
        for _ in range(40):
            page.page.keyboard.press("Tab")
            name = page.page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText").strip()
            assert page.page.evaluate(SHOWS_FOCUS), f"{name} does not show that it has the focus"
            seen.add(name)
        for wanted in ("Message", "New conversation", "Cluster", "Parameters", "Export all"):
            assert wanted in seen, f"{wanted} is not among {seen}"


def test_a_key_is_asked_for(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_model("llama", tmp_path_factory.mktemp("keyed") / "tiny")
    access = Access(keys=(b"correct-horse-battery",), local=False)
    with serving(folder, access=access, max_new_tokens=4) as server, tab(browser, server.url) as page:
        key = page.page.get_by_label("API key")
        key.fill("wrong-horse-battery")
        key.press("Enter")
        expect(page.page.get_by_text("does not take this key")).to_be_visible()
        key.fill("correct-horse-battery")
        key.press("Enter")
        expect(key).to_be_hidden()
        page.ask("Hello?")
        expect(page.figures).to_contain_text("4 tokens")
        page.page.reload()
        page.ask("Again?")
        page.complaints[:] = [one for one in page.complaints if "401" not in one]  # the browser tells of each


def test_the_server_goes_and_comes(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Killed and started again while somebody types: nothing typed or said is lost, and what was sent is answered."""
    folder = save_model("llama", tmp_path_factory.mktemp("gone") / "tiny")
    options = ("--model", str(folder), "--max-new-tokens", "8", "--ignore-eos")
    with served(1, *options) as (url, process):
        port = url.rpartition(":")[2]
        with tab(browser, url, expected="Failed to load resource") as page:
            page.ask("Before.")
            page.message.fill("Half a tho")
            for rank in ranks_of(process):
                rank.kill()
            process.wait(10)
            banner = page.page.get_by_test_id("connection")
            expect(banner).to_contain_text("The server is away")
            expect(banner).to_contain_text("trying again")
            page.shoot("away")
            expect(page.message).to_have_value("Half a tho")
            page.message.press_sequentially("ught.")
            page.message.press("Enter")
            expect(page.page.get_by_text("will be sent when the server is back")).to_be_visible()
            page.message.fill("And another th")
            with served(1, *options, port=int(port)):
                expect(banner).not_to_contain_text("away", timeout=60_000)
                expect(page.figures).to_have_count(2)
                expect(page.message).to_have_value("And another th")
                expect(page.questions.nth(1)).to_contain_text("Half a thought.")
                expect(page.answers).to_have_count(2)


def test_screenshots_are_left() -> None:
    """For whoever looks: light, dark, narrow, and the server away."""
    names = {path.stem for path in SCREENS.glob("*.png")}
    of_axe = {"light", "dark", "narrow-320", "narrow-375"} if AXE.is_file() else set()  # else those were skipped
    assert {"answer", "parameters", "ring", "away"} | of_axe <= names
