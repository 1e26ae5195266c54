"""sniroute_book: all groups of one router, and what they share.

    Book      the groups by Decision.key, kept over a reload; the queues that they share; what is known of members that
              are in no group now; which backends an operator has drained
    Warmth    the warm connections of one group: a pool for each member (sniroute_warm), its share, and what clients
              give back (sniroute_reuse)
    Checked   a member, as active checks see it (sniroute_checks)

All queues of the loop that these rooms need come from Book.queue: one for all that wait equally long for the same.

Threads: the loop only; `Book.listed` and `Book.rows` are for any thread.  Main calls `Book.adopt` once, before the loop
runs.

Seams: I want to ...
    share warm connections otherwise    `Warmth.share`
    let operators do more               a method of Book, asked for by the admin in the loop (Router.call)

It imports groups, balance, deadlines, race, targets, the loop, wire and refusals; where a route asks for them, warm,
reuse, checks and probes.
"""

from __future__ import annotations

import collections
import functools
import re
from typing import TYPE_CHECKING, Any, Callable, Iterator, Sequence

from sniroute_balance import Member
from sniroute_deadlines import silent_connect
from sniroute_groups import DOWN, NO_FAULT, Group, Penalty
from sniroute_loop import JITTERS, Loop, Queue, jittered
from sniroute_race import STAGGER, no_answer
from sniroute_refusals import Refused
from sniroute_targets import Backend, Targets
from sniroute_wire import PROXY_WRITERS

if TYPE_CHECKING:
    from sniroute_checks import Checks
    import socket
    from sniroute_backends import GroupBackend
    from sniroute_connection import Connection
    from sniroute_reuse import Aside, Reuse
    from sniroute_routes import Decision, Route

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
GROUPS_MAX = 1024  # groups of routes whose targets have fields: names come from strangers
MEMBERS_MAX = 4096  # backends in all of these together: each takes a kilobyte
KNOWN_MAX = 4096  # targets that are in no group, and were down: strangers may have named them; the oldest goes
PENALTY_FOR = 10.0  # a failure counts as an open connection: who fails fast looks idle, and would attract everybody
NO_NAME = "health.invalid"  # what a check asks for where the names of a route have nothing in common: RFC 6761
ASIDES_MAX = 64  # connections of a route that rest until they may serve another client: as many as a pool keeps


# -- warm connections ---------------------------------------------------------------------------


class Warmth:
    """The warm connections of one group, a pool for each member: dialled ahead, or given back by clients."""

    def __init__(self, group: Group):
        from sniroute_warm import WarmOptions, WarmPool  # imported late: only where it is asked for
        self.group, self.book = group, group.book
        self.options = options = group.options
        self.reuse: Reuse | None = None
        if options.reuse != "off":
            from sniroute_reuse import REUSES  # imported late: only where it is asked for
            self.reuse = REUSES[options.reuse]
        # Connections that rest before they may serve another client; the one that rests longest comes first.
        self.asides: dict[Aside, tuple[Member, Backend]] = {}
        before = group.warmth and group.warmth.reuse
        wanted = WarmOptions(0, options.warm_max_idle, options.warm_max_age, options.warm_jitter,
                             options.warm_order, group.route.is_port, options.connect_timeout)
        for member in group.members.values():
            make_way = functools.partial(way_ahead, group, member)
            told = functools.partial(self.told, member)
            if member.pool is not None and member.pool.options != wanted:
                close_pool(member)
            if member.pool is None:
                member.pool = WarmPool(self.book.loop, self.book.queue, make_way, wanted, told)
            else:
                member.pool.make_way, member.pool.told = make_way, told
            if self.reuse is not before:
                member.pool.drop_reused()

    def told(self, member: Member, why: str) -> None:
        """A dial ahead has failed: that counts as a client's failure.

        One that succeeds is no good news: it proves less than a client that is served.
        """
        self.group.penalise(member)
        self.group.bad_news(member, why, False)

    def share(self) -> None:
        """Share `warm` among the members that clients are led to now; what is over goes to the first of the list."""
        good = self.group.good
        takers = good[:1] if self.options.balance == "first" else good
        each, more = divmod(self.options.warm, max(len(takers), 1))
        shares: collections.Counter[Member] = collections.Counter()
        for place, member in enumerate(takers):
            shares[member] += each + (place < more)
        for member in self.group.members.values():
            member.share = shares[member]
            self.fit(member)

    def fit(self, member: Member) -> None:
        """Keep its share warm, as far as max_backend_connections has room for it."""
        if member.pool is not None:
            limit = self.options.max_backend_connections
            size = member.share if limit is None else min(member.share, max(limit - member.active, 0))
            if size != member.pool.size or member.rank >= DOWN:  # the latter: what clients gave back goes, too
                member.pool.resize(size)
            if limit is not None and self.reuse is not None:
                self.make_room(member, max(limit - member.active, 0))

    def make_room(self, member: Member, room: int) -> None:
        """Close those connections that no client has, and for which a limit has no room; the latest stay."""
        resting = [aside for aside, (whose, _) in self.asides.items() if whose is member]
        for aside in resting[:max(len(resting) - room, 0)]:
            _, way = self.asides.pop(aside)
            aside.close()
            way.release()
        member.pool.trim(max(room - len(resting), 0))

    # -- reuse

    def observe(self, backend: GroupBackend) -> None:
        """Find out whether the connection of a client may serve another one when it has left."""
        from sniroute_reuse import observe
        pool = backend.member.pool
        if pool is None:
            return  # a reload has taken the member out
        if backend.warm is None:
            backend.birth = pool.birth()
        elif backend.warm.greeting:
            return  # the next client would wait for one
        else:
            backend.birth = backend.warm.began
        observe(backend.connection, self.reuse.machine(), functools.partial(self.keep, backend))

    def keep(self, backend: GroupBackend, sock: socket.SocketType) -> None:
        """A client has left a connection that may serve another one, unless a reload has changed that."""
        member, warmth = backend.member, self.group.warmth
        way, backend.way = backend.way, backend  # so that it is not released with the client
        if warmth is None or warmth.reuse is not self.reuse:
            sock.close()
            way.release()
        elif not self.reuse.rest:
            warmth.put(member, way, backend.birth, sock)
        else:
            warmth.put_aside(member, way, backend.birth, sock)

    def put_aside(self, member: Member, way: Backend, birth: float, sock: socket.SocketType) -> None:
        """It waits for the next client, if it is silent until then."""
        if member.pool is None or len(self.asides) >= ASIDES_MAX:
            sock.close()
            way.release()
            return
        from sniroute_reuse import Aside
        queue = self.book.queue(self.reuse.rest, Aside.rested)
        aside = Aside(self.book.loop.poller, queue, sock, lambda sock: self.rested(aside, member, way, birth, sock))
        self.asides[aside] = member, way

    def rested(self, aside: Aside, member: Member, way: Backend, birth: float, sock: socket.SocketType | None) -> None:
        """It was silent for long enough; or it was not, and is closed."""
        del self.asides[aside]
        if sock is None:
            way.release()
        else:
            self.put(member, way, birth, sock)

    def put(self, member: Member, way: Backend, birth: float, sock: socket.SocketType) -> None:
        """It waits for the next client in the pool, where the member still gets any, and has this address, and room."""
        pool, limit = member.pool, self.options.max_backend_connections
        if pool is None or member.rank >= DOWN or member.rows and way.row not in member.rows \
                or limit is not None and member.active + len(pool.idle) > limit:
            sock.close()
            way.release()
        else:
            pool.put(way, sock, birth)

    def close(self) -> None:
        """Close what rests aside.  The pools stay: they are the members'."""
        for aside, (_, way) in self.asides.items():
            aside.close()
            way.release()
        self.asides.clear()


# -- all groups --------------------------------------------------------------------------------


class Checked:
    """A member as its active checks see it: the Subject of sniroute_checks."""

    def __init__(self, group: Group, member: Member):
        from sniroute_probes import parse_health  # imported late: only where it is asked for
        self.group, self.member = group, member
        route, options = group.route, group.options
        self.target = member.target
        self.health = parse_health(options.health)
        self.interval, self.timeout = options.health_interval, options.health_timeout
        # Behind a port nobody speaks TLS for a name.  Of a pattern, the labels that all its names end with.
        self.name = "" if route.is_port else re.sub(r".*[*}][^.]*\.?", "", route.pattern) or NO_NAME
        write = PROXY_WRITERS[route.send_proxy]
        self.preface = write(None, ("0.0.0.0", 0)) if write is not None else b""

    def way(self) -> Backend | None:
        """A new way there, or None: see Subject."""
        targets, port = self.group.book.targets, self.health.port
        way = way_ahead(self.group, self.member)
        if way is not None and port \
                and not all(targets.may_dial(self.member.decision, (address[0], port)) for _, address in way.addresses):
            way.release()
            raise Refused("forbidden", f"port {port} of {self.target} is this router's own")
        return way

    def hear(self, why: str) -> None:
        self.group.checked(self.member, why)


class Book:
    """The groups of one router, and the queues that they share.  Kept over a reload."""

    def __init__(self, targets: Targets, loop: Loop):
        self.targets = targets
        self.loop = loop
        self.routes: dict[str, Route] = {}  # by pattern, as they are now
        self.groups: dict[str, Group] = {}  # by Decision.key
        self.most = self.full = GROUPS_MAX  # how many groups there may be before those that nobody uses are forgotten
        self.known: dict[str, Member] = {}  # by target: those that are in no group, and were down; the latest last
        self.drained: set[tuple[str, str]] = set()  # pattern and target; both of the configuration
        self.checks: Checks | None = None  # where a route asks for them
        self.queues: dict[tuple[float, Callable[[Any], Any]], Queue] = {}
        self.penalties = self.queue(PENALTY_FOR, Penalty.forget)
        self.soon = self.queue(0.0, next_turn)  # of clients whose connects fail at once: others have a turn between
        self.stale = self.queue(0.0, Group.refresh)

    # -- queues

    def queue(self, seconds: float, act: Callable[[Any], Any]) -> Queue:
        """A queue of the loop, one for all that wait equally long for the same."""
        found = self.queues.get((seconds, act))
        if found is None:
            found = self.queues[seconds, act] = self.loop.queue(seconds, act)
        return found

    def spread(self, seconds: float, share: float, chance: float, act: Callable[[Any], Any]) -> Queue:
        """The queue for about so many seconds, up to a `share` of that more or less, as `chance` (0 to 1) has it."""
        return self.queue(jittered(seconds, share, int(chance * JITTERS)), act)

    def patience(self, seconds: float) -> tuple[Queue, Queue]:
        """The two deadlines of a connect that has so many seconds (connect_timeout).

        The first ends when other addresses are tried beside the silent one, instead of Deadlines.stagger.  The second
        is for the rest, whatever it is that the backend does not answer: instead of .connect, .budget and .greeting.
        """
        alone = min(seconds / 2, STAGGER)
        return self.queue(alone, silent_connect), self.queue(seconds - alone, late_member)

    def turns(self, seconds: float) -> Queue:
        """The deadline of clients that wait so long for room."""
        return self.queue(seconds, late_turn)

    # -- groups

    def adopt(self, routes: Sequence[Route], identified: bool) -> None:
        """Have these routes, all that have several backends; `identified` as in Route.decide.

        Those whose targets have no fields have their group before a client comes; the others get one for each name.
        """
        self.routes = {route.pattern: route for route in routes}
        widest = max((len(route.members) for route in routes if route.has_fields), default=1)
        self.most = self.full = max(min(GROUPS_MAX, MEMBERS_MAX // widest), 1)
        self.drained = {(pattern, target) for pattern, target in self.drained if pattern in self.routes}
        for key, group in list(self.groups.items()):
            route = self.routes.get(group.pattern)
            if route is None or route.has_fields is not group.route.has_fields:  # the latter changes Decision.key
                self.drop(key)
        for route in routes:
            if not route.has_fields:
                self.group(route.decide("", identified, fields={}))
        self.check()

    def check(self) -> None:
        """Check the members of all groups whose routes ask for that."""
        wanted = [Checked(group, member) for group, member in self.rows() if member.is_checked]
        if wanted and self.checks is None:
            from sniroute_checks import Checks  # imported late: only where it is asked for
            self.checks = Checks(self.loop, self.queue)
        if self.checks is not None:
            self.checks.adopt(wanted)

    def group(self, decision: Decision) -> Group:
        """The group of a decision; of one that is older than a reload, the group as it is now."""
        group, route = self.groups.get(decision.key), decision.route
        if group is not None and group.route is route:
            return group
        if self.routes.get(route.pattern) is not route:
            return group or self.last_of(decision)
        if group is None:
            if len(self.groups) >= self.full:
                self.make_room()
            group = self.groups[decision.key] = Group(self)
        group.adopt(route, decision.members)
        return group

    def last_of(self, decision: Decision) -> Group:
        """A group for a client whose route a reload took out behind its hello.  Nobody else finds it."""
        group, route = Group(self), decision.route
        group.adopt(route._replace(several=route.several._replace(warm=0, reuse="off")), decision.members)
        return group

    def make_room(self) -> None:
        """Forget the groups that nobody uses, of names that strangers have chosen."""
        for key, group in list(self.groups.items()):
            if group.route.has_fields and not group.waiting and not any(each.active for each in group.members.values()):
                self.drop(key)
        self.full = max(self.most, 2 * len(self.groups))

    def drop(self, key: str) -> None:
        """Forget a group, but not which of its members were down."""
        group = self.groups.pop(key)
        if group.warmth is not None:
            group.warmth.close()
        for member in group.members.values():
            self.let_go(member)

    def close(self) -> None:
        """Nobody comes any more: end what is warm, and the checks.  May be called twice."""
        for group in self.groups.values():
            if group.warmth is not None:
                group.warmth.close()
            for member in group.members.values():
                if member.pool is not None:
                    member.pool.close()
        if self.checks is not None:
            self.checks.close()

    def give_way(self) -> None:
        """Clients find no descriptors on this host."""
        for group in self.groups.values():
            for member in group.members.values():
                if member.pool is not None:
                    member.pool.give_way()

    def let_go(self, member: Member) -> None:
        """A member is in no group any more.  Remember whether it was down."""
        close_pool(member)
        if member.why:
            self.known.pop(member.target, None)
            self.known[member.target] = member
            if len(self.known) > KNOWN_MAX:
                del self.known[next(iter(self.known))]

    def recall(self, member: Member) -> Member:
        """A new member; what is known of its address counts for it."""
        known = self.known.pop(member.target, None)
        if known is not None:
            member.why, member.since, member.until, member.fails = known.why, known.since, known.until, known.fails
        return member

    def warmth(self, group: Group) -> Warmth | None:
        """The Warmth of a group, made anew as its options are now; None where they ask for none."""
        if group.warmth is not None:
            group.warmth.close()
        if group.options.warm or group.options.reuse != "off":
            return Warmth(group)
        for member in group.members.values():
            close_pool(member)
        return None

    # -- operators

    def drain(self, pattern: str, address: str, is_drained: bool) -> str:
        """Lead no new client of a route to a backend, or lead them there again; its target, "" where there is none.

        `address` is as in Group.find.
        """
        found = ""
        for group in self.groups.values():
            member = group.find(address) if group.pattern == pattern else None
            if member is not None:
                found = member.target
                member.is_drained = is_drained
                (self.drained.add if is_drained else self.drained.discard)((pattern, found))
                group.changed()
        return found

    def listed(self) -> list[Group]:
        """The groups of routes whose targets have no fields: those of the configuration.  Any thread."""
        return [group for group in list(self.groups.values()) if group.route is not None and not group.route.has_fields]

    def rows(self) -> Iterator[tuple[Group, Member]]:
        """Each backend of the configuration, with its group.  Any thread."""
        for group in self.listed():
            for member in list(group.members.values()):
                yield group, member


def way_ahead(group: Group, member: Member) -> Backend | None:
    """As Group.way_to, where no client waits for it: what is not ready is prepared meanwhile.  Raises Refused."""
    try:
        way = group.way_to(member)
    except Refused as error:
        if error.kind in NO_FAULT:
            return None
        raise
    if way is None:
        group.book.targets.ask(member.decision)
    return way


def close_pool(member: Member) -> None:
    """End the warm connections of a member, if it has some."""
    if member.pool is not None:
        member.pool.close()
        member.pool = None


def late_member(connection: Connection) -> None:
    """A backend has had its connect_timeout.  Called by the second queue of Book.patience."""
    backend = connection.backend
    backend.warm = None  # silence is no end: where it was warm, the same backend is not asked anew
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
    """Others have had their turn: go on.  Called by Book.soon."""
    connection.resume()
