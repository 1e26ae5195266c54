"""Tests of sniroute_wire.py: ClientHello, PROXY headers, PostgreSQL packets, the prelude; last, mutations of all.

The builders are in testbed/hellos.py, and OpenSSL, which judges the names that are read, in testbed/openssl.py.
Most inputs are seen whole, cut at every byte, and with something behind them (`check_parser`, `check_prelude`).
"""

from __future__ import annotations

import ipaddress
import logging
import random
import socket
import struct
import time
import types
from typing import Any, Callable, Iterator, NamedTuple

import pytest

import sniroute_wire
from sniroute_names import normalise
from sniroute_refusals import REFUSALS, Malformed, Refused, postgres_error, tls_alert, told
from sniroute_wire import (GSSENC_REQUEST, PROXY_POLICY, PROXY_V2, SSL_REQUEST, Hello, HelloMemory, HelloReader,
                           Prelude, ProxyHeader, crc32c, parse_client_hello, parse_proxy_v1, parse_proxy_v2,
                           parse_server_name, parse_startup)
from testbed.hellos import (ASK_GSS, ASK_TLS, BAD_NAMES, GOOD_NAMES, GROUPS, HEADER, HEADER6, HEADERS, INET, INET6,
                            LINE, LOCAL, LONGEST, NAME, SIGNATURES, SNI, SOURCE, SOURCE6, VERSIONS, Bad, alpn, body,
                            check_hello, check_parser, extension, genuine, handshake, hello, hello_of, host_name, named,
                            read_hello, record, records, server_name, settled, summed, tlv, v1, v2, vector, verdict)
from testbed.openssl import check_against_openssl, openssl


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
    "T18-largest-body-of-others": (records(hello_of(16384), 16384), NAME),
    "T18-ticket-with-a-certificate": (records(hello_of(17423), 16384), NAME),
    "T18-largest-body": (records(hello_of(65536), *[16384] * 4), NAME),
    "T18-largest-body-in-records-of-1024": (records(hello_of(65536), *[1024] * 64), NAME),
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
    "T38-longest-name-with-a-trailing-dot": (hello(named(LONGEST.encode() + b".")), LONGEST),
    "T38-trailing-dot": (hello(named(b"db.example.com.")), NAME),
    "T39-upper-case": (hello(named(b"DB.Example.COM")), NAME),
    "T42-one-label": (hello(named(b"db")), "db"),
    "T42-one-label-with-a-trailing-dot": (hello(named(b"localhost.")), "localhost"),
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
    "trailing-dot": dict(name="db.example.com."),
    "one-label": dict(name="localhost"),
}


@pytest.mark.parametrize("how", GENUINE.values(), ids=GENUINE)
def test_a_hello_of_openssl_is_read(how):
    wire = genuine(**how)
    name = how.get("name", NAME)
    name = name and name.lower().removesuffix(".")
    check_hello(wire, (name, len(wire)))
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
    assert hellos.find(wire).name == name.lower().removesuffix(".") != other
    assert hellos.find(wire.replace(name.encode(), other.encode())).name == other.removesuffix(".")
    assert hellos.find(wire + b"more") == hellos.find(wire)
    assert not walked and len(hellos.shapes) == 1
    assert hellos.find(wire) == verdict(Prelude("allow", True).feed, wire)
    assert hellos.find(wire).alpn == ([text.encode() for text in how.get("protocols", ())] or None)


def test_names_with_and_without_a_trailing_dot_are_of_the_same_shape(hellos):
    """The name is read anew each time, in whatever form it comes."""
    names = {b"db.example.com": NAME, b"b.example.com.": "b.example.com", b"B.EXAMPLE.COM.": "b.example.com",
             b"abcdefghijklmn": "abcdefghijklmn", b"abcdefghijklm.": "abcdefghijklm"}
    for raw, name in names.items():
        assert hellos.find(hello(named(raw))).name == read_hello(hello(named(raw)))[0] == name
    assert len(hellos.shapes) == 1
    for raw in (b".............." , b"db.example.co..", b"example.1.2.3.", b"1234567890123."):
        found = verdict(hellos.find, hello(named(raw)))
        assert found == verdict(read_hello, hello(named(raw))) == Bad("bad_name", NAMELESS), raw


def test_the_shape_of_a_hello_without_a_name_is_not_remembered(hellos):
    """It is refused in any case."""
    assert hellos.find(genuine(name=None)).name is None and not hellos.shapes


@pytest.mark.parametrize("wire", [
    PLAIN, hello(named(NAME.encode() + b".")), genuine(("h2", "http/1.1")), hello(*OTHERS, SNI, alpn(b"h2"), session=vector(1, b"s" * 32)),
    record(MESSAGE + handshake(b"", 20)),
], ids=["hand-made", "trailing-dot", "genuine", "name-in-the-middle", "more-in-the-record"])
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


@pytest.mark.parametrize("size", [65537, 131396, 0xFFFFFF])
def test_a_hello_that_is_too_large_is_refused_as_such_at_its_header(size):
    wire = record(MESSAGE[:1] + size.to_bytes(3, "big") + bytes(90))
    check_hello(wire, Bad("hello_too_large", DECODE))
    assert verdict(read_hello, wire[:8]) is None
    assert verdict(read_hello, wire[:9]) == Bad("hello_too_large", DECODE)
    assert REFUSALS["hello_too_large"].level == logging.INFO


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
    (record(b"", size=16385), 5), (record(bytes([2]) + MESSAGE[1:]), 6), (cut(MESSAGE, 3, 40), 9),
], ids=["T7-long-record", "T16-other-message", "T17-short-body"])
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


TOO_LARGE = Bad("hello_too_large", DECODE)


def test_records_of_one_byte_are_read_up_to_66560_bytes_of_wire_T9():
    fits = hello_of(66560 // 6 - 4)
    wire = records(fits, *[1] * len(fits))
    assert len(wire) == 66558 and read_hello(wire) == (NAME, len(wire))
    long = hello_of(66560 // 6 - 3)
    wire = records(long, *[1] * len(long))
    assert verdict(read_hello, wire) == verdict(read_hello, wire[:-1] + b"??") == TOO_LARGE
    reader = HelloReader()
    assert [verdict(reader.read, wire[:end]) for end in (66000, 66559)] == [None, None]


def test_a_hello_without_an_end_in_66560_bytes_of_wire_is_refused_T9():
    message = hello_of(16000)
    wire = records(message, *[1] * len(message))
    reader = HelloReader()
    assert [verdict(reader.read, wire[:end]) for end in (1000, 66563)] == [None, None]
    assert verdict(reader.read, wire[:66564]) == verdict(read_hello, wire) == TOO_LARGE


def test_a_hello_whose_end_lies_past_66560_bytes_of_wire_is_refused_T9():
    message = hello_of(16000)
    wire = records(message, *[1] * 10112)  # then one of 5892
    assert len(wire) > 66560 and verdict(read_hello, wire) == TOO_LARGE
    assert verdict(read_hello, wire[:66559]) is None
    wire = records(message, *[1] * 10109)
    assert len(wire) <= 66560 and read_hello(wire) == (NAME, len(wire))


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
    "T38-two-trailing-dots": (hello(named(b"db.example.com..")), "db.example.com.."),
    "T36-escape-sequence": (hello(named(b"\x1b[31mx.com")), "\x1b[31mx.com"),
    "T36-newline": (hello(named(b"foo.com\n")), "foo.com\n"),
    "T37-an-option": (hello(named(b"--url=x")), "--url=x"),
    "T41-address": (hello(named(b"127.0.0.1")), "127.0.0.1"),
    "T38-name-of-255": (hello(named(b"a" * 255)), "a" * 255),
    "T42-one-label-that-is-a-number": (hello(named(b"1234")), "1234"),
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
    "P13-mapped": (v1("TCP6 ::ffff:1.2.3.4 ::1 1 2"), "1.2.3.4", 1),
    "P13-mapped-in-hex": (v1("TCP6 ::FFFF:102:304 ::ffff:192.0.2.9 1 2"), "1.2.3.4", 1),
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

MAPPED = b"".join(ipaddress.IPv6Address(f"::ffff:{end}").packed for end in ("203.0.113.5", "198.51.100.1")) \
    + struct.pack(">HH", 1000, 443)
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
    "Q4-UNSPEC": (v2(0x21, 0x00), None, 0),
    "Q4-UNSPEC-with-anything": (v2(0x21, 0x00, b"\xff" * 7), None, 0),
    "Q4-UNSPEC-STREAM": (v2(0x21, 0x01), None, 0),
    "Q4-UNSPEC-DGRAM": (v2(0x21, 0x02, INET), None, 0),
    "Q4-INET-UNSPEC": (v2(0x21, 0x10, INET), None, 0),
    "Q4-INET6-UNSPEC": (v2(0x21, 0x20, INET6), None, 0),
    "Q5-UDP4": (v2(0x21, 0x12, INET), None, 0),
    "Q5-UDP4-with-a-TLV": (v2(0x21, 0x12, INET + tlv(1, b"h2")), None, 0),
    "Q5-UDP6": (v2(0x21, 0x22, INET6), None, 0),
    "Q5-UNIX": (v2(0x21, 0x31, bytes(216)), None, 0),
    "Q5-UNIX-DGRAM": (v2(0x21, 0x32, bytes(216) + tlv(4, b"")), None, 0),
    "Q5-UNIX-UNSPEC": (v2(0x21, 0x30, bytes(216)), None, 0),
    "Q3-mapped": (v2(0x21, 0x21, MAPPED), "203.0.113.5", 1000),
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
    "Q5-UDP4-with-a-TLV-past-the-end": v2(0x21, 0x12, INET + b"\4\0\2\0"),
    "Q5-UDP6-of-35": v2(0x21, 0x22, INET6[:35]),
    "Q5-UNIX-of-215": v2(0x21, 0x31, bytes(215)),
    "Q5-UNIX-of-0": v2(0x21, 0x31),
    "Q5-UNIX-DGRAM-of-215": v2(0x21, 0x32, bytes(215)),
    "Q5-INET-UNSPEC-of-11": v2(0x21, 0x10, INET[:11]),
    **{f"Q6-UNSPEC-protocol-{protocol:x}": v2(0x21, protocol) for protocol in range(3, 16)},
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
    (("192.0.2.1", 1), ("2001:db8::9", 2), ("192.0.2.1", "2001:db8::9")),
], ids=["IPv4", "IPv6", "scoped", "mapped", "mixed"])
def test_a_proxy_header_that_we_write_is_read_again(write, parse, source, destination, read):
    header = write(source, destination)
    assert parse(header) == ProxyHeader(len(header), ANY(read[0]), source[1], (str(ANY(read[1])), destination[1]))


@pytest.mark.parametrize("header", [v1("TCP6 ::ffff:203.0.113.5 ::ffff:198.51.100.1 1000 443"), v2(0x21, 0x21, MAPPED)],
                         ids=["v1", "v2"])
def test_an_ipv4_client_in_ipv6_is_written_on_as_ipv4(header):
    parse = parse_proxy_v1 if header.startswith(b"PROXY") else parse_proxy_v2
    found = parse(header)
    assert (str(found.source), found.port, found.destination) == ("203.0.113.5", 1000, ("198.51.100.1", 443))
    ends = (str(found.source), found.port), found.destination
    assert sniroute_wire.proxy_v1(*ends) == b"PROXY TCP4 203.0.113.5 198.51.100.1 1000 443\r\n"
    assert sniroute_wire.proxy_v2(*ends)[12:16] == b"\x21\x11\0\x0c"


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
    "G1-SSLRequest": (ASK_TLS, SSL_REQUEST),
    "G5-GSSENCRequest": (ASK_GSS, GSSENC_REQUEST),
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
    "G14-seven-bytes": (ASK_TLS[:7], None),
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


REQUESTS = {"no-request": [], "SSLRequest": [ASK_TLS], "GSSENCRequest-and-SSLRequest": [ASK_GSS, ASK_TLS]}
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


@pytest.mark.parametrize("method", [b"GET", b"POST", b"PUT", b"OPTIONS"])
def test_http_is_no_proxy_fault_where_a_header_is_required(method):
    """A scanner's request is for debug only."""
    assert verdict(Prelude("require", True).feed, method + b" / HTTP/1.1\r\n") == Bad("not_tls")


@pytest.mark.parametrize("mode", ["off", "auto", "required"])
@pytest.mark.parametrize("trusted", [False, True], ids=["untrusted", "trusted"])
@pytest.mark.parametrize("kind", [*HEADERS, "UNSPEC", "UNIX", "bad-v1", "bad-v2"])
def test_a_proxy_header_is_believed_only_where_it_may_be_P19_Q20(mode, trusted, kind):
    policy = PROXY_POLICY[mode, trusted]
    assert (policy == "close") == (mode == "required" and not trusted)
    if policy == "close":
        return  # closed before a byte is read: there is no prelude
    header = {**HEADERS, "UNSPEC": v2(0x21, 0x00), "UNIX": v2(0x21, 0x31, bytes(216)), "bad-v1": v1("TCP4 1 2 3 4"), "bad-v2": v2(0x21, 0x41, bytes(4))}[kind]
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
    [ASK_TLS + PLAIN], [ASK_TLS + b"\0"], [ASK_TLS + ASK_TLS], [ASK_GSS + b"\x16"], [ASK_GSS + ASK_TLS],
    [HEADER + ASK_TLS + PLAIN], [ASK_GSS, ASK_TLS + PLAIN],
], ids=["G2-hello-behind-SSLRequest", "G3-one-byte-behind", "G7-SSLRequest-behind",
        "G5b-one-byte-behind-GSSENCRequest",
        "G5b-SSLRequest-behind-GSSENCRequest", "G2-with-a-header", "G2-behind-GSSENCRequest"])
def test_bytes_that_do_not_wait_for_the_answer_are_refused(waves):
    assert talk([[wave] for wave in waves]).name == Bad("malformed")


@pytest.mark.parametrize("waves, answers", [
    ([ASK_TLS, ASK_TLS], b"S"), ([ASK_GSS, ASK_GSS], b"N"), ([ASK_TLS, ASK_GSS], b"S"),
    ([ASK_GSS, ASK_TLS, ASK_GSS], b"NS"), ([ASK_TLS, PLAIN_STARTUP], b"S"),
    ([ASK_TLS, HEADER + PLAIN], b"S"), ([ASK_TLS, LINE + PLAIN], b"S"),
    ([ASK_TLS, b"GET / HTTP/1.1\r\n"], b"S"),
], ids=["G7-SSLRequest-twice", "G7-GSSENCRequest-twice", "G7-GSSENCRequest-after-S", "G7-GSSENCRequest-again-after-S",
        "G16-startup-after-S", "header-after-S", "line-after-S", "HTTP-after-S"])
def test_after_an_answer_only_what_may_follow_is_accepted(waves, answers):
    check_prelude(waves, Told(Bad("malformed"), answers))


@pytest.mark.parametrize("waves, expected", [
    ([ASK_GSS, PLAIN], Told(NAME, b"N", b"", PLAIN)),
    ([ASK_GSS, PLAIN_STARTUP], Told(Bad("plain_postgres"), b"N")),
    ([ASK_GSS, CANCEL], Told(Bad("cancel"), b"N")),
    ([ASK_GSS, HEADER + PLAIN], Told(Bad("not_tls"), b"N")),
    ([ASK_TLS, hello(VERSIONS)], Told(None, b"S", b"", hello(VERSIONS))),
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
                           (v1("UNKNOWN"), None), (v2(0x21, 0x00), None), (v2(0x21, 0x31, bytes(216)), None),
                           (v2(0x21, 0x12, INET), None), (v2(0x21, 0x21, MAPPED), ANY("203.0.113.5"))):
        prelude = Prelude("allow", False)
        assert prelude.proxy is None
        prelude.feed(memoryview(header + PLAIN))
        assert prelude.proxy.source == source and prelude.ssl is False
    prelude.feed(b"")
    prelude = Prelude("allow", False)
    assert (prelude.feed(ASK_GSS), prelude.ssl, prelude.feed(ASK_TLS), prelude.ssl) == (b"N", False, b"S", True)


@pytest.mark.parametrize("waves, expected", [
    ([b""], b""), ([b"\x16\3"], b""), ([b"\x16\3\1"], tls_alert(40, 1)), ([HEADER + b"\x16\3\3"], tls_alert(40, 3)),
    ([ASK_TLS, b"\x16\3\4"], tls_alert(40, 3)), ([ASK_TLS], b""), ([HEADER], b""), ([ASK_TLS[:7]], b""),
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


LARGE, LARGEST = hello_of(16384), hello_of(65536)


@pytest.mark.parametrize("wire, step", [
    (records(LARGE, 16384), 1 << 20), (records(LARGE, 16384), 1), (records(LARGE, *[1024] * 17), 1),
    (records(LARGE, *[1024] * 17), 1000), (records(hello_of(11000), *[1] * 11000), 1),
    (records(LARGEST, *[16384] * 5), 1), (records(LARGEST, *[16384] * 5), 4096), (records(LARGEST, *[1024] * 65), 1),
], ids=["one-segment", "byte-by-byte", "1024-byte-records-byte-by-byte", "1024-byte-records", "1-byte-records",
        "the-largest-byte-by-byte", "the-largest-by-4096", "the-largest-in-1024-byte-records-byte-by-byte"])
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
               hello(named(b"DB.Example.COM")), hello(named(b"db.example.com.")), hello(named(b"db")), PLAIN + EARLY, records(MESSAGE, *[1] * len(MESSAGE)),
               *(wire for wire, _ in BAD_HELLOS.values() if len(wire) < 500)]
LINE_SEEDS = [line for line, *_ in GOOD_LINES.values()] + [*BAD_LINES.values()]
BLOCK_SEEDS = [block for block, *_ in GOOD_BLOCKS.values() if len(block) < 500] \
    + [block for block in BAD_BLOCKS.values() if len(block) < 500]
POSTGRES_SEEDS = [packet for packet, _ in POSTGRES.values() if 4 < len(packet) < 500]


def test_a_mutated_hello_is_a_name_that_openssl_reads_or_is_refused():
    rng = random.Random(20260801)
    short = hello(SNI, alpn(b"h2"), suites=vector(2, b"\x13\x01"))
    tried, accepted, names = 0, 0, set()
    for data in [*substitutions([short, records(short[5:], 40)]), *mutations(HELLO_SEEDS, rng, 15_000)]:
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
    assert tried > 55_000 and accepted > 10_000 and len(names) > 500, "it tries what matters"


def test_mutated_input_is_a_result_or_None_or_a_refusal_for_every_parser():
    rng = random.Random(20260802)
    entries = [ENTRY, SNI[4:], vector(2, ENTRY + ENTRY), vector(2, host_name(b"x", 1)),
               vector(2, host_name(LONGEST.encode()))]
    names = [raw for raw in BAD_NAMES.values() if len(raw) < 300] \
        + [name.encode() + dot for name in GOOD_NAMES.values() for dot in (b"", b".")]
    bodies = [wire[9:] for wire in HELLO_SEEDS if len(wire) < 600]
    table: list[tuple[Callable[[bytes], Any], type, list[bytes], int]] = [
        (parse_proxy_v1, ProxyHeader, LINE_SEEDS, 12_000), (parse_proxy_v2, ProxyHeader, BLOCK_SEEDS, 12_000),
        (parse_startup, int, POSTGRES_SEEDS, 8_000), (parse_server_name, str, entries, 5_000),
        (normalise, str, names, 8_000), (parse_client_hello, tuple, bodies, 8_000),
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
            if parse is normalise and isinstance(found, str):
                assert found.encode() == data.lower().removesuffix(b".") and normalise(found.encode() + b".") == found
            if isinstance(found, ProxyHeader):
                assert found.size <= len(data) and 0 <= found.port < 65536
        assert results > count // 50, parse
    assert tried > 50_000


def test_a_mutated_prelude_has_one_verdict_however_it_is_cut():
    rng = random.Random(20260803)
    seeds = [header + request + wire for header in HEADERS.values() for request in (b"", ASK_TLS, ASK_GSS)
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


# -- what a client of a port says first ----------------------------------------------------------


@pytest.mark.parametrize("policy", ["allow", "require"])
@pytest.mark.parametrize("header", [sniroute_wire.proxy_v1(("192.0.2.7", 1), ("192.0.2.1", 2)),
                                    sniroute_wire.proxy_v2(("192.0.2.7", 1), ("192.0.2.1", 2)),
                                    sniroute_wire.proxy_v1(None, ("192.0.2.1", 2))], ids=["v1", "v2", "unknown"])
def test_a_ports_header_is_the_same_in_whatever_pieces_and_what_follows_is_left(policy, header):
    said = header + header  # the second one is the target's
    for at in range(len(header) + 1):
        prelude = sniroute_wire.PortPrelude(policy, False)
        found = [prelude.feed(piece) for piece in (said[:at], said[at:]) if piece and not prelude.header]
        assert found[-1] is sniroute_wire.NO_HELLO and prelude.header == header
        assert header.startswith(bytes(prelude.data)) and prelude.proxy is not None


@pytest.mark.parametrize("said", [b"\x16\3\1", b"PING\r\n", b"PRO\r", b"\r\n\r\nx", b"\n", b"GET /"])
def test_what_is_no_header_at_a_port_is_data_or_refused(said):
    prelude = sniroute_wire.PortPrelude("allow", False)
    assert prelude.feed(said) is sniroute_wire.NO_HELLO and (prelude.header, bytes(prelude.data)) == (b"", said)
    with pytest.raises(sniroute_wire.Malformed) as caught:
        sniroute_wire.PortPrelude("require", False).feed(said)
    assert caught.value.kind == "proxy"
