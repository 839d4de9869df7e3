"""The page's own tests and types, as npm runs them; and the build, made again from its sources."""

from __future__ import annotations

from scripts.build_page import MARK, PAGE, WEB, run_npm


def test_the_pages_own_tests(npm_modules: None) -> None:
    run_npm("run", "check")
    run_npm("test")


def test_the_committed_page_is_what_its_sources_give(npm_modules: None) -> None:
    """Whoever reads the sources reads what runs."""
    out = WEB.parent.parent / "build" / "page"
    run_npm("exec", "--", "vite", "build", "--outDir", str(out), "--emptyOutDir", "--logLevel", "warn")
    made = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    committed = {path.relative_to(PAGE): path.read_bytes() for path in PAGE.rglob("*") if path.is_file()}
    committed.pop(MARK.relative_to(PAGE))
    assert made == committed, "make page"


def test_no_index_is_named_in_the_lock_file() -> None:
    assert "resolved" not in (WEB / "package-lock.json").read_text()
