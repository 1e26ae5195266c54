from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute
from conftest import HERE, HOST, Cloudflared, wait_until
from sniroute_tunnels import TunnelTable, cloudflared_launcher

SSL_REQUEST = sniroute.SSL_REQUEST_BYTES
GSSENC_REQUEST = struct.pack(">II", 8, sniroute.GSSENC_REQUEST)


def genuine_hello(name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()

# CUT
# -- the router, running -----------------------------------------------------------------------


class Running:
    """A Router with its loop in a thread of this process."""

    def __init__(self, *argv: str, program: str):
        sniroute.log.setLevel("DEBUG")
        settings = sniroute.load_settings(["--listen", f"{HOST}:0", *argv], {})
        self.tunnels = TunnelTable({"cloudflared": cloudflared_launcher(program, {})}, settings.ports,
                                   idle=settings.idle, start_timeout=settings.start_timeout,
                                   max_tunnels=settings.max_tunnels, max_starting=settings.max_starting)
        self.router = sniroute.Router(settings, self.tunnels)
        self.endings: list[sniroute.Ending] = []
        self.router.journal = self.endings.append
        self.address = self.router.server_address
        self.thread = threading.Thread(target=self.router.serve_forever, name="loop")

    def __enter__(self) -> Running:
        self.tunnels.start()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.router.shutdown()
        self.thread.join()
        self.tunnels.close(now=True)
        self.router.server_close()
        sniroute.log.setLevel("NOTSET")

    def connect(self, said: bytes = b"") -> socket.socket:
        """A client, with a time-out so that a failing test ends."""
        client = socket.create_connection(self.address, 20)
        client.sendall(said)
        return client

    def ending(self, number: int = 1) -> sniroute.Ending:
        """The last of `number` endings, once they are there."""
        wait_until(lambda: len(self.endings) >= number, what=f"{number} endings")
        return self.endings[number - 1]

    def counter(self, name: str) -> int:
        return self.router.counters[name]


@pytest.fixture
def run(cloudflared: Cloudflared) -> Iterator[Callable[..., Running]]:
    """run(*options, program=...) -> Running.  It ends before the stand-in's own end is checked."""
    with contextlib.ExitStack() as stack:
        yield lambda *argv, program=cloudflared.path: stack.enter_context(Running(*argv, program=program))


HELLO = genuine_hello("db.example.com")


def route(address: tuple[str, int], pattern: str = "db.example.com") -> str:
    return f"--route={pattern}=tcp:{address[0]}:{address[1]}"


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def read_all(sock: socket.socket) -> bytes:
    """What comes until the end; a reset is an end."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 18):
            parts.append(data)
    return b"".join(parts)


def alert(description: int, minor: int = 1) -> bytes:
    return bytes((21, 3, minor, 0, 2, 2, description))


def answer(text: bytes, expected: int = len(HELLO)) -> Callable[[socket.socket], None]:
    """A far end that reads so many bytes, says `text`, and goes on as an echo."""
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, expected)
        sock.sendall(text)
        while data := sock.recv(65536):
            sock.sendall(data)
    return handler


@pytest.fixture(params=["splice", "copy"])
def flow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways bytes are moved."""
    if request.param == "copy":
        monkeypatch.setattr(sniroute, "can_splice", lambda: False)
    elif not sniroute.can_splice():
        pytest.skip("no splice(2) here")
    return request.param


# -- bytes -------------------------------------------------------------------------------------


def test_bytes_arrive_as_they_were_sent_and_the_end_comes_behind_them(run, serve, flow):
    """8 MiB each way in pieces of any size; then the client's end, then the answer to it."""
    def digest(sock: socket.socket) -> None:
        seen = hashlib.sha256()
        while data := sock.recv(65536):
            seen.update(data)
            sock.sendall(data)
        sock.sendall(seen.digest())
    far = serve(digest)
    running = run(route(far.address))
    seeded = random.Random(7)
    payload = seeded.randbytes(8 << 20)
    received = []
    with running.connect(HELLO) as client:
        reader = threading.Thread(target=lambda: received.append(read_all(client)))
        reader.start()
        at = 0
        while at < len(payload):
            size = seeded.choice((1, 60, 1400, 16384, 100_000, 1 << 20))
            client.sendall(payload[at:at + size])
            at += size
        client.shutdown(socket.SHUT_WR)
        reader.join()
    sent = HELLO + payload
    assert received[0] == sent + hashlib.sha256(sent).digest()
    end = running.ending()
    assert (end.up, end.down, end.reason) == (len(sent), len(received[0]), "client_closed")


def test_backend_that_ends_first_is_passed_on_and_the_client_may_still_speak(run, serve, flow):
    heard = []
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(b"goodbye")
        sock.shutdown(socket.SHUT_WR)
        heard.append(read_all(sock))
    running = run(route(serve(handler).address))
    with running.connect(HELLO) as client:
        assert read_all(client) == b"goodbye"
        client.sendall(b"one more thing")
    assert running.ending().reason == "backend_closed"
    assert heard == [b"one more thing"]


@pytest.mark.parametrize("pipes", [0, 2, 64], ids=["no pipe to lend", "two pipes", "pipes for all"])
def test_readers_that_stop_cost_no_memory_and_lose_nothing(run, serve, flow, monkeypatch, pipes):
    """Twelve clients ask for 6 MiB each and read nothing; then they read, and all of it is there."""
    monkeypatch.setattr(sniroute, "PIPES_MAX", pipes)
    monkeypatch.setattr(sniroute, "PENDING_MAX", 1 << 19)
    payload = random.Random(8).randbytes(6 << 20)
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(payload)
    running = run(route(serve(handler).address))
    router = running.router
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect(HELLO)) for _ in range(12)]
        wait_until(lambda: len(router.connections) == 12 and all(
            c.state == "open" and c.down.state == "blocked" for c in list(router.connections)), what="all blocked")
        assert router.pending <= (1 << 19) + 12 * (sniroute.BULK if flow == "copy" else sniroute.BULK)
        for client in clients:
            assert hashlib.sha256(read_all(client)).digest() == hashlib.sha256(payload).digest()
    running.ending(12)
    wait_until(lambda: router.pending == 0)
    assert router.chunk == sniroute.BULK
    assert router.pipes_made <= max(1, pipes)


def test_backend_that_stops_reading_holds_the_client_back(run, serve, flow):
    """The other direction; when the backend goes on, every byte is there."""
    go, total = threading.Event(), []
    def handler(sock: socket.socket) -> None:
        go.wait(20)
        total.append(hashlib.sha256(read_all(sock)).digest())
    running = run(route(serve(handler).address))
    payload = random.Random(9).randbytes(1 << 20)
    sent = hashlib.sha256(HELLO)
    with running.connect(HELLO) as client:
        client.settimeout(0.3)
        count = 0
        with contextlib.suppress(TimeoutError):
            while True:
                sent_now = client.send(payload)
                sent.update(payload[:sent_now])
                count += sent_now
                assert count < 1 << 28, "nothing holds the client back"
        go.set()
    wait_until(lambda: total, what="the backend's end")
    assert total == [sent.digest()]


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_client_that_resets_ends_the_backend_too(run, serve, flow):
    ended = threading.Event()
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(b"x")
        read_all(sock)
        ended.set()
    running = run(route(serve(handler).address))
    client = running.connect(HELLO)
    assert client.recv(1) == b"x"
    reset(client)
    assert running.ending().reason == "client_reset"
    assert ended.wait(10)


def test_backend_that_resets_loses_nothing_it_had_said(run, serve, flow):
    said = threading.Event()
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(b"last words")
        said.wait(10)
        reset(sock)
    running = run(route(serve(handler).address))
    with running.connect(HELLO) as client:
        assert read_exactly(client, 10) == b"last words"
        said.set()
        assert client.recv(1) == b""
    assert running.ending().reason == "backend_reset"


def test_sink_that_breaks_while_full_gives_its_pipe_back(run, serve, flow):
    """The client resets with megabytes on the way to it."""
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        with contextlib.suppress(OSError):
            sock.sendall(bytes(32 << 20))
    running = run(route(serve(handler).address))
    for number in range(1, 4):
        client = running.connect(HELLO)
        wait_until(lambda: [c for c in list(running.router.connections) if c.down and c.down.state == "blocked"])
        reset(client)
        assert running.ending(number).reason in ("client_reset", "backend_closed")
    assert running.router.pending == 0
    assert running.router.pipes_made <= 2


def test_options_of_the_listener_are_those_of_its_connections(run, serve):
    """Set once, inherited: no system call for each client."""
    running = run(route(serve(answer(b"x")).address))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        connection, = running.router.connections
        for sock in (connection.client, connection.down.source):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert not sock.getblocking()
        assert connection.client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert connection.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 110_000
            assert connection.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


def test_connection_outlives_the_prelude_deadline(run, echo_server):
    running = run(route(echo_server.address), "--prelude-timeout=100ms")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        wait_until(lambda: not running.router.prelude_deadline.entries)
        with running.connect() as silent:  # its deadline passes meanwhile
            assert silent.recv(1) == b""
        client.sendall(b"still here")
        assert read_exactly(client, 10) == b"still here"


def test_bytes_behind_the_hello_go_first(run, serve):
    """0-RTT data in the segment of the hello, and a large amount of it."""
    heard = []
    running = run(route(serve(lambda sock: heard.append(read_all(sock))).address))
    early = b"\x17\x03\x03\x40\x00" + bytes(16384)
    with running.connect(HELLO + early):
        pass
    wait_until(lambda: heard)
    assert heard == [HELLO + early]


@pytest.mark.parametrize("size", [1, 7, 200])
def test_hello_in_segments_of_any_size(run, serve, size):
    running = run(route(serve(answer(b"found")).address))
    with running.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(HELLO), size):
            client.send(HELLO[at:at + size])
        assert read_exactly(client, 5) == b"found"


# -- preludes ----------------------------------------------------------------------------------

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 50000 443\r\n"
V2 = sniroute.PROXY_V2 + b"\x21\x11\x00\x0c" + bytes((192, 0, 2, 8, 198, 51, 100, 1)) + struct.pack(">HH", 50001, 443)
V2_LOCAL = sniroute.PROXY_V2 + b"\x20\x00\x00\x07" + b"healthy"


@pytest.mark.parametrize("header, client", [(V1, ("192.0.2.7", 50000)), (V2, ("192.0.2.8", 50001)),
                                            (V2_LOCAL, None)], ids=["v1", "v2", "local"])
def test_proxy_header_is_believed_and_replayed(run, serve, header, client):
    heard = []
    running = run(route(serve(lambda sock: heard.append(read_all(sock))).address))
    with running.connect(header + HELLO):
        pass
    end = running.ending()
    assert end.client == client or client is None and end.client[0] == HOST
    wait_until(lambda: heard)
    assert heard == [header + HELLO]


@pytest.mark.parametrize("mode, trusted, header, served", [
    ("off", True, b"", True), ("off", True, V1, False), ("off", True, V2, False), ("off", False, V1, False),
    ("auto", True, b"", True), ("auto", True, V1, True), ("auto", True, V2, True), ("auto", True, V2_LOCAL, True),
    ("auto", True, b"PROXY nonsense\r\n", False),
    ("auto", False, b"", True), ("auto", False, V1, False), ("auto", False, V2, False), ("auto", False, V2_LOCAL, False),
    ("required", True, b"", False), ("required", True, V1, True), ("required", True, V2_LOCAL, True),
    ("required", True, V1 + V1, False), ("required", False, b"", False), ("required", False, V1, False),
])
def test_proxy_modes_and_trust(run, serve, mode, trusted, header, served):
    far = serve(answer(b"served", len(header + HELLO)))
    running = run(route(far.address), f"--proxy-protocol={mode}",
                  f"--proxy-from={'127.0.0.0/8' if trusted else '192.0.2.0/24'}")
    with running.connect() as client:
        with contextlib.suppress(OSError):
            client.sendall(header + HELLO)
        if served:
            assert read_exactly(client, 6) == b"served"
        else:
            assert read_all(client) == b""
            assert running.ending().reason in ("proxy", "not_tls")
            assert far.accepted == 0


def postgres(reply: bytes, expected: int = 8, then: bytes = b"tls") -> Callable[[socket.socket], None]:
    """A PostgreSQL far end: SSLRequest, its answer, the hello, and something back."""
    def handler(sock: socket.socket) -> None:
        assert read_exactly(sock, expected)[-8:] == SSL_REQUEST
        sock.sendall(reply)
        if read_exactly(sock, len(HELLO)) == HELLO:
            sock.sendall(then)
            read_all(sock)
    return handler


@pytest.mark.parametrize("header", [b"", V1, V2], ids=["direct", "v1", "v2"])
@pytest.mark.parametrize("gss", [False, True], ids=["", "GSSENCRequest first"])
@pytest.mark.parametrize("together", [True, False], ids=["header with request", "header alone"])
def test_postgres_client_is_answered_at_once_and_routed(run, serve, header, gss, together):
    running = run(route(serve(postgres(b"S", len(header) + 8)).address))
    with running.connect() as client:
        if not together:
            client.sendall(header)
            header = b""
        if gss:
            client.sendall(header + GSSENC_REQUEST)
            assert read_exactly(client, 1) == b"N"
            header = b""
        client.sendall(header + SSL_REQUEST)
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_exactly(client, 3) == b"tls"


@pytest.mark.parametrize("reply, says", [(b"N", "does not offer TLS"), (b"E", "answered"), (b"Sx", "answered"),
                                         (b"", "without an answer")],
                         ids=["no TLS", "an error", "more than S", "end"])
def test_postgres_backend_that_does_not_say_S_gets_no_hello(run, serve, reply, says):
    heard = []
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, 8)
        sock.sendall(reply)
        if reply:
            heard.append(read_all(sock))
    running = run(route(serve(handler).address))
    with running.connect(SSL_REQUEST) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_all(client) == alert(80)
    assert says in running.ending().detail
    assert heard in ([], [b""])


def test_postgres_backend_that_is_silent_is_given_up(run, serve, monkeypatch):
    monkeypatch.setattr(sniroute, "GREETING_TIMEOUT", 0.1)
    running = run(route(serve(read_all).address))
    with running.connect(SSL_REQUEST) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_all(client) == alert(80)
    assert "no answer to SSLRequest" in running.ending().detail


def test_bytes_that_did_not_wait_for_S_are_refused(run, echo_server):
    """They sit in the kernel when the request has been read: 8 bytes, then the rest."""
    running = run(route(echo_server.address))
    with running.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(SSL_REQUEST + HELLO)
        assert read_all(client) == b""
    assert running.ending().reason == "malformed"
    assert echo_server.accepted == 0


def test_answer_to_a_request_is_not_sent_to_a_client_that_did_not_wait():
    """The peek before `S`: what came between the read and the answer."""
    ours, theirs = socket.socketpair()
    connection = sniroute.Connection.__new__(sniroute.Connection)
    connection.client = ours
    with ours, theirs:
        ours.setblocking(False)
        connection._answer(b"S")
        assert theirs.recv(1) == b"S"
        theirs.sendall(b"\x16")
        with pytest.raises(sniroute.Malformed):
            connection._answer(b"S")


PLAIN_STARTUP = struct.pack(">II", 20, 3 << 16) + b"user\0me\0\0\0\0\0"


@pytest.mark.parametrize("said, heard, reason", [
    (PLAIN_STARTUP, sniroute.PLAIN_POSTGRES, "plain_postgres"),
    (GSSENC_REQUEST, b"N", "truncated"),
    (struct.pack(">IIII", 16, sniroute.CANCEL_REQUEST, 1, 2), b"", "cancel"),
    (b"GET / HTTP/1.1\r\n\r\n", b"", "not_tls"),
    (b"SSH-2.0-OpenSSH\r\n", b"", "not_tls"),
    (HELLO[:100], alert(50), "truncated"),
    (b"", b"", "truncated"),
    (genuine_hello(None), alert(112), "no_name"),
    (genuine_hello("other.example.com"), alert(112), "no_route"),
    (HELLO.replace(b"db.example.com", b"db.example.c\x1bm"), alert(112), "bad_name"),
    (b"\x16\x03\x01\xff\xff", alert(50), "malformed"),
], ids=["plain startup", "GSSENCRequest", "CancelRequest", "HTTP", "SSH", "half a hello", "nothing", "no name",
        "no route", "escape in the name", "record of 65535 bytes"])
def test_refusals_are_readable_and_counted(run, echo_server, said, heard, reason):
    running = run(route(echo_server.address))
    with running.connect(said) as client:
        if reason == "truncated":
            client.shutdown(socket.SHUT_WR)
        assert read_all(client) == heard
    assert running.ending().reason == reason
    assert running.ending().level == sniroute.REFUSALS[reason].level
    assert running.counter(reason) == 1
    assert echo_server.accepted == 0


def test_oversized_record_is_refused_at_its_header(run, echo_server):
    """The client stalls; nobody waits for the deadline."""
    running = run(route(echo_server.address))
    with running.connect(b"\x16\x03\x01\xff\xff") as client:
        assert read_all(client) == alert(50)
    assert running.ending().seconds < 5


def test_no_name_ok_is_for_debugging(run, echo_server):
    running = run(route(echo_server.address), "--no-name=ok")
    with running.connect(genuine_hello(None)) as client:
        assert read_all(client) == b"OK\n"


def test_alert_is_read_though_the_client_goes_on_talking(run, echo_server):
    """Unread bytes at the close would reset the connection under the alert."""
    running = run(route(echo_server.address))
    with running.connect(genuine_hello("other.example.com") + bytes(100_000)) as client:
        assert read_all(client) == alert(112)


def test_client_that_never_reads_its_alert_is_let_go(run, echo_server, monkeypatch):
    monkeypatch.setattr(sniroute, "LINGER", 0.1)
    running = run(route(echo_server.address))
    with running.connect(genuine_hello("other.example.com")) as client:
        running.ending()
        assert client.recv(7) == alert(112)


@pytest.mark.parametrize("prefix", [1, 5, 8, len(V1), len(V1) + 4, len(V1) + 8, len(V1) + 8 + 60])
def test_stall_after_any_part_of_the_prelude_ends_at_the_one_deadline(run, echo_server, prefix):
    """PROXY header, SSLRequest, hello: the deadline runs from accept, whatever is answered."""
    whole = V1 + SSL_REQUEST + HELLO
    running = run(route(echo_server.address), "--prelude-timeout=200ms")
    with running.connect(whole[:min(prefix, len(V1) + 8)]) as client:
        if prefix > len(V1) + 8:
            assert read_exactly(client, 1) == b"S"
            client.sendall(whole[len(V1) + 8:prefix])
        assert read_all(client) in (b"", b"S", alert(50))
    end = running.ending()
    assert end.reason == "prelude_timeout"
    assert 0.19 < end.seconds < 5


def test_drip_does_not_renew_the_deadline(run, echo_server):
    running = run(route(echo_server.address), "--prelude-timeout=300ms")
    with running.connect() as client:
        with contextlib.suppress(OSError):
            for at in range(len(HELLO) - 1):
                client.send(HELLO[at:at + 1])
                if running.endings:
                    break
                threading.Event().wait(0.02)
    assert running.ending().reason == "prelude_timeout"


def test_half_hellos_do_not_hold_up_the_others(run, serve):
    """300 clients say half a hello and stop: others are served, and all 300 end at the deadline."""
    running = run(route(serve(answer(b"served")).address), "--prelude-timeout=2s")
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(running.connect(HELLO[:200])) for _ in range(300)]
        wait_until(lambda: len(running.router.prelude_deadline.entries) == 300)
        for _ in range(20):
            with running.connect(HELLO) as client:
                assert read_exactly(client, 6) == b"served"
        assert running.counter("prelude_timeout") == 0
        for client in stalled:
            assert read_all(client) == alert(50)
    wait_until(lambda: running.counter("prelude_timeout") == 300)


# -- limits ------------------------------------------------------------------------------------


def test_oldest_prelude_goes_when_there_are_too_many(run, echo_server, monkeypatch):
    monkeypatch.setattr(sniroute, "PRELUDES_MAX", 5)
    running = run(route(echo_server.address))
    with contextlib.ExitStack() as stack:
        silent = []
        for number in range(8):
            silent.append(stack.enter_context(running.connect()))
            wait_until(lambda: running.counter("accepted") == number + 1)
        for client in silent[:3]:
            assert client.recv(1) == b""
        assert running.counter("shed") == 3
        silent[-1].sendall(HELLO)
        assert read_exactly(silent[-1], len(HELLO)) == HELLO


def test_clients_are_limited_by_address_and_a_balancer_is_not_one_client(run, echo_server):
    running = run(route(echo_server.address), "--max-per-client=2")
    with contextlib.ExitStack() as stack:
        def from_address(last: int) -> bytes:
            client = stack.enter_context(running.connect(V1.replace(b"192.0.2.7", b"192.0.2.%d" % last) + HELLO))
            return client.recv(1)
        for last in (1, 1, 2, 2):
            assert from_address(last) == b"P"
        assert from_address(1) == alert(80)[:1]
        assert from_address(3) == b"P"
        for _ in range(4):  # loopback itself is exempt
            client = stack.enter_context(running.connect(HELLO))
            assert client.recv(1) == HELLO[:1]
    wait_until(lambda: running.counter("client_limit") == 1)


def test_client_over_its_limit_is_closed_at_accept(run, echo_server, monkeypatch):
    running = run(route(echo_server.address), "--max-per-client=1")
    running.router.peers[HOST] = sniroute.Peer("192.0.2.9", "refuse", False, False)
    with running.connect(HELLO) as first:
        assert first.recv(1) == HELLO[:1]
        with running.connect() as second:
            assert second.recv(1) == b""
    running.ending(2)
    assert running.counter("client_limit") == 1


def test_accepting_stops_at_max_connections_and_goes_on(run, serve, caplog):
    running = run(route(serve(answer(b"x")).address), "--max-connections=3")
    with contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(running.connect(HELLO)) for _ in range(3)]
        for client in open_ones:
            assert client.recv(1) == b"x"
        late = stack.enter_context(running.connect(HELLO))
        wait_until(lambda: running.router.paused)
        open_ones[0].close()
        assert late.recv(1) == b"x"
    assert sum("not accepting" in r.message for r in caplog.records) == 1


def test_descriptors_that_run_out_pause_accepting_and_do_not_spin(run, serve, caplog, monkeypatch):
    """accept() fails with EMFILE: one log line, no spinning, and all is well when there are some again."""
    running = run(route(serve(answer(b"x")).address))
    calls, broken = [], threading.Event()
    broken.set()
    class Listener:
        """The real one, but for accept."""
        def __init__(self, real: socket.socket):
            self.real = real
        def accept(self) -> Any:
            calls.append(1)
            if broken.is_set():
                raise OSError(sniroute.errno.EMFILE, "Too many open files")
            return self.real.accept()
        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)
    router = running.router
    def swap() -> None:
        router.selector.unregister(router.listeners[0])
        router.listeners[0] = Listener(router.listeners[0])
        router._resume()
    router.call(swap)
    wait_until(lambda: isinstance(router.listeners[0], Listener))
    with running.connect(HELLO) as client:
        wait_until(lambda: len(calls) >= 3)
        assert len(calls) < 50
        broken.clear()
        assert client.recv(1) == b"x"
    assert sum("not accepting" in r.message for r in caplog.records) == 1


def test_peers_are_forgotten_when_there_are_many(run, echo_server, monkeypatch):
    monkeypatch.setattr(sniroute, "PEERS_MAX", 10)
    running = run(route(echo_server.address))
    router = running.router
    for last in range(200):
        router.peer_of(f"198.51.100.{last}")
    assert len(router.peers) <= 11
    one, other = router.peer_of("2001:db8::1"), router.peer_of("2001:db8::2")
    assert one is other, "a /64 is one client"
    assert router.peer_of("::ffff:198.51.100.9").key == "198.51.100.9"
    assert router.peer_of("fe80::1%lo").key


# -- tcp targets -------------------------------------------------------------------------------


def test_host_name_is_resolved_once_and_kept(run, serve, monkeypatch):
    far = serve(answer(b"x"))
    asked = []
    real = socket.getaddrinfo
    def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        return real(host, *args, **kwargs)
    running = run(f"--route=db.example.com=tcp:localhost:{far.address[1]}")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for _ in range(3):
        with running.connect(HELLO) as client:
            assert client.recv(1) == b"x"
    assert asked.count("localhost") == 1


def test_host_that_does_not_resolve_is_refused_with_its_reason(run):
    running = run("--route=db.example.com=tcp:nothing.invalid:1")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "unresolved"
    assert "nothing.invalid" in running.ending().detail


def test_resolver_that_is_down_for_a_moment_cuts_nobody(run, serve, monkeypatch):
    far = serve(answer(b"x"))
    monkeypatch.setattr(sniroute, "RESOLVED_FOR", 0.0)
    running = run(f"--route=db.example.com=tcp:localhost:{far.address[1]}")
    monkeypatch.setattr(sniroute, "PARKS_MAX", 10**9)
    monkeypatch.setattr(sniroute, "RESOLVED_FOR", 0.2)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    wait_until(lambda: all(until < time.monotonic() for _, until in running.router.resolved.values()))
    def broken(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", broken)
        with socket.socket() as client:  # create_connection would resolve
            client.settimeout(20)
            client.connect(running.address)
            client.sendall(HELLO)
            assert client.recv(1) == b"x"


def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


def test_next_address_is_tried_and_the_last_failure_is_told(run, serve, monkeypatch):
    far = serve(answer(b"x"))
    shut = closed_port()
    running = run(route((HOST, shut)), route(far.address, "two.example.com"))
    good = (socket.AF_INET, far.address)
    bad = (socket.AF_INET, (HOST, shut))
    running.router.resolved[f"tcp:{HOST}:{far.address[1]}"] = sniroute.Backend((bad, good), False), float("inf")
    with running.connect(genuine_hello("two.example.com")) as client:
        assert client.recv(1) == b"x"
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    end = running.ending(2)
    assert end.reason == "backend" and "refused" in end.detail


def test_connect_without_an_answer_times_out(run, monkeypatch):
    """A listener whose backlog is full: the kernel drops what comes."""
    monkeypatch.setattr(sniroute, "CONNECT_TIMEOUT", 0.2)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind((HOST, 0))
        full.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        running = run(route(full.getsockname()))
        with running.connect(HELLO) as client:
            assert read_all(client) == alert(80)
        assert "no answer to the connect" in running.ending().detail


def test_client_that_leaves_during_the_connect_is_noticed(run):
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind((HOST, 0))
        full.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        running = run(route(full.getsockname()))
        running.connect(HELLO).close()
        assert running.ending().reason == "client_left"


@pytest.mark.parametrize("pattern, target, address, allowed", [
    ("*", "tcp:{name}:443", ("10.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("127.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("fd00::1", 443), False),
    ("*", "tcp:{name}:443", ("8.8.8.8", 443), True),
    ("*", "tcp:10.0.0.1:443", ("10.0.0.1", 443), True),
    ("*.example.com", "tcp:{name}:443", ("10.0.0.1", 443), True),
])
def test_stranger_cannot_point_a_name_at_the_private_network(run, pattern, target, address, allowed):
    running = run(f"--route={pattern}={target}")
    decision = running.router.routes.decide("a.example.com")
    assert running.router.may_dial(decision, address) is allowed


def test_router_does_not_dial_itself(run):
    running = run(f"--route=db.example.com=tcp:localhost:1")
    decision = running.router.routes.decide("db.example.com")
    assert not running.router.may_dial(decision, running.address)
    assert running.router.may_dial(decision, (HOST, 1))
    with pytest.raises(sniroute.SettingsError, match="leads back"):
        sniroute.load_settings(["--listen=127.0.0.1:19999", "--route=a.example.com=tcp:127.0.0.1:19999"], {})


def test_forbidden_address_is_refused(run, monkeypatch):
    running = run("--route=*=tcp:{name}:443")
    private = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", 443))]
    with running.connect() as client:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: private)
        client.sendall(HELLO)
        assert read_all(client) == alert(112)
    assert running.ending().reason == "forbidden"


def test_own_name_needs_a_route_of_its_own(run, echo_server):
    running = run(route(echo_server.address, "*"), route(echo_server.address, "own.example.com"))
    running.router.own_names |= {"db.example.com", "own.example.com"}
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(112)
    own = genuine_hello("own.example.com")
    with running.connect(own) as client:
        assert read_exactly(client, len(own)) == own


# -- tunnels -----------------------------------------------------------------------------------

DB = "cloudflared:db.example.com"
TUNNEL = "--route=*=cloudflared:{name}"


@pytest.fixture
def ports(free_ports) -> str:
    first, last = free_ports(30)
    return f"--ports={first}-{last}"


def test_cold_name_starts_its_tunnel_and_idle_stops_it(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports, "--idle=300ms")
    for _ in range(2):
        with running.connect(HELLO) as client:
            assert client.recv(1) == b"x"
    assert len(cloudflared.starts()) == 1
    wait_until(lambda: not running.tunnels.snapshot(), what="the idle stop")
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    assert len(cloudflared.starts()) == 2


def crowd(running: Running, hellos: list[bytes]) -> None:
    """All at once: connect, say hello; then everybody has the echo."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect(hello)) for hello in hellos]
        for client, hello in zip(clients, hellos, strict=True):
            assert read_exactly(client, len(hello)) == hello


def test_thousand_clients_of_one_cold_name_start_one_child(run, cloudflared, ports, single_loop_echo):
    cloudflared.far("*", single_loop_echo)
    cloudflared.fault("*", listen_delay=300)
    running = run(TUNNEL, ports)
    crowd(running, [HELLO] * 1000)
    assert len(cloudflared.starts()) == 1
    running.ending(1000)
    assert {end.reason for end in running.endings} == {"client_closed"}
    assert running.router.waiting_threads == 0


def test_many_cold_names_start_a_few_at_a_time_and_all_are_answered(run, cloudflared, single_loop_echo, free_ports):
    cloudflared.far("*", single_loop_echo)
    first, last = free_ports(200)
    running = run(TUNNEL, f"--ports={first}-{last}", "--max-tunnels=200", "--start-timeout=60s")
    seen = []
    enter = running.tunnels._enter
    def watching(tunnel: Any, state: str) -> None:
        enter(tunnel, state)
        seen.append(sum(t.state == "starting" for t in running.tunnels.tunnels.values()))
    running.tunnels._enter = watching
    crowd(running, [genuine_hello(f"n{n}.example.com") for n in range(200)])
    assert max(seen) == 4
    assert len(cloudflared.starts()) == 200


def test_killed_tunnel_is_not_noticed_by_those_who_had_received_nothing(run, serve, cloudflared, ports):
    """It dies under load; clients whose hello it took and did not answer are served by the next."""
    release = threading.Event()
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        release.wait(20)
        sock.sendall(b"x")
        read_all(sock)
    far = serve(handler)
    cloudflared.far("*", far.address)
    running = run(TUNNEL, ports)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect(HELLO)) for _ in range(30)]
        wait_until(lambda: far.accepted == 30)
        os.kill(cloudflared.starts()[0]["pid"], signal.SIGKILL)
        late = stack.enter_context(running.connect(HELLO))
        wait_until(lambda: far.accepted >= 60, what="all of them again")
        release.set()
        for client in [*clients, late]:
            assert client.recv(1) == b"x"
    assert len(cloudflared.starts()) == 2
    assert running.counter("retries") >= 30
    running.ending(31)
    assert sum(leases for _, _, leases, _, _ in running.tunnels.snapshot()) == 0


def test_answer_without_a_byte_is_tried_once_more(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(answer(b"x")).address)
    cloudflared.fault("*", refuse=1)
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    assert len(cloudflared.clients()) == 2
    end = running.ending()
    assert (end.reason, end.up, end.down) == ("client_closed", len(HELLO), 1)


def test_tunnel_that_never_answers_is_refused_with_its_own_words(run, cloudflared, ports):
    cloudflared.fault("*", refuse=True, error="websocket: bad handshake")
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert len(cloudflared.clients()) == 2
    assert "bad handshake" in running.ending().detail


@pytest.mark.parametrize("said, tries", [(HELLO + b"early data", 1), (HELLO, 2)],
                         ids=["early data behind the hello", "the hello alone"])
def test_only_a_whole_speech_is_said_twice(run, cloudflared, ports, said, tries):
    cloudflared.fault("*", refuse=True)
    running = run(TUNNEL, ports)
    with running.connect(said) as client:
        assert read_all(client) == alert(80)
    assert len(cloudflared.clients()) == tries


def test_postgres_through_a_tunnel_is_retried_too(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(postgres(b"S")).address)
    cloudflared.fault("*", refuse=1)
    running = run(TUNNEL, ports)
    with running.connect(SSL_REQUEST) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_exactly(client, 3) == b"tls"


def test_hung_tunnel_is_found_out_and_restarted(run, serve, cloudflared, ports, monkeypatch):
    """SIGSTOP: its backlog still takes connections, and nobody answers."""
    monkeypatch.setattr(sniroute, "FIRST_BYTE_TIMEOUT", 0.5)
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    pid = cloudflared.starts()[0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    assert len(cloudflared.starts()) == 2


def test_start_that_fails_is_told_and_remembered(run, cloudflared, ports):
    cloudflared.fault("*", exit=0, words="no such flag")
    running = run(TUNNEL, ports)
    for number in (1, 2, 3):
        with running.connect(HELLO) as client:
            assert read_all(client) == alert(80)
        assert running.ending(number).reason == "tunnel_failed"
        assert "no such flag" in running.ending(number).detail
    assert len(cloudflared.starts()) == 1


def test_missing_program_is_named(run, ports):
    running = run(TUNNEL, ports, program="/nonexistent")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert "/nonexistent is not there" in running.ending().detail


def test_client_that_leaves_while_it_waits_is_noticed(run, cloudflared, ports):
    cloudflared.fault("*", never_listen=True)
    running = run(TUNNEL, ports)
    first = running.connect(HELLO)
    with running.connect(HELLO) as second:
        wait_until(lambda: len(running.router.connections) == 2 and cloudflared.starts())
        first.close()
        assert running.ending().reason == "client_left"
        assert len(running.router.waits[DB].connections) == 1
        reset(second)
        assert running.ending(2).reason == "client_left"


def test_client_that_goes_on_talking_while_it_waits_loses_nothing(run, serve, cloudflared, ports):
    """What does not fit waits in the kernel, not in memory."""
    heard = []
    cloudflared.far("*", serve(lambda sock: heard.append(read_all(sock))).address)
    cloudflared.fault("*", listen_delay=500)
    running = run(TUNNEL, ports)
    more = random.Random(3).randbytes(200_000)
    with running.connect(HELLO) as client:
        wait_until(lambda: running.router.waits)
        client.sendall(more)
        wait_until(lambda: [c for c in list(running.router.connections) if not c.up.watched])
        assert max(len(c.hello) for c in running.router.connections) <= 2 * sniroute.HELLO_WIRE_MAX
    wait_until(lambda: heard)
    assert heard == [HELLO + more]


def test_start_that_takes_too_long_is_refused(run, cloudflared, ports):
    cloudflared.fault("*", never_listen=True)
    running = run(TUNNEL, ports, "--start-timeout=500ms")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason in ("tunnel_timeout", "tunnel_failed")


def test_resolver_that_hangs_holds_nobody_for_ever(run, monkeypatch):
    release = threading.Event()
    running = run("--route=db.example.com=tcp:slow.example.net:1", "--start-timeout=100ms")
    monkeypatch.setattr(running.router.parked_deadline, "seconds", 0.3)
    with running.connect() as client:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and [])
        client.sendall(HELLO)
        assert read_all(client) == alert(80)
    assert "its address" in running.ending().detail
    monkeypatch.undo()
    release.set()
    wait_until(lambda: not running.router.waits)


def test_client_that_was_refused_while_it_waited_is_not_dialled_later(run, echo_server, monkeypatch):
    """It still reads its alert when the target is ready at last."""
    monkeypatch.setattr(sniroute, "LINGER", 5.0)
    release = threading.Event()
    running = run(f"--route=db.example.com=tcp:slow.example.net:{echo_server.address[1]}")
    monkeypatch.setattr(running.router.parked_deadline, "seconds", 0.1)
    found = socket.getaddrinfo(*echo_server.address, type=socket.SOCK_STREAM)
    with running.connect() as client:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and found)
        client.sendall(HELLO)
        assert read_exactly(client, 7) == alert(80)
        release.set()
        wait_until(lambda: not running.router.waits)
        assert [c.state for c in running.router.connections] == ["lingering"]
        assert echo_server.accepted == 0


def test_names_that_wait_are_bounded(run, cloudflared, ports, monkeypatch):
    """Two threads, three names: the third waits for a thread, a fourth is refused."""
    monkeypatch.setattr(sniroute, "WAIT_THREADS", 2)
    monkeypatch.setattr(sniroute, "WAITS_MAX", 3)
    cloudflared.fault("*", listen_delay=400)
    cloudflared.fault("n3.example.com", exit=1)
    running = run(TUNNEL, ports)
    with contextlib.ExitStack() as stack:
        for number in range(3):
            stack.enter_context(running.connect(genuine_hello(f"n{number}.example.com")))
            wait_until(lambda: len(running.router.waits) == number + 1)
        assert running.router.waiting_threads == 2
        with running.connect(genuine_hello("n3.example.com")) as client:
            assert read_all(client) == alert(80)
        assert running.ending().reason == "busy"
        wait_until(lambda: not running.router.waits)


def test_thread_that_cannot_start_refuses_and_leaves_nothing_behind(run, cloudflared, ports, monkeypatch):
    running = run(TUNNEL, ports)
    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(running.router, "process_request", no_thread)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "busy"
    assert running.router.waiting_threads == 0 and not running.router.waits


def test_fault_in_a_waiting_thread_ends_its_clients_only(run, cloudflared, ports, serve, monkeypatch, caplog):
    far = serve(answer(b"x"))
    running = run(TUNNEL, route(far.address, "ok.example.com"), ports)
    def fault(*_: Any) -> None:
        raise ZeroDivisionError("planted")
    monkeypatch.setattr(running.tunnels, "wait", fault)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "internal"
    with running.connect(genuine_hello("ok.example.com")) as client:
        assert client.recv(1) == b"x"
    assert "planted" in caplog.text


def test_tunnel_that_is_gone_each_time_it_is_ready_is_given_up(run, cloudflared, ports, monkeypatch):
    running = run(TUNNEL, ports)
    monkeypatch.setattr(running.tunnels, "wait", lambda *_: None)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert "gone each time" in running.ending().detail


def test_no_byte_reaches_whoever_took_the_port_of_a_dead_tunnel(run, serve, cloudflared, ports):
    """The child dies, somebody else listens on its port before the reaper has looked."""
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    running.ending()
    port, pid = running.tunnels.snapshot()[0][3:]
    held = threading.Event()
    real_exited = running.tunnels._exited
    def slow(child: Any) -> None:
        held.wait(10)
        real_exited(child)
    for key in list(running.tunnels.selector.get_map().values()):
        if key.data[0] == real_exited:
            running.tunnels.selector.modify(key.fileobj, key.events, (slow, key.data[1]))
    os.kill(pid, signal.SIGKILL)
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        def steal() -> bool:
            with contextlib.suppress(OSError):
                thief.bind((HOST, port))
                return True
            return False
        wait_until(steal)
        thief.listen()
        with running.connect(HELLO) as client:
            taken, _ = thief.accept()
            with taken:
                taken.settimeout(10)
                assert taken.recv(1) == b"", "a byte for the thief"
            held.set()
            assert client.recv(1) == b"x"


# -- ends --------------------------------------------------------------------------------------


def test_fault_in_the_loop_ends_only_the_connection_that_met_it(run, serve, monkeypatch, caplog):
    far = serve(answer(b"x"))
    running = run(route(far.address))
    with running.connect(HELLO) as other:
        assert other.recv(1) == b"x"
        def fault(*_: Any) -> None:
            raise ZeroDivisionError("planted")
        with monkeypatch.context() as patch:
            patch.setattr(sniroute.Connection, "route", fault)
            with running.connect() as victim:
                wait_until(lambda: len(running.router.connections) == 2)
                victim.sendall(HELLO)
                assert victim.recv(1) == b""
        assert running.ending().reason == "internal"
        other.sendall(b"y")
        assert other.recv(1) == b"y"
    assert "planted" in caplog.text


def test_idle_connections_are_closed_and_busy_ones_are_not(run, echo_server):
    running = run(route(echo_server.address), "--connection-idle=400ms")
    with running.connect(HELLO) as idle, running.connect(HELLO) as busy:
        for client in (idle, busy):
            assert read_exactly(client, len(HELLO)) == HELLO
        idle.settimeout(0.02)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            busy.sendall(b"x")
            assert busy.recv(1) == b"x"
            with contextlib.suppress(TimeoutError):
                assert idle.recv(1) == b""
                break
        assert running.ending().reason == "idle"
        busy.sendall(b"y")
        assert busy.recv(1) == b"y"


def test_half_closed_connection_that_is_silent_does_not_stay_for_ever(run, serve, monkeypatch):
    """The client is gone, the backend says nothing and never ends."""
    monkeypatch.setattr(sniroute, "HALF_CLOSED_IDLE", 0.2)
    done = threading.Event()
    far = serve(lambda sock: done.wait(20))
    running = run(route(far.address))
    running.connect(HELLO).close()
    assert running.ending().reason == "idle"
    done.set()


def test_drain_lets_connections_end_and_accepts_no_more(run, serve, caplog):
    caplog.set_level("INFO")
    running = run(route(serve(answer(b"x")).address))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        running.router.drain(20)
        wait_until(lambda: running.router.phase == "draining")
        with pytest.raises(OSError):
            running.connect()
        running.router.drain(20)  # twice is once
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
    running.thread.join(10)
    assert not running.thread.is_alive()


def test_drain_is_bounded(run, serve):
    running = run(route(serve(answer(b"x")).address))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        running.router.drain(0.1)
        assert client.recv(1) == b""
    assert running.ending().reason == "stopped"
    running.thread.join(10)
    assert not running.thread.is_alive()


def test_pipe_that_cannot_be_replaced_is_emptied(run, echo_server, monkeypatch):
    """A sink broke with bytes in the shared pipe, and there are no descriptors for another."""
    running = run(route(echo_server.address))
    router = running.router
    if router.pipe is None:
        pytest.skip("no splice(2) here")
    os.write(router.pipe[1], b"somebody else's bytes")
    monkeypatch.setattr(router, "_make_pipe", lambda: None)
    router.lose_pipe()
    with pytest.raises(BlockingIOError):
        os.read(router.pipe[0], 1)


def test_splice_is_tried_before_it_is_used(monkeypatch):
    def refused(*_: Any, **__: Any) -> int:
        raise OSError(22, "Invalid argument")
    monkeypatch.setattr(os, "splice", refused, raising=False)
    assert not sniroute.can_splice()
    monkeypatch.delattr(os, "splice")
    assert not sniroute.can_splice()


# -- the README --------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


@pytest.mark.parametrize("row", sniroute.SETTINGS, ids=lambda row: row.name)
def test_every_option_is_in_the_readme_with_its_default(row):
    line = next((line for line in README.split("\n") if line.startswith(f"| `--{row.name} {row.metavar}` |")), "")
    assert line, f"--{row.name} {row.metavar} is not in README.md"
    if row.default is not None and row.name != "proxy-from":
        assert f"`{row.default}`" in line.split("|")[2]


def test_every_refusal_is_in_the_readme():
    table = README.partition("## What is refused")[2].partition("\n## ")[0]
    assert {kind for kind in sniroute.REFUSALS if f"`{kind}`" not in table} == set()


def test_variables_a_tunnel_may_inherit_are_in_the_readme():
    import sniroute_tunnels

    names = {name for name in sniroute_tunnels.CLOUDFLARED_ENVIRONMENT if name.isupper()}
    assert {name for name in names if f"`{name}`" not in README} == set()


def test_quick_start_of_the_readme_works_as_pasted(tmp_path, free_ports):
    for program in ("openssl", "curl", "bash"):
        if shutil.which(program) is None:
            pytest.skip(f"needs the Debian package {program}")
    block = README.partition("<!-- quick start -->\n```sh\n")[2].partition("```")[0]
    first, _ = free_ports(2)
    script = block.replace("19000", str(first)).replace("8443", str(first + 1)).replace(
        "python3 ", f"{sys.executable} ") + "\nwait\n"
    for name in ("sniroute.py", "sniroute_tunnels.py"):
        shutil.copy(HERE / name, tmp_path)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "</HTML>" in done.stdout, done.stderr
    assert f"listening on {HOST}:{first}" in done.stderr and "reason=client_closed" in done.stderr
