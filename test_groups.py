"""Tests of sniroute_groups.py, sniroute_book.py and sniroute_balance.py: who is good, who is next, what is remembered.

Time and dice are the test's own.  Clients are stand-ins: those of test_backends.py are real.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import random
import socket
import types
from typing import Any, Callable, Iterator, Mapping

import pytest

import sniroute_book
import sniroute_loop
from sniroute_backends import SEVERAL
from sniroute_balance import STRIP, WAYS, Member, slot_of
from sniroute_book import NO_NAME, Book, Checked
from sniroute_groups import DOWN, DRAINED, FOREIGN, OWN, UNKNOWN, Group, Penalty, Several
from sniroute_loop import NEVER, Loop
from sniroute_routes import Route, parse_port_route, parse_route
from sniroute_targets import Resolved, Targets
from sniroute_values import Zones, own_zones, parse_zones
from conftest import FakeClock, Server, echo, wait_until


# -- helpers -----------------------------------------------------------------------------------


class Loops:
    """A loop without a loop: what is put is forgotten."""

    def queue(self, seconds: float, act: Callable[[Any], Any]) -> Any:
        return types.SimpleNamespace(put=lambda item: None, drop=lambda item: None)


def a_book(loop: Any = None, zones: Zones | None = None) -> Book:
    targets = Targets(None)
    targets.zones = zones
    targets.book = Book(targets, loop or Loops())
    return targets.book


def a_route(targets: list[str], pattern: str = "a.b", **options: Any) -> Route:
    route = parse_port_route(f"{pattern}=", targets) if pattern[0] == ":" else parse_route(f"{pattern}=", targets)
    return route._replace(members=tuple(targets), several=Several(SEVERAL, Book, [], **options))


def a_group(count: int = 5, clock: Callable[[], float] | None = None, targets: list[str] | None = None,
            book: Book | None = None, **options: Any) -> Group:
    group = Group(book or a_book(), clock or FakeClock(), random.Random(7).random)
    have(group, targets or [f"tcp:192.0.2.1:{1 + at}" for at in range(count)], **options)
    return group


def have(group: Group, targets: list[str], **options: Any) -> None:
    """The group has these targets."""
    route = a_route(targets, **options)
    group.adopt(route, route.decide("a.b").members)


class Client:
    """What a Group sees of a client."""

    group: Group  # where it waits

    def __init__(self, tried: Mapping[Member, str] = {}):
        self.told_of = dict(tried)
        self.served: list[Member] = []
        self.cuts = 0
        self.connection = types.SimpleNamespace(resume=lambda: None)

    def use(self, member: Member) -> None:
        self.served.append(member)
        self.group.take(member, self)

    def cut(self) -> None:
        self.cuts += 1


def picks(group: Group, count: int, address: Callable[[int], str] = lambda at: "192.0.2.1") -> list[str]:
    return [group.pick(Client(), address(at)).target for at in range(count)]


def led_to(group: Group) -> set[str]:
    """The hosts to which clients are led."""
    return {target.split(":")[1] for target in picks(group, 20)}


def waits(group: Group, client: Client | None = None) -> Client:
    """A client for which there is no room."""
    client = client or Client()
    assert group.pick(client, "192.0.2.1") is None
    client.group = group
    group.waiting[client] = None
    return client


def go_down(group: Group, member: Member) -> None:
    for _ in range(group.options.health_fail):
        group.bad_news(member, "it refused", False)
    assert member.why


def check(group: Group, member: Member, *results: str) -> None:
    """Active checks of a member; a result is what is wrong, or ""."""
    for why in results:
        group.checked(member, why)


# -- which one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 1000])
def test_round_robin_takes_turns(count):
    assert set(collections.Counter(picks(a_group(count), count * 2)).values()) == {2}


def test_a_member_that_is_twice_in_the_list_counts_twice():
    targets = ["tcp:192.0.2.1:1", "tcp:192.0.2.2:1", "tcp:192.0.2.2:1"]
    for balance in ("round-robin", "least", "hash", "random"):
        group = a_group(targets=targets, balance=balance)
        counts: collections.Counter[str] = collections.Counter()
        for at in range(3000):
            member = group.pick(Client(), f"198.51.{at >> 8}.{at & 255}")
            group.take(member, Client())
            counts[member.target] += 1
        assert 1.8 < counts["tcp:192.0.2.2:1"] / counts["tcp:192.0.2.1:1"] < 2.2, balance


def test_least_takes_the_one_with_the_fewest_connections():
    group = a_group(4, balance="least")
    members = list(group.members.values())
    for member, count in zip(members, (3, 1, 2, 0)):
        for _ in range(count):
            group.take(member, Client())
    taken = []
    for _ in range(6):
        member = group.pick(Client(), "192.0.2.9")
        group.take(member, Client())
        taken.append(members.index(member))
    assert sorted(taken) == [1, 1, 2, 3, 3, 3] and {member.active for member in members} == {3}
    group.leave(members[2], Client())
    assert group.pick(Client(), "192.0.2.9") is members[2]


@pytest.mark.parametrize("balance", ["least", "latency", "random"])
def test_a_backend_that_fails_fast_does_not_attract_everybody(balance):
    """A failure weighs like a connection, and like a connect time-out, for a while."""
    group = a_group(4, balance=balance, health="off")
    bad, *good = group.members.values()
    for member in group.members.values():
        member.observe(0.01, 0.0)
    counts: collections.Counter[bool] = collections.Counter()
    for _ in range(400):
        member = group.pick(Client(), "192.0.2.1")
        counts[member is bad] += 1
        group.take(member, client := Client())
        if member is bad:
            group.penalise(member)
            member.dialling -= 1
            group.leave(member, client)
        else:
            member.dialling -= 1
            member.connected(0.01, 0.0)
    assert counts[True] <= 100, "not more than its share"


def test_latency_prefers_the_fast_and_leaves_nobody_out():
    clock = FakeClock()
    group = a_group(3, clock, balance="latency")
    fast, slow, new = group.members.values()
    fast.observe(0.002, clock()), slow.observe(0.2, clock())
    first = picks(group, 300)
    assert first.count(new.target) > 150, "one that was never tried is tried"
    group.take(new, Client())
    counts = collections.Counter(picks(group, 300))
    assert counts[new.target] < 60, "and while that is silent it does not attract the others"
    assert counts[fast.target] > counts[slow.target]
    clock.now += 600
    assert collections.Counter(picks(group, 300))[slow.target] > 30, "its slow connect is long ago"


def test_hash_moves_only_the_clients_of_a_backend_that_is_gone():
    addresses = [f"198.51.{at // 250}.{at % 250}" for at in range(5_000)]
    group = a_group(5, balance="hash")
    def led() -> list[str]:
        return picks(group, len(addresses), addresses.__getitem__)
    before = led()
    assert max(collections.Counter(before).values()) < 1100
    for gone in list(group.members.values()):
        go_down(group, gone)
        now = led()
        moved = [old for old, new in zip(before, now) if old != new]
        assert len(moved) <= 1100 and set(moved) == {gone.target}, "nobody else moves"
        gone.until = 0.0
        for _ in range(2):
            group.good_news(gone)
        assert led() == before, "and all are back with it"
    have(group, [*group.members, "tcp:192.0.2.99:1"], balance="hash")
    moved = [new for old, new in zip(before, led()) if old != new]
    assert len(moved) <= 1100 and set(moved) == {"tcp:192.0.2.99:1"}, "a new one takes only its share"


def test_hash_counts_the_64_of_an_ipv6_address():
    assert slot_of("2001:db8:1:2::1") == slot_of("2001:db8:1:2:ffff::9") != slot_of("2001:db8:1:3::1")
    assert slot_of("::ffff:192.0.2.1") == slot_of("192.0.2.1")


def test_a_backend_that_flaps_changes_its_state_a_few_times_in_a_minute(caplog):
    clock = FakeClock()
    caplog.set_level("INFO", "sniroute")
    group = a_group(2, clock)
    flaps, good = group.members.values()
    begin = clock.now
    for step in range(600):  # a client each 0.1 s
        clock.now = begin + step / 10
        client = Client()
        member = group.pick(client, "192.0.2.1")
        is_trial = member.trial is client
        group.take(member, client)
        if member is flaps and step // 20 % 2:
            group.bad_news(member, "refused", is_trial)
        else:
            group.good_news(member)
        group.leave(member, client)
    changes = [record for record in caplog.records if " is down" in record.message or " is back" in record.message]
    assert 1 <= len(changes) <= 6


def test_one_client_tries_a_backend_that_has_rested_and_others_do_not_wait():
    clock = FakeClock()
    group = a_group(3, clock)
    down = next(iter(group.members.values()))
    go_down(group, down)
    assert down.target not in picks(group, 30)
    clock.now += 30
    client = Client()
    assert group.pick(client, "192.0.2.1") is down and down.trial is client
    group.take(down, client)
    assert down.target not in picks(group, 30), "one is enough"
    group.bad_news(down, "again", True)
    group.leave(down, client)
    assert down.target not in picks(group, 30), "it rests again"
    clock.now += 30
    for _ in range(group.options.health_pass):
        assert down.why
        assert group.pick(client, "192.0.2.1") is down
        group.good_news(down)
        group.leave(down, client)
        group.take(down, client)
    assert not down.why and picks(group, 30).count(down.target) == 10


def test_a_client_that_leaves_in_the_middle_of_a_trial_lets_the_next_one_try():
    group = a_group(2)
    down = next(iter(group.members.values()))
    go_down(group, down)
    down.until = 0.0
    client = Client()
    assert group.pick(client, "192.0.2.1") is down
    group.take(down, client)
    group.leave(down, client)
    assert group.pick(Client(), "192.0.2.1") is down


def test_first_goes_back_to_the_first():
    clock = FakeClock()
    group = a_group(3, clock, balance="first", health_pass=1)
    one, two, three = group.members.values()
    assert set(picks(group, 5)) == {one.target}
    go_down(group, three)
    clock.now += 100
    assert set(picks(group, 5)) == {one.target}, "nobody is sent to a later one, to try it"
    go_down(group, one)
    assert set(picks(group, 5)) == {two.target}
    clock.now += 31
    client = Client()
    assert group.pick(client, "192.0.2.1") is one
    group.good_news(one)
    assert set(picks(group, 5)) == {one.target}


def test_first_leads_nobody_else_back_before_health_pass():
    """It is back for a moment, and dead again."""
    clock = FakeClock()
    group = a_group(2, clock, balance="first", health_pass=3)
    one, two = group.members.values()
    go_down(group, one)
    for _ in range(3):
        clock.jump(30)
        for passes in range(3):
            client = Client()
            assert group.pick(client, "192.0.2.1") is one and one.trial is client
            group.take(one, client)
            assert set(picks(group, 20)) == {two.target}, "one client tries it, all others stay"
            if passes < 2:
                group.good_news(one)
            else:
                group.bad_news(one, "dead again", True)
            group.leave(one, client)
        assert set(picks(group, 20)) == {two.target}, "it rests again"


def test_a_backend_that_is_twice_in_the_list_counts_twice_again_when_it_is_back():
    group = a_group(targets=["tcp:192.0.2.1:1", "tcp:192.0.2.2:1", "tcp:192.0.2.2:1"], health_pass=1)
    twice = group.members["tcp:192.0.2.2:1"]
    go_down(group, twice)
    assert twice.target not in picks(group, 9)
    group.good_news(twice)
    assert picks(group, 9).count(twice.target) == 6


def test_slow_start_gives_a_share_that_grows():
    clock = FakeClock()
    group = a_group(2, clock, slow_start=100.0, health_pass=1)
    back = next(iter(group.members.values()))
    assert picks(group, 100).count(back.target) == 50, "at the start of the router all are as they are"
    go_down(group, back)
    group.good_news(back)
    shares = []
    for wait in (1, 49, 50):
        clock.now += wait
        shares.append(picks(group, 1000).count(back.target) / 500)
    assert shares[0] < 0.12 and 0.4 < shares[1] < 0.6 and shares[2] == 1.0


def test_what_is_known_of_an_address_is_kept_over_another_list():
    group = a_group(3)
    one, two, three = group.members.values()
    go_down(group, two)
    have(group, [three.target, two.target, "tcp:192.0.2.9:9"])
    assert list(group.members.values())[:2] == [three, two] and two.why
    assert two.target not in picks(group, 20) and one.target not in picks(group, 20)
    have(group, [three.target, two.target], health="off")
    assert two.target in picks(group, 20)


@pytest.mark.parametrize("balance", WAYS)
def test_every_way_leads_round_those_that_a_client_has_tried_and_ends(balance):
    group = a_group(6, balance=balance)
    go_down(group, list(group.members.values())[2])
    client = Client()
    for at in range(6):
        member = group.pick(client, "192.0.2.1")
        assert member not in client.told_of
        assert bool(member.why) == (at == 5), "those that are good come first"
        client.told_of[member] = "no"
    with pytest.raises(LookupError):
        group.pick(client, "192.0.2.1")


# -- ranks -------------------------------------------------------------------------------------

# 192.0.2.0/25 is the own zone; the longest prefix takes 192.0.2.128/25 out of it.  203.0.113.0/24 is in none.
ZONES = own_zones(parse_zones("a=192.0.2.0/24, b=192.0.2.128/25, b=198.51.100.0/24, a=2001:db8:a::/48"), "a", None)
NEAR, NEAR2, FAR, FAR2 = "192.0.2.1", "192.0.2.2", "198.51.100.1", "198.51.100.2"


def zoned(*hosts: str, clock: FakeClock | None = None, **options: Any) -> Group:
    """A group with backends at these hosts, for a router in zone `a`."""
    return a_group(targets=[f"tcp:{host}:1" for host in hosts], clock=clock, book=a_book(zones=ZONES), **options)


def member_of(group: Group, host: str) -> Member:
    return group.members[f"tcp:{host}:1"]


def test_clients_are_led_to_the_best_rank_that_there_is():
    group = zoned(NEAR, NEAR2, FAR, FAR2, health="connect")
    assert led_to(group) == {NEAR, NEAR2, FAR, FAR2}, "nothing is known of any: all are used"
    check(group, member_of(group, FAR2), "")
    assert led_to(group) == {FAR2}, "proven, in another zone, before unknown ones in the own"
    check(group, member_of(group, NEAR2), "")
    assert led_to(group) == {NEAR2}
    check(group, member_of(group, NEAR), "")
    assert led_to(group) == {NEAR, NEAR2}
    for host, left in ((NEAR, {NEAR2}), (NEAR2, {FAR2}), (FAR2, {FAR})):
        go_down(group, member_of(group, host))
        assert led_to(group) == left, f"{host} is down"
    group.book.groups["a.b"] = group
    assert group.book.drain("a.b", f"{FAR}:1", True)
    assert led_to(group) <= {NEAR, NEAR2, FAR2}, "those that are down, before one that is drained"
    assert sorted(member.rank for member in group.members.values()) == [DOWN, DOWN, DOWN, DRAINED]


@pytest.mark.parametrize("balance", WAYS)
def test_one_client_finds_all_ranks_in_order(balance):
    group = zoned(NEAR, NEAR2, FAR, FAR2, "192.0.2.3", "192.0.2.4", health="connect", balance=balance)
    for host in (NEAR, FAR, FAR2):
        check(group, member_of(group, host), "")
    go_down(group, member_of(group, "192.0.2.3"))
    member_of(group, "192.0.2.4").is_drained = True
    group.changed()
    client, ranks = Client(), []
    with pytest.raises(LookupError):
        while True:
            member = group.pick(client, "203.0.113.9")
            assert member not in client.told_of
            client.told_of[member] = "no"
            ranks.append(member.rank)
    assert ranks == [OWN, FOREIGN, FOREIGN, UNKNOWN, DOWN], "never the drained one"


def test_who_finds_the_best_full_is_led_to_the_next_rank():
    group = zoned(NEAR, FAR, FAR2, "192.0.2.3", "192.0.2.4", health="connect", max_backend_connections=1)
    for host in (NEAR, FAR, FAR2):
        check(group, member_of(group, host), "")
    go_down(group, member_of(group, "192.0.2.4"))
    clients, led = [], []
    for _ in range(4):
        clients.append(Client())
        member = group.pick(clients[-1], "203.0.113.9")
        group.take(member, clients[-1])
        led.append(member.rank)
    assert led == [OWN, FOREIGN, FOREIGN, UNKNOWN]
    first, second = waits(group), waits(group)  # one that is down is not used because others are full
    far = member_of(group, FAR)
    group.leave(far, clients[1])
    assert first.served == [far] and not second.served, "who waits is led to a lower rank, too, in order"
    group.leave(member_of(group, NEAR), clients[0])
    assert second.served == [member_of(group, NEAR)]


def test_room_that_a_change_brings_is_for_those_who_wait():
    """Not only room of the best rank."""
    for change in ("enabled", "proven", "a new limit", "a new backend"):
        group = zoned(NEAR, FAR, max_backend_connections=1, health="connect" if change == "proven" else "passive")
        near, far = group.members.values()
        check(group, near, "")
        far.is_drained = change == "enabled"
        group.changed()
        group.take(near, Client())
        if change != "enabled":
            group.take(far, Client())
        client = waits(group)
        if change == "enabled":
            far.is_drained = False
            group.changed()
            assert client.served == [far], change
            continue
        if change == "proven":
            far.active = 0
            check(group, far, "")
        elif change == "a new limit":
            have(group, [*group.members], max_backend_connections=2)
        else:
            have(group, [*group.members, "tcp:198.51.100.9:1"], max_backend_connections=1)
        assert len(client.served) == 1, change


def test_a_backend_that_a_reload_took_out_gets_none_of_those_who_wait():
    group = a_group(2, max_backend_connections=1)
    gone, stays = group.members.values()
    for member in (gone, stays):
        group.take(member, Client())
    have(group, [stays.target], max_backend_connections=1)
    client = waits(group)
    group.leave(gone, Client())
    assert not client.served
    group.leave(stays, Client())
    assert client.served == [stays]


def test_who_has_tried_all_good_ones_waits_for_those_that_are_down_too():
    group = a_group(2, max_backend_connections=1)
    down, good = group.members.values()
    group.take(down, Client())
    go_down(group, down)
    client = waits(group, Client({good: "it closed"}))
    group.take(good, other := Client())
    patient = waits(group)
    group.leave(down, Client())
    assert client.served == [down] and not patient.served
    group.leave(good, other)
    assert patient.served == [good]


# -- zones -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target, is_near", [
    ("tcp:192.0.2.1:1", True), ("tcp:192.0.2.129:1", False), ("tcp:198.51.100.1:1", False),
    ("tcp:203.0.113.1:1", False), ("tcp:[2001:db8:a::1]:1", True), ("tcp:[2001:db8:b::1]:1", False),
    ("tcp:[::ffff:192.0.2.1]:1", True), ("unix:/run/db.sock", True), ("exec:/bin/cat", True),
    ("cloudflared:db.example.com", False), ("carrier:db.example.com", False),
], ids=["own", "longest prefix", "another", "in no zone", "own, IPv6", "another, IPv6", "mapped", "unix", "exec",
        "cloudflared", "carrier"])
def test_a_backend_is_near_where_its_address_is_in_the_own_zone(target, is_near):
    group = a_group(targets=[target, "tcp:192.0.2.77:1"], book=a_book(zones=ZONES))
    assert group.members[target].is_near is is_near
    assert (target in picks(group, 10)) is is_near
    group.book.targets.zones = None
    have(group, [target, "tcp:192.0.2.77:1"])
    assert target in picks(group, 10), "without zones each is as good as another"


def test_the_zone_of_a_name_counts_once_it_is_known():
    group = a_group(targets=["tcp:db.example.com:1", f"tcp:{NEAR}:1"], book=a_book(zones=ZONES))
    named, near = group.members.values()
    assert group.way_to(named) is None and set(picks(group, 4)) == {named.target, near.target}
    for hosts, led in (([FAR], {near}), ([FAR, NEAR2], {named, near}), ([FAR2], {near})):
        rows = tuple((socket.AF_INET, (host, 1)) for host in hosts)
        group.book.targets.remember(named.decision, Resolved(rows, False, NEVER))
        assert {row[1][0] for row in group.way_to(named).addresses} == set(hosts)
        assert set(picks(group, 4)) == {member.target for member in led}, hosts


def test_a_name_that_resolves_to_other_addresses_is_as_good_as_before():
    group = a_group(targets=["tcp:db.example.com:1", "tcp:192.0.2.9:1"])
    named, other = group.members.values()
    for host in ("192.0.2.1", "192.0.2.2"):
        group.book.targets.remember(named.decision, Resolved(((socket.AF_INET, (host, 1)),), False, NEVER))
        group.way_to(named)
        assert set(picks(group, 4)) == ({other.target} if named.why else {named.target, other.target})
        if not named.why:
            go_down(group, named)


def test_where_the_only_backend_of_the_own_zone_dies_the_others_serve_and_it_comes_back():
    clock = FakeClock()
    group = zoned(NEAR, FAR, FAR2, clock=clock)
    assert led_to(group) == {NEAR}
    near = member_of(group, NEAR)
    go_down(group, near)
    assert led_to(group) == {FAR, FAR2}
    clock.jump(30)
    client = Client()
    assert group.pick(client, "192.0.2.1") is near and near.trial is client
    for _ in range(2):
        group.good_news(near)
    assert led_to(group) == {NEAR}


def test_one_far_away_that_has_rested_is_not_tried_while_a_near_one_serves():
    clock = FakeClock()
    group = zoned(NEAR, FAR, clock=clock)
    near, far = group.members.values()
    go_down(group, far)
    clock.jump(1000)
    assert led_to(group) == {NEAR}
    go_down(group, near)
    client = Client()
    assert group.pick(client, "192.0.2.1") is far and far.trial is client, "now it is"


def test_a_reload_may_move_the_zones():
    group = zoned(NEAR, FAR)
    assert led_to(group) == {NEAR}
    group.book.targets.zones = ZONES._replace(own="b")
    have(group, [*group.members])
    assert led_to(group) == {FAR}
    group.book.targets.zones = None
    have(group, [*group.members])
    assert led_to(group) == {NEAR, FAR}


# -- the addresses of one host -----------------------------------------------------------------


def firsts(group: Group, hosts: list[str], times: int = 6) -> list[list[str]]:
    """In which order the addresses of a name are tried, each time."""
    rows = tuple((socket.AF_INET6 if ":" in host else socket.AF_INET, (host, 1)) for host in hosts)
    member = next(iter(group.members.values()))
    group.book.targets.remember(member.decision, Resolved(rows, False, NEVER))
    return [[row[1][0] for row in group.way_to(member).addresses] for _ in range(times)]


def a_named_group(zones: Zones | None = None) -> Group:
    return a_group(targets=["tcp:db.example.com:1", "tcp:192.0.2.99:1"], book=a_book(zones=zones))


def test_the_addresses_of_a_host_share_its_weight():
    hosts = [f"192.0.2.{at}" for at in range(1, 4)]
    orders = firsts(a_named_group(), hosts)
    assert collections.Counter(order[0] for order in orders) == dict.fromkeys(hosts, 2)
    assert all(sorted(order) == hosts for order in orders), "and each of them is tried"


def test_the_other_family_comes_last():
    orders = firsts(a_named_group(), ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2"])
    assert {order[0] for order in orders} == {"2001:db8::1", "2001:db8::2"}
    assert all(order[2:] == ["192.0.2.1", "192.0.2.2"] for order in orders)


def test_an_address_that_did_not_take_the_last_connect_comes_last():
    group = a_named_group()
    group.book.targets.laggards.learn([(socket.AF_INET, ("192.0.2.1", 1))], (socket.AF_INET, ("192.0.2.2", 1)))
    orders = firsts(group, ["192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1"])
    assert {order[0] for order in orders} == {"192.0.2.2", "192.0.2.3"}
    assert {order[-1] for order in orders} == {"192.0.2.1"}


def test_addresses_of_the_own_zone_come_first():
    orders = firsts(a_named_group(ZONES), [FAR, NEAR, "2001:db8:a::1", FAR2, NEAR2])
    assert {order[0] for order in orders} == {NEAR, NEAR2}
    assert all(order[2:] == ["2001:db8:a::1", FAR, FAR2] for order in orders), "the other family, then far ones"


def test_of_a_host_far_away_the_addresses_that_work_come_first():
    group = a_named_group(ZONES)
    group.book.targets.laggards.learn([(socket.AF_INET, (FAR, 1))], (socket.AF_INET, (FAR2, 1)))
    assert {order[0] for order in firsts(group, [FAR, FAR2])} == {FAR2}


def test_a_host_all_whose_addresses_failed_is_tried_at_each():
    group = a_named_group()
    hosts = ["192.0.2.1", "192.0.2.2"]
    lost = [(socket.AF_INET, (host, 1)) for host in hosts]
    group.book.targets.laggards.learn(lost, (socket.AF_INET, ("192.0.2.3", 1)))
    assert {order[0] for order in firsts(group, hosts)} == set(hosts)


# -- operators ---------------------------------------------------------------------------------


def adopt(book: Book, *routes: Route) -> list[Group]:
    """A reload: the book has these routes."""
    book.adopt(routes, False)
    return [book.groups[route.pattern] for route in routes if not route.has_fields]


BOTH = ["tcp:192.0.2.1:1", "tcp:192.0.2.2:1"]


@pytest.mark.parametrize("address", ["192.0.2.1:1", "tcp:192.0.2.1:1"])
def test_a_drained_backend_gets_no_client_until_it_is_enabled(address):
    book = a_book()
    group, other = adopt(book, a_route(BOTH), a_route(BOTH, "c.d"))
    assert book.drain("a.b", address, True)
    assert led_to(group) == {"192.0.2.2"} and led_to(other) == {"192.0.2.1", "192.0.2.2"}, "of this route only"
    for _ in range(3):
        group, other = adopt(book, a_route(BOTH), a_route(BOTH[::-1], "c.d"))
    assert led_to(group) == {"192.0.2.2"}, "a reload keeps that"
    adopt(book, a_route(BOTH[1:]), a_route(BOTH, "c.d"))
    (group, _) = adopt(book, a_route(BOTH), a_route(BOTH, "c.d"))
    assert led_to(group) == {"192.0.2.2"}, "also where it was out of the list"
    assert book.drain("a.b", address, False) and led_to(group) == {"192.0.2.1", "192.0.2.2"}
    (group, _) = adopt(book, a_route(BOTH), a_route(BOTH, "c.d"))
    assert led_to(group) == {"192.0.2.1", "192.0.2.2"}


@pytest.mark.parametrize("pattern, address", [("a.b", "192.0.2.9:1"), ("x.y", "192.0.2.1:1"), ("a.b", "192.0.2.1"),
                                              ("a.b", "")])
def test_what_is_no_backend_cannot_be_drained(pattern, address):
    book = a_book()
    adopt(book, a_route(BOTH))
    assert not book.drain(pattern, address, True) and not book.drained


def test_a_route_that_is_taken_out_is_drained_no_more():
    book = a_book()
    adopt(book, a_route(BOTH))
    book.drain("a.b", "192.0.2.1:1", True)
    adopt(book)
    (group,) = adopt(book, a_route(BOTH))
    assert not book.drained and led_to(group) == {"192.0.2.1", "192.0.2.2"}


def test_a_drained_backend_is_never_tried_not_even_when_all_others_are_down_and_it_has_rested():
    book = a_book()
    (group,) = adopt(book, a_route(BOTH))
    group.clock = clock = FakeClock()
    first, second = group.members.values()
    go_down(group, first)
    go_down(group, second)
    book.drain("a.b", first.target, True)
    clock.jump(1000)
    client = Client()
    assert group.pick(client, "192.0.2.1") is second
    client.told_of[second] = "no"
    with pytest.raises(LookupError):
        group.pick(client, "192.0.2.1")
    book.drain("a.b", first.target, False)
    assert group.pick(client, "192.0.2.1") is first


# -- what is remembered ------------------------------------------------------------------------


def test_what_is_known_of_an_address_outlives_its_route():
    book = a_book()
    (group,) = adopt(book, a_route(BOTH))
    group.clock = FakeClock()
    down = group.members[BOTH[0]]
    go_down(group, down)
    for pattern in ("a.b", "c.d"):
        adopt(book)
        assert not book.groups
        (group,) = adopt(book, a_route(BOTH, pattern))
        group.clock = FakeClock()
        again = group.members[BOTH[0]]
        assert again is not down and (again.why, again.since, again.until) == (down.why, down.since, down.until)
        assert led_to(group) == {"192.0.2.2"} and not book.known
    adopt(book, a_route(BOTH[1:], "c.d"))
    (group,) = adopt(book, a_route(BOTH, "c.d"))
    assert group.members[BOTH[0]].why, "also where it was only out of the list"
    adopt(book)
    (group,) = adopt(book, a_route(BOTH, health="off"))
    assert led_to(group) == {"192.0.2.1", "192.0.2.2"}, "nobody is down where nobody looks"
    adopt(book)
    (group,) = adopt(book, a_route(BOTH))
    assert led_to(group) == {"192.0.2.1", "192.0.2.2"}


def test_a_backend_that_was_good_when_it_went_is_good_when_it_comes():
    book = a_book()
    (group,) = adopt(book, a_route(BOTH))
    member = group.members[BOTH[0]]
    go_down(group, member)
    adopt(book)
    for _ in range(2):  # a client that it had still
        group.good_news(member)
    (group,) = adopt(book, a_route(BOTH))
    assert led_to(group) == {"192.0.2.1", "192.0.2.2"}


def test_not_too_much_is_remembered(monkeypatch):
    monkeypatch.setattr(sniroute_book, "KNOWN_MAX", 3)
    book = a_book()
    (group,) = adopt(book, a_route([f"tcp:192.0.2.1:{1 + at}" for at in range(9)]))
    for member in group.members.values():
        go_down(group, member)
    adopt(book)
    assert list(book.known) == [f"tcp:192.0.2.1:{port}" for port in (7, 8, 9)], "the latest"


def test_50_reloads_lead_no_client_to_a_backend_that_is_down():
    book, clock = a_book(), FakeClock()
    (group,) = adopt(book, a_route(BOTH))
    group.clock = clock
    down = group.members[BOTH[0]]
    go_down(group, down)
    queues = None
    for at in range(50):
        (again,) = adopt(book, a_route(BOTH[::-1] if at % 2 else BOTH, balance=[*WAYS][at % len(WAYS)]))
        assert again is group and led_to(group) == {"192.0.2.2"}
        assert group.members[BOTH[0]] is down and list(group.resting) == [down]
        queues = queues or len(book.queues)
    assert len(book.queues) == queues, "a reload leaves no queue behind"
    clock.jump(30)
    assert group.pick(Client(), "192.0.2.1") is down or group.options.balance == "hash"


def test_a_route_whose_targets_get_fields_leaves_nothing_behind():
    """It has another key then."""
    book = a_book()
    adopt(book, a_route(BOTH, "*.example.org"))
    adopt(book, a_route(["tcp:{label}.invalid:1", BOTH[0]], "*.example.org"))
    assert not book.groups and not list(book.rows())
    adopt(book, a_route(BOTH, "*.example.org"))
    assert len(list(book.rows())) == 2


def test_a_route_that_a_reload_takes_out_goes_at_once_also_where_clients_wait():
    book = a_book()
    (group,) = adopt(book, a_route(BOTH, max_backend_connections=1))
    for member in group.members.values():
        group.take(member, Client())
    client = waits(group)
    adopt(book)
    assert not book.groups
    group.leave(member, Client())
    assert client.served == [member], "who waits is served all the same"


def test_a_client_that_spoke_before_a_reload_does_not_bring_the_old_route_back():
    book = a_book()
    old = a_route(BOTH)
    (group,) = adopt(book, old)
    decision = old.decide("a.b")
    new = a_route(BOTH[1:], balance="first")
    adopt(book, new)
    assert book.group(decision) is group and group.route is new and list(group.members) == BOTH[1:]
    adopt(book)
    late = book.group(decision)
    assert late is not group and list(late.members) == BOTH, "it is served"
    assert not book.groups, "and nobody else is led so"


# -- active checks -----------------------------------------------------------------------------


def test_checks_take_a_backend_down_and_bring_it_back():
    group = a_group(2, health="connect", health_fail=3, health_pass=2)
    one, two = group.members.values()
    check(group, two, "")
    check(group, one, "", "no", "no", "", "no", "no")
    assert not one.why, "in a row"
    check(group, one, "no")
    assert one.why == "no" and set(picks(group, 5)) == {two.target}
    check(group, one, "", "no", "")
    assert one.why, "in a row, too"
    check(group, one, "")
    assert not one.why and set(picks(group, 5)) == {one.target, two.target}
    assert one.results() == "+--+---+-++" and (one.checks_good, one.checks_bad) == (5, 6)


def test_no_client_is_sent_to_try_while_checks_do_that():
    clock = FakeClock()
    group = a_group(2, clock, health="connect")
    one, two = group.members.values()
    check(group, two, "")
    for take_down in (functools.partial(go_down, group, one), functools.partial(check, group, one, "no", "no", "no")):
        check(group, one, "", "", "")
        clock.jump(100)
        check(group, one, "", "")
        assert not one.why
        take_down()
        clock.jump(1000)
        assert set(picks(group, 20)) == {two.target} and not group.resting


def test_a_backend_whose_checks_pass_while_its_clients_fail_changes_once_in_fallback_interval(caplog):
    """Its health port is up, and its service is down."""
    caplog.set_level("INFO", "sniroute")
    clock = FakeClock()
    group = a_group(2, clock, health="connect", fallback_interval=30.0)
    bad, good = group.members.values()
    began, failures = clock.now, 0
    while clock.now < began + 300:
        for member in (bad, good):
            check(group, member, "")
        for _ in range(10):
            client = Client()
            if group.pick(client, "192.0.2.1") is bad:
                group.bad_news(bad, "it closed", False)
                failures += 1
        clock.jump(1)
    downs = [record.message for record in caplog.records if " is down" in record.message]
    assert 9 <= len(downs) <= 10, "once in 30 s"
    assert failures <= len(downs) + 2, "three failures the first time, one each time after"


def test_a_backend_whose_checks_fail_while_its_service_works_serves_where_no_other_is_left():
    """Its health port is down, and its service is up."""
    group = a_group(2, health="http:8008/")
    odd, good = group.members.values()
    check(group, good, "")
    check(group, odd, "", "HTTP 503", "HTTP 503", "HTTP 503")
    assert set(picks(group, 9)) == {good.target}
    check(group, good, "no", "no", "no")
    client = Client({good: "it refused"})
    assert group.pick(client, "192.0.2.1") is odd
    for _ in range(10):
        group.good_news(odd)
    assert odd.why == "HTTP 503", "clients do not bring it back: the operator has asked for checks"
    check(group, odd, "", "")
    assert set(picks(group, 9)) == {odd.target}


def test_failures_of_clients_bring_down_a_backend_that_checks_brought_back_as_before():
    clock = FakeClock()
    group = a_group(2, clock, health="connect")
    one, _ = group.members.values()
    check(group, one, "no", "no", "no", "", "")
    assert not one.why, "no rest, where only checks have failed"
    group.bad_news(one, "it refused", False)
    assert not one.why, "and one failure is not enough"
    go_down(group, one)
    check(group, one, "", "", "")
    assert one.why, "it rests"
    clock.jump(30)
    check(group, one, "")
    assert not one.why
    group.bad_news(one, "it refused", False)
    assert one.why, "one more is enough"


def test_news_of_a_backend_that_is_gone_changes_nothing():
    group = a_group(2, health="connect")
    gone, stays = group.members.values()
    have(group, [stays.target], health="connect")
    check(group, gone, "no", "no", "no", "")
    assert not gone.why and not gone.is_proven and not gone.checks_bad


def test_a_tunnel_or_a_program_beside_hosts_is_not_checked():
    targets = ["tcp:192.0.2.1:1", "unix:/run/db.sock", "cloudflared:db.example.com", "exec:/bin/cat"]
    for health, checked in (("connect", 2), ("postgres", 2), ("http:8008/", 1), ("passive", 0), ("off", 0)):
        group = a_group(targets=targets, health=health)
        assert [member.is_checked for member in group.members.values()] == [at < checked for at in range(4)]
    host, unix, tunnel, program = a_group(targets=targets, health="connect").members.values()
    assert {member.rank for member in (tunnel, program)} == {OWN} and host.rank == unix.rank == UNKNOWN
    group = a_group(2, FakeClock(), targets=targets, health="connect")
    tunnel = group.members[targets[2]]
    go_down(group, tunnel)
    assert list(group.resting) == [tunnel], "a client tries it"


def test_a_reload_that_turns_checks_on_or_off_keeps_who_is_down():
    clock = FakeClock()
    group = a_group(2, clock)
    down, good = group.members.values()
    go_down(group, down)
    have(group, [*group.members], health="connect")
    assert down.why and not group.resting and set(picks(group, 5)) == {good.target}
    clock.jump(30)
    check(group, down, "")
    have(group, [*group.members])
    assert down.why and list(group.resting) == [down]
    client = Client()
    assert group.pick(client, "192.0.2.1") is down and down.trial is client


def test_the_last_results_are_kept_and_no_more():
    group = a_group(1, health="connect")
    (member,) = group.members.values()
    check(group, member, *["", "no"] * 100)
    assert member.results() == "+-" * (STRIP // 2)


def test_a_reload_that_changes_the_check_begins_anew_with_what_is_proven():
    group = a_group(2, health="connect")
    replica, primary = group.members.values()
    check(group, replica, "")
    check(group, primary, "")
    have(group, [*group.members], health="connect", health_fail=5)
    assert set(picks(group, 4)) == {replica.target, primary.target}
    have(group, [*group.members], health="http:8008/primary")
    check(group, primary, "")
    assert set(picks(group, 4)) == {primary.target}, "the other one is not proven to be a primary"


@pytest.mark.parametrize("pattern, name", [
    ("db.example.com", "db.example.com"), ("*.example.com", "example.com"), ("**.example.com", "example.com"),
    ("*", NO_NAME), ("{service}.example.com", "example.com"), ("api-{a}.{b}-x.example.com", "example.com"),
    ("*.{a}.example.com", "example.com"), (":5433", ""),
])
def test_a_check_asks_for_what_all_names_of_a_route_end_with(pattern, name):
    book = a_book()
    (group,) = adopt(book, a_route(BOTH, pattern))
    group.options = group.options._replace(health="tls")
    assert Checked(group, group.members[BOTH[0]]).name == name


@pytest.mark.parametrize("send_proxy, preface", [
    ("as-received", b""), ("none", b""), ("v1", b"PROXY UNKNOWN\r\n"), ("v2", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"),
])
def test_a_check_says_the_proxy_header_that_the_backend_expects(send_proxy, preface):
    book = a_book()
    (group,) = adopt(book, a_route(BOTH)._replace(send_proxy=send_proxy))
    group.options = group.options._replace(health="tls")
    assert Checked(group, group.members[BOTH[0]]).preface == preface


# -- warm connections --------------------------------------------------------------------------


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop that a test turns; at the end it watches nothing, and nobody waits."""
    faults: list[Any] = []
    made = Loop(faults.append)
    yield made
    made.call(lambda: None)
    made.turn()
    watched = sum(callback is not sniroute_loop.ignore for callback in made.poller.callbacks.values())
    waiting = [item for queue in made.queues for item in queue.due if not isinstance(item, Penalty)]
    made.close()
    assert (watched, waiting, faults) == (1, [], []), "nothing but the loop's own pipe"


@pytest.fixture
def warm_book(loop) -> Iterator[Book]:
    book = a_book(loop)
    yield book
    book.close()


def sizes(group: Group) -> list[int]:
    """How many warm connections each backend is to have, in the next turn of the loop."""
    group.refresh()
    return [member.pool.size for member in group.members.values()]


@pytest.mark.parametrize("targets, warm, options, shares", [
    ([1, 2, 3], 6, {}, [2, 2, 2]), ([1, 2, 3], 7, {}, [3, 2, 2]), ([1, 2, 3], 2, {}, [1, 1, 0]),
    ([1, 2, 2], 6, {}, [2, 4]), ([1, 2, 3], 5, {"balance": "first"}, [5, 0, 0]),
    ([1, 2], 6, {"max_backend_connections": 2}, [2, 2]), ([1, 2], 4, {"balance": "hash"}, [2, 2]),
], ids=["even", "one more", "fewer than backends", "copies", "first", "a limit", "hash"])
def test_the_warm_connections_of_a_route_are_shared(warm_book, targets, warm, options, shares):
    (group,) = adopt(warm_book, a_route([f"tcp:192.0.2.{at}:1" for at in targets], warm=warm, **options))
    assert sizes(group) == shares


@pytest.mark.parametrize("balance", ["round-robin", "first"])
def test_only_backends_to_which_clients_are_led_have_warm_connections(warm_book, balance):
    (group,) = adopt(warm_book, a_route([f"tcp:192.0.2.{at}:1" for at in (1, 2, 3)], warm=6, balance=balance))
    group.clock = clock = FakeClock()
    one, two, three = group.members.values()
    go_down(group, one)
    assert sizes(group) == ([0, 3, 3] if balance == "round-robin" else [0, 6, 0])
    warm_book.drain("a.b", two.target, True)
    assert sizes(group) == [0, 0, 6]
    go_down(group, three)
    assert sizes(group) == [0, 0, 0], "none is good"
    clock.jump(30)
    for _ in range(2):
        group.good_news(one)
    assert sizes(group) == [6, 0, 0]
    warm_book.drain("a.b", two.target, False)
    assert sizes(group) == ([3, 3, 0] if balance == "round-robin" else [6, 0, 0])


def test_far_and_unproven_backends_have_no_warm_connections(loop):
    book = a_book(loop, ZONES)
    (group,) = adopt(book, a_route([f"tcp:{host}:1" for host in (NEAR, FAR, NEAR2)], warm=4, health="connect"))
    assert sizes(group) == [2, 1, 1], "nothing is known yet"
    check(group, member_of(group, FAR), "")
    assert sizes(group) == [0, 4, 0]
    check(group, member_of(group, NEAR), "")
    assert sizes(group) == [4, 0, 0]
    book.close()


def test_warm_connections_and_clients_together_keep_the_limit(warm_book):
    (group,) = adopt(warm_book, a_route(BOTH, warm=6, max_backend_connections=3))
    one, two = group.members.values()
    assert sizes(group) == [3, 3]
    clients = [Client() for _ in range(3)]
    for at, client in enumerate(clients):
        group.take(one, client)
        group.warmth.fit(one)  # as a client does once it has taken a warm connection, or has found none
        assert sizes(group) == [2 - at, 3]
    for at, client in enumerate(clients):
        group.leave(one, client)
        assert sizes(group) == [at + 1, 3]


class Crowd:
    """A far end, and how many connections it has."""

    def __init__(self, stack: contextlib.ExitStack, loop: Loop):
        self.loop = loop
        self.server = stack.enter_context(Server(echo))
        self.target = f"tcp:127.0.0.1:{self.server.address[1]}"

    def has(self, count: int, accepted: int = 0) -> None:
        """Turn until it has so many, and has had so many at least."""
        def do() -> bool:
            self.loop.call(lambda: None)
            self.loop.turn()
            return len(self.server.live) == count and self.server.accepted >= accepted
        wait_until(do, what=f"{count} connections")


@pytest.fixture
def crowds(loop) -> Iterator[Callable[[], Crowd]]:
    with contextlib.ExitStack() as stack:
        yield lambda: Crowd(stack, loop)


def test_a_reload_keeps_warm_connections_and_closes_those_that_nobody_wants(warm_book, crowds):
    one, two = crowds(), crowds()
    options = {"warm": 4, "connect_timeout": 2.0}
    adopt(warm_book, a_route([one.target, two.target], **options))
    one.has(2), two.has(2)
    for _ in range(50):
        adopt(warm_book, a_route([two.target, one.target], **options))
    assert (one.server.accepted, two.server.accepted) == (2, 2), "nothing has changed for them"
    (group,) = adopt(warm_book, a_route([two.target], **options))
    one.has(0), two.has(4)
    adopt(warm_book, a_route([one.target, two.target], **options, balance="first"))
    one.has(4), two.has(0)
    before = one.server.accepted
    adopt(warm_book, a_route([one.target, two.target], **options, balance="first", warm_order="fifo"))
    one.has(4, before + 4)
    assert one.server.accepted == before + 4, "made anew where an option of theirs changes"
    adopt(warm_book, a_route([one.target, two.target], connect_timeout=2.0))
    one.has(0), two.has(0)
    assert group.warmth is None and not any(member.pool for member in group.members.values())
    adopt(warm_book, a_route([one.target, two.target], **options))
    one.has(2), two.has(2)
    warm_book.drain("a.b", one.target, True)
    one.has(0), two.has(4)
    adopt(warm_book)
    two.has(0)


def test_warm_connections_end_with_a_route_for_which_clients_wait(warm_book, crowds):
    one = crowds()
    (group,) = adopt(warm_book, a_route([one.target], warm=2, max_backend_connections=2))
    one.has(2)
    (member,) = group.members.values()
    group.take(member, Client()), group.take(member, Client())
    waits(group)
    adopt(warm_book)
    one.has(0)


def test_reloads_leave_no_queues_behind(warm_book, crowds):
    one = crowds()
    for at in range(20):
        adopt(warm_book, a_route([one.target], warm=2, balance=[*WAYS][at % len(WAYS)]))
        if at == 0:
            before = len(warm_book.loop.queues), len(warm_book.loop.batches)
        adopt(warm_book)
    assert (len(warm_book.loop.queues), len(warm_book.loop.batches)) == before


def test_dials_that_fail_bring_a_backend_down_without_a_client(warm_book):
    (group,) = adopt(warm_book, a_route(BOTH, warm=2))
    one, two = group.members.values()
    for _ in range(3):
        one.pool.told("Connection refused")
    assert one.why == "Connection refused" and sizes(group) == [0, 2]
    assert one.failures == 3 and set(picks(group, 5)) == {two.target}


def test_a_thousand_backends_that_go_down_at_once_are_sorted_twice(warm_book, monkeypatch):
    (group,) = adopt(warm_book, a_route([f"tcp:192.0.2.{at % 250}:{at}" for at in range(1, 1001)], warm=10))
    sorts: list[None] = []
    reset = group.balancer.reset
    monkeypatch.setattr(group.balancer, "reset", lambda good: (sorts.append(None), reset(good)))
    for member in list(group.members.values())[1:]:
        go_down(group, member)
    assert sizes(group) == [10, *[0] * 999] and len(sorts) == 2


def test_a_name_that_turns_out_to_be_far_away_gets_no_warm_connection(loop, crowds):
    """That is learnt in the middle of a dial."""
    crowd = crowds()
    book = a_book(loop, own_zones(parse_zones("a=192.0.2.0/24"), "a", None))
    _, host, port = crowd.target.split(":")
    (group,) = adopt(book, a_route([f"tcp:db.example.com:{port}", f"tcp:{NEAR}:1"], warm=1, balance="first"))
    named, near = group.members.values()
    assert sizes(group) == [1, 0]
    book.targets.remember(named.decision, Resolved(((socket.AF_INET, (host, int(port))),), True, NEVER))
    loop.call(lambda: None)
    loop.turn()
    assert sizes(group) == [0, 1] and not named.pool.idle and not named.pool.dialling and not crowd.server.accepted
    book.close()


# -- whatever happens --------------------------------------------------------------------------


HOSTS = [NEAR, NEAR2, FAR, FAR2, "203.0.113.1", "2001:db8:a::1"]


class Life:
    """A group to which anything happens, in an order that dice choose; `holds` is what is true at each moment."""

    def __init__(self, seed: int):
        self.dice = random.Random(seed)
        self.clock = FakeClock()
        self.book = a_book(zones=ZONES)
        self.clients: list[Client] = []
        self.adopt()

    @property
    def group(self) -> Group:
        (group,) = self.book.groups.values()
        return group

    def adopt(self) -> None:
        """A reload."""
        dice = self.dice
        hosts = dice.choices(HOSTS, k=dice.randint(1, 6))
        targets = [f"tcp:[{host}]:1" if ":" in host else f"tcp:{host}:1" for host in hosts]
        self.book.targets.zones = dice.choice([ZONES, ZONES._replace(own="b"), None])
        adopt(self.book, a_route(targets, balance=dice.choice([*WAYS]), health=dice.choice(["passive", "connect", "off"]),
                                 max_backend_connections=dice.choice([None, 1, 2]), on_down=dice.choice(["keep", "cut"]),
                                 slow_start=dice.choice([0.0, 60.0])))
        self.group.clock = self.clock
        self.group.chance = dice.random

    def come(self) -> None:
        """A client comes, and some of the backends that it tries fail."""
        client = Client()
        client.group, group = self.group, self.group
        while True:
            try:
                member = group.pick(client, f"203.0.113.{self.dice.randint(1, 250)}")
            except LookupError:
                assert all(each in client.told_of or each.is_drained for each in group.members.values())
                return
            if member is None:
                assert not any(group.has_room(each) and group.suits(each, client.told_of)
                               for each in group.members.values()), "it waits only where nobody has room"
                group.waiting[client] = None
                self.clients.append(client)
                return
            assert member not in client.told_of and not member.is_drained
            assert group.members[member.target] is member and group.has_room(member)
            if member.why and member.trial is not client:
                assert all(each.why or each in client.told_of or each.is_drained or not group.has_room(each)
                           for each in group.members.values())
            group.take(member, client)
            if self.dice.random() < 0.6:
                client.served.append(member)
                self.clients.append(client)
                return
            is_trial = member.trial is client
            member.dialling -= 1
            group.leave(member, client)
            group.penalise(member)
            group.bad_news(member, "it refused", is_trial)
            client.told_of[member] = "no"

    def go(self) -> None:
        """A client leaves: one that waits, or one that was served."""
        if self.clients:
            client = self.clients.pop(self.dice.randrange(len(self.clients)))
            client.group.waiting.pop(client, None)
            if client.served:
                (member,) = client.served
                if self.dice.random() < 0.7:
                    client.group.good_news(member)
                member.dialling -= 1
                client.group.leave(member, client)

    def check(self) -> None:
        for member in list(self.group.members.values()):
            if member.is_checked:
                check(self.group, member, self.dice.choice(["", "", "no"]))

    def drain(self) -> None:
        self.book.drain("a.b", self.dice.choice([*self.group.members]), self.dice.random() < 0.4)

    def wait(self) -> None:
        self.clock.jump(self.dice.choice([1, 10, 40]))

    def step(self) -> None:
        act, = self.dice.choices([self.come, self.go, self.check, self.drain, self.wait, self.adopt],
                                 [50, 35, 10, 3, 5, 1])
        act()

    def holds(self) -> None:
        group = self.group
        for member in group.members.values():
            assert member.active >= 0 and member.dialling >= 0
            assert (member in group.resting) == (bool(member.why) and not member.is_checked)
            assert member.trial is None or member in group.resting or member.is_checked or not member.why
            if not group.is_stale:
                assert member.rank == group.rank(member)
        assert not set(group.resting) - set(group.members.values())
        untils = [member.until for member in group.resting]
        assert untils == sorted(untils), "the next to be tried comes first"
        for client in group.waiting:
            assert not client.served
            assert not any(group.has_room(each) and group.suits(each, client.told_of)
                           for each in group.members.values()), "nobody waits where there is room"


@pytest.mark.parametrize("seed", range(25))
def test_whatever_happens_nobody_waits_in_vain_and_nobody_is_led_astray(seed):
    life = Life(seed)
    for _ in range(600):
        life.step()
        life.holds()
    while life.clients:
        life.go()
        life.holds()
    assert not life.group.waiting and not any(member.active for member in life.group.members.values())
