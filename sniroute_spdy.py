"""sniroute_spdy: SPDY/3.1 as Kubernetes speaks it, without I/O: the client's side of one session.

    forward(8080), command() ---> a Call: a set of streams that belong together
    send, end, reset, ping -----> out --- take() ---> bytes to send
    bytes that came --- receive ---> [Accepted, Data, Ended, Told, Reset, Pong, GoneAway]

A port-forward and a command (`exec`) are each a Call, with a row in the table of kinds:

    FORWARD   error <---  data <-->                     a text on `error` ends this Call, and no other
    COMMAND   error <---  stdin --->  stdout, stderr <---   `error` tells at the end what came of it

Kubernetes uses SPDY without its flow control: WINDOW_UPDATE means nothing, and a peer sends what it has.  So a session
that is not read for the sake of one Call stands still for all: use one session for each client, or read on and throw
away.  All header blocks of one direction are one stream of zlib, so a block is compressed where it is sent.  What
comes in such blocks is not read: Kubernetes says nothing in them, and zlib would take 40 KiB for each session.

    Deflater   makes header blocks
    Session    the machine; the caller owns socket and clock

What is kept is bounded: a part of a control frame, TEXT_MAX of each error stream, OPEN_MAX streams, REPLIES_MAX of what
the peer makes us answer.  A stream that both ends have ended is forgotten.

Threads: none.  A Session belongs to one thread.

Seams: I want to ...
    open another set of streams    a row as FORWARD, and a method beside `forward`
    hear another control frame     a row in HEARD, and its function
    carry a session in WebSocket   Tunnel of sniroute_channels

Source: SPDY Protocol, draft 3.1 (https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/), and what
Kubernetes 1.36 and its kubectl do.

This room imports sniroute_refusals (Malformed).
"""

from __future__ import annotations

import collections
import struct
import zlib
from typing import Any, Callable, Iterable, NamedTuple

from sniroute_refusals import Malformed

__version__ = "0.1.0"

Pair = tuple[bytes, bytes]  # name and value of a header

# Limits, in bytes where nothing else is said.
CONTROL_MAX = 16384  # a control frame; the draft asks for 8,192, and Kubernetes sends less than 300
TEXT_MAX = 16384  # what is kept of an error stream.  A program's last words are in it, and few of them count
OPEN_MAX = 1000  # streams that are open at a time: a session is for one client, or for few
REPLIES_MAX = 16384  # what the peer makes us answer between two `take`s: a thousand pings
FORGOTTEN_MAX = 256  # streams that we have reset, and that may have something in flight; each is told so once
STREAM_LAST = 0x7FFFFFFF  # the largest number of a stream: 31 bits
PING_LAST = 0xFFFFFFFF
# A data frame that we send: as much as kubectl's.  The peer hands it on when it is whole, so larger ones would be late.
FRAME_DATA = 32760  # with its header it fills two TLS records

# -- frames ------------------------------------------------------------------------------------

# Types of control frames, section 2.6.
SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9
FIN = 0x1  # the flag of data, SYN_STREAM, SYN_REPLY and HEADERS: this end sends nothing more on the stream
# What RST_STREAM says, section 2.6.3.
PROTOCOL_ERROR, INVALID_STREAM, REFUSED_STREAM, CANCEL, STREAM_ALREADY_CLOSED = 1, 2, 3, 5, 9
OK = 0  # what GOAWAY says, section 2.6.6
MAX_CONCURRENT_STREAMS = 4  # the one setting that is obeyed, section 2.6.4

CONTROL = 0x80000000  # the first bit of a control frame
VERSION = 3
HEADER = 8  # bytes of a frame's header

_head = struct.Struct(">II")  # the stream, or version and type; flags and length
_number = struct.Struct(">I")
_two = struct.Struct(">II")


def control_frame(kind: int, payload: bytes, flags: int = 0) -> bytes:
    """A control frame.  Source: section 2.2.1."""
    return _head.pack(CONTROL | VERSION << 16 | kind, flags << 24 | len(payload)) + payload


def data_head(stream: int, size: int, flags: int = 0) -> bytes:
    """What stands before `size` bytes of data.  Source: section 2.2.2."""
    return _head.pack(stream, flags << 24 | size)


# -- header blocks -----------------------------------------------------------------------------

# The dictionary with which a stream of zlib begins, section 2.6.10.1: words, each behind its length, and a text.
_WORDS = (
    "options,head,post,put,delete,trace,accept,accept-charset,accept-encoding,accept-language,accept-ranges,age,allow,"
    "authorization,cache-control,connection,content-base,content-encoding,content-language,content-length,"
    "content-location,content-md5,content-range,content-type,date,etag,expect,expires,from,host,if-match,"
    "if-modified-since,if-none-match,if-range,if-unmodified-since,last-modified,location,max-forwards,pragma,"
    "proxy-authenticate,proxy-authorization,range,referer,retry-after,server,te,trailer,transfer-encoding,upgrade,"
    "user-agent,vary,via,warning,www-authenticate,method,get,status,200 OK,version,HTTP/1.1,url,public,set-cookie,"
    "keep-alive,origin")
_TEXT = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritative "
    "Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 "
    "Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec "
    "00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,"
    "application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8"
    "charset=iso-8859-1,utf-,*,enq=0.")
DICTIONARY = b"".join(_number.pack(len(word)) + word.encode() for word in _WORDS.split(",")) + _TEXT.encode()

# How we compress: with the smallest window zlib takes 9 KiB for a session instead of 270.  Only the end of the dictionary
# fits into it: a session's first block is 8 bytes longer for that, and the others are as short.
WINDOW_BITS, MEMORY_LEVEL = 9, 1


class Deflater:
    """Makes our header blocks, in the order in which they are sent."""

    __slots__ = ("stream",)

    def __init__(self) -> None:
        self.stream: Any = None  # zlib's, from the first block on: a session that waits for its client needs none

    def block(self, headers: Iterable[Pair]) -> bytes:
        """A header block; names are in lower case.  Source: section 2.6.10."""
        if self.stream is None:
            self.stream = zlib.compressobj(1, zlib.DEFLATED, WINDOW_BITS, MEMORY_LEVEL, zdict=DICTIONARY)
        pairs = list(headers)
        plain = _number.pack(len(pairs)) + b"".join(
            _number.pack(len(text)) + text for pair in pairs for text in pair)
        return self.stream.compress(plain) + self.stream.flush(zlib.Z_SYNC_FLUSH)


# -- calls -------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of Call, as a row."""

    names: tuple[str, ...]  # the header `streamtype` of each of its streams, in the order in which they are opened
    sends: str  # the stream on which we send
    hears: tuple[str, ...]  # those on which bytes come, beside `error`
    is_ended_by_text: bool  # whether a text on `error` means that it is over


ERROR = "error"  # the stream that tells what went wrong; or, of a command, what came of it
FORWARD = Kind(names=(ERROR, "data"), sends="data", hears=("data",), is_ended_by_text=True)
COMMAND = Kind(names=(ERROR, "stdin", "stdout", "stderr"), sends="stdin", hears=("stdout", "stderr"),
               is_ended_by_text=False)

# States of a stream, by the words of RFC 9113 section 5.1.  One that both ends have ended is forgotten.
OPEN, HALF_CLOSED_LOCAL, HALF_CLOSED_REMOTE = "open", "half-closed (local)", "half-closed (remote)"


class Stream:
    """One stream of a Call."""

    __slots__ = ("call", "name", "number", "state")

    def __init__(self, call: Call, name: str, number: int, state: str = OPEN):
        self.call = call
        self.name = name
        self.number = number
        self.state = state


class Call:
    """Streams that belong together: one port-forward, or one command.  Made by the machine that carries it."""

    __slots__ = ("kind", "streams", "text")

    def __init__(self, kind: Kind):
        self.kind = kind
        self.streams: dict[str, Stream] = {}  # by name; those that are not ended at both ends
        self.text = bytearray()  # what came on `error`, and was not told yet

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes of it, and nothing more can be sent."""
        return not self.streams

    @property
    def sends(self) -> bool:
        """Whether something may still be sent."""
        stream = self.streams.get(self.kind.sends)
        return stream is not None and stream.state != HALF_CLOSED_LOCAL


# -- events ------------------------------------------------------------------------------------


class Accepted(NamedTuple):
    """The peer has taken the Call.  Whether anybody listens on its port is not known yet."""

    call: Call


class Data(NamedTuple):
    """Bytes that came."""

    call: Call
    name: str  # of the stream: data, stdout, stderr
    data: memoryview  # into what was received: use it, or copy it, before that is reused


class Ended(NamedTuple):
    """The far end sends nothing more on this stream.  We still may."""

    call: Call
    name: str


class Told(NamedTuple):
    """What came on the error stream, when that has ended.  A forward is over then; it was cut, unless data had ended.

    A stranger's words: make them `printable` before they are logged.
    """

    call: Call
    text: str


class Reset(NamedTuple):
    """The Call is over, and was cut."""

    call: Call
    status: int  # of RST_STREAM; 0 where the session has ended


class Pong(NamedTuple):
    """A ping of ours was answered."""

    number: int


class GoneAway(NamedTuple):
    """The peer takes no new streams, and ends the connection when those that are open are over."""

    status: int


Event = Accepted | Data | Ended | Told | Reset | Pong | GoneAway


def tell(call: Call) -> Told:
    """The event for what came on the error stream; it is told once."""
    text = call.text.decode("utf-8", "replace")
    call.text.clear()
    return Told(call, text)


# -- the session -------------------------------------------------------------------------------


class Full(Exception):
    """This session takes no new streams: `takes_more` was not asked."""


class Session:
    """The client's side of a connection that speaks SPDY.

    Methods of the caller add to what is to be sent; `take` hands it out.  Take it when the socket has taken what was
    taken before: so `pending` tells how much waits, and a flood of pings is seen.  A Call that is over takes no more
    bytes, and says nothing.  Events that `receive` returns together were found together, so those behind one may be of
    a Call that the caller has just reset: throw them away.
    """

    __slots__ = ("out", "part", "left", "ends", "sink", "streams", "number", "theirs", "limit", "pings", "replies",
                 "is_leaving", "forgotten", "deflater")

    def __init__(self) -> None:
        self.out = bytearray()
        self.part = b""  # the beginning of a frame: a header, or a control frame
        self.left = 0  # bytes of the current data frame that are still to come
        self.ends = False  # whether that frame is the last one of its stream
        self.sink: Stream | None = None  # where its bytes go; None: nowhere
        self.streams: dict[int, Stream] = {}  # by number; those that are not ended at both ends
        self.number = 1  # of the next stream.  Ours are odd
        self.theirs = 0  # the last stream that the peer has opened, and we have refused.  Its own are even
        self.limit = OPEN_MAX  # streams that the peer allows at a time
        self.pings = 0  # how many were sent
        self.replies = 0  # bytes that the peer made us say since the last `take`
        self.is_leaving = False  # GOAWAY was said or heard
        self.forgotten: collections.deque[int] = collections.deque(maxlen=FORGOTTEN_MAX)
        self.deflater = Deflater()

    # -- what the caller asks

    @property
    def pending(self) -> int:
        """Bytes that `take` would return."""
        return len(self.out)

    @property
    def takes_more(self) -> bool:
        """Whether one more Call may be opened: there are numbers left, and the peer takes streams."""
        most = len(COMMAND.names)
        return not self.is_leaving and len(self.streams) + most <= self.limit and (
            self.number + 2 * (most - 1) <= STREAM_LAST)

    @property
    def calls(self) -> list[Call]:
        """Those that are not over."""
        return list({id(stream.call): stream.call for stream in self.streams.values()}.values())

    def take(self) -> bytearray:
        """What is to be sent; the next call returns what came after it."""
        taken, self.out = self.out, bytearray()
        self.replies = 0
        return taken

    # -- what the caller does

    def forward(self, port: int) -> Call:
        """Open a connection to a port of the pod.  Bytes may be sent at once.  Raises Full.

        The error stream is ended by us as it is opened: nothing is ever sent on it.
        """
        return self._open(FORWARD, (b"port", b"%d" % port), (b"requestid", b"%d" % self.number))

    def command(self) -> Call:
        """Open the streams of the command that the upgrade asked for: there is one in a session.  Raises Full."""
        return self._open(COMMAND)

    def send(self, call: Call, data: bytes | bytearray | memoryview) -> None:
        """Send bytes."""
        if not call.sends or not data:
            return
        number = call.streams[call.kind.sends].number
        if len(data) <= FRAME_DATA:
            self.out += data_head(number, len(data))
            self.out += data
            return
        view = memoryview(data)
        for at in range(0, len(view), FRAME_DATA):
            self.send(call, view[at:at + FRAME_DATA])

    def end(self, call: Call) -> bool:
        """We send nothing more.  Returns whether the far end is told so: here it always is."""
        if call.sends:
            stream = call.streams[call.kind.sends]
            self.out += data_head(stream.number, 0, FIN)
            self._end_here(stream)
        return True

    def reset(self, call: Call, status: int = CANCEL) -> None:
        """Break a Call off.  What is still in flight is thrown away.

        The library of Kubernetes' servers (spdystream) does not look at this while it writes: a pod that has much to
        say goes on until it notices.  Where nothing else uses the session, end the connection instead.
        """
        for stream in call.streams.values():
            self.out += control_frame(RST_STREAM, _two.pack(stream.number, status))
        self._drop(call)

    def ping(self) -> int:
        """Ask for a Pong, which has the number that is returned.  A session whose Pong does not come is dead."""
        number = 2 * self.pings % (PING_LAST + 1) + 1  # ours are odd
        self.pings += 1
        self.out += control_frame(PING, _number.pack(number))
        return number

    def leave(self) -> None:
        """Say that the connection ends.  No stream of the peer's was taken, so the last one is 0."""
        self.is_leaving = True
        self.out += control_frame(GOAWAY, _two.pack(0, OK))

    def lost(self) -> list[Event]:
        """What it means for those that are open that the connection has ended.  Nothing comes after it."""
        self.is_leaving = True
        events: list[Event] = []
        for call in self.calls:
            self.cut(call, OK, events)
        return events

    # -- what came

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """What has come of these bytes.

        Raises Malformed where the connection cannot be read any further: end it, and ask `lost`.
        """
        events: list[Event] = []
        if self.part:
            data = self.part + bytes(data)
            self.part = b""
        view = memoryview(data)
        at, end = 0, len(view)
        while at < end:
            if self.left:
                piece = view[at:at + self.left]
                at += len(piece)
                self.left -= len(piece)
                self._carry(piece, events)
                continue
            if end - at < HEADER:
                break
            first, second = _head.unpack_from(view, at)
            flags, size = second >> 24, second & 0xFFFFFF
            if not first & CONTROL:
                at += HEADER
                self._begin(first, flags, size, events)
                continue
            if first >> 16 != CONTROL >> 16 | VERSION or size > CONTROL_MAX:
                raise Malformed(f"SPDY: a control frame {first:#x} of {size} bytes")
            if end - at - HEADER < size:
                break
            at += HEADER + size
            fits, hear = HEARD.get(first & 0xFFFF, IGNORED)
            if not fits(size):
                raise Malformed(f"SPDY: a control frame of type {first & 0xFFFF} with {size} bytes")
            hear(self, flags, bytes(view[at - size:at]), events)
        self.part = bytes(view[at:])
        return events

    # -- data

    def _begin(self, number: int, flags: int, size: int, events: list[Event]) -> None:
        """The header of a data frame."""
        stream = self.sink = self.streams.get(number)
        self.left, self.ends = size, bool(flags & FIN)
        if stream is None:
            self._reject(number)
        elif stream.state == HALF_CLOSED_REMOTE:
            self.sink = None
            self.reset(stream.call, STREAM_ALREADY_CLOSED)
            events.append(Reset(stream.call, STREAM_ALREADY_CLOSED))
        elif not size and self.ends:
            self.end_there(stream, events)

    def _carry(self, piece: memoryview, events: list[Event]) -> None:
        """Bytes of the current data frame."""
        stream = self.sink
        if stream is None:
            return
        if stream.name == ERROR:
            stream.call.text += piece[:TEXT_MAX - len(stream.call.text)]
        elif stream.name in stream.call.kind.hears:
            events.append(Data(stream.call, stream.name, piece))
        if not self.left and self.ends:
            self.end_there(stream, events)

    def _reject(self, number: int) -> None:
        """Data for a stream that is not open, which is thrown away.  Raises Malformed where it never was.

        The peer is told once that it is closed.  Streams that the peer has opened were refused already.
        """
        if number >= self.number if number & 1 else not 0 < number <= self.theirs:
            raise Malformed(f"SPDY: data for stream {number}, which was never opened")
        if number & 1 and number not in self.forgotten:
            self.forgotten.append(number)
            self.reply(control_frame(RST_STREAM, _two.pack(number, STREAM_ALREADY_CLOSED)))

    # -- streams; the functions that hear control frames use these, too

    def _open(self, kind: Kind, *headers: Pair) -> Call:
        """Open the streams of a Call."""
        if not self.takes_more:
            raise Full("this session takes no new streams")
        call = Call(kind)
        for name in kind.names:
            is_ended = kind.is_ended_by_text and name == ERROR
            stream = Stream(call, name, self.number, HALF_CLOSED_LOCAL if is_ended else OPEN)
            block = self.deflater.block(((b"streamtype", name.encode()), *headers))
            self.out += control_frame(SYN_STREAM, _two.pack(self.number, 0) + b"\0\0" + block, FIN if is_ended else 0)
            self.streams[self.number] = call.streams[name] = stream
            self.number += 2
        return call

    def _end_here(self, stream: Stream) -> None:
        """We have sent our last byte on a stream."""
        if stream.state == HALF_CLOSED_REMOTE:
            self.forget(stream)
        else:
            stream.state = HALF_CLOSED_LOCAL

    def end_there(self, stream: Stream, events: list[Event]) -> None:
        """The peer has sent its last byte on a stream."""
        call = stream.call
        if stream.state == HALF_CLOSED_REMOTE:  # HEADERS that end it once more
            return
        if stream.name in call.kind.hears:
            events.append(Ended(call, stream.name))
        elif stream.name == ERROR and call.text:
            if call.kind.is_ended_by_text:
                self.cut(call, OK, events)
                return
            events.append(tell(call))
        if stream.state == OPEN and stream.name != call.kind.sends:  # of a command, and we never send on it
            self.out += data_head(stream.number, 0, FIN)
            stream.state = HALF_CLOSED_LOCAL
        if stream.state == HALF_CLOSED_LOCAL:
            self.forget(stream)
        else:
            stream.state = HALF_CLOSED_REMOTE

    def cut(self, call: Call, status: int, events: list[Event]) -> None:
        """A Call is over: because of what was told, or else cut."""
        events.append(tell(call) if call.text else Reset(call, status))
        self.reset(call)

    def forget(self, stream: Stream) -> None:
        """A stream is over."""
        del self.streams[stream.number], stream.call.streams[stream.name]
        if self.sink is stream:
            self.sink = None

    def _drop(self, call: Call) -> None:
        """All streams of a Call are over; both ends know."""
        for stream in list(call.streams.values()):
            self.forgotten.append(stream.number)
            self.forget(stream)

    def reply(self, frame: bytes) -> None:
        """Say what the peer makes us say.  Raises Malformed where it asks for more than it reads."""
        self.replies += len(frame)
        if self.replies > REPLIES_MAX:
            raise Malformed("SPDY: a flood of what has to be answered")
        self.out += frame


# -- control frames ----------------------------------------------------------------------------

# Each function hears one type: the session, the flags, the payload, and the list to which its events go.


def hear_syn_stream(session: Session, flags: int, payload: bytes, events: list[Event]) -> None:
    """A stream that the peer opens: Kubernetes never does so.  It is refused."""
    number = _number.unpack_from(payload)[0]
    if number & 1 or not session.theirs < number <= STREAM_LAST:
        raise Malformed(f"SPDY: the peer opens stream {number}, which is none of its own")
    session.theirs = number
    session.reply(control_frame(RST_STREAM, _two.pack(number, REFUSED_STREAM)))


def hear_headers(session: Session, flags: int, payload: bytes, events: list[Event]) -> None:
    """SYN_REPLY and HEADERS: Kubernetes says nothing in them, but perhaps that it is the last frame of its stream."""
    stream = session.streams.get(_number.unpack_from(payload)[0])
    if stream is not None and flags & FIN:
        session.end_there(stream, events)


def hear_syn_reply(session: Session, flags: int, payload: bytes, events: list[Event]) -> None:
    """The peer has taken a stream."""
    stream = session.streams.get(_number.unpack_from(payload)[0])
    if stream is not None and stream.name == stream.call.kind.names[-1]:  # the last one that we opened
        events.append(Accepted(stream.call))
    hear_headers(session, flags, payload, events)


def hear_rst_stream(session: Session, flags: int, payload: bytes, events: list[Event]) -> None:
    """The peer breaks a stream off: the whole Call with it, unless that was an error stream that said nothing."""
    number, status = _two.unpack(payload)
    stream = session.streams.get(number)
    if stream is None:
        return
    if stream.name != ERROR or stream.call.text:
        session.cut(stream.call, status, events)
    else:
        session.forget(stream)


def hear_settings(session: Session, flags: int, payload: bytes, events: list[Event]) -> None:
    """How many streams the peer allows; all else is for flow control, which is not used."""
    count = _number.unpack_from(payload)[0]
    if len(payload) != 4 + 8 * count:
        raise Malformed(f"SPDY: {count} settings in {len(payload)} bytes")
    for name, value in _two.iter_unpack(payload[4:]):
        if name & 0xFFFFFF == MAX_CONCURRENT_STREAMS:  # the first byte has flags
            session.limit = min(OPEN_MAX, value)


def hear_ping(session: Session, flags: int, payload: bytes, events: list[Event]) -> None:
    """The peer's own is echoed; ours comes back."""
    number = _number.unpack(payload)[0]
    if number & 1:
        events.append(Pong(number))
    else:
        session.reply(control_frame(PING, payload))


def hear_goaway(session: Session, flags: int, payload: bytes, events: list[Event]) -> None:
    """The peer takes no new streams.  Those behind its last one were not looked at, section 2.6.6."""
    last, status = _two.unpack(payload)
    session.is_leaving = True
    events.append(GoneAway(status))
    for call in session.calls:
        if any(stream.number > last for stream in call.streams.values()):
            session.cut(call, REFUSED_STREAM, events)


def ignore(session: Session, flags: int, payload: bytes, events: list[Event]) -> None:
    """Unknown types, section 2.2.1; and flow control, which Kubernetes does not use."""


Hear = Callable[[Session, int, bytes, list[Event]], None]
# By type: (whether a payload may have so many bytes, who hears it).
HEARD: dict[int, tuple[Callable[[int], bool], Hear]] = {
    SYN_STREAM: (lambda size: size >= 10, hear_syn_stream),
    SYN_REPLY: (lambda size: size >= 4, hear_syn_reply),
    RST_STREAM: (lambda size: size == 8, hear_rst_stream),
    SETTINGS: (lambda size: size >= 4, hear_settings),
    PING: (lambda size: size == 4, hear_ping),
    GOAWAY: (lambda size: size == 8, hear_goaway),
    HEADERS: (lambda size: size >= 4, hear_headers),
    WINDOW_UPDATE: (lambda size: size == 8, ignore),
}
IGNORED: tuple[Callable[[int], bool], Hear] = (lambda size: True, ignore)
