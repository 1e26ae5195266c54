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
from typing import TYPE_CHECKING, Callable, Iterable, NamedTuple, Sequence

from sniroute_launchers import TunnelKey
from sniroute_names import Network, ascii_advice, has_owner, normalise, normalise_whole
from sniroute_refusals import Malformed, Refused
from sniroute_targets import SCHEMES, Scheme

if TYPE_CHECKING:
    from sniroute_backends import Several

__version__ = "0.1.0"

DECISIONS_MAX = 4096  # routed names remembered: names come from strangers
SHOWN_MAX = 8  # of the targets of one route: a line of the log has room for so many


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
    members: Sequence[Decision] = ()  # of each of its targets, where the route has several; never changed


class Route(NamedTuple):
    """One `PATTERN=TARGET`, and its options: ROUTE_OPTIONS of sniroute_settings."""

    pattern: str
    target: str
    send_proxy: str = "as-received"  # see PROXY_WRITERS
    allow: tuple[Network, ...] | None = None  # client networks; None: all
    max_connections: int | None = None
    idle: float | None = None  # seconds, instead of --idle
    connection_idle: float | None = None  # seconds, instead of --connection-idle
    members: tuple[str, ...] = ()  # the targets, each `scheme:rest`, where there are several; `target` is for people
    several: Several | None = None  # what is done with those; given where there are any

    def __str__(self) -> str:
        return f"{self.pattern}={self.target}"

    @property
    def scheme(self) -> Scheme:
        """The row of its kind of target."""
        if self.several is not None:
            return self.several.scheme
        return SCHEMES[self.target.partition(":")[0]]

    @property
    def targets(self) -> tuple[str, ...]:
        """All its targets, each `scheme:rest`."""
        return self.members or (self.target,)

    @property
    def has_tunnel(self) -> bool:
        """Whether one of its targets is a tunnel."""
        return any(SCHEMES[target.partition(":")[0]].is_tunnel for target in self.targets)

    def each(self) -> list[Route]:
        """A route to each of its targets."""
        return [self._replace(target=target, members=(), several=None) for target in self.members] or [self]

    def decide(self, name: str, identified: bool = False, tally: Tally | None = None) -> Decision:
        """Fill in the target for a name.  Raises Malformed where that gives no valid target.

        `identified`: the router has an Access token, which is not shown to everybody.
        """
        if self.several is not None:
            return self._decide_several(name, identified, tally or Tally())
        scheme, _, rest = expand(self.target, name).partition(":")
        row = SCHEMES[scheme]
        rest = row.check(rest)
        target = f"{scheme}:{rest}"
        tunnel = TunnelKey(scheme, rest, not identified or self.is_of_one_domain()) if row.is_tunnel else None
        return Decision(self, target, row, rest, f"{self.pattern}={target}", tunnel, tally or Tally(), self.is_plain)

    def _decide_several(self, name: str, identified: bool, tally: Tally) -> Decision:
        """As `decide`, with the decision of each target.  Without fields these are the same for each name."""
        members, key = self.several.fixed, self.pattern
        if not members:
            members = [route.decide(name, identified, tally) for route in self.each()]
            if self.has_fields:
                key = " ".join([self.pattern, *(member.target for member in members)])
            else:
                self.several.fixed[:] = members  # one assignment: another thread may decide, too
        target = expand(self.target, name)
        return Decision(self, target, self.several.scheme, "", key, None, tally, self.is_plain, members)

    @property
    def has_fields(self) -> bool:
        """Whether a target depends on the name."""
        return any(FIELDS.search(target) for target in self.targets)

    @property
    def is_plain(self) -> bool:
        """Whether it has no option that each connection has to be checked for."""
        return self.send_proxy == "as-received" and self.allow is None and self.max_connections is None

    def is_of_one_domain(self) -> bool:
        """Whether all its names lead into one domain, which the operator has chosen, and which has one owner.

        Else a client may own the domain that it is led to: `cft-{name}` for any name; `cft-{label}-{domain}` for
        `*.example.com`, which is `cft-a-example.com`; any name below `co.uk`.  Then it is neither shown the Access
        token, nor led to a private address.
        """
        if self.members:
            return all(route.is_of_one_domain() for route in self.each())
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


CHOSEN = "*"  # what a client may choose in a name: no name and no field has this character
FIELDS = re.compile(r"\{([^{}]*)\}")


def expand(template: str, name: str) -> str:
    """`template` with {name}, {label} (its first label) and {domain} (the rest) filled in."""
    label, _, domain = name.partition(".")
    values = {"name": name, "label": label, "domain": domain}
    return FIELDS.sub(lambda field: values[field[1]], template)


def parse_route(text: str, listed: Sequence[str] = ()) -> Route:
    """`PATTERN=TARGET`; or `PATTERN=`, and the targets as a list.  Raises ValueError with a sentence for people."""
    pattern, equals, target = text.partition("=")
    if not equals or not listed and ":" not in target:
        raise ValueError(f"{text!r} is not PATTERN=SCHEME:REST")
    stars = next((stars for stars in ("**.", "*.") if pattern.startswith(stars)), "")
    try:
        if pattern != "*":
            check = normalise_whole if stars else normalise
            pattern = stars + check(pattern[len(stars):].encode("utf-8", "surrogateescape"))
    except Malformed:
        raise ValueError(f"{pattern!r} is not a name, *.NAME, **.NAME or * (behind a star, NAME has two labels at "
                         f"least){ascii_advice(pattern)}") from None
    targets = [each for text in listed or [target] for each in split_target(text)]
    for each in targets:
        check_target(pattern, each)
    return Route(pattern, targets[0]) if len(targets) == 1 else Route(pattern, shown(targets), members=tuple(targets))


def split_target(target: str) -> list[str]:
    """The targets that `tcp:HOST:PORT,HOST:PORT` means; any other kind is one."""
    scheme, _, rest = target.partition(":")
    return [f"tcp:{each.strip()}" for each in rest.split(",")] if scheme == "tcp" else [target]


def shown(targets: Sequence[str]) -> str:
    """Several targets for people: the first few of them, and how many more there are."""
    few = targets[:SHOWN_MAX]
    if all(target.startswith("tcp:") for target in few):
        few = [few[0], *(target[4:] for target in few[1:])]
    more = len(targets) - SHOWN_MAX
    return ",".join(few) + (f" and {more} more" if more > 0 else "")


def check_target(pattern: str, target: str) -> None:
    """Whether a target is one, for a route of this pattern.  Raises ValueError with a sentence for people."""
    scheme, colon, rest = target.partition(":")
    if not colon:
        raise ValueError(f"{target!r} is not SCHEME:REST")
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme!r} is no kind of target: there are {', '.join(sorted(SCHEMES))}")
    unknown = [field for field in FIELDS.findall(rest) if field not in ("name", "label", "domain")]
    if unknown or "{" in FIELDS.sub("", rest) or "}" in FIELDS.sub("", rest):
        raise ValueError(f"{rest!r} has a field other than {{name}}, {{label}}, {{domain}}")
    try:  # a sample name shows what no name could make valid
        SCHEMES[scheme].check(expand(rest, pattern.replace("*", "a") if pattern != "*" else "a.example.com"))
    except Malformed as error:
        advice = ascii_advice(target)
        raise ValueError(f"{target!r} is not ASCII{advice}" if advice else f"{target!r}: {error}") from None


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
        widest = max((len(route.members) for route in self.routes if route.has_fields), default=1)
        self.decisions_max = max(DECISIONS_MAX // max(widest, 1), 2 * len(self.routes))
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
