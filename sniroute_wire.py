"""sniroute_wire: reads what a client says before it can be routed: pure parsers, no I/O.

A client says, where the parts in brackets may be missing:

    [PROXY header, version 1 or 2] [GSSENCRequest] [SSLRequest] ClientHello
    [PROXY header, version 1 or 2] a request in plain HTTP

    bytes --> Prelude.feed --+--> Hello(name, ...)      it can be routed; `header` and `data` are for the backend
                             +--> b"S" or b"N"          an answer to send at once (PostgreSQL)
                             +--> what `requests` returns, where HTTP is served: Web.read
                             +--> None                  need more bytes
                             +--> raises Malformed      broken
                             +--> raises Refused        well-formed, but unwanted

    parse_client_hello     the body of a hello, plainly; whole_hello and HelloReader unpack it from its TLS records
    parse_proxy_v1, _v2    a PROXY header; proxy_v1, proxy_v2 write one
    parse_startup          the first packet of a PostgreSQL client
    Prelude                which parser comes next: OPENERS, a table of (step, first byte)
    HelloMemory            reads hellos of a known shape faster than the plain reader; gives the same results

What all parsers promise.  They take all bytes received so far.  They return a result, return None for "I need more",
or raise Malformed, and nothing else.  They ask "complete?" before "valid?", and refuse early only what no further byte
can save.  They look at nothing behind a complete result.  "No name" is a result and garbage is an error: only a
well-formed hello can be routed.

Threads: none of its own.  A Prelude belongs to one connection, HelloMemory to the loop.

Seams: I want to ...
    read another prelude            a pure parser, a method of Prelude that calls it, and a row in Prelude.OPENERS
    write another PROXY header      a row in PROXY_WRITERS
    change who may send a header    PROXY_POLICY

It imports names and refusals.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import struct
from typing import Any, Callable, NamedTuple, NoReturn

from sniroute_names import Address, normalise, parse_ip, unmapped
from sniroute_refusals import (DECODE_ERROR, HTTP, ILLEGAL_PARAMETER, NOTHING, POSTGRES, PROTOCOL_VERSION, TLS,
                               UNEXPECTED_MESSAGE, Malformed, Refused)

__version__ = "0.1.0"


# -- the TLS hello -----------------------------------------------------------------------------

# Limits, each with its reason.  Sizes in bytes.
RECORD_MAX = 16384  # RFC 8446 5.1: a plaintext record holds no more
# A post-quantum hello is about 2 KB.  A ticket that holds the client's certificates makes 17 KB and more of it, which
# BoringSSL refuses and OpenSSL takes up to 131,396.  Memory is taken for what has come, never for what is announced;
# Connection has a limit for those that are large.
HELLO_MAX = 65536
HELLO_WIRE_MAX = 66560  # a hello with its record headers: in small records each costs five bytes more
NAMES_MAX = 1024  # server_name extensions in the cache: most are seen again


class Hello(NamedTuple):
    """A TLS ClientHello, as far as routing needs it."""

    name: str | None  # the host_name it asks for, normalised; None where it asks for none
    alpn_data: bytes | None  # the body of its ALPN extension
    end: int  # its size on the wire, record headers included; bytes behind it are not looked at

    @property
    def alpn(self) -> list[bytes] | None:
        """The protocols it offers (RFC 7301 3.1); None without a list, or with a broken one."""
        data = self.alpn_data
        if data is None or len(data) < 2 or int.from_bytes(data[:2], "big") != len(data) - 2:
            return None
        names, at = [], 2
        while at < len(data):
            end = at + 1 + data[at]
            if end > len(data) or end == at + 1:
                return None
            names.append(data[at + 1:end])
            at = end
        return names or None


NO_HELLO = Hello(None, None, 0)  # what comes is no TLS, and has no name

TLS_HANDSHAKE = 22  # RFC 8446 5.1, ContentType
CLIENT_HELLO = 1  # RFC 8446 4, HandshakeType
HELLO_MIN = 41  # version, random, empty session id, one cipher suite, one compression method
SERVER_NAME, ALPN = 0, 16  # extension types, RFC 6066 3 and RFC 7301 3.1
_two_shorts = struct.Struct(">HH").unpack_from
_short = struct.Struct(">H").unpack_from
_hello_header = struct.Struct(">BBBHBBH").unpack_from  # a record's header, and that of the handshake message in it


def parse_client_hello(body: bytes) -> tuple[str | None, bytes | None]:
    """The name and the body of the ALPN extension in a ClientHello (RFC 8446 4.1.2).

    `body` is the handshake message without its header.  All of its framing is checked, and an extension that comes
    twice is refused: so the name read here is the one that the backend's TLS reads.  Raises Malformed.
    """
    if body < b"\x03\x01":  # SSL 3.0 and older have no extensions; newer versions are the backend's business
        raise Malformed(f"TLS version {body[0]}.{body[1]}", PROTOCOL_VERSION)
    total = len(body)
    session_end = 35 + body[34]
    if body[34] > 32 or session_end + 2 > total:
        raise Malformed("a bad session id", DECODE_ERROR)
    suites = _short(body, session_end)[0]
    at = session_end + 2 + suites
    if not suites or suites % 2 or at >= total:
        raise Malformed("bad cipher suites", DECODE_ERROR)
    methods = body[at]
    at += 1 + methods
    if not methods or at > total:
        raise Malformed("bad compression methods", DECODE_ERROR)
    if at == total:
        return None, None
    if at + 2 > total or at + 2 + _short(body, at)[0] != total:
        raise Malformed("extensions that do not fill the hello", DECODE_ERROR)
    at += 2
    places: dict[int, int] = {}  # extension type -> where its header stands
    while at + 4 <= total:
        kind, size = _two_shorts(body, at)
        if kind in places:
            raise Malformed(f"extension {kind} twice", ILLEGAL_PARAMETER)
        places[kind] = at
        at += 4 + size
    if at != total:
        raise Malformed("an extension that goes past the hello", DECODE_ERROR)
    name = alpn = None
    if SERVER_NAME in places:
        at = places[SERVER_NAME]
        name = parse_server_name(body[at + 4:at + 4 + _short(body, at + 2)[0]])
    if ALPN in places:
        at = places[ALPN]
        alpn = body[at + 4:at + 4 + _short(body, at + 2)[0]]
    return name, alpn


@functools.lru_cache(maxsize=NAMES_MAX)
def parse_server_name(names: bytes) -> str:
    """The host_name in the body of a server_name extension (RFC 6066 3), normalised.  Raises Malformed.

    Implementations differ on which entry of a longer list counts, so a list has to have one entry.
    """
    if len(names) < 5 or _short(names, 0)[0] != len(names) - 2:
        raise Malformed("a server_name list of the wrong length", DECODE_ERROR)
    kind, size = names[2], _short(names, 3)[0]
    if kind != 0:
        raise Malformed(f"a server_name of type {kind}", DECODE_ERROR)
    if not size or 5 + size > len(names):
        raise Malformed("a server_name of the wrong length", DECODE_ERROR)
    if 5 + size < len(names):
        raise Malformed("more than one server_name", ILLEGAL_PARAMETER)
    return normalise(names[5:])


def whole_hello(data: bytes) -> Hello | None:
    """The hello at the start of `data`, if all of it is there and in one record, as nearly always.

    None for anything else, right or wrong: HelloReader has to read it.  Raises Malformed.
    """
    if len(data) <= 9:
        return None
    first, major, _, length, kind, high, size = _hello_header(data)
    end = 9 + size
    if first != TLS_HANDSHAKE or major != 3 or kind != CLIENT_HELLO or high \
            or not HELLO_MIN + 4 <= size + 4 <= length <= RECORD_MAX or len(data) < end:
        return None
    name, alpn = parse_client_hello(data[9:end])
    return Hello(name, alpn, end)


class HelloReader:
    """Joins the ClientHello of one connection from its records; one for each connection.

    It keeps its place between calls, so that a hello in records of one byte, each in a packet of its own, costs linear
    time.
    """

    __slots__ = ("at", "left", "message")

    def __init__(self) -> None:
        self.at = 0  # the first byte of `data` that has not been read
        self.left = 0  # bytes of the current record behind `at`
        self.message = bytearray()  # the handshake message so far, without record headers

    def read(self, data: bytes | bytearray) -> Hello | None:
        """Read on in `data`, which has all bytes of earlier calls and more behind them.

        RFC 8446 5.1 and 4.1.2.  One rule is stricter than OpenSSL's: an empty handshake record, which the RFC
        forbids, is refused.  Raises Malformed.
        """
        message = self.message
        received = len(data)
        while True:
            if not self.left:
                if not self._record(data):
                    return None
            taken = min(self.left, received - self.at)
            message += data[self.at:self.at + taken]
            self.at += taken
            self.left -= taken
            if message and message[0] != CLIENT_HELLO:
                raise Malformed(f"handshake message of type {message[0]}, not a ClientHello", UNEXPECTED_MESSAGE)
            if len(message) >= 4:
                size = int.from_bytes(message[1:4], "big")
                if size < HELLO_MIN:
                    raise Malformed(f"a ClientHello of {size} bytes", DECODE_ERROR)
                if size > HELLO_MAX:
                    raise Malformed(f"a ClientHello of {size} bytes", kind="hello_too_large")
                more = len(message) - 4 - size
                if more >= 0:
                    if self.at - more > HELLO_WIRE_MAX:
                        raise Malformed(f"a ClientHello over {HELLO_WIRE_MAX} bytes of records", kind="hello_too_large")
                    name, alpn = parse_client_hello(bytes(message[4:4 + size]))
                    return Hello(name, alpn, self.at - more)
            if self.at >= HELLO_WIRE_MAX:
                raise Malformed(f"a ClientHello over {HELLO_WIRE_MAX} bytes of records", kind="hello_too_large")
            if self.left:  # the rest of this record has not come yet
                return None

    def _record(self, data: bytes | bytearray) -> bool:
        """Step over a record header.  Returns whether it is complete and a byte of the record follows."""
        header = data[self.at:self.at + 5]
        if header:
            if header[0] != TLS_HANDSHAKE:
                raise Malformed(f"a TLS record of type {header[0]} in the hello", UNEXPECTED_MESSAGE)
            if len(header) > 1 and header[1] != 3:
                raise Malformed(f"not TLS (record version {header[1]})", kind="not_tls")
        if len(header) < 5:
            return False
        length = _short(header, 3)[0]
        if not 0 < length <= RECORD_MAX:
            raise Malformed(f"a TLS record of {length} bytes", DECODE_ERROR)
        self.left = length
        self.at += 5
        return self.at < len(data)


# -- the PROXY header --------------------------------------------------------------------------

# "PROXY protocol" and a section mean haproxy.org's specification, doc/proxy-protocol.txt.
PROXY_V1_MAX = 107  # bytes; PROXY protocol 2.1: the longest line, CRLF included
PROXY_V2_MAX = 4096  # bytes; nginx's limit: real headers with TLVs stay far below


class ProxyHeader(NamedTuple):
    """A PROXY protocol header of version 1 or 2."""

    size: int  # bytes on the wire
    source: Address | None  # the client, IPv4 inside IPv6 as IPv4; None: not told, so it is the connection's own
    port: int  # the client's
    destination: tuple[str, int] | None = None  # the address that the client connected to


PROXY_V1 = b"PROXY "
PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n"
PROXY_PORT = re.compile(rb"0|[1-9][0-9]{0,4}")
PROXY_FAMILIES = {b"TCP4": ipaddress.IPv4Address, b"TCP6": ipaddress.IPv6Address}


def parse_proxy_v1(data: bytes) -> ProxyHeader | None:
    """A version 1 header: one line of text (PROXY protocol 2.1).  Raises Malformed."""
    end = data.find(b"\r\n", 0, PROXY_V1_MAX)
    if end < 0:
        line = data[:PROXY_V1_MAX]
        if len(line) == PROXY_V1_MAX:
            raise Malformed("a PROXY line without an end", kind="proxy")
        if not line.startswith(PROXY_V1[:len(line)]) or b"\n" in line or b"\r" in line[:-1] or b"\0" in line:
            raise Malformed("a broken PROXY line", kind="proxy")
        return None
    word, *fields = data[:end].split(b" ")
    if word != b"PROXY" or not fields or b"\n" in data[:end] or b"\r" in data[:end] or b"\0" in data[:end]:
        raise Malformed("a broken PROXY line", kind="proxy")
    if fields[0] == b"UNKNOWN":
        return ProxyHeader(end + 2, None, 0)
    try:
        family, source, destination, source_port, destination_port = fields
        address = PROXY_FAMILIES[family]
        sender = unmapped(address(proxy_address(source)))
        target = unmapped(address(proxy_address(destination)))
    except (ValueError, KeyError):
        raise Malformed("a PROXY line with bad addresses", kind="proxy") from None
    for port in (source_port, destination_port):
        if not PROXY_PORT.fullmatch(port) or int(port) > 65535:
            raise Malformed("a PROXY line with a bad port", kind="proxy")
    return ProxyHeader(end + 2, sender, int(source_port), (str(target), int(destination_port)))


def proxy_address(field: bytes) -> str:
    """The text of an address field.  Raises ValueError for a scope (`%eth0`), which ipaddress would accept."""
    text = field.decode("ascii")
    if "%" in text:
        raise ValueError("a scope is not part of an address")
    return text


PROXY_ADDRESSES = {0: 0, 1: 12, 2: 36, 3: 216}  # bytes for each family: UNSPEC, INET, INET6, UNIX
PROXY_STREAM, PROXY_PROTOCOLS = 1, (0, 1, 2)  # UNSPEC, STREAM, DGRAM
TLV_AUTHORITY, TLV_CRC32C, TLV_UNIQUE_ID, TLV_SSL = 0x02, 0x03, 0x05, 0x20


def parse_proxy_v2(data: bytes) -> ProxyHeader | None:
    """A version 2 header: binary, with TLVs (type, length, value) behind the addresses (PROXY protocol 2.2).

    The command LOCAL is skipped with all that it carries, and so is the family UNSPEC.  The command PROXY tells the
    client where it is TCP over IPv4 or IPv6.  Of a unix socket, of UDP and of UNSPEC it tells nothing, as version 1
    with UNKNOWN.  Where the family is known, its addresses and TLVs have to fit, and the TLVs to be right, the
    checksum included.  Raises Malformed.
    """
    if not data.startswith(PROXY_V2[:len(data)]):
        raise Malformed("a broken PROXY signature", kind="proxy")
    if len(data) < 16:
        return None
    version, command = divmod(data[12], 16)
    family, protocol = divmod(data[13], 16)
    length = _short(data, 14)[0]
    size = 16 + length
    if version != 2 or command > 1:
        raise Malformed(f"PROXY version {version} command {command}", kind="proxy")
    if size > PROXY_V2_MAX:
        raise Malformed(f"a PROXY header of {size} bytes", kind="proxy")
    if command == 1:
        if family not in PROXY_ADDRESSES or protocol not in PROXY_PROTOCOLS:
            raise Malformed(f"PROXY family {family} protocol {protocol}, which are not defined", kind="proxy")
        if length < PROXY_ADDRESSES[family]:
            raise Malformed("a PROXY header too short for its addresses", kind="proxy")
    if len(data) < size:
        return None
    if command == 0 or family == 0:
        return ProxyHeader(size, None, 0)
    header = bytes(data[:size])
    check_proxy_tlvs(header, 16 + PROXY_ADDRESSES[family])
    if family == 3 or protocol != PROXY_STREAM:
        return ProxyHeader(size, None, 0)
    address, width = (ipaddress.IPv4Address, 4) if family == 1 else (ipaddress.IPv6Address, 16)
    ports = 16 + 2 * width
    destination = str(unmapped(address(header[16 + width:ports]))), _short(header, ports + 2)[0]
    return ProxyHeader(size, unmapped(address(header[16:16 + width])), _short(header, ports)[0], destination)


def read_tlvs(data: bytes, at: int) -> list[tuple[int, int, bytes]]:
    """The TLVs in `data` from `at` to its end, as (type, place of the value, value).  Raises Malformed."""
    found = []
    while at < len(data):
        value = at + 3
        if value > len(data) or value + _short(data, at + 1)[0] > len(data):
            raise Malformed("a PROXY TLV that goes past its end", kind="proxy")
        size = _short(data, at + 1)[0]
        found.append((data[at], value, data[value:value + size]))
        at = value + size
    return found


def check_proxy_tlvs(header: bytes, at: int) -> None:
    """Raise Malformed for TLVs that a strict receiver behind us would refuse (PROXY protocol 2.2.1 to 2.2.7)."""
    checksums = 0
    for kind, place, value in read_tlvs(header, at):
        wrong = False
        if kind == TLV_AUTHORITY:
            try:
                wrong = len(value) > 255 or not value.decode("utf-8").isprintable()
            except UnicodeDecodeError:
                wrong = True
        elif kind == TLV_UNIQUE_ID:
            wrong = len(value) > 128
        elif kind == TLV_SSL:
            wrong = len(value) < 5
            read_tlvs(value, 5)
        elif kind == TLV_CRC32C:
            checksums += 1
            wrong = checksums > 1 or len(value) != 4 or \
                crc32c(header[:place] + bytes(4) + header[place + 4:]) != int.from_bytes(value, "big")
        if wrong:
            raise Malformed(f"a bad PROXY TLV {kind:#04x}", kind="proxy")


@functools.cache
def crc32c_table() -> list[int]:
    """The remainder of each byte in CRC-32C.  Made when the first checksum comes: few headers have one."""
    table = []
    for remainder in range(256):
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
        table.append(remainder)
    return table


def crc32c(data: bytes) -> int:
    """The checksum CRC-32C (Castagnoli, RFC 3309); that of b"123456789" is 0xe3069283."""
    table, crc = crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def proxy_v1(source: tuple[str, int] | None, destination: tuple[str, int]) -> bytes:
    """A version 1 header (PROXY protocol 2.1) for a connection from `source` to `destination`, both (host, port).

    Without a source the header says UNKNOWN.  Raises ValueError where a host is no address.
    """
    if source is None:
        return PROXY_V1 + b"UNKNOWN\r\n"
    (sender, receiver), version = proxy_ends(source, destination)
    return PROXY_V1 + f"TCP{version} {sender} {receiver} {source[1]} {destination[1]}\r\n".encode()


def proxy_v2(source: tuple[str, int] | None, destination: tuple[str, int]) -> bytes:
    """A version 2 header (PROXY protocol 2.2), from the same arguments.  Without a source it says LOCAL."""
    if source is None:
        return PROXY_V2 + b"\x20\0\0\0"
    (sender, receiver), version = proxy_ends(source, destination)
    block = sender.packed + receiver.packed + struct.pack("!HH", source[1], destination[1])
    return PROXY_V2 + struct.pack("!BBH", 0x21, 0x11 if version == 4 else 0x21, len(block)) + block


def proxy_ends(*ends: tuple[str, int]) -> tuple[list[Address], int]:
    """The addresses of both ends, and their IP version, 4 or 6.

    A header has one family: where the ends differ, the IPv4 one is written as IPv6.
    """
    addresses = [parse_ip(host) for host, _ in ends]
    if len({address.version for address in addresses}) > 1:
        addresses = [ipaddress.IPv6Address(f"::ffff:{a}") if a.version == 4 else a for a in addresses]
    return addresses, addresses[0].version


# A route's send_proxy, and the function that writes its header.  Two need no function: `as-received` passes on the
# bytes of a believed header, `none` passes on nothing.
PROXY_WRITERS = {"as-received": None, "none": None, "v1": proxy_v1, "v2": proxy_v2}

# (--proxy-protocol, is the peer in --proxy-from?) -> what becomes of the peer.  "close": it is closed unread.  The
# others are policies of Prelude: its PROXY header is refused, allowed, or required.
PROXY_POLICY = {
    ("off", False): "refuse", ("off", True): "refuse",
    ("auto", False): "refuse", ("auto", True): "allow",
    ("required", False): "close", ("required", True): "require",
}


# -- PostgreSQL --------------------------------------------------------------------------------

STARTUP_MAX = 10004  # PostgreSQL's own limit for a startup packet
SSL_REQUEST, GSSENC_REQUEST, CANCEL_REQUEST = 80877103, 80877104, 80877102
STARTUP = 3  # major protocol version
SSL_REQUEST_BYTES = struct.pack(">II", 8, SSL_REQUEST)


def parse_startup(data: bytes) -> int | None:
    """Which first packet a PostgreSQL client sends: SSL_REQUEST, GSSENC_REQUEST, CANCEL_REQUEST or STARTUP.

    PostgreSQL's documentation, "Message Formats": length (4 bytes, itself included), code (4 bytes).  The two
    encryption requests have nothing more.  CANCEL_REQUEST is returned as soon as its code is there, STARTUP only when
    all of it is there.  Raises Malformed.
    """
    if len(data) < 4:
        if any(data[:2]):
            raise Malformed("not a PostgreSQL startup packet", kind="not_tls")
        return None
    length = int.from_bytes(data[:4], "big")
    if not 8 <= length <= STARTUP_MAX:
        raise Malformed(f"a PostgreSQL startup packet of {length} bytes", kind="not_tls")
    if len(data) < 8:
        return None
    code = int.from_bytes(data[4:8], "big")
    if code in (SSL_REQUEST, GSSENC_REQUEST):
        if length != 8:
            raise Malformed(f"a PostgreSQL encryption request of {length} bytes")
        return code
    if code == CANCEL_REQUEST:
        return code
    if code >> 16 != STARTUP:
        raise Malformed(f"PostgreSQL protocol {code >> 16}.{code & 0xFFFF}")
    return STARTUP if len(data) >= length else None


# -- the prelude -------------------------------------------------------------------------------

CAPITALS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # a method of HTTP begins with one
HTTP_METHODS = b"GPHDOCT"  # the first letters of GET, POST, PUT, PATCH, HEAD, DELETE, OPTIONS, CONNECT, TRACE
# First byte -> what a client without TLS most likely speaks.
NOT_TLS = {first: kind for kind, letters in {"HTTP": HTTP_METHODS, "SSH": b"S", "RDP": b"\x03",
                                             "an SSLv2 hello": range(0x80, 0x100)}.items() for first in letters}


class Prelude:
    """Reads what one client says before it can be routed.  A machine without I/O.

    `feed` takes bytes.  It returns a Hello, or an answer to send at once (b"S", b"N"), or None for "more".  After a
    Hello, `header` and `data` are the bytes for the backend.  `policy` says what to do about a PROXY header: "allow",
    "require" or "refuse" (see PROXY_POLICY).

    `requests(data, seen)` reads a request in plain HTTP: it returns what becomes of it, None for "more", or raises
    Malformed; `data[:seen]` is what an earlier call has had.  None where HTTP is not served.
    """

    __slots__ = ("policy", "local", "hellos", "step", "header", "proxy", "data", "reader", "ssl", "requests", "seen")

    START, CLIENT, AFTER_GSS, AFTER_SSL = "start", "client", "after GSSENCRequest", "after SSLRequest"
    PLAIN, ASKING = "PostgreSQL in clear text", "plain HTTP"

    def __init__(self, policy: str, local: bool, hellos: HelloMemory | None = None,
                 requests: Callable[[bytearray, int], Any] | None = None):
        self.policy = policy
        self.hellos = hellos  # None: every hello is read plainly
        self.local = local  # the peer is this machine, so its PROXY header may say that the client is, too
        self.step = self.START
        self.header = b""  # the bytes of a believed PROXY header
        self.proxy: ProxyHeader | None = None  # that header, parsed
        self.data = bytearray()  # the bytes behind the header, without requests that were answered here
        self.reader: HelloReader | None = None  # from the first byte of a hello on
        self.ssl = False  # the client has sent SSLRequest, so the backend has to be sent one, too
        self.requests = requests
        self.seen = 0  # bytes of `data` that `requests` has had

    def feed(self, data: bytes | memoryview) -> Any:
        """Read on with more bytes: a Hello, bytes, None, or what `requests` returns.

        Raises Malformed; Refused for a request that is well-formed, but unwanted.
        """
        self.data += data
        while self.data:
            opener = self.OPENERS.get((self.step, self.data[0]))
            if opener is None:
                self._stranger(self.data[0])
            if self.policy == "require" and self.step is self.START and opener not in (Prelude._proxy, Prelude._http):
                raise Malformed("a PROXY header is required", kind="proxy")
            result = opener(self)
            if result is not self:  # `self` means: one part was read, go on with the rest of `data`
                return result
        return None

    def language(self) -> tuple[str, int]:
        """The language for a refusal (see `told` in sniroute_refusals), and the minor version of its TLS record."""
        if self.reader is not None:
            return (TLS, self.data[2]) if len(self.data) > 2 else (NOTHING, 0)
        return {self.PLAIN: POSTGRES, self.ASKING: HTTP}.get(self.step, NOTHING), 0

    def _stranger(self, first: int) -> NoReturn:
        """No row of OPENERS fits the first byte: refuse it."""
        if self.step is self.AFTER_SSL:
            raise Malformed("no TLS behind SSLRequest")
        raise Malformed(f"not TLS: {NOT_TLS.get(first, 'unknown')}", kind="not_tls")

    def _hello(self) -> Hello | None:
        """A ClientHello.  Most are complete at the first call, and need no HelloReader."""
        if self.reader is None:
            self.reader = HelloReader()
            hello = self.hellos.find(bytes(self.data)) if self.hellos is not None else whole_hello(bytes(self.data))
            if hello is not None:
                return hello
        return self.reader.read(self.data)

    def _http(self) -> Any:
        """A request in plain HTTP, which has no hello: refused, unless HTTP is served."""
        if self.requests is None:
            self._stranger(self.data[0])
        if self.policy == "require" and self.step is self.START:
            raise Malformed("a PROXY header is required", kind="proxy")
        self.step = self.ASKING
        found = self.requests(self.data, self.seen)
        self.seen = len(self.data)
        return found

    def _proxy(self) -> Prelude | None:
        """A PROXY header; or an HTTP request, since POST begins with the same letter."""
        data = bytes(self.data[:PROXY_V2_MAX])
        parse, signature = (parse_proxy_v1, PROXY_V1) if data[0] == PROXY_V1[0] else (parse_proxy_v2, PROXY_V2)
        if not data.startswith(signature[:len(data)]) and (signature is PROXY_V1 or self.requests is not None):
            return self._http()  # an empty line may come before a request
        if self.policy not in ("allow", "require"):
            if len(data) < len(signature) and signature.startswith(data):
                return None
            raise Malformed("a PROXY header that is not wanted from here", kind="proxy")
        header = parse(data)
        if header is None:
            return None
        source = header.source
        if source is not None and not self.local and (source.is_loopback or source.is_unspecified
                                                      or source.is_multicast):
            raise Malformed(f"a PROXY header that claims to come from {source}", kind="proxy")
        self.header = data[:header.size]
        self.proxy = header
        del self.data[:header.size]
        self.step = self.CLIENT
        return self

    def _postgres(self) -> bytes | None:
        """The first packet of a PostgreSQL client.  GSSENCRequest is answered "no": psql then asks for TLS."""
        request = parse_startup(bytes(self.data[:STARTUP_MAX]))
        if request is None:
            return None
        if request == STARTUP:
            self.step = self.PLAIN
            raise Refused("plain_postgres", "a PostgreSQL client without TLS")
        if request == CANCEL_REQUEST:
            raise Refused("cancel", "a CancelRequest in clear text names no server")
        if len(self.data) > 8:  # CVE-2021-23214: bytes in clear text would be taken for a part of the TLS
            raise Malformed("bytes behind a PostgreSQL encryption request")
        self.data.clear()
        if request == GSSENC_REQUEST:
            if self.step is self.AFTER_GSS:
                raise Malformed("GSSENCRequest twice")
            self.step = self.AFTER_GSS
            return b"N"
        self.ssl = True
        self.step = self.AFTER_SSL
        return b"S"

    # (step, first byte) -> the method that reads on; other first bytes are refused by `_stranger`
    OPENERS: dict[tuple[str, int], Callable[[Prelude], Any]] = {}
    for _step in (START, CLIENT, AFTER_GSS):
        OPENERS[_step, 0x16] = _hello
        OPENERS[_step, 0x00] = _postgres
        for _letter in CAPITALS:
            OPENERS[_step, _letter] = _http
    for _letter in range(256):
        OPENERS[ASKING, _letter] = _http
    OPENERS[AFTER_SSL, 0x16] = _hello
    OPENERS[START, PROXY_V1[0]] = OPENERS[START, PROXY_V2[0]] = _proxy
    del _step, _letter



# -- hellos seen before ------------------------------------------------------------------------

KEY = 11  # the first bytes of a hello, both headers and the version: its shape is looked up by them
SHAPES_MAX = 512  # shapes remembered, 3 KB each.  The key holds the length, so there is one shape for each length
LEARN_EVERY = 16  # one in so many hellos of unknown shape is remembered: that takes 3 to 5 times as long as reading it
EXTENSIONS_MAX = 32  # in a hello whose shape is remembered: browsers have about 20, and 900 would fit


class Shape(NamedTuple):
    """The framing of a hello: each length and each type in it, and where its name is.

    `parse_client_hello` judges nothing else, but for the version, which is a part of the key, and the name itself.
    When a program connects again to a name of the same length, its hello has the same framing: only random bytes,
    keys, tickets and the name differ.  So one comparison is enough to know that it is right, and where its name is.
    A browser that shuffles its extensions has another framing each time, and is read plainly.
    """

    end: int  # the hello's size on the wire
    framing_of: Callable[[bytes, int], tuple[bytes, ...]]  # Struct.unpack_from: a hello's lengths and types from KEY on
    framing: tuple[bytes, ...]  # the lengths and types of this shape
    name: slice  # the body of the server_name extension
    alpn: slice | None  # the body of the ALPN extension


def shape_of(hello: bytes) -> Shape | None:
    """The shape of a hello that has been parsed, is in one record, and has a name; None with too many extensions."""
    layout, at = ["32x"], KEY + 32  # skip the random bytes, RFC 8446 4.1.2
    for width in (1, 2, 1):  # session id, cipher suites, compression methods
        size = int.from_bytes(hello[at:at + width], "big")
        layout.append(f"{width}s{size}x")
        at += width + size
    layout.append("2s")  # the length of all extensions
    at += 2
    bodies = {}
    while at < len(hello):
        kind, size = _two_shorts(hello, at)
        bodies[kind] = slice(at + 4, at + 4 + size)
        layout.append(f"4s{size}x")
        at += 4 + size
        if len(bodies) > EXTENSIONS_MAX:
            return None
    framing_of = struct.Struct("".join(layout)).unpack_from
    return Shape(len(hello), framing_of, framing_of(hello, KEY), bodies[SERVER_NAME], bodies.get(ALPN))


class PortPrelude(Prelude):
    """Reads what a client of a port with one target says first: a PROXY header, and nothing behind it.

    `feed` returns NO_HELLO where the header is whole, or where there is none and the policy is "allow".
    """

    __slots__ = ()

    def feed(self, data: bytes | memoryview) -> Hello | None:
        """Read on with more bytes.  Raises Malformed."""
        self.data += data
        start = bytes(self.data[:len(PROXY_V2)])
        if not any(start[:len(signature)] == signature[:len(start)] for signature in (PROXY_V1, PROXY_V2)):
            if self.policy == "require":
                raise Malformed("a PROXY header is required", kind="proxy")
            return NO_HELLO
        return None if self._proxy() is None else NO_HELLO


class HelloMemory:
    """Reads a hello of a known shape with one struct call, in a third of the time that `whole_hello` takes.

    One in LEARN_EVERY hellos of unknown shape is remembered.  Its shape replaces one of the same length, or else the
    oldest.  So many shapes that never come again cost little, and a useful one that they push out is soon learnt
    again.  Loop only.
    """

    def __init__(self) -> None:
        self.shapes: dict[bytes, Shape] = {}
        self.unknown = 0  # hellos of unknown shape so far

    def find(self, data: bytes) -> Hello | None:
        """What `whole_hello` returns, which is called for a hello of unknown shape.  Raises Malformed."""
        shape = self.shapes.get(data[:KEY])
        if shape is not None:
            end, framing_of, framing, name, alpn = shape
            if len(data) >= end and framing_of(data, KEY) == framing:
                return Hello(parse_server_name(data[name]), data[alpn] if alpn is not None else None, end)
        hello = whole_hello(data)
        if hello is not None and hello.name is not None:
            self.unknown += 1
            if self.unknown % LEARN_EVERY == 0:
                self.learn(data[:hello.end])
        return hello

    def learn(self, hello: bytes) -> None:
        """Remember the shape of a hello that `whole_hello` has read."""
        shape = shape_of(hello)
        if shape is not None:
            self.shapes.pop(hello[:KEY], None)  # a shape that is learnt again becomes the newest
            if len(self.shapes) >= SHAPES_MAX:
                del self.shapes[next(iter(self.shapes))]
            self.shapes[hello[:KEY]] = shape
