"""sniroute: one TCP port in front of many private TLS services.

A client connects with TLS; sniroute reads the name it asks for (SNI) without decrypting
anything, starts the tunnel that leads to that name if none is up, and passes bytes both ways.

    psql "host=db-123.example.com port=19000 sslmode=require"
          |  [PROXY header] [GSSENCRequest] [SSLRequest] ClientHello(db-123.example.com)
          v
    listener --- Prelude --- Routes --- Scheme --- Flow up, Flow down --- backend
     accept      who asks    pattern    how to      bytes, both ways       127.0.0.1:20000 (a tunnel)
                 for what    -> target  get there                          or any HOST:PORT

The one idea: waiting borrows a thread, moving bytes does not.  `Router` is a
`socketserver.ThreadingTCPServer`, but what is ready runs in one loop over epoll.  Only a *name*
that has to wait (a tunnel that starts, a host to resolve) gets a thread from `ThreadingMixIn`;
its clients park behind it, cost no thread, and are handed back to the loop with it.

Threads.
    main      settings, signals, start and stop, the hand-over to a successor: class Daemon.  Never touches
              a client's socket.
    loop      accept, read, route, dial, speak, pump, deadlines.  Waits for nothing: no DNS, no disk.
    wait-<n>  one for each target that waits, at most WAIT_THREADS, one started in a turn.  Touches
              no socket of a client.
    reaper    all child processes: see sniroute_tunnels.
    log       formats and writes log lines, so that a stuck log never stops traffic.
    (and those of sniroute_admin.py, where --admin asks for it: they read, and ask through `Router.call`)
Locks: this file makes one, Daemon.reloading, for reloads only (logging has one, held while a line is queued;
the dump for SIGUSR1 takes the tunnels').  Threads hand things to the loop by `Router.call` (a deque and a byte in a
pipe), to `log` likewise; the exceptions are single assignments: `Router.resolved`, filled by wait-<n>, what
a reload leaves in `Router.last_reload`, `Router.reloads` and the TunnelTable, and `Router.endings`, which the
admin sets.  `Router.counters` is written by the loop only, `TunnelTable.counters` by the reaper.

The life of a connection is `Connection.state`:

    PRELUDE -> ROUTED -> (PARKED -> ROUTED ->) DIALING -> (GREETING ->) OPEN -> (LINGERING ->) CLOSED
      PRELUDE    one deadline from accept on, however many packets it takes
      ROUTED     its name is known, and it is dialled in the same turn of the loop
      DIALING    over by the end of the turn where the connect succeeds at once, as to a tunnel
      any        -> PARKED, once: a tunnel failed before either side said more than the hello; the
                 same bytes are sent again, and the client never notices
      LINGERING  after a refusal or a backend's reset: the client may still read

A turn of the loop: what is ready is called back, deadlines are looked at, ends are passed on; then
the connections of this turn take each step together: all that were accepted are read, all that are
routed dial, all that have dialled speak.  So a backend is woken once for many of them, and not for
each: a fifth of the CPU of a connection.

Seams: I want to ...
    read another prelude          a parser (pure), a method of Prelude that calls it, and its row in
                                  Prelude.OPENERS
    add a kind of target          a row in SCHEMES
    run another tunnel program    a Launcher row in `tunnel_launchers`, and a row in SCHEMES with
                                  tunnel_ready and tunnel_prepare
    add a setting                 a row in SETTINGS: it makes the option, the variable, the key in the file
                                  and the help; what a reload changes is in Daemon._adopt and Router.adopt
    add an option of a route      a field of Route, and its row in ROUTE_OPTIONS
    test another hard case        a row in SELF_TESTS
    show or steer it otherwise    attach(router, settings) of another file, called in Daemon._attach
    refuse for another reason     a row in REFUSALS, and in the README: a test compares them
    feed routes from elsewhere    build a Routes and assign it to Router.routes: it is swapped whole

What it does not do: decrypt, look at anything behind the ClientHello, or treat a name as proof
of who asks.  SNI is not authentication.
"""

from __future__ import annotations

import os
import sys

AS_MODULE = ("import os, sys; del sys.argv[0]; sys.path.insert(0, os.path.dirname(sys.argv[0])); "
             "import sniroute; sys.exit(sniroute.main())")
if __name__ == "__main__" and __spec__ is None and os.path.basename(os.path.realpath(__file__)) == "sniroute.py":
    # Python keeps the syntax tree of a script for as long as the script runs: 6 MB for this one, a
    # quarter of the process.  A module's is freed, so the same process goes on as one (same pid).
    flags = sys.orig_argv[1:len(sys.orig_argv) - len(sys.argv)]
    os.execv(sys.executable, [sys.executable, *flags, "-P", "-c", AS_MODULE, os.path.realpath(__file__), *sys.argv[1:]])

import argparse
import collections
import contextlib
import errno
import functools
import gc
import io
import ipaddress
import itertools
import json
import logging
import re
import resource
import select
import selectors
import shlex
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import threading
import time
import types
from typing import Any, Callable, Iterable, NamedTuple, NoReturn, Sequence

import fcntl

from sniroute_launchers import TUNNEL_IDENTITY, Launcher, Reason, TunnelError, carrier_launcher, cloudflared_launcher
from sniroute_log import Ending, Journal
from sniroute_loop import READ, WRITE, EpollPoller, Poller
from sniroute_names import HOST, __version__, is_local, is_number, normalise, parse_host_port, printable, show_address
from sniroute_processes import Child
from sniroute_refusals import (DECODE_ERROR, ILLEGAL_PARAMETER, PROTOCOL_VERSION,
                               REFUSALS, UNEXPECTED_MESSAGE, UNRECOGNIZED_NAME, Malformed, Refused, SettingsError,
                               POSTGRES, NOTHING, TLS, told, tls_alert, tunnel_refused)
from sniroute_tunnels import Tunnel, TunnelTable

log = logging.getLogger("sniroute")
monotonic = time.monotonic
new_tuple = tuple.__new__  # makes a NamedTuple without a call into Python: half a microsecond; give it all fields

# Limits, each with its reason.  Sizes in bytes, times in seconds.
RECORD_MAX = 16384  # RFC 8446 5.1: a plaintext record holds no more
HELLO_MAX = 16384  # what BoringSSL and Envoy accept; a post-quantum hello is about 2 KB
HELLO_WIRE_MAX = 32768  # the same in small records: each costs five bytes more
PROXY_V1_MAX = 107  # PROXY protocol 2.1: the longest line, CRLF included
PROXY_V2_MAX = 4096  # nginx's limit; real headers with TLVs stay far below
STARTUP_MAX = 10004  # PostgreSQL's own limit for a startup packet
ACCEPTS = 16  # connections taken from a listener in one turn, so that the rest is served too; more is no cheaper
BACKLOG = 4096  # the kernel caps it at somaxconn; 5 or 128 lose a burst
PAUSE_SAID = 10.0  # between two log lines about that, however often it happens
ACCEPT_PAUSE = 0.1  # when descriptors are short: an accept loop that spins burns a core
PRELUDES_MAX = 1024  # clients that have not said their name yet; over it the oldest goes
LINGER = 0.5  # a refused client may read its alert this long before the close
CONNECT_TIMEOUT = 5.0  # for each address of a backend
GREETING_TIMEOUT = 20.0  # for a backend's answer to SSLRequest; a tunnel dials its far end meanwhile
FIRST_BYTE_TIMEOUT = 20.0  # a tunnel without an answer to the hello by then does not work; the carrier gives up at 15
WORDS_TIMEOUT = 0.05  # a tunnel has failed: its words are on their way from one process to another
TRIAL_TIMEOUT = 30.0  # `explain` waits so long for a carrier, which gives up at 15 by itself
SWEEP_LAST = 30.0  # between two looks for connections that nothing else would end
HALF_CLOSED_IDLE = 3600.0  # one side gone, the other silent: nobody will end this but we
WAIT_THREADS = 32  # targets that wait on a thread at once; --max-starting lets even fewer start
WAITS_PER_CLIENT = 8  # targets of one client address that still wait for a thread
WAITS_MAX = 1024  # targets that wait, with a thread or for one: a crowd of names, each good for one refusal
PARKS_MAX = 3  # times a connection may wait: its tunnel could be evicted as often as it comes up
RESOLVED_FOR = 30.0  # a resolved address; getaddrinfo does not tell its TTL
RESOLVED_MAX = 1024  # resolved hosts kept: names may come from strangers
ADDRESSES_MAX = 4  # addresses of one host that are tried
NAMES_MAX = 1024  # server_name extensions remembered: most are seen again
SHAPES_MAX = 512  # shapes of hellos remembered, 3 KB each: one for each length; who is as long takes the place
LEARN_EVERY = 16  # of so many hellos of unknown shape one is remembered: it takes 3 to 5 times as long as to read it
EXTENSIONS_MAX = 32  # in a hello whose shape is remembered: browsers have about 20, and 900 would fit
DECISIONS_MAX = 4096  # routed names remembered: names come from strangers
PEERS_MAX = 4096  # client addresses in memory before those without a connection are dropped
BULK = 1 << 20  # bytes moved in one go: a fifth to a third less CPU for a gigabyte than with 256 KiB
FEW = 512 - sys.getsizeof(b"")  # bytes read in one go while messages are small: more is malloc's, 5 % of a message
FEW_AFTER = 32  # so many small ones in a row: a larger one then takes two reads, which cost what 16 save
MESSAGE = 1 << 12  # bytes read in one go; what is more is spliced, where that can be done ...
READ_MAX = 1 << 16  # ... and read in larger pieces where not
SMALL = 1 << 14  # in the place of both while many clients do not read: what they leave has to be kept
PENDING_MAX = 1 << 22  # bytes copied out for full sinks (not those in lent pipes), before SMALL applies
PIPES_MAX = 32  # pipes lent to flows whose sink would block: 1 MiB and two descriptors each
GC_THRESHOLD = 20000  # objects between two looks for cycles: connections leave none
SWITCH_INTERVAL = 0.0005  # so long may another thread keep the interpreter while the loop wants it
DUMP_MAX = 200  # connections, and tunnels, in a dump
KEEPALIVE = (60, 15, 4)  # idle, interval, count: a dead peer is found in two minutes
STATUS_EVERY = 10.0  # between two words to systemd about how it stands; the watchdog may want more
STOP_TIME = 20.0  # what the end takes at most, once all has drained: TERM, KILL, and the tunnels' last words
LISTEN_FDS_START = 3  # sd_listen_fds(3)
SELF_TEST_TIME = 9.0  # for all of `selftest`: a case that hangs takes less than what is left
HANDOVER_TIMEOUT = 5.0  # for all that predecessors have, and for a last word: all of them are on this host
OFFER_AGAIN = 5.0  # between two tries to get a name that another process has
ADMIN_TIMEOUT = 5.0  # for what `explain` asks of a running router
HANDOVER_MAX = 253  # sockets in one message: the kernel's SCM_MAX_FD; an address needs two
SPARE_FDS = 400  # descriptors for 101 tunnels (three each), the pipes, listeners and the log
UNIX_PATH_MAX = 90  # sun_path of unix(7) has 108 bytes, or 104; some are for the name it has before it is ready
TUNNEL_MEMORY = 64 << 20  # memory of the host for each process of a tunnel program: cloudflared takes about 28 MB

PRELUDE, ROUTED, PARKED, DIALING, GREETING = "prelude", "routed", "parked", "dialing", "greeting"
OPEN, LINGERING, CLOSED = "open", "lingering", "closed"
CHATTY, BULKY, BLOCKED, DONE = "chatty", "bulky", "blocked", "done"  # states of a Flow, beside OPEN
RUNNING, DRAINING, STOPPED = "running", "draining", "stopped"  # of the Router

# errno values of accept() that mean "not now": pause, then go on.
CAPACITY_ERRNOS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))

# errno values of send() and connect() that mean "the connect is not over"; the last is BSD's.
NOT_CONNECTED = frozenset((errno.EAGAIN, errno.EALREADY, errno.EINPROGRESS, errno.ENOTCONN))


# -- wire formats ------------------------------------------------------------------------------


class Hello(NamedTuple):
    """A TLS ClientHello."""

    name: str | None  # the host_name it asks for, normalised; None where it names none
    alpn_data: bytes | None  # the body of its ALPN extension
    end: int  # bytes on the wire up to its last one

    @property
    def alpn(self) -> list[bytes] | None:
        """The protocols it offers (RFC 7301 3.1); None for none, or for a list that is broken."""
        data = self.alpn_data
        if data is None or len(data) < 2 or int.from_bytes(data[:2], "big") != len(data) - 2:
            return None
        names, at = [], 2
        while at < len(data):
            end = at + 1 + data[at]
            if end > len(data) or end == at + 1:
                return None
            names.append(data[at + 1:end])
            at = end
        return names or None


TLS_HANDSHAKE = 22  # RFC 8446 5.1, ContentType
CLIENT_HELLO = 1  # RFC 8446 4, HandshakeType
HELLO_MIN = 41  # version, random, empty session id, one cipher suite, one compression method
SERVER_NAME, ALPN = 0, 16  # extension types, RFC 6066 3 and RFC 7301 3.1
_two_shorts = struct.Struct(">HH").unpack_from
_short = struct.Struct(">H").unpack_from
_hello_header = struct.Struct(">BBBHBBH").unpack_from  # of a record, and of the handshake message in it


class Shape(NamedTuple):
    """How a hello is framed: each length and type in it.

    With the version, which is in its key, that is all that `parse_client_hello` judges but the name itself; and a
    program's next hello for a name as long has the same again: only random bytes, keys, tickets and the name are
    others.  So it need not be walked through, and its name stands where the last one stood.  (A browser that
    shuffles its extensions gains nothing.)
    """

    end: int  # bytes on the wire
    framing_of: Callable[[bytes, int], tuple[bytes, ...]]  # a struct's: lengths and types in such a hello, from KEY on
    framing: tuple[bytes, ...]  # what they have to be
    name: slice  # where a server_name extension stands
    alpn: slice | None


def shape_of(hello: bytes) -> Shape | None:
    """The shape of a whole hello in one record that has a name, and has been parsed; None for one too odd to keep."""
    layout, at = ["32x"], KEY + 32  # the random bytes, RFC 8446 4.1.2
    for width in (1, 2, 1):  # session id, cipher suites, compression methods
        size = int.from_bytes(hello[at:at + width], "big")
        layout.append(f"{width}s{size}x")
        at += width + size
    layout.append("2s")  # the length of all extensions
    at += 2
    bodies = {}
    while at < len(hello):
        kind, size = _two_shorts(hello, at)
        bodies[kind] = slice(at + 4, at + 4 + size)
        layout.append(f"4s{size}x")
        at += 4 + size
        if len(bodies) > EXTENSIONS_MAX:
            return None
    framing_of = struct.Struct("".join(layout)).unpack_from
    return Shape(len(hello), framing_of, framing_of(hello, KEY), bodies[SERVER_NAME], bodies.get(ALPN))


KEY = 11  # bytes of both headers and the version: what begins a hello, and what its shape is found by
SHAPES: dict[bytes, Shape] = {}  # of hellos that were parsed.  Loop only
unknown_hellos = itertools.count(1)


def learn_shape(hello: bytes) -> None:
    """Remember the shape of one in LEARN_EVERY, in the place of another one as long, or of the oldest.

    So a crowd of shapes that never come again costs little, and keeps nobody's out for long.
    """
    if next(unknown_hellos) % LEARN_EVERY:
        return
    shape = shape_of(hello)
    if shape is not None:
        SHAPES.pop(hello[:KEY], None)  # what is learnt again is the newest
        if len(SHAPES) >= SHAPES_MAX:
            del SHAPES[next(iter(SHAPES))]
        SHAPES[hello[:KEY]] = shape


def whole_hello(data: bytes) -> Hello | None:
    """The hello that `data` begins with, where it is all there and in one record, as nearly always.

    None says nothing but that: HelloReader has to look.  Raises Malformed.
    """
    shape = SHAPES.get(data[:KEY])
    if shape is not None:
        end, framing_of, framing, name, alpn = shape
        if len(data) >= end and framing_of(data, KEY) == framing:  # a third of what it takes to read it all
            return new_tuple(Hello, (parse_server_name(data[name]), data[alpn] if alpn is not None else None, end))
    if len(data) <= 9:
        return None
    first, major, _, length, kind, high, size = _hello_header(data)
    end = 9 + size
    if first != TLS_HANDSHAKE or major != 3 or kind != CLIENT_HELLO or high \
            or not HELLO_MIN + 4 <= size + 4 <= length <= RECORD_MAX or len(data) < end:
        return None
    name, alpn = parse_client_hello(data[9:end])
    if name is not None:
        learn_shape(data[:end])
    return new_tuple(Hello, (name, alpn, end))


class HelloReader:
    """Joins the ClientHello of one connection from its records; keeps its place between calls.

    So a hello that comes byte by byte, in records of one byte, costs linear time.
    """

    __slots__ = ("at", "left", "message")

    def __init__(self) -> None:
        self.at = 0  # the next byte of the wire
        self.left = 0  # of the record that `at` is in
        self.message = bytearray()

    def read(self, data: bytes | bytearray) -> Hello | None:
        """Parse `data`, which is what earlier calls were given and more.

        Raises Malformed.  RFC 8446 5.1 and 4.1.2; one rule is stricter than OpenSSL's: an empty
        handshake record, which the RFC forbids, is refused.
        """
        if not self.at:
            hello = whole_hello(bytes(data))
            if hello is not None:
                return hello
        message = self.message
        received = len(data)
        while True:
            if not self.left:
                if not self._record(data):
                    return None
            taken = min(self.left, received - self.at)
            message += data[self.at:self.at + taken]
            self.at += taken
            self.left -= taken
            if message and message[0] != CLIENT_HELLO:
                raise Malformed(f"handshake message of type {message[0]}, not a ClientHello", UNEXPECTED_MESSAGE)
            if len(message) >= 4:
                size = int.from_bytes(message[1:4], "big")
                if not HELLO_MIN <= size <= HELLO_MAX:
                    raise Malformed(f"a ClientHello of {size} bytes", DECODE_ERROR)
                more = len(message) - 4 - size
                if more >= 0:
                    if self.at - more > HELLO_WIRE_MAX:
                        raise Malformed(f"a ClientHello over {HELLO_WIRE_MAX} bytes of records", DECODE_ERROR)
                    name, alpn = parse_client_hello(bytes(message[4:4 + size]))
                    return Hello(name, alpn, self.at - more)
            if self.at >= HELLO_WIRE_MAX:
                raise Malformed(f"a ClientHello over {HELLO_WIRE_MAX} bytes of records", DECODE_ERROR)
            if self.left:  # the rest of this record is still to come
                return None

    def _record(self, data: bytes | bytearray) -> bool:
        """Step over a record header; False where it is not complete."""
        header = data[self.at:self.at + 5]
        if header:
            if header[0] != TLS_HANDSHAKE:
                raise Malformed(f"a TLS record of type {header[0]} in the hello", UNEXPECTED_MESSAGE)
            if len(header) > 1 and header[1] != 3:
                raise Malformed(f"not TLS (record version {header[1]})", kind="not_tls")
        if len(header) < 5:
            return False
        length = _short(header, 3)[0]
        if not 0 < length <= RECORD_MAX:
            raise Malformed(f"a TLS record of {length} bytes", DECODE_ERROR)
        self.left = length
        self.at += 5
        return self.at < len(data)


def parse_client_hello(body: bytes) -> tuple[str | None, bytes | None]:
    """The name and the raw ALPN extension in the body of a ClientHello (RFC 8446 4.1.2).

    The framing is checked all the way, so that the name read here is the one that the backend's
    TLS reads: one host_name, no extension twice.  Raises Malformed.
    """
    if body < b"\x03\x01":  # SSL 3.0 and older have no extensions; 3.1 and later negotiate elsewhere
        raise Malformed(f"TLS version {body[0]}.{body[1]}", PROTOCOL_VERSION)
    total = len(body)
    session_end = 35 + body[34]
    if body[34] > 32 or session_end + 2 > total:
        raise Malformed("a bad session id", DECODE_ERROR)
    suites = _short(body, session_end)[0]
    at = session_end + 2 + suites
    if not suites or suites % 2 or at >= total:
        raise Malformed("bad cipher suites", DECODE_ERROR)
    methods = body[at]
    at += 1 + methods
    if not methods or at > total:
        raise Malformed("bad compression methods", DECODE_ERROR)
    if at == total:
        return None, None
    if at + 2 > total or at + 2 + _short(body, at)[0] != total:
        raise Malformed("extensions that do not fill the hello", DECODE_ERROR)
    at += 2
    places: dict[int, int] = {}  # extension type -> where its header stands
    while at + 4 <= total:
        kind, size = _two_shorts(body, at)
        if kind in places:
            raise Malformed(f"extension {kind} twice", ILLEGAL_PARAMETER)
        places[kind] = at
        at += 4 + size
    if at != total:
        raise Malformed("an extension that goes past the hello", DECODE_ERROR)
    name = alpn = None
    if SERVER_NAME in places:
        at = places[SERVER_NAME]
        name = parse_server_name(body[at + 4:at + 4 + _short(body, at + 2)[0]])
    if ALPN in places:
        at = places[ALPN]
        alpn = body[at + 4:at + 4 + _short(body, at + 2)[0]]
    return name, alpn


@functools.lru_cache(maxsize=NAMES_MAX)
def parse_server_name(names: bytes) -> str:
    """The host_name of a server_name extension, RFC 6066 3, normalised.  Raises Malformed.

    Implementations differ on lists with more than one entry, so only one is accepted.
    """
    if len(names) < 5 or _short(names, 0)[0] != len(names) - 2:
        raise Malformed("a server_name list of the wrong length", DECODE_ERROR)
    kind, size = names[2], _short(names, 3)[0]
    if kind != 0:
        raise Malformed(f"a server_name of type {kind}", DECODE_ERROR)
    if not size or 5 + size > len(names):
        raise Malformed("a server_name of the wrong length", DECODE_ERROR)
    if 5 + size < len(names):
        raise Malformed("more than one server_name", ILLEGAL_PARAMETER)
    return normalise(names[5:])


class ProxyHeader(NamedTuple):
    """A PROXY protocol header (the specification of haproxy.org, versions 1 and 2)."""

    size: int  # bytes on the wire
    source: ipaddress.IPv4Address | ipaddress.IPv6Address | None  # None: UNKNOWN or LOCAL
    port: int
    destination: tuple[str, int] | None = None  # where the client connected to


PROXY_V1 = b"PROXY "
PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n"
PROXY_PORT = re.compile(rb"0|[1-9][0-9]{0,4}")
PROXY_FAMILIES = {b"TCP4": ipaddress.IPv4Address, b"TCP6": ipaddress.IPv6Address}


def parse_proxy_v1(data: bytes) -> ProxyHeader | None:
    """A version 1 header, PROXY protocol 2.1: one line of text.  Raises Malformed."""
    end = data.find(b"\r\n", 0, PROXY_V1_MAX)
    if end < 0:
        line = data[:PROXY_V1_MAX]
        if len(line) == PROXY_V1_MAX:
            raise Malformed("a PROXY line without an end", kind="proxy")
        if not line.startswith(PROXY_V1[:len(line)]) or b"\n" in line or b"\r" in line[:-1] or b"\0" in line:
            raise Malformed("a broken PROXY line", kind="proxy")
        return None
    word, *fields = data[:end].split(b" ")
    if word != b"PROXY" or not fields or b"\n" in data[:end] or b"\r" in data[:end] or b"\0" in data[:end]:
        raise Malformed("a broken PROXY line", kind="proxy")
    if fields[0] == b"UNKNOWN":
        return ProxyHeader(end + 2, None, 0)
    try:
        family, source, destination, source_port, destination_port = fields
        address = PROXY_FAMILIES[family]
        sender = address(proxy_address(source))
        target = address(proxy_address(destination))
    except (ValueError, KeyError):
        raise Malformed("a PROXY line with bad addresses", kind="proxy") from None
    for port in (source_port, destination_port):
        if not PROXY_PORT.fullmatch(port) or int(port) > 65535:
            raise Malformed("a PROXY line with a bad port", kind="proxy")
    return ProxyHeader(end + 2, sender, int(source_port), (str(target), int(destination_port)))


def proxy_address(field: bytes) -> str:
    """The text of an address field.  Raises ValueError for what ipaddress would let through."""
    text = field.decode("ascii")
    if "%" in text:
        raise ValueError("a scope is not part of an address")
    return text


PROXY_ADDRESSES = {0: 0, 1: 12, 2: 36, 3: 216}  # bytes for each family: UNSPEC, INET, INET6, UNIX
TLV_AUTHORITY, TLV_CRC32C, TLV_UNIQUE_ID, TLV_SSL = 0x02, 0x03, 0x05, 0x20


def parse_proxy_v2(data: bytes) -> ProxyHeader | None:
    """A version 2 header, PROXY protocol 2.2: binary, with TLVs behind the addresses.

    LOCAL is skipped whatever it carries; PROXY has to be TCP over IPv4 or IPv6, and its TLVs have
    to fit and to be right, the checksum included.  Raises Malformed.
    """
    if not data.startswith(PROXY_V2[:len(data)]):
        raise Malformed("a broken PROXY signature", kind="proxy")
    if len(data) < 16:
        return None
    version, command = divmod(data[12], 16)
    family, protocol = divmod(data[13], 16)
    length = _short(data, 14)[0]
    size = 16 + length
    if version != 2 or command > 1:
        raise Malformed(f"PROXY version {version} command {command}", kind="proxy")
    if size > PROXY_V2_MAX:
        raise Malformed(f"a PROXY header of {size} bytes", kind="proxy")
    if command == 1:
        if family not in (1, 2) or protocol != 1:
            raise Malformed(f"PROXY family {family} protocol {protocol}: TCP over IP is needed", kind="proxy")
        if length < PROXY_ADDRESSES[family]:
            raise Malformed("a PROXY header too short for its addresses", kind="proxy")
    if len(data) < size:
        return None
    if command == 0:
        return ProxyHeader(size, None, 0)
    header = bytes(data[:size])
    check_proxy_tlvs(header, 16 + PROXY_ADDRESSES[family])
    address, width = (ipaddress.IPv4Address, 4) if family == 1 else (ipaddress.IPv6Address, 16)
    ports = 16 + 2 * width
    destination = str(address(header[16 + width:ports])), _short(header, ports + 2)[0]
    return ProxyHeader(size, address(header[16:16 + width]), _short(header, ports)[0], destination)


def read_tlvs(data: bytes, at: int) -> list[tuple[int, int, bytes]]:
    """(type, place of the value, value) of TLVs that fill `data` from `at`.  Raises Malformed."""
    found = []
    while at < len(data):
        value = at + 3
        if value > len(data) or value + _short(data, at + 1)[0] > len(data):
            raise Malformed("a PROXY TLV that goes past its end", kind="proxy")
        size = _short(data, at + 1)[0]
        found.append((data[at], value, data[value:value + size]))
        at = value + size
    return found


def check_proxy_tlvs(header: bytes, at: int) -> None:
    """Refuse TLVs that a strict receiver behind us would refuse.  PROXY protocol 2.2.1 to 2.2.7."""
    checksums = 0
    for kind, place, value in read_tlvs(header, at):
        wrong = False
        if kind == TLV_AUTHORITY:
            try:
                wrong = len(value) > 255 or not value.decode("utf-8").isprintable()
            except UnicodeDecodeError:
                wrong = True
        elif kind == TLV_UNIQUE_ID:
            wrong = len(value) > 128
        elif kind == TLV_SSL:
            wrong = len(value) < 5
            read_tlvs(value, 5)
        elif kind == TLV_CRC32C:
            checksums += 1
            wrong = checksums > 1 or len(value) != 4 or \
                crc32c(header[:place] + bytes(4) + header[place + 4:]) != int.from_bytes(value, "big")
        if wrong:
            raise Malformed(f"a bad PROXY TLV {kind:#04x}", kind="proxy")


@functools.cache
def crc32c_table() -> list[int]:
    """The 256 remainders of CRC-32C, made when the first checksum comes."""
    table = []
    for remainder in range(256):
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
        table.append(remainder)
    return table


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), RFC 3309; crc32c(b"123456789") is e3069283."""
    table, crc = crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def proxy_v1(source: tuple[str, int] | None, destination: tuple[str, int]) -> bytes:
    """A version 1 header (PROXY protocol 2.1) for a connection from `source` to `destination`, both (host, port).

    Without a source, UNKNOWN.  Raises ValueError where a host is no address.
    """
    if source is None:
        return PROXY_V1 + b"UNKNOWN\r\n"
    (sender, receiver), version = proxy_ends(source, destination)
    return PROXY_V1 + f"TCP{version} {sender} {receiver} {source[1]} {destination[1]}\r\n".encode()


def proxy_v2(source: tuple[str, int] | None, destination: tuple[str, int]) -> bytes:
    """The same in version 2 (PROXY protocol 2.2).  Without a source, LOCAL."""
    if source is None:
        return PROXY_V2 + b"\x20\0\0\0"
    (sender, receiver), version = proxy_ends(source, destination)
    block = sender.packed + receiver.packed + struct.pack("!HH", source[1], destination[1])
    return PROXY_V2 + struct.pack("!BBH", 0x21, 0x11 if version == 4 else 0x21, len(block)) + block


def proxy_ends(*ends: tuple[str, int]) -> tuple[list[ipaddress.IPv4Address | ipaddress.IPv6Address], int]:
    """The addresses of both ends in one family, which a header needs, and its version."""
    addresses = [ipaddress.ip_address(host.partition("%")[0]) for host, _ in ends]
    addresses = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    if len({address.version for address in addresses}) > 1:
        addresses = [ipaddress.IPv6Address(f"::ffff:{a}") if a.version == 4 else a for a in addresses]
    return addresses, addresses[0].version


# What a route may want its backend to be told of the client, and what writes it; as-received says
# what a believed header said, none nothing.
PROXY_WRITERS = {"as-received": None, "none": None, "v1": proxy_v1, "v2": proxy_v2}


SSL_REQUEST, GSSENC_REQUEST, CANCEL_REQUEST = 80877103, 80877104, 80877102
STARTUP = 3  # major protocol version
SSL_REQUEST_BYTES = struct.pack(">II", 8, SSL_REQUEST)


def parse_startup(data: bytes) -> int | None:
    """The first packet of a PostgreSQL client: SSL_REQUEST, GSSENC_REQUEST, CANCEL_REQUEST, STARTUP.

    PostgreSQL "Message Formats": length (4 bytes, itself included), code (4 bytes).  The requests
    are 8 bytes; a STARTUP is a result when all of it is there.  Raises Malformed.
    """
    if len(data) < 4:
        if any(data[:2]):
            raise Malformed("not a PostgreSQL startup packet", kind="not_tls")
        return None
    length = int.from_bytes(data[:4], "big")
    if not 8 <= length <= STARTUP_MAX:
        raise Malformed(f"a PostgreSQL startup packet of {length} bytes", kind="not_tls")
    if len(data) < 8:
        return None
    code = int.from_bytes(data[4:8], "big")
    if code in (SSL_REQUEST, GSSENC_REQUEST):
        if length != 8:
            raise Malformed(f"a PostgreSQL encryption request of {length} bytes")
        return code
    if code == CANCEL_REQUEST:
        return code
    if code >> 16 != STARTUP:
        raise Malformed(f"PostgreSQL protocol {code >> 16}.{code & 0xFFFF}")
    return STARTUP if len(data) >= length else None


# What a client that speaks no TLS most likely speaks, by its first byte.
NOT_TLS = {first: kind for kind, letters in {"HTTP": b"GPHDOCT", "SSH": b"S", "RDP": b"\x03",
                                             "an SSLv2 hello": range(0x80, 0x100)}.items() for first in letters}


class Prelude:
    """What a client says before it can be routed, as a machine without I/O.

    `feed` takes bytes and returns a Hello, an answer to send at once (b"S", b"N"), or None for
    more.  `header` and `data` are then what the backend has to be told.  `policy` is what to do
    about a PROXY header: `allow`, `require` or `refuse` (see PROXY_POLICY).
    """

    __slots__ = ("policy", "local", "step", "header", "source", "data", "reader", "ssl")

    START, CLIENT, AFTER_GSS, AFTER_SSL = "start", "client", "after GSSENCRequest", "after SSLRequest"
    PLAIN = "PostgreSQL in clear text"

    def __init__(self, policy: str, local: bool):
        self.policy = policy
        self.local = local  # the peer is this machine: its header may name this machine
        self.step = self.START
        self.header = b""  # the believed PROXY header, as it came
        self.source: ProxyHeader | None = None
        self.data = bytearray()  # what came behind it, without what was answered here
        self.reader: HelloReader | None = None
        self.ssl = False

    def feed(self, data: bytes | memoryview) -> Hello | bytes | None:
        """Go on with more bytes.  Raises Malformed, or Refused for what is well-formed but unwanted."""
        self.data += data
        while self.data:
            opener = self.OPENERS.get((self.step, self.data[0]))
            if opener is None:
                self._stranger(self.data[0])
            if self.policy == "require" and self.step is self.START and opener is not Prelude._proxy:
                raise Malformed("a PROXY header is required", kind="proxy")
            result = opener(self)
            if result is not self:  # self: that was one step, and there is more to read
                return result
        return None

    def language(self) -> tuple[str, int]:
        """What a refused client is told in (see `told`), and the minor version of its TLS record."""
        if self.reader is not None:
            return (TLS, self.data[2]) if len(self.data) > 2 else (NOTHING, 0)
        return (POSTGRES if self.step is self.PLAIN else NOTHING), 0

    def _stranger(self, first: int) -> NoReturn:
        if self.step is self.AFTER_SSL:
            raise Malformed("no TLS behind SSLRequest")
        raise Malformed(f"not TLS: {NOT_TLS.get(first, 'unknown')}", kind="not_tls")

    def _hello(self) -> Hello | None:
        if self.reader is None:
            self.reader = HelloReader()
        return self.reader.read(self.data)

    def _proxy(self) -> Prelude | None:
        data = bytes(self.data[:PROXY_V2_MAX])
        parse, signature = (parse_proxy_v1, PROXY_V1) if data[0] == PROXY_V1[0] else (parse_proxy_v2, PROXY_V2)
        if signature is PROXY_V1 and not data.startswith(signature[:len(data)]):
            self._stranger(data[0])
        if self.policy not in ("allow", "require"):
            if len(data) < len(signature) and signature.startswith(data):
                return None
            raise Malformed("a PROXY header that is not wanted from here", kind="proxy")
        header = parse(data)
        if header is None:
            return None
        source = getattr(header.source, "ipv4_mapped", None) or header.source
        if source is not None and not self.local and (source.is_loopback or source.is_unspecified
                                                      or source.is_multicast):
            raise Malformed(f"a PROXY header that claims to come from {source}", kind="proxy")
        self.header = data[:header.size]
        self.source = header
        del self.data[:header.size]
        self.step = self.CLIENT
        return self

    def _postgres(self) -> bytes | None:
        request = parse_startup(bytes(self.data[:STARTUP_MAX]))
        if request is None:
            return None
        if request == STARTUP:
            self.step = self.PLAIN
            raise Refused("plain_postgres", "a PostgreSQL client without TLS")
        if request == CANCEL_REQUEST:
            raise Refused("cancel", "a CancelRequest in clear text names no server")
        if len(self.data) > 8:  # CVE-2021-23214 and its kin: they would be taken for a part of the TLS
            raise Malformed("bytes behind a PostgreSQL encryption request")
        self.data.clear()
        if request == GSSENC_REQUEST:
            if self.step is self.AFTER_GSS:
                raise Malformed("GSSENCRequest twice")
            self.step = self.AFTER_GSS
            return b"N"
        self.ssl = True
        self.step = self.AFTER_SSL
        return b"S"

    # (step, first byte) -> what reads it; anything else is a stranger
    OPENERS: dict[tuple[str, int], Callable[[Prelude], Any]] = {}
    for _step in (START, CLIENT, AFTER_GSS):
        OPENERS[_step, 0x16] = _hello
        OPENERS[_step, 0x00] = _postgres
    OPENERS[AFTER_SSL, 0x16] = _hello
    OPENERS[START, PROXY_V1[0]] = OPENERS[START, PROXY_V2[0]] = _proxy
    del _step


# (--proxy-protocol, is the peer in --proxy-from?) -> what becomes of a PROXY header
PROXY_POLICY = {
    ("off", False): "refuse", ("off", True): "refuse",
    ("auto", False): "refuse", ("auto", True): "allow",
    ("required", False): "close", ("required", True): "require",
}


# -- routes ------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """What becomes of a name."""

    route: Route
    target: str  # the target with its fields filled in: `scheme:rest`
    scheme: Scheme
    rest: str
    key: str  # of what is kept for it: two routes to one target may not be allowed the same addresses
    tunnel: str  # where that is a tunnel: its key in the TunnelTable, `launcher:hostname`
    tally: Tally
    plain: bool  # the route asks for nothing that the prelude has to be looked at for


class Tally:
    """What came of a route.  Written by the loop only."""

    __slots__ = ("active", "total", "refused", "up", "down")

    def __init__(self) -> None:
        self.active = 0  # connections now
        self.total = 0  # that are over, those that were refused included
        self.refused = 0
        self.up = 0  # bytes, of those that are over
        self.down = 0


class Route(NamedTuple):
    """One `PATTERN=TARGET`, and what a file of settings may say of it beside that: ROUTE_OPTIONS."""

    pattern: str
    target: str
    send_proxy: str = "as-received"  # see PROXY_WRITERS
    allow: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] | None = None  # client networks; None: all
    max_connections: int | None = None
    idle: float | None = None  # in the place of --idle
    connection_idle: float | None = None  # in the place of --connection-idle

    def __str__(self) -> str:
        return f"{self.pattern}={self.target}"

    def decide(self, name: str, identified: bool = False, tally: Tally | None = None) -> Decision:
        """Fill in the target for a name.  Raises Malformed where that gives no valid target.

        `identified` is whether the router has an Access token, which is not shown to everybody.
        """
        scheme, _, rest = expand(self.target, name).partition(":")
        row = SCHEMES[scheme]
        rest = row.check(rest)
        target = f"{scheme}:{rest}"
        tunnel = ANONYMOUS + target if identified and not self.is_of_one_domain() else target
        plain = self.send_proxy == "as-received" and self.allow is None and self.max_connections is None
        return Decision(self, target, row, rest, f"{self.pattern}={target}", tunnel, tally or Tally(), plain)

    def is_of_one_domain(self) -> bool:
        """Whether all that its names lead to is in one domain, which the operator has chosen.

        Else a client may own the domain that it leads to: `cft-{name}` for any name, or
        `cft-{label}-{domain}` for `*.example.com`, which is `cft-a-example.com`.
        """
        star, _, domain = self.pattern.partition(".")
        if not star.startswith("*"):
            return True
        names = ("a.b.c", "d.e.f") if not domain else (f"a.{domain}", f"b.{'c.' * (star == '**')}{domain}")
        host = self.target.partition(":")[2]
        ends = [expand(host, name).split(".")[-2:] for name in names]
        return ends[0] == ends[1] and len(ends[0]) == 2


ANONYMOUS = "anonymous "  # before the launcher of a tunnel that is not given the router's Access token
FIELDS = re.compile(r"\{([^{}]*)\}")


def expand(template: str, name: str) -> str:
    """`template` with {name}, {label} (its first label) and {domain} (the rest) filled in."""
    label, _, domain = name.partition(".")
    values = {"name": name, "label": label, "domain": domain}
    return FIELDS.sub(lambda field: values[field[1]], template)


def parse_route(text: str) -> Route:
    """`PATTERN=TARGET`.  Raises ValueError with a sentence for people."""
    pattern, equals, target = text.partition("=")
    scheme, colon, rest = target.partition(":")
    if not equals or not colon:
        raise ValueError(f"{text!r} is not PATTERN=SCHEME:REST")
    stars = next((stars for stars in ("**.", "*.") if pattern.startswith(stars)), "")
    try:
        if pattern != "*":
            pattern = stars + normalise(pattern[len(stars):].encode())
    except Malformed:
        raise ValueError(f"{pattern!r} is not a name, *.NAME, **.NAME or * (NAME has two labels at least)") from None
    if scheme not in SCHEMES:
        raise ValueError(f"{scheme!r} is no kind of target: there are {', '.join(sorted(SCHEMES))}")
    unknown = [field for field in FIELDS.findall(rest) if field not in ("name", "label", "domain")]
    if unknown or "{" in FIELDS.sub("", rest) or "}" in FIELDS.sub("", rest):
        raise ValueError(f"{rest!r} has a field other than {{name}}, {{label}}, {{domain}}")
    try:  # a sample name shows what no name could make valid
        SCHEMES[scheme].check(expand(rest, pattern.replace("*", "a") if pattern != "*" else "a.example.com"))
    except Malformed as error:
        raise ValueError(f"{target!r}: {error}") from None
    return Route(pattern, target)


class Routes:
    """An immutable set of routes: exact name, else the longest wildcard.

    `*.example.com` is one label in front, `**.example.com` one or more, `*` any name.
    `identified`: see Route.decide.  Raises ValueError where a pattern is there twice.
    """

    def __init__(self, routes: Iterable[Route], identified: bool = False):
        self.routes = tuple(routes)
        self.identified = identified
        self.patterns = {route.pattern: route for route in self.routes}
        if len(self.patterns) < len(self.routes):
            patterns = [route.pattern for route in self.routes]
            raise ValueError(f"{next(p for p in patterns if patterns.count(p) > 1)} is routed twice")
        self.tallies = {route.pattern: Tally() for route in self.routes}
        self.decisions: dict[str, Decision] = {}  # what was decided; emptied when there are ...
        self.decisions_max = max(DECISIONS_MAX, 2 * len(self.routes))

    def find(self, name: str) -> Route | None:
        """The route for a normalised name."""
        patterns = self.patterns
        if name in patterns:
            return patterns[name]
        stars, suffix = ("*.", "**."), name
        while suffix := suffix.partition(".")[2]:
            for star in stars:
                if star + suffix in patterns:
                    return patterns[star + suffix]
            stars = ("**.",)
        return patterns.get("*")

    def in_order(self) -> list[Route]:
        """The routes as `find` prefers them: names, then wildcards, the longest first."""
        def rank(route: Route) -> tuple[int, int, str, str]:
            stars, star, suffix = route.pattern.rpartition("*")
            return (1, -suffix.count("."), stars, suffix) if star else (0, 0, "", suffix)
        return sorted(self.routes, key=rank)

    def decide(self, name: str) -> Decision:
        """What becomes of a normalised name.  Raises Refused where nothing does."""
        decision = self.decisions.get(name)
        if decision is None:
            route = self.find(name)
            if route is None:
                raise Refused("no_route", f"no route for {name}")
            if len(self.decisions) >= self.decisions_max:
                self.decisions.clear()
            decision = self.decisions[name] = route.decide(name, self.identified, self.tallies[route.pattern])
        return decision

    def take_tallies(self, former: Routes) -> None:
        """Go on counting where other routes ended, pattern by pattern.  Before any name is decided.

        A pattern that is gone is kept while it has connections: it may come back.
        """
        self.tallies |= {pattern: tally for pattern, tally in former.tallies.items()
                         if pattern in self.tallies or tally.active}


# -- targets -----------------------------------------------------------------------------------


class Backend(NamedTuple):
    """Where to connect to now."""

    addresses: tuple[tuple[int, tuple], ...]  # (family, socket address), best first
    local: bool  # all of them loopback
    tunnel: Tunnel | None = None  # leased to the connection
    child: Child | None = None  # the process that listens there

    def intact(self, server: socket.SocketType) -> bool:
        """Whether what answered the connect to a tunnel was its own process.

        Asked after the connect, which has to be over: a child that lives now held its port then, so no
        byte of a client reaches a stranger that took the port of a tunnel that died.
        Raises BlockingIOError where the connect is not over, and OSError where it failed.
        """
        error = server.connect_ex(self.addresses[0][1])
        if error not in (0, errno.EISCONN):
            raise OSError(error, os.strerror(error))  # of EALREADY, a BlockingIOError
        # In this order: the reaper takes the child away before it closes what alive() reads.
        return self.child.alive() and self.tunnel.child is self.child


class Scheme(NamedTuple):
    """One kind of target, as a row."""

    check: Callable[[str], str]  # the part behind `scheme:`, made canonical; raises Malformed
    ready: Callable[[Router, Decision], Backend | None]  # loop: None where it has to wait
    prepare: Callable[[Router, Wait], None]  # wait-<n>: returns when it may be ready; raises Refused
    waits_on: str  # for people: what a client waits for


def check_tunnel(rest: str) -> str:
    """A tunnel's hostname: only the name rules stand between it and argv."""
    return normalise(rest.encode())


def tunnel_ready(router: Router, decision: Decision) -> Backend | None:
    """Lease the tunnel, if it is ready; None: it has to be waited for.  Loop."""
    tunnel = router.tunnels.lease(decision.tunnel)
    if tunnel is None:
        return None
    child = tunnel.child
    if child is None:  # the reaper let go of it an instant ago: the state follows
        router.tunnels.release(tunnel)
        return None
    return Backend(((socket.AF_INET, child.address),), True, tunnel, child)


def tunnel_prepare(router: Router, wait: Wait) -> None:
    """Sleep until the tunnel is ready; the kind of a TunnelError becomes `tunnel_<kind>` of REFUSALS."""
    try:
        router.tunnels.wait(wait.decision.tunnel, wait.client, wait.deadline, wait.doubted, wait.decision.route.idle)
    except TunnelError as error:
        raise tunnel_refused(error.kind, str(error)) from None


def check_tcp(rest: str) -> str:
    """HOST:PORT, as it came.  Raises Malformed, also for numbers that a resolver takes for addresses."""
    try:
        host, port = parse_host_port(rest)
    except ValueError as error:
        raise Malformed(str(error), kind="bad_name") from None
    if not port or not HOST.fullmatch(host) or is_number(host):
        raise Malformed(f"{rest!r} is not HOST:PORT", kind="bad_name")
    return rest


def tcp_ready(router: Router, decision: Decision) -> Backend | None:
    """The remembered addresses, or a literal one at once; None: tcp_prepare resolves it, or refuses.  Loop."""
    backend, until = router.resolved.get(decision.key, (None, 0.0))
    if until > monotonic():
        return backend
    host, port = parse_host_port(decision.rest)
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return None  # a name: to be resolved
    address = (host, port) if literal.version == 4 else (host, port, 0, 0)
    family = socket.AF_INET if literal.version == 4 else socket.AF_INET6
    if not router.may_dial(decision, address):
        return None  # tcp_prepare says so
    backend = Backend(((family, address),), literal.is_loopback)
    router.remember(decision, backend, float("inf"))
    return backend


def tcp_prepare(router: Router, wait: Wait) -> None:
    """Resolve the host.  A host that was there before stays while the resolver is down."""
    host, port = parse_host_port(wait.decision.rest)
    until = monotonic() + RESOLVED_FOR
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        backend = router.resolved.get(wait.decision.key, (None,))[0]
        if backend is None:
            raise Refused("unresolved", f"{host} does not resolve: {error}") from None
        router.remember(wait.decision, backend, until)
        return
    addresses = tuple(dict.fromkeys((family, address) for family, _, _, _, address in found))
    allowed = tuple(a for a in addresses if router.may_dial(wait.decision, a[1]))
    if not allowed:
        raise Refused("forbidden", f"{host} is {addresses[0][1][0]}, which this route does not lead to")
    local = all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in allowed)
    router.remember(wait.decision, Backend(allowed[:ADDRESSES_MAX], local), until)


SCHEMES = {
    "cloudflared": Scheme(check_tunnel, tunnel_ready, tunnel_prepare, "its tunnel"),
    "carrier": Scheme(check_tunnel, tunnel_ready, tunnel_prepare, "its tunnel"),
    "tcp": Scheme(check_tcp, tcp_ready, tcp_prepare, "its address"),
}


# -- settings ----------------------------------------------------------------------------------

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
    parser.add_argument("command", nargs="?", default="serve", choices=tuple(COMMANDS), help=argparse.SUPPRESS)
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


# -- the log -----------------------------------------------------------------------------------


# -- the loop ----------------------------------------------------------------------------------


class Flow:
    """One direction of a connection, from `source` to its twin's.  Loop only.

    States: OPEN; CHATTY after FEW_AFTER reads in a row of less than FEW bytes, until there is more to read; BULKY
    after a read that was full, until there is less to read; each of these has its own way of moving bytes (`mover`).
    BLOCKED: the sink takes no more, so what is left waits in `pending` and the source is not read (backpressure);
    then OPEN (BULKY, if that was in a pipe).  DONE: the source has ended, which the sink is told behind the last
    byte, or the sink is gone.
    """

    __slots__ = ("connection", "twin", "source", "fd", "total", "few", "state", "pending", "pipe", "watched")

    def __init__(self, connection: Connection):
        self.connection: Connection | None = connection
        self.twin: Flow = NO_FLOW
        self.source: socket.SocketType | None = None
        self.fd = -1
        self.total = 0  # bytes read from the source
        self.few = 0  # reads of less than FEW bytes in a row
        self.state = DONE
        self.pending: memoryview | int | None = None  # what the sink did not take; in a pipe: how much
        self.pipe: tuple[int, int] | None = None  # see SpliceFlow
        self.watched = 0  # what the poller waits for on the source

    def watch(self, events: int, callback: Callable[[int], None] | None = None) -> None:
        """Wait for these events on the source; for none, forget it (a hang-up would spin)."""
        poller = self.connection.router.poller
        if not events:
            if self.watched:
                poller.forget(self.fd)
        elif self.watched:
            poller.change(self.fd, events, callback)
        else:
            poller.watch(self.fd, events, callback)
        self.watched = events

    def rewatch(self) -> None:
        """Wait for what is wanted of the source: each socket is one flow's source and its twin's sink."""
        events = (READ if self.state in READING else 0) | (WRITE if self.twin.state is BLOCKED else 0)
        if events != self.watched:
            self.watch(events, self.mover() if events == READ else self.ready)

    def mover(self) -> Callable[[int], None]:
        """What moves bytes in this state.  In BLOCKED and DONE that is `pump`, which does nothing then."""
        return self.chat if self.state is CHATTY else self.move_bulk if self.state is BULKY else self.pump

    def become(self, state: str) -> None:
        """Move bytes otherwise from here on."""
        self.state = state
        self.few = 0
        if self.watched == READ:
            self.connection.router.poller.callbacks[self.fd] = self.mover()

    def ready(self, mask: int) -> None:
        """Called by the loop when the source can be written by the other direction, or read too."""
        if mask != READ and self.twin.state is BLOCKED:
            self.twin.flush()
        if mask != WRITE:
            self.mover()(mask)

    def pump(self, mask: int, size: int = MESSAGE) -> None:
        """Move what the source has to the sink.  Called by the loop when there is something to read.

        os.read and os.write, not the sockets' methods: fewer instructions.  Safe only because both descriptors are
        open, and nobody else's, while the flow is not DONE.
        """
        if self.state is not OPEN:
            return  # an event of the same turn changed that
        connection = self.connection
        try:
            data = os.read(self.fd, size)
        except BlockingIOError:
            return
        except OSError as error:
            connection.failed(self, error)
            return
        if not data:
            connection.ended(self)
            return
        count = len(data)
        self.total += count
        if connection.hello is not None:
            connection.spoke(self)
        try:
            sent = os.write(self.twin.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            connection.broken(self)
            return
        if sent != count:
            self.hold(memoryview(data[sent:]))
        elif count < FEW:
            self.few += 1
            if self.few == FEW_AFTER:
                self.become(CHATTY)
        else:
            self.few = 0
            if count == size:
                self.become(BULKY)

    def chat(self, mask: int) -> None:
        """As `pump`, for small messages: 45 operations of the interpreter in the place of 68.

        Written out, since a call for each step would cost more than the step.  Two checks of `pump` are left out:
        of the state, since whoever leaves CHATTY takes this callback away, and of `hello`, which `pump` has seen to
        be None.
        """
        try:
            data = os.read(self.fd, FEW)
        except BlockingIOError:
            return
        except OSError as error:
            self.connection.failed(self, error)
            return
        if not data:
            self.connection.ended(self)
            return
        count = len(data)
        self.total += count
        try:
            sent = os.write(self.twin.fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.connection.broken(self)
            return
        if sent != count:
            self.hold(memoryview(data[sent:]))
        elif count == FEW:
            self.become(OPEN)
            self.pump(mask)  # the rest of the message

    def move_bulk(self, mask: int) -> None:
        """There was more than one read takes: read as much as the router allows at this time."""
        if self.state is BULKY:
            self.become(OPEN)  # `pump` makes it BULKY again, if this read is full too
            self.pump(mask, self.connection.router.chunk)

    def hold(self, rest: memoryview) -> None:
        """The sink is full: keep the rest, and do not read before it is gone."""
        self.pending = rest
        self.connection.router.keep(len(rest))
        self.block()

    def block(self) -> None:
        """Wait for the sink instead of the source."""
        self.state = BLOCKED
        self.rewatch()
        self.twin.rewatch()

    def flush(self) -> None:
        """The sink takes bytes again."""
        try:
            sent = self.twin.source.send(self.pending)
        except BlockingIOError:
            return
        except OSError:
            self.connection.broken(self)
            return
        self.connection.router.keep(-sent)
        self.pending = self.pending[sent:]
        if not self.pending:
            self.pending = None
            self.unblock()

    def unblock(self, state: str = OPEN) -> None:
        """All is with the sink: read on."""
        self.state = state
        self.rewatch()
        self.twin.rewatch()

    def discard(self) -> None:
        """Forget what the sink did not take, and read no more."""
        self.state = DONE
        if self.pending is not None:
            self.connection.router.keep(-len(self.pending))
            self.pending = None


class SpliceFlow(Flow):
    """A Flow whose bytes stay in the kernel while it is BULKY (splice(2)).

    That is half the CPU for each gigabyte, and a tenth more for a message of 64 bytes: the two meet
    at 3 KiB.  All flows of the loop share one pipe.  It is empty between two calls, unless a sink is
    full: then the pipe is lent to that flow, with the rest in it, and the loop takes another.  Where
    there is none to spare, the rest is copied out, as in Flow.
    """

    __slots__ = ()

    def move_bulk(self, mask: int) -> None:
        """As `pump`, written out again: a call for each step would cost more than the step."""
        if self.state is not BULKY:
            return
        connection = self.connection
        router = connection.router
        reader, writer = router.pipe
        try:
            count = os.splice(self.fd, writer, router.bulk, flags=SPLICE_FLAGS)
        except BlockingIOError:
            return
        except OSError as error:
            connection.failed(self, error)
            return
        if not count:
            connection.ended(self)
            return
        self.total += count
        if connection.hello is not None:
            connection.spoke(self)
        try:
            sent = os.splice(reader, self.twin.fd, count, flags=SPLICE_FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError:
            router.lose_pipe()
            connection.broken(self)
            return
        if sent != count:
            rest = count - sent
            self.pipe = router.lend_pipe()
            if self.pipe:
                self.pending = rest
                self.block()
            else:
                self.hold(memoryview(read_exactly(reader, rest)))
        elif count < MESSAGE:
            self.become(OPEN)

    def flush(self) -> None:
        """As Flow.flush, out of the pipe that was lent."""
        if self.pipe is None:
            super().flush()
            return
        try:
            self.pending -= os.splice(self.pipe[0], self.twin.fd, self.pending, flags=SPLICE_FLAGS)
        except BlockingIOError:
            return
        except OSError:
            self.connection.broken(self)
            return
        if not self.pending:
            self.connection.router.return_pipe(self.pipe)
            self.pipe = self.pending = None
            self.unblock(BULKY)

    def discard(self) -> None:
        if self.pipe is not None:  # it is not empty: nobody else can use it
            self.connection.router.drop_pipe(self.pipe)
            self.pipe = self.pending = None
        super().discard()


def read_exactly(fd: int, count: int) -> bytes:
    """`count` bytes of a pipe that holds them."""
    parts = []
    while count:
        parts.append(os.read(fd, count))
        count -= len(parts[-1])
    return b"".join(parts)


def can_splice() -> bool:
    """Whether splice(2) works here: not everywhere does it, whatever `os` says (gVisor, seccomp)."""
    if not hasattr(os, "splice"):
        return False
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    try:
        theirs.send(b"x")
        return os.splice(ours.fileno(), writer, 1, flags=SPLICE_FLAGS) == 1
    except OSError:
        return False
    finally:
        ours.close()
        theirs.close()
        os.close(reader)
        os.close(writer)


READING = (OPEN, CHATTY, BULKY)  # states of a flow whose source is read
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST
SPLICE_FLAGS = getattr(os, "SPLICE_F_NONBLOCK", 0) | getattr(os, "SPLICE_F_MOVE", 0)

# socket.SocketType is the class that socket.socket is written around, whatever the manual says.
STREAM = int(socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0))  # born non-blocking: a call less
NO_FLOW = Flow.__new__(Flow)  # the twin of a flow whose connection is over
NO_FLOW.state = DONE


class Peer:
    """An address that connects, and what the settings say of it."""

    __slots__ = ("key", "policy", "local", "exempt", "count")

    def __init__(self, key: str, policy: str, local: bool, exempt: bool):
        self.key = key  # the address; for IPv6 the /64, which is what one client has
        self.policy = policy  # what becomes of its PROXY header: see PROXY_POLICY
        self.local = local
        self.exempt = exempt  # from the limits for each client
        self.count = 0  # connections


class Wait:
    """A target that is not ready, and the connections that wait for it."""

    __slots__ = ("decision", "client", "deadline", "doubted", "connections", "number", "error")

    def __init__(self, decision: Decision, client: str | None, deadline: float, doubted: Child | None):
        self.decision = decision
        self.client = client  # whom a start is charged to
        self.deadline = deadline
        self.doubted = doubted  # the process that gave no answer, where that is why they wait
        self.connections: dict[Connection, None] = {}  # an ordered set
        self.number = 0  # how many threads ran when it got its own; 0 while it waits for one
        self.error: Refused | None = None  # how it ended


class Deadline:
    """A time that is the same for all, so that those who wait form a queue: no timers."""

    __slots__ = ("seconds", "act", "entries")

    def __init__(self, seconds: float, act: Callable[[Connection], None]):
        self.seconds = seconds
        self.act = act
        self.entries: collections.OrderedDict[Connection, float] = collections.OrderedDict()


class Connection:
    """One client, from accept to close.  Loop only.

    `on_prelude`, `dial` and `speak` are the steps of Router.serve_forever.
    """

    __slots__ = ("router", "client", "address", "peer", "state", "began", "prelude", "name", "decision", "backend",
                 "greeting", "hello", "replayable", "retried", "tried", "parks", "wait", "up", "down", "deadline",
                 "refusal", "reason", "failure", "carried", "quiet_since", "dialled", "header", "admitted")

    def __init__(self, router: Router, client: socket.SocketType, address: tuple[str, int], peer: Peer):
        self.router = router
        self.client = client
        self.address = address
        self.peer = peer
        self.state = PRELUDE
        self.began = monotonic()
        self.prelude: Prelude | None = None  # where its first bytes are not all of a hello
        self.name: str | None = None
        self.decision: Decision | None = None
        self.backend: Backend | None = None
        self.header: ProxyHeader | None = None  # a believed one
        self.greeting = b""  # what the backend is told first: PROXY header, SSLRequest
        self.dialled = 0.0  # when it last was
        self.admitted = False  # it counts among its route's
        self.hello: bytes | None = None  # the ClientHello and what followed, until either side says more
        self.replayable = False  # `hello` is all the client has said: it can be sent again
        self.retried = False
        self.tried = 0  # addresses of the backend
        self.parks = 0
        self.wait: Wait | None = None
        self.up = router.flow(self)
        self.down = router.flow(self)
        self.up.twin, self.down.twin = self.down, self.up
        self.up.source, self.up.fd = client, client.fileno()
        self.deadline: Deadline | None = None  # the queue it stands in
        self.refusal: Refused | None = None
        self.reason = ""  # why it ends, while it lingers
        self.carried = 0  # bytes at the last sweep
        self.quiet_since = self.began
        router.connections.add(self)
        peer.count += 1

    # -- the prelude

    def on_prelude(self, mask: int = READ) -> None:
        """Read what the client says before it can be routed.

        In the turn of its accept it is a step: the hello is often there.
        """
        if self.state is not PRELUDE:
            return
        router = self.router
        verdict = None
        try:
            data = os.read(self.up.fd, MESSAGE)
            if not data:
                raise Malformed("the client left in the middle of its prelude", kind="truncated")
            verdict = self._parse(data)
            if isinstance(verdict, bytes):
                self._answer(verdict)
        except Refused as error:
            self.refuse(error)
            return
        except BlockingIOError:
            pass
        except OSError:
            self.refuse(Refused("truncated", "the client reset the connection"))
            return
        if isinstance(verdict, Hello):
            self.route(verdict)
        elif not self.up.watched:
            router.arm(self, router.prelude_deadline)
            self.up.watch(READ, self.on_prelude)
            if len(router.prelude_deadline.entries) > PRELUDES_MAX:
                router.shed()

    def _parse(self, data: bytes) -> Hello | bytes | None:
        """See Prelude.feed, which does this where the first bytes are not all of a hello."""
        if self.prelude is None:
            if self.peer.policy != "require":
                self.hello = data  # before it is parsed: an alert for a broken one has its version
                hello = whole_hello(data)
                if hello is not None:
                    return hello
                self.hello = None
            self.prelude = Prelude(self.peer.policy, self.peer.local)
        return self.prelude.feed(data)

    def _answer(self, answer: bytes) -> None:
        """Send `S` or `N`, unless the client did not wait for it."""
        try:
            if self.client.recv(1, socket.MSG_PEEK):
                raise Malformed("bytes behind a PostgreSQL encryption request")
        except BlockingIOError:
            pass
        except OSError:
            return  # the next read says so
        with contextlib.suppress(OSError):  # likewise
            self.client.send(answer)

    def route(self, hello: Hello) -> None:
        """The name is known: decide where it leads, and go there."""
        router = self.router
        self.name = hello.name
        if router.level <= logging.DEBUG:
            log.debug("%s:%d says hello: name %s, ALPN %s, %d bytes", *self.address, hello.name, hello.alpn, hello.end)
        try:
            if self.prelude is not None:
                self._adopt()
            self.replayable = hello.end == len(self.hello)
            self.decision = decision = router.decide(hello.name)
            if not decision.plain:
                self._admit(decision)
            self.admitted = True
            decision.tally.active += 1
        except Refused as error:
            self.refuse(error)
            return
        if self.deadline is not None:
            router.disarm(self)
        self.go_on()

    def _adopt(self) -> None:
        """Take over what the prelude has found out.  Raises Refused."""
        prelude, self.prelude = self.prelude, None
        self.hello = bytes(prelude.data)
        self.greeting = prelude.header + SSL_REQUEST_BYTES if prelude.ssl else prelude.header
        self.header = header = prelude.source
        if header is None or header.source is None:
            return
        self.address = (str(header.source), header.port)
        self.peer.count -= 1
        self.peer = self.router.peer_of(self.address[0])
        self.peer.count += 1
        if self.peer.count > self.router.max_per_client and not self.peer.exempt:
            raise Refused("client_limit", f"{self.peer.key} has {self.peer.count - 1} connections")

    def _admit(self, decision: Decision) -> None:
        """Do what the route asks for beside its target.  Raises Refused."""
        route, host = decision.route, self.address[0].partition("%")[0]
        if route.allow is not None:
            address = ipaddress.ip_address(host)
            address = getattr(address, "ipv4_mapped", None) or address
            if not any(address in network for network in route.allow):
                raise Refused("not_allowed", f"{route.pattern} does not allow {address}")
        if route.max_connections is not None and decision.tally.active >= route.max_connections:
            raise Refused("route_limit", f"{route.pattern} has {route.max_connections} connections")
        if route.send_proxy == "as-received":
            return
        self.greeting = SSL_REQUEST_BYTES if self.greeting.endswith(SSL_REQUEST_BYTES) else b""
        write = PROXY_WRITERS[route.send_proxy]
        if write is not None:
            header = self.header
            source = None if header is not None and header.source is None else self.address
            destination = header and header.destination or self.client.getsockname()[:2]
            self.greeting = write(source, destination) + self.greeting

    # -- on the way to the backend

    def go_on(self) -> None:
        """Have `dial` called in this turn."""
        self.state = ROUTED
        self.router.to_dial.append(self)

    def dial(self) -> None:
        """Connect to the backend, or wait until it can be."""
        if self.state is not ROUTED:
            return  # something in this turn has ended it
        self.tried = 0
        self.backend = self.decision.scheme.ready(self.router, self.decision)
        if self.backend is None:
            self.park(None)
        else:
            self._connect()

    def park(self, doubted: Child | None) -> None:
        """Wait, with all who want the same, until the target is ready."""
        self.parks += 1
        if self.parks > PARKS_MAX:
            self.refuse(Refused("tunnel_failed", f"{self.decision.target} was ready {PARKS_MAX} times, "
                                                 "and gone each time"))
            return
        self.state = PARKED
        self.up.watch(READ, self.on_waiting)
        self.router.arm(self, self.router.parked_deadline)
        self.router.join_wait(self, doubted)

    def resume(self) -> None:
        """Go on after a wait."""
        self._leave_wait()
        self.router.disarm(self)
        self.go_on()

    def _leave_wait(self) -> None:
        """Wait no more: whatever becomes of the target, it is not for this connection."""
        wait, self.wait = self.wait, None
        if wait is not None:
            del wait.connections[self]
            if not wait.connections and not wait.number:
                del self.router.waits[wait.decision.key]  # it waited for a thread, for nobody now
                self.router.queued_waits.remove(wait)

    def on_waiting(self, mask: int) -> None:
        """The client says more, or leaves, while it waits for the backend."""
        if self.state not in (PARKED, DIALING, GREETING):
            return
        if len(self.hello) >= HELLO_WIRE_MAX:
            self.up.watch(0)  # enough: the rest waits in the kernel
            return
        try:
            data = self.client.recv(MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.hello += data
            self.replayable = False
        else:
            self.close("client_left")

    def _connect(self) -> None:
        """Connect to the next address that does not refuse at once; `speak` sees what becomes of it."""
        self.dialled = monotonic()
        error = errno.EHOSTUNREACH
        for family, address in self.backend.addresses[self.tried:]:
            self.tried += 1
            try:
                server = socket.SocketType(family, STREAM)
            except OSError as failure:
                error = failure.errno
                if error in CAPACITY_ERRNOS:  # our own trouble: neither the backend's fault nor its tunnel's
                    self.router.pause(failure.strerror, monotonic() + ACCEPT_PAUSE)
                    self.refuse(Refused("busy", failure.strerror))
                    return
                continue  # no IPv6 here
            if STREAM == socket.SOCK_STREAM:
                server.setblocking(False)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not self.backend.local:
                keep_alive(server)
            self.down.source, self.down.fd = server, server.fileno()
            error = server.connect_ex(address)
            if error in (0, errno.EINPROGRESS):
                self.state = DIALING
                self.router.to_speak.append(self)
                return
            self._hang_up()
        self._unreachable(os.strerror(error))

    def speak(self, mask: int = WRITE) -> None:
        """Say what the client said, once the connect is over: loopback's is by the end of the turn.

        A PostgreSQL backend is asked for TLS first.
        """
        if self.state is not DIALING:
            return
        server = self.down.source
        asks = self.greeting.endswith(SSL_REQUEST_BYTES)
        said = self.greeting if asks else self.greeting + self.hello
        try:
            if self.backend.child is not None and not self.backend.intact(server):
                self.retry("its process ended")
                return
            sent = server.send(said)
        except OSError as error:
            watched = self.down.watched
            if not watched and error.errno in NOT_CONNECTED:
                self.router.arm(self, self.router.connect_deadline)
                self.up.watch(READ, self.on_waiting)
                self.down.watch(WRITE, self.speak)
            elif not watched or not isinstance(error, BlockingIOError):
                self._connect_next(error.strerror)
            return
        if asks:  # a few bytes into an empty buffer: it took them all
            self.state = GREETING
            self.router.arm(self, self.router.greeting_deadline)
            self.up.watch(READ, self.on_waiting)
            self.down.watch(READ, self.on_greeting)
        else:
            self._open(said, sent)

    def on_connect_timeout(self) -> None:
        self._connect_next("no answer to the connect")

    def _connect_next(self, why: str) -> None:
        self._hang_up()
        if self.tried < len(self.backend.addresses):
            self._connect()
        else:
            self._unreachable(why)

    def _unreachable(self, why: str) -> None:
        if self.backend.tunnel is not None:
            self.retry(why)
            return
        self.router.resolved.pop(self.decision.key, None)  # perhaps it has moved
        self.refuse(Refused("backend", f"{self.decision.target}: {why}"))

    def on_greeting(self, mask: int) -> None:
        """The backend's answer to SSLRequest: exactly one `S`, or this is no place for a hello."""
        if self.state is not GREETING:
            return
        try:
            answer = self.down.source.recv(64)
            if not answer:
                self._unanswered("it closed the connection without an answer to SSLRequest")
            elif answer == b"S":
                self._open(self.hello, self.down.source.send(self.hello))
            else:
                said = "does not offer TLS" if answer == b"N" else f"answered SSLRequest with {answer[:8]!r}"
                self.refuse(Refused("backend_no_tls", f"{self.decision.target} {said}"))
        except BlockingIOError:
            pass
        except OSError as error:
            self._unanswered(error.strerror)

    def on_greeting_timeout(self) -> None:
        self._unanswered("no answer to SSLRequest")

    def _unanswered(self, why: str) -> None:
        """The backend failed before the client had a byte of it."""
        if self.backend.tunnel is not None:
            self.retry(why)
        else:
            self.refuse(Refused("backend", f"{self.decision.target}: {why}"))

    def _open(self, said: bytes, sent: int) -> None:
        """Pump: the backend has `sent` bytes of what the client said."""
        up, down = self.up, self.down
        self.state = up.state = down.state = OPEN
        up.total += len(said) if not self.retried else 0
        up.watch(READ, up.pump)
        down.watch(READ, down.pump)
        if self.backend.tunnel is not None:
            self.router.arm(self, self.router.first_byte_deadline)
        else:
            self.hello = None
            if self.deadline is not None:
                self.router.disarm(self)
        if sent != len(said):
            self.up.hold(memoryview(said)[sent:])

    # -- open

    def spoke(self, flow: Flow) -> None:
        """The first byte behind the hello, either way: from here on nothing can be sent again."""
        self.hello = None
        if flow is self.down:
            self.router.disarm(self)
            self.backend.child.proven = True

    def ended(self, flow: Flow) -> None:
        """The source has ended: pass that on behind its last byte."""
        if self.hello is not None:
            if flow is self.up:
                self.close("client_left")  # nobody ends TLS in the middle of its handshake, and stays
            else:
                self._unanswered("it closed the connection without a byte")
            return
        flow.state = DONE
        if flow.twin.state is DONE:
            self.close("backend_closed" if flow is self.up else "client_closed")  # who was first
            return
        self.router.to_end.append(flow.twin.source)
        flow.rewatch()

    def failed(self, flow: Flow, error: OSError) -> None:
        """The source is gone.  What it sent before is with the sink, and stays there."""
        if flow is self.up:
            self.close("client_reset")
        elif self.hello is not None:
            self._unanswered(error.strerror)
        else:
            self._linger(b"", "backend_reset")

    def broken(self, flow: Flow) -> None:
        """The sink takes no more.  What it sent is still to be read by the other flow."""
        flow.discard()
        if flow.twin.state is DONE:
            self.close("client_reset" if flow is self.down else "backend_reset")
            return
        flow.rewatch()
        flow.twin.rewatch()

    def on_first_byte_timeout(self) -> None:
        """The tunnel took the hello and is silent: say it once more; `TunnelTable.wait` looks at the process."""
        if self.hello is not None:
            self._unanswered(f"no answer within {FIRST_BYTE_TIMEOUT:g} s")

    # -- the end

    def retry(self, why: str) -> None:
        """A tunnel failed before the client had a byte: hear what its program says of that."""
        child, port = self.backend.child, 0
        if self.down.source is not None:
            with contextlib.suppress(OSError):  # it was reset
                port = self.down.source.getsockname()[1]
        self.failure = child, port, why  # for on_words
        self._drop_backend()
        last = self.retried or not self.replayable
        if self.router.tunnels.words(child, self.dialled, port).text or not last and not child.names_clients:
            self.on_words()
        else:
            self.state = PARKED
            self.up.watch(READ, self.on_waiting)
            self.router.arm(self, self.router.words_deadline)

    def on_words(self) -> None:
        """Once, and where that may help, send the same bytes again; else refuse, with the reason."""
        child, port, why = self.failure
        reason = self.router.tunnels.words(child, self.dialled, port)
        if self.retried or not self.replayable or reason.final:
            self.refuse(tunnel_refused(reason.kind, f"{self.decision.target}: {reason.text or why}"))
            return
        self.retried = True
        self.router.counters["retries"] += 1
        self.park(None if reason.text and child.names_clients else child)  # what says why is not to be doubted

    def _hang_up(self) -> None:
        """Let go of the connection to the backend."""
        if self.down.source is not None:
            if self.down.watched:
                self.router.poller.closing(self.down.fd)
                self.down.watched = 0
            self.down.source.close()
            self.down.source = None

    def _drop_backend(self) -> None:
        """Let go of the backend, its lease included."""
        for flow in (self.up, self.down):
            flow.discard()
        self._hang_up()
        if self.backend is not None and self.backend.tunnel is not None:
            self.router.tunnels.release(self.backend.tunnel, self.decision.route.idle)
        self.backend = None

    def refuse(self, error: Refused) -> None:
        """Turn a Refused into bytes, a log line and a counter: all refusals end here."""
        self.refusal = error
        self._leave_wait()
        speaks, minor = NOTHING, 0
        if self.prelude is not None:
            speaks, minor = self.prelude.language()
        elif self.hello is not None:
            speaks, minor = TLS, self.hello[2]
        farewell = told(error, speaks, minor)
        if farewell:
            self._linger(farewell, error.kind)
        else:
            self.close(error.kind)

    def _linger(self, farewell: bytes, reason: str) -> None:
        """Say goodbye, and give the client a moment to read it: unread bytes would reset it."""
        self._drop_backend()
        self.state = LINGERING
        self.reason = reason
        try:
            if farewell:
                self.client.send(farewell)
            self.client.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(reason)
            return
        self.router.arm(self, self.router.linger_deadline)
        self.up.watch(READ, self.on_linger)

    def on_linger(self, mask: int) -> None:
        """Read and forget what the client still says."""
        if self.state is not LINGERING:
            return
        try:
            if self.client.recv(READ_MAX):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.close(self.reason)

    def close(self, reason: str) -> None:
        """Let go of everything, once, and write the one line."""
        if self.state is CLOSED:
            return
        router = self.router
        backend = self.backend
        self.state = CLOSED
        if self.deadline is not None:
            router.disarm(self)
        if self.wait is not None:
            self._leave_wait()
        up, down = self.up, self.down
        if up.pending is not None or down.pending is not None:
            up.discard()
            down.discard()
        up.state = down.state = DONE
        if up.watched:
            router.poller.closing(up.fd)
        self.client.close()
        if down.source is not None:  # from here on _drop_backend, unrolled: every connection passes here
            if down.watched:
                router.poller.closing(down.fd)
            if self.hello is not None and backend.tunnel is not None:
                # A tunnel that still dials learns by a reset that it does so for nobody.
                with contextlib.suppress(OSError):
                    down.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            down.source.close()
        if backend is not None and backend.tunnel is not None:
            router.tunnels.release(backend.tunnel, self.decision.route.idle)
        up.twin = down.twin = NO_FLOW  # no cycles: nothing is left to the collector
        up.connection = down.connection = self.up = self.down = None
        self.peer.count -= 1
        router.closed(self, reason, up.total, down.total)


def keep_alive(sock: socket.SocketType) -> None:
    """Find a peer that is gone.  While data is under way the kernel's tcp_retries2 does, in 15 minutes.

    Before you add TCP_USER_TIMEOUT: measured, it also ends a client that is alive and does not read
    for that long (`psql ... | less`), though it acknowledges every probe of its closed window.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE, strict=True):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Listener(socket.socket):
    """A listening socket whose family and type are known, not asked for at each accept()."""

    family = socket.AF_INET
    type = socket.SOCK_STREAM

    def __init__(self, fd: int | None = None) -> None:
        super().__init__(self.family, self.type, 0, fd)

    def accept(self) -> tuple[socket.SocketType, tuple]:
        """The next client, as the interpreter's own kind of socket, and its address.

        socket.socket is a class written in Python around that one: 4 us for each connection.
        """
        fd, address = self._accept()
        return socket.SocketType(self.family, self.type, 0, fd), address


class Listener6(Listener):
    """The same for IPv6."""

    family = socket.AF_INET6


class Router(socketserver.ThreadingTCPServer):
    """The server: listeners, the loop, and what all connections share.

    `tunnels` is a TunnelTable; `settings` is what load_settings gives.  `routes` may be assigned at any time.
    `inherited` are sockets that listen already: those of the addresses in `settings.listen` that another
    process had, or, where there are `activated` ones (systemd), all that there are.
    Raises SettingsError where an address cannot be listened on.
    """

    version = __version__
    refusal_kinds = frozenset(REFUSALS)  # of what `counters` counts, what is a refusal
    allow_reuse_address = True
    request_queue_size = BACKLOG
    daemon_threads = True  # a resolver that hangs must not keep the process
    block_on_close = False

    def __init__(self, settings: types.SimpleNamespace, tunnels: TunnelTable,
                 inherited: Sequence[socket.socket] = (), activated: bool = False):
        self.settings = settings
        self.tunnels = tunnels
        self.routes: Routes = settings.routes
        self.max_connections: int = settings.max_connections
        self.max_per_client: int = settings.max_per_client
        self.phase = RUNNING
        self.deaf = threading.Event()  # its listeners are closed: it drains
        self.level = log.getEffectiveLevel()  # needed for each connection; `adopt` asks again
        self.connections: set[Connection] = set()
        # No Counter, which assigns slower.  Other threads use .get: [] would insert.
        self.counters: collections.defaultdict[str, int] = collections.defaultdict(int)
        self.endings: collections.deque[Ending] | None = None  # bounded, of whoever asks: every connection's
        self.started = time.time()
        self.reloads: collections.Counter[str] = collections.Counter()  # `ok`, `failed`
        self.last_reload = True, self.started  # whether it went well, and when it was
        self.resolved: dict[str, tuple[Backend, float]] = {}  # see `remember`
        self.peers: dict[str, Peer] = {}
        self.peers_full = PEERS_MAX
        self.waits: dict[str, Wait] = {}
        self.queued_waits: collections.deque[Wait] = collections.deque()
        self.waiting_threads = 0
        self.thread_wanted = False  # `_start_wait` is called in the next turn
        self.paused = False  # accepting
        self.pause_said = -PAUSE_SAID
        self.resume_at = self.drain_until = float("inf")
        self.pending = 0  # bytes kept for sinks that are full
        self.pipes: list[tuple[int, int]] = []  # to spare
        self.pipes_made = 0
        self.flow: type[Flow] = SpliceFlow if can_splice() else Flow
        self.pipe = self._make_pipe() if self.flow is SpliceFlow else None
        if self.pipe is None:
            self.flow = Flow
        self.keep(0)
        self.prelude_deadline = Deadline(settings.prelude_timeout, lambda c: c.refuse(Malformed(
            "the client did not say its name in time", kind="prelude_timeout")))
        self.parked_deadline = Deadline(settings.start_timeout + 1, lambda c: c.refuse(Refused(
            "tunnel_timeout", f"{c.decision.target}: waited too long for {c.decision.scheme.waits_on}")))
        self.connect_deadline = Deadline(CONNECT_TIMEOUT, Connection.on_connect_timeout)
        self.greeting_deadline = Deadline(GREETING_TIMEOUT, Connection.on_greeting_timeout)
        self.first_byte_deadline = Deadline(FIRST_BYTE_TIMEOUT, Connection.on_first_byte_timeout)
        self.words_deadline = Deadline(WORDS_TIMEOUT, Connection.on_words)
        self.linger_deadline = Deadline(LINGER, lambda c: c.close(c.reason))
        self.deadlines = (self.prelude_deadline, self.parked_deadline, self.connect_deadline,
                          self.greeting_deadline, self.first_byte_deadline, self.words_deadline, self.linger_deadline)
        self.sweep_every = self._sweep_interval()
        self.next_sweep = monotonic() + self.sweep_every
        self.next_beat = float("inf")
        self.next_check = self.next_sweep
        self.calls: collections.deque[Callable[[], None]] = collections.deque()
        self.to_end: list[socket.SocketType] = []  # shut down together: their readers are woken once
        self.to_read: list[Connection] = []
        self.to_dial: list[Connection] = []
        self.to_speak: list[Connection] = []
        self.steps = ((self.to_read, Connection.on_prelude), (self.to_dial, Connection.dial),
                      (self.to_speak, Connection.speak))
        self.poller = EpollPoller() if hasattr(select, "epoll") else Poller()
        self.wake_reader, self.wake_writer = os.pipe()
        for end in (self.wake_reader, self.wake_writer):
            os.set_blocking(end, False)
        self.poller.watch(self.wake_reader, READ, self._woken)
        self.listeners: list[socket.socket] = []
        self.inherited = list(inherited)
        self.addresses = [(listener.family, listener.getsockname()) for listener in inherited] if activated else [
            found for host, port in settings.listen for found in listen_addresses(host, port)]
        self.own_names = {host.lower() for host, _ in settings.listen} | {os.uname().nodename.lower()}
        self.address_family = self.addresses[0][0]
        super().__init__(self.addresses[0][1], None)

    # -- main thread ---------------------------------------------------------------------------

    def server_bind(self) -> None:
        """Bind every address.  Options set here are inherited by what is accepted."""
        for family, address in self.addresses:
            inherited = next((each for each in self.inherited if each.getsockname() == address), None)
            if inherited is not None:
                self.inherited.remove(inherited)
            listener = (Listener6 if family == socket.AF_INET6 else Listener)(inherited and inherited.detach())
            self.listeners.append(listener)
            try:
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                keep_alive(listener)
                if inherited is not None:
                    continue
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
            except OSError as error:
                raise SettingsError(f"--listen {show_address(address)}: {error.strerror}") from None
        self.socket.close()  # TCPServer makes one of its own class
        self.socket = self.listeners[0]
        self.server_address = self.socket.getsockname()

    def server_activate(self) -> None:
        """Listen on every address, and have the loop accept from it.  Raises SettingsError."""
        self.listening = [listener.getsockname()[:2] for listener in self.listeners]
        for listener in self.listeners:
            try:
                listener.listen(self.request_queue_size)
            except OSError as error:  # SO_REUSEADDR lets two bind; only one may listen
                raise SettingsError(f"--listen {show_address(listener.getsockname())}: {error.strerror}") from None
            listener.setblocking(False)
            self.poller.watch(listener.fileno(), READ, functools.partial(self._accept, listener))

    def server_close(self) -> None:
        """Close what is left.  After the loop has ended, or instead of it."""
        for listener in [self.socket, *self.listeners, *self.inherited]:
            listener.close()
        for pipe in [*self.pipes, *([self.pipe] if self.pipe else [])]:
            os.close(pipe[0])
            os.close(pipe[1])
        self.pipes, self.pipe = [], None
        self.poller.close()
        reader, writer = self.wake_reader, self.wake_writer
        self.wake_reader = self.wake_writer = -1  # a late thread must not write to whatever has the number next
        os.close(reader)
        os.close(writer)

    def call(self, act: Callable[[], None]) -> None:
        """Have the loop run `act`.  Any thread; returns at once."""
        self.calls.append(act)
        with contextlib.suppress(OSError):  # full: it is being woken; closed: there is no loop any more
            os.write(self.wake_writer, b"\0")

    def shutdown(self) -> None:
        """End the loop now.  Any thread; returns at once."""
        self.call(self._stop)

    def drain(self, seconds: float) -> None:
        """Accept no more, let connections end by themselves for so long, then end.  Any thread."""
        self.call(lambda: self._drain(seconds))

    # -- threads wait-<n>: ThreadingMixIn's hooks, its `request` is a Wait -------------------------

    def finish_request(self, wait: Wait, number: int) -> None:
        """Wait until the target may be ready."""
        threading.current_thread().name = f"wait-{number}"
        try:
            wait.decision.scheme.prepare(self, wait)
        except Refused as error:
            wait.error = error
        except Exception:
            log.exception("while waiting for %s", wait.decision.target)
            wait.error = Refused("internal", "a fault in sniroute")

    def shutdown_request(self, wait: Wait) -> None:
        """Hand the connections back to the loop."""
        self.call(lambda: self._hand_back(wait))

    def remember(self, decision: Decision, backend: Backend, until: float) -> None:
        """Keep a resolved address until then (clock time).  The loop does so, too."""
        if len(self.resolved) >= max(RESOLVED_MAX, 2 * len(self.routes.routes)):
            self.resolved.clear()
        self.resolved[decision.key] = backend, until

    def may_dial(self, decision: Decision, address: tuple) -> bool:
        """Whether a resolved address may be dialled.

        Never the router itself.  Where the client chooses the whole host (`*=tcp:{name}:443`,
        `tcp:{label}:443`), never a private address either: whoever owns a domain can point it at one.
        """
        ip = ipaddress.ip_address(address[0].partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        for host, port in self.listening:
            if port == address[1] and (host == str(ip) or host in ("::", "0.0.0.0") and is_local(ip)):
                return False
        route = decision.route
        host, _, _ = route.target.partition(":")[2].rpartition(":")
        chosen = host == "{label}" or host == "{name}" and route.pattern == "*" or host == "{domain}"
        return ip.is_global or not chosen

    # -- any thread ----------------------------------------------------------------------------

    def tunnel_of(self, name: str) -> str:
        """The tunnel that a client's name leads to: its key in the table.  Raises ValueError."""
        try:
            decision = self.decide(normalise(name.encode("ascii", "replace")))
        except Refused as error:
            raise ValueError(str(error)) from None
        if decision.scheme.ready is not tunnel_ready:
            raise ValueError(f"{name} leads to {decision.target}, which is no tunnel")
        return decision.tunnel

    def standing(self) -> str:
        """How it stands, in one line for people."""
        ready = sum(tunnel.state == "ready" for tunnel in list(self.tunnels.tunnels.values()))
        return f"{self.phase}: {len(self.connections)} connections, {ready} tunnels"

    # -- the loop ------------------------------------------------------------------------------

    def adopt(self, settings: types.SimpleNamespace) -> None:
        """Go on with other settings; what is open stays as it is."""
        former, self.settings = self.settings, settings
        settings.routes.take_tallies(self.routes)
        self.routes = settings.routes
        self.level = log.getEffectiveLevel()
        # Who stands in these queues already keeps its time: so they may fire late by as much as the times shrank.
        self.prelude_deadline.seconds = settings.prelude_timeout
        self.parked_deadline.seconds = settings.start_timeout + 1
        self.sweep_every = self._sweep_interval()
        self.next_sweep = min(self.next_sweep, monotonic() + self.sweep_every)
        self.max_connections, self.max_per_client = settings.max_connections, settings.max_per_client
        if self.paused and self.resume_at == float("inf"):
            self.resume_at = 0.0  # there may be room now
        if (former.proxy_from, former.proxy_protocol) != (settings.proxy_from, settings.proxy_protocol):
            self.peers = {}
            for connection in list(self.connections):
                connection.peer = self.peer_of(connection.address[0])
                connection.peer.count += 1
                if connection.state is PRELUDE and connection.peer.policy == "close":
                    connection.refuse(Refused("proxy", REFUSALS["proxy"].meaning))
        self.next_check = 0.0

    def _sweep_interval(self) -> float:
        """Seconds between two looks for silent connections: an eighth of the shortest silence that ends one."""
        idle = [route.connection_idle for route in self.routes.routes] + [self.settings.connection_idle]
        return min(SWEEP_LAST, *(each / 8 for each in idle if each), HALF_CLOSED_IDLE / 8)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Run the loop until `shutdown`, or until all has drained."""
        poll, callbacks = self.poller.poll, self.poller.callbacks
        while self.phase is not STOPPED:
            for fd, mask in poll(max(0.0, self.next_check - monotonic())):
                # Of a descriptor closed in this turn it is `ignore`: who gets its number waits only from the steps on.
                callback = callbacks[fd]
                try:
                    callback(mask)
                except Exception:
                    self.handle_error(callback, None)
            now = monotonic()
            if now >= self.next_check:
                self._check(now)
            for sink in self.to_end:
                try:
                    sink.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # it is gone, and its own flow will say so
            self.to_end.clear()
            for waiting, step in self.steps:
                if not waiting:
                    continue
                for connection in waiting:  # may grow meanwhile
                    try:
                        step(connection)
                    except Exception:
                        self.handle_error(connection.close, None)
                waiting.clear()
        for connection in list(self.connections):
            connection.close("stopped")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A fault of ours: log it whole, and end only the connection that met it."""
        log.exception("a fault in sniroute: please report it")
        owner = getattr(request, "__self__", getattr(getattr(request, "func", None), "__self__", None))
        connection = owner.connection if isinstance(owner, Flow) else owner
        if isinstance(connection, Connection):
            connection.close("internal")

    def _accept(self, listener: socket.socket, mask: int) -> None:
        """Take the connections that wait."""
        if self.phase is not RUNNING or self.paused:
            return  # an event of the turn in which that changed
        for taken in range(ACCEPTS):
            if len(self.connections) >= self.max_connections:
                if taken or self.to_read:
                    return  # whether one more waits, the next event tells; who is silent, the next step
                if not self.shed():
                    self.pause(f"--max-connections ({self.max_connections}) are open", float("inf"))
                    return
            try:
                client, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in CAPACITY_ERRNOS:
                    self.pause(error.strerror, monotonic() + ACCEPT_PAUSE)
                    return
                continue  # that client is gone (ECONNABORTED), or a firewall took it (EPERM)
            client.setblocking(False)
            host = address[0]
            if host.startswith("::ffff:"):
                host = host[7:]  # an IPv4 client of a dual-stack listener
            peer = self.peers.get(host) or self.peer_of(host)
            self.counters["accepted"] += 1
            if peer.count >= self.max_per_client and not peer.exempt or peer.policy == "close":
                kind = "proxy" if peer.policy == "close" else "client_limit"
                Connection(self, client, (host, address[1]), peer).refuse(Refused(kind, REFUSALS[kind].meaning))
                continue
            self.to_read.append(Connection(self, client, (host, address[1]), peer))

    def shed(self) -> bool:
        """Refuse the client that has been silent longest; False where all have said their name."""
        for connection in self.prelude_deadline.entries:
            connection.refuse(Refused("shed", REFUSALS["shed"].meaning))
            return True
        return False

    def pause(self, why: str, until: float) -> None:
        """Stop accepting for a while: a listener that stays readable would spin the loop."""
        if self.paused or self.phase is not RUNNING:
            return
        now = monotonic()
        if now - self.pause_said >= PAUSE_SAID:
            self.pause_said = now
            log.warning("not accepting for now: %s", why)
        self.paused = True
        for listener in self.listeners:
            self.poller.forget(listener.fileno())
        self.resume_at = until
        self.next_check = min(self.next_check, until)

    def _resume(self) -> None:
        """Accept again."""
        self.resume_at = float("inf")
        self.paused = False
        for listener in self.listeners:
            self.poller.watch(listener.fileno(), READ, functools.partial(self._accept, listener))

    def peer_of(self, host: str) -> Peer:
        """What the settings say of an address.  Remembered, so that it is asked once."""
        address = ipaddress.ip_address(host.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        trusted = any(address in network for network in self.settings.proxy_from)
        exempt = trusted or address.is_loopback
        key = str(address)
        if address.version == 6 and not exempt:
            key = str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
        if len(self.peers) >= self.peers_full:
            self.peers = {name: peer for name, peer in self.peers.items() if peer.count}
            self.peers_full = max(PEERS_MAX, 2 * len(self.peers))
        policy = PROXY_POLICY[self.settings.proxy_protocol, trusted]
        peer = self.peers[host] = self.peers.setdefault(key, Peer(key, policy, address.is_loopback, exempt))
        return peer

    def decide(self, name: str | None) -> Decision:
        """What becomes of a name.  Raises Refused."""
        if name is None:
            farewell = b"OK\n" if self.settings.no_name == "ok" else b""
            raise Refused("no_name", REFUSALS["no_name"].meaning, farewell=farewell)
        decision = self.routes.decide(name)
        if name in self.own_names and decision.route.pattern != name:
            raise Refused("no_route", f"{name} is this router itself")
        return decision

    def join_wait(self, connection: Connection, doubted: Child | None) -> None:
        """Have a connection wait with those that want the same; the first brings a thread.

        Who joins later waits for what the first asked for: its doubt, its deadline, its budget.
        """
        decision = connection.decision
        wait = self.waits.get(decision.key)
        if wait is None:
            if len(self.waits) >= WAITS_MAX:
                connection.refuse(Refused("busy", f"{WAITS_MAX} names wait already"))
                return
            client = None if connection.peer.exempt else connection.peer.key
            if client and sum(w.client == client and not w.number for w in self.waits.values()) >= WAITS_PER_CLIENT:
                connection.refuse(Refused("busy", f"{client} has {WAITS_PER_CLIENT} names that wait for a thread"))
                return
            wait = Wait(decision, client, monotonic() + self.settings.start_timeout, doubted)
            self.waits[decision.key] = wait
            self.queued_waits.append(wait)
        wait.connections[connection] = None
        connection.wait = wait
        self._want_thread()

    def _want_thread(self) -> None:
        """Have a thread started for a name in the next turn, one in a turn: each takes a while."""
        if self.queued_waits and self.waiting_threads < WAIT_THREADS and not self.thread_wanted:
            self.thread_wanted = True
            self.call(self._start_wait)

    def _start_wait(self) -> None:
        self.thread_wanted = False
        if not self.queued_waits:
            return  # they have left
        wait = self.queued_waits.popleft()
        self.waiting_threads += 1
        wait.number = self.waiting_threads
        try:
            self.process_request(wait, wait.number)
        except RuntimeError as error:  # no more threads to be had
            wait.error = Refused("busy", str(error))
            self.call(functools.partial(self._hand_back, wait))
        self._want_thread()

    def _hand_back(self, wait: Wait) -> None:
        """A wait is over: go on with its connections."""
        self.waiting_threads -= 1
        del self.waits[wait.decision.key]
        self._want_thread()
        for connection in list(wait.connections):
            if connection.wait is not wait:
                continue  # those before it have ended it
            try:
                if wait.error is None or wait.error.kind == "tunnel_budget" and connection.peer.key != wait.client:
                    connection.resume()  # a budget that is spent is one client's, not the next one's
                else:
                    connection.refuse(wait.error)
            except Exception:
                self.handle_error(connection.resume, None)

    def arm(self, connection: Connection, deadline: Deadline) -> None:
        """Put a connection into the queue of a deadline, and out of the one it stands in."""
        if connection.deadline is not None:
            del connection.deadline.entries[connection]
        connection.deadline = deadline
        due = deadline.entries[connection] = monotonic() + deadline.seconds
        if due < self.next_check:
            self.next_check = due

    def disarm(self, connection: Connection) -> None:
        """Take a connection out of its queue."""
        if connection.deadline is not None:
            del connection.deadline.entries[connection]
            connection.deadline = None

    def _check(self, now: float) -> None:
        """Do what is due, and find out when to look again."""
        if now >= self.resume_at:
            self._resume()
        if now >= self.drain_until:
            self._stop()
        if now >= self.next_sweep:
            self._sweep(now)
        if now >= self.next_beat:
            self.next_beat = now + self.beat()
        self.next_check = float("inf")  # what is armed from here on lowers it
        for deadline in self.deadlines:
            entries = deadline.entries
            while entries:
                connection, due = next(iter(entries.items()))
                if due > now:
                    self.next_check = min(self.next_check, due)
                    break
                self.disarm(connection)
                try:
                    deadline.act(connection)
                except Exception:
                    self.handle_error(connection.close, None)
        # Looked at last: what was done above may have changed them.
        self.next_check = min(self.next_check, self.next_sweep, self.next_beat, self.resume_at, self.drain_until)

    def _sweep(self, now: float) -> None:
        """Close what has been silent too long: found by comparing byte counts, free for the pump."""
        self.next_sweep = now + self.sweep_every
        for connection in list(self.connections):
            up, down = connection.up, connection.down
            for flow, reason in ((up, "client_reset"), (down, "backend_reset")):
                # A socket that is not watched, because its bytes are not wanted now, cannot say so itself.
                if not flow.watched and flow.source is not None \
                        and flow.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    connection.close(reason)
                    break
            if connection.state is not OPEN:
                continue
            if up.total + down.total != connection.carried:
                connection.carried = up.total + down.total
                connection.quiet_since = now
            idle = connection.decision.route.connection_idle
            idle = (self.settings.connection_idle if idle is None else idle) or float("inf")
            half = DONE in (up.state, down.state)
            if now - connection.quiet_since >= (min(idle, HALF_CLOSED_IDLE) if half else idle):
                connection.close("idle")

    def closed(self, connection: Connection, reason: str, up: int, down: int) -> None:
        """A connection is over: count it, log it, and see who may come in its place."""
        self.connections.discard(connection)
        refusal = connection.refusal
        counters = self.counters
        counters[reason] += 1
        counters["bytes_up"] += up
        counters["bytes_down"] += down
        level = logging.INFO
        decision = connection.decision
        if decision is not None:
            tally = decision.tally
            tally.active -= connection.admitted
            tally.total += 1
            tally.up += up
            tally.down += down
        if refusal is not None:
            level = REFUSALS[refusal.kind].level
            if decision is not None:
                tally.refused += 1
        endings = self.endings
        if level >= self.level or endings is not None:
            began, dialled = connection.began, connection.dialled
            ending = new_tuple(Ending, (
                level, time.time(), connection.address, connection.name, decision and decision.route.pattern,
                decision and decision.target, up, down, monotonic() - began, reason,
                str(refusal) if refusal is not None else None, dialled - began if dialled else None))
            if level >= self.level:
                self.journal(ending)
            if endings is not None:
                endings.append(ending)
        if self.paused and self.resume_at == float("inf") \
                and len(self.connections) < self.max_connections - self.max_connections // 20:
            self.resume_at = self.next_check = 0.0
        if self.phase is DRAINING and not self.connections:
            self._stop()

    journal: Callable[[Ending], None] = staticmethod(lambda ending: None)  # Journal.emit, where there is one
    beat: Callable[[], float] = staticmethod(lambda: float("inf"))  # the loop; seconds to the next: see Supervisor
    reload: Callable[[], list[str]] = staticmethod(lambda: [])  # any thread; what is wrong, a line each: see Daemon

    def _woken(self, mask: int) -> None:
        """Run what other threads asked for."""
        os.read(self.wake_reader, 4096)
        for _ in range(len(self.calls)):  # what these ask for is for the next turn
            act = self.calls.popleft()
            try:
                act()
            except Exception:
                self.handle_error(act, None)

    def _drain(self, seconds: float) -> None:
        if self.phase is not RUNNING:
            return
        for listener in self.listeners:
            if not self.paused:
                self.poller.forget(listener.fileno())  # not `closing`: another process may hold it, and epoll goes on
            listener.close()
        self.deaf.set()
        self.phase = DRAINING
        self.resume_at = float("inf")
        self.paused = False
        log.info("draining: %d connections have %g s to end", len(self.connections), seconds)
        self.drain_until = monotonic() + seconds
        self.next_check = min(self.next_check, self.drain_until)
        if not self.connections:
            self._stop()

    def _stop(self) -> None:
        self.phase = STOPPED

    def dump(self) -> None:
        """Log what there is, at most DUMP_MAX of a kind and whatever --log-level: somebody asked for it."""
        level = max(logging.INFO, log.level)
        log.log(level, "counters: %s", dict(sorted({**self.counters, **dict(self.tunnels.counters)}.items())))
        tunnels = [*self.tunnels.snapshot(), *self.tunnels.failed()]
        for view in tunnels[:DUMP_MAX]:
            log.log(level, "tunnel %s: %s for %.0f s, %d connections, port %d, pid %d%s", view.key, view.state,
                    view.age, view.leases, view.port, view.pid, f": {view.words}" if view.words else "")
        now = monotonic()
        for connection in list(self.connections)[:DUMP_MAX]:
            log.log(level, "connection %s: %s for %.1f s, name %s, %d bytes up, %d down",
                    show_address(connection.address), connection.state, now - connection.began, connection.name,
                    connection.up.total, connection.down.total)
        for what, count in (("tunnels", len(tunnels)), ("connections", len(self.connections))):
            if count > DUMP_MAX:
                log.log(level, "and %d %s more", count - DUMP_MAX, what)

    # -- pipes and what is kept for slow readers

    def _make_pipe(self) -> tuple[int, int] | None:
        """A pipe of BULK bytes; None where descriptors are short."""
        try:
            pipe = os.pipe()
        except OSError:
            return None
        for end in pipe:
            os.set_blocking(end, False)
        with contextlib.suppress(OSError):  # over the user's share of pipe memory: it holds less at a time
            fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, BULK)
        self.pipes_made += 1
        return pipe

    def lend_pipe(self) -> tuple[int, int] | None:
        """Give the pipe in use away, if there is another."""
        spare = self.pipes.pop() if self.pipes else self._make_pipe() if self.pipes_made < PIPES_MAX else None
        if spare is None:
            return None
        lent, self.pipe = self.pipe, spare
        return lent

    def return_pipe(self, pipe: tuple[int, int]) -> None:
        """Take an empty pipe back."""
        self.pipes.append(pipe)

    def drop_pipe(self, pipe: tuple[int, int]) -> None:
        """Close a pipe with bytes in it that nobody wants."""
        os.close(pipe[0])
        os.close(pipe[1])
        self.pipes_made -= 1

    def lose_pipe(self) -> None:
        """Replace the pipe in use: it holds bytes whose sink is gone."""
        spare = self.pipes.pop() if self.pipes else self._make_pipe()
        if spare is None:  # no descriptors: empty it instead
            try:
                while os.read(self.pipe[0], BULK):
                    pass
            except BlockingIOError:
                return
        self.drop_pipe(self.pipe)
        self.pipe = spare

    def keep(self, count: int) -> None:
        """Count bytes kept for full sinks; the more there are, the less is read at a time."""
        self.pending += count
        self.bulk = BULK if self.pending < PENDING_MAX else SMALL  # for one splice
        self.chunk = min(self.bulk, READ_MAX)  # for one read of a flow that cannot splice


def listen_addresses(host: str, port: int) -> list[tuple[int, tuple]]:
    """(family, address) of what a --listen means.  Raises SettingsError."""
    if host == "*":  # as getsockname() says it: so a socket that is handed over is known again
        both = socket.has_dualstack_ipv6()
        return [(socket.AF_INET6, ("::", port, 0, 0)) if both else (socket.AF_INET, ("0.0.0.0", port))]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"--listen {host}:{port}: {getattr(error, 'strerror', error)}") from None
    return [(family, address) for family, _, _, _, address in found]


# -- commands ----------------------------------------------------------------------------------


def show_option(value: Any) -> str:
    """An option of a route, for people."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g} s" if isinstance(value, float) and value else str(value or "off")


def show_route(route: Route) -> str:
    """A route and its options, for people."""
    options = [f"{name} {show_option(value)}" for name in ROUTE_OPTIONS
               if (value := getattr(route, name)) != Route._field_defaults[name]]
    return f"{route} ({'; '.join(options)})" if options else str(route)


def check(settings: types.SimpleNamespace) -> int:
    """`sniroute check`: the settings are valid, or we would not be here.  The routes, as they are matched."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("sniroute: %(message)s"))
    log.addHandler(handler)
    warn(settings)
    log.removeHandler(handler)
    for route in settings.routes.in_order():
        print(show_route(route))
    return 0


def explain(settings: types.SimpleNamespace) -> int:
    """`sniroute explain NAME`: 0 where a route fits the name, 1 where it would be refused.

    Where the carrier would serve it, the far end is tried, once.  Where a router runs with an admin address,
    it is asked how that tunnel stands there.  What else takes a running router is not asked: `forbidden`,
    `not_allowed`, and a name that is the router's own.
    """
    def refuse(error: Refused) -> int:
        print(f"refused: {error} ({error.kind}, TLS alert {error.alert})")
        print("to do:  ", REFUSALS[error.kind].advice)
        return 1

    try:
        name = normalise(os.fsencode(settings.name))
        decision = settings.routes.decide(name)
    except Refused as error:
        print(f"name:    {printable(settings.name)}")
        return refuse(error)
    print(f"name:    {name}\nroute:   {show_route(decision.route)}\ntarget:  {decision.target}")
    launcher = settings.launchers.get(decision.tunnel.partition(":")[0])
    if settings.admin is not None:
        explain_live(settings.admin, None if launcher is None else decision.tunnel)
    try:
        if launcher is not None:
            print("runs:   ", shlex.join([launcher.find(), *launcher.argv(decision.rest, settings.ports[0])]))
            if decision.tunnel != decision.target:
                print("token:   not shown there: the client may own that domain")
            try_tunnel(launcher, decision.rest)
    except TunnelError as error:
        return refuse(tunnel_refused(error.kind, str(error)))
    return 0


# What to do about a tunnel in a running router, by its state.
TUNNEL_ADVICE = {
    "absent": "nothing: the next client starts it",
    "queued": "nothing, it waits for its turn; if it stays so: --max-starting, --max-tunnels, --ports",
    "starting": "nothing yet: it may take --start-timeout",
    "ready": "nothing; if clients fail all the same: the far end, see the log's lines for this name",
    "stopping": "nothing: the next client starts it again",
    "backoff": "see why it ended; it is started again by itself",
    "failed": "mend what it says; then POST /tunnels/NAME/stop forgets it, or wait",
}


def explain_live(admin: str | tuple[str, int], key: str | None) -> None:
    """Print how a tunnel stands in the router whose admin address this is."""
    try:
        status = ask_admin(admin)
        rows = [row for row in status["tunnels"] if row["key"] == key]
        print(f"router:  {status['phase']}, pid {status['pid']}, {status['connections']['active']} connections")
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"router:  no answer from its admin address: {printable(str(error))}")
        return
    if key is None:
        return
    row = rows[0] if rows else {"state": "absent", "age": 0, "leases": 0, "next": 0, "words": ""}
    facts = [f"for {row['age']:.0f} s"] * (row["age"] > 0) + [f"{row['leases']} connections"] * (row["leases"] > 0)
    facts += [f"next in {row['next']:.0f} s"] * (row["next"] > 0)
    print("tunnel: ", ", ".join([printable(row["state"]), *facts]))
    if row["words"]:
        print("said:   ", printable(row["words"], 500))
    print("to do:  ", TUNNEL_ADVICE.get(row["state"], "see the README"))


def ask_admin(admin: str | tuple[str, int]) -> dict[str, Any]:
    """GET /status.  Raises OSError, or ValueError for an answer that is none."""
    import http.client  # a megabyte, for this one question
    connection = http.client.HTTPConnection("localhost")
    try:
        family = socket.AF_UNIX if isinstance(admin, str) else socket.AF_INET6 if ":" in admin[0] else socket.AF_INET
        connection.sock = socket.socket(family)
        connection.sock.settimeout(ADMIN_TIMEOUT)
        connection.sock.connect(admin)
        connection.request("GET", "/status")
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"{answer.status} {answer.reason}")
        return json.loads(answer.read())
    except http.client.HTTPException as error:
        raise ValueError(repr(error)) from None
    finally:
        connection.close()


def try_tunnel(launcher: Launcher, hostname: str) -> None:
    """Dial once, where the program can do that and end.  Raises TunnelError with its reason."""
    if launcher.trial is None:
        return
    try:
        trial = subprocess.run([launcher.find(), *launcher.trial(hostname)], env=launcher.environment, cwd="/",
                               stdin=subprocess.DEVNULL, capture_output=True, timeout=TRIAL_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise TunnelError("timeout", f"no answer within {TRIAL_TIMEOUT:g} s") from None
    if trial.returncode:
        reason = launcher.reason(trial.stderr)
        raise TunnelError(reason.kind, reason.text)
    print("far end: it answers")


def sample_hello(name: str | None, size: int = 0, record: int = RECORD_MAX) -> bytes:
    """A ClientHello (RFC 8446 4.1.2), padded to so many bytes (RFC 7685) and cut into records of so many."""
    host = (name or "").encode()
    names = struct.pack("!HHHBH", 0, len(host) + 5, len(host) + 3, 0, len(host)) + host if name else b""
    head = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
    pad = max(0, size - len(head) - len(names) - 15)
    extensions = names + struct.pack("!HH", 21, pad) + bytes(pad)
    body = head + struct.pack("!H", len(extensions)) + extensions
    message = b"\1" + len(body).to_bytes(3, "big") + body
    parts = [message[at:at + record] for at in range(0, len(message), record)]
    return b"".join(struct.pack("!BHH", 22, 0x0301, len(part)) + part for part in parts)


class SelfTestBackend(socketserver.BaseRequestHandler):
    """Sends everything back, PostgreSQL's question for TLS apart; ends when its client ends."""

    def handle(self) -> None:
        """Serve one connection."""
        with contextlib.suppress(OSError):
            while data := self.request.recv(READ_MAX):
                self.request.sendall(b"S" if data.endswith(SSL_REQUEST_BYTES) else data)


# A tunnel program for the self-test: it echoes.  The name that begins with `dies` ends its first process at
# the first client, without a word.
SELF_TEST_TUNNEL = """
import os, socket, sys, threading
name, port = sys.argv[1], int(sys.argv[2])
mark = os.path.join(os.environ["HOME"], name)
def serve(client):
    with client:
        while data := client.recv(65536):
            client.sendall(data)
listener = socket.create_server(("127.0.0.1", port))
while True:
    client, _ = listener.accept()
    if name.startswith("dies") and not os.path.exists(mark):
        open(mark, "w").close()
        os._exit(1)
    threading.Thread(target=serve, args=(client,)).start()
"""


class SelfTest:
    """A router on loopback, with routes to an echo and to tunnels that echo, and a client for it."""

    ROUTES = ("--route", "echo.example.com=tcp:127.0.0.1:{port}",
              "--route", "**.tunnel.example.com=cloudflared:{{name}}")

    def __init__(self) -> None:
        self.deadline = monotonic() + SELF_TEST_TIME
        self.backend = socketserver.ThreadingTCPServer(("127.0.0.1", 0), SelfTestBackend)
        self.backend.daemon_threads = True
        port = self.backend.server_address[1]
        settings = load_settings(["--listen", "127.0.0.1:0", *(word.format(port=port) for word in self.ROUTES)], {})
        launcher = Launcher(sys.executable, lambda name, port: ["-I", "-S", "-c", SELF_TEST_TUNNEL, name, str(port)],
                            {}, lambda tail: Reason(text=printable(tail.decode(errors="replace"))), "no Python")
        self.tunnels = TunnelTable({"cloudflared": launcher}, settings.ports)
        self.router = Router(settings, self.tunnels)
        self.threads = [threading.Thread(target=self.backend.serve_forever, args=(0.05,), name="backend"),
                        threading.Thread(target=self.router.serve_forever, name="loop")]

    def __enter__(self) -> SelfTest:
        self.tunnels.start()
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.router.shutdown()
        self.backend.shutdown()
        for thread in self.threads:
            thread.join()
        self.tunnels.close(now=True)
        self.router.server_close()
        self.backend.server_close()

    def connect(self) -> socket.socket:
        """A client, which gives up when the time for the whole test is over."""
        client = socket.create_connection(self.router.server_address, 2)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.settimeout(max(0.1, min(3.0, self.deadline - monotonic())))
        return client

    def expect(self, client: socket.socket, expected: bytes) -> None:
        """Read exactly that.  Raises AssertionError with what came instead."""
        data = b""
        try:
            while len(data) < len(expected) and (more := client.recv(len(expected) - len(data))):
                data += more
        except OSError as error:
            raise AssertionError(f"{error} after {len(data)} of {len(expected)} bytes") from None
        if data != expected:
            raise AssertionError(f"{len(data)} bytes, {data[:20].hex(' ')}..., in the place of {len(expected)}")

    def talk(self, *steps: bytes | tuple[bytes, bytes], end: bool = False, piece: int = 0) -> None:
        """Say each step, in pieces of so many bytes, and hear the same, or what stands behind it; then the `end`."""
        with self.connect() as client:
            for step in steps:
                said, heard = step if isinstance(step, tuple) else (step, step)
                for at in range(0, len(said), piece or len(said)):
                    client.sendall(said[at:at + (piece or len(said))])
                self.expect(client, heard)
            if end and client.recv(1):
                raise AssertionError("more than that")

    # -- the cases that are more than a talk

    def half_close(self) -> None:
        """The client ends; what is on its way back still arrives, and then the backend's end."""
        with self.connect() as client:
            client.sendall(HELLO_SAMPLE + b"last words")
            client.shutdown(socket.SHUT_WR)
            self.expect(client, HELLO_SAMPLE + b"last words")
            if client.recv(1):
                raise AssertionError("no end")

    def megabytes(self) -> None:
        """Four MiB there and back, by a client that reads late."""
        data = os.urandom(1 << 22)
        with self.connect() as client:
            def write() -> None:
                with contextlib.suppress(OSError):  # `expect` says what is missing
                    client.sendall(HELLO_SAMPLE + data)

            writer = threading.Thread(target=write)
            writer.start()
            try:
                self.expect(client, HELLO_SAMPLE + data)
            finally:
                client.shutdown(socket.SHUT_RDWR)
                writer.join()

    def crowd(self) -> None:
        """Twenty clients of one cold name: one process, and all are answered."""
        said = sample_hello("crowd.tunnel.example.com")
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self.connect()) for _ in range(20)]
            for client in clients:
                client.sendall(said)
            for client in clients:
                self.expect(client, said)
                client.close()
        if self.tunnels.counters["starts"] != 1:
            raise AssertionError(f"{self.tunnels.counters['starts']} processes were started")

    def killed(self) -> None:
        """A tunnel is killed while it is in use: its client hears the end, the next is served by another process."""
        said = sample_hello("killed.tunnel.example.com")
        with self.connect() as client:
            client.sendall(said)
            self.expect(client, said)
            os.kill(next(v.pid for v in self.tunnels.snapshot() if "killed" in v.key), signal.SIGKILL)
            with contextlib.suppress(ConnectionResetError):
                if client.recv(1):
                    raise AssertionError("no end")
        self.talk(said)


HELLO_SAMPLE = sample_hello("echo.example.com")
NEGOTIATED = (SSL_REQUEST_BYTES, b"S")
NO_NAME_ALERT, BROKEN_ALERT = tls_alert(UNRECOGNIZED_NAME, 1), tls_alert(DECODE_ERROR, 1)
PROXY_SAMPLES = (proxy_v1(("192.0.2.1", 1111), ("192.0.2.9", 443)), proxy_v2(("192.0.2.1", 1111), ("192.0.2.9", 443)))

# What `selftest` tries: (for people, what to do).
SELF_TESTS: tuple[tuple[str, Callable[[SelfTest], None]], ...] = (
    ("a hello", lambda t: t.talk(HELLO_SAMPLE, b"and more")),
    ("a hello in one-byte segments", lambda t: t.talk(HELLO_SAMPLE, piece=1)),
    ("a hello over many records", lambda t: t.talk(sample_hello("echo.example.com", 600, 16))),
    ("a hello of post-quantum size, in two segments",
     lambda t: t.talk(sample_hello("echo.example.com", 1800), piece=1460)),
    ("a hello of 16 KiB", lambda t: t.talk(sample_hello("echo.example.com", HELLO_MAX - 100))),
    ("a PROXY header, version 1", lambda t: t.talk(PROXY_SAMPLES[0] + HELLO_SAMPLE)),
    ("a PROXY header, version 2", lambda t: t.talk(PROXY_SAMPLES[1] + HELLO_SAMPLE)),
    ("a PROXY header from itself twice is refused", lambda t: t.talk((PROXY_SAMPLES[0] * 2, b""), end=True)),
    ("PostgreSQL: SSLRequest", lambda t: t.talk(NEGOTIATED, HELLO_SAMPLE, b"query")),
    ("PostgreSQL: GSSENCRequest, then SSLRequest",
     lambda t: t.talk((struct.pack("!II", 8, GSSENC_REQUEST), b"N"), NEGOTIATED, HELLO_SAMPLE)),
    ("PostgreSQL: PROXY header, SSLRequest",
     lambda t: t.talk((PROXY_SAMPLES[1] + SSL_REQUEST_BYTES, b"S"), HELLO_SAMPLE)),
    ("PostgreSQL without TLS is told why",
     lambda t: t.talk((struct.pack("!II", 20, STARTUP << 16) + b"user\0selft\0\0", told(Refused("plain_postgres", ""), POSTGRES)), end=True)),
    ("no name: an alert", lambda t: t.talk((sample_hello(None), NO_NAME_ALERT), end=True)),
    ("a name without a route: an alert", lambda t: t.talk((sample_hello("a.example.net"), NO_NAME_ALERT), end=True)),
    ("a broken hello: an alert", lambda t: t.talk((b"\x16\3\1\0\4\1\0\0\0", BROKEN_ALERT), end=True)),
    ("HTTP is refused", lambda t: t.talk((b"GET / HTTP/1.1\r\n", b""), end=True)),
    ("half-close", SelfTest.half_close),
    ("4 MiB there and back", SelfTest.megabytes),
    ("a tunnel for a crowd: one process", SelfTest.crowd),
    ("a tunnel that dies at its first client: nobody notices",
     lambda t: t.talk(sample_hello("dies.tunnel.example.com"))),
    ("a tunnel that is killed is started again", SelfTest.killed),
)


def selftest(settings: types.SimpleNamespace) -> int:
    """`sniroute selftest`: the real router against its hard cases, on loopback.  0 where all went well, else 1."""
    log.addHandler(logging.NullHandler())
    log.propagate = False
    began, failed = monotonic(), 0
    with SelfTest() as test:
        for title, run in SELF_TESTS:
            start, fault = monotonic(), ""
            try:
                run(test)
            except (AssertionError, OSError, StopIteration) as error:
                fault = f": {printable(str(error) or repr(error))}"
                failed += 1
            print(f"{'FAIL' if fault else 'ok':4}  {monotonic() - start:5.2f} s  {title}{fault}", flush=True)
    print(f"{len(SELF_TESTS) - failed} of {len(SELF_TESTS)} went well, in {monotonic() - began:.1f} s")
    return 1 if failed else 0


def serve(settings: types.SimpleNamespace) -> int:
    """`sniroute serve`: run until a signal ends it.  The exit code."""
    raise_descriptor_limit()
    # Not sys.stderr: Python flushes that at its exit, and hangs or fails there if nobody reads it.
    stream = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "ascii", "replace", write_through=True)
    journal = Journal(stream, settings.log_format)
    log.setLevel(settings.log_level.upper())
    log.propagate = False
    log.addHandler(journal)
    try:
        return Daemon(settings, journal).run()
    finally:
        log.removeHandler(journal)
        journal.stop()
        for number in SIGNALS:  # until now they were blocked; the interpreter sets the default again at its end
            signal.signal(number, signal.SIG_IGN)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Supervisor:
    """What systemd is told (sd_notify(3)), where it asks.  Any thread: a message is one datagram."""

    def __init__(self, environ: dict[str, str]):
        self.socket: socket.socket | None = None
        self.watchdog = False
        self.every = STATUS_EVERY
        self.status = ""  # as it was last told
        address = environ.get("NOTIFY_SOCKET")
        if not address:
            return
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        try:
            self.socket.connect("\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            log.warning("NOTIFY_SOCKET %s: %s", printable(address), error.strerror)
            self.close()
            return
        usec = environ.get("WATCHDOG_USEC", "")
        if usec.isdecimal() and int(usec) and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self.watchdog = True
            self.every = min(STATUS_EVERY, int(usec) / 2e6)

    def tell(self, *lines: str) -> None:
        """Send a message.  Nobody to hear it, or no room for it, is no reason to fail."""
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.send("\n".join(lines).encode())

    def ready(self, router: Router) -> None:
        """It serves, or does so again with other settings."""
        self.status = router.standing()
        self.tell("READY=1", f"STATUS={self.status}")

    def beat(self, router: Router) -> float:
        """The loop lives: it says so itself.  Returns the seconds until it has to again."""
        lines = ["WATCHDOG=1"] if self.watchdog else []
        if router.phase is DRAINING:
            lines.append(f"EXTEND_TIMEOUT_USEC={int(1e6 * (2 * self.every + STOP_TIME))}")
        status = router.standing()
        if status != self.status:
            self.status = status
            lines.append(f"STATUS={status}")
        if lines:
            self.tell(*lines)
        return self.every

    def close(self) -> None:
        """Let go of it."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None


def activated_sockets(environ: dict[str, str]) -> dict[str, list[socket.socket]]:
    """The sockets that systemd listens on for us (sd_listen_fds(3)): those named `admin`, and all others under ''.

    Raises SettingsError where one is no listening TCP socket (the admin's may be a unix one).
    """
    found: dict[str, list[socket.socket]] = {"": [], "admin": []}
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return found
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    for number, fd in enumerate(range(LISTEN_FDS_START, LISTEN_FDS_START + int(count))):
        name = names[number] if number < len(names) else ""
        use = name if name in found else ""
        families = [socket.AF_INET, socket.AF_INET6, *([socket.AF_UNIX] if use else [])]
        try:
            sock = socket.socket(fileno=fd)
            sock.set_inheritable(False)
            found[use].append(sock)
            if sock.family in families and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
        except OSError:
            pass
        raise SettingsError(f"LISTEN_FDS: descriptor {fd} ({printable(name) or 'no name'}) is no listening TCP socket")
    return found


class Handover:
    """Passes the listening sockets on to a successor, so that a restart refuses nobody.  Main thread.

    A second process of the same user with the same --listen is that successor:

        successor                               predecessor
        connects to the address's name  ---->
                                        <----   all its sockets: those that listen, and its names' (SCM_RIGHTS)
        accepts, too
        "drain"                         ---->   closes its listeners, and drains
                                        <----   lets go of its names and of the admin address: end of file
        has the names

    If it dies before that word, nothing has changed.  The names are handed on, not taken anew, so that there is
    no moment without: who comes next waits in their backlog for whoever has them then.

    A name is one of unix(7)'s abstract ones: no file that outlives its owner, and as wide as TCP ports are, one
    network namespace.  Both look who the other is, since any user may take such a name.  Without them (macOS)
    there is no hand-over.
    """

    def __init__(self) -> None:
        self.names: list[socket.socket] = []
        self.inherited: dict[tuple[str, int], socket.socket] = {}  # names by address, until they are offered
        self.predecessors: list[socket.socket] = []
        self.successor: socket.socket | None = None  # one at a time: others wait in the backlog of the names

    @staticmethod
    def name(address: tuple) -> str:
        """The name of the process that listens on an address."""
        return f"\0sniroute {show_address(address)}"

    @staticmethod
    def is_ours(peer: socket.socket) -> bool:
        """Whether the other end is a process of this user."""
        _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return user == os.geteuid()

    def take(self, addresses: Iterable[tuple[str, int]]) -> list[socket.socket]:
        """The sockets that predecessors have for these addresses."""
        wanted = {address for address in addresses if address[1]}
        taken: dict[tuple, socket.socket] = {}
        deadline = monotonic() + HANDOVER_TIMEOUT
        for address in sorted(wanted) if sys.platform == "linux" else ():  # in one order: two never wait for each other
            if address not in taken and address not in self.inherited:
                try:
                    self._take(address, wanted, taken, deadline)
                except OSError as error:
                    log.warning("%s is not handed over: %s", show_address(address), error)
        return list(taken.values())

    def _take(self, address: tuple[str, int], wanted: set[tuple[str, int]], taken: dict[tuple, socket.socket],
              deadline: float) -> None:
        """Ask who has one address, and add what of all that it has is wanted.  Raises OSError."""
        while True:
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            channel.settimeout(max(deadline - monotonic(), ACCEPT_PAUSE))  # whoever is asked last has a moment, too
            try:
                channel.connect(self.name(address))
                if not self.is_ours(channel):
                    raise PermissionError(errno.EPERM, "another user has its name")
                word, fds, _, _ = socket.recv_fds(channel, 16, HANDOVER_MAX)
                if word:
                    break
            except ConnectionRefusedError:
                channel.close()
                return  # nobody has it
            except (ConnectionResetError, BlockingIOError):
                pass  # it has ended: perhaps there is another; or its backlog is full, which any user can see to
            except OSError:
                channel.close()
                raise
            channel.close()
            if monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "who has its name says nothing")
            time.sleep(ACCEPT_PAUSE)
        self.predecessors.append(channel)
        names = {self.name(each).encode(): each for each in wanted}
        for fd in fds:
            sock = socket.socket(fileno=fd)
            kept, found = taken, sock.getsockname()
            if sock.family == socket.AF_UNIX:
                kept, found = self.inherited, names.get(found, ())
            if found[:2] in wanted.difference(kept):
                kept[found[:2]] = sock
            else:
                sock.close()

    def dismiss(self) -> bool:
        """Have the predecessors drain, now that we accept.  Whether there were any."""
        for channel in self.predecessors:
            with channel, contextlib.suppress(OSError):
                channel.settimeout(HANDOVER_TIMEOUT)
                channel.sendall(b"drain")
                channel.recv(1)
        count, self.predecessors = len(self.predecessors), []
        return count > 0

    def offer(self, addresses: Iterable[tuple]) -> list[tuple]:
        """Be found by a successor under each of these addresses.  Returns those whose name somebody else has."""
        others = []
        for address in addresses if sys.platform == "linux" else ():
            name = self.inherited.pop(address, None)
            if name is None:
                name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    name.bind(self.name(address))
                    name.listen()
                except OSError:
                    name.close()
                    others.append(address)
                    continue
            name.setblocking(False)
            self.names.append(name)
        return others

    def accept(self, name: socket.socket) -> socket.socket | None:
        """Who has connected to a name, where that is a process of this user."""
        try:
            channel, _ = name.accept()
        except OSError as error:
            if error.errno in CAPACITY_ERRNOS:
                time.sleep(ACCEPT_PAUSE)  # it is still there: do not spin
            return None
        channel.settimeout(HANDOVER_TIMEOUT)
        if self.is_ours(channel):
            return channel
        channel.close()
        return None

    def give(self, channel: socket.socket, listeners: Iterable[socket.socket]) -> bool:
        """Pass the sockets on to a successor, whose word is then waited for.  Whether that went well."""
        try:
            socket.send_fds(channel, [b"sockets"], [sock.fileno() for sock in (*listeners, *self.names)])
        except OSError:
            channel.close()
            return False
        self.successor = channel
        return True

    def withdraw(self) -> None:
        """Let go of the names."""
        for name in self.names:
            name.close()
        self.names = []

    def close(self) -> None:
        """Let go of everything."""
        self.withdraw()
        for sock in (*self.predecessors, *self.inherited.values(), self.successor):
            if sock is not None:
                sock.close()


class Daemon:
    """The main thread of `serve`: it starts the others, and then does what signals and a successor say.

    Signals arrive as bytes in a pipe: a handler that did more could meet a lock that this thread holds.
    """

    def __init__(self, settings: types.SimpleNamespace, journal: Journal):
        self.settings = settings
        self.journal = journal
        self.supervisor = Supervisor(dict(os.environ))
        self.handover = Handover()
        self.admin: Any = None
        self.router: Router | None = None
        self.thread: threading.Thread | None = None
        self.stopping = False  # it drains, or more
        self.asked = False  # by a signal; by a second one, it ends now
        self.unnamed: list[tuple] = []  # addresses whose name another process has: see Handover
        self.failed = False
        self.reloading = threading.Lock()  # one at a time: the admin's threads reload, too
        self.selector = selectors.DefaultSelector()
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.selector.register(self.reader, selectors.EVENT_READ, self._on_signals)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.tunnels = TunnelTable(settings.launchers, settings.ports, idle=settings.idle,
                                   start_timeout=settings.start_timeout, max_tunnels=settings.max_tunnels,
                                   max_starting=settings.max_starting)

    def run(self) -> int:
        """Serve.  The exit code."""
        try:
            try:
                self._start()
            except SettingsError as error:
                for line in error.lines:
                    log.error("%s", line)
                return 1
            while self.thread.is_alive():
                for key, _ in self.selector.select(OFFER_AGAIN if self.unnamed else None):
                    if self.selector.get_map().get(key.fd) is key:  # else an event before it has unregistered it
                        key.data(key.fileobj)
                if self.unnamed and self.handover.successor is None:
                    self._offer()
            return 1 if self.failed else 0
        finally:
            self._close()

    def _start(self) -> None:
        """Listen, start the threads, and take the place of a predecessor.  Raises SettingsError."""
        settings = self.settings
        sockets = activated_sockets(dict(os.environ))
        activated = bool(sockets[""])
        inherited = sockets[""]
        if not activated:
            addresses = [address[:2] for host, port in settings.listen for _, address in listen_addresses(host, port)]
            if len(addresses) > HANDOVER_MAX // 2:
                raise SettingsError(f"--listen: {len(addresses)} addresses, and only {HANDOVER_MAX // 2} can be handed "
                                    "over to a successor: name fewer, or all of them as :PORT")
            inherited = self.handover.take(addresses)
        self.router = router = Router(settings, self.tunnels, inherited, activated)
        router.journal = self.journal.emit
        router.reload = self.reload
        if self.supervisor.socket is not None:
            router.beat = functools.partial(self.supervisor.beat, router)
            router.next_beat = router.next_check = 0.0
        with_admin = settings.admin is not None or bool(sockets["admin"])
        if with_admin:
            try:
                import sniroute_admin  # noqa: F401 - what is wrong with the file shows before anybody is dismissed
            except Exception as error:
                raise SettingsError(f"--admin: sniroute_admin.py: {error}") from None
        self.tunnels.start()
        warn(settings)
        sys.setswitchinterval(SWITCH_INTERVAL)
        gc.set_threshold(GC_THRESHOLD)
        gc.freeze()  # what is here now lives as long as the process: never look at it again
        self.thread = threading.Thread(target=self._loop, name="loop", daemon=True)
        self.thread.start()
        for listener in router.listeners:
            log.info("listening on %s", show_address(listener.getsockname()))
        succeeded = self.handover.dismiss()
        if succeeded:
            log.info("another sniroute listened there: it drains, and ends")
        if activated:
            log.info("systemd holds the sockets: --listen is not used")
        self.unnamed = [] if activated else router.listening
        self._offer()
        if self.unnamed:
            log.warning("no successor can take over for now: another process has the name for %s",
                        ", ".join(map(show_address, self.unnamed)))
        if with_admin:
            self._attach(sockets["admin"][:1], alone=not succeeded)
        self.supervisor.ready(router)

    def _attach(self, listener: Sequence[socket.socket], alone: bool) -> None:
        """Open the admin's address.  Raises SettingsError, but for a successor: there is nobody to go back to."""
        import sniroute_admin
        try:
            self.admin = sniroute_admin.attach(self.router, self.settings, *listener)
            log.info("admin on %s", self.admin.address if isinstance(self.admin.address, str)
                     else show_address(self.admin.address))
        except Exception as error:
            if alone:
                raise SettingsError(f"--admin: {error}") from None
            log.error("--admin: %s: going on without it", error)

    def _loop(self) -> None:
        """The thread `loop`: run it, then stop the tunnels, and tell the main thread."""
        try:
            self.router.serve_forever()
        except BaseException:
            log.exception("the loop ended: please report it")
            self.failed = True
        finally:
            self.tunnels.close()  # here, so that the main thread hears a second signal meanwhile
            with contextlib.suppress(OSError):
                os.write(self.writer, b"\0")

    def _on_signals(self, reader: int) -> None:
        numbers = os.read(reader, 64)
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                self.stop()
            elif number == signal.SIGUSR1:
                self.router.call(self.router.dump)
        if signal.SIGHUP in numbers:  # last, and once: it may take a while
            self.reload()
        if 0 in numbers:  # from `_loop`: all that is left of that thread is its end
            self.thread.join()

    def stop(self) -> None:
        """Drain; asked a second time, end now."""
        if self.asked:
            self.router.shutdown()
            self.tunnels.close(now=True)
            return
        self.asked = True
        if not self.stopping:
            self._drain()

    def _drain(self) -> None:
        self.stopping = True
        self.supervisor.tell("STOPPING=1")
        self.tunnels.retiring = True  # what nobody uses gives its port to a successor
        self.tunnels.wake()
        self.router.drain(self.settings.drain)

    def _offer(self) -> None:
        """Take the names that are free by now, and hear who comes."""
        known = len(self.handover.names)
        self.unnamed = self.handover.offer(self.unnamed)
        for name in self.handover.names[known:]:
            self.selector.register(name, selectors.EVENT_READ, self._on_successor)

    def _on_successor(self, name: socket.socket) -> None:
        """A process like this one has come for the sockets."""
        channel = self.handover.accept(name)
        if channel is None:
            return
        if self.stopping:  # it gets none: it can listen itself once ours are closed
            self.router.deaf.wait(HANDOVER_TIMEOUT)
        if self.handover.give(channel, () if self.stopping else self.router.listeners):
            for each in self.handover.names:
                self.selector.unregister(each)
            self.selector.register(channel, selectors.EVENT_READ, self._on_word)

    def _on_word(self, channel: socket.socket) -> None:
        """The successor accepts, or is gone."""
        self.selector.unregister(channel)
        self.handover.successor = None
        word = b""
        with channel:
            with contextlib.suppress(OSError):  # it was reset
                word = channel.recv(16)
            if word != b"drain":
                for name in self.handover.names:
                    self.selector.register(name, selectors.EVENT_READ, self._on_successor)
                return
            self.unnamed = []
            if not self.stopping:
                log.info("another sniroute listens here now")
                self._drain()
            self.router.deaf.wait(HANDOVER_TIMEOUT)  # first: who finds no name listens there itself
            self.handover.withdraw()
            if self.admin is not None:
                self.admin.close()

    def reload(self) -> list[str]:
        """Read the settings again, and go on with them; what is wrong with them, a line each.  Any thread."""
        with self.reloading:
            self.supervisor.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            faults: list[str] = []
            try:
                settings = self.settings.again(self.settings)
            except SettingsError as error:
                faults = list(error.lines)
            except Exception as error:  # a fault of ours is no reason to end
                log.exception("while reading the settings again: please report it")
                faults = [repr(error)]
            for fault in faults:
                log.error("reload: %s", fault)
            if faults:
                log.error("reload: nothing has changed")
            else:
                self._adopt(settings)
            self.router.reloads["failed" if faults else "ok"] += 1
            self.router.last_reload = not faults, time.time()
            self.supervisor.ready(self.router)
            return faults

    def _adopt(self, settings: types.SimpleNamespace) -> None:
        self.settings = settings
        log.setLevel(settings.log_level.upper())
        for line in settings.kept:
            log.warning("reload: %s", line)
        self.tunnels.adopt(settings)
        self.router.call(functools.partial(self.router.adopt, settings))
        warn(settings)
        log.info("reload: done, routes: %d", len(settings.routes.routes))
        if not settings.config:
            log.warning("reload: there is no file of settings to read again; "
                        "options and variables are for the next start")

    def _close(self) -> None:
        """Let go of everything, also where the start failed."""
        if self.admin is not None:
            self.admin.close()
        if self.thread is not None:
            self.router.shutdown()
            self.thread.join()
        else:
            self.tunnels.close()
        if self.router is not None:
            self.router.server_close()
            log.info("stopped")
        self.handover.close()  # after the listeners: who finds no name listens there itself
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one more changes nothing now
        signal.set_wakeup_fd(-1)
        self.supervisor.close()
        self.selector.close()
        os.close(self.reader)
        os.close(self.writer)


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


def keep_standard_streams() -> None:
    """Open descriptors 0 to 2 where they are closed: a client's socket must never become stderr."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


COMMANDS = {"serve": serve, "check": check, "explain": explain, "selftest": selftest}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.  Returns the exit code.

    0 clean; 1 could not listen, failed while running, or `explain` or `selftest` found something; 2 bad settings.
    """
    keep_standard_streams()
    try:
        settings = load_settings(sys.argv[1:] if argv is None else argv, dict(os.environ))
        return COMMANDS[settings.command](settings)
    except SettingsError as error:
        for line in error.lines:
            print(f"sniroute: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":  # `python3 -m sniroute`, or a file of another name
    sys.exit(main())
