"""sniroute_ends: what the two ends of a NodePass tunnel have in common: the link, and what is said on it.

    Server (sniroute_dialin)      Client (sniroute_dialout)
        accepts the link    <------   dials the link, and all connections of the pool
        gives each its id
                 |                       |
               End: the link, once it is there: signals, `verify`, callers of this end, callers of the other

    AnyEnd   what carries callers: of both, and of a client that forwards by itself (sniroute_single)
      End    and the link with another end; what to do when that is over is `fail`, of a Server or a Client

The client dials everything: the handshake, and then the connections of the pool.  The server gives each of those an
id.  Which end accepts callers is the `flow` that the server decides: "-", the server; "+", the client.  The accepting
end names a connection to the other (`take`); that one dials the target (`Callee`).

Both ends begin again for ever, whatever has failed.  Connections that carry outlive a link where they have sockets of
their own; callers wait for the next link as long as for a connection.

What is ours.  Where both ends are sniroute, each connection of the pool is proven with the key (`proof`): in the
original whoever shares an address with the client can join its pool.  And a caller of a target that cannot be had is
told at once (`refused`).

Threads: the loop's only.

Seams: I want to ...
    understand another signal      a row in ACTIONS
    carry something else           as sniroute_datagrams

This room imports sniroute_callers, sniroute_datagrams, sniroute_peering, sniroute_pool, sniroute_upstreams,
sniroute_duplex, sniroute_guards, sniroute_nodeurl, sniroute_signals, sniroute_loop, sniroute_names and
sniroute_refusals (Failed).
"""

from __future__ import annotations

from typing import Any, Callable

from sniroute_callers import PEEK_LAST, Callee, Caller, Counts, Relays
from sniroute_datagrams import Datagrams
from sniroute_duplex import Wire
from sniroute_guards import News, Slots
from sniroute_loop import Alarm, monotonic
from sniroute_names import show_address
from sniroute_nodeurl import Options, Times
from sniroute_peering import Link
from sniroute_pool import Asker, Pool, Slot
from sniroute_refusals import Failed
from sniroute_signals import DATAGRAM_MAX, Signal, Terms
from sniroute_upstreams import Upstreams

__version__ = "0.1.0"

IDLE, LINKED, CLOSED = "idle", "linked", "closed"  # states; each kind of end has more


class AnyEnd:
    """What carries callers, and what all that do so have.

    Args:
        program: what all ends of a process share: loop, alarms, wires, way, pipes, log, listen, connections, closed.
    """

    def __init__(self, program: Any, options: Options, times: Times):
        self.program = program
        self.loop = program.loop
        self.log: Callable[..., None] = program.log
        self.options = options
        self.times = times
        self.state = IDLE
        self.counts = Counts()
        self.slots = Slots(options.slot)
        self.relays = Relays(self.loop, program.pipes, program.wires, program.alarms, self.counts, options.byte_rate,
                             options.read, lambda: program.buffers)
        self.upstreams = Upstreams(self.loop, program.way, options, times)
        self.datagrams = Datagrams(self, self.relays.buckets)
        self.carried: dict[str, Caller] = {}  # of this end's callers, by the id of their connection
        self.peeking = self.loop.queue(PEEK_LAST, lambda caller: caller.on_silence())
        self.news = News()
        self.alarms: dict[str, Alarm] = {}  # by what is to be done; one that has rung stays until it is set again

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

    # -- what is told

    def nuisance(self, what: str, text: str, level: str = "warn") -> None:
        """Tell of something that strangers can do as often as they like: once in a while."""
        if self.news.has(what):
            self.log(level, text)

    def refused(self, caller: Caller, reason: str, text: str) -> None:
        """A caller cannot be served.  `reason` is a word for programs, `text` a sentence for people."""
        if self.program.tells_each or self.news.has(f"caller {reason}"):
            self.program.tell(caller, "warn", "failed", text, reason=reason, error=text)

    def close(self) -> None:
        """End all that is carried, and wait for nothing more."""
        for name in list(self.alarms):
            self.never(name)
        self.datagrams.close()
        self.relays.close()
        self.upstreams.close()
        self.loop.retire(self.peeking)


class End(AnyEnd):
    """One of two ends, which have a link.

    Its alarms are "report", each NP_REPORT_INTERVAL of a link, and those of its kind.
    """

    def __init__(self, program: Any, options: Options, times: Times):
        super().__init__(program, options, times)
        self.key = options.secret
        self.accepts = False  # callers come in here
        self.terms = Terms("-", options.max, options.tls, options.type)
        self.pool = Pool(self.loop, False, times.pool_get, self.on_stranger, self.on_fewer)
        self.link: Link | None = None  # LINKED
        self.peer = ""  # the address of the other end
        self.fingerprint = ""  # of the server's certificate, as this end sees it
        self.said_verify = False  # in this link
        self.spent = ""  # the id of a connection that was used for that, and had not come
        self.verified = False  # the other end sees the same certificate; or there is nothing to verify
        self.callees: set[Any] = set()  # of the other end's
        self.errors = 0  # since the last report

    @property
    def address(self) -> str:
        """The tunnel's, for people."""
        host, port = self.options.host, self.options.port
        return show_address((host, port)) if host else f":{port}"

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

    # -- callers of this end

    def take(self, action: str, remote: str, done: Callable[[Slot | None], None]) -> Asker:
        """A connection of the pool for a caller, whom the other end is told of.

        Args:
            action: "tcp" or "udp", for the Signal.
            remote: the caller's address, HOST:PORT.
            done: gets a Slot, whose wire is its own; or None, when nobody could be had in NP_POOL_GET_TIMEOUT.
        """

        def got(slot: Slot | None) -> None:
            if slot is not None:
                slot.use()
                if self.link is None:  # it ended in this turn
                    slot.wire.reset()
                    slot = None
                else:
                    self.link.send(Signal(action, remote, slot.id))
            done(slot)

        return self.pool.ask(got)

    def why_none(self) -> tuple[str, str]:
        """Why there was no connection for a caller: a word, and a sentence."""
        if self.state is not LINKED:
            return "away", f"no client has dialled in to {self.address}"
        return "pool", f"the pool was empty for {self.times.pool_get:g} s"

    # -- callers of the other end

    def lost(self, signal: Signal) -> None:
        """A signal names a connection that has not come."""
        if self.link is None:
            return  # it would have come in the link that is over
        self.errors += 1
        self.nuisance("lost", f"the other end has named a connection that is not there ({signal.id})")
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
        """End everything.  More than once does no harm."""
        if self.state is CLOSED:
            return
        link, self.link = self.link, None
        self.state = CLOSED
        if link is not None:
            link.over = lambda why: None
            link.end("closed")
        for callee in list(self.callees):
            callee.abort()
        super().close()
        self.pool.close()


ACTIONS: dict[str, Callable[[Any, Signal], None]] = {
    "tcp": End.on_tcp, "udp": End.on_udp, "verify": End.on_verify, "flush": End.on_flush, "pong": End.on_pong,
    "refused": End.on_refused,
}
