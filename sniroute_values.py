"""sniroute_values: what people write as a value, and what it means: durations, counts, addresses, networks, programs.

    text  --- parse_duration, parse_count, parse_networks, ... ---> a value; ValueError with a sentence for people

A parser looks at its text only; parse_program and absolute ask the host about a path.

Threads: any; nothing is kept.

Seams: I want to ...
    read another kind of value    a parser here; then its name in a row of SETTINGS (sniroute_settings), or of
                                  ROUTE_OPTIONS (sniroute_options)

It imports host, launchers, names and refusals.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Any, Callable, Iterable, Mapping, NamedTuple

from sniroute_host import PATHS_MAX, changed_by_others
from sniroute_launchers import Variable
from sniroute_names import Network, ascii_advice, normalise, parse_host_port, parse_ip, parse_network, printable
from sniroute_refusals import Refused

__version__ = "0.1.0"

UNIX_PATH_MAX = 90  # sun_path of unix(7) has 108 bytes, or 104; some are for the name it has before it is ready
PROTOCOL = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+(?:/[a-z0-9!#$%&'*+.^_`|~-]+)?")  # RFC 9110 section 7.8
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)  # the name of one, POSIX 8.1
DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?", re.ASCII)


def as_text(value: Any) -> str:
    """A TOML value as the command line would have it, so that one parser does for both.

    A table is `key=value,...`, with a pair for each value of a list.
    """
    if isinstance(value, list):
        return ",".join(map(as_text, value))
    if isinstance(value, dict):
        return ",".join(f"{key}={as_text(each)}" for key, values in value.items()
                        for each in (values if isinstance(values, list) else [values]))
    return str(value).lower() if isinstance(value, bool) else str(value)


def meant(word: str, words: Iterable[str]) -> str:
    """What somebody may have meant, as the end of a sentence about an unknown word."""
    import difflib  # imported late: only a mistyped word needs it
    close = difflib.get_close_matches(word.replace("-", "_"), words, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(words)}"


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


def parse_size(text: str) -> int:
    """A whole number from 0 to 1000.  Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,4}", text, re.ASCII) or int(text) > 1000:
        raise ValueError(f"{text!r} is not a whole number from 0 to 1000")
    return int(text)


def parse_share(text: str) -> float:
    """A share, from 0 to 0.5.  Raises ValueError."""
    if not re.fullmatch(r"0?\.[0-9]{1,6}|0", text, re.ASCII) or float(text) > 0.5:
        raise ValueError(f"{text!r} is not a share from 0 to 0.5, as 0.1")
    return float(text)


def parse_registry(text: str) -> str | tuple[str, int]:
    """`unix:PATH`, which gives the path, or an address to listen on.  Raises ValueError."""
    return parse_admin(text) if text.startswith("unix:") else parse_listen(text)


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


def parse_zones(text: str) -> dict[str, tuple[Network, ...]]:
    """`NAME=CIDR,...`, a pair for each network.  Raises ValueError."""
    zones: dict[str, tuple[Network, ...]] = {}
    for pair in text.split(","):
        name, equals, network = (part.strip() for part in pair.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z0-9._-]{1,63}", name):
            raise ValueError(f"{pair.strip()!r} is not NAME=CIDR, as a=10.1.0.0/16")
        zones[name] = (*zones.get(name, ()), *parse_networks(network))
    return zones


class Zones(NamedTuple):
    """Networks by the name of their zone, and which zone is this router's own."""

    networks: tuple[tuple[Network, str], ...]  # the longest prefix first
    own: str

    def find(self, address: str) -> str | None:
        """The zone of an address: that of the longest network that it is in; None where it is in none."""
        ip = parse_ip(address)
        return next((name for network, name in self.networks if ip in network), None)

    def has(self, row: tuple[int, Any]) -> bool:
        """Whether an address, as `socket` takes it, is in the own zone; a unix socket is."""
        return isinstance(row[1], str) or self.find(row[1][0]) == self.own


def own_zones(zones: Mapping[str, Iterable[Network]] | None, zone: str | None, address: str | None) -> Zones | None:
    """What the settings `zones`, `zone` and `own_address` mean; None where none is the own one.  Raises ValueError."""
    if zone and address:
        raise ValueError("zone, own_address: one of them is enough: leave the other out")
    if zone and zones and zone not in zones:
        raise ValueError(f"zone: {printable(zone)!r} is none of the zones {', '.join(zones)}")
    pairs = [(network, name) for name, networks in (zones or {}).items() for network in networks]
    found = Zones(tuple(sorted(pairs, key=lambda pair: -pair[0].prefixlen)), zone or "")
    if address:
        found = found._replace(own=found.find(address) or "")
    return found if found.own and zones else None


def parse_address(text: str) -> str:
    """An IP address.  Raises ValueError."""
    return str(parse_ip(text))


def absolute(text: str) -> str:
    """A path as it is from `/`: the folder that a program was started in may go.  Raises ValueError."""
    try:
        return os.path.abspath(text)
    except OSError as error:
        raise ValueError(f"{text!r} is relative to a folder that cannot be used ({error.strerror}): "
                         "give the whole path, from /") from None


def parse_paths(text: str) -> str:
    """`PATH[:PATH ...]`, each as it is from `/`; `~` is the user's home.  Raises ValueError."""
    paths = [absolute(os.path.expanduser(part)) for part in text.split(":") if part]
    if not paths:
        raise ValueError(f"{text!r} names no path")
    return ":".join(paths)


def parse_kubeconfig(text: str) -> str:
    """As `parse_paths`, for files that nobody else may change: they name programs that are run.  Raises ValueError."""
    paths = parse_paths(text)
    for path in paths.split(":"):
        if os.path.isfile(path) and (fault := changed_by_others(path)):
            raise ValueError(f"{path!r} is not read, since {printable(fault, PATHS_MAX)}")
    return paths


def parse_aliases(text: str) -> dict[str, str]:
    """`NAME=CONTEXT,...`: short names of contexts of a kubeconfig.  Raises ValueError."""
    aliases = {}
    for pair in text.split(","):
        name, equals, context = (part.strip() for part in pair.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z0-9._-]{1,63}", name) or not re.fullmatch(r"[!-~]{1,253}", context):
            raise ValueError(f"{printable(pair.strip())!r} is not NAME=CONTEXT, as "
                             "prod=arn:aws:eks:eu-west-1:1:cluster/prod")
        aliases[name] = context
    return aliases


def parse_globs(text: str) -> tuple[str, ...]:
    """`GLOB,...`: names in which `*` stands for any characters, and `?` for one.  Raises ValueError."""
    globs = tuple(part.strip() for part in text.split(","))
    for glob in globs:
        if not re.fullmatch(r"[!-~]{1,253}", glob):
            raise ValueError(f"{printable(glob)!r} is not a name, or a glob as team-*")
    return globs


def parse_label(text: str) -> str:
    """The name of a container.  Raises ValueError.  Source: RFC 1123 section 2.1."""
    if not re.fullmatch(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", text):
        raise ValueError(f"{printable(text)!r} is not a name of letters a-z, digits and -")
    return text


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


def parse_switch(text: str) -> bool:
    """`on` or `off`, or as a file has it `true` or `false`.  Raises ValueError."""
    return one_of("on", "off", "true", "false")(text) in ("on", "true")


def parse_port(text: str) -> int:
    """A port, from 1 to 65535.  Raises ValueError."""
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text, re.ASCII) or int(text) > 65535:
        raise ValueError(f"{text!r} is not a port, from 1 to 65535")
    return int(text)


def parse_verify(text: str) -> bool | str:
    """`true`, `false`, or a file of certificates in PEM, which nobody else may change: its path.  Raises ValueError."""
    if text in ("true", "false"):
        return text == "true"
    path = absolute(text)
    fault = changed_by_others(path) if os.path.isfile(path) else f"{path} is no file"
    if fault:
        raise ValueError(f"{text!r} is not read, since {printable(fault, PATHS_MAX)}")
    import ssl  # imported late: three megabytes, and only such a file needs it here
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        pass  # it has none: below
    except OSError as error:
        raise ValueError(f"{text!r} cannot be read: {error.strerror}") from None
    if not context.cert_store_stats()["x509"]:
        raise ValueError(f"{text!r} has no certificate in PEM, as -----BEGIN CERTIFICATE-----")
    return path


def parse_host(text: str) -> str:
    """`backend`, or a host name, in lower case, which may have fields.  Raises ValueError."""
    try:
        normalise(re.sub(r"\{[^{}]*\}", "a", text).encode())
    except Refused as error:
        raise ValueError(f"{error}{ascii_advice(text)}") from None
    return text.lower().removesuffix(".")


def parse_upgrades(text: str) -> tuple[str, ...]:
    """`PROTOCOL,...`: protocols beside WebSocket, in lower case; `none`: not even that.  Raises ValueError.

    Source: RFC 9110 section 7.8.
    """
    names = [name.strip().lower() for name in text.split(",")]
    if names in (["none"], [""]):
        return ()
    for name in names:
        if not PROTOCOL.fullmatch(name) or name == "none":
            raise ValueError(f"{name!r} is not the name of a protocol, as websocket")
        if name in ("h2c", "h2"):
            raise ValueError(f"{name} is refused: HTTP/2 in plain text goes through http = pass only, and from its "
                             "first byte")
    return tuple(dict.fromkeys(("websocket", *names)))


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
