"""Tests of sniroute_admin.py: a real router and real tunnels behind it, and real sockets in front."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import select
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile
from typing import Any, Callable, Iterator

import pytest

import sniroute_admin
import sniroute_door
import sniroute_metrics
from sniroute_names import printable
from conftest import HERE, HOST, Address, connect, echo, wait_until
from testbed.admin import (DB, HOSTILE, TOKEN, TUNNEL, Reply, Running, ask, metrics, parse_metrics, read_reply, tell,
                           value)
from testbed.running import read_all, read_exactly

pytestmark = pytest.mark.usefixtures("hurry")


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """A thousand clients take a thousand descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], min(before[1], 4096)), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


# -- who may ask -------------------------------------------------------------------------------

PATHS = {"/": "GET", "/metrics": "GET", "/status": "GET", "/claims/shop.tun.example.com": "GET", "/healthz": "GET", "/readyz": "GET",
         "/reload": "POST", "/tunnels/db.example.com/stop": "POST", "/tunnels/db.example.com/start": "POST",
         "/routes/db.example.com/backends/192.0.2.1:5432/drain": "POST",
         "/routes/db.example.com/backends/192.0.2.1:5432/enable": "POST",
         "/routes/db.example.com/backends/192.0.2.1:5432": "", "/routes/db.example.com/drain": "",
         "/nothing": "", "/tunnels/db.example.com": "", "/status/": "", "/../status": "", "*": ""}
RIGHT = dict.fromkeys((path for path in PATHS if path.endswith(("/stop", "/drain", "/enable"))
                       or path.startswith("/claims/")), 404)  # none is there


@pytest.mark.parametrize("token", [TOKEN, None], ids=["with a token", "without a token"])
def test_table_of_methods_and_paths(token, run_admin, cloudflared, ports, serve):
    """(method, path) -> status: with the right token, without one, and where the router has none."""
    cloudflared.far("*", serve(echo).address)
    running = run_admin(TUNNEL, ports, token=token)
    found, expected = {}, {}
    for path, right in PATHS.items():
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "PROPFIND"):
            row = f"{method} {path}"
            reply = ask(running.admin, path, method, token=TOKEN)
            found[row] = reply.status, reply.headers.get("Allow")
            fits = method == right or (method, right) == ("HEAD", "GET")
            expected[row] = (404, None) if not right else (405, "POST" if right == "POST" else "GET, HEAD") \
                if not fits else (403 if right == "POST" and token is None else RIGHT.get(path, 200), None)
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
def test_every_order_wants_the_token(path, run_admin):
    running = run_admin("--route=db.example.com=tcp:192.0.2.1:5432,192.0.2.2:5432" if "backends" in path else TUNNEL)
    calls: list[str] = []
    if running.router.targets.book is not None:
        running.router.targets.book.drain = lambda *_: calls.append("backends") or "tcp:192.0.2.1:5432"
    running.router.hooks = running.router.hooks._replace(reload=lambda: calls.append("reload") or [])
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
def test_host_has_to_be_this_host(path, run_admin):
    """A page that has its own name resolve to 127.0.0.1 says that name (DNS rebinding)."""
    running = run_admin()
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
def test_page_of_another_origin_may_not_ask(path, run_admin):
    running = run_admin()
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


def test_table_of_frames(run_admin):
    """Each gets its status, and all that follows is well-formed, names no file, and shows no traceback."""
    running = run_admin()
    found = {}
    for name, (text, _) in FRAMES.items():
        reply = tell(running.admin.address, text)
        found[name] = reply.status
        assert reply.headers["Connection"] == "close"
        assert not re.search(rb"Traceback|\.py|/work|[^\n -~]", reply.body), reply.body
    assert found == {name: status for name, (_, status) in FRAMES.items()}


def test_client_that_is_declined_early_may_finish_its_request(run_admin, monkeypatch):
    """It is not reset while it sends, and reads why."""
    monkeypatch.setattr(sniroute_door, "LINGER", 20.0)  # a busy host may stop this thread for as long as it usually has
    running = run_admin()
    with connect(running.admin.address) as sock:
        sock.sendall(request(*POST, "Content-Length: 300000", body="x" * 100_000).encode())
        assert select.select([sock], [], [], 20)[0]
        wait_until(lambda: [caller.state for caller in running.admin.door.gates[0].callers] == ["lingering"])
        for _ in range(2):
            sock.sendall(b"x" * 100_000)
        assert read_reply(sock).status == 413


def test_every_answer_has_the_headers_of_its_safety(run_admin):
    running = run_admin()
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


def test_head_is_get_without_the_body(run_admin):
    running = run_admin()
    for path in (path for path, method in PATHS.items() if method == "GET"):
        got, head = ask(running.admin, path), ask(running.admin, path, "HEAD")
        assert head.status == RIGHT.get(path, 200)
        with connect(running.admin.address) as sock:
            sock.sendall(request(f"HEAD {path} HTTP/1.1", "Host: localhost").encode())
            assert sock.makefile("rb").read().partition(b"\r\n\r\n")[1:] == (b"\r\n\r\n", b"")
        assert head.headers["Content-Type"] == got.headers["Content-Type"]
        assert int(head.headers["Content-Length"]) > 0 and int(got.headers["Content-Length"]) == len(got.body)


# -- what is asked often -----------------------------------------------------------------------


def test_asking_often_costs_one_rendering(run_admin, monkeypatch):
    monkeypatch.setattr(sniroute_admin, "CACHE_TIME", 60.0)
    running = run_admin()
    made = []
    snapshot = running.tunnels.snapshot
    running.tunnels.snapshot = lambda: made.append(1) or snapshot()
    bodies = {ask(running.admin, path).body for path in ("/status", "/metrics") for _ in range(50)}
    assert len(bodies) == len(made) == 2
    running.router.hooks = running.router.hooks._replace(reload=lambda: [])
    ask(running.admin, "/reload", "POST")
    ask(running.admin, "/status")
    assert len(made) == 3, "after an order it is made anew"


# -- health and orders -------------------------------------------------------------------------


def test_health_and_readiness(run_admin, echo_server):
    running = run_admin(f"--route=web.test.test=tcp:{HOST}:{echo_server.address[1]}")
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
        router.lameduck(20)
        wait_until(lambda: router.phase == "lameduck")
        assert both() == (200, 503) and ask(admin, "/readyz").body == b"lameduck\n"
        with running.connect("web.test.test") as late:
            assert late.recv(1), "it still accepts"
        assert value(metrics(running), "sniroute_draining") == 0
        admin.metrics.forget()
        router.drain(20)
        wait_until(lambda: router.phase == "draining")
        assert both() == (200, 503) and ask(admin, "/readyz").body == b"draining\n"
        assert value(metrics(running), "sniroute_draining") == 1
    running.thread.join()
    assert both() == (503, 503)


def test_loop_that_hangs_is_found_out_and_not_asked_twice(run_admin, monkeypatch):
    monkeypatch.setattr(sniroute_admin, "PULSE_TIME", 0.05)
    monkeypatch.setattr(sniroute_admin, "PULSE_EVERY", 0.05)
    running = run_admin(f"--admin-public={HOST}:0")
    hangs, go_on = threading.Event(), threading.Event()
    try:
        running.router.call(lambda: hangs.set() or go_on.wait(20))
        assert hangs.wait(20)
        wait_until(lambda: ask(running.admin, "/healthz").status == 503)
        for _ in range(5):
            assert ask(running.admin, "/healthz").status == ask(running.admin, "/healthz", public=True).status == 503
        assert len(running.router.loop.calls) == 1
        assert ask(running.admin, "/metrics").status == ask(running.admin, "/status").status == 200
    finally:
        go_on.set()
    wait_until(lambda: ask(running.admin, "/healthz").status == 200)


def test_reload(run_admin):
    running = run_admin()
    running.router.hooks = running.router.hooks._replace(reload=lambda: [])
    reply = ask(running.admin, "/reload", "POST")
    assert (reply.status, reply.json["done"]) == (200, "The settings were read again.")
    running.router.hooks = running.router.hooks._replace(reload=lambda: ["idle: 'x' is not a duration", f"routes: {HOSTILE}"])
    reply = ask(running.admin, "/reload", "POST")
    assert reply.status == 409
    assert reply.json["faults"] == ["idle: 'x' is not a duration", f"routes: {printable(HOSTILE)}"]


def test_fault_of_ours_is_told_to_the_log_alone(run_admin, caplog):
    running = run_admin()
    running.router.hooks = running.router.hooks._replace(reload=lambda: 1 // 0)
    reply = ask(running.admin, "/reload", "POST")
    assert reply.status == 500 and reply.json == {"error": "a fault in sniroute: its log says which"}
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()
    running.admin.collector.collect = lambda: 1 // 0
    wait_until(lambda: "ZeroDivisionError" in caplog.text)
    assert ask(running.admin, "/healthz").status == 200


def test_tunnels_are_started_and_stopped(run_admin, serve, cloudflared, ports):
    cloudflared.far("*", serve(echo).address)
    running = run_admin(TUNNEL, ports, f"--route=web.test.test=tcp:{HOST}:9")
    admin = running.admin

    def order(name: str, verb: str) -> tuple[int, str]:
        reply = ask(admin, f"/tunnels/{name}/{verb}", "POST")
        return reply.status, reply.json["done" if reply.status == 200 else "error"]

    assert order("DB.example.com", "start") == (200, f"{DB} is ready.")
    with running.connect("db.example.com") as client:
        assert client.recv(1)
        assert order("db.example.com", "stop") == (200, f"{DB} is stopped.")
        read_all(client)
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


def test_failed_tunnel_is_tried_again_at_once(run_admin, serve, cloudflared, ports):
    cloudflared.far("*", serve(echo).address)
    cloudflared.fault("db.example.com", exit=1, words="lookup db.example.com: no such host")
    running = run_admin(TUNNEL, ports)
    reply = ask(running.admin, "/tunnels/db.example.com/start", "POST")
    assert reply.status == 502 and "no such host" in reply.json["error"]
    assert [str(view.key) for view in running.tunnels.failed()] == [DB]
    cloudflared.fault("db.example.com")
    assert ask(running.admin, f"/tunnels/{DB}/start", "POST").status == 200
    assert running.tunnels.failed() == []


# -- backends ----------------------------------------------------------------------------------


def says(text: bytes) -> Callable[[socket.socket], None]:
    """A handler that answers the first piece with `text`, and then sends everything back."""
    def handler(sock: socket.socket) -> None:
        if sock.recv(65536):
            sock.sendall(text)
            while data := sock.recv(65536):
                sock.sendall(data)
    return handler


def served(come: Callable[[], socket.socket]) -> bytes:
    """Which backends answer six clients."""
    found = set()
    for _ in range(6):
        with come() as client:
            found.add(client.recv(1))
    return b"".join(sorted(found))


def order(running: Running, pattern: str, address: str, verb: str) -> Reply:
    quoted = [urllib.parse.quote(each, safe="") for each in (pattern, address)]
    return ask(running.admin, f"/routes/{quoted[0]}/backends/{quoted[1]}/{verb}", "POST")


@pytest.mark.parametrize("prefix", ["tcp:", ""], ids=["target", "address"])
@pytest.mark.parametrize("pattern", ["db.example.com", "*.example.org", f"port {HOST}:0", f"{HOST}:0"])
def test_a_drained_backend_gets_no_new_client_and_keeps_those_it_has(pattern, prefix, run_admin, serve, caplog):
    caplog.set_level(logging.INFO, "sniroute")
    one, two = serve(says(b"1")).address, serve(says(b"2")).address
    shown, target = f"{HOST}:{one[1]}", f"tcp:{HOST}:{one[1]},{HOST}:{two[1]}"
    is_port = pattern.endswith(":0")
    running = run_admin(f"--port={HOST}:0={target}" if is_port else f"--route={pattern}={target}",
                        "--route=other.example.net=tcp:192.0.2.1:1")
    name = pattern.replace("*", "a")
    listener = running.router.listeners[-1].getsockname()
    come = (lambda: connect(listener, b"x")) if is_port else lambda: running.connect(name)
    (group,) = running.router.targets.book.listed()
    former = group.route
    with contextlib.ExitStack() as stack:
        stayed = None
        while stayed is None:
            client = stack.enter_context(come())
            stayed = client if client.recv(1) == b"1" else None
        reply = order(running, pattern, prefix + shown, "drain")
        route = f"port {HOST}:0" if is_port else pattern
        assert (reply.status, reply.json) == (200, {"done": f"{route}: backend tcp:{shown} is drained.", "route": route,
                                                    "backend": f"tcp:{shown}", "drained": True})
        assert served(come) == b"2"
        stayed.sendall(b"still")
        assert read_exactly(stayed, 5) == b"still"
        rows = {row["backend"]: row for row in ask(running.admin, "/status").json["backends"]}
        assert (rows[f"tcp:{shown}"]["state"], rows[f"tcp:{HOST}:{two[1]}"]["state"]) == ("drained", "good")
        running.admin.metrics.forget()
        seen = metrics(running)
        assert value(seen, "sniroute_backend_drained", route=route, backend=f"tcp:{shown}") == 1
        assert value(seen, "sniroute_backend_up", route=route, backend=f"tcp:{shown}") == 1
        settings, member = running.router.settings.again(running.router.settings), group.members[f"tcp:{shown}"]
        running.router.call(lambda: running.router.adopt(settings))
        wait_until(lambda: group.route is not former)
        assert served(come) == b"2" and group.members[f"tcp:{shown}"] is member, "a reload keeps it"
        assert order(running, pattern, prefix + shown, "enable").json["drained"] is False
        assert served(come) == b"12"
    lines = [record.getMessage() for record in caplog.records if "by an order of" in record.getMessage()]
    assert [re.sub(r":\d+$", ":PORT", line) for line in lines] == [
        f"{route}: backend tcp:{shown} is {word}, by an order of {HOST}:PORT" for word in ("drained", "enabled")]


def test_where_all_backends_are_drained_a_client_is_told_so(run_admin, serve):
    one = serve(says(b"1")).address
    running = run_admin(f"--route=db.example.com=tcp:{HOST}:{one[1]},{HOST}:1")
    for port in (one[1], 1):
        assert order(running, "db.example.com", f"{HOST}:{port}", "drain").status == 200
    running.refused("db.example.com")
    running.collected()
    (refusal,) = ask(running.admin, "/status").json["last_refusals"]
    assert (refusal["reason"], "an operator has drained all its backends" in refusal["detail"]) == ("backend", True)


@pytest.mark.parametrize("pattern, address, said", [
    ("nothing.example.com", "192.0.2.1:1", "no route has the pattern nothing.example.com"),
    ("a.example.com", "192.0.2.1:1", "no route has the pattern a.example.com"),  # a name that a route fits is none
    ("port :9", "192.0.2.1:1", "no route has the pattern port :9"),
    ("\x1b[31m\n", "192.0.2.1:1", "no route has the pattern ?[31m?"),
    ("one.example.com", "192.0.2.9:9", "one.example.com leads to one target, tcp:192.0.2.9:9: there is no other one "
                                       "that could take its clients"),
    ("*.example.com", "192.0.2.1:3", "*.example.com has no backend 192.0.2.1:3; it has: tcp:192.0.2.1:1, "
                                     "tcp:192.0.2.1:2"),
    ("*.example.com", "\x9b/../\r\n", "*.example.com has no backend ?/../??; it has: tcp:192.0.2.1:1, tcp:192.0.2.1:2"),
    ("many.example.com", "x", "many.example.com has no backend x; it has: "
     + "".join(f"tcp:192.0.2.1:{port}, " for port in range(1, 11))[:-2] + " ..."),
    ("{a}.example.org", "tcp:192.0.2.1:1", "{a}.example.org has no backend tcp:192.0.2.1:1; it has: "
                                           "none that depends on no name"),
])
@pytest.mark.parametrize("verb", ["drain", "enable"])
def test_an_order_for_a_backend_that_is_not_there_is_a_sentence(pattern, address, said, verb, run_admin):
    many = ",".join(f"192.0.2.1:{port}" for port in range(1, 13))
    running = run_admin("--route=*.example.com=tcp:192.0.2.1:1,192.0.2.1:2", "--route=one.example.com=tcp:192.0.2.9:9",
                        f"--route=many.example.com=tcp:{many}", "--route={a}.example.org=tcp:{a}:1,{a}:2")
    reply = order(running, pattern, address, verb)
    assert (reply.status, reply.json) == (404, {"error": said})


def test_a_backend_is_ordered_by_what_status_shows_of_it(run_admin):
    """A path with letters that /status shows as `?`."""
    running = run_admin("--route=db.example.com=tcp:192.0.2.1:1", "--route=x.example.com=tcp:192.0.2.1:1,192.0.2.1:2")
    (group,) = running.router.targets.book.listed()
    member = next(iter(group.members.values()))
    group.members = {"unix:/run/\u00e9.sock": member, "unix:/run/e.sock": member}
    member.target = "unix:/run/\u00e9.sock"
    running.admin.status.forget()
    shown = ask(running.admin, "/status").json["backends"][0]["backend"]
    assert shown == "unix:/run/?.sock"
    assert group.find(shown) is None, "two are shown so"
    del group.members["unix:/run/e.sock"]
    assert order(running, "x.example.com", shown, "drain").json["drained"] and member.is_drained


def test_a_drained_backend_stays_so_for_each_name_that_leads_there(run_admin, serve):
    """A route whose targets have fields: what is drained holds for names that come later."""
    one, two = serve(says(b"1")).address, serve(says(b"2")).address
    running = run_admin(f"--route={{a}}.example.com=tcp:{HOST}:{one[1]},{HOST}:{two[1]},{{a}}.invalid:1")
    a, b = (lambda: running.connect("a.example.com")), lambda: running.connect("b.example.com")
    assert served(a) == b"12"
    assert order(running, "{a}.example.com", f"{HOST}:{one[1]}", "drain").status == 200
    assert served(a) == served(b) == b"2"
    assert ask(running.admin, "/status").json["backends"] == []


def test_a_loop_that_hangs_does_not_hold_an_order_for_ever(run_admin, monkeypatch):
    monkeypatch.setattr(sniroute_admin, "LOOP_TIME", 0.05)
    running = run_admin("--route=db.example.com=tcp:192.0.2.1:1,192.0.2.1:2")
    hangs, go_on = threading.Event(), threading.Event()
    try:
        running.router.call(lambda: hangs.set() or go_on.wait(20))
        assert hangs.wait(20)
        reply = order(running, "db.example.com", "192.0.2.1:1", "drain")
        assert (reply.status, "it may still do it later" in reply.json["error"]) == (503, True)
    finally:
        go_on.set()
    (group,) = running.router.targets.book.listed()
    wait_until(lambda: group.members["tcp:192.0.2.1:1"].is_drained)


def test_at_a_unix_socket_the_log_says_which_user_has_ordered_it(run_admin, admin_path, caplog):
    caplog.set_level(logging.INFO, "sniroute")
    running = run_admin("--route=db.example.com=tcp:192.0.2.1:1,192.0.2.1:2", admin=f"unix:{admin_path}")
    assert order(running, "db.example.com", "192.0.2.1:2", "drain").status == 200
    assert f"backend tcp:192.0.2.1:2 is drained, by an order of uid {os.getuid()}, pid {os.getpid()}" in caplog.text
    with socket.socket() as gone:
        assert sniroute_door.asker(gone) == "somebody at the admin's address"


def test_a_backend_that_a_reload_takes_out_and_brings_back_is_drained_still(run_admin, settings_file):
    """As long as its route is there: whoever lists it again may not know of the order."""
    lists = [f'[routes]\n"db.example.com" = "tcp:{each}"\n' for each in (
        "192.0.2.1:1,192.0.2.1:2", "192.0.2.1:1,192.0.2.1:3", "192.0.2.1:2,192.0.2.1:1")]
    running = run_admin("-c", settings_file(lists[0]))
    assert order(running, "db.example.com", "192.0.2.1:2", "drain").status == 200
    states = []
    for text in lists[1:]:
        settings_file(text)
        settings = running.router.settings.again(running.router.settings)
        done = threading.Event()
        running.router.call(lambda: (running.router.adopt(settings), done.set()))
        assert done.wait(20)
        running.admin.status.forget()
        states.append({row["backend"][-1]: row["state"] for row in ask(running.admin, "/status").json["backends"]})
    assert states == [{"1": "good", "3": "good"}, {"2": "drained", "1": "good"}]


# -- tunnels once more -------------------------------------------------------------------------


def test_start_without_room_is_a_conflict(run_admin, serve, cloudflared, ports):
    cloudflared.far("*", serve(echo).address)
    running = run_admin(TUNNEL, ports, "--max-tunnels=1")
    with running.connect("db.example.com") as client:
        assert client.recv(1)
        reply = ask(running.admin, "/tunnels/other.example.com/start", "POST")
    assert reply.status == 409 and "--max-tunnels" in reply.json["error"]


# -- sockets -----------------------------------------------------------------------------------


def test_slow_request_is_ended_in_time(run_admin, monkeypatch):
    """A byte now and then does not keep it: the time is for all of the request."""
    monkeypatch.setattr(sniroute_door, "REQUEST_TIME", 0.15)
    running = run_admin()
    for text in (b"", request(*GET).encode()[:-2], request(*POST, "Content-Length: 9").encode()):
        began = time.monotonic()  # before the time for its request begins
        with connect(running.admin.address) as sock:
            sock.sendall(text)
            ended = False
            while not ended and time.monotonic() - began < 5:
                if select.select([sock], [], [], 0.02)[0]:
                    with contextlib.suppress(ConnectionResetError):
                        assert sock.recv(1) == b""
                    ended = True
                else:
                    with contextlib.suppress(OSError):
                        sock.send(b"x")
            assert ended and 0.12 < time.monotonic() - began < 2


def test_more_than_16_orders_at_once_wait_and_are_told_so(run_admin, monkeypatch):
    """Those that have no thread in time get a sentence, and who only asks how it stands is answered at once."""
    monkeypatch.setattr(sniroute_door, "WORK_MAX", 19)
    running = run_admin()
    (gate,) = running.admin.door.gates
    go_on = threading.Event()
    running.router.hooks = running.router.hooks._replace(reload=lambda: go_on.wait(20) and [])
    try:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(connect(running.admin.address)) for _ in range(19)]
            for sock in held:
                sock.sendall(request(*POST).encode())
            wait_until(lambda: len(gate.live) == 16 and len(gate.waiting) == 3)
            assert sum(thread.name.startswith("admin-") for thread in threading.enumerate()) == 16
            late = ask(running.admin, "/reload", "POST")
            assert (late.status, late.headers["Retry-After"]) == (503, "1")
            assert late.json == {"error": "too many ask at once"}
            assert ask(running.admin, "/healthz").status == ask(running.admin, "/readyz").status == 200
            go_on.set()
            assert [read_reply(sock).status for sock in held] == [200] * 19
    finally:
        go_on.set()
    wait_until(lambda: not gate.live and not gate.callers)


def test_an_order_that_waits_too_long_for_a_thread_is_told_so(run_admin, monkeypatch):
    monkeypatch.setattr(sniroute_door, "WAIT_TIME", 0.1)
    monkeypatch.setattr(sniroute_admin, "THREADS", {"admin": 1, "public": 1})
    running = run_admin()
    go_on = threading.Event()
    running.router.hooks = running.router.hooks._replace(reload=lambda: go_on.wait(20) and [])
    try:
        with connect(running.admin.address) as first:
            first.sendall(request(*POST).encode())
            wait_until(lambda: running.admin.door.gates[0].live)
            assert ask(running.admin, "/reload", "POST").status == 503
            go_on.set()
            assert read_reply(first).status == 200
    finally:
        go_on.set()
    assert ask(running.admin, "/reload", "POST").status == 200


def test_client_that_does_not_read_is_left(run_admin, monkeypatch, caplog):
    monkeypatch.setattr(sniroute_door, "ANSWER_TIME", 0.2)
    running = run_admin()
    running.admin.status.make = lambda: bytes(20 << 20)
    (gate,) = running.admin.door.gates
    with connect(running.admin.address) as sock:
        wait_until(lambda: gate.callers)  # before it asks: it may be left before this thread looks
        sock.sendall(request("GET /status HTTP/1.1", "Host: localhost").encode())
        wait_until(lambda: not gate.callers, timeout=5)


def test_address_that_is_taken(run_admin):
    with socket.create_server((HOST, 0)) as taken:
        with pytest.raises(OSError, match=rf"^--admin: 127\.0\.0\.1:{taken.getsockname()[1]}: Address already in use$"):
            run_admin(f"--admin={HOST}:{taken.getsockname()[1]}")


def test_localhost_and_ipv6(run_admin):
    running = run_admin("--admin=localhost:0")
    assert running.admin.address[0] == "127.0.0.1" and ask(running.admin, "/healthz").status == 200
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        running = run_admin("--admin=[::1]:0")
        assert running.admin.address[0] == "::1"
        assert ask(running.admin, "/healthz", host=f"[::1]:{running.admin.address[1]}").status == 200


def test_listener_that_is_given_is_used(run_admin, tmp_path):
    with socket.create_server((HOST, 0)) as listener:
        running = run_admin(listener=listener)
        assert running.admin.address == listener.getsockname()
        assert ask(running.admin, "/healthz").status == 200
    path = str(tmp_path / "given.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        running = run_admin(listener=listener)
        assert running.admin.address == path
        assert ask(running.admin, "/healthz", host="sniroute").status == 200
        running.admin.close()
    assert os.path.exists(path)  # it is the giver's
    with socket.create_server(("0.0.0.0", 0)) as listener, pytest.raises(OSError, match="not a loopback address"):
        run_admin(listener=listener)


def test_unix_socket(run_admin, tmp_path):
    path = str(tmp_path / "admin.sock")
    umask = os.umask(0)
    try:
        running = run_admin(f"--admin=unix:{path}")
    finally:
        os.umask(umask)
    assert running.admin.address == path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    assert sorted(os.listdir(tmp_path)) == ["admin.sock", "cloudflared"]
    for host, status in (("sniroute", 200), ("localhost", 200), ("127.0.0.1", 200), ("evil.test", 421), (None, 400)):
        assert ask(running.admin, "/healthz", host=host).status == status
    running.admin.close()
    assert not os.path.exists(path)


def test_stale_socket_is_replaced_and_a_successors_is_left_alone(run_admin, tmp_path):
    path = str(tmp_path / "admin.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    first = run_admin(f"--admin=unix:{path}")
    assert ask(first.admin, "/healthz").status == 200
    second = run_admin(f"--admin=unix:{path}")
    first.admin.close()
    assert os.path.exists(path) and ask(second.admin, "/healthz").status == 200
    second.admin.close()
    assert not os.path.exists(path)
    second.admin.close()


def test_file_that_is_no_socket_is_not_replaced(run_admin, tmp_path):
    path = tmp_path / "admin.sock"
    path.write_text("precious")
    with pytest.raises(OSError, match="a file that is no socket"):
        run_admin(f"--admin=unix:{path}")
    assert path.read_text() == "precious"
    with pytest.raises(OSError, match="No such file or directory"):
        run_admin(f"--admin=unix:{tmp_path}/nowhere/admin.sock")


def test_close_ends_what_is_under_way(run_admin):
    running = run_admin()
    with connect(running.admin.address) as sock:
        sock.sendall(b"GET /")
        wait_until(lambda: running.admin.door.gates[0].callers)
        sock.settimeout(2)  # the request's own time is 5 s
        threads = [threading.Thread(target=running.admin.close) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sock.recv(1) == b""
    assert running.router.endings is None and running.router.accesses is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("admin")]
    with pytest.raises(ConnectionRefusedError):
        connect(running.admin.address)


def test_accept_that_fails_does_not_spin(run_admin, monkeypatch):
    monkeypatch.setattr(sniroute_door, "ACCEPT_PAUSE", 0.01)
    running = run_admin()
    tried = []

    class Exhausted:
        def __init__(self, listener: socket.socket):
            self.listener = listener
            self.fileno, self.close = listener.fileno, listener.close

        def accept(self) -> Any:
            tried.append(time.monotonic())
            if len(tried) <= 7:  # twice at once: one gives up the descriptor in reserve; then with pauses
                raise OSError(24, "Too many open files")
            return self.listener.accept()

    (gate,) = running.admin.door.gates
    gate.listener = Exhausted(gate.listener)
    assert ask(running.admin, "/healthz").status == 200
    assert tried[7] - tried[0] >= 0.05


def test_log_says_who_asked_for_what_without_the_token(run_admin, caplog):
    caplog.set_level(logging.DEBUG, "sniroute")
    running = run_admin()
    ask(running.admin, "/tunnels/%1b%0a/stop?\x9b31m", "POST")
    wait_until(lambda: "admin: POST" in caplog.text)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("admin: POST")]
    assert line == "admin: POST /tunnels/%1b%0a/stop??31m HTTP/1.1: 404"
    assert TOKEN not in caplog.text


# -- slow clients, and many --------------------------------------------------------------------

HALF = b"GET /healthz HTTP/1.1\r\nHost: loc"
BOTH = pytest.mark.parametrize("public", [False, True], ids=["admin", "public"])


def at(running: Running, public: bool) -> Address:
    return running.admin.public if public else running.admin.address


@BOTH
def test_a_probe_is_answered_at_once_whoever_is_slow(public, run_admin):
    """40 clients send half a head; 40 ask for a lot, and do not read."""
    running = run_admin(f"--admin-public={HOST}:0")
    running.admin.metrics.make = lambda: bytes(20 << 20)
    with contextlib.ExitStack() as stack:
        for text in (HALF, request("GET /metrics HTTP/1.1", "Host: localhost").encode()):
            for _ in range(40):
                stack.enter_context(connect(at(running, public))).sendall(text)
            began = time.monotonic()
            for path in ("/healthz", "/readyz") * 20:
                assert ask(running.admin, path, public=public).body == b"ok\n"
            assert time.monotonic() - began < 2, "40 probes"


@BOTH
def test_a_probe_is_answered_within_a_second_of_a_thousand_connects(public, run_admin, many_descriptors):
    running = run_admin(f"--admin-public={HOST}:0")
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(at(running, public))
        began = time.monotonic()
        assert ask(running.admin, "/healthz", public=public).status == 200
        assert time.monotonic() - began < 1


def test_a_request_that_no_thread_can_be_had_for_is_told_so(run_admin, monkeypatch):
    """As where a limit of processes is reached."""
    running = run_admin()

    class Short(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading, "Thread", Short)
        said = ask(running.admin, "/status")
        assert said.status == 503 and said.json == {"error": "can't start new thread"}
        assert ask(running.admin, "/healthz").status == 200
    assert not running.admin.door.gates[0].live
    assert ask(running.admin, "/status").status == 200


def test_a_thread_without_memory_is_told_of_and_its_place_is_free_again(run_admin):
    """Also where it finds none for saying so.  A place that was lost would be missed until a restart."""
    running = run_admin()
    (gate,), call, left = running.admin.door.gates, running.admin.door.loop.call, [1]
    places, decide = len(gate.free), gate.decide
    def starve(caller: Any) -> Any:
        raise MemoryError
    def no_call(act: Any) -> None:
        if left:
            left.pop()
            raise MemoryError
        call(act)
    gate.decide = lambda head: decide(head)._replace(act=starve)
    running.admin.door.loop.call = no_call
    said = ask(running.admin, "/status")
    assert said.status == 503 and said.json == {"error": "memory is short"} and not left
    gate.decide = decide
    assert ask(running.admin, "/status").status == 200
    wait_until(lambda: len(gate.free) == places and not gate.live)


def test_a_fault_of_ours_ends_one_connection_and_not_the_admin(run_admin, caplog):
    running = run_admin()
    (gate,) = running.admin.door.gates
    decide, gate.decide = gate.decide, lambda head: 1 // 0
    with connect(running.admin.address) as sock:
        wait_until(lambda: gate.callers)
        sock.sendall(request(*GET).encode())
        assert sock.recv(1) == b""
    assert "ZeroDivisionError" in caplog.text and "please report it" in caplog.text
    gate.decide = decide
    assert ask(running.admin, "/healthz").status == 200


def test_strangers_do_not_take_the_admin_s_place(run_admin):
    running = run_admin(f"--admin-public={HOST}:0")
    admin, public = running.admin.door.gates
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(connect(running.admin.address))
        mine.sendall(HALF)
        wait_until(lambda: len(admin.callers) == 1)
        for _ in range(3 * sniroute_door.CALLERS_MAX):
            stack.enter_context(connect(running.admin.public)).sendall(HALF)
        assert ask(running.admin, "/healthz", public=True).status == 200  # all of those before it were accepted
        assert len(public.callers) <= sniroute_door.CALLERS_MAX
        mine.sendall(b"alhost\r\n\r\n")
        assert read_reply(mine).status == 200


def test_the_oldest_that_is_slow_makes_room(run_admin, monkeypatch):
    """First those that are still to send, then those that are still to read; never one whose answer is being made."""
    monkeypatch.setattr(sniroute_door, "CALLERS_MAX", 3)
    running = run_admin()
    running.admin.status.make = lambda: bytes(20 << 20)
    (gate,) = running.admin.door.gates
    go_on = threading.Event()
    running.router.hooks = running.router.hooks._replace(reload=lambda: go_on.wait(20) and [])

    def states() -> list[str]:
        return [caller.state for caller in list(gate.callers)]

    try:
        with contextlib.ExitStack() as stack:
            order, reader, half = (stack.enter_context(connect(running.admin.address)) for _ in range(3))
            order.sendall(request(*POST).encode())
            reader.sendall(request("GET /status HTTP/1.1", "Host: localhost").encode())
            half.sendall(HALF)
            wait_until(lambda: sorted(states()) == ["answering", "reading", "working"])
            next_one = stack.enter_context(connect(running.admin.address))
            assert half.recv(1) == b""
            reader_2 = stack.enter_context(connect(running.admin.address))
            assert next_one.recv(1) == b""
            reader_2.sendall(request("GET /status HTTP/1.1", "Host: localhost").encode())
            wait_until(lambda: sorted(states()) == ["answering", "answering", "working"])
            assert ask(running.admin, "/healthz").status == 200
            wait_until(lambda: sorted(states()) == ["answering", "working"])
            go_on.set()
            assert read_reply(order).status == 200
    finally:
        go_on.set()


def test_a_head_may_come_in_pieces(run_admin):
    running = run_admin()
    text = request(*POST[:2], "Expect: 100-continue", *POST[2:], "Content-Length: 4").encode()
    running.router.hooks = running.router.hooks._replace(reload=lambda: [])
    with connect(running.admin.address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(text)):
            sock.sendall(text[at:at + 1])
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        for piece in (b"ab", b"cd"):
            sock.sendall(piece)
        assert read_reply(sock).status == 200


@pytest.mark.parametrize("name", [name for name, (_, status) in FRAMES.items() if status == 200])
def test_each_prefix_of_a_head_needs_more(name):
    text = FRAMES[name][0].encode()
    head, end = sniroute_door.parse_head(text)
    assert text[end:] in (b"", b"abc", b"x" * 65536)
    for cut in range(end):
        assert sniroute_door.parse_head(text[:cut]) is None
        before = max(0, cut - 3)
        found = sniroute_door.parse_head(text, before)
        assert found == (head, end)


# -- strangers ---------------------------------------------------------------------------------


def test_anybody_gets_metrics_and_probes_and_nothing_else(run_admin):
    """With any Host, or none, from any page, with a token and without."""
    running = run_admin(f"--admin-public={HOST}:0")
    calls: list[str] = []
    running.router.hooks = running.router.hooks._replace(reload=lambda: calls.append("reload") or [])
    running.tunnels.stop = running.tunnels.wait = lambda *_: calls.append("tunnels") or True
    found, expected = {}, {}
    for path in (*PATHS, "/metrics?x=1", "/healthz/", "//metrics", "/%6detrics", "/favicon.ico"):
        open_to_all = path.partition("?")[0] in ("/metrics", "/healthz", "/readyz")
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"):
            for host in ("localhost", "sniroute.example.com:9100", "192.0.2.1", None):
                row = method, path, host
                reply = ask(running.admin, path, method, host=host, public=True, Origin="http://evil.test")
                found[row] = reply.status
                expected[row] = 404 if not open_to_all else 200 if method in ("GET", "HEAD") else 405
                assert reply.headers["Connection"] == "close" and "Access-Control-Allow-Origin" not in reply.headers
    assert found == expected and calls == []
    for text in ("GET /healthz HTTP/1.0\r\n\r\n", "GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"):
        assert tell(running.admin.public, text).body == b"ok\n"
    for name, (text, status) in FRAMES.items():
        reply = tell(running.admin.public, text)
        assert reply.status in (200, 400, 404, 405, 414, 431, 505) and b"evil" not in reply.body, name


def test_strangers_learn_nothing_of_clients(run_admin, serve, cloudflared, ports):
    """No name that a client asked for, no tunnel, no address is in what they get: labels are routes and fixed words."""
    cloudflared.far("*", serve(echo).address)
    cloudflared.fault("broken.example.com", exit=1, words="lookup broken.example.com: no such host")
    running = run_admin(TUNNEL, ports, f"--route=web.example.net=tcp:{HOST}:9", f"--admin-public={HOST}:0")
    with running.connect("db.example.com") as client:
        assert client.recv(1)
        for name in ("broken.example.com", "nowhere.example.org", "web.example.net"):
            running.refused(name)
        wait_until(lambda: len(running.router.connections) == 1)
        wait_until(lambda: not running.admin.collector.endings)
        running.admin.metrics.forget()
        shown = {path: ask(running.admin, path, public=True).body.decode()
                 for path in ("/metrics", "/healthz", "/readyz")}
        seen = ask(running.admin, "/status").body.decode()
        words = ["db.example.com", "broken.example.com", "nowhere.example.org", HOST]
        assert all(word in seen for word in words), "the host's own users see them"
    for word in (*words, "cloudflared"):
        assert word not in "".join(shown.values())
    labels = {}
    for samples in parse_metrics(shown["/metrics"]).values():
        for row in samples:
            for name, text in row:
                labels.setdefault(name, set()).add(text)
    assert labels.pop("route") == {"*.example.com", "web.example.net"}
    assert labels.keys() == {"result", "direction", "state", "reason", "le", "version", "python"}
    assert labels["result"] == {*sniroute_metrics.RESULTS, "ready", "ok", "failed"}


def test_the_public_address_may_be_the_only_one(run_admin):
    running = run_admin(f"--admin-public={HOST}:0", admin=None)
    assert running.admin.address is None
    found = [ask(running.admin, path, public=True).status for path in ("/metrics", "/healthz", "/status")]
    assert found == [200, 200, 404]
    running.admin.close()
    with pytest.raises(ConnectionRefusedError):
        connect(running.admin.public)


@pytest.mark.parametrize("where, hosts", [
    (":0", ("127.0.0.1", "::1")), ("[::]:0", ("127.0.0.1", "::1")), ("0.0.0.0:0", ("127.0.0.1",)),
    ("[::1]:0", ("::1",)), ("localhost:0", ("127.0.0.1",)),
])
def test_the_public_address_may_be_any(where, hosts, run_admin):
    if ":" in "".join(hosts) and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    running = run_admin(f"--admin-public={where}", admin=None)
    for host in hosts:
        assert tell((host, running.admin.public[1]), request("GET /readyz HTTP/1.1", "Host: x")).body == b"ok\n"


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid", "x" * 64 + ".invalid"])
def test_a_public_address_that_cannot_be_had_is_one_sentence(host, run_admin):
    with pytest.raises(OSError, match=rf"^--admin-public: {host}:9: [^\n]+$"):
        run_admin(f"--admin-public={host}:9")


def test_a_successor_goes_on_with_the_address_that_it_can_open(run_admin, caplog):
    running = run_admin()
    with socket.create_server((HOST, 0)) as taken:
        settings = running.settings._replace(admin_public=taken.getsockname())
        running.admin.close()
        running.admin = sniroute_admin.attach(running.router, settings, alone=False)
        assert caplog.messages == [
            "--admin-public: %s:%d: Address already in use: going on without it" % taken.getsockname()]
        assert running.admin.public is None and ask(running.admin, "/healthz").status == 200


def test_many_routes_do_not_keep_a_processor_busy(monkeypatch):
    """The longer it takes to make an answer, the longer it is given again."""
    now = [0.0]
    monkeypatch.setattr(sniroute_admin.time, "monotonic", lambda: now[0])
    made = []

    def make() -> bytes:
        now[0] += 0.1
        made.append(now[0])
        return b"%d" % len(made)

    cached = sniroute_admin.Cached(make)
    for _ in range(200):
        cached.get()
        now[0] += 0.05
    assert len(made) == 5, "in ten seconds"


# -- the file ----------------------------------------------------------------------------------


def test_it_works_from_inside_a_zip_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "rooms.zip", "w") as rooms:
        for path in HERE.glob("sniroute*.py"):
            rooms.write(path, path.name)
    code = "import sys; sys.path[0] = 'rooms.zip'; import sniroute_admin; print(sniroute_admin.__file__)"
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60)
    assert (done.stdout, done.stderr) == ("rooms.zip/sniroute_admin.py\n", "")


def test_no_route_leads_to_the_admin_itself(run_admin, tmp_path, admin_path):
    """Whoever reaches the router would reach it; the path may be one that no setting names, systemd's."""
    running = run_admin("--route={port}.p.example.com=tcp:127.0.0.1:{port}", "--route=x.example.com=unix:/nowhere")
    router, (host, port) = running.router, running.admin.address
    decision = router.routes.decide(f"{port}.p.example.com")
    assert not router.targets.may_dial(decision, (host, port)) and not router.targets.may_dial(decision, ("0.0.0.0", port))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(admin_path))
        listener.listen()
        unix = run_admin("--route=x.example.com=unix:/nowhere", admin=None, listener=listener)
        assert unix.router.targets.own_socket == str(admin_path)
    os.unlink(admin_path)


def test_what_is_known_of_a_claimed_name_is_told_and_no_lease(claiming):
    there = claiming()
    admin = there.running.admin
    lease = there.claim("shop.tun.example.com").claim.lease
    there.claim(there.port)
    reply = ask(admin, "/claims/SHOP.tun.example.com")
    left = reply.json["left"]
    assert reply.status == 200 and lease.encode() not in reply.body and 3590 < left <= 3600
    assert {name: value for name, value in reply.json.items() if name != "left"} == {
        "name": "shop.tun.example.com", "owner": "alice", "target": "tcp:192.0.2.1:80", "suspended": False,
        "while_connected": False}
    assert ask(admin, f"/claims/{there.port}").json["name"] == there.port
    there.release("shop.tun.example.com")
    held = ask(admin, "/claims/shop.tun.example.com").json
    assert held["left"] == 0 and 590 < held["held"] <= 600
    reply = ask(admin, "/claims/other.tun.example.com")
    assert (reply.status, reply.json) == (404, {"error": "nobody has claimed other.tun.example.com"})
    assert ask(admin, "/claims/%1b%5b31m").json == {"error": "nobody has claimed ?[31m"}
