"""What the tests of tunnels and their processes share: a table under test, listeners, the stand-in's row.

Processes and sockets are real; the tunnel program is the stand-in of fake_cloudflared.py, which can
be a process for each tunnel (`own`) or for several (`shared`).  A test that has to hold for both is
marked `both`, one about the second `shared`; the others have the first.  Most
tests turn the reaper by hand (`Bench.turn`) under a clock that they move; where waiting itself is
the subject, the reaper's own thread runs (`live=True`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
import socket
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_launchers
import sniroute_processes
from sniroute_launchers import TunnelError, TunnelKey
from sniroute_tunnels import READY, Tunnel, TunnelTable
from conftest import HOST, FakeClock, wait_until

both = pytest.mark.parametrize("kind", ["own", "shared"], indirect=True)
shared = pytest.mark.parametrize("kind", ["shared"], indirect=True)


def listening(port: int = 0, host: str = HOST, family: int = socket.AF_INET, backlog: int = 5) -> socket.socket:
    """A listener that is in nobody's way once it is closed."""
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((host, port))
    listener.listen(backlog)
    return listener


def port_of(sock: socket.socket) -> int:
    return sock.getsockname()[1]


def runs(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(") ")[2][0] not in "ZX"


def ask(address: tuple[str, int], question: bytes = b"hello") -> bytes:
    """What a far end that echoes answers through a tunnel; b"" where it refuses."""
    with socket.create_connection(address, 10) as client:
        answer = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            client.sendall(question)
            while len(answer) < len(question) and (data := client.recv(65536)):
                answer += data
        return answer


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    """What was logged: (what happened, its fields)."""
    return [(record.getMessage(), getattr(record, "fields", {})) for record in caplog.records]


def key(hostname: str) -> TunnelKey:
    """The key of a tunnel in a Bench's table."""
    return TunnelKey("cf", hostname)


class Bench:
    """A table under test, and the threads that wait on it."""

    def __init__(self, table: TunnelTable, live: bool):
        self.table = table
        self.clock = table.clock
        self.threads: list[threading.Thread] = []
        if live:
            table.start()

    def ask(self, name: str, client: str | None = None, timeout: float = 60.0,
            doubted: sniroute_processes.Child | None = None) -> concurrent.futures.Future[None]:
        """wait() in a thread of its own."""
        future: concurrent.futures.Future[None] = concurrent.futures.Future()

        def run() -> None:
            try:
                self.table.wait(key(f"{name}"), client, self.clock() + timeout, doubted)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self.threads.append(threading.Thread(target=run, name=f"ask-{name}"))
        self.threads[-1].start()
        return future

    def turn(self, until: Callable[[], Any], timeout: float = 10.0) -> Any:
        """Let the reaper work until something is true."""
        if self.table.reaper.ident is not None:
            return wait_until(until, timeout)
        return wait_until(lambda: self.table.step(0.005) or until(), timeout)

    def outcome(self, future: concurrent.futures.Future[None]) -> TunnelError | None:
        """What became of an ask()."""
        self.turn(future.done)
        error = future.exception()
        assert error is None or isinstance(error, TunnelError), error
        return error

    def ready(self, name: str, **options: Any) -> Tunnel:
        """A tunnel that is ready, without a lease."""
        error = self.outcome(self.ask(name, **options))
        assert error is None, error
        return self.table.tunnels[key(f"{name}")]

    def leased(self, name: str) -> Tunnel:
        self.ready(name)
        tunnel = self.table.lease(key(f"{name}"))
        assert tunnel is not None
        return tunnel

    def failed(self, name: str, **options: Any) -> TunnelError:
        error = self.outcome(self.ask(name, **options))
        assert error is not None
        return error

    def doubt(self, tunnel: Tunnel) -> bool:
        """Whether doubt has the tunnel's child started again.  Returns when it is ready again."""
        child = tunnel.child
        future = self.ask(tunnel.key.hostname, doubted=child)
        wait_until(lambda: tunnel.state is not READY or future.done())
        assert self.outcome(future) is None
        assert tunnel.state is READY
        return tunnel.child is not child

    def states(self) -> dict[str, str]:
        return {view.key.hostname: view.state for view in self.table.snapshot()}

    def close(self) -> None:
        if self.table.reaper.ident is None:
            self.table.start()  # it ends at once, with all that the table holds
        self.table.close(now=True)
        for thread in self.threads:
            thread.join()


@pytest.fixture
def kind(request) -> str:
    """How many tunnels a process carries: `own`, or `shared`."""
    return getattr(request, "param", "own")


def stand_in(kind: str, program: str, environ: dict[str, str]) -> sniroute_launchers.Launcher:
    """The row for the stand-in."""
    launcher = sniroute_launchers.cloudflared_launcher(program, environ)
    if kind == "shared":
        launcher = launcher._replace(shared=("forwarders",), reason=sniroute_launchers.carrier_reason, carries=16)
    return launcher


@pytest.fixture
def bench(kind, cloudflared, free_ports) -> Iterator[Callable[..., Bench]]:
    """bench(live=False, count=20, program=..., **options of TunnelTable) -> Bench."""
    with contextlib.ExitStack() as stack:
        def make(live: bool = False, count: int = 20, program: str = cloudflared.path,
                 environ: dict[str, str] | None = None, **options: Any) -> Bench:
            if not live:
                options.setdefault("clock", FakeClock())
            options.setdefault("jitter", lambda: 1.0)
            options.setdefault("ports", free_ports(count))
            launcher = stand_in(kind, program, environ or {})
            made = Bench(TunnelTable({"cf": launcher, "too": launcher}, **options), live)
            stack.callback(made.close)
            return made

        yield make


def event(child: sniroute_processes.Child, event: str, **fields: Any) -> bytes:
    """A line that concerns a child's listener."""
    return json.dumps({"level": "info", "event": event, "listener": child.listener, **fields}).encode()
