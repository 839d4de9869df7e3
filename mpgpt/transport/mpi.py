"""Ranks that ``mpirun`` started: links over MPI, and who of them is lost.

Knows: MPI (the only module that imports mpi4py), buffers and who may touch them when, the sockets that MPI reads.
Must not know: what is in a frame.

MPI moves data only while somebody is inside an MPI call. A rank therefore always has its next receive posted,
and calls ``progress`` between layers, so that a send that has begun and the receive that follows both go on
while it computes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import mpi4py

from mpgpt.errors import LinkError
from mpgpt.transport import code_version, doorbell, mpirun
from mpgpt.transport.addresses import connections, named_apart, nearest, own_addresses, plain
from mpgpt.transport.doorbell import USUAL_MOST_S, Doorbell, wait
from mpgpt.transport.heartbeat import Heartbeat
from mpgpt.transport.heartbeat_connection import Peer
from mpgpt.transport.link import Link, Loss, QueueLink, Silence

mpi4py.rc.initialize = False  # MPIWorld starts and ends it
mpi4py.rc.finalize = False
from mpi4py import MPI  # noqa: E402

TAG, HELLO = 1, 2
NETWORKS = 4
"""Over so many connections between two ranks, one for each network and family of addresses, MPI may send in turn."""
LEAVE_S = 1.0
"""How long a rank that knows of a failure waits to be ended with mpirun, which would comment on its status."""
LOST_S = 0.05
"""How long after mpirun's signal, which is a quarter of a second late, it may take to see that a rank died."""
TROUBLE_S = 1.0
"""How much sooner than a heartbeat MPI may see that a rank has gone."""
FIRST_S = 60.0
"""How long the first exchange between all ranks may take: they start at the speed of their disks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """What a rank sends of itself at the start."""

    host: str
    code: str
    version: str
    bell: str
    heartbeat: int
    addresses: tuple[str, ...]
    """With their networks, such as 10.0.0.2/24."""


class MPILink:
    """A link over MPI: one message a frame, two receive buffers so that the next one is always posted.

    Its source sends some empty messages ahead of all frames. When they are there, so are the connections, and the
    target knows the descriptors to sleep on.
    """

    def __init__(self, world: MPIWorld, source: int, target: int, capacity: int, ringer: socket.socket | None) -> None:
        """``ringer`` reaches the target's doorbell, where that is on this host."""
        self._world, self._bell, self._ringer = world, world.bell, ringer
        self._source, self._target = source, target
        self._sends: deque[tuple[MPI.Request, bytearray]] = deque()
        self._status = MPI.Status()
        self._posted: MPI.Request | None = None
        self._hellos: list[MPI.Request] = []
        self._usual = 0.0
        if world.rank == target:
            self._buffers = [bytearray(capacity), bytearray(capacity)]
            self._hellos = [world.comm.Irecv([bytearray(), MPI.BYTE], source, HELLO) for _ in range(NETWORKS)]
            self._post()
        else:
            for _ in range(NETWORKS):
                self._begin(HELLO, bytearray())

    def _post(self) -> None:
        try:
            self._posted = self._world.comm.Irecv([self._buffers[0], MPI.BYTE], self._source, TAG)
        except MPI.Exception as error:
            raise self._world.trouble(f"cannot receive from {self._world.name(self._source)}", error) from error

    def _begin(self, tag: int, frame: bytearray) -> None:
        try:
            self._sends.append((self._world.comm.Isend([frame, MPI.BYTE], self._target, tag), frame))
        except MPI.Exception as error:
            raise self._world.trouble(f"cannot send to {self._world.name(self._target)}", error) from error
        if self._ringer:
            doorbell.ring(self._ringer)
        else:
            self._bell.alert()

    def send(self, frame: bytearray) -> None:
        assert self._world.rank == self._source, "only the source of a link sends"
        self.progress()
        self._begin(TAG, frame)

    def recv(self, timeout: float | None = None, until: Callable[[], bool] | None = None) -> memoryview | None:
        assert self._posted is not None, "only the target of a link receives"
        begun = time.monotonic()
        ready, interrupted = self._arrived, False
        if until:

            def ready() -> bool:
                nonlocal interrupted
                interrupted = until()
                return interrupted or self._arrived()

        if not wait(ready, self._bell, timeout, 0.0 if until else self._usual) or interrupted:
            return None
        waited = time.monotonic() - begun
        # Down at once and up slowly: to wake too early costs some spinning, too late costs everyone.
        self._usual = waited if waited < self._usual else self._usual + 0.2 * (min(waited, USUAL_MOST_S) - self._usual)
        count = self._status.Get_count(MPI.BYTE)
        full, free = self._buffers
        self._buffers = [free, full]
        self._post()
        return memoryview(full)[:count]

    def _arrived(self) -> bool:
        assert self._posted is not None
        self._world.check()
        try:
            return not self.connecting() and self._posted.Test(self._status)
        except MPI.Exception as error:
            raise self._world.trouble(f"cannot receive from {self._world.name(self._source)}", error) from error

    def progress(self) -> None:
        try:
            while self._sends and self._sends[0][0].Test():
                self._sends.popleft()
        except MPI.Exception as error:
            raise self._world.trouble(f"cannot send to {self._world.name(self._target)}", error) from error

    def connecting(self) -> bool:
        """Whether a connection may not be there yet, on whose descriptor this rank would sleep."""
        if self._hellos:
            self._hellos = [hello for hello in self._hellos if not hello.Test()]
            if not self._hellos:
                self._world.find_sockets()
        return bool(self._hellos)

    def sending(self) -> bool:
        """Whether frames are still on their way."""
        self.progress()
        return bool(self._sends)

    def close(self) -> None:
        """Wait until all that was sent has left, and take the posted receive back."""
        wait(lambda: not self.sending(), self._bell, timeout=5.0)
        for request in (*self._hellos, *([self._posted] if self._posted else [])):
            request.Cancel()
            request.Wait()
        self._posted, self._hellos = None, []
        self._world.closed(self)


class MPIWorld:
    """The ranks that one ``mpirun`` started."""

    launched = True

    def __init__(self, pulse: Callable[[float], None] | None = None) -> None:
        """``pulse`` is called as long as this rank lives (``Heartbeat.on_pulse``).

        Raises ``LinkError`` on every rank when they run different code, or do not reach one another."""
        MPI.Init_thread(MPI.THREAD_SERIALIZED)
        self.comm: MPI.Intracomm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size
        self._foreign = set(connections())
        """Connections that were there before any of MPI's."""
        self._links: list[MPILink] = []
        self.told_to_end: Callable[[], None] = lambda: None
        self.ringers: dict[int, socket.socket] = {}
        """What reaches the doorbells of the ranks on this host, by rank."""
        self.bell = Doorbell()
        try:
            self.bell.unfinished = self._unfinished
            self.bell.missed = self.find_sockets
            self._heartbeat = Heartbeat(self.rank)
            if pulse:
                self._heartbeat.on_pulse(pulse)
            self._ranks = self._meet()
            self._reach()
            self._start_heartbeat()
        finally:
            self.bell.seal()  # all have reached all: nobody else shall; nor is anything left of a start that failed

    def _meet(self) -> list[_Rank]:
        """What every rank sends of itself."""
        mine = {
            "host": socket.gethostname(), "code": code_version.code_id(), "version": code_version.describe(),
            "bell": self.bell.path, "heartbeat": self._heartbeat.port, "addresses": own_addresses(),
        }  # fmt: skip
        said = self.gather(json.dumps(mine).encode(), FIRST_S)
        ranks = []
        for data in said:
            try:
                raw = json.loads(data)
                ranks.append(_Rank(**{**raw, "addresses": tuple(raw["addresses"])}))
            except (ValueError, TypeError, KeyError):
                raise LinkError(
                    f"{_other(data)} runs another version of mpgpt than {mine['host']} ({mine['version']}): "
                    "update all checkouts to the same commit"
                ) from None
        if len({rank.code for rank in ranks}) > 1:
            each = ", ".join(dict.fromkeys(f"{rank.host} has {rank.version}" for rank in ranks))
            raise LinkError(f"the hosts run different code: {each}; update all checkouts to the same commit")
        return ranks

    def _reach(self) -> None:
        """Find out which ranks are on this host, and name the hosts."""
        for number, rank in enumerate(self._ranks):
            with contextlib.suppress(OSError):
                self.ringers[number] = Doorbell.reach(rank.bell)
        said = self.gather(min(self.ringers).to_bytes(4, "little"), FIRST_S)
        self.hosts = named_apart([rank.host for rank in self._ranks], [int.from_bytes(home, "little") for home in said])

    def _start_heartbeat(self) -> None:
        ours = self._ranks[self.rank].addresses
        peers = [
            Peer(rank=number, host=self.hosts[number], port=rank.heartbeat,
                 addresses=("127.0.0.1",) if number in self.ringers else tuple(nearest(rank.addresses, ours)))
            for number, rank in enumerate(self._ranks) if number != self.rank
        ]  # fmt: skip
        secret = self.gather(secrets.token_bytes(32) if self.rank == 0 else b"", FIRST_S)[0]
        if self.size > 1:
            self._heartbeat.start(peers, secret, self._alarmed)
        self.gather(b"", FIRST_S)

    def connect(self, source: int, target: int, capacity: int) -> Link:
        assert self.rank in (source, target), "this rank is at neither end"
        if source == target:
            return QueueLink(self.bell)
        link = MPILink(self, source, target, capacity, self.ringers.get(target))
        self._links.append(link)
        return link

    def closed(self, link: MPILink) -> None:
        """A link is not used any more."""
        self._links.remove(link)

    def find_sockets(self) -> None:
        """Have data from other hosts wake this rank: look for the connections that MPI has made by now."""
        hosts = {plain(address.split("/")[0]) for rank in self._ranks for address in rank.addresses}
        beats = {rank.heartbeat for rank in self._ranks}
        self.bell.watch(
            fd for fd, here, there, address in connections()
            if (fd, here, there, address) not in self._foreign and address in hosts and not beats & {here, there}
        )  # fmt: skip

    def _unfinished(self) -> bool:
        return any(link.connecting() or link.sending() for link in self._links)

    # -- who is lost

    @property
    def loss(self) -> Loss | None:
        return self._heartbeat.loss

    def lost_soon(self) -> bool:
        if self.size > 1:
            self._await_loss(LOST_S)
        return self.loss is not None and not self.loss.said

    def _await_loss(self, seconds: float) -> None:
        """Wait until a rank is lost, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while self.loss is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def trouble(self, what: str, error: MPI.Exception) -> LinkError:
        """Why MPI cannot do ``what``. It may see that a rank has gone before the heartbeat, which knows more, does."""
        self._await_loss(TROUBLE_S)
        return LinkError(self.loss.sentence if self.loss else f"{what}: {error}")

    def silences(self) -> tuple[Silence, ...]:
        return self._heartbeat.silences()

    def heed(self, interval_s: float, timeout_s: float) -> None:
        self._heartbeat.configure(interval_s, timeout_s)

    def part(self, sentence: str) -> None:
        self._heartbeat.close(sentence)

    def check(self) -> None:
        """Raises ``LinkError`` when a rank is lost."""
        if loss := self._heartbeat.loss:
            raise LinkError(loss.sentence)

    @property
    def wakeup(self) -> int:
        """A descriptor for ``signal.set_wakeup_fd`` on all ranks but rank 0: a signal ends the rank at once, and in
        order, whatever it computes."""
        return self._heartbeat.wakeup

    def _alarmed(self) -> None:
        """On the heartbeat's thread. Rank 0's main thread prints what happened; any other rank just ends."""
        if self.rank == 0:
            self.bell.ring()
            return
        loss, signum = self._heartbeat.loss, self._heartbeat.signal
        silences = self._heartbeat.silences()
        alone = bool(loss and not loss.said and silences)
        if loss and alone:  # no other rank can print it
            os.write(2, f"mpgpt: rank {self.rank} on {self.hosts[self.rank]}: {loss.sentence}\n".encode())
        self._heartbeat.close("" if signum else loss.sentence if loss else "")
        if alone or any(silence.rank == 0 for silence in silences):  # a neighbour may have sent it before
            mpirun.end_daemon()
        if loss and loss.said and not signum:
            time.sleep(LEAVE_S)
        os._exit(128 + signum if signum else 1)

    # -- all ranks together

    def gather(self, data: bytes, timeout: float | None = None) -> list[bytes]:
        """Every rank's ``data``, on every rank. Raises ``LinkError`` if that takes longer than ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            return self._gather(data, deadline)
        except MPI.Exception as error:
            raise self.trouble("the ranks cannot exchange what they know", error) from error

    def _gather(self, data: bytes, deadline: float | None) -> list[bytes]:
        length = memoryview(bytearray(len(data).to_bytes(8, "little")))
        lengths = bytearray(8 * self.size)
        self._finish(self.comm.Iallgather([length, MPI.BYTE], [lengths, MPI.BYTE]), deadline)
        counts = [int.from_bytes(lengths[8 * r : 8 * r + 8], "little") for r in range(self.size)]
        everything = bytearray(sum(counts))
        self._finish(self.comm.Iallgatherv([data, MPI.BYTE], [everything, (counts, None), MPI.BYTE]), deadline)
        starts = [sum(counts[:r]) for r in range(self.size)]
        return [bytes(everything[a : a + n]) for a, n in zip(starts, counts, strict=True)]

    def broadcast(self, data: bytes) -> bytes:
        return self.gather(data if self.rank == 0 else b"")[0]

    def _finish(self, request: MPI.Request, deadline: float | None) -> None:
        """Wait for a collective without burning a core: nobody rings for it, so nap."""
        nap = 0.0001
        while not request.Test():
            self.check()
            if deadline is not None and time.monotonic() > deadline:
                raise LinkError(
                    f"the {self.size} ranks have not met within {FIRST_S:.0f} s: a firewall lets ssh in but not MPI, "
                    "or the hosts have several networks (--mca btl_tcp_if_include names the right one); "
                    "scripts/check_hosts.py HOSTFILE tells which"
                )
            time.sleep(nap)
            nap = min(1.5 * nap, 0.005)

    def abort(self, status: int) -> None:
        self.comm.Abort(status)

    def close(self) -> None:
        self.gather(b"")
        if self.rank:
            signal.set_wakeup_fd(-1)
        self._heartbeat.close()
        for ringer in self.ringers.values():
            ringer.close()
        self.bell.close()
        MPI.Finalize()


def _other(data: bytes) -> str:
    """The host of a rank whose report of itself this version cannot read."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(data)["host"])
    return data.decode(errors="replace").split(" ")[0] or "another host"
