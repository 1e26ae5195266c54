"""sniroute_streams: HTTP/2 connections whose streams are connections of a pool, as NodePass has them.

    owner --- H2Client.open ---> HEADERS, DATA 00 ~~~~~~~~~~~> H2Server ---> arrived(StreamWire)
          <-- done(StreamWire)        one TLS connection                         | send: the 4 bytes of its id
                                <~~~~~~~~~~~~~~~~ HEADERS 200, DATA <------------+

    StreamWire --- send, finish ---> [out] --- Carrier.pump: in turn, QUANTUM each ---> H2 --- Carrier.flush ---> Wire
               <-- on_data, on_end - [inbox, while it is paused] <--- events of H2 <------- Carrier._on_data <---

    StreamWire.says, .hears:   OPEN --- the end is said, or has come ---> ENDING --- behind out, or inbox ---> OVER

A StreamWire is a wire with two directions, as those of sniroute_duplex: on_end(None) is the end of the peer's, finish()
that of ours, and both travel as END_STREAM.  A reset travels as RST_STREAM with INTERNAL_ERROR.  A Carrier is the
connection below, which all its streams share; H2Client and H2Server are its two ends.

What streams send is framed at once, as long as the connection takes it, and written once a turn of the loop.  What the
connection does not take waits with its stream, so nobody's bulk stands between another's byte and the wire: there are
FULL bytes at most.  What an owner does not read waits with its stream, too, and the stream's window stops the peer; the
connection itself is always read.

The original program ends its streams otherwise, and this copes with it:
    its client    never says END_STREAM, but RST_STREAM with CANCEL.  That is an end where nothing of ours was unsent,
                  for what had come before it is whole, and a break where something was
    its server    never ends a stream at all.  `ends=False` says so: GRACE behind our own end the stream is over.  Where
                  we have not ended, what we send shows that nobody reads it any more: see `H2Client._find_left`

Threads: the loop's only.

Seams: I want to ...
    answer another request         H2Server.on_opened
    treat another event            a row of HANDLERS, and a method
    let streams wait otherwise     Carrier.pump

This room imports sniroute_h2 (H2 and its events), sniroute_layers (Wire), sniroute_loop and sniroute_refusals.
"""

from __future__ import annotations

import collections
import socket
import time
from typing import Any, Callable

from sniroute_h2 import (CANCEL, H2, INTERNAL_ERROR, NO_ERROR, PEER_ENDS, STREAM_CLOSED, STREAMS_MAX, WE_END, Answered,
                         Data, Ended, Event, GoneAway, Opened, Pong, Reset, Room, Settled, Stream)
from sniroute_layers import PIECE, RECORD, ROOM, Wire, unheard
from sniroute_loop import Loop, monotonic
from sniroute_refusals import Failed, Malformed

__version__ = "0.1.0"

# Limits, in bytes where nothing else is said.
QUANTUM = 1 << 16  # that one stream sends before it is another's turn
FLUSH = 1 << 17  # framed bytes that are written before the end of the turn: they are still in the processor's cache
FULL = 1 << 18  # framed, and not yet written: no stream adds to it
CHATTER_MAX = 1 << 20  # the same, of frames that only answer the peer: then it does not read, and never will
PING_EVERY = 5.0  # seconds between two pings of a client, as the original's: its server drops whom it does not hear
PING_LAST = 15.0  # seconds for which its answer is waited; as the control channel's own ping
GREETING = 10.0  # seconds from the head of a stream to its first byte
CLOSING = 10.0  # seconds in which a closed stream has to get rid of something of what is unsent
LINGER = 1.0  # seconds for which a closed stream waits for the peer's end; what comes meanwhile resets it
GRACE = 1.0  # seconds from our end to that of a peer which never says it: what is on its way
LEFT = 1 << 16  # sent on a stream whose reader has left: more than updates of windows that are on their way
ASKS_MAX = 4096  # openings that wait until the peer takes more streams: four times NodePass's usual `max`

REQUEST = ((b":method", b"POST"), (b":path", b"/stream"), (b":scheme", b"https"))
ITS_WINDOW = 1 << 20  # of the original's server, for all streams
HELLO = b"\0"  # a client's first byte: Go sends no head before there is a body
TEXTS = {403: b"unauthorized\n", 404: b"not found\n"}  # as the original's
GENTLE = (CANCEL, NO_ERROR)  # codes of a reset that may be an end

# What a direction may be, as in sniroute_duplex.
OPEN, ENDING, OVER = "open", "ending", "over"


class Streams:
    """What all carriers of one loop share: buffers, and the queues in which they and their streams wait."""

    def __init__(self, loop: Loop, clock: Callable[[], float] = monotonic):
        self.loop = loop
        self.clock = clock  # for floods
        self.buffers = memoryview(bytearray(PIECE + RECORD)), memoryview(bytearray(PIECE))  # of `Wire.use`
        self.flushing: list[Carrier] = loop.batch(Carrier.flush)
        self.telling = loop.queue(0.0, StreamWire.tell)  # those that have something to tell their owners
        self.greeting = loop.queue(GREETING, H2Server.ungreeted)
        self.closing = loop.queue(CLOSING, StreamWire.late)
        self.lingering = loop.queue(LINGER, StreamWire.cancel)
        self.grace = loop.queue(GRACE, StreamWire.cancel)
        self.pinging = loop.queue(PING_EVERY, H2Client.keep_alive)
        self.silent = loop.queue(PING_LAST, H2Client.unanswered)


# -- a stream ----------------------------------------------------------------------------------


class StreamWire(Wire):
    """A stream as a wire with two directions.  `on_data` gets bytes, or a view that is good until it returns.

    A paused wire tells nothing, its end neither: as a socket that nobody reads.
    """

    __slots__ = ("carrier", "stream", "says", "hears", "out", "waiting", "closing", "is_paused", "inbox", "failure",
                 "done")

    half = True  # a half-close reaches the peer

    def __init__(self, carrier: Carrier, stream: Stream):
        super().__init__()
        self.carrier = carrier
        self.stream = stream  # which may be over, by a reset, before the owner has noticed
        stream.owner = self
        self.says = self.hears = OPEN
        self.out: collections.deque[memoryview] = collections.deque()  # not framed yet
        self.waiting = 0  # its bytes
        self.closing = 0  # what they were when `late` looked last
        self.is_paused = False
        self.inbox: collections.deque[bytes] = collections.deque()  # not told yet; the stream's window is its bound
        self.failure: Failed | None = None  # is told behind it
        self.done: Callable[[StreamWire | Failed], None] = unheard  # of `open`; `unheard` again when it was called

    # -- the owner's ---------------------------------------------------------------------------

    @property
    def unsent(self) -> int:
        return self.waiting

    @property
    def peer(self) -> Any:
        """The address of the other side of the connection."""
        return self.carrier.wire.peer  # type: ignore[attr-defined]

    def fingerprint(self) -> str:
        """That of the connection."""
        return self.carrier.wire.fingerprint()  # type: ignore[attr-defined]

    def raw(self) -> socket.socket | None:
        """None: a stream has no socket of its own."""
        return None

    def send(self, data: bytes | bytearray | memoryview) -> None:
        if not self.is_open or self.says is not OPEN or not data:
            return
        carrier, size, sent = self.carrier, len(data), 0
        if self.stream.state not in WE_END:
            self._fail_soon(Failed("reset", "the peer has cancelled the stream"))
            return
        if not self.out and not carrier.is_full:
            sent = carrier.send(self, data if size <= FULL else memoryview(data)[:FULL])
        if sent < size:
            self.out.append(memoryview(data if isinstance(data, bytes) else bytes(data))[sent:])
            self.waiting += size - sent
            carrier.queue(self)
        carrier.touch()

    def finish(self) -> None:
        """End our direction behind what is unsent; reading goes on.  When both directions are over the wire closes."""
        if self.is_open and self.says is OPEN:
            self._end()

    def refuse(self, status: int) -> None:
        """Answer with this status (404: no room; 403: not for you), and close.  For a wire that has sent nothing."""
        if self.leave():
            self._drop_inbox()
            self.carrier.refuse(self.stream, status)

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False
        if self.inbox or self.hears is ENDING or self.failure is not None:
            self.carrier.streams.telling.put(self)

    def close(self) -> None:
        if self.leave():
            self._drop_inbox()
            if self.says is OPEN:
                self._end()
            if self.out:
                self.closing = self.waiting
                self.carrier.streams.closing.put(self)
            elif self.stream.state in PEER_ENDS:
                self.carrier.streams.lingering.put(self)

    def reset(self) -> None:
        if self.leave():
            self._drop_inbox()
            self.cancel(INTERNAL_ERROR)

    # -- our direction -------------------------------------------------------------------------

    def _end(self) -> None:
        self.says = ENDING
        if not self.out:
            self._say_end()

    def _say_end(self) -> None:
        """All is framed: END_STREAM."""
        self.says = OVER
        self.carrier.end(self)
        if self.stream.state in PEER_ENDS:
            if not self.is_open:
                self.carrier.streams.closing.drop(self)
                self.carrier.streams.lingering.put(self)
            elif not self.carrier.ends:
                self.carrier.streams.grace.put(self)
        self._settle()

    def push(self) -> None:
        """Frame up to QUANTUM of what waits."""
        left, before = QUANTUM, self.waiting
        while self.out and left > 0:
            piece = self.out.popleft()
            sent = self.carrier.send(self, piece[:left])
            left -= sent
            self.waiting -= sent
            if sent < len(piece):
                self.out.appendleft(piece[sent:])
                break
        if not self.out and self.says is ENDING:
            self._say_end()
        if before > ROOM >= self.waiting:
            self.on_room()

    def late(self) -> None:
        """A closed wire has had CLOSING to send something."""
        if 0 < self.waiting < self.closing:
            self.closing = self.waiting
            self.carrier.streams.closing.put(self)
        else:
            self.cancel(INTERNAL_ERROR)

    def cancel(self, code: int = CANCEL) -> None:
        """The stream is over, in both directions; an owner that is still there hears the end of the peer's."""
        self._drop_out()
        self.carrier.reset(self.stream, code)
        if self.is_open and self.hears is OPEN:
            self.take_end()

    # -- the peer's direction ------------------------------------------------------------------

    def take(self, data: bytes | memoryview) -> None:
        """Bytes have come."""
        if self.is_open and (self.is_paused or self.inbox):
            self.inbox.append(bytes(data))
            return
        if self.is_open:
            self.on_data(data)  # type: ignore[arg-type]
        else:
            self.cancel(STREAM_CLOSED)  # nobody reads: a kernel resets such a connection, too
        self.carrier.h2.consume(self.stream, len(data))

    def take_end(self) -> None:
        """The peer has ended its direction."""
        self.carrier.streams.lingering.drop(self)
        self.hears = ENDING
        if not self.is_paused and not self.inbox:
            self.tell()

    def take_reset(self, failed: Failed, is_gentle: bool) -> None:
        """The stream is over.  `is_gentle`: that may be how the peer ends it."""
        self.carrier.streams.lingering.drop(self)
        is_whole = is_gentle and not self.out and self.done is unheard
        self._drop_out()
        if not self.is_open:
            return
        if is_whole:
            if self.hears is OPEN:
                self.take_end()
        elif self.hears is ENDING:  # what the peer has said is whole, and waits for its owner
            self.failure = failed
        else:
            self._drop_inbox()
            self._fail(failed)

    def tell(self) -> None:
        """Tell the owner what has waited."""
        inbox, carrier = self.inbox, self.carrier
        while inbox and self.is_open and not self.is_paused:
            pieces, size = [], 0
            while inbox and size < PIECE:
                pieces.append(inbox.popleft())
                size += len(pieces[-1])
            self.on_data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            carrier.h2.consume(self.stream, size)
        carrier.touch()
        if not self.is_open or self.is_paused and (inbox or self.hears is ENDING):
            return
        if self.hears is ENDING:
            self.hears = OVER
            self.on_end(None)
            self._settle()
        if self.failure is not None and self.is_open:
            self._fail(self.failure)

    def _fail_soon(self, failed: Failed) -> None:
        if self.failure is None:
            self.failure = failed
            self.carrier.streams.telling.put(self)

    def _fail(self, failed: Failed) -> None:
        done, self.done = self.done, unheard
        if done is unheard:
            self.ended(failed)
        else:
            self.leave()
            done(failed)

    # -- the end -------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Where both directions are over the wire is closed."""
        if self.says is OVER and self.hears is OVER:
            self.leave()

    def _drop_out(self) -> None:
        self.out.clear()
        self.waiting = 0

    def _drop_inbox(self) -> None:
        self.carrier.h2.consume(self.stream, sum(map(len, self.inbox)))
        self.inbox.clear()


# -- a connection ------------------------------------------------------------------------------


class Carrier:
    """A connection whose streams are wires: what its two ends have in common.

    Args:
        streams: of the loop.
        wire: the connection, of which both have agreed to speak HTTP/2; the carrier's from here on.
        h2: its end.
        ended: called once, with Failed, when the connection is over and was not closed by its owner; all its wires have
            heard that by then.
        ends: whether the peer ends its streams.
    """

    ends = True

    def __init__(self, streams: Streams, wire: Wire, h2: H2, ended: Callable[[Failed], None]):
        self.streams = streams
        self.wire = wire
        self.h2 = h2
        self.ended = ended
        self.is_open = True
        self.is_busy = False  # events are being told: what they cause is written at once, behind the last one
        self.is_due = False  # to be flushed in this turn
        self.ready: collections.OrderedDict[StreamWire, None] = collections.OrderedDict()  # with something to send
        wire.use(streams.buffers)
        wire.on_data, wire.on_end, wire.on_room = self._on_data, self._on_end, self.flush
        wire.resume()
        self.flush()

    def close(self) -> None:
        """Say GOAWAY, and close.  The streams break off."""
        self.ended = unheard
        self.h2.go_away()
        self._part(Failed("closed", "the connection was closed"))

    # -- what is sent --------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Whether the streams have to wait: for `flush`, which comes, or for the wire's `on_room`."""
        return len(self.h2.out) >= FULL or self.wire.unsent > ROOM

    def send(self, wire: StreamWire, data: bytes | bytearray | memoryview) -> int:
        """Frame as much as the windows allow."""
        return self.h2.send(wire.stream, data)

    def end(self, wire: StreamWire) -> None:
        """Frame the end of our direction."""
        self.h2.end(wire.stream)
        self.touch()

    def reset(self, stream: Stream, code: int) -> None:
        """Frame a reset."""
        self.h2.reset(stream, code)
        self.touch()

    def refuse(self, stream: Stream, status: int) -> None:
        """Answer with a status, and nothing else."""
        raise NotImplementedError

    def queue(self, wire: StreamWire) -> None:
        """A wire has something to send, when it is its turn."""
        if wire.stream.sendable > 0:
            self.ready[wire] = None

    def touch(self) -> None:
        """Something may have been framed: write it, in this turn."""
        if self.is_busy or not self.h2.out:
            return
        if len(self.h2.out) >= FLUSH:
            self.flush()
        elif not self.is_due:
            self.is_due = True
            self.streams.flushing.append(self)
            self.streams.loop.hurry()  # whoever sends may be a batch behind this one

    def flush(self) -> None:
        """Write what is framed."""
        self.is_due = False
        if not self.is_open:
            return
        self.pump()
        if self.h2.out:
            self.wire.send(self.h2.data_to_send())
            if self.wire.unsent > CHATTER_MAX:
                self._lost(Failed("reset", "the peer does not read"))
            elif self.ready and not self.is_full and self.h2.sendable > 0 and not self.is_due:
                self.is_due = True
                self.streams.flushing.append(self)
                self.streams.loop.hurry()

    def pump(self) -> None:
        """Frame what waits, one stream after another, as long as the connection takes it."""
        ready, was_busy = self.ready, self.is_busy
        self.is_busy = True
        try:
            while ready and self.h2.sendable > 0 and not self.is_full:
                wire, _ = ready.popitem(last=False)
                wire.push()
                if wire.out and wire.stream.sendable > 0:
                    ready[wire] = None
        finally:
            self.is_busy = was_busy

    # -- what comes ----------------------------------------------------------------------------

    def _on_data(self, data: bytes | memoryview) -> None:
        self.is_busy = True
        try:
            for event in self.h2.feed(data):
                if not self.is_open:
                    return
                getattr(self, HANDLERS[event.__class__])(event)
        except Malformed as error:
            self._lost(Failed("broken", f"HTTP/2: {error}"))
        except Exception:
            self._lost(Failed("internal", "a fault in sniroute"))  # the events behind it are lost
            raise
        finally:
            self.is_busy = False
        self.flush()

    def _on_end(self, error: Failed | None) -> None:
        self._lost(error or Failed("reset", "the peer has closed the connection"))

    def _lost(self, failed: Failed) -> None:
        if self.is_open:
            self._part(failed)
            ended, self.ended = self.ended, unheard  # who hears it may know us: else both wait to be collected
            ended(failed)

    def _part(self, failed: Failed) -> None:
        """The connection is over: tell its wires."""
        if not self.is_open:
            return
        self.is_open = False
        if self.h2.out:
            self.wire.send(self.h2.data_to_send())
        self.wire.close()
        self.ready.clear()
        for stream in list(self.h2.streams.values()):
            self.h2.reset(stream)
            if stream.owner is not None:
                stream.owner.take_reset(failed, False)
                stream.owner = None
        self.h2.out.clear()

    def on_data(self, event: Data) -> None:
        """Bytes of a stream."""
        wire = event.stream.owner
        if wire is None:
            self.h2.consume(event.stream, len(event.data))
        else:
            wire.take(event.data)

    def on_ended(self, event: Ended) -> None:
        """The peer has ended its direction of a stream."""
        if event.stream.owner is not None:
            event.stream.owner.take_end()

    def on_reset(self, event: Reset) -> None:
        """A stream is over."""
        words = f"{'a fault' if event.is_own else 'reset by the peer'}, HTTP/2 code {event.code}"
        if event.stream.owner is not None:
            event.stream.owner.take_reset(Failed("reset", words), event.code in GENTLE and not event.is_own)

    def on_room(self, event: Room) -> None:
        """A window has room; `flush` follows."""
        if event.stream is not None and event.stream.owner is not None and event.stream.owner.out:
            self.ready[event.stream.owner] = None

    def on_nothing(self, event: Event) -> None:
        """Nothing to be done here."""

    on_opened = on_answered = on_pong = on_settled = on_gone = on_nothing


HANDLERS = {  # the method for each
    Opened: "on_opened", Answered: "on_answered", Data: "on_data", Ended: "on_ended", Reset: "on_reset",
    Room: "on_room", Pong: "on_pong", Settled: "on_settled", GoneAway: "on_gone",
}


# -- its two ends ------------------------------------------------------------------------------


class Ask:
    """A wire that is being opened, or waits until the peer takes one more."""

    __slots__ = ("done", "wire")

    def __init__(self, done: Callable[[StreamWire | Failed], None]):
        self.done = done
        self.wire: StreamWire | None = None  # from when it is asked for

    def cancel(self) -> None:
        """It is not wanted any more: `done` is not called."""
        self.done = unheard
        if self.wire is not None and self.wire.done is not unheard:
            self.wire.done = unheard
            self.wire.reset()


class H2Client(Carrier):
    """The end that opens streams.

    Args:
        authority: the server's name; `none` where it has none.
        ends: False where the peer is the original's server.
    """

    def __init__(self, streams: Streams, wire: Wire, authority: str, ended: Callable[[Failed], None] = unheard,
                 ends: bool = True):
        self.ends = ends
        self.asks: collections.deque[Ask] = collections.deque()
        self.request = [(b":authority", authority.encode("ascii", "replace")), *REQUEST,
                        (b"accept-encoding", b"gzip"), (b"user-agent", b"Go-http-client/2.0")]
        self.credits: dict[Stream, int] = {}  # of streams, at the last look at those whose reader seems to have left
        super().__init__(streams, wire, H2(True, clock=streams.clock), ended)
        streams.pinging.put(self)

    def open(self, done: Callable[[StreamWire | Failed], None]) -> Ask:
        """Open a stream: `done` gets its wire once the server has answered, or Failed.  What comes next are the bytes
        of its id.  It may be called before this returns, but only with Failed.  The owner has a deadline."""
        ask = Ask(done)
        if not self.is_open or self.h2.is_leaving or len(self.asks) >= ASKS_MAX:
            done(Failed("busy", "the connection takes no more streams"))
            return ask
        self.asks.append(ask)
        self._open_more()
        self.touch()
        return ask

    def _open_more(self) -> None:
        while self.asks and self.h2.may_open:
            ask = self.asks.popleft()
            if ask.done is not unheard:
                ask.wire = StreamWire(self, self.h2.open(self.request))
                ask.wire.done = ask.done
                ask.wire.send(HELLO)

    def flush(self) -> None:
        self._open_more()
        super().flush()

    def _part(self, failed: Failed) -> None:
        super()._part(failed)
        self.streams.pinging.drop(self)
        self.streams.silent.drop(self)
        self._give_up(failed)

    def _give_up(self, failed: Failed) -> None:
        asks, self.asks = self.asks, collections.deque()
        for ask in asks:
            ask.done(failed)

    def on_answered(self, event: Answered) -> None:
        wire = event.stream.owner
        done, wire.done = wire.done, unheard
        if done is unheard:
            return
        if event.status == 200:
            done(wire)
        else:
            wire.reset()
            done(Failed("refused", f"the server answers HTTP {event.status}"))

    def on_gone(self, event: GoneAway) -> None:
        """The server takes no more streams."""
        self._give_up(Failed("busy", f"the server goes away, HTTP/2 code {event.code} {event.words}".rstrip()))

    def keep_alive(self) -> None:
        """Ask whether the server lives."""
        self.h2.ping(bytes(8))
        self.touch()
        self.streams.pinging.put(self)
        if self not in self.streams.silent.due:
            self.streams.silent.put(self)
        if not self.ends:
            self._find_left()

    def _find_left(self) -> None:
        """Break off streams that the original's server has left without a word.

        Where nobody reads a stream any more, it gives back the connection's window, and not the stream's; where one is
        only slow to read, neither.  So a stream that has more on its way than the whole connection was left.  That is
        looked at twice, since it says the one before the other.  Source: golang.org/x/net/http2, processData.
        """
        before, self.credits = self.credits, {}
        on_way = ITS_WINDOW - self.h2.sendable
        for stream in list(self.h2.streams.values()):
            if self.h2.peer_window - stream.sendable > on_way + LEFT:
                self.credits[stream] = stream.credit
                if before.get(stream) == stream.credit:
                    self.h2.reset(stream)
                    stream.owner.take_reset(Failed("reset", "the other side has left"), False)
        self.touch()

    def unanswered(self) -> None:
        """It has not said so for PING_LAST."""
        self._lost(Failed("timeout", f"no answer to a ping within {PING_LAST:g} s"))

    def on_pong(self, event: Pong) -> None:
        self.streams.silent.drop(self)


class H2Server(Carrier):
    """The end at which streams arrive.

    Args:
        arrived: called with the wire of each, whose owner sends its id next, or refuses it.
        streams_max: how many there may be at a time.
    """

    def __init__(self, streams: Streams, wire: Wire, arrived: Callable[[StreamWire], None],
                 ended: Callable[[Failed], None] = unheard, streams_max: int = STREAMS_MAX):
        self.arrived = arrived
        super().__init__(streams, wire, H2(False, streams_max, streams.clock), ended)

    def on_opened(self, event: Opened) -> None:
        said = dict(event.fields)
        if any(said[name] != value for name, value in REQUEST if name != b":scheme"):
            self.refuse(event.stream, 404)
        else:
            self.streams.greeting.put((self, event.stream))

    def on_data(self, event: Data) -> None:
        stream, data = event.stream, event.data
        if stream.owner is None and stream.state in WE_END:  # HELLO, and what is behind it
            self.streams.greeting.drop((self, stream))
            wire = StreamWire(self, stream)
            self.h2.consume(stream, 1)
            self.arrived(wire)
            if len(data) > 1:
                wire.take(data[1:])
        else:
            super().on_data(event)

    def on_ended(self, event: Ended) -> None:
        if event.stream.owner is None:
            self.ungreeted((self, event.stream))
        else:
            super().on_ended(event)

    @staticmethod
    def ungreeted(item: tuple[H2Server, Stream]) -> None:
        """A stream without HELLO is over."""
        carrier, stream = item
        carrier.streams.greeting.drop(item)
        carrier.reset(stream, CANCEL)

    def send(self, wire: StreamWire, data: bytes | bytearray | memoryview) -> int:
        self._answer(wire.stream, 200, b"application/octet-stream")
        return self.h2.send(wire.stream, data)

    def end(self, wire: StreamWire) -> None:
        self._answer(wire.stream, 200, b"application/octet-stream")
        super().end(wire)

    def refuse(self, stream: Stream, status: int) -> None:
        self._answer(stream, status, b"text/plain; charset=utf-8")
        self.h2.send(stream, TEXTS.get(status, b""))
        self.h2.end(stream)
        self.reset(stream, NO_ERROR)

    def _answer(self, stream: Stream, status: int, kind: bytes) -> None:
        """Send the head, once."""
        if not stream.was_answered and stream.state in WE_END:
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()).encode()
            self.h2.head(stream, [(b":status", b"%d" % status), (b"content-type", kind), (b"date", date)])
