"""Tests of sniroute_upgrade.py, in its order."""

from __future__ import annotations

import contextlib
import random

import pytest

import sniroute_names
import sniroute_upgrade
from sniroute_refusals import Malformed
from sniroute_upgrade import (BINARY, CHUNK, CLOSE, CONTINUATION, HEAD_MAX, PING, PONG, TEXT, Answer, EitherReader,
                              FrameReader, check_upgrade, frame, parse_answer, upgrade_answer)
from testbed.carrier import NOISE, masked, server_frame

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 section 1.3


# -- heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, header", [
    pytest.param("a: b", ("a", "b"), id="plain"),
    pytest.param("a:b", ("a", "b"), id="no space"),
    pytest.param("A-b: \t c, d \t", ("A-b", "c, d"), id="blanks around, a comma inside"),
    pytest.param("a: b: c", ("a", "b: c"), id="a colon inside"),
    pytest.param("a:", ("a", ""), id="empty"),
])
def test_parse_header(text, header):
    assert sniroute_upgrade.parse_header(text) == header


@pytest.mark.parametrize("text", ["", "a", ": b", "a b: c", "a: s3cret\r\nx: y", "a: s3cret\n", "a: s3cret\x7f",
                                  "a: s3cret\u00e9", "a: s3cret\0", "caf\u00e9: s3cret"])
def test_what_is_no_header_is_not_repeated(text):
    with pytest.raises(ValueError) as caught:
        sniroute_upgrade.parse_header(text)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("head, status, headers", [
    pytest.param(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", 101, {"upgrade": "websocket"},
                 id="usual"),
    pytest.param(b"HTTP/1.1 200\r\n\r\n", 200, {}, id="no reason, no header"),
    pytest.param(b"HTTP/1.0 200 Connection established\r\n\r\n", 200, {}, id="a proxy of old"),
    pytest.param(b"HTTP/1.1 302 Found\r\nA:b\r\nA:  c \t\r\na-B:\r\n\r\n", 302, {"a": "b, c", "a-b": ""},
                 id="one name twice, blanks, an empty value"),
    pytest.param(b"HTTP/1.1 530 \xff\r\nA: \xe9\r\n\r\n", 530, {"a": "\u00e9"}, id="not ASCII"),
])
def test_parse_answer(head, status, headers):
    for size in range(len(head)):
        assert sniroute_upgrade.parse_answer(head[:size]) is None
    for rest in (b"", b"\x82\x01x", b"\r\n\r\n"):
        assert sniroute_upgrade.parse_answer(bytearray(head + rest)) == Answer(status, headers, len(head))


@pytest.mark.parametrize("data", [
    pytest.param(b"\x15\x03\x03\x00\x02", id="TLS"),
    pytest.param(b"HTTP/2 200\r\n\r\n", id="HTTP/2"),
    pytest.param(b"HTTP/1.2 200\r\n\r\n", id="HTTP/1.2"),
    pytest.param(b"HTTP/1.1 20\r\n\r\n", id="two digits"),
    pytest.param(b"HTTP/1.1 2000\r\n\r\n", id="four digits"),
    pytest.param(b"HTTP/1.1 099\r\n\r\n", id="below 100"),
    pytest.param(b"HTTP/1.0 101 Switching\r\n\r\n", id="an upgrade in HTTP/1.0"),
    pytest.param(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", id="no colon"),
    pytest.param(b"HTTP/1.1 200 OK\r\n: x\r\n\r\n", id="no name"),
    pytest.param(b"HTTP/1.1 200 OK\r\na : x\r\n\r\n", id="a blank behind the name"),
    pytest.param(b"HTTP/1.1 200 OK\r\na: x\r\n folded\r\n\r\n", id="a folded line"),
    pytest.param(b"X", id="its first byte is enough"),
    pytest.param(b"HTTP/1.1 200 OK\r\nX: " + bytes(HEAD_MAX), id="too long"),
])
def test_what_is_no_answer(data):
    with pytest.raises(Malformed):
        sniroute_upgrade.parse_answer(data)


def test_a_head_may_be_64_kib():
    start = b"HTTP/1.1 200 OK\r\nX: "
    head = start + b"x" * (HEAD_MAX - len(start) - 4) + b"\r\n\r\n"
    assert sniroute_upgrade.parse_answer(head).end == HEAD_MAX
    assert sniroute_upgrade.parse_answer(head[:-1]) is None
    with pytest.raises(Malformed):
        sniroute_upgrade.parse_answer(head.replace(b": ", b": x"))


def test_connect_request():
    assert sniroute_upgrade.connect_request("app", 443, "") == (
        b"CONNECT app:443 HTTP/1.1\r\nHost: app:443\r\n\r\n")
    assert sniroute_upgrade.connect_request("::1", 9, "Basic dTpw") == (
        b"CONNECT [::1]:9 HTTP/1.1\r\nHost: [::1]:9\r\nProxy-Authorization: Basic dTpw\r\n\r\n")


# -- the upgrade to WebSocket ----------------------------------------------------------------


@pytest.mark.parametrize("host, port, place", [
    pytest.param("app", 443, b"app", id="the usual port"),
    pytest.param("app", 8443, b"app:8443", id="another port"),
    pytest.param("app", 1443, b"app:1443", id="a port that ends like the usual one"),
    pytest.param("::1", 443, b"[::1]", id="IPv6"),
    pytest.param("::1", 9, b"[::1]:9", id="IPv6 and another port"),
])
def test_request_names_the_host(host, port, place):
    assert sniroute_upgrade.upgrade_request(host, port, "/", KEY, []) == (
        b"GET / HTTP/1.1\r\nHost: " + place + b"\r\nUser-Agent: sniroute/" + sniroute_names.__version__.encode() +
        b"\r\nConnection: Upgrade\r\nSec-WebSocket-Key: " + KEY.encode() +
        b"\r\nSec-WebSocket-Version: 13\r\nUpgrade: websocket\r\n\r\n")


def test_request_keeps_path_and_headers_but_its_own():
    own = [(name.title(), "evil") for name in sniroute_upgrade.OWN_HEADERS]
    lines = sniroute_upgrade.upgrade_request("app", 443, "/x?y=1", KEY, [("A", "1"), *own, ("a", "2"),
                                                                      ("Sec-WebSocket-Protocol", "p")])
    assert lines.startswith(b"GET /x?y=1 HTTP/1.1\r\n") and b"evil" not in lines
    assert b"\r\nA: 1\r\na: 2\r\nSec-WebSocket-Protocol: p\r\n" in lines


# -- frames ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 7, 8, 125, 1000, CHUNK - 1, CHUNK, CHUNK + 1])
def test_mask(size):
    data = NOISE[:size]
    for key in (b"\0\0\0\0", b"\1\2\3\4", b"\xff\xfe\xfd\xfc", b"\0\0\0\xff"):
        assert sniroute_upgrade.mask(data, key) == masked(data, key)


def test_mask_of_the_standard():
    assert sniroute_upgrade.mask(b"Hello", bytes.fromhex("37fa213d")) == bytes.fromhex("7f9f4d5158")  # RFC 6455 5.7


@pytest.mark.parametrize("opcode, size, head", [
    pytest.param(BINARY, 0, b"\x82\x80", id="empty"),
    pytest.param(PONG, 125, b"\x8a\xfd", id="the longest short one"),
    pytest.param(BINARY, 126, b"\x82\xfe\x00\x7e", id="the shortest long one"),
    pytest.param(BINARY, CHUNK, b"\x82\xfe\x3f\xf8", id="the longest"),
])
def test_frame(opcode, size, head):
    made = sniroute_upgrade.frame(opcode, NOISE[:size])
    assert made.startswith(head) and len(made) == len(head) + 4 + size
    assert masked(made[len(head) + 4:], made[len(head):len(head) + 4]) == NOISE[:size]


def test_a_full_message_is_what_the_far_end_takes_and_fits_a_record():
    made = sniroute_upgrade.frame(BINARY, NOISE[:CHUNK])
    assert CHUNK <= 16384 and len(made) <= 16384
    keys = {sniroute_upgrade.frame(BINARY, b"x" * 200)[4:8] for _ in range(100)}
    assert len(keys) == 100


STREAM = b"".join((
    server_frame(TEXT, b"one ", fin=False), server_frame(PING, b"ping"), server_frame(CONTINUATION, b"two ", fin=False),
    server_frame(PONG, b""), server_frame(CONTINUATION, b""), server_frame(BINARY, b""),
    server_frame(BINARY, b"x" * 126), server_frame(BINARY, b"three ", extended=2),
    server_frame(BINARY, b"", extended=8),
    server_frame(PING, b"y" * 125), server_frame(BINARY, b"four", extended=8),
    server_frame(CLOSE, b"\x03\xe8bye"), server_frame(BINARY, b"ignored")))
STREAM_SAYS = b"one two " + b"x" * 126 + b"three four"
STREAM_CONTROLS = [(PING, b"ping"), (PONG, b""), (PING, b"y" * 125), (CLOSE, b"\x03\xe8bye")]
STREAM_END = len(STREAM) - len(server_frame(BINARY, b"ignored"))


def read_all(*portions: bytes) -> tuple[bytes, list[tuple[int, bytes]]]:
    """What a FrameReader makes of these portions; behind a Close nobody asks it."""
    reader, said, controls = FrameReader(), [], []
    for portion in portions:
        buffer = bytearray(portion)
        pieces, found = reader.read(memoryview(buffer))
        said += map(bytes, pieces)
        controls += found
        buffer[:] = bytes(len(buffer))  # the buffer is used again
        assert len(reader.part) < 128
        if found and found[-1][0] == CLOSE:
            break
    return b"".join(said), controls


def test_frames_in_two_portions_cut_anywhere():
    for at in range(len(STREAM) + 1):
        assert read_all(STREAM[:at], STREAM[at:]) == (STREAM_SAYS, STREAM_CONTROLS), at


def test_frames_byte_by_byte_and_in_three_portions():
    assert read_all(*(STREAM[at:at + 1] for at in range(STREAM_END))) == (STREAM_SAYS, STREAM_CONTROLS)
    chance = random.Random(3)
    for _ in range(2000):
        one, two = sorted(chance.choices(range(STREAM_END), k=2))
        assert read_all(STREAM[:one], STREAM[one:two], STREAM[two:]) == (STREAM_SAYS, STREAM_CONTROLS), (one, two)


def test_large_frames_are_not_held():
    data = NOISE * 2
    stream = server_frame(BINARY, data[:65535]) + server_frame(BINARY, data[65535:])
    assert read_all(*(stream[at:at + 5000] for at in range(0, len(stream), 5000))) == (data, [])


@pytest.mark.parametrize("data", [
    pytest.param(b"\xc2\x01", id="reserved bit 1"),
    pytest.param(b"\xa2\x01", id="reserved bit 2"),
    pytest.param(b"\x92\x01", id="reserved bit 3"),
    pytest.param(b"\x82\x80", id="masked"),
    pytest.param(b"\x83\x00", id="data opcode 3"),
    pytest.param(b"\x87\x00", id="data opcode 7"),
    pytest.param(b"\x8b\x00", id="control opcode 11"),
    pytest.param(b"\x8f\x00", id="control opcode 15"),
    pytest.param(b"\x89\x7e", id="a long control frame"),
    pytest.param(b"\x88\x7f", id="a very long control frame"),
    pytest.param(b"\x09\x00", id="a fragmented control frame"),
    pytest.param(b"\x88\x01", id="half a code"),
    pytest.param(b"\x80\x00", id="a continuation of nothing"),
    pytest.param(b"\x02\x00\x82\x00", id="a message within a message"),
    pytest.param(b"\x02\x00\x80\x00\x80\x00", id="a continuation of what is over"),
    pytest.param(b"\x82\x7f\x80\0\0\0\0\0\0\0", id="a length of 2**63"),
])
def test_malformed_frames_are_known_at_the_header(data):
    with pytest.raises(Malformed):
        read_all(data)
    with pytest.raises(Malformed):
        read_all(*(data[at:at + 1] for at in range(len(data))))
    with pytest.raises(Malformed):
        read_all(server_frame(BINARY, b"before") + data)


def test_only_malformed_is_ever_raised():
    chance = random.Random(4)
    for _ in range(5000):
        with contextlib.suppress(Malformed):
            read_all(*(chance.randbytes(chance.randrange(12)) for _ in range(4)))


# -- at a server -------------------------------------------------------------------------------


def test_the_answer_to_an_upgrade():
    said = upgrade_answer(KEY, "Mon, 30 Nov 2026 00:00:00 GMT")
    answer = parse_answer(said)
    assert answer.status == 101 and answer.end == len(said)
    assert answer.headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 section 1.3
    check_upgrade(answer, KEY)


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_frames_in_any_portions_are_read_at_either_side(is_masked, seed):
    chance = random.Random(seed)
    write = frame if is_masked else server_frame
    data, payload, controls = b"", b"", []
    for _ in range(30):
        size = chance.choice((0, 1, 5, 125, 126, 1000, CHUNK, 65535))
        piece = NOISE[:size]
        data += write(BINARY, piece)
        payload += piece
        if chance.random() < 0.3:
            data += write(PING, piece[:125])
            controls.append((PING, piece[:125]))
    data += write(CLOSE, b"\x03\xe8") + b"ignored"
    reader, read, heard = EitherReader(is_masked), b"", []
    at = 0
    while at < len(data) - len(b"ignored"):
        size = chance.choice((1, 2, 7, 1000, 100000))
        pieces, found = reader.read(memoryview(data[at:at + size]))
        read += b"".join(pieces)
        heard += found
        at += size
    assert read == payload and heard == [*controls, (CLOSE, b"\x03\xe8")]


@pytest.mark.parametrize("is_masked", [True, False])
def test_either_reader_raises_only_malformed(is_masked):
    chance = random.Random(4)
    for _ in range(5000):
        reader = EitherReader(is_masked)
        with contextlib.suppress(Malformed):
            for _ in range(4):
                reader.read(memoryview(chance.randbytes(chance.randrange(12))))
