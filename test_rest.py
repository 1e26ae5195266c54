"""Tests of sniroute_rest.py: a registry that serves, and real clients."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from typing import Any

import pytest

import sniroute_registry
import sniroute_rest
from conftest import FakeClock, wait_until
from sniroute_claims import HELD_MIN, LINGER, WORDS
from sniroute_registry import DONE, UNAVAILABLE, Written
from sniroute_rest import ENDPOINTS, Bucket, describe
from testbed.registry import ADMIN, ALICE, BOB, DOMAIN, OWNERS, Late, owner
from testbed.web import Cut, Talk, request

SHOP = f"shop.{DOMAIN}"
PATHS = [(row.method, row.path.replace("{key}", "shop")) for row in ENDPOINTS]


def lease(said: Any) -> dict[str, str]:
    return {"Sniroute_Lease": said.json["lease"]}


# -- strangers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "", "x", ALICE + "x", ALICE[:-1], f"{ALICE} {ALICE}"])
@pytest.mark.parametrize("method, path", [*PATHS, ("GET", "/nothing"), ("PATCH", "/routes")])
def test_a_stranger_learns_nothing_and_claims_nothing(registry, method, path, token):
    there = registry()
    there.claim()
    said = there.ask(method, path, token=token)
    assert (said.status, said.headers["WWW-Authenticate"]) == (401, 'Bearer realm="sniroute registry"')
    assert said.headers["Content-Type"] == "application/problem+json"
    assert said.json["detail"] == "the token is missing or wrong" and SHOP not in said.body.decode()
    assert [claim.key for claim in there.registry.table.page()] == [SHOP]


def test_many_wrong_tokens_are_told_to_wait_and_fill_no_log(registry, monkeypatch, caplog):
    monkeypatch.setattr(sniroute_rest, "STRANGERS", 5.0)
    there = registry(clock=FakeClock())
    with Talk_of(there) as client:
        statuses = []
        for number in range(30):
            client.say(head("GET", "/routes", f"wrong-{number}"))
            statuses.append(client.answer().status)
    assert statuses == [401] * 10 + [429] * 20
    assert there.ask("GET", "/routes", token="wrong").headers["Retry-After"] == "1"
    assert there.claim().status == 201, "owners are not held up by that"
    assert sum("without a token" in record.message for record in caplog.records) == 1


def head(method: str, path: str, token: str) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n".encode()


def Talk_of(there: Any) -> Talk:
    from conftest import connect
    return Talk(connect(there.address))


@pytest.mark.parametrize("fields, status", [
    ({"Host": "evil.example"}, 421), ({"Host": "registry.example.com"}, 421), ({"Host": "localhost"}, 200),
    ({"Origin": "http://localhost"}, 403), ({"Origin": "null"}, 403), ({"Sec_Fetch_Site": "cross-site"}, 403),
    ({"Sec_Fetch_Site": "same-origin"}, 403), ({"Sec_Fetch_Site": "none"}, 200), ({"Host": "a b"}, 400)])
def test_no_page_of_a_browser_asks_here(registry, fields, status):
    said = registry().ask("GET", "/routes", **fields)
    assert said.status == status
    assert not any(name.lower().startswith("access-control") for name in said.headers)


def test_a_preflight_is_refused(registry):
    assert registry().ask("OPTIONS", "/routes", token=None, Origin="http://evil.example").status == 403


# -- claims ------------------------------------------------------------------------------------


def test_a_ttl_may_be_said_back_as_it_was_shown(registry):
    there = registry()
    assert there.claim(ttl=there.claim().json["ttl"]).status == 200


def test_a_claim_has_all_that_its_owner_needs(registry):
    there = registry()
    said = there.claim(ttl=30, allow=["192.0.2.7"], http="forward", meta={"version": "1"})
    assert said.status == 201
    claim = said.json
    assert (claim["name"], claim["owner"], claim["target"], claim["ttl"]) == (SHOP, "alice", "tcp:192.0.2.1:80", 30)
    assert re.fullmatch("[0-9a-f]{32}", claim["id"]) and re.fullmatch("[0-9a-f]{32}", claim["lease"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", claim["expires_at"])
    assert (claim["allow"], claim["http"], claim["meta"]) == (["192.0.2.7/32"], "forward", {"version": "1"})
    assert there.moved == [SHOP]
    shown = there.ask("GET", "/routes/shop").json
    assert shown == {key: value for key, value in claim.items() if key != "lease"} | {"expires_at": shown["expires_at"]}


@pytest.mark.parametrize("path", ["shop", SHOP, SHOP.upper() + ".", "s%68op", "uuid:ID"])
def test_the_ways_to_name_a_claim(registry, path):
    there = registry()
    made = there.claim()
    assert there.ask("GET", f"/routes/{path.replace('ID', made.json['id'])}").json["name"] == SHOP
    assert there.ask("DELETE", f"/routes/{path.replace('ID', made.json['id'])}", **lease(made)).status == 204
    assert there.ask("GET", "/routes/shop").status == 404 and there.moved == [SHOP, SHOP]


def test_a_random_name_is_nobodys(registry):
    names = {registry().claim(None).json["name"] for _ in range(3)}
    assert len(names) == 3 and all(re.fullmatch(rf"[0-9a-z]{{10}}\.{DOMAIN}", name) for name in names)


def test_the_same_owner_takes_over_and_the_old_lease_is_void(registry):
    there = registry()
    first, second = there.claim(), there.claim(target="tcp:192.0.2.2:80")
    assert (second.status, second.json["taken_over"], second.json["id"]) == (200, True, first.json["id"])
    assert second.json["generation"] > first.json["generation"]
    for method, path in (("POST", "/routes/shop/renew"), ("PUT", "/routes/shop"), ("DELETE", "/routes/shop")):
        said = there.ask(method, path, **lease(first))
        assert (said.status, said.json["class"]) == (409, "stale")
        assert there.ask(method, path).status == 428
    assert there.ask("POST", "/routes/shop/renew", {"ttl": 90}, **lease(second)).json["ttl"] == 90
    said = there.claim(takeover=False)
    assert (said.status, said.json["class"]) == (409, "own")


@pytest.mark.parametrize("name, word", [("shop", "other"), ("www", "reserved"), ("configured", "configured"),
                                        ("held", "held")])
def test_who_comes_too_late_hears_why(registry, name, word):
    there = registry()
    there.claim()
    there.ask("DELETE", "/routes/held", **lease(there.claim("held")))
    said = there.claim(name, token=BOB)
    assert (said.status, said.json["class"]) == (409, word)
    assert ("free_at" in said.json) == (word in ("other", "held")) and "alice" not in said.body.decode()


def test_a_claim_of_another_is_as_one_that_is_not_there(registry):
    there = registry()
    made = there.claim()
    for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("POST", "/renew")):
        theirs = there.ask(method, f"/routes/shop{path}", token=BOB, **lease(made))
        nobodys = there.ask(method, f"/routes/shup{path}", token=BOB, **lease(made))
        assert theirs.status == nobodys.status == 404
        assert theirs.json["detail"].replace("shop", "shup") == nobodys.json["detail"]
    assert there.ask("GET", "/routes", token=BOB).json == {"routes": [], "next": None}


@pytest.mark.parametrize("body, fields", [
    (b"", {""}), (b"[]", {""}), (b"{", {""}), (b"\xff", {""}), (b"[" * 8000, {""}), ({}, {"name", "target"}),
    ({"name": "a", "port": 1, "target": "x"}, {"name", "port", "target"}),
    ({"name": "-a", "target": "tcp:192.0.2.1:80", "ttl": 0, "meta": 1, "x": 1}, {"name", "ttl", "meta", "x"}),
])
def test_each_field_that_is_wrong_has_its_sentence(registry, body, fields):
    said = registry().ask("POST", "/routes", body)
    assert (said.status, said.json["class"], said.json["status"]) == (400, "fault", 400)
    assert {error["field"] for error in said.json["errors"]} == fields
    assert all(error["detail"] for error in said.json["errors"])


@pytest.mark.parametrize("target, status", [
    ("tcp:192.0.2.1:80", 201), ("tcp:198.51.100.1:80", 403), ("tcp:127.0.0.1:80", 403),
    ("tcp:[::ffff:127.0.0.1]:80", 403), ("tcp:169.254.169.254:80", 403), ("exec:sh", 403), ("unix:/x", 403),
    ("tcp:somewhere.example.com:80", 201)])
def test_an_owner_reaches_only_what_it_may(registry, target, status):
    assert registry().claim(target=target).status == status


def test_a_body_that_is_too_long_is_refused_before_it_is_read(registry):
    there = registry()
    with Talk_of(there) as client:
        client.say(head("POST", "/routes", ALICE).replace(b"\r\n\r\n", b"\r\nContent-Length: 8193\r\n\r\n"))
        assert client.answer().status == 413
    assert there.ask("GET", "/routes", b"x").status == 413


def test_so_many_names_and_no_more(registry):
    there = registry(owners={**OWNERS, "bob": owner("bob", BOB, max_names=2)})
    assert [there.claim(name, token=BOB).status for name in ("a", "b", "c", "a")] == [201, 201, 403, 200]


def test_who_asks_too_often_is_told_to_wait(registry):
    there = registry(clock=FakeClock(), owners={**OWNERS, "bob": owner("bob", BOB, max_names=1)})
    statuses = [there.ask("GET", "/routes", token=BOB) for _ in range(30)]
    assert [said.status for said in statuses[:21]] == [200] * 21 and statuses[-1].status == 429
    assert int(statuses[-1].headers["Retry-After"]) >= 1
    assert there.claim().status == 201, "another owner is not held up"


def test_a_bucket():
    bucket = Bucket(10, 0.0)
    assert [bucket.take(0.0) for _ in range(20)] == [0.0] * 20
    assert bucket.take(0.0) == pytest.approx(0.1)
    assert bucket.take(0.1) == 0.0 and bucket.take(0.1) > 0
    assert [bucket.take(1000.0) for _ in range(21)][-1] > 0


def test_pages_in_the_order_of_names(registry):
    there = registry()
    for name in ("b", "a", "d", "c"):
        there.claim(name)
    there.claim("e", token=BOB)
    page = there.ask("GET", "/routes?limit=3").json
    assert [claim["name"][0] for claim in page["routes"]] == ["a", "b", "c"] and page["next"] == f"c.{DOMAIN}"
    page = there.ask("GET", f"/routes?limit=3&after={page['next']}").json
    assert [claim["name"][0] for claim in page["routes"]] == ["d"] and page["next"] is None
    everybody = there.ask("GET", "/routes", token=ADMIN).json["routes"]
    assert [claim["owner"] for claim in everybody] == ["alice"] * 4 + ["bob"]
    assert all("lease" not in claim for claim in everybody)
    assert len(there.ask("GET", "/routes?owner=bob&prefix=e", token=ADMIN).json["routes"]) == 1


@pytest.mark.parametrize("query, status", [("owner=bob", 403), ("limit=0", 400), ("limit=x", 400), ("limit=1001", 400),
                                           ("x=1", 400), ("limit=1&limit=2", 400), ("owner=alice", 200)])
def test_what_a_page_may_be(registry, query, status):
    assert registry().ask("GET", f"/routes?{query}").status == status


def test_a_change_leads_elsewhere(registry):
    there = registry()
    made = there.claim()
    said = there.ask("PUT", "/routes/shop", {"target": "tcp:192.0.2.9:81", "meta": {"a": 1}}, X_Lease=made.json["lease"])
    assert (said.status, said.json["target"], said.json["meta"], said.json["lease"]) == (
        200, "tcp:192.0.2.9:81", {"a": 1}, made.json["lease"])
    assert there.ask("PUT", "/routes/shop", {"name": "x"}, **lease(made)).status == 400
    assert there.ask("PUT", "/routes/shop", {"target": "tcp:198.51.100.1:1"}, **lease(made)).status == 403


def test_an_admin_needs_no_lease_and_suspends(registry):
    there = registry()
    there.claim()
    assert there.ask("POST", "/routes/shop/suspend").status == 403
    assert there.ask("POST", "/routes/shop/suspend", token=ADMIN).json["suspended"] is True
    assert there.claim().json["suspended"] is True, "also when it is claimed again"
    said = there.ask("POST", "/routes/shop/resume", token=ADMIN)
    assert said.json["suspended"] is False and "lease" not in said.json
    assert there.ask("DELETE", "/routes/shop?cut=1", token=ADMIN).status == 204 and there.cuts == [SHOP]
    assert there.ask("DELETE", "/routes/shop", token=ADMIN).status == 404


def test_ports_are_claimed_as_names_are(registry):
    there = registry()
    there.ports["tcp:49001"] = "port 49001: address in use"
    def port(number: Any, **more: Any) -> Any:
        return there.ask("POST", "/routes", {"port": number, "target": "tcp:192.0.2.1:80", **more})
    made = port(49000)
    assert (made.status, made.json["name"]) == (201, "tcp:49000")
    assert there.ask("GET", "/routes/tcp:49000").json["id"] == made.json["id"]
    said = port(49001)
    assert said.status == 409 and "address in use" in said.json["detail"]
    assert port(80).status == 400 and port(49002, http="forward").status == 400
    assert re.fullmatch("tcp:4900[2-9]", port(None).json["name"])
    for number in range(2, 10):
        there.ports[f"tcp:4900{number}"] = "address in use"
    assert port(None).status == 409
    assert there.ask("POST", "/routes/tcp:49000/renew", **lease(made)).status == 200


# -- the end -----------------------------------------------------------------------------------


def test_a_claim_that_is_not_renewed_ends_and_the_router_hears(registry):
    clock = FakeClock()
    there = registry(clock=clock)
    made = there.claim(ttl=10)
    clock.jump(9)
    assert there.ask("POST", "/routes/shop/renew", **lease(made)).status == 200
    clock.jump(9.9)
    assert there.ask("GET", "/routes/shop").status == 200
    clock.jump(0.2)
    said = there.ask("POST", "/routes/shop/renew", **lease(made))
    assert (said.status, said.json["class"]) == (404, "gone") and "claim it again" in said.json["detail"]
    assert there.claim(token=BOB).json["class"] == "held"
    assert there.claim().status == 201


def test_a_claim_lives_as_long_as_its_connection(registry):
    clock = FakeClock()
    there = registry(clock=clock)
    body = {"name": "shop", "target": "tcp:192.0.2.1:80", "ttl": 10, "while_connected": True}
    with there.talk("POST", "/routes", body) as client:
        made = json.loads(client.answer().body)
        for _ in range(5):
            clock.jump(9)
            wait_until(lambda: there.registry.table.live[SHOP].expires > clock() + 9, what="a renewal")
        client.say(head("GET", "/routes/shop", ALICE))
        assert json.loads(client.answer().body)["id"] == made["id"]
    wait_until(lambda: there.registry.table.live[SHOP].ttl == 5)
    clock.jump(5.1)
    wait_until(lambda: SHOP not in there.registry.table.live)


def test_a_claim_that_was_taken_over_is_not_ended_by_the_old_connection(registry):
    there = registry()
    body = {"name": "shop", "target": "tcp:192.0.2.1:80", "while_connected": True}
    with there.talk("POST", "/routes", body) as old, there.talk("POST", "/routes", body) as new:
        old.answer(), new.answer()
        with there.talk("POST", "/routes", body) as newest:
            newest.answer()
            old.sock.close()
            wait_until(lambda: len(there.gate.callers) == 2)
            assert there.registry.table.live[SHOP].ttl == 60


def test_a_stream_with_the_lease_keeps_a_claim_too(registry):
    there = registry()
    with there.talk("POST", "/routes", {"name": "shop", "target": "tcp:192.0.2.1:80", "while_connected": True}) as first:
        made = json.loads(first.answer().body)
        with there.talk("GET", "/events", None, ALICE, f"Sniroute-Lease: {made['lease']}") as second:
            second.head()
            wait_until(lambda: there.rest.attached[SHOP][1] in there.rest.streams)
            first.sock.close()
            wait_until(lambda: len(there.gate.callers) == 1)
            assert there.registry.table.live[SHOP].ttl == 60
        wait_until(lambda: there.registry.table.live[SHOP].ttl == 5)


@pytest.mark.parametrize("comes_again", [False, True])
def test_a_claim_whose_connection_ends_while_the_store_is_away_does_not_live_for_its_ttl(registry, comes_again):
    there = registry(store=lambda loop: Late())
    body = {"name": "shop", "target": "tcp:192.0.2.1:80", "ttl": 3600, "while_connected": True}
    with there.talk("POST", "/routes", body) as client:
        wait_until(lambda: there.store.orders)
        in_loop(there, lambda: there.store.orders.pop().done(DONE))
        made = json.loads(client.answer().body)
    wait_until(lambda: there.store.orders)
    with there.talk("GET", "/events", None, ALICE, f"Sniroute-Lease: {made['lease']}") if comes_again else \
            contextlib.nullcontext():
        wait_until(lambda: not comes_again or there.rest.attached)
        in_loop(there, lambda: there.store.orders.pop().done(Written(UNAVAILABLE)))
        if comes_again:
            in_loop(there, there.rest.tick)
            assert not there.store.orders and there.registry.table.live[SHOP].ttl == 3600, "another one keeps it"
            return
        order = wait_until(lambda: there.store.orders)[0]
    assert order.claim.ttl == LINGER
    in_loop(there, lambda: order.done(DONE))
    in_loop(there, there.rest.tick)
    assert len(there.store.orders) == 1 and there.registry.table.live[SHOP].ttl == LINGER


def test_an_owner_that_is_gone_loses_its_claims(registry, caplog):
    there = registry()
    made, other = there.claim(), there.claim("x", token=BOB)
    done = threading.Event()
    there.door.loop.call(lambda: (there.rest.adopt(there.rules, {"bob": OWNERS["bob"]}), done.set()))
    assert done.wait(5)
    assert there.ask("POST", "/routes/shop/renew", **lease(made)).status == 401
    assert there.ask("POST", "/routes/x/renew", token=BOB, **lease(other)).status == 200
    assert there.claim(token=BOB).status == 201, "its names are free at once"
    assert any("owner alice is gone from the settings, and with it 1 claims" in each.message for each in caplog.records)


def in_loop(there: Any, act: Any) -> None:
    """Have the registry's loop do this, and wait for it."""
    done = threading.Event()
    there.door.loop.call(lambda: (act(), done.set()))
    assert done.wait(5)


NARROWER = {"other": {"alice": owner("alice", ALICE, names=(f"other.{DOMAIN}",))}, "gone": {"bob": OWNERS["bob"]}}


@pytest.mark.parametrize("settings, status", [("other", 403), ("gone", 401), ("the same", 201)])
def test_what_a_reload_does_not_allow_is_not_claimed_while_the_store_is_asked(registry, settings, status):
    there = registry(store=lambda loop: Late())
    with there.talk("POST", "/routes", {"name": "shop", "target": "tcp:192.0.2.1:80"}) as client:
        wait_until(lambda: there.store.orders)
        in_loop(there, lambda: there.rest.adopt(there.rules._replace(ttl=9.0), NARROWER.get(settings, OWNERS)))
        in_loop(there, lambda: there.store.orders.pop().done(DONE))
        assert client.answer().status == status
    assert (there.registry.table.find(SHOP) is not None) == (status == 201)
    assert [order.what for order in there.store.orders] == ["released"] * (status != 201), "the store has it no more"


@pytest.mark.parametrize("narrower, status", [(True, 403), (False, 200)])
def test_what_a_reload_does_not_allow_is_not_changed_while_the_store_is_asked(registry, narrower, status):
    there = registry(store=lambda loop: Late())
    with there.talk("POST", "/routes", {"name": "shop", "target": "tcp:192.0.2.1:80"}) as client:
        wait_until(lambda: there.store.orders)
        in_loop(there, lambda: there.store.orders.pop().done(DONE))
        made = json.loads(client.answer().body)
    with there.talk("PUT", "/routes/shop", {"target": "tcp:192.0.2.1:90"}, ALICE,
                    f"Sniroute-Lease: {made['lease']}") as client:
        wait_until(lambda: there.store.orders)
        rules = there.rules._replace(target_ports=(80, 80 if narrower else 90))
        in_loop(there, lambda: there.rest.adopt(rules, OWNERS))
        in_loop(there, lambda: there.store.orders.pop().done(DONE))
        assert client.answer().status == status
    assert (there.registry.table.find(SHOP) is None) == narrower


@pytest.mark.parametrize("settings, status", [("other", 403), ("gone", 401), ("the same", 201)])
def test_a_body_that_comes_behind_a_reload_is_held_against_the_settings_of_then(registry, settings, status):
    there = registry()
    body = json.dumps({"name": "shop", "target": "tcp:192.0.2.1:80"}).encode()
    with Talk_of(there) as client:
        client.say(request("POST", "/routes", f"Authorization: Bearer {ALICE}", f"Content-Length: {len(body)}",
                           host="localhost"))
        wait_until(lambda: any(caller.plan for caller in list(there.gate.callers)))
        in_loop(there, lambda: there.rest.adopt(there.rules._replace(ttl=9.0), NARROWER.get(settings, OWNERS)))
        client.say(body)
        assert client.answer().status == status
    assert (SHOP in there.registry.table.live) == (status == 201) and len(there.moved) == (status == 201)


# -- events ------------------------------------------------------------------------------------


def events(client: Talk, count: int) -> list[tuple[str, str, Any]]:
    """The next ones: id, what, data."""
    found: list[tuple[str, str, Any]] = []
    while len(found) < count:
        lines = dict(line.partition(": ")[::2] for line in client.until(b"\n\n").decode().strip().split("\n")
                     if not line.startswith(":"))
        if "event" in lines:
            found.append((lines["id"], lines["event"], json.loads(lines["data"])))
    return found


def test_events_come_as_they_happen_and_one_sees_ones_own(registry):
    there = registry()
    with there.talk("GET", "/events") as alice, there.talk("GET", "/events", None, ADMIN) as root:
        for client in (alice, root):
            assert client.head().get("Content-Type") == "text/event-stream"
            assert client.until(b"\n\n") == b"retry: 2000\n\n" and client.until(b"\n\n").startswith(b": ")
        theirs, made = there.claim("x", token=BOB), there.claim()
        there.ask("POST", "/routes/shop/renew", **lease(made))
        there.ask("PUT", "/routes/shop", {"target": "tcp:192.0.2.2:80"}, **lease(made))
        there.ask("DELETE", "/routes/shop", **lease(made))
        there.ask("DELETE", "/routes/x", token=BOB, **lease(theirs))
        heard = events(alice, 4)
        assert [(what, data["name"]) for _, what, data in heard] == [
            (what, SHOP) for what in ("claimed", "renewed", "changed", "released")]
        assert all("lease" not in data for _, _, data in heard)
        assert [what for _, what, _ in events(root, 6)] == ["claimed", "claimed", "renewed", "changed", "released",
                                                            "released"]


def test_who_comes_again_misses_nothing(registry, monkeypatch):
    monkeypatch.setattr(sniroute_registry, "EVENTS_MAX", 5)
    there = registry()
    there.claim("a")
    with there.talk("GET", "/events") as client:
        client.head()
        there.claim("b")
        ((last, _, _),) = events(client, 1)
    for name in ("c", "d", "e"):
        there.claim(name)
    with there.talk("GET", "/events", None, ALICE, f"Last-Event-ID: {last}") as client:
        client.head()
        assert [data["name"][0] for _, _, data in events(client, 3)] == ["c", "d", "e"]
    for name in "fghijk":
        there.claim(name)
    for last_id in (last, "nonsense", "other-3", f"{there.rest.epoch}-999999", f"{there.rest.epoch}-"):
        with there.talk("GET", "/events", None, ALICE, f"Last-Event-ID: {last_id}") as client:
            client.head()
            ((number, what, _),) = events(client, 1)
            assert (number, what) == (f"{there.rest.epoch}-{there.registry.events.number}", "reset")


def test_a_reader_that_never_reads_is_dropped_and_holds_up_nobody(registry):
    """Some kernels take 32 MiB for it first."""
    there = registry(owners={**OWNERS, "alice": owner("alice", ALICE, max_names=5000)})  # who may ask that often
    with there.talk("GET", "/events") as client:
        client.head()
        wait_until(lambda: there.rest.streams)
        (caller,) = there.rest.streams
        while there.rest.streams:
            there.door.loop.call(lambda: caller.push(b":" * 60000))
            assert there.claim().status in (200, 201)
        with pytest.raises(Cut):
            client.exactly(1 << 30)


def test_a_stream_is_not_silent(registry, monkeypatch):
    monkeypatch.setattr(sniroute_rest, "QUIET", 0.05)
    with registry().talk("GET", "/events") as client:
        client.head()
        for _ in range(5):
            assert client.until(b"\n\n")


def test_so_many_streams_and_no_more(registry, monkeypatch):
    monkeypatch.setattr(sniroute_rest, "STREAMS_MAX", 1)
    there = registry()
    with there.talk("GET", "/events") as client:
        client.head()
        assert there.ask("GET", "/events").status == 429
        with there.talk("GET", "/events", None, BOB) as other:
            assert other.head().status == 200
    wait_until(lambda: not there.rest.streams)
    with there.talk("GET", "/events") as client:
        assert client.head().status == 200


# -- the description ---------------------------------------------------------------------------


def test_the_description_is_that_of_the_code(registry):
    there = registry()
    assert there.ask("GET", "/openapi.json").json == describe()
    told = describe()
    assert {(method.upper(), path) for path, row in told["paths"].items() for method in row} == {
        (row.method, row.path) for row in ENDPOINTS}
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(told)))
    assert references == told["components"]["schemas"].keys()
    assert told["components"]["schemas"]["Wish"]["properties"].keys() == sniroute_rest_fields()
    made = there.claim().json
    assert made.keys() <= told["components"]["schemas"]["Claim"]["properties"].keys()
    problem = there.claim("www", token=BOB).json
    assert problem.keys() <= told["components"]["schemas"]["Problem"]["properties"].keys()


def sniroute_rest_fields() -> set[str]:
    from sniroute_owners import FIELDS
    return set(FIELDS)


def test_no_word_of_a_verdict_is_without_a_status(registry):
    assert {word.status for word in WORDS.values()} <= {200, 201, 400, 403, 404, 409, 428}
    statuses = {status for row in ENDPOINTS for status in row.statuses}
    assert {word.status for word in WORDS.values()} - {403} <= statuses


def test_a_path_for_another_method(registry):
    said = registry().ask("PATCH", "/routes/shop")
    assert (said.status, said.headers["Allow"]) == (405, "GET, PUT, DELETE")
    assert registry().ask("GET", "/nothing").status == 404
    assert registry().ask("GET", "/audit", token=ADMIN).status == 404


# -- a store that is late ----------------------------------------------------------------------

WHILE = {"name": "shop", "target": "tcp:192.0.2.1:80", "ttl": 10, "while_connected": True}


def late(there: Any, said: Written = DONE) -> None:
    """Have the store answer the next one."""
    order = wait_until(lambda: there.store.orders and there.store.orders.pop(0))
    there.door.loop.call(lambda: order.done(said))


def test_a_claim_whose_client_left_before_it_was_written_is_not_renewed_for_ever(registry):
    clock = FakeClock()
    there = registry(store=lambda loop: Late(), clock=clock)
    with there.talk("POST", "/routes", WHILE):
        wait_until(lambda: there.store.orders)
    wait_until(lambda: not there.gate.callers)
    late(there)  # the claim
    late(there)  # its last renewal
    wait_until(lambda: there.registry.table.live[SHOP].ttl == 5)
    assert there.rest.attached == {}
    clock.jump(5.1)
    wait_until(lambda: SHOP not in there.registry.table.live)


def test_a_claim_that_is_written_when_its_owner_is_gone_ends(registry):
    there = registry(store=lambda loop: Late())
    with there.talk("POST", "/routes", WHILE) as client:
        wait_until(lambda: there.store.orders)
        done = threading.Event()
        there.door.loop.call(lambda: (there.rest.adopt(there.rules, {"bob": OWNERS["bob"]}), done.set()))
        assert done.wait(5)
        late(there)
        client.answer()
        wait_until(lambda: there.store.orders)
        assert there.store.orders[0].claim is None and SHOP not in there.registry.table.live
        assert SHOP not in there.registry.table.held and there.rest.attached == {}


def test_so_many_claims_at_once_are_no_more_than_an_owner_may_have(registry):
    there = registry(store=lambda loop: Late(), owners={"alice": owner("alice", ALICE, max_names=2)})
    clients = [there.talk("POST", "/routes", {"name": f"n{number}", "target": "tcp:192.0.2.1:80"})
               for number in range(5)]
    wait_until(lambda: len(there.store.orders) == 2)
    late(there), late(there)
    assert sorted(client.answer().status for client in clients) == [201, 201, 403, 403, 403]
    for client in clients:
        client.sock.close()


def test_a_client_that_left_before_its_stream_began_takes_no_place(registry):
    """It has asked for something else first, and closed without reading."""
    there = registry()
    go = threading.Event()
    there.door.loop.call(lambda: go.wait(5))
    for _ in range(3):
        client = Talk_of(there)
        client.say(head("GET", "/routes", ALICE) + head("GET", "/events", ALICE))
        client.sock.close()
    go.set()
    wait_until(lambda: not there.gate.callers)
    with there.talk("GET", "/events") as client:
        client.head()
        wait_until(lambda: len(there.rest.streams) == 1)


def test_a_connection_that_keeps_no_claim_any_more_is_as_any_other(registry):
    there = registry()
    with there.talk("POST", "/routes", WHILE) as client:
        for _ in range(5):
            made = json.loads(client.answer().body)
            (caller,) = there.gate.callers
            assert len(caller.at_end) == 1
            assert there.ask("DELETE", "/routes/shop", Sniroute_Lease=made["lease"]).status == 204
            client.say(head("GET", "/routes", ALICE))
            client.answer()
            wait_until(lambda: not there.rest.attached)
            wait_until(lambda: caller in there.door.late["kept"].due)
            assert caller.at_end == []
            data = json.dumps(WHILE).encode()
            client.say(head("POST", "/routes", ALICE)[:-2] + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        client.answer()


def test_an_id_of_another_owners_claim_tells_no_name(registry):
    there = registry()
    made = there.claim("secret-name")
    for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("POST", "/renew")):
        for key in (made.json["id"], "0" * 32):
            said = there.ask(method, f"/routes/uuid:{key}{path}", token=BOB, Sniroute_Lease="x")
            assert (said.status, said.json["class"]) == (404, "gone")
            assert "secret-name" not in said.body.decode()
    assert there.ask("GET", f"/routes/uuid:{made.json['id']}", token=ADMIN).json["name"].startswith("secret-name.")


def test_a_head_of_the_events_is_a_head(registry):
    there = registry()
    with there.talk("HEAD", "/events") as client:
        answer = client.answer("HEAD")
        assert (answer.status, answer.get("Content-Type")) == (200, "text/event-stream")
        there.claim()
        client.say(head("GET", "/routes/shop", ALICE))
        assert json.loads(client.answer().body)["name"] == SHOP and there.rest.streams == {}


@pytest.mark.parametrize("line", [
    b"GET http://localhost/routes HTTP/1.1", b"GET //routes HTTP/1.1", b"GET /routes/../routes HTTP/1.1",
    b"GET /routes/%2e%2e HTTP/1.1", b"GET /routes/a%2fb HTTP/1.1", b"GET /ROUTES HTTP/1.1", b"GET /routes/ HTTP/1.1",
    b"GET /routes;x HTTP/1.1", b"GET /routes/shop%00 HTTP/1.1", b"GET /routes/shop%0d%0aX:%20y HTTP/1.1"])
def test_a_path_that_is_spelled_otherwise_is_another_one(registry, line):
    there = registry()
    there.claim()
    with Talk_of(there) as client:
        client.say(line + head("GET", "", ALICE)[len(b"GET  HTTP/1.1"):])
        answer = client.answer()
        assert answer.status == 404 and answer.get("X") is None


@pytest.mark.parametrize("fields", [
    ["Host: localhost", "Host: localhost"], ["Authorization: Bearer " + ALICE, "Authorization: Bearer " + BOB],
    ["Sniroute-Lease: a", "X-Lease: b"], ["Sniroute-Lease: a", "Sniroute-Lease: b"], ["Host: localhost, localhost"],
    ["Host: localhost@evil.example"], ["Host:"]])
def test_what_is_there_twice_is_refused(registry, fields):
    there = registry()
    there.claim()
    rest = [each for each in ("Host: localhost", "Authorization: Bearer " + ALICE)
            if not any(field.startswith(each[:4]) for field in fields)]
    with Talk_of(there) as client:
        client.say("\r\n".join(["DELETE /routes/shop HTTP/1.1", *rest, *fields, "", ""]).encode())
        assert client.answer().status == 400
    assert SHOP in there.registry.table.live


@pytest.mark.parametrize("spelling", [
    "shop", "SHOP", "shop.", SHOP, f"{SHOP.upper()}.", "*", "**", f"*.{DOMAIN}", "{x}", "*.shop", f"x.{SHOP}", DOMAIN,
    "shop ", "shop\n", "shop\0", "sh\u043ep", "s\u212aop", "%73hop", "shop:443", "..shop", f"shop.{DOMAIN}.{DOMAIN}"])
def test_a_name_of_another_is_taken_in_no_spelling(registry, spelling):
    """Nor what would fit it, nor what is below or above it."""
    there = registry()
    there.claim()
    assert there.claim(spelling, token=BOB).status in (400, 403, 409, 422)
    assert [(claim.key, claim.owner) for claim in there.registry.table.page()] == [(SHOP, "alice")]
    assert there.claim("bobs", token=BOB).status == 201


def test_a_name_that_is_suspended_cannot_be_washed(registry):
    """Who claims and releases other names, until it is not held any more, has it suspended still."""
    there = registry(clock=FakeClock(), owners={**OWNERS, "alice": owner("alice", ALICE, max_names=5000)})
    made = there.claim()
    assert there.ask("POST", "/routes/shop/suspend", token=ADMIN).status == 200
    assert there.ask("DELETE", "/routes/shop", **lease(made)).status == 204
    for number in range(HELD_MIN + 5):
        assert there.ask("DELETE", f"/routes/n{number}", **lease(there.claim(f"n{number}"))).status == 204
    assert there.claim().json["suspended"]


def test_a_stream_keeps_a_claim_behind_the_first_page_of_names(registry, monkeypatch):
    monkeypatch.setattr(sniroute_rest, "PAGE_MAX", 3)
    there = registry()
    for number in range(7):
        there.claim(f"n{number}")
    with there.talk("POST", "/routes", WHILE) as first:
        made = json.loads(first.answer().body)
        with there.talk("GET", "/events", None, ALICE, f"Sniroute-Lease: {made['lease']}") as second:
            second.head()
            wait_until(lambda: there.rest.attached[SHOP][1] in there.rest.streams)


def test_events_are_told_in_order_also_where_one_ends_a_stream(registry):
    """The end of a stream that is too slow is the end of a claim that it keeps, which is an event, too."""
    there = registry()
    with there.talk("POST", "/routes", WHILE) as first:
        made = json.loads(first.answer().body)
        with there.talk("GET", "/events", None, ALICE, f"Sniroute-Lease: {made['lease']}") as slow, \
                there.talk("GET", "/events") as other:
            slow.head()
            wait_until(lambda: there.rest.attached[SHOP][1] in there.rest.streams)
            other.head()
            wait_until(lambda: len(there.rest.streams) == 2)
            caller = there.rest.attached[SHOP][1]
            done = threading.Event()
            there.door.loop.call(lambda: (caller.out.extend([memoryview(b"x" * 70000)] * 3), done.set()))
            assert done.wait(5)
            there.claim("other")
            heard = events(other, 2)
            assert [what for _, what, _ in heard] == ["claimed", "renewed"]
            numbers = [int(number.partition("-")[2]) for number, _, _ in heard]
            assert numbers == sorted(numbers)
