"""sniroute_tunnels: names that have a tunnel: their states, leases, waiting, and the reaper's turn.

    router's threads               `lock`, and a Condition of it       thread `reaper`
                                   for each tunnel
    ----------------               ----------------------------        ---------------
    loop:   lease / release  ----(no lock: see "Leases")---->  idle stop, eviction
    wait-n: wait(key)  ------->  tunnels: key -> Tunnel  <----  step(): decide, start, look, stop, hear
                                             |  child
                                           Child, Process       of sniroute_processes

A tunnel is a name, `scheme:argument`, where the scheme is a launcher's.  Most of the time it has a Child: a
local port on which a process listens for it.  `Tunnel.state` is always one word:

    QUEUED    -> STARTING  its turn has come         -> (absent)  nobody waits for it any more
    STARTING  -> READY     it listens                -> QUEUED    no port is free, its port was taken,
                                                                  or its process died by no fault of its own
              -> FAILED    remembered in `failures`, refused from memory: 5 s at first, 300 s at last
    READY     -> STOPPING  idle, evicted, doubted    -> BACKOFF   its process died
    BACKOFF   -> STARTING  it was in use: once `until` has come   -> FAILED  it was not in use, or made room
    STOPPING  -> READY     a lease came first        -> QUEUED    somebody waits   -> FAILED  nobody waits

Besides: `stop` and `close` move a STARTING or READY tunnel to STOPPING; a QUEUED or BACKOFF one goes at once.  Any
tunnel whose process cannot be killed becomes FAILED.  A row in state FAILED is not in `tunnels` any more.

Threads.  The thread `reaper` does everything that can block or that touches a process; it runs `step` in a
loop.  Threads named `wait-<n>` sleep in `wait`.  The router's loop calls `lease`, `release`, `words` and
`Child.alive`, which never block.  Any thread may look and steer: it calls `snapshot`, `failed`, `stop`,
`wait`, `adopt` and `wake`, reads `counters` and `started`, and may assign `retiring`.

The lock.  `TunnelTable.lock` guards `tunnels`, `failures`, `budget`, `closing`, and of each Tunnel `state`,
`child`, `waiters` and `doubts`.  Two kinds of reads go without it: the loop's (see "Leases"), and those of a
Child's `close_at` and `refusals`, which only the reaper writes.
The lock is never held across a fork, a kill or a bind.  Only `_doubt` asks the kernel something while it holds
the lock: whether a process lives, and how many clients wait for it.
The reaper claims a row under the lock, works without it, and publishes the result under it.
Each change of state goes through `_enter`, which notifies `Tunnel.changed`, a Condition of that lock.  Only
`wait` and what it calls sleep on it.  Each tunnel has a Condition of its own: a common one would wake 32
threads for each change of any tunnel.  While 500 cold names start, that took a quarter of a core, and the
loop waited for it.

Leases.  A connection holds a lease on its tunnel, so that the tunnel is not stopped for being idle.  The loop
takes a lease without the lock.  At that instant the reaper, or a thread that doubts, may be about to stop the
same tunnel.  So both sides write first and look second: the loop adds one to `leases`, then reads `state`; the
other side sets `state`, then reads `leases`.  Whatever the order, at least one of them sees the other, and
takes its own step back.  Where both step back, the tunnel is READY again and the loop's client has no lease: it
goes to `wait`, which returns at once.  Only the loop writes `leases`.

Standing.  Where the far end of a tunnel has to dial in (a Launcher that `stands`), its process has to listen before a
client comes.  Such tunnels are named by `stand`, and started by the reaper: at first, and each time they are gone.  As
long as they are named they are neither idle nor evicted; afterwards they go with their last lease, whoever is dialled
in.  max_tunnels holds for them, too: the first of them stand.

Seams: I want to ...
    run another tunnel program     a Launcher row (sniroute_launchers): this room knows nothing of cloudflared
    wait, retry or forget later    a constant below
    run processes of another kind  a Guest: sniroute_commands has one
    test without waiting           `clock` and `jitter` are arguments; `step()` is one turn of the reaper

This room imports sniroute_launchers, sniroute_processes, sniroute_ports, sniroute_host, sniroute_scarcity,
sniroute_log, WakePipe and WAIT_LAST of
sniroute_loop, and the standard library.  It knows nothing of routes or TLS.
"""

from __future__ import annotations

import collections
import errno
import itertools
import logging
import os
import random
import threading
import time
from typing import Callable, Mapping, NamedTuple, Protocol, Sequence

from sniroute_host import shortage
from sniroute_launchers import TAKEN, Launcher, Reason, TunnelError, TunnelKey
from sniroute_log import log, log_event
from sniroute_loop import CAPACITY_ERRNOS, WAIT_LAST, WakePipe
from sniroute_ports import PortPool, leaves_waiting, listens
from sniroute_processes import LOST, NO_FAULT, OWN_FAULT, POLL, STOP_GRACE, Child, Ends, Link, Process, Processes
from sniroute_scarcity import SHORT_OF_MEMORY, Paced, outlast, ran_out

__version__ = "0.1.0"

# Limits and times (seconds), each with its reason.
RETRY = 0.1  # after a fault of the reaper: it must not spin
SHORT_RETRY = 0.5  # until a tunnel that is to stand is tried again where this host was short of something
REAPER_NAP = 0.005  # between two turns while names queue: each costs as much as there are tunnels
POLL_LAST = 0.2  # between two looks at a child that takes long to start: a look may read /proc/net, up to 7 ms
PORT_TRIES = 5  # starts on another port after "address already in use"
FAILURE_FIRST, FAILURE_LAST = 5.0, 300.0  # how long a failed start is refused from memory
FAILURES_KEPT = 1024  # remembered failures, oldest out: names come from strangers
BACKOFF_FIRST, BACKOFF_LAST = 1.0, 60.0  # before a tunnel that died in use is started again
HEALTHY = 60.0  # a tunnel that lived this long starts its back-off from the beginning
DOUBT_FIRST, DOUBT_LAST = 5.0, 300.0  # youngest age at which doubt restarts a process
EVICT_AGE = 1.0  # a tunnel this fresh is not evicted: its client is on the way
STARTS_BURST, STARTS_REFILL = 8, 1.0  # starts one client address may ask for: burst, per second
BUDGETS_KEPT = 4096  # client addresses with a start budget, least recent out
STARTS_KEPT = 1024  # starts remembered, so that the metrics can tell how long they took

QUEUED, STARTING, READY = "queued", "starting", "ready"
STOPPING, BACKOFF, FAILED = "stopping", "backoff", "failed"
MAKE_ROOM = "to make room"
FOR_EVER = float("inf")
LIVE = frozenset((STARTING, READY, STOPPING))  # the states that have, or are given, a process


class StartBudget:
    """Cold starts that each client address may still ask for: a token bucket, LRU-bounded."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()

    def spend(self, client: str | None) -> bool:
        """Whether this client may start one more; None is a client without a budget."""
        if client is None:
            return True
        now = self.clock()
        tokens, then = self.buckets.pop(client, (float(STARTS_BURST), now))
        tokens = min(STARTS_BURST, tokens + (now - then) * STARTS_REFILL)
        allowed = tokens >= 1
        self.buckets[client] = (tokens - allowed, now)
        if len(self.buckets) > BUDGETS_KEPT:
            self.buckets.popitem(last=False)
        return allowed


class Failure(NamedTuple):
    """A start that failed, remembered."""

    until: float  # clock time; before it the name is refused
    count: int  # starts in a row that failed
    reason: Reason


class Start(NamedTuple):
    """A tunnel that became ready."""

    key: TunnelKey
    when: float  # wall-clock time
    seconds: float  # from its start until it listened


class View(NamedTuple):
    """A tunnel, or the memory of one that failed, as it is at one moment.  Times are in seconds."""

    key: TunnelKey
    state: str  # of the Tunnel; FAILED: refused from memory
    leases: int  # connections
    port: int  # 0 without a process
    pid: int
    waiters: int  # threads that wait for it
    age: float  # in this state; 0 for FAILED
    next: float  # until it is started again (BACKOFF), may be (FAILED), or is stopped (READY and unused); else 0
    crashes: int  # deaths in a row; FAILED: starts in a row that failed
    words: str  # FAILED: why; else the last words of its process, or of the one before
    link: Link | None = None  # its far end, where that has dialled in
    stands: bool = False  # it is one whose far end has to dial in


class Tunnel:
    """One name and, most of the time, the child that serves it."""

    __slots__ = ("key", "changed", "state", "child", "leases", "last_used", "waiters", "since", "until", "idle",
                 "crashes", "failures", "doubts", "tries", "reason")

    def __init__(self, key: TunnelKey, now: float, lock: threading.RLock):
        self.key = key
        self.changed = threading.Condition(lock)  # of the table's lock; notified when `state` changes
        self.state = QUEUED
        self.child: Child | None = None
        self.leases = 0  # written by the loop only
        self.last_used = now  # written by the loop; before it is READY, by the reaper
        self.waiters = 0  # threads in wait()
        self.since = now  # when this state began
        self.until = 0.0  # BACKOFF: when to start again
        self.idle: float | None = None  # how long it may be unused, as its last client's route says; None: the table's
        self.crashes = 0  # deaths in a row, each within HEALTHY
        self.failures = 0  # starts in a row that failed
        self.doubts = 0  # restarts in a row because a client got no answer
        self.tries = 0  # in this start: ports found taken, and processes that died by no fault of its own
        self.reason = Reason()  # FAILED: why

    def next(self, now: float, idle: float) -> float:
        """Seconds until it is started again or stopped, 0 where neither is due; `idle`: how long it may be unused."""
        if self.state is BACKOFF:
            return max(0.0, self.until - now)
        if self.state is READY and not self.leases and idle < FOR_EVER:
            return max(0.0, self.last_used + idle - now)
        return 0.0


class Limits(Protocol):
    """The settings that `TunnelTable.adopt` takes over.  Times are in seconds."""

    idle: float  # how long a tunnel may be unused
    start_timeout: float  # how long a start may take
    max_tunnels: int
    max_starting: int  # of those, how many at a time


class Guest(Protocol):
    """Something else that has processes: they are started, and stopped, in the reaper's turn."""

    def step(self, now: float, closing: str) -> None:
        """Do what is due (clock time).  Once the table is `closing`, end all that there is, and begin nothing."""

    def due(self, now: float) -> list[float]:
        """The clock times at which `step` has something to do."""


class TunnelTable:
    """All tunnels, and the thread that runs their processes.

    `launchers` maps a scheme to its row; a key is `scheme:argument`.  Times are in seconds.
    `proc` is whether this system tells who listens (/proc).  Without it a child is ready once anybody
    listens on its port: whose listener that is cannot be told.
    """

    def __init__(self, launchers: Mapping[str, Launcher], ports: tuple[int, int] = (20000, 20100), *,
                 idle: float = 300.0, start_timeout: float = 15.0, max_tunnels: int = 101,
                 max_starting: int = 4, clock: Callable[[], float] = time.monotonic,
                 jitter: Callable[[], float] = random.random, proc: bool = os.path.exists("/proc/self/net/tcp")):
        self.launchers = launchers
        self.idle = idle
        self.start_timeout = start_timeout
        self.max_tunnels = max_tunnels
        self.max_starting = max_starting
        self.clock = clock
        self.jitter = jitter
        self.proc = proc
        self.lock = threading.RLock()  # see "The lock" at the top
        self.crowded = False  # names wait for their turn to start; reaper only
        # What is to stand, by who wants it; under the lock.  Of it as many as may, in order: replaced as a whole.
        self.wanted: dict[str, Sequence[TunnelKey]] = {}
        self.standing: dict[TunnelKey, None] = {}
        self.tunnels: dict[TunnelKey, Tunnel] = {}
        self.failures: collections.OrderedDict[TunnelKey, Failure] = collections.OrderedDict()
        self.budget = StartBudget(clock)
        self.retiring = False  # the router drains: a tunnel that nobody uses is stopped; written by the main thread
        self.closing = ""  # "" -> "drain" (TERM first) -> "now" (KILL)
        self.pipe = WakePipe()  # ends the reaper's wait
        self.guest: Guest | None = None  # written by the loop, once
        # The rest belongs to the reaper; `words` looks whether a child is among `children`.
        self.pool = PortPool(*ports, clock=clock)
        self.processes = Processes(self, self.pipe, clock)
        self.children: dict[Child, Tunnel] = {}
        self.counters: collections.Counter[str] = collections.Counter()
        self.started: collections.deque[Start] = collections.deque(maxlen=STARTS_KEPT)
        self.reaper = threading.Thread(target=reap, args=(self,), name="reaper", daemon=True)

    # -- main thread ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the reaper."""
        self.reaper.start()

    def close(self, now: bool = False) -> None:
        """Stop every tunnel and wait until no process is left.  A second call may hurry it (`now`)."""
        with self.lock:
            self.closing = "now" if now else self.closing or "drain"
            for tunnel in self.tunnels.values():
                tunnel.changed.notify_all()  # those in wait() find `closing`
            self.wake()
        if self.reaper.ident is not None:
            self.reaper.join()

    def adopt(self, settings: Limits) -> None:
        """Take over the settings that a reload may change; tunnels that run are held to them, too.  Any thread."""
        self.idle, self.start_timeout = settings.idle, settings.start_timeout
        self.max_tunnels, self.max_starting = settings.max_tunnels, settings.max_starting
        self.wake()  # a tunnel may be due sooner than the reaper thinks

    # -- the loop: nothing here blocks ---------------------------------------------------------

    def lease(self, key: TunnelKey) -> Tunnel | None:
        """A lease on a ready tunnel; None where there is none, then a thread has to `wait`.  See "Leases"."""
        tunnel = self.tunnels.get(key)
        if tunnel is None or tunnel.state is not READY:
            return None
        tunnel.leases += 1
        if tunnel.state is not READY:
            tunnel.leases -= 1
            return None
        return tunnel

    def release(self, tunnel: Tunnel, idle: float | None = None) -> None:
        """Give a lease back.  `idle`: how long the tunnel may be unused from now on; None: as long as any."""
        tunnel.last_used = self.clock()
        tunnel.leases -= 1
        if idle != tunnel.idle:
            tunnel.idle = idle
            self.wake()  # it may be due sooner than the reaper thinks

    def wake(self) -> None:
        """Make the reaper look at the table now.  Any thread."""
        self.pipe.wake()

    # -- threads wait-<n> ----------------------------------------------------------------------

    def wait(self, key: TunnelKey, client: str | None, deadline: float, doubted: Child | None = None,
             idle: float | None = None) -> None:
        """Sleep until the tunnel `key` is ready; have it started if need be.

        A cold start is charged to `client` (None: to nobody).  `deadline` is a clock time, `idle` as for `release`.
        `doubted` is a child that was ready and gave no answer: it is restarted where it is dead or
        hung, or serves nobody else; otherwise it is left alone.  Raises TunnelError.
        """
        with self.lock:
            tunnel = self._demand(key, client)
            if idle is not None:
                tunnel.idle = idle
            tunnel.waiters += 1
            self.wake()
            try:
                if doubted is not None:
                    self._doubt(tunnel, doubted, client)
                while tunnel.state is not READY:
                    if self.closing:
                        raise TunnelError("stopping", "sniroute is stopping")
                    if tunnel.state is FAILED:
                        raise TunnelError(tunnel.reason.kind, tunnel.reason.text)
                    remaining = deadline - self.clock()
                    if remaining <= 0 or tunnel.state is BACKOFF and tunnel.until > deadline:
                        raise TunnelError("timeout", f"{key} was not ready in time (it is {tunnel.state})")
                    tunnel.changed.wait(remaining)
            finally:
                tunnel.waiters -= 1

    def _demand(self, key: TunnelKey, client: str | None) -> Tunnel:
        """The row for `key`, made where there is none.  Under the lock."""
        if self.closing:
            raise TunnelError("stopping", "sniroute is stopping")
        tunnel = self.tunnels.get(key)
        if tunnel is not None:
            return tunnel
        now = self.clock()
        failure = self.failures.get(key)
        if failure and failure.until > now:
            raise TunnelError(failure.reason.kind, f"{failure.reason.text}; next try in {failure.until - now:.0f} s")
        rows = self.tunnels.values()
        full = len(rows) >= self.max_tunnels
        if full and in_use(self) >= self.max_tunnels:
            raise TunnelError("limit", f"all {self.max_tunnels} tunnels are in use: raise --max-tunnels")
        if not self.budget.spend(client):
            raise TunnelError("budget", f"{client} asked for too many cold tunnels: wait a few seconds")
        unwanted = [t for t in rows if t.state is BACKOFF and not t.waiters and t.key not in self.standing] \
            if full else []
        if unwanted:  # else those that nobody waits for would pile up
            self._retire(min(unwanted, key=lambda t: t.since), MAKE_ROOM, "evictions")
        tunnel = self.tunnels[key] = Tunnel(key, now, self.lock)
        tunnel.failures = failure.count if failure else 0
        return tunnel

    def _doubt(self, tunnel: Tunnel, child: Child, client: str | None) -> None:
        """`child` gave no answer: have it restarted where that may help.

        That is where its process is hung (with all that it carries), or where nobody uses it and it is so
        old that a fresh start may help.  A client can make a good tunnel look bad: so a restart is charged to
        that client, and a child that has worked has to be older.
        Called under the lock, and releases it while it waits.
        """
        if tunnel.child is not child or tunnel.state is not READY:
            return  # another thread has had it restarted already
        if not child.alive():  # dead or dying, and the reaper is about to find out
            if tunnel.changed.wait_for(lambda: self.closing or tunnel.child is not child or tunnel.state is not READY,
                                       STOP_GRACE):
                return
        if child.proven:
            tunnel.doubts = 0
        age = DOUBT_LAST if child.proven else min(DOUBT_LAST, DOUBT_FIRST * 2 ** min(tunnel.doubts, 16))
        hung = not child.process.is_full(self.clock()) and leaves_waiting(
            child.address[1], lambda seconds: tunnel.changed.wait_for(lambda: self.closing, seconds))
        # One whose far end is there works: a fresh start would part them.
        if hung or not tunnel.leases and child.link is None and self.clock() - child.ready >= age:
            if tunnel.child is child and tunnel.state is READY and self.budget.spend(client):
                self._enter(tunnel, STOPPING)
                if tunnel.leases and not hung:  # the loop was first: see "Leases"
                    self._enter(tunnel, READY)
                    return
                if hung:
                    child.process.verdict = "it leaves its clients waiting"
                log_event(logging.WARNING, "tunnel gives no answer: it is started again", tunnel=str(tunnel.key))
                tunnel.doubts += 1

    # -- any thread ----------------------------------------------------------------------------

    def snapshot(self) -> list[View]:
        """Every tunnel."""
        with self.lock:
            now = self.clock()
            rows = [(t.child, View(t.key, t.state, t.leases, 0, 0, t.waiters, now - t.since,
                                   t.next(now, may_idle(self, t)), t.crashes, t.reason.text,
                                   t.child and t.child.link, self.launchers[t.key.launcher].stands))
                    for t in self.tunnels.values()]
        views = []
        for child, view in rows:
            if child is not None:
                process = child.process
                said = "" if process.shared else process.launcher.reason(process.tail).text
                view = view._replace(port=child.address[1], pid=process.pid, words=said or view.words)
            views.append(view)
        return views

    def failed(self) -> list[View]:
        """Every start that failed and is refused from memory."""
        with self.lock:
            now = self.clock()
            return [View(key, FAILED, 0, 0, 0, 0, 0.0, failure.until - now, failure.count, failure.reason.text,
                         stands=self.launchers[key.launcher].stands)
                    for key, failure in self.failures.items() if failure.until > now]

    def stop(self, key: TunnelKey) -> bool:
        """Stop a tunnel and its connections, or forget that its start failed: an operator asks for it.

        The next client starts it again, or one that waits for it now.  Returns whether there was anything
        to stop or to forget.
        """
        with self.lock:
            failure, tunnel = self.failures.pop(key, None), self.tunnels.get(key)
            state = tunnel.state if tunnel is not None else None
            if state in (READY, STARTING):
                self._enter(tunnel, STOPPING)
            elif state in (QUEUED, BACKOFF):
                self._remove(tunnel)
        if state is not None and state is not STOPPING:
            log_event(logging.INFO, "tunnel is stopped", tunnel=str(key), reason="an operator asked for it")
        if failure is not None:
            log_event(logging.INFO, "failed start forgotten", tunnel=str(key), reason="an operator asked for it")
        return failure is not None or tunnel is not None

    def words(self, child: Child, since: float, port: int) -> Reason:
        """Why the client that connected to a child from `port` after `since` (clock time) was not served.

        Where the program does not say that: why it ended, or else what it has said to anybody after `since`.
        """
        when, refusal = child.refusals.get(f"127.0.0.1:{port}", (0.0, Reason()))
        if refusal.text and when >= since:  # else it was for a client that had this port before
            return refusal
        if child not in self.children:
            return child.verdict
        process = child.process
        return Reason() if process.shared or process.said < since else process.launcher.reason(process.tail)

    # -- the reaper ----------------------------------------------------------------------------

    def step(self, timeout: float | None = 0.0) -> None:
        """One turn: decide, act, look at what happened.  None waits until something is due."""
        now = self.clock()
        spawn, stop = self._decide(now)
        try:
            if spawn is not None:
                self._spawn(spawn, now)
        except BaseException:
            with self.lock:
                if spawn.state in (STARTING, STOPPING) and spawn.child is None:  # an operator may have stopped it
                    self._enter(spawn, QUEUED)  # the fault must not lose a tunnel that was claimed
            raise
        for tunnel, why in stop:
            self.processes.stop(tunnel.child, why, now)
        for child, tunnel in list(self.children.items()):
            if child.process.kill_at:
                continue  # it ends with its process
            if tunnel.state is STARTING and not child.close_at and time.monotonic() >= child.look_at:
                child.pause = min(POLL_LAST, child.pause * 1.1)
                self._look(child, tunnel, now)
                child.look_at = time.monotonic() + child.pause
        if self.guest is not None:
            self.guest.step(now, self.closing)
        self.processes.tend(now, self.closing == "now")
        self.processes.turn(self._timeout(self.clock()) if timeout is None else timeout)

    def _decide(self, now: float) -> tuple[Tunnel | None, list[tuple[Tunnel, str]]]:
        """What is to be started, and what is to be stopped and why ('' is no failure)."""
        spawn: Tunnel | None = None
        stop: list[tuple[Tunnel, str]] = []
        with self.lock:
            raise_standing(self, now)
            for tunnel in list(self.tunnels.values()):
                state = tunnel.state
                if self.closing and state in (QUEUED, BACKOFF) or not is_wanted(self, tunnel) and (
                        state is QUEUED or state is BACKOFF and self.launchers[tunnel.key.launcher].stands):
                    del self.tunnels[tunnel.key]  # nobody waits for it any more
                elif self.closing and state is not STOPPING:
                    self._enter(tunnel, STOPPING)
                elif state is READY and not tunnel.leases and not tunnel.waiters \
                        and now - tunnel.last_used >= (idle := may_idle(self, tunnel)):
                    self._retire(tunnel, f"idle for {idle:g} s" if idle or self.retiring
                                 else "nothing leads there any more", "idle_stops")
                elif state is STARTING and tunnel.child and now - tunnel.child.started >= self.start_timeout:
                    stop.append((tunnel, f"it did not listen within {self.start_timeout:g} s"))
                if tunnel.state is STOPPING and tunnel.child:
                    stop.append((tunnel, ""))
            rows = self.tunnels.values()
            due = [t for t in rows if t.state is QUEUED or t.state is BACKOFF and t.until <= now]
            if due and not self.closing and sum(t.state is STARTING for t in rows) < self.max_starting:
                live = sum(t.state in LIVE for t in rows)
                if live < self.max_tunnels and (self.pool.free or self.pool.next_free() <= now):
                    # one; the next in the next turn: many that start in one instant stop everything else
                    spawn = min(due, key=lambda t: (not t.waiters, t.since))
                    self._enter(spawn, STARTING)
                elif any(is_wanted(self, t) for t in due):
                    stop += self._evict(now)
            self.crowded = len(due) > 1
        return spawn, stop

    def _evict(self, now: float) -> list[tuple[Tunnel, str]]:
        """Make room for a name that waits: stop the tunnel that has been idle longest."""
        rows = self.tunnels.values()
        if any(t.state is STOPPING for t in rows):
            return []  # it will make room
        idle = [t for t in rows if t.state is READY and not t.leases and not is_wanted(self, t)
                and now - t.last_used >= EVICT_AGE]
        for tunnel in sorted(idle, key=lambda t: t.last_used):
            if self._retire(tunnel, MAKE_ROOM, "evictions"):
                return [(tunnel, "")]
        return []

    def _retire(self, tunnel: Tunnel, why: str, counter: str) -> bool:
        """Stop a tunnel that has no process, or no lease, unless the loop takes one at this instant."""
        if tunnel.state is BACKOFF:
            self._remove(tunnel)
        else:
            self._enter(tunnel, STOPPING)
            if tunnel.leases:  # the loop was first: see "Leases"
                self._enter(tunnel, READY)
                return False
        self.counters[counter] += 1
        log_event(logging.INFO, "tunnel stopped", tunnel=str(tunnel.key), reason=why)
        return True

    def _enter(self, tunnel: Tunnel, state: str) -> None:
        """Change a state.  Under the lock; wakes those in wait(), and the reaper: it may have room now."""
        tunnel.state = state
        tunnel.since = self.clock()
        tunnel.changed.notify_all()
        self.wake()

    def _timeout(self, now: float) -> float | None:
        """Seconds until something is due, None for nothing."""
        due = self.processes.due(now) + (self.guest.due(now) if self.guest is not None else [])
        with self.lock:
            rows = list(self.tunnels.values())
            due += [self.failures[key].until for key in self.standing
                    if key in self.failures and self.failures[key].until > now]
        wanted = False
        for tunnel in rows:
            if tunnel.state is STARTING and tunnel.child and not tunnel.child.close_at:
                due += [now + max(0.0, tunnel.child.look_at - time.monotonic()),
                        tunnel.child.started + self.start_timeout]
            elif tunnel.state is READY and not tunnel.leases and not tunnel.waiters:
                due.append(tunnel.last_used + may_idle(self, tunnel))
            elif tunnel.state is READY:
                due.append(now + max(POLL_LAST, may_idle(self, tunnel)))  # releases do not wake the reaper: look again
            elif tunnel.state is BACKOFF and tunnel.until > now:
                due.append(tunnel.until)
            elif tunnel.state in (QUEUED, BACKOFF):
                due.append(now + EVICT_AGE)  # it waits for its turn, for an eviction, or for its waiters to give up
                wanted = wanted or is_wanted(self, tunnel)
        if wanted:  # perhaps for a port
            due.append(max(self.pool.next_free(), now + POLL))
        return min(max(0.0, min(due) - now), WAIT_LAST) if due else None

    def _spawn(self, tunnel: Tunnel, now: float) -> None:
        """Find a port and a process for a tunnel that was claimed (STARTING)."""
        scheme, hostname, identified, _ = tunnel.key
        launcher = self.launchers[scheme].row(tunnel.key)
        process = self.processes.with_room(launcher, identified)
        port = None
        try:
            program = launcher.find() if process is None else ""
            port = self.pool.take()
            if port is None:  # all are in use, or others hold them
                with self.lock:
                    self._enter(tunnel, QUEUED)
                return
            if process is None:
                process = self.processes.launch(
                    launcher, identified, [program, *(launcher.shared or launcher.argv(hostname, port))])
                self.counters["processes"] += 1
        except (OSError, TunnelError) as error:
            if port is not None:
                self.pool.give(port)
            number = getattr(error, "errno", None)
            # The host's fault, not the name's.  EAGAIN: fork(2) found no task for it.
            self._failed(tunnel, Reason(text=shortage(error) if number == errno.EAGAIN else str(error)), remember=False,
                         soon=number == errno.EAGAIN or number in CAPACITY_ERRNOS)
            return
        except BaseException:
            if port is not None:
                self.pool.give(port)
            raise
        child = process.seat(port, now)
        self.children[child] = tunnel
        self.counters["starts"] += 1
        with self.lock:
            tunnel.child = child
        process.listen(child, launcher.told(tunnel.key))
        log.debug("tunnel %s starts on port %d (pid %d)", tunnel.key, port, process.pid)

    def _look(self, child: Child, tunnel: Tunnel, now: float) -> None:
        """Whether a starting child listens by now."""
        found = "own"  # it has said so
        if not child.process.shared:
            found = listens(child.process.pid, child.address[1], self.proc)
        if found == "other":
            self.processes.stop(child, f"{TAKEN} by another process", now)
        if found != "own" or not child.alive():
            return
        with self.lock:
            if tunnel.state is not STARTING:
                return  # an operator has stopped it
            self.failures.pop(tunnel.key, None)
            child.ready = tunnel.last_used = self.clock()
            tunnel.tries = tunnel.failures = 0
            self._enter(tunnel, READY)
        self.counters["ready"] += 1
        self.started.append(Start(tunnel.key, time.time(), child.ready - child.started))
        log_event(logging.INFO, "tunnel ready", tunnel=str(tunnel.key), address=child.listener,
                  seconds=round(child.ready - child.started, 3), pid=child.process.pid)

    # -- the reaper, told by Processes -----------------------------------------------------------

    def closed(self, child: Child, reason: Reason) -> None:
        """A listener of a shared process is gone, or there never was one."""
        tunnel, state = self._vacate(child)
        self._settle(child, tunnel, state, NO_FAULT if TAKEN in reason.text else OWN_FAULT)

    def linked(self, child: Child, error: str) -> None:
        """The far end of a tunnel has dialled in, or has gone."""
        tunnel = str(self.children[child].key)
        if child.link is not None:
            self.counters["links"] += 1
            log_event(logging.INFO, "far end has dialled in", tunnel=tunnel, client=child.link.client)
        else:
            log_event(logging.INFO, "far end has gone", tunnel=tunnel, **({"reason": error} if error else {}))

    def exited(self, process: Process, ends: Ends) -> None:
        """A process has ended, or does not die and is given up."""
        gone = [(child, *self._vacate(child), fault) for child, fault in ends]
        for child, tunnel, state, fault in gone:
            self._settle(child, tunnel, state, fault)

    def _vacate(self, child: Child) -> tuple[Tunnel, str]:
        """Part a tunnel from its child, which is gone, and give the port back.  The tunnel, and the state it had."""
        tunnel = self.children.pop(child)
        self.pool.give(child.address[1])
        with self.lock:
            state = tunnel.state  # under the lock: a thread in wait() may have begun to doubt it
            tunnel.child = None
            if state is READY:
                self._enter(tunnel, BACKOFF)  # now, before the numbers of its descriptors can mean another process
        return tunnel, state

    def _settle(self, child: Child, tunnel: Tunnel, state: str, fault: str) -> None:
        """Decide what becomes of a tunnel whose child is gone: by the `state` it had, and by whose `fault` it was."""
        if fault is LOST:
            with self.lock:
                self._remove(tunnel)
        elif state is STARTING and fault is NO_FAULT and tunnel.tries < PORT_TRIES and not self.closing:
            log_event(logging.INFO, "tunnel did not start: it is tried again", tunnel=str(tunnel.key),
                      reason=child.verdict.text)
            with self.lock:
                tunnel.tries += 1
                self._enter(tunnel, QUEUED)
        elif state is STARTING:
            self._failed(tunnel, child.verdict)
        elif state is READY:
            self._crashed(tunnel, child)
        else:
            with self.lock:
                if tunnel.waiters and not self.closing:
                    self._enter(tunnel, QUEUED)
                else:
                    self._remove(tunnel)

    def _failed(self, tunnel: Tunnel, reason: Reason, remember: bool = True, soon: bool = False) -> None:
        """A start failed: those who wait are told, and the name is refused for a while (`remember`).

        `soon`: this host was short of something, so one that is to stand is tried again soon, however often that fails.
        """
        known = self.failures.get(tunnel.key)
        tunnel.reason = reason._replace(text=f"{tunnel.key} did not start: {reason.text}")
        self.counters["failures"] += 1
        with self.lock:
            remember = remember or tunnel.key in self.standing  # else it would be started again at once
            if remember and soon:
                wait, count = SHORT_RETRY, tunnel.failures
            elif remember:
                count = tunnel.failures + 1
                wait = min(FAILURE_LAST, FAILURE_FIRST * 2 ** min(tunnel.failures, 16)) * (0.5 + self.jitter() / 2)
            if remember:
                self.failures[tunnel.key] = Failure(self.clock() + wait, count, tunnel.reason)
                self.failures.move_to_end(tunnel.key)
                if len(self.failures) > FAILURES_KEPT:
                    self.failures.popitem(last=False)
            self._remove(tunnel)
        if soon and known is not None and known.reason == tunnel.reason:
            return  # it has been said
        log_event(logging.WARNING, "tunnel did not start", tunnel=str(tunnel.key), reason=reason.text,
                  **({"next": round(wait)} if remember else {}))

    def _remove(self, tunnel: Tunnel) -> None:
        """Take a row out; those who still wait for it read FAILED.  Under the lock."""
        if self.tunnels.get(tunnel.key) is tunnel:  # an operator may have removed it, and a client made a new one
            del self.tunnels[tunnel.key]
        if not tunnel.reason.text:
            tunnel.reason = Reason(text=f"{tunnel.key} was stopped")
        self._enter(tunnel, FAILED)

    def _crashed(self, tunnel: Tunnel, child: Child) -> None:
        """A ready child ended by itself: if it was in use it is started again, after a pause that grows."""
        self.counters["crashes"] += 1
        if self.clock() - child.ready >= HEALTHY:
            tunnel.crashes = 0
        wait = min(BACKOFF_LAST, BACKOFF_FIRST * 2 ** min(tunnel.crashes, 16)) * self.jitter()
        tunnel.crashes += 1
        with self.lock:
            if tunnel.leases or is_wanted(self, tunnel):
                tunnel.until = self.clock() + wait
                fate = f"starting it again in {wait:.1f} s"
            else:
                self._remove(tunnel)
                fate = "the next client starts it again"
        log_event(logging.WARNING, "tunnel ended", tunnel=str(tunnel.key), reason=child.verdict.text, then=fate)


# -- what is kept up ---------------------------------------------------------------------------


def stand(table: TunnelTable, source: str, keys: Sequence[TunnelKey]) -> None:
    """Keep these tunnels up from now on, instead of those that `source` wanted before.  Any thread."""
    if not keys and source not in table.wanted:
        return  # as for most claims: they need not wait for the lock
    with table.lock:
        table.wanted[source] = keys
        if not keys:
            del table.wanted[source]
        every = dict.fromkeys(itertools.chain.from_iterable(table.wanted.values()))
        table.standing = dict.fromkeys(itertools.islice(every, table.max_tunnels))
    table.wake()


def raise_standing(table: TunnelTable, now: float) -> None:
    """Have each tunnel started that is to stand, is not there, and has not just failed.  Reaper, under the lock."""
    for key in table.standing if not table.closing and not table.retiring else ():
        if key in table.tunnels:
            continue
        failure = table.failures.get(key)
        if failure and failure.until > now or len(table.tunnels) >= table.max_tunnels <= in_use(table):
            continue
        tunnel = table.tunnels[key] = Tunnel(key, now, table.lock)
        tunnel.failures = failure.count if failure else 0


def is_wanted(table: TunnelTable, tunnel: Tunnel) -> bool:
    """Whether somebody waits for a tunnel, or it is to stand."""
    return tunnel.waiters > 0 or tunnel.key in table.standing and not table.retiring


def in_use(table: TunnelTable) -> int:
    """How many tunnels do not make room for others."""
    return sum(t.state is STARTING or t.state is READY and t.leases > 0 or t.key in table.standing
               for t in table.tunnels.values())


def may_idle(table: TunnelTable, tunnel: Tunnel) -> float:
    """Seconds that a tunnel may be unused."""
    if table.retiring:
        return 0.0
    if tunnel.key in table.standing:
        return FOR_EVER
    if table.launchers[tunnel.key.launcher].stands:
        return 0.0
    return table.idle if tunnel.idle is None else tunnel.idle


def reap(table: TunnelTable) -> None:
    """The thread `reaper`: turn until the table is closed and no process is left."""
    paced = Paced()

    def step() -> None:
        while not (table.closing and not table.processes.running):
            table.step(None)
            if table.crowded:
                time.sleep(REAPER_NAP)

    def tell(error: Exception) -> None:
        if not isinstance(error, OSError) and not ran_out(error):
            log.exception("a fault in the reaper: please report it")
        elif paced.is_due(SHORT_OF_MEMORY if ran_out(error) else error.strerror or ""):
            # No descriptors left, most likely, or no memory; what was claimed is tried again.
            log.error("tunnels: %s", SHORT_OF_MEMORY if ran_out(error) else error)

    outlast(step, tell, RETRY)  # if this thread ended, every child would end with it
    if table.guest is not None:
        table.guest.step(table.clock(), table.closing)  # what came since the last turn
    table.processes.close()
    with table.lock:
        table.pipe.close()
