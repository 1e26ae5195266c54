"""sniroute_reuse: connections to a backend that serve another client after the first has left.

    client ---- up ----> ObservedFlow ----> backend        the bytes pass on unchanged
                              | client_said
                              v
                           a Machine (sniroute_conversations): is it clean?  spoilt?
                              ^
                              | server_said
    client <--- down --- ObservedFlow <---- backend

    the client ends or breaks off --- clean, and the kernel holds no byte ---> give(sock): it may serve the next one
                                  --- else ---> the end is passed on as ever, and the connection is used up
    the machine is spoilt ----------> the flows are ordinary ones from here on

An unknown protocol (`quiet`) has to be silent for QUIET_FOR besides: see Aside.  That is a guess, and no proof.

Who gets the socket is the caller's business: a warm pool, by way of Warmth (sniroute_book).

Threads: the loop only.

Seams: I want to ...
    another protocol               a row in REUSES

It imports conversations, flow, log and the loop.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Callable, NamedTuple

from sniroute_conversations import Http, Machine, Quiet, Redis
from sniroute_flow import DONE, NO_FLOW, OPEN, READING, SMALL_READ, Flow
from sniroute_log import CLIENT_CLOSED, CLIENT_RESET
from sniroute_loop import READ, Poller, Queue, Watch, unsent

if TYPE_CHECKING:
    from sniroute_connection import Connection

__version__ = "0.1.0"

QUIET_FOR = 1.0  # seconds: several round trips around the world.  An answer that is later still reaches a stranger


# -- the ways to reuse -------------------------------------------------------------------------


class Reuse(NamedTuple):
    """A value of the option `reuse`, as a row."""

    machine: Callable[[], Machine]  # a new one for each client
    rest: float  # seconds that a connection is kept aside, silent, before it serves another client: see Aside


REUSES = {
    "redis": Reuse(Redis, 0.0),
    "http": Reuse(Http, 0.0),
    "quiet": Reuse(Quiet, QUIET_FOR),
}


# -- the flows ---------------------------------------------------------------------------------


class ObservedFlow(Flow):
    """A Flow that has a machine hear what passes.  It never splices: the machine needs the bytes."""

    __slots__ = ("machine", "hear", "give")

    def __init__(self, connection: Connection, poller: Poller, machine: Machine, hear: Callable[[bytes], None],
                 give: Callable[[socket.SocketType], object]):
        super().__init__(connection, poller)
        self.machine = machine
        self.hear = hear
        self.give = give

    def pass_on(self, data: bytes) -> None:
        """As Flow.pass_on."""
        self.hear(data)
        super().pass_on(data)
        if self.machine.is_spoilt and self.connection is not None:
            be_ordinary(self.connection)

    def pump(self, mask: int) -> None:
        """As Flow.pump."""
        size = self.size
        try:
            data = os.read(self.fd, size)
        except BlockingIOError:
            return
        except OSError as error:
            self.over(error)
            return
        if not data:
            self.over(None)
            return
        self.pass_on(data)
        if self.connection is None or self.state not in READING:
            return  # it is an ordinary flow's turn; or the sink is full, or gone
        if len(data) == size:
            self._read_more(size)
        elif size != SMALL_READ:
            self._read_less(len(data))

    def over(self, error: OSError | None) -> None:
        """The source has ended, or broken off with an error."""
        connection = self.connection
        is_up = self is connection.up
        if is_up and may_go_on(connection, self.machine):
            hand_over(connection, self.give, CLIENT_CLOSED if error is None else CLIENT_RESET)
            return
        be_ordinary(connection)  # nobody else is served here
        flow = connection.up if is_up else connection.down
        if error is None:
            connection.ended(flow)
        else:
            connection.failed(flow, error)


def observe(connection: Connection, machine: Machine, give: Callable[[socket.SocketType], object]) -> None:
    """Have a machine hear all that a connection and its backend say, from the client's first byte on.

    To be called by `Backend.connected`, once it has found that the connect is over: the client's first bytes are sent
    right behind it.  Each call begins anew, with a machine of its own.

    Where the client leaves and another may go on, `give(sock)` is called: the backend's socket, connected, non-blocking
    and watched by nobody, is the caller's from here on.  The connection still has its Backend then, and is closed next;
    so `Backend.release` comes behind `give`.  Else `give` is never called, and all is as without `observe`.

    Not to be called for a connection whose greeting has been read before: the next client would wait for it.  Does
    nothing where the connection is its client's for good: with TLS, or behind a PROXY header.
    """
    if connection.name is not None or any(connection.preface):
        return
    poller = connection.router.loop.poller
    exchange(connection, ObservedFlow(connection, poller, machine, machine.client_said, give),
             ObservedFlow(connection, poller, machine, machine.server_said, give))
    machine.client_said(connection.hello)


def be_ordinary(connection: Connection) -> None:
    """Nobody else will be served here: pass bytes as all connections do, at their cost."""
    flow, poller = connection.router.pipes.flow, connection.router.loop.poller
    exchange(connection, flow(connection, poller), flow(connection, poller))


def exchange(connection: Connection, up: Flow, down: Flow) -> None:
    """Go on with these two flows in the places of those that the connection has."""
    for old, new in ((connection.up, up), (connection.down, down)):
        new.source, new.fd, new.events = old.source, old.fd, old.events
        new.total, new.size, new.small = old.total, old.size, old.small
        new.state, new.pending, new.lent = old.state, old.pending, old.lent
        callback = new.poller.callbacks.get(old.fd)
        if getattr(callback, "__self__", None) is old:  # else it is the connection's
            new.poller.callbacks[old.fd] = getattr(new, callback.__name__)
        old.connection, old.twin = None, NO_FLOW  # no cycles: nothing is left to the collector
        old.source, old.events, old.pending = None, 0, None
    up.twin, down.twin = down, up
    connection.up, connection.down = up, down


def may_go_on(connection: Connection, machine: Machine) -> bool:
    """Whether another client may go on where this one leaves: nothing of it is left, nor under way.

    Both flows are read, so none has bytes that its sink did not take.
    """
    down = connection.down
    return (machine.clean and connection.state is OPEN and down.state in READING and connection.proxy is None
            and is_silent(down.source))


def is_silent(sock: socket.SocketType) -> bool:
    """Whether the kernel holds no byte of a connection, in either direction, nor its end."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return unsent(sock) == 0  # where the kernel does not tell, nobody knows
    except OSError:
        pass
    return False


def hand_over(connection: Connection, give: Callable[[socket.SocketType], object], reason: str) -> None:
    """Give the backend's socket away, and close the connection without it."""
    up, down = connection.up, connection.down
    down.wait_for(0)
    server, down.source = down.source, None
    up.state = down.state = DONE  # an end, and no cut
    give(server)
    connection.close(reason)


# -- kept aside --------------------------------------------------------------------------------


class Aside(Watch):
    """A connection that has to be silent for a while before it may serve another client.  It owns the socket meanwhile.

    `queue` is one for all that rest equally long, `loop.queue(Reuse.rest, Aside.rested)`.  How many there are at once
    is the owner's to limit: they are connections of its pool.  Unless it is closed before, `done(sock)` is called once:
    with the socket, watched by nobody and the caller's from here on; or with None: the backend has said something, or
    has ended, and the socket is closed.
    """

    __slots__ = ("sock", "queue", "done")

    def __init__(self, poller: Poller, queue: Queue, sock: socket.SocketType,
                 done: Callable[[socket.SocketType | None], object]):
        super().__init__(poller, sock.fileno())
        self.sock = sock
        self.queue = queue
        self.done = done
        self.wait_for(READ, self.on_word)
        queue.put(self)

    def on_word(self, mask: int) -> None:
        """A late answer, or the end."""
        self.close()
        self.done(None)

    def rested(self) -> None:
        """Its time is over."""
        if is_silent(self.sock):
            self.wait_for(0)
            self.done(self.sock)
        else:
            self.on_word(READ)

    def close(self) -> None:
        """Give it up."""
        self.queue.drop(self)
        self.closing()
        self.sock.close()
