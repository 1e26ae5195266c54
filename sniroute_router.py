"""sniroute_router: the server: listeners, accept, limits, waits, and the count of what came of it.

Threads: see the class.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import functools
import ipaddress
import logging
import os
import select
import socket
import socketserver
import threading
import time
import types
from typing import Any, Callable, Sequence, TYPE_CHECKING

from sniroute_connection import (ACCEPT_PAUSE, CAPACITY_ERRNOS, CONNECT_TIMEOUT, FIRST_BYTE_TIMEOUT,
                                 GREETING_TIMEOUT, LINGER, OPEN, PRELUDE, WORDS_TIMEOUT, Connection, keep_alive)
from sniroute_flow import BULK, DONE, PENDING_MAX, PIPES_MAX, READ_MAX, SMALL, Flow, SpliceFlow, can_splice
from sniroute_log import Ending
from sniroute_loop import READ, EpollPoller, Poller
from sniroute_names import __version__, is_local, normalise, show_address
from sniroute_refusals import REFUSALS, Malformed, Refused, SettingsError
from sniroute_routes import RESOLVED_MAX, Backend, Decision, Routes, tunnel_ready
from sniroute_wire import PROXY_POLICY

if TYPE_CHECKING:
    from sniroute_tunnels import Child, TunnelTable

log = logging.getLogger("sniroute")
monotonic = time.monotonic
new_tuple = tuple.__new__  # makes a NamedTuple without a call into Python: half a microsecond; give it all fields
ACCEPTS = 16  # connections taken from a listener in one turn, so that the rest is served too; more is no cheaper
BACKLOG = 4096  # the kernel caps it at somaxconn; 5 or 128 lose a burst
PAUSE_SAID = 10.0  # between two log lines about that, however often it happens
SWEEP_LAST = 30.0  # between two looks for connections that nothing else would end
HALF_CLOSED_IDLE = 3600.0  # one side gone, the other silent: nobody will end this but we
WAIT_THREADS = 32  # targets that wait on a thread at once; --max-starting lets even fewer start
WAITS_PER_CLIENT = 8  # targets of one client address that still wait for a thread
WAITS_MAX = 1024  # targets that wait, with a thread or for one: a crowd of names, each good for one refusal
PEERS_MAX = 4096  # client addresses in memory before those without a connection are dropped
DUMP_MAX = 200  # connections, and tunnels, in a dump
RUNNING, DRAINING, STOPPED = "running", "draining", "stopped"  # of the Router


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
