"""Tests of sniroute_registry.py: the machine, over a store that answers when it is told to."""

from __future__ import annotations

import json
import random
from typing import Any, Callable, Iterator

import pytest

import sniroute_registry
from conftest import FakeClock
from sniroute_claims import Claim, Table
from sniroute_loop import Loop
from sniroute_registry import (DONE, EXPIRED, RELEASED, TAKEN, TURNS_MAX, UNAVAILABLE, Registry, Result, Written,
                               from_text, to_text)
from testbed.registry import Late, Order

KEY = "shop.tun.example.com"


class Machine:
    """A registry, its loop, which a test turns, and what came of each request."""

    def __init__(self, store: Any = None):
        self.faults: list[Any] = []
        self.loop = Loop(self.faults.append)
        self.clock = FakeClock()
        self.store = store or Late()
        self.moved: list[str] = []
        self.registry = Registry(self.loop, Table(self.clock), self.store, self.moved.append)
        self.table = self.registry.table
        self.results: list[Result] = []

    def turn(self) -> None:
        """What the loop has to do now."""
        while self.loop.calls:
            self.loop.calls.popleft()()

    def answer(self, said: Written = DONE, at: int = 0) -> Order:
        """Have the store answer."""
        order = self.store.orders.pop(at)
        order.done(said)
        self.turn()
        return order

    def claim(self, key: str = KEY, owner: str = "alice", ttl: float = 10.0, hold: float = 100.0, **more: Any) -> None:
        self.registry.claim(key, owner, "tcp:192.0.2.1:80", ttl, hold, self.results.append, **more)

    def claimed(self, key: str = KEY, owner: str = "alice", **more: Any) -> Claim:
        """A claim that stands."""
        self.claim(key, owner, **more)
        self.answer()
        return self.table.live[key]

    @property
    def words(self) -> list[str]:
        return [result.word for result in self.results]

    @property
    def happened(self) -> list[str]:
        return [event.what for event in self.registry.events.last]


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.loop.close()


# -- turns -------------------------------------------------------------------------------------


def test_requests_for_one_key_wait_for_each_other_and_those_for_others_do_not(machine):
    machine.claim()
    machine.claim(owner="bob")
    machine.claim("other.tun.example.com", "bob")
    assert [order.claim.owner for order in machine.store.orders] == ["alice", "bob"]
    machine.answer(at=1)
    machine.answer()
    assert machine.words == ["new", "new", "other"] and machine.registry.turns == {}


def test_one_too_many_for_a_key_is_told_to_come_again(machine):
    for _ in range(TURNS_MAX + 2):
        machine.claim()
    assert machine.words == ["busy"] and machine.results[0].retry_after
    while machine.store.orders:
        machine.answer()
    assert machine.words.count("taken_over") == TURNS_MAX and machine.registry.turns == {}


def test_a_store_that_answers_twice_ends_one_turn(machine):
    machine.claim()
    machine.claim()
    order = machine.answer()
    order.done(DONE)
    order.done(Written(UNAVAILABLE))
    machine.turn()
    assert machine.words == ["new"] and len(machine.store.orders) == 1, "the second has its turn, and keeps it"
    machine.answer()
    assert machine.words == ["new", "taken_over"] and machine.registry.turns == {}
    assert not machine.registry.coming


@pytest.mark.parametrize("where", ["moved", "event", "done", "store"])
def test_a_fault_of_those_who_are_told_takes_no_key_for_ever(machine, where):
    def fault(*words: Any) -> None:
        raise RuntimeError("of the test")
    registry = machine.registry
    done, write = machine.results.append, machine.store.write
    if where == "moved":
        registry.moved = fault
    elif where == "event":
        registry.events.listeners["x"] = fault
    elif where == "done":
        done = fault
    else:
        machine.store.write = fault
    registry.claim(KEY, "alice", "tcp:192.0.2.1:80", 10.0, 100.0, done)
    registry.claim(KEY, "alice", "tcp:192.0.2.1:80", 10.0, 100.0, done)
    while machine.store.orders:
        machine.answer()
    machine.turn()
    assert machine.faults and registry.turns == {} and not registry.coming
    if where in ("moved", "event"):
        assert machine.words == ["new", "taken_over"]
    machine.store.write, registry.moved = write, machine.moved.append
    registry.events.listeners.clear()
    machine.claim()
    machine.answer()
    assert machine.results[-1].passed


def test_an_owner_that_asks_for_many_names_at_once_has_no_more_than_it_may(machine):
    for number in range(5):
        machine.claim(f"n{number}.tun.example.com", limit=2)
    assert machine.words == ["limit"] * 3
    machine.answer(Written(UNAVAILABLE))
    machine.claim("again.tun.example.com", limit=2)
    while machine.store.orders:
        machine.answer()
    assert machine.words == ["limit"] * 3 + ["unavailable", "new", "new"]
    assert machine.table.count("alice") == 2 and not machine.registry.coming


def test_taking_over_what_one_has_counts_as_one(machine):
    machine.claimed(limit=1)
    machine.claim(limit=1)
    machine.claim("other.tun.example.com", limit=1)
    assert machine.words == ["new", "limit"]
    machine.answer()
    assert machine.words[-1] == "taken_over"


# -- a store that is late ----------------------------------------------------------------------


def test_a_claim_lives_from_the_answer_of_the_store_on(machine):
    machine.claim(ttl=10)
    machine.clock.jump(9)
    machine.answer()
    machine.clock.jump(9.9)
    assert machine.table.find(KEY)
    machine.clock.jump(0.2)
    assert machine.table.find(KEY) is None


def test_the_end_of_a_claim_is_not_written_over_the_next_one(machine):
    """Its time is over while its owner has it again: what a file keeps last is what counts after a restart."""
    machine.claimed(ttl=10)
    machine.claim()
    machine.clock.jump(11)
    machine.registry.tick()
    machine.answer()
    assert machine.words[-1] == "taken_over" and machine.table.find(KEY) and machine.store.orders == []
    machine.claim()
    machine.clock.jump(11)
    machine.registry.tick()
    machine.answer(Written(UNAVAILABLE))
    assert [(order.what, order.claim) for order in machine.store.orders] == [(EXPIRED, None)], "now it has ended"
    assert machine.registry.turns == {} and machine.happened == ["claimed", "expired", "claimed", "expired"]


@pytest.mark.parametrize("ask", [lambda r, *of: r.renew(*of[:3], None, of[3]),
                                 lambda r, *of: r.change(*of[:3], {"target": "tcp:192.0.2.2:1"}, of[3])])
def test_what_ends_while_the_store_is_asked_has_ended_in_the_store_too(machine, ask):
    """Or the store would go on believing, and telling other routers, what its owner was told is gone."""
    claim = machine.claimed(ttl=10)
    ask(machine.registry, KEY, "alice", claim.lease, machine.results.append)
    machine.clock.jump(11)
    machine.registry.tick()
    assert KEY not in machine.table.live
    order = machine.store.orders[0]
    machine.answer()
    assert machine.words == ["new", "gone"]
    assert [(each.what, each.claim) for each in machine.store.orders] == [(RELEASED, None), (EXPIRED, None)]
    assert machine.store.orders[0].former.lease == order.claim.lease
    assert KEY not in machine.table.live and machine.happened == ["claimed", "expired"]


def test_the_end_by_other_settings_is_not_written_over_the_next_claim(machine):
    """Its owner has the name again, for a target that the settings allow: what a file keeps last is what counts."""
    former = machine.claimed()
    machine.claim()
    machine.registry.end(former)
    assert machine.table.find(KEY) is None, "it is not routed any more"
    kept = machine.answer()
    assert machine.words == ["new", "taken_over"] and machine.table.find(KEY).lease == kept.claim.lease
    assert machine.store.orders == [], "nothing is written behind it"
    machine.claim()
    machine.registry.end(machine.table.find(KEY))
    machine.answer(Written(UNAVAILABLE))
    ((what, ended, claim, _),) = machine.store.orders
    assert (what, ended.lease, ended.hold, claim) == (RELEASED, kept.claim.lease, 0.0, None), "now it has ended"
    assert machine.registry.turns == {}


def test_an_end_is_written_however_many_wait_for_the_name(machine):
    claim = machine.claimed(ttl=10)
    machine.registry.renew(KEY, "alice", claim.lease, None, machine.results.append)
    for _ in range(TURNS_MAX):
        machine.claim(owner="bob")
    machine.clock.jump(11)
    machine.registry.tick()
    machine.answer(Written(UNAVAILABLE))
    assert machine.words == ["new", "unavailable", *["held"] * TURNS_MAX]
    assert [(order.what, order.claim) for order in machine.store.orders] == [(EXPIRED, None)]


def test_the_end_of_a_claim_that_another_one_finds_is_written_too(machine):
    machine.claimed(ttl=10)
    machine.clock.jump(11)
    machine.claim(owner="bob")
    assert machine.words == ["new", "held"]
    assert [(order.what, order.claim) for order in machine.store.orders] == [(EXPIRED, None)]


def test_a_renewal_that_ends_behind_a_takeover_says_that_its_lease_is_old(machine):
    claim = machine.claimed()
    machine.registry.renew(KEY, "alice", claim.lease, None, machine.results.append)
    machine.registry.learn(KEY, claim._replace(lease="x" * 32, generation=claim.generation + 1))
    machine.answer()
    assert machine.words == ["new", "stale"] and machine.table.live[KEY].lease == "x" * 32
    assert machine.store.orders == []


def test_a_conflict_is_looked_at_again_and_the_store_is_right(machine):
    machine.claim()
    theirs = machine.store.orders[0].claim._replace(owner="bob", lease="b" * 32)
    machine.answer(Written(TAKEN, theirs._replace(expires=machine.clock() + 5)))
    assert machine.words == ["other"] and machine.table.find(KEY).owner == "bob" and machine.moved == [KEY]
    assert machine.results[0].free_at == machine.clock() + 5 + theirs.hold


@pytest.mark.parametrize("ask, field, value", [
    (lambda r, lease, done: r.renew(KEY, "alice", lease, 30.0, done), "ttl", 30.0),
    (lambda r, lease, done: r.change(KEY, "alice", lease, {"http": "forward"}, done), "http", "forward"),
    (lambda r, lease, done: r.suspend(KEY, True, done), "suspended", True)], ids=["renew", "change", "suspend"])
def test_what_another_router_has_changed_is_what_is_changed(machine, ask, field, value):
    claim = machine.claimed(ttl=10)
    ask(machine.registry, claim.lease, machine.results.append)
    machine.answer(Written(TAKEN, claim._replace(target="tcp:192.0.2.9:1")))
    assert machine.answer().claim.target == "tcp:192.0.2.9:1"
    found = machine.table.find(KEY)
    assert machine.words == ["new", "ok"] and (found.target, getattr(found, field)) == ("tcp:192.0.2.9:1", value)
    ask(machine.registry, claim.lease, machine.results.append)
    while machine.store.orders:
        machine.answer(Written(TAKEN, found))
    assert machine.words[-1] == "busy" and machine.registry.turns == {}


def test_a_store_that_changes_all_the_time_ends_in_words(machine):
    machine.claim()
    while machine.store.orders:
        machine.answer(Written(TAKEN, None))
    assert machine.words == ["busy"] and machine.registry.turns == {} and not machine.registry.coming


@pytest.mark.parametrize("field, value", [
    ("ttl", "60"), ("ttl", True), ("key", 5), ("owner", None), ("lease", 1), ("generation", "1"), ("hold", None),
    ("allow", [1]), ("allow", "ab"), ("meta", []), ("suspended", 0), ("target", ["tcp:192.0.2.1:80"]), ("http", 1),
    ("key", "a\nb"), ("target", "tcp:\x1b[31m"), ("ttl", -1.0), ("ttl", float("nan")), ("hold", float("inf")),
    ("more", 1), ("\ud800", 1), ("expires", 5.0)])
def test_a_text_that_is_no_claim_is_none(machine, field, value):
    """A store is another program's, too: one wrong row must not break the table."""
    fields = json.loads(to_text(machine.claimed(allow=("192.0.2.0/24",))))
    assert from_text(json.dumps(fields), 5.0).allow == ("192.0.2.0/24",)
    for text in (json.dumps({**fields, field: value}), json.dumps([fields]), "[" * 100000, "5", b"\xff"):
        with pytest.raises(ValueError) as raised:
            from_text(text, 5.0)
        assert str(raised.value).isprintable()


# -- a model -----------------------------------------------------------------------------------

OWNERS = ("alice", "bob", "carol")
KEYS = tuple(f"n{number}.tun.example.com" for number in range(5))


class Common(Late):
    """A store that others write to as well: it compares leases, as Redis does, when an order is carried out.

    One that is not shared keeps what comes last, as a file does.
    """

    def __init__(self, clock: FakeClock, is_shared: bool):
        super().__init__()
        self.is_shared = is_shared
        self.clock = clock
        self.kept: dict[str, tuple[Claim, float]] = {}  # and until when each lives
        self.said: list[tuple[Order, Written]] = []  # that are carried out, and not answered yet

    def known(self, key: str) -> Claim | None:
        """What is there, living or held."""
        claim, until = self.kept.get(key, (None, 0.0))
        if claim is None or until + claim.hold <= self.clock():
            return None
        return claim._replace(expires=until)

    def carry_out(self, refuse: bool) -> None:
        """The next order."""
        order = self.orders.pop(0)
        claim = order.claim or order.former
        there, said = self.known(claim.key), DONE
        if refuse:
            said = Written(UNAVAILABLE)
        elif not self.is_shared:
            self.kept.pop(claim.key, None)
            if order.claim is not None:
                self.kept[claim.key] = claim, float("inf")
        elif order.what == EXPIRED:
            pass
        elif there is not None and there.lease != getattr(order.former, "lease", None):
            said = Written(TAKEN, there)
        elif order.claim is not None:
            self.kept[claim.key] = claim, self.clock() + claim.ttl
        elif there is not None:
            self.kept[claim.key] = there._replace(lease=f"over {there.lease}"), self.clock()
        self.said.append((order, said))


@pytest.mark.parametrize("seed, is_shared", [(0, True), (1, True), (2, False)])
def test_over_a_store_that_is_late_no_name_has_two_owners_and_nothing_acknowledged_is_lost(monkeypatch, seed, is_shared):
    dice = random.Random(seed)
    monkeypatch.setattr(sniroute_registry, "EVENTS_MAX", 10)
    clock = FakeClock()
    machine = Machine(Common(clock, is_shared))
    machine.clock = machine.table.clock = clock
    store, registry, table = machine.store, machine.registry, machine.table
    acknowledged: dict[str, tuple[str, str, float]] = {}  # by key: owner, lease, until
    leases: dict[str, tuple[str, str]] = {}  # that somebody has been given: key, owner
    asked = told = 0

    def begin(key: str) -> Callable[[Result], None]:
        nonlocal asked
        asked += 1
        once: list[Result] = []

        def done(result: Result) -> None:
            nonlocal told
            told += 1
            once.append(result)
            assert len(once) == 1
            if not result.passed:
                return
            claim = result.claim
            if table.live.get(key) is claim:
                until = clock() + claim.ttl
                assert claim.expires <= until
                acknowledged[key] = claim.owner, claim.lease, until
                leases[claim.lease] = key, claim.owner
            else:
                acknowledged.pop(key, None)  # released
        return done

    def step() -> None:
        key, owner = dice.choice(KEYS), dice.choice(OWNERS)
        mine = [lease for lease, whose in leases.items() if whose == (key, owner)]
        lease = dice.choice(mine[-2:]) if mine else "none"
        match dice.randrange(12):
            case 0 | 1:
                registry.claim(key, owner, "tcp:192.0.2.1:80", dice.choice((5.0, 20.0)), dice.choice((0.0, 10.0)),
                               begin(key), takeover=dice.random() < 0.7, limit=3)
            case 2 | 3:
                registry.renew(key, owner, lease, dice.choice((None, 5.0, 30.0)), begin(key))
            case 4:
                registry.change(key, owner, lease, {"target": f"tcp:192.0.2.{dice.randrange(9)}:1"}, begin(key))
            case 5:
                registry.release(key, owner, lease, begin(key))
            case 6:
                clock.jump(dice.choice((0.1, 1.0, 6.0)))
            case 7:
                registry.tick()
            case 8 | 9 if store.orders:
                order = store.orders[0]
                store.carry_out(dice.random() < 0.1 and (is_shared or order.claim is not None))
            case 10 if store.said:
                order, said = store.said.pop(0)
                order.done(said)
                machine.turn()
            case 11 if is_shared and dice.random() < 0.2 and not store.orders and not store.said:  # another router, at once
                there = store.known(key)
                if there is None or there.owner == owner:
                    theirs = Claim(key, "id" + key, owner, "tcp:192.0.2.1:80", dice.randbytes(16).hex(),
                                   1 + (there.generation if there else table.floor), 20.0, 10.0, clock() + 20.0)
                    store.kept[key] = theirs, theirs.expires
                    registry.learn(key, theirs)
                    acknowledged.pop(key, None)

    for _ in range(5000):
        step()
        for key in KEYS:
            claim = table.find(key)
            if key in acknowledged:
                owner, lease, until = acknowledged[key]
                if clock() >= until:
                    del acknowledged[key]
                    assert claim is None or claim.lease != lease, "no lease outlives its time"
                elif key not in registry.turns:
                    assert claim is not None and (claim.owner, claim.lease) == (owner, lease), "nothing is lost"
                    there = store.known(key)  # whose time began a little earlier
                    assert there is None or there.expires <= clock() or there.lease == lease, "the store knows it"
    while store.orders or store.said:
        if store.orders:
            store.carry_out(False)
        order, said = store.said.pop(0)
        order.done(said)
        machine.turn()
        registry.tick()
    if not is_shared:
        assert {key: claim.lease for key, (claim, _) in store.kept.items()} == {
            key: claim.lease for key, claim in table.live.items()}
    assert registry.turns == {} and told == asked > 1500 and not registry.coming and machine.faults == []
    machine.loop.close()
