"""sniroute_guards: what callers of a NodePass tunnel may: which protocols, how fast, how many at once; without I/O.

The last one, News, is against strangers who would fill the log.

    a caller's first bytes  --- protocol_of ---> "SOCKS5", "TLS", ...: closed;  "": passes;  None: need more
    bytes that moved        --- Bucket.take ---> seconds for which the connection is not read
    a caller                --- Slots.acquire -> whether there is room; Slots.release when it has gone
    what strangers do       --- News.has ------> whether a line of the log tells it

`protocol_of` says None only as long as the bytes so far may be the beginning of what is blocked, so a short greeting is
judged at once.  A caller that says nothing gets `whole` after a deadline, which is its owner's: in some protocols it is
the server that speaks first.

A Bucket is for all connections of an end, one in each direction.  It is asked after the bytes have moved, and lets
debts be made: each connection then waits for the debt that it finds, its own bytes included.  So nobody waits for
anybody to wake him, and all of them together keep the rate.

Threads: all is the loop's; there are no locks.

Seams: I want to ...
    block another protocol     a row in PROTOCOLS; its digit in `parse_block` (sniroute_nodeurl)

Sources: docs/configuration.md of https://github.com/NodePassProject/nodepass-core, "Protocol Blocking"; RFC 1928 for
SOCKS5, RFC 9110 section 9.1 for methods, RFC 8446 section 5.1 for TLS.

This room imports the standard library only.
"""

from __future__ import annotations

import re
import time
from typing import Callable

__version__ = "0.1.0"

METHOD_MAX = 16  # letters of a method: the longest that is used is BASELINE-CONTROL
TOLD = 10.0  # seconds between two lines of the log about the same nuisance of strangers


# -- protocols ---------------------------------------------------------------------------------

# A digit of `block` -> name and first bytes of each protocol: what it is for sure, and what may become it.  A SOCKS
# greeting has a version, and a command (4) or how many ways to log in are offered (5).  The original looks for at most
# 3 ways and at most 7 letters of a method; so a client with a fourth way, or a PROPFIND, gets past it.
PROTOCOLS: dict[str, tuple[tuple[str, re.Pattern[bytes], re.Pattern[bytes]], ...]] = {
    "1": (("SOCKS4", re.compile(rb"\x04[\x01\x02]"), re.compile(rb"\x04?")),
          ("SOCKS5", re.compile(rb"\x05[^\0]", re.DOTALL), re.compile(rb"\x05?"))),
    "2": (("HTTP", re.compile(rb"[A-Z][A-Z-]{0,%d} " % (METHOD_MAX - 1)),
           re.compile(rb"(?:[A-Z][A-Z-]{0,%d})?" % (METHOD_MAX - 1))),),
    "3": (("TLS", re.compile(rb"\x16"), re.compile(rb"")),),
}


def protocol_of(data: bytes, kinds: frozenset[str], whole: bool) -> str | None:
    """Which blocked protocol a caller speaks whose first bytes are `data`; "": none; None: need more.

    `kinds`: digits of `block`, keys of PROTOCOLS.  `whole`: no more will come in time, so nothing is waited for.
    """
    waits = False
    for kind in kinds:
        for name, sure, perhaps in PROTOCOLS[kind]:
            if sure.match(data):
                return name
            waits = waits or not data or perhaps.fullmatch(data) is not None
    return None if waits and not whole else ""


# -- rates -------------------------------------------------------------------------------------


class Bucket:
    """A token bucket: `rate` bytes a second, of which one second's worth may go at once; 0: no limit.

    Whoever made a debt pauses for as long as it takes to be paid.  The debt is bounded by what the connections have
    moved in one turn each.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic):
        self.rate = rate
        self.clock = clock
        self.level = rate  # bytes that may go at once; below zero: a debt
        self.seen = clock()

    def take(self, count: int) -> float:
        """So many bytes have moved.  Returns seconds to pause before the next; 0.0: none."""
        if not self.rate:
            return 0.0
        now = self.clock()
        self.level = min(self.rate, self.level + (now - self.seen) * self.rate) - count
        self.seen = now
        return -self.level / self.rate if self.level < 0 else 0.0


# -- how many ----------------------------------------------------------------------------------


class Slots:
    """The connections and flows of callers, at most `limit` of both together; 0: no limit.

    They are counted without a limit, too: the status line tells them.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.tcp = 0
        self.udp = 0

    def acquire(self, udp: bool) -> bool:
        """Take a slot, where one is free."""
        if self.limit and self.tcp + self.udp >= self.limit:
            return False
        if udp:
            self.udp += 1
        else:
            self.tcp += 1
        return True

    def release(self, udp: bool) -> None:
        """Give a slot back that was acquired."""
        if udp:
            self.udp -= 1
        else:
            self.tcp -= 1


# -- what is told ------------------------------------------------------------------------------


class News:
    """What strangers can bring about as often as they like: which of it is to be told, once in TOLD seconds each."""

    __slots__ = ("clock", "told")

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.told: dict[str, float] = {}  # when each kind was told; the kinds are ours, so they are few

    def has(self, what: str) -> bool:
        """Whether this kind is to be told now; then it is taken for told."""
        now = self.clock()
        if now - self.told.get(what, -TOLD) < TOLD:
            return False
        self.told[what] = now
        return True
