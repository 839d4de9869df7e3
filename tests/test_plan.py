"""Dividing layers over ranks, against every way there is."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpgpt.core import Span
from mpgpt.errors import UsageError
from mpgpt.plan import HEAD_SHARE, divide, head_in_layers


def costs(spans: tuple[Span, ...], head: float) -> list[float]:
    return [len(span) + (head if rank == len(spans) - 1 else 0.0) for rank, span in enumerate(spans)]


def every_way(layers: int, ranks: int) -> list[tuple[Span, ...]]:
    cuts = ((0, *inner, layers) for inner in combinations(range(1, layers), ranks - 1))
    return [tuple(Span(start=a, stop=b) for a, b in pairwise(cut)) for cut in cuts]


sizes = st.integers(1, 60).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers)))
heads = st.floats(0, 40, allow_nan=False)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sizes, heads)
def test_spans_are_contiguous_disjoint_and_complete(size: tuple[int, int], head: float) -> None:
    layers, ranks = size
    spans = divide(layers, ranks, head)
    assert len(spans) == ranks
    assert [layer for span in spans for layer in range(span.start, span.stop)] == list(range(layers))


@pytest.mark.parametrize("head", [0.0, 0.5, 1.0, 2.7, 6.0, 50.0])
@pytest.mark.parametrize(("layers", "ranks"), [(n, r) for n in range(1, 11) for r in range(1, n + 1)])
def test_no_other_way_is_better(layers: int, ranks: int, head: float) -> None:
    """The busiest rank has the least that it can have, and among those ways the squares add up to the least."""
    best = min((max(c), sum(x * x for x in c)) for c in (costs(way, head) for way in every_way(layers, ranks)))
    ours = costs(divide(layers, ranks, head), head)
    assert (max(ours), sum(x * x for x in ours)) == pytest.approx(best)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes)
def test_without_a_head_no_rank_has_two_layers_more_than_another(size: tuple[int, int]) -> None:
    lengths = [len(span) for span in divide(*size)]
    assert max(lengths) - min(lengths) <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes, heads, heads)
def test_a_heavier_head_never_gives_the_last_rank_more_layers(size: tuple[int, int], a: float, b: float) -> None:
    light, heavy = sorted((a, b))
    assert len(divide(*size, heavy)[-1]) <= len(divide(*size, light)[-1])


def test_gpt2_on_three_ranks() -> None:
    assert [str(span) for span in divide(12, 3, 2.7)] == ["0-4", "5-9", "10-11"]


def test_a_head_heavier_than_all_layers_leaves_its_rank_one_layer() -> None:
    assert [len(span) for span in divide(9, 3, 100.0)] == [4, 4, 1]


def test_one_rank_takes_all_and_as_many_ranks_as_layers_take_one_each() -> None:
    assert divide(7, 1, 3.0) == (Span(start=0, stop=7),)
    assert [str(span) for span in divide(4, 4, 3.0)] == ["0", "1", "2", "3"]


def test_a_large_model_on_many_ranks_is_no_problem() -> None:
    assert {len(span) for span in divide(126, 64)} == {1, 2}


@pytest.mark.parametrize(("layers", "ranks"), [(1, 2), (12, 13), (12, 1000)])
def test_more_ranks_than_layers_is_the_users_mistake(layers: int, ranks: int) -> None:
    with pytest.raises(UsageError, match=rf"\b{ranks} ranks.*\b{layers} layers.*-n {layers}\b"):
        divide(layers, ranks, 1.0)


def test_the_head_counts_a_little() -> None:
    """Enough to spare the last rank a layer where layers do not come out even, not so much as to upset an even cut."""
    gpt2 = head_in_layers(50257 * 768, 7_087_872)
    assert gpt2 == pytest.approx(HEAD_SHARE * 5.4456, abs=1e-4)
    assert [str(span) for span in divide(12, 2, gpt2)] == ["0-5", "6-11"]
    assert [len(span) for span in divide(13, 2, gpt2)] == [7, 6]
    assert head_in_layers(0, 10) == 0
