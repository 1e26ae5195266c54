"""endure_house_nemesis: what goes wrong in `house`, one fault after another.

    FAULTS     the table: what strikes, how often, and which of them end router one
    Nemesis    strikes by chance, with a seed; each fault is in the Ledger, with the parts that it touches, and is undone
               when its row returns

What touches no part must not be noticed by any client: settings that are read again, good ones and bad ones, a log that
nobody reads, a wall clock that jumps.

A program that was killed is started again by its router after a pause that doubles while it dies young (OPERATING.md).
So after each such fault clients take new names, and what stands under one name (`rest`) is left alone for a minute.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import random
import resource
import signal
import time
from typing import TYPE_CHECKING, Callable, NamedTuple

from testbed.endure_router import Problem, children, descriptors, wait_for

if TYPE_CHECKING:
    from testbed.endure_house import House
    from testbed.endure_house_ends import Disk

YEAR = 365 * 86400.0
PROGRAMS = {"cloudflared": "tunnels", "sniroute_carrier": "carrier", "sniroute_kubernetes": "kubernetes",
            "sniroute_nodepass": "nodepass"}  # a word of a child's command line: the part that it is
REST = 65.0  # seconds until what stands is struck again: it has lived long enough then for its pause to begin anew


class Nemesis:
    """Makes faults."""

    def __init__(self, house: House, seed: int):
        self.house = house
        self.broken = house.ledger.broken
        self.rng = random.Random(f"nemesis {seed}")
        self.counts: collections.Counter[str] = collections.Counter()
        self.struck: dict[str, float] = {}  # when each was struck last
        self.first = self.rng.sample(list(FAULTS), len(FAULTS))  # each of them once, from the end
        self.met: set[str] = set()  # the processes of children so far: "PID START"

    def strike(self, seconds: float, pause: float, ends_router: bool = True) -> None:
        """Faults for so long: each of the table once, then by chance, as its weight says.  `pause`: between two, at most."""
        rows = {what: row for what, row in FAULTS.items()
                if self.house.may(row.needs) and (ends_router or not row.ends_router)}
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            what = self.first.pop() if self.first else self.rng.choices(list(rows), [row.weight for row in rows.values()])[0]
            if what not in rows or time.monotonic() < self.struck.get(what, -REST) + REST * rows[what].rests:
                continue
            self.note_children()
            self.struck[what] = time.monotonic()
            self.counts[what] += 1
            rows[what].strike(self)
            for router in self.house.routers:
                if router.process.poll() is not None:
                    raise Problem(f"a router ended after {what!r}: {''.join(router.lines)}")
            for other in self.house.others:
                other.must_live()
            time.sleep(self.rng.uniform(0.05, pause))

    def note_children(self) -> None:
        """Remember who lives below the routers: none of them may live at the end."""
        for router in self.house.routers:
            for pid in children(router.pid):
                with contextlib.suppress(OSError):
                    self.met.add(f"{pid} {born(pid)}")

    def pause(self, *seconds: float) -> None:
        time.sleep(self.rng.choice(seconds))

    # -- what the routers have started

    def child(self, *wanted: str) -> tuple[int, str] | None:
        """A child of a router, and which part it is; of the `wanted` parts, where some are named."""
        found = []
        for router, place in zip(self.house.routers, self.house.places):
            for pid in sorted(children(router.pid)):
                with contextlib.suppress(OSError):
                    line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                    part = next((part for word, part in PROGRAMS.items() if word in line), "")
                    if part in wanted:
                        found.append((pid, f"{part} {place.word}"))
        return self.rng.choice(found) if found else None

    def hurt(self, what: str, number: int, *wanted: str) -> None:
        """A child gets a signal; then its clients take new names."""
        if (victim := self.child(*wanted)) is None:
            return
        with self.broken(what, victim[1]):
            kill(victim[0], number)
            self.house.new_names()
            self.pause(0.0, 0.1)

    def freeze(self) -> None:
        """A child hangs for a moment."""
        if (victim := self.child(*PROGRAMS.values())) is None:
            return
        with self.broken("a child hangs", victim[1]):
            kill(victim[0], signal.SIGSTOP)
            self.pause(0.05, 0.3, 1.5)
            kill(victim[0], signal.SIGCONT)

    # -- what is beside them

    def again(self, what: str, end: object, part: str, *numbers: int) -> None:
        """A process is killed, and starts again."""
        with self.broken(what, part):
            end.kill(self.rng.choice(numbers or (signal.SIGKILL,)))
            self.pause(0.0, 0.0, 0.5, 1.5)
            end.start()

    def claim_again(self) -> None:
        """What keeps a claim is killed, and starts again; it is over once that has claimed."""
        claim = self.house.claim
        with self.broken("claim killed", "claim"):
            said = claim.log.read_text()
            claim.kill(self.rng.choice((signal.SIGKILL, signal.SIGTERM)))
            self.pause(0.0, 1.5, 11.0)  # the last one is longer than the claim's ttl
            claim.start()
            wait_for(lambda: f"\n{self.house.claimed}\n" in claim.log.read_text()[len(said) - 1:], "a claim that is made again")

    def hang(self, what: str, end: object, part: str) -> None:
        """A process hangs for a moment."""
        with self.broken(what, part):
            end.tell(signal.SIGSTOP)
            self.pause(0.05, 0.5, 2.0)
            end.tell(signal.SIGCONT)

    def link(self) -> None:
        """The link to the namespace of the NodePass client is down."""
        with self.broken("link down", "link"):
            self.house.network.down(True)
            self.pause(0.1, 0.4, 1.0)
            self.house.network.down(False)

    def cluster_down(self) -> None:
        """The API server refuses."""
        with self.broken("API server gone", "cluster"):
            self.house.cluster.order("down", back_after=None)
            self.pause(0.1, 0.5, 2.0)
            self.house.cluster.order("up")

    def pod(self) -> None:
        """A pod is gone, and another of its name comes; at once, or after a moment."""
        cluster = self.house.cluster
        name = self.rng.choice(cluster.pods)
        with self.broken("pod gone", "cluster"):
            if self.rng.random() < 0.5:
                cluster.order("replace", name=name, ports=None, namespace="default")
            else:
                cluster.order("remove", resource="pods", name=name, namespace="default")
                self.pause(0.1, 1.0)
                cluster.run_pod(name)

    def sessions(self) -> None:
        """Sessions to pods break."""
        with self.broken("sessions break", "cluster"):
            self.house.cluster.order("end", how=self.rng.choice(("rst", "eof", "goaway")), sessions=True, match={})

    def redis_clients(self) -> None:
        """Redis cuts its clients off."""
        with self.broken("Redis cuts clients", "redis"):
            for kind in ("normal", "pubsub"):
                self.house.redis.ask("CLIENT", "KILL", "TYPE", kind)

    # -- the routers

    def reload(self) -> None:
        """Good settings, with something changed.  Nobody notices."""
        router = self.rng.choice(self.house.routers)
        seen = router.seen["reload: done"]
        with self.broken("good reload"):
            self.house.write_settings(self.rng.choice((
                'connection_idle = "1h"', "max_starting = 3", 'prelude_timeout = "11s"', 'log_level = "debug"')))
            router.signal(signal.SIGHUP)
            wait_for(lambda: router.seen["reload: done"] > seen, "the reload")

    def bad_reload(self) -> None:
        """Bad settings.  Nothing changes."""
        router = self.rng.choice(self.house.routers)
        seen = router.seen["reload: nothing has changed"]
        with self.broken("bad reload"):
            router.folder.replace(router.folder.settings, self.rng.choice((
                "listen = [", "no_such_key = 1\n", "[routes]\n\"*\" = \"nowhere:x\"\n", "idle = \"soon\"\n", "\0\xff")))
            router.signal(signal.SIGHUP)
            wait_for(lambda: router.seen["reload: nothing has changed"] > seen, "the word on a bad reload")
            self.house.write_settings()

    def log_stops(self) -> None:
        """Nobody reads the log of router one for a while; its pipe fills up.  Nobody notices."""
        router = self.house.routers[0]
        with self.broken("log stops"):
            router.log_is_read.clear()
            for _ in range(20):
                router.signal(signal.SIGUSR1)
                time.sleep(0.02)
            self.pause(0.0, 1.0)
            router.log_is_read.set()

    def clock(self) -> None:
        """The wall clock of the routers jumps.  Nobody notices."""
        with self.broken("clock jumps"):
            self.house.clock.put(self.rng.choice((3600.0, -3600.0, YEAR, -YEAR, 0.0)))

    def few_descriptors(self) -> None:
        """A router may open hardly any more."""
        at = self.rng.randrange(2)
        router = self.house.routers[at]
        limits = resource.prlimit(router.pid, resource.RLIMIT_NOFILE)
        with self.broken("few descriptors", f"router {self.house.places[at].word}", "redis"):
            try:
                allowed = len(descriptors(router.pid)) + self.rng.randrange(6)
                resource.prlimit(router.pid, resource.RLIMIT_NOFILE, (allowed, limits[1]))
                self.pause(0.3, 1.0)
            finally:
                resource.prlimit(router.pid, resource.RLIMIT_NOFILE, limits)

    def disk_full(self, disk: Disk, *parts: str) -> None:
        """There is no room on a disk."""
        with self.broken("disk full", *parts):
            disk.fill(True)
            self.pause(0.3, 1.5)
            disk.fill(False)
            self.house.new_names()

    def redis_full(self) -> None:
        """There is no room for what Redis acknowledges: it ends then, by itself, and starts again."""
        redis = self.house.redis
        with self.broken("Redis's disk full", "redis"):
            redis.disk.fill(True)
            self.pause(0.3, 1.5)
            redis.disk.fill(False)
            if not redis.is_alive():
                redis.kill()
                redis.start()

    def router_hangs(self) -> None:
        """A router hangs for a moment."""
        at = self.rng.randrange(2)
        with self.broken("router hangs", f"router {self.house.places[at].word}"):
            self.house.routers[at].signal(signal.SIGSTOP)
            self.pause(0.1, 0.5, 2.0)
            self.house.routers[at].signal(signal.SIGCONT)

    def killed(self, number: int) -> None:
        """Router one is killed, or told to end, and starts again."""
        with self.broken("router killed", "router one", "registry one", "tunnels one", "carrier one", "kubernetes one",
                         "nodepass one"):
            self.house.end_router(number)
            self.pause(0.0, 0.0, 0.5)
            self.house.start_router()

    def handover(self) -> None:
        """A successor takes router one's port over.  Claimed names, and what has dialled in, come a moment later."""
        with self.broken("hand-over", "registry one", "nodepass one"):
            self.house.hand_over()


class Fault(NamedTuple):
    """A row of the table."""

    strike: Callable[[Nemesis], None]
    weight: int = 2  # how often it comes, beside the others
    ends_router: bool = False  # router one's process is another one then
    needs: str = ""  # what has to be here: words of `House.may`
    rests: int = 0  # whether it waits for REST until it strikes again


TUNNELS = "tunnels", "carrier", "kubernetes"
FAULTS = {
    "child SIGKILL": Fault(lambda self: self.hurt("child SIGKILL", signal.SIGKILL, *TUNNELS), 6),
    "child SIGTERM": Fault(lambda self: self.hurt("child SIGTERM", signal.SIGTERM, *TUNNELS), 4),
    "child hangs": Fault(Nemesis.freeze, 4),
    "NodePass server killed": Fault(lambda self: self.hurt("NodePass server killed", signal.SIGKILL, "nodepass"), rests=1),
    "NodePass client killed": Fault(lambda self: self.again("NodePass client killed", self.house.dialled, "link",
                                                            signal.SIGKILL, signal.SIGTERM), 3),
    "NodePass client hangs": Fault(lambda self: self.hang("NodePass client hangs", self.house.dialled, "link")),
    "link down": Fault(Nemesis.link, 3, needs="netns"),
    "API server gone": Fault(Nemesis.cluster_down, 3),
    "API server hangs": Fault(lambda self: self.hang("API server hangs", self.house.cluster, "cluster")),
    "pod gone": Fault(Nemesis.pod, 4),
    "sessions break": Fault(Nemesis.sessions, 3),
    "port-forward killed": Fault(lambda self: self.again("port-forward killed", self.house.forward, "port-forward")),
    "edge killed": Fault(lambda self: self.again("edge killed", self.house.edge, "edge"), 3),
    "edge hangs": Fault(lambda self: self.hang("edge hangs", self.house.edge, "edge")),
    "Redis killed": Fault(lambda self: self.again("Redis killed", self.house.redis, "redis"), 3, needs="redis-server"),
    "Redis ends": Fault(lambda self: self.again("Redis ends", self.house.redis, "redis", signal.SIGTERM),
                        needs="redis-server"),
    "Redis hangs": Fault(lambda self: self.hang("Redis hangs", self.house.redis, "redis"), 3, needs="redis-server"),
    "Redis cuts clients": Fault(Nemesis.redis_clients, needs="redis-server"),
    "PostgreSQL starts anew": Fault(lambda self: self.again("PostgreSQL starts anew", self.house.database, "postgres",
                                                            signal.SIGINT, signal.SIGQUIT), needs="postgres"),
    "good reload": Fault(Nemesis.reload),
    "bad reload": Fault(Nemesis.bad_reload),
    "log stops": Fault(Nemesis.log_stops),
    "clock jumps": Fault(Nemesis.clock, 4),
    "few descriptors": Fault(Nemesis.few_descriptors, 3),
    "disk full": Fault(lambda self: self.disk_full(self.house.scratch, "tunnels one"), needs="root"),
    "log's disk full": Fault(lambda self: self.disk_full(self.house.log_disk), needs="root"),
    "Redis's disk full": Fault(Nemesis.redis_full, 1, needs="root redis-server"),
    "web server killed": Fault(lambda self: self.again("web server killed", self.house.web, "web")),
    "claim killed": Fault(Nemesis.claim_again, needs="redis-server"),
    "router hangs": Fault(Nemesis.router_hangs),
    "router SIGKILL": Fault(lambda self: self.killed(signal.SIGKILL), 2, ends_router=True),
    "router SIGTERM": Fault(lambda self: self.killed(signal.SIGTERM), 1, ends_router=True),
    "hand-over": Fault(Nemesis.handover, 3, ends_router=True),
}


def kill(pid: int, number: int) -> None:
    """A signal, to what may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def born(pid: int) -> str:
    """When a process began, in ticks since the boot: it and its number are never the same again.  Raises OSError."""
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
