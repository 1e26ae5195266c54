"""sniroute_admin: metrics, status, health and control of a running sniroute, by HTTP on this host only.

    browser, curl, Prometheus
          |  HTTP/1.1 on a loopback port or a unix socket, one request for each connection
          v
      listener ---> thread `admin` ---------------> threads `admin-<n>`, 16 at most
                    accepts                          Handler: Host, Origin, path, token
                    every 0.25 s:                      |           |            |
                    Collector.collect()                |           |            +- POST: Router.reload,
                      ^             |  histograms,     v           v                     TunnelTable.stop, wait
     Router.endings --+             +- rings, --->   METRICS     status()
     TunnelTable.started               rates           ^           ^
                                                       +-- Facts --+-- copies of what the router counts

A drop-in: sniroute.py loads it where --admin is given, and hands it the router.  It imports neither
sniroute nor its siblings, and without it the router lacks nothing else.

Threads.  `admin` accepts, and is the only one that writes to the Collector.  `admin-<n>` answers one
request, and takes its deadline with it: 5 s for all of the request, 5 s for all of the answer.  None of
them touches a client's socket, or shares a lock with the loop: what the loop writes is copied in one
step of the interpreter (see `copied`), and what it should do is handed to it by `Router.call`.  The
table of tunnels has a lock, which the loop never takes.  This file's own (in Cached, Pulse and Admin) are
no other thread's business; Cached's is held while the table is looked at, and nobody takes the two the
other way round.

What is bounded.  Requests, their sizes and times; rings; names (TopNames); rows of /status; and by
the cache the work: whoever asks more often than twice a second gets what the last one got.  No JSON is
made in one long step, which would keep the interpreter from the loop.

Who may ask.  The host's own users: a loopback address is open to all of them, a unix socket (0660) to
its group.  A page in a browser is a stranger on this host, so Host, Origin and Sec-Fetch-Site are looked
at before all else.  What changes something wants the token, too.

Seams: I want to ...
    export another number         a row in METRICS; out of each connection's ending: a row in HISTOGRAMS
    answer on another path        a function, and its row in ENDPOINTS
    show something on the page    a field in `status`, and an element in HTML that SCRIPT fills

Names, addresses and words of others are shown as printable ASCII; labels of metrics are configured
routes and fixed words, never what a client said.
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
from typing import Any, Callable, NamedTuple

from sniroute_metrics import Collector, Facts, copied, expose, status
from sniroute_names import printable, show_address
from sniroute_page import PAGE, POLICY

log = logging.getLogger("sniroute")

# Limits, each with its reason.  Sizes in bytes, times in seconds.
REQUESTS_MAX = 16  # at once; a browser uses six, and a scraper one
REQUEST_TIME = 5.0  # for all of a request, however it trickles in
ANSWER_TIME = 5.0  # for all of an answer: the largest is a few hundred kilobytes, to this host
LINGER = 1.0  # a client whose request was not read may read why ...
LINGER_READS = 64  # ... while so many pieces of it are thrown away
HEAD_MAX = 32768  # request line and header fields
BODY_MAX = 65536  # no request needs one
COLLECT = 0.25  # between two looks at what has ended: the router keeps ENDINGS_MAX meanwhile
CACHE_TIME = 0.5  # an answer is given again for so long: a scraping storm costs nothing
ACCEPT_PAUSE = 0.1  # when descriptors are short: an accept loop that spins burns a core
PULSE_TIME = 1.0  # the loop answers within microseconds, or hangs
CLOSE_TIME = 1.0  # for the threads at the end; one that waits for a tunnel's start ends later, with nobody to tell
BACKLOG = 64

LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]"))


class Declined(Exception):
    """A request that gets no more than a sentence: a status, that sentence, and header fields."""

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(sentence)
        self.answer = Answer.json({"error": sentence}, status,
                                  tuple((name.replace("_", "-"), value) for name, value in headers.items()))


class Answer(NamedTuple):
    """What a request gets."""

    status: int
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()

    @classmethod
    def json(cls, value: dict[str, Any], status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
        """An answer in JSON."""
        return cls(status, render_json(value), "application/json", headers)


# -- text --------------------------------------------------------------------------------------


def render_json(value: dict[str, Any]) -> bytes:
    """A JSON object.  A list in it is encoded row by row: json.dumps of it all would hold up the loop."""
    members = []
    for name, member in value.items():
        text = "[" + ",\n ".join(map(json.dumps, member)) + "]" if isinstance(member, list) else json.dumps(member)
        members.append(f"{json.dumps(name)}: {text}")
    return ("{" + ",\n".join(members) + "}\n").encode()


class Cached:
    """What `make` gave last, for CACHE_TIME."""

    def __init__(self, make: Callable[[], bytes]):
        self.make = make
        self.lock = threading.Lock()  # guards the rest; held while it is made, so that many who ask make one
        self.until = 0.0
        self.made = b""

    def get(self) -> bytes:
        """It, made anew where it is old."""
        with self.lock:
            if time.monotonic() >= self.until:
                self.made = self.make()
                self.until = time.monotonic() + CACHE_TIME
            return self.made

    def forget(self) -> None:
        """Make it anew next time."""
        with self.lock:
            self.until = 0.0


class Pulse:
    """Whether the loop answers.  Those who ask while it does not share one question: none piles up there."""

    def __init__(self, call: Callable[[Callable[[], None]], None]):
        self.call = call
        self.lock = threading.Lock()  # guards `heard`; never held while waiting
        self.heard: threading.Event | None = None

    def beats(self) -> bool:
        """Ask the loop, and wait for its answer for PULSE_TIME."""
        with self.lock:
            if self.heard is None or self.heard.is_set():
                self.heard = threading.Event()
                self.call(self.heard.set)
            heard = self.heard
        return heard.wait(PULSE_TIME)


# -- requests ----------------------------------------------------------------------------------

HEADERS = "".join(f"{name}: {value}\r\n" for name, value in (
    ("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"), ("Cross-Origin-Resource-Policy", "same-origin"), ("Cache-Control", "no-store"),
    ("Connection", "close")))



def page(admin: Admin, name: str) -> Answer:
    """GET /"""
    return Answer(200, PAGE, "text/html; charset=utf-8")


def metrics(admin: Admin, name: str) -> Answer:
    """GET /metrics"""
    return Answer(200, admin.metrics.get(), "text/plain; version=0.0.4; charset=utf-8")


def show_status(admin: Admin, name: str) -> Answer:
    """GET /status"""
    return Answer(200, admin.status.get(), "application/json")


def health(admin: Admin, name: str) -> Answer:
    """GET /healthz: whether the loop answers."""
    if admin.router.phase == "stopped" or not admin.pulse.beats():
        return Answer(503, b"the loop does not answer\n")
    return Answer(200, b"ok\n")


def readiness(admin: Admin, name: str) -> Answer:
    """GET /readyz: whether it accepts connections."""
    if admin.router.phase != "running":
        return Answer(503, f"{admin.router.phase}\n".encode())
    if admin.router.paused:
        return Answer(503, b"not accepting for now: connections or descriptors are short\n")
    return Answer(200, b"ok\n")


def reload(admin: Admin, name: str) -> Answer:
    """POST /reload"""
    faults = [printable(fault, 1000) for fault in admin.router.reload()]
    if faults:
        return Answer.json({"error": "; ".join(faults), "faults": faults}, 409)
    return Answer.json({"done": "The settings were read again."})


def tunnel_key(admin: Admin, name: str) -> str:
    """The tunnel that a path names, by its key or by a client's name.  Raises Declined.

    A key has to be one of the table's: it became that by way of a name, which is checked.
    """
    if ":" not in name:
        try:
            return admin.router.tunnel_of(name)
        except ValueError as error:
            raise Declined(404, printable(str(error), 500)) from None
    tunnels = admin.router.tunnels
    if not any(view.key == name for view in (*tunnels.snapshot(), *tunnels.failed())):
        raise Declined(404, f"{printable(name)} is not in the table; a client's name may start it")
    return name


def stop_tunnel(admin: Admin, name: str) -> Answer:
    """POST /tunnels/NAME/stop"""
    key = tunnel_key(admin, name)
    if not admin.router.tunnels.stop(key):
        raise Declined(404, f"{key} is not up, and did not fail")
    return Answer.json({"done": f"{key} is stopped.", "tunnel": key})


def start_tunnel(admin: Admin, name: str) -> Answer:
    """POST /tunnels/NAME/start: answers when it is up.  One that failed, or waits for its next try, is tried now."""
    key = tunnel_key(admin, name)
    tunnels = admin.router.tunnels
    if any(view.key == key for view in tunnels.failed()) \
            or any(view.key == key and view.state == "backoff" for view in tunnels.snapshot()):
        tunnels.stop(key)
    began = tunnels.clock()
    try:
        tunnels.wait(key, None, began + tunnels.start_timeout)
    except Exception as error:
        kind = getattr(error, "kind", None)  # of a TunnelError
        if kind is None:
            raise
        raise Declined(409 if kind in ("limit", "budget", "stopping") else 502, printable(str(error), 500)) from None
    return Answer.json({"done": f"{key} is ready.", "tunnel": key, "seconds": round(tunnels.clock() - began, 3)})


class Endpoint(NamedTuple):
    """What is done for a method and a path."""

    method: str  # GET is HEAD, too
    path: re.Pattern[str]
    act: Callable[[Admin, str], Answer]  # given the path's first group, percent-decoded


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
ALLOW = {"GET": "GET, HEAD", "POST": "POST"}
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::[0-9]{1,5})?")
BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)


class Timed(io.RawIOBase):
    """What a client sends, until a deadline and up to a number of bytes; its end before that is an error."""

    def __init__(self, sock: socket.socket, seconds: float, limit: int):
        self.sock = sock
        self.deadline = time.monotonic() + seconds
        self.left = limit

    def readable(self) -> bool:
        """As io wants it."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As io wants it.  Raises OSError."""
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
    """One request.  Threads `admin-<n>`."""

    protocol_version = "HTTP/1.1"
    server: Server
    raw_requestline: bytes

    def setup(self) -> None:
        """Limit what the client may say."""
        self.connection: socket.socket = self.request
        self.rfile = io.BufferedReader(Timed(self.connection, REQUEST_TIME, HEAD_MAX + BODY_MAX))
        self.unread = True  # what the client said, in part
        self.replied = False

    def handle(self) -> None:
        """Read a request, answer it, and end: a connection kept alive would keep a thread."""
        self.raw_requestline = self.rfile.readline(HEAD_MAX)
        self.requestline = self.command = self.path = ""
        if not self.raw_requestline.endswith(b"\n"):
            self.send_error(414)
            return
        if not self.parse_request():
            return  # send_error has answered
        try:
            self.reply(self.answer())
        except Declined as declined:
            self.reply(declined.answer)

    def finish(self) -> None:
        """Let a client that was declined early read why: unread bytes would reset it."""
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
        """What this request gets.  Raises Declined, and OSError where the client is gone."""
        if self.request_version == "HTTP/0.9":  # Python 3.14 has no header then, not even an empty one
            raise Declined(400, "HTTP/0.9 has no header, and Host is needed")
        self.check_origin()
        path = self.path.partition("?")[0]
        found = [(endpoint, match) for endpoint in ENDPOINTS if (match := endpoint.path.fullmatch(path))]
        if not found:
            raise Declined(404, "there is no such path")
        endpoint, match = found[0]
        if endpoint.method != self.command.replace("HEAD", "GET"):
            raise Declined(405, f"this path is for {ALLOW[endpoint.method]}", Allow=ALLOW[endpoint.method])
        if endpoint.method == "POST":
            self.check_token()
        self.skip_body()
        try:
            name = urllib.parse.unquote(match[1], errors="strict")
        except ValueError:
            raise Declined(400, "the name in the path is not UTF-8") from None
        admin = self.server.admin
        try:
            return endpoint.act(admin, name)
        except Declined:
            raise
        except Exception:
            log.exception("admin: a fault in sniroute: please report it")
            raise Declined(500, "a fault in sniroute: its log says which") from None
        finally:
            if endpoint.method == "POST":
                admin.status.forget()

    def field(self, name: str) -> str | None:
        """A header field, which may be there once.  Raises Declined."""
        values = self.headers.get_all(name, [])
        if len(values) > 1:
            raise Declined(400, f"{name} is there twice")
        return values[0].strip() if values else None

    def check_origin(self) -> None:
        """Decline what a page of another origin may have sent.  Raises Declined.

        A page may have its own name resolve to this host (DNS rebinding), but that name is in Host.  The port
        tells nothing: it may be forwarded by ssh.
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
        """Decline who may not give orders.  Raises Declined."""
        token = self.server.admin.token
        if not token:
            raise Declined(403, "the router takes no orders: start it with SNIROUTE_ADMIN_TOKEN in its environment")
        match = BEARER.fullmatch(self.field("Authorization") or "")
        if match is None or not hmac.compare_digest(match[1].encode("utf-8", "replace"), token.encode()):
            raise Declined(401, "the token is missing or wrong", WWW_Authenticate='Bearer realm="sniroute"')

    def skip_body(self) -> None:
        """Read the body, which says nothing here.  Raises Declined, OSError."""
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
        """Send an answer, all at once.  Raises OSError where the client is gone, or does not read."""
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
        """Where the base class cannot parse a request."""
        self.reply(Declined(code, printable(message or http.HTTPStatus(code).phrase)).answer)

    def handle_expect_100(self) -> bool:
        """Let the client send its body."""
        self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True


class Server(http.server.ThreadingHTTPServer):
    """Accepts, collects, and hands each connection to a thread.  Thread `admin`, but for `_serve`."""

    def __init__(self, admin: Admin, listener: socket.socket):
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()  # TCPServer makes one of its own
        self.socket = listener
        listener.setblocking(False)  # another process may listen on it, too, and be faster
        self.admin = admin
        self.free = collections.deque(range(REQUESTS_MAX, 0, -1))  # numbers of threads that do not run
        self.live: dict[int, tuple[threading.Thread, socket.socket]] = {}

    def service_actions(self) -> None:
        """Collect.  Called after each wait for a client, COLLECT at the longest."""
        try:
            self.admin.collect()
        except Exception:
            log.exception("admin: a fault in sniroute: please report it")

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next client.  Raises OSError where there is none."""
        try:
            return self.socket.accept()
        except BlockingIOError:
            raise
        except OSError:
            time.sleep(ACCEPT_PAUSE)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a client a thread, or none of it where all are taken."""
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
        except RuntimeError:  # threads are short
            self._end(number, request)

    def _serve(self, number: int, request: socket.socket, client_address: Any) -> None:
        """A thread `admin-<n>`."""
        try:
            self.finish_request(request, client_address)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            self._end(number, request)

    def _end(self, number: int, request: socket.socket) -> None:
        self.shutdown_request(request)
        del self.live[number]
        self.free.append(number)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none of ours; the rest is."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log.debug("admin: %s", printable(str(error)))
        else:
            log.exception("admin: a fault in sniroute: please report it")

    def hang_up(self) -> None:
        """End what is under way, and wait for its threads, for a while."""
        deadline = time.monotonic() + CLOSE_TIME
        for _, request in copied(self.live, dict).values():
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        for thread, _ in copied(self.live, dict).values():
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


def listen(where: str | tuple[str, int]) -> tuple[socket.socket, tuple[int, int] | None]:
    """A socket that listens there, and the identity of its file.  Raises OSError with a sentence for people."""
    try:
        return listen_unix(where) if isinstance(where, str) else (listen_tcp(*where), None)
    except OSError as error:
        shown = where if isinstance(where, str) else show_address(where)
        raise OSError(f"{shown}: {os.strerror(error.errno) if error.errno else error}") from None


def listen_tcp(host: str, port: int) -> socket.socket:
    """A socket that listens on a loopback address."""
    host = "127.0.0.1" if host == "localhost" else host  # that name may resolve to anything
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def listen_unix(path: str) -> tuple[socket.socket, tuple[int, int]]:
    """A socket that listens at `path`, in the place of what an earlier process left there.

    It gets its name when it listens, and has its mode: nobody sees it before that.
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
    """The admin's server, while it runs.  See `attach`."""

    def __init__(self, router: Any, settings: Any, listener: socket.socket | None = None):
        self.router = router
        self.token: str | None = settings.admin_token
        self.identity: tuple[int, int] | None = None  # of a socket file that is ours
        if listener is None:
            listener, self.identity = listen(settings.admin)
        name = listener.getsockname()
        self.address: str | tuple[str, int] = settings.admin if self.identity else \
            name[:2] if isinstance(name, tuple) else os.fsdecode(name)
        if isinstance(name, tuple) and not ipaddress.ip_address(name[0]).is_loopback:
            raise OSError(f"{show_address(name)}: not a loopback address, but open to other hosts")
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
        """Collect, when it is time.  Thread `admin`."""
        now = time.monotonic()
        if now >= self.due:
            self.due = now + COLLECT
            self.collector.collect()

    def close(self) -> None:
        """End it.  Any thread; a second call does nothing."""
        with self.closing:
            if self.closed:
                return
            self.closed = True
        self.server.shutdown()
        self.thread.join()
        if self.identity is not None:
            with contextlib.suppress(OSError):
                state = os.stat(self.address)  # before the socket is closed: until then nothing else has its number
                if (state.st_dev, state.st_ino) == self.identity:  # else a successor's
                    os.unlink(self.address)
        self.server.server_close()
        self.server.hang_up()
        if self.router.endings is self.collector.endings:
            self.router.endings = None


def attach(router: Any, settings: Any, listener: socket.socket | None = None) -> Admin:
    """Serve the admin's requests at `settings.admin`, or on `listener`, until Admin.close().

    `settings.admin` is a loopback (host, port), or the path of a unix socket.  The listener is closed with the
    Admin.  Raises OSError with a sentence for people where nothing can be listened on.
    """
    return Admin(router, settings, listener)
