"""Tests of sniroute_single.py: a client that forwards by itself, as its callers and its log see it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute_ends
from conftest import HOST, Address, wait_until
from sniroute_nodepass import NodePass
from sniroute_nodeurl import parse_url, read_times
from sniroute_refusals import SettingsError
from sniroute_single import Single
from testbed.carrier import resolve_as
from testbed.running import read_all, read_exactly


class Lines:
    """A log that a test reads."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.lines: list[bytes] = []  # that wait for a reader: none do

    def __call__(self, level: str, message: str, **fields: str) -> None:
        self.said.append((level, message))

    def flush(self) -> None:
        pass

    def of(self, *levels: str) -> list[str]:
        return [message for level, message in self.said if level in levels]


class Forward:
    """A Single in a thread of its own."""

    def __init__(self, port: int, targets: list[Address], query: str = "", host: str = HOST, **environ: str):
        self.log = Lines()
        places = ",".join(f"{host}:{number}" for host, number in targets)
        options = parse_url(f"client://{host}:{port}/{places}?mode=1{query}")
        times, _ = read_times(environ)
        self.program = NodePass(self.log, times, {})
        self.single = Single(self.program, options, times)
        self.program.add_end(self.single)
        self.address = HOST, options.port
        self.thread = threading.Thread(target=self.program.run)
        self.thread.start()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, 10)

    def secure(self) -> ssl.SSLSocket:
        """A caller that speaks TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(self.connect(), suppress_ragged_eofs=False)

    def udp(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(self.address)
        sock.settimeout(10)
        return sock

    def close(self) -> None:
        self.program.loop.call(self.program.loop.stop)
        self.thread.join(10)
        assert not self.thread.is_alive() and not [line for line in self.log.of("error") if "fault" in line]
        assert self.single.slots.tcp == self.single.slots.udp == 0
        assert self.single.counts.tcps == self.single.counts.udps == 0


@pytest.fixture
def port(free_ports) -> int:
    """A port of this host that neither TCP nor UDP has."""
    return free_ports(2)[0] + 1  # a UDP socket marks the first one as taken


@pytest.fixture
def forward(port) -> Iterator[Callable[..., Forward]]:
    """forward(targets, query, VARIABLE=...) -> Forward, at `port`."""
    with contextlib.ExitStack() as stack:
        def make(*words: Any, **environ: Any) -> Forward:
            made = Forward(port, *words, **environ)
            stack.callback(made.close)
            return made

        yield make


PLAIN_OR_TLS = pytest.mark.parametrize("tls", ["", "&tls=1"], ids=["plain", "TLS"])
PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n"


def caller(made: Forward, tls: str) -> socket.socket:
    return made.secure() if tls else made.connect()


# -- there and back --------------------------------------------------------------------------------


@PLAIN_OR_TLS
@pytest.mark.parametrize("rate", ["", "&rate=800"], ids=["no rate", "a rate"])
def test_bytes_come_and_go(forward, echo_server, tls, rate):
    made = forward([echo_server.address], tls + rate)
    data = os.urandom(1 << 20)
    with caller(made, tls) as sock:
        for at in range(0, len(data), 1 << 16):  # in one thread: an SSLSocket takes no two at once
            sock.sendall(data[at:at + (1 << 16)])
            assert read_exactly(sock, 1 << 16) == data[at:at + (1 << 16)]
    wait_until(lambda: not made.single.slots.tcp)
    assert made.single.relays.moved() == (len(data), len(data))


def test_a_callers_end_is_an_end_for_the_target_and_its_answer_comes(forward, serve):
    far = serve(lambda sock: sock.sendall(b"%d bytes" % len(read_all(sock))))
    made = forward([far.address])
    with made.connect() as sock:
        sock.sendall(b"hello")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"5 bytes"


@PLAIN_OR_TLS
def test_a_targets_end_is_an_end_for_the_caller_and_the_rest_arrives(forward, serve, tls):
    def handler(sock: socket.socket) -> bytes:
        sock.sendall(b"bye")
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)

    far = serve(handler)
    made = forward([far.address], tls)
    with caller(made, tls) as sock:
        assert read_all(sock) == b"bye"
        sock.sendall(b"the rest")
        if not tls:
            sock.shutdown(socket.SHUT_WR)
        else:
            sock.unwrap().close()
        assert far.result() == b"the rest"


@PLAIN_OR_TLS
def test_what_is_cut_does_not_look_whole(forward, serve, tls):
    def handler(sock: socket.socket) -> None:
        sock.sendall(b"half")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.recv(1)
        sock.close()

    made = forward([serve(handler).address], tls)
    with caller(made, tls) as sock:
        assert read_exactly(sock, 4) == b"half"
        sock.sendall(b"x")
        with pytest.raises(OSError):
            assert not sock.recv(1) and pytest.fail("it looks whole")


def test_a_target_that_is_dead_is_passed_over(forward, echo_server, free_ports):
    made = forward([(HOST, free_ports(1)[0]), echo_server.address])
    for _ in range(2):
        with made.connect() as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"


@PLAIN_OR_TLS
def test_where_there_is_no_target_the_caller_sees_a_failure_and_the_log_says_why_once(forward, free_ports, tls):
    port, _ = free_ports(1)  # for TCP
    made = forward([(HOST, port)], tls)
    for _ in range(3):
        with contextlib.suppress(ConnectionResetError, ssl.SSLError), caller(made, tls) as sock:
            assert sock.recv(1) == b""
    line, = wait_until(lambda: made.log.of("warn"))
    assert line.endswith(f"no target: {HOST}:{port}: Connection refused") and f"{HOST}:{port}: {HOST}:" in line


def test_datagrams_come_and_go(forward):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        far.bind((HOST, 0))
        far.settimeout(10)
        made = forward([far.getsockname()])
        with made.udp() as sock:
            sock.send(b"hello")
            data, address = far.recvfrom(100)
            far.sendto(data + b" there", address)
            assert sock.recv(100) == b"hello there"
        counts = made.single.counts
        assert (counts.udps, counts.udprx, counts.udptx) == (1, 5, 11)


@pytest.mark.parametrize("host", [HOST, "::1"])
def test_without_a_host_callers_of_both_families_come(forward, host):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        far.bind((HOST, 0))
        far.settimeout(10)
        made = forward([far.getsockname()], "&notcp=1", "")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect((host, made.address[1]))
            except OSError:
                pytest.skip("needs IPv6 on loopback")
            sock.settimeout(10)
            wait_until(lambda: made.single.datagrams.port)
            sock.send(b"hello")
            data, address = far.recvfrom(100)
            far.sendto(data, address)
            assert sock.recv(100) == b"hello"
            shown = f"[{host}]" if ":" in host else host
            assert f"UDP: a flow of {shown}:{sock.getsockname()[1]} begins" in made.log.of("debug")


# -- TLS -------------------------------------------------------------------------------------------


def test_tls_ends_here_with_the_files_certificate(forward, echo_server, certificates):
    made = forward([echo_server.address], f"&tls=2&crt={certificates / 'edge.pem'}&key={certificates / 'edge.pem'}")
    with made.secure() as sock:
        sock.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"
        pem, end, _ = (certificates / "edge.pem").read_text().partition("-----END CERTIFICATE-----")
        assert sock.getpeercert(True) == ssl.PEM_cert_to_DER_cert(pem + end)


def test_files_that_are_none_stop_the_start(tmp_path):
    options = parse_url(f"client://{HOST}:1/{HOST}:2?mode=1&tls=2&crt={tmp_path}/no.crt&key={tmp_path}/no.key")
    program = NodePass(Lines(), read_times({})[0], {})
    with pytest.raises(SettingsError, match="crt"):
        Single(program, options, program.times)
    program.pipes.close()
    program.loop.close()


def test_a_handshake_has_a_deadline_and_no_target_is_dialled_before_it(forward, echo_server):
    made = forward([echo_server.address], "&tls=1", NP_HANDSHAKE_TIMEOUT="200ms")
    with made.connect() as sock:
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert "no TLS handshake in 0.2 s" in made.log.of("warn")[0]
    wait_until(lambda: not made.single.slots.tcp)  # it is counted out behind its reset
    assert not echo_server.accepted


def test_who_does_not_speak_tls_is_told_so_in_tls(forward, echo_server):
    made = forward([echo_server.address], "&tls=1")
    for _ in range(3):
        with made.connect() as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert read_all(sock)[:1] in (b"\x15", b"")
    assert len(wait_until(lambda: made.log.of("warn"))) == 1 and "TLS: " in made.log.of("warn")[0]
    assert not echo_server.accepted


def test_what_a_caller_says_before_the_target_is_there_is_not_lost(forward, serve):
    far = serve(lambda sock: read_exactly(sock, 300_000))
    made = forward([far.address], "&tls=1")
    data = os.urandom(300_000)
    with made.secure() as sock:
        sock.sendall(data)
        assert far.result() == data


def test_a_caller_that_ends_before_it_is_judged_is_passed_on(forward, serve):
    far = serve(read_all)
    made = forward([far.address], "&tls=1&block=2")
    with made.secure() as sock:
        sock.unwrap().close()
        assert far.result() == b""


@PLAIN_OR_TLS
def test_a_caller_that_leaves_before_its_target_is_there_is_over(forward, echo_server, monkeypatch, tls):
    release = threading.Event()
    asked = resolve_as(monkeypatch, lambda: [echo_server.address] if release.wait(10) else [])
    made = forward([("db.example.com", 1)], f"&proxy=1{tls}")
    try:
        with caller(made, tls) as sock:
            wait_until(lambda: asked)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    finally:
        release.set()
    wait_until(lambda: not made.single.slots.tcp and not made.single.upstreams.names.waiting)


# -- who may -----------------------------------------------------------------------------------------


@PLAIN_OR_TLS
@pytest.mark.parametrize("block, first, protocol", [
    ("1", b"\5\1\0", "SOCKS5"), ("1", b"\4\1", "SOCKS4"), ("2", b"GET ", "HTTP"), ("3", b"\x16", "TLS"),
    ("123", b"PROPFIND / HTTP/1.1\r\n", "HTTP")])
def test_a_blocked_protocol_is_refused_at_once(forward, echo_server, tls, block, first, protocol):
    made = forward([echo_server.address], f"&block={block}{tls}")
    with caller(made, tls) as sock:
        sock.sendall(first)
        with contextlib.suppress(ConnectionResetError, ssl.SSLError):
            assert sock.recv(1) == b""
    assert f"it speaks {protocol}, which block= refuses" in made.log.of("warn")[0]
    assert not echo_server.accepted


@PLAIN_OR_TLS
@pytest.mark.parametrize("first", [b"hi", b"G", b"\5", b"hello, is anybody there?\r\n"])
def test_what_is_not_blocked_passes_however_short_it_is(forward, echo_server, monkeypatch, tls, first):
    monkeypatch.setattr(sniroute_ends, "PEEK_LAST", 0.05)
    made = forward([echo_server.address], f"&block=123{tls}")
    with caller(made, tls) as sock:
        sock.sendall(first)
        assert read_exactly(sock, len(first)) == first


@PLAIN_OR_TLS
def test_a_server_that_speaks_first_is_heard_in_spite_of_block(forward, serve, monkeypatch, tls):
    monkeypatch.setattr(sniroute_ends, "PEEK_LAST", 0.05)
    far = serve(lambda sock: sock.sendall(b"SSH-2.0-x\r\n"))
    made = forward([far.address], f"&block=123{tls}")
    with caller(made, tls) as sock:
        assert read_all(sock) == b"SSH-2.0-x\r\n"


@PLAIN_OR_TLS
def test_one_caller_more_than_slots_is_refused_until_one_leaves(forward, echo_server, tls):
    made = forward([echo_server.address], f"&slot=2{tls}")

    def works(sock: socket.socket) -> bool:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError, ssl.SSLError):
            sock.sendall(b"x")
            return sock.recv(1) == b"x"
        return False

    with caller(made, tls) as one, caller(made, tls) as two:
        assert works(one) and works(two)
        with contextlib.suppress(ConnectionResetError, ssl.SSLError), caller(made, tls) as three:
            assert not works(three)
        assert "2 connections are open (slot=)" in made.log.of("warn")[0]
        two.close()
        wait_until(lambda: made.single.slots.tcp == 1)
        with caller(made, tls) as four:
            assert works(four)


@PLAIN_OR_TLS
@pytest.mark.parametrize("version", [1, 2])
def test_the_target_hears_who_the_caller_is(forward, serve, tls, version):
    far = serve(read_all)
    made = forward([far.address], f"&proxy={version}{tls}")
    with caller(made, tls) as sock:
        port = sock.getsockname()[1]
        sock.sendall(b"hello")
        if tls:
            sock.unwrap().close()
    said = far.result()
    if version == 1:
        assert said == f"PROXY TCP4 {HOST} {HOST} {port} {far.address[1]}\r\nhello".encode()
    else:
        assert said == PROXY_V2 + b"\x21\x11\0\x0c" + socket.inet_aton(HOST) * 2 + port.to_bytes(2, "big") \
            + far.address[1].to_bytes(2, "big") + b"hello"


@pytest.mark.parametrize("off", ["notcp", "noudp"])
def test_one_of_both_can_be_off(forward, echo_server, off):
    made = forward([echo_server.address], f"&{off}=1")
    wait_until(lambda: made.single.datagrams.port or made.program.listeners)
    if off == "notcp":
        with pytest.raises(ConnectionRefusedError):
            made.connect()
        assert made.single.datagrams.port is not None
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(made.address)
        made.connect().close()


def test_a_rate_slows_a_stream_and_does_not_stop_it(forward, echo_server):
    """The original's passes one second's worth, and then nothing."""
    made = forward([echo_server.address], "&rate=1")
    data = os.urandom(150_000)
    with made.connect() as sock:
        began = time.monotonic()
        for part in (data, b"more"):  # the second one waits for the debt of the first, 0.2 s
            sock.sendall(part)
            assert read_exactly(sock, len(part)) == part
        assert 0.15 < time.monotonic() - began < 5


def test_a_connection_that_is_silent_for_too_long_is_cut(forward, echo_server):
    made = forward([echo_server.address], "&read=1s")
    with made.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    wait_until(lambda: not made.single.slots.tcp)


# -- the address, and what is told -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["TCP", "UDP"])
def test_an_address_that_somebody_has_is_told_and_tried_again(forward, port, echo_server, kind):
    with socket.socket(socket.AF_INET, kind) as busy:
        busy.bind((HOST, port))
        if kind == socket.SOCK_STREAM:
            busy.listen()
        made = forward([echo_server.address], "", NP_SERVICE_COOLDOWN="50ms")
        wait_until(lambda: len(made.log.of("error")) >= 2)
        assert set(made.log.of("error")) == {
            f"cannot listen on {HOST}:{port}: address already in use; next try in 0.05 s"}
    wait_until(lambda: made.single.datagrams.port)
    with made.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"


def test_without_a_mode_it_is_found_out_whether_the_address_is_ours(port, echo_server):
    program = NodePass(Lines(), read_times({})[0], {})
    singles = [Single(program, parse_url(f"client://{host}/{HOST}:2"), program.times)
               for host in (f"{HOST}:{port}", f"{HOST}:{echo_server.address[1]}", "192.0.2.1:1")]
    assert [single.can_listen() for single in singles] == [True, False, False]
    for single in singles:
        single.close()
    program.loop.turn()
    program.pipes.close()
    program.loop.close()


def test_a_status_line_says_what_was_carried(forward, echo_server):
    made = forward([echo_server.address], "", NP_REPORT_INTERVAL="50ms")
    with made.connect() as sock:
        sock.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"
        line = r"CHECK_POINT\|MODE=1\|PING=\d+ms\|POOL=0\|TCPS=%d\|UDPS=0\|TCPRX=5\|TCPTX=5\|UDPRX=0\|UDPTX=0"
        wait_until(lambda: re.fullmatch(line % 1, made.log.of("event")[-1]))
    wait_until(lambda: re.fullmatch(line % 0, made.log.of("event")[-1]))
    assert made.log.of("event")[0] == "CHECK_POINT|MODE=1|PING=0ms|POOL=0|TCPS=0|UDPS=0|TCPRX=0|TCPTX=0|UDPRX=0|UDPTX=0"
