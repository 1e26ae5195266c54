"""Tests of sniroute_routes.py: routes, and what they may ask for.

The first half asks the module itself.  The second half asks a router in a thread (`run` of testbed/running.py):
where a client's bytes go, and what a route allows.
"""

from __future__ import annotations

import ipaddress
import random
import re
import socket
import struct
from typing import Any, Callable

import pytest

import sniroute_routes
import sniroute_targets
import sniroute_wire
from sniroute_refusals import Refused
from sniroute_routes import Layer, Route, Routes, expand, parse_route
from sniroute_settings import load_settings
from conftest import HOST, wait_until
from testbed.hellos import (ASK_TLS, HELLO, INET, LOCAL, LONGEST, ROUTED_HEADER, Bad, genuine, tlv, v1, v2,
                            verdict)
from testbed.running import Running, alert, read_all, read_exactly


MAPPED = v2(0x21, 0x21, b"".join(ipaddress.IPv6Address(f"::ffff:{end}").packed for end in (
    "203.0.113.5", "198.51.100.1")) + struct.pack(">HH", 1000, 443))


# -- routes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("template, expected", [
    ("cft-{name}", "cft-db.eu.example.com"), ("{label}.internal:5432", "db.internal:5432"),
    ("{domain}", "eu.example.com"),
    ("{label}-{label}.{domain}", "db-db.eu.example.com"), ("fixed", "fixed"),
])
def test_a_template_is_filled_in(template, expected):
    assert expand(template, next(Route("**.example.com", "tcp:h:1").splits("db.eu.example.com"))) == expected


@pytest.mark.parametrize("text, pattern, target", [
    ("db.example.com=tcp:10.0.0.1:5432", "db.example.com", "tcp:10.0.0.1:5432"),
    ("DB.Example.COM=cloudflared:Host.Example.com", "db.example.com", "cloudflared:Host.Example.com"),
    ("*.example.com=cloudflared:cft-{name}", "*.example.com", "cloudflared:cft-{name}"),
    ("**.Example.com=tcp:{label}:1", "**.example.com", "tcp:{label}:1"),
    ("db.example.com.=tcp:db.internal.:1", "db.example.com", "tcp:db.internal.:1"),
    ("**.Example.com.=cloudflared:cft-{name}.", "**.example.com", "cloudflared:cft-{name}."),
    ("DB=tcp:db:5432", "db", "tcp:db:5432"), ("db.=tcp:{name}:5432", "db", "tcp:{name}:5432"),
    ("*=tcp:{name}:443", "*", "tcp:{name}:443"), ("a.b=tcp:[::1]:443", "a.b", "tcp:[::1]:443"),
    ("{service}--{port}.SVC.example.com.=tcp:{service}.internal:{port}", "{service}--{port}.svc.example.com",
     "tcp:{service}.internal:{port}"),
    ("{a}.example.com=tcp:[::1]:{a}", "{a}.example.com", "tcp:[::1]:{a}"),
    ("*.{env}.example.com=cloudflared:{label}-{env}.example.net", "*.{env}.example.com",
     "cloudflared:{label}-{env}.example.net"),
    ("*.port.example.com=tcp:10.0.0.1:{label}", "*.port.example.com", "tcp:10.0.0.1:{label}"),
])
def test_a_route_is_read(text, pattern, target):
    route = parse_route(text)
    assert route == Route(pattern, target) and str(route) == f"{pattern}={target}"


@pytest.mark.parametrize("text, complaint", [
    ("db.example.com", "not PATTERN=TARGET"), ("db.example.com=here", "not PATTERN=TARGET"),
    ("", "not PATTERN"),
    ("=tcp:h:1", "two labels"), ("*.com=tcp:h:1", "two labels"), ("*.com.=tcp:h:1", "two labels"),
    ("**.db=tcp:h:1", "two labels"), (".=tcp:h:1", "two labels"), ("123=tcp:h:1", "two labels"),
    ("***.example.com=tcp:h:1", "two labels"), ("a.*.example.com=tcp:h:1", "two labels"),
    ("*a.example.com=tcp:h:1", "two labels"),
    ("**=tcp:h:1", "two labels"), ("a.b..=tcp:h:1", "two labels"), ("10.0.0.1=tcp:h:1", "two labels"),
    ("a.b=http:h:1", "cloudflared, command, exec, jump, kubernetes, nodepass, tcp, unix"), ("a.b=tcp:{host}:1", "{name}, {label}, {domain}"),
    ("a.b=tcp:{name:1", "field"),
    ("a.b=tcp:name}:1", "field"), ("a.b=tcp:{}:1", "field"), ("a.b=tcp:h", "HOST:PORT"), ("a.b=tcp:h:0", "HOST:PORT"),
    ("a.b=tcp:h:65536", "HOST:PORT"), ("a.b=tcp:h h:1", "HOST:PORT"), ("a.b=cloudflared:", "host name"),
    ("a.b=cloudflared:--url", "host name"), ("a.b=cloudflared:{label}", "two labels"),
    ("db=cloudflared:{name}", "two labels"), ("db=carrier:cft-{name}.", "two labels"),
    ("db=carrier:{label}.{domain}", "two labels"), ("a.b=tcp:127.1.:1", "HOST:PORT"),
    ("{a}.b.c=tcp:{b}:1", "{name}, {label}, {domain}, {a}"), ("{a}{b}.c.d=tcp:h:1", "stands literal text"),
    ("{a}.b.c=cloudflared:{a}", "two labels"), ("{a}.b.c=cloudflared:-{a}.d.e", "not a host name"),
    ("{a}.b.c=tcp:h:{a}x", "HOST:PORT"), ("{a}.b.c=tcp:{a}.0.0.1:{a}", "HOST:PORT"), ("{a}.b.c=tcp:h:0{a}", "HOST:PORT"),
    ("a.b=tcp:h:{label}", "HOST:PORT"), ("{a}.b.c=http:{a}", "cloudflared, command, exec, jump, kubernetes, nodepass, tcp, unix"),
    ("\udcff.b=tcp:h:1", "is not a name"), ("fa\u00df.example=tcp:h:1", "is not a name"),
])
def test_a_route_that_cannot_work_is_refused_at_the_start(text, complaint):
    with pytest.raises(ValueError) as caught:
        parse_route(text)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text, written", [
    ("m\u00fcnchen.example=tcp:h:1", "xn--mnchen-3ya.example"),
    ("**.M\u00fcnchen.example=tcp:h:1", "**.xn--mnchen-3ya.example"), ("\u00fc=tcp:h:1", "xn--tda"),
    ("a.b=tcp:m\u00fcnchen.example:443", "tcp:xn--mnchen-3ya.example:443"),
    ("*.a.b=cloudflared:cft-{label}.m\u00fcnchen.example", "cloudflared:cft-{label}.xn--mnchen-3ya.example"),
    ("a.b=carrier:m\u00fcnchen.example", "carrier:xn--mnchen-3ya.example"),
])
def test_a_name_with_other_letters_is_told_its_form_for_dns(text, written):
    with pytest.raises(ValueError, match=re.escape(f"; write {written}, which")):
        parse_route(text)


@pytest.mark.parametrize("text, mine", [
    # The whole host is fixed, or the client chooses below a domain of mine.
    ("db.example.com=tcp:{name}:1", True), ("db=tcp:{label}:1", True), ("*=tcp:10.0.0.1:1", True),
    ("*=tcp:[fd00::1]:1", True), ("*=tcp:db:1", True), ("**.co.uk=tcp:db.internal:1", True),
    ("*.example.com=tcp:{name}:443", True), ("*.example.com=tcp:{name}.:443", True),
    ("**.example.com=tcp:{name}:443", True), ("*.example.com=tcp:cft-{name}:443", True),
    ("*.example.com=tcp:{label}.{domain}:443", True), ("**.example.com=tcp:{label}.{domain}:443", True),
    ("*.example.com=tcp:{domain}:443", True), ("**.example.com=tcp:{domain}:443", True),
    ("*.example.co.uk=tcp:{name}:443", True), ("*.mine.github.io=tcp:{name}:443", True),
    ("*=tcp:{label}.example.net:443", True), ("*=tcp:{domain}.example.net:443", True),
    ("**.example.org=tcp:{label}.internal:443", True), ("*=tcp:{label}.default.svc.cluster.local:443", True),
    ("*.example.com=cloudflared:cft-{name}", True), ("**.example.com=carrier:cft-{label}.example.net", True),
    ("{service}--{port}.svc.example.com=tcp:{service}.internal:{port}", True),
    ("{a}-{port}.co.uk=tcp:10.0.0.1:{port}", True), ("{a}.example.com=tcp:{name}:443", True),
    ("{a}.{b}.example.com=tcp:{a}.{b}.example.net:443", True), ("{a}.{b}.example.com=tcp:{domain}:443", True),
    ("{a}.{b}.example.com=tcp:x-{domain}:443", True), ("{a}.b.example.com=tcp:x-{a}-{domain}:443", True),
    ("*.{env}.example.com=tcp:{name}:443", True), ("**.{env}.example.com=tcp:{label}.{env}.internal:443", True),
    ("**.{b}.example.com=tcp:x-{domain}:443", True), ("{a}.example.com=carrier:{a}.example.net", True),
    # A client may own where it is led to.
    ("{a}.example.com=tcp:{a}:1", False), ("{a}-{b}.example.com=tcp:{a}.{b}:1", False),
    ("{a}.co.uk=tcp:{name}:1", False), ("{a}.{b}=tcp:{name}:1", False), ("db.{b}=tcp:{name}:1", False),
    ("db.{b}.com=tcp:{name}:1", False), ("{a}.example.com=tcp:{a}.com:1", False),
    ("{a}.example.com=tcp:cft-{a}-{domain}:1", False), ("{a}.github.io=cloudflared:{name}", False),
    ("{a}.{b}.example.com=cloudflared:{a}.{b}.com", False), ("{a}.example.com=tcp:10.0.0.{a}:1", False),
    ("{a}.{b}.{c}.{d}.example.com=tcp:{a}.{b}.{c}.{d}:1", False), ("*.{b}.example.com=cloudflared:{label}.{b}", False),
    ("**.{b}.example.com=cloudflared:{label}.{b}.co.uk", False), ("{a}.{b}.example.com=carrier:{b}.{a}.local", False),
    ("*=tcp:{name}:1", False), ("*=tcp:{name}.:1", False), ("*=tcp:{label}.{domain}:1", False),
    ("*=tcp:cft-{name}:1", False), ("*=tcp:{domain}:1", False), ("*=tcp:{label}:1", False),
    ("*=tcp:db.{domain}:1", False), ("*=tcp:{label}-{domain}:1", False), ("*=tcp:{label}.com:1", False),
    ("*.example.com=tcp:{label}:1", False), ("*.example.com=tcp:{label}.:1", False),
    ("*.example.com=tcp:{label}-{domain}:1", False), ("**.example.com=tcp:{label}-{domain}:1", False),
    ("**.example.com=tcp:cft-{domain}:1", False), ("*.example.com=tcp:{label}.co.uk:1", False),
    ("*.co.uk=tcp:{name}:1", False), ("**.co.uk=tcp:{name}:1", False), ("**.co.uk=tcp:{domain}:1", False),
    ("**.co.uk=cloudflared:cft-{name}", False), ("*.github.io=cloudflared:{name}", False),
    ("*.example.com=tcp:{label}.GitHub.io:1", False), ("**.pages.dev=tcp:{name}:1", False),
    ("*.example.nip.io=tcp:{name}:1", False), ("*.example.com=tcp:{label}.local:1", False),
    ("*.example.com=cloudflared:cft-{label}-{domain}", False), ("*=cloudflared:cft-{name}", False),
])
def test_one_rule_says_whether_a_client_may_own_where_it_is_led(text, mine):
    """For the Access token, and for private addresses."""
    route = parse_route(text)
    assert route.is_of_one_domain() is mine
    identified = Routes([route], identified=True)
    name = {"db": "db", "*": "a.example.com"}.get(route.pattern, route.pattern.replace("*", "a"))
    name = re.sub(r"\{\w+\}", "a", name.replace("{port}", "1"))
    decision = identified.decide(name)
    assert decision.tunnel is None or decision.tunnel.identified is mine
    assert sniroute_targets.Targets(None).may_dial(decision, ("10.0.0.1", 1)) is mine
    assert sniroute_targets.Targets(None).may_dial(decision, ("8.8.8.8", 1))


ROUTES = Routes([parse_route(f"{pattern}=tcp:h{number}:1") for number, pattern in enumerate(
    ["db.example.com", "*.example.com", "**.example.com", "**.eu.example.com", "*.eu.example.com",
     "other.example.org", "db"])])
EVERY = Routes([parse_route("*=tcp:{name}:1"), parse_route("a.b=tcp:h:1")])


@pytest.mark.parametrize("routes, name, pattern", [
    (ROUTES, "db.example.com", "db.example.com"), (ROUTES, "x.example.com", "*.example.com"),
    (ROUTES, "x.y.example.com", "**.example.com"), (ROUTES, "x.y.z.example.com", "**.example.com"),
    (ROUTES, "eu.example.com", "*.example.com"), (ROUTES, "x.eu.example.com", "*.eu.example.com"),
    (ROUTES, "x.y.eu.example.com", "**.eu.example.com"), (ROUTES, "example.com", None),
    (ROUTES, "xexample.com", None),
    (ROUTES, "example.org", None), (ROUTES, "x.other.example.org", None), (EVERY, "a.b", "a.b"), (EVERY, "c.d", "*"),
    (ROUTES, "db", "db"), (ROUTES, "com", None), (EVERY, "db", None),
])
def test_the_most_exact_route_is_taken(routes, name, pattern):
    found = routes.find(name)
    assert (found and found[0].pattern) == pattern


def test_a_name_without_a_route_is_refused():
    with pytest.raises(Refused) as caught:
        ROUTES.decide("example.net")
    assert (caught.value.kind, caught.value.alert) == ("no_route", 112)


def test_a_name_of_one_label_is_served_where_a_route_names_it():
    """As Compose and Kubernetes name services.  A wildcard is for names of two labels."""
    routes = Routes([parse_route("db=tcp:{name}:5432"), parse_route("*=cloudflared:cft-{name}")])
    assert routes.decide("db").target == "tcp:db:5432"
    assert verdict(routes.decide, "web") == Bad("no_route", 112)


def test_a_trailing_dot_in_a_target_is_one_tunnel_and_stays_for_the_resolver():
    routes = Routes([parse_route("a.example.com=carrier:T.example.com."), parse_route("b.example.com=carrier:t.example.com"),
                     parse_route("c.example.com=tcp:db.example.com.:5432")])
    one, other, direct = (routes.decide(f"{label}.example.com") for label in "abc")
    assert one.tunnel == other.tunnel and one.target == "carrier:t.example.com"
    assert direct.rest == "db.example.com.:5432", "a host with a dot is not looked for in the search domains"


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


# -- fields ------------------------------------------------------------------------------------


FIELDED = "{service}--{port}.{env}.svc.example.com"


@pytest.mark.parametrize("target, name, expected", [
    ("tcp:{service}.{env}.internal:{port}", "my-api--8080.eu.svc.example.com", "tcp:my-api.eu.internal:8080"),
    ("tcp:{service}.{env}.internal:{port}", "a--b--65535.eu.svc.example.com", "tcp:a--b.eu.internal:65535"),
    ("cloudflared:cft-{service}-{port}.{domain}", "web--http.eu.svc.example.com", "cloudflared:cft-web-http.eu.svc.example.com"),
    ("carrier:{label}.{env}.example.net", "web--http.eu.svc.example.com", "carrier:web--http.eu.example.net"),
    *((f"tcp:{host}:{{port}}", f"web--{port}.eu.svc.example.com", None) for host in ("10.0.0.1", "{service}.internal")
      for port in ("http", "0", "65536", "080", "8_0", "0x50", "99999999999999999999", "80a")),
    ("tcp:{service}:{port}", "127--80.eu.svc.example.com", None), ("tcp:{service}:{port}", "0x7f--80.eu.svc.example.com", None),
    ("tcp:10.0.0.{env}:{port}", "web--80.300.svc.example.com", None),
    ("cloudflared:{service}.{port}", "web--80.eu.svc.example.com", None),
    ("cloudflared:{service}.example.net", "web---80.eu.svc.example.com", None),
    ("cloudflared:{port}.example.net", "web-----80.eu.svc.example.com", "cloudflared:80.example.net"),
    ("carrier:{service}{port}.example.net", f"{'a' * 50}--{'b' * 11}.eu.svc.example.com",
     f"carrier:{'a' * 50}{'b' * 11}.example.net"),
    ("carrier:{service}-{port}-{env}.example.net", f"{'a' * 50}--{'b' * 11}.eu.svc.example.com", None),
])
def test_the_fields_of_a_name_make_its_target_or_it_is_refused(target, name, expected):
    """What is no name and no port from 1 to 65535 reaches neither a resolver nor a program."""
    routes = Routes([Route(FIELDED, target)])
    if expected is None:
        assert verdict(routes.decide, name) == Bad("bad_name", 112)
    else:
        assert routes.decide(name).target == expected


def test_a_later_split_of_a_name_may_be_decided():
    route = parse_route("{service}-{port}.example.com=cloudflared:{service}.{port}.example.net")
    assert [route.decide("my-api-http-metrics.example.com", fields=fields).rest for fields in route.splits(
        "my-api-http-metrics.example.com")] == ["my-api-http.metrics.example.net", "my-api.http-metrics.example.net",
                                                "my.api-http-metrics.example.net"]
    assert route.decide("my-api-http-metrics.example.com").rest == "my-api-http.metrics.example.net"


MIXED = Routes([parse_route(f"{pattern}=tcp:h:1") for pattern in (
    "db.example.com", "{a}.example.com", "*.example.com", "**.example.com", "{a}-{b}.example.com", "*.{e}.example.com",
    "**.{e}.example.com", "*.eu.example.com", "{a}.us.example.com", "{a}.{b}.{c}.example.org")])


@pytest.mark.parametrize("name, pattern", [
    ("db.example.com", "db.example.com"), ("x.example.com", "{a}.example.com"), ("x-y.example.com", "{a}-{b}.example.com"),
    ("x.us.example.com", "{a}.us.example.com"), ("x.eu.example.com", "*.eu.example.com"),
    ("x.uk.example.com", "*.{e}.example.com"), ("x.y.eu.example.com", "**.{e}.example.com"),
    ("a.b.c.example.org", "{a}.{b}.{c}.example.org"), ("b.c.example.org", None), ("a.b.c.d.example.org", None),
    ("example.com", None), ("db", None),
])
def test_a_name_goes_before_fields_which_go_before_a_wildcard(name, pattern):
    found = MIXED.find(name)
    assert (found and found[0].pattern) == pattern


def test_the_name_of_one_label_needs_a_route_that_names_it():
    routes = Routes([to("{a}.{b}", 1), to("*", 2)])
    assert leads(routes, "db") == 0 and leads(routes, "a.b") == 1


@pytest.mark.parametrize("one, other", [
    ("{a}-{b}.example.com", "{service}-{port}.example.com"), ("*.{a}.example.com", "*.{b}.Example.com."),
    ("x{a}.{b}.example.com", "X{b}.{a}.example.com"),
])
def test_two_patterns_that_fit_the_same_names_are_refused(one, other):
    with pytest.raises(ValueError, match="fits the same names as"):
        Routes([to(one, 1), to("a.b", 2), to(other, 3)])


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern fits a name, by a regular expression: right, and slow."""
    if pattern == "*":
        return "." in name
    stars = next((stars for stars in ("**.", "*.") if pattern.startswith(stars)), "")
    front = {"": "", "*.": r"[^.]+\.", "**.": r"(?:[^.]+\.)+"}[stars]
    return re.fullmatch(front + re.sub(r"\\\{\w+\\\}", "[a-z0-9_-]+", re.escape(pattern[len(stars):])), name) is not None


def test_of_all_routes_the_first_that_fits_in_the_order_of_check_is_taken():
    """Found by asking each, for a thousand names and routes of all kinds that come and go."""
    chance = random.Random(1717)
    parts = ["a", "b", "ab", "{x}", "a{x}", "{x}b", "{x}-{y}", "{x}--{y}", "a-{x}", "{x}-b"]
    patterns = {"*"}
    for _ in range(300):
        labels = [chance.choice(parts) for _ in range(chance.randint(2, 3))]
        labels = [label.replace("x", f"x{at}").replace("y", f"y{at}") for at, label in enumerate(labels)]
        patterns.add(chance.choice(("", "", "*.", "**.")) + ".".join(labels))
    taken = set()
    for _ in range(10):
        routes = Routes([to(pattern, 1) for pattern in chance.sample(sorted(patterns), 60)])
        ordered = routes.in_order()
        for _ in range(100):
            name = ".".join(chance.choice(("a", "b", "ab", "a-b", "a--b", "b-a-b", "aab")) for _ in range(chance.randint(1, 4)))
            expected = next((route.pattern for route in ordered if fits(route.pattern, name)), None)
            found = routes.find(name)
            assert (found and found[0].pattern) == expected, name
            taken.add(expected)
    assert len(taken) > 100


def test_a_strangers_name_takes_as_long_with_12_000_routes_as_with_few():
    routes = Routes([to(f"{{service}}--{{port}}.shop-{number}.example.com", 1) for number in range(12_000)])
    routes.configured.patterns = Unwalked(routes.configured.patterns)
    fielded = routes.configured.fielded
    for table in ("sizes", "used", "ends", "places"):
        setattr(fielded, table, Unwalked(getattr(fielded, table)))
    assert routes.decide("a--b.shop-11999.example.com").route.pattern == "{service}--{port}.shop-11999.example.com"
    assert leads(routes, "a-b.shop-11999.example.com") == 0
    for number in range(15_000):
        assert leads(routes, f"n{number}--80.shop-{number % 12_000}.example.com") == 1
        assert len(routes.decisions) <= 24_000
    routes.configured.drop("{service}--{port}.shop-7.example.com")
    routes.configured.put(to("{a}--{b}.shop-7.example.com", 2))
    assert leads(routes, "n7--80.shop-7.example.com") == 2


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


@pytest.mark.parametrize("pattern", ["a.b.c.d", "*.b.c.d", "**.c.d", "*", "{x}.b.c.d", "a.{x}.{y}.d", "**.{x}.d"])
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
    ("as-received", v2(0x21, 0x00), lambda own: v2(0x21, 0x00)),
    ("v1", v2(0x21, 0x31, bytes(216)), lambda own: b"PROXY UNKNOWN\r\n"),
    ("v2", v2(0x21, 0x12, INET), lambda own: v2(0x20, 0x00)),
    ("v1", MAPPED, lambda own: v1("TCP4 203.0.113.5 198.51.100.1 1000 443")),
    ("v2", MAPPED, lambda own: sniroute_wire.proxy_v2(("203.0.113.5", 1000), ("198.51.100.1", 443))),
])
def test_a_route_says_what_its_backend_hears_of_the_client(run_file, echo_server, how, said, expected):
    running = run_file(echo_server.address, f'send_proxy = "{how}"')
    with running.connect(said + HELLO) as client:
        header = expected((client.getsockname(), client.getpeername()))
        assert read_exactly(client, len(header + HELLO)) == header + HELLO


@pytest.mark.parametrize("how", ["as-received", "none", "v1", "v2"])
@pytest.mark.parametrize("asks", [False, True], ids=["TLS", "SSLRequest"])
@pytest.mark.parametrize("header", [
    v1("TCP4 192.0.2.1 192.0.2.9 1234 5679"),
    v2(0x21, 0x11, bytes((192, 0, 2, 1, 0, 0, 0, 8)) + struct.pack(">HH", 1234, 5679)),
    v2(0x21, 0x11, INET + tlv(0xEE, ASK_TLS)), v2(0x20, 0x00, ASK_TLS), v2(0x21, 0x00, ASK_TLS),
], ids=["v1", "ports", "TLV", "LOCAL", "UNSPEC"])
def test_the_backend_hears_the_question_for_tls_only_where_the_client_has_asked_it(run_file, serve, header, asks, how):
    """Whatever the last bytes of its PROXY header are."""
    def backend(sock: socket.socket) -> bytes:
        heard = b""
        while not heard.endswith(HELLO):
            more = sock.recv(4096)
            if not more:
                break
            heard += more
            if asks and heard.endswith(ASK_TLS) and len(heard) > len(expected_header):
                sock.sendall(b"S")
        sock.sendall(b"x")
        return heard

    far = serve(backend)
    running = run_file(far.address, f'send_proxy = "{how}"')
    known = header not in (v2(0x20, 0x00, ASK_TLS), v2(0x21, 0x00, ASK_TLS))
    found = (sniroute_wire.parse_proxy_v1 if header.startswith(b"PROXY") else sniroute_wire.parse_proxy_v2)(header)
    write = {"v1": sniroute_wire.proxy_v1, "v2": sniroute_wire.proxy_v2}.get(how)
    expected_header = {"as-received": header, "none": b""}.get(how)
    if write is not None:
        expected_header = write((str(found.source), found.port) if known else None, found.destination or ("::", 0))
    with running.connect(header + (ASK_TLS if asks else HELLO)) as client:
        if asks:
            assert client.recv(1) == b"S"
            client.sendall(HELLO)
        assert client.recv(1) == b"x"
    assert far.result() == expected_header + (ASK_TLS if asks else b"") + HELLO


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
    running.router.deadlines.linger.seconds = 20.0
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


# -- plain HTTP --------------------------------------------------------------------------------


def test_a_route_with_options_for_http_costs_a_tls_client_nothing():
    route = parse_route("a.example.com=tcp:h:1")._replace(http="forward-tls", verify=False, host="backend", upgrades=(),
                                                          cross_site="refuse", http_reuse="safe", redirect_port=8443)
    assert route.is_plain and route.decide("a.example.com").plain


@pytest.mark.parametrize("route, refuses", [
    ("a.example.com=tcp:h:1", False), ("*.example.com=tcp:h:1", False), ("*.example.com=tcp:{label}.example.net:1", True),
    ("{a}.b.example.com=unix:/run/{a}", True), ("a.example.com=command:x {port}", False),
])
def test_a_page_of_another_site_may_not_choose_the_target(route, refuses):
    read = parse_route(route)
    assert read.refuses_cross_site is refuses
    assert read._replace(cross_site="refuse").refuses_cross_site
    assert not read._replace(cross_site="allow").refuses_cross_site


@pytest.mark.parametrize("pattern, host, name, filled", [
    ("*.example.com", "", "a.example.com", ""), ("*.example.com", "backend", "a.example.com", "backend"),
    ("*.example.com", "inner.example.net", "a.example.com", "inner.example.net"),
    ("*.example.com", "{label}.example.net", "a.example.com", "a.example.net"),
    ("{app}--{env}.example.com", "{app}.{env}.example.net", "web--eu.example.com", "web.eu.example.net"),
])
@pytest.mark.parametrize("target", ["tcp:h:1", "tcp:{name}:1"])
def test_the_host_that_a_backend_is_told_may_have_fields(pattern, host, name, filled, target):
    routes = Routes([parse_route(f"{pattern}={target}")._replace(host=host)])
    assert routes.decide(name).host == filled


def test_the_host_that_several_backends_are_told_is_that_of_each_name(settings_file):
    path = settings_file('[routes]\n"*.example.com" = { target = "tcp:h:1,h:2", http = "forward", '
                         'host = "{label}.example.net" }\n')
    routes = load_settings(["-c", path], {}).routes
    assert [routes.decide(f"{name}.example.com").host for name in "ab"] == ["a.example.net", "b.example.net"]
    assert {member.host for member in routes.decide("a.example.com").members} == {""}


def test_a_name_that_would_make_no_host_name_is_refused():
    routes = Routes([parse_route("{app}--{env}.example.com=tcp:h:1")._replace(host="{app}.example.net")])
    assert routes.decide("web--eu.example.com").host == "web.example.net"
    with pytest.raises(Refused) as caught:
        routes.decide("web---eu.example.com")
    assert caught.value.kind == "bad_name"
