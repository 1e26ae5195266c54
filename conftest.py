"""What the tests share: real far ends, the stand-in for cloudflared, and a meter for leaks."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import pathlib
import selectors
import signal
import socket
import sys
import threading
import time
from typing import Any, Callable, Iterator

import pytest

HERE = pathlib.Path(__file__).resolve().parent
HOST = "127.0.0.1"
Address = tuple[str, int]


def wait_until(predicate: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """What `predicate` returns, once that is true; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (result := predicate()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what or predicate}"
        time.sleep(0.005)
    return result


class FakeClock:
    """A clock that moves when it is told to."""

    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now

    def jump(self, seconds: float) -> None:
        self.now += seconds


# -- leaks -------------------------------------------------------------------------------------


def own_children() -> set[int]:
    """The children of this process, zombies too; empty without /proc."""
    pids: set[int] = set()
    for tasks in pathlib.Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # that thread has ended
            pids.update(map(int, tasks.read_text().split()))
    return pids


def own_fds() -> dict[str, str]:
    """The open descriptors of this process and what they are; empty without /proc."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the one that listdir() used
                found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Each test ends with the threads, the children and the descriptors that it began with."""
    def state() -> tuple[set[threading.Thread], set[int], int]:
        return set(threading.enumerate()), own_children(), len(own_fds())

    before, fds = state(), own_fds()
    yield
    if state() != before:
        gc.collect()  # an object that only a cycle keeps is closed here, with its warning
        with contextlib.suppress(AssertionError):  # the comparison below says more
            wait_until(lambda: state() == before, timeout=5)
    threads, children, count = state()
    assert threads == before[0], "threads"
    assert children == before[1], "child processes"
    assert count == before[2], f"descriptors: {sorted(own_fds().items() ^ fds.items())}"


# -- far ends ----------------------------------------------------------------------------------


class Server:
    """A TCP server on a free port; `handler` serves each connection in a thread of its own.

    Used with `with`.  `accepted` counts connections.  A handler that raises OSError has lost
    its client, which is no failure; leaving the block closes every connection.
    """

    def __init__(self, handler: Callable[[socket.socket], object]):
        self.handler = handler
        self.accepted = 0
        self.listener = socket.create_server((HOST, 0))
        self.address: Address = self.listener.getsockname()[:2]
        self.lock = threading.Lock()  # guards what follows
        self.live: set[socket.socket] = set()
        self.closed = False
        self.threads = [threading.Thread(target=self.accept, name="far-accept")]
        self.threads[0].start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.closed = True
            for sock in self.live:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):  # the last client is ours, and wakes accept()
            socket.create_connection(self.address, 5).close()
        for thread in self.threads:
            thread.join()
        self.listener.close()

    def accept(self) -> None:
        while True:
            sock, _ = self.listener.accept()
            with self.lock:
                if self.closed:
                    sock.close()
                    return
                self.accepted += 1
                self.live.add(sock)
                self.threads.append(threading.Thread(target=self.serve, args=(sock,), name="far"))
                self.threads[-1].start()

    def serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self.handler(sock)
        with self.lock:
            self.live.discard(sock)


def echo(sock: socket.socket) -> None:
    """A handler that sends everything back, and ends when its client ends."""
    while data := sock.recv(65536):
        sock.sendall(data)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket], object]], Server]]:
    """serve(handler) -> Server: a far end whose peer is a function that is given a socket."""
    with contextlib.ExitStack() as stack:
        yield lambda handler: stack.enter_context(Server(handler))


@pytest.fixture
def echo_server(serve) -> Server:
    """A far end that sends everything back: `.address`, `.accepted`."""
    return serve(echo)


# -- ports -------------------------------------------------------------------------------------

BLOCK = 32  # ports per block
BLOCKS_FIRST, BLOCKS_COUNT = 10016, 680  # blocks from port 10016 to 31775: below the ephemeral range
block_numbers = itertools.count(os.getpid() * 37)


@pytest.fixture
def free_ports() -> Iterator[Callable[..., tuple[int, int]]]:
    """free_ports(count=20) -> (first, last): consecutive TCP ports that nobody holds.

    Each call has a block of its own, also among test runs side by side: a UDP socket on the
    block's first port marks it as taken, until the test ends.
    """
    with contextlib.ExitStack() as stack:
        def reserve(count: int = 20) -> tuple[int, int]:
            blocks = -(-count // BLOCK)
            for number in itertools.islice(block_numbers, 0, BLOCKS_COUNT, blocks):
                first = BLOCKS_FIRST + BLOCK * (number % (BLOCKS_COUNT - blocks))
                with contextlib.ExitStack() as marks:
                    try:
                        for port in range(first, first + blocks * BLOCK):
                            if (port - first) % BLOCK == 0:
                                mark = marks.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                                mark.bind((HOST, port))
                            with socket.socket() as probe:
                                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                                probe.bind((HOST, port))
                    except OSError:
                        continue
                    stack.enter_context(marks.pop_all())
                    return first, first + count - 1
            raise AssertionError("no free block of ports")

        yield reserve


# -- the stand-in for cloudflared --------------------------------------------------------------


class Cloudflared:
    """A directory with the stand-in in it; see fake_cloudflared.py for the switches."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.path = str(directory / "cloudflared")
        # A wrapper, as an import of the compiled file starts faster than the file itself.
        pathlib.Path(self.path).write_text(
            f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(HERE)!r})\n"
            "import fake_cloudflared\nsys.exit(fake_cloudflared.main())\n")
        os.chmod(self.path, 0o700)
        self.tables: dict[str, dict[str, Any]] = {"far.json": {}, "faults.json": {}}

    def set(self, name: str, hostname: str, value: Any) -> None:
        """Change one entry; the file is replaced as a whole, since somebody may be reading it."""
        self.tables[name][hostname] = value
        new = self.directory / f"{name}.new"
        new.write_text(json.dumps(self.tables[name]))
        new.replace(self.directory / name)

    def far(self, hostname: str, address: Address) -> None:
        """Where `hostname` ("*": any other) leads."""
        self.set("far.json", hostname, list(address))

    def fault(self, hostname: str, **switches: Any) -> None:
        """What goes wrong with `hostname` ("*": any other) from now on; no switches: nothing."""
        self.set("faults.json", hostname, switches)

    def lines(self, name: str, hostname: str | None) -> list[dict[str, Any]]:
        try:
            text = (self.directory / name).read_text()
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [row for row in rows if hostname in (None, row["hostname"])]

    def runs(self, pid: int) -> bool:
        """Whether this process is there, and is this program; False without /proc."""
        try:
            return self.path.encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def starts(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per start: hostname, pid, port, argv, environment, fds, time, detached."""
        return self.lines("starts.jsonl", hostname)

    def clients(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per accepted client: hostname, pid, number (in its process), time."""
        return self.lines("clients.jsonl", hostname)


@pytest.fixture
def cloudflared(tmp_path: pathlib.Path) -> Iterator[Cloudflared]:
    """The stand-in: .path, .far(hostname, address), .fault(hostname, **switches), .starts(), .clients()."""
    directory = tmp_path / "cloudflared"
    directory.mkdir()
    program = Cloudflared(directory)
    yield program
    for row in program.starts():
        if program.runs(row["detached"]):  # nobody's child: only the test's end ends it
            os.kill(row["detached"], signal.SIGKILL)
    pids = {row["pid"] for row in program.starts() + program.clients()}
    try:
        wait_until(lambda: not any(map(program.runs, pids)), timeout=2, what="the end of all stand-ins")
    finally:
        for pid in filter(program.runs, pids):
            os.kill(pid, signal.SIGKILL)


# -- a far end for crowds ----------------------------------------------------------------------


@pytest.fixture
def single_loop_echo() -> Iterator[Address]:
    """The address of a far end that echoes to any number of clients from one thread."""
    selector = selectors.DefaultSelector()
    stop_reader, stop_writer = socket.socketpair()
    listener = socket.create_server((HOST, 0), backlog=4096)
    listener.setblocking(False)

    def loop() -> None:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(stop_reader, selectors.EVENT_READ)
        clients = set()
        while True:
            for key, _ in selector.select():
                if key.fileobj is stop_reader:
                    for client in clients:
                        client.close()
                    return
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    clients.add(client)
                    selector.register(client, selectors.EVENT_READ)
                    continue
                data = b""
                with contextlib.suppress(OSError):
                    data = key.fileobj.recv(65536)
                    key.fileobj.sendall(data)
                if not data:
                    selector.unregister(key.fileobj)
                    clients.discard(key.fileobj)
                    key.fileobj.close()

    thread = threading.Thread(target=loop, name="far-loop")
    thread.start()
    yield listener.getsockname()[:2]
    stop_writer.close()
    thread.join()
    for sock in (stop_reader, listener):
        sock.close()
    selector.close()
