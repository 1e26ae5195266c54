"""fuzz_oracles: what the targets of testbed/fuzz.py ask of a parser, whichever it is.

    outcome     what a call gives: its result, or a No where it refuses in a documented way; any other exception passes
    prefixes    a parser that is given all bytes so far: each prefix gives None, or what the whole gives
    sliced      a machine that is fed: in pieces it hears what it hears of the whole
    counted     a call may take so many lines of Python for its input: what is too slow is found on any host

How an input is cut is made of the input itself, so a target is a function of its bytes alone.
"""

from __future__ import annotations

import random
import sys
import zlib
from typing import Any, Callable, Iterable, NamedTuple

from sniroute_refusals import REFUSALS, Refused
from testbed.endure_inputs import Fault, pieces

COUNTED = 64  # one input of so many has its lines counted: that takes ten times as long
LINES, LINES_EACH = 20_000, 120  # of Python: for any input, and for each of its bytes


class No:
    """A refusal.  Two are the same where a peer is told the same: words for people may tell how much has come."""

    __slots__ = ("kind", "words")

    def __init__(self, kind: str, words: str):
        self.kind = kind  # the type of the exception; of Refused its row, too
        self.words = words

    def __repr__(self) -> str:
        return f"No({self.kind!r}, {self.words!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, No) and self.kind == other.kind

    __hash__ = None  # type: ignore[assignment]


def dice_of(data: bytes) -> random.Random:
    """Chance that is the input's own."""
    return random.Random(zlib.crc32(data))


def choice_of(data: bytes, count: int) -> int:
    """A number below `count`, the input's own."""
    return zlib.crc32(data, 1) % count


def outcome(call: Callable[..., Any], *args: Any, allowed: tuple[type[Exception], ...] = (Refused,)) -> Any:
    """What a call gives, or a No."""
    try:
        return call(*args)
    except allowed as error:
        kind = type(error).__name__
        if isinstance(error, Refused):
            kind += f" {error.kind} {error.alert} {error.status}"
            if error.kind not in REFUSALS:
                raise Fault(f"refused as {error.kind!r}, which is no row of REFUSALS") from None
        if not all(line.isprintable() for line in str(error).split("\n")):
            raise Fault(f"words that nobody can print: {str(error)!r}") from None
        return No(kind, str(error))


def counted(size: int, call: Callable[..., Any], *args: Any) -> Any:
    """Make a call, which may take a number of lines that grows with `size` as its input does.  Raises Fault."""
    left = LINES + LINES_EACH * size
    before = sys.gettrace()

    def trace(frame: Any, event: str, what: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left < 0:
                raise Fault(f"more than {LINES + LINES_EACH * size} lines of Python for {size} bytes")
        return trace

    sys.settrace(trace)
    try:
        return call(*args)
    finally:
        sys.settrace(before)


def measured(data: bytes, call: Callable[..., Any], *args: Any) -> Any:
    """The call, counted for a few of all inputs."""
    if zlib.crc32(data, 2) % COUNTED:
        return call(*args)
    return counted(len(data), call, *args)


def prefixes(data: bytes, parse: Callable[[bytes], Any], allowed: tuple[type[Exception], ...] = (Refused,)) -> Any:
    """What `parse` says to the whole; each prefix has to give None, or the same."""
    whole = measured(data, lambda: outcome(parse, data, allowed=allowed))
    end, decided = 0, None
    for piece in pieces(data, dice_of(data)):
        end += len(piece)
        found = outcome(parse, data[:end], allowed=allowed)
        if decided is not None and found != decided:
            raise Fault(f"after {end} bytes {found!r}, and {decided!r} before")
        decided = found
    if decided != whole and data:
        raise Fault(f"in pieces {decided!r}, whole {whole!r}")
    return whole


class Told(NamedTuple):
    """What a machine has heard."""

    events: Any
    stands: Any  # how it stands at the end; or a No: then nothing is asked of the events


def sliced(data: bytes, hear: Callable[[Iterable[bytes]], Told]) -> Told:
    """What a machine hears of the whole; in pieces it has to hear the same.  `hear` makes a machine and feeds it."""
    whole = measured(data, lambda: hear([data]))
    cut = hear(pieces(data, dice_of(data)))
    if isinstance(whole.stands, No) or isinstance(cut.stands, No):
        if whole.stands != cut.stands:
            raise Fault(f"in pieces {cut.stands!r}, whole {whole.stands!r}")
    elif whole != cut:
        raise Fault(f"in pieces {cut!r}, whole {whole!r}")
    return whole


def expect(is_so: Any, what: str) -> None:
    """Raise Fault, unless it is so."""
    if not is_so:
        raise Fault(what)


def same(a: Any, b: Any, what: str) -> None:
    """Raise Fault where two results differ."""
    if a != b:
        raise Fault(f"{what}: {a!r}, and {b!r}")
