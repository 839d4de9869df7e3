"""A step's way around a ring: what stages, hosts and links have to do for it, one by one and together.

Knows: the order of stages and hops, and that ranks of one host share its cores.
Must not know: torch, MPI, how spans were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mpgpt.core import Span
from mpgpt.machines import Node, Shape
from mpgpt.placement.costs import Links, Work, result_bytes, route, step_bytes, work_seconds


class Route:
    """A step's way around a ring: stages and hops."""

    def __init__(self, spans: Sequence[Span | None], shape: Shape, nodes: Sequence[Node], links: Links) -> None:
        self.stages = route(spans)
        self._nodes, self._token_bytes = nodes, shape.token_bytes
        self._last = self.stages[-1][0]
        between = [(a, b) for (a, _), (b, _) in pairwise(self.stages)]
        self._edges = [links[pair] for pair in between]
        self._back = links[self._last, 0] if self._last else None
        # The first hop carries ids alone if rank 0 has no layers.
        self._width = [shape.token_bytes if layers else 0 for _, layers in self.stages[:-1]]

    def busy(self, works: Sequence[Work]) -> dict[int, float]:
        """Seconds that each rank computes."""
        return {
            rank: work_seconds(works, self._nodes[rank], layers, head=rank == self._last and layers > 0)
            for rank, layers in self.stages
        }

    def stretched(self, works: Sequence[Work]) -> dict[int, float]:
        """The same where ranks of a host share too few cores."""
        busy = self.busy(works)
        hosts: dict[str, list[int]] = {}
        for rank in busy:
            hosts.setdefault(self._nodes[rank].host, []).append(rank)
        for ranks in hosts.values():
            cores = self._nodes[ranks[0]].cores
            work = sum(busy[rank] * min(self._nodes[rank].threads, cores) for rank in ranks) / cores
            factor = max(1.0, work / max(busy[rank] for rank in ranks)) if len(ranks) > 1 and work else 1.0
            busy.update({rank: busy[rank] * factor for rank in ranks})
        return busy

    def busiest(self, works: Sequence[Work]) -> float:
        """Seconds of the busiest stage, host or link."""
        sending = [
            sum(work.bytes(width) for work in works) / edge.bytes_per_s
            for edge, width in zip(self._edges, self._width, strict=True)
        ]
        if self._back:
            sending.append(sum(work.result_bytes for work in works) / self._back.bytes_per_s)
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
            for edge, width in zip(self._edges, self._width, strict=True)
        ]
        back = self._back
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
