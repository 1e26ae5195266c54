"""sniroute_upstreams: the targets of one end: which is next, where its addresses are, and where we leave from.

    dial(done) --> order ------------> Attempt ---- names ---- connect ----> done(socket)
                   a row of ORDERS     a target after the      Dial          or done(Failed): each target's reason
                                       other, until one takes

An Upstreams has the targets of one URL, `HOST:PORT,HOST:PORT`.  A caller's connection goes to one of them; where that
one takes no connection within NP_TCP_DIAL_TIMEOUT, the next is tried.  `lbs` says which is the first:

    0  in turn       each connection begins one further.  A target that was silent is tried last for REST seconds, or
                     each round would wait for it again
    1  the fastest   the time of a connect is measured: of callers, and of a probe each report interval
    2  the first     the next one where it fails, until that fails.  After NP_FALLBACK_INTERVAL one connection tries the
                     first again, while the others go on with the one that works

Names are resolved in a thread each (KeptNames), and kept for `dns` seconds.  Where the resolver has no answer then, or
none within PATIENCE, the old addresses are used.  The addresses of one host are tried beside each other, as any Dial
does it.  With `dial` all of this leaves from one address of ours (TargetWay); addresses of the other family are left
out.

UDP has no connect that could fail: a datagram socket is connected to the first target whose name resolves, in the same
order and with the same turns.  Its owner tells where that target refuses datagrams (`Attempt.refused`).

Threads: the loop's only, but for the resolver's (sniroute_dial).

Seams: I want to ...
    another order        a function and a row of ORDERS; `Upstreams.worked` and `failed` hear what became of each
    keep names otherwise KeptNames

This room imports sniroute_dial, sniroute_loop, sniroute_names, sniroute_race and sniroute_refusals.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import sys
from typing import TYPE_CHECKING, Callable

from sniroute_dial import Addresses, Dial, Names, WayOut, name_failure, numeric
from sniroute_loop import NEVER, Loop, monotonic, owner_of
from sniroute_names import show_address
from sniroute_race import alternate
from sniroute_refusals import Failed

if TYPE_CHECKING:
    from sniroute_nodeurl import Options, Times

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
REST = 5.0  # a target that was silent is tried last for so long: each connection to it costs its caller a time-out
PATIENCE = 1.0  # for the resolver, where old addresses are at hand: RFC 8767 section 5 allows 1.8
RETRY = 5.0  # old addresses are used for so long before the resolver is asked again: RFC 8767 section 5 has 30 at most
BIND_WITHOUT_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)  # ip(7); Python 3.11 does not name it


# -- names -------------------------------------------------------------------------------------


class KeptNames(Names):
    """The addresses of our targets, kept for `ttl` seconds, and longer where the resolver has none.

    There are as many names as targets, so nothing has to be forgotten.
    """

    def __init__(self, loop: Loop, ttl: float, clock: Callable[[], float] = monotonic):
        super().__init__(loop, clock)
        self.ttl = ttl
        self.silent: set[tuple[str, int]] = set()  # names for which the resolver has had PATIENCE
        self.patience = loop.queue(PATIENCE, self._use_old)

    def keep_address(self, host: str, port: int) -> None:
        """Note a host that is an address: there is nothing to resolve."""
        if addresses := numeric(host, port):
            self.known[host, port] = addresses, NEVER

    def has(self, host: str, port: int) -> bool:
        """Whether the addresses are at hand."""
        return self.known.get((host, port), ([], 0.0))[1] > self.clock()

    def ask(self, host: str, port: int, found: Callable[[Addresses | OSError], None]) -> None:
        place = host, port
        if place in self.silent:
            found(self.known[place][0])
            return
        if place in self.known and place not in self.waiting and not self.has(host, port):
            self.patience.put(place)
        super().ask(host, port, found)

    def _use_old(self, place: tuple[str, int]) -> None:
        """The resolver takes long: serve those who wait with what it said before."""
        self.silent.add(place)
        waiting, self.waiting[place] = self.waiting[place], []
        self._tell(waiting, self.known[place][0])

    def _resolved(self, host: str, port: int, result: Addresses | Exception) -> None:
        place = host, port
        result = self._in_words(result)
        self.patience.drop(place)
        self.silent.discard(place)
        if not isinstance(result, OSError):
            self.known[place] = result, self.clock() + self.ttl
        elif place in self.known:
            result = self.known[place][0]
            self.known[place] = result, self.clock() + RETRY
        self._tell(self.waiting.pop(place), result)

    def _tell(self, waiting: list[Callable[[Addresses | OSError], None]], result: Addresses | OSError) -> None:
        for found in waiting:
            try:
                found(result)
            except Exception:
                self.loop.fault(owner_of(found))


# -- where we leave from -----------------------------------------------------------------------


class TargetWay(WayOut):
    """A way that has names of its own, no proxy, and perhaps a source address; its queues are another way's.

    `source` is an address of this host; "" leaves it to the kernel.
    """

    def __init__(self, way: WayOut, names: KeptNames, source: str):
        self.loop = way.loop
        self.proxy = None
        self.no_proxy = ""
        self.names = names
        self.soon, self.staggered, self.short = self.queues = way.queues
        self.source = source
        self.family = socket.AF_INET6 if ":" in source else socket.AF_INET

    def open(self, family: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket that leaves from the source.  Raises OSError: it is none of ours, or of another family."""
        if self.source and family != self.family:
            raise OSError(errno.EADDRNOTAVAIL, f"this target has no address that {self.source} can reach")
        sock = socket.socket(family, kind)
        if not self.source:
            return sock
        try:
            if sys.platform == "linux" and kind == socket.SOCK_STREAM:
                # The port is chosen by connect, or there are 28,000 for all targets together.
                sock.setsockopt(socket.IPPROTO_IP, BIND_WITHOUT_PORT, 1)
            sock.bind((self.source, 0))
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"cannot leave from {self.source}: {os.strerror(error.errno or 0)}") from None
        return sock


# -- which is next -----------------------------------------------------------------------------


class Target:
    """One place where connections may lead."""

    __slots__ = ("place", "host", "port", "name", "latency", "error", "rests")

    def __init__(self, place: int, host: str, port: int):
        self.place = place  # in the list
        self.host = host or "localhost"
        self.port = port
        self.name = show_address((self.host, port))
        self.latency = NEVER  # seconds of a connect, smoothed; NEVER: not measured, or it failed
        self.error = ""  # of the last connect
        self.rests = 0.0  # until this clock time it is tried last

    def __str__(self) -> str:
        return self.name


def in_turn(upstreams: Upstreams) -> list[Target]:
    """lbs=0: the next one, and those behind it; silent ones last."""
    targets = upstreams.targets
    at = upstreams.turn % len(targets)
    upstreams.turn += 1
    now = upstreams.clock()
    return sorted(targets[at:] + targets[:at], key=lambda target: target.rests > now)


def fastest(upstreams: Upstreams) -> list[Target]:
    """lbs=1: by the time of a connect; as they are listed where none is known."""
    return sorted(upstreams.targets, key=lambda target: target.latency)


def first(upstreams: Upstreams) -> list[Target]:
    """lbs=2: the one in use, and those behind it; now and then the first of all before them."""
    targets, at = upstreams.targets, upstreams.current
    row = targets[at:] + targets[:at]
    now = upstreams.clock()
    if at and now - upstreams.left_at >= upstreams.times.fallback:
        upstreams.left_at = now  # one caller tries it; the others do not wait for what that finds out
        row.remove(targets[0])
        row.insert(0, targets[0])
    return row


ORDERS: dict[int, Callable[["Upstreams"], list[Target]]] = {0: in_turn, 1: fastest, 2: first}


class Upstreams:
    """The targets of one end.  All methods run in the loop.

    Args:
        way: whose queues its dials wait in.
        options: `targets`, `lbs`, `dns` and `dial` are read.
        times: `tcp_dial`, `fallback` and `report` are read.

    `close` ends what is under way, and takes its times from the loop.
    """

    def __init__(self, loop: Loop, way: WayOut, options: Options, times: Times,
                 clock: Callable[[], float] = monotonic):
        self.loop = loop
        self.times = times
        self.clock = clock
        self.targets = [Target(place, host, port) for place, (host, port) in enumerate(options.targets)]
        self.order = ORDERS[options.lbs]
        self.names = KeptNames(loop, options.dns, clock)
        self.way = TargetWay(way, self.names, options.dial)
        self.turn = 0  # of lbs=0
        self.current = 0  # of lbs=2: the place of the target in use
        self.left_at = 0.0  # of lbs=2: clock time at which the first was left, or tried again
        self.attempts: set[Attempt] = set()
        self.late = [loop.queue(seconds, Attempt.expire) for seconds in (times.tcp_dial, times.udp_dial)]
        self.probed: set[Target] = set()  # whose probe is under way
        self.probing = loop.timer(self._probe)
        for target in self.targets:
            self.names.keep_address(target.host, target.port)
        if options.lbs == 1 and len(self.targets) > 1:
            self.probing.set(monotonic())

    def dial(self, done: Callable[[socket.socket | Failed], None], udp: bool = False) -> Attempt:
        """Connect to a target.  Unless the Attempt is cancelled, `done` is called once, perhaps before this returns:

            done(socket)   connected and non-blocking, TCP with NODELAY and keep-alive; the caller owns it from here on
            done(Failed)   no target took it; the message has the reason of each
        """
        attempt = Attempt(self, self.order(self), done, udp)
        self.attempts.add(attempt)
        attempt.next()
        return attempt

    def worked(self, target: Target, seconds: float | None) -> None:
        """A target took a connect, within so many seconds, where that was measured."""
        target.error, target.rests = "", 0.0
        if seconds is not None:
            known = target.latency
            target.latency = seconds if known == NEVER else known + (seconds - known) / 4  # as TCP smooths: RFC 6298
        if target.place == 0:
            self.current = 0

    def failed(self, target: Target, error: str, silent: bool) -> None:
        """A target took no connect; `silent`: it did not even refuse it."""
        target.error, target.latency = error, NEVER
        if silent:
            target.rests = self.clock() + REST
        if target.place == self.current:
            self.current = (target.place + 1) % len(self.targets)
            self.left_at = self.clock()

    @property
    def ping(self) -> float:
        """Seconds of a connect to the fastest target, as measured last; 0 where nothing was."""
        seconds = min((target.latency for target in self.targets), default=NEVER)
        return 0.0 if seconds == NEVER else seconds

    def status(self) -> str:
        """The targets, and how each was met last, for people."""
        return ", ".join(f"{target} ({target.error})" if target.error else
                         f"{target}" if target.latency == NEVER else f"{target} ({target.latency * 1000:.2g} ms)"
                         for target in self.targets)

    def _probe(self) -> None:
        """Measure all targets."""
        self.probing.set(monotonic() + self.times.report)
        for target in self.targets:
            if target not in self.probed:
                self.probed.add(target)
                attempt = Attempt(self, [target], functools.partial(self._probed, target), False)
                self.attempts.add(attempt)
                attempt.next()

    def _probed(self, target: Target, result: socket.socket | Failed) -> None:
        """A probe is over; its Attempt has noted how."""
        self.probed.discard(target)
        if not isinstance(result, Failed):
            result.close()

    def close(self) -> None:
        """Cancel what is under way."""
        for attempt in list(self.attempts):
            attempt.cancel()
        self.loop.retire(self.probing, *self.late, self.names.patience)


class Attempt:
    """One connection in the making: to one target after another.  `cancel` is for its owner."""

    __slots__ = ("upstreams", "todo", "done", "udp", "target", "dial", "began", "reasons")

    def __init__(self, upstreams: Upstreams, todo: list[Target], done: Callable[[socket.socket | Failed], None],
                 udp: bool):
        self.upstreams = upstreams
        self.todo = todo
        self.done = done
        self.udp = udp
        self.target: Target | None = None  # that is tried now, or was the last
        self.dial: Dial | None = None
        self.began: float | None = None  # clock time; None where a name is resolved on the way
        self.reasons: list[Failed] = []  # of those that were tried

    def next(self) -> None:
        """Try the next target, or give up."""
        upstreams = self.upstreams
        if not self.todo:
            self._end()
            self.done(self.why())
            return
        self.target = target = self.todo.pop(0)
        upstreams.late[self.udp].put(self)
        if self.udp:
            upstreams.names.ask(target.host, target.port, functools.partial(self._connect_udp, target))
            return
        self.began = upstreams.clock() if upstreams.names.has(target.host, target.port) else None
        self.dial = Dial(upstreams.way, target.host, target.port, self._dialled)
        self.dial.start()

    def why(self) -> Failed:
        """What became of it: the last word for programs, all targets for people."""
        if not self.reasons:
            return Failed("refused", "there is no target")
        return Failed(self.reasons[-1].reason, "; ".join(map(str, self.reasons)))

    def cancel(self) -> None:
        """Close everything, and never call `done`.  Does nothing where it is over."""
        if self in self.upstreams.attempts:
            self._end()

    def expire(self) -> None:
        """This target has had its time."""
        upstreams = self.upstreams
        phase = "resolving the name" if self.dial is None else \
            "for lack of a descriptor" if self.dial in upstreams.way.short.due else self.dial.phase
        self._stop()
        self._fail(Failed("timeout", f"no answer in {upstreams.late[self.udp].seconds:g} s, {phase}"), True)

    def _dialled(self, result: socket.socket | Failed) -> None:
        if isinstance(result, Failed):
            self._fail(result, result.reason == "timeout")
        elif result.getsockname() == result.getpeername():
            # The kernel gave our end the very port that it connects to, on which nobody listens: RFC 9293 section 3.5.
            result.close()
            self._fail(Failed("refused", os.strerror(errno.ECONNREFUSED)), False)
        else:
            began, target = self.began, self.target
            assert target is not None
            self.upstreams.worked(target, None if began is None else self.upstreams.clock() - began)
            self._end()
            self.done(result)

    def _connect_udp(self, target: Target, found: Addresses | OSError) -> None:
        """Connect a datagram socket to the first address that has a route."""
        if self.target is not target or self not in self.upstreams.attempts:
            return  # cancelled, or expired, meanwhile
        if isinstance(found, OSError):
            self._fail(name_failure(found, None), False)
            return
        error = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        for family, address in alternate(found):
            try:
                sock = self.upstreams.way.open(family, socket.SOCK_DGRAM)
            except OSError as failed:
                error = failed
                continue
            try:
                sock.setblocking(False)
                sock.connect(address)
            except OSError as failed:
                sock.close()
                error = failed
                continue
            self._end()
            self.done(sock)
            return
        self._fail(Failed("refused", error.strerror), False)

    def _fail(self, why: Failed, silent: bool) -> None:
        """This target took no connection."""
        assert self.target is not None
        self.reasons.append(Failed(why.reason, f"{self.target}: {why}"))
        if not self.udp:
            self.upstreams.failed(self.target, str(why), silent)
        self.next()

    def refused(self) -> None:
        """The target of the datagram socket that `done` got has refused a datagram."""
        if self.target is not None:
            self.upstreams.failed(self.target, os.strerror(errno.ECONNREFUSED), False)

    def _stop(self) -> None:
        """Leave the target that is tried."""
        self.upstreams.late[self.udp].drop(self)
        if self.dial is not None:
            self.dial.cancel()
            self.dial = None

    def _end(self) -> None:
        self._stop()
        self.todo = []
        self.upstreams.attempts.discard(self)
