"""sniroute_admin: metrics, status, health and control of a running router, by HTTP for this host's own users.

    browser, curl, Prometheus
          |  HTTP/1.1 on a loopback port or a unix socket; one request for each connection
          v
      listener --> thread `admin`: Server -----------> threads `admin-<n>`, at most 16: Handler
                   accepts; every 0.25 s it            checks Host, Origin, path, method and token,
                   calls Collector.collect             then calls the path's row in ENDPOINTS:

          GET /                             PAGE of sniroute_page
          GET /metrics, /status             Cached: sniroute_metrics makes it of Facts
          GET /healthz                      Pulse: does the router's loop answer?
          GET /readyz                       Router.phase, Router.paused
          POST /reload                      Hooks.reload
          POST /tunnels/NAME/start, stop    TunnelTable.wait, TunnelTable.stop

An option: the daemon imports this file if --admin is given, or if systemd has a socket for it, and calls
`attach(router, settings)`.  The router and its tunnel table are arguments: their classes are not imported.  It imports
sniroute_metrics, sniroute_page and sniroute_names.

Threads.  `admin` accepts clients, and is the only thread that writes to the Collector.  Each `admin-<n>` answers one
request; it has 5 s to read the request and 5 s to send the answer.  None of them touches a socket of the router's
clients.  To have the loop do something they hand it a function by `Router.call`.

Locks.  Cached, Pulse and Admin have one each.  While Cached's is held, Facts takes the tunnel table's; nothing
takes these two in the other order.  The router's loop takes none of them.

What is bounded.  The number of requests at once, their sizes and their times.  Work: `Cached` gives the same answer
again for half a second, so asking more often costs almost nothing.  Single steps of the interpreter, as the
router's loop cannot run during one: `render_json` encodes long lists row by row.

Who may ask.  This host's own users: any of them on a loopback port, owner and group (0660) on a unix socket.  A page
that somebody's browser shows is a stranger on this host, so Host, Origin and Sec-Fetch-Site are checked before
everything else.  A request that changes something also needs the token.

Seams: I want to ...
    answer on another path        a function, and its row in ENDPOINTS
    export another number         see sniroute_metrics
    show something on the page    see sniroute_page
    let somebody else ask         `Handler.check_origin`, `Handler.check_token`, LOCAL_HOSTS
"""

from __future__ import annotations

import collections
import contextlib
import hmac
import http
import http.server
import io
import ipaddress
import json
import logging
import os
import re
import socket
import stat
import sys
import threading
import time
import urllib.parse
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from sniroute_metrics import Collector, Facts, copied, expose, status
from sniroute_names import printable, show_address
from sniroute_page import PAGE, POLICY

if TYPE_CHECKING:
    from sniroute_launchers import TunnelKey

__version__ = "0.1.0"

log = logging.getLogger("sniroute")

# Limits, each with its reason.  Sizes in bytes, times in seconds.
REQUESTS_MAX = 16  # at once: a browser uses six, a scraper one
REQUEST_TIME = 5.0  # to read a whole request, however slowly it comes
ANSWER_TIME = 5.0  # to send a whole answer: the largest has a few hundred kilobytes, and stays on this host
LINGER = 1.0  # a client that was declined while it still sends gets this time to read why ...
LINGER_READS = 64  # ... and at most so many pieces of its request are thrown away meanwhile
HEAD_MAX = 32768  # request line and header fields: a browser adds the cookies of every other port (RFC 6265, 8.5)
BODY_MAX = 65536  # no request needs a body, but some clients send one
COLLECT = 0.25  # between two calls of Collector.collect, which can keep ten times what ends meanwhile
CACHE_TIME = 0.5  # an answer is given again for so long: the page and several scrapers cost no more than one of them
ACCEPT_PAUSE = 0.1  # after an accept that failed since descriptors ran out: without it the thread would spin
PULSE_TIME = 1.0  # for the loop to answer: it does so within microseconds, unless it hangs
CLOSE_TIME = 1.0  # for threads to end in Admin.close(); one that waits for a tunnel may end later, unheard
BACKLOG = 64  # connections that wait for accept: a few times what is served at once

LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]"))  # names in Host that mean this host
ALLOW = {"GET": "GET, HEAD", "POST": "POST"}  # an endpoint's method: what Allow says of it
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::[0-9]{1,5})?")  # RFC 9110 section 7.2, in lower case
BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)  # RFC 6750 section 2.1
FAULT = "admin: a fault in sniroute: please report it"

# Header fields of every answer.  So a browser keeps no copy, guesses no content type, lets no other page show or
# load an answer, and runs no script but ours.
HEADERS = "".join(f"{name}: {value}\r\n" for name, value in (
    ("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"), ("Cross-Origin-Resource-Policy", "same-origin"), ("Cache-Control", "no-store"),
    ("Connection", "close")))


# -- answers -----------------------------------------------------------------------------------


def render_json(value: dict[str, Any]) -> bytes:
    """A JSON object.

    A list in it is encoded row by row.  json.dumps of a long list is one step of the interpreter, in which the
    router's loop could not run.
    """
    members = []
    for name, member in value.items():
        text = "[" + ",\n ".join(map(json.dumps, member)) + "]" if isinstance(member, list) else json.dumps(member)
        members.append(f"{json.dumps(name)}: {text}")
    return ("{" + ",\n".join(members) + "}\n").encode()


class Answer(NamedTuple):
    """What a request gets: a status, a body, its Content-Type, and further header fields."""

    status: int
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def json(cls, value: dict[str, Any], status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
        """An answer in JSON."""
        return cls(status, render_json(value), "application/json", headers)


class Declined(Exception):
    """A request that is not done.  `answer` tells its client why, as {"error": sentence}.

    `headers` are further header fields of the answer, with `_` for `-`.
    """

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(sentence)
        self.answer = Answer.json({"error": sentence}, status,
                                  tuple((name.replace("_", "-"), value) for name, value in headers.items()))


class Cached:
    """The result of `make`, made anew after CACHE_TIME.  Any thread."""

    def __init__(self, make: Callable[[], bytes]):
        self.make = make
        self.lock = threading.Lock()  # guards the rest; held during `make`: threads that wait get its result, too
        self.until = 0.0
        self.made = b""

    def get(self) -> bytes:
        """The result, at most CACHE_TIME old."""
        with self.lock:
            if time.monotonic() >= self.until:
                self.made = self.make()
                self.until = time.monotonic() + CACHE_TIME
            return self.made

    def forget(self) -> None:
        """Have the next `get` make it anew: something has changed."""
        with self.lock:
            self.until = 0.0


class Pulse:
    """Asks the router's loop whether it still runs.  `call` is Router.call.  Any thread.

    While the loop has not answered, everybody waits for the same question, so questions do not pile up in a loop
    that hangs.
    """

    def __init__(self, call: Callable[[Callable[[], None]], None]):
        self.call = call
        self.lock = threading.Lock()  # guards `heard`; not held while waiting
        self.heard: threading.Event | None = None  # set when the loop has answered the last question

    def beats(self) -> bool:
        """Whether the loop answers within PULSE_TIME."""
        with self.lock:
            if self.heard is None or self.heard.is_set():
                self.heard = threading.Event()
                self.call(self.heard.set)
            heard = self.heard
        return heard.wait(PULSE_TIME)


# -- endpoints ---------------------------------------------------------------------------------
#
# One function for each path.  It runs in a thread `admin-<n>`, and is given the Admin and what the path names: the
# tunnel, for the others "".


def page(admin: Admin, name: str) -> Answer:
    """GET /: the page."""
    return Answer(200, PAGE, "text/html; charset=utf-8")


def metrics(admin: Admin, name: str) -> Answer:
    """GET /metrics: all numbers for Prometheus."""
    return Answer(200, admin.metrics.get(), "text/plain; version=0.0.4; charset=utf-8")


def show_status(admin: Admin, name: str) -> Answer:
    """GET /status: `sniroute_metrics.status` as JSON, and `control`."""
    return Answer(200, admin.status.get(), "application/json")


def health(admin: Admin, name: str) -> Answer:
    """GET /healthz: 200 if the router's loop answers, else 503."""
    if admin.router.phase == "stopped" or not admin.pulse.beats():
        return Answer(503, b"the loop does not answer\n")
    return Answer(200, b"ok\n")


def readiness(admin: Admin, name: str) -> Answer:
    """GET /readyz: 200 if the router accepts connections, else 503."""
    if admin.router.phase != "running":
        return Answer(503, f"{admin.router.phase}\n".encode())
    if admin.router.paused:
        return Answer(503, b"not accepting for now: connections or descriptors are short\n")
    return Answer(200, b"ok\n")


def reload(admin: Admin, name: str) -> Answer:
    """POST /reload: read the settings again.  409 if they have faults; then the router keeps those it has."""
    faults = [printable(fault, 1000) for fault in admin.router.hooks.reload()]
    if faults:
        return Answer.json({"error": "; ".join(faults), "faults": faults}, 409)
    return Answer.json({"done": "The settings were read again."})


def tunnel_key(admin: Admin, name: str) -> TunnelKey:
    """The key of the tunnel that a path names, by a client's name or by the key itself.  Raises Declined (404).

    A key is accepted only if the table has it.  It came there from a client's name, so it was checked; a key from the
    path would go unchecked into a program's command line.
    """
    if ":" not in name:
        try:
            return admin.router.tunnel_of(name)
        except ValueError as error:
            raise Declined(404, printable(str(error), 500)) from None
    tunnels = admin.router.tunnels
    for view in (*tunnels.snapshot(), *tunnels.failed()):
        if str(view.key) == name:
            return view.key
    raise Declined(404, f"there is no tunnel {printable(name)} now; give a client's name to start one")


def stop_tunnel(admin: Admin, name: str) -> Answer:
    """POST /tunnels/NAME/stop: stop it, and cut its connections; if its start failed, forget that."""
    key = tunnel_key(admin, name)
    if not admin.router.tunnels.stop(key):
        raise Declined(404, f"{key} is not up, and did not fail")
    return Answer.json({"done": f"{key} is stopped.", "tunnel": str(key)})


def start_tunnel(admin: Admin, name: str) -> Answer:
    """POST /tunnels/NAME/start: start it, and answer when it is ready.

    If its last start failed, or if it waits for its next try, it is tried now.  409 if there is no room
    for another tunnel, or sniroute is stopping; 502 if the start fails.
    """
    key = tunnel_key(admin, name)
    tunnels = admin.router.tunnels
    if any(view.key == key for view in tunnels.failed()) \
            or any(view.key == key and view.state == "backoff" for view in tunnels.snapshot()):
        tunnels.stop(key)
    began = tunnels.clock()
    try:
        tunnels.wait(key, None, began + tunnels.start_timeout)
    except Exception as error:
        kind = getattr(error, "kind", None)  # only a TunnelError has one, and its class is not imported here
        if kind is None:
            raise
        raise Declined(409 if kind in ("limit", "budget", "stopping") else 502, printable(str(error), 500)) from None
    return Answer.json({"done": f"{key} is ready.", "tunnel": str(key), "seconds": round(tunnels.clock() - began, 3)})


class Endpoint(NamedTuple):
    """A method, a path, and the function that answers them."""

    method: str  # GET means HEAD, too
    path: re.Pattern[str]  # its first group is what the path names
    act: Callable[[Admin, str], Answer]  # is given that group, percent-decoded; may raise Declined


ENDPOINTS = (
    Endpoint("GET", re.compile(r"/()"), page),
    Endpoint("GET", re.compile(r"/metrics()"), metrics),
    Endpoint("GET", re.compile(r"/status()"), show_status),
    Endpoint("GET", re.compile(r"/healthz()"), health),
    Endpoint("GET", re.compile(r"/readyz()"), readiness),
    Endpoint("POST", re.compile(r"/reload()"), reload),
    Endpoint("POST", re.compile(r"/tunnels/([^/]+)/stop"), stop_tunnel),
    Endpoint("POST", re.compile(r"/tunnels/([^/]+)/start"), start_tunnel),
)


def find_endpoint(method: str, path: str) -> tuple[Endpoint, str]:
    """The endpoint for a request, and what its path names, not yet decoded.  Raises Declined (404, 405)."""
    for endpoint in ENDPOINTS:
        match = endpoint.path.fullmatch(path)
        if match is None:
            continue
        if endpoint.method != method.replace("HEAD", "GET"):
            allowed = ALLOW[endpoint.method]
            raise Declined(405, f"this path is for {allowed}", Allow=allowed)
        return endpoint, match[1]
    raise Declined(404, "there is no such path")


# -- one request -------------------------------------------------------------------------------


class Timed(io.RawIOBase):
    """What a client sends, as a raw stream that ends with an OSError after `seconds`, or after `limit` bytes.

    A client that closes early is an error, too: the stream never has a normal end.
    """

    def __init__(self, sock: socket.socket, seconds: float, limit: int):
        self.sock = sock
        self.deadline = time.monotonic() + seconds
        self.left = limit

    def readable(self) -> bool:
        """As io.RawIOBase wants it."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As io.RawIOBase wants it.  Raises OSError."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the request took too long")
        self.sock.settimeout(remaining)
        count = self.sock.recv_into(memoryview(buffer)[:self.left])
        if not count:
            raise ConnectionAbortedError("the request ended early, or is too long")
        self.left -= count
        return count


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection, with one request.  Thread `admin-<n>`.

    The base class calls setup, handle and finish.  It parses the request line and the header fields; all the rest is
    checked here.
    """

    protocol_version = "HTTP/1.1"
    server: Server
    raw_requestline: bytes

    def setup(self) -> None:
        """Bound the size and time of the request."""
        self.connection: socket.socket = self.request
        self.rfile = io.BufferedReader(Timed(self.connection, REQUEST_TIME, HEAD_MAX + BODY_MAX))
        self.unread = True  # the client may still be sending its request
        self.replied = False

    def handle(self) -> None:
        """Read the request and answer it.  A connection that stayed open for another would keep its thread."""
        self.raw_requestline = self.rfile.readline(HEAD_MAX)
        self.requestline = self.command = self.path = ""  # `reply` reads them, and parsing may fail before it sets them
        if not self.raw_requestline.endswith(b"\n"):
            self.send_error(414)
            return
        if not self.parse_request():
            return  # parse_request has called send_error
        try:
            self.reply(self.answer())
        except Declined as declined:
            self.reply(declined.answer)

    def finish(self) -> None:
        """Let a client that was declined early read why (RFC 9112 section 9.6).

        Closing a socket that has unread bytes resets the connection, and the client may lose the answer.
        So its bytes are read first, for a while.
        """
        if self.replied and self.unread:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
                deadline = time.monotonic() + LINGER
                for _ in range(LINGER_READS):
                    self.connection.settimeout(max(0.001, deadline - time.monotonic()))
                    if not self.connection.recv(BODY_MAX):
                        break
        self.rfile.close()

    def answer(self) -> Answer:
        """What this request gets.  Raises Declined, and OSError if the client is gone."""
        if self.request_version == "HTTP/0.9":  # it has no header; from Python 3.14 on, `self.headers` is missing then
            raise Declined(400, "HTTP/0.9 has no header, and Host is needed")
        self.check_origin()
        endpoint, quoted = find_endpoint(self.command, self.path.partition("?")[0])
        if endpoint.method == "POST":
            self.check_token()
        self.skip_body()
        try:
            name = urllib.parse.unquote(quoted, errors="strict")
        except ValueError:
            raise Declined(400, "the name in the path is not UTF-8") from None
        admin = self.server.admin
        try:
            return endpoint.act(admin, name)
        except Declined:
            raise
        except Exception:
            log.exception(FAULT)
            raise Declined(500, "a fault in sniroute: its log says which") from None
        finally:
            if endpoint.method == "POST":
                admin.status.forget()  # the page asks for it next, and should see what came of the order

    def field(self, name: str) -> str | None:
        """A header field; None if it is missing.  Raises Declined if it is there twice: two readers may differ."""
        values = self.headers.get_all(name, [])
        if len(values) > 1:
            raise Declined(400, f"{name} is there twice")
        return values[0].strip() if values else None

    def check_origin(self) -> None:
        """Decline a request that a page of another origin may have sent.  Raises Declined.

        A browser tells where the page came from in Origin (RFC 6454 section 7) and Sec-Fetch-Site (W3C, Fetch
        Metadata).  A page may also have its own name resolve to this host (DNS rebinding).  Then the request seems
        to be of the same origin, but Host has that name.  Host may have any port: ssh may forward another one here.
        """
        if self.headers.defects:
            raise Declined(400, "the header is malformed")
        host = (self.field("Host") or "").lower()
        if not host:
            raise Declined(400, "Host is missing")
        match = HOST.fullmatch(host)
        if match is None or match[1] not in self.server.admin.hosts:
            raise Declined(421, "Host is not this router's address: ask for localhost")
        if self.field("Origin") not in (None, f"http://{host}") \
                or self.field("Sec-Fetch-Site") not in (None, "same-origin", "none"):
            raise Declined(403, "a page of another origin may not ask")

    def check_token(self) -> None:
        """Decline an order without the right token.  Raises Declined."""
        token = self.server.admin.token
        if not token:
            raise Declined(403, "the router takes no orders: start it with SNIROUTE_ADMIN_TOKEN in its environment")
        match = BEARER.fullmatch(self.field("Authorization") or "")
        if match is None or not hmac.compare_digest(match[1].encode("utf-8", "replace"), token.encode()):
            raise Declined(401, "the token is missing or wrong", WWW_Authenticate='Bearer realm="sniroute"')

    def skip_body(self) -> None:
        """Read the body and ignore it.  Raises Declined, and OSError if it does not come."""
        if self.field("Transfer-Encoding") is not None:
            raise Declined(411, "a body wants a Content-Length")
        length = self.field("Content-Length") or "0"
        if not re.fullmatch(r"[0-9]{1,18}", length, re.ASCII):
            raise Declined(400, "Content-Length is no number")
        if int(length) > BODY_MAX:
            raise Declined(413, f"the body is over {BODY_MAX} bytes")
        self.rfile.read(int(length))
        self.unread = False

    def reply(self, answer: Answer) -> None:
        """Send an answer, in one call.  Raises OSError if the client is gone, or does not read for ANSWER_TIME."""
        status = http.HTTPStatus(answer.status)
        head = "".join(f"{name}: {value}\r\n" for name, value in (
            ("Date", self.date_time_string()), ("Content-Type", answer.kind),
            ("Content-Length", str(len(answer.body))), *answer.headers))
        body = b"" if self.command == "HEAD" else answer.body
        log.debug("admin: %s: %d", printable(self.requestline, 200), status)
        self.connection.settimeout(ANSWER_TIME)
        self.connection.sendall(f"HTTP/1.1 {status.value} {status.phrase}\r\n{HEADERS}{head}\r\n".encode() + body)
        self.replied = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that could not be parsed.  The base class calls it; its own would answer in HTML."""
        self.reply(Declined(code, printable(message or http.HTTPStatus(code).phrase)).answer)

    def handle_expect_100(self) -> bool:
        """Let the client send its body (RFC 9110 section 10.1.1).  The base class needs `wfile`, which is not made."""
        self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True


# -- the server --------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Accepts clients, and gives each a thread.  Thread `admin`, but for `_serve` and what that calls."""

    def __init__(self, admin: Admin, listener: socket.socket):
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()  # the base class has made one
        self.socket = listener
        listener.setblocking(False)  # select may name a client that another process on this listener then accepts
        self.admin = admin
        self.free = collections.deque(range(REQUESTS_MAX, 0, -1))  # the numbers n of threads that are not running
        self.live: dict[int, tuple[threading.Thread, socket.socket]] = {}  # those that are; the keys are not in `free`

    def service_actions(self) -> None:
        """Collect.  The base class calls it after each wait for a client, which takes COLLECT at most."""
        try:
            self.admin.collect()
        except Exception:
            log.exception(FAULT)

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next client.  Raises OSError if there is none; the base class then goes on."""
        try:
            return self.socket.accept()
        except BlockingIOError:
            raise
        except OSError:
            time.sleep(ACCEPT_PAUSE)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a client a thread, or close its connection if all are taken."""
        try:
            number = self.free.pop()
        except IndexError:
            self.shutdown_request(request)
            return
        thread = threading.Thread(target=self._serve, args=(number, request, client_address), daemon=True,
                                  name=f"admin-{number}")
        self.live[number] = thread, request
        try:
            thread.start()
        except RuntimeError:  # the system has no thread to spare
            self._end(number, request)

    def _serve(self, number: int, request: socket.socket, client_address: Any) -> None:
        """What a thread `admin-<n>` runs."""
        try:
            self.finish_request(request, client_address)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            self._end(number, request)

    def _end(self, number: int, request: socket.socket) -> None:
        """Close a client's connection; its number may be used again."""
        self.shutdown_request(request)
        del self.live[number]
        self.free.append(number)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error.  Any OSError is a client that went away: no fault of ours."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log.debug("admin: %s", printable(str(error)))
        else:
            log.exception(FAULT)

    def hang_up(self) -> None:
        """Cut all requests short, and wait up to CLOSE_TIME for their threads.  Any thread, also one of them."""
        deadline = time.monotonic() + CLOSE_TIME
        for _, request in copied(self.live, dict).values():
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        for thread, _ in copied(self.live, dict).values():
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


def listen(where: str | tuple[str, int]) -> tuple[socket.socket, tuple[int, int] | None]:
    """Listen on a loopback (host, port), or at the path of a unix socket.

    Returns the socket, and for a unix one its file's (device, inode).  Raises OSError with a sentence for people.
    """
    try:
        return listen_unix(where) if isinstance(where, str) else (listen_tcp(*where), None)
    except OSError as error:
        shown = where if isinstance(where, str) else show_address(where)
        raise OSError(f"{shown}: {os.strerror(error.errno) if error.errno else error}") from None


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen on a loopback address.  Raises OSError."""
    host = "127.0.0.1" if host == "localhost" else host  # a resolver may give it any address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def listen_unix(path: str) -> tuple[socket.socket, tuple[int, int]]:
    """Listen at `path`, and replace a socket that an earlier process left there.  Raises OSError.

    Returns the socket, and its file's (device, inode).  It is made under another name and renamed when it listens and
    has its mode: nobody can connect to it before that.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError("there is something else than a socket")
    early = f"{path}.{os.getpid()}"
    with contextlib.ExitStack() as undo:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(early)
        listener = undo.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(early)
        undo.callback(os.unlink, early)
        os.chmod(early, 0o660)
        listener.listen(BACKLOG)
        identity = os.stat(early)
        os.rename(early, path)
        undo.pop_all()
    return listener, (identity.st_dev, identity.st_ino)


class Admin:
    """The admin of one router, from `attach` to close().  It owns its server, listener and Collector."""

    def __init__(self, router: Any, settings: Any, listener: socket.socket | None = None):
        self.router = router
        self.token: str | None = settings.admin_token
        self.identity: tuple[int, int] | None = None  # (device, inode) of the socket file, if we made it
        if listener is None:
            listener, self.identity = listen(settings.admin)
        name = listener.getsockname()
        self.address: str | tuple[str, int] = settings.admin if self.identity else \
            name[:2] if isinstance(name, tuple) else os.fsdecode(name)
        if isinstance(name, tuple) and not ipaddress.ip_address(name[0]).is_loopback:
            raise OSError(f"{show_address(name)}: not a loopback address, but open to other hosts")
        # What Host may say.  On a unix socket no name is the right one, so `sniroute` is allowed, too.
        self.hosts = LOCAL_HOSTS | ({"sniroute"} if isinstance(self.address, str)
                                    else {show_address(self.address).rpartition(":")[0]})
        self.collector = Collector(router)
        self.due = 0.0  # when to collect again
        self.metrics = Cached(lambda: expose(Facts(router, self.collector)))
        self.status = Cached(lambda: render_json(
            {**status(Facts(router, self.collector)), "control": bool(self.token)}))
        self.pulse = Pulse(router.call)
        self.closing = threading.Lock()  # guards `closed`
        self.closed = False
        self.server = Server(self, listener)
        router.endings = self.collector.endings
        self.thread = threading.Thread(target=self.server.serve_forever, args=(COLLECT,), name="admin", daemon=True)
        self.thread.start()

    def collect(self) -> None:
        """Collect, if it is time: many clients must not make it more frequent.  Thread `admin`."""
        now = time.monotonic()
        if now >= self.due:
            self.due = now + COLLECT
            self.collector.collect()

    def close(self) -> None:
        """End the server and its threads, and remove its socket file.  Any thread; a second call does nothing."""
        with self.closing:
            if self.closed:
                return
            self.closed = True
        self.server.shutdown()
        self.thread.join()
        if self.identity is not None:
            with contextlib.suppress(OSError):
                # While our socket is open, no other file gets its inode.  Another inode: the file is a successor's.
                state = os.stat(self.address)
                if (state.st_dev, state.st_ino) == self.identity:
                    os.unlink(self.address)
        self.server.server_close()
        self.server.hang_up()
        if self.router.endings is self.collector.endings:
            self.router.endings = None


def attach(router: Any, settings: Any, listener: socket.socket | None = None) -> Admin:
    """Answer requests about `router` until Admin.close().

    `settings.admin` says where to listen: a loopback (host, port), or the path of a unix socket.  It is not used if
    `listener` is given, a socket that listens already; the Admin closes either.  `settings.admin_token` is what
    orders need; None: there are none.  Raises OSError with a sentence for people if it cannot listen there.
    """
    return Admin(router, settings, listener)
