"""Heartbeats, several in one process on loopback: who is accused of what, by whom, and what strangers achieve."""

from __future__ import annotations

import errno
import gc
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpgpt.transport import heartbeat, heartbeat_connection
from mpgpt.transport.heartbeat import Heartbeat
from mpgpt.transport.heartbeat_connection import (
    BEAT,
    FAREWELL,
    FRAME,
    GREETING,
    MAGIC,
    PROOF_BYTES,
    Connection,
    Peer,
    prove,
)

SECRET = b"s" * 32
INTERVAL_S, TIMEOUT_S = 0.05, 1.5
"""A silence must be longer than this loaded machine may stop a thread for."""


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class Ranks:
    """All ranks of a run, each on a host of its own name, and what their alarms were."""

    def __init__(self, size: int, **options: Any) -> None:
        self.hearts = [Heartbeat(rank, **options) for rank in range(size)]
        self.alarms: list[int] = []

    def __getitem__(self, rank: int) -> Heartbeat:
        return self.hearts[rank]

    def peers(
        self, rank: int, via: dict[tuple[int, int], int] | None = None, addresses: Sequence[str] = ("127.0.0.1",)
    ) -> list[Peer]:
        """The others, for a rank. ``via`` are the ports by which a rank dials another instead of its own."""
        return [
            Peer(rank=other, host=f"host{other}", port=(via or {}).get((rank, other), heart.port),
                 addresses=tuple(addresses))
            for other, heart in enumerate(self.hearts) if other != rank
        ]  # fmt: skip

    def start(
        self, *ranks: int, via: dict[tuple[int, int], int] | None = None, alarm: Callable[[], None] = lambda: None,
        interval_s: float = INTERVAL_S, timeout_s: float = TIMEOUT_S, addresses: Sequence[str] = ("127.0.0.1",),
    ) -> None:  # fmt: skip
        """Start these ranks, or all."""
        for rank in ranks or range(len(self.hearts)):

            def noted(rank: int = rank) -> None:
                self.alarms.append(rank)
                alarm()

            self[rank].configure(interval_s, timeout_s)
            self[rank].start(self.peers(rank, via, addresses), SECRET, noted)

    def connected(self) -> bool:
        """Whether every pair that should has proved itself to one another."""
        return all(heart.connected == heart.watched for heart in self.hearts)

    def losses(self) -> list[str]:
        return [heart.loss.sentence for heart in self.hearts if heart.loss]


@contextmanager
def ranks(size: int, **options: Any) -> Iterator[Ranks]:
    gc.collect()  # what another test left to it would be closed meanwhile
    before = set(os.listdir("/dev/fd"))
    those = Ranks(size, **options)
    try:
        yield those
    finally:
        for heart in those.hearts:
            heart.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
    assert set(os.listdir("/dev/fd")) <= before, "a descriptor is left open"


class Proxy:
    """A line that can be cut: what two ranks send one another goes through it until then, and nowhere after."""

    def __init__(self, target: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._target, self.cut = target, False
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                self._threads.append(threading.Thread(target=self._pass, args=(source, sink)))
                self._threads[-1].start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        while True:
            try:
                data = source.recv(65536)
                if not data:
                    return
                if not self.cut:
                    sink.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for one in self._sockets:
            one.close()


@contextmanager
def block(heart: Heartbeat) -> Iterator[None]:
    """The heartbeat's thread stands still, as in a process that is stopped."""
    standing, go = threading.Event(), threading.Event()

    def still(patience_s: float) -> None:
        standing.set()
        go.wait(60)

    heart.on_pulse(still)
    assert standing.wait(30)
    try:
        yield
    finally:
        heart.on_pulse(lambda patience_s: None)
        go.set()


# -- in order


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_hear_one_another(size: int) -> None:
    """Each rank and rank 0, and neighbours; nobody is accused for as long as all live."""
    with ranks(size) as run:
        run.start()
        wait_for(run.connected)
        assert run[0].watched == set(range(1, size))
        time.sleep(TIMEOUT_S + 0.5)
        assert not run.losses() and not run.alarms
        assert all(not heart.silences() for heart in run.hearts)


def test_many_ranks_of_one_host() -> None:
    with ranks(64) as run:
        run.start(interval_s=1.0, timeout_s=60.0)
        wait_for(run.connected, 60)
        assert not run.losses()


@pytest.mark.parametrize("addresses", [("::1",), ("203.0.113.9", "2001:db8::9", "::1"), ("203.0.113.9", "127.0.0.1")])
def test_addresses_of_either_family_are_dialled_at_once(addresses: tuple[str, ...]) -> None:
    """Those that lead nowhere cost no time."""
    if any(":" in address for address in addresses) and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with ranks(2) as run:
        run.start(addresses=addresses, timeout_s=60)
        begun = time.monotonic()
        wait_for(run.connected)
        assert time.monotonic() - begun < heartbeat.DIAL_S
        assert run[1].strangers == 0, "the other calls are given up"


def test_a_rank_that_does_not_answer_is_dialled_again() -> None:
    """A connection on which nobody has proved anything yet is nobody's loss."""
    with ranks(2) as run, socket.create_server(("127.0.0.1", 0)) as busy:
        busy.settimeout(30)
        run.start(via={(1, 0): busy.getsockname()[1]}, timeout_s=60)
        for _ in range(2):
            with busy.accept()[0] as answered:
                assert answered.recv(1) == b"", "who dials waits for a greeting"
        assert not run.losses()


def test_a_farewell_in_order_is_no_loss() -> None:
    with ranks(3) as run:
        run.start()
        wait_for(run.connected)
        run[1].close()
        wait_for(lambda: not {1} & (run[0].connected | run[2].connected))
        time.sleep(TIMEOUT_S + 0.5)
        assert not run.losses() and not run.alarms
        run[0].close()
        run[2].close()
        run[2].close()
        assert not run.losses()


def test_all_say_farewell_at_once() -> None:
    for _ in range(5):
        with ranks(4) as run:
            run.start(timeout_s=60)
            wait_for(run.connected)
            closing = [threading.Thread(target=heart.close) for heart in run.hearts]
            for thread in closing:
                thread.start()
            for thread in closing:
                thread.join()
            assert not run.losses() and not run.alarms


def test_what_was_never_started_is_closed() -> None:
    with ranks(2) as run:
        assert run[0].silences() == () and run[0].loss is None
        run[0].close("why")


# -- losses


LIFE = """
import sys, time
from mpgpt.transport.heartbeat import Heartbeat
from mpgpt.transport.heartbeat_connection import Peer

heart = Heartbeat(int(sys.argv[1]))
print(heart.port, flush=True)
told = []

def pulse(patience_s):
    if heart.connected == heart.watched and not told:
        told.append(print("connected", flush=True))

heart.on_pulse(pulse)
heart.configure({interval_s}, 60.0)
heart.start(eval(input()), {secret}, lambda: None)
time.sleep(600)
"""


@contextmanager
def doomed(size: int, rank: int) -> Iterator[tuple[Ranks, Callable[[], None]]]:
    """A run all of whose ranks are connected, and what kills ``rank``, which is a process of its own."""
    code = LIFE.format(interval_s=INTERVAL_S, secret=SECRET)
    with (
        ranks(size) as run,
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True) as process,
    ):  # fmt: skip
        assert process.stdin and process.stdout
        try:
            run[rank].close()
            run[rank].port = int(process.stdout.readline())
            rest = [other for other in range(size) if other != rank]
            run.start(*rest, timeout_s=60)
            process.stdin.write(f"{run.peers(rank)}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "connected\n"
            wait_for(lambda: all(run[other].connected == run[other].watched for other in rest))
            yield run, process.kill
        finally:
            process.kill()


def test_a_killed_rank_is_lost_at_once_and_named() -> None:
    with doomed(3, rank=2) as (run, kill):
        kill()
        wait_for(lambda: run[0].loss, 10)
        loss = run[0].loss
        assert loss and not loss.said
        assert loss.sentence == "rank 2 on host2 ended without a word: it was killed, or its host went down"
        assert run.alarms == [0], "rank 0 alone judges"


def test_a_killed_rank_0_is_lost_to_all() -> None:
    with doomed(3, rank=0) as (run, kill):
        kill()
        wait_for(lambda: run[1].loss and run[2].loss, 10)
        assert all(sentence.startswith("rank 0 on host0 ended") for sentence in run.losses())


def test_a_signal_may_still_come_after_the_last_words() -> None:
    """A process that ends for a loss, by its heartbeat's own thread, still has its descriptor for signals."""
    with ranks(2) as run:
        written: list[int] = []

        def end() -> None:
            run[1].close("it ends")
            written.append(os.write(run[1].wakeup, b"\x0f"))

        run.start(0, timeout_s=60)
        run.start(1, timeout_s=60, alarm=end)
        wait_for(run.connected)
        run[0].close("no room on disk")
        wait_for(lambda: written)


def test_a_silent_rank_is_lost_after_the_timeout() -> None:
    with ranks(3) as run:
        run.start(timeout_s=2.5)
        wait_for(run.connected)
        begun = time.monotonic()
        with block(run[1]):
            wait_for(lambda: run[0].loss)
            loss = run[0].loss
            assert loss and not loss.said and time.monotonic() - begun > 2.0
            assert "rank 1 on host1 has been silent for 3 s" in loss.sentence or "for 2 s" in loss.sentence
            (silence,) = run[0].silences()
            assert (silence.rank, silence.host) == (1, "host1") and silence.seconds > 2.0
        assert run[2].loss is None, "others leave it to rank 0"


def test_a_silence_is_told_before_it_is_a_loss() -> None:
    with ranks(2) as run:
        run.start(timeout_s=60)
        wait_for(run.connected)
        with block(run[1]):
            wait_for(run[0].silences)
            (silence,) = run[0].silences()
            assert 3.0 < silence.seconds < 30 and not run.losses()
        wait_for(lambda: not run[0].silences())


def test_slow_beats_are_no_silence() -> None:
    with ranks(2) as run:
        run.start(interval_s=4.0, timeout_s=60)
        wait_for(run.connected)
        watched = time.monotonic() + 4.5
        while time.monotonic() < watched:
            assert not run[0].silences()
            time.sleep(0.1)


def test_rank_0_that_is_silent_is_lost_later_than_others() -> None:
    """It is the one that could say what happened."""
    with ranks(2) as run:
        run.start(timeout_s=1.0)
        wait_for(run.connected)
        begun = time.monotonic()
        with block(run[0]):
            wait_for(lambda: run[1].loss)
            assert time.monotonic() - begun > 1.0 + heartbeat.LATER_S - 0.2
        assert run.losses()[0].startswith("rank 0 on host0 has been silent")


def test_a_cut_between_two_others_is_rank_0s_to_tell() -> None:
    with ranks(3) as run:
        proxy = Proxy(run[1].port)
        try:
            run.start(via={(2, 1): proxy.port})
            wait_for(run.connected)
            time.sleep(0.5)
            proxy.cut = True
            wait_for(lambda: run[0].loss)
            (sentence,) = run.losses()
            assert "host1" in sentence and "host2" in sentence and "the network between them is cut" in sentence
            assert {"rank 1", "rank 2"} <= {sentence[:6], sentence.partition("not heard ")[2][:6]}
        finally:
            proxy.close()


def test_who_is_silent_to_rank_0_too_is_no_cut_between_two_others() -> None:
    """Although another has not heard it for longer."""
    with ranks(3) as run:
        proxy = Proxy(run[1].port)
        try:
            run.start(via={(2, 1): proxy.port}, timeout_s=2.5)
            wait_for(run.connected)
            proxy.cut = True
            time.sleep(1.0)
            with block(run[1]):
                wait_for(lambda: run[0].loss)
                assert run.losses()[0].startswith("rank 1 on host1 has been silent")
        finally:
            proxy.close()


def test_who_was_away_accuses_nobody() -> None:
    """Neither at once, nor is it deaf afterwards."""
    with ranks(3) as run:
        run.start()
        wait_for(run.connected)
        with block(run[0]):
            time.sleep(2 * TIMEOUT_S)
        time.sleep(1.0)
        assert not run[0].loss
        seconds = [silence.seconds for silence in run[0].silences(longer_than_s=-math.inf)]
        assert len(seconds) == 2 and min(seconds) >= 0.0, "nobody is heard in the future"
        with block(run[1]):
            wait_for(lambda: run[0].loss, 10 * TIMEOUT_S)
        assert "rank 1" in run.losses()[0]


def test_another_rhythm_for_a_running_ring_accuses_nobody() -> None:
    """All get it at about the same time, some a little later; and then it counts."""
    with ranks(3) as run:
        run.start(interval_s=1.0, timeout_s=10.0)
        wait_for(run.connected)
        time.sleep(0.8)  # nobody was heard for as long
        run[0].configure(0.05, 0.4)
        time.sleep(0.6)
        for rank in (1, 2):
            run[rank].configure(0.05, 0.4)
        time.sleep(1.0)
        assert not run.losses()
        time.sleep(heartbeat.NOTICE_S + 0.5)
        with block(run[2]):
            wait_for(lambda: run[0].loss, 5)


# -- words


@pytest.mark.parametrize("sentence", ["no room on disk: /tmp/x", "", "Füße, 足", "é" * 4000, "a\udce9b"])
def test_a_farewell_with_a_sentence_is_given_as_said(sentence: str) -> None:
    with ranks(3) as run:
        run.start(timeout_s=60)
        wait_for(run.connected)
        run[2].close(sentence)
        wait_for(lambda: run[0].loss and run[1].loss)
        for rank in (0, 1):
            loss = run[rank].loss
            assert loss and loss.said and loss.by_signal == (not sentence)
            if not sentence:
                assert loss.sentence == "rank 2 on host2 was ended"
            elif len(sentence) > 1000:
                assert set(loss.sentence) == {"é"} and len(loss.sentence) == (heartbeat_connection.MOST_BODY - 1) // 2
            else:
                assert loss.sentence == sentence.replace("\udce9", "\\udce9")


def test_a_farewell_behind_a_broken_connection_is_read() -> None:
    """A beat that can no longer be sent must not hide what the other end has said."""
    with ranks(2) as run, socket.create_server(("127.0.0.1", 0)) as server:
        rank_0: list[socket.socket] = []

        def break_off() -> None:
            """On rank 1's thread, which beats next, and only then reads."""
            reason = b"\1the reason"
            if rank_0:
                with rank_0.pop() as far:
                    far.sendall(FRAME.pack(MAGIC, FAREWELL, 0, len(reason)) + reason)
                    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() breaks it
                time.sleep(2 * INTERVAL_S)

        run.start(1, via={(1, 0): server.getsockname()[1]}, timeout_s=60, alarm=break_off)
        rank_0.append(server.accept()[0])
        greet(rank_0[0], 0)
        wait_for(lambda: run[1].connected)
        os.write(run[1].wakeup, b"\x0f")
        wait_for(lambda: run.losses())
        assert run.losses() == ["the reason"]
        wait_for(lambda: not run[1].connected)
        assert run.losses() == ["the reason"]


def test_a_signal_rings_the_alarm() -> None:
    with ranks(2) as run:
        run.start()
        wait_for(run.connected)
        os.write(run[1].wakeup, bytes([15]))
        wait_for(lambda: run[1].signal)
        assert run[1].signal == 15 and run.alarms == [1] and not run.losses()


def test_a_peer_that_does_not_read_gets_whole_frames() -> None:
    """What does not fit is left out, and no frame is ever half of one."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = Connection(ours, 0.0)
    count = 0
    for n in range(20000):
        before = connection.unsent
        connection.send(BEAT, bytes([n % 251]) * (n % 4000))
        count += connection.unsent == before
    assert count
    received = bytearray()
    theirs.setblocking(False)
    for _ in range(20):
        try:
            while data := theirs.recv(1 << 20):
                received += data
        except BlockingIOError:
            connection.send(FAREWELL, b"\0")
    while len(received) >= FRAME.size:
        magic, kind, _, length = FRAME.unpack_from(received)
        body = bytes(received[FRAME.size : FRAME.size + length])
        assert magic == MAGIC and kind in (BEAT, FAREWELL) and len(set(body)) <= 1 and len(body) == length
        del received[: FRAME.size + length]
    assert not received
    ours.close()
    theirs.close()


# -- strangers


def call(heart: Heartbeat) -> socket.socket:
    caller = socket.create_connection(("127.0.0.1", heart.port), 30)
    caller.settimeout(30)
    return caller


def read(caller: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := caller.recv(count - len(data))):
        data += more
    return data


def ended(caller: socket.socket) -> bool:
    """Whether the other end closes, whatever it says before."""
    try:
        while caller.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def greet(other: socket.socket, rank: int, secret: bytes = SECRET) -> bytes:
    """Introduce oneself as ``rank``, to one that was called or that calls; the proof that was given."""
    greeting = GREETING.pack(MAGIC, rank, os.urandom(16))
    if not rank:  # whoever dials waits for a greeting
        other.sendall(greeting)
    _, _, nonce = GREETING.unpack(read(other, GREETING.size))
    proof = prove(secret, nonce, rank)
    other.sendall(proof if not rank else greeting + proof)
    return proof


@pytest.fixture
def pair() -> Iterator[Ranks]:
    """Rank 0 is there, rank 1 has not called yet."""
    with ranks(2) as run:
        run.start(0, timeout_s=60)
        yield run


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3,
        b"\0" * 100,
        GREETING.pack(b"mpgX", 1, b"n" * 16) + b"p" * 32,
        GREETING.pack(MAGIC, 0, b"n" * 16) + b"p" * 32,
        GREETING.pack(MAGIC, 2, b"n" * 16) + b"p" * 32,
        GREETING.pack(MAGIC, 2**32 - 1, b"n" * 16) + b"p" * 32,
        GREETING.pack(MAGIC, 1, b"n" * 16) + b"p" * 32,
        GREETING.pack(MAGIC, 1, b"n" * 16) + b"p" * 32 + FRAME.pack(MAGIC, FAREWELL, 0, 4) + b"\1bad",
    ],
)
def test_a_stranger_is_hung_up_on(pair: Ranks, words: bytes) -> None:
    with call(pair[0]) as caller:
        caller.sendall(words)
        assert ended(caller)
    assert not pair.losses() and not pair[0].connected
    pair.start(1, timeout_s=60)
    wait_for(pair.connected)


def test_a_wrong_secret_and_a_replayed_proof_are_refused(pair: Ranks) -> None:
    with call(pair[0]) as caller:
        greet(caller, 1, b"t" * 32)
        assert ended(caller)
    with call(pair[0]) as caller:
        proof = greet(caller, 1)
        assert len(read(caller, PROOF_BYTES)) == PROOF_BYTES, "the right secret is believed"
        with call(pair[0]) as again:
            again.sendall(GREETING.pack(MAGIC, 1, os.urandom(16)) + proof)
            assert ended(again)


def test_half_a_greeting_is_hung_up_on_after_a_while() -> None:
    with ranks(2, prove_s=0.5) as run:
        run.start(0, timeout_s=60)
        with call(run[0]) as silent, call(run[0]) as half, call(run[0]) as unproved:
            half.sendall(GREETING.pack(MAGIC, 1, b"n" * 16)[:10])
            unproved.sendall(GREETING.pack(MAGIC, 1, b"n" * 16) + b"p" * 31)
            assert ended(silent) and ended(half) and ended(unproved)
        assert not run.losses()


def test_a_greeting_in_pieces_is_understood(pair: Ranks) -> None:
    with call(pair[0]) as caller:
        _, _, nonce = GREETING.unpack(read(caller, GREETING.size))
        words = GREETING.pack(MAGIC, 1, b"n" * 16) + prove(SECRET, nonce, 1)
        for byte in words + FRAME.pack(MAGIC, BEAT, 0, 0) + FRAME.pack(MAGIC, FAREWELL, 0, 4) + b"\1bye":
            caller.sendall(bytes([byte]))
            time.sleep(0.001)
        wait_for(lambda: pair[0].loss)
    assert pair.losses() == ["bye"]


def test_a_crowd_of_strangers_keeps_no_rank_out(pair: Ranks) -> None:
    crowd = [call(pair[0]) for _ in range(100)]
    pair.start(1, timeout_s=60)
    wait_for(pair.connected)
    assert pair[0].strangers <= heartbeat.STRANGERS + heartbeat.MOST_ADDRESSES + 1
    assert not pair.losses()
    for caller in crowd:
        caller.close()


@pytest.mark.parametrize("length", [heartbeat_connection.MOST_BODY + 1, 65535])
def test_a_peer_that_sends_too_long_a_frame_is_hung_up_on(pair: Ranks, length: int) -> None:
    with call(pair[0]) as caller:
        greet(caller, 1)
        read(caller, PROOF_BYTES)
        caller.sendall(FRAME.pack(MAGIC, BEAT, 0, 0) + FRAME.pack(MAGIC, BEAT, 0, length))
        assert ended(caller)
    wait_for(lambda: pair[0].loss)
    assert "rank 1 on host1" in pair.losses()[0]


def test_what_a_dialled_stranger_says() -> None:
    """Who answers must prove itself too: a rank tells nothing to another's machine."""
    for words in (b"junk" * 20, GREETING.pack(MAGIC, 0, b"n" * 16) + b"p" * 32, GREETING.pack(MAGIC, 2, b"n" * 16)):
        with ranks(2) as run, socket.create_server(("127.0.0.1", 0)) as stranger:
            run.start(1, via={(1, 0): stranger.getsockname()[1]}, timeout_s=60)
            stranger.settimeout(30)
            with stranger.accept()[0] as answered:
                answered.settimeout(30)
                answered.sendall(words)
                assert ended(answered)
            assert not run[1].connected and not run.losses()


def test_a_connection_that_only_one_end_believes_in_is_no_loss(pair: Ranks) -> None:
    """The dialling rank gave up before the proof reached it; it dials again."""
    with call(pair[0]) as caller:
        greet(caller, 1)
        wait_for(lambda: 1 in pair[0].connected)
    wait_for(lambda: 1 not in pair[0].connected)
    assert not pair.losses()
    pair.start(1, timeout_s=60)
    wait_for(pair.connected)


def test_a_rank_that_dials_anew_replaces_its_connection(pair: Ranks) -> None:
    with call(pair[0]) as first, call(pair[0]) as second:
        for caller in (first, second):
            greet(caller, 1)
            read(caller, PROOF_BYTES)
            caller.sendall(FRAME.pack(MAGIC, BEAT, 0, 0))
        assert ended(first)
        assert not pair.losses() and pair[0].connected == {1}


def test_no_more_descriptors_is_not_the_end(pair: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it keep a core busy: whoever dials waits until there is one."""
    full, tries, accept = threading.Event(), list[float](), socket.socket.accept
    full.set()

    def accept_if_possible(listener: socket.socket) -> Any:
        if full.is_set():
            tries.append(time.monotonic())
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_if_possible)
    with call(pair[0]):
        wait_for(lambda: tries)
        time.sleep(10 * INTERVAL_S)
        assert not pair.losses() and len(tries) < 20
    full.clear()
    pair.start(1, timeout_s=60)
    wait_for(pair.connected)


@settings(max_examples=60, deadline=None)
@given(
    proved=st.booleans(), frames=st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=5),
    junk=st.binary(max_size=200), pieces=st.lists(st.integers(1, 100), min_size=1),
)  # fmt: skip
def test_any_bytes_are_a_frame_or_the_end(
    proved: bool, frames: list[tuple[int, bytes]], junk: bytes, pieces: list[int]
) -> None:
    """Of a stranger or of a peer, in whatever pieces: no exception, and never more kept than a frame."""
    kept: list[int] = []

    class Measured(Connection):
        def frames(self) -> Iterator[tuple[int, bytes]]:
            try:
                yield from super().frames()
            finally:
                kept.append(len(self.received))

    with pytest.MonkeyPatch.context() as patch, ranks(3) as run:
        patch.setattr(heartbeat, "Connection", Measured)
        run.start(0, timeout_s=60)
        with call(run[0]) as caller:
            greeting = read(caller, GREETING.size)
            proof = prove(SECRET, GREETING.unpack(greeting)[2], 1)
            words = GREETING.pack(MAGIC, 1, b"n" * 16) + proof if proved else b""
            words += b"".join(FRAME.pack(MAGIC, kind, 0, len(body)) + body for kind, body in frames) + junk
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(OSError):  # it may be hung up on before the end
                for piece in pieces * len(words):
                    caller.sendall(words[:piece])
                    words = words[piece:]
                    if not words:
                        break
                if proved:
                    assert read(caller, PROOF_BYTES) == prove(SECRET, b"n" * 16, 0)
                caller.shutdown(socket.SHUT_WR)
            assert ended(caller)
        assert bool(kept) == proved and all(count <= FRAME.size + heartbeat_connection.MOST_BODY for count in kept)
        if not proved:
            assert not run.losses() and not run[0].connected
        run.start(1, 2, timeout_s=60)
        wait_for(run.connected)
