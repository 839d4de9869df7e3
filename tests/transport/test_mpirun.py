"""The mpirun above a run: found, its settings read and packed, its standard error written to."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpgpt.config import load
from mpgpt.errors import UsageError
from mpgpt.transport import mpirun
from mpgpt.transport.mpirun import MOST_PACKED, SETTINGS_VARIABLE, Launcher, beside, find, hostfile_of, pack
from tests.support.launch import ROOT
from tests.transport.mpiruns import LAUNCH, fake

PROGRAM = ["-n", "3", "/x/.venv/bin/mpgpt", "generate", "--prompt", "-hostfile"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/x/.venv/bin/prterun", "-hostfile", "hostfiles/local", *PROGRAM], "hostfiles/local"),
        (["prterun", "-n", "3", "--hostfile", "/abs/hybrid", "/x/mpgpt", "serve"], "/abs/hybrid"),
        (["/usr/bin/mpirun", "--hostfile=a b=c", *PROGRAM], "a b=c"),
        (["mpirun", "-machinefile", "m", *PROGRAM], "m"),
        (["mpiexec", "--machinefile", "m", *PROGRAM], "m"),
        (["orterun", "-default-hostfile", "d", *PROGRAM], "d"),
        (["mpirun", "--default-hostfile=d", *PROGRAM], "d"),
        (["mpirun", "-n", "3", "mpgpt", "generate"], None),
        (["mpirun", "-n", "3", "mpgpt", "-hostfile"], None),
        (["mpirun", "-n", "3", "-host", "a,b", "mpgpt"], None),
        (["bash", "-c", "mpirun -hostfile x", "-hostfile", "y"], None),
        (["/x/.venv/bin/mpgpt", "-hostfile", "y"], None),
        (["mpirun"], None),
        ([], None),
    ],
)
def test_the_hostfile_is_found(argv: list[str], expected: str | None) -> None:
    assert hostfile_of(argv) == expected


def test_settings_are_found_beside_the_hostfile(tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text("")
    assert beside("h", tmp_path) == tmp_path / "h.yaml"
    assert beside(str(tmp_path / "h"), Path("/nowhere")) == tmp_path / "h.yaml"
    assert beside("other", tmp_path) is None


# -- finding it


def test_the_launcher_is_a_parent_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text("seed: 1\n")
    with fake("/x/bin/prterun", LAUNCH, "-hostfile", "h", cwd=tmp_path) as process:
        said, errors = process.communicate(timeout=60)
        assert not errors
        pid, argv, cwd, settings = eval(said)
    assert (pid, argv[0], argv[-2:]) == (process.pid, "/x/bin/prterun", ("-hostfile", "h"))
    assert (cwd, settings) == (str(tmp_path), str(tmp_path / "h.yaml"))
    with fake("/x/bin/bash", LAUNCH, "-hostfile", "h", cwd=tmp_path) as process:
        assert process.communicate(timeout=60)[0] == "None\n"


@pytest.mark.parametrize("named", ["host", "domain", "another host", "another program", "gone"])
def test_the_launcher_of_a_rank_that_came_by_ssh(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """It is nobody's parent then; the run's name tells its host and process. macOS's hosts are called x.local."""
    monkeypatch.setattr(socket, "gethostname", lambda: "pi-5.local")
    host = {"domain": "pi-5.local", "another host": "pi-6"}.get(named, "pi-5")
    name = "bash" if named == "another program" else "mpirun"
    with fake(name, "print(flush=True); input()") as process:
        assert process.stdout
        process.stdout.readline()
        pid = process.pid
        if named == "gone":
            process.communicate("\n", timeout=60)
        found = find({"PMIX_NAMESPACE": f"prterun-{host}-{pid}@1"})
        if named in ("host", "domain"):
            assert found and (found.pid, found.argv[0]) == (pid, "mpirun")
        else:
            assert found is None


def test_without_a_launcher() -> None:
    assert find({}) is None and find({"PMIX_NAMESPACE": "nonsense"}) is None
    assert mpirun.settings(None, {}) is None


# -- its settings


@pytest.mark.parametrize("name", ["h.yaml", "mit Leerzeichen.yaml", "Füße 足.yaml", "a'b\"$c.yaml"])
def test_settings_survive_the_way_to_another_host(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("system: Füße\nseed: 7\n", encoding="utf-8")
    value = pack(path)
    assert value.isprintable()
    file = mpirun.settings(None, {SETTINGS_VARIABLE: value})
    assert file and file.path == path and file.text == path.read_text(encoding="utf-8")
    assert load(file.path, file.text) == load(path)


def test_large_settings(tmp_path: Path) -> None:
    """200 KB that are alike are little; what is too much for the way is a sentence, and only where it is wanted."""
    path = tmp_path / "h.yaml"
    path.write_text("# nothing\n" * 20_000 + "seed: 3\n")
    file = mpirun.settings(None, {SETTINGS_VARIABLE: pack(path)})
    assert file and load(file.path, file.text).seed == 3
    path.write_text("# " + "".join(random.Random(1).choices("0123456789abcdef" * 3 + "xyzuvw", k=200_000)))
    value = pack(path)
    assert len(value) < MOST_PACKED
    with pytest.raises(UsageError, match=r"h\.yaml is too long to be taken to another host"):
        mpirun.settings(None, {SETTINGS_VARIABLE: value})


@pytest.mark.parametrize(
    ("content", "said"), [(b"system: F\xfc\xdfe\n", "not UTF-8"), (b"seed: 1\n", ""), (b"\xef\xbb\xbfseed: 1\n", "")]
)
def test_settings_from_elsewhere_read_as_here(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "h.yaml"
    path.write_bytes(content)
    if not said:
        file = mpirun.settings(None, {SETTINGS_VARIABLE: pack(path)})
        assert file and load(file.path, file.text).seed == 1
        return
    with pytest.raises(UsageError, match=said):
        mpirun.settings(None, {SETTINGS_VARIABLE: pack(path)})


@pytest.mark.parametrize("value", ["/x/h.yaml rubbish", "/x/h.yaml AAAA", "/x/h.yaml é"])
def test_a_variable_that_somebody_else_wrote(value: str) -> None:
    with pytest.raises(UsageError, match=SETTINGS_VARIABLE):
        mpirun.settings(None, {SETTINGS_VARIABLE: value})


# -- its standard error


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_what_is_said_to_its_standard_error(tmp_path: Path) -> None:
    with fake("mpirun", "input()") as process:
        assert Launcher(pid=process.pid, argv=(), cwd=ROOT).say("the reason: Füße, a\udce9b")
        assert process.communicate("\n", timeout=60)[1] == "the reason: Füße, a\\udce9b\n"
    path = tmp_path / "errors"
    with path.open("w") as errors, subprocess.Popen(["sleep", "60"], stderr=errors) as sleeping:
        assert Launcher(pid=sleeping.pid, argv=(), cwd=ROOT).say("one")
        assert Launcher(pid=sleeping.pid, argv=(), cwd=ROOT).say("two")
        sleeping.kill()
    assert path.read_text() == "one\ntwo\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
@pytest.mark.parametrize("how", ["nobody reads", "it is full", "it is gone"])
def test_last_words_wait_for_nobody(how: str) -> None:
    reading, writing = os.pipe()
    with subprocess.Popen(["sleep", "60"], stderr=writing) as sleeping:
        if how == "it is full":
            os.set_blocking(writing, False)
            with pytest.raises(BlockingIOError):
                while True:
                    os.write(writing, b"x" * 4096)
        os.close(writing)
        if how == "nobody reads":
            os.close(reading)
        if how == "it is gone":
            sleeping.kill()
            sleeping.wait()
        begun = time.monotonic()
        assert not Launcher(pid=sleeping.pid, argv=(), cwd=ROOT).say("the reason")
        assert time.monotonic() - begun < 20
        sleeping.kill()
    if how != "nobody reads":
        os.close(reading)
