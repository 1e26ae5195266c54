"""sniroute_race: several addresses of one host: in which order, and beside each other where one is silent.

    found ---- alternate ---- Laggards.last ---- addresses      families take turns; what was worse lately comes last

    0 s      192.0.2.1 --------------------------- closed       one address at a time, as long as it answers at once
    0.25 s          192.0.2.2 ---------------- closed           silence: a Race, a new attempt each STAGGER
    0.5 s                  192.0.2.3 -- it answers              the first that connects wins
                                 +---> done(owner, attempt)     and the socket is the owner's

A connect that answers within STAGGER has no Race: one is made for a silent connect only.  When an address wins, those
that did not answer are remembered (Laggards), so that the next client does not wait for them.

    Attempt   one connect that is under way: its socket, and what the loop waits for
    Race      the attempts of one client.  It owns their sockets: each is closed once, or handed over to the owner
    Races     what the races of one loop share: their queues, and how many sockets they may have
    Laggards  addresses that did not take a connect where another one did

A Race asks a Backend (sniroute_targets) for the next connect (`begin`), and tells it what became of each (`tell`).

Sockets are opened in the second phase of a turn only.  In the first phase the loop may still have an event for a
number that was closed in this turn, and a new socket may get that number.

Threads: the loop only; `Laggards.last` is for any thread.

Seams: I want to ...
    another order of addresses      `alternate`, Laggards.last
    race something else             an object with `begin`, `row` and `tell`, as Backend has

It imports the loop.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import time
from typing import Any, Callable, Iterable, Protocol

from sniroute_loop import WRITE, Loop, Watch

__version__ = "0.1.0"

monotonic = time.monotonic

# Limits, each with its reason.  Times in seconds.
STAGGER = 0.25  # until the next address is tried beside a silent one: RFC 8305 section 5, Connection Attempt Delay
CONNECT_TIMEOUT = 5.0  # for each address
CONNECT_BUDGET = 15.0  # for all addresses of one client, however many there are
ADDRESSES_MAX = 16  # addresses of one host that are tried: the last begins after 3.75 s, and all is over within 9 s
EXTRA_MAX = 256  # sockets of all races beside the first of each: --max-connections reckons with one for a backend
WORSE_FOR = 600.0  # a laggard is tried last for so long, and no longer: perhaps it was only one lost packet
LAGGARDS_MAX = 1024  # laggards that are remembered: names, and so addresses, may come from strangers

Row = tuple[int, Any]  # family, and address as `socket` takes it
UNDER_WAY = (errno.EALREADY, errno.EINPROGRESS)  # of connect(): it is not over


def alternate(found: Iterable[Row]) -> tuple[Row, ...]:
    """The addresses in an order that changes the family at each step; the first stays.  Source: RFC 8305 section 4."""
    rows = list(found)
    first = [row for row in rows if row[0] == rows[0][0]]
    other = [row for row in rows if row[0] != rows[0][0]]
    mixed = [row for pair in zip(first, other) for row in pair]
    return (*mixed, *first[len(other):], *other[len(first):])


class Laggards:
    """Addresses that did not take a connect while another of the same host did: they are tried last for WORSE_FOR.

    Only those are moved, not the winner: so a resolver that rotates good addresses goes on to spread the load.
    """

    def __init__(self) -> None:
        self.until: dict[Row, float] = {}  # the latest comes last

    def learn(self, lost: Iterable[Row], won: Row) -> bool:
        """Remember what `lost` where another has `won`; whether that is news.  Loop only."""
        now = monotonic()
        self.until.pop(won, None)
        news = False
        for row in lost:
            news |= self.until.pop(row, 0.0) <= now
            self.until[row] = now + WORSE_FOR
        while len(self.until) > LAGGARDS_MAX:
            del self.until[next(iter(self.until))]
        return news

    def has(self, row: Row) -> bool:
        """Whether an address is one of them.  Loop only."""
        return bool(self.until) and self.until.get(row, 0.0) > monotonic()

    def last(self, rows: Iterable[Row]) -> tuple[Row, ...]:
        """The same addresses, those that are remembered behind the others.  Any thread."""
        now = monotonic()
        return tuple(sorted(rows, key=lambda row: self.until.get(row, 0.0) > now))


class Entrant(Protocol):
    """What a Race asks; a Backend is one."""

    row: Row | None  # the address to which `begin` has begun a connect last

    def begin(self) -> socket.SocketType | None:
        """A non-blocking socket whose connect to the next address has begun; None where no address is left.

        Raises OSError, with one of the loop's CAPACITY_ERRNOS, where this host has no descriptors; the address is still
        left then.
        """

    def tell(self, row: Row, what: str) -> None:
        """What became of an address, for people."""


class Attempt(Watch):
    """One connect under way."""

    __slots__ = ("race", "row", "sock", "began")

    def __init__(self, race: Race, row: Row, sock: socket.SocketType, began: float):
        super().__init__(race.races.loop.poller, sock.fileno())
        self.race = race
        self.row = row
        self.sock = sock
        self.began = began  # clock time

    @property
    def connection(self) -> Any:
        """The connection that ends where a callback of this attempt raises: `Router.fault` asks for it."""
        return self.race.connection

    def expire(self) -> None:
        """It has had its time."""
        self.race.drop(self, no_answer(CONNECT_TIMEOUT))
        self.race.another()


class Races:
    """What the races of one loop share."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.soon = loop.queue(0.0, Race.another)
        self.staggered = loop.queue(STAGGER, Race.another)
        self.late = loop.queue(CONNECT_TIMEOUT, Attempt.expire)
        self.extra = 0  # attempts that are open beside the first of their race


class Race:
    """The connects of one client to the addresses of its backend, begun one after another, under way together.

    Begins with `server`, whose connect to `entrant.row` began at the clock time `began`, and has given no answer since.
    Unless it is closed before, `done(connection, result)` is called once, with

        an Attempt   it is connected: its `sock` is the caller's from here on, and is watched no more
        None         no address is left; `entrant` was told what became of each
        an OSError   no address answers, and there is no descriptor to try the next one
    """

    __slots__ = ("races", "entrant", "connection", "done", "attempts")

    def __init__(self, races: Races, entrant: Entrant, server: socket.SocketType, began: float, connection: Any,
                 done: Callable[[Any, Attempt | OSError | None], None]):
        self.races = races
        self.entrant = entrant
        self.connection = connection
        self.done = done
        self.attempts: list[Attempt] = []  # under way, in the order in which they began
        self._add(server, began)

    def another(self) -> None:
        """Begin the next attempt beside those that are under way.  Second phase of a turn only."""
        self._leave_queues()
        races = self.races
        if self.attempts and races.extra >= EXTRA_MAX:
            races.staggered.put(self)
            return
        try:
            server = self.entrant.begin()
        except OSError as error:
            if self.attempts:
                races.staggered.put(self)  # whatever ends until then makes room
            else:
                self._finish(error)
            return
        if server is not None:
            self._add(server, monotonic())
            races.staggered.put(self)
        elif not self.attempts:
            self._finish(None)

    def _add(self, server: socket.SocketType, began: float) -> None:
        self.races.extra += bool(self.attempts)
        attempt = Attempt(self, self.entrant.row, server, began)
        self.attempts.append(attempt)
        attempt.wait_for(WRITE, functools.partial(self._on_answer, attempt))
        self.races.late.put(attempt)

    def _on_answer(self, attempt: Attempt, mask: int) -> None:
        """A connect is over."""
        error = attempt.sock.connect_ex(attempt.row[1])  # instead of SO_ERROR, which is 0 also while it is under way
        if error in UNDER_WAY:
            return
        if error in (0, errno.EISCONN):
            self._win(attempt)
        else:
            self.drop(attempt, os.strerror(error))
            self.races.soon.put(self)

    def _win(self, winner: Attempt) -> None:
        """Hand over the winner, and close the others.  Of those that began later nothing is said."""
        now = monotonic()
        self._remove(winner)
        winner.wait_for(0)
        for other in self.attempts.copy():
            if other.began < winner.began:
                self.drop(other, no_answer(now - other.began))
            else:
                self._discard(other)
        self.entrant.row = winner.row
        self._finish(winner)

    def _finish(self, result: Attempt | OSError | None) -> None:
        """Tell the owner how it ended."""
        self._leave_queues()
        self.done(self.connection, result)
        self.connection = None  # no cycles: nothing is left to the collector

    def drop(self, attempt: Attempt, why: str) -> None:
        """An attempt has failed: say so, and close it."""
        self.entrant.tell(attempt.row, why)
        self._discard(attempt)

    def close(self) -> None:
        """Give up: nothing is left open.  Does nothing where it is over already."""
        now = monotonic()
        self._leave_queues()
        for attempt in self.attempts.copy():
            self.drop(attempt, no_answer(now - attempt.began))
        self.connection = None

    def _discard(self, attempt: Attempt) -> None:
        self._remove(attempt)
        attempt.closing()
        attempt.sock.close()

    def _remove(self, attempt: Attempt) -> None:
        self.races.late.drop(attempt)
        self.attempts.remove(attempt)
        self.races.extra -= bool(self.attempts)

    def _leave_queues(self) -> None:
        for queue in (self.races.soon, self.races.staggered):
            queue.drop(self)


def no_answer(seconds: float) -> str:
    """What is said of an address that was silent for so long."""
    return f"no answer in {seconds:.2g} s"
