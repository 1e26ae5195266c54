"""sniroute_daemon: the main thread of `serve`: start and end, signals, systemd, reload, the hand-over to a successor.

    SIGTERM, SIGINT -----+                                        +--> lameduck, then drain; at a second signal: end now
    SIGHUP --------------+--> bytes in a pipe --+                 +--> reload
    SIGUSR1 -------------+                      +--> Daemon.run --+--> dump what there is into the log
    the loop has ended --+                      |                 +--> close everything
    a successor ------------> one of our names -+                 +--> give it the listening sockets
    the file of settings -----> Watch: it has changed, and rests -+--> reload

    Daemon   the main thread: owns the Router, the TunnelTable, the Supervisor (systemd) and the Handover
    Watch    with --watch: when the file of settings is read again
    dump     counters, tunnels and connections into the log

The start.  Until the handlers are there, the face keeps SIGHUP and SIGUSR1 waiting.  A failure in the steps 1 to 3
leaves a predecessor as it was; so does a host that allows too little for one of them (`shortage`):

    1  get the listening sockets: systemd's, else those of a predecessor
    2  Router: takes these sockets over, and opens those that are missing
    3  import the admin's room, if a setting or systemd asks for it; start the thread `reaper` (TunnelTable.start), the
       registry, if there is one and no predecessor has it, then `loop`, which accepts clients from here on; warn
    4  tell the predecessor to drain; listen on its names, and bind those that are missing
    5  open the admin's addresses (threads `admin`, `admin-<n>`, `public-<n>`), and a predecessor's registry, then tell
       systemd READY=1

The end.  Where --lameduck asks for it, all but /readyz goes on for so long after the signal.  The main thread has the
clock, so that it never hands over listeners that the loop just closes: a successor that comes then gets them, and its
word begins the drain.  The thread `loop` runs until all has drained, or until a second signal.  It stops all tunnels,
which ends `reaper`, and wakes the main thread.  The main thread joins `loop`, and closes the admin, the listeners and
the names, in this order.  The thread `log` begins first and ends last: `serve` owns it.  The threads wait-<n> are the
Router's.

Threads: main, but for three functions.  `dump` runs in the loop, `Daemon._loop` is the thread `loop`, and any thread
may call `Daemon.reload`.  One lock, Daemon.reloading: one reload at a time.

Seams: I want to ...
    react to another signal          a number in SIGNALS, and a branch in Daemon._on_signals
    apply a setting at a reload      Router.adopt or TunnelTable.adopt; `_adopt` calls both
    show more in a dump              `dump`
    start something else             Daemon._start, and in the opposite order Daemon._close

It imports the router, listeners, routes, tunnels, settings, systemd, handover, log, host, loop, scarcity, names and
refusals; sniroute_admin and sniroute_registrar only where they are asked for.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
from typing import Any, Sequence

from sniroute_handover import HANDOVER_MAX, HANDOVER_TIMEOUT, OFFER_AGAIN, Handover
from sniroute_host import Stamp, raise_descriptor_limit, require_descriptors, shortage, stamp
from sniroute_listeners import Listener, arrange, sockets_of, wanted_addresses
from sniroute_log import Journal
from sniroute_loop import CAPACITY_ERRNOS, WAIT_LAST, WakePipe
from sniroute_names import show_address
from sniroute_refusals import SettingsError
from sniroute_router import Hooks, Router, prepare
from sniroute_routes import port_address
from sniroute_scarcity import SHORT_OF_MEMORY, Paced, outlast, ran_out
from sniroute_settings import Settings, warn
from sniroute_systemd import Supervisor, activated_sockets
from sniroute_tunnels import TunnelTable

__version__ = "0.1.0"

log = logging.getLogger("sniroute")
monotonic = time.monotonic

GC_THRESHOLD = 20000  # objects between two searches for cycles: connections leave none
SWITCH_INTERVAL = 0.0005  # seconds that another thread may keep the interpreter while the loop wants it
REGISTRY_WAIT = 5.0  # seconds that a predecessor has to give the registry's address and store away ...
REGISTRY_PAUSE = 0.02  # ... and between two looks
REGISTRY_HOLD = 2.0  # seconds in which a successor that does not know yet what is claimed accepts nobody, for any name
ADOPT_TIMEOUT = 5.0  # seconds for the loop to take over new settings: it does so in its next turn, unless it hangs
DUMP_MAX = 200  # connections in a dump, and as many tunnels
MEMORY_PAUSE = 0.1  # seconds until the main thread goes on where it found no memory, or no descriptor
WATCH_EVERY = 0.25  # seconds between two looks at the file of settings, with --watch: a stat(2) each
WATCH_RESTS = 0.5  # seconds without a change until it is read: an editor, or a copy, may write it in pieces
LOOK_AGAIN = b"\xff"  # in the pipe, where no signal has this number: a reload may have changed how long we wait
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def tune_interpreter() -> None:
    """Set what suits a loop of many short-lived objects.  An interpreter other than CPython may have none of these."""
    # `freeze`: all objects of the start live as long as the process, so the collector need not look at them again.
    for module, name, values in ((sys, "setswitchinterval", (SWITCH_INTERVAL,)),
                                 (gc, "set_threshold", (GC_THRESHOLD,)), (gc, "freeze", ())):
        if hasattr(module, name):
            getattr(module, name)(*values)


def check_handover(addresses: int, ports: int) -> None:
    """Raise SettingsError for more than a successor could be given: so many addresses of --listen, so many ports."""
    if addresses > HANDOVER_MAX // 2:
        raise SettingsError(f"--listen: {addresses} addresses, and only {HANDOVER_MAX // 2} can be handed "
                            "over to a successor: name fewer, or all of them as :PORT")
    if 2 * addresses + ports > HANDOVER_MAX:
        raise SettingsError(f"--port: {ports} ports, and only {HANDOVER_MAX - 2 * addresses} can be handed over "
                            "to a successor: name fewer")


def taken_over(settings: Settings, held: list[socket.socket]) -> list[tuple[str, int]]:
    """The addresses that a predecessor may have sockets for, but for those that are `held` by systemd."""
    here = {sock.getsockname()[:2] for sock in held}
    wanted = wanted_addresses(settings.listen) + wanted_addresses(list(map(port_address, settings.port)), "port")
    return [address for address in wanted if address not in here]


def announce(listeners: list[Listener]) -> None:
    """Log where the router listens, and where the ports lead."""
    for listener in listeners:
        address = show_address(listener.getsockname())
        if listener.decision is None:
            log.info("listening on %s", address)
        else:
            log.info("port %s leads to %s", address, listener.decision.target)


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


class Watch:
    """When the file of settings is to be read again.  Main thread, but for `known`, which a reload in any thread sets.

    A look at the path each WATCH_EVERY, instead of inotify(7): it finds a symlink that is swapped (as Kubernetes does
    with a ConfigMap), a file that takes the place of another (as editors do), and works where files are on a network.
    A file that is gone has a stamp, too: the errno.
    """

    def __init__(self, known: Stamp | int):
        self.known = known  # as the file was when it was last read, or could not be
        self.seen = known  # as it was at the last look
        self.since = 0.0  # when it was first seen so

    def is_due(self, found: Stamp | int, now: float) -> bool:
        """Look: whether the file, whose stamp is `found` now, is another than the one known, and rests."""
        if found != self.seen:
            self.seen, self.since = found, now
        return found != self.known and now - self.since >= WATCH_RESTS


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
        self.registrar: Any = None
        self.router: Router | None = None
        self.thread: threading.Thread | None = None
        self.stopping = False  # it drains: a signal or a successor has asked for it
        self.asked: float | None = None  # when a signal has asked for the end; a second one ends it now
        self.unnamed: list[tuple] = []  # addresses whose name another process has (see Handover): tried again
        self.failed = False  # the loop ended by an exception
        self.watch = Watch(settings.stamp)
        self.faults: list[str] = []  # of the last reload; [] where it has succeeded
        self.reloading = threading.Lock()  # one reload at a time: the admin's threads reload, too
        self.selector = selectors.DefaultSelector()
        self.pipe = WakePipe()
        self.selector.register(self.pipe.reader, selectors.EVENT_READ, self._on_signals)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self.pipe.writer, warn_on_full_buffer=False)
        # Those that came since the face blocked them arrive now.  From here on nothing is blocked, since each thread
        # inherits the mask, and each child that of its thread.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
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
            except (OSError, RuntimeError, MemoryError) as error:
                if not shortage(error):
                    raise
                log.error("%s", shortage(error))
                return 1
            outlast(self._serve, functools.partial(self._short, Paced()), MEMORY_PAUSE)
            return 1 if self.failed else 0
        finally:
            self._close()

    def _serve(self) -> None:
        while self.thread.is_alive():
            self._turn()

    def _short(self, said: Paced, error: Exception) -> None:
        """Inside `except`: say that this host has no descriptor or no memory; anything else is raised again."""
        if not ran_out(error) and getattr(error, "errno", None) not in CAPACITY_ERRNOS:
            raise
        why = SHORT_OF_MEMORY if ran_out(error) else str(error)
        if said.is_due(why):
            log.error("%s", why)

    def _turn(self) -> None:
        """Wait for an event, and act on what there is."""
        for key, _ in self.selector.select(self._patience()):
            if self.selector.get_map().get(key.fd) is key:  # an earlier event may have unregistered it
                key.data(key.fileobj)
        if self._lameduck_left() == 0.0:
            self._drain()
        if self.unnamed and self.handover.successor is None:
            self._offer()
        if self._watches() and self.watch.is_due(stamp(self.settings.config), monotonic()):
            self.reload(said=self.faults)

    def _start(self) -> None:
        """Listen, start the threads, and replace a predecessor.  Raises SettingsError."""
        settings = self.settings
        sockets = activated_sockets(dict(os.environ))
        inherited = [*sockets[""], *sockets["port"]]
        held = sockets_of(settings.port, inherited)
        for sock in sockets["port"]:
            if sock not in held:
                raise SettingsError(f"LISTEN_FDS: {show_address(sock.getsockname())} is called port, and no --port, "
                                    "and no line of [ports], is for this address")
        activated = len(inherited) > len(held)
        if not activated:
            addresses, _ = arrange(settings.listen)
            check_handover(len(addresses), len(settings.port))
            require_descriptors(len(addresses) + len(settings.port))
            inherited += self.handover.take(taken_over(settings, held))
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
        tune_interpreter()
        succeeds = bool(self.handover.predecessors)
        if settings.claims is not None and not succeeds:  # what is claimed already is routed for the first client
            self._serve_registry(alone=True)
        if settings.claims is not None and succeeds:  # its predecessor has what is claimed: nobody is refused meanwhile
            router.hold(REGISTRY_HOLD)
        loop = threading.Thread(target=self._loop, name="loop", daemon=True)
        loop.start()
        self.thread = loop  # only now: a thread that could not start cannot be joined
        warn(settings)
        if router.left_out:
            log.warning("%s", router.left_out)
        announce(router.listeners)
        succeeded = self.handover.dismiss()
        if succeeded:
            log.info("another sniroute listened there: it drains, and ends")
        if activated:
            log.info("systemd holds the sockets: --listen is not used")
        # The ports go with them, and need no name.
        self.unnamed = [] if activated else [
            listener.getsockname()[:2] for listener in router.listeners if listener.decision is None]
        self._offer()
        if self.unnamed:
            log.warning("no successor can take over for now: another process has the name for %s",
                        ", ".join(map(show_address, self.unnamed)))
        if asked:
            self._attach(asked[0], {name: sockets[name][0] for name in asked if sockets[name]}, alone=not succeeded)
        if settings.claims is not None and succeeds:
            self._serve_registry(alone=False)
            router.call(router.admit)
        self.supervisor.ready(router)

    def _attach(self, asked: str, listeners: dict[str, socket.socket], alone: bool) -> None:
        """Open the admin's addresses, or use the `listeners` that systemd has; `asked` is a setting that asks for one.

        Raises SettingsError if we are `alone`.  A successor goes on without: its predecessor drains already.
        """
        import sniroute_admin
        try:
            self.admin = sniroute_admin.attach(self.router, self.settings, listeners, alone)
        except Exception as error:
            short = shortage(error)
            fault = str(error) if isinstance(error, OSError) and not short else f"--{asked}: {short or error}"
            if alone:
                raise SettingsError(fault) from None
            log.error("%s: going on without it", fault)
            return
        for what, where in (("admin", self.admin.address), ("metrics and probes", self.admin.public)):
            if where is not None:
                log.info("%s on %s", what, where if isinstance(where, str) else show_address(where))

    def _serve_registry(self, alone: bool) -> None:
        """Serve the registry.  Raises SettingsError if we are `alone`.  A successor goes on without, as above.

        A predecessor gives address and store away a moment after it was told to drain.  Waits for what the store tells.
        """
        from sniroute_registrar import attach
        deadline = time.monotonic() + REGISTRY_WAIT
        while True:
            claims = self.settings.claims
            try:
                self.registrar = attach(self.router, claims)
                break
            except (OSError, SettingsError) as error:
                if alone:
                    raise SettingsError(str(error)) from None
                if time.monotonic() > deadline:
                    log.error("%s: going on without it", error)
                    return
            time.sleep(REGISTRY_PAUSE)
        if self.settings.claims not in (claims, None):  # the admin has reloaded meanwhile, and found no registry
            self.registrar.adopt(self.settings.claims)
        where = self.registrar.address
        log.info("registry on %s, below %s", where if isinstance(where, str) else show_address(where),
                 ", ".join(self.settings.claims.rules.domains))
        self.registrar.wait_for_store()

    def _close(self) -> None:
        """End the threads and close everything, also after a start that failed."""
        if self.admin is not None:
            self.admin.close()
        if self.registrar is not None:
            self.registrar.close()
        if self.thread is not None:
            self.router.shutdown()
            self.thread.join()
        else:
            self.tunnels.close()
        if self.router is not None:
            self.router.server_close()
            log.info("stopped")
            self.supervisor.farewell(self.router)
        self.handover.close()  # after the listeners: a process that finds no name opens the address itself
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # one more must not interrupt the end: see `serve`
        signal.set_wakeup_fd(-1)
        self.supervisor.close()
        self.selector.close()
        self.pipe.close()

    # -- main thread: signals ------------------------------------------------------------------

    def _on_signals(self, reader: int) -> None:
        """Act on the bytes in the pipe: numbers of signals, 0 for the end of the loop; LOOK_AGAIN only wakes us."""
        numbers = os.read(reader, 64)
        try:
            for number in numbers:
                if number in (signal.SIGTERM, signal.SIGINT):
                    self.stop()
                elif number == signal.SIGUSR1:
                    self.router.call(functools.partial(dump, self.router))
        except Exception:
            self.pipe.wake(numbers)  # none is lost: one that comes twice at worst hurries the end
            raise
        if signal.SIGHUP in numbers:  # last, and once for many: a reload may take a while
            self.reload()
        if 0 in numbers:  # the last act of `_loop`, so this does not wait
            self.thread.join()

    def stop(self) -> None:
        """Serve on for --lameduck, then drain; at a second call, end now."""
        if self.asked is not None:
            self.router.shutdown()
            self.tunnels.close(now=True)
            return
        self.asked = monotonic()
        if self.stopping:
            return
        if not self.settings.lameduck:
            self._drain()
            return
        self.supervisor.tell("STOPPING=1")
        self.router.lameduck(self.settings.lameduck)

    def _lameduck_left(self) -> float | None:
        """For how many seconds new clients are served yet, after a signal; None where it has not come, or we drain."""
        if self.asked is None or self.stopping:
            return None
        return max(0.0, self.asked + self.settings.lameduck - monotonic())

    def _watches(self) -> bool:
        """Whether a change of the file of settings counts."""
        return self.settings.watch and not self.stopping

    def _patience(self) -> float | None:
        """How many seconds `run` may wait for an event."""
        waits = [OFFER_AGAIN] if self.unnamed else []
        waits += [WATCH_EVERY] if self._watches() else []
        left = self._lameduck_left()
        if left is not None:
            waits += left, WAIT_LAST
        return min(waits, default=None)

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
        if self.handover.give(channel, () if self.stopping else self._handed_over()):
            for each in self.handover.names:
                self.selector.unregister(each)
            self.selector.register(channel, selectors.EVENT_READ, self._on_word)

    def _handed_over(self) -> list[Listener]:
        """The listeners that a successor may get.  It opens the claimed ports anew: there may be any number of them."""
        claimed = self.router.claimed_ports
        return [each for each in self.router.listeners
                if each.decision is None or each.decision.route.pattern not in claimed]

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
            if self.registrar is not None:
                self.registrar.close()

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

    def reload(self, said: Sequence[str] = ()) -> list[str]:
        """Read the settings again, and go on with them if they are right.

        Returns what is wrong with them, a line each; then nothing has changed.  These are not logged where they are the
        same as `said`: --watch says them once.
        """
        with self.reloading:
            self.supervisor.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            faults: list[str] = []
            if self.settings.config:
                self.watch.known = stamp(self.settings.config)  # before it is read: a later change is one
            try:
                settings = self.settings.again(self.settings)
                check_handover(sum(each.decision is None for each in self.router.listeners), len(settings.port))
                prepare(settings)
                opened = self.router.ports.open(settings.port)
            except SettingsError as error:
                faults = list(error.lines)
            except OSError as error:
                faults = [shortage(error) or str(error)]
            except Exception as error:  # a fault in our own code must not end a router that serves
                if ran_out(error):
                    faults = [shortage(error)]
                else:
                    log.exception("while reading the settings again: please report it")
                    faults = [repr(error)]
            for fault in faults if faults != said else ():
                log.error("reload: %s", fault)
            if not faults:
                try:
                    self._adopt(settings, opened)
                except Exception as error:
                    if not ran_out(error):
                        raise
                    faults = [f"{SHORT_OF_MEMORY}: not all of it is in use: reload again"]
                    log.error("reload: %s", faults[0])
            elif faults != said:
                log.error("reload: nothing has changed")
            self.faults = faults
            self.router.reloads["failed" if faults else "ok"] += 1
            self.router.last_reload = not faults, time.time()
            self.supervisor.ready(self.router)
            return faults

    def _adopt(self, settings: Settings, opened: dict[str, list[Listener]]) -> None:
        """Hand new settings to all that read them, and the ports that were `opened` to the router."""
        self.settings = settings
        log.setLevel(settings.log_level.upper())
        for line in settings.kept:
            log.warning("reload: %s", line)
        self.tunnels.adopt(settings)
        before = self.router.listeners
        done = threading.Event()
        self.router.call(lambda: (self.router.adopt(settings, opened), done.set()))
        done.wait(ADOPT_TIMEOUT)  # the next reload looks at the ports that are open then
        if self.registrar is not None and settings.claims is not None:
            self.registrar.adopt(settings.claims)
        announce([listener for listener in self.router.listeners if listener not in before])
        for listener in before:
            if listener not in self.router.listeners:
                log.info("%s is closed", listener.decision.route.pattern)
        warn(settings)
        self.pipe.wake(LOOK_AGAIN)
        log.info("reload: done, routes: %d", len(settings.routes.routes))
        if not settings.config:
            log.warning("reload: there is no file of settings to read again; "
                        "options and variables are for the next start")


def serve(settings: Settings) -> int:
    """`sniroute serve`: run until a signal ends it.  Returns the exit code.  Raises what `shortage` can explain."""
    require_descriptors(len(settings.listen) + len(settings.port))
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
