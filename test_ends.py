"""Tests of how a connection ends: one table, and a test that reads it.

A stream that was cut must not look whole where the transport can say so: protocols without a length of their own have
only TCP's word.  ENDS has a row for each way in which a connection can end.  Further tests, below, are for what does
not fit in a row: sinks that are full, readers that are slow, and alerts for what is no end.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import pathlib
import random
import re
import signal
import socket
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple

import pytest

import sniroute_resets
import sniroute_deadlines
import sniroute_flow
import sniroute_registrar
import sniroute_router
from sniroute_launchers import carrier_launcher
from sniroute_log import ENDINGS
from sniroute_loop import READ, unsent
from sniroute_owners import new_token
from sniroute_refusals import REFUSALS
from conftest import HERE, HOST, wait_until
from testbed.hellos import ASK_TLS, HELLO, NAME
from testbed.running import Running, alert, read_exactly, reset, route
from testbed.standins import HASTY, write_carrier

ALERT = "alert"


class Talk:
    """A client, the router, and the far end; the test plays both ends.  `far` is where the far end listens."""

    def __init__(self, running: Running, far: socket.socket, stand_in: Any):
        self.running = running
        self.far = far
        self.stand_in = stand_in  # for cloudflared, or the edge
        self.client: socket.socket | None = None
        self.backend: socket.socket | None = None
        self.for_client = self.for_backend = b""  # what the other side has said, and is not read yet

    def connect(self, said: bytes = HELLO) -> None:
        self.client = self.running.connect(said)

    def accept(self, expected: bytes = HELLO) -> None:
        """The far end takes the connection, and reads what it is told first."""
        self.backend, _ = self.far.accept()
        self.backend.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a second write does not wait for an ACK
        self.backend.settimeout(20)
        assert read_exactly(self.backend, len(expected)) == expected

    def reaches(self, state: str) -> Any:
        """Wait until the router's connection is in a state."""
        def found() -> list[Any]:
            return [each for each in list(self.running.router.connections) if each.state == state]
        return wait_until(found, what=state)[0]

    def say(self, which: str) -> None:
        """Last words of the client or of the backend."""
        if which == "client":
            self.client.sendall(b"last words of the client")
            self.for_backend += b"last words of the client"
        else:
            self.backend.sendall(b"last words of the backend")
            self.for_client += b"last words of the backend"

    def unread(self, which: str) -> None:
        """Let a byte wait at this side, unread: a close is a reset then."""
        sock, other = (self.client, self.backend) if which == "client" else (self.backend, self.client)
        other.sendall(b"!")
        assert sock.recv(1, socket.MSG_PEEK) == b"!"

    def pid(self) -> int:
        """The process of the tunnel."""
        return self.running.tunnels.snapshot()[0].pid

    def close(self) -> None:
        for sock in (self.client, self.backend):
            if sock is not None:
                sock.close()


def seen(sock: socket.socket) -> tuple[bytes, str]:
    """Read to the end: the bytes, and `end`, `reset`, or ALERT, where a TLS alert is all there is."""
    data = b""
    try:
        while more := sock.recv(1 << 18):
            data += more
    except ConnectionResetError:
        return data, "reset"
    return (b"", ALERT) if data in (alert(80), alert(50)) else (data, "end")


# -- moments: how far the connection has come -----------------------------------------------------


def is_open(talk: Talk) -> None:
    talk.connect()
    talk.accept()
    talk.backend.sendall(b"x")
    assert talk.client.recv(1) == b"x"
    talk.reaches("open")


def in_its_prelude(talk: Talk) -> None:
    talk.connect(HELLO[:50])
    wait_until(lambda: [each for each in list(talk.running.router.connections) if each.prelude is not None])


def parked(talk: Talk) -> None:
    talk.stand_in.fault("*", never_listen=True)
    talk.connect()
    talk.reaches("parked")


def greeting(talk: Talk) -> None:
    talk.connect(ASK_TLS)
    assert talk.client.recv(1) == b"S"
    talk.client.sendall(HELLO)
    talk.accept(ASK_TLS)
    talk.reaches("greeting")


def unanswered(talk: Talk) -> None:
    talk.connect()
    talk.accept()
    talk.reaches("unanswered")


def early(talk: Talk) -> None:
    unanswered(talk)
    talk.client.sendall(b"0-RTT")
    assert read_exactly(talk.backend, 5) == b"0-RTT"
    talk.reaches("early")


MOMENTS = {"prelude": in_its_prelude, "parked": parked, "greeting": greeting, "unanswered": unanswered, "early": early,
           "open": is_open}


# -- what happens ----------------------------------------------------------------------------------


def client_closes(talk: Talk) -> None:
    talk.say("client")
    talk.client.close()


def client_leaves(talk: Talk) -> None:
    """Without another word."""
    talk.client.close()


def client_resets(talk: Talk) -> None:
    talk.say("client")
    wait_until(lambda: not unsent(talk.client))
    reset(talk.client)


def client_is_gone(talk: Talk) -> None:
    """It resets without another word."""
    reset(talk.client)


def client_closes_unread(talk: Talk) -> None:
    talk.say("client")
    talk.unread("client")
    talk.client.close()


def client_ends_and_is_answered(talk: Talk) -> None:
    talk.say("client")
    talk.client.shutdown(socket.SHUT_WR)
    assert seen(talk.backend) == (talk.for_backend, "end")
    talk.say("backend")
    talk.backend.close()


def client_ends_while_its_answer_comes(talk: Talk) -> None:
    """WebSocket has no half-close: the backend hears of the end when nothing has come down for a while."""
    talk.client.shutdown(socket.SHUT_WR)
    talk.say("backend")
    talk.backend.close()


def client_ends_and_the_answer_is_cut(talk: Talk) -> None:
    talk.client.shutdown(socket.SHUT_WR)
    assert seen(talk.backend) == (b"", "end")
    talk.say("backend")
    wait_until(lambda: not unsent(talk.backend))
    reset(talk.backend)


def client_closes_and_is_answered(talk: Talk) -> None:
    """The answer meets nobody."""
    talk.say("client")
    talk.client.close()
    assert seen(talk.backend) == (talk.for_backend, "end")
    for _ in range(2):  # the first is answered with a reset
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            talk.backend.sendall(b"bye")
        wait_until(lambda: not unsent(talk.backend) or talk.running.endings)
    talk.backend.close()


def client_closes_as_psql_does(talk: Talk) -> None:
    """It says goodbye and is gone; the server reads half of that, and closes a moment later."""
    talk.client.sendall(b"goodbye, and more of it")
    assert read_exactly(talk.backend, 5) == b"goodb"
    talk.client.close()
    wait_until(lambda: [each for each in list(talk.running.router.connections) if each.up.state == "done"])
    talk.backend.close()


def server_is_faster_than_the_end_of_its_client(talk: Talk) -> None:
    """The router hears of its reset first, and the end of the client has come."""
    held, go = threading.Event(), threading.Event()
    talk.running.router.call(lambda: (held.set(), go.wait(10)))
    assert held.wait(10)
    talk.client.sendall(b"goodbye")
    talk.client.close()
    connection, = talk.running.router.connections
    reset(talk.backend)
    talk.running.router.call(lambda: connection.state == "open" and connection.down.mover()(READ))
    go.set()


def backend_closes(talk: Talk) -> None:
    talk.say("backend")
    talk.backend.close()


def backend_leaves(talk: Talk) -> None:
    """Without another word."""
    talk.backend.close()


def backend_resets(talk: Talk) -> None:
    talk.say("backend")
    wait_until(lambda: not unsent(talk.backend))
    reset(talk.backend)


def backend_is_gone(talk: Talk) -> None:
    """It resets without another word."""
    reset(talk.backend)


def backend_closes_unread(talk: Talk) -> None:
    talk.say("backend")
    talk.unread("backend")
    talk.backend.close()


def backend_ends_and_the_client_goes_on(talk: Talk) -> None:
    talk.say("backend")
    talk.backend.shutdown(socket.SHUT_WR)
    assert seen(talk.client) == (talk.for_client, "end")
    client_closes(talk)


def backend_ends_and_the_client_resets(talk: Talk) -> None:
    talk.say("backend")
    talk.backend.shutdown(socket.SHUT_WR)
    assert seen(talk.client) == (talk.for_client, "end")
    client_resets(talk)


def backend_closes_and_the_client_goes_on(talk: Talk) -> None:
    """What it says meets nobody."""
    talk.say("backend")
    talk.backend.close()
    connection, = talk.running.router.connections
    wait_until(lambda: connection.down is None or connection.down.state == "done")
    while not talk.running.endings:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            talk.client.sendall(b"more")


def both_are_silent(talk: Talk) -> None:
    """For longer than --connection-idle allows."""
    talk.say("client")
    talk.say("backend")


def it_is_too_old(talk: Talk) -> None:
    """For max_lifetime."""
    talk.say("client")
    talk.say("backend")


def its_backend_goes_down(talk: Talk) -> None:
    """While on_down is cut."""
    talk.say("client")
    talk.say("backend")
    book = talk.running.router.targets.book

    def down() -> None:
        group, = book.groups.values()
        member, = group.members.values()
        group.bad_news(member, "as an operator sees it", False)

    talk.running.router.call(down)


def its_name_is_released(talk: Talk) -> None:
    """With cut=1."""
    talk.say("client")
    talk.say("backend")
    assert ask_registry(talk.running, "DELETE", f"/routes/{NAME}?cut=1") == 204


def router_stops(talk: Talk) -> None:
    """A second signal, or the end of --drain."""
    talk.running.router.shutdown()


def tunnel_is_killed(talk: Talk) -> None:
    """The kernel ends its connections as it ends those of a program that has said everything."""
    talk.say("backend")
    assert read_exactly(talk.client, len(talk.for_client)) == talk.for_client
    talk.for_client = b""
    os.kill(talk.pid(), signal.SIGKILL)


def tunnel_is_killed_unanswered(talk: Talk) -> None:
    os.kill(talk.pid(), signal.SIGKILL)


def tunnel_is_killed_and_the_next_one_answers(talk: Talk) -> None:
    os.kill(talk.pid(), signal.SIGKILL)
    talk.backend.close()
    talk.accept()
    talk.say("backend")
    talk.backend.close()


def operator_stops_the_tunnel(talk: Talk) -> None:
    talk.running.tunnels.stop(next(iter(talk.running.tunnels.tunnels)))


def edge_resets(talk: Talk) -> None:
    edge_does(talk, rst="open", rst_after=26)


def edge_ends_tls_in_the_middle(talk: Talk) -> None:
    edge_does(talk, eof="open", eof_after=26)


def edge_says_that_it_goes_away(talk: Talk) -> None:
    edge_does(talk, close=1001, close_after=26)


def edge_does(talk: Talk, **switches: Any) -> None:
    """The edge does that after the last words.  It looks at its switches when a client comes: here is another."""
    talk.close()
    talk.running.ending()
    talk.running.endings.clear()
    talk.stand_in.fault("*", **switches)
    is_open(talk)
    talk.say("backend")


# -- the table -------------------------------------------------------------------------------------


class End(NamedTuple):
    """One way to end, as a row."""

    via: str  # tcp; group, for a route with the options of several backends; cloudflared (the stand-in) and carrier: tunnels
    moment: str  # a key of MOMENTS
    act: Callable[[Talk], None]
    client: str  # what the client sees: end, reset, alert; "" where it has left, or has seen it already
    backend: str  # what the backend sees
    reason: str  # in the line; of several, one


ENDS = [
    # The one who breaks off is passed on; who was first is in the line.
    End("tcp", "open", client_closes, "", "end", "client_closed"),
    End("tcp", "open", client_closes_unread, "", "reset", "client_reset"),
    End("tcp", "open", client_resets, "", "reset", "client_reset"),
    End("tcp", "open", client_ends_and_is_answered, "end", "", "client_closed"),
    End("tcp", "open", client_ends_and_the_answer_is_cut, "reset", "", "client_closed"),
    End("tcp", "open", client_closes_and_is_answered, "", "", "client_closed"),
    End("tcp", "open", client_closes_as_psql_does, "", "", "client_closed"),
    End("tcp", "open", server_is_faster_than_the_end_of_its_client, "", "", "client_closed"),
    End("tcp", "open", backend_closes, "end", "", "backend_closed"),
    End("tcp", "open", backend_closes_unread, "reset", "", "backend_reset"),
    End("tcp", "open", backend_resets, "reset", "", "backend_reset"),
    End("tcp", "open", backend_ends_and_the_client_goes_on, "", "end", "backend_closed"),
    End("tcp", "open", backend_ends_and_the_client_resets, "", "reset", "backend_closed"),
    End("tcp", "open", backend_closes_and_the_client_goes_on, "end", "", "backend_closed"),  # it had said all
    # What the router cuts, it cuts for both.
    End("tcp", "open", both_are_silent, "reset", "reset", "idle"),
    End("tcp", "open", router_stops, "reset", "reset", "stopped"),
    End("group", "open", client_closes, "", "end", "client_closed"),
    End("group", "open", client_resets, "", "reset", "client_reset"),
    End("group", "open", client_ends_and_is_answered, "end", "", "client_closed"),
    End("group", "open", backend_closes, "end", "", "backend_closed"),
    End("group", "open", backend_resets, "reset", "", "backend_reset"),
    End("group", "open", both_are_silent, "reset", "reset", "idle"),
    End("group", "open", it_is_too_old, "reset", "reset", "lifetime"),
    End("group", "open", its_backend_goes_down, "reset", "reset", "backend_down"),
    End("group", "open", router_stops, "reset", "reset", "stopped"),
    End("claim", "open", client_closes, "", "end", "client_closed"),
    End("claim", "open", backend_resets, "reset", "", "backend_reset"),
    End("claim", "open", its_name_is_released, "reset", "reset", "released"),
    # Before the backend has answered.
    End("tcp", "prelude", client_leaves, "", "", "truncated"),
    End("tcp", "prelude", client_is_gone, "", "", "truncated"),
    End("tcp", "prelude", router_stops, "end", "", "stopped"),
    End("tcp", "greeting", client_leaves, "", "end", "client_left"),
    End("tcp", "greeting", client_is_gone, "", "end", "client_left"),
    End("tcp", "greeting", backend_leaves, ALERT, "", "backend"),
    End("tcp", "greeting", backend_is_gone, ALERT, "", "backend"),
    End("tcp", "greeting", router_stops, "reset", "end", "stopped"),
    End("cloudflared", "parked", client_leaves, "", "", "client_left"),
    End("cloudflared", "parked", client_is_gone, "", "", "client_left"),
    End("cloudflared", "parked", router_stops, "reset", "", "stopped"),
    End("cloudflared", "unanswered", client_leaves, "", "end", "client_left"),
    End("cloudflared", "unanswered", client_is_gone, "", "end", "client_left"),
    End("cloudflared", "unanswered", tunnel_is_killed_and_the_next_one_answers, "end", "", "backend_closed"),
    End("cloudflared", "unanswered", router_stops, "reset", "end", "stopped"),
    End("cloudflared", "early", client_leaves, "", "end", "client_closed"),
    End("cloudflared", "early", client_is_gone, "", "end", "client_reset"),
    End("cloudflared", "early", backend_leaves, ALERT, "", "tunnel_failed"),
    End("cloudflared", "early", tunnel_is_killed_unanswered, ALERT, "end", "tunnel_failed"),
    End("cloudflared", "early", router_stops, "reset", "end", "stopped"),
    # cloudflared makes an end of a reset, and ends both sides at the first end of either.
    End("cloudflared", "open", client_closes, "", "end", "client_closed"),
    End("cloudflared", "open", client_resets, "", "end", "client_reset"),
    End("cloudflared", "open", backend_closes, "end", "", "backend_closed"),
    End("cloudflared", "open", backend_resets, "end", "", "backend_closed"),
    End("cloudflared", "open", both_are_silent, "reset", "end", "idle"),
    End("cloudflared", "open", router_stops, "reset", "end", "stopped"),
    End("cloudflared", "open", tunnel_is_killed, "reset", "end", "backend_reset"),
    End("cloudflared", "open", operator_stops_the_tunnel, "reset", "end", "backend_reset"),
    # The carrier passes on what the edge says.  What the connector beside the service makes of a reset is an end.
    End("carrier", "open", client_closes, "", "end", "client_closed"),
    End("carrier", "open", client_resets, "", "end", "client_reset"),
    End("carrier", "open", client_ends_while_its_answer_comes, "end", "", "client_closed"),
    End("carrier", "open", backend_closes, "end", "", "backend_closed"),
    End("carrier", "open", edge_resets, "reset", "", "backend_reset"),
    End("carrier", "open", edge_ends_tls_in_the_middle, "reset", "", "backend_reset"),
    End("carrier", "open", edge_says_that_it_goes_away, "reset", "", "backend_reset"),
    End("carrier", "open", both_are_silent, "reset", "end", "idle"),
    End("carrier", "open", router_stops, "reset", "end", "stopped"),
    End("carrier", "open", tunnel_is_killed, "reset", "end", "backend_reset"),
    End("carrier", "open", operator_stops_the_tunnel, "reset", "end", "backend_reset"),
]


TOKEN, DIGEST = new_token()
NAMES = f"""
[registry]
listen = "{HOST}:0"
domains = ["{NAME.partition('.')[2]}"]
targets = ["tcp"]
networks = ["127.0.0.0/8"]
[registry.owners.alice]
token = "{DIGEST}"
admin = true
"""


def ask_registry(running: Running, method: str, path: str, body: Any = None) -> int:
    """Ask the registry of a router; the status."""
    asking = http.client.HTTPConnection(*running.router.registrar.address, timeout=10)
    with contextlib.closing(asking):
        asking.request(method, path, None if body is None else json.dumps(body), {"Authorization": f"Bearer {TOKEN}"})
        return asking.getresponse().status


@pytest.fixture
def talk(request: pytest.FixtureRequest, run, ports, settings_file, nursery) -> Iterator[Callable[..., Talk]]:
    """talk(via, *options) -> Talk."""
    with contextlib.ExitStack() as stack:
        def make(via: str, *options: str, lifetime: str = "1h") -> Talk:
            far = stack.enter_context(socket.create_server((HOST, 0)))
            far.settimeout(20)
            stand_in = None
            if via == "tcp":
                running = run(route(far.getsockname()), *options)
            elif via == "group":
                target = "tcp:{}:{}".format(*far.getsockname())
                file = settings_file(f'[routes."{NAME}"]\ntarget = "{target}"\nhealth = "passive"\nhealth_fail = 1\n'
                                     f'on_down = "cut"\nmax_lifetime = "{lifetime}"\n')
                running = run("-c", file, *options)
            elif via == "claim":
                running = run("-c", settings_file(NAMES), *options)
                stack.callback(sniroute_registrar.attach(running.router, running.router.settings.claims).close)
                target = "tcp:{}:{}".format(*far.getsockname())
                assert ask_registry(running, "POST", "/routes", {"name": NAME, "target": target}) == 201
            else:
                stand_in = request.getfixturevalue("cloudflared" if via == "cloudflared" else "own_edge")
                stand_in.far("*", far.getsockname())
                running = run(f"--route=*={via}:{{name}}", ports, *options)
                if via == "carrier":
                    row, path = carrier_launcher(stand_in.environ), stand_in.directory / "carrier"
                    write_carrier(path, HASTY)
                    running.tunnels.launchers["carrier"] = row._replace(program=str(path), shared=("forwarders",))
            made = Talk(running, far, stand_in)
            stack.callback(made.close)
            return made

        yield make


def words(act: Callable[[Talk], None]) -> str:
    return act.__name__.replace("_", " ")


@pytest.mark.parametrize("end", ENDS, ids=[f"{end.via}, {end.moment}: {words(end.act)}" for end in ENDS])
def test_how_a_connection_ends(talk, end):
    options = ["--connection-idle=150ms"] if end.act is both_are_silent else []
    talking = talk(end.via, *options, lifetime="300ms" if end.act is it_is_too_old else "1h")
    MOMENTS[end.moment](talking)
    end.act(talking)
    if end.client:
        assert seen(talking.client) == (talking.for_client, end.client)
    if end.backend:
        assert seen(talking.backend) == (talking.for_backend, end.backend)
    talking.close()
    assert talking.running.ending().reason == end.reason
    assert len(talking.running.endings) == 1
    assert not talking.running.router.pipes.pending


def test_every_word_for_an_end_is_in_the_table():
    assert set(ENDINGS) <= {end.reason for end in ENDS}


# -- full sinks ------------------------------------------------------------------------------------


def fill(sock: socket.socket, payload: bytes, moves: Callable[[], int]) -> None:
    """Send until nobody takes any more."""
    sock.setblocking(False)
    at, before, still = 0, -1, 0
    while still < 2 or at == 0:
        still = still + 1 if moves() == before else 0
        before = moves()
        with contextlib.suppress(BlockingIOError):
            while True:
                at += sock.send(payload[at:at + (1 << 18)])
        time.sleep(0.02)  # there is no event for "nothing happens"
    assert at < len(payload)


PAYLOAD = random.Random(16).randbytes(24 << 20)


def test_client_that_reads_slowly_gets_all_that_its_server_said_before_it_broke_off(talk, flow):
    talking = talk("tcp")
    is_open(talking)
    connection, = talking.running.router.connections
    fill(talking.backend, PAYLOAD, lambda: connection.down.total)
    assert connection.down.state == "blocked"
    passed = connection.down.total - 1
    reset(talking.backend)
    data, how = seen(talking.client)
    assert how == "reset" and len(data) >= passed and PAYLOAD.startswith(data)
    assert talking.running.ending().reason == "backend_reset"


def test_server_that_reads_slowly_gets_all_that_its_client_said_before_it_broke_off(talk, flow, monkeypatch):
    """Nobody reads the client meanwhile: a look now and then finds out that it is gone."""
    monkeypatch.setattr(sniroute_router, "SWEEP_LAST", 0.1)
    talking = talk("tcp")
    is_open(talking)
    connection, = talking.running.router.connections
    fill(talking.client, PAYLOAD, lambda: connection.up.total)
    assert connection.up.state == "blocked"
    passed = connection.up.total - len(HELLO)
    reset(talking.client)
    talking.reaches("resetting")
    data, how = seen(talking.backend)
    assert how == "reset" and len(data) >= passed and PAYLOAD.startswith(data)
    assert talking.running.ending().reason == "client_reset"


@pytest.mark.parametrize("who", ["backend", "client"])
def test_upload_that_its_server_breaks_off_is_no_end_for_either(talk, flow, who):
    """One side sends at full speed; the other answers, and closes with bytes unread.  So for the two roles."""
    talking = talk("tcp")
    is_open(talking)
    breaks, sends = (talking.backend, talking.client) if who == "backend" else (talking.client, talking.backend)
    def upload() -> None:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for at in itertools.cycle(range(0, 8 << 20, 1 << 18)):
                sends.sendall(PAYLOAD[at:at + (1 << 18)])
    thread = threading.Thread(target=upload)
    thread.start()
    read_exactly(breaks, 1000)
    breaks.sendall(b"x" * 1000)
    wait_until(lambda: not unsent(breaks))
    breaks.close()
    thread.join(20)
    assert not thread.is_alive()
    assert talking.running.ending().reason == f"{who}_reset"
    data, _ = seen(sends)  # its own send was told of the reset
    assert data == b"x" * 1000


def test_reader_that_takes_nothing_is_reset_all_the_same_and_one_that_is_slow_gets_everything(talk, monkeypatch):
    monkeypatch.setattr(sniroute_router, "SWEEP_LAST", 0.1)
    monkeypatch.setattr(sniroute_resets, "RESET_STALL", 0.2)
    for reads in (False, True):
        talking = talk("tcp")
        is_open(talking)
        connection, = talking.running.router.connections
        fill(talking.backend, PAYLOAD, lambda: connection.down.total)
        passed = connection.down.total - 1
        reset(talking.backend)
        began = time.monotonic()
        data = b""
        while reads and len(data) < passed:
            data += read_exactly(talking.client, min(passed - len(data), passed // 8))
            time.sleep(0.05)  # as a slow reader does
        assert talking.running.ending().reason == "backend_reset"
        took = time.monotonic() - began
        assert took > 0.35 if reads else 0.2 <= took < 5
        assert PAYLOAD.startswith(data)
        talking.close()


def test_reset_that_is_stuck_is_looked_at_less_and_less_and_not_for_ever(talk, monkeypatch):
    """A crowd of them would take the loop's time; and a reader that takes a byte now and then would stay."""
    monkeypatch.setattr(sniroute_router, "SWEEP_LAST", 0.1)
    monkeypatch.setattr(sniroute_resets, "RESET_LOOK_LATER", 0.1)
    monkeypatch.setattr(sniroute_deadlines, "RESET_LOOK_LATER", 0.1)
    monkeypatch.setattr(sniroute_resets, "RESET_LOOKS", 2)
    monkeypatch.setattr(sniroute_resets, "RESET_LAST", 0.5)
    talking = talk("tcp")
    is_open(talking)
    connection, = talking.running.router.connections
    deadlines = talking.running.router.deadlines
    waits: list[float] = []
    put = type(deadlines.stuck).put
    monkeypatch.setattr(type(deadlines.stuck), "put", lambda queue, item: (waits.append(queue.seconds), put(queue, item)))
    fill(talking.backend, PAYLOAD, lambda: connection.down.total)
    waits.clear()
    reset(talking.backend)
    assert talking.running.ending().reason == "backend_reset"
    looks = [seconds for seconds in waits if seconds in (0.05, 0.1)]
    assert looks == [0.05] * 2 + [0.1] * 5
    talking.close()


def test_reset_under_way_does_not_hold_up_the_end_of_the_router(talk):
    talking = talk("tcp")
    is_open(talking)
    connection, = talking.running.router.connections
    fill(talking.backend, PAYLOAD, lambda: connection.down.total)
    reset(talking.backend)
    router = talking.running.router
    router.call(lambda: connection.broken(connection.up))
    talking.reaches("resetting")
    router.drain(0.2)
    talking.running.thread.join(10)
    assert not talking.running.thread.is_alive()
    assert talking.running.ending().reason == "backend_reset"
    assert seen(talking.client)[1] == "reset"


def test_where_the_kernel_does_not_tell_what_has_arrived_a_reset_waits_a_moment(talk, monkeypatch):
    """As on macOS."""
    monkeypatch.setattr(sniroute_resets, "unsent", lambda sock: None)
    monkeypatch.setattr(sniroute_flow, "unsent", lambda sock: None)
    talking = talk("tcp")
    is_open(talking)
    backend_resets(talking)
    assert seen(talking.client) == (talking.for_client, "reset")
    end = talking.running.ending()
    assert end.reason == "backend_reset" and end.seconds >= sniroute_deadlines.LINGER


@pytest.mark.parametrize("size", [2 << 20, len(PAYLOAD)], ids=["the kernel has the rest", "the router has the rest"])
def test_survivor_that_breaks_off_too_ends_the_wait(talk, monkeypatch, size):
    monkeypatch.setattr(sniroute_router, "SWEEP_LAST", 0.1)
    talking = talk("tcp")
    is_open(talking)
    connection, = talking.running.router.connections
    if size < len(PAYLOAD):
        talking.backend.sendall(PAYLOAD[:size])
        wait_until(lambda: connection.down.total == 1 + size)
    else:
        fill(talking.backend, PAYLOAD, lambda: connection.down.total)
    reset(talking.backend)
    talking.reaches("resetting")
    assert connection.down.state == ("done" if size < len(PAYLOAD) else "blocked")
    reset(talking.client)
    end = talking.running.ending()
    assert end.reason == "backend_reset" and end.seconds < sniroute_resets.RESET_STALL / 2


# -- alerts ----------------------------------------------------------------------------------------


def alert_expressions() -> Iterator[tuple[str, str]]:
    """(document, expr) of every alert that the documents offer."""
    for name in ("README.md", "OPERATING.md"):
        text = pathlib.Path(HERE / name).read_text()
        for expression in re.findall(r"^\s*(?:- )?expr: (.*)$", text, re.MULTILINE):
            yield name, expression
        for expression in re.findall(r"`([^`]*result=~[^`]*)`", text):
            yield name, expression


def matched(expression: str) -> Iterator[set[str]]:
    """The words that each matcher of `result` in an expression lets through, as Prometheus reads it: anchored."""
    for operator, pattern in re.findall(r'sniroute_connections_total\{[^}]*\bresult(=~|!~|!=|=)"([^"]*)"', expression):
        hits = {word for word in (*ENDINGS, *REFUSALS)
                if (re.fullmatch(pattern, word) if "~" in operator else pattern == word)}
        yield hits if operator in ("=", "=~") else {*ENDINGS, *REFUSALS} - hits


# What no operator wants to be woken for: how connections end, and what clients do wrong.
NO_FAILURE = {*ENDINGS, "cancel", "not_tls", "truncated", "malformed", "bad_request", "prelude_timeout", "no_name", "no_route",
              "bad_name", "hello_too_large", "plain_postgres", "proxy", "shed", "client_limit", "route_limit",
              "not_allowed", "forbidden", "tunnel_budget", "tunnel_stopping", "late_head", "late_body", "no_method",
              "cross_site", "loop"}
FAILURES = {"backend", "command_failed", "backend_no_tls", "bad_answer", "unresolved", "busy", "internal", "tunnel_failed",
            "tunnel_timeout", "tunnel_limit", "tunnel_denied", "tunnel_unknown", "queue_full", "queue_timeout", "backend_tls",
            "late_answer", "tunnel_absent", "tunnel_not_ready", "tunnel_config", "tunnel_login", "tunnel_forbidden",
            "tunnel_unreachable", "tunnel_certificate", "tunnel_plugin"}


def test_no_alert_is_fired_by_ordinary_ends_and_each_failure_fires_one():
    fired = [hits for _, expression in alert_expressions() for hits in matched(expression)]
    assert fired, "no alert looks at how connections end"
    assert {word for hits in fired for word in hits & NO_FAILURE} == set()
    assert FAILURES - set().union(*fired) == set()
    assert set(ENDINGS) | set(REFUSALS) == NO_FAILURE | set().union(*fired), "a word that nobody has decided about"


def test_every_alternative_of_an_alert_is_a_word_that_there_is():
    """A word that was renamed would leave an alert that never fires."""
    for _, expression in alert_expressions():
        for pattern in re.findall(r'sniroute_connections_total\{[^}]*\bresult=~"([^"]*)"', expression):
            for alternative in re.split(r"\|(?![^(]*\))", pattern):
                assert any(re.fullmatch(alternative, word) for word in (*ENDINGS, *REFUSALS)), alternative
