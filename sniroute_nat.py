"""sniroute_nat: targets that dial in, by NodePass, as the router sees them: the kind of target, and its program.

    nodepass:[KEY@]HOST:PORT[?QUERY]        the NodePass client that has dialled in to the server on HOST:PORT

        loop                              reaper                          sniroute_nodepass.py, one process
        tunnel_ready                      TunnelTable
          Decision.tunnel: a TunnelKey ---->  Launcher.told ------------>  listen 127.0.0.1:20000 $KEY@HOST:PORT?QUERY
          a TunnelBackend, to that port       Child.link  <-------------  linked, state, unlinked: the client is there
                                              reason      <-------------  failed: `away`, where it is not

Such a tunnel *stands* (sniroute_tunnels): a client can dial in only where the server is up already.

Keys.  KEY is the secret of both ends, so it is taken out of a target before anything else looks at that (`put_aside`):
what is left has HIDDEN in its place, and the Route has the key as a Secret.  `$NAME` is shown as it is, and stands for
a variable of the router's environment.  The program gets keys by its environment, and is told the names of the
variables.  A process cannot be given another variable later, so a key that is new, as those of claims are, begins
another process (Programs).

Threads: any.  The reaper asks Programs; a thread that reads settings tells it what comes.  Each replaces its one
attribute; where both do so at once a key may be lost from it, and begins a process of its own.

Seams: I want to ...
    take another parameter of a URL     PARAMETERS; for owners of names OWNERS_PARAMETERS
    refuse one in other words           ELSEWHERE
    understand another reason           a row in REASONS; for another kind of refusal one in sniroute_refusals, too

This room imports sniroute_targets, sniroute_launchers, sniroute_nodeurl (`parse_url`, `is_address`), sniroute_names and
sniroute_refusals.

Source: NodePass, version 2, "Usage" (the URL of a server), and "Connection Pool" for what a key is for.
"""

from __future__ import annotations

import re
import sys
import urllib.parse
from typing import TYPE_CHECKING, Iterable, Iterator, Mapping, NamedTuple, NoReturn, Sequence

from sniroute_launchers import (TUNNEL_ENVIRONMENT, TUNNEL_IDENTITY, Launcher, Reason, TunnelKey, last_line, last_words,
                                our_words, words_by_hand)
from sniroute_names import HIDDEN, HOST, OPTIONS, overlap, parse_host_port, printable, show_address
from sniroute_nodeurl import is_address, parse_url
from sniroute_refusals import Malformed, SettingsError
from sniroute_targets import Scheme, tunnel_prepare, tunnel_ready

if TYPE_CHECKING:
    from sniroute_routes import Route

__version__ = "0.1.0"

# Limits, each with its reason.
CARRIES = 500  # servers in one process: more than there are ports for by default
TARGET_MAX = 800  # characters: a line of the program's stdin takes 1,024, with an address and a variable
KEY_MAX = 256  # characters of a key: 1,500 random bits
KEYS_KEPT = CARRIES  # keys in the environment of one process, the oldest out: owners of names bring some of them

VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]{0,99})", re.ASCII)
KEY = re.compile(r"(?:[A-Za-z0-9._~!&'()*+,;=-]|%[0-9A-Fa-f]{2})+")  # userinfo of RFC 3986 section 3.2.1, without `:`

# -- targets -----------------------------------------------------------------------------------

# What QUERY may have, of the parameters of a server's URL.
PARAMETERS = ("max", "type", "tls", "crt", "key", "slot", "rate", "read", "block")
# The same for owners of names, who name no file of this host.
OWNERS_PARAMETERS = ("max", "type", "tls", "slot", "rate", "read", "block")
# What else a URL may have, and why it has no place here.
_CLIENT = "is for the client, which dials the service: write it into the client's URL"
ELSEWHERE = {
    "mode": "is always 1 here: the server takes callers, and the client dials the service",
    "notcp": "would refuse all clients: they come by TCP",
    "noudp": "goes without saying: only TCP is led here",
    "log": "is said for all with --log-level",
    **dict.fromkeys(("min", "lbs", "dns", "dial", "proxy", "sni", "pin"), _CLIENT),
}


class Server(NamedTuple):
    """The parts of a target."""

    key: str  # as it was written: "" for none, HIDDEN, `$NAME`, or the key itself, escaped as in a URL
    host: str  # "*": every address
    port: int
    query: str

    @property
    def place(self) -> str:
        """HOST:PORT, as it is used and shown."""
        return f":{self.port}" if self.host == "*" else show_address((self.host, self.port))

    def __str__(self) -> str:
        return f"{self.key}@" * bool(self.key) + self.place + f"?{self.query}" * bool(self.query)


def bad(sentence: str) -> NoReturn:
    """Raise Malformed, `bad_name`.  No sentence repeats what may be a key."""
    raise Malformed(sentence, kind="bad_name")


def parse_server(rest: str) -> Server:
    """The parts of a target.  Raises Malformed, `bad_name`."""
    if not re.fullmatch(rf"[!-~]{{1,{TARGET_MAX}}}", rest):
        bad(f"a target has 1 to {TARGET_MAX} characters of printable ASCII, without blanks")
    front, _, query = rest.partition("?")
    key, at, place = front.rpartition("@")
    if key.startswith("$") and not VARIABLE.fullmatch(key):
        bad("a key that begins with $ is the name of a variable, letters, digits and _; write %24 for a $ that is none")
    if at and not (key == HIDDEN or VARIABLE.fullmatch(key) or KEY.fullmatch(key) and len(key) <= KEY_MAX):
        bad(f"the key has 1 to {KEY_MAX} letters, digits, and - . _ ~; anything else is escaped as in a URL, as %40 "
            "for @")
    try:
        urllib.parse.unquote(key, errors="strict")
    except UnicodeDecodeError:
        bad("the key is no UTF-8")
    if re.search("%[01]|%7F", key, re.IGNORECASE):
        bad("the key has control characters")
    if "{" in place + query:
        bad("nothing is filled in for { }: a client would choose among the ports of this host")
    try:
        host, port = parse_host_port(place, default_host="*")
    except ValueError:
        host, port = "", 0
    if not port or host != "*" and not HOST.fullmatch(host):
        bad("it is not [KEY@]HOST:PORT[?QUERY], with a name or an address of this host as HOST, or :PORT for all")
    return Server(key, host, port, query)


def read_query(query: str) -> list[tuple[str, str]]:
    """The parameters of a query: their names and values."""
    return urllib.parse.parse_qsl(query, keep_blank_values=True)


def check(rest: str) -> str:
    """A target in the form that is used, with its key, if it has one.  Raises Malformed, `bad_name`."""
    server = parse_server(rest)
    for name, value in read_query(server.query):
        if name in ELSEWHERE:
            bad(f"{name}: {ELSEWHERE[name]}")
        if name in ("crt", "key") and not value.startswith("/"):
            bad(f"{name}: write its whole path: the program runs in another folder")
    try:  # any target will do that has another port
        parse_url(f"server://{server.place}/127.0.0.1:{1 if server.port > 1 else 2}?{server.query}")
    except SettingsError as error:
        bad("; ".join(error.lines))
    return str(server)


def secret_of(server: Server) -> str:
    """The key that stands in a target, unescaped."""
    return urllib.parse.unquote(server.key)


def put_aside(rest: str) -> tuple[str, str]:
    """A target without its key, and the key; "" where that is a variable, or not there.  Raises ValueError."""
    try:
        server = parse_server(rest)
    except Malformed as error:
        raise ValueError(f"nodepass: {error}") from None
    if server.key == HIDDEN:
        raise ValueError(f"nodepass: {HIDDEN} is how a key is shown, and no key: write the key itself, or $NAME")
    if not server.key or server.key.startswith("$"):
        return str(server), ""
    return str(server._replace(key=HIDDEN)), secret_of(server)


def servers_of(routes: Iterable[Route]) -> Iterator[tuple[Route, str, Server]]:
    """The servers that routes of the settings lead to: the route, the target, its parts."""
    for route in routes:
        for target in route.targets:
            if target.startswith("nodepass:"):
                yield route, target, parse_server(target.removeprefix("nodepass:"))


def addresses_of(routes: Iterable[Route]) -> tuple[tuple[str, int], ...]:
    """Where these servers listen, each (IP address, port); names of hosts are left out."""
    names = {"*": "::", "localhost": "127.0.0.1"}
    found = {(names.get(server.host, server.host), server.port): None for _, _, server in servers_of(routes)}
    return tuple(address for address in found if is_address(address[0]))


Taken = Sequence[tuple[str, tuple[str, int]]]  # what has an address, and the address


def misfits(routes: Iterable[Route], environ: Mapping[str, str], taken: Taken, ports: range) -> Iterator[str]:
    """What stops the start, a sentence each.

    Args:
        taken: where the router itself listens.
        ports: of this host that its tunnels have.
    """
    known: dict[tuple[str, int], tuple[str, str]] = {}  # by address: the target, and the key
    for route, target, (key, host, port, _) in servers_of(routes):
        variable = VARIABLE.fullmatch(key)
        if variable and not environ.get(variable[1], "").strip():
            yield f"{route}: {key} is not in the environment: set it to the key of this server"
        address, secret = (host, port), next((each.value for each in route.secrets if each.name == target), "")
        for what, other in taken:
            if overlap(address, other):
                yield f"{route}: {what} {show_address(other)} has that address, or a part of it: take another port"
        if port in ports and any(overlap(address, (each, port)) for each in ("127.0.0.1", "::1")):
            yield f"{route}: port {port} is one of --ports {ports[0]}-{ports[-1]}, which tunnels have: take another one"
        for other, (its_target, its_secret) in known.items():
            if overlap(address, other) and (target, secret) != (its_target, its_secret):
                yield (f"{route}: {its_target} has that address, or a part of it, with another key or other "
                       "parameters: one server has one key; give the other one a port of its own")
        known[address] = target, secret


def cautions(routes: Sequence[Route], most: int) -> Iterator[str]:
    """What is likely not meant, a sentence each; `most`: so many tunnels may there be."""
    targets = set()
    for route, target, server in servers_of(routes):
        if target not in targets and not server.key:
            yield (f"{route}: without a key anybody who knows the port can dial in, and gets what its clients send: "
                   "write nodepass:$NAME@HOST:PORT, and set the variable")
        if any(target == each.name and each.value in word for each in route.secrets for word in sys.argv):
            yield (f"{route}: its key is on the command line, which every user of this host can read: write $NAME, and "
                   "set the variable")
        targets.add(target)
    if len(targets) > most:
        yield (f"{len(targets)} nodepass targets, and only {most} tunnels: the last of them are not up: "
               "raise --max-tunnels")


# -- the program -------------------------------------------------------------------------------

ROOM = "sniroute_nodepass"
VARIABLES = TUNNEL_ENVIRONMENT - TUNNEL_IDENTITY
PREFIX = "NP_"  # of the variables that NodePass itself knows
OUR_VARIABLE = "NODEPASS_KEY_"  # begins the names of those that have a key

# Its reasons: (kind, final).  Any other is ("failed", False): a connection to the client that was lost.
AWAY = "no NodePass client has dialled in"  # in the program's own words it is "no client"
REASONS = {"away": ("away", True), "refused": ("failed", True)}


def reason(tail: bytes) -> Reason:
    """The reason in the program's last line; what its `error` says, without the server before it."""
    fields = last_line(tail)[1]
    kind, final = REASONS.get(str(fields.get("reason")), ("failed", False))
    words = printable(str(fields["error"]), 200) if fields.get("error") else last_words(tail)
    if kind == "away":
        words = words.replace("no client has", "no NodePass client has") if "has dialled in" in words else AWAY
    return Reason(kind, words, final)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the program, without keys."""
    found = {name: value for name, value in environ.items() if name in VARIABLES or name.startswith(PREFIX)}
    return {**found, "TUNNEL_LOG_OUTPUT": "json"}


def variable_of(key: TunnelKey) -> str:
    """The name of the variable that has the key of a server; "" where that has none."""
    server = parse_server(key.hostname)
    variable = VARIABLE.fullmatch(server.key)
    return variable[1] if variable else OUR_VARIABLE + re.sub(r"\W", "_", server.place) if server.key else ""


def argument_of(key: TunnelKey) -> str:
    """What the program is told to listen for: the target, with the name of a variable for its key."""
    server, name = parse_server(key.hostname), variable_of(key)
    return str(server._replace(key=f"${name}" if name else "", query=server.query.replace("@", "%40")))


class Programs:
    """Rows of the program, the newest of which has all the keys that are known: `Launcher.made`."""

    def __init__(self, environ: Mapping[str, str], row: Launcher):
        self.environ = environ
        self.row = row  # without a key; so is the environment that all have
        self.newest = row

    def __call__(self, key: TunnelKey) -> Launcher:
        """The row for one server."""
        self.learn([key])
        return self.newest

    def learn(self, keys: Iterable[TunnelKey]) -> None:
        """Have the next process know the keys of these servers, if the last one does not."""
        newest = self.newest
        known = {name: value for name, value in newest.environment.items() if name not in self.row.environment}
        wanted = {name: self.value_of(key) for key in keys
                  if (name := variable_of(key)) and name not in self.row.environment}
        if any(known.get(name) != value for name, value in wanted.items()):
            kept = [(name, value) for name, value in known.items() if name not in wanted]
            room = max(KEYS_KEPT - len(wanted), 0)
            known = {**dict(kept[len(kept) - room:] if len(kept) > room else kept), **wanted}
            self.newest = newest._replace(environment={**known, **self.row.environment})

    def value_of(self, key: TunnelKey) -> str:
        """The key of a server."""
        return key.variables[0].value if key.variables else self.environ.get(variable_of(key), "").strip()


def argv(hostname: str, port: int) -> list[str]:
    """The words after Python, for people: the key is not among them."""
    target, _, query = hostname.partition("?")
    return words_by_hand(ROOM, f"server://{target}/127.0.0.1:{port}?mode=1{f'&{query}' if query else ''}")


def nodepass_launcher(environ: Mapping[str, str]) -> Launcher:
    """The row for sniroute_nodepass.py."""
    row = Launcher(sys.executable, argv, environment(environ), reason, f"{sys.executable} is not there",
                   OPTIONS["nodepass"], CARRIES, tuple(our_words(ROOM, "forwarders")), home=False, told=argument_of,
                   stands=True)
    return row._replace(made=Programs(environ, row))


# -- the row -----------------------------------------------------------------------------------

NODEPASS_SCHEMES = {
    "nodepass": Scheme(check, tunnel_ready, tunnel_prepare, "its tunnel", is_tunnel=True, is_program=True,
                       put_aside=put_aside),
}
