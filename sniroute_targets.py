"""sniroute_targets: the kinds of target, and one connection's way to one.

    Decision --- Scheme.ready ---> Backend      told: open, connected, settled, answered, failed, release
                      |
                      +----------> None         it has to wait: a thread runs Scheme.prepare, then back to `ready`

    SCHEMES   the kinds of target, a row each: how to check one, to be ready for it, to wait for it
    Backend   is told what happens on its way.  Nobody asks its kind
    Targets   what the kinds share: the tunnel table, resolved hosts, the router's own addresses

Threads.  The loop asks `ready`, and owns every Backend.  A thread wait-<n> runs `prepare`.  `Targets.resolved` is
written by both, one assignment each.

Seams: I want to ...
    add a kind of target     a row in SCHEMES; a subclass of Backend where none of those here fits; a room of its own
                             where many do without, as sniroute_commands

It imports tunnels, processes, launchers, race, the loop, names and refusals.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import struct
import time
from typing import TYPE_CHECKING, Callable, Iterable, Mapping, NamedTuple, Sequence

from sniroute_launchers import Launcher, TunnelError, TunnelKey
from sniroute_loop import CAPACITY_ERRNOS, NEVER, Loop, Queue
from sniroute_names import (HOST, Address, is_local, is_number, is_public, normalise_whole, parse_host_port, parse_ip,
                            printable, show_address)
from sniroute_processes import Child
from sniroute_race import ADDRESSES_MAX, Laggards, Race, Row, alternate
from sniroute_refusals import Malformed, Refused, tunnel_refused
from sniroute_tunnels import Tunnel, TunnelTable, stand

if TYPE_CHECKING:
    from sniroute_book import Book
    from sniroute_connection import Connection
    from sniroute_router import Wait
    from sniroute_routes import Decision, Route
    from sniroute_values import Zones

__version__ = "0.1.0"

monotonic = time.monotonic

# Limits, each with its reason.  Times in seconds.
RESOLVED_MAX = 1024  # resolved hosts kept: names may come from strangers
UNIX_PATH_MAX = 100  # sun_path of unix(7) has 108 bytes, 104 on macOS
NOBODY = "port.invalid"  # a name for targets that depend on none
BACKLOG_PATIENCE = 5.0  # a unix socket whose backlog is full: as long as an address of a host has for its connect
KEEPALIVE = (60, 15, 4)  # idle, interval, count: a dead peer is found in two minutes

# socket.SocketType is the class that socket.socket is written around: it is made without a call into Python.
STREAM = int(socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0))  # born non-blocking: a system call less
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST
NO_PORT = "this host has no local port left to dial it from (net.ipv4.ip_local_port_range), or no address of its family"


# -- backends ----------------------------------------------------------------------------------


class Unreachable(Exception):
    """No address of a backend is left to try; the message says what became of them."""


class Retry(NamedTuple):
    """A backend that failed may be tried once more, after a wait."""

    doubted: Child | None  # the process that gave no answer, where it has to be looked at first


class Another(NamedTuple):
    """One of several backends failed, and another one may serve the client: `open` is called again at once."""


class NotYet(Exception):
    """No connect can begin now: the connection waits for the target `Backend.awaited`, or for its turn in a queue."""

    def __init__(self, turn: Queue | None = None):
        super().__init__()
        self.turn = turn  # the queue that the connection stands in meanwhile; None: it waits for `awaited`


class Doubt(NamedTuple):
    """A backend that failed a client that cannot be served by trying again, perhaps because its process hangs."""

    doubted: Child  # to be looked at, though the client does not wait for that
    refusal: Refused


Verdict = Retry | Another | Doubt | Refused | None  # of Backend.failed


class Backend:
    """One connection's way to its target, told what happens on it.  Loop only.

    Called in this order: `open`, again for each address that fails; `connected`; `proves`; then `settled` where that
    is True, else `answered`, or `committed` where the client of a port speaks first; `release`, perhaps more than once.
    `failed` may come at any time before `settled` or `answered`; where it says None, it is called once more, after
    `release`.  `remark` is asked for at the end, where `settled` has not said None.

    This base tries (family, address) pairs one after another, or, where one is silent, beside each other: a Race then
    asks it for them.  Where none is left the client is refused with `backend`.
    """

    __slots__ = ("target", "addresses", "local", "tried", "row", "told", "race")
    proven_by_connect = True  # False: a connect shows nothing; only the first byte shows that somebody is there
    # For one of several backends (sniroute_backends); as they are here they change nothing.
    awaited: Decision | None = None  # what has to be ready first, where that is not the connection's own decision
    patience: tuple[Queue, Queue] | None = None  # its own two deadlines for a connect: see Book.patience
    greeting = b""  # what the backend has said before the client came
    may_change_hands = True  # its connection may serve another client, with this Backend

    def __init__(self, target: str, addresses: Sequence[Row], local: bool):
        self.target = target  # for people
        self.addresses = addresses  # best first
        self.local = local  # loopback: no keep-alive is needed
        self.tried = 0  # so many of them
        self.row: Row | None = None  # the one to which the connection's socket leads
        self.told: dict[Row, str] | None = None  # what became of them, where the first did not take the connect
        self.race: Race | None = None  # only where an address was silent

    def open(self, why: str = "") -> socket.SocketType:
        """A non-blocking socket whose connect has begun, to the next address that does not refuse at once.

        `why` is what became of the address before.  Raises Unreachable where no address is left, NotYet or
        Refused where it is too early, and OSError with one of CAPACITY_ERRNOS where this host has no descriptors.
        """
        if why:
            self.tell(self.row, why)
        server = self.begin()
        if server is None:
            raise Unreachable(self.give_up())
        return server

    def begin(self) -> socket.SocketType | None:
        """As `open`; None where no address is left."""
        addresses = self.addresses
        while self.tried < len(addresses):
            self.row = row = addresses[self.tried]
            family, address = row
            try:
                server = socket.SocketType(family, STREAM)
            except OSError as error:
                if error.errno in CAPACITY_ERRNOS:
                    raise
                self.tried += 1
                self.tell(row, error.strerror)  # no IPv6 here
                continue
            self.tried += 1
            if STREAM == socket.SOCK_STREAM:
                server.setblocking(False)
            self.set_options(server)
            error = server.connect_ex(address)
            if error in (0, errno.EINPROGRESS):
                return server
            self.tell(row, NO_PORT if error == errno.EADDRNOTAVAIL else os.strerror(error))
            server.close()
        return None

    def is_ours(self) -> bool:
        """Whether this host could dial none of its addresses: that is no fault of the backend.

        All of them: where IPv6 is switched off, ::1 is never dialled, and 127.0.0.1 may refuse all the same.
        """
        return bool(self.told) and all(what == NO_PORT for what in self.told.values())

    def tell(self, row: Row, what: str) -> None:
        """What became of an address, for people."""
        if self.told is None:
            self.told = {}
        self.told[row] = what

    def give_up(self) -> str:
        """None of its addresses took the connect: what became of them, for people."""
        self.exhausted()
        return self.account() if self.told else os.strerror(errno.EHOSTUNREACH)

    def account(self) -> str:
        """What became of its addresses, for people."""
        return "; ".join(self.told.values())

    def remark(self) -> str | None:
        """What is worth a word in the line of a connection that was not refused."""
        return None

    def exhausted(self) -> None:
        """None of its addresses can be reached."""

    def set_options(self, server: socket.SocketType) -> None:
        """Set the options of a socket that is about to connect."""
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.local:
            keep_alive(server)

    def connected(self, server: socket.SocketType) -> None:
        """The connect may be over: is this the right peer?

        Raises BlockingIOError where the connect is not over, OSError where it failed, Unreachable where the peer is
        not the one that was meant.
        """

    @property
    def way(self) -> Backend:
        """The Backend whose addresses are tried now: this one, or that of the member that a client uses."""
        return self

    def proves(self) -> bool:
        """The connect is over, and the client's bytes are on their way: does that prove that somebody is there?"""
        return self.proven_by_connect

    def settled(self) -> Backend | None:
        """The connect has proven it, and bytes pass.  None: it need not be told any more, so it need not be kept."""
        return None

    def answered(self) -> None:
        """The first byte has come back."""

    def is_used_up(self, server: socket.SocketType) -> bool:
        """Whether a connection that was warm has ended while its client was silent; the client speaks now."""
        return False

    def committed(self) -> None:
        """The client of a port has spoken before the backend has: nothing can be sent again."""

    def goes_on(self, error: Refused) -> bool:
        """What it waits for cannot be had.  Whether the client may be served all the same, by another backend."""
        return False

    def is_lost(self) -> bool | None:
        """Whether the end of the connection is that of a program that died: then what it said is not whole.

        None: it is not known yet; ask again in EXIT_TIMEOUT.
        """
        return False

    def failed(self, why: str, server: socket.SocketType | None, last: bool) -> Verdict:
        """It failed before the client had a byte of it.  `last`: the client cannot be served by trying again.

        `server` is the socket, where there is one still.  None: the reason is on its way; ask again after WORDS_TIMEOUT
        (sniroute_deadlines).
        """
        if self.is_ours():
            return Refused("busy", f"{self.target}: {why}")
        return Refused("backend", f"{self.target}: {why}")

    def abandon(self, server: socket.SocketType) -> None:
        """The client has left before the backend answered; the socket is closed next."""

    def release(self) -> None:
        """The connection needs the backend no longer."""
        if self.race is not None:
            self.race.close()


class TcpBackend(Backend):
    """A host and port; its addresses are forgotten where none can be reached: perhaps it has moved."""

    __slots__ = ("targets", "key")

    def __init__(self, targets: Targets, key: str, target: str, found: Resolved):
        self.target = target
        self.addresses = found.addresses
        self.local = found.local
        self.tried = 0
        self.row = self.told = self.race = None
        self.targets = targets
        self.key = key

    def exhausted(self) -> None:
        self.targets.resolved.pop(self.key, None)

    def account(self) -> str:
        """As the base, and which address it was, where the target does not say so."""
        shown = ((show_address(row[1]), self.told[row]) for row in self.addresses if row in self.told)
        return "; ".join(what if self.target.endswith(f":{where}") else f"{where}: {what}" for where, what in shown)

    def settled(self) -> Backend | None:
        """Where an address did not take the connect, have it tried last, and keep this to say so once."""
        if not self.told or not self.targets.learn(self.key, self.told, self.row):
            return None
        self.tell(self.row, "took it")
        return self

    def remark(self) -> str | None:
        return self.account() if self.told else None


class UnixBackend(Backend):
    """A unix socket of this host.  Where its backlog is full, the connect is tried again for a while, as TCP does."""

    __slots__ = ("since", "longest")

    def __init__(self, target: str, addresses: Sequence[Row], local: bool):
        super().__init__(target, addresses, local)
        self.since = 0.0  # clock time since which its backlog is full; 0: it was not yet
        self.longest = BACKLOG_PATIENCE  # seconds: for so long that is waited for

    def begin(self) -> socket.SocketType | None:
        """As the base.  Raises BlockingIOError where the backlog is full, to be called again soon."""
        if self.tried:
            return None
        server = socket.SocketType(socket.AF_UNIX, STREAM)
        if STREAM == socket.SOCK_STREAM:
            server.setblocking(False)
        error = server.connect_ex(self.addresses[0][1])
        if not error:
            self.tried = 1
            return server
        server.close()
        why = os.strerror(error)
        if error == errno.EAGAIN:  # unix(7): at once, where TCP would try on
            now = monotonic()
            self.since = self.since or now
            if now < self.since + self.longest:
                raise BlockingIOError(error, why)
            why = f"its backlog was full for {self.longest:g} s"
        self.tried = 1
        self.tell(self.addresses[0], why)
        return None


class TunnelBackend(Backend):
    """A leased tunnel: a local port on which a tunnel program listens, accepts, and only then dials its far end."""

    __slots__ = ("tunnels", "idle", "lease", "tunnel", "child", "dialled", "failure")
    proven_by_connect = False

    def __init__(self, tunnels: TunnelTable, target: str, idle: float | None, tunnel: Tunnel, child: Child):
        super().__init__(target, ((socket.AF_INET, child.address),), True)
        self.tunnels = tunnels
        self.idle = idle
        self.lease: Tunnel | None = tunnel
        self.tunnel = tunnel
        self.child = child
        self.dialled = 0.0
        self.failure: tuple[str, int] | None = None  # why, and the port from which it was dialled

    def set_options(self, server: socket.SocketType) -> None:
        super().set_options(server)
        self.dialled = monotonic()

    def connected(self, server: socket.SocketType) -> None:
        """Whether the child's own process took the connect.

        Asked after the connect, which has to be over: a child that lives now held its port then, so no byte of a
        client reaches a stranger that took the port of a tunnel that died.
        """
        error = server.connect_ex(self.child.address)
        if error not in (0, errno.EISCONN):
            raise OSError(error, os.strerror(error))  # of EALREADY, a BlockingIOError
        # In this order: the reaper takes the child away before it closes what alive() reads.
        if not (self.child.alive() and self.tunnel.child is self.child):
            raise Unreachable("its process ended")

    def answered(self) -> None:
        self.child.proven = True

    def is_lost(self) -> bool:
        return not self.child.alive()

    def failed(self, why: str, server: socket.SocketType | None, last: bool) -> Verdict:
        """Decide by what the tunnel program has said: refuse, or try the same bytes again, unless `last`.

        Where the program has not said why yet, None.  The second call decides by what it has said until then.
        """
        if self.is_ours():
            return super().failed(why, server, last)
        child = self.child
        asked_before = self.failure is not None
        if not asked_before:
            port = 0
            if server is not None:
                with contextlib.suppress(OSError):  # it was reset
                    port = server.getsockname()[1]
            self.failure = why, port
        why, port = self.failure
        reason = self.tunnels.words(child, self.dialled, port)
        if not reason.text and not asked_before and (last or child.names_clients):
            return None
        # A tunnel program that gave a reason for this client is alive: do not restart it.
        doubted = None if reason.text and child.names_clients else child
        if not last and not reason.final:
            return Retry(doubted)
        refusal = tunnel_refused(reason.kind, f"{self.target}: {reason.text or why}")
        return refusal if reason.final or doubted is None else Doubt(doubted, refusal)

    def abandon(self, server: socket.SocketType) -> None:
        """Have the close send RST: so a tunnel program that still dials its far end learns that the client has left."""
        with contextlib.suppress(OSError):
            server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def release(self) -> None:
        lease, self.lease = self.lease, None
        if lease is not None:
            self.tunnels.release(lease, self.idle)


def keep_alive(sock: socket.SocketType) -> None:
    """Find a peer that is gone.  While data is under way the kernel's tcp_retries2 does, in 15 minutes.

    Before you add TCP_USER_TIMEOUT: measured, it also ends a client that is alive and does not read
    for that long (`psql ... | less`), though it acknowledges every probe of its closed window.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE, strict=True):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# -- kinds of target ---------------------------------------------------------------------------


class Resolved(NamedTuple):
    """The addresses of a host, until a clock time."""

    addresses: tuple[Row, ...]  # best first
    local: bool  # all of them loopback
    until: float


class Targets:
    """What the kinds of target share.  `own` are the addresses on which the router listens."""

    def __init__(self, tunnels: TunnelTable):
        self.tunnels = tunnels
        self.own: list[tuple[str, int]] = []
        self.tunnel_ports = range(0)  # of this host
        self.own_socket: str | None = None  # the path of the admin's
        self.own_admin: list[tuple[str, int]] = []  # its address, where that is no path
        self.own_registry: list[tuple[str, int]] = []  # the same of the registry, and of its store
        self.resolved: dict[str, Resolved] = {}  # by Decision.key
        self.laggards = Laggards()
        self.zones: Zones | None = None  # of the settings
        self.ask: Callable[[Decision], None] = ask_nobody  # have a thread prepare a target: Waits.prepare
        self.book: Book | None = None  # where a route has several backends
        self.make_room(0)

    def make_room(self, targets: int) -> None:
        """Keep as many resolved hosts as this number of configured targets can need."""
        self.resolved_max = max(RESOLVED_MAX, 2 * targets)

    def follow(self, routes: Sequence[Route], identified: bool, loop: Loop) -> None:
        """Use other routes, those of ports among them; `identified` as in Route.decide.

        Main calls it before the loop runs, then the loop does.
        """
        self.make_room(sum(len(route.targets) for route in routes))
        stand(self.tunnels, "the settings", standing_tunnels(routes, self.tunnels.launchers))
        several = [route for route in routes if route.several is not None]
        if several and self.book is None:
            self.book = several[0].several.book(self, loop)
        if self.book is not None:
            self.book.adopt(several, identified)

    def give_way(self) -> None:
        """Clients find no descriptors on this host: less is kept ready for them.  The loop."""
        if self.book is not None:
            self.book.give_way()

    def close(self) -> None:
        """No new clients come: nothing needs to be ready for them.  The loop, perhaps twice."""
        if self.book is not None:
            self.book.close()

    def remember(self, decision: Decision, found: Resolved) -> Resolved:
        """Keep resolved addresses.  The loop, and threads wait-<n>."""
        if len(self.resolved) >= self.resolved_max:
            self.resolved.clear()
        self.resolved[decision.key] = found
        return found

    def learn(self, key: str, lost: Iterable[Row], won: Row) -> bool:
        """One address of a host took the connect where others did not; whether that is news.  The loop."""
        news = self.laggards.learn(lost, won)
        found = self.resolved.get(key)
        if found is not None:
            self.resolved[key] = found._replace(addresses=self.laggards.last(found.addresses))
        return news

    def may_dial(self, decision: Decision, address: tuple) -> bool:
        """Whether a resolved address may be dialled: never the router itself.

        Where clients choose the port, never that of a tunnel either: what its route allows is asked on its route only.
        Where a client may own the domain that it is led to, never a private address either: whoever owns a domain can
        point it at one.  A claim says itself where it may lead.
        """
        ip = parse_ip(address[0])
        for host, port in (*self.own, *self.own_admin, *self.own_registry):
            own = parse_ip(host)
            if port == address[1] and reaches(ip, own):
                return False
        if address[1] in self.tunnel_ports and decision.route.chooses_port and is_local(ip):
            return False
        if decision.route.reach is not None:
            return decision.route.reach(address)
        return is_public(ip) or decision.route.is_of_one_domain()


def standing_tunnels(routes: Iterable[Route], launchers: Mapping[str, Launcher]) -> list[TunnelKey]:
    """The tunnels of these routes that are to be up before a client asks for them.  No name chooses those."""
    schemes = tuple(f"{scheme}:" for scheme, launcher in launchers.items() if launcher.stands)
    found = [each._replace(pattern=NOBODY).decide(NOBODY).tunnel for route in routes if schemes
             and any(target.startswith(schemes) for target in route.targets)
             for each in route.each() if each.target.startswith(schemes)]
    return list(dict.fromkeys(filter(None, found)))


def ask_nobody(decision: Decision) -> None:
    """`Targets.ask` where there is no router."""


def never_waits(targets: Targets, wait: Wait) -> None:
    """`Scheme.prepare` of a kind whose `ready` never returns None: it is not called."""


def leads_elsewhere(rest: str, listen: str) -> bool:
    """`Scheme.leads_back` of a kind that has no HOST:PORT of this router's."""
    return False


def all_is_well(template: str, rest: str) -> None:
    """`Scheme.guard` of a kind whose `check` is enough."""


def no_obstacle(rest: str) -> str:
    """`Scheme.obstacle` of a kind that needs no program."""
    return ""


class Scheme(NamedTuple):
    """One kind of target, as a row."""

    # The part behind `scheme:`, in the form that is used and shown; raises Malformed.  Called for a sample name when
    # the settings are read, and for each name with its fields filled in.
    check: Callable[[str], str]
    ready: Callable[[Targets, Decision], Backend | None]  # loop: None where it has to wait; raises Refused
    prepare: Callable[[Targets, Wait], None] = never_waits  # wait-<n>: returns when it may be ready; raises Refused
    waits_on: str = "nothing"  # for people: what a client waits for
    leads_back: Callable[[str, str], bool] = leads_elsewhere  # (rest, HOST:PORT where we listen): it is ourselves
    is_tunnel: bool = False  # it has a tunnel in the TunnelTable, and so an idle time
    # Raises Malformed where the fields of (the target as it was written, the same filled in) did what no name may do.
    guard: Callable[[str, str], None] = all_is_well
    holds: tuple[str, ...] = ()  # fields that it fills in itself, later
    is_inside: bool = False  # it leads into this host: whoever reaches the listener gets there
    is_program: bool = False  # it runs programs of the operator's, which never get the Access token
    obstacle: Callable[[str], str] = no_obstacle  # why it cannot be run now, as a sentence; '' where it can
    choose: Callable[[Connection], Backend] | None = None  # instead of `ready`, where the way depends on the client
    # What the tunnel's program is told, where that is more than a target: of this route, and of each split of a name,
    # since only the far end knows which one is meant; raises Refused.
    told: Callable[[Route, Sequence[str]], str] | None = None
    guards_pages: bool = False  # on loopback, pages of other sites may not ask for it: it is more than this host
    # The part behind `scheme:` as people may see it, and its secret, "" where it has none; raises ValueError, which
    # repeats nothing of it.  Called before anything else is.
    put_aside: Callable[[str], tuple[str, str]] | None = None


def check_tunnel(rest: str) -> str:
    """A tunnel's hostname: only the name rules stand between it and argv."""
    return normalise_whole(rest.encode())


def tunnel_ready(targets: Targets, decision: Decision) -> Backend | None:
    """Lease the tunnel, if it is ready."""
    tunnels = targets.tunnels
    tunnel = tunnels.lease(decision.tunnel)
    if tunnel is None:
        return None
    child = tunnel.child
    if child is None:  # the reaper has just taken it away, and changes the state next
        tunnels.release(tunnel)
        return None
    return TunnelBackend(tunnels, decision.target, decision.route.idle, tunnel, child)


def tunnel_prepare(targets: Targets, wait: Wait) -> None:
    """Sleep until the tunnel is ready; the kind of a TunnelError becomes `tunnel_<kind>` of REFUSALS."""
    decision = wait.decision
    try:
        targets.tunnels.wait(decision.tunnel, wait.client, wait.deadline, wait.doubted, decision.route.idle)
    except TunnelError as error:
        raise tunnel_refused(error.kind, str(error)) from None


def check_tcp(rest: str) -> str:
    """HOST:PORT, as it came.  Raises Malformed, also for numbers that a resolver takes for addresses."""
    try:
        host, port = parse_host_port(rest)
    except ValueError as error:
        raise Malformed(str(error), kind="bad_name") from None
    if not port or not HOST.fullmatch(host) or is_number(host):
        raise Malformed(f"{rest!r} is not HOST:PORT, with a name or an address as HOST", kind="bad_name")
    return rest


def reaches(ip: Address, own: Address) -> bool:
    """Whether a connect to an address arrives at a listener.  One to 0.0.0.0 or :: goes to loopback (Linux, BSD)."""
    return own == ip or own.is_unspecified and is_local(ip) or ip.is_unspecified and own.is_loopback


def is_listener(rest: str, listen: str) -> bool:
    """`Scheme.leads_back` of a HOST:PORT, in whatever spelling.  Names are compared, and resolved at each dial only."""
    try:
        (host, port), (own, own_port) = parse_host_port(rest), parse_host_port(listen)
    except ValueError:  # a field stands for the port
        return False
    if port != own_port:
        return False
    try:
        return reaches(parse_ip(host), parse_ip("::" if own == "*" else own))
    except ValueError:
        return host.lower() == own.lower()


def tcp_ready(targets: Targets, decision: Decision) -> Backend | None:
    """The remembered addresses, or a literal one at once; a name that is not remembered has to be resolved.

    A name that is in use is resolved again beside its clients: they get the last addresses until then.
    """
    found = targets.resolved.get(decision.key)
    if found is None or found.until <= (now := monotonic()):
        if found is not None and now < found.until + decision.route.resolve_interval:
            targets.ask(decision)
            return TcpBackend(targets, decision.key, decision.target, found)
        row = literal_row(decision.rest)
        if row is None:
            return None
        if not targets.may_dial(decision, row[1]):
            raise forbidden(row[1][0], row[1])
        found = targets.remember(decision, Resolved((row,), parse_ip(row[1][0]).is_loopback, NEVER))
    return TcpBackend(targets, decision.key, decision.target, found)


def literal_row(rest: str) -> Row | None:
    """The family and the address of a HOST:PORT whose host is an address; None where it is a name."""
    host, port = parse_host_port(rest)
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return None
    if literal.version == 4:
        return socket.AF_INET, (host, port)
    return socket.AF_INET6, (host, port, 0, 0)


def tcp_prepare(targets: Targets, wait: Wait) -> None:
    """Resolve the host.  Its last addresses stay while the resolver is down."""
    decision = wait.decision
    host, port = parse_host_port(decision.rest)
    until = monotonic() + decision.route.resolve_interval
    try:
        rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        known = targets.resolved.get(decision.key)
        if known is None and (error.errno if isinstance(error, OSError) else 0) in (*CAPACITY_ERRNOS, socket.EAI_MEMORY):
            raise Refused("busy", f"{host} cannot be looked up: {error.strerror}") from None  # our trouble, not the name's
        if known is None:
            raise Refused("unresolved", f"{host} does not resolve: {error}") from None
        targets.remember(decision, known._replace(until=until))
        return
    addresses = tuple(dict.fromkeys((family, address) for family, _, _, _, address in rows))
    allowed = tuple(row for row in addresses if targets.may_dial(decision, row[1]))
    if not allowed:
        raise forbidden(host, addresses[0][1])
    local = all(parse_ip(address[0]).is_loopback for _, address in allowed)
    ordered = targets.laggards.last(alternate(allowed))
    targets.remember(decision, Resolved(ordered[:ADDRESSES_MAX], local, until))


def forbidden(host: str, address: tuple) -> Refused:
    """The refusal for a host whose address the route may not reach."""
    return Refused("forbidden", f"{host} is {address[0]}, which this route does not lead to")


def check_unix(rest: str) -> str:
    """The absolute path of a unix socket, as it came.  Raises Malformed.

    No part of it is empty, `.` or `..`: so a field, which has no `/`, never leaves its folder.  A symlink is followed.
    """
    if not re.fullmatch(r"(?:/(?!\.{0,2}(?:/|\Z))[!-.0-~]+)+", rest) or len(rest) > UNIX_PATH_MAX:
        raise Malformed(f"{printable(rest)!r} is not the absolute path of a unix socket: at most {UNIX_PATH_MAX} "
                        "characters, no spaces, no . or .. in it", kind="bad_name")
    return rest


def keeps_its_folder(template: str, rest: str) -> None:
    """Whether each field has filled one part of the path.  Raises Malformed."""
    if template.count("/") != rest.count("/"):
        raise Malformed(f"{printable(rest)!r} is in another folder than {template}", kind="bad_name")


def is_own_socket(rest: str, listen: str) -> bool:
    """`Scheme.leads_back` of a path, where `listen` is one."""
    return os.path.realpath(rest) == os.path.realpath(listen) if listen.startswith("/") else False


def unix_ready(targets: Targets, decision: Decision) -> Backend:
    """There is nothing to resolve or to start.  Raises Refused for the router's own socket, whatever its name."""
    path, own = decision.rest, targets.own_socket
    if own is not None:
        with contextlib.suppress(OSError):  # there is none: the connect says so
            if os.path.samefile(path, own):  # no more than the look-up of a connect
                raise Refused("forbidden", f"{path} is this router's own")
    return UnixBackend(decision.target, ((socket.AF_UNIX, path),), True)


TUNNEL = Scheme(check_tunnel, tunnel_ready, tunnel_prepare, "its tunnel", is_tunnel=True)
SCHEMES = {
    "cloudflared": TUNNEL,
    "carrier": TUNNEL,
    "tcp": Scheme(check_tcp, tcp_ready, tcp_prepare, "its address", is_listener),
    "unix": Scheme(check_unix, unix_ready, leads_back=is_own_socket, guard=keeps_its_folder, is_inside=True),
}
