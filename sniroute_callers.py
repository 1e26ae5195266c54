"""sniroute_callers: one caller's TCP connection, from accept to close, on either side of a tunnel.

    accepting end                                        dialling end
    Caller   PEEKING   what may it speak? (`block`)      Callee   FINDING   the connection of this id
             WAITING   for a connection of the pool               DIALLING  the target; a PROXY header first
             CARRYING  ------------ Relay                         CARRYING  ------------ Relay
             OVER                                                 OVER

    Relay    CARRYING  both ways, or one that has not ended yet
             RESETTING one side has broken off: the other gets what came before, and then a reset
             OVER      both sides are closed
      Spliced   two sockets: the kernel moves the bytes (sniroute_flow)
      Joined    two wires of any kind, one of which may be TLS, WebSocket or a stream of HTTP/2; and where there is a
                `rate`

A Caller owns its socket, and a Callee the wire that it has found, until a Relay has both sides: that closes them, and
tells them so (`on_over`).  Caller and Callee are Parties: what ends one of them is `Party.abort`.

Each direction of a relay ends by itself: an end is passed on, and the other direction goes on.  A stream that was cut
must not look whole: what has broken off is passed on as a reset, behind the bytes that came before it.

`Relays` has all of one end, and what they share.

Threads: the loop's only.

Seams: I want to ...
    refuse callers otherwise    `Caller.refuse`
    carry over other wires      nothing to do: a wire of sniroute_duplex that has no `raw` socket is joined

This room imports sniroute_forwarder (Listener), sniroute_duplex, sniroute_guards, sniroute_signals (PROXY headers),
sniroute_flow, sniroute_loop and sniroute_refusals (Failed).
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any, Callable, Sequence

from sniroute_duplex import TcpWire, Wire
from sniroute_flow import DONE, NO_FLOW, OPEN, Flow
from sniroute_flow import BROKEN as SINK_BROKEN
from sniroute_forwarder import Listener, reset
from sniroute_guards import Bucket, protocol_of
from sniroute_loop import READ, Loop, Watch, monotonic, unsent
from sniroute_refusals import Failed
from sniroute_signals import Signal, proxy_header

if TYPE_CHECKING:
    from sniroute_ends import End
    from sniroute_pool import Asker, Slot

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds, sizes in bytes.
PEEKED = 16  # of a caller's first bytes that are looked at: the longest thing to tell is a word of HTTP
PEEK_LAST = 0.5  # for which a caller may be silent before it is passed on unseen: in many protocols the server begins
HELD = 1 << 18  # unsent on one side before the other is not read any more: a piece of sniroute_layers
SETTLE = 0.05  # between two looks whether the bytes before a reset have arrived
SETTLE_LAST = 30.0  # for which that is waited for

PEEKING, WAITING, FINDING, DIALLING, CARRYING, RESETTING, OVER = (
    "peeking", "waiting", "finding", "dialling", "carrying", "resetting", "over")


class Counts:
    """What an end has carried: connections that are open, and bytes, as its status line says."""

    __slots__ = ("tcps", "udps", "tcprx", "tcptx", "udprx", "udptx")

    def __init__(self) -> None:
        self.tcps = self.udps = self.tcprx = self.tcptx = self.udprx = self.udptx = 0


class Relays:
    """The TCP connections of one end, and what they share.

    Args:
        rate: bytes in a second each way, for all together; 0: as many as there are.
        idle: seconds without a byte after which a connection is cut; 0: never.
        buffers: gives those for what comes from a wire, and from the layers below it (`Wire.use`); all wires of the
            loop use the same, since what is in them is sent on before another one reads.  Asked once there is a wire.
    """

    def __init__(self, loop: Loop, pipes: Any, wires: Any, alarms: Any, counts: Counts, rate: float, idle: float,
                 buffers: Callable[[], Sequence[memoryview]]):
        self.loop = loop
        self.pipes = pipes  # as Flow asks for it
        self.wires = wires
        self.alarms = alarms
        self.counts = counts
        self.buckets = (Bucket(rate, monotonic), Bucket(rate, monotonic)) if rate else None
        self.buffers = buffers
        self.open: set[Relay] = set()
        self.settling = loop.queue(SETTLE, lambda relay: relay.settle())
        self.idling = loop.queue(idle, lambda relay: relay.look_idle()) if idle else None

    def join(self, near: socket.socket | Wire, far: Wire, early: bytes, ended: bool,
             over: Callable[[Relay], None]) -> Relay:
        """Carry between a caller, or a target, and a wire of the pool.  Both are the Relay's from here on.

        Args:
            early: what the wire has given before.
            ended: the other end has ended behind that.
            over: is told once, when both sides are closed; before this returns where one is broken already.
        """
        raw = far.raw() if isinstance(near, socket.SocketType) and not self.buckets else None
        relay = Joined(self, near, far, over) if raw is None else Spliced(self, near, raw, over)
        self.open.add(relay)
        self.counts.tcps += 1
        if self.idling is not None:
            self.idling.put(relay)
        relay.start(early, ended)
        return relay

    def forget(self, relay: Relay) -> None:
        """A relay is over."""
        self.open.discard(relay)
        self.settling.drop(relay)
        if self.idling is not None:
            self.idling.drop(relay)
        self.counts.tcps -= 1
        rx, tx = relay.moved()
        self.counts.tcprx += rx
        self.counts.tcptx += tx

    def moved(self) -> tuple[int, int]:
        """Bytes from, and to, the callers or targets of this end, those of open connections included."""
        rx, tx = self.counts.tcprx, self.counts.tcptx
        for relay in self.open:
            more_rx, more_tx = relay.moved()
            rx, tx = rx + more_rx, tx + more_tx
        return rx, tx

    def close(self) -> None:
        """End all of them."""
        for relay in list(self.open):
            relay.cut()
        self.loop.retire(self.settling, *([self.idling] if self.idling is not None else []))


class Relay:
    """One connection that carries.  `near` is the caller's, or the target's, side; `far` the tunnel's.  Owns both."""

    __slots__ = ("router", "state", "over", "seen", "since")

    def __init__(self, relays: Relays, over: Callable[[Relay], None]):
        self.router = relays  # so named for Flow, which finds `pipes` there
        self.state = CARRYING
        self.over: Callable[[Relay], None] | None = over
        self.seen = 0  # bytes at the last look whether it is idle
        self.since = 0.0  # RESETTING: since when

    def moved(self) -> tuple[int, int]:
        """Bytes from the near side, and to it."""
        raise NotImplementedError

    def start(self, early: bytes, ended: bool) -> None:
        """Begin."""
        raise NotImplementedError

    def cut(self) -> None:
        """Reset both sides at once."""
        raise NotImplementedError

    def settle(self) -> None:
        """Reset what is left, once the bytes before that have arrived."""
        raise NotImplementedError

    def look_idle(self) -> None:
        """Cut it where no byte has moved since the last look."""
        now = sum(self.moved())
        if now == self.seen:
            self.cut()
            return
        self.seen = now
        self.router.idling.put(self)

    def end(self) -> None:
        """Both sides are closed."""
        if self.state is OVER:
            return
        self.state = OVER
        self.router.forget(self)
        over, self.over = self.over, None
        over(self)


class Spliced(Relay):
    """Two sockets, of which it owns both.  The flows call `ended`, `failed` and `broken`: see sniroute_flow."""

    __slots__ = ("up", "down", "near", "far")

    def __init__(self, relays: Relays, near: socket.socket, far: socket.socket, over: Callable[[Relay], None]):
        super().__init__(relays, over)
        self.near, self.far = near, far
        poller = relays.loop.poller
        self.up: Flow = relays.pipes.flow(self, poller)
        self.down: Flow = relays.pipes.flow(self, poller)
        self.up.twin, self.down.twin = self.down, self.up
        for flow, sock in ((self.up, near), (self.down, far)):
            flow.source, flow.fd = sock, sock.fileno()

    def moved(self) -> tuple[int, int]:
        return self.up.total, self.down.total

    def start(self, early: bytes, ended: bool) -> None:
        self.up.state = self.down.state = OPEN
        self.up.wait_for(READ, self.up.pump)
        self.down.wait_for(READ, self.down.pump)
        if early:
            self.down.pass_on(early)

    def ended(self, flow: Flow) -> None:
        """The source has ended: pass that on behind its last byte."""
        if flow.twin.state is SINK_BROKEN:
            self._break(flow, read=True)
            return
        flow.state = DONE
        if flow.twin.state is DONE:
            self._close()
            return
        try:
            flow.twin.source.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has broken off: the other flow finds out
        flow.rewatch()

    def failed(self, flow: Flow, error: OSError) -> None:
        """The source has broken off."""
        self._break(flow, read=True)

    def broken(self, flow: Flow) -> None:
        """The sink has broken off; what it said before is still read."""
        if self.state is RESETTING:
            self.cut()
        else:
            self._break(flow.twin, read=False)

    def _break(self, flow: Flow, read: bool) -> None:
        """The source of `flow` has broken off: its sink gets what came before, and then a reset."""
        if self.state is not RESETTING:
            self.state = RESETTING
            self.since = monotonic()
            flow.twin.discard(SINK_BROKEN)
        if read:
            flow.state = DONE
        flow.rewatch()
        flow.twin.rewatch()
        self.settle()

    def settle(self) -> None:
        flow = self.up if self.down.state is SINK_BROKEN else self.down
        sink = flow.twin.source
        is_whole = flow.state is DONE and not unsent(sink)
        if (is_whole or monotonic() - self.since > SETTLE_LAST
                or sink.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            self.cut()
        else:
            self.router.settling.put(self)

    def cut(self) -> None:
        for sock in (self.near, self.far):
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass  # it is over already
        self._close()

    def _close(self) -> None:
        if self.state is OVER:
            return
        for flow in (self.up, self.down):
            flow.discard()
            flow.closing()
            flow.twin = NO_FLOW  # else the two would keep each other
        self.near.close()
        self.far.close()
        self.end()
        self.up.connection = self.down.connection = None


class Side:
    """One side of a Joined: a wire, and why it is not read now."""

    __slots__ = ("wire", "total", "holds", "ended")

    def __init__(self, wire: Wire):
        self.wire = wire
        self.total = 0  # bytes that have come from it
        self.holds = 0  # reasons why it is not read: the other side is full, and there is a rate
        self.ended = False  # it has ended its direction

    def hold(self) -> None:
        """One more reason."""
        self.holds += 1
        if self.holds == 1:
            self.wire.pause()

    def release(self) -> None:
        """One reason less."""
        self.holds -= 1
        if not self.holds and self.wire.is_open:
            self.wire.resume()


class Joined(Relay):
    """Two wires, of which it owns both."""

    __slots__ = ("near", "far", "full")

    def __init__(self, relays: Relays, near: socket.socket | Wire, far: Wire, over: Callable[[Relay], None]):
        super().__init__(relays, over)
        self.near = Side(TcpWire(relays.wires, near) if isinstance(near, socket.SocketType) else near)
        self.far = Side(far)
        self.full: set[Side] = set()  # sides that are held since the other one is full

    def moved(self) -> tuple[int, int]:
        return self.near.total, self.far.total

    def start(self, early: bytes, ended: bool) -> None:
        for at, (here, there) in enumerate(((self.near, self.far), (self.far, self.near))):
            wire = here.wire
            wire.on_data = lambda data, at=at, here=here, there=there: self.pass_on(data, at, here, there)
            wire.on_end = lambda error, here=here, there=there: self.on_end(error, here, there)
            wire.on_room = lambda here=here, there=there: self.on_room(there)
            wire.use(self.router.buffers())
        if early:
            self.pass_on(early, 1, self.far, self.near)
        if ended:
            self.on_end(None, self.far, self.near)
        elif self.state is CARRYING and not self.far.holds:
            self.far.wire.resume()

    def pass_on(self, data: bytes | memoryview, at: int, here: Side, there: Side) -> None:
        """Bytes came on one side: send them to the other."""
        here.total += len(data)
        there.wire.send(data)
        if there.wire.unsent > HELD and here not in self.full:
            self.full.add(here)
            here.hold()
        if self.router.buckets:
            pause = self.router.buckets[at].take(len(data))
            if pause > 0:
                here.hold()
                self.router.alarms.at(monotonic() + pause, here.release)

    def on_room(self, held: Side) -> None:
        """A side takes bytes again: read the other one."""
        if held in self.full:
            self.full.discard(held)
            held.release()

    def on_end(self, error: Failed | None, here: Side, there: Side) -> None:
        """One side has ended its direction, or broken off."""
        if self.state is OVER:
            return
        here.ended = True
        if error is None and self.state is CARRYING:
            there.wire.finish()
            if there.ended:
                self.end()  # each closes by itself, behind what is unsent
            return
        if self.state is RESETTING or there.ended and error is None:
            self.cut()
            return
        self.state = RESETTING
        self.since = monotonic()
        there.wire.pause()
        self.settle()

    def settle(self) -> None:
        there = self.near if self.far.ended else self.far
        wire = there.wire
        bottom: Any = wire
        while hasattr(bottom, "below"):
            bottom = bottom.below
        sock = getattr(bottom, "sock", None)
        is_whole = not wire.unsent and (sock is None or sock.fileno() < 0 or not unsent(sock))
        if is_whole or monotonic() - self.since > SETTLE_LAST:
            self.cut()
        else:
            self.router.settling.put(self)

    def cut(self) -> None:
        self.near.wire.reset()
        self.far.wire.reset()
        self.end()


class Party:
    """A caller, at the end where it comes in, or at the end where its target is."""

    __slots__ = ("end", "state", "asker", "relay")

    def __init__(self, end: End, state: str):
        self.end = end
        self.state = state
        self.asker: Asker | None = None  # its place among those who wait for a connection
        self.relay: Relay | None = None  # that carries

    def abort(self) -> None:
        """End it, so that the other side of it sees a failure.  More than once does no harm."""
        if self.state is OVER:
            return
        if self.relay is not None:
            self.relay.cut()  # which calls `on_over`
            return
        if self.asker is not None:
            self.asker.cancel()
            self.asker = None
        self._leave()
        self._gone()

    def on_over(self, relay: Relay) -> None:
        """The relay has ended, and has closed both sides."""
        self.relay = None
        self._gone()

    def _leave(self) -> None:
        """Wait for nothing more, and reset what is ours.  There is no relay."""
        raise NotImplementedError

    def _gone(self) -> None:
        """Nothing is ours any more: tell those who count us, once."""
        raise NotImplementedError


# -- the accepting end -------------------------------------------------------------------------


class Caller(Party):
    """One caller.  As sniroute_forwarder's `Served` says; `listener.target` is the End that it has come to."""

    __slots__ = ("program", "listener", "client", "address", "watch", "is_counted", "id")

    def __init__(self, program: Any, listener: Listener, client: socket.socket, address: str):
        super().__init__(listener.target, WAITING)
        self.program = program
        self.listener = listener
        self.client = client
        self.address = address
        self.watch: Watch | None = None
        self.is_counted = False  # among those of `slot=`
        self.id = ""  # of its connection

    def start(self) -> None:
        """Begin: look what it speaks, where that matters."""
        if self.end.options.block:
            self.state = PEEKING
            self.watch = Watch(self.program.loop.poller, self.client.fileno())
            self.end.peeking.put(self)
            self.watch.wait_for(READ, self.on_peek)
        else:
            self.admit()

    def on_peek(self, mask: int) -> None:
        """It says something."""
        if self.state is not PEEKING:
            return
        try:
            data = self.client.recv(PEEKED, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self.judge(data, whole=not data or len(data) == PEEKED)
        if self.state is PEEKING:  # too little to tell: these bytes would wake us again and again
            self.watch.wait_for(0)

    def on_silence(self) -> None:
        """It has had its time to say what it speaks."""
        try:
            data = self.client.recv(PEEKED, socket.MSG_PEEK)
        except BlockingIOError:
            data = b""
        except OSError:
            self.close()
            return
        self.judge(data, whole=True)

    def judge(self, data: bytes, whole: bool) -> None:
        """Whether what it says may pass."""
        protocol = protocol_of(data, self.end.options.block, whole)
        if protocol is None:
            return
        self.end.peeking.drop(self)
        self.watch.wait_for(0)
        if protocol:
            self.refuse("blocked", f"it speaks {protocol}, which block= refuses")
        else:
            self.admit()

    def admit(self) -> None:
        """Ask for a connection of the pool."""
        if not self.end.slots.acquire(False):
            self.refuse("slots", f"{self.end.options.slot} connections are open (slot=)")
            return
        self.is_counted = True
        self.state = WAITING
        asker = self.end.take("tcp", self.address, self.got)
        if self.state is WAITING:
            self.asker = asker

    def got(self, slot: Slot | None) -> None:
        """A connection of the pool, or none in time."""
        self.asker = None
        if slot is None:
            self.refuse(*self.end.why_none())
            return
        self.state = CARRYING
        self.id = slot.id
        self.end.carried[slot.id] = self
        self.relay = self.end.relays.join(self.client, slot.wire, b"", False, self.on_over)

    def refuse(self, reason: str, text: str) -> None:
        """It cannot be served: it sees a failure."""
        self.end.refused(self, reason, text)
        self.abort()

    def close(self) -> None:
        self.abort()

    def dismiss(self) -> None:
        self.abort()

    def _leave(self) -> None:
        if self.watch is not None:
            self.end.peeking.drop(self)
            self.watch.closing()
        reset(self.client)

    def _gone(self) -> None:
        self.state = OVER
        self.end.carried.pop(self.id, None)
        if self.is_counted:
            self.end.slots.release(False)
        self.program.closed(self)


# -- the dialling end --------------------------------------------------------------------------


class Callee(Party):
    """A caller of the other end, here: the connection that a signal names, and the target that it is for."""

    __slots__ = ("signal", "dial", "wire", "slot")

    def __init__(self, end: End, signal: Signal):
        super().__init__(end, FINDING)
        self.signal = signal
        self.dial: Any = None
        self.slot: Slot | None = None  # DIALLING: the connection, and its wire, which are ours
        self.wire: Wire | None = None

    def start(self) -> None:
        """Find the connection."""
        self.end.callees.add(self)
        asker = self.end.pool.find(self.signal.id, self.found)
        if self.state is FINDING:
            self.asker = asker

    def found(self, slot: Slot | None) -> None:
        """The connection, or None: it has not come in time."""
        self.asker = None
        if slot is None:
            self.end.lost(self.signal)
            self._gone()
            return
        if not slot.wire.is_open:  # it has broken off behind what came: its target would take that for whole
            self._gone()
            return
        self.slot, self.wire = slot, slot.wire
        self.wire.on_data = self._on_early
        self.wire.on_end = self._on_end
        if not self.end.slots.acquire(False):
            self.end.nuisance("slots", f"no room for {self.signal.remote}: {self.end.options.slot} connections are "
                                       "open (slot=)")
            self.wire.reset()
            self._gone()
            return
        self.state = DIALLING
        self.end.pool.hold(slot)
        dial = self.end.upstreams.dial(self.dialled)
        if self.state is DIALLING:
            self.dial = dial

    def _on_early(self, data: bytes | memoryview) -> None:
        """The caller speaks before the target is there."""
        self.end.pool.came(self.slot, data)

    def _on_end(self, error: Failed | None) -> None:
        self.slot.ended = True
        if error is not None:
            self.abort()

    def dialled(self, result: socket.socket | Failed) -> None:
        """The target is there, or it is not."""
        self.dial = None
        if self.state is not DIALLING:
            return
        if isinstance(result, Failed):
            self.end.unreachable(self.signal, result)
            self.abort()
            return
        if self.end.options.proxy:
            source = parse_remote(self.signal.remote)
            try:
                header = proxy_header(self.end.options.proxy, source or result.getsockname()[:2],
                                      result.getpeername()[:2])
                result.send(header)  # into an empty buffer: it takes a hundred bytes
            except OSError as error:
                result.close()
                self.end.unreachable(self.signal, Failed("reset", error.strerror or str(error)))
                self.abort()
                return
        self.state = CARRYING
        slot, wire, self.slot, self.wire = self.slot, self.wire, None, None  # the relay's from here on
        self.end.pool.release(slot)
        wire.on_data = wire.on_end = lambda *what: None
        self.relay = self.end.relays.join(result, wire, slot.early, slot.ended, self.on_over)

    def _leave(self) -> None:
        if self.dial is not None:
            self.dial.cancel()
            self.dial = None
        if self.wire is not None:
            self.wire.reset()
        if self.state is DIALLING:
            self.end.pool.release(self.slot)

    def _gone(self) -> None:
        if self.state is not FINDING:
            self.end.slots.release(False)
        self.state = OVER
        self.end.callees.discard(self)


def parse_remote(text: str) -> tuple[str, int] | None:
    """HOST:PORT of a caller, as the other end says it; None where it is no address."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]").partition("%")[0]
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
        number = int(port)
    except (OSError, ValueError):
        return None
    return (host, number) if 0 <= number <= 65535 else None
