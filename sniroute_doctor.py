"""sniroute_doctor: what a person asks about a router: check, explain, selftest; and bundle, which packs it.

    check           settings, read without a fault ------> warnings, the routes as they are matched
    explain NAME    routes, tunnel program, a running router's admin address, the far end ----> facts, one verdict
    selftest        a real Router on loopback, an echo behind it, SELF_TESTS in front ---------> ok or FAIL, a line each
    bundle          the rooms' sources and bytecode -----> sniroute.pyz

An option: without this file a router serves all the same.

Threads.  check, explain and bundle have one.  selftest runs the router's loop, the reaper of its tunnels and an echo
server in threads of their own, and ends them all.

Seams: I want to ...
    test another hard case          a row in SELF_TESTS
    advise about a tunnel's state   a row in TUNNEL_ADVICE; about a refusal: the row in REFUSALS
    pack another file               CORE or OPTIONS of sniroute_names
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import logging
import os
import random
import re
import shlex
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Sequence

from sniroute_flow import READ_MAX
from sniroute_host import too_little, under_journald
from sniroute_launchers import WORDS_MAX, Launcher, Reason, TunnelError, TunnelKey, last_words
from sniroute_listeners import NO_NAME
from sniroute_log import LEVELS
from sniroute_names import CORE, OPTIONS, ascii_advice, describe_version, normalise, printable, show_address
from sniroute_patterns import parse_pattern
from sniroute_refusals import (DECODE_ERROR, POSTGRES, REFUSALS, UNRECOGNIZED_NAME, Refused, tls_alert, told,
                               tunnel_refused)
from sniroute_options import HTTP_MODES, ROUTE_OPTIONS
from sniroute_router import Router
from sniroute_routes import PORT, Decision, Route, port_address
from sniroute_settings import Settings, load_settings, warn
from sniroute_tunnels import TunnelTable
from sniroute_wire import GSSENC_REQUEST, HELLO_MAX, RECORD_MAX, SSL_REQUEST_BYTES, STARTUP, proxy_v1, proxy_v2

if TYPE_CHECKING:
    from sniroute_owners import Where

__version__ = "0.1.0"

log = logging.getLogger("sniroute")
monotonic = time.monotonic
TRIAL_TIMEOUT = 30.0  # `explain` waits so long for a carrier, which gives up at 15 by itself
SELF_TEST_TIME = 9.0  # for all of `selftest`: no case waits longer than what is left of it
ADMIN_TIMEOUT = 5.0  # for what `explain` asks of a running router, connect and all
ADMIN_MAX = 1 << 21  # bytes of its answer: a thousand tunnels, routes and backends take half of that
URL = re.compile(r"https?://(?P<name>[^/?#:@]*)(?::[0-9]*)?(?:[/?#]|$)", re.IGNORECASE)  # RFC 3986, of a name alone
NUMBER_MAX = 1e12  # seconds, connections, a process: more is none of these
WORD_MAX = 40  # of a phase or a state
BACKENDS_SHOWN = 100  # of one route: more is for /status
FAR_END_SHOWN = 20  # lines that a program says of its far end: the pods of a service, for example


def show_option(value: Any) -> str:
    """An option of a route, for people."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g} s" if isinstance(value, float) and value else str(value or "off")


def show_route(route: Route, http: str = "refuse") -> str:
    """A route and its options, for people; `http` is what the settings say where the route does not."""
    if http != "refuse" and not route.is_port:
        route = route._replace(http=route.http or http)
    options = [f"{name} {show_option(value)}" for name in ROUTE_OPTIONS
               if (value := getattr(route, name)) != Route._field_defaults[name]]
    options += [f"balance {route.balance}"] * (route.balance != "least")  # of a cluster's pods
    options += route.several.shown() if route.several is not None else []
    return f"{route} ({'; '.join(options)})" if options else str(route)


class CheckLine(logging.Formatter):
    """A warning of `check`, for a person, or with its priority for journald (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        _, priority = LEVELS[record.levelno]
        return f"<{priority}>" * under_journald(sys.stderr) + f"sniroute: {record.getMessage()}"


def check(settings: Settings) -> int:
    """`sniroute check`: print warnings, and the routes as they are matched.  `load_settings` has found the faults."""
    handler = logging.StreamHandler()
    handler.setFormatter(CheckLine())
    log.addHandler(handler)
    warn(settings)
    log.removeHandler(handler)
    for route in () if settings.quiet else settings.routes.in_order():
        print(show_route(route, settings.http))
        if "{" in route.pattern:
            print("   ", parse_pattern(route.pattern).describe())
    for route in () if settings.quiet else settings.port:
        print(show_route(route))
    if settings.claims is not None and not settings.quiet:
        print(show_registry(settings.claims))
    return 0


def show_registry(where: Where) -> str:
    """A registry, for people: where names may be claimed, and where they may lead.  It shows no secret."""
    rules, count = where.rules, len(where.owners)
    address = f"unix:{where.address}" if isinstance(where.address, str) else show_address(where.address)
    facts = [f"names below {', '.join(rules.domains)}", f"{count} owner{'s' * (count > 1)}",
             f"targets {', '.join(rules.targets)}"]
    facts += [f"networks {', '.join(map(str, rules.networks))}"] * bool(rules.networks)
    facts += ["ports %d-%d" % rules.ports] if rules.ports is not None else []
    facts += [f"store {shown_store(where.store)}"]
    return f"registry {address} ({'; '.join(facts)})"


def shown_store(store: str) -> str:
    """A store as the settings have it, without its password."""
    if "://" not in store:
        return store
    from sniroute_resp import parse_url  # imported late: an option
    return str(parse_url(store))


def explain(settings: Settings) -> int:
    """`sniroute explain NAME`: 0 where a route fits the name, 1 where it would be refused.

    NAME may be a port with one target: `tcp:5433`, or its address, `127.0.0.1:5433`; or a URL, for its name.

    The facts first, then one verdict: what the name would be refused for, or what is to be done, if anything.
    Where the carrier would serve it, the far end is tried, once.  Where a router runs with an admin address, it is
    asked how that tunnel stands there.  Only a router that runs can tell `forbidden`, `not_allowed`, and a name that
    is its own.
    """
    advice = ""
    url = URL.match(settings.name)
    asked = url["name"] if url else settings.name
    try:
        if ":" in asked:
            decision = decide_port(settings)
            print(f"route:   {show_route(decision.route)}")
        else:
            try:
                name = normalise(os.fsencode(asked))
                print(f"name:    {name}")
            except Refused as error:
                print(f"name:    {printable(asked)}")
                raise Refused(error.kind, f"{error}{ascii_advice(asked)}") from None
            found = settings.routes.find(name)
            if found is not None:
                explain_route(found[0], name)
                mode = found[0].http or settings.http
                if url or mode != "refuse":
                    print(f"http:    {mode}: {HTTP_MODES[mode]}")
            if found is None and settings.claims is not None and explain_claim(settings, name):
                return 0
            decision = settings.routes.decide(name)
        print(f"target:  {decision.target}")
        if decision.tunnel is not None:
            advice = explain_tunnel(settings, decision.tunnel)
        elif decision.members:
            explain_backends(settings, decision)
        else:
            if obstacle := decision.scheme.obstacle(decision.rest):
                raise Refused("command_failed", obstacle)
            if settings.admin is not None:
                ask_router(settings.admin)
    except TunnelError as error:
        return show_refusal(tunnel_refused(error.kind, str(error)))
    except Refused as error:
        return show_refusal(error)
    if advice:
        print("to do:  ", advice)
    return 0


def explain_claim(settings: Settings, name: str) -> bool:
    """Print what the registry of a router that runs knows of a name; whether it leads somewhere."""
    if settings.admin is None:
        print("claimed: only a router that runs knows; give it an --admin address, which is asked")
        return False
    try:
        found = ask_admin(settings.admin, f"/claims/{name}")
        owner, target, left = fields(found, "a claim", owner=str, target=str, left=float)
        suspended = found.get("suspended") is True
    except (OSError, ValueError):
        print("claimed: by nobody, as far as the router's admin address says")
        return False
    print(f"claimed: by {printable(owner)}" + (f", for another {left:.0f} s unless it is renewed" if left else
                                              ", until a short while ago: it is held for that owner")
          + ", suspended by an admin" * suspended)
    if left:
        print(f"target:  {printable(target)}")
        if target.startswith("nodepass:") and (standing := ask_router(settings.admin)) is not None:
            show_standing(standing.tunnels.get(target))
    return bool(left) and not suspended


def explain_route(route: Route, name: str) -> None:
    """Print the route that a name takes, and what the fields of its pattern are in that name."""
    print(f"route:   {show_route(route)}")
    if names := parse_pattern(route.pattern).fields:
        fields = next(route.splits(name))
        print("fields: ", ", ".join(f"{field} {fields[field]}" for field in names))


def decide_port(settings: Settings) -> Decision:
    """Where the port leads that `explain` was asked about.  Raises Refused where there is none."""
    asked = settings.name
    host, _, number = asked.rpartition(":")
    ports = [route for route in settings.port if str(port_address(route)[1]) == number] if host == "tcp" else [
        route for route in settings.port if route.pattern == f"{PORT}{asked.removeprefix('*')}"]
    print(f"port:    {printable(asked)}")
    if not ports:
        there = ", ".join(route.pattern.removeprefix(PORT) for route in settings.port) or "none"
        raise Refused("no_route", f"no port with one target is {printable(asked)}; there are: {printable(there)}")
    for route in ports[1:]:
        print(f"also:    {show_route(route)}")
    return ports[0].decide(NO_NAME, settings.routes.identified)


def show_refusal(error: Refused) -> int:
    """Print what a name is refused for, and what can be done about it.  Returns the exit code."""
    print(f"refused: {error} ({error.kind}, TLS alert {error.alert})")
    print("to do:  ", REFUSALS[error.kind].advice)
    return 1


# What to do about a tunnel in a running router, by its state.
TUNNEL_ADVICE = {
    "absent": "nothing: the next client starts it",
    "queued": "nothing, it waits for its turn; if it stays so: --max-starting, --max-tunnels, --ports",
    "starting": "nothing yet: it may take --start-timeout",
    "ready": "nothing; if clients fail all the same: see the log's lines for this name",
    "stopping": "nothing: the next client starts it again",
    "backoff": "see why it ended; it is started again by itself",
    "failed": "mend what it says; then POST /tunnels/NAME/stop forgets it, or wait",
}
LOCAL_ONLY = {"ready": "ready (its local port is open)"}  # `ready` tells nothing of the far end


def explain_tunnel(settings: Settings, key: TunnelKey) -> str:
    """Print what a tunnel runs, and how it stands in a router that runs; try its far end.  Returns what to do.

    Raises TunnelError where it cannot be had.
    """
    launcher = settings.launchers[key.launcher].row(key)
    print("runs:   ", shlex.join([launcher.find(), *launcher.argv(key.hostname, settings.ports[0])]))
    if not key.identified:
        print("token:   not shown there: the client may own that domain")
    standing = ask_router(settings.admin) if settings.admin is not None else None
    advice = show_standing(standing.tunnels.get(str(key))) if standing is not None else ""
    try_far_end(launcher, key)
    return advice


# Which backend a client would be led to, of (target, connections) of those that will do, by `balance`.
TAKEN: dict[str, Callable[[list[tuple[str, int]]], str]] = {
    "round-robin": lambda rows: "each in turn", "hash": lambda rows: "the one for the client's address",
    "random": lambda rows: "of two at random the one with fewer connections",
    "latency": lambda rows: "of two at random the one that connects faster",
    "first": lambda rows: f"{rows[0][0]}, the first of them",
    "least": lambda rows: f"{min(rows, key=lambda row: row[1])[0]}, which has the fewest connections",
}


def explain_backends(settings: Settings, decision: Decision) -> None:
    """Print which of several backends would be taken, and why not the others: a router that runs knows that.

    Raises Refused where a client would be.
    """
    standing = ask_router(settings.admin) if settings.admin is not None else None
    members = {member.target: member for member in decision.members}
    known = standing.backends if standing is not None else {}
    rows = [(target, known.get((printable(decision.route.pattern), printable(target)))) for target in members]
    for target, row in rows[:BACKENDS_SHOWN]:
        print(f"backend: {target}{show_place(settings, members[target])}{show_backend(row) if row is not None else ''}")
    if len(rows) > BACKENDS_SHOWN:
        print(f"backend: and {len(rows) - BACKENDS_SHOWN} more")
    several = decision.route.several
    if all(row is not None for _, row in rows):
        print("taken:  ", who_is_taken(several.balance, several.queue, rows, decision.target))
        return
    why = "only a router that runs knows which are good (--admin)" if standing is None else \
        "that router does not say which are good" + ", since the targets depend on the name" * decision.route.has_fields
    print(f"taken:   not known here: {why}; while all are: {TAKEN[several.balance]([(each, 0) for each, _ in rows])}")


def show_place(settings: Settings, member: Decision) -> str:
    """What can be told of a backend without a router that runs, for people."""
    if obstacle := member.scheme.obstacle(member.rest):
        return f", cannot be run: {printable(obstacle)}"
    if settings.own_zones is not None and member.target.startswith("tcp:"):
        with contextlib.suppress(ValueError):  # a name: its addresses say it
            zone = settings.own_zones.find(member.rest.rpartition(":")[0].strip("[]"))
            return ", in no zone" if zone is None else f", in zone {zone}"
    return ""


def show_backend(row: dict[str, Any]) -> str:
    """How a backend stands, by its row in the status of a router, for people."""
    state, limit = row["state"], row["limit"]
    connections = f"{row['active']} connections"
    down = ""
    if row["why"]:
        later = f"tried again in {row['next']:.0f} s" if row["next"] > 0 else "its checks bring it back" \
            if row["checks"] else "the next client tries it"
        down = f"down for {row['since']:.0f} s: {printable(row['why'])}; {later}"
    if state == "down":
        return f", {down}"
    if state == "drained":
        return f", drained by an operator, {connections}" + f", and {down}" * bool(down)
    words = {"good": "good", "spare": "good, but in another zone", "unknown": "not known yet: no check has passed"}
    full = ", full: max_backend_connections" * (limit is not None and row["active"] >= limit)
    return f", {words.get(state, printable(state, WORD_MAX))}, {connections}{full}"


def who_is_taken(balance: str, queue: float, rows: list[tuple[str, dict[str, Any]]], target: str) -> str:
    """Which backend a client would be led to, for people.  Raises Refused where there is none."""
    is_full = False
    for state in ("good", "spare", "unknown"):  # the best first, as in sniroute_groups
        alike = [(each, row) for each, row in rows if row["state"] == state]
        free = [(each, row["active"]) for each, row in alike if row["limit"] is None or row["active"] < row["limit"]]
        if free and is_full:
            return f"{min(free, key=lambda row: row[1])[0]}, since better ones are full"
        if len(free) == 1:
            return f"{free[0][0]}, since no other one is as good" if len(rows) > 1 else free[0][0]
        if free:
            return TAKEN[balance](free) if len(free) == len(rows) else f"of {len(free)}: {TAKEN[balance](free)}"
        is_full = is_full or bool(alike)
    if is_full:
        return f"none now, since all are full: a client waits up to {queue:g} s for room"
    if any(row["state"] == "down" for _, row in rows):
        return "each that is not drained is tried, since none is good"
    raise Refused("backend", f"{target}: an operator has drained all its backends")


class Standing(NamedTuple):
    """What a router that runs says."""

    tunnels: dict[str, Any]  # by key
    backends: dict[tuple[str, str], Any]  # by pattern and target


def ask_router(admin: str | tuple[str, int]) -> Standing | None:
    """Print how the router stands whose admin address this is; None where it does not say."""
    try:
        status = ask_admin(admin)
        phase, pid, counts, rows = fields(status, "the status", phase=str, pid=int, connections=dict, tunnels=list)
        active, = fields(counts, "connections", active=int)
        tunnels, backends = {}, {}
        several, = fields({"backends": [], **status}, "the status", backends=list)
        for row in several:
            pattern, target, *_ = fields(row, "a backend", route=str, backend=str, state=str, why=str, since=float,
                                         active=int, next=float)
            limit = None if row.get("limit") is None else fields(row, "a backend", limit=int)[0]
            backends[pattern, target] = {**row, "limit": limit, "checks": row.get("checks") is not None}
        for row in rows:
            key, *_ = fields(row, "a tunnel", key=str, state=str, age=float, leases=int, next=float, words=str)
            link = row.get("link")
            tunnels[key] = {**row, "link": link and fields(link, "a link", client=str, kind=str, pool=int, ping=float)}
    except (OSError, ValueError) as error:
        print(f"router:  no answer from its admin address: {printable(str(error))}")
    else:
        print(f"router:  {printable(phase, WORD_MAX)}, pid {pid}, {active} connections")
        return Standing(tunnels, backends)
    return None


def fields(row: Any, what: str, **kinds: type) -> list[Any]:
    """The values of a row that somebody else has made, each of the kind that is asked for; `float` takes both numbers.

    Raises ValueError where it is no such row, and where a number is too large for people.
    """
    if not isinstance(row, dict):
        raise ValueError(f"it is no sniroute: {what} is no object")
    values = [row.get(name) for name in kinds]
    for (name, kind), value in zip(kinds.items(), values):
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) \
                or isinstance(value, (int, float)) and not 0 <= value <= NUMBER_MAX:
            raise ValueError(f"it is no sniroute: {name} of {what} is missing, or is none")
    return values


def show_standing(row: dict[str, Any] | None) -> str:
    """Print how a tunnel stands, by its row in the status of a router.  Returns what to do about it."""
    row = row or {"state": "absent", "age": 0, "leases": 0, "next": 0, "words": "", "link": None}
    state = printable(row["state"], WORD_MAX)
    facts = [f"for {row['age']:.0f} s"] * (row["age"] > 0) + [f"{row['leases']} connections"] * (row["leases"] > 0)
    facts += [f"next in {row['next']:.0f} s"] * (row["next"] > 0)
    print("tunnel: ", ", ".join([LOCAL_ONLY.get(state, state), *facts]))
    if row["words"]:
        print("said:   ", printable(row["words"], 500))
    if row.get("stands") is True and state == "ready":
        return show_link(row["link"])
    return TUNNEL_ADVICE.get(state, "see OPERATING.md")


def show_link(link: Any) -> str:
    """Print the far end of a tunnel, where that has to dial in, by its row.  Returns what to do about it."""
    if link is None:
        print("client:  none has dialled in")
        return REFUSALS["tunnel_away"].advice.partition(";")[0]
    client, how, pool, ping = link
    print(f"client:  {printable(client, 64)}, {printable(how, WORD_MAX)}, {pool} connections in its pool, ping {ping:g} ms")
    return TUNNEL_ADVICE["ready"]


def ask_admin(admin: str | tuple[str, int], path: str = "/status") -> Any:
    """GET it: what the JSON says, whatever that is.  Raises OSError, or ValueError for an answer that is none.

    Somebody else may have that address.  So all of it has to come within ADMIN_TIMEOUT, and in ADMIN_MAX bytes.
    """
    data = bytearray()
    deadline = monotonic() + ADMIN_TIMEOUT
    family = socket.AF_UNIX if isinstance(admin, str) else socket.AF_INET6 if ":" in admin[0] else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(ADMIN_TIMEOUT)
        sock.connect(admin)
        sock.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path.encode())
        while (body := body_of(data)) is None:
            if len(data) > ADMIN_MAX:
                raise ValueError(f"its answer is over {ADMIN_MAX} bytes")
            sock.settimeout(max(0.001, deadline - monotonic()))  # even what has come already may be read
            piece = sock.recv(READ_MAX)
            if not piece:
                raise ValueError("its answer ended early" if data else "it closed without an answer")
            if monotonic() > deadline:
                raise TimeoutError(f"its answer took over {ADMIN_TIMEOUT:g} s")
            data += piece
    try:
        return json.loads(body, parse_constant=not_json)
    except RecursionError:
        raise ValueError("its answer is nested too deep") from None


def body_of(data: bytes | bytearray) -> bytes | None:
    """The body of sniroute's answer to GET; None for "need more".  Raises ValueError for one that is another's."""
    if not data[:9].startswith(b"HTTP/1.1 "[:len(data)]):
        raise ValueError(f"it does not speak HTTP: {printable(bytes(data[:40]).decode('latin-1'))!r}")
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return None
    status, *lines = head.decode("latin-1").split("\r\n")
    if not status.startswith("HTTP/1.1 200 "):
        raise ValueError(status.removeprefix("HTTP/1.1 "))
    lengths = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("content-length:")]
    if len(lengths) != 1 or not re.fullmatch("[0-9]{1,9}", lengths[0]):
        raise ValueError("it is no sniroute: its answer has no Content-Length")
    if int(lengths[0]) > ADMIN_MAX:
        raise ValueError(f"its answer is over {ADMIN_MAX} bytes")
    return bytes(body[:int(lengths[0])]) if len(body) >= int(lengths[0]) else None


def not_json(word: str) -> None:
    """NaN and Infinity, which Python would take.  Raises ValueError."""
    raise ValueError(f"{word} is not JSON")


def try_far_end(launcher: Launcher, key: TunnelKey) -> None:
    """Dial once, where the program can do that and end.  Raises TunnelError with its reason."""
    if launcher.trial is None:
        return
    try:
        with open(os.devnull, "rb") as nothing:  # DEVNULL stays open where Popen finds no descriptor for a pipe
            trial = subprocess.run([launcher.find(), *launcher.trial(key.hostname)], cwd="/", stdin=nothing,
                                   env=launcher.environment_for(key.identified), capture_output=True,
                                   timeout=TRIAL_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise TunnelError("timeout", f"no answer within {TRIAL_TIMEOUT:g} s") from None
    said = trial.stdout.decode("utf-8", "replace").splitlines()
    for line in said[:FAR_END_SHOWN] or ["it answers"] * (not trial.returncode):
        print("far end:", printable(line, WORDS_MAX))
    if trial.returncode:
        reason = launcher.reason(trial.stderr)
        raise TunnelError(reason.kind, reason.text)


# -- selftest ----------------------------------------------------------------------------------


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
                            {}, lambda tail: Reason(text=last_words(tail).lower()), "no Python")  # as TAKEN is
        first = random.randrange(20200, 32600, 100)  # not settings.ports: a router of this host may have tunnels there
        self.tunnels = TunnelTable({"cloudflared": launcher}, (first, first + 99))
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
            raise AssertionError(f"{len(data)} bytes, {data[:20].hex(' ')}..., instead of {len(expected)}")

    def talk(self, *steps: bytes | tuple[bytes, bytes], end: bool = False, piece: int = 0) -> None:
        """Send each step and expect it back; of a step (sent, expected), expect the second.

        `piece`: bytes to send at a time, 0 for all.  `end`: then expect the end of the connection.
        """
        with self.connect() as client:
            for step in steps:
                said, heard = step if isinstance(step, tuple) else (step, step)
                for at in range(0, len(said), piece or len(said)):
                    client.sendall(said[at:at + (piece or len(said))])
                self.expect(client, heard)
            if end and client.recv(1):
                raise AssertionError("more than that")

    # -- the cases for which `talk` is not enough

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
            os.kill(next(v.pid for v in self.tunnels.snapshot() if "killed" in v.key.hostname), signal.SIGKILL)
            with contextlib.suppress(ConnectionResetError):
                if client.recv(1):
                    raise AssertionError("no end")
        self.talk(said)


HELLO_SAMPLE = sample_hello("echo.example.com")
NEGOTIATED = (SSL_REQUEST_BYTES, b"S")
NO_NAME_ALERT, BROKEN_ALERT = tls_alert(UNRECOGNIZED_NAME, 1), tls_alert(DECODE_ERROR, 1)
PLAIN_TOLD = told(Refused("plain_postgres", ""), POSTGRES)
PROXY_SAMPLES = (proxy_v1(("192.0.2.1", 1111), ("192.0.2.9", 443)), proxy_v2(("192.0.2.1", 1111), ("192.0.2.9", 443)))

# What `selftest` tries: (for people, what to do).
SELF_TESTS: tuple[tuple[str, Callable[[SelfTest], None]], ...] = (
    ("a hello", lambda t: t.talk(HELLO_SAMPLE, b"and more")),
    ("a hello in one-byte segments", lambda t: t.talk(HELLO_SAMPLE, piece=1)),
    ("a hello over many records", lambda t: t.talk(sample_hello("echo.example.com", 600, 16))),
    ("a hello of post-quantum size, in two segments",
     lambda t: t.talk(sample_hello("echo.example.com", 1800), piece=1460)),
    ("a hello of 64 KiB", lambda t: t.talk(sample_hello("echo.example.com", HELLO_MAX - 100))),
    ("a PROXY header, version 1", lambda t: t.talk(PROXY_SAMPLES[0] + HELLO_SAMPLE)),
    ("a PROXY header, version 2", lambda t: t.talk(PROXY_SAMPLES[1] + HELLO_SAMPLE)),
    ("a PROXY header from itself twice is refused", lambda t: t.talk((PROXY_SAMPLES[0] * 2, b""), end=True)),
    ("PostgreSQL: SSLRequest", lambda t: t.talk(NEGOTIATED, HELLO_SAMPLE, b"query")),
    ("PostgreSQL: GSSENCRequest, then SSLRequest",
     lambda t: t.talk((struct.pack("!II", 8, GSSENC_REQUEST), b"N"), NEGOTIATED, HELLO_SAMPLE)),
    ("PostgreSQL: PROXY header, SSLRequest",
     lambda t: t.talk((PROXY_SAMPLES[1] + SSL_REQUEST_BYTES, b"S"), HELLO_SAMPLE)),
    ("PostgreSQL without TLS is told why",
     lambda t: t.talk((struct.pack("!II", 20, STARTUP << 16) + b"user\0selft\0\0", PLAIN_TOLD), end=True)),
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


def selftest(settings: Settings) -> int:
    """`sniroute selftest`: the real router against its hard cases, on loopback.  0 where all went well, else 1."""
    log.addHandler(logging.NullHandler())
    log.propagate = False
    for line in too_little(True, False, 1):  # some cases fail for that, and cannot say so
        print(f"sniroute: {line}", file=sys.stderr)
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


# -- bundle ------------------------------------------------------------------------------------

BUNDLE_MAIN = "import sys\n\nimport sniroute\n\nsys.exit(sniroute.main())\n"
BUNDLE_START = b"#!/usr/bin/env python3\n"  # zipapp's: the system runs the file, Python finds the zip behind it
BUNDLE_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can say: no clock in the file

# Compiles sources: JSON {file: text} on stdin, {file: bytecode in hex} on stdout.  In a fresh interpreter, because
# the bytes that `marshal` writes depend on which strings the interpreter already shares.
BUNDLE_COMPILER = """
import importlib._bootstrap_external as form, importlib.util, json, marshal, sys
def pyc(name, text):  # PEP 552, "unchecked": valid whatever its date
    code = compile(text, name, "exec", dont_inherit=True)
    return form._code_to_hash_pyc(code, importlib.util.source_hash(text.encode()), False)
print(json.dumps({name: bytes(pyc(name, text)).hex() for name, text in json.load(sys.stdin).items()}))
"""


def bundle(words: Sequence[str]) -> int:
    """`sniroute bundle`: write the rooms that are here into one file, `python3 sniroute.pyz`.

    A zip file with each room's source, for any Python from 3.11, and its bytecode, for the one that wrote it.  The
    same sources and the same Python give the same bytes.  Returns the exit code.
    """
    parser = argparse.ArgumentParser(prog="sniroute bundle", allow_abbrev=False,
                                     description="Writes sniroute into one file that any Python from 3.11 runs.")
    parser.add_argument("-o", "--output", metavar="FILE", default="sniroute.pyz", help="default: sniroute.pyz")
    parser.add_argument("--with", dest="options", metavar="OPTION,...", default="doctor",
                        help=f"what it can do beside serving: {', '.join(OPTIONS)}, all or none (default doctor)")
    given = parser.parse_args(words)
    options = {"all": list(OPTIONS), "none": []}.get(given.options, given.options.split(","))
    unknown = [option for option in options if option not in OPTIONS]
    if unknown:
        parser.error(f"--with: {printable(unknown[0])!r} is none of {', '.join(OPTIONS)}, all and none")
    rooms = [*CORE, *itertools.chain.from_iterable(OPTIONS[option] for option in options)]
    try:
        sources = {f"{room}.py": source_of(room) for room in rooms}
        write_bundle(given.output, {**sources, "__main__.py": BUNDLE_MAIN})
    except subprocess.CalledProcessError as error:  # the sources do not compile: its last line says where
        print(f"sniroute: bundle: {printable(error.stderr.strip().rpartition(chr(10))[2])}", file=sys.stderr)
        return 1
    except (OSError, SyntaxError, UnicodeDecodeError) as error:  # the last two: a room that is no text
        why = getattr(error, "strerror", None) or str(error)
        print(f"sniroute: {printable(given.output)}: {printable(why)}", file=sys.stderr)
        return 1
    version = describe_version().partition(" (")[0]
    print(f"{printable(given.output)}: {version} with {', '.join(options) or 'no options'}, "
          f"{os.path.getsize(given.output) >> 10} KiB")
    return 0


def source_of(room: str) -> str:
    """The text of a room, from its folder or from the bundle that it is in.  Raises OSError."""
    import importlib.util
    spec = importlib.util.find_spec(room)
    source = spec.loader.get_source(room) if spec is not None else None
    if source is None:
        raise FileNotFoundError(errno.ENOENT, f"{room}.py is not here")
    return source


def write_bundle(path: str, sources: dict[str, str]) -> None:
    """Write a zip file of these sources and their bytecode.  Raises OSError, or SubprocessError."""
    import zipfile
    done = subprocess.run([sys.executable, "-I", "-S", "-c", BUNDLE_COMPILER], input=json.dumps(sources), text=True,
                          capture_output=True, check=True)
    files = {name: text.encode() for name, text in sources.items()}
    files |= {f"{name}c": bytes.fromhex(code) for name, code in json.loads(done.stdout).items()}
    part = f"{path}.part"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)  # in /tmp another user may have made it: the program would be that user's
        with open(part, "xb") as file:
            file.write(BUNDLE_START)
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for name in sorted(files):
                    entry = zipfile.ZipInfo(name, BUNDLE_DATE)
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    entry.create_system = 3  # Unix, whatever writes it
                    entry.external_attr = 0o644 << 16
                    archive.writestr(entry, files[name])
        os.chmod(part, 0o755)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
