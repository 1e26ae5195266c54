"""sniroute_requests: a client that asks in plain HTTP: its requests, one after another.

    BETWEEN -- a head --> begin -- MODES --> redirect: answered here
       ^                    | forward, forward-tls
       |                    +- the backend of the last request will do -----------+
       |                    +- else ROUTED, PARKED, DIALING, GREETING, as ever ---+--> the request goes out
       |                                                                          |
       +------- finish <------ message_sent (down) <--- the answer's body <--- backend_said: its head
                                                                                     | 101
    any -- refuse --> no answer has begun: a page, LINGERING                         +---> switch: both flows are raw
                      one has: cut, RESETTING

The states are those of Connection; BETWEEN is here alone, and GREETING is the TLS handshake with the backend.

One connection leads to one backend at a time.  The next request uses that where it leads to the same place; else
another one is dialled.  Pipelined requests wait until the one before is answered.

Each request has an Exchange: what was asked, and how far that has come.  What the client says goes by `up`, the answer
by `down` (MessageFlow of sniroute_bodies).  What has come and is not used yet stands in two slots: `ahead`, of the
client, behind the request that is under way; `stash`, of the backend, a head that is not whole.  `hello` is the request
as the backend gets it, as long as it can be sent again (`replayable`): so a Connection sends it to the next backend, or
once more, just as a TLS hello.

After a 101 both flows are raw, and the connection is like any other.

An answer that was cut never looks whole: a client whose answer cannot go on is reset.  After an answer of ours that
refuses, the connection closes, and nothing that comes behind is read as a request.

Threads: the loop only.

Seams: I want to ...
    do something else with a request    a function as `answer_redirect`, its row in MODES and in HTTP_MODES of
                                        sniroute_options; what a request may say, and what is added: sniroute_gateway
    answer otherwise                    sniroute_answers; `say` sends it, and closes
    wait for something else             a queue of Web (sniroute_web), and `wait_in`
    keep a connection to a backend,     `leave_backend` and `go`; `may_give` and `may_share` say for whom
    or not

This room imports sniroute_bodies, sniroute_spares, sniroute_gateway, sniroute_answers, sniroute_connection,
sniroute_deadlines, sniroute_resets, sniroute_targets, sniroute_flow, sniroute_http, sniroute_log, sniroute_loop and
sniroute_refusals.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Callable

from sniroute_answers import options, redirect, refusal
from sniroute_bodies import HELD, MessageFlow
from sniroute_connection import (BETWEEN, CLOSED, DIALING, ROUTED, UNHEARD, WAITING_FOR_BACKEND, WAITING_MAX,
                                 Connection, Preface)
from sniroute_deadlines import wait_for_exit
from sniroute_flow import BLOCKED, BROKEN, DONE, EARLY, GREETING, MESSAGE, NO_FLOW, OPEN, UNANSWERED
from sniroute_gateway import Policy, check, choose_upgrade, hop, max_forwards, may_ask_again
from sniroute_http import (CHUNKED, COUNTED, NO_BODY, NONE, UNTIL_CLOSE, Counted, Request, Response, open_body,
                           parse_request, parse_response, pass_request, pass_response)
from sniroute_log import BACKEND_CLOSED, CLIENT_CLOSED, CLIENT_LEFT, CLIENT_RESET, CUT
from sniroute_loop import READ
from sniroute_refusals import Malformed, Refused
from sniroute_resets import RESETTING, pass_on_reset
from sniroute_spares import SAFE, has_news, has_said_more, is_personal, may_give, may_share
from sniroute_targets import Another

if TYPE_CHECKING:
    from sniroute_routes import Decision
    from sniroute_tls import TlsClient
    from sniroute_web import Web

__version__ = "0.1.0"

monotonic = time.monotonic

# Limits, each with its reason.
AHEAD_MAX = MESSAGE  # bytes of later requests that are read while one is answered; the rest waits in the kernel
REPLAYED_MAX = WAITING_MAX  # bytes of a request that are kept, to be sent again: a hello may have so many, too
INTERIM_MAX = 100  # answers with 1xx before the final one: a backend may say that it still works, and not for ever

CLOSE: tuple[tuple[bytes, bytes], ...] = ((b"Connection", b"close"),)
KEEP_ALIVE = ((b"Connection", b"keep-alive"),)  # HTTP/1.0 has to be told
NOTHING_ADDED: tuple[tuple[bytes, bytes], ...] = ()
EMPTY_BODY = Counted(0, "bad_request", False)  # the body of a message without one: it never changes
# Values that are compared by `is` (Web.policy sees to that): rows of MODES.
REFUSE, PASS, FORWARD_TLS = "refuse", "pass", "forward-tls"


class Exchange:
    """One request, and how far it and its answer have come."""

    __slots__ = ("request", "policy", "decision", "began", "first", "response", "status", "up", "down", "interim",
                 "upgrade", "keeps", "is_asked", "is_reused", "is_spoilt", "is_broken", "mark")

    def __init__(self, request: Request | None, began: float):
        self.request = request  # None: it could not be read
        self.policy: Policy | None = None
        self.decision: Decision | None = None
        self.began = began  # clock time of its first byte
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
        self.is_broken = False  # its backend has broken off, and reading from it will not say so
        self.mark = -1  # `up` when `late_body` last looked: a body that has stopped has not grown since


class HttpConnection(Connection):
    """A client that asks in plain HTTP.  It takes the place of the Connection that read its first request."""

    __slots__ = ("web", "exchange", "ahead", "seen", "stash", "received", "tls", "believes", "port", "has_ended",
                 "answered_once", "is_private", "since")

    greets_by = "the hello of TLS"
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
        self.since = former.began  # clock time of the first byte of the request that comes
        self.received = b""  # the client's PROXY header as it came: each backend may be told (send_proxy)
        self.tls: TlsClient | None = None  # where the backend speaks TLS
        self.has_ended = False  # the client has ended its side within a request: it asks no more
        self.answered_once = False  # it has had an answer of a backend
        self.is_private = False  # the connection to the backend may be tied to one user, or is not fit for others
        self.port = former.client.getsockname()[1]
        self.believes = web.believed(former.address[0])  # the peer, not the one that a PROXY header names
        take_over(self, former, MessageFlow)

    # -- requests

    def begin(self, request: Request, rest: bytes | bytearray) -> None:
        """A request is there; `rest` came behind its head.  Find out what becomes of it; here it is refused, too."""
        self.exchange = exchange = Exchange(request, self.since)
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
            say(self, options(), 200)
            return
        exchange.upgrade = upgrade = choose_upgrade(request, policy)
        head = pass_request(request, hop(request, self.address[0], self.port, self.believes),
                            host=self.web.host(decision), believes=self.believes, upgrade=upgrade)
        self.hello = head
        self.replayable = True
        self.up.body = body = open_body(request) if request.framing is not NO_BODY else EMPTY_BODY
        if self.ahead and not body.is_done:
            rest, self.ahead = self.ahead, b""
            self.keep(*body.feed(rest), rest)
        if decision is self.decision and self.down.source is not None:
            self.reuse_backend()
        else:
            self.go(decision)

    def keep(self, parts: list[memoryview], used: int, data: bytes | bytearray) -> None:
        """Of `data`, these parts are the request's, whose backend is not there yet; behind `used` is the next one."""
        before = len(self.hello)
        self.hello = b"".join((self.hello, *parts))
        self.exchange.up += len(self.hello) - before
        self.ahead = data[used:]

    def go(self, decision: Decision) -> None:
        """Have the backend dialled, or take a connection to it that another client has left.  Raises Refused."""
        self.leave_backend()
        leave_route(self)
        self.preface = Preface(self.received, b"")
        self.retried, self.parks = False, 0
        self._admit(decision)
        self.pause()
        if self.queue is not None:
            self.leave_queue()
        if self.exchange.policy.reuse is SAFE and may_share(self):
            by_tls = self.web.key(self.exchange) if self.exchange.policy.mode is FORWARD_TLS else None
            spare = self.web.spares.take((decision.key, by_tls))
            if spare is not None:
                self.down.source, self.down.fd = spare.sock, spare.fd
                self.backend, self.tls = spare.backend, spare.tls
                self.up.state = self.down.state = OPEN
                self.down.take(MessageFlow.hear)
                self.down.listen()
                self.up.listen()
                self.reuse_backend()

    def pause(self) -> None:
        """There is no backend: what the client says in this turn of the loop is not for the former one.

        Nor for the descriptor that it had, which may be another client's by now.
        """
        if self.up.events:
            self.up.wait_for(READ, self.on_waiting)

    def leave_backend(self) -> None:
        """Give the connection to the backend away (Spares), or close it, if there is one."""
        down = self.down
        if down.source is not None and self.state is BETWEEN and may_give(self):
            down.wait_for(0)
            down.discard()
            by_tls = self.tls and self.tls.key
            self.web.spares.give((self.decision.key, by_tls), down.source, self.backend, self.tls)
            down.source = self.tls = None
        elif self.backend is not None or down.source is not None:
            self.drop_backend()
        self.backend, self.is_private = None, False

    def reuse_backend(self) -> None:
        """Send the request on the connection to the backend that is there: it has served before."""
        exchange, down = self.exchange, self.down
        self.replayable = may_ask_again(exchange.request) and len(self.hello) <= REPLAYED_MAX
        if not self.replayable and has_news(down.source):
            self.ask_elsewhere()
            return
        exchange.is_reused = True
        said = self.hello
        try:
            if self.tls is not None:
                said = self.tls.seal(said)
            sent = down.source.send(said)
        except BlockingIOError:
            sent = 0
        except OSError:  # it has ended, and took nothing
            self.ask_elsewhere()
            return
        self.state = OPEN
        if self.queue is not None:
            self.leave_queue()
        if sent == len(said) and self.up.body is EMPTY_BODY:  # as `go_on`: both flows are as they have to be
            if not self.replayable:
                self.hello = None
            self.message_sent(self.up)
        else:
            self.go_on(said, sent)

    def ask_elsewhere(self) -> None:
        """The connection that served before has ended without a byte of the answer: dial a new one, once."""
        self.router.counters["retries"] += 1
        self.exchange.is_reused = False
        self.drop_backend()
        self.backend, self.is_private = None, False
        self.replayable = True  # the new one has had nothing
        self.state = ROUTED
        self.pause()
        self.router.to_dial.append(self)
        self.router.loop.hurry()

    # -- on the way to the backend

    def connect(self, why: str) -> None:
        """As the base; a backend that speaks TLS is sent a ClientHello first."""
        super().connect(why)
        if self.state is DIALING and self.tls is None and self.exchange.policy.mode is FORWARD_TLS:
            try:
                self.tls = self.web.tls(self.exchange)
            except Refused as error:
                self.refuse(error)
            else:
                self.preface = self.preface._replace(question=self.tls.hello())

    def on_ssl_answer(self, mask: int) -> None:
        """What the backend says in the TLS handshake; where that is over, the request goes out."""
        if self.state is not GREETING:
            return
        server, tls = self.down.source, self.tls
        try:
            data = server.recv(MESSAGE)
            if not data:
                self.backend_failed("it closed the connection in the TLS handshake")
                return
            said = tls.answer(data)
            if tls.is_ready:
                said += tls.seal(self.hello)
                self._open(said, server.send(said))
                if self.state is not CLOSED:
                    self.down.drain()  # what came with the end of the handshake: no event tells of it
            elif said:
                server.send(said)  # a few bytes into an empty buffer: it took them all
        except BlockingIOError:
            pass
        except Refused as error:
            error = Refused("backend_tls", f"{self.backend.target}: {error}")
            if self.backend.goes_on(error):
                self.drop_backend()
                self.obey(Another())
            else:
                self.refuse(error)
        except OSError as error:
            self.backend_failed(error.strerror)

    def on_waiting(self, mask: int) -> None:
        """As the base: what belongs to the request is kept with it, what is behind it waits."""
        if self.state is not ROUTED and self.state not in WAITING_FOR_BACKEND:
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
        self.exchange.is_asked = self.exchange.is_broken = False
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
        if self.state is BETWEEN:
            if self.ahead:
                self.ahead += data
            else:
                self.ahead, self.since = data, monotonic()
            self.next()
            return
        self.ahead = self.ahead + data if self.ahead else data
        if len(self.ahead) >= AHEAD_MAX:
            self.up.state = HELD
            self.up.rewatch()

    def next(self) -> None:
        """Begin with the next request, if its head is there; else wait for it."""
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
        """A part of an answer's head; or what nobody has asked for."""
        exchange = self.exchange
        if exchange is None:
            self.forget_backend()
            return
        if self.state in UNHEARD:
            self.state = OPEN
            self.backend.answered()
        self.hello, self.replayable = None, False  # what was asked is not asked again
        if self.up.state is BROKEN:
            self.up.state = OPEN
            self.up.rewatch()
        stash = self.stash = self.stash + data if self.stash else data
        while True:
            try:
                response = parse_response(stash, exchange.request.method, (exchange.upgrade,), self.seen)
            except Malformed as error:
                self.refuse(Refused("bad_answer", f"{target_of(self, self.decision)}: {error}"))
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
                self.refuse(Refused("bad_answer", f"{target_of(self, self.decision)}: {INTERIM_MAX} answers with 1xx"))
                return
            if exchange.request.version and not self.down.put(pass_response(response)):
                return
            stash = self.stash = rest
            if not rest or self.down.state is BLOCKED:
                return  # to be called again
        if response.upgrade and not exchange.is_asked:
            self.refuse(Refused("bad_answer", f"{target_of(self, self.decision)}: a 101 before all of the request"))
        elif response.upgrade:
            switch(self, response, rest)
        else:
            self.answer(response, rest)

    def answer(self, response: Response, rest: bytes) -> None:
        """The answer's head is there; `rest` came behind it."""
        exchange, down = self.exchange, self.down
        if self.queue is not None:  # of the request's body, too: from here on both sides set the pace
            self.leave_queue()
        request, kind = exchange.request, response.framing.kind
        is_old = not request.version
        is_unframed = is_old and kind is CHUNKED
        exchange.response, exchange.status, exchange.first = response, response.status, monotonic()
        # Behind an upgrade that was declined, the client may have said what is no HTTP.
        exchange.keeps = keeps = (request.keeps and exchange.is_asked and kind is not UNTIL_CLOSE and not is_unframed
                                  and not exchange.upgrade and (not self.has_ended or bool(self.ahead))
                                  and not self.router.deaf.is_set())
        add = NOTHING_ADDED if keeps and not is_old else KEEP_ALIVE if keeps else CLOSE
        head = pass_response(response, add, unframed=is_old)
        if response.framing.length == len(rest) and kind in (NONE, COUNTED):  # all of it came with its head
            exchange.down = len(rest)
            down.body = EMPTY_BODY
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

    def message_sent(self, flow: MessageFlow) -> None:
        """A message is all on its way to the sink of `flow`."""
        if flow is self.down:
            flow.body = None
            self.finish()
            return
        flow.body = EMPTY_BODY  # more that comes is none of it, also where all of it has to be sent again
        self.exchange.is_asked = True
        flow.take(MessageFlow.hear)
        web, is_unanswered = self.web, self.exchange.response is None
        if is_unanswered and web.answers.seconds:
            self.wait_in(web.answers)
        elif is_unanswered and self.has_ended:
            self.wait_in(web.leaving)
        elif self.queue is not None:
            self.leave_queue()

    def finish(self) -> None:
        """The client has its answer: wait for the next request, or close."""
        exchange, up, down = self.exchange, self.up, self.down
        self.web.tell(self, exchange)
        self.answered_once = True
        if exchange.policy.reuse is SAFE:
            self.is_private = (self.is_private or exchange.is_spoilt or not exchange.response.keeps
                               or is_personal(exchange))
        if not exchange.keeps and not exchange.request.keeps and exchange.is_asked and not self.ahead:
            self.state = BETWEEN
            self.close(CLIENT_CLOSED)  # it says no more, so nothing can come that makes a reset of the close
            return
        if not exchange.keeps:
            self.linger(b"", CLIENT_CLOSED if self.has_ended or not exchange.request.keeps else BACKEND_CLOSED)
            return
        # Where the next request is here, no event has told of what came behind the answer.
        is_fit = exchange.response.keeps and not exchange.is_spoilt and exchange.policy.reuse != "off"
        if is_fit and down.state is OPEN and not (self.ahead and has_said_more(self)):
            down.take(MessageFlow.hear)
        else:
            self.leave_backend()
        self.state = BETWEEN
        if up.state is not OPEN:
            up.state = OPEN
            up.rewatch()
        if self.ahead:
            self.since = monotonic()
        self.next()

    def ended(self, flow: MessageFlow) -> None:
        """The source has ended."""
        if flow.step is MessageFlow.raw:
            if flow is self.down or self.tls is None or say_end(self):
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
            is_lost = exchange.response.framing.kind is UNTIL_CLOSE and self.backend is not None \
                and self.backend.is_lost()
            if is_lost is None and error is None:
                wait_for_exit(self)
                return
            try:
                if error is not None or is_lost or exchange.is_broken or down.body is None:
                    raise Malformed("it broke off", kind="bad_answer")
                down.body.end()
            except Malformed:
                self.cut()
            else:
                self.message_sent(down)
        elif self.stash or exchange.interim:
            self.refuse(Refused("bad_answer", f"{target_of(self, self.decision)}: it ended within its answer"))
        elif exchange.is_reused and self.replayable:
            self.ask_elsewhere()
        else:
            why = error.strerror if error is not None else "it closed the connection without an answer"
            if self.state in UNHEARD:
                self.backend_failed(why)
            else:
                self.refuse(Refused("backend", f"{target_of(self, self.decision)}: {why}"))

    def broken(self, flow: MessageFlow) -> None:
        """The sink has broken off."""
        if flow.step is MessageFlow.raw:
            super().broken(flow)
        elif flow is self.down or self.state is RESETTING:
            self.close(self.reason if self.state is RESETTING else CLIENT_RESET)
        else:
            # The backend takes no more of the request.  Perhaps it has answered: what it said is still to be read.
            # If not, all of the request may be sent again, so none of it is forgotten until then.
            # EPIPE comes where it had ended before, and TLS tells an end from a cut.
            exchange = self.exchange
            exchange.is_broken = self.tls is None and not isinstance(sys.exception(), BrokenPipeError)
            exchange.is_asked = exchange.keeps = False  # a part of the next request may be forgotten, too
            flow.discard(BROKEN if self.replayable else OPEN)
            flow.take(MessageFlow.forget)
            flow.rewatch()
            flow.twin.rewatch()

    def forget_backend(self) -> None:
        """Let go of a backend that has ended between two requests, or says what nobody has asked for."""
        self.is_private = True  # what comes behind that is no answer for others
        self.leave_backend()
        self.up.state = OPEN

    # -- the end

    def refuse(self, error: Refused) -> None:
        """As the base, with a page.  Where an answer has begun, it is cut."""
        exchange = self.exchange
        if exchange is not None and exchange.response is not None or self.down.pending is not None:
            self.refusal = error.with_traceback(None)
            self.cut()
            return
        if exchange is None:
            exchange = Exchange(None, self.since)
        self.refusal = error.with_traceback(None)  # its frames know this connection: that were a cycle
        self.router.waits.leave(self)
        exchange.status, exchange.first = error.status, monotonic()
        self.web.tell(self, exchange, error.kind, str(error))
        self.linger(error.farewell or refusal(error, exchange.request), error.kind)

    def cut(self) -> None:
        """The answer cannot go on: the client gets what there is of it, then a reset."""
        exchange = self.exchange
        if exchange is not None:
            self.web.tell(self, exchange, self.refusal.kind if self.refusal else CUT)
        pass_on_reset(self, self.down, read=True)

    def _hang_up(self) -> None:
        self.tls = None
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
        elif self.state is BETWEEN:
            self.leave_backend()
        super().close(reason)


def leave_route(connection: HttpConnection) -> None:
    """What it has carried so far counts as its route's; the next route begins at nothing."""
    decision = connection.decision
    if decision is None:
        return
    up, down, counters, tally = connection.up, connection.down, connection.router.counters, decision.tally
    tally.active -= connection.admitted
    tally.total += connection.admitted
    connection.admitted = False
    tally.up += up.total
    tally.down += down.total
    counters["bytes_up"] += up.total
    counters["bytes_down"] += down.total
    up.total = down.total = 0


def target_of(connection: HttpConnection, decision: Decision) -> str:
    """Which backend it is, or would be, for people."""
    return connection.backend.target if connection.backend is not None else decision.target


def say_end(connection: HttpConnection) -> bool:
    """Tell a backend that speaks TLS that no more comes; False where it cannot be told yet, or is gone."""
    up, tls = connection.up, connection.tls
    if tls.is_dry:
        return up.write(tls.close()) and up.state is not BLOCKED
    connection.has_ended = True
    up.state = HELD  # `drain` goes on
    up.rewatch()
    return False


def say(connection: HttpConnection, answer: bytes, status: int) -> None:
    """Give an answer of our own, and close."""
    exchange = connection.exchange
    exchange.status, exchange.first = status, monotonic()
    connection.web.tell(connection, exchange)
    connection.linger(answer, CLIENT_CLOSED)


def switch(connection: HttpConnection, response: Response, rest: bytes) -> None:
    """A 101: both sides speak another protocol from here on, whose bytes are passed as they are."""
    exchange, up, down = connection.exchange, connection.up, connection.down
    exchange.response, exchange.status, exchange.first = response, response.status, monotonic()
    exchange.up, exchange.down = -up.total, len(rest) - down.total  # `close` adds what there is then
    if connection.queue is not None:
        connection.leave_queue()
    ahead, connection.ahead = bytes(connection.ahead), b""
    for flow in (up, down):
        flow.body = None
        flow.take(MessageFlow.raw)
    if up.state is HELD:
        up.state = OPEN
    if down.put(pass_response(response) + rest) and (not ahead or up.put(ahead)):
        up.rewatch()
        down.rewatch()
        if connection.has_ended:
            connection.ended(up)


def take_over(heir: Connection, former: Connection, flow: Callable[[Connection, Any], Any]) -> None:
    """Have the heir go on in the place of a former connection, whose slots it has: with the client's socket, in new
    flows that `flow(heir, poller)` makes.  The former one is of no use afterwards.
    """
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


# -- what becomes of a request -----------------------------------------------------------------


def answer_redirect(connection: HttpConnection, exchange: Exchange, decision: Decision) -> None:
    """Answer that the same name is served by https."""
    say(connection, redirect(exchange.request, connection.name, connection.port, exchange.policy.redirect_port), 308)


def misdirect(connection: HttpConnection, exchange: Exchange, decision: Decision) -> None:
    """A later request, for a name that is not served on a connection that has asked for another.  Raises Refused."""
    raise Refused("bad_request", f"{connection.name} is not served on a connection that asked for another name",
                  status=421)


# What is done with a request, by the `http` of its route; each may raise Refused.  For people: HTTP_MODES.
MODES: dict[str, Callable[[HttpConnection, Exchange, Decision], None]] = {
    "forward": HttpConnection.forward, FORWARD_TLS: HttpConnection.forward, "redirect": answer_redirect,
    REFUSE: misdirect, PASS: misdirect,  # a first request does not come here: Web.serve
}
