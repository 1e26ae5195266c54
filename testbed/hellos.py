"""Bytes for the wire: names, ClientHellos, PROXY headers and PostgreSQL packets; and checks of what a parser says.

    genuine          a hello that OpenSSL has written; HELLO is such a one, for NAME
    hello            a hello built field by field, for what OpenSSL would never write; without arguments a good one
    v1, v2, tlv      PROXY headers; LINE, HEADER, HEADER6 and others are good ones
    check_parser     asks a parser about the whole, about each prefix, and about the whole with bytes behind it

The ids in tables of tests begin with a letter: T for TLS, P and Q for PROXY versions 1 and 2, G for PostgreSQL.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import ssl
import struct
from typing import Any, Callable, NamedTuple

from sniroute_refusals import REFUSALS, Refused
from sniroute_wire import GSSENC_REQUEST, PROXY_V2, SSL_REQUEST, Hello, HelloReader, crc32c


# -- names -------------------------------------------------------------------------------------

NAME = "db.example.com"

LABEL63 = "a" * 63
LONGEST = ".".join([LABEL63, LABEL63, LABEL63, "a" * 61])

GOOD_NAMES = {
    "two-labels": "a.b",
    "one-label-T42": "localhost",
    "one-letter": "a",
    "one-label-of-63": LABEL63,
    "digits-in-a-label": "1.2.3.org",
    "underscore-T40": "_acme.x.org",
    "punycode-is-not-decoded-T40": "xn--mnchen-3ya.example",
    "broken-punycode-is-not-decoded-T40": "xn--" + "9" * 50 + ".example",
    "hyphens-inside": "a-b--c.example.com",
    "label-of-63-T38": LABEL63 + ".org",
    "whole-of-253-T38": LONGEST,
    "last-label-begins-with-a-digit": "example.1a",
    "last-label-begins-like-hex": "example.0xyz",
}
BAD_NAMES = {
    "empty-T33": b"",
    "only-a-dot": b".",
    "only-two-dots": b"..",
    "two-trailing-dots": b"db.example.com..",
    "one-label-of-64": b"a" * 64,
    "one-label-that-is-a-number-T41": b"1234",
    "one-label-in-hex-T41": b"0xdb",
    "ipv4-with-a-trailing-dot-T41": b"127.0.0.1.",
    "number-with-a-trailing-dot-T41": b"2130706433.",
    "whole-of-254-and-a-trailing-dot-T38": LONGEST.encode() + b"a.",
    "label-of-64-T38": b"a" * 64 + b".org",
    "whole-of-254-T38": LONGEST.encode() + b"a",
    "whole-of-255-T38": b".".join([b"a" * 63] * 4),
    "whole-of-256-T38": b"a." * 127 + b"aa",
    "whole-of-65535-T38": b"a." * 32767 + b"a",
    "empty-label-T38": b"a..example.com",
    "leading-dot-T38": b".example.com",
    "label-with-a-leading-hyphen-T38": b"db.-example.com",
    "label-with-a-trailing-hyphen-T38": b"db-.example.com",
    "an-option": b"--url=x.example.com",
    "hyphen-only": b"-.-",
    "wildcard-X1": b"*.example.com",
    "newline-behind-T36": b"db.example.com\n",
    "NUL-in-front-T35": b"\0db.example.com",
    "NUL-inside-T35": b"db.example.com\0.evil.org",
    "NUL-behind-T35": b"db.example.com\0",
    "colour-T36": b"\x1b[31mdb.example.com",
    "utf-8-T36": "m\u00fcnchen.example".encode(),
    "arabic-digits": "\u0661.example.\u0661".encode(),
    "kelvin-sign-that-lowers-to-k": "\u212a.example".encode(),
    "ipv4-T41": b"127.0.0.1",
    "short-ipv4-T41": b"127.1",
    "integer-ipv4-T41": b"2130706433",
    "hex-ipv4-T41": b"0x7f.1",
    "hex-last-label-T41": b"127.0.0.0x1",
    "upper-hex-last-label-T41": b"127.0.0.0XA",
    "empty-hex-last-label-T41": b"example.0x",
    "last-label-of-digits-T41": b"example.1234567890",
    "ipv6-T41": b"::1",
    "ipv6-in-brackets-T41": b"[::1]",
}


# -- bytes for the wire ------------------------------------------------------------------------


def vector(width: int, data: bytes) -> bytes:
    """`data` with its length in front, in `width` bytes."""
    return len(data).to_bytes(width, "big") + data


def extension(kind: int, data: bytes) -> bytes:
    """An extension of a hello, RFC 8446 section 4.2."""
    return kind.to_bytes(2, "big") + vector(2, data)


def host_name(name: bytes, kind: int = 0) -> bytes:
    """An entry of the server_name extension, RFC 6066 section 3."""
    return bytes([kind]) + vector(2, name)


def server_name(*entries: bytes) -> bytes:
    """The server_name extension with these entries."""
    return extension(0, vector(2, b"".join(entries)))


def named(name: bytes) -> bytes:
    """The server_name extension for one name."""
    return server_name(host_name(name))


def alpn(*names: bytes) -> bytes:
    """The ALPN extension, RFC 7301 section 3.1."""
    return extension(16, vector(2, b"".join(vector(1, name) for name in names)))


SNI = named(NAME.encode())
VERSIONS = extension(43, vector(1, b"\x03\x04\x03\x03"))
GROUPS = extension(10, vector(2, b"\x00\x1d\x00\x17"))
SIGNATURES = extension(13, vector(2, b"\x04\x03\x08\x04\x04\x01"))


def body(*extensions: bytes, version: bytes = b"\3\3", session: bytes = vector(1, b""),
         suites: bytes = vector(2, b"\x13\x01\xc0\x2f"), methods: bytes = vector(1, b"\0"),
         block: bytes | None = None) -> bytes:
    """The body of a ClientHello, RFC 8446 section 4.1.2.  `block` replaces the extensions and their length."""
    block = vector(2, b"".join(extensions)) if block is None else block
    return version + bytes(range(32)) + session + suites + methods + block


def handshake(data: bytes, kind: int = 1, size: int | None = None) -> bytes:
    """A handshake message with this body.  `size` is the length that it claims, by default the right one."""
    return bytes([kind]) + (len(data) if size is None else size).to_bytes(3, "big") + data


def record(data: bytes, kind: int = 22, version: bytes = b"\3\1", size: int | None = None) -> bytes:
    """A TLS record.  `size` is the length that it claims, by default the right one."""
    return bytes([kind]) + version + (len(data) if size is None else size).to_bytes(2, "big") + data


def records(message: bytes, *sizes: int) -> bytes:
    """A message split into records of these sizes; the rest is one more record."""
    parts, at = [], 0
    for size in sizes:
        parts.append(record(message[at:at + size]))
        at += size
    return b"".join(parts) + (record(message[at:]) if at < len(message) else b"")


def hello(*extensions: bytes, **fields: Any) -> bytes:
    """A ClientHello in one record; without arguments, a good one that asks for NAME."""
    return records(handshake(body(*(extensions or (SNI,)), **fields)))


def hello_of(size: int) -> bytes:
    """A handshake message whose body has `size` bytes."""
    return handshake(body(SNI, extension(21, bytes(size - len(body(SNI, extension(21, b"")))))))


@functools.cache
def genuine(protocols: tuple[str, ...] = (), newest: str = "TLSv1_3", name: str | None = NAME) -> bytes:
    """The hello of OpenSSL's client.  Cached: the same arguments give the same bytes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = ssl.TLSVersion[newest]
    if protocols:
        context.set_alpn_protocols(list(protocols))
    out = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name).do_handshake()
    return out.read()


HELLO = genuine()  # for NAME


def settled(wire: bytes) -> bytes:
    """A genuine hello with its random bytes and keys replaced by zeros, so that a mutation of it can be repeated."""
    wire = wire[:11] + bytes(32) + wire[43:44] + bytes(wire[43]) + wire[44 + wire[43]:]
    head, share, tail = wire.partition(b"\0\x24\0\x1d\0\x20")  # X25519
    return head + share + (bytes(32) + tail[32:] if share else b"")


ASK_TLS, ASK_GSS = struct.pack(">II", 8, SSL_REQUEST), struct.pack(">II", 8, GSSENC_REQUEST)


def v1(text: str) -> bytes:
    """A PROXY header of version 1: `text` is the line behind "PROXY"."""
    return b"PROXY " + text.encode() + b"\r\n"


def v2(version_command: int, family: int, data: bytes = b"", size: int | None = None) -> bytes:
    """A PROXY header of version 2.  `size` is the length that it claims, by default the right one."""
    return PROXY_V2 + struct.pack(">BBH", version_command, family, len(data) if size is None else size) + data


def tlv(kind: int, data: bytes) -> bytes:
    """A TLV of a version 2 header."""
    return bytes([kind]) + vector(2, data)


def summed(header: bytes, behind: bytes = b"") -> bytes:
    """Add to a version 2 header a TLV with the right checksum, and the bytes `behind` after that."""
    size = struct.unpack_from(">H", header, 14)[0] + 7 + len(behind)
    whole = header[:14] + struct.pack(">H", size) + header[16:] + tlv(3, bytes(4)) + behind
    return whole.replace(tlv(3, bytes(4)), tlv(3, crc32c(whole).to_bytes(4, "big")))


INET = bytes((192, 0, 2, 1, 192, 0, 2, 2)) + struct.pack(">HH", 1111, 443)
INET6 = ipaddress.IPv6Address("2001:db8::1").packed + ipaddress.IPv6Address("2001:db8::2").packed \
    + struct.pack(">HH", 1111, 443)
SOURCE, SOURCE6 = ipaddress.IPv4Address("192.0.2.1"), ipaddress.IPv6Address("2001:db8::1")
LINE = v1("TCP4 192.0.2.1 192.0.2.2 1111 443")
HEADER, HEADER6 = v2(0x21, 0x11, INET), v2(0x21, 0x21, INET6)
LOCAL = v2(0x20, 0x00)
HEADERS = {"no-header": b"", "v1": LINE, "v2": HEADER, "LOCAL": LOCAL}

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 50000 443\r\n"
V2 = v2(0x21, 0x11, bytes((192, 0, 2, 8, 198, 51, 100, 1)) + struct.pack(">HH", 50001, 443))
V2_LOCAL = v2(0x20, 0x00, b"healthy")
ROUTED_HEADER = v1("TCP4 192.0.2.1 192.0.2.9 1111 443")


# -- verdicts ----------------------------------------------------------------------------------


class Bad(NamedTuple):
    """A refusal that a test expects: its row of REFUSALS, and its alert."""

    kind: str = "malformed"
    alert: int | None = None


def verdict(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """What a parser says: its result, None, or a Bad for a refusal.  Any other exception fails the test."""
    try:
        return parse(data)
    except Refused as error:
        assert error.kind in REFUSALS
        return Bad(error.kind, error.alert)


def check_parser(parse: Callable[[bytes], Any], data: bytes, expected: Any) -> None:
    """Ask the parser three questions: the whole; every prefix of it; the whole with bytes behind it.

    Each prefix has to give None or already the expected verdict, and a verdict never changes.
    """
    assert verdict(parse, data) == expected
    decided = False
    for end in range(len(data)):
        early = verdict(parse, data[:end])
        assert early == expected if decided else early in (None, expected), f"after {end} bytes"
        decided = early is not None
    if expected is not None:
        for behind in (b"\0", b"\x16\3\1", b"\r\n", b"\xff" * 300, data):
            assert verdict(parse, data + behind) == expected, f"with {behind[:4]!r} behind it"


def read_hello(data: bytes) -> tuple[str | None, int] | None:
    """The name and the end of a hello, by a new HelloReader."""
    found = HelloReader().read(data)
    return found and (found.name, found.end)


def check_hello(data: bytes, expected: Any) -> None:
    """Ask the three questions of `check_parser`, and give one HelloReader the bytes one by one."""
    check_parser(read_hello, data, expected)
    reader = HelloReader()
    for end in range(len(data) + 1):
        found = verdict(reader.read, data[:end])
        if found is not None:
            break
    assert (found[:1] + found[2:] if isinstance(found, Hello) else found) == expected
