#!/usr/bin/env python3
"""scale: what more names, more routes and more routers cost, as curves: which cost grows with the number of the others.

    python3 bench/scale.py [--quick] [--only NAME,...] [--rounds N] [--json FILE]

    claims     the table of claims alone (sniroute_claims), with a clock that is set: 1,000 to 1,000,000 names
    one owner  the same, where all names are one owner's
    routes     a file of settings with 10 to 10,000 routes of five backends each, and the router that it makes
    ports      ports that owners have claimed
    routers    1 to 100 routers on one Redis, with so many names: each change is heard by all
    names      three routers on one Redis, with more and more names: each start, and each sweep, reads all

Each point of a curve is a process of its own, so that its memory is its own.  A figure is CPU time, or resident memory,
divided by the number of things; the lower one of the rounds counts.  The last column says how that grows with their
number, from the slope of its logarithm: what is done once to all is linear where the figure stays the same.

The routers of a point are Registry and Shared, as a router has them, 100 times in one loop, and a real redis-server.
Its CPU is what it says itself (INFO).

Needs Linux; for `routers` and `names` redis-server.  Everything stays on 127.0.0.1.  The exit code is 1 where
something failed, or grows as the square of its number.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Iterable, NamedTuple, Sequence

from routers import (HOST, PORTS, PROJECT, SILENCE, Failed, Figures, Processes, find, free_port, host_facts, lay_out,
                     output_of, version, wait_for)

sys.path.insert(0, str(PROJECT))

POINT_MAX = 900.0  # seconds for one point
CYCLES = 20000  # objects between two searches for cycles: as the router sets it (GC_THRESHOLD of sniroute_daemon)
BACKENDS = 5  # of each route
OWNED = 100  # names of each owner, but for the part where one has all
LOOKS = 20_000  # look-ups that are timed
CHANGES = 20_000  # claims and releases of an owner that has as many names as it may hold
TARGET = "tcp:192.0.2.1:443"
IN_FLIGHT = 64  # claims that a store is asked for at once
TTL, HOLD = 3600.0, 60.0
FLAT, LOGARITHM, SQUARE = 0.10, 0.40, 0.75  # slopes: a logarithm alone is 0.10 to 0.15, and caches double it


class Row(NamedTuple):
    """A line of a table."""

    key: str
    label: str
    digits: int = 1
    whole: bool = False  # it is done to all at once: then the sum of all is what grows


class Part(NamedTuple):
    """A curve for each row."""

    measure: Callable[[int], Figures]
    points: tuple[int, ...]
    quick: tuple[int, ...]
    what: str  # is counted by the points
    rows: tuple[Row, ...]
    program: str = ""  # that has to be installed


# -- measuring ---------------------------------------------------------------------------------


def cpu_us(act: Callable[[], Any], count: int) -> float:
    """CPU time of this process for one of `count` things, in microseconds."""
    began = time.process_time()
    act()
    return 1e6 * (time.process_time() - began) / count


def resident() -> int:
    """Bytes of this process in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def shuffled(names: Iterable[str]) -> list[str]:
    """In an order that is the same each time."""
    found = list(names)
    random.Random(1).shuffle(found)
    return found


# -- claims ------------------------------------------------------------------------------------


def measure_claims(count: int, owned: int = OWNED) -> Figures:
    """The table, without a store: names come, are renewed, found, end all at once, and are released."""
    from sniroute_claims import Table, Verdict
    from sniroute_registry import from_text, to_text
    now = 0.0
    table = Table(lambda: now)
    keys = shuffled(f"name-{number}.tun.example.com" for number in range(count))
    owners = [f"owner-{number // owned}" for number in range(count)]
    found: Figures = {}

    def claim() -> None:
        for key, owner in zip(keys, owners):
            verdict = table.judge(key, owner, limit=count + 1)
            table.put(table.claimed(verdict, key, owner, TARGET, TTL, HOLD))

    def renew() -> None:
        for key, owner in zip(keys, owners):
            verdict = table.permit(key, owner, table.live[key].lease)
            table.put(table.renewed(verdict.claim))

    def end() -> None:
        while table.next_expiry() <= now:
            table.expire()

    def change() -> None:
        for number in range(min(count, CHANGES)):
            key = f"other-{number}.tun.example.com"
            table.put(table.claimed(Verdict("new"), key, owners[0], TARGET, TTL, HOLD))
            table.drop(key)

    def pages() -> None:
        after = ""
        while page := table.page(after=after, limit=1000):
            after = page[-1].key

    gc.collect()
    before = resident()
    found["claim"] = cpu_us(claim, count)
    found["bytes"] = (resident() - before) / count
    found["cycles"] = cpu_us(gc.collect, count)
    now = 1.0
    found["renew"] = cpu_us(renew, count)
    some = keys[:LOOKS]
    strange = [f"x{key}" for key in some]
    found["find"] = cpu_us(lambda: [table.find(key) for key in some], len(some))
    found["miss"] = cpu_us(lambda: [table.find(key) for key in strange], len(some))
    found["page"] = cpu_us(lambda: [table.page(after=key) for key in keys[:1000]], len(keys[:1000]))
    found["list"] = cpu_us(pages, count)
    found["text"] = cpu_us(lambda: [from_text(to_text(table.live[key]), 0.0) for key in some], len(some))
    found["thaw"] = cpu_us(lambda: (table.freeze(), table.thaw()), count)
    now += TTL + HOLD / 2  # over, and held
    found["end"] = cpu_us(end, count)
    gc.collect()  # else the first one since the names came is in the figure
    found["change"] = cpu_us(change, min(count, CHANGES))
    now += HOLD
    found["free"] = cpu_us(end, count)
    assert not table.live and not table.held and not table.owned
    claim()
    found["release"] = cpu_us(lambda: [table.drop(key) for key in keys], count)
    return found


CLAIM_ROWS = (
    Row("claim", "claim, us"), Row("renew", "renew, us"), Row("find", "find a name, us", 2),
    Row("miss", "find none, us", 2), Row("page", "a page of 100, us", 0), Row("release", "release, us"),
    Row("change", "claim and release, where as many are held as may be, us"),
    Row("text", "as JSON for a store, and back, us"), Row("list", "list all, us each", 2, True),
    Row("thaw", "go on after an outage, us each", 2, True),
    Row("end", "all leases end in one second, us each", 1, True),
    Row("free", "all held names become free, us each", 1, True),
    Row("cycles", "Python's search for cycles, us each", 2, True), Row("bytes", "memory, bytes each", 0, True))


# -- routes ------------------------------------------------------------------------------------


def settings_text(count: int, change: str = "") -> str:
    """A file with so many routes, one in five a wildcard; `change` is added to the first one's backends."""
    lines = ["[routes]"]
    for number in range(count):
        backends = ",".join(f"10.{number >> 8}.{number & 255}.{each + 1}:443" for each in range(BACKENDS))
        pattern = f"*.w{number}.example.com" if number % 5 == 4 else f"r{number}.example.com"
        more = change if number == 0 else ""
        lines.append(f'"{pattern}" = {{ target = "tcp:{backends}{more}", health = "connect" }}')
    return "\n".join(lines) + "\n"


class Client:
    """What Group.pick asks of a client that has not tried any backend yet."""

    told_of = ()


def measure_routes(count: int) -> Figures:
    """Read a file, make a router, read it again with one change, look names up; and the schedule of the checks."""
    import sniroute_checks
    from sniroute_refusals import Refused
    from sniroute_router import Router, prepare
    from sniroute_settings import load_settings, warn
    from sniroute_tunnels import TunnelTable
    found: Figures = {}
    # Once with one route, so that all that is imported late is there.
    few = load_settings(["--listen", f"{HOST}:0", "--route", "a.example.com=tcp:192.0.2.1:1,192.0.2.2:1"], {})
    Router(few, TunnelTable(few.launchers, few.ports, idle=1.0, start_timeout=1.0, max_tunnels=1,
                            max_starting=1)).server_close()
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        path = pathlib.Path(file.name)
        path.write_text(settings_text(count))
        made: list[Any] = []
        gc.collect()
        before = resident()
        found["read"] = cpu_us(lambda: made.append(load_settings(["-c", file.name, "--listen", f"{HOST}:0"], {})), count)
        settings = made.pop()
        found["warn"] = cpu_us(lambda: warn(settings), count)
        tunnels = TunnelTable(settings.launchers, settings.ports, idle=1.0, start_timeout=1.0, max_tunnels=1,
                              max_starting=1)
        found["build"] = cpu_us(lambda: made.append(Router(settings, tunnels)), count)
        router = made.pop()
        found["bytes"] = (resident() - before) / count
        path.write_text(settings_text(count, ",10.255.255.1:443"))
        found["again"] = cpu_us(lambda: (made.append(settings.again(settings)), prepare(made[0])), count)
        other = made.pop()
        found["adopt"] = cpu_us(lambda: router.adopt(other), count)
    routes = router.routes
    dice = random.Random(1)
    numbers = [dice.randrange(max(count // 5, 1)) * 5 for _ in range(min(LOOKS, 2 * count + 100))]
    exact = [f"r{number}.example.com" for number in numbers]
    wild = [f"n{at}.w{number + 4}.example.com" for at, number in enumerate(numbers)]

    def miss() -> None:
        for name in wild:
            try:
                routes.decide(f"x.{name}")
            except Refused:
                pass

    found["exact"] = cpu_us(lambda: [routes.find(name) for name in exact], len(exact))
    found["wild"] = cpu_us(lambda: [routes.find(name) for name in wild], len(wild))
    found["miss"] = cpu_us(miss, len(wild))
    for name in exact:
        routes.decide(name)
    found["known"] = cpu_us(lambda: [routes.decide(name) for name in exact], len(exact))
    book = router.targets.book
    groups, client = [book.group(routes.decide(name)) for name in exact], Client()
    for group in groups:
        for member in group.members.values():
            group.checked(member, "")
    found["proven"] = cpu_us(lambda: [group.pick(client, "192.0.2.7") for group in groups], len(groups))
    found["pick"] = cpu_us(lambda: [group.pick(client, "192.0.2.7") for group in groups], len(groups))
    sniroute_checks.Round.start = lambda round: None  # the schedule alone: no sockets
    checks = book.checks

    def beat() -> None:
        for each in checks.rounds.values():
            each.queue.drop(each)
            each.beat()

    assert len(checks.rounds) == BACKENDS * count + 1
    found["beat"] = cpu_us(beat, len(checks.rounds))
    found["queues"] = float(len(book.queues))
    router.server_close()
    return found


ROUTE_ROWS = (
    Row("read", "read the file, us for a route", 0, True), Row("warn", "hold it against all warnings, us", 0, True),
    Row("build", "build the router, us", 0, True), Row("again", "reload: read it again, in the main thread, us", 0, True),
    Row("adopt", "reload: take it over, in the loop, us", 0, True), Row("bytes", "memory, bytes", 0, True),
    Row("known", "a name that was asked for before, us", 2), Row("exact", "a name, us", 2),
    Row("wild", "a name below a star, us", 2), Row("miss", "a name without a route, us", 2),
    Row("pick", "one of its backends, us", 2), Row("beat", "one beat of a health check, without its socket, us", 2),
    Row("queues", "queues of the loop", 0))


# -- ports -------------------------------------------------------------------------------------


def measure_ports(count: int) -> Figures:
    """The last twenty of so many claimed ports: what the router's loop does for each."""
    from sniroute_listeners import Ports
    from sniroute_refusals import SettingsError
    from sniroute_registrar import close_claimed, open_claimed
    from sniroute_router import Router
    from sniroute_routes import parse_port_route
    from sniroute_settings import load_settings
    from sniroute_tunnels import TunnelTable
    settings = load_settings(["--listen", f"{HOST}:0", "--route", f"a.example.com={TARGET}"], {})
    router = Router(settings, TunnelTable(settings.launchers, settings.ports, idle=1.0, start_timeout=1.0, max_tunnels=1,
                                          max_starting=1))
    routes, opened, free = [], {}, iter(PORTS)
    while len(routes) < count:
        route = parse_port_route(f"127.0.0.1:{next(free)}={TARGET}")
        try:
            opened |= Ports().open([route])
            routes.append(route)
        except SettingsError:
            pass  # somebody has it
    last = routes[-20:]
    for route in routes[:-20]:
        router.claimed_ports[route.pattern] = route
    router.change_ports({route.pattern: opened[route.pattern] for route in routes[:-20]})
    found = {"claim": cpu_us(lambda: [open_claimed(router, each, opened[each.pattern]) for each in last], len(last))}
    found["release"] = cpu_us(lambda: [close_claimed(router, each.pattern, lambda: None) for each in last], len(last))
    router.server_close()
    return found


# -- routers on one Redis ----------------------------------------------------------------------


class Routers:
    """As many routers as wanted, as far as their registries go, in one loop; and a Redis."""

    def __init__(self, processes: Processes):
        import sniroute_redis
        import sniroute_shared
        from sniroute_loop import Loop, monotonic
        # CPU is what counts: nothing gives up where other work has the cores, and sweeps come when we say so.
        sniroute_shared.ASK_TIME = sniroute_redis.TRY_MAX = sniroute_redis.ANSWER_MAX = sniroute_redis.IDLE = POINT_MAX
        sniroute_shared.SWEEP = POINT_MAX
        self.monotonic = monotonic
        self.port = free_port(itertools.islice(itertools.cycle(PORTS), os.getpid() % len(PORTS), 3 * len(PORTS)))
        self.process = processes.start([find("redis-server"), "--port", str(self.port), "--bind", HOST, "--save", ""],
                                       dict(os.environ))
        self.loop = Loop(self.fault)
        self.alarm = self.loop.timer(lambda: None)
        self.registries: list[Any] = []
        wait_for(self.listens, SILENCE, "redis-server")

    def fault(self, owner: Any) -> None:
        """A callback has raised."""
        raise

    def listens(self) -> bool:
        """Whether Redis takes connections."""
        import socket
        with socket.socket() as probe:
            return not probe.connect_ex((HOST, self.port))

    def until(self, predicate: Callable[[], Any], seconds: float = POINT_MAX) -> None:
        """Turn the loop until it is so."""
        deadline = self.monotonic() + seconds
        while not predicate():
            if self.monotonic() > deadline:
                raise Failed(f"not within {seconds:g} s")
            self.alarm.set(self.monotonic() + 0.01)
            self.loop.turn()

    def start(self, count: int) -> list[Any]:
        """More routers, which have read all."""
        from sniroute_claims import Table
        from sniroute_registry import Registry
        from sniroute_resp import parse_url
        from sniroute_shared import Shared
        new = []
        for _ in range(count):
            store = Shared(parse_url(f"redis://{HOST}:{self.port}"), self.loop)
            registry = Registry(self.loop, Table(), store, lambda key: None)
            store.open(registry)
            new.append(registry)
        self.registries += new
        self.until(lambda: all(registry.table.frozen_since is None for registry in new))
        return new

    def stop(self, registries: Sequence[Any]) -> None:
        """These end."""
        for registry in registries:
            registry.store.stop()
            self.registries.remove(registry)

    def info(self) -> Figures:
        """What Redis says of itself."""
        got: list[Any] = []
        self.registries[0].store.redis.ask("INFO", done=got.append)
        self.until(lambda: got)
        text = got[0] if isinstance(got[0], str) else got[0].decode()
        rows = dict(line.partition(":")[::2] for line in text.split("\r\n"))
        return {"cpu": 1e6 * (float(rows["used_cpu_sys"]) + float(rows["used_cpu_user"])),
                "bytes": float(rows["total_net_output_bytes"]), "memory": float(rows["used_memory"])}

    def ask_all(self, count: int, ask: Callable[[int, Callable[[Any], None]], None]) -> None:
        """Ask for each of so many things, IN_FLIGHT at once."""
        from sniroute_claims import PASSED
        asked = answered = 0

        def done(result: Any) -> None:
            nonlocal answered
            answered += 1
            if result.word not in PASSED:
                raise Failed(f"{result.word}: {result.sentence}")

        while answered < count:
            while asked < count and asked - answered < IN_FLIGHT:
                ask(asked, done)
                asked += 1
            self.until(lambda: answered == count or asked < count and asked - answered < IN_FLIGHT // 2)

    def claim(self, count: int, routers: Sequence[Any]) -> None:
        """So many names, each at another one of these routers; all have heard of them."""
        def ask(number: int, done: Callable[[Any], None]) -> None:
            routers[number % len(routers)].claim(f"name-{number}.tun.example.com", f"owner-{number // OWNED}", TARGET,
                                                 TTL, HOLD, done)
        self.ask_all(count, ask)
        self.until(lambda: all(len(registry.table) == count for registry in self.registries))

    def renew(self, count: int) -> None:
        """The same names, each at the router that has claimed it."""
        def ask(number: int, done: Callable[[Any], None]) -> None:
            registry = self.registries[number % len(self.registries)]
            claim = registry.table.live[f"name-{number}.tun.example.com"]
            registry.renew(claim.key, claim.owner, claim.lease, None, done)
        heard = [registry.events.counts["renewed"] for registry in self.registries]
        self.ask_all(count, ask)
        self.until(lambda: all(registry.events.counts["renewed"] == before + count
                               for registry, before in zip(self.registries, heard)))

    def measured(self, act: Callable[[], Any], count: int) -> Figures:
        """CPU of the routers and of Redis, bytes that Redis has sent: for one of so many things."""
        before = self.info()
        ours = cpu_us(act, count)
        after = self.info()
        return {"routers": ours, "redis": (after["cpu"] - before["cpu"]) / count,
                "bytes": (after["bytes"] - before["bytes"]) / count}


def with_routers(measure: Callable[[Routers], Figures]) -> Figures:
    """Measure with a Redis of its own."""
    with tempfile.TemporaryDirectory(prefix="sniroute-bench-") as folder:
        processes = Processes(pathlib.Path(folder))
        try:
            return measure(Routers(processes))
        finally:
            processes.stop(*processes.running)


CLAIMED = 1000  # names that are claimed and renewed, where the number of routers changes ...
READ = 2000  # ... and that are there when all routers start at once


def measure_routers(count: int) -> Figures:
    """So many routers: claims and renewals that all hear of, and a start of all at once."""
    def measure(lab: Routers) -> Figures:
        routers = lab.start(count)
        claims = lab.measured(lambda: lab.claim(CLAIMED, routers), CLAIMED)
        renewals = lab.measured(lambda: lab.renew(CLAIMED), CLAIMED)
        found = {"claim": claims["routers"] / count, "claim_redis": claims["redis"], "claim_bytes": claims["bytes"],
                 "renew": renewals["routers"] / count, "renew_redis": renewals["redis"], "renew_bytes": renewals["bytes"]}
        found["rate"] = 1e6 / renewals["redis"]
        lab.stop(routers[1:])
        lab.claim(READ, routers[:1])
        read = lab.measured(lambda: lab.start(count), count * READ)
        return {**found, "read": read["routers"], "read_redis": read["redis"], "read_bytes": read["bytes"]}
    return with_routers(measure)


MANY = 3  # routers, where the number of names changes


def measure_names(count: int) -> Figures:
    """Some routers that start at once where so many names are, and their next sweep."""
    def measure(lab: Routers) -> Figures:
        first = lab.start(1)
        empty = lab.info()["memory"]
        lab.claim(count, first)
        found = {"redis_bytes": (lab.info()["memory"] - empty) / count}
        gc.collect()
        before, many = resident(), MANY
        routers: list[Any] = []
        read = lab.measured(lambda: routers.extend(lab.start(many)), many * count)
        found["router_bytes"] = (resident() - before) / many / count

        def sweep() -> None:
            for registry in routers:
                registry.store._begin(False)
            lab.until(lambda: not any(registry.store.cursor for registry in routers))

        swept = lab.measured(sweep, many * count)
        return {**found, "read": read["routers"], "read_redis": read["redis"], "sweep": swept["routers"],
                "sweep_redis": swept["redis"], "sweep_bytes": swept["bytes"]}
    return with_routers(measure)


ROUTER_ROWS = (
    Row("claim", "a claim: CPU of each router, us"), Row("claim_redis", "  of Redis, us"),
    Row("claim_bytes", "  bytes that Redis sends", 0),
    Row("renew", "a renewal: CPU of each router, us"), Row("renew_redis", "  of Redis, us"),
    Row("renew_bytes", "  bytes that Redis sends", 0), Row("rate", "  a second, where Redis has a core for itself", 0),
    Row("read", "all start at once: CPU of a router for a name, us", 1, True),
    Row("read_redis", "  of Redis for a router and a name, us", 2, True),
    Row("read_bytes", "  bytes that Redis sends, the same", 0, True))
NAME_ROWS = (
    Row("read", "all start at once: CPU of a router for a name, us", 1, True),
    Row("read_redis", "  of Redis for a router and a name, us", 2, True),
    Row("sweep", "a sweep: CPU of a router for a name, us", 1, True),
    Row("sweep_redis", "  of Redis for a router and a name, us", 2, True),
    Row("sweep_bytes", "  bytes that Redis sends, the same", 0, True),
    Row("router_bytes", "memory of a router for a name, bytes", 0, True),
    Row("redis_bytes", "  of Redis", 0, True))


PARTS = {
    "claims": Part(measure_claims, (1000, 10_000, 100_000, 1_000_000), (300, 1000, 3000), "names", CLAIM_ROWS),
    "one owner": Part(lambda count: measure_claims(count, count), (1000, 10_000, 100_000, 1_000_000), (300, 1000, 3000),
                      "names", CLAIM_ROWS),
    "routes": Part(measure_routes, (10, 100, 1000, 10_000), (10, 30, 100), "routes", ROUTE_ROWS),
    "ports": Part(measure_ports, (30, 100, 300, 1000), (30, 60), "ports", (
        Row("claim", "claim one more: CPU in the loop, us", 0), Row("release", "release it, us", 0))),
    "routers": Part(measure_routers, (1, 10, 100), (1, 3), "routers", ROUTER_ROWS, "redis-server"),
    "names": Part(measure_names, (1000, 10_000, 100_000), (300, 1000), "names", NAME_ROWS, "redis-server"),
}


# -- curves ------------------------------------------------------------------------------------


def slope(points: Sequence[tuple[int, float]]) -> float:
    """How the logarithm of a figure grows with that of the number: least squares."""
    logs = [(math.log(count), math.log(max(figure, 1e-3))) for count, figure in points]
    middle, level = (sum(each) / len(logs) for each in zip(*logs))
    return sum((x - middle) * (y - level) for x, y in logs) / sum((x - middle) ** 2 for x, _ in logs)


def verdict(row: Row, points: Sequence[tuple[int, float]]) -> str:
    """How the cost of one thing grows with the number of things; of a whole, how the cost of all does."""
    power = slope(points[-3:])  # few things are all beginning
    if power <= FLAT:
        return "linear" if row.whole else "constant" if power >= -FLAT else "less"
    if power <= LOGARITHM:
        return "n log n" if row.whole else "log n"
    return f"n^{power + row.whole:.1f}"


def curves(part: Part, figures: dict[int, Figures]) -> tuple[str, list[str]]:
    """The table of a part, and the labels of what grows as the square."""
    lines, bad = [(part.what, *(f"{count:,}" for count in figures), "grows")], []
    for row in part.rows:
        points = [(count, each[row.key]) for count, each in figures.items()]
        lines.append((row.label, *(f"{figure:.{row.digits}f}" for _, figure in points),
                      verdict(row, points) if len(points) > 1 else "-"))
        if row.whole and len(points) > 2 and slope(points[-3:]) > SQUARE:
            bad.append(row.label)
    return lay_out(lines), bad


def point(name: str, count: int) -> Figures:
    """One point, in a process of its own."""
    process = subprocess.Popen([sys.executable, str(pathlib.Path(__file__).resolve()), "--point", name, str(count)],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said, wrong = process.communicate(timeout=POINT_MAX)
    except BaseException:
        process.terminate()  # it ends its Redis
        process.communicate()
        raise
    if process.returncode:
        raise Failed(f"{count:,} {PARTS[name].what}: {wrong.strip()[-300:]}")
    return json.loads(said)


def measured(name: str, points: Sequence[int], rounds: int) -> dict[int, Figures]:
    """The curves of a part: the lower figure of so many rounds."""
    found: dict[int, Figures] = {}
    for count in points:
        print(f"{name}: {count:,} {PARTS[name].what} ...", file=sys.stderr, flush=True)
        runs = [point(name, count) for _ in range(rounds)]
        found[count] = {key: (max if key == "rate" else min)(run[key] for run in runs) for key in runs[0]}
    return found


def main() -> int:
    """The command line.  Returns the exit code."""
    parser = argparse.ArgumentParser(description="Measures what more names, routes and routers cost.")
    parser.add_argument("--quick", action="store_true", help="few of everything, one round: whether it runs at all")
    parser.add_argument("--rounds", type=int, metavar="N", help="the lower figure of so many (default 2)")
    parser.add_argument("--only", metavar="NAME,...", default=",".join(PARTS), help=f"of these: {', '.join(PARTS)}")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--point", nargs=2, metavar=("NAME", "N"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if given.point:
        gc.set_threshold(CYCLES)
        print(json.dumps(PARTS[given.point[0]].measure(int(given.point[1]))))
        return 0
    wanted = given.only.split(",")
    if unknown := set(wanted).difference(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: there is {', '.join(PARTS)}")
    if given.rounds is not None and given.rounds < 1:
        parser.error("--rounds: one at least")
    rounds = given.rounds or (1 if given.quick else 2)
    facts = host_facts() | {"sniroute": version(output_of(sys.executable, str(PROJECT / "sniroute.py"), "--version"))}
    print(f"{facts['date']}, sniroute {facts['sniroute']}, Python {facts['python']}, {facts['cores']} x {facts['cpu']}, "
          f"Linux {facts['kernel']}, load {facts['load'][0]} at the start; the lower of {rounds}")
    figures: dict[str, dict[int, Figures]] = {}
    failed: dict[str, str] = {}
    for name in wanted:
        part = PARTS[name]
        if part.program and not find(part.program):
            print(f"{name}: not measured: there is no {part.program} (Debian: apt install {part.program})",
                  file=sys.stderr)
            continue
        try:
            figures[name] = measured(name, part.quick if given.quick else part.points, rounds)
        except KeyboardInterrupt:
            return 130
        except (Failed, OSError, subprocess.TimeoutExpired) as error:
            failed[name] = str(error)
            continue
        table, bad = curves(part, figures[name])
        print(f"\n{name}\n{table}", flush=True)
        if bad and not given.quick:
            failed[name] = f"grows as the square: {'; '.join(bad)}"
    for name, why in failed.items():
        print(f"{name}: FAILED: {why}", file=sys.stderr)
    if given.json:
        with open(given.json, "w") as file:
            json.dump({**facts, "quick": given.quick, "rounds": rounds, "figures": figures, "failures": failed}, file,
                      indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
