"""Tests of sniroute_admin.py: a real router and real tunnels behind it, and real sockets and a browser in front."""

from __future__ import annotations

import ast
import base64
import collections
import contextlib
import hashlib
import http.client
import json
import logging
import math
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import types
from typing import Any, Callable, Iterator, NamedTuple

import pytest

import sniroute
import sniroute_log
import sniroute_names
import sniroute_refusals
from sniroute import sample_hello
from sniroute_launchers import cloudflared_launcher
from sniroute_tunnels import Start, TunnelTable, View
import sniroute_admin
from conftest import HERE, HOST, Address, Cloudflared, FakeClock, echo, wait_until
from sniroute_admin import Admin, Collector, Histogram, TopNames, attach, escape_label, printable, show_number

TOKEN = "a-token-of-the-tests"
HOSTILE = "<b>x</b>\"\\\x1b[31m\n\r\u202e\u00e9{}"
TUNNEL = "--route=*.example.com=cloudflared:{name}"
DB = "cloudflared:db.example.com"


class Running:
    """A Router with its loop in a thread of this process, and its admin."""

    def __init__(self, *argv: str, program: str, token: str | None = TOKEN, listener: socket.socket | None = None):
        settings = sniroute.load_settings(["--listen", f"{HOST}:0", f"--admin={HOST}:0", *argv],
                                          {"SNIROUTE_ADMIN_TOKEN": token} if token else {})
        self.tunnels = TunnelTable({"cloudflared": cloudflared_launcher(program, {})}, settings.ports,
                                   idle=settings.idle, start_timeout=settings.start_timeout,
                                   max_tunnels=settings.max_tunnels, max_starting=settings.max_starting)
        self.settings = settings
        self.listener = listener
        self.router = sniroute.Router(settings, self.tunnels)
        self.thread = threading.Thread(target=self.router.serve_forever, name="loop")

    def __enter__(self) -> Running:
        self.tunnels.start()
        self.thread.start()
        try:
            self.admin = attach(self.router, self.settings, self.listener)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.admin.close()
        self.stop()

    def stop(self) -> None:
        self.router.shutdown()
        self.thread.join()
        self.tunnels.close(now=True)
        self.router.server_close()

    def connect(self, name: str) -> socket.socket:
        """A client that has said its name."""
        client = socket.create_connection(self.router.server_address, 20)
        client.sendall(sample_hello(name))
        return client

    def refused(self, name: str) -> None:
        """A client that is refused."""
        with self.connect(name) as client:
            with contextlib.suppress(ConnectionResetError):
                while client.recv(4096):
                    pass

    def collected(self) -> None:
        """Wait until all that has ended is counted, and no answer is one of before."""
        admin = self.admin
        wait_until(lambda: not self.router.connections, what="the end of all connections")
        wait_until(lambda: not admin.collector.endings, what="the collector")
        turn = admin.due
        wait_until(lambda: admin.due != turn, what="the collector's next turn")
        turn = admin.due
        wait_until(lambda: admin.due != turn, what="the collector's next turn")
        admin.status.forget()
        admin.metrics.forget()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of an admin waits for its next look at the endings."""
    monkeypatch.setattr(sniroute_admin, "COLLECT", 0.02)
    monkeypatch.setattr(sniroute_admin, "SAMPLE", 0.1)


@pytest.fixture
def run(cloudflared: Cloudflared) -> Iterator[Callable[..., Running]]:
    """run(*options, program=..., token=..., listener=...) -> Running.  It ends before the stand-in's end is checked."""
    with contextlib.ExitStack() as stack:
        yield lambda *argv, program=cloudflared.path, **more: stack.enter_context(
            Running(*argv, program=program, **more))


@pytest.fixture
def ports(free_ports) -> str:
    first, last = free_ports(20)
    return f"--ports={first}-{last}"


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def dial(address: Address | str) -> socket.socket:
    """A connection to the admin, with a time-out so that a failing test ends."""
    if isinstance(address, tuple):
        return socket.create_connection(address, 20)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(address)
    return sock


def read_reply(sock: socket.socket, method: str = "GET") -> Reply:
    response = http.client.HTTPResponse(sock, method=method)
    try:
        response.begin()
        return Reply(response.status, response.headers, response.read())
    finally:
        response.close()


def tell(address: Address | str, text: str | bytes, method: str = "GET") -> Reply:
    """What comes back for these bytes."""
    with dial(address) as sock:
        sock.sendall(text.encode("latin-1") if isinstance(text, str) else text)
        return read_reply(sock, method)


def ask(admin: Admin, path: str, method: str = "GET", host: str | None = "localhost", token: str | None = TOKEN,
        **fields: str) -> Reply:
    """One request.  `fields` are more header fields, with `_` for `-`."""
    lines = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host is not None else [])]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return tell(admin.address, "\r\n".join([*lines, "", ""]), method)


# -- who may ask -------------------------------------------------------------------------------

PATHS = {"/": "GET", "/metrics": "GET", "/status": "GET", "/healthz": "GET", "/readyz": "GET",
         "/reload": "POST", "/tunnels/db.example.com/stop": "POST", "/tunnels/db.example.com/start": "POST",
         "/nothing": "", "/tunnels/db.example.com": "", "/status/": "", "/../status": "", "*": ""}
RIGHT = {"/tunnels/db.example.com/stop": 404}  # it is not up


@pytest.mark.parametrize("token", [TOKEN, None], ids=["with a token", "without a token"])
def test_table_of_methods_and_paths(token, run, cloudflared, ports, serve):
    """(method, path) -> status: with the right token, without one, and where the router has none."""
    cloudflared.far("*", serve(echo).address)
    running = run(TUNNEL, ports, token=token)
    found, expected = {}, {}
    for path, right in PATHS.items():
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "PROPFIND"):
            row = f"{method} {path}"
            reply = ask(running.admin, path, method, token=TOKEN)
            found[row] = reply.status, reply.headers.get("Allow")
            fits = method == right or (method, right) == ("HEAD", "GET")
            expected[row] = (404, None) if not right else (405, "POST" if right == "POST" else "GET, HEAD") \
                if not fits else (200 if right == "GET" else 403 if token is None else RIGHT.get(path, 200), None)
            if right == "GET":
                found[f"{row} in the dark"] = ask(running.admin, path, method, token=None).status
                expected[f"{row} in the dark"] = expected[row][0]
            if path == "/tunnels/db.example.com/start" and method == "POST" and token:
                assert ask(running.admin, path.replace("start", "stop"), "POST").status == 200
                wait_until(lambda: not running.tunnels.snapshot(), what="the stop")
    assert found == expected
    if token is None:
        assert "SNIROUTE_ADMIN_TOKEN" in ask(running.admin, "/reload", "POST").json["error"]


@pytest.mark.parametrize("path", [path for path, method in PATHS.items() if method == "POST"])
def test_every_order_wants_the_token(path, run):
    running = run()
    calls: list[str] = []
    running.router.reload = lambda: calls.append("reload") or []
    running.tunnels.stop = running.tunnels.wait = lambda *_: calls.append("tunnels") or True
    found = {}
    for said in (None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN,
                 f"Bearer {TOKEN} {TOKEN}", "Bearer \xff\xfe", f"Bearer {TOKEN.upper()}"):
        reply = ask(running.admin, path, "POST", token=None, **({} if said is None else {"Authorization": said}))
        found[said] = reply.status, reply.headers["WWW-Authenticate"]
    assert set(found.values()) == {(401, 'Bearer realm="sniroute"')}, found
    assert calls == []
    assert ask(running.admin, path, "POST", token=None, Authorization=f"bearer {TOKEN}").status == 200
    assert len(calls) == 1


HOSTS = {
    "localhost": 200, "LOCALHOST": 200, "localhost:PORT": 200, "127.0.0.1": 200, "127.0.0.1:PORT": 200, "[::1]": 200,
    "[::1]:PORT": 200, "localhost:8080": 200,  # as forwarded by ssh -L
    None: 400, "": 400,
    "evil.test": 421, "evil.test:PORT": 421, "localhost.evil.test": 421, "localhost@evil.test": 421, "127.0.0.2": 421,
    "0.0.0.0": 421, "127.1": 421, "2130706433": 421, "::1": 421, "localhost.": 421, "localhost:": 421,
    "localhost:x": 421, "sniroute": 421, "localhost localhost": 421, "localhost,evil.test": 421,
    "http://localhost": 421,
}


@pytest.mark.parametrize("path", ["/healthz", "/status", "/metrics", "/", "/nothing", "POST /reload"])
def test_host_has_to_be_this_host(path, run):
    """A page that has its own name resolve to 127.0.0.1 says that name (DNS rebinding)."""
    running = run()
    method, _, path = path.rpartition(" ")
    port = str(running.admin.address[1])
    right = 404 if path == "/nothing" else 200
    found = {host: ask(running.admin, path, method or "GET", host=host and host.replace("PORT", port)).status
             for host in HOSTS}
    assert found == {host: right if status == 200 else status for host, status in HOSTS.items()}


ORIGINS = {
    ("Origin", "http://localhost:PORT"): 200, ("Origin", "http://localhost"): 403,
    ("Origin", "http://127.0.0.1:PORT"): 403, ("Origin", "https://localhost:PORT"): 403,
    ("Origin", "http://evil.test"): 403, ("Origin", "null"): 403, ("Origin", ""): 403,
    ("Origin", "http://localhost:PORT http://evil.test"): 403, ("Origin", "http://localhost:3000"): 403,
    ("Sec-Fetch-Site", "same-origin"): 200, ("Sec-Fetch-Site", "none"): 200, ("Sec-Fetch-Site", "same-site"): 403,
    ("Sec-Fetch-Site", "cross-site"): 403, ("Sec-Fetch-Site", ""): 403,
}


@pytest.mark.parametrize("path", ["/healthz", "/status", "/metrics", "/", "/nothing", "POST /reload"])
def test_page_of_another_origin_may_not_ask(path, run):
    running = run()
    method, _, path = path.rpartition(" ")
    port = str(running.admin.address[1])
    right = 404 if path == "/nothing" else 200
    found = {(name, value): ask(running.admin, path, method or "GET", host=f"localhost:{port}",
                                **{name: value.replace("PORT", port)}).status for name, value in ORIGINS}
    assert found == {row: right if status == 200 else status for row, status in ORIGINS.items()}


def request(*lines: str, body: str = "") -> str:
    return "\r\n".join([*lines, "", body])


GET = "GET /healthz HTTP/1.1", "Host: localhost"
POST = "POST /reload HTTP/1.1", "Host: localhost", f"Authorization: Bearer {TOKEN}"
FRAMES = {
    "whole": (request(*GET), 200),
    "a query": (request("GET /healthz?probe=1 HTTP/1.1", "Host: localhost"), 200),
    "HTTP/1.0": (request("GET /healthz HTTP/1.0", "Host: localhost"), 200),
    "lines that end with LF": ("GET /healthz HTTP/1.1\nHost: localhost\n\n", 200),
    "a body of GET": (request(*GET, "Content-Length: 3", body="abc"), 200),
    "a body": (request(*POST, "Content-Length: 3", body="abc"), 200),
    "the largest body": (request(*POST, "Content-Length: 65536", body="x" * 65536), 200),
    "a body of one byte more": (request(*POST, "Content-Length: 65537", body="x" * 65537), 413),
    "a body that only says so": (request(*POST, "Content-Length: 999999999999"), 413),
    "a body without end": (request(*POST, "Content-Length: 1" + "0" * 30), 400),
    "a negative body": (request(*POST, "Content-Length: -1"), 400),
    "a body of words": (request(*POST, "Content-Length: many"), 400),
    "two lengths": (request(*POST, "Content-Length: 0", "Content-Length: 3"), 400),
    "chunks": (request(*POST, "Transfer-Encoding: chunked", body="0\r\n\r\n"), 411),
    "HTTP/0.9": ("GET /healthz\r\n\r\n", 400),
    "HTTP/0.9 with a header": ("GET /healthz\r\nHost: localhost\r\n\r\n", 400),
    "HTTP/2.0": (request("GET /healthz HTTP/2.0", "Host: localhost"), 505),
    "HTTP/x": (request("GET /healthz HTTP/x", "Host: localhost"), 400),
    "four words": (request("GET /healthz HTTP/1.1 more", "Host: localhost"), 400),
    "garbage": ("\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    "Host twice": (request(*GET, "Host: evil.test"), 400),
    "Origin twice": (request(*GET, "Origin: http://localhost", "Origin: http://evil.test"), 400),
    "a line that is no field": (request(*GET, "what", "Origin: http://evil.test"), 400),
    "a long line": (request("GET /" + "x" * 40000 + " HTTP/1.1", "Host: localhost"), 414),
    "many fields": (request(*GET, *(f"X-{number}: y" for number in range(200))), 431),
    "a whole URL": (request("GET http://localhost/healthz HTTP/1.1", "Host: localhost"), 404),
    "a name that is not UTF-8": (request(POST[0].replace("/reload", "/tunnels/%ff/stop"), *POST[1:]), 400),
    "a slash in a name": (request(POST[0].replace("/reload", "/tunnels/a%2Fb.test/stop"), *POST[1:]), 404),
    "CR and LF in a name": (request(POST[0].replace("/reload", "/tunnels/a%0d%0ab:c/stop"), *POST[1:]), 404),
}


def test_table_of_frames(run):
    """Each gets its status, and all that follows is well-formed, names no file, and shows no traceback."""
    running = run()
    found = {}
    for name, (text, _) in FRAMES.items():
        reply = tell(running.admin.address, text)
        found[name] = reply.status
        assert reply.headers["Connection"] == "close"
        assert not re.search(rb"Traceback|\.py|/work|[^\n -~]", reply.body), reply.body
    assert found == {name: status for name, (_, status) in FRAMES.items()}


def test_client_that_is_declined_early_may_finish_its_request(run):
    """It is not reset while it sends, and reads why."""
    running = run()
    with dial(running.admin.address) as sock:
        sock.sendall(request(*POST, "Content-Length: 300000", body="x" * 100_000).encode())
        assert select.select([sock], [], [], 20)[0]
        with pytest.raises(AssertionError):
            wait_until(lambda: not running.admin.server.live, timeout=0.2)
        for _ in range(2):
            sock.sendall(b"x" * 100_000)
        assert read_reply(sock).status == 413


def test_every_answer_has_the_headers_of_its_safety(run):
    running = run()
    for path in (*PATHS, "/x"):
        for method in ("GET", "HEAD", "POST"):
            headers = ask(running.admin, path, method, token=None).headers
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["Cache-Control"] == "no-store"
            assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
            assert "unsafe" not in headers["Content-Security-Policy"]
            assert "Server" not in headers and "Access-Control-Allow-Origin" not in headers


def test_head_is_get_without_the_body(run):
    running = run()
    for path in (path for path, method in PATHS.items() if method == "GET"):
        got, head = ask(running.admin, path), ask(running.admin, path, "HEAD")
        assert head.status == 200
        with dial(running.admin.address) as sock:
            sock.sendall(request(f"HEAD {path} HTTP/1.1", "Host: localhost").encode())
            assert sock.makefile("rb").read().partition(b"\r\n\r\n")[1:] == (b"\r\n\r\n", b"")
        assert head.headers["Content-Type"] == got.headers["Content-Type"]
        assert int(head.headers["Content-Length"]) > 0 and int(got.headers["Content-Length"]) == len(got.body)


def test_policy_names_what_the_page_has(run):
    page = ask(run().admin, "/")
    text = page.body.decode()
    for tag in ("style", "script"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page.headers["Content-Security-Policy"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\son[a-z]+=|style=", text)
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", text) == []


# -- what it shows -----------------------------------------------------------------------------

NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")


def parse_metrics(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """The exposition format, version 0.0.4, read strictly: {sample name: {labels: value}}."""
    assert text.endswith("\n")
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = collections.defaultdict(dict)
    kinds: dict[str, str] = {}
    helped = name = ""
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            _, _, helped, words = line.split(" ", 3)
            assert helped not in kinds and words
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == helped and kind in ("counter", "gauge", "histogram")
            kinds[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            family = re.sub("_(bucket|sum|count)$", "", match[1]) if kinds[name] == "histogram" else match[1]
            assert family == name, f"{line}: not behind its TYPE"
            labels = tuple((key, re.sub(r"\\(.)", lambda escaped: {"n": "\n"}.get(escaped[1], escaped[1]), value))
                           for key, value in re.findall(LABEL, match[2] or ""))
            assert len(dict(labels)) == len(labels) and labels not in samples[match[1]], line
            samples[match[1]][labels] = float(match[match.re.groups])
    for name, kind in kinds.items():
        assert kind != "counter" or name.endswith("_total"), name
        if kind == "histogram":
            buckets = samples[f"{name}_bucket"]
            bounds = [float(dict(labels)["le"]) for labels in buckets]
            assert bounds == sorted(bounds) and math.isinf(bounds[-1])
            assert list(buckets.values()) == sorted(buckets.values()), "cumulative"
            assert buckets[("le", "+Inf"),] == samples[f"{name}_count"][()]
            assert samples[f"{name}_sum"][()] >= 0
        else:
            assert all(value >= 0 for value in samples[name].values())
    return dict(samples)


def metrics(running: Running) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    reply = ask(running.admin, "/metrics")
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse_metrics(reply.body.decode())


def value(samples: dict, name: str, **labels: str) -> float:
    return samples[name][tuple(labels.items())]


def test_metrics_count_what_happened(run, serve, cloudflared, ports):
    far = serve(echo)
    cloudflared.far("*", far.address)
    running = run(TUNNEL, f"--route=web.test.test=tcp:{far.address[0]}:{far.address[1]}", ports)
    hello = len(sample_hello("db.example.com"))
    with running.connect("db.example.com") as client:
        assert len(client.recv(65536)) == hello
        running.refused("a.nowhere.test")
        running.refused("b.nowhere.test")
        wait_until(lambda: running.router.counters.get("no_route") == 2, what="refusals")
        wait_until(lambda: running.admin.collector.totals[2] >= hello, what="bytes of a connection that is open")
        running.admin.metrics.forget()
        seen = metrics(running)
        assert value(seen, "sniroute_connections_active") == 1
        assert value(seen, "sniroute_route_connections_active", route="*.example.com") == 1
        assert value(seen, "sniroute_bytes_total", direction="up") == hello
        assert value(seen, "sniroute_tunnels", state="ready") == 1
    running.collected()
    seen = metrics(running)
    assert value(seen, "sniroute_build_info", version=sniroute_names.__version__, python=sys.version.split()[0]) == 1
    assert value(seen, "sniroute_connections_active") == 0
    assert value(seen, "sniroute_accepted_total") == 3
    assert value(seen, "sniroute_connections_total", result="no_route") == 2
    assert sum(seen["sniroute_connections_total"].values()) == 3
    assert value(seen, "sniroute_route_connections_total", route="*.example.com") == 1
    assert value(seen, "sniroute_route_connections_total", route="web.test.test") == 0
    assert value(seen, "sniroute_route_bytes_total", route="*.example.com", direction="down") == hello
    assert value(seen, "sniroute_tunnel_starts_total", result="ready") == 1
    assert value(seen, "sniroute_port_pool_size") == 20
    assert value(seen, "sniroute_port_pool_used") == 1
    assert seen["sniroute_route_wait_seconds_count"][()] == 1
    assert seen["sniroute_connection_duration_seconds_count"][()] == 3
    assert seen["sniroute_tunnel_start_seconds_count"][()] == 1
    assert 0 < seen["sniroute_tunnel_start_seconds_sum"][()] < 20
    assert value(seen, "process_open_fds") > 5
    assert value(seen, "process_resident_memory_bytes") > 1 << 20
    assert abs(value(seen, "process_start_time_seconds") - time.time()) < 86400
    assert {dict(labels)["result"] for labels in seen["sniroute_connections_total"]} \
        == {*sniroute_refusals.REFUSALS, *sniroute_admin.ENDS}


def test_labels_do_not_grow_with_what_clients_say(run):
    """1000 names that nobody has a route for, and some more in what failed: no label more."""
    running = run("--route=*.example.com=tcp:127.0.0.1:9")
    before = metrics(running)
    for number in range(1000):
        running.refused(f"n{number}.x{number % 7}.nowhere.test")
    running.refused("some.example.com")
    running.collected()
    after = metrics(running)
    assert {name: set(samples) for name, samples in before.items()} == {
        name: set(samples) for name, samples in after.items()}
    assert value(after, "sniroute_connections_total", result="no_route") == 1000
    text = ask(running.admin, "/metrics").body
    assert b"nowhere" not in text and b"127.0.0.1" not in text and TOKEN.encode() not in text
    status = ask(running.admin, "/status").body
    assert b"nowhere" in status and TOKEN.encode() not in status
    assert len(running.admin.collector.names.counts) <= sniroute_admin.NAMES_KEPT


def test_label_values_are_escaped():
    assert escape_label('a"b\\c\nd') == 'a\\"b\\\\c\\nd'
    assert [show_number(number) for number in (1, 0.25, 1e-07, float("inf"), 12345678901234567890)] \
        == ["1", "0.25", "1e-07", "+Inf", "12345678901234567890"]
    text = f'# HELP a b\n# TYPE a gauge\na{{route="{escape_label(HOSTILE)}"}} 1\n'
    assert parse_metrics(text) == {"a": {(("route", HOSTILE),): 1.0}}


def hostile_ending(reason: str = "no_route", name: str | None = HOSTILE) -> sniroute_log.Ending:
    return sniroute_log.Ending(20, time.time(), (HOST, 4711), name, HOSTILE, HOSTILE, 1, 2, 3.0, reason, HOSTILE, None)


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    for part in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(part)


def test_hostile_text_is_shown_printable(run):
    running = run()
    router = running.router
    router.routes = types.SimpleNamespace(
        routes=(sniroute.Route(HOSTILE, HOSTILE),), tallies={HOSTILE: sniroute.Tally()})
    running.tunnels.failed = lambda: [View(HOSTILE, "failed", 0, 0, 0, 0, 0.0, 4.0, 1, HOSTILE)]
    running.tunnels.started.append(Start(HOSTILE, time.time(), 1.5))
    router.endings.extend([hostile_ending(), hostile_ending(name=None), hostile_ending("client_closed")])
    running.collected()
    seen = metrics(running)
    assert value(seen, "sniroute_route_connections_active", route=HOSTILE) == 0
    reply = ask(running.admin, "/status")
    assert not re.search(rb"[^\n -~]", reply.body)
    status = reply.json
    assert all(printable(text, 10_000) == text for text in strings(status))
    shown = printable(HOSTILE)
    assert shown == '<b>x</b>"\\?[31m????{}'
    assert status["last_refusals"][0]["name"] == "" and status["last_refusals"][1]["name"] == shown
    assert status["refused_names"] == [{"name": shown, "count": 1}]
    assert status["routes"][0]["pattern"] == status["tunnels"][0]["words"] == shown
    assert status["slowest_starts"][0]["key"] == shown
    router.routes = router.settings.routes


def test_status_shows_connections_tunnels_and_what_failed(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(echo).address)
    cloudflared.fault("bad.example.com", exit=1, words="lookup bad.example.com: no such host")
    running = run(TUNNEL, ports, "--max-connections=100")
    with running.connect("db.example.com") as client, socket.create_connection(running.router.server_address) as silent:
        hello = len(client.recv(65536))
        running.refused("bad.example.com")
        running.refused("scan.test.test")
        wait_until(lambda: len(running.admin.collector.refusals) == 2, what="refusals")
        running.admin.status.forget()
        status = ask(running.admin, "/status").json
        client_port, silent_port = client.getsockname()[1], silent.getsockname()[1]
    assert (status["phase"], status["paused"], status["pid"], status["version"]) \
        == ("running", False, os.getpid(), sniroute_names.__version__)
    assert status["listening"] == [f"{HOST}:{running.router.server_address[1]}"]
    assert status["limits"] == {"connections": 100, "tunnels": running.tunnels.max_tunnels, "ports": 20}
    assert status["connections"]["active"] == 2 and status["connections"]["states"] == {"open": 1, "prelude": 1}
    rows = {row["client"]: row for row in status["oldest_connections"]}
    row = rows[f"{HOST}:{client_port}"]
    assert 0 <= row.pop("seconds") < 20
    assert row == {"client": f"{HOST}:{client_port}", "name": "db.example.com", "route": "*.example.com", "backend": DB,
                   "state": "open", "up": hello, "down": hello}
    assert rows[f"{HOST}:{silent_port}"]["name"] == ""
    up, failed = status["tunnels"]
    assert (up["key"], up["state"], up["leases"]) == (DB, "ready", 1) and up["port"] > 0 and up["pid"] > 0
    assert (failed["key"], failed["state"]) == ("cloudflared:bad.example.com", "failed")
    assert "no such host" in failed["words"] and failed["next"] > 0
    assert status["tunnel_states"]["ready"] == status["tunnel_states"]["failed"] == 1
    assert status["refusals"] == {"no_route": 1, "tunnel_unknown": 1}
    assert status["refused_names"] == [{"name": "bad.example.com", "count": 1}, {"name": "scan.test.test", "count": 1}]
    last, first = status["last_refusals"]
    assert (last["name"], last["reason"]) == ("scan.test.test", "no_route")
    assert last["detail"] == "no route for scan.test.test"
    assert first["reason"] == "tunnel_unknown" and "no such host" in first["detail"]
    assert [row["key"] for row in status["slowest_starts"]] == [DB]
    (route,) = status["routes"]
    assert (route["pattern"], route["active"], route["total"], route["refused"], route["up"]) \
        == ("*.example.com", 1, 1, 1, hello)


def test_lists_of_status_are_bounded(run, monkeypatch):
    monkeypatch.setattr(sniroute_admin, "CONNECTIONS_SHOWN", 3)
    running = run(*(f"--route=n{number}.example.com=tcp:127.0.0.1:9" for number in range(5)))
    monkeypatch.setattr(sniroute_admin, "ROUTES_SHOWN", 4)
    with contextlib.ExitStack() as stack:
        for number in range(5):
            stack.enter_context(socket.create_connection(running.router.server_address))
            wait_until(lambda: len(running.router.connections) == number + 1)
        running.router.endings.extend(hostile_ending() for _ in range(200))
        wait_until(lambda: not running.router.endings)
        running.admin.status.forget()
        status = ask(running.admin, "/status").json
        began = sorted(connection.began for connection in running.router.connections)
    ages = [row["seconds"] for row in status["oldest_connections"]]
    assert len(ages) == 3 and ages == sorted(ages, reverse=True) and status["connections"]["active"] == 5
    assert began == sorted(began)
    assert len(status["last_refusals"]) == sniroute_admin.REFUSALS_SHOWN
    assert len(status["routes"]) == 4


def test_asking_often_costs_one_rendering(run, monkeypatch):
    monkeypatch.setattr(sniroute_admin, "CACHE_TIME", 60.0)
    running = run()
    made = []
    snapshot = running.tunnels.snapshot
    running.tunnels.snapshot = lambda: made.append(1) or snapshot()
    bodies = {ask(running.admin, path).body for path in ("/status", "/metrics") for _ in range(50)}
    assert len(bodies) == len(made) == 2
    running.router.reload = lambda: []
    ask(running.admin, "/reload", "POST")
    ask(running.admin, "/status")
    assert len(made) == 3, "after an order it is made anew"


# -- the collector -----------------------------------------------------------------------------


def test_frequent_names_survive_any_number_of_others():
    names = TopNames(16)
    for number in range(20_000):
        names.add(f"n{number}.test")
        if number % 10 == 0:
            names.add("often.test")
        assert len(names.counts) <= 16
    added = 22_000
    assert 2000 - added // 17 <= names.counts["often.test"] <= 2000
    assert max(names.counts, key=names.counts.get) == "often.test"


def test_histogram_counts_up_to_and_with_its_bounds():
    histogram = Histogram((1.0, 2.0))
    for seen in (0.5, 1.0, 1.5, 2.0, 99.0):
        histogram.observe(seen)
    assert (histogram.counts, histogram.sum) == ([2, 2, 1], 104.0)


def stub_router() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        counters=collections.Counter(), connections=[], refusal_kinds=frozenset(("no_route",)), started=100.0,
        last_reload=(True, 100.0), tunnels=types.SimpleNamespace(started=collections.deque(maxlen=3)))


def connection(up: int, down: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(up=types.SimpleNamespace(total=up), down=types.SimpleNamespace(total=down))


def test_rates_count_the_bytes_of_open_connections_and_never_fall():
    router, clock = stub_router(), FakeClock()
    collector = Collector(router, clock)
    one = connection(1000, 50)
    router.connections = [types.SimpleNamespace(up=None, down=None)]  # it has just ended, and is not counted yet
    router.counters.update(accepted=4, no_route=2)
    clock.jump(0.09)
    collector.collect()
    assert not collector.samples
    router.connections = [one]
    clock.jump(1.91)
    collector.collect()
    assert collector.samples[-1] == (2.0, 1.0, 500.0, 25.0, 1)
    one.up = None  # between the loop's two steps at its end
    clock.jump(1.0)
    collector.collect()
    assert collector.samples[-1] == (0.0, 0.0, 0.0, 0.0, 1) and collector.totals[2:] == [1000, 50]
    router.connections = []
    router.counters.update(bytes_up=1500, bytes_down=50)
    clock.jump(1.0)
    collector.collect()
    assert collector.samples[-1] == (0.0, 0.0, 500.0, 0.0, 0)


def test_each_start_is_counted_once():
    router = stub_router()
    starts = router.tunnels.started
    collector = Collector(router, FakeClock())
    histogram = collector.histograms["sniroute_tunnel_start_seconds"]
    for _ in range(2):
        collector.collect()
        assert sum(histogram.counts) == 0
    starts.append(Start("a", 1.0, 0.5))
    starts.append(Start("a", 1.0, 0.5))
    for _ in range(2):
        collector.collect()
        assert sum(histogram.counts) == 2
    starts.extend(Start("b", 2.0, 0.5) for _ in range(5))  # more than are kept: the one last seen is gone
    collector.collect()
    collector.collect()
    assert sum(histogram.counts) == 5


def test_time_of_the_last_good_reload_outlives_a_bad_one():
    router = stub_router()
    collector = Collector(router, FakeClock())
    router.last_reload = True, 200.0
    collector.collect()
    router.last_reload = False, 300.0
    collector.collect()
    assert collector.last_success == 200.0


# -- health and orders -------------------------------------------------------------------------


def test_health_and_readiness(run, echo_server):
    running = run(f"--route=web.test.test=tcp:{HOST}:{echo_server.address[1]}")
    router, admin = running.router, running.admin

    def both() -> tuple[int, int]:
        return ask(admin, "/healthz").status, ask(admin, "/readyz").status

    assert both() == (200, 200)
    router.call(lambda: router.pause("the test wants it", float("inf")))
    wait_until(lambda: router.paused)
    assert both() == (200, 503) and b"not accepting" in ask(admin, "/readyz").body
    router.call(router._resume)
    wait_until(lambda: not router.paused)
    with running.connect("web.test.test") as client:
        assert client.recv(1)
        router.drain(20)
        wait_until(lambda: router.phase == "draining")
        assert both() == (200, 503) and ask(admin, "/readyz").body == b"draining\n"
        assert value(metrics(running), "sniroute_draining") == 1
    running.thread.join()
    assert both() == (503, 503)


def test_loop_that_hangs_is_found_out_and_not_asked_twice(run, monkeypatch):
    monkeypatch.setattr(sniroute_admin, "PULSE_TIME", 0.05)
    running = run()
    hangs, go_on = threading.Event(), threading.Event()
    try:
        running.router.call(lambda: hangs.set() or go_on.wait(20))
        assert hangs.wait(20)
        for _ in range(5):
            assert ask(running.admin, "/healthz").status == 503
        assert len(running.router.calls) == 1
        assert ask(running.admin, "/metrics").status == ask(running.admin, "/status").status == 200
    finally:
        go_on.set()
    wait_until(lambda: ask(running.admin, "/healthz").status == 200)


def test_reload(run):
    running = run()
    running.router.reload = lambda: []
    reply = ask(running.admin, "/reload", "POST")
    assert (reply.status, reply.json["done"]) == (200, "The settings were read again.")
    running.router.reload = lambda: ["idle: 'x' is not a duration", f"routes: {HOSTILE}"]
    reply = ask(running.admin, "/reload", "POST")
    assert reply.status == 409
    assert reply.json["faults"] == ["idle: 'x' is not a duration", f"routes: {printable(HOSTILE)}"]


def test_fault_of_ours_is_told_to_the_log_alone(run, caplog):
    running = run()
    running.router.reload = lambda: 1 // 0
    reply = ask(running.admin, "/reload", "POST")
    assert reply.status == 500 and reply.json == {"error": "a fault in sniroute: its log says which"}
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()
    running.admin.collector.collect = lambda: 1 // 0
    wait_until(lambda: "ZeroDivisionError" in caplog.text)
    assert ask(running.admin, "/healthz").status == 200


def test_tunnels_are_started_and_stopped(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(echo).address)
    running = run(TUNNEL, ports, f"--route=web.test.test=tcp:{HOST}:9")
    admin = running.admin

    def order(name: str, verb: str) -> tuple[int, str]:
        reply = ask(admin, f"/tunnels/{name}/{verb}", "POST")
        return reply.status, reply.json["done" if reply.status == 200 else "error"]

    assert order("DB.example.com", "start") == (200, f"{DB} is ready.")
    with running.connect("db.example.com") as client:
        assert client.recv(1)
        assert order("db.example.com", "stop") == (200, f"{DB} is stopped.")
        while client.recv(65536):
            pass
    wait_until(lambda: not running.tunnels.snapshot(), what="the stop")
    assert order("db.example.com", "stop") == (404, f"{DB} is not up, and did not fail")
    assert order("cloudflared%3Adb.example.com", "start")[0] == 404  # a key that is not in the table
    assert order("cloudflared:--url.x", "start")[0] == 404
    assert order("db.example.com", "start")[0] == 200
    assert order("cloudflared%3Adb.example.com", "stop") == (200, f"{DB} is stopped.")
    assert order("web.test.test", "start") == (404, "web.test.test leads to tcp:127.0.0.1:9, which is no tunnel")
    assert order("nowhere.test.test", "stop") == (404, "no route for nowhere.test.test")
    assert order("%1b%3Cb%3E", "stop")[0] == 404
    assert len(cloudflared.starts()) == 2


def test_failed_tunnel_is_tried_again_at_once(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(echo).address)
    cloudflared.fault("db.example.com", exit=1, words="lookup db.example.com: no such host")
    running = run(TUNNEL, ports)
    reply = ask(running.admin, "/tunnels/db.example.com/start", "POST")
    assert reply.status == 502 and "no such host" in reply.json["error"]
    assert [view.key for view in running.tunnels.failed()] == [DB]
    cloudflared.fault("db.example.com")
    assert ask(running.admin, f"/tunnels/{DB}/start", "POST").status == 200
    assert running.tunnels.failed() == []


def test_start_without_room_is_a_conflict(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(echo).address)
    running = run(TUNNEL, ports, "--max-tunnels=1")
    with running.connect("db.example.com") as client:
        assert client.recv(1)
        reply = ask(running.admin, "/tunnels/other.example.com/start", "POST")
    assert reply.status == 409 and "--max-tunnels" in reply.json["error"]


# -- sockets -----------------------------------------------------------------------------------


def test_slow_request_is_ended_in_time(run, monkeypatch):
    """A byte now and then does not keep it: the time is for all of the request."""
    monkeypatch.setattr(sniroute_admin, "REQUEST_TIME", 0.3)
    running = run()
    for text in (b"", request(*GET).encode()[:-2], request(*POST, "Content-Length: 9").encode()):
        with dial(running.admin.address) as sock:
            began = time.monotonic()
            sock.sendall(text)
            ended = False
            while not ended and time.monotonic() - began < 5:
                if select.select([sock], [], [], 0.05)[0]:
                    with contextlib.suppress(ConnectionResetError):
                        assert sock.recv(1) == b""
                    ended = True
                else:
                    with contextlib.suppress(OSError):
                        sock.send(b"x")
            assert ended and 0.25 < time.monotonic() - began < 2


def test_more_than_16_requests_at_once_are_closed(run):
    running = run()
    server = running.admin.server
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(dial(running.admin.address)) for _ in range(16)]
        wait_until(lambda: len(server.live) == 16)
        for _ in range(3):
            with dial(running.admin.address) as late:
                assert late.recv(1) == b""
        assert sum(thread.name.startswith("admin-") for thread in threading.enumerate()) == 16
        held[7].sendall(request(*GET).encode())
        assert read_reply(held[7]).status == 200
        wait_until(lambda: len(server.live) == 15)
        assert ask(running.admin, "/healthz").status == 200
    wait_until(lambda: not server.live)


def test_client_that_does_not_read_is_left(run, monkeypatch, caplog):
    monkeypatch.setattr(sniroute_admin, "ANSWER_TIME", 0.2)
    running = run()
    running.admin.status.make = lambda: bytes(20 << 20)
    with dial(running.admin.address) as sock:
        sock.sendall(request("GET /status HTTP/1.1", "Host: localhost").encode())
        wait_until(lambda: running.admin.server.live)
        wait_until(lambda: not running.admin.server.live, timeout=5)


def test_address_that_is_taken(run):
    with socket.create_server((HOST, 0)) as taken:
        with pytest.raises(OSError, match=rf"^127\.0\.0\.1:{taken.getsockname()[1]}: Address already in use$"):
            run(f"--admin={HOST}:{taken.getsockname()[1]}")


def test_localhost_and_ipv6(run):
    running = run("--admin=localhost:0")
    assert running.admin.address[0] == "127.0.0.1" and ask(running.admin, "/healthz").status == 200
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        running = run("--admin=[::1]:0")
        assert running.admin.address[0] == "::1"
        assert ask(running.admin, "/healthz", host=f"[::1]:{running.admin.address[1]}").status == 200


def test_listener_that_is_given_is_used(run, tmp_path):
    with socket.create_server((HOST, 0)) as listener:
        running = run(listener=listener)
        assert running.admin.address == listener.getsockname()
        assert ask(running.admin, "/healthz").status == 200
    path = str(tmp_path / "given.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        running = run(listener=listener)
        assert running.admin.address == path
        assert ask(running.admin, "/healthz", host="sniroute").status == 200
        running.admin.close()
    assert os.path.exists(path)  # it is the giver's
    with socket.create_server(("0.0.0.0", 0)) as listener, pytest.raises(OSError, match="not a loopback address"):
        run(listener=listener)


def test_unix_socket(run, tmp_path):
    path = str(tmp_path / "admin.sock")
    umask = os.umask(0)
    try:
        running = run(f"--admin=unix:{path}")
    finally:
        os.umask(umask)
    assert running.admin.address == path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    assert sorted(os.listdir(tmp_path)) == ["admin.sock", "cloudflared"]
    for host, status in (("sniroute", 200), ("localhost", 200), ("127.0.0.1", 200), ("evil.test", 421), (None, 400)):
        assert ask(running.admin, "/healthz", host=host).status == status
    running.admin.close()
    assert not os.path.exists(path)


def test_stale_socket_is_replaced_and_a_successors_is_left_alone(run, tmp_path):
    path = str(tmp_path / "admin.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    first = run(f"--admin=unix:{path}")
    assert ask(first.admin, "/healthz").status == 200
    second = run(f"--admin=unix:{path}")
    first.admin.close()
    assert os.path.exists(path) and ask(second.admin, "/healthz").status == 200
    second.admin.close()
    assert not os.path.exists(path)
    second.admin.close()


def test_file_that_is_no_socket_is_not_replaced(run, tmp_path):
    path = tmp_path / "admin.sock"
    path.write_text("precious")
    with pytest.raises(OSError, match="something else than a socket"):
        run(f"--admin=unix:{path}")
    assert path.read_text() == "precious"
    with pytest.raises(OSError, match="No such file or directory"):
        run(f"--admin=unix:{tmp_path}/nowhere/admin.sock")


def test_close_ends_what_is_under_way(run):
    running = run()
    with dial(running.admin.address) as sock:
        sock.sendall(b"GET /")
        wait_until(lambda: running.admin.server.live)
        sock.settimeout(2)  # the request's own time is 5 s
        threads = [threading.Thread(target=running.admin.close) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sock.recv(1) == b""
    assert running.router.endings is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("admin")]
    with pytest.raises(ConnectionRefusedError):
        dial(running.admin.address)


def test_accept_that_fails_does_not_spin(run, monkeypatch):
    monkeypatch.setattr(sniroute_admin, "ACCEPT_PAUSE", 0.01)
    running = run()
    tried = []

    class Exhausted:
        def __init__(self, listener: socket.socket):
            self.listener = listener
            self.fileno, self.close = listener.fileno, listener.close

        def accept(self) -> Any:
            tried.append(time.monotonic())
            if len(tried) <= 5:
                raise OSError(24, "Too many open files")
            return self.listener.accept()

    running.admin.server.socket = Exhausted(running.admin.server.socket)
    assert ask(running.admin, "/healthz").status == 200
    assert tried[5] - tried[0] >= 0.05


def test_log_says_who_asked_for_what_without_the_token(run, caplog):
    caplog.set_level(logging.DEBUG, "sniroute")
    running = run()
    ask(running.admin, "/tunnels/%1b%0a/stop?\x9b31m", "POST")
    wait_until(lambda: "admin: POST" in caplog.text)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("admin: POST")]
    assert line == "admin: POST /tunnels/%1b%0a/stop??31m HTTP/1.1: 404"
    assert TOKEN not in caplog.text


def test_it_imports_nothing_of_its_siblings():
    tree = ast.parse((HERE / "sniroute_admin.py").read_text())
    modules = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
               for alias in node.names} | {node.module.partition(".")[0] for node in ast.walk(tree)
                                           if isinstance(node, ast.ImportFrom)}
    assert modules <= sys.stdlib_module_names


# -- the page ----------------------------------------------------------------------------------

# Chromium reads its orders from descriptor 3, and writes to 4.
ON_3_AND_4 = ("import fcntl, os, sys; "
              "reader, writer = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]); "
              "os.dup2(reader, 3); os.dup2(writer, 4); os.execv(sys.argv[3], sys.argv[3:])")


class Browser:
    """A headless Chromium with one page, driven by the DevTools protocol over pipes."""

    def __init__(self, program: str, directory: pathlib.Path):
        orders, self.writer = os.pipe()
        self.reader, answers = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", ON_3_AND_4, str(orders), str(answers), program, "--headless=new",
             "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
             "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={directory}"],
            pass_fds=(orders, answers), start_new_session=True, env={**os.environ, "HOME": str(directory)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(orders)
        os.close(answers)
        self.said = b""
        self.number = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.reader)
        os.close(self.writer)

    def read(self) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self.said:
            assert select.select([self.reader], [], [], 20)[0], "the browser says nothing"
            data = os.read(self.reader, 1 << 20)
            assert data, "the browser has ended"
            self.said += data
        message, _, self.said = self.said.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Have something done, and wait for its answer."""
        self.number += 1
        order = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            order["sessionId"] = self.session
        os.write(self.writer, json.dumps(order).encode() + b"\0")
        while (message := self.read()).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, element: str) -> str:
        return self.evaluate(f"document.getElementById({element!r}).innerText")

    def happened(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event["method"] in methods]


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    """A page in a browser."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not here (Debian package chromium)")
    directory = tmp_path / "browser"
    directory.mkdir()
    with Browser(program, directory) as page:
        yield page


def test_page_in_a_browser(browser, run, serve, cloudflared, ports):
    """It shows what is there, as text; its orders are followed; it asks nobody else, and complains of nothing."""
    cloudflared.far("*", serve(echo).address)
    cloudflared.fault("bad.example.com", exit=1, words="lookup bad.example.com: no such host")
    running = run(TUNNEL, ports)
    origin = f"http://{HOST}:{running.admin.address[1]}"
    with running.connect("db.example.com") as client:
        assert client.recv(1)
        running.refused("bad.example.com")
        running.refused("scan.test.test")
        running.refused("<img/src=x/onerror=alert(1)>.test")
        running.router.endings.append(hostile_ending(name="<img src=x onerror=alert(2)>"))
        wait_until(lambda: len(running.admin.collector.refusals) == 4, what="refusals")
        running.admin.status.forget()
        browser.call("Page.navigate", url=origin + "/")
        wait_until(lambda: browser.evaluate("document.getElementById('phase')?.innerText") == "running",
                   what="the page")
        assert "db.example.com" in browser.text("connections")
        assert DB in browser.text("tunnels") and "ready" in browser.text("tunnels")
        assert "no such host" in browser.text("tunnels") and "no such host" in browser.text("troubles")
        assert "no route for scan.test.test" in browser.text("refusals") and "no route" in browser.text("reasons")
        assert "scan.test.test" in browser.text("names")
        assert "<img src=x onerror=alert(2)>" in browser.text("refusals")
        assert "<img/src=x/onerror=alert(1)>" in browser.text("refusals")
        assert browser.evaluate("document.images.length") == 0
        assert "*.example.com" in browser.text("routes") and DB in browser.text("starts")
        assert browser.text("tile-active").split("\n")[1] == "1"

        colours = {}
        for scheme in ("light", "dark"):
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            colours[scheme] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colours["light"] != colours["dark"]
        browser.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=True)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400
        browser.call("Emulation.clearDeviceMetricsOverride")

        def press(row: str, verb: str, token: str | None) -> None:
            browser.evaluate(f"[...document.querySelectorAll('#tunnels button')]"
                             f".find((one) => one.ariaLabel === {verb + ' ' + row!r}).click()")
            assert browser.evaluate("document.getElementById('ask').open")
            assert browser.evaluate("document.getElementById('ask-label').hidden") is (token is None)
            browser.evaluate(f"document.getElementById('ask-token').value = {token or ''!r};"
                             "document.getElementById('ask-go').click()")

        def said(what: str) -> None:
            wait_until(lambda: what in browser.text("said"), what=what)

        press(DB, "Stop", "not the token of it")
        said("the token is missing or wrong")
        assert running.tunnels.snapshot()[0].state == "ready"
        press(DB, "Stop", TOKEN)
        said(f"{DB} is stopped.")
        while client.recv(65536):
            pass
    wait_until(lambda: browser.evaluate("refresh()") or DB not in browser.text("tunnels"), what="its end")
    cloudflared.fault("bad.example.com")
    press("cloudflared:bad.example.com", "Start", None)
    said("cloudflared:bad.example.com is ready.")
    assert browser.evaluate("Object.values(sessionStorage).concat(Object.values(localStorage))") == [TOKEN]
    assert TOKEN not in browser.evaluate("document.documentElement.outerHTML")

    complaints = browser.happened("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    complaints += [event for event in browser.happened("Log.entryAdded") if event["entry"]["source"] != "network"]
    assert complaints == []  # but for the 401 that it was given
    asked = {event["request"]["url"] for event in browser.happened("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith((origin + "/", "data:"))} == set()
    running.admin.close()
    wait_until(lambda: browser.evaluate("refresh()") or browser.text("phase") == "no answer", what="the page to notice")


# -- the README --------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def test_readme_names_metrics_and_paths_that_there_are():
    alerts = README.partition("<!-- alerts -->")[2].partition("\n## ")[0]
    asked = {re.sub("_bucket$", "", name) for name in re.findall(r"\bsniroute_\w+", alerts)}
    assert len(asked) > 8 and asked <= {metric.name for metric in sniroute_admin.METRICS}
    section = README.partition("### Metrics, status, and a page")[2].partition("```")[0]
    for word in ("GET /`", "GET /metrics`", "GET /status`", "GET /healthz`", "GET /readyz`", "POST /reload`",
                 "POST /tunnels/NAME/stop`", "/start`"):
        assert f"`{word}" in section
