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

A Process is one running program.  A Child is one local port on which a process listens for one tunnel: a
process has one child, or up to `Launcher.carries`.

The owner keeps the children's ports and tunnels, Processes keeps the processes.  The owner is told of an end
before the process's descriptors are closed: until then `Child.alive`, on any thread, asks about the right
process; afterwards the numbers may belong to another one, so by then no tunnel may lead there.

Shared processes.  A launcher with `shared` words starts one process for several tunnels.  It is told on its
stdin, in lines, what to open and close, and it ends when its stdin ends:

    listen 127.0.0.1:PORT HOSTNAME        close 127.0.0.1:PORT

It answers on its output in JSON lines.  Their "listener" is that address, their "event" is one of

    listening   it is ready
    closed      the listener and its connections are gone; with an "error": it never listened
    failed      a client was not served: "client" is its address, "reason" one word, "error" the rest
    paused      (without "listener") it accepts nobody for now, since it has no descriptors left: full, not hung

Other events are ignored.  A line without "listener" is kept as part of its last words.  A process that
takes no line, or does not answer one in time, hangs: it is killed.  All that it carried ends with it.

Threads.  Everything in Processes and PortPool runs on one thread, the owner's `reaper`.  PR_SET_PDEATHSIG
follows the *thread* that forked, so that thread has to live as long as the processes do.  Any thread may
call `Process.alive`, `Child.alive`, `listeners` and `leaves_waiting`.  There are no locks here; single
attributes that other threads read or write say so.

Seams: I want to ...
    stop more patiently             STOP_GRACE, KILL_GRACE
    understand another event        `Processes._heard`
    find a listener otherwise       `listens`, on a system without /proc

This room imports sniroute_launchers, sniroute_log, WakePipe of sniroute_loop, and the standard library.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import heapq
import logging
import os
import selectors
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from typing import Callable, Iterable, Protocol

from sniroute_launchers import TAKEN, Launcher, Reason, last_line, last_words
from sniroute_log import log, log_event
from sniroute_loop import WakePipe

__version__ = "0.1.0"

# Limits and times (seconds), each with its reason.
POLL = 0.01  # between two looks at a starting child: a tenth of what a start takes
UNWATCHED_POLL = 0.1  # between two looks whether a process has ended, where there is no pidfd
STOP_GRACE = 2.0  # between TERM and KILL: cloudflared ends 3 ms after TERM
KILL_GRACE = 5.0  # a killed process that is not gone by then hangs in the kernel: we stop waiting
QUARANTINE = 2.0  # a used port rests: a late client of the old tunnel must not meet the new one
TAKEN_REST = 3.0  # a port that somebody else holds is not tried again at once; a predecessor soon gives up its own
PAUSED = 30.0  # a shared process that accepts nobody says so every 10 s, and is not hung for so long
HUNG_LOOK, HUNG_LOOKS = 0.02, 10  # a process accepts nobody: the time between looks, and how many agree
TAIL = 4096  # bytes kept of a process's output: its last words
DRAIN = 65536  # bytes read from a process's output at a time: what a pipe holds
LINE = 8192  # bytes of one line of a shared process; its lines are shorter, and a longer one is cut
REFUSALS_KEPT = 256  # clients not served, for each child, oldest out: the router asks at once

# -- the death guard ---------------------------------------------------------------------------

PR_SET_PDEATHSIG = 1  # prctl(2)
# The guard runs between fork and exec, in a process of its own, since preexec_fn is unsafe beside threads.
# Both forms ask again who the parent is: it may have died before prctl took hold.
PYTHON_GUARD = (
    "import ctypes, os, sys\n"
    f"ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])\n"
)
SHELL_GUARD = '[ "$PPID" = "$0" ] && exec "$@"'


def death_guard() -> list[str]:
    """Words to put before a process's argv so that the kernel kills it when the router dies.

    util-linux's setpriv takes 3 ms and Python itself 24 ms, so setpriv is preferred where it
    works (busybox's has no --pdeathsig).  Empty where there is no PR_SET_PDEATHSIG.
    """
    if sys.platform != "linux":
        return []
    setpriv = [shutil.which("setpriv", path="/usr/bin:/bin") or "", "--pdeathsig", "KILL", "--"]
    if setpriv[0] and os.access("/bin/sh", os.X_OK):
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if subprocess.run([*setpriv, "/bin/sh", "-c", ":"], **quiet).returncode == 0:
            return [*setpriv, "/bin/sh", "-c", SHELL_GUARD, str(os.getpid())]
    return [sys.executable, "-I", "-S", "-c", PYTHON_GUARD, str(os.getpid())]


# -- who listens -------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """The process and its descendants (a wrapper script's cloudflared is its child)."""
    pids = [pid]
    for parent in pids:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    pids += map(int, file.read().split())
        except OSError:
            pass  # it has ended meanwhile
    return pids


def socket_inodes(pids: Iterable[int]) -> set[str]:
    """The inodes of the sockets that these processes hold."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):  # it has closed this one meanwhile
                    target = os.readlink(f"/proc/{pid}/fd/{fd}")
                    if target.startswith("socket:["):
                        inodes.add(target[8:-1])
    return inodes


# The local addresses in /proc/net/tcp and tcp6 that a connect to 127.0.0.1 reaches: LOOPBACK, and,
# where nobody listens there, ANY.  Each word is printed in the machine's byte order.
LOOPBACK = frozenset(("0100007F", "7F000001",
                      "0000000000000000FFFF00000100007F", "00000000000000000000FFFF7F000001"))
ANY = frozenset(("00000000", "0" * 32))


# sock_diag(7), <linux/inet_diag.h>: asked for one TCP socket by its addresses, without a cookie.
DIAG_ASK = struct.Struct("=IHHIIBBBBIHH4s12x4s12xIII")
DIAG_TOLD = struct.Struct("=IH10xBBBB48xIIIII")
SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_REQUEST, NO_COOKIE = 4, 20, 1, 0xFFFFFFFF
TCP_LISTEN = 10  # <net/tcp_states.h>


def listeners(port: int) -> dict[str, int]:
    """The sockets that listen where a connect to 127.0.0.1:`port` arrives.

    Returns {inode: connections that wait to be accepted}.  The kernel, when asked, names the one socket
    that it would choose; /proc lists all of them (SO_REUSEPORT).
    """
    try:
        return ask_for_listener(port) or read_listeners(port)  # "none" also means "I cannot tell"
    except OSError:  # a sandbox without AF_NETLINK
        return read_listeners(port)


def ask_for_listener(port: int) -> dict[str, int]:
    """The socket that the kernel itself would choose: 14 us, where its table takes 7 ms for 500 listeners.

    Empty where there is none, or where the kernel has no tcp_diag.  Raises OSError.
    """
    if not hasattr(socket, "AF_NETLINK"):
        return {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, SOCK_DIAG) as kernel:
        kernel.send(DIAG_ASK.pack(DIAG_ASK.size, SOCK_DIAG_BY_FAMILY, NLM_REQUEST, 0, 0,
                                  socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 0,
                                  socket.htons(port), 0, b"\x7f\0\0\1", b"", 0, NO_COOKIE, NO_COOKIE))
        told = kernel.recv(4096, socket.MSG_DONTWAIT)
    if len(told) < DIAG_TOLD.size:
        return {}
    _, kind, _, state, _, _, _, backlog, _, _, inode = DIAG_TOLD.unpack_from(told)
    return {str(inode): backlog} if kind == SOCK_DIAG_BY_FAMILY and state == TCP_LISTEN else {}


def read_listeners(port: int) -> dict[str, int]:
    """The same as `listeners`, read from /proc/net.

    proc(5): state 0A is LISTEN, and for such a socket rx_queue is its accept backlog.  The kernel
    lists listeners first, so that reading stops at the first row of another state, however many
    connections there are.
    """
    exact: dict[str, int] = {}
    wild: dict[str, int] = {}  # on ANY, if IPv6-only too: it counts only where none is exact
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/self/net/{table}") as file:
                next(file)
                for row in file:
                    fields = row.split()
                    if fields[3] != "0A":
                        break
                    address, _, local = fields[1].rpartition(":")
                    if int(local, 16) == port and address in LOOPBACK | ANY:
                        found = exact if address in LOOPBACK else wild
                        found[fields[9]] = int(fields[4].split(":")[1], 16)
        except OSError:
            pass  # a kernel without IPv6, or no descriptor left to look with
    return exact or wild


def listens(pid: int, port: int) -> str:
    """Who listens on 127.0.0.1:`port`: `own` (the process or a descendant), `other`, `nobody`.

    It is looked up, and never tried with a connect: each connect would make cloudflared open a connection to
    the edge, the backlog of a stopped process would take it, and it would not say whose socket answered.
    """
    if not socket_inodes(family(pid)):
        return "nobody"  # and the kernel need not be asked who listens
    found = listeners(port).keys()  # before the inodes: a listener that the process opens after this is not missed
    if not found:
        return "nobody"
    inodes = socket_inodes(family(pid))
    if not inodes:
        return "nobody"
    return "own" if found <= inodes else "other"


def leaves_waiting(port: int, pause: Callable[[float], bool]) -> bool:
    """Whether the process that listens on 127.0.0.1:`port` leaves its clients in the backlog.

    A busy process has a backlog too, at one look or two, but it gets shorter now and then.
    `pause(seconds)` waits between two looks, and says whether to give up looking.
    """
    waiting = 0
    for _ in range(HUNG_LOOKS):
        before, waiting = waiting, sum(listeners(port).values())
        if waiting < max(before, 1) or pause(HUNG_LOOK):
            return False
    return True


# -- ports -------------------------------------------------------------------------------------


class PortPool:
    """Local ports for the children, lowest free first.  Used by the reaper only.

    A port is tested by a bind with SO_REUSEADDR: without that, TIME_WAIT looks like "in use".
    """

    def __init__(self, first: int, last: int, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.free = list(range(first, last + 1))  # a heap
        self.resting: list[tuple[float, int]] = []  # a heap of (until, port)

    def take(self) -> int | None:
        """A port that nobody holds, or None for now.  Raises OSError where no socket can be made."""
        now = self.clock()
        while self.resting and self.resting[0][0] <= now:
            heapq.heappush(self.free, heapq.heappop(self.resting)[1])
        while self.free:
            port = heapq.heappop(self.free)
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                    return port
                except OSError as error:
                    if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                        heapq.heappush(self.free, port)
                        raise
            self.give(port, TAKEN_REST)
        return None

    def give(self, port: int, rest: float = QUARANTINE) -> None:
        """Take a port back; it is not handed out again for `rest` seconds."""
        heapq.heappush(self.resting, (self.clock() + rest, port))

    def next_free(self) -> float:
        """When the next resting port is free again (clock time), or infinity."""
        return self.resting[0][0] if self.resting else float("inf")


# -- processes and their children --------------------------------------------------------------


class Process:
    """One process of a tunnel program, and the children it carries.

    The reaper writes it; a thread that doubts a child reads it, and may write `verdict`.
    """

    __slots__ = ("launcher", "identified", "popen", "pid", "pidfd", "statm", "output", "line", "tail", "said", "paused",
                 "children", "kill_at", "killed", "verdict")

    def __init__(self, launcher: Launcher, identified: bool, popen: subprocess.Popen):
        self.launcher = launcher
        self.identified = identified  # it has the router's Access token, if there is one
        self.popen = popen
        self.pid = popen.pid
        self.pidfd = -1  # without one (macOS, an old kernel) the process is polled
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.pidfd = os.pidfd_open(popen.pid)
        self.output = popen.stdout
        self.line = b""  # shared: a line of which the end has not come yet
        self.tail = b""  # the end of its output; where it is shared, of the lines that named no listener
        self.said = 0.0  # when it last said something
        self.paused = -PAUSED  # shared: when it last said that it accepts nobody
        self.children: dict[str, Child] = {}  # by listener
        self.kill_at = 0.0  # when KILL follows TERM; then, when we give it up; 0: it is not being stopped
        self.killed = False
        self.verdict = ""  # why it has to be killed; a thread that doubts writes it, too
        self.statm = -1  # /proc/PID/statm of this process, even when another process has its number later
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


class Child:
    """The port on which a process listens for one tunnel.

    The reaper writes it, except `proven`; the loop and threads that doubt it read it.
    """

    __slots__ = ("process", "address", "listener", "started", "look_at", "pause", "ready", "close_at", "verdict",
                 "proven", "refusals")

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


# How a child ended, as its owner has to know it.
OWN_FAULT = "own fault"  # it failed by itself
NO_FAULT = "no fault"  # its port was taken, or its process died while it served others
LOST = "lost"  # its process does not die, and is given up

Ends = list[tuple[Child, str]]


class Owner(Protocol):
    """The one that Processes tells of every end.  It gives the child's port back."""

    def closed(self, child: Child, reason: Reason) -> None:
        """A listener of a shared process is gone, or there never was one."""

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
        self.home = ""  # the HOME of all processes: a private folder
        self.selector = selectors.DefaultSelector()
        self.selector.register(pipe.reader, selectors.EVENT_READ, (self._woken, None))

    # -- start ---------------------------------------------------------------------------------

    def with_room(self, launcher: Launcher, identified: bool) -> Process | None:
        """A process of this launcher, as `identified` as this, that can take one more child."""
        return next((process for process in self.running if process.launcher is launcher
                     and process.identified is identified and process.has_room()), None)

    def launch(self, launcher: Launcher, identified: bool, words: list[str]) -> Process:
        """Start a process; `words` are its program and arguments.  Raises OSError, and leaves nothing behind then."""
        if self.guard is None:
            self.guard = death_guard()
        if not self._is_home():
            self.home = tempfile.mkdtemp(prefix="sniroute-")  # 0700: a place for its lock files
        popen = subprocess.Popen(
            [*self.guard, *words], stdin=subprocess.PIPE if launcher.shared else subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, cwd="/", process_group=0,
            env={**launcher.environment_for(identified), "HOME": self.home})
        process = Process(launcher, identified, popen)
        self.running.append(process)
        try:
            for pipe in (popen.stdin, popen.stdout):
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

    def _is_home(self) -> bool:
        """Whether HOME is still ours: a cleaner of /tmp may have removed it, and another user made it anew."""
        try:
            state = os.lstat(self.home)
        except OSError:
            return False
        return stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid() and not state.st_mode & 0o077

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
            self.owner.exited(process, ends)
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
        if self.home:
            shutil.rmtree(self.home, ignore_errors=True)
        self.selector.close()
