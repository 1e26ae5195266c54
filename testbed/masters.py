"""Masters of NodePass for tests, in a thread of the test; their instances are stand-ins.

    master           master(tls=0, ...) -> Served: a Master that is open until the test ends
    shared_master    a Served that the tests of a module share, for what changes nothing; `still` is its instance
    Served.ask       one request with the key -> Said;  Served.events: a stream
    url              url("good") -> a URL of an instance; testbed/fake_instance.py says what the word does
    TIMES            short ones
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import socket
import ssl
import sys
from typing import Any, Callable, Iterator

import pytest

import sniroute_master
from conftest import HERE, HOST, wait_until
from sniroute_children import Instance
from sniroute_forwarder import Log
from sniroute_master import Master
from sniroute_nodeurl import Options, Times
from testbed.registry import Said

TIMES = Times(report=30.0, cooldown=0.05, shutdown=0.3)
FAKE = [sys.executable, "-I", "-S", str(HERE / "testbed" / "fake_instance.py")]


def url(does: str = "good", role: str = "server", port: int = 10101, query: str = "") -> str:
    """A URL of an instance."""
    return f"{role}://{does}@{HOST}:{port}/{HOST}:10102{'?' * bool(query)}{query}"


class Lines(Log):
    """A log that keeps its lines instead of writing them."""

    def __init__(self) -> None:
        super().__init__("debug", as_json=False)
        self.text = ""

    def __call__(self, level: str, message: str, **fields: str) -> None:
        self.write(f"{level}: {message}")

    def write(self, line: str) -> None:
        self.text += line + "\n"


class Events:
    """A stream of events, as a client reads it."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.text = b""

    def read(self) -> bool:
        """Some more of it; whether there was any."""
        data = self.sock.recv(1 << 16)
        self.text += data
        return bool(data)

    @property
    def all(self) -> list[dict[str, Any]]:
        """What has come so far."""
        return [json.loads(block.partition(b"\ndata: ")[2]) for block in self.text.split(b"\n\n")[:-1]
                if block.startswith(b"event: instance\ndata: ")]

    def until(self, wanted: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The first event of this kind, which may have come already."""
        while not (found := [each for each in self.all if wanted(each)]):
            assert self.read(), "the stream has ended"
        return found[0]


class Served:
    """A Master that is open."""

    def __init__(self, state: pathlib.Path, times: Times, environ: dict[str, str], **options: Any):
        self.state = state
        self.options = Options("master", **{"host": HOST, **options})
        self.master = Master(self.options, times, {**os.environ, "WELL": str(state.parent / "well"), **environ},
                             Lines(), str(state), FAKE)
        self.master.open()
        self.address = self.master.listener.getsockname()[:2]
        self.is_closed = False
        self.still = ""  # an instance that has ended, of `shared_master`

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.master.close()

    @property
    def log(self) -> str:
        """All that it has logged."""
        return self.master.log.text

    @property
    def key(self) -> str:
        return self.master.instances.key.url

    def connect(self) -> socket.socket:
        """A connection, inside TLS where the master wants that."""
        sock = socket.create_connection(self.address, 10)
        if self.options.tls:
            context = ssl._create_unverified_context()
            sock = context.wrap_socket(sock, server_hostname="localhost")
        return sock

    def ask(self, method: str, path: str, body: Any = None, key: str | None = "", **fields: str) -> Said:
        """A request for a path behind /api/v1, or one that begins with /api; `key` None: without one."""
        connection = http.client.HTTPConnection(*self.address, timeout=10)
        with contextlib.closing(connection):
            connection.sock = self.connect()
            headers = {name.replace("_", "-"): value for name, value in fields.items()}
            if key is not None:
                headers.setdefault("X-API-Key", key or self.key)
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path if path.startswith("/api") else f"/api/v1{path}", data, headers)
            response = connection.getresponse()
            return Said(response.status, response.headers, response.read())

    def create(self, does: str = "good", alias: str = "", **how: Any) -> str:
        """A new instance; its id."""
        said = self.ask("POST", "/instances", {"url": url(does, **how), "alias": alias})
        assert said.status == 201, said.body
        return said.json["id"]

    def ended(self) -> str:
        """A new instance whose process has ended well; its id."""
        ident = self.create("ends")
        wait_until(lambda: self.instance(ident).wish == "stop")
        return ident

    def show(self, ident: str) -> dict[str, Any]:
        return self.ask("GET", f"/instances/{ident}").json

    def until(self, ident: str, **wanted: Any) -> dict[str, Any]:
        """Wait until the instance has these fields."""
        def look() -> dict[str, Any] | None:
            shown = self.show(ident)
            return shown if all(shown[name] == value for name, value in wanted.items()) else None
        return wait_until(look, what=str(wanted))

    def pid(self, ident: str) -> int:
        """Its process, once it runs; not that of another instance."""
        def look() -> int:
            child = self.instance(ident).child
            return child.popen.pid if child is not None else 0
        return wait_until(look)

    def instance(self, ident: str) -> Instance:
        return self.master.instances.table[ident]

    @contextlib.contextmanager
    def events(self, key: str = "") -> Iterator[Events]:
        """A stream of events, whose head has been read."""
        with contextlib.closing(self.connect()) as sock:
            head = f"GET /api/v1/events HTTP/1.1\r\nHost: x\r\nX-API-Key: {key or self.key}\r\n\r\n"
            sock.sendall(head.encode())
            stream = Events(sock)
            while b"\r\n\r\n" not in stream.text:
                assert stream.read()
            assert stream.text.startswith(b"HTTP/1.1 200 "), stream.text
            stream.text = stream.text.partition(b"\r\n\r\n")[2]
            yield stream

    def mcp(self, method: str, params: Any = None, ident: Any = 1) -> Any:
        """The response of MCP."""
        return self.ask("POST", "/api/v2", {"jsonrpc": "2.0", "id": ident, "method": method, "params": params}).json

    def tool(self, name: str, **arguments: Any) -> Any:
        """The result of a tool, or the `data` of its error."""
        said = self.mcp("tools/call", {"name": name, "arguments": arguments})
        return said["result"] if "result" in said else said["error"]["data"]


@pytest.fixture(scope="module")
def shared_master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sniroute_master, "TICK", 0.02)
        there = Served(tmp_path_factory.mktemp("master") / "shared.sqlite", TIMES, {})
    there.still = there.ended()
    yield there
    there.close()


@pytest.fixture
def master(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Served]]:
    """master(times=TIMES, environ={}, state="master.sqlite", **fields of Options) -> Served."""
    monkeypatch.setattr(sniroute_master, "TICK", 0.02)
    made: list[Served] = []

    def make(times: Times = TIMES, environ: dict[str, str] = {}, state: str = "master.sqlite",
             **options: Any) -> Served:
        made.append(Served(tmp_path / state, times, environ, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
