"""sniroute_scarcity: what this host does not have while we run: memory, and threads.

    a MemoryError, anywhere ---> ran_out: not a fault of ours ---> the word of it is SHORT_OF_MEMORY, without a traceback
    Loop --- Reserve: some memory that is given back then, so that what met it can be ended, told and logged
    begin_thread(act, name) ---> a thread that does `act`; or RuntimeError, soon, where there is none
    begin_errand(work, done, call, name) ---> the same, and the loop is told what came of it, whatever that is
    outlast(act, tell) ---> what goes on for as long as we do, or has to be done: tried again until it returns

What is too little at the start is sniroute_host's.  Descriptors are not here: what opens one gets an OSError with one of
the loop's CAPACITY_ERRNOS, and tries again later.

Threads: a Reserve is its loop's; all else is for any thread (of a Paced, a line comes twice at worst).

Seams: I want to ...
    start a thread while we serve    `begin_errand`, or `begin_thread`, instead of threading.Thread.start
    go on for ever, in a thread      `outlast`, instead of `while True` around a `try`
    tell scarcity from a fault       `ran_out`, in an `except Exception`

This room imports the standard library only.
"""

from __future__ import annotations

import functools
import mmap
import time
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    import threading

__version__ = "0.1.0"

SHORT_OF_MEMORY = "memory is short"
RESERVE = 256 << 10  # bytes: what it takes to end some connections, and to log them
THREAD_ROOM = 1 << 20  # bytes that have to be free for a thread: it is to do something, too
BEGINS = 2.0  # seconds in which a thread begins, or is given up: the loop waits meanwhile.  0.5 is too little: with 20
# processes for each core one took longer, in an hour of them
RESTS = 1.0  # seconds behind one that did not begin in which none is tried: each try holds the loop up
SAID_AGAIN = 10.0  # seconds between two log lines that say the same
SAID_MAX = 16  # things that are remembered: what a host may be short of are a handful
CAUSES_MAX = 10  # exceptions that led to one another, and are looked at
PAUSE = 0.1  # seconds until what failed is tried again: other threads may give some memory back meanwhile


def ran_out(error: BaseException | None) -> bool:
    """Whether this has come of a MemoryError: it is one, or came while one was handled."""
    for _ in range(CAUSES_MAX):
        if error is None or isinstance(error, MemoryError):
            break
        error = error.__context__
    return isinstance(error, MemoryError)


def only_shortage(error: BaseException) -> None:
    """Inside `except`: raise what is being handled, unless it has come of a lack of memory."""
    if not ran_out(error):
        raise


def outlast(act: Callable[[], Any], tell: Callable[[Exception], object] = only_shortage, pause: float = PAUSE) -> Any:
    """Call `act` again and again until it returns; then return what it has returned.

    Args:
        act: where it raises an exception it is called again, a `pause` (seconds) later.
        tell: gets each exception, inside `except`.  What it raises ends this, except a MemoryError: there may be no
            memory even to tell.

    Each step here stands inside a `try`: even to call a function may take memory (CPython has the frames of a thread's
    functions in pieces), and time.sleep runs the handlers of signals.
    """
    again = False
    while True:
        try:
            if again:
                time.sleep(pause)
            again = True
            return act()
        except Exception as error:
            try:
                tell(error)
            except MemoryError:
                pass


class Reserve:
    """Memory that is kept for when there is none.  It is never written to, so the host gives it no page."""

    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept: bytes | None = None  # not a bytearray: CPython writes its zeros
        self.restore()

    def spend(self) -> None:
        """Memory is short: have some."""
        self.kept = None

    def restore(self) -> bool:
        """Take it back; whether it is there: then memory is short no more."""
        if self.kept is None:
            try:
                self.kept = bytes(RESERVE)
            except MemoryError:
                return False
        return True


class Paced:
    """When something is to be said that goes on: each thing once in SAID_AGAIN seconds."""

    __slots__ = ("said",)

    def __init__(self) -> None:
        self.said: dict[str, float] = {}  # clock times

    def is_due(self, what: str) -> bool:
        """Whether to say this now."""
        now = time.monotonic()
        if now - self.said.get(what, -SAID_AGAIN) < SAID_AGAIN:
            return False
        if len(self.said) >= SAID_MAX:
            self.said.clear()
        self.said[what] = now
        return True


rests_until = 0.0  # clock time; see RESTS.  Any thread: one that reads an old one tries once more


def begin_thread(act: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread that does `act`.  Raises RuntimeError where this host has none: then `act` is never done.

    Use this instead of threading.Thread.start, which waits until the thread has begun: where memory is short, the
    thread may end before its first step, and the one that waits, the loop, waits for ever.  Seen with CPython 3.11
    (the stack of a new thread's frames is a mapping of its own) as "Exception ignored in thread started by".
    """
    global rests_until
    if time.monotonic() < rests_until:
        raise RuntimeError(f"can't start new thread: {SHORT_OF_MEMORY}")
    left = [act]  # whoever takes it out, the thread or the one who gives it up
    try:
        import threading  # late: 0.2 MB, which the carrier does without

        def run() -> None:
            try:
                wanted = left.pop()
            except IndexError:  # it has begun too late
                return
            wanted()

        with mmap.mmap(-1, THREAD_ROOM, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
            pass
        thread = threading.Thread(target=run, name=name, daemon=True)
        began = thread._started  # the event that `start` waits for
        began.wait = functools.partial(began.wait, BEGINS)
        thread.start()
    except (OSError, MemoryError, RuntimeError) as error:
        try:
            left.pop()
        except IndexError:  # it has begun, and only the wait for that has failed
            return thread
        if isinstance(error, RuntimeError):
            raise
        raise RuntimeError(f"can't start new thread: {SHORT_OF_MEMORY}") from None
    if not began.is_set():
        try:
            left.pop()
        except IndexError:  # just now
            return thread
        # `threading` remembers it until its first step, which may come yet: a kilobyte, for each RESTS seconds at most.
        rests_until = time.monotonic() + RESTS
        raise RuntimeError(f"can't start new thread: it did not begin within {BEGINS:g} s")
    return thread


class Report:
    """What a thread does for a loop, and what came of it: to call it, in the loop, tells."""

    __slots__ = ("work", "func", "result")

    def __init__(self, work: Callable[[], Any], done: Callable[[Any], object]):
        self.work = work
        self.func = done  # by this name, as a functools.partial has it: owner_of finds whose errand it is
        self.result: Any = None

    def __call__(self) -> None:
        result, self.result = self.result, None  # an exception has this in its frames: no cycle stays
        self.func(result)

    def run(self, tell: Callable[[], object]) -> None:
        """The thread."""
        try:
            self.result = self.work()
        except Exception as error:
            self.result = error
        outlast(tell)


def begin_errand(work: Callable[[], Any], done: Callable[[Any], object],
                 call: Callable[[Callable[[], None]], object], name: str) -> threading.Thread:
    """Start a daemon thread that does `work`, and have the loop call `done` with what came of it.

    `done` gets what `work` has returned, or the exception that it raised.  `call` is the Loop.call of that loop.  The
    report is made before the thread starts, so telling needs next to no memory.  Where memory is short in the loop,
    too, `done` may fail: it has to set right first what must not stay as it was, and to tell then.
    Raises RuntimeError and MemoryError where there is no thread: then neither `work` nor `done` is called.
    """
    report = Report(work, done)
    return begin_thread(functools.partial(report.run, functools.partial(call, report)), name)
