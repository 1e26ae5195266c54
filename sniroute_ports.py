"""sniroute_ports: local ports: which of them are free, and who listens on one.

    PortPool     the ports that tunnel programs may have: taken, given back, resting
    is_free      whether a port can be had: a bind tells
    listens      who listens there: the process that should, another one, nobody
    holder       who listens on any address of a port, for people
    listeners, leaves_waiting    the listener's sockets, and whether their clients are left in the backlog

Nothing here connects.  Each connect would make cloudflared open a connection to the edge, the backlog of a stopped
process would take it, and it would not say whose socket answered.

    who listens is asked of        what it tells                                     where
    sock_diag(7)                   the socket, and its backlog                       Linux
    /proc/net/tcp, tcp6            the same, for each listener                       Linux, with /proc
    /proc/PID/fd                   whose socket it is                                Linux, with /proc
    a bind with SO_REUSEADDR       whether somebody listens, and not who             anywhere: see `is_free`

So without /proc (macOS, a chroot) a port on which a stranger listens looks like the tunnel program's own.

Threads: PortPool belongs to the thread `reaper`.  Any thread may call the functions.  No locks.

Seams: I want to ...
    find a listener otherwise       `listens`, on a system without /proc
    let a port rest longer          QUARANTINE, TAKEN_REST

This room imports the standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import socket
import struct
import time
from typing import Callable, Iterable

__version__ = "0.1.0"

# Limits and times (seconds), each with its reason.
QUARANTINE = 2.0  # a used port rests: a late client of the old tunnel must not meet the new one
TAKEN_REST = 3.0  # a port that somebody else holds is not tried again at once; a predecessor soon gives up its own
HUNG_LOOK, HUNG_LOOKS = 0.02, 10  # a process accepts nobody: the time between looks, and how many agree

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
    """The inodes of the sockets that these processes hold.  Raises PermissionError where that is not for us to see."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
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


def listens(pid: int, port: int, proc: bool = True) -> str:
    """Who listens on 127.0.0.1:`port`: `own` (the process or a descendant), `other`, `nobody`.

    Where this system does not tell whose a socket is (`proc` is False, or the process runs as another user), whoever
    listens counts as `own`.  Raises OSError where no descriptor is left to look with.
    """
    if proc:
        with contextlib.suppress(PermissionError):
            return whose(pid, port)
    return "nobody" if is_free(port) else "own"


def whose(pid: int, port: int) -> str:
    """The answer of `listens` as /proc has it."""
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


def holder(port: int) -> str:
    """Who listens on this port, at any address, for people; "" where nobody does, or where this system does not tell.

    It walks through all processes: for a sentence about a failure only.
    """
    inodes: dict[str, str] = {}  # with the user's number
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/self/net/{table}") as file:
            next(file)
            rows = map(str.split, file)
            inodes |= {row[9]: row[7] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    if not inodes:
        return ""
    with contextlib.suppress(OSError):
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if socket_inodes([int(pid)]) & inodes.keys():
                    with open(f"/proc/{pid}/comm", encoding="ascii", errors="replace") as file:
                        name = "".join(c if " " <= c <= "~" else "?" for c in file.read().strip())
                    return f"pid {pid} ({name})" if int(pid) != os.getpid() else "sniroute itself"
    return f"a process of user {min(inodes.values())}"


# -- ports -------------------------------------------------------------------------------------


def is_free(port: int) -> bool:
    """Whether 127.0.0.1:`port` can be had.  Raises OSError where no socket can be made.

    A bind tells, with SO_REUSEADDR: without that, TIME_WAIT looks like "in use".  In Linux it fails where somebody
    listens on this address or on every address.  It fails, too, where a port is bound and nobody listens yet, unless
    both sockets have SO_REUSEADDR, as in Go and in our own programs.  In macOS and the BSDs it fails wherever this very
    address is bound, and does not see who listens on every address.

    A process that binds the port in the same microsecond is not in the way of this bind, nor this bind in its way,
    where both have SO_REUSEADDR.  A process without it may find its port taken, and is tried again on another.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            return False
    return True


class PortPool:
    """Local ports for the children, lowest free first.  Used by the reaper only."""

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
            try:
                if is_free(port):
                    return port
            except OSError:
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
