"""endure: the long forms of the tests, against the real program; with figures for RELIABILITY.md.

    python3 -m testbed.endure                                   everything at full length: an hour and a half
    python3 -m testbed.endure --only data,carrier --scale 0.01  two parts, a hundredth of the length
    python3 -m testbed.endure --only inputs --seed 7            other inputs

    nemesis     2,000 faults, one after another, under a mixed load             endure_nemesis, endure_inside
    inputs      1,000,000 mutated inputs for the parsers, 5,000 for the router  endure_inputs
    data        20 GB of checked bytes through `tcp:`, a fifth to slow readers  endure_streams
    carrier     2 GB through the carrier, to the stand-in for the edge          endure_streams, fake_edge
    kills       100 times SIGKILL to the router, with 20 children, under load   endure_kills, endure_claims
    handovers   10 successors under a load of new connections
    nodepass    four NodePass tunnels for five minutes, a day of theirs: ends,  endure_nodepass
                targets and the link between fail, one after another
    connections 500,000 small checked connections: memory, and exact counters   endure_connections
    house       all kinds of clients for an hour, while all that they use fails endure_house

The router is a process of its own, as users run it (endure_router).  A line for each part says what was done and how
the router stood before and after it: descriptors, threads and children have to be the same, memory up to RESIDENT_MORE,
and the log has no traceback.  A line `fault: ...` follows for each thing that is not as it should be, and the exit code
is 1 then.  Nothing depends on how fast the host is.

Seams: another part is a row in PARTS; another fault of the nemesis a row in its FAULTS; another parser a row in the
checks of endure_inputs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, NamedTuple

from testbed import endure_connections, endure_house, endure_inputs, endure_kills, endure_nemesis, endure_nodepass
from testbed.endure_crowd import CROWD, Crowd, prepare_crowd
from testbed.endure_far import edge
from testbed.endure_nemesis import Events, Load, Nemesis
from testbed.endure_router import (HERE, HOST, PIPES_MAX, RESIDENT_MORE_DATA, Backend, Baseline, Folder, Problem, Router,
                                   Standing, bytes_total, clients, environment, raise_descriptors, show,
                                   wait_for)
from testbed.endure_streams import bounded

GIGABYTE = 10 ** 9


class Result(NamedTuple):
    """What came of a part."""

    words: str  # what was done, in figures
    problems: list[str]
    before: Standing | None = None
    after: Standing | None = None


class Size(NamedTuple):
    """How much a part does: `of(500)` is 500 at full length."""

    scale: float
    seed: int

    def of(self, count: int) -> int:
        """At least 1."""
        return max(1, round(count * self.scale))


def said_wrong(router: Router, problems: list[str]) -> None:
    """Add what the log says of a fault of ours."""
    if router.faults:
        problems.append("the log: " + "\n      ".join(router.faults))


def end_well(router: Router, problems: list[str]) -> None:
    """End the router with SIGTERM, and add what is wrong with that, or in its log."""
    if (code := router.end()) != 0:
        problems.append(f"it ended with {code}")
    said_wrong(router, problems)


def count(number: float) -> str:
    """A number for people."""
    return f"{number:,.0f}"


# -- nemesis -----------------------------------------------------------------------------------


def nemesis(size: Size) -> Result:
    """Faults under a mixed load."""
    with Folder() as folder, Backend(endure_nemesis.SHELVES) as backend:
        load = Load(folder, backend, size.seed)
        evil = Nemesis(folder, load, backend, size.seed)
        evil.write_settings()
        problems = load.problems
        with Router(folder, apart=evil.apart) as router:
            evil.router = router
            try:
                load.start()
                for kind in endure_nemesis.AT_ONCE:  # what comes once is there
                    wait_for(lambda: load.counts[f"{kind} served"] > 3 or problems,
                             f"clients of {kind} that are served")
                load.stop()
                baseline = Baseline(router)
                events = Events(evil)
                load.start()
                evil.strike(size.of(2000))
                load.stop()
                endure_nemesis.served_again(load, random.Random(size.seed))
            finally:
                evil.close()
                load.stop()
            after = baseline.check(router, problems)
            events.compare(problems)
            end_well(router, problems)
            problems += backend.faults()
            kinds = collections.Counter()
            for what, number in load.counts.items():
                kinds[what.rpartition(" ")[2]] += number
            words = f"{count(sum(evil.counts.values()))} faults of {len(evil.counts)} kinds, " \
                    f"{count(kinds['served'])} streams served, {count(kinds['cut'])} cut, " \
                    f"{count(kinds['refused'])} refused; {count(load.made)} names, {evil.binds} ports stolen, " \
                    f"{count(kinds['201'])} claims" \
                    f"{'' if evil.apart.is_real else ' (the router has no user and no disk of its own here)'}"
            return Result(words, problems, baseline.before, after)


# -- inputs ------------------------------------------------------------------------------------


def said_to_the_router(folder: Folder, wires: list[bytes], rng: random.Random, problems: list[str]) -> None:
    """Say each input to the router, in pieces, then end.  It has to be answered, and ended, in every case."""
    for wire in wires:
        answer = b""
        with socket.create_connection(folder.listen) as sock:
            bounded(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                with contextlib.suppress(ConnectionError):  # it is refused already
                    for piece in endure_inputs.pieces(wire, rng) if rng.random() < 0.5 else [wire]:
                        sock.sendall(piece)
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    while data := sock.recv(65536):
                        answer += data
            except BlockingIOError:
                problems.append(f"no end after {wire.hex()}")
                continue
        if not fits(wire, answer.lstrip(b"SN")):
            problems.append(f"{wire.hex()} is answered {answer.hex()}")


def fits(wire: bytes, answer: bytes) -> bool:
    """Whether this can be what a client hears behind S and N: nothing, a refusal, or the echo of what it said.

    The echo lacks what the router has answered itself: it is a beginning and an end of what was said.
    """
    same = len(os.path.commonprefix([wire, answer]))
    is_echo = wire.endswith(answer[same:]) and (same < len(answer) or answer == wire)
    return is_echo or not answer or answer[0] in (0x15, ord("E"))


def inputs(size: Size) -> Result:
    """Mutated inputs: for the parsers in two processes, and for the running router."""
    problems: list[str] = []
    with Folder() as folder, Backend(1) as backend, contextlib.ExitStack() as stack:
        folder.write_settings(f'"**.example.com" = "tcp:{HOST}:{backend.echo}"\n"*" = "tcp:{HOST}:{backend.echo}"',
                              'proxy_from = ["127.0.0.0/8"]', 'prelude_timeout = "60s"')
        router = stack.enter_context(Router(folder))
        rng = random.Random(size.seed)
        preludes = endure_inputs.corpus()["preludes"]
        said_to_the_router(folder, preludes, rng, problems)  # what comes once is there
        baseline = Baseline(router)
        parsers = [stack.enter_context(subprocess.Popen(
            [sys.executable, "-m", "testbed.endure_inputs", str(size.of(1_000_000) // 2), str(size.seed * 2 + part)],
            cwd=HERE, env=environment(), stdout=subprocess.PIPE, text=True)) for part in range(2)]
        stack.callback(lambda: [parser.kill() for parser in parsers])
        wires = [endure_inputs.mutated(preludes, rng) for _ in range(size.of(5000))]
        workers = [threading.Thread(target=said_to_the_router,
                                    args=(folder, wires[part::4], random.Random(size.seed * 4 + part), problems))
                   for part in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        after = baseline.check(router, problems)
        end_well(router, problems)
        verdicts: collections.Counter[str] = collections.Counter()
        total = 0
        for parser in parsers:
            said = parser.communicate()[0]
            report = json.loads(said or '{"inputs": 0, "verdicts": {}, "faults": ["a process of parsers died"]}')
            total += report["inputs"]
            problems += report["faults"]
            for found in report["verdicts"].values():
                verdicts.update(found)
        words = f"{count(total)} inputs: {count(verdicts['read'])} read, {count(verdicts['refused'])} refused, " \
                f"{count(verdicts['more'])} incomplete; {count(len(wires))} said to the router"
        return Result(words, problems, baseline.before, after)


# -- data and carrier --------------------------------------------------------------------------


COUNTED: dict[str, Callable[[dict[str, float]], float]] = {  # what clients report, and where /metrics says the same
    "connections": lambda found: found["sniroute_accepted_total"],
    "served": lambda found: sum(found[f'sniroute_connections_total{{result="{who}_closed"}}']
                                for who in ("client", "backend")),
    "bytes up": lambda found: bytes_total(found, "up"),
    "bytes down": lambda found: bytes_total(found, "down"),
}


def carry(size: Size, router: Router, backend: Backend, total: int, **orders: Any) -> Result:
    """Carry `total` bytes through the router, and check each.  What comes once has come before.

    A fifth goes through a crowd of slow readers, which is larger than there are pipes for sinks that are full.
    """
    problems: list[str] = []
    orders |= {"address": router.folder.listen, "largest": min(1 << 27, total // 8)}
    little = orders | {"largest": 10_000}
    with clients(1, **little, bytes=50_000, at_once=4, all_slow=False, seed=size.seed + 1) as warm_up:
        for helper in warm_up:
            problems += json.loads(helper.process.stdout.readline())["wrong"]
    baseline = Baseline(router)
    counted = router.metrics()
    began = time.monotonic()
    report: collections.Counter[str] = collections.Counter()
    with clients(2, **orders, bytes=total - total // 5, at_once=6, all_slow=False, seed=size.seed) as helpers, \
            clients(1, **orders, bytes=total // 5, at_once=3 * PIPES_MAX, all_slow=True, seed=size.seed + 2) as slow:
        for helper in (*helpers, *slow):
            found = json.loads(helper.process.stdout.readline() or '{"wrong": ["a process of clients died"]}')
            problems += found.pop("wrong")
            report.update(found)
    seconds = time.monotonic() - began
    after = baseline.check(router, problems, RESIDENT_MORE_DATA)
    now = router.metrics(fresh=False)  # `check` has asked when all was over
    for what, read in COUNTED.items():
        taken = read(now) - read(counted)
        if taken != report[what] and not problems:
            problems.append(f"{what}: {report[what]} were made, and {taken:g} counted")
    end_well(router, problems)
    problems += backend.faults()
    words = f"{report['up'] / GIGABYTE:.2f} GB up, {report['down'] / GIGABYTE:.2f} GB down, " \
            f"{count(report['connections'])} connections, " \
            f"{(report['up'] + report['down']) / 1e6 / seconds:,.0f} MB/s"
    return Result(words, problems, baseline.before, after)


def data(size: Size) -> Result:
    """Checked bytes through `tcp:`."""
    names = ["a.example.test", "b.example.test", "c.example.test"]
    with Folder() as folder, Backend(len(names)) as backend:
        folder.write_settings("\n".join(f'"{name}" = "tcp:{HOST}:{port}"'
                                        for name, port in zip(names, backend.shelves)))
        with Router(folder) as router:
            return carry(size, router, backend, size.of(20 * GIGABYTE), names=names, ends_first=True)


def carrier(size: Size) -> Result:
    """Checked bytes through the carrier.  It has no half-close, as WebSocket has none."""
    names = ["a.example.test", "b.example.test", "c.example.test"]
    with Folder() as folder, Backend(len(names)) as backend, edge(folder, names, backend.shelves) as variables:
        folder.write_settings('"*.example.test" = "carrier:{name}"')
        with Router(folder, **variables) as router:
            return carry(size, router, backend, size.of(2 * GIGABYTE), names=names, ends_first=False)


# -- kills and hand-overs ----------------------------------------------------------------------


def kills(size: Size) -> Result:
    """SIGKILL to the router: its children end, the next one serves at once, claims are as they were."""
    return Result(*endure_kills.run(size.of(100), size.scale < 0.1, size.seed))


def handovers(size: Size) -> Result:
    """Successors take the port over under a load of new connections: nobody is refused, no byte is wrong."""
    problems: list[str] = []
    with Folder() as folder, Backend(len(CROWD)) as backend, contextlib.ExitStack() as stack:
        prepare_crowd(folder, backend)
        router = stack.enter_context(Router(folder))
        with Crowd(folder, CROWD, size.seed, 3) as crowd:
            wait_for(lambda: crowd.served > 40, "clients that are served")
        baseline = Baseline(router)
        with Crowd(folder, CROWD, size.seed + 1) as crowd:
            for _ in range(size.of(10)):
                goal = crowd.served + 30
                wait_for(lambda: crowd.served >= goal or crowd.broken or crowd.problems, "clients that are served")
                successor = stack.enter_context(Router(folder))
                if (code := router.ended()) != 0:
                    problems.append(f"a predecessor ended with {code}")
                said_wrong(router, problems)
                router = successor
            goal = crowd.served + 30
            wait_for(lambda: crowd.served >= goal or crowd.broken or crowd.problems, "clients that are served")
        problems += crowd.problems + [f"{number} clients of {what}" for what, number in crowd.broken.items()]
        after = baseline.check(router, problems)
        end_well(router, problems)
        problems += backend.faults()
    words = f"{size.of(10)} hand-overs, {count(crowd.served)} streams served, " \
            f"{count(sum(crowd.broken.values()))} refused or cut"
    return Result(words, problems, baseline.before, after)


# -- NodePass ----------------------------------------------------------------------------------


def nodepass(size: Size) -> Result:
    """Tunnels of which everything fails."""
    return Result(*endure_nodepass.run(300 * size.scale, size.seed))


def connections(size: Size) -> Result:
    """Many small connections, and exact counters."""
    return Result(*endure_connections.run(size.of(500_000), size.seed))


# -- the whole ---------------------------------------------------------------------------------


def house(size: Size) -> Result:
    """The main job under fault."""
    return Result(*endure_house.run(3600 * size.scale, size.seed))


# -- the command -------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Size], Result]] = {
    "nemesis": nemesis, "inputs": inputs, "data": data, "carrier": carrier, "kills": kills, "handovers": handovers,
    "nodepass": nodepass, "connections": connections, "house": house,
}


def main(argv: list[str] | None = None) -> int:
    """The command line.  Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m testbed.endure", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--scale", type=float, default=1.0, help="times the full length")
    parser.add_argument("--seed", type=int, default=16, help="of everything that is left to chance")
    given = parser.parse_args(argv)
    chosen = given.only.split(",")
    if unknown := set(chosen) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    raise_descriptors()
    failed = False
    for name in chosen:
        began = time.monotonic()
        try:
            result = PARTS[name](Size(given.scale, given.seed))
        except Problem as problem:
            result = Result("broke off", [str(problem)])
        stood = f"; {show(result.before, result.after)}" if result.before and result.after else ""
        print(f"{name:10} {time.monotonic() - began:6.1f} s  {result.words}{stood}  "
              f"{'FAILED' if result.problems else 'ok'}", flush=True)
        for problem in result.problems[:20]:
            print(f"    fault: {problem}", flush=True)
        if len(result.problems) > 20:
            print(f"    and {len(result.problems) - 20} faults more", flush=True)
        failed = failed or bool(result.problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
