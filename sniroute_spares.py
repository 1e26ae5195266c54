"""sniroute_spares: idle connections to backends, between two clients that they serve (`http_reuse = "safe"`).

    a client leaves, and its backend has answered all --- Spares.give ---> Spare: watched, for SPARE_IDLE seconds
    another client asks the same backend for a page  <--- Spares.take ----'   | its backend ends it, or says something
                                                                              +---> closed

What may be given, and for what it may be taken: `may_give`, `may_share`.  Only for bodyless GET and HEAD, never for a
client's first request, and never a connection that a backend may have tied to one user.

Threads: the loop only.

Seams: I want to ...
    keep more, or longer     SPARES_MAX, SPARE_IDLE
    give to others, or less  `may_give`, `may_share`, `is_personal`

This room imports sniroute_bodies, sniroute_flow, sniroute_http and sniroute_loop.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from sniroute_bodies import MessageFlow
from sniroute_flow import OPEN
from sniroute_http import NO_BODY
from sniroute_loop import READ, Loop, Poller, Watch

if TYPE_CHECKING:
    from sniroute_requests import Exchange, HttpConnection
    from sniroute_targets import Backend
    from sniroute_tls import TlsClient

__version__ = "0.1.0"

# Limits, each with its reason.
SPARES_MAX = 256  # connections: descriptors are for clients first; over it the longest idle one goes
SPARE_IDLE = 4.0  # seconds: Node.js ends idle connections after 5

SAFE = "safe"  # the value of `http_reuse`; compared by `is` (Web.policy sees to that)


Key = tuple[str, tuple[str, str | bool] | None]  # Decision.key; by TLS: the name that was proven, and to whom


class Spare(Watch):
    """A connection to a backend that nobody uses.  It owns the socket, and its Backend."""

    __slots__ = ("spares", "key", "sock", "backend", "tls")

    def __init__(self, spares: Spares, poller: Poller, key: Key, sock: Any, backend: Backend | None,
                 tls: TlsClient | None):
        super().__init__(poller, sock.fileno())
        self.spares = spares
        self.key = key
        self.sock = sock
        self.backend = backend
        self.tls = tls

    def on_news(self, mask: int) -> None:
        """Its backend has ended it, or says what nobody has asked for."""
        self.spares.drop(self)

    def expire(self) -> None:
        """It has been idle long enough."""
        self.spares.drop(self)


class Spares:
    """All of them, by where they lead.  Loop only."""

    def __init__(self, loop: Loop):
        self.poller = loop.poller
        self.queue = loop.queue(SPARE_IDLE, Spare.expire)
        self.by_key: dict[Key, list[Spare]] = {}  # the longest idle one comes first

    def give(self, key: Key, sock: Any, backend: Backend | None, tls: TlsClient | None) -> None:
        """Keep a connection: connected, without an unread byte, and watched by nobody.  It is ours from here on."""
        if len(self.queue.due) >= SPARES_MAX:
            self.drop(next(iter(self.queue.due)))
        spare = Spare(self, self.poller, key, sock, backend, tls)
        self.by_key.setdefault(key, []).append(spare)
        self.queue.put(spare)
        spare.wait_for(READ, spare.on_news)

    def take(self, key: Key) -> Spare | None:
        """The one that was used last: its backend keeps it the longest.  It is the caller's, and is watched no more."""
        while key in self.by_key:
            spare = self.by_key[key][-1]
            if has_news(spare.sock):  # of this turn: else that were the answer to what the caller asks
                self.drop(spare)
                continue
            self._forget(spare)
            spare.wait_for(0)
            return spare
        return None

    def drop(self, spare: Spare) -> None:
        """Close one."""
        self._forget(spare)
        spare.closing()
        spare.sock.close()
        if spare.backend is not None:
            spare.backend.release()

    def close(self) -> None:
        """Close all of them: routes have changed, or no more clients come."""
        for spare in list(self.queue.due):
            self.drop(spare)

    def _forget(self, spare: Spare) -> None:
        self.queue.drop(spare)
        spares = self.by_key[spare.key]
        spares.remove(spare)
        if not spares:
            del self.by_key[spare.key]


def has_news(sock: socket.SocketType) -> bool:
    """Whether a connection that should be silent has ended, or says something."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def has_said_more(connection: HttpConnection) -> bool:
    """Whether the backend has ended, or says something, behind its answer."""
    tls = connection.tls
    return tls is not None and tls.has_more() or has_news(connection.down.source)


# -- which connections, for whom ---------------------------------------------------------------


def may_share(connection: HttpConnection) -> bool:
    """Whether a request may go out on a connection that has served another client.

    Never a client's first request: if that connection is dead, only the client can try again, and it does so where it
    has had an answer before.
    """
    request = connection.exchange.request
    return (connection.answered_once and request.method in ("GET", "HEAD") and request.framing is NO_BODY
            and not connection.exchange.upgrade and not connection.preface.header)


def may_give(connection: HttpConnection) -> bool:
    """Whether the connection to the backend may serve another client."""
    web, backend, down, route = connection.web, connection.backend, connection.down, connection.decision.route
    known = web.policies.get(route.pattern)
    return (known is not None and known[0] is route and known[1].reuse is SAFE  # by the settings of now
            and not connection.is_private
            and not connection.preface.header and (backend is None or backend.may_change_hands)
            and down.step is MessageFlow.hear and down.state is OPEN and connection.up.pending is None
            and not has_said_more(connection)
            and connection.router.web is web and not connection.router.deaf.is_set())


def is_personal(exchange: Exchange) -> bool:
    """Whether a backend may take the connection for one user's from here on, as with NTLM (RFC 4559 section 6)."""
    said = [*exchange.request.head.values(b"authorization"), *exchange.response.head.values(b"www-authenticate")]
    return any(value[:9].lower().startswith((b"ntlm", b"negotiate")) for value in said)
