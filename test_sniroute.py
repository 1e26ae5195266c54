"""Tests of sniroute.py, in its order.

Hellos come from OpenSSL where they can (`genuine`), else field by field from a builder whose
default is a good one.  OpenSSL's server side is the judge of the names that are read (`openssl`).
Rows of tables carry an id: T for TLS, P and Q for PROXY versions 1 and 2, G for PostgreSQL.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import hashlib
import io
import ipaddress
import itertools
import json
import logging
import os
import pathlib
import pwd
import queue
import random
import re
import resource
import selectors
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import types
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import pytest

import sniroute
import sniroute_admin
import sniroute_connection
import sniroute_daemon
import sniroute_doctor
import sniroute_flow
import sniroute_launchers
import sniroute_log
import sniroute_loop
import sniroute_names
import sniroute_refusals
import sniroute_router
import sniroute_routes
import sniroute_settings
import sniroute_wire
from sniroute_launchers import cloudflared_launcher
from sniroute_log import Ending, Journal, under_journald
from sniroute_loop import NEVER
from sniroute_names import normalise, parse_host_port, show_address
from sniroute_refusals import REFUSALS, Malformed, Refused, SettingsError, postgres_error, tls_alert, told
from sniroute_routes import Resolved, Route, Routes, Targets, check_tcp, check_tunnel, expand, parse_route
from sniroute_settings import SETTINGS, load_settings
from sniroute_tunnels import TunnelTable
from sniroute_wire import (GSSENC_REQUEST, PROXY_POLICY, PROXY_V2, SSL_REQUEST, Hello, HelloMemory, HelloReader,
                           Prelude, ProxyHeader, crc32c, parse_client_hello, parse_proxy_v1, parse_proxy_v2,
                           parse_server_name, parse_startup, whole_hello)
from conftest import CORE, DOCTOR, HERE, HOST, Address, Cloudflared, Edge, FakeClock, wait_until

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


@pytest.fixture
def hellos(monkeypatch: pytest.MonkeyPatch) -> HelloMemory:
    """A memory of hellos that learns every unknown shape, and knows none yet."""
    monkeypatch.setattr(sniroute_wire, "LEARN_EVERY", 1)
    return HelloMemory()


NAMED = {key: how for key, how in GENUINE.items() if how.get("name", NAME)}


@pytest.mark.parametrize("how", NAMED.values(), ids=NAMED)
def test_a_hello_of_a_shape_that_is_known_is_read_without_a_walk_through_it(hellos, monkeypatch, how):
    first = genuine(**how)
    hellos.find(first)
    walked = []
    monkeypatch.setattr(sniroute_wire, "parse_client_hello", lambda data: walked.append(data) or parse_client_hello(data))
    wire = genuine.__wrapped__(**how)  # not the remembered one: with other random bytes and keys
    assert wire != first
    name = how.get("name", NAME)
    other = "other" + name[5:].lower()
    assert hellos.find(wire).name == name.lower() != other
    assert hellos.find(wire.replace(name.encode(), other.encode())).name == other
    assert hellos.find(wire + b"more") == hellos.find(wire)
    assert not walked and len(hellos.shapes) == 1
    assert hellos.find(wire) == verdict(Prelude("allow", True).feed, wire)
    assert hellos.find(wire).alpn == ([text.encode() for text in how.get("protocols", ())] or None)


def test_the_shape_of_a_hello_without_a_name_is_not_remembered(hellos):
    """It is refused in any case."""
    assert hellos.find(genuine(name=None)).name is None and not hellos.shapes


@pytest.mark.parametrize("wire", [
    PLAIN, genuine(("h2", "http/1.1")), hello(*OTHERS, SNI, alpn(b"h2"), session=vector(1, b"s" * 32)),
    record(MESSAGE + handshake(b"", 20)),
], ids=["hand-made", "genuine", "name-in-the-middle", "more-in-the-record"])
def test_what_is_nearly_of_a_known_shape_has_the_verdict_it_has_otherwise(hellos, wire):
    """Each byte of it changed, each beginning of it, and something behind it."""
    assert hellos.find(wire).name == NAME
    known = dict(hellos.shapes)
    assert len(known) == 1
    nearly = [wire[:at] + bytes([byte]) + wire[at + 1:] for at in range(len(wire))
              for byte in {0, 1, 255, wire[at] ^ 1, wire[at] ^ 128, (wire[at] + 1) % 256}]
    for data in [*nearly, *(wire[:end] for end in range(len(wire))), wire + b"\x16\3\1", wire + wire]:
        hellos.shapes.clear()
        hellos.shapes.update(known)
        found = verdict(hellos.find, data)
        hellos.shapes.clear()
        assert verdict(hellos.find, data) == found, data


def test_a_hello_as_long_as_a_known_one_and_of_another_shape_is_read_and_takes_its_place(hellos):
    """As of a browser that shuffles its extensions."""
    wires = [hello(SNI, *OTHERS, alpn(b"h2")), hello(*OTHERS, alpn(b"h2"), SNI), hello(alpn(b"h2"), SNI, *OTHERS)]
    assert len({wire[:11] for wire in wires}) == 1
    for wire in wires * 2:
        assert hellos.find(wire) == Hello(NAME, b"\0\3\2h2", len(wire))
        [shape] = hellos.shapes.values()
        assert shape == shape._replace(framing=shape.framing_of(wire, 11)), "it is this one's"


def test_so_many_shapes_are_remembered_at_most_and_the_oldest_goes(hellos, monkeypatch):
    monkeypatch.setattr(sniroute_wire, "SHAPES_MAX", 5)
    for size in range(500, 512):
        wire = records(hello_of(size))
        assert hellos.find(wire).name == hellos.find(wire).name == NAME
        assert [shape.end for shape in hellos.shapes.values()] == list(range(max(509, size + 5), size + 10))[-5:]


def test_one_in_so_many_unknown_shapes_is_remembered(hellos, monkeypatch):
    """Who never comes again should cost no more than it has to."""
    monkeypatch.setattr(sniroute_wire, "LEARN_EVERY", 8)
    for size in range(500, 580):
        hellos.find(records(hello_of(size)))
    assert len(hellos.shapes) == 10


def test_the_shape_of_a_hello_with_very_many_extensions_is_not_remembered(hellos):
    """A stranger would have it made, and compared, again and again."""
    for count in (sniroute_wire.EXTENSIONS_MAX - 1, sniroute_wire.EXTENSIONS_MAX, 900):
        wire = hello(SNI, *(extension(1000 + number, b"") for number in range(count)))
        assert hellos.find(wire).name == hellos.find(wire).name == NAME
        assert len(hellos.shapes) == 1


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


def without_destination(parse: Callable[[bytes], ProxyHeader | None]) -> Callable[[bytes], ProxyHeader | None]:
    """The parser, but for what test_a_proxy_header_that_we_write_is_read_again looks at."""
    return lambda data: (header := parse(data)) and header._replace(destination=None)


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
    check_parser(without_destination(parse_proxy_v1), line, ProxyHeader(len(line), source and ANY(source), port))


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
    check_parser(without_destination(parse_proxy_v2), header, ProxyHeader(len(header), source and ANY(source), port))


@pytest.mark.parametrize("header", BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_a_broken_proxy_header_is_refused(header):
    check_parser(parse_proxy_v2, header, Bad("proxy"))


@pytest.mark.parametrize("write, parse", [(sniroute_wire.proxy_v1, parse_proxy_v1), (sniroute_wire.proxy_v2, parse_proxy_v2)],
                         ids=["v1", "v2"])
@pytest.mark.parametrize("source, destination, read", [
    (("192.0.2.1", 1111), ("192.0.2.9", 443), ("192.0.2.1", "192.0.2.9")),
    (("2001:db8::1", 65535), ("2001:db8::9", 1), ("2001:db8::1", "2001:db8::9")),
    (("fe80::1%eth0", 1), ("fe80::2%eth0", 2), ("fe80::1", "fe80::2")),
    (("::ffff:192.0.2.1", 1), ("::ffff:192.0.2.9", 2), ("192.0.2.1", "192.0.2.9")),
    (("192.0.2.1", 1), ("2001:db8::9", 2), ("::ffff:192.0.2.1", "2001:db8::9")),
], ids=["IPv4", "IPv6", "scoped", "mapped", "mixed"])
def test_a_proxy_header_that_we_write_is_read_again(write, parse, source, destination, read):
    header = write(source, destination)
    assert parse(header) == ProxyHeader(len(header), ANY(read[0]), source[1], (str(ANY(read[1])), destination[1]))


def test_a_proxy_header_of_nobody_is_written_as_such():
    assert sniroute_wire.proxy_v1(None, ("192.0.2.9", 443)) == b"PROXY UNKNOWN\r\n"
    assert parse_proxy_v2(sniroute_wire.proxy_v2(None, ("192.0.2.9", 443))) == ProxyHeader(16, None, 0)


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
    "G8-CancelRequest": (CANCEL, sniroute_wire.CANCEL_REQUEST),
    **{f"G9-CancelRequest-with-a-key-of-{size}": (startup(80877102, bytes(4 + size)), sniroute_wire.CANCEL_REQUEST)
       for size in (4, 32, 256)},
    "G9-CancelRequest-of-a-wrong-length": (startup(80877102, size=9), sniroute_wire.CANCEL_REQUEST),
    "G10-startup-3.0": (PLAIN_STARTUP, sniroute_wire.STARTUP),
    "G10-startup-3.2": (startup(0x30002, b"user\0me\0\0"), sniroute_wire.STARTUP),
    "G10-startup-of-8": (startup(0x30000), sniroute_wire.STARTUP),
    "G10-startup-of-10004": (startup(0x30000, bytes(9996)), sniroute_wire.STARTUP),
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
    shapes += [records(message, at) for at in range(1, len(message), 3)]
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
    prelude = Prelude("refuse", False)
    with pytest.raises(Refused) as caught:
        prelude.feed(PLAIN_STARTUP)
    said = told(caught.value, *prelude.language())
    assert said.startswith(b"E") and b"sslmode=require" in said
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
    assert told(Malformed("broken", 40), *prelude.language()) == expected


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
    for data in [*substitutions([short, records(short[5:], 40)]), *mutations(HELLO_SEEDS, rng, 30_000)]:
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
    assert tried > 70_000 and accepted > 10_000 and len(names) > 500, "it tries what matters"


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
    for data in mutations(seeds, rng, 25_000):
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
    assert (found and found[0].pattern) == pattern


def test_a_name_without_a_route_is_refused():
    with pytest.raises(Refused) as caught:
        ROUTES.decide("example.net")
    assert (caught.value.kind, caught.value.alert) == ("no_route", 112)


def test_a_decision_is_made_once_and_names_its_target():
    routes = Routes([parse_route("**.example.com=cloudflared:CFT-{label}.{domain}")])
    decision = routes.decide("db.eu.example.com")
    assert decision.target == "cloudflared:cft-db.eu.example.com" and decision.rest == "cft-db.eu.example.com"
    assert decision.scheme is sniroute_routes.SCHEMES["cloudflared"] and decision.route is routes.routes[0]
    assert routes.decide("db.eu.example.com") is decision


def test_decisions_are_remembered_for_a_limited_number_of_names(monkeypatch):
    monkeypatch.setattr(sniroute_routes, "DECISIONS_MAX", 3)
    routes = Routes([parse_route("*=tcp:h:1")])
    for number in range(10):
        routes.decide(f"n{number}.example.com")
        assert len(routes.decisions) <= 3


def test_decisions_are_remembered_for_all_names_that_have_a_route_of_their_own(monkeypatch):
    monkeypatch.setattr(sniroute_routes, "DECISIONS_MAX", 3)
    names = [f"n{number}.example.com" for number in range(10)]
    routes = Routes([parse_route(f"{name}=tcp:h:1") for name in names])
    decisions = [routes.decide(name) for name in names]
    assert all(routes.decide(name) is decision for name, decision in zip(names, decisions, strict=True))


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
    (check_tunnel, "db.example.com", True), (check_tunnel, "--url.x", False),
    (check_tunnel, "localhost", False),
])
def test_a_target_is_checked(check, rest, good):
    assert verdict(check, rest) == (rest if good else Bad("bad_name", 112))


def resolve(monkeypatch: pytest.MonkeyPatch, target: str, found: list[str] | OSError, targets: Targets,
            allowed: Callable[[tuple], bool] = lambda address: True) -> Any:
    """Prepare a tcp target while the resolver answers `found`."""
    def answer(host: str, port: int, **_: Any) -> list[tuple]:
        if isinstance(found, OSError):
            raise found
        return [(socket.AF_INET6 if ":" in text else socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, port))
                for text in found]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    targets.may_dial = lambda decision, address: allowed(address)
    decision = Routes([Route("a.b", target)]).decide("a.b")
    sniroute_routes.tcp_prepare(targets, types.SimpleNamespace(decision=decision))
    return sniroute_routes.tcp_ready(targets, decision)


def addresses(backend: sniroute_routes.Backend) -> list[tuple]:
    """Those that it would try, in order."""
    return list(backend.addresses)


def test_a_host_is_resolved_once_and_stays_while_the_resolver_is_down(monkeypatch):
    targets = Targets(None)
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, "tcp:h:1", OSError("down"), targets)
    assert (caught.value.kind, caught.value.alert) == ("unresolved", 80)
    backend = resolve(monkeypatch, "tcp:h:1", ["192.0.2.1", "192.0.2.1", "2001:db8::1"], targets)
    assert not backend.local
    for known in (backend, resolve(monkeypatch, "tcp:h:1", OSError("down"), targets)):
        assert addresses(known) == [(socket.AF_INET, ("192.0.2.1", 1)), (socket.AF_INET6, ("2001:db8::1", 1))]
    now = time.monotonic()
    monkeypatch.setattr(sniroute_routes, "monotonic", lambda: now + sniroute_routes.RESOLVED_FOR + 1)
    assert sniroute_routes.tcp_ready(targets, Routes([Route("a.b", "tcp:h:1")]).decide("a.b")) is None, "its time is over"
    assert sniroute_routes.tcp_ready(targets, Routes([Route("a.b", "tcp:other:1")]).decide("a.b")) is None


@pytest.mark.parametrize("target, family, address, local", [
    ("tcp:127.0.0.1:1", socket.AF_INET, ("127.0.0.1", 1), True),
    ("tcp:192.0.2.1:2", socket.AF_INET, ("192.0.2.1", 2), False),
    ("tcp:[::1]:3", socket.AF_INET6, ("::1", 3, 0, 0), True),
], ids=["loopback", "elsewhere", "v6"])
def test_an_address_is_never_resolved(target, family, address, local):
    targets = Targets(None)
    decision = Routes([Route("a.b", target)]).decide("a.b")
    for _ in range(2):
        backend = sniroute_routes.tcp_ready(targets, decision)
        assert (addresses(backend), backend.local) == ([(family, address)], local)
    assert list(targets.resolved) == [decision.key]


def test_an_address_that_the_route_does_not_lead_to_is_not_ready_and_never_will_be(monkeypatch):
    targets = Targets(None)
    targets.own = [("127.0.0.1", 19000)]
    decision = Routes([Route("a.b", "tcp:127.0.0.1:19000")]).decide("a.b")
    with pytest.raises(Refused) as caught:
        sniroute_routes.tcp_ready(targets, decision)
    assert caught.value.kind == "forbidden", "at once: no thread is needed to say so"
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, decision.target, ["127.0.0.1"], targets, lambda address: False)
    assert caught.value.kind == "forbidden" and not targets.resolved


def test_only_addresses_that_the_route_leads_to_are_dialled(monkeypatch):
    targets = Targets(None)
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, "tcp:h:1", ["10.0.0.1"], targets, lambda address: False)
    assert (caught.value.kind, caught.value.alert) == ("forbidden", 112)
    backend = resolve(monkeypatch, "tcp:h:1", ["10.0.0.1", "192.0.2.1"], targets,
                      lambda address: address[0] != "10.0.0.1")
    assert [address[0] for _, address in addresses(backend)] == ["192.0.2.1"]


def test_resolved_hosts_and_their_addresses_are_limited(monkeypatch):
    monkeypatch.setattr(sniroute_routes, "RESOLVED_MAX", 2)
    targets = Targets(None)
    for number in range(5):
        backend = resolve(monkeypatch, f"tcp:h{number}:1", [f"192.0.2.{n}" for n in range(1, 9)], targets)
        assert len(addresses(backend)) == sniroute_routes.ADDRESSES_MAX and len(targets.resolved) <= 2
    targets.make_room(3)
    for number in range(6):
        resolve(monkeypatch, f"tcp:h{number}:1", ["192.0.2.1"], targets)
    assert len(targets.resolved) == 6, "there is room for those of all routes"


# -- refusals ----------------------------------------------------------------------------------


def raised_kinds() -> set[str]:
    """Every kind of refusal in the source."""
    kinds = set()
    rooms = [ast.parse((HERE / name).read_text()) for name in CORE]
    for node in itertools.chain.from_iterable(map(ast.walk, rooms)):
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
                assert ast.unparse(kind) in ("kind", "'tunnel_' + kind"), "a kind that this test does not know"
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "kind" \
                and isinstance(node.value, ast.IfExp) and isinstance(node.value.body, ast.Constant):
            kinds |= {node.value.body.value, node.value.orelse.value}
    for node in itertools.chain.from_iterable(map(ast.walk, rooms)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "TunnelError" \
                and isinstance(node.args[0], ast.Constant):
            kinds.add("tunnel_" + node.args[0].value)
    kinds |= {"tunnel_" + kind for kind, _ in sniroute_launchers.CARRIER_REASONS.values()}
    kinds |= {"tunnel_" + kind for _, kind, _ in sniroute_launchers.CLOUDFLARED_REASONS}
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
            sniroute_settings.parse_duration(text)
    else:
        assert sniroute_settings.parse_duration(text) == sniroute_settings.parse_off_or_duration(text) == pytest.approx(seconds)


PARSERS = {
    "off": (sniroute_settings.parse_off_or_duration, "off", 0.0),
    "count-1": (sniroute_settings.parse_count, "1", 1),
    "count-a-million": (sniroute_settings.parse_count, "1000000", 1_000_000),
    **{f"no-count-{text!r}": (sniroute_settings.parse_count, text, ValueError)
       for text in ("0", "-1", "01", "1.0", "1000001", "9999999", "", "x", "\u0661", "1_0", " 1")},
    "listen-everywhere": (sniroute_settings.parse_listen, ":19000", ("*", 19000)),
    "listen-on-a-host": (sniroute_settings.parse_listen, "127.0.0.1:0", ("127.0.0.1", 0)),
    "listen-on-v6": (sniroute_settings.parse_listen, "[::]:443", ("::", 443)),
    **{f"no-listen-{text!r}": (sniroute_settings.parse_listen, text, ValueError)
       for text in ("19000", "::1:443", ":", "h:x", "")},
    "ports": (sniroute_settings.parse_ports, "20000-20100", (20000, 20100)),
    "one-port": (sniroute_settings.parse_ports, "1-1", (1, 1)),
    **{f"no-ports-{text!r}": (sniroute_settings.parse_ports, text, ValueError)
       for text in ("20000", "2-1", "0-5", "1-65536", "a-b", "1-2-3", "", "1--2", "\u0661-5")},
    "no-networks": (sniroute_settings.parse_networks, "none", ()),
    "networks": (sniroute_settings.parse_networks, "10.0.0.0/8, fc00::/7",
                 (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fc00::/7"))),
    "an-address-is-a-network": (sniroute_settings.parse_networks, "192.0.2.1", (ipaddress.ip_network("192.0.2.1/32"),)),
    **{f"no-networks-{text!r}": (sniroute_settings.parse_networks, text, ValueError)
       for text in ("", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.0/8,", "x", "none,10.0.0.0/8")},
    "a-word": (sniroute_settings.one_of("a", "b"), "b", "b"),
    "no-word": (sniroute_settings.one_of("a", "b"), "B", ValueError),
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
        sniroute_settings.parse_program(str(program))
    program.write_text("")
    program.chmod(0o644)
    monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & stat.S_IXUSR))  # for root
    with pytest.raises(ValueError, match="is not a program"):
        sniroute_settings.parse_program(str(program))
    with pytest.raises(ValueError, match="is not a program"):
        sniroute_settings.parse_program(str(tmp_path))
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert sniroute_settings.parse_program("./cloudflared") == str(program)
    program.chmod(0o757)
    with pytest.raises(ValueError, match="chown it, and chmod o-w"):
        sniroute_settings.parse_program(str(program))
    program.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(program, 4321, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 4322)
    with pytest.raises(ValueError, match="chown it, and chmod o-w"):
        sniroute_settings.parse_program(str(program))


# name -> on the command line, its value; in the environment, its value
SAMPLES: dict[str, tuple[list[str], Any, str, Any]] = {
    "config": ([os.devnull], os.devnull, os.devnull, os.devnull),
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
    "admin": (["127.0.0.1:1"], ("127.0.0.1", 1), "unix:/run/admin", "/run/admin"),
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
     "--route: a.b=tcp:[::1]:7 leads back to --listen [::1]:7"),
], ids=["twice", "twice-in-the-environment", "a-circle", "a-circle-over-v6"])
def test_routes_that_contradict_are_refused(argv, environ, line):
    with pytest.raises(SettingsError) as caught:
        load_settings(argv, environ)
    assert caught.value.lines == (line,)


@pytest.mark.parametrize("argv, complaint", [
    (["explain"], "explain takes one NAME"), (["check", "a.b"], "unexpected 'a.b'"),
    (["serve", "a.b"], "unexpected 'a.b'"),
    (["route"], "invalid choice"), (["explain", "a.b", "c.d"], "unrecognized"), (["--idl=1s"], "unrecognized"),
    (["--idle"], "expected one argument"), (["--colour=x"], "unrecognized"), (["--colour", "x"], "error: "),
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
     "name:    db.example.org\nrefused: no route for db.example.org (no_route, TLS alert 112)\n"
     f"to do:   {REFUSALS['no_route'].advice}\n"),
    ("\udcff\x1b.org", 1, "name:    ??.org\nrefused: not a host name: '??.org' (bad_name, TLS alert 112)\n"
     f"to do:   {REFUSALS['bad_name'].advice}\n"),
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


@pytest.mark.parametrize("limit, fit", [(1024, 312), (256, 64), (2, 1), (1, 1), (1 << 20, (1 << 20) // 2 - 200),
                                        (resource.RLIM_INFINITY, (1 << 20) // 2 - 200)])
def test_the_connections_that_fit_follow_the_limit_of_open_files(limit, fit, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    settings = load_settings([], {})
    assert settings.max_connections == settings.fit == fit
    assert load_settings(["--max-connections", "7"], {}).max_connections == 7


@pytest.mark.parametrize("scheme, memory, tunnels", [
    ("cloudflared", 1 << 30, 16), ("cloudflared", 1 << 40, 101), ("cloudflared", 1, 1),
    ("carrier", 1 << 28, 64), ("carrier", 1 << 30, 101),
], ids=["1-GiB", "1-TiB", "hardly-any", "carrier-256-MiB", "carrier-1-GiB"])
def test_the_tunnels_that_fit_follow_the_memory_and_the_ports(scheme, memory, tunnels, cloudflared, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}[name])
    argv = [f"--route=*={scheme}:{{name}}", f"--cloudflared={cloudflared.path}"]
    assert load_settings(argv, {}).max_tunnels == tunnels


def test_the_limit_of_open_files_is_raised_where_it_may_be(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10, 20))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    sniroute_settings.raise_descriptor_limit()
    assert asked == [(20, 20)]

    def forbid(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "setrlimit", forbid)
    sniroute_settings.raise_descriptor_limit()


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


def test_a_line_of_json_has_a_level_for_journald_too(journald):
    text = written("json", said("x", level=logging.WARNING), stream=journald)
    assert text.startswith("<4>{") and json.loads(text[3:])["message"] == "x"


def test_an_event_has_the_same_fields_in_text_and_json():
    event = said("tunnel ready", level=logging.INFO)
    event.fields = {"tunnel": "cf:x.test", "seconds": 0.117, "reason": "two \"words\"\x1b", "pid": 7}
    assert written("text", event) == "2023-11-14T22:13:20.062Z info tunnel ready tunnel=cf:x.test seconds=0.117 " \
        'reason="two \\"words\\"?" pid=7\n'
    assert json.loads(written("json", event)) == {
        "time": "2023-11-14T22:13:20.062Z", "level": "info", "message": "tunnel ready", "tunnel": "cf:x.test",
        "seconds": 0.117, "reason": "two \"words\"?", "pid": 7}


@pytest.mark.parametrize("row, limit, kind", [
    (ended(reason="no_name"), sniroute_log.LOG_REFUSALS, "no_name"),
    (ended(), sniroute_log.LOG_ENDINGS, "client_closed"),
    (said("an event of %d", 1), sniroute_log.LOG_EVENTS, '"an event of %d"'),
], ids=["refusals", "endings", "events"])
def test_a_class_of_lines_has_a_limit_and_what_was_suppressed_is_said(row, limit, kind, monkeypatch):
    monkeypatch.setattr(sniroute_log, "LOG_LINES_MAX", 1 << 20)
    monkeypatch.setattr(sniroute_log, "LOG_PERIOD", 0.05)
    clock, stream = FakeClock(), io.StringIO()
    journal = Journal(stream, "text", clock)
    def lines() -> list[str]:
        return stream.getvalue().splitlines()
    for _ in range(limit + 5):
        journal.emit(row)
    journal.emit(said("something else"))
    wait_until(lambda: lines()[-1:] and "something else" in lines()[-1], what="all of them")
    assert len(lines()) == limit + 1
    clock.jump(1)
    wait_until(lambda: len(lines()) == limit + 2, what="the word of what is missing, though nothing follows")
    assert lines()[-1].partition("Z ")[2] == f"warning 5 suppressed suppressed=5 class={kind}"
    journal.emit(row)
    wait_until(lambda: len(lines()) == limit + 3, what="the class's next period")
    journal.stop()
    assert len(lines()) == limit + 3


def test_what_is_suppressed_at_the_end_is_said_there(monkeypatch):
    monkeypatch.setattr(sniroute_log, "LOG_EVENTS", 1)
    lines = written("json", said("x"), said("x"), said("x")).splitlines()
    assert [json.loads(line).get("suppressed") for line in lines] in ([None, 2], [None, None, 1])


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


def test_a_log_of_many_threads_has_every_line(monkeypatch):
    monkeypatch.setattr(sniroute_log, "LOG_EVENTS", 400)
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
    monkeypatch.setattr(sniroute_log, "LOG_LINES_MAX", 5)
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
    journal.pipe.close()


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


# -- the router, running -----------------------------------------------------------------------


class Running:
    """A Router with its loop in a thread of this process."""

    def __init__(self, *argv: str, program: str):
        sniroute_log.log.setLevel("DEBUG")
        settings = sniroute_settings.load_settings(["--listen", f"{HOST}:0", *argv], {})
        self.tunnels = TunnelTable({"cloudflared": cloudflared_launcher(program, {})}, settings.ports,
                                   idle=settings.idle, start_timeout=settings.start_timeout,
                                   max_tunnels=settings.max_tunnels, max_starting=settings.max_starting)
        self.endings: list[sniroute_log.Ending] = []
        self.router = sniroute_router.Router(settings, self.tunnels, sniroute_router.Hooks(self.endings.append))
        self.address = self.router.server_address
        self.thread = threading.Thread(target=self.router.serve_forever, name="loop")

    def __enter__(self) -> Running:
        self.tunnels.start()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.router.shutdown()
        self.thread.join()
        self.tunnels.close(now=True)
        self.router.server_close()
        sniroute_log.log.setLevel("NOTSET")

    def connect(self, said: bytes = b"") -> socket.socket:
        """A client, with a time-out so that a failing test ends."""
        client = socket.create_connection(self.address, 20)
        client.sendall(said)
        return client

    def ending(self, number: int = 1) -> sniroute_log.Ending:
        """The last of `number` endings, once they are there."""
        wait_until(lambda: len(self.endings) >= number, what=f"{number} endings")
        return self.endings[number - 1]

    def counter(self, name: str) -> int:
        return self.router.counters.get(name, 0)


@pytest.fixture
def run(cloudflared: Cloudflared) -> Iterator[Callable[..., Running]]:
    """run(*options, program=...) -> Running.  It ends before the stand-in's own end is checked."""
    with contextlib.ExitStack() as stack:
        yield lambda *argv, program=cloudflared.path: stack.enter_context(Running(*argv, program=program))


ASK_TLS = sniroute_wire.SSL_REQUEST_BYTES
ASK_GSS = struct.pack(">II", 8, sniroute_wire.GSSENC_REQUEST)


def genuine_hello(name: str | None) -> bytes:
    """The ClientHello that this Python's OpenSSL writes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


HELLO = genuine_hello("db.example.com")


def route(address: tuple[str, int], pattern: str = "db.example.com") -> str:
    return f"--route={pattern}=tcp:{address[0]}:{address[1]}"


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def read_all(sock: socket.socket) -> bytes:
    """What comes until the end; a reset is an end."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 18):
            parts.append(data)
    return b"".join(parts)


def alert(description: int, minor: int = 1) -> bytes:
    return bytes((21, 3, minor, 0, 2, 2, description))


def answer(text: bytes, expected: int = len(HELLO)) -> Callable[[socket.socket], None]:
    """A far end that reads so many bytes, says `text`, and goes on as an echo."""
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, expected)
        sock.sendall(text)
        while data := sock.recv(65536):
            sock.sendall(data)
    return handler


@pytest.fixture(params=["splice", "copy", "selectors"])
def flow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways bytes are moved; the last is that of a system without epoll, which has no splice(2) either."""
    if request.param == "selectors":
        monkeypatch.setattr(sniroute_loop, "EpollPoller", sniroute_loop.Poller)
    if request.param != "splice":
        monkeypatch.setattr(sniroute_flow, "can_splice", lambda: False)
    elif not sniroute_flow.can_splice():
        pytest.skip("no splice(2) here")
    return request.param


# -- bytes -------------------------------------------------------------------------------------


def test_bytes_arrive_as_they_were_sent_and_the_end_comes_behind_them(run, serve, flow):
    """8 MiB each way in pieces of any size; then the client's end, then the answer to it."""
    def digest(sock: socket.socket) -> None:
        seen = hashlib.sha256()
        while data := sock.recv(65536):
            seen.update(data)
            sock.sendall(data)
        sock.sendall(seen.digest())
    far = serve(digest)
    running = run(route(far.address))
    seeded = random.Random(7)
    payload = seeded.randbytes(8 << 20)
    received = []
    with running.connect(HELLO) as client:
        reader = threading.Thread(target=lambda: received.append(read_all(client)))
        reader.start()
        at = 0
        while at < len(payload):
            size = seeded.choice((1, 60, 1400, 16384, 100_000, 1 << 20))
            client.sendall(payload[at:at + size])
            at += size
        client.shutdown(socket.SHUT_WR)
        reader.join()
    sent = HELLO + payload
    assert received[0] == sent + hashlib.sha256(sent).digest()
    end = running.ending()
    assert (end.up, end.down, end.reason) == (len(sent), len(received[0]), "client_closed")


def test_backend_that_ends_first_is_passed_on_and_the_client_may_still_speak(run, serve, flow):
    def handler(sock: socket.socket) -> bytes:
        read_exactly(sock, len(HELLO))
        sock.sendall(b"goodbye")
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)
    far = serve(handler)
    running = run(route(far.address))
    with running.connect(HELLO) as client:
        assert read_all(client) == b"goodbye"
        client.sendall(b"one more thing")
    assert running.ending().reason == "backend_closed"
    assert far.result() == b"one more thing"


@pytest.mark.parametrize("pipes", [0, 2, 32], ids=["no pipe to lend", "two pipes", "pipes for all"])
def test_readers_that_stop_cost_no_memory_and_lose_nothing(run, serve, flow, monkeypatch, pipes):
    """Twelve clients ask for 8 MiB each and read nothing; then they read, and all of it is there."""
    monkeypatch.setattr(sniroute_flow, "PIPES_MAX", pipes)
    monkeypatch.setattr(sniroute_flow, "PENDING_MAX", 1 << 19)
    payload = random.Random(8).randbytes(8 << 20)
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(payload)
    running = run(route(serve(handler).address))
    router = running.router
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect(HELLO)) for _ in range(12)]
        wait_until(lambda: len(router.connections) == 12 and all(
            c.state == "open" and c.down.state == "blocked" for c in list(router.connections)), what="all blocked")
        assert router.pipes.pending <= (1 << 19) + sniroute_flow.BULK + 12 * sniroute_flow.CAREFUL
        for client in clients:
            assert hashlib.sha256(read_all(client)).digest() == hashlib.sha256(payload).digest()
    running.ending(12)
    wait_until(lambda: router.pipes.pending == 0)
    assert router.pipes.bulk == sniroute_flow.BULK
    assert router.pipes.made <= max(1, pipes)


def test_backend_that_stops_reading_holds_the_client_back(run, serve, flow):
    """The other direction; when the backend goes on, every byte is there."""
    go = threading.Event()
    def handler(sock: socket.socket) -> bytes:
        go.wait(20)
        return hashlib.sha256(read_all(sock)).digest()
    far = serve(handler)
    running = run(route(far.address))
    payload = random.Random(9).randbytes(1 << 20)
    sent = hashlib.sha256(HELLO)
    with running.connect(HELLO) as client:
        client.settimeout(0.3)
        count = 0
        with contextlib.suppress(TimeoutError):
            while True:
                sent_now = client.send(payload)
                sent.update(payload[:sent_now])
                count += sent_now
                assert count < 1 << 28, "nothing holds the client back"
        go.set()
    assert far.result() == sent.digest()


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_client_that_resets_ends_the_backend_too(run, serve, flow):
    ended = threading.Event()
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(b"x")
        read_all(sock)
        ended.set()
    running = run(route(serve(handler).address))
    client = running.connect(HELLO)
    assert client.recv(1) == b"x"
    reset(client)
    assert running.ending().reason == "client_reset"
    assert ended.wait(10)


def test_backend_that_resets_loses_nothing_it_had_said(run, serve, flow):
    said = threading.Event()
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(b"last words")
        said.wait(10)
        reset(sock)
    running = run(route(serve(handler).address))
    with running.connect(HELLO) as client:
        assert read_exactly(client, 10) == b"last words"
        said.set()
        assert client.recv(1) == b""
    assert running.ending().reason == "backend_reset"


def test_sink_that_breaks_while_full_gives_its_pipe_back(run, serve, flow):
    """The client resets with megabytes on the way to it."""
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        with contextlib.suppress(OSError):
            sock.sendall(bytes(32 << 20))
    running = run(route(serve(handler).address))
    for number in range(1, 4):
        client = running.connect(HELLO)
        wait_until(lambda: [c for c in list(running.router.connections) if c.down and c.down.state == "blocked"])
        reset(client)
        assert running.ending(number).reason in ("client_reset", "backend_closed")
    assert running.router.pipes.pending == 0
    assert running.router.pipes.made <= 2


def test_options_of_the_listener_are_those_of_its_connections(run, serve):
    """Set once, inherited: no system call for each client."""
    running = run(route(serve(answer(b"x")).address))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        connection, = running.router.connections
        for sock in (connection.client, connection.down.source):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert not sock.getblocking()
        assert connection.client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert connection.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # it would end clients that are alive and do not read
            assert connection.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


def test_connection_outlives_the_prelude_deadline(run, echo_server):
    running = run(route(echo_server.address), "--prelude-timeout=100ms")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        wait_until(lambda: not running.router.deadlines.prelude.due)
        with running.connect() as silent:  # its deadline passes meanwhile
            assert silent.recv(1) == b""
        client.sendall(b"still here")
        assert read_exactly(client, 10) == b"still here"


def test_bytes_behind_the_hello_go_first(run, serve):
    """0-RTT data in the segment of the hello, and a large amount of it."""
    far = serve(read_all)
    running = run(route(far.address))
    early = b"\x17\x03\x03\x40\x00" + bytes(16384)
    with running.connect(HELLO + early):
        pass
    assert far.result() == HELLO + early


@pytest.mark.parametrize("size", [1, 7, 200])
def test_hello_in_segments_of_any_size(run, serve, size):
    running = run(route(serve(answer(b"found")).address))
    with running.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(HELLO), size):
            client.send(HELLO[at:at + size])
        assert read_exactly(client, 5) == b"found"


# -- preludes ----------------------------------------------------------------------------------

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 50000 443\r\n"
V2 = sniroute_wire.PROXY_V2 + b"\x21\x11\x00\x0c" + bytes((192, 0, 2, 8, 198, 51, 100, 1)) + struct.pack(">HH", 50001, 443)
V2_LOCAL = sniroute_wire.PROXY_V2 + b"\x20\x00\x00\x07" + b"healthy"


@pytest.mark.parametrize("header, client", [(V1, ("192.0.2.7", 50000)), (V2, ("192.0.2.8", 50001)),
                                            (V2_LOCAL, None)], ids=["v1", "v2", "local"])
def test_proxy_header_is_believed_and_replayed(run, serve, header, client):
    far = serve(read_all)
    running = run(route(far.address))
    with running.connect(header + HELLO):
        pass
    end = running.ending()
    assert end.client == client or client is None and end.client[0] == HOST
    assert far.result() == header + HELLO


@pytest.mark.parametrize("mode, trusted, header, served", [
    ("off", True, b"", True), ("off", True, V1, False), ("off", True, V2, False), ("off", False, V1, False),
    ("auto", True, b"", True), ("auto", True, V1, True), ("auto", True, V2, True), ("auto", True, V2_LOCAL, True),
    ("auto", True, b"PROXY nonsense\r\n", False),
    ("auto", False, b"", True), ("auto", False, V1, False), ("auto", False, V2, False), ("auto", False, V2_LOCAL, False),
    ("required", True, b"", False), ("required", True, V1, True), ("required", True, V2_LOCAL, True),
    ("required", True, V1 + V1, False), ("required", False, b"", False), ("required", False, V1, False),
])
def test_proxy_modes_and_trust(run, serve, mode, trusted, header, served):
    far = serve(answer(b"served", len(header + HELLO)))
    running = run(route(far.address), f"--proxy-protocol={mode}",
                  f"--proxy-from={'127.0.0.0/8' if trusted else '192.0.2.0/24'}")
    with running.connect() as client:
        with contextlib.suppress(OSError):
            client.sendall(header + HELLO)
        if served:
            assert read_exactly(client, 6) == b"served"
        else:
            assert read_all(client) == b""
            assert running.ending().reason in ("proxy", "not_tls")
            assert far.accepted == 0


def postgres_far(reply: bytes, expected: int = 8, then: bytes = b"tls") -> Callable[[socket.socket], None]:
    """A PostgreSQL far end: SSLRequest, its answer, the hello, and something back."""
    def handler(sock: socket.socket) -> None:
        assert read_exactly(sock, expected)[-8:] == ASK_TLS
        sock.sendall(reply)
        if read_exactly(sock, len(HELLO)) == HELLO:
            sock.sendall(then)
            read_all(sock)
    return handler


@pytest.mark.parametrize("header", [b"", V1, V2], ids=["direct", "v1", "v2"])
@pytest.mark.parametrize("gss", [False, True], ids=["", "GSSENCRequest first"])
@pytest.mark.parametrize("together", [True, False], ids=["header with request", "header alone"])
def test_postgres_client_is_answered_at_once_and_routed(run, serve, header, gss, together):
    running = run(route(serve(postgres_far(b"S", len(header) + 8)).address))
    with running.connect() as client:
        if not together:
            client.sendall(header)
            header = b""
        if gss:
            client.sendall(header + ASK_GSS)
            assert read_exactly(client, 1) == b"N"
            header = b""
        client.sendall(header + ASK_TLS)
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_exactly(client, 3) == b"tls"


@pytest.mark.parametrize("reply, says", [(b"N", "does not offer TLS"), (b"E", "answered"), (b"Sx", "answered"),
                                         (b"", "without an answer")],
                         ids=["no TLS", "an error", "more than S", "end"])
def test_postgres_backend_that_does_not_say_S_gets_no_hello(run, serve, reply, says):
    def handler(sock: socket.socket) -> bytes:
        read_exactly(sock, 8)
        sock.sendall(reply)
        return read_all(sock) if reply else b""
    far = serve(handler)
    running = run(route(far.address))
    with running.connect(ASK_TLS) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_all(client) == alert(80)
    assert says in running.ending().detail
    assert far.result() == b""


def test_postgres_backend_that_is_silent_is_given_up(run, serve, monkeypatch):
    monkeypatch.setattr(sniroute_connection, "GREETING_TIMEOUT", 0.1)
    running = run(route(serve(read_all).address))
    with running.connect(ASK_TLS) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_all(client) == alert(80)
    assert "no answer to SSLRequest" in running.ending().detail


def test_bytes_that_did_not_wait_for_S_are_refused(run, echo_server):
    """They sit in the kernel when the request has been read: 8 bytes, then the rest."""
    running = run(route(echo_server.address))
    with running.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(ASK_TLS + HELLO)
        assert read_all(client) == b""
    assert running.ending().reason == "malformed"
    assert echo_server.accepted == 0


def test_answer_to_a_request_is_not_sent_to_a_client_that_did_not_wait():
    """The peek before `S`: what came between the read and the answer."""
    ours, theirs = socket.socketpair()
    connection = sniroute_connection.Connection.__new__(sniroute_connection.Connection)
    connection.client = ours
    with ours, theirs:
        ours.setblocking(False)
        connection._answer(b"S")
        assert theirs.recv(1) == b"S"
        theirs.sendall(b"\x16")
        with pytest.raises(sniroute_refusals.Malformed):
            connection._answer(b"S")


STARTUP_PACKET = struct.pack(">II", 20, 3 << 16) + b"user\0me\0\0\0\0\0"


@pytest.mark.parametrize("said, heard, reason", [
    (STARTUP_PACKET, told(Refused("plain_postgres", ""), sniroute_refusals.POSTGRES), "plain_postgres"),
    (ASK_GSS, b"N", "truncated"),
    (struct.pack(">IIII", 16, sniroute_wire.CANCEL_REQUEST, 1, 2), b"", "cancel"),
    (b"GET / HTTP/1.1\r\n\r\n", b"", "not_tls"),
    (b"SSH-2.0-OpenSSH\r\n", b"", "not_tls"),
    (HELLO[:100], alert(50), "truncated"),
    (b"", b"", "truncated"),
    (genuine_hello(None), alert(112), "no_name"),
    (genuine_hello("other.example.com"), alert(112), "no_route"),
    (HELLO.replace(b"db.example.com", b"db.example.c\x1bm"), alert(112), "bad_name"),
    (b"\x16\x03\x01\xff\xff", alert(50), "malformed"),
], ids=["plain startup", "GSSENCRequest", "CancelRequest", "HTTP", "SSH", "half a hello", "nothing", "no name",
        "no route", "escape in the name", "record of 65535 bytes"])
def test_refusals_are_readable_and_counted(run, echo_server, said, heard, reason):
    running = run(route(echo_server.address))
    with running.connect(said) as client:
        if reason == "truncated":
            client.shutdown(socket.SHUT_WR)
        assert read_all(client) == heard
    assert running.ending().reason == reason
    assert running.ending().level == sniroute_refusals.REFUSALS[reason].level
    assert running.counter(reason) == 1
    assert echo_server.accepted == 0


def test_oversized_record_is_refused_at_its_header(run, echo_server):
    """The client stalls; nobody waits for the deadline."""
    running = run(route(echo_server.address))
    with running.connect(b"\x16\x03\x01\xff\xff") as client:
        assert read_all(client) == alert(50)
    assert running.ending().seconds < 5


def test_no_name_ok_is_for_debugging(run, echo_server):
    running = run(route(echo_server.address), "--no-name=ok")
    with running.connect(genuine_hello(None)) as client:
        assert read_all(client) == b"OK\n"


def test_alert_is_read_though_the_client_goes_on_talking(run, echo_server):
    """Unread bytes at the close would reset the connection under the alert."""
    running = run(route(echo_server.address))
    with running.connect(genuine_hello("other.example.com") + bytes(100_000)) as client:
        assert read_all(client) == alert(112)


def test_client_that_never_reads_its_alert_is_let_go(run, echo_server, monkeypatch):
    monkeypatch.setattr(sniroute_connection, "LINGER", 0.1)
    running = run(route(echo_server.address))
    with running.connect(genuine_hello("other.example.com")) as client:
        running.ending()
        assert client.recv(7) == alert(112)


@pytest.mark.parametrize("prefix", [1, 5, 8, len(V1), len(V1) + 4, len(V1) + 8, len(V1) + 8 + 60])
def test_stall_after_any_part_of_the_prelude_ends_at_the_one_deadline(run, echo_server, prefix):
    """PROXY header, SSLRequest, hello: the deadline runs from accept, whatever is answered."""
    whole = V1 + ASK_TLS + HELLO
    running = run(route(echo_server.address), "--prelude-timeout=200ms")
    with running.connect(whole[:min(prefix, len(V1) + 8)]) as client:
        if prefix > len(V1) + 8:
            assert read_exactly(client, 1) == b"S"
            client.sendall(whole[len(V1) + 8:prefix])
        assert read_all(client) in (b"", b"S", alert(50))
    end = running.ending()
    assert end.reason == "prelude_timeout"
    assert 0.19 < end.seconds < 5


def test_drip_does_not_renew_the_deadline(run, echo_server):
    running = run(route(echo_server.address), "--prelude-timeout=300ms")
    with running.connect() as client:
        with contextlib.suppress(OSError):
            for at in range(len(HELLO) - 1):
                client.send(HELLO[at:at + 1])
                if running.endings:
                    break
                threading.Event().wait(0.02)
    assert running.ending().reason == "prelude_timeout"


def test_half_hellos_do_not_hold_up_the_others(run, serve):
    """300 clients say half a hello and stop: others are served, and all 300 end at the deadline."""
    running = run(route(serve(answer(b"served")).address), "--prelude-timeout=2s")
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(running.connect(HELLO[:200])) for _ in range(300)]
        wait_until(lambda: len(running.router.deadlines.prelude.due) == 300)
        for _ in range(20):
            with running.connect(HELLO) as client:
                assert read_exactly(client, 6) == b"served"
        assert running.counter("prelude_timeout") == 0
        for client in stalled:
            assert read_all(client) == alert(50)
    wait_until(lambda: running.counter("prelude_timeout") == 300)


# -- limits ------------------------------------------------------------------------------------


def test_oldest_prelude_goes_when_there_are_too_many(run, echo_server, monkeypatch):
    monkeypatch.setattr(sniroute_connection, "PRELUDES_MAX", 5)
    running = run(route(echo_server.address))
    with contextlib.ExitStack() as stack:
        silent = []
        for number in range(8):
            silent.append(stack.enter_context(running.connect()))
            wait_until(lambda: running.counter("accepted") == number + 1)
        for client in silent[:3]:
            assert client.recv(1) == b""
        assert running.counter("shed") == 3
        silent[-1].sendall(HELLO)
        assert read_exactly(silent[-1], len(HELLO)) == HELLO


def test_clients_are_limited_by_address_and_a_balancer_is_not_one_client(run, echo_server):
    running = run(route(echo_server.address), "--max-per-client=2")
    with contextlib.ExitStack() as stack:
        def from_address(last: int) -> bytes:
            client = stack.enter_context(running.connect(V1.replace(b"192.0.2.7", b"192.0.2.%d" % last) + HELLO))
            return client.recv(1)
        for last in (1, 1, 2, 2):
            assert from_address(last) == b"P"
        assert from_address(1) == alert(80)[:1]
        assert from_address(3) == b"P"
        for _ in range(4):  # loopback itself is exempt
            client = stack.enter_context(running.connect(HELLO))
            assert client.recv(1) == HELLO[:1]
    wait_until(lambda: running.counter("client_limit") == 1)


def test_client_over_its_limit_is_closed_at_accept(run, echo_server, monkeypatch):
    running = run(route(echo_server.address), "--max-per-client=1")
    running.router.peers.known[HOST] = sniroute_router.Peer("192.0.2.9", "refuse", False, False)
    with running.connect(HELLO) as first:
        assert first.recv(1) == HELLO[:1]
        with running.connect() as second:
            assert second.recv(1) == b""
    running.ending(2)
    assert running.counter("client_limit") == 1


def test_accepting_stops_at_max_connections_and_goes_on(run, serve, caplog):
    running = run(route(serve(answer(b"x")).address), "--max-connections=3")
    with contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(running.connect(HELLO)) for _ in range(3)]
        for client in open_ones:
            assert client.recv(1) == b"x"
        late = stack.enter_context(running.connect(HELLO))
        wait_until(lambda: running.router.paused)
        open_ones[0].close()
        assert late.recv(1) == b"x"
    assert sum("not accepting" in r.message for r in caplog.records) == 1


def test_accepting_goes_on_when_a_deadline_made_the_room(run, serve):
    """Refused clients linger and are closed by the clock: nothing else would wake the listener."""
    running = run(route(serve(answer(b"x")).address), "--max-connections=3")
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            assert stack.enter_context(running.connect(HELLO)).recv(1) == b"x"
        refused = stack.enter_context(running.connect(genuine_hello("other.example.com")))
        assert read_exactly(refused, 7) == alert(112)
        late = stack.enter_context(running.connect(HELLO))
        wait_until(lambda: running.router.paused)
        assert late.recv(1) == b"x"


def test_drain_ends_when_a_deadline_ends_the_last_connection(run, echo_server):
    running = run(route(echo_server.address), "--prelude-timeout=200ms")
    with running.connect():
        wait_until(lambda: running.router.connections)
        running.router.drain(3600)
        running.thread.join(10)
        assert not running.thread.is_alive()


def test_listener_event_of_the_turn_that_drains_is_ignored(run, echo_server):
    running = run(route(echo_server.address))
    router = running.router
    router.call(lambda: (router._drain(0.2), router._accept(router.listeners[0], sniroute_loop.READ)))
    running.thread.join(10)
    assert not running.thread.is_alive() and not router.paused


def test_descriptors_for_the_backend_that_run_out_are_not_the_tunnels_fault(run, serve, cloudflared, ports, monkeypatch):
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    running.ending()
    def none_left(*_: Any) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")
    with running.connect() as client:
        wait_until(lambda: len(running.router.connections) == 1)
        fake = types.SimpleNamespace(**{**vars(socket), "SocketType": none_left})
        with monkeypatch.context() as patch:
            patch.setattr(sniroute_routes, "socket", fake)
            client.sendall(HELLO)
            assert read_all(client) == alert(80)
    wait_until(lambda: [end for end in running.endings if end.reason == "busy"])
    assert len(cloudflared.starts()) == 1


def test_descriptors_that_run_out_pause_accepting_and_do_not_spin(run, serve, caplog, monkeypatch):
    """accept() fails with EMFILE: one log line, no spinning, and all is well when there are some again."""
    running = run(route(serve(answer(b"x")).address))
    calls, broken = [], threading.Event()
    broken.set()
    class Listener:
        """The real one, but for accept."""
        def __init__(self, real: socket.socket):
            self.real = real
        def accept(self) -> Any:
            calls.append(1)
            if broken.is_set():
                raise OSError(errno.EMFILE, "Too many open files")
            return self.real.accept()
        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)
    router = running.router
    def swap() -> None:
        router.loop.poller.forget(router.listeners[0].fileno())
        router.listeners[0] = Listener(router.listeners[0])
        router._resume()
    router.call(swap)
    wait_until(lambda: isinstance(router.listeners[0], Listener))
    with running.connect(HELLO) as client:
        wait_until(lambda: len(calls) >= 3)
        assert len(calls) < 50
        broken.clear()
        assert client.recv(1) == b"x"
    assert sum("not accepting" in r.message for r in caplog.records) == 1


def test_silent_clients_of_one_turn_are_shed_at_the_other_listener_too(run):
    """They have been accepted and not been read yet, when the second listener finds the table full."""
    running = run(route((HOST, 9)), f"--listen={HOST}:0", "--max-connections=8")
    router, held = running.router, threading.Event()
    addresses = [listener.getsockname() for listener in router.listeners]
    router.call(lambda: held.wait(20))
    with contextlib.ExitStack() as stack:
        for address in [addresses[0]] * 8 + [addresses[1]]:
            stack.enter_context(socket.create_connection(address, 20))
        held.set()
        with running.connect(genuine_hello("nope.example.org")) as client:
            assert read_all(client) == alert(112)
    assert router.counters.get("shed", 0) >= 1 and not router.paused


def test_a_deadline_that_another_one_sets_is_not_forgotten():
    """What is due in a later queue may put an item into an earlier one."""
    loop = sniroute_loop.Loop(lambda owner: None)
    try:
        earlier = loop.queue(60, lambda item: None)
        later = loop.queue(0, earlier.put)
        loop.next_check = time.monotonic() + 3600
        later.put("item")
        loop.turn()
        assert list(earlier.due) == ["item"] and not later.due
        assert loop.next_check <= earlier.due["item"]
    finally:
        loop.close()


def unresolved(go: threading.Event) -> Callable[..., Any]:
    """A getaddrinfo that does not find example.com, and takes until `go` to find out."""
    real = socket.getaddrinfo
    def getaddrinfo(host: str, *rest: Any, **options: Any) -> Any:
        if not host.endswith(".example.com"):
            return real(host, *rest, **options)
        go.wait(20)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return getaddrinfo


def test_threads_for_names_that_wait_are_started_one_in_a_turn(run, monkeypatch):
    """Each start waits for the interpreter, and with it all who are served."""
    turns, starts, go = [], [], threading.Event()
    real = sniroute_loop.EpollPoller.poll
    monkeypatch.setattr(sniroute_loop.EpollPoller, "poll", lambda self, timeout: turns.append(1) or real(self, timeout))
    running = run("--route=*.example.com=tcp:{name}:443", "--max-per-client=100")
    monkeypatch.setattr(socket, "getaddrinfo", unresolved(go))
    process = running.router.process_request
    running.router.process_request = lambda *wait: starts.append(len(turns)) or process(*wait)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(20)]
        wait_until(lambda: len(running.router.connections) == 20)
        held = threading.Event()
        running.router.call(lambda: held.wait(20))
        for number, client in enumerate(clients):
            client.sendall(genuine_hello(f"n{number}.example.com"))
        held.set()
        wait_until(lambda: len(starts) == 20)
        assert len(set(starts)) == 20
        go.set()
        running.ending(20)


def test_who_leaves_while_its_name_waits_for_a_thread_is_forgotten(run, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(sniroute_router, "WAIT_THREADS", 1)
    router = (running := run("--route=*.example.com=tcp:{name}:443")).router
    monkeypatch.setattr(socket, "getaddrinfo", unresolved(go))
    with running.connect(genuine_hello("first.example.com")):
        wait_until(lambda: router.waits.threads == 1)
        with running.connect(genuine_hello("second.example.com")):
            wait_until(lambda: len(router.waits.queued) == 1)
        wait_until(lambda: len(router.connections) == 1)
        assert not router.waits.queued and len(router.waits.by_key) == 1
        go.set()
        running.ending(2)


def test_a_connect_under_way_may_also_be_told_as_bsd_does(run, serve, deaf, monkeypatch):
    """There, send() on a socket that still connects is ENOTCONN."""
    class Bsd(socket.SocketType):
        def send(self, *said: Any) -> int:
            try:
                return super().send(*said)
            except BlockingIOError:
                raise OSError(errno.ENOTCONN, "Socket is not connected") from None
    monkeypatch.setattr(socket, "SocketType", Bsd)
    monkeypatch.setattr(sniroute_connection, "CONNECT_TIMEOUT", 0.1)
    running = run(route(deaf))
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert "no answer to the connect" in str(running.ending().detail)


def test_a_flow_that_has_much_to_move_is_spliced_and_goes_back_to_messages(run, echo_server):
    if not sniroute_flow.can_splice():
        pytest.skip("no splice here")
    running = run(route(echo_server.address))
    payload = random.Random(4).randbytes(1 << 20)
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        [connection] = running.router.connections
        for size in (1, sniroute_flow.MESSAGE - 1, sniroute_flow.MESSAGE, sniroute_flow.MESSAGE + 1, 1 << 20, 1, 64):
            sender = threading.Thread(target=client.sendall, args=(payload[:size],))
            sender.start()
            assert read_exactly(client, size) == payload[:size]
            sender.join()
            assert connection.up.state in ("open", "bulky")
            if size == sniroute_flow.MESSAGE:
                assert connection.up.state == "bulky"
        assert connection.up.state == connection.down.state == "open"
    assert running.ending().up == len(HELLO) + 3 * sniroute_flow.MESSAGE + (1 << 20) + 66


def way(flow: sniroute_flow.Flow) -> str:
    """How it moves bytes: its state, or `small` where it reads little at a time."""
    return "small" if flow.state == "open" and flow.size == sniroute_flow.SMALL_READ else flow.state


def test_a_flow_of_small_messages_makes_small_reads_until_there_is_a_larger_one(run, echo_server, flow):
    running = run(route(echo_server.address))
    payload = random.Random(5).randbytes(1 << 18)
    def say(client: socket.socket, size: int) -> str:
        sender = threading.Thread(target=client.sendall, args=(payload[:size],))
        sender.start()
        assert read_exactly(client, size) == payload[:size]
        sender.join()
        return way(connection.up)
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        [connection] = running.router.connections
        for larger in (sniroute_flow.SMALL_READ, sniroute_flow.SMALL_READ + 1, sniroute_flow.MESSAGE - 1, len(payload)):
            say(client, sniroute_flow.SMALL_READ)  # counting begins
            for _ in range(sniroute_flow.SMALL_AFTER - 1):
                assert say(client, 64) == "open"
            assert say(client, 64) == say(client, sniroute_flow.SMALL_READ - 1) == say(client, 1) == "small"
            assert say(client, larger) != "small"
            say(client, sniroute_flow.MESSAGE - 1)  # nor bulky
        for _ in range(2):  # it is counted from the beginning, each time
            states = [say(client, size) for size in [64] * sniroute_flow.SMALL_AFTER + [sniroute_flow.SMALL_READ]]
            assert states == ["open"] * (sniroute_flow.SMALL_AFTER - 1) + ["small", "open"]
    assert running.ending().down == running.ending().up


def test_flow_of_small_messages_goes_on_while_the_other_direction_is_blocked(run, serve, flow):
    """Its client does not read a download, and speaks: in small messages, larger ones, small ones."""
    download = random.Random(6).randbytes(8 << 20)
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    def server(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sender = threading.Thread(target=sock.sendall, args=(download,))
        sender.start()
        while data := sock.recv(65536):
            heard.put(data)
        sender.join()
    running = run(route(serve(server).address))
    with socket.socket() as client:
        client.settimeout(20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(running.address)
        client.sendall(HELLO)
        wait_until(lambda: running.router.connections)
        connection, = running.router.connections
        wait_until(lambda: connection.down is not None and connection.down.state is sniroute_flow.BLOCKED)
        up = connection.up
        def say(size: int) -> str:
            data, got = random.Random(size).randbytes(size), b""
            client.sendall(data)
            while len(got) < size:
                got += heard.get(timeout=20)
            assert got == data
            turned = threading.Event()
            running.router.call(turned.set)
            assert turned.wait(20)  # the server hears of a message before the loop is done with it
            return way(up)
        def chat() -> None:
            states = [say(64) for _ in range(sniroute_flow.SMALL_AFTER + 1)]
            assert states[-1] == "small" and connection.down.state == "blocked"
        for larger in (sniroute_flow.SMALL_READ, sniroute_flow.MESSAGE - 1, 70_000):
            chat()
            assert say(larger) != "small"
        chat()
        assert read_exactly(client, len(download)) == download
        assert say(64) == "small"
    running.ending()


def test_flow_of_small_messages_whose_sink_is_full_waits_and_goes_on(run, serve, flow, monkeypatch):
    """Small messages to a server that does not read: all arrive, in order, once it does."""
    held, hold = [], sniroute_flow.Flow.hold
    monkeypatch.setattr(sniroute_flow.Flow, "hold", lambda self, rest: (held.append(way(self)), hold(self, rest)))
    go = threading.Event()
    def server(sock: socket.socket) -> bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert read_exactly(sock, len(HELLO)) == HELLO
        sock.sendall(b"!")
        go.wait(20)
        heard = hashlib.sha256(read_all(sock)).digest()
        sock.sendall(b"all")
        return heard
    far = serve(server)
    running = run(route(far.address))
    said = hashlib.sha256()
    with running.connect(HELLO) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert client.recv(1) == b"!"
        connection, = running.router.connections
        up = connection.up
        def say(size: int) -> None:
            data, before = random.Random(up.total).randbytes(size), up.total
            client.sendall(data)
            said.update(data)
            wait_until(lambda: up.total > before or held)
        while way(up) != "small":
            say(64)
        connection.down.source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        while not held:
            say(sniroute_flow.SMALL_READ - 1)
        assert held == ["small"]
        go.set()
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"all"
    assert far.result() == said.digest() and running.ending().reason == "client_closed"


@pytest.mark.parametrize("fault", ["nothing to read", "client resets", "sink is full", "sink is gone"])
def test_flow_of_small_messages_meets_what_any_flow_does(run, serve, fault, caplog):
    def server(sock: socket.socket) -> bytes:
        assert read_exactly(sock, len(HELLO)) == HELLO
        sock.sendall(b"!")
        assert go.wait(20)
        heard = read_all(sock)
        if fault != "client resets":
            sock.sendall(b"bye")
        return heard
    go, prepared = threading.Event(), threading.Event()
    far = serve(server)
    running = run(route(far.address))
    with running.connect(HELLO) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert client.recv(1) == b"!"
        connection, = running.router.connections
        up, filled = connection.up, 0
        while way(up) != "small":
            before = up.total
            client.sendall(b"x")
            wait_until(lambda: up.total > before)
        said = up.total - len(HELLO)
        def prepare() -> None:
            nonlocal filled
            if fault == "nothing to read":
                up.pump(sniroute_loop.READ)
            elif fault == "sink is gone":
                connection.down.source.shutdown(socket.SHUT_WR)
            elif fault == "sink is full":
                with contextlib.suppress(BlockingIOError):
                    while True:
                        filled += os.write(connection.down.fd, b"x" * 4096)
            prepared.set()
        running.router.call(prepare)
        assert prepared.wait(20)
        if fault == "client resets":
            reset(client)
        else:
            client.sendall(b"x")
            wait_until(lambda: up.total == len(HELLO) + said + 1)
            if fault == "sink is gone":
                wait_until(lambda: up.state is sniroute_flow.DONE)
            client.shutdown(socket.SHUT_WR)
        go.set()
        if fault != "client resets":
            assert read_all(client) == b"bye"
    reason = running.ending().reason
    assert reason == ("client_reset" if fault == "client resets" else "client_closed")
    if fault != "client resets":
        assert far.result() == b"x" * (said + filled + (fault != "sink is gone"))
    assert running.router.pipes.pending == 0 and "a fault" not in caplog.text


def test_a_flow_without_splice_reads_less_from_the_moment_that_much_is_kept(run, serve, monkeypatch):
    """65536 bytes at a time, and 16384 while many clients do not read."""
    monkeypatch.setattr(sniroute_flow, "can_splice", lambda: False)
    asked: list[tuple[int, int]] = []
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: asked.append((fd, size)) or real(fd, size))
    def talk(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(bytes(1 << 20))
    running = run(route(serve(talk).address))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"\0"
        connection, = running.router.connections
        source = connection.down.fd
        def sizes() -> set[int]:
            read_exactly(client, 1 << 20)
            return {size for fd, size in asked if fd == source}
        wait_until(lambda: sniroute_flow.READ_MAX in sizes())
        held = threading.Event()
        def congest() -> None:
            running.router.pipes.keep(sniroute_flow.PENDING_MAX)
            asked.clear()
            held.set()
        running.router.call(congest)
        assert held.wait(20)
        wait_until(lambda: sniroute_flow.CAREFUL in sizes())
        assert max(sizes()) == sniroute_flow.CAREFUL
        reset(client)
    running.ending()


def test_connections_of_a_turn_take_each_step_together(run, serve):
    """Three that come in one turn: all are read, then all dial, then all speak."""
    running = run(route(serve(answer(b"x")).address))
    router, taken = running.router, []
    def noted(step: Callable[..., None]) -> Callable[..., None]:
        def take(connection: sniroute_connection.Connection, *args: Any) -> None:
            taken.append(step.__name__)
            step(connection, *args)
        return take
    router.loop.batches[:] = [(waiting, noted(step)) for waiting, step in router.loop.batches]
    held, go = threading.Event(), threading.Event()
    router.call(lambda: (held.set(), go.wait(20)))
    assert held.wait(20)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect(HELLO)) for _ in range(3)]
        go.set()
        assert [client.recv(1) for client in clients] == [b"x"] * 3
    assert taken[:9] == ["on_prelude"] * 3 + ["dial"] * 3 + ["speak"] * 3


@pytest.mark.parametrize("step", ["go_on", "_connect"])
def test_connection_that_ends_between_two_steps_of_a_turn_takes_no_further_one(run, echo_server, monkeypatch, step):
    running = run(route(echo_server.address))
    real = getattr(sniroute_connection.Connection, step)
    monkeypatch.setattr(sniroute_connection.Connection, step, lambda self, *why: (real(self, *why), self.close("shed")))
    with running.connect(HELLO) as client:
        assert read_all(client) == b""
    assert running.ending().reason == "shed" and running.ending().up == 0
    wait_until(lambda: not running.router.to_dial and not running.router.to_speak)


@pytest.mark.parametrize("early", [b"", b"0-RTT"])
def test_backend_with_nagle_does_not_wait_between_two_small_writes(run, serve, early):
    """Its kernel keeps the second until the first is acknowledged, so that ACK must not be one that Linux delays."""
    def server(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO) + len(early))
        sock.sendall(b"a")
        sock.sendall(b"b")
        read_all(sock)
    running = run(route(serve(server).address))
    took = []
    for number in range(5):
        began = time.monotonic()
        with running.connect(HELLO) as client:
            if early:
                wait_until(lambda: [each.state for each in running.router.connections] == ["open"])
                client.sendall(early)
            assert read_exactly(client, 2) == b"ab"
            took.append(time.monotonic() - began)
        running.ending(number + 1)
    assert min(took) < 0.04  # Linux delays an ACK for so long at least


def test_callback_bears_being_called_for_nothing(run, serve, caplog):
    """epoll reports a socket that is closed here and held by a child between fork and exec."""
    running = run(route(serve(answer(b"x")).address))
    def call_all(connection: sniroute_connection.Connection, flows: tuple[sniroute_flow.Flow, ...]) -> None:
        for mask in (sniroute_loop.READ, sniroute_loop.WRITE, sniroute_loop.READ | sniroute_loop.WRITE | 16):  # EPOLLHUP
            for name in ("on_prelude", "on_waiting", "speak", "on_greeting", "on_linger"):
                getattr(connection, name)(mask)
            for flow in flows:
                running.router.loop.poller.callbacks[flow.fd](mask), flow.ready(mask)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        connection, = running.router.connections
        flows = connection.up, connection.down
        running.router.call(lambda: call_all(connection, flows))
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
    assert running.ending().reason == "client_closed"
    done = threading.Event()
    callbacks = running.router.loop.poller.callbacks
    assert [callbacks[flow.fd] for flow in flows] == [sniroute_loop.ignore] * 2
    running.router.call(lambda: (call_all(connection, flows), done.set()))
    assert done.wait(20) and "please report it" not in caplog.text and len(running.endings) == 1


def test_tunnels_backend_tells_a_connect_that_is_not_over_from_one_that_failed(deaf, free_ports):
    def backend(address: Address) -> sniroute_routes.Backend:
        child = types.SimpleNamespace(alive=lambda: True, address=address)
        return sniroute_routes.TunnelBackend(None, "", None, types.SimpleNamespace(child=child), child)
    with socket.socket() as server:
        server.setblocking(False)
        assert server.connect_ex(deaf) == errno.EINPROGRESS
        with pytest.raises(BlockingIOError):
            backend(deaf).connected(server)
    nobody = HOST, free_ports(1)[0]
    with socket.socket() as server:
        server.setblocking(False)
        server.connect_ex(nobody)
        with pytest.raises(ConnectionRefusedError):
            backend(nobody).connected(server)


def test_peers_are_forgotten_when_there_are_many(run, echo_server, monkeypatch):
    monkeypatch.setattr(sniroute_router, "PEERS_MAX", 10)
    running = run(route(echo_server.address))
    router = running.router
    for last in range(200):
        router.peers.find(f"198.51.100.{last}")
    assert len(router.peers.known) <= 11
    one, other = router.peers.find("2001:db8::1"), router.peers.find("2001:db8::2")
    assert one is other, "a /64 is one client"
    assert router.peers.find("::ffff:198.51.100.9").key == "198.51.100.9"
    assert router.peers.find("fe80::1%lo").key


# -- tcp targets -------------------------------------------------------------------------------


def test_host_name_is_resolved_once_and_kept(run, serve, monkeypatch):
    far = serve(answer(b"x"))
    asked = []
    real = socket.getaddrinfo
    def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        return real(host, *args, **kwargs)
    running = run(f"--route=db.example.com=tcp:localhost:{far.address[1]}")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for _ in range(3):
        with running.connect(HELLO) as client:
            assert client.recv(1) == b"x"
    assert asked.count("localhost") == 1


def test_host_that_does_not_resolve_is_refused_with_its_reason(run):
    running = run("--route=db.example.com=tcp:nothing.invalid:1")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "unresolved"
    assert "nothing.invalid" in running.ending().detail


def test_resolver_that_is_down_for_a_moment_cuts_nobody(run, serve, monkeypatch):
    far = serve(answer(b"x"))
    monkeypatch.setattr(sniroute_routes, "RESOLVED_FOR", 0.0)
    running = run(f"--route=db.example.com=tcp:localhost:{far.address[1]}")
    monkeypatch.setattr(sniroute_connection, "PARKS_MAX", 10**9)
    monkeypatch.setattr(sniroute_routes, "RESOLVED_FOR", 0.2)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    wait_until(lambda: all(found.until < time.monotonic() for found in running.router.targets.resolved.values()))
    def broken(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", broken)
        with socket.socket() as client:  # create_connection would resolve
            client.settimeout(20)
            client.connect(running.address)
            client.sendall(HELLO)
            assert client.recv(1) == b"x"


def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


def test_next_address_is_tried_and_the_last_failure_is_told(run, serve, monkeypatch):
    far = serve(answer(b"x"))
    shut = closed_port()
    running = run(route((HOST, shut)), route(far.address, "two.example.com"))
    good = (socket.AF_INET, far.address)
    bad = (socket.AF_INET, (HOST, shut))
    running.router.targets.resolved[f"two.example.com=tcp:{HOST}:{far.address[1]}"] = Resolved((bad, good), False, NEVER)
    with running.connect(genuine_hello("two.example.com")) as client:
        assert client.recv(1) == b"x"
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    end, = wait_until(lambda: [end for end in running.endings if end.reason == "backend"])
    assert "refused" in end.detail


def test_connect_without_an_answer_times_out(run, monkeypatch, deaf):
    monkeypatch.setattr(sniroute_connection, "CONNECT_TIMEOUT", 0.2)
    running = run(route(deaf))
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert "no answer to the connect" in running.ending().detail


def test_next_address_is_tried_when_the_first_does_not_answer(run, serve, monkeypatch, deaf):
    monkeypatch.setattr(sniroute_connection, "CONNECT_TIMEOUT", 0.2)
    far = serve(answer(b"x"))
    running = run(route((HOST, 9)))
    addresses = tuple((socket.AF_INET, address) for address in (deaf, far.address))
    running.router.targets.resolved[f"db.example.com=tcp:{HOST}:9"] = Resolved(addresses, True, NEVER)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"


def test_client_that_leaves_during_the_connect_is_noticed(run, deaf):
    running = run(route(deaf))
    running.connect(HELLO).close()
    assert running.ending().reason == "client_left"


@pytest.mark.parametrize("pattern, target, address, allowed", [
    ("*", "tcp:{name}:443", ("10.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("127.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("fd00::1", 443), False),
    ("*", "tcp:{name}:443", ("8.8.8.8", 443), True),
    ("*", "tcp:10.0.0.1:443", ("10.0.0.1", 443), True),
    ("*.example.com", "tcp:{name}:443", ("10.0.0.1", 443), True),
    ("*.example.com", "tcp:{label}:443", ("10.0.0.1", 443), False),
    ("*.example.com", "tcp:{label}.internal.example.net:443", ("10.0.0.1", 443), True),
])
def test_stranger_cannot_point_a_name_at_the_private_network(run, pattern, target, address, allowed):
    running = run(f"--route={pattern}={target}")
    decision = running.router.routes.decide("a.example.com")
    assert running.router.targets.may_dial(decision, address) is allowed


@pytest.mark.parametrize("label", ["2130706433", "0x7f000001", "017700000001", "0"])
def test_number_is_no_host(run, label):
    """A resolver takes it for an address."""
    running = run("--route=*.example.com=tcp:{label}:443")
    with running.connect(genuine_hello(f"{label}.example.com")) as client:
        assert read_all(client) == alert(112)
    assert running.ending().reason == "bad_name"


def test_router_that_listens_everywhere_knows_its_addresses(run):
    running = run("--route=db.example.com=tcp:localhost:1")
    decision = running.router.routes.decide("db.example.com")
    running.router.targets.own = [("::", 19000)]
    for address in ("127.0.0.1", "127.0.0.2", "::1", "0.0.0.0", "::ffff:127.0.0.1", "::"):
        assert not running.router.targets.may_dial(decision, (address, 19000)), address
    assert running.router.targets.may_dial(decision, ("127.0.0.1", 19001))
    assert running.router.targets.may_dial(decision, ("192.0.2.1", 19000))


def test_router_does_not_dial_itself(run):
    running = run("--route=db.example.com=tcp:localhost:1")
    decision = running.router.routes.decide("db.example.com")
    assert not running.router.targets.may_dial(decision, running.address)
    assert running.router.targets.may_dial(decision, (HOST, 1))
    with pytest.raises(sniroute_refusals.SettingsError, match="leads back"):
        sniroute_settings.load_settings(["--listen=127.0.0.1:19999", "--route=a.example.com=tcp:127.0.0.1:19999"], {})


def test_forbidden_address_is_refused(run, monkeypatch):
    running = run("--route=*=tcp:{name}:443")
    private = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", 443))]
    with running.connect() as client:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: private)
        client.sendall(HELLO)
        assert read_all(client) == alert(112)
    assert running.ending().reason == "forbidden"


def test_own_name_needs_a_route_of_its_own(run, echo_server):
    running = run(route(echo_server.address, "*"), route(echo_server.address, "own.example.com"))
    running.router.own_names |= {"db.example.com", "own.example.com"}
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(112)
    own = genuine_hello("own.example.com")
    with running.connect(own) as client:
        assert read_exactly(client, len(own)) == own


# -- tunnels -----------------------------------------------------------------------------------

DB = "cloudflared:db.example.com"
TUNNEL = "--route=*=cloudflared:{name}"


@pytest.fixture
def ports(free_ports) -> str:
    first, last = free_ports(30)
    return f"--ports={first}-{last}"


def test_cold_name_starts_its_tunnel_and_idle_stops_it(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports, "--idle=300ms")
    for _ in range(2):
        with running.connect(HELLO) as client:
            assert client.recv(1) == b"x"
    assert len(cloudflared.starts()) == 1
    wait_until(lambda: not running.tunnels.snapshot(), what="the idle stop")
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    assert len(cloudflared.starts()) == 2


def crowd(running: Running, hellos: list[bytes]) -> None:
    """All at once: connect, say hello; then everybody has the echo."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect(hello)) for hello in hellos]
        for client, hello in zip(clients, hellos, strict=True):
            assert read_exactly(client, len(hello)) == hello


def test_thousand_clients_of_one_cold_name_start_one_child(run, cloudflared, ports, single_loop_echo):
    cloudflared.far("*", single_loop_echo)
    cloudflared.fault("*", listen_delay=300)
    running = run(TUNNEL, ports)
    crowd(running, [HELLO] * 1000)
    assert len(cloudflared.starts()) == 1
    running.ending(1000)
    assert {end.reason for end in running.endings} == {"client_closed"}
    assert running.router.waits.threads == 0


def test_many_cold_names_start_a_few_at_a_time_and_all_are_answered(run, cloudflared, single_loop_echo, free_ports):
    cloudflared.far("*", single_loop_echo)
    for n in range(4):  # however slow this machine is, these are under way together
        cloudflared.fault(f"n{n}.example.com", listen_delay=1000)
    first, last = free_ports(120)
    running = run(TUNNEL, f"--ports={first}-{last}", "--max-tunnels=120", "--start-timeout=60s")
    seen = []
    enter = running.tunnels._enter
    def watching(tunnel: Any, state: str) -> None:
        enter(tunnel, state)
        seen.append(sum(t.state == "starting" for t in running.tunnels.tunnels.values()))
    running.tunnels._enter = watching
    crowd(running, [genuine_hello(f"n{n}.example.com") for n in range(120)])
    assert max(seen) == 4
    assert len(cloudflared.starts()) == 120


def test_killed_tunnel_is_not_noticed_by_those_who_had_received_nothing(run, serve, cloudflared, ports):
    """It dies under load; clients whose hello it took and did not answer are served by the next."""
    release = threading.Event()
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        release.wait(20)
        sock.sendall(b"x")
        read_all(sock)
    far = serve(handler)
    cloudflared.far("*", far.address)
    running = run(TUNNEL, ports)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect(HELLO)) for _ in range(30)]
        wait_until(lambda: far.accepted == 30)
        os.kill(cloudflared.starts()[0]["pid"], signal.SIGKILL)
        late = stack.enter_context(running.connect(HELLO))
        wait_until(lambda: far.accepted >= 60, what="all of them again")
        release.set()
        for client in [*clients, late]:
            assert client.recv(1) == b"x"
    assert len(cloudflared.starts()) == 2
    assert running.counter("retries") >= 30
    running.ending(31)
    assert sum(view.leases for view in running.tunnels.snapshot()) == 0


def test_answer_without_a_byte_is_tried_once_more(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(answer(b"x")).address)
    cloudflared.fault("*", refuse=1)
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    assert len(cloudflared.clients()) == 2
    end = running.ending()
    assert (end.reason, end.up, end.down) == ("client_closed", len(HELLO), 1)


def test_tunnel_that_never_answers_is_refused_with_its_own_words(run, cloudflared, ports):
    cloudflared.fault("*", refuse=True, error="websocket: bad handshake")
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert len(cloudflared.clients()) == 2
    assert "bad handshake" in running.ending().detail


@pytest.mark.parametrize("said, tries", [(HELLO + b"early data", 1), (HELLO, 2)],
                         ids=["early data behind the hello", "the hello alone"])
def test_only_a_whole_speech_is_said_twice(run, cloudflared, ports, said, tries):
    cloudflared.fault("*", refuse=True)
    running = run(TUNNEL, ports)
    with running.connect(said) as client:
        assert read_all(client) == alert(80)
    assert len(cloudflared.clients()) == tries


def test_postgres_through_a_tunnel_is_retried_too(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(postgres_far(b"S")).address)
    cloudflared.fault("*", refuse=1)
    running = run(TUNNEL, ports)
    with running.connect(ASK_TLS) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_exactly(client, 3) == b"tls"


def test_hung_tunnel_is_found_out_and_restarted(run, serve, cloudflared, ports, monkeypatch):
    """SIGSTOP: its backlog still takes connections, and nobody answers."""
    monkeypatch.setattr(sniroute_connection, "FIRST_BYTE_TIMEOUT", 0.5)
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    pid = cloudflared.starts()[0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    assert len(cloudflared.starts()) == 2


def test_start_that_fails_is_told_and_remembered(run, cloudflared, ports):
    cloudflared.fault("*", exit=0, words="no such flag")
    running = run(TUNNEL, ports)
    for number in (1, 2, 3):
        with running.connect(HELLO) as client:
            assert read_all(client) == alert(80)
        assert running.ending(number).reason == "tunnel_failed"
        assert "no such flag" in running.ending(number).detail
    assert len(cloudflared.starts()) == 1


def test_missing_program_is_named(run, ports):
    running = run(TUNNEL, ports, program="/nonexistent")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert "/nonexistent is not there" in running.ending().detail


def test_client_that_leaves_while_it_waits_is_noticed(run, cloudflared, ports):
    cloudflared.fault("*", never_listen=True)
    running = run(TUNNEL, ports)
    first = running.connect(HELLO)
    with running.connect(HELLO) as second:
        wait_until(lambda: len(running.router.connections) == 2 and cloudflared.starts())
        first.close()
        assert running.ending().reason == "client_left"
        assert len(running.router.waits.by_key["*=" + DB].connections) == 1
        reset(second)
        assert running.ending(2).reason == "client_left"


def test_client_that_goes_on_talking_while_it_waits_loses_nothing(run, serve, cloudflared, ports):
    """What does not fit waits in the kernel, not in memory."""
    far = serve(read_all)
    cloudflared.far("*", far.address)
    cloudflared.fault("*", listen_delay=500)
    running = run(TUNNEL, ports)
    more = random.Random(3).randbytes(200_000)
    with running.connect(HELLO) as client:
        wait_until(lambda: running.router.waits.by_key)
        client.sendall(more)
        wait_until(lambda: [c for c in list(running.router.connections) if not c.up.watched])
        assert max(len(c.hello) for c in running.router.connections) <= 2 * sniroute_wire.HELLO_WIRE_MAX
    assert far.result() == HELLO + more


def test_start_that_takes_too_long_is_refused(run, cloudflared, ports):
    cloudflared.fault("*", never_listen=True)
    running = run(TUNNEL, ports, "--start-timeout=500ms")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason in ("tunnel_timeout", "tunnel_failed")


def test_resolver_that_hangs_holds_nobody_for_ever(run, monkeypatch):
    release = threading.Event()
    running = run("--route=db.example.com=tcp:slow.example.net:1", "--start-timeout=100ms")
    monkeypatch.setattr(running.router.deadlines.parked, "seconds", 0.3)
    with running.connect() as client:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and [])
        client.sendall(HELLO)
        assert read_all(client) == alert(80)
    assert "its address" in running.ending().detail
    monkeypatch.undo()
    release.set()
    wait_until(lambda: not running.router.waits.by_key)


def test_client_that_was_refused_while_it_waited_is_not_dialled_later(run, echo_server, monkeypatch):
    """It still reads its alert when the target is ready at last."""
    monkeypatch.setattr(sniroute_connection, "LINGER", 5.0)
    release = threading.Event()
    running = run(f"--route=db.example.com=tcp:slow.example.net:{echo_server.address[1]}")
    monkeypatch.setattr(running.router.deadlines.parked, "seconds", 0.1)
    found = socket.getaddrinfo(*echo_server.address, type=socket.SOCK_STREAM)
    with running.connect() as client:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and found)
        client.sendall(HELLO)
        assert read_exactly(client, 7) == alert(80)
        release.set()
        wait_until(lambda: not running.router.waits.by_key)
        assert [c.state for c in running.router.connections] == ["lingering"]
        assert echo_server.accepted == 0


def test_names_that_wait_are_bounded(run, cloudflared, ports, monkeypatch):
    """Two threads, three names: the third waits for a thread, a fourth is refused."""
    monkeypatch.setattr(sniroute_router, "WAIT_THREADS", 2)
    monkeypatch.setattr(sniroute_router, "WAITS_MAX", 3)
    cloudflared.fault("*", listen_delay=400)
    cloudflared.fault("n3.example.com", exit=1)
    running = run(TUNNEL, ports)
    with contextlib.ExitStack() as stack:
        for number in range(3):
            stack.enter_context(running.connect(genuine_hello(f"n{number}.example.com")))
            wait_until(lambda: len(running.router.waits.by_key) == number + 1)
        assert running.router.waits.threads == 2
        with running.connect(genuine_hello("n3.example.com")) as client:
            assert read_all(client) == alert(80)
        assert running.ending().reason == "busy"
        wait_until(lambda: not running.router.waits.by_key)


def test_names_of_clients_that_left_wait_for_nothing(run, monkeypatch):
    """One thread, held by a resolver; names whose clients have left give their places back."""
    monkeypatch.setattr(sniroute_router, "WAIT_THREADS", 1)
    release = threading.Event()
    running = run("--route=*.example.com=tcp:{label}.example.net:1")
    waits = running.router.waits.by_key
    with running.connect() as first:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and [])
        first.sendall(HELLO)
        wait_until(lambda: len(waits) == 1)
        for number in range(5):
            with socket.socket() as client:
                client.connect(running.address)
                client.sendall(genuine_hello(f"n{number}.example.com"))
                wait_until(lambda: len(waits) == 2)
            wait_until(lambda: len(waits) == 1)
        release.set()
        wait_until(lambda: not waits and not running.router.waits.threads)


def test_one_client_cannot_fill_the_queue_of_names(run, monkeypatch):
    monkeypatch.setattr(sniroute_router, "WAIT_THREADS", 1)
    monkeypatch.setattr(sniroute_router, "WAITS_PER_CLIENT", 2)
    release = threading.Event()
    running = run("--route=*.example.com=tcp:{label}.example.net:1")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(5)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and [])
        for number, client in enumerate(clients):
            client.sendall(V1 + genuine_hello(f"n{number}.example.com"))
            wait_until(lambda: len(running.router.waits.by_key) == min(number + 1, 3))
        assert read_all(clients[3]) == read_all(clients[4]) == alert(80)
        wait_until(lambda: running.counter("busy") == 2)
        release.set()
        wait_until(lambda: not running.router.waits.by_key)


def test_budget_that_is_spent_is_not_the_next_clients(run, serve, cloudflared, ports):
    """Both wait for one cold name; the first has no start left, the second has."""
    cloudflared.far("*", serve(lambda sock: (read_exactly(sock, len(V1)), sock.sendall(b"x"), read_all(sock))).address)
    running = run(TUNNEL, ports)
    running.tunnels.budget.buckets["192.0.2.7"] = (-100.0, time.monotonic())
    held = threading.Event()
    real = running.tunnels.wait
    running.tunnels.wait = lambda *args: (held.wait(10), real(*args))
    with running.connect(V1 + HELLO) as spender, running.connect() as other:
        wait_until(lambda: running.router.waits.by_key)
        other.sendall(V1.replace(b"192.0.2.7", b"192.0.2.6") + HELLO)
        wait_until(lambda: len(running.router.waits.by_key["*=" + DB].connections) == 2)
        held.set()
        assert read_all(spender) == alert(80)
        assert other.recv(1) == b"x"
        assert running.ending().reason == "tunnel_budget"  # the other one is still there


def test_thread_that_cannot_start_refuses_and_leaves_nothing_behind(run, cloudflared, ports, monkeypatch):
    running = run(TUNNEL, ports)
    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(running.router, "process_request", no_thread)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "busy"
    assert running.router.waits.threads == 0 and not running.router.waits.by_key


def test_fault_in_a_waiting_thread_ends_its_clients_only(run, cloudflared, ports, serve, monkeypatch, caplog):
    far = serve(answer(b"x"))
    running = run(TUNNEL, route(far.address, "ok.example.com"), ports)
    def fault(*_: Any) -> None:
        raise ZeroDivisionError("planted")
    monkeypatch.setattr(running.tunnels, "wait", fault)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "internal"
    with running.connect(genuine_hello("ok.example.com")) as client:
        assert client.recv(1) == b"x"
    assert "planted" in caplog.text


def test_tunnel_that_is_gone_each_time_it_is_ready_is_given_up(run, cloudflared, ports, monkeypatch):
    running = run(TUNNEL, ports)
    monkeypatch.setattr(running.tunnels, "wait", lambda *_: None)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert "gone each time" in running.ending().detail


def test_no_byte_reaches_whoever_took_the_port_of_a_dead_tunnel(run, serve, cloudflared, ports):
    """The child dies, somebody else listens on its port before the reaper has looked."""
    cloudflared.far("*", serve(answer(b"x")).address)
    running = run(TUNNEL, ports)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    running.ending()
    port, pid = running.tunnels.snapshot()[0][3:5]
    held = threading.Event()
    real_exited = running.tunnels.processes._exited
    def slow(child: Any) -> None:
        held.wait(10)
        real_exited(child)
    for key in list(running.tunnels.processes.selector.get_map().values()):
        if key.data[0] == real_exited:
            running.tunnels.processes.selector.modify(key.fileobj, key.events, (slow, key.data[1]))
    os.kill(pid, signal.SIGKILL)
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        def steal() -> bool:
            with contextlib.suppress(OSError):
                thief.bind((HOST, port))
                return True
            return False
        wait_until(steal)
        thief.listen()
        with running.connect(HELLO) as client:
            taken, _ = thief.accept()
            with taken:
                taken.settimeout(10)
                assert taken.recv(1) == b"", "a byte for the thief"
            held.set()
            assert client.recv(1) == b"x"


# -- ends --------------------------------------------------------------------------------------


def test_fault_in_the_loop_ends_only_the_connection_that_met_it(run, serve, monkeypatch, caplog):
    far = serve(answer(b"x"))
    running = run(route(far.address))
    with running.connect(HELLO) as other:
        assert other.recv(1) == b"x"
        def fault(*_: Any) -> None:
            raise ZeroDivisionError("planted")
        with monkeypatch.context() as patch:
            patch.setattr(sniroute_connection.Connection, "_route", fault)
            with running.connect() as victim:
                wait_until(lambda: len(running.router.connections) == 2)
                victim.sendall(HELLO)
                assert victim.recv(1) == b""
        assert running.ending().reason == "internal"
        other.sendall(b"y")
        assert other.recv(1) == b"y"
    assert "planted" in caplog.text


def test_idle_connections_are_closed_and_busy_ones_are_not(run, echo_server):
    running = run(route(echo_server.address), "--connection-idle=400ms")
    with running.connect(HELLO) as idle, running.connect(HELLO) as busy:
        for client in (idle, busy):
            assert read_exactly(client, len(HELLO)) == HELLO
        idle.settimeout(0.02)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            busy.sendall(b"x")
            assert busy.recv(1) == b"x"
            with contextlib.suppress(TimeoutError):
                assert idle.recv(1) == b""
                break
        assert running.ending().reason == "idle"
        busy.sendall(b"y")
        assert busy.recv(1) == b"y"


def test_half_closed_connection_that_is_silent_does_not_stay_for_ever(run, serve, monkeypatch):
    """The client is gone, the backend says nothing and never ends."""
    monkeypatch.setattr(sniroute_router, "HALF_CLOSED_IDLE", 0.2)
    done = threading.Event()
    far = serve(lambda sock: done.wait(20))
    running = run(route(far.address))
    running.connect(HELLO).close()
    assert running.ending().reason == "idle"
    done.set()


def test_client_that_resets_while_nobody_reads_it_is_found(run, serve, flow, monkeypatch):
    """Its bytes wait for a backend that does not read, so its socket is not watched."""
    monkeypatch.setattr(sniroute_router, "SWEEP_LAST", 0.1)
    done = threading.Event()
    running = run(route(serve(lambda sock: done.wait(20)).address))
    client = running.connect(HELLO)
    client.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while True:
            client.send(bytes(1 << 20))
    connection, = running.router.connections
    assert connection.up.state == "blocked"
    reset(client)
    assert running.ending().reason == "client_reset"
    done.set()


def test_fault_in_a_step_or_after_a_wait_ends_that_connection_only(run, serve, cloudflared, ports, monkeypatch, caplog):
    far = serve(answer(b"x"))
    cloudflared.far("*", far.address)
    running = run(TUNNEL, route(far.address, "ok.example.com"), ports)
    def fault(*_: Any) -> None:
        raise ZeroDivisionError("planted")
    real = sniroute_connection.Connection.resume
    with monkeypatch.context() as patch:
        patch.setattr(sniroute_connection.Connection, "resume", lambda self: fault() if self.name == "db.example.com" else real(self))
        with running.connect(HELLO) as client:
            assert client.recv(1) == b""
    for step in ("_parse", "_connect", "_open"):  # each is called by another of the loop's steps
        with monkeypatch.context() as patch:
            patch.setattr(sniroute_connection.Connection, step, fault)
            with running.connect(genuine_hello("ok.example.com")) as client:
                assert read_all(client) == b""
    running.router.call(fault)
    with running.connect(genuine_hello("ok.example.com")) as client:
        assert client.recv(1) == b"x"
    wait_until(lambda: not running.router.connections)
    assert caplog.text.count("ZeroDivisionError: planted") == 5


def test_drain_lets_connections_end_and_accepts_no_more(run, serve, caplog):
    caplog.set_level("INFO")
    running = run(route(serve(answer(b"x")).address))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        running.router.drain(20)
        wait_until(lambda: running.router.phase == "draining")
        with pytest.raises(OSError):
            running.connect()
        running.router.drain(20)  # twice is once
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
    running.thread.join(10)
    assert not running.thread.is_alive()


def test_drain_is_bounded(run, serve):
    running = run(route(serve(answer(b"x")).address))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        running.router.drain(0.1)
        assert client.recv(1) == b""
    assert running.ending().reason == "stopped"
    running.thread.join(10)
    assert not running.thread.is_alive()


def test_pipe_that_cannot_be_replaced_is_emptied(run, echo_server, monkeypatch):
    """A sink broke with bytes in the shared pipe, and there are no descriptors for another."""
    running = run(route(echo_server.address))
    router = running.router
    if router.pipes.shared is None:
        pytest.skip("no splice(2) here")
    os.write(router.pipes.shared[1], b"somebody else's bytes")
    monkeypatch.setattr(router.pipes, "_make", lambda: None)
    router.pipes.replace()
    with pytest.raises(BlockingIOError):
        os.read(router.pipes.shared[0], 1)


def test_splice_is_tried_before_it_is_used(monkeypatch):
    def refused(*_: Any, **__: Any) -> int:
        raise OSError(22, "Invalid argument")
    monkeypatch.setattr(os, "splice", refused, raising=False)
    assert not sniroute_flow.can_splice()
    monkeypatch.delattr(os, "splice")
    assert not sniroute_flow.can_splice()


@pytest.mark.parametrize("start", ["symlink", "other name", "-m"])
def test_program_starts_under_any_name(tmp_path, start):
    """It goes on as a module, where it can be found as one."""
    for name in (*CORE, DOCTOR):
        shutil.copy(HERE / name, tmp_path)
    command = [str(tmp_path / "router.py")]
    if start == "symlink":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "router").symlink_to(tmp_path / "sniroute.py")
        command = [str(tmp_path / "bin" / "router")]
    elif start == "-m":
        command = ["-m", "sniroute"]
    else:
        (tmp_path / "sniroute.py").rename(tmp_path / "router.py")
    done = subprocess.run([sys.executable, *command, "explain", "tcp.example.com", "--route=*=tcp:{name}:443"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tcp:tcp.example.com:443" in done.stdout


def test_address_given_twice_is_refused_in_one_line(tmp_path, free_ports):
    port, _ = free_ports(2)
    done = subprocess.run([sys.executable, HERE / "sniroute.py", f"--listen={HOST}:{port}", f"--listen={HOST}:{port}",
                           "--log-level=error"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and f"--listen {HOST}:{port}: Address already in use" in done.stderr


# -- the program -------------------------------------------------------------------------------

PROGRAM = HERE / "sniroute.py"
# What `python3 sniroute.py` makes of itself.  Python compiles a script at each start, and that is half of the start;
# tests that are about it, and all that name a `program` or `python`, begin there.
STARTED = (sys.executable, str(PROGRAM))
STOP_GRACE = 2.0  # how long a tunnel may take to end by itself
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def environment(**more: str) -> dict[str, str]:
    """What a router inherits here: nothing that changes Python or sniroute, but for coverage."""
    kept = {key: value for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "SNIROUTE_", "TUNNEL_", "JOURNAL_"))}
    return {**kept, "PYTHONWARNINGS": "default::ResourceWarning", **more}


class Program:
    """A router that is a process of its own; a thread reads what it says on stderr."""

    def __init__(self, command: list[str], **popen: Any):
        self.lines: list[str] = []
        self.code = 0  # the exit code that is expected
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                        **{"stderr": subprocess.PIPE, **popen})
        self.pid = self.process.pid
        self.log_is_read = threading.Event()
        self.log_is_read.set()
        self.reader = threading.Thread(target=self._read, name="log-reader")
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.lines.append(line.decode())
            self.log_is_read.wait()

    def log(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, count: int = 1) -> None:
        """Until the log has that text, so often."""
        wait_until(lambda: self.log().count(text) >= count or not self.reader.is_alive(), what=f"{text!r} in the log")
        assert self.log().count(text) >= count, f"it ended without {text!r}:\n{self.log()}"

    @property
    def addresses(self) -> list[Address]:
        """Where it listens, as its log says."""
        found = re.findall(r" listening on (\S+):(\d+)$", self.log(), re.MULTILINE)
        return [(host.strip("[]"), int(port)) for host, port in found]

    @property
    def address(self) -> Address:
        return self.addresses[0]

    def connect(self, said: bytes = b"", address: Address | None = None) -> socket.socket:
        """A client, with a time-out so that a failing test ends."""
        client = socket.create_connection(address or self.address, 20)
        client.sendall(said)
        return client

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 15) -> int:
        """The exit code, once there is one, and all of the log."""
        code = self.process.wait(timeout)
        self.log_is_read.set()
        self.reader.join()
        return code

    def stop(self) -> None:
        """End it, if it has not ended, and see that it was well."""
        self.log_is_read.set()
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
            assert self.wait() == self.code, self.log()
        finally:
            self.process.kill()
            self.wait()
            if self.process.stderr is not None:
                self.process.stderr.close()
        for word in ("Traceback", "report it", "ResourceWarning"):
            assert word not in self.log(), self.log()


@pytest.fixture
def launch(tmp_path: pathlib.Path, cloudflared) -> Iterator[Callable[..., Program]]:
    """launch(*options) -> Program, which listens on a free port unless the options say where.

    `python` is what runs it, `env` all of its environment, `listeners` how many lines about them
    are waited for; the rest goes to Popen.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    programs = []
    with contextlib.ExitStack() as stack:
        def start(*options: str, env: dict[str, str] | None = None, python: tuple[str, ...] = (),
                  program: pathlib.Path = PROGRAM, listeners: int = 1, **popen: Any) -> Program:
            env = environment() if env is None else env
            if "SNIROUTE_LISTEN" not in env and not any(option.startswith("--listen") for option in options):
                options = (f"--listen={HOST}:0", *options)
            if python or program != PROGRAM:
                words = [*(python or (sys.executable,)), str(program)]
            else:
                words = [*STARTED]
            running = Program([*words, *options], env={**env, "TMPDIR": str(scratch)}, **popen)
            programs.append(running)
            stack.callback(running.stop)
            running.wait_for(" listening on ", listeners) if listeners else None
            return running

        yield start
    if not any(program.code for program in programs):  # none was killed
        assert list(scratch.iterdir()) == []


def execute(*words: str, said: bytes = b"", **more: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, away from this user's own settings."""
    env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent", "LC_ALL": "C"}
    return subprocess.run(words, **{"input": said, "capture_output": True, "timeout": 60, "env": env, **more})


def command(*options: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run sniroute to its end."""
    return execute(*STARTED, *options, env=environment(**more), said="", text=True)


def resident(pid: int) -> float:
    """The memory of a process, in MiB."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal has not reached the process yet: a second one would be lost."""
    mask = re.search(r"ShdPnd:\s+(\w+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(mask, 16) >> number - 1 & 1)


def cpu_seconds(pid: int) -> float:
    """The time a process has computed; proc(5): utime and stime are fields 14 and 15."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def counter(program: Program, name: str) -> int:
    """A counter, by way of SIGUSR1."""
    seen = len(re.findall("counters: ", program.log()))
    program.signal(signal.SIGUSR1)
    program.wait_for("counters: ", seen + 1)
    last = re.findall(r"counters: (\{.*\})\n", program.log())[-1]
    found = re.search(rf"'{name}': (\d+)", last)
    return int(found[1]) if found else 0


BARE = {"PATH": ""}
BARE_PYTHON = (sys.executable, "-S", "-E")


def installed(folder: pathlib.Path, *names: str) -> pathlib.Path:
    """Copy these files, and no others, into a folder.  The path of sniroute.py."""
    for name in (*CORE, DOCTOR, *names):
        shutil.copy(HERE / name, folder)
    return folder / "sniroute.py"


@pytest.fixture(scope="session")  # so that they are compiled once
def two_files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The program in a folder of two files."""
    return installed(tmp_path_factory.mktemp("two files"))


def test_two_files_and_a_bare_python_are_all_it_takes(launch, two_files):
    """No packages, no PATH, no environment, no settings."""
    began = time.monotonic()
    program = launch(program=two_files, python=BARE_PYTHON, env=BARE)
    assert time.monotonic() - began < 3
    missing = "cloudflared is not there: install it, or name it with --cloudflared"
    assert f" warning {missing}; names that need it are refused until then\n" in program.log()
    assert " warning no --route: every name is served, " in program.log()
    with program.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    program.wait_for(missing, 2)


def test_two_files_route_bytes(launch, two_files, echo_server):
    program = launch(route(echo_server.address), program=two_files, python=BARE_PYTHON, env=BARE)
    with program.connect(HELLO + b"!") as client:
        assert read_exactly(client, len(HELLO) + 1) == HELLO + b"!"


@linux
def test_router_that_has_just_started_is_small(launch, two_files):
    """Not at its first start, when Python compiles it: that leaves up to 3 MiB more."""
    assert execute(*BARE_PYTHON, str(two_files), "check", env=BARE).returncode == 0
    sizes = []
    for _ in range(3):  # what the allocator takes varies by some MiB under load: the smallest is the program's
        program = launch(program=two_files, python=BARE_PYTHON, env=BARE)
        sizes.append(resident(program.pid))
        program.stop()
    limit = 20
    if sys.version_info >= (3, 14):  # its logging imports inspect; without the interpreter's lock, it is larger still
        limit = 26 if sysconfig.get_config_var("Py_GIL_DISABLED") else 22
    assert min(sizes) < limit, sizes


# -- addresses ---------------------------------------------------------------------------------


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return socket.has_dualstack_ipv6()
    return False


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


def test_port_alone_is_every_address(launch, echo_server):
    program = launch("--listen=:0", route(echo_server.address))
    hosts = [HOST, "::1"] if has_ipv6() else [HOST]
    for host in hosts:
        with program.connect(HELLO, (host, program.address[1])) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
    program.stop()
    clients = re.findall(r"client=(\S+):\d+ ", program.log())
    assert sorted(clients) == sorted(f"[{host}]" if ":" in host else host for host in hosts)


@ipv6
def test_ipv6_address_alone_is_not_reached_by_ipv4(launch, echo_server):
    program = launch("--listen=[::1]:0", route(echo_server.address))
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    with pytest.raises(ConnectionRefusedError):
        program.connect(address=(HOST, program.address[1]))


def test_several_addresses_are_one_service(launch, echo_server):
    program = launch(f"--listen={HOST}:0", f"--listen={HOST}:0", route(echo_server.address), listeners=2)
    assert len(set(program.addresses)) == 2
    for address in program.addresses:
        with program.connect(HELLO, address) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_address_that_is_taken_is_named_in_one_line(echo_server):
    ended = command(f"--listen={HOST}:{echo_server.address[1]}", route(echo_server.address, "*"),
                    SNIROUTE_LISTEN=":1")
    assert ended.returncode == 2, "that would be a circle"
    ended = command(f"--listen={HOST}:{echo_server.address[1]}", route((HOST, 1)))
    assert ended.returncode == 1
    assert re.fullmatch(rf"\S+ error --listen {HOST}:\d+: Address already in use\n", ended.stderr), ended.stderr


def test_address_of_another_machine_is_named_in_one_line():
    ended = command("--listen=192.0.2.1:19000", route((HOST, 1)))
    assert ended.returncode == 1
    assert re.fullmatch(r"\S+ error --listen 192.0.2.1:19000: .+\n", ended.stderr), ended.stderr


# -- settings and commands ---------------------------------------------------------------------


@pytest.mark.parametrize("options, variables, named", [
    (["--idle=soon"], {}, ["--idle"]),
    (["--idle=soon", "--ports=9"], {}, ["--ports", "--idle"]),
    ([], {"SNIROUTE_PORTS": "9"}, ["SNIROUTE_PORTS"]),
    (["--route=*=http:x"], {}, ["--route"]),
    (["--cloudflared=/nonexistent"], {}, ["--cloudflared"]),
    (["--listen=127.0.0.1:9", "--route=*=tcp:127.0.0.1:9"], {}, ["--route"]),
    (["check", "--max-tunnels=none"], {}, ["--max-tunnels"]),
], ids=["no duration", "two at once", "a variable", "no such target", "no such program", "a circle", "check"])
def test_settings_that_are_wrong_are_named_one_a_line(options, variables, named):
    ended = command(*options, **variables)
    assert ended.returncode == 2
    assert [line.split(": ")[:2] for line in ended.stderr.splitlines()] == [["sniroute", name] for name in named]


@pytest.mark.parametrize("options", [["--no-such-option"], ["fly"], ["explain"], ["check", "a.example.com"]],
                         ids=["unknown option", "unknown command", "explain without a name", "check with a name"])
def test_command_line_that_is_none_is_told_how(options):
    ended = command(*options)
    assert ended.returncode == 2
    assert ended.stderr.startswith("usage: sniroute ") and "Traceback" not in ended.stderr


def test_check_command_prints_the_routes():
    ended = command("check", "--route=DB.example.com=tcp:127.0.0.1:1", "--route=*=cloudflared:x-{name}")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "db.example.com=tcp:127.0.0.1:1\n*=cloudflared:x-{name}\n"


def test_explain_says_what_would_run(cloudflared):
    ended = command("explain", "DB.example.com", f"--cloudflared={cloudflared.path}", "--ports=20001-20002")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == (
        "name:    db.example.com\nroute:   *=cloudflared:cft-{name}\ntarget:  cloudflared:cft-db.example.com\n"
        f"runs:    {cloudflared.path} access tcp --hostname cft-db.example.com --url 127.0.0.1:20001 --loglevel info\n")


@pytest.mark.parametrize("name, says", [
    ("other.example.com", "no route for other.example.com (no_route, TLS alert 112)"),
    ("10.0.0.1", "not a host name: '10.0.0.1' (bad_name, TLS alert 112)"),
], ids=["no route", "an address"])
def test_explain_says_why_a_name_is_refused(name, says):
    ended = command("explain", name, "--route=db.example.com=tcp:127.0.0.1:1")
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.startswith(f"name:    {name}\nrefused: {says}\nto do:   ")


@pytest.mark.parametrize("scheme, says", [
    ("cloudflared", "cloudflared is not there: install it, or name it with --cloudflared"),
    ("carrier", "sniroute_carrier.py is not beside sniroute.py: copy it there"),
])
def test_explain_says_that_the_program_is_missing(two_files, scheme, says):
    ended = execute(*BARE_PYTHON, str(two_files), "explain", "db.example.com", f"--route=*={scheme}:{{name}}",
                    env=BARE, text=True, said="")
    assert ended.returncode == 1
    assert f"refused: {says} (tunnel_failed, TLS alert 80)\nto do:   " in ended.stdout


def test_version_and_help():
    version = command("--version")
    assert version.returncode == 0
    assert version.stdout.startswith(f"sniroute {sniroute_names.__version__} (Python {sys.version.split()[0]}, ")
    usage = command("--help")
    assert usage.returncode == 0
    for row in sniroute_settings.SETTINGS:
        assert f"--{row.name} " in usage.stdout


def test_environment_holds_settings_and_the_command_line_comes_first(launch, serve):
    first, second = serve(answer(b"1")).address, serve(answer(b"2")).address
    variables = environment(SNIROUTE_LISTEN=f"{HOST}:0 {HOST}:0",
                            SNIROUTE_ROUTE=" ".join((route(first)[8:], route(second, "web.example.com")[8:])))
    web = genuine_hello("web.example.com")
    program = launch(env=variables, listeners=2)
    for address, hello, said in zip(program.addresses, (HELLO, web), (b"1", b"2"), strict=True):
        with program.connect(hello, address) as client:
            assert client.recv(1) == said
    program = launch(f"--listen={HOST}:0", route(second), env=variables)
    with program.connect(HELLO) as client:
        assert client.recv(1) == b"2"
    with program.connect(web) as client:
        assert read_all(client) == alert(112)
    program.stop()
    assert len(program.addresses) == 1


# -- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_lets_connections_end_and_stops_the_tunnels_last(launch, cloudflared, ports, echo_server, number):
    cloudflared.far("*", echo_server.address)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}")
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        program.signal(number)
        program.wait_for("draining: 1 connections")
        with pytest.raises(ConnectionRefusedError):
            program.connect()
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
    assert program.wait() == 0
    assert "reason=client_closed" in program.lines[-2]
    assert program.lines[-1].endswith(" info stopped\n")
    assert not cloudflared.runs(cloudflared.starts()[0]["pid"])


@pytest.mark.parametrize("stubborn", [False, True], ids=["tunnel that ends", "tunnel that ignores TERM"])
def test_second_signal_ends_at_once(launch, cloudflared, ports, echo_server, stubborn):
    cloudflared.far("*", echo_server.address)
    cloudflared.fault("*", ignore_term=stubborn)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}")
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        program.signal(signal.SIGTERM)
        program.wait_for("draining: 1 connections")
        began = time.monotonic()
        program.signal(signal.SIGTERM)
        assert read_all(client) == b""
        assert program.wait() == 0
    assert time.monotonic() - began < STOP_GRACE
    assert not cloudflared.runs(cloudflared.starts()[0]["pid"])


def test_second_signal_hurries_tunnels_that_are_being_stopped(launch, cloudflared, ports, serve):
    """No connection is left, and a child ignores TERM."""
    cloudflared.far("*", serve(answer(b"x")).address)
    cloudflared.fault("*", ignore_term=True)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}")
    with program.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    program.wait_for("reason=client_closed")
    began = time.monotonic()
    program.signal(signal.SIGTERM)
    program.wait_for("draining: 0 connections")
    program.signal(signal.SIGINT)
    assert program.wait() == 0
    assert time.monotonic() - began < STOP_GRACE
    assert not cloudflared.runs(cloudflared.starts()[0]["pid"])


def test_signals_that_keep_coming_do_not_break_the_end(launch):
    """One came while the last lines were being written: exit code 1 and a traceback."""
    for _ in range(3):
        program = launch()
        deadline = time.monotonic() + 15
        while program.process.poll() is None:
            assert time.monotonic() < deadline
            program.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.process.wait(0.001)
        program.stop()


def test_hangup_changes_nothing(launch, echo_server):
    program = launch(route(echo_server.address))
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        program.signal(signal.SIGHUP)
        program.wait_for(" warning reload: there is no file of settings to read again; options and variables are for the next start\n")
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
        with program.connect(HELLO) as other:
            assert read_exactly(other, len(HELLO)) == HELLO


def test_usr1_tells_counters_tunnels_and_connections(launch, cloudflared, ports, serve):
    cloudflared.far("*", serve(answer(b"x")).address)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}")
    with program.connect(HELLO) as client, program.connect(HELLO[:9]) as silent:
        assert client.recv(1) == b"x"
        assert counter(program, "accepted") == 2
        row = cloudflared.starts()[0]
        program.wait_for(f" 1 connections, port {row['port']}, pid ")
        assert re.search(r" info tunnel cloudflared:db\.example\.com: ready for \d+ s, 1 connections, ", program.log())
        program.wait_for(f" info connection {HOST}:", 2)
        open_one, silent_one = (f"connection {HOST}:{sock.getsockname()[1]}: " for sock in (client, silent))
        assert re.search(rf"{open_one}open for \d+\.\d s, name db\.example\.com, {len(HELLO)} bytes up, 1 down\n",
                         program.log())
        assert re.search(rf"{silent_one}prelude for \d+\.\d s, name None, 0 bytes up, 0 down\n", program.log())


@linux
def test_tunnels_die_with_a_router_that_is_killed(launch, cloudflared, ports, serve):
    """Ready, starting, and deaf to TERM: the kernel sees to all of them."""
    cloudflared.far("*", serve(answer(b"x")).address)
    cloudflared.fault("*", ignore_term=True)
    cloudflared.fault("late.example.com", never_listen=True)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}")
    with program.connect(HELLO) as client, program.connect(genuine_hello("late.example.com")):
        assert client.recv(1) == b"x"
        wait_until(lambda: len(cloudflared.starts()) == 2, what="both starts")
        pids = [row["pid"] for row in cloudflared.starts()]
        assert all(map(cloudflared.runs, pids))
        program.code = -signal.SIGKILL
        program.signal(signal.SIGKILL)
        wait_until(lambda: not any(map(cloudflared.runs, pids)), timeout=2, what="the end of its children")


# -- a log that nobody takes -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["closed", "broken", "full"])
def test_log_that_cannot_be_written_stops_nothing_and_reaches_no_client(launch, free_ports, echo_server, kind):
    """stderr is closed before the start, a pipe without a reader, or a disk without room."""
    address = HOST, free_ports(1)[0]
    python = (sys.executable,)
    with contextlib.ExitStack() as stack:
        popen: dict[str, Any] = {}
        if kind == "closed":
            python = ("/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable)
        elif kind == "broken":
            reader, writer = os.pipe()
            os.close(reader)
            popen["stderr"] = stack.enter_context(open(writer, "wb"))
        elif os.path.exists("/dev/full"):
            popen["stderr"] = stack.enter_context(open("/dev/full", "wb"))
        else:
            pytest.skip("no /dev/full here")
        program = launch(f"--listen={HOST}:{address[1]}", route(echo_server.address), "--log-level=debug",
                         python=python, listeners=0, **popen)
    def connect() -> socket.socket | None:
        with contextlib.suppress(ConnectionRefusedError):
            return program.connect(address=address)
        return None
    with wait_until(connect) as client:
        client.sendall(HELLO)
        assert read_exactly(client, len(HELLO)) == HELLO
        for _ in range(20):
            with program.connect(genuine_hello("other.example.com"), address) as other:
                assert read_all(other) == alert(112)
        program.signal(signal.SIGUSR1)
        client.sendall(b"still")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"still"
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_log_that_nobody_reads_holds_up_neither_clients_nor_the_end(launch, single_loop_echo):
    """30,000 lines into a pipe that is full after 500."""
    program = launch(route(single_loop_echo), "--log-level=debug")
    program.log_is_read.clear()
    with contextlib.ExitStack() as stack:
        for _ in range(200):  # each is a line in every dump
            client = stack.enter_context(program.connect(HELLO))
            assert read_exactly(client, len(HELLO)) == HELLO
        for _ in range(150):
            program.signal(signal.SIGUSR1)
            client.sendall(b"?")
            assert client.recv(1) == b"?"
        with program.connect(HELLO) as late:
            assert read_exactly(late, len(HELLO)) == HELLO
    program.signal(signal.SIGTERM)
    assert program.process.wait(10) == 0


@linux
def test_log_that_is_read_again_says_how_much_is_missing(launch, single_loop_echo):
    program = launch(route(single_loop_echo))
    program.log_is_read.clear()
    def written() -> int:
        return sum(program.log().count(f" info {text}") for text in ("counters: ", "connection ", "draining: "))
    def dropped() -> int:
        return sum(map(int, re.findall(r" warning the log was too slow: (\d+) lines dropped\n", program.log())))
    def suppressed() -> int:
        return sum(map(int, re.findall(r" suppressed=(\d+) class=", program.log())))
    def refused() -> bool:
        try:
            program.connect().close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            pass  # it was in the backlog when the listener closed
        return False
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            client = stack.enter_context(program.connect(HELLO))
            assert read_exactly(client, len(HELLO)) == HELLO
        for _ in range(70):  # more lines than wait, are being written, and fit into the pipe
            program.signal(signal.SIGUSR1)
            wait_until(lambda: not is_pending(program.pid, signal.SIGUSR1))
        program.signal(signal.SIGTERM)
        wait_until(refused, what="the drain, which comes behind all dumps")
        program.log_is_read.set()
        wait_until(lambda: written() + dropped() + suppressed() == 70 * 201 + 1, what="word of every line")
    assert written() > 200 and suppressed()


# -- limits ------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("options, says", [([], "--max-connections (16) are open"),
                                           (["--max-connections=1000"], "Too many open files")],
                         ids=["limit that fits", "limit that does not"])
def test_few_descriptors_and_many_clients(launch, single_loop_echo, options, says):
    """64 descriptors, 100 clients that stay: no crash, no spinning; when they leave it goes on."""
    program = launch(route(single_loop_echo), *options,
                     python=("/bin/sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", sys.executable))
    assert ("raise LimitNOFILE" in program.log()) is bool(options)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(program.connect(HELLO)) for _ in range(100)]
        assert read_exactly(clients[0], len(HELLO)) == HELLO
        program.wait_for(says)
        before = cpu_seconds(program.pid)
        clients[0].settimeout(1)  # which is the time that is measured
        with pytest.raises(TimeoutError):
            clients[0].recv(1)
        assert cpu_seconds(program.pid) - before < 0.5
    assert program.log().count("not accepting") <= 1
    def served() -> bool:
        with contextlib.suppress(ConnectionResetError), program.connect(HELLO) as client:
            return read_exactly(client, len(HELLO)) == HELLO
        return False
    wait_until(served, timeout=5)


@pytest.fixture
def descriptors() -> Iterator[Callable[[int], None]]:
    """descriptors(count): let this process open so many files, or skip."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def need(count: int) -> None:
        if hard != resource.RLIM_INFINITY and hard < count:
            pytest.skip(f"RLIMIT_NOFILE is {hard}, and {count} are needed")
        if soft != resource.RLIM_INFINITY and soft < count:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))

    yield need
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@linux
def test_thousands_of_idle_connections_are_cheap_and_leave_nothing(launch, two_files, single_loop_echo, descriptors):
    descriptors(4500)
    program = launch(route(single_loop_echo), program=two_files, python=BARE_PYTHON, env=BARE)
    with program.connect(HELLO) as client:  # so that what comes once is there
        assert read_exactly(client, len(HELLO)) == HELLO
    wait_until(lambda: counter(program, "client_closed") == 1)
    before = len(os.listdir(f"/proc/{program.pid}/fd"))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(program.connect(HELLO)) for _ in range(2000)]
        for client in clients:
            assert read_exactly(client, len(HELLO)) == HELLO
        assert resident(program.pid) < 40
    wait_until(lambda: counter(program, "client_closed") == 2001, timeout=5, what="the end of all connections")
    assert len(os.listdir(f"/proc/{program.pid}/fd")) == before
    assert " connections more" not in program.log().rpartition("counters: ")[2]
    assert " connection " not in program.log().rpartition("counters: ")[2]


@pytest.mark.parametrize("tunnel_program", ["stand-in", "carrier"], indirect=True)
def test_tunnel_that_is_killed_under_a_crowd_costs_only_those_it_was_answering(launch, tunnel_program, ports, serve):
    """Twenty clients come again and again: whoever had received nothing is served."""
    payload = random.Random(11).randbytes(1 << 16)
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(payload)
        read_all(sock)
    tunnel_program.far("*", serve(handler).address)
    program = launch(TUNNEL, ports, *tunnel_program.options, env=environment(**tunnel_program.environ))
    enough = threading.Event()
    served, errors, cut = [0] * 20, [], []
    def come_again(number: int) -> None:
        while not enough.is_set():
            try:
                with program.connect(HELLO) as client:
                    data = read_exactly(client, len(payload))
            except OSError as error:
                errors.append(error)
                continue
            if data == payload:
                served[number] += 1
            else:
                cut.append(len(data))
    threads = [threading.Thread(target=come_again, args=(number,), name="client") for number in range(20)]
    for thread in threads:
        thread.start()
    try:
        for kills in range(2):
            goal = [count + 2 for count in served]
            wait_until(lambda: all(count >= wanted for count, wanted in zip(served, goal, strict=True)), 20,
                       f"service for everybody after {kills} kills")
            program.wait_for(" tunnel ready ", kills + 1)
            pids = re.findall(r" tunnel ready .* pid=(\d+)$", program.log(), re.MULTILINE)
            assert len(pids) == kills + 1
            if kills < 1:
                os.kill(int(pids[-1]), signal.SIGKILL)
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    resets = [error for error in errors if not isinstance(error, ConnectionResetError)]
    assert not resets and 0 not in cut, (errors, cut)
    assert len(cut) + len(errors) <= len(threads)
    program.wait_for("it ended (signal 9)")


# -- real clients, real servers ----------------------------------------------------------------


def program_path(name: str, package: str) -> str:
    """Where a program is; without it the test is skipped."""
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    places += sorted(map(str, pathlib.Path("/usr/lib/postgresql").glob("*/bin")), key=version_of, reverse=True)
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip(f"{name} is not here (Debian package {package})")
    return found


def version_of(text: str) -> float:
    """The first number in it."""
    return float(re.search(r"\d+(\.\d+)?", text)[0])


class Certificate(NamedTuple):
    """A certificate for *.example.com that vouches for itself, in files."""

    file: pathlib.Path
    key: pathlib.Path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder = tmp_path_factory.mktemp("certificate")
    made = Certificate(folder / "server.crt", folder / "server.key")
    ended = execute(program_path("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=sniroute test",
                    "-addext", "subjectAltName=DNS:*.example.com", "-keyout", str(made.key), "-out", str(made.file))
    assert ended.returncode == 0, ended.stderr
    return made


@pytest.fixture(scope="module")
def postgres(certificate: Certificate) -> Iterator[Address]:
    """The address of a PostgreSQL that speaks TLS.  It does not run as root, so root lends it a user."""
    initdb, server = program_path("initdb", "postgresql"), program_path("postgres", "postgresql")
    program_path("psql", "postgresql-client")
    other_user: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        # Not below pytest's folder, which is closed to other users; and short, for the socket's sake.
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sniroute-pg-")))
        for file in certificate:
            shutil.copy(file, folder)
            (folder / file.name).chmod(0o600)
        if os.geteuid() == 0:
            names = {entry.pw_name: entry for entry in pwd.getpwall()}
            user = names.get("postgres") or names["nobody"]
            other_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            for path in (folder, *folder.iterdir()):
                os.chown(path, user.pw_uid, user.pw_gid)
        data = folder / "data"
        ended = execute(initdb, "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync", "--no-locale",
                        "-E", "UTF8", cwd=folder, **other_user)
        assert ended.returncode == 0, ended.stderr
        log = stack.enter_context(open(folder / "log", "wb"))
        status = data / "postmaster.pid"
        for _ in range(5):  # somebody may be faster at taking the port
            with socket.create_server((HOST, 0)) as free:
                address = free.getsockname()
            process = subprocess.Popen(
                [server, "-D", str(data), "-h", HOST, "-p", str(address[1]), "-k", str(folder), "-c", "fsync=off",
                 "-c", "ssl=on", "-c", f"ssl_cert_file={folder}/server.crt", "-c", f"ssl_key_file={folder}/server.key"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env={"LC_ALL": "C"}, **other_user)
            def ready() -> bool:  # the eighth line of that file says it
                with contextlib.suppress(FileNotFoundError):
                    return "ready" in "".join(status.read_text().splitlines()[7:]) or process.poll() is not None
                return process.poll() is not None
            try:
                wait_until(ready, timeout=30, what="PostgreSQL")
                if process.poll() is None:
                    yield address
                    return
            finally:
                process.send_signal(signal.SIGINT)  # without waiting for clients
                process.wait()
        raise AssertionError((folder / "log").read_text())


def psql(address: Address, query: list[str], options: str, said: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run queries in one session, through `address`, as db.example.com."""
    where = f"host=db.example.com hostaddr={address[0]} port={address[1]} user=postgres dbname=postgres {options}"
    commands = [word for line in query for word in ("-c", line)]
    program = program_path("psql", "postgresql-client")
    return execute(program, "-XAtq", "-v", "ON_ERROR_STOP=1", *commands, where, said=said)


@pytest.fixture
def database(launch, tunnel_program, ports, postgres) -> Program:
    """A router with the default route, in front of PostgreSQL."""
    for name in ("cft-db.example.com", "cft-db.example.org"):
        tunnel_program.far(name, postgres)
    return launch(ports, *tunnel_program.options, env=environment(**tunnel_program.environ))


def started(program: Program) -> list[str]:
    """The hostnames whose tunnels were ready, in that order."""
    program.wait_for(" tunnel ready ")
    return re.findall(r" tunnel ready tunnel=cloudflared:(\S+) ", program.log())


@pytest.mark.parametrize("verified", [False, True], ids=["require", "verify-full"])
def test_psql_reads_megabytes_on_a_cold_name_and_on_the_warm_one(database, certificate, verified):
    options = f"sslmode=verify-full sslrootcert={certificate.file}" if verified else "sslmode=require"
    query = ["select ssl from pg_stat_ssl where pid = pg_backend_pid()",
             "select repeat(md5(n::text), 32) from generate_series(1, 6000) n"]
    for _ in range(2):
        ended = psql(database.address, query, options)
        assert (ended.returncode, ended.stderr) == (0, b"")
        lines = ended.stdout.decode().splitlines()
        assert lines[0] == "t"
        assert lines[1:] == [hashlib.md5(b"%d" % n).hexdigest() * 32 for n in range(1, 6001)]
    assert started(database) == ["cft-db.example.com"]


@pytest.mark.parametrize("tunnel_program", ["stand-in", "carrier"], indirect=True)
def test_psql_copies_megabytes_up(database):
    rows = [b"%x" % n * 100 for n in random.Random(12).sample(range(1 << 28, 1 << 32), 8_000)]
    query = ["create temp table t (row text)", r"\copy t from pstdin",
             "select count(*), sum(length(row)), min(row), max(row) from t"]
    ended = psql(database.address, query, "sslmode=require", b"".join(row + b"\n" for row in rows))
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.split() == [b"|".join((b"8000", b"6400000", min(rows), max(rows)))]
    assert started(database) == ["cft-db.example.com"]


@pytest.mark.parametrize("tunnel_program", ["stand-in"], indirect=True)
def test_psql_meets_the_certificate_of_the_server_itself(database, certificate):
    """sniroute has none: under another name it is the server's that does not fit."""
    options = f"sslmode=verify-full sslrootcert={certificate.file} host=db.example.org"
    ended = psql(database.address, ["select 1"], options)
    assert ended.returncode == 2
    assert b'server certificate for "*.example.com" does not match host name "db.example.org"' in ended.stderr


@pytest.mark.parametrize("tunnel_program", ["stand-in"], indirect=True)
def test_psql_without_tls_is_told_what_to_do(database):
    ended = psql(database.address, ["select 1"], "sslmode=disable")
    assert ended.returncode == 2
    assert b"FATAL:  sniroute routes by the TLS server name: a connection without TLS has none" in ended.stderr
    assert b"HINT:  Connect with sslmode=require." in ended.stderr


@pytest.mark.parametrize("tunnel_program", ["stand-in"], indirect=True)
def test_psql_that_begins_with_tls_at_once(database):
    for name, package in (("psql", "postgresql-client"), ("postgres", "postgresql")):
        version = execute(program_path(name, package), "--version").stdout.decode()
        if version_of(version) < 17:
            pytest.skip(f"{name} is older than 17: {version.strip()}")
    ended = psql(database.address, ["select 7"], "sslmode=require sslnegotiation=direct")
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, b"", b"7\n")


def test_curl_posts_megabytes_on_a_cold_name_and_on_the_warm_one(launch, tunnel_program, ports, serve, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    def handler(sock: socket.socket) -> None:
        """Answer a POST with its body, backwards."""
        sock.settimeout(20)
        with context.wrap_socket(sock, server_side=True) as tls, tls.makefile("rb") as lines:
            size = 0
            while (line := lines.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split()[1])
            body = lines.read(size)[::-1]
            tls.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            lines.read()  # until the client closes
    tunnel_program.far("cft-web.example.com", serve(handler).address)
    program = launch(ports, *tunnel_program.options, env=environment(**tunnel_program.environ))
    port = program.address[1]
    payload = random.Random(13).randbytes(4 << 20)
    for _ in range(2):
        ended = execute(program_path("curl", "curl"), "-sS", "--noproxy", "*", "--cacert", str(certificate.file),
                        "--resolve", f"web.example.com:{port}:{HOST}", "--data-binary", "@-", "-H", "Expect:",
                        f"https://web.example.com:{port}/", said=payload)
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert ended.stdout == payload[::-1]
    assert started(program) == ["cft-web.example.com"]


def test_openssl_shows_the_alert_for_a_name_without_a_route(launch, echo_server):
    program = launch(route(echo_server.address))
    ended = execute(program_path("openssl", "openssl"), "s_client", "-servername", "other.example.com", "-connect",
                    "{}:{}".format(*program.address))
    assert ended.returncode == 1
    assert b"unrecognized name" in ended.stderr and b"SSL alert number 112" in ended.stderr


# -- with the carrier, and nothing else --------------------------------------------------------

TRANSFER = int(os.environ.get("SNIROUTE_TEST_TRANSFER", "32"))  # MiB each way; more is for those who have the time
BLOCK = random.Random(14).randbytes((1 << 20) - 8)


def blocks() -> Iterator[bytes]:
    """TRANSFER blocks of 1 MiB, no two the same."""
    return (struct.pack(">Q", number) + BLOCK for number in range(TRANSFER))


def digest(parts: Iterable[bytes]) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.digest()


def depot(sock: socket.socket) -> None:
    """A far end: behind the hello, `d` asks for the blocks, `u` brings them and asks for their digest."""
    read_exactly(sock, len(HELLO))
    if sock.recv(1) == b"d":
        for block in blocks():
            sock.sendall(block)
    else:
        left = TRANSFER << 20
        def parts() -> Iterator[bytes]:
            nonlocal left
            while left and (data := sock.recv(min(left, 1 << 18))):
                left -= len(data)
                yield data
        sock.sendall(digest(parts()))
    read_all(sock)


@pytest.fixture(scope="session")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same with the carrier."""
    return installed(tmp_path_factory.mktemp("three files"), *(f"sniroute_{room}.py" for room in (
        "carrier", "edge", "forwarder", "dial", "http")))


@pytest.fixture
def carried(launch, three_files, edge, ports) -> Callable[..., Program]:
    """carried(*options) -> a router with the carrier, an empty PATH, and the edge's proxy and certificate."""
    return lambda *options: launch(ports, *options, program=three_files, python=BARE_PYTHON,
                                   env={**BARE, **edge.environ})


CARRIED = "--route=*.example.com=cloudflared:{name}"


def test_three_files_and_an_empty_path_carry_psql(carried, edge, postgres):
    edge.far("db.example.com", postgres)
    program = carried(CARRIED)
    ended = psql(program.address, ["select repeat('x', 1000000)", "select 7"], "sslmode=require")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout == b"x" * 1_000_000 + b"\n7\n"
    assert program.log().count("cloudflared is not on PATH: the carrier beside sniroute.py does its work") == 1


def test_three_files_and_an_empty_path_carry_many_bytes_each_way(carried, edge, serve):
    edge.far("db.example.com", serve(depot).address)
    program = carried(CARRIED)
    with program.connect(HELLO + b"d") as client:
        def parts() -> Iterator[bytes]:
            left = TRANSFER << 20
            while left and (data := client.recv(min(left, 1 << 18))):
                left -= len(data)
                yield data
        assert digest(parts()) == digest(blocks())
    with program.connect(HELLO + b"u") as client:
        for block in blocks():
            client.sendall(block)
        assert read_exactly(client, 32) == digest(blocks())
    ends = wait_until(lambda: len(found := edge.ends()) == 2 and found)
    assert all(end["largest_up"] <= 16384 and not end["cut"] and not end["client_pings"] for end in ends)


def test_names_of_both_schemes_share_one_carrier(carried, edge, echo_server):
    edge.far("*", echo_server.address)
    program = carried(CARRIED, "--route=*.example.org=carrier:{name}")
    hellos = [genuine_hello(f"n{number}.example.{top}") for number in range(3) for top in ("com", "org")]
    for hello in hellos:
        with program.connect(hello) as client:
            assert read_exactly(client, len(hello)) == hello
    program.wait_for(" tunnel ready ", 6)
    assert len(set(re.findall(r" tunnel ready .* pid=(\d+)$", program.log(), re.MULTILINE))) == 1


TOKEN = {"TUNNEL_SERVICE_TOKEN_ID": "the-id", "TUNNEL_SERVICE_TOKEN_SECRET": "s3cret", "CF_ACCESS_TOKEN": "jwt.jwt"}


@pytest.mark.parametrize("pattern, target, own", [
    ("*", "cft-{name}", False),
    ("*", "{label}.com", False),
    ("*", "one.example.com", True),
    ("*", "{label}.tunnels.example.net", True),
    ("*.example.com", "{name}", True),
    ("**.example.com", "cft-{name}", True),
    ("*.example.com", "cft-{label}-{domain}", False),
    ("**.example.com", "cft-{label}-{domain}", False),
    ("**.corp.example.com", "cft-{label}-{domain}", True),
    ("*.example.com", "{label}.{label}", False),
    ("a.example.com", "cft-{label}-{domain}", True),
])
def test_token_is_shown_only_where_the_operator_has_chosen_the_domain(pattern, target, own):
    """Whoever owns the domain that a route leads to reads what the router shows there."""
    route = sniroute_routes.parse_route(f"{pattern}=carrier:{target}")
    assert route.is_of_one_domain() is own
    settings = load_settings([f"--route={route}", "--route=x.example.org=carrier:{name}"], TOKEN)
    decision = settings.routes.decide(pattern.replace("**", "a").replace("*", "a") if "." in pattern else "a.b.c")
    environment = settings.launchers[decision.tunnel.partition(":")[0]].environment
    assert TOKEN.items() <= environment.items() if own else not TOKEN.keys() & environment.keys()


def test_stranger_with_a_domain_does_not_learn_the_token(launch, three_files, edge, ports):
    edge.far("*", (HOST, 1))
    program = launch(ports, "--route=*.example.com=carrier:{name}", "--route=*=carrier:{name}", program=three_files,
                     python=BARE_PYTHON, env={**BARE, **edge.environ, **TOKEN})
    shown = {}
    for name in ("db.example.com", "db.example.org"):
        with program.connect(genuine_hello(name)) as client:
            read_all(client)
        shown[name] = {key.lower(): value for key, value in edge.requests(name)[0]["headers"]}
    assert shown["db.example.com"]["cf-access-client-secret"] == "s3cret"
    assert shown["db.example.com"]["cf-access-token"] == "jwt.jwt"
    assert not [key for key in shown["db.example.org"] if key.startswith("cf-")]
    assert program.log().count("the Access token is not shown there") == 1


FAULTS = {  # what goes wrong at the edge -> reason, alert, words, dials
    "login": ({"service_token": ["id", "secret"]}, "tunnel_denied", 49, "Access wants a login", 1),
    "403": ({"deny": 403}, "tunnel_denied", 49, "Access denied it", 1),
    "404": ({"status": 404}, "tunnel_unknown", 112, "the edge knows no such application", 1),
    "certificate": ({"cert": "expired"}, "tunnel_failed", 80, "the edge's certificate is not trusted: certificate has expired",
                    1),
    "502": ({"status": 502}, "tunnel_failed", 80, "its connector runs, but cannot reach the service", 2),
    "530": ({"status": 530, "body": "error code: 1033"}, "tunnel_failed", 80,
            "its tunnel is down (does its connector run?): HTTP 530, error 1033", 2),
    "reset": ({"rst": "tls"}, "tunnel_failed", 80, "the edge closed the connection: in the TLS handshake", 2),
}


@pytest.mark.parametrize("fault, reason, description, words, dials", FAULTS.values(), ids=FAULTS)
def test_refusal_says_what_the_carrier_met(carried, edge, fault, reason, description, words, dials):
    edge.fault("db.example.com", **fault)
    program = carried(CARRIED)
    with program.connect(HELLO) as client:
        assert read_all(client) == alert(description)
    program.wait_for(f" reason={reason} ")
    assert f"db.example.com: {words}" in program.log()
    assert len(wait_until(lambda: len(found := edge.ends()) == dials and found)) == dials


def test_reasons_of_clients_that_come_together_are_not_mixed_up(carried, edge):
    """Three names, fifteen clients at once: each line has the words for its own name."""
    words = {"a": "Access denied it", "b": "the edge knows no such application", "c": "its tunnel is down"}
    for label, status in zip(words, (403, 404, 530), strict=True):
        edge.fault(f"{label}.example.com", status=status)
    program = carried(CARRIED)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(program.connect(genuine_hello(f"{label}.example.com")))
                   for _ in range(5) for label in words]
        for client in clients:
            assert read_all(client)[:1] == b"\x15"
    program.wait_for(" reason=tunnel_", 15)
    for line in program.log().splitlines():
        if " reason=tunnel_" in line:
            assert words[re.search(r" name=(.)\.", line)[1]] in line


def test_client_that_leaves_while_the_edge_hangs_is_let_go_at_once(carried, edge):
    edge.fault("db.example.com", hang="upgrade")
    program = carried(CARRIED)
    with program.connect(HELLO):
        wait_until(edge.requests)
    end, = wait_until(edge.ends, timeout=3)
    assert end["left"] in ("eof", "reset", "close_notify")
    program.wait_for(" reason=client_left")


def explained(three_files: pathlib.Path, edge: Edge) -> subprocess.CompletedProcess[str]:
    return execute(*BARE_PYTHON, str(three_files), "explain", "db.example.com", CARRIED, env={**BARE, **edge.environ},
                   text=True, said="")


def test_explain_dials_the_far_end_once(three_files, edge, echo_server):
    edge.far("db.example.com", echo_server.address)
    ended = explained(three_files, edge)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert (lines[2], lines[4:]) == ("target:  cloudflared:db.example.com", ["far end: it answers"])
    assert len(edge.requests()) == 1


def test_explain_says_what_the_far_end_says(three_files, edge):
    edge.fault("db.example.com", deny=403)
    ended = explained(three_files, edge)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.endswith("refused: db.example.com: Access denied it (is the token right, and does the "
                                 "application's policy allow it?): HTTP 403 (tunnel_denied, TLS alert 49)\n"
                                 f"to do:   {REFUSALS['tunnel_denied'].advice}\n")


# -- a file of settings ------------------------------------------------------------------------


def toml(value: Any) -> str:
    """A list of texts, or a text, as TOML."""
    return json.dumps(value)


@pytest.fixture
def settings_file(tmp_path: pathlib.Path) -> Callable[[str], str]:
    """settings_file(text) -> the path of a file with it; each call replaces the last."""
    path = tmp_path / "sniroute.toml"

    def write(text: str) -> str:
        new = tmp_path / "new.toml"
        new.write_text(text)
        new.replace(path)
        return str(path)

    return write


@pytest.mark.parametrize("name", [row.name for row in SETTINGS if row.name not in ("config", "route")])
def test_a_setting_in_the_file_is_what_it_is_in_the_environment_which_comes_first(name, settings_file):
    _, _, text, value = SAMPLES[name]
    given, on_line = SAMPLES[name][:2]
    row = next(row for row in SETTINGS if row.name == name)
    path = settings_file(f"{row.field} = {toml(text.split() if row.many else text)}\n")
    assert getattr(load_settings(["--config", path], {}), row.field) == value
    assert getattr(load_settings([], {"SNIROUTE_CONFIG": path}), row.field) == value
    argv = [word for each in given for word in (f"--{name}", each)]
    assert getattr(load_settings(["-c", path, *argv], {}), row.field) == on_line
    other = " ".join(given)
    assert getattr(load_settings(["-c", path], {variable(name): other}), row.field) == on_line


def test_the_file_has_types_of_its_own(settings_file):
    settings = load_settings(["-c", settings_file(
        'listen = ":1"\nmax_tunnels = 7\nproxy_from = ["192.0.2.0/24", "2001:db8::/32"]\n')], {})
    assert (settings.listen, settings.max_tunnels) == ([("*", 1)], 7)
    assert [str(network) for network in settings.proxy_from] == ["192.0.2.0/24", "2001:db8::/32"]


ROUTES_FILE = """
[routes]
"DB.example.com" = "tcp:192.0.2.10:5432"
"*.example.com" = { target = "cloudflared:{name}", idle = "1h", allow = ["192.0.2.0/24", "198.51.100.7"] }
[routes."**.example.org"]
target = "tcp:{label}.internal:443"
send_proxy = "v2"
max_connections = 50
connection_idle = "off"
"""


def test_routes_in_the_file_have_options(settings_file):
    path = settings_file(ROUTES_FILE)
    settings = load_settings(["-c", path], {})
    network = ipaddress.ip_network
    assert settings.routes.routes == (
        Route("db.example.com", "tcp:192.0.2.10:5432"),
        Route("*.example.com", "cloudflared:{name}", idle=3600.0,
              allow=(network("192.0.2.0/24"), network("198.51.100.7/32"))),
        Route("**.example.org", "tcp:{label}.internal:443", send_proxy="v2", max_connections=50, connection_idle=0.0))
    assert not settings.open_to_all
    replaced = load_settings(["-c", path, "--route", "a.b=tcp:h:1"], {})
    assert replaced.routes.routes == (Route("a.b", "tcp:h:1"),)


def test_all_that_is_wrong_with_the_file_is_said_at_once(settings_file):
    path = settings_file("""
listen = 19000
max-tunnels = 50
max_starting = true
idel = "10m"
colour = 1
log_level = 3
proxy_from = ["192.0.2.1/24"]
config = "other"
[routes]
db.example.com = "cloudflared:cft-{name}"
"*.example.com" = { target = "cloudflared:{name}", idle = "1", allow = ["x"], sendproxy = "v2" }
"c.example.com" = { target = "tcp:192.0.2.10:5432", send_proxy = "v3", max_connections = 0, idle = "1h" }
"*.*" = "tcp:h:1"
"d.example.com" = 5
"a\\u001bb" = "tcp:h:1"
""")
    with pytest.raises(SettingsError) as caught:
        load_settings(["-c", path, "--drain", "soon"], {})
    lines = [line.removeprefix(f"{path}: ") for line in caught.value.lines]
    assert lines == [
        "listen: '19000' is not HOST:PORT",
        "max-tunnels: there is no such setting; did you mean max_tunnels?",
        "max_starting: 'true' is not a whole number from 1 to 1000000",
        "idel: there is no such setting; did you mean idle?",
        "colour: there is no such setting; there are " + ", ".join(
            [row.field for row in SETTINGS if row.name not in ("config", "route")] + ["routes"]),
        "log_level: '3' is none of debug, info, warning, error",
        "proxy_from: 192.0.2.1/24 has host bits set: a network is 192.0.2.0/24, or one address",
        "config: there is no such setting" + lines[7].removeprefix("config: there is no such setting"),
        'routes."db": has no target (a pattern goes in quotes, as "db.example.com" = "tcp:192.0.2.10:5432")',
        "routes.\"*.example.com\".idle: '1' is not a duration such as 300s, 5m, 1h30m or 500ms",
        "routes.\"*.example.com\".allow: 'x' does not appear to be an IPv4 or IPv6 network: "
        "a network is 192.0.2.0/24, or one address",
        "routes.\"*.example.com\".sendproxy: there is no such option; did you mean send_proxy?",
        "routes.\"c.example.com\".send_proxy: 'v3' is none of as-received, none, v1, v2",
        "routes.\"c.example.com\".max_connections: '0' is not a whole number from 1 to 1000000",
        'routes."c.example.com".idle: is for tunnels; here connection_idle closes what is silent',
        "routes.\"*.*\": '*.*' is not a name, *.NAME, **.NAME or * (NAME has two labels at least)",
        "routes.\"d.example.com\": 'd.example.com=5' is not PATTERN=SCHEME:REST",
        'routes."a?b": ' + lines[17].partition(": ")[2],
        "--drain: 'soon' is not a duration such as 300s, 5m, 1h30m or 500ms"]
    assert all(re.fullmatch("[ -~]+", line) for line in lines)


@pytest.mark.parametrize("text, complaint", [
    ("a = [", r"sniroute\.toml: Invalid value \(at end of document\)"),
    ("idle = '1s'\nidle = '2s'\n", r"Cannot overwrite a value \(at line 2"),
    ("[routes]\n*.example.com = 'tcp:h:1'\n", r"Invalid .* \(at line 2, column 1\)"),
    ("routes = 3", r"routes: is no table of routes, as "),
    ("[routes]\n", r"routes: is no table of routes, as "),
    ("listen = []", r"listen: '' is not HOST:PORT"),
    ('[routes]\n"a.b" = "tcp:h:1"\n"A.b" = "tcp:h:1"\n', r"sniroute\.toml: routes: a\.b is routed twice"),
    ("x = " + "[" * 5000, r"sniroute\.toml: "),
], ids=["syntax", "twice", "no-quotes", "no-table", "no-routes", "no-address", "one-name-twice", "deep"])
def test_a_file_that_is_none_is_refused(settings_file, text, complaint):
    with pytest.raises(SettingsError, match=complaint) as caught:
        load_settings(["-c", settings_file(text)], {})
    assert len(caught.value.lines) == 1


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    missing, binary, public = (str(tmp_path / name) for name in ("missing", "binary", "public"))
    pathlib.Path(binary).write_bytes(b"\xff\xfe")
    pathlib.Path(public).write_text("")
    os.chmod(public, 0o666)
    for path, complaint in ((missing, "No such file"), (str(tmp_path), "Is a directory"), (binary, "codec can't"),
                            (public, "can be changed by other users: chmod o-w")):
        with pytest.raises(SettingsError, match=re.escape(path) + ": .*" + complaint):
            load_settings(["-c", path], {})


def test_a_reload_reads_a_file_again_and_nothing_else(settings_file, tmp_path):
    running = load_settings(["-c", settings_file(ROUTES_FILE)], {})
    settings_file("")  # somebody is writing it
    with pytest.raises(SettingsError, match="there are no routes any more: every name would be served"):
        running.again(running)
    os.unlink(running.config)
    os.mkfifo(running.config)
    with pytest.raises(SettingsError, match="is no regular file, and cannot be read again"):
        running.again(running)


def test_every_beginning_of_a_file_is_settings_or_a_complaint(settings_file):
    whole = 'max_tunnels = 5\nlisten = [":1", "[::1]:2"]\n' + ROUTES_FILE
    good = 0
    for end in range(0, len(whole), 3):
        path = settings_file(whole[:end])
        try:
            load_settings(["-c", path], {})
            good += 1
        except SettingsError as error:
            assert all(line.startswith(path) for line in error.lines)
    assert 3 < good < end / 3


@pytest.mark.parametrize("text, good", [
    ("unix:/run/sniroute/admin.sock", "/run/sniroute/admin.sock"), ("127.0.0.1:1", ("127.0.0.1", 1)),
    ("[::1]:0", ("::1", 0)), ("localhost:1", ("localhost", 1)), ("192.0.2.1:1", None), (":1", None), ("unix:", None),
    ("unix:/" + "x" * 90, None), ("unix:/a\0b", None), ("unix:/a b", None), ("example.com:1", None), ("0.0.0.0:1", None),
])
def test_an_admin_address_is_loopback_or_a_path(text, good):
    if good is None:
        with pytest.raises(ValueError):
            sniroute_settings.parse_admin(text)
    else:
        assert sniroute_settings.parse_admin(text) == good


def test_a_token_for_the_admin_is_no_joke():
    assert load_settings([], {"SNIROUTE_ADMIN_TOKEN": "0123456789abcdef"}).admin_token == "0123456789abcdef"
    assert load_settings([], {}).admin_token is None
    for token in ("short", "with spaces in it, many", "\x1b0123456789abcdef"):
        with pytest.raises(SettingsError) as caught:
            load_settings([], {"SNIROUTE_ADMIN_TOKEN": token})
        assert token not in str(caught.value)


def test_check_prints_the_routes_as_they_are_matched(settings_file, capsys):
    path = settings_file(ROUTES_FILE + '[routes."*"]\ntarget = "tcp:192.0.2.1:1"\n[routes."**.example.com"]\n'
                         'target = "cloudflared:{name}"\n[routes."*.a.example.com"]\ntarget = "tcp:{name}:1"\n'
                         'allow = "none"\n')
    assert sniroute.main(["check", "-c", path]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "db.example.com=tcp:192.0.2.10:5432",
        "*.a.example.com=tcp:{name}:1 (allow none)",
        "*.example.com=cloudflared:{name} (allow 192.0.2.0/24,198.51.100.7/32; idle 3600 s)",
        "**.example.com=cloudflared:{name}",
        "**.example.org=tcp:{label}.internal:443 (send_proxy v2; max_connections 50; connection_idle off)",
        "*=tcp:192.0.2.1:1"]


# -- what a route may ask for ------------------------------------------------------------------

ROUTED_HEADER = v1("TCP4 192.0.2.1 192.0.2.9 1111 443")
LOCAL_HEADER = v2(0x20, 0x00)


@pytest.fixture
def run_file(run, settings_file) -> Callable[..., Running]:
    """run_file(address, *options): a router with one route, db.example.com to that address, with options in TOML."""
    return lambda address, *options, **more: run("-c", settings_file(
        f'[routes."db.example.com"]\ntarget = "tcp:{address[0]}:{address[1]}"\n' + "\n".join(options)), **more)


@pytest.mark.parametrize("how, said, expected", [
    ("as-received", b"", lambda own: b""),
    ("as-received", ROUTED_HEADER, lambda own: ROUTED_HEADER),
    ("none", ROUTED_HEADER, lambda own: b""),
    ("none", b"", lambda own: b""),
    ("v1", b"", lambda own: sniroute_wire.proxy_v1(*own)),
    ("v2", b"", lambda own: sniroute_wire.proxy_v2(*own)),
    ("v1", LOCAL_HEADER, lambda own: b"PROXY UNKNOWN\r\n"),
    ("v2", v1("UNKNOWN"), lambda own: v2(0x20, 0x00)),
    ("v2", ROUTED_HEADER, lambda own: sniroute_wire.proxy_v2(("192.0.2.1", 1111), ("192.0.2.9", 443))),
    ("v1", v2(0x21, 0x11, INET), lambda own: v1("TCP4 192.0.2.1 192.0.2.2 1111 443")),
])
def test_a_route_says_what_its_backend_hears_of_the_client(run_file, echo_server, how, said, expected):
    running = run_file(echo_server.address, f'send_proxy = "{how}"')
    with running.connect(said + HELLO) as client:
        header = expected((client.getsockname(), client.getpeername()))
        assert read_exactly(client, len(header + HELLO)) == header + HELLO


def test_a_header_of_ours_goes_before_the_question_for_tls(run_file, serve):
    header = sniroute_wire.proxy_v2(("192.0.2.1", 1111), ("192.0.2.9", 443))

    def backend(sock: socket.socket) -> list[bytes]:
        asked = read_exactly(sock, len(header + ASK_TLS))
        sock.sendall(b"S")
        spoken = read_exactly(sock, len(HELLO))
        sock.sendall(b"x")
        return [asked, spoken]

    far = serve(backend)
    running = run_file(far.address, 'send_proxy = "v2"')
    with running.connect(ROUTED_HEADER + ASK_TLS) as client:
        assert client.recv(1) == b"S"
        client.sendall(HELLO)
        assert client.recv(1) == b"x"
    assert far.result() == [header + ASK_TLS, HELLO]


@pytest.mark.parametrize("source, allowed", [
    ("192.0.2.1", True), ("198.51.100.7", True), ("198.51.100.8", False), ("2001:db8::5", True), ("2001:db9::5", False),
    ("::ffff:192.0.2.1", True), ("::ffff:203.0.113.1", False),
])
def test_a_route_may_be_for_some_clients_only(run_file, echo_server, source, allowed):
    running = run_file(echo_server.address, 'allow = ["192.0.2.0/24", "198.51.100.7", "2001:db8::/32"]')
    family = "TCP6" if ":" in source else "TCP4"
    other = "::1" if ":" in source else "192.0.2.9"
    header = v1(f"{family} {source} {other} 1 2")
    with running.connect(header + HELLO) as client:
        if allowed:
            assert read_exactly(client, len(header + HELLO)) == header + HELLO
        else:
            assert read_all(client) == alert(49)
    assert running.ending().reason == ("client_closed" if allowed else "not_allowed")
    assert running.ending().route == "db.example.com" and echo_server.accepted == allowed


def test_a_route_has_as_many_connections_as_it_may_have(run_file, echo_server):
    running = run_file(echo_server.address, "max_connections = 2")
    tally = running.router.routes.tallies["db.example.com"]
    with running.connect(HELLO) as one, running.connect(HELLO) as two:
        for client in (one, two):
            assert read_exactly(client, len(HELLO)) == HELLO
        with running.connect(HELLO) as third:
            assert read_all(third) == alert(80)
        assert running.ending().reason == "route_limit" and tally.active == 2
    running.ending(3)
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    running.ending(4)
    assert (tally.active, tally.total, tally.refused) == (0, 4, 1)
    assert tally.up == tally.down == 3 * len(HELLO)


def test_who_is_not_allowed_takes_no_place_on_the_route(run_file, echo_server):
    running = run_file(echo_server.address, 'allow = ["192.0.2.1"]', "max_connections = 1")
    tally = running.router.routes.tallies["db.example.com"]
    with running.connect(HELLO) as stranger:  # it does not close: its connection lingers
        wait_until(lambda: running.counter("accepted") == 1 and any(
            c.state == "lingering" for c in list(running.router.connections)))
        assert tally.active == 0
        with running.connect(ROUTED_HEADER + HELLO) as client:
            assert read_exactly(client, len(ROUTED_HEADER + HELLO)) == ROUTED_HEADER + HELLO
            assert tally.active == 1
        assert read_all(stranger) == alert(49)
    running.ending(2)
    assert (tally.active, tally.total, tally.refused) == (0, 2, 1)


def test_a_route_has_an_idle_time_of_its_own(run_file, echo_server):
    running = run_file(echo_server.address, 'connection_idle = "400ms"', "[routes.\"x.example.com\"]",
                       f'target = "tcp:{HOST}:{echo_server.address[1]}"')
    other = genuine_hello("x.example.com")
    with running.connect(HELLO) as short, running.connect(other) as long:
        assert read_exactly(short, len(HELLO)) == HELLO
        assert read_exactly(long, len(other)) == other
        assert running.ending().reason == "idle" and running.ending().name == "db.example.com"
        long.sendall(b"still")
        assert long.recv(9)


# -- other settings for a router that runs -----------------------------------------------------


def test_hangup_brings_other_settings_and_cuts_nothing(launch, settings_file, echo_server, serve):
    port, other = echo_server.address[1], serve(answer(b"new", len(HELLO))).address[1]
    path = settings_file(f'log_level = "debug"\nports = "11000-11001"\n[routes]\n"db.example.com" = "tcp:{HOST}:{port}"\n')
    program = launch("-c", path)
    new_hello = genuine_hello("new.example.com")
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        with program.connect(new_hello) as early:
            assert read_all(early) == alert(112)
        settings_file('log_level = "info"\nports = "12000-12001"\nmax_per_client = 7\nlisten = ":1"\n'
                      f'[routes]\n"new.example.com" = "tcp:{HOST}:{other}"\n')
        program.signal(signal.SIGHUP)
        program.wait_for(" info reload: done, routes: 1\n")
        assert f" warning reload: {path}: ports: is for the next start; it stays as it is\n" in program.log()
        assert " listen: is for" not in program.log(), "that one is on the command line"
        with program.connect(new_hello) as late:
            assert late.recv(3) == b"new"
        with program.connect(HELLO) as gone:
            assert read_all(gone) == alert(112)
        client.sendall(b"still here")
        assert read_exactly(client, 10) == b"still here"


def test_a_bad_file_changes_nothing_and_says_why(launch, settings_file, echo_server):
    good = f'[routes]\n"db.example.com" = "tcp:{HOST}:{echo_server.address[1]}"\n'
    path = settings_file(good)
    program = launch("-c", path)
    for number, (text, complaint) in enumerate((
            ("[routes]\n'db.example.com' = 'tcp:h'\n", "is not HOST:PORT"), ("idle = ", "Invalid value"),
            ("idel = 1\nmax_tunnels = 'x'\n", "did you mean idle?"), (None, "No such file or directory")), 1):
        os.unlink(path) if text is None else settings_file(text)
        program.signal(signal.SIGHUP)
        program.wait_for(" error reload: nothing has changed\n", number)
        assert re.search(f" error reload: {path}: .*{re.escape(complaint)}", program.log())
        with program.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
    settings_file(good)
    program.signal(signal.SIGHUP)
    program.wait_for(" info reload: done, routes: 1\n")


def adopted(running: Running, *argv: str) -> None:
    """Have the router go on with other settings."""
    done = threading.Event()
    settings = load_settings(["--listen", f"{HOST}:0", *argv], {}, running.router.settings)
    running.router.call(lambda: (running.router.adopt(settings), done.set()))
    assert done.wait(10)


def test_other_settings_apply_from_the_next_connection_on(run, echo_server):
    running = run(route(echo_server.address), "--no-name=refuse")
    with running.connect(HELLO) as client, running.connect(ROUTED_HEADER + HELLO) as proxied:
        assert read_exactly(client, len(HELLO)) == HELLO
        assert read_exactly(proxied, len(ROUTED_HEADER + HELLO)) == ROUTED_HEADER + HELLO
        tally = running.router.routes.tallies["db.example.com"]
        adopted(running, route(echo_server.address), "--no-name=ok", "--proxy-protocol=off", "--prelude-timeout=300ms",
                "--max-per-client=3")
        assert running.router.routes.tallies["db.example.com"] is tally and tally.active == 2
        with running.connect(genuine_hello(None)) as nameless:
            assert read_all(nameless) == b"OK\n"
        with running.connect(ROUTED_HEADER + HELLO) as refused:
            assert read_all(refused) == b""
        wait_until(lambda: running.counter("proxy") == 1)
        with running.connect() as silent:
            assert read_all(silent) == b""
        wait_until(lambda: running.counter("prelude_timeout") == 1)
        for each in (client, proxied):
            each.sendall(b"on")
            assert read_exactly(each, 2) == b"on"
        counts = {peer.key: peer.count for peer in running.router.peers.known.values()}
        assert counts["192.0.2.1"] == 1, "who is connected counts on"
    wait_until(lambda: not running.router.connections)
    assert all(peer.count == 0 for peer in running.router.peers.known.values()) and tally.active == 0


def test_who_is_silent_meets_the_new_rules_for_proxy_headers(run, echo_server, monkeypatch):
    running = run(route(echo_server.address), "--proxy-from=192.0.2.0/24")
    with running.connect() as silent:
        wait_until(lambda: running.counter("accepted") == 1)
        adopted(running, route(echo_server.address), "--proxy-protocol=required", "--proxy-from=192.0.2.0/24")
        assert read_all(silent) == b"" and running.ending().reason == "proxy"


def test_a_route_that_comes_back_has_its_connections_still(run, echo_server):
    running = run(route(echo_server.address))
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        tally = running.router.routes.tallies["db.example.com"]
        adopted(running, "--route=x.example.com=tcp:127.0.0.1:1")
        adopted(running, route(echo_server.address))
        assert running.router.routes.tallies["db.example.com"] is tally and tally.active == 1
        adopted(running, "--route=x.example.com=tcp:127.0.0.1:1")
    wait_until(lambda: not running.router.connections)
    adopted(running, "--route=x.example.com=tcp:127.0.0.1:1")
    assert set(running.router.routes.tallies) == {"x.example.com"}


def test_more_connections_are_taken_at_once_when_more_may_be(run, echo_server):
    running = run(route(echo_server.address), "--max-connections=1")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        with running.connect(HELLO) as waiting:
            wait_until(lambda: running.router.paused, what="the pause")
            adopted(running, route(echo_server.address), "--max-connections=2")
            assert read_exactly(waiting, len(HELLO)) == HELLO


# -- a successor -------------------------------------------------------------------------------


class Customers:
    """Clients that come one after the other, in several threads, and note who was refused or cut."""

    def __init__(self, address: Address, threads: int = 4):
        self.address = address
        self.served = 0
        self.failures: list[str] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._come, name="customer") for _ in range(threads)]

    def __enter__(self) -> Customers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _come(self) -> None:
        while not self.stop.is_set():
            try:
                with socket.create_connection(self.address, 20) as client:
                    client.sendall(HELLO)
                    assert read_exactly(client, len(HELLO)) == HELLO
                self.served += 1
            except (OSError, AssertionError) as error:
                self.failures.append(repr(error))
                return


@linux
def test_ten_restarts_refuse_nobody_and_cut_nobody(launch, free_ports, single_loop_echo):
    """Each is a second process with the same --listen, which takes over."""
    port = free_ports(1)[0]
    options = f"--listen={HOST}:{port}", route(single_loop_echo), "--drain=60s"
    programs = [launch(*options)]
    with Customers((HOST, port)) as customers, programs[0].connect(HELLO) as old:
        assert read_exactly(old, len(HELLO)) == HELLO
        for _ in range(10):
            programs.append(launch(*options))
            programs[-1].wait_for(" info another sniroute listened there: it drains, and ends\n")
            goal = customers.served + 100
            wait_until(lambda: customers.served >= goal or customers.failures, timeout=20, what="a hundred customers")
        for program in programs[1:-1]:
            assert program.wait() == 0
        old.sendall(b"the first is still there for me")
        assert read_exactly(old, 31) == b"the first is still there for me"
    assert customers.failures == [] and customers.served >= 1000
    assert programs[0].wait() == 0
    assert programs[0].log().count(" reason=client_closed") >= 1


@linux
def test_a_successor_that_fails_changes_nothing(launch, free_ports, echo_server):
    port = free_ports(1)[0]
    program = launch(f"--listen={HOST}:{port}", route(echo_server.address))
    ended = command(f"--listen={HOST}:{port}", f"--listen=192.0.2.1:{port}", route(echo_server.address))
    assert ended.returncode == 1 and f"--listen 192.0.2.1:{port}: Cannot assign requested address" in ended.stderr
    with socket.socket(socket.AF_UNIX) as curious:
        curious.connect(sniroute_daemon.Handover.name((HOST, port)))
        assert socket.recv_fds(curious, 16, 0)[0] == b"sockets"
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    assert "another sniroute" not in program.log()


@linux
@pytest.mark.parametrize("host", ["", "0.0.0.0", pytest.param("[::]", marks=ipv6), pytest.param("[::1]", marks=ipv6)])
def test_a_successor_of_any_address_takes_over(launch, free_ports, echo_server, host):
    """The default, every address, is one of two families."""
    options = f"--listen={host}:{free_ports(1)[0]}", route(echo_server.address)
    first = launch(*options)
    second = launch(*options)
    assert first.wait() == 0 and " info another sniroute listens here now\n" in first.log()
    with second.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO


@linux
def test_more_addresses_than_can_be_handed_over_stop_the_start(free_ports, echo_server):
    port = free_ports(1)[0]
    ended = command(*(f"--listen=127.0.1.{n}:{port}" for n in range(127)), route(echo_server.address))
    assert ended.returncode == 1
    assert ended.stderr.endswith("--listen: 127 addresses, and only 126 can be handed over to a successor: "
                                 "name fewer, or all of them as :PORT\n")


@linux
def test_as_many_addresses_as_that_are_handed_over(launch, free_ports, echo_server):
    port = free_ports(1)[0]
    options = *(f"--listen=127.0.1.{n}:{port}" for n in range(126)), route(echo_server.address)
    first = launch(*options, listeners=126)
    second = launch(*options, listeners=126)
    assert first.wait() == 0 and "not handed over" not in second.log()


@linux
def test_silent_owners_of_many_names_cost_one_time_out_in_all_and_are_asked_in_one_order(free_ports, monkeypatch):
    """Two successors that asked in two orders could each have what the other waits for."""
    monkeypatch.setattr(sniroute_daemon, "HANDOVER_TIMEOUT", 1.0)
    monkeypatch.setattr(sniroute_loop, "CAPACITY_PAUSE", 0.01)
    asked: list[Address] = []
    name = sniroute_daemon.Handover.name
    monkeypatch.setattr(sniroute_daemon.Handover, "name", staticmethod(lambda address: asked.append(address) or name(address)))
    first, last = free_ports(8)
    addresses = [(HOST, port) for port in range(first, last + 1)]
    with contextlib.ExitStack() as stack:
        silent, taker = (stack.enter_context(contextlib.closing(sniroute_daemon.Handover())) for _ in range(2))
        assert silent.offer(addresses) == []
        asked.clear()
        began = time.monotonic()
        assert taker.take(reversed(addresses)) == [] and time.monotonic() - began < 4
    assert asked == addresses


@linux
def test_who_fills_the_backlog_of_a_name_only_holds_a_successor_up(free_ports, monkeypatch):
    """Any user of the host may connect to it; the kernel then tells a successor to try again."""
    address = HOST, free_ports(1)[0]
    found: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        giver, taker = (stack.enter_context(contextlib.closing(sniroute_daemon.Handover())) for _ in range(2))
        listener = stack.enter_context(socket.create_server(address))
        assert giver.offer([address]) == []
        with contextlib.suppress(BlockingIOError):
            while True:
                filler = stack.enter_context(socket.socket(socket.AF_UNIX))
                filler.setblocking(False)
                filler.connect(giver.name(address))
                filler.close()
        again, sleep = threading.Event(), time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: again.set() or sleep(seconds))
        thread = threading.Thread(target=lambda: found.extend(taker.take([address])))
        thread.start()
        assert again.wait(10)
        while thread.is_alive():
            channel = giver.accept(giver.names[0])
            if channel is not None:
                giver.give(channel, [listener])
            sleep(0.001)
        thread.join()
        assert [sock.getsockname() for sock in found] == [address]
        found[0].close()


@linux
def test_an_address_is_free_once_its_name_is(launch, free_ports, echo_server):
    """Of two that share a router's addresses, the second finds no name then, and listens itself."""
    first, last = free_ports(3)
    mine, free, admin = ((HOST, port) for port in range(first, last + 1))
    program = launch(f"--listen={HOST}:{mine[1]}", f"--listen={HOST}:{free[1]}", f"--admin={HOST}:{admin[1]}",
                     route(echo_server.address), listeners=2)
    program.wait_for(" info admin on ")
    with contextlib.closing(sniroute_daemon.Handover()) as taker, socket.socket(socket.AF_UNIX) as waiting:
        taken, = taker.take([mine])
        waiting.connect(taker.name(free))
        thread = threading.Thread(target=taker.dismiss)
        thread.start()
        with taken, pytest.raises(ConnectionResetError):
            waiting.recv(1)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(free)
            listener.listen()
        thread.join()
    assert program.wait() == 0


@linux
def test_a_successor_may_come_while_the_first_drains(launch, free_ports, echo_server):
    options = *(f"--listen={HOST}:{port}" for port in free_ports(2)), route(echo_server.address)
    launch = functools.partial(launch, listeners=2)
    first = launch(*options)
    with first.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        first.signal(signal.SIGTERM)
        first.wait_for(" info draining: ")
        second = launch(*options)
        with second.connect(HELLO) as other:
            assert read_exactly(other, len(HELLO)) == HELLO
        client.sendall(b"on")
        assert read_exactly(client, 2) == b"on"
    assert first.wait() == 0
    third = launch(*options)
    with third.connect(HELLO) as other:
        assert read_exactly(other, len(HELLO)) == HELLO
    assert second.wait() == 0
    assert "not handed over" not in second.log() + third.log()


@linux
@pytest.mark.parametrize("giver_sees, taker_sees, taken", [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_sockets_are_neither_given_to_nor_taken_from_another_user(giver_sees, taker_sees, taken, monkeypatch, free_ports):
    address = HOST, free_ports(1)[0]
    found: list[socket.socket] = []
    with contextlib.closing(sniroute_daemon.Handover()) as giver, contextlib.closing(sniroute_daemon.Handover()) as taker, \
            socket.create_server(address) as listener:
        assert giver.offer([address]) == [] and taker.offer([address]) == [address], "the name has one owner"
        monkeypatch.setattr(giver, "is_ours", lambda peer: not giver_sees)
        monkeypatch.setattr(taker, "is_ours", lambda peer: not taker_sees)
        monkeypatch.setattr(sniroute_daemon, "HANDOVER_TIMEOUT", 0.3)
        thread = threading.Thread(target=lambda: found.extend(taker.take([address])))
        thread.start()
        while thread.is_alive():
            channel = giver.accept(giver.names[0])
            if channel is not None:
                given = giver.give(channel, [listener])
                assert given or taker_sees, "one that has seen who this is may have left"
            time.sleep(0.001)
        thread.join()
        assert [sock.getsockname() for sock in found] == [address] * taken
        for sock in found:
            sock.close()


@linux
def test_it_is_told_whose_process_the_other_is(monkeypatch):
    one, other = socket.socketpair()
    with one, other:
        assert sniroute_daemon.Handover.is_ours(one)
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
        assert not sniroute_daemon.Handover.is_ours(one)


@linux
def test_of_two_successors_at_once_the_second_follows_the_first(launch, free_ports, single_loop_echo):
    port = free_ports(1)[0]
    options = f"--listen={HOST}:{port}", route(single_loop_echo)
    first = launch(*options)
    with Customers((HOST, port)) as customers:
        both = [launch(*options, listeners=0) for _ in range(2)]
        for program in both:
            program.wait_for(" info another sniroute listened there: it drains, and ends\n")
        wait_until(lambda: any(program.process.poll() == 0 for program in both), what="the end of the one between")
        goal = customers.served + 20
        wait_until(lambda: customers.served >= goal or customers.failures)
    assert first.wait() == 0 and customers.failures == []
    assert sum(program.process.poll() is None for program in both) == 1


@linux
def test_there_is_no_moment_without_a_name_between_two_owners(free_ports):
    """Who came then found nobody, and the address in use."""
    address, other = ((HOST, port) for port in free_ports(2))
    with contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(contextlib.closing(sniroute_daemon.Handover())) for _ in range(3))
        listener = stack.enter_context(socket.create_server(address))
        assert first.offer([other, address]) == []
        def give(giver: sniroute_daemon.Handover, taker: sniroute_daemon.Handover, name: int) -> None:
            found: list[socket.socket] = []
            thread = threading.Thread(target=lambda: found.extend(taker.take([address])))
            thread.start()
            channel = wait_until(lambda: giver.accept(giver.names[name]))
            assert giver.give(channel, [listener])
            thread.join()
            assert [sock.getsockname() for sock in found] == [address]
            found[0].close()
            giver.withdraw()
        give(first, second, 1)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(sniroute_daemon.Handover.name(address))  # in the backlog of whoever comes
        assert second.offer([address]) == [] and len(second.names) == 1 and not second.inherited
        assert stack.enter_context(second.accept(second.names[0])) is not None
        give(second, third, 0)
        assert third.offer([other, address]) == [], "the one that nobody wanted is free"


@linux
def test_a_name_that_another_process_has_is_taken_later(launch, free_ports, echo_server, monkeypatch):
    address = HOST, free_ports(1)[0]
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(sniroute_daemon.Handover.name(address))
        squatter.listen()
        with contextlib.closing(sniroute_daemon.Handover()) as taker:
            monkeypatch.setattr(sniroute_daemon, "HANDOVER_TIMEOUT", 0.1)
            assert taker.take([address]) == [], "it says nothing: that is no predecessor"
    with contextlib.closing(sniroute_daemon.Handover()) as handover:
        assert handover.offer([address]) == []


@linux
def test_a_predecessor_that_drains_hears_a_signal_and_lets_idle_tunnels_go(launch, free_ports, cloudflared, ports, serve):
    """Its first SIGTERM is no second one, and the ports of tunnels that nobody uses are free for the successor."""
    cloudflared.far("*", serve(answer(b"x")).address)
    options = f"--listen={HOST}:{free_ports(1)[0]}", TUNNEL, ports, f"--cloudflared={cloudflared.path}"
    first = launch(*options)
    with first.connect(HELLO) as client:
        with first.connect(genuine_hello("idle.example.com")) as other:
            assert client.recv(1) == other.recv(1) == b"x"
        idle = cloudflared.starts("idle.example.com")[0]["pid"]
        second = launch(*options)
        wait_until(lambda: not cloudflared.runs(idle), what="the end of the tunnel that nobody uses")
        first.signal(signal.SIGTERM)
        with second.connect(HELLO) as new:
            assert new.recv(1) == b"x"
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
        first.signal(signal.SIGTERM)
        assert first.wait() == 0


SYSTEMD = """
import fcntl, os, sys
names, fds, command = sys.argv[1], [int(fd) for fd in sys.argv[2].split(",")], sys.argv[3:]
for number, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]):
    os.dup2(fd, 3 + number)
    os.close(fd)
os.execve(command[0], command, {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)),
                                "LISTEN_FDNAMES": names})
"""


def activated(*sockets: tuple[str, Any]) -> dict[str, Any]:
    """What starts a program with these named sockets, as systemd passes them: words before it, and for Popen."""
    fds = [sock.fileno() for _, sock in sockets]
    return {"python": (sys.executable, "-S", "-c", SYSTEMD, ":".join(name for name, _ in sockets),
                       ",".join(map(str, fds)), sys.executable), "pass_fds": fds}


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """A listening socket that systemd would hold."""
    with socket.create_server((HOST, 0), backlog=512) as listener:
        os.set_inheritable(listener.fileno(), True)
        yield listener


def test_five_restarts_below_systemd_refuse_nobody(launch, held, single_loop_echo):
    """The socket is systemd's: who comes while nobody runs waits in its backlog."""
    with Customers(held.getsockname()) as customers:
        for _ in range(5):
            program = launch("--listen=192.0.2.1:9", route(single_loop_echo), **activated(("sniroute", held)))
            assert program.address == held.getsockname()
            goal = customers.served + 40
            wait_until(lambda: customers.served >= goal or customers.failures, timeout=20, what="forty customers")
            cpu = cpu_seconds(program.pid)
            program.signal(signal.SIGTERM)
            assert program.wait() == 0 and cpu < 5
        program = launch(route(single_loop_echo), **activated(("sniroute", held)))
        customers.stop.set()
    assert customers.failures == [] and customers.served >= 200


@linux
def test_a_draining_router_does_not_spin_over_a_socket_that_systemd_holds(launch, held, echo_server):
    program = launch(route(echo_server.address), **activated(("", held)))
    with program.connect(HELLO) as client, contextlib.ExitStack() as stack:
        assert read_exactly(client, len(HELLO)) == HELLO
        program.signal(signal.SIGTERM)
        program.wait_for(" info draining: 1 ")
        stack.enter_context(socket.create_connection(held.getsockname()))  # it waits in the backlog
        before = cpu_seconds(program.pid)
        for _ in range(50):
            client.sendall(b"?")
            assert client.recv(1) == b"?"
            time.sleep(0.005)
        assert cpu_seconds(program.pid) - before < 0.15


@pytest.mark.parametrize("kind", ["datagrams", "connected", "file", "beyond"])
def test_what_is_no_listening_socket_is_refused(kind, held, tmp_path):
    with contextlib.ExitStack() as stack:
        if kind == "datagrams":
            wrong: Any = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        elif kind == "connected":
            wrong = stack.enter_context(socket.create_connection(held.getsockname()))
        else:
            wrong = stack.enter_context(open(tmp_path / "file", "w"))
        made = activated(("", held), ("x\x1b", wrong))
        if kind == "beyond":
            made = activated(("", held))
            made["python"] = tuple(word.replace("str(len(fds))", "'2'") for word in made["python"])
        ended = execute(*made["python"], str(PROGRAM), "--route=a.b=tcp:h:1", env=environment(), text=True,
                        said="", pass_fds=made["pass_fds"])
    shown = "no name" if kind == "beyond" else "x?"
    assert ended.returncode == 1
    assert f"LISTEN_FDS: descriptor 4 ({shown}) is no listening TCP socket\n" in ended.stderr


def test_sockets_for_another_process_are_left_alone(monkeypatch):
    assert sniroute_daemon.activated_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "3"}) == {"": [], "admin": []}
    assert sniroute_daemon.activated_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}) == {"": [], "admin": []}


# -- the admin's address, as a router has it ---------------------------------------------------


@pytest.fixture
def admin_path() -> Iterator[str]:
    """A path for a unix socket; pytest's own folders are too deep for one."""
    with tempfile.TemporaryDirectory(prefix="sniroute-admin-") as folder:
        yield os.path.join(folder, "socket")


@linux
def test_explain_asks_a_router_that_runs(launch, cloudflared, ports, serve, admin_path):
    cloudflared.far("*", serve(answer(b"x")).address)
    cloudflared.fault("evil.example.com", exit=1, words="goroutine panic")
    options = TUNNEL, ports, f"--cloudflared={cloudflared.path}", f"--admin=unix:{admin_path}"
    program = launch(*options)
    program.wait_for(f" info admin on {admin_path}\n")
    with program.connect(HELLO) as client, program.connect(genuine_hello("evil.example.com")) as other:
        assert client.recv(1) == b"x" and read_all(other) == alert(80)
        ready, failed, absent = (command("explain", name, *options).stdout
                                 for name in (NAME, "evil.example.com", "cold.example.com"))
    assert re.search(rf"\nrouter:  running, pid {program.pid}, \d connections\n"
                     r"tunnel:  ready, for \d+ s, 1 connections\n", ready)
    assert re.search(r"\ntunnel:  failed, next in \d s\nsaid:    .*goroutine panic.*\nto do:   mend what it says", failed)
    assert "\ntunnel:  absent\nto do:   nothing: the next client starts it\n" in absent
    program.stop()
    assert "\nrouter:  no answer from its admin address: " in command("explain", NAME, *options).stdout


@linux
def test_the_admin_address_goes_to_the_successor(launch, free_ports, echo_server, admin_path):
    options = f"--listen={HOST}:{free_ports(1)[0]}", route(echo_server.address), f"--admin=unix:{admin_path}"
    first = launch(*options)
    with first.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        second = launch(*options)
        second.wait_for(" info admin on ")
        first.wait_for(" info draining: ")
        assert sniroute_doctor.ask_admin(admin_path)["pid"] == second.pid
    assert first.wait() == 0
    assert sniroute_doctor.ask_admin(admin_path)["pid"] == second.pid, "the first one left the second's socket alone"
    second.stop()
    assert not os.path.exists(admin_path)


def test_the_admin_address_may_be_systemd_s(launch, held, echo_server):
    with socket.create_server((HOST, 0)) as admin:
        launch(route(echo_server.address), **activated(("sniroute", held), ("admin", admin)))
        assert sniroute_doctor.ask_admin(admin.getsockname())["listening"] == ["%s:%d" % held.getsockname()]


def test_an_admin_address_that_is_taken_stops_the_start(launch, echo_server, held):
    ended = command(f"--listen={HOST}:0", route(echo_server.address), "--admin=%s:%d" % held.getsockname())
    assert ended.returncode == 1 and " error --admin: " in ended.stderr and "Traceback" not in ended.stderr


def test_an_admin_address_needs_the_admin_s_file(two_files):
    ended = execute(*BARE_PYTHON, str(two_files), "check", "--admin=127.0.0.1:1", env=BARE, text=True, said="")
    assert ended.returncode == 2
    assert ended.stderr == "".join(f"sniroute: --admin: {file} is not beside sniroute.py: copy it there\n"
                                   for file in ("sniroute_admin.py", "sniroute_metrics.py", "sniroute_page.py"))


# -- systemd -----------------------------------------------------------------------------------


class Manager:
    """A service manager's end of NOTIFY_SOCKET."""

    def __init__(self, address: str):
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(10)
        self.words: list[str] = []

    def hear(self, beginning: str) -> str:
        """The next assignment that begins so."""
        while True:
            for number, word in enumerate(self.words):
                if word.startswith(beginning):
                    del self.words[:number + 1]
                    return word
            self.words += self.socket.recv(4096).decode().split("\n")


@pytest.fixture
def manager(tmp_path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    with made.socket:
        yield made


def test_systemd_is_told_how_it_goes(launch, manager, echo_server, settings_file):
    path = settings_file(f'[routes]\n"db.example.com" = "tcp:{HOST}:{echo_server.address[1]}"\n')
    program = launch("-c", path, "--drain=30s", env=environment(
        NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="200000"))
    manager.hear("READY=1")
    assert manager.hear("STATUS=") == "STATUS=running: 0 connections, 0 tunnels"
    for _ in range(3):
        manager.hear("WATCHDOG=1")
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        assert manager.hear("STATUS=") == "STATUS=running: 1 connections, 0 tunnels"
        before = time.monotonic_ns() // 1000
        program.signal(signal.SIGHUP)
        manager.hear("RELOADING=1")
        assert before <= int(manager.hear("MONOTONIC_USEC=").partition("=")[2]) <= time.monotonic_ns() // 1000
        manager.hear("READY=1")
        program.signal(signal.SIGTERM)
        manager.hear("STOPPING=1")
        assert int(manager.hear("EXTEND_TIMEOUT_USEC=").partition("=")[2]) > 10e6
        assert manager.hear("STATUS=") == "STATUS=draining: 1 connections, 0 tunnels"
        manager.hear("EXTEND_TIMEOUT_USEC=")
        client.sendall(b"on")
        assert read_exactly(client, 2) == b"on"
    assert program.wait() == 0


def test_a_loop_that_hangs_does_not_feed_the_watchdog(run, echo_server):
    running = run(route(echo_server.address))
    beats, stuck, let_go = [], threading.Event(), threading.Event()

    def beat(router: sniroute_router.Router) -> float:
        beats.append(time.monotonic())
        return 0.02

    running.router.hooks = running.router.hooks._replace(beat=beat)
    running.router.call(lambda: running.router.heartbeat.set(0.0))
    wait_until(lambda: len(beats) >= 3, what="a few beats")
    running.router.call(lambda: (stuck.set(), let_go.wait(20)))
    stuck.wait(10)
    count = len(beats)
    with running.connect(HELLO) as client:
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert len(beats) == count
        let_go.set()
        client.settimeout(20)
        assert read_exactly(client, len(HELLO)) == HELLO
    wait_until(lambda: len(beats) > count)


def test_a_warning_where_the_allowed_can_be_claimed(settings_file, caplog):
    for option, warned in (("", True), ('proxy_from = "none"\n', False), ('proxy_protocol = "off"\n', False)):
        caplog.clear()
        sniroute_settings.warn(load_settings(["-c", settings_file(option + ROUTES_FILE)], {}))
        assert ("can claim any address in a PROXY header" in caplog.text) is warned


@pytest.mark.parametrize("address", ["/nonexistent/notify", "@nobody", "x" * 200], ids=["gone", "nobody", "long"])
def test_a_manager_that_is_not_there_is_no_reason_to_fail(address, caplog):
    supervisor = sniroute_daemon.Supervisor({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "x"})
    assert f"NOTIFY_SOCKET {address[:20]}" in caplog.text
    supervisor.tell("READY=1")
    supervisor.close()


def test_a_watchdog_for_another_process_is_not_fed():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind("")
        address = "@" + ear.getsockname()[1:].decode()
        for environ, watchdog in (({"WATCHDOG_PID": "1", "WATCHDOG_USEC": "1000"}, False),
                                  ({"WATCHDOG_PID": str(os.getpid()), "WATCHDOG_USEC": "1000"}, True),
                                  ({"WATCHDOG_USEC": "0"}, False), ({}, False)):
            with contextlib.closing(sniroute_daemon.Supervisor({"NOTIFY_SOCKET": address, **environ})) as supervisor:
                assert supervisor.watchdog is watchdog
                assert supervisor.every == (0.0005 if watchdog else sniroute_daemon.STATUS_EVERY)


# -- a dump, and a test of itself --------------------------------------------------------------


def test_a_dump_is_bounded_and_comes_whatever_the_log_level(launch, free_ports, single_loop_echo):
    address = HOST, free_ports(1)[0]
    program = launch(f"--listen={address[0]}:{address[1]}", route(single_loop_echo), "--log-level=error", listeners=0)

    def connect() -> socket.socket | None:
        with contextlib.suppress(ConnectionRefusedError):
            return program.connect(HELLO, address)
        return None

    with contextlib.ExitStack() as stack:
        for _ in range(sniroute_daemon.DUMP_MAX + 3):
            client = stack.enter_context(wait_until(connect))
            assert read_exactly(client, len(HELLO)) == HELLO
        program.signal(signal.SIGUSR1)
        program.wait_for(" error and 3 connections more\n")
        assert program.log().count(" error connection ") == sniroute_daemon.DUMP_MAX


def test_the_self_test_needs_two_files_and_less_than_ten_seconds(two_files):
    began = time.monotonic()
    ended = execute(*BARE_PYTHON, str(two_files), "selftest", env=BARE, text=True, said="")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) == len(sniroute_doctor.SELF_TESTS) + 1 and all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1].startswith(f"{len(lines) - 1} of {len(lines) - 1} went well, in ")
    assert time.monotonic() - began < 10 and ended.stderr == ""


def test_the_self_test_fails_where_the_router_does(monkeypatch, capsys):
    said = sniroute_doctor.HELLO_SAMPLE
    monkeypatch.setattr(sniroute_doctor, "SELF_TESTS", (
        ("right", lambda test: test.talk(said)),
        ("wrong", lambda test: test.talk((said, said[::-1]))),
        ("short", lambda test: test.talk((sniroute_doctor.sample_hello(None), b"more than an alert"))),
        ("right again", lambda test: test.talk(said))))
    handlers = list(sniroute_log.log.handlers)
    try:
        assert sniroute.main(["selftest"]) == 1
    finally:
        sniroute_log.log.handlers[:] = handlers
        sniroute_log.log.propagate = True
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines] == ["ok  ", "FAIL", "FAIL", "ok  ", "2 of"]
    assert "in the place of 97" in lines[1] or "bytes" in lines[1]
