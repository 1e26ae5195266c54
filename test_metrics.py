"""Tests of sniroute_metrics.py: the collector with a stub for a router, the rest with a real one, asked by HTTP."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import socket
import sys
import time
import types
from typing import Any, Iterator

import pytest

import sniroute_log
import sniroute_metrics
import sniroute_names
import sniroute_refusals
import sniroute_routes
from sniroute_doctor import sample_hello
from sniroute_metrics import Collector, Histogram, TopNames, escape_label, show_number
from sniroute_names import printable
from sniroute_tunnels import Start, View
from conftest import HOST, FakeClock, echo, wait_until
from testbed.admin import (DB, HOSTILE, TOKEN, TUNNEL, Running, ask, hostile_ending, hostile_request, metrics,
                           parse_metrics, request, value)

pytestmark = pytest.mark.usefixtures("hurry")


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
        counters=collections.Counter(), connections=[], started=100.0,
        last_reload=(True, 100.0), tunnels=types.SimpleNamespace(started=collections.deque(maxlen=3)))


def connection(up: int, down: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(up=types.SimpleNamespace(total=up), down=types.SimpleNamespace(total=down))


def test_rates_count_the_bytes_of_open_connections_and_never_fall():
    router, clock = stub_router(), FakeClock()
    collector = Collector(router, clock)
    one = connection(1000, 50)
    router.connections = [types.SimpleNamespace(up=None, down=None)]  # it has just ended, and is not counted yet
    router.counters.update(accepted=4, no_route=2, http_requests=6)
    clock.jump(0.09)
    collector.collect()
    assert not collector.samples
    router.connections = [one]
    clock.jump(1.91)
    collector.collect()
    assert collector.samples[-1] == (2.0, 1.0, 500.0, 25.0, 3.0, 1)
    one.up = None  # between the loop's two steps at its end
    clock.jump(1.0)
    collector.collect()
    assert collector.samples[-1] == (0.0, 0.0, 0.0, 0.0, 0.0, 1) and collector.totals[2:] == (1000, 50, 6)
    router.connections = []
    router.counters.update(bytes_up=1500, bytes_down=50)
    clock.jump(1.0)
    collector.collect()
    assert collector.samples[-1] == (0.0, 0.0, 500.0, 0.0, 0.0, 0)


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


def test_what_another_thread_changes_meanwhile_is_copied_again():
    """As interpreters other than CPython may find it."""
    faults = [RuntimeError("dictionary changed size during iteration")] * (sniroute_metrics.COPY_TRIES - 1)
    def kind(live: list[int]) -> list[int]:
        if faults:
            raise faults.pop()
        return list(live)
    live = [1, 2]
    found = sniroute_metrics.copied(live, kind)
    assert found == live and found is not live and not faults
    faults += [RuntimeError()] * sniroute_metrics.COPY_TRIES
    with pytest.raises(RuntimeError):
        sniroute_metrics.copied(live, kind)


def test_without_proc_what_it_tells_is_not_there(monkeypatch):
    def nothing(*_: Any) -> Any:
        raise FileNotFoundError
    assert sniroute_metrics.resident_memory() and sniroute_metrics.open_descriptors()
    assert 0 < sniroute_metrics.process_started(1.0) <= time.time()
    monkeypatch.setattr(sniroute_metrics, "open", nothing, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", nothing)
        assert sniroute_metrics.open_descriptors() is None
    assert sniroute_metrics.resident_memory() is None and sniroute_metrics.process_started(1.0) == 1.0


# -- /metrics ----------------------------------------------------------------------------------


def test_metrics_count_what_happened(run_admin, serve, cloudflared, ports):
    far = serve(echo)
    cloudflared.far("*", far.address)
    running = run_admin(TUNNEL, f"--route=web.test.test=tcp:{far.address[0]}:{far.address[1]}", ports)
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
    assert value(seen, "sniroute_port_pool_size") == 30
    assert value(seen, "sniroute_port_pool_used") == 1
    assert seen["sniroute_route_wait_seconds_count"][()] == 1
    assert seen["sniroute_connection_duration_seconds_count"][()] == 3
    assert seen["sniroute_tunnel_start_seconds_count"][()] == 1
    assert 0 < seen["sniroute_tunnel_start_seconds_sum"][()] < 20
    assert value(seen, "process_open_fds") > 5
    assert value(seen, "process_resident_memory_bytes") > 1 << 20
    assert abs(value(seen, "process_start_time_seconds") - time.time()) < 86400
    assert {dict(labels)["result"] for labels in seen["sniroute_connections_total"]} \
        == {*sniroute_refusals.REFUSALS, *sniroute_log.ENDINGS}


def test_labels_do_not_grow_with_what_clients_say(run_admin):
    """1000 names that nobody has a route for, and some more in what failed: no label more."""
    running = run_admin("--route=*.example.com=tcp:127.0.0.1:9")
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
    assert len(running.admin.collector.names.counts) <= sniroute_metrics.NAMES_KEPT


def of_registry(seen: dict[str, Any]) -> dict[str, Any]:
    """What the metrics of the registry say, by their names without what they have in common."""
    return {name.removeprefix("sniroute_registry_"): {labels[0][1] if labels else "": number
                                                      for labels, number in samples.items()}
            for name, samples in seen.items() if name.startswith("sniroute_registry_")}


def test_without_a_registry_nothing_tells_of_names(run_admin):
    running = run_admin("--route=*.example.com=tcp:192.0.2.1:80")
    assert of_registry(metrics(running)) == {}
    status = ask(running.admin, "/status").json
    assert (status["registry"], status["claims"]) == (None, [])


def test_metrics_and_status_tell_of_claimed_names_and_no_label_does(claiming):
    there = claiming()
    for name in ("a", "b", "c"):
        there.claim(f"{name}.tun.example.com")
    there.claim(there.port)
    there.release("c.tun.example.com")
    assert there.claim("a.tun.example.com", owner="bob").word == "other"
    there.claim("a.tun.example.com", while_connected=True)
    there.suspend("b.tun.example.com")
    there.forget()
    seen = of_registry(metrics(there.running))
    assert seen.pop("store_write_seconds_total")[""] >= 0
    assert seen == {"claims": {"live": 3, "held": 1}, "events_total": {"claimed": 5, "released": 1, "changed": 1},
                    "refusals_total": {"other": 1}, "store_up": {"": 1}, "store_writes_total": {"": 7}}
    reply = ask(there.running.admin, "/status")
    registry, claims = reply.json["registry"], reply.json["claims"]
    assert {name: registry[name] for name in ("store", "store_up", "fault", "claims", "held", "owners", "streams")} == {
        "store": "memory", "store_up": True, "fault": "", "claims": 3, "held": 1, "owners": {"alice": 3}, "streams": 0}
    assert [(row["name"], row["suspended"], row["while_connected"]) for row in claims] == [
        ("a.tun.example.com", False, True), ("b.tun.example.com", True, False), (there.port, False, False)]
    leases = [claim.lease for claim in there.registrar.table.live.values()]
    assert len(leases) == 3 and not any(lease.encode() in reply.body for lease in leases)
    text = ask(there.running.admin, "/metrics").body
    assert b"tun.example.com" not in text and b"alice" not in text and there.port[4:].encode() not in text


def test_a_store_that_is_away_is_told(claiming):
    there = claiming()
    there.claim("a.tun.example.com")
    there.registrar.door.loop.call(lambda: there.registrar.registry.freeze(True))
    wait_until(lambda: there.registrar.table.frozen_since is not None)
    there.forget()
    assert of_registry(metrics(there.running))["store_up"] == {"": 0}
    assert ask(there.running.admin, "/status").json["registry"]["store_up"] is False


def test_the_names_of_status_are_bounded(claiming, monkeypatch):
    monkeypatch.setattr(sniroute_metrics, "CLAIMS_SHOWN", 2)
    there = claiming()
    for name in ("b", "c", "a"):
        there.claim(f"{name}.tun.example.com")
    there.forget()
    status = ask(there.running.admin, "/status").json
    assert [row["name"] for row in status["claims"]] == ["a.tun.example.com", "b.tun.example.com"]
    assert status["registry"]["claims"] == 3


def test_label_values_are_escaped():
    assert escape_label('a"b\\c\nd') == 'a\\"b\\\\c\\nd'
    assert [show_number(number) for number in (1, 0.25, 1e-07, float("inf"), 12345678901234567890)] \
        == ["1", "0.25", "1e-07", "+Inf", "12345678901234567890"]
    text = f'# HELP a b\n# TYPE a gauge\na{{route="{escape_label(HOSTILE)}"}} 1\n'
    assert parse_metrics(text) == {"a": {(("route", HOSTILE),): 1.0}}


# -- requests in plain HTTP --------------------------------------------------------------------


def is_of_requests(name: str) -> bool:
    return name.startswith("sniroute_http_")


def test_where_no_route_serves_http_nothing_tells_of_requests(run_admin):
    running = run_admin()
    seen, status = metrics(running), ask(running.admin, "/status").json
    assert not any(map(is_of_requests, seen)) and b"http" not in ask(running.admin, "/metrics").body
    assert status["http"] is None and status["last_requests"] == []


def test_metrics_tell_of_requests_by_route_and_status_class(run_admin):
    running = run_admin("--route=web.example.com=tcp:192.0.2.1:80", "--route=*.example.org=tcp:192.0.2.1:80")
    running.serve_web(
        request(), request(first=0.2, seconds=7.0), request(status=404), request(status=101, seconds=1000.0),
        request(route="*.example.org", status=0, first=None, reason="client_left"),
        request(route=None, backend=None, status=400, reason="bad_request"))
    running.collected()
    seen = metrics(running)
    counts = {labels: count for labels, count in seen["sniroute_http_requests_total"].items()}
    assert counts == {(("route", route), ("status", status)): count for route, status, count in (
        ("web.example.com", "2xx", 2), ("web.example.com", "4xx", 1), ("web.example.com", "1xx", 1),
        ("*.example.org", "none", 1), ("-", "4xx", 1))}
    good = {"route": "web.example.com", "status": "2xx"}
    assert value(seen, "sniroute_http_first_byte_seconds_count", **good) == 2
    assert value(seen, "sniroute_http_first_byte_seconds_sum", **good) == pytest.approx(0.203)
    assert value(seen, "sniroute_http_first_byte_seconds_bucket", **good, le="0.005") == 1
    assert value(seen, "sniroute_http_request_duration_seconds_sum", **good) == pytest.approx(7.004)
    assert value(seen, "sniroute_http_request_duration_seconds_bucket", **good, le="5.0") == 1
    unanswered = {"route": "*.example.org", "status": "none"}
    assert value(seen, "sniroute_http_first_byte_seconds_count", **unanswered) == 0, "there was no first byte"
    assert value(seen, "sniroute_http_request_duration_seconds_count", **unanswered) == 1
    assert sum(map(is_of_requests, seen)) == 1 + 2 * 3


def test_labels_of_requests_do_not_grow_with_what_clients_say(run_admin):
    running = run_admin("--route=*.example.com=tcp:192.0.2.1:80")
    running.serve_web(request(route="*.example.com"))
    running.collected()
    before = metrics(running)
    running.serve_web(*(request(host=f"n{number}.example.com", path=f"/p{number}", method=f"M{number}",
                                status=200 + number % 100, route="*.example.com") for number in range(500)))
    running.collected()
    after = metrics(running)
    assert {name: set(samples) for name, samples in before.items()} == {
        name: set(samples) for name, samples in after.items()}
    assert value(after, "sniroute_http_requests_total", route="*.example.com", status="2xx") == 501
    text = ask(running.admin, "/metrics").body
    assert b"n7." not in text and b"/p7" not in text and b"192.0.2.1" not in text


def of_routes(*patterns: str) -> types.SimpleNamespace:
    """As a Router's routes."""
    return types.SimpleNamespace(tallies=dict.fromkeys(patterns))


def test_many_routes_share_a_row_and_those_that_are_gone_make_room(monkeypatch):
    monkeypatch.setattr(sniroute_metrics, "REQUEST_ROUTES", 2)
    router = types.SimpleNamespace(routes=of_routes("a", "b", "c", "d"))
    requests = sniroute_metrics.Requests(router)

    def ask_for(*routes: str | None) -> dict[str, int]:
        for route in routes:
            requests.add(request(route=route))
        return {label: row.count for (label, _), row in requests.rows.items()}

    assert ask_for("a", None, "b", "c", "d", "c", "a", "gone") == {"a": 2, "-": 1, "b": 1, "other": 4}
    router.routes = of_routes("b", "d", "e")
    assert ask_for("d", "e", "b", "a", None) == {"b": 2, "-": 2, "other": 6, "d": 1}
    router.routes = of_routes("f", "g")
    assert ask_for("f", "g", "f") == {"-": 2, "other": 6, "f": 2, "g": 1}
    assert all(known in (None, "f", "g") for known in requests.labels), "nothing is remembered of what is gone"


def test_status_shows_the_last_requests_and_how_many_there_were(run_admin, monkeypatch):
    monkeypatch.setattr(sniroute_metrics, "REQUESTS_SHOWN", 3)
    running = run_admin("--route=web.example.com=tcp:192.0.2.1:80")
    running.serve_web(*(request(path=f"/{number}") for number in range(5)), request(
        when=1_700_000_000.0, method="", host="", path="", status=0, first=None, route=None, backend=None,
        reason="bad_request", detail="a blank before a colon"))
    running.collected()
    status = ask(running.admin, "/status").json
    assert status["http"] == {"requests": 6, "statuses": {"none": 1, "2xx": 5}}
    assert [row["path"] for row in status["last_requests"]] == ["", "/4", "/3"]
    assert status["last_requests"][0] == {
        "when": 1_700_000_000.0, "client": f"{HOST}:4711", "method": "", "host": "", "path": "", "status": None,
        "up": 0, "down": 2, "first": None, "seconds": 0.004, "route": "", "backend": "", "reason": "bad_request",
        "detail": "a blank before a colon"}
    row = status["last_requests"][1]
    assert (row["method"], row["host"], row["status"], row["first"], row["route"], row["backend"]) == (
        "GET", "web.example.com", 200, 0.003, "web.example.com", "tcp:192.0.2.1:80")
    wait_until(lambda: running.admin.collector.totals.requests == 6)
    running.admin.status.forget()
    assert sum(ask(running.admin, "/status").json["rates"]["requests"]) > 0


# -- backends ----------------------------------------------------------------------------------


@pytest.fixture
def backends(run_admin, settings_file, serve, free_ports) -> Iterator[tuple[Running, str, str]]:
    """A router with three routes to several backends, and the targets of those of `db`: the first is down."""
    bad = f"tcp:{HOST}:{free_ports(1)[0]}"
    good = f"tcp:{HOST}:{serve(echo).address[1]}"
    one = f"tcp:{HOST}:{serve(echo).address[1]}"
    path = settings_file(f"""
        [routes]
        "*.example.org" = "tcp:{{label}}.invalid:1,{{label}}.invalid:2"
        "x.example.com" = "tcp:192.0.2.1:1"
        "q.example.com" = {{ target = ["{one}"], max_backend_connections = 1, queue = "1500ms" }}
        [routes."db.example.com"]
        target = ["{bad}", "{good}"]
        health = "connect"
        health_interval = "100ms"
        health_timeout = "50ms"
        health_fail = 1
        warm = 2
        """)
    running = run_admin("-c", path)
    members = {member.target: member for _, member in running.router.targets.book.rows()}
    wait_until(lambda: members[bad].why and members[bad].checks_bad)
    wait_until(lambda: members[good].checks_good and len(members[good].pool.idle) == 2)
    yield running, bad, good


def test_metrics_tell_of_each_backend_of_the_configuration(backends):
    running, bad, good = backends
    for _ in range(3):
        with running.connect("db.example.com") as client:
            assert client.recv(1)
    running.refused("a.example.org")
    with running.connect("q.example.com") as first, running.connect("q.example.com") as second:
        assert first.recv(1)
        (group,) = [group for group in running.router.targets.book.listed() if group.pattern == "q.example.com"]
        wait_until(lambda: group.waiting)
        running.admin.metrics.forget()
        assert value(metrics(running), "sniroute_backend_queue_length", route="q.example.com") == 1
        while second.recv(1):
            pass  # its time is over
    running.collected()
    seen = metrics(running)
    for target, up in ((bad, 0), (good, 1)):
        place = {"route": "db.example.com", "backend": target}
        assert value(seen, "sniroute_backend_up", **place) == up
        assert value(seen, "sniroute_backend_drained", **place) == 0
        assert value(seen, "sniroute_backend_connections", **place) == 0
        assert (value(seen, "sniroute_backend_checks_total", **place, result="good") > 0) is bool(up)
        assert (value(seen, "sniroute_backend_checks_total", **place, result="bad") > 0) is not bool(up)
        assert value(seen, "sniroute_backend_warm", **place, state="dialling") in (0, 1)
        assert value(seen, "sniroute_backend_warm_used_total", **place, result="hit") == 3 * up
        assert value(seen, "sniroute_backend_warm_used_total", **place, result="miss") == 0
        assert value(seen, "sniroute_backend_warm_used_total", **place, result="dead") == 0
        assert value(seen, "sniroute_backend_connect_seconds_count", **place) == 0, "their connects were ahead of them"
    assert value(seen, "sniroute_backend_queue_length", route="q.example.com") == 0
    assert value(seen, "sniroute_backend_queue_seconds_count", route="q.example.com") == 1
    assert 1.25 < value(seen, "sniroute_backend_queue_seconds_sum", route="q.example.com") < 10
    assert value(seen, "sniroute_backend_queue_seconds_count", route="db.example.com") == 0
    several = {name: {dict(labels)["route"] for labels in samples} for name, samples in seen.items()
               if name.startswith("sniroute_backend_")}
    both = {"db.example.com", "q.example.com"}
    assert several.pop("sniroute_backend_checks_total") == {"db.example.com"}
    assert several.pop("sniroute_backend_warm") == several.pop("sniroute_backend_warm_used_total") == {"db.example.com"}
    assert len(several) == 11 and all(routes == both for routes in several.values()), "no name of a client"


def test_status_says_how_each_backend_stands(backends):
    running, bad, good = backends
    with running.connect("db.example.com") as client:
        assert client.recv(1)
        running.admin.status.forget()
        status = ask(running.admin, "/status").json
    other, down, up = status["backends"]
    assert status["backend_states"] == {"down": 1, "good": 2}
    assert set(down) == set(up) == set(other)
    assert (down["route"], down["backend"], down["state"], down["why"]) \
        == ("db.example.com", bad, "down", "Connection refused")
    assert 0 <= down["since"] < 20 and 0 <= down["next"] <= 30
    assert set(down["results"]) == {"-"} and down["checks"]["bad"] > 0
    assert (up["state"], up["why"], up["active"], up["near"]) == ("good", "", 1, True)
    assert (up["limit"], up["waiting"]) == (None, 0) and status["oldest_connections"][0]["backend"] == good
    assert up["warm"]["hit"] == 1 and up["warm"]["miss"] == up["warm"]["dead"] == 0 and up["results"][-1] == "+"
    assert (other["limit"], other["checks"], other["warm"], other["results"]) == (1, None, None, "")


def test_a_backend_s_words_are_shown_printable_and_the_list_is_bounded(run_admin, monkeypatch):
    running = run_admin("--route=x.example.com=tcp:192.0.2.1:1,192.0.2.1:2,192.0.2.1:3")
    (group,) = running.router.targets.book.listed()
    one, two, three = group.members.values()
    three.why, three.target = HOSTILE * 20, HOSTILE
    two.is_drained = True
    monkeypatch.setattr(sniroute_metrics, "BACKENDS_SHOWN", 2)
    reply = ask(running.admin, "/status")
    assert not re.search(rb"[^\n -~]", reply.body)
    assert [(row["backend"], row["state"]) for row in reply.json["backends"]] == [
        ("tcp:192.0.2.1:2", "drained"), (printable(HOSTILE), "down")], "first those that are not good"
    assert reply.json["backends"][1]["why"] == printable(HOSTILE * 20, 300)
    assert reply.json["backend_states"] == {"good": 1, "drained": 1, "down": 1}
    assert value(metrics(running), "sniroute_backend_up", route="x.example.com", backend=HOSTILE) == 0


# -- /status -----------------------------------------------------------------------------------


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    for part in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(part)


def test_hostile_text_is_shown_printable(run_admin):
    running = run_admin()
    router = running.router
    router.routes = types.SimpleNamespace(
        routes=(sniroute_routes.Route(HOSTILE, HOSTILE),), tallies={HOSTILE: sniroute_routes.Tally()})
    running.tunnels.failed = lambda: [View(HOSTILE, "failed", 0, 0, 0, 0, 0.0, 4.0, 1, HOSTILE)]
    running.tunnels.started.append(Start(HOSTILE, time.time(), 1.5))
    router.endings.extend([hostile_ending(), hostile_ending(name=None), hostile_ending("client_closed")])
    running.serve_web(hostile_request(), hostile_request(route=HOSTILE, path=HOSTILE * 400))
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
    long, short = status["last_requests"]
    assert short["method"] == short["host"] == short["path"] == short["backend"] == short["detail"] == shown
    assert len(long["path"]) == sniroute_log.VALUE_MAX and long["route"] == shown
    assert value(seen, "sniroute_http_requests_total", route=HOSTILE, status="5xx") == 1
    router.routes = router.settings.routes


def test_status_shows_connections_tunnels_and_what_failed(run_admin, serve, cloudflared, ports):
    cloudflared.far("*", serve(echo).address)
    cloudflared.fault("bad.example.com", exit=1, words="lookup bad.example.com: no such host")
    running = run_admin(TUNNEL, ports, "--max-connections=100")
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
    assert status["limits"] == {"connections": 100, "tunnels": running.tunnels.max_tunnels, "ports": 30}
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


def test_lists_of_status_are_bounded(run_admin, monkeypatch):
    monkeypatch.setattr(sniroute_metrics, "CONNECTIONS_SHOWN", 3)
    running = run_admin(*(f"--route=n{number}.example.com=tcp:127.0.0.1:9" for number in range(5)))
    monkeypatch.setattr(sniroute_metrics, "ROUTES_SHOWN", 4)
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
    assert len(status["last_refusals"]) == sniroute_metrics.REFUSALS_SHOWN
    assert len(status["routes"]) == 4
