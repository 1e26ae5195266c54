"""sniroute_daemon: the main thread of `serve`: signals, systemd, the hand-over to a successor, reloads.
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
from typing import Any, Iterable, Sequence

from sniroute_log import Journal
from sniroute_loop import CAPACITY_ERRNOS, CAPACITY_PAUSE, NEVER, WakePipe
from sniroute_names import printable, show_address
from sniroute_refusals import SettingsError
from sniroute_router import DRAINING, Hooks, Router, listen_addresses
from sniroute_settings import Settings, raise_descriptor_limit, warn
from sniroute_tunnels import TunnelTable

__version__ = "0.1.0"

log = logging.getLogger("sniroute")
monotonic = time.monotonic
GC_THRESHOLD = 20000  # objects between two looks for cycles: connections leave none
SWITCH_INTERVAL = 0.0005  # so long may another thread keep the interpreter while the loop wants it
STATUS_EVERY = 10.0  # between two words to systemd about how it stands; the watchdog may want more
STOP_TIME = 20.0  # what the end takes at most, once all has drained: TERM, KILL, and the tunnels' last words
LISTEN_FDS_START = 3  # sd_listen_fds(3)
HANDOVER_TIMEOUT = 5.0  # for all that predecessors have, and for a last word: all of them are on this host
OFFER_AGAIN = 5.0  # between two tries to get a name that another process has
DUMP_MAX = 200  # connections, and tunnels, in a dump
HANDOVER_MAX = 253  # sockets in one message: the kernel's SCM_MAX_FD; an address needs two


def serve(settings: Settings) -> int:
    """`sniroute serve`: run until a signal ends it.  The exit code."""
    raise_descriptor_limit()
    # Not sys.stderr: Python flushes that at its exit, and hangs or fails there if nobody reads it.
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
        for number in SIGNALS:  # until now they were blocked; the interpreter sets the default again at its end
            signal.signal(number, signal.SIG_IGN)


def tune_interpreter() -> None:
    """Ask for what an interpreter has: not every one is CPython."""
    # `freeze`: what is here now lives as long as the process, so the collector need not look at it again.
    for module, name, values in ((sys, "setswitchinterval", (SWITCH_INTERVAL,)),
                                 (gc, "set_threshold", (GC_THRESHOLD,)), (gc, "freeze", ())):
        if hasattr(module, name):
            getattr(module, name)(*values)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Supervisor:
    """What systemd is told (sd_notify(3)), where it asks.  Any thread: a message is one datagram."""

    def __init__(self, environ: dict[str, str]):
        self.socket: socket.socket | None = None
        self.watchdog = False
        self.every = STATUS_EVERY
        self.status = ""  # as it was last told
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
        """Send a message.  Nobody to hear it, or no room for it, is no reason to fail."""
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.send("\n".join(lines).encode())

    def ready(self, router: Router) -> None:
        """It serves, or does so again with other settings."""
        self.status = router.standing()
        self.tell("READY=1", f"STATUS={self.status}")

    def beat(self, router: Router) -> float:
        """The loop lives: it says so itself.  Returns the seconds until it has to again."""
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
        """Let go of it."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None


def activated_sockets(environ: dict[str, str]) -> dict[str, list[socket.socket]]:
    """The sockets that systemd listens on for us (sd_listen_fds(3)): those named `admin`, and all others under ''.

    Raises SettingsError where one is no listening TCP socket (the admin's may be a unix one).
    """
    found: dict[str, list[socket.socket]] = {"": [], "admin": []}
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


class Handover:
    """Passes the listening sockets on to a successor, so that a restart refuses nobody.  Main thread.

    A second process of the same user with the same --listen is that successor:

        successor                               predecessor
        connects to the address's name  ---->
                                        <----   all its sockets: those that listen, and its names' (SCM_RIGHTS)
        accepts, too
        "drain"                         ---->   closes its listeners, and drains
                                        <----   lets go of its names and of the admin address: end of file
        has the names

    If it dies before that word, nothing has changed.  The names are handed on, not taken anew, so that there is
    no moment without: who comes next waits in their backlog for whoever has them then.

    A name is one of unix(7)'s abstract ones: no file that outlives its owner, and as wide as TCP ports are, one
    network namespace.  Both look who the other is, since any user may take such a name.  Without them (macOS)
    there is no hand-over.
    """

    def __init__(self) -> None:
        self.names: list[socket.socket] = []
        self.inherited: dict[tuple[str, int], socket.socket] = {}  # names by address, until they are offered
        self.predecessors: list[socket.socket] = []
        self.successor: socket.socket | None = None  # one at a time: others wait in the backlog of the names

    @staticmethod
    def name(address: tuple) -> str:
        """The name of the process that listens on an address."""
        return f"\0sniroute {show_address(address)}"

    @staticmethod
    def is_ours(peer: socket.socket) -> bool:
        """Whether the other end is a process of this user."""
        _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return user == os.geteuid()

    def take(self, addresses: Iterable[tuple[str, int]]) -> list[socket.socket]:
        """The sockets that predecessors have for these addresses."""
        wanted = {address for address in addresses if address[1]}
        taken: dict[tuple, socket.socket] = {}
        deadline = monotonic() + HANDOVER_TIMEOUT
        for address in sorted(wanted) if sys.platform == "linux" else ():  # in one order: two never wait for each other
            if address not in taken and address not in self.inherited:
                try:
                    self._take(address, wanted, taken, deadline)
                except OSError as error:
                    log.warning("%s is not handed over: %s", show_address(address), error)
        return list(taken.values())

    def _take(self, address: tuple[str, int], wanted: set[tuple[str, int]], taken: dict[tuple, socket.socket],
              deadline: float) -> None:
        """Ask who has one address, and add what of all that it has is wanted.  Raises OSError."""
        while True:
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            channel.settimeout(max(deadline - monotonic(), CAPACITY_PAUSE))  # whoever is asked last has a moment, too
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
                pass  # it has ended: perhaps there is another; or its backlog is full, which any user can see to
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
        """Have the predecessors drain, now that we accept.  Whether there were any."""
        for channel in self.predecessors:
            with channel, contextlib.suppress(OSError):
                channel.settimeout(HANDOVER_TIMEOUT)
                channel.sendall(b"drain")
                channel.recv(1)
        count, self.predecessors = len(self.predecessors), []
        return count > 0

    def offer(self, addresses: Iterable[tuple]) -> list[tuple]:
        """Be found by a successor under each of these addresses.  Returns those whose name somebody else has."""
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
        """Who has connected to a name, where that is a process of this user."""
        try:
            channel, _ = name.accept()
        except OSError as error:
            if error.errno in CAPACITY_ERRNOS:
                time.sleep(CAPACITY_PAUSE)  # it is still there: do not spin
            return None
        channel.settimeout(HANDOVER_TIMEOUT)
        if self.is_ours(channel):
            return channel
        channel.close()
        return None

    def give(self, channel: socket.socket, listeners: Iterable[socket.socket]) -> bool:
        """Pass the sockets on to a successor, whose word is then waited for.  Whether that went well."""
        try:
            socket.send_fds(channel, [b"sockets"], [sock.fileno() for sock in (*listeners, *self.names)])
        except OSError:
            channel.close()
            return False
        self.successor = channel
        return True

    def withdraw(self) -> None:
        """Let go of the names."""
        for name in self.names:
            name.close()
        self.names = []

    def close(self) -> None:
        """Let go of everything."""
        self.withdraw()
        for sock in (*self.predecessors, *self.inherited.values(), self.successor):
            if sock is not None:
                sock.close()


class Daemon:
    """The main thread of `serve`: it starts the others, and then does what signals and a successor say.

    Signals arrive as bytes in a pipe: a handler that did more could meet a lock that this thread holds.
    """

    def __init__(self, settings: Settings, journal: Journal):
        self.settings = settings
        self.journal = journal
        self.supervisor = Supervisor(dict(os.environ))
        self.handover = Handover()
        self.admin: Any = None
        self.router: Router | None = None
        self.thread: threading.Thread | None = None
        self.stopping = False  # it drains, or more
        self.asked = False  # by a signal; by a second one, it ends now
        self.unnamed: list[tuple] = []  # addresses whose name another process has: see Handover
        self.failed = False
        self.reloading = threading.Lock()  # one at a time: the admin's threads reload, too
        self.selector = selectors.DefaultSelector()
        self.pipe = WakePipe()
        self.selector.register(self.pipe.reader, selectors.EVENT_READ, self._on_signals)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self.pipe.writer, warn_on_full_buffer=False)
        self.tunnels = TunnelTable(settings.launchers, settings.ports, idle=settings.idle,
                                   start_timeout=settings.start_timeout, max_tunnels=settings.max_tunnels,
                                   max_starting=settings.max_starting)

    def run(self) -> int:
        """Serve.  The exit code."""
        try:
            try:
                self._start()
            except SettingsError as error:
                for line in error.lines:
                    log.error("%s", line)
                return 1
            while self.thread.is_alive():
                for key, _ in self.selector.select(OFFER_AGAIN if self.unnamed else None):
                    if self.selector.get_map().get(key.fd) is key:  # else an event before it has unregistered it
                        key.data(key.fileobj)
                if self.unnamed and self.handover.successor is None:
                    self._offer()
            return 1 if self.failed else 0
        finally:
            self._close()

    def _start(self) -> None:
        """Listen, start the threads, and take the place of a predecessor.  Raises SettingsError."""
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
        with_admin = settings.admin is not None or bool(sockets["admin"])
        if with_admin:
            try:
                import sniroute_admin  # noqa: F401 - what is wrong with the file shows before anybody is dismissed
            except Exception as error:
                raise SettingsError(f"--admin: sniroute_admin.py: {error}") from None
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
        if with_admin:
            self._attach(sockets["admin"][:1], alone=not succeeded)
        self.supervisor.ready(router)

    def _attach(self, listener: Sequence[socket.socket], alone: bool) -> None:
        """Open the admin's address.  Raises SettingsError, but for a successor: there is nobody to go back to."""
        import sniroute_admin
        try:
            self.admin = sniroute_admin.attach(self.router, self.settings, *listener)
            log.info("admin on %s", self.admin.address if isinstance(self.admin.address, str)
                     else show_address(self.admin.address))
        except Exception as error:
            if alone:
                raise SettingsError(f"--admin: {error}") from None
            log.error("--admin: %s: going on without it", error)

    def _loop(self) -> None:
        """The thread `loop`: run it, then stop the tunnels, and tell the main thread."""
        try:
            self.router.serve_forever()
        except BaseException:
            log.exception("the loop ended: please report it")
            self.failed = True
        finally:
            self.tunnels.close()  # here, so that the main thread hears a second signal meanwhile
            self.pipe.wake()

    def _on_signals(self, reader: int) -> None:
        numbers = os.read(reader, 64)
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                self.stop()
            elif number == signal.SIGUSR1:
                self.router.call(functools.partial(dump, self.router))
        if signal.SIGHUP in numbers:  # last, and once: it may take a while
            self.reload()
        if 0 in numbers:  # from `_loop`: all that is left of that thread is its end
            self.thread.join()

    def stop(self) -> None:
        """Drain; asked a second time, end now."""
        if self.asked:
            self.router.shutdown()
            self.tunnels.close(now=True)
            return
        self.asked = True
        if not self.stopping:
            self._drain()

    def _drain(self) -> None:
        self.stopping = True
        self.supervisor.tell("STOPPING=1")
        self.tunnels.retiring = True  # what nobody uses gives its port to a successor
        self.tunnels.wake()
        self.router.drain(self.settings.drain)

    def _offer(self) -> None:
        """Take the names that are free by now, and hear who comes."""
        known = len(self.handover.names)
        self.unnamed = self.handover.offer(self.unnamed)
        for name in self.handover.names[known:]:
            self.selector.register(name, selectors.EVENT_READ, self._on_successor)

    def _on_successor(self, name: socket.socket) -> None:
        """A process like this one has come for the sockets."""
        channel = self.handover.accept(name)
        if channel is None:
            return
        if self.stopping:  # it gets none: it can listen itself once ours are closed
            self.router.deaf.wait(HANDOVER_TIMEOUT)
        if self.handover.give(channel, () if self.stopping else self.router.listeners):
            for each in self.handover.names:
                self.selector.unregister(each)
            self.selector.register(channel, selectors.EVENT_READ, self._on_word)

    def _on_word(self, channel: socket.socket) -> None:
        """The successor accepts, or is gone."""
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
            self.router.deaf.wait(HANDOVER_TIMEOUT)  # first: who finds no name listens there itself
            self.handover.withdraw()
            if self.admin is not None:
                self.admin.close()

    def reload(self) -> list[str]:
        """Read the settings again, and go on with them; what is wrong with them, a line each.  Any thread."""
        with self.reloading:
            self.supervisor.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            faults: list[str] = []
            try:
                settings = self.settings.again(self.settings)
            except SettingsError as error:
                faults = list(error.lines)
            except Exception as error:  # a fault of ours is no reason to end
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

    def _close(self) -> None:
        """Let go of everything, also where the start failed."""
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
        self.handover.close()  # after the listeners: who finds no name listens there itself
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one more changes nothing now
        signal.set_wakeup_fd(-1)
        self.supervisor.close()
        self.selector.close()
        self.pipe.close()

def dump(router: Router) -> None:
    """Log what there is, at most DUMP_MAX of a kind and whatever --log-level: somebody asked for it.  The loop."""
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
