"""sniroute_dial: the way out of this host: resolve a name, try its addresses, ask HTTPS_PROXY.

    Dial.start --- Names.ask ---> addresses --- connect, connect, ... ---> CONNECT -----> done(socket)
                   a thread       both          a new one each STAGGER,    only with      or
                   `name`         families      the first answer wins      a proxy        done(Failed)
                     ^                               |
                     +---- Names.learn: those that did not answer are tried last from then on

A Dial makes one TCP connection to HOST:PORT.  A WayOut holds what all dials of one loop share: the proxy,
the addresses of names (Names), and the queues of dials that wait.  This room does not know what the connections are
for.

The life of a dial is `Dial.phase`, in words for people:

    NAMING -> CONNECTING -> OVER            straight, or by a proxy that ...
              CONNECTING -> ASKING -> OVER  ... is asked for the connection
    any -> OVER                             it failed, or it was cancelled

A dial has no deadline.  Its owner has one for more than this, and cancels it.

Threads: all runs in the loop, but one thread `name` for each host name that is being resolved; it hands its
result to the loop by `Loop.call`.  There are no locks.

Where there is no connection, the reason in Failed is a word of these; users of this room may have more:

    name       the host name does not resolve
    resolver   this host's resolver gives no answer
    refused    no address took the connection
    timeout    no address answered before the kernel gave up
    proxy      HTTPS_PROXY cannot be reached, or refused
    reset      the proxy closed the connection

Sockets are opened in the second phase of a turn only (`WayOut.soon`).  In the first phase the loop may
still have an event for a number that was closed in this turn, and a new socket may get that number: such
an event would be taken for the answer of its connect.

Seams: I want to ...
    another kind of proxy        `parse_proxy`, and a phase beside ASKING
    another order of addresses   `alternate` and Laggards, in sniroute_race
    another reason to fail       a word in the table above, and a sentence for people in each program's table of
                                 reasons (sniroute_edge.REASONS)

This room imports sniroute_upgrade, sniroute_race, sniroute_loop, sniroute_scarcity, sniroute_names and sniroute_refusals.
"""

from __future__ import annotations

import base64
import errno
import functools
import ipaddress
import os
import socket
import urllib.parse
from typing import Callable, Iterable, Mapping, NamedTuple

from sniroute_loop import CAPACITY_ERRNOS, READ, WRITE, Loop, monotonic, owner_of
from sniroute_names import parse_network, printable, show_address, unmapped
from sniroute_race import ADDRESSES_MAX, STAGGER, Laggards, Row, alternate
from sniroute_refusals import Failed, Malformed, SettingsError
from sniroute_scarcity import SHORT_OF_MEMORY, begin_errand, ran_out
from sniroute_upgrade import HEAD_MAX, connect_request, parse_answer

__version__ = "0.1.0"

SHORT_OF_FDS = 0.1  # seconds until a connect without a descriptor is tried again: whatever ends makes room
RESOLVED_FOR = 30.0  # seconds for which addresses are used: getaddrinfo does not tell their TTL
KEEPALIVE = (15, 15, 9)  # idle and interval in seconds, and count: cloudflared's

Addresses = list[Row]


# -- the proxy ---------------------------------------------------------------------------------


class Proxy(NamedTuple):
    """HTTPS_PROXY."""

    host: str
    port: int
    authorization: str  # the value of Proxy-Authorization, "" for none

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


def find_proxy(environ: Mapping[str, str]) -> tuple[Proxy | None, str]:
    """HTTPS_PROXY, and the text of NO_PROXY.  Raises SettingsError."""
    text = (environ.get("HTTPS_PROXY") or environ.get("https_proxy") or "").strip()
    try:
        proxy = parse_proxy(text) if text else None
    except ValueError as error:
        raise SettingsError(f"HTTPS_PROXY: {error}") from None
    return proxy, environ.get("NO_PROXY") or environ.get("no_proxy") or ""


def goes_direct(host: str, port: int, no_proxy: str) -> bool:
    """Whether a host is reached without the proxy: loopback always, else by the words of NO_PROXY.

    Each word is `*`, a domain, an address, or a network.  A domain means its subdomains too; with a dot in
    front it means those only.  A domain or an address may have a port.
    """
    host = host.lower().rstrip(".")
    try:
        address = unmapped(ipaddress.ip_address(host))
    except ValueError:
        address = None
    if host == "localhost" or address is not None and address.is_loopback:
        return True
    words = no_proxy.lower().replace(",", " ").split()
    return any(_means(word, host, address, port) for word in words)


def _means(word: str, host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, port: int) -> bool:
    """Whether one word of NO_PROXY means this host; `address` is the host, where that is an address."""
    if word == "*":
        return True
    if "/" in word:
        try:
            return address is not None and address in parse_network(word, strict=False)
        except ValueError:
            return False
    name, colon, digits = word.rpartition(":")
    if colon and digits.isdecimal() and ("]" in name or ":" not in name):
        if int(digits) != port:
            return False
        word = name
    word = word.strip("[]")
    try:
        return unmapped(ipaddress.ip_address(word)) == address
    except ValueError:
        pass  # a domain
    word = (word[1:] if word.startswith("*.") else word).rstrip(".")
    return host == word or host.endswith(word if word.startswith(".") else f".{word}")


# -- names -------------------------------------------------------------------------------------


def numeric(host: str, port: int) -> Addresses:
    """What a host is that is an address: there is nothing to resolve, and no thread to wait for; else nothing."""
    try:
        ipaddress.ip_address(host)
        # In bytes: for a name in letters `socket` loads the codec of IDNA, half a megabyte.
        rows = socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (ValueError, OSError):
        return []
    return [(rows[0][0], rows[0][4])]


class Names:
    """Resolves host names, one thread for each at a time, and remembers their addresses, and which were worse."""

    def __init__(self, loop: Loop, clock: Callable[[], float] = monotonic):
        self.loop = loop
        self.clock = clock
        self.known: dict[tuple[str, int], tuple[Addresses, float]] = {}  # and until when
        self.waiting: dict[tuple[str, int], list[Callable[[Addresses | OSError], None]]] = {}
        self.laggards = Laggards()

    def ask(self, host: str, port: int, found: Callable[[Addresses | OSError], None]) -> None:
        """Call `found` with the addresses, or with why there are none; perhaps before this returns.  Loop's thread."""
        addresses, until = self.known.get((host, port), ([], 0.0))
        if until > self.clock():
            found(addresses)
            return
        addresses = numeric(host, port)
        if addresses:
            self.known[host, port] = addresses, self.clock() + RESOLVED_FOR
            found(addresses)
            return
        waiting = self.waiting.get((host, port))
        if waiting is not None:
            waiting.append(found)
            return
        self.waiting[host, port] = [found]
        try:
            begin_errand(functools.partial(self._resolve, host, port), functools.partial(self._resolved, host, port),
                         self.loop.call, "name")
        except (RuntimeError, MemoryError) as error:  # there are too many threads
            self._resolved(host, port, OSError(str(error)))

    def _resolve(self, host: str, port: int) -> Addresses:
        """Ask the resolver, which may take long.  Thread `name`.  Raises OSError."""
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError:  # of a label that is too long
            raise OSError(socket.EAI_NONAME, "it is no name") from None
        found = alternate(dict.fromkeys((row[0], row[4]) for row in rows))
        return list(self.laggards.last(found)[:ADDRESSES_MAX])

    def learn(self, place: tuple[str, int], lost: Iterable[Row], won: Row) -> None:
        """One address of a host took the connect where others did not: try those last.  Loop's thread."""
        self.laggards.learn(lost, won)
        if place in self.known:
            addresses, until = self.known[place]
            self.known[place] = list(self.laggards.last(addresses)), until

    def _in_words(self, result: Addresses | Exception) -> Addresses | OSError:
        """What a thread has found, or met, as those who wait can take it; a fault of ours is told."""
        if not isinstance(result, Exception) or isinstance(result, OSError):
            return result
        self.loop.failed(result)
        return OSError(SHORT_OF_MEMORY if ran_out(result) else "a fault in sniroute: its log says which")

    def _resolved(self, host: str, port: int, result: Addresses | Exception) -> None:
        """Tell everybody who waits for this name.  Loop's thread."""
        waiting = self.waiting.pop((host, port))
        result = self._in_words(result)
        now = self.clock()
        self.known = {place: row for place, row in self.known.items() if row[1] > now}
        if not isinstance(result, OSError):
            self.known[host, port] = result, now + RESOLVED_FOR
        for found in waiting:
            try:
                found(result)
            except Exception:
                self.loop.met(owner_of, found)


# -- connections -------------------------------------------------------------------------------

# The phases of a dial.
NAMING, CONNECTING, ASKING, OVER = "resolving the name", "connecting", "asking the proxy", "over"


OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
           *((socket.IPPROTO_TCP, getattr(socket, name), value)
             for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), KEEPALIVE) if hasattr(socket, name))]


def set_options(sock: socket.socket) -> None:
    """Never wait; no delay for small messages; notice a peer that has gone without a word.

    Raises OSError on macOS, where the peer has left already.
    """
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        for level, option, value in OPTIONS:
            sock.setsockopt(level, option, value)


def name_failure(error: OSError, proxy: Proxy | None) -> Failed:
    """Why the host, or the proxy on the way to it, has no address."""
    why = error.strerror or str(error)
    if proxy is not None:
        return Failed("proxy", f"{proxy}: {why}")
    unknown = error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
    return Failed("name" if unknown else "resolver", why)


def connect_failure(error: OSError, proxy: Proxy | None) -> Failed:
    """Why the host, or the proxy on the way to it, took no connection."""
    if proxy is not None:
        return Failed("proxy", f"{proxy}: {error.strerror}")
    return Failed("timeout" if error.errno == errno.ETIMEDOUT else "refused", error.strerror)


class WayOut:
    """How connections leave this host, and what the dials of one loop share.

    `proxy` and `no_proxy` are what `find_proxy` gives.
    """

    def __init__(self, loop: Loop, proxy: Proxy | None, no_proxy: str):
        self.loop = loop
        self.proxy = proxy
        self.no_proxy = no_proxy
        self.names = Names(loop)
        self.soon = loop.queue(0.0, Dial.connect)
        self.staggered = loop.queue(STAGGER, Dial.connect)
        self.short = loop.queue(SHORT_OF_FDS, Dial.connect)
        self.queues = self.soon, self.staggered, self.short

    def open(self, family: int) -> socket.socket:
        """A socket for one connect; a subclass may choose where it leaves from.  Raises OSError."""
        return socket.socket(family, socket.SOCK_STREAM)

    def proxy_for(self, host: str, port: int) -> Proxy | None:
        """The proxy on the way to this host, if there is one."""
        if self.proxy is None or goes_direct(host, port, self.no_proxy):
            return None
        return self.proxy


def unheard(result: socket.socket | Failed) -> None:
    """The callback of a Dial that is over."""


class Dial:
    """One connection to HOST:PORT in the making.  All methods run in the loop.

    After `start`, unless it is cancelled, `done` is called once, perhaps before `start` returns:

        done(socket)   connected, non-blocking, with `set_options`; the caller owns it from here on
        done(Failed)   nothing is left open
    """

    __slots__ = ("way", "host", "port", "proxy", "done", "phase", "todo", "attempts", "lost", "error", "out", "head")

    def __init__(self, way: WayOut, host: str, port: int, done: Callable[[socket.socket | Failed], None]):
        self.way = way
        self.host = host
        self.port = port
        self.proxy = way.proxy_for(host, port)
        self.done = done
        self.phase = NAMING
        self.todo: Addresses = []  # still to be tried
        self.attempts: dict[socket.socket, Row] = {}  # connects under way; while ASKING, the one to the proxy
        self.lost: list[Row] = []  # addresses that took no connect
        self.error: OSError | None = None  # of the last connect
        self.out = b""  # what is still to be sent to the proxy
        self.head = bytearray()  # what the proxy has answered

    @property
    def place(self) -> tuple[str, int]:
        """Where it connects to: the host, or its proxy."""
        return (self.host, self.port) if self.proxy is None else self.proxy[:2]

    def start(self) -> None:
        """Begin to resolve the host, or its proxy."""
        self.way.names.ask(*self.place, self._found)

    def cancel(self) -> None:
        """Close everything, and never call `done`.  Does nothing when the dial is over."""
        if self.phase is not OVER:
            self._end(None)

    def _found(self, found: Addresses | OSError) -> None:
        if self.phase is not NAMING:
            return  # cancelled meanwhile
        if isinstance(found, OSError):
            self._fail(name_failure(found, self.proxy))
            return
        self.phase = CONNECTING
        self.todo = list(found)
        self.way.soon.put(self)

    def connect(self) -> None:
        """Try one address more, beside those that have not answered yet.  Source: RFC 8305 section 5."""
        self.way.staggered.drop(self)
        while self.todo:
            row = family, address = self.todo[0]
            try:
                sock = self.way.open(family)
            except OSError as error:
                if error.errno in CAPACITY_ERRNOS:
                    self.way.short.put(self)
                    return
                self.error = error  # this host has no IPv6, for example
                self.lost.append(row)
                del self.todo[0]
                continue
            del self.todo[0]
            set_options(sock)
            code = sock.connect_ex(address)
            if code in (0, errno.EINPROGRESS):
                self.attempts[sock] = row
                self.way.loop.poller.watch(sock.fileno(), WRITE, functools.partial(self._on_connected, sock))
                if self.todo:
                    self.way.staggered.put(self)
                return
            self.error = OSError(code, os.strerror(code))
            self.lost.append(row)
            sock.close()
        if not self.attempts:
            error = self.error or OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))  # there is no address
            self._fail(connect_failure(error, self.proxy))

    def _on_connected(self, sock: socket.socket, mask: int) -> None:
        """One of the connects has an answer."""
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.error = OSError(code, os.strerror(code))
            self.lost.append(self.attempts[sock])
            self._drop(sock)
            self.way.soon.put(self)
            return
        self._learn(sock)
        if self.proxy is None:
            self._tell(sock, sock)
        else:
            self.phase = ASKING
            self._stop(sock)
            self.out = connect_request(self.host, self.port, self.proxy.authorization)
            self.way.loop.poller.change(sock.fileno(), WRITE, functools.partial(self._on_proxy, sock))

    def _learn(self, winner: socket.socket) -> None:
        """Have those that began before the winner, and have not answered, tried last from now on."""
        rows = list(self.attempts.values())
        won = self.attempts[winner]
        self.lost += rows[:rows.index(won)]
        if self.lost:
            self.way.names.learn(self.place, self.lost, won)

    def _on_proxy(self, sock: socket.socket, mask: int) -> None:
        """Ask the proxy, and read its answer."""
        try:
            if self.out:
                self.out = self.out[sock.send(self.out):]
                if not self.out:
                    self.way.loop.poller.change(sock.fileno(), READ, functools.partial(self._on_proxy, sock))
                return
            data = sock.recv(HEAD_MAX - len(self.head))
            self.head += data
            answer = parse_answer(self.head)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(Failed("reset", f"the proxy: {error.strerror}"))
            return
        except Malformed as error:
            self._fail(Failed("proxy", str(error)))
            return
        if answer is None:
            if not data:
                self._fail(Failed("reset", "the proxy closed the connection"))
        elif not 200 <= answer.status < 300:
            self._fail(Failed("proxy", f"HTTP {answer.status}"))
        elif len(self.head) > answer.end:  # it would be lost; a TLS server does not speak first
            self._fail(Failed("proxy", "it said more than its answer"))
        else:
            self._tell(sock, sock)

    def _fail(self, why: Failed) -> None:
        self._tell(None, why)

    def _tell(self, kept: socket.socket | None, result: socket.socket | Failed) -> None:
        """It is over: tell the owner, and let go of it: the two would keep each other."""
        self._end(kept)
        self.done(result)  # where this raises, `fault` asks whose it is
        self.done = unheard

    def _end(self, kept: socket.socket | None) -> None:
        """The dial is over: close everything but `kept`, which the loop watches no more."""
        self.phase = OVER
        self._stop(kept)
        if kept is not None:
            self.way.loop.poller.forget(kept.fileno())
            self.attempts = {}

    def _stop(self, kept: socket.socket | None) -> None:
        """Try no more addresses: only the connect of `kept` goes on."""
        for queue in self.way.queues:
            queue.drop(self)
        self.todo = []
        for sock in [sock for sock in self.attempts if sock is not kept]:
            self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        """Close a connect that is under way, or has failed."""
        del self.attempts[sock]
        self.way.loop.poller.forget(sock.fileno())
        sock.close()
