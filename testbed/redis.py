"""Real Redis servers for tests, and the room sniroute_redis in a loop that a test turns.

    redis_server     redis_server(*options) -> RedisServer, until the test ends
    shared_redis     one that all tests of a module share
    ask_redis        ask_redis(url, ...) -> Asker, until the test ends
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import ssl
import subprocess
import tempfile
import traceback
from typing import Any, Callable, Iterator

import pytest

from conftest import HOST, connect, wait_until
from sniroute_loop import Loop, monotonic
from sniroute_redis import Redis, Subscription
from sniroute_refusals import Failed
from sniroute_resp import ErrorReply, Reader, Word, encode, parse_url
from testbed.clients import program_path
from testbed.ports import free_block

USER = "--user", "app", "on", ">secret", "~*", "&*", "+@all"


class Admin:
    """A connection that waits for each answer."""

    def __init__(self, path: str):
        self.reader = Reader()
        self.sock = connect(path)

    def ask(self, *words: Word) -> Any:
        self.sock.sendall(encode(*words))
        while data := self.sock.recv(65536):
            for value in self.reader.feed(data):
                return value
        raise OSError("it has ended")


class RedisServer:
    """A redis-server with a port of its own.  `folder` keeps what it writes."""

    def __init__(self, folder: pathlib.Path, port: int, *options: Any, sentinel: bool = False):
        self.folder = folder
        self.port = port
        self.path = str(folder / f"{port}.sock")
        self.words = [program_path("redis-server", "redis-server")]
        if sentinel:
            (folder / f"{port}.conf").write_text("")
            self.words += [str(folder / f"{port}.conf"), "--sentinel"]
        self.words += map(str, ("--port", port, "--bind", HOST, "--unixsocket", self.path, "--dir", folder, *options))
        if not sentinel:
            self.words += ["--save", "", "--repl-diskless-sync-delay", "0"]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / f"{self.port}.log").read_text()

    def start(self) -> RedisServer:
        """Start it, and wait until it listens."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        with open(self.folder / f"{self.port}.log", "ab") as log:
            self.process = subprocess.Popen(self.words, stdout=log, stderr=log)
        wait_until(self.listens, what="redis-server")
        return self

    def listens(self) -> bool:
        """Whether it takes connections.  The socket's file is there a little earlier."""
        assert self.process is not None and self.process.poll() is None, self.log
        try:
            connect(self.path).close()
        except OSError:
            return False
        return True

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it.  More than once does no harm."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def tell(self, *words: Word) -> Any:
        """Have an administrator's command done.  Fails where the answer is an error."""
        admin = Admin(self.path)
        with contextlib.closing(admin.sock):
            answer = admin.ask(*words)
        assert not isinstance(answer, ErrorReply), answer
        return answer

    def clients(self) -> int:
        """How many of its clients are ours."""
        return self.tell("CLIENT", "LIST").decode().count(" name=sniroute ")


@pytest.fixture
def redis_server(free_ports) -> Iterator[Callable[..., RedisServer]]:
    """redis_server(*options, sentinel=False) -> RedisServer, until the test ends."""
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sniroute-redis-")))

        def make(*options: Any, **more: Any) -> RedisServer:
            server = RedisServer(folder, free_ports(1)[0], *options, **more)
            stack.callback(server.stop)
            return server.start()

        yield make


@pytest.fixture(scope="module")
def shared_redis() -> Iterator[RedisServer]:
    """One for all tests of a module: with no password, and a user `app`, whose password is `secret`."""
    with tempfile.TemporaryDirectory(prefix="sniroute-redis-") as folder, free_block(1) as (port, _):
        server = RedisServer(pathlib.Path(folder), port, *USER)
        server.start()
        yield server
        server.stop()


# -- the room ----------------------------------------------------------------------------------


class Asker:
    """A loop with a Redis.  The loop turns in `until`, so in the test's own thread."""

    def __init__(self, url: str, context: ssl.SSLContext | None = None):
        self.faults: list[str] = []
        self.loop = Loop(lambda owner: self.faults.append(traceback.format_exc()))
        self.tick = self.loop.timer(lambda: None)
        self.ups: list[Any] = []
        self.downs: list[Failed] = []
        self.redis = Redis(self.loop, parse_url(url), self.ups.append, self.downs.append, context)

    def close(self) -> None:
        """End all.  Fails where something has raised."""
        self.redis.close()
        self.until(lambda: not self.redis.net.way.names.waiting, what="the resolver")
        self.loop.close()
        assert self.faults == []

    def until(self, predicate: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
        """Turn until `predicate` is true, and return its value."""
        deadline = monotonic() + timeout
        while not (result := predicate()):
            assert monotonic() < deadline, (f"not within {timeout:g} s: {what or predicate}; "
                                            f"{self.redis.state}, {self.downs}")
            assert self.faults == [], self.faults[0]
            self.tick.set(monotonic() + 0.005)
            self.loop.turn()
        return result

    def begin(self, *words: Word, **options: Any) -> list[Any]:
        """Begin to ask: the answer will be in the list."""
        got: list[Any] = []
        self.redis.ask(*words, done=got.append, **options)
        assert got == [], "no callback before it returns"
        return got

    def ask(self, *words: Word, **options: Any) -> Any:
        """Ask, and wait for the answer."""
        got = self.begin(*words, **options)
        return self.until(lambda: got)[0]

    def up(self) -> Any:
        """Wait until it is up; who has answered."""
        return self.until(lambda: self.redis.server, what="up")

    def down(self, reason: str) -> Failed:
        """Wait until it is down for this reason."""
        return self.until(lambda: next((failed for failed in self.downs if failed.reason == reason), None), what=reason)


class Heard:
    """A subscription: its messages, and what has become of it."""

    def __init__(self, asker: Asker, channel: str):
        self.messages: list[bytes] = []
        self.ups: list[Any] = []
        self.downs: list[Failed] = []
        self.subscription: Subscription = asker.redis.subscribe(
            channel, self.messages.append, self.ups.append, self.downs.append)


@pytest.fixture
def ask_redis() -> Iterator[Callable[..., Asker]]:
    """ask_redis(url, context=None) -> Asker, until the test ends."""
    with contextlib.ExitStack() as stack:
        def make(*words: Any) -> Asker:
            asker = Asker(*words)
            stack.callback(asker.close)
            return asker

        yield make
