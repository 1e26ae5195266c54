"""sniroute_flow: bytes one way, from a socket to its twin's, with backpressure and half-close.

       client socket                                     backend socket
          source  ---- Flow `up`:   read, write ----->      sink
          sink   <---- Flow `down`: write, read ------     source

    small reads --> copied through a bytes object (`pump`)
    full reads  --> moved inside the kernel through one pipe that all flows share (splice(2))

A Flow tells its connection what it meets: `ended` (the source has ended), `failed` (the source is gone),
`broken` (the sink takes no more), and the first byte of each side.

Threads: the loop only.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Callable, TYPE_CHECKING

from sniroute_loop import READ, WRITE

if TYPE_CHECKING:
    from sniroute_connection import Connection

BULK = 1 << 20  # bytes moved in one go: a fifth to a third less CPU for a gigabyte than with 256 KiB
FEW = 512 - sys.getsizeof(b"")  # bytes read in one go while messages are small: more is malloc's, 5 % of a message
FEW_AFTER = 32  # so many small ones in a row: a larger one then takes two reads, which cost what 16 save
MESSAGE = 1 << 12  # bytes read in one go; what is more is spliced, where that can be done ...
READ_MAX = 1 << 16  # ... and read in larger pieces where not
SMALL = 1 << 14  # in the place of both while many clients do not read: what they leave has to be kept
PENDING_MAX = 1 << 22  # bytes copied out for full sinks (not those in lent pipes), before SMALL applies
PIPES_MAX = 32  # pipes lent to flows whose sink would block: 1 MiB and two descriptors each
OPEN, CHATTY, BULKY, BLOCKED, DONE = "open", "chatty", "bulky", "blocked", "done"  # states of a Flow


class Flow:
    """One direction of a connection, from `source` to its twin's.  Loop only.

    States: OPEN; CHATTY after FEW_AFTER reads in a row of less than FEW bytes, until there is more to read; BULKY
    after a read that was full, until there is less to read; each of these has its own way of moving bytes (`mover`).
    BLOCKED: the sink takes no more, so what is left waits in `pending` and the source is not read (backpressure);
    then OPEN (BULKY, if that was in a pipe).  DONE: the source has ended, which the sink is told behind the last
    byte, or the sink is gone.
    """

    __slots__ = ("connection", "twin", "source", "fd", "total", "few", "state", "pending", "pipe", "watched")

    def __init__(self, connection: Connection):
        self.connection: Connection | None = connection
        self.twin: Flow = NO_FLOW
        self.source: socket.SocketType | None = None
        self.fd = -1
        self.total = 0  # bytes read from the source
        self.few = 0  # reads of less than FEW bytes in a row
        self.state = DONE
        self.pending: memoryview | int | None = None  # what the sink did not take; in a pipe: how much
        self.pipe: tuple[int, int] | None = None  # see SpliceFlow
        self.watched = 0  # what the poller waits for on the source

    def watch(self, events: int, callback: Callable[[int], None] | None = None) -> None:
        """Wait for these events on the source; for none, forget it (a hang-up would spin)."""
        poller = self.connection.router.poller
        if not events:
            if self.watched:
                poller.forget(self.fd)
        elif self.watched:
            poller.change(self.fd, events, callback)
        else:
            poller.watch(self.fd, events, callback)
        self.watched = events

    def rewatch(self) -> None:
        """Wait for what is wanted of the source: each socket is one flow's source and its twin's sink."""
        events = (READ if self.state in READING else 0) | (WRITE if self.twin.state is BLOCKED else 0)
        if events != self.watched:
            self.watch(events, self.mover() if events == READ else self.ready)

    def mover(self) -> Callable[[int], None]:
        """What moves bytes in this state.  In BLOCKED and DONE that is `pump`, which does nothing then."""
        return self.chat if self.state is CHATTY else self.move_bulk if self.state is BULKY else self.pump

    def become(self, state: str) -> None:
        """Move bytes otherwise from here on."""
        self.state = state
        self.few = 0
        if self.watched == READ:
            self.connection.router.poller.callbacks[self.fd] = self.mover()

    def ready(self, mask: int) -> None:
        """Called by the loop when the source can be written by the other direction, or read too."""
        if mask != READ and self.twin.state is BLOCKED:
            self.twin.flush()
        if mask != WRITE:
            self.mover()(mask)

    def pump(self, mask: int, size: int = MESSAGE) -> None:
        """Move what the source has to the sink.  Called by the loop when there is something to read.

        os.read and os.write, not the sockets' methods: fewer instructions.  Safe only because both descriptors are
        open, and nobody else's, while the flow is not DONE.
        """
        if self.state is not OPEN:
            return  # an event of the same turn changed that
        connection = self.connection
        try:
            data = os.read(self.fd, size)
        except BlockingIOError:
            return
        except OSError as error:
            connection.failed(self, error)
            return
        if not data:
            connection.ended(self)
            return
        count = len(data)
        self.total += count
        if connection.hello is not None:
            connection.spoke(self)
        try:
            sent = os.write(self.twin.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            connection.broken(self)
            return
        if sent != count:
            self.hold(memoryview(data[sent:]))
        elif count < FEW:
            self.few += 1
            if self.few == FEW_AFTER:
                self.become(CHATTY)
        else:
            self.few = 0
            if count == size:
                self.become(BULKY)

    def chat(self, mask: int) -> None:
        """As `pump`, for small messages: 45 operations of the interpreter in the place of 68.

        Written out, since a call for each step would cost more than the step.  Two checks of `pump` are left out:
        of the state, since whoever leaves CHATTY takes this callback away, and of `hello`, which `pump` has seen to
        be None.
        """
        try:
            data = os.read(self.fd, FEW)
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
        elif count == FEW:
            self.become(OPEN)
            self.pump(mask)  # the rest of the message

    def move_bulk(self, mask: int) -> None:
        """There was more than one read takes: read as much as the router allows at this time."""
        if self.state is BULKY:
            self.become(OPEN)  # `pump` makes it BULKY again, if this read is full too
            self.pump(mask, self.connection.router.chunk)

    def hold(self, rest: memoryview) -> None:
        """The sink is full: keep the rest, and do not read before it is gone."""
        self.pending = rest
        self.connection.router.keep(len(rest))
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
        self.connection.router.keep(-sent)
        self.pending = self.pending[sent:]
        if not self.pending:
            self.pending = None
            self.unblock()

    def unblock(self, state: str = OPEN) -> None:
        """All is with the sink: read on."""
        self.state = state
        self.rewatch()
        self.twin.rewatch()

    def discard(self) -> None:
        """Forget what the sink did not take, and read no more."""
        self.state = DONE
        if self.pending is not None:
            self.connection.router.keep(-len(self.pending))
            self.pending = None


class SpliceFlow(Flow):
    """A Flow whose bytes stay in the kernel while it is BULKY (splice(2)).

    That is half the CPU for each gigabyte, and a tenth more for a message of 64 bytes: the two meet
    at 3 KiB.  All flows of the loop share one pipe.  It is empty between two calls, unless a sink is
    full: then the pipe is lent to that flow, with the rest in it, and the loop takes another.  Where
    there is none to spare, the rest is copied out, as in Flow.
    """

    __slots__ = ()

    def move_bulk(self, mask: int) -> None:
        """As `pump`, written out again: a call for each step would cost more than the step."""
        if self.state is not BULKY:
            return
        connection = self.connection
        router = connection.router
        reader, writer = router.pipe
        try:
            count = os.splice(self.fd, writer, router.bulk, flags=SPLICE_FLAGS)
        except BlockingIOError:
            return
        except OSError as error:
            connection.failed(self, error)
            return
        if not count:
            connection.ended(self)
            return
        self.total += count
        if connection.hello is not None:
            connection.spoke(self)
        try:
            sent = os.splice(reader, self.twin.fd, count, flags=SPLICE_FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError:
            router.lose_pipe()
            connection.broken(self)
            return
        if sent != count:
            rest = count - sent
            self.pipe = router.lend_pipe()
            if self.pipe:
                self.pending = rest
                self.block()
            else:
                self.hold(memoryview(read_exactly(reader, rest)))
        elif count < MESSAGE:
            self.become(OPEN)

    def flush(self) -> None:
        """As Flow.flush, out of the pipe that was lent."""
        if self.pipe is None:
            super().flush()
            return
        try:
            self.pending -= os.splice(self.pipe[0], self.twin.fd, self.pending, flags=SPLICE_FLAGS)
        except BlockingIOError:
            return
        except OSError:
            self.connection.broken(self)
            return
        if not self.pending:
            self.connection.router.return_pipe(self.pipe)
            self.pipe = self.pending = None
            self.unblock(BULKY)

    def discard(self) -> None:
        if self.pipe is not None:  # it is not empty: nobody else can use it
            self.connection.router.drop_pipe(self.pipe)
            self.pipe = self.pending = None
        super().discard()


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


READING = (OPEN, CHATTY, BULKY)  # states of a flow whose source is read
SPLICE_FLAGS = getattr(os, "SPLICE_F_NONBLOCK", 0) | getattr(os, "SPLICE_F_MOVE", 0)
NO_FLOW = Flow.__new__(Flow)  # the twin of a flow whose connection is over
NO_FLOW.state = DONE
