"""endure_kills: SIGKILL to the router, with children of all kinds, under a load, with claims; for testbed/endure.py.

    Crowd     small checked streams through every name           (endure_crowd)
    Holders   a stream through every name that stays open        --- router ---> its children, of all KINDS
    Owners    claims that are made, changed and released         (endure_claims)   sqlite or Redis

Half of the kills meet a router whose names are in a sqlite file, half one with a redis-server that keeps all
(appendonly, appendfsync always).  A kill comes at one of three moments, by chance, with a seed: under the load, when
nobody says anything, or while the children start; now and then one of the children is stopped (SIGSTOP) just before.

After each kill:

    children   no descendant of the router runs: this process is given all orphans (PR_SET_CHILD_SUBREAPER), so none can
               hide.  Only what a script of the operator's has started may (OPERATING.md says so): the stand-in `grand`
               is such a script.  It keeps its port, which the next router has to leave alone, until that one serves
    ports      nobody but that one listens on a port of the router's
    restart    the next one serves: a client of `tcp:` at once, then all kinds
    claims     what was acknowledged is there, with its owner, target, generation and lease; what was released is not;
               nobody who asks for a claimed name is refused, not even the first one
    files      the home folder that was left is cleared

The last router of each half ends well, and leaves no file.  No verdict depends on how fast the host is: the line tells
how many ends and restarts took less than a second.
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
import statistics
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from testbed import endure_claims
from testbed.endure_claims import DOMAIN, NEAR, Owners, Registry, end_of
from testbed.endure_crowd import Crowd, stream
from testbed.endure_far import cluster, edge
from testbed.endure_nodepass import TIMES
from testbed.endure_router import (HERE, HOST, Backend, Folder, Problem, Router, children, descriptors, taking_orphans,
                                   wait_for)
from testbed.endure_streams import STALL, Cut, Opening, Refused, Wrong, bounded, hello_for, open_stream, read_pattern
from testbed.ports import free_block, free_port

GONE = 30.0  # seconds within which children have to be gone: a busy host is slow
SOON = 1.0  # what the line counts: a restart that took less
PROCESSES, PROCESSES_SHORT = 20, 11  # children at a kill, at least; at full length, and else one or two of each kind
LISTEN = "0A"  # of /proc/net/tcp
HELD = 3000  # bytes that a stream which stays open has brought
SETTINGS = """idle = "10m"
start_timeout = "60s"
max_starting = 8
"""


# -- what there is -----------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of child: its names, at full length and short, and the target of a name."""

    names: int
    short: int
    target: str  # {name}, {port}: of its backend; {program}, {pipe}, {key}: see `Place`
    serves: bool = True
    faults: dict[str, object] = {}  # switches of the stand-in for cloudflared


KINDS = {
    "tcp": Kind(1, 1, "tcp:127.0.0.1:{port}"),
    "tcp-pg": Kind(1, 1, "tcp:127.0.0.1:{port}"),
    "tunnel": Kind(5, 1, "cloudflared:{name}"),
    "stubborn": Kind(1, 1, "cloudflared:{name}", faults={"ignore_term": True}),
    "grand": Kind(1, 1, "cloudflared:{name}", faults={"child_listens": True}),
    "never": Kind(1, 1, "cloudflared:{name}", False, {"never_listen": True}),
    "fails": Kind(1, 1, "cloudflared:{name}", False, {"exit_after": 200, "words": "it fails"}),
    "command": Kind(4, 1, "command:{program} access tcp --hostname {name} --url {{address}}"),
    "exec": Kind(4, 1, "exec:{pipe} {port}"),
    "carrier": Kind(2, 1, "carrier:{name}"),
    "kubernetes": Kind(2, 1, "kubernetes:default/pod/web:{port}"),
    "jump": Kind(1, 1, "jump:default/pod/web/127.0.0.1:{port}"),
    "login": Kind(1, 1, "kubernetes:default/pod/web:80@login", False),
    "nodepass": Kind(1, 1, "nodepass:{key}@127.0.0.1:{dialled}"),
}


class Name(NamedTuple):
    """A name of the load."""

    kind: str
    name: str
    shelf: int

    @property
    def serves(self) -> bool:
        return self.kind not in KINDS or KINDS[self.kind].serves


def names_of(is_short: bool) -> list[Name]:
    """All names but the claimed ones; each has a shelf of its own."""
    found: list[Name] = []
    for kind, row in KINDS.items():
        for number in range(row.short if is_short else row.names):
            found.append(Name(kind, f"{kind}{number or ''}.example.test", len(found)))
    return found


class Place:
    """All that stands while routers come and go: the far ends, the settings, the names."""

    def __init__(self, folder: Folder, stack: contextlib.ExitStack, is_short: bool):
        self.folder = folder
        self.configured = names_of(is_short)
        shelves = len(self.configured) + 3  # two for claims, one for the claimed server
        self.backend = stack.enter_context(Backend(shelves))
        self.claimed = [Name("claimed", f"kept{at}.{DOMAIN}", len(self.configured) + at) for at in range(2)]
        self.claimed.append(Name("claimed nodepass", f"behind.{DOMAIN}", len(self.configured) + 2))
        self.names = self.configured + self.claimed
        self.registry = HOST, free_port()
        self.dialled = free_port(), free_port()  # the servers: of the settings, of a claim
        self.claimable = stack.enter_context(free_block(2))
        self.pipe = folder.tunnels / "pipe"
        self.write_pipe()
        ports = {each.name: self.backend.shelves[each.shelf] for each in self.names}
        carried = [each.name for each in self.configured if each.kind == "carrier"]
        self.variables = stack.enter_context(edge(folder, carried, [ports[name] for name in carried]))
        pods = {port: port for each in self.configured if each.kind == "kubernetes" for port in [ports[each.name]]}
        self.kubeconfig = stack.enter_context(cluster(folder, pods))
        for each in self.configured:
            folder.set("far.json", each.name, [HOST, ports[each.name]])
            folder.set("faults.json", each.name, KINDS[each.kind].faults)
        behind = next(each for each in self.configured if each.kind == "nodepass")
        for port, key, name in ((self.dialled[0], "key", behind), (self.dialled[1], "other", self.claimed[-1])):
            url = f"client://{key}@{HOST}:{port}/{HOST}:{ports[name.name]}?mode=2&min=2"
            stack.enter_context(ending(subprocess.Popen(
                [sys.executable, str(HERE / "sniroute_nodepass.py"), url], env=os.environ | TIMES,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)))

    def write_pipe(self) -> None:
        """The program of `exec:` targets."""
        self.pipe.write_text(f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(HERE)!r})\n"
                             "import os, select, socket\n" + PIPE)
        self.pipe.chmod(0o700)

    def write_settings(self, store: str) -> None:
        """Write the file of a router with this store."""
        folder, rows = self.folder, []
        for each in self.configured:
            target = KINDS[each.kind].target.format(
                name=each.name, port=self.backend.shelves[each.shelf], program=folder.cloudflared, pipe=self.pipe,
                key="key", dialled=self.dialled[0])
            rows.append(f'"{each.name}" = "{target}"')
        folder.replace(folder.settings, "\n".join([
            f'listen = ["{HOST}:{folder.listen[1]}"]', f'admin = "{HOST}:{folder.admin[1]}"',
            f'ports = "{folder.ports[0]}-{folder.ports[1]}"', f'cloudflared = "{folder.cloudflared}"',
            f'kubeconfig = "{self.kubeconfig}"', SETTINGS, "[routes]", *rows,
            endure_claims.settings(self.registry, store, self.claimable)]))

    def targets(self) -> list[str]:
        """Where claims lead to."""
        return [f"tcp:{HOST}:{self.backend.shelves[each.shelf]}" for each in self.claimed[:2]]

    def keep_claims(self, owners: Owners) -> None:
        """Claim what is kept all the time: two names, a server, a port."""
        for each, target in zip(self.claimed, [*self.targets(), f"nodepass:other@{HOST}:{self.dialled[1]}"]):
            owners.keep({"name": each.name, "target": target})
        owners.keep({"port": self.claimable[0], "target": self.targets()[0]})

    def own_ports(self) -> set[int]:
        """Those on which a router, or a child of it, may listen."""
        folder = self.folder
        return {folder.listen[1], folder.admin[1], self.registry[1], *self.dialled, *self.claimable,
                *range(folder.ports[0], folder.ports[1] + 1)}


@contextlib.contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Kill it behind the block."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def redis(folder: pathlib.Path) -> Iterator[str]:
    """A Redis that forgets nothing.  Yields its URL."""
    port = free_port()
    words = ["redis-server", "--port", str(port), "--bind", HOST, "--dir", str(folder), "--save", "",
             "--appendonly", "yes", "--appendfsync", "always"]
    with ending(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)):
        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), 5) as sock:
                sock.sendall(b"PING\r\n")
                return sock.recv(100).startswith(b"+PONG")
            return False

        wait_for(answers, "redis-server")
        yield f"redis://{HOST}:{port}"


# The program of `exec:` targets: its stdin and stdout are a connection to a port.
PIPE = """
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as far:
    ways = {0: far.fileno(), far.fileno(): 1}
    while True:
        for fd in select.select(list(ways), [], [])[0]:
            data = os.read(fd, 65536)
            if not data and fd:
                sys.exit()
            if not data:
                del ways[0]
                far.shutdown(socket.SHUT_WR)
            while data:
                data = data[os.write(ways[fd], data):]
"""


# -- processes ---------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A process, for good: numbers are used again."""

    pid: int
    started: int  # field 22 of /proc/PID/stat

    @classmethod
    def of(cls, pid: int) -> Seen | None:
        fields = stat_of(pid)
        return None if fields is None else cls(pid, int(fields[19]))

    def runs(self) -> bool:
        """Whether it is there, and no zombie."""
        fields = stat_of(self.pid)
        return fields is not None and int(fields[19]) == self.started and fields[0] not in "ZX"

    def words(self) -> str:
        """Its command line."""
        with contextlib.suppress(OSError):
            return pathlib.Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return ""


def stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name: the state is the first one."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return None


def descendants(pid: int) -> set[Seen]:
    """All that a process has started, and what those have."""
    found: set[Seen] = set()
    for child in children(pid):
        seen = Seen.of(child)
        if seen is not None:
            found |= {seen} | descendants(child)
    return found


def is_of_a_script(seen: Seen) -> bool:
    """Whether this is what the script `grand` has started, which nobody ends with the router."""
    return "--hostname grand" in seen.words()


def bury(pids: set[int]) -> None:
    """Take the exit codes of orphans that have ended."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def listening(ports: set[int]) -> dict[str, int]:
    """Who listens on one of these ports: {the socket's inode: port}."""
    found = {}
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                port = int(words[1].rpartition(":")[2], 16)
                if words[3] == LISTEN and port in ports:
                    found[words[9]] = port
    return found


# -- the load that stays -----------------------------------------------------------------------


class Holders:
    """A client of each name that stays: what it gets is checked, then it waits for the end, and comes again.

    Those of a kind that does not serve wait to be served.
    """

    def __init__(self, folder: Folder, names: Sequence[Name], seed: str, may_be_refused: Callable[[str], bool]):
        self.folder = folder
        self.may_be_refused = may_be_refused
        self.stopping = threading.Event()
        self.going = threading.Event()  # cleared: they leave, but for those that keep a process
        self.going.set()
        self.lock = threading.Lock()  # guards what follows
        self.sockets: dict[str, socket.socket] = {}
        self.held: set[str] = set()  # names that serve, and do so now
        self.problems: list[str] = []
        self.threads = [threading.Thread(target=self.come_again, args=(each, random.Random(f"{seed} {each.name}")),
                                         name="holder") for each in names]

    def __enter__(self) -> Holders:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def come_again(self, who: Name, rng: random.Random) -> None:
        """A thread's clients."""
        while not self.stopping.is_set():
            try:
                self.come(who, rng)
            except Wrong as error:
                if not (isinstance(error, Refused) and self.may_be_refused(who.name)):
                    with self.lock:
                        self.problems.append(f"who stays at {who.name}: {error}")
            except (Cut, OSError):
                pass  # the router was killed
            finally:
                with self.lock:
                    self.held.discard(who.name)
                    self.sockets.pop(who.name, None)
            self.stopping.wait(0.05)
            if who.kind != "exec":  # its process is one of a connection
                self.going.wait()

    def come(self, who: Name, rng: random.Random) -> None:
        """One client."""
        with socket.create_connection(self.folder.listen) as sock:
            bounded(sock)
            with self.lock:
                self.sockets[who.name] = sock
            opening = Opening(manner=STALL, shelf=who.shelf, seed=rng.randrange(1 << 32), cut=HELD, size_down=HELD)
            open_stream(sock, hello_for(who.name, rng), opening)
            if who.serves:
                read_pattern(sock, 0, HELD, False)
                with self.lock:
                    self.held.add(who.name)
            while not self.stopping.is_set() and (self.going.is_set() or who.kind == "exec"):
                with contextlib.suppress(BlockingIOError):  # SO_RCVTIMEO
                    if not sock.recv(1):
                        return

    def leave(self, all_of_them: bool) -> None:
        """Have them leave: all, or those that keep no process."""
        with self.lock:
            for name, sock in self.sockets.items():
                if all_of_them or not name.startswith("exec"):
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

    def rest(self) -> None:
        """Nobody says anything from now on."""
        self.going.clear()
        self.leave(False)

    def stop(self) -> None:
        """End, and wait for it.  A second call does nothing."""
        self.stopping.set()
        self.going.set()
        for thread in self.threads:
            while thread.is_alive():  # one may just come
                self.leave(True)
                thread.join(0.05)


# -- a half ------------------------------------------------------------------------------------


class Figures:
    """What a half, or all of it, has seen."""

    def __init__(self) -> None:
        self.processes: list[int] = []  # at each kill
        self.gone: list[float] = []  # seconds from the kill until no child ran
        self.up: list[float] = []  # seconds from the start of a router to the end of the first client
        self.moments: collections.Counter[str] = collections.Counter()
        self.streams = self.claims = self.checked = self.open = self.cleared = self.survivors = 0
        self.problems: list[str] = []


class Half:
    """A store, and so many kills."""

    def __init__(self, figures: Figures, place: Place, is_short: bool, seed: str):
        self.figures = figures
        self.problems = figures.problems
        self.place = place
        self.folder = place.folder
        self.rng = random.Random(f"{seed} kills")
        self.least = PROCESSES_SHORT if is_short else PROCESSES
        serving = [each for each in place.names if each.serves]
        self.serving = {each.name for each in serving}
        self.crowd = Crowd(self.folder, [each.name for each in serving], seed, 4,
                           [each.shelf for each in serving], 0.02)
        self.holders = Holders(self.folder, place.names, seed, self.may_be_refused)
        self.crowd.may_be_refused = self.may_be_refused
        self.owners = Owners(Registry(place.registry), place.targets(), seed)
        self.own: set[int] = set()  # processes that are no orphans
        self.survivors: set[Seen] = set()  # of the script
        self.left: set[str] = set()  # home folders of killed routers
        self.router: Router | None = None

    def run(self, kills: int, last: str) -> None:
        """Kill so many routers; then one ends well, in the moment `last`."""
        self.own = children(os.getpid())
        with contextlib.ExitStack() as stack:
            self.start(stack)
            self.place.keep_claims(self.owners)
            stack.callback(self.end_survivors)
            for each in (self.crowd, self.holders, self.owners):
                stack.enter_context(each)
            self.owners.resume()
            for number in range(kills):
                moment = self.rng.choice(("load", "load", "load", "calm", "start")) if number else "load"
                self.figures.moments[moment] += 1
                self.wait_for(moment)
                self.kill()
                self.start(stack)
                self.claims_are_as_they_were()
            self.wait_for(last)
            self.crowd.stop()
            self.owners.stop()
            self.holders.stop()
            self.end_well()
        self.figures.streams += self.crowd.served
        self.figures.claims += self.owners.acknowledged
        self.figures.checked += self.owners.checked
        self.figures.open += self.owners.open
        for each in (self.crowd, self.holders, self.owners):
            self.problems += each.problems

    def may_be_refused(self, name: str) -> bool:
        """Whether it is no fault that a client of this name is refused.

        A NodePass client that takes seconds to dial in again, or a store that takes seconds to tell what is claimed: a
        busy host is slow.
        """
        if name.startswith("nodepass") or name == self.place.claimed[-1].name:
            return True
        return name.endswith(DOMAIN) and any("the store has not told" in line for line in list(self.router.lines))

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start a router, and measure when it serves."""
        began = time.monotonic()
        router = Router(self.folder, **self.place.variables)
        stack.callback(router.__exit__)
        rng = random.Random(self.rng.random())
        former, self.router = self.router, router
        self.own.add(router.pid)
        if former is not None:
            self.own.discard(former.pid)

        def serves() -> bool:
            if router.process.poll() is not None:
                raise Problem(f"it ended with {router.process.wait()}: {''.join(router.lines)}")
            with contextlib.suppress(OSError, Cut):
                stream(self.folder, "tcp.example.test", 0, rng, 1000)
                return True
            return False

        wait_for(serves, "a router that serves `tcp:`")
        if former is not None:
            self.figures.up.append(time.monotonic() - began)
        router.wait_until_up()

    def wait_for(self, moment: str) -> None:
        """Wait until the router is as it has to be when it is killed."""
        self.crowd.going.set()
        self.holders.going.set()
        pid = self.router.pid
        if moment == "start":
            goal = self.rng.randrange(1, self.least)
            wait_for(lambda: len(descendants(pid)) >= goal, f"{goal} children")
            return
        wait_for(lambda: self.serving <= self.holders.held, "clients of each kind that stay")
        before = self.served_by_kind()
        wait_for(lambda: all(number > before[kind] for kind, number in self.served_by_kind().items()),
                 "clients of each kind that are served")
        self.end_survivors()
        wait_for(lambda: len(descendants(pid)) >= self.least, f"{self.least} children")
        goal = self.owners.acknowledged + 10
        wait_for(lambda: self.owners.acknowledged >= goal or self.owners.problems, "claims")
        wait_for(lambda: not self.left & self.folder.homes(), f"the end of {self.left}, which killed routers have left")
        self.figures.cleared += len(self.left)
        self.left.clear()
        if moment == "calm":
            self.crowd.going.clear()
            self.holders.rest()
            wait_for(lambda: all(name.startswith("exec") for name in self.holders.held), "clients that leave")
        time.sleep(self.rng.uniform(0, 0.1))

    def served_by_kind(self) -> dict[str, int]:
        """How many clients of each kind have been served so far."""
        kinds = dict.fromkeys((each.kind for each in self.place.names if each.serves), 0)
        for each in self.place.names:
            if each.serves:
                kinds[each.kind] += self.crowd.by_name[each.name]
        return kinds

    def kill(self) -> None:
        """Kill the router, and look at what is left."""
        noted = descendants(self.router.pid)
        self.figures.processes.append(len(noted))
        if self.rng.random() < 0.3:
            self.stop_one()
        self.owners.hold()
        self.router.process.kill()
        self.router.process.wait()
        began = time.monotonic()
        self.left |= self.folder.homes()

        def left() -> set[Seen]:
            orphans = children(os.getpid()) - self.own
            bury(orphans)
            found = noted | {seen for seen in map(Seen.of, orphans) if seen is not None}
            found |= {each for seen in found for each in descendants(seen.pid)}
            return {seen for seen in found if seen.runs()}

        def strangers() -> set[Seen]:
            return {seen for seen in left() if not is_of_a_script(seen)}

        with contextlib.suppress(Problem):
            wait_for(lambda: not strangers(), "the end of all children", GONE)
        self.figures.gone.append(time.monotonic() - began)
        for seen in strangers():
            self.problems.append(f"it outlives its router: {seen.words()}")
            os.kill(seen.pid, signal.SIGKILL)
        self.survivors |= left()
        self.figures.survivors += len(self.survivors)
        allowed = {path.strip("socket:[]") for seen in self.survivors for path in self.descriptors_of(seen)}

        def kept() -> list[int]:
            return [port for inode, port in listening(self.place.own_ports()).items() if inode not in allowed]

        with contextlib.suppress(Problem):
            wait_for(lambda: not kept(), "the end of all listeners", GONE)
        if ports := kept():
            self.problems.append(f"ports of a killed router that are still listened on: {ports}")
        if self.router.faults:
            self.problems.append("the log: " + "\n      ".join(self.router.faults))
        self.owners.wait_until_parked()

    def stop_one(self) -> None:
        """Stop a child.  Not one that begins: it looks itself whether its parent is there, once it goes on."""
        stoppable = [seen for seen in map(Seen.of, sorted(children(self.router.pid)))
                     if seen is not None and not any(word in seen.words() for word in ("pdeathsig", "sniroute.py"))]
        if stoppable:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.rng.choice(stoppable).pid, signal.SIGSTOP)

    def descriptors_of(self, seen: Seen) -> list[str]:
        """What a process has open; nothing where it has just ended."""
        with contextlib.suppress(OSError):
            return descriptors(seen.pid)
        return []

    def claims_are_as_they_were(self) -> None:
        """Hold the table against what was acknowledged, and come through some of the names; then all go on."""
        found = self.owners.check()
        shelves = {target: each.shelf for target, each in zip(self.place.targets(), self.place.claimed)}
        rows = [row for row in found.values() if row["target"] in shelves and not row["name"].startswith("tcp:")]
        for row in self.rng.sample(sorted(rows, key=lambda row: row["name"]), min(3, len(rows))):
            self.come_through(row, shelves[row["target"]])
        self.owners.resume()
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.place.claimable[0])):
            return
        self.problems.append("the claimed port is not open again")

    def come_through(self, row: Mapping[str, Any], shelf: int) -> None:
        """A client of a claimed name; it may be refused where the claim has just ended."""
        try:
            stream(self.folder, row["name"], shelf, random.Random(self.rng.random()), 1000)
        except (Wrong, Cut, OSError) as error:
            if not isinstance(error, Refused) or time.time() < end_of(row) - NEAR:
                self.problems.append(f"a client of a claimed name: {type(error).__name__} {error}: {row}")

    def end_survivors(self) -> None:
        """End what the script has left."""
        for seen in self.survivors:
            if seen.runs():
                os.kill(seen.pid, signal.SIGKILL)
        bury({seen.pid for seen in self.survivors})
        self.survivors.clear()

    def end_well(self) -> None:
        """End the last router, and look at what it leaves."""
        noted = descendants(self.router.pid)
        if (code := self.router.end()) != 0:
            self.problems.append(f"the last one ended with {code}")
        self.problems += [f"it outlives its router, which ended well: {seen.words()}" for seen in noted if seen.runs()]
        bury(children(os.getpid()) - self.own)
        if self.router.faults:
            self.problems.append("the log: " + "\n      ".join(self.router.faults))
        if left := sorted(path.name for path in self.folder.scratch.iterdir()):
            self.problems.append(f"files that are left: {left}")


def within_soon(times: list[float]) -> str:
    """Times in seconds, in words."""
    return f"after {1000 * statistics.median(times):.0f} ms (median; at most {1000 * max(times):.0f}; " \
           f"{sum(each <= SOON for each in times)} of {len(times)} within a second)"


def run(kills: int, is_short: bool, seed: int) -> tuple[str, list[str]]:
    """All of it: words, and problems."""
    figures = Figures()
    halves = {"sqlite": kills - kills // 2, "Redis": kills // 2}
    if not halves["Redis"] or not shutil.which("redis-server"):
        halves = {"sqlite": kills}
    with taking_orphans():
        with Folder() as folder, contextlib.ExitStack() as stack:
            place = Place(folder, stack, is_short)
            for store, number in halves.items():
                with contextlib.ExitStack() as stores:
                    sqlite = f"sqlite:{folder.path}/names.db"
                    place.write_settings(sqlite if store == "sqlite" else stores.enter_context(redis(folder.path)))
                    # All children again: that takes seconds.
                    last = "start" if is_short and len(halves) > 1 and store == "sqlite" else "load"
                    Half(figures, place, is_short, f"{seed} {store}").run(number, last)
            figures.problems += place.backend.faults()
    without = "" if shutil.which("redis-server") else ", since redis-server is not here (Debian package redis-server)"
    moments = ", ".join(f"{number} {words}" for words, number in
                        (("under load", figures.moments["load"]), ("in a calm", figures.moments["calm"]),
                         ("at the start", figures.moments["start"])) if number)
    kept = " and ".join(f"{number} with {store}" for store, number in halves.items())
    up, gone = figures.up, figures.gone
    words = f"{kills} kills ({moments}; {kept}{without}), {sum(figures.processes):,} processes ended, " \
            f"{statistics.median(figures.processes):g} at a time, {within_soon(gone)}; served again " \
            f"{within_soon(up)}; " \
            f"{figures.streams:,} streams served; {figures.claims:,} changes of claims acknowledged, " \
            f"{figures.checked:,} claims found as they were, {figures.open:,} times it was open; " \
            f"{figures.cleared} home folders cleared"
    return words, figures.problems
