"""sniroute_handover: how a restart refuses nobody: the listening sockets pass from process to process.

    a successor --- connects to the name of an address ---> its predecessor
                <-- all its listeners and names -----------
                --- "drain" ------------------------------>

A name is an abstract unix address that belongs to one TCP address.  See Handover.

Threads: main.

Seams: I want to ...
    hand over something else     `Handover.give` sends sockets, `_take` sorts them by their addresses

It imports the loop and names.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import sys
import time
from typing import Iterable

from sniroute_loop import CAPACITY_ERRNOS, CAPACITY_PAUSE
from sniroute_names import show_address

__version__ = "0.1.0"

log = logging.getLogger("sniroute")
monotonic = time.monotonic

# Times in seconds.
HANDOVER_TIMEOUT = 5.0  # for all predecessors to send sockets, and for each later answer: all are on this host
OFFER_AGAIN = 5.0  # between two tries to bind a name that another process has
HANDOVER_MAX = 253  # sockets in one message: the kernel's SCM_MAX_FD; an address needs two, its listener and its name


class Handover:
    """Passes the listening sockets on to a successor, so that a restart refuses nobody.  Main thread.

    A successor is a second process of the same user with the same --listen:

        successor                               predecessor
        connects to an address's name   ---->
                                        <----   sends all its sockets: its listeners and its names (SCM_RIGHTS)
        accepts clients, too
        "drain"                         ---->   closes its listeners, and drains
                                        <----   closes its names and the admin's addresses, then the connection
        listens on the names

    If the successor dies before it says "drain", nothing has changed.

    A name is an abstract unix address (unix(7)) that belongs to one TCP address.  It leaves no file behind, and is
    known in one network namespace, as a TCP port is.  The names are passed as sockets instead of bound again, so each
    exists at every moment: a third process that connects meanwhile waits in the name's backlog.  Any user may bind or
    connect to such a name, so both sides check whose process the other is.  Without abstract names (macOS) there is
    no hand-over.
    """

    def __init__(self) -> None:
        self.names: list[socket.socket] = []  # ours: a successor connects to these
        self.inherited: dict[tuple[str, int], socket.socket] = {}  # a predecessor's names, by address, until `offer`
        self.predecessors: list[socket.socket] = []  # connections to those that gave us sockets, until `dismiss`
        self.successor: socket.socket | None = None  # one at a time: others wait in the backlog of the names

    @staticmethod
    def name(address: tuple) -> str:
        """The abstract unix address that belongs to a TCP address."""
        return f"\0sniroute {show_address(address)}"

    @staticmethod
    def is_ours(peer: socket.socket) -> bool:
        """Whether the other end is a process of this user."""
        _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return user == os.geteuid()

    def take(self, addresses: Iterable[tuple[str, int]]) -> list[socket.socket]:
        """Get the listeners that predecessors have for these addresses; the caller owns them.

        Their names are kept in `inherited`.  Addresses with port 0 are skipped: nobody can have them before us.
        """
        wanted = {address for address in addresses if address[1]}
        taken: dict[tuple, socket.socket] = {}
        deadline = monotonic() + HANDOVER_TIMEOUT
        for address in sorted(wanted) if sys.platform == "linux" else ():  # in one order: no two wait for each other
            if address not in taken and address not in self.inherited:
                try:
                    self._take(address, wanted, taken, deadline)
                except OSError as error:
                    log.warning("%s is not handed over: %s", show_address(address), error)
        return list(taken.values())

    def _take(self, address: tuple[str, int], wanted: set[tuple[str, int]], taken: dict[tuple, socket.socket],
              deadline: float) -> None:
        """Ask the process that has this address's name for all its sockets.

        Listeners for `wanted` addresses go to `taken`, names to `inherited`; the rest is closed.  Raises OSError.
        """
        while True:
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            channel.settimeout(max(deadline - monotonic(), CAPACITY_PAUSE))  # even the last one asked gets a moment
            try:
                channel.connect(self.name(address))
                if not self.is_ours(channel):
                    raise PermissionError(errno.EPERM, "another user has its name")
                word, fds, _, _ = socket.recv_fds(channel, 16, HANDOVER_MAX)
                if word:
                    break
            except ConnectionRefusedError:
                channel.close()
                return  # nobody has it
            except (ConnectionResetError, BlockingIOError):
                pass  # try again: it has just ended, or its backlog is full, which any user can bring about
            except OSError:
                channel.close()
                raise
            channel.close()
            if monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "who has its name says nothing")
            time.sleep(CAPACITY_PAUSE)
        self.predecessors.append(channel)
        names = {self.name(each).encode(): each for each in wanted}
        for fd in fds:
            sock = socket.socket(fileno=fd)
            kept, found = taken, sock.getsockname()
            if sock.family == socket.AF_UNIX:
                kept, found = self.inherited, names.get(found, ())
            if found[:2] in wanted.difference(kept):
                kept[found[:2]] = sock
            else:
                sock.close()

    def dismiss(self) -> bool:
        """Tell the predecessors to drain, now that we accept.  Returns whether there were any."""
        for channel in self.predecessors:
            with channel, contextlib.suppress(OSError):
                channel.settimeout(HANDOVER_TIMEOUT)
                channel.sendall(b"drain")
                channel.recv(1)
        count, self.predecessors = len(self.predecessors), []
        return count > 0

    def offer(self, addresses: Iterable[tuple]) -> list[tuple]:
        """Listen on the name of each address, for a successor.  Returns addresses whose name another process has."""
        others = []
        for address in addresses if sys.platform == "linux" else ():
            name = self.inherited.pop(address, None)
            if name is None:
                name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    name.bind(self.name(address))
                    name.listen()
                except OSError:
                    name.close()
                    others.append(address)
                    continue
            name.setblocking(False)
            self.names.append(name)
        return others

    def accept(self, name: socket.socket) -> socket.socket | None:
        """The connection of a successor to a name; None where it has gone again, or is another user's process."""
        try:
            channel, _ = name.accept()
        except OSError as error:
            if error.errno in CAPACITY_ERRNOS:
                time.sleep(CAPACITY_PAUSE)  # it still waits in the backlog: without a pause the selector would spin
            return None
        channel.settimeout(HANDOVER_TIMEOUT)
        if self.is_ours(channel):
            return channel
        channel.close()
        return None

    def give(self, channel: socket.socket, listeners: Iterable[socket.socket]) -> bool:
        """Send a successor these listeners and all names, and keep its connection: it will say "drain".

        Returns whether they could be sent.
        """
        try:
            socket.send_fds(channel, [b"sockets"], [sock.fileno() for sock in (*listeners, *self.names)])
        except OSError:
            channel.close()
            return False
        self.successor = channel
        return True

    def withdraw(self) -> None:
        """Close the names: no successor finds us any more."""
        for name in self.names:
            name.close()
        self.names = []

    def close(self) -> None:
        """Close all sockets that nobody has taken over."""
        self.withdraw()
        for sock in (*self.predecessors, *self.inherited.values(), self.successor):
            if sock is not None:
                sock.close()
