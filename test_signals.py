"""Tests of sniroute_signals.py, in its order.  What runs with the original said is here byte for byte."""

from __future__ import annotations

import base64
import json
import random
from typing import Any, Callable

import pytest

from sniroute_refusals import Malformed
from sniroute_signals import (
    ASK_MAX, DATAGRAM_MAX, LINE_MAX, PROOF_SIZE, REFUSED, TERMS_MAX, Ask, DatagramReader, Signal, SignalReader, Terms,
    answer, ask, checkpoint, decode, disguise, encode, frame_datagram, key_of_port, parse_ask, parse_checkpoint,
    parse_terms, proof, proxy_header, same_token, token_of,
)

KEY = b"capkey"
NONCE = "0123456789abcdef" * 2
DATE = "Sun, 29 Nov 2026 12:00:00 GMT"


def fault(call: Callable[..., Any], *args: Any) -> Malformed:
    """What a call raises."""
    with pytest.raises(Malformed) as raised:
        call(*args)
    return raised.value


def line_of(text: str | bytes, key: bytes = KEY) -> bytes:
    """A line of the control channel with any text."""
    return base64.b64encode(disguise(text.encode() if isinstance(text, str) else text, key)) + b"\n"


def in_pieces(data: bytes, dice: random.Random) -> list[bytes]:
    """Some bytes, cut anywhere."""
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(dice.randrange(8)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)])]


# -- the key -----------------------------------------------------------------------------------


def test_a_port_makes_the_originals_key():
    assert key_of_port(10101) == key_of_port("10101") == "e68be2b4"


@pytest.mark.parametrize("port", [1, 80, 8080, 65535])
def test_a_key_of_a_port_has_eight_digits(port):
    assert len(key_of_port(port)) == 8 and int(key_of_port(port), 16) >= 0


@pytest.mark.parametrize("key, token", [
    ("e68be2b4", "8940572756af096447802f92b4c843ac61de93b80af9d37a85ed994508656d7e"),
    ("mypassword", "470e375a2c2f21ec2a5ad8c54b19bb78c09adf5aeda0878ef97ec5dc04c5e904"),
    ("capkey", "48b506313194617a738ef6794d02a06ddbc10bbdbe55a9438278db872a45f853"),
])
def test_a_token_is_the_originals(key, token):
    assert token_of(key) == token


def test_tokens_are_compared_whatever_is_in_them():
    token = token_of("capkey")
    assert same_token(token, token) and same_token("", "")
    for other in ("", token[:-1], token + "0", token.upper(), "\xe9", "\udcff"):
        assert not same_token(other, token)


def test_a_proof_is_for_one_key_one_nonce_and_one_connection():
    proofs = {proof(key, nonce, id) for key in ("a", "b") for nonce in (NONCE, NONCE[::-1])
              for id in (b"\0\0\0\0", b"\0\0\0\1")}
    assert len(proofs) == 8 and {len(each) for each in proofs} == {PROOF_SIZE}
    assert proof("a", NONCE, b"\0\0\0\0") == proof("a", NONCE, b"\0\0\0\0")
    assert token_of("a")[:32] not in {each.hex() for each in proofs}


# -- the control channel -----------------------------------------------------------------------


@pytest.mark.parametrize("key, signal, line", [
    ("e68be2b4", Signal("ping"), b"HhRZARFbDVpHDBoSDFwFFhg="),
    ("capkey", Signal("ping"), b"GEMRCBEQDA9SUUcJCg8XSRg="),
    ("capkey", Signal("pong"), b"GEMRCBEQDA9SUUcJDA8XSRg="),
    ("capkey", Signal("flush"), b"GEMRCBEQDA9SUUcfDxQDA0cE"),
    ("capkey", Signal("tcp", "127.0.0.1:49770", "1c0a8b10"),
     b"GEMRCBEQDA9SUUcNABFSR0cLBgwfHwBbWUNBWVJXU09ARVRDV1hHXFVbT0MZD0dDQVATWwRBAVBASRg="),
    ("capkey", Signal("udp", "127.0.0.1:32783", "f179ec8d"),
     b"GEMRCBEQDA9SUUcMBxFSR0cLBgwfHwBbWUNBWVJXU09ARVRDUFNHU1ZbT0MZD0dDQQdBXFwcAFkUSRg="),
])
def test_a_signal_is_the_originals_line(key, signal, line):
    assert encode(signal, key.encode()) == line + b"\n"
    assert SignalReader(key.encode()).feed(line + b"\n") == [signal]


def test_a_verify_is_as_long_as_the_originals():
    signal = Signal("verify", id="62737add", fp="sha256:" + "fb34" * 16)
    line = encode(signal, KEY)
    assert len(line) == 152 + len("\n") and SignalReader(KEY).feed(line) == [signal]


@pytest.mark.parametrize("text, signal", [
    ('{"id":"1c0a8b10","remote":"192.0.2.1:5","action":"tcp"}', Signal("tcp", "192.0.2.1:5", "1c0a8b10")),
    (' { "action" : "ping" , "id" : "" }\n', Signal("ping")),
    ('{"action":"ping","more":[{"a":1.5}],"remote":null}', Signal("ping")),
    ('{"Action":"ping","ID":"00000000"}', Signal("ping", id="00000000")),
    ('{"action":"pong","action":"ping"}', Signal("ping")),
    ('{"action":"p\\u0069ng"}', Signal("ping")),
    ('{"action":"restart","remote":"somewhere"}', Signal("restart", "somewhere")),
])
def test_a_signal_is_read_as_go_reads_it(text, signal):
    assert SignalReader(KEY).feed(line_of(text)) == [signal]


def test_a_line_may_end_in_crlf():
    assert SignalReader(KEY).feed(encode(Signal("ping"), KEY)[:-1] + b"\r\n") == [Signal("ping")]


@pytest.mark.parametrize("line, words", [
    (b"\n", "no JSON"), (b"?\n", "no base64"), (b"GEMRCBEQDA9SUUcJCg8XSRg\n", "no base64"), (line_of("{"), "no JSON"),
    (line_of('{"action":"ping"} x'), "no JSON"), (line_of("[" * 3000), "no JSON"),
    (line_of('{"action":"ping"}', b"other"), "another key"), (line_of(b"\xff\xfe"), "no JSON"),
    (line_of("[]"), "no object"), (line_of('"ping"'), "no object"), (line_of("null"), "no object"),
    (line_of("{}"), "action"), (line_of('{"action":7}'), "action"), (line_of('{"action":"pi\\nng"}'), "action"),
    (line_of('{"action":"' + "a" * 33 + '"}'), "action"), (line_of('{"action":["ping"]}'), "action"),
    (line_of('{"action":"tcp","id":"1C0A8B10"}'), "id"), (line_of('{"action":"tcp","id":"1c0a8b1"}'), "id"),
    (line_of('{"action":"tcp","id":"1c0a8b100"}'), "id"), (line_of('{"action":"tcp","id":"1c0a8b1g"}'), "id"),
    (line_of('{"action":"tcp","id":"1c0a8b1\\n"}'), "id"), (line_of('{"action":"tcp","id":1}'), "id"),
    (line_of('{"action":"tcp","remote":"a\\u0000b"}'), "remote"),
    (line_of('{"action":"tcp","remote":"\\u001b[2J"}'), "remote"),
    (line_of('{"action":"tcp","remote":"\\ud800"}'), "remote"), (line_of('{"action":"tcp","remote":"a\\n"}'), "remote"),
    (line_of('{"action":"tcp","remote":"' + "1" * 257 + '"}'), "remote"),
    (line_of('{"action":"tcp","remote":{}}'), "remote"), (line_of('{"action":"verify","fp":"a b"}'), "fp"),
    (line_of('{"action":"verify","fp":"' + "f" * 129 + '"}'), "fp"),
])
def test_a_line_that_is_no_signal_is_one_fault_and_the_link_goes_on(line, words):
    found = SignalReader(KEY).feed(line + encode(Signal("ping"), KEY))
    assert len(found) == 2 and isinstance(found[0], Malformed) and words in str(found[0]) and found[1] == Signal("ping")
    assert "capkey" not in str(found[0])


def test_the_longest_remote_is_read():
    remote = "1" * 256
    assert SignalReader(KEY).feed(line_of(f'{{"action":"tcp","remote":"{remote}"}}')) == [Signal("tcp", remote)]


@pytest.mark.parametrize("pieces", [
    [b"A" * (LINE_MAX + 1)], [b"A" * LINE_MAX, b"A"], [b"A" * (LINE_MAX + 1) + b"\n"], [b"A" * LINE_MAX, b"A\n"],
    [b"x\n" + b"A" * (LINE_MAX + 1)],
])
def test_a_line_without_end_ends_the_link(pieces):
    reader = SignalReader(KEY)
    for piece in pieces[:-1]:
        reader.feed(piece)
    assert str(LINE_MAX) in str(fault(reader.feed, pieces[-1]))


def test_a_line_of_the_most_bytes_is_one_fault():
    assert [type(each) for each in SignalReader(KEY).feed(b"A" * LINE_MAX + b"\n")] == [Malformed]


def test_signals_come_in_any_cut():
    signals = [Signal("ping"), Signal("tcp", "[2001:db8::1]:5", "deadbeef"), Signal("flush"), Signal("pong")]
    data, dice = b"".join(encode(signal, KEY) for signal in signals), random.Random(1)
    for _ in range(200):
        reader = SignalReader(KEY)
        assert [each for piece in in_pieces(data, dice) for each in reader.feed(piece)] == signals


def test_the_disguise_starts_anew_with_each_line_and_is_undone_by_itself():
    dice = random.Random(2)
    for _ in range(200):
        key, data = dice.randbytes(dice.randrange(1, 40)), dice.randbytes(dice.randrange(100))
        assert disguise(disguise(data, key), key) == data
        assert disguise(data, key) == bytes(byte ^ key[at % len(key)] for at, byte in enumerate(data))


# -- the handshake -----------------------------------------------------------------------------

ORIGINALS_ASK = (b"GET / HTTP/1.1\r\nHost: none\r\nUser-Agent: Go-http-client/1.1\r\n"
                 b"Authorization: Bearer 48b506313194617a738ef6794d02a06ddbc10bbdbe55a9438278db872a45f853\r\n"
                 b"Accept-Encoding: gzip\r\n\r\n")
ORIGINALS_ANSWER = (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\n"
                    b"Date: Sun, 29 Nov 2026 12:00:00 GMT\r\nContent-Length: 45\r\n\r\n"
                    b'{"flow":"-","max":1024,"tls":"0","type":"0"}\n')


def test_a_request_is_the_originals():
    assert ask("none", token_of("capkey"), ours=False) == ORIGINALS_ASK


@pytest.mark.parametrize("ours", [False, True])
def test_a_request_is_read_by_the_other_end(ours):
    data = ask("tunnel.example.com", "0a" * 32, ours)
    assert parse_ask(data + b"behind") == Ask("GET", "/", "0a" * 32, None, "", ours, len(data))
    for end in range(len(data)):
        assert parse_ask(data[:end]) is None


@pytest.mark.parametrize("data, found", [
    (b"GET /other?x=1 HTTP/1.1\r\nHost: none\r\n\r\n", Ask("GET", "/other", "", None, "", False, 0)),
    (b"HEAD / HTTP/1.0\r\n\r\n", Ask("HEAD", "/", "", None, "", False, 0)),
    (b"GET /?a HTTP/1.1\r\nauthorization: Bearer x\r\n\r\n", Ask("GET", "/", "x", None, "", False, 0)),
    (b"GET / HTTP/1.1\r\nAuthorization: bearer x\r\n\r\n", Ask("GET", "/", "", None, "", False, 0)),
    (b"GET / HTTP/1.1\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n",
     Ask("GET", "/", "a", None, "", False, 0)),
    (b"GET / HTTP/1.1\r\nSniroute: 2\r\n\r\n", Ask("GET", "/", "", None, "", False, 0)),
    (b"CONNECT example.com:443 HTTP/1.1\r\nProxy-Authorization: Basic Y2Fwa2V5Ong=\r\n\r\n",
     Ask("CONNECT", "example.com:443", "", ("example.com", 443), "capkey", False, 0)),
    (b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\n\r\n",
     Ask("CONNECT", "[2001:db8::1]:443", "", ("2001:db8::1", 443), "", False, 0)),
    (b"CONNECT a:1 HTTP/1.1\r\nProxy-Authorization: Basic !\r\n\r\n",
     Ask("CONNECT", "a:1", "", ("a", 1), "", False, 0)),
    (b"CONNECT a:1 HTTP/1.1\r\nProxy-Authorization: Basic Y2Fw\r\n\r\n",
     Ask("CONNECT", "a:1", "", ("a", 1), "", False, 0)),
    (b"CONNECT a:1 HTTP/1.1\r\nProxy-Authorization: Basic /w==\r\n\r\n",
     Ask("CONNECT", "a:1", "", ("a", 1), "", False, 0)),
])
def test_what_is_asked_is_read(data, found):
    assert parse_ask(data + b"behind") == found._replace(end=len(data))


@pytest.mark.parametrize("data", [
    b"\0", b"get / HTTP/1.1\r\n", b"GET / HTTP/2.0\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\n",
    b"GET / HTTP/1.1\n", b"CONNECT example.com HTTP/1.1\r\n\r\n", b"CONNECT : HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"GET / HTTP/1.1\r\na: b\n\r\n\r\n", b"GET /" + b"a" * ASK_MAX,
    b"GET / HTTP/1.1\r\na: " + b"a" * ASK_MAX, b"\x16\x03\x01\x02\0", b"SSH-2.0-x\r\n",
])
def test_what_is_no_request_is_refused(data):
    assert isinstance(fault(parse_ask, data), Malformed)


def test_an_answer_is_the_originals():
    assert answer(Terms("-", 1024, 0, 0), DATE) == ORIGINALS_ANSWER


@pytest.mark.parametrize("terms", [Terms("-", 1024, 0, 0), Terms("+", 1, 1, 2), Terms("+", 65536, 2, 3, NONCE)])
def test_terms_are_read_by_the_other_end(terms):
    data = answer(terms, DATE)
    assert parse_terms(data, ended=True) == parse_terms(data, ended=False) == terms
    for end in range(len(data)):
        assert parse_terms(data[:end], ended=False) is None
        assert "closed" in str(fault(parse_terms, data[:end], True))


@pytest.mark.parametrize("head, body, ended", [
    ("Transfer-Encoding: chunked", "{0:x}\r\n{1}\r\n0\r\n\r\n", False), ("Connection: close", "{1}", True),
    ("Content-Length: 45", "{1}", False),
])
def test_terms_are_read_in_any_framing_of_http(head, body, ended):
    text = '{"type":"2", "tls":"1", "flow":"+", "max":64}'
    data = f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n{body.format(len(text), text)}".encode()
    assert parse_terms(data, ended) == Terms("+", 64, 1, 2)
    if ended:
        assert parse_terms(data, False) is None


def test_no_connections_in_the_pool_are_one():
    assert parse_terms(answer(Terms("-", 0, 0, 0), DATE), True).max == 1


def answered(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    """An answer with any body."""
    return f"HTTP/1.1 {status}\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


GOOD = {"flow": "-", "max": 5, "tls": "0", "type": "0"}


@pytest.mark.parametrize("data, words", [
    (b"", "without an answer"), (b"SSH-2.0-x\r\n", "broken: it is no HTTP"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "broken"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "broken"),
    (answered(b"", "302 Found", "Location: https://example.com/\r\n"), "302, which leads elsewhere"),
    (answered(b"", "503 Service Unavailable"), "HTTP 503"), (answered(b"", "204 No Content"), "HTTP 204"),
    (answered(b"{"), "no JSON"), (answered(b"[" * 9000), "no JSON"), (answered(b"[]"), "no object"),
    (answered(b"\xff"), "no JSON"), (answered(b"{}"), "(flow)"),
    *[(answered(json.dumps(GOOD | {name: value}).encode()), f"({name})") for name, values in {
        "flow": ("", "x", None, 1, ["-"]), "max": (-1, "5", 5.0, True, None, 10**9), "tls": (0, "3", None, ["0"]),
        "type": (0, "4", "", {}),
    }.items() for value in values],
    *[(answered(json.dumps(GOOD | {"nonce": value}).encode()), "nonce") for value in (7, "xyz", "AB" * 16, "ab", None)],
    (answered(json.dumps(GOOD | {"type": "1", "tls": "1"}).encode()), "QUIC"),
])
def test_an_answer_that_is_none_is_refused_in_words(data, words):
    assert words in str(fault(parse_terms, data, True))


def test_an_answer_without_end_is_refused():
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"
    assert str(TERMS_MAX) in str(fault(parse_terms, head + b" " * TERMS_MAX, False))
    fault(parse_terms, b"HTTP/1.1 200 OK\r\na: " + b"a" * 70_000, False)


@pytest.mark.parametrize("status, line, body, words", [
    (401, b"401 Unauthorized", b"Unauthorized\n", "the key is wrong"),
    (404, b"404 Not Found", b"Not Found\n", "no tunnel"),
    (405, b"405 Method Not Allowed", b"Method Not Allowed\n", "no tunnel"),
    (407, b"401 Unauthorized", b"Unauthorized\n", "the key is wrong"),
    (409, b"409 Conflict", b"Conflict\n", "another client"),
])
def test_a_refusal_has_the_originals_words_and_is_understood(status, line, body, words):
    data = REFUSED[status]
    assert data.startswith(b"HTTP/1.1 " + line + b"\r\nConnection: close\r\n") and data.endswith(b"\r\n\r\n" + body)
    assert (status == 407) == (b'WWW-Authenticate: Basic realm="Restricted"\r\n' in data)
    raised = fault(parse_terms, data, False)
    assert words in str(raised) and raised.status == int(line[:3])


# -- datagrams ---------------------------------------------------------------------------------


def test_datagrams_come_in_any_cut_empty_ones_too():
    dice = random.Random(3)
    sent = [b"", b"a", dice.randbytes(16384), b"", dice.randbytes(DATAGRAM_MAX), b"end"]
    data = b"".join(map(frame_datagram, sent))
    assert data.startswith(b"\0\0\0\1a\x40\0")
    for _ in range(30):
        reader = DatagramReader(DATAGRAM_MAX)
        assert [each for piece in in_pieces(data, dice) for each in reader.feed(piece)] == sent
    reader = DatagramReader(DATAGRAM_MAX)
    assert [each for at in range(6) for each in reader.feed(data[at:at + 1])] == [b"", b"a"]


def test_a_datagram_that_is_too_long_is_refused_before_it_has_come():
    assert str(DATAGRAM_MAX) in str(fault(frame_datagram, bytes(DATAGRAM_MAX + 1)))
    reader = DatagramReader(16384)
    assert reader.feed(frame_datagram(bytes(16384))) == [bytes(16384)]
    assert "16385 bytes" in str(fault(reader.feed, (16385).to_bytes(2, "big")))


# -- what is told to others --------------------------------------------------------------------


def test_a_checkpoint_is_the_originals_and_is_read_again():
    line = "CHECK_POINT|MODE=1|PING=2ms|POOL=5|TCPS=2|UDPS=0|TCPRX=28|TCPTX=14|UDPRX=0|UDPTX=0"
    assert checkpoint(1, 2, 5, 2, 0, 28, 14, 0, 0) == line
    assert parse_checkpoint(f"2026-01-02 15:04:05.000  \x1b[36mEVENT\x1b[0m  {line}\n") == {
        "mode": 1, "ping": 2, "pool": 5, "tcps": 2, "udps": 0, "tcprx": 28, "tcptx": 14, "udprx": 0, "udptx": 0}


@pytest.mark.parametrize("text", [
    "", "CHECK_POINT", "CHECK_POINT|MODE=1|PING=2|POOL=5", "CHECK_POINT|MODE=-1|PING=2ms",
])
def test_what_is_no_checkpoint_says_nothing(text):
    assert parse_checkpoint(text) is None


def test_proxy_headers_are_as_the_original_writes_them():
    assert proxy_header(1, ("127.0.0.1", 49770), ("127.0.0.1", 80)) == b"PROXY TCP4 127.0.0.1 127.0.0.1 49770 80\r\n"
    assert proxy_header(1, ("2001:db8::1", 1), ("2001:db8::2", 2)) == b"PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n"
    assert proxy_header(1, None, ("127.0.0.1", 80)) == b"PROXY UNKNOWN\r\n"
    header = proxy_header(2, ("192.0.2.1", 258), ("192.0.2.2", 80))
    assert header == (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes((192, 0, 2, 1, 192, 0, 2, 2, 1, 2, 0, 80)))


# -- anything at all ---------------------------------------------------------------------------

SEEDS = [encode(Signal("tcp", "127.0.0.1:49770", "1c0a8b10"), KEY), ORIGINALS_ASK, ask("none", "0" * 64, True),
         ORIGINALS_ANSWER, answer(Terms("+", 8, 1, 2, NONCE), DATE), *REFUSED.values(), frame_datagram(b"abc"),
         answered(b'{"flow":"-"}', more="Transfer-Encoding: chunked\r\n"), line_of('{"action":"ping","id":"00000000"}')]


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Some bytes with a few of them changed, gone, doubled, or cut off."""
    found = bytearray(data)
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(found) + 1)
        match dice.randrange(4):
            case 0: found[at:at + 1] = bytes([dice.randrange(256)])
            case 1: del found[at:at + dice.randrange(4)]
            case 2: found[at:at] = found[max(0, at - 8):at]
            case _: del found[at:]
    return bytes(found)


def test_no_parser_answers_anything_else_whatever_it_is_given():
    dice, broken = random.Random(21), 0
    for number in range(3000):
        data = dice.randbytes(dice.randrange(60)) if number % 5 == 0 else mutated(dice.choice(SEEDS), dice)
        try:
            signal = decode(data, KEY)
            assert isinstance(signal, Signal) and signal.action and all(c.isprintable() for c in "".join(signal))
        except Malformed:
            broken += 1
        reader = SignalReader(KEY)
        for piece in in_pieces(data, dice):
            assert all(isinstance(each, (Signal, Malformed)) for each in reader.feed(piece))
        try:
            asked = parse_ask(data)
            assert asked is None or isinstance(asked, Ask) and asked.end <= len(data)
        except Malformed:
            broken += 1
        for ended in (False, True):
            try:
                terms = parse_terms(bytearray(data), ended)
                assert isinstance(terms, Terms) or terms is None and not ended
            except Malformed:
                broken += 1
        datagrams = DatagramReader(1000)
        try:
            assert sum(2 + len(each) for piece in in_pieces(data, dice) for each in datagrams.feed(piece)) <= len(data)
        except Malformed:
            broken += 1
    assert broken > 3000
