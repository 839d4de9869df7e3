"""Whether a model is on every host, and fits there."""

from __future__ import annotations

from typing import Any

import pytest

from mpgpt.cluster.preflight import fitting
from mpgpt.cluster.preflight.verdict import HostReport
from mpgpt.config import RunConfig
from tests.cluster.preflight.reports import CONFIG, MODEL, hosts, said


def models_of(**models: Any) -> dict[str, HostReport]:
    return hosts(**{name: {"model": model} for name, model in models.items()})


ABSENT = {"folder": "", "home": "/m", "disk": 1 << 40, "wrong": "", "source": False}


def test_a_model_that_is_absent() -> None:
    judged = fitting.judge_model("x", models_of(a=MODEL, b=ABSENT), "mpgpt pull x", {"b": "joe@b"})
    assert said(judged) == ("model b: the model x is not there; ssh joe@b mpgpt pull x, or copy /m/x of a to /m there")
    judged = fitting.judge_model("x", models_of(a=MODEL, b=ABSENT | {"disk": 10**9}), "mpgpt pull x", {"b": "b"})
    assert "of the 5.4 GB that it takes its disk has 1.0 GB free; make room there, then" in said(judged)
    judged = fitting.judge_model("/m/x", models_of(a=ABSENT, b=ABSENT), "mpgpt pull /m/x", {"b": "b"})
    assert [str(trouble) for trouble in judged] == [
        f"{host}: the model /m/x is not there; copy it there" for host in "ab"
    ]
    assert fitting.judge_model("x.gguf", models_of(a=ABSENT | {"source": True}), "", {}) == []


def test_a_model_that_is_another_one() -> None:
    judged = fitting.judge_model("x", models_of(a=MODEL, b=MODEL | {"digest": "e"}), "mpgpt pull x", {"b": "b"})
    assert "b: its model x has other weights than that of a" in said(judged)
    damaged = ABSENT | {"folder": "/m/x", "wrong": "/m/x has no safetensors"}
    judged = fitting.judge_model("x", models_of(a=MODEL, b=damaged), "mpgpt pull x", {"b": "b"})
    assert "b: its model x is not whole: /m/x has no safetensors; remove /m/x there, then ssh b" in said(judged)


FIXED = {"rank_0": (0,), "rank_1": (1, 2, 3)}


@pytest.mark.parametrize(
    ("free", "settings", "expected"),
    [
        ((32, 32), {}, ""),
        ((8, 2.0), {"layer_distribution": FIXED}, "model b: layers 1-3 need 3.4 GB of memory, and 2.0 GB of its"),
        ((8, 4.0), {"layer_distribution": FIXED}, "remark b: layers 1-3 with the cache of 16 sequences of 4096 tokens"),
        ((8, 4.0), {"layer_distribution": FIXED, "max_sequences": 1, "ctx_length": 64}, ""),
        ((8, 2.0), {"layer_distribution": FIXED, "dtype": "int8", "max_sequences": 1, "ctx_length": 64}, ""),
        ((16, 2.0), {"max_sequences": 1}, "remark b: layers 2-3 need 2.3 GB of memory, and 2.0 GB of its"),
        (
            (2.4, 2.4),
            {"max_sequences": 1},
            "model a, b: the model needs 5.5 GB, the ranks have 4.8 GB; bfloat16 would need 2.8 GB",
        ),
        ((8, 8), {"num_layers": 5}, "model the settings: num_layers is 5 but the model has 4"),
        ((8, 8), {"layer_distribution": {"rank_0": (0, 1, 2, 3)}}, "model the settings: layer_distribution"),
    ],
)
def test_memory(free: tuple[float, float], settings: dict[str, Any], expected: str) -> None:
    reports = hosts(**{name: {"available": int(gb * 1e9)} for name, gb in zip("ab", free, strict=True)})
    config = RunConfig.model_validate(settings)
    judged = fitting.judge_memory(config, CONFIG, ["a", "b"], reports, other_model=False)
    assert said(judged).startswith(expected) and bool(judged) == bool(expected), said(judged)


def test_memory_of_another_model_than_the_settings() -> None:
    reports = hosts(a={"available": 16 * 10**9}, b={"available": 16 * 10**9})
    config = RunConfig(layer_distribution={"rank_0": (0,), "rank_1": (1,)}, max_sequences=1)
    assert fitting.judge_memory(config, CONFIG, ["a", "b"], reports, other_model=True) == []
    (trouble,) = fitting.judge_memory(config, {"model_type": "bert"}, ["a", "b"], reports, other_model=True)
    assert "'bert' is not supported" in str(trouble)
