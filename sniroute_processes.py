"""sniroute_processes: the child processes of tunnel programs: started, watched, heard, stopped.

    the owner (TunnelTable)                Processes                          the system
    -----------------------                ---------                          ----------
    launch(launcher, ..., words) -------->  Popen behind the death guard  --->  cloudflared access tcp   :20000
    Process.listen(child, hostname) ---->  a line on its stdin           --->  carrier          :20001, :20002
    stop(child, why, now) -------------->  `close` on stdin, or TERM
    tend(now, hurry) ------------------->  TERM, later KILL, for what is due
    turn(timeout) ---------------------->  one wait of the selector:
                                             output  -> Child.look_at, Child.refusals, Process.tail
    owner.closed(child, reason)    <-----            -> a listener is gone
    owner.exited(process, ends)    <-----    pidfd   -> the process has ended

Each program runs without the router's capabilities and environment, in a Home of its own.  Where the router is the
first process of a container, `turn` also reaps what it did not start (`reap_orphans`).

A Process is one running program.  A Child is one local port on which a process listens for one tunnel: a
process has one child, or up to `Launcher.carries`.

The owner keeps the children's ports and tunnels, Processes keeps the processes.  The owner is told of an end
before the process's descriptors are closed: until then `Child.alive`, on any thread, asks about the right
process; afterwards the numbers may belong to another one, so by then no tunnel may lead there.

A process may also be one connection of a client: then a socket (`stream`) is its stdin and stdout, its stderr is what
is heard, and its owner is another one (sniroute_commands).

Shared processes.  A launcher with `shared` words starts one process for several tunnels.  It is told on its
stdin, in lines, what to open and close, and it ends when its stdin ends:

    listen 127.0.0.1:PORT HOSTNAME        close 127.0.0.1:PORT

It answers on its output in JSON lines.  Their "listener" is that address, their "event" is one of

    listening   it is ready
    closed      the listener and its connections are gone; with an "error": it never listened
    failed      a client was not served: "client" is its address, "reason" one word, "error" the rest
    paused      (without "listener") it accepts nobody for now, since it has no descriptors left: full, not hung
    warning     (without "listener") its "message" is for the operator
    linked      the far end has dialled in: "client" is its address, "type" and "tls" say how
    state       how it is with it: "pool" counts the connections that wait for use, "ping" has milliseconds
    unlinked    it has gone; "error" says why

Other events are ignored.  A line without "listener" is kept as part of its last words.  A process that
takes no line, or does not answer one in time, hangs: it is killed.  All that it carried ends with it.

Threads.  Everything in Processes runs on one thread, the owner's `reaper`.  PR_SET_PDEATHSIG
follows the *thread* that forked, so that thread has to live as long as the processes do.  Any thread may
call `Process.alive` and `Child.alive`.  There are no locks here; single attributes that other threads read
or write say so.

Seams: I want to ...
    stop more patiently             STOP_GRACE, KILL_GRACE
    understand another event        `Processes._heard`
    start them in another way       `death_guard` of sniroute_host; `Home` is their HOME

This room imports sniroute_launchers, sniroute_log, WakePipe of sniroute_loop, `death_guard` of sniroute_host,
`printable` of sniroute_names, and the standard library.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import logging
import os
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from typing import Callable, Iterator, NamedTuple, Protocol

from sniroute_host import death_guard
from sniroute_launchers import TAKEN, WORDS_MAX, Launcher, Reason, last_line, last_words
from sniroute_log import log, log_event
from sniroute_loop import WakePipe
from sniroute_names import printable

__version__ = "0.1.0"

# Limits and times (seconds), each with its reason.
POLL = 0.01  # between two looks at a starting child: a tenth of what a start takes
UNWATCHED_POLL = 0.1  # between two looks whether a process has ended, where there is no pidfd
STOP_GRACE = 2.0  # between TERM and KILL: cloudflared ends 3 ms after TERM
KILL_GRACE = 5.0  # a killed process that is not gone by then hangs in the kernel: we stop waiting
PAUSED = 30.0  # a shared process that accepts nobody says so every 10 s, and is not hung for so long
TAIL = 4096  # bytes kept of a process's output: its last words
DRAIN = 65536  # bytes read from a process's output at a time: what a pipe holds
LINE = 8192  # bytes of one line of a shared process; its lines are shorter, and a longer one is cut
NUMBER_MAX = 1e9  # that a program may say: no pool and no ping is larger
REFUSALS_KEPT = 256  # clients not served, for each child, oldest out: the router asks at once
ORPHANS_LOOK = 2.0  # between two looks at processes that nobody waits for, as the first process of a container
ORPHANS_MAX = 256  # reaped in one look: a storm of them must not keep the reaper from its own processes
HOME_TRIES = 3  # folders: another router that starts in the same instant may look at one just then
ENTRIES_MAX = 10_000  # of the folder for temporary files that one look for left homes goes through: some 10 ms

# -- their home --------------------------------------------------------------------------------

HOME_PREFIX = "sniroute-"
HOME_MARK = ".home-of-tunnels"  # a file in each home, with the folder's identity: one without is somebody's own
NO_HOME = "/nonexistent"  # what Debian gives to accounts without one


def places() -> Iterator[str]:
    """Folders in which a home may be made, best first.  systemd empties the first one when the service ends."""
    yield from os.environ.get("RUNTIME_DIRECTORY", "").split(":")[:1]
    with contextlib.suppress(OSError):  # none of those that it knows can be written
        yield tempfile.gettempdir()


class Home:
    """The HOME of all tunnel programs: a private folder, with a place for their lock files.

    The router keeps the folder locked (flock(2)) for as long as it lives, however it ends.  So whoever gets the lock
    of a folder with HOME_MARK in it has found one whose router is gone.  The mark is made under the lock: a folder that
    is not locked yet has none.  systemd-tmpfiles does not clean up a folder that is locked, either.
    """

    def __init__(self) -> None:
        self.path = ""
        self.lock = -1  # the folder's descriptor, locked
        self.complained = False

    def get(self) -> str:
        """The folder, made where there is none; NO_HOME where none can be made, which is logged once."""
        if not is_private(self.path):  # a cleaner of /tmp may have removed it, and another user made it anew
            self.close()
            why = "there is no folder for temporary files"
            for place in filter(None, places()):
                try:
                    self._make(place)
                    break
                except OSError as error:
                    why = f"{place}: {error.strerror}"
            if not self.path and not self.complained:
                self.complained = True
                log.warning("tunnel programs get no home folder (%s): make one that can be written, and name it in "
                            "TMPDIR, if they need one", why)
        return self.path or NO_HOME

    def _make(self, place: str) -> None:
        """Make a folder in `place`, and remove those that killed routers have left there.  Raises OSError."""
        remove_left_homes(place)
        for _ in range(HOME_TRIES):
            path = tempfile.mkdtemp(prefix=HOME_PREFIX, dir=place)  # 0700
            try:
                self.lock = lock_folder(path)
            except BlockingIOError:  # another router looks at it in this instant
                os.rmdir(path)
                continue
            except OSError:
                pass  # a file system without locks: then nobody removes it for us
            with contextlib.suppress(OSError):  # no room for a file: the same
                with open(os.open(os.path.join(path, HOME_MARK), os.O_CREAT | os.O_WRONLY, 0o600), "w") as mark:
                    mark.write(identity_of(path))
            self.path = path
            return
        raise BlockingIOError(errno.EAGAIN, "another process locks each folder")

    def close(self) -> None:
        """Remove the folder."""
        if is_private(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
        if self.lock >= 0:
            os.close(self.lock)
        self.path, self.lock = "", -1


def is_private(path: str) -> bool:
    """Whether this is a folder of ours, and of nobody else."""
    try:
        state = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid() and not state.st_mode & 0o077


def identity_of(path: str) -> str:
    """What tells a folder from a copy of it, which somebody may want to keep.  Raises OSError."""
    state = os.lstat(path)
    return f"{state.st_dev}:{state.st_ino}"


def read_mark(path: str) -> str:
    """What HOME_MARK in a folder says; "" where there is none.  Whatever else has that name, this does not wait."""
    try:
        fd = os.open(os.path.join(path, HOME_MARK), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return ""
    with open(fd, "rb", buffering=0) as mark:
        return (mark.read(64) or b"").decode("ascii", "replace")


def lock_folder(path: str) -> int:
    """Open a folder, never a symlink to one, and lock it.  Raises BlockingIOError where it is locked, and OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def remove_left_homes(place: str) -> None:
    """Remove the homes whose router is gone: ours alone.  The first ENTRIES_MAX files of `place` are looked at."""
    left = []
    with contextlib.suppress(OSError), os.scandir(place) as entries:  # it may not be for us to list
        left += [entry.path for _, entry in zip(range(ENTRIES_MAX), entries) if entry.name.startswith(HOME_PREFIX)]
    for path in filter(is_private, left):
        with contextlib.suppress(OSError):  # it is locked, so its router lives; or it is gone meanwhile
            fd = lock_folder(path)
            if read_mark(path) == identity_of(path):
                shutil.rmtree(path, ignore_errors=True)  # it follows no symlink
            os.close(fd)


# -- orphans -----------------------------------------------------------------------------------


def reap_orphans(own: set[int]) -> None:
    """Reap processes that have ended and that nobody waits for; those of `own` are left to who started them.

    The first process of a container (pid 1, without an init) is given every process whose parent has ended, as those
    that a health check leaves behind.  Not reaped, they stay as zombies until the host has no numbers left.
    """
    with contextlib.suppress(ChildProcessError):  # there is no child at all
        for _ in range(ORPHANS_MAX):
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # looked at, and not reaped yet
            if ended is None or ended.si_pid in own:
                return  # one of our own comes first in the kernel's list: the next look is past it
            os.waitid(os.P_PID, ended.si_pid, os.WEXITED | os.WNOHANG)


# -- processes and their children --------------------------------------------------------------


class Process:
    """One process of a tunnel program, and the children it carries.

    The reaper writes it; a thread that doubts a child reads it, and may write `verdict`.
    """

    __slots__ = ("owner", "launcher", "identified", "popen", "pid", "pidfd", "statm", "output", "line", "tail", "said",
                 "paused", "children", "kill_at", "killed", "verdict")

    def __init__(self, launcher: Launcher, identified: bool, popen: subprocess.Popen, owner: Owner | None = None):
        self.owner = owner  # is told of its end; None: the one of Processes
        self.launcher = launcher
        self.identified = identified  # it has the router's Access token, if there is one
        self.popen = popen
        self.pid = popen.pid
        self.pidfd = -1  # without one (macOS, an old kernel) the process is polled
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.pidfd = os.pidfd_open(popen.pid)
        self.output = popen.stdout or popen.stderr  # its stdout may be a client's connection
        self.line = b""  # shared: a line of which the end has not come yet
        self.tail = b""  # the end of its output; where it is shared, of the lines that named no listener
        self.said = 0.0  # when it last said something
        self.paused = -PAUSED  # shared: when it last said that it accepts nobody
        self.children: dict[str, Child] = {}  # by listener
        self.kill_at = 0.0  # when KILL follows TERM; then, when we give it up; 0: it is not being stopped
        self.killed = False
        self.verdict = ""  # why it has to be killed; a thread that doubts writes it, too
        self.statm = -1  # /proc/PID/statm of this process, even when another process has its number later
        if owner is not None:
            return  # nobody asks whether it holds a port
        try:
            self.statm = os.open(f"/proc/{popen.pid}/statm", os.O_RDONLY)
        except FileNotFoundError:
            pass  # there is no /proc
        except OSError as error:
            self.verdict = f"it cannot be watched ({error.strerror})"

    @property
    def shared(self) -> bool:
        """Whether it carries several tunnels, and is told which."""
        return bool(self.launcher.shared)

    def is_full(self, now: float) -> bool:
        """Whether it has said lately that it accepts nobody for now; `now` is clock time.  Any thread."""
        return now - self.paused < PAUSED

    def has_room(self) -> bool:
        """Whether it can take one more child."""
        return len(self.children) < self.launcher.carries and not self.kill_at and not self.verdict and self.alive()

    def alive(self) -> bool:
        """Whether the process runs and has not begun to exit.  The kernel is asked.  Any thread.

        A process that exits first gives up its memory, then its sockets (exit_mm and exit_files in the
        kernel's do_exit), and only then is its parent told.  In between its port is free for anybody.
        statm shows the first step, and is the cheapest file that does: it is read for each connection.
        """
        try:
            if self.statm >= 0:
                return os.pread(self.statm, 2, 0) != b"0 "
            if self.pidfd >= 0:
                return os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except OSError:
            return False
        return self.popen.returncode is None

    def seat(self, port: int, now: float) -> Child:
        """A new child of this process, for a port that the owner has chosen; `now` is clock time."""
        child = Child(self, port, now)
        self.children[child.listener] = child
        return child

    def listen(self, child: Child, hostname: str) -> None:
        """Tell a shared process to listen for a child.  A process for one tunnel knows that from its command line."""
        if self.shared:
            self.tell(f"listen {child.listener} {hostname}")

    def tell(self, words: str) -> None:
        """Write a line to a shared process.  A pipe takes so short a line whole or not at all."""
        try:
            os.write(self.popen.stdin.fileno(), words.encode() + b"\n")
        except OSError as error:  # it does not read, or it has ended
            self.verdict = self.verdict or f"it takes no orders ({error.strerror})"

    def signal(self, number: int) -> None:
        """Signal the whole process group.  Only before the process is reaped: until then its id is its own."""
        # All members may have ended already (macOS says EPERM for zombies).
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        """Close every descriptor that we hold of it."""
        for pipe in (self.output, self.popen.stdin):
            if pipe is not None:
                pipe.close()
        watched, self.pidfd, self.statm = (self.pidfd, self.statm), -1, -1
        for fd in watched:
            if fd >= 0:
                os.close(fd)


class Link(NamedTuple):
    """The far end of a tunnel whose far end has to dial in, since it did so."""

    client: str  # its address
    kind: str  # how it came, for people
    pool: int = 0  # connections that wait for use
    ping: float = 0.0  # milliseconds


class Child:
    """The port on which a process listens for one tunnel.

    The reaper writes it, except `proven`; the loop and threads that doubt it read it.
    """

    __slots__ = ("process", "address", "listener", "started", "look_at", "pause", "ready", "close_at", "verdict",
                 "proven", "refusals", "link")

    def __init__(self, process: Process, port: int, now: float):
        self.process = process
        self.address = ("127.0.0.1", port)
        self.listener = f"127.0.0.1:{port}"
        self.started = now
        # When to look again whether it listens, in real time instead of `clock`, which tests replace: no decision
        # hangs on it.  A shared process says itself that it listens.
        self.look_at = float("inf") if process.shared else 0.0
        self.pause = POLL  # until the next look
        self.ready = 0.0  # when it was found listening
        self.close_at = 0.0  # when it has to be gone; 0: it is not being stopped
        self.verdict = Reason()  # why the reaper stopped it, where that was a failure; later, why it ended
        self.proven = False  # written by the loop: a first byte has come through it
        self.refusals: collections.OrderedDict[str, tuple[float, Reason]] = collections.OrderedDict()  # by client
        self.link: Link | None = None  # where the far end dials in: while it is there

    @property
    def names_clients(self) -> bool:
        """Whether it says, for each client that was not served, why."""
        return self.process.shared

    def alive(self) -> bool:
        """Whether the listener still belongs to it.  Any thread.

        A shared process outlives its listeners.  One that has been told to close may be closed already, so
        `close_at` is written before the process is told.
        """
        return not self.close_at and self.process.alive()


def number_of(value: object) -> float:
    """A number that a program has said, as text or as it is; 0 for what is none, or too large to be one."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if 0 <= number < NUMBER_MAX else 0.0


# How a child ended, as its owner has to know it.
OWN_FAULT = "own fault"  # it failed by itself
NO_FAULT = "no fault"  # its port was taken, or its process died while it served others
LOST = "lost"  # its process does not die, and is given up

Ends = list[tuple[Child, str]]


class Owner(Protocol):
    """The one that Processes tells of every end.  It gives the child's port back."""

    def closed(self, child: Child, reason: Reason) -> None:
        """A listener of a shared process is gone, or there never was one."""

    def linked(self, child: Child, error: str) -> None:
        """The far end of a child has dialled in, or has gone: see `Child.link`; with an `error`, perhaps."""

    def exited(self, process: Process, ends: Ends) -> None:
        """A process has ended or is given up; `ends` has each child it still had, and OWN_FAULT, NO_FAULT or LOST.

        The process's descriptors are closed after this: no tunnel may lead to these children then.
        """


class Processes:
    """The running processes, and the selector that watches them.  Used by the owner's reaper only.

    `pipe` ends a wait of `turn`; it stays the owner's.  `clock` gives seconds.
    """

    def __init__(self, owner: Owner, pipe: WakePipe, clock: Callable[[], float] = time.monotonic):
        self.owner = owner
        self.pipe = pipe
        self.clock = clock
        self.running: list[Process] = []
        self.guard: list[str] | None = None
        self.home = Home()
        self.orphans_at = clock() if os.getpid() == 1 else float("inf")  # when to look for some (clock time)
        self.selector = selectors.DefaultSelector()
        self.selector.register(pipe.reader, selectors.EVENT_READ, (self._woken, None))

    # -- start ---------------------------------------------------------------------------------

    def with_room(self, launcher: Launcher, identified: bool) -> Process | None:
        """A process of this launcher, as `identified` as this, that can take one more child."""
        return next((process for process in self.running if process.launcher is launcher
                     and process.identified is identified and process.has_room()), None)

    def launch(self, launcher: Launcher, identified: bool, words: list[str], stream: socket.socket | None = None,
               owner: Owner | None = None) -> Process:
        """Start a process; `words` are its program and arguments.  Raises OSError, and leaves nothing behind then.

        `stream` becomes its stdin and stdout, and stays the caller's.  `owner` is told of its end instead of ours.
        """
        if self.guard is None:
            self.guard = death_guard()
        environment = launcher.environment_for(identified)
        if launcher.home and "HOME" not in environment:
            environment["HOME"] = self.home.get()
        # Use this instead of DEVNULL, because Popen opens that first, and leaves it open where there is no pipe to be had.
        with open(os.devnull, "rb") as nothing:
            popen = subprocess.Popen(
                [*self.guard, *words], stdin=stream or (subprocess.PIPE if launcher.shared else nothing),
                stdout=stream or subprocess.PIPE, stderr=subprocess.PIPE if stream else subprocess.STDOUT, bufsize=0,
                cwd="/", process_group=0, env=environment)
        process = Process(launcher, identified, popen, owner)
        self.running.append(process)
        try:
            for pipe in (popen.stdin, process.output):
                if pipe is not None:
                    os.set_blocking(pipe.fileno(), False)
            self.selector.register(process.output, selectors.EVENT_READ, (self._drain, process))
            if process.pidfd >= 0:
                self.selector.register(process.pidfd, selectors.EVENT_READ, (self._exited, process))
        except OSError:  # it cannot be watched
            process.signal(signal.SIGKILL)
            popen.wait()
            self._unwatch(process)
            process.close()
            raise
        return process

    # -- stop ----------------------------------------------------------------------------------

    def stop(self, child: Child, why: str, now: float) -> None:
        """Ask a child to end: its listener, or its process where no other child needs that.

        `why` is '' unless it failed.  May be called again.
        """
        process = child.process
        asked = child.close_at
        if not asked:
            child.verdict = Reason(text=why)
            child.close_at = now + STOP_GRACE  # before the process is told: see `Child.alive`
        if all(each.close_at for each in process.children.values()):
            self._end(process, now)
        elif why:
            process.verdict = process.verdict or f"{child.listener}: {why}"  # it has not answered `listen`: it hangs
        elif not asked:
            process.tell(f"close {child.listener}")

    def tend(self, now: float, hurry: bool) -> None:
        """Stop each process that has no child, kill each that hangs or is late; `hurry`: TERM is not waited for."""
        for process in list(self.running):
            if not process.kill_at:
                for child in process.children.values():
                    if child.close_at and now >= child.close_at:
                        late = f"it did not close {child.listener} within {STOP_GRACE:g} s"
                        process.verdict = process.verdict or late
            if not process.children:  # and no new one has come since the last one went
                self._end(process, now)
            hurried = process.verdict or process.kill_at and hurry
            if process.kill_at and now >= process.kill_at or hurried and not process.killed:
                self._kill(process, now)

    def _end(self, process: Process, now: float) -> None:
        """Ask a process to end; KILL comes after a while."""
        if not process.kill_at:
            process.signal(signal.SIGTERM)
            process.kill_at = now + STOP_GRACE

    def _kill(self, process: Process, now: float) -> None:
        """Kill a process; the second time, give it up."""
        if not process.killed:
            process.killed = True
            process.kill_at = now + KILL_GRACE
            process.signal(signal.SIGKILL)
            if process.verdict:
                log_event(logging.WARNING, "process killed", pid=process.pid, reason=process.verdict)
            return
        log.error("process %d does not die: giving it up", process.pid)
        self._gone(process, [(child, LOST) for child in process.children.values()])

    # -- watch ---------------------------------------------------------------------------------

    def due(self, now: float) -> list[float]:
        """The clock times at which `tend` or `turn` has something to do by itself."""
        times = [process.kill_at for process in self.running if process.kill_at]
        times += [child.close_at for process in self.running if not process.kill_at
                  for child in process.children.values() if child.close_at]
        if any(process.pidfd < 0 for process in self.running):
            times.append(now + UNWATCHED_POLL)
        if self.orphans_at < float("inf"):
            times.append(self.orphans_at)
        return times

    def turn(self, timeout: float | None) -> None:
        """Wait so many seconds at most (None: without end) for an event, and act on all that are there."""
        for key, _ in self.selector.select(timeout):
            act, process = key.data
            if process is None or process in self.running:  # an earlier event may have ended it
                act(process)
        for process in [process for process in self.running if process.pidfd < 0]:
            if process.popen.poll() is not None:
                self._exited(process)
        if self.clock() >= self.orphans_at:
            self.orphans_at = self.clock() + ORPHANS_LOOK
            reap_orphans({process.pid for process in self.running})

    def _woken(self, _: None) -> None:
        self.pipe.clear()

    def _drain(self, process: Process) -> None:
        """Read what a process says, or it would block; keep the end of it, and act on it."""
        try:
            data = process.output.read(DRAIN)
        except OSError:
            data = b""
        if data:
            process.said = self.clock()
            if log.isEnabledFor(logging.DEBUG):
                log.debug("pid %d: %s", process.pid, last_words(data[-TAIL:]))
            if process.shared:
                *lines, rest = (process.line + data).split(b"\n")
                process.line = rest[:LINE]
                for line in lines:
                    self._heard(process, line[:LINE])
            else:
                process.tail = (process.tail + data)[-TAIL:]
        elif data is not None:  # it closed its output, which is no failure
            self.selector.unregister(process.output)
            process.output.close()

    def _heard(self, process: Process, line: bytes) -> None:
        """Act on one line of a shared process."""
        fields = last_line(line)[1] if b'"event"' in line else {}
        if fields.get("event") == "paused":
            process.paused = self.clock()
        elif fields.get("event") == "warning":
            log_event(logging.WARNING, "tunnel program warns", pid=process.pid, text=last_words(line))
            return  # these are not its last words
        if "listener" not in fields:
            process.tail = (process.tail + line + b"\n")[-TAIL:]
            return
        child = process.children.get(str(fields["listener"]))
        if child is None:  # it is gone already
            return
        event = fields.get("event")
        if event == "listening":
            child.look_at = 0.0
        elif event == "closed":
            child.verdict = reason = process.launcher.reason(line)
            del process.children[child.listener]
            self.owner.closed(child, reason)
        elif event == "failed":
            client = str(fields.get("client"))
            child.refusals[client] = (self.clock(), process.launcher.reason(line))
            child.refusals.move_to_end(client)
            if len(child.refusals) > REFUSALS_KEPT:
                child.refusals.popitem(last=False)
        elif event == "linked":
            kind = f"type {printable(str(fields.get('type', '?')), 8)}, tls {printable(str(fields.get('tls', '?')), 8)}"
            child.link = Link(printable(str(fields.get("client", "?")), 64), kind)
            self.owner.linked(child, "")
        elif event == "unlinked" and child.link is not None:
            child.link = None
            self.owner.linked(child, printable(str(fields.get("error", "")), WORDS_MAX))
        elif event == "state" and child.link is not None:
            child.link = child.link._replace(pool=int(number_of(fields.get("pool"))), ping=number_of(fields.get("ping")))

    def _exited(self, process: Process) -> None:
        """A process has ended.  Whatever its code: if nobody asked for it, that is a failure."""
        if not process.output.closed:
            self._drain(process)
        process.signal(signal.SIGKILL)  # for the rest of its group; until wait() the id is its own
        code = process.popen.wait()
        ended = f"it ended ({f'signal {-code}' if code < 0 else f'exit {code}'})"
        if process.verdict and code == -signal.SIGKILL:
            ended = f"its process was killed: {process.verdict}"
        reason = process.launcher.reason(process.tail + process.line)
        children = list(process.children.values())
        # A child that starts beside one that is ready is not to blame, nor is one whose port was taken.
        blameless = any(child.ready for child in children) or TAKEN.encode() in process.tail
        ends = []
        for child in children:
            why = child.verdict.text or ended
            child.verdict = reason._replace(text=f"{why}: {reason.text}" if reason.text else why)
            ends.append((child, NO_FAULT if blameless or TAKEN in child.verdict.text else OWN_FAULT))
        self._gone(process, ends)

    def _gone(self, process: Process, ends: Ends) -> None:
        """Part with a process: first the owner is told, then its descriptors are closed."""
        self._unwatch(process)
        process.children.clear()
        try:
            (process.owner or self.owner).exited(process, ends)
        finally:
            process.close()

    def _unwatch(self, process: Process) -> None:
        """Take a process out of all that `turn` looks at."""
        self.running.remove(process)
        for watched in (process.output, process.pidfd):
            with contextlib.suppress(KeyError, ValueError):  # it is not watched
                self.selector.unregister(watched)

    def close(self) -> None:
        """Remove the processes' HOME and close the selector.  Only once no process runs."""
        self.home.close()
        self.selector.close()
