"""sniroute_names: names and addresses, as they are read, checked and shown; and the version.

    what a client says, a setting, a target  --- normalise ---> a host name that may reach argv, a log, a lookup
    "192.0.2.1:443", "[::1]:443", ":443"     --- parse_host_port ---> (host, port) --- show_address ---> text
    anything that others said                --- printable ---> one line of printable ASCII

Every name that is routed passes `normalise`, and every tunnel's: it is the only thing that stands between
a stranger's bytes and a program's command line.  All functions are pure but three: `is_local` binds a socket;
`is_here` and `describe_version` ask the import system which files are there.

Threads: none.

Seams: I want to ...
    allow another character in names   NAME, and the docstring of `normalise`
    add a file                         CORE, or OPTIONS if it may be missing; and py-modules in pyproject.toml

It imports refusals (Malformed).
"""

from __future__ import annotations

import ipaddress
import re
import socket
import sys

from sniroute_refusals import Malformed

__version__ = "0.1.0"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NAME_MAX = 253  # characters of a host name, RFC 1035 section 2.3.4

_LABEL = rb"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
NAME = re.compile(rb"(?:%b\.)+(?![0-9]+\Z|0x[0-9a-f]*\Z)%b" % (_LABEL, _LABEL))
HOST = re.compile(r"[A-Za-z0-9_.:-]{1,253}")  # a configured host may be an address or one label
PORT = re.compile(r"0|[1-9][0-9]{0,4}", re.ASCII)


def printable(text: str, limit: int = NAME_MAX) -> str:
    """`text` as one line of printable ASCII, at most `limit` characters: fit for a log."""
    line = "".join(c if " " <= c <= "~" else "?" for c in text[:limit + 1])
    return line if len(line) <= limit else line[:limit - 3] + "..."


def normalise(raw: bytes) -> str:
    """A host name in its one canonical form.

    Letters, digits, `-`, `_` and dots; at least two labels of 1..63 that neither begin nor end
    with `-`; 253 bytes at most; no trailing dot; no IP address in any spelling (RFC 6066 section 3
    forbids them), so the last label is not a number.  `xn--` is never decoded.
    Raises Malformed, of the kind `bad_name`.
    """
    name = raw.lower()
    if len(raw) > NAME_MAX or not NAME.fullmatch(name):
        raise Malformed(f"not a host name: {printable(raw.decode('latin-1'), 80)!r}", kind="bad_name")
    return name.decode("ascii")


def parse_port(text: str) -> int:
    """A port from 0 to 65535.  Raises ValueError."""
    if not PORT.fullmatch(text) or int(text) > 65535:
        raise ValueError(f"{text!r} is not a port")
    return int(text)


def parse_host_port(text: str, default_host: str | None = None) -> tuple[str, int]:
    """`HOST:PORT`, `[::1]:PORT`, or `:PORT` where there is a default.  Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif ":" in host:
        raise ValueError(f"{text!r}: an IPv6 address goes in brackets, as [::1]:443")
    host = host or default_host or ""
    try:
        number = parse_port(port)
    except ValueError:
        number = -1
    if not colon or not host or not host.isascii() or number < 0:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host, number


def show_address(address: tuple) -> str:
    """HOST:PORT, an IPv6 host in brackets."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_ip(host: str) -> Address:
    """The address that `host` spells, without its scope; IPv4 inside IPv6 becomes IPv4.  Raises ValueError."""
    return unmapped(ipaddress.ip_address(host.partition("%")[0]))


def unmapped(address: Address) -> Address:
    """IPv4 inside IPv6 (RFC 4291 section 2.5.5.2) as IPv4; any other address as it is."""
    return getattr(address, "ipv4_mapped", None) or address


def is_number(host: str) -> bool:
    """Whether a resolver would take this for an IPv4 address in one of its odd spellings."""
    try:
        ipaddress.ip_address(host)
        return False
    except ValueError:
        return re.fullmatch(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9a-fA-F]*)", host) is not None


def is_local(ip: Address) -> bool:
    """Whether this address is this machine's: then a socket can be bound to it."""
    if ip.is_loopback or ip.is_unspecified:
        return True
    try:
        with socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((str(ip), 0))
        return True
    except OSError:
        return False


# The files: those that serve, and the drop-in ones that may be missing, by the option that they make.
CORE = (
    "sniroute", "sniroute_daemon", "sniroute_systemd", "sniroute_handover", "sniroute_router", "sniroute_settings",
    "sniroute_connection", "sniroute_routes", "sniroute_targets", "sniroute_tunnels", "sniroute_processes",
    "sniroute_ports", "sniroute_launchers", "sniroute_flow", "sniroute_race", "sniroute_log", "sniroute_loop",
    "sniroute_host", "sniroute_wire", "sniroute_names", "sniroute_refusals",
)
OPTIONS = {
    "doctor": ("sniroute_doctor",),
    "admin": ("sniroute_admin", "sniroute_door", "sniroute_metrics", "sniroute_page"),
    "carrier": ("sniroute_carrier", "sniroute_edge", "sniroute_forwarder", "sniroute_dial", "sniroute_http"),
}


def is_here(room: str) -> bool:
    """Whether a drop-in file is beside the others, or with them in one zip file: asked by name, never by a path."""
    import importlib.util  # imported late: needed only for an option
    return importlib.util.find_spec(room) is not None


def describe_version() -> str:
    """The version, the Python that runs it, and which options are here."""
    options = [option for option, rooms in OPTIONS.items() if all(map(is_here, rooms))]
    runs_on = f"Python {sys.version.split()[0]}, {sys.platform}"
    return f"sniroute {__version__} ({runs_on}; with {', '.join(options) or 'no options'})"
