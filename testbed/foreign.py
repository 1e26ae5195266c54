"""Ends of a NodePass tunnel that are none of ours: a client and a server by hand, for tests of what a peer may do.

    Client(address)     asks for the terms, and makes connections of the pool, as the original does, or as ours
    served(script)      a listener by hand: `script(sock, number)` is called with each connection, in a thread of its own
    Original            the original's server, with its faults

Everything blocks, with a time-out.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import socket
import ssl
import threading
import time
from typing import Any, Callable, Iterator

import pytest

from conftest import HOST, Address, wait_until
from sniroute_duplex import client_context, fingerprint, make_pair, server_context
from sniroute_refusals import Malformed
from sniroute_signals import Signal, SignalReader, Terms, answer, ask, encode, parse_terms, proof, token_of

KEY = "key"
UPGRADE = (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
           b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
PATIENCE = 10.0  # seconds for whatever has to come


def call_from(source: str, address: Address, said: bytes = b"") -> socket.socket:
    """A connection from another address of this host."""
    sock = socket.create_connection(address, PATIENCE, source_address=(source, 0))
    if said:
        sock.sendall(said)
    return sock


@functools.cache
def context_of(protocols: tuple[str, ...]) -> ssl.SSLContext:
    """The context of a client that checks nothing."""
    return client_context(False, protocols)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """So many bytes.  Raises ConnectionError where it ends before."""
    got = b""
    while len(got) < count:
        data = sock.recv(count - len(got))
        if not data:
            raise ConnectionError(f"an end after {len(got)} bytes of {count}")
        got += data
    return got


def upgrade(sock: socket.socket) -> None:
    """Ask for a WebSocket, and read up to the id."""
    sock.sendall(UPGRADE)
    said = b""
    while not said.endswith(b"\r\n\r\n"):
        said += read_exactly(sock, 1)
    if not said.startswith(b"HTTP/1.1 101 "):
        raise ConnectionError(said.decode("latin-1"))
    read_exactly(sock, 2)  # the head of its frame


class Channel:
    """A control channel by hand."""

    def __init__(self, sock: socket.socket, key: str = KEY):
        self.sock = sock
        self.key = key.encode()
        self.reader = SignalReader(self.key)
        self.heard: list[Signal | Malformed] = []

    def say(self, action: str, remote: str = "", number: str = "", fp: str = "") -> None:
        self.sock.sendall(encode(Signal(action, remote, number, fp), self.key))

    def hear(self, *actions: str) -> Signal:
        """The next signal with one of these actions.  Pings on the way are answered."""
        while True:
            for at, signal in enumerate(self.heard):
                if isinstance(signal, Signal) and signal.action in actions:
                    del self.heard[at]
                    return signal
            data = self.sock.recv(65536)
            if not data:
                raise ConnectionError("the control channel has ended")
            for signal in self.reader.feed(data):
                self.heard.append(signal)
                if isinstance(signal, Signal) and signal.action == "ping" and "ping" not in actions:
                    self.say("pong")


class Client:
    """A client by hand.  Used with `with`.

    Args:
        ours: it says that it knows proofs, and proves.
        source: the address from which it calls.
    """

    def __init__(self, address: Address, key: str = KEY, ours: bool = False, source: str = HOST):
        self.address, self.key, self.ours, self.source = address, key, ours, source
        self.socks: list[socket.socket] = []
        self.slots: dict[str, socket.socket] = {}  # connections of the pool, by their ids
        self.channel: Channel
        self.terms: Terms

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.socks:
            sock.close()

    def open(self, is_tls: bool = False, protocols: tuple[str, ...] = ()) -> socket.socket:
        """A connection to the tunnel's port."""
        sock: Any = call_from(self.source, self.address)
        if is_tls:
            sock = context_of(protocols).wrap_socket(sock)
        self.socks.append(sock)
        return sock

    def shake(self) -> bytes:
        """Ask for the terms: what the server answers."""
        sock = self.open(is_tls=True)
        sock.sendall(ask("none", token_of(self.key), self.ours))
        said = b""
        with contextlib.suppress(ssl.SSLEOFError, ConnectionError):
            while data := sock.recv(65536):
                said += data
        sock.close()
        return said

    def begin(self) -> Client:
        """Ask, and take the terms."""
        self.terms = parse_terms(self.shake(), True)
        return self

    def dial(self, proves: bool | None = None) -> tuple[str, socket.socket]:
        """A connection of the pool: its id, and itself."""
        sock = self.open(is_tls=self.terms.tls == 1)
        if self.terms.type == 2:
            upgrade(sock)
        number = read_exactly(sock, 4)
        if self.ours if proves is None else proves:
            sock.sendall(proof(self.key, self.terms.nonce, number))
        return number.hex(), sock

    def fill(self, count: int) -> Client:
        """The control channel, and so many connections."""
        number, sock = self.dial()
        assert number == "00000000"
        self.channel = Channel(sock, self.key)
        self.channel.say("ping")
        for _ in range(count):
            number, sock = self.dial()
            self.slots[number] = sock
        return self


class Served:
    """A server by hand: `script` is called with each connection, in a thread of its own.  It has `count` of them."""

    def __init__(self, script: Callable[[socket.socket, int], object]):
        self.script = script
        self.count = 0
        self.listener = socket.create_server((HOST, 0), backlog=512)
        self.address: Address = self.listener.getsockname()
        pair = make_pair("nodepass.invalid")
        self.context = server_context(pair)
        self.fingerprint = fingerprint(pair.certificate)
        self.live: set[socket.socket] = set()
        self.is_over = False
        self.here = threading.local()  # `stack`: what a thread has to close
        self.threads = [threading.Thread(target=self.accept, name="foreign")]
        self.threads[0].start()

    def accept(self) -> None:
        while True:
            sock, _ = self.listener.accept()
            if self.is_over:
                sock.close()
                return
            sock.settimeout(PATIENCE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.live.add(sock)
            self.count += 1
            self.threads.append(threading.Thread(target=self.serve, args=(sock, self.count), name="foreign"))
            self.threads[-1].start()

    def serve(self, sock: socket.socket, number: int) -> None:
        with sock, contextlib.suppress(OSError), contextlib.ExitStack() as self.here.stack:
            self.script(sock, number)
        self.live.discard(sock)

    def wrap(self, sock: socket.socket) -> ssl.SSLSocket:
        """TLS on a connection, whose `script` runs."""
        wrapped = self.context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False)
        self.here.stack.callback(self.live.discard, wrapped)
        self.live.add(self.here.stack.enter_context(wrapped))
        return wrapped

    def shake(self, sock: socket.socket) -> ssl.SSLSocket:
        """TLS, and the request of a handshake, which is read."""
        wrapped = self.wrap(sock)
        said = b""
        while b"\r\n\r\n" not in said:
            said += wrapped.recv(4096)
        return wrapped

    def close(self) -> None:
        self.is_over = True
        for sock in list(self.live):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        socket.create_connection(self.address, PATIENCE).close()
        for thread in self.threads:
            thread.join()
        self.listener.close()


class Original(Served):
    """The original's server: a port that first takes one handshake, and then connections of the pool.

    It does not watch what is idle, and answers a second handshake with an id, as the original does.

    Args:
        loses: so many answers are never sent, and the port is the pool's all the same, until that fails.
    """

    def __init__(self, flow: str = "-", tls: int = 0, loses: int = 0):
        self.terms = Terms(flow, 64, tls, 0)
        self.loses = loses
        self.lock = threading.Lock()  # guards what follows
        self.is_shaking = True
        self.channel: Channel | None = None
        self.slots: dict[str, socket.socket] = {}  # in their order
        self.ready = threading.Event()  # the control channel is there
        self.done = threading.Event()
        super().__init__(self.meet)

    def meet(self, sock: socket.socket, number: int) -> None:
        with self.lock:
            is_handshake, self.is_shaking = self.is_shaking, False
        if is_handshake:
            wrapped = self.shake(sock)
            if self.loses:
                self.loses -= 1
                return
            wrapped.sendall(answer(self.terms, "Sun, 29 Nov 2026 00:00:00 GMT"))
            with contextlib.suppress(OSError):
                wrapped.unwrap()
            return
        if self.terms.tls:
            sock = self.wrap(sock)
        with self.lock:
            name = "00000000" if self.channel is None else secrets.token_hex(4)
            sock.sendall(bytes.fromhex(name))
            if name == "00000000":
                self.channel = Channel(sock)
            else:
                self.slots[name] = sock
        if name == "00000000":
            first = sock.recv(1, socket.MSG_PEEK) if not self.terms.tls else b"G"
            if first == b"\x16":  # a handshake: the channel is garbage, and it all begins again
                time.sleep(0.1)
                with self.lock:
                    self.channel, self.is_shaking = None, True
                    self.slots.clear()
                return
            self.ready.set()
        self.done.wait(PATIENCE * 2)

    def slot(self, number: str = "") -> tuple[str, socket.socket]:
        """The connection that waits longest, or the one with this id."""
        def found() -> str:
            with self.lock:
                return number if number in self.slots else "" if number else next(iter(self.slots), "")

        number = wait_until(found, what="a connection of the pool")
        with self.lock:
            return number, self.slots.pop(number)

    def close(self) -> None:
        self.done.set()
        super().close()


@pytest.fixture
def served() -> Iterator[Callable[..., Any]]:
    """served(script, or a class as Original, ...) -> Served, until the test ends."""
    with contextlib.ExitStack() as stack:
        def make(what: Any, **options: Any) -> Any:
            made = what(**options) if isinstance(what, type) else Served(what)
            stack.callback(made.close)
            return made

        yield make
