"""sniroute_options: what a route may have beside its target, and the tables of routes in a file.

    [routes]  "db.example.com" = { target = "tcp:192.0.2.10:5432", max_connections = 50 }
    [ports]   ":5433" = ...              --- read_routes ---> Routes, and a line for each fault

    ROUTE_OPTIONS   the options of a route, a row each: a field of Route, and its parser

Threads: main; a reload may come from any thread, one at a time.

Seams: I want to ...
    add an option of a route    a row in ROUTE_OPTIONS, and a field of Route

It imports routes, targets, wire, values and names.
"""

from __future__ import annotations

from typing import Any, Callable

from sniroute_names import printable
from sniroute_routes import PROGRAM_KINDS, Route, parse_route
from sniroute_targets import SCHEMES
from sniroute_values import (as_text, meant, one_of, parse_count, parse_duration, parse_env, parse_names,
                             parse_networks, parse_off_or_duration)
from sniroute_wire import PROXY_WRITERS

__version__ = "0.1.0"

# What a route in a file may have beside its target: a field of Route, and its parser.
ROUTE_OPTIONS = {"send_proxy": one_of(*PROXY_WRITERS), "allow": parse_networks, "max_connections": parse_count,
                 "idle": parse_duration, "connection_idle": parse_off_or_duration, "env": parse_env,
                 "env_from": parse_names}
WHOLE_OPTIONS = frozenset(("env",))  # those whose parser takes the value as TOML has it
PROGRAM_OPTIONS = frozenset(("env", "env_from"))  # those for targets that run a program


def read_routes(table: Any, wrong: list[str], kind: str = "routes",
                parse: Callable[[str], Route] = parse_route) -> list[Route]:
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
        target = as_text(options.pop("target"))
        scheme = target.partition(":")[0]
        try:
            route = parse(f"{pattern}={target}")
        except ValueError as error:
            wrong.append(f"{where}: {error}")
            scheme = target.partition(":")[0]
            route = Route("", f"{scheme if scheme in SCHEMES else 'tcp'}:")  # so that the options are checked, too
        for name, option in options.items():
            if name not in ROUTE_OPTIONS:
                others = meant(name, ("target", *ROUTE_OPTIONS))
                wrong.append(f"{where}.{printable(name)}: there is no such option{others}")
            elif name in PROGRAM_OPTIONS and scheme not in PROGRAM_KINDS:
                wrong.append(f"{where}.{name}: is for {' and '.join(f'{kind}:' for kind in PROGRAM_KINDS)}")
            elif name == "idle" and not route.scheme.is_tunnel:
                wrong.append(f"{where}.idle: is for tunnels; here connection_idle resets what is silent")
            else:
                try:
                    given = option if name in WHOLE_OPTIONS else as_text(option)
                    route = route._replace(**{name: ROUTE_OPTIONS[name](given)})
                except ValueError as error:
                    wrong.append(f"{where}.{name}: {error}")
        if route.pattern:
            routes.append(route)
    return routes
