"""sniroute_flow: bytes one way, from a socket to its twin's, with backpressure and half-close.

       client socket                                      backend socket
          source  -----> Flow `up`   : read, write ----->     sink
          sink    <----- Flow `down` : write, read <-----     source

    small reads --> copied through a bytes object (Flow.pump); the size of a read follows the traffic
    full reads  --> moved inside the kernel (splice(2)) through one pipe that all flows share: Pipes

A connection has two flows, each other's twin: one's source is the other's sink.  A flow tells its connection
what it meets: `answered` (the first byte of a backend that has proven nothing yet), `ended` (the source has
ended), `failed` (the source has broken off), `broken` (the sink has: it takes no more).

The state of a flow, and what is called when its source can be read (`mover`):

    OPEN      pump       reads at most `size` bytes: SMALL_READ after many small ones, else MESSAGE
    BULKY     move_bulk  the last read was full: as much as Pipes allows at this time
    BLOCKED   -          the sink is full: the rest waits in `pending`, and the source is not read (backpressure)
    DONE      -          the source has ended, which the sink is told behind the last byte
    ENDING    -          the source, a program's stream, has ended, and whether the program died is known in a moment
    BROKEN    -          the sink has broken off.  It is the twin's source: the twin reads what that said before, and
                         takes its end for a reset.  The kernel tells of a reset once; who reads later is told of an end

While its connection is UNANSWERED, `first` is called instead of `pump`; while it is EARLY, of the flow `down` only.

A change of state replaces the callback in the poller, so no mover asks which state it is in.

Threads: the loop only.

Seams: I want to ...
    read or keep more at a time   a constant below
    move bytes by another call    a subclass of Flow, as SpliceFlow, chosen in Pipes
    know where a message ends     a subclass, as MessageFlow of sniroute_bodies

It imports the loop.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from typing import TYPE_CHECKING, Any, Callable

from sniroute_loop import READ, WRITE, Poller, Watch, unsent

if TYPE_CHECKING:
    from sniroute_connection import Connection

__version__ = "0.1.0"

# Limits, each with its reason.  Sizes in bytes.
MESSAGE = 1 << 12  # bytes read in one go; larger reads are spliced, where that works
SMALL_READ = 479  # the same while messages are small: CPython's fast allocator takes 512, of which 33 are its head
SMALL_AFTER = 32  # so many small messages before reads are small: a larger one then takes two reads, the gain of 16
BULK = 1 << 20  # bytes of one splice: a fifth to a third less CPU for a gigabyte than with 256 KiB
READ_MAX = 1 << 16  # bytes of one read of a BULKY flow that cannot splice
CAREFUL = 1 << 14  # instead of BULK and READ_MAX while many sinks are full: their bytes have to be kept
PENDING_MAX = 1 << 22  # bytes kept for full sinks (those in lent pipes not counted) before CAREFUL applies
PIPES_MAX = 32  # pipes lent to flows whose sink is full: 1 MiB and two descriptors each

OPEN, BULKY, BLOCKED = "open", "bulky", "blocked"  # states of a flow
DONE, ENDING, BROKEN = "done", "ending", "broken"  # further ones, in which its source is not read any more
UNANSWERED, EARLY = "unanswered", "early"  # a connection's states: its backend has not said a byte yet
GREETING = "greeting"  # likewise: its backend took the connect, and was asked for TLS
READING = (OPEN, BULKY)  # states of a flow whose source is read

SPLICE_FLAGS = getattr(os, "SPLICE_F_NONBLOCK", 0) | getattr(os, "SPLICE_F_MOVE", 0)


class Flow(Watch):
    """One direction of a connection, from `source` to its twin's source.  What it waits for is the source's events."""

    __slots__ = ("connection", "twin", "source", "total", "size", "small", "state", "pending", "lent")

    def __init__(self, connection: Connection, poller: Poller):
        self.poller = poller
        self.fd = -1
        self.events = 0
        self.connection: Connection | None = connection
        self.twin: Flow = NO_FLOW
        self.source: Any = None  # a socket; its owner is the connection
        self.total = 0  # bytes read from the source
        self.size = MESSAGE  # of the next read
        self.small = 0  # small messages in a row
        self.state = DONE
        self.pending: memoryview | int | None = None  # the bytes that the sink did not take; in a pipe: how many
        self.lent: tuple[int, int] | None = None  # the pipe they are in

    @property
    def pipes(self) -> Pipes:
        """What all flows share.  No slot of its own: 10,000 idle connections have two flows each."""
        return self.connection.router.pipes

    # -- the poller

    def rewatch(self) -> None:
        """Wait for what is wanted of the source, which is also the twin's sink."""
        events = (READ if self.state in READING else 0) | (WRITE if self.twin.state is BLOCKED else 0)
        if events != self.events:
            self.wait_for(events, self.mover() if events == READ else self.on_writable)

    def mover(self) -> Callable[[int], None]:
        """What moves bytes in this state."""
        connection = self.connection
        if connection.state is UNANSWERED or connection.state is EARLY and self is connection.down:
            return self.first
        return self.move_bulk if self.state is BULKY else self.pump

    def become(self, state: str) -> None:
        """Enter a state in which the source is read; its mover is called from the next event on."""
        self.state = state
        self.size, self.small = MESSAGE, 0
        self.install()

    def install(self) -> None:
        """Have the poller call the mover of this state."""
        if self.events == READ:
            self.poller.callbacks[self.fd] = self.mover()

    def on_writable(self, mask: int) -> None:
        """The source can be written for the twin, and perhaps read too."""
        if mask != READ and self.twin.state is BLOCKED:
            self.twin.flush()
        if mask != WRITE and self.state in READING:
            self.mover()(mask)

    # -- moving bytes

    def first(self, mask: int) -> None:
        """As `pump`, for the first bytes behind the hello, whichever side they come from."""
        try:
            data = os.read(self.fd, MESSAGE)
        except BlockingIOError:
            return
        except OSError as error:
            self.connection.failed(self, error)
            return
        if not data:
            self.connection.ended(self)
            return
        self.connection.answered(self)  # before a byte is passed on: the hello cannot be sent again then
        self.pass_on(data)

    def pass_on(self, data: bytes) -> None:
        """Move to the sink what was read from the source."""
        self.total += len(data)
        try:
            sent = os.write(self.twin.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.connection.broken(self)
            return
        if sent != len(data):
            self.hold(memoryview(data[sent:]))

    def pump(self, mask: int) -> None:
        """Move what the source has to the sink, and choose the size of the next read.

        os.read and os.write, not the sockets' methods: fewer instructions.  Safe only because both descriptors are
        open, and nobody else's, while the flow is not DONE.
        """
        size = self.size
        try:
            data = os.read(self.fd, size)
        except BlockingIOError:
            return
        except OSError as error:
            self.connection.failed(self, error)
            return
        if not data:
            self.connection.ended(self)
            return
        count = len(data)
        self.total += count
        try:
            sent = os.write(self.twin.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.connection.broken(self)
            return
        if sent != count:
            self.hold(memoryview(data[sent:]))
        elif count == size:
            self._read_more(size)
        elif size != SMALL_READ:
            self._read_less(count)

    def _read_more(self, size: int) -> None:
        """The read was full."""
        if size == SMALL_READ:
            self.size, self.small = MESSAGE, 0
            self.pump(READ)  # the rest of the message
        elif self.state is OPEN:
            self.become(BULKY)

    def _read_less(self, count: int) -> None:
        """The read was not full."""
        if self.state is BULKY:
            self.become(OPEN)
        if count >= SMALL_READ:
            self.small = 0
            return
        self.small += 1
        if self.small == SMALL_AFTER:
            self.size = SMALL_READ

    def move_bulk(self, mask: int) -> None:
        """As `pump`, with as large a read as is allowed at this time."""
        self.size = self.pipes.chunk
        self.pump(mask)

    # -- a full sink

    def hold(self, rest: memoryview) -> None:
        """Keep what the sink did not take, and do not read before it is gone."""
        self.pending = rest
        self.pipes.keep(len(rest))
        self.block()

    def block(self) -> None:
        """Wait for the sink instead of the source."""
        self.state = BLOCKED
        self.rewatch()
        self.twin.rewatch()

    def flush(self) -> None:
        """The sink takes bytes again."""
        try:
            sent = self.twin.source.send(self.pending)
        except BlockingIOError:
            return
        except OSError:
            self.connection.broken(self)
            return
        self.pipes.keep(-sent)
        self.pending = self.pending[sent:]
        if not self.pending:
            self.pending = None
            self.unblock()

    def unblock(self, state: str = OPEN) -> None:
        """The sink has everything: read on."""
        self.state = state
        self.size, self.small = MESSAGE, 0
        self.rewatch()
        self.twin.rewatch()

    def discard(self, state: str = DONE) -> None:
        """Forget what the sink did not take, and read no more."""
        self.state = state
        if self.pending is not None:
            self._forget_pending()

    def arrived(self) -> int:
        """Bytes that the sink's peer has acknowledged; where the kernel does not tell, those that the sink took."""
        kept = 0 if self.pending is None else self.pending if self.lent else len(self.pending)
        return self.total - kept - (unsent(self.twin.source) or 0)

    def _forget_pending(self) -> None:
        self.pipes.keep(-len(self.pending))
        self.pending = None


class SpliceFlow(Flow):
    """A Flow whose bytes stay in the kernel while it is BULKY (splice(2)).

    That is half the CPU for each gigabyte, and a tenth more for a message of 64 bytes: the two meet
    at 3 KiB.  The shared pipe is empty between two calls, unless a sink is full: then the pipe is lent
    to that flow, with the rest in it.  Where there is no other pipe, the rest is copied out, as in Flow.
    """

    __slots__ = ()

    def move_bulk(self, mask: int) -> None:
        """Move what the source has to the sink, in the kernel."""
        count = self.splice(self.pipes.bulk)
        if 0 < count < MESSAGE and self.state is BULKY:
            self.become(OPEN)

    def splice(self, most: int) -> int:
        """Move up to so many bytes from the source into the shared pipe, and on to the sink.

        Returns how many the source has given; 0 too where the sink has broken off.
        """
        pipes = self.pipes
        reader, writer = pipes.shared
        try:
            count = os.splice(self.fd, writer, most, flags=SPLICE_FLAGS)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.connection.failed(self, error)
            return 0
        if not count:
            self.connection.ended(self)
            return 0
        self.total += count
        try:
            sent = os.splice(reader, self.twin.fd, count, flags=SPLICE_FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError:
            pipes.replace()
            self.connection.broken(self)
            return 0
        if sent != count:
            rest = count - sent
            self.lent = pipes.lend()
            if self.lent:
                self.pending = rest
                self.block()
            else:
                self.hold(memoryview(read_exactly(reader, rest)))
        return count

    def flush(self) -> None:
        """As Flow.flush, out of the pipe that was lent."""
        if self.lent is None:
            super().flush()
            return
        try:
            self.pending -= os.splice(self.lent[0], self.twin.fd, self.pending, flags=SPLICE_FLAGS)
        except BlockingIOError:
            return
        except OSError:
            self.connection.broken(self)
            return
        if not self.pending:
            self.pipes.take_back(self.lent)
            self.lent = self.pending = None
            self.unblock(BULKY)

    def _forget_pending(self) -> None:
        if self.lent is None:
            super()._forget_pending()
            return
        self.pipes.drop(self.lent)  # it is not empty: nobody else can use it
        self.lent = self.pending = None


NO_FLOW = Flow.__new__(Flow)  # the twin of a flow whose connection is over
NO_FLOW.state = DONE


class Pipes:
    """What all flows of a loop share: the pipe that they splice through, and the count of bytes kept for full sinks.

    `shared` is the pipe in use, None where splice(2) does not work; `flow` makes a Flow of the right kind.
    """

    def __init__(self, poller: Poller):
        self.poller = poller
        self.pending = 0  # bytes kept for sinks that are full
        self.bulk = self.chunk = 0  # bytes of one splice; of one read of a BULKY flow that cannot splice
        self.spare: list[tuple[int, int]] = []
        self.made = 0  # pipes that are open
        self.shared = self._make() if can_splice() else None
        self.flow: type[Flow] = SpliceFlow if self.shared else Flow
        self.keep(0)

    def keep(self, count: int) -> None:
        """Count bytes kept for full sinks; the more there are, the less is read at a time."""
        self.pending += count
        self.bulk = BULK if self.pending < PENDING_MAX else CAREFUL
        self.chunk = min(self.bulk, READ_MAX)

    def _make(self) -> tuple[int, int] | None:
        """A pipe of BULK bytes; None where descriptors are short."""
        try:
            pipe = os.pipe()
        except OSError:
            return None
        for end in pipe:
            os.set_blocking(end, False)
        with contextlib.suppress(OSError):  # over the user's share of pipe memory: it holds less at a time
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, BULK)
        self.made += 1
        return pipe

    def lend(self) -> tuple[int, int] | None:
        """Give the shared pipe to a flow, bytes included, if there is another to take its place."""
        spare = self.spare.pop() if self.spare else self._make() if self.made < PIPES_MAX else None
        if spare is None:
            return None
        lent, self.shared = self.shared, spare
        return lent

    def take_back(self, pipe: tuple[int, int]) -> None:
        """A lent pipe is empty again."""
        self.spare.append(pipe)

    def drop(self, pipe: tuple[int, int]) -> None:
        """Close a pipe whose bytes nobody wants."""
        os.close(pipe[0])
        os.close(pipe[1])
        self.made -= 1

    def replace(self) -> None:
        """The sink of the bytes in the shared pipe is gone: share another, or empty this one."""
        spare = self.spare.pop() if self.spare else self._make()
        if spare is None:  # no descriptors
            try:
                while os.read(self.shared[0], BULK):
                    pass
            except BlockingIOError:
                return
        self.drop(self.shared)
        self.shared = spare

    def close(self) -> None:
        """Close what is not lent.  After the last connection."""
        for pipe in [*self.spare, *([self.shared] if self.shared else [])]:
            self.drop(pipe)
        self.spare, self.shared = [], None


def read_exactly(fd: int, count: int) -> bytes:
    """`count` bytes of a pipe that holds them."""
    parts = []
    while count:
        parts.append(os.read(fd, count))
        count -= len(parts[-1])
    return b"".join(parts)


def can_splice() -> bool:
    """Whether splice(2) works here: not everywhere does it, whatever `os` says (gVisor, seccomp)."""
    if not hasattr(os, "splice"):
        return False
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    try:
        theirs.send(b"x")
        return os.splice(ours.fileno(), writer, 1, flags=SPLICE_FLAGS) == 1
    except OSError:
        return False
    finally:
        ours.close()
        theirs.close()
        os.close(reader)
        os.close(writer)
