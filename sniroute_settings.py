"""sniroute_settings: one table of settings: options, variables, keys of the file; checked, and explained where wrong.

    command line, environment, file --- sources ---> what was given, and where
                                    --- parsed ----> values                         faults: one line each, all at once
                                    --- cross_checked --> what contradicts
                                    --- derived ---> what depends on the host  ---> Settings

A row of SETTINGS makes the option `--name`, the variable `SNIROUTE_NAME`, the key `name` of the file, the help, and
the field of Settings.  A secret is no setting: every user of a host can read a command line.

Threads: main; a reload may come from any thread, one at a time (Daemon.reloading).

Seams: I want to ...
    add a setting               a row in SETTINGS, a field of Settings, and its use; a reload applies it where
                                Router.adopt or TunnelTable.adopt takes it over, else the row says `fixed`
    read another kind of value  sniroute_values; add an option of a route: sniroute_options
    warn about a combination    `warn`; refuse one: `cross_checked`
"""

from __future__ import annotations

import argparse
import codecs
import functools
import logging
import os
import re
import stat
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

from sniroute_host import (PATHS_MAX, TUNNEL_MEMORY, Stamp, changed_by_others, descriptor_limits, local_ports,
                           memory_allowed, stamp, too_little)
from sniroute_launchers import (SERVICE_TOKEN, TUNNEL_IDENTITY, Launcher, carrier_launcher, cloudflared_launcher,
                                identity_faults, inherited)
from sniroute_names import OPTIONS, Network, describe_version, is_here, is_loopback, overlap, printable, show_address
from sniroute_options import HTTP_MODES, any_port, any_route, misfits_of_http, read_routes
from sniroute_patterns import FIELDS
from sniroute_refusals import SettingsError
from sniroute_routes import (CLUSTER_KINDS, NODEPASS_KINDS, PROGRAM_KINDS, Route, Routes, parse_port_route, parse_route,
                             port_address)
from sniroute_targets import standing_tunnels
from sniroute_values import (Zones, absolute, as_text, meant, one_of, own_zones, parse_address, parse_admin,
                             parse_aliases, parse_count, parse_duration, parse_kubeconfig, parse_listen,
                             parse_networks, parse_none_or_duration, parse_off_or_duration, parse_paths, parse_ports,
                             parse_program, parse_registry, parse_switch, parse_zones)

if TYPE_CHECKING:
    from sniroute_owners import Where

__version__ = "0.1.0"

log = logging.getLogger("sniroute")

# Limits, each with its reason.
SPARE_FDS = 480  # descriptors of 101 tunnels (three each), 32 pipes, 64 clients of the admin, listeners and the log
LOOPBACK = ("127.0.0.1", "[::1]", "localhost")  # as a target may write this host
SECRET = re.compile(r"[!-~]{16,}")  # a token: printable, and too long to be guessed
# Kubernetes sets SNIROUTE_PORT to such a value where a Service is called sniroute: that is no setting of anybody's.
SERVICE_LINK = re.compile(r"(?:tcp|udp|sctp)://\S+")
SOME_NAME = "some-name-that-nobody-routes"  # stands for all the names below a domain
REGISTRY = "127.0.0.1:19002"  # where the registry listens, if [registry] does not say
REGISTRY_FDS = 1000  # descriptors of its clients
LOCAL_NETWORKS = "127.0.0.0/8,::1/128,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,fc00::/7"


# -- the table ---------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One setting, as a row."""

    name: str  # of the option
    metavar: str
    parse: Callable[[str], Any]
    default: str | None  # as text; None where it depends on the host: `derived`, or PATH
    help: str
    many: bool = False  # the option may be repeated; the variable holds several, with spaces between
    fixed: bool = False  # a reload cannot change it
    key: str | None = None  # in the file, where it is not the field's name; "" where the file has none
    short: tuple[str, ...] = ()  # other names of the option

    @property
    def field(self) -> str:
        """Its name in Settings."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return f"SNIROUTE_{self.field.upper()}"

    @property
    def file_key(self) -> str:
        """Its name in the file."""
        return self.field if self.key is None else self.key

    def read(self, value: Any) -> Any:
        """The value of its key in the file.  Raises ValueError."""
        if not self.many:
            return self.parse(as_text(value))
        texts = [as_text(each) for each in (value if isinstance(value, list) else [value])]
        return [self.parse(text) for text in texts or [""]]


SETTINGS = (
    Setting("config", "FILE", absolute, None,
            "a file of settings (TOML): all of these, and routes with options of their own", key="", short=("-c",)),
    Setting("watch", "SWITCH", parse_switch, "off",
            "on: the file of settings is read again when it has changed (default off)"),
    Setting("listen", "ADDRESS", parse_listen, ":19000",
            "where to listen: HOST:PORT, [::1]:PORT, or :PORT for every address (default :19000); repeatable",
            many=True, fixed=True),
    Setting("route", "PATTERN=TARGET", any_route, "*=cloudflared:cft-{name}",
            "what a name leads to; repeatable; replaces the default route, *=cloudflared:cft-{name}",
            many=True, key="routes"),
    Setting("port", "ADDRESS=TARGET", any_port, None,
            "where to listen for one target, whatever clients say: HOST:PORT=TARGET, or :PORT=TARGET for every address "
            "(default none); repeatable", many=True, key="[ports]"),
    Setting("proxy-protocol", "MODE", one_of("off", "auto", "required"), "auto",
            "PROXY protocol headers from --proxy-from: off, auto or required (default auto)"),
    Setting("proxy-from", "CIDR,...", parse_networks, LOCAL_NETWORKS,
            "whose PROXY headers are believed, or none (default: loopback and the private networks)"),
    Setting("ports", "FIRST-LAST", parse_ports, "20000-20100",
            "local ports for the tunnels (default 20000-20100)", fixed=True),
    Setting("idle", "DURATION", parse_duration, "5m",
            "a tunnel that nobody has used for this long is stopped (default 5m)"),
    Setting("start-timeout", "DURATION", parse_duration, "15s",
            "how long a tunnel may take to listen, and a client waits for it (default 15s)"),
    Setting("prelude-timeout", "DURATION", parse_duration, "10s",
            "how long a client may take to say its name (default 10s)"),
    Setting("connection-idle", "DURATION", parse_off_or_duration, "off",
            "a connection that has carried no byte for this long is reset (default off)"),
    Setting("lameduck", "DURATION", parse_none_or_duration, "0s",
            "how long new clients are served yet after SIGTERM, while /readyz says 503 (default 0s)"),
    Setting("drain", "DURATION", parse_duration, "30s",
            "how long open connections may go on after SIGTERM (default 30s)"),
    Setting("http", "MODE", one_of(*HTTP_MODES), "refuse",
            "what plain HTTP gets on the same port, where a route does not say: refuse, forward, forward-tls, redirect "
            "or pass (default refuse)"),
    Setting("forwarded-from", "CIDR,...", parse_networks, "none",
            "whose X-Forwarded-For and the like are believed, in plain HTTP, or none (default none)"),
    Setting("http-head-timeout", "DURATION", parse_duration, "10s",
            "how long the head of a later request may take; the first has --prelude-timeout (default 10s)"),
    Setting("http-idle", "DURATION", parse_duration, "60s",
            "how long a client that asks in plain HTTP may be silent between two requests (default 60s)"),
    Setting("http-response-timeout", "DURATION", parse_off_or_duration, "off",
            "how long a backend may take for the first byte of its answer to plain HTTP (default off)"),
    Setting("error-pages", "SWITCH", parse_switch, "off",
            "on: a browser that is refused over TLS gets a page that says why, behind a warning about its certificate "
            "(default off)"),
    Setting("max-connections", "N", parse_count, None,
            "connections at once (default: what RLIMIT_NOFILE allows)"),
    Setting("max-per-client", "N", parse_count, "256",
            "connections at once of one client address (default 256); loopback and --proxy-from are exempt: "
            "there the address in the PROXY header counts"),
    Setting("max-tunnels", "N", parse_count, None,
            "tunnels at once (default: as many as --ports; with cloudflared, one for each 64 MiB of memory at most)"),
    Setting("max-starting", "N", parse_count, "4",
            "tunnels that start at once (default 4)"),
    Setting("no-name", "ANSWER", one_of("refuse", "ok"), "refuse",
            "TLS without a name: refuse, or for debugging ok, which answers OK and closes (default refuse)"),
    Setting("cloudflared", "PATH", parse_program, None,
            "the tunnel program (default: cloudflared on PATH; without one, the carrier beside sniroute.py)",
            fixed=True),
    Setting("kubeconfig", "PATH[:PATH]", parse_kubeconfig, None,
            "the kubeconfig of kubernetes: and jump: targets, or several, merged as kubectl does it (default: "
            "KUBECONFIG, then ~/.kube/config, then the pod's own account)", fixed=True),
    Setting("exec-path", "DIR[:DIR]", parse_paths, None,
            "folders in which credential plugins are looked for, beside PATH (default: the usual ones)", fixed=True),
    Setting("kubernetes-ping", "DURATION", parse_duration, "15s",
            "how often a session to a pod is asked for a sign of life (default 15s)", fixed=True),
    Setting("kubernetes-contexts", "NAME=CONTEXT,...", parse_aliases, None,
            "short names of contexts of the kubeconfig, for targets and names (default none)"),
    Setting("zones", "NAME=CIDR,...", parse_zones, None,
            "networks by the name of their zone, a pair for each network: backends in the own zone are preferred "
            "(default none)"),
    Setting("zone", "NAME", str, None, "this router's own zone (default: that of --own-address)"),
    Setting("own-address", "ADDRESS", parse_address, None,
            "the address whose zone is this router's own: the longest network that it is in (default none)"),
    Setting("admin", "ADDRESS", parse_admin, None,
            "metrics, status and control by HTTP: a loopback HOST:PORT, or unix:PATH (default off); "
            "needs sniroute_admin.py, sniroute_door.py, sniroute_metrics.py and sniroute_page.py", fixed=True),
    Setting("admin-public", "ADDRESS", parse_listen, None,
            "metrics and probes alone, for everybody who can connect: HOST:PORT, or :PORT for every address "
            "(default off); needs the same files", fixed=True),
    Setting("registry", "ADDRESS", parse_registry, None,
            "names that come and go, by HTTP: HOST:PORT, or unix:PATH (default off); [registry] in the file has the "
            "rules and owners", fixed=True, key="registry.listen"),
    Setting("log-level", "LEVEL", one_of("debug", "info", "warning", "error"), "info",
            "debug, info, warning or error (default info)"),
    Setting("log-format", "FORMAT", one_of("text", "json"), "text",
            "text or json (default text)", fixed=True),
)

ADMIN_TOKEN = "SNIROUTE_ADMIN_TOKEN"  # the variable; a secret is no option, which every user of the host can read


class Settings(NamedTuple):
    """The settings, checked.  Durations in seconds; a field whose row has no default may be None before `derived`.

    A NamedTuple instead of a dataclass, because that module takes a megabyte of every router.
    """

    command: str
    name: str | None  # what `explain` is about
    quiet: bool  # `check` prints no routes
    config: str | None
    watch: bool
    listen: list[tuple[str, int]]
    route: list[Route]
    port: list[Route]  # listeners with one target: see parse_port_route
    proxy_protocol: str
    proxy_from: tuple[Network, ...]
    ports: tuple[int, int]
    idle: float
    start_timeout: float
    prelude_timeout: float
    connection_idle: float  # 0: off
    lameduck: float
    drain: float
    http: str  # for routes that have no `http`
    forwarded_from: tuple[Network, ...]
    http_head_timeout: float
    http_idle: float
    http_response_timeout: float  # 0: off
    error_pages: bool
    max_connections: int
    max_per_client: int
    max_tunnels: int
    max_starting: int
    no_name: str
    cloudflared: str | None
    kubeconfig: str | None  # paths, a colon between two
    exec_path: str | None  # the same
    kubernetes_ping: float
    kubernetes_contexts: dict[str, str] | None  # contexts by their short names
    zones: dict[str, tuple[Network, ...]] | None  # networks by name
    zone: str | None
    own_address: str | None
    admin: str | tuple[str, int] | None  # the path of a unix socket, or (host, port)
    admin_public: tuple[str, int] | None
    registry: str | tuple[str, int] | None  # the path of a unix socket, or (host, port)
    log_level: str
    log_format: str
    # What follows is no row of SETTINGS.
    routes: Routes
    open_to_all: bool  # nobody has named a route
    admin_token: str | None
    launchers: dict[str, Launcher]  # by scheme
    own_zones: Zones | None
    servers: tuple[tuple[str, int], ...]  # where NodePass clients dial in, by their routes
    claims: Where | None  # the rules, owners and store of the registry
    fit: int  # connections that the limit of open files allows
    covered: list[str]  # keys of the file that something else overrides, a line each
    kept: list[str]  # what a reload asked for and cannot change, a line each
    stamp: Stamp | int  # of the file, as it was read
    again: Callable[[Settings], Settings]  # read them anew, given those that run; raises SettingsError

    @property
    def serves_http(self) -> bool:
        """Whether plain HTTP is served for a name."""
        return asks_for_web(self.http, False, self.routes.routes) or self.claims_may_ask_for_web

    @property
    def on_loopback(self) -> bool:
        """Whether one of its listeners is for this host alone."""
        return any(is_loopback(host) for host, _ in self.listen)

    @property
    def needs_web(self) -> bool:
        """Whether the files of the option `web` are needed."""
        return asks_for_web(self.http, self.error_pages, self.routes.routes) or self.claims_may_ask_for_web

    @property
    def claims_may_ask_for_web(self) -> bool:
        """Whether the owners of names may have plain HTTP served: where the files for that are there."""
        return self.claims is not None and all(map(is_here, OPTIONS["web"]))


def asks_for_web(http: str | None, error_pages: bool | None, routes: Iterable[Route]) -> bool:
    """Whether plain HTTP is served for a name, or pages are shown."""
    return bool(error_pages) or any((route.http or http or "refuse") != "refuse" for route in routes)


# -- the file ----------------------------------------------------------------------------------


def read_settings(path: str, wrong: list[str], again: bool) -> dict[str, Any] | None:
    """What a file says, parsed, by key; None where it cannot be read.  What is wrong goes to `wrong`, a line each.

    Read `again`, it has to be a file: a pipe, as `-c <(...)` gives, would be empty, or be waited for.
    """
    faults: list[str] = []
    values: dict[str, Any] = {}
    tables = {"routes": parse_route, "ports": parse_port_route}
    rows = {row.file_key: row for row in SETTINGS if row.file_key and row.file_key not in ("routes", "[ports]")}
    rows["tunnel_ports"] = rows["ports"]  # the name of `ports` where there is a table of that name
    table, shown = read_toml(path, faults, again), printable(path, PATHS_MAX)
    if table is None:
        wrong += [f"{shown}: {fault}" for fault in faults]
        return None
    if isinstance(table.get("kubernetes"), dict):  # another name of a setting: a table reads better
        for name, value in table.pop("kubernetes").items():
            if name == "contexts":
                table["kubernetes_contexts"] = value
            else:
                faults.append(f"kubernetes.{printable(name)}: there is no such table; there is kubernetes.contexts")
    if isinstance(table.get("registry"), dict):  # where it listens is a setting; the rest is `registry_of`'s
        values["[registry]"] = table.pop("registry")
        if "listen" in values["[registry]"]:
            table["registry.listen"] = values["[registry]"].pop("listen")
    found = [(name, parse, table.pop(name)) for name, parse in tables.items()
             if name in table and (name == "routes" or isinstance(table[name], dict))]
    if "ports" in table and "tunnel_ports" in table:
        faults.append("tunnel_ports: is another name of ports, which is there, too: leave one out")
    for key, value in table.items():
        if key not in rows:
            faults.append(f"{printable(key)}: there is no such setting{meant(key, (*rows, 'routes'))}")
            continue
        try:
            values[rows[key].file_key] = rows[key].read(value)
        except ValueError as error:
            faults.append(f"{key}: {error}")
    for name, parse, value in found:
        values["[ports]" if name == "ports" else name] = read_routes(value, faults, name, parse)
    wrong += [f"{shown}: {fault}" for fault in faults]
    return values


def read_toml(path: str, faults: list[str], again: bool) -> dict[str, Any] | None:
    """The tables of a TOML file that nobody else may change; None, and a fault, where that cannot be had."""
    import tomllib  # imported late: a megabyte that only a file of settings needs
    try:
        if again and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("is no regular file, and cannot be read again")
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            named = stat.S_ISREG(state.st_mode) and state.st_nlink  # no pipe, and no file of a shell's <<EOF
            fault = changed_by_others(path) if named else ""
            if fault:
                raise ValueError(f"is not read, since {printable(fault, PATHS_MAX)}")
            return tomllib.loads(decoded(file.read()))
    except OSError as error:
        faults.append(error.strerror)
    except (ValueError, RecursionError) as error:  # no TOML, or no UTF-8
        faults.append(str(error))
    return None


def decoded(data: bytes) -> str:
    """The text of a file in UTF-8; the mark that editors put in front of it is skipped.  Raises ValueError."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise ValueError("begins with the mark of UTF-16 or UTF-32: save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8).decode()


# -- the command line --------------------------------------------------------------------------

COMMANDS = ("serve", "check", "explain", "selftest")
USAGE = """\
%(prog)s [serve] [options]                    run the router
       %(prog)s check [--quiet] [options]            check the settings, and print the routes
       %(prog)s explain NAME [options]               what would happen to this name, and why
       %(prog)s selftest                             the hard cases, against itself, on loopback
       %(prog)s bundle [-o FILE] [--with OPTION,...] one file, which any Python from 3.11 runs
       %(prog)s carrier ...                          what `cloudflared access tcp` does
       %(prog)s kubernetes ...                       what `kubectl port-forward` does
       %(prog)s claim NAME TARGET ...                a name in a registry
       %(prog)s token                                a token for an owner of names"""


class ShowVersion(argparse.Action):
    """argparse's own action for this takes its text at each start; this one looks for the options when it is asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe_version())
        parser.exit()


def parse_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as it was given.  Exits for --help, --version, and what is no command line."""
    parser = argparse.ArgumentParser(
        prog="sniroute", usage=USAGE, allow_abbrev=False,
        description="One TCP port in front of many private TLS services: reads the name a client asks for, "
                    "starts the tunnel that leads there, and passes bytes.",
        epilog="Every option has a twin in the environment, --max-tunnels is SNIROUTE_MAX_TUNNELS, and one in the "
               "file, max_tunnels. The command line comes first, then the environment, then the file. "
               "Durations: 300s, 5m, 1h30m, 500ms.")
    parser.add_argument("command", nargs="?", default="serve", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("name", nargs="?", help=argparse.SUPPRESS)
    for row in SETTINGS:
        parser.add_argument(*row.short, f"--{row.name}", metavar=row.metavar, help=row.help.replace("%", "%%"),
                            action="append" if row.many else "store")
    parser.add_argument("-q", "--quiet", action="store_true",
                        help="with check: print what is wrong, and warnings, but no routes")
    parser.add_argument("-V", "--version", action=ShowVersion, nargs=0,
                        help="show the version, and which options are here")
    given = parser.parse_intermixed_args(argv)
    if given.quiet and given.command != "check":
        parser.error("--quiet goes with check")
    if (given.command == "explain") != (given.name is not None):
        parser.error("explain takes one NAME" if given.command == "explain" else f"unexpected {given.name!r}")
    return given


# -- from what was given to Settings -----------------------------------------------------------


class Given(NamedTuple):
    """A setting as it was found."""

    source: str  # for people: --idle, SNIROUTE_IDLE, FILE: idle, default
    text: str | Sequence[str] | None = None  # to be parsed, several where it may repeat
    value: Any = None  # where the file gave it, parsed already


def load_settings(argv: Sequence[str], environ: Mapping[str, str], running: Settings | None = None) -> Settings:
    """The settings, from the command line, the environment, the file, the defaults, in this order of precedence.

    `running` are those of a router that runs: what it cannot change stays as it is there, and `kept` has a line for
    each.  Raises SettingsError with one line for each setting that is wrong; exits for --help, --version and a command
    line that is none.
    """
    asked = parse_command_line(argv)
    wrong: list[str] = []
    path = running.config if running else config_path(asked.config, environ, wrong)
    seen = stamp(path) if path else 0  # before it is read: a change that comes meanwhile is one
    file = read_settings(path, wrong, running is not None) if path else {}
    shown = printable(path, PATHS_MAX) if path else None
    given, covered = sources(asked, environ, file or {}, shown)
    values = parsed(given, running, wrong)
    values["config"], values["stamp"] = path, seen
    kept = keep_fixed(values, given, running)
    values["admin_token"] = environ.get(ADMIN_TOKEN, "").strip() or None
    values["open_to_all"] = given["route"].source == "default" and file is not None  # else nobody knows
    name_contexts(values)
    table = (file or {}).get("[registry]")
    if table is None and running is not None:
        values["claims"] = running.claims  # `keep_fixed` has said so
    else:
        values["claims"] = registry_of(values["registry"], table, given["registry"].source, wrong)
    if running is not None and running.claims is not None and values["claims"] is not None:
        values["claims"] = keep_store(values["claims"], running.claims, shown, kept)
    if values["claims"] is not None and values["open_to_all"]:
        values["route"], values["open_to_all"] = [], False  # the names that are claimed are those that there are
    values["routes"] = configured_routes(values, given["route"].source, environ, wrong)
    cross_checked(values, given, running, wrong)
    cross_checked_servers(values, given, environ, wrong)
    wrong += identity_faults(environ)
    if wrong:
        raise SettingsError(*wrong)
    values["launchers"] = running.launchers if running else tunnel_launchers(values["cloudflared"], environ)
    add_programs(values["launchers"], values, environ)
    return Settings(command=asked.command, name=asked.name, quiet=asked.quiet, covered=covered, kept=kept,
                    again=functools.partial(load_settings, argv, environ), **derived(values))


def config_path(asked: str | None, environ: Mapping[str, str], wrong: list[str]) -> str | None:
    """The path of the file, from `/`, so that a reload finds it wherever the process is then.  None without one."""
    source, text = ("--config", asked) if asked else ("SNIROUTE_CONFIG", environ.get("SNIROUTE_CONFIG"))
    try:
        return absolute(text) if text else None
    except ValueError as error:
        wrong.append(f"{source}: {error}")
        return None


def sources(asked: argparse.Namespace, environ: Mapping[str, str], file: Mapping[str, Any],
            path: str | None) -> tuple[dict[str, Given], list[str]]:
    """Where each setting comes from, by field, and a line for each key of the file that is not used."""
    given, covered = {}, []
    for row in SETTINGS:
        if row.name == "config":
            continue  # it says where the others are
        text, source = getattr(asked, row.field), f"--{row.name}"
        if text is None and environ.get(row.variable) and not SERVICE_LINK.fullmatch(environ[row.variable]):
            text, source = environ[row.variable], row.variable
            text = text.split() if row.many else text
        in_file = row.file_key in file
        if text is not None:
            if in_file:
                covered.append(f"{path}: {row.file_key} is not used: {source} goes first")
            given[row.field] = Given(source, text)
        elif in_file:
            given[row.field] = Given(f"{path}: {row.file_key}", value=file[row.file_key])
        elif row.name == "registry" and "[registry]" in file:
            given[row.field] = Given(f"{path}: {row.file_key}", value=row.parse(REGISTRY))
        else:
            given[row.field] = Given("default", [row.default] if row.many and row.default else row.default,
                                     [] if row.many else None)
    return given, covered


def parsed(given: Mapping[str, Given], running: Settings | None, wrong: list[str]) -> dict[str, Any]:
    """The values, by field; None for what is wrong, which is added to `wrong`.

    What a router that runs cannot change is not read again from its options: a path in them may lead nowhere by now.
    """
    values = {}
    for row in SETTINGS:
        if row.name == "config":
            continue  # `config_path`
        source, text, value = given[row.field]
        if running is not None and row.fixed and text is not None and source != "default":
            value = getattr(running, row.field)
        elif text is not None:
            try:
                value = [row.parse(each) for each in text] if row.many else row.parse(text)
            except ValueError as error:
                wrong.append(f"{source}: {error}")
        values[row.field] = value
    return values


def keep_fixed(values: dict[str, Any], given: Mapping[str, Given], running: Settings | None) -> list[str]:
    """Put back what a router that runs cannot change; a line for each that would be another."""
    kept = []
    for row in SETTINGS:
        if running is not None and row.fixed and values[row.field] != getattr(running, row.field):
            source = given[row.field].source
            what = f"--{row.name}" if source == "default" else source
            kept.append(f"{what}: is for the next start; it stays as it is")
            values[row.field] = getattr(running, row.field)
    return kept


def name_contexts(values: dict[str, Any]) -> None:
    """Give the short names of contexts to the routes whose targets may have them."""
    aliases = tuple(sorted((values["kubernetes_contexts"] or {}).items()))
    for name in ("route", "port") if aliases else ():
        values[name] = [route._replace(aliases=aliases) if not kinds_of([route]).isdisjoint(CLUSTER_KINDS) else route
                        for route in values[name] or ()]


def registry_of(where: str | tuple[str, int] | None, table: Mapping[str, Any] | None, source: str,
                wrong: list[str]) -> Where | None:
    """The registry; None without one."""
    if where is None:
        return None
    missing = [f"{room}.py" for room in OPTIONS["registry"] if not is_here(room)]
    if missing:
        wrong.append(f"{source}: needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not beside "
                     "sniroute.py: copy them there")
        return None
    if table is None:
        wrong.append(f"{source}: which names, and whose, is said in a file of settings: [registry], and --config FILE")
        return None
    from sniroute_owners import read_where  # imported late: an option
    try:
        return read_where(where, table)
    except SettingsError as error:
        wrong += error.lines
        return None


def keep_store(asked: Where, running: Where, path: str | None, kept: list[str]) -> Where:
    """The rules and owners that are asked for, with what a registry that runs cannot change, a line for each."""
    kept += [f"{path}: registry.{option}: is for the next start; it stays as it is" for option in ("store", "dns")
             if getattr(asked, option) != getattr(running, option)]
    return asked._replace(store=running.store, dns=running.dns)


def configured_routes(values: Mapping[str, Any], source: str, environ: Mapping[str, str], wrong: list[str]) -> Routes:
    """The routes as they are matched."""
    try:
        return Routes(values["route"] or (), any(map(inherited(environ).get, TUNNEL_IDENTITY)))
    except ValueError as error:
        wrong.append(f"{source}: {error}")
        return Routes(())


def cross_checked(values: Mapping[str, Any], given: Mapping[str, Given], running: Settings | None,
                  wrong: list[str]) -> None:
    """Add to `wrong` what each setting alone does not show."""
    cross_checked_http(values, given, wrong)
    for name in ("route", "port"):
        routes = values[name] or ()
        if not kinds_of(routes).isdisjoint(CLUSTER_KINDS):
            from sniroute_clusters import misfits  # imported late: an option
            wrong += [f"{given[name].source}: {route.pattern}: {each}" for route in routes for each in misfits(route)]
    if values["watch"]:
        where = values["config"]
        if where is None:
            wrong.append(f"{given['watch'].source}: there is no file of settings to look at: name one with --config")
        elif os.path.exists(where) and not os.path.isfile(where):
            wrong.append(f"{given['watch'].source}: {where} is no regular file, and cannot be read again")
    asked = "--admin" if values["admin"] is not None else "--admin-public" if values["admin_public"] is not None else ""
    if asked:
        wrong += [f"{asked}: {room}.py is not beside sniroute.py: copy it there" for room in OPTIONS["admin"]
                  if not is_here(room)]
    listened = [("--listen", address) for address in values["listen"] or ()]
    for route in values["port"] or ():
        others = [*listened, ("--admin", values["admin"]), ("--admin-public", values["admin_public"]),
                  ("--registry", values["registry"])]
        address = port_address(route)
        wrong += [f"{given['port'].source}: {route.pattern} is a part of {other} {show_address(taken)}, or all of it: "
                  "give it a port of its own" for other, taken in others if overlap(address, taken)]
        listened.append(("port", address))
    listened = [("listen", address) for address in values["listen"] or ()]
    admins = [("admin", values["admin"]), ("admin-public", values["admin_public"])]
    for name, others in (("admin", listened), ("admin_public", [*admins[:1], *listened]),
                         ("registry", [*admins, *listened])):
        for other, address in others:
            if overlap(values[name], address):
                wrong.append(f"{given[name].source}: {show_address(values[name])} and --{other} "
                             f"{show_address(address)} have an address in common: give it a port of its own")
    try:
        own_zones(values["zones"], values["zone"], values["own_address"])
    except ValueError as error:
        wrong.append(str(error))
    if values["admin_token"] and not SECRET.fullmatch(values["admin_token"]):
        wrong.append(f"{ADMIN_TOKEN}: has to be 16 printable characters or more, without spaces")
    own = [("--listen", show_address(address)) for address in values["listen"] or ()]
    own += [("port", show_address(port_address(route))) for route in values["port"] or ()]
    own += [("--admin", values["admin"])] if isinstance(values["admin"], str) else []
    for name in ("route", "port"):
        wrong += [f"{given[name].source}: {route} leads back to {what} {address}" for what, address in own
                  for route in values[name] or () if leads_back(route, address)]
    if running is not None and values["open_to_all"] and not running.open_to_all:
        wrong.append("there are no routes any more: every name would be served")  # a file that is being written
    elif running is not None and isinstance(values["stamp"], Stamp) and not values["stamp"].size:
        wrong.append(f"{values['config']}: is empty")


def cross_checked_http(values: Mapping[str, Any], given: Mapping[str, Given], wrong: list[str]) -> None:
    """The same for plain HTTP, and for pages."""
    routes = values["route"] or ()
    for route in routes if values["http"] else ():  # else nobody knows what is meant
        wrong += [f"{given['route'].source}: {route.pattern}: {each}"
                  for each in misfits_of_http(route, route.http or values["http"])]
    missing = [f"{room}.py" for room in OPTIONS["web"] if not is_here(room)]
    if missing and asks_for_web(values["http"], values["error_pages"], routes):
        asking = given["error_pages"].source if values["error_pages"] else given["http"].source \
            if values["http"] not in (None, "refuse") else f"{given['route'].source}: http"
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        wrong.append(f"{asking}: {' and '.join(missing)} {are} not beside sniroute.py: copy {them} there")


def cross_checked_servers(values: Mapping[str, Any], given: Mapping[str, Given], environ: Mapping[str, str],
                          wrong: list[str]) -> None:
    """The same for servers that NodePass clients dial in to: their keys and addresses."""
    routes = {name: values[name] or () for name in ("route", "port")}
    if kinds_of((*routes["route"], *routes["port"])).isdisjoint(NODEPASS_KINDS):
        return
    from sniroute_nat import misfits  # imported late: an option
    own = {"--listen": values["listen"], "port": map(port_address, routes["port"]), "--admin": [values["admin"]],
           "--admin-public": [values["admin_public"]], "--registry": [values["registry"]]}
    taken = [(what, each) for what, found in own.items() for each in found or () if isinstance(each, tuple)]
    first, last = values["ports"] or (0, -1)
    source = " and ".join(given[name].source for name in routes if not kinds_of(routes[name]).isdisjoint(NODEPASS_KINDS))
    wrong += [f"{source}: {each}" for each in misfits((*routes["route"], *routes["port"]), environ, taken,
                                                     range(first, last + 1))]


def leads_back(route: Route, address: str) -> bool:
    """Whether a target of the route is an address of this router's."""
    return any(row.leads_back(target.partition(":")[2], address) for row, target in zip(route.kinds, route.targets))


def derived(values: dict[str, Any]) -> dict[str, Any]:
    """The values, and what depends on the host."""
    _, descriptors = descriptor_limits()
    programs = "exec" in kinds_of((*values["route"], *values["port"]))
    spare = SPARE_FDS * (1 + programs)  # there may be as many of these as tunnels
    spare += REGISTRY_FDS * (values["registry"] is not None)
    spare += sum(route.several.warm for route in (*values["route"], *values["port"]) if route.several is not None)
    fit = max(1, (descriptors - min(spare, descriptors // 2)) // 2)
    values["fit"] = fit
    values["own_zones"] = own_zones(values["zones"], values["zone"], values["own_address"])
    values["servers"] = server_addresses((*values["route"], *values["port"]))
    values["max_connections"] = values["max_connections"] or fit
    values["max_tunnels"] = values["max_tunnels"] or tunnels_that_fit(values)
    return values


def kinds_of(routes: Iterable[Route]) -> set[str]:
    """The kinds of target that these routes have."""
    return {target.partition(":")[0] for target in targets_of(routes)}


def targets_of(routes: Iterable[Route]) -> Iterator[str]:
    """All the targets of these routes."""
    return (target for route in routes for target in route.targets)


def tunnels_that_fit(values: Mapping[str, Any]) -> int:
    """As many as there are ports; where each has a process of its own, as many as fit into the host's memory."""
    first, last = values["ports"]
    memory = memory_allowed()
    used = kinds_of((*values["route"], *values["port"]))
    share = min((row.carries for scheme, row in values["launchers"].items() if scheme in used), default=1)
    if not used.isdisjoint(PROGRAM_KINDS) or lets_owners_serve(values["claims"]):
        share = 1  # the key of each claim may begin another process
    return max(1, min(last - first + 1, memory * share // TUNNEL_MEMORY))


# -- the host ----------------------------------------------------------------------------------


def tunnel_launchers(program: str | None, environ: Mapping[str, str]) -> dict[str, Launcher]:
    """The tunnel programs, by scheme.  Where there is no cloudflared, the carrier stands in for it."""
    carrier = carrier_launcher(environ)
    cloudflared = cloudflared_launcher(program or "cloudflared", environ)
    if program is None and not cloudflared.is_there() and carrier.is_there():
        cloudflared = carrier
    return {"cloudflared": cloudflared, "carrier": carrier}


def server_addresses(routes: Sequence[Route]) -> tuple[tuple[str, int], ...]:
    """Where NodePass clients dial in."""
    if kinds_of(routes).isdisjoint(NODEPASS_KINDS):
        return ()
    from sniroute_nat import addresses_of  # imported late: an option
    return addresses_of(routes)


def lets_owners_serve(claims: Where | None) -> bool:
    """Whether owners of names may have NodePass servers."""
    return claims is not None and "nodepass" in claims.rules.targets and all(map(is_here, OPTIONS["nodepass"]))


def add_programs(launchers: dict[str, Launcher], values: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Add the rows of options, where a route needs them.  The table of a router that runs learns them at a reload."""
    used = kinds_of((*values["route"], *values["port"]))
    if "command" in used and "command" not in launchers:
        from sniroute_commands import COMMAND  # imported late: an option
        launchers["command"] = COMMAND
    if not used.isdisjoint(CLUSTER_KINDS) and "kubernetes" not in launchers:
        from sniroute_clusters import cluster_launcher
        paths = values["kubeconfig"] or environ.get("KUBECONFIG") and parse_paths(environ["KUBECONFIG"])
        launcher = cluster_launcher(environ, paths, values["exec_path"], values["kubernetes_ping"])
        launchers["kubernetes"] = launchers["jump"] = launcher  # one object: one process for both
    if "nodepass" in used or lets_owners_serve(values["claims"]):
        from sniroute_nat import nodepass_launcher
        launcher = launchers.setdefault("nodepass", nodepass_launcher(environ))
        launcher.made.learn(standing_tunnels((*values["route"], *values["port"]), {"nodepass": launcher}))


def warn_of_programs(settings: Settings) -> None:
    """Say which programs cannot be run, what they will miss, and who may reach the inside of this host."""
    reached = [(route, settings.listen) for route in settings.routes.routes]
    reached += [(route, [port_address(route)]) for route in settings.port]
    for route, addresses in reached:
        if not any(row.is_inside or row.is_program for row in route.kinds):
            continue
        outside = [show_address(address) for address in addresses if not is_loopback(address[0])]
        for row, target in zip(route.kinds, route.targets):
            if obstacle := row.obstacle(target.partition(":")[2]):
                log.warning("%s; names that need it are refused until then", obstacle)
        for variable in route.env_from:
            if variable.name not in os.environ:
                log.warning("%s: %s of env_from is not set: its program runs without it", route.pattern, variable)
        if outside and settings.max_per_client >= settings.max_tunnels \
                and any(target.startswith("exec:") for target in route.targets):
            log.warning("%s: one client address may hold all %d programs (--max-tunnels): lower --max-per-client",
                        route, settings.max_tunnels)
        if outside and any(row.is_inside for row in route.kinds) and route.allow is None:
            log.warning("%s: everybody who reaches %s gets there: name its clients in `allow`, "
                        "or listen on 127.0.0.1", route, ", ".join(outside))


def warn_of_http(settings: Settings) -> None:
    """Say where plain HTTP opens more than it seems to."""
    kept: dict[str, dict[tuple, Route]] = {}  # by target and `allow`: the first route of those
    for route in settings.routes.routes:
        for target in route.targets if route.allow is not None else ():
            kept.setdefault(one_loopback(target), {}).setdefault(route.allow, route)
    fielded = [target for target in kept if "{" in target]
    for route in settings.routes.routes:
        mode = route.http or settings.http
        if mode == "forward-tls" and route.verify is False:
            log.warning("%s: verify = false: whoever stands between here and there can read and change all of it: "
                        "name the file of the CA that has signed the certificate", route)
        if mode == "pass" and (other := kept_beside(route, kept, fielded)) is not None:
            log.warning("%s: with http = pass a client may ask that backend for %s, too, past its `allow`: take "
                        "forward, or give both the same `allow`", route, other.pattern)


def warn_of_registry(settings: Settings, where: Where) -> None:
    """Say where owners of names reach more than is meant, or nothing, and who may read their tokens."""
    rules = where.rules
    if not isinstance(where.address, str) and not is_loopback(where.address[0]):
        log.warning("registry on %s: tokens go there in plain text: listen on 127.0.0.1 or unix:PATH, and have a proxy "
                    "that speaks TLS in front for other hosts", show_address(where.address))
    if rules.targets == ("nodepass",) and not lets_owners_serve(where):
        log.warning("registry.targets: nothing can be claimed: nodepass needs %s beside sniroute.py",
                    ", ".join(f"{room}.py" for room in OPTIONS["nodepass"] if not is_here(room)))
    inside = [str(network) for network in rules.networks if network.is_loopback]
    if inside:
        log.warning("registry.networks: %s is this host: the owners of names, and all their clients, reach what listens "
                    "there from port %d to %d", ", ".join(inside), *rules.target_ports)
    for domain in rules.domains:
        taken = settings.routes.configured.find(f"{SOME_NAME}.{domain}")
        if taken is not None:
            log.warning("registry.domains: %s goes before each claim below %s, so all are refused as `configured`: "
                        "give one of them another domain", taken, domain)
    if rules.ports is not None and rules.ports[0] <= settings.ports[1] and settings.ports[0] <= rules.ports[1]:
        log.warning("registry.ports %d-%d overlap --ports %d-%d: a tunnel may have a port that is to be claimed",
                    *rules.ports, *settings.ports)


def kept_beside(route: Route, kept: Mapping[str, Mapping[tuple, Route]], fielded: Sequence[str]) -> Route | None:
    """A route with another `allow` that may lead to the same backend, as far as the targets say."""
    for target in map(one_loopback, route.targets):
        for near in kept if "{" in target else (target, *fielded):
            if near == target or fits(near, target) or fits(target, near):
                for allow, other in kept.get(near, {}).items():
                    if allow != route.allow:
                        return other
    return None


def one_loopback(target: str) -> str:
    """A target, with one name for this host."""
    scheme, _, rest = target.partition(":")
    host, colon, port = rest.rpartition(":")
    return f"tcp:localhost:{port}" if scheme == "tcp" and host in LOOPBACK else target


def fits(target: str, other: str) -> bool:
    """Whether the fields of a target may make the other one of it."""
    return "{" in target and re.fullmatch(".+".join(map(re.escape, FIELDS.split(target)[::2])), other) is not None


def warn(settings: Settings) -> None:
    """Say what is likely not meant, at the start, after a reload, and in `check`."""
    for line in settings.covered:
        log.warning("%s", line)
    if settings.open_to_all:
        log.warning("no --route: every name is served, each by a tunnel of its own (%s)", settings.routes.routes[0])
    routes = (*settings.routes.routes, *settings.port)
    for scheme, launcher in settings.launchers.items():
        if launcher.program and any(target.startswith(f"{scheme}:") for target in targets_of(routes)):
            if scheme == "cloudflared" and launcher is settings.launchers["carrier"]:
                log.info("cloudflared is not on PATH: the carrier beside sniroute.py does its work")
            elif obstacle := launcher.obstacle:
                log.warning("%s; names that need it are refused until then", obstacle)
    if settings.own_zones is None and (settings.zones or settings.zone or settings.own_address):
        why = f"own_address {settings.own_address} is in none of them" if settings.zones and settings.own_address \
            else "neither zone nor own_address says which is the own one" if settings.zones else "there are none"
        log.warning("zones: no backend is preferred for its zone, since %s", why)
    for route in settings.port:
        if route.several is not None and route.several.reuse == "quiet":
            log.warning("%s: reuse = quiet guesses: an answer that is late reaches another client, and so does what "
                        "the backend remembers of the one before", route)
    if "kubernetes" in settings.launchers:
        environ = settings.launchers["kubernetes"].environment
        home = "" if "KUBERNETES_SERVICE_HOST" in environ else environ.get("HOME", "")  # a pod may need no file
        paths = environ.get("KUBECONFIG") or (home and f"{home}/.kube/config")
        if paths and not any(map(os.path.exists, paths.split(":"))):
            log.warning("there is no kubeconfig at %s; names that need it are refused until then", paths)
    if not kinds_of(routes).isdisjoint(NODEPASS_KINDS):
        from sniroute_nat import cautions  # imported late: an option
        for line in cautions(routes, settings.max_tunnels):
            log.warning("%s", line)
    warn_of_programs(settings)
    warn_of_http(settings)
    if settings.claims is not None:
        warn_of_registry(settings, settings.claims)
    for route in settings.routes.routes:
        if any(row.is_tunnel and not row.is_program for row in route.kinds) and settings.routes.identified \
                and not route.is_of_one_domain():
            log.warning("%s: a client may own the domain this leads to, so the Access token is not shown there: "
                        "route your own domain, as **.example.com", route)
        if any(target.startswith("tcp:") for target in route.targets) and not route.is_of_one_domain():
            log.warning("%s: a client may own the domain this leads to, so private addresses are refused there: "
                        "name the host, or route your own domain, as **.example.com", route)
        hosts = [target.removeprefix("tcp:").rpartition(":")[0] for target in route.targets]
        if not set(LOOPBACK).isdisjoint(hosts) and route.chooses_port and route.allow is None:
            log.warning("%s: clients choose among all ports of this host: name the port, or let `allow` say who may "
                        "come", route)
        stars, star, behind = route.pattern.rpartition("*")
        taken = settings.routes.configured.find(f"x{behind}") if star and behind and "{" not in behind else None
        if taken is not None and "{" in taken.pattern and route.allow is not None and taken.allow is None:
            log.warning("%s goes before %s, and has not its `allow`: give it one", taken, route)
    identity = settings.launchers["carrier"].environment
    missing = [variable for variable in SERVICE_TOKEN if not identity.get(variable)]
    if len(missing) == 1 and any(row.is_tunnel and not row.is_program for route in routes for row in route.kinds):
        log.warning("%s is not set: the other half of the service token alone opens nothing", *missing)
    if settings.proxy_protocol != "off" and settings.proxy_from == parse_networks(LOCAL_NETWORKS) \
            and any(route.allow is not None for route in routes):
        log.warning("routes with `allow`: whoever is in --proxy-from, by default loopback and the private networks, "
                    "can claim any address in a PROXY header: name your balancers there, or none")
    if settings.max_connections > settings.fit:
        log.warning("--max-connections %d is more than the limit of open files allows (%d): raise LimitNOFILE",
                    settings.max_connections, settings.fit)
    tunnels = any(route.has_tunnel for route in routes)
    for line in too_little(tunnels, settings.admin is not None, settings.max_starting):
        log.warning("%s", line)
    low, high, said = local_ports() or (1, 0, True)
    if settings.ports[0] <= high and settings.ports[1] >= low:
        log.warning("--ports %d-%d overlap the kernel's own (%d-%d%s): a tunnel's port may be taken at any time",
                    *settings.ports, low, high, "" if said else ", its default: /proc/sys cannot be read here")
