"""sniroute_loop: one loop over many sockets: what is ready, what is due, what other threads ask for.

    a turn    1  poll      ready descriptors are called back    Poller: descriptor -> callback(mask)
              2  due       times that have come                 Timer: one time; Queue: many that wait equally long;
                                                                Alarms: many, each with a time of its own
              3  batches   what several do together             Loop.batch: a list and a step, in order

    other threads --- call(act) ---> a deque, and a byte in a pipe (WakePipe) ---> phase 1 of the next turn

Batches exist because it costs less to wake another process once for many connections than once for each: all
that were accepted in a turn are read together, then all that were routed dial, then all that have dialled
speak.  That saves a fifth of the CPU of a connection.

Threads: `call` and `WakePipe.wake` are for any thread; all else is for the thread that runs the loop.
No locks: a deque's append and popleft are each one step of the interpreter.

Where the process, or its host, stood still, all that was due meanwhile would be due at once, before what has come
meanwhile is read.  So nothing is due in the second behind that: peers that have spoken are not taken for silent.

A fault in a callback, a timer, a queue or a step ends with `fault(owner)`, given to Loop(): the owner is
the object that met it, so that one connection ends and not the loop.  So does a MemoryError, and the loop's reserve is
given back first, so that `fault` has some memory; one that the loop meets by itself makes it rest for a moment.
Where what failed stays ready, the next turn begins 0.1 s later.

Seams: I want to ...
    do something at a time       Loop.timer; where many items wait equally long, Loop.queue; else Alarms
    know that it stood still     Loop.woken
    do something once a turn     Loop.batch; its place among the batches is that of its call
    let many end at other times  `jittered`
    wait otherwise               a subclass of Poller, chosen in Loop

It imports scarcity, and knows nothing of connections.
"""

from __future__ import annotations

import collections
import errno
import fcntl
import functools
import heapq
import itertools
import os
import select
import selectors
import struct
import sys
import termios
import time
from typing import Any, Callable, Iterable

from sniroute_scarcity import Reserve, outlast, ran_out

__version__ = "0.1.0"

monotonic = time.monotonic

EVENTS = 256  # ready descriptors in a turn, so that a turn ends soon (epoll only)
WAIT_LAST = 3600.0  # seconds of one wait: epoll takes no more than 24 days
NEVER = float("inf")
STOOD_STILL = 2.0  # seconds by which a turn is late where this process did not run: it, or its host, was stopped
WAKING = 1.0  # seconds behind that in which nothing is due: what came meanwhile is heard first
WAKING_AGAIN = 10.0  # seconds behind these until it may be so again: a loop that is always late has deadlines, too
CAPACITY_PAUSE = 0.1  # seconds until an accept is tried again when descriptors are short; else the loop would spin
SPINS = 0.01  # seconds between two faults of a callback that stays ready: so soon it spins, and nobody has tried again
JITTERS = 16  # different times where one has jitter, since each is a queue: see `jittered`

# errno values that mean "not now": descriptors or memory are short on this host.
CAPACITY_ERRNOS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))

READ, WRITE = 1, 4  # what a descriptor waits for, as epoll(7) numbers them


class WakePipe:
    """A pipe by which any thread wakes the one that waits for its reading end."""

    __slots__ = ("reader", "writer")

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        for end in (self.reader, self.writer):
            os.set_blocking(end, False)

    def wake(self, word: bytes = b"\0") -> None:
        """Any thread; never waits.  `word`: a byte, for a reader that asks why it was woken."""
        try:
            os.write(self.writer, word)
        except OSError:
            pass  # full: the thread is being woken already; closed: it has ended

    def clear(self) -> None:
        """Read what woke us."""
        try:
            os.read(self.reader, 4096)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Close both ends.  The number goes first: a late `wake` must not write to whatever has it next."""
        reader, writer = self.reader, self.writer
        self.reader = self.writer = -1
        for end in (reader, writer):
            if end >= 0:
                os.close(end)


def ignore(mask: int) -> None:
    """The callback of a descriptor that waits for nothing."""


class Poller:
    """What descriptors wait for, and what to call then (`callbacks`).

    A forgotten descriptor keeps the callback `ignore`: this turn's events may still name it.
    The table never outgrows the highest descriptor.
    This one is `selectors`, for systems without epoll.
    """

    def __init__(self) -> None:
        self.callbacks: dict[int, Callable[[int], None]] = {}
        self.selector = selectors.DefaultSelector()

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Begin to wait for READ, WRITE or both."""
        self.callbacks[fd] = callback  # first: an event without a callback would end the loop
        self.selector.register(fd, AS_SELECTORS[events])

    def change(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Wait for something else."""
        self.selector.modify(fd, AS_SELECTORS[events])
        self.callbacks[fd] = callback

    def forget(self, fd: int) -> None:
        """Wait no more."""
        self.callbacks[fd] = ignore
        self.selector.unregister(fd)

    def closing(self, fd: int) -> None:
        """Forget a descriptor that is closed next."""
        self.forget(fd)

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        """Wait so many seconds at most; what is ready, and READ, WRITE or both for each (from epoll also ERR, HUP)."""
        return [(key.fd, AS_EPOLL[mask]) for key, mask in self.selector.select(timeout)]

    def close(self) -> None:
        """Close the selector; the descriptors stay open."""
        self.selector.close()


AS_SELECTORS = {READ: selectors.EVENT_READ, WRITE: selectors.EVENT_WRITE,
                READ | WRITE: selectors.EVENT_READ | selectors.EVENT_WRITE}
AS_EPOLL = {mask: events for events, mask in AS_SELECTORS.items()}


class EpollPoller(Poller):
    """The same straight on epoll(7).

    `selectors` makes an object for each descriptor and looks it up for each event, and asks the kernel
    for as many events as there are descriptors: a turn has to end even where 10,000 are ready.
    """

    def __init__(self) -> None:
        self.callbacks = {}
        self.epoll = select.epoll()

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        self.callbacks[fd] = callback
        self.epoll.register(fd, events)

    def change(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        self.epoll.modify(fd, events)
        self.callbacks[fd] = callback

    def forget(self, fd: int) -> None:
        self.callbacks[fd] = ignore
        self.epoll.unregister(fd)

    def closing(self, fd: int) -> None:
        """close(2) makes epoll forget the descriptor: a system call less than `forget`.

        While a child process is between fork and exec it holds the socket too, and epoll goes on naming the
        number, which may be another socket's by then: so a callback may be called for nothing.
        """
        self.callbacks[fd] = ignore

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        return self.epoll.poll(timeout, EVENTS)

    def close(self) -> None:
        self.epoll.close()


class Watch:
    """What one descriptor waits for, with a memory: the kernel is asked only for what changes."""

    __slots__ = ("poller", "fd", "events")

    def __init__(self, poller: Poller, fd: int):
        self.poller = poller
        self.fd = fd
        self.events = 0  # READ, WRITE, both, or 0 for nothing

    def wait_for(self, events: int, callback: Callable[[int], None] = ignore) -> None:
        """Wait for READ, WRITE or both, and call back then; or, with 0, for nothing."""
        before, self.events = self.events, events
        if not events:
            if before:
                self.poller.forget(self.fd)
        elif events == before:
            self.poller.callbacks[self.fd] = callback
        elif before:
            self.poller.change(self.fd, events, callback)
        else:
            self.poller.watch(self.fd, events, callback)

    def closing(self) -> None:
        """The descriptor is closed next."""
        if self.events:
            self.events = 0
            self.poller.closing(self.fd)


class Timer:
    """One thing that the loop does at a time, `when` (clock seconds; NEVER: not now)."""

    __slots__ = ("loop", "act", "when")

    def __init__(self, loop: Loop, act: Callable[[], Any]):
        self.loop = loop
        self.act = act
        self.when = NEVER

    def set(self, when: float) -> None:
        """Do it then, instead of when it was due before."""
        self.when = when
        if when < self.loop.next_check:
            self.loop.next_check = when


class Queue:
    """Items that wait equally long (`seconds`) for the same `act`: the first in is the first due.

    An OrderedDict instead of a dict, because the first key of a dict that loses keys at its front
    takes longer and longer to find.
    """

    __slots__ = ("loop", "seconds", "act", "due")

    def __init__(self, loop: Loop, seconds: float, act: Callable[[Any], Any]):
        self.loop = loop
        self.seconds = seconds  # may change: items already here keep their time, so they may be called late
        self.act = act
        self.due: collections.OrderedDict[Any, float] = collections.OrderedDict()

    def put(self, item: Any) -> None:
        """Begin to wait, or begin anew."""
        self.due.pop(item, None)
        when = self.due[item] = monotonic() + self.seconds
        if when < self.loop.next_check:
            self.loop.next_check = when

    def drop(self, item: Any) -> None:
        """Wait no more; nothing where the item does not wait."""
        self.due.pop(item, None)


class Alarm:
    """Something to be done at a time, by Alarms."""

    __slots__ = ("act",)

    def __init__(self, act: Callable[[], None]):
        self.act: Callable[[], None] | None = act

    def cancel(self) -> None:
        """Do not do it."""
        self.act = None


class Alarms:
    """Many things to be done, each at a time of its own, where no Queue fits: as requests with their owners' deadlines.

    What is cancelled stays in the heap until its time, so these times should be near.
    """

    def __init__(self, loop: Loop, clock: Callable[[], float] = monotonic):
        self.clock = clock
        self.timer = loop.timer(self._ring)
        self.heap: list[tuple[float, int, Alarm]] = []
        self.numbers = itertools.count()  # alarms cannot be compared

    def at(self, when: float, act: Callable[[], None]) -> Alarm:
        """Do it at this clock time, in a turn of the loop."""
        alarm = Alarm(act)
        heapq.heappush(self.heap, (when, next(self.numbers), alarm))
        self._set()
        return alarm

    def _set(self) -> None:
        while self.heap and self.heap[0][2].act is None:
            heapq.heappop(self.heap)
        if self.heap:
            self.timer.set(self.heap[0][0])

    def _ring(self) -> None:
        try:
            while self.heap and (self.heap[0][2].act is None or self.heap[0][0] <= self.clock()):
                alarm = heapq.heappop(self.heap)[2]
                act, alarm.act = alarm.act, None
                if act is not None:
                    act()
        finally:
            self._set()


class Loop:
    """The loop.  `fault(owner)` is called inside `except` with the object that met an exception, or None."""

    def __init__(self, fault: Callable[[Any], None]):
        self.fault = fault
        self.poller: Poller = EpollPoller() if hasattr(select, "epoll") else Poller()
        self.calls: collections.deque[Callable[[], None]] = collections.deque()
        self.timers: list[Timer] = []
        self.queues: list[Queue] = []
        self.batches: list[tuple[list[Any], Callable[[Any], Any]]] = []
        self.next_check = 0.0  # no timer and no queue is due before this clock time
        self.awake = -WAKING_AGAIN  # clock time before which nothing is due, since the process stood still
        self.woken: list[Callable[[], None]] = []  # what is done then, at once
        self.stopping = False
        self.rests = False  # something that failed is still ready: `_check` pauses first
        self.stayed: tuple[Any, float] = None, 0.0  # the callback that stayed ready behind a fault of ours, and when
        self.reserve = Reserve()
        self.pipe = WakePipe()
        self.poller.watch(self.pipe.reader, READ, self._woken)

    # -- any thread ----------------------------------------------------------------------------

    def call(self, act: Callable[[], None]) -> None:
        """Have the loop run `act` in its next turn; returns at once."""
        self.calls.append(act)
        self.pipe.wake()

    # -- the thread of the loop ----------------------------------------------------------------

    def timer(self, act: Callable[[], Any]) -> Timer:
        """A new Timer, which is not set yet."""
        self.timers.append(Timer(self, act))
        return self.timers[-1]

    def queue(self, seconds: float, act: Callable[[Any], Any]) -> Queue:
        """A new Queue."""
        self.queues.append(Queue(self, seconds, act))
        return self.queues[-1]

    def retire(self, *waits: Timer | Queue) -> None:
        """Take timers and queues from the loop: what they belong to is over.  Done while it goes through neither."""
        for wait in waits:
            if isinstance(wait, Timer):
                wait.when = NEVER
                self.call(functools.partial(self.timers.remove, wait))
            else:
                wait.due.clear()
                self.call(functools.partial(self.queues.remove, wait))

    def batch(self, step: Callable[[Any], Any]) -> list[Any]:
        """A new batch: `step` is called for what has been appended to it, once a turn, after the batches before it."""
        self.batches.append(([], step))
        return self.batches[-1][0]

    def run(self, turns: Iterable[Any] = itertools.repeat(None)) -> None:
        """Turn until `stop` is called: wait for something to do, and do it; one turn for each item of `turns`."""
        outlast(functools.partial(self._turn, iter(turns)), self._outlasts, CAPACITY_PAUSE)

    def _turn(self, turns: Iterable[Any]) -> None:
        """One turn for each item of `turns`, until `stop`.  Raises MemoryError, and may be called again then."""
        poll, callbacks, batches, met = self.poller.poll, self.poller.callbacks, self.batches, self.met
        now = monotonic()
        for _ in turns:
            if self.stopping:
                return
            before, timeout = now, self.next_check - now  # read in the last turn: a deadline may be late by what it took
            for fd, mask in poll(timeout if timeout > 0.0 else 0.0):
                # A descriptor closed earlier in this turn maps to `ignore`; its number is not watched again
                # before the batches below.
                callback = callbacks[fd]
                try:
                    callback(mask)
                except Exception:
                    met(owner_of, callback, fd)
            now = monotonic()
            if now >= self.next_check:
                self._check(now, now - before - max(0.0, timeout))
            for batch, step in batches:
                if not batch:
                    continue
                for item in batch:  # may grow meanwhile
                    try:
                        step(item)
                    except Exception:
                        met(itself, item)
                batch.clear()

    def met(self, find: Callable[[Any], Any], by: Any, fd: int = -1) -> None:
        """Inside `except`: something has failed, for the object `find(by)`.

        Where an event of `fd` was the cause, `by` is its callback.
        """
        try:
            is_short = ran_out(sys.exc_info()[1])
            if is_short:
                self._spend()
            self.fault(find(by))
            # If its callback is still there, its owner has not ended, and the event comes again in the next turn.
            if self.poller.callbacks.get(fd) == by and (is_short or self._spins(by)):
                self._rest()
        except Exception as error:
            self._outlasts(error)
            self._rest()

    def failed(self, error: Exception, owner: Any = None) -> None:
        """Something has failed in another thread, for this object: tell it as a fault of our own."""
        try:
            raise error
        except Exception:
            self.met(itself, owner)

    def _spins(self, by: Any) -> bool:
        """Whether this callback, which stays ready behind a fault of ours, has just been there: each rest is all's."""
        now = monotonic()
        before, self.stayed = self.stayed, (by, now)
        return before[0] == by and now - before[1] < SPINS

    def _outlasts(self, error: Exception) -> None:
        """Inside `except`: raise it again, unless memory is short; then spend the reserve."""
        if not ran_out(error):
            raise
        self._spend()

    def _spend(self) -> None:
        self.reserve.spend()
        self.next_check = 0.0  # soon it is taken back

    def _rest(self) -> None:
        self.rests = True
        self.next_check = 0.0

    def hurry(self) -> None:
        """Do not wait before the next turn: a later batch may have put something into one that was done before it."""
        self.next_check = 0.0

    def turn(self) -> None:
        """Turn once."""
        self.run((None,))

    def stop(self) -> None:
        """Let `run` return after this turn."""
        self.stopping = True

    def _check(self, now: float, late: float) -> None:
        """Do what is due, and find out when to look again.  The turn is late by so many seconds."""
        if self.rests:
            self.rests = False
            time.sleep(CAPACITY_PAUSE)
        if late > STOOD_STILL and now >= self.awake + WAKING_AGAIN:
            self.awake = now + WAKING
            for act in self.woken:
                self.call(act)
        if now < self.awake:
            self.next_check = self.awake
            return
        self.next_check = now + WAIT_LAST  # what is set or put from here on lowers it
        if not self.reserve.restore():
            self.next_check = now + CAPACITY_PAUSE
        for timer in self.timers:
            if now >= timer.when:
                due, timer.when = timer.when, NEVER
                try:
                    timer.act()
                except Exception as error:
                    if timer.when == NEVER and ran_out(error):
                        timer.when = due  # it is tried again, behind a rest: nobody else would set it
                        self._rest()
                    self.met(owner_of, timer.act)
        for queue in self.queues:
            due = queue.due
            while due:
                item, when = next(iter(due.items()))
                if when > now:
                    self.next_check = min(self.next_check, when)
                    break
                del due[item]
                try:
                    queue.act(item)
                except Exception:
                    self.met(itself, item)
        # The timers come last: the steps above may have changed them.
        self.next_check = min(self.next_check, *(timer.when for timer in self.timers), NEVER)

    def _woken(self, mask: int) -> None:
        """Run what other threads asked for."""
        self.pipe.clear()
        try:
            for _ in range(len(self.calls)):  # calls that these add wait for the next turn
                act = self.calls.popleft()
                try:
                    act()
                except Exception:
                    self.met(owner_of, act)
        except Exception:
            self.pipe.wake()  # for those that are left
            raise

    def close(self) -> None:
        """Close the selector and the pipe.  After `run` has returned, or instead of it."""
        self.poller.close()
        self.pipe.close()


def jittered(seconds: float, share: float, step: int) -> float:
    """A time up to a `share` longer or shorter: what began together does not end together.

    `step`, from 0 to JITTERS - 1, says which of JITTERS times it is, the shortest first.
    """
    return seconds * (1 + share * (2 * step / (JITTERS - 1) - 1))


def unsent(sock: Any) -> int | None:
    """Bytes that the peer has not acknowledged yet; None where the kernel does not tell.  Source: tcp(7), SIOCOUTQ."""
    try:
        return struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]
    except OSError:
        return None


def itself(item: Any) -> Any:
    """The item."""
    return item


def owner_of(callback: Any) -> Any:
    """The object whose method this is, also as the `func` of another; else what a functools.partial gives first; else None."""
    first = None
    while hasattr(callback, "func"):
        first = next(iter(getattr(callback, "args", ())), None) if first is None else first
        callback = callback.func
    owner = getattr(callback, "__self__", None)
    return first if owner is None else owner
