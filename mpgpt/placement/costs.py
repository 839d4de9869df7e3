"""The cost of steps, in seconds of stages, hosts and links, and the cost of layers, in bytes of a rank's memory.

Knows: how a measured speed becomes the time of a step; of which steps a request consists; a frame's size; the order of
stages and hops on a step's route; that ranks of one host share its cores.
Must not know: torch, MPI, how anything was measured, or how spans are chosen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mpgpt.core import Span
from mpgpt.engine.scheduler import next_chunk
from mpgpt.machines import ClusterProfile, Node, Shape, Workload
from mpgpt.transport.wire import HEADER, ROW

Points = tuple[tuple[int, float], ...]

HEADROOM = 0.10
"""The memory that a step computes with, as a share of that of weights and cache."""
BUFFERS = 64_000_000
"""Bytes more for every rank that has layers: frames, libraries' scratch space, Python's own."""
ID_BYTES = 4
"""A token id in a frame."""


def interpolate(points: Points, rows: int) -> float:
    """Seconds for ``rows`` from what was measured: straight lines between the points, the first one's seconds below
    it, and proportional to the rows above the last. 0 for no rows."""
    if rows <= 0:
        return 0.0
    at = bisect_left(points, (rows, -1.0))
    if at == len(points):
        most, seconds = points[-1]
        return seconds * rows / most
    (above, right) = points[at]
    if at == 0 or above == rows:
        return right
    below, left = points[at - 1]
    return left + (right - left) * (rows - below) / (above - below)


def stage_seconds(
    node: Node, layers: int, *, rows: int, outputs: int, context: float, chunk: bool = False
) -> float:  # fmt: skip
    """The time of one step on a stage of ``layers`` layers; with none, the time of handing it on.

    ``rows`` are tokens, each with ``context`` positions before it on average; ``outputs`` is the number of tokens that
    this stage samples: 0 unless it has the head. ``chunk`` says that the rows are one prompt's.
    """
    speed = node.speed
    assert speed is not None, "nobody measured this rank"
    attend = speed.attend_s if speed.attend_chunk_s is None or not chunk else speed.attend_chunk_s
    layer = interpolate(speed.layer_s, rows) + attend * rows * context
    return speed.step_s + layers * layer + interpolate(speed.head_s, outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """``count`` steps of one kind: ``tokens`` of ``rows`` sequences, of which ``outputs`` tokens are sampled."""

    count: float
    tokens: int
    rows: int
    outputs: int
    context: float
    cold: bool = False
    """Whether every rank has slept since the step before."""

    def seconds(self, node: Node, layers: int, *, head: bool) -> float:
        outputs = self.outputs if head else 0
        once = stage_seconds(
            node, layers, rows=self.tokens, outputs=outputs, context=self.context, chunk=self.tokens > self.rows
        )
        assert node.speed
        return self.count * once * (node.speed.cold if self.cold else 1.0)

    def bytes(self, token_bytes: int) -> float:
        """Bytes on a hop with hidden states; with ``token_bytes`` 0, on the hop from a rank 0 without layers."""
        return self.count * step_bytes(self.tokens, self.rows, token_bytes)

    @property
    def result_bytes(self) -> float:
        return self.count * result_bytes(self.outputs)


def step_bytes(tokens: int, rows: int, token_bytes: int) -> int:
    """The length of a step's frame without padding: rows, ids, and hidden states of ``token_bytes`` a token."""
    return HEADER.size + ROW.size * rows + (ID_BYTES + token_bytes) * tokens


def result_bytes(outputs: int) -> int:
    return HEADER.size + ID_BYTES * outputs


def chunks(tokens: int, most: int) -> list[int]:
    """The lengths of the chunks into which the scheduler cuts a prompt, ``most`` tokens at a time."""
    cut, left = [], tokens
    while left:
        cut.append(next_chunk(left, most))
        left -= cut[-1]
    return cut


def chunk_of(nodes: Iterable[Node]) -> int:
    """The length of a prompt's chunk: the most rows that were measured."""
    return max(node.speed.layer_s[-1][0] for node in nodes if node.speed)


def prompt_work(workload: Workload, chunk: int) -> list[Work]:
    """The steps of one prompt alone, chunk by chunk; the last one samples a token."""
    works, start, cut = [], 0, chunks(workload.prompt_tokens, chunk)
    for at, size in enumerate(cut, 1):
        context = start + (size - 1) / 2
        works.append(Work(count=1, tokens=size, rows=1, outputs=int(at == len(cut)), context=context))
        start += size
    return works


def decode_work(workload: Workload, stages: int) -> list[Work]:
    """The steps of one token for each sequence, as the scheduler cuts them: one for each stage, or fewer where
    sequences run out. The last step has the rest."""
    share = -(-workload.sequences // stages)
    full, rest = divmod(workload.sequences, share)
    sizes = [(full, share)] + ([(1, rest)] if rest else [])
    context = workload.prompt_tokens + workload.new_tokens / 2
    return [Work(count=count, tokens=rows, rows=rows, outputs=rows, context=context) for count, rows in sizes]


def single_step_work(workload: Workload, stages: int) -> list[Work]:
    """The step of one token of a sequence that decodes alone."""
    context = workload.prompt_tokens + workload.new_tokens / 2
    return [Work(count=1, tokens=1, rows=1, outputs=1, context=context, cold=stages > 1)]


def request_work(workload: Workload, stages: int, chunk: int) -> list[Work]:
    """All steps of one request among others: its prompt, and its share of the steps that decode."""
    share = max(workload.new_tokens - 1, 0) / workload.sequences  # the prompt's last chunk gives the first token
    decoding = [replace(work, count=work.count * share) for work in decode_work(workload, stages)]
    return prompt_work(workload, chunk) + decoding


def work_seconds(works: Sequence[Work], node: Node, layers: int, *, head: bool) -> float:
    return sum(work.seconds(node, layers, head=head) for work in works)


def slice_bytes(shape: Shape, layers: int, *, last: bool) -> int:
    """Bytes of the weights of ``layers`` layers and their cache, and of the head on the ``last`` rank.

    The first rank's embedding takes none: its rows are looked up in the mapped file.
    """
    return layers * (shape.layer_bytes + shape.kv_bytes) + shape.head_bytes * last


def held_bytes(shape: Shape, layers: int, *, last: bool) -> int:
    """The memory that a rank needs for ``layers`` layers; 0 for none."""
    return round(slice_bytes(shape, layers, last=last) * (1 + HEADROOM)) + BUFFERS if layers else 0


def needs(shape: Shape) -> int:
    """The memory that a model needs on one rank, bytes; on several, ``BUFFERS`` more for each further one."""
    return held_bytes(shape, shape.layers, last=True)


def stages_in_order(spans: Sequence[Span | None]) -> list[tuple[int, int]]:
    """(rank, layers) in the order in which a step passes the stages: rank 0 always, then those that have layers."""
    return [(rank, len(span) if span else 0) for rank, span in enumerate(spans) if span or rank == 0]


def threads_used(node: Node) -> int:
    """The threads of a rank that its host can run at once."""
    return min(node.threads, node.cores)


def by_host(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """The ranks of each host."""
    hosts: dict[str, list[Node]] = {}
    for node in nodes:
        hosts.setdefault(node.host, []).append(node)
    return hosts


def is_crowded(nodes: Iterable[Node]) -> bool:
    """Whether some host has fewer cores than its ranks have threads together."""
    return any(sum(map(threads_used, ranks)) > ranks[0].cores for ranks in by_host(nodes).values())


class Route:
    """A step's way around a ring: stages and hops."""

    def __init__(self, spans: Sequence[Span | None], profile: ClusterProfile) -> None:
        self.stages = stages_in_order(spans)
        self._nodes, self._last = profile.nodes, self.stages[-1][0]
        self.hops = [profile.links[a, b] for (a, _), (b, _) in pairwise(self.stages)]
        self.back = profile.links[self._last, 0] if self._last else None
        """The result's hop to rank 0; None where rank 0 has the last stage."""
        # The first hop carries ids alone if rank 0 has no layers.
        self._width = [profile.shape.token_bytes if layers else 0 for _, layers in self.stages[:-1]]

    def busy(self, works: Sequence[Work]) -> dict[int, float]:
        """Seconds that each rank computes."""
        return {
            rank: work_seconds(works, self._nodes[rank], layers, head=rank == self._last and layers > 0)
            for rank, layers in self.stages
        }

    def stretched(self, works: Sequence[Work]) -> dict[int, float]:
        """The same where ranks of a host share too few cores."""
        busy = self.busy(works)
        for nodes in by_host(self._nodes[rank] for rank in busy).values():
            cores, ranks = nodes[0].cores, [node.rank for node in nodes]
            work = sum(busy[node.rank] * min(node.threads, cores) for node in nodes) / cores
            factor = max(1.0, work / max(busy[rank] for rank in ranks)) if len(ranks) > 1 and work else 1.0
            busy.update({rank: busy[rank] * factor for rank in ranks})
        return busy

    def busiest(self, works: Sequence[Work]) -> float:
        """Seconds of the busiest stage, host or link."""
        sending = [
            sum(work.bytes(width) for work in works) / edge.bytes_per_s
            for edge, width in zip(self.hops, self._width, strict=True)
        ]
        if self.back:
            sending.append(sum(work.result_bytes for work in works) / self.back.bytes_per_s)
        return max([*self.stretched(works).values(), *sending])

    def seconds(self, works: Sequence[Work]) -> float:
        """All stages and hops, one after the other."""
        return sum(self.busy(works).values()) + sum(
            (send + latency) * work.count for work in works for send, latency in self._hops(work)
        )

    def _hops(self, work: Work) -> list[tuple[float, float]]:
        """(seconds of sending, latency) of one step on each hop of its way, the result's last."""
        hops = [
            (step_bytes(work.tokens, work.rows, width) / edge.bytes_per_s, edge.latency_s)
            for edge, width in zip(self.hops, self._width, strict=True)
        ]
        back = self.back
        return [*hops, (result_bytes(work.outputs) / back.bytes_per_s, back.latency_s) if back else (0.0, 0.0)]

    def first_token(self, works: Sequence[Work], depth: int) -> float:
        """Seconds from a prompt's first chunk going in to the last one's result, ``depth`` of them at once at most;
        but not less than its host's cores need."""
        free, sent, results = [0.0] * len(self.stages), [0.0] * len(self.stages), list[float]()
        for at, work in enumerate(works):
            now = results[at - depth] if at >= depth else 0.0
            for place, ((rank, layers), (send, latency)) in enumerate(zip(self.stages, self._hops(work), strict=True)):
                head = rank == self._last and layers > 0
                free[place] = max(now, free[place]) + work.seconds(self._nodes[rank], layers, head=head)
                sent[place] = max(free[place], sent[place]) + send
                now = sent[place] + latency
            results.append(now)
        return max(results[-1], max(self.stretched(works).values()))
