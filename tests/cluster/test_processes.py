"""Starting processes and hearing them: what they say, how they fail, that none is left behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpgpt.cluster.processes import environment, listen, mpirun
from mpgpt.errors import MpgptError, UsageError


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_objects_are_heard_as_they_come_and_nothing_else() -> None:
    heard: list[tuple[dict[str, Any], float]] = []
    code = "import time; print('a word'); print('{\"a\": 1}', flush=True); time.sleep(1); print('{\"b\": [2]}')"
    listen(python(code), os.environ, lambda said: heard.append((said, time.monotonic())))
    assert [said for said, _ in heard] == [{"a": 1}, {"b": [2]}]
    assert heard[1][1] - heard[0][1] > 0.5, "the first before the second was there"


@pytest.mark.parametrize(
    ("errors", "cause"),
    [
        ("mpgpt: no such model", "no such model"),
        (
            "some warning\nmpgpt: rank 0: full\nrank 1: full too\n-----\nprterun noticed\n",
            "rank 0: full\nrank 1: full too",
        ),
        ("Traceback\n  File x\nKeyError: 1", "Traceback\n  File x\nKeyError: 1"),
        ("", "it ended with status 3 and without a word"),
    ],
)
def test_a_failure_has_its_cause(errors: str, cause: str) -> None:
    with pytest.raises(MpgptError) as caught:
        listen(python(f"import sys; sys.stderr.write({errors!r}); sys.exit(3)"), os.environ, lambda said: None)
    assert str(caught.value) == cause


def test_an_interrupt_ends_the_process_too() -> None:
    pids: list[int] = []

    def interrupted(said: dict[str, Any]) -> None:
        pids.append(said["pid"])
        raise KeyboardInterrupt

    code = "import os, time; print('{\"pid\": %d}' % os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        listen(python(code), os.environ, interrupted)
    assert not psutil.pid_exists(pids[0])


def test_a_process_is_bound_and_we_are_not() -> None:
    heard: list[dict[str, Any]] = []
    before = os.sched_getaffinity(0)
    core = max(before)
    code = "import json, os; print(json.dumps({'cores': list(os.sched_getaffinity(0))}))"
    listen(python(code), os.environ, heard.append, cores=[core])
    assert heard == [{"cores": [core]}] and os.sched_getaffinity(0) == before


def test_a_process_that_hangs_is_ended() -> None:
    heard: list[dict[str, Any]] = []
    code = "import os, time; print('{\"pid\": %d}' % os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(MpgptError, match="longer than 2 s"):
        listen(python(code), os.environ, heard.append, limit_s=2.0)
    assert not psutil.pid_exists(heard[0]["pid"])


def test_what_cannot_be_started_or_understood() -> None:
    with pytest.raises(MpgptError, match="/nowhere/program cannot be started: No such file"):
        listen(["/nowhere/program"], os.environ, lambda said: None)
    with pytest.raises(MpgptError, match=r"no JSON: \{oh"):
        listen(python("print('{oh')"), os.environ, lambda said: None)


def test_ranks_are_bound_as_asked() -> None:
    path = os.environ["PATH"]
    free = mpirun(3, threads=1, pin=False, hostfile=None, path=path)
    assert free[1:] == ["--bind-to", "none", "--map-by", "slot:oversubscribe", "-n", "3"]
    bound = mpirun(2, threads=1, pin=True, hostfile=None, path=path)
    assert bound[1:5] == ["--bind-to", "core:overload-allowed", "--map-by", "core:oversubscribe"]
    wide = mpirun(2, threads=4, pin=True, hostfile=Path("hosts"), path=path)
    assert wide[1:3] == ["--hostfile", "hosts"] and "slot:PE=4" in wide


def test_no_mpirun_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UsageError, match="mpirun"):
        mpirun(2, threads=1, pin=False, hostfile=None, path="/nowhere")


def test_a_child_has_our_environment() -> None:
    env = environment({"A": "1"})
    assert env["A"] == "1" and ("OMPI_ALLOW_RUN_AS_ROOT" in env) == (os.geteuid() == 0)
