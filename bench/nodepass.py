#!/usr/bin/env python3
"""nodepass: what a tunnel to a service behind NAT costs, beside the original program; in one run.

    python3 bench/nodepass.py [--quick] [--json FILE]

    callers ----- server://  ======= pool =======  client:// ----- far end (this file, --far-end)
    (this file)   a process                        a process       TCP: sends, takes, echoes; UDP: echoes
    callers ----- client:// alone (mode=1) ----------------------- far end

The columns:

    sniroute     sniroute_nodepass.py at both ends, started as sniroute starts it
    the original the program that SNIROUTE_TEST_NODEPASS names, at both ends; without it its figures as they were
                 measured on another day (ORIGINAL)
    times        sniroute's figure by the original's
    bar          what that is held against; a figure that misses it is marked.  That is a result: the exit code is 1
                 only if something failed or could not be measured

Each figure is the median of the rounds.  CPU is the kernel's CPU clock of both ends together, memory is resident
(/proc/PID/smaps_rollup) of both.  Needs Linux.  Everything stays on 127.0.0.1, and everything that was started is
stopped, also after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import resource
import select
import selectors
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple

from routers import lay_out, medians, output_of, version
from tunnels import (HOST, MIB, PROJECT, Failed, Figures, Processes, cpu_seconds, free_port, host_facts, listens,
                     memory, wait_for)

HERE = pathlib.Path(__file__).resolve()
ORIGINAL_PROGRAM = "SNIROUTE_TEST_NODEPASS"
PORTS = range(3000, 10000)  # for listeners: below the ephemeral ports, and apart from those of the tests
BLOCK = MIB  # bytes that are sent or taken at a time
MESSAGE = 64  # bytes that a small connection sends, and gets back
AT_ONCE = 16  # small connections under way
DATAGRAM = 512  # bytes
UDP_CALLERS, UDP_WINDOW = 4, 16  # addresses, and datagrams under way from each
LOST_AFTER = 0.5  # seconds after which a datagram counts as lost, and another one is sent
OPEN = 1000  # connections that are held open
STARTED = 1.0  # seconds within which a start is to be up
PATIENCE = 40.0  # seconds after which it never will be
SETTLE = 0.3  # seconds between a start and what is measured

OUR_CODE = "import sys; sys.path.insert(0, sys.argv.pop(1)); import sniroute_nodepass as n; sys.exit(n.main())"
OURS = [sys.executable, "-I", "-S", "-c", OUR_CODE, str(PROJECT)]


class Scale(NamedTuple):
    """How much is measured."""

    rounds: int
    bulk: int  # bytes of one stream
    connections: int
    seconds: float  # of datagrams
    starts: int

    def __str__(self) -> str:
        return (f"rounds: {self.rounds}, each with streams of {self.bulk // MIB} MiB, {self.connections} connections, "
                f"{self.seconds:g} s of datagrams; {self.starts} starts")


FULL, QUICK = Scale(3, 2048 * MIB, 5000, 3.0, 40), Scale(1, 128 * MIB, 500, 0.5, 3)


class Case(NamedTuple):
    """A kind of tunnel."""

    key: str  # in front of those of Figures
    label: str
    query: str  # of the server


CASES = (
    Case("plain", "TCP", "type=0&tls=0"),
    Case("tls", "TLS (tls=1)", "type=0&tls=1"),
    Case("ws", "WebSocket", "type=2&tls=0"),
    Case("h2", "HTTP/2 (tls=1)", "type=3&tls=1"),
)
PLAIN, TLS = CASES[:2]


class Row(NamedTuple):
    """A line of the table."""

    key: str  # in Figures
    label: str
    digits: int  # behind the point
    least: float | None = None  # times the original's: the bar
    most: float | None = None
    all_of: bool = False  # the bar is: all starts


ROWS = (
    *(Row(f"{case.key}_down_mb_s", f"{case.label}: down, MB/s", 0, {"plain": 1.5, "tls": 0.9}.get(case.key)) if not cpu
      else Row(f"{case.key}_down_cpu_s", "  CPU for a GB, s", 2) for case in CASES for cpu in (False, True)),
    *(Row(f"{case.key}_up_mb_s", f"{case.label}: up, MB/s", 0, {"plain": 1.5, "tls": 0.9}[case.key]) if not cpu else
      Row(f"{case.key}_up_cpu_s", "  CPU for a GB, s", 2) for case in (PLAIN, TLS) for cpu in (False, True)),
    Row("plain_conn_s", f"TCP: new connections a second, {AT_ONCE} at a time", 0, 2.0),
    Row("plain_p50_ms", "  p50, ms", 1),
    Row("plain_p99_ms", "  p99, ms", 1, most=0.25),
    Row("plain_conn_cpu_s", "  CPU for 5,000, s", 2),
    Row("tls_conn_s", "TLS: new connections a second", 0, 2.0),
    Row("tls_p50_ms", "  p50, ms", 1),
    Row("tls_p99_ms", "  p99, ms", 1, most=0.25),
    Row("tls_conn_cpu_s", "  CPU for 5,000, s", 2),
    Row("plain_idle_mb", "TCP: memory of both ends, MB", 1),
    Row("plain_open_mb", f"  with {OPEN} connections open", 1, most=0.4),
    Row("tls_idle_mb", "TLS: memory of both ends, MB", 1),
    Row("tls_open_mb", f"  with {OPEN} connections open", 1, most=0.4),
    Row("plain_udp_s", f"TCP: UDP echoes of {DATAGRAM} bytes a second", 0, 0.5),
    Row("plain_udp_cpu_s", "  CPU for 100,000, s", 2),
    Row("single_down_mb_s", "one end alone: down, MB/s", 0),
    Row("single_down_cpu_s", "  CPU for a GB, s", 2),
    Row("single_conn_s", "  new connections a second", 0),
    Row("single_p99_ms", "  p99, ms", 1),
    Row("single_conn_cpu_s", "  CPU for 5,000, s", 2),
    Row("single_open_mb", f"  memory with {OPEN} connections open, MB", 1),
    Row("single_udp_s", "  UDP echoes a second", 0),
    Row("plain_started", "TCP: starts up within a second", 0, all_of=True),
    Row("plain_start_ms", "  median, ms", 0),
    Row("plain_start_most_ms", "  slowest, ms", 0),
    Row("tls_started", "TLS: starts up within a second", 0, all_of=True),
    Row("tls_start_ms", "  median, ms", 0),
    Row("tls_start_most_ms", "  slowest, ms", 0),
    Row("failed", "connections that failed", 0),
)

# The original, version 2, both ends, on two cores that other work shared: medians of three, +-30 %.  Starts: of 40.
ORIGINAL = "the original, as measured earlier"
ORIGINAL_FIGURES: Figures = {
    "plain_down_mb_s": 588, "plain_down_cpu_s": 1.5, "plain_up_mb_s": 747, "plain_up_cpu_s": 1.1,
    "tls_down_mb_s": 353, "tls_down_cpu_s": 2.9, "tls_up_mb_s": 416, "tls_up_cpu_s": 2.1,
    "ws_down_mb_s": 343, "ws_down_cpu_s": 3.5, "h2_down_mb_s": 187, "h2_down_cpu_s": 5.2,
    "plain_conn_s": 708, "plain_p50_ms": 5, "plain_p99_ms": 183, "plain_conn_cpu_s": 2.65,
    "tls_conn_s": 317, "tls_p50_ms": 6, "tls_p99_ms": 678, "tls_conn_cpu_s": 9.5,
    "plain_idle_mb": 27, "plain_open_mb": 82, "tls_idle_mb": 36, "tls_open_mb": 153,
    "plain_udp_s": 15600, "plain_udp_cpu_s": 5.7,
    "single_down_mb_s": 830, "single_down_cpu_s": 0.9, "single_conn_s": 4140, "single_p99_ms": 13,
    "single_conn_cpu_s": 0.84, "single_open_mb": 40, "single_udp_s": 28000,
    "plain_started": 38, "tls_started": 25,
}


# -- the far end -------------------------------------------------------------------------------

HEAD = struct.Struct(">cQ")  # what is asked for: d, u or e; and how many bytes
DONE = b"!"  # the far end has taken all of an upload


def stream(sock: socket.socket, what: bytes, size: int) -> None:
    """Send, or take, so many bytes."""
    with sock, contextlib.suppress(OSError):
        sock.setblocking(True)
        if what == b"d":
            block = bytes(BLOCK)
            for _ in range(size // BLOCK):
                sock.sendall(block)
        else:
            take(sock, size)
            sock.sendall(DONE)
        sock.recv(1)


def far_end() -> None:
    """Listen, and print the port, TCP and UDP; until stdin ends."""
    listener = socket.create_server((HOST, 0), backlog=4096)
    datagrams = socket.socket(type=socket.SOCK_DGRAM)
    datagrams.bind(listener.getsockname())
    for sock in (listener, datagrams):
        sock.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    selector = selectors.DefaultSelector()
    for source in (listener, datagrams, sys.stdin):
        selector.register(source, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            sock = key.fileobj
            with contextlib.suppress(BlockingIOError):
                if sock is sys.stdin:
                    return
                if sock is listener:
                    while True:
                        client, _ = listener.accept()
                        client.setblocking(False)
                        selector.register(client, selectors.EVENT_READ, b"?")
                elif sock is datagrams:
                    while True:
                        data, address = datagrams.recvfrom(65536)
                        datagrams.sendto(data, address)
                else:
                    answer(selector, key)


def answer(selector: selectors.BaseSelector, key: Any) -> None:
    """Bytes of a client, or its end."""
    sock = key.fileobj
    try:
        data = sock.recv(BLOCK)
    except ConnectionError:
        data = b""
    if data and key.data == b"?":  # what it wants; a head comes whole, being the first thing on a connection
        what, size = HEAD.unpack_from(data)
        if what != b"e":
            selector.unregister(sock)
            threading.Thread(target=stream, args=(sock, what, size - (len(data) - HEAD.size) * (what == b"u")),
                             daemon=True).start()
            return
        selector.modify(sock, selectors.EVENT_READ, what)
        data = data[HEAD.size:]
        if not data:
            return
    if data:
        sock.send(data)
    else:
        selector.unregister(sock)
        sock.close()


# -- callers -----------------------------------------------------------------------------------


def take(sock: socket.socket, size: int) -> None:
    """Receive so many bytes.  Raises Failed where there are fewer."""
    space = bytearray(BLOCK)
    while size > 0:
        count = sock.recv_into(space, min(size, BLOCK))
        if not count:
            raise Failed(f"the connection ended {size} bytes early")
        size -= count


def ask(address: tuple[str, int], what: bytes, size: int = 0) -> socket.socket:
    """A connection on which something was asked for."""
    sock = socket.create_connection(address, timeout=20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(HEAD.pack(what, size))
    return sock


def transfer(address: tuple[str, int], direction: str, size: int) -> float:
    """The seconds that one stream takes."""
    if direction == "down":
        with ask(address, b"d", size) as sock:
            take(sock, BLOCK)  # the connection is made
            began = time.perf_counter()
            take(sock, size - BLOCK)
            return (time.perf_counter() - began) * size / (size - BLOCK)
    block = bytes(BLOCK)
    began = time.perf_counter()
    with ask(address, b"u", size) as sock:
        for _ in range(size // BLOCK):
            sock.sendall(block)
        take(sock, len(DONE))
    return time.perf_counter() - began


class Short:
    """One connection: made, a message there and back, closed."""

    def __init__(self, address: tuple[str, int]):
        self.began = time.perf_counter()
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.connect_ex(address)
        self.asked = False

    def act(self) -> bool | None:
        """Go on; at the end whether it was served."""
        try:
            if not self.asked:
                self.sock.send(HEAD.pack(b"e", 0) + bytes(MESSAGE))
                self.asked = True
                return None
            return len(self.sock.recv(2 * MESSAGE)) == MESSAGE
        except OSError:
            return False


def connect_often(address: tuple[str, int], count: int) -> tuple[float, list[float], int]:
    """So many connections, AT_ONCE at a time: the seconds of all, those of each, and how many failed."""
    poller, open_ones, times, failed = select.epoll(), {}, [], 0
    left = count
    began = time.perf_counter()

    def begin() -> None:
        short = Short(address)
        open_ones[short.sock.fileno()] = short
        poller.register(short.sock, select.EPOLLOUT)

    with poller:
        for _ in range(min(AT_ONCE, count)):
            begin()
            left -= 1
        while open_ones:
            events = poller.poll(PATIENCE)
            if not events:
                raise Failed(f"no connection within {PATIENCE:g} s")
            for fd, _ in events:
                short = open_ones[fd]
                good = short.act()
                if good is None:
                    poller.modify(fd, select.EPOLLIN)
                    continue
                failed += not good
                times.append(time.perf_counter() - short.began)
                del open_ones[fd]
                short.sock.close()
                if left:
                    begin()
                    left -= 1
    return time.perf_counter() - began, sorted(times), failed


def echo_datagrams(address: tuple[str, int], seconds: float) -> float:
    """Echoes a second."""
    socks = []
    with contextlib.ExitStack() as stack:
        for _ in range(UDP_CALLERS):
            sock = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            sock.connect(address)
            sock.setblocking(False)
            socks.append(sock)
        data, echoes = bytes(DATAGRAM), 0
        poller = stack.enter_context(select.epoll())
        by_fd = {sock.fileno(): sock for sock in socks}
        heard = dict.fromkeys(by_fd, 0.0)  # when; or when it was filled up
        for fd in by_fd:
            poller.register(fd, select.EPOLLIN)
        began = time.perf_counter()
        counted_from, counted = began + seconds / 4, 0  # the first quarter makes the flows
        while (now := time.perf_counter()) < began + seconds * 1.25:
            for fd, sock in by_fd.items():
                if now - heard[fd] > LOST_AFTER:
                    heard[fd] = now
                    for _ in range(UDP_WINDOW):
                        with contextlib.suppress(OSError):
                            sock.send(data)
            for fd, _ in poller.poll(0.1):
                sock, heard[fd] = by_fd[fd], now
                with contextlib.suppress(BlockingIOError):
                    while sock.recv(65536):
                        echoes += 1
                        sock.send(data)
            if now < counted_from:
                counted = echoes
        if echoes == counted:
            raise Failed("no datagram came back")
        return (echoes - counted) / (time.perf_counter() - counted_from)


# -- tunnels -----------------------------------------------------------------------------------


class Tunnel:
    """Both ends, or one that is alone."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], address: tuple[str, int]):
        self.processes = processes
        self.address = address  # where callers come in

    def cpu(self) -> float:
        """CPU of all ends, seconds."""
        return sum(cpu_seconds(process.pid) for process in self.processes)

    def memory(self) -> float:
        """Resident memory of all ends, MB."""
        return sum(memory(process.pid).rss for process in self.processes) * 1024 / 1e6


class Lab:
    """The far end, and what is started in front of it."""

    def __init__(self, processes: Processes, scale: Scale):
        self.processes, self.scale = processes, scale
        self.candidates = itertools.islice(itertools.cycle(PORTS), os.getpid() * 50 % len(PORTS), None)
        far = processes.start([sys.executable, "-I", "-S", "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); "
                               "import nodepass; nodepass.far_end()", str(HERE.parent)], {},
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        line = far.stdout.readline()
        if not line:
            raise Failed(f"the far end: {processes.words(far)}")
        self.far = HOST, int(line)

    def port(self) -> int:
        """A port that nobody holds."""
        return free_port(itertools.islice(self.candidates, len(PORTS)))

    @contextlib.contextmanager
    def tunnel(self, argv: list[str], query: str) -> Iterator[tuple[Tunnel, float]]:
        """Two ends; also the seconds from their start until a caller got its echo.  `query`: "": one end alone."""
        pool, callers = self.port(), self.port()
        far = f"{HOST}:{self.far[1]}"
        urls = ([f"server://bench@{HOST}:{pool}/{HOST}:{callers}?mode=1&log=none&{query}",
                 f"client://bench@{HOST}:{pool}/{far}?mode=2&log=none"] if query else
                [f"client://bench@{HOST}:{callers}/{far}?mode=1&log=none"])
        began, address = time.perf_counter(), (HOST, callers)
        started: list[subprocess.Popen[bytes]] = []
        try:
            for url in urls:
                started.append(self.processes.start([*argv, url], {"PATH": os.defpath}))
                if url.startswith("server:"):  # the original's client waits for 3 s where it comes too early
                    server = started[0]
                    wait_for(lambda: listens(server.pid, pool) or server.poll() is not None, PATIENCE, "a server")
            while not served(address):
                if time.perf_counter() - began > PATIENCE:
                    raise Failed(f"not up within {PATIENCE:g} s")
                if any(process.poll() is not None for process in started):
                    raise Failed(f"an end has ended: {'; '.join(map(self.processes.words, started))}")
                time.sleep(0.01)
            yield Tunnel(started, address), time.perf_counter() - began
        finally:
            self.processes.stop(*(process for process in started if process in self.processes.running))


def served(address: tuple[str, int]) -> bool:
    """Whether a caller gets its echo."""
    try:
        with ask(address, b"e") as sock:
            sock.sendall(b"?")
            return sock.recv(1) == b"?"
    except OSError:
        return False


# -- what is measured --------------------------------------------------------------------------


def used(tunnel: Tunnel, act: Callable[[], Any]) -> tuple[Any, float]:
    """What `act` returns, and the CPU that it took."""
    before = tunnel.cpu()
    return act(), tunnel.cpu() - before


def measure_stream(tunnel: Tunnel, key: str, direction: str, size: int) -> Figures:
    """One stream."""
    took, cpu = used(tunnel, lambda: transfer(tunnel.address, direction, size))
    return {f"{key}_{direction}_mb_s": size / took / 1e6, f"{key}_{direction}_cpu_s": cpu / size * 1e9}


def measure_connections(tunnel: Tunnel, key: str, count: int) -> Figures:
    """Small connections, one after another."""
    (took, times, failed), cpu = used(tunnel, lambda: connect_often(tunnel.address, count))
    return {f"{key}_conn_s": count / took, f"{key}_p50_ms": 1e3 * statistics.median(times),
            f"{key}_p99_ms": 1e3 * times[int(0.99 * len(times))], f"{key}_conn_cpu_s": cpu / count * 5000,
            "failed": failed}


def measure_datagrams(tunnel: Tunnel, key: str, seconds: float) -> Figures:
    """Echoes."""
    rate, cpu = used(tunnel, lambda: echo_datagrams(tunnel.address, seconds))
    return {f"{key}_udp_s": rate, f"{key}_udp_cpu_s": cpu / (rate * seconds * 1.25) * 100_000}


def measure_memory(tunnel: Tunnel, key: str) -> Figures:
    """Of a tunnel that has done nothing yet."""
    found = {f"{key}_idle_mb": tunnel.memory()}
    with contextlib.ExitStack() as stack:
        for _ in range(OPEN):  # one after another: this is no test of a burst
            sock = stack.enter_context(ask(tunnel.address, b"e"))
            sock.sendall(b"?")
            take(sock, 1)
        found[f"{key}_open_mb"] = tunnel.memory()
    return found


def parts() -> Iterator[tuple[str, str, Callable[[Tunnel, Scale], Figures]]]:
    """What is measured in a round: words, the query of a tunnel of its own, and how."""
    for case in CASES:
        key = case.key
        yield f"{case.label}, down", case.query, lambda tunnel, scale: measure_stream(tunnel, key, "down", scale.bulk)
        if case in (PLAIN, TLS):
            yield f"{case.label}, up", case.query, lambda tunnel, scale: measure_stream(tunnel, key, "up", scale.bulk)
            yield f"{case.label}, memory", case.query, lambda tunnel, scale: measure_memory(tunnel, key)
            yield (f"{case.label}, connections", case.query,
                   lambda tunnel, scale: measure_connections(tunnel, key, scale.connections))
    yield "UDP", PLAIN.query, lambda tunnel, scale: measure_datagrams(tunnel, "plain", scale.seconds)
    yield "one end, down", "", lambda tunnel, scale: measure_stream(tunnel, "single", "down", scale.bulk)
    yield "one end, memory", "", lambda tunnel, scale: measure_memory(tunnel, "single")
    yield "one end, connections", "", lambda tunnel, scale: measure_connections(tunnel, "single", scale.connections)
    yield "one end, UDP", "", lambda tunnel, scale: measure_datagrams(tunnel, "single", scale.seconds)


def measure_starts(lab: Lab, argv: list[str], case: Case) -> Figures:
    """Both ends started at the same moment, over and over."""
    times = []
    for _ in range(lab.scale.starts):
        try:
            with lab.tunnel(argv, case.query) as (_, took):
                times.append(took)
        except Failed:
            times.append(PATIENCE)
    return {f"{case.key}_started": sum(took <= STARTED for took in times),
            f"{case.key}_start_ms": 1e3 * statistics.median(times), f"{case.key}_start_most_ms": 1e3 * max(times)}


def misses(row: Row, ours: float, theirs: float | None, starts: int) -> bool:
    """Whether a figure misses its bar."""
    if row.all_of:
        return ours < starts
    if not theirs:
        return False
    return (row.least is not None and ours < row.least * theirs) or (row.most is not None and ours > row.most * theirs)


def show(columns: dict[str, Figures], starts: int) -> str:
    """The table."""
    ours, theirs = columns.values()
    lines = [("", *columns, "times", "bar", "")]
    for row in ROWS:
        cells = [f"{figures[row.key]:.{row.digits}f}" if row.key in figures else "-" for figures in columns.values()]
        mine, other = ours.get(row.key), theirs.get(row.key)
        times = f"{mine / other:.2f}" if mine is not None and other and not row.all_of else ""
        bar = (f"{starts}" if row.all_of else f"{row.least:g} and more" if row.least is not None else
               f"{row.most:g} and less" if row.most is not None else "")
        missed = mine is not None and misses(row, mine, other, starts)
        lines.append((row.label, *cells, times, bar, "missed" if missed else ""))
    return lay_out(lines)


def main() -> int:
    """The command line.  Returns the exit code: 0, or 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description="Measures sniroute_nodepass.py beside the original program.")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, and one round")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    given = parser.parse_args()
    if not os.path.exists("/proc/self/smaps_rollup"):
        parser.error("/proc/self/smaps_rollup is not here")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scale, facts = QUICK if given.quick else FULL, host_facts()
    facts["sniroute"] = version(output_of(*OURS, "--version"))  # this start compiles
    programs = {"sniroute": OURS}
    path = os.environ.get(ORIGINAL_PROGRAM)
    if path:
        programs["the original"] = [path]
    columns: dict[str, Figures] = {}
    failed: dict[str, str] = {}

    @contextlib.contextmanager
    def attempt(what: str) -> Iterator[None]:
        """Run a part.  A failure is noted, and ends this part only."""
        try:
            yield
        except (Failed, OSError) as error:
            failed[what] = str(error)

    with tempfile.TemporaryDirectory(prefix="sniroute-bench-") as folder:
        processes = Processes(pathlib.Path(folder))
        try:
            lab = Lab(processes, scale)
            rounds: dict[str, list[Figures]] = {title: [] for title in programs}
            for number, (title, argv) in itertools.product(range(1, scale.rounds + 1), programs.items()):
                print(f"round {number}: {title} ...", file=sys.stderr, flush=True)
                for words, query, measure in parts():
                    with attempt(f"round {number}: {title}: {words}"), lab.tunnel(argv, query) as (tunnel, _):
                        time.sleep(SETTLE)
                        rounds[title].append(measure(tunnel, scale))
            for case, (title, argv) in itertools.product((PLAIN, TLS), programs.items()):
                print(f"starts, {case.label}: {title} ...", file=sys.stderr, flush=True)
                with attempt(f"starts, {case.label}: {title}"):
                    rounds[title].append(measure_starts(lab, argv, case))
            columns = {title: medians(found) for title, found in rounds.items()}
        except KeyboardInterrupt:
            return 130
        except (Failed, OSError) as error:
            failed["the benchmark"] = str(error)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            processes.stop(*processes.running)

    if not path:
        columns[ORIGINAL] = ORIGINAL_FIGURES
    for title, figures in columns.items():
        if figures.get("failed"):
            failed[f"connections: {title}"] = f"{figures['failed']:.0f} of {scale.connections} failed"
    print(f"{facts['date']}, sniroute {facts['sniroute']}, Python {facts['python']}, {facts['openssl']},\n"
          f"  {facts['cores']} x {facts['cpu']}, Linux {facts['kernel']}, load {facts['load'][0]} at the start\n"
          f"{scale}")
    if len(columns) == 2:
        print(f"\n{show(columns, scale.starts)}")
    if not path:
        print(f"the original is not here ({ORIGINAL_PROGRAM} names it): its figures are of another day",
              file=sys.stderr)
    print(*(f"{what}: FAILED: {why}" for what, why in failed.items()), sep="\n", file=sys.stderr)
    if given.json:
        with open(given.json, "w") as file:
            json.dump({**facts, "quick": given.quick, "scale": scale._asdict(),
                       "labels": {row.key: row.label for row in ROWS}, "columns": columns, "failures": failed},
                      file, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
