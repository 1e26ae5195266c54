"""sniroute_h2: HTTP/2 with flow control, for both ends, without I/O (RFC 9113).

    bytes of the peer --- H2.feed ---------> [Opened, Answered, Data, Ended, Reset, Room, Pong, Settled, GoneAway]
    H2.open, head, send, end, reset,
    consume, ping, go_away ----------------> H2.data_to_send ---> bytes for the peer

    Stream.state:   OPEN --- end ---> LOCAL_ENDED ---+
                      |                              +--- the other's END_STREAM, or end ---> CLOSED
                      +-- END_STREAM -> PEER_ENDED --+        RST_STREAM of either, at any time, too

One H2 is one end of a connection.  The two ends are rows of a table, CLIENT and SERVER: what each says at the beginning
is to the letter what the ends of NodePass 2 say (Go's x/net/http2), so either of them may be the other end.

DATA goes by without being gathered: what has come of a frame is an event at once, a view of the bytes that were fed,
good until the next `feed`.  Pieces of one stream that follow each other are one event.  All other frames are taken
whole; none of them may be larger than CONTROL_MAX.

Flow control.  The connection's window is given back as bytes come: a stream whose owner does not read must not stop the
others, the control channel of the tunnel least of all.  A stream's window is given back by its owner (`consume`), once
half of it is used.  So a stream holds one window of bytes at most, and all of them together HELD_MAX: the stream that
goes beyond is reset.

A peer that breaks a rule of the connection, or does for ever what costs it nothing (FLOODS), is told GOAWAY: `feed`
raises Broken, `data_to_send` has the frame, and the H2 is of no use any more.  A fault of one stream is an RST_STREAM
to the peer, and Reset for the owner.

Threads: none.

Seams: I want to ...
    say something else at the beginning     a row of Role
    take another frame                      a row in FRAMES, and a method
    allow more, or less, of something       a row in FLOODS

This room imports sniroute_hpack (fields), sniroute_http2 (frames) and sniroute_refusals (Malformed).
"""

from __future__ import annotations

import collections
import re
import struct
from time import monotonic
from typing import Any, Callable, NamedTuple

from sniroute_hpack import Decoder, Pair, encode
from sniroute_http2 import (ACK, COMPRESSION_ERROR, CONTINUATION, CONTINUATIONS_MAX, DATA, END_HEADERS,
                            ENHANCE_YOUR_CALM, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, GOAWAY, HEADER_SIZE, HEADERS,
                            PADDED, PING, PREFACE, PRIORITY, PROTOCOL_ERROR, PUSH_PROMISE, REFUSED_STREAM, RST_STREAM,
                            SETTINGS, WINDOW_UPDATE, Broken, Frame, check_settings, find_fragment, make_frame)
from sniroute_refusals import Malformed

__version__ = "0.1.0"

# Limits, in bytes where nothing else is said.
CONTROL_MAX = 16384  # a frame other than DATA, section 4.2: no larger one is of use here, whatever MAX_FRAME_SIZE says
BLOCK_MAX = 32768  # the header block of one head, in all its frames; Go's take 60 to 200
STREAMS_MAX = 1024  # streams that a peer has open at a time, where its owner says nothing else: NodePass's `max`
UNSETTLED_MAX = 100  # streams that we open before the peer has said how many it takes: as Go's client
RESETS_KEPT = 2048  # streams of ours that were reset lately: frames for them may be on their way
HELD_MAX = 256 << 20  # what the owners of all streams have not consumed: 64 streams that nobody reads, 4 MiB each
GROWN = 16 << 20  # the connection's window of a server, from its first update on: 1 MiB would be all that is on the way
WINDOW_MAX = (1 << 31) - 1  # section 6.9.1
WINDOW_START = 65535  # section 6.9.2
ID_MAX = (1 << 31) - 1

# What a peer may do so often within FLOOD_SECONDS.  Each costs it a few bytes, and us an answer, or work.  The
# original's client ends every stream with RST_STREAM, so it may do that 5,000 times a second where it was answered.
# WINDOW_UPDATE is not here: Go sends one for every 4 KiB that it reads.
FLOOD_SECONDS = 10.0
FLOODS = {
    "SETTINGS": 100, "PING": 1000, "PRIORITY": 1000, "empty DATA": 1000, "early resets": 1000, "refused streams": 1000,
    "resets": 50000, "stream errors": 200, "unknown frames": 1000, "GOAWAY": 10, "answers of 1xx": 100,
}

END_STREAM = 0x1  # a flag of DATA and HEADERS
NO_ERROR, INTERNAL_ERROR, STREAM_CLOSED, CANCEL = 0x0, 0x2, 0x5, 0x8  # codes, section 7
# Settings, section 6.5.2; the last one is of RFC 9218.
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 2, 3, 4
MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE, NO_RFC7540_PRIORITIES = 5, 6, 9

_header = struct.Struct(">HBBBI")  # section 4.1: the length has three bytes
_unpack, _pack = _header.unpack_from, _header.pack
_setting = struct.Struct(">HI")


class Role(NamedTuple):
    """What one of the two ends says at the beginning, and what it grants."""

    is_client: bool
    first: bytes  # before its SETTINGS
    settings: tuple[tuple[int, int], ...]  # in their order; -1 is the number of streams
    window: int  # of a stream
    connection: int  # of the connection
    grown: int  # of the connection, from its first update on
    frame_max: int
    id: int  # of its first stream


CLIENT = Role(True, PREFACE, ((ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, 4 << 20), (MAX_FRAME_SIZE, 16384),
                              (MAX_HEADER_LIST_SIZE, 10 << 20)),
              4 << 20, (1 << 30) + WINDOW_START, (1 << 30) + WINDOW_START, 16384, 1)
SERVER = Role(False, b"", ((MAX_FRAME_SIZE, 1 << 20), (MAX_CONCURRENT_STREAMS, -1), (MAX_HEADER_LIST_SIZE, 1048896),
                           (HEADER_TABLE_SIZE, 4096), (INITIAL_WINDOW_SIZE, 1 << 20), (NO_RFC7540_PRIORITIES, 1)),
              1 << 20, 1 << 20, GROWN, 1 << 20, 2)


# -- streams and events ------------------------------------------------------------------------

# The states of a stream, section 5.1; those without a number here are in no table.
OPEN, LOCAL_ENDED, PEER_ENDED, CLOSED = "open", "half-closed (local)", "half-closed (remote)", "closed"
WE_END = {OPEN: LOCAL_ENDED, PEER_ENDED: CLOSED}
PEER_ENDS = {OPEN: PEER_ENDED, LOCAL_ENDED: CLOSED}


class Stream:
    """One stream, as both H2 and its owner see it.  `owner` is the owner's."""

    __slots__ = ("id", "state", "sendable", "credit", "window", "used", "has_head", "was_answered", "owner")

    def __init__(self, number: int, sendable: int, window: int):
        self.id = number
        self.state = OPEN
        self.sendable = sendable  # bytes that the peer lets us send; less than 0 where it has taken a part back
        self.credit = 0  # bytes that the peer has given back in all
        self.window = window  # bytes that we let the peer send
        self.used = 0  # consumed, and not yet given back
        self.has_head = False  # whether the peer's head has come
        self.was_answered = False  # whether ours has been sent
        self.owner: Any = None

    def __repr__(self) -> str:
        return f"<stream {self.id}, {self.state}>"


class Opened(NamedTuple):
    """The peer has opened a stream (at a server)."""

    stream: Stream
    fields: list[Pair]


class Answered(NamedTuple):
    """The head of the answer (at a client); not those with a status of 1xx."""

    stream: Stream
    status: int
    fields: list[Pair]


class Data:
    """Bytes of a stream, in pieces which are good until the next `feed`."""

    __slots__ = ("stream", "pieces")

    def __init__(self, stream: Stream, piece: memoryview):
        self.stream = stream
        self.pieces = [piece]

    @property
    def data(self) -> memoryview | bytes:
        """All of them."""
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)


class Ended(NamedTuple):
    """The peer has ended its direction of a stream."""

    stream: Stream


class Reset(NamedTuple):
    """A stream is over: the peer has reset it, or broken a rule."""

    stream: Stream
    code: int
    is_own: bool = False  # whether the fault was found here


class Room(NamedTuple):
    """A window that was empty has room: that of a stream, or of the connection (None)."""

    stream: Stream | None


class Pong(NamedTuple):
    """The peer has answered a ping."""

    data: bytes


class Settled(NamedTuple):
    """The peer has said how many streams it takes, and other things."""


class GoneAway(NamedTuple):
    """The peer takes no new streams.  Those beyond `last` it has not looked at: each is Reset."""

    last: int
    code: int
    words: str  # for people


Event = Opened | Answered | Data | Ended | Reset | Room | Pong | Settled | GoneAway


class Floods:
    """What a peer has done lately of what costs it nothing."""

    __slots__ = ("clock", "since", "counts")

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.since = clock()
        self.counts: collections.Counter[str] = collections.Counter()

    def count(self, what: str) -> None:
        """Once more.  Raises Broken where that is too often."""
        now = self.clock()
        if now - self.since >= FLOOD_SECONDS:
            self.since = now
            self.counts.clear()
        self.counts[what] += 1
        if self.counts[what] > FLOODS[what]:
            raise Broken(f"more than {FLOODS[what]} {what} in {FLOOD_SECONDS:g} s", ENHANCE_YOUR_CALM)


# -- fields ------------------------------------------------------------------------------------

_name = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")  # section 8.2.1
_value = re.compile(rb"[^\0\r\n]*")
_status = re.compile(rb"[1-5]\d\d")
REQUEST = frozenset((b":method", b":scheme", b":authority", b":path"))
ANSWER = frozenset((b":status",))


def read_head(fields: list[Pair], allowed: frozenset[bytes]) -> dict[bytes, bytes]:
    """The pseudo fields of a head.  Raises Malformed where it is malformed.  Source: section 8.2 and 8.3."""
    said: dict[bytes, bytes] = {}
    has_begun = False
    for name, value in fields:
        if not _value.fullmatch(value):
            raise Malformed("a character that no field may have")
        if name[:1] == b":":
            if name not in allowed or name in said or has_begun:
                raise Malformed("a pseudo field that is unknown, doubled, or behind others")
            said[name] = value
            continue
        has_begun = True
        if not _name.fullmatch(name):
            raise Malformed("a field whose name is none")
    if allowed == REQUEST and not said.keys() >= REQUEST - {b":authority"}:
        raise Malformed("a request without method, scheme or path")
    if allowed == ANSWER and not _status.fullmatch(said.get(b":status", b"")):
        raise Malformed("an answer without a status")
    return said


# -- a connection ------------------------------------------------------------------------------


class H2:
    """One end of a connection.

    Args:
        client: whether it is the client's end.
        streams_max: how many streams the peer may have open; of no use at a client.
        clock: seconds, for FLOODS.
    """

    __slots__ = ("role", "streams_max", "floods", "streams", "out", "awaited", "partial", "need", "frame", "stream",
                 "left", "padding", "ends", "block", "block_id", "block_flags", "continuations", "decoder", "sendable",
                 "window", "used", "held", "peer_max", "peer_window", "peer_frame_max", "is_settled", "peer_last",
                 "next_id", "resets", "is_over", "is_leaving")

    def __init__(self, client: bool, streams_max: int = STREAMS_MAX, clock: Callable[[], float] = monotonic):
        role = self.role = CLIENT if client else SERVER
        self.streams_max = streams_max
        self.floods = Floods(clock)
        self.streams: dict[int, Stream] = {}  # those that are not closed
        settings = b"".join(_setting.pack(number, streams_max if value < 0 else value)
                            for number, value in role.settings)
        self.out = bytearray(role.first + make_frame(SETTINGS, settings) + make_frame(
            WINDOW_UPDATE, struct.pack(">I", role.connection - WINDOW_START)))
        self.awaited = b"" if client else PREFACE  # what has to come before any frame
        self.partial = bytearray()  # the header of a frame, or the payload of one other than DATA, that is not whole
        self.need = HEADER_SIZE  # how long it has to be
        self.frame: tuple[int, int, int] | None = None  # type, flags and stream where it is a payload
        # The DATA frame that is coming; or another one that is skipped.
        self.stream: Stream | None = None  # whose it is; None: nobody wants it
        self.left = 0  # bytes of it that have not come, padding too
        self.padding = 0  # how many of them at its end; -1: the next byte says
        self.ends = False  # whether it has END_STREAM
        # The head whose CONTINUATION has to come next.
        self.block = bytearray()
        self.block_id = 0  # its stream; 0: there is none
        self.block_flags = 0
        self.continuations = 0
        self.decoder = Decoder()
        self.sendable = WINDOW_START  # bytes that the peer lets us send on all streams
        self.window = role.connection  # and we the peer
        self.used = 0
        self.held = 0  # bytes of all streams that their owners were told, and have not consumed
        self.peer_max = UNSETTLED_MAX
        self.peer_window = WINDOW_START  # of a new stream
        self.peer_frame_max = CONTROL_MAX
        self.is_settled = False  # whether the peer's SETTINGS have come
        self.peer_last = 0  # the peer's last stream
        self.next_id = role.id  # of our next stream
        self.resets: collections.OrderedDict[int, None] = collections.OrderedDict()
        self.is_over = False  # an error of the connection
        self.is_leaving = False  # the peer takes no more streams

    # -- what we say -------------------------------------------------------------------------

    def data_to_send(self) -> bytearray:
        """All that is to be sent now.  It is the caller's then."""
        out, self.out = self.out, bytearray()
        return out

    @property
    def may_open(self) -> bool:
        """Whether a stream can be opened now."""
        return not self.is_leaving and not self.is_over and len(self.streams) < self.peer_max and self.next_id <= ID_MAX

    def open(self, fields: list[Pair]) -> Stream:
        """Open a stream (a client), where `may_open`."""
        stream = Stream(self.next_id, self.peer_window, self.role.window)
        self.next_id += 2
        self.streams[stream.id] = stream
        self.head(stream, fields)
        return stream

    def head(self, stream: Stream, fields: list[Pair]) -> None:
        """Send the head: a server's answer."""
        stream.was_answered = True
        self.out += make_frame(HEADERS, encode(fields), END_HEADERS, stream.id)

    def send(self, stream: Stream, data: bytes | bytearray | memoryview) -> int:
        """Send as much as the windows and `stream.state` allow.  Returns how many bytes that is; data is not kept."""
        count = min(len(data), stream.sendable, self.sendable)
        if count <= 0 or stream.state is not OPEN and stream.state is not PEER_ENDED:
            return 0
        stream.sendable -= count
        self.sendable -= count
        out, most, number = self.out, self.peer_frame_max, stream.id
        if count == len(data) <= most:
            out += _pack(count >> 8, count & 255, DATA, 0, number)
            out += data
            return count
        view = memoryview(data)
        for at in range(0, count, most):
            size = min(most, count - at)
            out += _pack(size >> 8, size & 255, DATA, 0, number)
            out += view[at:at + size]
        return count

    def end(self, stream: Stream) -> None:
        """End our direction of a stream, behind what was sent."""
        if stream.state in WE_END:
            self.out += make_frame(DATA, b"", END_STREAM, stream.id)
            self.become(stream, WE_END[stream.state])

    def reset(self, stream: Stream, code: int = CANCEL) -> None:
        """End both directions of a stream at once."""
        if stream.state is not CLOSED:
            self.say_reset(stream.id, code)
            self.become(stream, CLOSED)

    def consume(self, stream: Stream, count: int) -> None:
        """The owner has done with so many bytes of a stream: the peer may send as many again.

        Owed for all that `Data` has told, also when the stream is over, or nobody wants it.
        """
        self.held -= count
        self.give_back(stream, count)

    def ping(self, data: bytes) -> None:
        """Send a ping with these 8 bytes."""
        self.out += make_frame(PING, data)

    def go_away(self, code: int = NO_ERROR, words: bytes = b"") -> None:
        """Tell the peer that no more of its streams are taken."""
        self.out += make_frame(GOAWAY, struct.pack(">II", self.peer_last, code) + words)

    def give_back(self, stream: Stream, count: int) -> None:
        """So many bytes of a stream are used: give its window back, once that is half of it."""
        stream.used += count
        if stream.used * 2 >= self.role.window and stream.state in PEER_ENDS:
            self.out += make_frame(WINDOW_UPDATE, struct.pack(">I", stream.used), 0, stream.id)
            stream.window += stream.used
            stream.used = 0

    def say_reset(self, number: int, code: int) -> None:
        """Say RST_STREAM, and remember that: what the peer has sent before it heard of it is skipped."""
        self.out += make_frame(RST_STREAM, struct.pack(">I", code), 0, number)
        self.resets[number] = None
        if len(self.resets) > RESETS_KEPT:
            self.resets.popitem(last=False)

    def become(self, stream: Stream, state: str) -> None:
        """A stream is in another state; when it is CLOSED it is forgotten."""
        stream.state = state
        if state is CLOSED:
            del self.streams[stream.id]
            if self.stream is stream:
                self.stream = None  # the rest of its frame is skipped

    # -- what the peer says --------------------------------------------------------------------

    def feed(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """What these bytes say, in their order.

        Raises Broken for an error of the connection: what came before is lost, and `data_to_send` has a GOAWAY.
        """
        events: list[Event] = []
        if self.is_over:
            return events
        try:
            self._feed(memoryview(data), events)
        except Broken as error:
            self.is_over = True
            self.go_away(error.code, str(error).encode("ascii", "replace"))
            raise
        return events

    def _feed(self, view: memoryview, events: list[Event]) -> None:
        at, end, partial = 0, len(view), self.partial
        if self.awaited:
            at = min(end, len(self.awaited))
            if view[:at] != self.awaited[:at]:
                raise Broken("a preface that is none")
            self.awaited = self.awaited[at:]
        while at < end:
            if self.left:
                at = self._take(view, at, end, events)
            elif not partial and self.frame is None and end - at >= HEADER_SIZE:
                at += HEADER_SIZE
                self._begin(*_unpack(view, at - HEADER_SIZE), events)
            else:
                stop = at + self.need - len(partial)
                partial += view[at:stop]
                at = min(stop, end)
                if len(partial) == self.need:
                    self._go_on(events)

    def _go_on(self, events: list[Event]) -> None:
        """`partial` is whole."""
        whole, frame = bytes(self.partial), self.frame
        self.partial.clear()
        self.need, self.frame = HEADER_SIZE, None
        if frame is None:
            self._begin(*_unpack(whole), events)
        else:
            self._do(*frame, whole, events)

    def _begin(self, high: int, low: int, kind: int, flags: int, number: int, events: list[Event]) -> None:
        """The header of a frame has come."""
        size, number = high << 8 | low, number & ID_MAX  # a bit is reserved
        if size > self.role.frame_max:
            raise Broken(f"a frame of {size} bytes", FRAME_SIZE_ERROR)
        if self.block_id and (kind != CONTINUATION or number != self.block_id):
            raise Broken("a head that is interrupted")
        if not self.is_settled and (kind != SETTINGS or flags & ACK):
            raise Broken("no SETTINGS at the beginning")
        if kind == DATA:
            self._begin_data(size, flags, number, events)
            return
        rule = FRAMES.get(kind)
        if rule is None:
            if kind == PUSH_PROMISE:
                raise Broken("a push, which was not allowed")
            self.floods.count("unknown frames")
            self.stream, self.left, self.padding, self.ends = None, size, 0, False
            return
        if rule.is_of_stream is not None and rule.is_of_stream != bool(number):
            raise Broken(f"a frame of type {kind} on stream {number}")
        if not rule.fits(size):
            raise Broken(f"a frame of type {kind} with {size} bytes", FRAME_SIZE_ERROR)
        if size:
            self.frame, self.need = (kind, flags, number), size
        else:
            self._do(kind, flags, number, b"", events)

    def _do(self, kind: int, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
        """A frame other than DATA is whole."""
        FRAMES[kind].take(self, flags, number, payload, events)

    # -- DATA: section 6.1 ---------------------------------------------------------------------

    def _begin_data(self, size: int, flags: int, number: int, events: list[Event]) -> None:
        if size > self.window:
            raise Broken("more DATA than the connection's window", FLOW_CONTROL_ERROR)
        self.window -= size
        self.used += size
        if self.used * 2 >= self.role.connection:
            grant = self.role.grown - self.window
            self.out += make_frame(WINDOW_UPDATE, struct.pack(">I", grant))
            self.window += grant
            self.used = 0
        stream = self.streams.get(number)
        if stream is None:
            self.check_closed(DATA, number)
        elif code := self._data_fault(stream, size):
            self.fault(stream, code, events)
            stream = None
        else:
            stream.window -= size
        if flags & PADDED and not size:
            raise Broken("a DATA frame without room for what its flags say", FRAME_SIZE_ERROR)
        self.stream, self.left, self.ends = stream, size, bool(flags & END_STREAM)
        self.padding = -1 if flags & PADDED else 0
        if not size:
            self._end_data(events)
            if not self.ends:
                self.floods.count("empty DATA")

    def _data_fault(self, stream: Stream, size: int) -> int:
        """The code of the error where a stream must not have so much DATA now; else 0."""
        if stream.state not in PEER_ENDS:
            return STREAM_CLOSED
        if not stream.has_head:
            return PROTOCOL_ERROR
        return FLOW_CONTROL_ERROR if size > stream.window else 0

    def _take(self, view: memoryview, at: int, end: int, events: list[Event]) -> int:
        """Something of a frame that goes by is at `at`.  Returns where the rest begins."""
        stream = self.stream
        if self.padding < 0:
            self.padding = view[at]
            if self.padding >= self.left:
                raise Broken("more padding than its frame holds")
            if self.padding == self.left - 1 and not self.ends:
                self.floods.count("empty DATA")
            if stream is not None:
                self.give_back(stream, self.padding + 1)
            self.left -= 1
            at += 1
        count = min(self.left - self.padding, end - at)
        if count > 0:
            if stream is not None:
                self._tell(stream, view[at:at + count], events)
            self.left -= count
            at += count
        if self.left <= self.padding:
            skipped = min(self.left, end - at)
            self.left -= skipped
            self.padding -= skipped
            at += skipped
            if not self.left:
                self._end_data(events)
        return at

    def _tell(self, stream: Stream, piece: memoryview, events: list[Event]) -> None:
        if self.held + len(piece) > HELD_MAX:
            self.fault(stream, ENHANCE_YOUR_CALM, events)
            return
        self.held += len(piece)
        last = events[-1] if events else None
        if last.__class__ is Data and last.stream is stream:  # type: ignore[union-attr]
            last.pieces.append(piece)  # type: ignore[union-attr]
        else:
            events.append(Data(stream, piece))

    def _end_data(self, events: list[Event]) -> None:
        stream, self.stream = self.stream, None
        if stream is not None and self.ends:
            self.peer_ends(stream, events)

    def peer_ends(self, stream: Stream, events: list[Event]) -> None:
        """END_STREAM has come."""
        self.become(stream, PEER_ENDS[stream.state])
        events.append(Ended(stream))

    def fault(self, stream: Stream, code: int, events: list[Event]) -> None:
        """The peer has broken a rule of a stream, section 5.4.2."""
        self.floods.count("stream errors")
        self.reset(stream, code)
        events.append(Reset(stream, code, True))

    def is_idle(self, number: int) -> bool:
        """Whether no stream of this number has been opened."""
        return number > self.peer_last if number & 1 != self.role.is_client else number >= self.next_id

    def check_closed(self, kind: int, number: int) -> None:
        """A frame for a stream that is not open.  Raises Broken, unless we have reset it lately: section 5.1."""
        if not number or self.is_idle(number):
            raise Broken(f"a frame of type {kind} on stream {number}, which nobody has opened")
        if number not in self.resets:
            raise Broken(f"a frame of type {kind} on stream {number}, which is closed", STREAM_CLOSED)

    def open_window(self, stream: Stream, more: int, events: list[Event]) -> None:
        """The window of a stream grows, or shrinks.  Section 6.9.1, 6.9.2."""
        was_empty = stream.sendable <= 0
        stream.sendable += more
        if stream.sendable > WINDOW_MAX:
            self.fault(stream, FLOW_CONTROL_ERROR, events)
        elif was_empty and stream.sendable > 0:
            events.append(Room(stream))


# -- heads: section 6.2, 6.10 --------------------------------------------------------------


def on_headers(h2: H2, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
    """The beginning of a head, or all of it.  Section 6.2."""
    start, end = find_fragment(payload, Frame(HEADERS, flags, number, 0, len(payload)))
    h2.block_id, h2.block_flags, h2.continuations = number, flags, 0
    h2.block += payload[start:end]
    if flags & END_HEADERS:
        on_block(h2, events)


def on_continuation(h2: H2, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
    """More of a head.  Section 6.10."""
    if not h2.block_id:
        raise Broken("a CONTINUATION of nothing")
    h2.continuations += 1
    h2.block += payload
    if h2.continuations > CONTINUATIONS_MAX or len(h2.block) > BLOCK_MAX:
        raise Broken("a head that is too large", ENHANCE_YOUR_CALM)
    if flags & END_HEADERS:
        on_block(h2, events)


def on_block(h2: H2, events: list[Event]) -> None:
    """A head is whole."""
    number, h2.block_id = h2.block_id, 0
    block = bytes(h2.block)
    h2.block.clear()
    try:
        fields = h2.decoder.decode(block)
    except Malformed as error:
        raise Broken(str(error), COMPRESSION_ERROR if error.status == 400 else ENHANCE_YOUR_CALM) from None
    ends = bool(h2.block_flags & END_STREAM)
    stream = h2.streams.get(number)
    if stream is not None:
        on_more(h2, stream, fields, ends, events)
    elif h2.role.is_client or not h2.is_idle(number):
        h2.check_closed(HEADERS, number)
    elif not number & 1:
        raise Broken(f"a request on stream {number}, which is no client's")
    else:
        h2.peer_last = number
        on_request(h2, number, fields, ends, events)


def on_request(h2: H2, number: int, fields: list[Pair], ends: bool, events: list[Event]) -> None:
    """A head that opens a stream.  Section 8.3.1."""
    if len(h2.streams) >= h2.streams_max:
        h2.floods.count("refused streams")
        h2.say_reset(number, REFUSED_STREAM)
        return
    stream = Stream(number, h2.peer_window, h2.role.window)
    stream.has_head = True
    h2.streams[number] = stream
    try:
        read_head(fields, REQUEST)
    except Malformed:
        h2.fault(stream, PROTOCOL_ERROR, events)
        events.pop()  # its owner has not heard of it
        return
    events.append(Opened(stream, fields))
    if ends:
        h2.peer_ends(stream, events)


def on_more(h2: H2, stream: Stream, fields: list[Pair], ends: bool, events: list[Event]) -> None:
    """A head on a stream that is open: the answer, or trailers, which nobody asks for.  Section 8.1."""
    if stream.state not in PEER_ENDS:
        h2.fault(stream, STREAM_CLOSED, events)
        return
    try:
        said = read_head(fields, frozenset() if stream.has_head else ANSWER)
    except Malformed:
        h2.fault(stream, PROTOCOL_ERROR, events)
        return
    status = int(said.get(b":status", b"200"))
    if stream.has_head and not ends or status < 200 and ends:
        h2.fault(stream, PROTOCOL_ERROR, events)
        return
    if status < 200:
        h2.floods.count("answers of 1xx")
        return
    if not stream.has_head:
        stream.has_head = True
        events.append(Answered(stream, status, fields))
    if ends:
        h2.peer_ends(stream, events)


# -- other frames: section 6.3 to 6.9 ------------------------------------------------------


def on_priority(h2: H2, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
    """It means nothing any more, and is counted.  Section 5.3.2."""
    h2.floods.count("PRIORITY")


def on_reset(h2: H2, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
    """The peer has broken a stream off.  Section 6.4."""
    stream = h2.streams.get(number)
    if stream is None:
        if h2.is_idle(number):
            raise Broken(f"a reset of stream {number}, which nobody has opened")
        return
    h2.floods.count("resets" if stream.was_answered else "early resets")
    h2.become(stream, CLOSED)
    events.append(Reset(stream, int.from_bytes(payload, "big")))


def on_settings(h2: H2, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
    """What the peer wants, or that it has heard what we want.  Section 6.5."""
    h2.floods.count("SETTINGS")
    if flags & ACK:
        if payload:
            raise Broken("an acknowledgement with settings", FRAME_SIZE_ERROR)
        return
    check_settings(payload)
    said = dict(_setting.iter_unpack(payload))  # the last one of each: a thousand changes are one
    if h2.role.is_client and said.get(ENABLE_PUSH):
        raise Broken("a server that wants to be pushed to")
    if INITIAL_WINDOW_SIZE in said:
        grown = said[INITIAL_WINDOW_SIZE] - h2.peer_window
        h2.peer_window = said[INITIAL_WINDOW_SIZE]
        for stream in list(h2.streams.values()):
            h2.open_window(stream, grown, events)
    h2.peer_frame_max = said.get(MAX_FRAME_SIZE, h2.peer_frame_max)
    if MAX_CONCURRENT_STREAMS in said or not h2.is_settled:
        h2.peer_max = min(said.get(MAX_CONCURRENT_STREAMS, STREAMS_MAX), ID_MAX)
    h2.is_settled = True
    h2.out += make_frame(SETTINGS, b"", ACK)
    events.append(Settled())


def on_ping(h2: H2, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
    """A sign of life, or the wish for one.  Section 6.7."""
    h2.floods.count("PING")
    if flags & ACK:
        events.append(Pong(payload))
    else:
        h2.out += make_frame(PING, payload, ACK)


def on_go_away(h2: H2, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
    """The peer takes no stream behind the last one that it names.  Section 6.8."""
    last, code = struct.unpack_from(">II", payload)
    last &= ID_MAX
    h2.is_leaving = True
    h2.floods.count("GOAWAY")
    events.append(GoneAway(last, code, payload[8:8 + 200].decode("ascii", "replace")))
    for stream in [stream for stream in h2.streams.values() if stream.id > last and h2.role.is_client]:
        h2.become(stream, CLOSED)
        events.append(Reset(stream, REFUSED_STREAM))


def on_window(h2: H2, flags: int, number: int, payload: bytes, events: list[Event]) -> None:
    """The peer takes more, on one stream or on all together.  Section 6.9."""
    more = int.from_bytes(payload, "big") & ID_MAX
    if number:
        stream = h2.streams.get(number)
        if stream is None:
            if h2.is_idle(number):
                raise Broken(f"a window of stream {number}, which nobody has opened")
        elif not more:
            h2.fault(stream, PROTOCOL_ERROR, events)
        else:
            stream.credit += more
            h2.open_window(stream, more, events)
        return
    if not more:
        raise Broken("a WINDOW_UPDATE of 0")
    if h2.sendable + more > WINDOW_MAX:
        raise Broken("a window that is too large", FLOW_CONTROL_ERROR)
    if h2.sendable <= 0:
        events.append(Room(None))
    h2.sendable += more


class Rule(NamedTuple):
    """What is asked of a type of frame, and what is done with it."""

    is_of_stream: bool | None  # whether it is about a stream, or about the connection; None: either
    fits: Callable[[int], bool]  # whether its payload may have so many bytes
    take: Callable[[H2, int, int, bytes, list[Event]], None]  # flags, stream, payload


def is_small(size: int) -> bool:
    """Whether a frame has a size that is of use here."""
    return size <= CONTROL_MAX


FRAMES = {
    HEADERS: Rule(True, is_small, on_headers),
    PRIORITY: Rule(True, lambda size: size == 5, on_priority),
    RST_STREAM: Rule(True, lambda size: size == 4, on_reset),
    SETTINGS: Rule(False, lambda size: size % _setting.size == 0 and size <= CONTROL_MAX, on_settings),
    PING: Rule(False, lambda size: size == 8, on_ping),
    GOAWAY: Rule(False, lambda size: 8 <= size <= CONTROL_MAX, on_go_away),
    WINDOW_UPDATE: Rule(None, lambda size: size == 4, on_window),
    CONTINUATION: Rule(True, is_small, on_continuation),
}
