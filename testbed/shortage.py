"""shortage: the whole router while this host gives it too little; for test_exhaustion.py, and by hand.

    python3 -m testbed.shortage                                  each shortage for ten seconds, a line of a table each
    python3 -m testbed.shortage --seconds 60 --only memory       one, for a minute

    Stage       a router with all that a user may have on, as a user of its own, and what its clients are led to
    KNOCKS      who wants something of it: clients by each way there is, the admin's, an owner of names, a reload
    Pace        one thread for each of KNOCKS: it comes again and again, and notes what became of it
    SHORTAGES   what is short: how that begins and ends, and what the router has to say of it
    suffer      one shortage from its begin to its end -> Suffered: CPU, lines, who was served again, and when

A shortage is a limit that prlimit(2) sets while the router runs: so the same router, with all that it has open, meets
each of them in turn.  RLIMIT_NPROC holds nobody who is root, and counts all processes of a user: so the router is a
user's whom nobody else is.

The verdict does not depend on how busy the host is.  CPU is what the router's threads have taken (proc(5)); what comes
after a shortage is waited for, and the time that it took is told.

Linux only, root only.  The standard library, and what needs no pytest of testbed/.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import http.client
import itertools
import json
import os
import pathlib
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple

from sniroute_owners import digest_of
from testbed import endure_router
from testbed.endure_router import (HOST, PIPES_MAX, RESIDENT_MORE_DATA, Baseline, Folder, Problem, Router, Standing,
                                   descriptors, show, standing, wait_for)
from testbed.hellos import hello, hello_of, named

USER = 54329  # who the router is; nobody else, so that RLIMIT_NPROC counts nothing but the router
READS = "+dac_read_search,+dac_override"  # what that user may do beside: read what root's Python and files are
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", f"--inh-caps={READS}",
           f"--ambient-caps={READS}")
LIMIT = ("import resource, sys; pid, which, number = sys.argv[1:]; _, hard = resource.prlimit(int(pid), int(which)); "
         "resource.prlimit(int(pid), int(which), (hard if number == 'None' else int(number), hard))")
TOKEN = "shortage-token"
PATIENCE = 2.0  # seconds that a client waits for its answer
FEW = 64  # descriptors
CPU_MOST = 0.10  # of one core, while something is short
LINES_MOST = 10  # lines that say one and the same, whatever happens meanwhile
LONGER = 5.0  # seconds
SETTLES = 0.2, 4.0  # seconds: CPU counts once it was little for so long, and this long after the begin at last
WARM = 2  # connections that are dialled ahead
CROWD = 80  # clients that stay, where descriptors are 64
HOLDERS = 200  # clients whose bytes are kept
MORE_MEMORY = 1 << 18  # bytes of address space beyond those in use
BIG = 60000  # bytes of a large hello: they are kept while its client waits


# -- the far end -------------------------------------------------------------------------------


def serve_far(listener: socket.socket) -> None:
    """Send back what each connection says first, by the one thread of the far end; plain HTTP gets an answer."""
    poller, socks = select.poll(), {}
    poller.register(listener, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd == listener.fileno():
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return  # it was shut down
                sock.setblocking(False)
                socks[sock.fileno()] = sock
                poller.register(sock, select.POLLIN)
                continue
            sock = socks[fd]
            try:
                data = sock.recv(1 << 16)
                if data.startswith(b"GET "):
                    data = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
                if data:
                    sock.send(data)
                    continue
            except BlockingIOError:
                continue
            except OSError:
                pass
            poller.unregister(fd)
            socks.pop(fd).close()


@contextlib.contextmanager
def far_end() -> Iterator[int]:
    """The port of a far end."""
    with socket.create_server((HOST, 0), backlog=1024) as listener:
        thread = threading.Thread(target=serve_far, args=(listener,), name="far-end")
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


# -- the router --------------------------------------------------------------------------------


def python() -> str:
    """A Python that every user may run: this one, or the host's own."""
    for path in (sys.executable, "/usr/bin/python3"):
        whole = pathlib.Path(path).resolve()
        if os.path.exists(path) and all(each.stat().st_mode & 1 for each in (whole, *whole.parents)):
            return path
    raise Problem("there is no Python here that other users may run")


class Stage:
    """A router with all that a user may have on.  Used with `with`."""

    def __init__(self) -> None:
        self.stack = contextlib.ExitStack()
        self.numbers = itertools.count(1)

    def __enter__(self) -> Stage:
        try:
            self._open()
        except BaseException:
            self.stack.close()
            raise
        return self

    def _open(self) -> None:
        self.folder = folder = self.stack.enter_context(Folder())
        self.far = self.stack.enter_context(far_end())
        first, _ = folder.ports
        self.port: endure_router.Address = HOST, first
        self.registry: endure_router.Address = HOST, first + 1
        folder.ports = first + 2, folder.ports[1]
        folder.set("far.json", "*", [HOST, self.far])
        far = f"tcp:{HOST}:{self.far}"
        folder.write_settings(
            "\n".join((f'"tcp.example.test" = "{far}"', f'"host.example.test" = "tcp:localhost:{self.far}"',
                       f'"web.example.test" = {{ target = "{far}", http = "forward" }}',
                       f'"many.example.test" = {{ target = ["{far}", "{far}"], warm = 2, health = "connect", '
                       'health_interval = "1s" }',
                       '"*.tunnel.example.test" = "cloudflared:{name}"', '"*.carried.example.test" = "carrier:{name}"',
                       "[registry]", f'listen = "{HOST}:{self.registry[1]}"', 'domains = ["claimed.example.test"]',
                       f'store = "sqlite:{folder.path}/claims.db"', 'targets = ["tcp"]', 'networks = ["127.0.0.0/8"]',
                       'target_ports = "1-65535"', "[registry.owners.alice]",
                       f'token = "sha256:{digest_of(TOKEN).hex()}"')),
            f'cloudflared = "{folder.cloudflared}"', 'start_timeout = "5s"', 'max_per_client = 100000', 'log_level = "info"')
        # A tunnel program has none of READS: the router gives its children no capability.  So the stand-in is a copy,
        # run by a Python that everybody may read.
        shutil.copy(endure_router.TESTBED / "fake_cloudflared.py", folder.tunnels)
        folder.write_cloudflared(os.path.realpath(python()), folder.tunnels)  # a venv's is a link, in a folder of root's
        for path in (folder.path, *folder.path.rglob("*")):
            os.chown(path, USER, USER)
        self.router = self.stack.enter_context(Router(folder, f"--port={HOST}:{self.port[1]}={far}", python=python(), before=AS_USER))
        self.router.lines = collections.deque(self.router.lines)  # without a bound
        self.pid = self.router.pid

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def limit(self, which: int, number: int | None) -> None:
        """Let the router have so much; None: as much as it may have.

        A process of the router's user does it: for root it takes CAP_SYS_RESOURCE, which not every container's has.
        """
        subprocess.run([*AS_USER, python(), "-I", "-S", "-c", LIMIT, *map(str, (self.pid, which, number))], check=True)

    def size(self, field: str) -> int:
        """The memory of the router, in bytes, by this field of its status (proc(5))."""
        return int(re.search(rf"{field}:\s+(\d+) kB", pathlib.Path(f"/proc/{self.pid}/status").read_text())[1]) << 10

    def cpu(self) -> float:
        """The CPU seconds that the router has taken, user and system."""
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


# -- who wants something -----------------------------------------------------------------------


class Refused(Exception):
    """A client was not served; the message says what it was told."""


def said_back(address: endure_router.Address, said: bytes, wanted: bytes | None = None) -> None:
    """A client that says this, and gets it back, or what begins with `wanted`.  Raises Refused and OSError."""
    with socket.create_connection(address, PATIENCE) as sock:
        sock.settimeout(PATIENCE)
        sock.sendall(said)
        wanted, answer = wanted or said, b""
        while len(answer) < len(wanted):
            data = sock.recv(1 << 16)
            if not data:
                raise Refused(f"ended after {answer[:40]!r}")
            answer += data
            if not wanted.startswith(answer[:len(wanted)]):
                raise Refused(f"{answer[:40]!r}")


def client(name: str) -> Callable[[Stage], None]:
    """A client of this name, a new one each time where it has {}."""
    def knock(stage: Stage) -> None:
        said_back(stage.folder.listen, hello(named(name.format(next(stage.numbers)).encode())))
    return knock


def asks(address: Callable[[Stage], endure_router.Address], path: str, body: Any = None) -> Callable[[Stage], None]:
    """An HTTP request, to the router itself."""
    def knock(stage: Stage) -> None:
        connection = http.client.HTTPConnection(*address(stage), timeout=PATIENCE)
        try:
            data = None if body is None else json.dumps({**body, "target": f"tcp:{HOST}:{stage.far}"})
            connection.request("GET" if body is None else "POST", path, data, {"Authorization": f"Bearer {TOKEN}"})
            response = connection.getresponse()
            text = response.read()
            if response.status >= 400:
                raise Refused(f"{response.status} {text[:200]!r}")
        except http.client.HTTPException as error:
            raise Refused(repr(error)) from None
        finally:
            connection.close()
    return knock


def reload(stage: Stage) -> None:
    """SIGHUP."""
    seen = stage.router.seen["reload: done"], stage.router.seen["reload: nothing has changed"]
    stage.router.signal(signal.SIGHUP)
    deadline = time.monotonic() + PATIENCE
    while stage.router.seen["reload: done"] == seen[0]:
        if stage.router.seen["reload: nothing has changed"] > seen[1]:
            raise Refused("nothing has changed")
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


class Knock(NamedTuple):
    """One who comes again and again."""

    act: Callable[[Stage], None]  # raises Refused or OSError
    every: float  # seconds between two


KNOCKS = {
    "tcp": Knock(client("tcp.example.test"), 0.1),
    "host": Knock(client("host.example.test"), 0.2),
    "port": Knock(lambda stage: said_back(stage.port, b"hello"), 0.2),
    "web": Knock(lambda stage: said_back(stage.folder.listen, b"GET / HTTP/1.1\r\nHost: web.example.test\r\n\r\n",
                                         b"HTTP/1.1 200"), 0.2),
    "many": Knock(client("many.example.test"), 0.2),
    "tunnel": Knock(client("same.tunnel.example.test"), 0.2),
    "new tunnel": Knock(client("n{}.tunnel.example.test"), 0.5),
    "admin": Knock(asks(lambda stage: stage.folder.admin, "/metrics"), 1.0),
    "probe": Knock(asks(lambda stage: stage.folder.admin, "/healthz"), 0.5),
    "claim": Knock(asks(lambda stage: stage.registry, "/routes", {"name": "shop"}), 0.5),
    "claimed": Knock(client("shop.claimed.example.test"), 0.2),
    "reload": Knock(reload, 1.0),
}


class Pace:
    """Everybody of KNOCKS, each in a thread of its own, from the begin to the end of a `with`."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self.over = threading.Event()
        self.hurry = False  # they come as often as they can: what is measured is when they are served again
        self.lock = threading.Lock()  # guards what follows
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()  # by who, and what became of it
        self.since = 0.0  # `served` is of those that were served after this
        self.served: dict[str, float] = {}  # when the first was
        self.threads = [threading.Thread(target=self._come, args=(name,), name=f"knock-{name}") for name in KNOCKS]

    def __enter__(self) -> Pace:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def _come(self, name: str) -> None:
        while not self.over.is_set():
            word = "served"
            try:
                KNOCKS[name].act(self.stage)
            except TimeoutError:
                word = "no answer"
            except (Refused, OSError) as error:
                word = re.sub(r"\d+", "N", str(error) or repr(error))
            with self.lock:
                self.counts[name, word] += 1
                if word == "served":
                    self.served.setdefault(name, time.monotonic())
            self.over.wait(0.05 if self.hurry else KNOCKS[name].every)

    def all_served(self) -> float:
        """Wait until each has been served from now on.  Returns the seconds that it took until the last one was."""
        with self.lock:
            self.served.clear()
            began = time.monotonic()
        self.hurry = True
        try:
            wait_for(lambda: len(self.served) == len(KNOCKS), "everybody served")
        except Problem as problem:
            last = "".join(list(self.stage.router.lines)[-20:])
            raise Problem(f"{problem}, but not {sorted(set(KNOCKS) - set(self.served))}: {self.counts}; "
                          f"the last lines:\n{last}") from None
        finally:
            self.hurry = False
        self.again = {name: when - began for name, when in self.served.items()}
        return max(self.again.values())


# -- what is short -----------------------------------------------------------------------------


@contextlib.contextmanager
def few_descriptors(stage: Stage) -> Iterator[None]:
    """64 descriptors, and more clients than that, who stay: half of them say no word."""
    with contextlib.ExitStack() as stack:
        stage.limit(resource.RLIMIT_NOFILE, FEW)
        for number in range(CROWD):
            sock = stack.enter_context(socket.create_connection(stage.folder.listen))
            sock.sendall(hello(named(b"tcp.example.test")) if number % 2 else b"")
        yield
    stage.limit(resource.RLIMIT_NOFILE, None)


@contextlib.contextmanager
def no_descriptor(stage: Stage) -> Iterator[None]:
    """No descriptor but those that are open."""
    stage.limit(resource.RLIMIT_NOFILE, len(descriptors(stage.pid)))
    yield
    stage.limit(resource.RLIMIT_NOFILE, None)


@contextlib.contextmanager
def no_task(stage: Stage) -> Iterator[None]:
    """Neither thread nor child starts."""
    stage.limit(resource.RLIMIT_NPROC, 1)
    yield
    stage.limit(resource.RLIMIT_NPROC, None)


@contextlib.contextmanager
def little_memory(which: int, field: str, stage: Stage) -> Iterator[None]:
    """No memory but what is in use, and clients whose bytes have to be kept."""
    with contextlib.ExitStack() as stack:
        stage.limit(which, stage.size(field) + MORE_MEMORY)
        for number in range(HOLDERS):
            sock = stack.enter_context(socket.create_connection(stage.folder.listen))
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                if number % 2:  # it reads nothing of what comes back
                    sock.send(hello(named(b"tcp.example.test")))
                    for _ in range(64):
                        sock.send(bytes(1 << 16))
                else:  # it does not come to the end of its hello
                    sock.send(hello_of(BIG)[:-1])
        yield
    stage.limit(which, None)


class Shortage(NamedTuple):
    """Something that this host gives too little of."""

    lasts: Callable[[Stage], Any]  # a context: the shortage is within
    says: str  # what a line of the log has
    served: tuple[str, ...] = ()  # who is served all the while


SHORTAGES = {
    "few descriptors": Shortage(few_descriptors, "Too many open files"),
    "no descriptor": Shortage(no_descriptor, "Too many open files"),
    "threads": Shortage(no_task, "no thread can be started", ("tcp", "port", "web", "many")),
    "address space": Shortage(functools.partial(little_memory, resource.RLIMIT_AS, "VmSize"), "memory"),
    "memory": Shortage(functools.partial(little_memory, resource.RLIMIT_DATA, "VmData"), "memory"),
}


class Suffered(NamedTuple):
    """What came of a shortage."""

    problems: list[str]
    cpu: float  # of one core, while it lasted
    said: collections.Counter[str]  # lines of the log meanwhile, by their words without numbers
    again: dict[str, float]  # seconds until each was served, after its end
    counts: collections.Counter[tuple[str, str]]


def words_of(line: str) -> str:
    """A line of the log without what differs from line to line of its kind."""
    text = line.split(" ", 2)[-1].rstrip()
    return re.sub(r"\b(n|c)?\d[\d.:]*", "N", text)


def settle(stage: Stage) -> None:
    """Wait until the router has done what its clients had asked for when the shortage began, or does not come to that."""
    last = time.monotonic() + SETTLES[1]
    while True:
        before = stage.cpu()
        time.sleep(SETTLES[0])
        if stage.cpu() - before <= SETTLES[0] * CPU_MOST or time.monotonic() > last:
            return


def suffer(stage: Stage, name: str, seconds: float) -> Suffered:
    """One shortage.  Raises Problem where the router ends, or does not serve everybody again."""
    shortage, problems, router = SHORTAGES[name], [], stage.router
    with Pace(stage) as pace:
        seen = len(router.lines)
        with shortage.lasts(stage):
            settle(stage)
            pace.counts.clear()
            cpu, began = stage.cpu(), time.monotonic()
            share, lasted = 1.0, 0.0
            # Longer where it has taken too much: a burst, as of what came before, has an end, and spinning has none.
            while (lasted < seconds or share > CPU_MOST and lasted < seconds + LONGER) and router.process.poll() is None:
                time.sleep(0.1)
                lasted = time.monotonic() - began
                share = (stage.cpu() - cpu) / lasted
            counts = pace.counts.copy()
            if router.process.poll() is not None:
                raise Problem(f"it ended with {router.process.returncode}")
        said = collections.Counter(map(words_of, list(router.lines)[seen:]))
        pace.all_served()
    if share > CPU_MOST:
        problems.append(f"{share:.1%} of a core")
    told = [line for line in said if shortage.says in line and "reason=" not in line]
    if not told and not any(shortage.says in line and "reason=" not in line for line in list(router.lines)):
        # It is said once in ten seconds, so perhaps before this shortage.
        problems.append(f"{shortage.says!r} is not in the log")
    flood = {line: said[line] for line in told if said[line] > LINES_MOST + counts["reload", "nothing has changed"]}
    if flood:
        problems.append(f"it is said too often: {flood}")
    for who in shortage.served:
        problems += [f"{who}: {word} ({count})" for (each, word), count in counts.items()
                     if each == who and word != "served"]
    return Suffered(problems, share, said, pace.again, counts)


def stand(stage: Stage) -> Standing:
    """How the router stands once it has served everybody, and is quiet."""
    with Pace(stage) as pace:
        pace.all_served()
    return Baseline(stage.router).before


def stood(stage: Stage, before: Standing) -> list[str]:
    """What is not as before, and not within a minute.  Connections are not dialled ahead for a while: WARM are missing."""
    def same() -> bool:
        now = standing(stage.pid)
        return (now.threads == before.threads and now.children == before.children
                and before.descriptors - WARM <= now.descriptors <= before.descriptors
                and now.pipes <= before.pipes + PIPES_MAX and now.resident <= before.resident + RESIDENT_MORE_DATA)

    try:
        wait_for(lambda: stage.router.is_quiet() and same(), "the baseline")
    except Problem:
        return [show(before, standing(stage.pid)), *descriptors(stage.pid)]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--only", default=",".join(SHORTAGES))
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    failed = False
    for name in args.only.split(","):
        with Stage() as stage:
            print(f"{name}: ", end="", flush=True)
            before = stand(stage)
            came = suffer(stage, name, args.seconds)
            came.problems.extend(stood(stage, before))
            slowest = max(came.again, key=came.again.get)
            print(f"CPU {came.cpu:.1%}, {sum(came.said.values())} lines of {len(came.said)} kinds, all served again "
                  f"after {came.again[slowest]:.2f} s ({slowest})")
            if args.verbose:
                for (who, word), number in sorted(came.counts.items()):
                    print(f"    {who}: {word}: {number}")
                for line, number in came.said.most_common(40):
                    print(f"    log: {number} x {line[:300]}")
                print(f"    again: { {who: round(after, 2) for who, after in came.again.items()} }")
            for problem in [*came.problems, *stage.router.faults]:
                print(f"fault: {problem}")
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
