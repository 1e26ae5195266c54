"""sniroute_duplex: connections of which each direction ends by itself: TCP, TLS, WebSocket.

    owner --- send, finish --------> WebSocketWire ------> TlsWire ---------> TcpWire --- bytes, then FIN ---> peer
          <-- on_data, on_end(None)  messages, and Close   close_notify               <-- bytes, then FIN ----

Any of the three may be what the owner has: plain TCP, TLS, `ws://`, `wss://`.  Each serves a client, and a server.

A wire of this room is a Wire of sniroute_layers whose two directions are two things:

    on_end(None)      the peer has ended ITS direction; the wire takes what is sent as before.  At most once
    on_end(Failed)    it has broken off, and is closed.  At most once, perhaps behind on_end(None); nothing follows
    finish()          end OUR direction behind what is unsent.  Reading goes on.  Send nothing after it

When both directions are over the wire closes by itself: in on_end(None), where the peer is the last to end, and without
a word, where `finish` is.  `close` and `reset` end both directions at once.

An owner that wants the socket, to move bytes in the kernel, asks for it by `raw`.

Threads: the loop's only.

Seams: I want to ...
    another kind of wire     a subclass of Duplex, as WebSocketWire
    trust otherwise          client_context; who we are: Certificates

This room imports sniroute_layers (Wire), sniroute_upgrade (frames), sniroute_loop, sniroute_names and
sniroute_refusals; and sniroute_certificate where it makes a certificate.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Callable, Iterable, Sequence

from sniroute_layers import RECORD, ROOM, Opening, Plain, Secure, Wire, Wires, asked_name, load_ssl, tls_words, unheard
from sniroute_loop import monotonic, unsent
from sniroute_names import printable
from sniroute_refusals import Failed, Malformed, SettingsError
from sniroute_upgrade import BINARY, CHUNK, CLOSE, PING, PONG, ZERO, EitherReader, frame

if TYPE_CHECKING:
    import ssl

    from sniroute_certificate import Pair

__version__ = "0.1.0"

Peer = tuple[str, int]  # an address, as in a log

SLOW = 1 << 14  # bytes that a closed wire's peer has to take each LINGER; else it is not slow, but gone, or hostile

STEP = 1 << 14  # bytes at a time through OpenSSL's buffers, which never shrink: four times that is 8 % faster
LINGERING_MAX = 2048  # closed wires whose peers have not ended yet: the oldest goes.  10 s of 200 closes a second
LOOK_EVERY = 1.0  # seconds between two looks at whether a certificate's files have changed
PEM_BEGIN, PEM_END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"  # RFC 7468 section 5
CERTIFICATE_MAX = 1 << 20  # bytes of a file with certificates that are read
LIFE = 3650 * 86400  # seconds for which a certificate made on the spot is valid: it is compared, not checked

# What a direction may be.
OPEN, ENDING, OVER = "open", "ending", "over"


class Duplex(Wire):
    """What wires have whose directions end one by one, beside what a Wire has."""

    __slots__ = ()

    protocol = ""  # what both have agreed to speak (ALPN)
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

    def close(self) -> None:
        super().close()
        if len(lingering := self.wires.lingering.due) > LINGERING_MAX:
            next(iter(lingering)).drop()

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


# -- TLS ---------------------------------------------------------------------------------------


def load_tls() -> None:
    """Have `ssl` here, and `hashlib`, which brings the same library.  They take 5 MB, which an end without TLS does not
    need."""
    global hashlib, ssl
    import hashlib
    import ssl
    load_ssl()  # for Secure


class TlsWire(Secure, Duplex):
    """TLS over another wire, which it owns, on either side.  Its owner waits for `shake` before it sends.

    Our end is `close_notify`, and so is the peer's: an end of the wire below without one is a cut, which anybody
    between could have made.  Source: RFC 8446 section 6.1.

    OpenSSL's buffers never shrink: so STEP bytes at a time pass through them, however many came at once.

    Args:
        below: a wire that nobody else uses; a Duplex.
        name: that the server's certificate has to have, on the client's side; "" asks for none.
        session: not used.  A resumed handshake takes 0.61 ms of CPU at both ends together, and a whole one 0.70.
        server_side: whether we are the server.
    """

    __slots__ = ("hears", "says", "is_busy", "print")

    def __init__(self, below: Wire, context: ssl.SSLContext, name: str = "", session: ssl.SSLSession | None = None,
                 server_side: bool = False):
        Wire.__init__(self)
        load_tls()
        self.below = below
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side, asked_name(name) if name else None)
        self.taken = 0
        self.done: Callable[[Failed | None], None] = unheard
        self.keep = None
        self.hears = True  # as in TcpWire
        self.says = OPEN
        self.is_busy = False  # bytes are being decrypted.  To say the end OpenSSL must have none that it has not read
        self.print = ""
        below.on_end = self._on_end
        below.on_room = self._on_room

    @property
    def peer(self) -> Peer:  # type: ignore[override]
        return self.below.peer  # type: ignore[attr-defined]

    @property
    def protocol(self) -> str:
        """What both have agreed to speak (ALPN); "": nothing."""
        return self.tls.selected_alpn_protocol() or ""

    def fingerprint(self) -> str:
        return self.print

    def shake(self, done: Callable[[Failed | None], None], keep: Callable[[ssl.SSLSession], None] = unheard,
              early: bytes = b"") -> None:
        """As Secure's.  `early`: what the peer has said already, where it began."""

        def shaken(failed: Failed | None) -> None:
            self.done = unheard
            if failed is None and (certificate := self.tls.getpeercert(True)):  # later, in an error, it is not told
                self.print = sys.intern(fingerprint(certificate))  # one string for a thousand connections
            done(failed)

        super().shake(shaken, keep)
        if early:
            self._on_shake(early)

    def send(self, data: bytes | bytearray | memoryview) -> None:
        if not self.is_open or self.says is not OPEN or not data:
            return
        try:
            if len(data) <= STEP:
                self.tls.write(data)
                self.below.send(self.outgoing.read())
                return
            view = memoryview(data)
            for at in range(0, len(view), STEP):
                self.tls.write(view[at:at + STEP])
                self.below.send(self.outgoing.read())
        except ssl.SSLError:
            return  # it has broken: `on_end` says so

    def close(self) -> None:
        super().close()
        self.done = unheard  # which knows this wire: 30 KiB would wait for the collector of garbage, each

    def reset(self) -> None:
        super().reset()
        self.done = unheard

    def finish(self) -> None:
        if self.is_open and self.says is OPEN:
            self.says = ENDING
            if not self.is_busy:
                self._say_end()

    def _say_end(self) -> None:
        """Say `close_notify`."""
        self.says = OVER
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            pass  # the other side's own end has not come yet
        self.below.send(self.outgoing.read())
        if not self.hears and self.leave():
            self.below.close()

    def _on_bytes(self, data: bytes | memoryview) -> None:
        self._decrypt(data)

    def _decrypt(self, data: bytes | memoryview = b"") -> None:
        """Hand over what has come, in large pieces."""
        read, buffer, incoming = self.tls.read, self.buffer, self.incoming
        pieces, size = [], 0
        ended: Failed | None | bool = False
        self.is_busy = True
        try:
            for at in range(0, len(data) or 1, STEP):
                incoming.write(data if len(data) <= STEP else data[at:at + STEP])
                try:
                    while incoming.pending:
                        if buffer is None:
                            count = len(piece := read(RECORD))
                            pieces.append(piece)
                        else:
                            count = read(RECORD, buffer[size:])
                            size += count
                            if size > len(buffer) - RECORD:
                                self.on_data(buffer[:size])
                                size = 0
                        if not count:
                            raise ssl.SSLZeroReturnError
                except ssl.SSLWantReadError:
                    pass
        except ssl.SSLZeroReturnError:  # `read` says so itself where our own end was said
            ended = None
        except ssl.SSLError as error:
            ended = Failed("tls", tls_words(error))
        if self.outgoing.pending:  # a new key, RFC 8446 section 4.6.3; an alert
            self.below.send(self.outgoing.read())
        if pieces and pieces != [b""]:
            self.on_data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        elif size and buffer is not None:
            self.on_data(buffer[:size])
        self.is_busy = False
        if self.says is ENDING and self.is_open:
            self._say_end()
        if ended is not False and self.is_open:
            self._heard_end(ended)

    def _heard_end(self, ended: Failed | None) -> None:
        """TLS's own end has come, or it has broken."""
        self.hears = False
        self.below.on_data = unheard
        if ended is None and self.says is not OVER:
            self.on_end(None)
            return
        self.below.close()
        self.ended(ended)

    def _on_end(self, error: Failed | None) -> None:
        if error is None and not self.hears:
            return  # it was said in TLS before
        self.below.close()
        if self.done is unheard:
            self.ended(error or Failed("reset", "it ended without the end of TLS"))
        elif self.leave():
            self.done(Failed("reset", "in the TLS handshake"))


class DuplexOpening(Opening):
    """An Opening that gives a TcpWire, or a TlsWire."""

    __slots__ = ()

    plain = TcpWire
    secure = TlsWire


def accept_tls(wires: Wires, sock: socket.socket, context: ssl.SSLContext, done: Callable[[TlsWire | Failed], None],
               peer: Peer | None = None) -> TlsWire:
    """Be the server of a TLS handshake on an accepted socket, which is non-blocking: `done(wire)`, or `done(Failed)`.

    There is no deadline: its owner has one, and then calls `reset` of what this returns, which `done` is not told.
    """
    wire = TlsWire(TcpWire(wires, sock, peer), context, server_side=True)
    wire.shake(lambda failed: done(wire if failed is None else failed))
    return wire


def fingerprint(certificate: bytes) -> str:
    """How NodePass names a certificate, DER: `sha256:` and lower hex."""
    return "sha256:" + hashlib.sha256(certificate).hexdigest()


# -- WebSocket ---------------------------------------------------------------------------------

NORMAL, GOING_AWAY, NO_CODE = 1000, 1001, 1005  # RFC 6455 section 7.4.1


class WebSocketWire(Duplex):
    """Binary messages over another wire, which it owns, once the upgrade is done: where they end means nothing.

    Our end is a Close, and so is the peer's; it is not answered before our side ends, too, so that a peer of our kind
    may hear us out.  A peer that follows RFC 6455 to the letter closes the connection.  Source: RFC 6455 section 5.

    A client in TLS masks with the key 0, which costs nothing: a mask keeps proxies from taking our bytes for HTTP
    (section 10.3), and in TLS no proxy sees them.

    Args:
        below: a wire that nobody else uses; a Duplex.
        is_client: whether we are the client.
    """

    __slots__ = ("below", "is_client", "reader", "hears", "says")

    def __init__(self, below: Wire, is_client: bool):
        super().__init__()
        self.below = below
        self.is_client = is_client
        self.reader = EitherReader(not is_client)
        self.hears = True  # as in TcpWire
        self.says = OPEN
        below.on_data = self.hear
        below.on_end = self._on_end
        below.on_room = self._on_room

    @property
    def peer(self) -> Peer:  # type: ignore[override]
        return self.below.peer  # type: ignore[attr-defined]

    def fingerprint(self) -> str:
        return self.below.fingerprint()  # type: ignore[attr-defined]

    @property
    def unsent(self) -> int:
        return self.below.unsent

    def use(self, buffers: Sequence[memoryview]) -> None:
        super().use(buffers)
        if buffers[1:]:
            self.below.use(buffers[1:])

    def pause(self) -> None:
        self.below.pause()

    def resume(self) -> None:
        self.below.resume()

    def send(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_open and self.says is OPEN and data:
            self.below.send(self._framed(BINARY, data))

    def _framed(self, opcode: int, data: bytes | bytearray | memoryview) -> bytes:
        """`data` in as many messages as it takes."""
        parts: list[bytes | memoryview] = []
        view = memoryview(data)
        for at in range(0, len(view) or 1, CHUNK):
            piece = view[at:at + CHUNK]
            size = len(piece)
            if self.is_client and not isinstance(self.below, TlsWire):
                parts.append(frame(opcode, piece))
                continue
            bit = 0x80 if self.is_client else 0
            if size < 126:
                parts.append(bytes((0x80 | opcode, bit | size)))
            else:
                parts.append(bytes((0x80 | opcode, bit | 126, size >> 8, size & 0xFF)))
            if self.is_client:
                parts.append(ZERO)
            parts.append(piece)
        return b"".join(parts)

    def finish(self) -> None:
        if self.is_open and self.says is OPEN:
            self._say_close(NORMAL)
            if not self.hears and self.leave():
                self.below.close()

    def close(self) -> None:
        if self.leave():
            self._say_close(NORMAL)
            self.below.close()

    def reset(self) -> None:
        if self.leave():
            self.below.reset()

    def _say_close(self, code: int) -> None:
        """Say Close, once."""
        if self.says is OPEN:
            self.says = OVER
            self.below.send(self._framed(CLOSE, code.to_bytes(2, "big")))

    def hear(self, data: bytes | memoryview) -> None:
        """Bytes of the wire below; from whoever made the upgrade those that came behind it, once there is an owner."""
        try:
            pieces, controls = self.reader.read(memoryview(data))
        except Malformed as error:
            self._break(self.reader.code, Failed("reset", str(error)))
            return
        for opcode, payload in controls:  # a ping means nothing for the data around it
            if opcode == PING and self.says is OPEN and self.below.unsent <= ROOM:  # not for one that takes no answers
                self.below.send(self._framed(PONG, payload))
        if len(pieces) == 1:
            self.on_data(pieces[0])  # type: ignore[arg-type]
        elif pieces:
            self.on_data(self._joined(pieces))  # type: ignore[arg-type]
        if controls and controls[-1][0] == CLOSE and self.is_open:
            self._heard_close(int.from_bytes(controls[-1][1][:2], "big") or NO_CODE)

    def _joined(self, pieces: list[bytes | memoryview]) -> bytes | memoryview:
        """Several pieces as one."""
        buffer, at = self.buffer, 0
        if buffer is None or sum(map(len, pieces)) > len(buffer):  # TLS without a buffer may give a record more
            return b"".join(pieces)
        for piece in pieces:
            buffer[at:at + len(piece)] = piece
            at += len(piece)
        return buffer[:at]

    def _heard_close(self, code: int) -> None:
        """The peer says that it has ended; most codes say that something is wrong."""
        self.hears = False
        self.below.on_data = unheard
        if code not in (NORMAL, GOING_AWAY, NO_CODE):
            self._break(NORMAL, Failed("reset", f"the other end has closed the WebSocket with {code}"))
        elif self.says is OPEN:
            self.on_end(None)
        else:
            self.below.close()
            self.ended(None)

    def _break(self, code: int, failed: Failed) -> None:
        """It is over: a rule was broken, here or there."""
        self._say_close(code)
        self.below.close()
        self.ended(failed)

    def _on_room(self) -> None:
        self.on_room()

    def _on_end(self, error: Failed | None) -> None:
        if error is None and not self.hears:
            return  # it was said by a Close before
        self.below.close()
        self.ended(error or Failed("reset", "it ended without a Close"))


# -- contexts, and who we are ------------------------------------------------------------------


def _modern(context: ssl.SSLContext, protocols: Iterable[str]) -> ssl.SSLContext:
    """TLS 1.3, and no cut that passes for an end."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # Debian's Python sets it
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def client_context(is_checked: bool, protocols: Iterable[str] = (), authorities: str | None = None) -> ssl.SSLContext:
    """The context of a client.  Loads the trust store where `is_checked`: 20 ms.

    Args:
        is_checked: whether the certificate has to be for the server's name, from an authority that this host trusts.
        protocols: what we speak (ALPN), the best first.
        authorities: the path of a file with authorities, in place of this host's (or of SSL_CERT_FILE).

    Raises OSError, also ssl.SSLError, for that file.
    """
    load_tls()
    if is_checked:
        context = ssl.create_default_context(cafile=authorities)
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return _modern(context, protocols)


def server_context(certificate: Pair | tuple[str, str], protocols: Iterable[str] = ()) -> ssl.SSLContext:
    """The context of a server.  Any thread but a busy loop's: it opens files.

    Args:
        certificate: a Pair; or the paths of two files, PEM: the certificate, with the chain behind it, and its key.
        protocols: what we speak (ALPN); a client that speaks none of them, or says nothing, is taken all the same.

    Raises OSError, also ssl.SSLError.
    """
    load_tls()
    context = _modern(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), protocols)
    # No tickets: nobody resumes, they would be 500 bytes for each connection, and a client that closes before it has
    # read them resets the connection.
    context.num_tickets = 0
    # The client knows what its machine does fast: Go puts AES-128 first, OpenSSL AES-256.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    if len(certificate) == 2:
        context.load_cert_chain(*certificate, password=no_password)
    else:
        from sniroute_certificate import load  # as in `make_pair`
        load(context, certificate)
    return context


def no_password() -> str:
    """Instead of a question on the terminal."""
    raise ssl.SSLError("its key is encrypted; sniroute takes keys without a password")


class Certificates:
    """Who a server is: a certificate made on the spot, or one in files, which are read again when they change.

    Args:
        files: the paths of the certificate and of its key, PEM; None: one is made now.
        name: for which one is made, where it can be for it; nobody checks that.
        tell: told in words that the files were read again, or why the ones before are still in use.
        clock: seconds that never go back.

    Raises SettingsError where the files cannot be used now.
    """

    def __init__(self, files: tuple[str, str] | None, name: str = "", tell: Callable[[str], None] = unheard,
                 clock: Callable[[], float] = monotonic):
        load_tls()
        self.files = files
        self.protocols: tuple[str, ...] = ()
        self.tell = tell
        self.clock = clock
        self.stamp: list[tuple[int, ...]] = []  # of the files as they were when they were read
        self.trouble = ""  # what was told last
        self.looked = clock()
        if files is None:
            pair = make_pair(name)
            self.made = server_context(pair, self.protocols)
            self.fingerprint = fingerprint(pair.certificate)
            return
        try:
            self._read(self._stamp())
        except (OSError, ValueError) as error:
            raise SettingsError(f"crt, key: {self._words(error)}") from None

    def speak(self, protocols: Iterable[str]) -> None:
        """Have connections agree on these from now on (ALPN), the best first."""
        self.protocols = tuple(protocols)
        if self.protocols:
            self.made.set_alpn_protocols(list(self.protocols))

    @property
    def context(self) -> ssl.SSLContext:
        """The context for the next connection.  Looks at the files now and then."""
        if self.files is not None and self.clock() - self.looked >= LOOK_EVERY:
            self.looked = self.clock()
            self._look()
        return self.made

    def _look(self) -> None:
        """Read the files again, where they have changed.  Those that cannot be used are tried again each time."""
        words = ""
        try:
            if (stamp := self._stamp()) != self.stamp:
                self._read(stamp)
                self.tell(f"the certificate in {printable(self.files[0])} was read again")
        except (OSError, ValueError) as error:
            words = self._words(error)
            if words != self.trouble:
                self.tell(f"the certificate before is still in use: {words}")
        self.trouble = words

    def _stamp(self) -> list[tuple[int, ...]]:
        """What changes when the files do.  Raises OSError."""
        status = [os.stat(path) for path in self.files]
        return [(each.st_mtime_ns, each.st_size, each.st_ino, each.st_dev) for each in status]

    def _read(self, stamp: list[tuple[int, ...]]) -> None:
        """Read the files.  Raises OSError, ValueError."""
        made = server_context(self.files, self.protocols)
        with open(self.files[0], encoding="latin-1") as file:
            text = file.read(CERTIFICATE_MAX)
        begin, end = text.index(PEM_BEGIN), text.index(PEM_END) + len(PEM_END)
        self.fingerprint = fingerprint(ssl.PEM_cert_to_DER_cert(text[begin:end]))  # the first one is ours
        self.made, self.stamp = made, stamp

    def _words(self, error: OSError | ValueError) -> str:
        """What is wrong with the files."""
        if isinstance(error, ssl.SSLError):
            why = tls_words(error) if error.reason else "it is no PEM"
        else:
            why = (error.strerror or str(error)).lower() if isinstance(error, OSError) else "it is no certificate"
        path = getattr(error, "filename", None)
        return f"{printable(path or ', '.join(self.files))}: {why}"


def make_pair(name: str) -> Pair:
    """A new certificate for a name or an address, or, where one cannot be for it, for another."""
    from sniroute_certificate import self_signed  # 0.4 MB, for who makes one
    now = time.time()
    try:
        return self_signed(ipaddress.ip_address(name), now, LIFE)
    except ValueError:
        pass
    try:
        return self_signed(name, now, LIFE)
    except Malformed:
        return self_signed("nodepass.invalid", now, LIFE)
