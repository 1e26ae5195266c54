"""sniroute_channels: streams of Kubernetes in WebSocket messages, without I/O: the client's side of one connection.

The upgrade chooses by its subprotocol (`check_protocol`) what the messages are:

    TUNNEL             Tunnel     bytes of SPDY (sniroute_spdy); where a message ends means nothing
    PORTS, ?ports=N    Ports      <channel><bytes>: 0 data, 1 error; each channel begins with the port in two bytes
    COMMANDS           Command    <channel><bytes>: 0 stdin, 1 stdout, 2 stderr, 3 error, which has a status in JSON

    bytes that came --- receive ---> events of sniroute_spdy, and Closed
    send, end, reset, ping --> out --- take() ---> bytes to send

All three are used as a Session is, by the same methods.  Ports and Command have one Call, `call`; a Tunnel makes them
by `forward`.  Ports has no half-close, and Command has one in version 5 only.  Where there is none `end` returns False.

What becomes of a command is read by `read_outcome`, whichever way it came.

Frames are masked, as the standard asks: with a random key, or in TLS with the key 0, which costs nothing.  A mask keeps
a proxy between from taking our bytes for HTTP (RFC 6455 section 10.3), and in TLS no proxy sees them.

Threads: none.  A machine belongs to one thread.

Seams: I want to ...
    speak another version of channels    a row in VERSIONS
    understand another status            read_outcome

Source: RFC 6455; https://kubernetes.io/docs/reference/using-api/websockets/ (version 5), and what Kubernetes 1.36 does.

This room imports sniroute_spdy (the session, the events), sniroute_upgrade (frames), sniroute_names (printable) and
sniroute_refusals (Malformed).
"""

from __future__ import annotations

import json
import re
import struct
from typing import NamedTuple

from sniroute_names import printable
from sniroute_refusals import Malformed
from sniroute_spdy import (COMMAND, ERROR, FORWARD, HALF_CLOSED_LOCAL, REPLIES_MAX, TEXT_MAX, Accepted, Call, Data,
                           Ended, Event, Kind, Pong, Reset, Session, Stream, tell)
from sniroute_upgrade import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, FrameReader, frame

__version__ = "0.1.0"

# -- subprotocols ------------------------------------------------------------------------------

# What Sec-WebSocket-Protocol asks for, RFC 6455 section 1.9: the server takes the first one that it knows.
TUNNEL = "SPDY/3.1+portforward.k8s.io"  # from Kubernetes 1.30 on
V5, V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"
COMMANDS = V5, V4  # version 5 is there from 1.29 on; it adds the end of stdin
PORTS = (V4,)
VERSIONS = {V5: True, V4: False}  # whether a channel can be ended


def check_protocol(answer: str, asked: tuple[str, ...]) -> str:
    """The subprotocol that the server has taken, from its answer.  Raises Malformed where it was not asked for."""
    if answer not in asked:
        raise Malformed(f"the server speaks {printable(answer, 60)!r}, and not {' or '.join(asked)}")
    return answer


# -- messages ----------------------------------------------------------------------------------

MESSAGE_MAX = 32768  # bytes of a message that we send: the far end hands a whole one on, so larger ones would be late
NORMAL = 1000  # RFC 6455 section 7.4.1
NO_CODE = 1005  # for a Close without a code
ZERO = bytes(4)

_short = struct.Struct(">BB4s")
_long = struct.Struct(">BBH4s")


class Closed(NamedTuple):
    """The server has said Close: nothing comes after it.  For each Call that is open, `lost` says what that means."""

    code: int
    reason: str  # the server's words: make them `printable` before they are logged


class Piece(NamedTuple):
    """A part of a message."""

    data: memoryview  # into what was received
    starts: bool  # whether a message begins with it
    ends: bool  # whether it ends with it


class MessageReader(FrameReader):
    """Reads the frames of a server, as FrameReader does, and tells where messages begin and end."""

    __slots__ = ("starts", "is_over")

    def __init__(self) -> None:
        super().__init__()
        self.starts = True  # whether the next piece is a message's first one
        self.is_over = False  # a Close has come

    def pieces(self, data: memoryview) -> tuple[list[Piece], list[tuple[int, bytes]]]:
        """The pieces of messages in `data`, and the control frames as (opcode, payload), each in order.

        What follows a Close is ignored.  Raises Malformed.  Source: RFC 6455 section 5.
        """
        pieces: list[Piece] = []
        controls: list[tuple[int, bytes]] = []
        if self.part:
            data = memoryview(self.part + bytes(data))
            self.part = b""
        at, end = 0, len(data)
        while at < end and not self.is_over:
            if not self.left:
                header = self._header(data, at, end)
                if header is None or header[0] >= CLOSE and header[1] + header[2] > end:
                    self.part = bytes(data[at:])
                    break
                opcode, start, size = header
                if opcode == TEXT:
                    raise Malformed("a message of text")
                at = start
                if opcode >= CLOSE:
                    at += size
                    controls.append((opcode, bytes(data[start:at])))
                    self.is_over = opcode == CLOSE
                    continue
                self.left = size
                self.starts = opcode != CONTINUATION
                if size and at == end:
                    break
            piece = data[at:at + self.left]
            at += len(piece)
            self.left -= len(piece)
            pieces.append(Piece(piece, self.starts, not self.left and not self.fragmented))
            self.starts = False
        return pieces, controls


class Messages:
    """The client's side of a WebSocket that carries binary messages: what is to be sent, and control frames.

    `in_tls`: whether it is inside TLS.
    """

    __slots__ = ("reader", "out", "in_tls", "is_closed", "pings", "replies")

    def __init__(self, in_tls: bool):
        self.reader = MessageReader()
        self.out = bytearray()
        self.in_tls = in_tls
        self.is_closed = False  # Close was said or heard: nothing more is sent
        self.pings = 0  # how many were sent
        self.replies = 0  # bytes that the server made us say since the last `take`

    def take(self) -> bytearray:
        """What is to be sent; the next call returns what came after it."""
        taken, self.out = self.out, bytearray()
        self.replies = 0
        return taken

    def say(self, data: bytes | bytearray | memoryview, opcode: int = BINARY) -> None:
        """Send one message: 65,535 bytes at most."""
        if self.is_closed:
            return
        if not self.in_tls:
            self.out += frame(opcode, data)
            return
        size = len(data)
        if size < 126:
            self.out += _short.pack(0x80 | opcode, 0x80 | size, ZERO)
        else:
            self.out += _long.pack(0x80 | opcode, 0x80 | 126, size, ZERO)
        self.out += data

    def ping(self) -> int:
        """Ask for a Pong, which has the number that is returned."""
        self.pings += 1
        self.say(b"%d" % self.pings, PING)
        return self.pings

    def close(self, code: int = NORMAL) -> None:
        """Say Close, once."""
        self.say(code.to_bytes(2, "big"), CLOSE)
        self.is_closed = True

    def hear(self, data: bytes | bytearray | memoryview) -> tuple[list[Piece], list[Event | Closed]]:
        """The pieces of messages, and what control frames meant.  Raises Malformed."""
        pieces, controls = self.reader.pieces(memoryview(data))
        events: list[Event | Closed] = []
        for opcode, payload in controls:
            if opcode == PING:
                self.replies += len(payload) + 6
                if self.replies > REPLIES_MAX:
                    raise Malformed("a flood of pings")
                self.say(payload, PONG)
            elif opcode == PONG:
                if re.fullmatch(rb"[1-9][0-9]{0,17}", payload) and int(payload) <= self.pings:
                    events.append(Pong(int(payload)))  # others were not asked for: they mean nothing, section 5.5.3
            else:
                events.append(Closed(int.from_bytes(payload[:2], "big") or NO_CODE,
                                     payload[2:].decode("utf-8", "replace")))
                self.close()
        return pieces, events


# -- SPDY in messages --------------------------------------------------------------------------


class Tunnel(Session):
    """A session of SPDY whose bytes are carried in messages.  `in_tls`: whether that is inside TLS."""

    __slots__ = ("messages",)

    def __init__(self, in_tls: bool):
        super().__init__()
        self.messages = Messages(in_tls)

    @property
    def pending(self) -> int:
        """Bytes that `take` would return, without the heads of messages."""
        return len(self.out) + len(self.messages.out)

    @property
    def takes_more(self) -> bool:
        """Whether one more Call may be opened."""
        return super().takes_more and not self.messages.is_closed

    def take(self) -> bytearray:
        """What is to be sent; the next call returns what came after it."""
        data = memoryview(super().take())
        for at in range(0, len(data), MESSAGE_MAX):
            self.messages.say(data[at:at + MESSAGE_MAX])
        return self.messages.take()

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event | Closed]:
        """What has come of these bytes.  Raises Malformed where the connection cannot be read any further."""
        pieces, others = self.messages.hear(data)
        events: list[Event | Closed] = []
        for piece in pieces:  # Kubernetes sends the head of a frame by itself, so nothing is gained by joining them
            events += super().receive(piece.data)
        return events + others


# -- channels ----------------------------------------------------------------------------------


class Channels:
    """One Call whose streams are channels; the base of Ports and Command.  `in_tls`: whether it is inside TLS."""

    __slots__ = ("call", "messages", "channel", "names")

    takes_more = False  # a connection carries one Call, which the upgrade has opened

    def __init__(self, kind: Kind, names: dict[int, str], in_tls: bool):
        self.messages = Messages(in_tls)
        self.names = names  # of the channels that we hear
        self.channel = -1  # of the message that is being read; -1: its first byte has not come
        self.call = Call(kind)
        self.call.streams = {name: Stream(self.call, name, 0) for name in kind.names}

    @property
    def pending(self) -> int:
        """Bytes that `take` would return."""
        return len(self.messages.out)

    @property
    def calls(self) -> list[Call]:
        """Those that are not over."""
        return [] if self.call.is_over else [self.call]

    def take(self) -> bytearray:
        """What is to be sent; the next call returns what came after it."""
        return self.messages.take()

    def send(self, call: Call, data: bytes | bytearray | memoryview) -> None:
        """Send bytes: on channel 0, which is data or stdin."""
        if not call.sends:
            return
        view = memoryview(data)
        for at in range(0, len(view), MESSAGE_MAX):
            self.messages.say(b"".join((b"\0", view[at:at + MESSAGE_MAX])))

    def end(self, call: Call) -> bool:
        """We send nothing more.  Returns whether the far end is told so; if not, all that is left is to close."""
        if call.sends:
            call.streams[call.kind.sends].state = HALF_CLOSED_LOCAL
        return False

    def reset(self, call: Call) -> None:
        """Break the Call off, and the connection with it."""
        call.streams.clear()
        self.messages.close()

    def ping(self) -> int:
        """Ask for a Pong, which has the number that is returned.  A server whose Pong does not come is dead."""
        return self.messages.ping()

    def leave(self) -> None:
        """Say that the connection ends."""
        self.messages.close()

    def lost(self) -> list[Event]:
        """What it means for the Call that the connection has ended.  Nothing comes after it."""
        events: list[Event] = []
        if not self.call.is_over:
            events.append(tell(self.call) if self.call.text else Reset(self.call, 0))
        self.call.streams.clear()
        return events

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event | Closed]:
        """What has come of these bytes.  Raises Malformed where the connection cannot be read any further."""
        pieces, others = self.messages.hear(data)
        events: list[Event | Closed] = []
        for data, starts, ends in pieces:
            if starts:
                self.channel = -1
            if self.channel < 0:
                if not data:
                    if ends:
                        raise Malformed("a message without a channel")
                    continue
                self.channel, data = data[0], data[1:]
            if not self.call.is_over:
                self._hear(self.channel, data, ends, events)
        return events + others

    def _hear(self, channel: int, data: memoryview, ends: bool, events: list[Event | Closed]) -> None:
        """Bytes of a message on a channel; `ends`: they are its last ones.  A subclass has more to say before it."""
        name = self.names.get(channel)
        if name is None:
            raise Malformed(f"a message on channel {channel}")
        if name != ERROR:
            if data:
                events.append(Data(self.call, name, data))
            return
        self.call.text += data[:TEXT_MAX - len(self.call.text)]
        if ends and self.call.text:
            events.append(tell(self.call))
            if self.call.kind.is_ended_by_text:
                self.call.streams.clear()


class Ports(Channels):
    """One connection to a port of a pod, in channels: the way of old, from before TUNNEL.

    It ends as a whole, by a Close.  Without a text on `error` before it that is the end of data, and no cut.
    """

    __slots__ = ("port", "prefaces")

    def __init__(self, port: int, in_tls: bool):
        super().__init__(FORWARD, {0: "data", 1: ERROR}, in_tls)
        self.port = port.to_bytes(2, "little")  # so it is on the wire
        self.prefaces = {0: b"", 1: b""}  # what has come of the port with which each channel begins

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event | Closed]:
        """What has come of these bytes.  Raises Malformed where the connection cannot be read any further."""
        events = super().receive(data)
        if not self.call.is_over and any(isinstance(event, Closed) and event.code == NORMAL for event in events):
            self.call.streams.clear()
            events.insert(-1, Ended(self.call, "data"))  # a Close is the last thing that is heard
        return events

    def _hear(self, channel: int, data: memoryview, ends: bool, events: list[Event | Closed]) -> None:
        missing = 2 - len(self.prefaces.get(channel, self.port))
        if missing and data:
            preface = self.prefaces[channel] = self.prefaces[channel] + bytes(data[:missing])
            data = data[missing:]
            if len(preface) == 2:
                if preface != self.port:
                    raise Malformed(f"channel {channel} is of port {int.from_bytes(preface, 'little')}")
                if channel == 0:
                    events.append(Accepted(self.call))
        super()._hear(channel, data, ends, events)


class Command(Channels):
    """One command in channels.  `protocol`: the one of COMMANDS that the server has taken."""

    __slots__ = ("can_end", "closing", "is_accepted")

    CLOSING = 0xFF  # of version 5: the channel behind it has ended

    def __init__(self, protocol: str, in_tls: bool):
        super().__init__(COMMAND, {1: "stdout", 2: "stderr", 3: ERROR}, in_tls)
        self.can_end = VERSIONS[protocol]
        self.closing = b""  # what has come of a message on CLOSING
        self.is_accepted = False

    def end(self, call: Call) -> bool:
        """We send nothing more.  Returns whether the command is told so: version 4 has no words for it."""
        if self.can_end and call.sends:
            self.messages.say(bytes((self.CLOSING, 0)))
        super().end(call)
        return self.can_end

    def _hear(self, channel: int, data: memoryview, ends: bool, events: list[Event | Closed]) -> None:
        if self.can_end and channel == self.CLOSING:
            self.closing = (self.closing + bytes(data[:2]))[:2]
            if ends:
                if len(self.closing) != 1:
                    raise Malformed("the end of a channel that is none")
                name, self.closing = self.names.get(self.closing[0], ERROR), b""
                if name != ERROR:  # the status comes yet, or was there; on others we hear nothing
                    events.append(Ended(self.call, name))
            return
        if not self.is_accepted:  # by an empty message on stdout, which comes first
            self.is_accepted = True
            events.append(Accepted(self.call))
        super()._hear(channel, data, ends, events)


# -- what becomes of a command -----------------------------------------------------------------

WORDS_MAX = 500  # characters of a status's message: longer ones repeat the command


class Outcome(NamedTuple):
    """What became of a command."""

    code: int | None  # the exit code; None: it has none, since it did not start, or was lost
    words: str  # why, in one printable line; "" where it went well


def read_outcome(text: str) -> Outcome:
    """What the error stream of a command says: a status in JSON.  It never raises: what is none is words.

    Source: metav1.Status, as the API server writes it for `v4.channel.k8s.io` and later.
    """
    try:
        status = json.loads(text)
    except (ValueError, RecursionError):
        status = None
    if not isinstance(status, dict):
        return Outcome(None, printable(text.strip(), WORDS_MAX))
    if status.get("status") == "Success":
        return Outcome(0, "")
    said = [each for each in (status.get("message"), status.get("reason")) if isinstance(each, str) and each]
    words = printable(said[0] if said else "no reason", WORDS_MAX)
    details = status.get("details")
    causes = details.get("causes") if isinstance(details, dict) else None
    if status.get("reason") == "NonZeroExitCode" and isinstance(causes, list):
        for cause in causes:
            if isinstance(cause, dict) and cause.get("reason") == "ExitCode":
                code = cause.get("message")
                if isinstance(code, str) and re.fullmatch(r"[0-9]{1,9}", code, re.ASCII):
                    return Outcome(int(code), words)
    return Outcome(None, words)
