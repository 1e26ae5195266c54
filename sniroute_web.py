"""sniroute_web: a client that asks in plain HTTP: its requests, one after another.

    Prelude --- Web.read ---> Request --- Web.meet ---> by the route's `http`
                                                          pass      PassedConnection: as any client; all that it says is raw
                                                          others    HttpConnection: each request finds its own route

    BETWEEN -- a head --> begin -- MODES --> redirect: answered here
       ^                    | forward, forward-tls
       |                    +- the backend of the last request will do -----------+
       |                    +- else ROUTED, PARKED, DIALING, GREETING, as ever ---+--> the request goes out
       |                                                                          |
       +------- finish <------ message_sent (down) <--- the answer's body <--- backend_said: its head

One connection leads to one backend at a time, and belongs to one client.  The next request uses it where it leads to
the same place; else that is dialled.  Pipelined requests wait until the one before is answered.

Each request has an Exchange: what was asked, and how far that has come.  What the client says goes by `up`, the answer
by `down` (MessageFlow of sniroute_bodies).  `hello` is the request as the backend gets it, as long as it can be sent
again: a Connection sends it to the next backend, or once more, just as a TLS hello.

After a 101 both flows are raw, and the connection is like any other.

What nobody else says: an answer that was cut is never whole, so a client whose answer cannot go on is reset; after an
answer of ours that refuses, the connection closes, and nothing of it is read as a request.

Threads: the loop only.

Seams: I want to ...
    do something else with a request    a row in MODES; what it may say, and what is added: sniroute_gateway
    answer otherwise                    sniroute_answers
    wait for something else             a queue of Web

It imports bodies, gateway, answers, connection, resets, targets, flow, http, log, loop, names and refusals; tls where a
route asks for it.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any, Callable

from sniroute_answers import options, redirect, refusal
from sniroute_bodies import HELD, MessageFlow
from sniroute_connection import BETWEEN, CLOSED, DIALING, ROUTED, UNHEARD, WAITING_FOR_BACKEND, Connection, Preface
from sniroute_flow import BLOCKED, DONE, EARLY, GREETING, MESSAGE, NO_FLOW, OPEN, UNANSWERED
from sniroute_gateway import Policy, check, choose_upgrade, hop, max_forwards, may_ask_again
from sniroute_http import (CHUNKED, COUNTED, NO_BODY, NONE, UNTIL_CLOSE, Counted, Request, Response, open_body, parse_request, parse_response,
                           pass_request, pass_response)
from sniroute_log import (BACKEND_CLOSED, CLIENT_CLOSED, CLIENT_LEFT, CLIENT_RESET, CUT, IDLE, STOPPED, Access,
                          log_access)
from sniroute_loop import WRITE
from sniroute_names import parse_ip
from sniroute_refusals import HTTP, TELLERS, Malformed, Refused
from sniroute_resets import RESETTING, pass_on_reset
from sniroute_targets import Another

if TYPE_CHECKING:
    from sniroute_router import Router
    from sniroute_routes import Decision
    from sniroute_settings import Settings
    from sniroute_tls import Cipher, Ciphers

__version__ = "0.1.0"

monotonic = time.monotonic

# Limits, each with its reason.
AHEAD_MAX = 32768  # bytes of later requests that are read while one is answered: one head has room
REPLAYED_MAX = 65536  # bytes of a request that are kept, to be sent again
INTERIM_MAX = 100  # answers with 1xx before the real one: a backend may say that it still works, and not for ever

TELLERS[HTTP] = lambda refused, minor: refusal(refused, None)

LEFT_PATIENCE = 30.0  # seconds until a client that has ended, and has had no byte of its answer, counts as gone
CLOSE: tuple[tuple[bytes, bytes], ...] = ((b"Connection", b"close"),)
KEEP_ALIVE = ((b"Connection", b"keep-alive"),)  # HTTP/1.0 has to be told
NOTHING = Counted(0, "bad_request", False)  # the body of a message without one: it never changes
NOTHING_ADDED: tuple[tuple[bytes, bytes], ...] = ()
BACKEND = "backend"  # the option `host`: as the target has it
SILENT, RAW, BY_TLS = "refuse", "pass", "forward-tls"  # modes that are asked for by name; see MODES


class Exchange:
    """One request, and how far it and its answer have come."""

    __slots__ = ("request", "policy", "decision", "began", "first", "response", "status", "up", "down", "interim",
                 "upgrade", "keeps", "is_asked", "is_reused", "is_spoilt")

    def __init__(self, request: Request | None):
        self.request = request  # None: it could not be read
        self.policy: Policy | None = None
        self.decision: Decision | None = None
        self.began = monotonic()
        self.first = 0.0  # clock time of the first byte of the answer; 0: it has not come
        self.response: Response | None = None  # the answer's head, once it has been sent
        self.status = 0
        self.up = 0  # bytes of the request's body
        self.down = 0  # bytes of the answer's body
        self.interim = 0  # answers with 1xx so far
        self.upgrade = b""  # the protocol that the backend is offered
        self.keeps = False  # the client may ask again behind this
        self.is_asked = False  # the backend has all of the request
        self.is_reused = False  # it went out on a connection that has served before, and may be dead
        self.is_spoilt = False  # the backend said more than the answer


class HttpConnection(Connection):
    """A client that asks in plain HTTP.  It takes the place of the Connection that read its first request."""

    __slots__ = ("web", "exchange", "ahead", "seen", "stash", "received", "cipher", "believes", "port", "has_ended")

    up: MessageFlow
    down: MessageFlow

    def __init__(self, former: Connection, web: Web):
        for slot in Connection.__slots__:
            setattr(self, slot, getattr(former, slot))
        self.web = web
        self.exchange: Exchange | None = None  # the request that is under way
        self.ahead: bytes | bytearray = b""  # what the client has said behind it
        self.seen = 0  # bytes of `ahead`, or of `stash`, in which no head has ended
        self.stash: bytes | bytearray = b""  # a part of the answer's head
        self.received = b""  # the PROXY header of the client
        self.cipher: Cipher | None = None  # where the backend speaks TLS
        self.has_ended = False  # the client asks no more
        self.port = former.client.getsockname()[1]
        self.believes = web.believed(former.address[0])  # the peer, not the one that a PROXY header names
        take_over(self, former, MessageFlow)

    # -- requests

    def begin(self, request: Request, rest: bytes | bytearray) -> None:
        """A request is there; `rest` came behind its head.  Find out what becomes of it."""
        self.exchange = exchange = Exchange(request)
        self.name = request.name
        self.ahead, self.seen = rest, 0
        try:
            if not request.name:
                raise Malformed("no Host", kind="bad_request")
            exchange.decision = decision = self.router.decide(request.name)
            exchange.policy = policy = self.web.policy(decision)
            check(request, policy)
            MODES[policy.mode](self, exchange, decision)
        except Refused as error:
            self.refuse(error)

    def forward(self, exchange: Exchange, decision: Decision) -> None:
        """Send the request to where its route leads.  Raises Refused."""
        policy = exchange.policy
        request = max_forwards(exchange.request)
        if request is None:
            self.say(options(), 200)
            return
        exchange.upgrade = upgrade = choose_upgrade(request, policy)
        head = pass_request(request, hop(request, self.address[0], self.port, self.believes),
                            host=self.web.host(policy, decision), believes=self.believes, upgrade=upgrade)
        self.hello = head
        self.replayable = True
        self.up.body = body = open_body(request) if request.framing is not NO_BODY else NOTHING
        if self.ahead and not body.is_done:
            rest, self.ahead = self.ahead, b""
            self.keep(*body.feed(rest), rest)
        if decision is self.decision and self.down.source is not None:
            self.ask_again()
        else:
            self.go(decision)

    def keep(self, parts: list[memoryview], used: int, data: bytes | bytearray) -> None:
        """Of `data`, these parts belong to the request, whose backend is not there yet; what is behind `used`, to the next."""
        before = len(self.hello)
        self.hello = b"".join((self.hello, *parts))
        self.exchange.up += len(self.hello) - before
        self.ahead = data[used:]

    def go(self, decision: Decision) -> None:
        """Have the backend dialled.  Raises Refused."""
        self.leave_backend()
        self.leave_route()
        self.preface = Preface(self.received, b"")
        self.retried, self.parks = False, 0
        self._admit(decision)
        if self.queue is not None:
            self.leave_queue()

    def leave_route(self) -> None:
        """What it has carried so far counts as its route's; the next route begins at nothing."""
        decision = self.decision
        if decision is None:
            return
        up, down, counters, tally = self.up, self.down, self.router.counters, decision.tally
        tally.active -= self.admitted
        tally.total += self.admitted
        self.admitted = False
        tally.up += up.total
        tally.down += down.total
        counters["bytes_up"] += up.total
        counters["bytes_down"] += down.total
        up.total = down.total = 0

    def leave_backend(self) -> None:
        """Close the connection to the backend, if there is one."""
        if self.backend is not None or self.down.source is not None:
            self._drop_backend()
            self.backend = None

    def ask_again(self) -> None:
        """Send the request on the connection that the last one has left."""
        exchange, down = self.exchange, self.down
        self.replayable = may_ask_again(exchange.request) and len(self.hello) <= REPLAYED_MAX
        if not self.replayable and has_news(down.source):
            self.ask_elsewhere()
            return
        exchange.is_reused = True
        said = self.hello if self.cipher is None else self.cipher.seal(self.hello)
        try:
            sent = down.source.send(said)
        except BlockingIOError:
            sent = 0
        except OSError:  # it has ended, and took nothing
            self.ask_elsewhere()
            return
        self.state = OPEN
        if self.queue is not None:
            self.leave_queue()
        if sent == len(said) and self.up.body is NOTHING:  # as `go_on`: both flows are as they have to be
            if not self.replayable:
                self.hello = None
            self.message_sent(self.up)
        else:
            self.go_on(said, sent)

    def ask_elsewhere(self) -> None:
        """The connection that served before has ended without a byte of the answer: dial a new one, once."""
        self.router.counters["retries"] += 1
        self.exchange.is_reused = False
        self.leave_backend()
        self.replayable = True  # the new one has had nothing
        self.state = ROUTED
        self.router.to_dial.append(self)
        self.router.loop.hurry()

    # -- on the way to the backend

    def connect(self, why: str) -> None:
        """As the base; a backend that speaks TLS is greeted first."""
        super().connect(why)
        if self.state is DIALING and self.cipher is None and self.exchange.policy.mode is BY_TLS:
            try:
                self.cipher = self.web.cipher(self.exchange)
            except Refused as error:
                self.refuse(error)
            else:
                self.preface = self.preface._replace(question=self.cipher.hello())

    def on_ssl_answer(self, mask: int) -> None:
        """The backend's side of the handshake."""
        if self.state is not GREETING:
            return
        server, cipher = self.down.source, self.cipher
        try:
            data = server.recv(MESSAGE)
            if not data:
                self.backend_failed("it closed the connection in the TLS handshake")
                return
            said = cipher.answer(data)
            if cipher.is_ready:
                said += cipher.seal(self.hello)
                self._open(said, server.send(said))
            elif said:
                server.send(said)  # a few bytes into an empty buffer: it took them all
        except BlockingIOError:
            pass
        except Refused as error:
            error = Refused(error.kind, f"{self.backend.target}: {error}")
            if self.backend.goes_on(error):
                self._drop_backend()
                self.obey(Another())
            else:
                self.refuse(error)
        except OSError as error:
            self.backend_failed(error.strerror)

    def on_waiting(self, mask: int) -> None:
        """As the base: what belongs to the request is kept with it, what is behind it waits."""
        if self.state not in WAITING_FOR_BACKEND:
            return
        body = self.up.body
        if len(self.ahead) >= AHEAD_MAX or len(self.hello) >= REPLAYED_MAX:
            self.up.wait_for(0)  # enough: the rest waits in the kernel
            return
        data = self.up.read(MESSAGE)
        if data is None:
            return
        if body.is_done:
            self.ahead += data
            return
        try:
            self.keep(*body.feed(data), data)
        except Malformed as error:
            self.refuse(error)

    def _open(self, said: bytes, sent: int) -> None:
        """The backend has `sent` bytes of what it is told: see to the rest of the request, and hear the answer."""
        if not may_ask_again(self.exchange.request):
            self.replayable = False
        if self.queue is not None:
            self.leave_queue()
        greeting = b""
        if self.backend.proves():
            self.state = OPEN
            self.replayable = False
            self.backend = self.backend.settled()
            if self.backend is not None:
                greeting = self.backend.greeting
        else:
            self.state = UNANSWERED if self.replayable else EARLY
        self.go_on(said, sent)
        if greeting and self.state is not CLOSED:
            self.backend_said(greeting)

    def go_on(self, said: bytes, sent: int) -> None:
        """A part of the request is under way: see to the rest, and hear the answer."""
        up, down = self.up, self.down
        self.stash, self.seen = b"", 0
        if not self.replayable:
            self.hello = None
        up.state, down.state = DONE if self.has_ended else OPEN, OPEN
        down.take(MessageFlow.hear)
        if sent != len(said):
            up.hold(memoryview(said)[sent:])
        is_whole = up.body.is_done
        up.take(MessageFlow.hear if is_whole else MessageFlow.carry)
        up.listen()
        down.listen()
        if not is_whole:
            self.wait_in(self.web.bodies)
        elif up.state is not BLOCKED:
            self.message_sent(up)

    # -- what the flows meet

    def client_said(self, data: bytes) -> None:
        """What is no part of a body: a request, or what comes after the one that is under way."""
        self.ahead = self.ahead + data if self.ahead else data
        if self.state is BETWEEN:
            self.next()
        elif len(self.ahead) >= AHEAD_MAX:
            self.up.state = HELD
            self.up.rewatch()

    def next(self) -> None:
        """The client may ask again, and perhaps it has."""
        web, ahead = self.web, self.ahead
        if isinstance(ahead, bytes) and self.seen:
            self.ahead = ahead = bytearray(ahead)  # it comes in pieces: add to it, instead of copying it
        try:
            request = parse_request(ahead, self.seen) if ahead else None
        except Malformed as error:
            self.refuse(error)
            return
        if request is not None:
            self.begin(request, ahead[request.head.end:])
            return
        self.seen = len(ahead)
        queue = web.heads if ahead else web.idle
        if self.queue is not queue:
            self.wait_in(queue)

    def backend_said(self, data: bytes) -> None:
        """A part of the answer's head; or what nobody has asked for."""
        exchange = self.exchange
        if exchange is None:
            self.forget_backend()
            return
        if self.state in UNHEARD:
            self.state = OPEN
            self.backend.answered()
        self.hello, self.replayable = None, False  # what was asked is not asked again
        if self.queue is self.web.answers:
            self.leave_queue()
        stash = self.stash = self.stash + data if self.stash else data
        while True:
            try:
                response = parse_response(stash, exchange.request.method, (exchange.upgrade,), self.seen)
            except Malformed as error:
                self.refuse(Refused(error.kind, f"{self.target()}: {error}"))
                return
            if response is None:
                self.seen = len(stash)
                self.stash = stash if isinstance(stash, bytearray) else bytearray(stash)
                return
            rest = bytes(stash[response.head.end:])
            self.stash, self.seen = b"", 0
            if not response.is_interim:
                break
            exchange.interim += 1
            if exchange.interim > INTERIM_MAX:
                self.refuse(Refused("bad_answer", f"{self.target()}: more than {INTERIM_MAX} answers with 1xx"))
                return
            if exchange.request.version and not self.down.put(pass_response(response)):
                return
            if not rest:
                return
            stash = self.stash = rest
        if response.upgrade:
            self.switch(response, rest)
        else:
            self.answer(response, rest)

    def answer(self, response: Response, rest: bytes) -> None:
        """The answer's head is there; `rest` came behind it."""
        exchange, down = self.exchange, self.down
        request, kind = exchange.request, response.framing.kind
        is_old = not request.version
        is_unframed = is_old and kind is CHUNKED
        exchange.response, exchange.status, exchange.first = response, response.status, monotonic()
        exchange.keeps = keeps = (request.keeps and exchange.is_asked and kind is not UNTIL_CLOSE and not is_unframed
                                  and not self.has_ended and not self.router.deaf.is_set())
        add = NOTHING_ADDED if keeps and not is_old else KEEP_ALIVE if keeps else CLOSE
        head = pass_response(response, add, unframed=is_unframed)
        if response.framing.length == len(rest) and kind in (NONE, COUNTED):  # all of it came with its head
            exchange.down = len(rest)
            down.body = NOTHING
            if down.put(head + rest) and down.state is not BLOCKED:
                self.message_sent(down)
            return
        down.body = open_body(response, is_unframed)
        down.take(MessageFlow.carry)
        down.feed(rest, head)

    def carried_on(self, flow: MessageFlow, count: int, said: bytes = b"") -> None:
        """So many bytes of a body have been passed on: `said`, where they were seen."""
        exchange = self.exchange
        if flow is self.down:
            exchange.down += count
            return
        exchange.up += count
        if self.replayable:
            self.hello += said
            if len(self.hello) > REPLAYED_MAX:
                self.hello, self.replayable = None, False
                self.state = EARLY if self.state is UNANSWERED else self.state

    def behind(self, flow: MessageFlow, data: bytes) -> None:
        """This came behind a body: of a client, its next request; a backend has nothing more to say."""
        if flow is self.up:
            self.ahead = data
        else:
            self.exchange.is_spoilt = True

    def message_sent(self, flow: MessageFlow) -> None:
        """A message is all on its way."""
        flow.body = None
        if flow is self.down:
            self.finish()
            return
        self.exchange.is_asked = True
        flow.take(MessageFlow.hear)
        web = self.web
        if web.answers.seconds:
            self.wait_in(web.answers)
        elif self.queue is not None:
            self.leave_queue()

    def finish(self) -> None:
        """The client has its answer: wait for the next request, or close."""
        exchange, up, down = self.exchange, self.up, self.down
        self.web.tell(self, exchange)
        if not exchange.keeps:
            self._linger(b"", CLIENT_CLOSED if self.has_ended or not exchange.request.keeps else BACKEND_CLOSED)
            return
        if exchange.response.keeps and not exchange.is_spoilt and exchange.policy.reuse != "off" and down.state is OPEN:
            down.take(MessageFlow.hear)
        else:
            self.leave_backend()
        self.state = BETWEEN
        if up.state is not OPEN:
            up.state = OPEN
            up.rewatch()
        self.next()

    def switch(self, response: Response, rest: bytes) -> None:
        """Both sides speak another protocol from here on: its bytes are passed as they are."""
        exchange, up, down = self.exchange, self.up, self.down
        exchange.response, exchange.status, exchange.first = response, response.status, monotonic()
        exchange.up, exchange.down = -up.total, len(rest) - down.total  # `close` adds what there is then
        if self.queue is not None:
            self.leave_queue()
        ahead, self.ahead = bytes(self.ahead), b""
        for flow in (up, down):
            flow.body = None
            flow.take(MessageFlow.raw)
        if up.state is HELD:
            up.state = OPEN
        if down.put(pass_response(response) + rest) and (not ahead or up.put(ahead)):
            up.rewatch()
            down.rewatch()
            if self.has_ended:
                super().ended(up)

    def ended(self, flow: MessageFlow) -> None:
        """The source has ended."""
        if flow.step is MessageFlow.raw:
            if flow is self.up and self.cipher is not None:
                flow.put(self.cipher.close())
            super().ended(flow)
        elif flow is self.down:
            self.backend_ended(None)
        elif self.state is BETWEEN:
            self.close(CLIENT_CLOSED)
        elif flow.body is not None and not flow.body.is_done:
            self.close(CLIENT_LEFT)  # what it has sent must not look whole
        else:
            self.has_ended = True
            flow.wait_for(0)
            if self.state not in WAITING_FOR_BACKEND:
                flow.state = DONE
                flow.rewatch()
            if self.exchange.response is None and self.queue is None:
                self.wait_in(self.web.leaving)

    def failed(self, flow: MessageFlow, error: OSError) -> None:
        """The source has broken off."""
        if flow.step is MessageFlow.raw:
            super().failed(flow, error)
        elif flow is self.down:
            self.backend_ended(error)
        else:
            self.close(CLIENT_RESET)

    def backend_ended(self, error: OSError | None) -> None:
        """The backend has ended, or broken off with an error."""
        exchange, down = self.exchange, self.down
        if exchange is None:
            self.forget_backend()
        elif exchange.response is not None:
            try:
                if error is not None or down.body is None:
                    raise Malformed("it broke off", kind="bad_answer")
                down.body.end()
            except Malformed:
                self.cut()
            else:
                self.message_sent(down)
        elif self.stash or exchange.interim:
            self.refuse(Refused("bad_answer", f"{self.target()}: it ended within its answer"))
        elif exchange.is_reused and self.replayable:
            self.ask_elsewhere()
        else:
            why = error.strerror if error is not None else "it closed the connection without an answer"
            if self.state in UNHEARD:
                self.backend_failed(why)
            else:
                self.refuse(Refused("backend", f"{self.target()}: {why}"))

    def broken(self, flow: MessageFlow) -> None:
        """The sink has broken off."""
        if flow.step is MessageFlow.raw:
            super().broken(flow)
        elif flow is self.down or self.state is RESETTING:
            self.close(self.reason if self.state is RESETTING else CLIENT_RESET)
        else:
            # The backend takes no more of the request: perhaps it has answered already.  What it said is still to be read.
            flow.discard(OPEN)
            flow.take(MessageFlow.forget)
            flow.rewatch()
            flow.twin.rewatch()

    def spoilt(self, flow: MessageFlow, error: Malformed) -> None:
        """A body that is broken."""
        if flow is self.up:
            self.refuse(error)
        else:
            self.cut()

    def forget_backend(self) -> None:
        """The backend has ended a connection on which nothing is asked, or says something there."""
        self.leave_backend()
        self.up.state = OPEN

    # -- the end

    def target(self) -> str:
        """Which backend it is, for people."""
        decision = self.decision if self.exchange is None else self.exchange.decision
        return self.backend.target if self.backend is not None else decision.target

    def say(self, answer: bytes, status: int) -> None:
        """Give an answer of our own, and close."""
        exchange = self.exchange
        exchange.status, exchange.first = status, monotonic()
        self.web.tell(self, exchange)
        self._linger(answer, CLIENT_CLOSED)

    def refuse(self, error: Refused) -> None:
        """As the base, with a page; where an answer has begun, it is cut."""
        exchange = self.exchange
        if exchange is not None and exchange.response is not None or self.down.pending is not None:
            self.refusal = error
            self.cut()
            return
        if exchange is None:
            exchange = Exchange(None)
        self.refusal = error
        self.router.waits.leave(self)
        exchange.status, exchange.first = error.status, monotonic()
        self.web.tell(self, exchange, error.kind, str(error))
        self._linger(error.farewell or refusal(error, exchange.request), error.kind)

    def cut(self) -> None:
        """The answer cannot go on: the client gets what there is of it, then a reset."""
        exchange = self.exchange
        if exchange is not None:
            self.web.tell(self, exchange, self.refusal.kind if self.refusal else CUT)
        pass_on_reset(self, self.down, read=True)

    def _hang_up(self) -> None:
        self.cipher = None
        super()._hang_up()

    def close(self, reason: str) -> None:
        """As the base; a request that is under way has come to nothing."""
        exchange = self.exchange
        if exchange is not None and exchange.status == 101:
            exchange.up += self.up.total
            exchange.down += self.down.total
            self.web.tell(self, exchange)
        elif exchange is not None:
            self.web.tell(self, exchange, reason)
        super().close(reason)


class PassedConnection(Connection):
    """A client whose first request says where it leads; after that nothing is looked at."""

    __slots__ = ("request",)

    def __init__(self, former: Connection, request: Request | None, name: str):
        for slot in Connection.__slots__:
            setattr(self, slot, getattr(former, slot))
        self.request = request  # None: it speaks HTTP/2
        self.name = name
        take_over(self, former, former.router.pipes.flow)

    def _open(self, said: bytes, sent: int) -> None:
        """As the base; but the first byte of an answer may take as long as it likes."""
        super()._open(said, sent)
        if self.state in UNHEARD and self.queue is not None:
            self.leave_queue()

    def refuse(self, error: Refused) -> None:
        """As the base, with a page."""
        if self.request is not None and not error.farewell:
            error.farewell = refusal(error, self.request)
        super().refuse(error)


def take_over(heir: Connection, former: Connection, flow: Callable[[Connection, Any], Any]) -> None:
    """Go on in the place of another connection, with flows of its own."""
    router = heir.router
    router.connections.discard(former)
    router.connections.add(heir)
    if former.queue is not None:
        former.leave_queue()
    heir.queue = None
    up, down = flow(heir, router.loop.poller), flow(heir, router.loop.poller)
    up.twin, down.twin = down, up
    old = former.up
    up.source, up.fd, up.events, up.total = old.source, old.fd, old.events, old.total
    old.source, old.events = None, 0
    heir.up, heir.down = up, down
    former.state, former.prelude = CLOSED, None
    former.up.connection = former.down.connection = None  # no cycles: nothing is left to the collector
    former.up.twin = former.down.twin = NO_FLOW
    former.up = former.down = None


def has_news(sock: socket.SocketType) -> bool:
    """Whether a connection that should be silent has ended, or says something."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


# -- what becomes of a request -----------------------------------------------------------------


def answer_redirect(connection: HttpConnection, exchange: Exchange, decision: Decision) -> None:
    """The same name, by https."""
    connection.say(redirect(exchange.request, connection.name, connection.port, exchange.policy.redirect_port), 308)


def misdirect(connection: HttpConnection, exchange: Exchange, decision: Decision) -> None:
    """A later request, for a name that is not to be had on a connection that has asked for another one.  Raises Refused."""
    raise Refused("bad_request", f"{connection.name} is not served on a connection that asked for another name",
                  status=421)


MODES: dict[str, Callable[[HttpConnection, Exchange, Decision], None]] = {
    "forward": HttpConnection.forward, BY_TLS: HttpConnection.forward, "redirect": answer_redirect,
    SILENT: misdirect, RAW: misdirect,  # of a first request: Web.meet
}


# -- what all of them share --------------------------------------------------------------------


class Web:
    """What a router's clients that ask in plain HTTP share.  Loop only."""

    def __init__(self, router: Router, settings: Settings):
        self.router = router
        loop = router.loop
        self.idle = loop.queue(0.0, lambda connection: connection.close(IDLE))
        self.heads = loop.queue(0.0, late_head)
        self.bodies = loop.queue(0.0, late_body)
        self.answers = loop.queue(0.0, late_answer)
        self.leaving = loop.queue(LEFT_PATIENCE, has_left)
        self.adopt(settings)

    def adopt(self, settings: Settings) -> None:
        """Go on with other settings."""
        self.settings = settings
        self.idle.seconds = self.bodies.seconds = settings.http_idle
        self.heads.seconds = settings.http_head_timeout
        self.answers.seconds = settings.http_response_timeout
        self.policies: dict[str, Policy] = {}  # by the pattern of their route
        self.ciphers: Ciphers | None = None

    def policy(self, decision: Decision) -> Policy:
        """What a route says about plain HTTP."""
        route = decision.route
        policy = self.policies.get(route.pattern)
        if policy is None:
            mode = next(mode for mode in MODES if mode == (route.http or self.settings.http))
            policy = self.policies[route.pattern] = Policy(
                mode, route.verify, route.host.encode("ascii"), route.refuses_cross_site,
                frozenset(each.encode("ascii") for each in route.upgrades), route.http_reuse, route.redirect_port)
        return policy

    def host(self, policy: Policy, decision: Decision) -> bytes:
        """The Host that is sent on; b"": as it came."""
        if policy.host == b"backend":
            return decision.rest.encode("ascii") if decision.rest.rpartition(":")[1] else b""
        return policy.host

    def cipher(self, exchange: Exchange) -> Cipher:
        """A conversation by TLS with the backend of a request."""
        if self.ciphers is None:
            from sniroute_tls import Ciphers  # imported late: only where a route asks for it
            self.ciphers = Ciphers()
        host = self.host(exchange.policy, exchange.decision).decode("ascii").rpartition(":")[0]
        return self.ciphers.begin(host or exchange.request.name, exchange.policy.verify)

    def believed(self, address: str) -> bool:
        """Whether what a peer says of others is believed."""
        networks = self.settings.forwarded_from
        if not networks:
            return False
        ip = parse_ip(address)
        return any(ip in network for network in networks)

    # -- clients

    def read(self, data: bytearray, seen: int) -> Request | None:
        """`requests` of a Prelude: the first request of a client.  Raises Malformed."""
        return parse_request(data, seen)

    def meet(self, connection: Connection, request: Request) -> None:
        """A client has asked for the first time."""
        mode = "forward"
        try:
            decision = self.router.decide(request.name)
            mode = self.policy(decision).mode
        except Refused:
            pass  # with a page
        if mode is SILENT:
            connection.prelude = None  # as ever: without a word
            connection.refuse(Malformed(f"not TLS: HTTP, which is not served for {request.name}", kind="not_tls"))
            return
        prelude = connection.prelude
        heir = PassedConnection(connection, request, request.name) if mode is RAW else HttpConnection(connection, self)
        try:
            heir._take_prelude(prelude)
            if mode is RAW:
                heir.replayable = may_ask_again(request) and len(heir.hello) == request.head.end
                heir._admit(decision)
                return
        except Refused as error:
            heir.refuse(error)
            return
        heir.received, data, heir.hello = heir.preface.header, heir.hello, None
        heir.up.total += len(data)
        try:
            heir.begin(request, data[request.head.end:])
        except Exception:
            self.router.fault(heir)  # the loop knows the former one only

    def tell(self, connection: HttpConnection, exchange: Exchange, reason: str = "", detail: str | None = None) -> None:
        """A request is over."""
        connection.exchange = None
        now, request, decision = monotonic(), exchange.request, exchange.decision
        log_access(self.router, Access(
            time.time(), connection.address, *asked(request), exchange.status, exchange.up, exchange.down,
            exchange.first - exchange.began if exchange.first else None, now - exchange.began,
            decision and decision.route.pattern,
            connection.backend.target if connection.backend is not None else decision and decision.target,
            reason, detail))

    def drain(self) -> None:
        """No new clients come: those that have had their answers are not waited for."""
        for connection in list(self.idle.due):
            connection.close(STOPPED)


def asked(request: Request | None) -> tuple[str, str, str]:
    """Method, host and path of a request, for people; its query may hold secrets."""
    if request is None:
        return "", "", ""
    return request.method, request.name, request.path.partition(b"?")[0].decode("latin-1")


def late_head(connection: HttpConnection) -> None:
    """A later request has begun, and is not whole in time."""
    connection.refuse(Refused("late_head", "the head of the request did not come in time"))


def late_body(connection: HttpConnection) -> None:
    """It is time to see whether a request's body still comes."""
    up = connection.up
    if up.total != connection.carried or up.state is BLOCKED:  # a backend that does not take it is not the client's fault
        connection.carried = up.total
        connection.wait_in(connection.web.bodies)
    else:
        connection.refuse(Refused("late_body", "the body of the request stopped coming"))


def late_answer(connection: HttpConnection) -> None:
    """The backend has had its time."""
    connection.refuse(Refused("late_answer", f"{connection.target()}: no answer within http_response_timeout"))


def has_left(connection: HttpConnection) -> None:
    """The client has ended a while ago, and its answer has not begun."""
    if connection.exchange is not None and connection.exchange.response is None:
        connection.close(CLIENT_LEFT)
