"""Tests of sniroute_peering.py: what is said on a control channel, and how it ends."""

from __future__ import annotations

from typing import Any, Callable, Iterator

import pytest

import sniroute_peering
from conftest import FakeClock
from sniroute_loop import Loop
from sniroute_peering import NONSENSE_MAX, UNREAD_MAX, Link
from sniroute_refusals import Failed
from sniroute_signals import LINE_MAX, Signal, SignalReader, encode

KEY = b"capkey"


class Wire:
    """What a link asks of a wire, and what was sent."""

    def __init__(self) -> None:
        self.on_data: Any = None
        self.on_end: Any = None
        self.on_room: Any = None
        self.sent: list[bytes] = []
        self.unsent = 0
        self.closed = False

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def resume(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    reset = close


class Said:
    """A link, and all that it has told."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.heard: list[Signal] = []
        self.ends: list[str] = []
        self.wire = Wire()
        self.link = Link(loop, self.wire, KEY, self.heard.append, self.ends.append, loop.batch(Link.flush))
        self.link.start()

    def sent(self) -> list[Any]:
        """The signals that have left by now."""
        self.loop.hurry()
        self.loop.turn()
        data, self.wire.sent = b"".join(self.wire.sent), []
        return SignalReader(KEY).feed(data)

    def hears(self, *signals: Signal) -> None:
        self.wire.on_data(b"".join(encode(signal, KEY) for signal in signals))


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    made = FakeClock()
    monkeypatch.setattr(sniroute_peering, "monotonic", made)
    return made


@pytest.fixture
def link(clock) -> Iterator[Said]:
    loop = Loop(lambda owner: pytest.fail(f"a fault in {owner}"))
    yield Said(loop)
    loop.close()


def test_it_asks_at_once_and_answers_at_once(link):
    assert link.sent() == [Signal("ping")]
    link.hears(Signal("ping"))
    assert link.sent() == [Signal("pong")] and link.heard == []


def test_the_time_of_an_answer_is_the_ping(link, clock):
    clock.jump(0.25)
    link.hears(Signal("pong"))
    assert link.link.ping == 0.25 and link.heard == [Signal("pong")]
    clock.jump(1.0)
    link.hears(Signal("pong"))
    assert link.link.ping == 0.25, "nobody has asked"


def test_what_many_callers_need_leaves_in_one_write(link):
    link.sent()
    for number in range(50):
        link.link.send(Signal("tcp", "192.0.2.1:5", f"{number:08x}"))
    link.loop.hurry()
    link.loop.turn()
    assert len(link.wire.sent) == 1 and len(link.sent()) == 50


def test_silence_ends_it_after_three_intervals(link, clock):
    clock.jump(15.0)
    link.link.tick(5.0)
    assert link.ends == []
    clock.jump(0.1)
    link.link.tick(5.0)
    assert link.ends == ["the other end has said nothing for 15 s"] and link.wire.closed


def test_any_line_is_a_sign_of_life(link, clock):
    for _ in range(10):
        clock.jump(14.0)
        link.hears(Signal("ping"))
        link.link.tick(5.0)
    assert link.ends == []


@pytest.mark.parametrize("error, words", [
    (None, "the other end has closed the link"), (Failed("reset", "broken pipe"), "has broken off: broken pipe")])
def test_its_end_is_told_once(error, words, link):
    link.wire.on_end(error)
    link.link.end("again")
    assert len(link.ends) == 1 and words in link.ends[0]
    link.link.send(Signal("ping"))
    assert link.sent() == []


def test_nonsense_is_skipped_until_it_is_too_much(link):
    for _ in range(NONSENSE_MAX):
        link.wire.on_data(b"!!\n")
    link.hears(Signal("flush"))
    assert link.ends == [] and link.heard == [Signal("flush")]
    link.wire.on_data(b"!!\n")
    assert len(link.ends) == 1


def test_a_line_without_an_end_ends_it(link):
    link.wire.on_data(b"A" * (LINE_MAX + 1))
    assert "more than 4096 bytes" in link.ends[0]


def test_an_end_that_reads_nothing_is_left(link):
    link.sent()
    link.wire.unsent = UNREAD_MAX + 1
    link.link.send(Signal("tcp", "192.0.2.1:5", "00000001"))
    link.sent()
    assert link.ends == ["the other end takes no signals"]


def test_what_stands_behind_the_end_is_not_heard(link):
    """A signal may end the link: the rest of the same bytes belongs to nobody."""
    heard: Callable[[Signal], None] = lambda signal: link.link.end("enough")
    link.link.heard = heard
    link.hears(Signal("flush"), Signal("tcp", "192.0.2.1:5", "00000001"))
    assert link.ends == ["enough"] and link.heard == []
