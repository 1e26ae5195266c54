"""sniroute_upgrade: the upgrade to WebSocket, and its frames, as bytes: a client's side, and what a server adds.

    connect_request, upgrade_request -----------------------> bytes to send
    bytes that came   --- parse_answer ---> Answer --- check_upgrade ---> the connection speaks WebSocket
    data              --- frame ----------> one masked message to send
    bytes that came   --- FrameReader ----> the payload, and the control frames
                          EitherReader      the same, at a server, too
    upgrade_answer -----------------------> bytes to send

Nothing here reads or writes a socket.  A parser returns its result, or None when it needs more bytes,
or raises Malformed.  That exception is the router's (sniroute_refusals): broken bytes are one kind of
fault for all parsers, whoever sent them.

Threads: none.  Only a reader has a state.

Seams: I want to ...
    send another request     a function beside `connect_request`: it lists the lines of a head
    speak another protocol   another check beside `check_upgrade`; Answer and parse_answer stay

This room imports sniroute_http (the grammar of heads), sniroute_names (addresses, the version) and sniroute_refusals
(Malformed).
"""

from __future__ import annotations

import base64
import os
import struct
from typing import Iterable, NamedTuple

from sniroute_http import TOKEN, parse_lines, parse_status
from sniroute_names import HEADER_VALUE, show_address
from sniroute_refusals import Malformed

__version__ = "0.1.0"

# -- heads -------------------------------------------------------------------------------------

HEAD_MAX = 1 << 16  # bytes of an answer's head: Cloudflare's and proxies' have at most a few thousand

class Answer(NamedTuple):
    """The head of an HTTP answer."""

    status: int
    headers: dict[str, str]  # names in lower case; values of one name joined by commas
    end: int  # the head's size in bytes: what follows begins there


def parse_header(text: str) -> tuple[str, str]:
    """`NAME: VALUE`.  Raises ValueError, which does not repeat the value: it may be a secret."""
    name, colon, value = text.partition(":")
    value = value.strip(" \t")
    if not colon or not TOKEN.fullmatch(name.strip().encode()):
        raise ValueError("it is not NAME: VALUE")
    if not HEADER_VALUE.fullmatch(value):
        raise ValueError(f"the value of {name.strip()} has characters that no header may have")
    return name.strip(), value


def parse_answer(data: bytes | bytearray) -> Answer | None:
    """The head of an HTTP/1 answer; None: need more.  Raises Malformed.

    Source: RFC 9112 section 2 and 5.  Where its body ends is not asked: an answer to CONNECT, and a 101, have none,
    whatever their fields say.
    """
    found = parse_status(data, most=HEAD_MAX)
    if found is None:
        return None
    status, _, first, block = found
    headers: dict[str, str] = {}
    for field in parse_lines(block).fields:
        name, value = field.name.decode("ascii").lower(), field.value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Answer(status, headers, len(first) + len(block))


def connect_request(host: str, port: int, authorization: str) -> bytes:
    """Ask a proxy for a connection to HOST:PORT.  Source: RFC 9110 section 9.3.6.

    `authorization` is the value of Proxy-Authorization, "" for none.
    """
    place = show_address((host, port))
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
    if authorization:
        lines.append(f"Proxy-Authorization: {authorization}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


# -- the upgrade to WebSocket ------------------------------------------------------------------

# `upgrade_request` writes these itself.
OWN_HEADERS = frozenset(("host", "user-agent", "upgrade", "connection", "sec-websocket-key",
                         "sec-websocket-version", "sec-websocket-extensions"))
ACCEPT_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3


def new_key() -> str:
    """A Sec-WebSocket-Key, random each time.  Source: RFC 6455 section 4.1."""
    return base64.b64encode(os.urandom(16)).decode()


def upgrade_request(host: str, port: int, path: str, key: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """Ask for the upgrade over TLS, in the order of cloudflared's lines.  Source: RFC 6455 section 4.1.

    `path` includes the query.  `headers` are (name, value); those of OWN_HEADERS are left out.
    """
    place = show_address((host, port)).removesuffix(":443")
    lines = [f"GET {path} HTTP/1.1", f"Host: {place}", f"User-Agent: sniroute/{__version__}"]
    lines += [f"{name}: {value}" for name, value in headers if name.lower() not in OWN_HEADERS]
    lines += ["Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "Upgrade: websocket"]
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def accept_of(key: str) -> str:
    """The Sec-WebSocket-Accept that answers a Sec-WebSocket-Key.  Source: RFC 6455 section 4.2.2."""
    import hashlib  # it brings OpenSSL, 3.6 MB: for who speaks WebSocket
    digest = hashlib.sha1((key + ACCEPT_GUID).encode(), usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def upgrade_answer(key: str, date: str) -> bytes:
    """The answer of a server that takes the upgrade, without a subprotocol.  Source: RFC 6455 section 4.2.2.

    `date` is for its header (RFC 9110 section 5.6.7).
    """
    return (f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nDate: {date}\r\n"
            f"Sec-WebSocket-Accept: {accept_of(key)}\r\nUpgrade: websocket\r\n\r\n").encode("ascii")


def check_upgrade(answer: Answer, key: str) -> None:
    """Raise Malformed, unless this answer with status 101 is the upgrade that was asked for with `key`.

    Source: RFC 6455 section 4.1.
    """
    headers = answer.headers
    words = [word.strip() for word in headers.get("connection", "").lower().split(",")]
    if headers.get("upgrade", "").lower() != "websocket" or "upgrade" not in words:
        raise Malformed("HTTP 101 that is no upgrade to websocket")
    if headers.get("sec-websocket-accept") != accept_of(key):
        raise Malformed("HTTP 101 with a wrong Sec-WebSocket-Accept")
    if headers.get("sec-websocket-extensions"):
        raise Malformed("HTTP 101 with an extension that was not asked for")


# -- frames ------------------------------------------------------------------------------------

# Bytes of a full message: with its header it fills one TLS record (16,384), and Cloudflare's connector
# drops what a message has over 16,384.
CHUNK = 16376
CONTROL_MAX = 125  # bytes of a control frame's payload, RFC 6455 section 5.5

PROTOCOL_FAULT, UNACCEPTABLE = 1002, 1003  # codes of a Close, RFC 6455 section 7.4.1
ZERO = bytes(4)  # the key that masks nothing
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA  # RFC 6455 section 5.2
FULL_REPEAT = int.from_bytes(b"\1\0\0\0" * (CHUNK // 4), "little")


def mask(data: bytes, key: bytes) -> bytes:
    """`data` masked with the four bytes of `key`.  Source: RFC 6455 section 5.3.

    One XOR of two large numbers takes 27 us for a full message; a loop over its bytes takes 1,000.
    """
    size = len(data)
    if size == CHUNK:  # the repeated key is a product, which is made twice as fast as by bytes
        pad = int.from_bytes(key, "little") * FULL_REPEAT
    else:
        pad = int.from_bytes((key * (size // 4 + 1))[:size], "little")
    return (int.from_bytes(data, "little") ^ pad).to_bytes(size, "little")


def frame(opcode: int, data: bytes) -> bytes:
    """One whole message in one frame, masked with a fresh key.  Source: RFC 6455 section 5.2.

    `data`: 65,535 bytes at most.
    """
    size = len(data)
    key = os.urandom(4)
    if size < 126:
        head = struct.pack(">BB4s", 0x80 | opcode, 0x80 | size, key)
    else:
        head = struct.pack(">BBH4s", 0x80 | opcode, 0x80 | 126, size, key)
    return head + mask(data, key)


class FrameReader:
    """Reads the frames of a server from bytes in any portions.

    Payload is handed out as it comes; only a header or a control frame is kept until it is whole.
    """

    __slots__ = ("left", "part", "fragmented")

    def __init__(self) -> None:
        self.left = 0  # bytes of the current data frame that are still to come
        self.part = b""  # the beginning of a header or of a control frame
        self.fragmented = False  # a message goes on in the next data frame

    def is_inside(self) -> bool:
        """Whether the bytes so far end within a message or a frame."""
        return bool(self.left or self.part or self.fragmented)

    def read(self, data: memoryview) -> tuple[list[memoryview], list[tuple[int, bytes]]]:
        """The pieces of payload in `data`, and the control frames as (opcode, payload), each in order.

        The pieces are views of `data`.  What follows a Close is ignored.  Raises Malformed.
        Source: RFC 6455 section 5.
        """
        pieces: list[memoryview] = []
        controls: list[tuple[int, bytes]] = []
        if self.part:
            data = memoryview(self.part + bytes(data))
            self.part = b""
        at, end = 0, len(data)
        while at < end:
            if self.left:
                piece = data[at:at + self.left]
                pieces.append(piece)
                at += len(piece)
                self.left -= len(piece)
                continue
            header = self._header(data, at, end)
            if header is None:
                self.part = bytes(data[at:])
                break
            opcode, start, size = header
            if opcode < CLOSE:
                at = start
                self.left = size
                continue
            if start + size > end:
                self.part = bytes(data[at:])
                break
            controls.append((opcode, bytes(data[start:start + size])))
            if opcode == CLOSE:
                break
            at = start + size
        return pieces, controls

    def _header(self, data: memoryview, at: int, end: int) -> tuple[int, int, int] | None:
        """The frame at `at`: opcode, where its payload starts, and its size; None: need more."""
        if end - at < 2:
            return None
        first, second = data[at], data[at + 1]
        opcode, size = first & 0x0F, second & 0x7F
        if first & 0x70:
            raise Malformed("a frame with a reserved bit")
        if second & 0x80:
            raise Malformed("a masked frame from a server")
        if opcode >= CLOSE:
            if opcode > PONG:
                raise Malformed(f"a frame with opcode {opcode}")
            if not first & 0x80 or size > CONTROL_MAX:
                raise Malformed("a control frame that is fragmented or too long")
            if opcode == CLOSE and size == 1:
                raise Malformed("a Close with half a code")
            return opcode, at + 2, size
        start = at + 2
        if size == 126:
            if end - at < 4:
                return None
            size, start = int.from_bytes(data[start:start + 2], "big"), start + 2
        elif size == 127:
            if end - at < 10:
                return None
            size, start = int.from_bytes(data[start:start + 8], "big"), start + 8
            if size >> 63:
                raise Malformed("a frame of more than 2**63 bytes")
        if opcode > BINARY or (opcode == CONTINUATION) is not self.fragmented:
            raise Malformed("a data frame out of turn" if opcode <= BINARY else f"a frame with opcode {opcode}")
        self.fragmented = not first & 0x80
        return opcode, start, size


class EitherReader:
    """Reads frames from bytes in any portions: a server's, or a client's, which are masked.

    Payload is handed out as it comes; only a header or a control frame is kept until it is whole.

    Attributes:
        code: with which the connection is to be closed where Malformed was raised.
    """

    __slots__ = ("is_masked", "left", "part", "is_fragmented", "key", "code")

    def __init__(self, is_masked: bool):
        self.is_masked = is_masked  # the frames are a client's
        self.left = 0  # bytes of the current data frame that are still to come
        self.part = b""  # the beginning of a header or of a control frame
        self.is_fragmented = False  # a message goes on in the next data frame
        self.key = ZERO  # of the current data frame, from its next byte on
        self.code = PROTOCOL_FAULT

    def read(self, data: memoryview) -> tuple[list[bytes | memoryview], list[tuple[int, bytes]]]:
        """The pieces of payload in `data`, and the control frames as (opcode, payload), each in order.

        What follows a Close is ignored.  Raises Malformed.  Source: RFC 6455 section 5.
        """
        pieces: list[bytes | memoryview] = []
        controls: list[tuple[int, bytes]] = []
        if self.part:
            data = memoryview(self.part + bytes(data))
            self.part = b""
        at, end = 0, len(data)
        while at < end:
            if self.left:
                piece = data[at:at + self.left]
                at += len(piece)
                self.left -= len(piece)
                if self.key != ZERO:
                    pieces.append(mask(piece, self.key))
                    turn = len(piece) % 4
                    self.key = self.key[turn:] + self.key[:turn]
                else:
                    pieces.append(piece)
                continue
            header = self._header(data, at, end)
            if header is None:
                self.part = bytes(data[at:])
                break
            opcode, key, at, self.left = header
            if opcode < CLOSE:
                self.key = key
                continue
            controls.append((opcode, mask(data[at:at + self.left], key)))
            at += self.left
            self.left = 0
            if opcode == CLOSE:
                break
        return pieces, controls

    def _header(self, data: memoryview, at: int, end: int) -> tuple[int, bytes, int, int] | None:
        """The frame at `at`: opcode, key, where its payload starts, its size; None: need more.

        A control frame is needed as a whole.
        """
        if end - at < 2:
            return None
        first, second = data[at], data[at + 1]
        opcode, size, start = first & 0x0F, second & 0x7F, at + 2
        if first & 0x70:
            raise Malformed("a frame with a reserved bit")
        if bool(second & 0x80) is not self.is_masked:
            raise Malformed("a frame that is not masked" if self.is_masked else "a masked frame from a server")
        if opcode > PONG or BINARY < opcode < CLOSE:
            raise Malformed(f"a frame with opcode {opcode}")
        if opcode == TEXT:
            self.code = UNACCEPTABLE
            raise Malformed("a message of text")
        if opcode >= CLOSE:
            if not first & 0x80 or size > CONTROL_MAX:
                raise Malformed("a control frame that is fragmented or too long")
            if opcode == CLOSE and size == 1:
                raise Malformed("a Close with half a code")
        elif (opcode == CONTINUATION) is not self.is_fragmented:
            raise Malformed("a data frame out of turn")
        for mark, width in ((126, 2), (127, 8)):
            if size == mark:
                if end - start < width:
                    return None
                size, start = int.from_bytes(data[start:start + width], "big"), start + width
                break
        if size >> 63:
            raise Malformed("a frame of more than 2**63 bytes")
        key = ZERO
        if self.is_masked:
            key, start = bytes(data[start:start + 4]), start + 4
        if end < start or opcode >= CLOSE and end - start < size:
            return None
        if opcode < CLOSE:
            self.is_fragmented = not first & 0x80
        return opcode, key, start, size
