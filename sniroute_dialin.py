"""sniroute_dialin: a server, the end of a NodePass tunnel with a public address: clients dial in to it.

    IDLE        its address cannot be had yet    start: it tries again each NP_SERVICE_COOLDOWN
    LISTENING   for the handshake of a client    on_ask: the key is right: a Candidate has the terms
    EXPECTING   its first connections            on_arrival: each is given its id, and proves the key; 00000000 first
    LINKED      the control channel is there     as End; further connections join the pool.  Then LISTENING, at once
    CLOSED

A connection passes four owners: Guest (sniroute_lanes), which tells it from a handshake; Newcomer (sniroute_peering),
until the key is proven; Slot of the Pool (sniroute_pool), while it waits; and its user: Link, Caller, Callee or Flow.

One listener for its whole life tells handshakes and connections of the pool apart (Reception of sniroute_lanes).  The
original closes its listener after the handshake and opens another, and loses the answer in one start of twenty.

A second client that knocks while a link is up gets no link: the control channel is asked for a sign of life at once, so
that a client that has come back elsewhere does not wait for the old one's time-out.

Threads: the loop's only.

Seams: I want to ...
    refuse a client otherwise    `Server._judge`
    let another one in           Candidate, Newcomer of sniroute_peering

This room imports sniroute_ends, sniroute_peering, sniroute_lanes, sniroute_pool, sniroute_offload, sniroute_duplex,
sniroute_nodeurl, sniroute_signals, sniroute_dial (`set_options`), sniroute_loop and sniroute_names.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from typing import Any

from sniroute_dial import set_options
from sniroute_duplex import Certificates, Wire
from sniroute_ends import CLOSED, LINKED, End
from sniroute_lanes import Reception
from sniroute_loop import READ, Watch
from sniroute_names import show_address, site_of
from sniroute_nodeurl import Options, Times
from sniroute_offload import is_worth_it
from sniroute_peering import CONTROL, Candidate, Newcomer
from sniroute_pool import Slot
from sniroute_signals import ID_SIZE, REFUSED, Ask, Terms, answer, http_date, same_token, token_of

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
ASKED_LAST = 2.0  # for the client of a handshake to read its answer
ANSWERED_MAX = 256  # clients that are reading it
CANDIDATES_MAX = 16  # clients that have the terms, and no link yet
SITE_MAX = 4  # of them from one site: who hears a token can ask again and again
UNPROVEN_MAX = 1024  # connections of the pool that have not proven the key yet: as many as a pool has by default
ACCEPTS = 64  # connections taken in one go

LISTENING, EXPECTING = "listening", "expecting"  # states of a server, beside those of each End


class Server(End):
    """The end with a public address.  `accepts`: whether it is the accepting end, too (the flow is "-").

    Raises SettingsError where the files of its certificate cannot be used.
    """

    def __init__(self, program: Any, options: Options, times: Times, accepts: bool):
        super().__init__(program, options, times)
        self.accepts = accepts
        self.pool.picks = accepts
        self.terms = Terms("-" if accepts else "+", options.max, options.tls, options.type)
        self.certificates: Certificates | None = None  # a helper does what TLS there is
        if options.tls or options.type or not is_worth_it():
            files = (options.crt, options.key_file) if options.tls == 2 else None
            self.certificates = Certificates(files, options.server_name, tell=lambda words: self.log("info", words))
        self.listener: socket.socket | None = None
        self.watch: Watch | None = None
        self.reception: Reception | None = None
        self.candidates: list[Candidate] = []  # clients with the terms, the newest last; or the one with the link
        self.answered = self.loop.queue(ASKED_LAST, lambda wire: wire.close())
        self.proving = self.loop.queue(times.handshake, Newcomer.end)  # connections that have not proven the key

    def start(self) -> None:
        """Listen for a client; where that fails, again and again."""
        if self.state is CLOSED:
            return
        try:
            self.listener = listen(self.options.host, self.options.port)
        except OSError as error:
            self.log("error", f"cannot listen on {self.address}: "
                              f"{(error.strerror or str(error)).lower()}: trying again",
                     event="warning")
            self.later("start", self.times.cooldown, self.start)
            return
        if self.certificates is None:
            self.program.offload.prepare()
        self.reception = Reception(self, self.certificates, self.on_ask, self.on_arrival)
        self.watch = Watch(self.loop.poller, self.listener.fileno())
        self._accept_again()
        self.state = LISTENING
        self.log("info", f"listening for a client on {show_address(self.listener.getsockname())}")

    def _accept_again(self) -> None:
        if self.state is not CLOSED:
            self.watch.wait_for(READ, self._accept)

    def _accept(self, mask: int) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, address = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # descriptors are short, or that one has left already
                self.nuisance("accept", f"cannot accept a connection: {error.strerror}")
                self.watch.wait_for(0)
                self.later("accept", 0.1, self._accept_again)
                return
            self.reception.receive(sock, address)

    @property
    def expects_pool(self) -> bool:
        """Whether what comes in is a connection of the pool, and not a handshake: for Reception."""
        return bool(self.candidates)

    def knows(self, address: Any) -> bool:
        """Whether a client that has the terms, or the link, is at the site of that address: for Reception."""
        site = site_of(address[0])
        return any(each.site == site for each in self.candidates)

    def may_join(self, address: Any) -> bool:
        """Whether a connection from there may be one of the pool's."""
        return self.terms.type == 2 or self.knows(address)

    @property
    def is_full(self) -> bool:
        """Whether the pool has all the connections that it may have.  Those that are not proven are a stranger's."""
        return len(self.pool.idle) >= self.options.max

    # -- the handshake

    def on_ask(self, ask: Ask, wire: Wire) -> None:
        """Somebody asks for the terms."""
        refused = self._judge(ask, wire)
        wire.on_data = lambda data: None
        wire.on_end = lambda error: self.answered.drop(wire)
        self.answered.put(wire)
        if len(self.answered.due) > ANSWERED_MAX:
            self.answered.due.popitem(last=False)[0].close()
        wire.send(refused or answer(self.terms._replace(nonce=self.candidates[-1].nonce), http_date(time.time())))
        wire.finish()

    def _judge(self, ask: Ask, wire: Wire) -> bytes:
        """A refusal, or nothing, and then a link is expected.

        CONNECT: for whoever has the key the original is a proxy to anywhere, as long as it waits for a client.  Nobody
        asked for that here.
        """
        if ask.method == "CONNECT":
            return REFUSED[405] if same_token(ask.proxy_key, self.key) else REFUSED[407]
        if ask.path != "/":
            return REFUSED[404]
        if not same_token(ask.token, token_of(self.key)):
            self.nuisance("token", f"{show_address(wire.peer)} has asked with a wrong key")
            return REFUSED[401]
        if ask.method != "GET":
            return REFUSED[405]
        if self.state is LINKED:
            self.nuisance("second", f"{show_address(wire.peer)} asks for a link, but {self.peer} has it")
            self.link.prod()
            return REFUSED[409]
        candidate = Candidate(wire.peer[0], os.urandom(16).hex() if ask.ours else "")
        same = [each for each in self.candidates if each.site == candidate.site]
        if len(same) >= SITE_MAX:
            self.candidates.remove(same[0])
        elif len(self.candidates) >= CANDIDATES_MAX:
            del self.candidates[0]
        self.candidates.append(candidate)
        self.state = EXPECTING
        self.later("expect", self.times.handshake, lambda: self.fail("the client has made no connection in time"))
        return b""

    # -- connections of the pool

    def on_arrival(self, wire: Wire, address: Any) -> None:
        """A connection of the pool has come: it is given its id."""
        site = site_of(address[0])
        candidates = [each for each in self.candidates if each.site == site or self.terms.type == 2]
        if not candidates or self.is_full:
            wire.reset()
            return
        last = candidates[-1]
        number = CONTROL
        if self.state is not EXPECTING or not last.gives_zero():
            while number == CONTROL or number in self.pool.idle:
                number = os.urandom(ID_SIZE).hex()
        wire.send(bytes.fromhex(number))
        if not last.nonce:
            self.admit(last, number, wire, b"")
            return
        Newcomer(self, candidates, number, wire, address)
        if len(self.proving.due) > UNPROVEN_MAX:
            next(iter(self.proving.due)).end()

    def admit(self, candidate: Candidate, number: str, wire: Wire, early: bytes) -> None:
        """A connection is the client's: it may be used."""
        if candidate not in self.candidates or number == self.spent or early and self.accepts and number != CONTROL:
            wire.reset()
        elif number != CONTROL:
            if self.is_full:
                wire.reset()
                return
            if self.state is EXPECTING:
                candidate.ids.add(number)
            self.pool.add(Slot(number, wire))
            if early and wire.is_open:
                wire.on_data(early)
            self.say_verify()
        elif self.state is LINKED:
            wire.reset()
        else:
            self._choose(candidate)
            self.begin_link(wire)
            if early:
                wire.on_data(early)

    def _choose(self, candidate: Candidate) -> None:
        """The link is this one's: forget the others, and what is theirs."""
        self.candidates = [candidate]
        self.peer = candidate.peer
        self.terms = self.terms._replace(nonce=candidate.nonce)
        self.fingerprint = self.certificates.fingerprint if self.certificates is not None else ""
        for number in self.pool.idle.keys() - candidate.ids:
            self.pool.pick(number).wire.reset()
        candidate.ids.clear()

    def fail(self, why: str) -> None:
        """There is no link, or no more: wait for the next client, at once."""
        if self.state is CLOSED:
            return
        self.log("warn", f"{why}: waiting for a client")
        self.candidates = []
        for newcomer in list(self.proving.due):
            newcomer.end()
        self.pool.shut()
        self.state = LISTENING

    def close(self) -> None:
        if self.state is CLOSED:
            return
        if self.watch is not None:
            self.watch.closing()
            self.listener.close()
        if self.reception is not None:
            self.reception.close()
        for newcomer in list(self.proving.due):
            newcomer.end()
        for wire in list(self.answered.due):
            wire.close()
        self.loop.retire(self.proving, self.answered)
        super().close()


# -- addresses ---------------------------------------------------------------------------------


class Listening(socket.socket):
    """A listening socket.  What it accepts has its options (`set_options`): the kernel passes all on but O_NONBLOCK."""

    def accept(self) -> tuple[Any, Any]:
        """The next connection, as the interpreter's own kind of socket, which costs less, and its address."""
        fd, address = self._accept()  # type: ignore[attr-defined]
        sock = socket.SocketType(self.kind, socket.SOCK_STREAM, 0, fd)
        sock.setblocking(False)
        return sock, address

    @functools.cached_property
    def kind(self) -> int:
        """Its family.  `socket.family` makes an enumeration of it each time."""
        return int(self.family)


def listen(host: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A listener, non-blocking; without a host on all addresses of both families.  Raises OSError."""
    found = socket.getaddrinfo(host.encode() or None, port, type=kind, flags=socket.AI_PASSIVE)
    rows = sorted(found, key=lambda row: row[0] != (socket.AF_INET if host else socket.AF_INET6))
    error = OSError("no address")
    for family, _, _, _, address in rows:
        try:
            sock = Listening(family, kind) if kind == socket.SOCK_STREAM else socket.socket(family, kind)
        except OSError as failed:
            error = failed  # this host has no IPv6
            continue
        try:
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if not host else 1)
            sock.bind(address)
            if kind == socket.SOCK_STREAM:
                sock.listen(4096)
                set_options(sock)
            sock.setblocking(False)
            return sock
        except OSError as failed:
            sock.close()
            error = failed
            if host or family == socket.AF_INET:
                raise
    raise error
