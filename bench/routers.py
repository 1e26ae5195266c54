#!/usr/bin/env python3
"""routers: what sniroute costs, compared with HAProxy and nginx, and with itself under a burden; in one run.

    python3 bench/routers.py [--quick] [--only NAME,...] [--pythons [PATH ...]] [--json FILE]

    load.c, MODE --------- router --------- load.c, backend
      core B              core A      `---- load.c, access tcp: instead of cloudflared
                       is measured            core B

The first table compares routers.  Its columns:

    HAProxy, nginx      if they are installed; set up to do the same: the name decides, the bytes pass
    sniroute            with `tcp:` routes and its defaults: it logs a line for each connection
    sniroute, tunnel    with a `cloudflared:` route; load.c is the tunnel program, and not in the figures
    more of sniroute    one for each interpreter of --pythons

It compares the CPU that a router spends for the same work: the kernel's CPU clock of its processes (user and
system).  Rates and times are those of a router that is alone on its core, while the load runs on another.

The second table compares sniroute with itself, in pairs: without and with a burden, in turns (A B, B A, ...).  A
shared machine drifts within a minute by more than the difference that is looked for.

The third table is about cold names: names without a tunnel yet.  While many of them are asked for, how long do the
messages of other clients take?  Two columns: clients of sniroute itself, whose names are up; and clients of the first
column's router, which shares the core but not the work, and so shows what all those starting programs cost the core.

Needs Linux and a C compiler.  Everything stays on 127.0.0.1, and everything that was started is stopped, also after
Ctrl-C.  The exit code is 0, or 1 if something failed or could not be measured.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import glob
import itertools
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from tunnels import (HOST, MIB, PROJECT, SILENCE, Failed, Processes, cpu_seconds, free_port, host_facts, memory,
                     wait_for)

LOAD = pathlib.Path(__file__).resolve().with_name("load.c")

CLIENTS = 64  # clients that connect at once: enough to keep a router busy
TALKERS = 16  # clients that exchange small messages at once
STREAMS = 4  # connections that move bulk at once
MESSAGE = 64  # bytes
PACE = 10  # ms between two messages of a client whose times are measured: they must not queue behind each other
STREAM = 64 * MIB  # bytes that a download beside small messages moves before it connects anew
WAITING = 900  # clients that say nothing; WAITING + CLIENTS stays below sniroute's PRELUDES_MAX (1024)
PATIENT = "--max-starting=16", "--start-timeout=10m"  # start a crowd of tunnels where their start is not measured
LONG = 3600  # seconds; for load that is ended by Load.end
PORTS = range(10000, 20000)  # for listeners: below the ephemeral ports, and apart from those of bench/tunnels.py
TUNNEL_PORTS = range(20000, 32000, 1000)  # first ports for the tunnels of each sniroute that runs some
DESCRIPTORS = 2.5  # for each connection: two sockets; HAProxy's pipes take half of one more
FILES_MIN = 4096  # open files that are needed: three for each of 500 tunnels, and as many for their clients
BALANCES = "round-robin", "least", "random", "hash", "first", "latency"  # ways to choose one backend of several
SPARE = 200  # descriptors for anything else; also, connections beside those that are held open
CONNECTIONS_MAX = 10000  # connections that routers are set up for, if descriptors allow it
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"  # folders that only root has on PATH
OLDEST = [3, 11]  # the first Python that runs sniroute

Figures = dict[str, float]


class Scale(NamedTuple):
    """How much is measured."""

    rounds: int
    seconds: float  # of each measurement
    gigabyte: int  # bytes each way
    idle: int  # open connections whose memory is measured
    pairs: int  # in each comparison of the second table
    pair_seconds: float  # of each half of a pair
    held: int  # idle connections, as a burden
    routes: int  # as a burden
    tunnels: int  # as a burden
    cold: int  # cold names asked for at once

    def __str__(self) -> str:
        return (f"{self.rounds} rounds of {self.seconds:g} s, {self.gigabyte / 1e9:g} GB each way, "
                f"{self.idle} idle connections, {self.pairs} pairs of {self.pair_seconds:g} s each half")


FULL = Scale(3, 3.0, 2000 * 10**6, 3000, 10, 1.0, 5000, 10000, 500, 500)
QUICK = Scale(1, 1.0, 400 * 10**6, 1000, 4, 0.4, 2000, 10000, 100, 100)


class Row(NamedTuple):
    """A line of the first or the third table."""

    key: str  # in Figures
    label: str
    digits: int  # behind the point


ROWS = (
    Row("connection_us", "new connection: CPU, us", 0),
    Row("connection_rate", f"  each second, {CLIENTS} clients", 0),
    Row("connection_p99_ms", "  p99, ms", 1),
    Row("message_us", f"{MESSAGE} bytes there and back: CPU, us", 1),
    Row("message_p50_us", "  p50 of one client, us", 0),
    Row("gigabyte_s", "gigabyte: CPU, s", 2),
    Row("down_mb_s", "  down, MB/s", 0),
    Row("up_mb_s", "  up, MB/s", 0),
    Row("idle_kib", "idle connection: RSS, KiB", 1),
    Row("resident_mib", "resident before, MiB", 1),
    Row("beside_p50_us", f"{MESSAGE} bytes beside {STREAMS} downloads: p50, us", 0),
    Row("beside_p99_us", "  p99, us", 0),
    Row("beside_mb_s", "  the downloads, MB/s", 0),
    Row("failures", "failures", 0),
)


# -- names -------------------------------------------------------------------------------------


def name(number: int) -> str:
    """A host name.  All have the same length, so that the hello for one can be made into that for another."""
    return f"db-{number:05}.example.com"


NAME, BULK_NAME = name(0), name(1)  # each leads to a backend of its own


@functools.cache
def hello_of_first() -> bytes:
    """The ClientHello for NAME, as OpenSSL writes it."""
    written = ssl.MemoryBIO()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), written, server_hostname=NAME)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return written.read()


# -- what is started ---------------------------------------------------------------------------


def give_way(process: subprocess.Popen[bytes]) -> None:
    """Let a process run only when no other wants its core (SCHED_IDLE, sched(7)).

    For bulk beside small messages: the small ones must wait for the router only, not for the core that makes the load.
    """
    os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Processes that are started within the block stay on this core."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def find(program: str) -> str | None:
    """The path of a program that only root may have on PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")


def output_of(*argv: str) -> str:
    """The output of a program, stdout and stderr."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=SILENCE)
    return done.stdout


def version(text: str) -> str:
    """The first thing in a text that looks like a version."""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "(no version)"


class Router(NamedTuple):
    """A running router."""

    title: str
    process: subprocess.Popen[bytes]
    port: int
    pids: list[int]  # its processes: their CPU and memory are added up

    def cpu(self) -> float:
        """CPU it has used so far, in seconds."""
        return sum(map(cpu_seconds, self.pids))

    def rss(self) -> int:
        """Resident memory in KiB."""
        return sum(memory(pid).rss for pid in self.pids)


class Load:
    """A running load generator.  Its clock starts with it.  `strict`: a failed connection counts as a failure."""

    def __init__(self, lab: Lab, router: Router, mode: str, hellos: pathlib.Path, strict: bool = True,
                 **options: float):
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        self.lab, self.router, self.mode, self.strict = lab, router, mode, strict
        self.process = lab.processes.start([lab.load, mode, HOST, str(router.port), str(hellos), *words], lab.environ,
                                           stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self.process.stdout.readline() != b"ready\n":
            raise Failed(f"{router.title}, {mode}: {lab.processes.words(self.process)}")

    def figures(self) -> Figures:
        """Wait for its end, and return the figures that it then prints."""
        words = self.process.stdout.read().decode().split()
        if self.process.wait() or not words:
            raise Failed(f"{self.router.title}, {self.mode}: {self.lab.processes.words(self.process)}")
        self.lab.processes.stop(self.process)
        figures = {key: float(value) for key, value in (word.split("=") for word in words)}
        if self.strict:
            self.lab.failures[self.router.title] += int(figures["failures"])
        return figures

    def end(self) -> Figures:
        """End it before its time is over, and return its figures."""
        self.process.stdin.close()
        return self.figures()


class Lab:
    """The load generator and its backends; starts routers, and load on them."""

    def __init__(self, processes: Processes, scale: Scale, cores: Sequence[int]):
        self.processes = processes
        self.descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self.connections = min(CONNECTIONS_MAX, int((self.descriptors - SPARE) / DESCRIPTORS))
        room = max(1, self.connections - SPARE)
        self.scale = scale._replace(idle=min(scale.idle, room), held=min(scale.held, room))
        self.core, load_core = cores
        self.failures: collections.Counter[str] = collections.Counter()
        self.environ = {key: value for key, value in os.environ.items()
                        if not key.startswith(("SNIROUTE_", "TUNNEL_", "PYTHONDONTWRITEBYTECODE"))}
        self.environ["TMPDIR"] = str(processes.directory)  # files that a router leaves are removed with this folder
        self.candidates = itertools.cycle(PORTS)
        self.tunnel_ports = itertools.cycle(TUNNEL_PORTS)
        self.numbers = itertools.count()
        self.load = str(processes.directory / "load")
        built = subprocess.run(["cc", "-std=c11", "-O2", "-Wall", "-Wextra", f"-DTUNNEL_CORE={load_core}",
                                "-o", self.load, str(LOAD), "-lm"], stderr=subprocess.PIPE, text=True)
        if built.returncode:
            raise Failed(f"cc: {built.stderr}")
        _, self.backend = self.start_backend()
        bulk, self.bulk_backend = self.start_backend()
        give_way(bulk)
        self.hellos = self.write_hellos([0])
        self.bulk_hellos = self.write_hellos([1])

    def port(self) -> int:
        """A port that nobody holds."""
        return free_port(itertools.islice(self.candidates, len(PORTS)))

    def write_hellos(self, numbers: Sequence[int]) -> pathlib.Path:
        """Write a file with the hellos for these names."""
        path = self.processes.directory / f"hellos-{next(self.numbers)}"
        path.write_bytes(b"".join(hello_of_first().replace(NAME.encode(), name(number).encode()) for number in numbers))
        return path

    def start_backend(self, host: str = HOST) -> tuple[subprocess.Popen[bytes], int]:
        """Start one more backend.  Returns its process and its port."""
        port = self.port()
        process = self.processes.start([self.load, "backend", host, str(port)], self.environ)
        self.wait_connects(process, port)
        return process, port

    def wait_for(self, process: subprocess.Popen[bytes], predicate: Callable[[], bool], what: str) -> None:
        """Wait until `predicate` is true.  Raises Failed with the process's last words if it ends before."""
        wait_for(lambda: predicate() or process.poll() is not None, SILENCE, what)
        if process.returncode is not None:
            raise Failed(f"{what}: it exited with {process.returncode}: {self.processes.words(process)}")

    def wait_connects(self, process: subprocess.Popen[bytes], port: int) -> None:
        """Wait until the process accepts connections on a port."""
        def connects() -> bool:
            with socket.socket() as probe:
                return not probe.connect_ex((HOST, port))

        self.wait_for(process, connects, f"a listener on {port}")

    def start(self, router: Router, mode: str, hellos: pathlib.Path | None = None, **options: Any) -> Load:
        """Start load on a router."""
        return Load(self, router, mode, hellos or self.hellos, **options)

    def run(self, router: Router, mode: str, hellos: pathlib.Path | None = None, **options: Any) -> Figures:
        """Put load on a router to its end.  Returns its figures."""
        return self.start(router, mode, hellos, **options).figures()

    def ready(self, title: str, process: subprocess.Popen[bytes], port: int) -> Router:
        """Make the first connection through a router, so that all its processes are there."""
        router = Router(title, process, port, [process.pid])
        if not self.run(router, "connect", seconds=0)["n"]:
            raise Failed(f"{title} does not lead to the backend: {self.processes.words(process)}")
        return router

    @contextlib.contextmanager
    def haproxy(self, title: str, servers: Sequence[str] = ()) -> Iterator[Router]:
        """HAProxy with one thread, as sniroute has one; with these servers behind NAME, if there are any."""
        port = self.port()
        small = "\n    ".join(f"server s{number} {address} check"
                              for number, address in enumerate(servers)) or f"server only {HOST}:{self.backend}"
        config = self.processes.directory / f"haproxy-{port}.cfg"
        config.write_text(f"""\
global
    maxconn {self.connections}
    nbthread 1
defaults
    mode tcp
    maxconn {self.connections}
    option splice-auto
    timeout connect 5s
    timeout client 1h
    timeout server 1h
frontend tls
    bind {HOST}:{port} backlog 4096
    tcp-request inspect-delay 5s
    tcp-request content accept if {{ req.ssl_hello_type 1 }}
    use_backend small if {{ req.ssl_sni -i {NAME} }}
    use_backend bulk if {{ req.ssl_sni -i {BULK_NAME} }}
backend small
    balance roundrobin
    {small}
backend bulk
    server only {HOST}:{self.bulk_backend}
""")
        with on_core(self.core):
            process = self.processes.start([find("haproxy"), "-db", "-f", str(config)], self.environ)
        self.wait_connects(process, port)
        yield self.ready(title, process, port)
        self.processes.stop(process)

    @contextlib.contextmanager
    def nginx(self, module: str, title: str) -> Iterator[Router]:
        """nginx with one worker."""
        port = self.port()
        config = self.processes.directory / f"nginx-{port}.conf"
        config.write_text(f"""\
{module}
worker_processes 1;
worker_rlimit_nofile {self.descriptors};
daemon off;
pid {self.processes.directory}/nginx-{port}.pid;
error_log stderr;
events {{ worker_connections {2 * self.connections}; }}
stream {{
    map $ssl_preread_server_name $backend {{
        {NAME} {HOST}:{self.backend};
        {BULK_NAME} {HOST}:{self.bulk_backend};
    }}
    server {{ listen {HOST}:{port} backlog=4096; ssl_preread on; proxy_pass $backend; }}
}}
""")
        with on_core(self.core):
            process = self.processes.start(
                [find("nginx"), "-e", "stderr", "-p", str(self.processes.directory), "-c", str(config)], self.environ)
        self.wait_connects(process, port)
        router = self.ready(title, process, port)
        workers = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield router._replace(pids=[process.pid, *map(int, workers)])
        self.processes.stop(process)

    @contextlib.contextmanager
    def sniroute(self, title: str, *options: str, python: str = sys.executable) -> Iterator[Router]:
        """sniroute with `tcp:` routes, unless the options name others.  Its log is a file."""
        port = self.port()
        if not any(option.startswith(("--route", "--config")) for option in options):
            backends = {NAME: self.backend, BULK_NAME: self.bulk_backend}
            options += tuple(f"--route={key}=tcp:{HOST}:{value}" for key, value in backends.items())
        program = [python, str(PROJECT / "sniroute.py")]
        subprocess.run([*program, "--version"], env=self.environ, stdout=subprocess.DEVNULL)  # this start compiles
        words = [*program, f"--listen={HOST}:{port}", "--drain=1ms", *options]
        with on_core(self.core):
            process = self.processes.start(words, self.environ)
        log = self.processes.logs[process.pid]
        if "--log-level=error" in options:
            self.wait_connects(process, port)
        else:
            self.wait_for(process, lambda: b"listening on" in log.read_bytes(), f"{title} on {port}")
        yield self.ready(title, process, port)
        self.processes.stop(process)

    def settings(self, text: str) -> str:
        """The option for a file of settings with this text."""
        path = self.processes.directory / f"settings-{next(self.numbers)}.toml"
        path.write_text(text)
        return f"--config={path}"

    @contextlib.contextmanager
    def tunnelled(self, title: str, tunnels: int, *options: str) -> Iterator[Router]:
        """sniroute with a tunnel to each name."""
        first = next(self.tunnel_ports)
        with self.sniroute(title, "--route=*.example.com=cloudflared:{name}", f"--cloudflared={self.load}",
                           f"--ports={first}-{first + tunnels - 1}", f"--max-tunnels={tunnels}", "--idle=1h",
                           *options) as router:
            yield router


# -- what is measured: routers side by side ----------------------------------------------------


class Column(NamedTuple):
    """A column of the first table: how to start its router."""

    title: str
    start: Callable[[str], contextlib.AbstractContextManager[Router]]
    has_bulk: bool = True  # BULK_NAME leads to a backend of its own (see `give_way`)


def measure_connection(lab: Lab, column: Column, router: Router) -> Figures:
    """Clients that connect, get a byte, and close."""
    load = lab.start(router, "connect", clients=CLIENTS, seconds=lab.scale.seconds)
    before = router.cpu()
    found = load.figures()
    return {"connection_us": 1e6 * (router.cpu() - before) / max(found["n"], 1), "connection_rate": found["rate"],
            "connection_p99_ms": found["p99_us"] / 1e3}


def measure_message(lab: Lab, column: Column, router: Router) -> Figures:
    """Small messages: many clients to measure the CPU, one to measure the time."""
    load = lab.start(router, "ping", clients=TALKERS, size=MESSAGE, seconds=lab.scale.seconds)
    before = router.cpu()
    found = load.figures()
    used = router.cpu() - before
    alone = lab.run(router, "ping", size=MESSAGE, seconds=lab.scale.seconds / 2)
    return {"message_us": 1e6 * used / max(found["n"], 1), "message_p50_us": alone["p50_us"]}


def measure_gigabyte(lab: Lab, column: Column, router: Router) -> Figures:
    """Bulk, first down, then up."""
    before = router.cpu()
    down, up = (lab.run(router, mode, clients=STREAMS, size=lab.scale.gigabyte // STREAMS, seconds=0)
                for mode in ("down", "up"))
    return {"gigabyte_s": (router.cpu() - before) * 10**9 / (2 * lab.scale.gigabyte), "down_mb_s": down["mb_s"],
            "up_mb_s": up["mb_s"]}


def measure_idle(lab: Lab, column: Column, router: Router) -> Figures:
    """Memory of a new router: one that has worked would have freed memory at hand."""
    with column.start(column.title) as fresh:
        before = fresh.rss()
        crowd = lab.start(fresh, "hold", clients=lab.scale.idle, seconds=LONG)
        grown = fresh.rss() - before
        crowd.end()
    return {"idle_kib": grown / lab.scale.idle, "resident_mib": before / 1024}


def measure_beside(lab: Lab, column: Column, router: Router) -> Figures:
    """Small messages while other clients download at full speed."""
    if not column.has_bulk:
        return {}
    streams = lab.start(router, "down", lab.bulk_hellos, clients=STREAMS, size=STREAM, seconds=LONG)
    give_way(streams.process)
    found = lab.run(router, "ping", clients=TALKERS, size=MESSAGE, every=PACE, seconds=lab.scale.seconds)
    return {"beside_p50_us": found["p50_us"], "beside_p99_us": found["p99_us"], "beside_mb_s": streams.end()["mb_s"]}


# -- what is measured: sniroute with itself ----------------------------------------------------


class Change(NamedTuple):
    """A line of the second table: CPU for a new connection, in us."""

    label: str
    without: float  # without the burden
    beside: float  # with it
    percent: float  # the median of the changes of all pairs
    least: float  # percent, of a single pair
    most: float  # percent, of a single pair


def compare(lab: Lab, label: str, plain: Router, other: Router, hellos: pathlib.Path | None = None) -> Change:
    """Compare new connections to `plain` and to `other`, in turns; `other` is asked for the names in `hellos`."""
    def cost(router: Router) -> float:
        """CPU for a connection, in us."""
        load = lab.start(router, "connect", hellos if router is other else None, clients=CLIENTS,
                         seconds=lab.scale.pair_seconds)
        before = router.cpu()
        count = load.figures()["n"]
        return 1e6 * (router.cpu() - before) / max(count, 1)

    pairs = []
    for number in range(lab.scale.pairs + 1):
        order = (plain, other) if number % 2 else (other, plain)
        costs = {router.title: cost(router) for router in order}
        if number:  # the first pair warms up
            pairs.append((costs[plain.title], costs[other.title]))
    changes = [100 * (with_it / without - 1) for without, with_it in pairs]
    return Change(label, *map(statistics.median, zip(*pairs)), statistics.median(changes), min(changes), max(changes))


def change_log(lab: Lab) -> Iterator[Change]:
    """What does the log line of each connection cost?"""
    with lab.sniroute("sniroute without its line", "--log-level=error") as plain, lab.sniroute("sniroute") as other:
        yield compare(lab, "its line in the log (without: --log-level error)", plain, other)


def change_held(lab: Lab) -> Iterator[Change]:
    """What do open, silent connections cost a new one?"""
    count = lab.scale.held
    with lab.sniroute("sniroute alone") as plain, lab.sniroute("sniroute beside idle connections") as other:
        crowd = lab.start(other, "hold", clients=count, seconds=LONG)
        yield compare(lab, f"{count} idle connections", plain, other)
        crowd.end()


def change_routes(lab: Lab) -> Iterator[Change]:
    """What does a long list of routes cost?  Asked for one of its names, then for each name in turn."""
    count = lab.scale.routes
    routes = [f"--route={name(number)}=tcp:{HOST}:{lab.backend}" for number in range(count)]
    with lab.sniroute("sniroute with one route") as plain, lab.sniroute("sniroute with many routes", *routes) as other:
        yield compare(lab, f"{count} routes, one name asked for", plain, other)
        yield compare(lab, f"{count} routes, each name in turn", plain, other, lab.write_hellos(range(count)))


def change_tunnels(lab: Lab) -> Iterator[Change]:
    """What do many tunnels that are up cost a connection to one of them?"""
    count = lab.scale.tunnels
    with lab.tunnelled("sniroute with one tunnel", 1) as plain, \
            lab.tunnelled("sniroute with many tunnels", count, *PATIENT) as other:
        raised = lab.run(other, "connect", lab.write_hellos(range(count)), clients=count, seconds=0)
        if raised["failures"]:
            raise Failed(f"{raised['failures']:.0f} of {count} tunnels: {lab.processes.words(other.process)}")
        yield compare(lab, f"{count} tunnels up (without: 1)", plain, other)


def change_queue(lab: Lab) -> Iterator[Change]:
    """What do clients cost that have not said a word yet?  Each has a deadline."""
    patience = "--prelude-timeout=1h"
    with lab.sniroute("sniroute alone") as plain, lab.sniroute("sniroute beside silent clients", patience) as other:
        crowd = lab.start(other, "stand", clients=WAITING, seconds=LONG)
        yield compare(lab, f"{WAITING} clients that have not said their name", plain, other)
        crowd.end()


def change_groups(lab: Lab) -> Iterator[Change]:
    """What does a group of backends cost, and a large one?  All are one process, so that only the choice differs."""
    _, port = lab.start_backend("0.0.0.0")

    def addresses(count: int) -> list[str]:
        """So many addresses of the backend."""
        return [f"127.0.{1 + number // 250}.{1 + number % 250}:{port}" for number in range(count)]

    def group(count: int, balance: str, more: str = "") -> str:
        """The option for a route to all of them."""
        targets = ",".join(addresses(count))
        return lab.settings(f'[routes."{NAME}"]\ntarget = "tcp:{targets}"\nbalance = "{balance}"\n{more}')

    with lab.sniroute("sniroute with one backend", f"--route={NAME}=tcp:{HOST}:{port}") as plain:
        for balance in BALANCES:
            with lab.sniroute(f"sniroute with a group, {balance}", group(4, balance)) as other:
                yield compare(lab, f"4 backends, {balance} (without: 1)", plain, other)
                with lab.sniroute(f"sniroute with a large group, {balance}", group(1000, balance)) as large:
                    yield compare(lab, f"1000 backends, {balance} (without: 4)", other, large)
        with lab.sniroute("sniroute without warm connections", group(4, "round-robin")) as other, \
                lab.sniroute("sniroute with warm connections", group(4, "round-robin", f"warm = {CLIENTS}\n")) as warm:
            yield compare(lab, f"{CLIENTS} warm connections to 4 backends (without: none)", other, warm)
    if find("haproxy"):
        with lab.haproxy("HAProxy with one server", addresses(1)) as plain, \
                lab.haproxy("HAProxy with four servers", addresses(4)) as other:
            yield compare(lab, "HAProxy: 4 servers, roundrobin (without: 1)", plain, other)


# -- what is measured: cold names --------------------------------------------------------------

COLD_ROWS = (
    Row("alone_p50_us", f"{MESSAGE} bytes to names that are up, p50, us", 0),
    Row("alone_p99_us", "  p99, us", 0),
    Row("cold_p50_us", "  while cold names are asked for: p50, us", 0),
    Row("cold_p99_us", "  p99, us", 0),
    Row("cold_p99_ratio", "  ratio of p99", 2),
    Row("answered", "cold names answered", 0),
    Row("refused", "  refused", 0),
    Row("seconds", "  seconds until all were", 2),
)


def measure_cold(lab: Lab, neighbour: Column | None = None) -> Figures:
    """Ask sniroute, with its defaults, for many names at once that have no tunnel yet; measure messages meanwhile.

    The messages pass through sniroute itself, to names that are up.  With `neighbour` they pass through that router
    on the same core instead: it starts nothing, so their delay is what the busy core alone costs.
    """
    count = lab.scale.cold
    up, cold = lab.write_hellos(range(TALKERS)), lab.write_hellos(range(TALKERS, TALKERS + count))
    messages = {"clients": TALKERS, "size": MESSAGE, "every": PACE}
    with contextlib.ExitStack() as stack:
        router = talked_to = stack.enter_context(lab.tunnelled("sniroute with cold names", TALKERS + count))
        if neighbour:
            talked_to, up = stack.enter_context(neighbour.start(neighbour.title)), lab.hellos
        alone = lab.run(talked_to, "ping", up, seconds=lab.scale.seconds, **messages)
        talkers = lab.start(talked_to, "ping", up, seconds=LONG, **messages)
        asked = lab.run(router, "connect", cold, strict=False, clients=count, seconds=0)
        beside = talkers.end()
    figures = {"alone_p50_us": alone["p50_us"], "alone_p99_us": alone["p99_us"], "cold_p50_us": beside["p50_us"],
               "cold_p99_us": beside["p99_us"]}
    if not neighbour:
        figures |= {"answered": asked["n"], "refused": asked["failures"], "seconds": asked["seconds"]}
    return figures


COLUMN_EXPERIMENTS: dict[str, Callable[[Lab, Column, Router], Figures]] = {
    "connection": measure_connection, "message": measure_message, "gigabyte": measure_gigabyte, "idle": measure_idle,
    "beside": measure_beside}
CHANGE_EXPERIMENTS: dict[str, Callable[[Lab], Iterator[Change]]] = {
    "log": change_log, "held": change_held, "routes": change_routes, "tunnels": change_tunnels, "queue": change_queue,
    "groups": change_groups}
EXPERIMENTS = (*COLUMN_EXPERIMENTS, *CHANGE_EXPERIMENTS, "cold")


# -- the columns -------------------------------------------------------------------------------


def interpreters(given: Sequence[str]) -> dict[str, str]:
    """{version: path} of these Pythons, or of all that are found and not too old.  A `t`: free-threaded."""
    ask = ("import json, sys, sysconfig; free = sysconfig.get_config_var('Py_GIL_DISABLED'); "
           "print(json.dumps([sys.version_info[:2], sys.version.split()[0] + 't' * bool(free), sys.executable]))")
    folders = os.environ.get("PATH", os.defpath).split(":")
    paths = given or [path for folder in folders for path in sorted(glob.glob(f"{folder}/python3.*"))
                      if re.fullmatch(r"python3\.\d+t?", os.path.basename(path))] + \
        sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python3")))
    found: dict[str, str] = {}
    for path in paths:
        try:
            numbers, shown, executable = json.loads(output_of(path, "-I", "-c", ask))
        except (OSError, ValueError, subprocess.TimeoutExpired):  # it is no Python, or a pyenv shim without one
            numbers = []
        if numbers >= OLDEST:
            found.setdefault(shown, executable)
        elif given:
            raise Failed(f"{path} is no Python {'.'.join(map(str, OLDEST))} or later")
    return found


def nginx_module() -> str | None:
    """The configuration line that loads nginx's stream module; "" if it is built in, None if there is none."""
    built = output_of(find("nginx"), "-V") if find("nginx") else ""
    folder = re.search(r"--modules-path=(\S+)", built)
    module = f"{folder[1]}/ngx_stream_module.so" if folder else ""
    if re.search(r"--with-stream(\s|$)", built):
        return ""
    return f"load_module {module};" if os.path.exists(module) else None


def columns_of(lab: Lab, sniroute: str, pythons: Sequence[str] | None) -> list[Column]:
    """The columns for the routers that are installed; `sniroute` begins the titles of its columns."""
    columns, missing = [], []
    if find("haproxy"):
        columns.append(Column(f"HAProxy {version(output_of(find('haproxy'), '-v'))}", lab.haproxy))
    else:
        missing.append("haproxy")
    module = nginx_module()
    if module is not None:
        columns.append(Column(f"nginx {version(output_of(find('nginx'), '-v'))}", functools.partial(lab.nginx, module)))
    else:
        missing.append("nginx with its stream module")
    if missing:
        print(f"not here: {' and '.join(missing)} (Debian: apt install haproxy nginx libnginx-mod-stream)",
              file=sys.stderr)
    own = next(iter(interpreters([sys.executable])))
    columns += [Column(f"{sniroute}, Python {own}", lab.sniroute),
                Column(f"{sniroute}, Python {own}, tunnel", lambda title: lab.tunnelled(title, 1), has_bulk=False)]
    for python, path in interpreters(pythons).items() if pythons is not None else ():
        if python != own:
            columns.append(Column(f"{sniroute}, Python {python}", functools.partial(lab.sniroute, python=path)))
    return columns


# -- the tables --------------------------------------------------------------------------------


def lay_out(lines: Sequence[Sequence[str]]) -> str:
    """Rows of texts as a table: the first column flush left, the others flush right."""
    first, *widths = [max(map(len, texts)) for texts in zip(*lines)]
    return "\n".join("  ".join((label.ljust(first), *map(str.rjust, texts, widths))).rstrip()
                     for label, *texts in lines)


def show_columns(columns: dict[str, Figures], known: Sequence[Row]) -> str:
    """The first or the third table, with a line for each word of a title."""
    reference = next(iter(columns.values()))

    def cell(row: Row, figures: Figures) -> str:
        """A figure, and its ratio to that of the first column."""
        if row.key not in figures:
            return "-"
        ratio = " " * 7
        if figures is not reference and row.key != "failures" and reference.get(row.key):
            ratio = f" ({figures[row.key] / reference[row.key]:.2f})"
        return f"{figures[row.key]:.{row.digits}f}{ratio}"

    heads = [[word + " " * 7 for word in title.split()] for title in columns]
    height = max(map(len, heads))
    above = zip(*([""] * (height - len(head)) + head for head in heads))
    rows = [row for row in known if any(row.key in figures for figures in columns.values())]
    return lay_out([("", *words) for words in above] +
                   [(row.label, *(cell(row, figures) for figures in columns.values())) for row in rows]) + \
        "\n(n.nn): times the first column's"


def show_changes(changes: Sequence[Change]) -> str:
    """The second table."""
    return lay_out([("sniroute: CPU of a new connection, us", "without", "with", "change, %", "of single pairs")] + [
        (change.label, f"{change.without:.0f}", f"{change.beside:.0f}", f"{change.percent:+.1f}",
         f"{change.least:+.0f} .. {change.most:+.0f}") for change in changes])


def medians(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure over all rounds."""
    return {key: statistics.median(figures[key] for figures in rounds if key in figures)
            for key in dict.fromkeys(itertools.chain(*rounds))}


class Results:
    """All figures so far, and what could not be measured."""

    def __init__(self) -> None:
        self.columns: dict[str, Figures] = {}
        self.changes: list[Change] = []
        self.cold: dict[str, Figures] = {}
        self.failed: dict[str, str] = {}

    @contextlib.contextmanager
    def attempt(self, lab: Lab, what: str) -> Iterator[None]:
        """Run a part.  A failure is noted, and ends this part and its processes only."""
        print(f"{what} ...", file=sys.stderr, flush=True)
        running = len(lab.processes.running)
        try:
            yield
        except (Failed, OSError) as error:
            self.failed[what] = str(error)
            lab.processes.stop(*lab.processes.running[running:])

    def measure(self, lab: Lab, columns: Sequence[Column], wanted: Sequence[str]) -> None:
        """Measure the `wanted` experiments; each round goes through all routers."""
        with contextlib.ExitStack() as stack:
            routers: dict[Column, Router] = {}
            for column in columns if set(COLUMN_EXPERIMENTS).intersection(wanted) else ():
                with self.attempt(lab, column.title):
                    routers[column] = stack.enter_context(column.start(column.title))
            rounds: dict[str, list[Figures]] = {column.title: [] for column in routers}
            for key in filter(wanted.__contains__, COLUMN_EXPERIMENTS):
                for _, (column, router) in itertools.product(range(lab.scale.rounds), routers.items()):
                    with self.attempt(lab, f"{key}: {column.title}"):
                        rounds[column.title].append(COLUMN_EXPERIMENTS[key](lab, column, router))
            self.columns = {title: medians(found) | {"failures": lab.failures.pop(title, 0)}
                            for title, found in rounds.items()}
        for key in filter(wanted.__contains__, CHANGE_EXPERIMENTS):
            with self.attempt(lab, key):
                self.changes += CHANGE_EXPERIMENTS[key](lab)
        if "cold" in wanted:
            with self.attempt(lab, "cold"):
                found = [(measure_cold(lab, columns[0]), measure_cold(lab)) for _ in range(lab.scale.rounds)]
                for title, figures in zip((f"beside: {columns[0].title}", "sniroute itself"), map(medians, zip(*found))):
                    figures["cold_p99_ratio"] = figures["cold_p99_us"] / figures["alone_p99_us"]
                    self.cold[title] = figures
        self.failed |= {title: f"{count} connections failed" for title, count in lab.failures.items() if count}
        self.failed |= {title: f"{figures['failures']:.0f} connections failed"
                        for title, figures in self.columns.items() if figures["failures"]}


def main() -> int:
    """The command line.  Returns the exit code: 0, or 1 if something failed or could not be measured."""
    parser = argparse.ArgumentParser(description="Measures sniroute beside HAProxy and nginx, and beside itself.")
    parser.add_argument("--quick", action="store_true", help="less of everything, and one round")
    parser.add_argument("--rounds", type=int, metavar="N", help="the median of so many is shown (default 3)")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(EXPERIMENTS),
                        help=f"of these: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--pythons", nargs="*", metavar="PATH",
                        help="a column for each of these interpreters, or of all that are on PATH and in ~/.pyenv")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    given = parser.parse_args()
    wanted = given.only.split(",")
    if unknown := set(wanted).difference(EXPERIMENTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: there is {', '.join(EXPERIMENTS)}")
    if not shutil.which("cc"):
        parser.error("there is no C compiler (Debian: apt install gcc libc6-dev)")
    if given.rounds is not None and given.rounds < 1:
        parser.error("--rounds: one at least")
    scale = QUICK if given.quick else FULL
    scale = scale._replace(rounds=given.rounds or scale.rounds)
    facts = host_facts() | {"cc": output_of("cc", "--version").split("\n")[0], "hello": len(hello_of_first()),
                            "sniroute": version(output_of(sys.executable, str(PROJECT / "sniroute.py"), "--version"))}
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("one core for the router and one for the load: there is only one here")
    os.sched_setaffinity(0, {cores[1]})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < FILES_MIN:
        parser.error(f"needs {FILES_MIN} open files, and the hard limit is {hard}: raise ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = Results()
    with tempfile.TemporaryDirectory(prefix="sniroute-bench-") as folder:
        processes = Processes(pathlib.Path(folder))
        try:
            lab = Lab(processes, scale, cores[:2])
            scale = lab.scale
            results.measure(lab, columns_of(lab, f"sniroute {facts['sniroute']}", given.pythons), wanted)
        except KeyboardInterrupt:
            return 130
        except (Failed, OSError) as error:
            results.failed["the benchmark"] = str(error)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            processes.stop(*processes.running)

    print(f"{facts['date']}, sniroute {facts['sniroute']}, Python {facts['python']}, {facts['cc']}, "
          f"{facts['cores']} x {facts['cpu']}, Linux {facts['kernel']}, load {facts['load'][0]} at the start\n"
          f"{scale}, a ClientHello of {facts['hello']} bytes ({facts['openssl']})")
    if results.columns:
        print(f"\n{show_columns(results.columns, ROWS)}")
    if results.changes:
        print(f"\n{show_changes(results.changes)}")
    if results.cold:
        print(f"\n{scale.cold} cold names asked for at once, in sniroute\n{show_columns(results.cold, COLD_ROWS)}")
    for title, why in results.failed.items():
        print(f"{title}: FAILED: {why}", file=sys.stderr)
    if given.json:
        with open(given.json, "w") as file:
            json.dump({**facts, "quick": given.quick, "scale": scale._asdict(),
                       "labels": {row.key: row.label for row in ROWS + COLD_ROWS}, "columns": results.columns,
                       "changes": [change._asdict() for change in results.changes], "cold": results.cold,
                       "failures": results.failed}, file, indent=1)
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
