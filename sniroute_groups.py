"""sniroute_groups: the backends of one route: who is good, who rests, who waits for room.

    a client --- Group.pick ---> Member         the next one for it; None: it waits, and `serve` leads it on
                     ^
                     | good_news, bad_news      what clients met
                     | checked                  what active checks met (sniroute_checks)
                     | Book.drain               what an operator wants (sniroute_book)

    Group     one route's members (sniroute_balance), and the policy.  It reads and writes nothing
    Several   the options of such a route

All groups of a router stand in a Book (sniroute_book).

How clients see a member, its rank, best first.  A client is led to the best rank that there is.  It is led to the next
one where it has tried all of the better ranks, or finds them full.  But DOWN is only for who has tried all the others:
where these are full, the client waits.

    OWN       good, and in the own zone; without zones each good one
    FOREIGN   good, in another zone
    UNKNOWN   active checks are on, and none has passed yet
    DOWN      it has failed too often; when nothing else is left, each is tried once for each client
    DRAINED   an operator wants no client led there: never used

A member that is down by its clients rests; then one client tries it, and the others do not wait for that:

    good --- health_fail failures in a row ---> down, rests fallback_interval ---> one client tries it
      ^                                           ^                                   |         |
      +------ health_pass successes --------------|-----------------------------------+         |
                                                  +---------------- it fails -------------------+

Where checks are active, they bring it back instead of a client: health_pass of them, and not before its rest is over.
So a member whose checks pass while its clients fail changes its state once in fallback_interval, not each second.

Threads: the loop only.  Other threads may read a Member's numbers, which change by single assignments, and call
Group.states and Several.shown.

Seams: I want to ...
    another way to balance        sniroute_balance
    another option of such routes a row in SEVERAL_OPTIONS of sniroute_options, a field of Several, and its use
    another reason to prefer one  a rank, and `Group.rank`

It imports balance, targets and names.
"""

from __future__ import annotations

import bisect
import collections
import logging
import random
import time
from typing import TYPE_CHECKING, Any, Callable, Collection, Iterable, NamedTuple, Sequence

from sniroute_balance import BUCKETS, STRIP_MASK, WAYS, ByClient, Member, RoundRobin, slot_of
from sniroute_names import printable
from sniroute_targets import Backend, Scheme, literal_row

if TYPE_CHECKING:
    from sniroute_backends import GroupBackend
    from sniroute_book import Book, Warmth
    from sniroute_loop import Loop, Queue
    from sniroute_race import Row
    from sniroute_routes import Decision, Route
    from sniroute_targets import Targets

__version__ = "0.1.0"

log = logging.getLogger("sniroute")
monotonic = time.monotonic

# Limits, each with its reason.  Times in seconds.
PENALTIES_MAX = 100  # failures of one member that count as connections at once
SLOWEST_START = 0.05  # of its share, for a backend that has just come back: so that some client tries it at once

# Refusals of a target that has to wait, or of a program, which are no fault of the backend.
NO_FAULT = frozenset(("busy", "tunnel_budget", "tunnel_stopping", "internal"))
SHARES = frozenset(("warm_jitter",))  # options that are floats, and no seconds
OWN, FOREIGN, UNKNOWN, DOWN, DRAINED = range(5)  # ranks of a member
WORDS = ("good", "good", "unknown", "down", "drained")  # of a rank, for people; FOREIGN beside OWN is "spare"


# -- options -----------------------------------------------------------------------------------


class Several(NamedTuple):
    """The options of a route with several backends, SEVERAL_OPTIONS of sniroute_options.  Seconds; 0 is off."""

    scheme: Scheme  # the row of such a target
    book: Callable[[Targets, Loop], Book]  # makes what the groups of one router share
    fixed: list[Decision]  # the decision of each target, where they have no fields: the same for each name
    balance: str = "round-robin"
    health: str = "passive"  # or off, or what sniroute_probes reads
    health_interval: float = 10.0
    health_timeout: float = 2.0
    health_fail: int = 3
    health_pass: int = 2
    fallback_interval: float = 30.0
    slow_start: float = 0.0
    on_down: str = "keep"
    connect_timeout: float = 5.0
    tries: int | None = None  # None: each backend once
    connect_budget: float = 15.0
    max_backend_connections: int | None = None
    queue: float = 5.0
    queue_length: int = 100
    max_lifetime: float = 0.0
    warm: int = 0
    warm_max_idle: float = 55.0
    warm_max_age: float = 0.0
    warm_jitter: float = 0.1
    warm_order: str = "lifo"
    reuse: str = "off"

    def checks(self, target: str) -> bool:
        """Whether a backend is checked actively: not a tunnel, nor a program, which would be started for that."""
        kinds = ("tcp",) if self.health.startswith("http") else ("tcp", "unix")
        return self.health not in ("passive", "off") and target.partition(":")[0] in kinds

    def shown(self) -> list[str]:
        """The options that are not as they are by default, for people."""
        return [f"{name} {shown_value(name, value)}" for name, value in zip(self._fields, self)
                if value != self._field_defaults.get(name, value)]


def shown_value(name: str, value: Any) -> str:
    """The value of an option as it is written, for people: seconds, a share, a count or a word."""
    if not isinstance(value, float) or name in SHARES:
        return str(value)
    return f"{value:g} s" if value else "off"


# -- groups ------------------------------------------------------------------------------------


class Group:
    """The members of one route.  `clock` and `chance` (0 to 1) are the time and the dice.  Loop only, but `states`."""

    bounds = BUCKETS  # of the buckets in `waits`

    def __init__(self, book: Book, clock: Callable[[], float] = monotonic, chance: Callable[[], float] = random.random):
        self.book = book
        self.clock = clock
        self.chance = chance
        # `adopt` gives these four, and again with each reload.
        self.route: Route | None = None
        self.options: Several
        self.turns: Queue  # the deadline of who waits for room
        self.patience: tuple[Queue, Queue]  # the two deadlines of a connect
        self.members: dict[str, Member] = {}
        self.entries: list[Member] = []  # each as often as it is in the list
        self.good: list[Member] = []  # of these, the ones of the best rank; none where all are down or drained
        self.spare: list[Member] = []  # those of the next ranks before DOWN; each once, the best first
        self.is_stale = False  # a rank may have changed since `sort`
        # Down by their clients: whose rest is over first comes first.
        self.resting: collections.OrderedDict[Member, None] = collections.OrderedDict()
        # Clients that wait for room, in order of arrival, and since when.
        self.waiting: collections.OrderedDict[GroupBackend, float] = collections.OrderedDict()
        self.waits = [0] * (len(BUCKETS) + 1)  # how long clients have waited: of each bucket of BUCKETS, and above
        self.waits_sum = 0.0
        self.balancer: RoundRobin = RoundRobin(self)
        self.warmth: Warmth | None = None  # where connections are dialled ahead

    @property
    def pattern(self) -> str:
        """The route, for people."""
        return self.route.pattern

    def adopt(self, route: Route, decisions: Sequence[Decision]) -> None:
        """Have these members, and these options.

        What is known of a member is kept; one that is gone keeps its connections, and gets no more.
        """
        now = self.clock()
        before, self.members, self.entries = self.members, {}, []
        asks_anew = self.route is not None and self.options.health != route.several.health
        self.options, self.route = route.several, route
        for decision in decisions:
            member = self.members.get(decision.target)
            if member is None:
                member = before.pop(decision.target, None) or self.book.recall(Member(decision.target, now))
                member.place, member.weight = len(self.members), 0
                member.is_drained = (route.pattern, decision.target) in self.book.drained
                self.members[decision.target] = member
            member.decision = decision
            member.is_checked = self.options.checks(decision.target)
            member.weight += 1
            self.entries.append(member)
        for member in before.values():
            self.book.let_go(member)
        if type(self.balancer) is not WAYS[self.options.balance]:
            self.balancer.reset([])
            self.balancer = WAYS[self.options.balance](self)
        for member in self.members.values():
            if self.options.health == "off":
                member.why, member.fails = "", 0
            if asks_anew:  # what another check has proven says nothing
                member.is_proven, member.fails_checked = False, 0
            self.locate(member, member.rows or literal_rows(member.decision))
        self.warmth = self.book.warmth(self)
        self.resting = collections.OrderedDict(
            (member, None) for member in sorted(self.members.values(), key=lambda each: each.until)
            if member.why and not member.is_checked)
        self.turns = self.book.turns(self.options.queue)
        self.patience = self.book.patience(self.options.connect_timeout)
        self.sort()

    # -- ranks

    def rank(self, member: Member) -> int:
        """How clients see it now."""
        if member.is_drained:
            return DRAINED
        if member.why:
            return DOWN
        if member.is_checked and not member.is_proven:
            return UNKNOWN
        return OWN if member.is_near else FOREIGN

    def states(self) -> dict[Member, str]:
        """How each member stands now, in one word: good, spare, unknown, down or drained.  Any thread."""
        ranks = {member: self.rank(member) for member in list(self.members.values())}
        best = min(ranks.values(), default=DRAINED)
        return {member: "spare" if best < rank == FOREIGN else WORDS[rank] for member, rank in ranks.items()}

    def is_good(self, member: Member) -> bool:
        """Whether it is one of `good`, which is not searched for that."""
        return bool(self.good) and member.rank == self.good[0].rank and self.members.get(member.target) is member

    def changed(self) -> None:
        """A rank has changed: sort at once where somebody waits for that, else when the next client comes.

        So a thousand that go down at once are mostly sorted once.  Warm connections are shared anew for the first of
        them, and in the next turn for all the others.
        """
        self.is_stale = True
        if self.waiting:
            self.sort()
        elif self.warmth is not None and self not in self.book.stale.due:
            self.sort()
            self.book.stale.put(self)

    def refresh(self) -> None:
        """Sort, where a change has left that for later."""
        if self.is_stale:
            self.sort()

    def sort(self) -> None:
        """Find out who is good, and tell all that depend on it."""
        self.is_stale = False
        ranks: dict[int, list[Member]] = {}
        for member in self.entries:
            member.rank = self.rank(member)
            ranks.setdefault(member.rank, []).append(member)
        best = min(ranks)
        self.good = ranks[best] if best < DOWN else []
        self.spare = [member for rank in range(best + 1, DOWN) for member in dict.fromkeys(ranks.get(rank, ()))]
        self.balancer.reset(self.good)
        if self.warmth is not None:
            self.warmth.share()
        if self.waiting:
            self.serve((*self.good, *self.spare, *ranks.get(DOWN, ())))

    def locate(self, member: Member, rows: Sequence[Row]) -> None:
        """These are its addresses now: is one of them in the own zone?  Until that is known it is taken for near.

        A tunnel is in no zone: its port on this host says nothing of its far end.
        """
        member.rows = rows
        zones = self.book.targets.zones
        member.far = frozenset(row for row in rows if zones is not None and not zones.has(row))
        is_near = zones is None or not member.decision.scheme.is_tunnel and (not rows or len(member.far) < len(rows))
        if is_near is not member.is_near:
            member.is_near = is_near
            self.changed()
        if member.pool is not None and rows:
            member.pool.keep_only(rows)

    def way_to(self, member: Member) -> Backend | None:
        """A new way to a member; None where its target has to be prepared first.  Raises Refused."""
        way = member.decision.scheme.ready(self.book.targets, member.decision)
        if way is not None:
            rows = way.addresses
            if rows is not member.rows and rows != member.rows:  # a tunnel has new ones each time, which are equal
                self.locate(member, rows)
            if len(rows) > 1:
                way.addresses = member.ordered(rows, self.book.targets.laggards.has)
        return way

    def find(self, address: str) -> Member | None:
        """The member that an operator names: by its target, by what stands behind `tcp:`, or as /status shows it."""
        member = self.members.get(address) or self.members.get(f"tcp:{address}")
        if member is None and ("?" in address or "..." in address):  # what `printable` writes for what it cannot show
            alike = [each for each in self.members.values() if printable(each.target) == address]
            member = alike[0] if len(alike) == 1 else None
        return member

    # -- which one

    def has_room(self, member: Member) -> bool:
        """Whether it may have one more connection."""
        limit = self.options.max_backend_connections
        return limit is None or member.active < limit

    def pick(self, client: GroupBackend, address: str) -> Member | None:
        """The next member for a client; None where it has to wait for room.  Raises LookupError where none is left."""
        if self.is_stale:
            self.sort()
        tried = client.told_of
        if not tried and self.options.max_backend_connections is None:
            chosen = self.balancer.pick(None, address)
        else:
            chosen = self.balancer.pick(lambda member: member not in tried and self.has_room(member), address)
        if self.resting:
            member = self.next_trial(tried, chosen, address)
            if member is not None:
                member.trial = client
                return member
        if chosen is None:
            return self.instead(tried)
        return self.slowly(chosen, tried, address) if self.options.slow_start else chosen

    def instead(self, tried: Collection[Member]) -> Member | None:
        """As `pick`, where none of the good ones has room, or all of them were tried."""
        free = [member for member in self.spare if member not in tried and self.has_room(member)]
        if free:
            return min(free, key=lambda member: (member.rank, member.load))
        if any(member not in tried for member in (*self.good, *self.spare)):
            return None
        left = [member for member in self.members.values() if member not in tried and member.rank == DOWN]
        if not left:
            raise LookupError
        return next(filter(self.has_room, left), None)

    def next_trial(self, tried: Collection[Member], chosen: Member | None, address: str) -> Member | None:
        """A member whose rest is over and that no other client tries, where this client may try it; else None.

        It would be led to `chosen`: who would be served in the own zone tries none in another one.
        """
        now = self.clock()
        if isinstance(self.balancer, ByClient):
            owner = self.balancer.owner(slot_of(address))
            resting: Iterable[Member] = [owner] if owner in self.resting else []
        else:
            resting = self.resting
        for member in resting:
            if member.until > now:
                return None  # so is that of all behind it
            if member.trial is None and member not in tried and not member.is_drained and self.has_room(member) \
                    and (chosen is None or member.is_near or not chosen.is_near) \
                    and self.balancer.may_try(member, chosen, address):
                return member
        return None

    def slowly(self, chosen: Member, tried: Collection[Member], address: str) -> Member:
        """`chosen`, or another one where that has just come back: its share grows over `slow_start`."""
        now, ramp = self.clock(), self.options.slow_start
        passed: set[Member] = set()
        member: Member | None = chosen
        while member is not None:
            share = (now - member.since) / ramp if member.passes else 1.0  # no `passes`: it was never down
            if share >= 1.0 or self.chance() < max(share, SLOWEST_START):
                return member
            passed.add(member)
            member = self.balancer.instead(
                lambda each: each not in passed and each not in tried and self.has_room(each), address)
        return chosen

    # -- what becomes of it

    def take(self, member: Member, client: GroupBackend) -> None:
        """A client begins to use it: first of all a connect."""
        member.active += 1
        if not member.dialling:
            member.dialled = self.clock()
        member.dialling += 1
        if self.options.on_down == "cut":
            member.held[client] = None
        if self.balancer.follows_load:
            self.balancer.moved(member)

    def leave(self, member: Member, client: GroupBackend) -> None:
        """A client uses it no more."""
        member.active -= 1
        if member.held:
            member.held.pop(client, None)
        if member.trial is client:
            member.trial = None
        if self.balancer.follows_load:
            self.balancer.moved(member)
        if self.warmth is not None and self.options.max_backend_connections is not None:
            self.warmth.fit(member)
        if self.waiting:
            self.serve((member,))

    def good_news(self, member: Member) -> None:
        """It has served a client."""
        member.strip = (member.strip << 2 | 3) & STRIP_MASK  # as Member.mark, without a call for each connection
        member.fails = 0
        if not member.why or member.is_checked:
            return
        member.passes += 1
        if member.passes >= self.options.health_pass:
            self.came_back(member)
            return
        member.until = 0.0  # the next client may try it at once
        if member in self.resting:
            self.resting.move_to_end(member, last=False)

    def came_back(self, member: Member) -> None:
        """It is good again."""
        log.info("%s: backend %s is back, after %.0f s", self.pattern, printable(member.target),
                 self.clock() - member.since)
        member.why, member.since = "", self.clock()
        self.resting.pop(member, None)
        self.changed()

    def penalise(self, member: Member) -> None:
        """It has failed: for a while that counts as a connection."""
        member.failures += 1
        member.mark(False)
        member.observe(self.options.connect_timeout, self.clock())
        if member.penalties < PENALTIES_MAX:
            member.penalties += 1
            if self.balancer.follows_load:
                self.balancer.moved(member)
            self.book.penalties.put(Penalty(self, member))

    def bad_news(self, member: Member, why: str, is_trial: bool) -> None:
        """It has failed a client, or a dial ahead, and it is to blame.  `is_trial`: that client was its one try."""
        member.fails += 1
        if self.options.health == "off" or self.members.get(member.target) is not member:
            return
        if member.why:
            if is_trial:
                self.rest(member)
        elif member.fails >= self.options.health_fail:
            self.rest(member)
            self.went_down(member, why, f"{member.fails} failures in a row; the next try is in "
                                        f"{self.options.fallback_interval:g} s")

    def checked(self, member: Member, why: str) -> None:
        """An active check is over; `why` it failed, or ""."""
        if self.members.get(member.target) is not member:
            return
        member.mark(not why)
        if why:
            member.checks_bad += 1
            member.fails_checked += 1
            member.passes = 0 if member.why else member.passes
            if not member.why and member.fails_checked >= self.options.health_fail:
                member.until = 0.0  # no rest: checks alone say when it is back
                self.went_down(member, why, f"{member.fails_checked} checks in a row")
            return
        member.checks_good += 1
        member.fails_checked = 0
        if not member.is_proven:
            member.is_proven = True
            self.changed()
        if member.why:
            member.passes += 1
            if member.passes >= self.options.health_pass and self.clock() >= member.until:
                # Where clients found it down, one more failure of theirs is enough.
                member.fails = self.options.health_fail - 1 if member.until else 0
                self.came_back(member)

    def went_down(self, member: Member, why: str, after: str) -> None:
        """It is not good any more.  One log line for each change."""
        member.why, member.since, member.passes = why, self.clock(), 0
        log.warning("%s: backend %s is down: %s (%s)", self.pattern, printable(member.target), printable(why), after)
        self.changed()
        for client in list(member.held) if self.options.on_down == "cut" else ():
            client.cut()

    def rest(self, member: Member) -> None:
        """Have no client try it for `fallback_interval`."""
        member.passes = 0
        member.until = self.clock() + self.options.fallback_interval
        if not member.is_checked:
            self.resting[member] = None
            self.resting.move_to_end(member)

    # -- who waits

    def suits(self, member: Member, tried: Collection[Member]) -> bool:
        """Whether a client that has tried these may be led to a member: to one that is down only after all others."""
        return member not in tried and (member.rank < DOWN or member.rank == DOWN
                                        and all(each in tried for each in (*self.good, *self.spare)))

    def serve(self, members: Iterable[Member]) -> None:
        """These may have room: each gets the first clients that wait for it, as many as it has room for.

        A member that a reload took out gets nobody.
        """
        for member in members:
            while self.waiting and self.has_room(member) and self.members.get(member.target) is member:
                client = next((each for each in self.waiting if self.suits(member, each.told_of)), None)
                if client is None:
                    break
                self.count_wait(client)
                client.use(member)
                client.connection.resume()

    def count_wait(self, client: GroupBackend) -> None:
        """A client waits no more, if it did: it has got its turn, or it is gone."""
        since = self.waiting.pop(client, None)
        if since is not None:
            seconds = self.clock() - since
            self.waits[bisect.bisect_left(BUCKETS, seconds)] += 1
            self.waits_sum += seconds


def literal_rows(decision: Decision) -> tuple[Row, ...]:
    """The address that a target names by number; nothing where it names none."""
    row = literal_row(decision.rest) if decision.target.startswith("tcp:") else None
    return () if row is None else (row,)


class Penalty:
    """A failure that counts as a connection for PENALTY_FOR."""

    __slots__ = ("group", "member")

    def __init__(self, group: Group, member: Member):
        self.group = group
        self.member = member

    def forget(self) -> None:
        """It counts no more."""
        self.member.penalties -= 1
        if self.group.balancer.follows_load:
            self.group.balancer.moved(self.member)
