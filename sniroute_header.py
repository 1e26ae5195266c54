"""sniroute_header: clients of a port with one target, and PROXY headers: who a client is.

    a port's client --- read_header ---> route_to        a PROXY header may come first, or has to
                            |
                            +- silent -> route_to        led on at once: its server may be one that speaks first
                                            |
                                            +--- first_words, learn     its first bytes, when they come
                                            +--- first_answer           its backend's, where the client spoke first

    believe    the client is the one that a believed header names

Threads: the loop only.

Seams: I want to ...
    wait otherwise for a header    `read_header`, HEADER_GRACE of sniroute_deadlines
    read another header            sniroute_wire

It imports flow, loop, wire and refusals.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from typing import TYPE_CHECKING

from sniroute_flow import MESSAGE, UNANSWERED
from sniroute_loop import READ
from sniroute_refusals import Malformed, Refused
from sniroute_wire import PROXY_V2_MAX, PortPrelude, ProxyHeader

if TYPE_CHECKING:
    from sniroute_connection import Connection
    from sniroute_routes import Decision

__version__ = "0.1.0"

HEADER = "header"  # the state of a connection that is read here: see sniroute_connection
PRELUDES_MAX = 1024  # clients that have not said their name yet; over it the oldest goes


def read_header(connection: Connection, mask: int = READ) -> None:
    """Meet the client of a port with one target: read its PROXY header, where one may come, and go on.

    A server that speaks first must not wait for a header that never comes.  So where a header is allowed and not
    required, a silent client is led on at once, and `learn` looks at its first bytes when they come; HEADER_GRACE later
    where the port's options depend on who it is, and none is looked for then.
    """
    if connection.state is not HEADER:
        return
    peer, decision, deadlines = connection.peer, connection.decision, connection.router.deadlines
    if peer.policy == "refuse":  # its bytes are data, whatever they look like
        connection.route_to(decision)
        return
    if connection.prelude is None:
        connection.prelude = PortPrelude(peer.policy, peer.local)
    prelude, required = connection.prelude, peer.policy == "require"
    whole, queue = False, deadlines.prelude
    try:
        data = os.read(connection.up.fd, MESSAGE)
        if data:
            whole = prelude.feed(data) is not None
        elif required:
            raise Malformed("the client left in the middle of its prelude", kind="truncated")
        else:
            whole = True  # the next read finds the end again
    except Refused as error:
        connection.refuse(error)
        return
    except BlockingIOError:
        if not prelude.data and not required:
            whole = not asks_who(decision)
            queue = deadlines.header
    except OSError:
        connection.refuse(Refused("truncated", "the client reset the connection"))
        return
    if whole:
        connection.route_to(decision)
        return
    if connection.queue not in (queue, deadlines.prelude):
        connection.wait_in(queue)
    if not connection.up.events:
        connection.up.wait_for(READ, functools.partial(read_header, connection))
    if len(deadlines.prelude.due) > PRELUDES_MAX:
        connection.router.shed()


def asks_who(decision: Decision) -> bool:
    """Whether what a route does with a client depends on a PROXY header."""
    return decision.route.allow is not None or decision.route.send_proxy != "as-received"


def first_words(connection: Connection, mask: int) -> None:
    """The client of a port was led on while it was silent, and speaks or ends now; its bytes are moved as always."""
    up = connection.up
    up.install()
    with contextlib.suppress(OSError):  # who moves the bytes meets it, too
        learn(connection, connection.client.recv(PROXY_V2_MAX, socket.MSG_PEEK))
    if connection.state is UNANSWERED and connection.backend.is_used_up(connection.down.source):
        connection.backend_failed("it ended the connection while the client was silent")
    elif connection.up is not None:  # else `learn` has refused it
        up.mover()(mask)


def first_answer(connection: Connection, mask: int) -> None:
    """The backend of a port, whose client has spoken first, says something: that proves it."""
    down = connection.down
    down.install()
    down.mover()(mask)
    if down.total and connection.backend is not None:
        connection.backend.answered()


def learn(connection: Connection, data: bytes) -> None:
    """A client was led on while it was silent, and these are its first bytes: whose are they?

    A PROXY header is passed on with them, as received; it is not taken out.
    """
    peer = connection.peer
    if not data or peer.policy != "allow" or connection.proxy is not None or asks_who(connection.decision):
        return
    prelude = PortPrelude(peer.policy, peer.local)
    try:
        prelude.feed(data)
        if prelude.proxy is not None:
            believe(connection, prelude.proxy)
    except Refused as error:
        connection.refuse(error)


def believe(connection: Connection, header: ProxyHeader) -> None:
    """Take the client for the one that a PROXY header names.  Raises Refused where that has too many connections."""
    connection.proxy = header
    if header.source is None:
        return
    router = connection.router
    connection.address = (str(header.source), header.port)
    connection.peer.count -= 1
    connection.peer = peer = router.peers.find(connection.address[0])
    peer.count += 1
    if peer.count > router.max_per_client and not peer.exempt:
        raise Refused("client_limit", f"{peer.key} has {peer.count - 1} connections")
