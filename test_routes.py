"""Tests of sniroute_routes.py: routes, and what they may ask for.

The first half asks the module itself.  The second half asks a router in a thread (`run` of testbed/running.py):
where a client's bytes go, and what a route allows.
"""

from __future__ import annotations

import socket
from typing import Any, Callable

import pytest

import sniroute_routes
import sniroute_targets
import sniroute_wire
from sniroute_refusals import Refused
from sniroute_routes import Layer, Route, Routes, expand, parse_route
from conftest import HOST, wait_until
from testbed.hellos import (ASK_TLS, HELLO, INET, LOCAL, LONGEST, ROUTED_HEADER, Bad, genuine, v1, v2,
                            verdict)
from testbed.running import Running, alert, read_all, read_exactly


# -- routes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("template, expected", [
    ("cft-{name}", "cft-db.eu.example.com"), ("{label}.internal:5432", "db.internal:5432"),
    ("{domain}", "eu.example.com"),
    ("{label}-{label}.{domain}", "db-db.eu.example.com"), ("fixed", "fixed"),
])
def test_a_template_is_filled_in(template, expected):
    assert expand(template, "db.eu.example.com") == expected


@pytest.mark.parametrize("text, pattern, target", [
    ("db.example.com=tcp:10.0.0.1:5432", "db.example.com", "tcp:10.0.0.1:5432"),
    ("DB.Example.COM=cloudflared:Host.Example.com", "db.example.com", "cloudflared:Host.Example.com"),
    ("*.example.com=cloudflared:cft-{name}", "*.example.com", "cloudflared:cft-{name}"),
    ("**.Example.com=tcp:{label}:1", "**.example.com", "tcp:{label}:1"),
    ("*=tcp:{name}:443", "*", "tcp:{name}:443"), ("a.b=tcp:[::1]:443", "a.b", "tcp:[::1]:443"),
])
def test_a_route_is_read(text, pattern, target):
    route = parse_route(text)
    assert route == Route(pattern, target) and str(route) == f"{pattern}={target}"


@pytest.mark.parametrize("text, complaint", [
    ("db.example.com", "not PATTERN=SCHEME:REST"), ("db.example.com=here", "not PATTERN=SCHEME:REST"),
    ("", "not PATTERN"),
    ("=tcp:h:1", "two labels"), ("localhost=tcp:h:1", "two labels"), ("*.com=tcp:h:1", "two labels"),
    ("***.example.com=tcp:h:1", "two labels"), ("a.*.example.com=tcp:h:1", "two labels"),
    ("*a.example.com=tcp:h:1", "two labels"),
    ("**=tcp:h:1", "two labels"), ("a.b.=tcp:h:1", "two labels"), ("10.0.0.1=tcp:h:1", "two labels"),
    ("a.b=http:h:1", "cloudflared, tcp"), ("a.b=tcp:{host}:1", "{name}, {label}, {domain}"),
    ("a.b=tcp:{name:1", "field"),
    ("a.b=tcp:name}:1", "field"), ("a.b=tcp:{}:1", "field"), ("a.b=tcp:h", "HOST:PORT"), ("a.b=tcp:h:0", "HOST:PORT"),
    ("a.b=tcp:h:65536", "HOST:PORT"), ("a.b=tcp:h h:1", "HOST:PORT"), ("a.b=cloudflared:", "host name"),
    ("a.b=cloudflared:--url", "host name"), ("a.b=cloudflared:{label}", "host name"),
    ("\udcff.b=tcp:h:1", "can't encode"),
])
def test_a_route_that_cannot_work_is_refused_at_the_start(text, complaint):
    with pytest.raises(ValueError) as caught:
        parse_route(text)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


ROUTES = Routes([parse_route(f"{pattern}=tcp:h{number}:1") for number, pattern in enumerate(
    ["db.example.com", "*.example.com", "**.example.com", "**.eu.example.com", "*.eu.example.com",
     "other.example.org"])])
EVERY = Routes([parse_route("*=tcp:{name}:1"), parse_route("a.b=tcp:h:1")])


@pytest.mark.parametrize("routes, name, pattern", [
    (ROUTES, "db.example.com", "db.example.com"), (ROUTES, "x.example.com", "*.example.com"),
    (ROUTES, "x.y.example.com", "**.example.com"), (ROUTES, "x.y.z.example.com", "**.example.com"),
    (ROUTES, "eu.example.com", "*.example.com"), (ROUTES, "x.eu.example.com", "*.eu.example.com"),
    (ROUTES, "x.y.eu.example.com", "**.eu.example.com"), (ROUTES, "example.com", None),
    (ROUTES, "xexample.com", None),
    (ROUTES, "example.org", None), (ROUTES, "x.other.example.org", None), (EVERY, "a.b", "a.b"), (EVERY, "c.d", "*"),
])
def test_the_most_exact_route_is_taken(routes, name, pattern):
    found = routes.find(name)
    assert (found and found[0].pattern) == pattern


def test_a_name_without_a_route_is_refused():
    with pytest.raises(Refused) as caught:
        ROUTES.decide("example.net")
    assert (caught.value.kind, caught.value.alert) == ("no_route", 112)


def test_a_decision_is_made_once_and_names_its_target():
    routes = Routes([parse_route("**.example.com=cloudflared:CFT-{label}.{domain}")])
    decision = routes.decide("db.eu.example.com")
    assert decision.target == "cloudflared:cft-db.eu.example.com" and decision.rest == "cft-db.eu.example.com"
    assert decision.scheme is sniroute_targets.SCHEMES["cloudflared"] and decision.route is routes.routes[0]
    assert routes.decide("db.eu.example.com") is decision


def test_decisions_are_remembered_for_a_limited_number_of_names(monkeypatch):
    monkeypatch.setattr(sniroute_routes, "DECISIONS_MAX", 3)
    routes = Routes([parse_route("*=tcp:h:1")])
    for number in range(10):
        routes.decide(f"n{number}.example.com")
        assert len(routes.decisions) <= 3


def test_decisions_are_remembered_for_all_names_that_have_a_route_of_their_own(monkeypatch):
    monkeypatch.setattr(sniroute_routes, "DECISIONS_MAX", 3)
    names = [f"n{number}.example.com" for number in range(10)]
    routes = Routes([parse_route(f"{name}=tcp:h:1") for name in names])
    decisions = [routes.decide(name) for name in names]
    assert all(routes.decide(name) is decision for name, decision in zip(names, decisions, strict=True))


def test_a_name_that_makes_its_target_too_long_is_refused():
    routes = Routes([parse_route("*=cloudflared:cft-{name}")])
    assert verdict(routes.decide, LONGEST) == Bad("bad_name", 112)
    assert not routes.decisions


def test_a_pattern_is_routed_once():
    with pytest.raises(ValueError, match="a.b is routed twice"):
        Routes([parse_route("c.d=tcp:h:1"), parse_route("a.b=tcp:h:1"), parse_route("A.B=tcp:h:2")])


# -- layers ------------------------------------------------------------------------------------


def to(pattern: str, port: int) -> Route:
    """A route to this port of a host."""
    return parse_route(f"{pattern}=tcp:h:{port}")


def leads(routes: Routes, name: str) -> int:
    """The port that a name leads to; 0 for none."""
    try:
        return int(routes.decide(name).rest.partition(":")[2])
    except Refused as error:
        assert error.kind == "no_route"
        return 0


def test_layers_are_asked_in_order_and_the_configured_one_first():
    routes = Routes([to("*.example.com", 1), to("a.example.org", 2)])
    second, third = Layer([to("a.example.com", 3), to("*.example.org", 4)]), Layer([to("*", 5)])
    routes.add_layer(second)
    routes.add_layer(third)
    names = ["a.example.com", "a.example.org", "b.example.org", "example.net"]
    assert [leads(routes, name) for name in names] == [1, 2, 4, 5], "a wildcard of the first goes before a name behind"
    assert routes.layers == [routes.configured, second, third]
    assert routes.find("b.example.org") == (second.patterns["*.example.org"], second.tallies["*.example.org"])
    assert list(routes.tallies) == ["*.example.com", "a.example.org"], "what is told of routes is about the configured"


@pytest.mark.parametrize("pattern", ["a.b.c.d", "*.b.c.d", "**.c.d", "*"])
def test_a_route_that_is_put_or_dropped_counts_from_the_next_decision_on(pattern):
    routes = Routes([to("other.example.com", 9)])
    layer = Layer()
    routes.add_layer(layer)
    assert leads(routes, "a.b.c.d") == 0
    for port in (1, 2, 3):  # 1 is new, the others replace it
        layer.put(to(pattern, port))
        assert leads(routes, "a.b.c.d") == leads(routes, "a.b.c.d") == port
        assert leads(routes, "other.example.com") == 9
    layer.drop(pattern)
    assert leads(routes, "a.b.c.d") == 0
    with pytest.raises(KeyError):
        layer.drop(pattern)


def test_a_decision_that_is_made_while_a_layer_changes_is_not_kept(monkeypatch):
    """An admin's thread decides, and the loop puts a route at that instant."""
    routes = Routes([])
    layer = Layer([to("a.b.c.d", 1)])
    routes.add_layer(layer)
    real = Route.decide
    def late(route: Route, *rest: Any) -> Any:
        layer.put(to("a.b.c.d", 2))
        return real(route, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(Route, "decide", late)
        assert routes.decide("a.b.c.d").target == to("a.b.c.d", 1).target
    assert routes.decide("a.b.c.d").target == to("a.b.c.d", 2).target


def test_a_route_that_is_dropped_uncovers_those_behind_it():
    routes = Routes([to("a.b.c.d", 1)])
    layer = Layer([to("*.b.c.d", 2), to("**.c.d", 3)])
    last = Layer([to("a.b.c.d", 4)])
    routes.add_layer(layer)
    routes.add_layer(last)
    for drop, port in ((None, 1), ((routes.configured, "a.b.c.d"), 2), ((layer, "*.b.c.d"), 3), ((layer, "**.c.d"), 4),
                       ((last, "a.b.c.d"), 0)):
        if drop is not None:
            drop[0].drop(drop[1])
        assert leads(routes, "a.b.c.d") == port


def test_a_name_that_gets_a_route_leaves_what_was_decided_for_others():
    """A registry may put thousands of names a minute."""
    routes = Routes([to("*", 1)])
    layer = Layer()
    routes.add_layer(layer)
    kept, changed = routes.decide("a.example.com"), routes.decide("b.example.com")
    routes.configured.put(to("b.example.com", 2))
    assert routes.decide("a.example.com") is kept and routes.decide("b.example.com") is not changed
    layer.put(to("*.example.net", 3))
    assert routes.decide("a.example.com") == kept is not routes.decide("a.example.com")


class Unwalked(dict):
    """A dict that must not be walked through."""

    def __iter__(self, *_: Any) -> Any:
        raise AssertionError("walked through")

    keys = values = items = copy = __iter__


def test_a_change_of_a_layer_takes_as_long_with_many_routes_as_with_few():
    routes = Routes([to("x.y", 1)])
    layer = Layer(to(f"n{number}.example.com", 1) for number in range(1000))
    routes.add_layer(layer)
    for number in range(1000):
        routes.decide(f"n{number}.example.com")
    layer.patterns, layer.tallies = Unwalked(layer.patterns), Unwalked(layer.tallies)
    routes.decisions = Unwalked(routes.decisions)
    layer.put(to("n7.example.com", 2))
    layer.put(to("new.example.com", 3))
    layer.drop("n8.example.com")
    assert [leads(routes, f"{name}.example.com") for name in ("n6", "n7", "n8", "new")] == [1, 2, 0, 3]


def test_the_tally_of_a_route_that_is_dropped_stays_while_it_has_connections():
    layer = Layer([to("a.b", 1), to("c.d", 1)])
    routes = Routes([])
    routes.add_layer(layer)
    busy, idle = routes.decide("a.b").tally, routes.decide("c.d").tally
    busy.active = busy.total = idle.total = 1
    layer.put(to("a.b", 2))
    assert routes.decide("a.b").tally is busy, "a route that is replaced goes on counting"
    layer.drop("a.b")
    layer.drop("c.d")
    layer.put(to("a.b", 3))
    layer.put(to("c.d", 3))
    assert routes.decide("a.b").tally is busy, "its connections are still there"
    assert routes.decide("c.d").tally is not idle and layer.tallies["c.d"].total == 0
    layer.drop("a.b")
    assert list(layer.leaving) == ["a.b"] and "a.b" not in layer.tallies
    del busy
    assert not layer.leaving, "nothing is left of it once its last connection is gone"


def test_routes_that_succeed_others_keep_their_counts_and_their_other_layers():
    former = Routes([to("kept.b", 1), to("gone.b", 1), to("busy.b", 1)])
    layer = Layer([to("*", 2)])
    former.add_layer(layer)
    tallies = {label: former.decide(f"{label}.b").tally for label in ("kept", "gone", "busy")}
    tallies["busy"].active = 1
    other = former.decide("x.y").tally
    routes = Routes([to("kept.b", 3), to("new.b", 3)])
    routes.succeed(former)
    assert routes.decide("kept.b").tally is tallies["kept"] and leads(routes, "kept.b") == 3
    assert set(routes.tallies) == {"kept.b", "new.b", "busy.b"} and routes.tallies["busy.b"] is tallies["busy"]
    assert routes.layers == [routes.configured, layer] and routes.decide("x.y").tally is other
    assert leads(routes, "busy.b") == 2, "it has a tally, and no route of its own"
    layer.drop("*")
    assert leads(routes, "x.y") == 0, "the layer tells these routes now"


# -- what a route may ask for ------------------------------------------------------------------


@pytest.fixture
def run_file(run, settings_file) -> Callable[..., Running]:
    """run_file(address, *options): a router with one route, db.example.com to that address, with options in TOML."""
    return lambda address, *options, **more: run("-c", settings_file(
        f'[routes."db.example.com"]\ntarget = "tcp:{address[0]}:{address[1]}"\n' + "\n".join(options)), **more)


@pytest.mark.parametrize("how, said, expected", [
    ("as-received", b"", lambda own: b""),
    ("as-received", ROUTED_HEADER, lambda own: ROUTED_HEADER),
    ("none", ROUTED_HEADER, lambda own: b""),
    ("none", b"", lambda own: b""),
    ("v1", b"", lambda own: sniroute_wire.proxy_v1(*own)),
    ("v2", b"", lambda own: sniroute_wire.proxy_v2(*own)),
    ("v1", LOCAL, lambda own: b"PROXY UNKNOWN\r\n"),
    ("v2", v1("UNKNOWN"), lambda own: v2(0x20, 0x00)),
    ("v2", ROUTED_HEADER, lambda own: sniroute_wire.proxy_v2(("192.0.2.1", 1111), ("192.0.2.9", 443))),
    ("v1", v2(0x21, 0x11, INET), lambda own: v1("TCP4 192.0.2.1 192.0.2.2 1111 443")),
])
def test_a_route_says_what_its_backend_hears_of_the_client(run_file, echo_server, how, said, expected):
    running = run_file(echo_server.address, f'send_proxy = "{how}"')
    with running.connect(said + HELLO) as client:
        header = expected((client.getsockname(), client.getpeername()))
        assert read_exactly(client, len(header + HELLO)) == header + HELLO


def test_a_header_of_ours_goes_before_the_question_for_tls(run_file, serve):
    header = sniroute_wire.proxy_v2(("192.0.2.1", 1111), ("192.0.2.9", 443))

    def backend(sock: socket.socket) -> list[bytes]:
        asked = read_exactly(sock, len(header + ASK_TLS))
        sock.sendall(b"S")
        spoken = read_exactly(sock, len(HELLO))
        sock.sendall(b"x")
        return [asked, spoken]

    far = serve(backend)
    running = run_file(far.address, 'send_proxy = "v2"')
    with running.connect(ROUTED_HEADER + ASK_TLS) as client:
        assert client.recv(1) == b"S"
        client.sendall(HELLO)
        assert client.recv(1) == b"x"
    assert far.result() == [header + ASK_TLS, HELLO]


@pytest.mark.parametrize("source, allowed", [
    ("192.0.2.1", True), ("198.51.100.7", True), ("198.51.100.8", False), ("2001:db8::5", True), ("2001:db9::5", False),
    ("::ffff:192.0.2.1", True), ("::ffff:203.0.113.1", False),
])
def test_a_route_may_be_for_some_clients_only(run_file, echo_server, source, allowed):
    running = run_file(echo_server.address, 'allow = ["192.0.2.0/24", "198.51.100.7", "2001:db8::/32"]')
    family = "TCP6" if ":" in source else "TCP4"
    other = "::1" if ":" in source else "192.0.2.9"
    header = v1(f"{family} {source} {other} 1 2")
    with running.connect(header + HELLO) as client:
        if allowed:
            assert read_exactly(client, len(header + HELLO)) == header + HELLO
        else:
            assert read_all(client) == alert(49)
    assert running.ending().reason == ("client_closed" if allowed else "not_allowed")
    assert running.ending().route == "db.example.com" and echo_server.accepted == allowed


def test_a_route_has_as_many_connections_as_it_may_have(run_file, echo_server):
    running = run_file(echo_server.address, "max_connections = 2")
    tally = running.router.routes.tallies["db.example.com"]
    with running.connect(HELLO) as one, running.connect(HELLO) as two:
        for client in (one, two):
            assert read_exactly(client, len(HELLO)) == HELLO
        with running.connect(HELLO) as third:
            assert read_all(third) == alert(80)
        assert running.ending().reason == "route_limit" and tally.active == 2
    running.ending(3)
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    running.ending(4)
    assert (tally.active, tally.total, tally.refused) == (0, 4, 1)
    assert tally.up == tally.down == 3 * len(HELLO)


def test_who_is_not_allowed_takes_no_place_on_the_route(run_file, echo_server):
    running = run_file(echo_server.address, 'allow = ["192.0.2.1"]', "max_connections = 1")
    tally = running.router.routes.tallies["db.example.com"]
    with running.connect(HELLO) as stranger:  # it does not close: its connection lingers
        wait_until(lambda: running.counter("accepted") == 1 and any(
            c.state == "lingering" for c in list(running.router.connections)))
        assert tally.active == 0
        with running.connect(ROUTED_HEADER + HELLO) as client:
            assert read_exactly(client, len(ROUTED_HEADER + HELLO)) == ROUTED_HEADER + HELLO
            assert tally.active == 1
        assert read_all(stranger) == alert(49)
    running.ending(2)
    assert (tally.active, tally.total, tally.refused) == (0, 2, 1)


def test_a_route_has_an_idle_time_of_its_own(run_file, echo_server):
    running = run_file(echo_server.address, 'connection_idle = "400ms"', "[routes.\"x.example.com\"]",
                       f'target = "tcp:{HOST}:{echo_server.address[1]}"')
    other = genuine(name="x.example.com")
    with running.connect(HELLO) as short, running.connect(other) as long:
        assert read_exactly(short, len(HELLO)) == HELLO
        assert read_exactly(long, len(other)) == other
        assert running.ending().reason == "idle" and running.ending().name == "db.example.com"
        long.sendall(b"still")
        assert long.recv(9)
