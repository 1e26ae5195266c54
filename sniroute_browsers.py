"""sniroute_browsers: a page for a browser that is refused over TLS, in place of the alert.

    Connection.refuse --- Courtesy.take ---> no: the alert, as ever
                               | yes: the kind of refusal, the hello and the room that is left allow it
                               v
                  COURTESY: a Visit, with a thread or waiting for one
                               |  thread courtesy-<n>: a leaf for the name, the handshake, a request, the page
                               v
                  Visit.over, in the loop: Connection.linger, the one line in the log, the counters

An alert is one number, and a browser shows it as `ERR_SSL_...`: nobody learns from that what to do.  With
`--error-pages on` the router answers instead, as the server that the name has not got.  The certificate is made on the
spot, and nobody trusts it.  So the browser warns its user first, and shows the page behind that warning; it shows none
for a name that may only be visited with a good certificate (HSTS, RFC 6797 section 12.1).

Everything else that speaks TLS has to get the alert: a program would report an untrusted certificate where the alert
says `unrecognized_name`.  So a browser is known by what programs do not send (`is_browser`).  ALPN does not tell: curl,
git, Go and Python offer the same protocols.

What is answered is the refusal, whatever is asked for.  No byte of it comes from a backend or goes to one, and a client
that has said more than its hello to a backend gets the alert: those bytes are gone.

Measured (2 cores, CPython 3.11): 2 ms of a core for a visit; 5 us more for the refusal of a client that is none.

Threads: Courtesy and Visit belong to the loop.  `Visit.serve` and what it calls run in a thread of that visit: it has a
descriptor of its own for the socket, owns and closes it, and hands the connection back by `call`.  The loop does not
touch the socket meanwhile; where it closes its own descriptor, the thread's still leads to the same connection, and to
no other.  No locks but that of Leafs.

Seams: I want to ...
    show a page for another refusal     PAGES
    know another browser                BROWSERS
    let more of them in                 THREADS, WAITING, VISITS; VISIT_TIME, WAIT_TIME

This room imports sniroute_answers (the page), sniroute_certificate (leafs), sniroute_http (the request), sniroute_scarcity,
sniroute_names (addresses), sniroute_refusals and sniroute_wire (hellos).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING, Any, Callable

from sniroute_answers import refusal
from sniroute_certificate import Leafs, Pair, load
from sniroute_http import parse_request
from sniroute_names import Address, parse_ip
from sniroute_refusals import REFUSALS, Malformed, Refused
from sniroute_scarcity import begin_errand, ran_out
from sniroute_wire import ALPN, TLS_HANDSHAKE, Hello, HelloReader

if TYPE_CHECKING:
    from sniroute_connection import Connection
    from sniroute_router import Router

__version__ = "0.1.0"

log = logging.getLogger("sniroute")
monotonic = time.monotonic

# Limits, each with its reason.  Times in seconds.  Beyond each of them a client gets the alert.
THREADS = 4  # visits at once: one takes 3 ms, unless its client is slow
WAITING = 64  # visits that wait for a thread; each holds its hello
HELLO_MOST = 16384  # bytes of that, and of what came with it; a browser's takes 2 KB, and with a ticket 4
VISITS = 50  # visits in any second: at 2 ms each a tenth of a core, whoever asks
VISIT_TIME = 5.0  # for all of a visit, from the refusal on: a thread is not for those who are slow
WAIT_TIME = 2.0  # of these a visit may wait for its thread: the rest is for a handshake and a request
READ = 16384  # bytes of one read: a TLS record

COURTESY = "courtesy"  # the state of a Connection meanwhile

# The refusals that a page can help with: the name is known, and the user or the operator can do something about it.
# Those of a client that has too much already (client_limit, shed) are not here, as a page is one thing more.
PAGES = frozenset((
    "no_name", "bad_name", "no_route", "not_allowed", "route_limit", "forbidden", "busy", "unresolved", "backend",
    "queue_timeout", "queue_full", "command_failed", "internal",
    *(kind for kind in REFUSALS if kind.startswith("tunnel_"))))

# -- who is a browser --------------------------------------------------------------------------

# Values that no server knows, which a client puts among its own so that servers get used to that: RFC 8701 section 2.
GREASE = frozenset(0x0A0A + 0x1010 * step for step in range(16))
# Extension types, https://www.iana.org/assignments/tls-extensiontype-values.
STATUS_REQUEST, GROUPS, SIGNATURES, SCT, RECORD_SIZE, DELEGATED, VERSIONS, KEY_SHARE = 5, 10, 13, 18, 28, 34, 43, 51
# (whether there is GREASE among the cipher suites and among the extensions, extensions that are there, in any order)
BROWSERS = (
    # Chrome, Edge and others of Chromium (BoringSSL with GREASE), and Safari.  Go sends these extensions, too.
    (True, frozenset((STATUS_REQUEST, GROUPS, SIGNATURES, ALPN, SCT, VERSIONS, KEY_SHARE))),
    # Firefox (NSS), which has no GREASE there.  GnuTLS limits its records, too; only NSS has delegated credentials.
    (False, frozenset((STATUS_REQUEST, GROUPS, SIGNATURES, ALPN, RECORD_SIZE, DELEGATED, VERSIONS, KEY_SHARE))),
)
SPOKEN = b"http/1.1"  # what a page is sent in: who does not offer it (gRPC, a mail program) would not understand

_short = struct.Struct(">H").unpack_from
_two_shorts = struct.Struct(">HH").unpack_from


def is_browser(body: bytes) -> bool:
    """Whether a browser has written this ClientHello (RFC 8446 section 4.1.2).  A few microseconds.

    `body` is the handshake message without its header, and has passed `parse_client_hello`: its framing is right.
    Programs that use a browser's own TLS (Apple's URLSession, Chromium's Cronet) or imitate it look the same.
    """
    at = 35 + body[34]  # behind version, random and session id
    suites = at + 2
    at = suites + _short(body, at)[0]
    suites_end = at
    at += 1 + body[at] + 2  # compression methods, the length of the extensions
    kinds = {}
    while at < len(body):
        kind, size = _two_shorts(body, at)
        at += 4
        kinds[kind] = at, at + size
        at += size
    for greased, needed in BROWSERS:
        if kinds.keys() >= needed and (not greased or not GREASE.isdisjoint(kinds) and any(
                _short(body, place)[0] in GREASE for place in range(suites, suites_end, 2))):
            return SPOKEN in (Hello(None, body[slice(*kinds[ALPN])], 0).alpn or ())
    return False


def body_of(hello: bytes) -> bytes:
    """The body of the ClientHello at the beginning of these bytes, which was read before: joined from its records."""
    size = int.from_bytes(hello[6:9], "big")
    if size + 4 <= _short(hello, 3)[0]:
        return hello[9:9 + size]  # in one record, as nearly always
    reader = HelloReader()
    reader.read(hello)
    return bytes(reader.message[4:4 + int.from_bytes(reader.message[1:4], "big")])


# -- who gets a page ---------------------------------------------------------------------------


class Courtesy:
    """Decides who gets a page, and has so many served at once.  Loop only, but for its `leafs`."""

    def __init__(self, router: Router):
        self.router = router
        self.leafs = Leafs()  # at most 5 new ones a second
        self.served: set[Visit] = set()  # with a thread
        self.waiting: collections.deque[Visit] = collections.deque()  # for one; at most WAITING
        self.begun: collections.deque[float] = collections.deque(maxlen=VISITS)  # when the last visits came

    def take(self, connection: Connection, error: Refused, farewell: bytes) -> bool:
        """Take over a connection that is refused, where its client is a browser and there is room.

        `farewell` is the alert that it gets otherwise, be it now or where the page cannot be made.
        """
        hello, (header, asked) = connection.hello, connection.preface
        if error.kind not in PAGES or error.farewell or not hello or hello[0] != TLS_HANDSHAKE or asked \
                or connection.name is None and error.kind != "no_name" \
                or connection.up.total > len(header) + len(hello):  # the backend had more of it (0-RTT)
            return False
        now = monotonic()
        if len(self.waiting) >= WAITING or len(self.begun) == VISITS and now - self.begun[0] < 1.0 \
                or len(hello) > HELLO_MOST or not is_browser(body_of(hello)):
            return False
        self.begun.append(now)
        connection.drop_backend()
        connection.leave_queue()
        connection.up.wait_for(0)
        connection.up.source = None  # nobody looks at the socket but the thread
        connection.hello = None
        connection.state, connection.reason = COURTESY, error.kind
        self.waiting.append(Visit(self, connection, error, farewell, hello, now + VISIT_TIME))
        self.serve_next()
        return True

    def serve_next(self) -> None:
        """Give threads to those who wait, as far as there are any."""
        while self.waiting and len(self.served) < THREADS:
            visit = self.waiting.popleft()
            if visit.connection.state is COURTESY and not visit.begin():
                visit.connection.linger(visit.farewell, visit.connection.reason)

    def close(self) -> None:
        """The loop has ended: have the threads end soon.  They are not waited for."""
        self.waiting.clear()
        for visit in self.served:
            with contextlib.suppress(OSError):  # it is closed, and the thread will see
                visit.connection.client.shutdown(socket.SHUT_RD)  # the thread reads an end


# -- a visit -----------------------------------------------------------------------------------


class Visit:
    """One browser, from its refusal to the end of its page.  `sock` is the thread's, from `begin` on."""

    __slots__ = ("courtesy", "connection", "error", "farewell", "name", "deadline", "sock", "incoming", "outgoing",
                 "is_shown")

    def __init__(self, courtesy: Courtesy, connection: Connection, error: Refused, farewell: bytes, hello: bytes,
                 deadline: float):
        self.courtesy = courtesy
        self.connection = connection
        self.error = error
        self.farewell = farewell  # the alert; b"" from the first byte of ours on
        self.name: str | Address = connection.name or local_address(connection)
        self.deadline = deadline
        self.sock: socket.socket | None = None
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.incoming.write(hello)  # it has been read from the socket, and perhaps more with it
        self.is_shown = False

    # -- the loop

    def begin(self) -> bool:
        """Start the thread; False where it is too late for that, or the host is short of something."""
        served = self.courtesy.served
        if self.deadline - monotonic() < VISIT_TIME - WAIT_TIME:
            return False
        try:
            fd = os.dup(self.connection.up.fd)
            try:
                self.sock = socket.socket(fileno=fd)
            except Exception:
                os.close(fd)
                raise
            begin_errand(self.serve, self.over, self.courtesy.router.call, f"courtesy-{len(served) + 1}")
        except (OSError, RuntimeError, MemoryError):  # descriptors, threads
            if self.sock is not None:
                self.sock.close()
            return False
        served.add(self)
        return True

    def over(self, _: object) -> None:
        """The thread has done what it could: end the connection, and let the next one in."""
        courtesy, connection = self.courtesy, self.connection
        courtesy.served.discard(self)
        courtesy.router.counters["error_pages"] += self.is_shown
        courtesy.serve_next()
        if connection.state is COURTESY:  # else the loop has closed it meanwhile
            connection.linger(self.farewell, connection.reason)

    # -- its thread

    def serve(self) -> None:
        """Show the page, as far as the client wants it."""
        try:
            pair = self.courtesy.leafs.get(self.name)
            if pair is not None:
                self.answer(pair)
        except OSError as error:  # TimeoutError, ssl.SSLError: mostly a browser that does not trust the certificate
            log.debug("%s:%d, no page for %s: %s", *self.connection.address, self.name, error)
        except Exception as error:
            if not ran_out(error):
                log.exception("a fault in sniroute: please report it")
        finally:
            self.sock.close()

    def answer(self, pair: Pair) -> None:
        """Shake hands, read the head of a request, send the page.  Raises OSError."""
        tls = context_for(pair).wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.exchange(tls.do_handshake)
        request, data, seen = None, bytearray(), 0
        with contextlib.suppress(Malformed):  # the answer is the same
            while (request := parse_request(data, seen)) is None:
                seen = len(data)
                more = self.exchange(functools.partial(tls.read, READ))
                if not more:
                    return
                data += more
        self.exchange(functools.partial(tls.write, refusal(self.error, request)))
        self.is_shown = True
        with contextlib.suppress(ssl.SSLWantReadError):  # it sends close_notify, and need not wait for the client's
            tls.unwrap()
        self.flush()

    def exchange(self, act: Callable[[], Any]) -> Any:
        """Do a step of TLS, with as many bytes both ways as it needs, and return what it returns.  Raises OSError."""
        while True:
            try:
                return act()
            except ssl.SSLWantReadError:
                pass
            finally:  # also where it failed: an alert says so
                self.flush()
            self.sock.settimeout(self.left())
            data = self.sock.recv(READ)
            if not data:
                raise ConnectionResetError("it has left")
            self.incoming.write(data)

    def flush(self) -> None:
        """Send what TLS wants to be sent.  Raises OSError."""
        if self.outgoing.pending:
            self.farewell = b""
            self.sock.settimeout(self.left())
            self.sock.sendall(self.outgoing.read())

    def left(self) -> float:
        """Seconds that are left.  Raises TimeoutError where there are none."""
        left = self.deadline - monotonic()
        if left <= 0.0:
            raise TimeoutError(f"not within {VISIT_TIME:g} s")
        return left


def local_address(connection: Connection) -> Address:
    """Where the client connected to: what it has typed in place of a name."""
    header = connection.proxy
    return parse_ip((header and header.destination or connection.client.getsockname())[0])


def context_for(pair: Pair) -> ssl.SSLContext:
    """A server's context for one visit.  Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([SPOKEN.decode()])
    context.options |= ssl.OP_NO_TICKET  # nobody comes back to this context
    context.num_tickets = 0
    load(context, pair)
    return context
