"""Tests of sniroute_datagrams.py: UDP from callers to targets, over connections of the pool and without them."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import pytest

import sniroute_datagrams
from conftest import HOST, Address, FakeClock, linux, wait_until
from sniroute_datagrams import Datagrams
from sniroute_dial import WayOut
from sniroute_duplex import TcpWire
from sniroute_guards import Bucket, Slots
from sniroute_layers import Wires
from sniroute_loop import Loop, ignore
from sniroute_signals import DatagramReader, frame_datagram
from sniroute_upstreams import Upstreams
from testbed.carrier import resolve_as


class End:
    """One end, as Datagrams wants it."""

    def __init__(self, loop: Loop, way: WayOut, targets: tuple[Address, ...] = (), slot: int = 0, lbs: int = 0):
        self.loop = loop
        self.times = SimpleNamespace(tcp_dial=5.0, udp_dial=5.0, report=5.0, fallback=300.0, udp_read=30.0)
        self.slots = Slots(slot)
        self.counts = SimpleNamespace(udps=0, udprx=0, udptx=0)
        self.lines: list[tuple[str, str]] = []
        options = SimpleNamespace(targets=targets, lbs=lbs, dns=300.0, dial="")
        self.upstreams = Upstreams(loop, way, options, self.times)
        self.take: Callable[..., None]

    def log(self, level: str, message: str, **fields: str) -> None:
        self.lines.append((level, message))

    def warnings(self) -> list[str]:
        return [message for level, message in self.lines if level != "debug"]


class Tunnel:
    """An accepting end and a dialling end in one loop, which this thread turns.

    Each flow gets a TCP connection; `pairs` has its two wires.  `answer` is called with what is to be done once a
    connection of the pool was asked for.
    """

    def __init__(self, targets: list[Address], slot: int = 0, direct: bool = False, lbs: int = 0,
                 buckets: Any = None):
        self.faults: list[Any] = []
        self.loop = Loop(self.faults.append)
        self.tick = self.loop.timer(lambda: None)
        self.clock = FakeClock(0.0)
        self.wires = Wires(self.loop)
        self.way = WayOut(self.loop, None, "")
        self.queues = len(self.loop.queues)
        self.accepting = End(self.loop, self.way, tuple(targets) if direct else (), slot)
        self.accepting.take = self.take
        self.dialling = End(self.loop, self.way, tuple(targets), lbs=lbs)
        self.near = Datagrams(self.accepting, buckets, self.clock)
        self.far = Datagrams(self.dialling, None, self.clock)
        self.pairs: list[tuple[TcpWire, TcpWire]] = []
        self.asked: list[str] = []  # remotes
        self.answer: Callable[[Callable[[], None]], None] = lambda act: act()
        self.served = True  # by the other end
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((HOST, 0))
        sock.setblocking(False)
        self.address = sock.getsockname()
        self.near.listen(sock, direct)
        self.listener = socket.create_server((HOST, 0))

    def pair(self) -> tuple[TcpWire, TcpWire]:
        """A connection between the ends."""
        ours = socket.create_connection(self.listener.getsockname())
        theirs, _ = self.listener.accept()
        for sock in (ours, theirs):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pairs.append((TcpWire(self.wires, ours), TcpWire(self.wires, theirs)))
        return self.pairs[-1]

    def take(self, action: str, remote: str, done: Callable[[Any], None]) -> None:
        assert action == "udp"
        self.asked.append(remote)

        def act() -> None:
            ours, theirs = self.pair()
            done(SimpleNamespace(wire=ours))
            if self.served:
                self.far.serve(SimpleNamespace(wire=theirs, early=b"", ended=False), remote)

        self.answer(act)

    def turn(self) -> None:
        self.tick.set(time.monotonic() + 0.02)
        self.loop.turn()

    def turn_until(self, predicate: Callable[[], Any]) -> Any:
        return wait_until(lambda: predicate() or self.turn())

    def receive(self, sock: socket.socket) -> bytes:
        """The next datagram of a socket of the test."""
        got: list[bytes] = []

        def look() -> bool:
            with contextlib.suppress(BlockingIOError):
                got.append(sock.recv(65535))
            return bool(got)

        self.turn_until(look)
        return got[0]

    def ask(self, sock: socket.socket, data: bytes) -> bytes:
        """A caller's datagram, and the answer to it."""
        sock.send(data)
        return self.receive(sock)

    def flows(self) -> tuple[int, int]:
        return len(self.near.flows), len(self.far.flows)

    def close(self) -> None:
        for part in (self.near, self.far, self.accepting.upstreams, self.dialling.upstreams):
            part.close()
        for pair in self.pairs:
            for wire in pair:
                wire.reset()
        self.turn()
        self.wires.close()
        self.turn()
        self.listener.close()
        assert not self.faults and self.flows() == (0, 0) and self.near.waiting == self.far.waiting == 0
        for end in (self.accepting, self.dialling):
            assert end.counts.udps == end.slots.udp == 0
        assert len(self.loop.queues) == self.queues and self.loop.timers == [self.tick]
        assert {fd for fd, act in self.loop.poller.callbacks.items() if act is not ignore} == {self.loop.pipe.reader}
        self.loop.close()


@pytest.fixture
def udp() -> Iterator[Callable[..., socket.socket]]:
    """udp(peer=None) -> a bound socket, which does not wait."""
    with contextlib.ExitStack() as stack:
        def open_one(peer: Address | None = None) -> socket.socket:
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind((HOST, 0))
            sock.setblocking(False)
            if peer is not None:
                sock.connect(peer)
            return sock

        yield open_one


class Target:
    """A UDP service in the loop of a Tunnel: it answers each datagram with the same."""

    def __init__(self, tunnel: Tunnel, sock: socket.socket):
        self.sock = sock
        self.callers: list[Address] = []  # of each datagram
        tunnel.loop.poller.watch(sock.fileno(), 1, self.echo)
        self.poller = tunnel.loop.poller
        self.answers = True

    def echo(self, mask: int) -> None:
        data, address = self.sock.recvfrom(65535)
        self.callers.append(address)
        if self.answers:
            self.sock.sendto(data, address)


class Made(Tunnel):
    """A Tunnel with an echo behind it."""

    def __init__(self, sock: socket.socket, **options: Any):
        super().__init__([sock.getsockname()], **options)
        self.target = Target(self, sock)

    def close(self) -> None:
        self.loop.poller.forget(self.target.sock.fileno())
        super().close()


@pytest.fixture
def make(udp) -> Iterator[Callable[..., Made]]:
    with contextlib.ExitStack() as stack:
        def make_one(**options: Any) -> Made:
            made = Made(udp(), **options)
            stack.callback(made.close)
            return made

        yield make_one


@pytest.fixture
def lead(udp) -> Iterator[Callable[..., Tunnel]]:
    """lead(*addresses) -> a Tunnel to targets that are not in its loop."""
    with contextlib.ExitStack() as stack:
        def make_one(*targets: Address, **options: Any) -> Tunnel:
            made = Tunnel(list(targets), **options)
            stack.callback(made.close)
            return made

        yield make_one


DIRECT = pytest.mark.parametrize("direct", [False, True], ids=["two ends", "by itself"])


# -- there and back --------------------------------------------------------------------------------


@DIRECT
@pytest.mark.parametrize("size", [0, 1, 512, 16384, 16385, 65507])
def test_a_datagram_comes_and_goes_whole(make, udp, direct, size):
    made = make(direct=direct)
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    caller = udp(made.address)
    assert made.ask(caller, data) == data
    counts = made.accepting.counts
    assert (counts.udps, counts.udprx, counts.udptx) == (1, size, size)
    if not direct:
        counts = made.dialling.counts
        assert (counts.udps, counts.udprx, counts.udptx) == (1, size, size)


@DIRECT
def test_each_caller_has_a_flow_and_gets_its_own_answers(make, udp, direct):
    made = make(direct=direct)
    callers = [udp(made.address) for _ in range(5)]
    for round in range(3):
        for number, caller in enumerate(callers):
            caller.send(b"%d of %d" % (round, number))
        for number, caller in enumerate(callers):
            assert made.receive(caller) == b"%d of %d" % (round, number)
    assert len(set(made.target.callers)) == 5 and made.accepting.counts.udps == 5
    if not direct:
        assert made.asked == [f"{HOST}:{caller.getsockname()[1]}" for caller in callers]


def test_many_datagrams_are_one_write_in_their_order(make, udp, monkeypatch):
    made = make()
    caller = udp(made.address)
    made.ask(caller, b"first")
    writes: list[int] = []
    send = TcpWire.send
    monkeypatch.setattr(TcpWire, "send", lambda wire, data: (writes.append(len(data)), send(wire, data)))
    for number in range(20):
        caller.send(b"%02d" % number)
    made.turn()
    assert writes[0] == 20 * 4
    assert [made.receive(caller) for _ in range(20)] == [b"%02d" % number for number in range(20)]


def test_a_flood_does_not_keep_the_loop(make, udp, monkeypatch):
    monkeypatch.setattr(sniroute_datagrams, "BATCH", 4)
    made = make()
    caller = udp(made.address)
    made.ask(caller, b"first")
    before = made.accepting.counts.udprx
    for _ in range(10):
        caller.send(b"x")
    made.near.port.on_ready(1)
    assert made.accepting.counts.udprx == before + 4


def test_frames_that_come_in_pieces_are_put_together(make, udp):
    made = make()
    made.served = False
    caller = udp(made.address)
    caller.send(b"hello")
    made.turn_until(lambda: made.pairs)
    far = made.pairs[0][1]
    for byte in frame_datagram(b"") + frame_datagram(b"abc"):
        far.send(bytes((byte,)))
        made.turn()
    assert [made.receive(caller), made.receive(caller)] == [b"", b"abc"]


def test_what_came_before_the_signal_is_for_the_target(make, udp):
    made = make()
    ours, theirs = made.pair()
    frames = frame_datagram(b"one") + frame_datagram(b"two")
    theirs.pause()
    ours.send(frames[7:])
    made.far.serve(SimpleNamespace(wire=theirs, early=frames[:7], ended=False), "192.0.2.1:1")
    reader, got = DatagramReader(65535), []
    ours.on_data = lambda data: got.extend(reader.feed(data))
    made.turn_until(lambda: len(got) == 2)
    assert got == [b"one", b"two"]


def test_what_came_before_the_signal_and_an_end_is_for_the_target(make):
    made = make()
    ours, theirs = made.pair()
    made.far.serve(SimpleNamespace(wire=theirs, early=frame_datagram(b"bye"), ended=True), "192.0.2.1:1")
    made.turn_until(lambda: made.target.callers)
    assert made.flows() == (0, 0)


@pytest.mark.parametrize("how", ["finish", "reset"])
def test_a_connection_may_end_before_the_target_is_known(lead, udp, monkeypatch, how):
    """What has come is for the target all the same, unless it was cut."""
    release, target = threading.Event(), udp()
    resolve_as(monkeypatch, lambda: [target.getsockname()] if release.wait(10) else [])
    made = lead(("dns.example.com", 53))
    ours, theirs = made.pair()
    made.far.serve(SimpleNamespace(wire=theirs, early=frame_datagram(b"one"), ended=False), "192.0.2.1:1")
    ours.send(frame_datagram(b"two"))
    getattr(ours, how)()
    theirs.resume()  # as where a piece is on its way when it is paused
    made.turn_until(lambda: not made.far.flows or next(iter(made.far.flows)).far.ended)
    release.set()
    if how == "finish":
        assert [made.receive(target), made.receive(target)] == [b"one", b"two"]
    made.turn_until(lambda: not made.far.flows and not made.dialling.upstreams.names.waiting)
    with pytest.raises(BlockingIOError):
        target.recv(1)


# -- how flows end -----------------------------------------------------------------------------------


@DIRECT
def test_a_flow_ends_when_nothing_has_moved_for_its_time(make, udp, direct):
    made = make(direct=direct)
    caller = udp(made.address)
    made.ask(caller, b"x")
    made.clock.jump(29)
    made.ask(caller, b"x")  # either direction keeps it
    made.clock.jump(29)
    made.turn()
    assert made.accepting.counts.udps == 1
    made.clock.jump(1)
    made.turn_until(lambda: made.flows() == (0, 0))
    assert made.accepting.slots.udp == made.dialling.slots.udp == 0
    assert made.ask(caller, b"again") == b"again" and len(set(made.target.callers)) == 2


@pytest.mark.parametrize("way", ["caller", "target"])
def test_one_direction_is_enough_to_keep_a_flow(make, udp, way):
    """With the original a flow whose target is silent ends, and begins anew."""
    made = make()
    caller = udp(made.address)
    made.ask(caller, b"x")
    made.target.answers = False
    for _ in range(10):
        made.clock.jump(20)
        if way == "caller":
            count = len(made.target.callers)
            caller.send(b"x")
            made.turn_until(lambda: len(made.target.callers) > count)
        else:
            made.target.sock.sendto(b"news", made.target.callers[0])
            assert made.receive(caller) == b"news"
    assert len(made.asked) == 1 and len(set(made.target.callers)) == 1


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("how", ["close", "finish", "reset"])
def test_a_flow_ends_with_its_connection(make, udp, side, how):
    made = make()
    caller = udp(made.address)
    made.ask(caller, b"x")
    getattr(made.pairs[0][side], how)()
    datagrams = made.far if side == 0 else made.near
    made.turn_until(lambda: not datagrams.flows)
    if how == "finish":
        made.turn_until(lambda: made.flows() == (0, 0))
        assert made.ask(caller, b"again") == b"again"


def test_a_dead_target_is_another_flows_turn(lead, udp, monkeypatch, free_ports):
    monkeypatch.setattr(sniroute_datagrams, "REFUSED_LAST", 0.02)
    place, good = (HOST, free_ports(2)[1]), udp()
    made = lead(place, good.getsockname())
    caller = udp(made.address)
    for _ in range(3):  # the second is told that the first was refused
        caller.send(b"lost")
    made.turn_until(lambda: made.flows() == (1, 1))
    made.turn_until(lambda: made.flows() == (0, 0))
    caller.send(b"hello")
    assert made.receive(good) == b"hello"
    assert made.far.dropped[sniroute_datagrams.REFUSED] >= 2


def test_a_target_that_restarts_within_a_moment_keeps_its_flow(lead, udp, monkeypatch):
    monkeypatch.setattr(sniroute_datagrams, "REFUSED_LAST", 60.0)
    target = udp()
    place = target.getsockname()
    made = lead(place)
    caller = udp(made.address)
    caller.send(b"1")
    assert made.receive(target) == b"1"
    target.close()
    caller.send(b"lost")
    made.turn_until(lambda: made.far.refused.due)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(place)
        again.setblocking(False)
        caller.send(b"2")
        assert made.receive(again) == b"2"
        flow, = made.far.flows
        again.sendto(b"3", flow.near.sock.getsockname())
        assert made.receive(caller) == b"3"
    assert not made.far.refused.due and made.flows() == (1, 1)


@linux
def test_a_flow_that_was_quiet_for_too_long_for_the_other_end_is_no_refused_one(lead, udp):
    """Where datagrams go one way only, and the times of the two ends differ: the next one begins another flow."""
    target = udp()
    made = lead(target.getsockname())
    made.near.refused.seconds = 60.0
    caller = udp(made.address)
    caller.send(b"one")
    assert made.receive(target) == b"one"
    made.clock.jump(sniroute_datagrams.REFUSED_LAST)
    flow, = made.far.flows
    flow.end()  # as `_sweep` does it
    made.turn_until(lambda: not made.pairs[0][0].is_open)
    caller.send(b"two")
    assert made.receive(target) == b"two" and len(made.pairs) == 2 and not made.near.dropped


def test_with_a_backup_the_first_is_left_when_it_refuses_datagrams(lead, udp, monkeypatch, free_ports):
    monkeypatch.setattr(sniroute_datagrams, "REFUSED_LAST", 0.02)
    place, good = (HOST, free_ports(2)[1]), udp()  # the first of them is marked by a socket, which is none that refuses
    made = lead(place, good.getsockname(), lbs=2)
    caller = udp(made.address)
    caller.send(b"lost")
    made.turn_until(lambda: made.far.dropped)
    made.turn_until(lambda: made.flows() == (0, 0))
    for word in (b"one", b"two"):
        caller.send(word)
        assert made.receive(good) == word


@DIRECT
def test_where_no_target_can_be_had_the_flow_ends_and_says_so_once(lead, udp, monkeypatch, direct):
    monkeypatch.setattr(sniroute_datagrams, "REFUSED_LAST", 0.02)
    made = lead(("::1%nowhere", 1), direct=direct)
    for _ in range(3):
        caller = udp(made.address)
        caller.send(b"x")
        made.turn_until(lambda: made.near.flows or made.dialling.warnings() or made.accepting.warnings())
        made.turn_until(lambda: made.flows() == (0, 0))
    end = made.accepting if direct else made.dialling
    assert len([line for line in end.warnings() if line.startswith("UDP: no target for 127.0.0.1:")]) == 1


# -- limits ------------------------------------------------------------------------------------------


@DIRECT
@pytest.mark.parametrize("limit", ["slot", "flows"])
def test_a_caller_for_whom_there_is_no_room_is_dropped_and_told_once(make, udp, monkeypatch, direct, limit):
    if limit == "flows":
        monkeypatch.setattr(sniroute_datagrams, "FLOWS_MAX", 2)
    made = make(direct=direct, slot=2 if limit == "slot" else 0)
    callers = [udp(made.address) for _ in range(6)]
    for caller in callers[:2]:
        made.ask(caller, b"x")
    for caller in callers[2:]:
        caller.send(b"x")
    made.turn_until(lambda: made.near.dropped.total() == 4)
    assert len(made.accepting.warnings()) == 1 and "UDP: datagrams were dropped: " in made.accepting.warnings()[0]
    assert made.ask(callers[0], b"y") == b"y"  # nobody else notices
    made.clock.jump(15)
    made.ask(callers[0], b"y")
    made.clock.jump(15)
    made.turn_until(lambda: made.accepting.counts.udps == 1)
    assert made.ask(callers[2], b"y") == b"y"


def test_new_callers_do_not_all_wait_for_connections(make, udp, monkeypatch):
    """A flood from many addresses leaves the pool to others."""
    monkeypatch.setattr(sniroute_datagrams, "WAITING_MAX", 3)
    made = make()
    first = udp(made.address)
    made.ask(first, b"x")
    late: list[Callable[[], None]] = []
    made.answer = late.append
    callers = [udp(made.address) for _ in range(10)]
    for caller in callers:
        caller.send(b"hello")
    made.turn_until(lambda: made.near.dropped[sniroute_datagrams.CROWD] == 7)
    assert len(late) == 3 and made.ask(first, b"y") == b"y"
    for act in late:
        act()
    assert [made.receive(caller) for caller in callers[:3]] == [b"hello"] * 3 and made.near.waiting == 0


def test_an_other_end_that_is_full_ends_the_connection(make, udp, monkeypatch):
    monkeypatch.setattr(sniroute_datagrams, "REFUSED_LAST", 0.02)
    made = make()
    made.dialling.slots.limit = 1
    one, two = udp(made.address), udp(made.address)
    made.ask(one, b"x")
    two.send(b"x")
    made.turn_until(lambda: len(made.asked) == 2)
    made.turn_until(lambda: made.flows() == (1, 1))
    assert made.ask(one, b"y") == b"y"


def test_what_comes_before_the_connection_is_kept_within_a_limit(make, udp):
    made = make()
    late: list[Callable[[], None]] = []
    made.answer = late.append
    caller = udp(made.address)
    for number in range(10):
        caller.send(b"%d" % number + bytes(9871))
        made.turn_until(lambda: made.accepting.counts.udprx == (number + 1) * 9872)
    assert made.near.dropped == {sniroute_datagrams.EARLY: 3}
    late[0]()
    assert [made.receive(caller)[:1] for _ in range(7)] == [b"%d" % number for number in range(7)]


def test_a_large_first_datagram_is_kept(make, udp):
    made = make()
    late: list[Callable[[], None]] = []
    made.answer = late.append
    caller = udp(made.address)
    caller.send(bytes(65507))
    made.turn_until(lambda: late)
    late[0]()
    assert made.receive(caller) == bytes(65507)


def test_without_a_connection_the_flow_ends(make, udp):
    made = make()
    made.accepting.take = lambda action, remote, done: done(None)
    caller = udp(made.address)
    for _ in range(3):
        caller.send(b"x")
    made.turn_until(lambda: made.near.dropped.total() or made.accepting.lines)
    line = "debug", f"UDP: a flow of {HOST}:{caller.getsockname()[1]} ends"
    made.turn_until(lambda: made.accepting.lines[-1] == line)
    assert made.flows() == (0, 0)


def test_a_connection_that_comes_too_late_is_closed(make, udp):
    made = make()
    made.served = False
    late: list[Callable[[], None]] = []
    made.answer = late.append
    udp(made.address).send(b"x")
    made.turn_until(lambda: late)
    made.clock.jump(30)
    made.turn_until(lambda: not made.near.flows)
    late[0]()
    assert not made.pairs[0][0].is_open
    assert made.near.dropped == {}


def test_a_connection_that_is_too_slow_loses_datagrams(make, udp):
    made = make()
    made.served = False
    caller = udp(made.address)
    caller.send(b"x")
    made.turn_until(lambda: made.pairs)
    wire, far = made.pairs[0]
    far.pause()
    size, rounds = 60000, 0
    while not made.near.dropped:
        caller.send(bytes(size))
        made.turn()
        rounds += 1
        assert rounds < 2000
    assert sniroute_datagrams.UNSENT_MAX < wire.unsent < sniroute_datagrams.UNSENT_MAX + 64 * size
    assert list(made.near.dropped) == [sniroute_datagrams.FULL_WIRE]
    assert made.accepting.warnings() == ["UDP: datagrams were dropped: the connection to the other end is too slow "
                                         "(1 so far)"]


def test_what_is_too_large_for_the_other_end_is_dropped_instead_of_cut(make, udp):
    made = make()
    made.near.largest = 16384
    caller = udp(made.address)
    caller.send(bytes(16385))
    assert made.ask(caller, bytes(16384)) == bytes(16384)
    assert made.near.dropped == {sniroute_datagrams.TOO_LARGE: 1}


def test_a_frame_that_no_datagram_can_carry_is_dropped(make, udp):
    made = make()
    made.served = False
    caller = udp(made.address)
    caller.send(b"hello")
    made.turn_until(lambda: made.pairs)
    made.pairs[0][1].send(struct.pack(">H", 65535) + bytes(65535) + frame_datagram(b"next"))
    assert made.receive(caller) == b"next"
    assert made.near.dropped == {"Message too long": 1}


@DIRECT
@pytest.mark.parametrize("way", [0, 1])
def test_a_rate_is_kept_by_reading_later(make, udp, direct, way):
    clock = FakeClock(0.0)
    fast, slow = Bucket(0.0, clock), Bucket(1000.0, clock)
    made = make(direct=direct, buckets=(slow, fast) if way == 0 else (fast, slow))
    caller = udp(made.address)
    made.ask(caller, bytes(1500))  # a debt of half a second
    caller.send(bytes(10))
    count = len(made.target.callers)
    if way == 1:
        made.turn_until(lambda: len(made.target.callers) > count)
    for _ in range(3):
        made.turn()
    with pytest.raises(BlockingIOError):
        caller.recv(1)
    clock.jump(0.6)
    made.clock.jump(0.6)
    assert made.receive(caller) == bytes(10)


def test_a_flow_that_ends_while_its_rate_holds_it_is_over(make, udp):
    clock = FakeClock(0.0)
    made = make(buckets=(Bucket(1000.0, clock), Bucket(1000.0, clock)))
    caller = udp(made.address)
    made.ask(caller, bytes(1500))
    made.pairs[0][0].finish()
    made.near.unlisten()
    made.clock.jump(1)
    made.turn()
    made.turn()
    assert made.flows()[0] == 0


# -- between two ends --------------------------------------------------------------------------------


@pytest.fixture
def echoing(udp) -> Iterator[Address]:
    """The address of a UDP echo, in a thread."""
    sock = udp()
    sock.setblocking(True)

    def serve() -> None:
        while True:
            data, address = sock.recvfrom(65535)
            if data == b"stop":
                return
            sock.sendto(data, address)

    thread = threading.Thread(target=serve)
    thread.start()
    yield sock.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
        last.sendto(b"stop", sock.getsockname())
    thread.join(10)


@pytest.mark.parametrize("flow", ["-", "+"], ids=["server accepts", "client accepts"])
@pytest.mark.parametrize("query", ["type=0", "type=0&tls=1", "type=2", "type=2&tls=1", "type=3"])
def test_each_kind_of_pool_carries_datagrams(tunnel, echoing, udp, query, flow):
    made = tunnel(echoing, flow, query)
    callers = [udp(made.udp) for _ in range(3)]
    for size in (0, 1, 512, 16384, 16385, 65507):
        for number, sock in enumerate(callers):
            sock.setblocking(True)
            sock.settimeout(10)
            data = bytes((number,)) * size
            sock.send(data)
            assert sock.recv(65535) == data
    counts = [end.end.counts for end in (made.accepting, made.dialling)]
    assert [count.udps for count in counts] == [3, 3]
    size = 3 * (1 + 512 + 16384 + 16385 + 65507)
    assert {count.udprx for count in counts} == {count.udptx for count in counts} == {size}
    made.accepting.call(made.accepting.end.datagrams.unlisten)
    wait_until(lambda: [end.end.slots.udp for end in (made.accepting, made.dialling)] == [0, 0])


def test_an_end_that_serves_no_udp_costs_a_connection_now_and_then(tunnel, echoing, udp, monkeypatch):
    monkeypatch.setattr(sniroute_datagrams, "REFUSED_LAST", 60.0)
    made = tunnel(echoing, "-", "type=0", "noudp=1")
    caller = udp(made.udp)
    dropped, refused = made.accepting.end.datagrams.dropped, made.accepting.end.datagrams.refused

    def hurry() -> None:
        refused.seconds = 0.3
        for flow in list(refused.due):
            refused.put(flow)

    caller.send(b"x")
    wait_until(lambda: refused.due)
    for _ in range(5):  # that may cost a connection only now and then
        caller.send(b"x")
    wait_until(lambda: dropped[sniroute_datagrams.UNWANTED] == 5)
    made.accepting.call(hurry)  # not before: then the five had to come within that time
    wait_until(lambda: not made.accepting.end.slots.udp)
    assert not made.dialling.end.counts.udptx


# -- words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address, text", [
    (("192.0.2.1", 5), "192.0.2.1:5"), (("2001:db8::1", 5, 0, 0), "[2001:db8::1]:5"),
    (("::ffff:192.0.2.1", 5, 0, 0), "192.0.2.1:5"), (("fe80::1%eth0", 5, 0, 2), "[fe80::1%eth0]:5")])
def test_callers_are_shown_as_addresses(address, text):
    assert sniroute_datagrams.show_caller(address) == text
