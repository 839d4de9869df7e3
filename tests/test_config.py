"""What config promises: bad settings get a sentence, good ones survive the broadcast, spans are proved."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mpgpt.config import IPad, RunConfig, load, parse_layers
from mpgpt.core import Sampling, Span, check_spans, signed_seed
from mpgpt.errors import UsageError
from mpgpt.model.sampler import check
from mpgpt.transport.mpirun import beside

HOSTFILES = Path(__file__).parent.parent / "hostfiles"
HYBRID = "{rank_0: [0, 1, 2, 3], rank_1: [4, 5, 6, 7], rank_2: [8, 9, 10, 11]}"


def settings(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaint(folder: Path, text: str | bytes) -> str:
    with pytest.raises(UsageError) as caught:
        load(settings(folder, text))
    assert caught.value.exit_status == 2
    assert all(line.startswith(f"{folder / 'run.yaml'}: ") for line in str(caught.value).splitlines())
    return str(caught.value).replace(f"{folder / 'run.yaml'}: ", "")


def spans_of(*bounds: tuple[int, int]) -> tuple[Span, ...]:
    return tuple(Span(start=start, stop=stop) for start, stop in bounds)


THERE = "rank: 1, address: h:1, token_file: t, package: p"


# --- files ---


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff", "decoding_strategies:\nweb_interface:\n"])
def test_an_empty_file_is_valid_and_has_no_model(tmp_path: Path, text: str) -> None:
    config = load(settings(tmp_path, text))
    assert config == RunConfig()
    assert config.hf_model_name is None
    assert (config.max_new_tokens, config.dtype, config.max_sequences) == (256, "float32", 16)


def test_all_keys_are_read(tmp_path: Path) -> None:
    config = load(
        settings(
            tmp_path,
            f"""
hf_model_name: openai-community/gpt2
weights_model_name: gpt2
num_nodes: 3
num_layers: 12
layer_distribution: {HYBRID}
max_new_tokens: 100
ctx_length: 1024
active_decoding_strategy: top_p
decoding_strategies:
  greedy: {{temperature: 1, repetition_penalty: 1.1}}
  sampling: {{temperature: 0.5, min_p: 0.05}}
  top_k: {{temperature: 1.5, k: 0}}
  top_p: {{temperature: 0, p: 1}}
web_interface: {{host: 0.0.0.0, port: 1, api_port: 8080, frontend_port: 65535}}
dtype: bfloat16
threads: 2
max_sequences: 1
seed: 0
system: "Sé breve."
use_coreml_rank1: true
ipad: {{rank: 1, address: "[fe80::1%en0]:8000", token_file: ~/t, package: a.mlpackage, fallback: none, timeout_s: 2}}
""",
        )
    )
    assert config.layer_distribution == {
        "rank_0": (0, 1, 2, 3),
        "rank_1": (4, 5, 6, 7),
        "rank_2": (8, 9, 10, 11),
    }
    assert config.decoding_strategies.greedy.repetition_penalty == 1.1
    assert config.decoding_strategies.top_k.k == 0
    assert config.web_interface.frontend_port == 65535
    assert (config.system, config.use_coreml_rank1, config.seed) == ("Sé breve.", True, 0)
    ipad = IPad(
        rank=1,
        address="[fe80::1%en0]:8000",
        token_file="~/t",
        package="a.mlpackage",
        fallback="none",
        timeout_s=2.0,
    )
    assert config.ipad == config.device == ipad
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("max_new_tokens: many", ["max_new_tokens is 'many'", "integer"]),
        ("max_new_tokens: true", ["max_new_tokens is true", "integer"]),
        ("max_new_tokens: 3.0", ["max_new_tokens is 3.0", "integer"]),
        ("max_new_tokens: 0", ["max_new_tokens is 0", "greater than or equal to 1"]),
        ("max_new_tokens: 1000001", ["less than or equal to 1000000"]),
        ("max_new_tokens:", ["max_new_tokens is empty"]),
        ("max_new_tokens: 0x" + "f" * 9000, ["max_new_tokens is an overlong number"]),
        ("ctx_length: 0", ["ctx_length is 0", "equal to 1"]),
        ("num_nodes: -1", ["num_nodes is -1"]),
        ("num_layers: [12]", ["num_layers is [12]"]),
        ("threads: 0", ["threads is 0"]),
        ("max_sequences: 0", ["max_sequences is 0"]),
        ("seed: -9223372036854775809", ["seed is -9223372036854775809", "equal to -9223372036854775808"]),
        ("seed: 9223372036854775808", ["less than 9223372036854775808"]),
        ("dtype: fp16", ["dtype is 'fp16'", "'float32', 'bfloat16', 'float16', 'int8' or 'int4'"]),
        ("hf_model_name: ''", ["hf_model_name is ''", "at least 1 character"]),
        ("hf_model_name: 7", ["hf_model_name is 7", "string"]),
        ("system: yes", ["system is true", "string"]),
        ("use_coreml_rank1: 1", ["use_coreml_rank1 is 1", "boolean"]),
        (
            "use_coreml_rank1: true",
            ["use_coreml_rank1 needs an iPad behind rank 1: ipad: {rank: 1, address: HOST:PORT"],
        ),
        (f"use_coreml_rank1: true\nipad: {{{THERE.replace('rank: 1', 'rank: 2')}}}", ["behind rank 1"]),
        (f"ipad: {{{THERE.replace('rank: 1', 'rank: 0')}}}", ["ipad.rank is 0", "greater than or equal to 1"]),
        ("ipad: {rank: 1, address: h:1, token_file: t}", ["ipad.package is missing"]),
        (f"ipad: {{{THERE}, adress: x}}", ["ipad.adress is not a known key; did you mean address?"]),
        (f"ipad: {{{THERE}, fallback: cpu}}", ["ipad.fallback is 'cpu'", "'torch' or 'none'"]),
        (f"ipad: {{{THERE}, timeout_s: 0}}", ["ipad.timeout_s is 0"]),
        *(
            (
                f"ipad: {{{THERE.replace('h:1', bad)}}}",
                ["ipad.address is", "should be HOST:PORT, such as 10.10.0.5:8000"],
            )
            for bad in ("h", "h:0", "h:65536", "'::1:80'", "'[::1]'", "'a b:1'", "':1'")
        ),
        ("active_decoding_strategy: beam", ["is 'beam'", "'greedy', 'sampling', 'top_k' or 'top_p'"]),
        ("decoding_strategies: [top_k]", ["decoding_strategies is ['top_k']", "dictionary"]),
        ("decoding_strategies: {top_k: 40}", ["decoding_strategies.top_k is 40"]),
        ("decoding_strategies: {top_k: {k: -1}}", ["decoding_strategies.top_k.k is -1"]),
        ("decoding_strategies: {top_k: {k: 2.5}}", ["decoding_strategies.top_k.k is 2.5"]),
        ("decoding_strategies: {top_k: {p: 0.9}}", ["decoding_strategies.top_k.p is not a known key"]),
        ("decoding_strategies: {top_p: {p: -0.1}}", ["decoding_strategies.top_p.p is -0.1", "equal to 0"]),
        ("decoding_strategies: {top_p: {p: 1.5}}", ["less than or equal to 1"]),
        ("decoding_strategies: {sampling: {temperature: -1}}", ["sampling.temperature is -1"]),
        ("decoding_strategies: {sampling: {temperature: .inf}}", ["sampling.temperature is inf", "finite"]),
        ("decoding_strategies: {sampling: {temperature: .nan}}", ["sampling.temperature is nan", "finite"]),
        ("decoding_strategies: {sampling: {temperature: true}}", ["sampling.temperature is true"]),
        ("decoding_strategies: {sampling: {temperature: '1'}}", ["sampling.temperature is '1'"]),
        ("decoding_strategies: {greedy: {min_p: 2}}", ["greedy.min_p is 2"]),
        ("decoding_strategies: {greedy: {repetition_penalty: 0}}", ["greedy.repetition_penalty is 0"]),
        ("web_interface: {port: 0}", ["web_interface.port is 0"]),
        ("web_interface: {api_port: 65536}", ["web_interface.api_port is 65536", "equal to 65535"]),
        ("web_interface: {queue: -1}", ["web_interface.queue is -1", "equal to 0"]),
        ("web_interface: {origins: http://x}", ["web_interface.origins is 'http://x'; it should be a list"]),
        ("web_interface: {origins: [1]}", ["web_interface.origins.0 is 1"]),
        ("web_interface: {origins: [a://b, 'localhost:3000']}", ["origins.1 is 'localhost:3000'; it should be scheme"]),
        ("web_interface: {origins: [null]}", ["web_interface.origins.0 is null", "in quotes"]),
        ("web_interface: {origins: ['*']}", ["web_interface.origins.0 is '*'"]),
        ("web_interface: {origins: ['http://*.a']}", ["web_interface.origins.0 is 'http://*.a'; each origin"]),
        ("web_interface: {time_limit_s: 0}", ["web_interface.time_limit_s is 0", "greater than 0"]),
        ("web_interface: {api_key_file: 5}", ["web_interface.api_key_file is 5"]),
        ("web_interface: {hots: x}", ["web_interface.hots is not a known key", "did you mean host?"]),
        ("max_new_token: 5", ["max_new_token is not a known key", "did you mean max_new_tokens?"]),
        ("zzz: 5", ["zzz is not a known key", "known are hf_model_name, "]),
        ("1: 5", ["1 is 1", "strings"]),
        ('"\\e[31m": 5', [r"'\x1b[31m' is not a known key"]),
        ('system: "\\uD800"', ["system ", r"'\ud800'", "surrogates not allowed"]),
        ("layer_distribution: manual", ["layer_distribution is 'manual'", "auto, or for each rank"]),
        ("layer_distribution: [[0, 1]]", ["layer_distribution is [[0, 1]]"]),
        ("layer_distribution: {rank_0: 0-3}", ["layer_distribution gives rank_0 '0-3'", "list"]),
        ("layer_distribution: {rank_0: [0, true]}", ["layer_distribution gives rank_0 [0, True]"]),
        ("layer_distribution: {rank_0: [-1, 0]}", ["layer_distribution gives rank_0 [-1, 0]"]),
        ("layer_distribution: {server: [0, 1]}", ["layer_distribution gives server [0, 1]", "{rank_0: "]),
        ("layer_distribution: {0: [0, 1]}", ["layer_distribution gives 0 [0, 1]"]),
    ],
)
def test_impossible_values_are_named_with_what_is_allowed(tmp_path: Path, text: str, parts: list[str]) -> None:
    said = complaint(tmp_path, text)
    assert len(said.splitlines()) == 1
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: b\nc: [1, 2\nd: e\n", ["line 3: ", "not YAML"]),
        ("a: b: c", ["line 1: ", "not YAML", "mapping values"]),
        ("a: 1\n--- \nb: 2\n", ["not YAML", "line 2"]),
        ("a: 1\nb: \x07\n", ["line 2: ", "not YAML", "unacceptable character"]),
        ("seed: 2024-13-45", ["not YAML", "month must be in 1..12"]),
        ("seed: !!int x", ["not YAML"]),
        ("seed: !!timestamp x", ["not YAML"]),
        ("seed: !!bool x", ["not YAML"]),
        ("seed: !!python/name:os.system x", ["line 1: ", "not YAML", "could not determine a constructor"]),
        ("seed: *a", ["line 1: ", "undefined alias"]),
        ("? [a]\n: 1", ["line 1: ", "unhashable"]),
        ("- 1\n- 2\n", ["[1, 2]", "mapping"]),
        ("gpt2", ["'gpt2'", "mapping"]),
        ("3", ["this is 3", "mapping"]),
        ("[" * 5000, ["nested too deeply"]),
        (b"a: 1\nhf_model_name: gpt\xff\n", ["line 2: ", "not UTF-8"]),
        ("a: 1".encode("utf-16"), ["line 1: ", "not UTF-8"]),
        ("# x\n" * 100_000, ["larger than 256 KiB"]),
    ],
)
def test_what_is_no_settings_file_is_refused(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    said = complaint(tmp_path, text)
    assert len(said.splitlines()) == 1
    for part in parts:
        assert part in said


def test_absent_file_and_directory(tmp_path: Path) -> None:
    for path, part in [(tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")]:
        with pytest.raises(UsageError, match=part) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_all_problems_are_told_together(tmp_path: Path) -> None:
    said = complaint(
        tmp_path,
        "seed: 1\nseed: 2\ndtype: fp8\nweb_interface: {port: 1, port: 0, prot: 2}\nmax_new_tokens: x\ntop_k: 3\n",
    )
    assert sorted(line.partition("; known are ")[0] for line in said.splitlines()) == [
        "dtype is 'fp8'; it should be 'float32', 'bfloat16', 'float16', 'int8' or 'int4'",
        "line 2: seed is given twice, first in line 1",
        "line 4: port is given twice, first in line 4",
        "max_new_tokens is 'x'; it should be a valid integer",
        "top_k is not a known key",
        "web_interface.port is 0; it should be greater than or equal to 1",
        "web_interface.prot is not a known key; did you mean port?",
    ]


def test_a_rank_named_twice_is_refused(tmp_path: Path) -> None:
    said = complaint(tmp_path, "layer_distribution:\n  rank_0: [0]\n  rank_0: [1]\n")
    assert said == "line 3: rank_0 is given twice, first in line 2"


def test_merge_keys_are_not_duplicates(tmp_path: Path) -> None:
    text = "decoding_strategies:\n  sampling: &s {temperature: 2}\n  top_k: {<<: *s, temperature: 0.5, k: 3}\n"
    config = load(settings(tmp_path, text))
    assert config.sampling("top_k", 0) == Sampling(temperature=0.5, top_k=3)


def test_a_bomb_of_aliases_is_not_written_out(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert len(complaint(tmp_path, "\n".join([*lines, "seed: *a11"]))) < 10_000


@given(text=st.text(alphabet=st.sampled_from("seed dtype:\n -[]{}&*!!<>|'\"#%@,?019.~\x00\x85é"), max_size=60))
def test_any_text_is_settings_or_a_usage_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = settings(tmp_path_factory.getbasetemp(), text)
    try:
        load(path)
    except UsageError as error:
        assert str(error).isprintable() or "\n" in str(error)


# --- layers ---


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[Span, ...], int]:
    layers = draw(st.integers(1, 60))
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1), max_size=8))) if layers > 1 else []
    edges = [0, *cuts, layers]
    return spans_of(*pairwise(edges)), layers


def test_parsed_and_named_layers_are_proved_alike() -> None:
    expected = spans_of((0, 4), (4, 8), (8, 12))
    named = {"rank_2": [8, 9, 10, 11], "rank_0": [0, 1, 2, 3], "rank_1": [4, 5, 6, 7]}
    assert RunConfig.model_validate({"layer_distribution": named}).spans(3, 12) == expected
    assert check_spans(parse_layers("0-3,4-7,8-11"), 3, 12, "--layers") == expected
    assert RunConfig().spans(3, 12) is None


@given(partition=partitions())
def test_any_partition_passes_both_ways(partition: tuple[tuple[Span, ...], int]) -> None:
    spans, layers = partition
    assert check_spans(spans, len(spans), layers, "x") == spans
    assert parse_layers(",".join(map(str, spans))) == spans
    gaps = tuple(span for one in spans for span in (None, one, None))
    assert check_spans(gaps, len(gaps), layers, "x") == gaps
    assert parse_layers(",".join(str(span or "-") for span in gaps)) == gaps
    named = {f"rank_{rank}": list(range(span.start, span.stop)) for rank, span in enumerate(spans)}
    assert RunConfig.model_validate({"layer_distribution": named}).spans(len(spans), layers) == spans


@given(partition=partitions(), data=st.data())
def test_any_perturbed_partition_is_refused(partition: tuple[tuple[Span, ...], int], data: st.DataObject) -> None:
    spans, layers = partition
    at = data.draw(st.integers(0, len(spans) - 1))
    span, ranks = spans[at], len(spans)

    def changed(start: int, stop: int) -> list[Span]:
        return [*spans[:at], Span(start=start, stop=stop), *spans[at + 1 :]]

    wrong: list[tuple[Sequence[Span | None], int, int]] = [
        (spans, ranks + 1, layers),
        (spans, ranks - 1, layers),
        (spans[:-1], ranks - 1, layers),
        (spans[1:], ranks - 1, layers),
        ((), ranks, layers),
        ((None,) * ranks, ranks, layers),
        ([None, *spans], ranks, layers),
        (spans, ranks, layers + 1),
        (spans, ranks, layers - 1),
        ([*spans[:at], span, *spans[at:]], ranks + 1, layers),
        (changed(span.start, span.stop + 1), ranks, layers),
        (changed(span.start + 1, span.stop + 1), ranks, layers),
    ]
    if len(span) > 1:
        wrong.append((changed(span.start + 1, span.stop), ranks, layers))
        wrong.append((changed(span.start, span.stop - 1), ranks, layers))
    if span.start:
        wrong.append((changed(span.start - 1, span.stop), ranks, layers))
    if ranks > 1:
        wrong.append((spans[::-1], ranks, layers))
        wrong.append((spans[1:] + spans[:1], ranks, layers))
    for bad, n, total in wrong:
        with pytest.raises(UsageError, match=r"^here "):
            check_spans(bad, n, total, "here")


@pytest.mark.parametrize(
    ("named", "ranks", "parts"),
    [
        ({"rank_0": [0, 1], "rank_1": [2], "rank_2": [3]}, 2, ["names 3 ranks but mpirun started 2 (-n 2)"]),
        ({"rank_0": [0, 1, 2, 3]}, 2, ["names 1 rank but mpirun started 2 (-n 2)"]),
        ({}, 2, ["names 0 ranks"]),
        ({"rank_0": [0, 1], "rank_2": [2, 3]}, 2, ["rank_2", "rank_0, rank_1 and so on"]),
        ({"rank_00": [0, 1], "rank_1": [2, 3]}, 2, ["rank_00"]),
        ({"rank_0": [], "rank_1": [0, 1, 2, 3]}, 2, ["rank_0", "at least one"]),
        ({"rank_0": [0, 2], "rank_1": [3]}, 2, ["rank_0 [0, 2]", "consecutive"]),
        ({"rank_0": [1, 0], "rank_1": [2, 3]}, 2, ["rank_0 [1, 0]", "ascending"]),
        ({"rank_0": [0, 0], "rank_1": [1, 2, 3]}, 2, ["rank_0 [0, 0]"]),
        ({"rank_0": [0], "rank_1": [2, 3]}, 2, ["rank 1 layers 2-3", "begin at layer 1"]),
        ({"rank_0": [0, 1, 2], "rank_1": [2, 3]}, 2, ["rank 1 layers 2-3", "begin at layer 3"]),
        ({"rank_0": [2, 3], "rank_1": [0, 1]}, 2, ["rank 0 layers 2-3", "begin at layer 0"]),
        ({"rank_0": [0, 1], "rank_1": [2]}, 2, ["layer 2", "rank 1", "last is 3"]),
        ({"rank_0": [0, 1], "rank_1": [2, 3, 4]}, 2, ["layer 4", "rank 1", "last is 3"]),
    ],
)
def test_a_bad_distribution_gets_a_sentence(named: dict[str, list[int]], ranks: int, parts: list[str]) -> None:
    config = RunConfig.model_validate({"layer_distribution": named})
    with pytest.raises(UsageError, match=r"^layer_distribution ") as caught:
        config.spans(ranks, 4)
    for part in parts:
        assert part in str(caught.value)


def test_num_nodes_and_num_layers_must_fit_even_with_auto() -> None:
    config = RunConfig(num_nodes=3, num_layers=12)
    assert config.spans(3, 12) is None
    with pytest.raises(UsageError, match=r"num_nodes is 3 but mpirun started 2 \(-n 2\)"):
        config.spans(2, 12)
    with pytest.raises(UsageError, match="num_layers is 12 but the model has 30"):
        config.spans(3, 30)


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("0-3,4-7,8-11", [(0, 4), (4, 8), (8, 12)]),
        ("5", [(5, 6)]),
        ("0, 1 - 2 ,3", [(0, 1), (1, 3), (3, 4)]),
        ("-,0-4, - ,5", [None, (0, 5), None, (5, 6)]),
    ],
)
def test_layers_are_parsed(text: str, bounds: list[tuple[int, int] | None]) -> None:
    assert parse_layers(text) == tuple(pair and Span(start=pair[0], stop=pair[1]) for pair in bounds)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["'' at character 1, for rank 0", "is no range"]),
        ("0-3,", ["'' at character 5, for rank 1"]),
        ("0-3,x,8-11", ["'x' at character 5, for rank 1"]),
        ("0-3,7-4", ["'7-4' at character 5", "backwards"]),
        ("-1", ["'-1'"]),
        ("0-", ["'0-'"]),
        ("0-3-5", ["'0-3-5'"]),
        ("0-3;4-7", ["'0-3;4-7'"]),
        ("1.5", ["'1.5'"]),
        ("\u0663", ["no range"]),
        ("9" * 5000, ["no range"]),
    ],
)
def test_bad_layers_are_placed(text: str, parts: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^--layers: ") as caught:
        parse_layers(text)
    assert len(str(caught.value)) < 300
    for part in parts:
        assert part in str(caught.value)


@given(text=st.text(alphabet="0123456789-, x", max_size=20))
def test_any_layers_text_is_spans_or_a_usage_error(text: str) -> None:
    try:
        assert len(parse_layers(text)) == text.count(",") + 1
    except UsageError as error:
        assert "--layers" in str(error)


# --- sampling ---


def test_strategies_become_sampling() -> None:
    config = RunConfig()
    assert config.sampling("greedy", 7) == config.sampling(None, 7) == Sampling(seed=7)
    assert config.sampling("sampling", 7) == Sampling(temperature=1.0, seed=7)
    assert config.sampling("top_k", 7) == Sampling(temperature=1.0, top_k=40, seed=7)
    assert config.sampling("top_p", 7) == Sampling(temperature=1.0, top_p=0.9, seed=7)
    assert RunConfig(active_decoding_strategy="top_k").strategy().temperature == 1.0


def test_overrides_lie_over_the_strategy() -> None:
    config = RunConfig(active_decoding_strategy="top_k")
    got = config.sampling(None, 1, temperature=2, top_k=3, top_p=None, min_p=0.1, repetition_penalty=1.2)
    assert got == Sampling(temperature=2.0, top_k=3, min_p=0.1, repetition_penalty=1.2, seed=1)
    assert RunConfig().sampling(None, 1, temperature=0.5).temperature == 0.5
    assert RunConfig().sampling("greedy", 1, temperature=0.5).temperature == 0.0


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"k": 3}, "k is not a known key"),
    ],
)
def test_impossible_overrides_are_refused(overrides: dict[str, float], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        RunConfig().sampling("top_k", 1, **overrides)


def test_impossible_strategy_and_seed_are_refused() -> None:
    for name in ("beam", ""):
        with pytest.raises(UsageError, match=f"strategy '{name}'; there are greedy, sampling, top_k, top_p"):
            RunConfig().sampling(name, 0)
    for seed in (-(2**63) - 1, 2**63):
        with pytest.raises(UsageError, match=f"seed is {seed}"):
            RunConfig().sampling(None, seed)


def test_seeds_are_signed_and_the_engines_are_not() -> None:
    config = RunConfig(seed=-1)
    for seed, theirs in ((0, 0), (-1, 2**64 - 1), (-(2**63), 2**63), (2**63 - 1, 2**63 - 1)):
        sampling = config.sampling("sampling", seed)
        assert sampling.seed == theirs and signed_seed(sampling.seed) == seed
        check(sampling)


def test_a_top_p_of_0_is_greedy(tmp_path: Path) -> None:
    """In the settings and over them, whatever the temperature; penalties stay."""
    config = RunConfig(active_decoding_strategy="top_k")
    greedy = Sampling(top_k=40, seed=3, repetition_penalty=1.5)
    assert config.sampling(None, 3, top_p=0, temperature=2.0, repetition_penalty=1.5) == greedy
    (tmp_path / "a.yaml").write_text("active_decoding_strategy: top_p\ndecoding_strategies: {top_p: {p: 0}}\n")
    assert load(tmp_path / "a.yaml").sampling(None, 3) == Sampling(seed=3)


def test_origins_are_taken_as_browsers_send_them(tmp_path: Path) -> None:
    listed = '"null", APP://Obsidian.md, "http://localhost:80", "tauri://localhost/", "file://"'
    (tmp_path / "a.yaml").write_text(f"web_interface: {{origins: [{listed}]}}\n")
    assert load(tmp_path / "a.yaml").web_interface.origins == (
        "null", "app://obsidian.md", "http://localhost", "tauri://localhost", "file://",
    )  # fmt: skip


# --- what is shipped ---


@pytest.mark.parametrize(
    ("name", "model", "layers", "spans"),
    [
        ("local", "smollm2-135m", 30, None),
        ("standard", "gpt2", 12, spans_of((0, 5), (5, 10), (10, 12))),
        ("hybrid", "gpt2", 12, spans_of((0, 4), (4, 8), (8, 12))),
    ],
)
def test_shipped_settings_fit_three_ranks(name: str, model: str, layers: int, spans: tuple[Span, ...] | None) -> None:
    path = beside(f"hostfiles/{name}", HOSTFILES.parent)
    assert path is not None
    config = load(path)
    assert config.hf_model_name == model
    assert config.spans(3, layers) == spans
    assert config.max_new_tokens == 256
    assert (config.device is not None) == bool(config.use_coreml_rank1) == (name == "hybrid")
    greedy = name == "local"
    assert config.sampling(None, 5) == (Sampling(seed=5) if greedy else Sampling(temperature=1.0, top_k=40, seed=5))


@pytest.mark.parametrize(
    ("name", "hosts"),
    [
        ("local", ["localhost"]),
        ("standard", ["mini1", "mini2", "pi5"]),
        ("hybrid", ["mini1", "ipad-proxy", "mini2"]),
    ],
)
def test_shipped_hostfiles_hold_three_ranks(name: str, hosts: list[str]) -> None:
    lines = [line.partition("#")[0].split() for line in (HOSTFILES / name).read_text().splitlines()]
    found = [line for line in lines if line]
    assert [line[0] for line in found] == hosts
    assert sum(int(line[1].removeprefix("slots=")) for line in found) >= 3


def test_neither_torch_nor_mpi_is_imported() -> None:
    code = "import sys, mpgpt.config; sys.exit('torch' in sys.modules or 'mpi4py' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HOSTFILES.parent)
