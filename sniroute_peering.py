"""sniroute_peering: one link between two ends: its control channel, and what is said there.

    this end --- Link.send(Signal) --- one line each, at the end of the turn ---> control channel ---> the other end
             <-- End.on_signal(Signal) --- ACTIONS of sniroute_ends                <---

The control channel is a connection of the pool, the one with the id 00000000.  Each side says `ping` at once and then
in each report interval, and answers one with `pong`.  A side that says nothing for three intervals is gone.

The lines are no secret: base64 of JSON under XOR with the key.  With tls=1 or 2 the channel is TLS.

Threads: the loop's only.

Seams: I want to ...
    say another thing    a Signal, and a row in ACTIONS of sniroute_ends; a peer that does not know it skips it

This room imports sniroute_signals, sniroute_duplex (Wire), sniroute_loop and sniroute_refusals.
"""

from __future__ import annotations

from typing import Any, Callable

from sniroute_duplex import Wire
from sniroute_loop import monotonic
from sniroute_refusals import Failed, Malformed
from sniroute_signals import Signal, SignalReader, encode

__version__ = "0.1.0"

CONTROL = "00000000"  # the id of the control channel
SILENCES = 3  # report intervals without a line after which the other end is gone: 15 s, as in the original
UNREAD_MAX = 1 << 20  # bytes of signals that the other end has not taken: it hangs
NONSENSE_MAX = 100  # lines in a link that are no signal; more is no accident


class Link:
    """The control channel.

    Args:
        heard: called with each signal but ping.
        over: called once, with why it has ended.
    """

    __slots__ = ("loop", "wire", "key", "reader", "heard", "over", "last", "pinged", "ping", "out", "nonsense", "due")

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
                if self.pinged:
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
        self.wire.close()
        over(why)
