"""Which pairs are measured, what is assumed of the others, and how a frame's time is told from the work."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpgpt.cluster.link_probe import ALL_PAIRS, SMALL, PingPong, complete, edge_of, rounds, worth_measuring
from mpgpt.errors import LinkError
from mpgpt.machines import Edge
from mpgpt.transport.doorbell import Doorbell
from mpgpt.transport.link import QueueLink

clusters = st.lists(st.sampled_from(["mac", "pi", "box", "vm"]), min_size=1, max_size=24)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(clusters)
def test_every_pair_has_its_round(hosts: list[str]) -> None:
    pairs = worth_measuring(hosts)
    played = list(rounds(pairs))
    assert sorted(pair for now in played for pair in now) == sorted(pairs)
    for now in played:
        ranks = [rank for pair in now for rank in pair]
        assert len(ranks) == len(set(ranks)), "a rank plays one game at a time"
    if len(hosts) <= ALL_PAIRS:
        assert len(pairs) == len(hosts) * (len(hosts) - 1) // 2
        assert len(played) <= len(hosts) + 1
    else:
        assert {(rank, rank + 1) for rank in range(len(hosts) - 1)} | {(0, len(hosts) - 1)} <= set(pairs)
        assert len(pairs) <= len(hosts) + len(set(hosts))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(clusters)
def test_every_edge_is_known_and_assumed_from_its_hosts(hosts: list[str]) -> None:
    """A cluster in which an edge depends on its two hosts alone is known wherever those were measured."""

    def truth(a: int, b: int) -> Edge:
        low, high = sorted((hosts[a], hosts[b]))
        return Edge(latency_s=0.001 * (1 + ord(low[0]) + 2 * ord(high[0])), bytes_per_s=1e6 * ord(high[0]))

    measured = {pair: truth(*pair) for a, b in worth_measuring(hosts) for pair in ((a, b), (b, a))}
    links = complete(measured, hosts)
    ranks = range(len(hosts))
    assert set(links) == {(a, b) for a in ranks for b in ranks if a != b}
    assert all(links[pair] == edge for pair, edge in measured.items())
    seen = {frozenset((hosts[a], hosts[b])) for a, b in measured}
    for (a, b), edge in links.items():
        if frozenset((hosts[a], hosts[b])) in seen:
            assert edge == truth(a, b)


@pytest.mark.parametrize("edge", [Edge(latency_s=2e-4, bytes_per_s=1e9), Edge(latency_s=5e-3, bytes_per_s=3e6)])
def test_an_edge_out_of_two_times(edge: Edge) -> None:
    large = 300_000
    found = Edge(**edge_of(edge.seconds(SMALL), edge.seconds(large), large))
    assert found.latency_s == pytest.approx(edge.latency_s) and found.bytes_per_s == pytest.approx(edge.bytes_per_s)


def test_a_large_frame_that_seems_faster_gives_a_fast_edge_and_no_nonsense() -> None:
    found = Edge(**edge_of(0.002, 0.001, 300_000))
    assert found.latency_s == pytest.approx(0.002, rel=0.01) and 0 < found.bytes_per_s < 1e12


@pytest.fixture
def bells() -> Iterator[tuple[Doorbell, Doorbell]]:
    pair = Doorbell(), Doorbell()
    yield pair
    for bell in pair:
        bell.close()


class SlowLink(QueueLink):
    """Every frame is underway for so long."""

    def __init__(self, bell: Doorbell, seconds: float) -> None:
        super().__init__(bell)
        self._seconds, self.sent = seconds, list[int]()

    def send(self, frame: bytearray) -> None:
        self.sent.append(len(frame))
        threading.Timer(self._seconds, super().send, (frame,)).start()


def test_a_hop_is_the_way_without_the_work(bells: tuple[Doorbell, Doorbell]) -> None:
    """50 ms of work a frame and 20 ms on the way, there and back: 20 ms are found, in the least number of frames."""
    there, back = (SlowLink(bell, 0.02) for bell in bells)
    follower = threading.Thread(target=PingPong(back, there, "pi", work_s=0.05).follow)
    follower.start()
    leader = PingPong(there, back, "pi", work_s=0.05)
    small_s, large_s = leader.lead(SMALL, last=False), leader.lead(300_000, last=True)
    follower.join(timeout=10)
    assert not follower.is_alive(), "the last frame ends the game"
    assert there.sent == back.sent == [SMALL] * 4 + [300_000] * 4
    assert 0.02 <= small_s < 0.04 and 0.02 <= large_s < 0.04


def test_no_answer_is_said(bells: tuple[Doorbell, Doorbell]) -> None:
    begun, leader = time.monotonic(), PingPong(QueueLink(bells[0]), QueueLink(bells[1]), "pi", timeout_s=0.1)
    with pytest.raises(LinkError, match="no answer from pi"):
        leader.lead(SMALL, last=True)
    assert time.monotonic() - begun < 5
