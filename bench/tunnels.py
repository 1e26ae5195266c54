#!/usr/bin/env python3
"""tunnels: what a tunnel program costs; compares several of them in one run.

    python3 bench/tunnels.py [--quick] [--json FILE]

    client (this process) --- tunnel program --- fake_edge.py --- far end (this file, --far-end)
         plain TCP               measured          TLS, WebSocket      plain TCP

The columns:

    carrier, a process each     `sniroute_carrier.py access tcp`, one process for each name
    carrier, shared             `sniroute_carrier.py forwarders`, one process for all names
    cloudflared                 `cloudflared access tcp`: the program that SNIROUTE_TEST_CLOUDFLARED names,
                                else the one on PATH; without either there is no such column
    cloudflared, as published   constants, measured on another machine: see PUBLISHED_ON
    edge alone, mask 0          no tunnel program: this process speaks TLS and WebSocket itself, as cheaply
                                as Python can
    edge alone, masked          likewise, but with masks that the edge has to undo, as with any program.  A
                                program that comes near these figures is limited by the edge
    far end alone               no tunnel at all: the limit of client and far end

All figures are taken outside the program.  Times are the client's, CPU is the kernel's CPU clock of the process,
memory is /proc/PID/smaps_rollup.  The kernel is asked which sockets listen on a port: a port counts as listening once
one of them is the program's, and nobody has to connect to find out.

Needs Linux, and the openssl program for the certificates.  Everything stays on 127.0.0.1, and everything that was
started is stopped, also after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import os
import pathlib
import platform
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Iterable, Iterator, NamedTuple

HOST = "127.0.0.1"
HERE = pathlib.Path(__file__).resolve()
PROJECT = HERE.parent.parent
MIB = 1 << 20

ROUND = 64 * MIB  # bytes of one timed transfer: the receiver keeps them, and hashes them after the clock has stopped
DIGEST = hashlib.sha256().digest_size
CROWD, CROWD_SIZE = 200, MIB  # connections at once, and the bytes that each echoes
IDLE = 200  # open connections whose memory is measured
FEW, MANY = 10, 100  # names that are served at once
PORTS = range(3000, 10000)  # for listeners: below the ephemeral ports, and apart from those of the tests
CHUNK = 16376  # bytes of a message: with its header it fills one TLS record, as the carrier's messages do
RECORD = 16384  # RFC 8446 5.1: room for each read, so that TLS holds nothing back that poll(2) does not see
SILENCE = 60.0  # seconds without a byte, or without a listener, after which a measurement has failed
SETTLING = 30.0  # seconds in which the edge has to see the end of all connections; the carrier takes 2 for each


class Failed(Exception):
    """Something could not be measured; the message says why."""


class Row(NamedTuple):
    """A line of the table."""

    key: str  # in Figures
    label: str
    digits: int  # behind the point
    published: str = ""  # cloudflared's figure from elsewhere


# cloudflared's published figures show an order of magnitude only: they are from another machine.
PUBLISHED = "cloudflared 2026.8.2, as published"
PUBLISHED_ON = "measured earlier on ANOTHER machine (two cores, loopback, TLS 1.3, cloudflared's own code as far end)"
ROWS = (
    Row("start_ms", "start -> listening, median, ms", 1, "66"),
    Row("start_min_ms", "start -> listening, fastest, ms", 1, "59"),
    Row("start_cpu_ms", "  CPU of it, ms", 1, "50"),
    Row("start_trust_ms", "  with the host's certificates, median, ms", 1),
    Row("name_ms", "one more name in a running process, ms", 2),
    Row("first_ms", "first connection + 1 byte, median, ms", 2),
    Row("connect_ms", "next connections + 1 byte, median, ms", 2, "2.7-3.4"),
    Row("resumed", "  of them with TLS resumed, %", 0),
    Row("connect_cpu_ms", "CPU per connection, ms", 2, "1.7"),
    Row("rtt_us", "1-byte round trip, median, us", 0, "90-180"),
    Row("down_mib_s", "down, MiB/s", 0, "213-271"),
    Row("up_mib_s", "up, MiB/s", 0, "185-275"),
    Row("echo_mib_s", "echo, MiB/s", 0, "128-154"),
    Row("down_cpu_ms", "CPU per MiB down, ms", 2, "3.7-4.2"),
    Row("up_cpu_ms", "CPU per MiB up, ms", 2, "1.5"),
    Row("echo_cpu_ms", "CPU per MiB echoed, ms", 2),
    Row("crowd_s", f"{CROWD} x {CROWD_SIZE // MIB} MiB echo at once, s", 2, "2.6"),
    Row("rss_mib", "one idle name: RSS, MiB", 1, "28.7 MB"),
    Row("private_mib", "one idle name: private dirty, MiB", 1, "10.1 MB"),
    Row("few_rss_mib", f"{FEW} names: RSS added up, MiB", 1, f"{FEW} x 28.7 MB (1)"),
    Row("few_kib", f"each further name of {FEW}: private dirty, KiB", 0, "10.1 MB"),
    Row("many_kib", f"each further name of {MANY}: private dirty, KiB", 1),
    Row("idle_kib", f"each of {IDLE} idle connections: RSS, KiB", 1, "60-90 kB"),
)
FOOTNOTE = "(1) its undocumented mode with many names in one process: 30.3 MB RSS in all"


class Scale(NamedTuple):
    """How much is measured."""

    starts: int
    connections: int
    round_trips: int
    stream: int  # rounds down, and as many up
    echo: int  # rounds echoed

    def __str__(self) -> str:
        return (f"{self.starts} starts, {self.connections} connections, {self.round_trips} round trips, "
                f"{self.stream * ROUND // MIB} MiB down and up, {self.echo * ROUND // MIB} MiB echoed")


FULL = Scale(10, 50, 5000, 16, 4)
QUICK = Scale(5, 20, 1000, 4, 1)


# -- figures of the kernel ---------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used, with its ended threads, in seconds.  Finer than the ticks of /proc/PID/stat.

    Source: linux/posix-timers.h, make_process_cpuclock(pid, CPUCLOCK_SCHED), as clock_getcpuclockid(3) makes it.
    """
    return time.clock_gettime(~pid << 3 | 2)


class Memory(NamedTuple):
    """The memory of one process, in KiB."""

    rss: int
    private: int  # private dirty pages: the memory that this process alone costs


def memory(pid: int) -> Memory:
    """The memory of a process now."""
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    return Memory(*(int(re.search(rf"^{name}: +(\d+) kB", text, re.MULTILINE)[1]) for name in ("Rss", "Private_Dirty")))


SOCK_DIAG_BY_FAMILY, NLMSG_DONE, DUMP = 20, 3, 0x301  # linux/sock_diag.h, linux/netlink.h: NLM_F_REQUEST | NLM_F_DUMP
TCP_LISTEN = 10  # net/tcp_states.h


def listening(port: int) -> set[int]:
    """The inodes of the sockets that listen on this port of HOST.

    Source: sock_diag(7).  Used instead of /proc/net/tcp, which takes milliseconds after many connections have ended:
    longer than the times that are measured here.
    """
    found = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as kernel:  # 4: NETLINK_SOCK_DIAG
        kernel.send(struct.pack("=IHHIIBBBBI48s", 72, SOCK_DIAG_BY_FAMILY, DUMP, 0, 0, socket.AF_INET,
                                socket.IPPROTO_TCP, 0, 0, 1 << TCP_LISTEN, b""))
        while True:
            data = kernel.recv(1 << 16)
            while data:
                size, kind = struct.unpack_from("=IH", data)
                if kind != SOCK_DIAG_BY_FAMILY:
                    if kind != NLMSG_DONE:
                        raise Failed("the kernel does not tell who listens (sock_diag)")
                    return found
                if data[20:22] == port.to_bytes(2, "big") and data[24:28] == socket.inet_aton(HOST):
                    found.add(int.from_bytes(data[84:88], sys.byteorder))
                data = data[(size + 3) & ~3:]


def listens(pid: int, port: int) -> bool:
    """Whether this process listens on this port of HOST."""
    inodes = {f"socket:[{inode}]" for inode in listening(port)}
    folder = f"/proc/{pid}/fd"
    for fd in os.listdir(folder) if inodes else ():
        with contextlib.suppress(FileNotFoundError):  # closed since
            if os.readlink(f"{folder}/{fd}") in inodes:
                return True
    return False


# -- the client's side -------------------------------------------------------------------------


class Wire:
    """A connection that does not block."""

    def __init__(self, address: tuple[str, int]):
        self.sock: Any = socket.create_connection(address, SILENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rest = b""  # bytes that have been received, and wait for the next Job

    def ready(self) -> Wire:
        """Stop blocking.  Returns the wire."""
        self.sock.setblocking(False)
        return self

    def send(self, data: memoryview) -> int:
        """Send what the socket takes now.  Returns the bytes of `data` that are sent."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0

    def receive(self, space: memoryview) -> int:
        """Fill `space` with what has come.  Returns the count of bytes, 0 for nothing yet; raises Failed at the end."""
        try:
            count = self.sock.recv_into(space)
        except BlockingIOError:
            return 0
        if not count:
            raise Failed("the connection has ended")
        return count


class EdgeWire(Wire):
    """A connection to the edge without a tunnel program in between.

    The mask of every frame is the byte `key`, four times.  0 changes nothing.  With any other the edge has the full
    work of four bytes, and this end the work of one.
    """

    def __init__(self, edge: Edge, hostname: str, key: int):
        super().__init__(edge.proxy)
        self.ask(f"CONNECT {hostname}:443 HTTP/1.1\r\nHost: {hostname}:443\r\n\r\n", 200)
        self.sock = edge.context.wrap_socket(self.sock, server_hostname=hostname, session=edge.session)
        self.ask(f"GET / HTTP/1.1\r\nHost: {hostname}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                 "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", 101)
        edge.session = self.sock.session
        self.key = bytes([key]) * 4
        self.table = bytes(byte ^ key for byte in range(256))
        self.space = memoryview(bytearray(8 * RECORD))
        self.frame = memoryview(b"")  # the rest of a frame that is being sent
        self.size = 0  # bytes of payload in that frame
        self.part = b""  # an incomplete header of a received frame
        self.left = 0  # bytes of the received frame that have not come yet

    def ask(self, request: str, status: int) -> None:
        """Send a request, and check the status of the answer."""
        self.sock.sendall(request.encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            data = self.sock.recv(RECORD)
            if not data:
                raise Failed(f"the edge left after {answer!r}")
            answer += data
        if int(answer.split()[1]) != status:
            raise Failed(f"the edge answered {answer!r}")

    def send(self, data: memoryview) -> int:
        """Send a message from the start of `data`.  Returns the bytes of `data` in it; 0 until all of it is sent."""
        if not self.frame:
            self.size = min(len(data), CHUNK)
            head = struct.pack(">BB", 0x82, 0x80 | self.size) if self.size < 126 else \
                struct.pack(">BBH", 0x82, 0x80 | 126, self.size)
            payload = bytes(data[:self.size])
            if any(self.key):
                payload = payload.translate(self.table)
            self.frame = memoryview(b"".join((head, self.key, payload)))
        try:
            self.frame = self.frame[self.sock.send(self.frame):]
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0
        return 0 if self.frame else self.size

    def receive(self, space: memoryview) -> int:
        """Fill `space` with payload that has come.  Returns the count of bytes."""
        filled = 0
        try:
            while filled <= len(self.space) - RECORD:
                count = self.sock.recv_into(self.space[filled:])
                if not count:
                    raise Failed("the edge has ended the connection")
                filled += count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        done = 0
        for piece in self.payload(self.space[:filled]):
            count = min(len(piece), len(space) - done)
            space[done:done + count] = piece[:count]
            done += count
            self.rest += piece[count:]
        return done

    def payload(self, data: memoryview) -> list[memoryview]:
        """The payload of the frames in `data`, in pieces.  This edge sends no frame beyond 65535 bytes."""
        if self.part:
            data, self.part = memoryview(self.part + data), b""
        pieces, at = [], 0
        while at < len(data):
            if self.left:
                pieces.append(data[at:at + self.left])
                at += len(pieces[-1])
                self.left -= len(pieces[-1])
                continue
            size = 4 if len(data) - at > 1 and data[at + 1] == 126 else 2
            if len(data) - at < size:
                self.part = bytes(data[at:])
                break
            if data[at] != 0x82:
                raise Failed(f"the edge sent a frame that begins with {data[at]:#x}")
            self.left = int.from_bytes(data[at + 2:at + 4], "big") if size == 4 else data[at + 1]
            at += size
        return pieces


Dial = Callable[[], Wire]


class Job:
    """A transfer over a wire: bytes to send, and space to fill."""

    def __init__(self, wire: Wire, data: bytes | memoryview, space: bytearray):
        self.wire = wire
        self.data = memoryview(data)
        self.space = memoryview(space)
        count = min(len(wire.rest), len(self.space))
        self.space[:count] = wire.rest[:count]
        self.space, wire.rest = self.space[count:], wire.rest[count:]

    def events(self) -> int:
        """The events of poll(2) to wait for; 0 when all is done."""
        return (select.POLLOUT if self.data else 0) | (select.POLLIN if self.space else 0)

    def act(self, mask: int) -> None:
        """Send and receive what these events allow."""
        if mask & select.POLLOUT and self.data:
            self.data = self.data[self.wire.send(self.data):]
        if mask & ~select.POLLOUT and self.space:
            self.space = self.space[self.wire.receive(self.space):]


def exchange(*jobs: Job) -> None:
    """Do all transfers at once, both ways."""
    poll = select.poll()
    by_fd = {job.wire.sock.fileno(): job for job in jobs if job.events()}
    watched = {fd: job.events() for fd, job in by_fd.items()}
    for fd, events in watched.items():
        poll.register(fd, events)
    while watched:
        ready = poll.poll(SILENCE * 1000)
        if not ready:
            raise Failed(f"{len(watched)} of {len(jobs)} connections: nothing moved for {SILENCE:g} s")
        for fd, mask in ready:
            by_fd[fd].act(mask)
            events = by_fd[fd].events()
            if not events:
                poll.unregister(fd)
                del watched[fd]
            elif events != watched[fd]:
                poll.modify(fd, events)
                watched[fd] = events


def same(ours: bytes, theirs: bytes, what: str) -> None:
    """Raise Failed where bytes or digests differ."""
    if ours != theirs:
        raise Failed(f"{what}: the bytes have changed on the way")


# -- the far end -------------------------------------------------------------------------------


def far_end() -> None:
    """A server that obeys single bytes, until its standard input ends.

        d    send a round of bytes, then its digest
        u    receive a round of bytes; answer one byte when all is there, then its digest
        e    from now on, send everything back
    """
    data = os.urandom(ROUND)
    digest = hashlib.sha256(data).digest()

    def serve(sock: socket.socket) -> None:
        """One connection, in a thread of its own: commands of one byte, until its end."""
        with sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while command := sock.recv(1):
                if command == b"d":
                    sock.sendall(data)
                    sock.sendall(digest)
                elif command == b"u":
                    taken = bytearray(data)  # a copy, so that the kernel has given it pages before the transfer
                    space = memoryview(taken)
                    while space and (count := sock.recv_into(space)):
                        space = space[count:]
                    sock.sendall(b"!")
                    sock.sendall(hashlib.sha256(taken).digest())
                elif command == b"e":
                    buffer = memoryview(bytearray(256 * 1024))
                    while count := sock.recv_into(buffer):
                        sock.sendall(buffer[:count])

    def accept() -> None:
        while True:
            threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()

    listener = socket.create_server((HOST, 0), backlog=4096)
    threading.Thread(target=accept, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()
    os._exit(0)  # without waiting for the threads


# -- what is started ---------------------------------------------------------------------------


class Processes:
    """The processes that have been started, each with its log."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.running: list[subprocess.Popen[bytes]] = []
        self.logs: dict[int, pathlib.Path] = {}
        self.numbers = itertools.count()

    def start(self, argv: list[str], environ: dict[str, str], **streams: Any) -> subprocess.Popen[bytes]:
        """Start a process whose stderr goes to a file; stop() ends it."""
        log = self.directory / f"log-{next(self.numbers)}"
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **streams}
        with open(log, "wb") as stderr:
            process = subprocess.Popen(argv, env=environ, cwd=self.directory, stderr=stderr, **streams)
        self.running.append(process)
        self.logs[process.pid] = log
        return process

    def words(self, process: subprocess.Popen[bytes]) -> str:
        """The end of a process's log."""
        return self.logs[process.pid].read_text(errors="replace").strip()[-300:] or "it said nothing"

    def stop(self, *processes: subprocess.Popen[bytes]) -> None:
        """End these processes; kill them if that takes longer than a second."""
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            self.running.remove(process)


def make_certificates(directory: pathlib.Path) -> None:
    """An authority, and the edge's certificate with its key: ca.pem, edge.pem."""
    (directory / "openssl.cnf").write_text(
        "[req]\ndistinguished_name = name\n[name]\n"
        "[ca]\nbasicConstraints = critical, CA:TRUE\nkeyUsage = critical, keyCertSign\nsubjectKeyIdentifier = hash\n"
        "[edge]\nbasicConstraints = critical, CA:FALSE\nkeyUsage = digitalSignature\nextendedKeyUsage = serverAuth\n"
        "subjectKeyIdentifier = hash\nauthorityKeyIdentifier = keyid\nsubjectAltName = DNS:*.example.test\n")
    key = "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-config", "openssl.cnf"
    for words in (
        ("req", "-x509", *key, "-extensions", "ca", "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key",
         "-out", "ca.pem"),
        ("req", *key, "-subj", "/CN=edge", "-keyout", "edge.key", "-out", "edge.csr"),
        ("x509", "-req", "-in", "edge.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", "1", "-days", "2",
         "-extfile", "openssl.cnf", "-extensions", "edge", "-out", "edge.pem"),
    ):
        done = subprocess.run(["openssl", *words], cwd=directory, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise Failed(f"openssl {words[0]}: {done.stderr.strip()}")
    with open(directory / "edge.pem", "a") as file:
        file.write((directory / "edge.key").read_text())


def wait_for(predicate: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until `predicate` is true, and return its value.  Pauses grow with the time: at most 5 % late."""
    began = time.perf_counter()
    while not (result := predicate()):
        waited = time.perf_counter() - began
        if waited > seconds:
            raise Failed(f"not within {seconds:g} s: {what}")
        time.sleep(min(0.005, waited / 20))
    return result


class Edge:
    """fake_edge.py with its CONNECT proxy, and the far end that all names lead to."""

    def __init__(self, processes: Processes):
        directory = processes.directory / "edge"
        directory.mkdir()
        make_certificates(directory)
        python = [sys.executable, "-I", "-S"]
        far = processes.start([*python, str(HERE), "--far-end"], {}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        line = far.stdout.readline()
        if not line:
            raise Failed(f"the far end: {processes.words(far)}")
        self.far = HOST, int(line)
        (directory / "far.json").write_text(json.dumps({"*": self.far}))
        program = PROJECT / "testbed" / "fake_edge.py"
        edge = processes.start([*python, str(program), str(directory)], {}, stdin=subprocess.PIPE)
        ready = directory / "edge.json"
        wait_for(lambda: ready.exists() or edge.poll() is not None, SILENCE, "the edge")
        if not ready.exists():
            raise Failed(f"the edge: {processes.words(edge)}")
        self.proxy = HOST, json.loads(ready.read_text())["proxy"]
        self.records = directory / "connections.jsonl"
        self.environ = {"HTTPS_PROXY": f"http://{HOST}:{self.proxy[1]}", "SSL_CERT_FILE": str(directory / "ca.pem")}
        self.context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
        self.session: ssl.SSLSession | None = None  # the last EdgeWire's, to be resumed

    def rows(self, event: str) -> list[dict[str, Any]]:
        """The edge's records with this event."""
        lines = self.records.read_text().splitlines(keepends=True)
        return [row for row in (json.loads(line) for line in lines if line.endswith("\n")) if row["event"] == event]

    def settle(self) -> None:
        """Wait until the edge has seen the end of all connections."""
        wait_for(lambda: len(self.rows("end")) == len(self.rows("accepted")), SETTLING, "the end of all connections")


class Program(NamedTuple):
    """A tunnel program: a column of the table."""

    title: str
    argv: list[str]
    shared: bool = False  # one process carries many names, told on its standard input


# As sniroute starts it: importing the compiled file is faster than running the source.
CARRIER_CODE = "import sys; sys.path.insert(0, sys.argv.pop(1)); import sniroute_carrier as c; sys.exit(c.main())"
CARRIER = [sys.executable, "-I", "-S", "-c", CARRIER_CODE, str(PROJECT)]


def programs() -> list[Program]:
    """The programs to measure: the carrier both ways, and a real cloudflared if there is one."""
    found = [Program("carrier, a process each", [*CARRIER, "access", "tcp"]),
             Program("carrier, shared", [*CARRIER, "forwarders"], shared=True)]
    path = os.environ.get("SNIROUTE_TEST_CLOUDFLARED") or shutil.which("cloudflared")
    if path:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
        version = re.search(r"\d+\.\d+\.\d+", said)
        found.append(Program(f"cloudflared {version[0] if version else '(no version)'}",
                             [os.path.abspath(path), "access", "tcp"]))
    return found


class Tunnel:
    """A running tunnel program, and the ports it listens on, one for each name."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self.process = process
        self.pid = process.pid
        self.ports: list[int] = []

    def dial(self, index: int = 0) -> Wire:
        """Connect through it to one of its names."""
        return Wire((HOST, self.ports[index])).ready()


def free_port(candidates: Iterable[int]) -> int:
    """The first of these ports that nobody holds.  Raises Failed."""
    for port in candidates:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port
    raise Failed("no free port")


class Lab:
    """The edge, and the tunnels to it."""

    def __init__(self, processes: Processes, scale: Scale):
        self.processes = processes
        self.scale = scale
        self.edge = Edge(processes)
        self.own = len(processes.running)  # edge and far end; all further processes are tunnels
        self.home = processes.directory / "home"
        self.home.mkdir()
        self.names = (f"name-{number}.example.test" for number in itertools.count())
        self.candidates = itertools.islice(itertools.cycle(PORTS), os.getpid() * 50 % len(PORTS), None)

    def port(self) -> int:
        """A port that nobody holds."""
        return free_port(itertools.islice(self.candidates, len(PORTS)))

    def launch(self, program: Program, trust: bool = False) -> tuple[Tunnel, float]:
        """Start a process with one name.  Returns it, and the seconds until it listened.

        `trust`: it loads the host's certificates instead of the one of our own authority.
        """
        environ = {"HOME": str(self.home), **self.edge.environ}
        if trust:
            del environ["SSL_CERT_FILE"]
        port = self.port()
        words = [] if program.shared else ["--hostname", next(self.names), "--url", f"{HOST}:{port}"]
        streams = {"stdin": subprocess.PIPE} if program.shared else {}
        began = time.perf_counter()
        tunnel = Tunnel(self.processes.start([*program.argv, *words], environ, **streams))
        if program.shared:
            return tunnel, self.add(tunnel, port, began)
        self.wait_listening(tunnel, port)
        return tunnel, time.perf_counter() - began

    def add(self, tunnel: Tunnel, port: int = 0, began: float = 0.0) -> float:
        """Add a name to a shared process.  Returns the seconds until it listened for it."""
        port = port or self.port()
        began = began or time.perf_counter()
        tunnel.process.stdin.write(f"listen {HOST}:{port} {next(self.names)}\n".encode())
        tunnel.process.stdin.flush()
        self.wait_listening(tunnel, port)
        return time.perf_counter() - began

    def wait_listening(self, tunnel: Tunnel, port: int) -> None:
        """Wait until the process listens on the port.  Raises Failed."""
        process = tunnel.process
        wait_for(lambda: listens(tunnel.pid, port) or process.poll() is not None, SILENCE, f"a listener on {port}")
        if process.returncode is not None:
            raise Failed(f"it exited with {process.returncode}: {self.processes.words(process)}")
        tunnel.ports.append(port)

    def stop(self) -> None:
        """End all tunnels, with their connections."""
        self.processes.stop(*self.processes.running[self.own:])
        self.edge.settle()


# -- what is measured --------------------------------------------------------------------------

Figures = dict[str, float]


def first_byte(dial: Dial) -> tuple[Wire, float]:
    """Open an echoing connection.  Returns it, and the seconds until its first byte was back."""
    space = bytearray(1)
    began = time.perf_counter()
    wire = dial()
    exchange(Job(wire, b"e?", space))
    took = time.perf_counter() - began
    same(space, b"?", "the first byte")
    return wire, took


def connect_once(dial: Dial) -> float:
    """The seconds until a new connection's first byte was back."""
    wire, took = first_byte(dial)
    wire.sock.close()
    return took


def measure_starts(lab: Lab, program: Program) -> Figures:
    """How long does a process take to listen, and its first connection to answer?"""
    lab.launch(program)
    lab.stop()  # this first start has compiled the program, and filled the page cache
    starts, cpu, firsts, more = [], [], [], []
    for _ in range(lab.scale.starts):
        tunnel, took = lab.launch(program)
        starts.append(took)
        cpu.append(cpu_seconds(tunnel.pid))
        firsts.append(connect_once(tunnel.dial))
        if program.shared:
            more.append(lab.add(tunnel))
        lab.stop()
    trust = []
    for _ in range(lab.scale.starts):
        tunnel, took = lab.launch(program, trust=True)
        trust.append(took)
        lab.stop()
    figures = {"start_ms": 1e3 * statistics.median(starts), "start_min_ms": 1e3 * min(starts),
               "start_cpu_ms": 1e3 * statistics.median(cpu), "start_trust_ms": 1e3 * statistics.median(trust),
               "first_ms": 1e3 * statistics.median(firsts)}
    return figures | ({"name_ms": 1e3 * statistics.median(more)} if more else {})


def measure_memory(lab: Lab, program: Program) -> Figures:
    """Memory: with one name, with open connections, and with more names."""
    tunnel, _ = lab.launch(program)
    one = memory(tunnel.pid)
    figures = {"rss_mib": one.rss / 1024, "private_mib": one.private / 1024}
    wires = [first_byte(tunnel.dial)[0]]  # the first one loads code that all share: not counted
    before = memory(tunnel.pid)
    wires += [first_byte(tunnel.dial)[0] for _ in range(IDLE)]
    figures["idle_kib"] = (memory(tunnel.pid).rss - before.rss) / IDLE
    for wire in wires:
        wire.sock.close()
    lab.stop()

    if program.shared:
        tunnel, _ = lab.launch(program)
        one = memory(tunnel.pid)
        for count, key in ((FEW, "few_kib"), (MANY, "many_kib")):
            while len(tunnel.ports) < count:
                lab.add(tunnel)
            now = memory(tunnel.pid)
            figures[key] = (now.private - one.private) / (count - 1)
            figures.setdefault("few_rss_mib", now.rss / 1024)
        lab.stop()
    else:
        tunnels = [lab.launch(program)[0] for _ in range(FEW)]
        each = [memory(tunnel.pid) for tunnel in tunnels]
        figures["few_kib"] = statistics.mean(row.private for row in each[1:])
        figures["few_rss_mib"] = sum(row.rss for row in each) / 1024
        lab.stop()
    return figures


def measure_connections(lab: Lab, dial: Dial, cpu: Callable[[], float] | None) -> Figures:
    """Connections one after the other, the first one not counted.  `cpu` returns the CPU used so far, in seconds."""
    connect_once(dial)
    lab.edge.settle()
    before = cpu() if cpu else 0.0
    known = len(lab.edge.rows("tls"))
    figures = {"connect_ms": 1e3 * statistics.median(connect_once(dial) for _ in range(lab.scale.connections))}
    lab.edge.settle()
    if cpu:
        figures["connect_cpu_ms"] = 1e3 * (cpu() - before) / lab.scale.connections
    shaken = lab.edge.rows("tls")[known:]
    if shaken:
        figures["resumed"] = 100 * sum(row["session_reused"] for row in shaken) / len(shaken)
    return figures


def measure_round_trips(lab: Lab, dial: Dial) -> Figures:
    """One byte there and back."""
    wire, _ = first_byte(dial)
    poll, space, took = select.poll(), memoryview(bytearray(1)), []
    poll.register(wire.sock.fileno(), select.POLLIN)
    for _ in range(lab.scale.round_trips):
        began = time.perf_counter()
        wire.send(memoryview(b"?"))
        while not wire.receive(space):
            poll.poll(SILENCE * 1000)
        took.append(time.perf_counter() - began)
    wire.sock.close()
    return {"rtt_us": 1e6 * statistics.median(took)}


def measure_streams(lab: Lab, dial: Dial, cpu: Callable[[], float] | None) -> Figures:
    """Large transfers on one connection.  Each round is timed, then hashed."""
    data = os.urandom(ROUND)
    digest = hashlib.sha256(data).digest()
    taken = bytearray(data)  # filled, so that the kernel has given it pages before the transfer
    answer = bytearray(DIGEST)

    def down(wire: Wire) -> float:
        """Seconds for one round down, checked."""
        began = time.perf_counter()
        exchange(Job(wire, b"d", taken))
        took = time.perf_counter() - began
        exchange(Job(wire, b"", answer))
        same(answer, hashlib.sha256(taken).digest(), "down")
        return took

    def up(wire: Wire) -> float:
        """Seconds for one round up, checked."""
        began = time.perf_counter()
        exchange(Job(wire, b"u", bytearray()))
        exchange(Job(wire, data, bytearray(1)))
        took = time.perf_counter() - began
        exchange(Job(wire, b"", answer))
        same(answer, digest, "up")
        return took

    def echo(wire: Wire) -> float:
        """Seconds for one round there and back, checked."""
        began = time.perf_counter()
        exchange(Job(wire, data, taken))
        took = time.perf_counter() - began
        same(hashlib.sha256(taken).digest(), digest, "echo")
        return took

    figures = {}
    for name, transfer, rounds in (("down", down, lab.scale.stream), ("up", up, lab.scale.stream),
                                   ("echo", echo, lab.scale.echo)):
        wire = first_byte(dial)[0] if transfer is echo else dial()
        before = cpu() if cpu else 0.0
        took = [transfer(wire) for _ in range(rounds)]
        figures[f"{name}_mib_s"] = ROUND / MIB / statistics.median(took)
        if cpu:
            figures[f"{name}_cpu_ms"] = 1e3 * (cpu() - before) / (rounds * ROUND / MIB)
        wire.sock.close()
        lab.edge.settle()
    return figures


def measure_crowd(dial: Dial) -> Figures:
    """Many connections at once, each with bytes of its own."""
    data = memoryview(os.urandom(CROWD_SIZE + 4096 * CROWD))
    wanted = [data[4096 * number:][:CROWD_SIZE] for number in range(CROWD)]
    taken = [bytearray(part) for part in reversed(wanted)]
    began = time.perf_counter()
    wires = [dial() for _ in range(CROWD)]
    exchange(*(Job(wire, b"e", bytearray()) for wire in wires))
    exchange(*map(Job, wires, wanted, taken))
    took = time.perf_counter() - began
    for wire, ours, theirs in zip(wires, wanted, taken):
        same(hashlib.sha256(ours).digest(), hashlib.sha256(theirs).digest(), "the crowd")
        wire.sock.close()
    return {"crowd_s": took}


def measure_program(lab: Lab, program: Program) -> Iterator[Figures]:
    """The figures of a program's column, part by part."""
    yield measure_starts(lab, program)
    yield measure_memory(lab, program)
    tunnel, _ = lab.launch(program)
    cpu = functools.partial(cpu_seconds, tunnel.pid)
    yield measure_connections(lab, tunnel.dial, cpu)
    yield measure_round_trips(lab, tunnel.dial)
    yield measure_streams(lab, tunnel.dial, cpu)
    yield measure_crowd(tunnel.dial)


def measure_edge(lab: Lab, key: int) -> Iterator[Figures]:
    """The figures of the edge alone.  No crowd: this process would do its 200 handshakes one after the other."""
    def dial() -> Wire:
        return EdgeWire(lab.edge, "bare.example.test", key).ready()

    lab.edge.session = None
    yield {"first_ms": 1e3 * connect_once(dial)}
    yield measure_connections(lab, dial, None)
    yield measure_round_trips(lab, dial)
    yield measure_streams(lab, dial, None)


def measure_far(lab: Lab) -> Iterator[Figures]:
    """The figures of the far end alone."""
    def dial() -> Wire:
        return Wire(lab.edge.far).ready()

    yield measure_connections(lab, dial, None)
    yield measure_round_trips(lab, dial)
    yield measure_streams(lab, dial, None)
    yield measure_crowd(dial)


# -- the table ---------------------------------------------------------------------------------


def host_facts() -> dict[str, Any]:
    """What to know about this machine and this run."""
    cpu = re.search(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "python": platform.python_version(), "openssl": ssl.OPENSSL_VERSION, "kernel": platform.release(),
            "cpu": cpu[1] if cpu else platform.machine(), "cores": len(os.sched_getaffinity(0)),
            "load": [round(value, 2) for value in os.getloadavg()]}


def show(columns: dict[str, dict[str, Any]]) -> str:
    """The table, with a line for each word of a title."""
    def cell(row: Row, figures: dict[str, Any]) -> str:
        value = figures.get(row.key, "-")
        return value if isinstance(value, str) else f"{value:.{row.digits}f}"

    heads = [title.split() for title in columns]
    height = max(map(len, heads))
    above = zip(*([""] * (height - len(head)) + head for head in heads))
    table = [("", *words) for words in above]
    table += [(row.label, *(cell(row, figures) for figures in columns.values())) for row in ROWS]
    first, *widths = [max(map(len, texts)) for texts in zip(*table)]
    return "\n".join("  ".join((label.ljust(first), *map(str.rjust, texts, widths))).rstrip()
                     for label, *texts in table)


def main() -> int:
    """The command line.  Returns the exit code: 0, or 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description="Measures tunnel programs on the project's own edge, side by side.")
    parser.add_argument("--quick", action="store_true", help="a quarter of everything")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--far-end", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.far_end:
        far_end()
    for name in ("openssl", "/proc/self/smaps_rollup"):
        if not shutil.which(name) and not os.path.exists(name):
            parser.error(f"{name} is not here")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scale, facts = QUICK if given.quick else FULL, host_facts()
    columns: dict[str, Figures] = {}
    failures: dict[str, str] = {}

    def measure(title: str, parts: Iterator[Figures]) -> None:
        """Fill a column.  A failure is noted, and ends that column only."""
        print(f"{title} ...", file=sys.stderr, flush=True)
        columns[title] = {}
        try:
            for part in parts:
                columns[title] |= part
            lab.stop()
        except (Failed, OSError) as error:
            failures[title] = str(error)
            lab.stop()

    with tempfile.TemporaryDirectory(prefix="sniroute-bench-") as folder:
        processes = Processes(pathlib.Path(folder))
        try:
            lab = Lab(processes, scale)
            for program in programs():
                measure(program.title, measure_program(lab, program))
            measure("edge alone, mask 0", measure_edge(lab, 0))
            measure("edge alone, masked", measure_edge(lab, 0x5A))
            measure("far end alone", measure_far(lab))
        except KeyboardInterrupt:
            return 130
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            processes.stop(*processes.running)

    published = {row.key: row.published for row in ROWS if row.published}
    shown: dict[str, dict[str, Any]] = {title: columns[title] for title in columns if "alone" not in title}
    shown[PUBLISHED] = published
    shown |= columns
    print(f"{facts['date']}, Python {facts['python']}, {facts['openssl']}, {facts['cores']} x {facts['cpu']}, "
          f"Linux {facts['kernel']}, load {facts['load'][0]} at the start\n{scale}\n\n{show(shown)}\n\n"
          f"{PUBLISHED}: {PUBLISHED_ON}\n{FOOTNOTE}")
    for title, why in failures.items():
        print(f"{title}: FAILED: {why}", file=sys.stderr)
    if given.json:
        with open(given.json, "w") as file:
            json.dump({**facts, "quick": given.quick, "labels": {row.key: row.label for row in ROWS},
                       "columns": columns, "published": {"what": PUBLISHED, "where": PUBLISHED_ON, **published},
                       "failures": failures}, file, indent=1)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
