"""NodePass ends among strangers: each attack is bounded, told once in a while, and nobody else notices.

`Calm` is a caller that goes on all the time, and has to be served within normal times.  Strangers call from STRANGER, or
from the client's own address.  At the end of each attack the tables of the server are as before.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import socket
import struct
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute_datagrams
import sniroute_lanes
import sniroute_pool
from conftest import HOST, connect, wait_until
from sniroute_duplex import TcpWire, TlsWire, WebSocketWire
from sniroute_dialin import ANSWERED_MAX, CANDIDATES_MAX, UNPROVEN_MAX
from sniroute_dialout import CAPACITY_MAX
from sniroute_hpack import encode as encode_head
from sniroute_http2 import CONTINUATION, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, make_frame
from sniroute_nodepass import Forwarders, NodePass
from sniroute_pool import EARLY_MAX, WANTED_MAX, Slot
from sniroute_refusals import Malformed
from sniroute_signals import Signal, Terms, answer, encode, proof
from testbed.endure_router import children, descriptors, resident
from testbed.foreign import UPGRADE, Client, Served, call_from, read_exactly, upgrade
from testbed.nodepass import QUICK, Local, Tunnel, trip
from testbed.ports import free_port

STRANGER = "127.0.0.2"
HASTY = QUICK._replace(handshake=1.0)  # who is not ready by then goes
DATE = "Sun, 29 Nov 2026 00:00:00 GMT"
SLOWEST = 2.0  # seconds that a caller waits, on a host that does other things, too
LINES_MAX = 12  # of the log that an attack may cost


class Calm:
    """A caller that comes again and again while something happens.  Used with `with`."""

    def __init__(self, made: Tunnel):
        self.made = made
        self.address = made.address
        self.times: list[float] = []
        self.stopping = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, name="calm")

    def run(self) -> None:
        try:
            while not self.stopping.is_set() or not self.times:
                began = time.monotonic()
                assert trip(self.address) == b"hello"
                self.times.append(time.monotonic() - began)
                time.sleep(0.005)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Calm:
        self.link = self.made.server.end.link
        self.lines = [len(lines_of(self.made.server)), len(lines_of(self.made.client))]
        self.thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.stopping.set()
        self.thread.join()
        if kind is not None:
            return
        if self.error is not None:
            raise self.error
        assert max(self.times) < SLOWEST, f"{max(self.times):.2f} s, of {len(self.times)} callers"
        assert self.made.server.end.link is self.link, "another link"
        for end, before in zip((self.made.server, self.made.client), self.lines):
            told = lines_of(end)[before:]
            assert len(told) <= LINES_MAX, told


def lines_of(end: Local) -> list[str]:
    """What it has logged, also its state; not what it would log at `debug`."""
    return [row["message"] for row in end.log.rows.copy() if row["level"] != "debug"]


def strangers(server: Local) -> dict[str, int]:
    """What a server has of those that are nobody yet."""
    end, reception = server.end, server.end.reception
    return {"strangers": len(reception.strangers), "friends": len(reception.friends), "sessions": len(reception.sessions),
            "unproven": len(end.proving.due), "answered": len(end.answered.due)}


LIMITS = {"strangers": sniroute_lanes.STRANGERS_MAX, "friends": sniroute_lanes.FRIENDS_MAX,
          "sessions": sniroute_lanes.SESSIONS_MAX, "unproven": UNPROVEN_MAX, "answered": ANSWERED_MAX}


@contextlib.contextmanager
def crowd(*socks: socket.socket) -> Iterator[list[socket.socket]]:
    """Sockets that are closed at the end."""
    opened = list(socks)
    try:
        yield opened
    finally:
        for sock in opened:
            sock.close()


def within_limits(server: Local) -> None:
    for what, count in server.call(lambda: strangers(server)).items():
        assert count <= LIMITS[what], f"{count} {what}"


def forgotten(server: Local, sessions: int = 0) -> None:
    """Wait until nothing is left of strangers."""
    wait_until(lambda: all(count <= (sessions if what == "sessions" else 0) for what, count in strangers(server).items()),
               what=f"no stranger: {strangers(server)}")


# -- handshakes --------------------------------------------------------------------------------


@pytest.mark.parametrize("key, ours, status, words", [
    ("wrong", True, b"401", "wrong key"), ("key", True, b"409", "asks for a link"),
    ("key", False, b"409", "asks for a link")], ids=["a wrong key", "replayed", "replayed as the original's"])
@pytest.mark.parametrize("source, query", [(STRANGER, "tls=1"), (HOST, "type=2&tls=1")], ids=["a stranger", "a neighbour"])
def test_handshakes_while_there_is_a_link(key, ours, status, words, source, query, tunnel, echo_server):
    """With a wrong key; or replayed, which is with the right token, since that never changes.  The client keeps the link."""
    made = tunnel(echo_server.address, server=query, client="min=8")
    address = made.server.end.listener.getsockname()
    with Calm(made):
        for _ in range(8):
            with Client(address, key, ours, source) as client:
                assert client.shake().startswith(b"HTTP/1.1 %s " % status)
    assert sum(words in line for line in made.server.messages) == 1
    forgotten(made.server)


@pytest.mark.parametrize("query, source", [("", HOST), ("tls=1", HOST), ("tls=1", STRANGER), ("type=2", STRANGER)])
def test_replayed_handshakes_do_not_keep_a_client_out(query, source, tunnel, echo_server):
    """Somebody asks again and again with a token that it has heard, and joins the pool, without the key."""
    made = tunnel(echo_server.address, server=query, client="min=8", times=HASTY._replace(handshake=0.5))
    address = made.server.end.listener.getsockname()
    stopping = threading.Event()
    kept: list[Client] = []

    def attack() -> None:
        while not stopping.is_set():
            with contextlib.suppress(OSError, Malformed):
                client = Client(address, ours=True, source=source)
                kept.append(client)
                client.begin()
                for _ in range(4):
                    client.dial(proves=False)

    thread = threading.Thread(target=attack, name="replay")
    thread.start()
    try:
        for count in (2, 3):
            wait_until(lambda: len(kept) > 3 * count)
            made.server.call(lambda: made.server.end.link.end("a test"))
            made.linked_again(count)
            assert trip(made.address) == b"hello"
            assert len(made.server.end.candidates) <= CANDIDATES_MAX
    finally:
        stopping.set()
        thread.join()
        for client in kept:
            client.__exit__()
    forgotten(made.server)


def half_hello(sock: socket.socket, number: int) -> None:
    sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00"[:1 + number % 7])


def half_request(sock: socket.socket, number: int) -> None:
    sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"[:1 + number % 40])


HALVES = {
    "silence": ("", lambda sock, number: None), "half a hello": ("tls=1", half_hello), "half an upgrade": ("type=2", half_request),
    "half a hello, type=3": ("type=3&tls=1", half_hello),
}


@pytest.mark.parametrize("half", HALVES)
def test_half_handshakes_in_thousands(half, tunnel, single_loop_echo):
    """Each is closed in time, and there are never too many: of strangers, and of neighbours of the client."""
    query, say = HALVES[half]
    made = tunnel(single_loop_echo, server=query, client="min=8", times=HASTY)
    address = made.server.end.listener.getsockname()
    with Calm(made), crowd() as socks:
        for number in range(1000):
            socks.append(call_from((STRANGER, HOST)[number % 2], address))
            with contextlib.suppress(ConnectionError):
                say(socks[-1], number)
            if number % 300 == 0:
                within_limits(made.server)
        within_limits(made.server)
        forgotten(made.server, sessions=1)
    wait_until(lambda: made.server.end.idle >= 8)


@pytest.mark.parametrize("query, halves", [
    ("tls=1", (b"", b"GET / HTTP/1.1\r\nHost")), ("type=2&tls=1", (b"", UPGRADE[:50], UPGRADE, UPGRADE + bytes(15)))])
def test_who_says_nothing_inside_tls_has_the_same_deadline(query, halves, tunnel, echo_server):
    """Neither nothing, nor half a request, nor a WebSocket without a proof of the key; of strangers, and of neighbours."""
    made = tunnel(echo_server.address, server=query, client="min=4", times=HASTY)
    address = made.server.end.listener.getsockname()
    with Calm(made), Client(address, source=STRANGER) as stranger, Client(address) as neighbour:
        for client in (stranger, neighbour):
            for said in halves * 3:
                client.open(True).sendall(said)
        forgotten(made.server)
    wait_until(lambda: made.server.end.idle >= 4)


def test_bytes_that_drip_have_the_same_deadline(tunnel, echo_server):
    """A byte now and then does not make more time."""
    made = tunnel(echo_server.address, server="type=2", client="min=4", times=HASTY)
    began = time.monotonic()
    with Calm(made), call_from(STRANGER, made.server.end.listener.getsockname()) as sock:
        with pytest.raises(ConnectionError):
            for byte in b"GET / HTTP/1.1\r\nHost: " + b"x" * 5000:
                sock.sendall(bytes((byte,)))
                time.sleep(0.02)
    assert time.monotonic() - began < 5


def test_connections_of_neighbours_leave_the_client_its_room(tunnel, echo_server):
    """They have the client's address, and do not prove the key: they count for nothing."""
    made = tunnel(echo_server.address, server="max=16", client="min=16", times=HASTY)
    address = made.server.end.listener.getsockname()
    with Calm(made), crowd() as socks:
        for _ in range(400):
            with contextlib.suppress(ConnectionError):  # the pool is full
                socks.append(connect(address))
                assert len(socks[-1].recv(4)) == 4
        for _ in range(40):  # more than the pool had: it is filled again, whatever they do
            assert trip(made.address) == b"hello"
        wait_until(lambda: made.client.end.idle >= 16 and made.server.end.idle >= 16, what="a pool that is full")
        within_limits(made.server)
    forgotten(made.server)


def test_a_client_that_makes_connections_without_end(lone, echo_server):
    """It has the key: what is too much is closed."""
    server = lone(times=HASTY).begin(f"server://key@{HOST}:1/{HOST}:2?mode=1&max=16", port=0, targets=((HOST, 0),))
    with Client(server.end.listener.getsockname(), ours=True) as client:
        client.begin().fill(0)
        refused = 0
        for _ in range(200):
            with contextlib.suppress(ConnectionError):
                number, sock = client.dial()
                client.slots[number] = sock
                continue
            refused += 1
        wait_until(lambda: server.end.idle == 16)
        assert refused > 100
    wait_until(lambda: server.end.idle == 0)


# -- the control channel -----------------------------------------------------------------------


@pytest.fixture
def link(lone, echo_server) -> Iterator[Callable[..., tuple[Local, Client]]]:
    """link(flow, count=4) -> (our server, a client of it by hand): linked."""
    with contextlib.ExitStack() as stack:
        def make(flow: str, count: int = 4, ours: bool = True, target: Any = None, **times: Any) -> tuple[Local, Client]:
            server = lone(times=QUICK._replace(**times)).begin(
                f"server://key@{HOST}:1/{HOST}:2?mode={1 if flow == '-' else 2}", port=0,
                targets=((HOST, 0) if flow == "-" else target or echo_server.address,))
            wait_until(lambda: server.program.ends and server.end.listener)
            client = stack.enter_context(Client(server.end.listener.getsockname(), ours=ours))
            client.begin().fill(count)
            wait_until(lambda: server.end.idle >= count)
            return server, client

        yield make


def test_signals_that_are_none_end_the_link_after_a_hundred(link):
    server, client = link("-")
    client.channel.sock.sendall(b"no signal\n" * 50)
    client.channel.say("verily", "x", "0badcafe")
    client.channel.say("ping")
    client.channel.hear("pong")
    client.channel.sock.sendall(b"AAAA\n" * 100)
    assert "a signal that is no" in server.has_said("the link is over")
    assert len(server.messages) < 10


@pytest.mark.parametrize("said", [b"A" * 5000, b"A" * 5000 + b"\n", bytes(range(256)) * 40], ids=["endless", "line", "any"])
def test_a_line_that_is_too_long_ends_the_link(said, link):
    server, client = link("-")
    with contextlib.suppress(ConnectionError):
        for _ in range(200):
            client.channel.sock.sendall(said)
    assert re.search("more than 4096 bytes|no base64", server.has_said("the link is over"))


def test_a_peer_that_names_whatever_it_likes(link):
    """Ids that are not there, by the ten thousand: so many are waited for, and the rest is told at once."""
    server, client = link("+", pool_get=0.5, report=60.0)  # a report would flush the pool, for so many errors
    lines = [encode(Signal("tcp", "192.0.2.1:5", f"{number:08x}"), b"key") for number in range(1, 10_001)]
    for at in range(0, len(lines), 500):
        client.channel.sock.sendall(b"".join(lines[at:at + 500]))
        assert server.call(lambda: len(server.end.pool.wanted)) <= WANTED_MAX
        assert server.call(lambda: len(server.end.callees)) <= WANTED_MAX
    client.channel.sock.setblocking(True)
    for _ in range(10_000):
        client.channel.hear("refused")
    wait_until(lambda: not server.end.pool.wanted and not server.end.callees)
    assert sum("is not there" in line for line in server.messages) == 1
    number, sock = next(iter(client.slots.items()))
    client.channel.say("tcp", "192.0.2.1:5", number)
    sock.sendall(b"hello")
    assert read_exactly(sock, 5) == b"hello"


def test_what_was_named_in_a_link_is_not_waited_for_in_the_next_one(link):
    """It cannot come; and the next one would be blamed for it: so many errors flush its pool."""
    server, client = link("+", pool_get=2.0)
    for number in ("0badcafe", "1badcafe", "2badcafe", "3badcafe"):
        client.channel.say("tcp", "192.0.2.1:5", number)
    wait_until(lambda: len(server.end.pool.wanted) == 4)
    server.call(lambda: server.end.link.end("a test"))
    with Client(server.end.listener.getsockname(), ours=True) as successor:
        successor.begin().fill(4)
        wait_until(lambda: server.end.link is not None and server.end.idle == 4)
        wait_until(lambda: not server.end.pool.wanted and not server.end.callees)
        assert server.end.errors == 0


def test_a_connection_that_is_named_twice_is_one(link):
    """Also for UDP; and the second one harms nobody."""
    server, client = link("+", pool_get=0.2)
    number, sock = next(iter(client.slots.items()))
    for action in ("tcp", "tcp", "udp"):
        client.channel.say(action, "192.0.2.1:5", number)
    sock.sendall(b"hello")
    assert read_exactly(sock, 5) == b"hello"
    client.channel.hear("refused")
    sock.sendall(b"again")
    assert read_exactly(sock, 5) == b"again"
    assert server.end.slots.tcp == 1 and server.end.slots.udp == 0


@pytest.mark.parametrize("action, words", [("flush", "flushed"), ("pong", "CHECK_POINT"), ("refused", "refused"),
                                           ("verify", "verify")])
def test_signals_in_thousands_cost_no_lines(action, words, link):
    server, client = link("-")
    before = len(server.messages)
    lines = encode(Signal(action, "", "0badcafe", ""), b"key") * 500
    with contextlib.suppress(ConnectionError):
        for _ in range(10):
            client.channel.sock.sendall(lines)
        client.channel.say("ping")
        client.channel.hear("pong")
    assert len(server.messages) - before <= 4, server.messages[-8:]


def test_a_peer_that_does_not_read_its_control_channel_is_dropped(link):
    """It asks, and takes no answer: a megabyte of those is enough."""
    server, client = link("-")
    client.channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    ping = encode(Signal("ping"), b"key") * 5000
    with pytest.raises(ConnectionError):
        for _ in range(400):
            client.channel.sock.sendall(ping)
    assert "takes no signals" in server.has_said("the link is over")


@pytest.mark.parametrize("kind, lines", [(NodePass, 1), (Forwarders, 20)], ids=["a program", "for sniroute"])
def test_callers_who_are_refused_cost_a_line_once_in_a_while(kind, lines, lone):
    """sniroute hears of each: it has a client of its own to tell."""
    server = lone(times=QUICK._replace(pool_get=0.3), kind=kind).begin(f"server://key@{HOST}:1/{HOST}:2?mode=1", port=0,
                                                                        targets=((HOST, 0),))
    with crowd(*(connect(server.callers) for _ in range(20))) as callers:
        for caller in callers:
            with contextlib.suppress(ConnectionError):
                assert not caller.recv(1)
        wait_until(lambda: not server.program.connections)
    assert sum(row.get("event") == "failed" for row in server.log.rows) == lines


# -- idle connections --------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "the original"])
def test_megabytes_on_idle_connections_of_an_accepting_end_reset_them(ours, link):
    server, client = link("-", 8, ours)
    for sock in client.slots.values():
        with pytest.raises(ConnectionError):
            for _ in range(100):
                sock.sendall(bytes(1 << 18))
    wait_until(lambda: server.end.idle == 0)
    assert sum("spoken without being asked" in line for line in server.messages) == 1


@pytest.mark.parametrize("named", ["", "before", "behind"], ids=["idle", "named, and the target hangs",
                                                                  "named behind what it says"])
def test_megabytes_on_idle_connections_of_a_dialling_end_stay_with_the_sender(named, link, deaf, monkeypatch):
    """They may be a caller's, whose signal is on its way: a bound for all together."""
    monkeypatch.setattr(sniroute_pool, "EARLY_MAX", 1 << 20)
    server, client = link("+", 60, target=deaf, pool_get=20.0)
    end = server.end
    if named == "before":
        for number in client.slots:
            client.channel.say("tcp", "192.0.2.1:5", number)
        wait_until(lambda: len(end.pool.dialling) == len(client.slots))
    for number, sock in client.slots.items():
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(bytes(1 << 20))
        if named == "behind":
            client.channel.say("tcp", "192.0.2.1:5", number)
    wait_until(lambda: end.pool.is_tight)
    time.sleep(0.1)
    held, kept = server.call(lambda: (end.pool.held, sum(len(slot.early) for slot in end.pool.idle.values())
                                      + sum(len(callee.slot.early) for callee in end.callees if callee.slot is not None)))
    assert held == kept < (1 << 20) + 3 * (1 << 18), f"{held} bytes, {kept} of them are there"
    server.call(lambda: end.link.end("a test"))
    for callee in server.call(lambda: list(end.callees)):
        server.call(callee.abort)
    wait_until(lambda: end.pool.held == 0 and not end.pool.is_tight and not end.pool.dialling)


def test_what_was_held_is_passed_on_when_there_is_room_again(link, monkeypatch):
    """Nobody loses a byte by it."""
    monkeypatch.setattr(sniroute_pool, "EARLY_MAX", 1000)
    server, client = link("+", 6)
    data = bytes(range(256)) * 16
    for sock in client.slots.values():
        sock.sendall(data)
    wait_until(lambda: server.end.pool.is_tight)
    for number, sock in client.slots.items():
        client.channel.say("tcp", "192.0.2.1:5", number)
        assert read_exactly(sock, len(data)) == data
    assert server.end.pool.held == 0 and not server.end.pool.is_tight


def test_what_comes_right_behind_a_proof_is_held_like_what_comes_later(link, monkeypatch):
    """The first caller's bytes, where a pool is empty: they are counted, and no more than one piece is read."""
    monkeypatch.setattr(sniroute_pool, "EARLY_MAX", 1000)
    server, client = link("+", 0)
    data = bytes(range(256)) * 16
    number, sock = client.dial(proves=False)
    sock.sendall(proof(client.key, client.terms.nonce, bytes.fromhex(number)) + data)
    wait_until(lambda: number in server.end.pool.idle)
    assert server.end.pool.held == len(data) and server.end.pool.is_tight
    client.channel.say("tcp", "192.0.2.1:5", number)
    assert read_exactly(sock, len(data)) == data
    wait_until(lambda: not server.end.pool.dialling)
    assert server.end.pool.held == 0 and not server.end.pool.is_tight


# -- WebSocket ---------------------------------------------------------------------------------

MASK = b"\1\2\3\4"


def frame(opcode: int, data: bytes, final: bool = True, masked: bool = True, size: int | None = None) -> bytes:
    """A frame of a client, by hand."""
    first, bit = (0x80 if final else 0) | opcode, 0x80 if masked else 0
    size = len(data) if size is None else size
    head = struct.pack(">BB", first, bit | size) if size < 126 else struct.pack(">BBQ", first, bit | 127, size)
    body = bytes(byte ^ MASK[at % 4] for at, byte in enumerate(data)) if masked else data
    return head + (MASK if masked else b"") + body


@pytest.mark.parametrize("said", [frame(2, b"half") + frame(8, b"\3\xf3"), frame(8, b"\3\xe8")],
                         ids=["by its last word", "behind its end"])
def test_what_has_broken_off_before_it_is_named_does_not_look_whole(said, link, serve):
    """Its target would get what came before, and then an end; and nobody would hear what the target says."""
    target = serve(lambda sock: sock.recv(10))
    server, client = link("+", 0, target=target.address)
    with socket.create_server((HOST, 0)) as listener, connect(listener.getsockname()) as far:
        near, _ = listener.accept()
        near.setblocking(False)
        wire = server.call(lambda: WebSocketWire(TcpWire(server.program.wires, near), False))
        server.call(lambda: server.end.pool.add(Slot("0badcafe", wire)))
        far.sendall(said)
        wait_until(lambda: "0badcafe" in server.end.pool.ended)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: not wire.is_open)
    client.channel.say("tcp", "192.0.2.1:5", "0badcafe")
    wait_until(lambda: not server.end.pool.ended and not server.end.callees)
    assert not target.accepted and server.end.slots.tcp == 0


WRONG_FRAMES = {
    "unmasked": frame(2, b"x" * 16, masked=False), "a continuation of nothing": frame(0, b"x" * 16),
    "two beginnings": frame(2, b"x", final=False) + frame(2, b"x"), "a ping in pieces": frame(9, b"x", final=False),
    "a ping that is too long": frame(9, b"x" * 126), "half a code": frame(8, b"\3"), "text": frame(1, b"x"),
    "an opcode that is none": frame(3, b"x"), "a reserved bit": bytes((0xC2, 0x80)) + MASK,
    "more than there is": frame(2, b"", size=1 << 63),
}


def upgraded(address: Any) -> socket.socket:
    """A WebSocket of a stranger, which has got its id."""
    sock = call_from(STRANGER, address)
    upgrade(sock)
    read_exactly(sock, 4)
    return sock


def test_websocket_frames_out_of_order(tunnel, echo_server):
    made = tunnel(echo_server.address, server="type=2", client="min=4", times=HASTY)
    address = made.server.end.listener.getsockname()
    with Calm(made):
        for wrong in WRONG_FRAMES.values():
            with upgraded(address) as sock, contextlib.suppress(ConnectionError):
                sock.sendall(wrong)
                while sock.recv(4096):
                    pass
    forgotten(made.server)


def test_websocket_pings_and_fragments_of_a_stranger(tunnel, echo_server):
    """Ten thousand pings whose answers are not read; and a message of ten thousand fragments."""
    made = tunnel(echo_server.address, server="type=2", client="min=4", times=HASTY)
    address = made.server.end.listener.getsockname()
    with Calm(made), upgraded(address) as one, upgraded(address) as other:
        with contextlib.suppress(ConnectionError, TimeoutError):
            for _ in range(100):
                one.sendall(frame(9, b"x" * 100) * 100)
        with contextlib.suppress(ConnectionError):
            other.sendall(frame(2, b"", final=False) + frame(0, b"", final=False) * 10_000)
    forgotten(made.server)


# -- HTTP/2 ------------------------------------------------------------------------------------

HELLO = PREFACE + make_frame(SETTINGS)
HEAD = encode_head([(b":authority", b"none"), (b":method", b"POST"), (b":path", b"/stream"), (b":scheme", b"https")])


def settings(number: int) -> bytes:
    return make_frame(SETTINGS, struct.pack(">HI", 4, number)) * 50


def pings(number: int) -> bytes:
    return make_frame(PING, bytes(8)) * 100


def resets(number: int) -> bytes:
    return b"".join(make_frame(HEADERS, HEAD, 4, stream) + make_frame(RST_STREAM, bytes(4), 0, stream)
                    for stream in range(1 + 200 * number, 201 + 200 * number, 2))


def continuations(number: int) -> bytes:
    return (make_frame(HEADERS, HEAD, 0, 1) if not number else b"") + make_frame(CONTINUATION, b"\0" * 100, 0, 1) * 50


def requests(number: int) -> bytes:
    return b"".join(make_frame(HEADERS, HEAD, 4, stream) + make_frame(0, b"\0", 0, stream)
                    for stream in range(1 + 200 * number, 201 + 200 * number, 2))


@pytest.mark.parametrize("flood", [settings, pings, resets, continuations, requests])
def test_http_2_floods(flood, tunnel, echo_server):
    """Of a stranger, and of a neighbour of the client."""
    made = tunnel(echo_server.address, server="type=3&tls=1", client="min=4", times=HASTY)
    address = made.server.end.listener.getsockname()
    with Calm(made), Client(address, source=STRANGER) as stranger, Client(address) as neighbour:
        socks = [client.open(True, ("h2",)) for client in (stranger, neighbour)]
        for sock in socks:
            sock.sendall(HELLO)
            sock.settimeout(0.2)
            with contextlib.suppress(ConnectionError, TimeoutError):
                for number in range(60):
                    sock.sendall(flood(number))
            with contextlib.suppress(ConnectionError, TimeoutError):
                while sock.recv(65536):
                    pass
        within_limits(made.server)
    forgotten(made.server, sessions=1)


@pytest.mark.parametrize("said", [b"", PREFACE[:5], HELLO, HELLO + make_frame(HEADERS, HEAD, 4, 1)],
                         ids=["nothing", "half a preface", "settings", "a stream without a byte"])
def test_http_2_sessions_of_strangers_do_not_push_the_client_out(said, tunnel, echo_server):
    made = tunnel(echo_server.address, server="type=3&tls=1", client="min=4", times=HASTY)
    address = made.server.end.listener.getsockname()
    with contextlib.ExitStack() as stack:
        for _ in range(sniroute_lanes.SESSIONS_MAX + 20):
            stack.enter_context(Client(address, source=STRANGER)).open(True, ("h2",)).sendall(said)
        wait_until(lambda: len(made.server.end.reception.sessions) == sniroute_lanes.SESSIONS_MAX)
        assert trip(made.address) == b"hello"
        made.client.call(lambda: made.client.end.link.end("a test"))
        made.linked_again()
        assert trip(made.address) == b"hello"
        assert len(made.server.end.reception.sessions) == sniroute_lanes.SESSIONS_MAX
    forgotten(made.server, sessions=1)


# -- UDP ---------------------------------------------------------------------------------------


def test_udp_floods_from_many_sources(tunnel, echo_server, monkeypatch):
    """New callers by the thousand: a caller with a flow, and callers by TCP, do not notice."""
    monkeypatch.setattr(sniroute_datagrams, "FLOWS_MAX", 200)
    with crowd(*(socket.socket(type=socket.SOCK_DGRAM) for _ in range(2))) as (target, good):
        target.bind((HOST, echo_server.address[1]))
        target.settimeout(0.5)
        good.settimeout(5)
        made = tunnel(echo_server.address, client="min=8", times=QUICK._replace(udp_read=2.0))
        address, end = made.udp, made.server.end
        stopping = threading.Event()

        def answer_all() -> None:
            while not stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    data, source = target.recvfrom(65536)
                    target.sendto(data, source)

        thread = threading.Thread(target=answer_all, name="target")
        thread.start()
        try:
            with Calm(made), crowd() as socks:
                for number in range(1000):
                    socks.append(socket.socket(type=socket.SOCK_DGRAM))
                    socks[-1].bind((f"127.0.{1 + number % 100}.1", 0))
                    socks[-1].sendto(b"flood", address)
                    if number % 50 == 0:
                        good.sendto(b"good", address)
                        assert good.recv(100) == b"good"
                        assert len(end.datagrams.flows) <= 200
                assert sum("UDP: datagrams were dropped" in line for line in made.server.messages) >= 1
        finally:
            stopping.set()
            thread.join()
        wait_until(lambda: not end.datagrams.flows and not made.client.end.datagrams.flows and end.slots.udp == 0)


# -- a hostile server --------------------------------------------------------------------------


def led_astray(lone, server: Served, query: str = "min=8", **times: Any) -> Local:
    """Our client of such a server."""
    return lone(times=QUICK._replace(**times)).begin(f"client://key@{HOST}:1/{HOST}:2?mode=2&{query}",
                                                     port=server.address[1], targets=((HOST, 0),))


class Wicked(Served):
    """A server that answers the first handshake with these terms, and does something to each connection of the pool."""

    def __init__(self, then: Callable[[Wicked, socket.socket, int], object], terms: Terms = Terms("-", 1024, 0, 0)):
        self.then, self.terms = then, terms
        self.over = threading.Event()
        super().__init__(lambda sock, number: None)

    def serve(self, sock: socket.socket, number: int) -> None:
        with sock, contextlib.suppress(OSError):
            if number == 1:
                with contextlib.ExitStack() as self.here.stack:
                    self.shake(sock).sendall(answer(self.terms, DATE))
            else:
                self.then(self, sock, number)
        self.live.discard(sock)

    def close(self) -> None:
        self.over.set()
        super().close()


def give(sock: socket.socket, number: int) -> None:
    """An id: the first connection of the pool is the control channel."""
    sock.sendall(bytes(4) if number == 2 else struct.pack(">I", number))


def test_a_server_that_wants_a_million_connections_gets_what_the_client_has(lone, served):
    """`max` is the server's word; what is idle is `min`, and grows with what is used, up to a limit of the client's."""
    def then(server: Wicked, sock: socket.socket, number: int) -> None:
        give(sock, number)
        server.over.wait(10)

    server = served(Wicked, then=then, terms=Terms("-", 1 << 20, 0, 0))
    client = led_astray(lone, server)
    wait_until(lambda: client.end.idle >= 8)
    assert client.end.sizer.most <= CAPACITY_MAX
    time.sleep(0.3)
    assert server.count <= 12


def test_a_server_that_gives_an_id_twice(lone, served):
    """The second one is closed, and said; the first is of use."""
    def then(server: Wicked, sock: socket.socket, number: int) -> None:
        sock.sendall(bytes(4) if number == 2 else b"same")
        server.over.wait(10)

    server = served(Wicked, then=then)
    client = led_astray(lone, server)
    client.has_said("the same id (73616d65)")
    time.sleep(0.5)
    assert server.count < 80, "it dials more and more slowly"
    assert len(client.messages) < 10 and client.end.idle == 1


@pytest.mark.parametrize("when", ["at once", "with an id", "by a flush"])
def test_a_server_that_ends_connections_is_dialled_more_and_more_slowly(when, lone, served):
    """A broken one, or a box between, would have the client dial all the time."""
    def then(server: Wicked, sock: socket.socket, number: int) -> None:
        if number == 2 or when != "at once":
            give(sock, number)
        if number == 2 and when == "by a flush":
            while not server.over.wait(0.01):
                sock.sendall(encode(Signal("flush"), b"key"))
        if number == 2 or when == "by a flush":
            server.over.wait(10)

    server = served(Wicked, then=then)
    client = led_astray(lone, server)
    wait_until(lambda: client.end.link is not None)
    time.sleep(0.6)
    assert server.count < 90, server.count
    assert len(client.messages) < 10


def test_a_server_that_never_gives_an_id(lone, served):
    server = served(Wicked, then=lambda server, sock, number: server.over.wait(10))
    client = led_astray(lone, server, handshake=1.0)
    client.has_said("no control channel in time")
    wait_until(lambda: not client.end.dials)
    assert server.count < 8 + 10


def test_a_server_that_sends_without_end_instead_of_an_id(lone, served):
    """A stranger's words on an idle connection; where callers come in at the server they are kept, up to a limit."""
    def then(server: Wicked, sock: socket.socket, number: int) -> None:
        give(sock, number)
        if number > 2:
            while True:
                sock.sendall(bytes(1 << 16))
        server.over.wait(10)

    for flow in "-+":
        server = served(Wicked, then=then, terms=Terms(flow, 1024, 0, 0))
        client = led_astray(lone, server, "min=4")
        wait_until(lambda: client.end.link is not None)
        time.sleep(0.3)
        assert client.call(lambda: client.end.pool.held) <= EARLY_MAX
        assert server.count < 80 and len(client.messages) < 12


HUGE = {
    "a huge body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n" + b"x" * 100_000,
    "a huge head": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000,
    "a head without end": b"HTTP/1.1 200 OK\r\nA: " + b"x" * 200_000,
    "1xx without end": b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20_000,
    "brackets": answer(Terms("-", 1, 0, 0), DATE).partition(b"Content-Length")[0]
    + b"Content-Length: 16000\r\n\r\n" + b"[" * 16000,
    "no HTTP": bytes(range(256)) * 100, "another max": b"HTTP/1.1 200 OK\r\nContent-Length: 48\r\n\r\n"
    + b'{"flow":"-","max":99999999,"tls":"0","type":"0"}',
}


@pytest.mark.parametrize("what", HUGE)
def test_an_answer_that_is_none_fails_the_handshake(what, lone, served):
    def script(sock: socket.socket, number: int) -> None:
        server.shake(sock).sendall(HUGE[what])

    server = served(script)
    client = led_astray(lone, server)
    client.has_said("the handshake has failed")
    assert client.end.link is None


# -- memory ------------------------------------------------------------------------------------


def half_hellos(address: Any) -> None:
    with crowd() as socks:
        for number in range(100):
            socks.append(call_from((STRANGER, HOST)[number % 2], address))
            with contextlib.suppress(ConnectionError):
                half_hello(socks[-1], number)


def no_hellos(address: Any) -> None:
    for _ in range(30):
        with call_from(STRANGER, address, b"\x16\x03\x01\x00\x20" + bytes(32)) as sock, contextlib.suppress(ConnectionError):
            sock.recv(100)


def sessions(address: Any) -> None:
    for number in range(10):
        with Client(address, source=STRANGER) as client, contextlib.suppress(ConnectionError):
            sock = client.open(True, ("h2",))
            sock.sendall(HELLO)
            for number in range(20):
                sock.sendall(pings(number))


@pytest.mark.parametrize("query", ["tls=1", "type=2&tls=1", "type=3&tls=1"])
@pytest.mark.parametrize("act", [half_hellos, no_hellos, sessions])
def test_what_was_tls_does_not_wait_for_the_collector_of_garbage(act, query, tunnel, echo_server):
    """It counts objects, and no bytes: a thousand of these are few to it, and 30 MB."""
    def dead() -> int:
        return sum(isinstance(each, TlsWire) and not each.is_open for each in gc.get_objects())

    made = tunnel(echo_server.address, server=query, client="min=4", times=HASTY)
    gc.collect()
    gc.disable()
    try:
        act(made.server.end.listener.getsockname())
        forgotten(made.server, sessions=1)
        wait_until(lambda: dead() <= 4, 5, f"the end of what was TLS: {dead()}")
    finally:
        gc.enable()


# -- all of it, to a program as users run it ---------------------------------------------------


def test_a_helper_for_tls_keeps_no_handshake_that_is_given_up(processes, single_loop_echo):
    """Where only the handshake has TLS a child does it, and has no deadlines: strangers who stay must not fill it."""
    port = free_port()
    server = processes(f"server://key@{HOST}:{port}/{HOST}:{free_port()}?mode=1", env=os.environ | {"NP_HANDSHAKE_TIMEOUT": "1s"})
    server.has_said("listening for a client")
    with crowd() as socks:
        for number in range(600):
            socks.append(call_from(f"127.0.0.{2 + number % 100}", (HOST, port)))
            with contextlib.suppress(ConnectionError):
                half_hello(socks[-1], number)
        helper, = wait_until(lambda: children(server.process.pid))
        wait_until(lambda: len(descriptors(server.process.pid)) < 40, what="a server without a stranger")
        wait_until(lambda: len(descriptors(helper)) < 20, 3, "a helper without a stranger")


def test_what_an_attacker_sees_of_memory_descriptors_and_the_log(processes, single_loop_echo, tmp_path):
    """1,500 strangers, at a server that runs as a process; and as many again: what it has got by then is enough."""
    port, callers = free_port(), free_port()
    server = processes(f"server://key@{HOST}:{port}/{HOST}:{callers}?mode=1", env=os.environ | {"NP_HANDSHAKE_TIMEOUT": "1s"})
    server.has_said("listening for a client")
    client = processes(f"client://key@{HOST}:{port}/{HOST}:{single_loop_echo[1]}?mode=2&min=8")
    client.has_said("linked with")
    wait_until(lambda: trip((HOST, callers)) == b"hello")

    def stands() -> tuple[int, float]:
        return len(os.listdir(f"/proc/{server.process.pid}/fd")), resident(server.process.pid)

    def barrage() -> tuple[int, float]:
        before = stands()
        with crowd() as socks:
            for number in range(1500):
                sock = call_from((STRANGER, HOST)[number % 2], (HOST, port))
                socks.append(sock)
                with contextlib.suppress(ConnectionError):
                    (half_hello if number % 3 else half_request)(sock, number)
            assert trip((HOST, callers)) == b"hello"
            assert stands()[0] < sum(LIMITS.values())
        wait_until(lambda: stands()[0] <= before[0] + 2, what="its descriptors")
        return stands()

    barrage()
    first, second = barrage(), barrage()
    assert first[1] < 100 and second[1] < first[1] + 10, f"MiB: {first} -> {second}"
    assert len(server.said) < 5000, server.said
    server.process.terminate()
    assert server.process.wait(10) == 0
