"""sniroute_checks: active health checks: one check of a backend, and when each backend is checked.

    Checks     the schedule: one Round for all members that want the same of the same target
      Round      its beat, with jitter; never two checks at once --- way, hear ---> Subject, a member of a group
        Check      one check, under one deadline: connect, talk, leave
          Dialogue   what is said: sniroute_probes

A Check leaves in order: what the protocol has for an end, then a FIN; then it reads up to the backend's own end, for
LINGER at most, so that no RST follows.

Threads: the loop only.

Seams: I want to ...
    check another protocol    sniroute_probes
    another schedule          Round.beat

It imports probes, targets, race, the loop, names and refusals.
"""

from __future__ import annotations

import collections
import errno
import functools
import os
import random
import socket
import time
from typing import Any, Callable, Iterable, Protocol

from sniroute_loop import JITTERS, READ, WRITE, Loop, Queue, Watch, jittered
from sniroute_names import printable, show_address
from sniroute_probes import HEARD_MAX, KINDS, READ_SIZE, Dialogue, Health, Question
from sniroute_race import STAGGER, UNDER_WAY, Attempt, Race, Races
from sniroute_refusals import Refused
from sniroute_targets import Backend, Unreachable

__version__ = "0.1.0"

monotonic = time.monotonic

# Limits, each with its reason.  Times in seconds.
LINGER = 1.0  # for the backend's own end; most need a millisecond
AGAIN = 1.0  # until a member is asked again that has to be prepared, or for which this host had no descriptor
FULL = 0.05  # until a unix socket whose backlog is full is tried again
JITTER = 0.1  # the share by which an interval is longer or shorter: what began together does not stay together
START_WITHIN = 5.0  # the first checks of what is new are spread over this, or over a shorter interval
AT_ONCE = 256  # checks: 1,000 dead backends that take 2 s each, every 10 s, need 200; each takes a descriptor


# -- one check ---------------------------------------------------------------------------------

CONNECTING, TALKING, LEAVING, OVER = "connecting", "talking", "leaving", "over"


class Shared:
    """What the checks of one loop share.  `queue` is Book.queue: it gives one for all that wait equally long."""

    def __init__(self, loop: Loop, queue: Callable[[float, Callable[[Any], Any]], Queue]):
        self.loop = loop
        self.queue = queue
        self.races = Races(loop)
        self.soon = queue(0.0, Check.open)  # another address comes next
        self.full = queue(FULL, Check.open)
        self.stagger = queue(STAGGER, Check.race)
        self.leaving = queue(LINGER, Check.left)


class Check(Watch):
    """One check of one backend.  It owns its socket and `way`, a Backend that has not been opened.

    Unless it is closed before, `done(why)` is called once: "" where the backend is good, else what is wrong, for
    people; None where this host has no descriptor, so that nothing is known.  All is closed and released by then.
    `preface` is sent first, as a PROXY header.
    """

    __slots__ = ("shared", "health", "way", "name", "timeout", "done", "preface", "state", "sock", "dialogue", "why",
                 "unsent", "late", "surplus", "began")

    def __init__(self, shared: Shared, health: Health, way: Backend, name: str, timeout: float,
                 done: Callable[[str | None], None], preface: bytes = b""):
        super().__init__(shared.loop.poller, -1)
        self.shared = shared
        self.health = health
        self.way = way
        self.name = name
        self.timeout = timeout
        self.done: Callable[[str | None], None] | None = done
        self.preface = preface
        self.state = CONNECTING
        self.sock: socket.SocketType | None = None
        self.dialogue: Dialogue | None = None
        self.why = ""  # why the last address did not take the connect, or why sending failed
        self.unsent = b""
        self.surplus = 0  # bytes read while it leaves
        self.began = 0.0  # clock time; the connect to the latest address
        self.late = shared.queue(timeout, Check.expire)  # its one deadline, until it leaves
        self.late.put(self)

    # -- the connect

    def open(self) -> None:
        """Begin the connect to the next address.  Second phase of a turn only: see sniroute_race."""
        why, self.why = self.why, ""
        self.began = monotonic()
        try:
            self.sock = self.way.open(why)
        except BlockingIOError:
            self.shared.full.put(self)
            return
        except Unreachable as error:
            self.end(None if self.way.is_ours() else str(error))
            return
        except OSError:
            self.end(None)
            return
        self.fd = self.sock.fileno()
        self.wait_for(WRITE, self.on_connect)
        if self.way.tried < len(self.way.addresses):
            self.shared.stagger.put(self)

    def race(self) -> None:
        """The address is silent: try the others beside it."""
        self.wait_for(0)
        server, self.sock = self.sock, None
        self.way.race = Race(self.shared.races, self.way, server, self.began, self, Check.raced)
        self.way.race.another()

    def raced(self, result: Attempt | OSError | None) -> None:
        """One of several addresses took the connect, or none did."""
        if isinstance(result, Attempt):
            self.sock, self.fd = result.sock, result.fd
            self.guarded(self.connected)
        else:
            self.end(None if isinstance(result, OSError) or self.way.is_ours() else self.way.give_up())

    def on_connect(self, mask: int) -> None:
        """The connect is over."""
        row = self.way.row
        if row is not None:  # else it is no connect, as a program's
            error = self.sock.connect_ex(row[1])
            if error in UNDER_WAY:
                return
            if error not in (0, errno.EISCONN):
                self.refused(os.strerror(error))
                return
        self.guarded(self.connected)

    def refused(self, why: str) -> None:
        """The address did not take the connect: try the next one, if there is one."""
        self.why = why
        self.shared.stagger.drop(self)
        self.closing()
        self.sock.close()
        self.sock = None
        self.shared.soon.put(self)

    def connected(self) -> None:
        """Begin to talk."""
        way = self.way
        try:
            way.connected(self.sock)
        except BlockingIOError:
            self.wait_for(WRITE, self.on_connect)
            return
        except Unreachable as error:
            self.end(str(error))
            return
        except OSError as error:
            self.refused(error.strerror)
            return
        self.shared.stagger.drop(self)
        if way.proven_by_connect:
            way.settled()
        if KINDS[self.health.kind].talk is None:
            self.leave(self.preface)
            return
        self.state = TALKING
        host = way.row[1] if way.row is not None else ""
        host = show_address((*host[:1], 0)).removesuffix(":0") if isinstance(host, tuple) else "localhost"
        self.dialogue = Dialogue(Question(self.health, self.name, host))
        self.say(self.preface + self.dialogue.begin())

    # -- the talk

    def say(self, data: bytes) -> None:
        """Send, and wait for the answer, also where sending fails: a backend may have said why before it broke off."""
        self.unsent += data
        if self.unsent:
            try:
                self.unsent = self.unsent[self.sock.send(self.unsent):]
            except BlockingIOError:
                pass
            except OSError as error:
                self.unsent, self.why = b"", error.strerror
        self.wait_for(READ | WRITE if self.unsent else READ, self.on_ready)

    def on_ready(self, mask: int) -> None:
        """Something has come, or can be sent."""
        self.guarded(self.hear if mask & ~WRITE else functools.partial(self.say, b""))

    def hear(self) -> None:
        """Read, and go on."""
        try:
            data = self.sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self.end(error.strerror)
            return
        if data:
            self.way.answered()
        elif self.why:
            self.end(self.why)
            return
        dialogue = self.dialogue
        answer = dialogue.receive(data)
        if dialogue.verdict is None:
            self.say(answer)
        elif dialogue.verdict.why:
            self.end(dialogue.verdict.why)
        else:
            self.leave(answer)

    # -- the end

    def leave(self, goodbye: bytes) -> None:
        """The backend is good: say goodbye, and wait for its own end."""
        self.state = LEAVING
        self.late.drop(self)
        try:
            if goodbye:
                self.sock.send(goodbye)  # a few bytes: they fit
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.left()  # it has broken off
            return
        self.shared.leaving.put(self)
        self.wait_for(READ, self.on_leaving)

    def on_leaving(self, mask: int) -> None:
        """Read up to the backend's end: bytes that nobody has read make close() send RST."""
        try:
            data = self.sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        except (OSError, MemoryError):  # without memory it would stay readable, and nobody would end it
            data = b""
        self.surplus += len(data)
        if not data or self.surplus > HEARD_MAX:
            self.left()

    def left(self) -> None:
        """It was good, and has ended."""
        self.end("")

    def expire(self) -> None:
        """It has had its time."""
        self.guarded(self.too_late)

    def too_late(self) -> None:
        """Say what it has been waiting for."""
        no_answer = f"no answer in {self.timeout:g} s"
        if self.state == TALKING:
            no_answer = f"it took the connect, but gave {no_answer}"
        elif self.way.race is not None:
            self.way.race.close()
            no_answer = self.way.account() or no_answer
        self.end(no_answer)

    def guarded(self, step: Callable[[], None]) -> None:
        """Do a step.  A fault of ours ends the check, since nobody else would."""
        try:
            step()
        except Exception:
            self.end(None)
            raise

    def end(self, why: str | None) -> None:
        """Close everything, and tell."""
        done = self.done
        self.close()
        if done is not None:
            done(why)

    def close(self) -> None:
        """End without a word.  May be called twice."""
        self.done = None
        if self.state == OVER:
            return
        self.state = OVER
        shared = self.shared
        for queue in (self.late, shared.soon, shared.full, shared.stagger, shared.leaving):
            queue.drop(self)
        if self.sock is not None:
            self.closing()
            self.sock.close()
            self.sock = None
        self.way.release()
        self.dialogue = None


def at_port(way: Backend, port: int) -> Backend:
    """The way to another port of the same host.  Takes `way` over.  Raises Unreachable where it leads to no host."""
    way.release()
    if not way.proven_by_connect or any(family not in (socket.AF_INET, socket.AF_INET6) for family, _ in way.addresses):
        raise Unreachable(f"{way.target} has no port {port}")
    rows = [(family, (address[0], port, *address[2:])) for family, address in way.addresses]
    return Backend(f"tcp:{show_address(rows[0][1])}" if len(rows) == 1 else way.target, rows, way.local)


# -- the schedule ------------------------------------------------------------------------------


class Subject(Protocol):
    """What a member of a group says of its checks: `Checked` of sniroute_book.  Its attributes never change."""

    target: str  # where it leads: who has the same target, and wants the same, shares a check
    health: Health
    name: str  # as of Check; "" for none
    preface: bytes  # as of Check; b"" for none
    interval: float  # seconds
    timeout: float  # seconds

    def way(self) -> Backend | None:
        """A new way there; None: it has to be prepared first, and nothing is known.  Raises Refused, Unreachable."""

    def hear(self, why: str) -> None:
        """It was checked; `why` is "" where it is good, else what is wrong, for people."""


def wish(subject: Subject) -> tuple[Any, ...]:
    """What a subject wants; subjects that want the same share a check."""
    name = subject.name if KINDS[subject.health.kind].needs_name else ""
    return subject.target, subject.health, name, subject.preface, subject.interval, subject.timeout


class Round:
    """The checks of one target, for all subjects that want the same.  At most one is under way."""

    __slots__ = ("checks", "subjects", "check", "queue")

    def __init__(self, checks: Checks, first: Subject):
        self.checks = checks
        self.subjects = [first]
        self.check: Check | None = None
        self.queue: Queue | None = None  # in which it waits for its next beat

    def wait(self, seconds: float) -> None:
        """The next beat is in so many seconds."""
        before, self.queue = self.queue, self.checks.shared.queue(seconds, Round.beat)
        self.queue.put(self)
        if before is not None and before is not self.queue:
            before.drop(self)

    def beat(self) -> None:
        """Its time has come.  Where the last check is not over, or still waits for its turn, this one is left out."""
        self.queue.put(self)  # first, so that it comes again where memory is short below
        self.wait(jittered(self.subjects[0].interval, JITTER, self.checks.dice()))
        self.ask()

    def ask(self) -> None:
        """Check it as soon as there is room."""
        if self.check is None:
            self.checks.waiting[self] = None
            self.checks.serve()

    def start(self) -> None:
        """Check it now.  Second phase of a turn only."""
        subject, shared = self.subjects[0], self.checks.shared
        self.checks.again.drop(self)
        try:
            way = subject.way()
            if way is None:
                self.checks.again.put(self)
                return
            preface = subject.preface
            if subject.health.port:
                way, preface = at_port(way, subject.health.port), b""
        except (Refused, Unreachable) as error:
            self.tell(str(error))
            return
        self.check = Check(shared, subject.health, way, subject.name, subject.timeout, self.over, preface)
        self.checks.running += 1
        self.check.open()

    def over(self, why: str | None) -> None:
        """The check is over; `why` as `done` of Check."""
        self.check = None
        self.checks.running -= 1
        if self.checks.waiting:
            self.checks.turn.put(self.checks)
        if why is None:
            self.checks.again.put(self)
        else:
            self.tell(why)

    def tell(self, why: str) -> None:
        """Tell all subjects."""
        for subject in list(self.subjects):
            subject.hear(printable(why))

    def close(self) -> None:
        """Nobody wants it any more."""
        if self.check is not None:
            self.check.close()
            self.check = None
            self.checks.running -= 1
        self.queue.drop(self)
        self.checks.again.drop(self)
        self.checks.waiting.pop(self, None)


class Checks:
    """When which target is checked.  Loop only.  `chance` (0 to 1) is the dice; `queue` as of Shared."""

    def __init__(self, loop: Loop, queue: Callable[[float, Callable[[Any], Any]], Queue],
                 chance: Callable[[], float] = random.random):
        self.shared = Shared(loop, queue)
        self.chance = chance
        self.rounds: dict[tuple[Any, ...], Round] = {}
        self.waiting: collections.OrderedDict[Round, None] = collections.OrderedDict()  # for AT_ONCE, in order
        self.running = 0  # checks under way
        self.turn = queue(0.0, Checks.serve)  # in the second phase of a turn
        self.again = queue(AGAIN, Round.ask)

    def dice(self) -> int:
        """A step of the jitter, 0 to JITTERS - 1."""
        return int(self.chance() * JITTERS)

    def adopt(self, subjects: Iterable[Subject]) -> None:
        """Check these from here on.  Who wanted the same before keeps its beat, and a check that is under way."""
        before, self.rounds = self.rounds, {}
        for subject in subjects:
            key = wish(subject)
            known = self.rounds.get(key)
            if known is not None:
                known.subjects.append(subject)
            elif key in before:
                self.rounds[key] = before.pop(key)
                self.rounds[key].subjects = [subject]
            else:
                made = self.rounds[key] = Round(self, subject)
                made.wait(min(subject.interval, START_WITHIN) * self.dice() / JITTERS)
        for left in before.values():
            left.close()
        if self.waiting:
            self.turn.put(self)

    def serve(self) -> None:
        """Start what waits, as long as there is room.  Second phase of a turn only."""
        while self.waiting and self.running < AT_ONCE:
            self.waiting.popitem(last=False)[0].start()

    def close(self) -> None:
        """End all.  May be called twice."""
        self.adopt(())
