"""Which code this is: the same for the same files, another for any other, and its commit by every way git keeps it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpgpt import __version__
from mpgpt.transport import code_version
from tests.support.launch import ENV, ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the packages, of which ``code_version`` takes itself to be a part."""
    for package in code_version.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "page"))
    monkeypatch.setattr(code_version, "__file__", str(tmp_path / "mpgpt" / "transport" / "code_version.py"))
    return tmp_path


def test_the_same_files_are_the_same_code(checkout: Path) -> None:
    code = code_version.code_id()
    assert len(code) == 12 and int(code, 16) >= 0
    shutil.rmtree(checkout / "api" / "mpgpt_api" / "__pycache__", ignore_errors=True)
    for name in ("notes.txt", "mpgpt/__pycache__/x.pyc", "mpgpt/._cli.py", "tests/x.py"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_bytes(b"\xff")
    (checkout / "mpgpt" / ".#cli.py").symlink_to("nobody@nowhere.1")  # what Emacs leaves
    assert code_version.code_id() == code
    assert _real_code() == code


def _real_code() -> str:
    run = subprocess.run(
        [sys.executable, "-c", "from mpgpt.transport import code_version; print(code_version.code_id())"],
        cwd=ROOT, env=ENV | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.strip()


@pytest.mark.parametrize("package", code_version.PACKAGES)
def test_another_file_is_other_code(checkout: Path, package: str) -> None:
    code = code_version.code_id()
    path = checkout / package / "__init__.py"
    path.write_bytes(path.read_bytes() + b"\n")
    changed = code_version.code_id()
    path.rename(path.with_name("renamed.py"))
    assert len({code, changed, code_version.code_id()}) == 3


def test_installed_packages_are_the_same_code(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    code, site = code_version.code_id(), tmp_path_factory.mktemp("site")
    for package in code_version.PACKAGES:
        shutil.copytree(checkout / package, site / Path(package).name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_version, "__file__", str(site / "mpgpt" / "transport" / "code_version.py"))
        assert code_version.code_id() == code
        assert code_version.describe() == f"{__version__} (code {code})"


def test_a_checkouts_commit(checkout: Path) -> None:
    def git(*arguments: str, cwd: Path = checkout) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        run = subprocess.run(["git", *identity, *arguments], cwd=cwd, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    git("init", "-b", "feature/größe")
    assert code_version.describe() == f"{__version__} (code {code_version.code_id()})", "nothing is committed yet"
    git("commit", "--allow-empty", "-m", "x")
    head = git("rev-parse", "HEAD")
    said = f"{__version__} (commit {head[:7]}, code {code_version.code_id()})"
    assert code_version.describe() == said
    git("pack-refs", "--all")
    assert not (checkout / ".git" / "refs" / "heads" / "feature" / "größe").exists()
    assert code_version.describe() == said
    git("checkout", "--detach")
    assert code_version.describe() == said
    git("checkout", "feature/größe")
    git("worktree", "add", "-b", "other", str(checkout / "tree"))
    git("commit", "--allow-empty", "-m", "y", cwd=checkout / "tree")
    assert code_version.checked_out_commit(checkout / "tree" / ".git") == git("rev-parse", "other") != head


@pytest.mark.parametrize("head", [None, "", "ref: refs/heads/none\n", "ref: refs/heads/../../../x\n"])
def test_what_is_no_checkout(tmp_path: Path, head: str | None) -> None:
    if head is not None:
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "HEAD").write_text(head)
    assert code_version.checked_out_commit(tmp_path / ".git") == ""


def test_a_detached_head(tmp_path: Path) -> None:
    (tmp_path / "HEAD").write_text(f"{COMMIT}\n")
    assert code_version.checked_out_commit(tmp_path) == COMMIT
