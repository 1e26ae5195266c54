"""Tests of sniroute.py, in its order.

Hellos come from OpenSSL where they can (`genuine`), else field by field from a builder whose
default is a good one.  OpenSSL's server side is the judge of the names that are read (`openssl`).
Rows of tables carry an id: T for TLS, P and Q for PROXY versions 1 and 2, G for PostgreSQL.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import ipaddress
import json
import logging
import os
import pathlib
import random
import re
import resource
import socket
import ssl
import stat
import struct
import threading
import time
import types
from typing import Any, Callable, Iterator, NamedTuple

import pytest

import sniroute
from conftest import HERE
from sniroute import (GSSENC_REQUEST, PROXY_POLICY, PROXY_V2, REFUSALS, SETTINGS, SSL_REQUEST, Ending, Hello,
                      HelloReader, Journal, Malformed, Prelude, ProxyHeader, Refused, Route, Routes, SettingsError,
                      check_cloudflared, check_tcp, crc32c, expand, load_settings, normalise, parse_client_hello,
                      parse_host_port, parse_proxy_v1, parse_proxy_v2, parse_route, parse_server_name, parse_startup,
                      postgres_error, show_address, tls_alert, under_journald)

NAME = "db.example.com"


# -- bytes for the wire ------------------------------------------------------------------------


def vector(width: int, data: bytes) -> bytes:
    """`data` behind its length."""
    return len(data).to_bytes(width, "big") + data


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vector(2, data)


def host_name(name: bytes, kind: int = 0) -> bytes:
    return bytes([kind]) + vector(2, name)


def server_name(*entries: bytes) -> bytes:
    """The server_name extension."""
    return extension(0, vector(2, b"".join(entries)))


def named(name: bytes) -> bytes:
    """The server_name extension for one name."""
    return server_name(host_name(name))


def alpn(*names: bytes) -> bytes:
    return extension(16, vector(2, b"".join(vector(1, name) for name in names)))


SNI = named(NAME.encode())
VERSIONS = extension(43, vector(1, b"\x03\x04\x03\x03"))
GROUPS = extension(10, vector(2, b"\x00\x1d\x00\x17"))
SIGNATURES = extension(13, vector(2, b"\x04\x03\x08\x04\x04\x01"))


def body(*extensions: bytes, version: bytes = b"\3\3", session: bytes = vector(1, b""),
         suites: bytes = vector(2, b"\x13\x01\xc0\x2f"), methods: bytes = vector(1, b"\0"),
         block: bytes | None = None) -> bytes:
    """The body of a ClientHello; `block` stands for its extensions, their length included."""
    block = vector(2, b"".join(extensions)) if block is None else block
    return version + bytes(range(32)) + session + suites + methods + block


def handshake(data: bytes, kind: int = 1, size: int | None = None) -> bytes:
    """A handshake message."""
    return bytes([kind]) + (len(data) if size is None else size).to_bytes(3, "big") + data


def record(data: bytes, kind: int = 22, version: bytes = b"\3\1", size: int | None = None) -> bytes:
    return bytes([kind]) + version + (len(data) if size is None else size).to_bytes(2, "big") + data


def records(message: bytes, *sizes: int) -> bytes:
    """A message in records of these sizes, the rest in one more."""
    parts, at = [], 0
    for size in sizes:
        parts.append(record(message[at:at + size]))
        at += size
    return b"".join(parts) + (record(message[at:]) if at < len(message) else b"")


def hello(*extensions: bytes, **fields: Any) -> bytes:
    """A ClientHello in one record; without arguments, a good one that names NAME."""
    return records(handshake(body(*(extensions or (SNI,)), **fields)))


def hello_of(size: int) -> bytes:
    """A handshake message whose body has `size` bytes."""
    return handshake(body(SNI, extension(21, bytes(size - len(body(SNI, extension(21, b"")))))))


@functools.cache
def genuine(protocols: tuple[str, ...] = (), newest: str = "TLSv1_3", name: str | None = NAME) -> bytes:
    """What OpenSSL's client says first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = ssl.TLSVersion[newest]
    if protocols:
        context.set_alpn_protocols(list(protocols))
    out = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name).do_handshake()
    return out.read()


def settled(wire: bytes) -> bytes:
    """A genuine hello with zeros for what is another in each run: so a mutation can be repeated."""
    wire = wire[:11] + bytes(32) + wire[43:44] + bytes(wire[43]) + wire[44 + wire[43]:]
    head, share, tail = wire.partition(b"\0\x24\0\x1d\0\x20")  # X25519
    return head + share + (bytes(32) + tail[32:] if share else b"")


SSL_ASKED, GSS_ASKED = struct.pack(">II", 8, SSL_REQUEST), struct.pack(">II", 8, GSSENC_REQUEST)


def v1(text: str) -> bytes:
    return b"PROXY " + text.encode() + b"\r\n"


def v2(version_command: int, family: int, data: bytes = b"", size: int | None = None) -> bytes:
    return PROXY_V2 + struct.pack(">BBH", version_command, family, len(data) if size is None else size) + data


def tlv(kind: int, data: bytes) -> bytes:
    return bytes([kind]) + vector(2, data)


def summed(header: bytes, behind: bytes = b"") -> bytes:
    """A version 2 header with a checksum TLV that is right, and `behind` after it."""
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


# -- verdicts ----------------------------------------------------------------------------------


class Bad(NamedTuple):
    """A refusal, as it is expected."""

    kind: str = "malformed"
    alert: int | None = None


def verdict(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """A result, None or a Bad; no other exception ever leaves a parser."""
    try:
        return parse(data)
    except Refused as error:
        assert error.kind in REFUSALS
        return Bad(error.kind, error.alert)


def check_parser(parse: Callable[[bytes], Any], data: bytes, expected: Any) -> None:
    """Three questions: the whole; every prefix; the whole with something behind it."""
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
    found = HelloReader().read(data)
    return found and (found.name, found.end)


def check_hello(data: bytes, expected: Any) -> None:
    """The three questions, and a fourth: one reader that sees the bytes come one by one."""
    check_parser(read_hello, data, expected)
    reader = HelloReader()
    for end in range(len(data) + 1):
        found = verdict(reader.read, data[:end])
        if found is not None:
            break
    assert (found[:1] + found[2:] if isinstance(found, Hello) else found) == expected


# -- OpenSSL as the judge ----------------------------------------------------------------------


class Answer(NamedTuple):
    """What OpenSSL's server makes of a hello."""

    asked: bool  # it got as far as to ask for the certificate of a name
    name: str | None
    reason: str | None  # None: it wants more bytes
    alert: bytes


@functools.cache
def openssl_context() -> tuple[ssl.SSLContext, list[str | None]]:
    seen: list[str | None] = []

    def note(sock: Any, name: str | None, context: Any) -> int:
        seen.append(name)
        return ssl.ALERT_DESCRIPTION_USER_CANCELLED  # the handshake ends here

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = note
    return context, seen


def openssl(data: bytes) -> Answer:
    """Ask OpenSSL.  Not for names beyond ASCII: CPython cannot pass them on, and says so."""
    context, seen = openssl_context()
    seen.clear()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    incoming.write(data)
    reason = None
    try:
        context.wrap_bio(incoming, outgoing, server_side=True).do_handshake()
    except ssl.SSLWantReadError:
        pass
    except ssl.SSLError as error:
        reason = error.reason
    return Answer(bool(seen), seen[0] if seen else None, reason, outgoing.read(7))


def blinded(data: bytes) -> bytes:
    """The hello with the same framing and name, but nothing else in it that OpenSSL knows.

    OpenSSL also judges the contents of the other extensions, the cipher suites and the version.
    sniroute leaves that to the backend, which does not make the name another one.
    """
    message, at = bytearray(), 0
    while len(message) < 4 or len(message) < 4 + int.from_bytes(message[1:4], "big"):
        size = int.from_bytes(data[at + 3:at + 5], "big")
        message += data[at + 5:at + 5 + size]
        at += 5 + size
    del message[4 + int.from_bytes(message[1:4], "big"):]
    message[4:6] = b"\3\3"
    at = 4 + 34
    at += 1 + message[at]
    size = int.from_bytes(message[at:at + 2], "big")
    message[at + 2:at + 2 + size] = b"\xc0\x2f" * (size // 2)
    at += 2 + size
    size = message[at]
    message[at + 1:at + 1 + size] = bytes(size)
    at += 1 + size + 2
    unknown = 0x6000
    while at < len(message):
        if message[at:at + 2] != b"\0\0":
            message[at:at + 2] = unknown.to_bytes(2, "big")
            unknown += 1
        at += 4 + int.from_bytes(message[at + 2:at + 4], "big")
    return records(bytes(message), *[16000] * (len(message) // 16000))


def check_against_openssl(data: bytes, name: str | None) -> None:
    """A name that we accept is the one that OpenSSL reads, and where we see none it sees none.

    In a second try it is asked without what it alone looks at, and with whole records: it waits
    for the end of the last one.
    """
    answer = openssl(data)
    if not answer.asked:
        answer = openssl(blinded(data))
    assert answer.asked and (answer.name and answer.name.lower()) == (name and name.lower()), answer


# -- names -------------------------------------------------------------------------------------

LABEL63 = "a" * 63
LONGEST = ".".join([LABEL63, LABEL63, LABEL63, "a" * 61])

GOOD_NAMES = {
    "two-labels": "a.b",
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
    "one-label-T42": b"localhost",
    "only-a-dot": b".",
    "label-of-64-T38": b"a" * 64 + b".org",
    "whole-of-254-T38": LONGEST.encode() + b"a",
    "whole-of-255-T38": b".".join([b"a" * 63] * 4),
    "whole-of-256-T38": b"a." * 127 + b"aa",
    "whole-of-65535-T38": b"a." * 32767 + b"a",
    "empty-label-T38": b"a..example.com",
    "leading-dot-T38": b".example.com",
    "trailing-dot-T38": b"db.example.com.",
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


@pytest.mark.parametrize("name", GOOD_NAMES.values(), ids=GOOD_NAMES)
def test_a_name_in_any_case_becomes_its_lower_case(name):
    assert normalise(name.encode()) == name
    assert normalise(name.upper().encode()) == name


@pytest.mark.parametrize("raw", BAD_NAMES.values(), ids=BAD_NAMES)
def test_what_is_no_name_is_refused_as_one(raw):
    with pytest.raises(Malformed) as caught:
        normalise(raw)
    assert (caught.value.kind, caught.value.alert) == ("bad_name", 112)
    assert re.fullmatch("[ -~]{1,120}", str(caught.value)), "fit for a log, whatever the name"


def test_only_letters_digits_hyphen_underscore_and_dot_are_in_names_T36_T37():
    allowed = b"abcdefghijklmnopqrstuvwxyz0123456789-_."
    for byte in range(256):
        raw = b"a" + bytes([byte]) + b"b.example.com"
        if bytes([byte]).lower() in [allowed[i:i + 1] for i in range(len(allowed))]:
            assert normalise(raw) == raw.lower().decode()
        else:
            assert verdict(normalise, raw) == Bad("bad_name", 112), byte


# -- ClientHello -------------------------------------------------------------------------------

MESSAGE = handshake(body(SNI, VERSIONS, GROUPS, SIGNATURES))
PLAIN = records(MESSAGE)
CCS = record(b"\1", 20, b"\3\3")
ALERT = record(b"\2\x28", 21)
NO_BLOCK = handshake(body(block=b""))
MINIMAL = body(suites=vector(2, b"\x13\x01"), block=b"")  # 41 bytes
ENTRY = host_name(NAME.encode())
FULL = len(MESSAGE) - 4  # its body
OTHERS = [extension(kind, b"") for kind in (0x0A0A, 0x4A4A, 0xFE0D, 0x1234)]  # GREASE, GREASE, ECH, unknown

# id -> wire, and the name that is read (None: it names none)
GOOD_HELLOS: dict[str, tuple[bytes, str | None]] = {
    "T1-record-version-3.1": (PLAIN, NAME),
    "T1-record-version-3.3": (record(MESSAGE, version=b"\3\3"), NAME),
    "T2-record-version-3.0": (record(MESSAGE, version=b"\3\0"), NAME),
    "T3-record-version-3.255": (record(MESSAGE, version=b"\3\xff"), NAME),
    "T6-record-of-16384": (records(hello_of(16380)), NAME),
    "T9-records-of-one-byte": (records(MESSAGE, *[1] * len(MESSAGE)), NAME),
    "T12-second-record-of-another-minor-version":
        (record(MESSAGE[:50], version=b"\3\1") + record(MESSAGE[50:], version=b"\3\3"), NAME),
    "T17-smallest-body": (records(handshake(MINIMAL)), None),
    "T18-largest-body": (records(hello_of(16384), 16384), NAME),
    **{f"T21-legacy-version-{high}.{low}": (hello(SNI, VERSIONS, version=bytes((high, low))), NAME)
       for high, low in ((3, 1), (3, 2), (3, 3), (3, 4), (3, 5), (3, 255), (4, 0), (255, 255))},
    "T23-session-id-of-32": (hello(SNI, session=vector(1, b"s" * 32)), NAME),
    "T27-ends-behind-compression": (records(NO_BLOCK), None),
    "T27-no-extensions": (hello(block=b"\0\0"), None),
    "T27-extensions-without-server-name": (hello(VERSIONS, GROUPS), None),
    "T31-server-name-last-behind-GREASE-padding-and-ECH":
        (hello(*OTHERS, extension(21, bytes(200)), alpn(b"h2"), SNI), NAME),
    "T31-extensions-reversed": (hello(SIGNATURES, GROUPS, VERSIONS, SNI), NAME),
    "T31-post-quantum-key-share": (hello(extension(51, vector(2, b"\x11\xec" + vector(2, bytes(1216)))), SNI), NAME),
    "T38-longest-name": (hello(named(LONGEST.encode())), LONGEST),
    "T39-upper-case": (hello(named(b"DB.Example.COM")), NAME),
    "T40-underscore": (hello(named(b"_acme.x.org")), "_acme.x.org"),
    "T40-punycode": (hello(named(b"xn--mnchen-3ya.example")), "xn--mnchen-3ya.example"),
    "T48-one-protocol": (hello(SNI, alpn(b"postgresql")), NAME),
    "T48-a-hundred-protocols": (hello(SNI, alpn(*(b"p%d" % n for n in range(100)))), NAME),
    "T48-protocol-list-of-a-bad-length": (hello(SNI, extension(16, b"\0\x09\2h2")), NAME),
}


@pytest.mark.parametrize("wire, name", GOOD_HELLOS.values(), ids=GOOD_HELLOS)
def test_a_hello_is_read(wire, name):
    if len(wire) < 4000:
        check_hello(wire, (name, len(wire)))
    assert read_hello(wire) == read_hello(wire + PLAIN) == (name, len(wire))
    assert read_hello(wire[:-1]) is None
    check_against_openssl(wire, name)


GENUINE = {
    "TLS-1.3": dict(),
    "TLS-1.2": dict(newest="TLSv1_2"),
    "TLS-1.3-with-protocols": dict(protocols=("h2", "http/1.1")),
    "TLS-1.2-with-a-protocol": dict(protocols=("postgresql",), newest="TLSv1_2"),
    "without-a-name": dict(name=None),
    "upper-case": dict(name="DB.Example.COM"),
    "longest-name": dict(name=LONGEST),
}


@pytest.mark.parametrize("how", GENUINE.values(), ids=GENUINE)
def test_a_hello_of_openssl_is_read(how):
    wire = genuine(**how)
    name = how.get("name", NAME)
    check_hello(wire, (name and name.lower(), len(wire)))
    check_against_openssl(wire, name)
    protocols = [text.encode() for text in how.get("protocols", ())] or None
    assert HelloReader().read(wire).alpn == protocols


@pytest.mark.parametrize("message", [MESSAGE, genuine()[5:]], ids=["hand-made", "genuine"])
def test_a_hello_in_two_records_is_read_wherever_it_is_split_T8(message):
    for at in range(1, len(message)):
        wire = records(message, at)
        assert read_hello(wire) == (NAME, len(wire)), f"split at {at}"
        if at < 80:
            check_against_openssl(wire, NAME)


def test_a_hello_in_two_records_is_never_decided_early_T8_T15():
    for at in (1, 3, 4, 5, 9, 43, MESSAGE.index(b"example"), len(MESSAGE) - 1):
        wire = records(MESSAGE, at)
        check_hello(wire, (NAME, len(wire)))


@pytest.mark.parametrize("behind", [handshake(b"", 20), MESSAGE], ids=["finished", "another-hello"])
def test_a_second_message_in_the_record_of_the_hello_is_left_alone_T13(behind):
    wire = record(MESSAGE + behind)
    assert read_hello(wire) == (NAME, len(PLAIN))
    assert read_hello(wire + b"junk") == (NAME, len(PLAIN))


@pytest.mark.parametrize("behind", [
    CCS + record(b"early", 23, b"\3\3"), record(b""), bytes(5), b"\x16\xff\xff\xff\xff",
], ids=["0-RTT", "empty-record", "zeros", "a-header-of-no-version"])
def test_records_behind_the_hello_are_not_looked_at_T14(behind):
    assert read_hello(PLAIN + behind) == (NAME, len(PLAIN))


def cut(message: bytes, at: int, byte: int) -> bytes:
    """The message with one byte of it replaced, in a record."""
    return record(message[:at] + bytes([byte]) + message[at + 1:])


SUITES_AT = 4 + 34 + 1  # in a message without a session id
DECODE, PARAMETER, UNEXPECTED, VERSION, NAMELESS = 50, 47, 10, 70, 112

BAD_HELLOS: dict[str, tuple[bytes, int | None]] = {
    "T5-empty-record-first": (record(b"") + PLAIN, DECODE),
    "T5-empty-record-between": (record(MESSAGE[:9]) + record(b"") + record(MESSAGE[9:]), DECODE),
    **{f"T7-record-of-{size}": (record(b"", size=size), DECODE) for size in (16385, 18433, 65535)},
    **{f"T7-record-of-{size}-that-begins-with-a-hello": (record(MESSAGE, size=size), DECODE)
       for size in (16385, 18433, 65535)},
    **{f"T10-record-of-type-{kind}-between": (record(MESSAGE[:9]) + record(MESSAGE[9:], kind), UNEXPECTED)
       for kind in (0, 20, 21, 23, 24, 255)},
    "T11-CCS-first": (CCS + PLAIN, UNEXPECTED),
    "T11-alert-first": (ALERT + PLAIN, UNEXPECTED),
    "T18-body-of-16385": (record(MESSAGE[:1] + (16385).to_bytes(3, "big")), DECODE),
    "T18-body-of-16777215": (record(MESSAGE[:1] + b"\xff\xff\xff"), DECODE),
    "T20-length-one-less-than-the-content": (record(handshake(MESSAGE[4:], size=FULL - 1)), DECODE),
    "T22-version-3.0": (hello(SNI, version=b"\3\0"), VERSION),
    "T22-version-2.0": (hello(SNI, version=b"\2\0"), VERSION),
    "T22-version-0.2": (hello(SNI, version=b"\0\2"), VERSION),
    **{f"T24-session-id-of-{size}": (hello(SNI, session=vector(1, bytes(size))), DECODE) for size in (33, 64, 255)},
    "T24-session-id-past-the-end": (records(handshake(MINIMAL[:34] + b"\x20" + MINIMAL[35:])), DECODE),
    "T25-no-cipher-suites": (hello(SNI, suites=b"\0\0"), DECODE),
    "T25-odd-cipher-suites": (hello(SNI, suites=vector(2, b"\x13\x01\xc0")), DECODE),
    "T25-cipher-suites-past-the-end": (hello(SNI, suites=b"\xff\xfe\x13\x01"), DECODE),
    "T25-cipher-suites-up-to-the-end": (records(handshake(body(suites=vector(2, bytes(6)), methods=b"", block=b""))),
                                        DECODE),
    "T26-no-compression-methods": (hello(SNI, methods=b"\0"), DECODE),
    "T26-compression-methods-past-the-end": (hello(SNI, methods=b"\xff\0"), DECODE),
    "T28-extensions-past-the-end": (hello(block=b"\0\x80" + SNI), DECODE),
    "T28-extensions-end-early": (hello(block=vector(2, SNI) + b"\0"), DECODE),
    "T28-one-byte-of-their-length": (hello(block=b"\0"), DECODE),
    **{f"T29-extension-header-of-{size}": (hello(SNI, bytes([1] * size)), DECODE) for size in (1, 2, 3)},
    "T29-extension-past-the-end": (hello(SNI, b"\x12\x34\0\2\0"), DECODE),
    "T30-server-name-twice": (hello(SNI, SNI), PARAMETER),
    "T30-server-name-twice-apart": (hello(SNI, VERSIONS, named(b"evil.example.org")), PARAMETER),
    "T30-versions-twice": (hello(SNI, VERSIONS, VERSIONS), PARAMETER),
    "T30-protocols-twice": (hello(alpn(b"h2"), SNI, alpn(b"h2")), PARAMETER),
    "T30-unknown-twice": (hello(SNI, extension(0x1234, b""), extension(0x1234, b"x")), PARAMETER),
    "T32-extension-of-0": (hello(extension(0, b"")), DECODE),
    "T32-extension-of-1": (hello(extension(0, b"\0")), DECODE),
    "T32-list-of-0": (hello(extension(0, b"\0\0")), DECODE),
    "T32-list-of-1": (hello(extension(0, b"\0\1\0")), DECODE),
    "T32-list-of-2": (hello(extension(0, b"\0\2\0\0")), DECODE),
    "T32-list-longer-than-the-extension": (hello(extension(0, struct.pack(">H", len(ENTRY) + 1) + ENTRY)), DECODE),
    "T32-list-shorter-than-the-extension": (hello(extension(0, struct.pack(">H", len(ENTRY) - 1) + ENTRY)), DECODE),
    "T32-name-longer-than-the-list": (hello(server_name(b"\0\0\x0f" + NAME.encode())), DECODE),
    "T32-name-shorter-than-the-list": (hello(server_name(b"\0\0\x0d" + NAME.encode())), PARAMETER),
    "T33-empty-name": (hello(named(b"")), DECODE),
    "T34-two-names": (hello(server_name(ENTRY, host_name(b"evil.example.org"))), PARAMETER),
    "T34-the-same-name-twice": (hello(server_name(ENTRY, ENTRY)), PARAMETER),
    "T34-other-type-first": (hello(server_name(host_name(b"x", 1), ENTRY)), DECODE),
    "T34-other-type-last": (hello(server_name(ENTRY, host_name(b"x", 1))), PARAMETER),
    "T34-only-another-type": (hello(server_name(host_name(NAME.encode(), 1))), DECODE),
}
NAMES_THAT_ARE_NONE = {key: raw for key, raw in BAD_NAMES.items() if 0 < len(raw) < 16000}


@pytest.mark.parametrize("wire, alert", BAD_HELLOS.values(), ids=BAD_HELLOS)
def test_a_broken_hello_is_refused(wire, alert):
    check_hello(wire, Bad("malformed", alert))


@pytest.mark.parametrize("raw", NAMES_THAT_ARE_NONE.values(), ids=NAMES_THAT_ARE_NONE)
def test_a_hello_for_what_is_no_name_is_refused(raw):
    check_hello(hello(named(raw)), Bad("bad_name", NAMELESS))


def test_a_hello_with_any_other_byte_in_its_name_is_refused_T35_T36_T37():
    for byte in [*range(0x21), *b"%*/:@[]()~+,;=!$&'\"\\<>", 0x7F, *range(0x80, 0x100)]:
        for form in (b"%bb.example.com", b"d%b.example.com", b"db.example.co%b"):
            raw = form % bytes([byte])
            assert verdict(read_hello, hello(named(raw))) == Bad("bad_name", NAMELESS), raw


@pytest.mark.parametrize("version", [b"\2\0", b"\xff\xff", b"\xfe\xfd", b"\0\0", b"\4\1"],
                         ids=["T4-2.0", "T4-255.255", "T4-DTLS", "T4-0.0", "T4-4.1"])
def test_a_record_of_no_TLS_version_is_no_TLS(version):
    check_hello(record(MESSAGE, version=version), Bad("not_tls"))
    check_hello(record(MESSAGE[:20]) + record(MESSAGE[20:], version=version), Bad("not_tls"))


@pytest.mark.parametrize("wire, decided_at", [
    (record(b"", size=16385), 5), (record(MESSAGE[:1] + b"\0\x40\x01" + bytes(90)), 9),
    (record(bytes([2]) + MESSAGE[1:]), 6), (cut(MESSAGE, 3, 40), 9),
], ids=["T7-long-record", "T18-long-body", "T16-other-message", "T17-short-body"])
def test_a_hello_is_refused_as_soon_as_nothing_can_save_it(wire, decided_at):
    assert verdict(read_hello, wire[:decided_at - 1]) is None
    assert isinstance(verdict(read_hello, wire[:decided_at]), Bad)


def test_other_handshake_messages_are_refused_T16():
    for kind in {*range(256)} - {1}:
        assert verdict(read_hello, cut(MESSAGE, 0, kind)) == Bad("malformed", UNEXPECTED), kind


def test_bodies_too_short_for_a_hello_are_refused_T17():
    for size in range(41):
        assert verdict(read_hello, record(handshake(MINIMAL[:size]))) == Bad("malformed", DECODE), size
        assert verdict(read_hello, record(handshake(MESSAGE[4:], size=size))) == Bad("malformed", DECODE), size


@pytest.mark.parametrize("more", [1, 2, 3, 4])
def test_a_hello_that_announces_more_than_it_brings_is_never_a_name_T19(more):
    wire = record(handshake(MESSAGE[4:], size=FULL + more))
    check_hello(wire, None)
    check_hello(wire + record(b"\xff" * more), Bad("malformed", DECODE))


@pytest.mark.parametrize("at, good, alert", [
    (SUITES_AT - 1, {0}, DECODE), (SUITES_AT, {0}, DECODE), (SUITES_AT + 1, {4}, DECODE),
], ids=["T24-session-id", "T25-cipher-suites-high", "T25-cipher-suites-low"])
def test_every_other_length_is_refused(at, good, alert):
    for byte in range(256):
        found = verdict(read_hello, cut(MESSAGE, at, byte))
        if byte in good:
            assert found == (NAME, len(PLAIN))
        else:
            assert found == Bad("malformed", alert), byte


def test_every_length_of_the_server_name_but_one_is_refused_T32():
    at = MESSAGE.index(ENTRY)
    for place in (at - 4, at - 3, at - 2, at - 1, at + 1, at + 2):  # extension, list, name
        for byte in {*range(256)} - {MESSAGE[place]}:
            assert isinstance(verdict(read_hello, cut(MESSAGE, place, byte)), Bad), (place, byte)


def test_records_of_one_byte_are_read_up_to_32768_bytes_of_wire_T9():
    fits = hello_of(32768 // 6 - 4)
    wire = records(fits, *[1] * len(fits))
    assert len(wire) == 32766 and read_hello(wire) == (NAME, len(wire))
    long = hello_of(32768 // 6 - 3)
    wire = records(long, *[1] * len(long))
    assert verdict(read_hello, wire) == verdict(read_hello, wire[:-1] + b"??") == Bad("malformed", DECODE)
    reader = HelloReader()
    assert [verdict(reader.read, wire[:end]) for end in (32000, 32767)] == [None, None]


def test_a_hello_without_an_end_in_32768_bytes_of_wire_is_refused_T9():
    message = hello_of(16000)
    wire = records(message, *[1] * len(message))
    reader = HelloReader()
    assert [verdict(reader.read, wire[:end]) for end in (1000, 32771)] == [None, None]
    assert verdict(reader.read, wire[:32772]) == verdict(read_hello, wire) == Bad("malformed", DECODE)


def test_a_hello_whose_end_lies_past_32768_bytes_of_wire_is_refused_T9():
    message = hello_of(16000)
    wire = records(message, *[1] * 3355)  # then one of 12649
    assert len(wire) > 32768 and verdict(read_hello, wire) == Bad("malformed", DECODE)
    assert verdict(read_hello, wire[:32767]) is None
    wire = records(message, *[1] * 3351)
    assert len(wire) <= 32768 and read_hello(wire) == (NAME, len(wire))


@pytest.mark.parametrize("data, expected", [
    (None, None), (vector(2, vector(1, b"h2")), [b"h2"]),
    (vector(2, vector(1, b"h2") + vector(1, b"http/1.1")), [b"h2", b"http/1.1"]),
    (vector(2, vector(1, b"x" * 255)), [b"x" * 255]), (b"", None), (b"\0", None), (b"\0\0", None),
    (b"\0\4\2h2", None), (b"\0\2\2h2", None), (vector(2, b"\3h2"), None), (vector(2, b"\0"), None),
    (vector(2, b"\2h2\0"), None),
], ids=["absent", "one", "two", "longest", "empty", "half-a-length", "no-names", "list-too-long", "list-too-short",
        "name-past-the-end", "empty-name", "empty-name-behind"])
def test_the_protocols_that_a_client_offers_T48(data, expected):
    assert Hello(NAME, data, 0).alpn == expected


@pytest.mark.parametrize("minor, expected", [(0, 0), (1, 1), (3, 3), (4, 3), (255, 3)])
def test_an_alert_has_the_version_of_the_client_up_to_3_3(minor, expected):
    assert tls_alert(112, minor) == bytes((21, 3, expected, 0, 2, 2, 112))


# -- what OpenSSL reads ------------------------------------------------------------------------

# id -> wire, the name OpenSSL reads; all of them are refused here
STRICTER = {
    "T5-empty-record-first": (record(b"") + PLAIN, NAME),
    "T38-trailing-dot": (hello(named(b"db.example.com.")), "db.example.com."),
    "T36-escape-sequence": (hello(named(b"\x1b[31mx.com")), "\x1b[31mx.com"),
    "T36-newline": (hello(named(b"foo.com\n")), "foo.com\n"),
    "T37-an-option": (hello(named(b"--url=x")), "--url=x"),
    "T41-address": (hello(named(b"127.0.0.1")), "127.0.0.1"),
    "T38-name-of-255": (hello(named(b"a" * 255)), "a" * 255),
    "T42-one-label": (hello(named(b"localhost")), "localhost"),
}
BROKEN_FOR_OPENSSL = {
    "T34-two-names": (hello(server_name(ENTRY, ENTRY)), b"\x32"),
    "T34-other-type-first": (hello(server_name(host_name(b"x", 1), ENTRY)), b"\x32"),
    "T29-extension-past-the-end": (hello(SNI, b"\x12\x34\0\2\0"), b"\x32"),
    "T30-server-name-twice": (hello(SNI, SNI), b"\x2f"),
    "T35-NUL-in-the-name": (hello(named(b"a\0b.example.com")), b"\x70"),
    "T38-name-of-256": (hello(named(b"a" * 256)), b"\x70"),
    "T11-CCS-first": (CCS + PLAIN, b"\x0a"),
    "T11-alert-first": (ALERT + PLAIN, b"\x0a"),
    "T4-record-version-255.255": (record(MESSAGE, version=b"\xff\xff"), b""),
    "T43-SSLv2": (bytes.fromhex("801c010002000300000010010080") + bytes(16), b"\x46"),
    "T44-HTTP": (b"GET / HTTP/1.1\r\n\r\n", b""),
}


@pytest.mark.parametrize("wire, name", STRICTER.values(), ids=STRICTER)
def test_openssl_reads_what_is_refused_on_purpose(wire, name):
    answer = openssl(wire)
    assert (answer.asked, answer.name) == (True, name)
    assert isinstance(verdict(read_hello, wire), Bad)


@pytest.mark.parametrize("wire, alert", BROKEN_FOR_OPENSSL.values(), ids=BROKEN_FOR_OPENSSL)
def test_what_openssl_refuses_is_refused(wire, alert):
    answer = openssl(wire)
    assert not answer.asked and answer.reason is not None
    assert answer.alert[6:] in (alert, b"", b"\x32"), "its reason"  # versions differ in the number
    assert isinstance(verdict(Prelude("refuse", False).feed, wire), Bad)


def test_openssl_wants_more_of_a_hello_that_is_not_complete():
    for end in range(1, len(PLAIN), 7):
        assert openssl(PLAIN[:end]).reason is None and read_hello(PLAIN[:end]) is None


@pytest.mark.parametrize("key", BAD_HELLOS)
def test_openssl_reads_a_broken_hello_only_where_that_is_known(key):
    answer = openssl(BAD_HELLOS[key][0])
    known = ("T5-", "T22-", "T33-", "T30-unknown", "T30-versions", "T18-")
    assert not answer.asked or key.startswith(known), answer


# -- PROXY, version 1 --------------------------------------------------------------------------

UNKNOWN_LONGEST = "UNKNOWN " + "x" * (107 - len("PROXY UNKNOWN \r\n"))
ANY = ipaddress.ip_address
ONES = ":".join(["ffff"] * 8)

GOOD_LINES: dict[str, tuple[bytes, str | None, int]] = {
    "P1-TCP4": (v1("TCP4 192.0.2.1 192.0.2.2 123 5678"), "192.0.2.1", 123),
    "P1-longest-TCP4": (v1("TCP4 255.255.255.255 255.255.255.255 65535 65535"), "255.255.255.255", 65535),
    "P2-TCP6-in-either-case": (v1("TCP6 2001:Db8::1 2001:dB8::2 123 5678"), "2001:db8::1", 123),
    "P2-longest-TCP6": (v1(f"TCP6 {ONES} {ONES} 65535 65535"), ONES, 65535),
    "P3-UNKNOWN": (v1("UNKNOWN"), None, 0),
    "P4-UNKNOWN-with-more": (v1("UNKNOWN 1 2 3 4 5 6"), None, 0),
    "P4-UNKNOWN-of-107-bytes": (v1(UNKNOWN_LONGEST), None, 0),
    "P10-port-0": (v1("TCP4 192.0.2.1 192.0.2.2 0 443"), "192.0.2.1", 0),
    "P10-port-65535": (v1("TCP4 192.0.2.1 192.0.2.2 65535 443"), "192.0.2.1", 65535),
    "P13-unspecified": (v1("TCP6 :: ::1 1 2"), "::", 1),
    "P13-mapped": (v1("TCP6 ::ffff:1.2.3.4 ::1 1 2"), "::ffff:1.2.3.4", 1),
}


def tcp4(source: str = "192.0.2.1", destination: str = "192.0.2.2", port: str = "1", other: str = "2") -> bytes:
    return v1(f"TCP4 {source} {destination} {port} {other}")


BAD_LINES: dict[str, bytes] = {
    **{f"P5-{word}": v1(f"{word} 192.0.2.1 192.0.2.2 1 2")
       for word in ("UNKNOWNX", "unknown", "TCP5", "UDP4", "tcp4", "TCP")},
    "P5-proxy": b"proxy TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
    "P5-nothing-behind": b"PROXY\r\n",
    "P6-107-bytes-without-an-end": b"PROXY UNKNOWN " + b"x" * 93,
    "P6-line-of-108-bytes": v1(UNKNOWN_LONGEST + "x"),
    "P6-256-spaces": v1("UNKNOWN" + " " * 256),
    "P7-LF-only": tcp4()[:-2] + b"\n" + bytes(80),
    "P7-CR-only": tcp4()[:-2] + b"\r" + bytes(80),
    "P7-CR-CR-LF": tcp4()[:-2] + b"\r\r\n",
    "P7-NUL-inside": v1("UNKNOWN \0"),
    "P7-LF-inside-UNKNOWN": v1("UNKNOWN a\nb"),
    "P7-end-behind-a-tab": tcp4()[:-2] + b"\t\r\n",
    "P8-two-spaces": v1("TCP4  192.0.2.1 192.0.2.2 1 2"),
    "P8-two-spaces-first": b"PROXY  TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
    "P8-trailing-space": v1("TCP4 192.0.2.1 192.0.2.2 1 2 "),
    "P8-tab": v1("TCP4\t192.0.2.1 192.0.2.2 1 2"),
    "P8-fifth-field": v1("TCP4 192.0.2.1 192.0.2.2 1 2 3"),
    "P8-missing-field": v1("TCP4 192.0.2.1 192.0.2.2 1"),
    **{f"P9-{text}": tcp4(text)
       for text in ("192.000.2.1", "010.0.0.1", "256.1.1.1", "1.2.3", "127.1", "1.2.3.4.", "0x7f.0.0.1",
                    "\u0661.2.3.4", "1.2.3.4/8", "1")},
    "P9-in-the-destination": tcp4(destination="127.1"),
    **{f"P11-port-{text or 'empty'}": tcp4(port=text)
       for text in ("65536", "99999", "100000", "00", "0080", "-0", "+80", "6_5", "\u0661", "", "0x50", "1.0")},
    "P11-in-the-destination": tcp4(other="65536"),
    "P12-TCP4-with-v6": tcp4("::1", "::2"),
    "P12-TCP6-with-v4": v1("TCP6 192.0.2.1 192.0.2.2 1 2"),
    "P12-mixed": v1("TCP6 ::1 192.0.2.2 1 2"),
    **{f"P14-{text}": v1(f"TCP6 {text} ::1 1 2")
       for text in ("1::2::3", "1:2:3:4:5:6:7:8:9", "fe80::1%lo", "12345::", "[::1]", "::1/64", ":", "::g")},
    "P17-space-before": b" " + tcp4(),
    "P17-byte-order-mark-before": b"\xef\xbb\xbf" + tcp4(),
}


@pytest.mark.parametrize("line, source, port", GOOD_LINES.values(), ids=GOOD_LINES)
def test_a_proxy_line_is_read(line, source, port):
    check_parser(parse_proxy_v1, line, ProxyHeader(len(line), source and ANY(source), port))


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_broken_proxy_line_is_refused(line):
    check_parser(parse_proxy_v1, line, Bad("proxy"))


def test_a_proxy_line_without_an_end_is_refused_at_107_bytes_P6():
    line = b"PROXY UNKNOWN " + b"x" * 92
    assert verdict(parse_proxy_v1, line) is None
    assert verdict(parse_proxy_v1, line + b"\r") == Bad("proxy")


# -- PROXY, version 2 --------------------------------------------------------------------------

PUBLISHED_SUM = bytes.fromhex("0d0a0d0a000d0a515549540a21110013 0102030405060708 045701bb 0300047160feb6")
SSL_VALUE = b"\1" + bytes(4) + tlv(0x21, b"TLSv1.3") + tlv(0x22, b"client.example.com")

GOOD_BLOCKS: dict[str, tuple[bytes, str | None, int]] = {
    "Q1-LOCAL": (v2(0x20, 0x00), None, 0),
    "Q2-LOCAL-with-addresses": (v2(0x20, 0x11, INET), None, 0),
    "Q2-LOCAL-with-TLVs": (v2(0x20, 0x00, tlv(4, b"1234")), None, 0),
    "Q2-LOCAL-with-anything": (v2(0x20, 0xFF, b"\xff" * 7), None, 0),
    "Q2-LOCAL-of-4096": (v2(0x20, 0x00, bytes(4080)), None, 0),
    "Q3-TCP4": (HEADER, "192.0.2.1", 1111),
    "Q3-Q17-TCP6": (HEADER6, "2001:db8::1", 1111),
    "Q12-one-TLV": (v2(0x21, 0x11, INET + tlv(1, b"h2")), "192.0.2.1", 1111),
    "Q12-empty-TLV": (v2(0x21, 0x11, INET + tlv(2, b"")), "192.0.2.1", 1111),
    "Q12-NOOP-padding": (v2(0x21, 0x11, INET + tlv(4, bytes(100))), "192.0.2.1", 1111),
    "Q12-types-twice": (v2(0x21, 0x21, INET6 + tlv(0xE0, b"a") * 2), "2001:db8::1", 1111),
    "Q12-types-00-and-ff": (v2(0x21, 0x11, INET + tlv(0, b"a") + tlv(0xFF, b"b")), "192.0.2.1", 1111),
    "Q12-up-to-4096": (v2(0x21, 0x11, INET + tlv(4, bytes(4080 - 12 - 3))), "192.0.2.1", 1111),
    "Q14-checksum-as-published": (PUBLISHED_SUM, "1.2.3.4", 1111),
    "Q14-checksum-among-others": (summed(v2(0x21, 0x21, INET6 + tlv(1, b"h2")), tlv(2, b"x.org")),
                                  "2001:db8::1", 1111),
    "Q16-unique-id-of-128": (v2(0x21, 0x11, INET + tlv(5, bytes(128))), "192.0.2.1", 1111),
    "Q16-authority-of-255": (v2(0x21, 0x11, INET + tlv(2, b"a" * 255)), "192.0.2.1", 1111),
    "Q16-authority-in-utf-8": (v2(0x21, 0x11, INET + tlv(2, "m\u00fcnchen.example".encode())), "192.0.2.1", 1111),
    "Q16-SSL": (v2(0x21, 0x11, INET + tlv(0x20, SSL_VALUE)), "192.0.2.1", 1111),
    "Q16-SSL-without-more": (v2(0x21, 0x11, INET + tlv(0x20, bytes(5))), "192.0.2.1", 1111),
}
ONE_SUM = summed(HEADER)
BAD_BLOCKS: dict[str, bytes] = {
    "Q4-UNSPEC": v2(0x21, 0x00),
    "Q4-UNSPEC-STREAM": v2(0x21, 0x01),
    "Q4-INET-UNSPEC": v2(0x21, 0x10, INET),
    "Q5-UDP4": v2(0x21, 0x12, INET),
    "Q5-UDP6": v2(0x21, 0x22, INET6),
    "Q5-UNIX": v2(0x21, 0x31, bytes(216)),
    "Q5-UNIX-DGRAM": v2(0x21, 0x32, bytes(216)),
    **{f"Q6-family-{family:x}": v2(0x21, family << 4 | 1, bytes(4)) for family in range(4, 16)},
    **{f"Q6-protocol-{protocol:x}": v2(0x21, 0x10 | protocol, INET) for protocol in range(3, 16)},
    **{f"Q7-version-{version:x}": v2(version << 4 | 1, 0x11, INET) for version in (0, 1, *range(3, 16))},
    **{f"Q8-command-{command:x}": v2(0x20 | command, 0x11, INET) for command in range(2, 16)},
    "Q9-TCP4-of-11": v2(0x21, 0x11, INET[:11]),
    "Q9-TCP6-of-35": v2(0x21, 0x21, INET6[:35]),
    "Q9-UDP4-of-0": v2(0x21, 0x12),
    "Q9-TCP4-of-0": v2(0x21, 0x11),
    "Q10-4081": v2(0x21, 0x11, size=4081),
    "Q10-65535": v2(0x21, 0x11, size=65535),
    "Q2-LOCAL-of-65535": v2(0x20, 0x00, size=65535),
    "Q13-one-stray-byte": v2(0x21, 0x11, INET + b"\4"),
    "Q13-two-stray-bytes": v2(0x21, 0x21, INET6 + b"\4\0"),
    "Q13-TLV-past-the-end": v2(0x21, 0x11, INET + b"\4\0\2\0"),
    "Q15-checksum-of-3": v2(0x21, 0x11, INET + tlv(3, bytes(3))),
    "Q15-checksum-of-5": v2(0x21, 0x11, INET + tlv(3, bytes(5))),
    "Q15-checksum-of-zeros": v2(0x21, 0x11, INET + tlv(3, bytes(4))),
    "Q15-two-checksums": v2(0x21, 0x11, INET + tlv(3, ONE_SUM[-4:]) * 2),
    "Q16-unique-id-of-129": v2(0x21, 0x11, INET + tlv(5, bytes(129))),
    "Q16-authority-of-256": v2(0x21, 0x11, INET + tlv(2, b"a" * 256)),
    "Q16-authority-not-in-utf-8": v2(0x21, 0x11, INET + tlv(2, b"\xff\xfe")),
    "Q16-authority-with-an-escape": v2(0x21, 0x11, INET + tlv(2, b"\x1b[2J")),
    "Q16-SSL-of-4": v2(0x21, 0x11, INET + tlv(0x20, bytes(4))),
    "Q16-SSL-with-an-overflow": v2(0x21, 0x11, INET + tlv(0x20, bytes(5) + b"\x21\0\x08TLSv1.3")),
    "Q16-SSL-with-a-stray-byte": v2(0x21, 0x11, INET + tlv(0x20, bytes(5) + b"\x21")),
}


@pytest.mark.parametrize("header, source, port", GOOD_BLOCKS.values(), ids=GOOD_BLOCKS)
def test_a_proxy_header_is_read(header, source, port, monkeypatch):
    for name in ("socket", "inet_ntop", "getaddrinfo"):  # Q17: a family that this host lacks is data, too
        monkeypatch.delattr(socket, name)
    check_parser(parse_proxy_v2, header, ProxyHeader(len(header), source and ANY(source), port))


@pytest.mark.parametrize("header", BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_a_broken_proxy_header_is_refused(header):
    check_parser(parse_proxy_v2, header, Bad("proxy"))


def test_a_proxy_header_too_long_is_refused_at_byte_16_Q10():
    header = v2(0x21, 0x11, size=4081)
    assert len(header) == 16 and verdict(parse_proxy_v2, header) == Bad("proxy")
    assert verdict(parse_proxy_v2, header[:15]) is None


def test_a_proxy_signature_is_refused_at_its_first_wrong_byte_Q11():
    for at in range(12):
        wrong = HEADER[:at] + bytes([HEADER[at] ^ 1])
        assert verdict(parse_proxy_v2, wrong) == Bad("proxy")
        check_parser(parse_proxy_v2, wrong + HEADER[at + 1:], Bad("proxy"))


def test_a_proxy_checksum_with_one_wrong_bit_is_refused_Q15():
    for at in range(16, len(PUBLISHED_SUM)):
        for bit in range(8):
            wrong = PUBLISHED_SUM[:at] + bytes([PUBLISHED_SUM[at] ^ 1 << bit]) + PUBLISHED_SUM[at + 1:]
            if wrong[28] == 3:
                assert verdict(parse_proxy_v2, wrong) == Bad("proxy"), (at, bit)


def test_what_lies_behind_a_proxy_header_is_payload_Q13():
    assert parse_proxy_v2(HEADER + tlv(4, b"x")).size == len(HEADER)


@pytest.mark.parametrize("data, expected", [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA),
                                            (b"\xff" * 32, 0x62A8AB43)], ids=["nothing", "digits", "zeros", "ones"])
def test_the_checksum_is_the_published_one(data, expected):
    assert crc32c(data) == expected


# -- PostgreSQL --------------------------------------------------------------------------------


def startup(code: int, data: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack(">II", 8 + len(data) if size is None else size, code) + data


PLAIN_STARTUP = startup(0x30000, b"user\0me\0database\0db\0\0")
CANCEL = startup(80877102, bytes(8))
POSTGRES: dict[str, tuple[bytes, Any]] = {
    "G1-SSLRequest": (SSL_ASKED, SSL_REQUEST),
    "G5-GSSENCRequest": (GSS_ASKED, GSSENC_REQUEST),
    **{f"G4-SSLRequest-of-{size}": (startup(SSL_REQUEST, b"1234", size), Bad()) for size in (9, 12)},
    **{f"G4-GSSENCRequest-of-{size}": (startup(GSSENC_REQUEST, b"1234", size), Bad()) for size in (9, 12)},
    "G4-SSLRequest-of-7": (startup(SSL_REQUEST, size=7), Bad("not_tls")),
    "G8-CancelRequest": (CANCEL, sniroute.CANCEL_REQUEST),
    **{f"G9-CancelRequest-with-a-key-of-{size}": (startup(80877102, bytes(4 + size)), sniroute.CANCEL_REQUEST)
       for size in (4, 32, 256)},
    "G9-CancelRequest-of-a-wrong-length": (startup(80877102, size=9), sniroute.CANCEL_REQUEST),
    "G10-startup-3.0": (PLAIN_STARTUP, sniroute.STARTUP),
    "G10-startup-3.2": (startup(0x30002, b"user\0me\0\0"), sniroute.STARTUP),
    "G10-startup-of-8": (startup(0x30000), sniroute.STARTUP),
    "G10-startup-of-10004": (startup(0x30000, bytes(9996)), sniroute.STARTUP),
    "G11-startup-2.0": (startup(0x20000, bytes(288)), Bad()),
    "G11-startup-4.0": (startup(0x40000, bytes(4)), Bad()),
    "G11-code-1234.5681": (startup(80877105), Bad()),
    "G11-code-1234.0": (startup(1234 << 16), Bad()),
    **{f"G12-length-{size:#x}": (size.to_bytes(4, "big"), Bad("not_tls"))
       for size in (*range(8), 10005, 0x7FFFFFFF, 0x80000000)},
    "G14-seven-bytes": (SSL_ASKED[:7], None),
}


@pytest.mark.parametrize("packet, expected", POSTGRES.values(), ids=POSTGRES)
def test_the_first_packet_of_a_postgres_client(packet, expected):
    if len(packet) < 4000:
        check_parser(parse_startup, packet, expected)
    assert verdict(parse_startup, packet) == expected
    assert len(packet) < 10000 or parse_startup(packet[:-1]) is None


def test_a_length_that_no_startup_packet_has_is_refused_at_its_first_bytes_G12():
    for data in (b"\1", b"\0\1", b"\x16\3"):
        assert verdict(parse_startup, data) == Bad("not_tls")
    assert verdict(parse_startup, b"\0\0\xff") is None


def test_an_error_response_is_what_postgres_clients_read():
    packet = postgres_error("it does not work", "do it otherwise")
    assert packet[:1] == b"E" and int.from_bytes(packet[1:5], "big") == len(packet) - 1
    *fields, last, nothing = packet[5:].split(b"\0")
    assert (last, nothing) == (b"", b"")
    assert {field[:1]: field[1:] for field in fields} == {
        b"S": b"FATAL", b"V": b"FATAL", b"C": b"08004", b"M": b"it does not work", b"H": b"do it otherwise"}


# -- the prelude -------------------------------------------------------------------------------


class Told(NamedTuple):
    """What a Prelude made of a client."""

    name: Any  # or the Bad
    answers: bytes = b""
    header: bytes = b""
    data: bytes = b""


def talk(waves: list[list[bytes]], policy: str = "allow", local: bool = True) -> Told:
    """Feed a Prelude with waves of segments; behind each but the last, the client waits for an answer."""
    prelude = Prelude(policy, local)
    answers = b""
    for number, wave in enumerate(waves):
        found: Any = None
        for segment in wave:
            assert found is None or found and number == len(waves) - 1, "an answer before its question was complete"
            if isinstance(found, Hello):
                prelude.data += segment  # what the router does with what comes behind
                continue
            try:
                found = prelude.feed(segment)
            except Refused as error:
                assert error.kind in REFUSALS
                return Told(Bad(error.kind, error.alert), answers)
        if isinstance(found, Hello):
            assert found.end <= len(prelude.data)
            return Told(found.name, answers, prelude.header, bytes(prelude.data))
        if found is None:
            return Told(None, answers, prelude.header, bytes(prelude.data))
        answers += found
    return Told(None, answers, prelude.header, bytes(prelude.data))


def segmentations(waves: list[bytes]) -> Iterator[list[list[bytes]]]:
    """Whole; byte by byte; and each wave in two, wherever it can be cut."""
    yield [[wave] for wave in waves]
    yield [[wave[at:at + 1] for at in range(len(wave))] for wave in waves]
    for number, wave in enumerate(waves):
        for at in range(1, len(wave)):
            yield [[wave[:at], wave[at:]] if n == number else [w] for n, w in enumerate(waves)]


def check_prelude(waves: list[bytes], expected: Told, **how: Any) -> None:
    for parts in segmentations(waves):
        assert talk(parts, **how) == expected, parts


REQUESTS = {"no-request": [], "SSLRequest": [SSL_ASKED], "GSSENCRequest-and-SSLRequest": [GSS_ASKED, SSL_ASKED]}
EARLY = CCS + record(b"early data", 23, b"\3\3")  # 0-RTT, in the segment of the hello


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_every_prelude_gives_the_name_and_the_bytes_however_it_is_cut(header, requests):
    """G6, G22, P15, P16, Q19, T8, T9, T14: the product of headers, requests, records and segments."""
    message = handshake(body(SNI, suites=vector(2, b"\x13\x01")))
    answers = {0: b"", 1: b"S", 2: b"NS"}[len(requests)]
    shapes = [records(message), records(message, *[1] * len(message))]
    shapes += [records(message, at) for at in range(1, len(message))]
    for shape in shapes:
        waves = [*requests, shape + EARLY]
        waves[0] = header + waves[0]
        expected = Told(NAME, answers, header, shape + EARLY)
        check_prelude(waves, expected)


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
def test_a_genuine_hello_behind_every_request_however_it_is_cut(requests):
    wire = genuine(("postgresql",))
    waves = [*requests, wire]
    waves[0] = HEADER + waves[0]
    check_prelude(waves, Told(NAME, b"NS"[2 - len(requests):], HEADER, wire))


@pytest.mark.parametrize("mode", ["off", "auto", "required"])
@pytest.mark.parametrize("trusted", [False, True], ids=["untrusted", "trusted"])
@pytest.mark.parametrize("kind", [*HEADERS, "bad-v1", "bad-v2"])
def test_a_proxy_header_is_believed_only_where_it_may_be_P19_Q20(mode, trusted, kind):
    policy = PROXY_POLICY[mode, trusted]
    assert (policy == "close") == (mode == "required" and not trusted)
    if policy == "close":
        return  # closed before a byte is read: there is no prelude
    header = {**HEADERS, "bad-v1": v1("TCP4 1 2 3 4"), "bad-v2": v2(0x21, 0x41, bytes(4))}[kind]
    if not header:
        wanted = Told(Bad("proxy")) if mode == "required" else Told(NAME, b"", b"", PLAIN)
    elif mode == "off" or not trusted or kind.startswith("bad"):
        wanted = Told(Bad("proxy"))
    else:
        wanted = Told(NAME, b"", header, PLAIN)
    check_prelude([header + PLAIN], wanted, policy=policy, local=False)


STRANGERS: dict[str, tuple[bytes, Bad]] = {
    **{f"T44-{text.split()[0]}": (text.encode() + b" / HTTP/1.1\r\n\r\n", Bad("not_tls"))
       for text in ("GET", "POST", "PUT", "PATCH", "PROPFIND", "HEAD", "OPTIONS", "CONNECT", "TRACE", "DELETE")},
    "T44-SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", Bad("not_tls")),
    "T44-RDP": (bytes.fromhex("0300001302e000000000000100080003000000"), Bad("not_tls")),
    "T43-SSLv2": (bytes.fromhex("801c010002000300000010010080") + bytes(16), Bad("not_tls")),
    "T43-SSLv2-that-offers-TLS": (bytes.fromhex("801c010301000300000010010080") + bytes(16), Bad("not_tls")),
    "T11-CCS-first": (CCS + PLAIN, Bad("not_tls")),
    "T11-alert-first": (ALERT + PLAIN, Bad("not_tls")),
    "T4-DTLS": (record(MESSAGE, version=b"\xfe\xfd"), Bad("not_tls")),
    "T5-empty-record": (record(b"") + PLAIN, Bad("malformed", 50)),
    "T41-address": (hello(named(b"127.0.0.1")), Bad("bad_name", 112)),
    "P5-lower-case": (b"proxy TCP4 192.0.2.1 192.0.2.2 1 2\r\n", Bad("not_tls")),
    "P17-space-before": (b" " + LINE + PLAIN, Bad("not_tls")),
    "P17-byte-order-mark-before": (b"\xef\xbb\xbf" + LINE + PLAIN, Bad("not_tls")),
    "P17-second-line": (LINE + LINE + PLAIN, Bad("not_tls")),
    "X5-second-header": (HEADER + HEADER + PLAIN, Bad("not_tls")),
    "X5-line-behind-LOCAL": (LOCAL + LINE + PLAIN, Bad("not_tls")),
    "Q11-cut-signature": (PROXY_V2[:11] + PLAIN, Bad("proxy")),
    "G4-SSLRequest-of-12": (startup(SSL_REQUEST, b"1234"), Bad()),
    "G8-CancelRequest": (CANCEL, Bad("cancel")),
    "G9-CancelRequest-with-a-key-of-256": (startup(80877102, bytes(260)), Bad("cancel")),
    "G10-startup": (PLAIN_STARTUP, Bad("plain_postgres")),
    "G10-startup-behind-a-header": (HEADER + PLAIN_STARTUP, Bad("plain_postgres")),
    "G11-startup-2.0": (startup(0x20000, bytes(8)), Bad()),
    "G12-length-of-0": (bytes(8), Bad("not_tls")),
}


@pytest.mark.parametrize("data, expected", STRANGERS.values(), ids=STRANGERS)
def test_what_is_no_prelude_is_refused_however_it_is_cut(data, expected):
    check_prelude([data], Told(expected))


@pytest.mark.parametrize("key", ["T44-GET", "T44-POST", "T44-PROPFIND", "T44-SSH", "T43-SSLv2", "P5-lower-case"])
def test_a_stranger_is_no_proxy_header_where_none_is_wanted_T44(key):
    check_prelude([STRANGERS[key][0]], Told(Bad("not_tls")), policy="refuse")


@pytest.mark.parametrize("word, decided_at", [(b"POST", 2), (b"PUT ", 2), (b"PATCH", 2), (b"PROPFIND", 4)])
def test_a_method_of_HTTP_is_told_from_a_proxy_line_as_soon_as_they_differ(word, decided_at):
    for policy in ("allow", "refuse", "require"):
        assert talk([[word[:decided_at - 1]]], policy).name is None
        assert talk([[word[:decided_at]]], policy).name == Bad("not_tls")


def test_a_proxy_header_that_is_not_wanted_is_refused_when_its_signature_is_complete_T44():
    for header, size in ((LINE, 6), (HEADER, 12)):
        assert talk([[header[:size - 1]]], "refuse").name is None
        assert talk([[header[:size]]], "refuse").name == Bad("proxy")


@pytest.mark.parametrize("waves", [
    [SSL_ASKED + PLAIN], [SSL_ASKED + b"\0"], [SSL_ASKED + SSL_ASKED], [GSS_ASKED + b"\x16"], [GSS_ASKED + SSL_ASKED],
    [HEADER + SSL_ASKED + PLAIN], [GSS_ASKED, SSL_ASKED + PLAIN],
], ids=["G2-hello-behind-SSLRequest", "G3-one-byte-behind", "G7-SSLRequest-behind",
        "G5b-one-byte-behind-GSSENCRequest",
        "G5b-SSLRequest-behind-GSSENCRequest", "G2-with-a-header", "G2-behind-GSSENCRequest"])
def test_bytes_that_do_not_wait_for_the_answer_are_refused(waves):
    assert talk([[wave] for wave in waves]).name == Bad("malformed")


@pytest.mark.parametrize("waves, answers", [
    ([SSL_ASKED, SSL_ASKED], b"S"), ([GSS_ASKED, GSS_ASKED], b"N"), ([SSL_ASKED, GSS_ASKED], b"S"),
    ([GSS_ASKED, SSL_ASKED, GSS_ASKED], b"NS"), ([SSL_ASKED, PLAIN_STARTUP], b"S"),
    ([SSL_ASKED, HEADER + PLAIN], b"S"), ([SSL_ASKED, LINE + PLAIN], b"S"),
    ([SSL_ASKED, b"GET / HTTP/1.1\r\n"], b"S"),
], ids=["G7-SSLRequest-twice", "G7-GSSENCRequest-twice", "G7-GSSENCRequest-after-S", "G7-GSSENCRequest-again-after-S",
        "G16-startup-after-S", "header-after-S", "line-after-S", "HTTP-after-S"])
def test_after_an_answer_only_what_may_follow_is_accepted(waves, answers):
    check_prelude(waves, Told(Bad("malformed"), answers))


@pytest.mark.parametrize("waves, expected", [
    ([GSS_ASKED, PLAIN], Told(NAME, b"N", b"", PLAIN)),
    ([GSS_ASKED, PLAIN_STARTUP], Told(Bad("plain_postgres"), b"N")),
    ([GSS_ASKED, CANCEL], Told(Bad("cancel"), b"N")),
    ([GSS_ASKED, HEADER + PLAIN], Told(Bad("not_tls"), b"N")),
    ([SSL_ASKED, hello(VERSIONS)], Told(None, b"S", b"", hello(VERSIONS))),
], ids=["G13-direct-TLS-after-N", "G10-startup-after-N", "G8-CancelRequest-after-N", "header-after-N",
        "G21-hello-without-a-name-after-S"])
def test_after_an_answer_the_next_step_is_free_or_not(waves, expected):
    check_prelude(waves, expected)


def test_a_postgres_client_without_TLS_reads_why_G10():
    with pytest.raises(Refused) as caught:
        Prelude("refuse", False).feed(PLAIN_STARTUP)
    assert caught.value.farewell.startswith(b"E") and b"sslmode=require" in caught.value.farewell
    assert not isinstance(caught.value, Malformed)


def test_an_ambiguous_beginning_waits_G14():
    for data in (b"", b"\0", bytes.fromhex("00000008 04d216"), b"P", b"\r", b"\x16", HEADER, LINE[:-1]):
        assert talk([[data]]) == Told(None, b"", *((data, b"") if data == HEADER else (b"", data)))


SPOOFS = ["127.0.0.1", "127.255.0.9", "0.0.0.0", "224.0.0.1", "::1", "::", "ff02::1", "::ffff:127.0.0.1",
          "::ffff:0.0.0.0", "::ffff:224.0.0.1"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("source", SPOOFS)
def test_a_remote_proxy_cannot_speak_for_this_machine_Q18(source, version):
    address = ANY(source)
    if version == 1:
        header = v1(f"TCP{address.version} {source} {source} 1 2")
    else:
        header = v2(0x21, {4: 0x11, 6: 0x21}[address.version], address.packed * 2 + bytes(4))
    assert talk([[header + PLAIN]], local=False).name == Bad("proxy")
    assert talk([[header + PLAIN]], local=True) == Told(NAME, b"", header, PLAIN)


def test_the_prelude_says_who_the_header_speaks_for():
    for header, source in ((LINE, SOURCE), (HEADER, SOURCE), (HEADER6, SOURCE6), (LOCAL, None),
                           (v1("UNKNOWN"), None)):
        prelude = Prelude("allow", False)
        assert prelude.source is None
        prelude.feed(memoryview(header + PLAIN))
        assert prelude.source.source == source and prelude.ssl is False
    prelude.feed(b"")
    prelude = Prelude("allow", False)
    assert (prelude.feed(GSS_ASKED), prelude.ssl, prelude.feed(SSL_ASKED), prelude.ssl) == (b"N", False, b"S", True)


@pytest.mark.parametrize("waves, expected", [
    ([b""], b""), ([b"\x16\3"], b""), ([b"\x16\3\1"], tls_alert(40, 1)), ([HEADER + b"\x16\3\3"], tls_alert(40, 3)),
    ([SSL_ASKED, b"\x16\3\4"], tls_alert(40, 3)), ([SSL_ASKED], b""), ([HEADER], b""), ([SSL_ASKED[:7]], b""),
], ids=["nothing", "two-bytes", "a-record", "behind-a-header", "behind-SSLRequest", "SSLRequest", "header",
        "half-a-request"])
def test_an_alert_is_only_for_who_has_begun_with_TLS(waves, expected):
    prelude = Prelude("allow", False)
    for wave in waves:
        prelude.feed(wave)
    assert prelude.alert(40) == expected


class Meter(bytearray):
    """Counts the bytes that are copied out of it."""

    copied = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.copied += len(found) if isinstance(key, slice) else 1
        return found


LARGE = hello_of(16384)


@pytest.mark.parametrize("wire, step", [
    (records(LARGE, 16384), 1 << 20), (records(LARGE, 16384), 1), (records(LARGE, *[1024] * 17), 1),
    (records(LARGE, *[1024] * 17), 1000), (records(hello_of(5000), *[1] * 5000), 1),
], ids=["one-segment", "byte-by-byte", "1024-byte-records-byte-by-byte", "1024-byte-records", "1-byte-records"])
def test_the_cost_of_a_hello_is_linear_T47(wire, step):
    prelude = Prelude("refuse", False)
    prelude.data = Meter()
    began = time.process_time()
    for at in range(0, len(wire), step):
        found = prelude.feed(wire[at:at + step])
    assert found == Hello(NAME, None, len(wire))
    segments = -(-len(wire) // step)
    assert prelude.data.copied < 3 * len(wire) + 12 * segments
    assert time.process_time() - began < 2


# -- mutations ---------------------------------------------------------------------------------


def mutations(seeds: list[bytes], rng: random.Random, count: int) -> Iterator[bytes]:
    """`count` inputs, each a seed with one to three faults."""
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            at = rng.randrange(len(data) + 1)
            end = min(len(data), at + rng.choice((1, 1, 2, 4, 16)))
            match rng.randrange(7):
                case 0 if at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at:at] = rng.randbytes(rng.choice((1, 1, 2, 5)))
                case 2:
                    del data[at:end]
                case 3:
                    data[at:at] = data[at:end]
                case 4 if rng.randrange(4) == 0:
                    del data[at:]
                case 5:
                    other = rng.choice(seeds)
                    data[at:] = other[rng.choice((at, rng.randrange(len(other) + 1))):]
                case _ if at < len(data):
                    data[at] = rng.choice((0, 1, 2, 3, 4, 5, 0x16, 0x20, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        yield bytes(data)


def substitutions(seeds: list[bytes], limit: int = 400) -> Iterator[bytes]:
    """Each byte of each seed with every other value: the length bytes are among them."""
    for seed in seeds:
        for at in range(min(len(seed), limit)):
            head, tail = seed[:at], seed[at + 1:]
            for byte in range(256):
                yield head + bytes([byte]) + tail


HELLO_SEEDS = [PLAIN, settled(genuine()), settled(genuine(("h2", "http/1.1"), "TLSv1_2")),
               settled(genuine(name=None)), records(MESSAGE, 5, 60),
               records(NO_BLOCK), hello(alpn(b"h2"), SNI), hello(*OTHERS, SNI, extension(21, bytes(40))),
               hello(named(b"DB.Example.COM")), PLAIN + EARLY, records(MESSAGE, *[1] * len(MESSAGE)),
               *(wire for wire, _ in BAD_HELLOS.values() if len(wire) < 500)]
LINE_SEEDS = [line for line, *_ in GOOD_LINES.values()] + [*BAD_LINES.values()]
BLOCK_SEEDS = [block for block, *_ in GOOD_BLOCKS.values() if len(block) < 500] \
    + [block for block in BAD_BLOCKS.values() if len(block) < 500]
POSTGRES_SEEDS = [packet for packet, _ in POSTGRES.values() if 4 < len(packet) < 500]


def test_a_mutated_hello_is_a_name_that_openssl_reads_or_is_refused():
    rng = random.Random(20260801)
    short = hello(SNI, alpn(b"h2"), suites=vector(2, b"\x13\x01"))
    tried, accepted, names = 0, 0, set()
    for data in [*substitutions([short, records(short[5:], 40)]), *mutations(HELLO_SEEDS, rng, 60_000)]:
        tried += 1
        found = verdict(HelloReader().read, data)
        reader = HelloReader()
        assert (verdict(reader.read, data[:9]) or verdict(reader.read, data)) == found, "in two steps"
        if isinstance(found, Hello):
            accepted += 1
            names.add(found.name)
            assert found.end <= len(data) and (found.alpn is None or all(found.alpn))
            assert found.name is None or normalise(found.name.encode()) == found.name
            check_against_openssl(data[:found.end], found.name)
        else:
            assert found is None or isinstance(found, Bad)
    assert tried > 100_000 and accepted > 10_000 and len(names) > 500, "it tries what matters"


def test_mutated_input_is_a_result_or_None_or_a_refusal_for_every_parser():
    rng = random.Random(20260802)
    entries = [ENTRY, SNI[4:], vector(2, ENTRY + ENTRY), vector(2, host_name(b"x", 1)),
               vector(2, host_name(LONGEST.encode()))]
    names = [raw for raw in BAD_NAMES.values() if len(raw) < 300] + [name.encode() for name in GOOD_NAMES.values()]
    bodies = [wire[9:] for wire in HELLO_SEEDS if len(wire) < 600]
    table: list[tuple[Callable[[bytes], Any], type, list[bytes], int]] = [
        (parse_proxy_v1, ProxyHeader, LINE_SEEDS, 25_000), (parse_proxy_v2, ProxyHeader, BLOCK_SEEDS, 25_000),
        (parse_startup, int, POSTGRES_SEEDS, 15_000), (parse_server_name, str, entries, 10_000),
        (normalise, str, names, 15_000), (parse_client_hello, tuple, bodies, 15_000),
    ]
    tried = 0
    for parse, kind, seeds, count in table:
        more = [*substitutions([LINE, v1("UNKNOWN")])] if parse is parse_proxy_v1 else \
            [*substitutions([PUBLISHED_SUM])] if parse is parse_proxy_v2 else []
        results = 0
        for data in [*more, *mutations(seeds, rng, count)]:
            if parse is parse_client_hello and len(data) < 41:
                continue  # its caller never asks that
            tried += 1
            found = verdict(parse, data)
            assert isinstance(found, (kind, Bad, types.NoneType)), data
            results += isinstance(found, kind) and not isinstance(found, Bad)
            if isinstance(found, ProxyHeader):
                assert found.size <= len(data) and 0 <= found.port < 65536
        assert results > count // 50, parse
    assert tried > 100_000


def test_a_mutated_prelude_has_one_verdict_however_it_is_cut():
    rng = random.Random(20260803)
    seeds = [header + request + wire for header in HEADERS.values() for request in (b"", SSL_ASKED, GSS_ASKED)
             for wire in HELLO_SEEDS[:1] + HELLO_SEEDS[4:8]] + LINE_SEEDS + BLOCK_SEEDS + POSTGRES_SEEDS
    for data in mutations(seeds, rng, 40_000):
        policy, local = rng.choice(("allow", "allow", "refuse", "require")), rng.random() < 0.5
        whole = verdict(Prelude(policy, local).feed, data)
        assert isinstance(whole, (Hello, bytes, Bad, types.NoneType))
        prelude, at = Prelude(policy, local), rng.randrange(len(data) + 1)
        found = verdict(prelude.feed, data[:at])
        if found is None:
            assert verdict(prelude.feed, data[at:]) == whole, (data, at)
        elif not isinstance(found, bytes):  # S or N: had it waited, the rest would be another story
            assert found == whole, (data, at)
        if isinstance(whole, Hello) and found is None:
            assert prelude.header + prelude.data == data, "what is forwarded is what came"


# -- routes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("template, expected", [
    ("cft-{name}", "cft-db.eu.example.com"), ("{label}.internal:5432", "db.internal:5432"),
    ("{domain}", "eu.example.com"),
    ("{label}-{label}.{domain}", "db-db.eu.example.com"), ("fixed", "fixed"),
])
def test_a_template_is_filled_in(template, expected):
    assert expand(template, "db.eu.example.com") == expected


@pytest.mark.parametrize("text, pattern, target", [
    ("db.example.com=tcp:10.0.0.1:5432", "db.example.com", "tcp:10.0.0.1:5432"),
    ("DB.Example.COM=cloudflared:Host.Example.com", "db.example.com", "cloudflared:Host.Example.com"),
    ("*.example.com=cloudflared:cft-{name}", "*.example.com", "cloudflared:cft-{name}"),
    ("**.Example.com=tcp:{label}:1", "**.example.com", "tcp:{label}:1"),
    ("*=tcp:{name}:443", "*", "tcp:{name}:443"), ("a.b=tcp:[::1]:443", "a.b", "tcp:[::1]:443"),
])
def test_a_route_is_read(text, pattern, target):
    route = parse_route(text)
    assert route == Route(pattern, target) and str(route) == f"{pattern}={target}"


@pytest.mark.parametrize("text, complaint", [
    ("db.example.com", "not PATTERN=SCHEME:REST"), ("db.example.com=here", "not PATTERN=SCHEME:REST"),
    ("", "not PATTERN"),
    ("=tcp:h:1", "two labels"), ("localhost=tcp:h:1", "two labels"), ("*.com=tcp:h:1", "two labels"),
    ("***.example.com=tcp:h:1", "two labels"), ("a.*.example.com=tcp:h:1", "two labels"),
    ("*a.example.com=tcp:h:1", "two labels"),
    ("**=tcp:h:1", "two labels"), ("a.b.=tcp:h:1", "two labels"), ("10.0.0.1=tcp:h:1", "two labels"),
    ("a.b=http:h:1", "cloudflared, tcp"), ("a.b=tcp:{host}:1", "{name}, {label}, {domain}"),
    ("a.b=tcp:{name:1", "field"),
    ("a.b=tcp:name}:1", "field"), ("a.b=tcp:{}:1", "field"), ("a.b=tcp:h", "HOST:PORT"), ("a.b=tcp:h:0", "HOST:PORT"),
    ("a.b=tcp:h:65536", "HOST:PORT"), ("a.b=tcp:h h:1", "HOST:PORT"), ("a.b=cloudflared:", "host name"),
    ("a.b=cloudflared:--url", "host name"), ("a.b=cloudflared:{label}", "host name"),
    ("\udcff.b=tcp:h:1", "can't encode"),
])
def test_a_route_that_cannot_work_is_refused_at_the_start(text, complaint):
    with pytest.raises(ValueError) as caught:
        parse_route(text)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


ROUTES = Routes([parse_route(f"{pattern}=tcp:h{number}:1") for number, pattern in enumerate(
    ["db.example.com", "*.example.com", "**.example.com", "**.eu.example.com", "*.eu.example.com",
     "other.example.org"])])
EVERY = Routes([parse_route("*=tcp:{name}:1"), parse_route("a.b=tcp:h:1")])


@pytest.mark.parametrize("routes, name, pattern", [
    (ROUTES, "db.example.com", "db.example.com"), (ROUTES, "x.example.com", "*.example.com"),
    (ROUTES, "x.y.example.com", "**.example.com"), (ROUTES, "x.y.z.example.com", "**.example.com"),
    (ROUTES, "eu.example.com", "*.example.com"), (ROUTES, "x.eu.example.com", "*.eu.example.com"),
    (ROUTES, "x.y.eu.example.com", "**.eu.example.com"), (ROUTES, "example.com", None),
    (ROUTES, "xexample.com", None),
    (ROUTES, "example.org", None), (ROUTES, "x.other.example.org", None), (EVERY, "a.b", "a.b"), (EVERY, "c.d", "*"),
])
def test_the_most_exact_route_is_taken(routes, name, pattern):
    found = routes.find(name)
    assert (found and found.pattern) == pattern


def test_a_name_without_a_route_is_refused():
    with pytest.raises(Refused) as caught:
        ROUTES.decide("example.net")
    assert (caught.value.kind, caught.value.alert) == ("no_route", 112)


def test_a_decision_is_made_once_and_names_its_target():
    routes = Routes([parse_route("**.example.com=cloudflared:CFT-{label}.{domain}")])
    decision = routes.decide("db.eu.example.com")
    assert decision.target == "cloudflared:cft-db.eu.example.com" and decision.rest == "cft-db.eu.example.com"
    assert decision.scheme is sniroute.SCHEMES["cloudflared"] and decision.route is routes.routes[0]
    assert routes.decide("db.eu.example.com") is decision


def test_decisions_are_remembered_for_a_limited_number_of_names(monkeypatch):
    monkeypatch.setattr(sniroute, "DECISIONS_MAX", 3)
    routes = Routes([parse_route("*=tcp:h:1")])
    for number in range(10):
        routes.decide(f"n{number}.example.com")
        assert len(routes.decisions) <= 3


def test_a_name_that_makes_its_target_too_long_is_refused():
    routes = Routes([parse_route("*=cloudflared:cft-{name}")])
    assert verdict(routes.decide, LONGEST) == Bad("bad_name", 112)
    assert not routes.decisions


def test_a_pattern_is_routed_once():
    with pytest.raises(ValueError, match="a.b is routed twice"):
        Routes([parse_route("c.d=tcp:h:1"), parse_route("a.b=tcp:h:1"), parse_route("A.B=tcp:h:2")])


# -- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("h:1", ("h", 1)), ("[::1]:443", ("::1", 443)), ("[2001:DB8::0]:0", ("2001:db8::", 0)), ("*:65535", ("*", 65535)),
    ("10.0.0.1:80", ("10.0.0.1", 80)), (":80", None), ("", None), ("h", None), ("h:", None), ("h:65536", None),
    ("h:080", None), ("h:+80", None), ("h:\u0661", None), ("::1:80", None), ("[]:80", None), ("[::g]:80", None),
    ("[h]:80", None), ("h\u00e4:80", None), ("h:8\udcff", None),
])
def test_a_host_and_a_port(text, expected):
    if expected is None:
        with pytest.raises(ValueError):
            parse_host_port(text)
    else:
        assert parse_host_port(text) == expected


@pytest.mark.parametrize("check, rest, good", [
    (check_tcp, "h:1", True), (check_tcp, "[::1]:1", True), (check_tcp, "h:0", False), (check_tcp, "h", False),
    (check_tcp, "a/b:1", False), (check_tcp, "h\n:1", False), (check_tcp, "[fe80::1%eth0]:1", False),
    (check_cloudflared, "db.example.com", True), (check_cloudflared, "--url.x", False),
    (check_cloudflared, "localhost", False),
])
def test_a_target_is_checked(check, rest, good):
    assert verdict(check, rest) == (rest if good else Bad("bad_name", 112))


def resolve(monkeypatch: pytest.MonkeyPatch, target: str, found: list[str] | OSError, router: Any,
            allowed: Callable[[tuple], bool] = lambda address: True) -> Any:
    """Prepare a tcp target while the resolver answers `found`."""
    def answer(host: str, port: int, **_: Any) -> list[tuple]:
        if isinstance(found, OSError):
            raise found
        return [(socket.AF_INET6 if ":" in text else socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, port))
                for text in found]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    router.may_dial = lambda decision, address: allowed(address)
    decision = Routes([Route("a.b", target)]).decide("a.b")
    sniroute.tcp_prepare(router, types.SimpleNamespace(decision=decision))
    return sniroute.tcp_ready(router, decision)


class Resolved(types.SimpleNamespace):
    """As much of a Router as resolving needs."""

    remember = sniroute.Router.remember

    def __init__(self, **more: object):
        super().__init__(resolved={}, **more)


def test_a_host_is_resolved_once_and_stays_while_the_resolver_is_down(monkeypatch):
    router = Resolved()
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, "tcp:h:1", OSError("down"), router)
    assert (caught.value.kind, caught.value.alert) == ("unresolved", 80)
    backend = resolve(monkeypatch, "tcp:h:1", ["192.0.2.1", "192.0.2.1", "2001:db8::1"], router)
    assert backend.addresses == ((socket.AF_INET, ("192.0.2.1", 1)), (socket.AF_INET6, ("2001:db8::1", 1)))
    assert not backend.local and backend.intact()
    assert resolve(monkeypatch, "tcp:h:1", OSError("down"), router) is backend
    now = sniroute.monotonic()
    monkeypatch.setattr(sniroute, "monotonic", lambda: now + sniroute.RESOLVED_FOR + 1)
    assert sniroute.tcp_ready(router, Routes([Route("a.b", "tcp:h:1")]).decide("a.b")) is None, "its time is over"
    assert sniroute.tcp_ready(router, Routes([Route("a.b", "tcp:other:1")]).decide("a.b")) is None


@pytest.mark.parametrize("target, family, address, local", [
    ("tcp:127.0.0.1:1", socket.AF_INET, ("127.0.0.1", 1), True),
    ("tcp:192.0.2.1:2", socket.AF_INET, ("192.0.2.1", 2), False),
    ("tcp:[::1]:3", socket.AF_INET6, ("::1", 3, 0, 0), True),
], ids=["loopback", "elsewhere", "v6"])
def test_an_address_is_never_resolved(target, family, address, local):
    router = Resolved(may_dial=lambda decision, address: True)
    decision = Routes([Route("a.b", target)]).decide("a.b")
    backend = sniroute.tcp_ready(router, decision)
    assert (backend.addresses, backend.local) == (((family, address),), local)
    assert sniroute.tcp_ready(router, decision) is backend


def test_an_address_that_the_route_does_not_lead_to_is_not_ready_and_never_will_be(monkeypatch):
    router = Resolved(may_dial=lambda decision, address: False)
    decision = Routes([Route("a.b", "tcp:127.0.0.1:19000")]).decide("a.b")  # where the router listens itself
    assert sniroute.tcp_ready(router, decision) is None
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, decision.target, ["127.0.0.1"], router, lambda address: False)
    assert caught.value.kind == "forbidden" and not router.resolved


def test_only_addresses_that_the_route_leads_to_are_dialled(monkeypatch):
    router = Resolved()
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, "tcp:h:1", ["10.0.0.1"], router, lambda address: False)
    assert (caught.value.kind, caught.value.alert) == ("forbidden", 112)
    backend = resolve(monkeypatch, "tcp:h:1", ["10.0.0.1", "192.0.2.1"], router,
                      lambda address: address[0] != "10.0.0.1")
    assert [address[0] for _, address in backend.addresses] == ["192.0.2.1"]


def test_resolved_hosts_and_their_addresses_are_limited(monkeypatch):
    monkeypatch.setattr(sniroute, "RESOLVED_MAX", 2)
    router = Resolved()
    for number in range(5):
        backend = resolve(monkeypatch, f"tcp:h{number}:1", [f"192.0.2.{n}" for n in range(1, 9)], router)
        assert len(backend.addresses) == sniroute.ADDRESSES_MAX and len(router.resolved) <= 2


# -- refusals ----------------------------------------------------------------------------------


def raised_kinds() -> set[str]:
    """Every kind of refusal in the source."""
    kinds = set()
    for node in ast.walk(ast.parse((HERE / "sniroute.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            words = {keyword.arg: keyword.value for keyword in node.keywords}
            if node.func.id == "Refused":
                kind = words.get("kind", node.args[0])
            elif node.func.id == "Malformed":
                kind = words.get("kind", node.args[2] if len(node.args) > 2 else ast.Constant("malformed"))
            else:
                continue
            if isinstance(kind, ast.Constant):
                kinds.add(kind.value)
            else:
                assert ast.unparse(kind) in ("kind", "'tunnel_' + error.kind"), "a kind that this test does not know"
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "kind" \
                and isinstance(node.value, ast.IfExp):
            kinds |= {node.value.body.value, node.value.orelse.value}
    for node in ast.walk(ast.parse((HERE / "sniroute_tunnels.py").read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "TunnelError" \
                and isinstance(node.args[0], ast.Constant):
            kinds.add("tunnel_" + node.args[0].value)
    return kinds


def test_every_kind_of_refusal_is_a_row_and_every_row_is_used():
    kinds = raised_kinds()
    assert kinds == REFUSALS.keys()
    for kind, row in REFUSALS.items():
        assert re.fullmatch("[a-z_]+", kind) and row.meaning
        assert logging.getLevelName(row.level) in ("DEBUG", "INFO", "WARNING", "ERROR")


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, seconds", [
    ("300s", 300), ("5m", 300), ("1h30m", 5400), ("500ms", 0.5), ("1.5s", 1.5), ("1h2m3s4ms", 3723.004),
    ("8784h", 366 * 86400),
    ("", None), ("0s", None), ("5", None), ("-5s", None), ("5 s", None), ("5S", None), ("1m1h", None), ("1e3s", None),
    ("8785h", None), ("9" * 400 + "h", None), ("\u0661s", None), ("5s\n", None), ("nans", None), ("infs", None),
    ("off", None),
])
def test_durations(text, seconds):
    if seconds is None:
        with pytest.raises(ValueError, match="is not a duration"):
            sniroute.parse_duration(text)
    else:
        assert sniroute.parse_duration(text) == sniroute.parse_off_or_duration(text) == pytest.approx(seconds)


PARSERS = {
    "off": (sniroute.parse_off_or_duration, "off", 0.0),
    "count-1": (sniroute.parse_count, "1", 1),
    "count-a-million": (sniroute.parse_count, "1000000", 1_000_000),
    **{f"no-count-{text!r}": (sniroute.parse_count, text, ValueError)
       for text in ("0", "-1", "01", "1.0", "1000001", "9999999", "", "x", "\u0661", "1_0", " 1")},
    "listen-everywhere": (sniroute.parse_listen, ":19000", ("*", 19000)),
    "listen-on-a-host": (sniroute.parse_listen, "127.0.0.1:0", ("127.0.0.1", 0)),
    "listen-on-v6": (sniroute.parse_listen, "[::]:443", ("::", 443)),
    **{f"no-listen-{text!r}": (sniroute.parse_listen, text, ValueError)
       for text in ("19000", "::1:443", ":", "h:x", "")},
    "ports": (sniroute.parse_ports, "20000-20100", (20000, 20100)),
    "one-port": (sniroute.parse_ports, "1-1", (1, 1)),
    **{f"no-ports-{text!r}": (sniroute.parse_ports, text, ValueError)
       for text in ("20000", "2-1", "0-5", "1-65536", "a-b", "1-2-3", "", "1--2", "\u0661-5")},
    "no-networks": (sniroute.parse_networks, "none", ()),
    "networks": (sniroute.parse_networks, "10.0.0.0/8, fc00::/7",
                 (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fc00::/7"))),
    "an-address-is-a-network": (sniroute.parse_networks, "192.0.2.1", (ipaddress.ip_network("192.0.2.1/32"),)),
    **{f"no-networks-{text!r}": (sniroute.parse_networks, text, ValueError)
       for text in ("", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.0/8,", "x", "none,10.0.0.0/8")},
    "a-word": (sniroute.one_of("a", "b"), "b", "b"),
    "no-word": (sniroute.one_of("a", "b"), "B", ValueError),
}


@pytest.mark.parametrize("parse, text, expected", PARSERS.values(), ids=PARSERS)
def test_the_text_of_a_setting(parse, text, expected):
    if expected is ValueError:
        with pytest.raises(ValueError) as caught:
            parse(text)
        assert "\n" not in str(caught.value)
    else:
        assert parse(text) == expected


def test_the_tunnel_program_is_one_that_strangers_cannot_replace(tmp_path, monkeypatch):
    program = tmp_path / "cloudflared"
    with pytest.raises(ValueError, match="is not a program"):
        sniroute.parse_program(str(program))
    program.write_text("")
    program.chmod(0o644)
    monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & stat.S_IXUSR))  # for root
    with pytest.raises(ValueError, match="is not a program"):
        sniroute.parse_program(str(program))
    with pytest.raises(ValueError, match="is not a program"):
        sniroute.parse_program(str(tmp_path))
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert sniroute.parse_program("./cloudflared") == str(program)
    program.chmod(0o757)
    with pytest.raises(ValueError, match="chown it, and chmod o-w"):
        sniroute.parse_program(str(program))
    program.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(program, 4321, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 4322)
    with pytest.raises(ValueError, match="chown it, and chmod o-w"):
        sniroute.parse_program(str(program))


# name -> on the command line, its value; in the environment, its value
SAMPLES: dict[str, tuple[list[str], Any, str, Any]] = {
    "listen": (["127.0.0.1:1", ":2"], [("127.0.0.1", 1), ("*", 2)], "[::1]:3  h:4", [("::1", 3), ("h", 4)]),
    "route": (["a.b=tcp:h:1", "*.c.d=tcp:h:2"], [Route("a.b", "tcp:h:1"), Route("*.c.d", "tcp:h:2")],
              "e.f=tcp:h:3\n*=tcp:h:4", [Route("e.f", "tcp:h:3"), Route("*", "tcp:h:4")]),
    "proxy-protocol": (["off"], "off", "required", "required"),
    "proxy-from": (["none"], (), "192.0.2.0/24", (ipaddress.ip_network("192.0.2.0/24"),)),
    "ports": (["1-2"], (1, 2), "3-4", (3, 4)),
    "idle": (["1s"], 1.0, "2s", 2.0),
    "start-timeout": (["3s"], 3.0, "4s", 4.0),
    "prelude-timeout": (["5s"], 5.0, "6s", 6.0),
    "connection-idle": (["7s"], 7.0, "off", 0.0),
    "drain": (["8s"], 8.0, "9s", 9.0),
    "max-connections": (["10"], 10, "11", 11),
    "max-per-client": (["12"], 12, "13", 13),
    "max-tunnels": (["14"], 14, "15", 15),
    "max-starting": (["16"], 16, "17", 17),
    "no-name": (["ok"], "ok", "refuse", "refuse"),
    "cloudflared": (["/bin/sh"], "/bin/sh", "/bin/cat", "/bin/cat"),
    "log-level": (["debug"], "debug", "error", "error"),
    "log-format": (["json"], "json", "text", "text"),
}


def variable(name: str) -> str:
    return "SNIROUTE_" + name.upper().replace("-", "_")


@pytest.mark.parametrize("name", [row.name for row in SETTINGS])
def test_a_setting_comes_from_the_command_line_then_the_environment(name):
    given, on_line, text, in_environment = SAMPLES[name]
    attribute = name.replace("-", "_")
    argv = [word for value in given for word in (f"--{name}", value)]
    assert getattr(load_settings(argv, {}), attribute) == on_line
    assert getattr(load_settings([], {variable(name): text}), attribute) == in_environment
    assert getattr(load_settings(argv, {variable(name): text}), attribute) == on_line
    default = getattr(load_settings([], {}), attribute)
    assert getattr(load_settings([], {variable(name): ""}), attribute) == default, "an empty variable is none"
    joined = [f"--{name}={value}" for value in given]
    assert getattr(load_settings(joined, {}), attribute) == on_line


def test_the_settings_without_any():
    settings = load_settings([], {"HOME": "/"})
    assert (settings.command, settings.name, settings.listen) == ("serve", None, [("*", 19000)])
    assert settings.routes.routes == (Route("*", "cloudflared:cft-{name}"),) and settings.open_to_all
    assert (settings.ports, settings.idle, settings.connection_idle) == ((20000, 20100), 300.0, 0.0)
    assert (settings.proxy_protocol, settings.max_per_client, settings.cloudflared) == ("auto", 256, None)
    assert ipaddress.ip_address("127.0.0.1") in settings.proxy_from[0] and len(settings.proxy_from) == 6
    assert not load_settings(["--route", "a.b=tcp:h:1"], {}).open_to_all
    assert not load_settings([], {"SNIROUTE_ROUTE": "a.b=tcp:h:1"}).open_to_all


def test_the_last_of_an_option_that_does_not_repeat_counts():
    assert load_settings(["--idle", "1s", "--idle", "2s"], {}).idle == 2.0


@pytest.mark.parametrize("argv, command, name", [
    ([], "serve", None), (["serve"], "serve", None), (["check"], "check", None),
    (["explain", "a.b"], "explain", "a.b"), (["--idle", "1s", "check"], "check", None),
    (["explain", "--idle", "1s", "a.b"], "explain", "a.b"),
])
def test_the_command(argv, command, name):
    settings = load_settings(argv, {})
    assert (settings.command, settings.name) == (command, name)


def test_everything_that_is_wrong_is_said_at_once_a_line_for_each():
    with pytest.raises(SettingsError) as caught:
        load_settings(["--idle", "soon", "--ports=9-1", "--route", "a.b=tcp:h:1", "--route", "x",
                       "--listen", "here\n"],
                      {"SNIROUTE_MAX_TUNNELS": "many", "SNIROUTE_DRAIN": "\x1b[2J", "SNIROUTE_IDLE": "never"})
    lines = caught.value.lines
    assert [line.partition(":")[0] for line in lines] == \
        ["--listen", "--route", "--ports", "--idle", "SNIROUTE_DRAIN", "SNIROUTE_MAX_TUNNELS"]
    assert all(re.fullmatch("[ -~]+", line) for line in lines) and str(caught.value) == "\n".join(lines)


@pytest.mark.parametrize("argv, environ, line", [
    (["--route", "a.b=tcp:h:1", "--route", "A.b=tcp:h:2"], {}, "--route: a.b is routed twice"),
    ([], {"SNIROUTE_ROUTE": "a.b=tcp:h:1 a.b=tcp:h:2"}, "SNIROUTE_ROUTE: a.b is routed twice"),
    (["--route", "a.b=tcp:127.0.0.1:7", "--listen", "127.0.0.1:7"], {},
     "--route: a.b=tcp:127.0.0.1:7 leads back to --listen 127.0.0.1:7"),
    (["--route", "a.b=tcp:[::1]:7", "--listen", "[::1]:7"], {},
     "--route: a.b=tcp:[::1]:7 leads back to --listen ::1:7"),
], ids=["twice", "twice-in-the-environment", "a-circle", "a-circle-over-v6"])
def test_routes_that_contradict_are_refused(argv, environ, line):
    with pytest.raises(SettingsError) as caught:
        load_settings(argv, environ)
    assert caught.value.lines == (line,)


@pytest.mark.parametrize("argv, complaint", [
    (["explain"], "explain takes one NAME"), (["check", "a.b"], "unexpected 'a.b'"),
    (["serve", "a.b"], "unexpected 'a.b'"),
    (["route"], "invalid choice"), (["explain", "a.b", "c.d"], "unrecognized"), (["--idl=1s"], "unrecognized"),
    (["--idle"], "expected one argument"), (["--config=x"], "unrecognized"), (["--config", "x"], "error: "),
], ids=["explain-nothing", "check-a-name", "serve-a-name", "no-command", "explain-two", "abbreviation", "no-value",
        "no-option", "no-option-and-a-value"])
def test_a_command_line_that_is_none_ends_with_2(argv, complaint, capsys):
    with pytest.raises(SystemExit) as caught:
        sniroute.main(argv)
    assert caught.value.code == 2 and complaint in capsys.readouterr().err


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from the environment of whoever runs the tests."""
    for name in os.environ:
        if name.startswith("SNIROUTE_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("command", [["serve"], ["check"], ["explain", "a.b"]], ids=["serve", "check", "explain"])
def test_settings_that_are_wrong_end_with_2_and_a_line_for_each(command, capsys, monkeypatch, no_variables):
    monkeypatch.setenv("SNIROUTE_DRAIN", "never")
    assert sniroute.main([*command, "--idle=soon"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "sniroute: --idle: 'soon' is not a duration such as 300s, 5m, 1h30m or 500ms\n" \
        "sniroute: SNIROUTE_DRAIN: 'never' is not a duration such as 300s, 5m, 1h30m or 500ms\n"


def test_check_prints_the_routes(capsys, no_variables):
    assert sniroute.main(["check", "--route", "A.b=tcp:h:1", "--route", "*=cloudflared:x.{name}"]) == 0
    assert capsys.readouterr().out == "a.b=tcp:h:1\n*=cloudflared:x.{name}\n"


@pytest.mark.parametrize("name, code, line", [
    ("DB.Example.com", 0, "name:    db.example.com\nroute:   *.example.com=tcp:{label}:1\ntarget:  tcp:db:1\n"),
    ("db.example.org", 1,
     "name:    db.example.org\nrefused: no route for db.example.org (no_route, TLS alert 112)\n"),
    ("\udcff\x1b.org", 1, "name:    ??.org\nrefused: not a host name: '??.org' (bad_name, TLS alert 112)\n"),
], ids=["routed", "not-routed", "bytes-that-are-no-text"])
def test_explain_says_what_becomes_of_a_name(name, code, line, capsys, no_variables):
    assert sniroute.main(["explain", name, "--route", "*.example.com=tcp:{label}:1"]) == code
    assert capsys.readouterr().out == line


def test_the_help_lists_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"], {})
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert SAMPLES.keys() == {row.name for row in SETTINGS}
    for row in SETTINGS:
        assert f"--{row.name} {row.metavar} " in text
        assert " ".join(row.help.split()) in text or "-" in row.help, row.name  # argparse breaks at hyphens
    assert "explain NAME" in text and "SNIROUTE_MAX_TUNNELS" in text


def test_every_default_is_in_the_help_of_its_setting():
    for row in SETTINGS:
        if row.default is not None and row.name != "proxy-from":
            assert row.default in row.help, row.name


def test_the_version(capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(["-V"], {})
    assert caught.value.code == 0
    assert re.fullmatch(r"sniroute \d+\.\d+\.\d+ \(Python 3\.\d+\.\S+, \S+\)\n", capsys.readouterr().out)


@pytest.mark.parametrize("limit, fit", [(1024, 384), (256, 64), (2, 1), (1, 1), (1 << 20, (1 << 20) // 2 - 128),
                                        (resource.RLIM_INFINITY, (1 << 20) // 2 - 128)])
def test_the_connections_that_fit_follow_the_limit_of_open_files(limit, fit, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    settings = load_settings([], {})
    assert settings.max_connections == settings.fit == fit
    assert load_settings(["--max-connections", "7"], {}).max_connections == 7


@pytest.mark.parametrize("memory, tunnels", [(1 << 30, 16), (1 << 40, 101), (1, 1)],
                         ids=["1-GiB", "1-TiB", "hardly-any"])
def test_the_tunnels_that_fit_follow_the_memory_and_the_ports(memory, tunnels, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}[name])
    assert load_settings([], {}).max_tunnels == tunnels


def test_the_limit_of_open_files_is_raised_where_it_may_be(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10, 20))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    sniroute.raise_descriptor_limit()
    assert asked == [(20, 20)]

    def forbid(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "setrlimit", forbid)
    sniroute.raise_descriptor_limit()


# -- the log -----------------------------------------------------------------------------------

WHEN = 1_700_000_000.0625
FORGED = "x\n<3>forged line\r\n2023-11-14T22:13:20.062Z error forged\x1b[2J\x1b]0;title\x07 " \
    "\u2028 \u202e \x85 \x9b31m \0 \x7f \u00e9 \udcff"


def said(message: str, *args: object, level: int = logging.INFO,
         error: BaseException | None = None) -> logging.LogRecord:
    """A log record, as a logger makes it."""
    record = logging.LogRecord("sniroute", level, __file__, 1, message, args, None)
    record.exc_info = (type(error), error, error.__traceback__) if error else None
    record.created = WHEN
    return record


def ended(**changes: Any) -> Ending:
    row = Ending(logging.INFO, WHEN, ("192.0.2.1", 1111), NAME, "*.example.com", "127.0.0.1:20000", 10, 20, 1.23456,
                 "client_closed", None)
    return row._replace(**changes)


def written(style: str, *rows: Any, stream: Any = None) -> str:
    """What the log has of these rows."""
    stream = stream or io.StringIO()
    journal = Journal(stream, style)
    for row in rows:
        journal.emit(row)
    journal.stop()
    return stream.getvalue()


@pytest.fixture
def journald(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stream that looks like journald's."""
    class Stream(io.StringIO):
        def fileno(self) -> int:
            return file.fileno()

    with open(tmp_path / "journal", "w") as file:
        state = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{state.st_dev}:{state.st_ino}")
        yield Stream()


def test_a_line_of_the_log():
    assert written("text", said("listening on %s", ":1")) == "2023-11-14T22:13:20.062Z info listening on :1\n"
    assert json.loads(written("json", said("it's %d", 1, level=logging.WARNING))) == \
        {"time": "2023-11-14T22:13:20.062Z", "level": "warning", "message": "it's 1"}


def test_a_line_under_journald_has_a_level_for_it_and_no_time(journald):
    levels = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
    text = written("text", *(said("x", level=level) for level in levels), ended(level=logging.DEBUG), stream=journald)
    assert re.findall("^<(.)>", text, re.MULTILINE) == ["7", "6", "4", "3", "7"] and text.startswith("<7>x\n")


def test_a_line_of_json_is_the_same_under_journald(journald):
    assert json.loads(written("json", said("x"), stream=journald))["message"] == "x"


def test_the_line_of_a_connection():
    assert written("text", ended()) == \
        "2023-11-14T22:13:20.062Z info client=192.0.2.1:1111 name=db.example.com route=*.example.com " \
        "backend=127.0.0.1:20000 up=10 down=20 seconds=1.235 reason=client_closed\n"
    assert json.loads(written("json", ended())) == {
        "time": "2023-11-14T22:13:20.062Z", "level": "info", "client": "192.0.2.1:1111", "name": NAME,
        "route": "*.example.com", "backend": "127.0.0.1:20000", "up": 10, "down": 20, "seconds": 1.235,
        "reason": "client_closed"}


def test_the_line_of_a_connection_that_came_to_nothing():
    row = ended(name=None, route=None, backend=None, client=("2001:db8::1", 5), reason="malformed",
                detail='a "bad" hello')
    assert written("text", row).endswith(
        "client=[2001:db8::1]:5 name=- route=- backend=- up=10 down=20 seconds=1.235 "
        'reason=malformed detail="a \\"bad\\" hello"\n')
    fields = json.loads(written("json", row))
    assert fields["detail"] == 'a "bad" hello' and not {"name", "route", "backend"} & fields.keys()


@pytest.mark.parametrize("style", ["text", "json", "journald"])
@pytest.mark.parametrize("row", [said("%s", FORGED), said(FORGED), ended(detail=FORGED)],
                         ids=["argument", "message", "detail"])
def test_what_a_client_sends_never_makes_a_line_or_moves_a_terminal(style, row, request):
    stream = request.getfixturevalue("journald") if style == "journald" else None
    text = written("json" if style == "json" else "text", row, stream=stream)
    assert text.endswith("\n") and text.count("\n") == 1 and re.fullmatch("[ -~]+", text[:-1])
    assert "forged" in text


@pytest.mark.parametrize("style", ["text", "json", "journald"])
def test_a_traceback_is_indented_or_a_field_whatever_is_in_it(style, request):
    stream = request.getfixturevalue("journald") if style == "journald" else None
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        row = said("a fault", level=logging.ERROR, error=error)
    first, *rest = written("json" if style == "json" else "text", row, stream=stream)[:-1].split("\n")
    assert all(re.fullmatch("[ -~]+", line) for line in (first, *rest))
    if style == "json":
        trace = json.loads(first)["traceback"]
        assert not rest and trace.startswith("Traceback") and FORGED in trace
    else:
        assert first.endswith("a fault") and rest[0] == "  Traceback (most recent call last):"
        assert all(line.startswith("  ") for line in rest) and len(rest) >= 5


def test_a_line_is_not_longer_than_it_may_be():
    assert len(written("text", said("x" * 100_000))) < 2100
    assert len(written("text", ended(detail="\\" * 100_000))) < 1300


@pytest.mark.parametrize("address, text", [(("192.0.2.1", 1), "192.0.2.1:1"), (("::1", 2), "[::1]:2"),
                                           (("fe80::1%eth0", 3, 0, 2), "[fe80::1%eth0]:3")])
def test_an_address_for_people(address, text):
    assert show_address(address) == text


def test_a_log_of_many_threads_has_every_line():
    stream = io.StringIO()
    journal = Journal(stream, "text")
    barrier = threading.Barrier(4)

    def speak(number: int) -> None:
        barrier.wait()
        for line in range(100):
            journal.emit(said("%s", f"{number}-{line}"))

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.stop()
    words = [line.split()[-1] for line in stream.getvalue().splitlines()]
    for number in range(4):
        of_one = [word for word in words if word.startswith(f"{number}-")]
        assert of_one == [f"{number}-{line}" for line in range(100)]


class Stuck(io.StringIO):
    """A stream whose writes wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.free = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.free.wait(30)
        return super().write(text)


def test_a_log_that_is_stuck_drops_lines_and_counts_them(monkeypatch):
    monkeypatch.setattr(sniroute, "LOG_LINES_MAX", 5)
    stream = Stuck()
    journal = Journal(stream, "text")
    journal.emit(said("first"))
    assert stream.entered.wait(10)
    for number in range(8):
        journal.emit(said("line %d", number))
    assert (journal.dropped, len(journal.lines)) == (3, 5)
    stream.free.set()
    journal.stop()
    words = [line.split(" ", 2)[1:] for line in stream.getvalue().splitlines()]
    assert words == [["info", "first"], *(["info", f"line {number}"] for number in range(5)),
                     ["warning", "the log was too slow: 3 lines dropped"]]


def test_a_log_that_stays_stuck_does_not_hold_up_the_end():
    stream = Stuck()
    journal = Journal(stream, "text")
    journal.emit(said("first"))
    assert stream.entered.wait(10)
    journal.stop()
    assert journal.thread.is_alive() and journal.thread.daemon
    stream.free.set()
    journal.thread.join()
    os.close(journal.wake_reader)
    os.close(journal.wake_writer)


@pytest.mark.parametrize("failure", [
    OSError(28, "no space left on device"), BrokenPipeError(), ValueError("closed file"),
], ids=["full", "broken-pipe", "closed"])
def test_a_log_that_fails_goes_on(failure):
    class Failing(io.StringIO):
        failures = [failure]

        def flush(self) -> None:
            if self.failures:
                self.entered.set()
                raise self.failures.pop()

    stream = Failing()
    stream.entered = threading.Event()
    journal = Journal(stream, "text")
    journal.emit(said("first"))
    assert stream.entered.wait(10)
    journal.emit(said("second"))
    journal.stop()
    assert stream.getvalue().endswith(" second\n")


def test_a_log_without_a_stream_is_silent():
    journal = Journal(None, "text")
    journal.emit(said("x"))
    journal.stop()
    assert not journal.lines


def test_journald_is_recognised_by_its_inode(journald, tmp_path, monkeypatch):
    assert under_journald(journald)
    with open(tmp_path / "other", "w") as file:
        assert not under_journald(file)
    assert not under_journald(file), "closed"
    assert not under_journald(None) and not under_journald(io.StringIO())
    monkeypatch.delenv("JOURNAL_STREAM")
    assert not under_journald(journald)
