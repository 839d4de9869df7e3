"""From logits to token ids, on the last rank.

Knows: logits, each row's sampling parameters, and the ids that rows carried so far (for the penalties).
Must not know: the model, the link, the scheduler, or what was drawn before: noise is a function of
(seed, position) alone, so a token does not depend on its company or on being computed twice.

Equal in distribution to transformers 5 ``generate()``: repetition penalty, temperature, top_k, top_p, min_p,
in that order; OpenAI's two penalties come behind the first. Two things are done otherwise, for accuracy and
speed. Probabilities are float64, so a token whose cumulative probability is within float32's rounding of
``top_p`` may fall on the other side; and top_k looks at the logits before the division by temperature, which
float32 may round into new ties.

Where this works on arrays it uses numpy and not torch: on one core, 50257 float32 values, argmax takes 2 us
instead of 31, a full sort 0.1 ms instead of 3.4. Only ``exp`` is torch's, numpy's being slow without AVX-512.

Shape suffixes: O outputs of the step, V vocabulary, N any number of candidates in vocabulary order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpgpt.core import NO_TOKEN, Row, Sampling, TokenLogprob
from mpgpt.errors import RequestError

Floats = NDArray[np.float32] | NDArray[np.float64]

HEAD = 1024
"""How many of the likeliest tokens top_p sorts before it falls back to sorting the vocabulary."""
STRIPES = 16
"""How many stripes ``at_least`` folds values into: more leave fewer maxima to rank, but more candidates."""
IMPOSSIBLE = -9999.0
"""The logprob of an impossible token, as OpenAI has it: JSON has no number for the logarithm of 0."""
BLOCK = 256
"""About the square root of a vocabulary: ``pick`` then walks as many blocks as weights."""


class Sampler:
    """Logits and rows to token ids. Its only state is what the rows carried: ids by slot and position."""

    def __init__(self, *, slots: int, context: int, vocab: int) -> None:
        self._history = np.zeros((slots, context), dtype=np.int32)
        self._vocab = vocab

    def observe(self, rows: Sequence[Row]) -> None:
        """Write every row's ids at its absolute positions. Once a step, before ``sample``."""
        slots, context = self._history.shape
        for row in rows:
            assert 0 <= row.slot < slots and row.start >= 0 and row.stop <= context, f"out of bounds: {row}"
            self._history[row.slot, row.start : row.stop] = row.ids

    def sample(self, rows: Sequence[Row], logits: Tensor) -> list[int]:
        """``logits`` [O, V] float32, each row's last ``outputs`` positions, in row order -> O ids, flat.

        Where the largest logit is NaN or infinite the id is ``NO_TOKEN``: damage is of one output, not of the step.
        """
        outputs = [(row, at) for row in rows for at in range(row.stop - row.outputs + 1, row.stop + 1)]
        assert logits.shape == (len(outputs), self._vocab) and logits.dtype == torch.float32
        scores_OV: NDArray[np.float32] = logits.numpy(force=True)
        # numpy's argmax is the first of equals, and of a row that holds NaN it is the NaN.
        best_O = scores_OV.argmax(axis=1)
        finite_O = np.isfinite(scores_OV[np.arange(len(outputs)), best_O])
        # Overflow is intended: a token far below the likeliest, at a low temperature, is at -inf.
        with np.errstate(over="ignore", invalid="ignore"):
            return [
                self._token(row, position, scores_V, int(best)) if finite else NO_TOKEN
                for (row, position), scores_V, best, finite in zip(outputs, scores_OV, best_O, finite_O, strict=True)
            ]

    def logprobs(self, rows: Sequence[Row], logits: Tensor, ids: Sequence[int]) -> list[TokenLogprob]:
        """Of the ``ids`` that ``sample`` made of these ``rows`` and ``logits`` [O, V] float32: for each as many as its
        row wants, flat, and none for ``NO_TOKEN``. Equally likely tokens come in the order of the vocabulary."""
        scores_OV: NDArray[np.float32] = logits.numpy(force=True)
        found: list[TokenLogprob] = []
        for count, token, scores_V in zip(
            (r.logprobs for r in rows for _ in range(r.outputs)), ids, scores_OV, strict=True
        ):
            if not count or token == NO_TOKEN:
                continue
            scores = scores_V.astype(np.float64)
            scores -= scores.max()
            scores -= np.log(torch.from_numpy(scores).exp().sum().item())
            near = largest(scores_V, count - 1) if count > 1 else np.arange(0)
            likeliest = near[np.argsort(-scores_V[near], kind="stable")][: count - 1]
            found += [(int(id), max(float(scores[id]), IMPOSSIBLE)) for id in (token, *likeliest)]
        return found

    def _token(self, row: Row, position: int, scores_V: NDArray[np.float32], best: int) -> int:
        """The token for ``position``, given the logits of the one before and the index of their largest."""
        sampling = row.sampling
        if sampling.repetition_penalty != 1:
            scores_V = penalised(scores_V, self._history[row.slot, :position], sampling.repetition_penalty)
            best = int(scores_V.argmax())
        if sampling.frequency_penalty or sampling.presence_penalty:
            said = self._history[row.slot, row.prompt : position]
            scores_V = lowered(scores_V, said, sampling.frequency_penalty, sampling.presence_penalty)
            best = int(scores_V.argmax())
        if sampling.temperature == 0:
            return best
        ids_N, weights_N = candidates(scores_V, scores_V[best], sampling)
        index = pick(weights_N, uniform(sampling.seed, position))
        return index if ids_N is None else int(ids_N[index])


def check(sampling: Sampling) -> None:
    """Raise ``RequestError`` with the parameter's name and its range when a value is impossible."""
    s, most = sampling, sys.float_info.max
    for name, value, possible, allowed in (
        ("temperature", s.temperature, lambda v: 0 <= v <= most, "a number >= 0 (0 is greedy)"),
        ("top_k", s.top_k, lambda v: isinstance(v, int) and v >= 0, "an integer >= 0 (0 is off)"),
        ("top_p", s.top_p, lambda v: 0 < v <= 1, "a number > 0 and <= 1 (1 is off)"),
        ("min_p", s.min_p, lambda v: 0 <= v <= 1, "a number from 0 to 1 (0 is off)"),
        ("repetition_penalty", s.repetition_penalty, lambda v: 0 < v <= most, "a number > 0 (1 is off)"),
        ("frequency_penalty", s.frequency_penalty, lambda v: -2 <= v <= 2, "a number from -2 to 2 (0 is off)"),
        ("presence_penalty", s.presence_penalty, lambda v: -2 <= v <= 2, "a number from -2 to 2 (0 is off)"),
        ("seed", s.seed, lambda v: isinstance(v, int) and 0 <= v < 2**64, "an integer >= 0 and < 2**64"),
    ):
        # A bool is an int to Python; in a request it is a mistake. A NaN fails every comparison.
        if isinstance(value, bool) or not isinstance(value, int | float) or not possible(value):
            raise RequestError(f"{name} must be {allowed}, not {value!r}.")


def uniform(seed: int, position: int) -> float:
    """The noise for one token, in [0, 1), 53 bits; a pure function of its arguments.

    Philox4x64-10, a counter-based generator: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as
    1, 2, 3", SC 2011.
    """
    return int(np.random.Philox(key=seed, counter=position).random_raw() >> 11) * 2.0**-53


def penalised(scores_V: NDArray[np.float32], seen: NDArray[np.int32], penalty: float) -> NDArray[np.float32]:
    """A copy of ``scores_V`` with each ``seen`` id made less likely (``penalty`` > 1), once.

    Keskar et al., "CTRL", 2019, section 4.1, with transformers' correction for negative logits. An id that
    occurs twice is written twice with the same value: cheaper than finding the unique ones.
    """
    scores_V = scores_V.copy()
    seen = seen[seen < len(scores_V)]  # the embedding may be padded beyond the logits
    old = scores_V[seen]
    # An absurd penalty must make neither NaN nor an infinity that was none; a banned token stays banned.
    factor = np.float32(min(max(penalty, 1e-30), 1e30))
    bound = np.finfo(np.float32).max
    new = np.where(old < 0, old * factor, old / factor).clip(-bound, bound)
    scores_V[seen] = np.where(old == -np.inf, old, new)
    return scores_V


def lowered(
    scores_V: NDArray[np.float32], said: NDArray[np.int32], frequency: float, presence: float
) -> NDArray[np.float32]:
    """A copy of ``scores_V`` with each id of ``said`` lowered by ``frequency`` for each time, and ``presence`` once.

    OpenAI's definition: API reference, "frequency and presence penalties".
    """
    scores_V = scores_V.copy()
    ids, counts = np.unique(said[said < len(scores_V)], return_counts=True)
    scores_V[ids] -= (frequency * counts + presence).astype(np.float32)
    return scores_V


def candidates(
    scores_V: NDArray[np.float32], top: np.float32, sampling: Sampling
) -> tuple[NDArray[np.intp] | None, NDArray[np.float64]]:
    """The candidates after top_k, top_p and min_p: ids in vocabulary order (None: all), and their weights.

    ``top`` is the largest of ``scores_V``. Weights are probabilities relative to the largest, which is what
    min_p is a threshold on.
    """
    ids_N = largest(scores_V, sampling.top_k) if 0 < sampling.top_k < len(scores_V) else None
    weights_N = (scores_V if ids_N is None else scores_V[ids_N]).astype(np.float64)
    weights_N -= top
    weights_N /= float(sampling.temperature)
    torch.from_numpy(weights_N).exp_()
    if sampling.top_p < 1:
        part = nucleus(weights_N, sampling.top_p)
        ids_N, weights_N = part if ids_N is None else ids_N[part], weights_N[part]
    if sampling.min_p > 0:
        part = np.flatnonzero(weights_N >= sampling.min_p)
        ids_N, weights_N = part if ids_N is None else ids_N[part], weights_N[part]
    return ids_N, weights_N


def largest(values: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Ascending indices of the ``k`` largest and of all equals of the k-th, as transformers does."""
    ids = at_least(values, k)
    near = values[ids]
    kth: np.float32 = np.partition(near, len(near) - k)[len(near) - k]
    return ids[near >= kth]


def at_least(values: Floats, k: int) -> NDArray[np.intp]:
    """Ascending indices of all values above some bound, including the ``k`` largest and their equals.

    The k-th largest of the maxima of disjoint stripes is such a bound, since k stripes have a value that
    reaches it. Finding it costs one pass and no sort.
    """
    width = len(values) // STRIPES
    if k >= width:
        return np.arange(len(values))
    maxima = values[: width * STRIPES].reshape(STRIPES, width).max(axis=0)
    return np.flatnonzero(values >= np.partition(maxima, width - k)[width - k])


def nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Ascending indices of the fewest likeliest tokens that together have ``top_p`` of the weight.

    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020. transformers removes a token when
    it and all below it have at most ``1 - top_p``; that is when those above it have ``top_p``. Of equals at
    the edge the later in the vocabulary stay, as after transformers' ascending sort, were it stable.

    The head of the descending order is a prefix of the whole, so its sums are the same floats, and the short
    way and the full sort give the same answer.
    """
    target = top_p * weights.sum()
    ids = at_least(weights, HEAD)
    falling = np.sort(weights[ids])[::-1]
    cumulative = falling.cumsum()
    if cumulative[-1] < target and len(ids) < len(weights):
        ids = np.arange(len(weights))
        falling = np.sort(weights)[::-1]
        cumulative = falling.cumsum()
    count = min(int(cumulative.searchsorted(target)) + 1, len(falling))
    edge = falling[count - 1]
    ids = ids[weights[ids] >= edge]
    return np.delete(ids, np.flatnonzero(weights[ids] == edge)[: len(ids) - count])


def pick(weights: NDArray[np.float64], u: float) -> int:
    """The inverse of the cumulative distribution at ``u`` in [0, 1), as an index; never one of weight 0.

    Cumulative in vocabulary order, in which float noise in the weights cannot swap tokens; first over the
    sums of blocks, then inside one, which is eight times as fast as over 50257 weights one by one.
    """
    whole = len(weights) // BLOCK * BLOCK
    blocks = np.append(weights[:whole].reshape(-1, BLOCK).sum(axis=1), weights[whole:].sum())
    block, rest = invert(blocks, u * blocks.sum())
    start = block * BLOCK
    return start + invert(weights[start : start + BLOCK], rest)[0]


def invert(weights: NDArray[np.float64], target: float) -> tuple[int, float]:
    """The first index whose cumulative weight exceeds ``target``, and what is left of the target there."""
    cumulative = weights.cumsum()
    index = int(cumulative.searchsorted(target, side="right"))
    if index == len(weights):  # rounding: the target is the whole sum, or a hair above
        index = int(np.flatnonzero(weights)[-1])
    return index, target - float(cumulative[index - 1] if index else 0.0)
