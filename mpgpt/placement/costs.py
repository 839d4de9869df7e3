"""What steps cost stages and links, in seconds, and what layers cost a rank, in bytes.

Knows: how a measured speed becomes the time of a step; of which steps a sequence's life consists; a frame's size.
Must not know: torch, MPI, how anything was measured, or which rank has which layers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mpgpt.core import Span
from mpgpt.machines import Edge, Node, Shape, Workload

Links = Mapping[tuple[int, int], Edge]
"""Every ordered pair of ranks; none is looked up where one rank does everything."""
Points = tuple[tuple[int, float], ...]

HEADROOM = 0.10
"""More memory than weights and cache take, as a share of them: what a step computes with."""
BUFFERS = 64_000_000
"""And in bytes for every rank that has layers: frames, libraries' scratch space, Python's own."""

# What wire.py's docstring says of frames; a few bytes of padding are left out.
FRAME_BYTES, ROW_BYTES, ID_BYTES = 32, 88, 4


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
    """What one step costs a stage of so many layers.

    ``rows`` are tokens, each with ``context`` positions before it on average; ``outputs`` is for how many of them a
    token is wanted of this stage: 0 unless it has the head. ``chunk`` says that they are one prompt's. No
    layers is what handing a step on costs.
    """
    speed = node.speed
    assert speed is not None, "nobody measured this rank"
    attend = speed.attend_s if speed.attend_chunk_s is None or not chunk else speed.attend_chunk_s
    layer = interpolate(speed.layer_s, rows) + attend * rows * context
    return speed.step_s + layers * layer + interpolate(speed.head_s, outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """``count`` steps of one kind: ``tokens`` of ``rows`` sequences, ``outputs`` tokens wanted."""

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
        """On a hop with hidden states; with ``token_bytes`` 0 on the way to a first stage that is not rank 0's."""
        return self.count * step_bytes(self.tokens, self.rows, token_bytes)

    @property
    def result_bytes(self) -> float:
        return self.count * result_bytes(self.outputs)


def step_bytes(tokens: int, rows: int, token_bytes: int) -> int:
    """A step's frame: rows and ids always, hidden states of ``token_bytes`` a token."""
    return FRAME_BYTES + ROW_BYTES * rows + (ID_BYTES + token_bytes) * tokens


def result_bytes(outputs: int) -> int:
    return FRAME_BYTES + ID_BYTES * outputs


def chunks(tokens: int, most: int) -> list[int]:
    """How a prompt is cut: ``most`` tokens at a time, towards the end half of what is left, but never less than half
    of ``most``. The same as ``scheduler.py`` does, and a test holds them together."""
    cut, left = [], tokens
    while left:
        cut.append(min(left, most, max(most // 2, -(-left // 2), 1)))
        left -= cut[-1]
    return cut


def chunk_of(nodes: Iterable[Node]) -> int:
    """The tokens of a prompt's chunk: the most rows that were measured."""
    return max(node.speed.layer_s[-1][0] for node in nodes if node.speed)


def prompt_work(workload: Workload, chunk: int) -> list[Work]:
    """One prompt alone, chunk by chunk; a token is wanted of the last."""
    works, start, cut = [], 0, chunks(workload.prompt_tokens, chunk)
    for at, size in enumerate(cut, 1):
        context = start + (size - 1) / 2
        works.append(Work(count=1, tokens=size, rows=1, outputs=int(at == len(cut)), context=context))
        start += size
    return works


def decode_work(workload: Workload, stages: int) -> list[Work]:
    """One token for each of the sequences, in as many steps as there are stages, or fewer where sequences run out:
    what ``scheduler.py`` makes of them. The last step has what is left."""
    share = -(-workload.sequences // stages)
    full, rest = divmod(workload.sequences, share)
    sizes = [(full, share)] + ([(1, rest)] if rest else [])
    context = workload.prompt_tokens + workload.new_tokens / 2
    return [Work(count=count, tokens=rows, rows=rows, outputs=rows, context=context) for count, rows in sizes]


def alone_work(workload: Workload, stages: int) -> list[Work]:
    """One token of a sequence that decodes alone."""
    context = workload.prompt_tokens + workload.new_tokens / 2
    return [Work(count=1, tokens=1, rows=1, outputs=1, context=context, cold=stages > 1)]


def life_work(workload: Workload, stages: int, chunk: int) -> list[Work]:
    """All steps of one sequence among the others: its prompt, and its share of the steps that decode."""
    share = max(workload.new_tokens - 1, 0) / workload.sequences  # the prompt's last chunk gives the first token
    decoding = [
        Work(count=work.count * share, tokens=work.tokens, rows=work.rows, outputs=work.outputs, context=work.context)
        for work in decode_work(workload, stages)
    ]
    return prompt_work(workload, chunk) + decoding


def work_seconds(works: Sequence[Work], node: Node, layers: int, *, head: bool) -> float:
    return sum(work.seconds(node, layers, head=head) for work in works)


def held_bytes(shape: Shape, layers: int, *, first: bool, last: bool, headroom: float = HEADROOM) -> int:
    """The memory that a rank needs for so many layers; 0 for none."""
    if not layers:
        return 0
    weights = layers * (shape.layer_bytes + shape.kv_bytes)
    weights += shape.embedding_bytes * first + shape.head_bytes * last
    return round(weights * (1 + headroom)) + BUFFERS


def needs(shape: Shape, headroom: float = HEADROOM) -> int:
    """The memory that a model needs on one rank, bytes; on several, ``BUFFERS`` more for each further one."""
    return held_bytes(shape, shape.layers, first=True, last=True, headroom=headroom)


def route(spans: Sequence[Span | None]) -> list[tuple[int, int]]:
    """(rank, layers) in the order of a step's way: rank 0 always, then those that have layers."""
    return [(rank, len(span) if span else 0) for rank, span in enumerate(spans) if span or rank == 0]
