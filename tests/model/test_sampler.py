"""The sampler against transformers' own processors, and against its own promises.

Every random choice has a fixed seed: a chi-square that passes once passes always.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import mpgpt.model.sampler
from mpgpt.core import GREEDY, NO_TOKEN, Row, Sampling
from mpgpt.errors import RequestError
from mpgpt.model.sampler import Sampler, candidates, check, nucleus, pick, uniform

PROMPT = (3, 1, 4, 1, 5)


def theirs(logits_V: Tensor, sampling: Sampling, ids: Sequence[int]) -> NDArray[np.float64]:
    """The probabilities that transformers' generate() draws from, [V]."""
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature != 1:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    scores = chain(cast(Any, torch.tensor([list(ids)])), cast(Any, logits_V[None]))[0]
    return cast("NDArray[np.float64]", scores.double().softmax(-1).numpy())


def ours(logits_V: Tensor, sampling: Sampling) -> NDArray[np.float64]:
    """The probabilities that ``pick`` draws from, [V]."""
    scores: NDArray[np.float32] = logits_V.numpy()
    ids, weights = candidates(scores, scores.max(), sampling)
    full = np.zeros(len(scores))
    full[slice(None) if ids is None else ids] = weights
    return cast("NDArray[np.float64]", full / full.sum())


def randn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def sampler(vocab: int, slots: int = 4, context: int = 64) -> Sampler:
    return Sampler(slots=slots, context=context, vocab=vocab)


# --- the distribution ------------------------------------------------------------------------------------

DISTRIBUTIONS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=1.0, repetition_penalty=1.4),
    Sampling(temperature=1.0, repetition_penalty=0.7),
    Sampling(temperature=0.8, top_k=8, top_p=0.9),
    Sampling(temperature=1.3, top_k=9, min_p=0.05),
    Sampling(temperature=1.3, top_p=0.85, min_p=0.05),
    Sampling(temperature=1.5, top_k=10, top_p=0.95, min_p=0.02, repetition_penalty=1.2),
]


def agrees(drawn: Sequence[int], expected: NDArray[np.float64]) -> None:
    counts = np.bincount(drawn, minlength=len(expected))
    support = expected > 0
    assert not counts[~support].any(), "a token was drawn that transformers excludes"
    # Merge the cells too small for the chi-square approximation.
    small = expected * len(drawn) < 5
    observed = np.append(counts[support & ~small], counts[small].sum())
    wanted = np.append(expected[support & ~small], expected[small].sum()) * len(drawn)
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    if len(wanted) > 1:
        assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


@pytest.mark.parametrize("sampling", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("vocab", [12, 50])
def test_frequencies_over_seeds(sampling: Sampling, vocab: int) -> None:
    logits, draws = randn(vocab, seed=vocab), 3000
    row = Row(slot=0, start=0, ids=PROMPT, outputs=1)
    rows = [replace(row, sampling=replace(sampling, seed=seed)) for seed in range(draws)]
    subject = sampler(vocab)
    subject.observe(rows[:1])
    agrees(subject.sample(rows, logits.expand(draws, vocab)), theirs(logits, sampling, PROMPT))


@pytest.mark.parametrize("sampling", DISTRIBUTIONS, ids=str)
def test_frequencies_over_positions(sampling: Sampling) -> None:
    vocab, draws = 20, 3000
    logits = randn(vocab, seed=9)
    # The new ids repeat what the prompt has, so that every position has the same penalties.
    row = Row(slot=1, start=4, ids=(5,) * draws, outputs=draws, sampling=replace(sampling, seed=2**64 - 1))
    subject = sampler(vocab, context=draws + 4)
    subject.observe([Row(slot=1, start=0, ids=PROMPT[:4]), row])
    agrees(subject.sample([row], logits.expand(draws, vocab)), theirs(logits, sampling, PROMPT))


# Steps of an eighth make ties common, and keep float32 division from making new ones.
grids = st.lists(st.integers(-60, 60), min_size=1, max_size=80).map(
    lambda eighths: torch.tensor(eighths, dtype=torch.float32) / 8
)


def borderline(logits_V: Tensor, sampling: Sampling) -> bool:
    """Whether a sum or ratio is at a limit but for float32 rounding: there transformers' answer is chance."""
    unlimited = ours(logits_V, replace(sampling, top_p=1.0, min_p=0.0))
    sums = np.sort(unlimited)[::-1].cumsum()
    ratios = unlimited / unlimited.max()
    at_top_p = sampling.top_p < 1 and (abs(sums - sampling.top_p) < 2e-6).any()
    return bool(at_top_p or (sampling.min_p > 0 and (abs(ratios - sampling.min_p) < 2e-6).any()))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    logits_V=grids,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.25, 3.0]),
    top_k=st.integers(0, 90),
    top_p=st.floats(0.01, 1.0),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.99)),
)
def test_support_is_transformers(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assume(not borderline(logits_V, sampling))
    expected, got = theirs(logits_V, sampling, [0]), ours(logits_V, sampling)
    # Which of the equals at top_p's edge stay depends on transformers' unstable sort; how many does not.
    assert sorted(logits_V[expected > 0].tolist()) == sorted(logits_V[got > 0].tolist())
    edge = logits_V[got > 0].min()
    above = (logits_V > edge).numpy()
    assert ((expected > 0) == (got > 0))[above].all()
    np.testing.assert_allclose(np.sort(got), np.sort(expected), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("vocab", "top_p"), [(4, 0.75), (4, 0.5), (8, 0.125), (10, 0.9), (20, 0.95), (3, 1 / 3)])
def test_equals_at_the_edge_of_top_p(vocab: int, top_p: float) -> None:
    kept = ours(torch.zeros(vocab), Sampling(temperature=1.0, top_p=top_p)) > 0
    assert kept.sum() == (theirs(torch.zeros(vocab), Sampling(temperature=1.0, top_p=top_p), [0]) > 0).sum()
    assert kept[-kept.sum() :].all(), "the later in the vocabulary stay"


def test_top_k_keeps_all_equals_of_the_kth() -> None:
    logits = torch.tensor([1.0, 5.0, 3.0, 3.0, 0.0, 3.0])
    assert np.flatnonzero(ours(logits, Sampling(temperature=0.5, top_k=2))).tolist() == [1, 2, 3, 5]


def test_min_p_1_keeps_the_likeliest_alone() -> None:
    logits = torch.tensor([1.0, 5.0, 4.999, 5.0])
    assert np.flatnonzero(ours(logits, Sampling(temperature=2.0, min_p=1.0))).tolist() == [1, 3]


@pytest.mark.parametrize("vocab", [50257, 20000, 1000])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("ties", [False, True])
def test_big_vocabulary_by_the_short_way(vocab: int, scale: float, ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = randn(vocab, seed=vocab, scale=scale)
    logits = (logits * 2).round() / 2 if ties else logits
    shuffled = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))
    weights = np.exp((logits - logits.max()).double().numpy())
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.99, 1 - 1e-7, 1 - 2**-53):
        short = nucleus(weights, top_p)
        with monkeypatch.context() as patched:
            patched.setattr(mpgpt.model.sampler, "HEAD", vocab)
            assert np.array_equal(short, nucleus(weights, top_p))
        assert weights[short].sum() >= top_p * weights.sum() * (1 - 1e-12)
        least = weights[short].min()
        assert weights[short].sum() - least < top_p * weights.sum() * (1 + 1e-12), "one fewer would do"
    for top_k in (1, 40, vocab // 10, vocab):
        sampling = Sampling(temperature=0.7, top_k=top_k)
        threshold = torch.topk(logits, top_k).values[-1]
        assert np.array_equal(ours(logits, sampling) > 0, (logits >= threshold).numpy())
        # The order of the vocabulary is nothing to the rules.
        np.testing.assert_allclose(ours(logits[shuffled], sampling), ours(logits, sampling)[shuffled.numpy()])


# --- the noise and the draw ------------------------------------------------------------------------------


def test_noise_is_philox_of_seed_and_position() -> None:
    # Random123's kat_vectors: philox4x64-10, key 0, counter 0. numpy counts before it draws: 2**256 - 1.
    assert uniform(0, 2**256 - 1) == (0x16554D9ECA36314C >> 11) / 2**53
    word = int(np.random.Philox(key=2**64 - 1, counter=4).random_raw())
    assert uniform(2**64 - 1, 4) == (word >> 11) / 2**53 == uniform(2**64 - 1, 4)
    noise = [uniform(seed, position) for seed in (0, 1, 2**63, 2**64 - 1) for position in range(500)]
    assert len(set(noise)) == len(noise)
    assert all(0 <= u < 1 for u in noise)
    assert chisquare(np.histogram(noise, bins=20, range=(0, 1))[0]).pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 2, 5, 255, 256, 257, 512, 1000, 50257])
def test_never_a_token_of_probability_zero(size: int) -> None:
    generator = np.random.default_rng(size)
    weights = generator.random(size) * (generator.random(size) < 0.2)
    weights[[0, -1]] = 0
    weights[size // 2] = 1e-300
    edges = weights.cumsum() / weights.sum()
    for u in (0.0, 5e-324, 1 - 2**-53, *edges[edges < 1][:300], *generator.random(200)):
        assert weights[pick(weights, float(u))] > 0


def test_draw_is_the_inverse_of_the_cumulative_sum_in_vocabulary_order() -> None:
    weights = np.random.default_rng(0).random(3000)
    cumulative = weights.cumsum() / weights.sum()
    for u in np.random.default_rng(1).random(500):
        assert pick(weights, u) == cumulative.searchsorted(u, side="right")


def test_banned_tokens_and_extreme_parameters() -> None:
    logits = torch.tensor([-math.inf, 1.0, -math.inf, 2.0, -3e38, 0.0])
    subject = sampler(6)
    for extreme in ({"temperature": 5e-324}, {"temperature": 1e300}, {"repetition_penalty": 1e-50},
                    {"repetition_penalty": 1e300}, {"top_k": 10**30}, {"top_p": 5e-324},
                    {"repetition_penalty": 2.0, "temperature": 1e300}):  # fmt: skip
        for seed in range(50):
            sampling = replace(Sampling(temperature=1.0, seed=seed), **cast(Any, extreme))
            check(sampling)
            row = Row(slot=0, start=0, ids=(0, 1, 3, 4, 5), outputs=1, sampling=sampling)
            subject.observe([row])
            assert subject.sample([row], logits[None])[0] not in (0, 2)
    cold = Row(slot=0, start=0, ids=(1,), outputs=1, sampling=Sampling(temperature=5e-324))
    assert subject.sample([cold], logits[None]) == [3]


# --- rows, history, company ------------------------------------------------------------------------------


def test_greedy_is_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 7.0, 7.0], [-1.0, -1.0, -1.0], [-5.0, -math.inf, -4.0]])
    rows = [Row(slot=slot, start=0, ids=(0,), outputs=1) for slot in range(3)]
    assert sampler(3).sample(rows, logits) == [1, 0, 2]


def test_greedy_ignores_the_other_parameters_but_not_the_penalty() -> None:
    logits = torch.tensor([[1.0, 1.2, 0.9, -0.5]])
    sampling = Sampling(temperature=0.0, top_k=2, top_p=0.1, min_p=0.9, seed=5)
    subject = sampler(4)
    row = Row(slot=0, start=0, ids=(1, 1), outputs=1, sampling=sampling)
    subject.observe([row])
    assert subject.sample([row], logits) == [1]
    before = logits.clone()
    assert subject.sample([replace(row, sampling=replace(sampling, repetition_penalty=1.25))], logits) == [0]
    assert logits.equal(before), "the caller's logits are not ours to change"


def test_penalty_is_once_an_id_and_makes_negative_logits_less_likely() -> None:
    logits = torch.tensor([[-1.0, -1.1, -9.0, 0.0]])[:, :3]
    row = Row(slot=0, start=0, ids=(0, 0, 2), outputs=1, sampling=Sampling(repetition_penalty=1.05))
    subject = sampler(3)
    subject.observe([row])
    assert subject.sample([row], logits) == [0]  # -1.05 once; twice would be -1.1025
    assert subject.sample([replace(row, sampling=Sampling(repetition_penalty=1.2))], logits) == [1]


def test_ids_beyond_the_logits_have_no_penalty() -> None:
    row = Row(slot=0, start=0, ids=(1, 999), outputs=1, sampling=Sampling(repetition_penalty=2.0))
    subject = sampler(3)
    subject.observe([row])
    assert subject.sample([row], torch.tensor([[0.0, 1.5, 1.0]])) == [2]


MIXED = [
    GREEDY,
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_k=40, seed=2),
    Sampling(temperature=0.9, top_p=0.9, seed=3),
    Sampling(temperature=1.1, min_p=0.05, seed=4),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=1.2, top_k=200, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=5),
]


def test_company_changes_nothing() -> None:
    vocab = 2003  # odd, so that rows are not aligned alike
    logits = randn(len(MIXED), vocab, seed=3)
    rows = [
        Row(slot=slot, start=0, ids=tuple(range(slot, 40)), outputs=1, sampling=sampling)
        for slot, sampling in enumerate(MIXED)
    ]
    subject = sampler(vocab, slots=8)
    subject.observe(rows)
    together = subject.sample(rows, logits)
    assert subject.sample(rows[::-1], logits.flip(0)) == together[::-1]
    for row, row_logits, token in zip(rows, logits, together, strict=True):
        alone = sampler(vocab, slots=8)
        moved = replace(row, slot=7 - row.slot)
        alone.observe([moved])
        assert alone.sample([moved], row_logits[None].clone()) == [token]
        warm = replace(row.sampling, temperature=1.0)
        assert np.array_equal(ours(row_logits, warm), ours(row_logits.clone(), warm)), "bit for bit"


def test_same_seed_and_position_same_token_else_other_noise() -> None:
    vocab, sampling = 5000, Sampling(temperature=1.0, seed=11)
    flat = torch.zeros(1, vocab)
    subject = sampler(vocab, context=200)

    def token(position: int, seed: int = 11) -> int:
        row = Row(slot=0, start=position, ids=(0,), outputs=1, sampling=replace(sampling, seed=seed))
        return subject.sample([row], flat)[0]

    tokens = [token(position) for position in range(60)]
    assert [token(position) for position in reversed(range(60))] == tokens[::-1]
    assert len(set(tokens)) > 50
    assert sum(a == b for a, b in zip(tokens, (token(p, seed=12) for p in range(60)), strict=True)) <= 2


@pytest.mark.parametrize("sampling", MIXED, ids=str)
def test_drafts_equal_one_by_one(sampling: Sampling) -> None:
    vocab, prompt, draft = 300, tuple(range(10)), (250, 17, 250, 3)
    logits = randn(5, vocab, seed=8)
    many, single = sampler(vocab), sampler(vocab)
    whole = Row(slot=2, start=0, ids=prompt + draft, outputs=5, sampling=sampling)
    other = Row(slot=3, start=0, ids=(1, 2), outputs=0)
    many.observe([other, whole, other])
    together = many.sample([other, whole, other], logits)

    steps = [Row(slot=2, start=0, ids=prompt, outputs=1, sampling=sampling)]
    steps += [Row(slot=2, start=10 + i, ids=(token,), outputs=1, sampling=sampling) for i, token in enumerate(draft)]
    one_by_one = []
    for row, row_logits in zip(steps, logits, strict=True):
        single.observe([row])
        one_by_one += single.sample([row], row_logits[None])
    assert together == one_by_one


def test_a_draft_is_not_penalised_for_what_comes_after() -> None:
    row = Row(slot=0, start=0, ids=(0, 1, 2), outputs=3, sampling=Sampling(repetition_penalty=3.0))
    subject = sampler(4)
    subject.observe([row])
    assert subject.sample([row], torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(3, 4)) == [1, 2, 0]


def test_rewound_history_is_forgotten() -> None:
    penalty = Sampling(repetition_penalty=3.0)
    logits = torch.tensor([[2.0, 1.9, 1.8]])
    subject = sampler(3)
    subject.observe([Row(slot=0, start=0, ids=(2, 0, 0, 1))])
    back = Row(slot=0, start=1, ids=(1,), outputs=1, sampling=penalty)
    subject.observe([back])
    assert subject.sample([back], logits) == [0]  # 2 and 1 were seen; the zeros were taken back
    fresh = Row(slot=0, start=0, ids=(0,), outputs=1, sampling=penalty)
    subject.observe([fresh])
    assert subject.sample([fresh], logits) == [1]


def test_no_outputs_no_tokens() -> None:
    row = Row(slot=0, start=0, ids=(1, 2))
    subject = sampler(9)
    subject.observe([row])
    assert subject.sample([row], torch.empty(0, 9)) == []
    assert subject.sample([], torch.empty(0, 9)) == []


# --- damage and impossible values ------------------------------------------------------------------------


ALL = slice(None)
DAMAGE: dict[str, tuple[tuple[int | slice, float], ...]] = {
    "one nan": ((70, math.nan),), "the first nan": ((0, math.nan),), "one infinite": ((70, math.inf),),
    "all nan": ((ALL, math.nan),), "all infinite": ((ALL, math.inf),), "all impossible": ((ALL, -math.inf),),
    "nan among the impossible": ((ALL, -math.inf), (99, math.nan)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("sampling", [
    GREEDY, Sampling(temperature=1.0), Sampling(repetition_penalty=1.1), Sampling(temperature=0.7, top_k=5, top_p=0.9),
    Sampling(temperature=1.5, min_p=0.1, frequency_penalty=1.0, presence_penalty=-2.0),
], ids=str)  # fmt: skip
def test_damaged_logits_give_no_token_and_the_others_do_not_notice(
    damage: tuple[tuple[int | slice, float], ...], sampling: Sampling
) -> None:
    """Whole rows, and one draft of several; no logprobs are given of what has no token."""
    logits = randn(5, 100)
    rows = [
        Row(slot=0, start=0, ids=(0,), outputs=1, sampling=sampling),
        Row(slot=2, start=3, ids=(5, 6, 7), outputs=3, logprobs=3, sampling=sampling),
        Row(slot=3, start=0, ids=(0, 4), outputs=1, logprobs=2, sampling=sampling),
    ]
    subject = sampler(100)
    subject.observe(rows)
    ids = subject.sample(rows, logits)
    logprobs = subject.logprobs(rows, logits, ids)
    for bad in range(5):
        damaged = logits.clone()
        for where, value in damage:
            damaged[bad, where] = value
        got = subject.sample(rows, damaged)
        assert got == [*ids[:bad], NO_TOKEN, *ids[bad + 1 :]]
        first, last = ((0, 0), (0, 3), (3, 6), (6, 9), (9, 11))[bad]
        assert subject.logprobs(rows, damaged, got) == logprobs[:first] + logprobs[last:]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("temperature", [-0.1, math.nan, math.inf, -math.inf, 10**400, "1", None, True]),
        ("top_k", [-1, 1.5, 40.0, math.nan, "40", None, True]),
        ("top_p", [0, 0.0, -0.5, 1.0001, math.nan, math.inf, "0.9", None]),
        ("min_p", [-0.01, 1.01, math.nan, math.inf, None]),
        ("repetition_penalty", [0, 0.0, -1.0, math.nan, math.inf, None]),
        ("seed", [-1, 2**64, 0.5, math.nan, None, False]),
    ],
)
def test_impossible_values(name: str, bad: list[object]) -> None:
    for value in bad:
        with pytest.raises(RequestError, match=rf"^{name} must be (a number|an integer) .*, not "):
            check(replace(GREEDY, **cast(Any, {name: value})))


def test_possible_values() -> None:
    check(GREEDY)
    check(Sampling(temperature=2, top_k=0, top_p=1, min_p=1, repetition_penalty=1, seed=2**64 - 1))
    check(Sampling(temperature=1e-9, top_k=10**9, top_p=1e-9, min_p=0.0, repetition_penalty=0.01, seed=0))


# --- what OpenAI's clients ask for --------------------------------------------------------------------------


def test_penalties_count_what_was_said_and_not_the_prompt() -> None:
    """OpenAI's formula, by hand: logit - count * frequency - (count > 0) * presence."""
    logits = torch.zeros(1, 8)
    logits[0, :4] = torch.tensor([3.0, 2.9, 2.8, 2.7])
    said = (0, 0, 1)
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.3)
    sampled = sampler(8)
    ids = (0, 1, 2, 3, *said)
    row = Row(slot=1, start=0, ids=ids, outputs=1, prompt=4, sampling=sampling)
    sampled.observe([row])
    # 3.0 - 1.0 - 0.3 and 2.9 - 0.5 - 0.3 against 2.8, which stands in the prompt only.
    assert sampled.sample([row], logits) == [2]
    assert sampled.sample([replace(row, prompt=len(ids))], logits) == [0]
    assert sampled.sample([replace(row, sampling=Sampling(frequency_penalty=-0.5))], logits) == [0]
    assert sampled.sample([replace(row, prompt=0)], logits) == [2], "the prompt counts now, but for all alike"


@pytest.mark.parametrize("count", [1, 2, 6, 21])
def test_logprobs_are_log_softmax_of_the_models_own_logits(count: int) -> None:
    """torch's, whatever the temperature and the penalties."""
    logits = randn(3, 50, seed=5)
    rows = [
        Row(
            slot=0, start=0, ids=(1, 2), outputs=1, logprobs=count, sampling=Sampling(temperature=0.3, top_k=3, seed=9)
        ),
        Row(slot=1, start=0, ids=(4,), outputs=1),
        Row(slot=2, start=0, ids=(5,), outputs=1, logprobs=1, sampling=Sampling(repetition_penalty=1.5)),
    ]
    sampled = sampler(50)
    sampled.observe(rows)
    ids = sampled.sample(rows, logits)
    logprobs = sampled.logprobs(rows, logits, ids)
    assert len(logprobs) == count + 1
    truth = logits.double().log_softmax(-1)
    best = truth[0].topk(count - 1)
    assert [id for id, _ in logprobs] == [ids[0], *best.indices.tolist(), ids[2]]
    wanted = [truth[0, ids[0]].item(), *best.values.tolist(), truth[2, ids[2]].item()]
    assert [log for _, log in logprobs] == pytest.approx(wanted, abs=1e-9)


def test_logprobs_of_equals_and_of_the_impossible() -> None:
    logits = torch.full((1, 6), -math.inf)
    logits[0, [1, 3, 4]] = 2.0
    row = Row(slot=0, start=0, ids=(0,), outputs=1, logprobs=5)
    third = pytest.approx(-math.log(3))
    assert sampler(6).logprobs([row], logits, [4]) == [(4, third), (1, third), (3, third), (4, third), (0, -9999.0)]
