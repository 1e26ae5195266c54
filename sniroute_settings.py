"""sniroute_settings: one table of settings: options, variables, and keys of the file.

Threads: main; a reload may come from any thread, one at a time.
"""

from __future__ import annotations

import logging
import argparse
import functools
import ipaddress
import os
import re
import resource
import stat
import sys
import types
from typing import Any, Callable, Iterable, NamedTuple, Sequence, TYPE_CHECKING

from sniroute_names import __version__, parse_host_port, show_address
from sniroute_refusals import SettingsError
from sniroute_routes import ANONYMOUS, SCHEMES, Route, Routes, parse_route, tunnel_ready
from sniroute_tunnels import TUNNEL_IDENTITY, carrier_launcher, cloudflared_launcher, printable
from sniroute_wire import PROXY_WRITERS

if TYPE_CHECKING:
    from sniroute_tunnels import Launcher

log = logging.getLogger("sniroute")
SPARE_FDS = 400  # descriptors for 101 tunnels (three each), the pipes, listeners and the log
UNIX_PATH_MAX = 90  # sun_path of unix(7) has 108 bytes, or 104; some are for the name it has before it is ready
TUNNEL_MEMORY = 64 << 20  # memory of the host for each process of a tunnel program: cloudflared takes about 28 MB


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
    """The same, or `off`, which is 0."""
    return 0.0 if text == "off" else parse_duration(text)


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


def parse_networks(text: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """`CIDR,...`, or `none`.  Raises ValueError."""
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",")) if text != "none" else ()
    except ValueError as error:
        raise ValueError(f"{error}: a network is 192.0.2.0/24, or one address") from None


def parse_program(text: str) -> str:
    """The tunnel program: a file that runs, and that only root or this user may replace."""
    path = os.path.abspath(text)
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        raise ValueError(f"{text!r} is not a program: there is no such file, or it may not be executed")
    state = os.stat(path)
    if state.st_mode & stat.S_IWOTH or state.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{text!r} can be replaced by other users: chown it, and chmod o-w")
    return path


def parse_admin(text: str) -> str | tuple[str, int]:
    """`unix:PATH`, which gives the path, or a loopback HOST:PORT.  Raises ValueError."""
    if text.startswith("unix:"):
        path = os.path.abspath(text[5:])
        if not re.fullmatch(r"[!-~]+", text[5:]) or len(path) > UNIX_PATH_MAX:
            raise ValueError(f"{text!r} is not unix:PATH with at most {UNIX_PATH_MAX} characters, without spaces")
        return path
    host, port = parse_host_port(text)
    try:
        loopback = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ValueError(f"{text!r} is neither a loopback address, as 127.0.0.1:19001, nor unix:PATH")
    return host, port


def one_of(*words: str) -> Callable[[str], str]:
    """A parser for one of these words."""
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text
    return parse


LOCAL_NETWORKS = "127.0.0.0/8,::1/128,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,fc00::/7"


class Setting(NamedTuple):
    """One setting: the option `--name`, the variable `SNIROUTE_NAME`, the attribute `name`, and a key in the file.

    But for `config`, which is no key, and `route`, which is the table `routes` there.
    """

    name: str
    metavar: str
    parse: Callable[[str], Any]
    default: str | None  # as text; None where it depends on the host: derive_settings, or PATH
    help: str
    many: bool = False  # the option may be repeated; the variable holds several, with spaces between
    fixed: bool = False  # a reload cannot change it

    @property
    def attribute(self) -> str:
        """Its name in the program."""
        return self.name.replace("-", "_")


SETTINGS = (
    Setting("config", "FILE", os.path.abspath, None,
            "a file of settings (TOML): all of these, and routes with options of their own"),
    Setting("listen", "ADDRESS", parse_listen, ":19000",
            "where to listen: HOST:PORT, [::1]:PORT, or :PORT for every address (default :19000); repeatable",
            many=True, fixed=True),
    Setting("route", "PATTERN=TARGET", parse_route, "*=cloudflared:cft-{name}",
            "what a name leads to; repeatable; replaces the default route, *=cloudflared:cft-{name}", True),
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
            "a connection that has carried no byte for this long is closed (default off)"),
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
            "needs sniroute_admin.py", fixed=True),
    Setting("log-level", "LEVEL", one_of("debug", "info", "warning", "error"), "info",
            "debug, info, warning or error (default info)"),
    Setting("log-format", "FORMAT", one_of("text", "json"), "text",
            "text or json (default text)", fixed=True),
)

# What a route in a file may have beside its target: an attribute of Route, and its parser.
ROUTE_OPTIONS = {"send_proxy": one_of(*PROXY_WRITERS), "allow": parse_networks, "max_connections": parse_count,
                 "idle": parse_duration, "connection_idle": parse_off_or_duration}
HERE = os.path.dirname(os.path.abspath(__file__))
ADMIN_TOKEN = "SNIROUTE_ADMIN_TOKEN"  # the variable; a secret is no option, which every user of the host can read


def as_text(value: Any) -> str:
    """A TOML value as the command line would have it, so that one parser does for both."""
    if isinstance(value, list):
        return ",".join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def meant(word: str, words: Iterable[str]) -> str:
    """What somebody may have meant, as the end of a sentence about an unknown word."""
    import difflib  # for those who mistype only
    close = difflib.get_close_matches(word.replace("-", "_"), words, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(words)}"


def read_routes(table: Any, wrong: list[str]) -> list[Route]:
    """The table `routes` of a file.  What is wrong with it is added to `wrong`."""
    if not isinstance(table, dict) or not table:
        wrong.append("routes: is no table of routes, as \"*.example.com\" = \"cloudflared:{name}\"")
        return []
    routes = []
    for pattern, value in table.items():
        where = f'routes."{printable(pattern)}"'
        options = dict(value) if isinstance(value, dict) else {"target": value}
        if "target" not in options:
            wrong.append(f"{where}: has no target (a pattern goes in quotes, "
                         'as "db.example.com" = "tcp:192.0.2.10:5432")')
            continue
        target = as_text(options.pop("target"))
        try:
            route = parse_route(f"{pattern}={target}")
        except ValueError as error:
            wrong.append(f"{where}: {error}")
            route = Route(pattern, "tcp:")  # for what else is wrong
        for name, option in options.items():
            if name not in ROUTE_OPTIONS:
                others = meant(name, ("target", *ROUTE_OPTIONS))
                wrong.append(f"{where}.{printable(name)}: there is no such option{others}")
            elif name == "idle" and SCHEMES.get(target.partition(":")[0], SCHEMES["tcp"]).ready is not tunnel_ready:
                wrong.append(f"{where}.idle: is for tunnels; here connection_idle closes what is silent")
            else:
                try:
                    route = route._replace(**{name: ROUTE_OPTIONS[name](as_text(option))})
                except ValueError as error:
                    wrong.append(f"{where}.{name}: {error}")
        routes.append(route)
    return routes


def read_settings(path: str, wrong: list[str], again: bool) -> dict[str, Any]:
    """What a file says, parsed, by attribute.  What is wrong with it is added to `wrong`, a line each.

    Read `again`, it has to be a file: a pipe, as `-c <(...)` gives, would be empty, or be waited for.
    """
    import tomllib  # a megabyte, for those who have a file
    faults: list[str] = []
    values: dict[str, Any] = {}
    table: dict[str, Any] = {}
    try:
        if again and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("is no regular file, and cannot be read again")
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & stat.S_IWOTH:
                raise ValueError("can be changed by other users: chmod o-w")
            table = tomllib.load(file)
    except OSError as error:
        faults.append(error.strerror)
    except (ValueError, RecursionError) as error:  # no TOML, or no UTF-8
        faults.append(str(error))
    rows = {row.attribute: row for row in SETTINGS if row.name not in ("config", "route")}
    for key, value in table.items():
        row = rows.get(key)
        try:
            if key == "routes":
                values["route"] = read_routes(value, faults)
            elif row is None:
                faults.append(f"{printable(key)}: there is no such setting{meant(key, (*rows, 'routes'))}")
            elif row.many:
                texts = [as_text(each) for each in (value if isinstance(value, list) else [value])]
                values[key] = [row.parse(text) for text in texts or [""]]
            else:
                values[key] = row.parse(as_text(value))
        except ValueError as error:
            faults.append(f"{key}: {error}")
    wrong += [f"{path}: {fault}" for fault in faults]
    return values


COMMANDS = ("serve", "check", "explain", "selftest")
USAGE = """\
%(prog)s [serve] [options]
       %(prog)s check [options]           validate the settings and print the routes
       %(prog)s explain NAME [options]    what would happen to this name, and why
       %(prog)s selftest                  the hard cases, against itself, on loopback"""


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
        short = ["-c"] if row.name == "config" else []
        parser.add_argument(*short, f"--{row.name}", metavar=row.metavar, help=row.help.replace("%", "%%"),
                            action="append" if row.many else "store")
    parser.add_argument("-V", "--version", action="version",
                        version=f"sniroute {__version__} (Python {sys.version.split()[0]}, {sys.platform})")
    given = parser.parse_intermixed_args(argv)
    if (given.command == "explain") != (given.name is not None):
        parser.error("explain takes one NAME" if given.command == "explain" else f"unexpected {given.name!r}")
    return given


def load_settings(argv: Sequence[str], environ: dict[str, str],
                  running: types.SimpleNamespace | None = None) -> types.SimpleNamespace:
    """The settings, by name, and the `command` and `name` of the command line.

    Precedence: command line, environment, file, default.  `running` are those of a router that runs: what it
    cannot change stays as it is there, and `kept` has a line for each.  Raises SettingsError with one line
    for each setting that is wrong; exits for --help, --version and a command line that is no command line.
    """
    given = parse_command_line(argv)
    settings = types.SimpleNamespace(command=given.command, name=given.name, kept=[], covered=[])
    wrong: list[str] = []
    path = given.config or environ.get("SNIROUTE_CONFIG")
    file = read_settings(path, wrong, running is not None) if path else {}
    for row in SETTINGS:
        attribute = row.attribute
        text, source = getattr(given, attribute), f"--{row.name}"
        variable = f"SNIROUTE_{attribute.upper()}"
        if text is None and environ.get(variable):
            text, source = environ[variable], variable
            text = text.split() if row.many else text
        key = "routes" if row.name == "route" else attribute
        if text is not None and attribute in file:
            settings.covered.append(f"{path}: {key} is not used: {source} goes first")
        if text is None and attribute in file:
            value, source = file[attribute], f"{path}: {key}"
        else:
            if text is None and row.default is not None:
                text, source = [row.default] if row.many else row.default, "default"
            try:
                value = None if text is None else [row.parse(t) for t in text] if row.many else row.parse(text)
            except ValueError as error:
                wrong.append(f"{source}: {error}")
                value = None
        if running is not None and row.fixed and value != getattr(running, attribute):
            settings.kept.append(f"{source}: is for the next start; it stays as it is")
            value = getattr(running, attribute)
        setattr(settings, attribute, value)
        if row.name == "route":
            routes_from, settings.open_to_all = source, source == "default"
            try:
                settings.routes = Routes(value or (), any(environ.get(variable) for variable in TUNNEL_IDENTITY))
            except ValueError as error:
                wrong.append(f"{source}: {error}")
    if settings.admin is not None and not os.path.isfile(os.path.join(HERE, "sniroute_admin.py")):
        wrong.append("--admin: sniroute_admin.py is not beside sniroute.py: copy it there")
    settings.admin_token = environ.get(ADMIN_TOKEN)
    if settings.admin_token and not re.fullmatch(r"[!-~]{16,}", settings.admin_token):
        wrong.append(f"{ADMIN_TOKEN}: has to be 16 printable characters or more, without spaces")
    wrong += [f"{routes_from}: {route} leads back to --listen {show_address(address)}"
              for address in settings.listen or () for route in settings.route or ()
              if route.target == f"tcp:{show_address(address)}"]
    if running is not None and settings.open_to_all and not running.open_to_all:
        wrong.append("there are no routes any more: every name would be served")  # a file that is being written
    if wrong:
        raise SettingsError(*wrong)
    derive_settings(settings, environ)
    if running is not None:
        settings.launchers = running.launchers
    settings.again = functools.partial(load_settings, argv, environ)  # for a reload
    return settings


def tunnel_launchers(program: str | None, environ: dict[str, str]) -> dict[str, Launcher]:
    """The tunnel programs, by scheme, and those that do not get our Access token.

    Where there is no cloudflared, the carrier stands in for it.
    """
    rows = {}
    strangers = {key: value for key, value in environ.items() if key not in TUNNEL_IDENTITY}
    for prefix, shown in (("", environ), (ANONYMOUS, strangers)):
        carrier = carrier_launcher(shown)
        cloudflared = cloudflared_launcher(program or "cloudflared", shown)
        if program is None and not cloudflared.is_there() and carrier.is_there():
            cloudflared = carrier
        rows |= {f"{prefix}cloudflared": cloudflared, f"{prefix}carrier": carrier}
    return rows


def derive_settings(settings: types.SimpleNamespace, environ: dict[str, str]) -> None:
    """Fill in what depends on the host."""
    first, last = settings.ports
    settings.launchers = tunnel_launchers(settings.cloudflared, environ)
    if settings.max_tunnels is None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        used = {route.target.partition(":")[0] for route in settings.route}
        share = min((row.carries for scheme, row in settings.launchers.items() if scheme in used), default=1)
        settings.max_tunnels = max(1, min(last - first + 1, memory * share // TUNNEL_MEMORY))
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if descriptors == resource.RLIM_INFINITY:
        descriptors = 1 << 20
    fit = max(1, (descriptors - min(SPARE_FDS, descriptors // 2)) // 2)
    if settings.max_connections is None:
        settings.max_connections = fit
    settings.fit = fit


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one: each connection takes two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass  # macOS has a lower limit of its own; a sandbox may forbid it


def warn(settings: types.SimpleNamespace) -> None:
    """Say what is likely not meant, at the start, after a reload, and in `check`."""
    for line in settings.covered:
        log.warning("%s", line)
    if settings.open_to_all:
        log.warning("no --route: every name is served, each by a tunnel of its own (%s)", settings.routes.routes[0])
    for scheme, launcher in settings.launchers.items():
        if any(route.target.startswith(f"{scheme}:") for route in settings.routes.routes):
            if scheme == "cloudflared" and launcher is settings.launchers["carrier"]:
                log.info("cloudflared is not on PATH: the carrier beside sniroute.py does its work")
            elif not launcher.is_there():
                log.warning("%s; names that need it are refused until then", launcher.missing)
    for route in settings.routes.routes:
        tunnels = route.target.partition(":")[0] in settings.launchers
        if tunnels and settings.routes.identified and not route.is_of_one_domain():
            log.warning("%s: a client may own the domain this leads to, so the Access token is not shown there: "
                        "route your own domain, as **.example.com", route)
    if settings.proxy_protocol != "off" and settings.proxy_from == parse_networks(LOCAL_NETWORKS) \
            and any(route.allow is not None for route in settings.routes.routes):
        log.warning("routes with `allow`: whoever is in --proxy-from, by default loopback and the private networks, "
                    "can claim any address in a PROXY header: name your balancers there, or none")
    if settings.max_connections > settings.fit:
        log.warning("--max-connections %d is more than the limit of open files allows (%d): raise LimitNOFILE",
                    settings.max_connections, settings.fit)
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            low, high = map(int, file.read().split())
    except (OSError, ValueError):
        return
    if settings.ports[0] <= high and settings.ports[1] >= low:
        log.warning("--ports %d-%d overlap the kernel's own (%d-%d): a tunnel's port may be taken at any time",
                    *settings.ports, low, high)
