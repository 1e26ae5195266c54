"""Tests of sniroute_http.py.  The table of what is refused, and what is not, is testbed/smuggling.py.

The last part asks other programs: what the grammar lets through is sent to Python's http.server, nginx and HAProxy, and
they have to find the same requests in it.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import random
import re
import shutil
import socket
import socketserver
import subprocess
import threading
from typing import Any, Callable, Iterable, Iterator

import pytest

from sniroute_http import (CHUNK_LINE_MAX, CHUNKED, COUNTED, EXTENSIONS_MAX, HEAD_MAX, NONE, TUNNEL, UNTIL_CLOSE,
                           Framing, open_body, parse_request, parse_response, pass_request, pass_response)
from sniroute_refusals import REFUSALS, Malformed
from conftest import connect, wait_until
from testbed.clients import program_path
from testbed.smuggling import (CHUNKS, EVIL, GET, NEUTRAL, OK, POST, REQUESTS, RESPONSES, SHAPES, WEBSOCKET, Row, Said,
                               Wire)

REFUSED = [row for row in REQUESTS if row.status and not row.is_cut]
TAKEN = [row for row in REQUESTS if not row.status]
CUT = [row for row in REQUESTS if row.is_cut]


def rows(table: Iterable[Any]) -> Any:
    """A table for parametrize."""
    return pytest.mark.parametrize("row", table, ids=[row.name for row in table])


def cuts(data: bytes) -> Iterator[tuple[bytes, ...]]:
    """The bytes whole, cut in two at every place, and one by one; what is very long only at some places."""
    places = range(len(data) + 1) if len(data) < 1000 else [*range(60), *range(len(data) - 60, len(data))]
    yield (data,)
    for at in places:
        yield data[:at], data[at:]
    step = 1 if len(data) < 1000 else len(data) // 400
    yield tuple(data[at:at + step] for at in range(0, len(data), step))


def forwarded(wire: Wire, pieces: Iterable[bytes]) -> Malformed | None:
    """Feed these pieces; return what refuses them."""
    try:
        for piece in pieces:
            wire.feed(piece)
    except Malformed as error:
        return error
    return None


def heard(wire: Wire) -> tuple[tuple[str, str, str, bytes], ...]:
    """The requests that a Wire has heard, as in Row.heard."""
    return tuple((request.method, request.path.decode(), request.name, bytes(body))
                 for request, body in zip(wire.heard, wire.bodies))


# -- the table: requests -----------------------------------------------------------------------


def test_the_table_has_no_name_twice():
    for table in (REQUESTS, RESPONSES):
        names = [row.name for row in table]
        assert sorted(set(names)) == sorted(names)
    assert len(REFUSED) > 150 and len(TAKEN) > 40


@rows(REFUSED)
@pytest.mark.parametrize("behind", [b"", EVIL], ids=["alone", "and a request"])
def test_what_is_refused(row: Row, behind: bytes):
    """Wherever it is cut, with the same status; and the request behind it does not get through."""
    for pieces in cuts(row.data + behind):
        wire = Wire()
        error = forwarded(wire, pieces)
        assert error is not None and error.status == row.status, (pieces[:2], error)
        assert error.kind in ("bad_request", "bad_name") and str(error)
        assert b"evil" not in wire.out and len(wire.heard) <= 1
        assert len(wire.out) <= len(row.data)


@rows(TAKEN)
def test_what_gets_through(row: Row):
    for pieces in cuts(row.data + EVIL):
        wire = Wire()
        assert forwarded(wire, pieces) is None, pieces[:2]
        assert heard(wire) == row.heard + (("GET", "/evil", "a", b""),), pieces[:2]
        wire.end()
        assert not wire.data


@rows(TAKEN)
def test_what_gets_through_is_read_again_as_the_same(row: Row):
    """By the same grammar, and byte for byte: another router behind this one changes nothing."""
    first, second = Wire(), Wire()
    assert forwarded(first, [row.data]) is None
    if not first.heard[0].name:
        return  # HTTP/1.0 without a Host: the forwarder has to add one
    assert forwarded(second, [bytes(first.out)]) is None
    assert second.out == first.out and heard(second) == heard(first)


@rows(CUT)
def test_what_is_cut_is_never_whole(row: Row):
    for pieces in cuts(row.data):
        wire = Wire()
        assert forwarded(wire, pieces) is None
        with pytest.raises(Malformed) as caught:
            wire.end()
        assert caught.value.status == row.status
    wire = Wire()
    forwarded(wire, [row.data + EVIL])
    assert not any((request.method, request.path) == ("GET", b"/evil") for request in wire.heard)


def test_nothing_of_the_far_end_of_a_refusal_is_kept():
    """A hundred requests in turns to two hosts, the last but one broken: those before it were heard, in order."""
    asked = [b"GET /%d HTTP/1.1\r\nHost: %b\r\n\r\n" % (number, (b"a", b"b")[number % 2]) for number in range(100)]
    expected = tuple(("GET", f"/{number}", "ab"[number % 2], b"") for number in range(100))
    wire = Wire()
    assert forwarded(wire, [b"".join(asked)]) is None and heard(wire) == expected
    asked[98] = asked[98].replace(b"Host:", b"Host :")
    wire = Wire()
    assert forwarded(wire, [b"".join(asked)]).status == 400 and heard(wire) == expected[:98]


# -- the table: answers ------------------------------------------------------------------------


@rows([said for said in RESPONSES if said.heard is not None])
def test_answers(row: Said):
    for pieces in cuts(row.data):
        wire = Wire(row.method, row.upgrades)
        assert forwarded(wire, pieces) is None, pieces[:2]
        if wire.body is not None:
            assert wire.heard[-1].framing.kind in (UNTIL_CLOSE, TUNNEL)
        wire.end()
        assert tuple((answer.status, bytes(body)) for answer, body in zip(wire.heard, wire.bodies)) == row.heard
        assert wire.data == row.left, "what nobody asked for is not read"
        assert wire.heard[-1].keeps == (b"Connection: close" not in row.data
                                        and wire.heard[-1].framing.kind not in (UNTIL_CLOSE, TUNNEL))


@rows([said for said in RESPONSES if said.heard is None])
def test_answers_that_are_refused(row: Said):
    for pieces in cuts(row.data):
        wire = Wire(row.method, row.upgrades)
        error = forwarded(wire, pieces)
        if row.is_cut:
            assert error is None
            with pytest.raises(Malformed) as caught:
                wire.end()
            error = caught.value
            assert wire.body is not None or not wire.out, "the client cannot take it for whole"
            continue
        assert error is not None and (error.kind, error.status) == ("bad_answer", 502), pieces[:2]


@pytest.mark.parametrize("lines, kind, length", [
    (b"", UNTIL_CLOSE, 0), (b"Content-Length: 7\r\n", COUNTED, 7), (b"Transfer-Encoding: chunked\r\n", CHUNKED, 0)])
@pytest.mark.parametrize("method, status", [("GET", 200), ("GET", 404), ("POST", 201), ("GET", 205), ("CONNECT", 407),
                                            ("HEAD", 200), ("HEAD", 404), ("GET", 204), ("POST", 304), ("GET", 100),
                                            ("GET", 199), ("CONNECT", 200), ("CONNECT", 299)])
def test_where_an_answer_ends(method, status, lines, kind, length):
    """RFC 9112 section 6.3, in its order."""
    framing = parse_response(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, lines), method).framing
    if method == "HEAD" or status < 200 or status in (204, 304):
        assert framing == Framing(NONE)
    elif (method, status // 100) == ("CONNECT", 2):
        assert framing == Framing(TUNNEL)
    else:
        assert framing == Framing(kind, length)


@pytest.mark.parametrize("version, connection, keeps", [
    (1, b"", True), (1, b"close", False), (1, b"CLOSE", False), (1, b"keep-alive, close", False), (1, b"foo", True),
    (0, b"", False), (0, b"keep-alive", True), (0, b"Keep-Alive, x", True), (0, b"keep-alive, close", False)])
def test_whether_a_connection_goes_on(version, connection, keeps):
    lines = b"Connection: " + connection + b"\r\n" if connection else b""
    request = parse_request(b"GET / HTTP/1.%d\r\nHost: a\r\n%b\r\n" % (version, lines))
    answer = parse_response(b"HTTP/1.%d 200 OK\r\nContent-Length: 0\r\n%b\r\n" % (version, lines), "GET")
    assert (request.keeps, answer.keeps) == (keeps, keeps)
    assert (request.version, answer.version) == (version, version)


# -- examples of the standards -----------------------------------------------------------------


@pytest.mark.parametrize("data, form, place, path", [
    pytest.param(b"GET /hello.txt HTTP/1.1\r\nUser-Agent: curl/7.64.1\r\nHost: www.example.com\r\n"
                 b"Accept-Language: en, mi\r\n\r\n", "origin", ("www.example.com", 0), b"/hello.txt", id="9110 3.9"),
    pytest.param(b"GET /where?q=now HTTP/1.1\r\nHost: www.example.org\r\n\r\n", "origin", ("www.example.org", 0),
                 b"/where?q=now", id="9112 3.2.1"),
    pytest.param(b"GET http://www.example.org/pub/WWW/TheProject.html HTTP/1.1\r\nHost: www.example.org\r\n\r\n",
                 "absolute", ("www.example.org", 0), b"/pub/WWW/TheProject.html", id="9112 3.2.2"),
    pytest.param(b"CONNECT www.example.com:80 HTTP/1.1\r\nHost: www.example.com\r\n\r\n", "authority",
                 ("www.example.com", 80), b"", id="9112 3.2.3"),
    pytest.param(b"OPTIONS * HTTP/1.1\r\nHost: www.example.org:8001\r\n\r\n", "asterisk", ("www.example.org", 8001),
                 b"*",
                 id="9112 3.2.4"),
    pytest.param(b"OPTIONS http://www.example.org:8001 HTTP/1.1\r\nHost: www.example.org:8001\r\n\r\n", "absolute",
                 ("www.example.org", 8001), b"*", id="9112 3.2.4, to a proxy"),
])
def test_requests_of_the_standard(data, form, place, path):
    request = parse_request(data)
    assert (request.form, (request.name, request.port), request.path) == (form, place, path)
    assert request.head.first + request.head.block == data and request.head.end == len(data)
    assert request.framing == Framing(NONE)


def test_the_answer_of_the_standard():
    """RFC 9110 section 3.9."""
    lines = (b"Date: Mon, 27 Jul 2009 12:28:53 GMT", b"Server: Apache", b"Last-Modified: Wed, 22 Jul 2009 19:15:56 GMT",
             b'ETag: "34aa387-d-1568eb00"', b"Accept-Ranges: bytes", b"Content-Length: 51", b"Vary: Accept-Encoding",
             b"Content-Type: text/plain")
    body = b"Hello World! My content includes a trailing CRLF.\r\n"
    data = b"\r\n".join((b"HTTP/1.1 200 OK", *lines, b"", body))
    answer = parse_response(data, "GET")
    assert answer.framing == Framing(COUNTED, 51) and data[answer.head.end:] == body
    assert pass_response(answer) == data[:answer.head.end]
    assert [field.name + b": " + field.value for field in answer.head.fields] == list(lines)


def test_the_upgrade_of_the_standards():
    """RFC 9110 section 7.8, RFC 6455 section 1.2; Firefox names both words in Connection."""
    websocket = (b"GET /chat HTTP/1.1\r\nHost: server.example.com\r\nUpgrade: websocket\r\n"
                 b"Connection: keep-alive, Upgrade\r\n"
                 b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
    request = parse_request(websocket + b"\x81\x80abcd")
    assert request.upgrades == (b"websocket",) and request.head.end == len(websocket), "a frame behind it stays there"
    listed = parse_request(GET + b"Connection: upgrade\r\nUpgrade: websocket, IRC/6.9, RTA/x11\r\n\r\n")
    assert listed.upgrades == (b"websocket", b"irc/6.9", b"rta/x11")
    twice = parse_request(GET + b"Connection: upgrade\r\nUpgrade: a\r\nUpgrade: b\r\n\r\n")
    assert twice.upgrades == (b"a", b"b")
    passed = pass_request(twice, upgrade=b"b")
    assert passed == GET + b"Connection: Upgrade\r\nUpgrade: b\r\n\r\n"


@pytest.mark.parametrize("data", [
    pytest.param(GET + b"Upgrade: websocket\r\n\r\n", id="Connection does not name it"),
    pytest.param(POST + b"Connection: upgrade\r\nUpgrade: foo\r\nContent-Length: 5\r\n\r\nhello", id="beside a body"),
    pytest.param(POST + b"Connection: upgrade\r\nUpgrade: foo\r\nTransfer-Encoding: chunked\r\n\r\n",
                 id="beside chunks"),
    pytest.param(b"GET / HTTP/1.0\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: foo\r\n\r\n", id="HTTP/1.0"),
])
def test_no_upgrade(data):
    request = parse_request(data)
    assert request.upgrades == () and b"pgrade" not in pass_request(request)


def test_chunks_of_the_standard():
    """RFC 9112 section 7.1, and the order of its parts, with each kind of extension."""
    body = open_body(parse_request(CHUNKS))
    said = b'4\r\nWiki\r\n6 ; a ;b="\xe9;\\"" ;c\r\npedia \r\nE\r\nin \r\n\r\nchunks.\r\n0;x\r\nX-Sum: 1\r\n\r\n'
    parts, used = body.feed(said + b"GET")
    assert b"".join(parts) == b"4\r\nWiki\r\n6\r\npedia \r\nE\r\nin \r\n\r\nchunks.\r\n0\r\n\r\n" and body.is_done
    assert used == len(said)


# -- heads -------------------------------------------------------------------------------------


def test_a_line_keeps_its_bytes_and_its_place():
    data = b"GET /x HTTP/1.1\r\nhOsT: a\r\nX-UPPER:y\r\nx-upper: \t z  \r\nx_under: 1\r\nAccept:\r\nBytes: \xe9\r\n\r\n"
    request = parse_request(data)
    assert [request.head.block[field.start:field.end] for field in request.head.fields] == data.splitlines(True)[1:-1]
    assert [(field.name, field.key, field.value) for field in request.head.fields] == [
        (b"hOsT", b"host", b"a"), (b"X-UPPER", b"x-upper", b"y"), (b"x-upper", b"x-upper", b"z"),
        (b"x_under", b"x-under", b"1"), (b"Accept", b"accept", b""), (b"Bytes", b"bytes", b"\xe9")]
    assert request.head.values(b"x-upper") == [b"y", b"z"]
    assert pass_request(request) == data


@pytest.mark.parametrize("begin, end, status", [
    pytest.param(GET + b"X: ", b"\r\n\r\n", 431, id="request"),
    pytest.param(OK + b"X: ", b"\r\n\r\n", 502, id="answer")])
def test_a_head_of_32_kib_is_the_largest(begin, end, status):
    parse: Callable[[bytes], Any] = parse_request if status == 431 else lambda data: parse_response(data, "GET")
    head = begin + b"x" * (HEAD_MAX - len(begin) - len(end)) + end
    assert parse(head + b"x").head.end == HEAD_MAX
    assert parse(head[:-1]) is None
    for data in (begin + b"x" + head[len(begin):], begin + b"x" * HEAD_MAX):
        with pytest.raises(Malformed) as caught:
            parse(data)
        assert caught.value.status == status


@pytest.mark.parametrize("line, passed", [
    (b"host:a\t", b"host: a"), (b"Transfer-Encoding: \t CHUNKED \t", b"Transfer-Encoding: chunked"),
    (b"CONTENT-LENGTH:5 ", b"CONTENT-LENGTH: 5"), (b"X-Other:\t 5 ", b"X-Other:\t 5 ")])
def test_what_decides_is_written_plainly(line, passed):
    """Python's http.server keeps the blanks behind a value, so `chunked ` is no coding that its users know."""
    lines = [line, b"Host: a"] if not line.startswith(b"host") else [line]
    request = parse_request(b"\r\n".join((b"POST / HTTP/1.1", *lines, b"", b"")))
    assert b"\r\n" + passed + b"\r\n" in pass_request(request)


def test_a_secret_in_a_broken_line_is_not_repeated():
    for line in (b"Authorization : s3cret", b"Authorization\xff: s3cret", b" s3cret", b"s3cret", b"A: s3cret\x01",
                 b": s3cret",
                 b"Content-Length: s3cret", b"Transfer-Encoding: s3cret", b"Connection: a s3cret", b"Expect: s3cret"):
        with pytest.raises(Malformed) as caught:
            parse_request(GET + line + b"\r\n\r\n")
        assert "s3cret" not in str(caught.value)


def test_a_head_that_comes_byte_by_byte_is_not_searched_again():
    """`seen` says where to go on; a wrong line end just before it is still found."""
    head = GET + b"X: " + b"y" * 200 + b"\r\n\r\n"
    for at in range(len(head)):
        assert parse_request(head[:at]) is None and parse_request(head, at) == parse_request(head)
        for fault in (b"\n", b"\r", b"\0"):
            broken = head[:at] + fault + head[at:]
            if broken.endswith(b"\r\n\r\n") and broken.count(b"\n") == head.count(b"\n"):
                continue  # a CR before a CR
            with pytest.raises(Malformed):
                for end in range(at, len(broken) + 1):
                    parse_request(broken[:end], max(0, end - 1))


def test_the_same_from_bytes_and_from_a_bytearray():
    data = POST + b"Content-Length: 5\r\n\r\nhello"
    buffer = bytearray(data)
    request = parse_request(buffer)
    buffer[:] = bytes(len(buffer))  # the buffer is used again
    assert request == parse_request(data) and isinstance(request.head.block, bytes)


# -- bodies ------------------------------------------------------------------------------------


def test_a_counted_body_may_be_moved_by_the_caller():
    body = open_body(parse_request(POST + b"Content-Length: 10\r\n\r\n"))
    assert (body.left, body.is_done) == (10, False)
    parts, used = body.feed(b"abc")
    assert (b"".join(parts), used, body.left) == (b"abc", 3, 7)
    body.passed(5)  # spliced
    parts, used = body.feed(memoryview(b"xyGET /"))
    assert (b"".join(parts), used, body.left, body.is_done) == (b"xy", 2, 0, True)
    assert body.feed(b"GET") == ([], 0)
    body.end()


def test_a_chunk_may_be_moved_by_the_caller():
    body = open_body(parse_request(CHUNKS))
    parts, used = body.feed(b"a\r\nab")
    assert (b"".join(parts), used, body.left) == (b"a\r\nab", 5, 8)
    body.passed(8)
    assert body.left == 0 and not body.is_done
    parts, _ = body.feed(b"\r\n0\r\n\r\n")
    assert b"".join(parts) == b"\r\n0\r\n\r\n" and body.is_done


def test_a_body_until_the_end_is_never_done_before():
    body = open_body(parse_response(OK + b"\r\n", "GET"))
    parts, used = body.feed(b"abc")
    assert (b"".join(parts), used, body.left, body.is_done) == (b"abc", 3, None, False)
    body.passed(1 << 40)
    body.end()
    assert body.is_done


def test_no_body_is_done_at_once():
    for message in (parse_request(GET + b"\r\n"), parse_request(POST + b"Content-Length: 0\r\n\r\n"),
                    parse_response(b"HTTP/1.1 304 X\r\nContent-Length: 9\r\n\r\n", "GET")):
        body = open_body(message)
        assert body.is_done and body.feed(b"GET") == ([], 0)
        body.end()


@pytest.mark.parametrize("unframed", [False, True])
def test_plain_chunks_pass_in_one_part(unframed):
    """Those that need no change are not copied: a part is a view of what came."""
    body = open_body(parse_request(CHUNKS), unframed)
    data = b"3\r\nabc\r\n" * 1000
    parts, used = body.feed(data)
    assert used == len(data)
    if unframed:
        assert b"".join(parts) == b"abc" * 1000
    else:
        assert len(parts) == 1 and parts[0].obj is data
    parts, _ = body.feed(b"0\r\n\r\n")
    assert (b"".join(parts), body.is_done) == (b"" if unframed else b"0\r\n\r\n", True)


def chunks_of(data: bytes, chance: random.Random) -> bytes:
    """The data in chunks of any size, spelled in all ways that are allowed."""
    said, at = [], 0
    while at < len(data):
        size = min(chance.choice((1, 2, 15, 16, 300)), len(data) - at)
        digits = chance.choice(("%x", "%X", "%05x")) % size
        said.append(digits.encode() + chance.choice((b"", b"", b";a",
                                                     b' ;a="b\t"')) + b"\r\n" + data[at:at + size] + b"\r\n")
        at += size
    return b"".join(said) + chance.choice((b"0\r\n\r\n", b"000;x\r\nA: b\r\n\r\n"))


def test_chunks_in_any_pieces():
    chance = random.Random(7)
    for _ in range(300):
        data = chance.randbytes(chance.randrange(400))
        said = chunks_of(data, chance) + EVIL
        framed, plain = open_body(parse_request(CHUNKS)), open_body(parse_request(CHUNKS), unframed=True)
        again = open_body(parse_request(CHUNKS), unframed=True)
        out, inner, at = bytearray(), bytearray(), 0
        while not framed.is_done:
            piece = said[at:at + chance.choice((1, 1, 2, 3, 50, 5000))]
            parts, used = framed.feed(piece)
            out += b"".join(parts)
            same, count = plain.feed(bytearray(piece))
            inner += b"".join(same)
            assert used == count and len(framed.part) <= CHUNK_LINE_MAX
            at += used
        assert said[at:] == EVIL and inner == data and plain.is_done
        assert not re.search(rb"^0[0-9A-Fa-f]", out) and out.endswith(b"0\r\n\r\n")
        parts, used = again.feed(bytes(out))
        assert b"".join(parts) == data and used == len(out) and again.is_done


def test_extensions_are_paid_for_by_what_is_sent():
    """A signature beside each large chunk may go on for ever; a byte beside each KiB of extension may not."""
    body = open_body(parse_request(CHUNKS))
    for _ in range(2000):
        body.feed(b"100;signature=%b\r\n" % (b"f" * 64))
        body.passed(256)
        body.feed(b"\r\n")
    said = 0
    with pytest.raises(Malformed):
        while True:
            body.feed(b"1;" + b"x" * 1000 + b"\r\na\r\n")
            said += 1000
    assert said <= EXTENSIONS_MAX


def test_an_endless_line_beside_a_chunk_is_refused_before_it_takes_memory():
    for beginning in (b"5;", b"0\r\nX: "):
        body = open_body(parse_request(CHUNKS))
        body.feed(beginning)
        with pytest.raises(Malformed):
            for _ in range(CHUNK_LINE_MAX + 1):
                body.feed(b"x")
        assert len(body.part) <= CHUNK_LINE_MAX + 1


# -- heads that are passed on ------------------------------------------------------------------


def test_what_is_for_one_connection_only_is_left_out():
    request = parse_request(
        b"GET /x HTTP/1.1\r\nHost: a\r\nA: 1\r\nConnection: close, X-Mine\r\nX-Mine: 2\r\nX_MINE: 3\r\nB: 4\r\n"
        b"Keep-Alive: timeout=5\r\n"
        b"Proxy-Connection: keep-alive\r\nTE: trailers\r\nTrailer: X\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
        b"Proxy-Authorization: Basic eDp5\r\nCookie: c\r\nconnection: keep-alive\r\nPROXY_CONNECTION: x\r\n\r\n")
    assert pass_request(request) == b"GET /x HTTP/1.1\r\nHost: a\r\nA: 1\r\nB: 4\r\nCookie: c\r\n\r\n"


FORGED = (b"Forwarded", b"X-Forwarded-For", b"x-forwarded-proto", b"X-Forwarded-Host", b"X-Forwarded-Port",
          b"X-Forwarded-Prefix",
          b"X-Forwarded", b"X-Forwarded-Server", b"X-Real-IP", b"X_Forwarded_For", b"X_Real-IP", b"x_FORWARDED-proto",
          b"X.Forwarded.For",
          b"X-Forwarded_For", b"X-Forwarded~For")


@pytest.mark.parametrize("name", FORGED)
def test_a_forwarding_field_of_a_stranger_is_left_out(name):
    request = parse_request(GET + name + b": forged\r\nX: y\r\n\r\n")
    assert pass_request(request, [(b"X-Forwarded-For", b"192.0.2.1")]) == (
        GET + b"X: y\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n")
    believed = pass_request(request, believes=True)
    assert (name in believed) == bool(re.fullmatch(rb"[A-Za-z-]+", name)), "of those that are believed, one spelling"


def test_what_a_connection_names_cannot_take_away_what_is_added():
    """It is gone before ours are set."""
    request = parse_request(GET + b"Connection: close, X-Secret, Via-Us\r\nX-Secret: y\r\nVia-Us: z\r\n\r\n")
    assert pass_request(request, [(b"Via-Us", b"1")]) == GET + b"Via-Us: 1\r\n\r\n"


@pytest.mark.parametrize("host, passed", [(b"", b"a"), (b"web.internal:8080", b"web.internal:8080")])
def test_host_stays_where_it_stands(host, passed):
    request = parse_request(b"GET http://a/p HTTP/1.0\r\nX: 1\r\nhost:a\r\nExpect: 100-continue\r\nY: 2\r\n\r\n")
    assert pass_request(request, host=host).replace(b"host: ", b"host:") == (
        b"GET /p HTTP/1.1\r\nX: 1\r\nhost:" + passed + b"\r\nY: 2\r\n\r\n")


@pytest.mark.parametrize("target, host, passed", [
    (b"/x", b"", b"Host: "), (b"/x", b"web.internal", b"Host: web.internal"), (b"http://A/x", b"", b"Host: a"),
    (b"http://a:8080/x", b"", b"Host: a:8080")])
def test_a_host_is_added_where_an_old_client_names_none(target, host, passed):
    request = parse_request(b"GET " + target + b" HTTP/1.0\r\nX: 1\r\n\r\n")
    assert pass_request(request, [(b"Y", b"2")], host=host) == (
        b"GET /x HTTP/1.1\r\nX: 1\r\n" + passed + b"\r\nY: 2\r\n\r\n")


def test_expect_passes_where_the_client_waits():
    request = parse_request(POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert request.expects_continue and b"Expect: 100-continue\r\n" in pass_request(request)
    for data in (GET + b"Expect: 100-continue\r\n\r\n", POST + b"Expect: 100-continue\r\nContent-Length: 0\r\n\r\n"):
        request = parse_request(data)
        assert not request.expects_continue and b"Expect" not in pass_request(request)


@pytest.mark.parametrize("name, value", [(b"X", b"a\r\nEvil: 1"), (b"X", b"a\n"), (b"X", b"a\0"), (b"X:", b"a"), (b"",
                                                                                                                  b"a"),
                                         (b"X\r\nY", b"a"), (b"X ", b"a")])
def test_what_is_added_begins_no_other_line(name, value):
    with pytest.raises(ValueError):
        pass_request(parse_request(GET + b"\r\n"), [(name, value)])
    with pytest.raises(ValueError):
        pass_response(parse_response(OK + b"\r\n", "GET"), [(name, value)])
    if name == b"X":
        with pytest.raises(ValueError):
            pass_request(parse_request(GET + b"\r\n"), host=value)


def test_an_answer_is_passed_on():
    data = (b"HTTP/1.0 404 Not \xe9\r\nServer: x\r\nConnection: close, X-Mine\r\nX-Mine: 1\r\n"
            b"Keep-Alive: timeout=5\r\nContent-Length: 2\r\nContent_Length: 9\r\nSet-Cookie: a\r\nset-cookie: b\r\n\r\nok")
    assert pass_response(parse_response(data, "GET"), [(b"Connection", b"close")]) == (
        b"HTTP/1.1 404 Not \xe9\r\nServer: x\r\nContent-Length: 2\r\n"
        b"Set-Cookie: a\r\nset-cookie: b\r\nConnection: close\r\n\r\n")
    upgraded = parse_response(WEBSOCKET + b"Sec-WebSocket-Accept: x\r\n\r\n", "GET", (b"websocket",))
    assert pass_response(upgraded) == (b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: x\r\nConnection: Upgrade\r\n"
                                       b"Upgrade: websocket\r\n\r\n")


@pytest.mark.parametrize("method, status, unframed, length, coding", [
    ("GET", 200, False, True, True), ("GET", 200, True, True, False), ("HEAD", 200, False, True, True),
    ("GET", 304, False, True, True), ("GET", 204, False, False, False), ("GET", 103, False, False, False)])
def test_an_answer_says_of_a_body_what_its_client_can_use(method, status, unframed, length, coding):
    for line, stays in ((b"Content-Length: 2\r\n", length), (b"Transfer-Encoding: chunked\r\n", coding)):
        answer = parse_response(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, line), method)
        assert (line in pass_response(answer, unframed=unframed)) is stays


# -- shapes that are known ---------------------------------------------------------------------


@pytest.mark.parametrize("data", SHAPES.values(), ids=SHAPES)
def test_a_known_shape_is_refused(data):
    for pieces in cuts(data):
        wire = Wire()
        assert forwarded(wire, pieces) is not None
        assert b"/evil" not in wire.out


@pytest.mark.parametrize("data, expected, gone", NEUTRAL.values(), ids=NEUTRAL)
def test_a_known_shape_is_one_thing_to_all_readers(data, expected, gone):
    wire = Wire()
    assert forwarded(wire, [data]) is None and heard(wire) == expected
    assert gone not in wire.out


# -- faults at random --------------------------------------------------------------------------

SEEDS = [row.data for row in TAKEN if len(row.data) < 400] + [row.data for row in REFUSED if len(row.data) < 200]
TELLING = [b"\r", b"\n", b"\r\n", b"\0", b" ", b"\t", b":", b",", b";", b"0", b"1", b"\x0b", b"\xa0", b"\x85", b"_",
           b"-", b"/",
           b"chunked", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n",
           b"Connection: close\r\n",
           b"HTTP/1.0", b"HTTP/1.1", b"\r\n\r\n", b"Content-Length", b"\xe2\x84\xaa"]


def mutated(chance: random.Random) -> bytes:
    """A row with some faults."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(data) + 1)
        what = chance.randrange(5)
        if what == 0:
            data[at:at] = chance.choice(TELLING)
        elif what == 1:
            del data[at:at + chance.choice((1, 1, 2, 8))]
        elif what == 2 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif what == 3:
            data[at:at + 1] = chance.choice(TELLING)
        else:
            other = chance.choice(SEEDS)
            cut = chance.randrange(len(other) + 1)
            data[at:at] = other[cut:cut + chance.choice((5, 20, 60))]
    return bytes(data)


def lax_readings(head: bytes) -> set[tuple[str, int]]:
    """How programs that are not strict would frame a request with this head: each of them reads another way."""
    readings = set()
    for line_end in (rb"\r\n", rb"\r?\n", rb"\r\n|\r|\n", rb"\r*\n"):
        for same in (lambda name: name, lambda name: name.replace(b"_", b"-"), lambda name: name.strip()):
            length, chunked = 0, False
            text = re.sub(rb"(?:%b)[ \t]+" % line_end, b" ", head)
            for line in re.split(line_end, text)[1:]:
                name, _, value = line.partition(b":")
                name, value = same(name).lower(), value.strip()
                if name == b"content-length":
                    found = re.match(rb"\+?(\d+)", value)
                    length = int(found[1]) if found else 0
                elif name == b"transfer-encoding" and b"chunked" in value.lower():
                    chunked = True
            readings.add((CHUNKED, 0) if chunked else (COUNTED if length else NONE, length))
    return readings


def test_a_fault_is_refused_or_makes_no_difference_to_any_reader():
    """What passes on has one framing, however it is read; and nothing but Malformed is raised."""
    chance = random.Random(18)
    taken = 0
    for _ in range(15000):
        data = mutated(chance)
        wire = Wire()
        error = forwarded(wire, [data])
        if error is not None:
            assert REFUSALS[error.kind].status and 400 <= error.status <= 505
        if not wire.heard:
            continue
        taken += 1
        request = wire.heard[0]
        framing = request.framing if request.framing != Framing(COUNTED) else Framing(NONE)
        passed = pass_request(request)
        assert lax_readings(passed) == {tuple(framing)}, data
        assert passed.count(b"\n") == passed.count(b"\r\n") == passed.count(b"\r") and b"\0" not in passed
        assert len(re.findall(rb"(?mi)^host[^a-z:]*:", passed)) == 1, data
    assert taken > 1000


def test_pieces_make_no_difference():
    chance = random.Random(19)
    for _ in range(1500):
        data = mutated(chance)
        whole, parts = Wire(), Wire()
        at = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((1, 2, 5))))
        pieces = [data[start:end] for start, end in zip([0, *at], [*at, len(data)])]
        errors = forwarded(whole, [data]), forwarded(parts, pieces)
        assert (errors[0] is None) == (errors[1] is None), data
        assert heard(parts)[:len(parts.heard) - 1] == heard(whole)[:len(parts.heard) - 1], data
        assert [request.head for request in parts.heard] == [request.head for request in whole.heard], data


def test_answers_with_faults_raise_nothing_but_malformed():
    chance = random.Random(20)
    seeds = [said.data for said in RESPONSES if len(said.data) < 400]
    for _ in range(5000):
        data = bytearray(chance.choice(seeds))
        at = chance.randrange(len(data) + 1)
        data[at:at + chance.randrange(3)] = chance.choice(TELLING)
        wire = Wire(chance.choice(("GET", "HEAD", "CONNECT")), (b"websocket",))
        error = forwarded(wire, [bytes(data)])
        assert error is None or (error.kind, error.status) == ("bad_answer", 502)


# -- other programs read the same --------------------------------------------------------------


class Recorder(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Python's http.server on a unix socket.  It writes down the requests that it finds."""

    daemon_threads = False

    def __init__(self, path: str):
        super().__init__(path, Recording)
        self.found: list[tuple[str, str, str, bytes]] = []  # as Row.heard, with Host as it came


class Recording(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    server: Recorder

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self.record
        raise AttributeError(name)

    def record(self) -> None:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                assert self.rfile.read(2) == b"\r\n"
            assert self.rfile.readline() == b"\r\n"
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        target = self.requestline.split(" ")[1]  # `path` has one slash where two came
        self.server.found.append((self.command, target, self.headers.get("Host", ""), body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 64; }}
http {{
    access_log off; client_max_body_size 0; large_client_header_buffers 4 64k; client_header_buffer_size 64k;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi; merge_slashes off; keepalive_requests 10000;
    server {{
        listen unix:{folder}/nginx;
        location / {{
            proxy_pass http://unix:{recorder}; proxy_http_version 1.1; proxy_set_header Host $http_host;
        }}
    }}
}}
"""
HAPROXY = """
global
    tune.bufsize 131072
defaults
    mode http
    timeout client 10s
    timeout server 10s
    timeout connect 10s
    option http-server-close
frontend f
    bind unix@{folder}/haproxy
    default_backend b
backend b
    server s unix@{recorder}
"""


@contextlib.contextmanager
def running(words: list[str], path: str) -> Iterator[str]:
    """A program that listens on a unix socket."""
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE) as process:
        try:
            def is_up() -> bool:
                assert process.poll() is None, process.stderr.read().decode()
                with contextlib.suppress(OSError):
                    connect(path).close()
                    return True
                return False

            wait_until(is_up, what=words[0])
            yield path
        finally:
            process.terminate()
            process.communicate(timeout=20)


@pytest.fixture(params=["http.server", "nginx", "haproxy"])
def reader(request, tmp_path) -> Iterator[tuple[str, Recorder]]:
    """Where another program listens, and who writes down what it finds."""
    folder, own = tmp_path, f"{tmp_path}/recorder"
    with Recorder(own) as recorder, contextlib.ExitStack() as stack:
        thread = threading.Thread(target=recorder.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        stack.callback(thread.join)
        stack.callback(recorder.shutdown)
        path = own
        if request.param != "http.server":
            path = f"{folder}/{request.param}"
            (folder / "conf").write_text({"nginx": NGINX, "haproxy": HAPROXY}[request.param].format(
                folder=folder, recorder=own))
            program = shutil.which(f"/usr/sbin/{request.param}") or program_path(request.param, request.param)
            words = {"nginx": ["-e", f"{folder}/nginx.log", "-p", f"{folder}", "-c", f"{folder}/conf"],
                     "haproxy": ["-db", "-f", f"{folder}/conf"]}[request.param]
            stack.enter_context(running([program, *words], path))
        yield path, recorder


LAST = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def found_by(reader: tuple[str, Recorder], said: bytes) -> tuple[list[tuple[str, str, str, bytes]], list[int]]:
    """What the program finds in these bytes, and the statuses that it answers with."""
    path, recorder = reader
    recorder.found.clear()
    with connect(path, said + LAST) as client:
        answered = b"".join(iter(lambda: client.recv(65536), b""))
    return list(recorder.found), [int(status) for status in re.findall(rb"HTTP/1\.1 ([2-5][0-9]{2})", answered)]


def passed_on(data: bytes) -> tuple[bytes, list[tuple[str, str, str, bytes]]]:
    """What the grammar passes on of these bytes, and what it takes that for."""
    wire = Wire()
    assert forwarded(wire, [data]) is None
    wire.end()
    hosts = [(request.head.values(b"host") or [request.name.encode()])[0].decode() for request in wire.heard]
    return bytes(wire.out), [(method, path, host, body)
                             for (method, path, _, body), host in zip(heard(wire), hosts)]


def ordinary(chance: random.Random) -> bytes:
    """Some requests that are right, and as odd as that allows."""
    said = []
    for number in range(chance.randrange(1, 6)):
        method = chance.choice((b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"))
        body = chance.choice((b"", b"x", EVIL, EVIL * 3, b"0\r\n\r\n" + EVIL, chance.randbytes(50)))
        lines = [b"Host: " + chance.choice((b"a", b"b.example.com:8080"))]
        lines += chance.sample((b"X-A:y", b"x_b: \t z ", b"Accept: */*, a/b;q=0.1", b"Cookie: a=b", b"X-Empty:",
                                b"X: \xe9", b"TE: trailers",
                                b"Connection: keep-alive, x-a", b"Content_Length: 3", b"Transfer.Encoding: chunked",
                                b"X-Long: " + b"y" * 3000), chance.randrange(5))
        if chance.random() < 0.5:
            lines.append(b"Transfer-Encoding: chunked")
            body = chunks_of(body, chance)
        elif body or method in (b"POST", b"PUT", b"PATCH"):
            lines.append(b"Content-Length: %d" % len(body))
        chance.shuffle(lines)
        target = b"/%d" % number + chance.choice((b"", b"?q=/../x", b"/%2e%2e/%01", b"/a;b=c", b"?a=HTTP/1.1"))
        said.append(chance.choice((b"", b"\r\n")) + b"\r\n".join((method + b" " + target + b" HTTP/1.1", *lines, b"",
                                                                  body)))
    return b"".join(said)


def with_faults(chance: random.Random, count: int) -> Iterator[bytes]:
    """So many rows with faults that get through all the same, to their end."""
    while count:
        data, wire = mutated(chance), Wire()
        if (forwarded(wire, [data]) is None and wire.heard and wire.body is None and not wire.data
                and all(request.name for request in wire.heard)):
            count -= 1
            yield data


def test_other_programs_find_the_same_requests(reader):
    """Whatever passes on: the odd ones of the table, and many at random, each with one more behind it."""
    chance = random.Random(22)
    table = [row.data for row in TAKEN]
    last = ("GET", "/last", "a", b"")
    same = 0
    for data in [*table, *(ordinary(chance) for _ in range(120)), *with_faults(chance, 150)]:
        said, expected = passed_on(data)
        found, statuses = found_by(reader, said)
        # A program may refuse a request that we take; then it ends, or goes on where the next one begins.
        taken = [each for each, status in zip([*expected, last], statuses) if status < 400]
        assert found == taken and (statuses[-1] >= 400 or len(statuses) == len(expected) + 1), (data, found, statuses)
        same += len(statuses) == len(taken)
    assert same > 250


@rows([said for said in RESPONSES if said.heard and len(said.heard) == 1 and said.heard[0][0] != 101])
@pytest.mark.parametrize("unframed", [False, True], ids=["as it is", "for HTTP/1.0"])
def test_a_client_finds_the_same_answer(row: Said, unframed: bool):
    """Python's http.client, in what passes on."""
    wire = Wire(row.method, row.upgrades)
    assert forwarded(wire, [row.data]) is None
    passed = wire.out if not unframed else pass_response(wire.heard[0], unframed=True) + wire.bodies[0]
    ours, client = socket.socketpair()
    with ours, client, contextlib.closing(http.client.HTTPResponse(client, method=row.method)) as answer:
        ours.sendall(passed)
        ours.shutdown(socket.SHUT_WR)
        answer.begin()
        assert ((answer.status, answer.read()),) == row.heard


def test_other_programs_would_have_taken_more(reader):
    """These programs take some of what is refused here: so it is the grammar that makes them agree."""
    path, _ = reader
    data = GET + b"X: y\n\r\n"
    if path.endswith("haproxy"):
        data = POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"
    assert forwarded(Wire(), [data]) is not None
    assert ("GET", "/last", "a", b"") in found_by(reader, data)[0]

