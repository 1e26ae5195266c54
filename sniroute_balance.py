"""sniroute_balance: one backend of several, and how one of the good ones is chosen.

    Member    one backend of a route: its connections, its failures, how fast it connects
    WAYS      how one is chosen (`balance`): RoundRobin, Least, AnyOfTwo, Fastest, ByClient, First

                    reset(good)                     who is good has changed
    Group --------> moved(member)                   its connections have changed
                    pick(allowed, client)           one of the good that `allowed` takes, or None; None allows each
                    may_try(member, chosen, client) whether a client that would be led to `chosen` may try one that
                                                    has rested

A choice takes as long for a thousand backends as for two, but where the ones that it meets are full, or were tried.
No I/O: the time and the dice are the group's.

Threads: the loop only.

Seams: I want to ...
    another way to balance    a class as RoundRobin is, its row in WAYS, and its word in sniroute_options

It imports names.
"""

from __future__ import annotations

import bisect
import collections
import functools
import hashlib
from typing import TYPE_CHECKING, Callable, Sequence

from sniroute_names import parse_ip

if TYPE_CHECKING:
    from sniroute_backends import GroupBackend
    from sniroute_groups import Group
    from sniroute_race import Row
    from sniroute_warm import WarmPool
    from sniroute_routes import Decision

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
SLOTS = 16384  # of client addresses in `hash`: with 1,000 backends each has about 16
STRIP = 30  # results of a member that are kept, two bits each: with 60 bits they are a small number of the interpreter
STRIP_MASK = (1 << 2 * STRIP) - 1
FORGET_SLOW = 30.0  # a connect time counts half after this long: who was slow is tried again
GAIN = 0.25  # of a new connect time in the moving average: the last eight have nine tenths of it
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # upper bounds of times


# -- members -----------------------------------------------------------------------------------


class Member:
    """One backend of a route, and what is known of it.  Its methods keep the numbers; Group says what follows."""

    bounds = BUCKETS  # of the buckets in `counts`

    __slots__ = ("target", "decision", "place", "weight", "active", "penalties", "fails", "passes", "why", "since",
                 "until", "trial", "held", "seconds", "heard", "dialling", "dialled", "failures", "counts", "sum",
                 "level", "rank", "is_drained", "is_near", "is_checked", "is_proven", "fails_checked", "checks_good",
                 "checks_bad", "rows", "far", "turn", "strip", "pool", "share")

    def __init__(self, target: str, now: float):
        self.target = target  # for people, and its key
        self.decision: Decision | None = None  # given by the group
        self.place = 0  # the first in the list is 0
        self.weight = 1  # how often it is in the list
        self.active = 0  # connections now, those that are being made among them
        self.penalties = 0  # failures of the last PENALTY_FOR seconds
        self.fails = 0  # in a row
        self.passes = 0  # successes in a row, while it is down
        self.why = ""  # it is down, and this is why; "" where it is good
        self.since = now  # it is so since this clock time
        self.until = 0.0  # it rests until this clock time
        self.trial: GroupBackend | None = None  # the client that tries whether it is back
        self.held: dict[GroupBackend, None] = {}  # the clients that use it, where on_down = cut
        self.seconds: float | None = None  # moving average of its connect time; None: never tried
        self.heard = 0.0  # clock time at which `seconds` was last changed
        self.dialling = 0  # connects under way
        self.dialled = 0.0  # clock time since which it has answered none of these
        self.failures = 0  # all that there were
        self.counts = [0] * (len(BUCKETS) + 1)  # connect times: of each bucket of BUCKETS, and above
        self.sum = 0.0  # of all connect times, in seconds
        self.level: int | None = None  # where it stands in Least; None: nowhere
        self.rank = 0  # how clients see it, as Group.sort found it last: OWN to DRAINED of sniroute_groups
        self.is_drained = False  # an operator wants no client led there
        self.is_near = True  # in the own zone, where there are zones
        self.is_checked = False  # by active checks
        self.is_proven = False  # one of these has passed
        self.fails_checked = 0  # active checks in a row
        self.checks_good = self.checks_bad = 0  # all that there were
        self.rows: Sequence[Row] = ()  # its addresses, as `is_near` was asked about
        self.far: frozenset[Row] = frozenset()  # of these, the ones in another zone
        self.turn = 0  # counts up: which one of its addresses comes first, see `ordered`
        self.pool: WarmPool | None = None  # where the route has warm connections, or `reuse`
        self.share = 0  # so many of the route's warm connections are its own
        self.strip = 0  # its last results: see `mark`

    @property
    def load(self) -> float:
        """Its connections, and its failures of late, for each time that it is in the list."""
        return (self.active + self.penalties) / self.weight

    def mark(self, is_good: bool) -> None:
        """Remember how a client, or a check, fared: two bits, 1 and whether that was good.  The latest are last."""
        self.strip = (self.strip << 2 | 2 + is_good) & STRIP_MASK

    def results(self) -> str:
        """The last results, the latest last: `+` good, `-` bad."""
        strip, shown = self.strip, ""
        while strip:
            shown = "-+"[strip & 1] + shown
            strip >>= 2
        return shown

    def ordered(self, rows: Sequence[Row], lags: Callable[[Row], bool]) -> Sequence[Row]:
        """The addresses of one host in the order in which they are tried; `lags` as Laggards.has of sniroute_race.

        Those that do not lag, then those in the own zone, come first.  The best of one family take turns in the first
        place, from call to call: so they share the weight of the host.
        """
        flaws = {row: 2 * lags(row) + (row in self.far) for row in rows}
        rows = sorted(rows, key=flaws.__getitem__)
        family, few = rows[0][0], flaws[rows[0]]
        turning = [row for row in rows if row[0] == family and flaws[row] == few]
        self.turn += 1
        at = self.turn % len(turning)
        return (*turning[at:], *turning[:at], *(row for row in rows if row not in turning))

    def connected(self, seconds: float, now: float) -> None:
        """A connect succeeded, and took so long."""
        self.dialled = now
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds
        known = self.seconds  # as `observe`, without a call for each connection
        self.seconds = seconds if known is None else known + GAIN * (seconds - known)
        self.heard = now

    def observe(self, seconds: float, now: float) -> None:
        """A connect took so many seconds; of one that failed they are connect_timeout, as if it had been silent."""
        known = self.seconds
        self.seconds = seconds if known is None else known + GAIN * (seconds - known)
        self.heard = now

    def cost(self, now: float, timeout: float) -> float:
        """Seconds that a connect is expected to take; `timeout` is connect_timeout.

        One under way that is silent costs what it has cost so far.  Each failure of late costs a `timeout`.
        """
        if self.seconds is None:
            expected = timeout if self.dialling else 0.0  # one client finds out
        else:
            expected = self.seconds * 0.5 ** ((now - self.heard) / FORGET_SLOW)
        if self.dialling:
            expected = max(expected, now - self.dialled)
        return expected + self.penalties * timeout


# -- ways to balance ---------------------------------------------------------------------------


Allowed = Callable[[Member], bool] | None  # whether a member may be picked; None: each may


class RoundRobin:
    """One after another.  The base of the others: a copy in the list has a place of its own."""

    follows_load = False  # whether `moved` is called, for each connection that begins and ends

    def __init__(self, group: Group):
        self.group = group
        self.good: list[Member] = []
        self.at = 0

    def reset(self, good: list[Member]) -> None:
        """Who is good has changed: these, each as often as its weight."""
        self.good = good

    def moved(self, member: Member) -> None:
        """The load of a member has changed."""

    def pick(self, allowed: Allowed, client: str) -> Member | None:
        """A good member that is allowed, for the client at this address; None where there is none."""
        self.at += 1
        if allowed is None and self.good:
            return self.good[self.at % len(self.good)]
        return self.scan(self.at, allowed)

    def instead(self, allowed: Allowed, client: str) -> Member | None:
        """Another one than was picked just now."""
        return self.scan(self.at, allowed)

    def scan(self, begin: int, allowed: Allowed) -> Member | None:
        """The first that is allowed, from a place on."""
        good = self.good
        for step in range(len(good)):
            member = good[(begin + step) % len(good)]
            if allowed is None or allowed(member):
                return member
        return None

    def may_try(self, member: Member, chosen: Member | None, client: str) -> bool:
        """Whether a client that would be led to `chosen` may try a member that has rested."""
        return True


class First(RoundRobin):
    """The first of the list; so another is tried again only where it would be before that."""

    def pick(self, allowed: Allowed, client: str) -> Member | None:
        return self.scan(0, allowed)

    instead = pick

    def may_try(self, member: Member, chosen: Member | None, client: str) -> bool:
        return chosen is None or member.place < chosen.place


class AnyOfTwo(RoundRobin):
    """Two at random, and of these the one with less to do.

    Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 1996.
    """

    def pick(self, allowed: Allowed, client: str) -> Member | None:
        """As RoundRobin.pick."""
        chance, good = self.group.chance, self.good
        if not good:
            return None
        one = int(chance() * len(good))
        first, second = good[one], good[(one + 1 + int(chance() * (len(good) - 1))) % len(good)]
        better, worse = (first, second) if self.prefers(first, second) else (second, first)
        if allowed is None or allowed(better):
            return better
        return worse if allowed(worse) else self.scan(one, allowed)

    instead = pick

    def prefers(self, one: Member, other: Member) -> bool:
        """Whether one is the better."""
        return (one.active + one.penalties) * other.weight <= (other.active + other.penalties) * one.weight


class Fastest(AnyOfTwo):
    """Two at random, and of these the one that connects faster.  Nobody is left out for being slow."""

    def prefers(self, one: Member, other: Member) -> bool:
        now, timeout = self.group.clock(), self.group.options.connect_timeout
        mine, its = one.cost(now, timeout), other.cost(now, timeout)
        return mine < its or mine == its and super().prefers(one, other)


class Least(RoundRobin):
    """The one with the fewest connections; of equals, the one that has been so for longest.

    The members stand on levels by their load, so that a choice takes as long for a thousand as for two.
    """

    follows_load = True

    def __init__(self, group: Group):
        super().__init__(group)
        self.levels: list[collections.OrderedDict[Member, None]] = []  # by load; as many as there ever were
        self.low = 0  # no level below it has a member

    def reset(self, good: list[Member]) -> None:
        """As RoundRobin.reset."""
        for level in self.levels:
            for member in level:
                member.level = None
        self.levels.clear()
        for member in dict.fromkeys(good):
            self.put(member, int(member.load))
        self.low = min((member.level for member in good), default=0)

    def put(self, member: Member, level: int) -> None:
        """Stand on a level, behind those who came before."""
        levels = self.levels
        while len(levels) <= level:
            levels.append(collections.OrderedDict())
        levels[level][member] = None
        member.level = level

    def moved(self, member: Member) -> None:
        """As RoundRobin.moved: the member goes to the level of its load."""
        before, level = member.level, (member.active + member.penalties) // member.weight
        if before is None or level == before:
            return
        levels, low = self.levels, self.low
        del levels[before][member]
        self.put(member, level)
        if level < low:
            self.low = level
        else:
            while not levels[low]:
                low += 1
            self.low = low

    def pick(self, allowed: Allowed, client: str) -> Member | None:
        """As RoundRobin.pick."""
        if not self.levels:
            return None
        for member in self.levels[self.low]:
            if allowed is None or allowed(member):
                self.levels[self.low].move_to_end(member)  # in the list more than once, it may stay on its level
                return member
        for level in self.levels[self.low + 1:]:
            for member in level:
                if allowed(member):
                    return member
        return None

    instead = pick


class ByClient(RoundRobin):
    """The same one for each client address: rendezvous hashing.

    Each pair of client and backend has a score, and the highest wins: so of those that lose a backend each finds
    another one, and nobody else moves.  Clients fall into SLOTS, whose winner is remembered.
    Source: Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998.
    """

    def __init__(self, group: Group):
        super().__init__(group)
        self.entries: list[Member] = []
        self.seeds: list[int] = []
        self.winners: dict[int, Member] = {}  # by slot, of all members
        self.chosen: dict[int, Member | None] = {}  # by slot, of the good ones

    def reset(self, good: list[Member]) -> None:
        """As RoundRobin.reset."""
        self.good = good
        self.chosen = {}
        if self.entries != self.group.entries:
            self.entries = list(self.group.entries)
            seen: collections.Counter[str] = collections.Counter()
            self.seeds = []
            for member in self.entries:
                seen[member.target] += 1
                self.seeds.append(scrambled(f"{member.target} {seen[member.target]}"))
            self.winners = {}

    def winner(self, slot: int, allowed: Allowed) -> Member | None:
        """The member with the highest score of a slot.  Source of the mix: Steele, "SplitMix", 2014, its last step."""
        turn = scrambled(str(slot))
        best, found = -1, None
        for seed, member in zip(self.seeds, self.entries):
            mixed = (seed ^ turn) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 31) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            if mixed > best and (allowed is None or allowed(member)):
                best, found = mixed, member
        return found

    def owner(self, slot: int) -> Member:
        """Whose this slot is while all are good."""
        if slot not in self.winners:
            self.winners[slot] = self.winner(slot, None)
        return self.winners[slot]

    def pick(self, allowed: Allowed, client: str) -> Member | None:
        """As RoundRobin.pick."""
        slot, good = slot_of(client), self.group.is_good
        if slot in self.chosen:
            member = self.chosen[slot]
        else:
            member = self.owner(slot)
            if not good(member):
                member = self.winner(slot, good)
            self.chosen[slot] = member
        if member is None or allowed is None or allowed(member):
            return member
        return self.winner(slot, lambda member: good(member) and allowed(member))

    instead = pick

    def may_try(self, member: Member, chosen: Member | None, client: str) -> bool:
        return self.owner(slot_of(client)) is member


def scrambled(text: str) -> int:
    """64 bits that look random, and are the same in each process, so that routers agree."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@functools.lru_cache(4096)
def slot_of(client: str) -> int:
    """The slot of a client's address; of IPv6 the /64 counts, which is what one client has."""
    ip = parse_ip(client)
    return scrambled(str(int(ip) >> 64) if ip.version == 6 else str(ip)) % SLOTS


WAYS: dict[str, type[RoundRobin]] = {"round-robin": RoundRobin, "least": Least, "random": AnyOfTwo, "hash": ByClient,
                                     "first": First, "latency": Fastest}
