"""What the tests share: real far ends, the stand-ins for cloudflared and its edge, and a meter for leaks."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import pathlib
import queue
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple

import pytest

HERE = pathlib.Path(__file__).resolve().parent
HOST = "127.0.0.1"
DOCTOR = "sniroute_doctor.py"
OPTIONS = {  # drop-in files that may be missing
    DOCTOR, "sniroute_admin.py", "sniroute_metrics.py", "sniroute_page.py",
    "sniroute_carrier.py", "sniroute_dial.py", "sniroute_edge.py", "sniroute_forwarder.py", "sniroute_http.py",
}
CORE = sorted({path.name for path in HERE.glob("sniroute*.py")} - OPTIONS)  # the files that serve
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is started a hundred times is compiled once
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
    its client, which is no failure; leaving the block closes every connection.  What a handler
    heard, it returns, and the test asks for it with `result()`: its thread may get there long
    after the test has seen the connection end.
    """

    def __init__(self, handler: Callable[[socket.socket], object]):
        self.handler = handler
        self.accepted = 0
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()
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
        with sock:
            try:
                self.results.put(self.handler(sock))
            except OSError as error:
                self.results.put(error)
        with self.lock:
            self.live.discard(sock)

    def result(self) -> Any:
        """What the next handler to end returned, or the OSError it ended with; fails after ten seconds."""
        return self.results.get(timeout=10)


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


@pytest.fixture
def deaf() -> Iterator[Address]:
    """The address of a listener whose backlog is full: the kernel drops what comes."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind((HOST, 0))
        full.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield full.getsockname()


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


class StandIn:
    """A directory in which a stand-in finds its switches, and leaves its records."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
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


class Cloudflared(StandIn):
    """The stand-in for the program; see fake_cloudflared.py for the switches."""

    def __init__(self, directory: pathlib.Path):
        super().__init__(directory)
        self.path = str(directory / "cloudflared")
        # A wrapper, as an import of the compiled file starts faster than the file itself.
        pathlib.Path(self.path).write_text(
            f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(HERE)!r})\n"
            "import fake_cloudflared\nsys.exit(fake_cloudflared.main())\n")
        os.chmod(self.path, 0o700)

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


# -- the stand-in for the edge -----------------------------------------------------------------


def make_certificates(directory: pathlib.Path) -> None:
    """What fake_edge.py wants: ca.pem, edge.pem, and three that are wrong, each with its key."""
    usual = "basicConstraints = critical, CA:FALSE\nkeyUsage = digitalSignature\nextendedKeyUsage = serverAuth\n" \
            "subjectKeyIdentifier = hash\nauthorityKeyIdentifier = keyid\n"
    names = "subjectAltName = DNS:*.example.test, DNS:example.test, DNS:*.example.com, DNS:*.example.org, " \
            "DNS:localhost, IP:127.0.0.1\n"
    (directory / "openssl.cnf").write_text(
        "[req]\ndistinguished_name = name\nx509_extensions = ca\n[name]\n"
        "[ca]\nbasicConstraints = critical, CA:TRUE\nkeyUsage = critical, keyCertSign\nsubjectKeyIdentifier = hash\n"
        f"[right]\n{usual}{names}[wrong]\n{usual}subjectAltName = DNS:other.example.org\n"
        "[issue]\ndatabase = issued\nrand_serial = yes\nunique_subject = no\nnew_certs_dir = .\n"
        "default_md = sha256\npolicy = subject\n"
        "[subject]\ncommonName = supplied\n")
    (directory / "issued").touch()

    def openssl(*words: str) -> None:
        done = subprocess.run(["openssl", *words], cwd=directory, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    key = "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-config", "openssl.cnf"
    for authority in ("ca", "stranger"):
        openssl("req", "-x509", *key, "-days", "2", "-subj", f"/CN={authority}", "-keyout", f"{authority}.key",
                "-out", f"{authority}.pem")
    openssl("req", *key, "-subj", "/CN=edge", "-keyout", "edge.key", "-out", "edge.csr")
    for name, authority, section, end in (("edge", "ca", "right", "2099"), ("untrusted", "stranger", "right", "2099"),
                                          ("expired", "ca", "right", "2021"), ("wrong_name", "ca", "wrong", "2099")):
        openssl("ca", "-batch", "-notext", "-config", "openssl.cnf", "-name", "issue", "-in", "edge.csr",
                "-cert", f"{authority}.pem", "-keyfile", f"{authority}.key",
                "-startdate", "20200101000000Z", "-enddate", f"{end}0101000000Z",  # `x509 -days` takes no past
                "-extensions", section, "-out", f"{name}.pem")
        with open(directory / f"{name}.pem", "a") as file:
            file.write((directory / "edge.key").read_text())


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory with the certificates that the edge uses."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here (Debian package openssl)")
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory)
    return directory


class Edge(StandIn):
    """The stand-in for Cloudflare's edge, which is up; see fake_edge.py for the switches and the rows."""

    def __init__(self, directory: pathlib.Path, certificates: pathlib.Path):
        super().__init__(directory)
        for file in certificates.glob("*.pem"):
            (directory / file.name).symlink_to(file)
        self.errors = directory / "errors"
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import fake_edge; fake_edge.main()"
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen([sys.executable, "-IS", "-c", code, directory],
                                            stdin=subprocess.PIPE, stderr=errors)
        ready = directory / "edge.json"
        try:
            wait_until(lambda: ready.exists() or self.process.poll() is not None, what="the edge")
            ports = json.loads(ready.read_text())
        except BaseException:
            self.stop()
            raise
        self.port: int = ports["tls"]
        self.proxy: Address = HOST, ports["proxy"]
        self.environ = {"HTTPS_PROXY": f"http://{HOST}:{ports['proxy']}", "SSL_CERT_FILE": str(directory / "ca.pem")}

    def stop(self) -> None:
        """End it at once, as often as you like; what it complained of is a failure."""
        self.process.terminate()
        self.process.wait(10)
        self.process.stdin.close()
        assert self.errors.read_text() == ""

    def events(self, event: str, hostname: str | None) -> list[dict[str, Any]]:
        return [row for row in self.lines("connections.jsonl", hostname) if row["event"] == event]

    def accepted(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per TCP connection; it has a hostname only where it came through the proxy."""
        return self.events("accepted", hostname)

    def handshakes(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per TLS handshake: sni, tls, alpn, session_reused."""
        return self.events("tls", hostname)

    def requests(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per request: path, headers, and what handshakes() says."""
        return self.events("request", hostname)

    def ends(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per connection that is over: who ended it and how, and what it carried."""
        return self.events("end", hostname)

    def proxied(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per CONNECT: target, headers."""
        return [row for row in self.lines("proxy.jsonl", hostname) if row["event"] == "request"]


@pytest.fixture
def edge(tmp_path: pathlib.Path, certificates: pathlib.Path) -> Iterator[Edge]:
    """The edge: .far(hostname, address), .fault(hostname, **switches), .port, .proxy, .environ, .requests(), ..."""
    directory = tmp_path / "edge"
    directory.mkdir()
    program = Edge(directory, certificates)
    yield program
    program.stop()


# -- tunnel programs, one like the other -------------------------------------------------------


class TunnelProgram(NamedTuple):
    """A tunnel program, as a router is told of it: what drives it needs no more."""

    options: tuple[str, ...]
    environ: dict[str, str]
    far: Callable[[str, Address], None]  # where a hostname leads


REAL = "SNIROUTE_TEST_CLOUDFLARED"  # the variable that names a real cloudflared, which no CI has
PROGRAMS = ("stand-in", "carrier", "carrier by its path", *(["cloudflared"] if REAL in os.environ else []))


@pytest.fixture(params=PROGRAMS)
def tunnel_program(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> TunnelProgram:
    """The stand-in, the carrier, and a real cloudflared where there is one."""
    if request.param == "stand-in":
        stand_in = request.getfixturevalue("cloudflared")
        return TunnelProgram((f"--cloudflared={stand_in.path}",), {}, stand_in.far)
    edge = request.getfixturevalue("edge")
    if request.param == "carrier":  # no cloudflared is found
        return TunnelProgram((), {**edge.environ, "PATH": ""}, edge.far)
    path = os.environ.get(REAL, "")
    if request.param == "carrier by its path":
        path = str(tmp_path / "sniroute_carrier.py")  # its own first line may find another Python
        pathlib.Path(path).write_text(f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(HERE)!r})\n"
                                      "import sniroute_carrier\nsys.exit(sniroute_carrier.main())\n")
        os.chmod(path, 0o700)
    return TunnelProgram((f"--cloudflared={path}",), edge.environ, edge.far)


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
