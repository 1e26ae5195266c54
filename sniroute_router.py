"""sniroute_router: the server: who may come in, who has to wait, and the count of what came of it.

    listener --- _accept ---> Connection --- loop.batch: read, dial, speak ---> flows --- closed ---> counters, tallies,
                              Peer: limits     |                                                      one Ending
                                               +-- target not ready: Waits.join
                                                        |  one thread for each target, not for each client
                                                        v
                                               a thread: finish_request, Scheme.prepare --> back to the loop

The one idea: waiting borrows a thread, moving bytes does not.  Router is a `socketserver.ThreadingTCPServer`, but all
that is ready runs in one Loop.  Only a target that has to wait (a tunnel that starts, a host to resolve) gets a thread, as
ThreadingMixIn gives one to each request; its clients park behind it, cost no thread, and the loop has them back with it.

Threads.  Each group of methods says which thread runs it.  Other threads ask the loop by `call`; what they read
(counters, connections, phase) is copied by them, or changed by single assignments.  `counters` is written by the loop
only.  No locks.

Seams: I want to ...
    open a listener with one target       Ports of sniroute_listeners; `_accept` has its clients led there
    hear what happens                     Hooks, given to Router(); Router.endings, Router.accesses
    limit something else                  `_accept` (before a byte is read), Connection._admit (once the name is known)
"""

from __future__ import annotations

import collections
import contextlib
import functools
import ipaddress
import logging
import os
import socket
import socketserver
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Sequence

from sniroute_connection import PRELUDE, WAITING_FOR_BACKEND, Connection, holds_hello
from sniroute_deadlines import Deadlines, awaited_by, cannot_wait
from sniroute_flow import DONE, Flow, Pipes
from sniroute_header import HEADER, read_header
from sniroute_host import shortage
from sniroute_listeners import Listener, Ports, arrange, bind, listen, sockets_of
from sniroute_log import CLIENT_LEFT, IDLE, STOPPED, Access, Ending
from sniroute_loop import CAPACITY_ERRNOS, CAPACITY_PAUSE, NEVER, READ, Loop, itself
from sniroute_names import ascii_advice, normalise, parse_ip
from sniroute_refusals import REFUSALS, Refused
from sniroute_resets import RESETTING
from sniroute_routes import Decision, Route, Routes
from sniroute_scarcity import SHORT_OF_MEMORY, Paced, begin_errand, ran_out
from sniroute_targets import Targets
from sniroute_tunnels import TunnelTable
from sniroute_wire import PROXY_POLICY, HelloMemory

if TYPE_CHECKING:
    from sniroute_browsers import Courtesy
    from sniroute_launchers import TunnelKey
    from sniroute_processes import Child
    from sniroute_settings import Settings
    from sniroute_web import Web

__version__ = "0.1.0"

log = logging.getLogger("sniroute")
monotonic = time.monotonic

# Limits, each with its reason.  Times in seconds.
ACCEPTS = 16  # connections taken from a listener in one turn, so that the rest is served too; more is no cheaper
PEERS_MAX = 4096  # client addresses in memory before those without a connection are dropped
WAIT_THREADS = 32  # targets that wait on a thread at once; --max-starting lets even fewer start
WAITS_PER_CLIENT = 8  # targets of one client address that still wait for a thread
WAITS_MAX = 1024  # targets that wait, with a thread or for one: a crowd of names, each good for one refusal
SWEEP_LAST = 30.0  # between two looks for connections that nothing else would end
HALF_CLOSED_IDLE = 3600.0  # one side gone, the other silent: nothing else would end such a connection

RUNNING, LAMEDUCK, DRAINING, OVER = "running", "lameduck", "draining", "stopped"  # phases of the Router
ACCEPTING = RUNNING, LAMEDUCK  # the phases in which it has listeners


# -- who may come in ---------------------------------------------------------------------------


class Peer:
    """An address that connects, and what the settings say of it."""

    __slots__ = ("key", "policy", "local", "exempt", "count")

    def __init__(self, key: str, policy: str, local: bool, exempt: bool):
        self.key = key  # the address; for IPv6 the /64, which is what one client has
        self.policy = policy  # what becomes of its PROXY header: see PROXY_POLICY
        self.local = local  # it is this machine
        self.exempt = exempt  # from the limits for each client
        self.count = 0  # connections


class Peers:
    """The addresses that connect, remembered so that the settings are asked once for each.  Loop only."""

    def __init__(self, settings: Settings):
        self.proxy_from = settings.proxy_from
        self.proxy_protocol = settings.proxy_protocol
        self.known: dict[str, Peer] = {}  # by address, and by key
        self.full = PEERS_MAX  # how many may be known before those without a connection are dropped

    def find(self, host: str) -> Peer:
        """What the settings say of an address."""
        address = parse_ip(host)
        trusted = any(address in network for network in self.proxy_from)
        exempt = trusted or address.is_loopback
        key = str(address)
        if address.version == 6 and not exempt:
            key = str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
        if len(self.known) >= self.full:
            self.known = {name: peer for name, peer in self.known.items() if peer.count}
            self.full = max(PEERS_MAX, 2 * len(self.known))
        policy = PROXY_POLICY[self.proxy_protocol, trusted]
        peer = self.known[host] = self.known.setdefault(key, Peer(key, policy, address.is_loopback, exempt))
        return peer


# -- who has to wait ---------------------------------------------------------------------------


class Wait:
    """A target that is not ready, or whose process is in doubt, and the connections that wait for it."""

    __slots__ = ("decision", "client", "deadline", "doubted", "connections", "number", "error")

    def __init__(self, decision: Decision, client: str | None, deadline: float, doubted: Child | None):
        self.decision = decision
        self.client = client  # the client address that is charged for a start
        self.deadline = deadline
        self.doubted = doubted  # the process that gave no answer, where that is why they wait
        self.connections: dict[Connection, None] = {}  # an ordered set
        self.number = 0  # how many threads ran when it got its own; 0 while it waits for one
        self.error: Refused | None = None  # how it ended


class Waits:
    """The targets that wait, each with a thread or for one.  Loop only."""

    def __init__(self, router: Router):
        self.router = router
        self.by_key: dict[str, Wait] = {}
        self.queued: collections.deque[Wait] = collections.deque()  # those that wait for a thread
        self.threads = 0
        self.thread_wanted = False  # `_start` is called in the next turn
        self.said = Paced()  # that there is no thread

    def join(self, connection: Connection, doubted: Child | None) -> None:
        """Have a connection wait with those that want the same; the first brings a thread.

        A connection that joins later waits for what the first asked for: its doubt, its deadline, its budget.
        """
        try:
            wait = self._wait_of(connection, doubted)
        except Refused as error:
            connection.refuse(error)
            return
        wait.connections[connection] = None
        connection.wait = wait
        self._want_thread()

    def doubt(self, connection: Connection, doubted: Child) -> None:
        """Have a process looked at that gave a connection no answer, though the connection does not wait for that.

        A doubt that finds no room is dropped: the next client casts it again.
        """
        with contextlib.suppress(Refused):
            self._wait_of(connection, doubted)
        self._want_thread()

    def prepare(self, decision: Decision) -> None:
        """Have a target prepared for which nobody waits yet; nothing where that is under way, or finds no room."""
        with contextlib.suppress(Refused):
            self._wait_for(decision, None, None)
        self._want_thread()

    def _wait_of(self, connection: Connection, doubted: Child | None) -> Wait:
        """The wait for a connection's target, begun where there is none.  Raises Refused where too many wait."""
        return self._wait_for(awaited_by(connection), None if connection.peer.exempt else connection.peer.key, doubted)

    def _wait_for(self, decision: Decision, client: str | None, doubted: Child | None) -> Wait:
        """The wait for a target, begun for this client where there is none.  Raises Refused where too many wait."""
        wait = self.by_key.get(decision.key)
        if wait is None:
            if len(self.by_key) >= WAITS_MAX:
                raise Refused("busy", f"{WAITS_MAX} names wait already")
            if client and sum(w.client == client and not w.number for w in self.by_key.values()) >= WAITS_PER_CLIENT:
                raise Refused("busy", f"{client} has {WAITS_PER_CLIENT} names that wait for a thread")
            wait = Wait(decision, client, monotonic() + self.router.settings.start_timeout, doubted)
            self.by_key[decision.key] = wait
            self.queued.append(wait)
        return wait

    def leave(self, connection: Connection) -> None:
        """Wait no more: whatever becomes of the target, it is not for this connection."""
        wait, connection.wait = connection.wait, None
        if wait is not None:
            del wait.connections[connection]
            if not wait.connections and not wait.number:  # nobody wants it, and no thread has begun
                del self.by_key[wait.decision.key]
                self.queued.remove(wait)

    def _want_thread(self) -> None:
        """Have a thread started in the next turn, one in a turn: each takes a while."""
        if self.queued and self.threads < WAIT_THREADS and not self.thread_wanted:
            self.router.call(self._start)
            self.thread_wanted = True  # set after the call: if that raises, no `_start` is on its way

    def _start(self) -> None:
        self.thread_wanted = False
        if not self.queued:
            return  # they have left
        wait = self.queued.popleft()
        self.threads += 1
        wait.number = self.threads
        try:
            begin_errand(functools.partial(self.router.finish_request, wait, wait.number),
                         functools.partial(self._over, wait), self.router.call, f"wait-{wait.number}")
        except (RuntimeError, MemoryError) as error:  # no more threads to be had
            self.router.loop.reserve.spend()
            wait.error = Refused("busy", str(error) or SHORT_OF_MEMORY)
            self.router.call(functools.partial(self._over, wait, None))
            if self.said.is_due(str(error)):
                log.warning("names that have to wait are refused for now: %s", shortage(error) or error)
        self._want_thread()

    def _over(self, wait: Wait, error: Exception | None) -> None:
        """A wait is over: its thread has noted there how, or has failed with an exception."""
        self.threads -= 1
        del self.by_key[wait.decision.key]
        try:
            if ran_out(error):
                self.router.loop.reserve.spend()
                wait.error = Refused("busy", SHORT_OF_MEMORY)
            elif error is not None:
                log.error("while waiting for %s", wait.decision.target, exc_info=error)
                wait.error = Refused("internal", "a fault in sniroute")
            self._hand_back(wait)
        finally:
            self._want_thread()

    def _hand_back(self, wait: Wait) -> None:
        """Go on with the connections of a wait."""
        for connection in list(wait.connections):
            if connection.wait is not wait:
                continue  # a connection earlier in this list has ended it
            try:
                if wait.error is None or wait.error.kind == "tunnel_budget" and connection.peer.key != wait.client:
                    connection.resume()  # the spent budget was another client's
                else:
                    cannot_wait(connection, wait.error)
            except Exception:
                self.router.loop.met(itself, connection)


# -- the server --------------------------------------------------------------------------------


class Hooks(NamedTuple):
    """What the router tells its owner."""

    # The loop, for each connection and each request that --log-level shows.
    journal: Callable[[Ending | Access], None] = lambda line: None
    beat: Callable[[Router], float] = lambda router: NEVER  # the loop lives; returns the seconds to the next call
    reload: Callable[[], list[str]] = lambda: []  # any thread: read the settings again; what is wrong, a line each


def end_sink(sink: socket.SocketType) -> None:
    """Tell a sink that its source has ended.  A step of a turn: a process that reads many sinks is woken once."""
    try:
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it is gone, and its own flow will say so


def prepare(settings: Settings) -> None:
    """Do before the loop has these settings what would hold it up: open the files that are needed, decide targets.

    Main, or whoever reads the settings again.  Raises OSError.
    """
    for route in (*settings.routes.routes, *settings.port):
        if route.several is not None and not route.has_fields:
            route.decide("", settings.routes.identified, fields={})  # it remembers what its backends are
    if settings.serves_http:
        from sniroute_web import prepare_tls  # imported late: an option
        prepare_tls(settings)


def serve_web(router: Router, settings: Settings) -> None:
    """Serve plain HTTP where a route wants that.  Once there, it stays: clients that are kept are to be told."""
    if router.web is not None:
        router.web.adopt(settings)
    elif settings.serves_http:
        from sniroute_web import Web  # imported late: an option
        router.web = Web(router, settings)


def starved(connection: Connection) -> None:
    """There is no memory for it: refuse it, or cut it where it passes bytes."""
    error = Refused("busy", SHORT_OF_MEMORY)
    try:
        if holds_hello(connection):
            connection.refuse(error)
            return
    except MemoryError:
        pass
    connection.refusal = error
    connection.close(error.kind)


def unhear(router: Router) -> None:
    """Accept from no listener; some may not have been heard."""
    for listener in router.listeners:
        with contextlib.suppress(KeyError, OSError):
            router.loop.poller.forget(listener.fileno())


def unheard_reset(up: Flow, down: Flow) -> Flow | None:
    """The flow whose source has broken off, and cannot say so: nobody watches it, as its bytes are not wanted now."""
    for flow in (up, down):
        if not flow.events and flow.source is not None and flow.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return flow
    return None


def courtesy_of(router: Router, courtesy: Courtesy | None) -> Courtesy | None:
    """What has a page shown to browsers that are refused, with --error-pages; the one that is there stays."""
    if not router.settings.error_pages:
        return None  # visits that have begun end by themselves
    from sniroute_browsers import Courtesy  # an option: costs the others nothing
    return courtesy or Courtesy(router)


class Router(socketserver.ThreadingTCPServer):
    """The server: listeners, the loop, and what all connections share.

    `settings` is a Settings; `routes` may be assigned at any time.  `inherited` are sockets that listen already: those
    of the addresses in `settings.listen` and `settings.port` that another process had, or, where they are `activated`
    ones (systemd), all that there are but for ports.  Raises SettingsError where an address cannot be listened on.
    """

    allow_reuse_address = True
    daemon_threads = True  # a resolver that hangs must not keep the process
    block_on_close = False

    def __init__(self, settings: Settings, tunnels: TunnelTable, hooks: Hooks = Hooks(),
                 inherited: Sequence[socket.socket] = (), activated: bool = False):
        self.settings = settings
        self.tunnels = tunnels
        self.hooks = hooks
        self.routes: Routes = settings.routes
        self.max_connections: int = settings.max_connections
        self.max_per_client: int = settings.max_per_client
        self.phase = RUNNING
        self.deaf = threading.Event()  # its listeners are closed: it drains
        self.level = log.getEffectiveLevel()  # needed for each connection; `adopt` asks again
        # The connections, and what came of them.
        self.connections: set[Connection] = set()
        # No Counter, which assigns slower.  Other threads use .get: [] would insert.
        self.counters: collections.defaultdict[str, int] = collections.defaultdict(int)
        self.endings: collections.deque[Ending] | None = None  # bounded; the admin sets it to get every Ending
        self.accesses: collections.deque[Access] | None = None  # likewise: `log_access` adds each request in plain HTTP
        self.started = time.time()
        self.reloads: collections.Counter[str] = collections.Counter()  # `ok`, `failed`
        self.last_reload = True, self.started  # whether it went well, and when it was
        self.courtesy = courtesy_of(self, None)  # None, unless browsers that are refused are shown a page
        self.large: list[Connection] = []  # those with a large hello, the oldest first: see `make_room`
        # What connections share.
        self.loop = Loop(self.fault)
        self.pipes = Pipes(self.loop.poller)
        self.hellos = HelloMemory()
        self.targets = Targets(tunnels)
        self.targets.tunnel_ports = range(settings.ports[0], settings.ports[1] + 1)
        self.targets.zones = settings.own_zones
        self.peers = Peers(settings)
        self.waits = Waits(self)
        self.targets.ask = self.waits.prepare
        self.deadlines = Deadlines(self.loop, settings.prelude_timeout, settings.start_timeout)
        self.web: Web | None = None  # what serves plain HTTP; None: no route has wanted that yet
        prepare(settings)
        serve_web(self, settings)
        self.to_end: list[socket.SocketType] = self.loop.batch(end_sink)
        self.to_read: list[Connection] = self.loop.batch(Connection.on_prelude)
        self.to_meet: list[Connection] = self.loop.batch(read_header)
        self.to_dial: list[Connection] = self.loop.batch(Connection.dial)
        self.to_speak: list[Connection] = self.loop.batch(Connection.speak)
        # After these batches: warm connections have one, too, and dial there what the steps above have taken.
        self.targets.follow((*settings.routes.routes, *settings.port), self.routes.identified, self.loop)
        # Timers of the loop.
        self.paused = False  # accepting is paused
        self.pause_said = Paced()
        self.resumption = self.loop.timer(self._resume)  # paused, and NEVER: when connections have ended, see `closed`
        self.drain_end = self.loop.timer(self._stop)
        self.heartbeat = self.loop.timer(self._beat)
        self.heartbeat.set(0.0)
        self.sweeping = self.loop.timer(self._sweep)
        self.sweeping.set(monotonic() + self._sweep_interval())
        # Listeners.
        self.listeners: list[Listener] = []
        self.ports = Ports()
        self.registrar: Any = None  # the registry, where there is one: see sniroute_registrar
        self.claimed_ports: dict[str, Route] = {}  # ports that the registry's owners have claimed, by pattern
        self.port_sockets = sockets_of(settings.port, inherited)
        self.inherited = [sock for sock in inherited if sock not in self.port_sockets]
        self.addresses, self.left_out = (
            [(listener.family, listener.getsockname()) for listener in self.inherited], "") if activated else arrange(
            settings.listen, self.inherited)
        hosts = [host for host, _ in settings.listen] + [os.uname().nodename]
        self.own_names = {host.lower().removesuffix(".") for host in hosts}
        self.address_family = self.addresses[0][0]
        super().__init__(self.addresses[0][1], None)

    # -- main thread ---------------------------------------------------------------------------

    def server_bind(self) -> None:
        """Bind every address, and open the ports with one target."""
        bind(self.addresses, self.inherited, self.listeners, "--listen")
        opened = self.ports.open(self.settings.port, self.port_sockets)
        self.listeners += self.ports.adopt(self.settings.port, self.routes.identified, opened)[0]
        self.socket.close()  # TCPServer makes one of its own class
        self.socket = self.listeners[0]
        self.server_address = self.socket.getsockname()

    def server_activate(self) -> None:
        """Listen on every address, and have the loop accept from it.  Raises SettingsError."""
        self.targets.own = [listener.getsockname()[:2] for listener in self.listeners]
        self.targets.own_socket = self.settings.admin if isinstance(self.settings.admin, str) else None
        listen((listener for listener in self.listeners if listener.decision is None), "--listen")
        for listener in self.listeners:
            self._hear(listener)

    def server_close(self) -> None:
        """Close what is left.  After the loop has ended, or instead of it."""
        for listener in [self.socket, *self.listeners, *self.inherited, *self.port_sockets, *self.ports.spare]:
            listener.close()
        self.pipes.close()
        self.loop.close()

    # -- any thread; each returns at once ------------------------------------------------------

    def call(self, act: Callable[[], None]) -> None:
        """Have the loop run `act`."""
        self.loop.call(act)

    def shutdown(self) -> None:
        """End the loop now."""
        self.call(self._stop)

    def lameduck(self, seconds: float) -> None:
        """Go on, but say that it ends: whoever sends clients here has so long to find others, before `drain`."""
        def begin() -> None:
            if self.phase is RUNNING:
                self.phase = LAMEDUCK
                log.info("lameduck: new clients are served for %g s yet, while /readyz says 503", seconds)
                self.heartbeat.set(0.0)  # systemd is told at once that this may take long
        self.call(begin)

    def drain(self, seconds: float) -> None:
        """Accept no more, let connections end by themselves for so long, then end."""
        self.call(lambda: self._drain(seconds))

    def tunnel_of(self, name: str) -> TunnelKey:
        """The tunnel that a client's name leads to.  Raises ValueError."""
        try:
            decision = self.decide(normalise(name.encode("ascii", "replace")))
        except Refused as error:
            raise ValueError(f"{error}{ascii_advice(name)}") from None
        if not decision.scheme.is_tunnel:
            raise ValueError(f"{name} leads to {decision.target}, which is no tunnel")
        return decision.tunnel

    def standing(self) -> str:
        """How it stands, in one line for people."""
        ready = sum(tunnel.state == "ready" for tunnel in list(self.tunnels.tunnels.values()))
        return f"{self.phase}: {len(self.connections)} connections, {ready} tunnels"

    # -- threads wait-<n>: socketserver's hook, its `request` is a Wait -------------------------

    def finish_request(self, wait: Wait, number: int) -> None:
        """Wait until the target may be ready."""
        try:
            wait.decision.scheme.prepare(self.targets, wait)
        except Refused as error:
            wait.error = error

    # -- the loop ------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Run the loop until `shutdown`, or until all has drained."""
        self.loop.run()
        if self.courtesy is not None:
            self.courtesy.close()
        for connection in list(self.connections):
            connection.close(connection.reason or STOPPED)
        if self.web is not None:
            self.web.spares.close()
        self.targets.close()

    def adopt(self, settings: Settings, opened: Mapping[str, list[Listener]] = {}) -> None:
        """Go on with other settings; what is open stays as it is.

        `opened`: what `Ports.open` has returned for them.
        """
        former, self.settings = self.settings, settings
        settings.routes.succeed(self.routes)
        self.routes = settings.routes
        self.targets.zones = settings.own_zones
        self.targets.follow((*settings.routes.routes, *settings.port), self.routes.identified, self.loop)
        self.level = log.getEffectiveLevel()
        self.deadlines.adopt(settings.prelude_timeout, settings.start_timeout)
        serve_web(self, settings)
        self.sweeping.set(min(self.sweeping.when, monotonic() + self._sweep_interval()))
        self.max_connections, self.max_per_client = settings.max_connections, settings.max_per_client
        self.courtesy = courtesy_of(self, self.courtesy)
        if self.paused and self.resumption.when == NEVER:
            self.resumption.set(0.0)  # there may be room now
        if (former.proxy_from, former.proxy_protocol) != (settings.proxy_from, settings.proxy_protocol):
            self.peers = Peers(settings)
            for connection in list(self.connections):
                connection.peer = self.peers.find(connection.address[0])
                connection.peer.count += 1
                if connection.state in (PRELUDE, HEADER) and connection.peer.policy == "close":
                    connection.refuse(Refused("proxy", REFUSALS["proxy"].meaning))
        self.change_ports(opened)

    def change_ports(self, opened: Mapping[str, list[Listener]], pattern: str | None = None) -> None:
        """Close the ports that are gone, and accept from those that are new.  Connections go on.

        `pattern`: of the only one that has changed, so that one more does not cost more where there are many.
        """
        if self.phase not in ACCEPTING:
            self.ports.close_all(opened)
            return
        configured = {route.pattern: route for route in self.settings.port}  # these come first, as for names
        if pattern is None:
            claimed = {key: route for key, route in self.claimed_ports.items() if key not in configured}
            routes = [*configured.values(), *claimed.values()]
            new, gone = self.ports.adopt(routes, self.routes.identified, opened)
        else:
            route = configured.get(pattern) or self.claimed_ports.get(pattern)
            new, gone = self.ports.adopt_one(pattern, route, self.routes.identified, opened)
        for connection in [each for each in self.connections if each.state is HEADER]:  # not let in yet
            heirs = self.ports.listeners.get(connection.decision.route.pattern)
            if heirs:
                connection.decision = heirs[0].decision
            else:
                connection.refuse(Refused("no_route", f"{connection.decision.route.pattern} is closed"))
        if not new and not gone:
            return
        left = [listener for listeners in gone.values() for listener in listeners]
        if not self.paused:
            for listener in left:
                self.loop.poller.forget(listener.fileno())
            for listener in new:
                self._hear(listener)
        # One assignment each: other threads read the lists.
        self.listeners = [listener for listener in self.listeners if listener not in left] + new
        own = [*self.targets.own, *(listener.getsockname()[:2] for listener in new)]
        for listener in left:
            own.remove(listener.getsockname()[:2])
        self.targets.own = own
        self.ports.close_all(gone)
        self.targets.resolved.clear()  # an address that was remembered may be our own now

    def fault(self, owner: Any) -> None:
        """A fault of ours: log it whole, and end only the connection that met it.  Or memory is short: no fault."""
        connection = getattr(owner, "connection", owner)  # a Flow has one, and a Race
        if ran_out(sys.exc_info()[1]):
            self.run_short(SHORT_OF_MEMORY)
            if isinstance(connection, Connection):
                starved(connection)
            return
        log.exception("a fault in sniroute: please report it")
        if isinstance(connection, Connection):
            connection.close("internal")

    def _hear(self, listener: Listener) -> None:
        """Have the loop accept from a listener."""
        self.loop.poller.watch(listener.fileno(), READ, functools.partial(self._accept, listener))

    def _accept(self, listener: Listener, mask: int) -> None:
        """Take the connections that wait."""
        if self.phase not in ACCEPTING or self.paused:
            return  # the state changed in this turn, and the event is older
        for taken in range(ACCEPTS):
            if len(self.connections) >= self.max_connections:
                if taken or self.to_read or self.to_meet:
                    return  # `shed` needs the clients of this turn read first; the next event accepts on
                if not self.shed():
                    self.pause(f"--max-connections ({self.max_connections}) are open", NEVER)
                    return
            try:
                client, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in CAPACITY_ERRNOS:
                    self.run_short(error.strerror)
                    return
                continue  # that client is gone (ECONNABORTED), or a firewall took it (EPERM)
            client.setblocking(False)
            host = address[0]
            if host.startswith("::ffff:"):
                host = host[7:]  # an IPv4 client of a dual-stack listener
            peer = self.peers.known.get(host) or self.peers.find(host)
            self.counters["accepted"] += 1
            connection = Connection(self, client, (host, address[1]), peer)
            if listener.decision is not None:
                connection.decision, connection.state = listener.decision, HEADER
            if peer.policy == "close":
                connection.refuse(Refused("proxy", REFUSALS["proxy"].meaning))
            elif peer.count > self.max_per_client and not peer.exempt:
                connection.refuse(Refused("client_limit", REFUSALS["client_limit"].meaning))
            elif connection.state is HEADER:
                self.to_meet.append(connection)
            else:
                self.to_read.append(connection)

    def shed(self) -> bool:
        """Refuse the client that has been silent longest; False where all have said their name."""
        for connection in self.deadlines.prelude.due:
            connection.refuse(Refused("shed", REFUSALS["shed"].meaning))
            return True
        return False

    def pause(self, why: str, until: float) -> None:
        """Stop accepting until a clock time: a listener that stays readable would spin the loop."""
        if self.paused or self.phase not in ACCEPTING:
            return
        if self.pause_said.is_due(why):
            log.warning("not accepting for now: %s", why)
        self.paused = True
        self.resumption.set(until)  # first: whatever fails below, it is tried again
        unhear(self)

    def hold(self, seconds: float) -> None:
        """Accept nobody yet, until `admit`, or for so long: clients wait in the backlog.  Before the loop runs."""
        self.paused = True
        self.resumption.set(monotonic() + seconds)
        unhear(self)

    def admit(self) -> None:
        """Accept those that were held."""
        if self.paused:
            self.resumption.set(0.0)

    def run_short(self, why: str) -> None:
        """This host has no descriptors or no memory left: accept none for a moment, keep fewer connections ready."""
        self.pause(why, monotonic() + CAPACITY_PAUSE)
        self.targets.give_way()

    def _resume(self) -> None:
        """Accept again, where there is memory for it."""
        if not self.loop.reserve.restore():
            self.resumption.set(monotonic() + CAPACITY_PAUSE)
            return
        try:
            for listener in self.listeners:
                self._hear(listener)
        except (OSError, MemoryError):  # epoll(7) takes kernel memory, too
            unhear(self)
            self.resumption.set(monotonic() + CAPACITY_PAUSE)
            return
        self.paused = False

    def decide(self, name: str | None) -> Decision:
        """What becomes of a name.  Raises Refused."""
        if name is None:
            farewell = b"OK\n" if self.settings.no_name == "ok" else b""
            raise Refused("no_name", REFUSALS["no_name"].meaning, farewell=farewell)
        decision = self.routes.decide(name)
        if name in self.own_names and decision.route.pattern != name:
            raise Refused("no_route", f"{name} is this router itself")
        return decision

    def _sweep_interval(self) -> float:
        """Seconds between two looks for silent connections: an eighth of the shortest silence that ends one."""
        idle = [route.connection_idle for route in (*self.routes.routes, *self.settings.port)]
        idle.append(self.settings.connection_idle)
        return min(SWEEP_LAST, *(each / 8 for each in idle if each), HALF_CLOSED_IDLE / 8)

    def _sweep(self) -> None:
        """Close what has been silent too long.  It compares byte counts, so that the pump needs no clock."""
        now = monotonic()
        self.sweeping.set(now + self._sweep_interval())
        self.large = list(filter(holds_hello, self.large))
        for connection in list(self.connections):
            up, down = connection.up, connection.down
            if connection.state is RESETTING:
                continue  # it has a deadline of its own
            flow = unheard_reset(up, down)
            if flow is not None:
                if connection.state in WAITING_FOR_BACKEND or flow.twin.source is None:  # that was accepted just now
                    connection.close(CLIENT_LEFT)
                else:
                    connection.broken(flow.twin)
                continue
            if up.state is DONE and down.state is DONE:
                continue  # it does not pass bytes (yet)
            if up.total + down.total != connection.carried:
                connection.carried = up.total + down.total
                connection.quiet_since = now
            idle = connection.decision.route.connection_idle
            idle = (self.settings.connection_idle if idle is None else idle) or NEVER
            half = DONE in (up.state, down.state)
            if now - connection.quiet_since >= (min(idle, HALF_CLOSED_IDLE) if half else idle):
                connection.close(IDLE)

    def closed(self, connection: Connection, reason: str, up: int, down: int) -> None:
        """A connection is over: count it and log it; accept again if that was paused, and end if all has drained."""
        self.connections.discard(connection)
        refusal = connection.refusal
        counters = self.counters
        counters[reason] += 1
        counters["bytes_up"] += up
        counters["bytes_down"] += down
        level = logging.INFO if refusal is None else REFUSALS[refusal.kind].level
        decision = connection.decision
        if decision is not None:
            tally = decision.tally
            tally.active -= connection.admitted
            tally.total += 1
            tally.refused += refusal is not None
            tally.up += up
            tally.down += down
        endings = self.endings
        if level >= self.level or endings is not None:
            began, dialled, backend = connection.began, connection.dialled, connection.backend
            ending = Ending(
                level, time.time(), connection.address, connection.name, decision and decision.route.pattern,
                backend.target if backend else decision and decision.target, up, down, monotonic() - began, reason,
                str(refusal) if refusal is not None else backend and backend.remark(),
                dialled - began if dialled else None)
            if level >= self.level:
                self.hooks.journal(ending)
            if endings is not None:
                endings.append(ending)
        if self.paused and self.resumption.when == NEVER \
                and len(self.connections) < self.max_connections - self.max_connections // 20:
            self.resumption.set(0.0)
        if self.phase is DRAINING and not self.connections:
            self._stop()

    def _beat(self) -> None:
        """Say that the loop lives."""
        self.heartbeat.set(monotonic() + self.hooks.beat(self))

    def _drain(self, seconds: float) -> None:
        if self.phase not in ACCEPTING:
            return
        for listener in self.listeners:
            if not self.paused:
                # Not `closing`: another process may hold it, and epoll would go on.
                self.loop.poller.forget(listener.fileno())
            listener.close()
        self.deaf.set()
        self.targets.close()
        if self.web is not None:
            self.web.drain()
        self.phase = DRAINING
        self.resumption.set(NEVER)
        self.paused = False
        log.info("draining: %d connections have %g s to end", len(self.connections), seconds)
        self.drain_end.set(monotonic() + seconds)
        self.heartbeat.set(0.0)  # systemd is told at once that this may take long
        if not self.connections:
            self._stop()

    def _stop(self) -> None:
        self.phase = OVER
        self.loop.stop()
