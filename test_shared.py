"""Tests of sniroute_shared.py: registries that share a real Redis."""

from __future__ import annotations

import contextlib
import random
import signal
import statistics
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute_shared
from conftest import wait_until
from sniroute_claims import Verdict
from sniroute_loop import Loop
from sniroute_refusals import Failed
from sniroute_registry import from_text, to_text
from sniroute_resp import parse_url
from sniroute_shared import CHANNEL, PREFIX, Shared
from testbed.redis import RedisServer
from testbed.registry import ADMIN, BOB, DOMAIN, Served

SHOP = f"shop.{DOMAIN}"


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    shared_redis.tell("FLUSHALL")
    return shared_redis


@pytest.fixture
def shared(registry) -> Callable[..., Served]:
    """shared(server, **options of Served) -> a registry that has read all."""
    def make(server: RedisServer, wait: bool = True, **options: Any) -> Served:
        def store(loop: Loop) -> Shared:
            return Shared(parse_url(server.url), loop)
        made = registry(store=store, **options)
        if wait:
            wait_until(lambda: made.registry.table.frozen_since is None, what="Redis")
        return made
    return make


def lease(said: Any) -> dict[str, str]:
    return {"Sniroute_Lease": said.json["lease"]}


def knows(there: Served, key: str = SHOP) -> Any:
    return there.registry.table.find(key)


def test_a_claim_on_one_router_is_a_route_on_the_other_at_once(redis, shared):
    first, second = shared(redis), shared(redis)
    times = []
    for number in range(20):
        key = f"n{number}.{DOMAIN}"
        assert first.claim(f"n{number}").status == 201
        began = time.monotonic()
        wait_until(lambda: knows(second, key))
        times.append(time.monotonic() - began)
    assert statistics.median(times) < 0.1
    wait_until(lambda: len(second.moved) == 20)  # told a moment after it is known
    assert second.moved == [f"n{number}.{DOMAIN}" for number in range(20)]
    assert knows(second, f"n3.{DOMAIN}").lease == knows(first, f"n3.{DOMAIN}").lease


def test_all_that_may_be_done_on_one_is_seen_on_the_other(redis, shared):
    first, second = shared(redis), shared(redis)
    made = first.claim(ttl=30)
    wait_until(lambda: knows(second))
    assert second.ask("PUT", "/routes/shop", {"target": "tcp:192.0.2.9:1"}, **lease(made)).status == 200
    wait_until(lambda: knows(first).target == "tcp:192.0.2.9:1")
    before = knows(first).expires
    assert second.ask("POST", "/routes/shop/renew", {"ttl": 60}, **lease(made)).status == 200
    wait_until(lambda: knows(first).expires > before + 20)
    again = second.claim()
    assert (again.status, again.json["taken_over"]) == (200, True)
    wait_until(lambda: knows(first).lease == again.json["lease"])
    assert first.ask("POST", "/routes/shop/renew", **lease(made)).json["class"] == "stale"
    assert first.ask("DELETE", "/routes/shop", **lease(again)).status == 204
    wait_until(lambda: knows(second) is None)
    assert second.claim(token=BOB).json["class"] == "held"
    assert second.claim().status == 201
    wait_until(lambda: knows(first))


def test_the_last_claim_that_goes_is_gone_everywhere(redis, shared):
    first, second = shared(redis), shared(redis)
    made = first.claim()
    wait_until(lambda: knows(second))
    first.ask("DELETE", "/routes/shop", **lease(made))
    wait_until(lambda: not second.registry.table.live)


def test_of_many_that_want_one_name_on_several_routers_one_gets_it(redis, shared):
    routers = [shared(redis) for _ in range(3)]
    for round_ in range(10):
        name, statuses = f"n{round_}", []
        def claim(there: Served, token: str) -> None:
            statuses.append((there.claim(name, token=token, takeover=False).status, token))
        threads = [threading.Thread(target=claim, args=(there, token)) for there in routers for token in
                   ("alice-token", BOB, "admin-token")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(status for status, _ in statuses) == [201] + [409] * 8
        winner = next(token for status, token in statuses if status == 201).partition("-")[0].replace("admin", "root")
        wait_until(lambda: [knows(there, f"{name}.{DOMAIN}").owner for there in routers] == [winner] * 3)


def test_a_claim_that_is_not_renewed_ends_on_both_and_in_redis(redis, shared):
    first, second = shared(redis, hold="1ms"), shared(redis, hold="1ms")
    first.claim(ttl=5)
    wait_until(lambda: knows(second))
    left = redis.tell("PTTL", PREFIX + SHOP)
    assert 4000 < left <= 5001
    redis.tell("PEXPIRE", PREFIX + SHOP, 1)  # as after that time
    wait_until(lambda: redis.tell("EXISTS", PREFIX + SHOP) == 0)
    assert second.claim(token=BOB).status == 409, "by the clock of the router it lives"


def test_a_router_that_starts_knows_all_and_for_how_long(redis, shared):
    first = shared(redis)
    made = first.claim(ttl=60, allow=["192.0.2.0/24"], meta={"a": [1]})
    first.ask("DELETE", "/routes/gone", **lease(first.claim("gone")))
    first.close()
    second = shared(redis)
    claim = knows(second)
    assert (claim.lease, claim.allow, claim.meta) == (made.json["lease"], ("192.0.2.0/24",), {"a": [1]})
    assert 0 < claim.expires - second.registry.table.clock() <= 60
    assert second.ask("POST", "/routes/shop/renew", **lease(made)).status == 200
    assert second.claim("gone", token=BOB).json["class"] == "held"


def test_while_redis_is_away_names_are_routed_and_none_is_claimed(redis_server, shared):
    redis = redis_server("--appendonly", "no")
    first = shared(redis)
    made = first.claim(ttl=5)
    redis.stop()
    said = wait_until(lambda: (said := first.claim("other")).status == 503 and said)
    assert said.headers["Retry-After"] and said.json["class"] == "unavailable"
    wait_until(lambda: first.registry.table.frozen_since is not None)
    assert knows(first) and first.ask("GET", "/routes/shop").status == 200
    assert first.ask("POST", "/routes/shop/renew", **lease(made)).status == 503
    redis.start()  # empty
    wait_until(lambda: first.registry.table.frozen_since is None)
    assert knows(first), "it has a time to be renewed"
    assert first.ask("POST", "/routes/shop/renew", **lease(made)).status == 200
    assert redis.tell("EXISTS", PREFIX + SHOP) == 1, "and is there again"
    assert first.claim("other").status == 201


def test_until_redis_is_read_nobody_hears_that_a_claim_is_gone(redis_server, shared):
    """A router that has just started: an owner that believed it would claim anew, and void the lease that it has."""
    redis = redis_server("--appendonly", "yes", "--appendfsync", "always")
    made = shared(redis).claim(ttl=600)
    redis.process.send_signal(signal.SIGSTOP)
    try:
        second = shared(redis, wait=False)
        asked = [("GET", "/routes/shop"), ("GET", "/routes"), ("POST", "/routes/shop/renew"), ("DELETE", "/routes/shop")]
        said = [second.ask(*each, **lease(made)) for each in asked]
        said += [second.ask("POST", "/routes/shop/suspend", token=ADMIN)]
        said += [second.ask("PUT", "/routes/shop", {"target": "tcp:192.0.2.2:80"}, **lease(made))]
        assert [(each.status, each.json["class"], bool(each.headers["Retry-After"])) for each in said] \
            == [(503, "unavailable", True)] * 6
    finally:
        redis.process.send_signal(signal.SIGCONT)
    wait_until(lambda: second.registry.table.frozen_since is None)
    assert second.ask("GET", "/routes").json["routes"][0]["name"] == SHOP
    assert second.ask("POST", "/routes/shop/renew", **lease(made)).status == 200
    assert second.ask("GET", "/routes/other").status == 404, "now it is known"


def test_who_has_a_name_is_not_said_while_redis_is_away(redis_server, shared):
    redis = redis_server("--appendonly", "yes", "--appendfsync", "always")
    first, second = shared(redis), shared(redis)
    made = first.claim(ttl=600)
    wait_until(lambda: knows(second))
    redis.stop()
    wait_until(lambda: second.registry.table.frozen_since is not None)
    for said in (second.claim(token=BOB), second.claim(takeover=False), second.ask("GET", "/routes/other"),
                 second.ask("POST", "/routes/shop/renew", Sniroute_Lease="0" * 32)):
        assert (said.status, said.json["class"]) == (503, "unavailable")
    redis.start()
    wait_until(lambda: second.registry.table.frozen_since is None)
    assert second.claim(token=BOB).json["class"] == "other"
    assert second.ask("POST", "/routes/shop/renew", **lease(made)).status == 200


def test_a_redis_that_stands_still_is_away(redis_server, shared, monkeypatch):
    redis = redis_server()
    first = shared(redis)
    made = first.claim()
    redis.process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(sniroute_shared, "ASK_TIME", 0.2)
        assert first.claim("other").status == 503
    redis.process.send_signal(signal.SIGCONT)
    wait_until(lambda: first.claim("other").status in (200, 201))
    wait_until(lambda: first.registry.table.frozen_since is None)
    assert first.ask("POST", "/routes/shop/renew", **lease(made)).status == 200


@pytest.fixture
def quick(monkeypatch) -> Iterator[None]:
    """Sweeps that follow each other."""
    monkeypatch.setattr(sniroute_shared, "SWEEP", 0.05)
    monkeypatch.setattr(sniroute_shared, "GRACE_MIN", 0.0)
    yield


def test_what_the_channel_has_not_told_the_sweep_finds(redis, shared, quick):
    first, second = shared(redis), shared(redis)
    second.door.loop.call(second.store.subscription.close)
    wait_until(lambda: redis.tell("PUBSUB", "NUMSUB", CHANNEL)[1] == 1)
    made = first.claim()
    wait_until(lambda: knows(second))
    second.store.kept_until = 0.0
    first.ask("DELETE", "/routes/shop", **lease(made))
    wait_until(lambda: knows(second) is None)


def test_a_subscriber_that_is_killed_hears_again(redis, shared):
    first, second = shared(redis), shared(redis)
    redis.tell("CLIENT", "KILL", "TYPE", "pubsub")
    first.claim()
    wait_until(lambda: knows(second))
    wait_until(lambda: redis.tell("PUBSUB", "NUMSUB", CHANNEL)[1] == 2)
    first.claim("next")
    wait_until(lambda: knows(second, f"next.{DOMAIN}"))


def test_claims_that_somebody_has_flushed_are_gone_by_the_next_sweep_or_renewed(redis, shared, quick):
    first = shared(redis)
    kept, lost = first.claim("kept"), first.claim("lost")
    first.store.kept_until = 0.0
    redis.tell("FLUSHALL")
    wait_until(lambda: knows(first, f"lost.{DOMAIN}") is None)
    assert first.ask("POST", "/routes/lost/renew", **lease(lost)).status == 404
    assert first.claim("kept").status in (200, 201) and kept.status == 201


def test_what_is_no_claim_is_left_alone(redis, shared, caplog):
    redis.tell("SET", PREFIX + SHOP, "nonsense")
    redis.tell("SET", PREFIX + f"x.{DOMAIN}", '{"allow": null}', "PX", "100000")
    redis.tell("LPUSH", PREFIX + "list", "x")
    first = shared(redis)
    assert not first.registry.table.live
    redis.tell("PUBLISH", CHANNEL, "nonsense")
    redis.tell("PUBLISH", CHANNEL, "other 1000 {}")
    redis.tell("PUBLISH", CHANNEL, "other x y z")
    text = to_text(first.registry.table.claimed(Verdict("new"), SHOP, "alice", "tcp:192.0.2.1:80", 60.0, 0.0))
    redis.tell("PUBLISH", CHANNEL, f"other {'9' * 5000} {text}")
    redis.tell("PUBLISH", CHANNEL, f"other 1000 {'[' * 100000}")
    redis.tell("PUBLISH", CHANNEL, b"\xff \xff \xff")
    assert first.claim("fine").status == 201
    assert first.claim("x").status in (429, 503)
    assert not any("report it" in each.message for each in caplog.records)


def test_many_claims_are_read_in_pages(redis, shared, monkeypatch):
    monkeypatch.setattr(sniroute_shared, "PAGE", 10)
    first = shared(redis)
    for number in range(60):
        first.claim(f"n{number}")
    second = shared(redis)
    assert len(second.registry.table) == 60


def test_a_redis_that_may_forget_claims_is_warned_of(redis_server, shared, caplog):
    redis = redis_server("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    shared(redis)
    wait_until(lambda: any("maxmemory-policy allkeys-lru" in each.message for each in caplog.records))


def test_nothing_is_asked_of_redis_that_takes_rights(redis_server, shared):
    """No CONFIG, no keyspace notifications."""
    redis = redis_server("--user", "default", "on", "nopass", "~sniroute:*", "&sniroute:*", "+@all", "-config", "-@dangerous",
                         "+info", "+keys")
    first = shared(redis)
    assert first.claim().status == 201


# -- what comes late, or not at all ------------------------------------------------------------


def in_loop(there: Served, act: Callable[[], Any]) -> Any:
    """Have the registry's loop do this, and wait for what it returns."""
    done, results = threading.Event(), []
    there.door.loop.call(lambda: (results.append(act()), done.set()))
    assert done.wait(5)
    return results[0]


@contextlib.contextmanager
def standing_still(there: Served) -> Iterator[None]:
    """Its loop does nothing meanwhile."""
    go = threading.Event()
    there.door.loop.call(lambda: go.wait(10))
    try:
        yield
    finally:
        go.set()


def said(claim: Any, left: float) -> bytes:
    """What another router says of a claim."""
    return f"another {round(left * 1000)} {to_text(claim)}".encode()


def test_a_page_of_before_does_not_undo_what_the_channel_has_told_since(redis, shared):
    there = shared(redis)
    there.claim()
    newer = knows(there)._replace(lease="n" * 32, generation=9)

    def both() -> None:
        there.store._begin(False)  # what Redis says to that is what it has had before
        there.store.on_message(said(newer, 50.0))
    wait_until(lambda: not in_loop(there, lambda: there.store.asked and there.store.asked.clear()))
    in_loop(there, both)
    wait_until(lambda: not there.store.cursor)
    assert knows(there).lease == newer.lease
    in_loop(there, lambda: (there.store._begin(False), there.store.on_message(said(newer, 0.0))))
    wait_until(lambda: not there.store.cursor)
    assert knows(there) is None, "a claim that was just released does not come back"


@pytest.mark.parametrize("left", [0.0, 60.0])
def test_what_was_said_before_our_own_change_does_not_undo_it(redis, shared, left):
    """The channel is another connection than that of our questions: either may be the first to come."""
    there = shared(redis)
    old = there.claim()
    former = knows(there)
    new = there.claim(target="tcp:192.0.2.9:80")
    in_loop(there, lambda: there.store.on_message(said(former, left)))
    assert knows(there).lease == new.json["lease"] != old.json["lease"]
    in_loop(there, lambda: there.store.on_message(said(knows(there)._replace(target="tcp:192.0.2.1:80"), 60.0)))
    in_loop(there, lambda: None)
    time.sleep(0.05)  # for what Redis is asked now
    assert knows(there).target == "tcp:192.0.2.9:80"
    assert there.ask("POST", "/routes/shop/renew", **lease(new)).status == 200


def test_what_is_said_behind_our_own_change_counts(redis, shared):
    first, second = shared(redis), shared(redis)
    first.claim()
    wait_until(lambda: knows(second))
    newer = second.claim(target="tcp:192.0.2.9:80")
    wait_until(lambda: knows(first).lease == newer.json["lease"])
    second.ask("DELETE", "/routes/shop", **lease(newer))
    wait_until(lambda: knows(first) is None)


def test_a_lease_that_was_released_elsewhere_is_not_brought_back_by_a_renewal(redis, shared):
    first, second = shared(redis), shared(redis)
    made = first.claim()
    wait_until(lambda: knows(second))
    in_loop(second, second.store.subscription.close)
    assert first.ask("DELETE", "/routes/shop", **lease(made)).status == 204
    assert knows(second), "it has not heard of that"
    assert second.ask("POST", "/routes/shop/renew", **lease(made)).json["class"] == "gone"
    assert knows(first) is None and second.claim(token=BOB).json["class"] == "held"
    assert second.claim().status == 201 and first.claim().status == 200


@pytest.mark.parametrize("ask", [
    lambda there, made: there.ask("POST", "/routes/shop/renew", **lease(made)),
    lambda there, made: there.ask("POST", "/routes/shop/renew", {"ttl": 30}, **lease(made)),
    lambda there, made: there.ask("PUT", "/routes/shop", {"meta": {"a": 1}}, **lease(made)),
    lambda there, made: there.claim(target="tcp:192.0.2.9:80")], ids=["renewed", "another ttl", "changed", "claimed"])
def test_what_another_router_has_changed_is_not_undone_before_it_is_heard_of(redis, shared, ask):
    """The lease is the same, and the rest of the claim is not."""
    first, second = shared(redis), shared(redis)
    made = first.claim()
    wait_until(lambda: knows(second))
    in_loop(second, second.store.subscription.close)
    assert first.ask("PUT", "/routes/shop", {"target": "tcp:192.0.2.9:80"}, **lease(made)).status == 200
    assert first.ask("POST", "/routes/shop/suspend", token=ADMIN).status == 200
    assert not knows(second).suspended, "it has not heard of that"
    assert ask(second, made).status == 200
    assert knows(second).suspended and knows(second).target == "tcp:192.0.2.9:80"
    wait_until(lambda: knows(first)._replace(expires=0.0) == knows(second)._replace(expires=0.0))


def test_a_claim_whose_time_ran_out_in_an_outage_has_a_ttl_to_be_renewed(redis_server, shared, monkeypatch):
    """As after a Redis that stood still for longer than the ttl."""
    redis = redis_server()
    there = shared(redis, hold="600s")
    over, short = there.claim(ttl=60), there.claim("short", ttl=60)
    redis.tell("PEXPIRE", PREFIX + SHOP, 599_000)
    redis.tell("PEXPIRE", PREFIX + f"short.{DOMAIN}", 603_000)
    redis.process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(sniroute_shared, "SWEEP", 0.02)  # from now on: one before would end both claims
    with monkeypatch.context() as patch:
        patch.setattr(sniroute_shared, "ASK_TIME", 0.2)
        assert there.claim("other").status == 503
        wait_until(lambda: there.registry.table.frozen_since is not None)
    redis.process.send_signal(signal.SIGCONT)
    wait_until(lambda: there.registry.table.frozen_since is None)
    sweeps = redis.tell("INFO", "commandstats").count(b"cmdstat_scan")
    assert sweeps and knows(there)
    time.sleep(0.2)  # some sweeps
    for key in (SHOP, f"short.{DOMAIN}"):
        assert knows(there, key).expires > there.registry.table.clock() + 50, "a sweep does not take the time away"
    assert there.ask("POST", "/routes/shop/renew", **lease(over)).status == 200
    assert there.ask("POST", "/routes/short/renew", **lease(short)).status == 200
    assert redis.tell("PTTL", PREFIX + SHOP) > 650_000


def test_a_router_that_starts_lets_no_claim_live_longer_than_redis_says(redis, shared):
    """It knows of no outage: those that go on routing them end them at their time."""
    first = shared(redis, hold="600s")
    first.claim(ttl=60)
    redis.tell("PEXPIRE", PREFIX + SHOP, 603_000)
    second = shared(redis, hold="600s")
    assert 0 < knows(second).expires - second.registry.table.clock() <= 3


def test_what_was_released_or_taken_over_in_an_outage_is_not_kept(redis, shared):
    first, second = shared(redis), shared(redis)
    gone, other = first.claim(), first.claim("other")
    wait_until(lambda: knows(second, f"other.{DOMAIN}"))
    with standing_still(second):
        redis.tell("CLIENT", "KILL", "TYPE", "pubsub")
        redis.tell("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        wait_until(lambda: first.ask("DELETE", "/routes/shop", **lease(gone)).status == 204)
        taken = wait_until(lambda: (said := first.claim("other")).status == 200 and said)
    wait_until(lambda: knows(second) is None)
    wait_until(lambda: knows(second, f"other.{DOMAIN}").lease == taken.json["lease"] != other.json["lease"])


def test_a_release_without_a_hold_that_a_killed_subscriber_has_missed_is_found(redis, shared):
    first, second = shared(redis, hold="off"), shared(redis, hold="off")
    made = first.claim(ttl=60)
    wait_until(lambda: knows(second))
    second.store.kept_until = 0.0
    with standing_still(second):
        redis.tell("CLIENT", "KILL", "TYPE", "pubsub")
        assert first.ask("DELETE", "/routes/shop", **lease(made)).status == 204
    wait_until(lambda: knows(second) is None)


def test_a_sweep_that_breaks_off_at_its_last_page_lets_nothing_end(redis, shared):
    there = shared(redis)
    there.claim()

    def broken() -> Any:
        there.store.on_down(Failed("reset", "of the test"))
        there.store.on_up(None)
        there.store._on_page([b"0", [(PREFIX + SHOP).encode()]])
        there.store.redis.drop(Failed("reset", "of the test"))
        return there.registry.table.frozen_since
    assert in_loop(there, broken) is not None
    wait_until(lambda: there.registry.table.frozen_since is None)
    assert knows(there)


@pytest.mark.parametrize("refused, words", [("-subscribe", "does not tell of changes"), ("-scan", "does not tell what")])
def test_a_redis_that_refuses_to_tell_is_said_in_the_log(redis_server, shared, caplog, refused, words):
    redis = redis_server("--user", "default", "on", "nopass", "~*", "&*", "+@all", refused)
    there = shared(redis, wait=refused == "-subscribe")
    wait_until(lambda: any(words in each.message for each in caplog.records))
    assert there.claim().status == 201
    if refused == "-subscribe":
        assert there.registry.table.frozen_since is None


def test_a_refusal_to_tell_may_come_before_redis_is_known_to_be_there(redis_server, shared, caplog, monkeypatch):
    """Two connections: the one for the channel may be the quicker one."""
    on_up = Shared.on_up

    def late(store: Shared, server: Any) -> None:
        if store.subscription.failed is None:
            store.loop.call(lambda: late(store, server))
        else:
            on_up(store, server)

    monkeypatch.setattr(Shared, "on_up", late)
    there = shared(redis_server("--user", "default", "on", "nopass", "~*", "&*", "+@all", "-subscribe"))
    assert there.claim().status == 201
    assert sum("does not tell of changes" in each.message for each in caplog.records) == 1


def test_a_claim_with_no_end_and_one_of_another_kind_are_none(redis, shared):
    """PTTL -1 and -2; a value that a script cannot read."""
    there = shared(redis)
    there.claim()
    redis.tell("PERSIST", PREFIX + SHOP)
    redis.tell("SET", PREFIX + f"n.{DOMAIN}", "5", "PX", "100000")
    assert there.claim("n").status in (429, 503)
    assert there.claim().status == 200 and redis.tell("PTTL", PREFIX + SHOP) > 0


@pytest.mark.parametrize("seed, kills", [(1, 0), (2, 0), (3, 4)])
def test_routers_that_are_asked_all_at_once_agree_with_redis_in_the_end(redis, shared, seed, kills):
    """Without a sweep: what the channel tells, what is asked, and what was lost with a connection, is enough."""
    dice = random.Random(seed)
    routers = [shared(redis, hold="300s"), shared(redis, hold="300s")]
    for there, delay in zip(routers, (0.004, 0.02)):  # the channel is the slower one
        late = there.door.loop.queue(delay, lambda each: each[0](each[1]))
        subscription, hear = there.store.subscription, there.store.subscription.on_message
        subscription.on_message = lambda message, late=late, hear=hear: late.put((hear, message))
    keys = [f"n{number}.{DOMAIN}" for number in range(4)]
    asked, told = 0, []
    for round_ in range(60):
        for _ in range(10):
            there, key, owner = dice.choice(routers), dice.choice(keys), dice.choice(("alice", "bob"))
            registry, what, number = there.registry, dice.randrange(5), dice.randrange(100)
            asked += 1

            def act(registry=registry, key=key, owner=owner, what=what, number=number) -> None:
                live = registry.table.live.get(key)
                lease = live.lease if live is not None else "none"
                if what < 2:
                    registry.claim(key, owner, f"tcp:192.0.2.1:{number}", 60.0 + number, 300.0, told.append)
                elif what == 2:
                    registry.renew(key, owner, lease, 60.0 + number, told.append)
                elif what == 3:
                    registry.change(key, owner, lease, {"target": f"tcp:192.0.2.2:{number}"}, told.append)
                else:
                    registry.release(key, owner, lease, told.append)
            there.door.loop.call(act)
        if kills and round_ % (60 // kills) == 7:
            redis.tell("CLIENT", "KILL", "TYPE", dice.choice(("pubsub", "normal")), "SKIPME", "yes")
        wait_until(lambda: len(told) > asked - 30)
    wait_until(lambda: len(told) == asked)
    assert sum(result.passed for result in told) > asked / 5

    def differences() -> list[Any]:
        found = []
        for key in keys:
            text = redis.tell("GET", PREFIX + key)
            left = redis.tell("PTTL", PREFIX + key) / 1000
            kept = from_text(text, 0.0) if text is not None else None
            lives = kept is not None and left > kept.hold
            for there in routers:
                live = knows(there, key)
                if lives != (live is not None) or live is not None and (
                        live._replace(expires=0.0) != kept or
                        abs(live.expires - there.registry.table.clock() - left + kept.hold) > 1 and not kills):
                    found.append((routers.index(there), key, live, kept, left))
        return found
    wait_until(lambda: all(there.registry.table.frozen_since is None for there in routers))
    wait_until(lambda: not differences(), what="agreement")
