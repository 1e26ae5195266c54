"""sniroute_systemd: what systemd is told, and the sockets that it holds for us.

    NOTIFY_SOCKET, WATCHDOG_USEC     Supervisor: ready, reloading, stopping, alive (sd_notify(3))
    LISTEN_FDS, LISTEN_FDNAMES       activated_sockets: where there is a sniroute.socket (sd_listen_fds(3))

Threads: main; `Supervisor.beat` runs in the loop.  Any thread may call `tell`: a message is one datagram.

Seams: I want to ...
    tell systemd something else      Supervisor.ready for what changes with a reload, Supervisor.beat for what recurs

It imports the router, listeners, the loop, names and refusals.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket

from sniroute_listeners import Held
from sniroute_loop import NEVER
from sniroute_names import printable
from sniroute_refusals import SettingsError
from sniroute_router import DRAINING, LAMEDUCK, Router

__version__ = "0.1.0"

log = logging.getLogger("sniroute")

# Times in seconds.
STATUS_EVERY = 10.0  # between two status messages to systemd; a short WatchdogSec makes them more frequent
STOP_TIME = 20.0  # the end takes at most this, once all has drained: SIGTERM, SIGKILL, the tunnels' last words
LISTEN_FDS_START = 3  # the first descriptor that systemd passes: sd_listen_fds(3)


class Supervisor:
    """Tells systemd how the daemon is (sd_notify(3)).  Does nothing where NOTIFY_SOCKET is not set."""

    def __init__(self, environ: dict[str, str]):
        self.socket: socket.socket | None = None  # None: nobody asks
        self.watchdog = False
        self.every = STATUS_EVERY  # seconds between two calls of `beat`
        self.status = ""  # the last one that systemd was told
        address = environ.get("NOTIFY_SOCKET")
        if not address:
            return
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        try:
            self.socket.connect("\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            log.warning("NOTIFY_SOCKET %s: %s", printable(address), error.strerror)
            self.close()
            return
        usec = environ.get("WATCHDOG_USEC", "")
        if usec.isdecimal() and int(usec) and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self.watchdog = True
            self.every = min(STATUS_EVERY, int(usec) / 2e6)

    def tell(self, *lines: str) -> None:
        """Send lines as one message.  It is lost without a word where systemd is gone, or does not keep up."""
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.send("\n".join(lines).encode())

    def ready(self, router: Router) -> None:
        """Say that the router serves: at the start, and again after each reload."""
        self.status = router.standing()
        self.tell("READY=1", f"STATUS={self.status}")

    def beat(self, router: Router) -> float:
        """Say that the loop is alive, and its status where that has changed.  The loop calls this.

        Returns the seconds until the next call is due.
        """
        if self.socket is None:
            return NEVER
        lines = ["WATCHDOG=1"] if self.watchdog else []
        if router.phase in (LAMEDUCK, DRAINING):
            lines.append(f"EXTEND_TIMEOUT_USEC={int(1e6 * (2 * self.every + STOP_TIME))}")
        status = router.standing()
        if status != self.status:
            self.status = status
            lines.append(f"STATUS={status}")
        if lines:
            self.tell(*lines)
        return self.every

    def farewell(self, router: Router) -> None:
        """Say how it stands at the end: the unit shows its last status for as long as it is not started again."""
        self.tell(f"STATUS={router.standing()}")

    def close(self) -> None:
        """Close the socket; later messages are dropped."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None


def activated_sockets(environ: dict[str, str]) -> dict[str, list[socket.socket]]:
    """The listening sockets that systemd has opened for us (sd_listen_fds(3)); they are the caller's to close.

    "admin", "admin-public" and "port" have those that FileDescriptorName= calls so, "" has all others.  All are empty
    without systemd.  Raises SettingsError where a descriptor is no listening TCP socket; the admin's may be a unix
    socket.
    """
    found: dict[str, list[socket.socket]] = {"": [], "admin": [], "admin-public": [], "port": []}
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return found
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    for number, fd in enumerate(range(LISTEN_FDS_START, LISTEN_FDS_START + int(count))):
        name = names[number] if number < len(names) else ""
        use = name if name in found else ""
        families = [socket.AF_INET, socket.AF_INET6, *([socket.AF_UNIX] if use.startswith("admin") else [])]
        try:
            sock = Held(fileno=fd)
            sock.set_inheritable(False)
            found[use].append(sock)
            if sock.family in families and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
        except OSError:
            pass
        raise SettingsError(f"LISTEN_FDS: descriptor {fd} ({printable(name) or 'no name'}) is no listening TCP socket")
    return found
