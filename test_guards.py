"""Tests of sniroute_guards.py, in its order."""

from __future__ import annotations

import random

import pytest

from sniroute_guards import METHOD_MAX, PROTOCOLS, Bucket, Slots, protocol_of
from testbed.hellos import HELLO

ALL = frozenset("123")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# -- protocols ---------------------------------------------------------------------------------

GREETINGS = [
    ("1", "SOCKS4", b"\x04\x01\0\x50\xc0\0\x02\x01user\0", 2), ("1", "SOCKS4", b"\x04\x02\0\x50", 2),
    ("1", "SOCKS5", b"\x05\x01\0", 2), ("1", "SOCKS5", b"\x05\x02\0\x02", 2), ("1", "SOCKS5", b"\x05\x0a\0\1\2\3", 2),
    ("2", "HTTP", b"GET / HTTP/1.1\r\n\r\n", 4), ("2", "HTTP", b"OPTIONS * HTTP/1.1\r\n\r\n", 8),
    ("2", "HTTP", b"PROPFIND / HTTP/1.1\r\n\r\n", 9), ("2", "HTTP", b"M-SEARCH * HTTP/1.1\r\n\r\n", 9),
    ("2", "HTTP", b"BASELINE-CONTROL / HTTP/1.1\r\n\r\n", 17), ("2", "HTTP", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 4),
    ("3", "TLS", HELLO, 1),
]


@pytest.mark.parametrize("kind, name, data, enough", GREETINGS)
def test_a_protocol_is_known_by_as_few_bytes_as_it_takes(kind, name, data, enough):
    """So a greeting of three bytes is judged when it is there."""
    for kinds in (frozenset(kind), ALL):
        for end in range(len(data) + 1):
            assert protocol_of(data[:end], kinds, whole=False) == (name if end >= enough else None)
            assert protocol_of(data[:end], kinds, whole=True) == (name if end >= enough else "")


@pytest.mark.parametrize("kind, name, data, enough", GREETINGS)
def test_a_protocol_that_is_not_blocked_passes(kind, name, data, enough):
    others = ALL - {kind}
    assert protocol_of(data, others, whole=False) == ""
    assert protocol_of(data, frozenset(), whole=False) == protocol_of(b"", frozenset(), whole=False) == ""


@pytest.mark.parametrize("data", [
    b"\x04\x03", b"\x04\0", b"\x05\0", b"\x03", b"get / HTTP/1.1", b"SSH-2.0-x\r\n", b"EHLO\r\n",
    b"*1\r\n$4\r\nPING\r\n", b"\0\0\0\x08\x04\xd2\x16\x2f", b"\x17\x03\x03", b"-GET /", b" GET /",
    b"A" * (METHOD_MAX + 1), b"GET\t/", b"\xc7ET /",
])
def test_what_cannot_become_a_blocked_protocol_passes_at_once(data):
    assert protocol_of(data, ALL, whole=False) == protocol_of(data, ALL, whole=True) == ""


def test_a_caller_who_says_nothing_passes_after_the_deadline():
    """The server may speak first, as in SMTP, SSH and MySQL."""
    for kind in PROTOCOLS:
        assert protocol_of(b"", frozenset(kind), whole=False) is None
        assert protocol_of(b"", frozenset(kind), whole=True) == ""


def test_more_bytes_never_change_a_verdict():
    dice = random.Random(4)
    pieces = [b"\x04", b"\x05", b"\x01", b"\x16", b"GET", b"P", b" ", b"-", b"\0", b"x", b"\r\n"]
    names = {name for rows in PROTOCOLS.values() for name, _, _ in rows}
    for _ in range(3000):
        data = b"".join(dice.choices(pieces, k=dice.randrange(6))) + dice.randbytes(dice.randrange(3))
        kinds = frozenset(kind for kind in PROTOCOLS if dice.random() < 0.6)
        verdicts = [protocol_of(data[:end], kinds, whole=False) for end in range(len(data) + 1)]
        said = [verdict for verdict in verdicts if verdict is not None]
        assert len(set(said)) <= 1 and verdicts == [None] * (len(verdicts) - len(said)) + said
        assert set(said) <= names | {""}
        assert protocol_of(data, kinds, whole=True) == (said[0] if said else "")


# -- rates -------------------------------------------------------------------------------------


def test_one_seconds_worth_goes_at_once_and_then_the_rate():
    clock = Clock()
    bucket = Bucket(1000.0, clock)
    assert bucket.take(600) == bucket.take(400) == 0.0
    assert bucket.take(500) == pytest.approx(0.5)
    clock.now += 0.5
    assert bucket.take(0) == pytest.approx(0.0)
    clock.now += 3600
    assert bucket.take(1000) == 0.0 and bucket.take(1) == pytest.approx(0.001)


@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize("size", [100, 16384, 262144])
def test_all_connections_together_keep_the_rate_and_none_waits_for_ever(count, size):
    """The original lets a second's worth pass, and then stands still."""
    clock, rate = Clock(), 50.0 * size
    bucket, moved = Bucket(rate, clock), [0] * count
    ready, start = [clock.now] * count, clock.now
    for _ in range(4000):
        at = ready.index(min(ready))
        clock.now = max(clock.now, ready[at])
        moved[at] += size
        ready[at] = clock.now + bucket.take(size)
    assert (sum(moved) - rate) / rate == pytest.approx(clock.now - start, abs=count * size / rate + 1.0)
    assert min(moved) >= 0.5 * max(moved) > 0


def test_no_rate_is_no_limit():
    bucket = Bucket(0, Clock())
    assert [bucket.take(10**9) for _ in range(3)] == [0.0] * 3


def test_a_bucket_has_a_clock_of_its_own():
    assert Bucket(1.0).take(3) == pytest.approx(2.0, abs=0.5)


# -- how many ----------------------------------------------------------------------------------


def test_connections_and_flows_share_the_slots():
    slots = Slots(3)
    assert [slots.acquire(udp) for udp in (False, True, False, False, True)] == [True, True, True, False, False]
    assert (slots.tcp, slots.udp) == (2, 1)
    slots.release(True)
    assert slots.acquire(False) and (slots.tcp, slots.udp) == (3, 0) and not slots.acquire(True)


def test_without_a_limit_they_are_counted_all_the_same():
    slots = Slots(0)
    assert all(slots.acquire(number % 2 == 0) for number in range(1000))
    assert (slots.tcp, slots.udp) == (500, 500)
    for number in range(1000):
        slots.release(number % 2 == 0)
    assert (slots.tcp, slots.udp) == (0, 0)
