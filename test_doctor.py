"""Tests of sniroute_doctor.py: check, explain, selftest and bundle, as functions and as commands."""

from __future__ import annotations

import concurrent.futures
import contextlib
import glob
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import types
import zipfile
from typing import Any, Callable, Iterator

import pytest

import sniroute
import sniroute_doctor
import sniroute_log
import sniroute_tunnels
from sniroute_launchers import Launcher, Reason, TunnelError, TunnelKey
from sniroute_refusals import REFUSALS
from conftest import CORE, HOST, linux
from testbed.admin import NAMES
from testbed.hellos import HELLO, NAME, genuine
from testbed.program import BARE, BARE_PYTHON, PROGRAM, command, environment, execute, installed
from testbed.running import ROUTES_FILE, TUNNEL, alert, answer, read_all


# -- check -------------------------------------------------------------------------------------


def test_check_prints_the_routes(capsys, no_variables):
    assert sniroute.main(["check", "--route", "A.b=tcp:h:1", "--route", "*=cloudflared:x.{name}"]) == 0
    assert capsys.readouterr().out == "a.b=tcp:h:1\n*=cloudflared:x.{name}\n"


def test_a_quiet_check_prints_warnings_and_no_routes(settings_file):
    """Thousands of routes would fill the journal at each reload."""
    path = settings_file('idle = "7m"\n[routes]\n"a.example.com" = "tcp:h:1"\n')
    for quiet in ([], ["--quiet"], ["-q"]):
        ended = command("check", *quiet, "-c", path, "--idle=5m")
        assert ended.returncode == 0 and ended.stdout == "a.example.com=tcp:h:1\n" * (not quiet)
        assert ended.stderr == f"sniroute: {path}: idle is not used: --idle goes first\n"
    ended = command("check", "--quiet", "--route=x")
    assert ended.returncode == 2 and ended.stdout == "" and "--route: " in ended.stderr


def test_check_command_prints_the_routes():
    ended = command("check", "--route=DB.example.com=tcp:127.0.0.1:1", "--route=*=cloudflared:x-{name}")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "db.example.com=tcp:127.0.0.1:1\n*=cloudflared:x-{name}\n"


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


@pytest.mark.parametrize("store, shown", [
    ("memory", "memory"), ("sqlite:/var/lib/sniroute/names.db", "sqlite:/var/lib/sniroute/names.db"),
    ("redis://app:secret@redis.example.com", "redis://redis.example.com:6379/0"),
    ("redis+sentinel://:secret@192.0.2.1,192.0.2.2/main/1", "redis+sentinel://192.0.2.1:26379,192.0.2.2:26379/main/1"),
])
def test_check_says_what_a_registry_is_for_and_no_secret(store, shown, settings_file, capsys, no_variables):
    path = settings_file(NAMES.replace("targets", f'store = "{store}"\ntargets', 1))
    assert sniroute.main(["check", "-c", path]) == 0
    said = f"registry {HOST}:0 (names below tun.example.com; 1 owner; targets tcp; networks 192.0.2.0/24; " \
           f"ports 49000-49009; store {shown})\n"
    assert capsys.readouterr() == (said, "")
    assert sniroute.main(["check", "-q", "-c", path]) == 0 and capsys.readouterr() == ("", "")
    assert sniroute.main(["check", "-c", path, "--registry=unix:/run/registry"]) == 0
    assert capsys.readouterr().out == said.replace(f"{HOST}:0", "unix:/run/registry")


def test_check_says_how_fields_are_read(settings_file, capsys):
    path = settings_file('[routes]\n"*.{env}.example.com" = "cloudflared:{label}.{env}.example.net"\n'
                         '"{a}.svc.example.com" = { target = "tcp:{a}.internal:1", max_connections = 5 }\n'
                         '"{service}--{port}.svc.example.com" = "tcp:{service}.internal:{port}"\n'
                         '"db.svc.example.com" = "tcp:192.0.2.1:1"\n')
    assert sniroute.main(["check", "-c", path]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "db.svc.example.com=tcp:192.0.2.1:1",
        "{service}--{port}.svc.example.com=tcp:{service}.internal:{port}",
        "    fields service, port; the last '--' between {service} and {port} splits; 15 literal characters",
        "{a}.svc.example.com=tcp:{a}.internal:1 (max_connections 5)",
        "    fields a; 13 literal characters",
        "*.{env}.example.com=cloudflared:{label}.{env}.example.net",
        "    fields env; 10 literal characters"]
    assert sniroute.main(["check", "--quiet", "-c", path]) == 0 and capsys.readouterr().out == ""


HTTP_FILE = """
http = "redirect"
[routes]
"plain.example.com" = { target = "tcp:192.0.2.1:80", http = "forward", upgrades = ["chat"] }
"tls.example.com" = { target = "tcp:192.0.2.1:443", http = "forward-tls", verify = false, host = "backend" }
"none.example.com" = { target = "tcp:192.0.2.1:1", http = "refuse" }
"moved.example.com" = { target = "tcp:192.0.2.1:2", redirect_port = 8443 }
[ports]
"127.0.0.1:81" = "tcp:192.0.2.1:81"
"""


def test_check_says_what_plain_http_gets(settings_file, capsys):
    assert sniroute.main(["check", "-c", settings_file(HTTP_FILE)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "moved.example.com=tcp:192.0.2.1:2 (http redirect; redirect_port 8443)",
        "none.example.com=tcp:192.0.2.1:1 (http refuse)",
        "plain.example.com=tcp:192.0.2.1:80 (http forward; upgrades websocket,chat)",
        "tls.example.com=tcp:192.0.2.1:443 (http forward-tls; verify false; host backend)",
        "port 127.0.0.1:81=tcp:192.0.2.1:81"]
    assert err.startswith("sniroute: tls.example.com=tcp:192.0.2.1:443: verify = false: ") and err.count("\n") == 1


# -- explain -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, code, said", [
    ("My-API--8080.svc.example.com", 0, "fields:  service my-api, port 8080\ntarget:  tcp:my-api.internal:8080\n"),
    ("my-api--http.svc.example.com", 1, "fields:  service my-api, port http\nrefused: 'my-api.internal:http' is not "
     f"HOST:PORT (bad_name, TLS alert 112)\nto do:   {REFUSALS['bad_name'].advice}\n"),
], ids=["routed", "no port"])
def test_explain_says_what_the_fields_of_a_name_are(name, code, said, capsys, no_variables):
    route = "{service}--{port}.svc.example.com=tcp:{service}.internal:{port}"
    assert sniroute.main(["explain", name, f"--route={route}", "--route=*=tcp:h:1"]) == code
    assert capsys.readouterr().out == f"name:    {name.lower()}\nroute:   {route}\n{said}"


@pytest.mark.parametrize("name, code, line", [
    ("DB.Example.com", 0, "name:    db.example.com\nroute:   *.example.com=tcp:{label}:1\ntarget:  tcp:db:1\n"),
    ("db.example.org", 1,
     "name:    db.example.org\nrefused: no route for db.example.org (no_route, TLS alert 112)\n"
     f"to do:   {REFUSALS['no_route'].advice}\n"),
    ("\udcff\x1b.org", 1, "name:    ??.org\nrefused: not a host name: '??.org' (bad_name, TLS alert 112)\n"
     f"to do:   {REFUSALS['bad_name'].advice}\n"),
    ("DB.Example.com.", 0, "name:    db.example.com\nroute:   *.example.com=tcp:{label}:1\ntarget:  tcp:db:1\n"),
    ("db", 0, "name:    db\nroute:   db=tcp:db:5432\ntarget:  tcp:db:5432\n"),
    ("web", 1, "name:    web\nrefused: no route for web (no_route, TLS alert 112)\n"
     f"to do:   {REFUSALS['no_route'].advice}\n"),
    ("m\u00fcnchen.example", 1, "name:    m?nchen.example\nrefused: not a host name: 'm??nchen.example'; write "
     "xn--mnchen-3ya.example, which is its form in DNS and TLS (bad_name, TLS alert 112)\n"
     f"to do:   {REFUSALS['bad_name'].advice}\n"),
], ids=["routed", "not-routed", "bytes-that-are-no-text", "trailing-dot", "one-label", "one-label-not-routed", "IDN"])
def test_explain_says_what_becomes_of_a_name(name, code, line, capsys, no_variables):
    assert sniroute.main(["explain", name, "--route", "*.example.com=tcp:{label}:1", "--route=db=tcp:db:5432"]) == code
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("asked, name, says", [
    ("plain.example.com", "plain", "forward: to the target, request by request"),
    ("http://Plain.example.com:19000/a?b#c", "plain", "forward: to the target, request by request"),
    ("https://tls.example.com", "tls", "forward-tls: to the target over TLS, request by request"),
    ("HTTP://moved.example.com?x", "moved", "redirect: an answer that leads to https://"),
    ("http://none.example.com/", "none", "refuse: the connection closes"),
])
def test_explain_says_what_plain_http_gets_also_by_the_url(asked, name, says, settings_file, capsys):
    assert sniroute.main(["explain", asked, "-c", settings_file(HTTP_FILE)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[2]] == [f"name:    {name}.example.com", f"http:    {says}"]


def test_explain_says_nothing_of_http_where_nobody_asked_and_nothing_is_served(settings_file, capsys):
    assert sniroute.main(["explain", "none.example.com", "-c", settings_file(HTTP_FILE)]) == 0
    assert "http:" not in capsys.readouterr().out
    assert sniroute.main(["explain", "http://192.0.2.1/x", "-c", settings_file(HTTP_FILE)]) == 1
    assert "refused: not a host name: '192.0.2.1' (bad_name" in capsys.readouterr().out


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
    ("carrier", "sniroute_carrier.py, sniroute_edge.py, sniroute_forwarder.py, sniroute_dial.py, sniroute_upgrade.py, "
        "sniroute_http.py are not beside sniroute.py: copy them there"),
])
def test_explain_says_that_the_program_is_missing(two_files, scheme, says):
    ended = execute(*BARE_PYTHON, str(two_files), "explain", "db.example.com", f"--route=*={scheme}:{{name}}",
                    env=BARE, text=True, said="")
    assert ended.returncode == 1
    assert f"refused: {says} (tunnel_failed, TLS alert 80)\nto do:   " in ended.stdout


@linux
def test_explain_asks_a_router_that_runs(launch, cloudflared, ports, serve, admin_path):
    cloudflared.far("*", serve(answer(b"x")).address)
    cloudflared.fault("evil.example.com", exit=1, words="goroutine panic")
    options = TUNNEL, ports, f"--cloudflared={cloudflared.path}", f"--admin=unix:{admin_path}"
    program = launch(*options)
    program.wait_for(f" info admin on {admin_path}\n")
    with program.connect(HELLO) as client, program.connect(genuine(name="evil.example.com")) as other:
        assert client.recv(1) == b"x" and read_all(other) == alert(80)
        failed, ready, absent = (command("explain", name, *options).stdout  # it is remembered for 2.5 s at least
                                 for name in ("evil.example.com", NAME, "cold.example.com"))
    assert re.search(rf"\nrouter:  running, pid {program.pid}, \d connections\n"
                     r"tunnel:  ready \(its local port is open\), for \d+ s, 1 connections\n", ready)
    assert re.search(r"\ntunnel:  failed, next in \d s\nsaid:    .*goroutine panic.*\nto do:   mend what it says", failed)
    assert "\ntunnel:  absent\nto do:   nothing: the next client starts it\n" in absent
    for told in (ready, failed, absent):
        assert told.count("to do:") == 1, "one thing"
    program.stop()
    assert "\nrouter:  no answer from its admin address: " in command("explain", NAME, *options).stdout


SHOP = "shop.tun.example.com"


@pytest.fixture
def explain(capsys, no_variables) -> Callable[..., tuple[int, list[str]]]:
    """explain(*words) -> the exit code, and the lines that are said."""
    def run(*words: str) -> tuple[int, list[str]]:
        code = sniroute.main(["explain", *words])
        return code, capsys.readouterr().out.splitlines()
    return run


def test_explain_says_who_has_claimed_a_name(claiming, explain):
    there = claiming()
    options = "-c", there.path, "--admin=%s:%d" % there.running.admin.address
    there.claim(SHOP)
    code, (name, claimed, target) = explain(SHOP, *options)
    assert (code, name, target) == (0, f"name:    {SHOP}", "target:  tcp:192.0.2.1:80")
    assert re.fullmatch(r"claimed: by alice, for another 3(600|59\d) s unless it is renewed", claimed)

    there.suspend(SHOP)
    code, lines = explain(SHOP, *options)
    assert code == 1 and lines[1].endswith(" s unless it is renewed, suspended by an admin") and "(no_route, " in lines[3]
    there.release(SHOP)
    code, lines = explain(SHOP, *options)
    assert (code, lines[1]) == (1, "claimed: by alice, until a short while ago: it is held for that owner, suspended by "
                                   "an admin")
    code, lines = explain("other.tun.example.com", *options)
    assert (code, lines[1]) == (1, "claimed: by nobody, as far as the router's admin address says")
    assert lines[2].startswith("refused: ")


def test_explain_without_a_router_says_that_only_that_knows_who_has_claimed_a_name(settings_file, explain):
    code, lines = explain(SHOP, "-c", settings_file(NAMES))
    assert (code, lines[1]) == (1, "claimed: only a router that runs knows; give it an --admin address, which is asked")


def test_explain_asks_nobody_about_a_name_that_a_route_has(settings_file, explain):
    code, lines = explain(SHOP, "-c", settings_file(NAMES), f"--route={SHOP}=tcp:192.0.2.1:80")
    assert (code, lines[1:]) == (0, [f"route:   {SHOP}=tcp:192.0.2.1:80", "target:  tcp:192.0.2.1:80"])


@pytest.mark.parametrize("body", [
    "[]", "{}", '{"owner": 1, "target": "tcp:h:1", "left": 1}', '{"owner": "a", "target": "tcp:h:1", "left": -1}',
    '{"owner": "a", "target": "tcp:h:1", "left": true}', "x",
], ids=["list", "empty", "owner", "negative", "truth", "no-json"])
def test_explain_bears_any_claim_of_an_admin_address(body, serve, settings_file, explain):
    def far(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(as_json(body))
    code, lines = explain(SHOP, "-c", settings_file(NAMES), "--admin=%s:%d" % serve(far).address)
    assert (code, lines[1]) == (1, "claimed: by nobody, as far as the router's admin address says")


def test_explain_prints_what_a_claim_says_without_terminal_codes(serve, settings_file, explain):
    def far(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(as_json(json.dumps({"owner": "\x1b[31m", "target": "tcp:\x9b2J", "left": 1.5})))
    code, lines = explain(SHOP, "-c", settings_file(NAMES), "--admin=%s:%d" % serve(far).address)
    assert code == 0 and lines[1:] == ["claimed: by ?[31m, for another 2 s unless it is renewed", "target:  tcp:?2J"]


def as_json(text: str | bytes) -> bytes:
    """An answer with this body."""
    body = text.encode() if isinstance(text, str) else text
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def with_status(**changes: object) -> bytes:
    """The answer of a router with one tunnel, with some fields of the status, or of the tunnel, changed."""
    row = {"key": "carrier:db.example.com", "state": "ready", "age": 100.5, "leases": 1, "next": 0.0, "words": ""}
    status = {"phase": "running", "pid": 7, "connections": {"active": 3}, "tunnels": [row]}
    for name, value in changes.items():
        place = row if name in row else status
        place[name] = value
        if value is None:
            del place[name]
    return as_json(json.dumps(status))


STRANGERS = {  # what may answer at an admin address, and what is said of it
    "forbidden": (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "403 Forbidden"),
    "a redirect": (b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\n\r\n", "302 Found"),
    "another protocol": (b"SSH-2.0-OpenSSH\r\n", "it does not speak HTTP: 'SSH-2.0-OpenSSH"),
    "terminal codes instead of HTTP": (b"\x1b]0;owned\x07\x1b[2J" * 9, "it does not speak HTTP: '?]0;owned??[2J"),
    "terminal codes in the reason": (b"HTTP/1.1 500 \x1b[31m\x9b2J\r\n\r\n", "500 ?[31m?2J"),
    "a list": (as_json("[]"), "the status is no object"),
    "nothing in it": (as_json("{}"), "phase of the status is missing, or is none"),
    "no JSON": (as_json("no JSON"), "Expecting value"),
    "no UTF-8": (as_json(b"{\"\xff\xfe\": 1}"), "decode"),
    "cut": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "its answer ended early"),
    "nothing": (b"", "it closed without an answer"),
    "half a word": (b"HTTP/1", "its answer ended early"),
    "a head without an end": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 600_000, "over 2097152 bytes"),
    "a long body": (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n", "over 2097152 bytes"),
    "a body without a length": (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 9, "no Content-Length"),
    "chunks without an end": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx", "no Content-Length"),
    "two lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", "no Content-Length"),
    "a length of words": (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}", "no Content-Length"),
    "deep": (as_json("[" * 500_000), "nested too deep"),
    "deep and whole": (as_json('{"tunnels": ' + "[" * 200_000 + "]" * 200_000 + "}"), "nested too deep"),
    "NaN": (with_status(age=float("nan")), "NaN is not JSON"),
    "endless": (with_status(age=float("inf")), "Infinity is not JSON"),
    "a huge number": (as_json(b'{"pid": 1' + b"0" * 9999 + b"}"), "Exceeds the limit"),
    "a large number": (with_status(age=1e300), "age of a tunnel"),
    "a number too large for Python": (with_status().replace(b"100.5", b"1e999"), "age of a tunnel"),
    "a negative number": (with_status(leases=-1), "leases of a tunnel"),
    "a truth for a number": (with_status(pid=True), "pid of the status"),
    "a fraction of a connection": (with_status(connections={"active": 1.5}), "active of connections"),
    "a text for a number": (with_status(age="1"), "age of a tunnel"),
    "a number for a text": (with_status(words=5), "words of a tunnel"),
    "a list for a text": (with_status(key=[]), "key of a tunnel"),
    "a text for a row": (with_status(tunnels=["x"]), "a tunnel is no object"),
    "an object for a list": (with_status(tunnels={"key": 1}), "tunnels of the status"),
    "no connections": (with_status(connections=None), "connections of the status"),
    **{f"no {name}": (with_status(**{name: None}), f"{name} of a")
       for name in ("key", "state", "age", "leases", "next", "words")},
}


@pytest.mark.parametrize("name", STRANGERS)
def test_explain_bears_any_answer_of_an_admin_address(serve, capsys, name):
    """One line says what is wrong with it; no traceback, no terminal code, and soon."""
    answer, says = STRANGERS[name]

    def far(sock: socket.socket) -> None:
        sock.recv(65536)
        with contextlib.suppress(OSError):
            sock.sendall(answer)
    assert sniroute_doctor.ask_router(serve(far).address) is None
    said = capsys.readouterr().out
    assert said.startswith("router:  no answer from its admin address: ") and says in said and said.count("\n") == 1
    assert re.fullmatch(r"[ -~]+\n", said) and len(said) < 400


@pytest.mark.parametrize("first", [
    b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n",
], ids=["nothing", "a head", "a body"])
@pytest.mark.parametrize("drip", [b"", b"x"], ids=["silent", "drips"])
def test_explain_does_not_wait_for_ever(serve, capsys, monkeypatch, first, drip):
    """A byte now and then does not keep it."""
    monkeypatch.setattr(sniroute_doctor, "ADMIN_TIMEOUT", 0.15)
    over = threading.Event()

    def far(sock: socket.socket) -> None:
        sock.recv(65536)
        sent = 0
        with contextlib.suppress(OSError):
            sock.sendall(first)
            while not over.wait(0.02):
                sock.sendall(drip and (drip if first else b"HTTP/1.1 200 OK\r\n"[sent:sent + 1]))
                sent += 1
    began = time.monotonic()
    try:
        assert sniroute_doctor.ask_router(serve(far).address) is None
        assert time.monotonic() - began < 3
    finally:
        over.set()
    assert re.fullmatch(r"router:  no answer from its admin address: (timed out|its answer took over 0.15 s)\n",
                        capsys.readouterr().out)


def test_explain_bears_a_unix_socket_that_is_another_s(admin_path, capsys):
    """One of datagrams, one that nobody listens on, a file."""
    for kind, says in ((socket.SOCK_DGRAM, "Protocol wrong type for socket"),
                       (socket.SOCK_STREAM, "Connection refused")):
        with socket.socket(socket.AF_UNIX, kind) as other:
            other.bind(admin_path)
            assert sniroute_doctor.ask_router(admin_path) is None
            assert says in capsys.readouterr().out
        os.unlink(admin_path)
    with open(admin_path, "w"):
        assert sniroute_doctor.ask_router(admin_path) is None
    assert "Connection refused" in capsys.readouterr().out


def test_what_a_router_says_is_printed_without_terminal_codes(serve, capsys):
    hostile = "\x1b[31m\r\n\u202e" + "x" * 999

    def far(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(with_status(phase=hostile, state=hostile, words=hostile, key=hostile))
    (row,) = sniroute_doctor.ask_router(serve(far).address).tunnels.values()
    assert sniroute_doctor.show_standing(row) == "see OPERATING.md"
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20] for line in lines] == ["router:  ?[31m???xxx", "tunnel:  ?[31m???xxx", "said:    ?[31m???xxx"]
    assert all(re.fullmatch(r"[ -~]{1,520}", line) for line in lines)


def test_explain_says_that_a_router_runs_where_the_name_has_no_tunnel(serve, capsys, no_variables):
    body = b'{"tunnels": [], "phase": "running", "pid": 7, "connections": {"active": 3}}'
    def far(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    host, port = serve(far).address
    assert sniroute.main(["explain", "a.example.com", "--route=*=tcp:h:1", f"--admin={host}:{port}"]) == 0
    assert capsys.readouterr().out.endswith("\ntarget:  tcp:h:1\nrouter:  running, pid 7, 3 connections\n")


ZONES = ("--zones=a=192.0.2.0/25,b=192.0.2.128/25", "--zone=a")
ONE, TWO, FAR = "tcp:192.0.2.1:1", "tcp:192.0.2.2:1", "tcp:192.0.2.200:1"


def down(member: Any, seconds: float = 0.0) -> None:
    """A backend is down, and rests so long."""
    member.why, member.until = "Connection refused", time.monotonic() + seconds


def full(member: Any) -> None:
    member.active = 5


@pytest.mark.parametrize("asked, listens", [("db.example.com", "--route=db.example.com"), ("tcp:0", f"--port={HOST}:0")],
                         ids=["a name", "a port"])
@pytest.mark.parametrize("balance, changes, said", [
    ("least", {}, [", in zone a, good, 0 connections", ", in zone a, good, 0 connections",
                   ", in zone b, good, but in another zone, 0 connections", f"of 2: {ONE}, which has the fewest connections"]),
    ("first", {}, ["", "", "", f"of 2: {ONE}, the first of them"]),
    ("hash", {}, ["", "", "", "of 2: the one for the client's address"]),
    ("first", {0: lambda member: down(member, 9.0)}, [
        r", down for \d+ s: Connection refused; tried again in [89] s", "", "", f"{TWO}, since no other one is as good"]),
    ("first", {0: down}, ["; the next client tries it", "", "", f"{TWO}, since no other one is as good"]),
    ("least", {0: full}, [", good, 5 connections, full: max_backend_connections", "", "",
                          f"{TWO}, since no other one is as good"]),
    ("least", {0: full, 1: full}, ["", "", "", f"{FAR}, since better ones are full"]),
    ("least", {0: full, 1: full, 2: full}, ["", "", "", "none now, since all are full: a client waits up to 7 s for room"]),
    ("least", {0: lambda member: setattr(member, "is_drained", True), 1: down}, [
        ", drained by an operator, 0 connections", "", ", good, 0 connections", f"{FAR}, since no other one is as good"]),
    ("least", {0: down, 1: down, 2: down}, ["", "", "", "each that is not drained is tried, since none is good"]),
    ("first", {at: lambda member: setattr(member, "is_checked", True) for at in range(3)}, [
        ", not known yet: no check has passed, 0 connections", "", "", f"{ONE}, the first of them"]),
])
def test_explain_says_which_backend_would_be_taken_and_why_not_the_others(
        balance, changes, said, asked, listens, settings_file, run_admin, capsys, no_variables):
    pattern, kind = listens.removeprefix("--").partition("=")[2], listens[2:].partition("=")[0] + "s"
    path = settings_file(f'[{kind}."{pattern}"]\ntarget = ["{ONE}", "{TWO}", "{FAR}"]\nbalance = "{balance}"\n'
                         'max_backend_connections = 5\nqueue = "7s"\n' + '[routes]\n"x.example.org" = "tcp:h:1"\n')
    running = run_admin("-c", path, *ZONES)
    (group,) = running.router.targets.book.listed()
    for at, change in changes.items():
        change(list(group.members.values())[at])
    where = ":".join(map(str, running.admin.address))
    try:
        assert sniroute.main(["explain", asked, "-c", path, *ZONES, f"--admin={where}"]) == 0
    finally:
        for member in group.members.values():
            member.active = 0
    lines = capsys.readouterr().out.split("\n")
    for target, words in zip((ONE, TWO, FAR), said):
        (line,) = [line for line in lines if line.startswith(f"backend: {target}")]
        assert re.search(words + "$", line), line
    assert lines[-2] == f"taken:   {said[3]}"


def test_explain_refuses_where_an_operator_has_drained_all(settings_file, run_admin, capsys, no_variables):
    options = (f"--route=db.example.com={ONE},192.0.2.2:1",)
    running = run_admin(*options)
    (group,) = running.router.targets.book.listed()
    for member in group.members.values():
        member.is_drained = True
    where = ":".join(map(str, running.admin.address))
    assert sniroute.main(["explain", "db.example.com", *options, f"--admin={where}"]) == 1
    assert "\nrefused: tcp:192.0.2.1:1,192.0.2.2:1: an operator has drained all its backends (backend, " \
        in capsys.readouterr().out


def test_explain_without_a_router_says_what_can_be_known_of_backends(settings_file, capsys, no_variables):
    path = settings_file(f'[routes."db.example.com"]\ntarget = ["{ONE}", "{FAR}", "tcp:h.example.net:1", '
                         '"exec:/nowhere/x"]\nbalance = "first"\n')
    assert sniroute.main(["explain", "db.example.com", "-c", path, *ZONES]) == 0
    said = capsys.readouterr().out
    assert f"backend: {ONE}, in zone a\nbackend: {FAR}, in zone b\nbackend: tcp:h.example.net:1\n" in said
    assert re.search("backend: exec:/nowhere/x, cannot be run: .+\ntaken:   not known here: only a router that runs knows "
                     r"which are good \(--admin\); while all are: tcp:192.0.2.1:1, the first of them", said), said


def test_explain_says_that_a_router_has_no_rows_for_targets_with_fields(run_admin, capsys, no_variables):
    options = ("--route=*.example.com=tcp:{label}.example.net:1,{label}.example.net:2",)
    running = run_admin(*options)
    where = ":".join(map(str, running.admin.address))
    assert sniroute.main(["explain", "a.example.com", *options, f"--admin={where}"]) == 0
    assert "taken:   not known here: that router does not say which are good, since the targets depend on the name; " \
        "while all are: each in turn\n" in capsys.readouterr().out


BACKEND = {"route": "db.example.com", "backend": "tcp:192.0.2.1:1", "state": "good", "why": "", "since": 1.0,
           "active": 0, "next": 0, "limit": None, "checks": None}


@pytest.mark.parametrize("change, said", [
    ({"state": 1}, "state of a backend"), ({"limit": "x"}, "limit of a backend"), ({"limit": -1}, "limit of a backend"),
    ({"why": None}, "why of a backend"), ({"since": "long"}, "since of a backend"),
    ({"state": "\x1b[2Jwell"}, ", ?[2Jwell, 0 connections"), ({"state": "down", "why": "\x1b[2J"}, "down for 1 s: ?[2J;"),
])
def test_explain_bears_any_row_of_a_backend(change, said, serve, capsys, no_variables):
    answer = with_status(backends=[{**BACKEND, **change}, {**BACKEND, "backend": "tcp:192.0.2.2:1"}])
    server = serve(lambda sock: sock.recv(65536) and sock.sendall(answer))
    assert sniroute.main(["explain", "db.example.com", f"--route=db.example.com={ONE},192.0.2.2:1",
                          f"--admin={HOST}:{server.address[1]}"]) == 0
    assert said in capsys.readouterr().out


def test_explain_says_that_the_token_is_not_shown(cloudflared):
    options = f"--cloudflared={cloudflared.path}", "--route=*=cloudflared:{name}", "--route=*.example.com=cloudflared:{name}"
    for name, said in (("db.example.org", True), ("db.example.com", False)):
        ended = command("explain", name, *options, TUNNEL_SERVICE_TOKEN_ID="id", TUNNEL_SERVICE_TOKEN_SECRET="s3cret")
        assert (ended.returncode, ended.stderr) == (0, "") and "s3cret" not in ended.stdout
        assert ("\ntoken:   not shown there: the client may own that domain\n" in ended.stdout) is said


KEY = TunnelKey("carrier", "db.example.com")


def launcher(code: str) -> Launcher:
    """A tunnel program whose trial is this text of Python."""
    return Launcher(sys.executable, lambda hostname, port: [], {}, lambda tail: Reason("denied", tail.decode().strip()),
                    "", trial=lambda hostname: ["-I", "-S", "-c", code, hostname])


def test_a_far_end_is_tried_by_a_run_of_the_program(capsys):
    sniroute_doctor.try_far_end(launcher("import sys; assert sys.argv[1] == 'db.example.com'"), KEY)
    assert capsys.readouterr().out == "far end: it answers\n"
    with pytest.raises(TunnelError, match="^Access denied it$") as caught:
        sniroute_doctor.try_far_end(launcher("import sys; sys.exit('Access denied it')"), KEY)
    assert caught.value.kind == "denied"
    sniroute_doctor.try_far_end(launcher("")._replace(trial=None), KEY)
    assert capsys.readouterr().out == "", "a program that cannot be tried is not"


def test_a_far_end_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(sniroute_doctor, "TRIAL_TIMEOUT", 0.2)
    with pytest.raises(TunnelError, match="^no answer within 0.2 s$") as caught:
        sniroute_doctor.try_far_end(launcher("import time; time.sleep(60)"), KEY)
    assert caught.value.kind == "timeout"


# -- a test of itself --------------------------------------------------------------------------


def test_the_self_test_needs_two_files_and_less_than_ten_seconds(two_files):
    began = time.monotonic()
    ended = execute(*BARE_PYTHON, str(two_files), "selftest", env=BARE, text=True, said="")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) == len(sniroute_doctor.SELF_TESTS) + 1 and all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1].startswith(f"{len(lines) - 1} of {len(lines) - 1} went well, in ")
    assert time.monotonic() - began < 10 and ended.stderr == ""


@pytest.fixture
def selftest(capsys, monkeypatch) -> Iterator[Callable[[], tuple[int, list[str]]]]:
    """selftest() -> its exit code, and its lines.  It is the last that a process does: the log is put back here."""
    handlers = list(sniroute_log.log.handlers)
    monkeypatch.setattr(sniroute_tunnels, "BACKOFF_FIRST", 0.05)  # of the tunnel that is killed
    def run() -> tuple[int, list[str]]:
        code = sniroute.main(["selftest"])
        return code, capsys.readouterr().out.splitlines()
    yield run
    sniroute_log.log.handlers[:] = handlers
    sniroute_log.log.propagate = True


def test_the_self_test_can_be_run_again_and_again(selftest):
    for _ in range(2):
        code, lines = selftest()
        assert code == 0 and len(lines) == len(sniroute_doctor.SELF_TESTS) + 1
        assert all(line.startswith("ok ") for line in lines[:-1])


WRONG: dict[str, tuple[Callable[[bytes], bytes], set[str]]] = {  # what comes back, and what notices it
    "nothing": (lambda data: b"", {"a hello", "half-close", "4 MiB there and back", "PostgreSQL: SSLRequest"}),
    "another byte": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), {"a hello", "4 MiB there and back", "half-close"}),
    "one more": (lambda data: data + b"!", {"half-close", "4 MiB there and back"}),
}


@pytest.mark.parametrize("change, notices", WRONG.values(), ids=WRONG)
def test_the_self_test_notices_bytes_that_are_wrong(selftest, monkeypatch, change, notices):
    """And ends in its time, whatever hangs."""
    class Backend(sniroute_doctor.SelfTestBackend):
        def handle(self) -> None:
            request = self.request
            self.request = types.SimpleNamespace(recv=request.recv, sendall=lambda data: request.sendall(change(data)))
            super().handle()
    monkeypatch.setattr(sniroute_doctor, "SelfTestBackend", Backend)
    monkeypatch.setattr(sniroute_doctor, "SELF_TEST_TIME", 0.2)  # after it, a case that hangs has a tenth of a second
    said, healthy = next(row for row in sniroute_doctor.SELF_TESTS if row[0] == "a broken hello: an alert")

    def patient(test: sniroute_doctor.SelfTest) -> None:
        """The one that does not hang may take longer than a tenth of a second, where this host is busy."""
        test.deadline = time.monotonic() + 9
        healthy(test)
    monkeypatch.setattr(sniroute_doctor, "SELF_TESTS", (
        *(row for row in sniroute_doctor.SELF_TESTS if row[0] in notices), (said, patient)))
    code, lines = selftest()
    failed = {line.partition(" s  ")[2].partition(": ")[0] for line in lines if line.startswith("FAIL")}
    assert code == 1 and failed == {title.partition(": ")[0] for title in notices}
    assert lines[-1].startswith(f"1 of {len(lines) - 1} went well")


def test_the_self_test_notices_a_crowd_that_shared_no_process(selftest, monkeypatch):
    monkeypatch.setattr(sniroute_doctor, "SELF_TESTS", tuple(
        row for row in sniroute_doctor.SELF_TESTS if row[0].startswith(("a tunnel for a crowd", "a tunnel that is"))))
    code, lines = selftest()
    assert code == 0
    monkeypatch.setattr(sniroute_doctor, "SELF_TESTS", tuple(reversed(sniroute_doctor.SELF_TESTS)))
    code, lines = selftest()
    assert code == 1 and " processes were started" in lines[1], "another case had started some"


def test_the_self_test_fails_where_the_router_does(selftest, monkeypatch):
    said = sniroute_doctor.HELLO_SAMPLE
    monkeypatch.setattr(sniroute_doctor, "SELF_TESTS", (
        ("right", lambda test: test.talk(said)),
        ("wrong", lambda test: test.talk((said, said[::-1]))),
        ("short", lambda test: test.talk((sniroute_doctor.sample_hello(None), b"more than an alert"))),
        ("right again", lambda test: test.talk(said))))
    code, lines = selftest()
    assert code == 1
    assert [line[:4] for line in lines] == ["ok  ", "FAIL", "FAIL", "ok  ", "2 of"]
    assert "instead of 97" in lines[1] or "bytes" in lines[1]


# -- bundle ------------------------------------------------------------------------------------


def test_the_same_sources_give_the_same_bytes(one_file, tmp_path):
    """Whoever runs it, from wherever, however Python hashes, and also from inside itself."""
    first, inside = tmp_path / "first.pyz", tmp_path / "inside.pyz"
    def bundled(how: pathlib.Path, path: pathlib.Path, seed: str) -> None:
        ended = execute(sys.executable, str(how), "bundle", f"--output={path}", "--with=all", cwd="/",
                        env={"PYTHONHASHSEED": seed}, said="", text=True)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout == f"{path}: sniroute 0.1.0 with doctor, admin, carrier, commands, backends, web, kubernetes, registry, nodepass, {path.stat().st_size >> 10} KiB\n"
    with concurrent.futures.ThreadPoolExecutor(2) as two:
        list(two.map(bundled, (PROGRAM, one_file), (first, inside), "12"))
    assert first.read_bytes() == inside.read_bytes() == one_file.read_bytes()


def test_a_bundle_has_what_it_was_asked_for(tmp_path):
    path = tmp_path / "small.pyz"
    assert command("bundle", "-o", str(path), "--with", "none").returncode == 0
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert names == sorted(["__main__.py", "__main__.pyc", *CORE, *(f"{name}c" for name in CORE)])
    assert os.access(path, os.X_OK)
    version = execute(*BARE_PYTHON, str(path), "--version", env=BARE, said="", text=True)
    assert version.stdout.endswith("; with no options)\n")
    for words, says in ((["check"], f"sniroute_doctor is not in {path}: write it with `bundle --with all`"),
                        (["carrier"], f"sniroute_carrier is not in {path}: write it with `bundle --with all`")):
        ended = execute(*BARE_PYTHON, str(path), *words, env=BARE, said="", text=True)
        assert (ended.returncode, ended.stderr) == (2, f"sniroute: {says}\n")


@pytest.mark.parametrize("words, code, says", [
    (["--with", "everything"], 2, "'everything' is none of doctor, admin, carrier, commands, backends, web, kubernetes, registry, nodepass, all and none"),
    (["-o", "/nonexistent/sniroute.pyz"], 1, "sniroute: /nonexistent/sniroute.pyz: No such file or directory"),
], ids=["option", "folder"])
def test_a_bundle_that_cannot_be_written_is_one_sentence(words, code, says, tmp_path):
    ended = execute(sys.executable, str(PROGRAM), "bundle", *words, cwd=tmp_path, said="", text=True)
    assert ended.returncode == code and says in ended.stderr and "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_no_file_that_another_user_has_made(tmp_path):
    """Who has made it may change it later: in /tmp that is anybody."""
    with open(tmp_path / "sniroute.pyz.part", "w+b") as theirs:
        ended = execute(sys.executable, str(PROGRAM), "bundle", "--with=none", cwd=tmp_path, said="", text=True)
        assert ended.returncode == 0, ended.stderr
        assert theirs.read() == b"" and (tmp_path / "sniroute.pyz").stat().st_ino != os.fstat(theirs.fileno()).st_ino


@pytest.mark.parametrize("said, says", [
    (b"def x(:\n", "SyntaxError: invalid syntax"), (b"# \xff\n", "sniroute.pyz: "),
], ids=["no Python", "no text"])
def test_a_bundle_of_a_broken_room_is_one_sentence(said, says, tmp_path):
    program = installed(tmp_path)
    (tmp_path / "sniroute_page.py").write_bytes(said)
    for room in ("admin", "door", "metrics"):
        shutil.copy(PROGRAM.parent / f"sniroute_{room}.py", tmp_path)
    ended = execute(sys.executable, str(program), "bundle", "--with=admin", cwd=tmp_path, said="", text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("sniroute: ") and ended.stderr.count("\n") == 1
    assert says in ended.stderr and not (tmp_path / "sniroute.pyz").exists()


def test_a_bundle_runs_on_every_python_that_is_here(one_file):
    places = [*os.environ.get("PATH", "").split(":"), *glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin"))]
    pythons = {os.path.realpath(path) for place in places for path in glob.glob(f"{place}/python3.1[1-9]")}
    pythons -= {os.path.realpath(sys.executable)}

    def tried(python: str) -> tuple[int, str]:
        if execute(python, "-c", "", env=BARE).returncode:  # a shim, of a version manager
            return 0, ""
        ended = execute(python, "-S", "-E", str(one_file), "selftest", env=BARE, said="", text=True)
        return ended.returncode, ended.stderr

    with concurrent.futures.ThreadPoolExecutor(8) as several:  # each waits most of its time
        assert dict(zip(pythons, several.map(tried, pythons))) == dict.fromkeys(pythons, (0, ""))


def test_one_verdict_where_the_tunnel_is_up_and_its_far_end_is_not(launch, own_edge, ports, admin_path):
    """A local port that is open is not "nothing to do"."""
    own_edge.far("*", (HOST, 1))
    options = "--route=*.example.com=carrier:{name}", f"--admin=unix:{admin_path}", ports
    program = launch(*options, env=environment(**own_edge.environ))
    with program.connect(HELLO) as client:
        read_all(client)
    told = command("explain", NAME, *options, **own_edge.environ)
    assert told.returncode == 1 and "\ntunnel:  ready (its local port is open)" in told.stdout
    assert re.search(r"\nrefused: .*its connector runs, but cannot reach the service.*\nto do: .*\n$", told.stdout)
    assert told.stdout.count("to do:") == 1
