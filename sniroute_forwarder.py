"""sniroute_forwarder: the base of our own tunnel programs: where their clients come in, and what they tell.

    stdin: "listen 127.0.0.1:20000 ARGUMENT" ---> Control ---> Listener ---accept---> serve(client).start()
           "close 127.0.0.1:20000"                                |                      |
    stderr: one JSON line for each event <------- Log <-----------+----------------------+

A Forwarder has the loop, the listeners, and the clients.  It is given the class that serves one client
(`Served` says what that class needs), and knows nothing of what lies behind it.  sniroute starts such a
program and speaks with it as sniroute_processes, "Shared processes", says.  By itself a program may also listen
where its command line says, or serve one client between stdin and stdout (`bridge`).

A line of the log has an `event`, one word, and fields.  sniroute reads these:

    listening   listener                          clients can connect
    closed      listener                          it is closed; with `error`, it could not be opened
    failed      listener, client, reason, error   a client could not be served
    paused                                        no client is accepted for now

The others are for people and tests: open, reset, broken, end, fault.

Threads: `main` runs the loop, which owns every socket.  `bridge` has two more, which copy stdin and stdout.
There are no locks.

A fault in a callback ends the client that it is for, and no other: `fault` finds that client.

Seams: I want to ...
    write another tunnel program   a class like Served, a subclass of Forwarder with what its clients share,
                                   and a `main` like sniroute_carrier's
    tell sniroute another thing    an event here, and a branch in `Processes._heard` of sniroute_processes
    take another command           `Control.obey`

This room imports sniroute_host, sniroute_loop, sniroute_scarcity, sniroute_names and sniroute_refusals (SettingsError).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import ipaddress
import json
import os
import select
import signal
import socket
import struct
import sys
import time
import urllib.parse
from typing import Any, Callable, Protocol

from sniroute_host import descriptor_limits
from sniroute_loop import CAPACITY_ERRNOS, READ, Loop, Watch, monotonic, owner_of
from sniroute_names import printable, show_address, unmapped
from sniroute_refusals import SettingsError
from sniroute_scarcity import SHORT_OF_MEMORY, ran_out

__version__ = "0.1.0"

ACCEPTS = 64  # clients taken in one go, so that those already here get their turn
BACKLOG = 4096  # clients that wait to be accepted; the kernel caps it at somaxconn
SPARE_FDS = 64  # descriptors that are not for clients: listeners, the selector, resolvers
PAUSE = 1.0  # seconds without accepting, when descriptors are short; less where a client leaves
PAUSE_SAID = 10.0  # seconds between two lines about that; sniroute takes a program that is silent for 30 for hung
LOG_NAP = 0.1  # seconds until it is tried again to write lines that nobody took
LINES_MAX = 1000  # log lines that wait for somebody to read them; more are dropped and counted
LINE_MAX = 4095  # bytes of a log line; with its newline a pipe takes it as a whole (PIPE_BUF); none comes near it
TEXT_MAX = 400  # characters of a field in the log: three, each character escaped, fit in LINE_MAX
COMMAND_MAX = 1024  # bytes of a line on stdin: two words, an address and an argument


# -- the log -----------------------------------------------------------------------------------

LEVELS = {"debug": 0, "info": 1, "warn": 2, "error": 3, "fatal": 4}  # cloudflared's words


class Log:
    """Lines on stderr, in JSON or for people.  It never waits for the reader.

    A line is written only when select(2) says that the pipe has room: that is room for a whole line.
    Until then it waits here.
    """

    fd = 2  # where lines go

    def __init__(self, level: str, as_json: bool):
        self.level = LEVELS[level]
        self.as_json = as_json
        self.lines: collections.deque[bytes] = collections.deque()
        self.lost = 0  # lines that were dropped since the last one that told so

    def __call__(self, level: str, message: str, **fields: str) -> None:
        """One line: `message`, and the fields that are not empty."""
        if LEVELS[level] < self.level:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        message = printable(message, TEXT_MAX)
        fields = {key: printable(value, TEXT_MAX) for key, value in fields.items() if value}
        if self.as_json:
            line = json.dumps({"level": level, "time": now, **fields, "message": message})
        else:
            line = f"{now} {level[:3].upper()} {message}"
            line += "".join(f" {key}={json.dumps(value)}" for key, value in fields.items() if key != "event")
        self.write(line)

    def write(self, line: str) -> None:
        """Have a line written as soon as somebody reads."""
        if len(self.lines) >= LINES_MAX:
            self.lost += 1
            return
        self.lines.append(line.encode()[:LINE_MAX] + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write what can be written now."""
        try:
            while self.lines and select.select((), (self.fd,), (), 0)[1]:
                os.write(self.fd, self.lines.popleft())
                if self.lost and not self.lines:
                    lost, self.lost = self.lost, 0
                    self("warn", f"{lost} lines were lost: nobody read the log")
        except (OSError, ValueError):  # stderr is closed, or nobody will ever read it
            self.lines.clear()


# -- listeners and clients ---------------------------------------------------------------------


def parse_listen(text: str) -> tuple[str, int]:
    """`HOST:PORT`, where HOST is an address or `localhost`; a scheme and a path are dropped.  Raises ValueError."""
    try:
        url = urllib.parse.urlsplit(text if "://" in text else f"tcp://{text}")
        host = "127.0.0.1" if url.hostname == "localhost" else str(unmapped(ipaddress.ip_address(url.hostname or "")))
        if url.port is not None:
            return host, url.port
    except ValueError:
        pass
    raise ValueError(f"{printable(text, TEXT_MAX)!r} is not HOST:PORT, with an address or localhost as HOST")


def show_client(address: Any) -> str:
    """HOST:PORT of an accepted client; "" where accept() tells none: macOS does so when the client has left."""
    return show_address(address) if address else ""


def reset(sock: socket.socket) -> None:
    """Close a socket so that its peer sees a failure, not an end."""
    if sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):  # macOS, where the connection is over
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Listener:
    """One place where clients come in, and where it leads."""

    __slots__ = ("target", "sock", "address", "watch", "kept")

    def __init__(self, target: Any, sock: socket.socket | None = None, address: str = "", watch: Watch | None = None):
        self.target = target  # its argument, parsed
        self.sock = sock  # None: stdin and stdout
        self.address = address
        self.watch = watch
        self.kept: Any = None  # what the serving class keeps for the next client, a TLS session for example


class Served(Protocol):
    """What a Forwarder wants of the class that serves a client.  All methods run in the loop.

    An instance owns the accepted socket `client`.  When it has closed it, it calls `Forwarder.closed(self)`, once.
    """

    listener: Listener
    address: str  # the client's, for the log

    def __init__(self, forwarder: Any, listener: Listener, client: socket.socket, address: str): ...

    def start(self) -> None:
        """Begin to serve."""

    def abort(self) -> None:
        """Close everything so that the client sees a failure."""

    def close(self) -> None:
        """Close everything."""

    def dismiss(self) -> None:
        """The listener is closing: tell the far end where that is possible, and close everything."""


# -- the program -------------------------------------------------------------------------------


class Forwarder:
    """The loop, the listeners and the clients.

    `serve` is the class that serves a client.  `parse` makes of a listener's argument, as text, what `serve`
    wants as `Listener.target`, and raises ValueError; shown as text, the target stands in the log.
    """

    called = "the forwarder"  # in the line about a fault

    def __init__(self, log: Log, serve: type[Served], parse: Callable[[str], Any]):
        self.log = log
        self.serve = serve
        self.parse = parse
        self.loop = Loop(self.fault)
        self.listeners: dict[str, Listener] = {}  # by address
        self.connections: set[Served] = set()
        self.room = max(1, (descriptor_limits()[0] - SPARE_FDS) // 2)  # clients, each with a socket to the far end
        self.paused = False  # accepting
        self.resuming = self.loop.timer(self._resume)
        self.pause_said = -PAUSE_SAID
        self.failed = False  # a client could not be served, or not to its end
        self.signalled = False  # it was told to end
        self.finished = False  # the one client between stdin and stdout has ended by itself
        self.napping = self.loop.timer(log.flush)

    def run(self) -> None:
        """Serve until the loop is stopped."""
        while not self.loop.stopping:
            self.loop.turn()
            self.log.flush()
            if self.log.lines:
                self.napping.set(monotonic() + LOG_NAP)
        self.stop()
        self.loop.close()

    def stop(self) -> None:
        """End everything, the clients too."""
        self.loop.stop()
        for address in list(self.listeners):
            self.unlisten(address)
        for connection in list(self.connections):
            connection.close()

    def leave(self) -> None:
        """Stop, as a process that is about to end.

        Its ports stay open until the kernel closes them with the process.  If they were closed before that,
        a stranger could take one, and sniroute would see the right process alive and the port in use.
        """
        for listener in self.listeners.values():
            with contextlib.suppress(OSError):  # no descriptor is left
                os.dup(listener.sock.fileno())
        self.stop()

    def leave_at_signals(self) -> None:
        """Have SIGTERM and SIGINT end the program."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: Any) -> None:
        """It is told to end; where the loop is over already, `bridge` sees that."""
        self.signalled = True
        self.loop.call(self.leave)

    def fault(self, owner: Any) -> None:
        """A fault of ours ends the client that met it, and no other; so does a lack of memory.  Called inside `except`.

        `owner` is the object that met it.  It may work for another object, as a Dial does: then the method that
        it calls at its end, `done`, is that object's.
        """
        if ran_out(sys.exc_info()[1]):
            self._pause(SHORT_OF_MEMORY)
        else:
            places = []
            trace = sys.exc_info()[2]
            while trace is not None:
                places.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
                trace = trace.tb_next
            self.log("error", f"a fault in {self.called}: please report it", event="fault",
                     error=f"{sys.exc_info()[1]!r} in {' > '.join(places[-5:])}")
        while hasattr(owner, "done"):
            owner = owner_of(owner.done)
        if isinstance(owner, self.serve):
            owner.abort()

    # -- listeners -----------------------------------------------------------------------------

    def listen(self, target: Any, address: tuple[str, int], kind: type[socket.socket] = socket.socket) -> Listener:
        """Open a listener, a socket of this kind; once this returns, clients can connect.  Raises OSError."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = kind(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
        return self.take_listener(target, sock)

    def take_listener(self, target: Any, sock: socket.socket) -> Listener:
        """Accept clients on a socket that listens already."""
        listener = Listener(target, sock, show_address(sock.getsockname()), Watch(self.loop.poller, sock.fileno()))
        self.listeners[listener.address] = listener
        if not self.paused:
            self._watch(listener)
        self.log("info", f"listening on {listener.address} for {target}", event="listening", listener=listener.address)
        return listener

    def unlisten(self, address: str) -> None:
        """Close a listener and its clients."""
        listener = self.listeners.pop(address)
        listener.watch.closing()
        listener.sock.close()
        for connection in [each for each in self.connections if each.listener is listener]:
            connection.dismiss()

    def _watch(self, listener: Listener) -> None:
        listener.watch.wait_for(READ, functools.partial(self._accept, listener))

    def _accept(self, listener: Listener, mask: int) -> None:
        """Take the clients that wait.

        The number of a new socket may be that of one closed in this turn, whose event is still to come.  Then the
        class that serves it is called for nothing, and finds that out when it reads.
        """
        for _ in range(ACCEPTS):
            if self.paused or listener.address not in self.listeners:
                return
            if len(self.connections) >= self.room:
                self._pause(f"{self.room} connections are open")
                return
            try:
                client, address = listener.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in CAPACITY_ERRNOS:
                    self._pause(error.strerror)
                    return
                continue  # that one has left already
            self.add(listener, client, show_client(address))

    def _pause(self, why: str) -> None:
        """Accept no more for now: clients that come meanwhile wait in the backlog.

        This is said again and again while it lasts, or sniroute would take the program for hung.
        """
        self.paused = True
        for listener in self.listeners.values():
            listener.watch.wait_for(0)
        now = monotonic()
        self.resuming.set(now + PAUSE)
        if now - self.pause_said >= PAUSE_SAID:
            self.pause_said = now
            self.log("warn", f"not accepting for now: {why}", event="paused")

    def _resume(self) -> None:
        self.paused = False
        for listener in self.listeners.values():
            self._watch(listener)

    # -- clients -------------------------------------------------------------------------------

    def add(self, listener: Listener, client: socket.socket, address: str) -> None:
        """Serve one client."""
        connection = self.serve(self, listener, client, address)
        self.connections.add(connection)
        try:
            connection.start()
        except Exception:
            self.fault(connection)

    def tell(self, connection: Served, level: str, event: str, message: str, **fields: str) -> None:
        """Log one line about a client."""
        self.log(level, f"{connection.listener.target}: {message}", event=event,
                 listener=connection.listener.address, client=connection.address, **fields)

    def closed(self, connection: Served) -> None:
        """A client is gone: there is room for another."""
        self.connections.discard(connection)
        if self.paused:
            self.resuming.set(0.0)
        if connection.listener.sock is None and not self.loop.stopping:
            self.finished = True
            self.loop.stop()


class Control:
    """Opens and closes listeners as stdin says.  The end of stdin ends the program.

        listen 127.0.0.1:20000 db-1.example.com
        close 127.0.0.1:20000

    Each line is answered by one line of the log, with the listener's address as `listener` and, as
    `event`, `listening` or `closed`; a listener that could not be opened is `closed` with an `error`.
    """

    def __init__(self, forwarder: Forwarder):
        """Raises SettingsError, where stdin is a file."""
        self.forwarder = forwarder
        self.part = b""  # the beginning of a line
        try:
            forwarder.loop.poller.watch(0, READ, self.on_input)
        except PermissionError:
            raise SettingsError("stdin cannot be waited for: give it a pipe") from None

    def on_input(self, mask: int) -> None:
        """Read lines from stdin, and obey them."""
        data = os.read(0, 65536)
        *lines, self.part = (self.part + data).split(b"\n")
        if len(self.part) > COMMAND_MAX:
            self.forwarder.log("error", f"stdin: a line of more than {COMMAND_MAX} bytes", event="end")
        if not data or len(self.part) > COMMAND_MAX:
            self.forwarder.leave()
            return
        for line in lines:
            try:
                self.obey(line.decode("ascii", "replace").split())
            except Exception:
                self.forwarder.fault(self)

    def obey(self, words: list[str]) -> None:
        """Act on one line from stdin."""
        forwarder = self.forwarder
        try:
            if not words:
                return
            if len(words) == 3 and words[0] == "listen":
                forwarder.listen(forwarder.parse(words[2]), parse_listen(words[1]))
            elif len(words) == 2 and words[0] == "close" and words[1] in forwarder.listeners:
                forwarder.unlisten(words[1])
                forwarder.log("info", f"closed {words[1]}", event="closed", listener=words[1])
            else:
                raise ValueError("it is neither `listen ADDRESS ARGUMENT` nor `close ADDRESS`")
        except (OSError, ValueError) as error:
            why = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
            forwarder.log("error", f"cannot do {' '.join(words)}", event="closed",
                          listener=words[1] if len(words) > 1 else "", error=why)


# -- stdin and stdout --------------------------------------------------------------------------


def copy(reader: Callable[[int], bytes], writer: Callable[[bytes], Any], end: Callable[[], Any]) -> None:
    """Copy until the reader ends, then call `end`.  A thread of its own."""
    try:
        while data := reader(65536):
            writer(data)
    except OSError:
        pass  # nobody reads, or the connection is over
    finally:
        with contextlib.suppress(OSError):
            end()


def write_stdout(data: bytes) -> None:
    """Write all of it; waits for the reader."""
    while data:
        data = data[os.write(1, data):]


def bridge(forwarder: Forwarder, target: Any) -> int:
    """Serve one client between stdin and stdout.  Returns the exit code: 1 where it could not be served to its end.

    A pipe cannot be reset, so the code is all that tells a stream that was cut from a whole one.
    """
    import threading  # 0.2 MB, for who has no sockets
    ours, theirs = socket.socketpair()
    with theirs:
        threading.Thread(target=copy, args=(lambda size: os.read(0, size), theirs.sendall,
                                            lambda: theirs.shutdown(socket.SHUT_WR)), daemon=True).start()
        output = threading.Thread(target=copy, daemon=True, args=(theirs.recv, write_stdout,
                                                                  lambda: theirs.shutdown(socket.SHUT_RDWR)))
        output.start()
        forwarder.add(Listener(target), ours, "")
        forwarder.run()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if forwarder.finished and not forwarder.signalled:  # else stdout may never take the rest
            output.join()
    return 1 if forwarder.failed else 0
