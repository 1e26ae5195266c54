"""Tests of sniroute_probes.py and sniroute_checks.py: what each kind of check says and takes for good; what a backend sees of it; when it is
asked.

The protocols are first fed by hand, then asked of servers that misbehave, then of real ones.  The loop is turned by
the test, in its own thread; where the schedule is tested, under a clock that the test moves.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import http.server
import os
import pathlib
import pwd
import shutil
import socket
import socketserver
import ssl
import struct
import subprocess
import tempfile
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_checks
import sniroute_loop
from conftest import HOST, Address, FakeClock, deaf_listener, own_fds, wait_until
from sniroute_checks import AGAIN, AT_ONCE, JITTERS, Check, Checks, Shared, at_port
from sniroute_loop import Loop
from sniroute_probes import (COM_QUIT, HEAD_MAX, HEARD_MAX, KINDS, LINE_MAX, PACKET_MAX, PING, Dialogue, Health,
                             Question, Verdict, framed, parse_health)
from sniroute_refusals import Refused
from sniroute_targets import NO_PORT, Backend, UnixBackend, Unreachable
from sniroute_wire import SSL_REQUEST_BYTES
from testbed.clients import Database, program_path
from testbed.ports import free_port
from testbed.program import execute, namespace
from testbed.running import read_all, read_exactly

NAME = "db.example.com"
ACTIVE = ["connect", "tls", "postgres", "redis", "mysql", "http:80/", "https:443/"]
TALKING = ACTIVE[1:]

# -- the option --------------------------------------------------------------------------------


@pytest.mark.parametrize("text, health", [
    *((kind, Health(kind)) for kind in ("off", "passive", "connect", "tls", "postgres", "redis", "mysql")),
    ("http:8008/primary", Health("http", 8008, "/primary")),
    ("http:80/", Health("http", 80, "/")),
    ("https:8443/health?full=1&x=%20", Health("https", 8443, "/health?full=1&x=%20")),
])
def test_health_is_read(text, health):
    assert parse_health(text) == health


@pytest.mark.parametrize("text, words", [
    ("", "is none of off, passive, connect, mysql, postgres, redis, tls, http:PORT/PATH, https:PORT/PATH"),
    ("ping", "is none of"), ("tls:443", "is none of"), ("Redis", "is none of"), ("connect ", "is none of"),
    ("x\ny", "'x?y' is none of"),
    ("http", "is not http:PORT/PATH, as http:8008/primary"), ("http:", "is not http:PORT/PATH"),
    ("http:80", "is not http:PORT/PATH"), ("https:/x", "is not https:PORT/PATH"), ("http:0/", "is not http:"),
    ("http:65536/", "is not http:"), ("http:+80/", "is not http:"), ("http://example.com/", "is not http:"),
    ("http:80/a b", "no spaces"), ("http:80/a#b", "no #"), ("http:80/\u00e4", "ASCII"),
    ("http:80/a\r\nX: y", "no spaces"),
])
def test_a_health_that_is_none_is_explained(text, words):
    with pytest.raises(ValueError) as caught:
        parse_health(text)
    assert words in str(caught.value) and str(caught.value).isprintable()


# -- protocols without I/O ---------------------------------------------------------------------


def dialogue(kind: str, name: str = "") -> Dialogue:
    return Dialogue(Question(parse_health(kind), name, "192.0.2.1"))


def fed(kind: str, *answers: bytes, name: str = "", piece: int = 0) -> tuple[Verdict | None, bytes]:
    """What a dialogue makes of what comes, in pieces of so many bytes, and all that it says until its goodbye."""
    machine = dialogue(kind, name)
    said = machine.begin()
    for answer in answers:
        for at in range(0, len(answer), piece or len(answer)):
            assert machine.verdict is None, "it has ended before"
            reply = machine.receive(answer[at:at + (piece or len(answer))])
            if machine.verdict is None:
                said += reply
    return machine.verdict, said


SALT = bytes(range(1, 21))


def greeting(plugin: bytes = b"mysql_native_password", capabilities: int = 0x81BFF7FE) -> bytes:
    """What a MySQL server says first."""
    fixed = struct.pack("<B", 10) + b"8.0.40\0" + struct.pack("<I", 7) + SALT[:8] + b"\0" + struct.pack(
        "<HBHHB10x", capabilities & 0xFFFF, 45, 2, capabilities >> 16, 21)
    return framed(fixed + SALT[8:] + b"\0" + (plugin + b"\0" if capabilities & 0x80000 else b""), 0)


def fault(code: int, text: bytes, sequence: int = 2, state: bytes = b"#28000") -> bytes:
    return framed(b"\xff" + struct.pack("<H", code) + state + text, sequence)


LOGGED_IN = framed(b"\0\0\0\2\0\0\0", 2)
DENIED = fault(1045, b"Access denied for user 'sniroute'@'router' (using password: NO)")
HEAD = b"HTTP/1.1 %s\r\nContent-Length: 2\r\n\r\n"

GOOD_ANSWERS = {
    "pong": ("redis", b"+PONG\r\n"),
    "a password is needed": ("redis", b"-NOAUTH Authentication required.\r\n"),
    "PING is not allowed": ("redis", b"-NOPERM this user has no permissions to run the 'ping' command\r\n"),
    "an old redis": ("redis", b"-ERR operation not permitted\r\n"),
    "a proxy": ("redis", b"-ERR unknown command 'PING'\r\n"),
    "postgres without TLS": ("postgres", b"N"),
    "an account without a password": ("mysql", greeting(), LOGGED_IN),
    "no such account": ("mysql", greeting(), DENIED),
    "a locked account": ("mysql", greeting(), fault(4151, b"Access denied, this account is locked", 2, b"#HY000")),
    "TLS is needed": ("mysql", greeting(), fault(3159, b"Connections using insecure transport are prohibited")),
    "before plugins": ("mysql", greeting(capabilities=0xF7FF), LOGGED_IN),
    "another plugin": ("mysql", greeting(b"caching_sha2_password"),
                       framed(b"\xfemysql_native_password\0" + SALT + b"\0", 2), framed(b"\0\0\0\2\0\0\0", 4)),
    "a password by SHA-2": ("mysql", greeting(b"caching_sha2_password"), framed(b"\1\4", 2), fault(1045, b"no", 4)),
    "a login without an exchange": ("mysql", greeting(b"caching_sha2_password"),
                                    framed(b"\1\3", 2) + framed(b"\0\0\0\2\0\0\0", 3)),
    "200": ("http:80/", HEAD % b"200 OK"),
    "a body": ("http:80/", HEAD % b"200 OK" + b"ok"),
    "no reason": ("http:80/", HEAD % b"204"),
    "redirect": ("http:80/", HEAD % b"308 Permanent Redirect"),
    "HTTP/1.0": ("http:80/", b"HTTP/1.0 200 OK\r\n\r\n"),
    "early hints": ("http:80/", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n",
                    HEAD % b"200 OK"),
}


good_answers = pytest.mark.parametrize(
    "kind, answers", [(kind, answers) for kind, *answers in GOOD_ANSWERS.values()], ids=GOOD_ANSWERS)


@pytest.mark.parametrize("piece", [0, 1, 3], ids=["whole", "bytes", "pieces"])
@good_answers
def test_a_good_answer_is_good_in_whatever_pieces(kind, answers, piece):
    if answers[-1].endswith(b"\r\n\r\nok"):
        answers = [answers[0][:-2]] if piece else answers  # the head is enough
    verdict, _ = fed(kind, *answers, piece=piece)
    assert verdict.why == ""
    assert verdict.goodbye == (COM_QUIT if LOGGED_IN[4:] in answers[-1] else b"")


@good_answers
def test_each_part_of_a_good_answer_needs_more_and_then_an_end_is_told(kind, answers):
    whole = b"".join(answers).removesuffix(b"ok")
    for size in range(len(whole)):
        machine = dialogue(kind)
        machine.begin()
        if size:
            machine.receive(whole[:size])
        assert machine.verdict is None, whole[:size]
        machine.receive(b"")
        assert machine.verdict == Verdict(f"it closed {'in the middle of its' if size else 'without an'} answer")


BAD_ANSWERS = {
    "loading": ("redis", b"-LOADING Redis is loading the dataset in memory\r\n",
                "answered PING with -LOADING Redis is loading the dataset in memory"),
    "no master": ("redis", b"-MASTERDOWN Link with MASTER is down\r\n", "answered PING with -MASTERDOWN"),
    "too many clients": ("redis", b"-ERR max number of clients reached\r\n", "answered PING with -ERR max number"),
    "protected": ("redis", b"-DENIED Redis is running in protected mode\r\n", "answered PING with -DENIED"),
    "busy": ("redis", b"-BUSY Redis is busy running a script.\r\n", "answered PING with -BUSY"),
    "disk": ("redis", b"-MISCONF Errors writing to the AOF file\r\n", "answered PING with -MISCONF"),
    "not pong": ("redis", b"+PONGO\r\n", "answered PING with +PONGO"),
    "not redis": ("redis", b"HTTP/1.1 400 Bad Request\r\n", "it does not speak Redis: it said b'HTTP/1.1 400"),
    "nul": ("redis", b"\0", "it does not speak Redis: it said b'\\x00'"),
    "control characters": ("redis", b"-LOADING \x1b[31m\x07\r\n", "answered PING with -LOADING ?[31m?"),
    "a long line": ("redis", b"+" + b"P" * LINE_MAX, f"answered PING with a line of more than {LINE_MAX} bytes"),
    "not postgres": ("postgres", b"HTTP/1.1 400", "it does not speak PostgreSQL: it said b'HTTP/1.1 400'"),
    "postgres cannot": ("postgres", b"EFATAL: could not fork\0", "it answered SSLRequest with an error"),
    "bytes behind N": ("postgres", b"NN", "it does not speak PostgreSQL: it said b'NN'"),
    "bytes behind S": ("postgres", b"S\x16\3", "bytes behind its answer to SSLRequest"),
    "blocked": ("mysql", fault(1129, b"Host '192.0.2.2' is blocked because of many connection errors", 0, b""),
                "error 1129: Host '192.0.2.2' is blocked because of many connection errors"),
    "too many": ("mysql", fault(1040, b"Too many connections", 0, b"#08004"), "error 1040: Too many connections"),
    "not allowed": ("mysql", fault(1130, b"Host 'x' is not allowed to connect", 0, b""), "error 1130: Host 'x' is not"),
    "not mysql": ("mysql", b"SSH-2.0-OpenSSH_9.2\r\n", "it does not speak MySQL: it said b'SSH-2.0-OpenSSH_9.2"),
    "an empty packet": ("mysql", b"\0\0\0\0", "it does not speak MySQL"),
    "a large packet": ("mysql", (PACKET_MAX + 1).to_bytes(3, "little") + b"\0", "it does not speak MySQL"),
    "an old protocol": ("mysql", framed(b"\x095.0\0", 0), "it does not speak MySQL: it greets with protocol 9"),
    "a short greeting": ("mysql", framed(b"\x0a8.0\0" + bytes(30), 0), "its MySQL greeting is too short"),
    "no version": ("mysql", framed(b"\x0a" + b"8" * 60, 0), "its MySQL greeting is too short"),
    "503": ("http:80/", HEAD % b"503 Service Unavailable", "HTTP 503"),
    "404": ("http:80/", HEAD % b"404 Not Found", "HTTP 404"),
    "not http": ("http:80/", b"\x15\3\1\0\2\2\x46", "it does not speak HTTP/1.1: it said b'\\x15"),
    "http/2": ("http:80/", b"HTTP/2 200\r\n\r\n", "it does not speak HTTP/1.1"),
    "a bad status": ("http:80/", b"HTTP/1.1 2OO OK\r\n\r\n", "it does not speak HTTP/1.1: it said b'HTTP/1.1 2OO OK"),
    "a small status": ("http:80/", b"HTTP/1.1 099 X\r\n\r\n", "it does not speak HTTP/1.1"),
    "a long head": ("http:80/", b"HTTP/1.1 200 OK\r\nX: " + b"x" * HEAD_MAX,
                    f"an HTTP head of more than {HEAD_MAX} bytes"),
    "not tls": ("tls", b"HTTP/1.1 400 Bad Request\r\n\r\n", "TLS failed: "),
    "an alert": ("tls", b"\x15\3\3\0\2\2\x70", "TLS failed: tlsv1 unrecognized name"),
}


@pytest.mark.parametrize("kind, answer, words", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_bad_answer_is_told_in_words(kind, answer, words):
    verdict, _ = fed(kind, answer)
    assert words in verdict.why and verdict.why.isprintable() and len(verdict.why) < 256
    assert verdict.goodbye == b""


@pytest.mark.parametrize("case", sorted(BAD_ANSWERS.keys() - {"bytes behind N", "bytes behind S"}))
def test_a_bad_answer_is_told_in_whatever_pieces(case):
    """But for what comes behind PostgreSQL's one byte: when that comes alone, all is said."""
    kind, answer, _ = BAD_ANSWERS[case]
    machine = dialogue(kind)
    machine.begin()
    for at in range(len(answer)):
        machine.receive(answer[at:at + 1])
        if machine.verdict is not None:
            break
    assert machine.verdict.why and machine.verdict.why.isprintable()


def test_a_login_that_is_unfit_for_everybody_is_bad():
    for code in (1040, 1053):
        assert fed("mysql", greeting(), fault(code, b"whatever"))[0].why == f"error {code}: whatever"
    assert fed("mysql", greeting(), framed(b"\x42", 2))[0].why == "it answered a MySQL login with a packet of type 66"
    steps = [framed(b"\xfemysql_native_password\0" + SALT + b"\0", 2 * step) for step in range(1, 9)]
    assert fed("mysql", greeting(), *steps)[0].why == "its MySQL login has no end"


def test_a_mysql_login_has_no_password_and_the_plugin_that_the_server_has():
    login = struct.pack("<IIB23x", 0x88201, 1 << 24, 45) + b"sniroute\0"
    assert fed("mysql", greeting())[1] == framed(login + b"\0mysql_native_password\0", 1)
    assert fed("mysql", greeting(b"caching_sha2_password"))[1] == framed(login + b"\1\0caching_sha2_password\0", 1)
    switch = framed(b"\xfecaching_sha2_password\0" + SALT + b"\0", 2)
    assert fed("mysql", greeting(), switch)[1].endswith(framed(b"\0", 3)), "how that plugin is told of none"
    assert fed("mysql", greeting(), framed(b"\xfe", 2))[1].endswith(framed(b"", 3)), "an old server's"
    old = struct.pack("<IIB23x", 0x8201, 1 << 24, 45) + b"sniroute\0\0"
    assert fed("mysql", greeting(capabilities=0xF7FF))[1] == framed(old, 1)


def test_what_is_said_first():
    assert dialogue("redis").begin() == PING and dialogue("postgres").begin() == SSL_REQUEST_BYTES
    assert dialogue("mysql").begin() == b"", "the server speaks first"
    for kind, name, host in [("http:8008/primary?x=1", NAME, "db.example.com:8008"), ("http:80/", NAME, NAME),
                             ("http:443/", "", "192.0.2.1:443")]:
        lines = dialogue(kind, name).begin().decode().split("\r\n")
        assert lines[0] == f"GET {parse_health(kind).path} HTTP/1.1" and lines[-2:] == ["", ""]
        assert f"Host: {host}" in lines and "Connection: close" in lines
    for kind in ("tls", "https:443/", "redis", "mysql"):
        assert NAME.encode() in dialogue(kind, NAME).begin(), "SNI; clients that say a name speak TLS"


@pytest.mark.parametrize("kind", TALKING)
def test_a_stream_without_an_end_is_bounded(kind):
    """Whatever a backend says: in the end there is a verdict, and not much was kept."""
    for filler in (b"+" * 1000, b"HTTP/1.1 100 Continue\r\n\r\n" * 40, b"\x16\3\3\0\4\0\0\0\0" * 100,
                   framed(b"\1\3", 2) * 200):
        machine = dialogue(kind)
        machine.begin()
        sizes = 0
        while machine.verdict is None:
            machine.receive(filler)
            sizes += len(filler)
            assert sizes <= HEARD_MAX + len(filler)
        assert machine.verdict.why


# -- backends that misbehave -------------------------------------------------------------------


class Asker:
    """A loop that asks, turned by the test; what its checks leave behind fails the test."""

    def __init__(self) -> None:
        self.faults: list[Any] = []
        self.loop = Loop(self.faults.append)
        self.queue = functools.cache(self.loop.queue)
        self.shared = Shared(self.loop, self.queue)

    def begin(self, way: Backend | Address, health: str, name: str = "", timeout: float = 10.0,
              preface: bytes = b"") -> tuple[Check, list[str | None]]:
        """A check that has begun, and what it has told."""
        told: list[str | None] = []
        if not isinstance(way, Backend):
            way = Backend(f"tcp:{way[0]}:{way[1]}", ((socket.AF_INET, way),), True)
        check = Check(self.shared, parse_health(health), way, name, timeout, told.append, preface)
        check.open()
        return check, told

    def ask(self, *words: Any, **more: Any) -> str | None:
        """What a check tells."""
        check, told = self.begin(*words, **more)
        while not told:
            self.loop.turn()
        assert check.sock is None
        return told[0]

    def close(self) -> None:
        left = [item for queue in self.loop.queues for item in queue.due]
        self.loop.close()
        assert not left and not self.faults


@pytest.fixture
def asker() -> Iterator[Asker]:
    made = Asker()
    yield made
    made.close()


def hears(sock: socket.socket) -> bytes | OSError:
    """A handler that says nothing; all that came, or how the connection broke."""
    return read_all(sock)


@pytest.mark.parametrize("health", ACTIVE)
def test_a_backend_that_refuses(asker, health):
    with socket.socket() as shut:  # its port is held, and nobody listens there
        shut.bind((HOST, 0))
        assert asker.ask(shut.getsockname(), health) == "Connection refused"


@pytest.mark.parametrize("health", ACTIVE)
def test_a_backend_that_is_deaf(asker, deaf, health):
    assert asker.ask(deaf, health, timeout=0.1) == "no answer in 0.1 s"


class Starving:
    """A socket that finds no memory for what it reads."""

    def __init__(self, sock: socket.SocketType):
        self.sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def recv(self, *_: int) -> bytes:
        raise MemoryError


def test_a_good_backend_whose_end_cannot_be_read_for_lack_of_memory_is_good(asker, serve):
    """The check ends: it would be woken for that end all the while."""
    check, told = asker.begin(serve(lambda sock: None).address, "connect")
    while check.state != sniroute_checks.LEAVING:
        asker.loop.turn()
    check.sock = Starving(check.sock)
    while not told:
        asker.loop.turn()
    assert told == [""] and check.sock is None


@pytest.mark.parametrize("health", TALKING)
def test_a_backend_that_is_silent(asker, serve, health):
    server = serve(hears)
    assert asker.ask(server.address, health, timeout=0.1) == "it took the connect, but gave no answer in 0.1 s"


@pytest.mark.parametrize("health", TALKING)
def test_a_backend_that_closes_at_once(asker, serve, health):
    assert asker.ask(serve(lambda sock: None).address, health) in (
        "it closed without an answer", "it closed in the TLS handshake", "Connection reset by peer")


@pytest.mark.parametrize("health", TALKING)
def test_a_backend_that_breaks_off(asker, serve, health):
    def handler(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert asker.ask(serve(handler).address, health) == "Connection reset by peer"


@pytest.mark.parametrize("health", TALKING)
@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "bytes"])
def test_a_backend_that_talks_garbage(asker, serve, health, pieces):
    garbage = bytes(range(7, 200)) * 3
    def handler(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in ([garbage[at:at + 1] for at in range(len(garbage))] if pieces else [garbage]):
            sock.sendall(piece)
        read_all(sock)
    why = asker.ask(serve(handler).address, health)
    assert why.startswith(("it does not speak ", "TLS failed: ")) and why.isprintable()


@pytest.mark.parametrize("health, start", [
    ("redis", b"+"), ("http:80/", b"HTTP/1.1 200 OK\r\n"), ("mysql", b"\0\1\0\0"), ("postgres", b"N"),
    ("tls", b"\x16\3\3\0\4\0\0\0\0")])
def test_a_backend_whose_answer_has_no_end(asker, serve, health, start):
    def handler(sock: socket.socket) -> None:
        sock.sendall(start)
        while True:
            sock.sendall(b"x: yyyyyyy" * 1000)
    server = serve(handler)
    health = aimed(health, server.address)
    why = asker.ask(server.address, health)
    if health != "postgres" or why:  # N may come alone: then all is said
        assert "more than" in why or "does not speak" in why or "TLS failed" in why
    assert isinstance(server.result(), OSError)


def aimed(health: str, address: Address) -> str:
    """The check of HTTP, at the port of a server."""
    return f"http:{address[1]}/" if health.startswith("http:") else health


def test_a_good_backend_that_stays_is_left_after_a_while(asker, serve, monkeypatch):
    """It says nothing to the FIN.  Nobody waits for ever, and it was good."""
    release = threading.Event()
    monkeypatch.setattr(asker.shared.leaving, "seconds", 0.05)
    server = serve(lambda sock: release.wait(10))
    try:
        assert asker.ask(server.address, "connect", timeout=0.01) == "", "that time was for the answer"
    finally:
        release.set()


def test_a_good_backend_that_talks_on_is_left(asker, serve):
    def handler(sock: socket.socket) -> None:
        while True:
            sock.sendall(bytes(65536))
    server = serve(handler)
    assert asker.ask(server.address, "connect") == ""
    assert isinstance(server.result(), OSError)


def test_a_good_backend_sees_an_end_and_no_reset(asker, serve):
    """Also where it speaks first, after the connect was proof enough."""
    def handler(sock: socket.socket) -> bytes:
        sock.sendall(b"220 mail.example.com ESMTP\r\n")
        heard = read_all(sock)
        sock.sendall(b"221 bye\r\n")
        return heard
    server = serve(handler)
    for _ in range(20):
        assert asker.ask(server.address, "connect") == ""
        assert server.result() == b""


def test_a_check_that_is_closed_tells_nothing(asker, serve, deaf):
    server = serve(hears)
    for address in (deaf, server.address):
        check, told = asker.begin(address, "redis")
        for _ in range(2):
            asker.loop.call(lambda: None)
            asker.loop.turn()
        check.close()
        check.close()
        assert not told and check.sock is None
    assert server.result() in (PING, b"")


def test_a_preface_comes_first(asker, serve):
    def handler(sock: socket.socket) -> bytes:
        heard = read_exactly(sock, 4 + len(PING))
        sock.sendall(b"+PONG\r\n")
        return heard + read_all(sock)
    server = serve(handler)
    assert asker.ask(server.address, "redis", preface=b"HEAD") == ""
    assert server.result() == b"HEAD" + PING
    server = serve(hears)
    assert asker.ask(server.address, "connect", preface=b"HEAD") == ""
    assert server.result() == b"HEAD"


def test_what_does_not_fit_at_once_is_sent_in_parts(asker, serve):
    """A hello always fits; nothing is lost where it does not."""
    preface = bytes(8_000_000)
    def handler(sock: socket.socket) -> bool:
        whole = read_exactly(sock, len(preface) + len(PING)) == preface + PING
        sock.sendall(b"+PONG\r\n")
        return whole
    server = serve(handler)
    assert asker.ask(server.address, "redis", preface=preface) == ""
    assert server.result()


# -- the way there -----------------------------------------------------------------------------


def several(*addresses: Address) -> Backend:
    return Backend("tcp:db.example.com:1", tuple((socket.AF_INET, address) for address in addresses), True)


def test_the_next_address_is_asked_where_one_refuses(asker, serve):
    server = serve(hears)
    with socket.socket() as shut:  # its port is held, and nobody listens there
        shut.bind((HOST, 0))
        address = shut.getsockname()
        assert asker.ask(several(address, server.address), "connect") == ""
        assert asker.ask(several(address, address), "connect") == "Connection refused"


def test_a_silent_address_does_not_hold_up_the_others(asker, serve, deaf):
    server = serve(hears)
    assert asker.ask(several(deaf, server.address), "connect", timeout=5) == ""
    assert server.result() == b""


def test_several_silent_addresses_have_one_deadline(asker, deaf):
    with deaf_listener() as other:
        why = asker.ask(several(deaf, other), "redis", timeout=0.6)
    assert why.count("no answer in") == 2


def test_an_address_that_answers_late_and_none_that_is_left(asker, deaf, free_ports):
    """The race ends without a winner: its last address refuses."""
    nobody = (HOST, free_ports(1)[0])
    check, told = asker.begin(several(deaf, nobody), "connect", timeout=2)
    while check.way.race is None:
        asker.loop.turn()
    attempt = check.way.race.attempts[0]
    check.way.race.drop(attempt, "it was dropped")
    while not told:
        asker.loop.turn()
    assert told == ["it was dropped; Connection refused"]


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="sniroute-") as folder:
        yield f"{folder}/socket"


def unix(path: str) -> UnixBackend:
    return UnixBackend(f"unix:{path}", ((socket.AF_UNIX, path),), True)


def test_a_unix_socket_is_asked_and_its_full_backlog_is_waited_for(asker, path):
    assert asker.ask(unix(path), "redis") == "No such file or directory"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as filler:
        listener.bind(path)
        listener.listen(0)
        filler.connect(path)
        assert asker.ask(unix(path), "redis", timeout=0.2) == "no answer in 0.2 s", "its backlog is full"
        check, told = asker.begin(unix(path), "http:1/")
        listener.accept()[0].close()
        def serve() -> None:
            client = listener.accept()[0]
            with client:
                head.append(client.recv(4096))
                client.sendall(HEAD % b"200 OK" + b"ok")
        head: list[bytes] = []
        thread = threading.Thread(target=serve)
        thread.start()
        while not told:
            asker.loop.turn()
        thread.join()
    assert told == [""] and b"Host: localhost:1\r\n" in head[0]


def test_a_way_that_says_no(asker, serve):
    """As a tunnel's does where its process has ended, or did not take the connect yet."""
    class Way(Backend):
        answers = [BlockingIOError(errno.EALREADY, "again"), Unreachable("its process ended")]
        released = 0
        def connected(self, server: socket.SocketType) -> None:
            raise self.answers.pop(0)
        def release(self) -> None:
            super().release()
            self.released += 1
    server = serve(hears)
    way = Way("carrier:db.example.com", ((socket.AF_INET, server.address),), True)
    assert asker.ask(way, "connect") == "its process ended"
    assert way.released and not way.answers
    way = Way("carrier:db.example.com", ((socket.AF_INET, server.address),), True)
    way.answers = [OSError(errno.ECONNREFUSED, "Connection refused")]
    assert asker.ask(way, "connect") == "Connection refused"


def test_a_program_is_asked_where_it_has_no_address(asker):
    class Way(Backend):
        def begin(self) -> socket.SocketType | None:
            near, self.far = socket.socketpair()
            near.setblocking(False)
            self.far.sendall(b"+PONG\r\n")
            return near
    way = Way("exec:redis", (), True)
    check, told = asker.begin(way, "redis")
    with way.far:
        while check.state != "leaving":
            asker.loop.turn()
        assert read_all(way.far) == PING
    while not told:
        asker.loop.turn()
    assert told == [""]


def test_nothing_is_known_where_this_host_has_no_descriptor(asker):
    class Way(Backend):
        def begin(self) -> None:
            raise OSError(errno.EMFILE, "Too many open files")
    assert asker.ask(Way("tcp:x", (), True), "connect") is None


def test_nothing_is_known_where_this_host_has_no_port_to_dial_from(asker):
    class Way(Backend):
        def begin(self) -> None:
            self.tell((socket.AF_INET, ("192.0.2.1", 1)), NO_PORT)
    assert asker.ask(Way("tcp:x", (), True), "connect") is None


def test_a_fault_of_ours_ends_the_check(asker, serve, monkeypatch):
    monkeypatch.setitem(KINDS, "redis", KINDS["redis"]._replace(talk=lambda question: iter(())))
    assert asker.ask(serve(hears).address, "redis") is None
    assert len(asker.faults) == 1 and isinstance(asker.faults.pop(), Check)


def test_another_port_of_the_same_host(asker):
    rows = ((socket.AF_INET, ("192.0.2.1", 5432)), (socket.AF_INET6, ("2001:db8::1", 5432, 0, 0)))
    way = at_port(Backend("tcp:db.example.com:5432", rows, False), 8008)
    assert way.addresses == [(socket.AF_INET, ("192.0.2.1", 8008)), (socket.AF_INET6, ("2001:db8::1", 8008, 0, 0))]
    assert not way.local and way.target == "tcp:db.example.com:5432"
    assert at_port(Backend("tcp:192.0.2.1:5432", rows[:1], False), 8008).target == "tcp:192.0.2.1:8008"
    class Tunnel(Backend):
        proven_by_connect = False
    for way in (unix("/x"), Tunnel("carrier:db.example.com", rows, True)):
        with pytest.raises(Unreachable, match=f"^{way.target} has no port 8008$"):
            at_port(way, 8008)


# -- TLS and HTTP ------------------------------------------------------------------------------


@pytest.fixture
def https(certificate, serve) -> Callable[..., Any]:
    """https(answer, version) -> a server that speaks TLS, and says what it heard and which name it was asked for."""
    def made(answer: bytes = b"", version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Any:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        context.minimum_version = context.maximum_version = version
        names = []
        context.sni_callback = lambda sock, name, context: names.append(name)
        def handler(sock: socket.socket) -> tuple[Any, bytes]:
            sock.settimeout(10)
            with context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as tls:
                heard = tls.recv(4096)
                if answer:
                    tls.sendall(answer)
                    assert tls.recv(4096) == b""
                tls.unwrap()
                return names[-1], heard
        return serve(handler)
    return made


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_is_a_whole_handshake_and_an_orderly_end(asker, https, version):
    """A certificate that nobody vouches for.  With TLS 1.3 the server sends tickets behind the handshake."""
    server = https(version=version)
    for name in (NAME, ""):
        assert asker.ask(server.address, "tls", name) == ""
        assert server.result() == (name or None, b""), "close_notify, then FIN"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("status, why", [(b"200 OK", ""), (b"503 No", "HTTP 503")])
def test_https(asker, https, version, status, why):
    server = https(HEAD % status + b"ok", version)
    assert asker.ask(server.address, "https:8443/health", NAME) == why
    if not why:
        name, heard = server.result()
        assert name == NAME and heard.startswith(b"GET /health HTTP/1.1\r\nHost: db.example.com:8443\r\n")


def test_protocols_are_spoken_inside_tls_where_clients_say_a_name(asker, https, serve):
    server = https(b"+PONG\r\n")
    assert asker.ask(server.address, "redis", NAME) == ""
    assert server.result() == (NAME, PING)
    server = https(b"-LOADING x\r\n")
    assert asker.ask(server.address, "redis", NAME) == "answered PING with -LOADING x"


def test_mysql_inside_tls(asker, certificate, serve):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    def handler(sock: socket.socket) -> bytes:
        with context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as tls:
            tls.sendall(greeting())
            tls.recv(4096)
            tls.sendall(LOGGED_IN)
            heard = tls.recv(4096)
            assert tls.recv(4096) == b""
            return heard
    server = serve(handler)
    assert asker.ask(server.address, "mysql", NAME) == ""
    assert server.result() == COM_QUIT


@pytest.mark.parametrize("before, why", [
    (b"", "it closed without an answer"), (b"+PO", "it closed in the middle of its answer")])
@pytest.mark.parametrize("orderly", [False, True])
def test_an_end_inside_tls(asker, certificate, serve, before, why, orderly):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.num_tickets = 0
    def handler(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as tls:
            tls.recv(4096)
            tls.sendall(before)
            if orderly:
                with contextlib.suppress(OSError):
                    tls.unwrap()
            tls.shutdown(socket.SHUT_WR)
    assert asker.ask(serve(handler).address, "redis", NAME) == why


@pytest.mark.parametrize("health, answer", [
    ("tls", b""), ("https:443/", b"\x16\3\3"), ("postgres", b"S"), ("redis", b"")])
def test_an_end_in_the_handshake(asker, serve, health, answer):
    def handler(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(answer)
        if answer == b"S":
            sock.recv(4096)
        sock.shutdown(socket.SHUT_WR)
        read_all(sock)
    assert asker.ask(serve(handler).address, health, NAME) == "it closed in the TLS handshake"


def test_a_server_that_refuses_the_name(asker, certificate, serve):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.sni_callback = lambda sock, name, context: ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
    def handler(sock: socket.socket) -> None:
        with contextlib.suppress(ssl.SSLError):
            context.wrap_socket(sock, server_side=True).close()
    assert asker.ask(serve(handler).address, "tls", NAME) == "TLS failed: tlsv1 unrecognized name"


class Page(http.server.BaseHTTPRequestHandler):
    """Says what the path is for; its errors go to a list of the server's."""

    def do_GET(self) -> None:
        status = int(self.path.strip("/"))
        self.send_response(status)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(bytes(100000))
        self.server.hosts.append(self.headers["Host"])

    def log_message(self, *words: Any) -> None:
        """Nothing on stderr."""


class Web(socketserver.ThreadingMixIn, http.server.HTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        self.errors.append(client_address)


@pytest.fixture
def web() -> Iterator[Web]:
    with Web((HOST, 0), Page) as server:
        server.hosts, server.errors = [], []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_web_server(asker, web):
    """The answer is read whole, so that it meets no reset."""
    port = web.server_address[1]
    for status, why in [(200, ""), (301, ""), (404, "HTTP 404"), (500, "HTTP 500")]:
        assert asker.ask(web.server_address, f"http:{port}/{status}", NAME) == why
        if not why:
            wait_until(lambda: web.hosts)
            assert web.hosts.pop() == f"{NAME}:{port}"
    assert asker.ask(web.server_address, f"http:{port}/200") == ""
    wait_until(lambda: f"{HOST}:{port}" in web.hosts)


def test_another_protocol_than_the_check(asker, web, https):
    assert asker.ask(web.server_address, "tls", NAME) == "TLS failed: wrong version number"
    assert asker.ask(web.server_address, "redis").startswith("it does not speak Redis: it said b'")
    why = asker.ask(https().address, "http:1/")
    assert why.startswith(("it does not speak HTTP", "Connection reset", "it closed "))


# -- databases ---------------------------------------------------------------------------------


@pytest.fixture
def own_postgres(certificate, initdb) -> Iterator[Address]:
    """The address of a PostgreSQL that nobody has used."""
    with contextlib.closing(Database(certificate, initdb)) as database:
        yield database.address


def test_postgres_is_good_and_its_log_stays_empty(asker, own_postgres):
    postgres = own_postgres
    log = next(pathlib.Path(place.split(" ")[0]) for place in logs_of(postgres))
    before = log.read_text()
    for health in ("postgres", "connect"):
        for _ in range(20):
            assert asker.ask(postgres, health, NAME) == ""
    ended = execute(program_path("psql", "postgresql-client"), "-h", postgres[0], "-p", str(postgres[1]),
                    "-U", "postgres", "-Atc",
                    "select count(*) from pg_stat_activity where backend_type = 'client backend'",
                    said=b"")
    assert ended.stdout == b"1\n", "nobody else is connected"
    assert log.read_text() == before
    # The measure measures: an end that is less orderly is there at once.
    with socket.create_connection(postgres) as sock:
        sock.sendall(SSL_REQUEST_BYTES)
        assert read_exactly(sock, 1) == b"S"
    wait_until(lambda: log.read_text() != before)


def logs_of(address: Address) -> Iterator[str]:
    """The logs of the PostgreSQL that listens there."""
    for status in pathlib.Path(tempfile.gettempdir()).glob("sniroute-pg-*/data/postmaster.pid"):
        with contextlib.suppress(FileNotFoundError):
            if status.read_text().splitlines()[3] == str(address[1]):
                yield str(status.parent.parent / "log")


@contextlib.contextmanager
def running(words: list[Any], address: Address, log: pathlib.Path) -> Iterator[None]:
    """A server, until it listens, and then to the end of the block."""
    with open(log, "ab") as out:
        process = subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(address, 5):
            return True
        return False
    try:
        wait_until(ready, timeout=30, what=str(words[0]))
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def redis(tmp_path, free_ports) -> Iterator[Callable[..., Any]]:
    """redis(*options) -> the address of a Redis, and its log."""
    with contextlib.ExitStack() as stack:
        def made(*options: Any) -> tuple[Address, pathlib.Path]:
            address = HOST, free_ports(1)[0]
            log = tmp_path / f"{address[1]}.log"
            words = [program_path("redis-server", "redis-server"), "--port", address[1], "--bind", HOST, "--save", "",
                     "--dir", tmp_path, *options]
            stack.enter_context(running(words, address, log))
            return address, log
        yield made


def test_redis_is_good_and_its_log_stays_empty(asker, redis):
    address, log = redis()
    wait_until(lambda: "Ready to accept connections" in log.read_text())
    before = log.read_text()
    for health in ("redis", "connect"):
        for _ in range(20):
            assert asker.ask(address, health) == ""
    assert log.read_text() == before


def test_redis_that_needs_a_password_is_good(asker, redis):
    assert asker.ask(redis("--requirepass", "secret")[0], "redis") == ""


def test_redis_that_has_lost_its_master_is_bad(asker, redis, free_ports):
    address, _ = redis("--replicaof", f"{HOST} {free_ports(1)[0]}", "--replica-serve-stale-data", "no")
    assert asker.ask(address, "redis").startswith("answered PING with -MASTERDOWN Link with MASTER is down")


def test_redis_without_room_is_bad(asker, redis):
    address, _ = redis("--maxclients", "1")
    wait_until(lambda: asker.ask(address, "redis") == "", what="the connect that found it ready is over")
    with socket.create_connection(address) as client:
        client.sendall(PING)
        assert read_exactly(client, 7) == b"+PONG\r\n"
        assert asker.ask(address, "redis") == "answered PING with -ERR max number of clients reached"


def test_redis_that_speaks_tls(asker, redis, certificate, free_ports):
    port = free_ports(1)[0]
    _, log = redis("--tls-port", port, "--tls-cert-file", certificate.file, "--tls-key-file", certificate.key,
                   "--tls-auth-clients", "no")
    wait_until(lambda: "Ready to accept connections" in log.read_text())  # at both ports
    assert asker.ask((HOST, port), "redis", NAME) == ""
    assert asker.ask((HOST, port), "redis") != "", "in clear text"


# -- MariaDB -----------------------------------------------------------------------------------


class Maria:
    """A MariaDB that blocks a host after five connect errors.

    Those of a host without a name do not count, nor do those from 127.0.0.1: so 127.0.0.2 has a name there.
    """

    def __init__(self, folder: pathlib.Path, address: Address):
        self.folder = folder
        self.address = address
        self.log = folder / "log"

    def sql(self, text: str) -> str:
        ended = execute(program_path("mariadb", "mariadb-client"), "--no-defaults", "-S", str(self.folder / "socket"),
                        "-uroot", "-Nse", text, text=True, said="")
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def errors(self) -> int:
        """Connect errors that count."""
        return int(self.sql("select coalesce(sum(sum_connect_errors), 0) from performance_schema.host_cache"))


@pytest.fixture(scope="module")
def maria() -> Iterator[Maria]:
    server = shutil.which("/usr/sbin/mariadbd") or program_path("mariadbd", "mariadb-server")
    install = program_path("mariadb-install-db", "mariadb-server")
    with tempfile.TemporaryDirectory(prefix="sniroute-maria-") as name:
        folder = pathlib.Path(name)
        (folder / "hosts").write_text("127.0.0.1 localhost\n127.0.0.2 prober.example.com\n")
        inside = namespace("-m", f"mount --bind {folder}/hosts /etc/hosts")  # root's
        names = {entry.pw_name: entry for entry in pwd.getpwall()}
        user = names.get("mysql") or names["nobody"]
        os.chown(folder, user.pw_uid, user.pw_gid)
        ended = execute(install, "--no-defaults", f"--datadir={folder}/data", "--skip-test-db",
                        "--auth-root-authentication-method=normal", user=user.pw_uid, group=user.pw_gid,
                        extra_groups=[])
        assert ended.returncode == 0, ended.stderr
        address = HOST, free_port()
        words = [*inside, server, "--no-defaults", f"--datadir={folder}/data", f"--socket={folder}/socket",
                 f"--port={address[1]}", f"--bind-address={HOST}", "--performance-schema=ON", "--max-connect-errors=5",
                 f"--user={user.pw_name}"]
        with running(words, address, folder / "log"):
            made = Maria(folder, address)
            made.sql("create user somebody@'%' identified by 'x'")  # else no host is allowed to connect
            yield made


class FromElsewhere(Backend):
    """A way that begins at 127.0.0.2."""

    def set_options(self, server: socket.SocketType) -> None:
        server.bind(("127.0.0.2", 0))


def prober(maria: Maria) -> Backend:
    return FromElsewhere("tcp:mariadb", ((socket.AF_INET, maria.address),), True)


@pytest.mark.parametrize("account, lines", [
    ("", 20), ("create user sniroute@'%'", 0), ("create user sniroute@'%' account lock", 0),
    ("create user sniroute@'%' identified by 'x'", 20), ("create user sniroute@'%' require ssl", 20),
], ids=["none", "no password", "locked", "password", "tls"])
def test_mysql_is_good_and_what_its_log_says_depends_on_the_account(asker, maria, account, lines):
    maria.sql(f"drop user if exists sniroute@'%'; {account}")
    before = maria.log.read_text().count("\n")
    for _ in range(20):
        assert asker.ask(prober(maria), "mysql") == ""
    wait_until(lambda: maria.log.read_text().count("\n") >= before + lines)
    wait_until(lambda: maria.sql("select count(*) from information_schema.processlist where user <> 'root'") == "0\n")
    assert maria.log.read_text().count("\n") == before + lines
    assert maria.errors() == 0


def test_a_mysql_that_blocks_this_host_is_bad(asker, maria):
    """So the measure above measures: who leaves without a login is counted."""
    for _ in range(5):
        assert asker.ask(prober(maria), "connect") == ""
    assert asker.ask(prober(maria), "mysql").startswith("error 1129: Host '127.0.0.2' is blocked because of many ")
    assert maria.errors() == 5
    maria.sql("flush hosts")
    assert asker.ask(prober(maria), "mysql") == ""


def test_a_mysql_without_room_is_bad(asker, maria):
    maria.sql("set global max_connections = 10")
    with contextlib.ExitStack() as stack:
        def is_greeted() -> bool:  # what has just ended may still count, so that one too many has no place yet
            client = stack.enter_context(socket.create_connection(maria.address))
            return read_exactly(client, 5)[4] == 10
        for _ in range(11):
            wait_until(is_greeted)
        assert asker.ask(maria.address, "mysql") == "error 1040: Too many connections"
    maria.sql("set global max_connections = 100")


# -- the schedule ------------------------------------------------------------------------------


class Member:
    """A subject whose ways a test gives: an address, None, or what is raised."""

    def __init__(self, leads: Any, health: str = "connect", name: str = "", interval: float = 10.0,
                 timeout: float = 2.0, preface: bytes = b""):
        self.leads = leads
        self.target = f"tcp:{leads}"
        self.health, self.name, self.preface = parse_health(health), name, preface
        self.interval, self.timeout = interval, timeout
        self.asked: list[float] = []
        self.heard: list[str] = []

    def way(self) -> Backend | None:
        self.asked.append(sniroute_loop.monotonic())
        if isinstance(self.leads, Exception):
            raise self.leads
        return self.leads and Backend(self.target, ((socket.AF_INET, self.leads),), True)

    def hear(self, why: str) -> None:
        self.heard.append(why)


class Timetable:
    """Checks under a clock and dice of the test's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.clock = FakeClock()
        monkeypatch.setattr(sniroute_loop, "monotonic", self.clock)
        self.faults: list[Any] = []
        self.loop = Loop(self.faults.append)
        self.luck = 0.5
        self.checks = Checks(self.loop, functools.cache(self.loop.queue), lambda: self.luck)
        self.pass_by(0)

    def pass_by(self, seconds: float, step: float = 0.25) -> None:
        """So much time, in steps; at each, connects and ends take as long as they take, and no time."""
        end = self.clock.now + seconds
        while True:
            for _ in range(2):  # what is due, and what waited for room
                self.turn()
                self.settle(lambda: all(each.check is None or each.check.state == "talking"
                                        for each in self.checks.rounds.values()))
            if self.clock.now >= end:
                return
            self.clock.jump(min(step, end - self.clock.now))

    def turn(self) -> None:
        self.loop.call(lambda: None)
        self.loop.turn()

    def settle(self, done: Callable[[], Any]) -> None:
        """Turn until it is so, at this time."""
        def one() -> Any:
            self.turn()
            return done()
        wait_until(one)


@pytest.fixture
def timetable(monkeypatch) -> Iterator[Timetable]:
    made = Timetable(monkeypatch)
    yield made
    made.checks.close()
    left = [item for queue in made.loop.queues for item in queue.due if queue is not made.checks.turn]
    made.loop.close()
    assert not left and not made.faults and not made.checks.running and not made.checks.waiting


def test_a_member_is_asked_at_its_interval_and_told(timetable, echo_server):
    member = Member(echo_server.address)
    timetable.checks.adopt([member])
    timetable.pass_by(2)
    assert not member.asked, "half of START_WITHIN is the time of the first one, by these dice"
    timetable.pass_by(99)
    assert len(member.asked) in (9, 10, 11) and set(member.heard) == {""}
    gaps = {round(b - a, 1) for a, b in zip(member.asked, member.asked[1:])}
    assert all(9.0 <= gap <= 11.3 for gap in gaps)


def test_a_beat_that_finds_no_memory_is_not_the_last_one(timetable, echo_server, monkeypatch):
    member, left = Member(echo_server.address), [1]
    timetable.checks.adopt([member])
    def chance() -> float:
        if left:
            left.pop()
            raise MemoryError
        return 0.5
    monkeypatch.setattr(timetable.checks, "chance", chance)
    monkeypatch.setattr(sniroute_loop.time, "sleep", lambda seconds: None)
    timetable.pass_by(5)
    assert not left and timetable.faults == [*timetable.checks.rounds.values()]
    timetable.faults.clear()
    timetable.pass_by(20)
    assert len(member.asked) >= 2


def test_first_checks_are_spread_and_intervals_differ(timetable, echo_server):
    members = [Member(echo_server.address, "connect", preface=b"%d" % number) for number in range(JITTERS)]
    for number, member in enumerate(members):  # the dice fall in order
        timetable.luck = number / JITTERS
        timetable.checks.adopt(members[:number + 1])
    began = timetable.clock.now
    timetable.pass_by(5)
    firsts = [member.asked[0] - began for member in members]
    assert firsts == sorted(firsts) and firsts[0] == 0 and 4 < firsts[-1] < 5 and len(set(firsts)) > 10
    for luck, low, high in [(0.0, 9.0, 9.25), (1 - 1 / JITTERS, 11.0, 11.25)]:
        timetable.luck = luck
        timetable.pass_by(25)
        for member in members:
            assert low <= member.asked[-1] - member.asked[-2] <= high
    assert len({queue.seconds for queue in timetable.loop.queues}) < 3 * JITTERS, "a bounded number of queues"


def test_a_short_interval_is_its_own_start(timetable, echo_server):
    member = Member(echo_server.address, interval=1)
    timetable.luck = 0.99
    timetable.checks.adopt([member])
    timetable.pass_by(1.25)
    assert member.asked


def test_who_wants_the_same_of_the_same_shares_a_check(timetable, echo_server):
    """As 500 routes to one host do."""
    same = [Member(echo_server.address, "connect", f"{number}.example.com") for number in range(500)]
    others = [Member(echo_server.address, "connect", timeout=1), Member(echo_server.address, "connect", interval=5),
              Member(echo_server.address, "connect", preface=b"HEAD")]
    timetable.checks.adopt([*same, *others])
    assert len(timetable.checks.rounds) == 4
    timetable.pass_by(6)
    assert sum(len(member.asked) for member in same) == 1 and all(member.heard == [""] for member in same)
    names = [Member(echo_server.address, "tls", name) for name in ("a.example.com", "b.example.com", "a.example.com")]
    timetable.checks.adopt(names)
    assert len(timetable.checks.rounds) == 2, "what TLS is asked depends on the name"


def test_a_slow_backend_is_not_asked_twice_at_once(timetable, serve):
    """The interval is shorter than the time that an answer may take."""
    release = threading.Event()
    server = serve(lambda sock: (release.wait(10), sock.sendall(b"+PONG\r\n"), read_all(sock)))
    member = Member(server.address, "redis", interval=1, timeout=30)
    timetable.checks.adopt([member])
    timetable.pass_by(10)
    assert len(member.asked) == 1 and timetable.checks.running == 1 and not member.heard
    release.set()
    timetable.settle(lambda: member.heard)
    timetable.pass_by(1.5)
    assert len(member.asked) == 2
    timetable.settle(lambda: len(member.heard) == 2)


def test_a_silent_backend_is_told_at_each_beat_that_it_had_time_for(timetable, serve):
    member = Member(serve(hears).address, "redis", interval=1, timeout=2.5)
    timetable.checks.adopt([member])
    timetable.pass_by(20)
    assert set(member.heard) == {"it took the connect, but gave no answer in 2.5 s"} and 5 <= len(member.heard) <= 8


def test_checks_at_once_are_limited_and_nobody_is_forgotten(timetable, serve, monkeypatch):
    monkeypatch.setattr(sniroute_checks, "AT_ONCE", 3)
    release = threading.Event()
    server = serve(lambda sock: (release.wait(10), sock.sendall(b"+PONG\r\n"), read_all(sock)))
    members = [Member(server.address, "redis", preface=b"%d" % number, timeout=1000) for number in range(10)]
    timetable.checks.adopt(members)
    timetable.pass_by(30)
    assert sum(len(member.asked) for member in members) == 3
    assert timetable.checks.running == 3 and len(timetable.checks.waiting) == 7
    release.set()
    timetable.settle(lambda: all(member.heard for member in members))
    assert all(member.heard == [""] for member in members) and AT_ONCE > 200


def test_who_is_not_ready_is_asked_again_soon(timetable, echo_server):
    """A host that has to be resolved, a tunnel that does not run: that says nothing of the backend."""
    member = Member(None, interval=60)
    timetable.checks.adopt([member])
    timetable.pass_by(20)
    assert not member.heard and 15 <= len(member.asked) <= 18
    assert min(b - a for a, b in zip(member.asked, member.asked[1:])) >= AGAIN
    member.leads = echo_server.address
    timetable.pass_by(1.5)
    assert member.heard == [""]


def test_a_way_that_is_refused_is_bad(timetable):
    members = [Member(Refused("forbidden", "localhost is 127.0.0.1\n, which")),
               Member(Unreachable("its process ended"))]
    timetable.checks.adopt(members)
    timetable.pass_by(5)
    assert members[0].heard == ["localhost is 127.0.0.1?, which"] and members[1].heard == ["its process ended"]


def test_nothing_is_heard_where_this_host_has_no_descriptors(timetable, echo_server):
    class Short(Backend):
        def begin(self) -> None:
            raise OSError(errno.ENFILE, "Too many open files in system")
    member = Member(echo_server.address)
    way, member.way = member.way, lambda: Short("tcp:x", (), True)
    timetable.checks.adopt([member])
    timetable.pass_by(5)
    assert not member.heard and not timetable.checks.running
    member.way = way
    timetable.pass_by(1.5)
    assert member.heard == [""]


def test_another_port_is_asked_without_the_preface(timetable, web):
    port = web.server_address[1]
    member = Member((HOST, 1), f"http:{port}/200", NAME, preface=b"PROXY UNKNOWN\r\n")
    timetable.checks.adopt([member])
    timetable.pass_by(4)
    timetable.settle(lambda: member.heard)
    assert member.heard == [""]
    member = Member(None, f"http:{port}/200")
    member.way = lambda: unix("/x")
    timetable.checks.adopt([member])
    timetable.pass_by(4)
    assert member.heard == [f"unix:/x has no port {port}"]


def test_a_reload_keeps_the_beat_and_forgets_who_has_gone(timetable, serve, echo_server):
    silent = Member(serve(hears).address, "redis")
    stays = Member(echo_server.address)
    timetable.checks.adopt([silent, stays])
    timetable.pass_by(3)
    assert timetable.checks.running == 1 and stays.heard == [""]
    for _ in range(50):
        again = Member(echo_server.address)
        timetable.checks.adopt([again])
        timetable.pass_by(0.1)
    assert not timetable.checks.running and not silent.heard, "its check was closed"
    assert not again.heard, "its time had not come"
    timetable.pass_by(6)
    assert again.heard == [""] and stays.heard == [""]


def test_who_has_gone_makes_room(timetable, serve, monkeypatch):
    monkeypatch.setattr(sniroute_checks, "AT_ONCE", 1)
    server = serve(hears)
    members = [Member(server.address, "redis", preface=bytes([number]), timeout=1000) for number in range(2)]
    timetable.checks.adopt(members)
    timetable.pass_by(5)
    assert [len(member.asked) for member in members] == [1, 0]
    timetable.checks.adopt(members[1:])
    timetable.pass_by(0)
    assert len(members[1].asked) == 1


def test_a_fault_in_who_is_told_ends_no_round(timetable, echo_server):
    member = Member(echo_server.address)
    member.hear = lambda why: 1 / 0
    timetable.checks.adopt([member])
    timetable.pass_by(30)
    assert len(member.asked) == 3 and len(timetable.faults) == 3
    timetable.faults.clear()


@pytest.mark.parametrize("health", ["connect", "redis"])
def test_a_thousand_checks_leave_nothing_behind(timetable, single_loop_echo, health):
    """The echo says PING for +PONG; what counts is that sockets and queues are as before."""
    before = len(own_fds())
    members = [Member(single_loop_echo, health, preface=b"%d" % number) for number in range(500)]
    timetable.checks.adopt(members)
    timetable.pass_by(14, 0.05)
    timetable.settle(lambda: not timetable.checks.running and not timetable.checks.waiting)
    assert sum(len(member.heard) for member in members) == sum(len(member.asked) for member in members) >= 500
    wait_until(lambda: len(own_fds()) == before, what="the far end has closed, too")
    waits = [len(queue.due) for queue in timetable.loop.queues if queue.act is not sniroute_checks.Round.beat]
    assert sum(waits) == 0 and sum(len(queue.due) for queue in timetable.loop.queues) == 500
