"""sniroute_routes: where a name leads.

    name --- Routes.decide ---> Decision: the route, its target with the fields filled in, the row of its kind
             pattern -> target

    Routes    ordered layers of patterns, the configured one first; a decision is made once for each name
    Layer     the routes of one source: exact names, patterns with fields, wildcards
    Route     one PATTERN=TARGET, and its options

Threads.  The loop decides.  Other threads may decide too (an operator asks for a name's tunnel): what they see is
whole, since a Routes is swapped as one object and a layer changes by single assignments.

Seams: I want to ...
    add a kind of target          a row in SCHEMES of sniroute_targets
    add an option of a route      a field of Route, and its row in ROUTE_OPTIONS of sniroute_options; where it is text
                                  that may have fields: `expand` in Route.decide, unknown_fields when it is read
    try other splits of a name    Route.splits, and Route.decide for each; stop after some: strangers choose names
    read patterns otherwise       sniroute_patterns
    feed routes from elsewhere    a Layer behind the configured one: Routes.add_layer, then Layer.put and Layer.drop

What a name is worth: nothing.  SNI is not authentication; `allow` looks at addresses only.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

from sniroute_launchers import Secret, TunnelKey, Variable
from sniroute_names import (OPTIONS, Network, ascii_advice, has_owner, is_here, normalise, parse_host_port, printable,
                            show_address, without_key)
from sniroute_patterns import (CHOSEN, FIELDS, OF_NAME, STARS, Fielded, Pattern, expand, fields_of, parse_pattern,
                               rank, unknown_fields, written)
from sniroute_refusals import Malformed, Refused
from sniroute_targets import SCHEMES, Scheme

if TYPE_CHECKING:
    from sniroute_groups import Several
    from sniroute_objects import NewPod

__version__ = "0.1.0"

DECISIONS_MAX = 4096  # routed names remembered: names come from strangers
SPLITS_MAX = 4  # ways to read one name: a hostile one has thousands
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
    variables: tuple[Variable, ...] = ()  # for its program
    host: str = ""  # the route's `host`, with its fields filled in


class Route(NamedTuple):
    """One `PATTERN=TARGET`, and its options: ROUTE_OPTIONS of sniroute_options."""

    pattern: str
    target: str
    send_proxy: str = "as-received"  # see PROXY_WRITERS
    allow: tuple[Network, ...] | None = None  # client networks; None: all
    max_connections: int | None = None
    idle: float | None = None  # seconds, instead of --idle
    connection_idle: float | None = None  # seconds, instead of --connection-idle
    resolve_interval: float = 30.0  # seconds until a host is resolved again; getaddrinfo does not tell its TTL
    env: tuple[Variable, ...] = ()  # for its program
    env_from: tuple[Variable, ...] = ()  # the router's own, for its program
    # Of clients that ask in plain HTTP.  They cost a TLS client nothing: see is_plain.
    http: str | None = None  # a row of HTTP_MODES; None: --http
    verify: bool | str = True  # of the backend's certificate; a path: the certificates to hold it against
    host: str = ""  # Host as the backend gets it: "" as it came, a name, or `backend`
    cross_site: str | None = None  # `refuse` or `allow` what a page of another site asks for; None: see below
    upgrades: tuple[str, ...] = ("websocket",)  # protocols that a client may change to, in lower case
    http_reuse: str = "client"  # whose a connection to the backend is: `client`, `off`, `safe`
    redirect_port: int | None = None  # None: 443 where the listener is 80, else the listener's
    # Of targets in Kubernetes clusters.
    contexts: tuple[str, ...] = ()  # globs: the contexts that it may lead to; (): what the target says
    namespaces: tuple[str, ...] = ()  # the same for namespaces
    container: str = ""  # of the pod, for `jump:`; "": the pod's own choice
    create_pod: NewPod | None = None  # of `jump:`: the pod is made where it is not there
    balance: str = "least"  # among the pods of a cluster; of several targets Several.balance says it
    reach: Callable[[tuple], bool] | None = None  # of a claim: whether a resolved address may be dialled
    aliases: tuple[tuple[str, str], ...] = ()  # short names of contexts, of the settings
    secrets: tuple[Secret, ...] = ()  # those of its targets, each by its target as it is shown
    members: tuple[str, ...] = ()  # the targets, each `scheme:rest`, where there are several; `target` is for people
    several: Several | None = None  # what is done with those; given where there are any

    def __str__(self) -> str:
        return f"{self.pattern}={self.target}"

    @property
    def scheme(self) -> Scheme:
        """The row of its kind of target."""
        if self.several is not None:
            return self.several.scheme
        return kind(self.target.partition(":")[0])

    @property
    def targets(self) -> tuple[str, ...]:
        """All its targets, each `scheme:rest`."""
        return self.members or (self.target,)

    @property
    def kinds(self) -> list[Scheme]:
        """The row of each of its targets."""
        return [kind(target.partition(":")[0]) for target in self.targets]

    @property
    def has_tunnel(self) -> bool:
        """Whether one of its targets is a tunnel."""
        return any(row.is_tunnel for row in self.kinds)

    def each(self) -> list[Route]:
        """A route to each of its targets; `host` is for the request, whichever of them gets it."""
        return [self._replace(target=target, members=(), several=None, host="") for target in self.members] or [self]

    @property
    def is_port(self) -> bool:
        """Whether it is that of a listener with one target."""
        return self.pattern.startswith(PORT)

    @property
    def chooses_port(self) -> bool:
        """Whether a name says to which port of a host it leads."""
        return any("{" in target.rpartition(":")[2] for target in self.targets)

    def splits(self, name: str) -> Iterator[dict[str, str]]:
        """The fields of a name that it fits: those of each name, and the pattern's; the split that counts first.

        There are more only where a pattern has several fields in one label: see Pattern.splits.
        """
        if "{" not in self.pattern:
            yield fields_of(name)
            return
        for fields in parse_pattern(self.pattern).splits(name):
            yield fields_of(name) | fields

    def decide(self, name: str, identified: bool = False, tally: Tally | None = None,
               fields: Mapping[str, str] | None = None) -> Decision:
        """Fill in the target for a name that it fits.  Raises Malformed where that gives no valid target.

        `identified`: the router has an Access token, which is not shown to everybody.  `fields`: one of `splits`, by
        default the first.
        """
        if fields is None and self.tries_splits:
            return self._decide_splits(name, identified, tally or Tally())
        if fields is None:
            fields = next(self.splits(name))
        if self.several is not None:
            return self._decide_several(name, identified, tally or Tally(), fields)
        scheme, _, rest = expand(self.target, fields).partition(":")
        row = kind(scheme)
        rest = row.check(rest)
        row.guard(self.target.partition(":")[2], rest)
        target = f"{scheme}:{rest}"
        key, variables, tunnel = f"{self.pattern}={target}", self.env + self.env_from, None
        argument = rest if row.told is None else row.told(self, [rest])
        if row.is_program and self.fields_of_env:
            variables = tuple(each._replace(value=each.value and expand(each.value, fields)) for each in variables)
            key = " ".join([key, *(f"{name}={value}" for name, value in variables)])
        if self.secrets:
            variables += tuple(each for each in self.secrets if each.name == target)
        if row.is_program and row.is_tunnel:
            tunnel = TunnelKey(scheme, argument, variables=variables)
        elif row.is_tunnel:
            tunnel = TunnelKey(scheme, argument, not identified or self.is_of_one_domain())
        return Decision(self, target, row, rest, key, tunnel, tally or Tally(), self.is_plain, variables=variables,
                        host=self._host_for(fields))

    def _decide_splits(self, name: str, identified: bool, tally: Tally) -> Decision:
        """As `decide`, for the first split that makes a target; its program is told of the next ones, too."""
        decided, fault = [], None
        for fields in itertools.islice(self.splits(name), SPLITS_MAX):
            try:
                decided.append(self.decide(name, identified, tally, fields))
            except Refused as error:
                fault = fault or error
        if not decided:
            raise fault
        first = decided[0]
        argument = first.scheme.told(self, [each.rest for each in decided])
        return first._replace(tunnel=first.tunnel._replace(hostname=argument))

    def _decide_several(self, name: str, identified: bool, tally: Tally, fields: Mapping[str, str]) -> Decision:
        """As `decide`, with the decision of each target.  Without fields these are the same for each name."""
        members, key = self.several.fixed, self.pattern
        if not members:
            members = [route.decide(name, identified, tally, fields) for route in self.each()]
            if self.has_fields:
                key = " ".join([self.pattern, *(member.key for member in members)])
            else:
                self.several.fixed[:] = members  # one assignment: another thread may decide, too
        target = expand(self.target, fields)
        return Decision(self, target, self.several.scheme, "", key, None, tally, self.is_plain, members,
                        host=self._host_for(fields))

    def _host_for(self, fields: Mapping[str, str]) -> str:
        """`host` with its fields filled in.  Raises Malformed where that is no host name."""
        return normalise(expand(self.host, fields).encode()) if "{" in self.host else self.host

    @property
    def has_fields(self) -> bool:
        """Whether a target depends on the name: it has a field that its kind does not fill in itself.

        Or what its program gets does.
        """
        return any(not set(FIELDS.findall(target)) <= set(row.holds) for row, target in zip(self.kinds, self.targets)) \
            or bool(self.fields_of_env)

    @property
    def tries_splits(self) -> bool:
        """Whether only the far end knows which split of a name is meant."""
        return "{" in self.pattern and self.several is None and kind(self.target.partition(":")[0]).told is not None \
            and parse_pattern(self.pattern).may_split

    @property
    def fields_of_env(self) -> set[str]:
        """The fields in the values of `env`.  What else stands in braces there stays as it is: it may be JSON."""
        if not self.env or self.is_port:
            return set()
        found = {field for variable in self.env for field in FIELDS.findall(variable.value)}
        return found & {*OF_NAME, *parse_pattern(self.pattern).fields}

    @property
    def refuses_cross_site(self) -> bool:
        """Whether a request that a page of another site has made is refused.

        By default where a client chooses the target: a page that the user only looks at would choose it then.
        """
        return self.has_fields if self.cross_site is None else self.cross_site == "refuse"

    @property
    def is_plain(self) -> bool:
        """Whether it has no option that each connection has to be checked for."""
        return self.send_proxy == "as-received" and self.allow is None and self.max_connections is None

    def is_of_one_domain(self) -> bool:
        """Whether all its names lead into one domain, which the operator has chosen, and which has one owner.

        Else a client may own the domain that it is led to: `cft-{name}` for any name; `cft-{label}-{domain}` for
        `*.example.com`, which is `cft-a-example.com`; any name below `co.uk`.  Then it is neither shown the Access
        token, nor led to a private address.  A field of the pattern is the client's choice, as a star is.
        """
        if self.members:
            return all(route.is_of_one_domain() for route in self.each())
        if "*" not in self.pattern and "{" not in self.pattern:
            return True
        pattern = parse_pattern(self.pattern)
        host, _, last = self.target.partition(":")[2].rpartition(":")
        hosts = [expand(host or last, pattern.sample(CHOSEN, front)) for front in STARS[pattern.stars]]
        if len({tuple(each.split(".")[-2:]) for each in hosts}) > 1:
            return False
        ends = [each.rpartition(CHOSEN)[2].partition(".")[2] for each in hosts if CHOSEN in each]
        return all(map(has_owner, ends))  # each is what stands behind the label that holds the client's last part


PROGRAM_KINDS = ("exec", "command")  # kinds of target that are an option: programs, and ...
CLUSTER_KINDS = ("kubernetes", "jump")  # ... what is in a Kubernetes cluster, and ...
NODEPASS_KINDS = ("nodepass",)  # ... what has dialled in


def kind(scheme: str) -> Scheme:
    """The row of a kind of target.  Raises ValueError where there is none, or a file of it is not there."""
    row = SCHEMES.get(scheme)
    if row is None and scheme in PROGRAM_KINDS + CLUSTER_KINDS + NODEPASS_KINDS:
        option = "commands" if scheme in PROGRAM_KINDS else "kubernetes" if scheme in CLUSTER_KINDS else "nodepass"
        missing = [f"{room}.py" for room in OPTIONS[option] if not is_here(room)]
        if missing:
            are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
            raise ValueError(f"{scheme}: needs {', '.join(missing)}, which {are} not beside sniroute.py: copy {them} "
                             "there")
        if scheme in PROGRAM_KINDS:
            from sniroute_commands import COMMAND_SCHEMES as rows  # imported late: an option
        elif scheme in CLUSTER_KINDS:
            from sniroute_clusters import CLUSTER_SCHEMES as rows
        else:
            from sniroute_nat import NODEPASS_SCHEMES as rows
        SCHEMES.update(rows)
        row = SCHEMES[scheme]
    if row is None:
        raise ValueError(f"{printable(scheme)!r} is no kind of target: there are "
                         f"{', '.join(sorted({*SCHEMES, *PROGRAM_KINDS, *CLUSTER_KINDS, *NODEPASS_KINDS}))}")
    return row


def parse_route(text: str, listed: Sequence[str] = ()) -> Route:
    """`PATTERN=TARGET`; or `PATTERN=`, and the targets as a list.  Raises ValueError with a sentence for people."""
    pattern, equals, target = text.partition("=")
    if not equals or not listed and ":" not in target:
        raise ValueError(f"{without_key(text)!r} is not PATTERN=TARGET, as db.example.com=tcp:192.0.2.10:5432")
    read = parse_pattern(pattern)
    targets, secrets = [], []
    for each in (each for text in listed or [target] for each in split_target(text)):
        each, secret = put_aside(each)
        check_target(read, each)
        targets.append(each)
        secrets += [Secret(each, secret)] if secret else []
    if len(targets) == 1:
        return Route(written(read), targets[0], secrets=tuple(secrets))
    return Route(written(read), shown(targets), members=tuple(targets), secrets=tuple(secrets))


def put_aside(target: str) -> tuple[str, str]:
    """A target as people may see it, and its secret; "" where it has none.  Raises ValueError."""
    scheme, colon, rest = target.partition(":")
    row = kind(scheme) if colon else None
    if row is None or row.put_aside is None:
        return target, ""
    shown, secret = row.put_aside(rest)
    return f"{scheme}:{shown}", secret


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


def check_target(read: Pattern, target: str) -> None:
    """Whether a target is one, for a route of this pattern.  Raises ValueError with a sentence for people."""
    scheme, colon, rest = target.partition(":")
    if not colon:
        raise ValueError(f"{target!r} is not SCHEME:REST, as tcp:192.0.2.10:5432")
    row = kind(scheme)
    if fault := unknown_fields(rest, read, row.holds):
        raise ValueError(fault)
    front = {"": "", CHOSEN: "{}.example.com"}.get(read.stars, "{}.")
    letter, number = (read.sample(value, front.format(value)) for value in ("a", "1"))
    host, port_follows, port = rest.rpartition(":")
    try:  # a sample name shows what no name could make valid; what stands for the port is a number in it
        sample = expand(host + port_follows, letter) + expand(port, number if port_follows else letter)
        row.check(sample)
        row.guard(rest, sample)
    except Malformed as error:
        advice = ascii_advice(target)
        raise ValueError(f"{target!r} is not ASCII{advice}" if advice else f"{target!r}: {error}") from None


PORT = "port "  # begins the pattern of a port's route; no name has a blank


def parse_port_route(text: str, listed: Sequence[str] = ()) -> Route:
    """`ADDRESS=TARGET`: a listener with one target, as a route whose pattern is `port ADDRESS`.  Raises ValueError.

    Or `ADDRESS=`, and several targets as a list.
    """
    address, equals, target = text.partition("=")
    if not equals or not listed and ":" not in target:
        raise ValueError(f"{without_key(text)!r} is not ADDRESS=TARGET, as 127.0.0.1:5433=tcp:192.0.2.10:5432")
    host, port = parse_host_port(address, default_host="*")
    named = [field for field in ("{name}", "{label}", "{domain}") if any(field in each for each in listed or [target])]
    if named:
        raise ValueError(f"{without_key(target)!r}: a port has no name, so nothing can stand for {', '.join(named)}")
    shown = f":{port}" if host == "*" else show_address((host, port))
    return parse_route(f"port.invalid={target}", listed)._replace(pattern=PORT + shown)


def port_address(route: Route) -> tuple[str, int]:
    """Where the port of such a route listens; the host `*` is every address."""
    return parse_host_port(route.pattern.removeprefix(PORT), default_host="*")


class Layer:
    """Some routes by their pattern: exact name, else fields, else the longest wildcard.  Changed in O(1), by the loop.

    Of several patterns with fields, `rank` says which is taken.  Stars in front of fields make a wildcard: of those
    with as many labels, the one without fields goes first.  `*.example.com` is one label in front, `**.example.com`
    one or more, `*` any name of two labels or more: one label is a name of this host's own network, and is served
    where a route names it.
    """

    def __init__(self, routes: Iterable[Route] = ()):
        self.patterns: dict[str, Route] = {}
        self.fielded = Fielded()  # those of the patterns that have fields
        self.tallies: dict[str, Tally] = {}
        # Of routes that were dropped with connections: a tally is here until the last of them ends.
        self.leaving: weakref.WeakValueDictionary[str, Tally] = weakref.WeakValueDictionary()
        self.forget: Callable[[str], None] = lambda pattern: None  # drops the decisions that it made; set by Routes
        forms: dict[str, str] = {}
        for route in routes:
            if route.pattern in self.patterns:
                raise ValueError(f"{route.pattern} is routed twice")
            if "{" in route.pattern:
                other = forms.setdefault(FIELDS.sub("{}", route.pattern), route.pattern)
                if other != route.pattern:
                    raise ValueError(f"{route.pattern} fits the same names as {other}: take one of them out")
            self.put(route)

    def put(self, route: Route) -> None:
        """Add a route, or replace the one of its pattern."""
        if "{" in route.pattern and route.pattern not in self.patterns:
            self.fielded.add(route.pattern)
        self.patterns[route.pattern] = route
        if route.pattern not in self.tallies:
            self.tallies[route.pattern] = self.leaving.pop(route.pattern, None) or Tally()
        self.forget(route.pattern)

    def drop(self, pattern: str) -> None:
        """Take a route out.  Raises KeyError where there is none."""
        del self.patterns[pattern]
        if "{" in pattern:
            self.fielded.remove(pattern)
        self.forget(pattern)
        tally = self.tallies.pop(pattern)
        if tally.active:
            self.leaving[pattern] = tally

    def find(self, name: str) -> Route | None:
        """The route for a normalised name."""
        patterns = self.patterns
        if name in patterns:
            return patterns[name]
        fielded = self.fielded if self.fielded.sizes else None
        if fielded is not None and (found := patterns.get(fielded.find(("",), name))):
            return found
        stars, suffix = ("*.", "**."), name
        while suffix := suffix.partition(".")[2]:
            for star in stars:
                if star + suffix in patterns:
                    return patterns[star + suffix]
            if fielded is not None and (found := patterns.get(fielded.find(stars, suffix))):
                return found
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
        if "*" in pattern or "{" in pattern:
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
        """The configured routes as they are preferred: names, those with fields, then wildcards, the longest first."""
        def order(route: Route) -> tuple:
            stars, star, suffix = route.pattern.rpartition("*")
            fielded = rank(route.pattern) if "{" in route.pattern else ()
            return (2, -suffix.count("."), fielded, stars, suffix) if star else (bool(fielded), 0, fielded, "", suffix)
        return sorted(self.routes, key=order)

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
