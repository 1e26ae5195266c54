"""Tests of sniroute_routes.py: routes, targets and backends.

The first half asks the module itself.  The second half asks a router in a thread (`run` of testbed/running.py):
where a client's bytes go, and what a route allows.
"""

from __future__ import annotations

import errno
import socket
import time
import types
from typing import Any, Callable

import pytest

import sniroute_connection
import sniroute_refusals
import sniroute_routes
import sniroute_settings
import sniroute_wire
from sniroute_launchers import Reason
from sniroute_refusals import Refused
from sniroute_routes import (Backend, Layer, Retry, Route, Routes, Targets, TcpBackend, TunnelBackend, Unreachable,
                             check_tcp, check_tunnel, expand, parse_route)
from conftest import HOST, Address, wait_until
from testbed.hellos import (ASK_TLS, HELLO, INET, LOCAL, LONGEST, ROUTED_HEADER, Bad, genuine, v1, v2,
                            verdict)
from testbed.running import Running, alert, answer, read_all, read_exactly, route


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
    assert decision.scheme is sniroute_routes.SCHEMES["cloudflared"] and decision.route is routes.routes[0]
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


# -- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("check, rest, good", [
    (check_tcp, "h:1", True), (check_tcp, "[::1]:1", True), (check_tcp, "h:0", False), (check_tcp, "h", False),
    (check_tcp, "a/b:1", False), (check_tcp, "h\n:1", False), (check_tcp, "[fe80::1%eth0]:1", False),
    (check_tunnel, "db.example.com", True), (check_tunnel, "--url.x", False),
    (check_tunnel, "localhost", False),
])
def test_a_target_is_checked(check, rest, good):
    assert verdict(check, rest) == (rest if good else Bad("bad_name", 112))


def resolve(monkeypatch: pytest.MonkeyPatch, target: str, found: list[str] | OSError, targets: Targets,
            allowed: Callable[[tuple], bool] = lambda address: True) -> Any:
    """Prepare a tcp target while the resolver answers `found`."""
    def answer(host: str, port: int, **_: Any) -> list[tuple]:
        if isinstance(found, OSError):
            raise found
        return [(socket.AF_INET6 if ":" in text else socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, port))
                for text in found]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    targets.may_dial = lambda decision, address: allowed(address)
    decision = Routes([Route("a.b", target)]).decide("a.b")
    sniroute_routes.tcp_prepare(targets, types.SimpleNamespace(decision=decision))
    return sniroute_routes.tcp_ready(targets, decision)


def addresses(backend: sniroute_routes.Backend) -> list[tuple]:
    """Those that it would try, in order."""
    return list(backend.addresses)


def test_a_host_is_resolved_once_and_stays_while_the_resolver_is_down(monkeypatch):
    targets = Targets(None)
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, "tcp:h:1", OSError("down"), targets)
    assert (caught.value.kind, caught.value.alert) == ("unresolved", 80)
    backend = resolve(monkeypatch, "tcp:h:1", ["192.0.2.1", "192.0.2.1", "2001:db8::1"], targets)
    assert not backend.local
    for known in (backend, resolve(monkeypatch, "tcp:h:1", OSError("down"), targets)):
        assert addresses(known) == [(socket.AF_INET, ("192.0.2.1", 1)), (socket.AF_INET6, ("2001:db8::1", 1))]
    now = time.monotonic()
    monkeypatch.setattr(sniroute_routes, "monotonic", lambda: now + sniroute_routes.RESOLVED_FOR + 1)
    assert sniroute_routes.tcp_ready(targets, Routes([Route("a.b", "tcp:h:1")]).decide("a.b")) is None, "its time is over"
    assert sniroute_routes.tcp_ready(targets, Routes([Route("a.b", "tcp:other:1")]).decide("a.b")) is None


@pytest.mark.parametrize("target, family, address, local", [
    ("tcp:127.0.0.1:1", socket.AF_INET, ("127.0.0.1", 1), True),
    ("tcp:192.0.2.1:2", socket.AF_INET, ("192.0.2.1", 2), False),
    ("tcp:[::1]:3", socket.AF_INET6, ("::1", 3, 0, 0), True),
], ids=["loopback", "elsewhere", "v6"])
def test_an_address_is_never_resolved(target, family, address, local):
    targets = Targets(None)
    decision = Routes([Route("a.b", target)]).decide("a.b")
    for _ in range(2):
        backend = sniroute_routes.tcp_ready(targets, decision)
        assert (addresses(backend), backend.local) == ([(family, address)], local)
    assert list(targets.resolved) == [decision.key]


def test_an_address_that_the_route_does_not_lead_to_is_not_ready_and_never_will_be(monkeypatch):
    targets = Targets(None)
    targets.own = [("127.0.0.1", 19000)]
    decision = Routes([Route("a.b", "tcp:127.0.0.1:19000")]).decide("a.b")
    with pytest.raises(Refused) as caught:
        sniroute_routes.tcp_ready(targets, decision)
    assert caught.value.kind == "forbidden", "at once: no thread is needed to say so"
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, decision.target, ["127.0.0.1"], targets, lambda address: False)
    assert caught.value.kind == "forbidden" and not targets.resolved


def test_only_addresses_that_the_route_leads_to_are_dialled(monkeypatch):
    targets = Targets(None)
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, "tcp:h:1", ["10.0.0.1"], targets, lambda address: False)
    assert (caught.value.kind, caught.value.alert) == ("forbidden", 112)
    backend = resolve(monkeypatch, "tcp:h:1", ["10.0.0.1", "192.0.2.1"], targets,
                      lambda address: address[0] != "10.0.0.1")
    assert [address[0] for _, address in addresses(backend)] == ["192.0.2.1"]


def test_resolved_hosts_and_their_addresses_are_limited(monkeypatch):
    monkeypatch.setattr(sniroute_routes, "RESOLVED_MAX", 2)
    targets = Targets(None)
    for number in range(5):
        backend = resolve(monkeypatch, f"tcp:h{number}:1", [f"192.0.2.{n}" for n in range(1, 9)], targets)
        assert len(addresses(backend)) == sniroute_routes.ADDRESSES_MAX and len(targets.resolved) <= 2
    targets.make_room(3)
    for number in range(6):
        resolve(monkeypatch, f"tcp:h{number}:1", ["192.0.2.1"], targets)
    assert len(targets.resolved) == 6, "there is room for those of all routes"


# -- backends ----------------------------------------------------------------------------------


def test_a_backend_goes_on_to_the_next_address_where_one_refuses_at_once(echo_server):
    """No such family here, and an address to which nothing may be sent; then the echo."""
    nobody = socket.AF_INET, ("255.255.255.255", 1)
    backend = Backend("tcp:h:1", [(9999, ("", 0)), nobody, (socket.AF_INET, echo_server.address)], True)
    server = backend.open()
    try:
        assert server.gettimeout() == 0.0, "it never blocks"
        server.settimeout(10)
        assert server.getpeername() == echo_server.address
        with pytest.raises(Unreachable, match="what became of the last one"):
            backend.open("what became of the last one")
    finally:
        server.close()


def test_a_socket_never_blocks_where_it_cannot_be_born_so(echo_server, monkeypatch):
    """macOS has no SOCK_NONBLOCK."""
    monkeypatch.setattr(sniroute_routes, "STREAM", socket.SOCK_STREAM)
    server = Backend("tcp:h:1", [(socket.AF_INET, echo_server.address)], False).open()
    try:
        assert server.gettimeout() == 0.0
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), "it is not on loopback, as far as is known"
    finally:
        server.close()


def test_a_backend_without_an_address_says_so():
    with pytest.raises(Unreachable, match="No route to host"):
        Backend("tcp:h:1", [], True).open()


def test_addresses_that_cannot_be_reached_are_forgotten():
    """Perhaps the host has moved: the next client has it resolved again."""
    targets = Targets(None)
    decision = Routes([Route("a.b", "tcp:192.0.2.1:1")]).decide("a.b")
    found = targets.remember(decision, sniroute_routes.Resolved((), True, sniroute_routes.NEVER))
    for _ in range(2):  # two clients had the same
        with pytest.raises(Unreachable):
            TcpBackend(targets, decision.key, decision.target, found).open()
        assert not targets.resolved


@pytest.mark.parametrize("last", [False, True])
def test_a_backend_of_addresses_is_not_tried_again(last):
    verdict = Backend("tcp:h:1", [], True).failed("Connection refused", None, last)
    assert (verdict.kind, str(verdict)) == ("backend", "tcp:h:1: Connection refused")


class Lessor:
    """A table of tunnels, as a backend sees it."""

    def __init__(self, *reasons: Reason):
        self.reasons = list(reasons)  # what the program has said each time it is asked
        self.asked: list[tuple[float, int]] = []
        self.given_back: list[tuple[Any, float | None]] = []

    def words(self, child: Any, since: float, port: int) -> Reason:
        self.asked.append((since, port))
        return self.reasons.pop(0)

    def release(self, tunnel: Any, idle: float | None) -> None:
        self.given_back.append((tunnel, idle))


def leased(lessor: Lessor, address: Address = (HOST, 1), names_clients: bool = False) -> TunnelBackend:
    """A backend with a lease."""
    child = types.SimpleNamespace(alive=lambda: True, address=address, names_clients=names_clients, proven=False)
    return TunnelBackend(lessor, "carrier:t.example.com", 7.0, types.SimpleNamespace(child=child), child)


SILENT, SAID, FINAL = Reason(), Reason("denied", "Access denied it"), Reason("unknown", "no such name", True)
WAIT, AGAIN, DOUBT = "wait for its words", "try again", "try again, once the process was looked at"


@pytest.mark.parametrize("names_clients, last, reasons, verdicts", [
    (False, False, [SILENT], [DOUBT]),
    (False, False, [SAID], [DOUBT]),  # it does not say for whom: it may have been another client
    (False, True, [SAID], [("tunnel_denied", "Access denied it")]),
    (False, True, [SILENT, SILENT], [WAIT, ("tunnel_failed", "why")]),
    (False, True, [SILENT, SAID], [WAIT, ("tunnel_denied", "Access denied it")]),
    (True, False, [SAID], [AGAIN]),
    (True, False, [SILENT, SAID], [WAIT, AGAIN]),
    (True, False, [SILENT, SILENT], [WAIT, DOUBT]),
    (True, False, [FINAL], [("tunnel_unknown", "no such name")]),
    (True, False, [SILENT, FINAL], [WAIT, ("tunnel_unknown", "no such name")]),
    (True, True, [SILENT, SILENT], [WAIT, ("tunnel_failed", "why")]),
])
def test_a_tunnel_that_failed_is_asked_for_its_words_at_most_twice(names_clients, last, reasons, verdicts, echo_server):
    lessor = Lessor(*reasons)
    backend = leased(lessor, echo_server.address, names_clients)
    server = backend.open()
    try:
        port = server.getsockname()[1]
        found = []
        for why, sock in (("why", server), ("", None))[:len(verdicts)]:
            verdict = backend.failed(why, sock, last)
            if isinstance(verdict, Retry):
                assert verdict.doubted in (None, backend.child)
                found.append(AGAIN if verdict.doubted is None else DOUBT)
            else:
                assert verdict is None or str(verdict).startswith("carrier:t.example.com: ")
                found.append(WAIT if verdict is None else (verdict.kind, str(verdict).partition(": ")[2]))
            backend.release()  # as a connection does: the lease is not needed for the words
    finally:
        server.close()
    assert found == verdicts and not lessor.reasons
    assert lessor.asked == [(backend.dialled, port)] * len(verdicts), "the port it was dialled from is remembered"
    assert lessor.given_back == [(backend.tunnel, 7.0)], "one lease, once"


def test_a_tunnel_that_could_not_be_dialled_has_no_port():
    lessor = Lessor(SAID)
    assert leased(lessor).failed("Connection refused", None, True).kind == "tunnel_denied"
    closed = socket.socket()
    closed.close()
    lessor.reasons.append(SAID)
    assert leased(lessor).failed("Connection reset by peer", closed, True).kind == "tunnel_denied"
    assert lessor.asked == [(0.0, 0), (0.0, 0)]


def test_a_tunnel_that_answered_is_proven():
    backend = leased(Lessor())
    assert not backend.proven_by_connect and not backend.child.proven
    backend.answered()
    assert backend.child.proven


def test_a_tunnel_whose_process_has_ended_is_not_the_one_that_was_meant(echo_server):
    for alive, is_its_child in ((False, True), (True, False)):
        backend = leased(Lessor(), echo_server.address)
        backend.child.alive = lambda alive=alive: alive
        if not is_its_child:
            backend.tunnel.child = None  # the reaper took it away
        server = backend.open()
        try:
            server.setblocking(True)
            with pytest.raises(Unreachable, match="its process ended"):
                backend.connected(server)
        finally:
            server.close()


@pytest.mark.parametrize("kind", [TunnelBackend, Backend])
def test_only_a_tunnel_learns_by_a_reset_that_its_client_has_left(kind, serve):
    """It may still dial for it."""
    def far(sock: socket.socket) -> str:
        sock.settimeout(10)
        return repr(sock.recv(1))

    listening = serve(far)
    backend = leased(Lessor(), listening.address) if kind is TunnelBackend else Backend(
        "tcp:h:1", [(socket.AF_INET, listening.address)], True)
    server = backend.open()
    backend.abandon(server)
    server.close()
    heard = listening.result()
    assert isinstance(heard, ConnectionResetError) if kind is TunnelBackend else heard == "b''"
    backend.abandon(server)  # closed already: nothing to say


def test_a_tunnel_that_is_taken_away_in_the_instant_of_its_lease_is_given_back():
    """The reaper sets its state next; until then a client waits."""
    tunnel = types.SimpleNamespace(child=None)
    given_back = []
    targets = Targets(types.SimpleNamespace(lease=lambda key: tunnel, release=given_back.append))
    assert sniroute_routes.tunnel_ready(targets, Routes([parse_route("*=carrier:{name}")]).decide("a.b.c")) is None
    assert given_back == [tunnel]


def test_tunnels_backend_tells_a_connect_that_is_not_over_from_one_that_failed(deaf, free_ports):
    def backend(address: Address) -> sniroute_routes.Backend:
        child = types.SimpleNamespace(alive=lambda: True, address=address)
        return sniroute_routes.TunnelBackend(None, "", None, types.SimpleNamespace(child=child), child)
    with socket.socket() as server:
        server.setblocking(False)
        assert server.connect_ex(deaf) == errno.EINPROGRESS
        with pytest.raises(BlockingIOError):
            backend(deaf).connected(server)
    nobody = HOST, free_ports(1)[0]
    with socket.socket() as server:
        server.setblocking(False)
        server.connect_ex(nobody)
        with pytest.raises(ConnectionRefusedError):
            backend(nobody).connected(server)


# -- tcp targets -------------------------------------------------------------------------------


def test_host_name_is_resolved_once_and_kept(run, serve, monkeypatch):
    far = serve(answer(b"x"))
    asked = []
    real = socket.getaddrinfo
    def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        return real(host, *args, **kwargs)
    running = run(f"--route=db.example.com=tcp:localhost:{far.address[1]}")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for _ in range(3):
        with running.connect(HELLO) as client:
            assert client.recv(1) == b"x"
    assert asked.count("localhost") == 1


def test_host_that_does_not_resolve_is_refused_with_its_reason(run):
    running = run("--route=db.example.com=tcp:nothing.invalid:1")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "unresolved"
    assert "nothing.invalid" in running.ending().detail


def test_resolver_that_is_down_for_a_moment_cuts_nobody(run, serve, monkeypatch):
    far = serve(answer(b"x"))
    monkeypatch.setattr(sniroute_routes, "RESOLVED_FOR", 0.0)
    running = run(f"--route=db.example.com=tcp:localhost:{far.address[1]}")
    monkeypatch.setattr(sniroute_connection, "PARKS_MAX", 10**9)
    monkeypatch.setattr(sniroute_routes, "RESOLVED_FOR", 0.2)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    wait_until(lambda: all(found.until < time.monotonic() for found in running.router.targets.resolved.values()))
    def broken(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", broken)
        with socket.socket() as client:  # create_connection would resolve
            client.settimeout(20)
            client.connect(running.address)
            client.sendall(HELLO)
            assert client.recv(1) == b"x"


@pytest.mark.parametrize("pattern, target, address, allowed", [
    ("*", "tcp:{name}:443", ("10.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("127.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("fd00::1", 443), False),
    ("*", "tcp:{name}:443", ("8.8.8.8", 443), True),
    ("*", "tcp:10.0.0.1:443", ("10.0.0.1", 443), True),
    ("*.example.com", "tcp:{name}:443", ("10.0.0.1", 443), True),
    ("*.example.com", "tcp:{label}:443", ("10.0.0.1", 443), False),
    ("*.example.com", "tcp:{label}.internal.example.net:443", ("10.0.0.1", 443), True),
])
def test_stranger_cannot_point_a_name_at_the_private_network(run, pattern, target, address, allowed):
    running = run(f"--route={pattern}={target}")
    decision = running.router.routes.decide("a.example.com")
    assert running.router.targets.may_dial(decision, address) is allowed


@pytest.mark.parametrize("label", ["2130706433", "0x7f000001", "017700000001", "0"])
def test_number_is_no_host(run, label):
    """A resolver takes it for an address."""
    running = run("--route=*.example.com=tcp:{label}:443")
    with running.connect(genuine(name=f"{label}.example.com")) as client:
        assert read_all(client) == alert(112)
    assert running.ending().reason == "bad_name"


def test_router_that_listens_everywhere_knows_its_addresses(run):
    running = run("--route=db.example.com=tcp:localhost:1")
    decision = running.router.routes.decide("db.example.com")
    running.router.targets.own = [("::", 19000)]
    for address in ("127.0.0.1", "127.0.0.2", "::1", "0.0.0.0", "::ffff:127.0.0.1", "::"):
        assert not running.router.targets.may_dial(decision, (address, 19000)), address
    assert running.router.targets.may_dial(decision, ("127.0.0.1", 19001))
    assert running.router.targets.may_dial(decision, ("192.0.2.1", 19000))


def test_router_does_not_dial_itself(run):
    running = run("--route=db.example.com=tcp:localhost:1")
    decision = running.router.routes.decide("db.example.com")
    assert not running.router.targets.may_dial(decision, running.address)
    assert running.router.targets.may_dial(decision, (HOST, 1))
    with pytest.raises(sniroute_refusals.SettingsError, match="leads back"):
        sniroute_settings.load_settings(["--listen=127.0.0.1:19999", "--route=a.example.com=tcp:127.0.0.1:19999"], {})


def test_forbidden_address_is_refused(run, monkeypatch):
    running = run("--route=*=tcp:{name}:443")
    private = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", 443))]
    with running.connect() as client:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: private)
        client.sendall(HELLO)
        assert read_all(client) == alert(112)
    assert running.ending().reason == "forbidden"


def test_an_address_that_leads_nowhere_is_refused_at_once(run):
    """By `ready`, in the loop: no thread is needed to say so."""
    running = run("--route=db.example.com=tcp:127.0.0.1:1")
    running.router.targets.own.append(("127.0.0.1", 1))
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(112)
    assert running.ending().reason == "forbidden" and not running.router.waits.threads
    assert "127.0.0.1 is 127.0.0.1, which this route does not lead to" in running.ending().detail
    assert running.router.routes.tallies["db.example.com"].active == 0


def test_own_name_needs_a_route_of_its_own(run, echo_server):
    running = run(route(echo_server.address, "*"), route(echo_server.address, "own.example.com"))
    running.router.own_names |= {"db.example.com", "own.example.com"}
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(112)
    own = genuine(name="own.example.com")
    with running.connect(own) as client:
        assert read_exactly(client, len(own)) == own


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
