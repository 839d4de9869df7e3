"""Which code this is, so that ranks of different code refuse one another.

Knows: the files of the packages, and git's folder beside them.
Must not know: anything else of the project.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from mpgpt import __version__

PACKAGES = ("mpgpt", "ios_proxy/mpgpt_ios", "api/mpgpt_api")
"""As they lie in a checkout; installed, they lie beside one another."""


def code_id() -> str:
    """A digest of all Python files of the packages, 12 hexadecimal digits: equal where the code is."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        folder = _folder(package)
        files = (path for path in folder.rglob("*.py") if not path.name.startswith("."))  # what editors and macOS leave
        for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
            digest.update(f"{package}/{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def describe() -> str:
    """For people: the version, the commit where there is a checkout, and the code's digest."""
    commit = checked_out_commit(Path(__file__).parents[2] / ".git")
    return f"{__version__} ({f'commit {commit[:7]}, ' if commit else ''}code {code_id()})"


def _folder(package: str) -> Path:
    here = Path(__file__).parents[2]
    return here / package if (here / package).is_dir() else here / Path(package).name


def checked_out_commit(git: Path) -> str:
    """The commit that is checked out; empty where it cannot be found."""
    try:
        if git.is_file():  # of a worktree
            git = git.parent / _read(git).removeprefix("gitdir: ")
        head = _read(git / "HEAD")
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        common = git / _read(git / "commondir") if (git / "commondir").is_file() else git
        if (common / name).is_file():
            return _read(common / name)
        packed = _read(common / "packed-refs").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")
    except OSError:
        return ""


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()
