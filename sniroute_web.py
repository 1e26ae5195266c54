"""sniroute_web: clients that ask in plain HTTP: where they are met, and what they share.

    Prelude --- Web.read ---> Request, or Authority (HTTP/2) --- Web.meet ---> by the `http` of the route
                     |                                             refuse    the connection closes, as ever
                     +-> UNGREETED: `meet` sends GREETING,         pass      PassedConnection: bytes pass as they came
                         `read_http2` reads on                     others    HttpConnection (sniroute_requests)

A client is a Connection until its first request is there.  What takes its place (an heir) has the same client's socket,
and flows of its own: `take_over` of sniroute_requests.

Web has what is the same for all of them: the routes' policies, deadlines, the TLS sessions of backends, connections to
backends that wait for a client (Spares).  A router has one, or none where no route serves HTTP; a reload has it `adopt`
other settings.

Threads: the loop only; `prepare_tls` in whichever thread reads the settings, since it opens files.

Seams: I want to ...
    read another protocol             Web.read, and what `meet` makes of it
    give a request another deadline   a queue of Web, its function below, and `wait_in` in sniroute_requests
    say more of each request          Web.tell, and Access of sniroute_log

This room imports sniroute_requests, sniroute_http2, sniroute_spares, sniroute_gateway, sniroute_answers,
sniroute_connection, sniroute_flow, sniroute_http, sniroute_log, sniroute_names and sniroute_refusals; sniroute_tls
where a route asks for it.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from sniroute_answers import refusal
from sniroute_connection import UNHEARD, Connection
from sniroute_flow import BLOCKED
from sniroute_gateway import Policy, may_ask_again
from sniroute_http import Request, parse_request
from sniroute_http2 import GREETING, PREFACE, Authority, awaits_settings, parse_authority
from sniroute_http2 import refusal as refusal_in_http2
from sniroute_log import CLIENT_LEFT, IDLE, STOPPED, Access, log_access
from sniroute_names import parse_host_port, parse_ip
from sniroute_refusals import HTTP, TELLERS, Malformed, Refused
from sniroute_requests import FORWARD_TLS, MODES, PASS, REFUSE, Exchange, HttpConnection, take_over, target_of
from sniroute_spares import SAFE, Spares

if TYPE_CHECKING:
    from sniroute_router import Router
    from sniroute_routes import Decision, Route
    from sniroute_settings import Settings
    from sniroute_tls import TlsClient, TlsClients
    from sniroute_wire import Prelude

__version__ = "0.1.0"

monotonic = time.monotonic

LEFT_PATIENCE = 30.0  # seconds until a client that has ended, and has had no byte of its answer, counts as gone

UNGREETED = Authority("", 0, 0, "", b"")  # a client that speaks HTTP/2, and waits for the server to begin
NO_POLICY: tuple[Route | None, Policy] = None, Policy()

# For who is refused while its first request is read.  Here, as the page is an option: without it there is no such row.
TELLERS[HTTP] = lambda refused, minor: refusal(refused, None)


class PassedConnection(Connection):
    """A client whose first request says where it leads; after that nothing is looked at."""

    __slots__ = ("request",)

    def __init__(self, former: Connection, request: Request | None, name: str):
        for slot in Connection.__slots__:
            setattr(self, slot, getattr(former, slot))
        self.request = request  # None: it speaks HTTP/2
        self.name = name
        take_over(self, former, former.router.pipes.flow)

    def begin(self, prelude: Prelude | None, decision: Decision) -> None:
        """Go where the route leads; `prelude`: what has read the first bytes, where that was not Web.find."""
        try:
            if prelude is not None:
                self._take_prelude(prelude)
            self.replayable = self.request is not None and len(self.hello) == self.request.head.end \
                and may_ask_again(self.request)
            self._admit(decision)
        except Refused as error:
            self.refuse(error)

    def _open(self, said: bytes, sent: int) -> None:
        """As the base; but an answer has no deadline as that of a TLS server has: it may be a long poll."""
        super()._open(said, sent)
        if self.state in UNHEARD and self.queue is not None:
            self.leave_queue()

    def refuse(self, error: Refused) -> None:
        """As the base, with a page; in HTTP/2 with GOAWAY."""
        if not error.farewell and self.request is not None:
            error.farewell = refusal(error, self.request)
        elif not error.farewell:
            error.farewell = refusal_in_http2(error)
        super().refuse(error)


# -- what all of them share --------------------------------------------------------------------


class Web:
    """What a router's clients that ask in plain HTTP share.  Loop only."""

    def __init__(self, router: Router, settings: Settings):
        self.router = router
        self.settings = settings
        loop = router.loop
        # Deadlines; a client stands in one at most, and `adopt` sets their seconds.  In this order: for a request to
        # begin, for the rest of its head, for more of its body, for an answer, for one whose client has ended.
        self.idle = loop.queue(0.0, lambda connection: connection.close(IDLE))
        self.heads = loop.queue(0.0, late_head)
        self.bodies = loop.queue(0.0, late_body)
        self.answers = loop.queue(0.0, late_answer)
        self.leaving = loop.queue(LEFT_PATIENCE, has_left)
        self.spares = Spares(loop)
        self.adopt(settings)

    def adopt(self, settings: Settings) -> None:
        """Go on with other settings."""
        former, self.settings = self.settings, settings
        if settings.forwarded_from != former.forwarded_from:
            for connection in self.router.connections:
                if isinstance(connection, HttpConnection):
                    connection.believes = self.believed(peer_of(connection))
        self.idle.seconds = self.bodies.seconds = settings.http_idle
        self.heads.seconds = settings.http_head_timeout
        self.answers.seconds = settings.http_response_timeout
        self.policies: dict[str, tuple[Route | None, Policy]] = {}  # with their route, by its pattern
        self.tls_clients: TlsClients | None = None
        self.spares.close()

    def policy(self, decision: Decision) -> Policy:
        """What a route says about plain HTTP.  Made once for each route."""
        route = decision.route
        known, policy = self.policies.get(route.pattern, NO_POLICY)
        if known is not route:  # a connection may still be on its way that older settings have decided
            # The very objects of MODES and SAFE, not equal ones: they are compared by `is` with each request.
            mode = next(mode for mode in MODES if mode == (route.http or self.settings.http))
            reuse = SAFE if route.http_reuse == SAFE else route.http_reuse
            guards = route.refuses_cross_site or route.cross_site is None and self.settings.on_loopback \
                and any(row.guards_pages for row in route.kinds)
            policy = Policy(
                mode, route.verify, guards,
                frozenset(each.encode("ascii") for each in route.upgrades), reuse, route.redirect_port)
            self.policies[route.pattern] = route, policy
        return policy

    def host(self, decision: Decision) -> bytes:
        """The Host that is sent on; b"": as it came."""
        if decision.host == "backend":  # where that is a HOST:PORT, and one
            return decision.rest.encode("ascii") if decision.target.startswith("tcp:") else b""
        return decision.host.encode("ascii")

    def tls(self, exchange: Exchange) -> TlsClient:
        """TLS with the backend of a request, which is asked for by the Host that it gets.  Raises Refused."""
        if self.tls_clients is None:
            from sniroute_tls import TlsClients  # imported late: only where a route asks for it
            self.tls_clients = TlsClients()
        return self.tls_clients.begin(*self.key(exchange))

    def key(self, exchange: Exchange) -> tuple[str, str | bool]:
        """Which name a backend has to prove by TLS, to whom."""
        host = self.host(exchange.decision).decode("ascii")
        if exchange.decision.host == "backend" and host:
            host, _ = parse_host_port(host)
        return host or exchange.request.name, exchange.policy.verify

    def believed(self, address: str) -> bool:
        """Whether what this peer says of others is believed: whether it is in --forwarded-from."""
        networks = self.settings.forwarded_from
        if not networks:
            return False
        ip = parse_ip(address)
        return any(ip in network for network in networks)

    # -- clients

    def find(self, data: bytes) -> Request | None:
        """A first request that is all there, with nothing before it; None for anything else, right or wrong."""
        try:
            return parse_request(data)
        except Malformed:
            return None

    def read(self, data: bytearray, seen: int) -> Request | Authority | None:
        """`requests` of a Prelude: the first request of a client, or UNGREETED.  Raises Refused."""
        if data[:2] != PREFACE[:2] or data[:len(PREFACE)] != PREFACE[:len(data)]:
            return parse_request(data, seen)
        found = self.read_http2(data, seen, False)
        return UNGREETED if found is None and awaits_settings(data) else found

    def read_http2(self, data: bytearray, seen: int, greeted: bool = True) -> Authority | None:
        """As `read`, for a client that speaks HTTP/2; `greeted` as in `parse_authority`.  Raises Refused."""
        try:
            return parse_authority(data, seen, greeted)
        except Refused as error:
            error.farewell = refusal_in_http2(error)
            raise

    def meet(self, connection: Connection, asked: Request | Authority) -> bool:
        """Take what `read` has returned.  Returns whether the client has to say more before it can be served."""
        if asked is UNGREETED:
            connection.prelude.requests = self.read_http2
            with contextlib.suppress(OSError):  # the next read says so
                connection.client.send(GREETING)  # a few bytes into an empty buffer: it took them all
            return True
        self.serve(connection, asked)
        return False

    def serve(self, connection: Connection, asked: Request | Authority) -> None:
        """As `meet`, for one that has said enough: by the mode of its route, an heir goes on with it."""
        request = asked if isinstance(asked, Request) else None
        mode = "forward"  # where it is refused below: `begin` of an HttpConnection meets the same, and has the page
        try:
            decision = self.router.decide(asked.name or None)
            mode = self.policy(decision).mode
            if request is None and mode not in (PASS, REFUSE):
                raise Refused("bad_request", f"{asked.name} is not served in HTTP/2", status=505)
        except Refused as error:
            if request is None:
                connection.name = asked.name
                error.farewell = refusal_in_http2(error)
                connection.refuse(error)
                return
        if mode is REFUSE:
            connection.prelude = connection.hello = None  # as ever: without a word
            connection.refuse(Malformed(f"not TLS: HTTP, which is not served for {asked.name}", kind="not_tls"))
            return
        prelude = connection.prelude
        if mode is PASS:
            if request is None:
                del prelude.data[slice(*asked.ack)]  # it acknowledges our GREETING: the backend has sent none
            PassedConnection(connection, request, asked.name).begin(prelude, decision)
            return
        heir = HttpConnection(connection, self)
        try:
            if prelude is not None:
                heir._take_prelude(prelude)
        except Refused as error:
            heir.refuse(error)
            return
        # `hello` is what came from the client; in an HttpConnection it is a request as its backend gets it.
        heir.received, data, heir.hello = heir.preface.header, heir.hello, None
        heir.up.total += len(data)
        try:
            heir.begin(request, data[request.head.end:])
        except Exception:
            self.router.fault(heir)  # the loop knows the former one only

    def tell(self, connection: HttpConnection, exchange: Exchange, reason: str = "", detail: str | None = None) -> None:
        """A request is over: write its line.  `reason` and `detail` are those of Access."""
        connection.exchange = None
        now, request, decision = monotonic(), exchange.request, exchange.decision
        log_access(self.router, Access(
            time.time(), connection.address, *described(request), exchange.status, exchange.up, exchange.down,
            exchange.first - exchange.began if exchange.first else None, now - exchange.began,
            decision and decision.route.pattern,
            decision and target_of(connection, decision),
            reason, detail))

    def drain(self) -> None:
        """No new clients come: those that have had their answers are not waited for."""
        for connection in list(self.idle.due):
            connection.close(STOPPED)
        self.spares.close()


def prepare_tls(settings: Settings) -> None:
    """Read the certificates that backends are held against, before `Web.tls` asks for them.  Raises OSError."""
    verified = {route.verify for route in settings.routes.routes if (route.http or settings.http) == FORWARD_TLS}
    if verified:
        from sniroute_tls import context  # imported late: only where a route asks for it
        for verify in verified:
            context(verify)


def described(request: Request | None) -> tuple[str, str, str]:
    """Method, host and path of a request, for people; its query may hold secrets."""
    if request is None:
        return "", "", ""
    return request.method, request.name, request.path.partition(b"?")[0].decode("latin-1")


def peer_of(connection: HttpConnection) -> str:
    """The address of a client's connection, whatever a PROXY header says of it."""
    try:
        return connection.client.getpeername()[0].removeprefix("::ffff:")
    except OSError:  # it has broken off
        return connection.address[0]


def late_head(connection: HttpConnection) -> None:
    """A later request has begun, and is not whole in time."""
    connection.refuse(Refused("late_head", "the head of the request did not come in time"))


def late_body(connection: HttpConnection) -> None:
    """It is time to see whether a request's body still comes."""
    exchange = connection.exchange
    if exchange.up != exchange.mark or connection.up.state is BLOCKED:  # no client's fault where the backend is slow
        exchange.mark = exchange.up
        connection.wait_in(connection.web.bodies)
    else:
        connection.refuse(Refused("late_body", "the body of the request stopped coming"))


def late_answer(connection: HttpConnection) -> None:
    """The backend has had its time."""
    target = target_of(connection, connection.decision)
    connection.refuse(Refused("late_answer", f"{target}: no answer within http_response_timeout"))


def has_left(connection: HttpConnection) -> None:
    """The client has ended a while ago, and its answer has not begun."""
    if connection.exchange is not None and connection.exchange.response is None:
        connection.close(CLIENT_LEFT)
