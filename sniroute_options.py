"""sniroute_options: what a route may have beside its target, and the tables of routes in a file.

    [routes]  "db.example.com" = { target = "tcp:192.0.2.10:5432", max_connections = 50 }
    [ports]   ":5433" = ...              --- read_routes ---> Routes, and a line for each fault

    ROUTE_OPTIONS    the options of a route, a row each: a field of Route, and its parser
    SEVERAL_OPTIONS  those of a route with several backends: a field of Several (sniroute_groups), and its parser

Threads: main; a reload may come from any thread, one at a time.

Seams: I want to ...
    add an option of a route    a row in ROUTE_OPTIONS, and a field of Route; for plain HTTP, one in HTTP_OPTIONS, too
    add one for several         a row in SEVERAL_OPTIONS, and a field of Several, which has the default

It imports routes, patterns, targets, wire, values and names; where a route has several backends, backends, book and
groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

from sniroute_names import OPTIONS, is_here, printable
from sniroute_patterns import parse_pattern, unknown_fields
from sniroute_routes import CLUSTER_KINDS, PROGRAM_KINDS, Route, parse_port_route, parse_route
from sniroute_targets import SCHEMES
from sniroute_values import (as_text, meant, one_of, parse_count, parse_duration, parse_env, parse_globs, parse_host,
                             parse_label, parse_names, parse_networks, parse_off_or_duration, parse_port, parse_share,
                             parse_size, parse_upgrades, parse_verify)
from sniroute_wire import PROXY_WRITERS

if TYPE_CHECKING:
    from sniroute_groups import Several
    from sniroute_objects import NewPod

__version__ = "0.1.0"

Parse = Callable[..., Route]  # parse_route, or parse_port_route

# What a client gets that asks in plain HTTP, for people.
HTTP_MODES = {
    "refuse": "the connection closes",
    "forward": "to the target, request by request",
    "forward-tls": "to the target over TLS, request by request",
    "redirect": "an answer that leads to https://",
    "pass": "to the target; after the first request nothing is looked at",
}


def parse_create_pod(value: Any) -> NewPod | None:
    """`true`, `false`, or a table of what the pod is to be.  Raises ValueError."""
    if value is False:
        return None
    if not is_here("sniroute_objects"):
        raise ValueError("needs sniroute_objects.py, which is not beside sniroute.py: copy it there")
    from sniroute_objects import parse_new_pod  # imported late: an option
    if isinstance(value, dict) and isinstance(value.get("ttl"), str):
        value = {**value, "ttl": parse_duration(value["ttl"])}
    return parse_new_pod(value)


# What a route in a file may have beside its target: a field of Route, and its parser.
ROUTE_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "send_proxy": one_of(*PROXY_WRITERS), "allow": parse_networks, "max_connections": parse_count,
    "idle": parse_duration, "connection_idle": parse_off_or_duration, "resolve_interval": parse_duration,
    "env": parse_env, "env_from": parse_names,
    "http": one_of(*HTTP_MODES), "verify": parse_verify, "host": parse_host,
    "cross_site": one_of("refuse", "allow"), "upgrades": parse_upgrades,
    "http_reuse": one_of("client", "off", "safe"), "redirect_port": parse_port,
    "contexts": parse_globs, "namespaces": parse_globs, "container": parse_label, "create_pod": parse_create_pod,
}
POD_BALANCE = one_of("least", "round-robin", "random", "first")  # `balance`, where a cluster's pods are the backends
FORWARDS = ("forward", "forward-tls")
HTTP_OPTIONS: dict[str, tuple[str, ...]] = {  # those that say more of a mode, and which modes
    "verify": ("forward-tls",), "host": FORWARDS, "cross_site": FORWARDS, "upgrades": FORWARDS,
    "http_reuse": FORWARDS, "redirect_port": ("redirect",),
}
WHOLE_OPTIONS = frozenset(("env", "create_pod"))  # those whose parser takes the value as TOML has it
# Those that are for some kinds of target only.
KINDS_OF_OPTIONS = {**dict.fromkeys(("env", "env_from"), PROGRAM_KINDS),
                    **dict.fromkeys(("contexts", "namespaces"), CLUSTER_KINDS), "container": ("jump",),
                    "create_pod": ("jump",)}


def parse_health(text: str) -> str:
    """`passive`, `off`, or what a check is to ask, as it came, once sniroute_probes can read it.  Raises ValueError."""
    if text not in ("passive", "off"):
        if not is_here("sniroute_probes"):
            raise ValueError(f"{text!r} needs sniroute_probes.py, which is not beside sniroute.py: copy it there")
        from sniroute_probes import parse_health as parse  # imported late: only where it is asked for
        parse(text)
    return text


# The same for a route with several backends: a field of Several.
SEVERAL_OPTIONS: dict[str, Callable[[str], Any]] = {
    "balance": one_of("round-robin", "least", "random", "hash", "first", "latency"),
    "health": parse_health, "health_interval": parse_duration, "health_timeout": parse_duration,
    "health_fail": parse_count, "health_pass": parse_count,
    "fallback_interval": parse_duration, "slow_start": parse_off_or_duration, "on_down": one_of("keep", "cut"),
    "connect_timeout": parse_duration, "tries": parse_count, "connect_budget": parse_duration,
    "max_backend_connections": parse_count, "queue": parse_duration, "queue_length": parse_count,
    "max_lifetime": parse_off_or_duration,
    "warm": parse_size, "warm_max_idle": parse_off_or_duration, "warm_max_age": parse_off_or_duration,
    "reuse": one_of("off", "redis", "http", "quiet"), "warm_jitter": parse_share, "warm_order": one_of("fifo", "lifo"),
}


def route_of_text(parse: Parse) -> Callable[[str], Route]:
    """A parser of a route on the command line, to one target or to several.  The parser raises ValueError."""
    return lambda text: with_several(parse(text), {})


any_route, any_port = route_of_text(parse_route), route_of_text(parse_port_route)


def with_several(route: Route, values: Mapping[str, Any]) -> Route:
    """The route with its Several, where it has several targets, or `values`: SEVERAL_OPTIONS that are set.

    Raises ValueError where a file for that is missing, or options do not fit the route: with a sentence for each.
    """
    if not route.members and not values:
        return route
    missing = [f"{room}.py" for room in OPTIONS["backends"] if not is_here(room)]
    if missing:
        raise ValueError(f"{route.pattern} has several backends, or an option for them, and {' and '.join(missing)} "
                         f"{'is' if len(missing) == 1 else 'are'} not beside sniroute.py: copy "
                         f"{'it' if len(missing) == 1 else 'them'} there")
    from sniroute_backends import SEVERAL  # imported late: an option
    from sniroute_book import Book
    from sniroute_groups import Several
    if not route.members:
        values = {"health": "off", **values}  # of one target: there is no other one to be used instead
    several = Several(SEVERAL, Book, [], **values)
    wrong = list(misfits(route, several))
    if wrong:
        raise ValueError(*wrong)
    return route._replace(members=route.targets, several=several)


def misfits(route: Route, several: Several) -> Iterator[str]:
    """What does not go together, a sentence each."""
    if route.has_fields and several.warm:
        yield "warm: is for targets without fields: clients would choose what is dialled ahead"
    if several.reuse != "off" and not route.is_port:
        yield "reuse: is for ports: behind a name there is TLS, which is its client's alone"
    if several.reuse != "off" and route.send_proxy in ("v1", "v2"):
        yield f"reuse: does not go with send_proxy = {route.send_proxy}: the header says who the client is"
    if several.health in ("passive", "off"):
        return
    if route.has_fields:
        yield f"health: {several.health} is for targets without fields: clients would choose what is checked"
    elif not any(map(several.checks, route.targets)):
        why = "a unix socket has no ports" if any(map(several._replace(health="connect").checks, route.targets)) \
            else "a check would start the program"
        yield f"health: {several.health} is not for {route.target}: {why}"


def misfits_of_http(route: Route, mode: str) -> Iterator[str]:
    """What does not go together where plain HTTP gets this row of HTTP_MODES, a sentence each."""
    for name, modes in HTTP_OPTIONS.items():
        if mode not in modes and getattr(route, name) != Route._field_defaults[name]:
            yield f"{name}: is for http = {' or '.join(modes)}; here it is {mode}"
    if "{" in route.host and (fault := unknown_fields(route.host, parse_pattern(route.pattern))):
        yield f"host: {fault}"
    if route.http_reuse == "safe" and route.send_proxy in ("v1", "v2"):
        yield f"http_reuse: safe does not go with send_proxy = {route.send_proxy}: the header says who the client is"


def read_routes(table: Any, wrong: list[str], kind: str = "routes", parse: Parse = parse_route) -> list[Route]:
    """The table `routes` of a file, or `ports`.  What is wrong with it is added to `wrong`."""
    if not isinstance(table, dict) or not table and kind == "routes":
        wrong.append("routes: is no table of routes, as \"*.example.com\" = \"cloudflared:{name}\"")
        return []
    routes = []
    for pattern, value in table.items():
        where = f'{kind}."{printable(pattern)}"'
        options = dict(value) if isinstance(value, dict) else {"target": value}
        if "target" not in options:
            wrong.append(f"{where}: has no target (a pattern goes in quotes, "
                         'as "db.example.com" = "tcp:192.0.2.10:5432")')
            continue
        target = options.pop("target")
        texts = [as_text(each) for each in (target or [""] if isinstance(target, list) else [target])]
        try:
            route = parse(f"{pattern}=", texts) if isinstance(target, list) else parse(f"{pattern}={texts[0]}")
        except ValueError as error:
            wrong.append(f"{where}: {error}")
            # So that the options are checked, too.
            route = Route("", f"{scheme}:" if (scheme := texts[0].partition(":")[0]) in SCHEMES else "tcp:")
        several = {}
        for name, option in options.items():
            try:
                if name == "balance" and is_one_cluster(texts):
                    route = route._replace(balance=POD_BALANCE(as_text(option)))
                elif name in SEVERAL_OPTIONS:
                    several[name] = SEVERAL_OPTIONS[name](as_text(option))
                else:
                    route = route._replace(**{name: read_option(name, option, texts, kind == "ports")})
            except ValueError as error:
                wrong.append(f"{where}.{printable(name)}: {error}")
        if not route.pattern:
            continue
        try:
            routes.append(with_several(route, several))
        except ValueError as error:
            wrong.extend(f"{where}: {each}" for each in error.args)
    return routes


def is_one_cluster(targets: Sequence[str]) -> bool:
    """Whether there is one target, and its backends are the pods of a cluster: their program chooses among them."""
    return len(targets) == 1 and targets[0].partition(":")[0] in CLUSTER_KINDS


def read_option(name: str, value: Any, targets: Sequence[str], is_port: bool = False) -> Any:
    """The value of an option of a route to these targets.  Raises ValueError, also where there is no such option."""
    if name not in ROUTE_OPTIONS:
        raise ValueError(f"there is no such option{meant(name, ('target', *ROUTE_OPTIONS, *SEVERAL_OPTIONS))}")
    schemes = {target.partition(":")[0] for target in targets}
    kinds = KINDS_OF_OPTIONS.get(name, schemes)
    if schemes.isdisjoint(kinds):
        raise ValueError(f"is for {' and '.join(f'{kind}:' for kind in kinds)}")
    if name == "idle" and not any(row.is_tunnel for scheme, row in SCHEMES.items() if scheme in schemes):
        raise ValueError("is for tunnels; here connection_idle resets what is silent")
    if is_port and (name == "http" or name in HTTP_OPTIONS):
        raise ValueError("is for [routes]: behind a port nothing is looked at, so HTTP passes as anything else")
    return ROUTE_OPTIONS[name](value if name in WHOLE_OPTIONS else as_text(value))
