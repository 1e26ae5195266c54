"""sniroute_tunnels: the tunnel programs that sniroute starts, watches and stops.

    router's threads               `lock`, a Condition for each        thread `reaper`
    ----------------               ----------------------------        ---------------
    loop:   lease / release  ----(no lock: see "Leases")---->  idle stop, eviction
    wait-n: wait(key)  ------->  tunnels: key -> Tunnel  <----  spawn, ready?, drain, exit, stop
                                                       Process     |  Popen, pidfd, statm, output, stdin
                                                                   v
                               cloudflared access tcp  :20000            one for each tunnel
                               carrier                 :20001, :20002    one for up to 16

A tunnel is a name (`scheme:argument`) and, most of the time, a local port on which a process
listens for it, its `Child`.  Its life, always one word in `Tunnel.state`:

    QUEUED    -> STARTING  its turn                  -> (absent)  nobody waits for it any more
    STARTING  -> READY     it listens                -> QUEUED    its port was taken, or none is free,
                                                                  or its process died, not for its sake
              -> FAILED    remembered in `failures`, refused from memory: 5 s at first, 300 s at last
    READY     -> STOPPING  idle, evicted, doubted    -> BACKOFF   its process died
    BACKOFF   -> STARTING  it was in use: when `until` has come   -> FAILED  it was not
    STOPPING  -> READY     a lease came first        -> QUEUED    somebody waits   -> FAILED  else

FAILED is the state of a row that is out of `tunnels` already.

Threads.  Everything that can block or that touches a process is done by one thread, `reaper`:
PR_SET_PDEATHSIG follows the *thread* that forked, so the forking thread has to live as long as
the process does.  Threads named `wait-<n>` sleep in `wait()`; the router's loop calls `lease`,
`release`, `words` and `Child.alive`, which never block.  Who looks or steers from outside, an operator,
calls `snapshot`, `failed`, `stop`, `wait` and `wake`, reads `counters` and `started`, and may assign `idle`,
`start_timeout`, `max_tunnels`, `max_starting` and `retiring`, from any thread.

Shared processes.  Where a launcher `carries` several tunnels, its process is told on its stdin, a
line each, what to open and close, and ends with its stdin:

    listen 127.0.0.1:PORT ARGUMENT        close 127.0.0.1:PORT

It answers on its output, in JSON lines whose "listener" is that address and whose "event" is

    listening   it is ready
    closed      the listener and its connections are gone; with an "error", there never was one
    failed      a client could not be served: "client" is its address, "reason" one word, "error" the rest
    paused      (of no listener) it accepts nobody for now, for want of descriptors: it is full, not hung

Other events are nobody's concern here; what names no listener is kept as its last words. A process
that takes no line, or does not answer one in time, hangs: it is killed. Its end is the end of all
that it carries; one that was starting in it beside others that ran is not to blame, and starts anew
in another.

The lock.  `TunnelTable.lock` guards `tunnels`, `failures`, `budget`, `closing`, and a Tunnel's
`state`, `child`, `waiters` and `doubts`; the loop reads three of them without it (see "Leases"), and
a Child's `close_at` and `refusals`, which only the reaper writes.  It is never held across a fork, a
kill or a bind, and while the kernel is asked only in `_doubt`: who lives, and who waits.  The reaper
claims rows under it, works outside, and publishes under it.  Every change of state goes through
`_enter`, which notifies `Tunnel.changed`, a Condition of that lock; those who sleep on it are in `wait()`,
or below it.
One Condition for all of them would wake 32 threads for each change of any tunnel, each to find that it
is not the one: while 500 cold names start, that took a quarter of a core, and the loop waited for it.

Leases.  The loop takes a lease without the lock, and the reaper, or a thread that doubts, may want
to stop the same tunnel at that instant.  Both write first and look second: the loop raises
`leases`, then reads `state`; the other sets `state`, then reads `leases`.  So one of them at least
sees the other, and gives way.  Where both do, the tunnel is ready again, and the loop's client finds
it so in `wait()`, at once.  `leases` has one writer, the loop.

Seams.  Another tunnel program is another `Launcher` row, one process for each tunnel or for
several; the table knows nothing of cloudflared.  Another time policy is a constant below; `clock`
and `jitter` are arguments, and `step()` is one turn of the reaper that a test can make by itself.
This file imports the standard library only and knows nothing of routes or TLS.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import heapq
import json
import logging
import os
import random
import selectors
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Callable, Iterable, Mapping, NamedTuple

log = logging.getLogger("sniroute")

# Limits and times (seconds), each with its reason.
RETRY = 0.1  # after a fault of the reaper: it must not spin
REAPER_NAP = 0.005  # between two turns while names queue: each costs as much as there are tunnels
POLL = 0.01  # between two looks at a starting child: a tenth of what a start takes
POLL_LAST = 0.2  # the same at most, for a child that takes long: a look that finds nobody reads /proc/net, up to 7 ms
STOP_GRACE = 2.0  # between TERM and KILL: cloudflared ends 3 ms after TERM
SELECT_LAST = 3600.0  # one wait of the reaper: epoll takes no more than 24 days
KILL_GRACE = 5.0  # a killed child that is not gone by then hangs in the kernel: we stop waiting
QUARANTINE = 2.0  # a used port rests: a late client of the old tunnel must not meet the new one
TAKEN_REST = 3.0  # a port that somebody else holds is not tried again at once; a predecessor lets go of its own soon
PORT_TRIES = 5  # starts on another port after "address already in use"
FAILURE_FIRST, FAILURE_LAST = 5.0, 300.0  # how long a failed start is refused from memory
FAILURES_KEPT = 1024  # remembered failures, oldest out: names come from strangers
BACKOFF_FIRST, BACKOFF_LAST = 1.0, 60.0  # before a tunnel that died in use is started again
HEALTHY = 60.0  # a tunnel that lived this long starts its back-off from the beginning
DOUBT_FIRST, DOUBT_LAST = 5.0, 300.0  # youngest age at which doubt restarts a process
PAUSED = 30.0  # a shared process that accepts nobody says so every 10 s, and is not hung for so long
HUNG_LOOK, HUNG_LOOKS = 0.02, 10  # a process accepts nobody: the time between looks, and how many agree
EVICT_AGE = 1.0  # a tunnel this fresh is not evicted: its client is on the way
STARTS_BURST, STARTS_REFILL = 8, 1.0  # starts one client address may ask for: burst, per second
BUDGETS_KEPT = 4096  # client addresses with a start budget, least recent out
TAIL = 4096  # bytes kept of a process's output: its last words
DRAIN = 65536  # bytes read from a process's output at a time: what a pipe holds
LINE = 8192  # bytes of one line of a shared process; it says less, and what is longer is cut
CARRIES = 16  # names in one carrier: they share its 20 MB, its one core, and its end
STARTS_KEPT = 1024  # starts remembered for whoever wants to know how long they took
REFUSALS_KEPT = 256  # clients not served, for each tunnel, oldest out: the router asks at once

QUEUED, STARTING, READY = "queued", "starting", "ready"
STOPPING, BACKOFF, FAILED = "stopping", "backoff", "failed"
LIVE = frozenset((STARTING, READY, STOPPING))  # the states that have, or are given, a process


class TunnelError(Exception):
    """A tunnel that cannot be had now.

    `kind` is one word for counters: `failed`, `denied` (Access wants another identity), `unknown` (no
    such name), `timeout`, `limit`, `budget` or `stopping`.
    The message is for people: what happened, and what to do.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Reason(NamedTuple):
    """Why a tunnel could not be had, or a client not be served."""

    kind: str = "failed"  # of a TunnelError: `failed`, `denied` or `unknown`
    text: str = ""  # for people; '' where nothing is known
    final: bool = False  # asked again, it would be the same


def printable(text: str, limit: int = 253) -> str:
    """`text` as one line of printable ASCII, at most `limit` characters: fit for a log."""
    line = "".join(c if " " <= c <= "~" else "?" for c in text[:limit + 1])
    return line if len(line) <= limit else line[:limit - 3] + "..."


def log_event(level: int, what: str, **fields: object) -> None:
    """Log an event: `what` in words that are always the same, and its particulars as fields of the line."""
    log.log(level, what, extra={"fields": fields})


def last_line(tail: bytes) -> tuple[str, dict]:
    """The last line of an output that says something, and its fields where it is JSON."""
    for line in reversed(tail.decode("utf-8", "replace").split("\n")):
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                fields = {}
            return line.strip(), fields if isinstance(fields, dict) else {}
    return "", {}


def last_words(tail: bytes) -> str:
    """The last line of an output that says something, as one printable line.

    A JSON line (cloudflared with TUNNEL_LOG_OUTPUT=json) is reduced to its message and error.
    """
    line, fields = last_line(tail)
    return printable(": ".join(str(fields[key]) for key in ("message", "error") if key in fields) or line, 200)


# What cloudflared's own last line means, and the kind of TunnelError.  Its texts change between
# versions: what is not here is shown as it came.
LOGIN_WANTED = "Access wants a login: give the router a service token"
CLOUDFLARED_REASONS = (
    ("websocket: bad handshake", "failed",
     "the edge refused it: access denied, no such tunnel, or its connector is down"),
    ("failed to verify certificate", "failed", "the edge's certificate is not trusted"),
    ("no such host", "unknown", "the name does not resolve"),
    ("network is unreachable", "failed", "the network is unreachable"),
    ("connection refused", "failed", "the edge refused the connection"),
    ("connection reset by peer", "failed", "the edge reset the connection"),
    ("Leave cloudflared running to download", "denied", LOGIN_WANTED),  # the end of its prompt
    ("If the browser failed to open", "denied", LOGIN_WANTED),  # the same, where it found a browser
    ("Waiting for login", "denied", LOGIN_WANTED),
    ("already waiting for authentication", "denied", LOGIN_WANTED),
    ("address already in use", "failed", "its local port was taken"),
)


def cloudflared_reason(tail: bytes) -> Reason:
    """The reason that cloudflared's last output gives.  Never final: it does not say for which client."""
    words = last_words(tail)
    if "reason" in last_line(tail)[1]:  # --cloudflared names a carrier
        return carrier_reason(tail)._replace(final=False)
    for text, kind, meaning in CLOUDFLARED_REASONS:
        if text in words:
            return Reason(kind, f"{meaning} ({words})")
    return Reason(text=words)


# The reasons of the carrier that are not just (`failed`, not final).
CARRIER_REASONS = {
    "name": ("unknown", True),
    "not_found": ("unknown", True),
    "login": ("denied", True),
    "denied": ("denied", True),
    "certificate": ("failed", True),
}


def carrier_reason(tail: bytes) -> Reason:
    """The reason that the carrier's last line gives."""
    kind, final = CARRIER_REASONS.get(str(last_line(tail)[1].get("reason")), ("failed", False))
    return Reason(kind, last_words(tail), final)


def cloudflared_argv(hostname: str, port: int) -> list[str]:
    """The words behind the program: `hostname` has passed the name rules, so it is no option."""
    return ["access", "tcp", "--hostname", hostname, "--url", f"127.0.0.1:{port}", "--loglevel", "info"]


class Launcher(NamedTuple):
    """One kind of tunnel program, as a row."""

    program: str  # a path, or a name that is looked up on PATH at each start
    argv: Callable[[str, int], list[str]]  # (argument, port) -> the words behind the program, for one tunnel
    environment: Mapping[str, str]  # all that the process gets, but for its private HOME
    reason: Callable[[bytes], Reason]  # the process's last output, or one line, -> the reason
    missing: str  # for people, where it is not there
    script: str = ""  # a file that it runs, which may be missing too
    carries: int = 1  # tunnels in one process; where more, see "Shared processes", ...
    shared: tuple[str, ...] = ()  # ... and these are its words
    trial: Callable[[str], list[str]] | None = None  # argument -> words with which it dials once, and ends

    def is_there(self) -> bool:
        """Whether it can be run now."""
        return shutil.which(self.program) is not None and (not self.script or os.path.isfile(self.script))

    def find(self) -> str:
        """The program's absolute path.  Raises TunnelError where it is not there."""
        path = shutil.which(self.program)
        if path is None or not self.is_there():
            raise TunnelError("failed", self.missing)
        return os.path.abspath(path)


# Who the router is to Access; the last one only the carrier reads.
TUNNEL_IDENTITY = frozenset(("TUNNEL_SERVICE_TOKEN_ID", "TUNNEL_SERVICE_TOKEN_SECRET", "CF_ACCESS_TOKEN"))
# What a tunnel program may inherit: that, the way out, and the trust store.  Any other TUNNEL_*
# variable would silently change it, and without PATH cloudflared finds no browser to open.
TUNNEL_ENVIRONMENT = TUNNEL_IDENTITY | {
    "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR", "TZ", "LANG"}


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """A process's environment, built from nothing."""
    return {**{name: environ[name] for name in TUNNEL_ENVIRONMENT if name in environ}, "TUNNEL_LOG_OUTPUT": "json"}


def cloudflared_launcher(program: str, environ: Mapping[str, str]) -> Launcher:
    """The row for `cloudflared access tcp`."""
    return Launcher(program, cloudflared_argv, inherited(environ), cloudflared_reason,
                    f"{program} is not there: install it, or name it with --cloudflared")


# Imported, so that it is compiled only once; -I and -S keep out what a user or site has installed.
CARRIER_CODE = ("import sys; sys.path.insert(0, sys.argv[1]); sys.argv[:2] = ['sniroute_carrier']; "
                "import sniroute_carrier; sys.exit(sniroute_carrier.main())")


def carrier_launcher(environ: Mapping[str, str]) -> Launcher:
    """The row for sniroute_carrier.py, which takes cloudflared's place."""
    here = os.path.dirname(os.path.abspath(__file__))
    script = os.path.join(here, "sniroute_carrier.py")
    python = "-I", "-S", "-c", CARRIER_CODE, here
    return Launcher(sys.executable, lambda hostname, port: [script, *cloudflared_argv(hostname, port)],
                    inherited(environ), carrier_reason, "sniroute_carrier.py is not beside sniroute.py: copy it there",
                    script, CARRIES, (*python, "forwarders"),
                    lambda hostname: [*python, "access", "tcp", "--hostname", hostname])


PR_SET_PDEATHSIG = 1  # prctl(2)
# Run between fork and exec, in a process of its own: preexec_fn is unsafe beside threads.  Both
# forms ask again who the parent is, since it may have died before prctl took hold.
PYTHON_GUARD = (
    "import ctypes, os, sys\n"
    f"ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGKILL)})\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])\n"
)
SHELL_GUARD = '[ "$PPID" = "$0" ] && exec "$@"'


def death_guard() -> list[str]:
    """Words to put before a child's argv so that the kernel kills it when the router dies.

    util-linux's setpriv takes 3 ms and Python itself 24 ms, so the first is preferred where it
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


# The local addresses in /proc/net/tcp and tcp6 that a connect to 127.0.0.1 reaches: that one, and,
# where nobody listens on it, any.  Each word is printed in the machine's byte order.
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

    Returns {inode: connections that wait to be accepted}.  The kernel, asked, names the one that it would
    choose; /proc has all of them (SO_REUSEPORT).
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
    """The same out of /proc/net.

    proc(5): state 0A is LISTEN, and for such a socket rx_queue is its accept backlog.  The kernel
    lists listeners first, so that reading stops at the first row of another state, however many
    connections there are.
    """
    exact: dict[str, int] = {}
    wild: dict[str, int] = {}  # one for IPv6 only looks the same, and is in nobody's way
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

    Never a connect: each one would make cloudflared open a connection to the edge, a stopped
    process's backlog would take it, and it would not say whose socket answered.
    """
    if not socket_inodes(family(pid)):
        return "nobody"  # and the kernel need not be asked who listens
    found = listeners(port).keys()  # before the inodes: what the child opens after this look is not missed
    if not found:
        return "nobody"
    inodes = socket_inodes(family(pid))
    if not inodes:
        return "nobody"
    return "own" if found <= inodes else "other"


class PortPool:
    """Local ports for the children, lowest free first.  Used by one thread, the reaper.

    A port is tested by a bind with SO_REUSEADDR: without that, TIME_WAIT looks like "in use".
    """

    def __init__(self, first: int, last: int, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.free = list(range(first, last + 1))  # a heap
        self.resting: list[tuple[float, int]] = []  # a heap of (until, port)

    def take(self) -> int | None:
        """A port that nobody holds, or None for now."""
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


class StartBudget:
    """Cold starts that each client address may still ask for: a token bucket, LRU-bounded."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

    def spend(self, client: str | None) -> bool:
        """Whether this client may start one more; None is a client without a budget."""
        if client is None:
            return True
        now = self.clock()
        tokens, then = self.buckets.pop(client, (float(STARTS_BURST), now))
        tokens = min(STARTS_BURST, tokens + (now - then) * STARTS_REFILL)
        allowed = tokens >= 1
        self.buckets[client] = (tokens - allowed, now)
        if len(self.buckets) > BUDGETS_KEPT:
            self.buckets.popitem(last=False)
        return allowed


class Failure(NamedTuple):
    """A start that failed, remembered."""

    until: float
    count: int
    reason: Reason


class Start(NamedTuple):
    """A tunnel that became ready."""

    key: str
    when: float  # wall-clock time
    seconds: float


class View(NamedTuple):
    """A tunnel, or the memory of one that failed, as it is at one moment.  Times are in seconds."""

    key: str
    state: str  # of the Tunnel; FAILED: refused from memory
    leases: int  # connections
    port: int  # 0 without a process
    pid: int
    waiters: int  # threads that wait for it
    age: float  # in this state; 0 for FAILED
    next: float  # until it is started again (BACKOFF), may be (FAILED), or is stopped (READY and unused); else 0
    crashes: int  # deaths in a row; FAILED: starts in a row that failed
    words: str  # FAILED: why; else the last words of its process, or of the one before


class Process:
    """One process of a tunnel program, and what it carries.

    Written by the reaper only, but for `verdict`; a thread that doubts reads it, and `TunnelTable.words`.
    """

    __slots__ = ("launcher", "popen", "pid", "pidfd", "statm", "output", "line", "tail", "said", "paused", "children",
                 "kill_at", "killed", "verdict")

    def __init__(self, launcher: Launcher, popen: subprocess.Popen):
        self.launcher = launcher
        self.popen = popen
        self.pid = popen.pid
        self.pidfd = -1  # without one (macOS, an old kernel) the process is polled
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.pidfd = os.pidfd_open(popen.pid)
        self.output = popen.stdout
        self.line = b""  # shared: the beginning of a line
        self.tail = b""  # the end of what it said; where it is shared, of what concerned no listener
        self.said = 0.0  # when it last said something
        self.paused = -PAUSED  # shared: when it last said that it accepts nobody
        self.children: dict[str, Child] = {}  # by listener
        self.kill_at = 0.0  # when TERM gives way to KILL, and KILL to despair; 0: not being stopped
        self.killed = False
        self.verdict = ""  # why it has to be killed; also written by a thread that doubts
        self.statm = -1  # /proc/PID/statm of this process, whoever has its number later
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

    def has_room(self) -> bool:
        """Whether it can take one more tunnel."""
        return len(self.children) < self.launcher.carries and not self.kill_at and not self.verdict and self.alive()

    def alive(self) -> bool:
        """Whether the process runs, and is not on its way out, asked of the kernel.  Any thread.

        One that ends has no memory any more before its sockets are closed (exit_mm and exit_files in
        the kernel's do_exit), and only then is its parent told: in between, its port is free for
        anybody.  statm is the cheapest file that shows it: asked for each connection.
        """
        try:
            if self.statm >= 0:
                return os.pread(self.statm, 2, 0) != b"0 "
            if self.pidfd >= 0:
                return os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except OSError:
            return False
        return self.popen.returncode is None

    def close(self) -> None:
        """Let go of what was opened to watch it."""
        watched, self.pidfd, self.statm = (self.pidfd, self.statm), -1, -1
        for fd in watched:
            if fd >= 0:
                os.close(fd)

    def signal(self, number: int) -> None:
        """Signal the whole process group.  Only before the process is reaped: its id is its own."""
        # All its members may have ended (macOS says EPERM for zombies).
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def tell(self, words: str) -> None:
        """Write a line to a shared process.  A pipe takes so short a line whole or not at all."""
        try:
            os.write(self.popen.stdin.fileno(), words.encode() + b"\n")
        except OSError as error:  # nobody has read for long, or nobody ever will
            self.verdict = self.verdict or f"it takes no orders ({error.strerror})"


class Child:
    """The place of one tunnel in a process.

    Written by the reaper only, but for `proven`; a thread that doubts reads it, and `TunnelTable.words`.
    """

    __slots__ = ("process", "address", "listener", "started", "look_at", "pause", "ready", "close_at", "verdict",
                 "proven", "refusals")

    def __init__(self, process: Process, port: int, now: float):
        self.process = process
        self.address = ("127.0.0.1", port)
        self.listener = f"127.0.0.1:{port}"
        self.started = now
        # When to look again whether it listens: pace, not policy, so real time.  One that is shared says so.
        self.look_at = float("inf") if process.shared else 0.0
        self.pause = POLL  # until then
        self.ready = 0.0  # when it was found listening
        self.close_at = 0.0  # when it should be gone; 0: not being stopped
        self.verdict = Reason()  # why the reaper stopped it, where that was a failure; then why it ended
        self.proven = False  # the loop: a first byte has come through it
        self.refusals: collections.OrderedDict[str, tuple[float, Reason]] = collections.OrderedDict()  # by client

    @property
    def names_clients(self) -> bool:
        """Whether it says for each client why that was not served."""
        return self.process.shared

    def alive(self) -> bool:
        """Whether the listener is still its own.  Any thread.

        A shared process outlives its listeners: one that has been told to close may have done so
        already, and `close_at` is written first.
        """
        return not self.close_at and self.process.alive()


class Tunnel:
    """One name and, most of the time, the child that serves it."""

    __slots__ = ("key", "changed", "state", "child", "leases", "last_used", "waiters", "since", "until", "idle",
                 "crashes", "failures", "doubts", "tries", "reason")

    def __init__(self, key: str, now: float, lock: threading.RLock):
        self.key = key
        self.changed = threading.Condition(lock)  # notified when `state` changes
        self.state = QUEUED
        self.child: Child | None = None
        self.leases = 0  # written by the loop only
        self.last_used = now  # written by the loop; by the reaper before it is READY
        self.waiters = 0  # threads in wait(), under the lock
        self.since = now  # when this state began
        self.until = 0.0  # BACKOFF: when to start again
        self.idle: float | None = None  # how long it may idle, where not the table's: whoever asked for it last
        self.crashes = 0  # deaths in a row, each within HEALTHY
        self.failures = 0  # starts in a row that failed
        self.doubts = 0  # restarts in a row for want of an answer
        self.tries = 0  # in this start: ports found taken, and processes that died for another's sake
        self.reason = Reason()  # FAILED: why


class TunnelTable:
    """All tunnels, and the thread that runs their processes.

    `launchers` maps a scheme to its row; a key is `scheme:argument`.  Times are in seconds.
    `proc` is whether this system tells who listens (/proc); without it a spawned child counts as
    ready, and the client's own connect, retried, is the test.
    """

    def __init__(self, launchers: Mapping[str, Launcher], ports: tuple[int, int] = (20000, 20100), *,
                 idle: float = 300.0, start_timeout: float = 15.0, max_tunnels: int = 101,
                 max_starting: int = 4, clock: Callable[[], float] = time.monotonic,
                 jitter: Callable[[], float] = random.random, proc: bool = os.path.exists("/proc/self/net/tcp")):
        self.launchers = launchers
        self.idle = idle
        self.start_timeout = start_timeout
        self.max_tunnels = max_tunnels
        self.max_starting = max_starting
        self.clock = clock
        self.jitter = jitter
        self.proc = proc
        self.lock = threading.RLock()  # see "The lock" at the top
        self.crowded = False  # names wait for their turn to start; reaper only
        self.tunnels: dict[str, Tunnel] = {}
        self.failures: collections.OrderedDict[str, Failure] = collections.OrderedDict()
        self.budget = StartBudget(clock)
        self.retiring = False  # we drain: what nobody uses is stopped; written by the main thread
        self.closing = ""  # "" -> "drain" (TERM first) -> "now" (KILL)
        # What follows belongs to the reaper; `words` looks whether a child is among `children`.
        self.pool = PortPool(*ports, clock=clock)
        self.processes: list[Process] = []
        self.children: dict[Child, Tunnel] = {}
        self.counters: collections.Counter[str] = collections.Counter()
        self.started: collections.deque[Start] = collections.deque(maxlen=STARTS_KEPT)
        self.home = ""
        self.guard: list[str] | None = None
        self.selector = selectors.DefaultSelector()
        self.wake_reader, self.wake_writer = os.pipe()
        for end in (self.wake_reader, self.wake_writer):
            os.set_blocking(end, False)
        self.selector.register(self.wake_reader, selectors.EVENT_READ, (self._woken, None))
        self.reaper = threading.Thread(target=self._run, name="reaper", daemon=True)

    # -- main thread ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the reaper."""
        self.reaper.start()

    def close(self, now: bool = False) -> None:
        """Stop every tunnel and wait until no process is left.  A second call may hurry it (`now`)."""
        with self.lock:
            self.closing = "now" if now else self.closing or "drain"
            for tunnel in self.tunnels.values():
                tunnel.changed.notify_all()  # those in wait(): there will be no tunnel
            self.wake()
        if self.reaper.ident is not None:
            self.reaper.join()

    # -- the loop: nothing here blocks ---------------------------------------------------------

    def lease(self, key: str) -> Tunnel | None:
        """A lease on a ready tunnel, or None: then somebody has to `wait`.  See "Leases"."""
        tunnel = self.tunnels.get(key)
        if tunnel is None or tunnel.state is not READY:
            return None
        tunnel.leases += 1
        if tunnel.state is not READY:
            tunnel.leases -= 1
            return None
        return tunnel

    def release(self, tunnel: Tunnel, idle: float | None = None) -> None:
        """Give a lease back.  `idle`: how long it may be unused from now on; None: as long as any."""
        tunnel.last_used = self.clock()
        tunnel.leases -= 1
        if idle != tunnel.idle:
            tunnel.idle = idle
            self.wake()  # it may be due sooner than the reaper thinks

    def wake(self) -> None:
        """Make the reaper look at the table now.  Any thread."""
        with contextlib.suppress(OSError):  # full: it is being woken already; closed: it has ended
            os.write(self.wake_writer, b"\0")

    # -- threads wait-<n> ----------------------------------------------------------------------

    def wait(self, key: str, client: str | None, deadline: float, doubted: Child | None = None,
             idle: float | None = None) -> None:
        """Sleep until the tunnel `key` is ready, having it started if need be.

        `client` is whom a cold start is charged to (None: nobody), `deadline` a clock time, `idle` as for `release`.
        `doubted` is a child that was ready and gave no answer: it is restarted where it is dead,
        hung, or serves nobody else; else it is left alone.  Raises TunnelError.
        """
        with self.lock:
            tunnel = self._demand(key, client)
            if idle is not None:
                tunnel.idle = idle
            tunnel.waiters += 1
            self.wake()
            try:
                if doubted is not None:
                    self._doubt(tunnel, doubted, client)
                while tunnel.state is not READY:
                    if self.closing:
                        raise TunnelError("stopping", "sniroute is stopping")
                    if tunnel.state is FAILED:
                        raise TunnelError(tunnel.reason.kind, tunnel.reason.text)
                    remaining = deadline - self.clock()
                    if remaining <= 0 or tunnel.state is BACKOFF and tunnel.until > deadline:
                        raise TunnelError("timeout", f"{key} was not ready in time (it is {tunnel.state})")
                    tunnel.changed.wait(remaining)
            finally:
                tunnel.waiters -= 1

    def _demand(self, key: str, client: str | None) -> Tunnel:
        """The row for `key`, made where there is none.  Under the lock."""
        if self.closing:
            raise TunnelError("stopping", "sniroute is stopping")
        tunnel = self.tunnels.get(key)
        if tunnel is not None:
            return tunnel
        now = self.clock()
        failure = self.failures.get(key)
        if failure and failure.until > now:
            raise TunnelError(failure.reason.kind, f"{failure.reason.text}; next try in {failure.until - now:.0f} s")
        rows = self.tunnels.values()
        if len(rows) >= self.max_tunnels and not any(t.state is READY and not t.leases or t.state is STOPPING
                                                     for t in rows):
            raise TunnelError("limit", f"all {self.max_tunnels} tunnels are in use: raise --max-tunnels")
        if not self.budget.spend(client):
            raise TunnelError("budget", f"{client} asked for too many cold tunnels: wait a few seconds")
        tunnel = self.tunnels[key] = Tunnel(key, now, self.lock)
        tunnel.failures = failure.count if failure else 0
        return tunnel

    def _doubt(self, tunnel: Tunnel, child: Child, client: str | None) -> None:
        """`child` gave no answer: have it restarted where that may help.  Under the lock.

        That is where its process is hung (with all that it carries), or where nobody uses it and it is so
        old that a fresh start may help.  A client can make a good tunnel look bad, so this costs it a
        start, and a child that has worked has to be older.
        """
        if tunnel.child is not child or tunnel.state is not READY:
            return  # somebody saw to it already
        if not child.alive():  # dead or dying, and the reaper is about to find out
            if tunnel.changed.wait_for(lambda: self.closing or tunnel.child is not child or tunnel.state is not READY,
                                       STOP_GRACE):
                return
        if not self.proc and self.clock() - child.started < self.start_timeout and not child.proven:
            tunnel.changed.wait(5 * POLL)  # perhaps it does not listen yet, and nobody can tell
            return
        if child.proven:
            tunnel.doubts = 0
        age = DOUBT_LAST if child.proven else min(DOUBT_LAST, DOUBT_FIRST * 2 ** min(tunnel.doubts, 16))
        hung = self._hung(tunnel, child)
        if hung or not tunnel.leases and self.clock() - child.ready >= age:
            if tunnel.child is child and tunnel.state is READY and self.budget.spend(client):
                self._enter(tunnel, STOPPING)
                if tunnel.leases and not hung:  # the loop was first: see "Leases"
                    self._enter(tunnel, READY)
                    return
                if hung:
                    child.process.verdict = "it leaves its clients waiting"
                log_event(logging.WARNING, "tunnel gives no answer: it is started again", tunnel=tunnel.key)
                tunnel.doubts += 1

    def _hung(self, tunnel: Tunnel, child: Child) -> bool:
        """Whether the process of `child` leaves its clients in the backlog.  Lets go of the lock meanwhile.

        `child` is the tunnel's.  A busy process has a backlog too, at one look or two, but it gets shorter now and then.
        """
        if not self.proc or self.clock() - child.process.paused < PAUSED:
            return False
        waiting = 0
        for _ in range(HUNG_LOOKS):
            before, waiting = waiting, sum(listeners(child.address[1]).values())
            if waiting < max(before, 1) or tunnel.changed.wait_for(lambda: self.closing, HUNG_LOOK):
                return False
        return True

    # -- any thread ----------------------------------------------------------------------------

    def snapshot(self) -> list[View]:
        """Every tunnel."""
        with self.lock:
            now = self.clock()
            rows = [(t.child, View(t.key, t.state, t.leases, 0, 0, t.waiters, now - t.since, self._next(t, now),
                                   t.crashes, t.reason.text)) for t in self.tunnels.values()]
        views = []
        for child, view in rows:
            if child is not None:
                process = child.process
                said = "" if process.shared else process.launcher.reason(process.tail).text
                view = view._replace(port=child.address[1], pid=process.pid, words=said or view.words)
            views.append(view)
        return views

    def failed(self) -> list[View]:
        """Every start that failed and is refused from memory."""
        with self.lock:
            now = self.clock()
            return [View(key, FAILED, 0, 0, 0, 0, 0.0, failure.until - now, failure.count, failure.reason.text)
                    for key, failure in self.failures.items() if failure.until > now]

    def _next(self, tunnel: Tunnel, now: float) -> float:
        if tunnel.state is BACKOFF:
            return max(0.0, tunnel.until - now)
        if tunnel.state is READY and not tunnel.leases:
            return max(0.0, tunnel.last_used + self._may_idle(tunnel) - now)
        return 0.0

    def stop(self, key: str) -> bool:
        """Stop a tunnel, its connections included, and forget that it failed: an operator wants it.

        The next client starts it again, or one that waits for it now.  Returns whether there was anything
        to stop or forget.
        """
        with self.lock:
            failure, tunnel = self.failures.pop(key, None), self.tunnels.get(key)
            state = tunnel.state if tunnel is not None else None
            if state in (READY, STARTING):
                self._enter(tunnel, STOPPING)
            elif state in (QUEUED, BACKOFF):
                self._remove(tunnel)
        if state is not None and state is not STOPPING:
            log_event(logging.INFO, "tunnel is stopped", tunnel=key, reason="an operator asked for it")
        if failure is not None:
            log_event(logging.INFO, "failed start forgotten", tunnel=key, reason="an operator asked for it")
        return failure is not None or tunnel is not None

    def words(self, child: Child, since: float, port: int) -> Reason:
        """Why the client that connected to a child from `port` after `since` (clock time) was not served.

        Where the program does not say that: why it ended, or what it has said `since` to anybody.
        """
        when, refusal = child.refusals.get(f"127.0.0.1:{port}", (0.0, Reason()))
        if refusal.text and when >= since:  # else it was for a client that had this port before
            return refusal
        if child not in self.children:
            return child.verdict
        process = child.process
        return Reason() if process.shared or process.said < since else process.launcher.reason(process.tail)

    # -- the reaper ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not (self.closing and not self.processes):
            try:
                self.step(None)
                if self.crowded:
                    time.sleep(REAPER_NAP)
            except OSError as error:  # out of descriptors, most likely: what was claimed is retried
                log.error("tunnels: %s", error)
                time.sleep(RETRY)
            except Exception:  # a thread that ended here would take every child with it
                log.exception("a fault in the reaper: please report it")
                time.sleep(RETRY)
        if self.home:
            shutil.rmtree(self.home, ignore_errors=True)
        self.selector.close()
        with self.lock:
            reader, writer = self.wake_reader, self.wake_writer
            self.wake_reader = self.wake_writer = -1
        os.close(reader)
        os.close(writer)

    def step(self, timeout: float | None = 0.0) -> None:
        """One turn: decide, act, look at what happened.  None waits until something is due."""
        now = self.clock()
        spawn, stop = self._decide(now)
        try:
            if spawn is not None:
                self._spawn(spawn, now)
        except BaseException:
            with self.lock:
                if spawn.state is STARTING and spawn.child is None:
                    self._enter(spawn, QUEUED)  # what was claimed is not lost with the fault
            raise
        for tunnel, why in stop:
            self._stop(tunnel.child, why, now)
        for child, tunnel in list(self.children.items()):
            process = child.process
            if process.kill_at:
                continue  # its end is the child's
            if child.close_at and now >= child.close_at:
                process.verdict = process.verdict or f"it did not close {child.listener} within {STOP_GRACE:g} s"
            elif tunnel.state is STARTING and not child.close_at and time.monotonic() >= child.look_at:
                child.pause = min(POLL_LAST, child.pause * 1.1)
                self._look(child, tunnel, now)
                child.look_at = time.monotonic() + child.pause
        for process in list(self.processes):
            if not process.children:  # and nobody has taken the place of the last
                self._end(process, now)
            hurried = process.verdict or process.kill_at and self.closing == "now"
            if process.kill_at and now >= process.kill_at or hurried and not process.killed:
                self._kill(process, now)
        if timeout is None:
            timeout = self._timeout(self.clock())
        for key, _ in self.selector.select(timeout):
            act, process = key.data
            if process is None or process in self.processes:  # an earlier event may have ended it
                act(process)
        for process in [process for process in self.processes if process.pidfd < 0]:
            if process.popen.poll() is not None:
                self._exited(process)

    def _decide(self, now: float) -> tuple[Tunnel | None, list[tuple[Tunnel, str]]]:
        """What is to be started, and what is to be stopped and why ('' is no failure)."""
        spawn: Tunnel | None = None
        stop: list[tuple[Tunnel, str]] = []
        with self.lock:
            for tunnel in list(self.tunnels.values()):
                state = tunnel.state
                if self.closing and state in (QUEUED, BACKOFF) or state is QUEUED and not tunnel.waiters:
                    del self.tunnels[tunnel.key]  # nobody waits for it any more
                elif self.closing and state is not STOPPING:
                    self._enter(tunnel, STOPPING)
                elif state is READY and not tunnel.leases and not tunnel.waiters \
                        and now - tunnel.last_used >= self._may_idle(tunnel):
                    self._retire(tunnel, f"idle for {self._may_idle(tunnel):g} s", "idle_stops")
                elif state is STARTING and tunnel.child and now - tunnel.child.started >= self.start_timeout:
                    stop.append((tunnel, f"it did not listen within {self.start_timeout:g} s"))
                if tunnel.state is STOPPING and tunnel.child:
                    stop.append((tunnel, ""))
            rows = self.tunnels.values()
            due = [t for t in rows if t.state is QUEUED or t.state is BACKOFF and t.until <= now]
            if due and not self.closing and sum(t.state is STARTING for t in rows) < self.max_starting:
                live = sum(t.state in LIVE for t in rows)
                if live >= self.max_tunnels or not (self.pool.free or self.pool.next_free() <= now):
                    stop += self._evict(now)
                else:  # one; the next in the next turn: many that start in one instant stop everything else
                    spawn = min(due, key=lambda t: t.since)
                    self._enter(spawn, STARTING)
            self.crowded = len(due) > 1
        return spawn, stop

    def _evict(self, now: float) -> list[tuple[Tunnel, str]]:
        """Make room for a name that waits: stop the tunnel that has been idle longest."""
        rows = self.tunnels.values()
        if any(t.state is STOPPING for t in rows):
            return []  # room is on its way
        idle = [t for t in rows if t.state is READY and not t.leases and not t.waiters
                and now - t.last_used >= EVICT_AGE]
        for tunnel in sorted(idle, key=lambda t: t.last_used):
            if self._retire(tunnel, "to make room", "evictions"):
                return [(tunnel, "")]
        return []

    def _may_idle(self, tunnel: Tunnel) -> float:
        """Seconds that a tunnel may be unused."""
        if self.retiring:
            return 0.0
        return self.idle if tunnel.idle is None else tunnel.idle

    def _retire(self, tunnel: Tunnel, why: str, counter: str) -> bool:
        """Stop a tunnel that has no lease, unless the loop takes one at this instant."""
        self._enter(tunnel, STOPPING)
        if tunnel.leases:  # the loop was first: see "Leases"
            self._enter(tunnel, READY)
            return False
        self.counters[counter] += 1
        log_event(logging.INFO, "tunnel stopped", tunnel=tunnel.key, reason=why)
        return True

    def _enter(self, tunnel: Tunnel, state: str) -> None:
        """Change a state.  Under the lock; wakes those in wait(), and the reaper: it may have room now."""
        tunnel.state = state
        tunnel.since = self.clock()
        tunnel.changed.notify_all()
        self.wake()

    def _timeout(self, now: float) -> float | None:
        """Seconds until something is due, None for nothing."""
        due = [process.kill_at for process in self.processes if process.kill_at]
        due += [child.close_at for child in self.children if child.close_at and not child.process.kill_at]
        if any(process.pidfd < 0 for process in self.processes):
            due.append(now + 10 * POLL)
        with self.lock:
            rows = list(self.tunnels.values())
        wanted = False
        for tunnel in rows:
            if tunnel.state is STARTING and tunnel.child and not tunnel.child.close_at:
                due += [now + max(0.0, tunnel.child.look_at - time.monotonic()),
                        tunnel.child.started + self.start_timeout]
            elif tunnel.state is READY and not tunnel.leases and not tunnel.waiters:
                due.append(tunnel.last_used + self._may_idle(tunnel))
            elif tunnel.state is READY:
                due.append(now + max(POLL_LAST, self._may_idle(tunnel)))  # releases do not wake the reaper: look again
            elif tunnel.state is BACKOFF and tunnel.until > now:
                due.append(tunnel.until)
            elif tunnel.state in (QUEUED, BACKOFF):
                wanted = True
        if wanted:  # it waits for a port, for its turn, for an eviction, or for its waiters to give up
            due += [now + EVICT_AGE, max(self.pool.next_free(), now + POLL)]
        return min(max(0.0, min(due) - now), SELECT_LAST) if due else None

    def _spawn(self, tunnel: Tunnel, now: float) -> None:
        """Find a port and a process for a tunnel that was claimed (STARTING)."""
        scheme, _, argument = tunnel.key.partition(":")
        launcher = self.launchers[scheme]
        process = next((each for each in self.processes if each.launcher is launcher and each.has_room()), None)
        port = None
        try:
            program = launcher.find() if process is None else ""
            port = self.pool.take()
            if port is None:  # all are in use, or held by others
                with self.lock:
                    self._enter(tunnel, QUEUED)
                return
            if process is None:
                process = self._launch(launcher, [program, *(launcher.shared or launcher.argv(argument, port))])
        except (OSError, TunnelError) as error:
            if port is not None:
                self.pool.give(port)
            self._failed(tunnel, Reason(text=str(error)), remember=False)  # the host's fault, not the name's
            return
        child = Child(process, port, now)
        process.children[child.listener] = child
        self.children[child] = tunnel
        self.counters["starts"] += 1
        with self.lock:
            tunnel.child = child
        if process.shared:
            process.tell(f"listen {child.listener} {argument}")
        log.debug("tunnel %s starts on port %d (pid %d)", tunnel.key, port, process.pid)

    def _launch(self, launcher: Launcher, words: list[str]) -> Process:
        """Start a process.  Raises OSError, and leaves nothing behind then."""
        if self.guard is None:
            self.guard = death_guard()
        if not self._is_home():
            self.home = tempfile.mkdtemp(prefix="sniroute-")  # 0700: a place for its lock files
        popen = subprocess.Popen(
            [*self.guard, *words], stdin=subprocess.PIPE if launcher.shared else subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, cwd="/", process_group=0,
            env={**launcher.environment, "HOME": self.home})
        process = Process(launcher, popen)
        self.processes.append(process)
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
            self._forget(process)
            raise
        self.counters["processes"] += 1
        return process

    def _is_home(self) -> bool:
        """Whether the processes' HOME is still ours: what cleans /tmp may have made room for another."""
        try:
            state = os.lstat(self.home)
        except OSError:
            return False
        return stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid() and not state.st_mode & 0o077

    def _look(self, child: Child, tunnel: Tunnel, now: float) -> None:
        """Whether a starting child listens by now."""
        found = "own"  # it has said so, or nobody can tell
        if self.proc and not child.process.shared:
            found = listens(child.process.pid, child.address[1])
        if found == "other":
            self._stop(child, "address already in use by another process", now)
        if found != "own" or not child.alive():
            return
        with self.lock:
            if tunnel.state is not STARTING:
                return  # an operator stops it
            self.failures.pop(tunnel.key, None)
            child.ready = tunnel.last_used = self.clock()
            tunnel.tries = tunnel.failures = 0
            self._enter(tunnel, READY)
        self.counters["ready"] += 1
        self.started.append(Start(tunnel.key, time.time(), child.ready - child.started))
        log_event(logging.INFO, "tunnel ready", tunnel=tunnel.key, address=child.listener,
                  seconds=round(child.ready - child.started, 3), pid=child.process.pid)

    def _stop(self, child: Child, why: str, now: float) -> None:
        """Ask a child to end: its listener, or its process where nobody else needs that."""
        process = child.process
        asked = child.close_at
        if not asked:
            child.verdict = Reason(text=why)
            child.close_at = now + STOP_GRACE  # before anybody hears of it: see `Child.alive`
        if all(each.close_at for each in process.children.values()):
            self._end(process, now)
        elif why:
            process.verdict = process.verdict or f"{child.listener}: {why}"  # it has not answered `listen`: it hangs
        elif not asked:
            process.tell(f"close {child.listener}")

    def _end(self, process: Process, now: float) -> None:
        """Ask a process to end; KILL comes after a while."""
        if not process.kill_at:
            process.signal(signal.SIGTERM)
            process.kill_at = now + STOP_GRACE

    def _kill(self, process: Process, now: float) -> None:
        """TERM was not enough, or is not to be waited for."""
        if not process.killed:
            process.killed = True
            process.kill_at = now + KILL_GRACE
            process.signal(signal.SIGKILL)
            if process.verdict:
                log_event(logging.WARNING, "process killed", pid=process.pid, reason=process.verdict)
            return
        log.error("process %d does not die: giving it up", process.pid)
        tunnels = [self.children[child] for child in process.children.values()]
        for child in list(process.children.values()):
            self._vacate(child)
        self._forget(process)
        with self.lock:
            for tunnel in tunnels:
                self._remove(tunnel)

    def _woken(self, _: None) -> None:
        os.read(self.wake_reader, 4096)

    def _drain(self, process: Process) -> None:
        """Read a process's output for ever, or it would block; keep its end, and do what it says."""
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
        elif data is not None:  # it closed its output, which is no crime
            self.selector.unregister(process.output)
            process.output.close()

    def _heard(self, process: Process, line: bytes) -> None:
        """One line of a shared process."""
        fields = last_line(line)[1] if b'"event"' in line else {}
        if fields.get("event") == "paused":
            process.paused = self.clock()
        if "listener" not in fields:
            process.tail = (process.tail + line + b"\n")[-TAIL:]
            return
        child = process.children.get(str(fields["listener"]))
        if child is None:  # it was let go meanwhile
            return
        event = fields.get("event")
        if event == "listening":
            child.look_at = 0.0
        elif event == "closed":
            self._closed(child, process.launcher.reason(line))
        elif event == "failed":
            client = str(fields.get("client"))
            child.refusals[client] = (self.clock(), process.launcher.reason(line))
            child.refusals.move_to_end(client)
            if len(child.refusals) > REFUSALS_KEPT:
                child.refusals.popitem(last=False)

    def _vacate(self, child: Child) -> str:
        """Let go of a child, and give its port back.  Returns its tunnel's state."""
        tunnel = self.children.pop(child)
        del child.process.children[child.listener]
        self.pool.give(child.address[1])
        with self.lock:
            state = tunnel.state  # under the lock: a thread in wait() may have begun to doubt it
            tunnel.child = None
            if state is READY:
                self._enter(tunnel, BACKOFF)  # before the numbers of its descriptors can mean another process
        return state

    def _forget(self, process: Process) -> None:
        """Let go of all that a process held.  No tunnel may have a child in it any more."""
        self.processes.remove(process)
        for watched in (process.output, process.pidfd):
            with contextlib.suppress(KeyError, ValueError):  # it is not watched
                self.selector.unregister(watched)
        for pipe in (process.output, process.popen.stdin):
            if pipe is not None:
                pipe.close()
        process.close()

    def _closed(self, child: Child, reason: Reason) -> None:
        """A listener of a shared process is gone, or there never was one."""
        tunnel = self.children[child]
        child.verdict = reason
        self._settle(child, tunnel, self._vacate(child), "address already in use" in reason.text)

    def _exited(self, process: Process) -> None:
        """A process has ended: whatever its code, if nobody asked for it, that is a failure."""
        if not process.output.closed:
            self._drain(process)
        process.signal(signal.SIGKILL)  # what is left of its group; until wait() the id is its own
        code = process.popen.wait()
        ended = f"it ended ({f'signal {-code}' if code < 0 else f'exit {code}'})"
        if process.verdict and code == -signal.SIGKILL:
            ended = f"its process was killed: {process.verdict}"
        reason = process.launcher.reason(process.tail + process.line)
        used = any(child.ready for child in process.children.values())  # then it did not end for one that starts
        ends = []
        for child in list(process.children.values()):
            why = child.verdict.text or ended
            child.verdict = reason._replace(text=f"{why}: {reason.text}" if reason.text else why)
            ends.append((child, self.children[child], self._vacate(child)))
        self._forget(process)
        taken = b"address already in use" in process.tail
        for child, tunnel, state in ends:
            self._settle(child, tunnel, state, used or taken or "address already in use" in child.verdict.text)

    def _settle(self, child: Child, tunnel: Tunnel, state: str, again: bool) -> None:
        """What becomes of a tunnel whose child is gone, and the `state` it had; `again`: it was not its fault."""
        if state is STARTING and again and tunnel.tries < PORT_TRIES and not self.closing:
            log_event(logging.INFO, "tunnel did not start: it is tried again", tunnel=tunnel.key,
                      reason=child.verdict.text)
            with self.lock:
                tunnel.tries += 1
                self._enter(tunnel, QUEUED)
        elif state is STARTING:
            self._failed(tunnel, child.verdict)
        elif state is READY:
            self._crashed(tunnel, child)
        else:
            with self.lock:
                if tunnel.waiters and not self.closing:
                    self._enter(tunnel, QUEUED)
                else:
                    self._remove(tunnel)

    def _failed(self, tunnel: Tunnel, reason: Reason, remember: bool = True) -> None:
        """A start failed: tell those who wait, and `remember` it for a while."""
        tunnel.reason = reason._replace(text=f"{tunnel.key} did not start: {reason.text}")
        self.counters["failures"] += 1
        with self.lock:
            if remember:
                count = tunnel.failures + 1
                wait = min(FAILURE_LAST, FAILURE_FIRST * 2 ** min(tunnel.failures, 16)) * (0.5 + self.jitter() / 2)
                self.failures[tunnel.key] = Failure(self.clock() + wait, count, tunnel.reason)
                self.failures.move_to_end(tunnel.key)
                if len(self.failures) > FAILURES_KEPT:
                    self.failures.popitem(last=False)
            self._remove(tunnel)
        log_event(logging.WARNING, "tunnel did not start", tunnel=tunnel.key, reason=reason.text,
                  **({"next": round(wait)} if remember else {}))

    def _remove(self, tunnel: Tunnel) -> None:
        """Take a row out; whoever still waits on it reads FAILED.  Under the lock."""
        if self.tunnels.get(tunnel.key) is tunnel:  # an operator may have removed it, and a client have come since
            del self.tunnels[tunnel.key]
        if not tunnel.reason.text:
            tunnel.reason = Reason(text=f"{tunnel.key} was stopped")
        self._enter(tunnel, FAILED)

    def _crashed(self, tunnel: Tunnel, child: Child) -> None:
        """A ready child ended by itself: start it again, later and later, if it was in use."""
        self.counters["crashes"] += 1
        if self.clock() - child.ready >= HEALTHY:
            tunnel.crashes = 0
        wait = min(BACKOFF_LAST, BACKOFF_FIRST * 2 ** min(tunnel.crashes, 16)) * self.jitter()
        tunnel.crashes += 1
        with self.lock:
            if tunnel.leases or tunnel.waiters:
                tunnel.until = self.clock() + wait
                fate = f"starting it again in {wait:.1f} s"
            else:
                self._remove(tunnel)
                fate = "the next client starts it again"
        log_event(logging.WARNING, "tunnel ended", tunnel=tunnel.key, reason=child.verdict.text, then=fate)
