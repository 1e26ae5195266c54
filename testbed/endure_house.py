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
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Iterator, NamedTuple

from sniroute_owners import digest_of
from testbed.endure_clock import Clock
from testbed.endure_house_ends import (Cluster, Database, Disk, Edge, Process, Redis, Web, found, listens,
                                       make_certificate)
from testbed.endure_house_load import (Download, Lane, Ledger, Load, Page, Place, Psql, Reach, Streams, Upload)
from testbed.endure_house_names import DELAY, DOMAIN, Contest, Keep, Owner
from testbed.endure_house_nemesis import Nemesis, born
from testbed.endure_nodepass import Network, middle
from testbed.endure_router import (HERE, HOST, TESTBED, Backend, Baseline, Folder, Problem, Router, Standing, children,
                                   environment, running, wait_for)
from testbed.ports import free_port

SHELVES = 5
STREAMS_ONE, STREAMS_TWO, POD, TUNNEL, FORWARD = range(SHELVES)  # of the backend
PROGRAMS = {"postgres": "PostgreSQL", "psql": "psql", "curl": "curl", "chromium": "chromium",
            "redis-server": "Redis", "openssl": "openssl"}
TOKENS = {"alice": "token-of-alice", "bob": "token-of-bob"}
KEY = "house-key"  # of NodePass
TIMES = {"NP_REPORT_INTERVAL": "500ms", "NP_SERVICE_COOLDOWN": "100ms", "NP_HANDSHAKE_TIMEOUT": "5s",
         "NP_TCP_DIAL_TIMEOUT": "5s", "NP_POOL_GET_TIMEOUT": "8s", "NP_MIN_POOL_INTERVAL": "10ms", "NP_MAX_POOL_INTERVAL": "100ms"}
POD_PORT = 8080
CLAIMED = "program"  # a name that `sniroute.py claim` keeps
SHORT = 30.0  # seconds; who has less is in the suite, beside much else, and its clients come less often
GENERATIONS = 10  # former names that still lead somewhere: who has asked for one is on the way, and faults come thick
PHASE = 600.0  # seconds between two rests, in which the load is over, and the routers are looked at
LEFT = ("sniroute_registry_claims",)  # a contest that is broken off leaves one, which ends by itself: see `claims_agree`
RESIDENT_MORE_HOUSE = 12.0  # MiB: RESIDENT_MORE, and half as much for what a registry, HTTP and four kinds of tunnels keep


class HouseRouter(Router):
    """A router with a wall clock that can be put.

    `stands`: tunnels that are never idle.  `log`: a file that its log goes to; else it is a pipe, as everywhere.
    """

    def __init__(self, folder: Folder, clock: Clock, stands: int, log: pathlib.Path | None, **variables: str):
        into = ["sh", "-c", f'exec "$0" "$@" 2>>"{log}"'] if log else []
        self.program = [*into, sys.executable, str(TESTBED / "endure_clock.py"), str(clock.path), str(HERE / "sniroute.py")]
        self.stands = stands
        self.log = log
        super().__init__(folder, **variables)

    def said(self) -> Iterator[str]:
        """The lines of its log.  A file is emptied as it is read: its disk is small."""
        if self.log is None:
            yield from super().said()
            return
        part = b""
        while True:
            is_over = self.process.poll() is not None  # before the last look
            data = self.log.read_bytes() if self.log.exists() else b""
            if data:
                os.truncate(self.log, 0)
            *lines, part = (part + data).split(b"\n")
            yield from (f"{line.decode(errors='replace')}\n" for line in lines)
            if is_over and not data:
                return
            time.sleep(0.02)

    def is_quiet(self) -> bool:
        """Whether there is no connection, and no tunnel but those that stand."""
        found = self.metrics(fresh=False)
        live = sum(found[f'sniroute_tunnels{{state="{state}"}}'] for state in ("queued", "starting", "ready",
                                                                              "stopping", "backoff"))
        return not found["sniroute_connections_active"] and live == self.stands == len(children(self.pid))


class House:
    """All of it.  Used with `with`."""

    def __init__(self, seed: int, pace: float):
        self.seed = seed
        self.pace = pace
        self.missing = [name for program, name in PROGRAMS.items() if found(program) is None]
        if "openssl" in self.missing:
            raise Problem("openssl is not here (Debian package openssl)")
        self.stack = contextlib.ExitStack()
        self.ledger = Ledger()
        self.generation = 0
        self.claimed = f"{CLAIMED}.{DOMAIN}"

    def may(self, need: str) -> bool:
        """Whether all of these words are here: programs, "root" for disks, "netns"."""
        rights = {"root": self.log_disk.is_there, "netns": self.network.is_real}
        return all(rights[word] if word in rights else PROGRAMS[word] not in self.missing for word in need.split())

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
        log = self.path / "log"
        log.mkdir()
        self.scratch, self.log_disk = Disk(self.folders[0].scratch, "size=1m,nr_inodes=400"), Disk(log, "size=16m")
        for disk in (self.scratch, self.log_disk):
            stack.callback(disk.close)
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
        python, there = sys.executable, self.network.there
        self.far = self.begun(stack, "far", there(python, "-m", "testbed.endure_streams", "backend", "1"))
        port, _ = json.loads(wait_for(lambda: self.far.log.read_text().partition("\n")[0], "a backend in the namespace"))
        self.dialled = self.begun(stack, "nodepass", there(
            python, str(HERE / "sniroute_nodepass.py"),
            f"client://{KEY}@{self.network.near}:{self.dialled_port}/{HOST}:{port}?mode=2&min=2"), **TIMES)
        self.forward_port = free_port()
        self.forward = self.begun(stack, "forward", [
            python, str(HERE / "sniroute_kubernetes.py"), "port-forward", "default/svc/web:80", "--listen",
            f"{HOST}:{self.forward_port}", "--kubeconfig", str(self.cluster.kubeconfig)])
        self.others = [self.web, self.cluster, self.edge, self.far, self.dialled, self.forward]
        if self.redis:
            host, registry = self.places[1].registry
            self.claim = self.begun(stack, "claim", [
                python, str(HERE / "sniroute.py"), "claim", CLAIMED, f"tcp:{HOST}:{self.web.ports['alice']}", "--registry",
                f"http://{host}:{registry}", "--ttl", "10s"], SNIROUTE_REGISTRY_TOKEN=TOKENS["alice"])
            self.others += [self.redis, self.claim]
        self.load = Load(self.path, self.ledger, self.seed, self.pace)
        self.load.log_of = self.log_of
        self.load.lanes = self.lanes()

    def begun(self, stack: contextlib.ExitStack, name: str, words: list[str], **variables: str) -> Process:
        """Start a process, with its log in a file."""
        process = Process(self.path / f"{name}.log", words, environment(**variables))
        process.start()
        stack.callback(process.close)
        return process

    def router(self, number: int) -> HouseRouter:
        """Start a router."""
        variables = {**self.edge.variables, "HOUSE_KEY": KEY, **TIMES} if number == 0 else self.edge.variables
        log = self.path / "log" / "two" if number else None
        return HouseRouter(self.folders[number], self.clock, 1 - number, log, **variables)

    # -- settings and names

    def new_names(self) -> None:
        """Clients ask for new names of tunnels from now on; the former ones lead where they led."""
        number = self.generation + 1
        far = {"db": self.database.port if self.database else 0, "web": self.web.ports["tls"],
               "stream": self.backend.shelves[TUNNEL]}
        rows = {f"{name}{at}.{{}}.example.test": [HOST, port] for name, port in far.items()
                for at in range(max(1, number - GENERATIONS), number + 1)}
        places = [("tunnels", folder.tunnels) for folder in self.folders] + [("edge", self.path / "edge")]
        for word, place in places:
            self.folders[0].replace(place / "far.json", json.dumps({name.format(word): row for name, row in rows.items()}))
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
            folder.write_settings("\n".join(rows), f'cloudflared = "{folder.cloudflared}"',
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
            lanes += [Download(load, named("web.example.test"), one, "web"),
                      Download(load, named("plain.example.test"), two, "web", scheme="http"),
                      Download(load, named("web{}.tunnels.example.test"), one, "tunnels one", "web"),
                      Upload(load, named("plain.example.test"), one, "web", scheme="http"),
                      Upload(load, named("web{}.edge.example.test"), two, "carrier two", "edge", "web")]
        if self.may("chromium") and self.pace == 1.0:  # it takes as much CPU as all others; the suite has its own browsers
            lanes.append(Page(load, named("web.example.test"), one, "web"))
        if self.redis:
            parts = "redis", "router one", "router two", "registry one", "registry two"
            owners = [Owner(load, name, token, self.web.ports[name], self.places, *parts) for name, token in TOKENS.items()]
            self.keeps = [Keep(owner, f"keep-{owner.owner}", *parts) for owner in owners]
            lanes += [*self.keeps, Contest(owners, *parts, "web")]
            for name, owner, *more in (*((keep.name, keep.owner.owner) for keep in self.keeps),
                                       (named(self.claimed), "alice", "claim", "redis")):
                lanes += [Reach(load, name, one, "registry one", "web", *more, owner=owner),
                          Reach(load, name, two, "web", *more, owner=owner)]
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

    def log_of(self, word: str, name: str) -> str:
        """What the log of a router said last of a name; it comes a little later than the client's end."""
        time.sleep(0.3)
        lines = [line.strip() for router, place in zip(self.routers, self.places) if place.word == word
                 for line in list(router.lines) if name in line]
        if name == self.claimed:
            lines += self.claim.log.read_text(errors="replace").splitlines()
        return " / ".join(lines[-6:])

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


def claims_agree(house: House, problems: list[str]) -> None:
    """Whether Redis has all claims that were kept, and both routers know all that Redis has.

    They may know more: behind an outage of Redis each claim has its time to be renewed, though Redis has ended it.
    """
    def known() -> list[dict[str, int]]:
        prefix = "sniroute:claim:"
        living = {key.removeprefix(prefix) for key in house.redis.ask("KEYS", f"{prefix}*")}
        tables = [dict.fromkeys(living, 0) for _ in house.places]
        for place, table in zip(house.places, tables):
            for keep in house.keeps:
                said = keep.owner.tell(place, "GET", "/routes?limit=1000")
                table.update({row["name"]: row["generation"] for row in (said.body or {}).get("routes", [])
                              if row["name"] in living})
        return tables

    with contextlib.suppress(Problem):
        wait_for(lambda: len({json.dumps(table, sort_keys=True) for table in known()}) == 1, "the same claims", DELAY)
    one, two = known()
    problems += [f"the claim of {name}: {one[name]} at router one, {two.get(name)} at router two" for name in one
                 if not one[name] == two.get(name) != 0]
    problems += [f"a claim that is lost: {keep.name()}" for keep in house.keeps if one.get(keep.name()) != keep.generation]


def left_behind(house: House, met: set[str]) -> list[str]:
    """Processes, ports, folders, disks and networks that are still there."""
    def alive(row: str) -> bool:
        pid, began = row.split()
        with contextlib.suppress(OSError):
            return born(int(pid)) == began
        return False

    with contextlib.suppress(Problem):
        wait_for(lambda: not any(map(alive, met)), "the end of all children", 10)
    places = [house.path, *(folder.path for folder in house.folders)]
    mounts = pathlib.Path("/proc/mounts").read_text() + subprocess.run(
        ["ip", "netns"], capture_output=True, text=True).stdout if house.network.is_real else ""
    found = [f"a process: {row}" for row in met if alive(row)]
    found += [f"a process with {place}: {pid}" for place in places for pid in running(str(place)) if pid != os.getpid()]
    found += [f"a folder: {place}" for place in (*places, house.database and house.database.place) if place and place.exists()]
    found += [f"a disk or a network: {word}" for word in (*map(str, places), house.network.name) if word in mounts]
    found += [f"a port: {address}" for place in house.places for address in (place.listen, place.registry)
              if listens(address)]
    return found


def run(seconds: float, seed: int) -> Outcome:
    """So many seconds of it."""
    phases = max(2, round(seconds / PHASE))
    with_ends = phases * 2 // 3  # in the first of them, router one is killed, and handed over
    with House(seed, 1.0 if seconds > SHORT else 3.0) as house:
        load, nemesis, problems = house.load, Nemesis(house, seed), house.load.problems
        served(house)
        stood = [Baseline(router, LEFT) for router in house.routers]
        memory = [[base.before.resident for base in stood]]
        began = time.monotonic()
        for phase in range(phases):
            load.start()
            try:
                nemesis.strike(seconds / phases, min(4.0, seconds / 100), ends_router=phase < with_ends)
            finally:
                load.stop()
            if phase < with_ends:
                stood[0] = Baseline(house.routers[0], LEFT)  # it is another process
            after = [base.check(router, problems, RESIDENT_MORE_HOUSE) for base, router in zip(stood, house.routers)]
            memory.append([each.resident for each in after])
        took = time.monotonic() - began
        nemesis.note_children()
        there = kept(house, problems)
        if house.redis:
            claims_agree(house, problems)
        for number, router in enumerate(house.routers):
            if (code := router.end()) != 0:
                problems.append(f"router {house.places[number].word} ended with {code}")
            house.look_at(router)
        problems += [f"a folder of a tunnel: {home}" for folder in house.folders for home in folder.homes()]
        for other in house.others:
            other.must_live()
            other.kill(signal.SIGTERM)
            problems += other.faults()
        problems += [line for line in house.far.log.read_text().splitlines() if line.startswith("wrong")]
        problems += house.backend.faults()
    problems += left_behind(house, nemesis.met)
    return Outcome(told(house, nemesis, took, there, memory), problems, stood[1].before, after[1])


def told(house: House, nemesis: Nemesis, took: float, there: str, memory: list[list[float]]) -> str:
    """All figures."""
    load = house.load
    kinds = sorted({lane.kind for lane in load.lanes})
    faults = ", ".join(f"{count} {what}" for what, count in sorted(nemesis.counts.items()))
    clients = ", ".join(f"{load.counts[f'{kind} served']:,} {kind}" for kind in kinds)
    cut, refused = (sum(load.counts[f"{kind} {how}"] for kind in kinds) for how in ("cut", "refused"))
    waits = [wait for rows in load.waits.values() for wait in rows]
    slowest = ", ".join(f"{kind} {middle(rows):.1f}/{max(rows):.1f}" for kind, rows in sorted(load.waits.items()))
    quiet = "; ".join(f"router {place.word} {', '.join(f'{value:.1f}' for value in column)}"
                      for place, column in zip(house.places, zip(*memory)))
    left_out = [*house.missing, *(["disks"] if not house.log_disk.is_there else []),
                *(["a network namespace"] if not house.network.is_real else [])]
    return f"{took:.0f} s, {sum(nemesis.counts.values()):,} faults ({faults}); served: {clients}; {cut:,} cut and " \
           f"{refused:,} refused, who came again; acknowledged: {there}; back after {middle(waits):.1f} s (the median), " \
           f"{max(waits, default=0.0):.1f} s at most ({slowest or 'nobody was cut'}); MiB at rests: {quiet}" \
           f"{'; without ' + ', '.join(left_out) if left_out else ''}; router two"
