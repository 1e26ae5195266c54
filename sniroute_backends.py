"""sniroute_backends: several backends behind one route: which one, which next, which rests.

    Decision with members --- choose ---> GroupBackend, one for each client: tells each event to its member's Backend,
                                              |         and goes on to the next member where that fails
                                  Group.pick  |
                                              v
    Group     one route's members (sniroute_balance): who is good, who rests, who waits for room
    Book      the groups of one router, kept over a reload; the queues that they share

A member is good, or it is down and rests:

    good --- health_fail failures in a row ---> down, rests fallback_interval ---> one client tries it
      ^                                           ^                                   |         |
      +------ health_pass successes --------------|-----------------------------------+         |
                                                  +---------------- it fails -------------------+

While one is good only good ones are used.  When none is, each is tried once for each client.  The next one gets the
same bytes as long as they are all that the client has said, and the backend has not said one: a Connection asks
`GroupBackend.failed`, and opens again.

Who is to blame?  A backend that takes the connect and closes without a byte may have been asked for nonsense.  So
that counts as its failure only when another backend then answers to the same bytes: else a stranger's broken hello
could have all of them rest.

Threads: the loop only.  Others read: a Member's numbers change by single assignments.

Seams: I want to ...
    another way to balance        sniroute_balance
    another option of such routes a row in SEVERAL_OPTIONS of sniroute_options, a field of Several, and its use

It imports balance, deadlines, resets, targets, flow, race, log, the loop, names and refusals.
"""

from __future__ import annotations

import collections
import logging
import random
import time
from typing import TYPE_CHECKING, Any, Callable, Collection, Iterable, Iterator, NamedTuple, Sequence

from sniroute_balance import WAYS, ByClient, Member, RoundRobin, slot_of
from sniroute_deadlines import silent_connect
from sniroute_flow import EARLY
from sniroute_log import BACKEND_DOWN, LIFETIME
from sniroute_loop import Loop, Queue
from sniroute_names import printable
from sniroute_race import STAGGER, no_answer
from sniroute_refusals import Refused
from sniroute_resets import will_reset
from sniroute_targets import Another, Backend, Doubt, NotYet, Retry, Scheme, Targets, Unreachable, Verdict

if TYPE_CHECKING:
    import socket
    from sniroute_connection import Connection
    from sniroute_routes import Decision, Route

__version__ = "0.1.0"

log = logging.getLogger("sniroute")
monotonic = time.monotonic

# Limits, each with its reason.  Times in seconds.
GROUPS_MAX = 1024  # groups of routes whose targets have fields: names come from strangers
WEIGHS_FOR = 10.0  # a failure counts as an open connection: who fails fast looks idle, and would attract everybody
WEIGHS_MAX = 100  # failures of one member that count so at once
TRIES_A_TURN = 8  # connects that fail at once, for one client, until other clients have their turn
JITTERS = 16  # different lifetimes: what began together does not end together; each is a queue
SLOWEST_START = 0.05  # of its share, for a backend that has just come back
ACCOUNTS_MAX = 20  # backends that a refusal names


# -- options -----------------------------------------------------------------------------------


class Several(NamedTuple):
    """The options of a route with several backends, SEVERAL_OPTIONS of sniroute_options.  Seconds; 0 is off."""

    fixed: list[Decision]  # the decision of each target, where they have no fields: the same for each name
    balance: str = "round-robin"
    health: str = "passive"
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

    @property
    def scheme(self) -> Scheme:
        """The row of such a target."""
        return SEVERAL

    def book(self, targets: Targets, loop: Loop) -> Book:
        """What the groups of one router share."""
        return Book(targets, loop)

    def shown(self) -> list[str]:
        """The options that are not as they are by default, for people."""
        return [f"{name} {f'{value:g} s' if isinstance(value, float) else value}" for name, value in
                zip(self._fields, self) if name != "fixed" and value != self._field_defaults[name]]


# -- groups ------------------------------------------------------------------------------------


class Group:
    """The members of one route: who is good, who rests, who waits.  Policy only: no I/O.

    `clock` and `chance` (0 to 1) are the time and the dice.
    """

    def __init__(self, book: Book, clock: Callable[[], float] = monotonic, chance: Callable[[], float] = random.random):
        self.book = book
        self.clock = clock
        self.chance = chance
        self.route: Route | None = None
        self.options = Several([])
        self.members: dict[str, Member] = {}
        self.entries: list[Member] = []  # each as often as it is in the list
        self.good: list[Member] = []
        self.resting: collections.OrderedDict[Member, None] = collections.OrderedDict()  # the next to be tried first
        self.waiting: collections.OrderedDict[GroupBackend, None] = collections.OrderedDict()  # the first comes first
        self.way: RoundRobin = RoundRobin(self)
        self.turns = book.queue(self.options.queue, late_turn)
        self.patience = book.patience(self.options.connect_timeout)

    def adopt(self, route: Route, decisions: Sequence[Decision]) -> None:
        """Have these members, and these options.  What is known of a member is kept; one that is gone keeps its
        connections, and gets no more."""
        now = self.clock()
        known, self.members = self.members, {}
        self.entries = []
        for decision in decisions:
            member = self.members.get(decision.target)
            if member is None:
                member = known.get(decision.target) or Member(decision.target, now)
                member.place, member.copies = len(self.members), 0
                self.members[decision.target] = member
            member.decision = decision
            member.copies += 1
            self.entries.append(member)
        self.options, self.route = route.several, route
        if type(self.way) is not WAYS[self.options.balance]:
            self.way.reset([])
            self.way = WAYS[self.options.balance](self)
        if self.options.health == "off":
            for member in self.members.values():
                member.why, member.fails = "", 0
        self.resting = collections.OrderedDict(
            (member, None) for member in sorted(self.members.values(), key=lambda each: each.until) if member.why)
        self.turns = self.book.queue(self.options.queue, late_turn)
        self.patience = self.book.patience(self.options.connect_timeout)
        self.sort()

    def is_good(self, member: Member) -> bool:
        """Whether it is used in the first place."""
        return not member.why and self.members.get(member.target) is member

    def sort(self) -> None:
        """Who is good has changed."""
        self.good = [member for member in self.entries if not member.why]
        self.way.reset(self.good)
        self.serve(self.good or list(self.members.values()))

    # -- which one

    def has_room(self, member: Member) -> bool:
        """Whether it may have one more connection."""
        limit = self.options.max_backend_connections
        return limit is None or member.active < limit

    def pick(self, client: GroupBackend, address: str) -> Member | None:
        """The next member for a client; None where it has to wait for room.  Raises LookupError where none is left."""
        tried = client.told_of
        limit = self.options.max_backend_connections
        if limit is None and not tried:
            chosen = self.way.pick(anyone, address)
        else:
            chosen = self.way.pick(lambda member: member not in tried and self.has_room(member), address)
        if self.resting:
            rested = self.rested(tried, chosen, address)
            if rested is not None:
                rested.trial = client
                return rested
        if chosen is not None:
            return self.slowly(chosen, tried, address) if self.options.slow_start else chosen
        if any(member not in tried for member in self.good):
            return None
        left = [member for member in self.members.values() if member not in tried]
        if not left:
            raise LookupError
        return next((member for member in left if self.has_room(member)), None)

    def rested(self, tried: Collection[Member], chosen: Member | None, address: str) -> Member | None:
        """One whose rest is over, and which nobody tries, for a client that would be led to `chosen`."""
        now = self.clock()
        if isinstance(self.way, ByClient):
            owner = self.way.owner(slot_of(address))
            resting: Iterable[Member] = [owner] if owner.why else []
        else:
            resting = self.resting
        for member in resting:
            if member.until > now:
                return None
            if member.trial is None and member not in tried and self.has_room(member) \
                    and self.way.may_try(member, chosen, address):
                return member
        return None

    def slowly(self, chosen: Member, tried: Collection[Member], address: str) -> Member:
        """`chosen`, or another one where that has just come back: its share grows over `slow_start`."""
        now, ramp = self.clock(), self.options.slow_start
        passed: set[Member] = set()
        member: Member | None = chosen
        while member is not None:
            share = (now - member.since) / ramp if member.passes else 1.0  # `passes`: it was down once
            if share >= 1.0 or self.chance() < max(share, SLOWEST_START):
                return member
            passed.add(member)
            member = self.way.instead(
                lambda each: each not in passed and each not in tried and self.has_room(each), address)
        return chosen

    # -- what becomes of it

    def take(self, member: Member, client: GroupBackend) -> None:
        """A client begins to use it."""
        member.active += 1
        if not member.dialling:
            member.dialled = self.clock()
        member.dialling += 1
        if self.options.on_down == "cut":
            member.held[client] = None
        self.way.moved(member)

    def leave(self, member: Member, client: GroupBackend) -> None:
        """A client uses it no more."""
        member.active -= 1
        member.held.pop(client, None)
        if member.trial is client:
            member.trial = None
        self.way.moved(member)
        if self.waiting:
            self.serve((member,))

    def dialled(self, member: Member) -> None:
        """A connect is over, whatever came of it."""
        member.dialling -= 1

    def connected(self, member: Member, seconds: float) -> None:
        """It took a connect."""
        now = self.clock()
        member.dialled = now
        member.observe(seconds, now)
        member.count(seconds)

    def good_news(self, member: Member) -> None:
        """It has served a client."""
        member.fails = 0
        if not member.why:
            return
        member.passes += 1
        if member.passes < self.options.health_pass:
            member.until = 0.0
            if member in self.resting:
                self.resting.move_to_end(member, last=False)
            return
        log.info("%s: backend %s is back, after %.0f s", self.pattern, printable(member.target),
                 self.clock() - member.since)
        member.why, member.since = "", self.clock()
        self.resting.pop(member, None)
        self.sort()

    def weigh(self, member: Member) -> None:
        """It has failed: for a while that counts as a connection."""
        member.failures += 1
        member.observe(self.options.connect_timeout, self.clock())
        if member.weighing < WEIGHS_MAX:
            member.weighing += 1
            self.way.moved(member)
            self.book.weighing.put(Failure(self, member))

    def bad_news(self, member: Member, why: str, is_trial: bool) -> None:
        """It has failed, and it is to blame.  One log line for each change."""
        member.fails += 1
        if self.options.health == "off" or self.members.get(member.target) is not member:
            return
        if member.why:
            if is_trial:
                self.rest(member)
            return
        if member.fails < self.options.health_fail:
            return
        member.why, member.since = why, self.clock()
        self.rest(member)
        log.warning("%s: backend %s is down: %s (%d failures in a row); the next try is in %g s", self.pattern,
                    printable(member.target), printable(why), member.fails, self.options.fallback_interval)
        self.sort()
        for client in list(member.held):
            if client.is_open:
                client.connection.close(BACKEND_DOWN)

    def rest(self, member: Member) -> None:
        """Have no client try it for `fallback_interval`."""
        member.passes = 0
        member.until = self.clock() + self.options.fallback_interval
        self.resting[member] = None
        self.resting.move_to_end(member)

    @property
    def pattern(self) -> str:
        """The route, for people."""
        return self.route.pattern

    # -- who waits

    def serve(self, members: Iterable[Member]) -> None:
        """There may be room: the first that waits for one of these gets it."""
        for member in members:
            while self.waiting and self.has_room(member) and (self.is_good(member) or not self.good):
                client = next((each for each in self.waiting if member not in each.told_of), None)
                if client is None:
                    break
                del self.waiting[client]
                client.use(member)
                client.connection.resume()


def anyone(member: Member) -> bool:
    """Each may be picked."""
    return True


class Failure:
    """A failure that counts as a connection for WEIGHS_FOR."""

    __slots__ = ("group", "member")

    def __init__(self, group: Group, member: Member):
        self.group = group
        self.member = member

    def forget(self) -> None:
        """It counts no more."""
        self.member.weighing -= 1
        self.group.way.moved(self.member)


class Book:
    """The groups of one router, and the queues that they share.  Kept over a reload."""

    def __init__(self, targets: Targets, loop: Loop):
        self.targets = targets
        self.loop = loop
        self.groups: dict[str, Group] = {}  # by Decision.key
        self.full = GROUPS_MAX  # how many there may be before those that nobody uses are forgotten
        self.queues: dict[tuple[float, Callable[[Any], Any]], Queue] = {}
        self.weighing = self.queue(WEIGHS_FOR, Failure.forget)
        self.soon = self.queue(0.0, next_turn)

    def queue(self, seconds: float, act: Callable[[Any], Any]) -> Queue:
        """A queue of the loop, one for all that wait equally long for the same."""
        found = self.queues.get((seconds, act))
        if found is None:
            found = self.queues[seconds, act] = self.loop.queue(seconds, act)
        return found

    def patience(self, seconds: float) -> tuple[Queue, Queue]:
        """The deadlines of one connect: until others are tried beside it, and from then on."""
        return (self.queue(min(seconds, STAGGER), silent_connect),
                self.queue(max(seconds - STAGGER, 0.0), late_member))

    def adopt(self, routes: Sequence[Route], identified: bool) -> None:
        """Have these routes.  `identified`: see Route.decide.

        Those whose targets have no fields are known before a client comes.
        """
        patterns = {route.pattern for route in routes}
        for key, group in list(self.groups.items()):
            if group.pattern not in patterns and not group.waiting:
                del self.groups[key]
        for route in routes:
            if not route.has_fields:
                self.group(route.decide("", identified, fields={}))

    def group(self, decision: Decision) -> Group:
        """The group of a decision."""
        group = self.groups.get(decision.key)
        if group is None:
            if len(self.groups) >= self.full:
                self.make_room()
            group = self.groups[decision.key] = Group(self)
        if group.route is not decision.route:
            group.adopt(decision.route, decision.members)
        return group

    def make_room(self) -> None:
        """Forget the groups that nobody uses, of names that strangers have chosen."""
        self.groups = {key: group for key, group in self.groups.items() if not group.route.has_fields
                       or group.waiting or any(member.active for member in group.members.values())}
        self.full = max(GROUPS_MAX, 2 * len(self.groups))

    def rows(self) -> Iterator[tuple[str, Member]]:
        """Each backend of the configuration: the pattern of its route, and the member.  Any thread."""
        for group in list(self.groups.values()):
            if group.route is not None and not group.route.has_fields:
                for member in list(group.members.values()):
                    yield group.pattern, member


# -- one client --------------------------------------------------------------------------------


class GroupBackend(Backend):
    """One client's way to one of several backends; `way` is the Backend of the member that it uses now."""

    __slots__ = ("connection", "group", "member", "way", "told_of", "until", "again", "asked", "awaited", "parked",
                 "patience", "is_trial", "stuck", "suspects", "is_open", "lifetime", "is_dialling", "served", "note",
                 "unsaid")

    def __init__(self, connection: Connection, group: Group):
        self.target = connection.decision.target
        self.connection = connection
        self.group = group
        self.member: Member | None = None
        self.way: Backend = self
        self.told_of: dict[Member, str] = {}  # those that have failed, and why
        self.until = 0.0  # clock time; the end of connect_budget
        self.again: Member | None = None  # the tunnel of this member is tried once more
        self.asked: Member | None = None  # the one whose target had to be prepared
        self.awaited: Decision | None = None
        self.parked = 0.0  # clock time
        self.patience: tuple[Queue, Queue] | None = group.patience
        self.is_trial = False
        self.stuck = False  # the client has said more than can be sent again
        self.suspects: dict[Member, str] = {}  # took the connect, and closed without a byte
        self.unsaid: tuple[Member, Backend, bool] | None = None  # has failed; its last words are on their way
        self.is_open = False
        self.lifetime: Queue | None = None
        self.is_dialling = False
        self.served = False
        self.note: str | None = None  # what the member's own Backend has to remark

    # -- the way there

    def open(self, why: str = "") -> socket.SocketType:
        if why and self.member is not None:
            try:
                return self.way.open(why)
            except Unreachable as error:
                self.lose(str(error))
        if self.awaited is not None:
            self.until += monotonic() - self.parked  # to start a tunnel takes another limit
            self.awaited, self.parked = None, 0.0
        for _ in range(TRIES_A_TURN):
            if self.member is None:
                self.choose()
            try:
                if self.way is self:
                    self.find_way()
                return self.way.open()
            except (Unreachable, Refused) as error:
                self.lose(str(error))
        raise NotYet(self.group.book.soon)

    def choose(self) -> None:
        """Use the next member.  Raises Unreachable where none is left, NotYet where none has room, Refused."""
        group, now = self.group, monotonic()
        options = group.options
        if self.again is not None:
            member, self.again = self.again, None
            self.use(member)
            return
        if self.told_of:
            if len(self.told_of) >= (options.tries or len(group.members)):
                raise Unreachable(self.account())
            if now >= self.until:
                raise Unreachable(f"{self.account()}; connect_budget ({options.connect_budget:g} s) is over")
        elif not self.until:
            self.until = now + options.connect_budget
        try:
            member = group.pick(self, self.connection.address[0])  # who waits has had the choice before
        except LookupError:
            raise Unreachable(self.account()) from None
        if member is not None:
            self.use(member)
            return
        if len(group.waiting) >= options.queue_length:
            raise Refused("queue_full", f"{group.pattern}: {options.queue_length} clients wait for a backend already")
        group.waiting[self] = None
        self.parked = now
        raise NotYet(group.turns)

    def use(self, member: Member) -> None:
        """This member is to serve the client."""
        self.member = member
        self.way = self
        self.target = member.target
        self.is_trial = member.trial is self
        self.is_dialling = True
        self.group.take(member, self)
        if self.parked:
            self.until += monotonic() - self.parked  # to wait for room takes another limit
            self.parked = 0.0

    def find_way(self) -> None:
        """Have the member's own Backend.  Raises NotYet where that has to wait, Refused, Unreachable."""
        member = self.member
        way = member.decision.scheme.ready(self.group.book.targets, member.decision)
        if way is not None:
            self.way = way
        elif self.asked is member:
            raise Unreachable(f"it was not ready, after {member.decision.scheme.waits_on} was")
        else:
            self.asked, self.awaited, self.parked = member, member.decision, monotonic()
            self.connection.parks = 0  # a limit for one target
            raise NotYet()

    def goes_on(self, error: Refused) -> bool:
        """The member could not be prepared: the next one is tried."""
        if self.again is not None:
            self.member, self.again = self.again, None
            self.group.take(self.member, self)
            self.is_dialling = True
        self.lose(str(error), is_fault=error.kind not in ("busy", "tunnel_budget", "tunnel_stopping", "internal"))
        return True

    def connected(self, server: socket.SocketType) -> None:
        self.way.connected(server)

    def proves(self) -> bool:
        """For TLS only a byte proves a backend: its hello can be sent to another one, as long as that is all."""
        self.over()
        self.group.connected(self.member, monotonic() - self.connection.dialled)
        return self.way.proven_by_connect and not (self.connection.name is not None and self.connection.replayable)

    def over(self) -> None:
        """The connect is."""
        if self.is_dialling:
            self.is_dialling = False
            self.group.dialled(self.member)

    def settled(self) -> Backend | None:
        self.way.settled()
        self.serves()
        return self

    def answered(self) -> None:
        self.way.answered()
        if self.way.proven_by_connect:
            self.way.settled()
        self.serves()

    def serves(self) -> None:
        """The member serves the client: so those that did not are to blame."""
        group = self.group
        for member, why in self.suspects.items():
            group.bad_news(member, why, False)
        self.suspects = {}
        self.is_open = self.served = True
        self.note = self.way.remark()
        group.good_news(self.member)
        if self.member.trial is self:
            self.member.trial = None
        if group.options.max_lifetime:
            jitter = 0.9 + 0.2 * int(group.chance() * JITTERS) / (JITTERS - 1)
            self.lifetime = group.book.queue(group.options.max_lifetime * jitter, too_old)
            self.lifetime.put(self)

    # -- what fails

    def lose(self, why: str, is_fault: bool = True, is_suspect: bool = False, member: Member | None = None) -> None:
        """The member does not serve the client; `is_suspect`: perhaps that is the client's fault."""
        member, group = member or self.member, self.group
        if member is None:
            return
        self.told_of[member] = why
        self.target = self.connection.decision.target
        is_trial = self.is_trial
        self.drop()
        if not is_fault:
            return
        group.weigh(member)
        if is_suspect and not is_trial:
            self.suspects[member] = why
        else:
            group.bad_news(member, why, is_trial)

    def drop(self) -> None:
        """Use the member no more."""
        member, way = self.member, self.way
        if member is not None:
            self.over()
            self.member, self.way = None, self
            if way is not self:
                way.release()
            self.group.leave(member, self)

    def account(self) -> str:
        """What became of each member, for people."""
        rows = [f"{member.target.removeprefix('tcp:')}: {why.removeprefix(f'{member.target}: ')}"
                for member, why in list(self.told_of.items())[:ACCOUNTS_MAX]]
        more = len(self.told_of) - ACCOUNTS_MAX
        return "; ".join(rows) + (f"; and {more} more" if more > 0 else "")

    def failed(self, why: str, server: socket.SocketType | None, last: bool) -> Verdict:
        """Go on to the next member, as long as the client's bytes can be sent again."""
        if self.unsaid is not None:  # it was let go of meanwhile
            (member, way, is_suspect), self.unsaid = self.unsaid, None
        elif self.member is None:  # `open` has tried them all
            return Refused("backend", f"{self.connection.decision.target}: {why}")
        else:
            member, way, is_suspect = self.member, self.way, not self.is_dialling
        self.stuck |= self.connection.state is EARLY
        others = not self.stuck and self.has_others()
        verdict = way.failed(why, server, last or self.stuck or others)
        if verdict is None:
            self.unsaid = member, way, is_suspect
            return None
        if isinstance(verdict, Retry):
            self.again, self.awaited, self.parked = member, member.decision, monotonic()
            return verdict
        refusal = verdict.refusal if isinstance(verdict, Doubt) else verdict
        if isinstance(verdict, Doubt) and others:
            self.awaited = member.decision
            self.connection.router.waits.doubt(self.connection, verdict.doubted)
            self.awaited = None
        self.lose(str(refusal), is_suspect=is_suspect, member=member)
        if others:
            return Another()
        if len(self.told_of) > 1:
            return Refused("backend", f"{self.connection.decision.target}: {self.account()}")
        return verdict

    def has_others(self) -> bool:
        """Whether another member may be tried behind this one."""
        group = self.group
        tried = len(self.told_of) + 1
        return tried < min(group.options.tries or tried + 1, len(group.members)) and monotonic() < self.until

    # -- the end

    def remark(self) -> str | None:
        if self.told_of and self.served:
            return f"{self.account()}; {self.target} took it"
        return self.note

    def is_lost(self) -> bool:
        return self.way is not self and self.way.is_lost()

    def abandon(self, server: socket.SocketType) -> None:
        if self.way is not self:
            self.way.abandon(server)
            if self.way.proven_by_connect:
                will_reset(server)

    def release(self) -> None:
        self.is_open = False
        self.group.waiting.pop(self, None)
        if self.lifetime is not None:
            self.lifetime.drop(self)
            self.lifetime = None
        self.drop()


def way_of(connection: Connection) -> Backend:
    """The way of a client, the same one for each try."""
    backend = connection.backend
    if backend is None:
        backend = GroupBackend(connection, connection.router.targets.book.group(connection.decision))
    return backend


def never_ready(targets: Targets, decision: Decision) -> Backend | None:
    """`Scheme.ready` where the way depends on the client: it is not called."""
    return None


def check_several(rest: str) -> str:
    """Each target is checked by its own row."""
    return rest


def late_member(connection: Connection) -> None:
    """A backend has had its connect_timeout."""
    backend = connection.backend
    race = backend.way.race
    if race is None:
        connection.connect(no_answer(backend.group.options.connect_timeout))
    else:
        race.close()
        connection.backend_failed(backend.way.give_up())


def late_turn(connection: Connection) -> None:
    """No backend had room in time."""
    group = connection.backend.group
    connection.refuse(Refused("queue_timeout", f"{group.pattern}: no backend had room within "
                                               f"{group.options.queue:g} s"))


def next_turn(connection: Connection) -> None:
    """Others have had theirs."""
    connection.resume()


def too_old(backend: GroupBackend) -> None:
    """It has had its max_lifetime."""
    backend.connection.close(LIFETIME)


SEVERAL = Scheme(check_several, never_ready, waits_on="a backend", choose=way_of)
