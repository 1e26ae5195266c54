"""Tests of sniroute_connection.py, in the order of a connection's life.

Preludes and how they are refused, then the way to the backend, then tunnels that fail and are tried again.
The router runs in a thread (`run` of testbed/running.py); the tunnel program is the stand-in of
testbed/fake_cloudflared.py.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import random
import select
import signal
import socket
import struct
import threading
import time
import types
from typing import Any, Callable, Iterator

import pytest

import sniroute_connection
import sniroute_deadlines
import sniroute_refusals
import sniroute_targets
import sniroute_wire
from sniroute_doctor import sample_hello
from sniroute_loop import NEVER
from sniroute_names import show_address
from sniroute_refusals import Refused, told
from sniroute_targets import Resolved
from conftest import HOST, wait_until
from testbed.hellos import (ASK_GSS, ASK_TLS, HELLO, INET, INET6, NAME, V1, V2, V2_LOCAL, genuine, hello, hello_of,
                            named, records, v1, v2)
from testbed.program import counter
from testbed.running import DB, TUNNEL, Running, alert, answer, read_all, read_exactly, reset, route


# -- preludes ----------------------------------------------------------------------------------


def test_connection_outlives_the_prelude_deadline(run, echo_server):
    running = run(route(echo_server.address), "--prelude-timeout=1s")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        wait_until(lambda: not running.router.deadlines.prelude.due)
        with running.connect() as silent:  # its deadline passes meanwhile
            assert silent.recv(1) == b""
        client.sendall(b"still here")
        assert read_exactly(client, 10) == b"still here"


def test_bytes_behind_the_hello_go_first(run, serve):
    """0-RTT data in the segment of the hello, and a large amount of it."""
    far = serve(read_all)
    running = run(route(far.address))
    early = b"\x17\x03\x03\x40\x00" + bytes(16384)
    with running.connect(HELLO + early):
        pass
    assert far.result() == HELLO + early


@pytest.mark.parametrize("size", [1, 7, 200])
def test_hello_in_segments_of_any_size(run, serve, size):
    running = run(route(serve(answer(b"found")).address))
    with running.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(HELLO), size):
            client.send(HELLO[at:at + size])
        assert read_exactly(client, 5) == b"found"


@pytest.mark.parametrize("header, client", [(V1, ("192.0.2.7", 50000)), (V2, ("192.0.2.8", 50001)),
                                            (V2_LOCAL, None)], ids=["v1", "v2", "local"])
def test_proxy_header_is_believed_and_replayed(run, serve, header, client):
    far = serve(read_all)
    running = run(route(far.address))
    with running.connect(header + HELLO):
        pass
    end = running.ending()
    assert end.client == client or client is None and end.client[0] == HOST
    assert far.result() == header + HELLO


MAPPED = b"".join(ipaddress.IPv6Address(f"::ffff:{end}").packed for end in ("203.0.113.5", "198.51.100.1")) \
    + struct.pack(">HH", 1000, 443)
UNTOLD = {  # headers that name no client
    "v1-UNKNOWN": v1("UNKNOWN"), "LOCAL": V2_LOCAL, "UNSPEC": v2(0x21, 0x00), "UNSPEC-with-more": v2(0x21, 0x00, b"x" * 9),
    "UNIX": v2(0x21, 0x31, bytes(216)), "UDP4": v2(0x21, 0x12, INET), "UDP6": v2(0x21, 0x22, INET6),
    "INET-UNSPEC": v2(0x21, 0x10, INET),
}


@pytest.mark.parametrize("header", [v1("TCP6 ::ffff:203.0.113.5 ::ffff:198.51.100.1 1000 443"),
                                    v1("TCP6 ::FFFF:cb00:7105 2001:db8::1 1000 443"), v2(0x21, 0x21, MAPPED)],
                         ids=["v1", "v1-in-hex", "v2"])
def test_an_ipv4_client_in_ipv6_is_logged_as_ipv4(run, serve, header):
    """As a balancer that listens on a dual-stack socket says it."""
    far = serve(read_all)
    running = run(route(far.address))
    with running.connect(header + HELLO):
        pass
    assert show_address(running.ending().client) == "203.0.113.5:1000"
    assert running.ending().client == ("203.0.113.5", 1000)
    assert far.result() == header + HELLO


@pytest.mark.parametrize("mode", ["auto", "required"])
@pytest.mark.parametrize("header", UNTOLD.values(), ids=UNTOLD)
def test_a_header_that_names_no_client_leaves_the_connections_own_address(run, serve, settings_file, header, mode):
    """What the route allows is asked of that one, too."""
    far = serve(answer(b"served", len(header + HELLO)))
    running = run(f"--proxy-protocol={mode}", "-c", settings_file(
        f'[routes."db.example.com"]\ntarget = "tcp:{HOST}:{far.address[1]}"\nallow = "{HOST}"\n'))
    with running.connect(header + HELLO) as client:
        assert read_exactly(client, 6) == b"served"
        own = client.getsockname()
    assert running.ending().client == own


@pytest.mark.parametrize("mode, trusted, header, served", [
    ("off", True, b"", True), ("off", True, V1, False), ("off", True, V2, False), ("off", False, V1, False),
    ("auto", True, b"", True), ("auto", True, V1, True), ("auto", True, V2, True), ("auto", True, V2_LOCAL, True),
    ("auto", True, b"PROXY nonsense\r\n", False),
    ("auto", False, b"", True), ("auto", False, V1, False), ("auto", False, V2, False), ("auto", False, V2_LOCAL, False),
    ("auto", True, v2(0x21, 0x00), True), ("auto", False, v2(0x21, 0x00), False), ("off", True, v2(0x21, 0x00), False),
    ("required", True, v2(0x21, 0x31, bytes(216)), True), ("required", True, v2(0x21, 0x31, bytes(215)), False),
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


def postgres_far(reply: bytes, expected: int = 8, then: bytes = b"tls") -> Callable[[socket.socket], None]:
    """A PostgreSQL far end: SSLRequest, its answer, the hello, and something back."""
    def handler(sock: socket.socket) -> None:
        assert read_exactly(sock, expected)[-8:] == ASK_TLS
        sock.sendall(reply)
        if read_exactly(sock, len(HELLO)) == HELLO:
            sock.sendall(then)
            read_all(sock)
    return handler


@pytest.mark.parametrize("header", [b"", V1, V2], ids=["direct", "v1", "v2"])
@pytest.mark.parametrize("gss", [False, True], ids=["", "GSSENCRequest first"])
@pytest.mark.parametrize("together", [True, False], ids=["header with request", "header alone"])
def test_postgres_client_is_answered_at_once_and_routed(run, serve, header, gss, together):
    running = run(route(serve(postgres_far(b"S", len(header) + 8)).address))
    with running.connect() as client:
        if not together:
            client.sendall(header)
            header = b""
        if gss:
            client.sendall(header + ASK_GSS)
            assert read_exactly(client, 1) == b"N"
            header = b""
        client.sendall(header + ASK_TLS)
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_exactly(client, 3) == b"tls"


@pytest.mark.parametrize("reply, says", [(b"N", "does not offer TLS"), (b"E", "answered"), (b"Sx", "answered"),
                                         (b"", "without an answer")],
                         ids=["no TLS", "an error", "more than S", "end"])
def test_postgres_backend_that_does_not_say_S_gets_no_hello(run, serve, reply, says):
    def handler(sock: socket.socket) -> bytes:
        read_exactly(sock, 8)
        sock.sendall(reply)
        return read_all(sock) if reply else b""
    far = serve(handler)
    running = run(route(far.address))
    with running.connect(ASK_TLS) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_all(client) == alert(80)
    assert says in running.ending().detail
    assert far.result() == b""


def test_postgres_backend_that_is_silent_is_given_up(run, serve, monkeypatch):
    monkeypatch.setattr(sniroute_deadlines, "GREETING_TIMEOUT", 0.1)
    running = run(route(serve(read_all).address))
    with running.connect(ASK_TLS) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_all(client) == alert(80)
    assert "no answer to SSLRequest" in running.ending().detail


def test_bytes_that_did_not_wait_for_S_are_refused(run, echo_server):
    """They sit in the kernel when the request has been read: 8 bytes, then the rest."""
    running = run(route(echo_server.address))
    with running.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(ASK_TLS + HELLO)
        assert read_all(client) == b""
    assert running.ending().reason == "malformed"
    assert echo_server.accepted == 0


def test_answer_to_a_request_is_not_sent_to_a_client_that_did_not_wait():
    """The peek before `S`: what came between the read and the answer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        sniroute_connection.answer_now(ours, b"S")
        assert theirs.recv(1) == b"S"
        theirs.sendall(b"\x16")
        with pytest.raises(sniroute_refusals.Malformed):
            sniroute_connection.answer_now(ours, b"S")


def test_client_that_resets_in_its_prelude_is_counted_among_those_that_left(run, echo_server):
    running = run(route(echo_server.address))
    client = running.connect(HELLO[:100])
    wait_until(lambda: [c for c in list(running.router.connections) if c.prelude is not None])
    reset(client)
    assert running.ending().reason == "truncated" and "reset the connection" in running.ending().detail


def test_answer_to_a_request_of_a_client_that_has_reset_is_nobodys():
    """The next read says so."""
    with socket.create_server((HOST, 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        ours, _ = listener.accept()
        with ours:
            reset(client)
            ours.setblocking(False)
            wait_until(lambda: select.select([ours], [], [], 0)[0])
            sniroute_connection.answer_now(ours, b"S")


def test_hello_that_the_backend_does_not_take_at_once_arrives_whole(run, monkeypatch):
    """Buffers are small on the way there, and the backend reads late."""
    said = sample_hello(NAME, 16_000) + bytes(40_000)
    def small(sock: socket.SocketType) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    monkeypatch.setattr(sniroute_targets, "keep_alive", small)
    with socket.create_server((HOST, 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        running = run(route(listener.getsockname()))
        targets = running.router.targets
        targets.remember(running.router.decide(NAME), Resolved(  # not local: so `keep_alive` is called
            ((socket.AF_INET, listener.getsockname()),), False, NEVER))
        with running.connect(said) as client:
            far, _ = listener.accept()
            with far:
                wait_until(lambda: [c for c in list(running.router.connections) if c.up.state == "blocked"])
                assert read_exactly(far, len(said)) == said
                far.sendall(b"all")
                assert read_exactly(client, 3) == b"all"
    assert running.ending().up == len(said)


STARTUP_PACKET = struct.pack(">II", 20, 3 << 16) + b"user\0me\0\0\0\0\0"


@pytest.mark.parametrize("said, heard, reason", [
    (STARTUP_PACKET, told(Refused("plain_postgres", ""), sniroute_refusals.POSTGRES), "plain_postgres"),
    (ASK_GSS, b"N", "truncated"),
    (struct.pack(">IIII", 16, sniroute_wire.CANCEL_REQUEST, 1, 2), b"", "cancel"),
    (b"GET / HTTP/1.1\r\n\r\n", b"", "not_tls"),
    (b"SSH-2.0-OpenSSH\r\n", b"", "not_tls"),
    (HELLO[:100], alert(50), "truncated"),
    (b"", b"", "truncated"),
    (genuine(name=None), alert(112), "no_name"),
    (genuine(name="other.example.com"), alert(112), "no_route"),
    (HELLO.replace(b"db.example.com", b"db.example.c\x1bm"), alert(112), "bad_name"),
    (b"\x16\x03\x01\xff\xff", alert(50), "malformed"),
    (b"\x16\x03\x01\x40\0\1\1\0\1" + bytes(9), alert(50), "hello_too_large"),
], ids=["plain startup", "GSSENCRequest", "CancelRequest", "HTTP", "SSH", "half a hello", "nothing", "no name",
        "no route", "escape in the name", "record of 65535 bytes", "hello of 65537 bytes"])
def test_refusals_are_readable_and_counted(run, echo_server, said, heard, reason):
    running = run(route(echo_server.address))
    with running.connect(said) as client:
        if reason == "truncated":
            client.shutdown(socket.SHUT_WR)
        assert read_all(client) == heard
    assert running.ending().reason == reason
    assert running.ending().level == sniroute_refusals.REFUSALS[reason].level
    assert running.counter(reason) == 1
    assert echo_server.accepted == 0


def test_names_that_no_route_fits_cost_no_process_no_question_and_no_dial(run, serve, cloudflared, ports, monkeypatch):
    """Nobody uses the router as an open proxy, or to have processes started."""
    far, asked, look = serve(read_all), [], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *words, **more: (
        None if host == HOST else asked.append(host)) or look(host, *words, **more))
    running = run("--route=*.example.com=cloudflared:cft-{name}", route(far.address, "*.tcp.example.com"),
                  "--route=*.dns.example.com=tcp:{name}:443", "--route={port}.port.example.com=tcp:127.0.0.1:{port}", ports)
    for number in range(500):
        name = (f"n{number:04}.test.org", f"a.{number:04}.xmpl.de", f"x{number:05}.example")[number % 3]
        assert len(name) == len(NAME)
        with running.connect(HELLO.replace(NAME.encode(), name.encode())) as client:
            assert read_all(client) == alert(112)
    for name in ("example.com", "a.b.example.com", "a.b.tcp.example.com", "tcp.example.org", "x.port.example.com",
                 "70000.port.example.com", "localhost", "db"):
        with running.connect(genuine(name=name)) as client:
            assert read_all(client) == alert(112), name
    assert running.counter("no_route") >= 500
    assert (cloudflared.starts(), asked, far.accepted) == ([], [], 0)
    assert not running.router.waits.by_key and not running.tunnels.snapshot()


WORDS = (b"--url=x", b"-T", b"-rf.example.com", b"a@b.example.com", b"a/b.example.com", b"..", b"a:1.example.com",
         b"a#b.example.com", b"a?b.example.com", b"$(id).example.com", b"`id`.example.com", b"a;id.example.com",
         b"a%00.example.com", b"a b.example.com", b"a\0b.example.com", b"a\tb.example.com", b"a,b.example.com",
         b"{name}.example.com", b"http://a.example.com")


def test_no_name_makes_a_word_of_a_command_line(run, serve, cloudflared, ports):
    """Neither by TLS nor by Host."""
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports, "--http=forward")
    for raw in WORDS:
        with running.connect(hello(named(raw))) as client:
            assert read_all(client) == alert(112), raw
        with running.connect(b"GET / HTTP/1.1\r\nHost: " + raw + b"\r\n\r\n") as client:
            assert read_all(client)[:10] == b"HTTP/1.1 4", raw
    assert cloudflared.starts() == []
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    (start,) = cloudflared.starts()
    assert start["argv"][3:5] == ["--hostname", NAME]


def test_a_scan_of_ports_writes_no_line(launch, echo_server):
    """Nor do probes of a balancer, or what is no TLS: counters have them."""
    program = launch(route(echo_server.address))
    for number in range(100):
        with program.connect() as probe:
            reset(probe) if number % 2 else None
    for said in (b"SSH-2.0-OpenSSH\r\n", b"\0" * 100, HELLO[:50]):
        with program.connect(said) as probe:
            probe.shutdown(socket.SHUT_WR)
            read_all(probe)
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    program.wait_for("reason=client_closed")
    assert program.log().count("client=") == 1
    assert (counter(program, "accepted"), counter(program, "not_tls")) == (104, 2)


def test_oversized_record_is_refused_at_its_header(run, echo_server):
    """The client stalls; nobody waits for the deadline."""
    running = run(route(echo_server.address))
    with running.connect(b"\x16\x03\x01\xff\xff") as client:
        assert read_all(client) == alert(50)
    assert running.ending().seconds < 5


@pytest.mark.parametrize("size", [17423, 40_000, sniroute_wire.HELLO_MAX])
@pytest.mark.parametrize("piece", [1 << 20, 4096, 1000])
def test_a_hello_with_a_certificate_in_its_ticket_is_served(run, echo_server, size, piece):
    """A client that resumes has no shorter one; its first connection worked."""
    running = run(route(echo_server.address))
    said = records(hello_of(size), *[16384] * (size // 16384))
    with running.connect() as client:
        for at in range(0, len(said), piece):
            client.sendall(said[at:at + piece])
        assert read_exactly(client, len(said)) == said
    assert running.ending().reason == "client_closed"


def test_a_hello_that_is_too_large_has_a_line_at_info(run, echo_server, caplog):
    running = run(route(echo_server.address))
    with running.connect(records(hello_of(65535), 16384)[:9].replace(b"\0\xff\xff", b"\2\1\x44")) as client:
        assert read_all(client) == alert(50)
    ending = running.ending()
    assert (ending.reason, ending.level, ending.detail) == ("hello_too_large", logging.INFO, "a ClientHello of 131396 bytes")


def test_a_few_clients_may_have_a_large_hello_and_the_oldest_goes(run, echo_server, monkeypatch):
    """Whoever has said so much, and no end: memory is bounded over all clients."""
    monkeypatch.setattr(sniroute_connection, "LARGE_HELLOS_MAX", 3)
    running = run(route(echo_server.address))
    router = running.router
    whole = records(hello_of(65000), *[16384] * 4)
    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(5):
            clients.append(stack.enter_context(running.connect(whole[:40_000])))
            wait_until(lambda: len(router.large) == min(number + 1, 4))
        small = [stack.enter_context(running.connect(whole[:32_000])) for _ in range(5)]
        for client in clients[:2]:
            assert read_all(client) == b"", "as other silent clients: without a word"
        wait_until(lambda: running.counter("shed") == 2)
        for client in [*clients[2:], *small[:2]]:
            client.sendall(whole[40_000 if client in clients else 32_000:])
            assert read_exactly(client, len(whole)) == whole
        held = [c for c in router.large if sniroute_connection.holds_hello(c)]
        assert not held, "a backend has answered: nothing is kept for them"
    wait_until(lambda: not router.connections)
    router.call(router._sweep)
    wait_until(lambda: not router.large, what="nobody is remembered once it is over")


def test_a_large_hello_counts_until_its_backend_answers(run, cloudflared, ports, monkeypatch):
    monkeypatch.setattr(sniroute_connection, "LARGE_HELLOS_MAX", 1)
    cloudflared.fault("*", listen_delay=60_000)
    running = run(TUNNEL, ports)
    whole = records(hello_of(40_000), *[16384] * 2)
    with running.connect(whole) as first:
        wait_until(lambda: running.router.waits.by_key)
        with running.connect(whole):
            assert read_all(first) == b""
            assert running.ending().reason == "shed" and "hellos over 32 KiB" in running.ending().detail


def test_no_name_ok_is_for_debugging(run, echo_server):
    running = run(route(echo_server.address), "--no-name=ok")
    with running.connect(genuine(name=None)) as client:
        assert read_all(client) == b"OK\n"


def test_alert_is_read_though_the_client_goes_on_talking(run, echo_server):
    """Unread bytes at the close would reset the connection under the alert."""
    running = run(route(echo_server.address))
    with running.connect(genuine(name="other.example.com") + bytes(100_000)) as client:
        assert read_all(client) == alert(112)


def test_client_that_never_reads_its_alert_is_let_go(run, echo_server, monkeypatch):
    monkeypatch.setattr(sniroute_deadlines, "LINGER", 0.1)
    running = run(route(echo_server.address))
    with running.connect(genuine(name="other.example.com")) as client:
        running.ending()
        assert client.recv(7) == alert(112)


@pytest.mark.parametrize("prefix", [1, 5, 8, len(V1), len(V1) + 4, len(V1) + 8, len(V1) + 8 + 60])
def test_stall_after_any_part_of_the_prelude_ends_at_the_one_deadline(run, echo_server, prefix):
    """PROXY header, SSLRequest, hello: the deadline runs from accept, whatever is answered."""
    whole = V1 + ASK_TLS + HELLO
    seconds = 1.0 if prefix > len(V1) + 8 else 0.12  # in which the client says all that it is to say
    running = run(route(echo_server.address), f"--prelude-timeout={seconds * 1000:g}ms")
    with running.connect(whole[:min(prefix, len(V1) + 8)]) as client:
        if prefix > len(V1) + 8:
            assert read_exactly(client, 1) == b"S"
            client.sendall(whole[len(V1) + 8:prefix])
        assert read_all(client) in (b"", b"S", alert(50))
    end = running.ending()
    assert end.reason == "prelude_timeout"
    assert seconds - 0.01 < end.seconds < 5


def test_drip_does_not_renew_the_deadline(run, echo_server):
    running = run(route(echo_server.address), "--prelude-timeout=150ms")
    running.part_early()
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
    running = run(route(serve(answer(b"served")).address), "--prelude-timeout=60s")
    prelude = running.router.deadlines.prelude
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(running.connect(HELLO[:200])) for _ in range(300)]
        wait_until(lambda: len(prelude.due) == 300)
        for _ in range(20):
            with running.connect(HELLO) as client:
                assert read_exactly(client, 6) == b"served"
        assert running.counter("prelude_timeout") == 0
        def expire() -> None:
            for connection in prelude.due:
                prelude.due[connection] = running.router.loop.next_check = 0.0
        running.router.call(expire)
        for client in stalled:
            assert read_all(client) == alert(50)
    wait_until(lambda: running.counter("prelude_timeout") == 300)


# -- the backend -------------------------------------------------------------------------------


def test_a_connect_under_way_may_also_be_told_as_bsd_does(run, serve, deaf, monkeypatch):
    """There, send() on a socket that still connects is ENOTCONN."""
    class Bsd(socket.SocketType):
        def send(self, *said: Any) -> int:
            try:
                return super().send(*said)
            except BlockingIOError:
                raise OSError(errno.ENOTCONN, "Socket is not connected") from None
    monkeypatch.setattr(socket, "SocketType", Bsd)
    monkeypatch.setattr(sniroute_deadlines, "CONNECT_TIMEOUT", 0.1)
    running = run(route(deaf))
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert "no answer in 0.1 s" in str(running.ending().detail)


@pytest.mark.parametrize("early", [b"", b"0-RTT"])
def test_backend_with_nagle_does_not_wait_between_two_small_writes(run, serve, early):
    """Its kernel keeps the second until the first is acknowledged, so that ACK must not be one that Linux delays."""
    def server(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO) + len(early))
        sock.sendall(b"a")
        sock.sendall(b"b")
        read_all(sock)
    running = run(route(serve(server).address))
    took = [5.0]
    for number in range(10):  # a busy host may hold up some of them; an ACK that is delayed, each
        if min(took) < 0.04:
            break
        began = time.monotonic()
        with running.connect(HELLO) as client:
            if early:
                wait_until(lambda: [each.state for each in running.router.connections] == ["open"])
                client.sendall(early)
            assert read_exactly(client, 2) == b"ab"
            took.append(time.monotonic() - began)
        running.ending(number + 1)
    assert min(took) < 0.04  # Linux delays an ACK for so long at least


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is held, and that nobody listens on."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        yield sock.getsockname()[1]


def test_next_address_is_tried_and_the_last_failure_is_told(run, serve, monkeypatch, closed_port):
    far = serve(answer(b"x"))
    shut = closed_port
    running = run(route((HOST, shut)), route(far.address, "two.example.com"))
    good = (socket.AF_INET, far.address)
    bad = (socket.AF_INET, (HOST, shut))
    running.router.targets.resolved[f"two.example.com=tcp:{HOST}:{far.address[1]}"] = Resolved((bad, good), False, NEVER)
    with running.connect(genuine(name="two.example.com")) as client:
        assert client.recv(1) == b"x"
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    end, = wait_until(lambda: [end for end in running.endings if end.reason == "backend"])
    assert "refused" in end.detail


def test_connect_without_an_answer_times_out(run, monkeypatch, deaf):
    monkeypatch.setattr(sniroute_deadlines, "CONNECT_TIMEOUT", 0.2)
    running = run(route(deaf))
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    end = running.ending()
    assert "no answer in 0.2 s" in end.detail
    assert end.seconds - end.waited >= 0.2, "what it waited for is the time until its last dial"


def test_next_address_is_tried_when_the_first_does_not_answer(run, serve, monkeypatch, deaf):
    monkeypatch.setattr(sniroute_deadlines, "CONNECT_TIMEOUT", 0.2)
    far = serve(answer(b"x"))
    running = run(route((HOST, 9)))
    addresses = tuple((socket.AF_INET, address) for address in (deaf, far.address))
    running.router.targets.resolved[f"db.example.com=tcp:{HOST}:9"] = Resolved(addresses, True, NEVER)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"


def test_client_that_leaves_during_the_connect_is_noticed(run, deaf):
    running = run(route(deaf))
    running.connect(HELLO).close()
    assert running.ending().reason == "client_left"


# -- tunnels -----------------------------------------------------------------------------------


def test_descriptors_for_the_backend_that_run_out_are_not_the_tunnels_fault(run, serve, cloudflared, ports, monkeypatch):
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    running.ending()
    def none_left(*_: Any) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")
    with running.connect() as client:
        wait_until(lambda: len(running.router.connections) == 1)
        fake = types.SimpleNamespace(**{**vars(socket), "SocketType": none_left})
        with monkeypatch.context() as patch:
            patch.setattr(sniroute_targets, "socket", fake)
            client.sendall(HELLO)
            assert read_all(client) == alert(80)
    wait_until(lambda: [end for end in running.endings if end.reason == "busy"])
    assert len(cloudflared.starts()) == 1


def test_cold_name_starts_its_tunnel_and_idle_stops_it(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports, "--idle=300ms")
    idle, running.tunnels.idle = running.tunnels.idle, 60.0  # until the second has come
    for _ in range(2):
        with running.connect(HELLO) as client:
            assert client.recv(1) == b"x"
    assert len(cloudflared.starts()) == 1
    running.tunnels.idle = idle
    running.tunnels.wake()
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
    assert running.router.waits.threads == 0


def test_many_cold_names_start_a_few_at_a_time_and_all_are_answered(run, cloudflared, single_loop_echo, free_ports):
    cloudflared.far("*", single_loop_echo)
    for n in range(4):  # however slow this machine is, these are under way together
        cloudflared.fault(f"n{n}.example.com", listen_delay=250)
    first, last = free_ports(40)
    running = run(TUNNEL, f"--ports={first}-{last}", "--max-tunnels=40", "--start-timeout=60s")
    seen = []
    enter = running.tunnels._enter
    def watching(tunnel: Any, state: str) -> None:
        enter(tunnel, state)
        seen.append(sum(t.state == "starting" for t in running.tunnels.tunnels.values()))
    running.tunnels._enter = watching
    crowd(running, [genuine(name=f"n{n}.example.com") for n in range(40)])
    assert max(seen) == 4
    assert len(cloudflared.starts()) == 40


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
    assert sum(view.leases for view in running.tunnels.snapshot()) == 0


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
    cloudflared.far("*", serve(postgres_far(b"S")).address)
    cloudflared.fault("*", refuse=1)
    running = run(TUNNEL, ports)
    with running.connect(ASK_TLS) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_exactly(client, 3) == b"tls"


def test_hung_tunnel_is_found_out_and_restarted(run, serve, cloudflared, ports, monkeypatch):
    """SIGSTOP: its backlog still takes connections, and nobody answers."""
    monkeypatch.setattr(sniroute_deadlines, "FIRST_BYTE_TIMEOUT", 1.0)
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    pid = cloudflared.starts()[0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    assert len(cloudflared.starts()) == 2


def served_once(running: Running) -> None:
    """A client that gets its answer."""
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"


PUSHED = 8 << 20  # more than the kernel holds for a process that does not read


@pytest.mark.parametrize("early, later", [(b"0-RTT" * 40, b""), (b"", b"0-RTT" * 40), (b"", bytes(PUSHED))],
                         ids=["behind the hello", "a moment later", "without end"])
def test_hung_tunnel_is_found_out_by_clients_that_say_more_than_the_hello_too(run, serve, cloudflared, ports,
                                                                              monkeypatch, early, later):
    """What they said cannot be said again: they are refused in time, and the next client has a tunnel that works."""
    monkeypatch.setattr(sniroute_deadlines, "FIRST_BYTE_TIMEOUT", 0.3)
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports)
    patience = running.router.deadlines.first_byte
    patience.seconds = 20.0  # for those that are answered
    served_once(running)
    running.ending()
    patience.seconds = 0.3
    os.kill(cloudflared.starts()[0]["pid"], signal.SIGSTOP)
    with running.connect(HELLO + early) as client:
        wait_until(lambda: [c for c in list(running.router.connections) if c.state in ("unanswered", "early")])
        with contextlib.suppress(OSError):  # it is refused while it says that
            client.sendall(later)
        if len(later) < PUSHED:
            assert read_all(client) == alert(80)
    end = running.ending(2)
    assert (end.reason, end.detail) == ("tunnel_failed", f"{DB}: no answer within 0.3 s")
    assert 0.3 <= end.seconds < 5
    wait_until(lambda: len(cloudflared.starts()) == 2, what="another process")
    patience.seconds = 20.0
    served_once(running)
    assert running.counter("retries") == 0
    wait_until(lambda: not running.router.waits.by_key and not running.router.waits.threads)


def test_good_tunnel_is_not_restarted_because_a_client_that_said_more_was_refused(run, serve, cloudflared, ports):
    """It serves somebody else: doubt looks, and leaves it alone."""
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as other:
        assert other.recv(1) == b"x"
        cloudflared.fault("*", refuse=True)
        with running.connect(HELLO + b"0-RTT") as client:
            assert read_all(client) == alert(80)
        wait_until(lambda: not running.router.waits.by_key and not running.router.waits.threads)
        other.sendall(b"still here")
        assert read_exactly(other, 10) == b"still here"
    assert len(cloudflared.starts()) == 1


def test_backend_that_has_spoken_may_be_silent_for_as_long_as_it_likes(run, serve, cloudflared, ports, monkeypatch):
    monkeypatch.setattr(sniroute_deadlines, "FIRST_BYTE_TIMEOUT", 1.0)
    cloudflared.far("*", serve(answer(b"x", len(HELLO + b"0-RTT"))).address)
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        client.sendall(b"0-RTT")
        assert client.recv(1) == b"x"
        time.sleep(1.1)  # nothing happens then
        client.sendall(b"more")
        assert read_exactly(client, 4) == b"more"


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
        wait_until(lambda: [len(wait.connections) for wait in list(running.router.waits.by_key.values())] == [2]
                   and cloudflared.starts())
        first.close()
        assert running.ending().reason == "client_left"
        assert len(running.router.waits.by_key["*=" + DB].connections) == 1
        reset(second)
        assert running.ending(2).reason == "client_left"


def test_clients_that_leave_give_a_tunnel_no_bad_name(run, serve, cloudflared, ports):
    """They reset while it starts, and once it is up with their hello on its way: it serves the next one as ever."""
    cloudflared.far("*", serve(answer(b"x")).address)
    cloudflared.fault("*", listen_delay=200)
    running = run(TUNNEL, ports)
    for number in range(200):
        reset(running.connect(HELLO))
    for number in range(100):
        with running.connect(HELLO) as client:
            assert client.recv(1) == b"x"
        reset(running.connect(HELLO if number % 2 else HELLO + b"more"))
    running.ending(400)
    wait_until(lambda: not running.router.waits.by_key)
    assert len(cloudflared.starts()) == 1
    assert not running.tunnels.failures and running.tunnels.counters["crashes"] == 0


def test_a_client_that_is_silent_does_not_keep_its_tunnel_for_ever(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports, "--connection-idle=1s", "--idle=50ms")
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        assert running.ending().reason == "idle"
        wait_until(lambda: not running.tunnels.snapshot(), what="the idle stop")


def test_client_that_goes_on_talking_while_it_waits_loses_nothing(run, serve, cloudflared, ports, monkeypatch):
    """What does not fit waits in the kernel, not in memory."""
    far = serve(read_all)
    cloudflared.far("*", far.address)
    running = run(TUNNEL, ports)
    go, wait = threading.Event(), running.tunnels.wait
    monkeypatch.setattr(running.tunnels, "wait", lambda *words: (go.wait(10), wait(*words)))
    more = random.Random(3).randbytes(200_000)
    with running.connect(HELLO) as client:
        wait_until(lambda: running.router.waits.by_key)
        client.sendall(more)
        wait_until(lambda: [c for c in list(running.router.connections) if not c.up.events])
        assert max(len(c.hello) for c in running.router.connections) <= sniroute_connection.WAITING_MAX + 4096
        go.set()
    assert far.result() == HELLO + more


def test_start_that_takes_too_long_is_refused(run, cloudflared, ports):
    cloudflared.fault("*", never_listen=True)
    running = run(TUNNEL, ports, "--start-timeout=200ms")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason in ("tunnel_timeout", "tunnel_failed")


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
    port, pid = running.tunnels.snapshot()[0][3:5]
    held = threading.Event()
    real_exited = running.tunnels.processes._exited
    def slow(child: Any) -> None:
        held.wait(10)
        real_exited(child)
    for key in list(running.tunnels.processes.selector.get_map().values()):
        if key.data[0] == real_exited:
            running.tunnels.processes.selector.modify(key.fileobj, key.events, (slow, key.data[1]))
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
