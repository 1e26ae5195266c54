"""sniroute_scarcity: what this host does not have while we run: memory, and threads.

    a MemoryError, anywhere ---> ran_out: not a fault of ours ---> the word of it is SHORT_OF_MEMORY, without a traceback
    Loop --- Reserve: some memory that is given back then, so that what met it can be ended, told and logged
    begin_thread(act, name) ---> a thread that does `act`; or RuntimeError, soon, where there is none

What is too little at the start is sniroute_host's.  Descriptors are not here: what opens one gets an OSError with one of
the loop's CAPACITY_ERRNOS, and tries again later.

Threads: a Reserve is its loop's; all else is for any thread (of a Paced, a line comes twice at worst).

Seams: I want to ...
    start a thread while we serve    `begin_thread`, instead of threading.Thread.start
    tell scarcity from a fault       `ran_out`, in an `except Exception`

This room imports the standard library only.
"""

from __future__ import annotations

import functools
import mmap
import time
from typing import TYPE_CHECKING, Callable

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


def ran_out(error: BaseException | None) -> bool:
    """Whether this has come of a MemoryError: it is one, or came while one was handled."""
    for _ in range(CAUSES_MAX):
        if error is None or isinstance(error, MemoryError):
            break
        error = error.__context__
    return isinstance(error, MemoryError)


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
    try:
        import threading  # late: 0.2 MB, which the carrier does without

        left = [act]  # whoever takes it out, the thread or the one who gives it up

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
    except (OSError, MemoryError):
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
