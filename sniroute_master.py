"""sniroute_master: `master://`: its REST API, and what else it answers over HTTP.

    client --- TLS, or not --- Door (sniroute_door) ---> Master.decide: the path, X-API-Key, the method
                                                           |  the path's row in ENDPOINTS
                                                           v
                                                         Instances (sniroute_instances), Pings, Host, MCP (sniroute_mcp)

With PREFIX of the URL, which is /api where it has none:

    GET, POST                 PREFIX/v1/instances        all; a new one
    GET, PATCH, PUT, DELETE   PREFIX/v1/instances/ID     one: its state; changes and orders; another URL; its end
    GET                       PREFIX/v1/events           what happens, as server-sent events
    GET, POST                 PREFIX/v1/info             this host and the master; another alias
    GET                       PREFIX/v1/tcping           whether a target takes a TCP connection
    GET                       PREFIX/v1/openapi.json     the description of all that is above, made of ENDPOINTS
    GET                       PREFIX/v1/docs             the same as a page
    POST                      PREFIX/v2                  MCP
    GET                       PREFIX/                    a page that shows the instances; it asks for the key

Paths, fields, statuses and sentences are the original's.  What is not, and why: a URL that no instance can have is
refused with the reason instead of an instance in state `error`; DELETE and PUT answer once the process has ended, so
its ports are free; streams get a comment each QUIET; /info has the id of the master from its first start on; what
PATCH refuses it has not done in part.

Who may ask.  All but openapi.json, docs and the page wants the API key, a random one that is printed when it is made,
and never again.  Any page of a browser may ask (CORS `*`), as with the original: the key is in a header of its own, so
a page without it gets nothing, also where its name resolves to this host.  With tls=0 the key crosses the network in
plain text: that is for loopback.

Threads.  `main` waits for signals (`Master.run`).  `master` runs the Door's loop: HTTP, instances, their processes,
which it forks.  `state` writes to the disk (sniroute_children).  `ping-<n>` tries one target.  The log is the
loop's while that runs; it never waits for its reader.  There are no locks here.

Seams: I want to ...
    answer on another path          a function, and its row in ENDPOINTS
    show another figure of a host   `Host.read`, and MasterInfo in SCHEMAS
    describe it, show it to people  sniroute_panel

This room imports sniroute_panel, sniroute_mcp, sniroute_instances, sniroute_children, sniroute_door, sniroute_launchers
(our own words), sniroute_duplex (certificates), sniroute_loop, sniroute_host, sniroute_scarcity, sniroute_names and
sniroute_refusals.

Sources: docs/api.md of NodePass, and what the program was seen to answer; OpenAPI Specification 3.1.1; WHATWG,
"Server-sent events", "Fetch".
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import hmac
import json
import os
import re
import signal
import socket
import ssl
import sys
import threading
import urllib.parse
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from sniroute_door import OWNER, Answer, Caller, Declined, Door, Gate, Head, Plan, listen
from sniroute_duplex import Certificates
from sniroute_host import raise_descriptor_limit
from sniroute_children import Inherited, Instance, NotDone, State, check_value, parse_change
from sniroute_instances import KEY_ID, UPDATE, Instances
from sniroute_launchers import our_words, place
from sniroute_loop import Alarms, Loop, monotonic
from sniroute_mcp import answer as answer_mcp
from sniroute_names import show_address
from sniroute_panel import DOCS_POLICY, PAGE, PAGE_POLICY, V1, Endpoint, describe, docs
from sniroute_refusals import SettingsError
from sniroute_scarcity import SHORT_OF_MEMORY, begin_errand, ran_out

if TYPE_CHECKING:
    from sniroute_forwarder import Log
    from sniroute_nodeurl import Options, Times

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds, sizes in bytes.
PREFIX = "/api"  # the original's
PROGRAM = "sniroute_nodepass"
STATE_FILE = "nodepass.sqlite"  # beside our files, as the original's is beside its own
CALLERS_MAX = 256  # clients at once: dashboards keep some connections each
STREAMS_MAX = 64  # of events: each gets what happens to all instances
STREAM_MAX = 1 << 20  # of events that a client has not read: a thousand instances tell half of that in a second
QUIET = 15.0  # between two comments in a stream: proxies cut silent ones after a minute
RETRY = 3000  # milliseconds after which a browser opens a stream again: the original's
TICK = 1.0  # between two looks at what has become late
PINGS_MAX = 10  # targets that are tried at once: the original's
PING_WAIT = 1.0  # for a place among these: the original's
PING_TIME = 5.0  # for a target to answer, and its name to be found
STOP_SPARE = 7.0  # beyond NP_SHUTDOWN_TIMEOUT, for children that were killed
CPU_SPAN = 0.1  # a share of the processor over less than that says nothing: /proc counts in hundredths

CORS = (("Access-Control-Allow-Origin", "*"),
        ("Access-Control-Allow-Methods", "GET, PATCH, POST, PUT, DELETE, OPTIONS"),
        ("Access-Control-Allow-Headers", "Content-Type, Authorization, X-API-Key, Cache-Control"))


# -- answers -----------------------------------------------------------------------------------


def encode(value: Any) -> bytes:
    """JSON in one line, as the original writes it: without a character that HTML takes for its own."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").encode()


def found(value: Any, status: int = 200) -> Answer:
    """An answer in JSON."""
    return Answer(status, encode(value) + b"\n", "application/json", CORS)


class Failure(Declined):
    """A request that is refused, in the original's form."""

    def __init__(self, status: int, sentence: str):
        Exception.__init__(self, sentence)
        self.answer = found({"error": sentence}, status)


NOT_FOUND = Declined(404, "")
NOT_FOUND.answer = Answer(404, b"404 page not found\n")


class Ask(NamedTuple):
    """A request of somebody who may ask."""

    master: Master
    head: Head
    ident: str  # that the path names; "" without one
    caller: Caller

    def body(self) -> Any:
        """The body's JSON.  Raises Failure."""
        try:
            return json.loads(bytes(self.caller.body))
        except (ValueError, RecursionError):
            raise Failure(400, "Invalid request body") from None

    def url(self) -> tuple[str, str]:
        """The `url` and the `alias` of the body.  Raises Failure."""
        fields = self.body()
        url, alias = (fields.get("url"), fields.get("alias")) if isinstance(fields, dict) else (None, None)
        if not isinstance(url, str) or not url or not isinstance(alias, str | None):
            raise Failure(400, "Invalid request body")
        return url, alias or ""

    def instance(self, what: str = "") -> Instance:
        """The one that the path names.  `what` is not for the API key.  Raises Failure."""
        if not self.ident:
            raise Failure(400, "Instance ID is required")
        one = self.master.instances.find(self.ident)
        if one is None:
            raise Failure(404, "Instance not found")
        if what and one.id == KEY_ID:
            raise Failure(403, "Forbidden: API Key")
        return one

    def answer(self, answer: Answer) -> None:
        """Answer."""
        self.caller.answer(answer)


def show_all(ask: Ask) -> None:
    """GET /instances"""
    ask.answer(found([each.show() for each in ask.master.instances.all()]))


def create(ask: Ask) -> None:
    """POST /instances"""
    ask.answer(found(ask.master.instances.create(*ask.url()).show(), 201))


def show_one(ask: Ask) -> None:
    """GET /instances/ID"""
    ask.answer(found(ask.instance().show()))


def patch(ask: Ask) -> None:
    """PATCH /instances/ID.  As in the original a body that cannot be read changes nothing, and is not refused."""
    one, instances = ask.instance(), ask.master.instances
    try:
        change = parse_change(ask.body())
    except (NotDone, Failure):
        ask.answer(found(one.show()))
        return
    if one.id != KEY_ID:
        instances.change(one, change)
    elif change.action == "restart":
        instances.new_key()
        ask.master.log("info", "API Key regenerated")
        ask.master.tell(UPDATE, one, "")
        ask.master.end_streams()
    ask.answer(found(one.show()))


def put(ask: Ask) -> None:
    """PUT /instances/ID"""
    one = ask.instance("to change")
    ask.master.instances.set_url(one, ask.url()[0], lambda: ask.answer(found(one.show())))


def delete(ask: Ask) -> None:
    """DELETE /instances/ID"""
    ask.master.instances.delete(ask.instance("to remove"), lambda: ask.answer(Answer(204, b"", headers=CORS)))


def stream(ask: Ask) -> None:
    """GET /events"""
    master, caller = ask.master, ask.caller
    if len(master.streams) >= STREAMS_MAX:
        raise Failure(503, f"There are {STREAMS_MAX} streams already")
    body = b"retry: %d\n\n" % RETRY + b"".join(event("initial", each) for each in master.instances.all())
    ask.answer(Answer(200, body, "text/event-stream", (*CORS, ("Cache-Control", "no-cache")), has_end=False))
    master.streams[caller] = None
    caller.when_over(lambda: master.streams.pop(caller, None))


def event(what: str, instance: Instance | None, logs: str = "") -> bytes:
    """An event as streams get it."""
    at = datetime.datetime.now(datetime.timezone.utc).isoformat().replace("+00:00", "Z")
    return b"event: instance\ndata: %b\n\n" % encode({
        "type": what, "time": at, "instance": None if instance is None else instance.show(), "logs": logs})


def show_info(ask: Ask) -> None:
    """GET /info"""
    ask.answer(found(ask.master.info()))


def rename(ask: Ask) -> None:
    """POST /info"""
    fields = ask.body()
    alias = fields.get("alias") if isinstance(fields, dict) else 0
    if not isinstance(alias, str | None):
        raise Failure(400, "Invalid request body")
    ask.master.rename(alias or "")
    ask.answer(found(ask.master.info()))


def ping(ask: Ask) -> None:
    """GET /tcping?target=HOST:PORT"""
    target = dict(reversed(urllib.parse.parse_qsl(ask.head.query))).get("target", "")
    if not target:
        raise Failure(400, "Target address required")
    ask.master.tcping(target, lambda row: ask.answer(found(row)))


def show_description(ask: Ask) -> None:
    """GET /openapi.json"""
    ask.answer(found(describe(ask.master.base, ENDPOINTS)))


def show_docs(ask: Ask) -> None:
    """GET /docs"""
    ask.answer(page_answer(docs(describe(ask.master.base, ENDPOINTS)), DOCS_POLICY))


def show_page(ask: Ask) -> None:
    """GET PREFIX/"""
    ask.answer(page_answer(PAGE, PAGE_POLICY))


def page_answer(page: bytes, policy: str) -> Answer:
    """A page, for which browsers obey this policy."""
    return Answer(200, page, "text/html; charset=utf-8", (("Content-Security-Policy", policy),))


def ask_mcp(ask: Ask) -> None:
    """POST PREFIX/v2"""
    answer_mcp(bytes(ask.caller.body), ask.master, lambda response: ask.answer(
        Answer(202, b"", headers=CORS) if response is None else found(response)))


ONE = f"{V1}/instances/{{id}}"
ENDPOINTS = (
    Endpoint("GET", f"{V1}/instances", show_all, "All instances, and the entry with the API key", (200,), "",
             "Instance", is_list=True),
    Endpoint("POST", f"{V1}/instances", create, "A new instance, which is started", (201, 400, 409),
             "CreateInstanceRequest", "Instance"),
    Endpoint("GET", ONE, show_one, "One instance", (200, 400, 404), "", "Instance"),
    Endpoint("PATCH", ONE, patch, "Change what is noted of it, or give it an order", (200, 400, 404),
             "UpdateInstanceRequest", "Instance"),
    Endpoint("PUT", ONE, put, "Another URL, with which it is started", (200, 400, 403, 404, 409),
             "PutInstanceRequest", "Instance"),
    Endpoint("DELETE", ONE, delete, "Stop and remove it", (204, 400, 403, 404)),
    Endpoint("GET", f"{V1}/events", stream, "What happens to all instances, as server-sent events", (200, 503)),
    Endpoint("GET", f"{V1}/info", show_info, "The master, and its host", (200,), "", "MasterInfo"),
    Endpoint("POST", f"{V1}/info", rename, "Another alias for the master", (200, 400), "UpdateMasterAliasRequest",
             "MasterInfo"),
    Endpoint("GET", f"{V1}/tcping", ping, "Try a TCP connection to a target", (200, 400), "", "TCPingResult",
             query="target"),
    Endpoint("GET", f"{V1}/openapi.json", show_description, "This description", (200,), is_public=True),
    Endpoint("GET", f"{V1}/docs", show_docs, "This description, as a page", (200,), is_public=True),
    Endpoint("POST", "/v2", ask_mcp, "MCP", (200, 202)),
    Endpoint("GET", "/", show_page, "A page that shows the instances", (200,), is_public=True),
)
PATHS: dict[str, dict[str, Endpoint]] = collections.defaultdict(dict)
for _row in ENDPOINTS:
    PATHS[_row.path][_row.method] = _row

# -- this host ---------------------------------------------------------------------------------

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm"}  # as Go names them
VIRTUAL = ("lo", "veth", "docker", "podman", "br-", "virbr")  # networks within the host: not counted
PARTS_OF_DISKS = re.compile(r"loop|ram|^dm-|^md|\d$")  # and what is counted with the disk that it is on


def fields_of(path: str) -> Iterator[list[str]]:
    """The words of each line of a file below /proc; none where there is no such file."""
    with contextlib.suppress(OSError), open(path) as file:
        yield from map(str.split, file)


class Host:
    """What /proc says of this host, as the original shows it.  `root` is another folder for it."""

    def __init__(self, root: str = "/proc"):
        self.root = root
        self.at, self.before = monotonic(), self.spent()
        self.share = self._share(*self.before)  # since the host has started

    def spent(self) -> tuple[int, int]:
        """The time that all processors have been idle, and all of it.  Source: proc(5), /proc/stat."""
        for words in fields_of(f"{self.root}/stat"):
            if words[:1] == ["cpu"]:
                return int(words[4]), sum(map(int, words[1:]))
        return 0, 0

    @staticmethod
    def _share(idle: int, total: int) -> int:
        """The share of a span in which they were not idle, in percent; -1: not known."""
        return min(100, max(0, (total - idle) * 100 // total)) if total > 0 else -1

    def cpu(self) -> int:
        """The use of the processors since it was asked last, in percent; -1 where that is not known."""
        if monotonic() - self.at >= CPU_SPAN:
            now = self.spent()
            self.share = self._share(now[0] - self.before[0], now[1] - self.before[1])
            self.at, self.before = monotonic(), now
        return self.share

    def read(self) -> dict[str, int]:
        """All figures: bytes, seconds, percent."""
        memory = {words[0]: int(words[1]) * 1024 for words in fields_of(f"{self.root}/meminfo")
                  if len(words) > 1 and words[1].isdecimal()}
        total, swap = memory.get("MemTotal:", 0), memory.get("SwapTotal:", 0)
        networks = [(words[0].rstrip(":"), words) for words in fields_of(f"{self.root}/net/dev") if len(words) > 9]
        real = [words for name, words in networks if words[1].isdecimal() and not name.startswith(VIRTUAL)]
        disks = [words for words in fields_of(f"{self.root}/diskstats")
                 if len(words) > 13 and not PARTS_OF_DISKS.search(words[2])]
        return {"cpu": self.cpu(), "mem_total": total, "mem_used": total - memory.get("MemAvailable:", 0),
                "swap_total": swap, "swap_used": swap - memory.get("SwapFree:", 0),
                "netrx": sum(int(words[1]) for words in real), "nettx": sum(int(words[9]) for words in real),
                "diskr": sum(int(words[5]) * 512 for words in disks),
                "diskw": sum(int(words[9]) * 512 for words in disks),
                "sysup": next((int(float(words[0])) for words in fields_of(f"{self.root}/uptime")), 0)}


# -- targets that are tried --------------------------------------------------------------------

Row = dict[str, Any]


def pinged(target: str, latency: int | None = None, error: str | None = None) -> Row:
    """What came of it; `latency` in milliseconds."""
    return {"target": target, "connected": latency is not None, "latency": latency or 0, "error": error}


def try_target(target: str) -> Row:
    """Connect to HOST:PORT, and close.  Waits PING_TIME at most, and for the resolver."""
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 65536:
        return pinged(target, error=f"address {target}: it is not HOST:PORT")
    began, error = monotonic(), "no address"
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host.strip("[]"), int(port),
                                                                     type=socket.SOCK_STREAM):
            left = began + PING_TIME - monotonic()
            if left <= 0:
                return pinged(target, error=f"dial tcp {target}: i/o timeout")
            try:
                with socket.socket(family, kind, protocol) as sock:
                    sock.settimeout(left)
                    sock.connect(address)
                return pinged(target, int((monotonic() - began) * 1000))
            except TimeoutError:
                error = "i/o timeout"
            except OSError as fault:
                error = (fault.strerror or str(fault)).lower()
    except (OSError, UnicodeError) as fault:
        error = f"lookup {host}: {getattr(fault, 'strerror', None) or fault}"
    return pinged(target, error=f"dial tcp {target}: {error}")


class Ping:
    """One target, and who wants to know."""

    __slots__ = ("target", "done")

    def __init__(self, target: str, done: Callable[[Row], None]):
        self.target = target
        self.done: Callable[[Row], None] | None = done

    def tell(self, row: Row) -> None:
        """Tell, once."""
        done, self.done = self.done, None
        if done is not None:
            done(row)


class Pings:
    """Targets that are tried, PINGS_MAX at once.  The master's loop, but for `try_target`, in threads `ping-<n>`."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.alarms = Alarms(loop)
        self.free = list(range(PINGS_MAX, 0, -1))
        self.late = loop.queue(PING_WAIT, self._give_up)
        self.waiting: collections.deque[Ping] = collections.deque()

    def ask(self, target: str, done: Callable[[Row], None]) -> None:
        """Try a target; `done` is called once."""
        self.waiting.append(asked := Ping(target, done))
        self.late.put(asked)
        self._begin()

    def _give_up(self, asked: Ping) -> None:
        """All places are taken, and have been for a while."""
        self.waiting.remove(asked)
        asked.tell(pinged(asked.target, error="too many requests"))

    def _begin(self) -> None:
        while self.free and self.waiting:
            asked, number = self.waiting.popleft(), self.free.pop()
            self.late.drop(asked)
            self.alarms.at(monotonic() + PING_TIME + PING_WAIT, lambda asked=asked: asked.tell(  # the resolver is slow
                pinged(asked.target, error=f"dial tcp {asked.target}: i/o timeout")))
            try:
                begin_errand(functools.partial(try_target, asked.target), functools.partial(self._end, asked, number),
                             self.loop.call, f"ping-{number}")
            except (RuntimeError, MemoryError) as error:
                self.free.append(number)
                asked.tell(pinged(asked.target, error=str(error)))

    def _end(self, asked: Ping, number: int, row: Row | Exception) -> None:
        self.free.append(number)
        if isinstance(row, Exception):
            self.loop.failed(row)
            row = pinged(asked.target, error=SHORT_OF_MEMORY if ran_out(row) else "a fault in sniroute: its log says which")
        asked.tell(row)
        self._begin()


# -- TLS ---------------------------------------------------------------------------------------


class TlsSocket:
    """A connection inside TLS, with what a Caller asks of a socket.  The handshake is done by the first reads."""

    def __init__(self, sock: ssl.SSLSocket):
        self.sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def recv(self, size: int) -> bytes:
        """As of a socket: raises BlockingIOError where nothing is there, OSError where it is no TLS.

        A record is no larger than `size`, so nothing stays behind that poll does not tell of.
        """
        try:
            return self.sock.recv(size)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def send(self, data: bytes) -> int:
        """As of a socket."""
        return self.sendmsg([memoryview(data)])

    def sendmsg(self, parts: Sequence[memoryview]) -> int:
        """As of a socket; it takes some of the first part."""
        try:
            return self.sock.send(parts[0])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None


class TlsListener:
    """A listener whose connections speak TLS 1.3, with what a Gate asks of one."""

    def __init__(self, listener: socket.socket, certificates: Certificates):
        self.listener = listener
        self.certificates = certificates

    def __getattr__(self, name: str) -> Any:
        return getattr(self.listener, name)

    def accept(self) -> tuple[TlsSocket, Any]:
        """As of a listener."""
        sock, address = self.listener.accept()
        try:
            sock.setblocking(False)
            wrapped = self.certificates.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except OSError:
            sock.close()
            raise BlockingIOError from None  # it has left already: the next one is asked for in the next turn
        return TlsSocket(wrapped), address


# -- the master --------------------------------------------------------------------------------


def beside(ours: str) -> str:
    """Where the state is by default: in the folder of our files, or of the .pyz file that holds them."""
    return os.path.join(os.path.dirname(ours) if os.path.isfile(ours) else ours, STATE_FILE)


class Master:
    """A master.  `open`, `close` and `run` are for the main thread; all else runs in the Door's loop.

    Args:
        environ: of its instances.
        log: on stdout.
        state: the file of its instances; "": STATE_FILE beside ours.
        words: the command line of an instance, where it is another program than ours.
    """

    version = __version__

    def __init__(self, options: Options, times: Times, environ: Mapping[str, str], log: Log, state: str = "",
                 words: Sequence[str] = ()):
        self.options = options
        self.log = log
        self.times = times
        self.base = f"/{options.prefix.strip('/')}" if options.prefix.strip("/") else PREFIX
        self.door = Door(self.tick, TICK, "master")
        self.state_path = state or beside(place())
        given = Inherited(options.log, str(options.tls), options.crt, options.key_file)
        kept = State(self.state_path, lambda why: self.door.loop.call(lambda: log("error", why)))
        self.instances = Instances(self.door.loop, kept, words or [sys.executable, *our_words(PROGRAM)], environ, times,
                                   given, self.tell, log)
        self.pings = Pings(self.door.loop)
        self.host = Host()
        self.began = self.quiet_since = monotonic()
        self.streams: dict[Caller, None] = {}
        self.news: list[bytes] = []  # events of this turn
        self.turn = self.door.loop.batch(lambda _: self._spread())
        self.listener: Any = None
        self.stopped = threading.Event()

    # -- the main thread -----------------------------------------------------------------------

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; the exit code.  Raises SettingsError."""
        self.open()
        before = {number: signal.signal(number, lambda *_: self.stopped.set())
                  for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.stopped.wait()
        finally:
            self.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return 0

    def open(self) -> None:
        """Listen, and start what is to run.  Raises SettingsError, and leaves nothing behind then."""
        raise_descriptor_limit()  # each instance takes two
        try:
            self._listen()
            was_there = self.instances.load()
        except BaseException:
            if self.listener is not None:
                self.listener.close()
            self.door.close()
            raise
        self.door.gates.append(Gate(self.door, "master", self.listener, self.decide, 0, True, CALLERS_MAX, STREAM_MAX))
        self.log("info", f"Master started: {show_address(self.listener.getsockname()[:2])}{self.base}{V1}")
        if was_there:
            self.log("info", f"API Key loaded: it is in {self.state_path}")
        else:  # the one secret that is ever printed, once: nobody could ask without it
            stamp = datetime.datetime.now().isoformat(" ", "milliseconds")
            self.log.write(f"{stamp}  INFO  API Key created: {self.instances.key.url}")
        self.door.open()

    def _listen(self) -> None:
        """Listen.  Raises SettingsError."""
        options = self.options
        try:
            self.listener, _ = listen((options.host or "*", options.port))
        except OSError as error:
            raise SettingsError(f"master://: {error}") from None
        if options.tls:
            files = (options.crt, options.key_file) if options.tls == 2 else None
            try:
                certificates = Certificates(files, options.host or "localhost", functools.partial(self.log, "info"))
            except SettingsError as error:
                self.listener.close()
                raise SettingsError(f"tls={options.tls}: {error}") from None
            self.listener = TlsListener(self.listener, certificates)

    def close(self) -> None:
        """Tell all streams, end all instances, keep what is known of them."""
        gone = threading.Event()
        self.door.loop.call(lambda: (self.end_streams(), self.instances.stop_all(gone.set)))
        gone.wait(self.times.shutdown + STOP_SPARE)
        self.door.close()
        self.instances.close()
        self.log("info", "Master shutdown complete")

    # -- who asks --------------------------------------------------------------------------------

    def decide(self, head: Head) -> Plan:
        """What is done for a request: see Gate.  Raises Declined."""
        try:
            path = urllib.parse.unquote(head.path, errors="strict")
        except ValueError:
            raise NOT_FOUND from None
        ident = ""
        if path.startswith(f"{self.base}{V1}/instances/"):
            ident = path.removeprefix(f"{self.base}{V1}/instances/")
            path = f"{self.base}{ONE}"
        rows = PATHS.get(path.removeprefix(self.base)) if path.startswith(self.base) else None
        if rows is None:
            raise NOT_FOUND
        if head.method == "OPTIONS":
            return Plan(lambda caller: caller.answer(Answer(200, b"", headers=CORS)), head.body_length(), OWNER)
        is_public = any(row.is_public for row in rows.values())
        if not is_public:
            self._check_key(head)
        row = rows.get(head.method.replace("HEAD", "GET") if is_public else head.method)
        if row is None:
            raise Failure(405, "Method not allowed")
        return Plan(lambda caller: self._act(row, Ask(self, head, ident, caller)), head.body_length(), OWNER)

    def _check_key(self, head: Head) -> None:
        """Raises Failure for who has not the key."""
        key = head.field("x-api-key")
        if not key:
            raise Failure(401, "Unauthorized: API key required")
        if not hmac.compare_digest(key.encode("latin-1"), self.instances.key.url.encode()):
            raise Failure(401, "Unauthorized: Invalid API key")

    def _act(self, row: Endpoint, ask: Ask) -> None:
        """Do what is asked; where it cannot be done, say so."""
        try:
            row.act(ask)
        except NotDone as error:
            ask.answer(found({"error": str(error)}, error.status))

    # -- what the master does itself -----------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """The master, and its host."""
        options, key = self.options, self.instances.key
        uname = os.uname()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return dict(sorted({
            **self.host.read(), "mid": key.config, "alias": key.alias, "os": sys.platform,
            "arch": ARCHITECTURES.get(uname.machine, uname.machine), "noc": cores, "ver": self.version,
            "name": options.host, "uptime": int(monotonic() - self.began), "log": options.log,
            "tls": str(options.tls), "crt": options.crt, "key": options.key_file}.items()))

    def rename(self, alias: str) -> None:
        """Another alias.  Raises NotDone."""
        self.instances.key.alias = check_value("Master alias", alias)
        self.instances.keep(self.instances.key)

    def tcping(self, target: str, done: Callable[[Row], None]) -> None:
        """Try a target; `done` is called once."""
        self.pings.ask(target, done)

    # -- events ----------------------------------------------------------------------------------

    def tell(self, what: str, instance: Instance, logs: str) -> None:
        """Something has happened.  Streams get all of a turn at once."""
        if self.streams:
            if not self.news:
                self.turn.append(None)
            self.news.append(event(what, instance, logs))

    def _spread(self) -> None:
        """Send what has happened in this turn."""
        data, self.news = b"".join(self.news), []
        for caller in list(self.streams) if data else ():
            caller.push(data)

    def end_streams(self) -> None:
        """Tell all streams that they end, and end them: the key is another one, or the master ends."""
        self._spread()
        for caller in list(self.streams):
            caller.push(event("shutdown", None))
            caller.close()

    def tick(self) -> None:
        """Once a second."""
        self.instances.tick()
        self.log.flush()  # what its reader had no room for
        now = monotonic()
        if now - self.quiet_since >= QUIET:
            self.quiet_since = now
            for caller in list(self.streams):
                caller.push(b":\n\n")
