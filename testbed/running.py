"""A router in a thread of the test, its clients and far ends, and files of settings for it.

    run              run(*options) -> Running, until the test ends
    flow             a test that takes it runs once with each way to move bytes
    settings_file    settings_file(text) -> the path of a file with it
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import struct
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_flow
import sniroute_log
import sniroute_loop
import sniroute_router
import sniroute_settings
import sniroute_tunnels
from sniroute_launchers import cloudflared_launcher
from sniroute_tunnels import TunnelTable
from conftest import HOST, Address, connect, wait_until
from testbed.hellos import HELLO, NAME
from testbed.standins import Cloudflared

DB = "cloudflared:db.example.com"
TUNNEL = "--route=*=cloudflared:{name}"


class Running:
    """A Router with its loop in a thread of this process."""

    def __init__(self, *argv: str, program: str):
        sniroute_log.log.setLevel("DEBUG")
        settings = sniroute_settings.load_settings(["--listen", f"{HOST}:0", *argv], {})
        launchers = {scheme: row for scheme, row in settings.launchers.items() if scheme not in ("cloudflared", "carrier")}
        self.tunnels = TunnelTable({"cloudflared": cloudflared_launcher(program, {}), **launchers}, settings.ports,
                                   idle=settings.idle, start_timeout=settings.start_timeout,
                                   max_tunnels=settings.max_tunnels, max_starting=settings.max_starting)
        self.endings: list[sniroute_log.Ending] = []
        self.accesses: list[sniroute_log.Access] = []
        self.router = sniroute_router.Router(settings, self.tunnels, sniroute_router.Hooks(self.hear))
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
        sniroute_log.log.setLevel("NOTSET")

    def hear(self, line: sniroute_log.Ending | sniroute_log.Access) -> None:
        """The journal's part."""
        (self.accesses if isinstance(line, sniroute_log.Access) else self.endings).append(line)

    def connect(self, said: bytes = b"") -> socket.socket:
        """A client that has sent `said`, as conftest's `connect`."""
        return connect(self.address, said)

    def ending(self, number: int = 1) -> sniroute_log.Ending:
        """Wait for `number` endings, and return the last of them."""
        wait_until(lambda: len(self.endings) >= number, what=f"{number} endings")
        return self.endings[number - 1]

    def counter(self, name: str) -> int:
        return self.router.counters.get(name, 0)

    def part_early(self) -> None:
        """Let refused clients that stay be closed soon, instead of half a second later."""
        self.router.deadlines.linger.seconds = 0.05


@pytest.fixture
def run(cloudflared: Cloudflared, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Running]]:
    """run(*options, program=...) -> Running.  It is torn down before `cloudflared`, which checks for processes left.

    A tunnel that dies is started again at once: half a second of back-off is not what its tests are about.
    """
    monkeypatch.setattr(sniroute_tunnels, "BACKOFF_FIRST", 0.05)
    with contextlib.ExitStack() as stack:
        yield lambda *argv, program=cloudflared.path: stack.enter_context(Running(*argv, program=program))


def route(address: Address, pattern: str = NAME) -> str:
    """The option --route: `pattern` leads to this address."""
    return f"--route={pattern}=tcp:{address[0]}:{address[1]}"


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """Read `count` bytes, or less if the peer ends before."""
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def read_all(sock: socket.socket) -> bytes:
    """Read until the peer ends; a reset is an end, too."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 18):
            parts.append(data)
    return b"".join(parts)


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def alert(description: int, minor: int = 1) -> bytes:
    """The TLS record with a fatal alert that a refused client reads; its version is 3.`minor`."""
    return bytes((21, 3, minor, 0, 2, 2, description))


def answer(text: bytes, expected: int = len(HELLO)) -> Callable[[socket.socket], None]:
    """A handler that reads `expected` bytes, sends `text`, and then sends everything back."""
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, expected)
        sock.sendall(text)
        while data := sock.recv(65536):
            sock.sendall(data)
    return handler


@pytest.fixture(params=["splice", "copy", "selectors"])
def flow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to move bytes: with splice(2); without it; without epoll, where there is no splice(2) either."""
    if request.param == "selectors":
        monkeypatch.setattr(sniroute_loop, "EpollPoller", sniroute_loop.Poller)
    if request.param != "splice":
        monkeypatch.setattr(sniroute_flow, "can_splice", lambda: False)
    elif not sniroute_flow.can_splice():
        pytest.skip("no splice(2) here")
    return request.param


# -- settings ----------------------------------------------------------------------------------


def toml(value: Any) -> str:
    """A text or a list of texts in TOML, which writes both as JSON does."""
    return json.dumps(value)


@pytest.fixture
def settings_file(tmp_path: pathlib.Path) -> Callable[[str], str]:
    """settings_file(text) -> the path of a file with that text.  Each call replaces the file."""
    path = tmp_path / "sniroute.toml"

    def write(text: str) -> str:
        new = tmp_path / "new.toml"
        new.write_text(text)
        new.replace(path)
        return str(path)

    return write


ROUTES_FILE = """
[routes]
"DB.example.com" = "tcp:192.0.2.10:5432"
"*.example.com" = { target = "cloudflared:{name}", idle = "1h", allow = ["192.0.2.0/24", "198.51.100.7"] }
[routes."**.example.org"]
target = "tcp:{label}.internal:443"
send_proxy = "v2"
max_connections = 50
connection_idle = "off"
"""
