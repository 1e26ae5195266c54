#!/usr/bin/env python3
"""sniroute_carrier: what `cloudflared access tcp` does, with nothing installed.

It listens on a local port.  For each client it opens TLS to the hostname, upgrades to WebSocket,
and carries the client's bytes in binary messages to the connector of that hostname (the
`cloudflared` that runs beside the service), and back.

    client --- Listener --- Connection -------------- edge --- connector --- service
     psql      127.0.0.1     recv  -> one masked message, at most CHUNK bytes
               :20000        bytes <- FrameReader <- messages of any shape

    access tcp --hostname H --url HOST:PORT   one hostname, with cloudflared's options and variables
    access tcp --hostname H                   one connection, between stdin and stdout
    forwarders                                any number of hostnames, told on stdin (see `Control`)

Threads.  `main` runs the one loop, which owns every socket: a TLS socket that two threads use can
lock up.  A thread `name` resolves one hostname and hands the addresses to the loop by
`Carrier.call`.  Without a listener, two more copy stdin and stdout.  There are no locks.

The life of a connection is `Connection.state`:

    NAMING -> CONNECTING -> (ASKING ->) SHAKING -> UPGRADING -> OPEN        one deadline for all this
       OPEN -> HALF -> LEAVING      the client has ended: its last bytes, a while for the answer, Close
       OPEN -> LEAVING              the client is gone, and has said its last
       OPEN, HALF -> DRAINING       the edge takes no more: what it has said before still counts
       any of these -> ENDING       the edge has ended: its last bytes, then the client may still read
       any -> CLOSED

What the far end is like decides what is sent.  It cuts a message at 16,384 bytes and drops the
rest; it answers a Ping in the middle of a frame it is writing; it has no half-close.  So messages
are small, Pings are never sent, and Pongs and Close stand between whole frames.  Of its own accord
Close is sent only when the client has ended and nothing has come down for a while; else it answers
a Close or a broken rule, or goes with the listener.

Seams: I want to ...
    tell a failure apart          raise Failed with a word of REASONS; `judge` does it for answers
    give the edge another header  `request`
    another way to the edge       a state between CONNECTING and SHAKING, as ASKING is

It is a program of its own and imports the standard library only; sniroute starts it, never imports it.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import errno
import fcntl
import functools
import hashlib
import ipaddress
import json
import os
import re
import resource
import select
import selectors
import signal
import socket
import ssl
import struct
import sys
import termios
import threading
import time
import urllib.parse
from typing import Any, Callable, Iterable, Mapping, NamedTuple

__version__ = "0.1.0"

# Limits, each with its reason.  Sizes in bytes, times in seconds.
CHUNK = 16376  # a message: the far end drops what is over 16,384, and with its header it fills one TLS record
RECORD = 16384  # RFC 8446 5.1: what one read of a TLS socket gives at most
BUFFER = 8 * RECORD  # from the edge in one go: eight reads, one write
TURN = 8  # messages from one client before the others have their turn
EARLY_MAX = 1 << 16  # what a client says before the edge is there; the rest waits in the kernel
HEAD_MAX = 1 << 16  # an HTTP answer's head
BODY_MAX = 8192  # of an error page: enough to find its error code
PIECES_MAX = 64  # buffers in one write: far under the kernel's 1,024
CONTROL_MAX = 125  # RFC 6455 5.5: a control frame's payload
ACCEPTS = 64  # connections taken in one go, so that those already open get their turn
BACKLOG = 4096  # the kernel caps it at somaxconn
DIAL_TIMEOUT = 15.0  # from accept to the edge's answer: name, connect, proxy, TLS and upgrade together
STAGGER = 0.25  # RFC 8305 5: until the next address is tried beside the one that does not answer
SHORT_OF_FDS = 0.1  # until a connect without a descriptor is tried again
PAUSE = 1.0  # in accepting, when descriptors are short; less where a connection ends
PAUSE_SAID = 10.0  # between two lines about that
GRACE = 2.0  # a client has ended: silence from the edge before Close, so that its answer gets through
SETTLE = 0.05  # until it is asked again whether the client has got everything, and may be reset
STALL = 60.0  # the edge takes nothing: until it is looked whether the client is still there
LINGER = 5.0  # after Close, or FIN: the other side may still send what is under way
ADDRESSES_MAX = 8  # addresses of one host that are tried
RESOLVED_FOR = 30.0  # an address is used; getaddrinfo does not tell its TTL
KEEPALIVE = (15, 15, 9)  # idle, interval, count: cloudflared's
SPARE_FDS = 64  # descriptors that are not for connections: listeners, the selector, resolvers
LOG_NAP = 0.1  # until it is tried again to write what nobody took
LINES_MAX = 1000  # log lines that wait for somebody to read them; over it they are dropped and counted
LINE_MAX = 4095  # a log line, and with its newline what a pipe takes as a whole (PIPE_BUF); none comes near it
COMMAND_MAX = 1024  # a line on stdin: two words, an address and a name

CAPACITY_ERRNOS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

# The states of a connection; those on the way to the edge are shown to people: "15 s, TLS handshake".
NAMING, CONNECTING, ASKING = "resolving the name", "connecting", "asking the proxy"
SHAKING, UPGRADING = "TLS handshake", "upgrade"
OPEN, HALF, LEAVING, DRAINING, ENDING, CLOSED = "open", "half", "leaving", "draining", "ending", "closed"
CARRYING = frozenset((OPEN, HALF, LEAVING, DRAINING))  # the states in which the edge is read


class Failed(Exception):
    """A client cannot be served: `reason` is a word of REASONS, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class Malformed(Exception):
    """Bytes that no peer of ours may send."""


class SettingsError(Exception):
    """A wrong setting; the message names it."""


# -- settings ----------------------------------------------------------------------------------


def printable(text: str, limit: int = 400) -> str:
    """`text` as one line of printable ASCII, at most `limit` characters: fit for a log."""
    line = "".join(c if " " <= c <= "~" else "?" for c in text[:limit])
    return line if len(text) <= limit else line[:limit - 3] + "..."


def show_address(address: Any) -> str:
    """HOST:PORT, an IPv6 host in brackets; '' for what is no such address."""
    if not isinstance(address, tuple):
        return ""
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


class Target(NamedTuple):
    """What `--hostname` leads to."""

    host: str
    port: int
    path: str  # and the query

    def __str__(self) -> str:
        return self.host if self.port == 443 else show_address((self.host, self.port))


LABEL = r"[A-Za-z0-9_-]{1,63}"  # RFC 1035 2.3.4; an empty or a longer one cannot even be asked for in TLS
HOST = re.compile(rf"(?=.{{1,253}}\Z)(?!-)(?:{LABEL}\.)*{LABEL}(?<!-)")


def parse_target(text: str) -> Target:
    """`HOST`, `HOST:PORT` or a URL; whatever its scheme, it is https.  Raises ValueError."""
    wrong = ValueError(f"{printable(text)!r} is not a hostname, HOST:PORT, or a URL")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise wrong
    try:
        url = urllib.parse.urlsplit(text if "://" in text else f"https://{text}")
        host, port = url.hostname or "", url.port
    except ValueError:
        raise wrong from None
    try:
        host = str(ipaddress.ip_address(host))
    except ValueError:
        if not HOST.fullmatch(host):
            raise wrong from None
    if port == 0:
        raise wrong
    return Target(host, port or 443, (url.path or "/") + (f"?{url.query}" if url.query else ""))


def parse_listen(text: str) -> tuple[str, int]:
    """`HOST:PORT`, where HOST is an address or `localhost`; a scheme and a path are dropped.  Raises ValueError."""
    try:
        url = urllib.parse.urlsplit(text if "://" in text else f"tcp://{text}")
        host = "127.0.0.1" if url.hostname == "localhost" else str(ipaddress.ip_address(url.hostname or ""))
        if url.port is not None:
            return host, url.port
    except ValueError:
        pass
    raise ValueError(f"{printable(text)!r} is not HOST:PORT, with an address or localhost as HOST")


# What the upgrade says itself: a --header of this name is dropped, as cloudflared does.
OWN_HEADERS = frozenset(("host", "user-agent", "upgrade", "connection", "sec-websocket-key",
                         "sec-websocket-version", "sec-websocket-extensions"))
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.6.2


def parse_header(text: str) -> tuple[str, str]:
    """`NAME: VALUE`.  Raises ValueError, which does not repeat the value: it may be a secret."""
    name, colon, value = text.partition(":")
    value = value.strip(" \t")
    if not colon or not TOKEN.fullmatch(name.strip()):
        raise ValueError("it is not NAME: VALUE")
    if not value.isascii() or any(c < " " and c != "\t" or c == "\x7f" for c in value):
        raise ValueError(f"the value of {name.strip()} has characters that no header may have")
    return name.strip(), value


# The variables that make a header, and the options that do the same.
IDENTITY = (
    ("TUNNEL_SERVICE_DESTINATION", "destination", "Cf-Access-Jump-Destination"),
    ("TUNNEL_SERVICE_TOKEN_ID", "service_token_id", "Cf-Access-Client-Id"),
    ("TUNNEL_SERVICE_TOKEN_SECRET", "service_token_secret", "Cf-Access-Client-Secret"),
    ("CF_ACCESS_TOKEN", "", "Cf-Access-Token"),  # cloudflared keeps this one in a file
)


def identity(environ: Mapping[str, str], given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The headers by which Access knows us; `given` are the options.  Raises SettingsError."""
    headers = []
    for variable, option, header in IDENTITY:
        value = given.get(option)
        source = f"--{option.replace('_', '-')}" if value else variable
        value = value or environ.get(variable)
        if value:
            try:
                headers.append(parse_header(f"{header}: {value}"))
            except ValueError as error:
                raise SettingsError(f"{source}: {error}") from None
    return headers


class Proxy(NamedTuple):
    """HTTPS_PROXY."""

    host: str
    port: int
    authorization: str  # the header's value, '' for none

    def __str__(self) -> str:
        return show_address((self.host, self.port))


def parse_proxy(text: str) -> Proxy:
    """`http://[USER:PASSWORD@]HOST[:PORT]`.  Raises ValueError, which does not repeat the password."""
    try:
        url = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        port = url.port
    except ValueError:  # its message may show a part of the password
        raise ValueError("it is not http://[USER:PASSWORD@]HOST[:PORT]") from None
    if url.path not in ("", "/") or url.query or url.fragment:  # perhaps the end of a password with a slash in it
        raise ValueError("it is not http://[USER:PASSWORD@]HOST[:PORT]")
    if url.scheme != "http":
        raise ValueError(f"a proxy is reached by http://, not by {printable(url.scheme, 20)}://")
    if not url.hostname or not url.hostname.isascii() or not url.hostname.isprintable():
        raise ValueError("it names no host")
    userinfo = url.netloc.rpartition("@")[0]
    plain = urllib.parse.unquote_to_bytes(userinfo if ":" in userinfo else userinfo + ":")
    authorization = "Basic " + base64.b64encode(plain).decode() if userinfo else ""
    return Proxy(url.hostname, port or 80, authorization)


def goes_direct(host: str, port: int, no_proxy: str) -> bool:
    """Whether a host is reached without the proxy: loopback always, else by the rules of NO_PROXY.

    Each of its words is `*`, a domain (which means its subdomains too; with a dot in front, those
    only), an address, or a network; a domain or an address may have a port.
    """
    host = host.lower().rstrip(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if host == "localhost" or address is not None and address.is_loopback:
        return True
    for word in no_proxy.lower().replace(",", " ").split():
        if word == "*":
            return True
        if "/" in word:
            try:
                if address is not None and address in ipaddress.ip_network(word, strict=False):
                    return True
            except ValueError:
                pass  # no network: it fits nothing
            continue
        name, colon, digits = word.rpartition(":")
        if colon and digits.isdecimal() and ("]" in name or ":" not in name):
            if int(digits) != port:
                continue
            word = name
        word = word.strip("[]")
        try:
            if ipaddress.ip_address(word) == address:
                return True
            continue
        except ValueError:
            pass  # a domain
        word = word[1:] if word.startswith("*.") else word
        if host == word or host.endswith(word if word.startswith(".") else f".{word}"):
            return True
    return False


def find_proxy(environ: Mapping[str, str]) -> tuple[Proxy | None, str]:
    """The proxy, and NO_PROXY.  Raises SettingsError."""
    text = environ.get("HTTPS_PROXY") or environ.get("https_proxy")
    try:
        proxy = parse_proxy(text) if text else None
    except ValueError as error:
        raise SettingsError(f"HTTPS_PROXY: {error}") from None
    return proxy, environ.get("NO_PROXY") or environ.get("no_proxy") or ""


def alternate(addresses: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The addresses in an order that changes the family at each step.  Source: RFC 8305 section 4."""
    rows = list(addresses)
    first = [row for row in rows if row[0] == rows[0][0]]
    other = [row for row in rows if row[0] != rows[0][0]]
    mixed = [row for pair in zip(first, other) for row in pair]
    longer = first[len(other):] + other[len(first):]
    return (mixed + longer)[:ADDRESSES_MAX]


# -- HTTP --------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """The head of an HTTP answer."""

    status: int
    headers: dict[str, str]  # names in lower case; values of one name joined by commas
    end: int  # where what follows begins


STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: .*)?")


def parse_answer(data: bytes | bytearray) -> Answer | None:
    """The head of an HTTP/1 answer; None: need more.  Raises Malformed.

    Source: RFC 9112 section 2 and 5.
    """
    if data[:7] != b"HTTP/1."[:len(data)]:
        raise Malformed("it is no HTTP")
    end = data.find(b"\r\n\r\n", 0, HEAD_MAX)
    if end < 0:
        if len(data) >= HEAD_MAX:
            raise Malformed(f"a head of more than {HEAD_MAX} bytes")
        return None
    first = bytes(data[:data.find(b"\r\n")])
    status = STATUS_LINE.fullmatch(first)
    if status is None:
        raise Malformed("it is no HTTP")
    if status[1] == b"0" and status[2] == b"101":
        raise Malformed("HTTP/1.0, which has no 101")
    headers: dict[str, str] = {}
    for line in bytes(data[len(first) + 2:end]).decode("latin-1").split("\r\n"):
        name, colon, value = line.partition(":")
        if not line:
            continue
        if not colon or not TOKEN.fullmatch(name):
            raise Malformed("a header line that is none")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Answer(int(status[2]), headers, end + 4)


def connect_request(target: Target, proxy: Proxy) -> bytes:
    """What a proxy is asked.  Source: RFC 9110 section 9.3.6."""
    place = show_address((target.host, target.port))
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def request(target: Target, key: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """The request for the upgrade, as cloudflared sends it.  Source: RFC 6455 section 4.1."""
    host = show_address((target.host, target.port)).removesuffix(":443")
    lines = [f"GET {target.path} HTTP/1.1", f"Host: {host}", f"User-Agent: sniroute/{__version__}"]
    lines += [f"{name}: {value}" for name, value in headers if name.lower() not in OWN_HEADERS]
    lines += ["Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "Upgrade: websocket"]
    return "\r\n".join([*lines, "", ""]).encode("ascii")


ACCEPT_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 1.3
LOGIN_PATH = "/cdn-cgi/access/login"
ERROR_CODE = re.compile(rb"error code: *([0-9]{3,5})|\bError +([0-9]{4})\b", re.IGNORECASE)
STATUS_REASONS = {401: "denied", 403: "denied", 404: "not_found", 502: "origin", 530: "down"}


def wants_body(answer: Answer) -> int:
    """How many bytes of the body are to be waited for: those of an error page that says more."""
    length = answer.headers.get("content-length", "0")
    return min(int(length[:9]), BODY_MAX) if answer.status >= 500 and length.isdecimal() else 0


def judge(answer: Answer, body: bytes, key: str) -> None:
    """Raise Failed, with its reason, unless the answer is the upgrade that was asked for.

    Source: RFC 6455 section 4.1; the other answers are what Cloudflare's edge gives.
    """
    status, headers = answer.status, answer.headers
    if status == 101:
        digest = base64.b64encode(hashlib.sha1((key + ACCEPT_GUID).encode(), usedforsecurity=False).digest()).decode()
        words = [word.strip() for word in headers.get("connection", "").lower().split(",")]
        if headers.get("upgrade", "").lower() != "websocket" or "upgrade" not in words:
            raise Failed("other", "HTTP 101 that is no upgrade to websocket")
        if headers.get("sec-websocket-accept") != digest:
            raise Failed("other", "HTTP 101 with a wrong Sec-WebSocket-Accept")
        if headers.get("sec-websocket-extensions"):
            raise Failed("other", "HTTP 101 with an extension that was not asked for")
        return
    detail = f"HTTP {status}"
    if 300 <= status < 400:
        try:
            url = urllib.parse.urlsplit(printable(headers.get("location", "")))
        except ValueError:
            raise Failed("other", f"{detail} to what is no URL") from None
        if status == 302 and url.path.startswith(LOGIN_PATH):
            raise Failed("login", detail)
        raise Failed("other", f"{detail} to {url.scheme}://{url.netloc}{url.path}: a web application?")
    code = ERROR_CODE.search(body)
    if code:
        detail += f", error {(code[1] or code[2]).decode()}"
    raise Failed(STATUS_REASONS.get(status, "other"), detail)


# -- WebSocket ---------------------------------------------------------------------------------

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA  # RFC 6455 5.2
FULL_REPEAT = int.from_bytes(b"\1\0\0\0" * (CHUNK // 4), "little")


def mask(data: bytes, key: bytes) -> bytes:
    """`data` masked with the four bytes of `key`.  Source: RFC 6455 section 5.3.

    One XOR of two large numbers: 27 us for a full message, where a loop over bytes takes 1,000.
    """
    size = len(data)
    if size == CHUNK:  # the key repeated is a product, twice as fast to make as by bytes
        pad = int.from_bytes(key, "little") * FULL_REPEAT
    else:
        pad = int.from_bytes((key * (size // 4 + 1))[:size], "little")
    return (int.from_bytes(data, "little") ^ pad).to_bytes(size, "little")


def frame(opcode: int, data: bytes) -> bytes:
    """One whole message in one frame, masked with a fresh key.  Source: RFC 6455 section 5.2."""
    size = len(data)
    key = os.urandom(4)
    if size < 126:
        head = struct.pack(">BB4s", 0x80 | opcode, 0x80 | size, key)
    else:
        head = struct.pack(">BBH4s", 0x80 | opcode, 0x80 | 126, size, key)  # CHUNK fits 16 bits
    return head + mask(data, key)


class FrameReader:
    """Reads frames from a server, bytes in any portions.  It keeps a header, or a control frame, at most."""

    __slots__ = ("left", "part", "fragmented")

    def __init__(self) -> None:
        self.left = 0  # bytes of the current data frame that are still to come
        self.part = b""  # the beginning of a header or of a control frame
        self.fragmented = False  # a message goes on in the next data frame

    def is_inside(self) -> bool:
        """Whether an end would come in the middle of something."""
        return bool(self.left or self.part or self.fragmented)

    def read(self, data: memoryview) -> tuple[list[memoryview], list[tuple[int, bytes]]]:
        """The payload in `data`, in order, and its control frames.  Raises Malformed.

        What comes behind a Close is ignored.  Source: RFC 6455 section 5.
        """
        pieces: list[memoryview] = []
        controls: list[tuple[int, bytes]] = []
        if self.part:
            data = memoryview(self.part + bytes(data))
            self.part = b""
        at, end = 0, len(data)
        while at < end:
            if self.left:
                piece = data[at:at + self.left]
                pieces.append(piece)
                at += len(piece)
                self.left -= len(piece)
                continue
            header = self._header(data, at, end)
            if header is None:
                self.part = bytes(data[at:])
                break
            opcode, start, size = header
            if opcode < CLOSE:
                at = start
                self.left = size
                continue
            if start + size > end:
                self.part = bytes(data[at:])
                break
            controls.append((opcode, bytes(data[start:start + size])))
            if opcode == CLOSE:
                break
            at = start + size
        return pieces, controls

    def _header(self, data: memoryview, at: int, end: int) -> tuple[int, int, int] | None:
        """The frame at `at`: opcode, where its payload starts, and its size; None: need more."""
        if end - at < 2:
            return None
        first, second = data[at], data[at + 1]
        opcode, size = first & 0x0F, second & 0x7F
        if first & 0x70:
            raise Malformed("a frame with a reserved bit")
        if second & 0x80:
            raise Malformed("a masked frame from a server")
        if opcode >= CLOSE:
            if opcode > PONG:
                raise Malformed(f"a frame with opcode {opcode}")
            if not first & 0x80 or size > CONTROL_MAX:
                raise Malformed("a control frame that is fragmented or too long")
            if opcode == CLOSE and size == 1:
                raise Malformed("a Close with half a code")
            return opcode, at + 2, size
        start = at + 2
        if size == 126:
            if end - at < 4:
                return None
            size, start = int.from_bytes(data[start:start + 2], "big"), start + 2
        elif size == 127:
            if end - at < 10:
                return None
            size, start = int.from_bytes(data[start:start + 8], "big"), start + 8
            if size >> 63:
                raise Malformed("a frame of more than 2**63 bytes")
        if opcode > BINARY or (opcode == CONTINUATION) is not self.fragmented:
            raise Malformed("a data frame out of turn" if opcode <= BINARY else f"a frame with opcode {opcode}")
        self.fragmented = not first & 0x80
        return opcode, start, size


# -- what may go wrong -------------------------------------------------------------------------

# Why a client could not be served: the word for programs, and the sentence for people.
REASONS = {
    "name": "the name does not resolve",
    "resolver": "the host's resolver gives no answer",
    "refused": "the edge cannot be reached",
    "timeout": "the edge gave no answer in time",
    "certificate": "the edge's certificate is not trusted",
    "tls": "the TLS handshake failed",
    "reset": "the edge closed the connection",
    "proxy": "the proxy (HTTPS_PROXY) cannot be reached, or refused",
    "login": "Access wants a login: give it a service token (TUNNEL_SERVICE_TOKEN_ID, TUNNEL_SERVICE_TOKEN_SECRET)",
    "denied": "Access denied it (is the token right, and does the application's policy allow it?)",
    "not_found": "the edge knows no such application",
    "origin": "its connector runs, but cannot reach the service",
    "down": "its tunnel is down (does its connector run?)",
    "other": "the edge answered something else",
}


# -- the log -----------------------------------------------------------------------------------

LEVELS = {"debug": 0, "info": 1, "warn": 2, "error": 3, "fatal": 4}  # cloudflared's words


class Log:
    """Lines on stderr, as JSON or as people read them.  Never waits for the reader.

    A line is written only where select(2) says that a pipe has room, which is then enough for a
    whole line; else it waits its turn.
    """

    def __init__(self, level: str, as_json: bool):
        self.level = LEVELS[level]
        self.as_json = as_json
        self.lines: collections.deque[bytes] = collections.deque()
        self.lost = 0

    def __call__(self, level: str, message: str, **fields: str) -> None:
        """One line: `message`, and the fields that are not empty."""
        if LEVELS[level] < self.level:
            return
        if len(self.lines) >= LINES_MAX:
            self.lost += 1
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        fields = {key: printable(value) for key, value in fields.items() if value}
        if self.as_json:
            line = json.dumps({"level": level, "time": now, **fields, "message": printable(message)})
        else:
            line = f"{now} {level[:3].upper()} {printable(message)}"
            line += "".join(f" {key}={json.dumps(value)}" for key, value in fields.items() if key != "event")
        self.lines.append(line.encode()[:LINE_MAX] + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write what can be written now."""
        try:
            while self.lines and select.select((), (2,), (), 0)[1]:
                os.write(2, self.lines.popleft())
                if self.lost and not self.lines:
                    lost, self.lost = self.lost, 0
                    self("warn", f"{lost} lines were lost: nobody read the log")
        except (OSError, ValueError):  # it is closed, or nobody will ever read it
            self.lines.clear()


# -- connections -------------------------------------------------------------------------------


def set_options(sock: socket.socket) -> None:
    """Never wait; no delay for small messages; notice a peer that has gone without a word."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def reset(sock: socket.socket) -> None:
    """Close a socket so that its peer sees a failure, not an end."""
    if sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):  # macOS, of a connection that is over
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def was_reset(sock: socket.socket) -> bool:
    """Whether a connection that is over was reset, which CPython before 3.12.3 takes for an end (its gh-115627)."""
    try:
        sock.getpeername()
    except OSError:
        return True
    return False


def unsent(sock: socket.socket) -> int:
    """Bytes that the peer has not acknowledged yet; 0 where the kernel does not tell.  Source: tcp(7), SIOCOUTQ."""
    answer = bytearray(4)
    try:
        fcntl.ioctl(sock, termios.TIOCOUTQ, answer)
    except OSError:
        return 0
    return int.from_bytes(answer, sys.byteorder)


def has_left(sock: socket.socket) -> bool:
    """Whether the peer has ended or is gone, asked without reading what it has said before (only Linux tells)."""
    poll = select.poll()
    poll.register(sock, getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


def name_failure(error: OSError, proxy: Proxy | None) -> Failed:
    """Why the next hop, the proxy where there is one, has no address."""
    why = error.strerror or str(error)
    if proxy is not None:
        return Failed("proxy", f"{proxy}: {why}")
    unknown = error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
    return Failed("name" if unknown else "resolver", why)


def connect_failure(error: OSError, proxy: Proxy | None) -> Failed:
    """Why the next hop took no connect."""
    if proxy is not None:
        return Failed("proxy", f"{proxy}: {error.strerror}")
    return Failed("timeout" if error.errno == errno.ETIMEDOUT else "refused", error.strerror)


class Queue:
    """Connections that wait equally long for the same thing: the first in is the first due."""

    def __init__(self, seconds: float, act: Callable[[Connection], None]):
        self.seconds = seconds
        self.act = act
        self.due: dict[Connection, float] = {}

    def put(self, connection: Connection) -> None:
        """Begin to wait, or begin anew."""
        self.due.pop(connection, None)
        self.due[connection] = time.monotonic() + self.seconds

    def drop(self, connection: Connection) -> None:
        self.due.pop(connection, None)


class Listener:
    """One hostname, where its clients come in, and what is remembered for the next one."""

    def __init__(self, target: Target, sock: socket.socket | None = None, address: str = ""):
        self.target = target
        self.sock = sock  # None: stdin and stdout
        self.address = address
        self.session: ssl.SSLSession | None = None  # of the last TLS connection: the next is resumed


class Connection:
    """One client, and its way to the edge.  All methods run in the loop."""

    __slots__ = ("carrier", "listener", "target", "client", "address", "edge", "state", "deaf", "early", "ended",
                 "attempts", "todo", "error", "key", "head", "answer", "reader", "out", "pong", "rest", "broken",
                 "client_events", "edge_events", "stalled_at", "still_unsent", "up", "down")

    def __init__(self, carrier: Carrier, listener: Listener, client: socket.socket, address: Any):
        self.carrier = carrier
        self.listener = listener
        self.target = listener.target
        self.client = client
        self.address = show_address(address)
        self.edge: Any = None
        self.state = NAMING
        self.deaf = False  # the client takes no more; what it has sent is still read
        self.early = b""  # what it has said that is not in a message yet
        self.ended = False  # it has ended: what is in `early` is its last
        self.attempts: list[socket.socket] = []  # connects under way
        self.todo: list[tuple[int, Any]] = []  # addresses still to be tried
        self.error: OSError = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))  # of the last one
        self.key = ""
        self.head = bytearray()  # of an answer
        self.answer: Answer | None = None
        self.reader: FrameReader | None = None
        self.out = memoryview(b"")  # on its way to the edge
        self.pong: bytes | None = None  # the last Ping's payload, not answered yet
        self.rest = b""  # on its way to the client
        self.broken = False  # the edge broke off: the client is to see that
        self.client_events = self.edge_events = 0
        self.stalled_at = (0, 0)  # what was sent, and not acknowledged, when that was last asked
        self.still_unsent = 1 << 62  # LEAVING, ENDING: bytes that the kernel held for the other side, when last asked
        self.up = self.down = 0  # bytes

    # -- on the way to the edge

    def start(self) -> None:
        """Dial at once: where the service speaks first, the client waits for that."""
        try:
            set_options(self.client)
        except OSError:
            self.close()  # it has left already
            return
        self.carrier.dialling.put(self)
        self._watch_client(READ, self.on_early)
        place = self.carrier.next_hop(self.target)
        self.carrier.names.ask(place.host, place.port, self)

    def on_early(self, mask: int) -> None:
        """The client says something, or leaves, before the edge is there."""
        if self.state in CARRYING or self.state in (ENDING, CLOSED):
            return
        try:
            data = self.client.recv(EARLY_MAX - len(self.early))
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if data:
            self.early += data
            if len(self.early) >= EARLY_MAX:
                self._watch_client(0)
            return
        self.ended = True
        self._watch_client(0)
        if self.listener.sock is None:
            return  # the end of stdin is nobody's leaving
        if not self.early:
            self.close()
            return
        # It may be a whole upload, so it is still delivered: for a while, since it may be a client
        # that has lost patience, which looks the same.
        self.carrier.dialling.drop(self)
        self.carrier.hurried.put(self)

    def on_addresses(self, found: list[tuple[int, Any]] | OSError) -> None:
        """The name is resolved."""
        if self.state is not NAMING:
            return
        if isinstance(found, OSError):
            self.fail(name_failure(found, self.carrier.proxy_for(self.target)))
            return
        self.todo = list(found)
        self.state = CONNECTING
        self.connect()

    def connect(self) -> None:
        """Try one address more, beside those that have not answered yet (RFC 8305)."""
        if self.state is not CONNECTING:
            return
        while self.todo:
            family, address = self.todo[0]
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                if error.errno in CAPACITY_ERRNOS:
                    self.carrier.short.put(self)  # what ends will make room
                    return
                self.error = error  # no IPv6 here
                del self.todo[0]
                continue
            del self.todo[0]
            set_options(sock)
            code = sock.connect_ex(address)
            if code in (0, errno.EINPROGRESS):
                self.carrier.selector.register(sock, WRITE, functools.partial(self.on_connected, sock))
                self.attempts.append(sock)
                if self.todo:
                    self.carrier.staggered.put(self)
                return
            self.error = OSError(code, os.strerror(code))
            sock.close()
        if not self.attempts:
            self.fail(connect_failure(self.error, self.carrier.proxy_for(self.target)))

    def on_connected(self, sock: socket.socket, mask: int) -> None:
        """One of the connects has an answer."""
        if self.state is not CONNECTING or sock not in self.attempts:
            return
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.error = OSError(code, os.strerror(code))
            self._drop_attempt(sock)
            self.connect()
            return
        for other in [other for other in self.attempts if other is not sock]:
            self._drop_attempt(other)
        self.attempts = []
        self.todo = []
        self.carrier.selector.unregister(sock)
        self.edge = sock
        proxy = self.carrier.proxy_for(self.target)
        if proxy is None:
            self._shake()
            return
        self.state = ASKING
        self.out = memoryview(connect_request(self.target, proxy))
        self._watch_edge(WRITE, self.on_proxy)

    def _drop_attempt(self, sock: socket.socket) -> None:
        self.attempts.remove(sock)
        self.carrier.selector.unregister(sock)
        sock.close()

    def on_proxy(self, mask: int) -> None:
        """Ask the proxy, and hear its answer, which nothing follows: TLS clients speak first."""
        if self.state is not ASKING:
            return
        try:
            if self.out:
                self.out = self.out[self.edge.send(self.out):]
                self._watch_edge(WRITE if self.out else READ, self.on_proxy)
                return
            data = self.edge.recv(HEAD_MAX - len(self.head))
            self.head += data
            answer = parse_answer(self.head)
            if answer is None and data:
                return
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(Failed("reset", f"the proxy: {error.strerror}"))
            return
        except Malformed as error:
            self.fail(Failed("proxy", str(error)))
            return
        if answer is None:
            self.fail(Failed("reset", "the proxy closed the connection"))
        elif not 200 <= answer.status < 300:
            self.fail(Failed("proxy", f"HTTP {answer.status}"))
        elif len(self.head) > answer.end:
            self.fail(Failed("proxy", "it said more than its answer"))
        else:
            self.head.clear()
            self._shake()

    def _shake(self) -> None:
        """Begin TLS: with the session of the last connection, where there is one."""
        self._watch_edge(0)
        self.state = SHAKING
        if was_reset(self.edge):  # which wrap_socket takes for a socket that is not connected yet
            self.fail(Failed("reset", "in the TLS handshake"))
            return
        try:
            self.edge = self.carrier.context.wrap_socket(
                self.edge, server_hostname=self.target.host, do_handshake_on_connect=False, suppress_ragged_eofs=False,
                session=self.listener.session)
        except OSError as error:  # it was reset meanwhile
            self.fail(Failed("reset", error.strerror or str(error)))
            return
        self.on_shake(WRITE)

    def on_shake(self, mask: int) -> None:
        """One more step of the handshake."""
        if self.state is not SHAKING:
            return
        try:
            self.edge.do_handshake()
        except ssl.SSLWantReadError:
            self._watch_edge(READ, self.on_shake)
        except ssl.SSLWantWriteError:
            self._watch_edge(WRITE, self.on_shake)
        except ssl.SSLCertVerificationError as error:
            self.fail(Failed("certificate", error.verify_message))
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            self.fail(Failed("reset", "in the TLS handshake"))
        except ssl.SSLError as error:
            self.fail(Failed("tls", error.reason or error.strerror or str(error)))
        except OSError:
            self.fail(Failed("reset", "in the TLS handshake"))
        else:
            self.state = UPGRADING
            self.key = base64.b64encode(os.urandom(16)).decode()
            self.out = memoryview(request(self.target, self.key, self.carrier.headers))
            self.on_upgrade(WRITE)

    def on_upgrade(self, mask: int) -> None:
        """Send the request, read the answer."""
        if self.state is not UPGRADING:
            return
        try:
            if not self._flush():
                self._watch_edge(WRITE, self.on_upgrade)
                return
            self._watch_edge(READ, self.on_upgrade)
            for _ in range(TURN):  # each takes a whole record, so that select sees what is left
                data = self.edge.recv(RECORD)
                self.head += data
                if self._answered(not data) or not data:
                    return
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except ssl.SSLEOFError:
            self._answered(True)
        except OSError as error:
            if self.answer is not None:
                self._answered(True)
            else:
                self.fail(Failed("reset", f"before its answer: {error.strerror or error}"))

    def _answered(self, over: bool) -> bool:
        """Whether the answer is complete; then it is judged.  `over`: nothing more will come."""
        try:
            if self.answer is None:
                self.answer = parse_answer(self.head)
            if self.answer is None:
                if over:
                    raise Failed("reset", "before its answer")
                return False
            body = bytes(self.head[self.answer.end:])
            if len(body) < wants_body(self.answer) and not over:
                return False
            judge(self.answer, body, self.key)
        except Malformed as error:
            self.fail(Failed("other", str(error)))
        except Failed as error:
            self.fail(error)
        else:
            self._open(body)
        return True

    def on_late(self) -> None:
        """The deadline has come."""
        if self.answer is not None:
            self._answered(True)
        else:
            self.fail(Failed("timeout", f"{DIAL_TIMEOUT:g} s, {self.state}"))

    def on_hurry(self) -> None:
        """The client has ended, and what it said cannot be delivered in time."""
        self.fail(Failed("timeout", f"{LINGER:g} s after the client's end, {self.state}"))

    def fail(self, failure: Failed) -> None:
        """The client cannot be served: say why, and let it see a failure."""
        self.carrier.log("error", f"{self.target}: {REASONS[failure.reason]}", event="failed",
                         listener=self.listener.address, client=self.address, reason=failure.reason,
                         error=str(failure))
        self.carrier.failed = True
        self.broken = True
        self.close()

    # -- carrying

    def _open(self, first: bytes) -> None:
        """The edge is there.  `first`: what it said behind its answer."""
        for queue in (self.carrier.dialling, self.carrier.hurried):
            queue.drop(self)
        if not self.edge.session_reused:  # reading one costs 0.6 ms: not for each connection
            session = self.edge.session
            self.listener.session = session if session is not None and session.has_ticket else None
        self.carrier.log("debug", f"{self.target}: open", event="open", listener=self.listener.address,
                         client=self.address, error="resumed" if self.edge.session_reused else "")
        self.answer = None
        self.head = bytearray()
        self.reader = FrameReader()
        self.state = OPEN
        if first:
            self._take(memoryview(first))
        self.pump_up()
        self._rewatch()

    def on_client(self, mask: int) -> None:
        """The client has said something, or takes more."""
        if mask & WRITE and self.rest:
            self._hand_down([])
        if mask & READ and self.state is OPEN:
            self.pump_up()
        self._rewatch()

    def on_edge(self, mask: int) -> None:
        """The edge has said something, or takes more."""
        if mask & READ and self.state in CARRYING and not self.rest:
            self.pump_down()
        if mask & WRITE:
            self.pump_up()
        self._rewatch()

    def pump_up(self) -> None:
        """From the client to the edge: each read is one message."""
        if self.state not in CARRYING:
            return
        try:
            for _ in range(TURN):
                if not self._flush() or self.state is not OPEN:
                    break
                if self.early:
                    data, self.early = self.early[:CHUNK], self.early[CHUNK:]
                elif self.ended:
                    data = b""
                else:
                    data = self._hear()
                if data is None:
                    break
                if not data:
                    self._client_ended()
                    break
                self.up += len(data)
                self.out = memoryview(frame(BINARY, data))
            else:  # the turn is over: the last message goes out, too
                self._flush()
        except OSError:
            self._edge_refuses()

    def _hear(self) -> bytes | None:
        """What the client says: None for nothing yet, b'' at its end."""
        try:
            return self.client.recv(CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            self.deaf = True
            return b""

    def _flush(self) -> bool:
        """Send what is on its way to the edge; a Pong goes between two frames.  Whether all is sent.

        Raises OSError.
        """
        try:
            while self.out or self.pong is not None:
                if not self.out:
                    self.out = memoryview(frame(PONG, self.pong))
                    self.pong = None
                self.out = self.out[self.edge.send(self.out):]
                if self.state is LEAVING:
                    self.carrier.lingering.put(self)  # it moves: let it
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            if self.state in CARRYING and self not in self.carrier.stalled.due:
                self.carrier.stalled.put(self)
            return False
        return True

    def pump_down(self) -> None:
        """From the edge to the client.

        Each read is given room for a whole TLS record, so that nothing stays inside the TLS socket
        where select would not see it.
        """
        buffer = self.carrier.buffer
        filled = 0
        over = lost = False
        try:
            while filled <= BUFFER - RECORD:
                count = self.edge.recv_into(buffer[filled:])
                if not count:
                    over = True
                    break
                filled += count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLEOFError:
            over, lost = True, was_reset(self.edge)
        except OSError:
            over = lost = True
        if filled:
            self._take(buffer[:filled])
        if over and self.state in CARRYING:
            self._edge_ended(lost or self.reader.is_inside())

    def _take(self, data: memoryview) -> None:
        """Bytes from the edge: hand down what is payload, answer what is control."""
        try:
            pieces, controls = self.reader.read(data)
        except Malformed as error:
            self._violated(str(error))
            return
        if pieces:
            if self.state is HALF:
                self.carrier.graced.put(self)  # its answer is still coming
            elif self.state is DRAINING:
                self.carrier.lingering.put(self)
            if not self.deaf:
                self._hand_down(pieces)
        for opcode, payload in controls:
            if opcode == PING and self.state in (OPEN, HALF):  # nothing follows a Close
                self.pong = payload  # RFC 6455 5.5.3: of several, the last will do
            elif opcode == CLOSE:
                self._say_close(payload[:2])
                self._edge_ended(False)
                return
        if self.pong is not None and self.state in CARRYING:
            try:
                self._flush()
            except OSError:
                self._edge_refuses()

    def _hand_down(self, pieces: list[memoryview]) -> None:
        """Write to the client; keep what it does not take now."""
        if self.rest:
            pieces = [memoryview(self.rest), *pieces]
        elif len(pieces) > PIECES_MAX:
            pieces = [memoryview(b"".join(pieces))]
        try:
            sent = self.client.sendmsg(pieces)
        except BlockingIOError:
            sent = 0
        except OSError:  # it takes no more, but what it has sent before still counts
            self.deaf = True
            self.rest = b""
            if self.state is ENDING:
                self.close()
            elif self.state is HALF:
                self._leave()
            return
        self.down += sent
        total = sum(map(len, pieces))
        self.rest = b"".join(pieces)[sent:] if sent < total else b""
        if self.state is ENDING and not self.rest:
            self._farewell()

    # -- the end

    def _client_ended(self) -> None:
        """All that the client said is in messages.  There is no half-close on this wire."""
        self.ended = True
        if self.deaf:
            self._leave()
            return
        self.state = HALF
        self.carrier.graced.put(self)

    def on_grace(self) -> None:
        """The client has ended, and nothing has come down for a while."""
        if self.rest:
            self.carrier.graced.put(self)  # the client is slow
        elif self.state is HALF:
            self._leave()
            self._rewatch()

    def _leave(self) -> None:
        """Tell the edge that this is all; go on reading, so that no reset destroys what is under way."""
        self.carrier.graced.drop(self)
        self.state = LEAVING
        self.pong = None
        self.carrier.lingering.put(self)
        self.out = memoryview(bytes(self.out) + frame(CLOSE, b"\x03\xe8"))  # 1000: all is well
        try:
            self._flush()
        except OSError:
            self._edge_refuses()

    def _edge_refuses(self) -> None:
        """The edge takes no more.  What it has said before is still to be read, its Close perhaps."""
        self.out = memoryview(b"")
        self.pong = None
        if self.state in (OPEN, HALF):
            self.state = DRAINING
            self.broken = True
            self.carrier.graced.drop(self)
            self.carrier.lingering.put(self)

    def on_stall(self) -> None:
        """For a while the edge has taken nothing, or little, and so nobody has listened to the client."""
        if self.state not in CARRYING or not self.out:
            return
        waiting = unsent(self.edge)
        if has_left(self.client) and (self.up, waiting) == self.stalled_at:
            self.broken = True
            self.close()
            return
        self.stalled_at = self.up, waiting
        self.carrier.stalled.put(self)

    def on_linger(self) -> None:
        """The other side does not end.  While the kernel still gets rid of what it has to send, there is more time."""
        if self.state is DRAINING:
            if self.rest:
                self.carrier.lingering.put(self)  # the client is slow, and the edge is not read meanwhile
            else:
                self._edge_ended(True)
            return
        waiting = unsent(self.edge or self.client)
        if 0 < waiting < self.still_unsent:
            self.still_unsent = waiting
            self.carrier.lingering.put(self)
        else:
            self.close()

    def _say_close(self, code: bytes) -> None:
        """Close towards the edge, where nothing else is half sent."""
        if self.state in (LEAVING, DRAINING) or self.out:
            return  # it has been said, or cannot be
        try:
            self.edge.send(frame(CLOSE, code))
        except OSError:
            pass  # it is gone, or full: no matter now

    def _violated(self, what: str) -> None:
        """The edge does not speak WebSocket."""
        self.carrier.log("error", f"{self.target}: the edge broke the protocol", event="broken",
                         listener=self.listener.address, client=self.address, reason="other", error=what)
        self._say_close(b"\x03\xea")  # 1002: protocol error
        self._edge_ended(True)

    def _edge_ended(self, broken: bool) -> None:
        """Nothing more comes from the edge: hand down the rest, then end the client, too."""
        if self.state not in CARRYING:
            return
        self.broken = broken and self.state is not LEAVING
        if self.broken:
            self.carrier.log("info", f"{self.target}: the edge broke off", event="reset",
                             listener=self.listener.address, client=self.address)
        self._watch_edge(0)
        self.edge.close()
        self.edge = None
        for queue in (self.carrier.graced, self.carrier.lingering):
            queue.drop(self)
        self.state = ENDING
        if self.deaf:
            self.close()
        elif self.rest:
            self._watch_client(WRITE, self.on_client)
        else:
            self._farewell()

    def _farewell(self) -> None:
        """The kernel has the client's last bytes.  A reset, or a close with unread bytes, would destroy them."""
        if self.broken and unsent(self.client):
            self._watch_client(0)
            self.carrier.settling.put(self)
            if self not in self.carrier.lingering.due:
                self.carrier.lingering.put(self)
            return
        if self.broken or self.ended:
            self.close()
            return
        try:
            self.client.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self.carrier.lingering.put(self)
        self._watch_client(READ, self.on_farewell)

    def on_farewell(self, mask: int) -> None:
        """Read and forget what the client still says."""
        if self.state is not ENDING:
            return
        try:
            if self.client.recv_into(self.carrier.buffer):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        """Let go of everything, once."""
        if self.state is CLOSED:
            return
        self.state = CLOSED
        try:
            for queue in self.carrier.queues:
                queue.drop(self)
            for sock in list(self.attempts):
                self._drop_attempt(sock)
            if self.edge is not None:
                self._watch_edge(0)
                self.edge.close()
        finally:  # whatever fault brought us here, the client is let go
            self._watch_client(0)
            if self.broken:
                reset(self.client)
            else:
                self.client.close()
            self.carrier.closed(self)

    # -- the selector

    def _rewatch(self) -> None:
        """Watch for what can be done now: this is the whole of backpressure."""
        if self.state not in CARRYING:
            return
        hears = READ if self.state is OPEN and not self.out else 0
        self._watch_client(hears | (WRITE if self.rest else 0), self.on_client)
        self._watch_edge((0 if self.rest else READ) | (WRITE if self.out else 0), self.on_edge)

    def _watch_client(self, events: int, act: Callable[[int], None] | None = None) -> None:
        self.client_events = self.carrier.watch(self.client, self.client_events, events, act)

    def _watch_edge(self, events: int, act: Callable[[int], None] | None = None) -> None:
        self.edge_events = self.carrier.watch(self.edge, self.edge_events, events, act)


class Names:
    """Resolves hostnames, one thread for each at a time, and remembers the addresses for a while."""

    def __init__(self, carrier: Carrier):
        self.carrier = carrier
        self.known: dict[tuple[str, int], tuple[list[tuple[int, Any]], float]] = {}
        self.waiting: dict[tuple[str, int], list[Connection]] = {}

    def ask(self, host: str, port: int, connection: Connection) -> None:
        """Call `connection.on_addresses`, at once or later.  Loop."""
        found, until = self.known.get((host, port), ([], 0.0))
        if until > time.monotonic():
            connection.on_addresses(found)
            return
        waiting = self.waiting.get((host, port))
        if waiting is not None:
            waiting.append(connection)
            return
        self.waiting[host, port] = [connection]
        try:
            threading.Thread(target=self._resolve, args=(host, port), name="name", daemon=True).start()
        except RuntimeError as error:
            self._found(host, port, OSError(str(error)))

    def _resolve(self, host: str, port: int) -> None:
        """Thread `name`."""
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found: Any = alternate(dict.fromkeys((row[0], row[4]) for row in rows))
        except UnicodeError:
            found = OSError(socket.EAI_NONAME, "it is no name")
        except OSError as error:
            found = error
        self.carrier.call(lambda: self._found(host, port, found))

    def _found(self, host: str, port: int, found: list[tuple[int, Any]] | OSError) -> None:
        """Hand the addresses to those who wait.  Loop."""
        now = time.monotonic()
        self.known = {place: row for place, row in self.known.items() if row[1] > now}
        if not isinstance(found, OSError):
            self.known[host, port] = found, now + RESOLVED_FOR
        for connection in self.waiting.pop((host, port)):
            try:
                connection.on_addresses(found)
            except Exception:
                self.carrier.fault(connection.close)


class Carrier:
    """The loop, and what all connections share.

    `headers` go into every upgrade.  `proxy` and `no_proxy` are what find_proxy gives.
    """

    def __init__(self, log: Log, headers: list[tuple[str, str]], proxy: Proxy | None, no_proxy: str):
        self.log = log
        self.headers = headers
        self.proxy = proxy
        self.no_proxy = no_proxy
        self.context = ssl.create_default_context()
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        # With TLS 1.2 an edge could have a send wait for its next word, while select says "go on".
        self.context.options |= ssl.OP_NO_RENEGOTIATION
        self.buffer = memoryview(bytearray(BUFFER))
        self.names = Names(self)
        self.listeners: dict[str, Listener] = {}
        self.connections: set[Connection] = set()
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if descriptors == resource.RLIM_INFINITY:
            descriptors = 1 << 20
        self.room = max(1, (descriptors - SPARE_FDS) // 2)
        self.paused = False  # accepting
        self.resume_at = float("inf")
        self.pause_said = -PAUSE_SAID
        self.failed = False  # a client could not be served
        self.stopping = False  # the loop is to end
        self.finished = False  # the connection between stdin and stdout has ended by itself
        self.dialling = Queue(DIAL_TIMEOUT, Connection.on_late)
        self.hurried = Queue(LINGER, Connection.on_hurry)
        self.staggered = Queue(STAGGER, Connection.connect)
        self.short = Queue(SHORT_OF_FDS, Connection.connect)
        self.stalled = Queue(STALL, Connection.on_stall)
        self.graced = Queue(GRACE, Connection.on_grace)
        self.lingering = Queue(LINGER, Connection.on_linger)
        self.settling = Queue(SETTLE, Connection._farewell)
        self.queues = (self.dialling, self.hurried, self.staggered, self.short, self.stalled, self.graced,
                       self.lingering, self.settling)
        self.calls: collections.deque[Callable[[], None]] = collections.deque()
        self.selector = selectors.DefaultSelector()
        self.wake_reader, self.wake_writer = socket.socketpair()
        for end in (self.wake_reader, self.wake_writer):
            end.setblocking(False)
        self.selector.register(self.wake_reader, READ, self._woken)

    # -- any thread ----------------------------------------------------------------------------

    def call(self, act: Callable[[], None]) -> None:
        """Have the loop do something."""
        self.calls.append(act)
        try:
            self.wake_writer.send(b"\0")
        except OSError:
            pass  # full: it is being woken already; closed: it has ended

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop` is called."""
        while not self.stopping:
            for key, mask in self.selector.select(self._timeout()):
                try:
                    key.data(mask)
                except Exception:
                    self.fault(key.data)
            self._do_what_is_due()
            self.log.flush()
        self.stop()
        self.selector.close()
        self.wake_reader.close()
        self.wake_writer.close()

    def fault(self, act: Any) -> None:
        """A fault of ours ends the connection that met it, and no other."""
        places = []
        trace = sys.exc_info()[2]
        while trace is not None:
            places.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
            trace = trace.tb_next
        self.log("error", "a fault in the carrier: please report it", event="fault",
                 error=f"{sys.exc_info()[1]!r} in {' > '.join(places[-5:])}")
        owner = getattr(getattr(act, "func", act), "__self__", None)
        if isinstance(owner, Connection):
            owner.broken = True
            owner.close()

    def stop(self) -> None:
        """End everything, the open connections too."""
        self.stopping = True
        for address in list(self.listeners):
            self.unlisten(address, 1001)
        for connection in list(self.connections):
            connection.close()

    def leave(self) -> None:
        """Stop, as a process that is about to end.

        Its ports stay its own until the kernel closes them: before that, nobody could tell a stranger
        who takes one from us.
        """
        for listener in self.listeners.values():
            with contextlib.suppress(OSError):  # no descriptor left
                os.dup(listener.sock.fileno())
        self.stop()

    def listen(self, target: Target, address: tuple[str, int]) -> Listener:
        """Open a listener; once this returns, clients can connect.  Raises OSError."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
        listener = Listener(target, sock, show_address(sock.getsockname()))
        self.listeners[listener.address] = listener
        if not self.paused:
            self.selector.register(sock, READ, functools.partial(self._accept, listener))
        self.log("info", f"listening on {listener.address} for {target}", event="listening", listener=listener.address)
        return listener

    def unlisten(self, address: str, code: int = 1000) -> None:
        """Close a listener and its connections; `code` is what the edge is told (RFC 6455 7.4.1)."""
        listener = self.listeners.pop(address)
        if not self.paused:
            self.selector.unregister(listener.sock)
        listener.sock.close()
        for connection in [c for c in self.connections if c.listener is listener]:
            if connection.state in CARRYING:
                connection._say_close(struct.pack(">H", code))
            connection.close()

    def proxy_for(self, target: Target) -> Proxy | None:
        """The proxy on the way to a target, if there is one."""
        if self.proxy is None or goes_direct(target.host, target.port, self.no_proxy):
            return None
        return self.proxy

    def next_hop(self, target: Target) -> Target | Proxy:
        """What to connect to."""
        return self.proxy_for(target) or target

    def add(self, listener: Listener, client: socket.socket, address: Any) -> None:
        """Serve one client."""
        connection = Connection(self, listener, client, address)
        self.connections.add(connection)
        connection.start()

    def _accept(self, listener: Listener, mask: int) -> None:
        """Take what waits."""
        for _ in range(ACCEPTS):
            if self.paused or listener.address not in self.listeners:
                return
            if len(self.connections) >= self.room:
                self._pause(f"{self.room} connections are open")
                return
            try:
                client, address = listener.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in CAPACITY_ERRNOS:
                    self._pause(error.strerror)
                    return
                continue  # that one has left already
            self.add(listener, client, address)

    def _pause(self, why: str) -> None:
        """Accept no more for now: who comes meanwhile waits in the backlog.

        Said again and again while that lasts, or whoever watches would take us for hung.
        """
        self.paused = True
        for listener in self.listeners.values():
            self.selector.unregister(listener.sock)
        now = time.monotonic()
        self.resume_at = now + PAUSE
        if now - self.pause_said >= PAUSE_SAID:
            self.pause_said = now
            self.log("warn", f"not accepting for now: {why}", event="paused")

    def _resume(self) -> None:
        self.paused = False
        self.resume_at = float("inf")
        for listener in self.listeners.values():
            self.selector.register(listener.sock, READ, functools.partial(self._accept, listener))

    def closed(self, connection: Connection) -> None:
        """A connection is over: there is room for another."""
        self.connections.discard(connection)
        if self.paused:
            self.resume_at = 0.0
        self.log("debug", f"{connection.target}: closed", event="end", listener=connection.listener.address,
                 client=connection.address, up=str(connection.up), down=str(connection.down))
        if connection.listener.sock is None and not self.stopping:
            self.stopping = self.finished = True

    def watch(self, sock: Any, before: int, events: int, act: Callable[[int], None] | None) -> int:
        """Change what a socket is watched for.  Returns `events`."""
        if before == events and (not events or self.selector.get_key(sock).data == act):
            return events
        if not events:
            self.selector.unregister(sock)
        elif before:
            self.selector.modify(sock, events, act)
        else:
            self.selector.register(sock, events, act)
        return events

    def _timeout(self) -> float | None:
        """Seconds until something is due; None for nothing."""
        due = [next(iter(queue.due.values())) for queue in self.queues if queue.due]
        if self.resume_at != float("inf"):
            due.append(self.resume_at)
        if self.log.lines:
            due.append(time.monotonic() + LOG_NAP)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if now >= self.resume_at:
            self._resume()
        for queue in self.queues:
            while queue.due:
                connection, due = next(iter(queue.due.items()))
                if due > now:
                    break
                queue.drop(connection)
                try:
                    queue.act(connection)
                except Exception:
                    self.fault(connection.close)

    def _woken(self, mask: int) -> None:
        """Do what other threads, or signals, asked for."""
        try:
            self.wake_reader.recv(4096)
        except BlockingIOError:
            pass
        while self.calls:
            act = self.calls.popleft()
            try:
                act()
            except Exception:
                self.fault(act)


# -- many hostnames ----------------------------------------------------------------------------


class Control:
    """Opens and closes listeners as stdin says; ends with it.

        listen 127.0.0.1:20000 db-1.example.com
        close 127.0.0.1:20000

    Each line is answered by one line of the log, with the listener's address as `listener` and, as
    `event`, `listening` or `closed`; a listener that could not be opened is `closed` with an `error`.
    """

    def __init__(self, carrier: Carrier):
        self.carrier = carrier
        self.part = b""
        try:
            carrier.selector.register(0, READ, self.on_input)
        except PermissionError:
            raise SettingsError("stdin cannot be waited for: give it a pipe") from None

    def on_input(self, mask: int) -> None:
        """Lines on stdin."""
        data = os.read(0, 65536)
        *lines, self.part = (self.part + data).split(b"\n")
        if len(self.part) > COMMAND_MAX:
            self.carrier.log("error", f"stdin: a line of more than {COMMAND_MAX} bytes", event="end")
        if not data or len(self.part) > COMMAND_MAX:
            self.carrier.leave()
            return
        for line in lines:
            try:
                self.obey(line.decode("ascii", "replace").split())
            except Exception:
                self.carrier.fault(self.obey)

    def obey(self, words: list[str]) -> None:
        """One line."""
        carrier = self.carrier
        try:
            if not words:
                return
            if len(words) == 3 and words[0] == "listen":
                carrier.listen(parse_target(words[2]), parse_listen(words[1]))
            elif len(words) == 2 and words[0] == "close" and words[1] in carrier.listeners:
                carrier.unlisten(words[1])
                carrier.log("info", f"closed {words[1]}", event="closed", listener=words[1])
            else:
                raise ValueError("it is neither `listen ADDRESS HOSTNAME` nor `close ADDRESS`")
        except (OSError, ValueError) as error:
            why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
            carrier.log("error", f"cannot do {' '.join(words)}", event="closed",
                        listener=words[1] if len(words) > 1 else "", error=why)


# -- commands ----------------------------------------------------------------------------------


def copy(reader: Callable[[int], bytes], writer: Callable[[bytes], Any], end: Callable[[], Any]) -> None:
    """From one to the other, in a thread of its own."""
    try:
        while data := reader(65536):
            writer(data)
    except OSError:
        pass  # nobody reads, or the connection is over
    finally:
        try:
            end()
        except OSError:
            pass


def write_stdout(data: bytes) -> None:
    while data:
        data = data[os.write(1, data):]


def bridge(carrier: Carrier, target: Target) -> int:
    """One connection between stdin and stdout.  1 where the edge could not be reached."""
    ours, theirs = socket.socketpair()
    with theirs:
        threading.Thread(target=copy, args=(lambda size: os.read(0, size), theirs.sendall,
                                            lambda: theirs.shutdown(socket.SHUT_WR)), daemon=True).start()
        output = threading.Thread(target=copy, daemon=True, args=(theirs.recv, write_stdout,
                                                                  lambda: theirs.shutdown(socket.SHUT_RDWR)))
        output.start()
        carrier.add(Listener(target), ours, None)
        carrier.run()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if carrier.finished:  # else it was told to end, and stdout may never take what is left
            output.join()
    return 1 if carrier.failed else 0


def parse_words(words: list[str], environ: Mapping[str, str]) -> Any:
    """The options of `access tcp`: cloudflared's names.  Raises SettingsError; exits for --help and wrong usage."""
    import argparse  # a megabyte that the other commands do without

    parser = argparse.ArgumentParser(
        prog="sniroute_carrier.py access tcp", allow_abbrev=False,
        description="Carries TCP to a hostname behind a Cloudflare tunnel, as `cloudflared access tcp` does.",
        epilog="Secrets belong in the environment: TUNNEL_SERVICE_TOKEN_ID, TUNNEL_SERVICE_TOKEN_SECRET, or "
               "CF_ACCESS_TOKEN (what `cloudflared access token` prints). Also read: TUNNEL_SERVICE_HOSTNAME, "
               "TUNNEL_SERVICE_URL, TUNNEL_SERVICE_DESTINATION, TUNNEL_LOG_OUTPUT=json, HTTPS_PROXY, NO_PROXY, "
               "SSL_CERT_FILE, SSL_CERT_DIR.")
    parser.add_argument("--hostname", "-T", "--tunnel-host", metavar="HOST", help="the application's hostname")
    parser.add_argument("--url", "-L", "--listener", metavar="HOST:PORT",
                        help="where to listen; without it, one connection between stdin and stdout")
    parser.add_argument("--destination", metavar="HOST:PORT", help="what a bastion is to connect to")
    parser.add_argument("--header", "-H", metavar="NAME:VALUE", action="append", default=[],
                        help="one more header for the edge; repeatable")
    parser.add_argument("--service-token-id", "--id", metavar="ID", help="of an Access service token")
    parser.add_argument("--service-token-secret", "--secret", metavar="SECRET", help="seen by all users of the host")
    parser.add_argument("--loglevel", "--log-level", choices=LEVELS, default="info", help="info by default")
    given = parser.parse_args(words)
    wrong = []
    for option, parse, variable in (("hostname", parse_target, "TUNNEL_SERVICE_HOSTNAME"),
                                    ("url", parse_listen, "TUNNEL_SERVICE_URL")):
        text = getattr(given, option)
        source = f"--{option}" if text else variable
        text = text or environ.get(variable)
        try:
            setattr(given, option, parse(text) if text else None)
        except ValueError as error:
            wrong.append(f"{source}: {error}")
    if not given.hostname and not wrong:
        wrong.append("--hostname is missing (or TUNNEL_SERVICE_HOSTNAME)")
    try:
        given.header = [parse_header(text) for text in given.header]
    except ValueError as error:
        wrong.append(f"--header: {error}")
    if wrong:
        raise SettingsError("\n".join(wrong))
    return given


def access(words: list[str], environ: Mapping[str, str]) -> int:
    """`access tcp`."""
    given = parse_words(words, environ)
    carrier = make_carrier(given.loglevel, given.header + identity(environ, vars(given)), environ)
    if given.url is None:
        return bridge(carrier, given.hostname)
    try:
        carrier.listen(given.hostname, given.url)
    except OSError as error:
        carrier.log("error", f"cannot listen on {show_address(given.url)}: {(error.strerror or str(error)).lower()}")
        return 1
    carrier.run()
    return 0


def forwarders(words: list[str], environ: Mapping[str, str]) -> int:
    """`forwarders`, which has no options: what varies comes by stdin, what does not by the environment."""
    if words:
        raise SettingsError(f"unexpected {printable(words[0])!r}")
    carrier = make_carrier("info", identity(environ, {}), environ)
    Control(carrier)
    carrier.run()
    return 0


def make_carrier(level: str, headers: list[tuple[str, str]], environ: Mapping[str, str]) -> Carrier:
    """A Carrier with its settings, which ends at SIGTERM and SIGINT.  Raises SettingsError."""
    proxy, no_proxy = find_proxy(environ)
    trusted = environ.get("SSL_CERT_FILE")
    if trusted and not os.access(trusted, os.R_OK):
        raise SettingsError(f"SSL_CERT_FILE: {trusted} cannot be read")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass  # macOS has a lower limit of its own; a sandbox may forbid it
    carrier = Carrier(Log(level, environ.get("TUNNEL_LOG_OUTPUT") == "json"), headers, proxy, no_proxy)
    if trusted and not carrier.context.cert_store_stats()["x509"]:
        raise SettingsError(f"SSL_CERT_FILE: there is no certificate in {trusted}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: carrier.call(carrier.leave))
    return carrier


USAGE = """\
usage: sniroute_carrier.py access tcp --hostname HOST [--url HOST:PORT] [options]
       sniroute_carrier.py access tcp --help
       sniroute_carrier.py forwarders          told on stdin what to listen for, as sniroute does
       sniroute_carrier.py --version

Does what `cloudflared access tcp` does; instead of tcp, ssh, rdp and smb mean the same.
"""
HELP = (["-h"], ["--help"], ["access", "-h"], ["access", "--help"], ["forwarders", "-h"], ["forwarders", "--help"])
COMMANDS = {("access", kind): access for kind in ("tcp", "ssh", "rdp", "smb")} | {("forwarders",): forwarders}


def main() -> int:
    """The command line.  Returns the exit code: 0 clean, 1 failed, 2 wrong settings."""
    for fd in range(3):  # one that is closed would become a socket's, and the log would go there
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    words = sys.argv[1:]
    if words in (["--version"], ["-v"], ["version"]):
        print(f"sniroute_carrier {__version__} (Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION})")
        return 0
    if words in HELP:
        print(USAGE, end="")
        return 0
    for command, run in COMMANDS.items():
        if tuple(words[:len(command)]) == command:
            try:
                return run(words[len(command):], os.environ)
            except SettingsError as error:
                for line in str(error).split("\n"):
                    print(f"sniroute_carrier: {line}", file=sys.stderr)
                return 2
    print(USAGE, end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
