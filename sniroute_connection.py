"""sniroute_connection: one client, from accept to close.

Threads: the loop only.
"""

from __future__ import annotations

import time
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING

from sniroute_flow import DONE, MESSAGE, NO_FLOW, READ_MAX, Flow
from sniroute_loop import READ, WRITE
from sniroute_refusals import NOTHING, TLS, Malformed, Refused, told, tunnel_refused
from sniroute_routes import Backend, Decision
from sniroute_wire import HELLO_WIRE_MAX, PROXY_WRITERS, SSL_REQUEST_BYTES, Hello, Prelude, ProxyHeader, whole_hello

if TYPE_CHECKING:
    from sniroute_router import Deadline, Peer, Router, Wait
    from sniroute_tunnels import Child

log = logging.getLogger("sniroute")
monotonic = time.monotonic
ACCEPT_PAUSE = 0.1  # when descriptors are short: an accept loop that spins burns a core
PRELUDES_MAX = 1024  # clients that have not said their name yet; over it the oldest goes
LINGER = 0.5  # a refused client may read its alert this long before the close
CONNECT_TIMEOUT = 5.0  # for each address of a backend
GREETING_TIMEOUT = 20.0  # for a backend's answer to SSLRequest; a tunnel dials its far end meanwhile
FIRST_BYTE_TIMEOUT = 20.0  # a tunnel without an answer to the hello by then does not work; the carrier gives up at 15
WORDS_TIMEOUT = 0.05  # a tunnel has failed: its words are on their way from one process to another
PARKS_MAX = 3  # times a connection may wait: its tunnel could be evicted as often as it comes up
KEEPALIVE = (60, 15, 4)  # idle, interval, count: a dead peer is found in two minutes

PRELUDE, ROUTED, PARKED, DIALING, GREETING = "prelude", "routed", "parked", "dialing", "greeting"
OPEN, LINGERING, CLOSED = "open", "lingering", "closed"

# errno values of accept() that mean "not now": pause, then go on.
CAPACITY_ERRNOS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))

# errno values of send() and connect() that mean "the connect is not over"; the last is BSD's.
NOT_CONNECTED = frozenset((errno.EAGAIN, errno.EALREADY, errno.EINPROGRESS, errno.ENOTCONN))


RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST

# socket.SocketType is the class that socket.socket is written around, whatever the manual says.
STREAM = int(socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0))  # born non-blocking: a call less


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
