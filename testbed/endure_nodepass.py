"""endure_nodepass: NodePass tunnels under a load, while everything about them fails; for testbed/endure.py.

    callers (TCP, checked; UDP) --- server ===== the network between ===== client --- Target, a process
                                    `------ Tunnel: one end lives to the end, the other one is killed

A day in five minutes: the times of the ends are a small part of the real ones (TIMES).  Four tunnels stand side by side,
one for each row of KINDS; one thing fails at a time (FAULTS), by chance, with a seed: an end is killed or stopped, its
target is killed, or the link between the two is down.  After each, a caller has to be served again within BACK.

Where this process may (root, and the program ip), clients live in a network namespace, and the link is a veth pair that
is taken down; else the client is stopped instead.

At the end, once the load is over: pools have their numbers, at both ends, and no session is left; the ends that have
lived all the time have no descriptor, thread or child more than at the start, and hardly more memory; no byte was
wrong; and no log has a fault.

    python3 -m testbed.endure_nodepass target HOST PORT     is the target: it sends everything back
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Callable, NamedTuple

from testbed.endure_router import FORBIDDEN, HERE, Problem, Standing, standing, wait_for
from testbed.ports import free_port

LOOPBACK = "127.0.0.1"
LINKS = "198.51.100."  # the network of all links: each has four addresses of it, and another run has others
TIMES = {
    "NP_REPORT_INTERVAL": "150ms", "NP_SERVICE_COOLDOWN": "100ms", "NP_HANDSHAKE_TIMEOUT": "1s", "NP_TCP_DIAL_TIMEOUT": "1s",
    "NP_POOL_GET_TIMEOUT": "2s", "NP_UDP_READ_TIMEOUT": "500ms", "NP_MIN_POOL_INTERVAL": "10ms",
    "NP_MAX_POOL_INTERVAL": "50ms",
}
LEAST, MOST = 4, 64  # connections of each pool, when nobody calls
BACK = 15.0  # seconds within which a caller is served again: an end that was stopped has a second of its own
CALM = 4.0  # seconds behind a fault, from which on no caller may fail
RESIDENT_MORE = 8.0  # MiB: what is bounded, and full after a while; see endure_router


class Kind(NamedTuple):
    """A tunnel of the test."""

    query: str
    flow: str
    survivor: str  # the end that is never killed


KINDS = [Kind("", "-", "server"), Kind("tls=1", "+", "client"), Kind("type=2", "-", "client"),
         Kind("type=3&tls=1", "+", "server")]


# -- the network between -----------------------------------------------------------------------


class Network:
    """Where clients live, and what leads there.  Used with `with`."""

    def __init__(self) -> None:
        self.name = f"np{os.getpid()}"
        self.link = f"npv{os.getpid()}"[:15]
        self.first = -1  # of its addresses
        self.is_real = False

    def ip(self, *words: str) -> bool:
        """Run ip; whether it went well."""
        return subprocess.run(["ip", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0

    def __enter__(self) -> Network:
        if os.geteuid() == 0 and shutil.which("ip") and self.ip("netns", "add", self.name):
            # The route is this run's alone, which `ip` sees to.  While the link is down its addresses must not be looked
            # for elsewhere.
            mine = (first for first in range(0, 256, 4)
                    if self.ip("route", "add", "unreachable", f"{LINKS}{first}/30", "metric", "9999"))
            self.first = next(mine, -1)
            steps = (("link", "add", self.link, "type", "veth", "peer", "name", "far", "netns", self.name),
                     ("addr", "add", f"{LINKS}{self.first + 1}/30", "dev", self.link), ("link", "set", self.link, "up"),
                     ("-n", self.name, "addr", "add", f"{LINKS}{self.first + 2}/30", "dev", "far"),
                     ("-n", self.name, "link", "set", "far", "up"), ("-n", self.name, "link", "set", "lo", "up"))
            self.is_real = self.first >= 0 and all(self.ip(*step) for step in steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self.first >= 0:
            self.ip("route", "del", "unreachable", f"{LINKS}{self.first}/30", "metric", "9999")
        self.ip("link", "del", self.link)
        self.ip("netns", "del", self.name)

    @property
    def near(self) -> str:
        """The address of servers and targets."""
        return f"{LINKS}{self.first + 1}" if self.is_real else LOOPBACK

    @property
    def far(self) -> str:
        """That of clients."""
        return f"{LINKS}{self.first + 2}" if self.is_real else LOOPBACK

    def there(self, *words: str) -> list[str]:
        """A command line that runs where clients live."""
        return ["ip", "netns", "exec", self.name, *words] if self.is_real else list(words)

    def down(self, is_down: bool) -> None:
        """Take the link down, or up."""
        self.ip("link", "set", self.link, "down" if is_down else "up")


# -- tunnels -----------------------------------------------------------------------------------


class Tunnel:
    """Two ends, and a target, which are processes."""

    def __init__(self, kind: Kind, network: Network, folder: pathlib.Path, number: int):
        self.kind = kind
        self.network = network
        self.path = folder / str(number)  # `.server`, `.client`, `.target`: their logs
        port, self.target_port = free_port(), free_port()
        is_near = kind.flow == "-"
        self.callers = (network.near, free_port()) if is_near else (network.far, 20000 + number)
        if not is_near and not network.is_real:
            self.callers = (LOOPBACK, free_port())
        places = (f"{self.callers[0]}:{self.callers[1]}", f"{network.near}:{self.target_port}")
        first, second = places if is_near else places[::-1]
        program = [sys.executable, str(HERE / "sniroute_nodepass.py")]
        self.words = {
            "server": [*program, f"server://key@{network.near}:{port}/{first}?mode={1 if is_near else 2}&{kind.query}"],
            "client": network.there(*program, f"client://key@{network.near}:{port}/{second}?mode=2&min={LEAST}"),
            "target": [sys.executable, "-m", "testbed.endure_nodepass", "target", network.near, str(self.target_port)],
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.fault_over = 0.0  # when the last fault was over; infinite while there is one
        for name in self.words:
            self.begin(name)

    def begin(self, name: str) -> None:
        """Start one of its processes."""
        with open(self.log_of(name), "ab") as output:
            self.processes[name] = subprocess.Popen(self.words[name], cwd=HERE, env=os.environ | TIMES, stdin=subprocess.DEVNULL,
                                                    stdout=output, stderr=output)

    def log_of(self, name: str) -> pathlib.Path:
        return self.path.with_suffix(f".{name}")

    def said(self, name: str) -> list[str]:
        """The log of one of its processes."""
        return self.log_of(name).read_text(errors="replace").splitlines()

    def tell(self, name: str, number: int) -> None:
        self.processes[name].send_signal(number)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End one of its processes."""
        self.tell(name, number)
        self.processes[name].wait()

    def trip(self, said: bytes = b"hello", patience: float = 0.5) -> bool:
        """Whether a caller is served."""
        with contextlib.suppress(OSError), socket.create_connection(self.callers, patience) as sock:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            got = b""
            while data := sock.recv(65536):
                got += data
            return got == said
        return False

    def udp_trip(self) -> bool:
        """Whether a datagram comes back."""
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.3)
            sock.sendto(b"datagram", self.callers)
            return sock.recv(100) == b"datagram"
        return False

    def state(self, name: str) -> dict[str, str]:
        """The numbers of the last status line of an end."""
        lines = [line.partition("CHECK_POINT|")[2] for line in self.said(name)[-20:] if "CHECK_POINT|" in line]
        return dict(pair.split("=") for pair in lines[-1].split("|")) if lines else {}

    def has_lost_its_link(self) -> bool:
        """Whether that was so lately: where the host is so busy that an end is not heard of for three report intervals."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - CALM - 5))
        return any("the link is over" in line and line[:19] >= since for name in ("server", "client")
                   for line in self.said(name)[-200:])

    def is_calm(self) -> bool:
        """Whether both ends say that nobody is served, and that the pool has the same number: LEAST, or a bit more.

        What is dialled for many stays until it is used, also when there are few.
        """
        states = [self.state(name) for name in ("server", "client")]
        pools = {int(state.get("POOL", 0)) for state in states}
        return all({"TCPS": "0", "UDPS": "0"}.items() <= state.items() for state in states) and len(pools) == 1 \
            and LEAST <= pools.pop() <= MOST

    def close(self) -> None:
        for name, process in self.processes.items():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


# -- what fails --------------------------------------------------------------------------------


def killed(tunnel: Tunnel, rng: random.Random) -> None:
    """The end that may die is killed, or told to end, and starts again."""
    name = "client" if tunnel.kind.survivor == "server" else "server"
    tunnel.kill(name, rng.choice((signal.SIGKILL, signal.SIGTERM)))
    time.sleep(rng.choice((0.0, 0.0, 0.3)))
    tunnel.begin(name)


def stopped(tunnel: Tunnel, rng: random.Random) -> None:
    """Either end hangs for a while: longer than the other one waits for a sign of life, or shorter."""
    name = rng.choice(("server", "client"))
    tunnel.tell(name, signal.SIGSTOP)
    time.sleep(rng.choice((0.05, 0.2, 0.8)))
    tunnel.tell(name, signal.SIGCONT)


def cut(tunnel: Tunnel, rng: random.Random) -> None:
    """The link is down for a while."""
    if not tunnel.network.is_real:
        stopped(tunnel, rng)
        return
    tunnel.network.down(True)
    time.sleep(rng.choice((0.1, 0.4, 1.0)))
    tunnel.network.down(False)


def without_target(tunnel: Tunnel, rng: random.Random) -> None:
    """The target is killed, and starts again."""
    tunnel.kill("target")
    time.sleep(rng.choice((0.0, 0.2)))
    tunnel.begin("target")


class Fault(NamedTuple):
    """A row of the table."""

    strike: Callable[[Tunnel, random.Random], None]
    weight: int
    is_common: bool  # it is about all tunnels


FAULTS = {"end killed": Fault(killed, 4, False), "end stopped": Fault(stopped, 3, False),
          "link down": Fault(cut, 2, True), "target killed": Fault(without_target, 2, False)}


# -- the load ----------------------------------------------------------------------------------


class Load:
    """Callers of all tunnels, who come again and again.  Used with `with`."""

    def __init__(self, tunnels: list[Tunnel], seed: int):
        self.stopping = threading.Event()
        self.lock = threading.Lock()  # guards what follows
        self.counts: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.threads = [threading.Thread(target=act, args=(tunnel, random.Random(f"{seed} {at} {act.__name__}")), name="load")
                        for at, tunnel in enumerate(tunnels) for act in (self.call, self.send)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def count(self, what: str, problem: str = "") -> None:
        with self.lock:
            self.counts[what] += 1
            if problem:
                self.problems.append(problem)

    def call(self, tunnel: Tunnel, rng: random.Random) -> None:
        """Callers by TCP: what comes back is what was said, or a beginning of it where something has failed."""
        while not self.stopping.wait(0.02):
            said = rng.randbytes(rng.choice((1, 100, 5_000, 200_000)))
            began, got, wrong = time.monotonic(), b"", ""
            try:
                with socket.create_connection(tunnel.callers, 5) as sock:
                    sender = threading.Thread(target=send_all, args=(sock, said))
                    sender.start()
                    try:
                        while data := sock.recv(1 << 18):
                            got += data
                    finally:
                        with contextlib.suppress(OSError):
                            sock.shutdown(socket.SHUT_RDWR)
                        sender.join()
            except OSError as error:
                wrong = str(error)
            if not said.startswith(got):
                same = len(os.path.commonprefix([said, got]))
                self.count("wrong", f"{tunnel.kind}: {len(got)} bytes for {len(said)}, of which {same} were sent: "
                                    f"{got[same:same + 20]!r}")
            elif got == said:
                self.count("served")
            else:
                excused = began < tunnel.fault_over + CALM or tunnel.has_lost_its_link()
                self.count("cut", "" if excused else f"{tunnel.kind}: a caller, to whose tunnel nothing was done, has got "
                                                     f"{len(got)} bytes of {len(said)}: {wrong or 'an end'}")

    def send(self, tunnel: Tunnel, rng: random.Random) -> None:
        """Callers by UDP: what comes back was sent."""
        while not self.stopping.is_set():
            with socket.socket(type=socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
                sock.settimeout(0.1)
                sent = set()
                for number in range(20):
                    data = b"%d " % number + rng.randbytes(rng.choice((1, 500, 5_000)))
                    sent.add(data)
                    with contextlib.suppress(TimeoutError):
                        sock.sendto(data, tunnel.callers)
                        back = sock.recv(65536)
                        self.count("datagrams", "" if back in sent else f"{tunnel.kind}: a datagram that nobody has sent")
                    if self.stopping.wait(0.02):
                        return


def send_all(sock: socket.socket, data: bytes) -> None:
    """Send, and end."""
    with contextlib.suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


# -- all of it ---------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What came of it."""

    words: str
    problems: list[str]
    before: Standing
    after: Standing


def stand(tunnels: list[Tunnel]) -> Standing:
    """How the ends that live all the time stand, together; without the connections that are idle in their pools."""
    rows = [standing(tunnel.processes[tunnel.kind.survivor].pid) for tunnel in tunnels]
    idle = sum(int(tunnel.state(tunnel.kind.survivor)["POOL"]) for tunnel in tunnels if "type=3" not in tunnel.kind.query)
    total = Standing(*(sum(column) for column in zip(*rows)))
    return total._replace(descriptors=total.descriptors - idle)


def calm(tunnels: list[Tunnel]) -> None:
    """Wait until nobody is served, and pools have their numbers."""
    for tunnel in tunnels:
        try:
            wait_for(tunnel.is_calm, "", 20)
        except Problem:
            raise Problem(f"{tunnel.kind}: a pool of {LEAST} to {MOST}, and no session: {tunnel.state('server')}, "
                          f"{tunnel.state('client')}") from None


def run(seconds: float, seed: int) -> Outcome:
    """So many seconds of it."""
    rng = random.Random(seed)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="endure-nodepass-"))
    problems: list[str] = []
    struck: collections.Counter[str] = collections.Counter()
    waits: list[float] = []
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, True)
        network = stack.enter_context(Network())
        tunnels = []
        for number, kind in enumerate(KINDS):
            tunnels.append(Tunnel(kind, network, folder, number))
            stack.callback(tunnels[-1].close)
        for tunnel in tunnels:
            wait_for(tunnel.trip, f"{tunnel.kind}: a first caller", 30)
            wait_for(tunnel.udp_trip, f"{tunnel.kind}: a first datagram", 10)
            tunnel.fault_over = time.monotonic()
        with Load(tunnels, seed) as warm_up:  # what comes once is there
            wait_for(lambda: warm_up.counts["served"] > 40 * len(tunnels), "callers that are served")
        calm(tunnels)
        before = stand(tunnels)
        with Load(tunnels, seed + 1) as load:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                name, = rng.choices(list(FAULTS), [fault.weight for fault in FAULTS.values()])
                fault, victim = FAULTS[name], rng.choice(tunnels)
                hurt = tunnels if fault.is_common else [victim]
                for tunnel in hurt:
                    tunnel.fault_over = float("inf")
                fault.strike(victim, rng)
                struck[name] += 1
                began = time.monotonic()
                for tunnel in hurt:
                    wait_for(tunnel.trip, f"{tunnel.kind}: a caller that is served again after: {name}", BACK)
                waits.append(time.monotonic() - began)
                for tunnel in hurt:
                    tunnel.fault_over = time.monotonic()
                time.sleep(rng.uniform(0, 0.3))
        problems += load.problems
        for tunnel in tunnels:
            wait_for(tunnel.udp_trip, f"{tunnel.kind}: a last datagram", 10)
        calm(tunnels)
        after = settled(tunnels, before)
        for what in ("descriptors", "threads", "children"):
            if getattr(after, what) > getattr(before, what):  # a helper for handshakes may have had its rest
                problems.append(f"{what}: {getattr(before, what)} before, {getattr(after, what)} after")
        if after.resident > before.resident + RESIDENT_MORE * len(tunnels):
            problems.append(f"memory: {before.resident:.1f} MiB before, {after.resident:.1f} after")
        for tunnel in tunnels:
            for name in ("server", "client"):
                tunnel.tell(name, signal.SIGTERM)
                if (code := tunnel.processes[name].wait(20)) != 0:
                    problems.append(f"{tunnel.kind}: the {name} has ended with {code}")
            problems += [f"{tunnel.kind}, {name}: {line}" for name in tunnel.words for line in tunnel.said(name)
                         if any(word in line for word in FORBIDDEN)][:5]
        words = f"{sum(struck.values())} faults ({', '.join(f'{count} {what}' for what, count in sorted(struck.items()))}; " \
                f"{'a real link' if network.is_real else 'no link of its own'}), {load.counts['served']:,} callers served, " \
                f"{load.counts['cut']:,} cut, {load.counts['datagrams']:,} datagrams; back after {middle(waits):.2f} s, at " \
                f"most {max(waits, default=0):.2f}"
        return Outcome(words, problems, before, after)


def settled(tunnels: list[Tunnel], before: Standing) -> Standing:
    """How they stand, once all is as before, or after a while: a helper for handshakes rests after ten seconds."""
    with contextlib.suppress(Problem):
        wait_for(lambda: all(now <= then for now, then in zip(stand(tunnels)[:3], before)), "descriptors", 20)
    return stand(tunnels)


def middle(values: list[float]) -> float:
    """The median."""
    return sorted(values)[len(values) // 2] if values else 0.0


# -- the target --------------------------------------------------------------------------------


def target(host: str, port: int) -> None:
    """Send everything back, by TCP and by UDP, until it is killed."""
    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(1 << 18):
                sock.sendall(data)

    def answer() -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.bind((host, port))
            while True:
                with contextlib.suppress(OSError):
                    data, address = sock.recvfrom(65536)
                    sock.sendto(data, address)

    threading.Thread(target=answer, daemon=True).start()
    with socket.create_server((host, port), backlog=128) as listener:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock,), daemon=True).start()


if __name__ == "__main__":
    target(sys.argv[2], int(sys.argv[3]))
