#!/usr/bin/env python3
"""sniroute_carrier: what `cloudflared access tcp` does, with nothing installed.

It listens on a local port.  For each client it opens TLS to the hostname and upgrades to WebSocket.  Then it
carries the client's bytes in binary messages to the connector of that hostname (the `cloudflared` that runs
beside the service), and back.

    client --- Listener --- Connection -------------- edge --- connector --- service
     psql      127.0.0.1     recv  -> one masked message, at most CHUNK bytes
               :20000        bytes <- FrameReader <- messages of any shape

    access tcp --hostname H --url HOST:PORT   one hostname, with cloudflared's options and variables
    access tcp --hostname H                   one connection, between stdin and stdout
    forwarders                                any number of hostnames, told on stdin

The life of a connection is `Connection.state`.  While DIALLING, `Connection.dial` makes the way to the
edge: first a Dial (TCP), then an Upgrade (TLS and WebSocket).

    DIALLING -> OPEN -> HALF -> LEAVING   the client has ended: its last bytes, a while for the answer, Close
                OPEN -> RESETTING         the client has broken off: its last bytes, then a reset for the edge
                OPEN, HALF -> DRAINING    the edge takes no more: what it said before is still read
                any of these -> ENDING    the edge has ended: its last bytes, then the client may still read
    any -> CLOSED

The far end decides what may be sent.  It cuts a message at 16,384 bytes and drops the rest; it answers a
Ping in the middle of a frame that it is writing; it has no half-close.  So messages are small, Pings are
never sent, and Pongs and Close stand between whole frames.  Close is sent in four cases: the client has
ended and nothing has come down for a while; the edge has sent one; the edge broke a rule; the listener closes.

A stream that was cut must not look whole.  The client is reset, behind its last bytes, where the edge resets or breaks
a rule, ends TLS without a close_notify, ends within a frame, or gives a code that means trouble.  TLS that ends with a
close_notify is an end, with a Close or without: the connector never sends a Close when its service has ended.

Threads: `main` runs the one loop, which owns every socket, because a TLS socket that two threads use can
lock up.  sniroute_dial resolves names in threads, and sniroute_forwarder copies stdin and stdout in two.
There are no locks.

Seams: I want to ...
    see what the edge is asked, and what its answers mean   sniroute_edge
    another way to the edge                                 a class beside Dial and Upgrade, with `start`, `cancel`,
                                                            `phase` and `done`
    another end of a connection                             the section "the end": each event is a method
    another option                                          `parse_words`

sniroute starts this program, and never imports it.  This room imports sniroute_edge, sniroute_forwarder,
sniroute_dial, sniroute_upgrade, sniroute_host, sniroute_loop, sniroute_names and sniroute_refusals.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import sys
from typing import Any, Mapping

from sniroute_dial import Dial, Failed, Proxy, WayOut, find_proxy, set_options
from sniroute_edge import REASONS, RECORD, Upgrade, Upgraded, identity, lacks_half, make_context, parse_target
from sniroute_forwarder import LEVELS, Control, Forwarder, Listener, Log, bridge, parse_listen, reset
from sniroute_host import open_standard_streams, raise_descriptor_limit
from sniroute_loop import READ, WRITE, Watch, unsent
from sniroute_names import printable, show_address
from sniroute_refusals import Malformed, SettingsError
from sniroute_upgrade import BINARY, CHUNK, CLOSE, PING, PONG, FrameReader, frame, parse_header

__version__ = "0.1.0"

BUFFER = 8 * RECORD  # bytes from the edge in one go: eight reads, one write
TURN = 8  # messages from one client before the others have their turn
EARLY_MAX = 1 << 16  # bytes that a client says before the edge is there; the rest waits in the kernel
PIECES_MAX = 64  # buffers in one write: far under the kernel's 1,024
DIAL_TIMEOUT = 15.0  # seconds from accept to the edge's answer: name, connect, proxy, TLS and upgrade together
GRACE = 2.0  # seconds of silence from the edge after a client's end, before Close: its answer gets through
SETTLE = 0.05  # seconds between two looks whether a side that is to be reset has got its last bytes
STALL = 60.0  # seconds in which the edge takes nothing; then we look whether the client is still there
LINGER = 5.0  # seconds after Close, or FIN: the other side may still send what is under way


# -- what the kernel tells ---------------------------------------------------------------------


def has_left(sock: socket.socket) -> bool:
    """Whether the peer has ended or is gone, asked without reading what it said before (only Linux tells)."""
    poll = select.poll()
    poll.register(sock, getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


# -- connections -------------------------------------------------------------------------------

NORMAL, GOING_AWAY, PROTOCOL_ERROR = b"\x03\xe8", b"\x03\xe9", b"\x03\xea"  # codes of Close, RFC 6455 section 7.4.1
ENDS = (NORMAL, b"")  # the codes of an end; a Close may be without one.  All others mean that something was cut

# The states of a connection.
DIALLING, OPEN, HALF, LEAVING, DRAINING, RESETTING, ENDING, CLOSED = (
    "dialling", "open", "half", "leaving", "draining", "resetting", "ending", "closed")
CARRYING = frozenset((OPEN, HALF, LEAVING, DRAINING, RESETTING))  # the states in which the edge is read


class Connection:
    """One client, and its way to the edge.  All methods run in the loop."""

    __slots__ = ("carrier", "listener", "client", "address", "client_watch", "dial", "edge", "edge_watch", "state",
                 "deaf", "early", "ended", "reader", "out", "pong", "rest", "broken", "stalled_at", "still_unsent",
                 "up", "down")

    def __init__(self, carrier: Carrier, listener: Listener, client: socket.socket, address: str):
        self.carrier = carrier
        self.listener = listener
        self.client = client
        self.address = address
        self.client_watch = Watch(carrier.loop.poller, client.fileno())
        self.dial: Dial | Upgrade | None = None  # DIALLING
        self.edge: Any = None
        self.edge_watch: Watch | None = None
        self.state = DIALLING
        self.deaf = False  # the client takes no more; what it has sent is still read
        self.early = b""  # bytes of the client that are not in a message yet
        self.ended = False  # the client has ended: its last bytes are in `early`
        self.reader = FrameReader()
        self.out = memoryview(b"")  # on its way to the edge
        self.pong: bytes | None = None  # the payload of the last Ping, when it is not answered yet
        self.rest = b""  # on its way to the client
        self.broken = False  # the edge broke off: the client is to see a reset
        self.stalled_at = (0, 0)  # at the last `on_stall`: `up`, and bytes that the edge had not acknowledged
        self.still_unsent = 1 << 62  # bytes that the kernel held for the other side at the last `on_linger`
        self.up = self.down = 0  # bytes

    # -- on the way to the edge

    def start(self) -> None:
        """Dial at once: where the service speaks first, the client waits for that."""
        try:
            set_options(self.client)
        except OSError:
            self.close()  # it has left already
            return
        self.carrier.dialling.put(self)
        self.client_watch.wait_for(READ, self.on_early)
        self.dial = Dial(self.carrier.way, self.listener.target.host, self.listener.target.port, self.on_dialled)
        self.dial.start()

    def on_early(self, mask: int) -> None:
        """The client says something, or leaves, before the edge is there."""
        try:
            data = self.client.recv(EARLY_MAX - len(self.early))
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if data:
            self.early += data
            if len(self.early) >= EARLY_MAX:
                self.client_watch.wait_for(0)
            return
        self.ended = True
        self.client_watch.wait_for(0)
        if self.listener.sock is None:
            return  # the end of stdin does not mean that somebody has left
        if not self.early:
            self.close()
            return
        # This may be a whole upload, so it is still delivered.  It may also be a client that has lost patience,
        # which looks the same: so there is less time.
        self.carrier.dialling.drop(self)
        self.carrier.hurried.put(self)

    def on_dialled(self, result: socket.socket | Failed) -> None:
        """There is a connection to the edge, or there will be none."""
        if isinstance(result, Failed):
            self.fail(result)
            return
        self.dial = Upgrade(self.carrier.loop, self.carrier.context, self.carrier.headers, self.listener, result,
                            self.on_upgraded)
        self.dial.start()

    def on_upgraded(self, result: Upgraded | Failed) -> None:
        """The edge carries messages, or will not."""
        if isinstance(result, Failed):
            self.fail(result)
            return
        self.dial = None
        self.edge, self.edge_watch, first = result
        self.state = OPEN
        for queue in (self.carrier.dialling, self.carrier.hurried):
            queue.drop(self)
        self.carrier.tell(self, "debug", "open", "open", error="resumed" if self.edge.session_reused else "")
        if first:
            self._take(memoryview(first))
        self.pump_up()
        self._rewatch()

    def on_late(self) -> None:
        """The deadline has come."""
        if not isinstance(self.dial, Upgrade) or not self.dial.hurry():
            self.fail(Failed("timeout", f"{DIAL_TIMEOUT:g} s, {self.dial.phase}"))

    def on_hurry(self) -> None:
        """The client has ended, and what it said cannot be delivered in time."""
        self.fail(Failed("timeout", f"{LINGER:g} s after the client's end, {self.dial.phase}"))

    def fail(self, why: Failed) -> None:
        """The client cannot be served: say why, and let it see a failure."""
        self.carrier.tell(self, "error", "failed", REASONS[why.reason], reason=why.reason, error=str(why))
        self.carrier.failed = True
        self.abort()

    # -- carrying

    def on_client(self, mask: int) -> None:
        """The client has said something, or takes more; an error or a hang-up may be either."""
        if self.rest and mask & ~READ:
            self._hand_down([])
        if self.state is OPEN and mask & ~WRITE:
            self.pump_up()
        self._rewatch()

    def on_edge(self, mask: int) -> None:
        """The edge has said something, or takes more; an error or a hang-up may be either."""
        if not self.rest and self.state in CARRYING and mask & ~WRITE:
            self.pump_down()
        if mask & ~READ:
            self.pump_up()
        self._rewatch()

    def pump_up(self) -> None:
        """From the client to the edge: each read is one message."""
        if self.state not in CARRYING:
            return
        try:
            for _ in range(TURN):
                if not self._flush() or self.state is not OPEN:
                    break
                if self.early:
                    data, self.early = self.early[:CHUNK], self.early[CHUNK:]
                elif self.ended:
                    data = b""
                else:
                    data = self._hear()
                if data is None:
                    break
                if not data:
                    self._client_ended()
                    break
                self.up += len(data)
                self.out = memoryview(frame(BINARY, data))
            else:  # the turn is over: the last message goes out, too
                self._flush()
        except OSError:
            self._edge_refuses()

    def _hear(self) -> bytes | None:
        """What the client says: None for nothing yet, b'' at its end."""
        try:
            return self.client.recv(CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            self.deaf = True
            return b""

    def _flush(self) -> bool:
        """Send what is on its way to the edge; a Pong goes between two frames.  Whether all is sent.

        Raises OSError.
        """
        try:
            while self.out or self.pong is not None:
                if not self.out:
                    self.out = memoryview(frame(PONG, self.pong))
                    self.pong = None
                self.out = self.out[self.edge.send(self.out):]
                if self.state is LEAVING:
                    self.carrier.lingering.put(self)  # the edge takes something: it has more time
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            if self.state in CARRYING and self not in self.carrier.stalled.due:
                self.carrier.stalled.put(self)
            return False
        return True

    def pump_down(self) -> None:
        """From the edge to the client.

        Each read is given room for a whole TLS record: nothing may stay inside the TLS socket, where
        the loop would not see it.
        """
        buffer = self.carrier.buffer
        filled = 0
        over = lost = False
        try:
            while filled <= BUFFER - RECORD:
                count = self.edge.recv_into(buffer[filled:])
                if not count:
                    over = True
                    break
                filled += count
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError:  # it was reset, or TLS has no close_notify
            over = lost = True
        if filled:
            self._take(buffer[:filled])
        if over and self.state in CARRYING:
            self._edge_ended(lost or self.reader.is_inside())

    def _take(self, data: memoryview) -> None:
        """Bytes from the edge: hand down the payload, answer the control frames."""
        try:
            pieces, controls = self.reader.read(data)
        except Malformed as error:
            self.carrier.tell(self, "error", "broken", "the edge broke the protocol", reason="other", error=str(error))
            self._say_close(PROTOCOL_ERROR)
            self._edge_ended(True)
            return
        if pieces:
            if self.state is HALF:
                self.carrier.graced.put(self)  # its answer is still coming
            elif self.state is DRAINING:
                self.carrier.lingering.put(self)
            if not self.deaf:
                self._hand_down(pieces)
        for opcode, payload in controls:
            if opcode == PING and self.state in (OPEN, HALF):  # nothing follows a Close
                self.pong = payload  # RFC 6455 section 5.5.3: of several Pings, answering the last is enough
            elif opcode == CLOSE:
                self._say_close(payload[:2])
                self._edge_ended(payload[:2] not in ENDS)
                return
        if self.pong is not None and self.state in CARRYING:
            try:
                self._flush()
            except OSError:
                self._edge_refuses()

    def _hand_down(self, pieces: list[memoryview]) -> None:
        """Write to the client; keep what it does not take now."""
        if self.rest:
            pieces = [memoryview(self.rest), *pieces]
        elif len(pieces) > PIECES_MAX:
            pieces = [memoryview(b"".join(pieces))]
        try:
            sent = self.client.sendmsg(pieces)
        except BlockingIOError:
            sent = 0
        except OSError:  # it takes no more, but what it sent before still counts
            self.deaf = True
            self.rest = b""
            if self.state is ENDING:
                self.close()
            elif self.state is HALF:
                self._leave()
            return
        self.down += sent
        total = sum(map(len, pieces))
        self.rest = b"".join(pieces)[sent:] if sent < total else b""
        if self.state is ENDING and not self.rest:
            self._farewell()

    def _rewatch(self) -> None:
        """Watch for what can be done now: this is the whole of backpressure."""
        if self.state in CARRYING:
            hears = READ if self.state is OPEN and not self.out else 0
            self.client_watch.wait_for(hears | (WRITE if self.rest else 0), self.on_client)
            self.edge_watch.wait_for((0 if self.rest else READ) | (WRITE if self.out else 0), self.on_edge)

    # -- the end

    def _client_ended(self) -> None:
        """All that the client said is in messages.  WebSocket has no half-close."""
        self.ended = True
        if self.deaf:
            self.state = RESETTING
            self.rest = b""
            self.carrier.lingering.put(self)
            settle(self)
            return
        self.state = HALF
        self.carrier.graced.put(self)

    def on_grace(self) -> None:
        """The client has ended, and nothing has come down for a while."""
        if self.rest:
            self.carrier.graced.put(self)  # the client is slow
        elif self.state is HALF:
            self._leave()
            self._rewatch()

    def _leave(self) -> None:
        """Tell the edge that this is all; go on reading: a close with unread bytes would reset, and destroy ours."""
        self.carrier.graced.drop(self)
        self.state = LEAVING
        self.pong = None
        self.carrier.lingering.put(self)
        self.out = memoryview(bytes(self.out) + frame(CLOSE, NORMAL))
        try:
            self._flush()
        except OSError:
            self._edge_refuses()

    def _edge_refuses(self) -> None:
        """The edge takes no more.  What it said before is still to be read, perhaps with its Close."""
        self.out = memoryview(b"")
        self.pong = None
        if self.state in (OPEN, HALF):
            self.state = DRAINING
            self.broken = True
            self.carrier.graced.drop(self)
            self.carrier.lingering.put(self)

    def on_stall(self) -> None:
        """For a while the edge has taken nothing, or little, and so nobody has listened to the client."""
        if self.state not in CARRYING or not self.out:
            return
        waiting = unsent(self.edge)
        if has_left(self.client) and (self.up, waiting) == self.stalled_at:
            self.abort()
            return
        self.stalled_at = self.up, waiting
        self.carrier.stalled.put(self)

    def on_linger(self) -> None:
        """The other side does not end.  While the kernel still gets rid of what it has to send, there is more time."""
        if self.state is DRAINING:
            if self.rest:
                self.carrier.lingering.put(self)  # the client is slow, and the edge is not read meanwhile
            else:
                self._edge_ended(True)
            return
        waiting = unsent(self.edge or self.client) or 0
        if 0 < waiting < self.still_unsent:
            self.still_unsent = waiting
            self.carrier.lingering.put(self)
        else:
            self.close()

    def _say_close(self, code: bytes) -> None:
        """Send Close to the edge, unless one was sent, or a frame is half sent, or it is to be reset."""
        if self.state in (LEAVING, DRAINING, RESETTING) or self.out:
            return
        try:
            self.edge.send(frame(CLOSE, code))
        except OSError:
            pass  # it is gone, or full: no matter now

    def _edge_ended(self, broken: bool) -> None:
        """Nothing more comes from the edge: hand down the rest, then end the client, too."""
        if self.state not in CARRYING:
            return
        self.broken = broken and self.state not in (LEAVING, RESETTING)
        if self.broken:
            self.carrier.tell(self, "info", "reset", "the edge broke off")
            self.carrier.failed = True
        self.edge_watch.closing()
        self.edge.close()
        self.edge = None
        for queue in (self.carrier.graced, self.carrier.lingering):
            queue.drop(self)
        self.state = ENDING
        if self.deaf:
            self.close()
        elif self.rest:
            self.client_watch.wait_for(WRITE, self.on_client)
        else:
            self._farewell()

    def _farewell(self) -> None:
        """The kernel has the client's last bytes.  A reset, or a close with unread bytes, would destroy them."""
        if self.broken and unsent(self.client) != 0:  # None, where the kernel does not tell: it waits for LINGER
            self.client_watch.wait_for(0)
            self.carrier.settling.put(self)
            if self not in self.carrier.lingering.due:
                self.carrier.lingering.put(self)
            return
        if self.broken or self.ended:
            self.close()
            return
        try:
            self.client.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self.carrier.lingering.put(self)
        self.client_watch.wait_for(READ, self.on_farewell)

    def on_farewell(self, mask: int) -> None:
        """Read and forget what the client still says."""
        try:
            if self.client.recv_into(self.carrier.buffer):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.close()

    def abort(self) -> None:
        """Close everything so that the client sees a reset."""
        self.broken = True
        self.close()

    def dismiss(self) -> None:
        """The listener is closing: say Close, reset the client, whose stream is cut, and close everything."""
        if self.state in CARRYING:
            self._say_close(GOING_AWAY if self.carrier.loop.stopping else NORMAL)
        self.broken = self.broken or self.state is not ENDING
        self.close()

    def close(self) -> None:
        """Close everything, once."""
        if self.state is CLOSED:
            return
        end_edge = reset if self.state is RESETTING else socket.socket.close
        self.state = CLOSED
        try:
            for queue in self.carrier.queues:
                queue.drop(self)
            if self.dial is not None:
                self.dial.cancel()
                self.dial = None
            if self.edge is not None:
                self.edge_watch.closing()
                end_edge(self.edge)
        finally:  # a fault of ours above must not keep the client waiting
            self.client_watch.closing()
            if self.broken:
                reset(self.client)
            else:
                self.client.close()
            self.carrier.closed(self)


def settle(connection: Connection) -> None:
    """Whether the side that is to be reset has its last bytes by now: the client, or, RESETTING, the edge."""
    if connection.state is not RESETTING:
        connection._farewell()
    elif unsent(connection.edge) != 0:
        connection.carrier.settling.put(connection)
    else:
        connection.close()


class Carrier(Forwarder):
    """What all connections share.

    `headers` are (name, value), and go into every upgrade.  `proxy` and `no_proxy` are what find_proxy gives.
    """

    called = "the carrier"

    def __init__(self, log: Log, headers: list[tuple[str, str]], proxy: Proxy | None, no_proxy: str):
        super().__init__(log, Connection, parse_target)
        self.headers = headers
        self.way = WayOut(self.loop, proxy, no_proxy)
        self.context = make_context()
        self.buffer = memoryview(bytearray(BUFFER))
        self.dialling = self.loop.queue(DIAL_TIMEOUT, Connection.on_late)
        self.hurried = self.loop.queue(LINGER, Connection.on_hurry)
        self.stalled = self.loop.queue(STALL, Connection.on_stall)
        self.graced = self.loop.queue(GRACE, Connection.on_grace)
        self.lingering = self.loop.queue(LINGER, Connection.on_linger)
        self.settling = self.loop.queue(SETTLE, settle)
        self.queues = self.dialling, self.hurried, self.stalled, self.graced, self.lingering, self.settling

    def closed(self, connection: Connection) -> None:
        """A client is gone."""
        super().closed(connection)
        self.tell(connection, "debug", "end", "closed", up=str(connection.up), down=str(connection.down))


# -- commands ----------------------------------------------------------------------------------


def parse_words(words: list[str], environ: Mapping[str, str]) -> Any:
    """The options of `access tcp`: cloudflared's names.  Raises SettingsError; exits for --help and wrong usage."""
    import argparse  # a megabyte; `forwarders` does without

    parser = argparse.ArgumentParser(
        prog="sniroute_carrier.py access tcp", allow_abbrev=False,
        description="Carries TCP to a hostname behind a Cloudflare tunnel, as `cloudflared access tcp` does.",
        epilog="Secrets belong in the environment: TUNNEL_SERVICE_TOKEN_ID, TUNNEL_SERVICE_TOKEN_SECRET, or "
               "CF_ACCESS_TOKEN (what `cloudflared access token` prints). Also read: TUNNEL_SERVICE_HOSTNAME, "
               "TUNNEL_SERVICE_URL, TUNNEL_SERVICE_DESTINATION, TUNNEL_LOG_OUTPUT=json, HTTPS_PROXY, NO_PROXY, "
               "SSL_CERT_FILE, SSL_CERT_DIR.")
    parser.add_argument("--hostname", "-T", "--tunnel-host", metavar="HOST", help="the application's hostname")
    parser.add_argument("--url", "-L", "--listener", metavar="HOST:PORT",
                        help="where to listen; without it, one connection between stdin and stdout")
    parser.add_argument("--destination", metavar="HOST:PORT", help="what a bastion is to connect to")
    parser.add_argument("--header", "-H", metavar="NAME:VALUE", action="append", default=[],
                        help="one more header for the edge; repeatable")
    parser.add_argument("--service-token-id", "--id", metavar="ID", help="of an Access service token")
    parser.add_argument("--service-token-secret", "--secret", metavar="SECRET", help="seen by all users of the host")
    parser.add_argument("--loglevel", "--log-level", choices=LEVELS, default="info", help="info by default")
    given = parser.parse_args(words)
    wrong = []
    for option, parse, variable in (("hostname", parse_target, "TUNNEL_SERVICE_HOSTNAME"),
                                    ("url", parse_listen, "TUNNEL_SERVICE_URL")):
        text = getattr(given, option)
        source = f"--{option}" if text else variable
        text = text or environ.get(variable)
        try:
            setattr(given, option, parse(text) if text else None)
        except ValueError as error:
            wrong.append(f"{source}: {error}")
    if not given.hostname and not wrong:
        wrong.append("--hostname is missing (or TUNNEL_SERVICE_HOSTNAME)")
    try:
        given.header = [parse_header(text) for text in given.header]
    except ValueError as error:
        wrong.append(f"--header: {error}")
    if wrong:
        raise SettingsError(*wrong)
    return given


def make_carrier(level: str, headers: list[tuple[str, str]], environ: Mapping[str, str]) -> Carrier:
    """A Carrier with its settings, which ends at SIGTERM and SIGINT.  Raises SettingsError."""
    proxy, no_proxy = find_proxy(environ)
    trusted = environ.get("SSL_CERT_FILE")
    if trusted and not os.access(trusted, os.R_OK):
        raise SettingsError(f"SSL_CERT_FILE: {trusted} cannot be read")
    raise_descriptor_limit()
    carrier = Carrier(Log(level, environ.get("TUNNEL_LOG_OUTPUT") == "json"), headers, proxy, no_proxy)
    if trusted and not carrier.context.cert_store_stats()["x509"]:
        raise SettingsError(f"SSL_CERT_FILE: there is no certificate in {trusted}")
    carrier.leave_at_signals()
    return carrier


def access(words: list[str], environ: Mapping[str, str]) -> int:
    """`access tcp`."""
    given = parse_words(words, environ)
    headers = given.header + identity(environ, vars(given))
    carrier = make_carrier(given.loglevel, headers, environ)
    if lacks_half(headers):
        carrier.log("warn", "the ID or the secret of the service token is not set: one of them alone opens nothing")
    if given.url is None:
        return bridge(carrier, given.hostname)
    try:
        carrier.listen(given.hostname, given.url)
    except OSError as error:
        carrier.log("error", f"cannot listen on {show_address(given.url)}: {(error.strerror or str(error)).lower()}")
        return 1
    carrier.run()
    return 0


def forwarders(words: list[str], environ: Mapping[str, str]) -> int:
    """`forwarders`, which has no options: what varies comes by stdin, what does not by the environment."""
    if words:
        raise SettingsError(f"unexpected {printable(words[0])!r}")
    carrier = make_carrier("info", identity(environ, {}), environ)
    Control(carrier)
    carrier.run()
    return 0


USAGE = """\
usage: sniroute_carrier.py access tcp --hostname HOST [--url HOST:PORT] [options]
       sniroute_carrier.py access tcp --help
       sniroute_carrier.py forwarders          told on stdin what to listen for, as sniroute does
       sniroute_carrier.py --version

Does what `cloudflared access tcp` does; instead of tcp, ssh, rdp and smb mean the same.
"""
HELP = (["-h"], ["--help"], ["access", "-h"], ["access", "--help"], ["forwarders", "-h"], ["forwarders", "--help"])
COMMANDS = {("access", kind): access for kind in ("tcp", "ssh", "rdp", "smb")} | {("forwarders",): forwarders}


def main(argv: list[str] | None = None) -> int:
    """The command line, by default the process's.  Returns the exit code: 0 clean, 1 failed, 2 wrong settings."""
    open_standard_streams()
    words = sys.argv[1:] if argv is None else argv
    if words in (["--version"], ["-v"], ["version"]):
        print(f"sniroute_carrier {__version__} (Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION})")
        return 0
    if words in HELP:
        print(USAGE, end="")
        return 0
    for command, run in COMMANDS.items():
        if tuple(words[:len(command)]) == command:
            try:
                return run(words[len(command):], os.environ)
            except SettingsError as error:
                for line in error.lines:
                    print(f"sniroute_carrier: {line}", file=sys.stderr)
                return 2
    print(USAGE, end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
