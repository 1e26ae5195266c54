"""sniroute_routes: where a name leads.

    name --- Routes.decide ---> Decision: the route, its target with the fields filled in, the row of its kind
             pattern -> target

    Routes    ordered layers of patterns, the configured one first; a decision is made once for each name
    Layer     the routes of one source: exact names and wildcards
    Route     one PATTERN=TARGET, and its options

Threads.  The loop decides.  Other threads may decide too (an operator asks for a name's tunnel): what they see is
whole, since a Routes is swapped as one object and a layer changes by single assignments.

Seams: I want to ...
    add a kind of target          a row in SCHEMES of sniroute_targets
    add an option of a route      a field of Route, and its row in ROUTE_OPTIONS of sniroute_settings
    feed routes from elsewhere    a Layer behind the configured one: Routes.add_layer, then Layer.put and Layer.drop

What a name is worth: nothing.  SNI is not authentication; `allow` looks at addresses only.
"""

from __future__ import annotations

import re
import weakref
from typing import Callable, Iterable, NamedTuple

from sniroute_launchers import TunnelKey, Variable
from sniroute_names import Network, ascii_advice, has_owner, is_here, normalise, normalise_whole, printable
from sniroute_refusals import Malformed, Refused
from sniroute_targets import SCHEMES, Scheme

__version__ = "0.1.0"

DECISIONS_MAX = 4096  # routed names remembered: names come from strangers


# -- routes ------------------------------------------------------------------------------------


class Tally:
    """Counts of a route's connections.  Written by the loop only."""

    __slots__ = ("active", "total", "refused", "up", "down", "__weakref__")

    def __init__(self) -> None:
        self.active = 0  # connections now
        self.total = 0  # connections that are over, refused ones included
        self.refused = 0
        self.up = 0  # bytes, of those that are over
        self.down = 0


class Decision(NamedTuple):
    """What becomes of a name."""

    route: Route
    target: str  # the target with its fields filled in: `scheme:rest`
    scheme: Scheme
    rest: str
    key: str  # cache key; holds the pattern, too: two routes to one target may differ in the addresses they allow
    tunnel: TunnelKey | None  # where that is a tunnel
    tally: Tally
    plain: bool  # the route has no option that each connection has to be checked for


class Route(NamedTuple):
    """One `PATTERN=TARGET`, and its options: ROUTE_OPTIONS of sniroute_settings."""

    pattern: str
    target: str
    send_proxy: str = "as-received"  # see PROXY_WRITERS
    allow: tuple[Network, ...] | None = None  # client networks; None: all
    max_connections: int | None = None
    idle: float | None = None  # seconds, instead of --idle
    connection_idle: float | None = None  # seconds, instead of --connection-idle
    env: tuple[Variable, ...] = ()  # for its program
    env_from: tuple[Variable, ...] = ()  # the router's own, for its program

    def __str__(self) -> str:
        return f"{self.pattern}={self.target}"

    @property
    def scheme(self) -> Scheme:
        """The row of its kind of target."""
        return kind(self.target.partition(":")[0])

    def decide(self, name: str, identified: bool = False, tally: Tally | None = None) -> Decision:
        """Fill in the target for a name.  Raises Malformed where that gives no valid target.

        `identified`: the router has an Access token, which is not shown to everybody.
        """
        scheme, _, rest = expand(self.target, name).partition(":")
        row = kind(scheme)
        rest = row.check(rest)
        row.guard(self.target.partition(":")[2], rest)
        target = f"{scheme}:{rest}"
        tunnel = None
        if row.is_program and row.is_tunnel:
            tunnel = TunnelKey(scheme, rest, variables=self.env + self.env_from)
        elif row.is_tunnel:
            tunnel = TunnelKey(scheme, rest, not identified or self.is_of_one_domain())
        plain = self.send_proxy == "as-received" and self.allow is None and self.max_connections is None
        return Decision(self, target, row, rest, f"{self.pattern}={target}", tunnel, tally or Tally(), plain)

    def is_of_one_domain(self) -> bool:
        """Whether all its names lead into one domain, which the operator has chosen, and which has one owner.

        Else a client may own the domain that it is led to: `cft-{name}` for any name; `cft-{label}-{domain}` for
        `*.example.com`, which is `cft-a-example.com`; any name below `co.uk`.  Then it is neither shown the Access
        token, nor led to a private address.
        """
        stars, dot, domain = self.pattern.partition(".")
        if not stars.startswith("*"):
            return True
        host, _, last = self.target.partition(":")[2].rpartition(":")
        names = [CHOSEN + dot + domain, f"{CHOSEN}.{CHOSEN}{dot}{domain}"]  # one label in front; more of them
        hosts = [expand(host or last, name) for name in (names[:1] if stars == "*" and domain else names)]
        if len({tuple(each.split(".")[-2:]) for each in hosts}) > 1:
            return False
        ends = [each.rpartition(CHOSEN)[2].partition(".")[2] for each in hosts if CHOSEN in each]
        return all(map(has_owner, ends))  # each is what stands behind the label that holds the client's last part


PROGRAM_KINDS = ("exec", "command")  # kinds of target that are an option


def kind(scheme: str) -> Scheme:
    """The row of a kind of target.  Raises ValueError where there is none, or its file is not there."""
    row = SCHEMES.get(scheme)
    if row is None and scheme in PROGRAM_KINDS:
        if not is_here("sniroute_commands"):
            raise ValueError(f"{scheme}: needs sniroute_commands.py, which is not beside sniroute.py: copy it there")
        from sniroute_commands import COMMAND_SCHEMES  # imported late: an option
        SCHEMES.update(COMMAND_SCHEMES)
        row = SCHEMES[scheme]
    if row is None:
        raise ValueError(f"{printable(scheme)!r} is no kind of target: there are "
                         f"{', '.join(sorted({*SCHEMES, *PROGRAM_KINDS}))}")
    return row


CHOSEN = "*"  # what a client may choose in a name: no name and no field has this character
FIELDS = re.compile(r"\{([^{}]*)\}")


def expand(template: str, name: str) -> str:
    """`template` with {name}, {label} (its first label) and {domain} (the rest) filled in."""
    label, _, domain = name.partition(".")
    values = {"name": name, "label": label, "domain": domain}
    return FIELDS.sub(lambda field: values.get(field[1], field[0]), template)  # a kind may have fields of its own


def parse_route(text: str) -> Route:
    """`PATTERN=TARGET`.  Raises ValueError with a sentence for people."""
    pattern, equals, target = text.partition("=")
    scheme, colon, rest = target.partition(":")
    if not equals or not colon:
        raise ValueError(f"{text!r} is not PATTERN=SCHEME:REST")
    stars = next((stars for stars in ("**.", "*.") if pattern.startswith(stars)), "")
    try:
        if pattern != "*":
            check = normalise_whole if stars else normalise
            pattern = stars + check(pattern[len(stars):].encode("utf-8", "surrogateescape"))
    except Malformed:
        raise ValueError(f"{pattern!r} is not a name, *.NAME, **.NAME or * (behind a star, NAME has two labels at "
                         f"least){ascii_advice(pattern)}") from None
    row = kind(scheme)
    unknown = [field for field in FIELDS.findall(rest) if field not in ("name", "label", "domain", *row.holds)]
    if unknown or "{" in FIELDS.sub("", rest) or "}" in FIELDS.sub("", rest):
        raise ValueError(f"{rest!r} has a field other than {{name}}, {{label}}, {{domain}}")
    try:  # a sample name shows what no name could make valid
        sample = expand(rest, pattern.replace("*", "a") if pattern != "*" else "a.example.com")
        row.check(sample)
        row.guard(rest, sample)
    except Malformed as error:
        advice = ascii_advice(target)
        raise ValueError(f"{target!r} is not ASCII{advice}" if advice else f"{target!r}: {error}") from None
    return Route(pattern, target)


class Layer:
    """Some routes by their pattern: exact name, else the longest wildcard.  Changed in O(1), by the loop.

    `*.example.com` is one label in front, `**.example.com` one or more, `*` any name of two labels or more: one label
    is a name of this host's own network, and is served where a route names it.
    """

    def __init__(self, routes: Iterable[Route] = ()):
        self.patterns: dict[str, Route] = {}
        self.tallies: dict[str, Tally] = {}
        # Of routes that were dropped with connections: a tally is here until the last of them ends.
        self.leaving: weakref.WeakValueDictionary[str, Tally] = weakref.WeakValueDictionary()
        self.forget: Callable[[str], None] = lambda pattern: None  # drops the decisions that it made; set by Routes
        for route in routes:
            if route.pattern in self.patterns:
                raise ValueError(f"{route.pattern} is routed twice")
            self.put(route)

    def put(self, route: Route) -> None:
        """Add a route, or replace the one of its pattern."""
        self.patterns[route.pattern] = route
        if route.pattern not in self.tallies:
            self.tallies[route.pattern] = self.leaving.pop(route.pattern, None) or Tally()
        self.forget(route.pattern)

    def drop(self, pattern: str) -> None:
        """Take a route out.  Raises KeyError where there is none."""
        del self.patterns[pattern]
        self.forget(pattern)
        tally = self.tallies.pop(pattern)
        if tally.active:
            self.leaving[pattern] = tally

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
        return patterns.get("*") if "." in name else None


class Routes:
    """The layers of routes, in order; the first layer, `configured`, is that of the settings.

    `identified`: see Route.decide.  Raises ValueError where a pattern is there twice.
    """

    def __init__(self, routes: Iterable[Route], identified: bool = False):
        self.routes = tuple(routes)  # the configured ones
        self.identified = identified
        self.layers: list[Layer] = []
        self.generation = 0  # counts `forget`: another thread that decides meanwhile keeps nothing
        self.decisions: dict[str, Decision] = {}  # what was decided, by name; emptied when there are too many
        self.decisions_max = max(DECISIONS_MAX, 2 * len(self.routes))
        self.configured = Layer(self.routes)
        self.add_layer(self.configured)

    def add_layer(self, layer: Layer) -> None:
        """Ask this layer too, where those before it have no route."""
        layer.forget = self.forget
        self.layers.append(layer)

    def forget(self, pattern: str) -> None:
        """A route has changed: decide anew for the names that it fits."""
        self.generation += 1
        if "*" in pattern:
            self.decisions.clear()
        else:
            self.decisions.pop(pattern, None)

    def find(self, name: str) -> tuple[Route, Tally] | None:
        """The route for a normalised name, and its Tally."""
        for layer in self.layers:
            route = layer.find(name)
            if route is not None:
                return route, layer.tallies[route.pattern]
        return None

    @property
    def tallies(self) -> dict[str, Tally]:
        """The tallies of the configured routes, by pattern."""
        return self.configured.tallies

    def in_order(self) -> list[Route]:
        """The configured routes as they are preferred: names, then wildcards, the longest first."""
        def rank(route: Route) -> tuple[int, int, str, str]:
            stars, star, suffix = route.pattern.rpartition("*")
            return (1, -suffix.count("."), stars, suffix) if star else (0, 0, "", suffix)
        return sorted(self.routes, key=rank)

    def decide(self, name: str) -> Decision:
        """What becomes of a normalised name.  Raises Refused where nothing does."""
        decision = self.decisions.get(name)
        if decision is None:
            generation = self.generation
            found = self.find(name)
            if found is None:
                raise Refused("no_route", f"no route for {name}")
            if len(self.decisions) >= self.decisions_max:
                self.decisions.clear()
            route, tally = found
            decision = route.decide(name, self.identified, tally)
            if generation == self.generation:
                self.decisions[name] = decision
        return decision

    def succeed(self, former: Routes) -> None:
        """Take the place of other routes: go on counting where they ended, and keep their other layers.

        Before any name is decided.  A configured pattern that is gone is kept while it has connections: it may
        come back.
        """
        tallies = self.configured.tallies
        tallies |= {pattern: tally for pattern, tally in former.tallies.items() if pattern in tallies or tally.active}
        for layer in former.layers[1:]:
            self.add_layer(layer)
