"""sniroute_ends: the two ends of a NodePass tunnel, server and client: from start to start again.

    Server   LISTENING  for the handshake of a client     Client   ASKING   the handshake: key, flow, pool type, TLS
             EXPECTING  its first connections                      FILLING  the first connections of the pool
             LINKED     the control channel is there               LINKED   the control channel is there
             COOLING    something failed: begin again              COOLING  something failed: begin again
             CLOSED                                                CLOSED

The client dials everything: the handshake, and then the connections of the pool.  The server gives each of those an
id.  Which end accepts callers is the `flow` that the server decides: "-", the server; "+", the client.  The accepting
end names a connection to the other (`take`); that one dials the target (`Callee`).

Both ends begin again for ever, whatever has failed.  Connections that carry outlive a link where they have sockets of
their own; callers wait for the next link as long as for a connection.

A second client that knocks while a link is up gets no link: the control channel is asked for a sign of life at once, so
that a client that has come back elsewhere does not wait for the old one's time-out.

What is ours.  Where both ends are sniroute, each connection of the pool is proven with the key (`proof`): in the
original whoever shares an address with the client can join its pool.  And a caller of a target that cannot be had is
told at once (`refused`).

Threads: the loop's only.

Seams: I want to ...
    understand another signal      a row in ACTIONS
    another way to the other end   a row in LANES of sniroute_lanes
    carry something else           as sniroute_datagrams

This room imports sniroute_callers, sniroute_datagrams, sniroute_peering, sniroute_lanes, sniroute_pool,
sniroute_upstreams, sniroute_offload, sniroute_duplex, sniroute_guards, sniroute_signals, sniroute_nodeurl,
sniroute_dial (set_options), sniroute_loop, sniroute_names and sniroute_refusals (Failed).
"""

from __future__ import annotations

import functools
import os
import socket
import time
from typing import Any, Callable

from sniroute_callers import PEEK_LAST, Callee, Caller, Counts, Relays
from sniroute_datagrams import Datagrams
from sniroute_dial import set_options
from sniroute_duplex import Certificates, Wire
from sniroute_guards import Slots
from sniroute_lanes import LANES, Lanes, Reception, shake
from sniroute_loop import READ, Alarm, Watch, monotonic
from sniroute_names import show_address
from sniroute_nodeurl import Options, Times
from sniroute_offload import is_worth_it
from sniroute_peering import CONTROL, Candidate, Link, Newcomer, News, network_of
from sniroute_pool import Asker, Pool, Sizer, Slot
from sniroute_refusals import Failed
from sniroute_signals import (DATAGRAM_MAX, REFUSED, Ask, Signal, Terms, answer, http_date, proof, same_token, token_of)
from sniroute_upstreams import Upstreams

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
ID = 4  # bytes of an id on the wire
DIALS_MAX = 128  # connections of the pool that are made at a time: a backlog holds no more on many hosts
FIRST_TRIES = (0.05, 0.2, 0.4, 0.8, 1.5)  # after a failure: the original's server often fails the first handshake
RETRY_LATER = 0.1  # before connections of the pool are dialled again where one has failed, or has ended unused
RETRY_MAX = 3.2  # the same after many times: each doubles it
KNOCKS = 5  # connections more that a client without a control channel makes in its time, for a stranger may have that
ASKED_LAST = 2.0  # for the client of a handshake to read its answer
ANSWERED_MAX = 256  # clients that are reading it
CANDIDATES_MAX = 16  # clients that have the terms, and no link yet
SITE_MAX = 4  # of them from one address: who hears a token can ask again and again
UNPROVEN_MAX = 1024  # connections of the pool that have not proven the key yet: as many as a pool has by default
CAPACITY_MAX = 8192  # idle connections of a client, whatever its server says; or `min`, or half of the descriptors
ACCEPTS = 64  # connections taken in one go

IDLE, LISTENING, EXPECTING, LINKED, COOLING, CLOSED = (
    "idle", "listening", "expecting", "linked", "cooling", "closed")
ASKING, FILLING = "asking", "filling"


class End:
    """What both ends have.

    Args:
        program: what all ends of a process share: loop, alarms, wires, way, pipes, log, listen, connections, closed.
    """

    def __init__(self, program: Any, options: Options, times: Times):
        self.program = program
        self.loop = program.loop
        self.log: Callable[..., None] = program.log
        self.options = options
        self.times = times
        self.key = options.secret
        self.state = IDLE
        self.accepts = False  # callers come in here
        self.terms = Terms("-", options.max, options.tls, options.type)
        self.counts = Counts()
        self.slots = Slots(options.slot)
        self.relays = Relays(self.loop, program.pipes, program.wires, program.alarms, self.counts, options.byte_rate,
                             options.read, lambda: program.buffers)
        self.upstreams = Upstreams(self.loop, program.way, options, times, monotonic)
        self.pool = Pool(self.loop, False, times.pool_get, self.on_stranger, self.on_fewer)
        self.datagrams = Datagrams(self, self.relays.buckets)
        self.link: Link | None = None
        self.peer = ""  # the address of the other end
        self.fingerprint = ""  # of the server's certificate, as this end sees it
        self.said_verify = False  # in this link
        self.spent = ""  # the id of a connection that was used for that, and had not come
        self.verified = False  # the other end sees the same certificate; or there is nothing to verify
        self.carried: dict[str, Caller] = {}  # of this end's callers, by the id of their connection
        self.callees: set[Any] = set()  # of the other end's
        self.errors = 0  # since the last report
        self.news = News()
        self.alarms: dict[str, Alarm] = {}
        self.peeking = self.loop.queue(PEEK_LAST, Caller.on_silence)

    @property
    def address(self) -> str:
        """The tunnel's, for people."""
        return f":{self.options.port}" if not self.options.host else show_address((self.options.host, self.options.port))

    def __str__(self) -> str:
        """For people."""
        return f"{self.options.scheme}://{self.address}"

    @property
    def mode(self) -> int:
        """As the status line has it: 1 where callers come in at a server."""
        return 1 if self.accepts and self.options.scheme == "server" else 2

    @property
    def idle(self) -> int:
        """Connections that are ready for callers."""
        return len(self.pool.idle)

    @property
    def ping(self) -> float:
        """Seconds to the other end and back."""
        return self.link.ping if self.link is not None else 0.0

    # -- times

    def later(self, name: str, seconds: float, act: Callable[[], None]) -> None:
        """Do something later, instead of what was to be done under that name."""
        self.never(name)
        self.alarms[name] = self.program.alarms.at(monotonic() + seconds, act)

    def never(self, name: str) -> None:
        """Do not do what was to be done under that name."""
        alarm = self.alarms.pop(name, None)
        if alarm is not None:
            alarm.cancel()

    def nuisance(self, what: str, text: str, level: str = "warn") -> None:
        """Tell of something that strangers can do as often as they like: once in a while."""
        if self.news.has(what):
            self.log(level, text)

    # -- callers of this end

    def take(self, action: str, remote: str, done: Callable[[Any], None]) -> Asker:
        """A connection of the pool for a caller, whom the other end is told of.  `done` gets a Slot, or None.

        For "udp" it gets the wire itself.
        """

        def got(slot: Slot | None) -> None:
            if slot is not None:
                slot.use()
                if self.link is None:  # it ended in this turn
                    slot.wire.reset()
                    slot = None
                else:
                    self.link.send(Signal(action, remote, slot.id))
            done(slot.wire if slot is not None and action == "udp" else slot)

        return self.pool.ask(got)

    def why_none(self) -> tuple[str, str]:
        """Why there was no connection for a caller: a word, and a sentence."""
        if self.state is not LINKED:
            return "away", f"no client has dialled in to {self.address}"
        return "pool", f"the pool was empty for {self.times.pool_get:g} s"

    def refused(self, caller: Caller, reason: str, text: str) -> None:
        """A caller cannot be served."""
        if self.program.tells_each or self.news.has(f"caller {reason}"):
            self.program.tell(caller, "warn", "failed", text, reason=reason, error=text)

    # -- callers of the other end

    def lost(self, signal: Signal) -> None:
        """A signal names a connection that has not come."""
        self.errors += 1
        self.nuisance("lost", f"the other end has named a connection that is not there ({signal.id})")
        if self.link is not None:
            self.link.send(Signal("refused", "", signal.id))

    def unreachable(self, signal: Signal, failed: Failed) -> None:
        """The target of a caller cannot be had."""
        self.nuisance("target", f"no target for {signal.remote}: {failed}", "error")

    def on_tcp(self, signal: Signal) -> None:
        """The other end has a TCP caller."""
        if self.accepts or self.options.notcp:
            self._decline(signal)
        else:
            Callee(self, signal).start()

    def on_udp(self, signal: Signal) -> None:
        """The other end has a UDP caller."""
        if self.accepts or self.options.noudp:
            self._decline(signal)
            return

        def found(slot: Slot | None) -> None:
            if slot is None:
                self.lost(signal)
            else:
                self.datagrams.serve(slot, signal.remote)

        self.pool.find(signal.id, found)

    def _decline(self, signal: Signal) -> None:
        """Callers of that kind are not served here: the connection closes, so that the caller does not wait."""

        def found(slot: Slot | None) -> None:
            if slot is not None:
                slot.use().reset()

        self.pool.find(signal.id, found)

    def on_refused(self, signal: Signal) -> None:
        """The other end cannot serve a caller of ours."""
        caller = self.carried.get(signal.id)
        if caller is not None:
            self.refused(caller, "refused", "the other end has refused it")
            caller.abort()

    # -- the link

    def begin_link(self, wire: Wire) -> None:
        """The control channel is there."""
        self.state = LINKED
        self.never("expect")
        self.verified = self.terms.tls != 1
        self.said_verify = False
        self.spent = ""
        self.link = Link(self.loop, wire, self.key.encode(), self.on_signal, self.on_unlinked, self.program.flushing)
        self.link.start()
        self.datagrams.largest = DATAGRAM_MAX if self.terms.nonce else self.times.udp_buffer
        self.errors = 0
        self.later("report", self.times.report, self.report)
        self.program.linked(self)
        if self.verified:
            self.pool.open()
        self.say_verify()

    def on_signal(self, signal: Signal) -> None:
        """The other end has said something; an action that is unknown is skipped."""
        action = ACTIONS.get(signal.action)
        if action is not None:
            action(self, signal)

    def on_pong(self, signal: Signal) -> None:
        """It lives: time for a line."""
        self.program.checkpoint(self)

    def on_flush(self, signal: Signal) -> None:
        """Its pool is no good: all idle connections go."""
        self.nuisance("flush", "the other end has flushed the pool")
        self.errors = 0
        self.pool.flush()

    def on_unlinked(self, why: str) -> None:
        """The link is over."""
        self.link = None
        self.never("report")
        self.pool.shut()
        self.program.unlinked(self, why)
        self.fail(why)

    def report(self) -> None:
        """A report interval is over."""
        if self.link is None:
            return
        if self.errors > len(self.pool.idle) / 2:
            self.link.send(Signal("flush"))
            self.pool.flush()
        self.errors = 0
        self.later("report", self.times.report, self.report)
        self.link.tick(self.times.report)

    def fail(self, why: str) -> None:
        """Begin again, after a while."""
        raise NotImplementedError

    # -- the certificate, with tls=1

    def say_verify(self) -> None:
        """Say which certificate is seen here, once in a link, on a connection that is used for nothing else.

        As soon as there is one, instead of in the first report as the original does: there both sides may choose the
        same connection at the same moment, and wait for each other.
        """
        if self.terms.tls != 1 or self.said_verify or self.link is None or not self.pool.idle:
            return
        self.said_verify = True
        slot = self.pool.take()
        self.link.send(Signal("verify", id=slot.id, fp=self.fingerprint))
        self.link.flush()  # before its connection ends
        slot.wire.close()

    def on_verify(self, signal: Signal) -> None:
        """The other end says which certificate it sees.  Another one than here: somebody is between us.

        All connections of a link have the same certificate, so the one that is named need not be found first: it may
        have ended already, or this end may have chosen the same one.
        """
        slot = self.pool.pick(signal.id)
        if slot is not None:
            slot.wire.close()
        else:
            self.spent = signal.id  # it may come yet, and has ended already
        if not self.fingerprint or self.fingerprint != signal.fp:
            self.log("error", "the certificates differ: somebody is between the two ends")
            self.link.end("the certificates differ")
        elif not self.verified:
            self.verified = True
            self.pool.open()

    # -- what each end does otherwise

    def on_stranger(self, slot: Slot, data: bytes) -> None:
        """Somebody speaks on an idle connection of this accepting end: no end of ours."""
        self.nuisance("stranger", f"a connection from {slot.wire.peer} has spoken without being asked: another client, "
                                  "perhaps with the same key")
        if self.link is not None:
            self.link.prod()

    def on_fewer(self, is_use: bool) -> None:
        """There are fewer idle connections than before: one was used, or wanted; or it has ended."""

    def close(self) -> None:
        """End everything."""
        if self.state is CLOSED:
            return
        link, self.link = self.link, None
        self.state = CLOSED
        for name in list(self.alarms):
            self.never(name)
        if link is not None:
            link.over = lambda why: None
            link.end("closed")
        for callee in list(self.callees):
            callee.abort()
        self.datagrams.close()
        self.relays.close()
        self.pool.close()
        self.upstreams.close()
        self.loop.retire(self.peeking)


ACTIONS: dict[str, Callable[[Any, Signal], None]] = {
    "tcp": End.on_tcp, "udp": End.on_udp, "verify": End.on_verify, "flush": End.on_flush, "pong": End.on_pong,
    "refused": End.on_refused,
}


# -- the server --------------------------------------------------------------------------------


class Server(End):
    """The end with a public address.

    One listener for its whole life tells handshakes and connections of the pool apart.  The original closes its
    listener after the handshake and opens another, and loses the answer in one start of twenty.
    """

    def __init__(self, program: Any, options: Options, times: Times, accepts: bool):
        super().__init__(program, options, times)
        self.accepts = accepts
        self.pool.picks = accepts
        self.terms = Terms("-" if accepts else "+", options.max, options.tls, options.type)
        self.certificates: Certificates | None = None  # a helper does what TLS there is
        if options.tls or options.type or not is_worth_it():
            files = (options.crt, options.key_file) if options.tls == 2 else None
            self.certificates = Certificates(files, options.server_name, tell=lambda words: self.log("info", words))
        self.listener: socket.socket | None = None
        self.watch: Watch | None = None
        self.reception: Reception | None = None
        self.candidates: list[Candidate] = []  # clients that have the terms, the last one last; or the one with the link
        self.answered = self.loop.queue(ASKED_LAST, lambda wire: wire.close())
        self.proving = self.loop.queue(times.handshake, Newcomer.end)  # connections that have not proven the key

    def start(self) -> None:
        """Listen for a client; where that fails, again and again."""
        if self.state is CLOSED:
            return
        try:
            self.listener = listen(self.options.host, self.options.port)
        except OSError as error:
            self.log("error", f"cannot listen on {self.address}: "
                              f"{(error.strerror or str(error)).lower()}: trying again",
                     event="warning")
            self.later("start", self.times.cooldown, self.start)
            return
        if self.certificates is None:
            self.program.offload.prepare()
        self.reception = Reception(self, self.certificates, self.on_ask, self.on_arrival)
        self.watch = Watch(self.loop.poller, self.listener.fileno())
        self._accept_again()
        self.state = LISTENING
        self.log("info", f"listening for a client on {show_address(self.listener.getsockname())}")

    def _accept_again(self) -> None:
        if self.state is not CLOSED:
            self.watch.wait_for(READ, self._accept)

    def _accept(self, mask: int) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, address = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # descriptors are short, or that one has left already
                self.nuisance("accept", f"cannot accept a connection: {error.strerror}")
                self.watch.wait_for(0)
                self.later("accept", 0.1, self._accept_again)
                return
            self.reception.receive(sock, address)

    @property
    def expects_pool(self) -> bool:
        """Whether what comes in is a connection of the pool, and not a handshake: for Reception."""
        return bool(self.candidates)

    def knows(self, address: Any) -> bool:
        """Whether a client that has the terms, or the link, has that address: for Reception.

        An IPv6 host has many addresses: its /64 counts.
        """
        network = network_of(address[0])
        return any(each.network == network for each in self.candidates)

    def may_join(self, address: Any) -> bool:
        """Whether a connection from there may be one of the pool's."""
        return self.terms.type == 2 or self.knows(address)

    @property
    def is_full(self) -> bool:
        """Whether the pool has all the connections that it may have.  Those that are not proven are a stranger's."""
        return len(self.pool.idle) >= self.options.max

    # -- the handshake

    def on_ask(self, ask: Ask, wire: Wire) -> None:
        """Somebody asks for the terms."""
        refused = self._judge(ask, wire)
        wire.on_data = lambda data: None
        wire.on_end = lambda error: self.answered.drop(wire)
        self.answered.put(wire)
        if len(self.answered.due) > ANSWERED_MAX:
            self.answered.due.popitem(last=False)[0].close()
        wire.send(refused or answer(self.terms._replace(nonce=self.candidates[-1].nonce), http_date(time.time())))
        wire.finish()

    def _judge(self, ask: Ask, wire: Wire) -> bytes:
        """A refusal, or nothing, and then a link is expected.

        CONNECT: for whoever has the key the original is a proxy to anywhere, as long as it waits for a client.  Nobody
        asked for that here.
        """
        if ask.method == "CONNECT":
            return REFUSED[405] if same_token(ask.proxy_key, self.key) else REFUSED[407]
        if ask.path != "/":
            return REFUSED[404]
        if not same_token(ask.token, token_of(self.key)):
            self.nuisance("token", f"{show_address(wire.peer)} has asked with a wrong key")
            return REFUSED[401]
        if ask.method != "GET":
            return REFUSED[405]
        if self.state is LINKED:
            self.nuisance("second", f"{show_address(wire.peer)} asks for a link, but {self.peer} has it")
            self.link.prod()
            return REFUSED[409]
        candidate = Candidate(wire.peer[0], os.urandom(16).hex() if ask.ours else "")
        same = [each for each in self.candidates if each.network == candidate.network]
        for surplus in (same[:1] if len(same) >= SITE_MAX else self.candidates[:len(self.candidates) + 1 - CANDIDATES_MAX]):
            self.candidates.remove(surplus)
        self.candidates.append(candidate)
        self.state = EXPECTING
        self.later("expect", self.times.handshake, lambda: self.fail("the client has made no connection in time"))
        return b""

    # -- connections of the pool

    def on_arrival(self, wire: Wire, address: Any) -> None:
        """A connection of the pool has come: it is given its id."""
        network = network_of(address[0])
        candidates = [each for each in self.candidates if each.network == network or self.terms.type == 2]
        if not candidates or self.is_full:
            wire.reset()
            return
        last = candidates[-1]
        number = CONTROL
        if self.state is not EXPECTING or not last.gives_zero():
            while number == CONTROL or number in self.pool.idle:
                number = os.urandom(ID).hex()
        wire.send(bytes.fromhex(number))
        if not last.nonce:
            self.admit(last, number, wire, b"")
            return
        Newcomer(self, candidates, number, wire, address)
        if len(self.proving.due) > UNPROVEN_MAX:
            next(iter(self.proving.due)).end()

    def admit(self, candidate: Candidate, number: str, wire: Wire, early: bytes) -> None:
        """A connection is the client's: it may be used."""
        if candidate not in self.candidates or number == self.spent or early and self.accepts and number != CONTROL:
            wire.reset()
        elif number != CONTROL:
            if self.is_full:
                wire.reset()
                return
            if self.state is EXPECTING:
                candidate.ids.add(number)
            self.pool.add(Slot(number, wire, early))
            self.say_verify()
        elif self.state is LINKED:
            wire.reset()
        else:
            self._choose(candidate)
            self.begin_link(wire)
            if early:
                wire.on_data(early)

    def _choose(self, candidate: Candidate) -> None:
        """The link is this one's: forget the others, and what is theirs."""
        self.candidates = [candidate]
        self.peer = candidate.peer
        self.terms = self.terms._replace(nonce=candidate.nonce)
        self.fingerprint = self.certificates.fingerprint if self.certificates is not None else ""
        for number in self.pool.idle.keys() - candidate.ids:
            self.pool.pick(number).wire.reset()
        candidate.ids.clear()

    def fail(self, why: str) -> None:
        if self.state in (CLOSED, COOLING):
            return
        self.log("warn", f"{why}: waiting for a client")
        self.candidates = []
        for newcomer in list(self.proving.due):
            newcomer.end()
        self.pool.shut()
        self.state = LISTENING

    def close(self) -> None:
        if self.state is CLOSED:
            return
        if self.watch is not None:
            self.watch.closing()
            self.listener.close()
        if self.reception is not None:
            self.reception.close()
        for newcomer in list(self.proving.due):
            newcomer.end()
        for wire in list(self.answered.due):
            wire.close()
        self.loop.retire(self.proving, self.answered)
        super().close()


# -- the client --------------------------------------------------------------------------------


class Client(End):
    """The end behind NAT."""

    def __init__(self, program: Any, options: Options, times: Times):
        super().__init__(program, options, times)
        self.asking: Any = None  # the handshake
        self.lanes: Lanes | None = None
        self.dials: set[Any] = set()  # connections of the pool in the making
        self.sizer = Sizer(options.min, options.max)
        self.failures = 0  # in a row
        self.setbacks = 0  # the same, of the pool: connections that were not made, or have ended unused
        self.tried_at = 0.0
        self.fingerprint = ""

    def start(self) -> None:
        """Ask for the terms."""
        if self.state is CLOSED:
            return
        self.state = ASKING
        self.asking = shake(self, self.on_terms)

    def on_terms(self, result: Terms | Failed) -> None:
        """What the server says."""
        self.asking = None
        if isinstance(result, Failed):
            self.fail(f"the handshake has failed: {result}")
            return
        self.terms = result
        self.accepts = result.flow == "+"
        self.pool.picks = self.accepts
        if self.accepts and not self.program.open_callers(self):
            self.fail("the address for callers cannot be had")
            return
        room = max(self.options.min, min(CAPACITY_MAX, self.program.room // 2))
        self.sizer = Sizer(self.options.min, min(result.max, room))
        self.state = FILLING
        self.later("expect", self.times.handshake, lambda: self.fail("the server has given no control channel in time"))
        self.lanes = LANES[result.type](self, result, self.on_lost_lanes)
        if result.nonce:
            self.later("knock", self.times.handshake / KNOCKS, self.knock)
        self.fill()

    def on_lost_lanes(self, why: str) -> None:
        """What carries all connections has ended (HTTP/2)."""
        if self.link is not None:
            self.link.end(why)
        else:
            self.fail(why)

    # -- the pool

    def on_fewer(self, is_use: bool) -> None:
        if is_use:
            self.setbacks = 0
            self.sizer.used(len(self.pool.idle))
            self.fill()
        else:
            self.set_back()

    def set_back(self) -> None:
        """A connection was not made, or has ended unused: dial no more for a while, which grows."""
        if self.state in (FILLING, LINKED) and "later" not in self.alarms:
            self.later("later", min(RETRY_LATER * 2 ** self.setbacks, RETRY_MAX), self.resume_fill)
            self.setbacks = min(self.setbacks + 1, 8)

    def knock(self) -> None:
        """There is no control channel yet: a server that has given its id to a stranger gives it to the next one."""
        if self.state is FILLING:
            Arrival(self).start()
            self.later("knock", self.times.handshake / KNOCKS, self.knock)

    def fill(self) -> None:
        """Dial as many as there should be."""
        if self.state not in (FILLING, LINKED) or "later" in self.alarms:
            return
        count = self.sizer.wanted(len(self.pool.idle), len(self.dials))
        for _ in range(min(count, DIALS_MAX - len(self.dials))):
            Arrival(self).start()

    def resume_fill(self) -> None:
        """A while after a connection could not be made."""
        self.never("later")
        self.fill()

    def arrived(self, number: str, wire: Wire) -> None:
        """A connection has its id."""
        if self.state not in (FILLING, LINKED):
            wire.reset()
            return
        seen = wire.fingerprint()
        if not self.fingerprint:
            self.fingerprint = seen
        if seen != self.fingerprint and self.terms.tls == 1:
            self.nuisance("certificate", "the server has shown two certificates: somebody is between the two ends")
            wire.reset()
        elif number != CONTROL:
            if not self.pool.add(Slot(number, wire)):
                self.nuisance("twice", f"the server has given two connections the same id ({number})")
                self.set_back()
            self.say_verify()
        else:
            self.failures = 0
            self.begin_link(wire)
            self.later("size", self.times.max_interval, self.look)
        self.fill()

    def look(self) -> None:
        """A period of the pool is over."""
        self.sizer.look(self.pool.least)
        if "later" not in self.alarms:
            self.setbacks = 0
        self.pool.least = len(self.pool.idle)
        self.later("size", self.times.max_interval, self.look)
        self.fill()

    def fail(self, why: str) -> None:
        if self.state in (CLOSED, COOLING):
            return
        self.state = COOLING
        for name in ("expect", "size", "later", "knock"):
            self.never(name)
        for dial in list(self.dials):
            dial.cancel()
        if self.asking is not None:
            self.asking.cancel()
            self.asking = None
        if self.lanes is not None:
            self.lanes.close()
            self.lanes = None
        self.fingerprint = ""
        link, self.link = self.link, None
        if link is not None:
            link.over = lambda why: None
            link.end(why)
        self.pool.shut()
        wait = FIRST_TRIES[self.failures] if self.failures < len(FIRST_TRIES) else self.times.cooldown
        self.failures += 1
        self.log("error" if self.failures > 1 else "warn", f"{why}: again in {wait:g} s")
        self.later("start", wait, self.start)

    def close(self) -> None:
        if self.state is CLOSED:
            return
        for dial in list(self.dials):
            dial.cancel()
        if self.asking is not None:
            self.asking.cancel()
        if self.lanes is not None:
            self.lanes.close()
        super().close()


class Arrival:
    """One connection of the pool in the making: dialled, and then given its id."""

    __slots__ = ("client", "opening", "wire", "said")

    def __init__(self, client: Client):
        self.client = client
        self.opening: Any = None
        self.wire: Wire | None = None
        self.said = b""

    def start(self) -> None:
        """Dial."""
        client = self.client
        client.dials.add(self)
        client.program.arriving.put(self)
        opening = client.lanes.open(self._opened)
        if self in client.dials and self.wire is None:
            self.opening = opening

    def _opened(self, result: Wire | Failed) -> None:
        self.opening = None
        if isinstance(result, Failed):
            self._failed(result)
            return
        self.wire = result
        result.on_data = self._on_data
        result.on_end = self._on_end
        result.resume()

    def _on_data(self, data: bytes | memoryview) -> None:
        self.said += data
        if len(self.said) < ID:
            return
        number, rest = self.said[:ID], self.said[ID:]
        wire, client = self.wire, self.client
        self._over()
        if client.link is not None and number == bytes(ID):  # a second control channel: nothing is proven on that
            wire.reset()
            client.fill()
            return
        if client.terms.nonce:
            wire.send(proof(client.key, client.terms.nonce, number))
        client.arrived(number.hex(), wire)
        if rest and wire.is_open:
            wire.on_data(rest)

    def _on_end(self, error: Failed | None) -> None:
        self.wire.reset()
        self._failed(error or Failed("reset", "it was closed"))

    def on_late(self) -> None:
        """No id came in time."""
        self.cancel()

    def _failed(self, why: Failed) -> None:
        client = self.client
        self._over()
        if client.state is LINKED:
            client.nuisance("pool", f"a connection of the pool could not be made: {why}")
        client.set_back()

    def cancel(self) -> None:
        """Make it no more."""
        if self.opening is not None:
            self.opening.cancel()
        if self.wire is not None:
            self.wire.reset()
        self._over()

    def _over(self) -> None:
        self.wire = None
        self.client.dials.discard(self)
        self.client.program.arriving.drop(self)


# -- addresses ---------------------------------------------------------------------------------


class Listening(socket.socket):
    """A listening socket.  What it accepts has its options (`set_options`): the kernel passes them on, but O_NONBLOCK."""

    def accept(self) -> tuple[Any, Any]:
        """The next connection, as the interpreter's own kind of socket, which costs less, and its address."""
        fd, address = self._accept()  # type: ignore[attr-defined]
        sock = socket.SocketType(self.kind, socket.SOCK_STREAM, 0, fd)
        sock.setblocking(False)
        return sock, address

    @functools.cached_property
    def kind(self) -> int:
        """Its family.  `socket.family` makes an enumeration of it each time."""
        return int(self.family)


def listen(host: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A listener, non-blocking; without a host on all addresses of both families.  Raises OSError."""
    found = socket.getaddrinfo(host.encode() or None, port, type=kind, flags=socket.AI_PASSIVE)
    rows = sorted(found, key=lambda row: row[0] != (socket.AF_INET if host else socket.AF_INET6))
    error = OSError("no address")
    for family, _, _, _, address in rows:
        try:
            sock = Listening(family, kind) if kind == socket.SOCK_STREAM else socket.socket(family, kind)
        except OSError as failed:
            error = failed  # this host has no IPv6
            continue
        try:
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if not host else 1)
            sock.bind(address)
            if kind == socket.SOCK_STREAM:
                sock.listen(4096)
                set_options(sock)
            sock.setblocking(False)
            return sock
        except OSError as failed:
            sock.close()
            error = failed
            if host or family == socket.AF_INET:
                raise
    raise error
