"""A caller of API servers for tests: the rooms sniroute_api and sniroute_credentials, in a loop that a test turns.

    call             call(kubeconfig, ...) -> Caller, until the test ends
    proxy            proxy(...) -> Proxy: an HTTP or SOCKS5 proxy, until the test ends
    soon             files are looked at for each request
"""

from __future__ import annotations

import contextlib
import ipaddress
import pathlib
import socket
import ssl
import struct
import threading
import traceback
from typing import Any, Callable, Iterator, Mapping, Sequence

import pytest

import sniroute_credentials
from conftest import Address, Server
from sniroute_api import Api, Apis, Job, Reply, Upgraded
from sniroute_dial import Failed
from sniroute_loop import Loop, monotonic
from testbed.running import read_exactly

SPDY = (("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", "portforward.k8s.io"))
WEBSOCKET = (("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
             ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
             ("Sec-WebSocket-Protocol", "SPDY/3.1+portforward.k8s.io"))


def told(result, reason: str) -> str:
    """The words of a Failed with this reason."""
    assert isinstance(result, Failed) and result.reason == reason, (result, getattr(result, "reason", ""))
    return str(result)


@pytest.fixture
def soon(monkeypatch):
    """Files are looked at for each request."""
    monkeypatch.setattr(sniroute_credentials, "LOOK_EVERY", 0)
    monkeypatch.setattr(sniroute_credentials, "REFUSED_EVERY", 0)


class Watched:
    """A watch: its lines, and how it has ended."""

    def __init__(self, api: Api, path: str):
        self.lines: list[dict[str, Any]] = []
        self.ends: list[Failed | None] = []
        self.job = api.watch(path, self.lines.append, self.ends.append)


class Caller:
    """A loop with its APIs.  The loop turns in `until`, so in the test's own thread."""

    def __init__(self, paths: Sequence[str | pathlib.Path], environ: Mapping[str, str], **options: Any):
        self.faults: list[str] = []
        self.loop = Loop(lambda owner: self.faults.append(traceback.format_exc()))
        self.tick = self.loop.timer(lambda: None)
        self.apis = Apis(self.loop, [str(path) for path in paths], environ, **options)

    def close(self) -> None:
        """End all.  Fails where something has raised."""
        self.apis.close()
        self.until(lambda: not self.apis.plugins.running, what="plugins end")
        self.loop.close()
        assert self.faults == []

    def until(self, predicate: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
        """Turn until `predicate` is true, and return its value."""
        deadline = monotonic() + timeout
        while not (result := predicate()):
            assert monotonic() < deadline, f"not within {timeout:g} s: {what or predicate}"
            assert self.faults == [], self.faults[0]
            self.tick.set(monotonic() + 0.005)
            self.loop.turn()
        return result

    def begin(self, path: str, context: str = "", timeout: float = 10.0) -> tuple[Job, list[Reply | Failed]]:
        """Begin to GET."""
        got: list[Reply | Failed] = []
        job = self.apis.of(context).get(path, got.append, monotonic() + timeout)
        assert got == [], "no callback before it returns"
        return job, got

    def get(self, path: str, context: str = "", timeout: float = 10.0) -> Any:
        """GET, to its end."""
        _, got = self.begin(path, context, timeout)
        return self.until(lambda: got, timeout + 1)[0]

    def upgrade(self, method: str, path: str, headers: Sequence[tuple[str, str]] = SPDY, timeout: float = 10.0) -> Any:
        """Ask for an upgrade, to its end."""
        got: list[Upgraded | Reply | Failed] = []
        self.apis.of("").upgrade(method, path, headers, got.append, monotonic() + timeout)
        return self.until(lambda: got, timeout + 1)[0]

    def watch(self, path: str) -> Watched:
        """Begin a watch."""
        return Watched(self.apis.of(""), path)


@pytest.fixture
def call() -> Iterator[Callable[..., Caller]]:
    """call(path of a kubeconfig, ..., environ={}, exec_path=()) -> Caller, until the test ends."""
    with contextlib.ExitStack() as stack:
        def make(*paths: str | pathlib.Path, environ: Mapping[str, str] | None = None, **options: Any) -> Caller:
            caller = Caller(paths, environ or {}, **options)
            stack.callback(caller.close)
            return caller

        yield make


# -- proxies -----------------------------------------------------------------------------------


class Proxy:
    """A proxy: each connection is served by a thread.  `asked` has what was asked for: (host, port, login)."""

    def __init__(self, serve: Callable[..., Server], kind: str, login: str = "", says: bytes | None = None,
                 context: ssl.SSLContext | None = None):
        self.asked: list[tuple[str, int, str]] = []
        self.login = login
        self.says = says  # instead of an answer
        self.context = context
        self.talk = {"http": self.http, "socks5": self.socks}[kind]
        self.address: Address = serve(self.handle).address

    def handle(self, sock: socket.socket) -> None:
        client = self.context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) if self.context else sock
        with client:
            if self.says is not None:
                client.recv(4096)
                if self.talk == self.socks and len(self.says) > 2:  # to each thing that it is told
                    client.sendall(self.says[:2])
                    client.recv(4096)
                    client.sendall(self.says[2:])
                else:
                    client.sendall(self.says)
                return
            place = self.talk(client)
            if place is not None:
                with socket.create_connection(place, 10) as server:
                    self.relay(client, server)

    def http(self, client: socket.socket) -> Address | None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += read_exactly(client, 1)
        first, *lines = head.decode().split("\r\n")
        login = next((line.partition(": ")[2] for line in lines if line.startswith("Proxy-Authorization")), "")
        host, _, port = first.split(" ")[1].rpartition(":")
        self.asked.append((host.strip("[]"), int(port), login))
        good = login == self.login
        client.sendall(b"HTTP/1.1 200 yes\r\n\r\n" if good else b"HTTP/1.1 407 no\r\nContent-Length: 0\r\n\r\n")
        return (host.strip("[]"), int(port)) if good else None

    def socks(self, client: socket.socket) -> Address | None:
        _, count = read_exactly(client, 2)
        methods = read_exactly(client, count)
        login = ""
        if self.login:
            assert 2 in methods
            client.sendall(b"\5\2")
            _, size = read_exactly(client, 2)
            user = read_exactly(client, size)
            login = (user + b":" + read_exactly(client, read_exactly(client, 1)[0])).decode()
            client.sendall(b"\1\0" if login == self.login else b"\1\1")
            if login != self.login:
                return None
        else:
            client.sendall(b"\5\0")
        kind = read_exactly(client, 4)[3]
        if kind == 3:
            host = read_exactly(client, read_exactly(client, 1)[0]).decode()
        else:
            host = str(ipaddress.ip_address(read_exactly(client, {1: 4, 4: 16}[kind])))
        port, = struct.unpack(">H", read_exactly(client, 2))
        self.asked.append((host, port, login))
        for byte in b"\5\0\0\3\4name\0\1":  # as slowly as it may come
            client.sendall(bytes((byte,)))
        return host, port

    def relay(self, client: socket.socket, server: socket.socket) -> None:
        def copy(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    target.sendall(data)
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=copy, args=(server, client), name="far-relay")
        thread.start()
        copy(client, server)
        thread.join()


@pytest.fixture
def proxy(serve: Callable[..., Server]) -> Callable[..., Proxy]:
    """proxy("http" or "socks5", login="", says=None, context=None) -> Proxy, until the test ends."""
    return lambda *words, **options: Proxy(serve, *words, **options)
