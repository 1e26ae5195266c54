"""sniroute_pool: connections that wait to be used: which is next, how many there should be, and one by its id.

    dialled, or accepted --- add ---> Pool.idle --- take, ask ---> a caller of this end     (the accepting end)
                                          |  ------ find(id) ----> a caller of the other    (the dialling end)
                                          v
                                      Pool.ended: on the dialling end `find` has it for KEPT seconds more

A connection is used once.  The accepting end picks any of them, first in, first out, and tells the other end its id.
So the dialling end may get the first bytes, and even the end, of a connection before the signal that names it: they are
kept with it (`Slot.early`).  On the accepting end nobody may speak on an idle connection: one that does is a
stranger's, and is reset.

An end that has no connection left makes its callers wait, in their order (`ask`).

    Slot    one connection, its id, and what came early (`slot=` counts callers: that is Slots of sniroute_guards)
    Pool    all that are idle, and all that wait for one
    Sizer   how many a client should have, from what was used: without I/O, and without a clock of its own

Threads: the loop's only.

Seams: I want to ...
    grow, or shrink, otherwise   Sizer
    pick otherwise               `Pool.take`

This room imports sniroute_duplex (Wire), sniroute_loop and sniroute_refusals (Failed).
"""

from __future__ import annotations

import collections
import functools
import itertools
from typing import Any, Callable

from sniroute_duplex import Wire
from sniroute_loop import Loop
from sniroute_refusals import Failed

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
KEPT = 5.0  # for which a connection that has ended can be found: its signal may still be on its way
ENDED_MAX = 4096  # of those; more than there are connections in a pool by default
WANTED_MAX = 4096  # ids that are waited for: the other end can name as many as it likes
EARLY_MAX = 16 << 20  # bytes kept with connections whose target is not there yet: then none of those is read any more
GROW_AT = 0.5  # of the capacity: with fewer idle ones a use doubles it, so that a burst is dialled ahead of
SHRINK_AT = 0.8  # of it: where more than so many were idle for a whole period, it shrinks
SHRINK_BY = 0.25  # of what it has above its least, in a period


def unheard(*what: Any) -> None:
    """The callback of a wire without an owner."""


class Slot:
    """One connection of a pool.  Its owner is the pool, while `Pool.idle` or `Pool.ended` has it; then who uses it.

    Args:
        number: its id, eight hex digits.
    """

    __slots__ = ("id", "wire", "early", "ended")

    def __init__(self, number: str, wire: Wire):
        self.id = number
        self.wire = wire
        self.early = b""  # what the other end has sent before the connection was used here
        self.ended = False  # the other end has ended its direction

    def use(self) -> Wire:
        """Take the wire.  The callbacks are the taker's to set; it is to look at `early` and `ended` first."""
        self.wire.on_data = self.wire.on_end = self.wire.on_room = unheard
        return self.wire


class Asker:
    """Somebody who waits for a connection."""

    __slots__ = ("pool", "done", "id")

    def __init__(self, pool: Pool, done: Callable[[Slot | None], None], number: str = ""):
        self.pool = pool
        self.done: Callable[[Slot | None], None] | None = done
        self.id = number  # "": any

    def answer(self, slot: Slot | None) -> None:
        """Tell what came of it, once."""
        done, self.done = self.done, None
        self.pool.patience.drop(self)
        if done is not None:
            done(slot)

    def cancel(self) -> None:
        """Wait no more; `done` is not called."""
        self.done = None
        self.pool.patience.drop(self)


class Pool:
    """The idle connections of one end.

    Args:
        picks: this is the accepting end.
        patience: seconds that somebody waits for a connection (NP_POOL_GET_TIMEOUT).
        spoke: called with a slot, and with what a stranger has said on it; only where this end `picks`.
        fewer: called when there are fewer idle connections than before, or too few: whether that is since they are
            used, and not since they have ended.
    """

    def __init__(self, loop: Loop, picks: bool, patience: float, spoke: Callable[[Slot, bytes], None],
                 fewer: Callable[[bool], None]):
        self.loop = loop
        self.picks = picks
        self.spoke = spoke
        self.fewer = fewer
        self.idle: collections.OrderedDict[str, Slot] = collections.OrderedDict()
        self.ended: collections.OrderedDict[str, Slot] = collections.OrderedDict()
        self.askers: collections.deque[Asker] = collections.deque()  # for any; may be over
        self.wanted: dict[str, Asker] = {}  # for one, by its id
        self.keeping = loop.queue(KEPT, self._forget)
        self.patience = loop.queue(patience, self._tell_none)
        self.is_open = False  # to those who ask for any: there is a link, and it is verified
        self.least = 0  # idle connections since the last look of the Sizer
        self.dialling: set[Slot] = set()  # in use, and their target is dialled: see `hold`
        self.held = 0  # bytes that came early: with connections here, and with those
        self.is_tight = False  # those are too many

    def add(self, slot: Slot) -> bool:
        """One more connection.  False: there is one with its id, and this one was reset."""
        if slot.id in self.idle or slot.id in self.ended:
            slot.use().reset()
            return False
        wanted = self.wanted.pop(slot.id, None)
        if wanted is not None and wanted.done is not None:
            wanted.answer(slot)
            return True
        while self.askers and self.is_open:
            asker = self.askers.popleft()
            if asker.done is not None:
                asker.answer(slot)
                return True
        self.idle[slot.id] = slot
        slot.wire.on_data = functools.partial(self._on_data, slot)
        slot.wire.on_end = functools.partial(self._on_end, slot)
        if self.is_tight:
            slot.wire.pause()
        return True

    def open(self) -> None:
        """Serve those who wait for any connection."""
        self.is_open = True
        while self.askers and self.idle:
            asker = self.askers.popleft()
            if asker.done is not None:
                asker.answer(self.take())

    def take(self) -> Slot | None:
        """The connection that waits longest."""
        if not self.idle:
            return None
        _, slot = self.idle.popitem(last=False)
        self._used(slot)
        return slot

    def _used(self, slot: Slot) -> None:
        self._let_go(slot)
        if len(self.idle) < self.least:
            self.least = len(self.idle)
        self.fewer(True)

    def _let_go(self, slot: Slot) -> Wire:
        """A connection is not the pool's any more."""
        if slot.early:
            self._count(-len(slot.early))
        return slot.use()

    def hold(self, slot: Slot) -> None:
        """Have what came early on a connection in use counted, until `release`: its target is dialled."""
        self.dialling.add(slot)
        self._count(len(slot.early))
        if self.is_tight:
            slot.wire.pause()

    def release(self, slot: Slot) -> None:
        """Its target is there, or nobody waits for it."""
        self.dialling.discard(slot)
        self._count(-len(slot.early))

    def came(self, slot: Slot, data: bytes | memoryview) -> None:
        """A piece came early, on an idle connection, or on one that is held.  It is all that is kept of each."""
        slot.wire.pause()
        slot.early += data
        self._count(len(data))

    def _count(self, more: int) -> None:
        """So many bytes more are kept, or less.  While they are too many none of these connections is read.

        Else callers that speak first, and a target that takes its time, fill the memory.
        """
        self.held += more
        if self.is_tight is (self.held > (EARLY_MAX // 2 if self.is_tight else EARLY_MAX)):
            return
        self.is_tight = not self.is_tight
        for slot in itertools.chain(self.idle.values(), self.dialling):
            if self.is_tight:
                slot.wire.pause()
            elif not slot.early and not slot.ended:
                slot.wire.resume()

    def ask(self, done: Callable[[Slot | None], None]) -> Asker:
        """Any connection, now or as soon as there is one; None when the patience is over."""
        asker = Asker(self, done)
        slot = self.take() if self.is_open else None
        if slot is not None:
            asker.answer(slot)
        else:
            self.askers.append(asker)
            self.patience.put(asker)
            self.least = 0
            self.fewer(True)
        return asker

    def find(self, number: str, done: Callable[[Slot | None], None]) -> Asker:
        """The connection with this id, now or as soon as it comes; None when the patience is over."""
        asker = Asker(self, done, number)
        slot = self.pick(number)
        if slot is not None:
            asker.answer(slot)
        elif (slot := self.ended.pop(number, None)) is not None:
            self.keeping.drop(slot)
            self._let_go(slot)
            asker.answer(slot)
        elif number in self.wanted or len(self.wanted) >= WANTED_MAX:
            asker.answer(None)  # it is named twice, or the other end names whatever it likes
        else:
            self.wanted[number] = asker
            self.patience.put(asker)
        return asker

    def _tell_none(self, asker: Asker) -> None:
        """The patience of somebody is over."""
        if asker.id and self.wanted.get(asker.id) is asker:
            del self.wanted[asker.id]
        while self.askers and self.askers[0].done is None:
            self.askers.popleft()
        if self.askers and self.askers[0] is asker:
            self.askers.popleft()
        asker.answer(None)

    def _on_data(self, slot: Slot, data: bytes | memoryview) -> None:
        if self.picks:
            self._leave(slot)
            slot.use().reset()
            self.spoke(slot, bytes(data))
            return
        self.came(slot, data)

    def _on_end(self, slot: Slot, error: Failed | None) -> None:
        """It has ended before it was used.  On the dialling end its signal may still be on its way."""
        self._leave(slot)
        if self.picks or error is not None and not slot.early:
            slot.use().reset()
        else:
            self._keep(slot)

    def _leave(self, slot: Slot) -> None:
        if self.idle.pop(slot.id, None) is not None:
            self.least = min(self.least, len(self.idle))
            self.fewer(False)

    def _keep(self, slot: Slot) -> None:
        slot.ended = True
        slot.wire.on_data = slot.wire.on_end = slot.wire.on_room = unheard
        self.ended[slot.id] = slot
        self.keeping.put(slot)
        if len(self.ended) > ENDED_MAX:
            self.keeping.drop(oldest := self.ended.popitem(last=False)[1])
            self._let_go(oldest).reset()

    def _forget(self, slot: Slot) -> None:
        """Nobody has asked for a connection that has ended."""
        if self.ended.pop(slot.id, None) is not None:
            self._let_go(slot).reset()

    def pick(self, number: str) -> Slot | None:
        """The idle connection with this id."""
        slot = self.idle.pop(number, None)
        if slot is not None:
            self._used(slot)
        return slot

    def flush(self) -> None:
        """Close all that are idle, or have ended."""
        slots = [*self.idle.values(), *self.ended.values()]
        self.idle.clear()
        self.ended.clear()
        for slot in slots:
            self.keeping.drop(slot)
            self._let_go(slot).reset()
        self.fewer(False)

    def shut(self) -> None:
        """The link is over: close all connections.  Callers wait for the next link; what was named in this one is lost."""
        self.is_open = False
        self.flush()
        self._give_up()

    def _give_up(self) -> None:
        """No connection that was named comes any more."""
        wanted, self.wanted = self.wanted, {}
        for asker in wanted.values():
            asker.answer(None)

    def close(self) -> None:
        """As `flush`, and nobody waits any more."""
        self.flush()
        self._give_up()
        for asker in list(self.askers):
            asker.answer(None)
        self.askers.clear()
        self.loop.retire(self.keeping, self.patience)


class Sizer:
    """How many idle connections a client should have.

    The original dials by a clock, at most once in 100 ms, so a burst of callers waits for it.  This one dials as soon
    as a connection is used, and doubles the capacity where the idle ones run short, and so many were used since it did
    that before: while a pool is being filled they are short, too, and a few callers must not make it a large one.

    Args:
        least, most: of idle connections (`min` of the client, `max` of the server; swapped where they are the wrong
            way round, as the original does).
    """

    def __init__(self, least: int, most: int):
        self.least, self.most = min(least, most), max(least, most)
        self.capacity = self.least
        self.uses = 0  # since it has grown, or a period ago

    def wanted(self, idle: int, dialling: int) -> int:
        """How many to dial now."""
        return max(0, self.capacity - idle - dialling)

    def used(self, idle: int) -> None:
        """One was used, and so many are left."""
        self.uses += 1
        if idle < self.capacity * GROW_AT / 2 and self.uses >= self.capacity * GROW_AT / 2:
            self.capacity = min(self.most, max(self.capacity * 2, 1))
            self.uses = 0

    def look(self, idle_at_least: int) -> None:
        """A period is over, in which there were always so many idle ones."""
        self.uses = 0
        if idle_at_least > self.capacity * SHRINK_AT:
            self.capacity -= min(self.capacity - self.least, max(1, int((self.capacity - self.least) * SHRINK_BY)))
