"""sniroute_offload: TLS in a child process, for an end that needs TLS for its handshake only.

    the end, which has no TLS                                          the helper, a child
    Offload.open(wire, Order, done) --- its socket, one of a pair, the Order ---> Errand: TLS on that socket
    done(TcpWire | Failed) <----------- a line: what came of TLS; then bytes in clear, both ways ---> relayed

The handshake of NodePass is in TLS whatever `tls` is, and with tls=0 that is all the TLS there is.  Python's `ssl` and
OpenSSL are 5 to 8 MB of a process for as long as it lives, so such an end has them done elsewhere: 14 MB at its start
instead of 21.  Where `ssl` is there already (another end of the process has tls=1) nothing is gained, and no helper is
used: `is_worth_it`.

The helper is started when the first handshake is near, serves any number of them at a time, and is told to end when
there was none for RESTS seconds: while a tunnel is up there is no helper.  It ends as well when its parent does.  It is
given no environment but where OpenSSL finds what it trusts, no key, and no other descriptor.

Threads: the loop's only, in both processes.

Seams: I want to ...
    tell the helper more      a field of Order
    keep it longer            RESTS

This room imports sniroute_duplex (wires, contexts, certificates), sniroute_layers (Wires), sniroute_loop and
sniroute_refusals.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import signal
import socket
import sys
from typing import Any, Callable, NamedTuple

from sniroute_duplex import Certificates, TcpWire, TlsWire, client_context
from sniroute_layers import Wires, unheard
from sniroute_loop import READ, Loop, Watch, monotonic
from sniroute_refusals import Failed

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds, sizes in bytes.
RESTS = 10.0  # without a handshake after which a helper ends: it takes 0.1 s to start another
ORDER_MAX = 1 << 16  # of an order: what a socket of a pair takes in one go; the first bytes of a TLS hello are 2 KB
CARRIED_MAX = 1 << 16  # each way in one errand: a handshake has 24 KB at most
LOOKS = 0.5  # between two looks of a helper whether it may end
LINE_MAX = 1024  # of the line that says what came of TLS

TRUST = ("SSL_CERT_FILE", "SSL_CERT_DIR", "OPENSSL_CONF")  # variables of OpenSSL's
CODE = "import sys; sys.path.insert(0, sys.argv[1]); import sniroute_offload; sniroute_offload.help_parent()"


class Order(NamedTuple):
    """What a helper is to do with a socket."""

    server_side: bool
    name: str = ""  # of the server: what the certificate has to be for, or is made for; "" for none
    is_checked: bool = False  # a client: whether the certificate has to be good
    early: str = ""  # base64 of what was read of the socket before


def is_worth_it() -> bool:
    """Whether this process would load `ssl` only for a handshake, and can have a helper do it."""
    return "ssl" not in sys.modules and bool(sys.executable) and hasattr(socket, "send_fds")


# -- the end -----------------------------------------------------------------------------------


class Helper:
    """A child that does TLS.  It lives until it has been told to end, and all its errands are done."""

    __slots__ = ("pid", "control", "watch", "gone")

    def __init__(self, wires: Wires, gone: Callable[[Helper], None]):
        """Start it.  Raises OSError."""
        self.gone = gone
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        place = os.path.dirname(os.path.abspath(__file__))
        with theirs:
            try:
                # Ctrl-C is for the end, which tells the helper by its own end.
                self.pid = os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", "-c", CODE, place],
                                          {name: os.environ[name] for name in TRUST if name in os.environ},
                                          file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)],
                                          setsigmask=[signal.SIGINT])
            except OSError:
                self.control.close()
                raise
        self.control.setblocking(False)
        self.watch = Watch(wires.loop.poller, self.control.fileno())
        self.watch.wait_for(READ, self._on_end)

    def send(self, order: bytes, descriptors: list[int]) -> None:
        """Give it an errand.  Raises OSError."""
        socket.send_fds(self.control, [order], descriptors)

    def dismiss(self) -> None:
        """Have it end when its errands are done."""
        try:
            self.control.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it is gone already

    def _on_end(self, mask: int) -> None:
        """It has ended: it says nothing else here."""
        try:
            self.control.recv(1)
        except BlockingIOError:
            return  # another socket, which was closed in this turn, had its number: to wait for it would stop the loop
        except OSError:
            pass  # it has left orders unread
        self.close()
        self.gone(self)

    def close(self) -> None:
        """Let go of it, whatever it does."""
        self.watch.closing()
        self.control.close()
        try:
            os.waitpid(self.pid, 0)  # its control socket closed when it ended
        except ChildProcessError:
            pass  # whoever started us ignores SIGCHLD: the kernel has done it


class Offload:
    """The helpers of a process: one, and perhaps some that are ending."""

    def __init__(self, wires: Wires):
        self.wires = wires
        self.helper: Helper | None = None  # that takes errands
        self.ending: set[Helper] = set()
        self.resting = wires.loop.timer(self._dismiss)

    def prepare(self) -> None:
        """A handshake is near: have a helper ready."""
        try:
            self._ready()
        except OSError:
            pass  # `open` will say so

    def _ready(self) -> Helper:
        """A helper, for RESTS at least.  Raises OSError."""
        if self.helper is None:
            self.helper = Helper(self.wires, self._gone)
        self.resting.set(monotonic() + RESTS)
        return self.helper

    def open(self, wire: TcpWire, order: Order, done: Callable[[Any, str], None]) -> TcpWire:
        """TLS for a wire that has sent nothing, and has no owner from here on.

        Args:
            done: called with a wire that carries what is inside TLS, and the fingerprint of the peer's certificate; or
                with Failed, and "".  Never before this returns.

        Returns the wire that there will be; to `reset` it is to give up.  The caller has a deadline.
        """
        text = json.dumps(order).encode()
        try:
            if len(text) > ORDER_MAX:  # it would be cut, which ends a helper, and all its errands
                raise OSError(errno.EMSGSIZE, "it says more than a hello")
            ours, theirs = socket.socketpair()
        except OSError as error:  # that, or descriptors are short
            wire.reset()
            failed = Failed("tls", error.strerror or str(error))
            self.wires.loop.call(lambda: done(failed, ""))
            return wire
        ours.setblocking(False)
        peer, sock = wire.peer, wire.raw()
        found = TcpWire(self.wires, ours, peer)
        said = bytearray()

        def on_data(data: bytes | memoryview) -> None:
            said.extend(data)
            line, end, rest = bytes(said).partition(b"\n")
            if not end:
                if len(said) > LINE_MAX:
                    found.reset()
                    done(Failed("tls", "the helper talks nonsense"), "")
                return
            reason, text = json.loads(line)
            found.on_data = found.on_end = unheard
            if reason:
                found.close()
                done(Failed(reason, text), "")
                return
            done(found, text)
            if rest and found.is_open:
                found.on_data(rest)

        def on_end(error: Failed | None) -> None:
            found.reset()
            done(Failed("tls", "the helper for TLS has ended"), "")

        found.on_data = on_data
        found.on_end = on_end
        try:
            if sock is not None:
                self._ready().send(text, [sock.fileno(), theirs.fileno()])
        except OSError:
            pass  # `theirs` closes, and `on_end` hears of it
        finally:
            theirs.close()
            if sock is not None:
                sock.close()
        return found

    def _dismiss(self) -> None:
        helper, self.helper = self.helper, None
        if helper is not None:
            self.ending.add(helper)
            helper.dismiss()

    def _gone(self, helper: Helper) -> None:
        """A helper has ended; not always because it was told to."""
        self.ending.discard(helper)
        if helper is self.helper:
            self.helper = None

    def close(self) -> None:
        """End all of them."""
        for helper in [*self.ending, *[self.helper] * (self.helper is not None)]:
            os.kill(helper.pid, signal.SIGKILL)
            helper.close()
        self.helper = None
        self.ending.clear()


# -- the helper --------------------------------------------------------------------------------


class Errand:
    """One handshake.  It owns both wires."""

    __slots__ = ("desk", "tls", "near", "carried")

    def __init__(self, desk: Desk, order: Order, sock: socket.socket, near: socket.socket):
        self.desk = desk
        self.near = TcpWire(desk.wires, near)  # on which nothing comes before our line, but the end
        self.near.on_end = self._given_up
        self.tls = TlsWire(TcpWire(desk.wires, sock), desk.context(order), "" if order.server_side else order.name,
                           server_side=order.server_side)
        self.carried = {self.near: 0, self.tls: 0}
        desk.errands.add(self)
        self.tls.shake(self._shaken, early=base64.b64decode(order.early))

    def _given_up(self, error: Failed | None) -> None:
        """Whoever has given the order wants it no more: nobody else has a deadline for a handshake."""
        self.near.close()
        self.tls.reset()
        self.desk.done(self)

    def _shaken(self, failed: Failed | None) -> None:
        line = json.dumps(["", self.tls.fingerprint()] if failed is None else [failed.reason, str(failed)])
        self.near.send(line.encode() + b"\n")
        if failed is not None:
            self.near.close()
            self.desk.done(self)
            return
        for here, there in ((self.near, self.tls), (self.tls, self.near)):
            here.on_data = lambda data, here=here, there=there: self._carry(data, here, there)
            here.on_end = lambda error, there=there: self._end(error, there)

    def _carry(self, data: bytes | memoryview, here: Any, there: Any) -> None:
        self.carried[here] += len(data)
        if self.carried[here] > CARRIED_MAX:
            self.near.reset()
            self.tls.reset()
            self.desk.done(self)
        else:
            there.send(data)

    def _end(self, error: Failed | None, there: Any) -> None:
        """One side has ended, or broken off: a handshake is over then.  What is unsent is still delivered."""
        (there.close if error is None else there.reset)()
        (self.near if there is self.tls else self.tls).close()
        self.desk.done(self)


def fault(owner: Any) -> None:
    """What should not happen has happened: tell, and end.  Whoever waits for an errand sees the end of it."""
    sys.excepthook(*sys.exc_info())
    os._exit(1)


class Desk:
    """All errands of a helper."""

    def __init__(self, control: socket.socket):
        self.loop = Loop(fault)
        self.wires = Wires(self.loop)
        self.control = control
        self.errands: set[Errand] = set()
        self.contexts: dict[tuple[Any, ...], Any] = {}  # by what they depend on: one for the server, two for the client
        self.looking = self.loop.queue(LOOKS, Desk.look)
        self.watch = Watch(self.loop.poller, control.fileno())
        self.watch.wait_for(READ, self._on_order)

    def context(self, order: Order) -> Any:
        """With what TLS an order is done."""
        key = order.server_side, order.is_checked
        if key not in self.contexts:
            self.contexts[key] = (Certificates(None, order.name).context if order.server_side else
                                  client_context(order.is_checked))
        return self.contexts[key]

    def _on_order(self, mask: int) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self.control, ORDER_MAX, 2)
        except BlockingIOError:
            return
        if not data:
            self.watch.wait_for(0)
            self.look()
            return
        sock, near = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        for each in (sock, near):
            each.setblocking(False)
        Errand(self, Order(*json.loads(data)), sock, near)

    def done(self, errand: Errand) -> None:
        """An errand is over."""
        self.errands.discard(errand)

    def look(self) -> None:
        """It was told to end: whether all is done."""
        if self.errands or self.wires.lingering.due:
            self.looking.put(self)
        else:
            self.loop.stop()


def help_parent() -> None:
    """Be a helper: orders come on stdin."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    control = socket.socket(fileno=0)
    control.setblocking(False)
    Desk(control).loop.run()
    os._exit(0)  # at once: its parent waits for it from the moment that `control` is closed
