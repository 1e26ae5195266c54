"""Tests of sniroute_callers.py: what one caller's connection goes through, over sockets and over wires."""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import Any

import pytest

import sniroute_callers
from conftest import HOST, connect, deaf_listener, wait_until
from sniroute_callers import DIALLING, PEEKING, WAITING, parse_remote
from sniroute_loop import unsent
from test_ends import is_refused, read_all, send_all, trip
from testbed.nodepass import QUICK
from testbed.ports import free_port

# A pool whose connections are sockets, which are spliced; one whose are wires; and sockets that a rate makes wires.
KINDS = pytest.mark.parametrize("query", ["", "tls=1", "rate=100000"])


def resets(sock: socket.socket) -> None:
    """Break a connection off."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def is_reset(sock: socket.socket) -> bool:
    """Whether the other side has broken off; a byte is a failure, an end is none."""
    try:
        assert sock.recv(1) == b"", "a byte"
    except ConnectionError:
        return True
    return False


def relays_of(made: Any) -> list[Any]:
    """All that carry, at both ends."""
    return [relay for each in (made.server, made.client) for relay in each.end.relays.open.copy()]


@KINDS
def test_a_sink_that_takes_nothing_holds_its_source(query, tunnel, serve):
    """What is kept meanwhile has a bound; and all of it arrives when the sink reads on."""
    go_on = threading.Event()
    data = bytes(160 << 20)  # more than the kernel's buffers of four sockets: tcp_rmem has 32 MiB for each that is read

    def slow(sock: socket.socket) -> None:
        assert go_on.wait(90)
        count = 0
        while more := sock.recv(1 << 20):
            count += len(more)
        sock.sendall(b"%d" % count)

    made = tunnel(serve(slow).address, server=query)
    with made.call(timeout=120.0) as caller:  # which is for all of it: 160 MiB inside TLS take a busy host a while
        thread = send_all(caller, data)
        wait_until(lambda: relays_of(made), what="relays")
        seen = [-1]

        def stands_still() -> bool:
            before, seen[0] = seen[0], sum(sum(relay.moved()) for relay in relays_of(made))
            time.sleep(0.05)
            return before == seen[0] > 0

        wait_until(stands_still, timeout=60)
        is_held = thread.is_alive()
        go_on.set()
        assert is_held, "it has taken all of it"
        assert read_all(caller) == b"%d" % len(data)
        thread.join()


@KINDS
@pytest.mark.parametrize("who", ["caller", "target"])
def test_a_reset_is_passed_on_behind_what_came_before(query, who, tunnel, serve):
    sides: list[socket.socket] = []
    served = threading.Event()
    over = threading.Event()

    def server(sock: socket.socket) -> None:
        sides.append(sock)
        served.set()
        assert over.wait(20)

    made = tunnel(serve(server).address, server=query)
    with made.call(b"hello") as caller:
        assert served.wait(20)
        one, other = (caller, sides[0]) if who == "caller" else (sides[0], caller)
        if who == "caller":
            assert other.recv(5) == b"hello"
        one.sendall(b"last words")
        assert other.recv(20) == b"last words"
        resets(one)
        assert is_reset(other)
        over.set()
    wait_until(lambda: not relays_of(made))


@KINDS
def test_the_bytes_before_a_reset_arrive_though_their_reader_is_slow(query, tunnel, serve):
    """A reset at once would throw away what the kernel has not delivered."""
    def server(sock: socket.socket) -> None:
        sock.recv(5)
        sock.sendall(b"x" * 3_000_000)
        wait_until(lambda: (unsent(sock) or 0) <= 1_000_000)  # what is in this socket still is lost with it
        time.sleep(0.2)
        resets(sock)

    made = tunnel(serve(server).address, server=query)
    with made.call(b"hello") as caller:
        time.sleep(0.3)
        got = 0
        with pytest.raises(ConnectionResetError):
            while data := caller.recv(65536):
                got += len(data)
            raise AssertionError("an end")
        assert got >= 2_000_000 or query != ""


@pytest.mark.parametrize("query", ["tls=1", "rate=100000"])
def test_a_side_that_never_takes_the_rest_does_not_keep_it_for_ever(query, tunnel, serve, monkeypatch):
    """Where the break was heard: two sockets, spliced, keep nothing, so a source that is not read is not heard."""
    monkeypatch.setattr(sniroute_callers, "SETTLE_LAST", 0.1)
    monkeypatch.setattr(sniroute_callers, "HELD", 1 << 30)  # else the target is not read when it breaks off

    broken = threading.Event()

    def server(sock: socket.socket) -> None:
        sock.recv(5)
        sock.sendall(bytes(24 << 20))  # more than all sockets on the way take
        resets(sock)
        broken.set()

    made = tunnel(serve(server).address, server=query)
    with made.call(b"hello"):
        assert broken.wait(20)
        wait_until(lambda: not relays_of(made) and made.server.end.slots.tcp == 0, timeout=20)


def test_the_end_of_an_end_cuts_what_it_carries(tunnel, echo_server):
    made = tunnel(echo_server.address)
    with made.call(b"hello") as caller:
        assert caller.recv(5) == b"hello"
        made.server.call(made.server.end.relays.close)
        assert is_reset(caller)


@pytest.mark.parametrize("state", [PEEKING, WAITING])
def test_callers_who_have_nothing_yet_end_with_the_program(state, lone):
    made = lone().begin(f"server://key@{HOST}:1/{HOST}:2?mode=1{'&block=1' if state == PEEKING else ''}", port=0,
                        targets=((HOST, 0),))
    made.end.peeking.seconds = 60.0
    with connect(made.callers) as caller:
        wait_until(lambda: {each.state for each in made.program.connections.copy()} == {state})
        made.program.loop.call(made.program.loop.stop)
        assert is_reset(caller)
    made.thread.join()


def test_a_caller_who_leaves_while_he_is_looked_at_is_forgotten(lone):
    made = lone().begin(f"server://key@{HOST}:1/{HOST}:2?mode=1&block=1", port=0, targets=((HOST, 0),))
    made.end.peeking.seconds = 60.0
    with connect(made.callers) as caller:
        wait_until(lambda: {each.state for each in made.program.connections.copy()} == {PEEKING})
        resets(caller)
    wait_until(lambda: not made.program.connections)
    assert made.end.slots.tcp == 0 and not made.end.peeking.due


@pytest.mark.parametrize("said", [b"\5", b"\5\1"], ids=["one byte", "two"])
def test_a_greeting_in_pieces_is_judged_in_its_time(said, tunnel, echo_server):
    """Too little to tell, and then nothing: it passes as it is; or it is known by then."""
    made = tunnel(echo_server.address, server="block=23")
    with made.call(said) as caller:
        assert caller.recv(5) == said


def test_a_dialling_end_that_is_full_says_so(tunnel, echo_server):
    made = tunnel(echo_server.address, client="slot=1")
    with made.call(b"a") as caller:
        assert caller.recv(1) == b"a"
        assert is_refused(made.address)
        assert "no room for" in made.client.has_said("slot=")
    wait_until(lambda: made.client.end.slots.tcp == 0)
    assert trip(made.address) == b"hello"


def test_a_caller_who_leaves_while_the_target_is_dialled(tunnel):
    with deaf_listener() as silent:
        made = tunnel(silent)
        with made.call(b"hello"):
            wait_until(lambda: {each.state for each in made.client.end.callees.copy()} == {DIALLING})
            made.client.call(lambda: [each.abort() for each in list(made.client.end.callees)])
        wait_until(lambda: made.server.end.slots.tcp == made.client.end.slots.tcp == 0)


def test_a_target_that_takes_no_connection_in_time(tunnel):
    with deaf_listener() as silent:
        made = tunnel(silent, times=QUICK._replace(tcp_dial=0.2))
        assert is_refused(made.address)
        made.client.has_said("no target for 127.0.0.1:")


def test_what_a_caller_says_before_its_target_is_there_is_not_lost(tunnel, serve):
    """In pieces, and its end too."""
    heard = serve(read_all)
    host, port = heard.address
    made = tunnel((HOST, port), times=QUICK)
    with made.call(b"one ") as caller:
        time.sleep(0.01)
        caller.sendall(b"two")
        caller.shutdown(socket.SHUT_WR)
        assert heard.result() == b"one two"


@pytest.mark.parametrize("text, found", [
    ("192.0.2.1:5", ("192.0.2.1", 5)), ("[2001:db8::1]:5", ("2001:db8::1", 5)), ("[fe80::1%eth0]:5", ("fe80::1", 5)),
    ("example.com:5", None), ("192.0.2.1", None), ("192.0.2.1:70000", None), ("192.0.2.1:-1", None), ("", None)])
def test_an_address_that_the_other_end_says_is_one_or_none(text, found):
    assert parse_remote(text) == found


def test_a_proxy_header_for_a_caller_without_an_address(tunnel, serve):
    """The other end may say anything."""
    heard = serve(lambda sock: sock.recv(200))
    made = tunnel(heard.address, client="proxy=1")
    made.server.call(lambda: setattr(made.server.program, "serve", type(
        "Nameless", (made.server.program.serve,), {"start": lambda self: (setattr(self, "address", "nobody"),
                                                                         super(type(self), self).start())})))
    with made.call(b"hello"):
        assert heard.result().startswith(b"PROXY TCP4 127.0.0.1 127.0.0.1 ")


def test_an_idle_relay_that_moves_is_not_cut(tunnel, echo_server):
    """The looks come when the test says so: by a clock, a host that is busy for 0.3 s moves nothing between two."""
    made = tunnel(echo_server.address, server="read=1h", client="read=1h")

    def look(end: Any) -> bool:
        relay, = end.relays.open
        waited = end.relays.idling.due.pop(relay)
        relay.look_idle()
        return end.relays.idling.due.get(relay, 0.0) > waited

    with made.call() as caller:
        for _ in range(6):
            caller.sendall(b"x")
            assert caller.recv(1) == b"x"
            assert [each.call(lambda: look(each.end)) for each in (made.server, made.client)] == [True] * 2, "and again"
        made.server.call(lambda: look(made.server.end))
        assert is_reset(caller), "since the last look nothing has moved"


def test_a_port_that_nobody_listens_on(tunnel):
    made = tunnel((HOST, free_port()))
    assert [is_refused(made.address) for _ in range(3)] == [True] * 3
    assert sum("no target for" in line for line in made.client.messages) == 1, "once in a while"
