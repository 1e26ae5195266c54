"""Tests of sniroute_offload.py: real children."""

from __future__ import annotations

import base64
import contextlib
import os
import pathlib
import signal
import socket
import ssl
import subprocess
import sys
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_offload
from conftest import HERE, HOST, connect, echo, linux, wait_until
from sniroute_duplex import TcpWire, client_context, fingerprint, make_pair, server_context
from sniroute_layers import Wires
from sniroute_loop import READ, Loop, monotonic
from sniroute_offload import Offload, Order
from sniroute_refusals import Failed
from testbed.ports import free_port


class Bench:
    """An Offload in a loop that the test turns, and what became of one wire."""

    def __init__(self) -> None:
        self.faults: list[Any] = []
        self.loop = Loop(self.faults.append)
        self.wires = Wires(self.loop)
        self.offload = Offload(self.wires)
        self.tick = self.loop.timer(lambda: None)
        self.results: list[tuple[Any, str]] = []
        self.heard = bytearray()
        self.ends: list[Any] = []

    def until(self, predicate: Callable[[], Any]) -> Any:
        """Turn until it is true."""
        def turn() -> Any:
            self.tick.set(monotonic() + 0.005)
            self.loop.turn()
            assert not self.faults
            return predicate()

        return wait_until(turn, 20)

    def open(self, sock: socket.socket, order: Order) -> TcpWire:
        """Have the helper do TLS on a socket."""
        sock.setblocking(False)
        return self.offload.open(TcpWire(self.wires, sock), order, self.done)

    def done(self, result: Any, print: str) -> None:
        self.results.append((result, print))
        if not isinstance(result, Failed):
            result.on_data, result.on_end = self.heard.extend, self.ends.append

    def result(self) -> tuple[Any, str]:
        """What came of it, once."""
        self.until(lambda: self.results)
        found, = self.results
        self.results.clear()
        return found

    def close(self) -> None:
        self.offload.close()
        self.wires.close()
        self.loop.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


PAIR = make_pair("app.example.com")


@pytest.fixture
def serve_tls(serve) -> Callable[[Callable[[ssl.SSLSocket], None]], Any]:
    """serve_tls(act) -> Server: what it does in TLS."""
    context = server_context(PAIR)

    def make(act: Callable[[ssl.SSLSocket], None]) -> Any:
        def run(sock: socket.socket) -> None:
            with contextlib.suppress(OSError), context.wrap_socket(sock, server_side=True) as secure:
                act(secure)

        return serve(run)

    return make


def shout(sock: ssl.SSLSocket) -> None:
    """Answer in capitals, and end."""
    sock.sendall(sock.recv(100).upper())
    sock.unwrap()


def test_what_is_inside_tls_comes_as_plain_bytes_and_the_certificate_is_told(bench, serve_tls):
    bench.open(connect(serve_tls(shout).address), Order(False))
    wire, seen = bench.result()
    assert seen == fingerprint(PAIR.certificate)
    wire.send(b"hello")
    bench.until(lambda: bench.ends)
    assert (bench.heard, bench.ends) == (b"HELLO", [None])
    wire.close()


def test_a_server_whose_client_has_said_its_hello_already(bench):
    client, ours = socket.socketpair()
    with client:
        heard: list[bytes] = []

        def speak() -> None:
            secure = client_context(False).wrap_socket(client, server_hostname="app.example.com")
            secure.sendall(b"GET / HTTP/1.1\r\n")
            heard.append(secure.recv(100))
            secure.close()

        thread = threading.Thread(target=speak)
        thread.start()
        early = ours.recv(1 << 14)
        bench.open(ours, Order(True, "app.example.com", early=base64.b64encode(early).decode()))
        wire, _ = bench.result()
        bench.until(lambda: bench.heard == b"GET / HTTP/1.1\r\n")
        wire.send(b"HTTP/1.1 200 OK\r\n")
        bench.until(lambda: heard)
        thread.join(10)
        assert heard == [b"HTTP/1.1 200 OK\r\n"]
        wire.reset()


def test_a_certificate_that_is_not_trusted_is_a_failure_in_words(bench, serve_tls):
    bench.open(connect(serve_tls(shout).address), Order(False, "app.example.com", is_checked=True))
    failed, seen = bench.result()
    assert (failed.reason, seen) == ("certificate", "") and "self" in str(failed)


def test_a_peer_that_speaks_no_tls_is_a_failure(bench, serve):
    bench.open(connect(serve(lambda sock: sock.sendall(b"SSH-2.0-x\r\n" * 10)).address), Order(False))
    failed, _ = bench.result()
    assert isinstance(failed, Failed) and failed.reason in ("tls", "reset")


def test_more_than_a_handshake_is_not_carried(bench, serve_tls):
    bench.open(connect(serve_tls(lambda sock: sock.sendall(bytes(1 << 20))).address), Order(False))
    wire, _ = bench.result()
    bench.until(lambda: bench.ends)
    assert len(bench.heard) <= sniroute_offload.CARRIED_MAX
    wire.reset()


def test_a_helper_that_dies_takes_its_errand_along_and_the_next_one_has_another(bench, serve_tls):
    bench.open(connect(serve_tls(lambda sock: sock.recv(1)).address), Order(False))
    wire, _ = bench.result()
    first = bench.offload.helper.pid
    os.kill(first, signal.SIGKILL)
    bench.until(lambda: bench.ends and bench.offload.helper is None)
    wire.reset()
    bench.open(connect(serve_tls(shout).address), Order(False))
    wire, seen = bench.result()
    assert seen and bench.offload.helper.pid != first
    wire.reset()


def test_a_first_piece_that_is_no_hello_harms_no_other_errand(bench, serve_tls):
    """A stranger's, who says a lot before anybody has read of it: its order would be cut, and end the helper."""
    with contextlib.ExitStack() as stack:
        (silent, ours), (stranger, theirs) = socket.socketpair(), socket.socketpair()
        for sock in (silent, stranger):
            stack.enter_context(sock)
        waiting = bench.open(ours, Order(True))
        pid = bench.offload.helper.pid
        bench.open(theirs, Order(True, early=base64.b64encode(b"\x16\3\1" * 30_000).decode()))
        assert isinstance(bench.result()[0], Failed)
        bench.open(connect(serve_tls(shout).address), Order(False))
        wire, _ = bench.result()
        assert isinstance(wire, TcpWire) and waiting.is_open and bench.offload.helper.pid == pid
        wire.reset()
        waiting.reset()


def test_an_event_of_a_socket_that_had_its_number_before_ends_no_helper(bench, serve_tls):
    """Two sockets have something in one turn; what is done for the first closes the second, and needs a helper."""
    with contextlib.ExitStack() as stack:
        (one, its_peer), (other, others_peer) = socket.socketpair(), socket.socketpair()
        for sock in (one, its_peer, other, others_peer):
            stack.callback(sock.close)
        number = other.fileno()

        def on_one(mask: int) -> None:
            bench.loop.poller.forget(one.fileno())
            while (spare := os.dup(one.fileno())) < number:  # the lowest number is the next one's
                stack.callback(os.close, spare)
            os.close(spare)
            bench.loop.poller.closing(number)
            other.close()
            bench.offload.prepare()
            helpers.append(bench.offload.helper)

        helpers: list[Any] = []
        bench.loop.poller.watch(one.fileno(), READ, on_one)
        bench.loop.poller.watch(number, READ, lambda mask: None)
        its_peer.send(b"x")
        others_peer.send(b"x")
        bench.until(lambda: helpers)
        assert helpers[0].control.fileno() == number and bench.offload.helper is helpers[0]
        bench.open(connect(serve_tls(shout).address), Order(False))
        wire, _ = bench.result()
        assert isinstance(wire, TcpWire) and bench.offload.helper is helpers[0]
        wire.reset()


def test_a_helper_that_cannot_be_started_is_a_failure(bench, serve_tls, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    bench.offload.prepare()
    bench.open(connect(serve_tls(shout).address), Order(False))
    assert str(bench.result()[0]) == "the helper for TLS has ended"


def test_a_helper_without_an_errand_ends(bench, monkeypatch):
    monkeypatch.setattr(sniroute_offload, "RESTS", 0.0)
    bench.offload.prepare()
    pid = bench.offload.helper.pid
    bench.until(lambda: bench.offload.helper is None and not bench.offload.ending)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_errands_are_done_before_a_helper_ends(bench, serve_tls):
    bench.open(connect(serve_tls(shout).address), Order(False))
    wire, _ = bench.result()
    bench.offload._dismiss()
    bench.until(lambda: bench.offload.ending)
    wire.send(b"still there?")
    bench.until(lambda: bench.ends)
    assert bench.heard == b"STILL THERE?"
    wire.close()
    bench.until(lambda: not bench.offload.ending)


PARENT = """
import sys; sys.path.insert(0, sys.argv[1])
from sniroute_layers import Wires
from sniroute_loop import Loop
from sniroute_offload import Offload, is_worth_it
assert is_worth_it()
offload = Offload(Wires(Loop(print)))
offload.prepare()
print(offload.helper.pid, flush=True)
sys.stdin.read()
"""


@linux
def test_a_helper_does_not_outlive_its_parent_and_is_told_no_secret():
    with subprocess.Popen([sys.executable, "-c", PARENT, str(HERE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env={**os.environ, "KEY": "secret", "SSL_CERT_FILE": "/x.pem"}) as parent:
        pid = int(parent.stdout.readline())
        told = wait_until(lambda: pathlib.Path(f"/proc/{pid}/environ").read_bytes())
        told = dict(line.split(b"=", 1) for line in told.split(b"\0") if line)
        assert told[b"SSL_CERT_FILE"] == b"/x.pem" and told.keys() <= set(map(str.encode, sniroute_offload.TRUST))
        parent.kill()
    wait_until(lambda: not pathlib.Path(f"/proc/{pid}/cmdline").exists()
               or pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z")


@linux
@pytest.mark.parametrize("tls, has_openssl", [(0, False), (1, True)])
def test_two_ends_have_openssl_only_where_the_pool_has_tls(processes, serve, tls, has_openssl):
    pool, callers = free_port(), free_port()
    target = "{}:{}".format(*serve(echo).address)
    ends = [processes(f"server://k@{HOST}:{pool}/{HOST}:{callers}?mode=1&tls={tls}"),
            processes(f"client://k@{HOST}:{pool}/{target}?mode=2")]

    def is_up() -> bool:
        with contextlib.suppress(OSError), connect((HOST, callers), b"hello") as sock:
            return sock.recv(5) == b"hello"
        return False

    wait_until(is_up, 20)
    for end in ends:
        maps = pathlib.Path(f"/proc/{end.process.pid}/maps").read_text()
        assert ("/libssl" in maps or "/_ssl" in maps) is has_openssl
