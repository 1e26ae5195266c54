"""sniroute_duplex: connections of which each direction ends by itself: TCP.

    owner --- send, finish -----------> TcpWire --- bytes, then FIN -----> peer
          <-- on_data, on_end(None) ---         <-- bytes, then FIN ------

A wire of this room is a Wire of sniroute_layers whose two directions are two things:

    on_end(None)      the peer has ended ITS direction; the wire takes what is sent as before.  At most once
    on_end(Failed)    it has broken off, and is closed.  At most once, perhaps behind on_end(None); nothing follows
    finish()          end OUR direction behind what is unsent.  Reading goes on.  Send nothing after it

When both directions are over the wire closes by itself: in on_end(None), where the peer is the last to end, and without
a word, where `finish` is.  `close` and `reset` end both directions at once.

An owner that wants the socket, to move bytes in the kernel, asks for it by `raw`.

Threads: the loop's only.

Seams: I want to ...
    another kind of wire     a subclass of Wire and Duplex, as TcpWire

This room imports sniroute_layers, sniroute_dial (Failed) and sniroute_loop.
"""

from __future__ import annotations

import socket

from sniroute_dial import Failed
from sniroute_layers import Plain, Wire, Wires, broke_off
from sniroute_loop import unsent

__version__ = "0.1.0"

Peer = tuple[str, int]  # an address, as in a log

SLOW = 1 << 14  # bytes that a closed wire's peer has to take each LINGER; else it is not slow, but gone, or hostile

# What a direction may be.
OPEN, ENDING, OVER = "open", "ending", "over"


class Duplex(Wire):
    """What wires have whose directions end one by one, beside what a Wire has."""

    __slots__ = ()

    half = True  # whether a peer that knows how may go on sending when it has heard our end
    peer: Peer  # the address of the other side

    def finish(self) -> None:
        """End our direction behind what is unsent; go on reading.  Nothing may be sent after it."""
        raise NotImplementedError

    def raw(self) -> socket.socket | None:
        """The socket, whose owner is the caller from here on, the wire being over; None: this wire cannot give it."""
        return None

    def fingerprint(self) -> str:
        """`sha256:` and the SHA-256 of the peer's certificate in lower hex; "" where it has shown none."""
        return ""


class TcpWire(Plain, Duplex):
    """A connection as it is.  `sock` is connected and non-blocking; `peer`: its other end, where the caller knows it.

    `hears`: whether the peer's direction is still open.  `says`: OPEN; ENDING: FIN comes behind what is unsent; OVER.
    """

    __slots__ = ("peer", "hears", "says", "left_unsent")

    def __init__(self, wires: Wires, sock: socket.socket, peer: Peer | None = None):
        self.hears = True
        self.says = OPEN
        self.left_unsent = 0  # bytes that the peer had not acknowledged when `late` looked last
        if peer is None:
            try:
                peer = sock.getpeername()[:2] or ("", 0)
            except OSError:  # it is gone already; reading says so
                peer = "", 0
        self.peer: Peer = peer  # type: ignore[assignment]
        super().__init__(wires, sock)

    def resume(self) -> None:
        self.is_reading = self.hears
        self._wait()

    def finish(self) -> None:
        if self.is_open and self.says is OPEN and self.error is None:
            self.says = ENDING
            if not self.out:
                self._say_end()

    def raw(self) -> socket.socket | None:
        if not self.is_open or self.out or self.says is not OPEN or self.error is not None:
            return None
        self.leave()
        self.is_reading = False
        self.watch.wait_for(0)
        return self.sock

    def late(self) -> None:
        left = self.waiting + (unsent(self.sock) or 0)
        if left and (not self.left_unsent or left <= self.left_unsent - SLOW):
            self.left_unsent = left
            self.wires.lingering.put(self)
        else:
            self.drop()

    def _flush(self) -> None:
        super()._flush()
        if self.says is ENDING and not self.out and self.is_open and self.error is None:
            self._say_end()

    def _say_end(self) -> None:
        """All is sent: FIN."""
        self.says = OVER
        if not self.hears:
            self.leave()
            self.drop()  # the kernel still delivers what it has: nothing is unread
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._break(error)

    def _end(self, error: Failed | None) -> None:
        if error is None and self.is_open and self.says is not OVER:
            self.hears = self.is_reading = False
            self._wait()
            self.on_end(None)
        else:
            super()._end(error)
