"""sniroute_nodeurl: the URLs and flags of NodePass, version 2, and its variables; without I/O.

    SCHEME://[KEY@]HOST:PORT/TARGET[,TARGET...][?NAME=VALUE&...]      server://, client://
    master://HOST:PORT[/PREFIX][?NAME=VALUE&...]

    a URL  --- parse_url ----+
                             +---> Options --- show ---> a URL again, with or without the key
    flags  --- parse_flags --+
    NP_... --- read_times -------> Times, and a line for each value that is none

HOST may be empty: all addresses.  A host that is an IPv6 address stands in brackets.  KEY is percent-encoded UTF-8.
Names, defaults and meanings are the original's.  It takes no notice of a parameter that it does not know, and of a
value that is none; here each is a fault that stops the start, since `rate=1OO` or `blocks=1` would leave a guard away.

A fault never has the key in it, nor anything that may be a piece of it where a URL is cut in the wrong place.

Threads: any; nothing is kept.

Seams: I want to ...
    another parameter      a field of Options, a row in PARAMETERS, and a row in WRITERS if `show` cannot write it
    another variable       a field of Times, a row in VARIABLES

Sources: runs of the original, its docs/usage.md, docs/cli.md and docs/configuration.md at
https://github.com/NodePassProject/nodepass-core, and RFC 3986; for durations the package `time` of Go.

This room imports sniroute_signals (key_of_port), sniroute_names (hosts, addresses) and sniroute_refusals
(SettingsError).
"""

from __future__ import annotations

import re
import urllib.parse
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

from sniroute_names import HOST, ascii_advice, normalise, parse_host_port, parse_ip, printable, show_address
from sniroute_refusals import Refused, SettingsError
from sniroute_signals import key_of_port

__version__ = "0.1.0"

URL_VARIABLE = "SNIROUTE_NODEPASS_URL"  # a URL that is not for everybody's eyes: words of a command line are

# Limits, each with its reason.
URL_MAX = 65536  # characters: TARGETS_MAX targets with the longest names have about as many
TARGETS_MAX = 256  # of one end: with lbs=1 each is dialled at each report interval
DURATION_MAX = 366 * 86400.0  # seconds: a year is as good as for ever
POOL_MAX = 65536  # connections: each takes a port of the client's address
SLOT_MAX = 2**31 - 1  # the original counts in 32 bits
RATE_MAX = 1_000_000  # Mbit/s
SHOWN = 60  # characters of a value that are repeated in a fault

SCHEMES = ("server", "client", "master")
LEVELS = ("none", "debug", "info", "warn", "error", "event")
NO_NAME = "none"  # the server name where a tunnel has none
QUIC = "is QUIC, which Python's standard library cannot speak: use 0 (TCP), 2 (WebSocket) or 3 (HTTP/2)"


class Options(NamedTuple):
    """What a URL says.  Durations are seconds."""

    scheme: str  # one of SCHEMES
    key: str = ""  # as given; see `secret`
    host: str = ""  # of the tunnel, or of the master's API; "": all addresses
    port: int = 0
    prefix: str = ""  # a master's, as /pre; "": its default
    targets: tuple[tuple[str, int], ...] = ()
    log: str = "info"  # one of LEVELS
    dns: float = 300.0  # how long an address is good; 0: it is asked for each time
    sni: str = ""
    lbs: int = 0  # 0 in turn, 1 the fastest, 2 the first that is there
    min: int = 64  # connections in the pool, a client's
    max: int = 1024  # a server's
    mode: int = 0  # 0: found out; a server: 1 takes callers, 2 dials; a client: 1 is alone, 2 has a server
    type: int = 0  # of the pool: 0 TCP, 2 WebSocket, 3 HTTP/2
    tls: int = 0  # 0 none, 1 a certificate made on the spot, 2 files
    crt: str = ""
    key_file: str = ""  # `key=`
    dial: str = ""  # the address from which targets are dialled; "": the system's choice
    read: float = 0.0  # after so much silence a connection closes; 0: never
    rate: int = 0  # Mbit/s each way; 0: no limit
    slot: int = 65536  # connections of callers; 0: no limit
    proxy: int = 0  # the version of the PROXY header; 0: none
    block: frozenset[str] = frozenset()  # of "1" SOCKS, "2" HTTP, "3" TLS
    notcp: bool = False
    noudp: bool = False
    pin: str = ""  # sha256: and 64 hex digits, of the certificate that the server has to have

    def __repr__(self) -> str:
        return f"Options({show(self, full=False, secret=False)!r})"

    @property
    def secret(self) -> str:
        """The key that counts: the one that is given, else one made of the port."""
        return self.key or key_of_port(self.port)

    @property
    def server_name(self) -> str:
        """The name in the handshake, and in TLS."""
        return self.sni or (self.host if self.host and not is_address(self.host) else NO_NAME)

    @property
    def byte_rate(self) -> int:
        """`rate` in bytes a second."""
        return self.rate * 125_000


# -- values ------------------------------------------------------------------------------------

UNITS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
PART = re.compile(r"([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})(ns|us|\u00b5s|\u03bcs|ms|s|m|h)", re.ASCII)


def parse_duration(text: str) -> float:
    """Seconds of `5s`, `1h`, `100ms`, `1m30s`, `1.5h` or `0`, as Go writes them.  Raises ValueError."""
    parts = PART.findall(text)
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    if text not in ("0", "+0") and (not parts or "".join(map("".join, parts)) != text.removeprefix("+")):
        raise ValueError("is not a duration such as 5s, 1h, 100ms or 1m30s")
    if total > DURATION_MAX:
        raise ValueError("is longer than 8784h, which is a year")
    return total


def show_duration(seconds: float) -> str:
    """Seconds as Go writes them: 5m0s, 1h0m0s, 1.5s, 100ms, 0s."""
    nanos = round(seconds * 1e9)
    for unit, size in (("ns", 1), ("\u00b5s", 10**3), ("ms", 10**6)):
        if 0 < nanos < size * 1000:
            return f"{decimal(nanos, size)}{unit}"
    minutes, nanos = divmod(nanos, 60 * 10**9)
    hours, minutes = divmod(minutes, 60)
    shown = f"{decimal(nanos, 10**9)}s"
    if hours or minutes:
        shown = f"{minutes}m{shown}"
    return f"{hours}h{shown}" if hours else shown


def decimal(nanos: int, size: int) -> str:
    """nanos / size, without needless zeros."""
    whole, part = divmod(nanos, size)
    digits = len(str(size)) - 1
    return f"{whole}.{part:0{digits}}".rstrip("0") if part else str(whole)


def whole(least: int, most: int) -> Callable[[str], int]:
    """A parser for a whole number."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"\+?[0-9]{1,18}", text, re.ASCII) or not least <= int(text) <= most:
            raise ValueError(f"is not a whole number from {least} to {most}")
        return int(text)
    return parse


def choice(*words: str) -> Callable[[str], int]:
    """A parser for one of these digits."""
    def parse(text: str) -> int:
        if text not in words:
            raise ValueError(f"is none of {', '.join(words)}")
        return int(text)
    return parse


def parse_level(text: str) -> str:
    """A log level.  Raises ValueError."""
    if text not in LEVELS:
        raise ValueError(f"is none of {', '.join(LEVELS)}")
    return text


# The words of the original's docs/cli.md.  Its program knows digits only, and takes all of these for 0.
BALANCES = {"random": 0, "roundrobin": 0, "leastconn": 0}


def parse_balance(text: str) -> int:
    """How targets are chosen.  Raises ValueError."""
    return BALANCES[text] if text in BALANCES else choice("0", "1", "2")(text)


def parse_type(text: str) -> int:
    """A kind of pool.  Raises ValueError."""
    if text == "1":
        raise ValueError(QUIC)
    return choice("0", "2", "3")(text)


# The words of docs/cli.md, too.  There its program blocks nothing for them, and says nothing.
PROTOCOLS = {"socks": "1", "socks4": "1", "socks5": "1", "http": "2", "https": "3", "tls": "3"}


def parse_block(text: str) -> frozenset[str]:
    """Digits of `1` SOCKS, `2` HTTP and `3` TLS in any order, or words for them with commas; `0`: none."""
    if re.fullmatch("[0-3]+", text):
        return frozenset(text) - {"0"}
    words = [word.strip().lower() for word in text.split(",")]
    if not all(word in PROTOCOLS for word in words):
        raise ValueError("has digits other than 1 (SOCKS), 2 (HTTP) and 3 (TLS), as in block=12; "
                         "for tcp and udp there are notcp=1 and noudp=1")
    return frozenset(PROTOCOLS[word] for word in words)


def parse_dial(text: str) -> str:
    """An IP address; `auto` is "".  Raises ValueError."""
    try:
        return "" if text == "auto" else str(parse_ip(text))
    except ValueError:
        raise ValueError("is not an IP address, and not auto") from None


def parse_name(text: str) -> str:
    """A host name.  Raises ValueError."""
    try:
        return normalise(text.encode("utf-8", "replace"))
    except Refused:
        raise ValueError(f"is not a host name{ascii_advice(text)}") from None


def parse_path(text: str) -> str:
    """A file's path.  Raises ValueError."""
    if "\0" in text:
        raise ValueError("has a NUL, which no path may have")
    return text


def parse_pin(text: str) -> str:
    """The SHA-256 of a certificate in DER, in hex, colons or not; as the ends write it.  Raises ValueError."""
    digits = text.lower().removeprefix("sha256:").replace(":", "")
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise ValueError("is not the SHA-256 of a certificate: 64 hex digits, with or without sha256: and colons")
    return f"sha256:{digits}"


def parse_flag(text: str) -> bool:
    """`0` or `1`.  Raises ValueError."""
    return choice("0", "1")(text) == 1


# A parameter -> its field of Options, and what reads it.
PARAMETERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "log": ("log", parse_level), "dns": ("dns", parse_duration), "sni": ("sni", parse_name),
    "lbs": ("lbs", parse_balance), "min": ("min", whole(1, POOL_MAX)), "max": ("max", whole(1, POOL_MAX)),
    "mode": ("mode", choice("0", "1", "2")), "type": ("type", parse_type), "tls": ("tls", choice("0", "1", "2")),
    "crt": ("crt", parse_path), "key": ("key_file", parse_path), "dial": ("dial", parse_dial),
    "read": ("read", parse_duration), "rate": ("rate", whole(0, RATE_MAX)), "slot": ("slot", whole(0, SLOT_MAX)),
    "proxy": ("proxy", choice("0", "1", "2")), "block": ("block", parse_block),
    "notcp": ("notcp", parse_flag), "noudp": ("noudp", parse_flag), "pin": ("pin", parse_pin),
}
MASTERS = ("log", "tls", "crt", "key")  # what means something to a master; it takes the others, and uses none


# -- addresses ---------------------------------------------------------------------------------


def is_address(host: str) -> bool:
    """Whether a host is an IP address, with a scope or not."""
    try:
        parse_ip(host)
    except ValueError:
        return False
    return True


def parse_place(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[::1]:PORT` or `:PORT`.  Raises ValueError, which does not repeat the text."""
    try:
        host, port = parse_host_port(text, default_host="*")
    except ValueError:
        raise ValueError("is not HOST:PORT, [IPv6]:PORT or :PORT, with a port in digits"
                         f"{ascii_advice(text.rpartition(':')[0])}") from None
    if not port:
        raise ValueError("has port 0: ports are from 1 to 65535")
    if host == "*" and not text.startswith("*"):
        return "", port
    try:
        if not HOST.fullmatch(host.partition("%")[0]):
            raise ValueError
        if not is_address(host):
            normalise(host.encode("ascii"))
    except (Refused, ValueError):
        raise ValueError("has a host that is neither a name nor an IP address") from None
    return host, port


def is_loop(tunnel: tuple[str, int], target: tuple[str, int]) -> bool:
    """Whether a target would be the tunnel itself.

    The original's rule: the same port, and a target on loopback or a tunnel on all addresses; and what is the same
    letter by letter.  Names are not resolved: `localhost` is one of loopback.
    """
    if tunnel[1] != target[1]:
        return False
    here, there = (host.lower().removesuffix(".") for host, _ in (tunnel, target))
    return (not here or here == there or is_address(here) and parse_ip(here).is_unspecified
            or there == "localhost" or is_address(there) and parse_ip(there).is_loopback)


# -- URLs and flags ----------------------------------------------------------------------------

# RFC 3986 appendix B, for what has a scheme and an authority.
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(?:\?([^#]*))?(#.*)?", re.DOTALL)
USER = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=%@-]*")  # RFC 3986 section 3.2.1, and @ as in the original
NOT_UTF8 = "key: it is not UTF-8"


class Parts(NamedTuple):
    """What a URL or flags say, in pieces that mean the same."""

    scheme: str
    key: str
    place: str  # HOST:PORT
    path: str  # the targets, or a master's prefix
    query: Sequence[tuple[str, str]]
    shy: bool = False  # no piece may be repeated in a fault: the key may be in it


class Faults(list[str]):
    """Lines for people, one for each fault."""

    def __init__(self, shy: bool):
        super().__init__()
        self.shy = shy

    def add(self, name: str, text: str, sentence: str) -> None:
        """A parameter whose value `text` is wrong.  With an @ in it, it may be a key that stands in a wrong place."""
        hides = self.shy or "@" in text
        self.append(f"{name}: {'what is given' if hides else repr(printable(text, SHOWN))} {sentence}")


def parse_url(text: str) -> Options:
    """What a URL says.  Raises SettingsError, with a line for each fault."""
    if len(text) > URL_MAX:
        raise SettingsError(f"URL: it has more than {URL_MAX} characters")
    found = URL.fullmatch(text)
    if not found or re.search(r"[\0-\x1f\x7f]", text):
        raise SettingsError("URL: it is not server://, client:// or master:// and HOST:PORT, in printable characters")
    scheme, authority, path, query, fragment = found.groups()
    user, _, place = authority.rpartition("@")
    if fragment is not None:
        raise SettingsError("URL: it has a #, and the original uses nothing behind it: write %23 where that is meant")
    if ":" in user:
        raise SettingsError("key: it has a colon, and the original uses nothing behind it: write %3A")
    if not USER.fullmatch(user):
        raise SettingsError("key: it has a character that a URL has only as %XX, as %20 for a space")
    shy = "@" in text[found.end(2):]  # a key with / or ? in it is cut there
    try:
        key = urllib.parse.unquote(user, errors="strict")
    except ValueError:
        raise SettingsError(NOT_UTF8) from None
    pairs = urllib.parse.parse_qsl(query or "", keep_blank_values=True, errors="surrogateescape")  # a path is bytes
    return build(Parts(scheme.lower(), key, urllib.parse.unquote(place), urllib.parse.unquote(path), pairs, shy))


FLAGS = ("password", "tunnel-addr", "tunnel-port", "target-addr", "target-port", "targets")


def parse_flags(scheme: str, words: Sequence[str]) -> Options:
    """What flags say, `--name VALUE` or `--name=VALUE`; one dash does, too.  Raises SettingsError, as `parse_url`."""
    flags = FLAGS[1:3] if scheme == "master" else FLAGS
    names = (*flags, *(MASTERS if scheme == "master" else PARAMETERS))
    given: dict[str, str] = {}
    faults: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, behind = word.partition("=")
        value: str | None = behind
        name = name.removeprefix("-").removeprefix("-")
        if not word.startswith("-") or name not in names:  # a word without dashes may be a key
            shown = repr(printable(word.partition("=")[0], SHOWN)) if word.startswith("-") else "a word without --"
            faults.append(f"{scheme}: {shown} is no flag of it; there are {', '.join(f'--{name}' for name in names)}")
            break
        if not equals:
            value = next(rest, None)
        if value is None:
            faults.append(f"{name}: it has no value")
        elif name in given:
            faults.append(f"{name}: it is there twice")
        else:
            given[name] = value
    if faults:
        raise SettingsError(*faults)
    taken = [given.pop(name, "") for name in FLAGS]
    key, host, port, target, target_port, targets = taken
    path = f"/{targets or join_place(target, target_port)}"
    return build(Parts(scheme, key, join_place(host, port), "" if scheme == "master" else path, list(given.items())))


def join_place(host: str, port: str) -> str:
    """HOST:PORT of two flags, an IPv6 host in brackets; without a port the host alone, which is a fault later."""
    host = f"[{host}]" if is_address(host) and ":" in host else host
    return f"{host}:{port}" if port else host


def build(parts: Parts) -> Options:
    """The options of a URL's parts.  Raises SettingsError."""
    faults = Faults(parts.shy)
    if re.search("[\ud800-\udfff]", parts.key):  # what argv has instead of bytes that are none
        raise SettingsError(NOT_UTF8)
    if parts.scheme not in SCHEMES:
        raise SettingsError(f"URL: its scheme is none of {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    values = read_query(parts.query, faults)
    if values.get("pin") and parts.scheme != "client":
        faults.append("pin: it is for a client:// only: a server has no certificate to expect")
    host, port = read_tunnel(parts.place, faults)
    options = Options(parts.scheme, parts.key, host, port, **values)
    if parts.scheme == "master":
        options = options._replace(prefix=read_prefix(parts.path, faults))
    else:
        options = options._replace(targets=read_targets(parts.path, (host, port), faults))
    faults.extend(misfits(options))
    if faults:
        raise SettingsError(*faults)
    if options.type == 3 and not options.tls:
        return options._replace(tls=1)  # HTTP/2 is spoken over TLS only; the original does so, too
    return options


def read_query(pairs: Iterable[tuple[str, str]], faults: Faults) -> dict[str, Any]:
    """The fields of Options that a query names.  An empty value is as none."""
    values: dict[str, Any] = {}
    seen = set()
    for name, text in pairs:
        if name not in PARAMETERS:
            shown = "one of those given" if faults.shy else repr(printable(name, SHOWN))
            faults.append(f"query: {shown} is no parameter; there are {', '.join(PARAMETERS)}")
            continue
        if name in seen:
            faults.append(f"{name}: it is there twice")
            continue
        seen.add(name)
        field, parse = PARAMETERS[name]
        try:
            if text:
                values[field] = parse(text)
        except ValueError as error:
            faults.add(name, text, str(error))
    return values


def read_tunnel(text: str, faults: Faults) -> tuple[str, int]:
    """The tunnel's address, or that of a master's API."""
    try:
        return parse_place(text)
    except ValueError as error:
        faults.add("tunnel address", text, str(error))
        return "", 0


def read_prefix(path: str, faults: Faults) -> str:
    """A master's prefix, without the slash at its end; "" for the default."""
    if not re.fullmatch("[!-~]*", path) or len(path) > 256:
        faults.add("prefix", path, "is not a path of printable characters, 256 at most")
    return path.rstrip("/")


def read_targets(path: str, tunnel: tuple[str, int], faults: Faults) -> tuple[tuple[str, int], ...]:
    """The targets of a path.  Blanks around them, and empty ones between commas, are as none."""
    texts = [text for part in path.removeprefix("/").split(",") if (text := part.strip())]
    if not texts:
        faults.append("target: there is none: write it behind the tunnel's address, as /127.0.0.1:8080")
    if len(texts) > TARGETS_MAX:
        faults.append(f"target: there are more than {TARGETS_MAX}")
        return ()
    targets = []
    for text in texts:
        try:
            target = parse_place(text)
        except ValueError as error:
            faults.add("target", text, str(error))
            continue
        if tunnel[1] and is_loop(tunnel, target):
            faults.add("target", text, "has the tunnel's port: it would lead to itself")
        targets.append(target)
    return tuple(targets)


def misfits(options: Options) -> Iterable[str]:
    """What does not go together."""
    if options.tls == 2 and not (options.scheme == "client" and options.mode == 2):  # that end shows no certificate
        for name, value in (("crt", options.crt), ("key", options.key_file)):
            if not value:
                yield f"{name}: tls=2 needs it, as {name}=/etc/ssl/{'cert' if name == 'crt' else 'key'}.pem"
    if options.notcp and options.noudp:
        yield "noudp: with notcp=1 nothing is left: leave one of them out"


# -- a URL again -------------------------------------------------------------------------------

ALL = ("dns", "lbs", "mode", "dial", "read", "rate", "slot", "proxy", "block", "notcp", "noudp", "log")
FILLED = {"server": (*ALL, "max", "type"), "client": (*ALL, "sni", "min"), "master": ("log", "tls")}
HIDDEN = "********"

# How a parameter is written where `str` is not enough.
WRITERS: dict[str, Callable[[Options], str]] = {
    "dns": lambda options: show_duration(options.dns),
    "read": lambda options: show_duration(options.read),
    "sni": lambda options: options.server_name,
    "dial": lambda options: options.dial or "auto",
    "block": lambda options: "".join(sorted(options.block)) or "0",
    "notcp": lambda options: str(int(options.notcp)),
    "noudp": lambda options: str(int(options.noudp)),
}


def show(options: Options, full: bool, secret: bool) -> str:
    """A URL that says the same, its parameters in order.

    `full`: with every default filled in, as a master shows it.  `secret`: whether the key is in it; without, its place
    is, and nothing else is hidden.
    """
    query = []
    for name, (field, _) in sorted(PARAMETERS.items()):
        value = getattr(options, field)
        if value != Options._field_defaults[field] or full and name in FILLED[options.scheme]:
            query.append((name, WRITERS[name](options) if name in WRITERS else str(value)))
    user = ""
    if options.key:
        # What Go leaves as it is in a user.
        user = (urllib.parse.quote(options.key, safe="$&+,;=") if secret else HIDDEN) + "@"
    path = options.prefix if options.scheme == "master" else "/" + ",".join(map(show_address, options.targets))
    behind = f"?{urllib.parse.urlencode(query, errors='surrogateescape')}" if query else ""
    place = show_address((options.host, options.port)) + path
    return f"{options.scheme}://{user}{place.replace('%', '%25')}{behind}"  # % begins the scope of an IPv6 address


# -- variables ---------------------------------------------------------------------------------


class Times(NamedTuple):
    """What variables of the environment set: sizes in bytes, counts, and seconds."""

    tcp_buffer: int = 16384  # as `semaphore` and `min_interval`: checked, and there is nothing that it could set
    udp_buffer: int = 16384
    semaphore: int = 65536  # signals that wait
    handshake: float = 5.0
    tcp_dial: float = 5.0
    udp_dial: float = 5.0
    udp_read: float = 30.0  # a flow without datagrams ends then; 0: never
    pool_get: float = 5.0
    min_interval: float = 0.1
    max_interval: float = 1.0
    report: float = 5.0
    fallback: float = 300.0
    cooldown: float = 3.0
    shutdown: float = 5.0
    reload: float = 3600.0


def parse_time(text: str) -> float:
    """A duration above zero, from a millisecond on.  Raises ValueError."""
    seconds = parse_duration(text)
    if seconds < 0.001:
        raise ValueError("is shorter than 1ms")
    return seconds


BUFFER = whole(512, 1 << 24)
VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "NP_TCP_DATA_BUF_SIZE": ("tcp_buffer", BUFFER), "NP_UDP_DATA_BUF_SIZE": ("udp_buffer", BUFFER),
    "NP_SEMAPHORE_LIMIT": ("semaphore", whole(1, 1 << 24)), "NP_HANDSHAKE_TIMEOUT": ("handshake", parse_time),
    "NP_TCP_DIAL_TIMEOUT": ("tcp_dial", parse_time), "NP_UDP_DIAL_TIMEOUT": ("udp_dial", parse_time),
    "NP_UDP_READ_TIMEOUT": ("udp_read", parse_duration), "NP_POOL_GET_TIMEOUT": ("pool_get", parse_time),
    "NP_MIN_POOL_INTERVAL": ("min_interval", parse_time), "NP_MAX_POOL_INTERVAL": ("max_interval", parse_time),
    "NP_REPORT_INTERVAL": ("report", parse_time), "NP_FALLBACK_INTERVAL": ("fallback", parse_duration),
    "NP_SERVICE_COOLDOWN": ("cooldown", parse_time), "NP_SHUTDOWN_TIMEOUT": ("shutdown", parse_duration),
    "NP_RELOAD_INTERVAL": ("reload", parse_duration),
}


def read_times(environ: Mapping[str, str]) -> tuple[Times, list[str]]:
    """What NP_... variables set, and a line for each value that is none: the default stays, as in the original."""
    values: dict[str, Any] = {}
    faults = Faults(shy=False)
    for name, (field, parse) in VARIABLES.items():
        try:
            if text := environ.get(name, ""):
                values[field] = parse(text)
        except ValueError as error:
            faults.add(name, text, f"{error}: the default is used")
    times = Times(**values)
    if times.min_interval > times.max_interval:
        faults.append("NP_MIN_POOL_INTERVAL: it is above NP_MAX_POOL_INTERVAL: the defaults of both are used")
        default = Times()
        times = times._replace(min_interval=default.min_interval, max_interval=default.max_interval)
    return times, list(faults)
