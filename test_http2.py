"""Tests of sniroute_http2.py: what comes before the first head, what is read from it, what is refused; real clients."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import subprocess
from typing import Any, Iterator

import pytest

from sniroute_hpack import Pair, encode, write_integer, write_string
from sniroute_http import HEAD_MAX, TARGET_MAX
from sniroute_http2 import (ACK, COMPRESSION_ERROR, CONTINUATION, CONTINUATIONS_MAX, DATA, END_HEADERS,
                            ENHANCE_YOUR_CALM, FLOW_CONTROL_ERROR, FRAME_MAX, FRAME_SIZE_ERROR, FRAMES_MAX, GOAWAY,
                            HAS_PRIORITY, HEADERS, PADDED, PING, PREFACE, PRIORITY, PROTOCOL_ERROR, REFUSED_STREAM,
                            PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE, Authority, Broken, awaits_settings, make_frame,
                            parse_authority, read_frame, refusal)
from sniroute_refusals import REFUSALS, Malformed, Refused
from testbed.clients import program_path

END_STREAM = 0x1
START = PREFACE + make_frame(SETTINGS)
GREASE = 0x8B, 0x10, 0xFF  # types that nobody defines, and PRIORITY_UPDATE


def request(*more: Pair, without: tuple[bytes, ...] = (), **changed: bytes) -> bytes:
    """The header block of a request; `changed` are pseudo fields, `more` stands behind them."""
    fields = {b":method": b"GET", b":scheme": b"http", b":authority": b"web.example.com", b":path": b"/a?b=c"}
    fields.update({b":" + name.encode(): value for name, value in changed.items()})
    return encode([pair for pair in fields.items() if pair[0] not in without] + list(more))


def head(block: bytes, flags: int = END_HEADERS | END_STREAM, stream: int = 1) -> bytes:
    """A HEADERS frame with this payload."""
    return make_frame(HEADERS, block, flags, stream)


def split(block: bytes, *sizes: int) -> bytes:
    """The frames of a head whose block goes on in CONTINUATION frames, cut into parts of these sizes and the rest."""
    parts = []
    for size in sizes:
        parts.append(block[:size])
        block = block[size:]
    parts.append(block)
    return b"".join(make_frame(CONTINUATION if number else HEADERS, part,
                               END_HEADERS if number == len(parts) - 1 else 0, 1) for number, part in enumerate(parts))


def cuts(data: bytes) -> Iterator[tuple[bytes, ...]]:
    """The bytes whole, cut in two at every place, and one by one; what is long only at some places."""
    yield (data,)
    step = 1 if len(data) < 400 else 1 + len(data) // 150
    for at in range(0, len(data), step):
        yield data[:at], data[at:]
    yield tuple(data[at:at + step] for at in range(0, len(data), step))


def told(pieces: tuple[bytes, ...]) -> Authority | None:
    """Feed these pieces, as a connection does."""
    data, seen = bytearray(), 0
    for piece in pieces:
        data += piece
        found = parse_authority(data, seen)
        seen = len(data)
        if found is not None:
            return found
    return None


def refused(data: bytes) -> Refused:
    """What refuses this, wherever it is cut."""
    errors = []
    for pieces in cuts(data):
        with pytest.raises(Refused) as caught:
            told(pieces)
        errors.append(caught.value)
    assert len({(type(error), str(error), error.status) for error in errors}) == 1
    return errors[0]


# -- what comes before a head ------------------------------------------------------------------

BLOCK = request((b"user-agent", b"x"))
PRIORITY_DATA = struct.pack(">IB", 3, 15)
SETTINGS_DATA = struct.pack(">HIHIHIHIHI", 1, 65536, 2, 0, 4, (1 << 31) - 1, 5, 16384, 0x4A4A, 0xFFFFFFFF)


@pytest.mark.parametrize("frames", [
    head(BLOCK), head(BLOCK, END_HEADERS), head(BLOCK, END_HEADERS, 13), head(BLOCK, END_HEADERS, (1 << 31) - 1),
    make_frame(SETTINGS, SETTINGS_DATA) + make_frame(WINDOW_UPDATE, b"\0\0\0\x01") + head(BLOCK),
    make_frame(PING, b"12345678")
    + b"".join(make_frame(PRIORITY, PRIORITY_DATA, 0, stream) for stream in range(3, 13, 2)) + head(BLOCK),
    b"".join(make_frame(kind, b"?" * 20, 0xFF, stream) for kind in GREASE for stream in (0, 2, 3)) + head(BLOCK),
    make_frame(DATA + 0x20, b"") + head(PRIORITY_DATA + BLOCK, END_HEADERS | HAS_PRIORITY),
    head(b"\x05" + BLOCK + bytes(5), END_HEADERS | PADDED),
    head(b"\0" + BLOCK, END_HEADERS | PADDED),
    head(b"\xff" + PRIORITY_DATA + BLOCK + bytes(255), END_HEADERS | PADDED | HAS_PRIORITY),
    split(BLOCK, 0), split(BLOCK, 1), split(BLOCK, 1, 1, 1, 1, 1, 1, 1), split(BLOCK, len(BLOCK)),
    head(b"\xff" + bytes(255), PADDED) + make_frame(CONTINUATION, BLOCK, END_HEADERS, 1),  # padding only
    make_frame(SETTINGS, b"", 0xFE) + head(BLOCK, END_HEADERS | 0xC2),  # flags that mean nothing
], ids=lambda frames: frames[3:9].hex() + f"-{len(frames)}")
@pytest.mark.parametrize("behind", [b"", b"\0\0\x01\0\0\0\0\0\x01x", b"what is no frame at all"],
                         ids=["alone", "body", "rubbish"])
def test_the_name_is_found_wherever_it_is_cut(frames, behind):
    """And nothing behind the head is looked at."""
    data = START + frames
    for pieces in cuts(data + behind):
        assert told(pieces) == Authority("web.example.com", 0, len(data), "GET", b"/a?b=c")
    for size in range(len(data)):
        assert parse_authority(data[:size]) is None
    assert parse_authority(data) == parse_authority(bytearray(data))


def test_the_reserved_bit_of_a_stream_is_not_looked_at():
    data = bytearray(START + head(BLOCK))
    data[len(START) + 5] |= 0x80
    assert parse_authority(data) is not None


@pytest.mark.parametrize("frames, code", [
    (make_frame(DATA, b"x", 0, 1), PROTOCOL_ERROR),
    (make_frame(RST_STREAM, bytes(4), 0, 1), PROTOCOL_ERROR),
    (make_frame(PUSH_PROMISE, bytes(4) + BLOCK, END_HEADERS, 1), PROTOCOL_ERROR),
    (make_frame(GOAWAY, bytes(8)), PROTOCOL_ERROR),
    (make_frame(CONTINUATION, BLOCK, END_HEADERS, 1), PROTOCOL_ERROR),
    (make_frame(SETTINGS, b"", 0, 1), PROTOCOL_ERROR),
    (make_frame(SETTINGS, b"", ACK), PROTOCOL_ERROR),
    (make_frame(SETTINGS, bytes(5)), FRAME_SIZE_ERROR),
    (make_frame(SETTINGS, struct.pack(">HI", 2, 2)), PROTOCOL_ERROR),
    (make_frame(SETTINGS, struct.pack(">HI", 4, 1 << 31)), FLOW_CONTROL_ERROR),
    (make_frame(SETTINGS, struct.pack(">HI", 5, 16383)), PROTOCOL_ERROR),
    (make_frame(SETTINGS, struct.pack(">HI", 5, 1 << 24)), PROTOCOL_ERROR),
    (make_frame(PING, bytes(8), ACK), PROTOCOL_ERROR),
    (make_frame(PING, bytes(8), 0, 1), PROTOCOL_ERROR),
    (make_frame(PING, bytes(7)), FRAME_SIZE_ERROR),
    (make_frame(WINDOW_UPDATE, bytes(4)), PROTOCOL_ERROR),
    (make_frame(WINDOW_UPDATE, b"\x80\0\0\0"), PROTOCOL_ERROR),
    (make_frame(WINDOW_UPDATE, b"\0\0\0\x01", 0, 1), PROTOCOL_ERROR),
    (make_frame(WINDOW_UPDATE, b"\0\0\x01"), FRAME_SIZE_ERROR),
    (make_frame(PRIORITY, PRIORITY_DATA), PROTOCOL_ERROR),
    (make_frame(PRIORITY, PRIORITY_DATA + b"\0", 0, 1), FRAME_SIZE_ERROR),
    (head(BLOCK, stream=0), PROTOCOL_ERROR),
    (head(BLOCK, stream=2), PROTOCOL_ERROR),
    (head(BLOCK, 0) + make_frame(PING, bytes(8)), PROTOCOL_ERROR),
    (head(BLOCK, 0) + make_frame(0x8B, b""), PROTOCOL_ERROR),
    (head(BLOCK, 0) + head(b"", END_HEADERS), PROTOCOL_ERROR),
    (head(BLOCK, 0) + make_frame(CONTINUATION, b"", END_HEADERS, 3), PROTOCOL_ERROR),
    (head(BLOCK, 0) + make_frame(CONTINUATION, b"", END_HEADERS, 0), PROTOCOL_ERROR),
    (head(b"", END_HEADERS | PADDED), FRAME_SIZE_ERROR),
    (head(b"\0" + bytes(4), END_HEADERS | PADDED | HAS_PRIORITY), FRAME_SIZE_ERROR),
    (head(bytes(4), END_HEADERS | HAS_PRIORITY), FRAME_SIZE_ERROR),
    (head(b"\x01", END_HEADERS | PADDED), PROTOCOL_ERROR),
    (head(b"\x06" + bytes(5), END_HEADERS | PADDED), PROTOCOL_ERROR),
    (head(b"\x01" + PRIORITY_DATA, END_HEADERS | PADDED | HAS_PRIORITY), PROTOCOL_ERROR),
    (head(BLOCK[:-1]), COMPRESSION_ERROR),
    (head(BLOCK + b"\xff"), COMPRESSION_ERROR),
    (head(b"\xbe"), COMPRESSION_ERROR),
    (head(BLOCK + b"\x20"), COMPRESSION_ERROR),
], ids=lambda value: value[3:9].hex() + f"-{len(value)}" if isinstance(value, bytes) else "")
def test_what_breaks_the_connection(frames, code):
    error = refused(START + frames + b"behind" * 10)
    assert isinstance(error, Broken) and (error.kind, error.status, error.code) == ("bad_request", 400, code)


@pytest.mark.parametrize("data", [
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\n\n", b"PRI * HTTP/2.1\r\n\r\nSM\r\n\r\n", b"PRI * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST / ", b"\n", PREFACE + head(BLOCK), PREFACE + make_frame(PING, bytes(8)), PREFACE + make_frame(0x8B, b""),
    PREFACE + PREFACE, PREFACE + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
], ids=repr)
def test_what_begins_in_another_way(data):
    assert refused(data).status == 400
    if data[:1] == b"P":
        assert parse_authority(b"P") is None, "it may still be right"


# -- too much ----------------------------------------------------------------------------------


def too_much(data: bytes) -> None:
    """Assert that this is refused as too much."""
    error = refused(data)
    assert isinstance(error, Broken) and (error.code, error.status) == (ENHANCE_YOUR_CALM, 431)


def test_a_flood_of_continuations():
    """CVE-2024-27316: empty ones, for ever; nothing of them is decoded."""
    assert told((START + split(BLOCK, *[0] * CONTINUATIONS_MAX),)) is not None
    too_much(START + split(BLOCK, *[0] * (CONTINUATIONS_MAX + 1)))
    too_much(START + head(b"\xff" * 100, 0) + make_frame(CONTINUATION, b"\xff" * 100, 0, 1) * 100)


@pytest.mark.parametrize("frame", [make_frame(PING, bytes(8)), make_frame(SETTINGS), make_frame(0x8B, b""),
                                   make_frame(PRIORITY, PRIORITY_DATA, 0, 3), make_frame(WINDOW_UPDATE, b"\0\0\0\x01")])
def test_a_flood_of_other_frames(frame):
    fit = FRAMES_MAX - 2  # beside the first and the head
    assert told((START + frame * fit + head(BLOCK),)) is not None
    too_much(START + frame * (fit + 1) + head(BLOCK))


def test_the_size_of_all_is_limited():
    """A frame that would go past it is refused by its header."""
    room = HEAD_MAX - len(START + head(BLOCK)) - 2 * 9
    full = START + make_frame(0x8B, bytes(FRAME_MAX)) + make_frame(0x8B, bytes(room - FRAME_MAX))
    assert told((full + head(BLOCK),)).end == HEAD_MAX
    too_much(full + head(BLOCK + b"\x84"))
    size = make_frame(0x8B, bytes(FRAME_MAX))
    with pytest.raises(Broken, match="too much"):
        parse_authority(START + size + size[:9])


def test_a_frame_that_is_too_large_is_refused_by_its_header():
    frame = struct.pack(">HBBBI", (FRAME_MAX + 1) >> 8, FRAME_MAX + 1 & 255, 0x8B, 0, 0)
    error = refused(START + frame)
    assert isinstance(error, Broken) and error.code == FRAME_SIZE_ERROR
    error = refused(PREFACE + b"\xff\xff\xff" + bytes(6))
    assert isinstance(error, Broken) and error.code == FRAME_SIZE_ERROR


def test_a_small_head_that_says_much():
    """A field in the table, and a byte for each time that it comes again."""
    bomb = request()[1:] + b"\x40" + write_string(b"x") + write_string(b"v" * 4000)
    assert told((START + head(bomb + b"\xbe" * 6),)) is not None
    too_much(START + head(bomb + b"\xbe" * 10))


# -- the request -------------------------------------------------------------------------------


@pytest.mark.parametrize("block, name, port", [
    (request(authority=b"WEB.Example.com."), "web.example.com", 0),
    (request(authority=b"web.example.com:8080"), "web.example.com", 8080),
    (request(authority=b"web.example.com:80"), "web.example.com", 80),
    (request((b"host", b"web.example.com")), "web.example.com", 0),
    (request((b"host", b"Web.example.com:80")), "web.example.com", 0),
    (request((b"x", b"y"), (b"host", b"web.example.com:81"), authority=b"web.example.com:81"), "web.example.com", 81),
    (request((b"host", b"other.example.com:81"), without=(b":authority",)), "other.example.com", 81),
    (request((b"te", b"trailers"), (b"content-length", b"5"), (b"cookie", b"a=b"), (b"cookie", b"c=\xff\td")),
     "web.example.com", 0),
], ids=range(8))
def test_where_a_request_leads(block, name, port):
    found = told((START + head(block),))
    assert (found.name, found.port) == (name, port)


@pytest.mark.parametrize("method, path", [(b"POST", b"/"), (b"OPTIONS", b"*"), (b"PROPFIND", b"/%20?//&="),
                                          (b"GET", b"/" + b"a" * (TARGET_MAX - 1))])
def test_what_a_request_asks_for(method, path):
    found = told((START + head(request(method=method, path=path)),))
    assert (found.method, found.path) == (method.decode(), path)


@pytest.mark.parametrize("block, kind, status", [
    (request(authority=b""), "bad_name", 400),
    (request(authority=b"192.0.2.1"), "bad_name", 400),
    (request(authority=b"[2001:db8::1]"), "bad_request", 400),
    (request(authority=b"user@web.example.com"), "bad_name", 400),
    (request(authority=b"user:secret@web.example.com"), "bad_request", 400),
    (request(authority=b"user:80@web.example.com"), "bad_request", 400),
    (request(authority=b"web.example.com:"), "bad_request", 400),
    (request(authority=b"web.example.com:0"), "bad_request", 400),
    (request(authority=b"web.example.com:+80"), "bad_request", 400),
    (request(authority=b"web.example.com:65536"), "bad_request", 400),
    (request(authority=b"web.example.com/"), "bad_name", 400),
    (request(authority=b"web.example.com,other.example.com"), "bad_name", 400),
    (request(authority=b"web.example.com "), "bad_request", 400),
    (request(authority=b"web.example.com\0"), "bad_request", 400),
    (request(authority=b"web.example.com\r\nhost: a"), "bad_request", 400),
    (request((b"host", b"other.example.com")), "bad_request", 400),
    (request((b"host", b"web.example.com:81")), "bad_request", 400),
    (request((b"host", b"")), "bad_name", 400),
    (request((b"host", b"user@web.example.com")), "bad_name", 400),
    (request((b"host", b"web.example.com"), (b"host", b"web.example.com")), "bad_request", 400),
    (request((b"host", b"a"), (b"host", b"a"), without=(b":authority",)), "bad_request", 400),
    (request(without=(b":authority",)), "bad_request", 400),
    (request((b":authority", b"web.example.com")), "bad_request", 400),
    (request((b"x", b"y"), (b":authority", b"web.example.com"), without=(b":authority",)), "bad_request", 400),
    (request(without=(b":method",)), "bad_request", 400),
    (request(without=(b":scheme",)), "bad_request", 400),
    (request(without=(b":path",)), "bad_request", 400),
    (encode([]), "bad_request", 400),
    (b"", "bad_request", 400),
    (request(status=b"200"), "bad_request", 400),
    (request(protocol=b"websocket", method=b"CONNECT"), "bad_request", 400),
    (request(method=b"CONNECT", without=(b":scheme", b":path")), "no_method", 405),
    (request(method=b"TRACE"), "no_method", 405),
    (request(method=b"get"), "bad_request", 400),
    (request(method=b"GET /"), "bad_request", 400),
    (request(method=b"A" * 17), "bad_request", 400),
    (request(scheme=b"https"), "bad_request", 421),
    (request(scheme=b"ftp"), "bad_request", 400),
    (request(path=b""), "bad_request", 400),
    (request(path=b"a"), "bad_request", 400),
    (request(path=b"*"), "bad_request", 400),
    (request(path=b"http://other.example.com/"), "bad_request", 400),
    (request(path=b"/#a"), "bad_request", 400),
    (request(path=b"/a b"), "bad_request", 400),
    (request(path=b"/\xc3\xa4"), "bad_request", 400),
    (request(path=b"/a HTTP/1.1\r\nhost: b"), "bad_request", 400),
    (request(path=b"/" * (TARGET_MAX + 1)), "bad_request", 414),
    (request((b"Host", b"web.example.com")), "bad_request", 400),
    (request((b"hos\xd4", b"web.example.com")), "bad_request", 400),
    (request((b"", b"x")), "bad_request", 400),
    (request((b"a b", b"x")), "bad_request", 400),
    (request((b"a:", b"x")), "bad_request", 400),
    (request((b"a\r\nb", b"x")), "bad_request", 400),
    (request((b"a", b"x\r\nb: c")), "bad_request", 400),
    (request((b"a", b"x\ny")), "bad_request", 400),
    (request((b"a", b"\0")), "bad_request", 400),
    (request((b"a", b" x")), "bad_request", 400),
    (request((b"a", b"x\t")), "bad_request", 400),
    (request((b"connection", b"close")), "bad_request", 400),
    (request((b"transfer-encoding", b"chunked")), "bad_request", 400),
    (request((b"upgrade", b"h2c")), "bad_request", 400),
    (request((b"te", b"gzip")), "bad_request", 400),
    (request((b"content-length", b"+1")), "bad_request", 400),
    (request((b"content-length", b"")), "bad_request", 400),
    (request((b"content-length", b"1"), (b"content-length", b"1")), "bad_request", 400),
], ids=range(65))
def test_a_request_that_is_refused(block, kind, status):
    error = refused(START + head(block))
    assert (error.kind, error.status) == (kind, status)
    assert isinstance(error, Malformed) == (status != 405) and "secret" not in str(error)


# -- what we say -------------------------------------------------------------------------------


@pytest.mark.parametrize("refused, code", [
    (Refused("no_route", "no route for db.example.com"), REFUSED_STREAM),
    (Refused("backend", "192.0.2.1:80 refuses"), REFUSED_STREAM),
    (Broken("a frame of 20000 bytes", FRAME_SIZE_ERROR), FRAME_SIZE_ERROR),
    (Malformed("not a host name: 'a b'", kind="bad_name"), PROTOCOL_ERROR),
    *((Refused(kind, "192.0.2.1"), REFUSED_STREAM) for kind in REFUSALS),
])
def test_a_refusal_says_why_and_nothing_that_is_not_for_strangers(refused, code):
    data = refusal(refused)
    settings = read_frame(data, 0)
    assert settings == (SETTINGS, 0, 0, 9, 9)
    goaway = read_frame(data, settings.end)
    assert goaway[:3] == (GOAWAY, 0, 0) and goaway.end == len(data) <= 300
    assert struct.unpack(">II", data[goaway.start:goaway.start + 8]) == (0, code)
    assert data[goaway.start + 8:].decode() == REFUSALS[refused.kind].meaning
    assert b"192.0.2.1" not in data and b"example" not in data


# -- real clients ------------------------------------------------------------------------------


def curl(port: int, *words: str) -> list[str]:
    """curl, which asks for web.example.com in HTTP/2 at a port of this host."""
    path = program_path("curl", "curl")
    if "HTTP2" not in subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout:
        pytest.skip("curl has no HTTP/2 here (Debian package curl)")
    return [path, "-sSi", "--max-time", "20", "--http2-prior-knowledge", "--connect-to", f"::127.0.0.1:{port}", *words]


def nghttp(port: int, *words: str) -> list[str]:
    """nghttp, likewise."""
    return [program_path("nghttp", "nghttp2-client"), "-v", "-t", "20", "-H", ":authority: web.example.com", *words,
            f"http://127.0.0.1:{port}/a?b=c"]


@contextlib.contextmanager
def asking(program: Any, *words: str) -> Iterator[tuple[bytes, socket.socket, subprocess.Popen]]:
    """What the client has said up to the end of its head, its connection, and the client."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        with subprocess.Popen(program(server.getsockname()[1], *words), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) as client:
            try:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(20)
                    data = b""
                    while parse_authority(data) is None:
                        piece = connection.recv(65536)
                        assert piece, data
                        data += piece
                    yield data, connection, client
            finally:
                client.kill()


def read_on(connection: socket.socket) -> None:
    """Until the client goes; it may have left unread what it was told last."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass


URL = "http://web.example.com/a?b=c"
REAL_CLIENTS = pytest.mark.parametrize("program, words", [
    (curl, (URL,)), (curl, ("-d", "x" * 100_000, "-H", "Expect:", URL)),
    (curl, ("-b", "a=b; c=d", "-H", "X-Own: 1", URL)),
    (curl, ("-H", f"X-Long: {'~' * 9000}", "-H", f"X-Other: {'a' * 9000}", URL)),
    (nghttp, ()), (nghttp, ("--no-dep",)), (nghttp, ("--padding=200",)), (nghttp, ("--continuation", "--padding=255")),
    (nghttp, ("--header-table-size=0", "--encoder-header-table-size=0")),
    (nghttp, ("-H", "x-own: ~!", "-H", "te: trailers")),
    (nghttp, ("-w", "30", "-W", "30", "--peer-max-concurrent-streams=1000")),
], ids=["curl", "curl with a body", "curl with a cookie", "curl with a long head", "nghttp", "nghttp without priority",
        "nghttp with padding", "nghttp with continuation", "nghttp without a table", "nghttp with fields",
        "nghttp with windows"])


@REAL_CLIENTS
def test_a_real_client_is_understood_and_refused_in_words(program, words):
    with asking(program, *words) as (data, connection, client):
        found = told((data,))
        assert found[:2] == ("web.example.com", 0) and found.path == b"/a?b=c"
        assert found.method == ("POST" if "-d" in words else "GET")
        connection.sendall(refusal(Refused("no_route", "no route")))
        read_on(connection)
        said = client.communicate(timeout=20)[0].decode()
        if program is nghttp:
            assert "REFUSED_STREAM(0x07), opaque_data(22)=[no route fits the name]" in said
        else:
            assert client.returncode == 16  # CURLE_HTTP2
    for pieces in cuts(data[:found.end]):  # when the client has been told: it waits for ten seconds only
        assert told(pieces) == found


@pytest.mark.parametrize("program, words", [(curl, (URL,)), (nghttp, ()), (nghttp, ("--header-table-size=0",)),
                                            (nghttp, ("--header-table-size=64",))])
def test_a_real_client_reads_what_we_encode(program, words):
    """Also one that allows no table."""
    with asking(program, *words) as (data, connection, client):
        at = len(PREFACE)
        while (frame := read_frame(data, at)).kind != HEADERS:
            at = frame.end
        answer = encode([(b":status", b"200"), (b"content-type", b"text/plain"), (b"x-own", b"v" * 200)])
        connection.sendall(make_frame(SETTINGS) + make_frame(SETTINGS, b"", ACK)
                           + make_frame(HEADERS, answer, END_HEADERS, frame.stream)
                           + make_frame(DATA, b"it works\n", END_STREAM, frame.stream))
        read_on(connection)
        said = client.communicate(timeout=20)[0].decode()
        assert client.returncode == 0, said
        assert "x-own: " + "v" * 200 in said and "it works" in said


# -- mutations ---------------------------------------------------------------------------------


def test_mutated_input_is_a_name_or_None_or_a_refusal():
    """And what was taken is taken again by its own bytes alone, in pieces, and not by fewer of them."""
    chance = random.Random(9113)
    seeds = [START + frames for frames in (
        head(BLOCK), split(BLOCK, 9, 9), head(b"\x05" + PRIORITY_DATA + BLOCK + bytes(5), 0x2D),
        make_frame(SETTINGS, SETTINGS_DATA) + make_frame(PRIORITY, PRIORITY_DATA, 0, 3) + make_frame(0x8B, b"12")
        + make_frame(WINDOW_UPDATE, b"\0\0\0\x01")
        + head(request((b"host", b"web.example.com:80"), (b"te", b"trailers"))),
        head(b"\x82\x86\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff", END_HEADERS))]
    outcomes = {"name": 0, "more": 0, "refused": 0}
    for _ in range(20_000):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(PREFACE) if chance.random() < 0.95 else 0, len(data))
            change = chance.randrange(4)
            if change == 0:
                data[at] = chance.randrange(256)
            elif change == 1:
                data[at] ^= 1 << chance.randrange(8)
            elif change == 2:
                del data[at:at + chance.randrange(1, 4)]
            else:
                more = b"\0", b"\xff", chance.randbytes(3), write_integer(1337, 5, 0x20), data[at:at + 9]
                data[at:at] = chance.choice(more)
            if len(data) <= len(PREFACE):
                break
        try:
            found = parse_authority(data)
        except Refused as error:
            assert error.kind in ("bad_request", "bad_name", "no_method")
            refusal(error)
            outcomes["refused"] += 1
            continue
        if found is None:
            outcomes["more"] += 1
            continue
        outcomes["name"] += 1
        assert parse_authority(data[:found.end]) == found and parse_authority(data[:found.end - 1]) is None
        middle = chance.randrange(found.end)
        assert told((data[:middle], data[middle:])) == found
    assert all(count > 500 for count in outcomes.values()), outcomes


def test_bytes_by_chance_are_never_a_name():
    chance = random.Random(1)
    for _ in range(5000):
        with contextlib.suppress(Refused):
            assert parse_authority(START + chance.randbytes(chance.randrange(100))) is None


# -- clients that wait for the server ----------------------------------------------------------

ACKNOWLEDGED = make_frame(SETTINGS, b"", ACK)


@pytest.mark.parametrize("data, waits", [
    (PREFACE + make_frame(SETTINGS), True), (PREFACE + make_frame(SETTINGS) + make_frame(WINDOW_UPDATE, b"\0\0\0\1"), True),
    (PREFACE, False), (PREFACE[:-1], False), (PREFACE + make_frame(SETTINGS)[:-1], False),
    (PREFACE + make_frame(SETTINGS) + b"\0", False), (PREFACE + make_frame(SETTINGS) + head(BLOCK)[:-1], False),
], ids=["settings", "window", "preface", "part", "half a frame", "half a header", "half a head"])
def test_a_client_that_waits_for_the_servers_settings_is_known(data, waits):
    assert parse_authority(data) is None and awaits_settings(bytearray(data)) == waits


@pytest.mark.parametrize("order", ["before", "behind"])
def test_the_acknowledgement_of_our_settings_is_found_wherever_it_comes(order):
    opening = PREFACE + make_frame(SETTINGS)
    request = head(BLOCK) + make_frame(DATA, b"body", 0, 1)
    data = opening + (ACKNOWLEDGED + request if order == "before" else request + ACKNOWLEDGED)
    found = parse_authority(data, 0, True)
    start, end = found.ack
    assert data[:start] + data[end:] == opening + request and found.name == "web.example.com"
    for size in range(len(data)):
        early = parse_authority(data[:size], 0, True)
        assert early is None or order == "before" and size >= found.end


@pytest.mark.parametrize("data, code", [
    (PREFACE + make_frame(SETTINGS) + ACKNOWLEDGED + ACKNOWLEDGED, PROTOCOL_ERROR),
    (PREFACE + ACKNOWLEDGED, PROTOCOL_ERROR),
    (PREFACE + make_frame(SETTINGS) + head(BLOCK) + make_frame(DATA, b"x", 0, 1) * 20, ENHANCE_YOUR_CALM),
], ids=["twice", "first", "never"])
def test_an_acknowledgement_that_is_out_of_place_is_refused(data, code):
    with pytest.raises(Broken) as caught:
        parse_authority(data, 0, True)
    assert caught.value.code == code
