"""sniroute_datagrams: UDP: a flow for each caller's address.

                      near                                     far
    accepting end     Inlet   a caller's address               Framed  a connection of the pool
    dialling end      Outlet  a socket, connected to a target  Framed
    by itself         Inlet                                    Outlet

A Flow joins two sides, and knows nothing of what they are.  A side has `send(datagrams)`, and calls `Flow.pass_on` with
what it has read: all that there was in one turn, BATCH at most.  So a connection of the pool gets one write for many
datagrams.  On the wire each is its length in two bytes, and itself (sniroute_signals).

A flow begins with a datagram from a new address (Port), or with the other end's signal (`Datagrams.serve`).  It ends
where nothing has moved in either direction for NP_UDP_READ_TIMEOUT, where its connection ends, or REFUSED_LAST after
its target, or the other end, has refused it: the caller's next datagram then begins another flow, perhaps with another
target.

UDP promises nothing, so nothing is kept for long.  A datagram is dropped, and counted, where a socket is full, where a
wire has more than UNSENT_MAX unsent, and where there is no room for another flow.  Who floods us from many addresses
costs other callers nothing but that room: of new flows no more than WAITING_MAX ask for a connection at a time.

What all flows of an end share is in Datagrams, which owns them.

Threads: the loop's only.

Seams: I want to ...
    another kind of side     a subclass of Side
    end flows otherwise      `Datagrams._sweep`

This room imports sniroute_guards (News), sniroute_signals, sniroute_layers (Wire), sniroute_dial (Failed),
sniroute_loop and sniroute_names.
"""

from __future__ import annotations

import collections
import ipaddress
import socket
from typing import TYPE_CHECKING, Any, Callable, Sequence

from sniroute_dial import Failed
from sniroute_guards import News
from sniroute_layers import PIECE, Wire
from sniroute_loop import READ, Alarms, Watch, monotonic
from sniroute_names import show_address, unmapped
from sniroute_signals import DATAGRAM_MAX, DatagramReader, frame_datagram

if TYPE_CHECKING:
    from sniroute_guards import Bucket
    from sniroute_upstreams import Attempt

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds, sizes in bytes.
BATCH = 64  # datagrams read from one socket in a turn: half a millisecond, so that the others have their turn
FLOWS_MAX = 8192  # flows of an end: each has a descriptor here and one there, and half of them is for TCP
WAITING_MAX = 64  # flows that wait for a connection or a name: whoever needs one for TCP waits behind them
EARLY_MAX = 1 << 16  # kept for a flow that waits; each datagram counts SMALL more, since it costs more than its bytes
SMALL = 128
UNSENT_MAX = 1 << 20  # in a wire: what comes later than that is of no use
RECEIVE = 1 << 21  # asked for as a socket's buffer; the kernel gives what net.core.rmem_max allows
REFUSED_LAST = 1.0  # for which a flow outlives a refusal, or each datagram that nobody wants would cost a connection

# Why datagrams are dropped.
NO_SLOT = "the end has as many connections as slot= allows"
NO_ROOM = f"there are {FLOWS_MAX} flows"
CROWD = f"{WAITING_MAX} new callers wait already"
NO_WIRE = "there was no connection to the other end"
NO_TARGET = "no target could be reached"
EARLY = "more came than is kept before the way is open"
FULL_WIRE = "the connection to the other end is too slow"
FULL_SOCKET = "a socket is full"
TOO_LARGE = "they were too large for the way"
REFUSED = "the target has refused them"
UNWANTED = "the other end has refused their flow"


class Datagrams:
    """The UDP flows of one end, and what they share.  All methods run in the loop.

    Args:
        end: has `loop`, `times` (udp_read), `log`, `slots`, `counts` (udps, udprx, udptx), `upstreams`, and for an
            accepting end take("udp", remote, done): `done` gets what has `wire`, a connection of the pool of which the
            other end was told; or None.
        buckets: of an end with a rate: for what comes from the near side, and for what comes from the far side.

    `largest`: bytes of a datagram that the other end takes whole; larger ones are dropped.
    """

    def __init__(self, end: Any, buckets: tuple[Bucket, Bucket] | None = None,
                 clock: Callable[[], float] = monotonic):
        self.end = end
        self.loop = end.loop
        self.clock = clock
        self.buckets = buckets
        self.largest = DATAGRAM_MAX
        self.port: Port | None = None
        self.flows: collections.OrderedDict[Flow, float] = collections.OrderedDict()  # the quietest first; since when
        self.waiting = 0  # flows that wait for a connection or a name
        self.dropped: collections.Counter[str] = collections.Counter()  # datagrams, by why
        self.news = News(clock)
        self.alarms = Alarms(self.loop, clock)
        self.is_sweeping = False  # an alarm is set for the quietest flow
        self.refused = self.loop.queue(REFUSED_LAST, Flow.end)
        self.buffers: Sequence[memoryview] = ()  # for all wires: see `Wire.use`

    # -- where flows begin

    def listen(self, sock: socket.socket, direct: bool = False) -> None:
        """Serve the callers of a bound, non-blocking UDP socket, which is ours from here on.

        `direct`: they are led to a target from here, and to no other end.
        """
        self.port = Port(self, sock, direct)

    def unlisten(self) -> None:
        """Close that socket, and end its flows."""
        port, self.port = self.port, None
        if port is not None:
            port.close()

    def serve(self, slot: Any, remote: str) -> None:
        """Lead a connection of the pool to a target: the other end has a caller, `remote`.

        `slot` has `wire`, whose callbacks are ours from here on; `early`, the bytes that have come; `ended`, whether
        the other end has ended behind them.
        """
        flow = Flow(self, remote)
        flow.far = framed = Framed(flow, slot.wire, bytes(slot.early), slot.ended)
        if self.admit(flow):
            self.dial(flow, framed.begin)
        else:
            framed.close()

    def admit(self, flow: Flow) -> bool:
        """Whether there is room for another flow; it is one of ours then, and waits."""
        end = self.end
        if len(self.flows) >= FLOWS_MAX or self.waiting >= WAITING_MAX or not end.slots.acquire(True):
            self.drop(NO_ROOM if len(self.flows) >= FLOWS_MAX else CROWD if self.waiting >= WAITING_MAX else NO_SLOT)
            return False
        flow.is_open = flow.waits = True
        self.waiting += 1
        end.counts.udps += 1
        self.flows[flow] = self.clock()
        if not self.is_sweeping:
            self._sweep()
        end.log("debug", f"UDP: a flow of {flow.remote} begins")
        return True

    def dial(self, flow: Flow, ready: Callable[[], None]) -> None:
        """Find a target for a flow.  `ready` is called when its Outlet is there."""

        def dialled(result: socket.socket | Failed) -> None:
            flow.attempt = None
            if isinstance(result, Failed):
                self.tell("error", NO_TARGET, f"UDP: no target for {flow.remote}: {result}")
                flow.give_up(NO_TARGET)
                return
            outlet = Outlet(flow, result)
            if flow.near is None:
                flow.near = outlet
            else:
                flow.far = outlet
            ready()

        attempt = self.end.upstreams.dial(dialled, True)
        flow.dialled = attempt
        if flow.waits:
            flow.attempt = attempt

    # -- what all share

    def use(self, wire: Wire) -> None:
        """Have a wire read into buffers that are there already."""
        if not self.buffers:
            self.buffers = [memoryview(bytearray(PIECE)) for _ in range(2)]
        wire.use(self.buffers)

    def _sweep(self) -> None:
        """End the flows that have been quiet for too long, and come back for the next."""
        self.is_sweeping = False
        now = self.clock()
        while self.flows:
            flow, since = next(iter(self.flows.items()))
            due = since + self.end.times.udp_read
            if due > now:
                self.is_sweeping = True
                self.alarms.at(due, self._sweep)
                return
            flow.end()

    def drop(self, why: str, count: int = 1) -> None:
        """So many datagrams are lost."""
        self.dropped[why] += count
        self.tell("warn", why, "UDP: datagrams were dropped: {0} ({1} so far)", why, self.dropped[why])

    def tell(self, level: str, what: str, text: str, *fields: Any) -> None:
        """Log what strangers can bring about as often as they like: once in a while."""
        if self.news.has(what):
            self.end.log(level, text.format(*fields) if fields else text)

    def close(self) -> None:
        """End everything."""
        self.unlisten()
        for flow in list(self.flows):
            flow.end()
        self.loop.retire(self.refused, self.alarms.timer)


class Flow:
    """The datagrams of one caller, both ways.  It owns its two sides."""

    __slots__ = ("datagrams", "remote", "near", "far", "is_open", "waits", "held", "attempt", "dialled")

    def __init__(self, datagrams: Datagrams, remote: str):
        self.datagrams = datagrams
        self.remote = remote  # the caller's address, for people and for the other end
        self.near: Side | None = None
        self.far: Side | None = None
        self.is_open = False
        self.waits = False  # for one of its sides
        self.held: list[bytes] = []  # of its caller, until the far side is there
        self.attempt: Attempt | None = None  # a dial under way
        self.dialled: Attempt | None = None  # the last one

    def pass_on(self, batch: list[bytes], side: Side) -> None:
        """Send to the other side what one has read, in one turn."""
        datagrams = self.datagrams
        if not self.is_open:
            return
        datagrams.flows[self] = datagrams.clock()
        datagrams.flows.move_to_end(self)
        size = sum(map(len, batch))
        is_near = side is self.near
        if is_near:
            datagrams.end.counts.udprx += size
            if self.far is None:
                self.hold(batch)
            else:
                self.far.send(batch)
        else:
            datagrams.end.counts.udptx += size
            assert self.near is not None  # a Framed is not read before that
            self.near.send(batch)
        if datagrams.buckets is not None:
            pause = datagrams.buckets[0 if is_near else 1].take(size)
            if pause > 0:
                side.hold()
                datagrams.alarms.at(datagrams.clock() + pause, side.release)

    def hold(self, batch: list[bytes]) -> None:
        """Keep what comes before the far side is there, the first one always."""
        room = EARLY_MAX - sum(len(data) + SMALL for data in self.held)
        for at, data in enumerate(batch):
            if room <= 0:
                self.datagrams.drop(EARLY, len(batch) - at)
                return
            self.held.append(data)
            room -= len(data) + SMALL

    def ready(self) -> None:
        """Both sides are there."""
        self.is_waiting_over()
        held, self.held = self.held, []
        if held and self.far is not None:
            self.far.send(held)

    def is_waiting_over(self) -> None:
        """It waits no more."""
        if self.waits:
            self.waits = False
            self.datagrams.waiting -= 1

    def give_up(self, why: str) -> None:
        """The far side cannot be had."""
        if self.is_open:
            if self.held:
                self.datagrams.drop(why, len(self.held))
            self.end()

    def refused(self) -> None:
        """The target has refused a datagram: nobody is there."""
        datagrams = self.datagrams
        if self not in datagrams.refused.due:
            datagrams.refused.put(self)
            if self.dialled is not None:
                self.dialled.refused()

    def end(self) -> None:
        """Close both sides.  More than once does no harm."""
        if not self.is_open:
            return
        self.is_open = False
        datagrams = self.datagrams
        self.is_waiting_over()
        del datagrams.flows[self]
        datagrams.refused.drop(self)
        datagrams.end.slots.release(True)
        datagrams.end.counts.udps -= 1
        if self.attempt is not None:
            self.attempt.cancel()
        for side in (self.near, self.far):
            if side is not None:
                side.close()
        self.held = []
        datagrams.end.log("debug", f"UDP: a flow of {self.remote} ends")


# -- sides -------------------------------------------------------------------------------------


class Side:
    """One side of a flow."""

    __slots__ = ("flow",)

    def __init__(self, flow: Flow):
        self.flow = flow

    def send(self, batch: list[bytes]) -> None:
        """Send datagrams there; what cannot be sent now is dropped."""
        raise NotImplementedError

    def hold(self) -> None:
        """Read no more for now."""
        raise NotImplementedError

    def release(self) -> None:
        """Read again; also where the flow is over."""
        raise NotImplementedError

    def close(self) -> None:
        """The flow is over."""
        raise NotImplementedError


class Port:
    """The UDP socket where callers come in."""

    __slots__ = ("datagrams", "sock", "watch", "direct", "flows", "holds")

    def __init__(self, datagrams: Datagrams, sock: socket.socket, direct: bool):
        self.datagrams = datagrams
        self.sock = sock
        self.direct = direct
        self.flows: dict[Any, Flow] = {}  # by the caller's address
        self.holds = 0  # reasons why it is not read
        widen(sock)
        self.watch = Watch(datagrams.loop.poller, sock.fileno())
        self.watch.wait_for(READ, self.on_ready)

    def on_ready(self, mask: int) -> None:
        """Callers have sent something: read it all, then pass it on, the datagrams of each together."""
        flows, receive = self.flows, self.sock.recvfrom
        batches: dict[Flow, list[bytes]] = {}
        for _ in range(BATCH):
            try:
                data, address = receive(DATAGRAM_MAX)
            except OSError:
                break  # nothing is left
            flow = flows.get(address) or self.begin(address)
            if flow is None:
                continue
            if flow in batches:
                batches[flow].append(data)
            else:
                batches[flow] = [data]
        for flow, batch in batches.items():
            assert flow.near is not None
            flow.pass_on(batch, flow.near)

    def begin(self, address: Any) -> Flow | None:
        """A new caller; None where there is no room."""
        datagrams = self.datagrams
        flow = Flow(datagrams, show_caller(address))
        if not datagrams.admit(flow):
            return None
        self.flows[address] = flow
        flow.near = Inlet(flow, self, address)
        if self.direct:
            datagrams.dial(flow, flow.ready)
        else:
            datagrams.end.take("udp", flow.remote, lambda slot: wired(flow, None if slot is None else slot.wire))
        return flow if flow.is_open else None

    def wait(self, step: int) -> None:
        """One reason more, or less, not to read."""
        self.holds += step
        if self.sock.fileno() >= 0:
            self.watch.wait_for(0 if self.holds else READ, self.on_ready)

    def close(self) -> None:
        for flow in list(self.flows.values()):
            flow.end()
        self.watch.closing()
        self.sock.close()


def wired(flow: Flow, wire: Wire | None) -> None:
    """A new caller has a connection to the other end, or none in time."""
    if wire is None or not flow.is_open or not wire.is_open:
        if wire is not None:
            wire.close()
        flow.give_up(NO_WIRE)
        return
    flow.far = framed = Framed(flow, wire)
    flow.ready()
    framed.begin()


class Inlet(Side):
    """A caller, behind a socket that all callers share."""

    __slots__ = ("port", "address")

    def __init__(self, flow: Flow, port: Port, address: Any):
        super().__init__(flow)
        self.port = port
        self.address = address

    def send(self, batch: list[bytes]) -> None:
        send, address = self.port.sock.sendto, self.address
        for data in batch:
            try:
                send(data, address)
            except OSError as error:
                lose(self.flow, error)

    def hold(self) -> None:
        self.port.wait(1)

    def release(self) -> None:
        self.port.wait(-1)

    def close(self) -> None:
        self.port.flows.pop(self.address, None)


class Outlet(Side):
    """A socket of this flow alone, connected to its target."""

    __slots__ = ("sock", "watch", "is_refused")

    def __init__(self, flow: Flow, sock: socket.socket):
        super().__init__(flow)
        self.sock = sock
        self.is_refused = False  # the last thing that was heard of the target is that nobody is there
        self.watch = Watch(flow.datagrams.loop.poller, sock.fileno())
        self.watch.wait_for(READ, self.on_ready)

    def send(self, batch: list[bytes]) -> None:
        send = self.sock.send
        for data in batch:
            try:
                send(data)
            except ConnectionRefusedError:  # told of one before; this one was not sent
                self.on_refusal()
                try:
                    send(data)
                except OSError as error:
                    lose(self.flow, error)
            except OSError as error:
                lose(self.flow, error)

    def on_ready(self, mask: int) -> None:
        """The target has sent something, or has refused something."""
        receive, batch = self.sock.recv, []
        for _ in range(BATCH):
            try:
                batch.append(receive(DATAGRAM_MAX))
            except ConnectionRefusedError:
                self.on_refusal()
            except OSError:
                break  # nothing is left
        if batch:
            if self.is_refused:
                self.is_refused = False
                self.flow.datagrams.refused.drop(self.flow)
            self.flow.pass_on(batch, self)

    def on_refusal(self) -> None:
        """ICMP says that nobody has this port."""
        self.is_refused = True
        self.flow.refused()
        self.flow.datagrams.drop(REFUSED)

    def hold(self) -> None:
        self.watch.wait_for(0)

    def release(self) -> None:
        if self.sock.fileno() >= 0:
            self.watch.wait_for(READ, self.on_ready)

    def close(self) -> None:
        self.watch.closing()
        self.sock.close()


class Framed(Side):
    """A connection to the other end, in which datagrams travel with their lengths.

    `early`: bytes that have come already; `ended`: whether the other end has ended behind them.
    """

    __slots__ = ("wire", "reader", "early", "ended", "is_heard")

    def __init__(self, flow: Flow, wire: Wire, early: bytes = b"", ended: bool = False):
        super().__init__(flow)
        self.wire = wire
        self.reader = DatagramReader(DATAGRAM_MAX)
        self.early = early
        self.ended = ended
        self.is_heard = False  # a datagram has come
        wire.on_data = self.on_early
        wire.on_end = self.on_early_end
        wire.pause()

    def begin(self) -> None:
        """The near side is there: read."""
        flow, wire = self.flow, self.wire
        flow.is_waiting_over()
        wire.on_data, wire.on_end = self.on_data, self.on_end
        early, self.early = self.early, b""
        if early:
            self.on_data(early)
        if self.ended:
            flow.end()
        elif flow.is_open:
            flow.datagrams.use(wire)
            wire.resume()

    def on_early(self, data: bytes | memoryview) -> None:
        """A piece that was on its way when the wire was paused: there is one at most."""
        self.early += data

    def on_early_end(self, error: Failed | None) -> None:
        """What has come is for the target all the same, where it is whole."""
        self.ended = True
        if error is not None or not self.early:
            self.flow.end()

    def on_data(self, data: bytes | memoryview) -> None:
        """Datagrams from the other end."""
        found = self.reader.feed(data)
        if found:
            self.is_heard = True
            self.flow.pass_on(found, self)

    def on_end(self, error: Failed | None) -> None:
        """The other end has ended the flow: at once, where it does not want it; later, it was quiet for too long there."""
        self.wire.close()
        datagrams = self.flow.datagrams
        quiet = datagrams.clock() - datagrams.flows[self.flow]
        if self.is_heard or isinstance(self.flow.near, Outlet) or quiet >= REFUSED_LAST:
            self.flow.end()
        else:
            datagrams.refused.put(self.flow)

    def send(self, batch: list[bytes]) -> None:
        wire, datagrams = self.wire, self.flow.datagrams
        if not wire.is_open:
            datagrams.drop(UNWANTED, len(batch))
            return
        if wire.unsent > UNSENT_MAX:
            datagrams.drop(FULL_WIRE, len(batch))
            return
        if datagrams.largest < DATAGRAM_MAX:
            small = [data for data in batch if len(data) <= datagrams.largest]
            if len(small) < len(batch):
                datagrams.drop(TOO_LARGE, len(batch) - len(small))
                batch = small
        wire.send(frame_datagram(batch[0]) if len(batch) == 1 else b"".join(map(frame_datagram, batch)))

    def hold(self) -> None:
        self.wire.pause()

    def release(self) -> None:
        if self.flow.is_open:
            self.wire.resume()

    def close(self) -> None:
        self.wire.close()


def lose(flow: Flow, error: OSError) -> None:
    """A socket has not taken a datagram."""
    flow.datagrams.drop(FULL_SOCKET if isinstance(error, BlockingIOError) else error.strerror or TOO_LARGE)


def widen(sock: socket.socket) -> None:
    """Ask for room for what comes while the loop does something else."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE)


def show_caller(address: Any) -> str:
    """HOST:PORT of a caller; IPv4 that came in by a socket of both families is IPv4."""
    host, port = address[:2]
    if host.startswith("::ffff:"):
        host = str(unmapped(ipaddress.ip_address(host.partition("%")[0])))
    return show_address((host, port))
