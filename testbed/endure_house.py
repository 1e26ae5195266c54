"""endure_house: the main job under fault.  All kinds of clients use two routers, and all that they use fails.

    psql      ---.                    .--- tcp: ----------- a real PostgreSQL, and a web server
    curl      ---|                    |--- cloudflared: --- the stand-in for the program --- both of them
    chromium  ---+--- router one, ----|--- carrier: ------- the stand-in for the edge ------ both of them
    streams   ---|    router two      |--- kubernetes: ---- the stand-in for a cluster, with two pods
    owners    ---'         |          '--- nodepass: ------ a NodePass client in a network namespace
                           '--- Redis: names that are claimed at one are served by both
    streams   ------- sniroute_kubernetes.py port-forward ------- the same cluster

    endure_house_ends      what stands behind the routers      endure_house_web    the web server's program
    endure_house_load      the clients                         endure_house_names  the owners of names
    endure_house_nemesis   the faults                          endure_clock        a wall clock that can be put

Nothing may be lost.  No byte is wrong, ever.  A client is served where no fault has touched its way in its time of life;
else it may be cut, and comes again: it is served BACK seconds after the fault at most.  What was acknowledged (rows,
uploads, claims) is there at the end, and once.  At the end the routers stand as before: router two has lived from the
beginning to the end.  Router one is killed, and handed over, in the first two thirds: the one of the last third is
compared with itself.

A program that is not on this host is left out, with its clients and faults, and named in the last line.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from sniroute_owners import digest_of
from testbed.endure_clock import Clock
from testbed.endure_house_ends import (Cluster, Database, Edge, Process, Redis, Web, found, listens, make_certificate)
from testbed.endure_house_load import (Download, Lane, Ledger, Load, Page, Place, Psql, Reach, Streams, Upload)
from testbed.endure_house_names import DOMAIN, Contest, Keep, Owner
from testbed.endure_house_nemesis import Nemesis, born
from testbed.endure_nodepass import TIMES, Network, middle
from testbed.endure_router import (HERE, HOST, TESTBED, Backend, Baseline, Folder, Problem, Router, Standing, children,
                                   environment, running, wait_for)
from testbed.ports import free_port, is_free

SHELVES = 5
STREAMS_ONE, STREAMS_TWO, POD, TUNNEL, FORWARD = range(SHELVES)  # of the backend
PROGRAMS = {"postgres": "PostgreSQL", "psql": "psql", "curl": "curl", "chromium": "chromium",
            "redis-server": "Redis", "openssl": "openssl"}
TOKENS = {"alice": "token-of-alice", "bob": "token-of-bob"}
KEY = "house-key"  # of NodePass
POD_PORT = 8080
RESIDENT_MORE_HOUSE = 12.0  # MiB: RESIDENT_MORE, and as much again for what a registry, HTTP and four kinds of tunnels keep


class HouseRouter(Router):
    """A router with a wall clock that can be put.  `stands`: tunnels that are never idle."""

    def __init__(self, folder: Folder, clock: Clock, stands: int, **variables: str):
        self.program = [sys.executable, str(TESTBED / "endure_clock.py"), str(clock.path), str(HERE / "sniroute.py")]
        self.stands = stands
        super().__init__(folder, **variables)

    def is_quiet(self) -> bool:
        """Whether there is no connection, and no tunnel but those that stand."""
        found = self.metrics(fresh=False)
        live = sum(found[f'sniroute_tunnels{{state="{state}"}}'] for state in ("queued", "starting", "ready",
                                                                              "stopping", "backoff"))
        return not found["sniroute_connections_active"] and live == self.stands == len(children(self.pid))


class House:
    """All of it.  Used with `with`."""

    def __init__(self, seed: int):
        self.seed = seed
        self.missing = [name for program, name in PROGRAMS.items() if found(program) is None]
        if "openssl" in self.missing:
            raise Problem("openssl is not here (Debian package openssl)")
        self.stack = contextlib.ExitStack()
        self.ledger = Ledger()
        self.generation = 0
        self.is_full = False

    def may(self, need: str) -> bool:
        """Whether a program is here, or a right."""
        if need in ("root", "netns"):
            return self.has_disk if need == "root" else self.network.is_real
        return not need or PROGRAMS[need] not in self.missing

    # -- set-up

    def __enter__(self) -> House:
        with contextlib.ExitStack() as stack:
            self.set_up(stack)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(*error)

    def set_up(self, stack: contextlib.ExitStack) -> None:
        self.path = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="endure-house-")))
        make_certificate(self.path)
        self.clock = Clock(self.path / "clock")
        self.folders = [stack.enter_context(Folder()) for _ in range(2)]
        self.has_disk = self.mount(stack)
        self.backend = stack.enter_context(Backend(SHELVES))
        self.network = stack.enter_context(Network())
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(Database, self.path) if self.may("postgres") else None,
                       pool.submit(Redis, self.path) if self.may("redis-server") else None]
            self.web = Web(self.path)
            stack.callback(self.web.close)
            self.cluster = Cluster(self.path, 2, POD_PORT, (HOST, self.backend.shelves[POD]))
            stack.callback(self.cluster.close)
            self.cluster.service("web")
            made = []
            for future in waiting:
                made.append(future and future.result())
                if future:
                    stack.callback(made[-1].close)
            self.database, self.redis = made
        self.edge = Edge(self.path, {})
        stack.callback(self.edge.close)
        self.places = [Place(word, folder.listen, (HOST, free_port())) for word, folder in zip(("one", "two"), self.folders)]
        self.dialled_port = free_port()
        self.new_names()
        self.write_settings()
        self.routers: list[HouseRouter] = []
        for number in range(2):
            self.routers.append(self.router(number))
            stack.callback(lambda number=number: self.routers[number].__exit__())
        for router in self.routers:
            router.wait_until_up()
        # Where the NodePass client lives, what it leads to lives, too.
        self.far = Process(self.path / "far.log", self.network.there(sys.executable, "-m", "testbed.endure_streams", "backend", "1"))
        self.far.start()
        stack.callback(self.far.close)
        port = wait_for(lambda: self.far.log.read_text().partition("\n")[0], "a backend in the namespace")
        self.dialled = Process(
            self.path / "nodepass.log", self.network.there(
                sys.executable, str(HERE / "sniroute_nodepass.py"),
                f"client://{KEY}@{self.network.near}:{self.dialled_port}/{HOST}:{eval(port)[0]}?mode=2&min=2"),
            environment(**TIMES))
        self.dialled.start()
        stack.callback(self.dialled.close)
        self.forward_port = free_port()
        self.forward = Process(
            self.path / "forward.log", [sys.executable, str(HERE / "sniroute_kubernetes.py"), "port-forward",
                                        "default/svc/web:80", "--listen", f"{HOST}:{self.forward_port}",
                                        "--kubeconfig", str(self.cluster.kubeconfig)])
        self.forward.start()
        stack.callback(self.forward.close)
        self.load = Load(self.path, self.ledger, self.seed)
        self.load.lanes = self.lanes()

    def mount(self, stack: contextlib.ExitStack) -> bool:
        """Give router one's files a small disk of their own.  Returns whether that may be."""
        scratch = self.folders[0].scratch
        if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=400,mode=0700", "house", scratch],
                                          capture_output=True).returncode:
            return False
        stack.callback(subprocess.run, ["umount", "-l", str(scratch)], capture_output=True)
        return True

    def fill(self, is_full: bool) -> None:
        """Fill that disk, or empty it."""
        filler = self.folders[0].scratch / "filler"
        if not is_full:
            shutil.rmtree(filler, ignore_errors=True)
            return
        filler.mkdir()
        with contextlib.suppress(OSError):
            (filler / "bytes").write_bytes(bytes(2 << 20))
        with contextlib.suppress(OSError):
            for number in range(1000):
                (filler / str(number)).touch()

    def router(self, number: int) -> HouseRouter:
        """Start a router."""
        variables = {**self.edge.variables, "HOUSE_KEY": KEY, **TIMES} if number == 0 else self.edge.variables
        return HouseRouter(self.folders[number], self.clock, 1 - number, **variables)

    # -- settings and names

    def new_names(self) -> None:
        """Clients ask for new names of tunnels from now on; the former ones lead where they led."""
        number = self.generation + 1
        far = {f"db{number}": self.database.port if self.database else 0, f"web{number}": self.web.ports["tls"],
               f"stream{number}": self.backend.shelves[TUNNEL]}
        for folder in self.folders:
            rows = {f"{name}.tunnels.example.test": [HOST, port] for name, port in far.items()}
            table = folder.tables["far.json"]
            table.update(rows)
            while len(table) > 3 * len(rows):
                del table[next(iter(table))]
            folder.set("far.json", "last.example.test", [HOST, 1])
        place = self.path / "edge"
        (place / "far.new").write_text(__import__("json").dumps(
            {f"{name}{at}.edge.example.test": [HOST, far[f"{name}{number}"]] for name in ("db", "web", "stream")
             for at in (number - 1, number)}))
        (place / "far.new").replace(place / "far.json")
        self.cluster.service(f"s{number}")
        self.generation = number

    def write_settings(self, *more: str) -> None:
        """The files of both routers, as they should be."""
        ports = self.web.ports
        owners = "\n".join(f'[registry.owners.{name}]\ntoken = "sha256:{digest_of(token).hex()}"'
                           for name, token in TOKENS.items())
        for number, folder in enumerate(self.folders):
            rows = [f'"streams.example.test" = "tcp:{HOST}:{self.backend.shelves[number]}"',
                    f'"web.example.test" = "tcp:{HOST}:{ports["tls"]}"',
                    f'"plain.example.test" = {{ target = "tcp:{HOST}:{ports["plain"]}", http = "forward" }}',
                    '"*.tunnels.example.test" = "cloudflared:{name}"', '"*.edge.example.test" = "carrier:{name}"',
                    '"{service}.k8s.example.test" = "kubernetes:default/svc/{service}:80"']
            if self.database:
                rows.append(f'"db.example.test" = "tcp:{HOST}:{self.database.port}"')
            if number == 0:
                rows.append(f'"dialled.example.test" = "nodepass:$HOUSE_KEY@{self.network.near}:{self.dialled_port}?tls=1"')
            if self.redis:
                rows.append(f'[registry]\nlisten = "{HOST}:{self.places[number].registry[1]}"\ndomains = ["{DOMAIN}"]\n'
                            f'store = "redis://{HOST}:{self.redis.port}"\ntargets = ["tcp"]\nnetworks = ["127.0.0.0/8"]\n'
                            f'target_ports = "1-65535"\nhold = "off"\n{owners}')
            folder.write_settings("\n".join(rows), f'cloudflared = "{folder.cloudflared}"', 'start_timeout = "5s"',
                                  f'kubeconfig = "{self.cluster.kubeconfig}"', 'kubernetes_ping = "1s"', *more)

    def lanes(self) -> list[Lane]:
        """All clients."""
        load, one, two = self.load, *self.places

        def named(form: str) -> Any:
            return lambda: form.format(self.generation)

        forward = Place("", (HOST, self.forward_port), (HOST, 0))
        lanes: list[Lane] = [
            Streams(load, named("streams.example.test"), one, shelf=STREAMS_ONE, kind="streams", may_end_first=True),
            Streams(load, named("streams.example.test"), two, shelf=STREAMS_TWO, kind="streams", may_end_first=True),
            Streams(load, named("stream{}.tunnels.example.test"), one, "tunnels one", shelf=TUNNEL, kind="streams"),
            Streams(load, named("stream{}.edge.example.test"), two, "carrier two", "edge", shelf=TUNNEL, kind="streams"),
            Streams(load, named("s{}.k8s.example.test"), one, "kubernetes one", "cluster", shelf=POD, kind="forwards"),
            Streams(load, named("s{}.k8s.example.test"), two, "kubernetes two", "cluster", shelf=POD, kind="forwards"),
            Streams(load, named("web.example.test"), forward, "port-forward", "cluster", shelf=POD, kind="forwards"),
            Streams(load, named("dialled.example.test"), one, "nodepass one", "link", shelf=0, kind="NodePass callers"),
        ]
        if self.database and self.may("psql"):
            lanes += [Psql(load, named("db.example.test"), one, "postgres"),
                      Psql(load, named("db{}.tunnels.example.test"), two, "tunnels two", "postgres"),
                      Psql(load, named("db{}.edge.example.test"), one, "carrier one", "edge", "postgres")]
        if self.may("curl"):
            lanes += [Download(load, named("web.example.test"), one), Download(load, named("plain.example.test"), two, scheme="http"),
                      Download(load, named("web{}.tunnels.example.test"), one, "tunnels one"),
                      Upload(load, named("plain.example.test"), one, scheme="http"),
                      Upload(load, named("web{}.edge.example.test"), two, "carrier two", "edge")]
        if self.may("chromium"):
            lanes.append(Page(load, named("web.example.test"), one))
        if self.redis:
            parts = "redis", "router one", "router two", "registry one", "registry two"
            owners = [Owner(load, name, token, self.web.ports[name], self.places, *parts) for name, token in TOKENS.items()]
            self.keeps = [Keep(owner, f"keep-{owner.owner}", *parts) for owner in owners]
            lanes += [*self.keeps, Contest(owners, *parts)]
            for keep in self.keeps:
                lanes += [Reach(load, keep.name, one, "registry one", owner=keep.owner.owner),
                          Reach(load, keep.name, two, owner=keep.owner.owner)]
        return lanes

    # -- router one

    def end_router(self, number: int) -> None:
        """End router one."""
        router = self.routers[0]
        router.log_is_read.set()
        router.signal(number)
        if (code := router.ended()) not in (0, -signal.SIGKILL):
            self.load.problem(f"router one ended with {code}")
        self.look_at(router)

    def start_router(self) -> None:
        """Start it again."""
        self.routers[0].__exit__()
        self.routers[0] = self.router(0)
        self.routers[0].wait_until_up()

    def hand_over(self) -> None:
        """Start a successor, which takes the port over; wait for the end of the former one."""
        former = self.routers[0]
        successor = self.router(0)
        self.routers[0] = successor
        try:
            successor.wait_until_up()
            if (code := former.ended()) != 0:
                self.load.problem(f"a predecessor ended with {code}")
        finally:
            former.__exit__()
        self.look_at(former)

    def look_at(self, router: Router) -> None:
        """What the log says of a fault of ours."""
        if router.faults:
            self.load.problem("the log: " + "\n      ".join(router.faults))


class Outcome(NamedTuple):
    """What came of it."""

    words: str
    problems: list[str]
    before: Standing
    after: Standing


def served(house: House) -> None:
    """Run the load until each lane was served: what comes once is there."""
    before = {lane: lane.served for lane in house.load.lanes}
    everything = frozenset().union(*(lane.parts for lane in house.load.lanes))
    try:
        with house.ledger.broken("set-up", *everything):
            house.load.start()
            wait_for(lambda: all(lane.served > before[lane] for lane in house.load.lanes)
                     or house.load.problems, "a first client of each kind", 90)
    except Problem:
        raise Problem("never served: " + "; ".join(f"{lane}: {lane.said}" for lane in house.load.lanes
                                                   if lane.served == before[lane])) from None
    finally:
        house.load.stop()


def kept(house: House, problems: list[str]) -> str:
    """Whether all that was acknowledged is there.  Returns the figures."""
    load, words = house.load, []
    if rows := load.acknowledged["rows"]:
        there = dict(line.split("|") for line in house.database.ask("select id, said = md5(id) from rows").splitlines())
        problems += [f"a row that is lost: {key}" for key in rows if key not in there]
        problems += [f"a row that nobody has sent: {key}" for key in there if key not in load.sent]
        problems += [f"a row that is not what was sent: {key}" for key, right in there.items() if right != "t"]
        words.append(f"{len(rows):,} rows")
    if uploads := load.acknowledged["uploads"]:
        rows = house.web.uploads()
        there = dict(rows)
        problems += [f"an upload that is lost or another: {key}" for key, digest in uploads.items() if there.get(key) != digest]
        if len(there) != len(rows):
            problems.append(f"{len(rows) - len(there)} uploads came twice")
        words.append(f"{len(uploads):,} uploads")
    if house.redis:
        words.append(f"{load.counts['claims']:,} claims")
    return ", ".join(words)


def left_behind(house: House, met: set[str]) -> list[str]:
    """Processes, ports and folders that are still there."""
    def alive(row: str) -> bool:
        pid, began = row.split()
        with contextlib.suppress(OSError):
            return born(int(pid)) == began
        return False

    with contextlib.suppress(Problem):
        wait_for(lambda: not any(map(alive, met)), "the end of all children", 10)
    found = [f"a process: {row}" for row in met if alive(row)]
    found += [f"a process with {house.path}: {pid}" for pid in running(str(house.path)) if pid != os.getpid()]
    for place in house.places:
        found += [f"a port: {port}" for port in (place.listen[1], place.registry[1]) if not is_free(port)]
    return found


def run(seconds: float, seed: int) -> Outcome:
    """So many seconds of it."""
    problems: list[str] = []
    t0 = time.monotonic()
    def mark(w): print(f"{time.monotonic()-t0:.1f} {w}", file=sys.stderr)
    with House(seed) as house:
        load, nemesis = house.load, Nemesis(house, seed)
        problems = load.problems
        mark("up")
        served(house)
        mark("served")
        begun = [Baseline(router) for router in house.routers]
        mark("baseline")
        began = time.monotonic()
        load.start()
        try:
            nemesis.strike(seconds * 2 / 3)
        finally:
            load.stop()
        mark("struck")
        middle_one = Baseline(house.routers[0])
        load.start()
        try:
            nemesis.strike(seconds / 3, ends_router=False)
        finally:
            load.stop()
        mark("struck 2")
        took = time.monotonic() - began
        after = [middle_one.check(house.routers[0], problems, RESIDENT_MORE_HOUSE),
                 begun[1].check(house.routers[1], problems, RESIDENT_MORE_HOUSE)]
        mark("checked")
        nemesis.note_children()
        there = kept(house, problems)
        for number in range(2):
            if (code := house.routers[number].end()) != 0:
                problems.append(f"router {house.places[number].word} ended with {code}")
            house.look_at(house.routers[number])
        for end in (house.dialled, house.forward, house.web, house.far):
            end.kill(signal.SIGTERM)
            problems += end.faults()
        problems += [line for line in house.far.log.read_text().splitlines() if line.startswith("wrong")]
        problems += house.backend.faults()
    problems += left_behind(house, nemesis.met)
    kinds = sorted({lane.kind for lane in load.lanes})
    faults = ", ".join(f"{count} {what}" for what, count in sorted(nemesis.counts.items()))
    clients = ", ".join(f"{load.counts[f'{kind} served']:,} {kind}" for kind in kinds)
    ended = {how: sum(load.counts[f"{kind} {how}"] for kind in kinds) for how in ("cut", "refused")}
    waits = [wait for rows in load.waits.values() for wait in rows]
    slowest = ", ".join(f"{kind} {middle(rows):.1f}/{max(rows):.1f}" for kind, rows in sorted(load.waits.items()))
    missing = f"; without {', '.join(house.missing)}" if house.missing else ""
    words = f"{took:.0f} s, {sum(nemesis.counts.values())} faults ({faults}); served: {clients}; {ended['cut']} cut and " \
            f"{ended['refused']} refused, all served in another try; {there}, all there; back after {middle(waits):.1f} s " \
            f"(the median), {max(waits, default=0):.1f} s at most ({slowest or 'nobody was cut'}){missing}; router one " \
            f"{begun[0].before.resident:.1f} -> {after[0].resident:.1f} MiB; router two"
    return Outcome(words, problems, begun[1].before, after[1])
