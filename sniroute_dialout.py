"""sniroute_dialout: a client, the end of a NodePass tunnel behind NAT: it dials out to a server.

    IDLE        it has not been started
    ASKING      the handshake: key, flow, pool type, TLS     on_terms
    FILLING     the first connections of the pool            Arrival: dialled, given its id; the first is 00000000
    LINKED      the control channel is there                 as End; used connections are replaced at once (Sizer)
    COOLING     something failed, or the link is over        start again in a while: FIRST_TRIES
    CLOSED

A connection passes four owners: what a Lanes opens it with (sniroute_lanes), until it can carry bytes; Arrival, until
it has its id; Slot of the Pool (sniroute_pool), while it waits; and who uses it: Link, Caller, Callee or Flow.

Threads: the loop's only.

Seams: I want to ...
    dial otherwise                   a row in LANES of sniroute_lanes
    begin again sooner, or later     FIRST_TRIES
    have more, or fewer, connections Sizer of sniroute_pool

This room imports sniroute_ends, sniroute_peering, sniroute_lanes, sniroute_pool, sniroute_duplex, sniroute_nodeurl,
sniroute_signals and sniroute_refusals (Failed).
"""

from __future__ import annotations

from typing import Any

from sniroute_duplex import Wire
from sniroute_ends import CLOSED, LINKED, End
from sniroute_lanes import LANES, Lanes, shake
from sniroute_nodeurl import Options, Times
from sniroute_peering import CONTROL
from sniroute_pool import Sizer, Slot
from sniroute_refusals import Failed
from sniroute_signals import ID_SIZE, Terms, proof

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
DIALS_MAX = 128  # connections of the pool that are made at a time: a backlog holds no more on many hosts
FIRST_TRIES = (0.05, 0.2, 0.4, 0.8, 1.5)  # after a failure: the original's server often fails the first handshake
RETRY_LATER = 0.1  # before connections of the pool are dialled again where one has failed, or has ended unused
RETRY_MAX = 3.2  # the same after many times: each doubles it
KNOCKS = 5  # connections more that a client without a control channel makes in its time, for a stranger may have that
CAPACITY_MAX = 8192  # idle connections of a client, whatever its server says; or `min`, or half of the descriptors

ASKING, FILLING, COOLING = "asking", "filling", "cooling"  # states of a client, beside those of each End


class Client(End):
    """The end behind NAT.

    Its alarms (`End.later`): "start" again; "expect" a control channel in time; "knock" for one; "refill" the pool
    after a set-back; "size" it each period; and "report" of each End.
    """

    def __init__(self, program: Any, options: Options, times: Times):
        super().__init__(program, options, times)
        self.asking: Any = None  # the handshake
        self.lanes: Lanes | None = None
        self.dials: set[Any] = set()  # connections of the pool in the making
        self.sizer = Sizer(options.min, options.max)
        self.failures = 0  # in a row
        self.setbacks = 0  # the same, of the pool: connections that were not made, or have ended unused

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
        if not self.accepts:
            self.program.close_callers(self)  # the server has the other flow than in the link before
        elif not self.program.open_callers(self):
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
        if self.state in (FILLING, LINKED) and "refill" not in self.alarms:
            self.later("refill", min(RETRY_LATER * 2 ** self.setbacks, RETRY_MAX), self.resume_fill)
            self.setbacks = min(self.setbacks + 1, 8)

    def knock(self) -> None:
        """There is no control channel yet: a server that has given its id to a stranger gives it to the next one."""
        if self.state is FILLING:
            Arrival(self).start()
            self.later("knock", self.times.handshake / KNOCKS, self.knock)

    def fill(self) -> None:
        """Dial as many as there should be."""
        if self.state not in (FILLING, LINKED) or "refill" in self.alarms:
            return
        count = self.sizer.wanted(len(self.pool.idle), len(self.dials))
        for _ in range(min(count, DIALS_MAX - len(self.dials))):
            Arrival(self).start()

    def resume_fill(self) -> None:
        """The while after a set-back is over."""
        self.never("refill")
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
        if "refill" not in self.alarms:
            self.setbacks = 0
        self.pool.least = len(self.pool.idle)
        self.later("size", self.times.max_interval, self.look)
        self.fill()

    def fail(self, why: str) -> None:
        """There is no link, or no more: let go of everything, and begin again in a while."""
        if self.state in (CLOSED, COOLING):
            return
        self.state = COOLING
        for name in ("expect", "size", "refill", "knock"):
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
        if len(self.said) < ID_SIZE:
            return
        number, rest = self.said[:ID_SIZE], self.said[ID_SIZE:]
        wire, client = self.wire, self.client
        self._over()
        if client.link is not None and number == bytes(ID_SIZE):  # a second control channel: nothing is proven on that
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
