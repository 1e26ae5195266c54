"""sniroute_rfc2136: a record in DNS for each claimed name: written, and removed again, by updates of the zone.

    want(name, id), unwant(name) ---> Entry, one for each name: what is wished, and what is there
                                        |
        READY ---- send ---> FLYING ---- the answer ---> KEPT, or GONE and forgotten
          ^                    |
          |                    +-- it is not as we thought ---> READY: ask what is there, then decide anew
          +------ RESTS -------+-- the server does not do it -> RESTING: each time longer
          +------ RESTS[0] ----+-- an update may yet be done -> DOUBTED: nothing is there, and we look once more
          +------ AGAIN -------+-- the server is not there ---> READY, all of them; the server is LEFT_ALONE for a while

Nobody waits for this room.  A wish is written down, and of a name only the newest one counts: so the queue has as many
entries as there are names.  Each is tried for ever.

What is sent for an entry follows from what is wished and what is there (Entry.plan):

    wished   there                    request
    yes      nothing, as far as known claim: only where the name is not in use
    yes      our mark                 replace: writes all anew, removes what an older mark names
    no       our mark                 remove
    any      it is not known          look_up
    no       nothing of ours          none: the entry is forgotten

A mark is ours where it has the id of this name's wish, or of an earlier one that may have been written.  So what is
there after a restart is ours, if the id is the same.  What is there is not known where the server says that it is not
as we thought, as it does where our request was done and its answer was lost; and where a wish has ended before it came
true.  Where an update had no answer, that nothing is there is believed when it is found twice, RESTS[0] apart.  A name
that has only records of others is not touched; it is tried again, in case they go away.  What others remove while a name
is KEPT is not written again.

Messages go by UDP and are sent again where no answer comes; by TCP where one is too long, or its answer is.  WINDOW of
them are under way at a time; after a failure of the server only one, until it answers.  The UDP socket is there as long
as something is under way, and has a random port each time.

Where the server says that the clocks differ (BADTIME), its time is taken for what is signed from then on.

Threads: all methods run in the loop, or before it runs; a thread `name` of sniroute_dial resolves the server's name.

Seams: I want to ...
    write other records         sniroute_dns: Mark
    react to another failure    SERVER_FAILURES, and REASONS here or in sniroute_dns
    see how it stands           State; of one name: `tell_of`

This room imports sniroute_dns, sniroute_dial (Names, dials), sniroute_loop, sniroute_names and sniroute_refusals.
"""

from __future__ import annotations

import collections
import errno
import logging
import random
import secrets
import socket
import time
from typing import Callable, NamedTuple

import sniroute_dns as dns
from sniroute_dial import Dial, WayOut
from sniroute_dns import Answer, Key, Mark, Request, Zone
from sniroute_loop import JITTERS, NEVER, READ, WRITE, Loop, Queue, Watch, jittered, monotonic
from sniroute_names import Address, parse_ip, show_address
from sniroute_refusals import Failed, Malformed

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
WINDOW = 8  # requests under way: a server writes each to its disk, and does a few of them together
SENDS = 1.0, 2.0, 4.0  # how long an answer is waited for, after each time that a message is sent
TCP_LAST = 10.0  # from the connect to the end of the answer
AGAIN = 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0  # how long a server that has failed is left alone
RESTS = 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0  # the same for a name that the server did not write
JITTER = 0.2  # share of AGAIN: several routers lose a server at one moment
IDS_MAX = 8  # ids that may be ours, of one name: each is another owner, and the oldest were replaced long ago
READS = 64  # datagrams in a turn
SOON = 0.0  # the time of a timer that is due

# Why there was no answer; the words that a server answers with are in sniroute_dns.REASONS.
REASONS = dns.REASONS | {
    "name": "the name of the DNS server does not resolve",
    "resolver": "the host's resolver gives no answer",
    "unreachable": "the DNS server cannot be reached",
    "timeout": "the DNS server gave no answer in time",
    "reset": "the DNS server closed the connection",
    "answer": "the DNS server answered nonsense",
    "long": "the name has more TXT records than a message takes",
    "address": "this host reaches the DNS server from an address that nobody else can use: name one with &address=",
}
DIAL_REASONS = {"refused": "unreachable", "timeout": "unreachable"}  # as this room calls them
# These are about the server and the key, so they hold for every name; the others are one name's.
SERVER_FAILURES = frozenset((
    "name", "resolver", "unreachable", "timeout", "reset", "answer", "address", "notauth", "badsig", "badkey",
    "badtime", "badtrunc"))

# Where an entry is, as the end of a sentence about its record; one that is FLYING has a Flight.
READY, FLYING, RESTING = "waits for its turn", "is under way", "waits to be tried again"
DOUBTED = "waits for a second look"
KEPT, GONE = "is there", "is gone"
CLAIM, REPLACE, REMOVE, LOOK_UP = "claim", "replace", "remove", "look up"  # requests: see the table above

# The phase of an Updater.
IDLE, NAMING, OPEN = "idle", "resolving the server's name", "open"
LEFT_ALONE, CLOSED = "left alone for a while", "closed"


class State(NamedTuple):
    """How an Updater stands, in numbers."""

    wanted: int  # names that are to be there
    kept: int  # of these: are there, as wished
    pending: int  # names with something to be done, removals too
    failed: int  # of these: whose last try has failed
    last_contact: float | None  # when the server last did what it was asked: seconds since 1970
    failure: Failed | None  # why the server is left alone
    done: dict[str, int]  # how many requests were answered, by "claim", "replace", "remove", "look up"
    failures: dict[str, int]  # by the words of REASONS


class Entry:
    """One name: what is wished, what is there, and where it stands in between."""

    __slots__ = ("name", "wish", "ids", "texts", "is_known", "is_late", "was_asked", "where", "rests", "failed")

    def __init__(self, name: str):
        self.name = name
        self.wish = ""  # the id that is to be there; "": nothing is
        self.ids: dict[str, None] = {}  # of marks that are ours; the newest is last
        self.texts: tuple[bytes, ...] = ()  # TXT records that are there
        self.is_known = True  # whether `texts` is what the server has, as far as we know
        self.is_late = False  # an update had no answer, so the server may do it yet
        self.was_asked = False  # the server was asked for `texts`, and nothing has failed since
        self.where = READY
        self.rests = 0  # how often it has rested since the wish was new: each time longer
        self.failed: Failed | None = None  # why the last try has failed

    @property
    def marks(self) -> list[Mark]:
        """Our marks that are there."""
        marks = map(dns.read_mark, self.texts)
        return [mark for mark in marks if mark is not None and mark.id in self.ids]

    def plan(self) -> str:
        """What is to be sent: CLAIM, REPLACE, REMOVE, LOOK_UP; "" where all is as wished."""
        if not self.is_known:
            return LOOK_UP
        if self.wish:
            return REPLACE if self.marks else CLAIM
        return REMOVE if self.marks else ""

    def adopt(self, ident: str) -> None:
        """A mark with this id is ours."""
        self.ids.pop(ident, None)
        self.ids[ident] = None
        if len(self.ids) > IDS_MAX:
            del self.ids[next(iter(self.ids))]


class Flight:
    """A request that is under way.

    Args:
        act: CLAIM, REPLACE, REMOVE or LOOK_UP.
        old: our marks that are not there any more, once it is done.
        mark: our mark that is there then; None: none.
        offset: of the clock by which it was signed, see Updater.
    """

    __slots__ = ("updater", "entry", "act", "old", "mark", "offset", "request", "sends", "due", "is_tcp", "dial",
                 "sock", "watch", "out", "heard")

    def __init__(self, updater: Updater, entry: Entry, act: str, old: list[Mark], mark: Mark | None, offset: float,
                 request: Request):
        self.updater = updater
        self.entry = entry
        self.act = act
        self.old = old
        self.mark = mark
        self.offset = offset
        self.request = request
        self.sends = 0  # how often it was sent by UDP
        self.due = NEVER  # when it is sent again, or given up, by the loop's clock
        self.is_tcp = False
        # What follows is for TCP.
        self.dial: Dial | None = None  # until it is connected
        self.sock: socket.socket | None = None
        self.watch: Watch | None = None
        self.out = b""  # what is still to be sent
        self.heard = bytearray()  # what has come of the answer

    def call(self, host: str, port: int) -> None:
        """Ask by TCP."""
        self.is_tcp = True
        self.due = monotonic() + TCP_LAST
        self.out = dns.frame(self.request.wire)
        self.dial = Dial(self.updater.way, host, port, self._on_dial)
        self.dial.start()

    def _on_dial(self, result: socket.socket | Failed) -> None:
        self.dial = None
        if isinstance(result, Failed):
            self.updater.lose(Failed(DIAL_REASONS.get(result.reason, result.reason), f"by TCP: {result}"))
            return
        self.sock = result
        self.watch = Watch(self.updater.loop.poller, result.fileno())
        self.watch.wait_for(WRITE, self._on_ready)

    def _on_ready(self, mask: int) -> None:
        try:
            if self.out:
                self.out = self.out[self.sock.send(self.out):]
                if not self.out:
                    self.watch.wait_for(READ, self._on_ready)
                return
            data = self.sock.recv(dns.MESSAGE_MAX)
        except BlockingIOError:
            return
        except OSError as error:
            self.updater.lose(Failed("reset", f"by TCP: {error.strerror}"))
            return
        self.heard += data
        try:
            message = dns.unframe(self.heard)
            answer = None if message is None else dns.read_answer(message, self.request, self.updater.key)
        except Malformed as error:
            self.updater.lose(Failed("answer", f"by TCP: {error}"))
            return
        if answer is not None:
            self.updater.answered(self, answer)
        elif not data:
            self.updater.lose(Failed("reset", "by TCP: before the end of its answer"))

    def close(self) -> None:
        """It is over, however it ended."""
        if self.dial is not None:
            self.dial.cancel()
            self.dial = None
        if self.sock is not None:
            self.watch.closing()
            self.sock.close()
            self.sock = None


class Updater:
    """Keeps the records of a zone as they are wished.

    Args:
        zone, key: of sniroute_dns.
        tell: called with a level of `logging`, and a sentence: when the server is lost or found again, when a name is
            not written, and when the clocks differ.
        clock: seconds since 1970, for what is signed.
        way: what resolves the server's name, shared with others; it has no proxy.  By default one of its own.
    """

    def __init__(self, loop: Loop, zone: Zone, key: Key, tell: Callable[[int, str], None],
                 clock: Callable[[], float] = time.time, way: WayOut | None = None):
        self.loop = loop
        self.zone = zone
        self.key = key
        self.tell = tell
        self.clock = clock
        self.way = way or WayOut(loop, None, "")
        self.phase = IDLE
        self.entries: dict[str, Entry] = {}  # by name
        self.ready: collections.OrderedDict[Entry, None] = collections.OrderedDict()  # the oldest first
        self.flights: dict[int, Flight] = {}  # by the id of the message
        self.resting = [loop.queue(seconds, self._next) for seconds in RESTS]
        self.doubted = loop.queue(RESTS[0], self._look_again)
        self.timer = loop.timer(self._work)
        self.losses = 0  # how often the server was lost, without an answer between them
        self.failure: Failed | None = None  # why it was lost last; None: it has answered since
        self.sock: socket.socket | None = None
        self.watch: Watch | None = None
        self.place: tuple | None = None  # the server's address, as a socket has it
        self.addresses: tuple[Address, ...] = zone.addresses  # that are written for each name
        self.offset = 0.0  # the server's clock, less ours: seconds that are added to `clock`
        self.is_corrected = False  # the last answer has told its time: it cannot be wrong twice
        self.last_contact: float | None = None  # see State; so are those that follow
        self.kept = self.failing = self.wanted = 0
        self.done = dict.fromkeys((CLAIM, REPLACE, REMOVE, LOOK_UP), 0)
        self.failures: dict[str, int] = {}

    # -- for its owner -------------------------------------------------------------------------

    def want(self, name: str, ident: str) -> bool:
        """A name is to be there, with this id.  False, and nothing is done, where the zone does not hold the name.

        Args:
            name: as `normalise` returns it.
            ident: 1 to 64 letters, digits and `_.:-`.  Whoever has the same one, later or in another process, is the
                same owner.  Raises ValueError for others.
        """
        if not dns.ID.fullmatch(ident):
            raise ValueError(f"{ident!r} is not an id for a record")
        if not self.zone.holds(name) or self.phase is CLOSED:
            return False
        entry = self.entries.get(name)
        if entry is None:
            entry = self.entries[name] = Entry(name)
            self.ready[entry] = None
        elif entry.wish == ident:
            return True
        self.wanted += not entry.wish
        entry.wish = ident
        entry.adopt(ident)
        self._change(entry)
        return True

    def unwant(self, name: str, ident: str = "") -> None:
        """A name is not to be there any more.  What we wrote is removed, and nothing else.

        With an id, also what an earlier process wrote with it, though this one was never asked for the name.
        """
        entry = self.entries.get(name)
        if entry is None:
            if not ident or not self.zone.holds(name) or self.phase is CLOSED:
                return
            entry = self.entries[name] = Entry(name)
            self.ready[entry] = None
            entry.is_known = False
        if ident:
            entry.adopt(ident)
        if entry.wish:
            self.wanted -= 1
            entry.wish = ""
            if entry.where is not KEPT:
                entry.is_known = False  # an earlier process may have written it
        self._change(entry)

    def tell_of(self, name: str) -> str:
        """How a name stands, as a sentence for people; "" for one that is neither wished nor there."""
        entry = self.entries.get(name)
        if entry is None:
            return ""
        said = f"its record in DNS {entry.where}"
        failed = None if entry.where is KEPT else self.failure or entry.failed
        return said if failed is None else f"{said}: {REASONS[failed.reason]} ({failed})"

    @property
    def state(self) -> State:
        """How this stands; it costs the same for any number of names."""
        return State(self.wanted, self.kept, len(self.entries) - self.kept, self.failing, self.last_contact,
                     self.failure, dict(self.done), dict(self.failures))

    def close(self) -> None:
        """Send and hear nothing more; what was written stays."""
        if self.phase is CLOSED:
            return
        self._hang_up(CLOSED)
        for queue in (*self.resting, self.doubted):
            queue.due.clear()
        self.entries.clear()
        self.ready.clear()
        self.kept = self.failing = self.wanted = 0
        self.timer.set(NEVER)

    # -- entries -------------------------------------------------------------------------------

    def _change(self, entry: Entry) -> None:
        """Something else is wished: begin with that now, unless a request of the entry is under way."""
        if entry.where is FLYING:
            return  # `_next` comes when its answer does
        if entry.where is KEPT:
            self.kept -= 1
        elif entry.where is RESTING:
            self._rest_of(entry).drop(entry)
        elif entry.where is DOUBTED:
            self.doubted.drop(entry)
        entry.rests = 0
        self._next(entry)

    def _next(self, entry: Entry) -> None:
        """Put an entry that is in no queue at the moment where its plan has it: to the READY ones, or away."""
        if not entry.plan() and entry.is_late:  # a server that has stood still may answer first, and do its updates then
            entry.where = DOUBTED
            self.doubted.put(entry)
            return
        if not entry.plan():
            entry.where = GONE
            self._mend(entry)
            self.ready.pop(entry, None)
            del self.entries[entry.name]
            return
        entry.where = READY
        self.ready[entry] = None
        self._hurry()

    def _look_again(self, entry: Entry) -> None:
        """Nothing was there, and the time for a late update is over: only now, since a new wish may end that rest."""
        entry.is_late = entry.is_known = False
        self._next(entry)

    def _keep(self, entry: Entry) -> None:
        """All is as wished."""
        entry.where = KEPT
        entry.rests = 0
        entry.was_asked = False
        self._mend(entry)
        self.kept += 1

    def _mend(self, entry: Entry) -> None:
        """Its last try has not failed."""
        if entry.failed is not None:
            self.failing -= 1
            entry.failed = None

    def _fail(self, entry: Entry, failed: Failed) -> None:
        """The server did not do it for this name: it is tried again later."""
        before = entry.failed
        self.failing += before is None
        entry.failed = failed
        entry.was_asked = False
        entry.where = RESTING
        entry.rests += 1
        self._rest_of(entry).put(entry)
        if before is None or before.reason != failed.reason:
            verb = "written" if entry.wish else "removed"
            self.tell(logging.WARNING,
                      f"the DNS record of {entry.name} is not {verb}: {REASONS[failed.reason]} ({failed})")

    def _rest_of(self, entry: Entry) -> Queue:
        """The queue in which an entry rests: each time a longer one."""
        return self.resting[min(entry.rests, len(self.resting)) - 1]

    # -- the server ----------------------------------------------------------------------------

    def _hurry(self) -> None:
        """Work in this turn, or in the next one: many wishes are one piece of work."""
        if self.phase is not LEFT_ALONE and self.timer.when != SOON:
            self.timer.set(SOON)

    def _work(self) -> None:
        """Send what may be sent, and what has had no answer.  In the second phase of a turn, where sockets may open."""
        now = monotonic()
        if self.phase is LEFT_ALONE:
            self.phase = IDLE
        if self.phase is IDLE and self.ready:
            self.phase = NAMING
            self.way.names.ask(self.zone.host, self.zone.port, self._found)
        if self.phase is NAMING and self.place is not None:
            self._open()
        if self.phase is not OPEN:
            return
        while self.phase is OPEN and self.ready and len(self.flights) < (1 if self.losses else WINDOW):
            self._begin(self.ready.popitem(False)[0])
        for flight in [flight for flight in self.flights.values() if flight.due <= now]:  # none, where it was lost
            if flight.is_tcp or flight.sends == len(SENDS):
                self.lose(Failed("timeout", flight.act))
                return
            self._send(flight)
            if self.phase is not OPEN:
                return
        if self.phase is not OPEN:
            return
        if not self.flights and not self.ready:
            self._hang_up(IDLE)
            return
        due = min(flight.due for flight in self.flights.values())
        if due < self.timer.when:
            self.timer.set(due)

    def _found(self, found: list | OSError) -> None:
        """The addresses of the server: after each loss the next one is tried."""
        if self.phase is not NAMING:
            return
        if isinstance(found, OSError):
            unknown = found.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
            self.lose(Failed("name" if unknown else "resolver", found.strerror or str(found)))
            return
        self.place = found[self.losses % len(found)]
        self.timer.set(SOON)

    def _open(self) -> None:
        """Open the UDP socket, and see which address the server sees us by."""
        family, address = self.place
        try:
            self.sock = socket.socket(family, socket.SOCK_DGRAM)
            self.sock.setblocking(False)
            self.sock.connect(address)
            own = parse_ip(self.sock.getsockname()[0])
        except OSError as error:
            self.lose(Failed("unreachable", error.strerror))
            return
        if not self.zone.addresses and (own.is_loopback or own.is_link_local or own.is_unspecified):
            self.lose(Failed("address", str(own)))
            return
        self.addresses = self.zone.addresses or (own,)
        self.phase = OPEN
        self.watch = Watch(self.loop.poller, self.sock.fileno())
        self.watch.wait_for(READ, self._on_datagrams)

    def _begin(self, entry: Entry) -> None:
        """Send the request of an entry."""
        act, marks = entry.plan(), entry.marks
        number = secrets.randbelow(1 << 16)
        while number in self.flights:
            number = secrets.randbelow(1 << 16)
        now = self.clock() + self.offset
        mark = Mark(entry.wish, self.addresses) if entry.wish else None
        if act is CLAIM:
            request = dns.claim(self.zone, self.key, number, now, entry.name, mark)
        elif act is LOOK_UP:
            request = dns.look_up(self.key, number, now, entry.name)
        else:
            request = dns.replace(self.zone, self.key, number, now, entry.name, entry.texts, marks, mark)
        if len(request.wire) > dns.MESSAGE_MAX:
            self._count("long")
            entry.is_known = False  # perhaps there are fewer by then
            self._fail(entry, Failed("long", f"{len(entry.texts)} of them"))
            return
        entry.where = FLYING
        flight = self.flights[number] = Flight(self, entry, act, marks, mark, self.offset, request)
        if len(request.wire) > dns.UDP_MAX:
            flight.call(*self.place[1][:2])
        else:
            self._send(flight)

    def _send(self, flight: Flight) -> None:
        """Send a datagram, or send it again."""
        flight.due = monotonic() + SENDS[flight.sends]
        flight.sends += 1
        try:
            self.sock.send(flight.request.wire)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS):  # then it is lost, as a datagram may be
                self.lose(Failed("unreachable", error.strerror))

    def _on_datagrams(self, mask: int) -> None:
        for _ in range(READS):
            if self.phase is not OPEN:
                return
            try:
                data = self.sock.recv(dns.MESSAGE_MAX)
            except BlockingIOError:
                return
            except OSError as error:
                self.lose(Failed("unreachable", error.strerror))
                return
            flight = self.flights.get(dns.number_of(data))
            if flight is None or flight.is_tcp:
                continue  # the second answer to what was sent twice
            try:
                answer = dns.read_answer(data, flight.request, self.key)
            except Malformed:
                continue  # perhaps not the server's: the right one may still come
            if answer.is_cut:
                flight.call(*self.place[1][:2])
            else:
                self.answered(flight, answer)

    def lose(self, failed: Failed) -> None:
        """The server is not there, or does not know us: leave it alone, and then try all again."""
        self._count(failed.reason)
        is_known = self.failure is not None and self.failure.reason == failed.reason
        self.failure = failed
        pause = jittered(AGAIN[min(self.losses, len(AGAIN) - 1)], JITTER, random.randrange(JITTERS))
        self.losses += 1
        self.is_corrected = False  # until the next try either clock may be set
        self._hang_up(LEFT_ALONE)
        self.timer.set(monotonic() + pause)
        if not is_known:
            self.tell(logging.WARNING, f"DNS records of {self.zone} are not written: {REASONS[failed.reason]} "
                                       f"({failed}); what waits is tried again")

    def _hang_up(self, phase: str) -> None:
        """Close the socket.  What was under way may be done: then the next try finds out that it is."""
        self.phase = phase
        self.place = None
        flights, self.flights = self.flights, {}
        for flight in flights.values():
            flight.close()
            flight.entry.where = READY
            flight.entry.was_asked = False
            flight.entry.is_late |= flight.act is not LOOK_UP
            self.ready[flight.entry] = None
        if self.watch is not None:
            self.watch.closing()
            self.watch = None
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    # -- answers -------------------------------------------------------------------------------

    def answered(self, flight: Flight, answer: Answer) -> None:
        """An answer has come."""
        reason = answer.reason
        if answer.code == dns.BADTIME and answer.time and self._set_clock(flight, answer.time):
            del self.flights[flight.request.number]
            flight.close()
            self._next(flight.entry)  # nothing was done: it is signed anew
            return
        if answer.code != dns.BADTIME:
            self.is_corrected = False
        if reason in SERVER_FAILURES:
            self.lose(Failed(reason, self._describe(answer)))
            return
        del self.flights[flight.request.number]
        flight.close()
        entry = flight.entry
        is_otherwise = flight.act is not LOOK_UP and answer.code in (dns.YXDOMAIN, dns.NXRRSET)
        if not reason or flight.act is LOOK_UP and answer.code == dns.NXDOMAIN:
            self.done[flight.act] += 1
            self._contacted()
            self._done(flight, answer)
        elif is_otherwise and not entry.was_asked:
            entry.is_known = False
            self._next(entry)
        else:
            self._count(reason)
            self._fail(entry, Failed(reason, self._describe(answer)))
        self._hurry()

    def _done(self, flight: Flight, answer: Answer) -> None:
        """What was asked for is done: note what is there now, and go on with the entry."""
        entry = flight.entry
        if flight.act is LOOK_UP:
            entry.texts = dns.texts_of(answer, entry.name)
            entry.is_known = entry.was_asked = True
            self._next(entry)
            return
        new = () if flight.mark is None else (flight.mark.data,)
        gone = {mark.data for mark in flight.old}.union(new)
        entry.texts = new if flight.act is CLAIM else (*(text for text in entry.texts if text not in gone), *new)
        entry.is_known = True
        entry.was_asked = entry.is_late = False  # a server does updates in the order in which they come
        entry.ids = dict.fromkeys(filter(None, (flight.mark and flight.mark.id, entry.wish)))
        if flight.mark is not None and flight.mark.id == entry.wish:
            self._keep(entry)
        else:
            self._mend(entry)
            self._next(entry)

    def _set_clock(self, flight: Flight, told: int) -> bool:
        """Sign by the server's time from now on.  Returns whether another try may help."""
        if flight.offset != self.offset:
            return True  # it was signed before another answer has told the time
        if self.is_corrected:
            return False
        before, self.offset, self.is_corrected = self.offset, told - self.clock(), True
        is_news = abs(self.offset - before) > dns.FUDGE  # else it was told, and did not help
        clocks = f"the clock of this host and that of the DNS server of {self.zone}"
        if abs(self.offset) <= dns.FUDGE:
            self.offset = 0.0
            if is_news:
                self.tell(logging.INFO, f"{clocks} agree again")
        elif is_news:
            self.tell(logging.WARNING, f"{clocks} differ by {abs(self.offset):.0f} s: its updates are signed with the "
                                       "server's time; set the clock that is wrong")
        return True

    def _contacted(self) -> None:
        """The server has done what it was asked for, so it is not lost any more."""
        self.last_contact = self.clock()
        self.failure = None
        if self.losses:
            self.losses = 0
            self.tell(logging.INFO, f"DNS records of {self.zone} are written again")

    def _count(self, reason: str) -> None:
        """Count a failure for `State.failures`."""
        self.failures[reason] = self.failures.get(reason, 0) + 1

    def _describe(self, answer: Answer) -> str:
        """Which server has answered what."""
        return f"{show_address(self.place[1])}: {dns.RCODES.get(answer.code, f'RCODE {answer.code}')}"
