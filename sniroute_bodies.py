"""sniroute_bodies: messages of HTTP on their way: the two flows of a client that asks in plain HTTP.

       the client                                             the backend
          source  -----> MessageFlow `up`   : a request  ----->  sink
          sink    <----- MessageFlow `down` : its answer <-----  source

A flow has a state, as every Flow, and a step: what is called when its source can be read.

    hear          a head: hand what came to the connection (`client_said`, `backend_said`)
    carry         a body: feed its machine (`Counted`, `Chunked`, `UntilClose` of sniroute_http), pass on what it says
    forget        a body that nobody wants any more
    raw           no HTTP: as every Flow does it

The states are those of sniroute_flow (BULKY with the step raw only), and one more:

    HELD          of `up`: its source is not read before the request that is under way is answered

What a MessageFlow tells its connection beside `ended`, `failed` and `broken`: `carried_on` (so many bytes of a body),
`message_sent` (a body, or a head that has none, is all on its way to the sink), `refuse` and `cut` (a body is broken).

A body of a known length never passes through Python where it is large: `carry` splices what is left of it, or of its
chunk.

A backend that speaks TLS has its TlsClient (sniroute_tls) between: what is read from it is decrypted, what is written
to it is encrypted, and nothing is spliced.

Threads: the loop only.

Seams: I want to ...
    splice smaller bodies                 SPLICED
    do something else with what comes     a step, and the place in sniroute_requests that takes it (`take`)

This room imports sniroute_flow, sniroute_loop and sniroute_refusals.
"""

from __future__ import annotations

import os
import types
from typing import TYPE_CHECKING, Callable

from sniroute_flow import BLOCKED, CAREFUL, MESSAGE, OPEN, READ_MAX, READING, Flow, SpliceFlow
from sniroute_loop import READ, Poller
from sniroute_refusals import Malformed

if TYPE_CHECKING:
    from sniroute_http import Counted
    from sniroute_requests import HttpConnection

__version__ = "0.1.0"

HELD = "held"  # a state of `up`: what the client says waits in the kernel until its request is answered
SPLICED = 1 << 14  # bytes that are left of a body, from which on it is spliced: below, two system calls more cost more


class MessageFlow(SpliceFlow):
    """One direction of a client that asks in plain HTTP.  It reads a message, and knows where that ends."""

    __slots__ = ("step", "body")

    connection: HttpConnection

    def __init__(self, connection: HttpConnection, poller: Poller):
        super().__init__(connection, poller)
        self.step: Callable[[MessageFlow, int], None] = MessageFlow.hear
        self.body: Counted | None = None  # None: there is no message

    def mover(self) -> Callable[[int], None]:
        """What is called when the source can be read."""
        connection = self.connection
        if connection.tls is not None and self is connection.down:
            return self.open
        if self.step is MessageFlow.raw and connection.tls is None:
            return super().mover()
        return types.MethodType(self.step, self)

    def move_bulk(self, mask: int) -> None:
        """As SpliceFlow, where splice(2) works here; else as Flow."""
        if self.pipes.shared is None:
            Flow.move_bulk(self, mask)
        else:
            super().move_bulk(mask)

    def listen(self) -> None:
        """Wait for what the source says, and call the step then."""
        self.rewatch()
        self.install()

    def take(self, step: Callable[[MessageFlow, int], None]) -> None:
        """From now on do this with what comes."""
        if step is not self.step:
            self.step = step
            self.size = MESSAGE
            self.install()

    def open(self, mask: int) -> None:
        """Decrypt what a backend has said by TLS, and have the step take it."""
        connection, tls = self.connection, self.connection.tls
        try:
            tls.fill(self.source)
        except BlockingIOError:
            return
        except OSError as error:
            connection.failed(self, error)
            return
        self.drain()

    def drain(self) -> None:
        """Have the step take what the TlsClient has, and pass on what TLS itself has to say to that."""
        connection = self.connection
        tls = connection and connection.tls
        if tls is None:
            return
        while not tls.is_dry and self.state in READING:
            self.step(self, READ)
            if self.connection is None or connection.tls is not tls:
                return
        up = connection.up
        if tls.outgoing.pending and up.state is not BLOCKED and not up.write(tls.outgoing.read()):
            return
        if tls.is_dry and up.state is HELD and connection.has_ended:  # raw: see HttpConnection.ended
            connection.ended(up)

    # -- what comes

    def read(self, size: int) -> bytes | None:
        """Bytes of the source; None where there are none now, or where its connection was told of its end."""
        connection = self.connection
        try:
            if connection.tls is not None and self is connection.down:
                data = connection.tls.read(size)
            else:
                data = os.read(self.fd, size)
        except BlockingIOError:
            return None
        except OSError as error:
            connection.failed(self, error)
            return None
        if not data:
            connection.ended(self)
            return None
        self.total += len(data)
        return data

    def hear(self, mask: int) -> None:
        """Hand what came to the connection."""
        data = self.read(MESSAGE)
        if data is not None:
            connection = self.connection
            if self is connection.up:
                connection.client_said(data)
            else:
                connection.backend_said(data)

    def forget(self, mask: int) -> None:
        """Read what nobody wants."""
        self.read(READ_MAX)

    def raw(self, mask: int) -> None:
        """Pass on what comes: as Flow.pump, which is used where there is no TLS."""
        data = self.read(READ_MAX)
        if data is not None:
            self.put(data)

    def carry(self, mask: int) -> None:
        """Pass on what comes of a body."""
        body = self.body
        left = body.left
        if (left is None and self.size != MESSAGE or left is not None and left >= SPLICED) and self.splices():
            count = self.splice(self.pipes.bulk if left is None else min(left, self.pipes.bulk))
            if count:
                body.passed(count)
                self.connection.carried_on(self, count)
                if body.is_done and self.state is not BLOCKED:
                    self.connection.message_sent(self)
            return
        size = self.size
        data = self.read(size)
        if data is None:
            return
        if len(data) != size:
            self.size = MESSAGE
        else:  # behind this chunk there may be thousands of tiny ones, each of which takes its time
            self.size = READ_MAX if body.left is None or body.left >= READ_MAX else CAREFUL
        self.feed(data)

    def splices(self) -> bool:
        """Whether bytes may pass without being seen here."""
        connection = self.connection
        return self.pipes.shared is not None and connection.tls is None and not (
            self is connection.up and connection.replayable)

    # -- what goes on

    def feed(self, data: bytes, head: bytes = b"") -> None:
        """Pass on what `data` has of the message's body, behind its head; tell the connection where it ends."""
        connection, body = self.connection, self.body
        try:
            parts, used = body.feed(data)
        except Malformed as error:
            if self is connection.up:
                connection.refuse(error)
            else:
                connection.cut()
            return
        said = b"".join((head, *parts)) if head or len(parts) != 1 else bytes(parts[0])
        if used < len(data) and self is connection.up:
            connection.ahead = data[used:]
        elif used < len(data):
            connection.exchange.is_spoilt = True  # nobody has asked for more
        if said:
            connection.carried_on(self, len(said) - len(head), said)
            if not self.put(said):
                return
        if body.is_done and self.state is not BLOCKED:
            connection.message_sent(self)

    def put(self, data: bytes) -> bool:
        """Have the sink take these bytes, now or later; False where it has broken off."""
        tls = self.connection.tls
        if tls is not None and self is self.connection.up:
            try:
                data = tls.seal(data)
            except OSError:
                self.connection.broken(self)
                return False
        return self.write(data)

    def write(self, data: bytes) -> bool:
        """As `put`, for bytes as they are sent."""
        try:
            sent = os.write(self.twin.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.connection.broken(self)
            return False
        if sent != len(data):
            self.hold(memoryview(data)[sent:])
        return True

    def unblock(self, state: str = OPEN) -> None:
        """As Flow.unblock; the end of a message may have waited for that, or bytes in the TlsClient."""
        super().unblock(state if self.step is MessageFlow.raw else OPEN)
        connection = self.connection
        if self.body is not None and self.body.is_done:
            connection.message_sent(self)
        elif connection.stash and self is connection.down:
            connection.backend_said(b"")  # the rest of an answer's head, or what came behind one of 1xx
        if self is connection.down:
            self.drain()
