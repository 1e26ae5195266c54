"""endure_connections: many small connections, each checked, and the counters of the router; for testbed/endure.py.

    python3 -m testbed.endure_connections backend FIRST PORT    listens on PORT of 127.0.0.FIRST and the next three
    python3 -m testbed.endure_connections clients ORDERS        reads a number from stdin, makes so many connections,
                                                                says in a line of JSON what came of them, and so on

KINDS are the kinds of clients, a row each.  A client says all it has to say at once, as far as its kind allows, and
reads to the end: what it hears has to be, byte for byte, what its backend was asked for.  A backend, in turn, checks
the hello and each byte, and on which address it is asked.  The language is that of endure_streams.

It goes in rounds.  After each one, when the router is quiet and its tunnels are gone, the counters have to be exactly
what was made: accepted, ended and how, bytes, clients and processes of tunnels.  None is refused, none is lost.  The
memory is looked at then: from SETTLED connections on it may grow by SLOPE for each SETTLED more.

Times are compressed: a tunnel is idle after half a second, so each round starts and stops all anew.

Ports.  A connection that has ended keeps its pair of addresses for a minute.  So clients come from SOURCES addresses,
and backends listen on several; each pair of addresses has 28,000 ports.
"""

from __future__ import annotations

import collections
import contextlib
import json
import random
import select
import socket
import sys
import time
import zlib
from typing import Any, NamedTuple

from sniroute_wire import SSL_REQUEST_BYTES
from testbed.endure_router import Baseline, Folder, Helper, Problem, Router, Standing, bytes_total, standing, wait_for
from testbed.endure_streams import (DONE, ENDS_FIRST, MAGIC, OPENING, PATTERN, PERIOD, TRAILER, Opening, Wrong, bounded,
                                    hello_for, log_uniform)
from testbed.hellos import V1, V2
from testbed.ports import free_port

ROUND = 50_000  # connections, at most: so often all is compared, and the memory looked at
SETTLED = 100_000  # connections after which everything that is remembered is full
SLOPE = 1.0  # MiB of memory more for SETTLED more connections, at most
CLIENTS = 2  # processes: the host has two cores, and the router needs one
AT_ONCE = 16  # connections of such a process
SHELVES_OF_ONE = 4  # addresses of a process of backends: 127.0.0.2 and so on
BACKENDS = 2  # such processes
SHELVES = SHELVES_OF_ONE * BACKENDS
SOURCES = 50  # addresses of each process of clients
LARGEST = 2048  # bytes of a direction, behind the opening
HELLOS = 8  # hellos of each name: OpenSSL takes longer to make one than the rest of a connection takes
SPACE = 1 << 16


class Kind(NamedTuple):
    """A kind of clients."""

    weight: int  # of 100
    ends_first: bool  # half of them end their direction first; not where a tunnel, or SSLRequest, gives that a meaning
    preface: bytes = b""


KINDS = {
    "plain": Kind(60, True),
    "postgres": Kind(16, False, SSL_REQUEST_BYTES),
    "proxied1": Kind(8, True, V1),
    "proxied2": Kind(8, True, V2),
    "tunnel": Kind(8, False),
}
TUNNELS = 2  # names of tunnels


def name_of(kind: str, shelf: int) -> str:
    """The name that leads a kind's clients to a shelf."""
    return f"s{shelf}.{kind.rstrip('12')}.example.test"


def address_of(shelf: int) -> str:
    """Where this shelf listens."""
    return f"127.0.0.{2 + shelf}"


# -- the backend -------------------------------------------------------------------------------


class Served:
    """One connection of a backend.  It never waits: what it sends is little, and a new socket takes it."""

    def __init__(self, sock: socket.socket, shelf: int):
        self.sock = sock
        self.shelf = shelf
        self.data = b""
        self.opening: Opening | None = None
        self.wanted = 0  # bytes up in all, once there is an Opening
        self.is_served = False

    def take(self) -> bool:
        """Something has come.  Whether it is over.  Raises Wrong, OSError."""
        more = self.sock.recv(SPACE)
        self.data += more
        if self.data == SSL_REQUEST_BYTES:
            self.sock.sendall(b"S")
            self.data = b""
            return False
        if self.opening is None:
            self.open()
        opening = self.opening
        if opening is None or len(self.data) < self.wanted:
            if not more:
                raise Wrong(f"an end after {len(self.data)} bytes")
            return False
        if len(self.data) > self.wanted \
                or not PATTERN.startswith(self.data[self.wanted - opening.size_up:], opening.start_up):
            raise Wrong(f"other bytes than were sent: {opening}")
        if not self.is_served and not (more and opening.flags & ENDS_FIRST):
            self.is_served = True
            self.sock.sendall(PATTERN[opening.start_down:opening.start_down + opening.size_down]
                              + TRAILER.pack(DONE, opening.size_up))
            self.sock.shutdown(socket.SHUT_WR)
        return not more

    def open(self) -> None:
        """Read the hello and the Opening, if they are whole.  Raises Wrong."""
        data = self.data
        end = 5 + int.from_bytes(data[3:5], "big")
        if len(data) < end + len(MAGIC) + OPENING.size or len(data) < 5:
            return
        opening = Opening(*OPENING.unpack_from(data, end + len(MAGIC)))
        if data[end:end + len(MAGIC)] != MAGIC or zlib.crc32(data[:end]) != opening.hello:
            raise Wrong(f"a hello, or what is behind it, that was not sent like this: {data[:600]!r}")
        if opening.shelf != self.shelf:
            raise Wrong(f"a stream for shelf {opening.shelf} came to {self.shelf}")
        self.opening = opening
        self.wanted = end + len(MAGIC) + OPENING.size + opening.size_up


def run_backend(first: int, port: int) -> int:
    """Until stdin ends.  A line `wrong: ...` for each fault."""
    listeners: dict[int, tuple[socket.socket, int]] = {}
    served: dict[int, Served] = {}
    with contextlib.ExitStack() as stack:
        poller = stack.enter_context(select.epoll())
        for shelf in range(first, first + SHELVES_OF_ONE):
            listener = stack.enter_context(socket.create_server((address_of(shelf), port), backlog=1024))
            listeners[listener.fileno()] = listener, shelf
        for fd in (0, *listeners):
            poller.register(fd, select.EPOLLIN)
        print("ready", flush=True)
        while True:
            for fd, _ in poller.poll():
                if fd == 0:  # its end
                    return 0
                if fd in listeners:
                    listener, shelf = listeners[fd]
                    sock = listener.accept()[0]
                    served[sock.fileno()] = Served(sock, shelf)
                    poller.register(sock, select.EPOLLIN)
                    continue
                one = served[fd]
                try:
                    is_over = one.take()
                except (Wrong, OSError) as fault:
                    print(f"wrong: the backend has {fault or type(fault).__name__}", flush=True)
                    is_over = True
                if is_over:
                    del served[fd]
                    one.sock.close()


# -- clients -----------------------------------------------------------------------------------


class Clients:
    """The clients of a process: AT_ONCE are open at a time, and each step is done for all of them."""

    def __init__(self, address: list[Any], number: int, seed: int):
        self.address = tuple(address)  # of the router
        self.rng = rng = random.Random(seed)
        self.sources = [f"127.{1 + number}.0.{1 + each}" for each in range(SOURCES)]
        self.hellos = {name: [(wire, zlib.crc32(wire)) for wire in (hello_for(name, rng) for _ in range(HELLOS))]
                       for kind in KINDS for shelf in range(SHELVES) for name in (name_of(kind, shelf),)}
        self.report: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.made = 0

    def run(self, count: int) -> dict[str, Any]:
        """So many connections.  Returns how many of each kind, by who ended first; bytes; and what was wrong."""
        self.report.clear()
        self.wrong = []
        while count > 0 and not self.wrong:
            self.batch(min(AT_ONCE, count))
            count -= AT_ONCE
        return {**self.report, "wrong": self.wrong}

    def batch(self, count: int) -> None:
        """That many clients, beside each other."""
        rng = self.rng
        turns = []
        for kind in rng.choices(list(KINDS), [row.weight for row in KINDS.values()], k=count):
            row = KINDS[kind]
            shelf = rng.randrange(TUNNELS if kind == "tunnel" else SHELVES)
            wire, crc = rng.choice(self.hellos[name_of(kind, shelf)])
            opening = Opening(flags=ENDS_FIRST if row.ends_first and rng.random() < 0.5 else 0, shelf=shelf, hello=crc,
                              start_up=rng.randrange(PERIOD), size_up=log_uniform(rng, LARGEST),
                              start_down=rng.randrange(PERIOD), size_down=log_uniform(rng, LARGEST))
            words = wire + opening.packed() + PATTERN[opening.start_up:opening.start_up + opening.size_up]
            turns.append((kind, opening, words, self.connect()))
        for kind, opening, words, sock in turns:
            preface = KINDS[kind].preface
            if preface == SSL_REQUEST_BYTES:
                sock.sendall(preface)
            else:
                self.say(sock, opening, preface + words)
        for kind, opening, words, sock in turns:
            if KINDS[kind].preface == SSL_REQUEST_BYTES:
                if (said := sock.recv(1)) == b"S":
                    self.say(sock, opening, words)
                else:
                    self.wrong.append(f"SSLRequest is answered {said!r}")
        for kind, opening, words, sock in turns:
            with sock:
                heard = self.hear(sock)
            self.report["bytes up"] += len(words)
            self.report["bytes down"] += len(heard)
            self.report[f"{kind} {'client' if opening.flags else 'backend'}"] += 1
            if heard != PATTERN[opening.start_down:opening.start_down + opening.size_down] \
                    + TRAILER.pack(DONE, opening.size_up):
                self.wrong.append(f"a client of {name_of(kind, opening.shelf)} hears {len(heard)} bytes, "
                                  f"{heard[:20]!r} first: {opening}")

    def connect(self) -> socket.socket:
        """A connection, from the next address."""
        sock = socket.socket()
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((self.sources[self.made % SOURCES], 0))
        self.made += 1
        bounded(sock)
        sock.connect(self.address)
        return sock

    def say(self, sock: socket.socket, opening: Opening, words: bytes) -> None:
        """Say it all, and end where it is the client's turn."""
        with contextlib.suppress(ConnectionError):  # what it hears tells
            sock.sendall(words)
            if opening.flags & ENDS_FIRST:
                sock.shutdown(socket.SHUT_WR)

    def hear(self, sock: socket.socket) -> bytes:
        """All that comes, to the end."""
        heard = b""
        try:
            while data := sock.recv(SPACE):
                heard += data
        except OSError as error:
            self.wrong.append(f"a client: {error}")
        return heard


IP_BIND_ADDRESS_NO_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)  # ip(7): the port is chosen by connect()


def run_clients(orders: dict[str, Any]) -> int:
    """Orders: address, of the router; number, of this process; seed."""
    clients = Clients(**orders)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(clients.run(int(line))), flush=True)
    return 0


# -- the part ----------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """As a Result of testbed/endure.py."""

    words: str
    problems: list[str]
    before: Standing
    after: Standing


class Part(Helper):
    """A process of this module."""

    module = "endure_connections"

    def __enter__(self) -> Part:
        if self.process.stdout.readline() != "ready\n":
            self.__exit__()
            raise Problem("a process of connections does not begin")
        return self

    def begin(self, count: int) -> None:
        """Have clients make so many connections."""
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()

    def report(self) -> dict[str, Any]:
        """What came of them."""
        return json.loads(self.process.stdout.readline() or '{"wrong": ["a process of clients died"]}')


def lines_of(folder: Folder, name: str) -> int:
    """How many lines the stand-in for cloudflared has written."""
    try:
        with open(folder.tunnels / name, "rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0


class Books:
    """What was made, and what the router has counted, from the same moment on."""

    def __init__(self, folder: Folder, router: Router):
        self.folder = folder
        self.router = router
        self.made: collections.Counter[str] = collections.Counter()
        self.counted = router.metrics()
        self.clients, self.starts = lines_of(folder, "clients.jsonl"), lines_of(folder, "starts.jsonl")

    def counts(self) -> dict[str, float]:
        """What the router has counted."""
        now = self.router.metrics()
        return {name: value - self.counted.get(name, 0) for name, value in now.items()}

    def compare(self, problems: list[str]) -> None:
        """Add what differs.  The histograms are made by another thread of the router, which may be late."""
        with contextlib.suppress(Problem):
            wait_for(lambda: not self.differences(), "counters that are equal", 10)
        problems += self.differences()

    def differences(self) -> list[str]:
        """What differs now."""
        made, counts = self.made, self.counts()
        total = sum(number for what, number in made.items() if " " in what and not what.startswith("bytes"))
        starts = lines_of(self.folder, "starts.jsonl") - self.starts
        rows = {  # a metric, or the labels of several, and what it has to be
            "sniroute_accepted_total": total,
            'sniroute_connections_total{result="client_closed"}': sum(made[f"{kind} client"] for kind in KINDS),
            'sniroute_connections_total{result="backend_closed"}': sum(made[f"{kind} backend"] for kind in KINDS),
            "sniroute_connection_duration_seconds_count": total,
            "sniroute_route_wait_seconds_count": total,
            "sniroute_tunnel_processes_total": starts,
            "sniroute_tunnel_launches_total": starts,
            'sniroute_tunnel_starts_total{result="ready"}': starts,
            'sniroute_tunnel_stops_total{reason="idle"}': starts,
            'sniroute_route_connections_total{route="*.tunnel.example.test"}': made["tunnel backend"],
        }
        rows |= {name: 0 for name in counts if "refused" in name or name.startswith("sniroute_connections_total")
                 and name not in rows}
        problems = [f"{name} has grown by {counts.get(name, 0):,.0f}, where {wanted:,} happened"
                    for name, wanted in rows.items() if counts.get(name, 0) != wanted]
        for way in ("up", "down"):
            passed = bytes_total(self.router.metrics(fresh=False), way) - bytes_total(self.counted, way)
            if passed != made[f"bytes {way}"]:
                problems.append(f"{passed:,.0f} bytes {way} are counted, and {made[f'bytes {way}']:,} were sent")
        if (heard := lines_of(self.folder, "clients.jsonl") - self.clients) != made["tunnel backend"]:
            problems.append(f"tunnels had {heard} clients, and {made['tunnel backend']} were made")
        return problems


def slope(points: list[tuple[int, float]]) -> float:
    """How much MiB grow for SETTLED connections, by the line through the points that has the least squares."""
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    return SETTLED * sum((x - middle_x) * (y - middle_y) for x, y in points) \
        / sum((x - middle_x) ** 2 for x, _ in points)


def run(count: int, seed: int) -> Outcome:
    """So many connections in all.  Returns the figures, what is wrong, and how the router stood before and after."""
    problems: list[str] = []
    with Folder() as folder, contextlib.ExitStack() as stack:
        port = free_port()
        backends = [stack.enter_context(Part("backend", str(first), str(port)))
                    for first in range(0, SHELVES, SHELVES_OF_ONE)]
        routes = [f'"{name_of(kind, shelf)}" = {{ target = "tcp:{address_of(shelf)}:{port}", send_proxy = "none" }}'
                  for kind in ("plain", "postgres", "proxied") for shelf in range(SHELVES)]
        folder.write_settings("\n".join([*routes, '"*.tunnel.example.test" = "cloudflared:{name}"']),
                              f'cloudflared = "{folder.cloudflared}"', 'proxy_from = ["127.0.0.0/8"]',
                              f"max_per_client = {4 * CLIENTS * AT_ONCE}")
        for shelf in range(TUNNELS):
            folder.set("far.json", name_of("tunnel", shelf), [address_of(shelf), port])
        router = stack.enter_context(Router(folder))
        helpers = [stack.enter_context(Part("clients", json.dumps(
            {"address": folder.listen, "number": number, "seed": seed * 100 + number}))) for number in range(CLIENTS)]

        def go(number: int) -> collections.Counter[str]:
            """So many connections, by all processes; returns what they report."""
            for helper in helpers:
                helper.begin(number // CLIENTS)
            report: collections.Counter[str] = collections.Counter()
            for helper in helpers:
                found = helper.report()
                problems.extend(found.pop("wrong"))
                report.update(found)
            return report

        go(20 * CLIENTS * AT_ONCE)  # what comes once is there
        baseline = Baseline(router)
        books = Books(folder, router)
        points: list[tuple[int, float]] = []
        seconds, done = 0.0, 0
        while done < count:
            number = max(CLIENTS, min(ROUND, count - done) // CLIENTS * CLIENTS)
            began = time.monotonic()
            books.made.update(go(number))
            seconds += time.monotonic() - began
            done += number
            if problems:
                break
            router.metrics()  # what `is_quiet` hears is not older
            wait_for(router.is_quiet, "a router without connections and tunnels")
            books.compare(problems)
            points.append((done, standing(router.pid).resident))
        after = baseline.check(router, problems)
        late = [point for point in points if point[0] >= SETTLED]
        grown = slope(late) if len(late) > 2 else None
        if grown is not None and grown >= SLOPE:
            problems.append(f"memory grows by {grown:.2f} MiB for {SETTLED:,} connections: "
                            + ", ".join(f"{each:,}: {mib:.1f}" for each, mib in points))
        if (code := router.end()) != 0:
            problems.append(f"it ended with {code}")
        problems += [f"the log: {line}" for line in router.faults[:10]]
        for backend in backends:
            backend.process.stdin.close()
            problems += backend.process.stdout.read().splitlines()[:10]
        kinds = ", ".join(f"{books.made[f'{kind} client'] + books.made[f'{kind} backend']:,} {kind}" for kind in KINDS)
        words = f"{done:,} connections ({kinds}), {done / seconds:,.0f}/s, counters equal" \
                f"{'' if grown is None else f'; {grown:+.2f} MiB for {SETTLED:,} more'}"
        return Outcome(words, problems, baseline.before, after)


def main(words: list[str]) -> int:
    """The command line."""
    what, *given = words
    return run_backend(*map(int, given)) if what == "backend" else run_clients(json.loads(*given))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
