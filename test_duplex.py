"""Tests of sniroute_duplex.py, in its order: real sockets, both ends in one loop or the other end in a thread."""

from __future__ import annotations

import random
import socket
import traceback

import pytest

import sniroute_layers
from sniroute_dial import Failed
from sniroute_duplex import TcpWire
from sniroute_layers import Wires
from sniroute_loop import Loop, monotonic
from testbed.running import read_all, reset

NOISE = random.Random(7).randbytes(1 << 20)


class Turned:
    """A loop that a test turns, and its wires."""

    def __init__(self):
        self.faults = []
        self.loop = Loop(lambda owner: self.faults.append(traceback.format_exc()))
        self.wires = Wires(self.loop)
        self.tick = self.loop.timer(lambda: None)

    def turn(self, count=1):
        for _ in range(count):
            self.tick.set(monotonic() + 0.01)
            self.loop.turn()
            assert not self.faults, self.faults[0]

    def until(self, predicate, timeout=10.0):
        """Turn until `predicate` is true; its value."""
        deadline = monotonic() + timeout
        while not (result := predicate()):
            assert monotonic() < deadline, "not within the time"
            self.turn()
        return result

    def close(self):
        self.wires.close()
        self.loop.close()


class Owner:
    """Whoever has a wire: what it was told."""

    def __init__(self, wire):
        self.wire = wire
        self.heard = bytearray()
        self.ends = []
        wire.on_data, wire.on_end = self.heard.extend, self.ends.append


@pytest.fixture
def turned():
    turned = Turned()
    yield turned
    turned.close()


def sockets():
    """Two connected TCP sockets that do not block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for sock in (near, far):
        sock.setblocking(False)
    return near, far


@pytest.fixture
def pair(turned):
    """pair() -> two Owners, of the two ends of one connection."""
    made = []

    def make():
        made.extend(TcpWire(turned.wires, sock) for sock in sockets())
        return Owner(made[-2]), Owner(made[-1])

    yield make
    for wire in made:
        wire.reset()


# -- TCP ---------------------------------------------------------------------------------------


def test_one_direction_ends_and_the_other_goes_on(turned, pair):
    near, far = pair()
    near.wire.send(b"question")
    near.wire.finish()
    turned.until(lambda: far.ends)
    assert far.ends == [None] and far.heard == b"question" and far.wire.is_open
    far.wire.send(NOISE)
    far.wire.finish()
    turned.until(lambda: near.ends)
    assert near.ends == [None] and near.heard == NOISE
    turned.until(lambda: far.wire.sock.fileno() < 0)  # both directions are over: it has closed by itself
    assert not near.wire.is_open and not far.wire.is_open and near.wire.sock.fileno() < 0
    assert far.ends == [None]


def test_the_end_comes_behind_what_is_unsent(turned, pair):
    near, far = pair()
    far.wire.pause()
    while near.wire.unsent < 1 << 20:
        near.wire.send(NOISE)
    near.wire.finish()
    assert near.wire.raw() is None
    turned.turn(3)
    assert not far.ends and near.wire.unsent
    far.wire.resume()
    turned.until(lambda: far.ends)
    assert far.ends == [None] and len(far.heard) % len(NOISE) == 0 and near.wire.is_open
    far.wire.pause()
    far.wire.resume()  # there is nothing to be read any more: it must not turn for ever
    far.wire.finish()
    turned.until(lambda: not near.wire.is_open)
    assert near.ends == [None]


def test_a_peer_that_breaks_off_behind_its_end_is_told(turned):
    near, far = sockets()
    owner = Owner(TcpWire(turned.wires, near))
    far.shutdown(socket.SHUT_WR)
    turned.until(lambda: owner.ends)
    reset(far)
    owner.wire.send(b"x")
    owner.wire.send(b"x")
    turned.until(lambda: len(owner.ends) == 2)
    assert owner.ends[0] is None and isinstance(owner.ends[1], Failed) and not owner.wire.is_open


@pytest.mark.parametrize("ended", [False, True])
def test_a_reset_is_told_once(turned, ended):
    near, far = sockets()
    owner = Owner(TcpWire(turned.wires, near))
    if ended:
        owner.wire.finish()
    reset(far)
    turned.until(lambda: owner.ends)
    turned.turn(3)
    assert [type(end) for end in owner.ends] == [Failed] and not owner.wire.is_open


def test_the_socket_can_be_had_while_nothing_is_on_its_way(turned, pair):
    near, far = pair()
    near.wire.send(b"first")
    turned.until(lambda: far.heard == b"first")
    with far.wire.raw() as sock:
        assert not far.wire.is_open and far.wire.raw() is None
        far.wire.close()
        far.wire.reset()  # they are the wire's, which has nothing any more
        near.wire.send(b"second")
        turned.turn(3)
        assert far.heard == b"first" and sock.recv(100) == b"second"
        sock.send(b"back")
        turned.until(lambda: near.heard == b"back")
    turned.until(lambda: near.ends)
    assert not far.ends


def test_the_socket_cannot_be_had_with_something_unsent(turned, pair):
    near, far = pair()
    far.wire.pause()
    while not near.wire.unsent:
        near.wire.send(NOISE)
    assert near.wire.raw() is None and near.wire.is_open


def test_close_ends_both_directions_and_what_was_sent_arrives(turned):
    near, far = sockets()
    owner = Owner(TcpWire(turned.wires, near))
    owner.wire.send(b"last words")
    owner.wire.close()
    far.setblocking(True)
    with far:
        assert read_all(far) == b"last words"
    turned.until(lambda: near.fileno() < 0)
    assert not owner.ends


def test_a_closed_wire_waits_for_a_slow_peer_and_not_for_one_that_takes_nothing(turned, monkeypatch):
    monkeypatch.setattr(sniroute_layers, "LINGER", 0.05)
    turned.wires.lingering.seconds = 0.05
    near, far = sockets()
    owner, total = Owner(TcpWire(turned.wires, near)), 0
    while owner.wire.unsent < 8 << 20:
        owner.wire.send(NOISE)
        total += len(NOISE)
    owner.wire.close()
    began, taken = monotonic(), 0
    while taken < total // 2:
        taken += len(far.recv(1 << 17))
        turned.turn()
    slow = monotonic() - began > 0.05
    assert near.fileno() >= 0 or not slow
    turned.until(lambda: near.fileno() < 0)  # nothing more is taken
    far.close()


def test_the_address_of_the_peer_is_known(turned, pair):
    near, far = pair()
    assert near.wire.peer == far.wire.sock.getsockname()[:2] and far.wire.fingerprint() == ""
