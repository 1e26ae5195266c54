"""sniroute_daemon: the main thread of `serve`: start and end, signals, systemd, reload, the hand-over to a successor.

    SIGTERM, SIGINT -----+                                        +--> drain; at a second signal: end now
    SIGHUP --------------+--> bytes in a pipe --+                 +--> reload
    SIGUSR1 -------------+                      +--> Daemon.run --+--> dump what there is into the log
    the loop has ended --+                      |                 +--> close everything
    a successor ------------> one of our names -+                 +--> give it the listening sockets

    Supervisor           what systemd is told: ready, reloading, stopping, alive
    activated_sockets    the listening sockets that systemd holds for us, where there is a sniroute.socket
    Handover             how a restart refuses nobody: passes the listening sockets from process to process; a
                         successor finds us by our names, which are unix addresses
    Daemon               the main thread: owns all of these, the Router and the TunnelTable
    dump                 counters, tunnels and connections into the log

The start.  A failure in the steps 1 to 3 leaves a predecessor as it was:

    1  get the listening sockets: systemd's, else those of a predecessor
    2  Router: takes these sockets over, and opens those that are missing
    3  import the admin's room, if a setting or systemd asks for it; start the thread `reaper` (TunnelTable.start), then
       `loop`, which accepts clients from here on
    4  tell the predecessor to drain; listen on its names, and bind those that are missing
    5  open the admin's addresses (threads `admin`, `admin-<n>`, `public-<n>`), then tell systemd READY=1

The end.  The thread `loop` runs until all has drained, or until a second signal.  It stops all tunnels, which ends
`reaper`, and wakes the main thread.  The main thread joins `loop`, and closes the admin, the listeners and the names,
in this order.  The thread `log` begins first and ends last: `serve` owns it.  The threads wait-<n> are the Router's.

Threads: main, but for four functions.  `Supervisor.beat` and `dump` run in the loop, `Daemon._loop` is the thread
`loop`, and any thread may call `Daemon.reload`.  One lock, Daemon.reloading: one reload at a time.

Seams: I want to ...
    react to another signal          a number in SIGNALS, and a branch in Daemon._on_signals
    tell systemd something else      Supervisor.ready for what changes with a reload, Supervisor.beat for what recurs
    apply a setting at a reload      Router.adopt or TunnelTable.adopt; `_adopt` calls both
    show more in a dump              `dump`
    start something else             Daemon._start, and in the opposite order Daemon._close

It imports the router, tunnels, settings, log, loop, names and refusals; sniroute_admin only where a setting or systemd
asks for it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import io
import logging
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from typing import Any, Iterable

from sniroute_log import Journal
from sniroute_loop import CAPACITY_ERRNOS, CAPACITY_PAUSE, NEVER, WakePipe, raise_descriptor_limit
from sniroute_names import printable, show_address
from sniroute_refusals import SettingsError
from sniroute_router import DRAINING, Hooks, Router, listen_addresses
from sniroute_settings import Settings, warn
from sniroute_tunnels import TunnelTable

__version__ = "0.1.0"

log = logging.getLogger("sniroute")
monotonic = time.monotonic


# -- systemd -----------------------------------------------------------------------------------

# Times in seconds.
STATUS_EVERY = 10.0  # between two status messages to systemd; a short WatchdogSec makes them more frequent
STOP_TIME = 20.0  # the end takes at most this, once all has drained: SIGTERM, SIGKILL, the tunnels' last words
LISTEN_FDS_START = 3  # the first descriptor that systemd passes: sd_listen_fds(3)


class Supervisor:
    """Tells systemd how the daemon is (sd_notify(3)).  Does nothing where NOTIFY_SOCKET is not set.

    Any thread: a message is one datagram.
    """

    def __init__(self, environ: dict[str, str]):
        self.socket: socket.socket | None = None  # None: nobody asks
        self.watchdog = False
        self.every = STATUS_EVERY  # seconds between two calls of `beat`
        self.status = ""  # the last one that systemd was told
        address = environ.get("NOTIFY_SOCKET")
        if not address:
            return
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        try:
            self.socket.connect("\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            log.warning("NOTIFY_SOCKET %s: %s", printable(address), error.strerror)
            self.close()
            return
        usec = environ.get("WATCHDOG_USEC", "")
        if usec.isdecimal() and int(usec) and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self.watchdog = True
            self.every = min(STATUS_EVERY, int(usec) / 2e6)

    def tell(self, *lines: str) -> None:
        """Send lines as one message.  It is lost without a word where systemd is gone, or does not keep up."""
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.send("\n".join(lines).encode())

    def ready(self, router: Router) -> None:
        """Say that the router serves: at the start, and again after each reload."""
        self.status = router.standing()
        self.tell("READY=1", f"STATUS={self.status}")

    def beat(self, router: Router) -> float:
        """Say that the loop is alive, and its status where that has changed.  The loop calls this.

        Returns the seconds until the next call is due.
        """
        if self.socket is None:
            return NEVER
        lines = ["WATCHDOG=1"] if self.watchdog else []
        if router.phase is DRAINING:
            lines.append(f"EXTEND_TIMEOUT_USEC={int(1e6 * (2 * self.every + STOP_TIME))}")
        status = router.standing()
        if status != self.status:
            self.status = status
            lines.append(f"STATUS={status}")
        if lines:
            self.tell(*lines)
        return self.every

    def close(self) -> None:
        """Close the socket; later messages are dropped."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None


def activated_sockets(environ: dict[str, str]) -> dict[str, list[socket.socket]]:
    """The listening sockets that systemd has opened for us (sd_listen_fds(3)); they are the caller's to close.

    "admin" and "admin-public" have those that FileDescriptorName= calls so, "" has all others.  All are empty without
    systemd.  Raises SettingsError where a descriptor is no listening TCP socket; the admin's may be a unix socket.
    """
    found: dict[str, list[socket.socket]] = {"": [], "admin": [], "admin-public": []}
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return found
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    for number, fd in enumerate(range(LISTEN_FDS_START, LISTEN_FDS_START + int(count))):
        name = names[number] if number < len(names) else ""
        use = name if name in found else ""
        families = [socket.AF_INET, socket.AF_INET6, *([socket.AF_UNIX] if use else [])]
        try:
            sock = socket.socket(fileno=fd)
            sock.set_inheritable(False)
            found[use].append(sock)
            if sock.family in families and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
        except OSError:
            pass
        raise SettingsError(f"LISTEN_FDS: descriptor {fd} ({printable(name) or 'no name'}) is no listening TCP socket")
    return found


# -- how a restart refuses nobody --------------------------------------------------------------

# Times in seconds.
HANDOVER_TIMEOUT = 5.0  # for all predecessors to send sockets, and for each later answer: all are on this host
OFFER_AGAIN = 5.0  # between two tries to bind a name that another process has
HANDOVER_MAX = 253  # sockets in one message: the kernel's SCM_MAX_FD; an address needs two, its listener and its name


class Handover:
    """Passes the listening sockets on to a successor, so that a restart refuses nobody.  Main thread.

    A successor is a second process of the same user with the same --listen:

        successor                               predecessor
        connects to an address's name   ---->
                                        <----   sends all its sockets: its listeners and its names (SCM_RIGHTS)
        accepts clients, too
        "drain"                         ---->   closes its listeners, and drains
                                        <----   closes its names and the admin's addresses, then the connection
        listens on the names

    If the successor dies before it says "drain", nothing has changed.

    A name is an abstract unix address (unix(7)) that belongs to one TCP address.  It leaves no file behind, and is
    known in one network namespace, as a TCP port is.  The names are passed as sockets instead of bound again, so each
    exists at every moment: a third process that connects meanwhile waits in the name's backlog.  Any user may bind or
    connect to such a name, so both sides check whose process the other is.  Without abstract names (macOS) there is
    no hand-over.
    """

    def __init__(self) -> None:
        self.names: list[socket.socket] = []  # ours: a successor connects to these
        self.inherited: dict[tuple[str, int], socket.socket] = {}  # a predecessor's names, by address, until `offer`
        self.predecessors: list[socket.socket] = []  # connections to those that gave us sockets, until `dismiss`
        self.successor: socket.socket | None = None  # one at a time: others wait in the backlog of the names

    @staticmethod
    def name(address: tuple) -> str:
        """The abstract unix address that belongs to a TCP address."""
        return f"\0sniroute {show_address(address)}"

    @staticmethod
    def is_ours(peer: socket.socket) -> bool:
        """Whether the other end is a process of this user."""
        _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return user == os.geteuid()

    def take(self, addresses: Iterable[tuple[str, int]]) -> list[socket.socket]:
        """Get the listeners that predecessors have for these addresses; the caller owns them.

        Their names are kept in `inherited`.  Addresses with port 0 are skipped: nobody can have them before us.
        """
        wanted = {address for address in addresses if address[1]}
        taken: dict[tuple, socket.socket] = {}
        deadline = monotonic() + HANDOVER_TIMEOUT
        for address in sorted(wanted) if sys.platform == "linux" else ():  # in one order: no two wait for each other
            if address not in taken and address not in self.inherited:
                try:
                    self._take(address, wanted, taken, deadline)
                except OSError as error:
                    log.warning("%s is not handed over: %s", show_address(address), error)
        return list(taken.values())

    def _take(self, address: tuple[str, int], wanted: set[tuple[str, int]], taken: dict[tuple, socket.socket],
              deadline: float) -> None:
        """Ask the process that has this address's name for all its sockets.

        Listeners for `wanted` addresses go to `taken`, names to `inherited`; the rest is closed.  Raises OSError.
        """
        while True:
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            channel.settimeout(max(deadline - monotonic(), CAPACITY_PAUSE))  # even the last one asked gets a moment
            try:
                channel.connect(self.name(address))
                if not self.is_ours(channel):
                    raise PermissionError(errno.EPERM, "another user has its name")
                word, fds, _, _ = socket.recv_fds(channel, 16, HANDOVER_MAX)
                if word:
                    break
            except ConnectionRefusedError:
                channel.close()
                return  # nobody has it
            except (ConnectionResetError, BlockingIOError):
                pass  # try again: it has just ended, or its backlog is full, which any user can bring about
            except OSError:
                channel.close()
                raise
            channel.close()
            if monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "who has its name says nothing")
            time.sleep(CAPACITY_PAUSE)
        self.predecessors.append(channel)
        names = {self.name(each).encode(): each for each in wanted}
        for fd in fds:
            sock = socket.socket(fileno=fd)
            kept, found = taken, sock.getsockname()
            if sock.family == socket.AF_UNIX:
                kept, found = self.inherited, names.get(found, ())
            if found[:2] in wanted.difference(kept):
                kept[found[:2]] = sock
            else:
                sock.close()

    def dismiss(self) -> bool:
        """Tell the predecessors to drain, now that we accept.  Returns whether there were any."""
        for channel in self.predecessors:
            with channel, contextlib.suppress(OSError):
                channel.settimeout(HANDOVER_TIMEOUT)
                channel.sendall(b"drain")
                channel.recv(1)
        count, self.predecessors = len(self.predecessors), []
        return count > 0

    def offer(self, addresses: Iterable[tuple]) -> list[tuple]:
        """Listen on the name of each address, for a successor.  Returns addresses whose name another process has."""
        others = []
        for address in addresses if sys.platform == "linux" else ():
            name = self.inherited.pop(address, None)
            if name is None:
                name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    name.bind(self.name(address))
                    name.listen()
                except OSError:
                    name.close()
                    others.append(address)
                    continue
            name.setblocking(False)
            self.names.append(name)
        return others

    def accept(self, name: socket.socket) -> socket.socket | None:
        """The connection of a successor to a name; None where it has gone again, or is another user's process."""
        try:
            channel, _ = name.accept()
        except OSError as error:
            if error.errno in CAPACITY_ERRNOS:
                time.sleep(CAPACITY_PAUSE)  # it still waits in the backlog: without a pause the selector would spin
            return None
        channel.settimeout(HANDOVER_TIMEOUT)
        if self.is_ours(channel):
            return channel
        channel.close()
        return None

    def give(self, channel: socket.socket, listeners: Iterable[socket.socket]) -> bool:
        """Send a successor these listeners and all names, and keep its connection: it will say "drain".

        Returns whether they could be sent.
        """
        try:
            socket.send_fds(channel, [b"sockets"], [sock.fileno() for sock in (*listeners, *self.names)])
        except OSError:
            channel.close()
            return False
        self.successor = channel
        return True

    def withdraw(self) -> None:
        """Close the names: no successor finds us any more."""
        for name in self.names:
            name.close()
        self.names = []

    def close(self) -> None:
        """Close all sockets that nobody has taken over."""
        self.withdraw()
        for sock in (*self.predecessors, *self.inherited.values(), self.successor):
            if sock is not None:
                sock.close()


# -- the daemon --------------------------------------------------------------------------------

GC_THRESHOLD = 20000  # objects between two searches for cycles: connections leave none
SWITCH_INTERVAL = 0.0005  # seconds that another thread may keep the interpreter while the loop wants it
DUMP_MAX = 200  # connections in a dump, and as many tunnels
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def tune_interpreter() -> None:
    """Set what suits a loop of many short-lived objects.  An interpreter other than CPython may have none of these."""
    # `freeze`: all objects of the start live as long as the process, so the collector need not look at them again.
    for module, name, values in ((sys, "setswitchinterval", (SWITCH_INTERVAL,)),
                                 (gc, "set_threshold", (GC_THRESHOLD,)), (gc, "freeze", ())):
        if hasattr(module, name):
            getattr(module, name)(*values)


def dump(router: Router) -> None:
    """Log the counters, and DUMP_MAX tunnels and connections at most.  Runs in the loop.

    The level is at least the one that --log-level shows: somebody has asked for these lines.
    """
    level = max(logging.INFO, log.level)
    log.log(level, "counters: %s", dict(sorted({**router.counters, **dict(router.tunnels.counters)}.items())))
    tunnels = [*router.tunnels.snapshot(), *router.tunnels.failed()]
    for view in tunnels[:DUMP_MAX]:
        log.log(level, "tunnel %s: %s for %.0f s, %d connections, port %d, pid %d%s", view.key, view.state,
                view.age, view.leases, view.port, view.pid, f": {view.words}" if view.words else "")
    now = monotonic()
    for connection in list(router.connections)[:DUMP_MAX]:
        log.log(level, "connection %s: %s for %.1f s, name %s, %d bytes up, %d down",
                show_address(connection.address), connection.state, now - connection.began, connection.name,
                connection.up.total, connection.down.total)
    for what, count in (("tunnels", len(tunnels)), ("connections", len(router.connections))):
        if count > DUMP_MAX:
            log.log(level, "and %d %s more", count - DUMP_MAX, what)


class Daemon:
    """The main thread of `serve`: it starts the others, and then does what signals and a successor ask for.

    Signals arrive as bytes in a pipe (signal.set_wakeup_fd).  A handler that did the work itself would run in the
    middle of anything, and could wait for a lock that this same thread holds.
    """

    def __init__(self, settings: Settings, journal: Journal):
        self.settings = settings
        self.journal = journal
        self.supervisor = Supervisor(dict(os.environ))
        self.handover = Handover()
        self.admin: Any = None
        self.router: Router | None = None
        self.thread: threading.Thread | None = None
        self.stopping = False  # it drains: a signal or a successor has asked for it
        self.asked = False  # a signal has asked for the end; a second one ends it now
        self.unnamed: list[tuple] = []  # addresses whose name another process has (see Handover): tried again
        self.failed = False  # the loop ended by an exception
        self.reloading = threading.Lock()  # one reload at a time: the admin's threads reload, too
        self.selector = selectors.DefaultSelector()
        self.pipe = WakePipe()
        self.selector.register(self.pipe.reader, selectors.EVENT_READ, self._on_signals)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self.pipe.writer, warn_on_full_buffer=False)
        self.tunnels = TunnelTable(settings.launchers, settings.ports, idle=settings.idle,
                                   start_timeout=settings.start_timeout, max_tunnels=settings.max_tunnels,
                                   max_starting=settings.max_starting)

    # -- main thread: start and end ------------------------------------------------------------

    def run(self) -> int:
        """Serve until the thread `loop` has ended.  Returns the exit code."""
        try:
            try:
                self._start()
            except SettingsError as error:
                for line in error.lines:
                    log.error("%s", line)
                return 1
            while self.thread.is_alive():
                for key, _ in self.selector.select(OFFER_AGAIN if self.unnamed else None):
                    if self.selector.get_map().get(key.fd) is key:  # an earlier event may have unregistered it
                        key.data(key.fileobj)
                if self.unnamed and self.handover.successor is None:
                    self._offer()
            return 1 if self.failed else 0
        finally:
            self._close()

    def _start(self) -> None:
        """Listen, start the threads, and replace a predecessor.  Raises SettingsError."""
        settings = self.settings
        sockets = activated_sockets(dict(os.environ))
        activated = bool(sockets[""])
        inherited = sockets[""]
        if not activated:
            addresses = [address[:2] for host, port in settings.listen for _, address in listen_addresses(host, port)]
            if len(addresses) > HANDOVER_MAX // 2:
                raise SettingsError(f"--listen: {len(addresses)} addresses, and only {HANDOVER_MAX // 2} can be handed "
                                    "over to a successor: name fewer, or all of them as :PORT")
            inherited = self.handover.take(addresses)
        hooks = Hooks(self.journal.emit, self.supervisor.beat, self.reload)
        self.router = router = Router(settings, self.tunnels, hooks, inherited, activated)
        asked = [name for name, where in (("admin", settings.admin), ("admin-public", settings.admin_public))
                 if where is not None or sockets[name]]
        if asked:
            try:
                import sniroute_admin  # noqa: F401 - a fault in the file shows while a predecessor still serves
            except Exception as error:
                raise SettingsError(f"--{asked[0]}: sniroute_admin.py: {error}") from None
        self.tunnels.start()
        warn(settings)
        tune_interpreter()
        self.thread = threading.Thread(target=self._loop, name="loop", daemon=True)
        self.thread.start()
        for listener in router.listeners:
            log.info("listening on %s", show_address(listener.getsockname()))
        succeeded = self.handover.dismiss()
        if succeeded:
            log.info("another sniroute listened there: it drains, and ends")
        if activated:
            log.info("systemd holds the sockets: --listen is not used")
        self.unnamed = [] if activated else router.targets.own
        self._offer()
        if self.unnamed:
            log.warning("no successor can take over for now: another process has the name for %s",
                        ", ".join(map(show_address, self.unnamed)))
        if asked:
            self._attach(asked[0], {name: sockets[name][0] for name in asked if sockets[name]}, alone=not succeeded)
        self.supervisor.ready(router)

    def _attach(self, asked: str, listeners: dict[str, socket.socket], alone: bool) -> None:
        """Open the admin's addresses, or use the `listeners` that systemd has; `asked` is a setting that asks for one.

        Raises SettingsError if we are `alone`.  A successor goes on without: its predecessor drains already.
        """
        import sniroute_admin
        try:
            self.admin = sniroute_admin.attach(self.router, self.settings, listeners, alone)
        except Exception as error:
            fault = str(error) if isinstance(error, OSError) else f"--{asked}: {error}"
            if alone:
                raise SettingsError(fault) from None
            log.error("%s: going on without it", fault)
            return
        for what, where in (("admin", self.admin.address), ("metrics and probes", self.admin.public)):
            if where is not None:
                log.info("%s on %s", what, where if isinstance(where, str) else show_address(where))

    def _close(self) -> None:
        """End the threads and close everything, also after a start that failed."""
        if self.admin is not None:
            self.admin.close()
        if self.thread is not None:
            self.router.shutdown()
            self.thread.join()
        else:
            self.tunnels.close()
        if self.router is not None:
            self.router.server_close()
            log.info("stopped")
        self.handover.close()  # after the listeners: a process that finds no name opens the address itself
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one more must not interrupt the end: see `serve`
        signal.set_wakeup_fd(-1)
        self.supervisor.close()
        self.selector.close()
        self.pipe.close()

    # -- main thread: signals ------------------------------------------------------------------

    def _on_signals(self, reader: int) -> None:
        """Act on the bytes in the pipe: numbers of signals, and 0 for the end of the loop."""
        numbers = os.read(reader, 64)
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                self.stop()
            elif number == signal.SIGUSR1:
                self.router.call(functools.partial(dump, self.router))
        if signal.SIGHUP in numbers:  # last, and once for many: a reload may take a while
            self.reload()
        if 0 in numbers:  # the last act of `_loop`, so this does not wait
            self.thread.join()

    def stop(self) -> None:
        """Drain; at a second call, end now."""
        if self.asked:
            self.router.shutdown()
            self.tunnels.close(now=True)
            return
        self.asked = True
        if not self.stopping:
            self._drain()

    def _drain(self) -> None:
        """Accept no more; the loop ends with its last connection, or when --drain is over."""
        self.stopping = True
        self.supervisor.tell("STOPPING=1")
        self.tunnels.retiring = True  # unused tunnels stop at once: a successor may need their ports
        self.tunnels.wake()
        self.router.drain(self.settings.drain)

    # -- main thread: a successor --------------------------------------------------------------

    def _offer(self) -> None:
        """Bind the names that are free by now, and wait for a successor on them."""
        known = len(self.handover.names)
        self.unnamed = self.handover.offer(self.unnamed)
        for name in self.handover.names[known:]:
            self.selector.register(name, selectors.EVENT_READ, self._on_successor)

    def _on_successor(self, name: socket.socket) -> None:
        """A successor has connected: give it our sockets, and wait for its word."""
        channel = self.handover.accept(name)
        if channel is None:
            return
        if self.stopping:  # our listeners are being closed: it gets the names only, and opens the addresses itself
            self.router.deaf.wait(HANDOVER_TIMEOUT)
        if self.handover.give(channel, () if self.stopping else self.router.listeners):
            for each in self.handover.names:
                self.selector.unregister(each)
            self.selector.register(channel, selectors.EVENT_READ, self._on_word)

    def _on_word(self, channel: socket.socket) -> None:
        """The successor says "drain", since it accepts now; or it has gone, and we serve on."""
        self.selector.unregister(channel)
        self.handover.successor = None
        word = b""
        with channel:
            with contextlib.suppress(OSError):  # it was reset
                word = channel.recv(16)
            if word != b"drain":
                for name in self.handover.names:
                    self.selector.register(name, selectors.EVENT_READ, self._on_successor)
                return
            self.unnamed = []
            if not self.stopping:
                log.info("another sniroute listens here now")
                self._drain()
            self.router.deaf.wait(HANDOVER_TIMEOUT)  # listeners first: see the end of `_close`
            self.handover.withdraw()
            if self.admin is not None:
                self.admin.close()

    # -- thread loop ---------------------------------------------------------------------------

    def _loop(self) -> None:
        """The thread `loop`: run the router's loop, then stop the tunnels, and wake the main thread."""
        try:
            self.router.serve_forever()
        except BaseException:
            log.exception("the loop ended: please report it")
            self.failed = True
        finally:
            self.tunnels.close()  # waits for them: not in the main thread, which a second signal may hurry meanwhile
            self.pipe.wake()

    # -- any thread ----------------------------------------------------------------------------

    def reload(self) -> list[str]:
        """Read the settings again, and go on with them if they are right.

        Returns what is wrong with them, a line each; then nothing has changed.
        """
        with self.reloading:
            self.supervisor.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            faults: list[str] = []
            try:
                settings = self.settings.again(self.settings)
            except SettingsError as error:
                faults = list(error.lines)
            except Exception as error:  # a fault in our own code must not end a router that serves
                log.exception("while reading the settings again: please report it")
                faults = [repr(error)]
            for fault in faults:
                log.error("reload: %s", fault)
            if faults:
                log.error("reload: nothing has changed")
            else:
                self._adopt(settings)
            self.router.reloads["failed" if faults else "ok"] += 1
            self.router.last_reload = not faults, time.time()
            self.supervisor.ready(self.router)
            return faults

    def _adopt(self, settings: Settings) -> None:
        """Hand new settings to all that read them."""
        self.settings = settings
        log.setLevel(settings.log_level.upper())
        for line in settings.kept:
            log.warning("reload: %s", line)
        self.tunnels.adopt(settings)
        self.router.call(functools.partial(self.router.adopt, settings))
        warn(settings)
        log.info("reload: done, routes: %d", len(settings.routes.routes))
        if not settings.config:
            log.warning("reload: there is no file of settings to read again; "
                        "options and variables are for the next start")


def serve(settings: Settings) -> int:
    """`sniroute serve`: run until a signal ends it.  Returns the exit code."""
    raise_descriptor_limit()
    # Instead of sys.stderr: Python flushes that one at its exit, and hangs or fails there if nobody reads it.
    stream = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "ascii", "replace", write_through=True)
    journal = Journal(stream, settings.log_format)
    log.setLevel(settings.log_level.upper())
    log.propagate = False
    log.addHandler(journal)
    try:
        return Daemon(settings, journal).run()
    finally:
        log.removeHandler(journal)
        journal.stop()
        # The interpreter replaces our handlers by the default at its end, but leaves an ignored signal ignored: one
        # that came late, while `Daemon._close` had them blocked, must not change the exit code.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
