"""sniroute_admin: metrics, status, health and control of a running router, by HTTP.

    this host's own users: browser, curl, Prometheus         anybody: probes, Prometheus
          |  a loopback port or a unix socket (--admin)           |  any address (--admin-public)
          v                                                       v
      Admin.decide: Host, Origin, path, method, token         Admin.decide_public: path, method
          +--------------------------+----------------------------+
                                     |  a Plan; sniroute_door has accepted the client and read the head
                                     v  the path's row in ENDPOINTS:

          GET /                             PAGE of sniroute_page
          GET /claims/NAME              Registrar.find
          GET /metrics, /status             Cached: sniroute_metrics makes it of Facts          public: /metrics
          GET /healthz                      Pulse: did the router's loop answer in time?        public
          GET /readyz                       Router.phase, Router.paused                         public
          POST /reload                      Hooks.reload
          POST /tunnels/NAME/start, stop    TunnelTable.wait, TunnelTable.stop
          POST /routes/PATTERN/backends/ADDRESS/drain, enable    Book.drain, in the router's loop

An option: the daemon imports this file if --admin or --admin-public is given, or if systemd has a socket for one, and
calls `attach(router, settings)`.  The router and its tunnel table are arguments: their classes are not imported.  It
imports sniroute_door, sniroute_metrics, sniroute_page and sniroute_names.

Threads.  `admin` runs the Door: it accepts clients, answers probes itself, and is the only thread that writes to the
Collector and the Pulse.  Each `admin-<n>` or `public-<n>` makes one answer.  None of them touches a socket of the
router's clients.  To have the loop do something they hand it a function by `Router.call`.

Locks.  Cached and Admin have one each.  While Cached's is held, Facts takes the tunnel table's; nothing takes these
two in the other order.  The router's loop takes none of them.

What is bounded.  Clients, sizes and times: see sniroute_door.  Work: `Cached` gives the same answer again for half a
second, or twenty times as long as it took to make, so asking more often costs almost nothing.  Single steps of the
interpreter, as the router's loop cannot run during one: `render_json` encodes long lists row by row.

Who may ask.  At --admin this host's own users: any of them on a loopback port, owner and group (0660) on a unix socket.
A page that somebody's browser shows is a stranger on this host, so Host, Origin and Sec-Fetch-Site are checked before
everything else.  A request that changes something also needs the token.  At --admin-public everybody: there is
nothing but the rows that are `public`, which name no client; of targets, the backends of routes that have several.

Seams: I want to ...
    answer on another path        a function, and its row in ENDPOINTS
    export another number         see sniroute_metrics
    show something on the page    see sniroute_page
    let somebody else ask         `Admin.decide`, `check_origin`, `check_token`, LOCAL_HOSTS
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import logging
import os
import queue
import re
import socket
import threading
import time
import urllib.parse
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Sequence

from sniroute_door import LOOP, THREAD, Answer, Declined, Door, Gate, Head, Plan, listen
from sniroute_metrics import Collector, Facts, expose, status
from sniroute_names import printable, show_address
from sniroute_page import PAGE

if TYPE_CHECKING:
    from sniroute_launchers import TunnelKey

__version__ = "0.1.0"

log = logging.getLogger("sniroute")

# Limits, each with its reason.  Times in seconds.
THREADS = {"admin": 16, "public": 2}  # of each address: orders wait for tunnels; /metrics alone needs hardly one
COLLECT = 0.25  # between two calls of Collector.collect, which can keep ten times what ends meanwhile
CACHE_TIME = 0.5  # an answer is given again for so long: the page and several scrapers cost no more than one of them
CACHE_SHARE = 20  # ... or so many times as long as it took: 10,000 routes must not keep a processor busy
PULSE_EVERY = 1.0  # between two questions to the loop: each wakes it
PULSE_TIME = 1.0  # for the loop to answer: it does so within microseconds, unless it hangs
LOOP_TIME = 5.0  # for the loop to follow an order: it does so in its next turn, unless it hangs
BACKENDS_NAMED = 10  # in an answer that says which ones there are

LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]"))  # names in Host that mean this host
ALLOW = {"GET": "GET, HEAD", "POST": "POST"}  # an endpoint's method: what Allow says of it
METRICS_KIND = "text/plain; version=0.0.4; charset=utf-8"
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::[0-9]{1,5})?")  # RFC 9110 section 7.2, in lower case
BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)  # RFC 6750 section 2.1


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


def json_answer(value: dict[str, Any], status: int = 200) -> Answer:
    """An answer in JSON."""
    return Answer(status, render_json(value), "application/json")


class Cached:
    """The result of `make`, made anew after CACHE_TIME, or later where that takes long.  Any thread."""

    def __init__(self, make: Callable[[], bytes]):
        self.make = make
        self.lock = threading.Lock()  # guards the rest; held during `make`: threads that wait get its result, too
        self.until = 0.0
        self.made = b""

    def get(self) -> bytes:
        """The result, made a moment ago."""
        with self.lock:
            if time.monotonic() >= self.until:
                began = time.monotonic()
                self.made = self.make()
                now = time.monotonic()
                self.until = now + max(CACHE_TIME, CACHE_SHARE * (now - began))
            return self.made

    def forget(self) -> None:
        """Have the next `get` make it anew: something has changed."""
        with self.lock:
            self.until = 0.0


class Pulse:
    """Whether the router's loop runs, without waiting for it.  `call` is Router.call.

    It is asked now and then, and not again before it has answered: questions must not pile up in a loop that hangs.
    So one that hangs is found out within PULSE_EVERY and PULSE_TIME.  Thread `admin`; `_hear` runs in the loop.
    """

    def __init__(self, call: Callable[[Callable[[], None]], None], clock: Callable[[], float] = time.monotonic):
        self.call = call
        self.clock = clock
        self.asked = -PULSE_EVERY  # when it was asked last
        self.heard = True  # it has answered that

    def ask(self) -> None:
        """Ask it, if it is time."""
        now = self.clock()
        if self.heard and now - self.asked >= PULSE_EVERY:
            self.asked = now
            self.heard = False
            self.call(self._hear)

    def _hear(self) -> None:
        self.heard = True

    def beats(self) -> bool:
        """Whether it has answered, or still has time to."""
        return self.heard or self.clock() - self.asked < PULSE_TIME


# -- endpoints ---------------------------------------------------------------------------------
#
# One function for each path.  It is given the Admin and what the path names: the tunnel, or the route and the backend,
# for the others "".  It runs in a thread `admin-<n>` or `public-<n>`; those that are `quick` run in the thread `admin`,
# and never wait.


def page(admin: Admin, name: str) -> Answer:
    """GET /: the page."""
    return Answer(200, PAGE, "text/html; charset=utf-8")


def metrics(admin: Admin, name: str) -> Answer:
    """GET /metrics: all numbers for Prometheus."""
    return Answer(200, admin.metrics.get(), METRICS_KIND)


def show_status(admin: Admin, name: str) -> Answer:
    """GET /status: `sniroute_metrics.status` as JSON, and `control`."""
    return Answer(200, admin.status.get(), "application/json")


def health(admin: Admin, name: str) -> Answer:
    """GET /healthz: 200 if the router's loop answers, else 503."""
    if admin.router.phase == "stopped" or not admin.pulse.beats():
        return Answer(503, b"the loop does not answer\n")
    return Answer(200, b"ok\n")


def readiness(admin: Admin, name: str) -> Answer:
    """GET /readyz: 200 if the router accepts connections, and goes on to; else 503."""
    if admin.router.phase != "running":
        return Answer(503, f"{admin.router.phase}\n".encode())
    if admin.router.paused:
        return Answer(503, b"not accepting for now: connections or descriptors are short\n")
    return Answer(200, b"ok\n")


def reload(admin: Admin, name: str) -> Answer:
    """POST /reload: read the settings again.  409 if they have faults; then the router keeps those it has."""
    faults = [printable(fault, 1000) for fault in admin.router.hooks.reload()]
    if faults:
        return json_answer({"error": "; ".join(faults), "faults": faults}, 409)
    return json_answer({"done": "The settings were read again."})


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
    return json_answer({"done": f"{key} is stopped.", "tunnel": str(key)})


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
    return json_answer({"done": f"{key} is ready.", "tunnel": str(key), "seconds": round(tunnels.clock() - began, 3)})


def find_route(admin: Admin, pattern: str) -> Any:
    """The route of the configuration with this pattern; of a port also by its address.  Raises Declined (404)."""
    router = admin.router
    names = pattern, f"port {pattern.removeprefix('port ').removeprefix('*')}"
    for route in (*router.routes.routes, *router.settings.port):
        if route.pattern in names:
            return route
    raise Declined(404, f"no route has the pattern {printable(pattern)}")


def order_drain(admin: Admin, pattern: str, address: str, is_drained: bool) -> Answer:
    """Lead no new client of a route to one of its backends, or lead them there again."""
    route = find_route(admin, pattern)
    if route.several is None:
        raise Declined(404, f"{printable(route.pattern)} leads to one target, {printable(route.target)}: there is no "
                            "other one that could take its clients")
    answers: queue.SimpleQueue[tuple[str, list[str]]] = queue.SimpleQueue()

    def act() -> None:
        """In the router's loop."""
        book = admin.router.targets.book
        found = book.drain(route.pattern, address, is_drained)
        answers.put((found, [] if found else [
            member.target for group, member in book.rows() if group.pattern == route.pattern]))

    admin.router.call(act)
    try:
        target, targets = answers.get(timeout=LOOP_TIME)
    except queue.Empty:
        raise Declined(503, "the router's loop does not answer; it may still do it later") from None
    shown = printable(target)
    if not target:
        there = ", ".join(map(printable, targets[:BACKENDS_NAMED])) + " ..." * (len(targets) > BACKENDS_NAMED)
        raise Declined(404, f"{printable(route.pattern)} has no backend {printable(address)}; it has: "
                            f"{there or 'none that depends on no name'}")
    done = f"{printable(route.pattern)}: backend {shown} is {'drained' if is_drained else 'enabled'}"
    return json_answer({"done": f"{done}.", "route": printable(route.pattern), "backend": shown,
                        "drained": is_drained})._replace(said=done)


def drain_backend(admin: Admin, pattern: str, address: str) -> Answer:
    """POST /routes/PATTERN/backends/ADDRESS/drain: lead no new client there; those that it has stay."""
    return order_drain(admin, pattern, address, True)


def enable_backend(admin: Admin, pattern: str, address: str) -> Answer:
    """POST /routes/PATTERN/backends/ADDRESS/enable: lead clients there again."""
    return order_drain(admin, pattern, address, False)


def show_claim(admin: Admin, key: str) -> Answer:
    """GET /claims/NAME: what the registry knows of a name, or of `tcp:PORT`."""
    registrar = admin.router.registrar
    found = None if registrar is None else registrar.find(key.lower())
    if found is None:
        raise Declined(404, f"nobody has claimed {printable(key)}")
    return json_answer(found)


class Endpoint(NamedTuple):
    """A method, a path, and the function that answers them."""

    method: str  # GET means HEAD, too
    path: re.Pattern[str]  # its groups are what the path names
    act: Callable[..., Answer]  # is given the Admin, and these groups, percent-decoded; may raise Declined
    quick: bool = False  # `act` never waits
    public: bool = False  # strangers may ask, at --admin-public


ENDPOINTS = (
    Endpoint("GET", re.compile(r"/()"), page),
    Endpoint("GET", re.compile(r"/metrics()"), metrics, public=True),
    Endpoint("GET", re.compile(r"/status()"), show_status),
    Endpoint("GET", re.compile(r"/claims/([^/]+)"), show_claim),
    Endpoint("GET", re.compile(r"/healthz()"), health, quick=True, public=True),
    Endpoint("GET", re.compile(r"/readyz()"), readiness, quick=True, public=True),
    Endpoint("POST", re.compile(r"/reload()"), reload),
    Endpoint("POST", re.compile(r"/tunnels/([^/]+)/stop"), stop_tunnel),
    Endpoint("POST", re.compile(r"/tunnels/([^/]+)/start"), start_tunnel),
    Endpoint("POST", re.compile(r"/routes/([^/]+)/backends/([^/]+)/drain"), drain_backend),
    Endpoint("POST", re.compile(r"/routes/([^/]+)/backends/([^/]+)/enable"), enable_backend),
)
PUBLIC = tuple(endpoint for endpoint in ENDPOINTS if endpoint.public)


def find_endpoint(head: Head, endpoints: Sequence[Endpoint] = ENDPOINTS) -> tuple[Endpoint, tuple[str, ...]]:
    """The endpoint for a request, and what its path names, not yet decoded.  Raises Declined (404, 405)."""
    for endpoint in endpoints:
        match = endpoint.path.fullmatch(head.path)
        if match is None:
            continue
        if endpoint.method != head.method.replace("HEAD", "GET"):
            allowed = ALLOW[endpoint.method]
            raise Declined(405, f"this path is for {allowed}", Allow=allowed)
        return endpoint, match.groups()
    raise Declined(404, "there is no such path")


# -- who may ask -------------------------------------------------------------------------------


def check_origin(head: Head, hosts: frozenset[str]) -> None:
    """Decline a request that a page of another origin may have sent.  Raises Declined.

    A browser tells where the page came from in Origin (RFC 6454 section 7) and Sec-Fetch-Site (W3C, Fetch
    Metadata).  A page may also have its own name resolve to this host (DNS rebinding).  Then the request seems
    to be of the same origin, but Host has that name.  Host may have any port: ssh may forward another one here.
    """
    host = (head.field("host") or "").lower()
    if not host:
        raise Declined(400, "Host is missing")
    match = HOST.fullmatch(host)
    if match is None or match[1] not in hosts:
        raise Declined(421, "Host is not this router's address: ask for localhost; "
                            "--admin-public is for other hosts, and takes any name")
    if head.field("origin") not in (None, f"http://{host}") \
            or head.field("sec-fetch-site") not in (None, "same-origin", "none"):
        raise Declined(403, "a page of another origin may not ask")


def check_token(head: Head, token: str | None) -> None:
    """Decline an order without the right token.  Raises Declined."""
    if not token:
        raise Declined(403, "the router takes no orders: start it with SNIROUTE_ADMIN_TOKEN in its environment")
    match = BEARER.fullmatch(head.field("authorization") or "")
    if match is None or not hmac.compare_digest(match[1].encode("utf-8", "replace"), token.encode()):
        raise Declined(401, "the token is missing or wrong", WWW_Authenticate='Bearer realm="sniroute"')


# -- the admin ---------------------------------------------------------------------------------


class Admin:
    """The admin of one router, from `attach` to close().  It owns its Door and its Collector."""

    def __init__(self, router: Any, settings: Any):
        self.router = router
        self.token: str | None = settings.admin_token
        self.address: str | tuple[str, int] | None = None  # of --admin: the path of a unix socket, or (host, port)
        self.public: str | tuple[str, int] | None = None  # of --admin-public
        self.identity: tuple[int, int] | None = None  # (device, inode) of the socket file of --admin, if we made it
        self.hosts: frozenset[str] = LOCAL_HOSTS  # what Host may say at --admin
        self.collector = Collector(router)
        self.due = 0.0  # when to collect again
        self.metrics = Cached(lambda: expose(Facts(router, self.collector)))
        self.status = Cached(lambda: render_json(
            {**status(Facts(router, self.collector)), "control": bool(self.token)}))
        self.pulse = Pulse(router.call)
        self.closing = threading.Lock()  # guards `closed`
        self.closed = False
        self.door = Door(self.tick, COLLECT)

    # -- the thread that attaches ----------------------------------------------------------------

    def open(self, where: str | tuple[str, int] | None, listener: socket.socket | None) -> None:
        """Answer this host's users at the address `where`, or at a listener.  Raises OSError."""
        if listener is None:
            listener, self.identity = listen(where)
        address = where if self.identity else address_of(listener)
        if isinstance(address, tuple) and not ipaddress.ip_address(address[0]).is_loopback:
            listener.close()
            raise OSError(f"{show_address(address)}: not a loopback address, but open to other hosts: "
                          "--admin-public is for these")
        self.address = address
        if isinstance(address, str):  # systemd's, too: no setting names that
            self.router.targets.own_socket = address
        else:
            self.router.targets.own_admin = [address[:2]]
        # On a unix socket no name is the right one, so `sniroute` is allowed, too.
        self.hosts |= {"sniroute" if isinstance(address, str) else show_address(address).rpartition(":")[0]}
        self.door.gates.append(Gate(self.door, "admin", listener, self.decide, THREADS["admin"]))

    def open_public(self, where: tuple[str, int] | None, listener: socket.socket | None) -> None:
        """Answer everybody, with what is `public`, at the address `where`, or at a listener.  Raises OSError."""
        if listener is None:
            listener, _ = listen(where)
        self.public = address_of(listener)
        self.door.gates.append(Gate(self.door, "public", listener, self.decide_public, THREADS["public"]))

    # -- thread admin --------------------------------------------------------------------------

    def tick(self) -> None:
        """What recurs."""
        self.due = time.monotonic() + COLLECT
        self.pulse.ask()
        self.collector.collect()

    def decide(self, head: Head) -> Plan:
        """What is done for a request of this host's users.  Raises Declined."""
        check_origin(head, self.hosts)
        endpoint, quoted = find_endpoint(head)
        if endpoint.method == "POST":
            check_token(head, self.token)
        return self.plan(endpoint, quoted, head)

    def decide_public(self, head: Head) -> Plan:
        """What is done for a request of anybody.  Raises Declined."""
        return self.plan(*find_endpoint(head, PUBLIC), head)

    def plan(self, endpoint: Endpoint, quoted: Sequence[str], head: Head) -> Plan:
        """What is done for a request that may be done.  Raises Declined."""
        length = head.body_length()
        try:
            names = [urllib.parse.unquote(each, errors="strict") for each in quoted]
        except ValueError:
            raise Declined(400, "the name in the path is not UTF-8") from None
        return Plan(lambda caller: self.act(endpoint, names), length, LOOP if endpoint.quick else THREAD)

    # -- any thread ----------------------------------------------------------------------------

    def act(self, endpoint: Endpoint, names: Sequence[str]) -> Answer:
        """Do what an endpoint does.  Raises Declined."""
        try:
            return endpoint.act(self, *names)
        finally:
            if endpoint.method == "POST":
                self.status.forget()  # the page asks for it next, and should see what came of the order

    def close(self) -> None:
        """End the Door and its threads, and remove the socket file.  A second call does nothing."""
        with self.closing:
            if self.closed:
                return
            self.closed = True
        if self.identity is not None:
            with contextlib.suppress(OSError):
                # While our socket is open, no other file gets its inode.  Another inode: the file is a successor's.
                state = os.stat(self.address)
                if (state.st_dev, state.st_ino) == self.identity:
                    os.unlink(self.address)
        self.door.close()
        if self.router.endings is self.collector.endings:
            self.router.endings = self.router.accesses = None


def address_of(listener: socket.socket) -> str | tuple[str, int]:
    """Where it listens: (host, port), or a path."""
    name = listener.getsockname()
    return name[:2] if isinstance(name, tuple) else os.fsdecode(name)


def attach(router: Any, settings: Any, listeners: Mapping[str, socket.socket] = {}, alone: bool = True) -> Admin:
    """Answer requests about `router` until Admin.close().

    `settings.admin` says where this host's users ask: a loopback (host, port), or the path of a unix socket;
    `settings.admin_public` where everybody does: (host, port), with the host `*` for every address; None: nowhere.
    `listeners` are sockets that listen already, by "admin" and "admin-public", and are used instead; the Admin closes
    them.  `settings.admin_token` is what orders need; None: there are none.

    Raises OSError with a sentence for people, which names the setting, if it cannot listen at one of them.  If the
    router is not `alone`, the sentence goes to the log instead: a successor goes on without.
    """
    admin = Admin(router, settings)
    try:
        for name, where, attempt in (("admin", settings.admin, admin.open),
                                     ("admin-public", settings.admin_public, admin.open_public)):
            if where is None and name not in listeners:
                continue
            try:
                attempt(where, listeners.get(name))
            except OSError as error:
                if alone:
                    raise OSError(f"--{name}: {error}") from None
                log.error("--%s: %s: going on without it", name, error)
    except BaseException:
        admin.close()
        raise
    router.endings, router.accesses = admin.collector.endings, admin.collector.accesses
    admin.door.open()
    return admin
