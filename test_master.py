"""Tests of sniroute_master.py and sniroute_panel.py: a master that serves, and real clients."""

from __future__ import annotations

import contextlib
import html.parser
import json
import os
import re
import socket
import ssl
import subprocess
import time

import pytest

import sniroute_master
from conftest import HOST, wait_until
from sniroute_instances import KEY_ID
from sniroute_master import ENDPOINTS, Host, Master, beside
from sniroute_nodeurl import Options
from sniroute_panel import SCHEMAS, describe
from sniroute_refusals import SettingsError
from testbed.clients import program_path
from testbed.masters import FAKE, TIMES, Lines, url
from testbed.web import Talk

PROTECTED = [(row.method, row.path) for row in ENDPOINTS if not row.is_public]


def path_of(path: str, ident: str = "x") -> str:
    return f"/api{path}".replace("{id}", ident)


# -- who asks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key, words", [
    (None, "Unauthorized: API key required"), (" ", "Unauthorized: API key required"),
    ("x", "Unauthorized: Invalid API key"), ("\u00ff", "Unauthorized: Invalid API key"),
    ("0" * 32, "Unauthorized: Invalid API key")])
def test_who_has_not_the_key_gets_nothing(shared_master, key, words):
    ident = shared_master.still
    for method, path in PROTECTED:
        said = shared_master.ask(method, path_of(path, ident), {"url": url()}, key=key)
        assert (said.status, said.body) == (401, json.dumps({"error": words}, separators=(",", ":")).encode() + b"\n")
        assert said.headers["Access-Control-Allow-Origin"] == "*"
    assert len(shared_master.ask("GET", "/instances").json) == 2


@pytest.mark.parametrize("path", [path_of(row.path) for row in ENDPOINTS])
def test_a_preflight_is_answered_to_everybody(shared_master, path):
    said = shared_master.ask("OPTIONS", path, key=None, Origin="https://dash.example.com")
    assert (said.status, said.body) == (200, b"")
    assert {name: value for name, value in said.headers.items() if name.startswith("Access")} == {
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Allow-Methods": "GET, PATCH, POST, PUT, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": "Content-Type, Authorization, X-API-Key, Cache-Control"}


def test_another_key_makes_the_old_one_worthless_at_once(master):
    there = master()
    old = there.key
    with there.events() as events:
        said = there.ask("PATCH", f"/instances/{KEY_ID}", {"action": "restart"})
        events.until(lambda event: event["type"] == "shutdown" and event["instance"] is None)
        assert not events.read(), "the stream ends"
        assert there.key not in events.text.decode() or events.all[-2]["type"] == "update"
    assert said.status == 200 and said.json["url"] == there.key != old
    assert there.ask("GET", "/instances", key=old).status == 401
    there.close()
    assert master().ask("GET", "/instances", key=said.json["url"]).status == 200


def test_the_entry_of_the_key_is_no_instance(shared_master):
    entry = shared_master.ask("GET", "/instances/%2A%2A%2A%2A%2A%2A%2A%2A").json
    assert (entry["id"], entry["url"], entry["type"], entry["status"], entry["restart"]) == (
        KEY_ID, shared_master.key, "", "", False)
    assert re.fullmatch("[0-9a-f]{32}", entry["url"]) and re.fullmatch("[0-9a-f]{16}", entry["config"])
    for method in ("PUT", "DELETE"):
        said = shared_master.ask(method, f"/instances/{KEY_ID}", {"url": url()})
        assert (said.status, said.json) == (403, {"error": "Forbidden: API Key"})
    assert shared_master.ask("PATCH", f"/instances/{KEY_ID}", {"action": "stop", "alias": "x"}).json == entry


def test_the_key_is_printed_once(master):
    there = master()
    key = there.key
    there.ask("PATCH", f"/instances/{KEY_ID}", {"action": "restart"})
    again = there.key
    assert re.search(rf"^20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d{{3}}  INFO  API Key created: {key}$",
                     there.log, re.MULTILINE)
    there.close()
    second = master()
    assert there.log.count(key) == 1 and again not in there.log
    assert key not in second.log and again not in second.log and "info: API Key loaded: it is in /" in second.log


# -- the description ---------------------------------------------------------------------------


def test_the_description_is_what_is_answered(master):
    """Each status that it names is seen here, and no other; the fields of the answers are those that it has."""
    there = master()
    ident = there.create()
    there.until(ident, status="running", ping=3)
    ready = url("good", query="mode=1")
    tries = [("GET", "/instances", None), ("POST", "/instances", {"url": ready}), ("POST", "/instances", b"x"),
             ("GET", f"/instances/{ident}", None), ("GET", "/instances/", None), ("GET", "/instances/nobody", None),
             ("PATCH", f"/instances/{ident}", {"alias": "a"}), ("PATCH", "/instances/", {}),
             ("PATCH", "/instances/x", {}), ("PATCH", f"/instances/{ident}", {"action": "x"}),
             ("PUT", f"/instances/{ident}", {"url": ready}), ("PUT", f"/instances/{ident}", {"url": ready}),
             ("PUT", "/instances/x", {}), ("PUT", f"/instances/{ident}", {}), ("PUT", f"/instances/{KEY_ID}", {}),
             ("DELETE", "/instances/x", None), ("DELETE", "/instances/", None),
             ("DELETE", f"/instances/{KEY_ID}", None), ("DELETE", f"/instances/{ident}", None),
             ("GET", "/info", None), ("POST", "/info", {"alias": "a"}),
             ("POST", "/info", b"x"), ("GET", "/tcping?target=x", None), ("GET", "/tcping", None),
             ("GET", "/openapi.json", None), ("GET", "/docs", None)]
    seen = {("/events", "get", "200"), ("/events", "get", "503"), ("/instances", "post", "409")}  # tests of their own
    shown = {}
    for method, path, body in tries:
        said = there.ask(method, path, body)
        pattern = re.sub("/instances/.*", "/instances/{id}", path.partition("?")[0])
        seen.add((pattern, method.lower(), str(said.status)))
        if said.headers["Content-Type"] == "application/json" and said.status in (200, 201):
            shown[pattern, method.lower()] = said.json
    told = there.ask("GET", "/openapi.json", key=None).json
    assert told["openapi"] == "3.1.1" and told["servers"] == [{"url": "/api/v1"}] and len(SCHEMAS) == 9
    for path, methods in told["paths"].items():
        for method in methods.keys() - {"parameters"}:
            stranger = there.ask(method.upper(), path.replace("{id}", ident), key=None)
            if stranger.status == 401:
                seen |= {(path, method, "401"), (path, method, "405")}  # 405: the next test
    assert seen == {(path, method, status) for path, methods in told["paths"].items()
                    for method, entry in methods.items() if method != "parameters"
                    for status in entry["responses"]}
    for path, methods in told["paths"].items():
        for method, entry in methods.items():
            for answer in entry["responses"].values() if method != "parameters" else ():
                schema = answer.get("content", {}).get("application/json", {}).get("schema")
                if schema is not None:
                    value = shown[path, method]
                    fits(value[0] if schema.get("type") == "array" else value, schema.get("items", schema))


def fits(value, schema):
    """A value has the type and all the fields that its schema names, and no other."""
    schema = SCHEMAS[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    kinds = {"object": dict, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    wanted = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    assert type(value) in [kinds[kind] for kind in wanted], (value, schema)
    if "properties" in schema:
        assert value.keys() == schema["properties"].keys()
        for name, each in schema["properties"].items():
            fits(value[name], each)


@pytest.mark.parametrize("path", sorted({row.path for row in ENDPOINTS}))
def test_a_method_that_a_path_has_not_is_405(shared_master, path):
    ident = shared_master.still
    known = {row.method for row in ENDPOINTS if row.path == path}
    for method in {"GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "TRACE"} - known:
        if method == "HEAD" and "GET" in known and not [row for row in PROTECTED if row[1] == path]:
            continue
        said = shared_master.ask(method, path_of(path, ident))
        assert said.status == 405, method
        assert method == "HEAD" or said.json == {"error": "Method not allowed"}


@pytest.mark.parametrize("path", ["/api/v1", "/api/v1/nothing", "/api/v2/", "/api", "/", "/apis/", "/api/v1/%ff",
                                  "/api/v1/instances2"])
def test_a_path_that_is_not_there_is_as_in_the_original(shared_master, path):
    with Talk(shared_master.connect()) as talk:
        talk.say(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        while talk.more():
            pass
    assert talk.heard.startswith(b"HTTP/1.1 404 ") and talk.heard.endswith(b"\r\n\r\n404 page not found\n")


@pytest.mark.parametrize("prefix, base", [("", "/api"), ("/", "/api"), ("/np", "/np"), ("/a/b/", "/a/b")])
def test_the_prefix_of_the_url_is_in_front_of_all_paths(tmp_path, prefix, base):
    there = Master(Options("master", host=HOST, prefix=prefix), TIMES, {}, Lines(), str(tmp_path / "state"), FAKE)
    there.door.close()
    assert there.base == base and describe(there.base, ENDPOINTS)["servers"] == [{"url": f"{base}/v1"}]


def test_the_state_is_beside_the_program_also_where_that_is_one_file(tmp_path):
    bundle = tmp_path / "sniroute.pyz"
    bundle.touch()
    assert beside(str(tmp_path)) == beside(str(bundle)) == str(tmp_path / "nodepass.sqlite")


# -- instances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method, path, body, status, words", [
    ("POST", "/instances", b"", 400, "Invalid request body"), ("POST", "/instances", {}, 400, "Invalid request body"),
    ("POST", "/instances", [], 400, "Invalid request body"), ("POST", "/instances", {"url": 5}, 400,
                                                             "Invalid request body"),
    ("POST", "/instances", {"url": "", "alias": "x"}, 400, "Invalid request body"),
    ("POST", "/instances", b"[" * 60000, 400, "Invalid request body"),
    ("POST", "/instances", {"url": url(), "alias": ["x"]}, 400, "Invalid request body"),
    ("POST", "/instances", {"url": url("x", "master")}, 400, "Invalid URL scheme"),
    ("POST", "/instances", {"url": "server://\n"}, 400, "Invalid URL format"),
    ("POST", "/instances", {"url": url(), "alias": "x" * 257}, 400, "Instance alias exceeds maximum length 256"),
    ("PATCH", "/instances/ID", {"action": "explode"}, 400, "Invalid action: explode"),
    ("PATCH", "/instances/ID", {"alias": "x" * 257}, 400, "Instance alias exceeds maximum length 256"),
    ("PATCH", "/instances/ID", {"alias": "y", "meta": {"peer": {"sid": "x" * 257}}}, 400,
     "Meta peer.sid exceeds maximum length 256"),
    ("PATCH", "/instances/ID", {"meta": {"tags": {"x" * 257: ""}}}, 400, "Meta tag key exceeds maximum length 256"),
    ("PATCH", "/instances/ID", {"meta": {"tags": {"x": "x" * 257}}}, 400, "Meta tag value exceeds maximum length 256"),
    ("PATCH", "/instances/ID", {"meta": {"tags": {str(n): "" for n in range(101)}}}, 400,
     "There are over 100 meta tags"),
    ("PATCH", "/instances/ID", {"alias": "y", "action": "explode"}, 400, "Invalid action: explode"),
    ("PUT", "/instances/ID", {}, 400, "Invalid request body"), ("PUT", "/instances/ID", {"url": "ftp://x"}, 400,
                                                               "Invalid URL scheme"),
    ("GET", "/instances/ID/x", None, 404, "Instance not found"), ("POST", "/info", {"alias": 5}, 400,
                                                                 "Invalid request body"),
    ("POST", "/info", {"alias": "x" * 257}, 400, "Master alias exceeds maximum length 256"),
    ("GET", "/tcping?target=", None, 400, "Target address required"),
    ("POST", "/instances", b"x" * 65537, 413, "the body is over 65536 bytes")])
def test_what_is_refused_changes_nothing_and_says_why(shared_master, method, path, body, status, words):
    ident = shared_master.still
    before = shared_master.ask("GET", "/instances").json
    said = shared_master.ask(method, path.replace("ID", ident), body)
    assert (said.status, said.json) == (status, {"error": words})
    assert shared_master.ask("GET", "/instances").json == before


def test_a_new_instance_is_shown_before_it_runs_and_its_fields_are_in_the_originals_order(master):
    said = master().ask("POST", "/instances", {"url": url(), "alias": "a", "what": 1})
    assert (said.status, said.json["status"], said.json["restart"]) == (201, "stopped", True)
    assert re.fullmatch("[0-9a-f]{8}", said.json["id"])
    assert list(said.json) == ["id", "alias", "type", "status", "url", "config", "restart", "meta", "mode", "ping",
                               "pool", "tcps", "udps", "tcprx", "tcptx", "udprx", "udptx"]
    assert said.json["meta"] == {"peer": {"sid": "", "type": "", "alias": ""}, "tags": {}}


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b"[" * 60000, {"alias": 5}, {"alias": "x", "restart": "yes"},
                                  {"alias": "x", "meta": {"tags": {"a": 1}}}, {"alias": "x", "meta": []}, {},
                                  {"alias": None, "action": None, "restart": None, "meta": None}])
def test_a_patch_that_cannot_be_read_changes_nothing_and_is_no_error(shared_master, body):
    ident = shared_master.still
    before = shared_master.show(ident)
    said = shared_master.ask("PATCH", f"/instances/{ident}", body)
    assert (said.status, said.json) == (200, before) and shared_master.show(ident) == before


def test_a_patch_changes_what_it_names(master):
    there = master()
    ident = there.ended()
    with there.events() as events:
        said = there.ask("PATCH", f"/instances/{ident}", {
            "alias": "x" * 256, "restart": False, "meta": {"peer": {"sid": "1", "type": "2"}, "tags": {"a": "b"}}})
        assert (said.json["alias"], said.json["restart"]) == ("x" * 256, False)
        events.until(lambda event: event["type"] == "update" and event["instance"]["alias"] == "x" * 256)
        there.ask("PATCH", f"/instances/{ident}", {"restart": False})
        said = there.ask("PATCH", f"/instances/{ident}", {"meta": {"peer": {}}})
        assert said.json["meta"] == {"peer": {"sid": "", "type": "", "alias": ""}, "tags": {"a": "b"}}
        events.until(lambda event: event["instance"]["meta"]["peer"]["sid"] == "" and event["type"] == "update"
                     and event["instance"]["alias"])
    assert sum(event["type"] == "update" for event in events.all) == 2, "what changed nothing is no event"


def test_an_order_is_answered_with_the_state_before_it(master):
    there = master()
    ident = there.create()
    there.until(ident, status="running", ping=3)
    assert there.ask("PATCH", f"/instances/{ident}", {"action": "stop"}).json["status"] == "running"
    there.until(ident, status="stopped")
    assert there.ask("PATCH", f"/instances/{ident}", {"action": "start"}).json["status"] == "stopped"
    there.until(ident, status="running")
    assert there.ask("PATCH", f"/instances/{ident}", {"action": "reset"}).json["udptx"] == 0


def test_a_client_that_leaves_while_an_answer_is_pending_harms_nobody(master):
    there = master()
    ident = there.create("deaf")
    there.until(ident, ping=3)
    with contextlib.closing(there.connect()) as sock:
        sock.sendall(b"DELETE /api/v1/instances/%b HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\n\r\n"
                     % (ident.encode(), there.key.encode()))
        wait_until(lambda: ident not in there.master.instances.table)
    wait_until(lambda: not there.master.instances.leaving)
    assert len(there.ask("GET", "/instances").json) == 1


# -- events ------------------------------------------------------------------------------------


def test_a_stream_begins_with_all_instances_and_tells_what_happens(master):
    there = master()
    first = there.ended()
    with there.events() as events:
        assert events.until(lambda event: event["instance"]["id"] == first)["type"] == "initial"
        assert events.text.startswith(b"retry: 3000\n\nevent: instance\ndata: ")
        second = there.create(alias="mine")
        for kind in ("create", "log", "update"):
            event = events.until(lambda event: event["type"] == kind)
            assert list(event) == ["type", "time", "instance", "logs"] and event["instance"]["id"] == second
            assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", event["time"])
        there.ask("DELETE", f"/instances/{second}")
        events.until(lambda event: event["type"] == "delete")
        assert all("CHECK_POINT" not in event["logs"] for event in events.all)
        there.close()
        events.until(lambda event: event["type"] == "shutdown")
        assert not events.read()


def test_a_silent_stream_gets_a_comment_now_and_then(master, monkeypatch):
    assert sniroute_master.QUIET == 15
    monkeypatch.setattr(sniroute_master, "QUIET", 0.05)
    with master().events() as events:
        while b"\n\n:\n\n:\n\n" not in events.text:
            assert events.read()


def test_who_does_not_read_its_events_is_dropped_and_others_are_not(master, monkeypatch):
    monkeypatch.setattr(sniroute_master, "STREAM_MAX", 200_000)
    there = master()
    there.master.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # clients inherit it
    one = there.ended()
    with there.events() as events, there.events():
        wait_until(lambda: len(there.master.streams) == 2)
        for number in range(100):
            there.ask("PATCH", f"/instances/{one}", {"meta": {"tags": {
                f"{n}-{number}".ljust(256, "k"): "v" * 256 for n in range(100)}}})
            events.until(lambda event: any(f"-{number}k" in name for name in event["instance"]["meta"]["tags"]))
            events.text = b""
            if len(there.master.streams) == 1:
                break
        else:
            pytest.fail("it is not dropped")
        there.ask("PATCH", f"/instances/{one}", {"alias": "last"})
        events.until(lambda event: event["instance"]["alias"] == "last")


def test_streams_have_a_limit(master, monkeypatch):
    monkeypatch.setattr(sniroute_master, "STREAMS_MAX", 1)
    there = master()
    with there.events():
        assert there.ask("GET", "/events").status == 503
    wait_until(lambda: not there.master.streams)
    with there.events():
        pass


# -- targets -----------------------------------------------------------------------------------


def test_a_target_is_tried(shared_master, serve, free_ports):
    far = f"{HOST}:{serve(lambda sock: None).address[1]}"
    said = shared_master.ask("GET", f"/tcping?target={far}").json
    assert said.pop("latency") in range(1000)
    assert said == {"target": far, "connected": True, "error": None}
    shut = f"{HOST}:{free_ports(1)[0]}"
    assert shared_master.ask("GET", f"/tcping?target={shut}").json == {
        "target": shut, "connected": False, "latency": 0, "error": f"dial tcp {shut}: connection refused"}


@pytest.mark.parametrize("target", ["x", "x:", ":1", "x:0", "x:65536", "x:-1", "x:1:y", "x:\u0661", "a..b:1", "\0:1",
                                    "x:" + "9" * 5000, "\ud800:1".encode("utf-8", "replace").decode()])
def test_what_is_no_target_is_told_so(shared_master, target):
    import urllib.parse
    said = shared_master.ask("GET", f"/tcping?target={urllib.parse.quote(target)}")
    assert said.status == 200 and not said.json["connected"] and said.json["error"]


def test_no_more_than_so_many_targets_are_tried_at_once(master, deaf, monkeypatch):
    assert (sniroute_master.PINGS_MAX, sniroute_master.PING_TIME) == (10, 5)
    monkeypatch.setattr(sniroute_master, "PINGS_MAX", 1)
    monkeypatch.setattr(sniroute_master, "PING_WAIT", 0.05)
    monkeypatch.setattr(sniroute_master, "PING_TIME", 1.5)  # the second one comes within that, also on a busy host
    there = master()
    target = f"{HOST}:{deaf[1]}"
    with Talk(there.connect()) as talk:
        talk.say(f"GET /api/v1/tcping?target={target} HTTP/1.1\r\nHost: x\r\nX-API-Key: {there.key}\r\n\r\n".encode())
        wait_until(lambda: not there.master.pings.free)
        assert there.ask("GET", f"/tcping?target={target}").json["error"] == "too many requests"
        while b"i/o timeout" not in talk.heard:
            assert talk.more()
    wait_until(lambda: there.master.pings.free)
    assert there.ask("GET", "/tcping?target=x").json["error"] != "too many requests"


# -- this host ---------------------------------------------------------------------------------


def test_the_figures_of_this_host_are_real(master):
    there = master()
    info = there.ask("GET", "/info").json
    assert list(info) == sorted(SCHEMAS["MasterInfo"]["properties"])
    assert (info["os"], info["noc"], info["tls"], info["name"]) == ("linux", len(os.sched_getaffinity(0)), "0", HOST)
    with open("/proc/meminfo") as file:
        assert info["mem_total"] == int(file.readline().split()[1]) * 1024
    assert 0 < info["mem_used"] < info["mem_total"] and 0 <= info["cpu"] <= 100 and info["uptime"] < 60
    with open("/proc/uptime") as file:
        assert abs(info["sysup"] - float(file.read().split()[0])) < 60


def test_the_figures_of_a_host_are_those_of_proc(tmp_path):
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    write("stat", "cpu  100 0 100 800 0 0 0 0\ncpu0 1 2 3 4\n")
    write("meminfo", "MemTotal: 100 kB\nMemAvailable: 60 kB\nSwapTotal: 10 kB\nSwapFree: 9 kB\nHugePages: 0\n")
    write("net/dev", "Inter-| Receive\n face |bytes packets\n    lo: 5 0 0 0 0 0 0 0 5 0\n  eth0: 7 0 0 0 0 0 0 0 9 0\n"
                     "veth1: 5 0 0 0 0 0 0 0 5 0\nwlan0: 1 0 0 0 0 0 0 0 1 0\n")
    row = "0 0 {} 1 0 {} 0 1 0 {} 0 0 0 0\n"
    write("diskstats", row.format("sda", 3, 5) + row.format("sda1", 3, 5) + row.format("dm-0", 9, 9)
          + row.format("loop0", 9, 9) + "short\n")
    write("uptime", "123.45 1.0\n")
    host = Host(str(tmp_path))
    assert host.read() == {"cpu": 20, "mem_total": 102400, "mem_used": 40960, "swap_total": 10240, "swap_used": 1024,
                           "netrx": 8, "nettx": 10, "diskr": 1536, "diskw": 2560, "sysup": 123}
    write("stat", "cpu  200 0 150 850 0 0 0 0\n")
    host.at -= 1
    assert host.cpu() == 75 == host.cpu()
    assert Host(str(tmp_path / "nothing")).read() == {**dict.fromkeys(host.read(), 0), "cpu": -1}


# -- TLS ---------------------------------------------------------------------------------------


def test_with_tls_1_a_certificate_is_made_on_the_spot(master):
    there = master(tls=1)
    ident = there.create()
    shown = there.until(ident, status="running", ping=3)
    assert "tls=1" in shown["url"] and there.ask("GET", "/info").json["tls"] == "1"
    with there.events() as events:
        events.until(lambda event: event["type"] == "update")
        assert events.sock.version() == "TLSv1.3"
    big = there.ask("POST", "/instances", {"url": url(), "alias": "x" * 60000})
    assert big.status == 400
    assert len(there.ask("GET", "/openapi.json").body) > 5000
    done = subprocess.run([program_path("curl", "curl"), "-sSk", "-H", f"X-API-Key: {there.key}",
                           f"https://{HOST}:{there.address[1]}/api/v1/instances"], capture_output=True, timeout=10)
    assert len(json.loads(done.stdout)) == 2, done.stderr


def test_inside_tls_a_slow_reader_gets_all_of_its_answer(master):
    there = master(tls=1)
    there.master.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ident = there.ended()
    there.ask("PATCH", f"/instances/{ident}", {"meta": {"tags": {
        f"{n}".ljust(256, "k"): "v" * 256 for n in range(90)}}})
    with contextlib.closing(socket.socket()) as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.settimeout(10)
        plain.connect(there.address)
        with ssl._create_unverified_context().wrap_socket(plain) as sock:
            sock.sendall(f"GET /api/v1/instances HTTP/1.1\r\nHost: x\r\nX-API-Key: {there.key}\r\n"
                         "Connection: close\r\n\r\n".encode())
            wait_until(lambda: [caller for caller in list(there.master.door.gates[0].callers)
                                if caller.state == "answering"])
            data = b""
            while more := sock.recv(65536):
                data += more
    assert len(json.loads(data.partition(b"\r\n\r\n")[2])) == 2 and len(data) > 40000


def test_who_speaks_no_tls_is_dropped_and_the_next_one_is_served(master):
    there = master(tls=1)
    with socket.create_connection(there.address, 10) as sock:
        sock.sendall(b"GET /api/v1/info HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert not re.search(b"HTTP/1", sock.recv(4096))
    with socket.create_connection(there.address, 10):
        assert there.ask("GET", "/info").status == 200, "one that says nothing holds up nobody"


def test_with_tls_2_the_files_are_read_again_when_they_change(master, tmp_path, certificates):
    crt, key = tmp_path / "c.pem", tmp_path / "k.pem"
    certificates(crt, key)
    there = master(tls=2, crt=str(crt), key_file=str(key))

    def shown() -> bytes:
        with contextlib.closing(there.connect()) as sock:
            return sock.getpeercert(True)

    first = shown()
    assert first == ssl.PEM_cert_to_DER_cert(crt.read_text())
    key.write_text("garbage")
    wait_until(lambda: shown() == first and "is still in use" in there.log)
    certificates(crt, key)
    wait_until(lambda: shown() != first)


@pytest.fixture
def certificates():
    """certificates(crt, key): a new pair, in these files."""
    from sniroute_certificate import self_signed

    def write(crt, key) -> None:
        pair = self_signed("localhost", time.time())
        key.write_bytes(pair.key_pem)
        crt.write_bytes(pair.certificate_pem)
    return write


@pytest.mark.parametrize("options, words", [
    ({"tls": 2, "crt": "/nonexistent", "key_file": "/nonexistent"}, "tls=2: crt, key: /nonexistent: no such file"),
    ({"host": "192.0.2.1"}, "192.0.2.1:0: Cannot assign"), ({"host": "nobody.invalid"}, "nobody.invalid")])
def test_a_master_that_cannot_listen_says_why_and_leaves_nothing(master, options, words):
    with pytest.raises(SettingsError, match=words) as caught:
        master(**options)
    assert len(caught.value.lines) == 1


# -- pages -------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("path", ["/api/v1/docs", "/api/"])
def test_pages_are_for_everybody_and_load_nothing_from_elsewhere(master, path):
    there = master()
    there.create(alias="<img src=x onerror=alert(1)>")
    said = there.ask("GET", path, key=None)
    assert (said.status, said.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = said.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert ("script-src" in policy) == (path == "/api/") and there.key.encode() not in said.body
    text = said.body.decode()
    for tag, attributes in Tags(text).found:
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes), tag
        assert attributes.get("href", "data:").startswith("data:")
    assert "onerror" not in text
    if path == "/api/v1/docs":
        assert "<script" not in text
        for row in ENDPOINTS:
            assert not row.path.startswith("/v1/") or f"{row.method} /api{row.path}" in text


def test_a_hostile_alias_does_not_run_on_the_page(browser, master):
    there = master()
    hostile = "<img src=x onerror=\"document.title='run'\">"
    ident = there.create("s3cret", alias=hostile)
    origin = f"http://{HOST}:{there.address[1]}"
    browser.call("Page.navigate", url=f"{origin}/api/")
    wait_until(lambda: browser.evaluate("document.getElementById('login')?.hidden") is False)
    browser.evaluate(f"document.getElementById('key').value = {there.key!r};"
                     "document.getElementById('login').requestSubmit()")
    wait_until(lambda: ident and hostile in browser.text("instances"))
    assert "s3cret" not in browser.text("instances") and f"server://{HOST}:10101" in browser.text("instances")
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.title") == "sniroute: NodePass"
    there.ask("PATCH", f"/instances/{KEY_ID}", {"action": "restart"})
    browser.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # it asks at once
    wait_until(lambda: browser.evaluate("document.getElementById('login').hidden") is False)
    assert "Invalid API key" in browser.text("about")


def test_no_answer_has_a_character_that_html_takes_for_its_own(master):
    there = master()
    ident = there.create(alias="<script>&\u2028</script>")
    for path in ("/instances", f"/instances/{ident}"):
        body = there.ask("GET", path).body
        assert not re.search(b"[<>&]", body) and body.isascii()
    assert there.show(ident)["alias"] == "<script>&\u2028</script>"
