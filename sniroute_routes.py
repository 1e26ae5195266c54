"""sniroute_routes: where a name leads.

    name --- Routes.decide ---> Decision(route, target, kind of target) --- ready ---> Backend
             pattern -> target        fields filled in                      or: wait

Threads: the loop decides and asks `ready`; a thread wait-<n> runs `prepare`.
"""

from __future__ import annotations

import time
import errno
import ipaddress
import os
import re
import socket
from typing import Callable, Iterable, NamedTuple, TYPE_CHECKING

from sniroute_names import HOST, is_number, normalise, parse_host_port
from sniroute_refusals import Malformed, Refused, tunnel_refused
from sniroute_tunnels import Child, Tunnel, TunnelError

monotonic = time.monotonic

if TYPE_CHECKING:
    from sniroute_router import Router, Wait

RESOLVED_FOR = 30.0  # a resolved address; getaddrinfo does not tell its TTL
RESOLVED_MAX = 1024  # resolved hosts kept: names may come from strangers
ADDRESSES_MAX = 4  # addresses of one host that are tried
DECISIONS_MAX = 4096  # routed names remembered: names come from strangers


class Decision(NamedTuple):
    """What becomes of a name."""

    route: Route
    target: str  # the target with its fields filled in: `scheme:rest`
    scheme: Scheme
    rest: str
    key: str  # of what is kept for it: two routes to one target may not be allowed the same addresses
    tunnel: str  # where that is a tunnel: its key in the TunnelTable, `launcher:hostname`
    tally: Tally
    plain: bool  # the route asks for nothing that the prelude has to be looked at for


class Tally:
    """What came of a route.  Written by the loop only."""

    __slots__ = ("active", "total", "refused", "up", "down")

    def __init__(self) -> None:
        self.active = 0  # connections now
        self.total = 0  # that are over, those that were refused included
        self.refused = 0
        self.up = 0  # bytes, of those that are over
        self.down = 0


class Route(NamedTuple):
    """One `PATTERN=TARGET`, and what a file of settings may say of it beside that: ROUTE_OPTIONS."""

    pattern: str
    target: str
    send_proxy: str = "as-received"  # see PROXY_WRITERS
    allow: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] | None = None  # client networks; None: all
    max_connections: int | None = None
    idle: float | None = None  # in the place of --idle
    connection_idle: float | None = None  # in the place of --connection-idle

    def __str__(self) -> str:
        return f"{self.pattern}={self.target}"

    def decide(self, name: str, identified: bool = False, tally: Tally | None = None) -> Decision:
        """Fill in the target for a name.  Raises Malformed where that gives no valid target.

        `identified` is whether the router has an Access token, which is not shown to everybody.
        """
        scheme, _, rest = expand(self.target, name).partition(":")
        row = SCHEMES[scheme]
        rest = row.check(rest)
        target = f"{scheme}:{rest}"
        tunnel = ANONYMOUS + target if identified and not self.is_of_one_domain() else target
        plain = self.send_proxy == "as-received" and self.allow is None and self.max_connections is None
        return Decision(self, target, row, rest, f"{self.pattern}={target}", tunnel, tally or Tally(), plain)

    def is_of_one_domain(self) -> bool:
        """Whether all that its names lead to is in one domain, which the operator has chosen.

        Else a client may own the domain that it leads to: `cft-{name}` for any name, or
        `cft-{label}-{domain}` for `*.example.com`, which is `cft-a-example.com`.
        """
        star, _, domain = self.pattern.partition(".")
        if not star.startswith("*"):
            return True
        names = ("a.b.c", "d.e.f") if not domain else (f"a.{domain}", f"b.{'c.' * (star == '**')}{domain}")
        host = self.target.partition(":")[2]
        ends = [expand(host, name).split(".")[-2:] for name in names]
        return ends[0] == ends[1] and len(ends[0]) == 2


ANONYMOUS = "anonymous "  # before the launcher of a tunnel that is not given the router's Access token
FIELDS = re.compile(r"\{([^{}]*)\}")


def expand(template: str, name: str) -> str:
    """`template` with {name}, {label} (its first label) and {domain} (the rest) filled in."""
    label, _, domain = name.partition(".")
    values = {"name": name, "label": label, "domain": domain}
    return FIELDS.sub(lambda field: values[field[1]], template)


def parse_route(text: str) -> Route:
    """`PATTERN=TARGET`.  Raises ValueError with a sentence for people."""
    pattern, equals, target = text.partition("=")
    scheme, colon, rest = target.partition(":")
    if not equals or not colon:
        raise ValueError(f"{text!r} is not PATTERN=SCHEME:REST")
    stars = next((stars for stars in ("**.", "*.") if pattern.startswith(stars)), "")
    try:
        if pattern != "*":
            pattern = stars + normalise(pattern[len(stars):].encode())
    except Malformed:
        raise ValueError(f"{pattern!r} is not a name, *.NAME, **.NAME or * (NAME has two labels at least)") from None
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme!r} is no kind of target: there are {', '.join(sorted(SCHEMES))}")
    unknown = [field for field in FIELDS.findall(rest) if field not in ("name", "label", "domain")]
    if unknown or "{" in FIELDS.sub("", rest) or "}" in FIELDS.sub("", rest):
        raise ValueError(f"{rest!r} has a field other than {{name}}, {{label}}, {{domain}}")
    try:  # a sample name shows what no name could make valid
        SCHEMES[scheme].check(expand(rest, pattern.replace("*", "a") if pattern != "*" else "a.example.com"))
    except Malformed as error:
        raise ValueError(f"{target!r}: {error}") from None
    return Route(pattern, target)


class Routes:
    """An immutable set of routes: exact name, else the longest wildcard.

    `*.example.com` is one label in front, `**.example.com` one or more, `*` any name.
    `identified`: see Route.decide.  Raises ValueError where a pattern is there twice.
    """

    def __init__(self, routes: Iterable[Route], identified: bool = False):
        self.routes = tuple(routes)
        self.identified = identified
        self.patterns = {route.pattern: route for route in self.routes}
        if len(self.patterns) < len(self.routes):
            patterns = [route.pattern for route in self.routes]
            raise ValueError(f"{next(p for p in patterns if patterns.count(p) > 1)} is routed twice")
        self.tallies = {route.pattern: Tally() for route in self.routes}
        self.decisions: dict[str, Decision] = {}  # what was decided; emptied when there are ...
        self.decisions_max = max(DECISIONS_MAX, 2 * len(self.routes))

    def find(self, name: str) -> Route | None:
        """The route for a normalised name."""
        patterns = self.patterns
        if name in patterns:
            return patterns[name]
        stars, suffix = ("*.", "**."), name
        while suffix := suffix.partition(".")[2]:
            for star in stars:
                if star + suffix in patterns:
                    return patterns[star + suffix]
            stars = ("**.",)
        return patterns.get("*")

    def in_order(self) -> list[Route]:
        """The routes as `find` prefers them: names, then wildcards, the longest first."""
        def rank(route: Route) -> tuple[int, int, str, str]:
            stars, star, suffix = route.pattern.rpartition("*")
            return (1, -suffix.count("."), stars, suffix) if star else (0, 0, "", suffix)
        return sorted(self.routes, key=rank)

    def decide(self, name: str) -> Decision:
        """What becomes of a normalised name.  Raises Refused where nothing does."""
        decision = self.decisions.get(name)
        if decision is None:
            route = self.find(name)
            if route is None:
                raise Refused("no_route", f"no route for {name}")
            if len(self.decisions) >= self.decisions_max:
                self.decisions.clear()
            decision = self.decisions[name] = route.decide(name, self.identified, self.tallies[route.pattern])
        return decision

    def take_tallies(self, former: Routes) -> None:
        """Go on counting where other routes ended, pattern by pattern.  Before any name is decided.

        A pattern that is gone is kept while it has connections: it may come back.
        """
        self.tallies |= {pattern: tally for pattern, tally in former.tallies.items()
                         if pattern in self.tallies or tally.active}


class Backend(NamedTuple):
    """Where to connect to now."""

    addresses: tuple[tuple[int, tuple], ...]  # (family, socket address), best first
    local: bool  # all of them loopback
    tunnel: Tunnel | None = None  # leased to the connection
    child: Child | None = None  # the process that listens there

    def intact(self, server: socket.SocketType) -> bool:
        """Whether what answered the connect to a tunnel was its own process.

        Asked after the connect, which has to be over: a child that lives now held its port then, so no
        byte of a client reaches a stranger that took the port of a tunnel that died.
        Raises BlockingIOError where the connect is not over, and OSError where it failed.
        """
        error = server.connect_ex(self.addresses[0][1])
        if error not in (0, errno.EISCONN):
            raise OSError(error, os.strerror(error))  # of EALREADY, a BlockingIOError
        # In this order: the reaper takes the child away before it closes what alive() reads.
        return self.child.alive() and self.tunnel.child is self.child


class Scheme(NamedTuple):
    """One kind of target, as a row."""

    check: Callable[[str], str]  # the part behind `scheme:`, made canonical; raises Malformed
    ready: Callable[[Router, Decision], Backend | None]  # loop: None where it has to wait
    prepare: Callable[[Router, Wait], None]  # wait-<n>: returns when it may be ready; raises Refused
    waits_on: str  # for people: what a client waits for


def check_tunnel(rest: str) -> str:
    """A tunnel's hostname: only the name rules stand between it and argv."""
    return normalise(rest.encode())


def tunnel_ready(router: Router, decision: Decision) -> Backend | None:
    """Lease the tunnel, if it is ready; None: it has to be waited for.  Loop."""
    tunnel = router.tunnels.lease(decision.tunnel)
    if tunnel is None:
        return None
    child = tunnel.child
    if child is None:  # the reaper let go of it an instant ago: the state follows
        router.tunnels.release(tunnel)
        return None
    return Backend(((socket.AF_INET, child.address),), True, tunnel, child)


def tunnel_prepare(router: Router, wait: Wait) -> None:
    """Sleep until the tunnel is ready; the kind of a TunnelError becomes `tunnel_<kind>` of REFUSALS."""
    try:
        router.tunnels.wait(wait.decision.tunnel, wait.client, wait.deadline, wait.doubted, wait.decision.route.idle)
    except TunnelError as error:
        raise tunnel_refused(error.kind, str(error)) from None


def check_tcp(rest: str) -> str:
    """HOST:PORT, as it came.  Raises Malformed, also for numbers that a resolver takes for addresses."""
    try:
        host, port = parse_host_port(rest)
    except ValueError as error:
        raise Malformed(str(error), kind="bad_name") from None
    if not port or not HOST.fullmatch(host) or is_number(host):
        raise Malformed(f"{rest!r} is not HOST:PORT", kind="bad_name")
    return rest


def tcp_ready(router: Router, decision: Decision) -> Backend | None:
    """The remembered addresses, or a literal one at once; None: tcp_prepare resolves it, or refuses.  Loop."""
    backend, until = router.resolved.get(decision.key, (None, 0.0))
    if until > monotonic():
        return backend
    host, port = parse_host_port(decision.rest)
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return None  # a name: to be resolved
    address = (host, port) if literal.version == 4 else (host, port, 0, 0)
    family = socket.AF_INET if literal.version == 4 else socket.AF_INET6
    if not router.may_dial(decision, address):
        return None  # tcp_prepare says so
    backend = Backend(((family, address),), literal.is_loopback)
    router.remember(decision, backend, float("inf"))
    return backend


def tcp_prepare(router: Router, wait: Wait) -> None:
    """Resolve the host.  A host that was there before stays while the resolver is down."""
    host, port = parse_host_port(wait.decision.rest)
    until = monotonic() + RESOLVED_FOR
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        backend = router.resolved.get(wait.decision.key, (None,))[0]
        if backend is None:
            raise Refused("unresolved", f"{host} does not resolve: {error}") from None
        router.remember(wait.decision, backend, until)
        return
    addresses = tuple(dict.fromkeys((family, address) for family, _, _, _, address in found))
    allowed = tuple(a for a in addresses if router.may_dial(wait.decision, a[1]))
    if not allowed:
        raise Refused("forbidden", f"{host} is {addresses[0][1][0]}, which this route does not lead to")
    local = all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in allowed)
    router.remember(wait.decision, Backend(allowed[:ADDRESSES_MAX], local), until)


SCHEMES = {
    "cloudflared": Scheme(check_tunnel, tunnel_ready, tunnel_prepare, "its tunnel"),
    "carrier": Scheme(check_tunnel, tunnel_ready, tunnel_prepare, "its tunnel"),
    "tcp": Scheme(check_tcp, tcp_ready, tcp_prepare, "its address"),
}
