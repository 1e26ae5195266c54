#!/usr/bin/env python3
"""web: what plain HTTP by Host costs in sniroute, compared with HAProxy and nginx as reverse proxies; in one run.

    python3 bench/web.py [--quick] [--only NAME,...] [--json FILE]

    wrk --------- router --------- nginx, the backend
      core B        core A           core B
                 is measured

The columns:

    HAProxy, nginx      set up to do the same: the Host decides, X-Forwarded-For is added, connections are kept; no log
    sniroute            with `http = "forward"` and its defaults: it logs a line for each request
    sniroute, quiet     without these lines (--log-level=error)

It compares the CPU that a router spends for the same work: the kernel's CPU clock of its processes (user and system).
Rates and times are those of a router that is alone on its core, while the load runs on another.

The last lines say how sniroute stands to the better of the others: a small request may cost three times as much CPU,
a body of 1 MiB no more.  A goal that is missed is shown; the exit code is 1 only if something failed or could not be
measured.

Needs Linux, wrk and nginx.  Everything stays on 127.0.0.1, and everything that was started is stopped, also after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Callable, Iterator, NamedTuple, Sequence

from routers import (FILES_MIN, HOST, MIB, PORTS, PROJECT, SILENCE, Failed, Figures, Processes, Router, Row, find,
                     free_port, host_facts, interpreters, lay_out, medians, on_core, output_of, show_columns, version,
                     wait_for)

NAME = "web-00000.example.com"
CLIENTS = 64  # connections of wrk: enough to keep a router busy
CONNECTIONS = 1000  # that proxies are set up for
STREAMS = 4  # connections that move bodies of 1 MiB at once
SMALL = 64  # bytes of a small answer
PROXIES = "HAProxy", "nginx"  # how the titles of columns begin that sniroute is held against

# What wrk does: the path, a body, and a line with figures at the end.
SCRIPT = """
wrk.method = "{method}"
wrk.body = {body}
wrk.headers["Host"] = "{name}"
{lines}
done = function(summary, latency, requests)
    local e = summary.errors
    io.write(string.format("n=%d failures=%d seconds=%f p50_us=%d p99_us=%d\\n", summary.requests,
                           e.connect + e.read + e.write + e.status + e.timeout, summary.duration / 1e6,
                           latency:percentile(50), latency:percentile(99)))
end
"""


class Scale(NamedTuple):
    """How much is measured."""

    rounds: int
    seconds: int  # of each measurement

    def __str__(self) -> str:
        return f"{self.rounds} rounds of {self.seconds} s"


FULL, QUICK = Scale(3, 4), Scale(1, 1)


class Kind(NamedTuple):
    """One kind of work."""

    label: str
    path: str
    clients: int
    is_small: bool = True
    body: str = "nil"  # in Lua
    lines: str = ""  # more of the script
    most: float = 3.0  # times the CPU of the better of the others that sniroute may take


KINDS = {
    "kept": Kind("small request, connections kept", "/small", CLIENTS),
    "new": Kind("small request, each on a new connection", "/small", CLIENTS,
                lines='wrk.headers["Connection"] = "close"'),
    "down": Kind("1 MiB down", "/large", STREAMS, False, most=1.0),
    "up": Kind("1 MiB up", "/up", STREAMS, False, f'string.rep("x", {MIB})', most=1.0),
}
ROWS = (
    *(row for key, kind in KINDS.items() for row in (
        Row(f"{key}_us", f"{kind.label}: CPU, us", 1 if kind.is_small else 0),
        Row(f"{key}_rate", "  each second", 0),
        Row(f"{key}_p99_ms", "  p99, ms", 2))),
    Row("failures", "failures", 0),
)

ORIGIN = """\
worker_processes 1;
worker_rlimit_nofile {files};
daemon off;
pid {folder}/origin.pid;
error_log stderr;
events {{ worker_connections {connections}; }}
http {{
    access_log off; keepalive_requests 100000000; keepalive_timeout 1h; client_max_body_size 0; sendfile on;
    tcp_nopush on; client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
    uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
    server {{
        listen {host}:{port} backlog=4096;
        location /small {{ return 200 "{small}"; }}
        location /large {{ alias {folder}/large; }}
        location /up {{  # it takes the whole body before it answers
            client_body_buffer_size 2m; proxy_pass_request_body off; proxy_set_header Content-Length "";
            proxy_pass http://own/small; proxy_http_version 1.1; proxy_set_header Connection "";
        }}
    }}
    upstream own {{ server {host}:{port}; keepalive 16; keepalive_requests 100000000; }}
}}
"""
NGINX = """\
worker_processes 1;
worker_rlimit_nofile {files};
daemon off;
pid {folder}/nginx-{port}.pid;
error_log stderr;
events {{ worker_connections {connections}; }}
http {{
    access_log off; keepalive_requests 100000000; keepalive_timeout 1h; client_max_body_size 0;
    proxy_request_buffering off; proxy_max_temp_file_size 0;
    client_body_temp_path {folder}/6; proxy_temp_path {folder}/7; fastcgi_temp_path {folder}/8;
    uwsgi_temp_path {folder}/9; scgi_temp_path {folder}/10;
    upstream origin {{ server {host}:{origin}; keepalive 64; keepalive_requests 100000000; }}
    server {{
        listen {host}:{port} backlog=4096; server_name {name};
        location / {{
            proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_set_header Host $http_host; proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto $scheme;
        }}
    }}
}}
"""
HAPROXY = """\
global
    maxconn {connections}
    nbthread 1
defaults
    mode http
    maxconn {connections}
    option splice-auto
    option forwardfor
    timeout connect 5s
    timeout client 1h
    timeout server 1h
frontend web
    bind {host}:{port} backlog 4096
    use_backend origin if {{ hdr(host) -i {name} }}
backend origin
    http-request set-header X-Forwarded-Proto http
    server only {host}:{origin}
"""


class Lab:
    """The backend; starts routers, and load on them."""

    def __init__(self, processes: Processes, scale: Scale, core: int, wanted: Sequence[str]):
        self.processes, self.scale, self.core, self.wanted = processes, scale, core, wanted
        self.descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self.failures: dict[str, int] = {}
        self.environ = {key: value for key, value in os.environ.items()
                        if not key.startswith(("SNIROUTE_", "TUNNEL_", "PYTHONDONTWRITEBYTECODE"))}
        self.environ["TMPDIR"] = str(processes.directory)
        self.candidates = itertools.cycle(PORTS)
        processes.directory.chmod(0o755)  # nginx's workers are another user
        (processes.directory / "large").write_bytes(os.urandom(MIB))
        self.scripts = {key: self.write(f"{key}.lua", SCRIPT, method="GET" if kind.body == "nil" else "POST",
                                        body=kind.body, lines=kind.lines) for key, kind in KINDS.items()}
        self.origin = self.port()
        self.serve(self.origin, "nginx", self.write("origin.conf", ORIGIN, port=self.origin, small="x" * SMALL))

    def port(self) -> int:
        """A port that nobody holds."""
        return free_port(itertools.islice(self.candidates, len(PORTS)))

    def write(self, file: str, text: str, **values: object) -> pathlib.Path:
        """Write a file of settings."""
        path = self.processes.directory / file
        known = {"host": HOST, "name": NAME, "folder": self.processes.directory, "files": self.descriptors,
                 "connections": CONNECTIONS}
        path.write_text(text.format(**known, **values))
        return path

    def serve(self, port: int, program: str, config: pathlib.Path) -> subprocess.Popen[bytes]:
        """Start nginx or HAProxy, and wait until it listens."""
        words = {"nginx": ["-e", "stderr", "-p", str(self.processes.directory), "-c", str(config)],
                 "haproxy": ["-db", "-f", str(config)]}[program]
        process = self.processes.start([find(program), *words], self.environ)
        self.wait_connects(process, port)
        return process

    def wait_connects(self, process: subprocess.Popen[bytes], port: int) -> None:
        """Wait until the process accepts connections on a port."""
        def connects() -> bool:
            with socket.socket() as probe:
                return not probe.connect_ex((HOST, port)) or process.poll() is not None

        wait_for(connects, SILENCE, f"a listener on {port}")
        if process.returncode is not None:
            raise Failed(f"it exited with {process.returncode}: {self.processes.words(process)}")

    def load(self, router: Router, key: str, seconds: int) -> Figures:
        """Put load on a router.  Returns wrk's figures, and the CPU that the router has used meanwhile."""
        kind = KINDS[key]
        before = router.cpu()
        ended = subprocess.run(
            [find("wrk"), "-t1", f"-c{kind.clients}", f"-d{seconds}s", "--timeout", "30s", "-s", str(self.scripts[key]),
             f"http://{HOST}:{router.port}{kind.path}"], env=self.environ, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds + SILENCE)
        used = router.cpu() - before
        line = ended.stdout.strip().rpartition("\n")[2]
        if ended.returncode or not line.startswith("n="):
            raise Failed(f"{router.title}, {key}: {ended.stdout[-300:]}")
        found = {key: float(value) for key, value in (word.split("=") for word in line.split())}
        if not found["n"]:
            raise Failed(f"{router.title}, {key}: no answer")
        self.failures[router.title] = self.failures.get(router.title, 0) + int(found["failures"])
        return {**found, "cpu": used}

    def ready(self, router: Router) -> Router:
        """Warm it up, so that all its processes are there, and nothing is done for the first time."""
        for key in self.wanted:
            self.load(router, key, 1)
        children = pathlib.Path(f"/proc/{router.process.pid}/task/{router.process.pid}/children").read_text().split()
        return router._replace(pids=[router.process.pid, *map(int, children)])

    @contextlib.contextmanager
    def proxy(self, program: str, title: str) -> Iterator[Router]:
        """HAProxy with one thread, or nginx with one worker, as sniroute has one."""
        port = self.port()
        text = {"haproxy": HAPROXY, "nginx": NGINX}[program]
        config = self.write(f"{program}-{port}.conf", text, port=port, origin=self.origin)
        with on_core(self.core):
            process = self.serve(port, program, config)
        yield self.ready(Router(title, process, port, [process.pid]))
        self.processes.stop(process)

    @contextlib.contextmanager
    def sniroute(self, title: str, *options: str) -> Iterator[Router]:
        """sniroute with one route; its log is a file."""
        port = self.port()
        program = [sys.executable, str(PROJECT / "sniroute.py")]
        subprocess.run([*program, "--version"], env=self.environ, stdout=subprocess.DEVNULL)  # this start compiles
        with on_core(self.core):
            process = self.processes.start([*program, f"--listen={HOST}:{port}", "--drain=1ms", "--http=forward",
                                            f"--route={NAME}=tcp:{HOST}:{self.origin}", *options], self.environ)
        self.wait_connects(process, port)
        yield self.ready(Router(title, process, port, [process.pid]))
        self.processes.stop(process)


class Column(NamedTuple):
    """A column of the table: how to start its router."""

    title: str
    start: Callable[[str], contextlib.AbstractContextManager[Router]]


def columns_of(lab: Lab, sniroute: str) -> list[Column]:
    """The columns for the routers that are installed."""
    columns = [Column(f"{name} {version(output_of(find(program), '-v'))}", functools.partial(lab.proxy, program))
               for name, program in (("HAProxy", "haproxy"), ("nginx", "nginx")) if find(program)]
    if len(columns) < 2:
        print("not here: haproxy (Debian: apt install haproxy)", file=sys.stderr)
    own = next(iter(interpreters([sys.executable])))
    return [*columns, Column(f"{sniroute}, Python {own}", lab.sniroute),
            Column(f"{sniroute}, Python {own}, quiet", lambda title: lab.sniroute(title, "--log-level=error"))]


def measure(lab: Lab, router: Router, key: str) -> Figures:
    """One kind of work: CPU for each request, how many there were, and how long the slow ones took."""
    found = lab.load(router, key, lab.scale.seconds)
    return {f"{key}_us": 1e6 * found["cpu"] / found["n"], f"{key}_rate": found["n"] / found["seconds"],
            f"{key}_p99_ms": found["p99_us"] / 1e3}


def show_goals(columns: dict[str, Figures]) -> str:
    """How each column of sniroute stands to the better of the others."""
    others = [figures for title, figures in columns.items() if title.startswith(PROXIES)]
    own = {title: figures for title, figures in columns.items() if not title.startswith(PROXIES)}
    lines = [("CPU, times the better of the others", *(["quiet" if title.endswith("quiet") else "sniroute"
                                                         for title in own]), "goal")]
    for key, kind in KINDS.items():
        best = min((figures[f"{key}_us"] for figures in others if f"{key}_us" in figures), default=None)
        if best is None:
            continue
        ratios = [figures.get(f"{key}_us", 0) / best for figures in own.values()]
        lines.append((kind.label, *(f"{ratio:.2f}{' missed' if ratio > kind.most else ''}" for ratio in ratios),
                      f"{kind.most:g}"))
    return lay_out(lines)


class Results:
    """All figures so far, and what could not be measured."""

    def __init__(self) -> None:
        self.columns: dict[str, Figures] = {}
        self.failed: dict[str, str] = {}

    @contextlib.contextmanager
    def attempt(self, lab: Lab, what: str) -> Iterator[None]:
        """Run a part.  A failure is noted, and ends this part and its processes only."""
        print(f"{what} ...", file=sys.stderr, flush=True)
        running = len(lab.processes.running)
        try:
            yield
        except (Failed, OSError, subprocess.TimeoutExpired) as error:
            self.failed[what] = str(error)
            lab.processes.stop(*lab.processes.running[running:])

    def measure(self, lab: Lab, columns: Sequence[Column]) -> None:
        """Measure the kinds that are wanted; each round goes through all routers."""
        with contextlib.ExitStack() as stack:
            routers: dict[Column, Router] = {}
            for column in columns:
                with self.attempt(lab, column.title):
                    routers[column] = stack.enter_context(column.start(column.title))
            lab.failures.clear()
            rounds: dict[str, list[Figures]] = {column.title: [] for column in routers}
            for key in lab.wanted:
                for _, (column, router) in itertools.product(range(lab.scale.rounds), routers.items()):
                    with self.attempt(lab, f"{key}: {column.title}"):
                        rounds[column.title].append(measure(lab, router, key))
        self.columns = {title: medians(found) | {"failures": lab.failures.get(title, 0)}
                        for title, found in rounds.items() if found}
        self.failed |= {title: f"{count} requests failed" for title, count in lab.failures.items() if count}


def main() -> int:
    """The command line.  Returns the exit code: 0, or 1 if something failed or could not be measured."""
    parser = argparse.ArgumentParser(description="Measures plain HTTP in sniroute beside HAProxy and nginx.")
    parser.add_argument("--quick", action="store_true", help="less of everything, and one round")
    parser.add_argument("--rounds", type=int, metavar="N", help="the median of so many is shown (default 3)")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(KINDS), help=f"of these: {', '.join(KINDS)}")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    given = parser.parse_args()
    wanted = given.only.split(",")
    if unknown := set(wanted).difference(KINDS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: there is {', '.join(KINDS)}")
    if given.rounds is not None and given.rounds < 1:
        parser.error("--rounds: one at least")
    missing = [program for program in ("wrk", "nginx") if not find(program)]
    if missing:
        parser.error(f"there is no {' and no '.join(missing)} (Debian: apt install {' '.join(missing)})")
    scale = QUICK if given.quick else FULL
    scale = scale._replace(rounds=given.rounds or scale.rounds)
    facts = host_facts() | {"sniroute": version(output_of(sys.executable, str(PROJECT / "sniroute.py"), "--version")),
                            "wrk": version(output_of(find("wrk"), "-v"))}
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
            lab = Lab(processes, scale, cores[0], wanted)
            results.measure(lab, columns_of(lab, f"sniroute {facts['sniroute']}"))
        except KeyboardInterrupt:
            return 130
        except (Failed, OSError) as error:
            results.failed["the benchmark"] = str(error)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            processes.stop(*processes.running)

    print(f"{facts['date']}, sniroute {facts['sniroute']}, Python {facts['python']}, wrk {facts['wrk']}, "
          f"{facts['cores']} x {facts['cpu']}, Linux {facts['kernel']}, load {facts['load'][0]} at the start\n"
          f"{scale}, {CLIENTS} clients of small requests ({SMALL} bytes come back), {STREAMS} of large ones")
    if results.columns:
        print(f"\n{show_columns(results.columns, ROWS)}\n\n{show_goals(results.columns)}")
    for title, why in results.failed.items():
        print(f"{title}: FAILED: {why}", file=sys.stderr)
    if given.json:
        with open(given.json, "w") as file:
            json.dump({**facts, "quick": given.quick, "scale": scale._asdict(),
                       "labels": {row.key: row.label for row in ROWS}, "columns": results.columns,
                       "failures": results.failed}, file, indent=1)
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
