#!/usr/bin/env python3
"""sniroute_nodepass: services behind NAT: one end of a tunnel as NodePass, version 2, makes it, with nothing installed.

    server://KEY@HOST:PORT/TARGET     the end with a public address
    client://KEY@HOST:PORT/TARGET     the end behind NAT, which dials out; or, by itself, a forwarder
    master://HOST:PORT/PREFIX         a REST API that starts and watches servers and clients
    server | client | master --flags  the same as flags
    forwarders                        any number of servers, told on stdin, for sniroute

    caller --- Caller ---+                                          +--- Callee --- target
                         |   a connection of the pool               |
        accepting end    +==========================================+    dialling end
                         |   control channel: tcp, ping, verify ... |

The URL grammar, the parameters, the variables and the wire are the original's, so either end may be the original
program.  What it has and this one has not is QUIC (type=1), which Python's standard library cannot speak.

The picture has the case of `-`, where the server is the accepting end; with `+` the client is.  A client that forwards
by itself has no other end.

What becomes of an end is in sniroute_dialin, sniroute_dialout and sniroute_ends; of a client that forwards by itself in
sniroute_single; of one caller in sniroute_callers, or sniroute_datagrams; the master is sniroute_master.

Threads: `main` runs the one loop, which owns every socket.  Names block: each is resolved in a thread `name`
(sniroute_dial).  There are no locks.

Seams: I want to ...
    another command      COMMANDS
    another parameter    sniroute_nodeurl, and whoever reads it
    another line         StatusLog

sniroute starts this program, and never imports it.  This room imports sniroute_dialin, sniroute_dialout, sniroute_ends,
sniroute_callers, sniroute_peering, sniroute_offload, sniroute_signals (the status line), sniroute_nodeurl,
sniroute_forwarder, sniroute_layers, sniroute_dial, sniroute_flow, sniroute_host, sniroute_loop, sniroute_names and
sniroute_refusals; and where it is asked for sniroute_single, sniroute_master, sniroute_streams.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import time
from typing import Any, Mapping

from sniroute_callers import Caller
from sniroute_dial import WayOut, set_options
from sniroute_dialin import Listening, Server, listen
from sniroute_dialout import Arrival, Client
from sniroute_ends import End
from sniroute_flow import Pipes
from sniroute_forwarder import TEXT_MAX, Control, Forwarder, Listener, Log
from sniroute_host import open_standard_streams, raise_descriptor_limit
from sniroute_layers import PIECE, RECORD, Wires
from sniroute_loop import Alarms
from sniroute_names import printable, show_address
from sniroute_nodeurl import URL_VARIABLE, Options, Times, parse_flags, parse_url, read_times
from sniroute_offload import Offload
from sniroute_peering import Link
from sniroute_refusals import SettingsError
from sniroute_signals import checkpoint

__version__ = "0.1.0"

LAYERS = 3  # of a wire at most: WebSocket in TLS over TCP

# -- the log -----------------------------------------------------------------------------------

STATUS_LEVELS = {"debug": 0, "info": 1, "warn": 2, "error": 3, "event": 4, "none": 5}  # the original's words
COLOURS = {"debug": "34", "info": "32", "warn": "33", "error": "31", "event": "36"}  # on a terminal


class StatusLog(Log):
    """Lines on stdout as the original writes them: dashboards read them.

        2006-01-02 15:04:05.000  EVENT  CHECK_POINT|MODE=1|PING=2ms|POOL=5|TCPS=2|UDPS=0|TCPRX=28|TCPTX=14|...
    """

    fd = 1

    def __init__(self, level: str):
        super().__init__("info", as_json=False)
        self.level = STATUS_LEVELS[level]
        self.is_coloured = os.isatty(1)

    def __call__(self, level: str, message: str, **fields: str) -> None:
        if STATUS_LEVELS[level] < self.level:
            return
        if fields.get("event") == "fault":
            message = f"{message}: {fields['error']}"
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f".{int(now * 1000) % 1000:03d}"
        word = level.upper()
        if self.is_coloured:
            word = f"\33[{COLOURS[level]}m{word}\33[0m"
        self.write(f"{stamp}  {word}  {printable(message, TEXT_MAX)}")


# -- the program -------------------------------------------------------------------------------


class NodePass(Forwarder):
    """What all ends of a process share."""

    called = "the NodePass program"
    tells_each = False  # who is refused is told of once in a while: strangers can be refused as often as they like

    def __init__(self, log: Log, times: Times, environ: Mapping[str, str]):
        super().__init__(log, Caller, self.parse_target)
        self.times = times
        self.environ = environ
        self.alarms = Alarms(self.loop)
        self.wires = Wires(self.loop)
        self.offload = Offload(self.wires)
        self.way = WayOut(self.loop, None, "")
        self.pipes = Pipes(self.loop.poller)
        self.arriving = self.loop.queue(times.handshake, Arrival.on_late)
        self.flushing = self.loop.batch(Link.flush)
        self.ends: list[End] = []

    @functools.cached_property
    def buffers(self) -> tuple[memoryview, ...]:
        """What all wires read into, where any bytes pass through this program: 0.8 MB."""
        return tuple(memoryview(bytearray(PIECE + RECORD)) for _ in range(LAYERS))

    @functools.cached_property
    def streams(self) -> Any:
        """What all HTTP/2 connections share, where there is one: a megabyte."""
        from sniroute_streams import Streams
        return Streams(self.loop)

    # -- ends

    def parse_target(self, text: str) -> Server:
        """An argument of `forwarders`: `[$NAME@]HOST:PORT[?QUERY]`.  Raises ValueError."""
        key, at, place = text.rpartition("@")
        if key.startswith("$"):
            key = self.environ.get(key[1:], "")
            if not key:
                raise ValueError(f"the variable {printable(text.partition('@')[0][1:], 80)} is not set")
        try:
            options = parse_url(f"server://{place.partition('?')[0]}/127.0.0.1:1?{place.partition('?')[2]}")
        except SettingsError as error:
            raise ValueError("; ".join(error.lines)) from None
        return Server(self, options._replace(key=key, noudp=True), self.times, accepts=True)

    def listen(self, target: Any, address: tuple[str, int]) -> Listener:
        """Listen for the callers of an end.  Raises OSError; an end that was made for this alone is closed then."""
        try:
            listener = super().listen(target, address, Listening)
        except OSError:
            if target not in self.ends:  # nobody else knows it
                target.close()
            raise
        set_options(listener.sock)
        if target not in self.ends:
            self.ends.append(target)
            target.start()
        return listener

    def unlisten(self, address: str) -> None:
        end = self.listeners[address].target
        super().unlisten(address)
        if end in self.ends and not self.listener_of(end):
            self.ends.remove(end)
            end.close()

    def add_end(self, end: Any) -> None:
        """Run an end that has no listener for callers, or opens it later."""
        self.ends.append(end)
        end.start()

    def open_callers(self, end: End) -> bool:
        """Open the addresses where an end's callers come in, TCP and UDP; whether they are open."""
        if end.datagrams.port is not None or any(listener.target is end for listener in self.listeners.values()):
            return True
        host, port = end.options.targets[0]
        try:
            if not end.options.notcp:
                sock = listen(host, port)
                self.take_listener(end, sock)
            if not end.options.noudp:
                end.datagrams.listen(listen(host, port, socket.SOCK_DGRAM))
        except OSError as error:
            self.log("error", f"cannot listen on {show_address((host or '0.0.0.0', port))}: "
                              f"{(error.strerror or str(error)).lower()}")
            self.close_callers(end)
            return False
        return True

    def close_callers(self, end: End) -> None:
        """Close them again."""
        for address in [address for address, each in self.listeners.items() if each.target is end]:
            super().unlisten(address)
        end.datagrams.unlisten()

    def stop(self) -> None:
        super().stop()
        for end in self.ends:
            end.close()
        self.offload.close()
        self.wires.close()
        self.pipes.close()

    # -- what ends tell

    def listener_of(self, end: End) -> str:
        """The address where an end's callers come in."""
        return next((address for address, each in self.listeners.items() if each.target is end), "")

    def linked(self, end: End) -> None:
        """The two ends have found each other."""
        self.log("info", f"{end}: linked with {end.peer or 'the server'} (type {end.terms.type}, tls {end.terms.tls})",
                 event="linked", listener=self.listener_of(end), client=end.peer, type=str(end.terms.type),
                 tls=str(end.terms.tls))

    def unlinked(self, end: End, why: str) -> None:
        """They have lost each other."""
        self.log("warn", f"{end}: the link is over: {why}", event="unlinked", listener=self.listener_of(end), error=why)

    def checkpoint(self, end: Any) -> None:
        """Time for a status line."""
        rx, tx = end.relays.moved()
        counts = end.counts
        self.log("event", checkpoint(end.mode, round(end.ping * 1000), end.idle, counts.tcps, counts.udps, rx, tx,
                                     counts.udprx, counts.udptx))


class Forwarders(NodePass):
    """The same for sniroute, which reads JSON, and asks why a client of its own was refused."""

    tells_each = True

    def checkpoint(self, end: Any) -> None:
        self.log("info", f"{end}: {end.idle} connections are ready", event="state", listener=self.listener_of(end),
                 client=end.peer, pool=str(end.idle), ping=f"{end.ping * 1000:.1f}")


# -- commands ----------------------------------------------------------------------------------


def run_server(program: NodePass, options: Options) -> None:
    """`server://`: who accepts callers is decided by `mode`, or by whether the target's address is ours."""
    end = Server(program, options, program.times, accepts=True)
    program.ends.append(end)
    start_server(program, end)


def start_server(program: NodePass, end: Server) -> None:
    """Open the address for callers; where that cannot be had now, dial it (mode=0), or try again (mode=1)."""
    if end.options.mode == 2 or not program.open_callers(end):
        if end.options.mode == 1:
            end.later("start", program.times.cooldown, lambda: start_server(program, end))
            return
        program.ends.remove(end)
        end.close()
        end = Server(program, end.options, program.times, accepts=False)
        program.ends.append(end)
    end.start()


def run_client(program: NodePass, options: Options) -> None:
    """`client://`: by itself (mode=1), or with a server (mode=2); else by whether the tunnel's address is ours."""
    if options.mode != 2:
        from sniroute_single import Single
        single = Single(program, options, program.times)
        if options.mode == 1 or single.can_listen():
            program.add_end(single)
            return
        single.close()
    program.add_end(Client(program, options, program.times))


def run(options: Options, environ: Mapping[str, str], state: str = "") -> int:
    """Run what a URL says.  Returns the exit code.  `state` is the file of a master; "": its default."""
    if state and options.scheme != "master":
        raise SettingsError("--state: it is for a master:// only, which keeps its instances there")
    times, warnings = read_times(environ)
    log = StatusLog(options.log)
    for line in warnings:
        log("warn", line)
    if options.scheme == "master":
        from sniroute_master import Master
        return Master(options, times, environ, log, state).run()
    raise_descriptor_limit()
    program = NodePass(log, times, environ)
    program.leave_at_signals()
    {"server": run_server, "client": run_client}[options.scheme](program, options)
    program.run()
    log("info", "shutdown complete")
    return 0


def forwarders(words: list[str], environ: Mapping[str, str]) -> int:
    """`forwarders`: what varies comes by stdin."""
    if words:
        raise SettingsError(f"unexpected {printable(words[0])!r}")
    raise_descriptor_limit()
    program = Forwarders(Log("info", as_json=True), read_times(environ)[0], environ)
    program.leave_at_signals()
    Control(program)
    program.run()
    return 0


USAGE = """\
usage: sniroute_nodepass.py server://[KEY@]HOST:PORT/TARGET[,TARGET ...][?PARAMETER=VALUE&...]
       sniroute_nodepass.py client://[KEY@]HOST:PORT/TARGET[,TARGET ...][?PARAMETER=VALUE&...]
       sniroute_nodepass.py master://HOST:PORT[/PREFIX][?PARAMETER=VALUE&...] [--state FILE]
       sniroute_nodepass.py server|client|master --FLAG VALUE ...     the same as flags: --help tells them
       sniroute_nodepass.py forwarders                                for sniroute

parameters of all: log=info, tls=0|1|2, crt=FILE, key=FILE
           of both ends: dns=5m, lbs=0|1|2, mode=0|1|2, dial=ADDRESS, read=0, rate=0 (Mbit/s), slot=65536, proxy=0|1|2,
                         block=1|2|3, notcp=0|1, noudp=0|1
           of a server: type=0|2|3 (TCP, WebSocket, HTTP/2), max=1024
           of a client: min=64, sni=NAME, pin=SHA256 of the server's certificate
"""


def take_state(words: list[str]) -> tuple[list[str], str]:
    """The words without `--state FILE`, and the file; "" without one.  Raises SettingsError."""
    for at, word in enumerate(words):
        name, equals, path = word.partition("=")
        if name == "--state":
            rest = words[at + 1:]
            if not equals:
                path, rest = "".join(rest[:1]), rest[1:]
            if not path:
                raise SettingsError("--state: it has no value")
            return words[:at] + rest, path
    return words, ""


def main(argv: list[str] | None = None) -> int:
    """The command line, by default the process's.  Returns the exit code: 0 clean, 1 wrong settings."""
    open_standard_streams()
    words = sys.argv[1:] if argv is None else argv
    if words in (["--version"], ["-v"], ["version"]):
        import ssl
        print(f"sniroute_nodepass {__version__} (Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION})")
        return 0
    if not words and URL_VARIABLE in os.environ:
        words = [os.environ.pop(URL_VARIABLE)]
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 1
    try:
        if words[0] == "forwarders":
            return forwarders(words[1:], os.environ)
        words, state = take_state(words)
        if words and "://" in words[0]:
            if words[1:]:
                raise SettingsError(f"unexpected {printable(words[1])!r}: a URL says all")
            return run(parse_url(words[0]), os.environ, state)
        return run(parse_flags("".join(words[:1]), words[1:]), os.environ, state)
    except SettingsError as error:
        for line in error.lines:
            print(f"sniroute_nodepass: {line}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
