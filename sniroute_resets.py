"""sniroute_resets: one side has broken off: the other gets what that said before, then a reset.

    the source of a flow breaks off --- pass_on_reset ---> RESETTING: the rest is delivered
                                                                |
                           every RESET_LOOK  look_at_reset -----+---> its peer has acknowledged all, or takes nothing
                                                                      for too long: close, with a reset

A stream that was cut must not look whole: protocols without a length of their own have only TCP's word for that.  So a
reset is passed on as a reset, behind the bytes that came before it.  A reset destroys what the kernel still has to
send: it waits until the peer has acknowledged all.

Threads: the loop only.

Seams: I want to ...
    wait longer for a slow reader     RESET_STALL, RESET_LAST
    say otherwise who was first       `who_was_first`; the words are rows of ENDINGS in sniroute_log

It imports targets (RESET), flow, log and the loop.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import TYPE_CHECKING

from sniroute_flow import BROKEN, DONE, EARLY, UNANSWERED, Flow
from sniroute_log import BACKEND_CLOSED, BACKEND_RESET, CLIENT_CLOSED, CLIENT_RESET
from sniroute_loop import unsent
from sniroute_targets import RESET

if TYPE_CHECKING:
    from sniroute_connection import Connection

__version__ = "0.1.0"

monotonic = time.monotonic

# Limits, each with its reason.  Times in seconds.
RESET_LOOK = 0.05  # between two looks whether the bytes before a reset have arrived: Linux delays an ACK by 0.04
RESET_LOOKS = 20  # so many of these, then one each second: thousands that are stuck must not take the loop's time
RESET_LOOK_LATER = 1.0
RESET_STALL = 30.0  # who takes none of them for so long is reset all the same; who is only slow gets them
RESET_LAST = 600.0  # or as many as that takes in so long: what is left was 4 MiB at most
BLIND = 0.5  # where the kernel does not tell what has arrived (macOS): its bytes get this long to arrive

RESETTING = "resetting"  # a state of a Connection


def is_unheard(connection: Connection) -> bool:
    """Whether its tunnel owes an answer.  Where its client has ended, it owes none: cloudflared ends both."""
    return connection.state is UNANSWERED or connection.state is EARLY and connection.up.state is not DONE


def pass_on_reset(connection: Connection, flow: Flow, read: bool) -> None:
    """The source of `flow` has broken off: its sink gets what it said before, then a reset.

    `read`: all that it said has been read.  Else `flow` goes on reading, until the source has no more.
    """
    if connection.state is not RESETTING:
        connection.reason = who_was_first(connection, flow)
        connection.state = RESETTING
        connection.hello = None
        connection.carried = -1
        connection.parks = 0
        flow.twin.discard(BROKEN)
    if read:
        flow.state = DONE
    flow.rewatch()
    flow.twin.rewatch()
    look_at_reset(connection)


def look_at_reset(connection: Connection) -> None:
    """Reset what is left, once the bytes before that have arrived, or nobody takes them."""
    now = monotonic()
    flow = connection.up if connection.down.state is BROKEN else connection.down
    sink = flow.twin.source
    if flow.state is not DONE:
        patience = RESET_STALL
    else:
        held = unsent(sink)
        patience = 0.0 if held == 0 else BLIND if held is None else RESET_STALL
    arrived = flow.arrived()
    if arrived != connection.carried:
        connection.carried = arrived
        connection.quiet_since = now
    deadlines = connection.router.deadlines
    connection.parks += 1
    if now - connection.quiet_since >= patience or sink.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        connection.close(connection.reason)
    elif connection.parks <= RESET_LOOKS:
        connection.wait_in(deadlines.resetting)
    elif connection.parks <= RESET_LOOKS + RESET_LAST / RESET_LOOK_LATER:
        connection.wait_in(deadlines.stuck)
    else:
        connection.close(connection.reason)


def who_was_first(connection: Connection, flow: Flow) -> str:
    """The word for a connection that ends because the source of `flow` has broken off.

    A side that ended before was first.  So was a client whose end waits in the kernel: servers break off because their
    client has left, and do so before its last bytes are read.
    """
    up, down = connection.up, connection.down
    if up.state is DONE or flow is down and has_ended(up.source):
        return CLIENT_CLOSED
    if down.state is DONE:
        return BACKEND_CLOSED
    return CLIENT_RESET if flow is up else BACKEND_RESET


def has_ended(sock: socket.SocketType) -> bool:
    """Whether the peer has ended, and not broken off; what it said before may be unread.  Only Linux tells."""
    ended = getattr(select, "POLLRDHUP", 0)
    poll = select.poll()
    poll.register(sock, ended)
    return any(mask == ended for _, mask in poll.poll(0))


def will_reset(sock: socket.SocketType) -> None:
    """Have close() send a reset."""
    with contextlib.suppress(OSError):  # macOS, where the connection is over
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
