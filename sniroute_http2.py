"""sniroute_http2: HTTP/2 in plain text (RFC 9113), as far as a name can be read from it, without I/O.

A client that knows beforehand that HTTP/2 is spoken says (section 3.3):

    PREFACE  SETTINGS  [WINDOW_UPDATE, PRIORITY, PING, SETTINGS, what is unknown]...  HEADERS [CONTINUATION]...  ...
                                                                                      |
    bytes --- parse_authority ---> Authority(name, port, end, method, path)  <--------+  `:authority`, or `host`
    a refusal --- refusal ------> SETTINGS and GOAWAY, which say why

As in sniroute_http: a parser takes all bytes so far, and returns its result, None for "I need more", or raises.  It
looks at nothing behind the first head.  All bytes then go to the backend as they came, those that were read here, too:
so it is the backend that is spoken to.

Some clients do not ask before they have heard the server's SETTINGS; gRPC's do so (`awaits_settings`).  They are sent
GREETING.  They acknowledge it, and that frame is for us alone: `Authority.ack` says where it is, to be cut out.

What the standard calls an error of the connection is refused, and so is a first request that it calls malformed.
Beyond that: one host (`host` beside `:authority` has to name the same), no user in it, `http` as the scheme, and the
limits below.

Threads: none.

Seams: I want to ...
    let another frame come before a head    a row in EARLY
    ask more of a request                   read_request
    refuse in another way                   refusal

This room imports sniroute_hpack (fields), sniroute_http (hosts and words) and sniroute_refusals (Malformed).
"""

from __future__ import annotations

import re
import struct
from typing import Callable, NamedTuple

from sniroute_hpack import Decoder, Pair
from sniroute_http import HEAD_MAX, LENGTH, METHOD, TARGET_MAX, TEXT, bad, parse_place
from sniroute_refusals import REFUSALS, Malformed, Refused

__version__ = "0.1.0"

# Limits.  HEAD_MAX bytes, from the first one to the end of the head: an ordinary client sends 200 to 2,000.
FRAME_MAX = 16384  # bytes in a frame: RFC 9113 section 4.2, until a server has said more
FRAMES_MAX = 16  # up to the end of the head.  curl sends 3, nghttp 7; each is looked at again with each call
# CVE-2024-27316 and its like: a head that goes on in empty frames.  Two hold all that HEAD_MAX allows; nghttp2 takes as
# many as this.
CONTINUATIONS_MAX = 8

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # section 3.4

# Types of frames, section 6.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x4, 0x8, 0x20  # flags
# Codes of errors, section 7.
PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, COMPRESSION_ERROR = 0x1, 0x3, 0x6, 0x9
REFUSED_STREAM, ENHANCE_YOUR_CALM = 0x7, 0xB

_frame_header = struct.Struct(">HBBBI").unpack_from  # section 4.1: the length has three bytes
_setting = struct.Struct(">HI")  # section 6.5.1
HEADER_SIZE = 9  # bytes


class Broken(Malformed):
    """A connection that breaks a rule of HTTP/2; `code` is the error for its GOAWAY."""

    def __init__(self, message: str, code: int = PROTOCOL_ERROR, status: int = 400):
        super().__init__(message, kind="bad_request", status=status)
        self.code = code


class Authority(NamedTuple):
    """Where the first request of a connection leads."""

    name: str  # the host, normalised
    port: int  # the port beside it, 0 for none
    end: int  # bytes up to the end of its head; those behind were not looked at
    method: str
    path: bytes  # with its query
    ack: tuple[int, int] = (0, 0)  # where the acknowledgement of GREETING is, from its first byte to behind its last


# -- frames ------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """The header of a frame, and where its payload is: data[start:end], which may not have come yet."""

    kind: int
    flags: int
    stream: int
    start: int
    end: int


def read_frame(data: bytes | bytearray, at: int) -> Frame | None:
    """The frame whose header begins at `at`; None: need more.  Raises Broken where it is too large.

    Source: RFC 9113 section 4.1.
    """
    if len(data) < at + HEADER_SIZE:
        return None
    high, low, kind, flags, stream = _frame_header(data, at)
    size = high << 8 | low
    if size > FRAME_MAX:
        raise Broken(f"a frame of {size} bytes", FRAME_SIZE_ERROR)
    return Frame(kind, flags, stream & 0x7FFFFFFF, at + HEADER_SIZE, at + HEADER_SIZE + size)  # a bit is reserved


def make_frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """A frame."""
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


# What a setting may be, section 6.5.2, and the error where it is not.
SETTING_RANGES = {
    2: (range(2), PROTOCOL_ERROR),  # ENABLE_PUSH
    4: (range(1 << 31), FLOW_CONTROL_ERROR),  # INITIAL_WINDOW_SIZE
    5: (range(16384, 1 << 24), PROTOCOL_ERROR),  # MAX_FRAME_SIZE
}


GREETING = make_frame(SETTINGS)  # a server's first frame, section 3.4; it changes nothing


def check_settings(payload: bytes) -> None:
    """Raise Broken for values that no setting may have."""
    for number, value in _setting.iter_unpack(payload):
        allowed, code = SETTING_RANGES.get(number, (range(1 << 32), 0))
        if value not in allowed:
            raise Broken(f"a setting {number} of {value}", code)


def check_window(payload: bytes) -> None:
    """Raise Broken for a window that grows by nothing, section 6.9."""
    if not int.from_bytes(payload, "big") & 0x7FFFFFFF:
        raise Broken("a WINDOW_UPDATE of 0")


class Early(NamedTuple):
    """What is asked of a frame that comes before the first head."""

    is_of_stream: bool  # whether it is about a stream, or about the connection
    fits: Callable[[int], bool]  # whether its payload may have so many bytes
    check: Callable[[bytes], None]  # looks at the payload
    has_ack: bool = False  # whether it has the flag ACK: there is nothing to acknowledge, since we have said nothing


EARLY: dict[int, Early] = {
    SETTINGS: Early(False, lambda size: size % _setting.size == 0, check_settings, True),
    WINDOW_UPDATE: Early(False, lambda size: size == 4, check_window),  # of a stream: there is none yet
    PRIORITY: Early(True, lambda size: size == 5, lambda payload: None),
    PING: Early(False, lambda size: size == 8, lambda payload: None, True),
}


def check_early(frame: Frame) -> None:
    """Raise Broken for a frame that must not come before the first head.

    Unknown types have to be ignored (section 5.5): GREASE, and PRIORITY_UPDATE of RFC 9218.
    """
    if frame.kind > CONTINUATION:
        return
    rule = EARLY.get(frame.kind)
    if rule is None:
        raise Broken(f"a frame of type {frame.kind} before the first request")
    if bool(frame.stream) != rule.is_of_stream:
        raise Broken(f"a frame of type {frame.kind} on stream {frame.stream}")
    if not rule.fits(frame.end - frame.start):
        raise Broken(f"a frame of type {frame.kind} with {frame.end - frame.start} bytes", FRAME_SIZE_ERROR)
    if rule.has_ack and frame.flags & ACK:
        raise Broken("an acknowledgement of what was not said")


def is_ack(frame: Frame) -> bool:
    """Whether it acknowledges SETTINGS."""
    return frame.kind == SETTINGS and frame.flags == ACK and not frame.stream and frame.start == frame.end


def find_fragment(data: bytes | bytearray, frame: Frame) -> tuple[int, int]:
    """Where a HEADERS frame, which is whole, has its part of the header block.  Raises Broken.

    Source: RFC 9113 section 6.2.  Padding of other bytes than 0 is let pass, as most do.
    """
    start, end = frame.start, frame.end
    padding = 0
    if frame.flags & PADDED:
        padding = data[start] if start < end else 0
        start += 1
    if frame.flags & HAS_PRIORITY:
        start += 5
    if start > end:
        raise Broken("a HEADERS frame without room for what its flags say", FRAME_SIZE_ERROR)
    if start + padding > end:
        raise Broken("more padding than its frame holds")
    return start, end - padding


# -- the prelude -------------------------------------------------------------------------------


def awaits_settings(data: bytes | bytearray) -> bool:
    """Whether a client has said PREFACE and whole frames, but has not begun to ask.

    Call it where `parse_authority` has returned None.
    """
    at, settings = len(PREFACE), False
    while (frame := read_frame(data, at)) is not None and frame.end <= len(data) and frame.kind != HEADERS:
        at, settings = frame.end, settings or frame.kind == SETTINGS
    return settings and at == len(data)


def parse_authority(data: bytes | bytearray, seen: int = 0, greeted: bool = False) -> Authority | None:
    """Where the first request leads of what came from a client, from PREFACE on; None: need more.

    `seen`: how much of `data` an earlier call has had, which returned None; what it checked is not checked again.
    `greeted`: the client was sent GREETING, and acknowledges it once; the result is not there before that has come.
    Raises Malformed for what is broken (Broken has its own code), Refused for a method that is not served.
    """
    if data[:len(PREFACE)] != PREFACE[:len(data)]:
        raise Broken("a preface that is none")
    at = len(PREFACE)
    frames = 0
    stream = 0  # whose head has begun
    parts: list[tuple[int, int]] = []  # of its header block, in `data`
    found, ack = None, (0, 0)
    while (frame := read_frame(data, at)) is not None:
        frames += 1
        if frame.end > HEAD_MAX or frames > FRAMES_MAX or len(parts) > CONTINUATIONS_MAX:
            raise Broken("too much before the end of the first head", ENHANCE_YOUR_CALM, 431)
        if frames == 1 and frame.kind != SETTINGS:
            raise Broken("no SETTINGS at the beginning")
        if greeted and not ack[1] and frames > 1 and is_ack(frame) and (not stream or found):
            ack = at, frame.end
            if found is not None:
                return found._replace(ack=ack)
            at = frame.end
            continue
        if found is not None:
            at = frame.end  # what comes behind the head is for the backend
            continue
        if stream:
            if frame.kind != CONTINUATION or frame.stream != stream:
                raise Broken("a head that is interrupted")
        elif frame.kind != HEADERS:
            if frame.end > seen:
                check_early(frame)
        elif not frame.stream & 1:
            raise Broken(f"a request on stream {frame.stream}, which is no client's")
        if frame.end > len(data):
            return None
        if frame.kind in (HEADERS, CONTINUATION):
            stream = frame.stream
            parts.append(find_fragment(data, frame) if frame.kind == HEADERS else (frame.start, frame.end))
            if frame.flags & END_HEADERS:
                found = read_request(read_fields(b"".join(data[start:end] for start, end in parts)), frame.end)
                if not greeted or ack[1]:
                    return found._replace(ack=ack)
        elif frame.end > seen and frame.kind in EARLY:
            EARLY[frame.kind].check(bytes(data[frame.start:frame.end]))
        at = frame.end
    return None


def read_fields(block: bytes) -> list[Pair]:
    """The fields of the first head.  Raises Broken."""
    try:
        return Decoder().decode(block)
    except Malformed as error:
        code = COMPRESSION_ERROR if error.status == 400 else ENHANCE_YOUR_CALM
        raise Broken(str(error), code, error.status) from None


# -- the request -------------------------------------------------------------------------------

NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")  # section 8.2.1: a token without capitals
PATH = re.compile(rb"/[!-~]*")
PSEUDO = frozenset((b":method", b":scheme", b":authority", b":path"))  # section 8.3.1
# Section 8.2.2: fields of one connection.
CONNECTION = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))
ONCE = frozenset((b"content-length", b"host"))
NOT_SERVED = frozenset((b"CONNECT", b"TRACE"))  # as sniroute_gateway has it for HTTP/1.1


def read_request(fields: list[Pair], end: int) -> Authority:
    """Where a request with these fields leads; its head ends at `end`.  Raises Malformed, or Refused for its method.

    Source: RFC 9113 section 8.2 and 8.3.
    """
    said: dict[bytes, bytes] = {}  # pseudo fields, and those of ONCE
    has_begun = False  # fields other than pseudo ones
    for name, value in fields:
        if not TEXT.fullmatch(value) or value != value.strip(b" \t"):
            raise bad("a character that no field may have")
        if name[:1] == b":":
            if name not in PSEUDO or name in said or has_begun:
                raise bad("a pseudo field that is unknown, doubled, or behind others")
            said[name] = value
            continue
        has_begun = True
        if not NAME.fullmatch(name):
            raise bad("a field whose name is none")
        if name in CONNECTION or name == b"te" and value.lower() != b"trailers":
            raise bad(f"{name.decode('ascii')}, which HTTP/2 does not have")
        if name in ONCE:
            if name in said:
                raise bad(f"two fields of {name.decode('ascii')}")
            said[name] = value
    if not LENGTH.fullmatch(said.get(b"content-length", b"0")):
        raise bad("a content-length that is no number")
    method, path = said.get(b":method", b""), said.get(b":path", b"")
    if not METHOD.fullmatch(method):
        raise bad("a method that is none")
    if method in NOT_SERVED:
        raise Refused("no_method", REFUSALS["no_method"].meaning)
    check_scheme(said.get(b":scheme", b""))
    if len(path) > TARGET_MAX:
        raise bad(f"a target of more than {TARGET_MAX} bytes", 414)
    if not (PATH.fullmatch(path) and b"#" not in path or path == b"*" and method == b"OPTIONS"):
        raise bad("a target that is none")
    return Authority(*find_place(said), end, method.decode("ascii"), path)


def check_scheme(scheme: bytes) -> None:
    """Raise Malformed where a request is for another scheme than http."""
    if scheme.lower() == b"https":
        raise bad("a request for https in plain HTTP", 421)  # RFC 9110 section 7.4
    if scheme.lower() != b"http":
        raise bad("a target of another scheme than http")


def find_place(said: dict[bytes, bytes]) -> tuple[str, int]:
    """Name and port in `:authority` and `host`, which have to be the same where both are there.  Raises Malformed."""
    places = [parse_place(said[name]) for name in (b":authority", b"host") if name in said]
    if not places:
        raise bad("no host")
    if len({(name, port or 80) for name, port in places}) > 1:
        raise bad("a host other than :authority")
    return places[0]


# -- what we say -------------------------------------------------------------------------------


def refusal(refused: Refused) -> bytes:
    """What a client of HTTP/2 is told before the close: SETTINGS, as a server begins, and GOAWAY with the reason.

    A well-formed request is refused with REFUSED_STREAM: gRPC knows that, and says the words.  It does not know
    HTTP_1_1_REQUIRED: version 1.85 ends its process.  No stream was served, so the last one is 0.  The words are those
    of the row; a stranger may read them.
    Source: RFC 9113 section 3.4 and 6.8.
    """
    code = REFUSED_STREAM
    if isinstance(refused, Malformed):
        code = refused.code if isinstance(refused, Broken) else PROTOCOL_ERROR
    words = REFUSALS[refused.kind].meaning.encode("ascii")
    return make_frame(SETTINGS) + make_frame(GOAWAY, struct.pack(">II", 0, code) + words)
