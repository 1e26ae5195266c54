"""sniroute_warm: connections to a backend that are dialled ahead, each for one client.

    make_way --- Warm.begin ---> dialling --- on_answer ---> idle --- take ------> a client's, for good
       ^                            |                        |  ^
       |                            | no answer, refused     |  +--- put --------- a client's that may serve another one
       |                            v                        v
       +----- WarmPool.fill <--- its socket is closed, its way released:
                                 the backend ended it or spoke, or it was idle for max_idle, or it is max_age old

    WarmPool   what is ready for one backend of one route, and how fast more is dialled
    Warm       one connection: the way (a Backend) by which it was dialled, its socket, what the backend has said on it

An idle connection is watched.  If its backend ends it, or says a byte on it, no client ever sees it.  Only where
servers may speak first (`greets`), what they say is kept, and the client gets it first: the greeting of MySQL, SMTP or
SSH.  `take` looks once more; what happens behind that look happens to a client's own connection.  Nothing is sent on an
idle connection: a PROXY header belongs to a client.

How fast a pool dials is its state; it dials in the second phase of a turn (sniroute_loop):

    TRYING    one dial.  It connects: STEADY; or PROVING, where there was a setback before
    PROVING   none, for PROVEN_AFTER; then STEADY
    STEADY    all that is missing, at once.  A connection that was idle for longer than PROVEN_AFTER ends: TRYING
    RESTING   none, for a while; then TRYING.  Any state ends here with a setback, for one of PAUSES: a dial has failed,
              or a connection has ended sooner than PROVEN_AFTER.  A backend that is not ready, as its name is being
              resolved, is no setback: it is asked for again after one of LOOKS
    CLOSED    none any more

So a backend that is down, or that ends its silent connections at once, is dialled once a second at most, and then
more and more seldom.  When all connections break at the same time, one dial asks whether the backend is still there.

A tunnel's way holds a lease on the tunnel (TunnelBackend): while a connection to it is kept warm, it does not stop for
being idle.  Each connection through it is one at the far end, too, from its dial on.

Threads: the loop only.  Others may read the counters, and len() of `idle` and `dialling`.

Seams: I want to ...
    dial faster, or more carefully     PAUSES, PROVEN_AFTER, DIALS_MAX, and the states above
    let a connection be idle otherwise `WarmPool._keep`, Warm.is_good

It imports targets, race, the loop and refusals.
"""

from __future__ import annotations

import collections
import errno
import os
import random
import time
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Sequence

from sniroute_loop import JITTERS, NEVER, READ, WRITE, Loop, Queue, Watch, ignore, jittered
from sniroute_race import UNDER_WAY, Row, no_answer
from sniroute_refusals import Refused
from sniroute_targets import Backend, Unreachable

if TYPE_CHECKING:
    import socket

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds, sizes in bytes.
GREETING_MAX = 4096  # what a server says first: SSH's banner has 255 bytes at most, MySQL's some 100, SMTP's lines 512
REUSED_MAX = 64  # connections kept that clients gave back, where `size` is less: a backend's processes are not for free
DIALS_MAX = 32  # connects under way at once, and in one turn: a fourth of the backlog of most servers, 128
BREATH = 0.02  # between two times DIALS_MAX, so that the server accepts meanwhile: 1,600 dials in a second
BACKLOG_LOOK = 0.1  # between two connects to a unix socket whose backlog is full: no client waits for it
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # after the first, second ... setback in a row
LOOKS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # until a backend that is not ready is asked for again
PAUSE_SPREAD = 0.25  # a pause is longer by up to this share: what failed together does not come back together
PAUSE_STEPS = 4  # different pauses of each length; each is a queue of the loop
PROVEN_AFTER = 2.0  # who ends a silent connection sooner does so always, or is about to go down
AGES = 16  # what a connection that comes back has left to live is rounded down to so many parts of max_age

TRYING, PROVING, STEADY, RESTING, CLOSED = "trying", "proving", "steady", "resting", "closed"  # states of a pool


class WarmOptions(NamedTuple):
    """What a route says of its warm connections to one backend; durations in seconds."""

    size: int  # so many are dialled ahead
    max_idle: float  # 0: off
    max_age: float  # 0: off
    jitter: float  # the share by which both are longer or shorter, 0 to 1
    order: str  # `fifo`: the one that has been idle longest is taken; `lifo`: the latest
    greets: bool  # servers may speak first; else a byte of a server makes a connection used up
    connect_timeout: float  # for each address


class Warm(Watch):
    """One connection of a pool.  Until it is taken, the pool owns `sock` and `way`.

    Who takes it closes the socket, and releases the way behind that, as with a way that it has opened itself, and tells
    it the rest: `settled`, `answered` and so on.  `connected` was called.
    """

    __slots__ = ("pool", "way", "sock", "greeting", "began", "since", "most", "why", "queues")

    def __init__(self, pool: WarmPool, way: Backend, most: int):
        self.poller = pool.loop.poller
        self.fd = -1
        self.events = 0
        self.pool = pool
        self.way = way
        self.sock: socket.SocketType | None = None
        self.greeting = b""  # what the server has said: the client gets it first
        self.began = 0.0  # clock time of its connect, moved by its part of the jitter: for `WarmPool.put`
        self.since = 0.0  # clock time of its connect, for `lost`; -NEVER: it has served a client, so it is no setback
        self.most = most  # bytes that the server may say before it is taken
        self.why = ""  # what became of the address before
        self.queues: tuple[Queue, ...] = ()  # in which it stands

    # -- the connect

    def begin(self) -> None:
        """Connect to the next address.  Second phase of a turn only: see sniroute_race."""
        pool = self.pool
        try:
            self.sock = self.way.open(self.why)
        except (Unreachable, Refused) as error:
            if self.way.is_ours():
                pool.has_no_room(self)
            else:
                pool.failed(self, str(error))
        except BlockingIOError:
            pool.dialling[self] = None
            self.stand_in(pool.backlog)
        except OSError:
            pool.has_no_room(self)  # CAPACITY_ERRNOS
        else:
            self.fd = self.sock.fileno()
            self.why = ""
            if self.way.local:  # on loopback a connect is over already, as a rule
                self.on_answer(0)
            else:
                self.await_answer()

    def await_answer(self) -> None:
        """The connect is under way."""
        if not self.events:
            self.pool.dialling[self] = None
            self.stand_in(self.pool.late)
            self.wait_for(WRITE, self.on_answer)

    def on_answer(self, mask: int) -> None:
        """The connect may be over."""
        row = self.way.row
        try:
            if row is not None:  # else a pair of sockets
                error = self.sock.connect_ex(row[1])  # as in a Race: SO_ERROR is 0 also while it is under way
                if error in UNDER_WAY:
                    self.await_answer()
                    return
                if error not in (0, errno.EISCONN):
                    raise OSError(error, os.strerror(error))
            self.way.connected(self.sock)
        except Unreachable as error:
            self.pool.failed(self, str(error))
        except OSError as error:
            self.go_on(error.strerror)
        else:
            self.pool.connected(self)

    def expire(self) -> None:
        """The connect has had its time."""
        self.go_on(no_answer(self.pool.options.connect_timeout))

    def go_on(self, why: str) -> None:
        """The address did not take it, and `why`: the next one is tried in the second phase of a turn."""
        self.close_socket()
        self.why = why
        self.pool.dialling[self] = None
        self.stand_in(self.pool.again)

    # -- idle

    def on_news(self, mask: int) -> None:
        """The server has ended it, or has said something; or there is no news (a stale event)."""
        if not self.is_good():
            pool = self.pool
            del pool.idle[self]
            self.discard()
            pool.lost(self)

    def is_good(self) -> bool:
        """Whether it can serve a client.  Reads what the server has said until now."""
        try:
            self.way.connected(self.sock)
            while True:
                said = self.sock.recv(GREETING_MAX)
                self.greeting += said
                if not said or len(self.greeting) > self.most:
                    return False
        except BlockingIOError:
            return True  # alive, and silent
        except (OSError, Unreachable, MemoryError):  # without memory it would stay readable, and wake us all the while
            return False

    def too_old(self) -> None:
        """It has been idle for max_idle, or it has lived for max_age."""
        pool = self.pool
        del pool.idle[self]
        self.discard()
        pool.schedule()

    def leave_to(self, heir: Watch | None) -> None:
        """Watch it no more; from here on `heir` does, where there is one, without a call of the kernel."""
        if heir is None:
            self.wait_for(0)
        else:
            heir.fd, heir.events, self.events = self.fd, self.events, 0
            self.poller.callbacks[self.fd] = ignore

    # -- both

    def stand_in(self, *queues: Queue) -> None:
        """Stand in these queues, and in no other."""
        for queue in self.queues:
            queue.drop(self)
        for queue in queues:
            queue.put(self)
        self.queues = queues

    def close_socket(self) -> None:
        """Close it in order: what the server said was read, so the kernel sends FIN, and no RST."""
        self.stand_in()
        self.closing()
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def discard(self) -> None:
        """The pool needs it no longer."""
        self.close_socket()
        self.way.release()


class WarmPool:
    """The warm connections to one backend of one route.

    Loop only.  `queue(seconds, act)` gives the queue that all share who wait equally long for the same.  `make_way()`
    gives a new way to the backend, or None where it is not ready (the pool asks again, more and more seldom), or raises
    Refused.  `told(why)` hears of each dial that has failed; of none where this host has no descriptors.  It may call
    `resize` and `close`.  `clock` and `chance` (0 to 1) are the time and the dice.

    Nothing is dialled before `resize` or `schedule` is called.
    """

    def __init__(self, loop: Loop, queue: Callable[[float, Callable[[Any], Any]], Queue],
                 make_way: Callable[[], Backend | None], options: WarmOptions, told: Callable[[str], Any],
                 clock: Callable[[], float] = time.monotonic, chance: Callable[[], float] = random.random):
        self.loop = loop
        self.queue = queue
        self.make_way = make_way
        self.options = options
        self.told = told
        self.clock = clock
        self.chance = chance
        self.size = options.size
        self.reused = 0  # so many are kept where `size` is less: REUSED_MAX, once a connection was given back
        self.state = TRYING
        self.setbacks = 0  # in a row
        self.looks = 0  # in a row that found the backend not ready
        self.pause: Queue | None = None  # the one in which it is RESTING
        self.idle: collections.OrderedDict[Warm, None] = collections.OrderedDict()  # the longest comes first
        self.dialling: dict[Warm, None] = {}  # the latest comes last
        self.hit = self.miss = self.dead = 0  # numbers so far: `take` gave one; had none; met one that had ended
        self.soon = refills(loop)  # pools that dial at the end of this turn
        self.breath = queue(BREATH, WarmPool.fill)
        self.proving = queue(PROVEN_AFTER, WarmPool.proven)
        self.late = queue(options.connect_timeout, Warm.expire)  # connects that are under way
        self.again = queue(0.0, Warm.begin)  # those whose last address did not take it
        self.backlog = queue(BACKLOG_LOOK, Warm.begin)
        # By the step of the jitter: how long a connection is idle, how long it lives, how far that moves its birth.
        idles, ages = ([jittered(most, options.jitter, step) for step in range(JITTERS)]
                       for most in (options.max_idle, options.max_age))
        self.idles = [queue(seconds, Warm.too_old) for seconds in idles] if options.max_idle else []
        self.ages = [queue(seconds, Warm.too_old) for seconds in ages] if options.max_age else []
        self.births = [seconds - options.max_age for seconds in ages]

    # -- clients

    def take(self, heir: Watch | None = None, is_replayable: bool = False) -> Warm | None:
        """A connection that was alive a moment ago, and is the caller's from here on; None where there is none.

        It is watched no more; or, with an `heir`, by that: it waits for READ already, and nothing is called back yet.
        That saves two system calls where it would wait for READ next.

        `is_replayable`: what the client says is sent again where the connection has ended.  Then the last look is left
        out: what the loop has been told of is as fresh as its turn, and the look is 3 % of a connection's CPU.
        """
        idle, is_lifo = self.idle, self.options.order == "lifo"
        while idle:
            warm, _ = idle.popitem(is_lifo)
            if is_replayable or warm.is_good():
                self.hit += 1
                warm.stand_in()
                warm.leave_to(heir)
                self.schedule()
                return warm
            self.dead += 1
            warm.discard()
            self.lost(warm)
        self.miss += 1
        return None

    def put(self, way: Backend, sock: socket.SocketType, began: float) -> None:
        """Give back a connection that may serve another client; both are the pool's from here on.

        Nobody watches the socket, and nothing on it is unread.  `began` is that of the Warm, or `birth()` at its dial:
        it does not get younger here.  A byte that comes before the next client makes it used up, whatever `greets` is:
        it belongs to the last client.
        """
        warm = Warm(self, way, 0)
        warm.sock, warm.fd, warm.began, warm.since = sock, sock.fileno(), began, -NEVER
        left, max_age = AGES, self.options.max_age
        if max_age:
            left = int((began + max_age - self.clock()) / max_age * AGES)
        if self.state is CLOSED or left <= 0:
            warm.discard()
            return
        self.reused = REUSED_MAX
        self._keep(warm, self._step(), self.queue(max_age * left / AGES, Warm.too_old) if max_age else None)
        self._trim()

    def birth(self) -> float:
        """`began` of a connection that somebody has dialled now, and may give to `put` later."""
        return self.clock() + self.births[self._step()]

    # -- the owner

    def keep_only(self, rows: Sequence[Row]) -> None:
        """These are the addresses of the backend now: close what leads to others."""
        for warm in [warm for warm in self.idle if warm.way.row not in rows]:
            del self.idle[warm]
            warm.discard()
        for warm in [warm for warm in self.dialling if not all(row in rows for row in warm.way.addresses)]:
            del self.dialling[warm]
            warm.discard()
        self.schedule()

    def trim(self, most: int) -> None:
        """Close the longest idle ones, until there are so many at most."""
        while len(self.idle) > most:
            warm, _ = self.idle.popitem(False)
            warm.discard()

    def drop_reused(self) -> None:
        """Close what clients gave back."""
        self.reused = 0
        for warm in [warm for warm in self.idle if warm.since == -NEVER]:
            del self.idle[warm]
            warm.discard()
        self.schedule()

    def resize(self, size: int) -> None:
        """Keep so many.  0, for a backend that is down: close what is idle, and what is being dialled.

        From 0 on it tries again at once, whatever was before: the owner knows that the backend is back.
        """
        if self.state is CLOSED:
            return
        before, self.size = self.size, size
        if size and not before:
            self._leave_queues()
            self.state = TRYING
        if size:
            self._trim()
            surplus = max(0, len(self.dialling) - max(0, size - len(self.idle)))
        else:
            self._drop_all(self.idle)
            surplus = len(self.dialling)
        for warm in list(self.dialling)[::-1][:surplus]:
            del self.dialling[warm]
            warm.discard()
        self.schedule()

    def close(self) -> None:
        """Close everything, once.  Nothing is called behind this."""
        self.state = CLOSED
        self.size = 0
        self._leave_queues()
        self._drop_all(self.idle)
        self._drop_all(self.dialling)

    # -- dialling

    def schedule(self) -> None:
        """Dial what is missing at the end of this turn, as fast as the state allows."""
        if self.state in (STEADY, TRYING) and len(self.idle) + len(self.dialling) < self.size:
            self.soon.append(self)

    def fill(self) -> None:
        """Dial what is missing, DIALS_MAX at most.  Second phase of a turn only."""
        for _ in range(DIALS_MAX):
            if len(self.idle) + len(self.dialling) >= self.size:
                return
            if self.state is STEADY and len(self.dialling) < DIALS_MAX or self.state is TRYING and not self.dialling:
                self._dial()
            else:
                return  # the end of a dial, or of a rest, goes on
        self.breath.put(self)

    def _dial(self) -> None:
        try:
            way = self.make_way()
        except Refused as error:
            self._set_back()
            self.told(str(error))
            return
        if way is None:
            self._rest(LOOKS[min(self.looks, len(LOOKS) - 1)])
            self.looks += 1
            return
        self.looks = 0
        if len(self.idle) + len(self.dialling) >= self.size:
            way.release()  # `make_way` has called `resize`: where it leads, none is wanted
        else:
            Warm(self, way, GREETING_MAX if self.options.greets else 0).begin()

    def connected(self, warm: Warm) -> None:
        """A dial has succeeded."""
        was_awaited = self.dialling.pop(warm, self) is not self
        step = self._step()
        warm.since = now = self.clock()
        warm.began = now + self.births[step]
        self._keep(warm, step, self.ages[step] if self.ages else None)
        if self.state is TRYING:
            if self.setbacks:
                self.state = PROVING
                self.proving.put(self)
            else:
                self.state = STEADY
        if was_awaited:  # else `fill` goes on
            self.schedule()

    def failed(self, warm: Warm, why: str) -> None:
        """A dial has failed; `why` is for people."""
        self.dialling.pop(warm, None)
        warm.discard()
        self._set_back()
        self.told(why)

    def has_no_room(self, warm: Warm) -> None:
        """This host has no descriptors, or no ports: nobody's fault, and clients need them more."""
        self.dialling.pop(warm, None)
        warm.discard()
        self._rest(PAUSES[0])

    def give_way(self) -> None:
        """Clients find no descriptors on this host: leave them half of what is idle, and dial none for a while."""
        if self.state is not CLOSED:
            self.trim(len(self.idle) // 2)
            self._drop_all(self.dialling)
            self._rest(PAUSES[-1])

    def lost(self, warm: Warm) -> None:
        """The backend has ended an idle connection, or has said a byte on it; it is closed."""
        if self.clock() - warm.since < PROVEN_AFTER:
            self._set_back()
        elif self.state is STEADY:
            self.state = TRYING  # where all break at once, one dial asks for all
        self.schedule()

    # -- the pace

    def _set_back(self) -> None:
        """A setback: rest, longer each time.  While it rests already, others of the same burst do not count."""
        if self.state is not RESTING:
            self._rest(PAUSES[min(self.setbacks, len(PAUSES) - 1)])
            self.setbacks += 1

    def _rest(self, seconds: float) -> None:
        self._leave_queues()
        self.state = RESTING
        longer = 1 + PAUSE_SPREAD * int(self.chance() * PAUSE_STEPS) / PAUSE_STEPS
        self.pause = self.queue(seconds * longer, WarmPool.try_again)
        self.pause.put(self)

    def try_again(self) -> None:
        """The rest is over."""
        self.pause = None
        self.state = TRYING
        self.schedule()

    def proven(self) -> None:
        """There was no setback since the last dial that connected."""
        self.state = STEADY
        oldest = next(iter(self.idle), None)
        if oldest is not None:  # else a client has taken it: nobody knows whether it would have lived so long
            self.setbacks = 0
        self.schedule()

    # -- what is kept

    def _step(self) -> int:
        """The step of the jitter of one connection."""
        return int(self.chance() * JITTERS)

    def _keep(self, warm: Warm, step: int, age: Queue | None) -> None:
        """It is idle from now on: for the time in `idles` at this step of the jitter, and until its `age` is over."""
        self.idle[warm] = None
        warm.stand_in(*self.idles[step:step + 1], *(() if age is None else (age,)))
        warm.wait_for(READ, warm.on_news)

    def _trim(self) -> None:
        """Close those that are too many."""
        self.trim(max(self.size, self.reused))

    def _drop_all(self, those: dict[Warm, None]) -> None:
        while those:
            warm, _ = those.popitem()
            warm.discard()

    def _leave_queues(self) -> None:
        for queue in (self.breath, self.proving, self.pause):
            if queue is not None:
                queue.drop(self)
        self.pause = None


def refills(loop: Loop) -> list[WarmPool]:
    """The batch of a loop in which pools are refilled: one for all.

    A batch instead of a queue: with a queue the loop would look through all queues in each turn in which a pool dials.
    """
    found = (batch for batch, step in loop.batches if step is WarmPool.fill)
    batch = next(found, None)
    return loop.batch(WarmPool.fill) if batch is None else batch
