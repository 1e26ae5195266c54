"""What the tests of the carrier's rooms share: carriers in a thread or as a program, and edges that break rules.

    edge        the stand-in of fake_edge.py, one for each test module
    hostname    a name for each test, so that tests share the edge without meeting
    local       a carrier in a thread of the test, for tests that shorten its times or look at its state
    program     the real program with any command line; `carrier`: one that listens for a hostname
    raw_edge    an edge that is a function of the test, for answers that fake_edge.py cannot give
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import selectors
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute_carrier
import sniroute_dial
import sniroute_forwarder
import sniroute_upgrade
from conftest import HERE, HOST, Address, connect, exit_code, wait_until
from sniroute_carrier import Carrier
from sniroute_dial import Proxy
from sniroute_forwarder import Log
from testbed.standins import Edge, Nursery, nursery_of

NOISE = random.Random(1).randbytes(1 << 20)  # no two pieces are alike, so a lost or repeated one shows
ROOMS = sniroute_carrier, sniroute_forwarder, sniroute_dial  # `local` patches times in the room that reads them
numbers = itertools.count(1)  # for names


# -- fixtures, and what they make ------------------------------------------------------------


@pytest.fixture(scope="module")
def edge(tmp_path_factory, certificates, nursery) -> Iterator[Edge]:
    """One edge for all tests of a module: its switches are for one hostname each, and read anew for each connection."""
    program = Edge(tmp_path_factory.mktemp("edge"), certificates, nursery)
    yield program
    program.stop()


@pytest.fixture
def hostname() -> str:
    """A hostname that no other test uses."""
    return f"app-{next(numbers)}.example.test"


class Notes(Log):
    """A Log that keeps its rows instead of writing them."""

    def __init__(self) -> None:
        super().__init__("debug", as_json=True)
        self.rows: list[dict[str, str]] = []

    def __call__(self, level: str, message: str, **fields: str) -> None:
        self.rows.append({"level": level, "message": message, **{key: value for key, value in fields.items() if value}})


class Rows:
    """What a test can ask of both kinds of carriers."""

    address: Address

    def rows(self, event: str) -> list[dict[str, str]]:
        raise NotImplementedError

    def connect(self) -> socket.socket:
        return connect(self.address)

    def failure(self) -> dict[str, str]:
        """The log's one line about the one client that could not be served."""
        row, = wait_until(lambda: self.rows("failed"))
        return row

    def ends(self, count: int = 1) -> list[dict[str, str]]:
        """The log's lines about the connections that are over."""
        return wait_until(lambda: len(self.rows("end")) >= count and self.rows("end"), what=f"{count} ends")


class Local(Rows):
    """A carrier in a thread of the test."""

    def __init__(self, hostname: str, proxy: Address | None, no_proxy: str = "", headers: Any = ()):
        self.log = Notes()
        self.carrier = Carrier(self.log, list(headers), proxy and Proxy(*proxy, ""), no_proxy)
        listener = self.carrier.listen(self.carrier.parse(hostname), (HOST, 0))
        self.address = listener.sock.getsockname()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, name="carrier")
        self.thread.start()

    def run(self) -> None:
        try:
            self.carrier.run()
        except BaseException as error:
            self.error = error
            raise

    def rows(self, event: str) -> list[dict[str, str]]:
        return [row for row in self.log.rows if row.get("event") == event]

    def states(self) -> list[str]:
        """The state of each connection; the phase of the dial where it is dialling."""
        return [connection.dial.phase if connection.state == "dialling" and connection.dial else connection.state
                for connection in self.carrier.connections.copy()]

    def reaches(self, *states: str) -> None:
        """Wait until the connections are in these states."""
        wait_until(lambda: sorted(self.states()) == sorted(states), what=f"{states}, not {self.states()}")

    def close(self) -> None:
        self.carrier.loop.call(self.carrier.stop)
        self.thread.join(10)
        assert not self.thread.is_alive() and self.error is None
        assert not self.carrier.connections and not self.carrier.listeners
        assert not any(queue.due for queue in self.carrier.loop.queues), "something is due"
        assert not self.rows("fault"), self.rows("fault")


@pytest.fixture
def local(edge, monkeypatch) -> Iterator[Callable[..., Local]]:
    """local(hostname, proxy=True, CONSTANT=..., **options of Local) -> Local."""
    monkeypatch.setenv("SSL_CERT_FILE", edge.environ["SSL_CERT_FILE"])
    with contextlib.ExitStack() as stack:
        def make(hostname: str, proxy: bool | Address = True, **options: Any) -> Local:
            options.setdefault("GRACE", 0.1)
            for constant in [option for option in options if option.isupper()]:
                room, = (room for room in ROOMS if hasattr(room, constant))
                monkeypatch.setattr(room, constant, options.pop(constant))
            made = Local(hostname, edge.proxy if proxy is True else proxy or None, **options)
            stack.callback(made.close)
            return made

        yield make


class Program(Rows):
    """The real program, as a child."""

    def __init__(self, words: list[str], environ: dict[str, str], stdin: Any = subprocess.DEVNULL,
                 stdout: Any = subprocess.PIPE, prepare: str = "carrier.GRACE = 0.1", room: str = "sniroute_carrier",
                 carriers: Nursery | None = None, **options: Any):
        prepare = f"import {room} as carrier; {prepare}"
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); {prepare}\nsys.exit(carrier.main())"
        coverage = {key: value for key, value in os.environ.items() if key.startswith("COVERAGE")}
        environ = {"TUNNEL_LOG_OUTPUT": "json", **coverage, **environ}
        flags = [] if coverage else ["-IS"]  # as the router runs it; coverage needs `site`, which -S leaves out
        if carriers is not None and not options and {stdin, stdout} <= {subprocess.PIPE, subprocess.DEVNULL}:
            self.process = carriers.child(room, ["-c", *words], environ, prepare, stdin, stdout)
        else:
            self.process = subprocess.Popen([sys.executable, *flags, "-c", code, *words], stdin=stdin, stdout=stdout,
                                            stderr=subprocess.PIPE, env=environ, **options)
        self.pid = self.process.pid
        self.errors = b""
        self.drained = threading.Event()
        self.ended = False
        self.thread = threading.Thread(target=self.drain, name="stderr")
        self.thread.start()

    def drain(self) -> None:
        while data := os.read(self.process.stderr.fileno(), 65536):
            self.errors += data

    def all_rows(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.errors.splitlines(keepends=True) if line.endswith(b"\n")]

    def rows(self, event: str) -> list[dict[str, str]]:
        return [row for row in self.all_rows() if row.get("event") == event]

    def listening(self, count: int = 1) -> list[Address]:
        """Where it listens.  These ports accept: the carrier logs the line after listen()."""
        rows = wait_until(lambda: len(self.rows("listening")) >= count and self.rows("listening")
                          or self.process.poll() is not None, what=f"{count} listeners")
        assert rows is not True, self.errors
        addresses = [row["listener"].rpartition(":") for row in rows]
        self.address = addresses[0][0], int(addresses[0][2])
        return [(host, int(port)) for host, _, port in addresses]

    def tell(self, *lines: str) -> None:
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.process.stdin.flush()

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Its resident memory in KiB."""
        return int(re.search(r"VmRSS:\s*(\d+)", pathlib.Path(f"/proc/{self.pid}/status").read_text())[1])

    def cpu(self) -> float:
        """The CPU time it has used, in seconds."""
        words = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def end(self, number: int | None = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit code.  None: it ends without a signal."""
        if number is not None:
            self.process.send_signal(number)
        code = exit_code(self.process, 20)
        self.close()
        return code

    def close(self) -> None:
        """End it if the test has not, and fail if its log has a traceback."""
        if self.ended:
            return
        self.ended = True
        self.process.kill() if self.process.poll() is None and not self.quits() else None
        self.process.wait()
        self.thread.join(10)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # flushing its buffer fails: the reader has gone
                    pipe.close()
        for word in (b"Traceback", b"Fatal", b"a fault in the carrier"):
            assert word not in self.errors, self.errors.decode()

    def quits(self) -> bool:
        """Send SIGTERM.  Returns whether it ends within ten seconds."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            exit_code(self.process, 10)
        return self.process.returncode is not None


@pytest.fixture(scope="session")
def carriers() -> Iterator[Nursery | None]:
    """What forks carriers of both kinds; None without Linux, and where coverage has to see each of them begin."""
    if not hasattr(os, "pidfd_open") or any(name.startswith("COVERAGE") for name in os.environ):
        yield None
        return
    with nursery_of("sniroute_carrier", "sniroute_kubernetes") as made:
        yield made


@pytest.fixture
def program(edge, carriers: Nursery | None) -> Iterator[Callable[..., Program]]:
    """program(*words, environ=the edge's, prepare=statements before main(), **options of Popen) -> Program."""
    with contextlib.ExitStack() as stack:
        def make(*words: str, environ: dict[str, str] = edge.environ, **options: Any) -> Program:
            made = Program(list(words), environ, carriers=carriers, **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def carrier(program) -> Callable[..., Program]:
    """carrier(hostname, *words, ...) -> Program that listens."""
    def make(hostname: str, *words: str, **options: Any) -> Program:
        made = program("access", "tcp", "--hostname", hostname, "--url", f"{HOST}:0", *words, **options)
        made.listening()
        return made

    return make


# -- clients ---------------------------------------------------------------------------------


def receive(sock: socket.socket, size: int) -> bytes:
    """Read `size` bytes, or less if the peer ends before."""
    data = bytearray()
    while len(data) < size and (more := sock.recv(min(1 << 20, size - len(data)))):
        data += more
    return bytes(data)


def receive_all(sock: socket.socket) -> tuple[bytes, str]:
    """Read until the peer ends.  Returns the bytes, and how it ended: "FIN" or "RST"."""
    data = bytearray()
    try:
        while more := sock.recv(1 << 20):
            data += more
    except ConnectionError:
        return bytes(data), "RST"
    return bytes(data), "FIN"


@contextlib.contextmanager
def beside(act: Callable[[], Any]) -> Iterator[None]:
    """Run `act` in a thread while the block runs; a lost connection is no failure."""
    def run() -> None:
        with contextlib.suppress(OSError):
            act()

    thread = threading.Thread(target=run, name="beside")
    thread.start()
    try:
        yield
    finally:
        thread.join(30)
        assert not thread.is_alive()


def echoed(rows: Rows, data: bytes = b"hello") -> bytes:
    """Send `data` on a new connection, and return what comes back."""
    with rows.connect() as client, beside(lambda: client.sendall(data)):
        return receive(client, len(data))


def refused(run: Rows) -> dict[str, str]:
    """Connect a client that has to get RST and no byte.  Returns the log's line about it."""
    with contextlib.suppress(ConnectionResetError):  # it may come before connect() has returned
        with run.connect() as client:
            assert receive_all(client) == (b"", "RST")
    return run.failure()


def parallel(address: Address, payloads: list[bytes], timeout: float = 30.0) -> list[bytes]:
    """Send each payload on a connection of its own, all at once.  Returns what comes back on each."""
    answers = [bytearray() for _ in payloads]
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for number, payload in enumerate(payloads):
            sock = stack.enter_context(connect(address))
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, [number, memoryview(payload)])
        deadline = time.monotonic() + timeout
        while selector.get_map():
            assert time.monotonic() < deadline
            for key, mask in selector.select(1):
                number, rest = key.data
                if mask & selectors.EVENT_WRITE:
                    key.data[1] = rest = rest[key.fileobj.send(rest):]
                    if not rest:
                        selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
                if mask & selectors.EVENT_READ:
                    answers[number] += key.fileobj.recv(1 << 18)
                    if len(answers[number]) >= len(payloads[number]):
                        selector.unregister(key.fileobj)
    return [bytes(answer) for answer in answers]


def with_buffers(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Set the kernel's buffers of the carrier's sockets: SO_SNDBUF=bytes, SO_RCVBUF=bytes.

    With a small SO_SNDBUF the carrier has to wait for its peer.  With a large SO_RCVBUF all is there at once.
    """
    set_options = sniroute_dial.set_options

    def resized(sock: socket.socket) -> None:
        set_options(sock)
        for option, size in sizes.items():
            sock.setsockopt(socket.SOL_SOCKET, getattr(socket, option), size)

    for room in (sniroute_carrier, sniroute_dial):  # one sets the client's, the other the edge's
        monkeypatch.setattr(room, "set_options", resized)


# -- far ends --------------------------------------------------------------------------------


def blocks(count: int) -> Iterator[bytes]:
    """`count` blocks of a MiB, no two the same."""
    for number in range(count):
        yield number.to_bytes(8, "big") + NOISE[8:]


def digest(count: int) -> bytes:
    """The SHA-256 of `blocks(count)`."""
    whole = hashlib.sha256()
    for block in blocks(count):
        whole.update(block)
    return whole.digest()


def send_blocks(count: int) -> Callable[[socket.socket], None]:
    """A handler that sends `blocks(count)`, and ends."""
    def handler(sock: socket.socket) -> None:
        for block in blocks(count):
            sock.sendall(block)

    return handler


def digest_upload(sock: socket.socket) -> None:
    """A handler that reads a size (8 bytes), then as many bytes, and answers with their SHA-256."""
    left = int.from_bytes(receive(sock, 8), "big")
    whole = hashlib.sha256()
    while left and (data := sock.recv(1 << 18)):
        whole.update(data)
        left -= len(data)
    sock.sendall(whole.digest())
    sock.recv(1)


def resolve_as(monkeypatch: pytest.MonkeyPatch, found: Callable[[], list[Address]]) -> list[str]:
    """Let names resolve to what `found` returns; HOST still resolves to itself.  Returns the names asked for."""
    asked, resolve = [], socket.getaddrinfo

    def getaddrinfo(host: str, *rest: Any, **options: Any) -> Any:
        if host in (HOST, HOST.encode()):
            return resolve(host, *rest, **options)
        asked.append(host)
        return [(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
                for address in found()]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def end_of(edge: Edge, hostname: str) -> dict[str, Any]:
    """The edge's record of the one connection of this hostname, once it is over."""
    row, = wait_until(lambda: edge.ends(hostname), what="the edge's end")
    return row


PHASES = [
    pytest.param({"proxy_hang": True}, "asking the proxy", id="proxy"),
    pytest.param({"hang": "accept"}, "TLS handshake", id="before the hello"),
    pytest.param({"hang": "tls"}, "TLS handshake", id="TLS"),
    pytest.param({"hang": "upgrade"}, "upgrade", id="upgrade"),
    pytest.param({"hang": "head"}, "upgrade", id="half an answer"),
]


# -- edges that are functions of a test ------------------------------------------------------


def masked(data: bytes, key: bytes) -> bytes:
    """Mask or unmask a payload with a key of four bytes (RFC 6455 section 5.3)."""
    return bytes(byte ^ key[at % 4] for at, byte in enumerate(data))


def server_frame(opcode: int, data: bytes, fin: bool = True, extended: int | None = None) -> bytes:
    """A frame as servers send it.  `extended`: bytes of the extended length, 0, 2 or 8; None: the shortest form."""
    size = len(data)
    extended = extended if extended is not None else 0 if size < 126 else 2 if size < 65536 else 8
    short = {0: size, 2: 126, 8: 127}[extended]
    return bytes((0x80 * fin | opcode, short)) + (size.to_bytes(extended, "big") if extended else b"") + data


@pytest.fixture
def raw_edge(serve, certificates) -> Callable[..., str]:
    """raw_edge(script, answer=None) -> hostname: an edge that answers the upgrade, then calls `script(TLS socket)`.

    `answer` is sent instead of a right 101.
    """
    def make(script: Callable[[ssl.SSLSocket], None], answer: bytes | None = None) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "edge.pem")

        def handler(sock: socket.socket) -> None:
            with context.wrap_socket(sock.dup(), server_side=True) as tls:
                head = b""
                while b"\r\n\r\n" not in head:
                    data = tls.recv(65536)
                    if not data:
                        return
                    head += data
                key = re.search(rb"Sec-WebSocket-Key: (\S+)", head)[1]
                accept = base64.b64encode(hashlib.sha1(key + sniroute_upgrade.ACCEPT_GUID.encode()).digest())
                tls.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n" if answer is None else answer)
                script(tls)

        return f"localhost:{serve(handler).address[1]}"

    return make


def wait_for_end(tls: ssl.SSLSocket) -> None:
    """Read until the client has left."""
    while tls.recv(65536):
        pass


def read_frames(tls: ssl.SSLSocket, frames: list[tuple[int, bytes]], last: int | None = None) -> None:
    """Append the client's frames to `frames`, as (opcode, payload), until it has left, or one has the opcode `last`."""
    data = b""
    while more := tls.recv(65536):
        data += more
        while len(data) >= 6:
            size, start = data[1] & 0x7F, 2
            if size == 126:
                size, start = int.from_bytes(data[2:4], "big"), 4
            if len(data) < start + 4 + size:
                break
            frames.append((data[0] & 0x0F, masked(data[start + 4:start + 4 + size], data[start:start + 4])))
            data = data[start + 4 + size:]
        if frames and frames[-1][0] == last:
            return
