"""Tests of sniroute_carrier.py, in its order.

The far end is the stand-in of fake_edge.py, one for the whole file, where each test has a hostname of
its own (`name`).  The carrier runs in a thread of the test where its times are shortened or its state is
looked at (`local`), and as the real program where that is the subject (`carrier`).  What no edge of ours
would say, an edge that is a function of the test says (`raw_edge`).
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import resource
import select
import selectors
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute_carrier
from conftest import HERE, HOST, Edge, echo, wait_until
from sniroute_carrier import (BINARY, CHUNK, CLOSE, CONTINUATION, HEAD_MAX, LINES_MAX, PING, PONG, REASONS, TEXT,
                              Answer, Carrier, Failed, FrameReader, Log, Malformed, Proxy, SettingsError, Target)

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc")
Address = tuple[str, int]
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # and its answer: RFC 6455 section 1.3
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
NOISE = random.Random(1).randbytes(1 << 20)  # what has no pattern that a lost piece could fit


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, limit, line", [
    pytest.param("plain", 10, "plain", id="short"),
    pytest.param("exactly te", 10, "exactly te", id="as long as the limit"),
    pytest.param("eleven long", 10, "eleven ...", id="one too long"),
    pytest.param("a\nb\x1b\x7f\u00e9", 10, "a?b???", id="not printable ASCII"),
])
def test_printable(text, limit, line):
    assert sniroute_carrier.printable(text, limit) == line


@pytest.mark.parametrize("text, target, shown", [
    pytest.param("app.example.com", ("app.example.com", 443, "/"), "app.example.com", id="host"),
    pytest.param("APP.Example.com", ("app.example.com", 443, "/"), "app.example.com", id="upper case"),
    pytest.param("app:8443", ("app", 8443, "/"), "app:8443", id="port"),
    pytest.param("https://app.example.com", ("app.example.com", 443, "/"), "app.example.com", id="URL"),
    pytest.param("http://app/x/y?a=1#z", ("app", 443, "/x/y?a=1"), "app", id="another scheme, path and query"),
    pytest.param("app?a=1", ("app", 443, "/?a=1"), "app", id="query without a path"),
    pytest.param("https://user:word@app:1/", ("app", 1, "/"), "app:1", id="userinfo is dropped"),
    pytest.param("127.0.0.1:9", ("127.0.0.1", 9, "/"), "127.0.0.1:9", id="IPv4"),
    pytest.param("[0:0::1]:9", ("::1", 9, "/"), "[::1]:9", id="IPv6"),
    pytest.param("[::1]", ("::1", 443, "/"), "::1", id="IPv6 without a port"),
    pytest.param("_a_b.example.com", ("_a_b.example.com", 443, "/"), "_a_b.example.com", id="underscores"),
    pytest.param("a" * 63 + ".com", ("a" * 63 + ".com", 443, "/"), "a" * 63 + ".com", id="the longest label"),
])
def test_parse_target(text, target, shown):
    parsed = sniroute_carrier.parse_target(text)
    assert parsed == target and str(parsed) == shown


@pytest.mark.parametrize("text", [
    "", " ", "a b", "a\nb", "caf\u00e9.example.com", "https://", "a..b", ".a", "a.", "-a", "a-", "a/ b", "a:x", "a:0",
    "a:65536", "::1", "[::1", "[x]", "a" * 64, ".".join(["a" * 63] * 4), "a,b", "a%20b", "https:///x"])
def test_what_is_no_target(text):
    with pytest.raises(ValueError, match="is not a hostname, HOST:PORT, or a URL$"):
        sniroute_carrier.parse_target(text)


@pytest.mark.parametrize("text, address", [
    pytest.param("127.0.0.1:20000", ("127.0.0.1", 20000), id="IPv4"),
    pytest.param("localhost:20000", ("127.0.0.1", 20000), id="localhost"),
    pytest.param("[::1]:20000", ("::1", 20000), id="IPv6"),
    pytest.param("tcp://127.0.0.1:20000", ("127.0.0.1", 20000), id="scheme"),
    pytest.param("http://127.0.0.1:20000/x", ("127.0.0.1", 20000), id="path"),
    pytest.param("0.0.0.0:0", ("0.0.0.0", 0), id="any"),
])
def test_parse_listen(text, address):
    assert sniroute_carrier.parse_listen(text) == address


@pytest.mark.parametrize("text", ["", ":1", "127.0.0.1", "20000", "unix:/x", "host.example.com:1", "127.0.0.1:x",
                                  "127.0.0.1:65536", "127.0.0.1:-1", "[::1:1", "\n:1"])
def test_what_is_no_place_to_listen(text):
    with pytest.raises(ValueError, match="is not HOST:PORT, with an address or localhost as HOST$"):
        sniroute_carrier.parse_listen(text)


@pytest.mark.parametrize("text, header", [
    pytest.param("a: b", ("a", "b"), id="plain"),
    pytest.param("a:b", ("a", "b"), id="no space"),
    pytest.param("A-b: \t c, d \t", ("A-b", "c, d"), id="blanks around, a comma inside"),
    pytest.param("a: b: c", ("a", "b: c"), id="a colon inside"),
    pytest.param("a:", ("a", ""), id="empty"),
])
def test_parse_header(text, header):
    assert sniroute_carrier.parse_header(text) == header


@pytest.mark.parametrize("text", ["", "a", ": b", "a b: c", "a: s3cret\r\nx: y", "a: s3cret\n", "a: s3cret\x7f",
                                  "a: s3cret\u00e9", "a: s3cret\0", "caf\u00e9: s3cret"])
def test_what_is_no_header_is_not_repeated(text):
    with pytest.raises(ValueError) as caught:
        sniroute_carrier.parse_header(text)
    assert "s3cret" not in str(caught.value)


def test_identity_takes_options_first_then_variables():
    environ = {"TUNNEL_SERVICE_TOKEN_ID": "id", "TUNNEL_SERVICE_TOKEN_SECRET": "secret", "CF_ACCESS_TOKEN": "jwt",
               "TUNNEL_SERVICE_DESTINATION": "db:5432"}
    everything = [("Cf-Access-Jump-Destination", "db:5432"), ("Cf-Access-Client-Id", "id"),
                  ("Cf-Access-Client-Secret", "secret"), ("Cf-Access-Token", "jwt")]
    assert sniroute_carrier.identity(environ, {}) == everything
    assert sniroute_carrier.identity({"TUNNEL_SERVICE_TOKEN_ID": ""}, {}) == []
    given = {"service_token_id": "other", "destination": None}
    assert sniroute_carrier.identity(environ, given)[1] == ("Cf-Access-Client-Id", "other")


@pytest.mark.parametrize("environ, given, source", [
    pytest.param({"TUNNEL_SERVICE_TOKEN_SECRET": "s3cret\nX: y"}, {}, "TUNNEL_SERVICE_TOKEN_SECRET", id="variable"),
    pytest.param({}, {"service_token_secret": "s3cret\nX: y"}, "--service-token-secret", id="option"),
    pytest.param({"TUNNEL_SERVICE_TOKEN_ID": "id"}, {"service_token_id": "s3cret\n"}, "--service-token-id", id="both"),
])
def test_an_identity_that_is_wrong_is_named_and_not_repeated(environ, given, source):
    with pytest.raises(SettingsError, match=f"^{source}: ") as caught:
        sniroute_carrier.identity(environ, given)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("text, proxy", [
    pytest.param("http://proxy:3128", Proxy("proxy", 3128, ""), id="URL"),
    pytest.param("proxy:3128", Proxy("proxy", 3128, ""), id="no scheme"),
    pytest.param("http://proxy/", Proxy("proxy", 80, ""), id="no port"),
    pytest.param("http://[::1]:1", Proxy("::1", 1, ""), id="IPv6"),
    pytest.param("http://u:p@proxy:1", Proxy("proxy", 1, "Basic dTpw"), id="credentials"),
    pytest.param("http://u@proxy:1", Proxy("proxy", 1, "Basic dTo="), id="no password"),
    pytest.param("http://u%40x:p%3Aq@proxy:1", Proxy("proxy", 1, "Basic dUB4OnA6cQ=="), id="quoted"),
    pytest.param("http://u:p@q@proxy:1", Proxy("proxy", 1, "Basic dTpwQHE="), id="an @ in the password"),
])
def test_parse_proxy(text, proxy):
    assert sniroute_carrier.parse_proxy(text) == proxy


@pytest.mark.parametrize("text", [
    "https://u:s3cret@proxy:1", "socks5://u:s3cret@proxy", "http://", "http://u:s3cret@:1", "http://u:s3cret@proxy:x",
    "http://u:s3cret/x@proxy:1", "http://u:s3cret#x@proxy:1", "http://u:s3cret?x@p:1", "http://u:s3cret\u2100@proxy",
    "http://u:s3cret@caf\u00e9:1", "http://u:s3cret@[::1", "http://u:s3cret@proxy:65536"])
def test_what_is_no_proxy_is_not_repeated(text):
    with pytest.raises(ValueError) as caught:
        sniroute_carrier.parse_proxy(text)
    assert "s3cret" not in str(caught.value)
    with pytest.raises(SettingsError, match="^HTTPS_PROXY: ") as wrong:
        sniroute_carrier.find_proxy({"https_proxy": text})
    assert "s3cret" not in str(wrong.value)


def test_find_proxy_reads_both_cases_and_upper_wins():
    find = sniroute_carrier.find_proxy
    one, two = Proxy("one", 1, ""), Proxy("two", 2, "")
    assert find({}) == (None, "")
    assert find({"HTTPS_PROXY": "one:1", "https_proxy": "two:2", "NO_PROXY": "a", "no_proxy": "b"}) == (one, "a")
    assert find({"HTTPS_PROXY": "", "https_proxy": "two:2", "NO_PROXY": "", "no_proxy": "b"}) == (two, "b")
    assert find({"ALL_PROXY": "one:1", "HTTP_PROXY": "one:1"}) == (None, "")


@pytest.mark.parametrize("host, port, no_proxy, direct", [
    pytest.param("app.example.com", 443, "", False, id="nothing"),
    pytest.param("localhost", 443, "", True, id="localhost"),
    pytest.param("127.8.9.1", 443, "", True, id="loopback"),
    pytest.param("::1", 443, "", True, id="IPv6 loopback"),
    pytest.param("app.example.com", 443, "*", True, id="everything"),
    pytest.param("app.example.com", 443, "a, *", True, id="everything, in a list"),
    pytest.param("app.example.com", 443, "example.com", True, id="a subdomain"),
    pytest.param("example.com", 443, "example.com", True, id="the domain itself"),
    pytest.param("badexample.com", 443, "example.com", False, id="only looks like a subdomain"),
    pytest.param("example.com", 443, ".example.com", False, id="a leading dot: not itself"),
    pytest.param("a.example.com", 443, ".example.com", True, id="a leading dot: subdomains"),
    pytest.param("a.example.com", 443, "*.example.com", True, id="a star and a dot: subdomains"),
    pytest.param("example.com", 443, "*.example.com", False, id="a star and a dot: not itself"),
    pytest.param("example.com", 443, "*example.com", False, id="a star without a dot fits nothing"),
    pytest.param("APP.Example.com", 443, "EXAMPLE.COM", True, id="case"),
    pytest.param("app.example.com", 443, "example.com:443", True, id="its port"),
    pytest.param("app.example.com", 443, "example.com:8443", False, id="another port"),
    pytest.param("app.example.com", 443, ":443", False, id="a port without a host"),
    pytest.param("10.0.0.1", 443, "10.0.0.1", True, id="an address"),
    pytest.param("10.0.0.1", 443, "10.0.0.1:443", True, id="an address and its port"),
    pytest.param("10.0.0.1", 443, "10.0.0.1:80", False, id="an address and another port"),
    pytest.param("10.0.0.1", 443, "10.0.0.2", False, id="another address"),
    pytest.param("10.1.2.3", 443, "10.0.0.0/8", True, id="a network"),
    pytest.param("11.1.2.3", 443, "10.0.0.0/8", False, id="another network"),
    pytest.param("10.1.2.3", 443, "10.0.0.0/x", False, id="no network"),
    pytest.param("app.example.com", 443, "10.0.0.0/8", False, id="a name is in no network"),
    pytest.param("2001:db8::1", 443, "2001:db8::/32", True, id="an IPv6 network"),
    pytest.param("2001:db8::1", 443, "2001:db8::1", True, id="an IPv6 address"),
    pytest.param("2001:db8::1", 443, "2001:0DB8:0::1", True, id="an IPv6 address, written otherwise"),
    pytest.param("2001:db8::1", 443, "[2001:db8::1]", True, id="an IPv6 address in brackets"),
    pytest.param("2001:db8::1", 443, "[2001:db8::1]:443", True, id="an IPv6 address and its port"),
    pytest.param("2001:db8::1", 443, "[2001:db8::1]:80", False, id="an IPv6 address and another port"),
    pytest.param("app.example.com", 443, " a.com ,, example.com ", True, id="blanks and empty words"),
])
def test_goes_direct(host, port, no_proxy, direct):
    assert sniroute_carrier.goes_direct(host, port, no_proxy) is direct


# -- HTTP --------------------------------------------------------------------------------------


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
        assert sniroute_carrier.parse_answer(head[:size]) is None
    for rest in (b"", b"\x82\x01x", b"\r\n\r\n"):
        assert sniroute_carrier.parse_answer(bytearray(head + rest)) == Answer(status, headers, len(head))


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
        sniroute_carrier.parse_answer(data)


def test_a_head_may_be_64_kib():
    start = b"HTTP/1.1 200 OK\r\nX: "
    head = start + b"x" * (HEAD_MAX - len(start) - 4) + b"\r\n\r\n"
    assert sniroute_carrier.parse_answer(head).end == HEAD_MAX
    assert sniroute_carrier.parse_answer(head[:-1]) is None
    with pytest.raises(Malformed):
        sniroute_carrier.parse_answer(head.replace(b": ", b": x"))


def test_connect_request():
    proxy = Proxy("proxy", 1, "")
    assert sniroute_carrier.connect_request(Target("app", 443, "/x"), proxy) == (
        b"CONNECT app:443 HTTP/1.1\r\nHost: app:443\r\n\r\n")
    assert sniroute_carrier.connect_request(Target("::1", 9, "/"), proxy._replace(authorization="Basic dTpw")) == (
        b"CONNECT [::1]:9 HTTP/1.1\r\nHost: [::1]:9\r\nProxy-Authorization: Basic dTpw\r\n\r\n")


@pytest.mark.parametrize("target, host", [
    pytest.param(Target("app", 443, "/"), b"app", id="the usual port"),
    pytest.param(Target("app", 8443, "/"), b"app:8443", id="another port"),
    pytest.param(Target("app", 1443, "/"), b"app:1443", id="a port that ends like the usual one"),
    pytest.param(Target("::1", 443, "/"), b"[::1]", id="IPv6"),
    pytest.param(Target("::1", 9, "/"), b"[::1]:9", id="IPv6 and another port"),
])
def test_request_names_the_host(target, host):
    assert sniroute_carrier.request(target, KEY, []) == (
        b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nUser-Agent: sniroute/" + sniroute_carrier.__version__.encode() +
        b"\r\nConnection: Upgrade\r\nSec-WebSocket-Key: " + KEY.encode() +
        b"\r\nSec-WebSocket-Version: 13\r\nUpgrade: websocket\r\n\r\n")


def test_request_keeps_path_and_headers_but_its_own():
    own = [(name.title(), "evil") for name in sniroute_carrier.OWN_HEADERS]
    lines = sniroute_carrier.request(Target("app", 443, "/x?y=1"), KEY, [("A", "1"), *own, ("a", "2"),
                                                                         ("Sec-WebSocket-Protocol", "p")])
    assert lines.startswith(b"GET /x?y=1 HTTP/1.1\r\n") and b"evil" not in lines
    assert b"\r\nA: 1\r\na: 2\r\nSec-WebSocket-Protocol: p\r\n" in lines


@pytest.mark.parametrize("status, length, wanted", [
    pytest.param(200, "100", 0, id="no error"),
    pytest.param(404, "100", 0, id="the client's error"),
    pytest.param(530, "100", 100, id="a short page"),
    pytest.param(530, "1000000", 8192, id="a long page"),
    pytest.param(530, "9" * 60_000, 8192, id="more digits than int() takes"),
    pytest.param(530, "-1", 0, id="no length"),
    pytest.param(530, "\u00b2", 0, id="no digits"),
    pytest.param(530, None, 0, id="none said"),
])
def test_wants_body(status, length, wanted):
    headers = {} if length is None else {"content-length": length}
    assert sniroute_carrier.wants_body(Answer(status, headers, 0)) == wanted


UPGRADED = {"upgrade": "websocket", "connection": "Upgrade", "sec-websocket-accept": ACCEPT}


@pytest.mark.parametrize("headers", [
    pytest.param({}, id="usual"),
    pytest.param({"upgrade": "WebSocket", "connection": "keep-alive, UPGRADE"}, id="case, and more words"),
    pytest.param({"sec-websocket-extensions": "", "sec-websocket-protocol": "p"}, id="no extension"),
])
def test_judge_lets_an_upgrade_through(headers):
    sniroute_carrier.judge(Answer(101, {**UPGRADED, **headers}, 0), b"", KEY)


@pytest.mark.parametrize("status, headers, body, reason, detail", [
    pytest.param(101, {**UPGRADED, "upgrade": "h2c"}, b"", "other", "HTTP 101 that is no upgrade to websocket",
                 id="another upgrade"),
    pytest.param(101, {**UPGRADED, "connection": "upgraded"}, b"", "other", "HTTP 101 that is no upgrade to websocket",
                 id="another connection"),
    pytest.param(101, {}, b"", "other", "HTTP 101 that is no upgrade to websocket", id="no headers"),
    pytest.param(101, {**UPGRADED, "sec-websocket-accept": ACCEPT.lower()}, b"", "other",
                 "HTTP 101 with a wrong Sec-WebSocket-Accept", id="wrong accept"),
    pytest.param(101, {**UPGRADED, "sec-websocket-extensions": "x"}, b"", "other",
                 "HTTP 101 with an extension that was not asked for", id="an extension"),
    pytest.param(302, {"location": "https://t.example.com/cdn-cgi/access/login/app?kid=s3cret"}, b"", "login",
                 "HTTP 302", id="login"),
    pytest.param(302, {"location": "/cdn-cgi/access/login"}, b"", "login", "HTTP 302", id="login, relative"),
    pytest.param(301, {"location": "https://t.example.com/cdn-cgi/access/login"}, b"", "other",
                 "HTTP 301 to https://t.example.com/cdn-cgi/access/login: a web application?",
                 id="only 302 is a login"),
    pytest.param(302, {"location": "https://app.example.com/x?token=s3cret"}, b"", "other",
                 "HTTP 302 to https://app.example.com/x: a web application?", id="another redirect"),
    pytest.param(307, {}, b"", "other", "HTTP 307 to ://: a web application?", id="a redirect to nowhere"),
    pytest.param(302, {"location": "https://[x/"}, b"", "other", "HTTP 302 to what is no URL", id="no URL"),
    pytest.param(401, {}, b"", "denied", "HTTP 401", id="401"),
    pytest.param(403, {}, b"", "denied", "HTTP 403", id="403"),
    pytest.param(404, {}, b"", "not_found", "HTTP 404", id="404"),
    pytest.param(502, {}, b"Bad gateway", "origin", "HTTP 502", id="502"),
    pytest.param(530, {}, b"error code: 1033", "down", "HTTP 530, error 1033", id="530"),
    pytest.param(530, {}, b"<h1>Error\n1016</h1>", "down", "HTTP 530", id="an error across lines is none"),
    pytest.param(530, {}, b"<title>Error 1033</title>", "down", "HTTP 530, error 1033", id="530 as a page"),
    pytest.param(500, {}, b"", "other", "HTTP 500", id="500"),
    pytest.param(200, {}, b"", "other", "HTTP 200", id="200"),
    pytest.param(426, {}, b"", "other", "HTTP 426", id="426"),
])
def test_judge(status, headers, body, reason, detail):
    with pytest.raises(Failed) as caught:
        sniroute_carrier.judge(Answer(status, headers, 0), body, KEY)
    assert (caught.value.reason, str(caught.value)) == (reason, detail)
    assert reason in REASONS and "s3cret" not in detail


def test_no_answer_but_an_upgrade_is_let_through_and_none_breaks_the_program():
    """An exception other than Failed would end every connection of the process."""
    chance = random.Random(2)
    for _ in range(3000):
        status = chance.choice((101, 200, 302, 404, 530))
        words = ("location", "upgrade", "connection", "sec-websocket-accept", "content-length")
        headers = {name: "".join(chance.choices("/:[]@?#%.a0\u00e9\x7f\t", k=chance.randrange(12))) for name in words}
        answer = Answer(status, headers, 0)
        sniroute_carrier.wants_body(answer)
        with pytest.raises(Failed):
            sniroute_carrier.judge(answer, chance.randbytes(20), KEY)


# -- WebSocket ---------------------------------------------------------------------------------


def masked(data: bytes, key: bytes) -> bytes:
    """As RFC 6455 section 5.3 has it."""
    return bytes(byte ^ key[at % 4] for at, byte in enumerate(data))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 7, 8, 125, 1000, CHUNK - 1, CHUNK, CHUNK + 1])
def test_mask(size):
    data = NOISE[:size]
    for key in (b"\0\0\0\0", b"\1\2\3\4", b"\xff\xfe\xfd\xfc", b"\0\0\0\xff"):
        assert sniroute_carrier.mask(data, key) == masked(data, key)


def test_mask_of_the_standard():
    assert sniroute_carrier.mask(b"Hello", bytes.fromhex("37fa213d")) == bytes.fromhex("7f9f4d5158")  # RFC 6455 5.7


@pytest.mark.parametrize("opcode, size, head", [
    pytest.param(BINARY, 0, b"\x82\x80", id="empty"),
    pytest.param(PONG, 125, b"\x8a\xfd", id="the longest short one"),
    pytest.param(BINARY, 126, b"\x82\xfe\x00\x7e", id="the shortest long one"),
    pytest.param(BINARY, CHUNK, b"\x82\xfe\x3f\xf8", id="the longest"),
])
def test_frame(opcode, size, head):
    made = sniroute_carrier.frame(opcode, NOISE[:size])
    assert made.startswith(head) and len(made) == len(head) + 4 + size
    assert masked(made[len(head) + 4:], made[len(head):len(head) + 4]) == NOISE[:size]


def test_a_full_message_is_what_the_far_end_takes_and_fits_a_record():
    made = sniroute_carrier.frame(BINARY, NOISE[:CHUNK])
    assert CHUNK <= 16384 and len(made) <= 16384
    keys = {sniroute_carrier.frame(BINARY, b"x" * 200)[4:8] for _ in range(100)}
    assert len(keys) == 100


def server_frame(opcode: int, data: bytes, fin: bool = True, extended: int | None = None) -> bytes:
    """A frame as servers send it; `extended`: how many bytes its length has, beside the usual one."""
    size = len(data)
    extended = extended if extended is not None else 0 if size < 126 else 2 if size < 65536 else 8
    short = {0: size, 2: 126, 8: 127}[extended]
    return bytes((0x80 * fin | opcode, short)) + (size.to_bytes(extended, "big") if extended else b"") + data


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


# -- the log -----------------------------------------------------------------------------------


@contextlib.contextmanager
def captured() -> Iterator[int]:
    """A pipe in the place of stderr: its reading end."""
    reader, writer = os.pipe()
    kept = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    try:
        yield reader
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        with contextlib.suppress(OSError):  # the test has closed it
            os.close(reader)


def test_lines_for_people_and_for_programs():
    with captured() as stderr:
        log = Log("info", as_json=False)
        log("debug", "not this one")
        log("info", "a\nb", event="e", client="1.2.3.4:5", listener="", error='x"\u00e9\n')
        log("error", "x" * 500)
        Log("debug", as_json=True)("warn", "m\n", event="e", client="", error="q\"\\")
        first, second, third, rest = os.read(stderr, 65536).split(b"\n")
        assert re.fullmatch(rb'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INF a\?b client="1.2.3.4:5" error="x\\"\?\?"', first)
        assert second.endswith(b" ERR " + b"x" * 397 + b"...") and rest == b""
        row = json.loads(third)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row.pop("time"))
        assert row == {"level": "warn", "event": "e", "error": "q\"\\", "message": "m?"}


def test_the_longest_line_is_whole_and_is_json():
    with captured() as stderr:
        worst = "\\" * 100_000
        Log("info", as_json=True)("error", worst, event="closed", listener=worst, error=worst)
        line = os.read(stderr, 65536)
        assert json.loads(line)["event"] == "closed" and len(line) <= 4096


def test_a_log_that_nobody_reads_neither_waits_nor_grows():
    with captured() as stderr:
        log = Log("info", as_json=True)
        for number in range(3 * LINES_MAX):
            log("info", f"line {number} " + "x" * 200)
        assert len(log.lines) == LINES_MAX and log.lost > 0
        lost, read = log.lost, b""
        while log.lines:
            read += os.read(stderr, 65536)
            log.flush()
        read += os.read(stderr, 65536)
        rows = [json.loads(line)["message"] for line in read.splitlines()]
        assert rows[-1] == f"{lost} lines were lost: nobody read the log"
        assert [row.split()[1] for row in rows[:-1]] == [str(number) for number in range(3 * LINES_MAX - lost)]
        assert log.lost == 0


def test_a_log_that_nobody_can_read_forgets():
    with captured() as stderr:
        os.close(stderr)
        log = Log("info", as_json=True)
        for number in range(10):
            log("info", f"line {number}")
        assert not log.lines


def test_no_address_is_shown_as_none():
    show = sniroute_carrier.show_address
    assert [show(("1.2.3.4", 5)), show(("::1", 5, 0, 0)), show(""), show(None)] == ["1.2.3.4:5", "[::1]:5", "", ""]


@pytest.mark.parametrize("families, order", [
    pytest.param("", "", id="none"),
    pytest.param("6", "6", id="one"),
    pytest.param("4444", "4444", id="one family"),
    pytest.param("6644", "6464", id="as many of each"),
    pytest.param("666644", "646466", id="more of the first"),
    pytest.param("64444", "64444", id="more of the other"),
    pytest.param("4666", "4666", id="the first stays first"),
    pytest.param("6" * 6 + "4" * 6, "64646464", id="eight at most"),
])
def test_alternate(families, order):
    rows = [(int(family), number) for number, family in enumerate(families)]
    mixed = sniroute_carrier.alternate(rows)
    assert "".join(str(family) for family, _ in mixed) == order
    for kind in (4, 6):
        numbers = [number for family, number in mixed if family == kind]
        assert numbers == sorted(numbers)


# -- what carries ------------------------------------------------------------------------------

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def edge(tmp_path_factory, certificates) -> Iterator[Edge]:
    """One edge for all: it reads its switches anew for each connection, and they go by hostname."""
    program = Edge(tmp_path_factory.mktemp("edge"), certificates)
    yield program
    program.stop()


@pytest.fixture
def name() -> str:
    """A hostname that no other test uses."""
    return f"app-{next(numbers)}.example.test"


class Notes(Log):
    """A log that is kept."""

    def __init__(self) -> None:
        super().__init__("debug", as_json=True)
        self.rows: list[dict[str, str]] = []

    def __call__(self, level: str, message: str, **fields: str) -> None:
        self.rows.append({"level": level, "message": message, **{key: value for key, value in fields.items() if value}})


class Rows:
    """What both kinds of carriers tell."""

    address: Address

    def rows(self, event: str) -> list[dict[str, str]]:
        raise NotImplementedError

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, 10)

    def failure(self) -> dict[str, str]:
        """The log's one line about the one client that could not be served."""
        row, = wait_until(lambda: self.rows("failed"))
        return row

    def ends(self, count: int = 1) -> list[dict[str, str]]:
        """The log's lines about the connections that are over."""
        return wait_until(lambda: len(self.rows("end")) >= count and self.rows("end"), what=f"{count} ends")


class Local(Rows):
    """A carrier in a thread of the test."""

    def __init__(self, hostname: str, proxy: Address | None, no_proxy: str = "", headers: Any = ()):
        self.log = Notes()
        self.carrier = Carrier(self.log, list(headers), proxy and Proxy(*proxy, ""), no_proxy)
        listener = self.carrier.listen(sniroute_carrier.parse_target(hostname), (HOST, 0))
        self.address = listener.sock.getsockname()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, name="carrier")
        self.thread.start()

    def run(self) -> None:
        try:
            self.carrier.run()
        except BaseException as error:
            self.error = error
            raise

    def rows(self, event: str) -> list[dict[str, str]]:
        return [row for row in self.log.rows if row.get("event") == event]

    def states(self) -> list[str]:
        return [connection.state for connection in self.carrier.connections.copy()]

    def reaches(self, *states: str) -> None:
        """Wait until the connections are in these states."""
        wait_until(lambda: sorted(self.states()) == sorted(states), what=f"{states}, not {self.states()}")

    def close(self) -> None:
        self.carrier.call(self.carrier.stop)
        self.thread.join(10)
        assert not self.thread.is_alive() and self.error is None
        assert not self.carrier.connections and not self.carrier.listeners
        assert not any(queue.due for queue in self.carrier.queues), "something is due"
        assert not self.rows("fault"), self.rows("fault")


@pytest.fixture
def local(edge, monkeypatch) -> Iterator[Callable[..., Local]]:
    """local(hostname, proxy=True, CONSTANT=..., **options of Local) -> Local."""
    monkeypatch.setenv("SSL_CERT_FILE", edge.environ["SSL_CERT_FILE"])
    with contextlib.ExitStack() as stack:
        def make(hostname: str, proxy: bool | Address = True, **options: Any) -> Local:
            options.setdefault("GRACE", 0.1)
            for constant in [option for option in options if option.isupper()]:
                monkeypatch.setattr(sniroute_carrier, constant, options.pop(constant))
            made = Local(hostname, edge.proxy if proxy is True else proxy or None, **options)
            stack.callback(made.close)
            return made

        yield make


class Program(Rows):
    """The real program, as a child."""

    def __init__(self, words: list[str], environ: dict[str, str], stdin: Any = subprocess.DEVNULL,
                 stdout: Any = subprocess.PIPE, prepare: str = "carrier.GRACE = 0.1", **options: Any):
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import sniroute_carrier as carrier; {prepare}\n" \
               "sys.exit(carrier.main())"
        coverage = {key: value for key, value in os.environ.items() if key.startswith("COVERAGE")}
        environ = {"TUNNEL_LOG_OUTPUT": "json", **coverage, **environ}
        flags = [] if coverage else ["-IS"]  # as the router runs it, but that coverage comes by way of site
        self.process = subprocess.Popen([sys.executable, *flags, "-c", code, *words], stdin=stdin, stdout=stdout,
                                        stderr=subprocess.PIPE, env=environ, **options)
        self.pid = self.process.pid
        self.errors = b""
        self.drained = threading.Event()
        self.ended = False
        self.thread = threading.Thread(target=self.drain, name="stderr")
        self.thread.start()

    def drain(self) -> None:
        while data := os.read(self.process.stderr.fileno(), 65536):
            self.errors += data

    def all_rows(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.errors.splitlines(keepends=True) if line.endswith(b"\n")]

    def rows(self, event: str) -> list[dict[str, str]]:
        return [row for row in self.all_rows() if row.get("event") == event]

    def listening(self, count: int = 1) -> list[Address]:
        """Where it listens; these are ready, since the line comes after the fact."""
        rows = wait_until(lambda: len(self.rows("listening")) >= count and self.rows("listening")
                          or self.process.poll() is not None, what=f"{count} listeners")
        assert rows is not True, self.errors
        addresses = [row["listener"].rpartition(":") for row in rows]
        self.address = addresses[0][0], int(addresses[0][2])
        return [(host, int(port)) for host, _, port in addresses]

    def tell(self, *lines: str) -> None:
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.process.stdin.flush()

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """KiB."""
        return int(re.search(r"VmRSS:\s*(\d+)", pathlib.Path(f"/proc/{self.pid}/status").read_text())[1])

    def cpu(self) -> float:
        """Seconds."""
        words = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def end(self, number: int | None = signal.SIGTERM) -> int:
        """Its exit code; without a signal it ends by itself."""
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(20)
        self.close()
        return code

    def close(self) -> None:
        """However the test went."""
        if self.ended:
            return
        self.ended = True
        self.process.kill() if self.process.poll() is None and not self.quits() else None
        self.process.wait()
        self.thread.join(10)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what is in its buffer has no reader
                    pipe.close()
        for word in (b"Traceback", b"Fatal", b"a fault in the carrier"):
            assert word not in self.errors, self.errors.decode()

    def quits(self) -> bool:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        return self.process.returncode is not None


@pytest.fixture
def program(edge) -> Iterator[Callable[..., Program]]:
    """program(*words, environ=the edge's, prepare=statements before main(), **options of Popen) -> Program."""
    with contextlib.ExitStack() as stack:
        def make(*words: str, environ: dict[str, str] = edge.environ, **options: Any) -> Program:
            made = Program(list(words), environ, **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def carrier(program) -> Callable[..., Program]:
    """carrier(hostname, *words, ...) -> Program that listens."""
    def make(hostname: str, *words: str, **options: Any) -> Program:
        made = program("access", "tcp", "--hostname", hostname, "--url", f"{HOST}:0", *words, **options)
        made.listening()
        return made

    return make


def receive(sock: socket.socket, size: int) -> bytes:
    """So many bytes, or less at the end."""
    data = bytearray()
    while len(data) < size and (more := sock.recv(min(1 << 20, size - len(data)))):
        data += more
    return bytes(data)


def receive_all(sock: socket.socket) -> tuple[bytes, str]:
    """Everything, and what the end was."""
    data = bytearray()
    try:
        while more := sock.recv(1 << 20):
            data += more
    except ConnectionError:
        return bytes(data), "RST"
    return bytes(data), "FIN"


@contextlib.contextmanager
def beside(act: Callable[[], Any]) -> Iterator[None]:
    """Do something in a thread meanwhile; a lost connection is no failure."""
    def run() -> None:
        with contextlib.suppress(OSError):
            act()

    thread = threading.Thread(target=run, name="beside")
    thread.start()
    try:
        yield
    finally:
        thread.join(30)
        assert not thread.is_alive()


def echoed(rows: Rows, data: bytes = b"hello") -> bytes:
    """What comes back."""
    with rows.connect() as client, beside(lambda: client.sendall(data)):
        return receive(client, len(data))


def parallel(address: Address, payloads: list[bytes], timeout: float = 30.0) -> list[bytes]:
    """What comes back on as many connections at once."""
    answers = [bytearray() for _ in payloads]
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for number, payload in enumerate(payloads):
            sock = stack.enter_context(socket.create_connection(address, 10))
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, [number, memoryview(payload)])
        deadline = time.monotonic() + timeout
        while selector.get_map():
            assert time.monotonic() < deadline
            for key, mask in selector.select(1):
                number, rest = key.data
                if mask & selectors.EVENT_WRITE:
                    key.data[1] = rest = rest[key.fileobj.send(rest):]
                    if not rest:
                        selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
                if mask & selectors.EVENT_READ:
                    answers[number] += key.fileobj.recv(1 << 18)
                    if len(answers[number]) >= len(payloads[number]):
                        selector.unregister(key.fileobj)
    return [bytes(answer) for answer in answers]


def blocks(count: int) -> Iterator[bytes]:
    """So many MiB, no two the same."""
    for number in range(count):
        yield number.to_bytes(8, "big") + NOISE[8:]


def digest(count: int) -> bytes:
    whole = hashlib.sha256()
    for block in blocks(count):
        whole.update(block)
    return whole.digest()


def send_blocks(count: int) -> Callable[[socket.socket], None]:
    """A handler that says so many MiB, and ends."""
    def handler(sock: socket.socket) -> None:
        for block in blocks(count):
            sock.sendall(block)

    return handler


def digest_upload(sock: socket.socket) -> None:
    """A handler that is told a size, and answers with the digest of that many bytes."""
    left = int.from_bytes(receive(sock, 8), "big")
    whole = hashlib.sha256()
    while left and (data := sock.recv(1 << 18)):
        whole.update(data)
        left -= len(data)
    sock.sendall(whole.digest())
    sock.recv(1)


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def end_of(edge: Edge, hostname: str) -> dict[str, Any]:
    """The edge's record of the one connection of this hostname, once it is over."""
    row, = wait_until(lambda: edge.ends(hostname), what="the edge's end")
    return row


@pytest.fixture
def raw_edge(serve, certificates) -> Callable[..., str]:
    """raw_edge(script) -> hostname: an edge that upgrades, and then does what `script(its TLS socket)` does."""
    def make(script: Callable[[ssl.SSLSocket], None], answer: bytes | None = None) -> str:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "edge.pem")

        def handler(sock: socket.socket) -> None:
            with context.wrap_socket(sock.dup(), server_side=True) as tls:
                head = b""
                while b"\r\n\r\n" not in head:
                    data = tls.recv(65536)
                    if not data:
                        return
                    head += data
                key = re.search(rb"Sec-WebSocket-Key: (\S+)", head)[1]
                accept = base64.b64encode(hashlib.sha1(key + sniroute_carrier.ACCEPT_GUID.encode()).digest())
                tls.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n" if answer is None else answer)
                script(tls)

        return f"localhost:{serve(handler).address[1]}"

    return make


def wait_for_end(tls: ssl.SSLSocket) -> None:
    """Read until the client has left."""
    while tls.recv(65536):
        pass


def read_frames(tls: ssl.SSLSocket, frames: list[tuple[int, bytes]]) -> None:
    """Note the client's frames until it has left."""
    data = b""
    while more := tls.recv(65536):
        data += more
        while len(data) >= 6:
            size, start = data[1] & 0x7F, 2
            if size == 126:
                size, start = int.from_bytes(data[2:4], "big"), 4
            if len(data) < start + 4 + size:
                break
            frames.append((data[0] & 0x0F, masked(data[start + 4:start + 4 + size], data[start:start + 4])))
            data = data[start + 4 + size:]


# -- what comes through ------------------------------------------------------------------------


def test_bytes_are_carried_in_messages_that_the_far_end_takes(edge, name, carrier, echo_server):
    edge.far(name, echo_server.address)
    run = carrier(name)
    data = NOISE[:700_000]
    assert echoed(run, data) == data
    end = end_of(edge, name)
    assert end["bytes_up"] == end["bytes_down"] == len(data)
    assert end["largest_up"] <= CHUNK and not end["cut"] and end["texts"] == 0
    assert end["frames_up"] == end["messages_up"] + 1, "whole messages, and a Close"
    assert end["masks"] == end["frames_up"], "a fresh key for each"
    assert end["client_pings"] == end["unsolicited"] == 0
    assert (end["how"], end["close"]) == ("client", 1000)
    request, = edge.requests(name)
    assert (request["host"], request["method"], request["path"]) == (name, "GET", "/")
    assert (request["sni"], request["alpn"], request["tls"]) == (name, None, "TLSv1.3")
    assert [header[0] for header in request["headers"]] == [
        "Host", "User-Agent", "Connection", "Sec-WebSocket-Key", "Sec-WebSocket-Version", "Upgrade"]
    row, = run.ends() if run.rows("end") else [{}]
    assert row == {} or (row["up"], row["down"]) == ("700000", "700000")


def test_a_service_may_speak_first(edge, name, local, serve):
    edge.far(name, serve(lambda sock: sock.sendall(b"banner")).address)
    with local(name).connect() as client:
        assert receive_all(client) == (b"banner", "FIN")


@pytest.mark.parametrize("switches", [
    pytest.param({"text": True}, id="text"),
    pytest.param({"empty": True}, id="empty messages"),
    pytest.param({"fragment": 1000}, id="fragments"),
    pytest.param({"fragment": 1000, "ping": 125, "empty": True}, id="pings between fragments"),
    pytest.param({"ping": 0}, id="pings without a payload"),
    pytest.param({"frame": 1 << 20}, id="messages of 1 MiB"),
    pytest.param({"frame": 125}, id="short messages"),
    pytest.param({"frame": 65535}, id="16-bit lengths"),
    pytest.param({"drip": True, "ping": 3, "fragment": 5}, id="byte by byte"),
    pytest.param({"together": True}, id="in one record with the answer"),
    pytest.param({"tls_max": "1.2"}, id="TLS 1.2"),
])
def test_shapes_of_what_comes_down(edge, name, local, serve, switches):
    edge.fault(name, **switches)
    data = NOISE[:40_000 if switches.get("fragment") == 5 or switches.get("frame") == 125 else len(NOISE)]
    edge.far(name, serve(lambda sock: sock.sendall(data)).address)
    with local(name).connect() as client:
        assert receive_all(client) == (data, "FIN")
    end = end_of(edge, name)
    assert (end["how"], end["close"], end["client_pings"], end["unsolicited"]) == ("origin", 1000, 0, 0)
    assert "ping" not in switches or end["pings"] > 0


def test_pings_are_answered_between_whole_frames(edge, name, local, echo_server):
    """The edge understands every frame, and finds the payload of its Pings in the Pongs."""
    edge.fault(name, ping=100, ping_every=1)
    edge.far(name, echo_server.address)
    run = local(name)
    data = NOISE * 4
    with run.connect() as client:
        with beside(lambda: client.sendall(data)):
            assert receive(client, len(data)) == data
        client.sendall(b"last")
        assert receive(client, 4) == b"last"
    end = end_of(edge, name)
    assert end["pongs"] > 0 and end["unsolicited"] == 0 and (end["how"], end["close"]) == ("client", 1000)
    assert end["bytes_up"] == len(data) + 4 and end["frames_up"] == end["messages_up"] + end["pongs"] + 1


def test_an_idle_connection_answers_each_ping(edge, name, local, echo_server):
    edge.fault(name, ping=4, ping_every=20)
    edge.far(name, echo_server.address)
    with local(name).connect() as client:
        client.sendall(b"x")
        receive(client, 1)
        time.sleep(0.2)  # some pings
        client.sendall(b"y")
        receive(client, 1)
    end = end_of(edge, name)
    assert end["pongs"] >= end["pings"] - 1 >= 3 and end["unsolicited"] == 0


def test_64_mib_up(edge, name, carrier, serve):
    edge.far(name, serve(digest_upload).address)
    run = carrier(name)
    with run.connect() as client:
        client.sendall((64 << 20).to_bytes(8, "big"))
        for block in blocks(64):
            client.sendall(block)
        assert receive(client, 32) == digest(64)
    end = end_of(edge, name)
    assert not end["cut"] and end["masks"] == 1000


def test_64_mib_down(edge, name, carrier, serve):
    edge.far(name, serve(send_blocks(64)).address)
    run = carrier(name)
    whole, size = hashlib.sha256(), 0
    with run.connect() as client:
        while data := client.recv(1 << 20):
            whole.update(data)
            size += len(data)
    assert (size, whole.digest()) == (64 << 20, digest(64))


def test_both_ways_at_once_byte_for_byte(edge, name, local, serve):
    def backend(sock: socket.socket) -> bytes:
        with beside(lambda: send_blocks(6)(sock)):
            return receive(sock, 6 << 20)

    far = serve(backend)
    edge.far(name, far.address)
    edge.fault(name, fragment=5000, ping=7)
    data = NOISE * 6
    with local(name).connect() as client, beside(lambda: client.sendall(data)):
        answer = receive_all(client)
    assert answer == (b"".join(blocks(6)), "FIN") and far.result() == data


def test_200_connections_at_once(edge, name, carrier, single_loop_echo):
    edge.far(name, single_loop_echo)
    run = carrier(name)
    payloads = [number.to_bytes(4, "big") + NOISE[number:number + (128 << 10)] for number in range(200)]
    answers = parallel(run.address, payloads)
    assert [got == sent for got, sent in zip(answers, payloads)] == [True] * 200
    wait_until(lambda: len(edge.ends(name)) == 200)
    assert {(end["how"], end["cut"]) for end in edge.ends(name)} == {("client", False)}


# -- backpressure ------------------------------------------------------------------------------


def settled(count: Callable[[], int]) -> int:
    """A count, once it has not moved for a while."""
    deadline, last, since = time.monotonic() + 20, -1, 0.0
    while last != (now := count()) or time.monotonic() - since < 0.3:
        assert time.monotonic() < deadline
        if now != last:
            last, since = now, time.monotonic()
        time.sleep(0.02)
    return last


@linux
def test_an_edge_that_does_not_read_stops_the_client_and_costs_nothing(edge, name, carrier, echo_server):
    edge.far(name, echo_server.address)
    run = carrier(name)
    assert echoed(run) == b"hello"
    edge.fault(name, slow_reads=True)
    sent = 0
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(run.connect()) for _ in range(4)]
        memory = run.memory()

        def push() -> int:
            nonlocal sent
            for client in clients:
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent += client.send(NOISE)
            return sent

        assert settled(push) > 4 << 16
        cpu = run.cpu()
        assert settled(push) == sent
        assert run.cpu() - cpu <= 0.05, "it spins"
        assert run.memory() - memory < 8192


@linux
def test_a_client_that_does_not_read_stops_the_service_and_loses_nothing(edge, name, carrier, serve):
    sent = 0

    def far(sock: socket.socket) -> None:
        nonlocal sent
        for block in blocks(256):
            for at in range(0, len(block), 1 << 16):
                sent += sock.send(block[at:at + (1 << 16)])

    edge.far(name, serve(far).address)
    run = carrier(name)
    with run.connect() as client:
        assert receive(client, 8) == bytes(8)
        memory = run.memory()
        assert settled(lambda: sent) < 100 << 20
        cpu = run.cpu()
        time.sleep(0.3)
        assert run.cpu() - cpu <= 0.05, "it spins"
        assert run.memory() - memory < 8192
        expected = b"".join(blocks(24))
        assert receive(client, (24 << 20) - 8) == expected[8:]


# -- why a client cannot be served -------------------------------------------------------------


def refused(run: Rows) -> dict[str, str]:
    """The log's line, after the client has seen RST and not a byte."""
    with contextlib.suppress(ConnectionResetError):  # it may come before connect() has returned
        with run.connect() as client:
            assert receive_all(client) == (b"", "RST")
    return run.failure()


@pytest.mark.parametrize("switches, reason, error", [
    pytest.param({"cert": "untrusted"}, "certificate", "unable to get local issuer certificate", id="untrusted"),
    pytest.param({"cert": "expired"}, "certificate", "certificate has expired", id="expired"),
    pytest.param({"cert": "wrong_name"}, "certificate", "Hostname mismatch.*", id="wrong name"),
    pytest.param({"rst": "accept"}, "reset", "in the TLS handshake|.*Connection reset by peer",
                 id="reset before the hello",  # where it falls into wrap_socket(), Python 3.11 forgets to close
                 marks=pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")),
    pytest.param({"rst": "tls"}, "reset", "in the TLS handshake", id="reset in the handshake"),
    pytest.param({"rst": "upgrade"}, "reset", "before its answer.*", id="reset in the upgrade"),
    pytest.param({"eof": "accept"}, "reset", "in the TLS handshake", id="end before the hello"),
    pytest.param({"eof": "tls"}, "reset", "in the TLS handshake", id="end in the handshake"),
    pytest.param({"eof": "upgrade"}, "reset", "before its answer", id="end in the upgrade"),
    pytest.param({"proxy_rst": True}, "reset", "the proxy: Connection reset by peer", id="the proxy resets"),
    pytest.param({"proxy_status": 407}, "proxy", "HTTP 407", id="proxy 407"),
    pytest.param({"proxy_status": 502}, "proxy", "HTTP 502", id="proxy 502"),
    pytest.param({"proxy_garbage": True}, "proxy", "it is no HTTP", id="proxy garbage"),
    pytest.param({"service_token": ["id", "other"]}, "login", "HTTP 302", id="login"),
    pytest.param({"deny": 401}, "denied", "HTTP 401", id="401"),
    pytest.param({"deny": 403}, "denied", "HTTP 403", id="403"),
    pytest.param({"status": 404}, "not_found", "HTTP 404", id="404"),
    pytest.param({"far": None}, "origin", "HTTP 502", id="502"),
    pytest.param({"status": 530, "body": "error code: 1033"}, "down", "HTTP 530, error 1033", id="530"),
    pytest.param({"status": 530, "body": "error code: 1033", "split_body": 50}, "down", "HTTP 530, error 1033",
                 id="530, its body later"),
    pytest.param({"status": 301, "location": "https://app.example.com/x?s3cret"}, "other",
                 "HTTP 301 to https://app.example.com/x: a web application\\?", id="301"),
    pytest.param({"status": 302, "location": "https://[x"}, "other", "HTTP 302 to what is no URL", id="302 to no URL"),
    pytest.param({"status": 500, "body": "x" * 20_000}, "other", "HTTP 500", id="500, a long page"),
    pytest.param({"status": 426}, "other", "HTTP 426", id="426"),
    pytest.param({"answer": "bad_accept"}, "other", "HTTP 101 with a wrong Sec-WebSocket-Accept", id="bad accept"),
    pytest.param({"answer": "no_upgrade"}, "other", "HTTP 101 that is no upgrade to websocket", id="no Upgrade"),
    pytest.param({"answer": "no_connection"}, "other", "HTTP 101 that is no upgrade to websocket", id="no Connection"),
    pytest.param({"answer": "extensions"}, "other", "HTTP 101 with an extension that was not asked for",
                 id="extensions"),
    pytest.param({"answer": "http10"}, "other", "HTTP/1.0, which has no 101", id="HTTP/1.0"),
    pytest.param({"answer": "garbage"}, "other", "it is no HTTP", id="garbage"),
    pytest.param({"answer": "huge"}, "other", "a head of more than 65536 bytes", id="a head without end"),
])
def test_failures_are_told_apart(edge, name, local, echo_server, switches, reason, error):
    if "far" not in switches:
        edge.far(name, echo_server.address)
    edge.fault(name, **switches)
    run = local(name, headers=[("Cf-Access-Client-Id", "id"), ("Cf-Access-Client-Secret", "s3cret")])
    row = refused(run)
    assert row["reason"] == reason and re.fullmatch(error, row["error"]), row
    assert row["message"] == f"{name}: {REASONS[reason]}" and row["level"] == "error"
    assert row["listener"] == sniroute_carrier.show_address(run.address) and row["client"].startswith(HOST)
    assert "s3cret" not in str(run.log.rows)


def test_a_failure_is_seen_also_by_a_client_that_has_spoken(edge, name, local):
    edge.fault(name, deny=403)
    run, said = local(name), threading.Event()
    run.carrier.call(lambda: said.wait(10))  # its loop cannot fail before the client has spoken
    with run.connect() as client:
        client.sendall(b"hello")
        said.set()
        assert receive_all(client) == (b"", "RST")


def test_a_name_that_does_not_resolve(local):
    row = refused(local("nothing.invalid", proxy=False))
    assert row["reason"] in ("name", "resolver") and row["error"], "the second where nobody is there to be asked"


@pytest.mark.parametrize("code, reason", [(socket.EAI_NONAME, "name"), (socket.EAI_AGAIN, "resolver")])
@pytest.mark.parametrize("proxied", [False, True], ids=["edge", "proxy"])
def test_a_name_that_is_not_there_and_a_resolver_that_is_not(local, monkeypatch, code, reason, proxied):
    def fail() -> list[Address]:
        raise socket.gaierror(code, "why not")

    asked = resolve_as(monkeypatch, fail)
    run = local("app.example.test", proxy=("proxy.example.test", 3128) if proxied else False)
    row = refused(run)
    if proxied:
        reason, error = "proxy", "proxy.example.test:3128: why not"
        assert asked == ["proxy.example.test"]
    else:
        error = "why not"
        assert asked == ["app.example.test"]
    assert (row["reason"], row["error"]) == (reason, error)
    assert row["message"] == f"app.example.test: {REASONS[reason]}"
    with contextlib.suppress(ConnectionResetError), run.connect() as client:  # a failure is not remembered
        assert receive_all(client) == (b"", "RST")
    wait_until(lambda: len(asked) == 2)


def test_what_is_no_name_for_the_resolver(local, monkeypatch):
    """getaddrinfo() raises UnicodeError for some; the program goes on."""
    resolve = socket.getaddrinfo

    def strange(host: str, *rest: Any, **options: Any) -> Any:
        if host == "strange.example.test":
            raise UnicodeError("label too long")
        return resolve(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", strange)
    assert refused(local("strange.example.test", proxy=False))["error"] == "it is no name"


def test_a_thread_too_few_is_no_end(local, monkeypatch):
    run = local("nothing.invalid", proxy=False)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert refused(run)["error"] == "can't start new thread"


@pytest.mark.parametrize("proxied", [False, True], ids=["edge", "proxy"])
def test_refused(local, free_ports, proxied):
    port, _ = free_ports(1)
    run = local("app.example.test", proxy=(HOST, port)) if proxied else local(f"localhost:{port}", proxy=False)
    row = refused(run)
    assert (row["reason"], row["error"]) == (("proxy", f"{HOST}:{port}: Connection refused") if proxied else
                                             ("refused", "Connection refused"))


def test_what_speaks_no_tls(local, serve):
    plain = serve(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n") or sock.recv(4096))
    row = refused(local(f"localhost:{plain.address[1]}", proxy=False))
    assert row["reason"] == "tls" and re.fullmatch("[A-Z_]+", row["error"])


@pytest.mark.parametrize("answer, reason, error", [
    pytest.param(b"HTTP/1.1 200 OK\r\n\r\nx", "proxy", "it said more than its answer", id="more"),
    pytest.param(b"HTTP/1.1 200 OK\r\n", "reset", "the proxy closed the connection", id="less"),
    pytest.param(b"", "reset", "the proxy closed the connection", id="nothing"),
])
def test_answers_that_no_proxy_may_give(local, serve, answer, reason, error):
    def proxy(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(answer)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(4096)

    row = refused(local("app.example.test", proxy=serve(proxy).address))
    assert (row["reason"], row["error"]) == (reason, error)


PHASES = [
    pytest.param({"proxy_hang": True}, "asking the proxy", id="proxy"),
    pytest.param({"hang": "accept"}, "TLS handshake", id="before the hello"),
    pytest.param({"hang": "tls"}, "TLS handshake", id="TLS"),
    pytest.param({"hang": "upgrade"}, "upgrade", id="upgrade"),
    pytest.param({"hang": "head"}, "upgrade", id="half an answer"),
]


@pytest.mark.parametrize("switches, phase", PHASES)
def test_timeout(edge, name, local, switches, phase):
    edge.far(name, edge.proxy)
    edge.fault(name, **switches)
    began = time.monotonic()
    row = refused(local(name, DIAL_TIMEOUT=0.15))
    assert (row["reason"], row["error"]) == ("timeout", f"0.15 s, {phase}") and time.monotonic() - began >= 0.15
    wait_until(lambda: edge.ends(name) or edge.lines("proxy.jsonl", name)[-1]["event"] == "end")


@linux
def test_timeout_of_the_connect(local, deaf):
    row = refused(local(f"localhost:{deaf[1]}", proxy=False, DIAL_TIMEOUT=0.15))
    assert (row["reason"], row["error"]) == ("timeout", "0.15 s, connecting")


def resolve_as(monkeypatch: pytest.MonkeyPatch, found: Callable[[], list[Address]]) -> list[str]:
    """Names resolve to what `found` says, addresses as ever: the list of names that were asked for."""
    asked, resolve = [], socket.getaddrinfo

    def getaddrinfo(host: str, *rest: Any, **options: Any) -> Any:
        if host == HOST:
            return resolve(host, *rest, **options)
        asked.append(host)
        return [(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
                for address in found()]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_timeout_of_the_name(local, monkeypatch):
    release = threading.Event()
    resolve_as(monkeypatch, lambda: [] if release.wait(10) else [])
    run = local("app.example.test", proxy=False, DIAL_TIMEOUT=0.15)
    row = refused(run)
    release.set()
    assert (row["reason"], row["error"]) == ("timeout", "0.15 s, resolving the name")
    wait_until(lambda: not run.carrier.names.waiting)


def test_timeout_of_an_error_page_tells_what_is_known(edge, name, local):
    """The status has come, and only the words behind it have not."""
    edge.fault(name, status=530, body="error code: 1033", split_body=400)
    row = refused(local(name, DIAL_TIMEOUT=0.15))
    assert (row["reason"], row["error"]) == ("down", "HTTP 530")


@pytest.mark.parametrize("proxy, reason, text", [
    pytest.param(None, "timeout", "no answer", id="edge"),
    pytest.param(Proxy("proxy", 3128, "Basic s3cret"), "proxy", "proxy:3128: no answer", id="proxy"),
])
def test_a_connect_that_the_kernel_gives_up_is_a_timeout(proxy, reason, text):
    failure = sniroute_carrier.connect_failure(OSError(errno.ETIMEDOUT, "no answer"), proxy)
    assert (failure.reason, str(failure)) == (reason, text)


def test_an_answer_with_an_error_page_that_breaks_off(local, raw_edge):
    """530, half a page, and a reset: the page is judged as it is."""
    def script(tls: ssl.SSLSocket) -> None:
        tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        time.sleep(0.05)  # so that the reset does not overtake it

    hostname = raw_edge(script, b"HTTP/1.1 530 x\r\nContent-Length: 1000\r\n\r\nerror code: 1033")
    row = refused(local(hostname, proxy=False))
    assert (row["reason"], row["error"]) == ("down", "HTTP 530, error 1033")


# -- who the client is, and the way there ------------------------------------------------------


@pytest.mark.parametrize("words, environ, wanted", [
    pytest.param([], {"TUNNEL_SERVICE_TOKEN_ID": "s3cret-id", "TUNNEL_SERVICE_TOKEN_SECRET": "s3cret-word"},
                 {"service_token": ["s3cret-id", "s3cret-word"]}, id="variables"),
    pytest.param([], {"CF_ACCESS_TOKEN": "s3cret-jwt"}, {"token": "s3cret-jwt"}, id="a token"),
    pytest.param(["--id", "s3cret-id", "--secret", "s3cret-word"], {"TUNNEL_SERVICE_TOKEN_ID": "s3cret-other"},
                 {"service_token": ["s3cret-id", "s3cret-word"]}, id="options win"),
    pytest.param(["--service-token-id=s3cret-id", "--service-token-secret=s3cret-word", "--destination", "db:1"], {},
                 {"service_token": ["s3cret-id", "s3cret-word"]}, id="long options"),
    pytest.param(["-H", "CF-Access-Token: s3cret-jwt", "--header", "X: a,b"], {"TUNNEL_SERVICE_DESTINATION": "db:1"},
                 {"token": "s3cret-jwt"}, id="headers"),
])
def test_access_lets_us_through_and_no_secret_is_told(edge, name, carrier, echo_server, words, environ, wanted):
    edge.far(name, echo_server.address)
    edge.fault(name, **wanted)
    run = carrier(name, "--loglevel", "debug", *words, environ={**edge.environ, **environ})
    assert echoed(run) == b"hello"
    headers = dict(edge.requests(name)[0]["headers"])
    assert ("X" in headers) == ("-H" in words) and headers.get("X", "a,b") == "a,b"
    assert headers.get("Cf-Access-Jump-Destination") == ("db:1" if "db:1" in str((words, environ)) else None)
    edge.fault(name, service_token=["x", "y"])
    assert refused(run)["reason"] == "login"
    assert run.rows("open") and run.end() == 0
    assert b"s3cret" not in run.errors


def test_a_proxy_with_credentials(edge, name, carrier, echo_server):
    edge.far(name, echo_server.address)
    url = edge.environ["HTTPS_PROXY"].replace("//", "//user:s3cret%40x@")
    run = carrier(name, "--loglevel", "debug", environ={**edge.environ, "HTTPS_PROXY": "", "https_proxy": url})
    assert echoed(run) == b"hello"
    row, = edge.proxied(name)
    assert row["target"] == f"{name}:443"
    assert row["headers"] == [["Host", f"{name}:443"],
                              ["Proxy-Authorization", "Basic " + base64.b64encode(b"user:s3cret@x").decode()]]
    edge.fault(name, proxy_status=407)
    assert refused(run)["reason"] == "proxy"
    assert run.end() == 0 and b"s3cret" not in run.errors and b"dXNlc" not in run.errors


def test_no_proxy(edge, name, local, monkeypatch, echo_server):
    edge.far(name, echo_server.address)
    resolve_as(monkeypatch, lambda: [(HOST, edge.port)])
    assert echoed(local(name, no_proxy="example.test")) == b"hello"
    assert not edge.proxied(name) and edge.requests(name)[0]["sni"] == name


def test_loopback_needs_no_proxy_and_the_port_is_said(edge, carrier, echo_server):
    edge.far("localhost", echo_server.address)
    run = carrier(f"https://localhost:{edge.port}/some/path?x=1")
    assert echoed(run) == b"hello"
    request, = edge.requests("localhost")
    assert (request["host"], request["sni"]) == (f"localhost:{edge.port}", "localhost")
    assert request["path"] == "/some/path?x=1"
    assert not edge.proxied("localhost")


def test_an_address_has_no_sni_and_its_certificate_is_checked(edge, local, echo_server):
    edge.far(HOST, echo_server.address)
    run = local(f"{HOST}:{edge.port}")
    assert echoed(run) == b"hello"
    request = edge.requests(HOST)[-1]
    assert (request["sni"], request["host"]) == (None, f"{HOST}:{edge.port}")


@pytest.mark.parametrize("newest", ["1.2", "1.3"])
def test_the_second_connection_resumes_tls(edge, name, local, echo_server, newest):
    edge.far(name, echo_server.address)
    edge.fault(name, tls_max=newest)
    run = local(name)
    for _ in range(3):
        assert echoed(run) == b"hello"
    assert [(row["tls"], row["session_reused"]) for row in edge.handshakes(name)] == [
        (f"TLSv{newest}", reused) for reused in (False, True, True)]
    assert [row.get("error") for row in run.rows("open")] == [None, "resumed", "resumed"]


def test_a_session_is_read_once_and_replaced_when_the_edge_has_forgotten_it(edge, name, local, monkeypatch,
                                                                            echo_server):
    """Reading one costs more than all else; one that is not taken up is no failure."""
    edge.far(name, echo_server.address)
    reads, session = [], ssl.SSLSocket.session
    monkeypatch.setattr(ssl.SSLSocket, "session", property(lambda tls: reads.append(tls) or session.fget(tls),
                                                           session.fset))
    run = local(name)
    listener, = run.carrier.listeners.values()
    kept = []
    for newest in ("1.3", "1.3", "1.3", "1.2", "1.2"):
        edge.fault(name, tls_max=newest)
        assert echoed(run) == b"hello"
        kept.append((listener.session, len(reads)))
    first, last = kept[0][0], kept[-1][0]
    assert first.has_ticket and last.has_ticket and first != last
    assert kept == [(first, 1)] * 3 + [(last, 2)] * 2
    assert [row["session_reused"] for row in edge.handshakes(name)] == [False, True, True, False, True]


def test_what_is_set_on_both_legs(edge, name, local, echo_server):
    edge.far(name, echo_server.address)
    run = local(name)
    with run.connect() as client:
        run.reaches("open")
        connection, = run.carrier.connections
        for sock in (connection.client, connection.edge):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 9)):
                if hasattr(socket, option):
                    assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, option)) == value, option
            assert not sock.getblocking()


def test_no_tls_before_1_2_is_offered(local, serve):
    far = serve(lambda sock: sock.recv(4096))
    run = local(f"localhost:{far.address[1]}", proxy=False)
    assert refused(run)["reason"] == "reset"
    assert run.carrier.context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert b"\x00\x2b\x00\x05\x04\x03\x04\x03\x03" in far.result(), "supported_versions: 1.3, 1.2 (RFC 8446 4.2.1)"


def test_certificates_in_a_directory(edge, name, carrier, certificates, tmp_path, echo_server):
    edge.far(name, echo_server.address)
    run = carrier(name, environ={"HTTPS_PROXY": edge.environ["HTTPS_PROXY"], "SSL_CERT_DIR": str(tmp_path)})
    assert refused(run)["reason"] == "certificate"
    number = subprocess.run(["openssl", "x509", "-hash", "-noout", "-in", certificates / "ca.pem"],
                            capture_output=True, text=True, timeout=20).stdout.strip()
    (tmp_path / f"{number}.0").symlink_to(certificates / "ca.pem")
    assert echoed(run) == b"hello"


def test_a_name_is_resolved_once_for_many_and_forgotten_in_time(edge, name, local, monkeypatch, echo_server):
    edge.far(name, echo_server.address)
    asked = resolve_as(monkeypatch, lambda: [(HOST, edge.port)])
    run = local(name, proxy=False, RESOLVED_FOR=1000.0)
    payloads = [b"hello"] * 10
    assert parallel(run.address, payloads) == payloads and asked == [name]
    monkeypatch.setattr(sniroute_carrier, "RESOLVED_FOR", 0.0)
    run.carrier.call(run.carrier.names.known.clear)
    assert echoed(run) == echoed(run) == b"hello" and asked == [name] * 3


@linux
def test_an_address_that_does_not_answer_does_not_hold_up_the_next(edge, name, local, monkeypatch, echo_server, deaf):
    edge.far(name, echo_server.address)
    resolve_as(monkeypatch, lambda: [deaf, ("::1", 1, 0, 0), (HOST, edge.port)])
    run = local(name, proxy=False, STAGGER=0.05)
    assert echoed(run) == b"hello"
    run.reaches()
    assert len(edge.handshakes(name)) == 1 and not run.rows("failed")


def test_all_addresses_are_tried_and_the_last_failure_is_told(name, local, monkeypatch, free_ports):
    port, _ = free_ports(2)
    resolve_as(monkeypatch, lambda: [(HOST, port), (HOST, port + 1)])
    row = refused(local(name, proxy=False))
    assert (row["reason"], row["error"]) == ("refused", "Connection refused")


def test_no_address_at_all(name, local, monkeypatch):
    resolve_as(monkeypatch, lambda: [])
    assert refused(local(name, proxy=False))["reason"] == "refused"


def test_an_address_that_the_kernel_refuses_at_once(edge, name, local, monkeypatch, echo_server):
    """A broadcast address is refused in connect() itself; a family that is not here, in socket()."""
    edge.far(name, echo_server.address)
    resolve = socket.getaddrinfo
    rows = [(0xFFFF, socket.SOCK_STREAM, 6, "", ("::1", 1, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("255.255.255.255", 1)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOST, edge.port))]
    monkeypatch.setattr(socket, "getaddrinfo",
                        lambda host, *rest, **options: rows if host == name else resolve(host, *rest, **options))
    run = local(name, proxy=False)
    assert echoed(run) == b"hello"
    del rows[2]
    run.carrier.call(run.carrier.names.known.clear)
    assert refused(run)["reason"] == "refused"


# -- who leaves early --------------------------------------------------------------------------


@pytest.mark.parametrize("switches, phase", PHASES)
@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["FIN", "RST"])
def test_a_client_that_leaves_while_we_dial_is_dropped_at_once(edge, name, local, switches, phase, leave):
    edge.far(name, edge.proxy)
    edge.fault(name, **switches)
    run = local(name)
    client = run.connect()
    run.reaches(phase)
    wait_until(lambda: edge.proxied(name))
    leave(client)
    run.reaches()
    wait_until(lambda: edge.ends(name) or edge.lines("proxy.jsonl", name)[-1]["event"] == "end", timeout=2)
    assert not run.rows("failed")


@linux
def test_a_client_that_leaves_while_we_connect_or_resolve(local, monkeypatch, deaf):
    release = threading.Event()
    resolve_as(monkeypatch, lambda: [deaf] if release.wait(10) else [])
    run = local("app.example.test", proxy=False)
    for phase in ("resolving the name", "connecting"):
        with run.connect():
            run.reaches(phase)
        run.reaches()
        release.set()
        wait_until(lambda: not run.carrier.names.waiting)
    assert not run.rows("failed")


@linux
def test_clients_that_leave_take_their_descriptors_along(edge, name, carrier):
    edge.far(name, edge.proxy)
    run = carrier(name)
    edge.fault(name, hang="tls")
    with run.connect():
        wait_until(lambda: edge.accepted(name))
    edge.fault(name, hang="upgrade")
    wait_until(lambda: edge.ends(name))
    before = run.fds()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(run.connect())
        wait_until(lambda: len(edge.requests(name)) == 20)
        assert run.fds() == before + 40
    wait_until(lambda: run.fds() == before, what="the descriptors")
    wait_until(lambda: len(edge.ends(name)) == 21)
    assert run.memory() < 64 << 10 and not run.rows("failed")


def test_a_port_probe_costs_no_upgrade(edge, name, local, echo_server):
    edge.far(name, echo_server.address)
    edge.fault(name, hang="accept")  # the edge is slow enough to see who has left
    run = local(name)
    for leave in (socket.socket.close, reset) * 5:
        with contextlib.suppress(ConnectionResetError):
            leave(run.connect())
    run.reaches()
    edge.fault(name)
    assert echoed(run) == b"hello"
    assert len(edge.requests(name)) == echo_server.accepted == 1


def test_a_client_that_has_gone_before_it_is_accepted(local):
    """The kernel hands out such a socket; whatever is done with it fails."""
    run = local("nothing.invalid", proxy=False)
    for _ in range(20):
        with contextlib.suppress(ConnectionResetError):  # the carrier was faster
            reset(run.connect())
    run.reaches()


@pytest.mark.parametrize("size", [1, 60_000])
def test_an_upload_that_ends_while_we_dial_is_delivered(edge, name, local, echo_server, size):
    edge.far(name, echo_server.address)
    edge.fault(name, delay=100)
    with local(name, GRACE=2.0).connect() as client:
        client.sendall(NOISE[:size])
        client.shutdown(socket.SHUT_WR)
        assert receive(client, size) == NOISE[:size]


def test_a_large_upload_waits_in_the_kernel_while_we_dial(edge, name, local, serve):
    edge.far(name, serve(digest_upload).address)
    edge.fault(name, delay=100)
    run = local(name)
    with run.connect() as client:
        with beside(lambda: client.sendall((4 << 20).to_bytes(8, "big") + b"".join(blocks(4)))):
            run.reaches("upgrade")
            connection, = run.carrier.connections
            assert len(connection.early) <= sniroute_carrier.EARLY_MAX
            assert receive(client, 32) == digest(4)


def test_an_upload_that_cannot_be_delivered_is_a_failure(edge, name, local):
    """Its client has ended, and would take FIN for success."""
    edge.fault(name, hang="upgrade")
    with local(name, LINGER=0.15).connect() as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == (b"", "RST")
    assert edge.requests(name)


def test_the_log_of_an_upload_that_cannot_be_delivered(edge, name, local):
    edge.fault(name, hang="upgrade")
    run = local(name, LINGER=0.15)
    with run.connect() as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        row = run.failure()
    assert (row["reason"], row["error"]) == ("timeout", "0.15 s after the client's end, upgrade")


# -- the end -----------------------------------------------------------------------------------


def test_an_upload_arrives_whole(edge, name, local, serve):
    """Nothing comes down: the grace, then Close 1000, and only behind the last byte."""
    far = serve(lambda sock: receive_all(sock)[0])
    edge.far(name, far.address)
    run = local(name)
    data = NOISE * 4
    with run.connect() as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == (b"", "FIN")
    end = end_of(edge, name)
    assert far.result() == data
    assert (end["how"], end["close"], end["bytes_up"]) == ("client", 1000, len(data))


def test_an_upload_arrives_whole_while_data_comes_down(edge, name, local, serve):
    """6 of 6: a close with unread bytes would reset, and destroy the last megabytes."""
    def backend(sock: socket.socket) -> bytes:
        with beside(lambda: send_blocks(2)(sock)):
            return hashlib.sha256(receive(sock, 9 << 20)).digest()

    far = serve(backend)
    edge.far(name, far.address)
    edge.fault(name, frame=1000)
    run = local(name)
    data = NOISE * 8
    expected = hashlib.sha256(data).digest()
    down = b"".join(blocks(2))

    def upload() -> None:
        with run.connect() as client:
            def send() -> None:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)

            with beside(send):
                assert receive_all(client) == (down, "FIN")

    for _ in range(6):
        upload()
    assert [far.result() for _ in range(6)] == [expected] * 6


def test_an_upload_arrives_whole_from_a_client_that_does_not_listen(edge, name, local, serve):
    """It closes with bytes unread, which resets it; what it had sent still counts."""
    def backend(sock: socket.socket) -> bytes:
        sock.sendall(NOISE)
        return receive_all(sock)[0]

    far = serve(backend)
    edge.far(name, far.address)
    run = local(name)
    client = run.connect()
    client.sendall(NOISE[:100_000])
    assert receive(client, 10) == NOISE[:10]
    wait_until(lambda: [connection.up for connection in run.carrier.connections.copy()] == [100_000])
    client.close()
    assert far.result() == NOISE[:100_000]
    assert end_of(edge, name)["close"] == 1000


def test_a_request_and_its_end_get_their_answer(edge, name, local, serve):
    """As `nc -N` does it: there is no half-close on the wire, so Close waits for the answer."""
    def far(sock: socket.socket) -> None:
        assert receive(sock, 7) == b"request"
        for at in range(0, len(NOISE), 1 << 18):
            sock.sendall(NOISE[at:at + (1 << 18)])
            time.sleep(0.15)  # longer in all than the grace, which begins anew with each part
        assert receive_all(sock)[0] == b""
        done.set()

    done = threading.Event()
    edge.far(name, serve(far).address)
    with local(name, GRACE=0.5).connect() as client:
        client.sendall(b"request")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == (NOISE, "FIN")
    assert done.wait(5) and end_of(edge, name)["close"] == 1000


def test_a_client_that_has_ended_and_reads_slowly_gets_everything(edge, name, local, serve):
    edge.far(name, serve(send_blocks(16)).address)
    run = local(name, GRACE=0.2, LINGER=0.1)  # what a busy host may make the far end pause is no silence
    with run.connect() as client:
        assert receive(client, 8) == bytes(8)
        client.shutdown(socket.SHUT_WR)
        run.reaches("half")
        time.sleep(0.5)  # several graces
        whole = hashlib.sha256(bytes(8))
        while data := client.recv(1 << 18):
            whole.update(data)
            time.sleep(0.005)
        assert whole.digest() == digest(16)


@pytest.mark.parametrize("no_close", [False, True], ids=["Close", "no Close"])
def test_the_service_ends_first(edge, name, local, serve, no_close):
    """The client gets everything, and then FIN, even while it is sending."""
    def far(sock: socket.socket) -> None:
        receive(sock, 1 << 16)
        send_blocks(4)(sock)
        sock.shutdown(socket.SHUT_WR)
        receive_all(sock)

    edge.far(name, serve(far).address)
    edge.fault(name, **({"no_close": True} if no_close else {}))
    with local(name).connect() as client, beside(lambda: [client.sendall(NOISE) for _ in range(1000)]):
        assert receive(client, 4 << 20) == b"".join(blocks(4))
        assert client.recv(1) == b"", "FIN"
        client.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("code", [1000, 1001, 1011, 4999, 0])
def test_a_close_is_answered_with_its_code(edge, name, local, echo_server, code):
    edge.far(name, echo_server.address)
    edge.fault(name, close=code, close_reason="going away" if code else "", close_after=5)
    with local(name).connect() as client:
        client.sendall(b"hello")
        assert receive_all(client) == (b"hello", "FIN")
    end = end_of(edge, name)
    assert (end["how"], end["close"]) == ("fault", code or 1005)


@pytest.mark.parametrize("size", [0, 1, 3 << 20])
def test_an_edge_that_resets(edge, name, local, serve, size):
    """The client gets what came, and then RST."""
    data = (NOISE * 3)[:size]
    edge.far(name, serve(lambda sock: sock.sendall(data) or sock.recv(1)).address)
    edge.fault(name, rst="open", rst_after=size)
    run = local(name)
    with contextlib.suppress(ConnectionResetError) if not size else contextlib.nullcontext():
        with run.connect() as client:
            assert receive_all(client) == (data, "RST")
    assert len(run.rows("reset")) == 1 or not size


def test_a_slow_client_gets_what_came_before_the_reset(edge, name, local, serve):
    """A reset destroys what is still under way to the client, so it waits until nothing is."""
    data = NOISE
    edge.far(name, serve(lambda sock: sock.sendall(data) or sock.recv(1)).address)
    edge.fault(name, rst="open", rst_after=len(data))
    run = local(name)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.settimeout(10)
        client.connect(run.address)
        assert receive(client, 1 << 16) == data[:1 << 16]
        run.reaches("ending")
        assert receive_all(client) == (data[1 << 16:], "RST")


def test_a_client_that_never_reads_is_reset_in_the_end(edge, name, local, serve):
    edge.far(name, serve(lambda sock: sock.sendall(NOISE[:500_000]) or sock.recv(1)).address)
    edge.fault(name, rst="open", rst_after=500_000)
    run = local(name, LINGER=0.1, SETTLE=0.01)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        client.connect(run.address)
        run.ends()
        assert receive_all(client)[1] == "RST"


def test_an_edge_that_ends_without_a_close(edge, name, local, serve):
    edge.far(name, serve(lambda sock: sock.sendall(NOISE) or sock.recv(1)).address)
    edge.fault(name, eof="open", eof_after=len(NOISE))
    with local(name).connect() as client:
        assert receive_all(client) == (NOISE, "FIN")


@pytest.mark.parametrize("kind", ["rsv", "masked", "opcode", "long_control", "fragmented_control", "continuation",
                                  "close_1"])
def test_an_edge_that_breaks_the_rules(edge, name, local, echo_server, kind):
    edge.far(name, echo_server.address)
    edge.fault(name, bad_frame=kind, bad_after=5)
    run = local(name)
    with run.connect() as client:
        client.sendall(b"hello")
        received, end = receive_all(client)
    assert end == "RST" and received in (b"", b"hello")
    assert end_of(edge, name)["close"] == 1002
    row, = run.rows("broken")
    assert row["reason"] == "other" and row["error"]


@pytest.mark.parametrize("stream, received, frames", [
    pytest.param(server_frame(BINARY, b"half", fin=False) + server_frame(CLOSE, b"\x03\xe9"), (b"half", "FIN"),
                 [(CLOSE, b"\x03\xe9")], id="a Close within a message"),
    pytest.param(server_frame(BINARY, b"whole") + server_frame(CLOSE, b"\x03\xe8bye") + b"\xff" * 100,
                 (b"whole", "FIN"), [(CLOSE, b"\x03\xe8")], id="garbage behind a Close"),
    pytest.param(server_frame(BINARY, b"x" * 100)[:50], (b"x" * 48, "RST"), [], id="an end within a frame"),
    pytest.param(server_frame(PING, b"1") + server_frame(PING, b"2") + server_frame(PING, b"3")
                 + server_frame(CLOSE, b""), (b"", "FIN"), [(CLOSE, b"")], id="Pings and a Close"),
    pytest.param(server_frame(BINARY, b"") * 3000 + server_frame(BINARY, b"x") * 3000 + server_frame(CLOSE, b""),
                 (b"x" * 3000, "FIN"), [(CLOSE, b"")], id="many tiny messages"),
])
def test_ends_that_no_connector_makes(local, raw_edge, stream, received, frames):
    said: list[tuple[int, bytes]] = []
    ended = threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        try:
            tls.sendall(stream)
            if not frames:
                tls.unwrap()
            read_frames(tls, said)
        finally:
            ended.set()

    with local(raw_edge(script), proxy=False).connect() as client:
        assert receive_all(client) == received
    assert ended.wait(5) and said == frames


def test_of_many_pings_the_last_is_answered(local, raw_edge):
    said: list[tuple[int, bytes]] = []

    def script(tls: ssl.SSLSocket) -> None:
        tls.sendall(b"".join(server_frame(PING, bytes([number])) for number in range(20)))
        read_frames(tls, said)

    with local(raw_edge(script), proxy=False).connect():
        wait_until(lambda: said)
    assert (PONG, b"\x13") in said and all(opcode == PONG for opcode, _ in said[:1])


def test_no_pong_follows_our_close(local, raw_edge):
    """What is behind a Close nobody reads; the edge may take it for an error."""
    said: list[tuple[int, bytes]] = []
    closed, ended = threading.Event(), threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        data = b""
        while len(data) < 8:
            data += tls.recv(8)
        closed.set()
        tls.sendall(server_frame(PING, b"1") + server_frame(BINARY, b"late") + server_frame(CLOSE, b"\x03\xe8"))
        read_frames(tls, said)
        ended.set()

    run = local(raw_edge(script), proxy=False, GRACE=0.02)
    with run.connect() as client:
        client.shutdown(socket.SHUT_WR) if run.reaches("open") is None else None
        assert receive_all(client) == (b"late", "FIN")
    assert closed.is_set() and ended.wait(5) and said == []


def test_a_client_that_resets_while_data_comes_down(edge, name, local, serve):
    def far(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            send_blocks(1000)(sock)
        gone.set()

    gone = threading.Event()
    edge.far(name, serve(far).address)
    run = local(name)
    client = run.connect()
    receive(client, 1000)
    reset(client)
    run.reaches()
    assert gone.wait(10)
    end = end_of(edge, name)
    assert end["how"] == "client" and end["close"] in (1000, 1006)


def test_a_client_that_resets_while_nothing_happens(edge, name, local, echo_server):
    edge.far(name, echo_server.address)
    run = local(name, GRACE=60.0)
    client = run.connect()
    run.reaches("open")
    reset(client)
    run.reaches()
    assert end_of(edge, name)["close"] == 1000


def test_a_client_that_resets_while_its_answer_comes(local, raw_edge):
    """It has ended, then it goes: the grace ends with it."""
    go, frames = threading.Event(), []

    def script(tls: ssl.SSLSocket) -> None:
        go.wait(10)
        for _ in range(5):
            tls.sendall(server_frame(BINARY, b"answer"))
            time.sleep(0.01)
        read_frames(tls, frames)

    run = local(raw_edge(script), proxy=False, GRACE=60.0, LINGER=0.5)
    client = run.connect()
    client.shutdown(socket.SHUT_WR) if run.reaches("open") is None else None
    run.reaches("half")
    client.close()
    go.set()
    run.reaches()
    wait_until(lambda: frames)
    assert frames == [(CLOSE, b"\x03\xe8")]


def test_an_edge_that_never_answers_a_close_is_left(local, raw_edge):
    left = threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        with contextlib.suppress(OSError):
            wait_for_end(tls)
        left.set()

    run = local(raw_edge(script), proxy=False, GRACE=0.05, LINGER=0.1)
    with run.connect() as client:
        client.shutdown(socket.SHUT_WR) if run.reaches("open") is None else None
        assert receive_all(client) == (b"", "FIN")
        run.reaches()
    assert left.wait(5)


def test_a_client_that_never_ends_is_left(edge, name, local, serve):
    edge.far(name, serve(lambda sock: sock.sendall(b"bye")).address)
    run = local(name, LINGER=0.1)
    with run.connect() as client:
        assert receive_all(client) == (b"bye", "FIN")
        run.ends()


def test_a_slow_edge_gets_a_whole_upload_though_it_takes_longer_than_we_linger(local, raw_edge):
    """What the kernel holds when the client has ended is still on its way."""
    frames: list[tuple[int, bytes]] = []
    ended = threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        paced = tls.recv

        def recv(size: int) -> bytes:
            time.sleep(0.01)
            return paced(size)

        tls.recv = recv
        with contextlib.suppress(OSError):
            read_frames(tls, frames)
        ended.set()

    run = local(raw_edge(script), proxy=False, GRACE=0.02, LINGER=0.1)
    with run.connect() as client:
        client.sendall(NOISE)
        client.shutdown(socket.SHUT_WR)
        assert ended.wait(20)
    assert b"".join(data for opcode, data in frames if opcode == BINARY) == NOISE
    assert frames[-1] == (CLOSE, b"\x03\xe8")


def test_an_edge_that_stops_reading_an_upload_is_left(local, raw_edge):
    stop = threading.Event()
    run = local(raw_edge(lambda tls: stop.wait(20)), proxy=False, GRACE=0.02, LINGER=0.1)
    with run.connect() as client:
        client.sendall(NOISE[:200_000])
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client)[0] == b""
        run.reaches()
    stop.set()


def test_one_connection_that_is_busy_leaves_the_others_their_turn(edge, name, local, serve):
    def far(sock: socket.socket) -> None:
        if receive(sock, 4) == b"echo":
            echo(sock)
        else:
            receive_all(sock)

    edge.far(name, serve(far).address)
    run = local(name)
    stop = threading.Event()

    def flood(client: socket.socket) -> None:
        while not stop.is_set():
            client.sendall(NOISE[:1 << 16])

    with run.connect() as busy, run.connect() as quiet, beside(lambda: flood(busy)):
        quiet.sendall(b"echo")
        for number in range(20):
            quiet.sendall(bytes([number]))
            assert receive(quiet, 1) == bytes([number])
        stop.set()


def with_buffers(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """How much the kernel takes of what the carrier sends (SO_SNDBUF=), and holds for it (SO_RCVBUF=).

    Little of the one, and it has to wait; much of the other, and all is there at once.
    """
    set_options = sniroute_carrier.set_options

    def resized(sock: socket.socket) -> None:
        set_options(sock)
        for option, size in sizes.items():
            sock.setsockopt(socket.SOL_SOCKET, getattr(socket, option), size)

    monkeypatch.setattr(sniroute_carrier, "set_options", resized)


def test_a_long_request_waits_for_an_edge_that_reads_slowly(edge, local, serve, monkeypatch):
    with_buffers(monkeypatch, SO_SNDBUF=4096)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(edge.directory / "edge.pem")
    read, heads = threading.Event(), []

    def handler(sock: socket.socket) -> None:
        with context.wrap_socket(sock.dup(), server_side=True) as tls:
            read.wait(10)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += tls.recv(1 << 20)
            heads.append(head)
            tls.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            wait_for_end(tls)

    far = serve(handler)
    far.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    values = [(f"X-{number}", "x" * 10_000) for number in range(100)]
    run = local(f"localhost:{far.address[1]}", proxy=False, headers=values)
    with run.connect() as client:
        connection = wait_until(lambda: next(iter(run.carrier.connections.copy()), None))
        wait_until(lambda: connection.state == "upgrade" and connection.out)
        read.set()
        assert receive_all(client) == (b"", "RST")
    assert run.failure()["reason"] == "denied"
    assert all(f"{name}: {value}".encode() in heads[0] for name, value in values)


@pytest.mark.parametrize("leave", [False, True], ids=["reads", "resets"])
def test_last_bytes_that_the_client_does_not_take_at_once(local, raw_edge, monkeypatch, leave):
    with_buffers(monkeypatch, SO_SNDBUF=4096, SO_RCVBUF=1 << 20)
    data = NOISE[:120_000]
    holding, sent = threading.Event(), threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        holding.wait(10)
        tls.sendall(server_frame(BINARY, data) + server_frame(CLOSE, b""))
        sent.set()
        tls.recv(99)

    run = local(raw_edge(script), proxy=False)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(run.address)
        run.reaches("open")
        run.carrier.call(lambda: (holding.set(), sent.wait(10)))  # what is read at once includes the Close
        run.reaches("ending")
        if leave:
            reset(client)
        else:
            assert receive_all(client) == (data, "FIN")
    run.reaches()


def test_a_client_that_resets_after_the_service_has_ended(edge, name, local, serve):
    edge.far(name, serve(lambda sock: sock.sendall(b"bye")).address)
    run = local(name, LINGER=60.0)
    with run.connect() as client:
        assert receive_all(client) == (b"bye", "FIN")
        client.sendall(b"more")
        run.reaches("ending")
        reset(client)
        run.reaches()


class Stuck(socket.socket):
    """An edge that takes nothing more."""

    def send(self, *_: Any) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@contextlib.contextmanager
def bare(state: str) -> Iterator[tuple[sniroute_carrier.Connection, socket.socket]]:
    """A connection in this state without a loop, whose edge takes nothing; and its client."""
    carrier = Carrier(Notes(), [], None, "")
    with socket.create_server((HOST, 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        inner, outer = socket.socketpair()
        connection = sniroute_carrier.Connection(
            carrier, sniroute_carrier.Listener(Target("app", 443, "/"), listener), listener.accept()[0], None)
        carrier.connections.add(connection)
        sniroute_carrier.set_options(connection.client)
        connection.edge = Stuck(fileno=inner.detach())
        connection.reader = FrameReader()
        connection.state = state
        try:
            with outer:
                yield connection, client
        finally:
            connection.close()
            carrier.stopping = True
            carrier.run()


class Dripping(socket.socket):
    """An edge whose records have one byte each, and come without end."""

    reads = 0

    def recv(self, size: int) -> bytes:
        self.reads += 1
        return b"HTTP/1.1 101 "[self.reads - 1:self.reads] or b"x"


def test_a_head_that_drips_leaves_others_their_turn():
    with bare("upgrade") as (connection, _):
        connection.edge.close()
        connection.edge = Dripping(socket.AF_UNIX)
        connection.on_upgrade(sniroute_carrier.WRITE)
        assert connection.edge.reads == sniroute_carrier.TURN and connection.state == "upgrade"
        connection.on_upgrade(sniroute_carrier.READ)
        assert connection.edge.reads == 2 * sniroute_carrier.TURN


def test_no_edge_can_begin_a_handshake_anew():
    """With TLS 1.2 a send would wait for its answer, and the loop spin meanwhile."""
    with bare("open") as (connection, _):
        assert connection.carrier.context.options & ssl.OP_NO_RENEGOTIATION


def test_ports_stay_ours_until_the_end(monkeypatch):
    """A process that ends and has closed a port cannot be told from one that listens there."""
    kept: list[int] = []
    dup = os.dup
    monkeypatch.setattr(os, "dup", lambda fd: kept.append(dup(fd)) or kept[-1])
    carrier = Carrier(Notes(), [], None, "")
    address = carrier.listen(Target("app.example.test", 443, "/"), (HOST, 0)).sock.getsockname()
    carrier.leave()
    carrier.run()
    try:
        with pytest.raises(OSError, match="in use"), socket.socket() as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stranger.bind(address)
    finally:
        os.close(*kept)


def test_a_fault_on_the_way_out_lets_the_client_go_all_the_same(monkeypatch):
    with bare("connecting") as (connection, client):
        connection.attempts = [socket.socket()]
        monkeypatch.setattr(sniroute_carrier.Connection, "_drop_attempt", lambda self, sock: sock.close() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            connection.close()
        assert connection not in connection.carrier.connections and receive_all(client) == (b"", "FIN")
        connection.edge.close()


@linux
@pytest.mark.parametrize("leaves", [True, False], ids=["and leaves", "and stays"])
def test_a_client_of_an_edge_that_takes_nothing(edge, name, local, leaves, echo_server):
    """While its bytes are not taken nobody listens to it: whether it is still there is asked now and then."""
    edge.far(name, echo_server.address)
    edge.fault(name, slow_reads=True)
    run = local(name, STALL=0.1, LINGER=0.2)
    client = run.connect()
    with client:
        client.setblocking(False)
        carried = [0]
        def full() -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.send(bytes(1 << 20))
            carried.append(sum(each.up for each in run.carrier.connections.copy() if each.out))
            return run.states() == ["open"] and carried[-1] > 0 and len(set(carried[-20:])) == 1
        wait_until(full)
        connection, = run.carrier.connections
        if leaves:
            reset(client)  # the end of one that only closes comes behind its bytes: keepalive sees to it
            run.reaches()
        else:
            wait_until(lambda: connection.stalled_at[0] == connection.up)
            connection.stalled_at = connection.up, -1
            wait_until(lambda: connection.stalled_at[1] != -1, what="another look")
            assert run.states() == ["open"]


@pytest.mark.parametrize("act", [
    pytest.param(lambda connection: connection.pump_up(), id="a message"),
    pytest.param(lambda connection: connection._take(memoryview(server_frame(PING, b""))), id="a Pong"),
])
def test_an_edge_that_takes_nothing_more(act):
    with bare("open") as (connection, client):
        client.sendall(b"hello")
        wait_until(lambda: connection.early or connection.client.recv(9, socket.MSG_PEEK))
        act(connection)
        assert connection.state == "draining" and connection in connection.carrier.lingering.due
        assert not connection.out and connection.pong is None and not connection.carrier.graced.due
        for _ in range(2):  # who tries again does no harm
            act(connection)
        assert connection.state == "draining"
        connection.on_linger()
        assert connection.state == "closed" and len([row for row in connection.carrier.log.rows
                                                     if row["event"] == "reset"]) == 1
        assert receive_all(client) == (b"", "RST")


def test_an_edge_that_does_not_take_our_close():
    """The client had ended, and gets no reset for that."""
    for act in ("_leave", "close"):
        with bare("half") as (connection, client):
            connection._say_close(b"")
            getattr(connection, act)()
            assert connection.state == ("closed" if act == "close" else "leaving") and not connection.out
            if act == "_leave":  # it may still have said something
                connection.on_linger()
            assert connection.state == "closed" and receive_all(client) == (b"", "FIN")


def test_what_an_edge_says_that_takes_nothing_gives_it_time():
    with bare("draining") as (connection, client):
        for said in (b"late", b"later"):
            connection.carrier.lingering.due[connection] = 0.0
            connection._take(memoryview(server_frame(BINARY, said)))
            assert connection.carrier.lingering.due[connection] > time.monotonic()
            assert receive(client, len(said)) == said
        connection.carrier.lingering.due[connection] = 0.0
        connection._take(memoryview(server_frame(PING, b"") + server_frame(BINARY, b"")))
        assert connection.carrier.lingering.due[connection] == 0.0 and connection.pong is None
        connection._take(memoryview(server_frame(CLOSE, b"\x03\xe8")))
        assert connection.state == "ending" and receive_all(client) == (b"", "FIN")


LAST = NOISE[:140_000]  # more than the carrier reads in one go, and as much as the kernel holds
keeps_what_came = pytest.mark.skipif(sys.platform != "linux", reason="there, a reset destroys what came before it")


class Refused:
    """The edge says something and resets; the carrier, which was busy, finds first that it cannot send."""

    def __init__(self, raw_edge: Callable[..., str], monkeypatch: pytest.MonkeyPatch, stream: bytes):
        with_buffers(monkeypatch, SO_RCVBUF=1 << 20)
        self.stream = stream
        self.go = threading.Event()
        self.hostname = raw_edge(self.script)
        self.states: list[str] = []

    def script(self, tls: ssl.SSLSocket) -> None:
        self.go.wait(10)
        tls.sendall(self.stream)
        wait_until(lambda: not sniroute_carrier.unsent(tls), what="it has arrived")
        tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def happen(self, run: Local, upload: Callable[[], Any] = lambda: None) -> None:
        """In the loop."""
        def act() -> None:
            connection, = run.carrier.connections
            self.states.append(connection.state)
            self.go.set()
            wait_until(lambda: sniroute_carrier.was_reset(connection.edge))
            upload()
            select.select([connection.client], [], [], 10)
            if connection.state == "open":
                connection.on_client(selectors.EVENT_READ)
            else:
                connection.on_edge(selectors.EVENT_READ)
            self.states.append(connection.state)

        run.carrier.call(act)


@keeps_what_came
@pytest.mark.parametrize("behind, end", [
    pytest.param(server_frame(CLOSE, b"\x03\xe8"), "FIN", id="Close"),
    pytest.param(b"", "RST", id="no Close"),
    pytest.param(server_frame(BINARY, b"x")[:2], "RST", id="half a frame"),
])
@pytest.mark.parametrize("phase", ["open", "half"])
def test_an_edge_that_resets_while_we_send_has_said_what_it_has_said(local, raw_edge, monkeypatch, phase, behind, end):
    """An upload that nobody takes any more, or a Pong, loses nothing of what came before."""
    far = Refused(raw_edge, monkeypatch, server_frame(PING, b"1") + server_frame(BINARY, LAST) + behind)
    run = local(far.hostname, proxy=False, GRACE=60.0, LINGER=60.0)
    with run.connect() as client:
        run.reaches("open")
        if phase == "half":
            client.shutdown(socket.SHUT_WR)
            run.reaches("half")
        far.happen(run, lambda: client.sendall(NOISE[:1 << 16]) if phase == "open" else None)
        assert receive_all(client) == (LAST, end)
        assert far.states == [phase, "draining"]
        assert len(run.rows("reset")) == (end == "RST")
    run.reaches()
    assert not run.rows("broken") and not run.rows("failed")


@keeps_what_came
def test_a_slow_client_gets_what_an_edge_said_that_takes_nothing_more(local, raw_edge, monkeypatch):
    """It may take longer than we linger."""
    with_buffers(monkeypatch, SO_SNDBUF=4096)
    far = Refused(raw_edge, monkeypatch, server_frame(BINARY, LAST) + server_frame(CLOSE, b"\x03\xe8"))
    run = local(far.hostname, proxy=False, LINGER=0.05)
    lingered = []
    run.carrier.lingering.act = lambda connection: (lingered.append(connection.state), connection.on_linger())
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(run.address)
        run.reaches("open")
        far.happen(run, lambda: client.sendall(b"hello"))
        wait_until(lambda: len(lingered) >= 3)
        assert set(lingered) == {"draining"}
        assert receive_all(client) == (LAST, "FIN")
    run.reaches()


@pytest.mark.parametrize("linger", [0.1, 60.0], ids=["is left", "is left when we end"])
def test_an_edge_that_neither_takes_anything_nor_ends(local, raw_edge, linger):
    run = local(raw_edge(wait_for_end), proxy=False, LINGER=linger)
    with run.connect() as client:
        run.reaches("open")
        connection, = run.carrier.connections
        connection.edge.send = functools.partial(Stuck.send, connection.edge)
        began = time.monotonic()
        client.sendall(b"hello")
        if linger > 1:
            run.reaches("draining")
            run.close()
        assert receive_all(client) == (b"", "RST")
        assert linger > 1 or linger <= time.monotonic() - began < 5.0
        run.reaches()
    assert len(run.rows("reset")) == (linger < 1)


@keeps_what_came
def test_a_client_that_has_gone_too_while_the_edge_takes_nothing_more(local, raw_edge, monkeypatch):
    far = Refused(raw_edge, monkeypatch, server_frame(BINARY, LAST) + server_frame(CLOSE, b"\x03\xe8"))
    run = local(far.hostname, proxy=False, LINGER=60.0)
    client = run.connect()
    run.reaches("open")
    far.happen(run, lambda: (client.sendall(b"hello"), reset(client)))
    run.reaches()
    assert far.states == ["open", "draining"]


def test_events_that_come_too_late_do_nothing():
    """select() may name a connection that one before it in the same round has closed."""
    with bare("open") as (connection, client):
        connection.close()
        for late in (connection.on_early, connection.on_proxy, connection.on_shake, connection.on_upgrade,
                     connection.on_client, connection.on_edge, connection.on_farewell,
                     lambda mask: connection.on_connected(client, mask)):
            late(selectors.EVENT_READ | selectors.EVENT_WRITE)
        connection.on_addresses([(socket.AF_INET, (HOST, 1))])
        for late in (connection.connect, connection.pump_up, connection.close, lambda: connection._edge_ended(True)):
            late()
        assert connection.state == "closed" and not connection.attempts and not connection.edge_events
        assert receive_all(client) == (b"", "FIN")


def test_events_that_were_for_nothing_do_nothing():
    """select() may also be wrong."""
    with bare("open") as (connection, _):
        for state, late in (("resolving the name", connection.on_early), ("ending", connection.on_farewell),
                            ("open", connection.on_client)):
            connection.state = state
            late(selectors.EVENT_READ)
            assert connection.state == state


def test_a_socket_that_cannot_be_set_up_is_closed(monkeypatch):
    """macOS refuses options of a client that has left already."""
    def refuse(sock: socket.socket) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with bare("resolving the name") as (connection, client):
        monkeypatch.setattr(sniroute_carrier, "set_options", refuse)
        connection.start()
        assert connection.state == "closed" and receive_all(client) == (b"", "FIN")


def test_what_the_kernel_does_not_tell():
    with socket.socket() as sock:
        assert sniroute_carrier.was_reset(sock)
        fileno = sock.detach()
        os.close(fileno)
    reader, writer = os.pipe()
    with open(reader), open(writer, "w") as end:
        assert sniroute_carrier.unsent(end) == 0


# -- descriptors -------------------------------------------------------------------------------


@linux
def test_who_comes_when_it_is_full_waits_and_is_served(edge, name, carrier, echo_server):
    edge.far(name, echo_server.address)
    limit = sniroute_carrier.SPARE_FDS + 2 * 3
    run = carrier(name, prepare=f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(run.connect()) for _ in range(5)]
        for client in clients[:3]:
            client.sendall(b"hello")
            assert receive(client, 5) == b"hello"
        row, = wait_until(lambda: run.rows("paused"))
        assert row["message"] == "not accepting for now: 3 connections are open"
        cpu = run.cpu()
        for client in clients[3:]:
            client.sendall(b"later")
        clients[2].sendall(b"again")
        assert receive(clients[2], 5) == b"again"
        time.sleep(0.2)
        assert run.cpu() - cpu <= 0.05, "it spins"
        assert len(edge.requests(name)) == 3
        for at in (0, 1):
            reset(clients[at])
            assert receive(clients[3 + at], 5) == b"later"
    assert len(run.rows("paused")) == 1, "once in a while is enough"


@linux
def test_descriptors_that_are_really_gone(edge, name, carrier, echo_server):
    """As when other programs have taken them all (ENFILE): accept() fails, and so does the socket to the edge."""
    edge.far(name, echo_server.address)
    run = carrier(name, prepare="carrier.PAUSE = 0.05; carrier.GRACE = 0.1")
    limits = resource.prlimit(run.pid, resource.RLIMIT_NOFILE)
    with run.connect() as live:
        live.sendall(b"hello")
        assert receive(live, 5) == b"hello"
        taken = max(map(int, os.listdir(f"/proc/{run.pid}/fd"))) + 1
        resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (taken, limits[1]))
        with run.connect() as waits, run.connect() as too:
            waits.sendall(b"later")
            too.sendall(b"later")
            row, = wait_until(lambda: run.rows("paused"))
            assert row["message"] == "not accepting for now: Too many open files"
            cpu = run.cpu()
            live.sendall(b"again")
            assert receive(live, 5) == b"again"
            time.sleep(0.3)
            assert run.cpu() - cpu <= 0.06, "it spins"
            resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (taken + 1, limits[1]))  # for a client, not for the edge
            wait_until(lambda: run.fds() == taken + 1, what="the client's descriptor")
            time.sleep(0.15)  # some tries
            assert not run.rows("failed")
            resource.prlimit(run.pid, resource.RLIMIT_NOFILE, limits)
            assert receive(waits, 5) == receive(too, 5) == b"later"


def test_other_errors_of_accept_cost_one_client_and_not_the_listener(edge, name, local, echo_server):
    edge.far(name, echo_server.address)
    run = local(name)
    listener, = run.carrier.listeners.values()
    real = listener.sock
    errors = iter([OSError(errno.ECONNABORTED, "gone"), OSError(errno.EPROTO, "broken")])

    class Listening:
        def accept(self) -> Any:
            for error in errors:
                raise error
            return real.accept()

        def __getattr__(self, attribute: str) -> Any:
            return getattr(real, attribute)

    listener.sock = Listening()
    assert echoed(run) == b"hello"
    listener.sock = real


def test_a_listener_that_comes_while_accepting_pauses(edge, name, local, echo_server):
    edge.far(name, echo_server.address)
    run = local(name, PAUSE=0.1)
    run.carrier.call(lambda: run.carrier._pause("of the test"))
    target = sniroute_carrier.parse_target(name)
    opened: list[Any] = []
    run.carrier.call(lambda: opened.append(run.carrier.listen(target, (HOST, 0))))
    run.carrier.call(lambda: opened.append(run.carrier.listen(target, (HOST, 0))))
    wait_until(lambda: len(opened) == 2)
    run.carrier.call(lambda: run.carrier.unlisten(opened[0].address))
    for address in (run.address, opened[1].sock.getsockname()):
        run.address = address
        assert echoed(run) == b"hello"
    assert len(run.rows("paused")) == 1


def test_a_fault_of_ours_ends_one_connection_and_is_told(edge, name, local, monkeypatch, echo_server):
    edge.far(name, echo_server.address)
    run = local(name)
    with run.connect() as live:
        live.sendall(b"hello")
        assert receive(live, 5) == b"hello"
        with monkeypatch.context() as patch:
            patch.setattr(sniroute_carrier, "request", lambda *_: 1 // 0)
            with contextlib.suppress(ConnectionResetError), run.connect() as client:
                assert receive_all(client) == (b"", "RST")
            wait_until(lambda: run.rows("fault"))
        live.sendall(b"again")
        assert receive(live, 5) == b"again"
    assert echoed(run) == b"hello"
    row, = run.rows("fault")
    assert "ZeroDivisionError" in row["error"]
    run.log.rows.remove(row)


def test_a_fault_in_what_another_thread_asked_for(edge, name, local, echo_server):
    edge.far(name, echo_server.address)
    run = local(name)
    run.carrier.call(lambda: 1 // 0)
    done = threading.Event()
    run.carrier.call(done.set)
    assert echoed(run) == b"hello" and done.wait(5)
    row, = run.rows("fault")
    run.log.rows.remove(row)


def test_a_call_to_a_loop_that_is_full_or_over_is_no_error(local):
    run = local("nothing.invalid", proxy=False)
    done = threading.Event()

    def flood() -> None:
        for _ in range(5000):
            run.carrier.call(lambda: None)
        run.carrier.call(done.set)

    run.carrier.call(flood)
    assert done.wait(10)
    run.close()
    run.carrier.call(lambda: None)
    run.close()


# -- the program -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_and_everything(edge, name, carrier, echo_server, number):
    edge.far(name, echo_server.address)
    run = carrier(name)
    edge.fault(name, hang="upgrade")
    with run.connect() as dialling:
        wait_until(lambda: edge.requests(name))
        edge.fault(name)
        with run.connect() as client:
            client.sendall(b"hello")
            assert receive(client, 5) == b"hello"
            assert run.end(number) == 0
            assert receive_all(client)[0] == receive_all(dialling)[0] == b""
    with pytest.raises(ConnectionRefusedError):
        run.connect()
    ends = wait_until(lambda: len(edge.ends(name)) == 2 and edge.ends(name))
    assert sorted(row["close"] for row in ends) == [1001, 1006]


def test_variables_in_place_of_options(edge, name, program, echo_server):
    edge.far(name, echo_server.address)
    run = program("access", "ssh", environ={**edge.environ, "TUNNEL_SERVICE_HOSTNAME": f"http://{name}/x",
                                            "TUNNEL_SERVICE_URL": "tcp://localhost:0"})
    run.listening()
    assert echoed(run) == b"hello"
    assert edge.requests(name)[0]["path"] == "/x"


@pytest.mark.parametrize("words", [
    pytest.param(["access", "tcp", "--hostname", "{}", "--url", "127.0.0.1:0"], id="tcp"),
    pytest.param(["access", "rdp", "-T", "{}", "-L", "127.0.0.1:0", "--log-level", "warn"], id="short"),
    pytest.param(["access", "smb", "--tunnel-host", "{}", "--listener", "[::1]:0"], id="aliases"),
])
def test_words(name, words, monkeypatch, edge):
    monkeypatch.setenv("SSL_CERT_FILE", edge.environ["SSL_CERT_FILE"])
    command, given = words[:2], [word.format(name) for word in words[2:]]
    parsed = sniroute_carrier.parse_words(given, {})
    assert sniroute_carrier.COMMANDS[tuple(command)] is sniroute_carrier.access
    assert parsed.hostname.host == name and parsed.url[1] == 0
    assert parsed.loglevel == ("warn" if "warn" in words else "info")


@pytest.mark.parametrize("words, environ, lines", [
    pytest.param(["access", "tcp"], {}, ["--hostname is missing (or TUNNEL_SERVICE_HOSTNAME)"],
                 id="no hostname"),
    pytest.param(["access", "tcp", "--hostname", "a b", "--url", ":1", "--header", "X: s3cret\n"], {},
                 ["--hostname: 'a b' is not a hostname, HOST:PORT, or a URL",
                  "--url: ':1' is not HOST:PORT, with an address or localhost as HOST",
                  "--header: the value of X has characters that no header may have"], id="one line each"),
    pytest.param(["access", "tcp"], {"TUNNEL_SERVICE_HOSTNAME": "a b", "TUNNEL_SERVICE_URL": "20000"},
                 ["TUNNEL_SERVICE_HOSTNAME: 'a b' is not a hostname, HOST:PORT, or a URL",
                  "TUNNEL_SERVICE_URL: '20000' is not HOST:PORT, with an address or localhost as HOST"],
                 id="variables"),
    pytest.param(["access", "tcp", "--hostname", "a"], {"HTTPS_PROXY": "http://u:s3cret/@p:1"},
                 ["HTTPS_PROXY: it is not http://[USER:PASSWORD@]HOST[:PORT]"], id="proxy"),
    pytest.param(["access", "tcp", "--hostname", "a"], {"TUNNEL_SERVICE_TOKEN_SECRET": "s3cret\r\nX: y"},
                 ["TUNNEL_SERVICE_TOKEN_SECRET: the value of Cf-Access-Client-Secret has characters that no header"
                  " may have"], id="secret"),
    pytest.param(["access", "tcp", "--hostname", "a"], {"SSL_CERT_FILE": "/nowhere"},
                 ["SSL_CERT_FILE: /nowhere cannot be read"], id="certificates"),
    pytest.param(["access", "tcp", "--hostname", "a"], {"SSL_CERT_FILE": "/dev/null"},
                 ["SSL_CERT_FILE: there is no certificate in /dev/null"], id="no certificate"),
    pytest.param(["forwarders"], {"SSL_CERT_FILE": str(HERE / "pyproject.toml")},
                 [f"SSL_CERT_FILE: there is no certificate in {HERE / 'pyproject.toml'}"],
                 id="forwarders, no certificate"),
    pytest.param(["forwarders", "x"], {}, ["unexpected 'x'"], id="forwarders has no words"),
    pytest.param(["forwarders"], {"https_proxy": "https://u:s3cret@p"},
                 ["HTTPS_PROXY: a proxy is reached by http://, not by https://"], id="forwarders"),
])
def test_wrong_settings(program, words, environ, lines):
    run = program(*words, environ=environ)
    assert run.end(None) == 2
    assert run.errors.decode().splitlines() == [f"sniroute_carrier: {line}" for line in lines]
    assert b"s3cret" not in run.errors


@pytest.mark.parametrize("words", [[], ["access"], ["access", "kubectl"], ["tunnel"], ["access", "tcp", "--host", "a"],
                                   ["access", "tcp", "--help"], ["--version"], *sniroute_carrier.HELP])
def test_usage(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sniroute_carrier.py", *words])
    try:
        code = sniroute_carrier.main()
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    good = words[-1:] in (["--help"], ["-h"], ["--version"])
    assert code == (0 if good else 2)
    text, nothing = (out, err) if good else (err, out)
    assert nothing == "" and text.startswith("sniroute_carrier 0." if words == ["--version"] else "usage: ")


def test_it_runs_as_a_script_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, "-I", HERE / "sniroute_carrier.py", "--version"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"sniroute_carrier {sniroute_carrier.__version__} (Python {sys.version.split()[0]}")


def test_a_port_that_is_taken(program, edge, echo_server):
    run = program("access", "tcp", "--hostname", "app.example.test", "--url", f"{HOST}:{echo_server.address[1]}")
    assert run.end(None) == 1
    row, = run.all_rows()
    assert row["message"] == f"cannot listen on {HOST}:{echo_server.address[1]}: address already in use"


@linux
def test_closed_standard_streams_do_not_become_sockets(edge, name, program, echo_server):
    """A log written to descriptor 2 would else land in somebody's connection."""
    edge.far(name, echo_server.address)
    run = program("access", "tcp", "--hostname", name, "--url", f"{HOST}:0", "--loglevel", "debug",
                  prepare="import os, threading; kept = os.dup(2); [os.close(fd) for fd in range(3)]; listen = "
                          "carrier.Carrier.listen; carrier.Carrier.listen = lambda self, *rest: (lambda listener: "
                          "os.write(kept, b'{\"event\": \"listening\", \"listener\": \"%s\"}\\n' "
                          "% listener.address.encode()) and listener)(listen(self, *rest))")
    run.listening()
    assert echoed(run, NOISE) == NOISE
    assert {os.readlink(f"/proc/{run.pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
    assert run.end() == 0


def test_a_log_that_nobody_reads_holds_up_nobody(edge, name, program, echo_server):
    edge.far(name, echo_server.address)
    with contextlib.ExitStack() as stack:
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        run = program("access", "tcp", "--hostname", name, "--url", f"{HOST}:0", "--loglevel", "debug",
                      prepare=f"import os; os.dup2({writer}, 2)", pass_fds=[writer])
        line = os.read(reader, 4096)
        run.address = HOST, int(json.loads(line)["listener"].rpartition(":")[2])
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        for _ in range(10):
            assert echoed(run) == b"hello"
        cpu = run.cpu() if sys.platform == "linux" else 0.0
        time.sleep(0.3)
        assert sys.platform != "linux" or run.cpu() - cpu <= 0.05, "it spins"
        assert run.end() == 0


def test_a_log_whose_reader_has_gone_holds_up_nobody(edge, name, carrier, echo_server):
    edge.far(name, echo_server.address)
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, writer)
        run = carrier(name, "--loglevel", "debug", pass_fds=[writer],
                      prepare="import os; listen = carrier.Carrier.listen; carrier.Carrier.listen = "
                              f"lambda self, *rest: (listen(self, *rest), os.dup2({writer}, 2))[0]")
        os.close(reader)
        assert echoed(run) == echoed(run) == b"hello"
        assert run.end() == 0


def test_text_lines_unless_json_is_asked_for(edge, program):
    run = program("access", "tcp", "--hostname", "app.example.test", "--url", f"{HOST}:0",
                  environ={**edge.environ, "TUNNEL_LOG_OUTPUT": "default"})
    wait_until(lambda: run.errors.endswith(b"\n"))
    assert run.end() == 0
    assert re.fullmatch(rb'\S+Z INF listening on 127\.0\.0\.1:\d+ for app\.example\.test listener="127\.0\.0\.1:\d+"\n',
                        run.errors)


# -- between stdin and stdout ------------------------------------------------------------------


def test_one_connection_between_stdin_and_stdout(edge, name, program, echo_server):
    edge.far(name, echo_server.address)
    run = program("access", "tcp", "--hostname", name, stdin=subprocess.PIPE, prepare="carrier.GRACE = 0.5")
    with beside(lambda: (run.process.stdin.write(NOISE), run.process.stdin.close())):
        assert run.process.stdout.read() == NOISE
    assert run.end(None) == 0 and run.errors == b""
    assert end_of(edge, name)["close"] == 1000


def test_without_stdin_it_waits_for_the_banner(edge, name, program, serve):
    edge.far(name, serve(lambda sock: sock.sendall(b"banner")).address)
    edge.fault(name, delay=200)
    run = program("access", "tcp", "--hostname", name, prepare="")
    assert run.process.stdout.read() == b"banner"
    assert run.end(None) == 0


def test_without_an_edge_it_fails(edge, name, program):
    edge.fault(name, deny=403)
    run = program("access", "tcp", "--hostname", name, stdin=subprocess.PIPE)
    assert run.process.stdout.read() == b""
    assert run.end(None) == 1
    row, = run.rows("failed")
    assert row["reason"] == "denied"


def test_a_service_that_ends_ends_it_though_stdin_goes_on(edge, name, program, serve):
    edge.far(name, serve(lambda sock: sock.sendall(NOISE)).address)
    run = program("access", "tcp", "--hostname", name, stdin=subprocess.PIPE, prepare="carrier.LINGER = 0.1")
    assert run.process.stdout.read() == NOISE
    assert run.end(None) == 0


@pytest.mark.parametrize("phase", ["dialling", "open", "nobody reads stdout", "nobody reads stdout any more"])
def test_signals_end_it_between_stdin_and_stdout(edge, name, program, serve, phase):
    edge.far(name, serve(lambda sock: [sock.sendall(NOISE[:1 << 17]), "any more" in phase or sock.recv(1)]).address)
    if phase == "dialling":
        edge.fault(name, hang="upgrade")
    run = program("access", "tcp", "--hostname", name, "--loglevel", "debug", stdin=subprocess.PIPE)
    wait_until(lambda: edge.requests(name) if phase == "dialling" else run.rows("open"))
    if phase == "open":
        assert len(run.process.stdout.read(1 << 17)) == 1 << 17
    if "any more" in phase:  # half of it is in the pipe, and the connection is over
        run.process.stdin.close()
        run.ends()
    assert run.end() in ((0, -signal.SIGTERM) if "any more" in phase else (0,))


def test_a_stdout_that_is_closed_ends_it(edge, name, program, serve):
    edge.far(name, serve(send_blocks(50)).address)
    run = program("access", "tcp", "--hostname", name, stdin=subprocess.PIPE, prepare="carrier.GRACE = 0.1")
    run.process.stdout.read(1000)
    run.process.stdout.close()
    run.process.stdin.close()
    assert run.end(None) == 0


# -- many hostnames ----------------------------------------------------------------------------


@pytest.fixture
def forwarders(program) -> Program:
    return program("forwarders", stdin=subprocess.PIPE)


def test_sixteen_names_in_one_process(edge, forwarders, echo_server):
    names = [f"app-{next(numbers)}.example.test" for _ in range(16)]
    for hostname in names:
        edge.far(hostname, echo_server.address)
    forwarders.tell(*(f"listen {HOST}:0 {hostname}" for hostname in names))
    addresses = forwarders.listening(16)
    assert len(set(addresses)) == 16
    for address in addresses:
        forwarders.address = address
        assert echoed(forwarders) == b"hello"
    assert [len(edge.requests(hostname)) for hostname in names] == [1] * 16
    messages = [row["message"] for row in forwarders.rows("listening")]
    assert messages == [f"listening on {HOST}:{port} for {hostname}"
                        for (_, port), hostname in zip(addresses, names)]
    forwarders.process.stdin.close()
    assert forwarders.end(None) == 0


def test_closing_one_name_leaves_the_others(edge, name, forwarders, echo_server):
    other = f"other-{name}"
    for hostname in (name, other):
        edge.far(hostname, echo_server.address)
    forwarders.tell(f"listen {HOST}:0 {name}", f"listen [::1]:0 {other}")
    first, (_, port) = forwarders.listening(2)
    with socket.create_connection(first) as one, socket.create_connection(("::1", port)) as two:
        for client in (one, two):
            client.sendall(b"hello")
            assert receive(client, 5) == b"hello"
        forwarders.tell(f"close {HOST}:{first[1]}")
        row, = wait_until(lambda: forwarders.rows("closed"))
        assert (row["listener"], row["level"], row.get("error")) == (f"{HOST}:{first[1]}", "info", None)
        assert receive_all(one)[0] == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(first)
        two.sendall(b"again")
        assert receive(two, 5) == b"again"
        assert end_of(edge, name)["close"] == 1000
        forwarders.tell(f"listen {HOST}:{first[1]} {other}")
        assert forwarders.listening(3)[2] == first
        with socket.create_connection(first) as third:
            third.sendall(b"third")
            assert receive(third, 5) == b"third"
        forwarders.process.stdin.close()
        assert forwarders.end(None) == 0
        assert receive_all(two)[0] == b""
    wait_until(lambda: len(edge.ends(other)) == 2)


@pytest.mark.parametrize("line, listener, error", [
    pytest.param("listen", None, "it is neither .*", id="one word"),
    pytest.param("listen 127.0.0.1:0", "127.0.0.1:0", "it is neither .*", id="no hostname"),
    pytest.param("listen 127.0.0.1:0 a b", "127.0.0.1:0", "it is neither .*", id="a word too many"),
    pytest.param("listen 127.0.0.1:0 a..b", "127.0.0.1:0", "'a..b' is not a hostname, .*", id="no such hostname"),
    pytest.param("listen nowhere:1 app", "nowhere:1", "'nowhere:1' is not HOST:PORT, with an address .*",
                 id="no address"),
    pytest.param("listen 127.0.0.1:99999 app", "127.0.0.1:99999", "'127.0.0.1:99999' is not HOST:PORT, .*",
                 id="no port"),
    pytest.param("listen 192.0.2.1:1 app", "192.0.2.1:1", "cannot assign requested address", id="not ours"),
    pytest.param("close 127.0.0.1:1", "127.0.0.1:1", "it is neither .*", id="what is not open"),
    pytest.param("fetch 127.0.0.1:1", "127.0.0.1:1", "it is neither .*", id="another word"),
    pytest.param("listen 127.0.0.1:0 caf\u00e9", "127.0.0.1:0", "'caf..' is not a hostname, .*", id="not ASCII"),
    pytest.param("listen " + "\\" * 900 + " x", "\\" * 900, ".*", id="a long one"),
])
def test_lines_that_cannot_be_obeyed_are_answered(control, line, listener, error):
    control.tell(line)
    row, = wait_until(lambda: control.rows("closed"))
    assert row.get("listener") == listener and row["level"] == "error" and re.fullmatch(error, row["error"])
    control.tell(f"listen {HOST}:0 app.example.test")
    wait_until(lambda: control.rows("listening"))


class Controlled:
    """`forwarders` in a thread of the test: stdin is a pipe of its own."""

    def __init__(self) -> None:
        self.log = Notes()
        self.carrier = Carrier(self.log, [], None, "")
        reader, self.writer = os.pipe()
        self.stdin = os.dup(0)
        os.dup2(reader, 0)
        os.close(reader)
        self.carrier.leave = self.carrier.stop  # this process does not end: see test_ports_stay_ours_until_the_end
        sniroute_carrier.Control(self.carrier)
        self.thread = threading.Thread(target=self.carrier.run, name="carrier")
        self.thread.start()

    def rows(self, event: str) -> list[dict[str, str]]:
        return [row for row in self.log.rows if row.get("event") == event]

    def tell(self, line: str) -> None:
        os.write(self.writer, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self.writer)
        self.thread.join(10)
        os.dup2(self.stdin, 0)
        os.close(self.stdin)
        assert not self.thread.is_alive() and not self.carrier.listeners
        assert not self.rows("fault")


@pytest.fixture
def control() -> Iterator[Controlled]:
    made = Controlled()
    yield made
    made.close()


def test_lines_in_any_portions(control):
    """Blank ones are nothing."""
    for byte in b"\nlisten 127.0.0.1:0 a.example.test\r\n \r\nlisten 127.0.0.1:0 b.example.test\n":
        os.write(control.writer, bytes([byte]))
    wait_until(lambda: len(control.rows("listening")) == 2)
    assert not control.rows("closed")


def test_a_port_that_is_taken_is_told_and_nothing_else_suffers(edge, name, forwarders, echo_server):
    edge.far(name, echo_server.address)
    port = echo_server.address[1]
    forwarders.tell(f"listen {HOST}:{port} {name}", f"listen {HOST}:0 {name}")
    forwarders.listening()
    row, = forwarders.rows("closed")
    assert (row["listener"], row["error"]) == (f"{HOST}:{port}", "address already in use")
    assert echoed(forwarders) == b"hello"


def test_the_answer_to_a_long_line_is_whole(forwarders):
    """In the log as it is written: three fields of what was said, each character escaped."""
    forwarders.tell("listen " + "\\" * 450 + " " + '"' * 450)
    row, = wait_until(lambda: forwarders.rows("closed"))
    assert row["listener"] == "\\" * 397 + "..." and row["error"]


def test_a_line_without_end_ends_it(forwarders):
    with contextlib.suppress(BrokenPipeError):
        forwarders.tell(f"listen {HOST}:0 app.example.test")
        forwarders.listening()
        forwarders.process.stdin.write(b"x" * 5000)
        forwarders.process.stdin.flush()
    assert forwarders.end(None) == 0
    assert [row["message"] for row in forwarders.rows("end")] == ["stdin: a line of more than 1024 bytes"]


def test_signals_end_forwarders(forwarders):
    forwarders.tell(f"listen {HOST}:0 app.example.test")
    forwarders.listening()
    assert forwarders.end() == 0


def test_forwarders_want_a_pipe(program, tmp_path, edge):
    (tmp_path / "file").write_text("")
    with open(tmp_path / "file") as file:
        run = program("forwarders", stdin=file)
        assert run.end(None) == 2
    assert run.errors == b"sniroute_carrier: stdin cannot be waited for: give it a pipe\n"


def test_forwarders_give_their_identity(edge, name, program, echo_server):
    edge.far(name, echo_server.address)
    edge.fault(name, service_token=["s3cret-id", "s3cret-word"])
    run = program("forwarders", stdin=subprocess.PIPE,
                  environ={**edge.environ, "TUNNEL_SERVICE_TOKEN_ID": "s3cret-id",
                           "TUNNEL_SERVICE_TOKEN_SECRET": "s3cret-word"})
    run.tell(f"listen {HOST}:0 {name}")
    run.listening()
    assert echoed(run) == b"hello"
    run.process.stdin.close()
    assert run.end(None) == 0 and b"s3cret" not in run.errors
