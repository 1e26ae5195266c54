"""sniroute_layers: a connection to an API server, or to a Redis, in layers: TCP, what a proxy wants to hear, TLS.

    Opening:  Dial ---- [TLS to the proxy] ---- [CONNECT, or SOCKS5] ---- [TLS to the server] ----> done(Wire)
              naming,                           sniroute's words to        the server's name,        or done(Failed)
              connecting                        the proxy                  our certificate

    owner --- send, pause, resume ---> Secure --- the same ---> Plain --- send, recv ---> socket
          <-- on_data, on_end, on_room --     <--- the same ---

A Wire is a connection as its owner sees it.  There are two: Plain has a socket, and Secure makes TLS (RFC 8446) out of
any Wire below it, with OpenSSL working on two buffers in memory (`ssl.SSLObject`).  So TLS through a proxy that is
itself reached by TLS is a Secure above a Secure.

Bytes are moved in large pieces: PIECE of the socket becomes one call of `on_data`, however many records are in it, and
what is given to `send` is encrypted in one go, and leaves in one write.

A Place is where an Opening leads to, with what it has to know: it is kept, since a TLS session of the last connection
saves a part of the next handshake.

The life of an opening is `Opening.phase`, in words for people.  It has no deadline: its owner has one, and cancels it.

Threads: the loop's only.

Seams: I want to ...
    another kind of proxy      a row in TALKS, and a generator as `connect_talk`
    another layer              a subclass of Wire, and a step in `Opening.steps`
    trust otherwise            `make_tls` of sniroute_credentials makes the contexts

This room imports sniroute_dial (Dial, Failed), sniroute_loop, sniroute_names, sniroute_refusals and sniroute_upgrade
(CONNECT).
"""

from __future__ import annotations

import base64
import collections
import ipaddress
import operator
import socket
import struct
from typing import TYPE_CHECKING, Any, Callable, Generator, Sequence

from sniroute_dial import OVER, Dial, Failed, WayOut
from sniroute_loop import READ, WRITE, Loop, Watch
from sniroute_names import show_address
from sniroute_refusals import Malformed
from sniroute_upgrade import connect_request, parse_answer

if TYPE_CHECKING:
    import ssl

    from sniroute_kubeconfig import Proxy  # registries use this room, too, and have no kubeconfig

__version__ = "0.1.0"

# Limits, in bytes where nothing else is said.
PIECE = 1 << 18  # read of a socket at a time: 16 records of TLS
RECORD = 16384  # of TLS: what one read of OpenSSL gives at most, RFC 8446 section 5.1
ROOM = 1 << 16  # `Wire.on_room` is called when `unsent` falls to this, having been above it
FLIGHT_MAX = 1 << 17  # of a handshake: a chain of certificates is a tenth of that
WRITES = 64  # pieces in one write; the kernel takes 1,024 (IOV_MAX)
LINGER = 10.0  # seconds for which a closed wire still sends what is unsent, and waits for the other side's end


NOTHING = ()  # `Plain.out` of a wire that was never congested


def unheard(*what: Any) -> None:
    """The callback of a wire without an owner."""


# -- wires -------------------------------------------------------------------------------------


class Wire:
    """A connection to an API server, as bytes: TLS or plain.  All methods run in the loop.

    The owner assigns the callbacks; whoever assigns them next is the next owner:

        on_data(data)    bytes came, up to 256 KiB at a time
        on_end(error)    the other side has ended: None, or Failed where it broke off.  It is called once; nothing comes
                         after it, the wire is closed by then
        on_room()        `unsent` has fallen to ROOM or less, having been above it

    `unsent`: bytes that the kernel has not taken yet.  There is no limit: the owner stops when it grows.

    With `use`, `on_data` gets views of a buffer, which are good until it returns.  That halves the CPU time of a
    stream: new memory for each piece would come from the kernel, page by page, and go back there.
    """

    __slots__ = ("on_data", "on_end", "on_room", "is_open", "buffer")

    def __init__(self) -> None:
        self.on_data: Callable[[bytes], None] = unheard
        self.on_end: Callable[[Failed | None], None] = unheard
        self.on_room: Callable[[], None] = unheard
        self.is_open = True
        self.buffer: memoryview | None = None

    @property
    def unsent(self) -> int:
        """Bytes that the kernel has not taken yet."""
        raise NotImplementedError

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send now what the kernel takes, and the rest as soon as it does.  Put many small pieces into one call.

        Never raises for the connection: a failure is told to `on_end`, later.  `data` is not kept.
        """
        raise NotImplementedError

    def use(self, buffers: Sequence[memoryview]) -> None:
        """Put what comes into these, PIECE bytes each: the first one, and the others for the layers below."""
        self.buffer = buffers[0]

    def pause(self) -> None:
        """Read no more, until `resume`.  A piece that is on its way to `on_data` still comes."""
        raise NotImplementedError

    def resume(self) -> None:
        """Read again."""
        raise NotImplementedError

    def close(self) -> None:
        """Send what is unsent, end TLS, and close; no callback is called any more.  More than once does no harm.

        The socket itself closes when the other side ends, or LINGER later.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Break off at once, with an RST; no callback is called any more.  More than once does no harm."""
        raise NotImplementedError

    def leave(self) -> bool:
        """No owner from here on: whether there was one."""
        was_open, self.is_open = self.is_open, False
        self.on_data = self.on_end = self.on_room = unheard
        return was_open

    def ended(self, error: Failed | None) -> None:
        """Tell the owner of the end, once."""
        on_end = self.on_end
        if self.leave():
            on_end(error)


class Wires:
    """What the wires of one loop share: the queues in which some of them wait."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.broken = loop.queue(0.0, Plain.tell_break)
        self.lingering = loop.queue(LINGER, operator.methodcaller("late"))  # closed wires

    def close(self) -> None:
        """Wait no more for those that are closed."""
        for wire in list(self.lingering.due):
            wire.drop()


class Plain(Wire):
    """A wire over a connected, non-blocking socket, which it owns."""

    __slots__ = ("wires", "sock", "watch", "is_reading", "out", "waiting", "error")

    def __init__(self, wires: Wires, sock: socket.socket):
        super().__init__()
        self.wires = wires
        self.sock = sock
        self.watch = Watch(wires.loop.poller, sock.fileno())
        self.is_reading = True
        self.out: collections.deque[memoryview] | tuple[()] = NOTHING  # what the kernel has not taken
        self.waiting = 0  # its bytes
        self.error: Failed | None = None  # why sending has failed
        self._wait()

    @property
    def unsent(self) -> int:
        return self.waiting

    def send(self, data: bytes | bytearray | memoryview) -> None:
        if not self.is_open or self.error is not None or not data:
            return
        sent = 0
        if not self.out:
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                pass
            except OSError as error:
                self._break(error)
                return
            if sent == len(data):
                return
        if self.out is NOTHING:
            self.out = collections.deque()  # late: it is 0.7 KB, and most connections never need one
        self.out.append(memoryview(data if isinstance(data, bytes) else bytes(data))[sent:])
        self.waiting += len(data) - sent
        self._wait()

    def pause(self) -> None:
        self.is_reading = False
        self._wait()

    def resume(self) -> None:
        self.is_reading = True
        self._wait()

    def close(self) -> None:
        if self.leave():
            self.wires.lingering.put(self)
            self.is_reading = not self.out
            if self.out:
                self._wait()
            else:
                self._part()

    def _part(self) -> None:
        """All is sent.  Now wait for the other side's end: the kernel resets what is closed with unread bytes, and
        with a reset the other side may lose what it has not read yet."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.drop()
            return
        self.is_reading = True
        self._wait()

    def reset(self) -> None:
        if self.leave():
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass  # it is over already
            self.drop()

    def late(self) -> None:
        """Closed LINGER ago, and the other side has not ended."""
        self.drop()

    def drop(self) -> None:
        """Close the socket."""
        self.out = NOTHING
        self.wires.broken.drop(self)
        self.wires.lingering.drop(self)
        self.watch.closing()
        self.sock.close()

    def _wait(self) -> None:
        """Watch the socket for what may be done now: read, where the owner reads; write, where something is unsent."""
        if self.sock.fileno() >= 0:
            self.watch.wait_for((READ if self.is_reading else 0) | (WRITE if self.out else 0), self._on_ready)

    def _on_ready(self, mask: int) -> None:
        """The socket takes or has something, or has failed."""
        if self.out and mask & ~READ:
            self._flush()
        if self.is_reading and mask & ~WRITE and self.sock.fileno() >= 0:
            self._read()

    def _read(self) -> None:
        buffer = self.buffer
        data: bytes | memoryview
        try:
            data = self.sock.recv(PIECE) if buffer is None else buffer[:self.sock.recv_into(buffer, PIECE)]
        except BlockingIOError:
            return
        except OSError as error:
            self._end(self.error or broke_off(error))
            return
        if data:
            self.on_data(data)
        else:
            self._end(self.error)

    def _flush(self) -> None:
        """Send more of what is unsent."""
        before = self.waiting
        try:
            sent = self.sock.sendmsg([self.out[at] for at in range(min(WRITES, len(self.out)))])
        except BlockingIOError:
            return
        except OSError as error:
            self._break(error)
            return
        self.waiting -= sent
        while sent:
            first = self.out.popleft()
            if len(first) > sent:
                self.out.appendleft(first[sent:])
                break
            sent -= len(first)
        if not self.is_open and not self.out:
            self._part()
            return
        self._wait()
        if before > ROOM >= self.waiting:
            self.on_room()

    def _break(self, error: OSError) -> None:
        """Nothing can be sent any more.  What the other side has said before is read first, where anybody reads."""
        self.error = broke_off(error)
        self.out = NOTHING
        self.waiting = 0
        if not self.is_open:
            self.drop()
            return
        self._wait()
        if not self.is_reading:
            self.wires.broken.put(self)

    def tell_break(self) -> None:
        """Sending has failed, and nobody reads."""
        self._end(self.error)

    def _end(self, error: Failed | None) -> None:
        """The other side has ended, or broken off."""
        self.drop()
        self.ended(error)


def broke_off(error: OSError) -> Failed:
    """Why a connection is over."""
    return Failed("reset", error.strerror or type(error).__name__)


def load_ssl() -> None:
    """Have `ssl` here.  It takes 4.3 MB, which a connection without TLS does not need."""
    global ssl
    import ssl


def asked_name(name: str) -> str | bytes:
    """A name as `ssl` is to be told it: one in bytes is taken as it is.

    For one in letters `ssl` loads the codec of IDNA, half a megabyte, which also looks at what OpenSSL does not: the
    length of a label.
    """
    is_plain = name.isascii() and all(len(label) < 64 for label in name.split("."))
    return name.encode() if is_plain else name


class Secure(Wire):
    """TLS over another wire, which it owns.  Its owner waits for `shake` before it sends.

    Args:
        name: that the certificate has to have; a host name or an address.
        session: of a connection before, made with the same context.
    """

    __slots__ = ("below", "tls", "incoming", "outgoing", "taken", "done", "keep")

    def __init__(self, below: Wire, context: ssl.SSLContext, name: str, session: ssl.SSLSession | None = None):
        super().__init__()
        load_ssl()
        self.below = below
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls: Any = context.wrap_bio(self.incoming, self.outgoing, server_hostname=asked_name(name),
                                         session=session)
        self.taken = 0  # bytes of the handshake that have come so far
        self.done: Callable[[Failed | None], None] = unheard  # of `shake`; `unheard` again when the handshake is over
        self.keep: Callable[[ssl.SSLSession], None] | None = None
        below.on_end = self._on_end
        below.on_room = self._on_room

    @property
    def unsent(self) -> int:
        return self.below.unsent

    def shake(self, done: Callable[[Failed | None], None], keep: Callable[[ssl.SSLSession], None]) -> None:
        """Begin the handshake: `done(None)`, or `done(Failed)` all closed.  `keep` gets a session, if one comes."""
        self.done, self.keep = done, keep
        self.below.on_data = self._on_shake
        self._on_shake(b"")

    def send(self, data: bytes | bytearray | memoryview) -> None:
        if not self.is_open or not data:
            return
        try:
            self.tls.write(data)
        except ssl.SSLError:
            return  # the other side has ended TLS: `on_end` says so
        self.below.send(self.outgoing.read())

    def use(self, buffers: Sequence[memoryview]) -> None:
        super().use(buffers)
        if buffers[1:]:
            self.below.use(buffers[1:])

    def pause(self) -> None:
        self.below.pause()

    def resume(self) -> None:
        self.below.resume()

    def close(self) -> None:
        if self.leave():
            self._close_below()

    def reset(self) -> None:
        if self.leave():
            self.below.reset()

    def _on_shake(self, data: bytes) -> None:
        """One more step of the handshake."""
        self.incoming.write(data)
        self.taken += len(data)
        failed = None
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            if self.taken <= FLIGHT_MAX:
                self.below.send(self.outgoing.read())
                return
            failed = Failed("tls", "its handshake has no end")
        except ssl.SSLCertVerificationError as error:
            failed = Failed("certificate", error.verify_message)
        except ssl.SSLError as error:
            failed = Failed("tls", tls_words(error))
        self.below.send(self.outgoing.read())  # its last words, also where it has failed: an alert
        if failed is not None:
            self.leave()
            self.below.close()
            self.done(failed)
            return
        self.below.on_data = self._on_bytes
        done, self.done = self.done, unheard
        done(None)
        if self.is_open:
            self._decrypt()  # what came with the end of the handshake

    def _on_bytes(self, data: bytes | memoryview) -> None:
        self.incoming.write(data)
        self._decrypt()

    def _decrypt(self) -> None:
        """Hand over all that has come, in one piece."""
        read, buffer = self.tls.read, self.buffer
        pieces, size = [], 0
        ended: Failed | None | bool = False
        try:
            if buffer is None:
                while piece := read(RECORD):
                    pieces.append(piece)
            else:
                while count := read(RECORD, buffer[size:]):
                    size += count
                    if size > len(buffer) - RECORD:
                        self.on_data(buffer[:size])
                        size = 0
            ended = None
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            ended = Failed("tls", tls_words(error))
        if self.outgoing.pending:  # a new key, RFC 8446 section 4.6.3
            self.below.send(self.outgoing.read())
        if pieces:
            if self.keep is not None:
                self._keep()
            self.on_data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        elif size and buffer is not None:
            self.on_data(buffer[:size])
        if ended is not False and self.is_open:
            self._close_below()
            self.ended(ended)

    def _close_below(self) -> None:
        """End TLS, and close."""
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            pass  # the other side's own end has not come yet, or the handshake is not over
        self.below.send(self.outgoing.read())
        self.below.close()

    def _keep(self) -> None:
        """Keep the session: with TLS 1.3 it has come behind the handshake, before the server's first words."""
        keep, self.keep = self.keep, None
        if not self.tls.session_reused:  # reading one costs 0.6 ms: not for each connection
            session = self.tls.session
            if session is not None and session.has_ticket:
                keep(session)

    def _on_room(self) -> None:
        self.on_room()

    def _on_end(self, error: Failed | None) -> None:
        """The wire below has ended.  An end without TLS's own word is a cut: anybody between could have made it."""
        if self.done is unheard:
            self.ended(error or Failed("reset", "it ended without the end of TLS"))
        elif self.leave():
            self.done(Failed("reset", "in the TLS handshake"))


def tls_words(error: ssl.SSLError) -> str:
    """What went wrong in TLS, for people."""
    return (error.reason or error.strerror or str(error)).lower().replace("_", " ")


# -- proxies -----------------------------------------------------------------------------------

# A talk with a proxy is a generator: it yields what is to be sent, is sent all that has come since, and returns when
# the connection leads to the server.  It raises Failed, `proxy`.
Talk = Generator[bytes, bytes, None]


def connect_talk(proxy: Proxy, host: str, port: int) -> Talk:
    """CONNECT of HTTP.  Source: RFC 9110 section 9.3.6."""
    login = "Basic " + base64.b64encode(with_colon(proxy)).decode() if proxy.login is not None else ""
    head = yield connect_request(host, port, login)
    try:
        while (answer := parse_answer(head)) is None:
            head += yield b""
    except Malformed as error:
        raise Failed("proxy", str(error)) from None
    if not 200 <= answer.status < 300:
        raise Failed("proxy", f"HTTP {answer.status}")
    if len(head) > answer.end:  # it would be lost; a server does not speak first
        raise Failed("proxy", "it said more than its answer")


def with_colon(proxy: Proxy) -> bytes:
    """USER:PASSWORD, where the URL may have said USER alone."""
    assert proxy.login is not None
    return proxy.login.value if b":" in proxy.login.value else proxy.login.value + b":"


SOCKS = 5  # the version
NO_LOGIN, LOGIN = 0, 2  # methods, RFC 1928 section 3
SOCKS_FAILURES = {  # RFC 1928 section 6
    1: "general failure", 2: "not allowed by its rules", 3: "network unreachable", 4: "host unreachable",
    5: "connection refused", 6: "the time to live has expired", 7: "it cannot connect",
    8: "it does not know this kind of address",
}


def socks_talk(proxy: Proxy, host: str, port: int) -> Talk:
    """SOCKS5; the proxy resolves the name.  Source: RFC 1928, and RFC 1929 for the login."""
    data = b""

    def take(said: bytes, count: int) -> Generator[bytes, bytes, bytes]:
        """Say something, and wait for so many bytes."""
        nonlocal data
        while said or len(data) < count:
            data += yield said
            said = b""
        taken, data = data[:count], data[count:]
        return taken

    methods = bytes((NO_LOGIN, LOGIN) if proxy.login else (NO_LOGIN,))
    version, method = yield from take(bytes((SOCKS, len(methods))) + methods, 2)
    if version != SOCKS or method not in methods:
        raise Failed("proxy", "it is no SOCKS5" if version != SOCKS else "it wants another login")
    if method == LOGIN:
        user, _, password = with_colon(proxy).partition(b":")
        if len(user) > 255 or len(password) > 255:
            raise Failed("proxy", "SOCKS5 takes names and passwords of 255 bytes at most")
        status = yield from take(b"\1" + bytes((len(user),)) + user + bytes((len(password),)) + password, 2)
        if status[1]:
            raise Failed("proxy", "it refused the login")
    version, code, _, kind = yield from take(bytes((SOCKS, 1, 0)) + socks_address(host, port), 4)
    if version != SOCKS or code:
        raise Failed("proxy", SOCKS_FAILURES.get(code, f"SOCKS5 failure {code}"))
    size = {1: 4, 4: 16}.get(kind, -1)
    if size < 0:
        size, = yield from take(b"", 1)
    yield from take(b"", size + 2)
    if data:
        raise Failed("proxy", "it said more than its answer")


def socks_address(host: str, port: int) -> bytes:
    """A destination.  Source: RFC 1928 section 5."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.encode("ascii")
        if len(name) > 255:
            raise Failed("proxy", "SOCKS5 takes names of 255 bytes at most") from None
        return bytes((3, len(name))) + name + struct.pack(">H", port)
    return bytes((1 if address.version == 4 else 4,)) + address.packed + struct.pack(">H", port)


TALKS: dict[str, Callable[[Proxy, str, int], Talk]] = {
    "http": connect_talk, "https": connect_talk, "socks5": socks_talk, "socks5h": socks_talk,
}


# -- from nothing to a wire --------------------------------------------------------------------


class Place:
    """Where connections lead to.  Those to one Place are as good as each other."""

    __slots__ = ("host", "port", "tls", "name", "proxy", "proxy_tls", "session")

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, name: str, proxy: Proxy | None = None,
                 proxy_tls: ssl.SSLContext | None = None):
        self.host = host
        self.port = port
        self.tls = tls  # with what we trust, and our certificate; None: plain HTTP
        self.name = name  # that the server's certificate has to have
        self.proxy = proxy
        self.proxy_tls = proxy_tls
        self.session: ssl.SSLSession | None = None

    def __str__(self) -> str:
        """For people."""
        return show_address((self.host, self.port))

    def keep(self, session: ssl.SSLSession) -> None:
        """Use this TLS session the next time."""
        self.session = session


# The phases of an opening, beside those of its Dial.
PROXYING, SHAKING = "asking the proxy", "TLS handshake"


class Opening:
    """A connection in the making.  All methods run in the loop.

    After `start`, unless it is cancelled, `done` is called once, perhaps before `start` returns: with a Wire that has
    no owner yet, or with Failed, and nothing is left open.

    Args:
        way: by which its Dial goes; one without a proxy where `place` has one.
    """

    __slots__ = ("wires", "place", "done", "dial", "wire", "steps", "talk", "own_phase")

    plain: type[Plain] = Plain  # what the wires are made of
    secure: type[Secure] = Secure

    def __init__(self, wires: Wires, way: WayOut, place: Place, done: Callable[[Wire | Failed], None]):
        self.wires = wires
        self.place = place
        self.done: Callable[[Wire | Failed], None] | None = done
        proxy = place.proxy
        start = (place.host, place.port) if proxy is None else (proxy.host, proxy.port)
        self.dial = Dial(way, *start, self._dialled)
        self.wire: Wire | None = None  # as far as it is made
        self.talk: Talk | None = None  # with the proxy
        self.own_phase = ""  # PROXYING, SHAKING or OVER; "" while the phase is the dial's
        self.steps: list[Callable[[], None]] = []  # still to be done
        if place.proxy_tls is not None:
            self.steps.append(self._secure_proxy)
        if proxy is not None:
            self.steps.append(self._ask_proxy)
        if place.tls is not None:
            self.steps.append(self._secure)

    @property
    def phase(self) -> str:
        """What it waits for."""
        return self.own_phase or self.dial.phase

    def start(self) -> None:
        """Begin."""
        self.dial.start()

    def cancel(self) -> None:
        """Close everything, and never call `done`.  Does nothing where it is over."""
        if self.done is not None:
            self.done = None
            self.dial.cancel()
            wire, self.wire = self.wire, None  # a dial and this know each other: only what is small waits with them
            if wire is not None:
                wire.reset()

    def _dialled(self, result: socket.socket | Failed) -> None:
        if isinstance(result, Failed):
            if self.place.proxy is not None:
                where = show_address((self.place.proxy.host, self.place.proxy.port))
                result = Failed("proxy", f"{where}: {result}")
            self._end(result)
            return
        self.wire = self.plain(self.wires, result)
        self._next()

    def _next(self) -> None:
        """Do the next step."""
        if self.steps:
            self.steps.pop(0)()
        else:
            wire, self.wire = self.wire, None
            wire.on_data = wire.on_end = wire.on_room = unheard
            self._end(wire)

    def _end(self, result: Wire | Failed) -> None:
        done, self.done = self.done, None
        self.own_phase = OVER
        if done is not None:
            done(result)

    def _secure_proxy(self) -> None:
        self._shake(self.place.proxy_tls, self.place.proxy.host, None, unheard, "proxy")

    def _secure(self) -> None:
        self._shake(self.place.tls, self.place.name, self.place.session, self.place.keep, "")

    def _shake(self, context: ssl.SSLContext, name: str, session: ssl.SSLSession | None,
               keep: Callable[[ssl.SSLSession], None], reason: str) -> None:
        """Put TLS over what there is.  `reason`: the word for all that may fail, "" where it has its own."""
        self.own_phase = SHAKING
        try:
            secure = self.secure(self.wire, context, name, session)
        except ValueError as error:  # a name that TLS cannot ask for
            self.wire.reset()
            self._end(Failed(reason or "tls", str(error)))
            return
        self.wire = secure

        def done(failed: Failed | None) -> None:
            if failed is None:
                self._next()
            else:
                self._end(Failed(reason, f"TLS to the proxy: {failed}") if reason else failed)

        secure.shake(done, keep)

    def _ask_proxy(self) -> None:
        self.own_phase = PROXYING
        self.talk = TALKS[self.place.proxy.scheme](self.place.proxy, self.place.host, self.place.port)
        self.wire.on_data = self._heard
        self.wire.on_end = self._proxy_ended
        self.wire.send(next(self.talk))

    def _heard(self, data: bytes) -> None:
        """The proxy has said something."""
        try:
            self.wire.send(self.talk.send(data))
        except StopIteration:
            self.talk = None
            self._next()
        except Failed as failed:
            self.wire.reset()
            self._end(failed)

    def _proxy_ended(self, error: Failed | None) -> None:
        self._end(Failed("proxy", f"it closed the connection{f': {error}' if error else ''}"))
