"""Tests of sniroute_claims: whose a name is, until when, and what becomes of it; with a clock that is given."""

from __future__ import annotations

import collections
import math
import random
import tracemalloc

import pytest

import sniroute_owners
from conftest import FakeClock
from sniroute_claims import (ALPHABET, EXPIRED_MAX, GRACE_MIN, HELD_MIN, NEW, OK, PAGE_MAX, RANDOM_LENGTH, ROW_MAX,
                             TAKEN_OVER, WORDS, Claim, Ordered, Table, random_label)

SHOP = "shop.tun.example.com"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def table(clock) -> Table:
    return Table(clock)


def claim(table: Table, key: str = SHOP, owner: str = "alice", ttl: float = 60, hold: float = 600, **more) -> Claim:
    """Claim a key, which has to be granted."""
    verdict = table.judge(key, owner)
    assert verdict.passed
    made = table.claimed(verdict, key, owner, "tcp:192.0.2.1:8080", ttl, hold, **more)
    table.put(made)
    return made


def names(claims: list[Claim]) -> list[str]:
    """Their first labels."""
    return [each.key.partition(".")[0] for each in claims]


# -- whose a name is ---------------------------------------------------------------------------


def test_a_claim_lives_as_long_as_its_ttl_and_not_a_moment_longer(table, clock):
    made = claim(table)
    assert table.find(SHOP) == made and made.expires == clock() + 60 and len(made.id) == len(made.lease) == 32
    clock.jump(59.999)
    assert table.find(SHOP) == table.find_id(made.id) == made and table.expire() == []
    clock.jump(0.001)
    assert table.find(SHOP) is table.find_id(made.id) is None  # at once, whether or not it was swept
    assert table.expire() == [made] and table.expire() == []
    assert len(table) == table.count("alice") == 0


def test_whoever_lost_its_lease_has_its_name_back_at_once_and_the_old_lease_is_void(table, clock):
    """A client that was killed comes again with the same token."""
    first = claim(table)
    clock.jump(1)
    verdict = table.judge(SHOP, "alice")
    assert verdict.word == TAKEN_OVER and WORDS[TAKEN_OVER].status == 200
    second = table.claimed(verdict, SHOP, "alice", "tcp:192.0.2.2:8080", 60, 600)
    table.put(second)
    assert second.id == first.id and second.lease != first.lease and second.generation > first.generation
    assert table.find_id(first.id) == second and table.count("alice") == 1
    assert table.permit(SHOP, "alice", first.lease).word == "stale"
    assert table.permit(SHOP, "alice", second.lease).claim == second


def test_whoever_does_not_want_to_take_over_is_told_that_the_name_is_its_own(table, clock):
    made = claim(table)
    verdict = table.judge(SHOP, "alice", takeover=False)
    assert verdict.word == "own" and not verdict.passed and verdict.free_at == made.expires
    assert "takeover" in verdict.sentence


def test_a_name_has_one_owner(table, clock):
    made = claim(table)
    verdict = table.judge(SHOP, "bob")
    assert verdict.word == "other" and verdict.free_at == clock() + 660 and verdict.claim is None
    assert "alice" not in verdict.sentence
    assert table.find(SHOP) == made


@pytest.mark.parametrize("end", ["expires", "released"])
def test_a_name_is_held_for_its_owner_after_its_end(table, clock, end):
    made = claim(table)
    if end == "released":
        assert table.drop(SHOP) == made
    else:
        clock.jump(60)
        table.expire()
    assert table.find(SHOP) is None and table.find_held(SHOP).owner == "alice"
    verdict = table.judge(SHOP, "bob")
    assert verdict.word == "held" and verdict.free_at == clock() + 600 and "alice" not in verdict.sentence
    assert table.judge(SHOP, "alice").word == NEW
    clock.jump(599.999)
    assert table.judge(SHOP, "bob").word == "held" and table.expire() == []
    clock.jump(0.001)
    assert table.judge(SHOP, "bob").word == NEW and table.find_held(SHOP) is None
    assert claim(table, owner="bob").id != made.id  # an id is never used again


def test_a_claim_that_was_not_swept_yet_is_held_too(table, clock):
    claim(table)
    clock.jump(61)
    assert table.judge(SHOP, "bob").word == "held" and table.judge(SHOP, "alice").word == NEW
    assert claim(table).generation == 2
    assert table.expire() == [] and table.count("alice") == 1


def test_a_hold_begins_with_the_end_of_a_claim_and_not_when_somebody_looks(table, clock):
    claim(table)
    clock.jump(100)
    table.drop(SHOP)
    assert table.judge(SHOP, "bob").free_at == clock() + 560


@pytest.mark.parametrize("hold", [0, 600])
def test_a_name_may_be_given_up_without_a_hold(table, clock, hold):
    claim(table, hold=hold)
    table.drop(SHOP, hold=hold == 0)
    assert table.judge(SHOP, "bob").word == NEW and table.owned == {}


def test_a_name_that_is_held_can_be_freed(table):
    claim(table)
    table.drop(SHOP)
    assert table.drop(SHOP, hold=False) is None
    assert table.judge(SHOP, "bob").word == NEW and table.drop("other.tun.example.com", hold=False) is None


def test_a_route_of_the_settings_comes_before_all_claims(table):
    claim(table)
    verdict = table.judge(SHOP, "alice", configured=True)
    assert verdict.word == "configured" and not verdict.passed and verdict.free_at is None


def test_an_owner_has_no_more_names_than_it_may(table, clock):
    claim(table, "a.tun.example.com", ttl=10)
    claim(table, "b.tun.example.com", ttl=60)
    claim(table, "c.tun.example.com", owner="bob")
    verdict = table.judge("d.tun.example.com", "alice", limit=2)
    assert verdict.word == "limit" and "2 names" in verdict.sentence
    assert table.judge("b.tun.example.com", "alice", limit=2).word == TAKEN_OVER  # that is not one more
    assert table.judge("d.tun.example.com", "alice", limit=3).word == NEW
    clock.jump(10)
    assert table.judge("a.tun.example.com", "alice", limit=2).word == NEW  # nor is what has ended unswept
    table.expire()
    assert table.judge("d.tun.example.com", "alice", limit=2).word == NEW
    assert table.counts() == {"alice": 1, "bob": 1}


def test_a_name_that_was_suspended_stays_so_when_it_is_claimed_again(table, clock):
    table.put(claim(table)._replace(suspended=True))
    assert claim(table).suspended
    table.drop(SHOP)
    assert claim(table).suspended  # its owner does not get rid of that by a release
    table.put(table.find(SHOP)._replace(suspended=False))
    assert not claim(table).suspended


def test_a_generation_grows_for_ever_also_when_all_is_forgotten(table, clock):
    seen = [claim(table).generation, claim(table).generation]
    table.drop(SHOP, hold=False)
    assert table.held == {} == table.live
    seen.append(claim(table, owner="bob").generation)
    clock.jump(1e6)
    while table.next_expiry() <= clock():
        table.expire()
    assert table.held == {}
    seen.append(claim(table).generation)
    assert seen == sorted(set(seen))


def test_what_another_router_has_written_is_believed(table, clock):
    """It knows better: this one may have missed the end of a claim."""
    mine = claim(table)
    theirs = mine._replace(owner="bob", id="b" * 32, lease="c" * 32, generation=7)
    table.put(theirs)
    assert table.find(SHOP) == theirs and table.find_id(mine.id) is None and table.find_id(theirs.id) == theirs
    assert table.count("alice") == 0 and table.page("bob") == [theirs] and table.page("alice") == []
    table.put(theirs._replace(expires=clock() - 1))  # the same, once it has ended
    assert table.find(SHOP) is None and table.judge(SHOP, "alice").word == "held"
    table.put(mine._replace(expires=clock() - 1e6))
    assert table.held == table.live == table.owned == {}


# -- leases ------------------------------------------------------------------------------------


def test_a_lease_is_asked_for_and_an_admin_needs_none(table, clock):
    made = claim(table)
    words = {(owner, lease, admin): table.permit(SHOP, owner, lease, admin).word for owner in ("alice", "bob")
             for lease in (made.lease, "0" * 32, "\udce4", "", None) for admin in (False, True)}
    right, none = made.lease, None
    assert {key for key, word in words.items() if word == OK} == {
        ("alice", right, False), ("alice", right, True), ("bob", right, True), ("alice", none, True),
        ("bob", none, True)}
    assert {key for key, word in words.items() if word == "gone"} == {
        ("bob", lease, False) for lease in (right, "0" * 32, "\udce4", "", none)}  # whatever it says, it learns nothing
    assert words["alice", none, False] == "no_lease" and words["alice", "", False] == "stale"
    assert [WORDS[word].status for word in ("gone", "stale", "no_lease")] == [404, 409, 428]
    clock.jump(60)
    assert table.permit(SHOP, "alice", right).word == "gone" == table.permit(SHOP, "bob", none, True).word
    assert "claim it again" in table.permit(SHOP, "alice", right).sentence


def test_who_asks_for_the_name_of_another_hears_what_it_hears_of_a_free_one(table):
    claim(table)
    taken = table.permit(SHOP, "bob", "0" * 32)
    table.drop(SHOP, hold=False)
    assert table.permit(SHOP, "bob", "0" * 32) == taken


def test_a_renewal_prolongs_a_claim_by_another_ttl(table, clock):
    made = claim(table)
    clock.jump(50)
    table.put(table.renewed(made))
    assert table.find(SHOP) == made._replace(expires=clock() + 60)
    clock.jump(59)
    assert table.expire() == []
    table.put(table.renewed(table.find(SHOP), 5, target="tcp:192.0.2.9:80", meta={"a": 1}))
    now = table.find(SHOP)
    assert (now.ttl, now.expires, now.target, now.meta, now.lease) == (
        5, clock() + 5, "tcp:192.0.2.9:80", {"a": 1}, made.lease)
    clock.jump(5)
    assert table.expire() == [now]


def test_renewals_need_no_memory(table, clock):
    """Nor do claims that come and go, or get shorter and longer."""
    made = claim(table, ttl=86400)
    for _ in range(2000):
        table.put(table.renewed(made, 5))
        table.put(table.renewed(made, 86400))
        clock.jump(4)
        table.expire()
        table.drop(SHOP)
        made = claim(table, ttl=86400)
    assert len(table.due) < 100


# -- expiry ------------------------------------------------------------------------------------


def test_where_nobody_could_renew_for_a_while_nothing_ends_for_a_moment(table, clock):
    """However long its ttl is; and the next renewal counts."""
    made = claim(table, ttl=60, hold=100)
    day = claim(table, "day.tun.example.com", ttl=86400)
    clock.jump(59)
    table.spared = clock() + GRACE_MIN
    clock.jump(GRACE_MIN - 1)
    assert table.find(SHOP) == made and table.expire() == [] and table.find_held(SHOP) is None
    assert table.next_expiry() == clock() + 1
    clock.jump(1)
    assert table.find(SHOP) is None and table.find_held(SHOP) == made
    assert [ended.key for ended in table.expire()] == [SHOP]
    assert table.find("day.tun.example.com") == day and day.expires == clock() - 59 - GRACE_MIN + 86400


def test_next_expiry_is_when_there_is_something_to_do(table, clock):
    assert table.next_expiry() == math.inf
    claim(table, "a.tun.example.com", ttl=60, hold=600)
    claim(table, "b.tun.example.com", ttl=30, hold=0)
    assert table.next_expiry() == clock() + 30
    clock.jump(30)
    assert names(table.expire()) == ["b"]
    assert table.next_expiry() == clock() + 30
    clock.jump(30)
    assert names(table.expire()) == ["a"] and table.next_expiry() == clock() + 600
    clock.jump(600)
    assert table.expire() == [] and table.next_expiry() == math.inf and table.owned == {}


class Counting(dict):
    """A dictionary that counts what it is asked."""

    asked = 0

    def get(self, *words):
        self.asked += 1
        return super().get(*words)


def test_expiry_looks_only_at_what_is_due(table, clock):
    for number in range(5000):
        claim(table, f"n{number}.tun.example.com", ttl=3600 if number % 100 else 60)
    table.live = Counting(table.live)
    clock.jump(59)
    assert table.expire() == [] and table.live.asked == 0
    clock.jump(1)
    assert len(table.expire()) == 50 and table.live.asked < 60


def test_a_crowd_that_expires_at_once_is_taken_in_portions(table, clock):
    for number in range(2 * EXPIRED_MAX + 10):
        claim(table, f"n{number}.tun.example.com", hold=0)
    clock.jump(60)
    found = []
    while table.next_expiry() <= clock():
        found.append(len(table.expire()))
    assert found == [EXPIRED_MAX, EXPIRED_MAX, 10] and not table.live and not table.owned


def test_who_claims_and_releases_in_a_circle_does_not_fill_the_name_space(table, clock):
    for number in range(HELD_MIN + 50):
        claim(table, f"n{number}.tun.example.com")
        table.drop(f"n{number}.tun.example.com")
    assert len(table.held) == HELD_MIN and table.count("alice") == 0
    assert table.judge("n49.tun.example.com", "bob").word == NEW  # what ended first is let go first
    assert table.judge("n50.tun.example.com", "bob").word == "held"


class Counted(dict):
    """A dict that counts its look-ups."""

    looks = 0

    def __getitem__(self, key):
        self.looks += 1
        return super().__getitem__(key)


def test_to_let_a_name_go_does_not_take_longer_where_many_are_held(table, clock):
    table.held = Counted()
    for number in range(HELD_MIN - 10):
        made = claim(table, f"off{number}.tun.example.com")
        table.put(made._replace(suspended=True))
        table.drop(made.key)
    for number in range(110):
        table.drop(claim(table, f"n{number}.tun.example.com").key)
    assert len(table.held) == HELD_MIN and table.held.looks < 10 * 110, "each end would look at all suspended ones"
    # With a dict, to find the first one is to pass the places of all that went before it.
    assert isinstance(table.owned["alice"].held, collections.OrderedDict)
    for number in range(100, 110):
        assert table.judge(f"n{number}.tun.example.com", "bob").word == "held"
    clock.jump(10_000)
    table.expire()
    assert not table.held and not table.owned


def test_suspended_names_are_let_go_last_and_those_that_ended_first_before_others(table):
    for number in range(HELD_MIN + 5):
        made = claim(table, f"off{number}.tun.example.com")
        table.put(made._replace(suspended=True))
        table.drop(made.key)
    assert table.judge("off4.tun.example.com", "bob").word == NEW
    assert table.judge("off5.tun.example.com", "bob").word == "held"
    table.drop(claim(table, "plain.tun.example.com").key)
    assert table.judge("plain.tun.example.com", "bob").word == NEW
    assert table.judge("off5.tun.example.com", "bob").word == "held"


def test_an_owner_with_many_names_has_all_of_them_held(table, clock):
    for number in range(3 * HELD_MIN):
        claim(table, f"n{number}.tun.example.com")
    clock.jump(60)
    table.expire()
    assert len(table.held) == 3 * HELD_MIN


# -- outages -----------------------------------------------------------------------------------


def test_in_an_outage_nothing_ends_and_after_it_each_claim_has_a_ttl_to_be_renewed(table, clock):
    claim(table, "long.tun.example.com", ttl=600)
    claim(table, "short.tun.example.com", ttl=5)
    claim(table, "other.tun.example.com", ttl=3600)
    table.freeze()
    clock.jump(1000)
    table.freeze()  # it is frozen already
    assert table.next_expiry() == math.inf and table.expire() == []
    assert names(table.page()) == ["long", "other", "short"] and table.find("short.tun.example.com")
    assert table.judge("short.tun.example.com", "bob").word == "other"
    moved = table.thaw()
    assert names(moved) == ["long", "short", "other"] and table.thaw() == []
    assert [each.expires - clock() for each in moved] == [600, GRACE_MIN, 3600]
    assert table.page() == sorted(moved)
    clock.jump(GRACE_MIN)
    assert names(table.expire()) == ["short"]
    clock.jump(570)
    assert names(table.expire()) == ["long"]


def test_an_outage_ends_without_grace_where_that_is_wanted(table, clock):
    claim(table)
    table.freeze()
    clock.jump(61)
    assert table.thaw(grace=False) == [] and names(table.expire()) == ["shop"]


def test_for_names_that_are_held_an_outage_does_not_count(table, clock):
    claim(table, "before.tun.example.com")
    claim(table, "while.tun.example.com")
    table.drop("before.tun.example.com")
    clock.jump(500)
    table.freeze()
    clock.jump(1000)
    table.drop("while.tun.example.com")
    assert table.find_held("before.tun.example.com") and table.find_held("while.tun.example.com")
    clock.jump(1000)
    table.thaw()
    clock.jump(99)
    table.expire()
    assert table.find_held("before.tun.example.com") and table.find_held("while.tun.example.com")
    clock.jump(1)
    table.expire()
    assert table.find_held("before.tun.example.com") is None and table.find_held("while.tun.example.com")
    clock.jump(500)
    assert table.find_held("while.tun.example.com") is None


def test_a_restart_is_an_outage(table, clock):
    """A store gives claims back whose time was over while nobody could renew them."""
    made = [claim(table, f"n{number}.tun.example.com", ttl=60) for number in range(3)]
    later = FakeClock(clock() + 1e5)
    again = Table(later)
    again.freeze()
    for each in made:
        again.put(each)
    again.put_held(made[0]._replace(key="held.tun.example.com", expires=later() - 10))
    again.put_held(made[0]._replace(key="long.ago.example.com"))
    again.thaw()
    assert again.judge("held.tun.example.com", "bob").word == "held"
    assert again.judge("long.ago.example.com", "bob").word == NEW
    assert again.expire() == [] and len(again.page()) == 3
    assert again.permit(made[0].key, "alice", made[0].lease).passed
    later.jump(60)
    assert len(again.expire()) == 3


def test_an_empty_table_is_as_good_as_any(table, clock):
    table.freeze()
    assert table.thaw() == [] and table.expire() == [] and table.page() == [] and table.counts() == {}
    claim(table)
    table.drop(SHOP, hold=False)
    assert table.page() == [] and table.keys == {} and len(table.ordered) == 0


# -- pages -------------------------------------------------------------------------------------


def test_pages_are_in_the_order_of_names(table):
    order = [f"{name}.tun.example.com" for name in ("a", "ab", "b1", "b2", "b3", "c")]
    for key in random.Random(1).sample(order, len(order)):
        claim(table, key, owner="bob" if key.startswith("b") else "alice")
    keys = [each.key for each in table.page()]
    assert keys == sorted(order) and [each.key for each in table.page("bob")] == order[2:5]
    assert names(table.page(prefix="b")) == ["b1", "b2", "b3"] == names(table.page("bob", prefix="b"))
    assert names(table.page(prefix="b", limit=2)) == ["b1", "b2"]
    assert names(table.page(prefix="b", limit=2, after=order[3])) == ["b3"]
    assert names(table.page(prefix="b", after="a.tun.example.com")) == ["b1", "b2", "b3"]
    assert table.page("alice", prefix="b") == table.page("carol") == table.page(after="d") == table.page(limit=0) == []
    assert table.page(prefix="b", after="c.tun.example.com") == []


def test_a_page_may_begin_behind_a_name_that_is_gone(table, clock):
    """Names come and go while somebody turns pages: no other is left out, or there twice."""
    for number in range(100):
        claim(table, f"n{number:03}.tun.example.com", ttl=60 if number % 10 else 30)
    seen, after, dice = [], "", random.Random(2)
    while page := table.page(limit=7, after=after):
        seen += names(page)
        after = page[-1].key
        table.drop(after)
        claim(table, f"x{dice.randrange(1000)}.tun.example.com")
    assert [name for name in seen if name.startswith("n")] == [f"n{number:03}" for number in range(100)]
    assert len(seen) == len(set(seen))
    clock.jump(30)
    assert not any(name.endswith("0") for name in names(table.page(prefix="n")))  # those that have ended, unswept


def test_a_page_is_bounded(table):
    for number in range(PAGE_MAX + 5):
        claim(table, f"n{number}.tun.example.com")
    assert len(table.page()) == 100 and len(table.page(limit=10 ** 9)) == PAGE_MAX


def test_names_stay_in_order_whatever_comes_and_goes():
    dice, ordered, model = random.Random(3), Ordered(), set()
    for step in range(12000):
        name = str(dice.randrange(3000))
        grows = step % 6000 < 4000
        if name not in model and grows:
            ordered.add(name)
            model.add(name)
        elif name in model and not grows:
            ordered.remove(name)
            model.remove(name)
        if step % 500 == 0:
            assert list(ordered.since("")) == sorted(model) and len(ordered) == len(model)
            assert list(ordered.since(name)) == sorted(each for each in model if each >= name)
            assert all(0 < len(row) <= ROW_MAX for row in ordered.rows) or len(ordered.rows) == 1
    for name in list(model):
        ordered.remove(name)
    assert ordered.rows == [[]] and ordered.starts == [""] and len(ordered) == 0


# -- any name, any port ------------------------------------------------------------------------


def test_random_names_are_of_50_bits_and_read_well():
    labels = {random_label() for _ in range(2000)}
    assert len(labels) == 2000 and all(len(label) == RANDOM_LENGTH == 10 for label in labels)
    assert set("".join(labels)) == set(ALPHABET) and len(ALPHABET) == 32 and not set("ilou") & set(ALPHABET)


def test_a_random_name_is_one_that_nobody_has(table, monkeypatch):
    claim(table, "aaa.tun.example.com")
    claim(table, "bbb.tun.example.com")
    table.drop("bbb.tun.example.com")
    drawn = iter(["aaa", "bbb", "ccc"])
    monkeypatch.setattr("sniroute_claims.random_label", lambda: next(drawn))
    assert table.free_name("tun.example.com") == "ccc.tun.example.com"


def test_a_free_port_is_one_that_nobody_has(table):
    ports = range(49000, 49010)
    dice = random.Random(4)
    for _ in range(8):
        claim(table, table.free_port(ports, dice))
    table.drop(table.page(prefix="tcp:")[0].key)
    left = {table.free_port(ports) for _ in range(100)}
    assert len(left) == 2 and not left & (table.live.keys() | table.held.keys())
    for key in left:
        claim(table, key)
    assert table.free_port(ports) is None and table.free_port(range(0)) is None
    assert all(49000 <= int(each.key.removeprefix("tcp:")) < 49010 for each in table.page())


# -- sizes -------------------------------------------------------------------------------------


def test_a_claim_takes_less_than_a_kilobyte_and_a_half():
    count = 10000
    tracemalloc.start()
    try:
        table = Table(FakeClock())
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            claim(table, f"name-{number:05}.tun.example.com", meta={"version": f"1.{number}"})
            table.put(table.renewed(table.find(f"name-{number:05}.tun.example.com")))
        assert (tracemalloc.get_traced_memory()[0] - before) / count < 1536
    finally:
        tracemalloc.stop()


# -- the model ---------------------------------------------------------------------------------


class Model:
    """What a Table does, as simply as it can be said: a row for each name, and a look at all of them each time."""

    def __init__(self, clock: FakeClock):
        self.clock = clock
        self.rows: dict[str, Claim] = {}
        self.ended: set[str] = set()
        self.frozen: float | None = None
        self.generations: dict[str, int] = {}

    def lives(self, key: str) -> bool:
        return key in self.rows and key not in self.ended and (
            self.frozen is not None or self.rows[key].expires > self.clock())

    def holder(self, key: str) -> str | None:
        """Who alone may claim the name."""
        row = self.rows.get(key)
        if row is None or not self.lives(key) and self.frozen is None and row.expires + row.hold <= self.clock():
            return None
        return row.owner

    def put(self, made: Claim) -> None:
        assert made.generation > self.generations.get(made.key, 0)
        self.generations[made.key] = made.generation
        self.rows[made.key] = made
        self.ended.discard(made.key)

    def drop(self, key: str) -> None:
        row = self.rows[key]
        self.rows[key] = row._replace(expires=min(row.expires, self.clock()))
        self.ended.add(key)
        if not row.hold:
            self.free(key)

    def free(self, key: str) -> None:
        del self.rows[key]
        self.ended.discard(key)

    def expire(self) -> set[str]:
        over = {key for key in self.rows if key not in self.ended and not self.lives(key)}
        self.ended |= over
        for key in [key for key in self.ended if self.holder(key) is None]:
            self.free(key)
        return over

    def thaw(self) -> None:
        now, since, self.frozen = self.clock(), self.frozen, None
        for key, row in self.rows.items():
            later = row.expires + max(0, now - max(since, row.expires)) if key in self.ended \
                else max(row.expires, now + max(row.ttl, GRACE_MIN))
            self.rows[key] = row._replace(expires=later)


@pytest.mark.parametrize("seed", [20, 21])
def test_the_table_does_what_the_model_does(seed):
    """10,000 random steps: no name has two owners, no lease outlives its time, nothing is lost."""
    dice, clock = random.Random(seed), FakeClock()
    table, model = Table(clock), Model(clock)
    keys = [f"n{number}.tun.example.com" for number in range(20)] + ["tcp:49000", "tcp:49001"]
    owners = ["alice", "bob", "carol"]
    leases: dict[str, str] = {}  # what clients remember, right or not

    def sweep() -> None:
        found = []
        while table.next_expiry() <= clock():
            found += table.expire(dice.randint(1, 5))
        assert {each.key for each in found} == (over := model.expire() if model.frozen is None else set())
        assert len(found) == len(over)

    def step_claim(key: str, owner: str) -> str:
        sweep()
        verdict = table.judge(key, owner, takeover := dice.random() < 0.8, limit := dice.choice([5, 1000]))
        count = sum(model.lives(each) and model.rows[each].owner == owner for each in keys)
        holder, lives = model.holder(key), model.lives(key)
        expected = ("other" if lives and holder != owner else TAKEN_OVER if lives and takeover else "own" if lives else
                    "held" if holder not in (None, owner) else "limit" if count >= limit else NEW)
        assert verdict.word == expected
        if verdict.passed:
            made = table.claimed(verdict, key, owner, "tcp:192.0.2.1:1", dice.choice([5, 30, 60, 600]),
                                 dice.choice([0, 10, 100, 600]))
            table.put(made)
            model.put(made)
            if dice.random() < 0.7:  # else the answer was lost
                leases[key] = made.lease
        return verdict.word

    def step_lease(key: str, owner: str) -> str:
        lease, admin = dice.choice([leases.get(key), None]), dice.random() < 0.1
        verdict = table.permit(key, owner, lease, admin)
        if not model.lives(key) or model.rows[key].owner != owner and not admin:
            assert verdict.word == "gone"
        elif lease is None and not admin:
            assert verdict.word == "no_lease"
        else:
            assert verdict.word == ("stale" if lease not in (None, model.rows[key].lease) else OK)
        if verdict.passed and dice.random() < 0.6:
            made = table.renewed(verdict.claim, dice.choice([None, 5, 60]), meta={"step": dice.random()})
            table.put(made)
            model.rows[key] = made
        elif verdict.passed:
            assert table.drop(key) == verdict.claim
            model.drop(key)
        return verdict.word

    seen: dict[str, int] = {}
    for _ in range(10000):
        key, owner, chance = dice.choice(keys), dice.choice(owners), dice.random()
        if chance < 0.45:
            word = step_claim(key, owner)
        elif chance < 0.8:
            row = model.rows.get(key)
            word = step_lease(key, row.owner if row and dice.random() < 0.9 else owner)
        elif chance < 0.97:
            clock.jump(dice.choice([0.0, 0.5, 1, 5, 20, 60, -2.5, 3600 if dice.random() < 0.02 else 10]))
            word = "later"
            if dice.random() < 0.5:
                sweep()
        elif model.frozen is None:
            table.freeze()
            model.frozen, word = clock(), "frozen"
        else:
            table.thaw()
            model.thaw()
            word = "thawed"
        seen[word] = seen.get(word, 0) + 1

        living = sorted(filter(model.lives, keys))
        assert [each.key for each in table.page()] == living
        assert [table.find(each) for each in living] == [model.rows[each] for each in living]
        assert all(table.find_id(model.rows[each].id).key == each for each in living)
        for each in dice.sample(keys, 3):
            held = table.find_held(each)
            assert (held and held.owner) == (None if model.lives(each) else model.holder(each))
        assert sorted(each for owned in table.owned.values() for each in owned.live.since("")) == sorted(table.live)
        assert table.keys.keys() == {each.id for each in table.live.values()}
        assert not table.live.keys() & table.held.keys()
    assert seen.keys() == {NEW, TAKEN_OVER, "own", "other", "held", "limit", "gone", "no_lease", "stale", OK, "later",
                           "frozen", "thawed"}
    assert min(seen.values()) > 20


def test_the_words_of_owners_are_among_those_of_claims():
    kinds = {fault: WORDS[fault].status for fault in ("fault", "forbidden", "reserved")}
    assert kinds == {"fault": 400, "forbidden": 403, "reserved": 409}
    assert sniroute_owners.Fault("name", "x").kind in WORDS
