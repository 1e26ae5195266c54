"""Tests of sniroute_conversations.py and sniroute_reuse.py, in their order.

The machines, by tables; then the flows, in a router in a thread; then the option.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import pathlib
import random
import socket
import subprocess
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_reuse
import sniroute_targets
from sniroute_connection import Connection
from sniroute_loop import READ, Loop, Queue
from sniroute_names import parse_host_port
from sniroute_conversations import (BULK_MAX, HEAD_MAX, LINE_MAX, PIPELINED_MAX, STATELESS, Http, Machine, Quiet,
                                    Redis)
from sniroute_refusals import SettingsError
from sniroute_reuse import QUIET_FOR, REUSES, Aside, ObservedFlow, is_silent, observe
from sniroute_settings import load_settings, warn
from sniroute_targets import SCHEMES, Backend
from conftest import HOST, Address, Server, wait_until
from testbed.clients import program_path
from testbed.hellos import HELLO
from testbed.program import execute
from testbed.running import Running, read_all, read_exactly, reset, route

Said = tuple[str, bytes]  # "client" or "server", and what it says


def client(said: bytes) -> Said:
    return "client", said


def server(said: bytes) -> Said:
    return "server", said


def state(machine: Machine) -> str:
    """clean, spoilt, or open: neither."""
    assert not (machine.clean and machine.is_spoilt)
    return "clean" if machine.clean else "spoilt" if machine.is_spoilt else "open"


def listened(machine: Machine, said: list[Said], pieces: Callable[[bytes], list[bytes]]) -> str:
    """The state of a machine that has heard a conversation in pieces."""
    for who, data in said:
        for piece in pieces(data):
            (machine.client_said if who == "client" else machine.server_said)(piece)
    return state(machine)


def whole(data: bytes) -> list[bytes]:
    return [data]


def bytewise(data: bytes) -> list[bytes]:
    return [data[at:at + 1] for at in range(len(data))]


def split(seed: int) -> Callable[[bytes], list[bytes]]:
    """Into pieces of 1 to 40 bytes, the same for each run; some are empty."""
    seeded = random.Random(seed)

    def pieces(data: bytes) -> list[bytes]:
        found, at = [], 0
        while at < len(data):
            size = seeded.randrange(40)
            found.append(data[at:at + size])
            at += size
        return found

    return pieces


CUTS = {"whole": whole, "bytes": bytewise, **{f"split {seed}": split(seed) for seed in range(5)}}


# -- Redis -------------------------------------------------------------------------------------


def ask(*words: bytes | str | int) -> bytes:
    """A command as clients of Redis send it."""
    texts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n%b" % (len(texts), b"".join(b"$%d\r\n%b\r\n" % (len(text), text) for text in texts))


GET = client(ask("GET", "key"))
OK = server(b"+OK\r\n")

REDIS = {
    "nothing": ([], "clean"),
    "an answer": ([GET, server(b"$5\r\nvalue\r\n")], "clean"),
    "an answer that is missing": ([GET], "open"),
    "lower case": ([client(ask("get", "key")), server(b"$0\r\n\r\n")], "clean"),
    "no such key": ([GET, server(b"$-1\r\n")], "clean"),
    "a status": ([client(ask("SET", "key", "v")), OK], "clean"),
    "an error": ([GET, server(b"-WRONGTYPE Operation against a key\r\n")], "clean"),
    "a number": ([client(ask("INCR", "key")), server(b":-12\r\n")], "clean"),
    "CRLF in values": ([client(ask("SET", "k\r\n+OK\r\n", b"\r\n*1\r\n$4\r\nAUTH\r\n\0\xff")), OK, GET,
                        server(b"$12\r\n+OK\r\n+OK\r\n\r\n\r\n")], "clean"),
    "an array": ([client(ask("MGET", "a", "b")), server(b"*2\r\n$1\r\na\r\n$-1\r\n")], "clean"),
    "an empty array": ([client(ask("KEYS", "*")), server(b"*0\r\n")], "clean"),
    "no array": ([client(ask("BLPOP", "q", 1)), server(b"*-1\r\n")], "clean"),
    "arrays in arrays": ([client(ask("XRANGE", "s", "-", "+")), server(
        b"*2\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n*2\r\n$3\r\n2-0\r\n*0\r\n")], "clean"),
    "an array without its end": ([client(ask("MGET", "a", "b")), server(b"*2\r\n$1\r\na\r\n")], "open"),
    "an array in an array without its end": ([client(ask("XRANGE", "s", "-", "+")), server(
        b"*1\r\n*2\r\n$3\r\n1-0\r\n")], "open"),
    "a command without its end": ([client(ask("SET", "key", "value")[:-1])], "open"),
    "pipelined": ([GET, GET, GET, server(b"$-1\r\n" * 3)], "clean"),
    "pipelined in one piece": ([client(GET[1] * 100), server(b":1\r\n" * 100)], "clean"),
    "pipelined, one is missing": ([GET, GET, GET, server(b"$-1\r\n" * 2)], "open"),
    "an answer too many": ([GET, GET, server(b"$-1\r\n" * 3)], "spoilt"),
    "unasked": ([OK], "spoilt"),
    "the beginning of what is unasked": ([server(b"+")], "spoilt"),
    "the beginning of what is unasked, behind an answer": ([GET, server(b"$-1\r\n+")], "spoilt"),
    "an answer before its command is whole": ([client(ask("SET", "k", "v")[:-2]), server(b"-ERR\r\n")], "spoilt"),
    "a large value": ([client(ask("SET", "k", b"x" * 100_000)), OK, GET,
                       server(b"$100000\r\n%b\r\n" % (b"\r\n" * 50_000))], "clean"),
    "a value without its end": ([GET, server(b"$10\r\n12345")], "open"),
    "a value and no CRLF": ([GET, server(b"$2\r\nabc\r\n")], "spoilt"),
    "a word and no CRLF": ([client(b"*2\r\n$3\r\nGET\r\n$1\r\nkey\r\n")], "spoilt"),
    "another size than the name's": ([client(b"*2\r\n$4\r\nGET\r\n$1\r\nk\r\n")], "spoilt"),
    "words in another spelling": ([client(b"*02\r\n$3\r\nGET\r\n$1\r\nk\r\n")], "spoilt"),
    "a size with a sign": ([client(b"*2\r\n$3\r\nGET\r\n$+1\r\nk\r\n")], "spoilt"),
    "a size with a line": ([client(b"*2\r\n$3\r\nGET\r\n$1_0\r\n")], "spoilt"),
    "a word that is too large": ([client(b"*2\r\n$3\r\nGET\r\n$%d\r\n" % (BULK_MAX + 1))], "spoilt"),
    "a word of no word": ([client(b"*2\r\n$3\r\nGET\r\n$-1\r\n")], "spoilt"),
    "no words": ([client(b"*0\r\n")], "spoilt"),
    "too many words": ([client(b"*9999999\r\n")], "spoilt"),
    "LF alone": ([client(b"*2\n$3\nGET\n$1\nk\n")], "spoilt"),
    "CR in a line": ([GET, server(b"+a\rb\r\n")], "spoilt"),
    "inline": ([client(b"GET key\r\n")], "spoilt"),
    "an empty line": ([client(b"\r\n")], "spoilt"),
    "TLS": ([client(b"\x16\x03\x01\x00\x05hello\n")], "spoilt"),
    "a line without an end": ([GET, server(b"+" + b"x" * LINE_MAX)], "spoilt"),
    "an unknown kind of answer": ([GET, server(b"?\r\n")], "spoilt"),
    "an empty answer": ([GET, server(b"\r\n")], "spoilt"),
    "an integer that is none": ([GET, server(b":1x\r\n")], "spoilt"),
    "for ever": ([client(ask("MULTI")), OK, client(ask("EXEC")), server(b"*0\r\n"), GET, server(b"$-1\r\n")], "spoilt"),
    **{f"RESP3: {kind}": ([GET, server(kind + b"\r\n")], "spoilt") for kind in (
        b"_", b"#t", b",1.5", b"(123", b"!5", b"=7", b"%1", b"~1", b">2", b"|1")},
    **{f"{words}": ([client(ask(*words.split())), OK], "spoilt") for words in (
        "AUTH secret", "SELECT 1", "select 0", "HELLO 3", "HELLO", "MULTI", "EXEC", "DISCARD", "WATCH key", "UNWATCH",
        "SUBSCRIBE c", "PSUBSCRIBE c*", "SSUBSCRIBE c", "UNSUBSCRIBE", "MONITOR", "CLIENT SETNAME me",
        "CLIENT REPLY OFF", "CLIENT TRACKING ON", "READONLY", "READWRITE", "ASKING", "RESET", "QUIT",
        "SCRIPT DEBUG YES", "WAIT 1 0", "EVAL return 0", "SYNC", "REPLCONF", "DEBUG SLEEP", "SHUTDOWN", "JSON.GET k",
        "FT.SEARCH i q", "NONE", "GETT k", "x" * 90, "x" * 200)},
}


@pytest.mark.parametrize("said, expected", REDIS.values(), ids=REDIS)
def test_redis_is_clean_between_whole_answers(said, expected):
    assert {name: listened(Redis(), said, pieces) for name, pieces in CUTS.items()} == dict.fromkeys(CUTS, expected)


def test_commands_of_redis_that_keep_state_are_not_on_the_list():
    kept = b"""auth select hello multi exec discard watch unwatch subscribe psubscribe ssubscribe unsubscribe monitor
        client readonly readwrite asking reset quit script eval evalsha fcall wait waitaof sync psync replconf debug
        shutdown migrate function acl config cluster module"""
    assert not STATELESS & {*kept.split()} and all(name == name.lower() for name in STATELESS)


# -- HTTP --------------------------------------------------------------------------------------


def request(first: str = "GET / HTTP/1.1", *fields: str, body: bytes = b"") -> Said:
    lines = [first, "Host: app.example.com", *fields, "", ""]
    return client("\r\n".join(lines).encode("latin-1") + body)


def answer(first: str, *fields: str, body: bytes = b"") -> Said:
    return server("\r\n".join([first, *fields, "", ""]).encode("latin-1") + body)


def ok(*fields: str, body: bytes = b"") -> Said:
    return answer("HTTP/1.1 200 OK", *fields, body=body)


ASK, SAY = request(), ok("Content-Length: 2", body=b"hi")
CHUNKED, CHUNKS = "Transfer-Encoding: chunked", b"5\r\nhello\r\n00a\r\n\r\n\r\n\r\n\r\n\r\n\r\n0\r\n\r\n"
POST = "POST /form HTTP/1.1"

HTTP = {
    "nothing": ([], "clean"),
    "an answer": ([ASK, SAY], "clean"),
    "an answer that is missing": ([ASK], "open"),
    "a head without its end": ([client(ASK[1][:-1])], "open"),
    "an answer without its end": ([ASK, server(SAY[1][:-1])], "open"),
    "an answer's head without its end": ([ASK, server(SAY[1][:-3])], "open"),
    "one after another": ([ASK, SAY] * 5, "clean"),
    "pipelined": ([ASK, ASK, ASK, SAY, SAY, SAY], "clean"),
    "pipelined, one is missing": ([ASK, ASK, ASK, SAY, SAY], "open"),
    "an answer too many": ([ASK, SAY, SAY], "spoilt"),
    "unasked": ([answer("HTTP/1.1 408 Request Timeout", "Content-Length: 0")], "spoilt"),
    "the beginning of what is unasked": ([ASK, SAY, server(b"H")], "spoilt"),
    "too many pipelined": ([ASK] * (PIPELINED_MAX + 1), "spoilt"),
    "a body": ([request(POST, "Content-Length: 5", body=b"hello"), SAY], "clean"),
    "a body without its end": ([request(POST, "Content-Length: 6", body=b"hello")], "open"),
    "a body of requests": ([request(POST, f"Content-Length: {len(ASK[1])}", body=ASK[1]), SAY], "clean"),
    "chunks": ([request(POST, CHUNKED, body=CHUNKS), ok(CHUNKED, body=CHUNKS)], "clean"),
    "chunks without an end": ([ASK, ok(CHUNKED, body=CHUNKS[:-2])], "open"),
    "trailers": ([ASK, ok(CHUNKED, body=b"0\r\nDigest: x\r\n\r\n")], "clean"),
    "a trailer that frames": ([ASK, ok(CHUNKED, body=b"0\r\nContent-Length: 3\r\n\r\n")], "spoilt"),
    "a trailer that is none": ([ASK, ok(CHUNKED, body=b"0\r\nDigest\r\n\r\n")], "spoilt"),
    "trailers without an end": ([ASK, ok(CHUNKED, body=b"0\r\n" + b"a: b\r\n" * HEAD_MAX)], "spoilt"),
    "a chunk's extension": ([ASK, ok(CHUNKED, body=b"5;a=b\r\nhello\r\n0\r\n\r\n")], "spoilt"),
    "a chunk's size with a sign": ([ASK, ok(CHUNKED, body=b"+5\r\nhello\r\n0\r\n\r\n")], "spoilt"),
    "a chunk's size with 0x": ([ASK, ok(CHUNKED, body=b"0x5\r\nhello\r\n0\r\n\r\n")], "spoilt"),
    "a chunk's size with a line": ([ASK, ok(CHUNKED, body=b"1_0\r\n")], "spoilt"),
    "a chunk's size with a space": ([ASK, ok(CHUNKED, body=b"5 \r\nhello\r\n")], "spoilt"),
    "a chunk and no CRLF": ([ASK, ok(CHUNKED, body=b"4\r\nhello\r\n0\r\n\r\n")], "spoilt"),
    "HEAD": ([request("HEAD / HTTP/1.1"), ok("Content-Length: 500")], "clean"),
    "HEAD, chunked": ([request("HEAD / HTTP/1.1"), ok(CHUNKED)], "clean"),
    "HEAD without a length": ([request("HEAD / HTTP/1.1"), ok()], "clean"),
    "HEAD and then GET": ([request("HEAD / HTTP/1.1"), ASK, ok("Content-Length: 2"), SAY], "clean"),
    "GET and then HEAD": ([ASK, request("HEAD / HTTP/1.1"), SAY, ok("Content-Length: 2")], "clean"),
    "HEAD with a body": ([request("HEAD / HTTP/1.1"), SAY], "spoilt"),
    "204": ([ASK, answer("HTTP/1.1 204 No Content")], "clean"),
    "204 with a length": ([ASK, answer("HTTP/1.1 204 No Content", "Content-Length: 2")], "spoilt"),
    "205": ([ASK, answer("HTTP/1.1 205 Reset Content", "Content-Length: 0")], "clean"),
    "205 with chunks": ([ASK, answer("HTTP/1.1 205 Reset Content", CHUNKED)], "spoilt"),
    "304": ([ASK, answer("HTTP/1.1 304 Not Modified", "Content-Length: 500")], "clean"),
    "304, chunked": ([ASK, answer("HTTP/1.1 304 Not Modified", CHUNKED)], "spoilt"),
    "404": ([ASK, answer("HTTP/1.1 404 Not Found", "Content-Length: 0")], "clean"),
    "no reason": ([ASK, answer("HTTP/1.1 200", "Content-Length: 0")], "clean"),
    "until the end": ([ASK, ok(body=b"hello")], "spoilt"),
    "100": ([request(POST, "Content-Length: 5", "Expect: 100-continue"), answer("HTTP/1.1 100 Continue"),
             client(b"hello"), SAY], "clean"),
    "100 and nothing yet": ([request(POST, "Content-Length: 5", "Expect: 100-continue"),
                             answer("HTTP/1.1 100 Continue")], "open"),
    "an end of the wait for 100": ([request(POST, "Content-Length: 5", "Expect: 100-continue", body=b"hello"),
                                    answer("HTTP/1.1 403 Forbidden", "Content-Length: 0")], "spoilt"),
    "an answer before the request is whole": ([request(POST, "Content-Length: 5"), SAY], "spoilt"),
    "an answer before the last chunk": ([request(POST, CHUNKED, body=b"5\r\nhello\r\n"), SAY], "spoilt"),
    "an answer while the next request comes": ([ASK, request(POST, "Content-Length: 5"), SAY, client(b"hello"), SAY],
                                               "clean"),
    "103": ([ASK, answer("HTTP/1.1 103 Early Hints", "Link: </a.css>"), SAY], "clean"),
    "103 and nothing yet": ([ASK, answer("HTTP/1.1 103 Early Hints", "Link: </a.css>")], "open"),
    "103 with a length": ([ASK, answer("HTTP/1.1 103 Early Hints", "Content-Length: 3"), SAY], "spoilt"),
    "another expectation": ([request("GET / HTTP/1.1", "Expect: a-miracle")], "spoilt"),
    "WebSocket": ([request("GET / HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket")], "spoilt"),
    "Upgrade alone": ([request("GET / HTTP/1.1", "Upgrade: h2c")], "spoilt"),
    "101": ([ASK, answer("HTTP/1.1 101 Switching Protocols")], "spoilt"),
    "CONNECT": ([client(b"CONNECT a.example.com:443 HTTP/1.1\r\nHost: a.example.com\r\n\r\n")], "spoilt"),
    "connect": ([client(b"connect a.example.com:443 HTTP/1.1\r\nHost: a.example.com\r\n\r\n")], "spoilt"),
    "HTTP/1.0": ([client(b"GET / HTTP/1.0\r\nHost: a.example.com\r\n\r\n")], "spoilt"),
    "an answer of HTTP/1.0": ([ASK, answer("HTTP/1.0 200 OK", "Content-Length: 0")], "spoilt"),
    "HTTP/2": ([client(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")], "spoilt"),
    "HTTP/0.9": ([client(b"GET /\r\n")], "spoilt"),
    "TLS": ([client(b"\x16\x03\x01\x00\x05hello\n")], "spoilt"),
    "a PROXY header": ([client(b"PROXY TCP4 192.0.2.7 192.0.2.1 51234 80\r\n"), ASK], "spoilt"),
    "an unknown method": ([request("FROB / HTTP/1.1")], "spoilt"),
    "a method in lower case": ([request("head / HTTP/1.1")], "spoilt"),
    "an empty line before a request": ([client(b"\r\n"), ASK], "spoilt"),
    "a space too many": ([request("GET  / HTTP/1.1")], "spoilt"),
    "a body of GET": ([request("GET / HTTP/1.1", "Content-Length: 1", body=b"x"), SAY], "spoilt"),
    "no body of GET": ([request("GET / HTTP/1.1", "Content-Length: 0"), SAY], "clean"),
    "chunks of DELETE": ([request("DELETE / HTTP/1.1", CHUNKED), SAY], "spoilt"),
    "the client says close": ([request("GET / HTTP/1.1", "Connection: close"), SAY], "spoilt"),
    "the client says close among others": ([request("GET / HTTP/1.1", "Connection: keep-alive, Close"), SAY], "spoilt"),
    "the client says keep-alive": ([request("GET / HTTP/1.1", "Connection: Keep-Alive"), SAY], "clean"),
    "the client takes trailers": ([request("GET / HTTP/1.1", "Connection: TE", "TE: trailers"), SAY], "clean"),
    "the client says close to a proxy": ([request("GET / HTTP/1.1", "Proxy-Connection: close")], "spoilt"),
    "the server says close": ([ASK, ok("Content-Length: 0", "connection:close")], "spoilt"),
    "the server says keep-alive": ([ASK, ok("Content-Length: 0", "Connection: keep-alive",
                                                "Keep-Alive: timeout=5")], "clean"),
    "length and chunks": ([request(POST, "Content-Length: 5", CHUNKED)], "spoilt"),
    "chunks and a length": ([ASK, ok(CHUNKED, "Content-Length: 5")], "spoilt"),
    "length and chunks with _": ([request(POST, "Content-Length: 5", "Transfer_Encoding: chunked")], "spoilt"),
    "two lengths": ([request(POST, "Content-Length: 5", "Content-Length: 6")], "spoilt"),
    "a length twice": ([ASK, ok("Content-Length: 2", "Content-Length: 2")], "spoilt"),
    "a list of lengths": ([request(POST, "Content-Length: 5, 5")], "spoilt"),
    "a length with a sign": ([request(POST, "Content-Length: +5")], "spoilt"),
    "a length with a line": ([request(POST, "Content-Length: 1_0")], "spoilt"),
    "a length with a nought": ([request(POST, "Content-Length: 010")], "spoilt"),
    "no length": ([request(POST, "Content-Length:")], "spoilt"),
    "chunked twice": ([request(POST, CHUNKED, CHUNKED)], "spoilt"),
    "another coding": ([request(POST, "Transfer-Encoding: gzip, chunked")], "spoilt"),
    "identity": ([request(POST, "Transfer-Encoding: identity")], "spoilt"),
    "chunked, nearly": ([request(POST, "Transfer-Encoding: xchunked")], "spoilt"),
    "chunked behind a vertical tab": ([request(POST, "Transfer-Encoding: \x0bchunked")], "spoilt"),
    "a folded field": ([request("GET / HTTP/1.1", "A: b", " c")], "spoilt"),
    "a space before the colon": ([request(POST, "Content-Length : 5")], "spoilt"),
    "a field without a name": ([request("GET / HTTP/1.1", ": b")], "spoilt"),
    "a field without a colon": ([request("GET / HTTP/1.1", "A")], "spoilt"),
    "a field with NUL": ([request("GET / HTTP/1.1", "A: \0")], "spoilt"),
    "a field with CR": ([request("GET / HTTP/1.1", "A: b\rContent-Length: 3")], "spoilt"),
    "a field that ends in LF": ([request("GET / HTTP/1.1", "A: b\nContent-Length: 3")], "spoilt"),
    "a field in Latin": ([request("GET / HTTP/1.1", "A: \xe4", "B:", "C: \t d \t"), SAY], "clean"),
    "no Host": ([client(b"GET / HTTP/1.1\r\n\r\n")], "spoilt"),
    "two Hosts": ([request("GET / HTTP/1.1", "Host: b.example.com")], "spoilt"),
    "a line that is too long": ([request("GET / HTTP/1.1", "A: " + "b" * LINE_MAX)], "spoilt"),
    "a head that is too long": ([request("GET / HTTP/1.1", *["A: " + "b" * 1000] * 33)], "spoilt"),
    "a long head": ([request("GET / HTTP/1.1", *["A: " + "b" * 1000] * 31), SAY], "clean"),
    "no status": ([ASK, answer("HTTP/1.1 OK")], "spoilt"),
    "a status of four digits": ([ASK, answer("HTTP/1.1 2000 OK")], "spoilt"),
    "bytes that are no HTTP": ([ASK, server(b"220 hello\r\n")], "spoilt"),
    "for ever": ([request("GET / HTTP/1.1", "Connection: close"), SAY, ASK, SAY], "spoilt"),
    **{f"trouble: {status}": ([ASK, answer(f"HTTP/1.1 {status} No", "Content-Length: 0")], "spoilt")
       for status in (400, 408, 411, 413, 417, 421, 426, 431, 501, 505)},
    **{f"authenticated by {scheme}": ([request("GET / HTTP/1.1", f"{field}: {scheme}"), SAY], expected)
       for field in ("Authorization", "proxy-authorization")
       for scheme, expected in (("Basic dTpw", "clean"), ("bearer x.y.z", "clean"), ("Digest username=a", "clean"),
                                ("NTLM TlRMTVNTUAAB", "spoilt"), ("Negotiate YII", "spoilt"),
                                ("Kerberos YII", "spoilt"), ("Basic", "clean"), ("", "spoilt"), ("secret", "spoilt"))},
    **{f"asked for {scheme}": ([ASK, answer("HTTP/1.1 401 Who?", "Content-Length: 0", f"{field}: {scheme}")], expected)
       for field in ("WWW-Authenticate", "Proxy-Authenticate")
       for scheme, expected in (('Basic realm="a"', "clean"), ("NTLM", "spoilt"),
                                ('Basic realm="a", Negotiate', "spoilt"))},
    "known for the connection": ([ASK, ok("Content-Length: 0", "Persistent-Auth: true")], "spoilt"),
}


@pytest.mark.parametrize("said, expected", HTTP.values(), ids=HTTP)
def test_http_is_clean_between_whole_answers(said, expected):
    assert {name: listened(Http(), said, pieces) for name, pieces in CUTS.items()} == dict.fromkeys(CUTS, expected)


# -- quiet, and all machines ---------------------------------------------------------------------


@pytest.mark.parametrize("said, expected", [
    ("", "open"), ("c", "open"), ("cs", "clean"), ("ccss", "clean"), ("csc", "open"), ("cscs", "clean"),
    ("s", "spoilt"), ("sc", "spoilt"), ("scs", "spoilt")])
def test_quiet_is_clean_where_the_backend_has_spoken_last_and_not_first(said, expected):
    turns = [client(b"x") if who == "c" else server(b"y") for who in said]
    assert listened(Quiet(), turns, whole) == expected


MACHINES = {"redis": Redis, "http": Http, "quiet": Quiet}


@pytest.mark.parametrize("kind", MACHINES)
def test_an_empty_piece_says_nothing(kind):
    machine = MACHINES[kind]()
    before = state(machine)
    machine.client_said(b"")
    machine.server_said(b"")
    assert state(machine) == before


def test_the_rows_of_reuse():
    assert {name: row.machine for name, row in REUSES.items()} == MACHINES
    assert {name: row.rest for name, row in REUSES.items()} == {"redis": 0.0, "http": 0.0, "quiet": QUIET_FOR}
    assert QUIET_FOR >= 1.0


PARTS = [part for table in (REDIS, HTTP) for said, _ in table.values() for _, part in said if len(part) < 2000]


@pytest.mark.parametrize("kind", MACHINES)
def test_no_bytes_raise_anything_and_none_but_a_line_is_kept(kind):
    seeded = random.Random(7)
    for _ in range(2400):
        machine = MACHINES[kind]()
        was_spoilt = False
        for _ in range(seeded.randrange(1, 12)):
            data = bytearray(seeded.choice(PARTS) if seeded.random() < 0.9 else seeded.randbytes(seeded.randrange(60)))
            for _ in range(seeded.randrange(3) if data else 0):
                data[seeded.randrange(len(data))] = seeded.choice(b"\r\n:*$0 9\x00a")
            data = bytes(data[:seeded.randrange(len(data) + 1)] if seeded.random() < 0.2 else data)
            (machine.client_said if seeded.random() < 0.5 else machine.server_said)(data)
            assert not (was_spoilt and state(machine) != "spoilt"), "it is for ever"
            was_spoilt = machine.is_spoilt
        if kind != "quiet":
            assert len(machine.up.part) <= LINE_MAX and len(machine.down.part) <= LINE_MAX


@pytest.mark.parametrize("kind, table", [("redis", REDIS), ("http", HTTP)])
def test_however_a_conversation_is_cut_the_same_comes_of_it(kind, table):
    """Also in the middle: whatever follows a prefix, the two pieces are as good as one."""
    for said, expected in table.values():
        for at, (who, data) in enumerate(said):
            if 5 <= at < len(said) - 5:
                continue  # those in the middle of a long one are alike
            for cut in (*range(1, min(len(data), 30)), *range(30, min(len(data), 150), 7)):
                cuts = [*said[:at], (who, data[:cut]), (who, data[cut:]), *said[at + 1:]]
                assert listened(MACHINES[kind](), cuts, whole) == expected


# -- a router that keeps connections ---------------------------------------------------------------


class Pool:
    """What is kept for the next client.  All of it runs on the loop; tests read the numbers."""

    def __init__(self) -> None:
        self.kind = "redis"
        self.idle: collections.deque[Any] = collections.deque()
        self.aside: set[Aside] = set()
        self.loop: Loop | None = None
        self.queue: Queue | None = None
        self.rest = 0.0
        self.given = self.taken = self.lost = 0
        self.tries = 1  # times that a client observes
        self.proven = True  # a connect proves a backend

    def give(self, sock: Any) -> None:
        self.given += 1
        if not self.rest:
            self.idle.append(sock)
            return
        if self.queue is None:
            self.queue = self.loop.queue(self.rest, Aside.rested)
        aside = Aside(self.loop.poller, self.queue, sock, lambda found: self.rested(aside, found))
        self.aside.add(aside)

    def rested(self, aside: Aside, found: Any) -> None:
        self.aside.discard(aside)
        if found is None:
            self.lost += 1
        else:
            self.idle.append(found)

    def close(self) -> None:
        for sock in self.idle:
            sock.close()
        for aside in self.aside:
            aside.close()


class Pooled(Backend):
    """One client's way to a backend whose connections are kept."""

    def __init__(self, connection: Connection, pool: Pool):
        super().__init__(connection.decision.target,
                         ((socket.AF_INET, parse_host_port(connection.decision.rest)),), True)
        self.connection = connection
        self.pool = pool
        self.proven_by_connect = pool.proven

    def begin(self) -> Any:
        if not self.pool.idle:
            return super().begin()
        self.row = self.addresses[0]
        self.pool.taken += 1
        return self.pool.idle.popleft()

    def connected(self, server: Any) -> None:
        self.pool.loop = self.connection.router.loop
        for _ in range(self.pool.tries):
            observe(self.connection, REUSES[self.pool.kind].machine(), self.pool.give)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """Where connections are kept, of all clients that are led to `tcp:`; closed after the router."""
    made = Pool()
    monkeypatch.setitem(sniroute_targets.SCHEMES, "tcp", SCHEMES["tcp"]._replace(
        choose=lambda connection: Pooled(connection, made)))
    yield made
    made.close()


@pytest.fixture
def start(pool: Pool, run) -> Callable[..., Running]:
    """start(kind, address) -> a router with a port that leads there, and reuses connections as `kind` says."""
    def begin(kind: str, address: Address, *options: str) -> Running:
        pool.kind = kind
        return run(f"--route=x.example.com=tcp:{HOST}:1", f"--port={HOST}:0=tcp:{address[0]}:{address[1]}", *options)
    return begin


def come(running: Running, said: bytes = b"") -> socket.socket:
    """A client of the router's port."""
    sock = socket.create_connection(running.router.listeners[-1].getsockname(), 20)
    if said:
        sock.sendall(said)
    return sock


def exchange(running: Running, said: bytes, expected: bytes) -> None:
    """A client that asks, has its answer, and leaves."""
    number = len(running.endings) + 1
    with come(running, said) as sock:
        assert read_exactly(sock, len(expected)) == expected
    assert running.ending(number).reason == "client_closed"


# -- Redis, the real one and a stand-in ---------------------------------------------------------------


def words_of(stream: Any) -> list[bytes]:
    """The next command; empty at the end, also where that comes in the middle."""
    words = []
    for _ in range(int(stream.readline()[1:] or 0)):
        size = int(stream.readline()[1:] or 0)
        words.append(stream.read(size + 2))
        if len(words[-1]) != size + 2 or not size:
            return []
    return [word[:-2] for word in words]


class StandIn:
    """A far end that speaks enough Redis.  What is asked for as `slow` is answered when `go` is set."""

    def __init__(self, serve) -> None:
        self.values: dict[bytes, bytes] = {}
        self.go = threading.Event()
        self.far: Server = serve(self.handler)
        self.address = self.far.address

    def handler(self, sock: socket.socket) -> None:
        with sock.makefile("rb") as stream:
            while words := words_of(stream):
                name = words[0].upper()
                if words[1:] == [b"slow"]:
                    self.go.wait(10)
                if name == b"SET":
                    self.values[words[1]] = words[2]
                found = self.values.get(words[1], b"?") if name == b"GET" else None
                sock.sendall(b"+OK\r\n" if found is None else b"$%d\r\n%b\r\n" % (len(found), found))

    def count(self) -> int:
        return self.far.accepted


class RealRedis:
    """redis-server, on a port of its own."""

    def __init__(self, address: Address):
        self.address = address
        self.direct = socket.create_connection(address, 10)
        self.stream = self.direct.makefile("rb")
        self.before = 0
        self.before = self.count()

    def count(self) -> int:
        """Connections that it has had."""
        self.direct.sendall(ask("INFO", "stats"))
        text = self.stream.read(int(self.stream.readline()[1:]) + 2)
        return int(text.partition(b"total_connections_received:")[2].split()[0]) - self.before

    def close(self) -> None:
        self.stream.close()
        self.direct.close()


@pytest.fixture
def redis(tmp_path: pathlib.Path, free_ports) -> Iterator[RealRedis]:
    """A real Redis."""
    address = HOST, free_ports(1)[0]
    words = {"port": address[1], "bind": HOST, "save": "", "dir": tmp_path}
    process = subprocess.Popen([program_path("redis-server", "redis-server"),
                                *(word for name, value in words.items() for word in (f"--{name}", str(value)))],
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ready() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError), socket.create_connection(address, 5):
            return True
        return False

    try:
        wait_until(ready, what="Redis")
        with contextlib.closing(RealRedis(address)) as found:
            yield found
    finally:
        process.kill()  # it has nothing to save
        process.wait()


@pytest.fixture(params=["stand-in", "redis-server"])
def far(request: pytest.FixtureRequest) -> StandIn | RealRedis:
    """A Redis: `.address`; `.count()` tells how many connections it has had."""
    if request.param == "redis-server":
        return request.getfixturevalue("redis")
    return StandIn(request.getfixturevalue("serve"))


def test_the_next_client_of_redis_gets_the_connection_of_the_one_before(start, pool, far, flow):
    running = start("redis", far.address)
    exchange(running, ask("SET", "a", "1"), b"+OK\r\n")
    for _ in range(6):
        exchange(running, ask("GET", "a") * 3, b"$1\r\n1\r\n" * 3)
    assert (far.count(), pool.given, pool.taken) == (1, 7, 6)
    assert [(end.up, end.down) for end in running.endings][1:] == [(3 * len(ask("GET", "a")), 21)] * 6
    assert running.router.peers.find(HOST).count == 0 and not running.router.connections


def test_a_connect_that_is_tried_again_begins_the_conversation_anew(start, pool, far, flow):
    """What was said to the address before is said again, and is one command."""
    pool.tries = 3
    running = start("redis", far.address)
    for _ in range(3):
        exchange(running, ask("SET", "a", "1"), b"+OK\r\n")
    assert (far.count(), pool.given) == (1, 3)


def test_what_comes_before_a_backend_has_proven_itself_is_followed_too(start, pool, far, flow):
    """As where a warm connection may be replaced until its first byte."""
    pool.proven = False
    running = start("redis", far.address)
    for _ in range(3):
        exchange(running, ask("SET", "a", "1"), b"+OK\r\n")
    with come(running) as sock:
        wait_until(lambda: pool.taken == 3)
        sock.sendall(ask("GET", "a"))
        assert read_exactly(sock, 7) == b"$1\r\n1\r\n"
    running.ending(4)
    with come(running, ask("AUTH", "secret")) as sock:
        assert sock.recv(1)
        (connection,) = running.router.connections
        in_the_loop(running, lambda: None)
        assert type(connection.up) is type(connection.down) is running.router.pipes.flow
    running.ending(5)
    assert (far.count(), pool.given) == (1, 4)


def test_small_commands_and_then_a_large_one_are_followed(start, pool, redis, flow):
    running = start("redis", redis.address)
    large = random.Random(5).randbytes(200_000)
    with come(running) as sock:
        for number in range(80):
            sock.sendall(ask("SET", "a", number))
            assert read_exactly(sock, 5) == b"+OK\r\n"
        sock.sendall(ask("SET", "a", large) + ask("GET", "a"))
        assert read_exactly(sock, 200_016) == b"+OK\r\n$200000\r\n%b\r\n" % large
    running.ending(1)
    exchange(running, ask("STRLEN", "a"), b":200000\r\n")
    assert (redis.count(), pool.given) == (1, 2)


def test_redis_cli_s_connection_serves_the_next_redis_cli(start, pool, redis):
    running = start("redis", redis.address)
    _, number = running.router.listeners[-1].getsockname()
    for words, said in ((["SET", "a", "1"], b"OK"), (["GET", "a"], b"1"), (["LPUSH", "l", "x", "y"], b"2"),
                        (["LRANGE", "l", "0", "-1"], b"y\nx")):
        ended = execute(program_path("redis-cli", "redis-tools"), "-h", HOST, "-p", str(number), *words, said=b"")
        assert ended.stdout.strip() == said
    running.ending(4)
    assert (redis.count(), pool.given) == (1, 4)


def test_two_clients_at_once_have_two_connections(start, pool, far):
    running = start("redis", far.address)
    with come(running, ask("SET", "a", "1")) as one, come(running, ask("SET", "b", "2")) as two:
        assert read_exactly(one, 5) == read_exactly(two, 5) == b"+OK\r\n"
        assert far.count() == 2
    running.ending(2)
    with come(running, ask("GET", "a")) as one, come(running, ask("GET", "b")) as two:
        assert (read_exactly(one, 7), read_exactly(two, 7)) == (b"$1\r\n1\r\n", b"$1\r\n2\r\n")
    running.ending(4)
    assert (far.count(), pool.given) == (2, 4)


def test_a_client_that_says_nothing_uses_nothing_up(start, pool, far):
    running = start("redis", far.address)
    with come(running):
        wait_until(lambda: [each for each in list(running.router.connections) if each.state == "open"])
    assert running.ending().reason == "client_closed"
    exchange(running, ask("SET", "a", "1"), b"+OK\r\n")
    assert (far.count(), pool.given) == (1, 2)


def test_after_multi_the_connection_serves_nobody_else(start, pool, redis):
    running = start("redis", redis.address)
    with come(running, ask("SET", "a", "1")) as sock:
        assert read_exactly(sock, 5) == b"+OK\r\n"
        (connection,) = running.router.connections
        assert type(connection.up) is type(connection.down) is ObservedFlow
        sock.sendall(ask("MULTI"))
        assert read_exactly(sock, 5) == b"+OK\r\n"
        assert type(connection.up) is type(connection.down) is running.router.pipes.flow, "it costs no more than others"
        sock.sendall(ask("GET", "a"))
        assert read_exactly(sock, 9) == b"+QUEUED\r\n"
        sock.sendall(ask("EXEC"))
        assert read_exactly(sock, 11) == b"*1\r\n$1\r\n1\r\n"
    running.ending(1)
    exchange(running, ask("GET", "a"), b"$1\r\n1\r\n")
    assert (redis.count(), pool.taken, pool.given) == (2, 0, 1)


def test_a_transaction_that_a_client_leaves_open_is_not_the_next_one_s(start, pool, redis):
    running = start("redis", redis.address)
    with come(running, ask("MULTI")) as sock:
        assert read_exactly(sock, 5) == b"+OK\r\n"
    running.ending(1)
    exchange(running, ask("SET", "a", "1"), b"+OK\r\n")
    assert redis.count() == 2


def test_a_push_that_nobody_asked_for_is_the_subscriber_s(start, pool, redis):
    running = start("redis", redis.address)
    with come(running, ask("SUBSCRIBE", "c")) as sock:
        subscribed = b"*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n"
        assert read_exactly(sock, len(subscribed)) == subscribed
        exchange(running, ask("PUBLISH", "c", "secret"), b":1\r\n")
    running.ending(2)
    exchange(running, ask("PUBLISH", "c", "secret"), b":0\r\n")
    assert (redis.count(), pool.given, pool.taken) == (2, 2, 1)


def test_a_blocked_client_that_leaves_takes_its_answer_along(start, pool, redis):
    """Its answer would be the next client's, and the value would be lost."""
    running = start("redis", redis.address)
    with come(running, ask("BLPOP", "q", 0)):
        wait_until(lambda: redis.count() == 1)
    running.ending(1)
    exchange(running, ask("RPUSH", "q", "secret"), b":1\r\n")
    exchange(running, ask("LPOP", "q"), b"$6\r\nsecret\r\n")
    assert (redis.count(), pool.given, pool.taken) == (2, 2, 1)


def test_a_late_answer_of_redis_never_reaches_the_next_client(start, pool, serve, flow):
    """It comes after the client has left: redis-py's CVE-2023-28858."""
    far = StandIn(serve)
    far.values = {b"slow": b"secret", b"a": b"1"}
    running = start("redis", far.address)
    exchange(running, ask("GET", "a"), b"$1\r\n1\r\n")
    with come(running, ask("GET", "slow")):
        wait_until(lambda: pool.taken == 1)
        wait_until(lambda: [each for each in list(running.router.connections) if each.up.total])
    with come(running, ask("GET", "a")) as sock:
        assert read_exactly(sock, 7) == b"$1\r\n1\r\n"
        far.go.set()
        assert running.ending(2).reason == "client_closed"
        sock.sendall(ask("GET", "a"))
        assert read_exactly(sock, 7) == b"$1\r\n1\r\n"
    running.ending(3)
    assert (far.count(), pool.given) == (2, 2)


def test_pipelined_commands_whose_client_leaves_in_the_middle(start, pool, serve):
    far = StandIn(serve)
    far.values = {b"slow": b"secret", b"a": b"1"}
    running = start("redis", far.address)
    with come(running, ask("GET", "a") * 2 + ask("GET", "slow") + ask("GET", "a")) as sock:
        assert read_exactly(sock, 7) == b"$1\r\n1\r\n"
    with come(running, ask("GET", "a")) as sock:
        assert read_exactly(sock, 7) == b"$1\r\n1\r\n"
        far.go.set()
        running.ending(1)
        sock.sendall(ask("GET", "a"))
        assert read_exactly(sock, 7) == b"$1\r\n1\r\n"
    running.ending(2)
    assert (far.count(), pool.given) == (2, 1)


def test_a_client_that_has_said_all_gets_its_answer_whole(start, pool, serve):
    """Half-close: it is passed on, and the connection serves nobody else."""
    far = StandIn(serve)
    far.values[b"slow"] = b"x" * 300_000
    running = start("redis", far.address)
    with come(running, ask("GET", "slow")) as sock:
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: [each for each in list(running.router.connections) if each.up.state == "done"])
        far.go.set()
        assert read_all(sock) == b"$300000\r\n" + far.values[b"slow"] + b"\r\n"
    assert running.ending().reason == "client_closed"
    assert pool.given == 0


def test_a_client_that_breaks_off_between_answers_uses_nothing_up(start, pool, far, flow):
    running = start("redis", far.address)
    sock = come(running, ask("SET", "a", "1"))
    assert read_exactly(sock, 5) == b"+OK\r\n"
    reset(sock)
    assert running.ending().reason == "client_reset"
    exchange(running, ask("GET", "a"), b"$1\r\n1\r\n")
    assert (far.count(), pool.given) == (1, 2)


def test_a_client_that_breaks_off_before_its_answer_breaks_off_the_backend(start, pool, serve, flow):
    heard = threading.Event()

    def handler(sock: socket.socket) -> bytes:
        read_exactly(sock, len(ask("GET", "a")))
        heard.set()
        return sock.recv(1)

    far = serve(handler)
    running = start("redis", far.address)
    sock = come(running, ask("GET", "a"))
    assert heard.wait(10)
    reset(sock)
    assert running.ending().reason == "client_reset"
    assert isinstance(far.result(), ConnectionResetError) and pool.given == 0


def test_a_backend_that_ends_is_passed_on_as_ever(start, pool, serve, flow):
    def handler(sock: socket.socket) -> bytes:
        read_exactly(sock, len(ask("GET", "a")))
        sock.sendall(b"$1\r\n1\r\n")
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)

    far = serve(handler)
    running = start("redis", far.address)
    with come(running, ask("GET", "a")) as sock:
        assert read_all(sock) == b"$1\r\n1\r\n"
    assert running.ending().reason == "backend_closed"
    assert (far.result(), pool.given) == (b"", 0)


def test_a_backend_that_breaks_off_is_passed_on_as_ever(start, pool, serve, flow):
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(ask("GET", "a")))
        reset(sock)

    running = start("redis", serve(handler).address)
    with come(running, ask("GET", "a")) as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert running.ending().reason == "backend_reset" and pool.given == 0


# -- HTTP --------------------------------------------------------------------------------------


class Web:
    """A far end that speaks enough HTTP/1.1: it answers with the body that it was sent, /slow when `go` is set."""

    def __init__(self, serve) -> None:
        self.go = threading.Event()
        self.far: Server = serve(self.handler)
        self.address = self.far.address

    def handler(self, sock: socket.socket) -> None:
        with sock.makefile("rb") as stream:
            while first := stream.readline():
                size = 0
                while (line := stream.readline()) not in (b"\r\n", b""):
                    name, _, value = line.partition(b":")
                    size = int(value) if name == b"Content-Length" else size
                body = stream.read(size) or first.split()[1]
                if first.split()[1] == b"/slow":
                    self.go.wait(10)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def got(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def get(path: str) -> bytes:
    return request(f"GET {path} HTTP/1.1")[1]


def test_the_next_client_of_http_gets_the_connection_of_the_one_before(start, pool, serve, flow):
    web = Web(serve)
    running = start("http", web.address)
    for number in range(10):
        exchange(running, get(f"/{number}") + get("/again"), got(b"/%d" % number) + got(b"/again"))
    assert (web.far.accepted, pool.given, pool.taken) == (1, 10, 9)


def test_the_connection_of_curl_serves_the_next_curl(start, pool, serve):
    web = Web(serve)
    running = start("http", web.address)
    place = "http://{}:{}".format(*running.router.listeners[-1].getsockname())
    for words, said in ((["/a", "/b"], b"/a/b"), (["/c"], b"/c"), (["--data", "hello", "/d"], b"hello")):
        words = [place + word if word.startswith("/") else word for word in words]
        ended = execute(program_path("curl", "curl"), "-s", "--noproxy", "*", *words, said=b"")
        assert ended.stdout == said
    running.ending(3)
    assert (web.far.accepted, pool.given) == (1, 3)


@pytest.mark.parametrize("proven", [True, False], ids=["proven by its connect", "by its first byte"])
@pytest.mark.parametrize("kind", ["redis", "http"])
def test_whenever_clients_leave_no_answer_reaches_another(start, pool, serve, kind, proven):
    """Four at a time.  Each asks for what is its own, reads some of the answers, and leaves in one of the ways."""
    def handler(sock: socket.socket) -> None:
        with sock.makefile("rb") as stream:
            while words := words_of(stream) if kind == "redis" else words_of_head(stream):
                if words[1][-1:] in b"0123":  # some answers are late
                    pause.wait(0.002)
                sock.sendall(one_answer(words[1]))

    def words_of_head(stream: Any) -> list[bytes]:
        lines = [stream.readline()]
        while lines[-1] not in (b"\r\n", b""):
            lines.append(stream.readline())
        return lines[0].split() if lines[-1] else []

    def one_answer(key: bytes) -> bytes:
        return got(key) if kind == "http" else b"$%d\r\n%b\r\n" % (len(key), key)

    def crowd(seed: int) -> None:
        seeded = random.Random(seed)
        for number in range(30):
            keys = [f"/{seed}-{number}-{seeded.randbytes(8).hex()}" for _ in range(seeded.randrange(4))]
            said = b"".join(get(key) if kind == "http" else ask("GET", key) for key in keys)
            expected = b"".join(one_answer(key.encode()) for key in keys)
            leaves = seeded.choice(("after all", "after all", "in the middle", "with a reset", "with half a word"))
            if leaves == "with half a word":
                said = said[:seeded.randrange(len(said) + 1)]
            sock = come(running, said)
            count = len(expected) if leaves == "after all" else seeded.randrange(len(expected) + 1)
            if leaves == "with half a word":
                sock.shutdown(socket.SHUT_WR)
                heard = read_all(sock)
            else:
                heard = read_exactly(sock, count)
            if not expected.startswith(heard) or leaves == "after all" and heard != expected:
                wrong.append((expected, heard))
            reset(sock) if leaves == "with a reset" else sock.close()

    pause, wrong = threading.Event(), []
    pool.proven = proven
    far = serve(handler)
    running = start(kind, far.address)
    crowds = [threading.Thread(target=crowd, args=(seed,)) for seed in range(4)]
    for thread in crowds:
        thread.start()
    for thread in crowds:
        thread.join()
    running.ending(120)
    assert not wrong and pool.taken > 20 and far.accepted > 20


def test_large_bodies_are_passed_over_and_the_connection_serves_another_client(start, pool, serve, flow):
    web = Web(serve)
    running = start("http", web.address)
    body = random.Random(3).randbytes(1 << 20)
    for _ in range(3):
        with come(running) as sock:
            said, expected = request(POST, f"Content-Length: {len(body)}", body=body)[1], got(body)
            sent = threading.Thread(target=sock.sendall, args=(said,))
            sent.start()
            assert read_exactly(sock, len(expected)) == expected
            sent.join()
    running.ending(3)
    assert (web.far.accepted, pool.given) == (1, 3)


def test_a_late_answer_of_http_never_reaches_the_next_client(start, pool, serve, flow):
    web = Web(serve)
    running = start("http", web.address)
    with come(running, get("/first") + get("/slow")) as sock:
        assert read_exactly(sock, len(got(b"/first"))) == got(b"/first")
    with come(running, get("/mine")) as sock:
        assert read_exactly(sock, len(got(b"/mine"))) == got(b"/mine")
        web.go.set()
        running.ending(1)
        sock.sendall(get("/also"))
        assert read_exactly(sock, len(got(b"/also"))) == got(b"/also")
    running.ending(2)
    assert (web.far.accepted, pool.given) == (2, 1)


def test_a_client_that_reads_no_further_does_not_leave_the_rest_to_the_next(start, pool, serve, flow):
    """8 MiB, of which it reads a byte: the rest is on its way when it leaves."""
    size = 8 << 20

    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(get("/")))
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
        read_all(sock)

    far = serve(handler)
    running = start("http", far.address)
    with come(running, get("/")) as sock:
        assert sock.recv(1) == b"H"
        wait_until(lambda: [each for each in list(running.router.connections) if each.down.state == "blocked"])
    assert running.ending().reason in ("client_closed", "client_reset")
    assert pool.given == 0


def test_a_conversation_that_is_spoilt_while_its_client_does_not_read_loses_nothing(start, pool, serve, flow):
    body = random.Random(4).randbytes(8 << 20)

    def handler(sock: socket.socket) -> bytes:
        read_exactly(sock, len(get("/")))
        sock.sendall(got(body))
        return read_all(sock)

    far = serve(handler)
    running = start("http", far.address)
    with come(running, get("/")) as sock:
        wait_until(lambda: [each for each in list(running.router.connections) if each.down.state == "blocked"])
        (connection,) = running.router.connections
        sock.sendall(b"what is this\r\n")
        wait_until(lambda: type(connection.down) is running.router.pipes.flow)
        assert connection.down.state == "blocked"
        expected = got(body)
        assert read_exactly(sock, len(expected)) == expected
        sock.sendall(b"!" * 100_000)
    assert running.ending().reason == "client_closed"
    assert far.result() == b"what is this\r\n" + b"!" * 100_000 and pool.given == 0


@pytest.mark.parametrize("field", ["Connection: close", "Upgrade: websocket", "Authorization: NTLM TlRMTVNTUAAB"])
def test_what_is_said_for_the_connection_uses_it_up(start, pool, serve, field):
    web = Web(serve)
    running = start("http", web.address)
    exchange(running, request("GET /a HTTP/1.1", field)[1], got(b"/a"))
    exchange(running, get("/b"), got(b"/b"))
    assert (web.far.accepted, pool.given) == (2, 1)


def test_an_answer_that_nobody_asked_for_uses_the_connection_up(start, pool, serve):
    more = threading.Event()

    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(get("/")))
        sock.sendall(got(b"a"))
        more.wait(10)
        sock.sendall(got(b"b"))
        read_all(sock)

    running = start("http", serve(handler).address)
    with come(running, get("/")) as sock:
        assert read_exactly(sock, len(got(b"a"))) == got(b"a")
        more.set()
        assert read_exactly(sock, len(got(b"b"))) == got(b"b"), "it is the client's, as ever"
    running.ending(1)
    assert pool.given == 0


def in_the_loop(running: Running, act: Callable[[], object]) -> None:
    """Run this in the router's thread, and wait for it."""
    done = threading.Event()
    running.router.call(lambda: (act(), done.set()))
    assert done.wait(10)


def fill(fd: int) -> int:
    """Write zeros until the kernel takes no more; how many."""
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += os.write(fd, bytes(4096))
    return filled


def test_a_client_that_has_not_read_its_answer_yet_and_says_no_more_gets_all_of_it(start, pool, serve, flow):
    """The router has read the answer, and holds it: to hand on the connection would cut it off."""
    web = Web(serve)
    running = start("http", web.address)
    filled = 0
    with come(running, get("/a")) as sock:
        assert read_exactly(sock, len(got(b"/a"))) == got(b"/a")
        (connection,) = running.router.connections
        asked = 0

        def hinder() -> None:
            nonlocal filled
            filled += fill(connection.up.fd)

        while connection.down.state != "blocked":  # the kernel may have made room meanwhile
            in_the_loop(running, hinder)
            sock.sendall(get("/b"))
            asked += 1
            wait_until(lambda: connection.down.total == len(got(b"/a")) * (1 + asked))
            in_the_loop(running, lambda: None)
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: connection.up is None or connection.up.state == "done")
        heard = read_all(sock)
        assert len(heard) == filled + asked * len(got(b"/b")) and heard.endswith(got(b"/b"))
    assert running.ending().reason == "client_closed"
    assert pool.given == 0


@pytest.mark.parametrize("fault", ["nothing to read", "sink is full", "sink is gone"])
def test_what_an_observed_flow_meets_ends_as_with_any_other(start, pool, serve, flow, fault):
    go = threading.Event()

    def handler(sock: socket.socket) -> int:
        read_exactly(sock, 5)
        sock.sendall(b"!")
        go.wait(10)
        return 5 + len(read_all(sock))

    far = serve(handler)
    running = start("quiet", far.address)
    with come(running, b"hello") as sock:
        assert sock.recv(1) == b"!"
        (connection,) = running.router.connections
        up, down, filled = connection.up, connection.down, 0

        def prepare() -> None:
            nonlocal filled
            if fault == "nothing to read":
                up.pump(READ)
            elif fault == "sink is gone":
                down.source.shutdown(socket.SHUT_WR)
            else:
                filled += fill(down.fd)

        total = 0
        while True:
            in_the_loop(running, prepare)
            sock.sendall(bytes(1000))
            total += 1000
            wait_until(lambda: up.total == total + 5)
            in_the_loop(running, lambda: None)  # it is done with that
            if fault != "sink is full" or up.state == "blocked":
                break  # else the kernel made room meanwhile
        if fault == "sink is gone":
            assert up.state == "broken"
            total = 0
        sock.shutdown(socket.SHUT_WR)
        go.set()
        assert far.result() == 5 + total + filled
        read_all(sock)
    assert running.ending().reason == ("client_closed" if fault != "sink is gone" else "backend_reset")
    assert pool.given == 0


# -- who is not observed ---------------------------------------------------------------------------


def test_a_client_with_tls_has_its_connection_for_itself(start, pool, run, echo_server):
    pool.kind = "quiet"
    running = run(route(echo_server.address))
    with running.connect(HELLO) as sock:
        assert read_exactly(sock, len(HELLO)) == HELLO
        (connection,) = running.router.connections
        assert type(connection.up) is running.router.pipes.flow
    running.ending(1)
    assert (pool.given, echo_server.accepted) == (0, 1)


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("kind", MACHINES)
def test_a_client_with_a_proxy_header_has_its_connection_for_itself(start, pool, serve, kind, when):
    """The backend has been told whose the connection is.  It comes before the connect, or `behind` it."""
    header = b"PROXY TCP4 192.0.2.7 192.0.2.1 51234 80\r\n"
    web = serve(lambda sock: (sock.sendall(read_exactly(sock, len(header) + len(get("/")))), read_all(sock)))
    running = start(kind, web.address, "--proxy-protocol=auto", "--proxy-from=127.0.0.0/8")
    with come(running, header + get("/") if when == "before" else b"") as sock:
        if when == "behind":
            wait_until(lambda: [each for each in list(running.router.connections) if each.state == "open"])
            sock.sendall(header + get("/"))
        assert read_exactly(sock, len(header + get("/"))) == header + get("/")
    assert running.ending().client == ("192.0.2.7", 51234)
    assert pool.given == 0


# -- quiet -------------------------------------------------------------------------------------


def test_a_silent_connection_serves_another_client_after_its_rest(start, pool, echo_server):
    pool.rest = 0.05
    running = start("quiet", echo_server.address)
    for number in range(3):
        exchange(running, b"hello", b"hello")
        wait_until(lambda: pool.idle)
        assert (pool.given, pool.taken) == (number + 1, number)
    assert echo_server.accepted == 1


def test_while_it_rests_it_serves_nobody(start, pool, echo_server):
    pool.rest = 600.0
    running = start("quiet", echo_server.address)
    for number in range(3):
        exchange(running, b"hello", b"hello")
        assert (echo_server.accepted, len(pool.aside)) == (number + 1, number + 1)


@pytest.mark.parametrize("last_words", [b"secret", b""], ids=["an answer", "the end"])
def test_what_comes_during_the_rest_uses_the_connection_up(start, pool, serve, last_words):
    go = threading.Event()

    def handler(sock: socket.socket) -> None:
        said = read_exactly(sock, 5)
        sock.sendall(said)
        if said == b"hello":
            go.wait(10)
            sock.sendall(last_words)
        if said == b"again" or last_words:
            read_all(sock)

    pool.rest = 600.0
    far = serve(handler)
    running = start("quiet", far.address)
    exchange(running, b"hello", b"hello")
    assert pool.given == 1
    go.set()
    wait_until(lambda: pool.lost == 1)
    exchange(running, b"again", b"again")
    assert far.accepted == 2 and not pool.idle


def test_a_backend_that_greets_its_clients_greets_each_of_them(start, pool, serve, flow):
    def handler(sock: socket.socket) -> None:
        sock.sendall(b"220 hello\r\n")
        while data := sock.recv(100):
            sock.sendall(data)

    far = serve(handler)
    running = start("quiet", far.address)
    for number in range(2):
        with come(running) as sock:
            assert read_exactly(sock, 11) == b"220 hello\r\n"
            sock.sendall(b"EHLO")
            assert read_exactly(sock, 4) == b"EHLO"
        running.ending(number + 1)
    assert (far.accepted, pool.given) == (2, 0)


def test_an_unknown_protocol_whose_client_spoke_last_is_not_quiet(start, pool, serve, flow):
    heard = threading.Event()

    def handler(sock: socket.socket) -> None:
        sock.sendall(read_exactly(sock, 5))
        read_exactly(sock, 4)
        heard.set()
        read_all(sock)

    running = start("quiet", serve(handler).address)
    with come(running, b"hello") as sock:
        assert read_exactly(sock, 5) == b"hello"
        sock.sendall(b"more")
        assert heard.wait(10)
    running.ending(1)
    assert pool.given == 0


# -- what the kernel holds ---------------------------------------------------------------------------


def pair(kind: str) -> tuple[Any, Any]:
    """Two ends of a connection, the first of them non-blocking."""
    if kind == "unix":
        near, end = socket.socketpair()
    else:
        with socket.create_server((HOST, 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            end = listener.accept()[0]
    near.setblocking(False)
    return near, end


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_connection_is_silent_where_nothing_is_under_way(kind):
    near, end = pair(kind)
    with near, end:
        assert is_silent(near)
        end.sendall(b"x")
        wait_until(lambda: not is_silent(near))
        assert near.recv(9) == b"x" and is_silent(near)
        near.sendall(b"y")
        end.recv(1)
        wait_until(lambda: is_silent(near))
        end.close()
        wait_until(lambda: not is_silent(near))
    near, end = pair(kind)
    with near:
        reset(end)
        wait_until(lambda: not is_silent(near))


def test_a_connection_is_not_silent_while_the_backend_has_not_taken_all():
    """With TCP's small buffers, and nobody who reads, bytes stay on this side."""
    near, end = pair("tcp")
    with near, end:
        with contextlib.suppress(BlockingIOError):
            while near.send(bytes(65536)):
                pass
        assert not is_silent(near)


def test_where_the_kernel_does_not_tell_nothing_is_silent(monkeypatch):
    monkeypatch.setattr("sniroute_reuse.unsent", lambda sock: None)
    near, end = pair("tcp")
    with near, end:
        assert not is_silent(near)


# -- kept aside --------------------------------------------------------------------------------


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop that the test turns, and in which nothing fails."""
    made = Loop(lambda owner: pytest.fail("a fault"))
    yield made
    made.close()


@pytest.mark.parametrize("happens, is_given", [("nothing", True), ("a byte", False), ("the end", False),
                                               ("a byte before", False), ("closed", None)])
def test_a_connection_rests_before_it_serves_another_client(loop, monkeypatch, happens, is_given):
    queue = loop.queue(0.0, Aside.rested)
    near, end = pair("tcp")
    found: list[Any] = []
    with near, end:
        if happens == "a byte before":
            end.sendall(b"x")
            wait_until(lambda: not is_silent(near))
        queue.seconds = 0.0 if happens in ("nothing", "a byte before") else 600.0
        aside = Aside(loop.poller, queue, near, found.append)
        if happens == "a byte":
            end.sendall(b"x")
        elif happens == "the end":
            end.close()
        elif happens == "closed":
            aside.close()
            loop.call(lambda: None)
            loop.turn()
        while not found and is_given is not None:
            loop.turn()
        assert found == ([] if is_given is None else [near if is_given else None])
        assert not queue.due and aside.events == 0
        assert (near.fileno() >= 0) is bool(is_given)


def test_a_byte_that_comes_in_the_last_moment_of_its_rest_uses_it_up(loop):
    """The queue is due, and the poller has not told of the byte."""
    near, end = pair("tcp")
    found: list[Any] = []
    with near, end:
        aside = Aside(loop.poller, loop.queue(600.0, Aside.rested), near, found.append)
        end.sendall(b"x")
        wait_until(lambda: not is_silent(near))
        aside.queue.drop(aside)
        aside.rested()
        assert found == [None] and near.fileno() < 0


# -- by the option -----------------------------------------------------------------------------


class Redislike:
    """A server that answers GET with the number of its connection; `late` has the next answer wait for `go`."""

    def __init__(self) -> None:
        self.late = False
        self.asked, self.go = threading.Event(), threading.Event()
        self.count = itertools.count(1)

    def __call__(self, sock: socket.socket) -> None:
        number = next(self.count)
        while sock.recv(4096):
            if self.late:
                self.late = False
                self.asked.set()
                self.go.wait(20)
            sock.sendall(b":%d\r\n" % number)


GET = b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n"


@pytest.fixture
def port_of(run, settings_file) -> Callable[..., Any]:
    """port_of(server, option=value ...) -> a router with a port that leads to it, and a way to ask there."""
    def start(server: Server, **options: Any) -> Any:
        lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items())
        running = run("-c", settings_file('[routes]\n"a.example.com" = "tcp:192.0.2.1:1"\n[ports."127.0.0.1:0"]\n'
                                          f'target = "tcp:{HOST}:{server.address[1]}"\n{lines}'))
        running.at = running.router.listeners[-1].getsockname()
        return running
    return start


def ask_at(running: Any, said: bytes = GET) -> bytes:
    with socket.create_connection(running.at, 20) as client:
        client.sendall(said)
        return client.recv(100)


def pool_of(running: Any) -> Any:
    group, = running.router.targets.book.groups.values()
    member, = group.members.values()
    return member.pool


def rests(running: Any, number: int = 1) -> None:
    wait_until(lambda: len(pool_of(running).idle) == number, what="a connection that waits for the next client")


def test_a_port_with_reuse_hands_the_connection_on(port_of, serve):
    far = serve(Redislike())
    running = port_of(far, reuse="redis")
    for _ in range(5):
        assert ask_at(running) == b":1\r\n"
        rests(running)
    assert far.accepted == 1
    assert {end.reason for end in running.endings} == {"client_closed"}


def test_a_late_answer_never_reaches_the_next_client(port_of, serve):
    """The client has left while its answer was on its way."""
    redislike = Redislike()
    far = serve(redislike)
    running = port_of(far, reuse="redis")
    assert ask_at(running) == b":1\r\n"
    rests(running)
    redislike.late = True
    with socket.create_connection(running.at, 20) as client:
        client.sendall(GET)
        assert redislike.asked.wait(20)
    assert ask_at(running) == b":2\r\n", "a connection of its own"
    redislike.go.set()
    running.ending(3)
    assert ask_at(running) in (b":2\r\n", b":3\r\n")


def test_what_keeps_state_is_not_handed_on(port_of, serve):
    far = serve(Redislike())
    running = port_of(far, reuse="redis")
    assert ask_at(running, b"*2\r\n$6\r\nSELECT\r\n$1\r\n1\r\n") == b":1\r\n"
    running.ending()
    assert ask_at(running) == b":2\r\n"


def test_a_quiet_connection_rests_before_the_next_client(port_of, serve, monkeypatch, caplog):
    monkeypatch.setattr(sniroute_reuse, "REUSES", {"quiet": REUSES["quiet"]._replace(rest=600.0)})
    far = serve(Redislike())
    running = port_of(far, reuse="quiet")
    assert ask_at(running, b"hello") == b":1\r\n"
    running.ending(1)
    assert ask_at(running, b"hello") == b":2\r\n", "the first one is not silent for long enough"
    running.ending(2)
    group, = running.router.targets.book.groups.values()

    def pass_time() -> None:
        """They have rested."""
        for aside in group.warmth.asides:
            aside.queue.due[aside] = 0.0
        running.router.loop.hurry()

    in_the_loop(running, pass_time)
    rests(running, 2)
    assert ask_at(running, b"hello") in (b":1\r\n", b":2\r\n")
    assert far.accepted == 2


def test_a_warm_connection_may_be_handed_on_too(port_of, serve):
    far = serve(Redislike())
    running = port_of(far, reuse="redis", warm=1)
    rests(running)
    assert ask_at(running) == b":1\r\n"
    rests(running, 2)
    assert ask_at(running) in (b":1\r\n", b":2\r\n")
    wait_until(lambda: far.accepted == 2)


def test_the_limit_of_a_backend_counts_what_waits_for_the_next_client(port_of, serve):
    far = serve(Redislike())
    running = port_of(far, reuse="redis", max_backend_connections=1)
    for _ in range(3):
        assert ask_at(running) == b":1\r\n"
        rests(running)
    assert far.accepted == 1


@pytest.mark.parametrize("change", ["the target is gone", "reuse is off", "it is drained"])
def test_what_waits_for_the_next_client_is_closed_where_there_will_be_none(port_of, serve, settings_file, change):
    ended = threading.Event()

    def handler(sock: socket.socket) -> None:
        Redislike()(sock)
        ended.set()

    running = port_of(serve(handler), reuse="redis")
    assert ask_at(running) == b":1\r\n"
    rests(running)
    pool = pool_of(running)
    book = running.router.targets.book
    if change == "it is drained":
        group, = book.groups.values()
        target, = group.members
        running.router.call(lambda: (book.drain(group.pattern, target, True), group.sort()))
    else:
        port, = running.router.settings.port
        other = "tcp:192.0.2.9:1" if change == "the target is gone" else port.target
        file = settings_file('[routes]\n"a.example.com" = "tcp:192.0.2.1:1"\n[ports."127.0.0.1:0"]\n'
                             f'target = "{other}"\n' + ('reuse = "redis"\n' if "target" in change else ""))
        running.router.call(lambda: running.router.adopt(load_settings(["-c", file], {}, running.router.settings)))
    assert ended.wait(20)
    wait_until(lambda: not pool.idle)


def test_a_client_with_tls_or_a_header_keeps_its_connection_for_itself(port_of, serve):
    far = serve(Redislike())
    running = port_of(far, reuse="redis")
    for number, said in ((1, HELLO), (2, b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + GET)):
        assert ask_at(running, said) == b":%d\r\n" % number
        running.ending(number)
    assert not pool_of(running).idle


@pytest.mark.parametrize("table, said", [
    ('[routes."a.example.com"]\ntarget = "tcp:h:1"\nreuse = "redis"', 'routes."a.example.com": reuse: is for ports'),
    ('[ports.":5"]\ntarget = "tcp:h:1"\nreuse = "redis"\nsend_proxy = "v1"', 'reuse: does not go with send_proxy'),
    ('[ports.":5"]\ntarget = "tcp:h:1"\nreuse = "mysql"', "reuse: 'mysql' is none of off, redis, http, quiet"),
])
def test_where_reuse_cannot_be_is_said_at_the_start(table, said, settings_file):
    with pytest.raises(SettingsError) as caught:
        load_settings(["-c", settings_file(table)], {})
    assert said in str(caught.value)


def test_quiet_is_warned_of_at_the_start(settings_file, caplog):
    warn(load_settings(["-c", settings_file('[ports.":5"]\ntarget = "tcp:h:1"\nreuse = "quiet"')], {}))
    assert "reuse = quiet guesses" in caplog.text
