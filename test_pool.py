"""Tests of sniroute_pool.py: who gets which connection, and how many there should be."""

from __future__ import annotations

import random
from typing import Any, Callable, Iterator

import pytest

from sniroute_loop import Loop
from sniroute_pool import ENDED_MAX, Pool, Sizer, Slot
from sniroute_refusals import Failed
from testbed.nodepass import how_many_wait


class Wire:
    """What a pool asks of a wire, and what was done to it."""

    def __init__(self) -> None:
        self.on_data: Any = None
        self.on_end: Any = None
        self.on_room: Any = None
        self.done: list[str] = []

    def reset(self) -> None:
        self.done.append("reset")

    def pause(self) -> None:
        self.done.append("pause")


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop(lambda owner: pytest.fail(f"a fault in {owner}"))
    yield made
    made.close()


@pytest.fixture
def pool(loop) -> Callable[..., Pool]:
    """pool(picks=True, patience=60) -> Pool, which is open; `strangers` and `changes` are what it has told."""
    def make(picks: bool = True, patience: float = 60.0) -> Any:
        strangers: list[tuple[str, bytes]] = []
        changes: list[int] = []
        made: Any = Pool(loop, picks, patience, lambda slot, data: strangers.append((slot.id, data)),
                         lambda used: changes.append(len(made.idle)))
        made.strangers, made.changes = strangers, changes
        made.open()
        return made

    return make


def slot(number: int) -> Slot:
    return Slot(f"{number:08x}", Wire())


def test_first_in_first_out(pool):
    made = pool()
    slots = [slot(number) for number in range(5)]
    for each in slots:
        made.add(each)
    assert [made.take() for _ in range(6)] == [*slots, None]
    assert not made.idle and not made.ended
    assert made.changes == [4, 3, 2, 1, 0]


def test_those_who_wait_are_served_in_their_order(pool):
    made, got = pool(), []
    askers = [made.ask(lambda slot, name=name: got.append((name, slot.id))) for name in "abc"]
    askers[1].cancel()
    assert how_many_wait(made) == 2
    for number in range(3):
        made.add(slot(number))
    assert got == [("a", "00000000"), ("c", "00000001")]
    assert list(made.idle) == ["00000002"] and not made.patience.due


def test_nobody_is_served_before_the_pool_is_open(pool):
    """With tls=1 only once the certificate is verified; who has waited is served then."""
    made, got = pool(), []
    made.shut()
    made.add(slot(1))
    made.ask(got.append)
    assert got == []
    made.open()
    assert [each.id for each in got] == ["00000001"]


def test_patience_ends(pool, loop):
    made, got = pool(patience=0.0), []
    made.ask(got.append)
    made.find("0badcafe", got.append)
    while len(got) < 2:
        loop.hurry()
        loop.turn()
    assert got == [None, None]
    assert not made.askers and not made.wanted and not made.patience.due


@pytest.mark.parametrize("before", [True, False], ids=["it is there", "it comes later"])
def test_one_is_found_by_its_id(before, pool):
    made, got, wanted = pool(picks=False), [], slot(7)
    if before:
        made.add(wanted)
    made.find(wanted.id, got.append)
    if not before:
        made.add(slot(8))
        made.add(wanted)
    assert got == [wanted] and wanted.id not in made.idle and not made.wanted


def test_what_comes_early_is_kept_with_it(pool):
    """On the dialling end; and no more than one piece is read."""
    made, got, early = pool(picks=False), [], slot(7)
    made.add(early)
    early.wire.on_data(b"early")
    assert early.wire.done == ["pause"]
    early.wire.on_end(None)
    assert early.id in made.ended and not made.idle
    made.find(early.id, got.append)
    assert got == [early] and (early.early, early.ended) == (b"early", True)


def test_one_that_ends_is_found_for_a_while(pool, loop):
    made = pool(picks=False)
    ended = slot(7)
    made.keeping.seconds = 0.0
    made.add(ended)
    ended.wire.on_end(None)
    assert list(made.ended) == [ended.id]
    loop.hurry()
    loop.turn()
    assert not made.ended and ended.wire.done == ["reset"]


def test_those_that_have_ended_have_a_bound(pool):
    made = pool(picks=False)
    first = slot(0)
    made.add(first)
    first.wire.on_end(None)
    for number in range(1, ENDED_MAX + 1):
        made.add(each := slot(number))
        each.wire.on_end(None)
    assert len(made.ended) == ENDED_MAX and first.wire.done == ["reset"] and len(made.keeping.due) == ENDED_MAX


@pytest.mark.parametrize("error", [None, Failed("reset", "it was cut")])
def test_a_dead_one_leaves_the_accepting_end_at_once(error, pool):
    made = pool()
    dead = slot(1)
    made.add(dead)
    dead.wire.on_end(error)
    assert not made.idle and not made.ended and dead.wire.done == ["reset"] and made.changes[-1] == 0


def test_who_speaks_without_being_asked_is_a_stranger(pool):
    made = pool()
    made.add(stranger := slot(1))
    stranger.wire.on_data(memoryview(b"\x16\3\1"))
    assert made.strangers == [("00000001", b"\x16\3\1")] and stranger.wire.done == ["reset"] and not made.idle


def test_one_id_is_named_once(pool):
    made, got = pool(picks=False), []
    made.find("0badcafe", got.append)
    made.find("0badcafe", lambda slot: got.append(("again", slot)))
    assert got == [("again", None)]
    made.add(Slot("0badcafe", Wire()))
    assert [each.id for each in got[1:]] == ["0badcafe"]


def test_the_end_of_a_link_closes_all_and_those_who_wait_go_on(pool):
    made, got = pool(), []
    slots = [slot(number) for number in range(3)]
    for each in slots:
        made.add(each)
    made.shut()
    made.ask(got.append)
    assert [each.wire.done for each in slots] == [["reset"]] * 3 and got == []
    made.add(slot(9))
    made.open()
    assert [each.id for each in got] == ["00000009"]


def test_the_end_of_all_tells_those_who_wait(pool, loop):
    made, got = pool(), []
    made.ask(got.append)
    made.find("0badcafe", got.append)
    made.close()
    loop.hurry()
    loop.turn()
    assert got == [None, None] and not loop.queues


def test_a_pool_as_a_model_of_it(pool):
    """10,000 random steps: each connection is used once, or closed once, and who waits is served in order."""
    rng = random.Random(21)
    made = pool()
    waiting: list[int] = []
    served: list[int] = []
    idle: list[str] = []
    used: set[str] = set()
    numbers = iter(range(1, 20_000))

    def got(asker: int, slot: Slot) -> None:
        assert slot.id not in used and slot.id not in made.idle and slot.id not in made.ended
        used.add(slot.id)
        served.append(asker)

    for step in range(10_000):
        kind = rng.random()
        if kind < 0.45:
            new = slot(next(numbers))
            made.add(new)
            if not waiting:
                idle.append(new.id)
            else:
                assert served.pop() == waiting.pop(0)
        elif kind < 0.9:
            made.ask(lambda slot, asker=step: got(asker, slot))
            if idle:
                assert served.pop() == step and idle.pop(0) in used
            else:
                waiting.append(step)
        elif idle:
            gone = rng.choice(idle)
            made.idle[gone].wire.on_end(None)
            idle.remove(gone)
        assert list(made.idle) == idle and how_many_wait(made) == len(waiting)
        assert used.isdisjoint(made.idle) and used.isdisjoint(made.ended)


# -- how many ----------------------------------------------------------------------------------


def test_a_client_begins_with_its_least():
    assert Sizer(64, 1024).wanted(0, 0) == 64


def test_min_and_max_the_wrong_way_round_are_swapped():
    """As the original does."""
    sizer = Sizer(6, 2)
    assert (sizer.least, sizer.most, sizer.wanted(0, 0)) == (2, 6, 2)


def test_each_use_is_replaced_at_once():
    sizer = Sizer(10, 100)
    sizer.used(9)
    assert sizer.wanted(9, 0) == 1 and sizer.wanted(9, 1) == 0


def test_a_burst_doubles_it_to_its_most():
    sizer = Sizer(8, 100)
    seen = {}
    for use in range(1, 60):
        sizer.used(1)
        seen.setdefault(sizer.capacity, use)
    assert seen == {8: 1, 16: 2, 32: 6, 64: 14, 100: 30}, "a quarter of it was used each time"
    assert sizer.wanted(0, 90) == 10


def test_a_few_uses_while_it_is_being_filled_are_no_burst():
    """With TLS that takes a while, in which there are few idle ones."""
    sizer = Sizer(64, 1024)
    for period in range(20):
        for _ in range(10):
            sizer.used(0)
        sizer.look(0)
    assert sizer.capacity == 64


def test_it_shrinks_slowly_to_its_least_where_nobody_uses_it():
    sizer = Sizer(8, 1000)
    sizer.capacity = 1000
    steps = 0
    while sizer.capacity > 8:
        before = sizer.capacity
        sizer.look(before)
        assert before > sizer.capacity >= 8
        steps += 1
    assert 10 < steps < 60
    sizer.look(8)
    assert sizer.capacity == 8


def test_it_does_not_shrink_while_it_is_used():
    sizer = Sizer(8, 1000)
    sizer.capacity = 100
    sizer.look(70)
    assert sizer.capacity == 100
