"""The far ends of tunnels: stand-ins for cloudflared and for Cloudflare's edge, and the fixtures that start them.

    cloudflared      the stand-in for the program (testbed/fake_cloudflared.py), for one test
    own_edge         the stand-in for the edge (testbed/fake_edge.py), for one test
    certificates     the folder with the certificates of edges, for all tests
    nursery          forks stand-ins for the edge and for a cluster (testbed/nursery.py)
    tunnel_program   a test that takes it runs once with each tunnel program: stand-in, carrier, a real cloudflared
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from conftest import HERE, HOST, Address, lasting, wait_until
from testbed.endure_router import taking_orphans

TESTBED = HERE / "testbed"


# -- the stand-in for cloudflared --------------------------------------------------------------


class StandIn:
    """The directory of a stand-in, which reads its switches there and writes its records."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.tables: dict[str, dict[str, Any]] = {"far.json": {}, "faults.json": {}}

    def set(self, name: str, hostname: str, value: Any) -> None:
        """Change one entry.  The file is replaced, so that the stand-in never reads half of one."""
        self.tables[name][hostname] = value
        new = self.directory / f"{name}.new"
        new.write_text(json.dumps(self.tables[name]))
        new.replace(self.directory / name)

    def far(self, hostname: str, address: Address) -> None:
        """Let `hostname` lead to an address; "*" stands for every hostname without an entry."""
        self.set("far.json", hostname, list(address))

    def fault(self, hostname: str, **switches: Any) -> None:
        """Set the switches of `hostname` from now on; "*" stands for every hostname without an entry."""
        self.set("faults.json", hostname, switches)

    def lines(self, name: str, hostname: str | None) -> list[dict[str, Any]]:
        """The records in a file, of one hostname or of all (None)."""
        try:
            text = (self.directory / name).read_text()
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [row for row in rows if hostname in (None, row["hostname"])]


class Cloudflared(StandIn):
    """The stand-in for the program cloudflared; see fake_cloudflared.py for the switches."""

    def __init__(self, directory: pathlib.Path):
        super().__init__(directory)
        self.path = str(directory / "cloudflared")
        # A wrapper: importing the compiled file is faster than running the source.
        pathlib.Path(self.path).write_text(
            f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(TESTBED)!r})\n"
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
        if program.runs(row["detached"]):  # it is nobody's child, so nobody else ends it
            os.kill(row["detached"], signal.SIGKILL)
    pids = {row["pid"] for row in program.starts() + program.clients()}
    try:
        wait_until(lambda: not any(map(program.runs, pids)), timeout=2, what="the end of all stand-ins")
    finally:
        for pid in filter(program.runs, pids):
            os.kill(pid, signal.SIGKILL)


# -- stand-ins that are forked -----------------------------------------------------------------


class Forked:
    """A process that the nursery has forked, as a Popen without an exit code."""

    def __init__(self, pid: int, pidfd: int):
        self.pid, self.pidfd = pid, pidfd

    def poll(self) -> int | None:
        """None while it runs."""
        return 0 if self.pidfd < 0 or select.select([self.pidfd], [], [], 0)[0] else None

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its end.  Raises subprocess.TimeoutExpired."""
        if self.pidfd >= 0:
            if not select.select([self.pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a stand-in", timeout or 0)
            os.close(self.pidfd)
            self.pidfd = -1

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            signal.pidfd_send_signal(self.pidfd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Child:
    """A process that a nursery has forked and that is a child of this one, as a Popen."""

    def __init__(self, pid: int, **streams: Any):
        self.pid = pid
        self.returncode: int | None = None
        self.stdin, self.stdout, self.stderr = (streams.get(name) for name in ("stdin", "stdout", "stderr"))

    def _reap(self, options: int = 0) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._reap(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.  Returns the exit code.  Raises subprocess.TimeoutExpired."""
        if self.returncode is None and timeout is not None:
            fd = os.pidfd_open(self.pid)
            try:
                if not select.select([fd], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("a forked program", timeout)
            finally:
                os.close(fd)
        return self._reap()

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def ended(self, timeout: float = 60) -> tuple[int, bytes, bytes]:
        """Wait for its end.  Returns its exit code, and what it said, which must fit into its pipes: 64 KiB each.

        Raises subprocess.TimeoutExpired, and has killed it then.
        """
        with self.stdout, self.stderr:
            try:
                code = self.wait(timeout)
            finally:
                self.kill()
                self.wait()
            return code, self.stdout.read(), self.stderr.read()


class Nursery:
    """A process that forks programs: testbed/nursery.py.  `python` runs it, `environ` are its variables."""

    def __init__(self, *modules: str, python: tuple[str, ...] = (sys.executable, "-IS"),
                 environ: dict[str, str] | None = None):
        self.environ = environ
        self.lock = threading.Lock()
        self.orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.orders.settimeout(20)
        code = f"import sys; sys.path[:0] = {[str(HERE), str(TESTBED)]!r}; import nursery; nursery.main(*{modules!r})"
        with theirs:
            self.process = subprocess.Popen([*python, "-c", code], stdin=theirs,
                                            stdout=subprocess.DEVNULL, env=environ)

    def _order(self, fds: list[int], **order: Any) -> tuple[int, int]:
        """One at a time; some tests start programs in several threads."""
        with self.lock, taking_orphans() if order["child"] else contextlib.nullcontext():
            socket.send_fds(self.orders, [json.dumps(order).encode()], fds)
            pid, (pidfd,), *_ = socket.recv_fds(self.orders, 64, 1)
        return int(pid), pidfd

    def start(self, module: str, words: list[str], stdin: socket.socket | int, stderr: Any) -> Forked:
        """Fork a stand-in: `module` is its program, `words` are its command line."""
        with open(os.devnull, "wb") as stdout:
            fds = [stream if isinstance(stream, int) else stream.fileno() for stream in (stdin, stdout, stderr)]
            return Forked(*self._order(fds, module=module, words=[f"{module}.py", *words], prepare="", environ=None,
                                       cwd=None, child=False))

    def child(self, module: str, words: list[str], environ: dict[str, str], prepare: str = "",
              stdin: int = subprocess.DEVNULL, stdout: int | None = None) -> Child:
        """Fork a program that is a child of this process: `words` are all its command line.

        Its stderr is a pipe; `stdin` and `stdout` may be, as with Popen.
        """
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            fds, streams = [], {}
            for number, (name, kind) in enumerate((("stdin", stdin), ("stdout", stdout), ("stderr", subprocess.PIPE))):
                if kind == subprocess.PIPE:
                    ends = os.pipe()
                    streams[name] = ours.enter_context(open(ends[not number], "rb" if number else "wb"))
                    fd = ends[bool(number)]
                else:
                    fd = os.open(os.devnull, os.O_RDWR) if kind == subprocess.DEVNULL else os.dup(number)
                theirs.callback(os.close, fd)
                fds.append(fd)
            pid, pidfd = self._order(fds, module=module, words=words, prepare=prepare, environ=environ,
                                     cwd=os.getcwd(), child=True)
            os.close(pidfd)
            ours.pop_all()
        return Child(pid, **streams)

    def close(self) -> None:
        self.orders.close()
        self.process.wait()


@contextlib.contextmanager
def nursery_of(*modules: str, **options: Any) -> Iterator[Nursery]:
    """A nursery to the end of the run."""
    if not hasattr(os, "pidfd_open"):
        pytest.skip("needs Linux's pidfd_open(2)")
    with contextlib.closing(Nursery(*modules, **options)) as made:
        lasting.add(made.process.pid)
        yield made
    lasting.discard(made.process.pid)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """nursery.start(module, words, stdin, stderr) -> Forked."""
    with nursery_of("fake_cluster", "fake_edge") as made:
        yield made


# -- the stand-in for the edge -----------------------------------------------------------------


def make_certificates(directory: pathlib.Path) -> None:
    """Make the certificates of fake_edge.py: ca.pem, edge.pem, and three wrong ones; each file has its key."""
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
                "-startdate", "20200101000000Z", "-enddate", f"{end}0101000000Z",  # `x509 -days` cannot set a past date
                "-extensions", section, "-out", f"{name}.pem")
        with open(directory / f"{name}.pem", "a") as file:
            file.write((directory / "edge.key").read_text())


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory with the certificates of `make_certificates`."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here (Debian package openssl)")
    directory = tmp_path_factory.mktemp("certificates")
    make_certificates(directory)
    return directory


class Edge(StandIn):
    """The stand-in for Cloudflare's edge, running; see fake_edge.py for the switches and the records."""

    def __init__(self, directory: pathlib.Path, certificates: pathlib.Path, nursery: Nursery):
        super().__init__(directory)
        for file in certificates.glob("*.pem"):
            (directory / file.name).symlink_to(file)
        self.errors = directory / "errors"
        reader, self.stdin = os.pipe()
        with open(reader, "rb") as stdin, open(self.errors, "wb") as errors:
            self.process = nursery.start("fake_edge", [str(directory)], stdin, errors)
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
        """End it; a second call does nothing.  Fails if it wrote to stderr."""
        self.process.terminate()
        self.process.wait(10)
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1
        assert self.errors.read_text() == ""

    def events(self, event: str, hostname: str | None) -> list[dict[str, Any]]:
        """The records of connections with this event."""
        return [row for row in self.lines("connections.jsonl", hostname) if row["event"] == event]

    def accepted(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per TCP connection; it has a hostname only where it came through the proxy."""
        return self.events("accepted", hostname)

    def handshakes(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per TLS handshake: sni, tls, alpn, session_reused."""
        return self.events("tls", hostname)

    def requests(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per request: path, headers, and the fields of handshakes()."""
        return self.events("request", hostname)

    def ends(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per connection that is over: who ended it and how, and what it carried."""
        return self.events("end", hostname)

    def proxied(self, hostname: str | None = None) -> list[dict[str, Any]]:
        """One row per CONNECT: target, headers."""
        return [row for row in self.lines("proxy.jsonl", hostname) if row["event"] == "request"]


@pytest.fixture
def own_edge(tmp_path: pathlib.Path, certificates: pathlib.Path, nursery: Nursery) -> Iterator[Edge]:
    """An edge for this test alone: .far(hostname, address), .fault(hostname, **switches), .port, .proxy, .environ,
    .requests(), ...
    """
    directory = tmp_path / "edge"
    directory.mkdir()
    program = Edge(directory, certificates, nursery)
    yield program
    program.stop()


# -- every tunnel program ----------------------------------------------------------------------


HASTY = "sniroute_carrier.GRACE = 0.2"  # a client's end is told soon: for clients that want no answer then


def write_carrier(path: pathlib.Path, change: str = "") -> None:
    """Write a program that runs the carrier, after a line that may change its times."""
    path.write_text(f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(HERE)!r})\nimport sniroute_carrier\n"
                    f"{change}\nsys.exit(sniroute_carrier.main())\n")  # the file's own `#!` line may find another Python
    path.chmod(0o700)


class TunnelProgram(NamedTuple):
    """A tunnel program, as a test uses it: the router's options and variables for it, and `far`."""

    options: tuple[str, ...]
    environ: dict[str, str]
    far: Callable[[str, Address], None]  # far(hostname, address) lets a hostname lead there


REAL = "SNIROUTE_TEST_CLOUDFLARED"  # the variable that names a real cloudflared; CI has none
PROGRAMS = ("stand-in", "carrier", "carrier by its path", *(["cloudflared"] if REAL in os.environ else []))


@pytest.fixture(params=PROGRAMS)
def tunnel_program(request: pytest.FixtureRequest, tmp_path: pathlib.Path, nursery: Nursery) -> TunnelProgram:
    """The stand-in, the carrier, and a real cloudflared where there is one; `hasty carrier` where a test asks for it."""
    if request.param == "stand-in":
        stand_in = request.getfixturevalue("cloudflared")
        return TunnelProgram((f"--cloudflared={stand_in.path}",), {}, stand_in.far)
    edge = request.getfixturevalue("own_edge")
    if request.param == "carrier":  # an empty PATH: the router finds no cloudflared, and uses the carrier
        return TunnelProgram((), {**edge.environ, "PATH": ""}, edge.far)
    path = os.environ.get(REAL, "")
    if "carrier" in request.param:
        path = str(tmp_path / "sniroute_carrier.py")
        write_carrier(pathlib.Path(path), HASTY if "hasty" in request.param else "")
    return TunnelProgram((f"--cloudflared={path}",), edge.environ, edge.far)
