"""sniroute_peering: one link between two ends: who may have it, its control channel, and what is said there.

    this end --- Link.send(Signal) --- one line each, at the end of the turn ---> control channel ---> the other end
             <-- End.on_signal(Signal) --- ACTIONS of sniroute_ends                <---

The control channel is a connection of the pool, the one with the id 00000000.  Each side says `ping` at once and then
in each report interval, and answers one with `pong`.  A side that says nothing for three intervals is gone.

    handshake ---> Candidate   a client that has the terms
    a connection of the pool ---> Newcomer --- it has proven the key ---> Server.admit, for one of the candidates

The lines are no secret: base64 of JSON under XOR with the key.  With tls=1 or 2 the channel is TLS.

Threads: the loop's only.

Seams: I want to ...
    let another client in   Server._judge of sniroute_dialin
    say another thing       a Signal, and a row in ACTIONS of sniroute_ends; a peer that does not know it skips it

This room imports sniroute_signals, sniroute_duplex (Wire), sniroute_loop, sniroute_names and sniroute_refusals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

from sniroute_duplex import Wire
from sniroute_loop import monotonic
from sniroute_names import show_address, site_of
from sniroute_refusals import Failed, Malformed
from sniroute_signals import PROOF_SIZE, Signal, SignalReader, encode, proof, same_secret

if TYPE_CHECKING:
    from sniroute_dialin import Server

__version__ = "0.1.0"

CONTROL = "00000000"  # the id of the control channel
ZERO_LAST = 0.3  # for one to prove it that has the id of the control channel; then all have it, until one does
SILENCES = 3  # report intervals without a line after which the other end is gone: 15 s, as in the original
UNREAD_MAX = 1 << 20  # bytes of signals that the other end has not taken: it hangs
NONSENSE_MAX = 100  # lines in a link that are no signal; more is no accident
PROD_EVERY = 1.0  # seconds between two signs of life that are asked for out of turn, whatever strangers do


class Link:
    """The control channel.

    Args:
        heard: called with each signal but ping, and a pong that nobody has asked for.
        over: called once, with why it has ended.
    """

    __slots__ = ("loop", "wire", "key", "reader", "heard", "over", "last", "pinged", "ping", "prodded", "out",
                 "nonsense", "due")

    def __init__(self, loop: Any, wire: Wire, key: bytes, heard: Callable[[Signal], None], over: Callable[[str], None],
                 due: list[Any]):
        self.loop = loop
        self.wire = wire
        self.key = key
        self.reader = SignalReader(key)
        self.heard = heard
        self.over: Callable[[str], None] | None = over
        self.last = monotonic()  # when the other end has said something
        self.pinged = 0.0  # when it was asked; 0: it has answered
        self.ping = 0.0  # seconds until the last answer
        self.prodded = -PROD_EVERY  # when it was asked out of turn
        self.out = bytearray()  # lines of this turn
        self.nonsense = 0
        self.due = due  # a batch of the loop, whose step is `flush`

    def start(self) -> None:
        """Begin to listen, and say `ping`."""
        self.wire.on_data = self._on_data
        self.wire.on_end = self._on_end
        self.wire.resume()
        self.say_ping()

    def send(self, signal: Signal) -> None:
        """Say something, at the end of this turn: what many callers need leaves in one write."""
        if self.over is None:
            return
        if not self.out:
            self.due.append(self)
        self.out += encode(signal, self.key)

    def flush(self) -> None:
        """Send the lines of this turn."""
        out, self.out = self.out, bytearray()
        if self.over is None or not out:
            return
        self.wire.send(bytes(out))
        if self.wire.unsent > UNREAD_MAX:
            self.end("the other end takes no signals")

    def say_ping(self) -> None:
        """Ask for a sign of life."""
        if not self.pinged:
            self.pinged = monotonic()
        self.send(Signal("ping"))

    def prod(self) -> None:
        """Ask for one out of turn: something has happened that a dead end would explain.  Strangers can do that."""
        now = monotonic()
        if now - self.prodded >= PROD_EVERY:
            self.prodded = now
            self.say_ping()

    def tick(self, report: float) -> None:
        """A report interval is over."""
        if monotonic() - self.last > SILENCES * report:
            self.end(f"the other end has said nothing for {SILENCES * report:g} s")
        else:
            self.say_ping()

    def _on_data(self, data: bytes | memoryview) -> None:
        self.last = monotonic()
        try:
            signals = self.reader.feed(bytes(data))
        except Malformed as error:
            self.end(f"the control channel: {error}")
            return
        for signal in signals:
            if isinstance(signal, Malformed):
                self.nonsense += 1
                if self.nonsense > NONSENSE_MAX:
                    self.end(f"the control channel: {signal}")
            elif signal.action == "ping":
                self.send(Signal("pong"))
            elif signal.action == "pong":
                if self.pinged:  # one that nobody has asked for is nothing
                    self.ping, self.pinged = monotonic() - self.pinged, 0.0
                    self.heard(signal)
            else:
                self.heard(signal)
            if self.over is None:
                return

    def _on_end(self, error: Failed | None) -> None:
        self.end(f"the control channel has broken off: {error}" if error else "the other end has closed the link")

    def end(self, why: str) -> None:
        """It is over: close the channel, and say so, once."""
        over, self.over = self.over, None
        if over is None:
            return
        self.wire.on_data = self.wire.on_end = self.wire.on_room = lambda *what: None
        if self.wire.unsent > UNREAD_MAX:
            self.wire.reset()
        else:
            self.wire.close()
        over(why)


# -- who may have a link --------------------------------------------------------------------------


class Candidate:
    """A client that has the terms, and perhaps the link.

    There may be several: who has heard a token once can ask with it again, and must not be able to spoil the start of
    the client that knows the key.  The first one with a control channel has the link.
    """

    __slots__ = ("peer", "site", "nonce", "zero_at", "ids")

    def __init__(self, peer: str, nonce: str):
        self.peer = peer
        self.site = site_of(peer)
        self.nonce = nonce  # "": it is the original
        self.zero_at = 0.0  # when a connection has got the id of the control channel
        self.ids: set[str] = set()  # of its connections before there is a link

    def gives_zero(self) -> bool:
        """Whether the next connection gets that id.

        That is the first one; and where that has not proven the key within ZERO_LAST, all of them until one does: it
        may be a stranger's.
        """
        now = monotonic()
        if not self.zero_at:
            self.zero_at = now
            return True
        return now - self.zero_at >= ZERO_LAST


class Newcomer:
    """A connection of the pool that has its id, and has not proven yet that its client knows the key."""

    __slots__ = ("server", "candidates", "id", "wire", "address", "said")

    def __init__(self, server: Server, candidates: list[Candidate], number: str, wire: Wire, address: Any):
        self.server = server
        self.candidates = candidates
        self.id = number
        self.wire = wire
        self.address = address
        self.said = b""
        wire.on_data = self._on_data
        wire.on_end = self.end
        server.proving.put(self)

    def _on_data(self, data: bytes | memoryview) -> None:
        self.said += data
        if len(self.said) < PROOF_SIZE:
            return
        server, wire = self.server, self.wire
        said, number = self.said[:PROOF_SIZE], bytes.fromhex(self.id)
        for candidate in self.candidates:
            if same_secret(bytes(said), proof(server.key, candidate.nonce, number)):
                server.proving.drop(self)
                server.admit(candidate, self.id, wire, self.said[PROOF_SIZE:])
                return
        server.nuisance("proof", f"a connection from {show_address(self.address[:2])} has not proven the key")
        if server.link is not None:  # it may be the handshake of the same client, which has come back
            server.link.prod()
        self.end()

    def end(self, error: Failed | None = None) -> None:
        """It has gone, or is a stranger's, or too late."""
        self.server.proving.drop(self)
        self.wire.reset()
