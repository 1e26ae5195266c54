"""endure_router: the router as a child process, as users run it, and how it stands; for testbed/endure.py.

    Folder          a place for a part: a settings file, the stand-in for cloudflared, TMPDIR; ports that nobody has
    Router          `python3 sniroute.py -c FILE`: its log, its /metrics, its descriptors, threads, children, memory
    Apart           a user and a small disk for a router, where this process may give them
    Baseline        how it stood before a part, and what has to be the same afterwards
    Helper          the backend, or clients, of testbed/endure_streams.py as a child
    Problem         what fails a part

Linux only: it reads /proc.  The standard library only: what it borrows from testbed/ needs no pytest.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import os
import pathlib
import py_compile
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple

from testbed.ports import BLOCK, free_block

TESTBED = pathlib.Path(__file__).resolve().parent
HERE = TESTBED.parent
HOST = "127.0.0.1"
Address = tuple[str, int]

PATIENCE = 60.0  # seconds for what has to come: a busy host is slow, and nothing here measures time
LAST_LINES = 15  # of the log, that are shown where a part breaks off
CACHED = 0.6  # seconds after which the admin makes a new answer
IDLE = 0.5  # seconds: the tunnels' idle time, so that they are gone soon after the load
PIPES_MAX = 32  # of sniroute_flow: so many pipes may be kept for the next sink that is full
# Memory that a part may leave behind.  What is remembered is bounded, and full only after a while: 512 shapes of hellos
# with 3 KB each; 1,024 names, starts and failed starts each; the last refusals.  And what is freed does not all go back
# to the system: one object that lives keeps an arena of the interpreter's (256 KiB; 1 MiB in newer ones), and malloc()
# keeps its heap.  Measured: 5,000 mutated inputs leave 4.7 MiB, 40,000 leave 5.0; 500 faults leave 3 to 5, and each 500
# more 0.5 (with 240 new names and 10,000 streams), up to 7.3 after 2,500.
RESIDENT_MORE = 8.0  # MiB
# And after bulk data: a full sink's bytes are kept in pieces of up to 1 MiB (PENDING_MAX of sniroute_flow allows 4 MiB,
# and one more piece for each reader), and what came to live between them keeps their memory.  Measured: 1 to 9 MiB,
# and no more after six times the bytes.
RESIDENT_MORE_DATA = 12.0  # MiB
FORBIDDEN = ("Traceback", "report it", "ResourceWarning", "Fatal Python")  # words of a fault of ours, in the log


HELD = (  # gauges of what is held for somebody, and of what the router cannot do for now: the same before and after
    "sniroute_connections_active", "sniroute_route_connections_active", "sniroute_paused", "sniroute_draining",
    "sniroute_port_pool_used", "sniroute_tunnels_linked", "sniroute_backend_queue_length", "sniroute_registry_claims",
    "sniroute_registry_store_up",
    *(f'sniroute_tunnels{{state="{state}"' for state in ("queued", "starting", "ready", "stopping", "backoff")))
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


class Problem(Exception):
    """A part has failed.  The message says what was seen."""


def wait_for(predicate: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until `predicate` is true, and return its value.  Raises Problem after so many seconds."""
    deadline = time.monotonic() + patience
    while not (result := predicate()):
        if time.monotonic() > deadline:
            raise Problem(f"not within {patience:g} s: {what}")
        time.sleep(0.01)
    return result


# -- /proc -------------------------------------------------------------------------------------


def children(pid: int) -> set[int]:
    """The children of a process, zombies too; empty where it has ended."""
    found: set[int] = set()
    for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # that thread has ended
            found.update(map(int, file.read_text().split()))
    return found


def descriptors(pid: int) -> list[str]:
    """What the open descriptors of a process are, a text each."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def resident(pid: int) -> float:
    """The resident memory of a process, in MiB."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def running(word: str) -> set[int]:
    """The processes whose command line has this word; zombies have none."""
    found = set()
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in file.read_bytes():
                found.add(int(file.parent.name))
    return found


@contextlib.contextmanager
def taking_orphans() -> Iterator[None]:
    """Whose parent ends meanwhile becomes a child of this process."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Standing(NamedTuple):
    """How a router stands at a moment."""

    descriptors: int  # without the pipes below
    threads: int
    children: int
    resident: float  # MiB
    pipes: int  # that have both ends in it: those that wake a thread, and those that bytes are spliced through


def standing(pid: int) -> Standing:
    """How the process stands."""
    opened = descriptors(pid)
    pipes = sum(count == 2 for name, count in collections.Counter(opened).items() if name.startswith("pipe:"))
    return Standing(len(opened) - 2 * pipes, len(os.listdir(f"/proc/{pid}/task")), len(children(pid)), resident(pid),
                    pipes)


def show(before: Standing, now: Standing) -> str:
    """Both, as they stand in the line of a part."""
    fields = [f"{what} {getattr(before, what)} -> {getattr(now, what)}"
              for what in ("descriptors", "threads", "children")]
    return ", ".join([*fields, f"pipes {before.pipes} -> {now.pipes}",
                      f"MiB {before.resident:.1f} -> {now.resident:.1f}"])


# -- a place -----------------------------------------------------------------------------------

class Folder:
    """A place for one part: files below `path`, and a block of 32 ports.  Used with `with`."""

    def __init__(self) -> None:
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="endure-"))
        self.scratch = self.path / "scratch"  # TMPDIR of the router
        self.scratch.mkdir()
        self.tunnels = self.path / "cloudflared-folder"
        self.tunnels.mkdir()
        self.cloudflared = self.tunnels / "cloudflared"
        self.write_cloudflared(sys.executable, TESTBED)
        self.tables: dict[str, dict[str, Any]] = {"far.json": {}, "faults.json": {}}
        self.reserved = contextlib.ExitStack()
        first, last = self.reserved.enter_context(free_block(BLOCK))
        self.listen: Address = HOST, first
        self.admin: Address = HOST, first + 1
        self.registry: Address = HOST, first + 2  # where a part has one
        self.ports = first + 3, last
        self.settings = self.path / "sniroute.toml"

    def __enter__(self) -> Folder:
        return self

    def write_cloudflared(self, python: str, testbed: pathlib.Path) -> None:
        """The stand-in.  It is a wrapper: importing the compiled file is faster than running the source."""
        self.cloudflared.write_text(f"#!{python} -IS\nimport sys\nsys.path.insert(0, {str(testbed)!r})\n"
                                    "import fake_cloudflared\nsys.exit(fake_cloudflared.main())\n")
        self.cloudflared.chmod(0o700)

    def __exit__(self, *_: object) -> None:
        self.reserved.close()
        for pid in running(str(self.tunnels)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.path, ignore_errors=True)

    def set(self, table: str, hostname: str, value: Any) -> None:
        """Change an entry of far.json or faults.json.  The file is replaced: the stand-in never reads half of one."""
        self.tables[table][hostname] = value
        self.replace(self.tunnels / table, json.dumps(self.tables[table]))

    def replace(self, path: pathlib.Path, text: str) -> None:
        """Write a file in one step."""
        new = path.with_suffix(".new")
        new.write_text(text)
        new.replace(path)

    def write_settings(self, routes: str, *more: str) -> None:
        """Write the file of settings.  `routes` are the lines behind [routes], `more` further keys."""
        lines = [f'listen = ["{HOST}:{self.listen[1]}"]', f'admin = "{HOST}:{self.admin[1]}"',
                 f'ports = "{self.ports[0]}-{self.ports[1]}"', f'idle = "{IDLE:g}s"', 'drain = "60s"', *more]
        self.replace(self.settings, "\n".join([*lines, "[routes]", routes, ""]))

    def homes(self) -> set[str]:
        """The home folders of tunnel programs that are there."""
        return {path.name for path in self.scratch.glob("sniroute-*")}


class Apart:
    """What a router has for itself, where this process may give it that: a user, and a small disk for its TMPDIR.

    A user: a limit of processes binds nobody who is root, and counts all that a user has.  A disk: it can be full.
    """

    DISK = 8 << 20  # bytes

    def __init__(self, folder: Folder):
        self.folder = folder
        self.user = 61000 + os.getpid() % 3000  # nobody's, on any usual host
        self.as_user = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups", "--"]
        self.python, self.home = sys.executable, HERE
        self.is_real = not os.geteuid() and all(map(shutil.which, ("unshare", "setpriv", "prlimit"))) and self._begin()

    def words(self) -> list[str]:
        """What stands before a command line of the router's.  The mounts are gone when the router is."""
        mounts = f'mount -t tmpfs -o size={self.DISK},mode=700,uid={self.user} tmpfs "$0/scratch" && ' \
                 'mount --bind "$1" "$0/python" && mount --bind "$2" "$0/home" && shift 2 && exec "$@"'
        return ["unshare", "--mount", "--propagation=private", "--", "/bin/sh", "-c", mounts, str(self.folder.path),
                sys.base_prefix, str(HERE), *self.as_user]

    def command(self, program: str) -> list[str]:
        """The command line for a file of this project."""
        return [*(self.words() if self.is_real else []), self.python, str(self.home / program)]

    def _begin(self) -> bool:
        """Give the folder to the user.  Whether that user may read all it needs.

        Python, and the checkout, are mounted below the folder: they may be in root's home.
        """
        path = self.folder.path
        for name in ("python", "home"):
            (path / name).mkdir()
        python = path / "python" / os.path.relpath(os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix))
        self.folder.write_cloudflared(str(python), path / "home/testbed")
        with contextlib.suppress(OSError):
            py_compile.compile(str(TESTBED / "fake_cloudflared.py"))  # this user cannot keep what it has compiled
        self._own(self.user)
        look = "import subprocess, sys; sys.path[:0] = sys.argv[1:2]; import sniroute; " \
               "subprocess.run(sys.argv[2:], check=True)"
        if not subprocess.run([*self.words(), str(python), "-c", look, str(path / "home"), str(self.folder.cloudflared),
                               "--version"], capture_output=True).returncode:
            self.python, self.home = str(python), path / "home"
            return True
        self._own(0)
        self.folder.write_cloudflared(sys.executable, TESTBED)
        return False

    def _own(self, user: int) -> None:
        """Give the folder to a user."""
        for path in (self.folder.path, *self.folder.path.rglob("*")):
            os.chown(path, user, user)

    def tasks(self) -> int:
        """How many threads and processes the user has; 1 where it is the user of all this."""
        found = 0
        for task in pathlib.Path("/proc").glob("[0-9]*/task/[0-9]*"):
            with contextlib.suppress(OSError):
                found += task.stat().st_uid == self.user
        return found or 1

    @contextlib.contextmanager
    def limited(self, pid: int, what: str, allowed: int) -> Iterator[None]:
        """The process has this limit for a while; `what` is "nofile", or another word of prlimit(1)."""
        if self.is_real:  # only who has that user may do it, be it root or not
            words = [*self.as_user, "prlimit", f"--pid={pid}"]
            most, = subprocess.run([*words, f"--{what}", "--output=HARD", "--noheadings", "--raw"], check=True,
                                   capture_output=True, text=True).stdout.split()
            subprocess.run([*words, f"--{what}={allowed}:{most}"], check=True)
            try:
                yield
            finally:
                subprocess.run([*words, f"--{what}={most}:{most}"], check=True)
            return
        number = getattr(resource, f"RLIMIT_{what.upper()}")
        limits = resource.prlimit(pid, number)
        resource.prlimit(pid, number, (allowed, limits[1]))
        try:
            yield
        finally:
            resource.prlimit(pid, number, limits)

    @contextlib.contextmanager
    def full(self, pid: int) -> Iterator[None]:
        """The disk is full for the router; without one of its own, none of its files may grow."""
        if not self.is_real:
            with self.limited(pid, "fsize", 0):
                yield
            return
        filler = pathlib.Path(f"/proc/{pid}/root{self.folder.scratch}/filler")
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:  # ENOSPC
                for _ in range(self.DISK // 1024):
                    file.write(bytes(1024))
            yield
        finally:
            filler.unlink()


# -- the router --------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """An environment without what changes Python, sniroute, or measures coverage."""
    kept = {key: value for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "SNIROUTE_", "TUNNEL_", "JOURNAL_", "COVERAGE", "NOTIFY", "LISTEN_"))}
    return {**kept, "PYTHONWARNINGS": "default::ResourceWarning", **more}


class Router:
    """A router that is a process of its own.  A thread reads its log, unless `log_is_read` is cleared."""

    program: list[str] = []  # else than `sniroute.py` of this folder

    def __init__(self, folder: Folder, *options: str, before: tuple[str, ...] = (), python: str = sys.executable,
                 apart: Apart | None = None, **variables: str):
        self.folder = folder
        self.lines: collections.deque[str] = collections.deque(maxlen=1000)
        self.faults: list[str] = []  # lines with a word of FORBIDDEN, and those behind them
        self.seen = collections.Counter()  # how often each word of `watched` came
        self.asked = -CACHED  # when its admin was asked last; nobody else asks it
        self.log_is_read = threading.Event()
        self.log_is_read.set()
        command = [*before, *(self.program or [python, str(HERE / "sniroute.py")]), "-c", str(folder.settings), *options]
        if apart is not None:
            command = [*apart.command("testbed/endure_inside.py"), str(apart.home / "sniroute.py"), "-c",
                       str(folder.settings), *options]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL if apart is None else subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, errors="replace",
                                        env=environment(TMPDIR=str(folder.scratch), **variables))
        self.pid = self.process.pid
        self.reader = threading.Thread(target=self._read, name="log-reader")
        self.reader.start()

    watched = (" listening on ", " admin on ", "tunnel ready", "reload: done", "reload: nothing has changed",
               "counters: ", "lines dropped", "not accepting for now")

    def said(self) -> Iterator[str]:
        """The lines of its log, as they come."""
        yield from self.process.stderr

    def _read(self) -> None:
        for line in self.said():
            self.lines.append(line)
            if any(word in line for word in FORBIDDEN) or 0 < len(self.faults) < 60:
                self.faults.append(line.rstrip())
            for word in self.watched:
                if word in line:
                    self.seen[word] += 1
            self.log_is_read.wait()

    def __enter__(self) -> Router:
        try:
            self.wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, kind: object = None, *_: object) -> None:
        """End it at once, if it has not ended.  Where a part broke off, show what it has logged last."""
        self.log_is_read.set()
        self.process.kill()
        self.process.wait()
        self.reader.join()
        self.process.stderr.close()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        if kind is Problem:
            print("".join(f"    log: {line}" for line in list(self.lines)[-LAST_LINES:]), end="", flush=True)

    def wait_until_up(self) -> None:
        """Wait until it listens, and its admin too."""
        for word in (" listening on ", " admin on "):
            wait_for(lambda: self.seen[word] or self.process.poll() is not None, f"{word!r} in the log")
            if not self.seen[word]:
                raise Problem(f"it ended with {self.process.wait()}: {''.join(self.lines)}")

    def connect(self) -> socket.socket:
        """A client."""
        return socket.create_connection(self.folder.listen)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def order(self, line: str) -> None:
        """Tell endure_inside to do this; only with `apart`."""
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """SIGTERM, and wait for the end.  Returns the exit code."""
        self.log_is_read.set()
        self.process.terminate()
        return self.ended()

    def ended(self) -> int:
        """Wait for its end.  Returns the exit code."""
        try:
            code = self.process.wait(2 * PATIENCE)
        except subprocess.TimeoutExpired:
            raise Problem(f"it does not end: {''.join(self.lines)}") from None
        self.reader.join()
        return code

    def metrics(self, fresh: bool = True) -> dict[str, float]:
        """All samples of /metrics, by their text without the value; `fresh`: none that the admin had already."""
        if fresh:
            time.sleep(max(0.0, self.asked + CACHED - time.monotonic()))
        with socket.create_connection(self.folder.admin, PATIENCE) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = b""
            while data := sock.recv(65536):
                answer += data
        self.asked = time.monotonic()
        body = answer.partition(b"\r\n\r\n")[2].decode()
        rows = (line.rpartition(" ") for line in body.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}

    def is_quiet(self) -> bool:
        """Whether there is no connection and no tunnel."""
        found = self.metrics(fresh=False)
        live = sum(found[f'sniroute_tunnels{{state="{state}"}}'] for state in ("queued", "starting", "ready",
                                                                              "stopping", "backoff"))
        return not found["sniroute_connections_active"] and not live and not children(self.pid)


def bytes_total(found: dict[str, float], direction: str) -> float:
    """The bytes "up" or "down" of the connections that are over, of all routes, in an answer of `Router.metrics`.

    `sniroute_bytes_total` has those of open ones, too, and is a second old.
    """
    return sum(value for name, value in found.items()
               if name.startswith("sniroute_route_bytes_total{") and f'direction="{direction}"' in name)


def ended_total(found: dict[str, float]) -> float:
    """The connections that are over, in an answer of `Router.metrics`."""
    return sum(value for name, value in found.items() if name.startswith("sniroute_connections_total{"))


class Baseline:
    """How a quiet router stood before a part.  `check` waits until it stands like this again.

    `but`: what of HELD may be another then.
    """

    def __init__(self, router: Router, but: tuple[str, ...] = ()):
        router.metrics()  # what `is_quiet` hears is not older
        wait_for(router.is_quiet, "a router without connections and tunnels")
        # What the admin has for an answer is gone a moment later: twice the same is quiet.
        last = [standing(router.pid)]

        def same() -> bool:
            time.sleep(0.3)
            before, last[0] = last[0], standing(router.pid)
            return before[:3] == last[0][:3]

        wait_for(same, "a router that stands still")
        self.before = last[0]
        self.opened = collections.Counter(descriptors(router.pid))
        self.held = {name: value for name, value in router.metrics().items() if name.startswith(HELD)
                     and not name.startswith(but)}

    def check(self, router: Router, problems: list[str], more: float = RESIDENT_MORE) -> Standing:
        """Add to `problems` what is not as it was, and not within a minute.  Returns how it stands now."""
        router.metrics()  # what `is_quiet` hears is not older
        with contextlib.suppress(Problem):
            wait_for(router.is_quiet, "quiet")

        def stands() -> bool:
            now = standing(router.pid)
            return now[:3] == self.before[:3] and now.resident <= self.before.resident + more

        with contextlib.suppress(Problem):
            wait_for(stands, "the baseline")
        now = standing(router.pid)
        for what, was, is_now in zip(Standing._fields[:3], self.before, now):
            if was != is_now:
                problems.append(f"{what}: {was} before, {is_now} now")
        if now.resident > self.before.resident + more:
            problems.append(f"memory: {self.before.resident:.1f} MiB before, {now.resident:.1f} now")
        if now.pipes > self.before.pipes + PIPES_MAX:
            problems.append(f"pipes: {self.before.pipes} before, {now.pipes} now")
        if now.descriptors != self.before.descriptors:
            opened = collections.Counter(descriptors(router.pid)) - self.opened
            problems.append(f"descriptors that are new: {dict(opened)}")
        found = router.metrics()
        accepted, active, over = (found["sniroute_accepted_total"], found["sniroute_connections_active"],
                                  ended_total(found))
        if accepted != active + over:
            problems.append(f"counters: {accepted:g} accepted, {over:g} over, {active:g} open")
        problems += [f"{name}: {was:g} before, {found.get(name)} now" for name, was in self.held.items()
                     if found.get(name) != was]
        return now


# -- helpers -----------------------------------------------------------------------------------


class Helper:
    """A backend or clients in a process of their own.  Used with `with`; leaving the block ends it."""

    module = "endure_streams"  # of testbed/

    def __init__(self, *words: str):
        self.process = subprocess.Popen([sys.executable, "-m", f"testbed.{self.module}", *words], cwd=HERE, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


class Backend(Helper):
    """The backend: `shelves` are the ports of checked streams, `echo` the one that sends everything back."""

    def __init__(self, shelves: int):
        super().__init__("backend", str(shelves))
        *self.shelves, self.echo = json.loads(self.process.stdout.readline())

    def faults(self) -> list[str]:
        """End it, and return what it found to be wrong."""
        self.process.stdin.close()
        said = self.process.stdout.read()
        return said.splitlines()


@contextlib.contextmanager
def clients(count: int, **orders: Any) -> Iterator[list[Helper]]:
    """So many processes of clients, each with a part of the bytes and a seed of its own."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Helper("clients", json.dumps({
            **orders, "bytes": orders["bytes"] // count, "seed": orders["seed"] * 100 + number})))
            for number in range(count)]


def raise_descriptors() -> int:
    """Allow this process as many descriptors as it may have.  Returns how many."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
