"""sniroute_lanes: the kinds of pool: from nothing to a connection that may be used, at both ends of a tunnel.

    client   shake -------> TLS, ask, Terms -------------------------------------------------> done(Terms)
             Lanes.open --> TCP [TLS] | [TLS] upgrade to WebSocket | a stream in TLS, HTTP/2 --> done(wire)

    server   Reception.receive(socket)
                 Guest: its first byte, or silence (type 0, no TLS) -----------------------> arrived(wire, address)
                   TLS ----> what it speaks, or silence (type 0) --------------------------> arrived
                    |    `-> HTTP/2 (type 3): its streams ---------------------------------> arrived, each
                    `------> a request ---+- it asks for WebSocket (type 2) ---------------> arrived
                   [type 2, no TLS] ------'`- anything else is the handshake --------------> asked(Ask, wire)

A wire that has arrived is at the point where the server says the 4 bytes of its id; one that was opened is where they
come.  Both have no owner yet.

A server has one listener for its whole life, so handshakes and connections of the pool come in at one place, and are
told apart by what they say first.  Where a connection of the pool says nothing before it has its id (type 0), and the
pool is expected, GRACE of silence makes it one.  A client that has come back, or a second one, speaks at once: its
hello travels right behind its connect, and its request right behind TLS.  What comes later the owner sees as data.

Who is not done within the time for a handshake is closed, whatever it was doing.  There is room for STRANGERS_MAX, and
for SITE_MAX of one site; beyond that the one goes that has waited longest.  The client that has the tunnel has
room of its own, since it opens a whole pool at once.

What a client trusts is a row of a table, by `tls` of the terms.  `pin` stands above it: the certificate of every
connection has to be that one, the handshake's too, before anything is sent.

Threads: the loop's only.

Seams: I want to ...
    another kind of pool        a row in LANES, and one in KINDS
    trust otherwise             `trust`
    admit more at a time        a limit below

This room imports sniroute_duplex (wires, certificates), sniroute_signals (the handshake), sniroute_nodeurl,
sniroute_layers (Place), sniroute_offload, sniroute_upgrade, sniroute_http, sniroute_loop, sniroute_names and
sniroute_refusals; sniroute_streams where a pool is HTTP/2.
"""

from __future__ import annotations

import base64
import functools
import socket
import time
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from sniroute_duplex import (Certificates, Duplex, DuplexOpening, TcpWire, TlsWire, WebSocketWire, client_context)
from sniroute_http import read_lines
from sniroute_layers import Place, Wire, unheard
from sniroute_loop import Alarm, monotonic
from sniroute_names import printable, show_address, site_of
from sniroute_nodeurl import NO_NAME, Options
from sniroute_offload import Offload, Order, is_worth_it
from sniroute_refusals import Failed, Malformed
from sniroute_signals import Ask, Terms, ask, http_date, parse_ask, parse_terms, refusal, token_of
from sniroute_upgrade import check_upgrade, new_key, parse_answer, upgrade_answer

if TYPE_CHECKING:
    import ssl

    from sniroute_streams import H2Client, H2Server, StreamWire

__version__ = "0.1.0"

# Limits, each with its reason.
STRANGERS_MAX = 256  # connections that are not told apart yet: 256 TLS handshakes are half a second of one core
SITE_MAX = 32  # of them from one site: an address, or a /64 of IPv6
FRIENDS_MAX = 1024  # of the client that has the tunnel: as many as a pool has at most by itself
GRACE = 0.002  # seconds: twenty times what a program needs from its connect to its first words, and no caller notices
SESSIONS_MAX = 64  # HTTP/2 connections of a server: a client has one, and another while it comes back
CARRIERS_MAX = 8  # HTTP/2 connections of a client, of which all but one take no more: a peer can say so of each
ANSWER_MAX = 8192  # bytes of an answer to the upgrade: the original's has 130

TLS_HELLO = 0x16  # the first byte of TLS: a handshake record, RFC 8446 section 5.1
H2_PROTOCOL = "h2"  # ALPN, RFC 9113 section 3.2

FULL = (b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"X-Content-Type-Options: nosniff\r\nContent-Length: 10\r\n\r\npool full\n")  # the original's words
NOT_PLAIN = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"  # the original's

Done = Callable[[Any], None]  # is given what was asked for, or Failed


# -- the client's side -------------------------------------------------------------------------


def trust(options: Options, code: int, name: str, protocols: tuple[str, ...] = ()) -> tuple[ssl.SSLContext | None, str]:
    """With what TLS a client meets its server: a context, and the name to ask for; None: there is no TLS.

    Args:
        code: 0 no TLS; 1 no certificate is checked; 2 it has to be for `name`, from an authority of this host.
    """
    if not code:
        return None, ""
    if options.pin:  # the certificate itself is known, so nobody has to vouch for it
        return client_context(False, protocols), name if code == 2 else ""
    return client_context(code == 2, protocols), name if code == 2 else ""


def name_of(options: Options) -> str:
    """The name that the server's certificate has to have: the one of TLS, or the address where there is none."""
    return options.server_name if options.server_name != NO_NAME else options.host or "127.0.0.1"


def pinned(wire: Duplex, pin: str, seen: str) -> Duplex | Failed:
    """A connection on which the certificate `seen` was shown: it is given back where that is the one of `pin`."""
    if not pin or seen == pin:
        return wire
    wire.reset()
    return Failed("certificate", f"the server's certificate is {seen}, and not the one of pin=" if seen else
                  "pin= is set, and the connection has no TLS")


class Approach:
    """A connection to the server in the making: dialled, in TLS where there is a context, and with the right pin.

    `done` is called once, perhaps before this returns, unless it is cancelled.  There is no deadline: its owner has it.
    """

    __slots__ = ("pin", "done", "opening")

    def __init__(self, end: Any, tls: ssl.SSLContext | None, name: str, done: Done):
        self.pin = end.options.pin
        self.done = done
        place = Place(end.options.host or "127.0.0.1", end.options.port, tls, name)
        self.opening = DuplexOpening(end.program.wires, end.program.way, place, self._opened)

    @property
    def phase(self) -> str:
        """What it waits for."""
        return self.opening.phase

    def start(self) -> None:
        """Begin."""
        self.opening.start()

    def cancel(self) -> None:
        """Close everything, and never call `done`."""
        self.done = unheard
        self.opening.cancel()

    def _opened(self, result: Duplex | Failed) -> None:
        done, self.done = self.done, unheard  # else a wire with its TLS waits for the collector of garbage
        done(result if isinstance(result, Failed) else pinned(result, self.pin, result.fingerprint()))


class Handshake:
    """The first thing that a client asks: the terms.

    Where a client's own `tls` is 2 the certificate is checked here, too: the token that is sent never changes, so who
    hears it once has it for ever.
    """

    __slots__ = ("options", "done", "wire", "said", "alarm", "approach", "offload")

    def __init__(self, end: Any, done: Done):
        self.options: Options = end.options
        self.done = done
        self.wire: Duplex | None = None
        self.said = bytearray()
        self.alarm: Alarm = end.program.alarms.at(monotonic() + end.times.tcp_dial + end.times.handshake, self._on_late)
        code = max(self.options.tls, 1)
        name = name_of(self.options) if code == 2 else ""
        if not name and self.options.server_name != NO_NAME:
            name = self.options.server_name  # nobody checks it, but who stands between may route by it
        self.approach: Approach | DuplexOpening
        self.offload: Offload | None = end.program.offload if is_worth_it() else None
        if self.offload is None:
            self.approach = Approach(end, trust(self.options, code, name)[0], name, self._opened)
            return
        self.offload.prepare()
        order = Order(False, name, code == 2 and not self.options.pin)
        place = Place(self.options.host or "127.0.0.1", self.options.port, None, "")
        self.approach = DuplexOpening(end.program.wires, end.program.way, place,
                                      functools.partial(self._dialled, order))

    def cancel(self) -> None:
        """Close everything, and never call `done`."""
        self.done = unheard
        self._over()

    def _over(self) -> None:
        self.alarm.cancel()
        self.approach.cancel()
        if self.wire is not None:
            self.wire.close()

    def _end(self, result: Terms | Failed) -> None:
        done, self.done = self.done, unheard
        self._over()
        done(result)

    def _on_late(self) -> None:
        what = self.approach.phase if self.wire is None else "waiting for the terms"
        self._end(Failed("timeout", f"no answer in time: {what}"))

    def _dialled(self, order: Order, result: TcpWire | Failed) -> None:
        if isinstance(result, Failed):
            self._end(result)
        else:
            self.wire = self.offload.open(result, order, self._unwrapped)

    def _unwrapped(self, result: TcpWire | Failed, fingerprint: str) -> None:
        self._opened(result if isinstance(result, Failed) else pinned(result, self.options.pin, fingerprint))

    def _opened(self, result: Duplex | Failed) -> None:
        if isinstance(result, Failed):
            self._end(result)
            return
        self.wire = result
        result.on_data = self._on_data
        result.on_end = self._on_end
        result.send(ask(self.options.server_name, token_of(self.options.secret), ours=True))

    def _on_data(self, data: bytes | memoryview) -> None:
        self.said += data
        self._read(False)

    def _on_end(self, error: Failed | None) -> None:
        self._read(True)

    def _read(self, ended: bool) -> None:
        """Look whether the terms are whole."""
        try:
            terms = parse_terms(self.said, ended)
        except Malformed as error:
            self._end(Failed("handshake", str(error)))
            return
        if terms is None:
            return
        if terms.type not in LANES:
            self._end(Failed("type", f"the server's pool has type={terms.type}: give it type=0, 2 or 3; 1 is QUIC, "
                                     "which Python's standard library cannot speak"))
        elif self.options.pin and not LANES[terms.type].code_of(self.options, terms):
            self._end(Failed("certificate", "pin= is set, and the server's pool has no TLS: give it tls=1 or tls=2"))
        else:
            self._end(terms)


def shake(end: Any, done: Done) -> Handshake:
    """Ask the server for its terms: `done(Terms)`, or `done(Failed)`, in time.  What is returned has `cancel`."""
    handshake = Handshake(end, done)
    handshake.approach.start()
    return handshake


class Lanes:
    """How a client makes connections of the pool, for the life of one link.

    Args:
        end: the client: its `options`, `program` (wires, way), `times`.
        terms: what the server has said.
        lost: told why, where something that all connections share has ended.
    """

    protocols: tuple[str, ...] = ()  # ALPN, at both ends

    def __init__(self, end: Any, terms: Terms, lost: Callable[[str], None]):
        self.end = end
        self.terms = terms
        self.lost = lost
        self.tls, self.name = trust(end.options, self.code_of(end.options, terms), self.name_of(end.options),
                                    self.protocols)

    @staticmethod
    def code_of(options: Options, terms: Terms) -> int:
        """The `tls` that counts."""
        return terms.tls

    @staticmethod
    def name_of(options: Options) -> str:
        """The name that a certificate has to have."""
        return name_of(options)

    def open(self, done: Callable[[Wire | Failed], None]) -> Any:
        """Make one: `done` gets a wire on which the id comes next, or Failed.  The result has `cancel`.

        `done` may be called before this returns, but only with Failed.  The owner has a deadline.
        """
        raise NotImplementedError

    def close(self) -> None:
        """The link is over: open nothing more.  Connections that were opened are their owners'."""


class TcpLanes(Lanes):
    """Type 0: a TCP connection each, in TLS where the server says so."""

    def open(self, done: Callable[[Wire | Failed], None]) -> Approach:
        approach = Approach(self.end, self.tls, self.name, done)
        approach.start()
        return approach


class Upgrading:
    """One WebSocket in the making."""

    __slots__ = ("lanes", "done", "approach", "wire", "key", "said")

    def __init__(self, lanes: Lanes, done: Done):
        self.lanes = lanes
        self.done = done
        self.approach = Approach(lanes.end, lanes.tls, lanes.name, self._opened)
        self.wire: Duplex | None = None
        self.key = new_key()
        self.said = b""

    def cancel(self) -> None:
        """Close everything, and never call `done`."""
        self.done = unheard
        self.approach.cancel()
        if self.wire is not None:
            self.wire.reset()

    def _opened(self, result: Duplex | Failed) -> None:
        if isinstance(result, Failed):
            self.done(result)
            return
        self.wire = result
        result.on_data = self._on_data
        result.on_end = self._on_end
        result.send(upgrade_ask(self.lanes.end.options.host, self.key))

    def _on_data(self, data: bytes | memoryview) -> None:
        self.said += data
        try:
            answer = parse_answer(self.said)
            if answer is None:
                if len(self.said) > ANSWER_MAX:
                    raise Malformed(f"an answer of more than {ANSWER_MAX} bytes")
                return
            if answer.status != 101:
                words = self.said[answer.end:].split(b"\n")[0].decode("latin-1")[:80]
                raise Malformed(f"the server answers HTTP {answer.status} {printable(words)}".rstrip())
            check_upgrade(answer, self.key)
        except Malformed as error:
            self.wire.reset()
            self.done(Failed("refused", str(error)))
            return
        wire = WebSocketWire(self.wire, True)
        rest, self.wire = self.said[answer.end:], None
        self.done(wire)
        if rest and wire.is_open:
            wire.hear(rest)

    def _on_end(self, error: Failed | None) -> None:
        self.wire.reset()
        self.done(error or Failed("reset", "the server has closed the connection"))


class WebSocketLanes(Lanes):
    """Type 2: a WebSocket each."""

    @staticmethod
    def code_of(options: Options, terms: Terms) -> int:
        return terms.tls or (2 if options.port == 443 else 0)  # as the original: nobody speaks plain HTTP there

    @staticmethod
    def name_of(options: Options) -> str:
        return options.host or "127.0.0.1"

    def open(self, done: Callable[[Wire | Failed], None]) -> Upgrading:
        upgrading = Upgrading(self, done)
        upgrading.approach.start()
        return upgrading


def upgrade_ask(host: str, key: str) -> bytes:
    """The request for the upgrade, byte for byte the original's: the host has no port."""
    host = f"[{host}]" if ":" in host else host
    return (f"GET / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: Go-http-client/1.1\r\nConnection: Upgrade\r\n"
            f"Sec-Websocket-Key: {key}\r\nSec-Websocket-Version: 13\r\nUpgrade: websocket\r\n\r\n").encode("ascii")


class Wish:
    """A stream that is wanted: while there is no connection yet, it waits for that."""

    __slots__ = ("done", "asked")

    def __init__(self, done: Done):
        self.done = done
        self.asked: Any = None  # of H2Client

    def cancel(self) -> None:
        """It is not wanted any more."""
        self.done = unheard
        if self.asked is not None:
            self.asked.cancel()


class H2Lanes(Lanes):
    """Type 3: streams of an HTTP/2 connection, which is made for the first of them.

    Where the peer takes no more on it (GOAWAY) further ones have another: those that there are go on, and the control
    channel, which is among them, as long as the link.
    """

    protocols = (H2_PROTOCOL,)

    def __init__(self, end: Any, terms: Terms, lost: Callable[[str], None]):
        super().__init__(end, terms, lost)
        self.approach: Approach | None = None
        self.clients: list[H2Client] = []  # all but the last are leaving; the first has the control channel
        self.wishes: list[Wish] = []  # that wait for the connection

    @staticmethod
    def code_of(options: Options, terms: Terms) -> int:
        return terms.tls or 1  # as the original

    def open(self, done: Callable[[Wire | Failed], None]) -> Wish:
        wish = Wish(done)
        if self.clients and (len(self.clients) >= CARRIERS_MAX or not self.clients[-1].h2.is_leaving):
            wish.asked = self.clients[-1].open(done)
            return wish
        self.wishes.append(wish)
        if self.approach is None:
            self.approach = Approach(self.end, self.tls, self.name, self._opened)
            self.approach.start()
        return wish

    def _opened(self, result: Duplex | Failed) -> None:
        from sniroute_streams import H2Client  # a megabyte, for a client that needs it

        wishes, self.wishes = self.wishes, []
        self.approach = None
        if isinstance(result, TlsWire) and result.protocol != H2_PROTOCOL:
            result.reset()
            result = Failed("tls", "the server does not speak HTTP/2")
        if isinstance(result, Failed):
            for wish in wishes:
                wish.done(result)
            return
        # A server of ours gives a nonce, since we have asked for one; the original's never ends a stream.
        client = H2Client(self.end.program.streams, result, self.end.options.server_name,
                          lambda failed: self._ended(client, failed), ends=bool(self.terms.nonce))
        self.clients.append(client)
        for wish in wishes:
            if wish.done is not unheard:
                wish.asked = client.open(wish.done)

    def _ended(self, client: H2Client, failed: Failed) -> None:
        if client is not self.clients[0]:
            self.clients.remove(client)
            return
        lost, self.lost = self.lost, unheard
        lost(str(failed))

    def close(self) -> None:
        self.lost = unheard
        if self.approach is not None:
            self.approach.cancel()
            self.approach = None
        for client in self.clients:
            client.close()


LANES: dict[int, type[Lanes]] = {0: TcpLanes, 2: WebSocketLanes, 3: H2Lanes}


# -- the server's side -------------------------------------------------------------------------


class Reception:
    """Where all connections of a server come in, for the life of the server.

    Args:
        end: the server.  What it is asked, each time: `terms` (type, tls), `expects_pool` (whether a client has the
            terms, or a link), `may_join(address)` (whether the pool takes connections from there), `knows(address)`
            (whether such a client has that address), `is_full`; `nuisance(kind, words)` is told what strangers do;
            `program` has wires, and streams for type 3.
        certificates: who the server is; None: TLS is for handshakes only, and a helper does it.
        asked: told of each handshake, with a wire that has no owner yet, and is to be answered.
        arrived: told of each connection that may be one of the pool's.  Its id is what is to be sent next.
    """

    def __init__(self, end: Any, certificates: Certificates | None, asked: Callable[[Ask, Duplex], None],
                 arrived: Callable[[Wire, Any], None]):
        self.end = end
        self.certificates = certificates
        self.asked = asked
        self.arrived = arrived
        self.kind = KINDS[end.terms.type]
        if certificates is not None:
            certificates.speak(LANES[end.terms.type].protocols)
        self.late = end.program.loop.queue(end.times.handshake, Guest.on_late)
        self.silent = end.program.loop.queue(GRACE, Guest.arrive)
        # Those that are not told apart yet, in the order in which they came.
        self.strangers: dict[Guest, None] = {}
        self.sites: dict[str, dict[Guest, None]] = {}  # the same, by where they come from
        self.friends: dict[Guest, None] = {}  # of the client that has the tunnel
        self.sessions: dict[H2Server, Any] = {}  # the addresses of their clients

    def receive(self, sock: socket.socket, address: Any) -> None:
        """Take an accepted connection; its listener has set its options."""
        guest = Guest(self, TcpWire(self.end.program.wires, sock, address[:2]), address)
        self._admit(guest)
        if not self.end.terms.tls:
            self.expect(guest)

    def may_join(self, address: Any) -> bool:
        """Whether a connection of the pool may come from there now."""
        return self.end.expects_pool and self.end.may_join(address)

    def expect(self, guest: Guest) -> None:
        """Its layers are up: what says nothing from here on is a connection of the pool, where that may be one."""
        if self.kind.is_silent and self.may_join(guest.address):
            self.silent.put(guest)

    def _admit(self, guest: Guest) -> None:
        """Count a guest, and see to it that there are not too many."""
        if self.end.knows(guest.address):
            self.friends[guest] = None
            if len(self.friends) > FRIENDS_MAX:
                next(iter(self.friends)).drop("there are too many connections that are not ready")
        else:
            ours = self.sites.setdefault(guest.site, {})
            self.strangers[guest] = ours[guest] = None
            if len(ours) > SITE_MAX:
                next(iter(ours)).drop(f"there are more than {SITE_MAX} from this address that are not ready")
            elif len(self.strangers) > STRANGERS_MAX:
                next(iter(self.strangers)).drop("there are too many connections that are not ready")
        self.late.put(guest)

    def leave(self, guest: Guest) -> None:
        """A guest is told apart, or gone."""
        self.late.drop(guest)
        self.silent.drop(guest)
        if guest in self.friends:
            del self.friends[guest]
        elif guest in self.strangers:
            del self.strangers[guest]
            ours = self.sites[guest.site]
            del ours[guest]
            if not ours:
                del self.sites[guest.site]

    def begin_session(self, wire: TlsWire, address: Any) -> None:
        """A connection speaks HTTP/2: its streams arrive."""
        from sniroute_streams import H2Server  # a megabyte, for a server that needs it

        def arrived(stream: StreamWire) -> None:
            if not self.end.may_join(address):
                stream.refuse(403)
            elif not self.end.expects_pool or self.end.is_full:
                stream.refuse(404)
            else:
                self.arrived(stream, address)

        session = H2Server(self.end.program.streams, wire, arrived, lambda failed: self.sessions.pop(session, None),
                           self.end.options.max + 1)
        self.sessions[session] = address
        if len(self.sessions) > SESSIONS_MAX:
            # A stranger's goes, or one that carries nothing; of those the oldest, and perhaps that is the new one.
            surplus = min(self.sessions, key=lambda each: (self.end.knows(self.sessions[each]), bool(each.h2.streams)))
            if self.end.knows(self.sessions[surplus]) and surplus.h2.streams:
                surplus = session
            del self.sessions[surplus]
            surplus.close()

    def close(self) -> None:
        """Close all that is not told apart."""
        for guest in [*self.strangers, *self.friends]:
            guest.drop("")
        sessions, self.sessions = self.sessions, {}
        for session in sessions:
            session.close()
        for queue in (self.late, self.silent):
            self.end.program.loop.retire(queue)


class Guest:
    """A connection that is not told apart yet.  It owns `wire`, of which there is more and more."""

    __slots__ = ("reception", "wire", "address", "site", "said")

    def __init__(self, reception: Reception, wire: Duplex, address: Any):
        self.reception = reception
        self.wire = wire
        self.address = address
        self.site = site_of(address[0])
        self.said = b""  # of a request
        wire.on_data = self.on_first
        wire.on_end = self.on_end

    def drop(self, why: str) -> None:
        """Close it, and say why, where that is something to be told."""
        self.reception.leave(self)
        self.wire.reset()
        if why:
            self.reception.end.nuisance("guest", f"{show_address(self.address[:2])} was refused: {why}")

    def on_late(self) -> None:
        """The time for a handshake is over."""
        self.drop("it was not ready in time")

    def on_end(self, error: Failed | None) -> None:
        """It has gone."""
        self.drop("")

    # -- what it says

    def on_first(self, data: bytes | memoryview) -> None:
        """The first bytes: TLS, or plain words."""
        self.reception.silent.drop(self)
        if data[0] == TLS_HELLO:
            if self.reception.certificates is None:
                order = Order(True, self.reception.end.options.server_name, early=base64.b64encode(data).decode())
                self.wire = self.reception.end.program.offload.open(self.wire, order, self._unwrapped)
                return
            wire = TlsWire(self.wire, self.reception.certificates.context, server_side=True)
            self.wire = wire
            wire.shake(self._on_shaken, early=bytes(data))
        elif self.reception.kind.upgrades and not self.reception.end.terms.tls:
            self.wire.on_data = self.on_request
            self.on_request(data)
        else:
            if bytes(data[:1]).isalpha():
                self.wire.send(NOT_PLAIN)
            self._say_goodbye("it speaks no TLS")

    def _unwrapped(self, result: TcpWire | Failed, fingerprint: str) -> None:
        if isinstance(result, Failed):
            self._on_shaken(result)
        else:  # a request: the pool's connections have no TLS
            self.wire.on_data = self.on_request
            self.wire.on_end = self.on_end

    def _on_shaken(self, failed: Failed | None) -> None:
        if failed is not None:
            self.reception.leave(self)
            self.reception.end.nuisance("tls", f"no TLS with {show_address(self.address[:2])}: {failed}")
            return
        self.wire.on_data = self.on_request
        self.wire.on_end = self.on_end
        if self.wire.protocol == H2_PROTOCOL:  # only a server of type 3 agrees to that
            self.reception.begin_session(self._hand_over(), self.address)
        elif self.reception.end.terms.tls:
            self.reception.expect(self)

    def on_request(self, data: bytes | memoryview) -> None:
        """Bytes of a request."""
        self.reception.silent.drop(self)
        self.said += data
        try:
            asked = parse_ask(self.said)
        except Malformed as error:
            self.wire.send(refusal(400, "Bad Request"))
            self._say_goodbye(str(error))
            return
        if asked is None:
            return
        head, rest = self.said[:asked.end], self.said[asked.end:]
        if self.reception.kind.upgrades and (key := upgrade_key(head)) is not None:
            self._upgrade(key, rest)
            return
        wire = self._hand_over()
        self.reception.asked(asked, wire)
        if rest and wire.is_open:
            wire.on_data(rest)

    # -- what becomes of it

    def _hand_over(self) -> Duplex:
        """The wire, which the guest gives away."""
        self.reception.leave(self)
        self.wire.on_data = self.wire.on_end = self.wire.on_room = unheard
        return self.wire

    def _say_goodbye(self, why: str) -> None:
        """Close it behind what was sent."""
        self._hand_over().close()
        self.reception.end.nuisance("guest", f"{show_address(self.address[:2])} was refused: {why}")

    def arrive(self) -> None:
        """It has said nothing: it is a connection of the pool."""
        self.reception.arrived(self._hand_over(), self.address)

    def _upgrade(self, key: str, rest: bytes) -> None:
        """It asks for a WebSocket.  `key`: "" for a request that is none of RFC 6455."""
        end = self.reception.end
        if not key:
            self.wire.send(refusal(400, "Bad Request"))
            self._say_goodbye("a wrong upgrade")
        elif not self.reception.may_join(self.address) or end.is_full:
            self.wire.send(FULL)
            self._hand_over().close()
        else:
            self.wire.send(upgrade_answer(key, http_date(time.time())))
            below = self._hand_over()
            wire = WebSocketWire(below, False)
            self.reception.arrived(wire, self.address)
            if rest and wire.is_open:
                wire.hear(rest)


def upgrade_key(head: bytes) -> str | None:
    """The Sec-WebSocket-Key of a request for WebSocket; "": one that cannot be answered; None: it is another request.

    `head` is whole.  Source: RFC 6455 section 4.2.1.
    """
    lines = read_lines(head[head.index(b"\n") + 1:])
    said = {field.name.lower(): field.value.decode("latin-1") for field in lines.fields}
    if said.get(b"upgrade", "").lower() != "websocket":
        return None
    key = said.get(b"sec-websocket-key", "")
    return key if said.get(b"sec-websocket-version") == "13" and key.isascii() else ""


class Kind(NamedTuple):
    """A kind of pool, as a server meets it."""

    is_silent: bool  # a connection says nothing before it has its id
    upgrades: bool  # it begins with an upgrade


KINDS = {0: Kind(True, False), 2: Kind(False, True), 3: Kind(False, False)}
