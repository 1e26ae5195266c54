"""NodePass tunnels for tests: both ends in threads of the test, as child processes, or one of them the original.

    tunnel      tunnel(target, flow="-", server="...", client="...") -> Tunnel: two ends of ours, in threads, linked
    local       lone(url, **times) -> Local: one end of ours, in a thread
    processes   processes(url) -> Program: sniroute_nodepass.py as a child
    tls_files   tls_files(query) -> the parameters of both ends, with certificates where it has tls=2
    original    original(url) -> Program: the original program, of SNIROUTE_TEST_NODEPASS, as a child

Ports of an end may be 0 in `lone` and `tunnel`: then each end has free ones.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import socket
import ssl  # noqa: F401: with it, ends in threads of the test do their TLS themselves: see sniroute_offload
import subprocess
import sys
import threading
from typing import Any, Callable, Iterator

import pytest

from conftest import HERE, HOST, Address, connect, wait_until
from sniroute_dialin import Server
from sniroute_dialout import Client
from sniroute_ends import LINKED, End
from sniroute_nodepass import Forwarders, NodePass, run_client, run_server
from sniroute_nodeurl import Times, parse_url
from sniroute_pool import Pool
from testbed.carrier import Notes

KINDS = [("", "plain"), ("tls=1", "tls=1"), ("tls=2", "tls=2"), ("type=2", "type=2"), ("type=2&tls=1", "type=2, tls=1"),
         ("type=2&tls=2", "type=2, tls=2"), ("type=3&tls=1", "type=3"), ("type=3&tls=2", "type=3, tls=2")]
ORIGINAL = os.environ.get("SNIROUTE_TEST_NODEPASS", "")
QUICK = Times(cooldown=0.2, handshake=5.0, pool_get=5.0, report=5.0)  # a test waits for nothing of it in vain


def how_many_wait(pool: Pool) -> int:
    """How many wait for any connection of a pool."""
    return sum(asker.done is not None for asker in list(pool.askers))


class Local:
    """A program in a thread of the test."""

    def __init__(self, times: Times = QUICK, kind: type[NodePass] = NodePass, environ: dict[str, str] | None = None):
        self.log = Notes()
        self.program = kind(self.log, times, environ or {})
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None

    def begin(self, url: str, **changes: Any) -> Local:
        """Run what a URL says; its ports are the ones given, or by `changes` of Options others."""
        options = parse_url(url)._replace(**changes)
        {"server": run_server, "client": run_client}[options.scheme](self.program, options)
        return self.start()

    def start(self) -> Local:
        """Turn the loop, in a thread."""
        self.thread = threading.Thread(target=self.run, name="nodepass")
        self.thread.start()
        return self

    def run(self) -> None:
        try:
            self.program.run()
        except BaseException as error:
            self.error = error
            raise

    @property
    def end(self) -> Any:
        """Its one end."""
        return self.program.ends[0]

    @property
    def callers(self) -> Address:
        """Where TCP callers come in."""
        listener, = self.program.listeners.values()
        return listener.sock.getsockname()

    @property
    def messages(self) -> list[str]:
        """All lines of its log."""
        return [row["message"] for row in self.log.rows.copy()]

    def has_said(self, words: str) -> str:
        """Wait for a line with these words."""
        return wait_until(lambda: next((line for line in self.messages if words in line), ""), what=words)

    def call(self, act: Callable[[], Any]) -> Any:
        """What `act` returns, called in the loop."""
        done: list[Any] = []
        event = threading.Event()

        def run() -> None:
            done.append(act())
            event.set()

        self.program.loop.call(run)
        assert event.wait(10)
        return done[0]

    def close(self) -> None:
        if self.thread is None:
            self.program.stop()
            self.program.loop.close()
            return
        self.program.loop.call(self.program.loop.stop)
        self.thread.join(10)
        assert not self.thread.is_alive() and self.error is None
        assert not self.program.connections and not self.program.listeners
        faults = [row for row in self.log.rows if row.get("event") == "fault"]
        assert not faults, faults


class Tunnel:
    """Two ends in threads of the test."""

    def __init__(self, server: Local, client: Local):
        self.server, self.client = server, client

    @property
    def accepting(self) -> Local:
        """The one at which callers come in."""
        return self.server if self.server.end.accepts else self.client

    @property
    def dialling(self) -> Local:
        """The other one."""
        return self.client if self.server.end.accepts else self.server

    @property
    def address(self) -> Address:
        """Where TCP callers come in."""
        return wait_until(lambda: self.accepting.program.listeners and self.accepting.callers)

    @property
    def udp(self) -> Address:
        """Where UDP callers come in."""
        return wait_until(lambda: self.accepting.end.datagrams.port).sock.getsockname()

    def is_linked(self) -> bool:
        """Whether both ends think so, and callers may come."""
        ends = self.server.end, self.client.end
        return all(end.state == LINKED and end.verified for end in ends) and self.accepting.end.idle > 0

    def linked(self) -> Tunnel:
        """Wait for that."""
        wait_until(self.is_linked, what="a link")
        return self

    def linked_again(self, times: int = 2) -> Tunnel:
        """Wait for a further link: so many since the beginning."""
        for each in (self.server, self.client):
            wait_until(lambda: sum("linked with" in line for line in each.messages) >= times, what=f"link {times}")
        return self.linked()

    def call(self, said: bytes = b"", timeout: float = 20.0) -> socket.socket:
        """A caller that has sent something."""
        return connect(self.address, said, timeout)


def trip(address: Address, said: bytes = b"hello") -> bytes:
    """What comes back for some bytes."""
    with connect(address, said) as caller:
        got = b""
        while len(got) < len(said):
            data = caller.recv(65536)
            assert data, f"{len(got)} bytes of {len(said)}"
            got += data
    return got


def is_refused(address: Address, said: bytes = b"hello") -> bool:
    """Whether a caller sees a failure, at whatever moment, and not a byte."""
    try:
        with connect(address, said) as caller:
            assert caller.recv(1) == b"x", "an end"
    except ConnectionError:
        return True
    return False


def send_all(sock: socket.socket, data: bytes) -> threading.Thread:
    """Send from a thread, and end."""
    def send() -> None:
        with contextlib.suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(1 << 20):
        parts.append(data)
    return b"".join(parts)


def show(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


@pytest.fixture
def lone() -> Iterator[Callable[..., Local]]:
    """lone(times=QUICK, kind=NodePass, environ={}) -> Local, not begun."""
    with contextlib.ExitStack() as stack:
        def make(**options: Any) -> Local:
            made = Local(**options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def tunnel(lone: Callable[..., Local]) -> Callable[..., Tunnel]:
    """tunnel(target address, flow="-", server=query, client=query, times=QUICK, waits=True) -> Tunnel."""
    def make(target: Address, flow: str = "-", server: str = "", client: str = "", times: Times = QUICK,
             waits: bool = True, host: str = HOST) -> Tunnel:
        behind, callers = (target,), ((HOST, 0),)
        mode = 1 if flow == "-" else 2
        one = lone(times=times).begin(f"server://key@{host}:1/{HOST}:2?mode={mode}&{server}", port=0,
                                       targets=callers if flow == "-" else behind)
        port = wait_until(lambda: one.program.ends and one.end.listener).getsockname()[1]
        other = lone(times=times).begin(f"client://key@{host}:1/{HOST}:2?mode=2&{client}", port=port,
                                         targets=behind if flow == "-" else callers)
        made = Tunnel(one, other)
        return made.linked() if waits else made

    return make


@pytest.fixture
def tls_files(certificates, monkeypatch) -> Callable[[str], tuple[str, str, str]]:
    """tls_files(server query) -> its query, the client's, and the host of the tunnel."""
    def make(query: str) -> tuple[str, str, str]:
        if "tls=2" not in query:
            return query, "", HOST
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
        return f"{query}&crt={certificates / 'edge.pem'}&key={certificates / 'edge.key'}", "sni=localhost", "localhost"

    return make


class Program:
    """A child process: sniroute_nodepass.py, or the original.  What it prints is in `path`."""

    def __init__(self, words: list[str], path: pathlib.Path, **options: Any):
        self.path = path
        with open(path, "wb") as output:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                            **options)

    @property
    def said(self) -> str:
        return self.path.read_text(errors="replace")

    def has_said(self, words: str, timeout: float = 20.0) -> str:
        """Wait for a line in which these words are."""
        return wait_until(lambda: next((line for line in self.said.split("\n") if re.search(words, line)), ""), timeout,
                          words)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert "a fault in" not in self.said and "Traceback" not in self.said, self.said


@pytest.fixture
def processes(tmp_path: pathlib.Path) -> Iterator[Callable[..., Program]]:
    """processes(*words, **options of Popen) -> Program: sniroute_nodepass.py."""
    with contextlib.ExitStack() as stack:
        def make(*words: str, **options: Any) -> Program:
            path = tmp_path / f"nodepass-{len(list(tmp_path.glob('nodepass-*')))}"
            made = Program([sys.executable, str(HERE / "sniroute_nodepass.py"), *words], path, **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def original(tmp_path: pathlib.Path) -> Iterator[Callable[..., Program]]:
    """original(*words) -> Program: the original program."""
    if not ORIGINAL:
        pytest.skip("SNIROUTE_TEST_NODEPASS does not name the original program (NodePass, version 2)")
    with contextlib.ExitStack() as stack:
        def make(*words: str, **options: Any) -> Program:
            path = tmp_path / f"original-{len(list(tmp_path.glob('original-*')))}"
            made = Program([ORIGINAL, *words], path, cwd=tmp_path, **options)
            stack.callback(made.close)
            return made

        yield make


__all__ = ["KINDS", "Client", "End", "Forwarders", "Local", "Program", "QUICK", "Server", "Tunnel", "is_refused",
           "read_all", "send_all", "show", "trip"]
