"""sniroute_connection: one client, from accept to close.

    PRELUDE, HEADER -> ROUTED -> (PARKED -> ROUTED ->) DIALING -> (GREETING ->) (UNANSWERED -> (EARLY ->)) OPEN
    OPEN -> CLOSED                     plain HTTP: OPEN -> BETWEEN -> OPEN, or ROUTED for another backend, or CLOSED
    any -> (COURTESY ->) LINGERING -> CLOSED         EARLY, OPEN -> RESETTING -> CLOSED

      PRELUDE     the client says its name; one deadline from accept on, however many packets it takes
      HEADER      a port with one target only: its target is known; a PROXY header may come first, or has to
      ROUTED      its target is known, and is dialled in the same turn of the loop
      PARKED      it waits, with all that want the same: for its target, for the last words of a tunnel that failed, or
                  for room on one of several backends
      DIALING     the connect is under way; over by the end of the turn where it succeeds at once, as on loopback.
                  Where it is silent for a while, other addresses are tried beside it: a Race has the sockets then
      GREETING    `preface.question` has to be answered before the hello goes out: a PostgreSQL backend was asked for
                  TLS; with http = forward-tls it is the TLS handshake
      UNANSWERED  a tunnel, or one of several backends: it took the hello, and has not said a byte.  If it fails now, a
                  tunnel is sent the same bytes once more, or the next backend gets them; the client never notices:
                  -> PARKED
      EARLY       the same, and the client has said more than the hello (0-RTT): nothing can be sent again
      OPEN        two flows pass bytes, until both sides have ended; in plain HTTP until the answer is over
      BETWEEN     plain HTTP only (sniroute_requests): the client has all its answers, and may ask again
      RESETTING   one side has broken off: the other gets what that said before, then a reset
      COURTESY    with --error-pages: it is refused, and a thread of sniroute_browsers shows its browser a page
      LINGERING   after a refusal: the client may still read

`on_prelude`, `dial` and `speak` are steps of a turn: the loop runs each of them for all connections that have come so
far, then the next (see Loop.batch).  A connection never asks what kind its target is: its Backend is told what
happens, and says what is to be done.

Threads: the loop only.

Seams: I want to ...
    let a connection wait for something else     a queue in Deadlines of sniroute_deadlines, and `wait_in`
    end a connection otherwise                   a word in ENDINGS of sniroute_log, and `close`; sniroute_resets
    skip the prelude                             `route_to`, as `read_header` of sniroute_header does
    serve what begins otherwise than with TLS    a subclass that takes its place, as in sniroute_web
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from sniroute_deadlines import out_of_descriptors, wait_for_exit, wait_for_room
from sniroute_flow import (BROKEN, DONE, EARLY, ENDING, GREETING, MESSAGE, NO_FLOW, OPEN, READ_MAX, UNANSWERED,
                           Flow)
from sniroute_header import PRELUDES_MAX, believe, first_answer, first_words, learn
from sniroute_log import BACKEND_CLOSED, CLIENT_CLOSED, CLIENT_LEFT
from sniroute_loop import READ, WRITE, Queue
from sniroute_names import parse_ip
from sniroute_refusals import NOTHING, TLS, Malformed, Refused, told
from sniroute_resets import RESETTING, is_unheard, pass_on_reset, will_reset
from sniroute_targets import Another, Backend, Doubt, NotYet, Unreachable, Verdict
from sniroute_wire import PROXY_WRITERS, SSL_REQUEST_BYTES, TLS_HANDSHAKE, Hello, Prelude, ProxyHeader

if TYPE_CHECKING:
    from sniroute_routes import Decision
    from sniroute_processes import Child
    from sniroute_router import Peer, Router, Wait

__version__ = "0.1.0"

log = logging.getLogger("sniroute")
monotonic = time.monotonic

# Limits, each with its reason.  Times in seconds.
# A hello takes its size twice, once with and once without record headers.  So 1,024 preludes hold 64 MiB at most while
# each is up to LARGE_HELLO, and the few that may have more hold 8 MiB.
LARGE_HELLO = 32768  # bytes; nearly all are smaller than 3,000
LARGE_HELLOS_MAX = 64  # clients with more than that, until their backend answers; over it the oldest goes
WAITING_MAX = 32768  # bytes that a client may say while it waits for its backend, the hello among them
PARKS_MAX = 3  # times a connection may wait: its tunnel could be evicted as often as it comes up

PRELUDE, ROUTED, PARKED = "prelude", "routed", "parked"  # and HEADER
DIALING = "dialing"  # behind it GREETING
LINGERING, CLOSED = "lingering", "closed"  # and RESETTING, COURTESY
WAITING_FOR_BACKEND = (PARKED, DIALING, GREETING)  # states in which the client has nobody to talk to
ABANDONED = (DIALING, GREETING, UNANSWERED)  # states in which a close leaves a backend that has not answered
UNHEARD = (UNANSWERED, EARLY)  # states in which the backend has not said a byte yet
PASSING = (OPEN, EARLY)  # states in which both sides may end
BETWEEN = "between"  # of an HttpConnection
# States in which a close is an end.  In PASSING it is one where both sides have ended; in all others it is a reset.
ORDERLY = (PRELUDE, LINGERING, BETWEEN)

# errno values of send() that mean "the connect is not over"; the last is BSD's.
NOT_CONNECTED = frozenset((errno.EAGAIN, errno.EALREADY, errno.EINPROGRESS, errno.ENOTCONN))


class Preface(NamedTuple):
    """What the backend is told before the hello.  One object is shared by all that have nothing to tell."""

    header: bytes  # a PROXY header
    question: bytes  # goes behind it, and is answered before the hello goes: an SSLRequest, or a ClientHello of ours


NO_PREFACE = Preface(b"", b"")


class Connection:
    """One client.  Its two sockets are `up.source` (the client's) and `down.source` (the backend's); it closes both."""

    greets_by = "SSLRequest"  # what the backend is asked in GREETING, for people

    __slots__ = ("router", "client", "address", "peer", "state", "began", "prelude", "name", "decision", "backend",
                 "preface", "hello", "replayable", "retried", "parks", "wait", "up", "down", "queue", "refusal",
                 "reason", "carried", "quiet_since", "dialled", "proxy", "admitted")

    def __init__(self, router: Router, client: socket.SocketType, address: tuple[str, int], peer: Peer):
        self.router = router
        self.client = client
        self.address = address
        self.peer = peer
        self.state = PRELUDE
        self.began = monotonic()
        self.prelude: Prelude | None = None  # only where the first bytes are not all of a hello
        self.name: str | None = None
        self.decision: Decision | None = None
        self.backend: Backend | None = None
        self.proxy: ProxyHeader | None = None  # the client's, where it is believed
        self.preface = NO_PREFACE  # what the backend is told first
        self.dialled = 0.0  # clock time of its last dial
        self.admitted = False  # it counts among its route's
        self.hello: bytes | None = None  # the ClientHello and what followed, until a byte has passed either way
        self.replayable = False  # `hello` is all the client has said: it can be sent again
        self.retried = False
        self.parks = 0  # times it waited; RESETTING: times it was looked at
        self.wait: Wait | None = None
        flow = router.pipes.flow
        self.up: Flow = flow(self, router.loop.poller)
        self.down: Flow = flow(self, router.loop.poller)
        self.up.twin, self.down.twin = self.down, self.up
        self.up.source, self.up.fd = client, client.fileno()
        self.queue: Queue | None = None  # the deadline that it stands in
        self.refusal: Refused | None = None
        self.reason = ""  # why it ends, while it lingers
        self.carried = 0  # bytes at the last sweep; RESETTING: those that had arrived at the last look
        self.quiet_since = self.began
        router.connections.add(self)
        peer.count += 1

    # -- deadlines

    def wait_in(self, queue: Queue) -> None:
        """Stand in the queue of a deadline, and in no other."""
        if self.queue is not None:
            self.queue.drop(self)
        self.queue = queue
        queue.put(self)

    def leave_queue(self) -> None:
        """Have no deadline."""
        if self.queue is not None:
            self.queue.drop(self)
            self.queue = None

    # -- the prelude

    def on_prelude(self, mask: int = READ) -> None:
        """Read what the client says before it can be routed.

        In the turn of its accept it is a step: the hello is often there.
        """
        if self.state is not PRELUDE:
            return
        verdict = None
        try:
            data = os.read(self.up.fd, MESSAGE)
            if not data:
                raise Malformed("the client left in the middle of its prelude", kind="truncated")
            verdict = self._parse(data)
            if isinstance(verdict, bytes):
                answer_now(self.client, verdict)
                verdict = None
        except Refused as error:
            self.refuse(error)
            return
        except BlockingIOError:
            pass
        except OSError:
            self.refuse(Refused("truncated", "the client reset the connection"))
            return
        if isinstance(verdict, Hello):
            self._route(verdict)
        elif (verdict is None or self.router.web.meet(self, verdict)) and not self.up.events:
            self.wait_in(self.router.deadlines.prelude)
            self.up.wait_for(READ, self.on_prelude)
            if len(self.router.deadlines.prelude.due) > PRELUDES_MAX:
                self.router.shed()

    def _parse(self, data: bytes) -> Any:
        """Read the first bytes: a whole hello, or request, directly; all else by a Prelude.

        Returns what `Prelude.feed` does, and raises as that does.
        """
        if self.prelude is None:
            web = self.router.web
            if self.peer.policy != "require":
                self.hello = data  # before it is parsed: an alert for a broken one has its version
                found = self.router.hellos.find(data) if web is None or data[0] == TLS_HANDSHAKE else web.find(data)
                if found is not None:
                    return found
                self.hello = None
            self.prelude = Prelude(self.peer.policy, self.peer.local, self.router.hellos, web and web.read)
        found = self.prelude.feed(data)
        if len(self.prelude.data) > LARGE_HELLO >= len(self.prelude.data) - len(data):  # it has just become one
            make_room(self)
        return found

    def _route(self, hello: Hello) -> None:
        """The name is known: decide where it leads, and go there."""
        router = self.router
        self.name = hello.name
        if router.level <= logging.DEBUG:
            log.debug("%s:%d says hello: name %s, ALPN %s, %d bytes", *self.address, hello.name, hello.alpn, hello.end)
        try:
            if self.prelude is not None:
                self._take_prelude(self.prelude)
            self.replayable = hello.end == len(self.hello)
            self._admit(router.decide(hello.name))
        except Refused as error:
            self.refuse(error)
            return
        if self.queue is not None:
            self.leave_queue()

    def route_to(self, decision: Decision) -> None:
        """Go where the listener leads, with what has been read so far."""
        self.hello = b""
        self.state = ROUTED  # a refusal is a reset: nobody knows what it speaks, and an end might be an answer to it
        if self.queue is not None:
            self.leave_queue()
        try:
            if self.prelude is not None:
                self._take_prelude(self.prelude)
            self.replayable = not self.hello  # a command in it may have been done, and must not be done twice
            self._admit(decision)
        except Refused as error:
            self.refuse(error)

    def _take_prelude(self, prelude: Prelude) -> None:
        """Take over what the prelude has found out.  Raises Refused."""
        self.prelude = None
        self.hello = bytes(prelude.data)
        self.preface = Preface(prelude.header, SSL_REQUEST_BYTES if prelude.ssl else b"")
        if prelude.proxy is not None:
            believe(self, prelude.proxy)

    def _admit(self, decision: Decision) -> None:
        """Have it dialled in this turn, where the route's options let the client in.  Raises Refused."""
        self.decision = decision
        if not decision.plain:
            self._obey_route(decision)
        self.admitted = True
        decision.tally.active += 1
        self.state = ROUTED
        self.router.to_dial.append(self)

    def _obey_route(self, decision: Decision) -> None:
        """Do what the route asks for beside its target.  Raises Refused."""
        route = decision.route
        if route.allow is not None:
            address = parse_ip(self.address[0])
            if not any(address in network for network in route.allow):
                raise Refused("not_allowed", f"{route.pattern} does not allow {address}")
        if route.max_connections is not None and decision.tally.active >= route.max_connections:
            raise Refused("route_limit", f"{route.pattern} has {route.max_connections} connections")
        if route.send_proxy == "as-received":
            return
        write, written = PROXY_WRITERS[route.send_proxy], b""
        if write is not None:
            header = self.proxy
            source = None if header is not None and header.source is None else self.address
            destination = header and header.destination or self.client.getsockname()[:2]
            written = write(source, destination)
        self.preface = self.preface._replace(header=written)

    # -- on the way to the backend

    def dial(self) -> None:
        """Connect to the backend, or wait until that can be done."""
        if self.state is not ROUTED:
            return  # something in this turn has ended it
        decision = self.decision
        try:
            scheme = decision.scheme
            self.backend = scheme.choose(self) if scheme.choose else scheme.ready(self.router.targets, decision)
        except Refused as error:
            self.refuse(error)
            return
        if self.backend is None:
            self.park(None)
        else:
            self.connect("")

    def park(self, doubted: Child | None) -> None:
        """Wait, with all that want the same, until the target is ready."""
        self.parks += 1
        if self.parks > PARKS_MAX:
            self.refuse(Refused("tunnel_failed", f"{self.decision.target} was ready {PARKS_MAX} times, "
                                                 "and gone each time"))
            return
        wait_in_park(self, self.router.deadlines.parked)
        self.router.waits.join(self, doubted)

    def resume(self) -> None:
        """The target may be ready: go on."""
        self.router.waits.leave(self)
        self.leave_queue()
        self.state = ROUTED
        self.router.to_dial.append(self)
        self.router.loop.hurry()  # who resumes it may be a step behind `dial`

    def on_waiting(self, mask: int) -> None:
        """The client says more, or leaves, while it waits for the backend."""
        if self.state not in WAITING_FOR_BACKEND:
            return
        if len(self.hello) >= WAITING_MAX:
            self.up.wait_for(0)  # enough: the rest waits in the kernel
            return
        try:
            data = self.client.recv(MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            before, self.hello = self.hello, self.hello + data
            self.replayable = False
            if self.name is None and not before:
                learn(self, data)
        elif self.name is None and self.hello:
            self.up.wait_for(0)  # it has said all, and waits for the answer: its end is passed on when bytes pass
        else:
            self.close(CLIENT_LEFT)

    def connect(self, why: str) -> None:
        """Connect to the next address; `why` is what became of the one before.  `speak` sees what becomes of it."""
        if self.down.source is not None:
            self._hang_up()
        now = monotonic()
        if not why:  # else only a new dial counts: the time-out of the address before is no wait for the target
            self.dialled = now
        try:
            server = self.backend.open(why)
        except Unreachable as error:
            self.backend_failed(str(error))
            return
        except BlockingIOError:
            self.state = DIALING
            wait_for_room(self)
            return
        except NotYet as early:
            if early.turn is None:
                self.park(None)
            else:
                wait_in_park(self, early.turn)
            return
        except Refused as error:
            self.refuse(error)
            return
        except OSError as error:
            out_of_descriptors(self, error)
            return
        self.dialled = now
        self.down.source, self.down.fd = server, server.fileno()
        self.state = DIALING
        self.router.to_speak.append(self)

    def speak(self, mask: int = WRITE) -> None:
        """Say what the client said, once the connect is over: loopback's is by the end of the turn.

        `preface.question` goes first: PostgreSQL is asked for TLS, or TLS begins.
        """
        if self.state is not DIALING:
            return
        server = self.down.source
        header, question = self.preface
        said = header + (question or self.hello)
        try:
            self.backend.connected(server)
            sent = server.send(said)
        except Unreachable as error:
            self.backend_failed(str(error))
            return
        except OSError as error:
            watched = self.down.events
            if not watched and error.errno in NOT_CONNECTED:
                patience = self.backend.patience
                self.wait_in(patience[0] if patience else self.router.deadlines.stagger)
                self.up.wait_for(READ, self.on_waiting)
                self.down.wait_for(WRITE, self.speak)
            elif not watched or not isinstance(error, BlockingIOError):
                self.connect(error.strerror)
            return
        if question:  # a few bytes into an empty buffer: it took them all
            self.state = GREETING
            patience = self.backend.patience if self.backend.way.proven_by_connect else None
            self.wait_in(patience[1] if patience else self.router.deadlines.greeting)
            self.up.wait_for(READ, self.on_waiting)
            self.down.wait_for(READ, self.on_ssl_answer)
        else:
            self._open(said, sent)

    def on_ssl_answer(self, mask: int) -> None:
        """The backend's answer to SSLRequest: exactly one `S`, or this is no place for a hello."""
        if self.state is not GREETING:
            return
        try:
            answer = self.down.source.recv(64)
            if not answer:
                self.backend_failed("it closed the connection without an answer to SSLRequest")
            elif answer == b"S":
                self._open(self.hello, self.down.source.send(self.hello))
            else:
                said = "does not offer TLS" if answer == b"N" else f"answered SSLRequest with {answer[:8]!r}"
                error = Refused("backend_no_tls", f"{self.backend.target} {said}")
                if self.backend.goes_on(error):
                    self.drop_backend()
                    self.obey(Another())
                else:
                    self.refuse(error)
        except BlockingIOError:
            pass
        except OSError as error:
            self.backend_failed(error.strerror)

    def _open(self, said: bytes, sent: int) -> None:
        """Pass bytes: the backend has `sent` bytes of what the client `said`."""
        up, down = self.up, self.down
        is_silent = not self.hello  # behind a port
        greeting = b""
        up.total += len(said) if not self.retried else 0
        up.state = down.state = OPEN
        if self.backend.proves():
            self.state = OPEN
            self.hello = None
            self.backend = self.backend.settled()
            if self.queue is not None:
                self.leave_queue()
            up.wait_for(READ, up.pump)
            down.wait_for(READ, down.pump)
            if self.backend is not None:
                greeting = self.backend.greeting
        else:
            self.state = UNANSWERED if self.replayable or self.name is None else EARLY
            if self.hello and self.queue is None:  # as `wait_in`, for each connection
                self.queue = queue = self.router.deadlines.first_byte
                queue.put(self)
            elif self.hello:
                self.wait_in(self.router.deadlines.first_byte)
            elif self.queue is not None:
                self.leave_queue()  # behind a port, whose client is silent: it may be its turn, for as long as it likes
            up.wait_for(READ, up.first if self.state is UNANSWERED else up.pump)
            down.wait_for(READ, down.first)
        if sent != len(said):
            up.hold(memoryview(said)[sent:])
        elif is_silent:
            up.wait_for(READ, functools.partial(first_words, self))
        if greeting:  # last: where the client has left, this may end all
            down.pass_on(greeting)

    # -- a backend that failed before the client had a byte of it

    def backend_failed(self, why: str) -> None:
        """Ask the backend what to do about its failure, and do it."""
        verdict = self.backend.failed(why, self.down.source, self.retried or not self.replayable)
        self.drop_backend()
        self.obey(verdict)

    def obey(self, verdict: Verdict) -> None:
        """Do what `Backend.failed` has said; None: wait for the tunnel's last words, then ask again."""
        if verdict is None:
            wait_in_park(self, self.router.deadlines.words)
        elif isinstance(verdict, Refused):
            self.refuse(verdict)
        elif isinstance(verdict, Doubt):
            if not self.retried:  # else its first try has cast this doubt
                self.router.waits.doubt(self, verdict.doubted)
            self.refuse(verdict.refusal)
        elif isinstance(verdict, Another):
            self.router.counters["retries"] += 1
            self.up.total = 0  # what was said to the one before is said again
            wait_in_park(self, self.router.deadlines.parked)
            self.resume()
        else:
            self.retried = True
            self.router.counters["retries"] += 1
            self.park(verdict.doubted)

    # -- what the flows meet

    def answered(self, flow: Flow) -> None:
        """The first byte behind the hello: from here on nothing can be sent again.

        A client that goes on to speak proves nothing: its deadline is the backend's first byte.  Behind a listener
        with one target it may be the client's turn to speak, so there either side's byte is enough.
        """
        if flow is self.up and self.name is not None:
            self.state = EARLY
            self.replayable = False
            flow.install()
            return
        self.hello = None
        self.state = OPEN
        if self.queue is not None:
            self.queue.drop(self)
            self.queue = None
        if flow is self.down:
            self.backend.answered()
        else:
            self.backend.committed()
        for each in (self.up, self.down):
            if each.events == READ:
                each.poller.callbacks[each.fd] = each.pump
        if flow is self.up and self.down.events == READ:
            self.down.poller.callbacks[self.down.fd] = functools.partial(first_answer, self)

    def ended(self, flow: Flow) -> None:
        """The source has ended: pass that on behind its last byte."""
        if self.state is UNANSWERED and flow is self.up:
            if self.name is not None or not flow.total and not self.backend.way.proven_by_connect:
                self.close(CLIENT_LEFT)  # nobody ends TLS in the middle of its handshake, and stays
                return
            self.answered(flow)  # a port's client has said all, and waits for the answer
        if flow is self.down:
            if is_unheard(self):
                self.backend_failed("it closed the connection without a byte")
                return
            lost = self.backend is not None and self.backend.is_lost()
            if lost is None:
                wait_for_exit(self)
                return
            if lost:
                pass_on_reset(self, flow, read=True)  # of a process that dies the kernel ends the connections
                return
        if flow.twin.state is BROKEN:
            pass_on_reset(self, flow, read=True)
            return
        flow.state = DONE
        if flow.twin.state is DONE:
            self.close(BACKEND_CLOSED if flow is self.up else CLIENT_CLOSED)  # this flow is the second to end
            return
        self.router.to_end.append(flow.twin.source)
        flow.rewatch()

    def failed(self, flow: Flow, error: OSError) -> None:
        """The source has broken off.  What it sent before is with the sink, and stays there."""
        if self.state is UNANSWERED and flow is self.up:
            self.close(CLIENT_LEFT)
        elif flow is self.down and is_unheard(self):
            self.backend_failed(error.strerror)
        else:
            pass_on_reset(self, flow, read=True)

    def broken(self, flow: Flow) -> None:
        """The sink has broken off.  What it sent before is still to be read by the other flow."""
        if self.state is RESETTING:
            self.close(self.reason)  # the side that was to get the rest has broken off, too
        elif flow is self.up and self.state in UNHEARD:
            flow.discard(BROKEN)  # the other flow finds out whether the tunnel has said anything, and what to do
            flow.rewatch()
            flow.twin.rewatch()
        elif self.state is UNANSWERED:
            self.close(CLIENT_LEFT)
        else:
            pass_on_reset(self, flow.twin, read=flow.twin.state is ENDING)

    # -- the end

    def _hang_up(self) -> None:
        """Close the connection to the backend."""
        down = self.down
        if down.source is not None:
            down.closing()
            down.source.close()
            down.source = None

    def drop_backend(self) -> None:
        """Close the connection to the backend, and give its lease back.  `backend.failed` may still be called."""
        self.up.discard()
        self.down.discard()
        self._hang_up()
        if self.backend is not None:
            self.backend.release()

    def refuse(self, error: Refused) -> None:
        """Turn a Refused into bytes, a log line and a counter: all refusals end here."""
        self.refusal = error.with_traceback(None)  # its frames know this connection: that were a cycle
        self.router.waits.leave(self)
        speaks, minor = NOTHING, 0
        if self.prelude is not None:
            speaks, minor = self.prelude.language()
        elif self.hello and self.hello[0] == TLS_HANDSHAKE and len(self.hello) > 2:  # after `route_to` it may be any
            speaks, minor = TLS, self.hello[2]
        farewell = told(error, speaks, minor)
        if self.router.courtesy is not None and self.router.courtesy.take(self, error, farewell):
            return
        if farewell:
            self.linger(farewell, error.kind)
        else:
            self.close(error.kind)

    def linger(self, farewell: bytes, reason: str) -> None:
        """Say goodbye, and give the client a moment to read it: unread bytes would reset it."""
        self.drop_backend()
        self.hello = self.prelude = None  # they may be large, and there may be many that linger
        self.state = LINGERING
        self.reason = reason
        try:
            if farewell:
                self.client.send(farewell)
            self.client.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(reason)
            return
        self.wait_in(self.router.deadlines.linger)
        self.up.wait_for(READ, self.on_linger)

    def on_linger(self, mask: int) -> None:
        """Read and forget what the client still says."""
        if self.state is not LINGERING:
            return
        try:
            if self.client.recv(READ_MAX):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.close(self.reason)

    def close(self, reason: str) -> None:
        """Give everything back, once, and write the one line.  What has not ended by itself is reset."""
        state = self.state
        if state is CLOSED:
            return
        self.state = CLOSED
        router = self.router
        up, down = self.up, self.down
        is_cut = state not in ORDERLY and not (state in PASSING and up.state is DONE and down.state is DONE)
        try:
            # The sockets first: one that stays open and watched would be called back for ever.
            up.closing()
            if is_cut:
                will_reset(self.client)
            self.client.close()
            backend = self.backend
            if down.source is not None:
                if state in ABANDONED:
                    backend.abandon(down.source)
                elif is_cut:
                    will_reset(down.source)
                self._hang_up()
            if up.pending is not None or down.pending is not None:
                up.discard()
                down.discard()
            up.state = down.state = DONE
            if self.queue is not None:
                self.leave_queue()
            if self.wait is not None:
                router.waits.leave(self)
            if backend is not None:
                backend.release()
        finally:  # whatever fault of ours this met, the connection is counted out
            up.twin = down.twin = NO_FLOW  # no cycles: nothing is left to the collector
            up.connection = down.connection = self.up = self.down = None
            self.peer.count -= 1
            router.closed(self, reason, up.total, down.total)
            self.backend = None  # a GroupBackend has its connection: else that were a cycle, left to the collector


def wait_in_park(connection: Connection, queue: Queue) -> None:
    """Wait until something resumes the connection, or the deadline comes; the client may say more meanwhile."""
    connection.state = PARKED
    connection.up.wait_for(READ, connection.on_waiting)
    connection.wait_in(queue)


def holds_hello(connection: Connection) -> bool:
    """Whether the client's first bytes are still in memory."""
    return connection.state is not CLOSED and (connection.hello is not None or connection.prelude is not None)


def make_room(connection: Connection) -> None:
    """A connection has a large hello now: refuse the oldest of those that have one, where there are too many."""
    router = connection.router
    router.large = [*filter(holds_hello, router.large), connection]
    if len(router.large) > LARGE_HELLOS_MAX:
        router.large[0].refuse(Refused("shed", f"more than {LARGE_HELLOS_MAX} clients have hellos over 32 KiB: "
                                               "the oldest goes"))


def answer_now(client: socket.SocketType, answer: bytes) -> None:
    """Send `S` or `N`, unless the client did not wait for it: then it raises Malformed."""
    try:
        if client.recv(1, socket.MSG_PEEK):
            raise Malformed("bytes that did not wait for the answer")
    except BlockingIOError:
        pass
    except OSError:
        return  # the client is gone: the next read says so
    with contextlib.suppress(OSError):  # likewise
        client.send(answer)
