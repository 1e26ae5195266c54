"""sniroute_deadlines: what a connection may wait for, how long, and what is done when that time has come.

    Connection.wait_in(deadlines.greeting) ---> a Queue of the loop: all in it wait equally long
                                                    | the time has come
                                                    +---> late_ssl_answer(connection)

A connection stands in one queue at most.  There is no timer for each: a queue is a FIFO.

Threads: the loop only.

Seams: I want to ...
    let a connection wait for something else     a queue in Deadlines, and its function

It imports resets, race, flow, the loop and refusals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sniroute_flow import ENDING
from sniroute_loop import READ, Loop
from sniroute_race import CONNECT_BUDGET, CONNECT_TIMEOUT, STAGGER, Attempt, Race, Races, no_answer
from sniroute_refusals import Refused
from sniroute_resets import RESET_LOOK, RESET_LOOK_LATER, look_at_reset

if TYPE_CHECKING:
    from sniroute_connection import Connection
    from sniroute_routes import Decision

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
HEADER_GRACE = 0.1  # a PROXY header that may come or not: a balancer sends it with its connect
GREETING_TIMEOUT = 20.0  # for a backend's answer to SSLRequest; a tunnel dials its far end meanwhile
FIRST_BYTE_TIMEOUT = 20.0  # a tunnel without an answer to the hello by then does not work; the carrier gives up at 15
WORDS_TIMEOUT = 0.05  # a tunnel has failed: its words are on their way from one process to another
BACKLOG_LOOK = 0.02  # between two connects to a unix socket whose backlog is full
EXIT_TIMEOUT = 0.05  # a program has ended its stream: its exit code comes next, from the kernel
LINGER = 0.5  # a refused client may read its alert this long before the close


class Deadlines:
    """The queues in which connections stand, one for each thing that they may wait for.  Loop only."""

    def __init__(self, loop: Loop, prelude_timeout: float, start_timeout: float):
        self.prelude = loop.queue(prelude_timeout, late_prelude)
        self.header = loop.queue(HEADER_GRACE, late_header)
        self.parked = loop.queue(0.0, late_target)
        self.stagger = loop.queue(STAGGER, silent_connect)
        self.connect = loop.queue(CONNECT_TIMEOUT - STAGGER, late_connect)
        self.budget = loop.queue(CONNECT_BUDGET - STAGGER, late_race)
        self.races = Races(loop)
        self.greeting = loop.queue(GREETING_TIMEOUT, late_ssl_answer)
        self.first_byte = loop.queue(FIRST_BYTE_TIMEOUT, late_first_byte)
        self.words = loop.queue(WORDS_TIMEOUT, words_are_due)
        self.backlog = loop.queue(BACKLOG_LOOK, lambda connection: connection.connect(""))
        self.exit = loop.queue(EXIT_TIMEOUT, exit_is_due)
        self.linger = loop.queue(LINGER, lambda connection: connection.close(connection.reason))
        self.resetting = loop.queue(RESET_LOOK, look_at_reset)
        self.stuck = loop.queue(RESET_LOOK_LATER, look_at_reset)
        self.adopt(prelude_timeout, start_timeout)

    def adopt(self, prelude_timeout: float, start_timeout: float) -> None:
        """Use other times, in seconds; connections already queued keep their old deadline."""
        self.prelude.seconds = prelude_timeout
        self.parked.seconds = start_timeout + 1  # so the thread that waits gives up first: it knows why


def late_prelude(connection: Connection) -> None:
    """Its one deadline has come, and the client has not said its name, or, at a port, all of its PROXY header."""
    if connection.decision is None:
        connection.refuse(Refused("prelude_timeout", "the client did not say its name in time"))
    else:
        connection.refuse(Refused("proxy", "no PROXY header came in time"))


def late_header(connection: Connection) -> None:
    """The client of a port has not said a byte: no PROXY header comes."""
    connection.route_to(connection.decision)


def late_target(connection: Connection) -> None:
    """The thread that waits for the target should have given up by now; perhaps it hangs in the resolver."""
    decision = awaited_by(connection)
    cannot_wait(connection, Refused("tunnel_timeout",
                                    f"{decision.target}: waited too long for {decision.scheme.waits_on}"))


def awaited_by(connection: Connection) -> Decision:
    """The target that has to be ready before this connection can go on: its own, or one of several."""
    backend = connection.backend
    return backend and backend.awaited or connection.decision


def cannot_wait(connection: Connection, error: Refused) -> None:
    """What the connection waits for cannot be had: refuse it, unless its backend knows another way."""
    if connection.backend is not None and connection.backend.goes_on(error):
        connection.resume()
    else:
        connection.refuse(error)


def silent_connect(connection: Connection) -> None:
    """An address is silent: try the others beside it, if there are any (RFC 8305 section 5)."""
    deadlines, backend, down = connection.router.deadlines, connection.backend.way, connection.down
    patience = connection.backend.patience
    if backend.tried == len(backend.addresses):
        connection.wait_in(patience[1] if patience else deadlines.connect)
        return
    connection.wait_in(patience[1] if patience else deadlines.budget)
    down.wait_for(0)
    server, down.source = down.source, None
    backend.race = Race(deadlines.races, backend, server, connection.dialled, connection, race_over)
    backend.race.another()


def late_connect(connection: Connection) -> None:
    """The last address has had its time."""
    connection.connect(no_answer(CONNECT_TIMEOUT))


def late_race(connection: Connection) -> None:
    """All addresses together have had their time."""
    connection.backend.way.race.close()
    connection.backend_failed(connection.backend.way.give_up())


def race_over(connection: Connection, result: Attempt | OSError | None) -> None:
    """One of several addresses took the connect, or none did."""
    if isinstance(result, Attempt):
        connection.down.source, connection.down.fd = result.sock, result.fd
        connection.dialled = result.began
        connection.speak()
    elif result is None:
        connection.backend_failed(connection.backend.way.give_up())
    else:
        out_of_descriptors(connection, result)


def out_of_descriptors(connection: Connection, error: OSError) -> None:
    """There is none for the backend: our own trouble, neither the backend's fault nor its tunnel's."""
    connection.router.run_short(error.strerror)
    connection.refuse(Refused("busy", error.strerror))


def wait_for_room(connection: Connection) -> None:
    """The backlog of its backend is full: connect again soon."""
    connection.up.wait_for(READ, connection.on_waiting)
    connection.wait_in(connection.router.deadlines.backlog)


def wait_for_exit(connection: Connection) -> None:
    """Its backend's program has ended its stream, and may have died: learn that before the client hears of the end."""
    connection.down.state = ENDING
    connection.down.rewatch()
    connection.wait_in(connection.router.deadlines.exit)


def exit_is_due(connection: Connection) -> None:
    """The exit code is there, or there is none."""
    if connection.down.state is ENDING:
        connection.ended(connection.down)


def late_ssl_answer(connection: Connection) -> None:
    """No backend may think about TLS longer than that."""
    connection.backend_failed(f"no answer to {connection.greets_by}")


def late_first_byte(connection: Connection) -> None:
    """The tunnel took the hello and is silent, whatever the client has said since.

    The same hello is sent once more, or the client is refused; `TunnelTable.wait` looks at the process.
    """
    connection.backend_failed(f"no answer within {FIRST_BYTE_TIMEOUT:g} s")


def words_are_due(connection: Connection) -> None:
    """The last words of its tunnel have had their time: ask the backend again."""
    connection.obey(connection.backend.failed("", None, connection.retried or not connection.replayable))
