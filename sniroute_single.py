"""sniroute_single: a client that forwards by itself, without a server: `client://HOST:PORT/TARGET,TARGET?mode=1`.

    caller --- HOST:PORT, TCP --- [TLS] --- `block` --- a slot --- dial --- [PROXY header] --- Relay --- target
               HOST:PORT, UDP ----------------------------- a Flow of sniroute_datagrams ------------- target

    Direct    a caller whose bytes go on as they come: two sockets, spliced
    Secured   one whose TLS ends here (tls=1 or 2).  Its handshake has a deadline, and the target is dialled after it

A Direct is a Caller (sniroute_callers) that asks for a connection to a target, where others ask for one of a pool.

Single is an AnyEnd without a link, so its states are IDLE and CLOSED: `start` opens the address, and tries again each
NP_SERVICE_COOLDOWN where somebody else has it.

    Secured   SHAKING   the TLS of the caller           then as a Caller: PEEKING, WAITING, CARRYING, OVER

Threads: the loop's only.

Seams: I want to ...
    do something with callers first   a subclass of Direct, and a row in SERVING

This room imports sniroute_dialin (`listen`), sniroute_ends (AnyEnd), sniroute_callers, sniroute_upstreams,
sniroute_duplex, sniroute_guards, sniroute_signals, sniroute_dial (Failed, set_options) and sniroute_names.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Callable

from sniroute_callers import CARRYING, OVER, PEEKED, PEEKING, Caller
from sniroute_dial import Failed, set_options
from sniroute_dialin import listen
from sniroute_duplex import Certificates, TcpWire, TlsWire, accept_tls
from sniroute_ends import CLOSED, AnyEnd
from sniroute_guards import protocol_of
from sniroute_names import show_address
from sniroute_signals import proxy_header
from sniroute_upstreams import Attempt

if TYPE_CHECKING:
    from sniroute_forwarder import Listener
    from sniroute_nodeurl import Options, Times

__version__ = "0.1.0"

SHAKING = "shaking"  # a state of a Secured


class Single(AnyEnd):
    """A forwarder at one address.  Its alarms: "open" the address again; "report" the status line.

    Raises SettingsError where the files of a certificate cannot be used.
    """

    mode = 1
    idle = 0  # there is no pool

    def __init__(self, program: Any, options: Options, times: Times):
        super().__init__(program, options, times)
        self.sockets: list[socket.socket] = []  # that are open already, for `start`
        self.certificates = self._certificates()
        self.shaking = self.loop.queue(times.handshake, Secured.on_late)

    def __str__(self) -> str:
        """Where it leads, for people."""
        return ",".join(map(show_address, self.options.targets))

    def _certificates(self) -> Certificates | None:
        """Who we are to callers; None: they speak as they like."""
        options = self.options
        if not options.tls:
            return None
        files = (options.crt, options.key_file) if options.tls == 2 else None
        return Certificates(files, options.server_name, tell=lambda text: self.log("info", text))

    # -- the address

    def can_listen(self) -> bool:
        """Whether the address can be had: a client without a `mode` is alone then."""
        try:
            self._bind()
        except OSError:
            return False
        return True

    def _bind(self) -> None:
        """Open it.  Raises OSError."""
        host, port = self.options.host, self.options.port
        kinds = [kind for kind, is_off in ((socket.SOCK_STREAM, self.options.notcp),
                                           (socket.SOCK_DGRAM, self.options.noudp)) if not is_off]
        try:
            for kind in kinds[len(self.sockets):]:
                self.sockets.append(listen(host, port, kind))
        except OSError:
            self._unbind()
            raise

    def _unbind(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()

    def start(self) -> None:
        """Begin to serve."""
        self.program.serve = SERVING[self.certificates is not None]
        self._open()
        self._report()

    def _open(self) -> None:
        """Open the address, or try again later."""
        try:
            self._bind()
        except OSError as error:
            where = show_address((self.options.host or "0.0.0.0", self.options.port))
            self.log("error", f"cannot listen on {where}: {(error.strerror or str(error)).lower()}; "
                              f"next try in {self.times.cooldown:g} s")
            self.later("open", self.times.cooldown, self._open)
            return
        sockets, self.sockets = self.sockets, []
        for sock in sockets:
            if sock.type == socket.SOCK_STREAM:
                self.program.take_listener(self, sock)
            else:
                self.datagrams.listen(sock, direct=True)

    def _report(self) -> None:
        """Write the status line."""
        self.program.checkpoint(self)
        self.later("report", self.times.report, self._report)

    @property
    def ping(self) -> float:
        """Seconds to the nearest target, as callers' connects have measured."""
        return self.upstreams.ping

    # -- callers

    def take(self, action: str, remote: str, done: Callable[[socket.socket | Failed], None]) -> Attempt:
        """What a Caller goes on with: here a connection to a target."""
        return self.upstreams.dial(done)

    def refused(self, caller: Caller, reason: str, text: str) -> None:
        """As of each end, with the address of the caller in the line."""
        super().refused(caller, reason, f"{caller.address}: {text}")

    def close(self) -> None:
        """End everything.  More than once does no harm."""
        if self.state is CLOSED:
            return
        self.state = CLOSED
        self._unbind()
        super().close()
        self.loop.retire(self.shaking)


class Direct(Caller):
    """A caller of this address."""

    __slots__ = ()

    end: Any  # a Single

    def got(self, result: socket.socket | Failed) -> None:  # type: ignore[override]
        """A target, or why there is none."""
        self.asker = None
        if isinstance(result, Failed):
            self.refuse("target", f"no target: {result}")
            return
        try:
            self.introduce(result)
        except OSError as error:
            result.close()
            self.refuse("left", error.strerror or str(error))
            return
        self.state = CARRYING
        self.join(TcpWire(self.program.wires, result))

    def introduce(self, target: socket.socket) -> None:
        """Say to the target who the caller is, where it wants to know.  Raises OSError: one of them has left."""
        version = self.end.options.proxy
        if version:
            header = proxy_header(version, self.client.getpeername()[:2], target.getpeername()[:2])
            target.send(header)  # into an empty buffer: it takes a hundred bytes

    def join(self, target: TcpWire) -> None:
        """Carry."""
        self.relay = self.end.relays.join(self.client, target, b"", False, self.on_over)


class Secured(Direct):
    """One whose TLS ends here."""

    __slots__ = ("wire", "said", "ended")

    def __init__(self, program: Any, listener: Listener, client: socket.socket, address: str):
        super().__init__(program, listener, client, address)
        self.wire: TlsWire | None = None
        self.said = bytearray()  # before its target is there
        self.ended = False  # it has ended its direction

    def start(self) -> None:
        try:
            set_options(self.client)
        except OSError:
            self.close()  # it has left already
            return
        self.state = SHAKING
        self.end.shaking.put(self)
        self.wire = accept_tls(self.program.wires, self.client, self.end.certificates.context, self.shaken)

    def on_late(self) -> None:
        """The handshake has had its time."""
        self.refuse("tls", f"no TLS handshake in {self.end.times.handshake:g} s")

    def shaken(self, result: TlsWire | Failed) -> None:
        """The handshake is over."""
        self.end.shaking.drop(self)
        if isinstance(result, Failed):
            self.end.refused(self, "tls", f"TLS: {result}")
            self.wire = None  # it closes by itself, behind an alert
            self._gone()
            return
        result.on_data, result.on_end = self.on_said, self.on_end
        if self.end.options.block:
            self.state = PEEKING
            self.end.peeking.put(self)
        else:
            result.pause()
            self.admit()

    def on_said(self, data: bytes | memoryview) -> None:
        """It speaks before its target is there: once it has passed, one piece more is what may come."""
        self.said += data
        if self.state is PEEKING:
            self.look(len(self.said) >= PEEKED)

    def on_end(self, error: Failed | None) -> None:
        self.ended = True
        if error is not None:
            self.abort()
        elif self.state is PEEKING:
            self.look(True)

    def on_silence(self) -> None:
        self.look(True)

    def look(self, whole: bool) -> None:
        """Whether what it says may pass."""
        protocol = protocol_of(bytes(self.said[:PEEKED]), self.end.options.block, whole)
        if protocol is None:
            return
        self.end.peeking.drop(self)
        if protocol:
            self.refuse("blocked", f"it speaks {protocol}, which block= refuses")
        else:
            assert self.wire is not None
            self.wire.pause()
            self.admit()

    def join(self, target: TcpWire) -> None:
        wire, said = self.wire, bytes(self.said)
        assert wire is not None
        self.said.clear()
        relay = self.relay = self.end.relays.join(wire, target, b"", False, self.on_over)
        if said:
            relay.pass_on(said, 0, relay.near, relay.far)
        if self.ended:
            relay.on_end(None, relay.near, relay.far)
        elif relay.state is not OVER and not relay.near.holds:
            wire.resume()

    def _leave(self) -> None:
        self.end.shaking.drop(self)
        self.end.peeking.drop(self)
        if self.wire is not None:
            self.wire.reset()  # before the socket below it is closed
        super()._leave()


SERVING: dict[bool, type[Direct]] = {False: Direct, True: Secured}  # by whether callers speak TLS
