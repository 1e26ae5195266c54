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
    add an option of a route    a row in ROUTE_OPTIONS, and a field of Route
    warn about a combination    `warn`; refuse one: `cross_checked`
"""

from __future__ import annotations

import argparse
import codecs
import functools
import ipaddress
import logging
import os
import re
import stat
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

from sniroute_host import (PATHS_MAX, TUNNEL_MEMORY, changed_by_others, descriptor_limits, local_ports, memory_allowed,
                           too_little)
from sniroute_launchers import (SERVICE_TOKEN, TUNNEL_IDENTITY, Launcher, Variable, carrier_launcher,
                                cloudflared_launcher, identity_faults, inherited)
from sniroute_names import (OPTIONS, Network, describe_version, is_here, parse_host_port, parse_ip, parse_network,
                            printable, show_address)
from sniroute_refusals import SettingsError
from sniroute_routes import PROGRAM_KINDS, Route, Routes, parse_port_route, parse_route, port_address
from sniroute_targets import SCHEMES
from sniroute_wire import PROXY_WRITERS

__version__ = "0.1.0"

log = logging.getLogger("sniroute")

# Limits, each with its reason.
SPARE_FDS = 480  # descriptors of 101 tunnels (three each), 32 pipes, 64 clients of the admin, listeners and the log
UNIX_PATH_MAX = 90  # sun_path of unix(7) has 108 bytes, or 104; some are for the name it has before it is ready
LOOPBACK = ("127.0.0.1", "[::1]", "localhost")  # as a target may write this host
SECRET = re.compile(r"[!-~]{16,}")  # a token: printable, and too long to be guessed
# Kubernetes sets SNIROUTE_PORT to such a value where a Service is called sniroute: that is no setting of anybody's.
SERVICE_LINK = re.compile(r"(?:tcp|udp|sctp)://\S+")


# -- values ------------------------------------------------------------------------------------


VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)  # the name of one, POSIX 8.1
DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?", re.ASCII)


def parse_duration(text: str) -> float:
    """`300s`, `5m`, `1h30m` or `500ms` in seconds, above zero.  Raises ValueError."""
    match = DURATION.fullmatch(text)
    hours, minutes, seconds, millis = (float(part or 0) for part in match.groups()) if match else (0,) * 4
    total = hours * 3600 + minutes * 60 + seconds + millis / 1000
    if not 0 < total <= 366 * 86400:
        raise ValueError(f"{text!r} is not a duration such as 300s, 5m, 1h30m or 500ms")
    return total


def parse_off_or_duration(text: str) -> float:
    """A duration as above, or `off`, which is 0.  Raises ValueError."""
    return 0.0 if text == "off" else parse_duration(text)


def parse_none_or_duration(text: str) -> float:
    """A duration as above, or `0s`.  Raises ValueError."""
    return 0.0 if text == "0s" else parse_duration(text)


def parse_count(text: str) -> int:
    """A whole number from 1 to a million.  Raises ValueError."""
    if not re.fullmatch(r"[1-9][0-9]{0,6}", text, re.ASCII) or int(text) > 1_000_000:
        raise ValueError(f"{text!r} is not a whole number from 1 to 1000000")
    return int(text)


def parse_listen(text: str) -> tuple[str, int]:
    """An address to listen on; without a host it is every address.  Raises ValueError."""
    return parse_host_port(text, default_host="*")


def parse_ports(text: str) -> tuple[int, int]:
    """`FIRST-LAST`.  Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", text, re.ASCII)
    if not match or not 0 < int(match[1]) <= int(match[2]) < 65536:
        raise ValueError(f"{text!r} is not FIRST-LAST, ports from 1 to 65535")
    return int(match[1]), int(match[2])


def parse_networks(text: str) -> tuple[Network, ...]:
    """`CIDR,...`, or `none`.  Raises ValueError."""
    try:
        return tuple(parse_network(part.strip()) for part in text.split(",")) if text != "none" else ()
    except ValueError as error:
        advice = "; IPv4 is written without ::ffff:" if "::ffff:" in text.lower() else ""
        raise ValueError(f"{error}: a network is 192.0.2.0/24, or one address{advice}") from None


def absolute(text: str) -> str:
    """A path as it is from `/`: the folder that a program was started in may go.  Raises ValueError."""
    try:
        return os.path.abspath(text)
    except OSError as error:
        raise ValueError(f"{text!r} is relative to a folder that cannot be used ({error.strerror}): "
                         "give the whole path, from /") from None


def parse_program(text: str) -> str:
    """The tunnel program: a file that runs, and that only root and this user may change.  Raises ValueError."""
    path = absolute(text)
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        raise ValueError(f"{text!r} is not a program: there is no such file, or it may not be executed")
    fault = changed_by_others(path)
    if fault:
        raise ValueError(f"{text!r} is not run, since {printable(fault, PATHS_MAX)}")
    return path


def parse_admin(text: str) -> str | tuple[str, int]:
    """`unix:PATH`, which gives the path, or a loopback HOST:PORT.  Raises ValueError."""
    if text.startswith("unix:"):
        path = absolute(text[5:])
        if not re.fullmatch(r"[!-~]+", text[5:]) or len(path) > UNIX_PATH_MAX:
            raise ValueError(f"{text!r} is not unix:PATH with at most {UNIX_PATH_MAX} characters, without spaces")
        return path
    host, port = parse_host_port(text)
    try:
        loopback = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ValueError(f"{text!r} is neither a loopback address, as 127.0.0.1:19001, nor unix:PATH; "
                         "for other hosts there is --admin-public: metrics and probes alone")
    return host, port


def one_of(*words: str) -> Callable[[str], str]:
    """A parser for one of these words."""
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text
    return parse


def parse_env(value: Any) -> tuple[Variable, ...]:
    """A table of variables.  Raises ValueError, which never has a value in it: it may be a secret."""
    if not isinstance(value, dict):
        raise ValueError("is no table of variables, as { NAME = \"value\" }")
    for name, text in value.items():
        if not VARIABLE.fullmatch(name) or "\0" in as_text(text):
            raise ValueError(f"{printable(name)}: is no variable: a name has letters, digits and _, a value no NUL")
    return tuple(sorted(Variable(name, as_text(text)) for name, text in value.items()))


def parse_names(text: str) -> tuple[Variable, ...]:
    """`NAME,...`: variables of the router's own environment.  Raises ValueError."""
    names = [name.strip() for name in text.split(",")]
    wrong = [name for name in names if not VARIABLE.fullmatch(name)]
    if wrong:
        raise ValueError(f"{printable(wrong[0])!r} is not the name of a variable")
    return tuple(Variable(name) for name in sorted(set(names)))


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
    Setting("listen", "ADDRESS", parse_listen, ":19000",
            "where to listen: HOST:PORT, [::1]:PORT, or :PORT for every address (default :19000); repeatable",
            many=True, fixed=True),
    Setting("route", "PATTERN=TARGET", parse_route, "*=cloudflared:cft-{name}",
            "what a name leads to; repeatable; replaces the default route, *=cloudflared:cft-{name}",
            many=True, key="routes"),
    Setting("port", "ADDRESS=TARGET", parse_port_route, None,
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
    Setting("admin", "ADDRESS", parse_admin, None,
            "metrics, status and control by HTTP: a loopback HOST:PORT, or unix:PATH (default off); "
            "needs sniroute_admin.py, sniroute_door.py, sniroute_metrics.py and sniroute_page.py", fixed=True),
    Setting("admin-public", "ADDRESS", parse_listen, None,
            "metrics and probes alone, for everybody who can connect: HOST:PORT, or :PORT for every address "
            "(default off); needs the same files", fixed=True),
    Setting("log-level", "LEVEL", one_of("debug", "info", "warning", "error"), "info",
            "debug, info, warning or error (default info)"),
    Setting("log-format", "FORMAT", one_of("text", "json"), "text",
            "text or json (default text)", fixed=True),
)

# What a route in a file may have beside its target: a field of Route, and its parser.
ROUTE_OPTIONS = {"send_proxy": one_of(*PROXY_WRITERS), "allow": parse_networks, "max_connections": parse_count,
                 "idle": parse_duration, "connection_idle": parse_off_or_duration, "env": parse_env,
                 "env_from": parse_names}
WHOLE_OPTIONS = frozenset(("env",))  # those whose parser takes the value as TOML has it
PROGRAM_OPTIONS = frozenset(("env", "env_from"))  # those for targets that run a program
ADMIN_TOKEN = "SNIROUTE_ADMIN_TOKEN"  # the variable; a secret is no option, which every user of the host can read


class Settings(NamedTuple):
    """The settings, checked.  Durations in seconds; a field whose row has no default may be None before `derived`.

    A NamedTuple instead of a dataclass, because that module takes a megabyte of every router.
    """

    command: str
    name: str | None  # what `explain` is about
    quiet: bool  # `check` prints no routes
    config: str | None
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
    max_connections: int
    max_per_client: int
    max_tunnels: int
    max_starting: int
    no_name: str
    cloudflared: str | None
    admin: str | tuple[str, int] | None  # the path of a unix socket, or (host, port)
    admin_public: tuple[str, int] | None
    log_level: str
    log_format: str
    # What follows is no row of SETTINGS.
    routes: Routes
    open_to_all: bool  # nobody has named a route
    admin_token: str | None
    launchers: dict[str, Launcher]  # by scheme
    fit: int  # connections that the limit of open files allows
    covered: list[str]  # keys of the file that something else overrides, a line each
    kept: list[str]  # what a reload asked for and cannot change, a line each
    again: Callable[[Settings], Settings]  # read them anew, given those that run; raises SettingsError


# -- the file ----------------------------------------------------------------------------------


def as_text(value: Any) -> str:
    """A TOML value as the command line would have it, so that one parser does for both."""
    if isinstance(value, list):
        return ",".join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def meant(word: str, words: Iterable[str]) -> str:
    """What somebody may have meant, as the end of a sentence about an unknown word."""
    import difflib  # imported late: only a mistyped word needs it
    close = difflib.get_close_matches(word.replace("-", "_"), words, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(words)}"


def read_settings(path: str, wrong: list[str], again: bool) -> dict[str, Any] | None:
    """What a file says, parsed, by key; None where it cannot be read.  What is wrong goes to `wrong`, a line each.

    Read `again`, it has to be a file: a pipe, as `-c <(...)` gives, would be empty, or be waited for.
    """
    faults: list[str] = []
    values: dict[str, Any] = {}
    tables = {"routes": parse_route, "ports": parse_port_route}
    rows = {row.file_key: row for row in SETTINGS if row.file_key and row.file_key not in ("routes", "[ports]")}
    rows["tunnel_ports"] = rows["ports"]  # the name of `ports` where there is a table of that name
    table = read_toml(path, faults, again)
    if table is None:
        wrong += [f"{path}: {fault}" for fault in faults]
        return None
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
    wrong += [f"{path}: {fault}" for fault in faults]
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


# -- the command line --------------------------------------------------------------------------

COMMANDS = ("serve", "check", "explain", "selftest")
USAGE = """\
%(prog)s [serve] [options]                    run the router
       %(prog)s check [--quiet] [options]            check the settings, and print the routes
       %(prog)s explain NAME [options]               what would happen to this name, and why
       %(prog)s selftest                             the hard cases, against itself, on loopback
       %(prog)s bundle [-o FILE] [--with OPTION,...] one file, which any Python from 3.11 runs
       %(prog)s carrier ...                          what `cloudflared access tcp` does"""


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
    file = read_settings(path, wrong, running is not None) if path else {}
    given, covered = sources(asked, environ, file or {}, path)
    values = parsed(given, running, wrong)
    values["config"] = path
    kept = keep_fixed(values, given, running)
    values["admin_token"] = environ.get(ADMIN_TOKEN, "").strip() or None
    values["open_to_all"] = given["route"].source == "default" and file is not None  # else nobody knows
    values["routes"] = configured_routes(values, given["route"].source, environ, wrong)
    cross_checked(values, given, running, wrong)
    wrong += identity_faults(environ)
    if wrong:
        raise SettingsError(*wrong)
    values["launchers"] = running.launchers if running else tunnel_launchers(values["cloudflared"], environ)
    add_commands(values["launchers"], (*values["route"], *values["port"]))
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
            kept.append(f"{given[row.field].source}: is for the next start; it stays as it is")
            values[row.field] = getattr(running, row.field)
    return kept


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
    asked = "--admin" if values["admin"] is not None else "--admin-public" if values["admin_public"] is not None else ""
    if asked:
        wrong += [f"{asked}: {room}.py is not beside sniroute.py: copy it there" for room in OPTIONS["admin"]
                  if not is_here(room)]
    listened = [("--listen", address) for address in values["listen"] or ()]
    for route in values["port"] or ():
        others = [*listened, ("--admin", values["admin"]), ("--admin-public", values["admin_public"])]
        address = port_address(route)
        wrong += [f"{given['port'].source}: {route.pattern} is a part of {other} {show_address(taken)}, or all of it: "
                  "give it a port of its own" for other, taken in others if overlap(address, taken)]
        listened.append(("port", address))
    listened = [("listen", address) for address in values["listen"] or ()]
    for name, others in (("admin", listened), ("admin_public", [("admin", values["admin"]), *listened])):
        for other, address in others:
            if overlap(values[name], address):
                wrong.append(f"{given[name].source}: {show_address(values[name])} and --{other} "
                             f"{show_address(address)} have an address in common: give it a port of its own")
    if values["admin_token"] and not SECRET.fullmatch(values["admin_token"]):
        wrong.append(f"{ADMIN_TOKEN}: has to be 16 printable characters or more, without spaces")
    own = [("--listen", show_address(address)) for address in values["listen"] or ()]
    own += [("port", show_address(port_address(route))) for route in values["port"] or ()]
    own += [("--admin", values["admin"])] if isinstance(values["admin"], str) else []
    for name in ("route", "port"):
        wrong += [f"{given[name].source}: {route} leads back to {what} {address}" for what, address in own
                  for route in values[name] or () if route.scheme.leads_back(route.target.partition(":")[2], address)]
    if running is not None and values["open_to_all"] and not running.open_to_all:
        wrong.append("there are no routes any more: every name would be served")  # a file that is being written


def overlap(one: str | tuple[str, int] | None, other: str | tuple[str, int] | None) -> bool:
    """Whether two places to listen have a TCP address in common; for names only where they are the same name."""
    if not isinstance(one, tuple) or not isinstance(other, tuple) or one[1] != other[1] or not one[1]:
        return False
    hosts = ["127.0.0.1" if host == "localhost" else host.lower() for host, _ in (one, other)]
    return any(a == b or a in ("*", "::") or a == "0.0.0.0" and ":" not in b for a, b in (hosts, reversed(hosts)))


def derived(values: dict[str, Any]) -> dict[str, Any]:
    """The values, and what depends on the host."""
    _, descriptors = descriptor_limits()
    programs = any(route.target.startswith("exec:") for route in (*values["route"], *values["port"]))
    spare = SPARE_FDS * (1 + programs)  # there may be as many of these as tunnels
    fit = max(1, (descriptors - min(spare, descriptors // 2)) // 2)
    values["fit"] = fit
    values["max_connections"] = values["max_connections"] or fit
    values["max_tunnels"] = values["max_tunnels"] or tunnels_that_fit(values)
    return values


def tunnels_that_fit(values: Mapping[str, Any]) -> int:
    """As many as there are ports; where each has a process of its own, as many as fit into the host's memory."""
    first, last = values["ports"]
    memory = memory_allowed()
    used = {route.target.partition(":")[0] for route in (*values["route"], *values["port"])}
    share = min((row.carries for scheme, row in values["launchers"].items() if scheme in used), default=1)
    if not used.isdisjoint(PROGRAM_KINDS):
        share = 1
    return max(1, min(last - first + 1, memory * share // TUNNEL_MEMORY))


# -- the host ----------------------------------------------------------------------------------


def tunnel_launchers(program: str | None, environ: Mapping[str, str]) -> dict[str, Launcher]:
    """The tunnel programs, by scheme.  Where there is no cloudflared, the carrier stands in for it."""
    carrier = carrier_launcher(environ)
    cloudflared = cloudflared_launcher(program or "cloudflared", environ)
    if program is None and not cloudflared.is_there() and carrier.is_there():
        cloudflared = carrier
    return {"cloudflared": cloudflared, "carrier": carrier}


def add_commands(launchers: dict[str, Launcher], routes: Iterable[Route]) -> None:
    """Add the row for commands, where a route has one.  The table of a router that runs learns it at a reload."""
    if "command" not in launchers and any(route.target.startswith("command:") for route in routes):
        from sniroute_commands import COMMAND  # imported late: an option
        launchers["command"] = COMMAND


def warn_of_programs(settings: Settings) -> None:
    """Say which programs cannot be run, what they will miss, and who may reach the inside of this host."""
    reached = [(route, settings.listen) for route in settings.routes.routes]
    reached += [(route, [port_address(route)]) for route in settings.port]
    for route, addresses in reached:
        if not route.scheme.is_inside and not route.scheme.is_program:
            continue
        outside = [show_address(address) for address in addresses if not is_loopback(address[0])]
        if obstacle := route.scheme.obstacle(route.target.partition(":")[2]):
            log.warning("%s; names that need it are refused until then", obstacle)
        for variable in route.env_from:
            if variable.name not in os.environ:
                log.warning("%s: %s of env_from is not set: its program runs without it", route.pattern, variable)
        if outside and route.target.startswith("exec:") and settings.max_per_client >= settings.max_tunnels:
            log.warning("%s: one client address may hold all %d programs (--max-tunnels): lower --max-per-client",
                        route, settings.max_tunnels)
        if outside and route.scheme.is_inside and route.allow is None:
            log.warning("%s: everybody who reaches %s gets there: name its clients in `allow`, "
                        "or listen on 127.0.0.1", route, ", ".join(outside))


def is_loopback(host: str) -> bool:
    """Whether only this host reaches a listener on it."""
    try:
        return host == "localhost" or parse_ip(host).is_loopback
    except ValueError:
        return False


def warn(settings: Settings) -> None:
    """Say what is likely not meant, at the start, after a reload, and in `check`."""
    for line in settings.covered:
        log.warning("%s", line)
    if settings.open_to_all:
        log.warning("no --route: every name is served, each by a tunnel of its own (%s)", settings.routes.routes[0])
    routes = (*settings.routes.routes, *settings.port)
    for scheme, launcher in settings.launchers.items():
        if launcher.made is None and any(route.target.startswith(f"{scheme}:") for route in routes):
            if scheme == "cloudflared" and launcher is settings.launchers["carrier"]:
                log.info("cloudflared is not on PATH: the carrier beside sniroute.py does its work")
            elif obstacle := launcher.obstacle:
                log.warning("%s; names that need it are refused until then", obstacle)
    warn_of_programs(settings)
    for route in settings.routes.routes:
        if route.scheme.is_tunnel and not route.scheme.is_program and settings.routes.identified \
                and not route.is_of_one_domain():
            log.warning("%s: a client may own the domain this leads to, so the Access token is not shown there: "
                        "route your own domain, as **.example.com", route)
        if route.target.startswith("tcp:") and not route.is_of_one_domain():
            log.warning("%s: a client may own the domain this leads to, so private addresses are refused there: "
                        "name the host, or route your own domain, as **.example.com", route)
        host, _, _ = route.target.removeprefix("tcp:").rpartition(":")
        if host in LOOPBACK and route.chooses_port and route.allow is None:
            log.warning("%s: clients choose among all ports of this host: name the port, or let `allow` say who may "
                        "come", route)
        stars, star, behind = route.pattern.rpartition("*")
        taken = settings.routes.configured.find(f"x{behind}") if star and behind and "{" not in behind else None
        if taken is not None and "{" in taken.pattern and route.allow is not None and taken.allow is None:
            log.warning("%s goes before %s, and has not its `allow`: give it one", taken, route)
    identity = settings.launchers["carrier"].environment
    missing = [variable for variable in SERVICE_TOKEN if not identity.get(variable)]
    if len(missing) == 1 and any(route.scheme.is_tunnel and not route.scheme.is_program for route in routes):
        log.warning("%s is not set: the other half of the service token alone opens nothing", *missing)
    if settings.proxy_protocol != "off" and settings.proxy_from == parse_networks(LOCAL_NETWORKS) \
            and any(route.allow is not None for route in routes):
        log.warning("routes with `allow`: whoever is in --proxy-from, by default loopback and the private networks, "
                    "can claim any address in a PROXY header: name your balancers there, or none")
    if settings.max_connections > settings.fit:
        log.warning("--max-connections %d is more than the limit of open files allows (%d): raise LimitNOFILE",
                    settings.max_connections, settings.fit)
    tunnels = any(route.scheme.is_tunnel for route in routes)
    for line in too_little(tunnels, settings.admin is not None, settings.max_starting):
        log.warning("%s", line)
    low, high, said = local_ports() or (1, 0, True)
    if settings.ports[0] <= high and settings.ports[1] >= low:
        log.warning("--ports %d-%d overlap the kernel's own (%d-%d%s): a tunnel's port may be taken at any time",
                    *settings.ports, low, high, "" if said else ", its default: /proc/sys cannot be read here")
