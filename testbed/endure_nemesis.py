"""endure_nemesis: a mixed load on a router, and one fault after another meanwhile; for testbed/endure.py.

    Load       threads of clients: `tcp:`, PostgreSQL, behind a PROXY header, of names that are claimed for a moment,
               through tunnels; every byte is checked
    Nemesis    FAULTS, a table: what goes wrong with tunnels, ports, clients, backends, settings, log, store, clock,
               descriptors, processes
    Events     what has happened, against what the router has counted

What has to hold: no wrong byte, ever, and none to a stranger who has taken a tunnel's port.  The clients of `tcp:` are
served whole, whatever goes wrong elsewhere, and however they send, read and end (MANNERS); only while descriptors or
threads are short may one of them be refused, and while the disk is full a claim.  Clients of tunnels may be cut or
refused.  Afterwards each kind is served again, the router stands as before, and its counters agree with the events.

The seed determines which faults come, in which order, and what each is given; when they strike is a matter of the
moment.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import threading
import time
from typing import Callable, Iterator, NamedTuple

from sniroute_wire import SSL_REQUEST_BYTES
from testbed.endure_router import HOST, Apart, Backend, Folder, Problem, Router, children, descriptors, wait_for
from testbed.endure_streams import (BACKEND_ENDS_FIRST, EARLY, ENDS_FIRST, LEAVE, PATTERN, PERIOD, RESET, SERVE,
                                    SHUT_BACKEND, SHUT_CLIENT, SHUT_SIZE, SLICED, STALL, Cut, Opening, Wrong, bounded,
                                    broken_off, exactly, hello_for, log_uniform, open_stream, pass_stream)
from testbed.hellos import V1, V2
from testbed.ports import free_port

SHELVES = 4
LARGEST, LARGEST_TUNNEL = 1 << 18, 1 << 22  # bytes of a direction; through a tunnel more, so that faults meet them
NAMES = 5  # names of tunnels in use at a time; each time one of their processes is hurt, a new name may take its place
HELD = 12.0  # seconds that a silent client is kept: more than --prelude-timeout
PAUSE = 0.01  # seconds between two clients of a thread: the host has two cores
AFTER = 0.05  # seconds between two faults
SHORT = 0.3  # seconds for which something is short
START_TIMEOUT = 2.0

ALERT = b"\x15"  # the first byte of what a refused client reads

# Kinds of clients that no fault is meant for: a name, and what they say before the hello.  The others are "tunnel".
KINDS = {
    "tcp": ("calm.example.test", b""),
    "postgres": ("pg.example.test", SSL_REQUEST_BYTES),
    "proxied": ("proxied.example.test", V1),
    "proxied2": ("proxied.example.test", V2),
}
AT_ONCE = {"tcp": 2, "postgres": 1, "proxied": 1, "proxied2": 1, "claimed": 1, "tunnel": 4}  # threads of each kind
# How a client, and its backend, send, read and end.  Where neither may end first: a tunnel has no half-close; who ends
# before a backend has answered SSLRequest has left.
MANNERS = (0, 0, SLICED, EARLY, SLICED | EARLY)
ENDS = (0, ENDS_FIRST, ENDS_FIRST, BACKEND_ENDS_FIRST)
MAY_END = ("calm.example.test", "proxied.example.test")

CLAIMED, CLAIMS = "c.claims.example.test", "claims.example.test"  # a name that comes and goes; below which names may
TOKEN = "nemesis-token"
CLAIM_PAUSE = 0.3  # seconds between two claims: an owner may ask so often


class Load:
    """Clients of all kinds, from `start` to `stop`; then perhaps again."""

    def __init__(self, folder: Folder, backend: Backend, seed: int):
        self.folder = folder
        self.shelves = backend.shelves
        self.seed = seed
        self.stopping = threading.Event()
        self.threads: list[threading.Thread] = []
        self.lock = threading.Lock()  # guards what follows
        self.counts: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.made = 0  # names of tunnels so far
        self.names: list[str] = []  # those in use
        self.connects = 0  # connections to the router, whatever became of them
        self.shortages = 0  # how often descriptors, threads or the disk were made short
        self.is_short = False

    # -- names of tunnels

    def new_name(self, **switches: object) -> str:
        """A hostname that was never asked for, and leads to a shelf; with these switches of the stand-in."""
        with self.lock:
            self.made += 1
            name = f"n{self.made}.tunnels.example.test"
            self.folder.set("far.json", name, [HOST, self.shelves[self.shelf_of(name)]])
            if switches:
                self.folder.set("faults.json", name, switches)
            return name

    @staticmethod
    def shelf_of(name: str) -> int:
        """The shelf that a name leads to."""
        return int(name[1:name.index(".")]) % SHELVES if ".tunnels." in name else 0

    def replace_name(self, number: int) -> None:
        """Give clients of tunnels a new name instead of one in use."""
        name = self.new_name()
        with self.lock:
            self.names[number % len(self.names)] = name

    # -- clients

    def connect(self) -> socket.socket:
        """A connection to the router."""
        sock = socket.create_connection(self.folder.listen)
        with self.lock:
            self.connects += 1
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def once(self, rng: random.Random, name: str, preface: bytes = b"", **opening: int) -> str:
        """One client.  Returns "served", "cut", or "refused"; notes a wrong byte."""
        flags = rng.choice(MANNERS) | (rng.choice(ENDS) if name in MAY_END else 0)
        largest = LARGEST_TUNNEL if ".tunnels." in name else LARGEST
        start = rng.randrange(PERIOD)
        while PATTERN.startswith(ALERT, start):
            start = rng.randrange(PERIOD)  # so that the first byte tells a refusal from the backend's bytes
        wanted = Opening(**{"flags": flags, "shelf": self.shelf_of(name), "seed": rng.randrange(1 << 32),
                            "start_up": rng.randrange(PERIOD), "size_up": log_uniform(rng, largest),
                            "start_down": start, "size_down": log_uniform(rng, largest), **opening})
        try:
            with self.connect() as sock:
                bounded(sock)
                open_stream(sock, hello_for(name, rng), wanted, preface)
                first = sock.recv(1, socket.MSG_PEEK)
                if first in (b"", ALERT):
                    return "refused"
                pass_stream(sock, wanted, at_once=False)
                return "served"
        except Wrong as fault:
            with self.lock:
                self.problems.append(f"a client of {name}: {fault}")
            return "wrong"
        except (Cut, OSError) as error:
            return f"cut: {error or type(error).__name__}"

    def has_to(self, kind: str, wanted: str, do: Callable[[], str]) -> str:
        """Note a problem if `do` does not return `wanted`, unless something was short meanwhile.  Returns that."""
        shortages, excused = self.shortages, self.is_short
        ended = do()
        with self.lock:
            self.counts[f"{kind} {ended.partition(':')[0]}"] += 1
            if ended != wanted and not (excused or self.is_short or shortages != self.shortages):
                self.problems.append(f"a client of {kind}, which nothing was done to, was {ended}, not {wanted}")
        return ended

    def serves(self, rng: random.Random, kind: str, **opening: int) -> None:
        """A client of one of KINDS, which has to be served."""
        name, preface = KINDS[kind]
        self.has_to(kind, "served", lambda: self.once(rng, name, preface, **opening))

    def come_again(self, kind: str, number: int) -> None:
        """A thread's clients, one after another."""
        rng = random.Random(f"{self.seed} {kind} {number} {self.made}")
        while not self.stopping.is_set():
            if kind == "tunnel":
                ended = self.once(rng, self.names[rng.randrange(NAMES)])
                with self.lock:
                    self.counts[f"{kind} {ended.partition(':')[0]}"] += 1
            elif kind == "claimed":
                self.claim_for_a_moment(rng)
            else:
                self.serves(rng, kind)
            time.sleep(PAUSE)

    # -- claims

    def ask(self, method: str, path: str, body: object = None, lease: str = "") -> tuple[int, bytes]:
        """One request to the registry: the status, and the body; status 0: it cannot be reached."""
        connection = http.client.HTTPConnection(*self.folder.registry, timeout=60)
        with contextlib.closing(connection):
            try:
                connection.request(method, path, body and json.dumps(body), {
                    "Authorization": f"Bearer {TOKEN}", **({"Sniroute-Lease": lease} if lease else {})})
                response = connection.getresponse()
                return response.status, response.read()
            except (OSError, http.client.HTTPException):
                return 0, b""

    def claim_for_a_moment(self, rng: random.Random) -> None:
        """Claim a name, have a client served there, and give it back, however often that has to be asked."""
        answer: list[bytes] = []

        def claim() -> str:
            """What the registry says to it."""
            status, body = self.ask("POST", "/routes", {"name": CLAIMED, "target": f"tcp:{HOST}:{self.shelves[0]}"})
            answer.append(body)
            return f"{status}"

        if self.has_to("claims", "201", claim) == "201":
            self.has_to("claimed", "served", lambda: self.once(rng, CLAIMED))
            lease = json.loads(answer[0])["lease"]
            while self.has_to("releases", "204", lambda: str(
                    self.ask("DELETE", f"/routes/{CLAIMED}", None, lease)[0])) != "204" and not self.problems:
                time.sleep(CLAIM_PAUSE)
        self.stopping.wait(CLAIM_PAUSE)

    def start(self) -> None:
        """Begin, with new names of tunnels."""
        self.stopping.clear()
        self.names = [self.new_name() for _ in range(NAMES)]
        self.threads = [threading.Thread(target=self.come_again, args=(kind, number), name="load")
                        for kind, at_once in AT_ONCE.items() for number in range(at_once)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """End, and wait for it."""
        self.stopping.set()
        for thread in self.threads:
            thread.join()


class Nemesis:
    """Makes faults.  `load` goes on meanwhile."""

    def __init__(self, folder: Folder, load: Load, backend: Backend, seed: int):
        self.router: Router  # what it is about: started after `write_settings`
        self.apart = Apart(folder)
        self.folder = folder
        self.load = load
        self.backend = backend
        self.rng = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.stolen: list[tuple[float, socket.socket]] = []  # until when, and the listener
        self.silent: list[tuple[float, socket.socket]] = []  # until when, and the client
        self.threads: list[threading.Thread] = []  # clients of a fault
        self.binds = 0
        self.kills = 0  # signals to tunnels, any of which may have come before a program has said that it has begun
        self.dead_port = free_port()  # for a backend that refuses

    # -- the flow

    def write_settings(self, *more: str) -> None:
        """The file of settings as it should be."""
        calm, port = self.backend.shelves[0], self.dead_port
        self.folder.write_settings(
            f'"calm.example.test" = "tcp:{HOST}:{calm}"\n"pg.example.test" = "tcp:localhost:{calm}"\n'
            f'"bad.example.test" = "tcp:{HOST}:{calm}"\n"dead.example.test" = "tcp:{HOST}:{port}"\n'
            f'"proxied.example.test" = {{ target = "tcp:{HOST}:{calm}", send_proxy = "none" }}\n'
            '"*.tunnels.example.test" = "cloudflared:{name}"\n'
            f'[registry]\nlisten = "{HOST}:{self.folder.registry[1]}"\ndomains = ["{CLAIMS}"]\n'
            f'store = "sqlite:{self.folder.scratch}/claims.db"\ntargets = ["tcp"]\nnetworks = ["127.0.0.0/8"]\n'
            f'[registry.owners.alice]\ntoken = "sha256:{hashlib.sha256(TOKEN.encode()).hexdigest()}"',
            f'cloudflared = "{self.folder.cloudflared}"', f'start_timeout = "{START_TIMEOUT:g}s"',
            'proxy_from = ["127.0.0.0/8"]', *more)

    def strike(self, count: int) -> None:
        """So many faults: each of the table once, then by chance, as its weight says."""
        rows = list(FAULTS.items())
        order = [name for name, _ in rows]
        self.rng.shuffle(order)
        order += self.rng.choices([name for name, _ in rows], [row.weight for _, row in rows], k=max(0, count))
        for name in order[:count]:
            self.counts[name] += 1
            FAULTS[name].strike(self)
            self.tend()
            time.sleep(AFTER)
            if self.router.process.poll() is not None:
                raise Problem(f"the router ended after {name!r}: {''.join(self.router.lines)}")

    def tend(self, end: bool = False) -> None:
        """End what has lasted long enough, or all."""
        now = time.monotonic()
        for kept, close in ((self.stolen, self.look_at), (self.silent, lambda sock: sock.close())):
            for row in list(kept):
                if end or row[0] <= now:
                    kept.remove(row)
                    close(row[1])
        self.threads = [thread for thread in self.threads if thread.is_alive()]

    def look_at(self, thief: socket.socket) -> None:
        """Whether anybody has told a stranger anything."""
        with thief:
            thief.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    with thief.accept()[0] as client, contextlib.suppress(OSError):
                        client.setblocking(False)
                        if data := client.recv(65536):
                            port = thief.getsockname()[1]
                            self.load.problems.append(f"a stranger on port {port} heard {data[:40]!r}")

    def close(self) -> None:
        """End everything that is still there."""
        self.router.log_is_read.set()
        for thread in self.threads:
            thread.join()
        self.tend(end=True)

    # -- what faults are made of

    def victim(self) -> int | None:
        """A process of a tunnel."""
        return self.rng.choice(sorted(children(self.router.pid)) or [None])

    def signal(self, pid: int | None, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, TypeError):
            os.kill(pid, number)
            self.kills += number != signal.SIGCONT

    def hurt(self, number: int) -> None:
        """Send a signal to a tunnel's process.  A name whose process dies often waits long: give up half of them."""
        self.signal(self.victim(), number)
        if self.rng.random() < 0.5:
            self.load.replace_name(self.rng.randrange(NAMES))

    def freeze(self) -> None:
        """A tunnel's process hangs for a moment."""
        pid = self.victim()
        self.signal(pid, signal.SIGSTOP)
        time.sleep(self.rng.choice((0.01, 0.1, 0.4)))
        self.signal(pid, signal.SIGCONT)

    def asks(self, name: str, **opening: int) -> None:
        """A client of its own, which may be cut or refused; nobody waits for it."""
        rng = random.Random(self.rng.randrange(1 << 32))
        thread = threading.Thread(target=self.load.once, args=(rng, name), kwargs=opening, name="asks")
        thread.start()
        self.threads.append(thread)

    def serves(self, *kinds: str, **opening: int) -> None:
        """A client of its own that has to be served, of one of these kinds or of all; nobody waits for it."""
        rng, kind = random.Random(self.rng.randrange(1 << 32)), self.rng.choice(kinds or tuple(KINDS))
        thread = threading.Thread(target=self.load.serves, args=(rng, kind), kwargs=opening, name="serves")
        thread.start()
        self.threads.append(thread)

    def start_goes_wrong(self, **switches: object) -> None:
        """A few clients ask for a name whose program is told to do this."""
        name = self.load.new_name(**switches)
        for _ in range(self.rng.choice((1, 3))):
            self.asks(name)

    def backend_goes_wrong(self, manner: int) -> None:
        """A backend does this, after some bytes or none."""
        self.asks("bad.example.test", manner=manner, cut=self.rng.choice((0, 1, 5000, 1 << 20)),
                  size_down=1 << 18, size_up=self.rng.choice((0, 100, 1 << 18)))

    def asks_the_dead(self) -> None:
        """A client whose backend refuses it: it is told so."""
        rng = random.Random(self.rng.randrange(1 << 32))
        self.load.has_to("dead", "refused", lambda: self.load.once(rng, "dead.example.test"))

    def stall(self, name: str) -> None:
        """A backend, or a tunnel, falls silent, until the client gives up."""
        with contextlib.suppress(OSError):
            sock = self.load.connect()
            open_stream(sock, hello_for(name, self.rng), Opening(
                manner=STALL, shelf=self.load.shelf_of(name), size_down=1 << 18, size_up=1 << 20, cut=1000))
            self.silent.append((time.monotonic() + 0.5, sock))

    def steal(self) -> None:
        """A stranger listens on a port for tunnels, for a moment: one that is free, or one that was freed by force.

        By force: clients ask for the tunnel, its process is killed, and the stranger is there before the router runs
        again.  So the router may dial the port before it hears that the process has ended.
        """
        port, name = self.rng.randint(*self.folder.ports), ""
        pid = self.victim()
        if pid is not None and self.rng.random() < 0.7:
            with contextlib.suppress(OSError):
                rows = (self.folder.tunnels / "starts.jsonl").read_text().splitlines()
                port, name = {row["pid"]: (row["port"], row["hostname"])
                              for row in map(json.loads, rows[-200:])}.get(pid, (port, name))
        thief = socket.socket()
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if name:
            self.router.signal(signal.SIGSTOP)
        try:
            if name:
                for _ in range(4):
                    self.asks(name)
                time.sleep(0.01)  # so that they have said their hello
                self.signal(pid, signal.SIGKILL)
            for _ in range(50):
                with contextlib.suppress(OSError):
                    thief.bind((HOST, port))
                    thief.listen()
                    self.binds += 1
                    self.stolen.append((time.monotonic() + 1, thief))
                    return
                time.sleep(0.001)
            thief.close()
        finally:
            self.router.signal(signal.SIGCONT)

    def says(self, data: bytes, then: str) -> None:
        """A client that says this, in pieces or whole, and then ends, breaks off, or says no more."""
        with contextlib.suppress(OSError):
            sock = self.load.connect()
            step = self.rng.choice((1, 50, len(data)))
            for at in range(0, len(data), max(1, step)):
                sock.sendall(data[at:at + step])
            if then == "reset":
                broken_off(sock)
            elif then == "silence":
                self.silent.append((time.monotonic() + HELD, sock))
            else:
                sock.shutdown(socket.SHUT_WR)
                self.silent.append((time.monotonic() + 1, sock))

    def client_goes_wrong(self, then: str) -> None:
        """A client leaves in the middle of its hello, or behind it; or was never one."""
        rng = self.rng
        whole = hello_for(rng.choice(("calm.example.test", "bad.example.test", self.load.names[0])), rng)
        proxied = V1 + hello_for("proxied.example.test", rng)
        data = rng.choice((whole, whole[:rng.randrange(len(whole))], proxied, b"", SSL_REQUEST_BYTES,
                           rng.randbytes(300), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-x\r\n"))
        self.says(data, then)

    def breaks_off_in_its_stream(self) -> None:
        """A client that has heard some bytes, and said some, resets the connection; the backend goes on, to nobody."""
        name = self.rng.choice(("bad.example.test", self.load.names[0], *MAY_END))
        with contextlib.suppress(OSError, Cut):
            sock = self.load.connect()
            bounded(sock)
            open_stream(sock, hello_for(name, self.rng), Opening(
                flags=self.rng.choice((0, SLICED)), shelf=self.load.shelf_of(name), size_up=1 << 18, size_down=1 << 20))
            sock.sendall(PATTERN[:self.rng.choice((1, 1000, 100_000))])
            exactly(sock, self.rng.choice((1, 1000, 100_000)))
            broken_off(sock)

    def in_bytes(self) -> None:
        """A client whose hello comes byte by byte is served."""
        with contextlib.suppress(OSError), self.load.connect() as sock:
            bounded(sock)
            for byte in hello_for("calm.example.test", self.rng):
                sock.sendall(bytes([byte]))
            sock.shutdown(socket.SHUT_WR)
            exactly(sock, 1)

    def reload(self) -> None:
        """Good settings, with something changed."""
        seen = self.router.seen["reload: done"]
        self.write_settings(self.rng.choice(('connection_idle = "1h"', "max_starting = 3", 'prelude_timeout = "11s"',
                                             "max_per_client = 300", 'log_level = "debug"')))
        self.router.signal(signal.SIGHUP)
        wait_for(lambda: self.router.seen["reload: done"] > seen, "the reload")

    def bad_reload(self) -> None:
        """Settings that are wrong: nothing changes."""
        seen = self.router.seen["reload: nothing has changed"]
        self.folder.replace(self.folder.settings, self.rng.choice((
            "listen = [", "no_such_key = 1\n", "[routes]\n\"*\" = \"nowhere:x\"\n", "idle = \"soon\"\n", "\0\xff",
            "[routes]\n\"a.example.test\" = \"tcp:192.0.2.1\"\n")))
        self.router.signal(signal.SIGHUP)
        wait_for(lambda: self.router.seen["reload: nothing has changed"] > seen, "the word on a bad reload")
        self.write_settings()

    def dump(self) -> None:
        """SIGUSR1."""
        seen = self.router.seen["counters: "]
        self.router.signal(signal.SIGUSR1)
        wait_for(lambda: self.router.seen["counters: "] > seen, "the dump")

    def nobody_reads_the_log(self) -> None:
        """The pipe of the log fills up."""
        self.router.log_is_read.clear()
        for _ in range(20):
            self.router.signal(signal.SIGUSR1)
            time.sleep(0.02)
        self.router.log_is_read.set()

    @contextlib.contextmanager
    def short(self) -> Iterator[None]:
        """For a moment something is short, and a client may be refused that nothing else is done to."""
        self.load.is_short = True
        try:
            yield
        finally:
            self.load.shortages += 1
            self.load.is_short = False

    def few_descriptors(self) -> None:
        """The router may open hardly any more."""
        allowed = len(descriptors(self.router.pid)) + self.rng.randrange(6)
        with self.short(), self.apart.limited(self.router.pid, "nofile", allowed):
            for _ in range(5):
                self.asks("calm.example.test")
            self.asks(self.load.new_name())
            time.sleep(SHORT)

    def few_processes(self) -> None:
        """The router may start hardly any more threads and processes.  Where it is root, nothing keeps it from that."""
        allowed = self.apart.tasks() + self.rng.randrange(4)
        with self.short(), self.apart.limited(self.router.pid, "nproc", allowed):
            for _ in range(3):
                self.asks(self.load.new_name())
            self.signal(self.victim(), signal.SIGKILL)  # it was in use, and is started again
            time.sleep(SHORT)

    def full_disk(self) -> None:
        """No byte can be written to the disk that has the claims, and the homes of tunnel programs."""
        with self.short(), self.apart.full(self.router.pid):
            self.asks(self.load.new_name())
            time.sleep(SHORT)

    def full_log(self) -> None:
        """No byte can be written to the disk that has the log.  Nobody else may notice."""
        self.router.order("log /dev/full")
        try:
            for _ in range(3):
                self.router.signal(signal.SIGUSR1)
                self.serves()
                time.sleep(0.05)
        finally:
            self.router.order("log")

    def jump(self) -> None:
        """The wall clock jumps: forth or back, by a second or by a century.  Nobody may notice."""
        self.router.order(f"clock {self.rng.choice((1, 90, 86400, 10 ** 9)) * self.rng.choice((-1, 1))}")
        self.serves()
        time.sleep(self.rng.choice((0.0, 0.2)))
        self.router.order(f"clock {self.rng.choice((0, 0, -3600, 3600))}")


class Row(NamedTuple):
    """A kind of fault."""

    strike: Callable[[Nemesis], None]
    weight: int = 2  # how often it comes, beside the others


FAULTS = {
    "SIGKILL to a tunnel": Row(lambda self: self.hurt(signal.SIGKILL), 4),
    "SIGTERM to a tunnel": Row(lambda self: self.hurt(signal.SIGTERM), 3),
    "a tunnel hangs": Row(Nemesis.freeze, 4),
    "a start fails": Row(lambda self: self.start_goes_wrong(exit=1, words="no such host")),
    "a start ends well": Row(lambda self: self.start_goes_wrong(exit=0)),
    "never listens": Row(lambda self: self.start_goes_wrong(never_listen=True)),
    "listens late": Row(lambda self: self.start_goes_wrong(listen_delay=500)),
    "the port is taken at first": Row(lambda self: self.start_goes_wrong(in_use=2)),
    "listens elsewhere": Row(lambda self: self.start_goes_wrong(wrong_port=True), 1),
    "a child of it listens": Row(lambda self: self.start_goes_wrong(child_listens=True)),
    "dies between accept and connect": Row(lambda self: self.start_goes_wrong(exit_on_client=True)),
    "dies after some bytes": Row(lambda self: self.start_goes_wrong(exit_after_bytes=10000)),
    "dies soon after it listens": Row(lambda self: self.start_goes_wrong(exit_after=100)),
    "refuses its clients": Row(lambda self: self.start_goes_wrong(refuse=True)),
    "ignores SIGTERM": Row(lambda self: self.start_goes_wrong(ignore_term=True), 1),
    "says a lot": Row(lambda self: self.start_goes_wrong(flood=4)),
    "stops itself": Row(lambda self: self.stall(self.load.new_name(stop=True)), 1),
    "a stranger on a port": Row(Nemesis.steal, 6),
    "a client breaks off": Row(lambda self: self.client_goes_wrong("reset"), 3),
    "a client breaks off in its stream": Row(Nemesis.breaks_off_in_its_stream),
    "a client ends": Row(lambda self: self.client_goes_wrong("end"), 3),
    "a client falls silent": Row(lambda self: self.client_goes_wrong("silence")),
    "a hello in bytes": Row(Nemesis.in_bytes),
    "a client ends its direction": Row(lambda self: self.serves("tcp", "proxied", flags=ENDS_FIRST)),
    "a backend ends its direction": Row(lambda self: self.serves("tcp", "proxied", flags=BACKEND_ENDS_FIRST)),
    "slices both ways": Row(lambda self: self.serves(flags=SLICED, size_up=LARGEST, size_down=LARGEST)),
    "bytes behind the hello": Row(lambda self: self.serves(flags=EARLY, size_up=LARGEST)),
    "a client shuts its window": Row(lambda self: self.serves(flags=SHUT_CLIENT, size_down=SHUT_SIZE), 1),
    "a backend shuts its window": Row(lambda self: self.serves(flags=SHUT_BACKEND, size_up=SHUT_SIZE), 1),
    "a backend breaks off": Row(lambda self: self.backend_goes_wrong(RESET)),
    "a backend leaves": Row(lambda self: self.backend_goes_wrong(LEAVE)),
    "a backend falls silent": Row(lambda self: self.stall("bad.example.test")),
    "a backend refuses": Row(Nemesis.asks_the_dead),
    "a good reload": Row(Nemesis.reload),
    "a bad reload": Row(Nemesis.bad_reload),
    "a dump": Row(Nemesis.dump),
    "nobody reads the log": Row(Nemesis.nobody_reads_the_log),
    "few descriptors": Row(Nemesis.few_descriptors, 3),
    "few processes": Row(Nemesis.few_processes),
    "a full disk": Row(Nemesis.full_disk),
    "a full disk for the log": Row(Nemesis.full_log),
    "the clock jumps": Row(Nemesis.jump),
}


class Events:
    """What has happened from a moment on, against what the router has counted."""

    def __init__(self, evil: Nemesis):
        self.evil = evil
        self.counted = evil.router.metrics()
        self.before = self.seen()

    def seen(self) -> collections.Counter[str]:
        """What the load and the nemesis know."""
        load, evil = self.evil.load, self.evil
        found = collections.Counter(load.counts)
        found["connects"] = load.connects
        found["good reloads"], found["bad reloads"] = evil.counts["a good reload"], evil.counts["a bad reload"]
        found["kills"] = evil.kills
        with contextlib.suppress(FileNotFoundError), open(load.folder.tunnels / "starts.jsonl", "rb") as file:
            found["processes"] = sum(1 for _ in file)
        return found

    def compare(self, problems: list[str]) -> None:
        """Add what does not agree."""
        now, seen = self.evil.router.metrics(), self.seen()
        seen.subtract(self.before)

        def total(name: str) -> float:
            """What the router has counted by this metric, all labels of it."""
            return sum(value - self.counted.get(each, 0) for each, value in now.items()
                       if each == name or each.startswith(name + "{"))

        postgres = sum(seen[f"postgres {how}"] for how in ("served", "cut", "refused", "wrong"))
        whole = sum(total(f'sniroute_connections_total{{result="{how}_closed"}}') for how in ("client", "backend"))
        served = sum(number for what, number in seen.items() if what.endswith(" served"))
        rows = [  # what, as the router has counted; the least and the most that it can be
            ("connections accepted", total("sniroute_accepted_total"), seen["connects"], seen["connects"]),
            ("connections that ended well", whole, served, seen["connects"]),
            ("good reloads", total('sniroute_reloads_total{result="ok"}'), seen["good reloads"], seen["good reloads"]),
            ("bad reloads", total('sniroute_reloads_total{result="failed"}'), seen["bad reloads"], seen["bad reloads"]),
            # A program that is killed at once has not said that it has begun.
            ("tunnel processes", total("sniroute_tunnel_processes_total"), seen["processes"],
             seen["processes"] + seen["kills"]),
            ("refusals of a dead backend", total('sniroute_route_refused_total{route="dead.example.test"}'),
             seen["dead refused"], seen["dead refused"]),
            ("claims", total('sniroute_registry_events_total{event="claimed"}'), seen["claims 201"],
             seen["claims 201"]),
            ("releases", total('sniroute_registry_events_total{event="released"}'), seen["releases 204"],
             seen["releases 204"]),
            ("claims that a full disk refused", total('sniroute_registry_refusals_total{reason="unavailable"}'),
             seen["claims 503"] + seen["releases 503"], seen["claims 503"] + seen["releases 503"]),
            ("connections of PostgreSQL", total('sniroute_route_connections_total{route="pg.example.test"}'),
             seen["postgres served"], postgres),
        ]
        problems += [f"the counters: {counted:g} {what}, and there were {least} to {most}"
                     for what, counted, least, most in rows if not least <= counted <= most]


def served_again(load: Load, rng: random.Random) -> None:
    """Every kind of client is served, after all that.  Raises Problem."""
    load.claim_for_a_moment(rng)
    for kind in (*KINDS, "tunnel"):
        name, preface = KINDS.get(kind) or (load.new_name(), b"")

        def is_served() -> bool:
            """Whether a client of this kind is."""
            ended = load.once(rng, name, preface, manner=SERVE)
            load.counts[f"{kind} {ended.partition(':')[0]}"] += 1
            return ended == "served"

        wait_for(is_served, f"a client of {kind} is served again")
