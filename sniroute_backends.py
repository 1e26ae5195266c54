"""sniroute_backends: one client's way to one of several backends.

    Decision with members --- way_of ---> GroupBackend, one for each client
                                              |    tells each event to the Backend of the member that it uses (`way`),
                                              |    and goes on to the next member where that fails
                              Group.pick      v
    Group, of sniroute_groups            a Backend of sniroute_targets: a host, a socket, a tunnel, a program

A Connection tells a GroupBackend what happens, as it tells any Backend.  What this one does otherwise:

    open        chooses a member first, or has the client wait for room on one, or for a member's target to be ready
                (NotYet; the target is `awaited`)
    failed      says Another while a member is left, and the client's bytes can be sent again: the next one gets the
                same bytes, and the client does not notice
    proves      a connect proves no backend to which a TLS hello was sent: that can be sent again until a byte comes
    goes_on     only one member could not be prepared, or offers no TLS: the next one is tried

Who is to blame?  A backend that takes the connect and closes without a byte, or without a good answer to PostgreSQL's
SSLRequest, may have been asked for nonsense.  So that counts as its failure only when another backend then answers to
the same bytes: else a stranger's broken hello could have all of them rest.

connect_budget is counted from the client's dial.  The time that it waits for room, or for a tunnel to start, has limits
of its own (`queue`, start_timeout), and is added to the budget.

A warm connection (sniroute_warm) that ends before the client has had a byte of it is no failure of its backend.  The
same one is dialled, and this client takes no warm connection again.

Most clients meet no failure, and do not wait.  What there is to be known of those that do is in a Trouble, which is
made when it is needed.

Threads: the loop only.

Seams: I want to ...
    choose otherwise              sniroute_groups, sniroute_balance
    get a connection otherwise    `GroupBackend.reach`

It imports groups, balance, resets, targets, flow, log, the loop and refusals.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from sniroute_balance import Member
from sniroute_flow import EARLY, GREETING, UNANSWERED
from sniroute_groups import NO_FAULT, Group
from sniroute_log import BACKEND_DOWN, LIFETIME
from sniroute_loop import Queue
from sniroute_refusals import Refused
from sniroute_resets import will_reset
from sniroute_targets import Another, Backend, Doubt, NotYet, Retry, Scheme, Targets, Unreachable, Verdict

if TYPE_CHECKING:
    from sniroute_connection import Connection
    from sniroute_routes import Decision
    from sniroute_warm import Warm

__version__ = "0.1.0"

monotonic = time.monotonic

# Limits, each with its reason.  Times in seconds.
TRIES_A_TURN = 8  # connects that fail at once, for one client, until other clients have their turn
LIFETIME_JITTER = 0.1  # of max_lifetime: what began together does not end together
ACCOUNTS_MAX = 20  # backends that a refusal names

NO_FAILURES: dict[Member, str] = {}  # of all clients that no member has failed: one object, which is never written

# How far a client has come with the member that it uses.  NONE: it uses none; SERVED: it stays there.
NONE, DIALLING, CONNECTED, SERVED = "none", "dialling", "connected", "served"


class Trouble:
    """What has gone wrong on one client's way, and what it waits for."""

    __slots__ = ("until", "again", "asked", "parked", "stuck", "suspects", "unsaid", "has_been_warm")

    def __init__(self) -> None:
        self.until = 0.0  # clock time: the end of connect_budget
        self.again: Member | None = None  # this member is tried once more
        self.asked: Member | None = None  # the one whose target had to be prepared
        self.parked = 0.0  # clock time since which the client waits, for room or for a target; 0: it does not
        self.stuck = False  # the client has said more than can be sent again
        # Those that took the connect, and gave no answer: why, and whether that was a trial.
        self.suspects: dict[Member, tuple[str, bool]] = {}
        self.has_been_warm = False  # a warm connection has ended on it: the next one is dialled
        # One that has failed, its Backend, whose last words are on their way, and whether it is a suspect.
        self.unsaid: tuple[Member, Backend, bool] | None = None


class GroupBackend(Backend):
    """One client's way to one of several backends.  Loop only.

    `member` is the one that it uses now, or None; `way` is that member's Backend, or itself before there is one.
    """

    may_change_hands = False  # it is one client's

    __slots__ = ("connection", "group", "member", "way", "told_of", "trouble", "awaited", "patience", "is_trial",
                 "stage", "lifetime", "note", "warm", "birth")

    def __init__(self, connection: Connection, group: Group):
        self.target = connection.decision.target
        self.connection = connection
        self.group = group
        self.member: Member | None = None
        self.way: Backend = self
        self.told_of = NO_FAILURES  # the members that have failed this client, and why
        self.trouble: Trouble | None = None
        self.awaited: Decision | None = None
        self.patience: tuple[Queue, Queue] | None = group.patience
        self.stage = NONE  # how far it has come with that member
        self.is_trial = False  # it is the one client that tries whether the member is back
        self.lifetime: Queue | None = None  # in which it stands until its max_lifetime
        self.birth = 0.0  # `began` of WarmPool.put, where its connection may serve another client
        self.warm: Warm | None = None  # the warm connection that it has taken
        self.note: str | None = None  # what the member's own Backend has to remark; "" where it served the client

    def in_trouble(self) -> Trouble:
        """Its Trouble, made where it had none."""
        if self.trouble is None:
            self.trouble = Trouble()
            self.told_of = {}
            self.trouble.until = self.connection.dialled + self.group.options.connect_budget
        return self.trouble

    # -- the way there

    def open(self, why: str = "") -> socket.SocketType:
        """As the base, for one member after another."""
        if why and self.warm is not None:
            self.cool_down()
        elif why and self.member is not None:
            try:
                return self.way.open(why)
            except Unreachable as error:
                self.lose(str(error), is_fault=not self.way.is_ours(), is_suspect=self.connection.state is GREETING)
        if self.awaited is not None:  # it was prepared meanwhile
            self.waited()
            self.awaited = None
        for _ in range(TRIES_A_TURN):
            if self.member is None:
                self.choose()
            try:
                return self.reach()
            except BlockingIOError:
                self.way.longest = self.group.options.connect_timeout
                raise
            except Unreachable as error:
                self.lose(str(error), is_fault=not self.way.is_ours())
            except Refused as error:
                self.lose(str(error), is_fault=error.kind not in NO_FAULT)
        raise NotYet(self.group.book.soon)

    def is_ours(self) -> bool:
        return False  # `way` knows

    def choose(self) -> None:
        """Use the next member.  Raises Unreachable where none is left, NotYet where none has room, Refused."""
        group, trouble = self.group, self.trouble
        if trouble is not None:
            options = group.options
            if trouble.again is not None:
                member, trouble.again = trouble.again, None
                if group.has_room(member):  # who waits for room may have got it meanwhile
                    self.use(member)
                    return
            if self.told_of:
                if options.tries and len(self.told_of) >= options.tries:
                    raise Unreachable(self.account())
                if monotonic() >= trouble.until:
                    raise Unreachable(f"{self.account()}; connect_budget ({options.connect_budget:g} s) is over")
        try:
            member = group.pick(self, self.connection.address[0])
        except LookupError:
            raise Unreachable(self.account() or "an operator has drained all its backends") from None
        if member is not None:
            self.use(member)
            return
        if len(group.waiting) >= group.options.queue_length:
            raise Refused("queue_full", f"{group.pattern}: {group.options.queue_length} clients wait for a backend "
                                        "already")
        group.waiting[self] = self.in_trouble().parked = monotonic()
        raise NotYet(group.turns)

    def use(self, member: Member) -> None:
        """This member is to serve the client."""
        self.member = member
        self.way = self
        self.target = member.target
        self.is_trial = member.trial is self
        self.stage = DIALLING
        self.group.take(member, self)
        if self.trouble is not None:  # it may have waited for room
            self.waited()

    def waited(self) -> None:
        """The wait is over, if there was one; its time does not count in connect_budget."""
        trouble = self.trouble
        if trouble.parked:
            trouble.until += monotonic() - trouble.parked
            trouble.parked = 0.0

    def reach(self) -> socket.SocketType:
        """As `open`, for the member.  Raises NotYet where that has to wait, Refused, Unreachable."""
        if self.way is not self:  # `open` has said BlockingIOError before
            return self.way.open()
        member = self.member
        if member.pool is not None and (self.trouble is None or not self.trouble.has_been_warm):
            connection = self.connection
            self.warm = member.pool.take(connection.down, connection.replayable and connection.name is not None)
            if self.group.options.max_backend_connections is not None:
                self.group.warmth.fit(member)
            if self.warm is not None:
                self.way = self.warm.way
                return self.warm.sock
        way = self.group.way_to(member)
        if way is None:
            trouble = self.in_trouble()
            if trouble.asked is member:
                raise Unreachable(f"it was not ready, after {member.decision.scheme.waits_on} was")
            trouble.asked, self.awaited, trouble.parked = member, member.decision, monotonic()
            self.connection.parks = 0  # PARKS_MAX is for one target
            raise NotYet()
        self.way = way
        return way.open()

    def goes_on(self, error: Refused) -> bool:
        """The member could not be prepared, or offers no TLS: `open` comes next, and tries the next one."""
        trouble = self.in_trouble()
        if trouble.again is not None:
            self.member, trouble.again = trouble.again, None
            self.group.take(self.member, self)
            self.stage = DIALLING
        self.lose(str(error), is_fault=error.kind not in NO_FAULT, is_suspect=self.connection.state is GREETING)
        return True

    def connected(self, server: socket.SocketType) -> None:
        self.way.connected(server)
        warmth = self.group.warmth
        if warmth is not None and warmth.reuse is not None:
            warmth.observe(self)

    def proves(self) -> bool:
        """As the base; called once for each connect that succeeds, which is counted here.

        For TLS only a byte proves a backend: its hello can be sent to another one, as long as that is all.

        Behind a port a warm connection that its backend ends before a byte is replaced, as long as the client is
        silent.
        """
        connection = self.connection
        if self.stage is DIALLING:
            self.stage = CONNECTED
            member = self.member
            member.dialling -= 1
            if self.warm is None:
                now = monotonic()
                member.connected(now - connection.dialled, now)
        if self.warm is not None and self.warm.greeting:
            return True
        if not self.way.proven_by_connect:
            return False
        if connection.name is None:
            return self.warm is None or not connection.replayable
        return not connection.replayable

    @property
    def greeting(self) -> bytes:
        return self.warm.greeting if self.warm is not None else b""

    def is_used_up(self, server: socket.SocketType) -> bool:
        """As the base: whether a warm connection has ended."""
        if self.warm is None:
            return False
        try:
            return not server.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def count_dead(self) -> None:
        """The warm connection that it took had ended: the pool has counted it as a hit."""
        pool = self.member.pool
        if pool is not None:
            pool.hit -= 1
            pool.dead += 1

    def cool_down(self) -> None:
        """The warm connection has ended, which is no fault of the member: let it go, and dial the same one."""
        self.in_trouble().has_been_warm = True
        self.count_dead()
        way, self.way, self.warm = self.way, self, None
        way.release()

    def settled(self) -> Backend | None:
        self.answered()
        return self

    def answered(self) -> None:
        way = self.way
        if not way.proven_by_connect:
            way.answered()
        elif way.told:
            way.settled()
        self.serves()

    def committed(self) -> None:
        self.stage = SERVED
        if self.group.options.max_lifetime:
            self.begin_to_age()

    def serves(self) -> None:
        """The member serves the client: so those that did not are to blame."""
        group, member = self.group, self.member
        self.stage = SERVED
        self.note = self.way.remark() or "" if self.way.told else ""
        group.good_news(member)
        if self.trouble is not None:
            for suspect, (why, is_trial) in self.trouble.suspects.items():
                group.bad_news(suspect, why, is_trial)
            self.trouble.suspects = {}
        if self.is_trial and member.trial is self:
            member.trial = None
        if group.options.max_lifetime:
            self.begin_to_age()

    def begin_to_age(self) -> None:
        """It stays with this member: its max_lifetime begins."""
        if self.lifetime is None:
            group = self.group
            self.lifetime = group.book.spread(group.options.max_lifetime, LIFETIME_JITTER, group.chance(), too_old)
            self.lifetime.put(self)

    # -- what fails

    def lose(self, why: str, is_fault: bool = True, is_suspect: bool = False, member: Member | None = None) -> None:
        """The member, or the one that is used now, does not serve the client, and `why`, for people.

        `is_fault`: it is to blame, which counts.  `is_suspect`: perhaps the client is.
        """
        member, group = member or self.member, self.group
        if member is None:
            return
        trouble = self.in_trouble()
        self.told_of[member] = why
        self.target = self.connection.decision.target
        is_trial = self.is_trial
        self.drop()
        if not is_fault:
            return
        group.penalise(member)
        if is_suspect:
            trouble.suspects[member] = why, is_trial
        else:
            group.bad_news(member, why, is_trial)

    def drop(self) -> None:
        """Use the member no more."""
        member, way = self.member, self.way
        if member is not None:
            if self.stage is DIALLING:
                member.dialling -= 1
            self.stage = NONE
            self.member, self.way, self.warm = None, self, None
            if way is not self:
                way.release()
            self.group.leave(member, self)

    def account(self) -> str:
        """What became of each member that has failed this client, for people."""
        rows = [f"{member.target.removeprefix('tcp:')}: {why.removeprefix(f'{member.target}: ')}"
                for member, why in list(self.told_of.items())[:ACCOUNTS_MAX]]
        more = len(self.told_of) - ACCOUNTS_MAX
        return "; ".join(rows) + (f"; and {more} more" if more > 0 else "")

    def failed(self, why: str, server: socket.SocketType | None, last: bool) -> Verdict:
        """Go on to the next member, as long as the client's bytes can be sent again."""
        trouble = self.in_trouble()
        if trouble.unsaid is not None:  # the second call; the member was dropped behind the first
            (member, way, is_suspect), trouble.unsaid = trouble.unsaid, None
        elif self.member is None:  # `open` has tried them all
            return Refused("backend", f"{self.connection.decision.target}: {why}")
        else:
            if self.warm is not None and not last and self.connection.state is not EARLY \
                    and (self.stage is DIALLING or self.is_used_up(server)):
                trouble.again, trouble.has_been_warm = self.member, True
                self.count_dead()
                self.drop()
                return Another()
            member, way = self.member, self.way
            is_suspect = self.stage is not DIALLING or self.connection.state is GREETING
        state = self.connection.state
        trouble.stuck |= state is EARLY or state is UNANSWERED and not self.connection.replayable
        others = not trouble.stuck and self.has_others(member)
        verdict = way.failed(why, server, last or trouble.stuck or others)
        if verdict is None:
            trouble.unsaid = member, way, is_suspect
            return None
        if isinstance(verdict, Retry):
            trouble.again, self.awaited, trouble.parked = member, member.decision, monotonic()
            return verdict
        refusal = verdict.refusal if isinstance(verdict, Doubt) else verdict
        if isinstance(verdict, Doubt) and others:
            self.awaited = member.decision
            self.connection.router.waits.doubt(self.connection, verdict.doubted)
            self.awaited = None
        self.lose(str(refusal), is_fault=not way.is_ours(), is_suspect=is_suspect, member=member)
        if others:
            return Another()
        if len(self.told_of) > 1:
            return Refused("backend", f"{self.connection.decision.target}: {self.account()}")
        return verdict

    def has_others(self, failed: Member) -> bool:
        """Whether another member may be tried behind this one.  A reload may have taken out some that were."""
        group, tried = self.group, self.told_of
        return (monotonic() < self.trouble.until and not (group.options.tries and len(tried) + 1 >= group.options.tries)
                and any(member is not failed and member not in tried for member in group.members.values()))

    # -- the end

    def cut(self) -> None:
        """Its member is down, and the route says that this ends it."""
        if self.stage is SERVED:
            self.connection.close(BACKEND_DOWN)

    def remark(self) -> str | None:
        if self.told_of and self.note is not None:
            return f"{self.account()}; {self.target} took it"
        return self.note or None

    def is_lost(self) -> bool | None:
        way = self.way
        return way is not self and not way.proven_by_connect and way.is_lost()

    def abandon(self, server: socket.SocketType) -> None:
        if self.way is not self:
            self.way.abandon(server)
            if self.way.proven_by_connect:
                will_reset(server)  # as Connection.close does where a backend has answered: a cut is no end

    def release(self) -> None:
        if self.group.waiting:
            self.group.count_wait(self)
        if self.lifetime is not None:
            self.lifetime.drop(self)
            self.lifetime = None
        self.drop()


def way_of(connection: Connection) -> Backend:
    """`Scheme.choose`: the GroupBackend of a client, the same one for each try."""
    backend = connection.backend
    if backend is None:
        book, decision = connection.router.targets.book, connection.decision
        group = book.groups.get(decision.key)
        if group is None or group.route is not decision.route:
            group = book.group(decision)
        backend = GroupBackend(connection, group)
    return backend


def never_ready(targets: Targets, decision: Decision) -> Backend | None:
    """`Scheme.ready` where the way depends on the client: it is not called."""
    return None


def check_several(rest: str) -> str:
    """`Scheme.check`: nothing, since each target is checked by its own row."""
    return rest


def too_old(backend: GroupBackend) -> None:
    """It has had its max_lifetime."""
    backend.connection.close(LIFETIME)


SEVERAL = Scheme(check_several, never_ready, waits_on="a backend", choose=way_of)
