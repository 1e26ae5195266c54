"""What the tests of tunnels and their processes share: a table under test, listeners, the stand-in's row.

Processes and sockets are real.  The tunnel program is the stand-in of fake_cloudflared.py: a process for each tunnel
(`own`), or one process for several (`shared`).  Tests marked `both` run with each, tests marked `shared` with the
second, all others with the first.  Most tests call the reaper's steps themselves (`Bench.turn`), with a clock that they
move.  Tests about waiting itself run the reaper's thread (`live=True`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
import socket
import threading
import time
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
    """A listener whose port is free as soon as it is closed."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, port))
        listener.listen(backlog)
        stack.pop_all()
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
    """Send `question` through a tunnel, and return the echo of the far end; b"" where the client is refused."""
    with socket.create_connection(address, 10) as client:
        answer = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            client.sendall(question)
            while len(answer) < len(question) and (data := client.recv(65536)):
                answer += data
        return answer


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    """The log so far: (message, fields) of each line."""
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
        """Call TunnelTable.wait in a thread of its own; the future has its outcome."""
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
        """Let the reaper work until `until` is true, and return its value."""
        if self.table.reaper.ident is not None:
            return wait_until(until, timeout)
        deadline = time.monotonic() + timeout
        while True:
            self.table.step(0.005)  # it wakes for what happens: no need to sleep beside it
            if result := until():
                return result
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {until}"

    def outcome(self, future: concurrent.futures.Future[None]) -> TunnelError | None:
        """Wait for the end of an `ask`.  Returns its TunnelError, None where the tunnel is ready."""
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
        """A tunnel that is ready, with a lease."""
        self.ready(name)
        tunnel = self.table.lease(key(f"{name}"))
        assert tunnel is not None
        return tunnel

    def failed(self, name: str, **options: Any) -> TunnelError:
        """The error of a tunnel that has to fail."""
        error = self.outcome(self.ask(name, **options))
        assert error is not None
        return error

    def doubt(self, tunnel: Tunnel) -> bool:
        """Doubt the tunnel's child, and wait until the tunnel is ready.  Returns whether it has a new child."""
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
            self.table.start()  # close() leaves the stopping to the reaper's thread
        self.table.close(now=True)
        for thread in self.threads:
            thread.join()


@pytest.fixture(params=[True, False], ids=["with /proc", "without /proc"])
def proc(request) -> bool:
    """Whether the table may ask /proc who listens; else a bind has to tell."""
    return request.param


@pytest.fixture
def kind(request) -> str:
    """Which stand-in: "own", a process for each tunnel; or "shared", one for several."""
    return getattr(request, "param", "own")


def stand_in(kind: str, program: str, environ: dict[str, str]) -> sniroute_launchers.Launcher:
    """The Launcher of the stand-in."""
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
    """A line as a shared process writes it about the listener of `child`."""
    return json.dumps({"level": "info", "event": event, "listener": child.listener, **fields}).encode()
