"""sniroute_listeners: what the router listens on: its own addresses, and ports with one target.

    --listen ---------- arrange ---> places --- bind, listen ---> Listeners without a decision: the client says a name
    --port, [ports] --- arrange ---> places --- Ports.open -----> Listeners with one: all clients are led there

    Listener   a listening socket, made for many accepts
    arrange    what to open for several addresses, which may include each other
    Ports      the ports with one target: which are open, where each leads, what came of its clients

`arrange` looks at all addresses together, since one may include another.  A predecessor (the router that this one
replaces: sniroute_handover) hands over sockets, each for one family or for both.

A reload is all or nothing.  `Ports.open` opens what is new, and closes it again where one address fails; only then
`Ports.adopt` changes anything.  A port that stays keeps its socket, and so the clients in its backlog.

Threads.  The main thread opens at the start; at a reload, the thread that reads the settings again, one at a time.
The loop runs `Ports.adopt`, and the thread that opens waits for it.  So nobody reads `Ports.listeners` while it
changes.

Seams: I want to ...
    listen on what comes from elsewhere     a Route whose pattern is `port ADDRESS`: Ports.open, then Ports.adopt

It imports routes, targets, ports, loop, names and refusals.
"""

from __future__ import annotations

import errno
import socket
from typing import Iterable, Sequence

from sniroute_loop import CAPACITY_ERRNOS
from sniroute_names import parse_ip, show_address
from sniroute_ports import holder
from sniroute_refusals import SettingsError
from sniroute_routes import Decision, Layer, Route, port_address
from sniroute_targets import keep_alive

__version__ = "0.1.0"

BACKLOG = 4096  # the kernel caps it at somaxconn; 5 or 128 lose a burst
NO_NAME = "port.invalid"  # Route.decide wants a name; a port's target has no field that this one could fill


# -- sockets -----------------------------------------------------------------------------------


class Listener(socket.socket):
    """A listening socket whose family and type are known, not asked for at each accept().

    `decision`: where all its clients are led, without a prelude; None: where their names lead.  `held`: see Held.
    """

    family = socket.AF_INET
    type = socket.SOCK_STREAM

    def __init__(self, fd: int | None = None) -> None:
        super().__init__(self.family, self.type, 0, fd)
        self.decision: Decision | None = None
        self.held = False

    def accept(self) -> tuple[socket.SocketType, tuple]:
        """The next client, as the interpreter's own kind of socket, and its address.

        Use SocketType instead of socket.socket, because that is a Python class around it: 4 us for each connection.
        """
        fd, address = self._accept()
        return socket.SocketType(self.family, self.type, 0, fd), address


class Listener6(Listener):
    """A Listener for IPv6."""

    family = socket.AF_INET6


ANY4, ANY6 = "0.0.0.0", "::"
Place = tuple[int, tuple]  # a family and a socket address


def listen_addresses(host: str, port: int, what: str = "--listen") -> list[Place]:
    """(family, address) of what the setting `what` means: each once, IPv4 inside IPv6 as IPv4.

    Raises SettingsError.
    """
    if host == "*":  # as getsockname() says it: so a socket that is handed over is known again
        both = socket.has_dualstack_ipv6()
        return [(socket.AF_INET6, (ANY6, port, 0, 0)) if both else (socket.AF_INET, (ANY4, port))]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) in CAPACITY_ERRNOS:
            raise  # the start says which limit that is
        raise SettingsError(f"{what} {host}:{port}: {getattr(error, 'strerror', error)}") from None
    places: dict[Place, None] = {}
    for family, _, _, _, address in found:
        if family == socket.AF_INET6 and "%" not in address[0] and parse_ip(address[0]).version == 4:
            family, address = socket.AF_INET, (str(parse_ip(address[0])), address[1])
        places[family, address] = None
    return list(places)


def for_both(listen: Sequence[tuple[str, int]], what: str = "--listen") -> set[int]:
    """The ports at which the IPv6 socket for every address is to take IPv4 clients, too.

    `:PORT` means that.  `[::]:PORT` does where no IPv4 address is named for the port.
    """
    places = [place for host, port in listen if host != "*"
              for place in listen_addresses(host, port, what)]
    named = {address[1] for family, address in places if family == socket.AF_INET}
    return ({port for host, port in listen if host == "*" and socket.has_dualstack_ipv6()}
            | {address[1] for _, address in places if address[0] == ANY6} - named) - {0}


def wanted_addresses(listen: Sequence[tuple[str, int]], what: str = "--listen") -> list[tuple[str, int]]:
    """The addresses that a predecessor may have sockets for.

    Where one socket is to serve both families, a predecessor may have one for each.
    """
    found = [address[:2] for host, port in listen for _, address in listen_addresses(host, port, what)]
    return list(dict.fromkeys(found + [(ANY4, port) for port in sorted(for_both(listen, what))]))


def arrange(listen: Sequence[tuple[str, int]], inherited: Sequence[socket.socket] = (),
            what: str = "--listen") -> tuple[list[Place], str]:
    """What to open for `listen`, or to take from the `inherited` sockets; and a sentence about what is left out.

    Two sockets cannot have one port where the address of one takes the other's clients: the kernel says "Address
    already in use".  So an address that another one includes is left out.  Port 0 is another port each time.
    """
    places: list[Place] = []
    left: list[str] = []
    for host, port in listen:
        for place in listen_addresses(host, port, what):
            if port and place in places:
                left.append(f"{show_address(place[1])} (named twice)")
            else:
                places.append(place)
    # A predecessor's sockets are as they are: one for each family, or one for both.
    split, joined = set(), set()
    for sock in inherited:
        host, port = sock.getsockname()[:2]
        if host == ANY4 or host == ANY6 and sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            split.add(port)
        elif host == ANY6:
            joined.add(port)
    both = for_both(listen, what)
    places += [place for port in sorted(both & split) if (place := (socket.AF_INET, (ANY4, port))) not in places]
    kept = []
    for family, address in places:
        port, includes = address[1], ()
        if port and family == socket.AF_INET:
            includes = (ANY4, ANY6) if port in both - split | joined else (ANY4,)
        elif port:
            includes = (ANY6,)
        over = [other for _, other in places if other[0] in includes and other[1] == port and other != address]
        if over:
            left.append(f"{show_address(address)} ({show_address(over[0])})")
        else:
            kept.append((family, address))
    return kept, f"{what}: left out, since another address takes their clients: {', '.join(left)}" if left else ""


class Held(socket.socket):
    """A listening socket that somebody else holds, too (systemd): to close it here ends nothing."""


# -- opening -----------------------------------------------------------------------------------


def bind(places: Iterable[Place], inherited: list[socket.socket], listeners: list[Listener], what: str) -> None:
    """Bind every place, or take its socket out of `inherited`, and append it to `listeners`.

    Options set here are inherited by what is accepted.  `what` is the setting, for people.  Raises SettingsError, and
    OSError with one of CAPACITY_ERRNOS; then `listeners` has those that are open.
    """
    places = list(places)
    taken = {(family, address[1]) for family, address in places if address[1]}
    for family, address in places:
        found = next((each for each in inherited if each.getsockname() == address), None)
        if found is not None:
            inherited.remove(found)
        # An IPv6 socket for every address takes IPv4 clients, too, unless another socket of ours is for them: that one
        # could not be bound then.
        both = address[0] == ANY6 and (socket.AF_INET, address[1]) not in taken
        try:
            held = isinstance(found, Held) or getattr(found, "held", False)
            listener = (Listener6 if family == socket.AF_INET6 else Listener)(found and found.detach())
            listener.held = held
            listeners.append(listener)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(listener)
            if found is not None:
                continue
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise trouble(what, address, error) from None


def listen(listeners: Iterable[Listener], what: str) -> None:
    """Listen on every socket.  Raises SettingsError."""
    for listener in listeners:
        try:
            listener.listen(BACKLOG)
        except OSError as error:  # SO_REUSEADDR lets two bind; only one may listen
            raise trouble(what, listener.getsockname(), error) from None
        listener.setblocking(False)


def trouble(what: str, address: tuple, error: OSError) -> Exception:
    """What to raise for an address that cannot be listened on: who has it, where that can be told."""
    if error.errno in CAPACITY_ERRNOS:
        return error  # the start says which limit that is
    whose = holder(address[1]) if error.errno == errno.EADDRINUSE else ""
    return SettingsError(f"{what} {show_address(address)}: {error.strerror}{whose and f': {whose} has it'}")


# -- ports with one target ---------------------------------------------------------------------


def sockets_of(routes: Iterable[Route], sockets: Iterable[socket.socket]) -> list[socket.socket]:
    """Those of `sockets` that have the address of one of these ports.  Raises SettingsError."""
    wanted = {place for place in wanted_addresses(list(map(port_address, routes)), "port") if place[1]}
    return [sock for sock in sockets if sock.getsockname()[:2] in wanted]


class Ports:
    """The ports with one target.  See the threads above."""

    def __init__(self) -> None:
        self.routes: tuple[Route, ...] = ()
        self.layer = Layer()  # their tallies: a port that comes back while it has connections counts on
        self.listeners: dict[str, list[Listener]] = {}  # by the pattern of its route
        self.spare: list[Listener] = []  # Held, and a reload took their port out: systemd has it, so no bind would work

    def open(self, routes: Iterable[Route], inherited: Sequence[socket.socket] = ()) -> dict[str, list[Listener]]:
        """Listen on those ports that are not open; the caller owns what is returned, by pattern, until `adopt`.

        Raises SettingsError with a line for each that cannot be had, and OSError where this host allows too little;
        then all is as it was.
        """
        found: list[socket.socket] = [*inherited, *self.spare]
        opened: dict[str, list[Listener]] = {}
        wrong: list[str] = []
        try:
            for route in routes:
                if route.pattern in self.listeners:
                    continue
                listeners = opened[route.pattern] = []
                try:
                    address = port_address(route)
                    places, _ = arrange([address], sockets_of([route], found), "port")
                    bind(places, found, listeners, "port")
                    listen(listeners, "port")
                except SettingsError as error:
                    wrong += error.lines
            if wrong:
                raise SettingsError(*wrong)
        except BaseException:
            self.close_all(opened)
            raise
        return opened

    def close_all(self, opened: dict[str, list[Listener]]) -> None:
        """Close what was opened; what is Held is kept for the next time."""
        for listener in (each for listeners in opened.values() for each in listeners):
            if listener.held:
                self.spare.append(listener)
            else:
                listener.close()

    def adopt(self, routes: Sequence[Route], identified: bool,
              opened: dict[str, list[Listener]]) -> tuple[list[Listener], dict[str, list[Listener]]]:
        """Go on with these ports.  Returns those that are new, and those that are gone, which the caller closes.

        `identified`: see Route.decide.
        """
        wanted = {route.pattern for route in routes}
        gone = {pattern: listeners for pattern, listeners in self.listeners.items() if pattern not in wanted}
        new = [listener for pattern, listeners in opened.items() for listener in listeners]
        self.spare = [each for each in self.spare if each.fileno() >= 0]  # `open` may have used some
        self.listeners = {pattern: listeners for pattern, listeners in {**self.listeners, **opened}.items()
                          if pattern in wanted}
        for pattern in gone:
            self.layer.drop(pattern)
        for route in routes:
            self._lead(route, identified)
        self.routes = tuple(routes)
        return new, gone

    def adopt_one(self, pattern: str, route: Route | None, identified: bool,
                  opened: dict[str, list[Listener]]) -> tuple[list[Listener], dict[str, list[Listener]]]:
        """As `adopt`, where all other ports stay as they are; without a `route` this one is gone."""
        self.listeners |= opened
        self.routes = tuple(each for each in self.routes if each.pattern != pattern)
        if route is None:
            listeners = self.listeners.pop(pattern, None)
            if listeners is None:
                return [], {}
            self.layer.drop(pattern)
            return [], {pattern: listeners}
        self._lead(route, identified)
        self.routes += route,
        return opened.get(pattern, []), {}

    def _lead(self, route: Route, identified: bool) -> None:
        """Have the listeners of a port lead where its route does."""
        self.layer.put(route)
        decision = route.decide(NO_NAME, identified, self.layer.tallies[route.pattern])
        for listener in self.listeners[route.pattern]:
            listener.decision = decision
