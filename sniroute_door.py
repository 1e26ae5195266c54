"""sniroute_door: HTTP of our own, for the admin, the registry, NodePass: accepts clients, reads requests, answers.

    listener --- accept ---> Caller, a client
                               READING    its head, then its body --- parse_head ---> Head --- Gate.decide ---> Plan
                               WAITING    for one of its gate's threads
                               WORKING    a thread `admin-<n>` or `public-<n>` runs Plan.act, which gives an Answer
                               PENDING    somebody else has the Caller, and answers it later
                               ANSWERING  the Answer is sent, as fast as the client reads
                               STREAMING  the Answer has no end: events, as they come
                               KEPT       the next request may come, where the gate keeps connections
                               LINGERING  the client was declined early: what it still sends is thrown away

A Gate is an address: who may ask for what there (`decide`), its threads, its callers.  A Door has one loop, of
sniroute_loop, for all its gates.  Who answers is `Plan.by`:

    LOOP      the loop, at once: a probe waits for nobody who is slow
    THREAD    a thread of the gate: `act` may wait
    OWNER     whoever has been given the Caller: it calls `Caller.answer` once, in this turn of the loop or later.
              Where that is a stream, `Caller.push` sends more of it

Connections.  Where the gate keeps them, the next request may come behind an answer.  Whoever wants to know when a
connection ends asks by `Caller.when_over`; as long as somebody does, the connection has no deadline between requests,
and makes no room for another.

Threads.  `admin`, or as the Door is named, runs the loop, and it alone touches sockets and Callers.  `<gate>-<n>` runs
one Plan.act and hands the Answer to the loop by `Loop.call`.  `Door.close` is for any other thread.  There is no lock
here.

What strangers can do.  Each gate has a limit of clients.  One more takes the place of another: first of the oldest that
is KEPT, then of the oldest that is still to send something, then of one that is still to read something.  Who has not
sent its request, or read its answer, in time is cut off.  Each gate keeps a descriptor in reserve, so that it can hear
somebody where clients of the router have taken all others.  Each gate has threads of its own, and WORK_MAX requests that
wait for them or are in them: one more gets 503.  Who does not read events is cut off, too.

Seams: I want to ...
    answer at another address     a Gate, as sniroute_admin has two
    answer later, or in a stream  a Plan by OWNER
    accept other heads            `parse_head`, which does no I/O
    change what all answers say   HEADERS, `render`

This room imports sniroute_loop, sniroute_scarcity, sniroute_page (the policy for browsers) and sniroute_names.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import http
import json
import logging
import os
import re
import socket
import stat
import struct
import sys
import threading
import time
from typing import Any, Callable, NamedTuple

from sniroute_loop import CAPACITY_ERRNOS, READ, WRITE, Loop, Watch
from sniroute_names import printable, show_address
from sniroute_page import POLICY
from sniroute_scarcity import SHORT_OF_MEMORY, Paced, begin_errand, ran_out

__version__ = "0.1.0"

log = logging.getLogger("sniroute")

# Limits, each with its reason.  Sizes in bytes, times in seconds.
CALLERS_MAX = 32  # clients of a gate at once, where it does not say otherwise: a browser makes six connections; each
# takes a descriptor, out of SPARE_FDS (sniroute_settings)
WORK_MAX = 16  # of these, requests that wait for a thread or are in one: others always find a place
REQUEST_TIME = 5.0  # to send a whole request, however slowly it comes
WAIT_TIME = 5.0  # for a thread
KEEP_TIME = 75.0  # for the next request: clients that renew something each twenty seconds need one connection
STREAM_MAX = 65536  # bytes of events that a client has not read
ANSWER_TIME = 10.0  # to read a whole answer: Prometheus' own limit for a scrape
LINGER = 1.0  # a client that was declined while it still sends gets this time to read why ...
LINGER_READS = 64  # ... and at most so many pieces of its request are thrown away meanwhile
HEAD_MAX = 32768  # request line and header fields: a browser adds the cookies of every other port (RFC 6265, 8.5)
FIELDS_MAX = 100  # header fields: browsers send twenty
BODY_MAX = 65536  # no request needs a body, but some clients send one
PIECE = 65536  # read at once
ACCEPT_MAX = 64  # clients in a row: then those who are here already have their turn
ACCEPT_PAUSE = 0.1  # until an accept that failed is tried again: else the thread would spin where descriptors are short
BACKLOG = 1024  # connections that wait for accept: the SYN of one more is dropped, and sent again after a second
CLOSE_TIME = 1.0  # for threads to end in Door.close(); one that waits for a tunnel may end later, unheard

READING, WAITING, WORKING, PENDING, ANSWERING, STREAMING, KEPT, LINGERING, CLOSED = (
    "reading", "waiting", "working", "pending", "answering", "streaming", "kept", "lingering", "closed")  # of a Caller
YIELDING = (KEPT,), (READING, LINGERING), (ANSWERING,)  # who makes room for a new one, first to last
LOOP, THREAD, OWNER = "loop", "thread", "owner"  # who answers: see Plan
FAULT = "a fault in sniroute: please report it"

REQUEST_LINE = re.compile(rb"([!-~]+) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])")  # RFC 9112 section 3
FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\0\r\n]*?)[ \t]*")  # RFC 9112 section 5
HEAD_END = re.compile(rb"\n\r?\n")  # lines may end with LF alone (RFC 9112 section 2.2)


# -- requests ----------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a request gets: a status, a body, its Content-Type, and further header fields."""

    status: int
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()
    said: str = ""  # an order that was followed, in words: the log adds who gave it.  "": nothing is logged
    has_end: bool = True  # False: `body` is the beginning of a stream, and `Caller.push` sends the rest


class Declined(Exception):
    """A request that is refused.  `answer` tells its client why, as {"error": sentence}.

    `headers` are further header fields of the answer, with `_` for `-`.
    """

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(sentence)
        self.answer = Answer(status, json.dumps({"error": sentence}).encode() + b"\n", "application/json",
                             tuple((name.replace("_", "-"), value) for name, value in headers.items()))


class Head(NamedTuple):
    """The head of a request: its request line and header fields, as texts (each character is a byte)."""

    line: str  # the request line
    method: str
    path: str  # without the query; not decoded
    query: str  # behind the first `?`; not decoded
    minor: int  # of HTTP/1.x
    fields: dict[str, list[str]]  # by name in lower case

    def field(self, name: str) -> str | None:
        """A header field, by its name in lower case; None if it is missing.

        Raises Declined if it is there twice: two readers may differ.
        """
        values = self.fields.get(name, [])
        if len(values) > 1:
            raise Declined(400, f"{name.title()} is there twice")
        return values[0] if values else None

    @property
    def persists(self) -> bool:
        """Whether the connection may carry another request.  Source: RFC 9112 section 9.3."""
        words = ",".join(self.fields.get("connection", [])).lower().split(",")
        return self.minor > 0 and "close" not in (word.strip() for word in words)

    def body_length(self) -> int:
        """The size of the body in bytes.  Raises Declined."""
        if self.field("transfer-encoding") is not None:
            raise Declined(411, "a body wants a Content-Length")
        length = self.field("content-length") or "0"
        if not re.fullmatch(r"[0-9]{1,18}", length, re.ASCII):
            raise Declined(400, "Content-Length is no number")
        if int(length) > BODY_MAX:
            raise Declined(413, f"the body is over {BODY_MAX} bytes")
        return int(length)


def parse_head(data: bytes | bytearray, start: int = 0) -> tuple[Head, int] | None:
    """The head of an HTTP/1 request (RFC 9112), and where its body begins; None for "need more".

    The first `start` bytes have no end of a head in them: they were looked through before.  Raises Declined for what
    can never be right.
    """
    end = HEAD_END.search(data, max(0, start - 2))
    if (end.end() if end else len(data)) > HEAD_MAX:
        raise Declined(431 if b"\n" in data[:HEAD_MAX] else 414, f"the head is over {HEAD_MAX} bytes")
    if end is None:
        return None
    lines = [line.removesuffix(b"\r") for line in bytes(data[:end.start()]).split(b"\n")]
    match = REQUEST_LINE.fullmatch(lines[0])
    if match is None:
        raise Declined(400, "the request line is malformed")
    if match[3] != b"1":
        raise Declined(505, "this is HTTP/1.1")
    if len(lines) > FIELDS_MAX + 1:
        raise Declined(431, f"there are over {FIELDS_MAX} header fields")
    fields: dict[str, list[str]] = {}
    for line in lines[1:]:
        field = FIELD_LINE.fullmatch(line)
        if field is None:
            raise Declined(400, "the header is malformed")
        fields.setdefault(field[1].decode().lower(), []).append(field[2].decode("latin-1"))
    line, method, target = (text.decode("latin-1") for text in match.group(0, 1, 2))
    path, _, query = target.partition("?")
    return Head(line, method, path, query, int(match[4]), fields), end.end()


class Plan(NamedTuple):
    """What is done for a request."""

    act: Callable[[Caller], Answer | None]  # may raise Declined; None, by OWNER only: the answer comes later
    body: int  # bytes of the request's body, which is read first: `Caller.body`
    by: str  # LOOP: `act` never waits; THREAD: it may; OWNER: the loop runs it, and it may keep the Caller


# Header fields of every answer.  So a browser keeps no copy, guesses no content type, lets no other page show or
# load an answer, and runs no script but ours.
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store"}


def render(answer: Answer, persists: bool) -> bytes:
    """The head of an answer; `persists`: the connection may carry another one."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    # RFC 9110 section 8.6: none where there is no body by definition.
    length = {"Content-Length": str(len(answer.body))} if answer.has_end and answer.status != 204 else {}
    fields = {**HEADERS, "Connection": "keep-alive" if persists else "close", "Date": date,
              "Content-Type": answer.kind, **length, **dict(answer.headers)}
    status = http.HTTPStatus(answer.status)
    shown = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n{shown}\r\n".encode()


# -- one client --------------------------------------------------------------------------------


class Caller:
    """One client, with one request after another.  The Door's thread, but for `perform` of a Plan by THREAD.

    `readable` and `writable` may be called for nothing: the number of a descriptor that was closed in this turn of the
    loop may be this one's by now.
    """

    __slots__ = ("gate", "sock", "watch", "state", "data", "head", "plan", "body", "left", "out", "unread", "reads",
                 "at_end")

    def __init__(self, gate: Gate, sock: socket.socket):
        self.gate = gate
        self.sock = sock
        self.watch = Watch(gate.door.loop.poller, sock.fileno())
        self.state = ""
        self.data = bytearray()  # what has come of the head; behind a request, what has come of the next one
        self.head: Head | None = None  # when it is complete
        self.plan: Plan | None = None  # when the head is right
        self.body = bytearray()
        self.left = 0  # bytes of the body that are to come
        self.out: list[memoryview] = []  # what is still to be sent
        self.unread = True  # the client may still be sending its request
        self.reads = LINGER_READS  # how many more pieces are thrown away
        self.at_end: list[Callable[[], None]] = []  # see `when_over`
        gate.callers[self] = None
        self.enter(READING)

    def enter(self, state: str) -> None:
        """Be in this state from now on; the time for it begins."""
        late = self.gate.door.late
        if self.state in late:
            late[self.state].drop(self)
        self.state = state
        if state in late and not (state is KEPT and self.at_end):  # whoever waits for its end wants it kept
            late[state].put(self)

    def close(self) -> None:
        """End the connection.  A second call does nothing."""
        if self.state is CLOSED:
            return
        self.enter(CLOSED)
        del self.gate.callers[self]
        self.watch.closing()
        self.sock.close()
        self.gate.save()
        at_end, self.at_end = self.at_end, []
        for act in at_end:
            act()

    def when_over(self, act: Callable[[], None]) -> None:
        """Have `act` called once the connection is over; at once, where it is.

        Until then, or `never_mind`, it is kept without a deadline between requests.
        """
        if self.state is CLOSED:
            act()
        else:
            self.at_end.append(act)

    def never_mind(self, act: Callable[[], None]) -> None:
        """Do not call `act` after all."""
        self.at_end.remove(act)
        if self.state is KEPT:
            self.enter(KEPT)

    # -- reading -------------------------------------------------------------------------------

    def readable(self, mask: int = 0) -> None:
        """Something may have come.  A client that ends its side has left: who asks waits for the answer."""
        try:
            data = self.sock.recv(PIECE)
        except BlockingIOError:
            self.watch.wait_for(READ, self.readable)
            return
        except OSError:
            data = b""
        if not data:
            self.close()
        elif self.state in (READING, KEPT):
            self._take(data)
        elif self.state in (LINGERING, STREAMING):  # it is thrown away: no request can follow
            self.reads -= 1
            if not self.reads:
                self.close()
        else:  # the next request comes already: no more of it than a head is kept
            self.data += data
            if len(self.data) > HEAD_MAX:
                self.watch.wait_for(0)

    def _take(self, data: bytes) -> None:
        """A piece of a request; where the request is declined, answer so."""
        if self.state is KEPT:
            self.enter(READING)
        try:
            self._read(data)
        except Declined as declined:
            with contextlib.suppress(Declined):
                # Without a body the next request begins here, so the connection may go on.
                if self.gate.keeps and self.head is not None and self.head.body_length() == 0:
                    self.unread = False
            self.answer(declined.answer)

    def _read(self, data: bytes) -> None:
        """A piece of the request.  Raises Declined."""
        if self.plan is None:
            before = len(self.data)
            self.data += data
            found = parse_head(self.data, before)
            if found is None:
                self.watch.wait_for(READ, self.readable)
                return
            self.head, end = found
            del self.data[:end]
            plan = self.gate.decide(self.head)
            self.plan, self.left = plan, plan.body
            data = bytes(self.data)
            self.data.clear()
            if plan.body > len(data) and (self.head.field("expect") or "").lower() == "100-continue":
                with contextlib.suppress(OSError):  # RFC 9110 section 10.1.1; a client that is gone shows later
                    self.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.body += data[:self.left]
        self.data += data[self.left:]
        self.left -= min(self.left, len(data))
        if self.left > 0:
            self.watch.wait_for(READ, self.readable)
            return
        self.unread = False
        self.watch.wait_for(READ if self.plan.by is OWNER and len(self.data) <= HEAD_MAX else 0, self.readable)
        if self.plan.by is THREAD:
            self.gate.work(self)
            return
        if self.plan.by is OWNER:
            self.enter(PENDING)
        state = self.state
        answer = self.perform()
        if answer is not None and self.state is state:  # else it has answered already, and failed after that
            self.answer(answer)

    def perform(self) -> Answer | None:
        """Do what is asked.  Runs in a thread of the gate (by THREAD), or in the Door's (by LOOP and OWNER)."""
        try:
            return self.plan.act(self)
        except Declined as declined:
            return declined.answer
        except Exception as error:
            if ran_out(error):
                self.gate.door.is_short(SHORT_OF_MEMORY)
                return SHORT.answer
            log.exception("%s: %s", self.gate.door.name, FAULT)
            return Declined(500, "a fault in sniroute: its log says which").answer

    # -- answering -----------------------------------------------------------------------------

    @property
    def persists(self) -> bool:
        """Whether another request may follow."""
        return self.gate.keeps and not self.unread and self.head is not None and self.head.persists

    def answer(self, answer: Answer) -> None:
        """Begin to send an answer; once for each request.  Does nothing where the client has left."""
        if self.state is CLOSED:
            return
        log.debug("%s: %s: %d", self.gate.name, printable(self.head.line if self.head else "no request", 200),
                  answer.status)
        if answer.said:
            log.info("%s, by an order of %s", answer.said, asker(self.sock))
        body = b"" if self.head is not None and self.head.method == "HEAD" else answer.body
        persists = answer.has_end and self.persists
        self.out = [memoryview(each) for each in (render(answer, persists), body) if each]
        self.enter(ANSWERING if answer.has_end else STREAMING)
        self.writable()

    def push(self, data: bytes) -> None:
        """Send more of a stream.  A client that has STREAM_MAX bytes, or its gate's own limit, to read is cut off.

        What the stream began with does not count, its head and what its client had missed: a slow network takes time
        for that.
        """
        if self.state is STREAMING:
            self.out.append(memoryview(data))
            if sum(map(len, self.out[2:])) > self.gate.unread_max:
                self.close()
            else:
                self.writable()

    def writable(self, mask: int = 0) -> None:
        """Send what the client takes.  At the end, let one that was declined early read why.

        Closing a socket that has unread bytes resets the connection, and the client may lose the answer (RFC 9112
        section 9.6).  So its bytes are read first, for a while.
        """
        try:
            while self.out:
                sent = self.sock.sendmsg(self.out)
                while self.out and sent >= len(self.out[0]):
                    sent -= len(self.out.pop(0))
                if sent:
                    self.out[0] = self.out[0][sent:]
            if self.state is STREAMING:
                self.watch.wait_for(READ, self.readable)
                return
            if self.unread:
                self.sock.shutdown(socket.SHUT_WR)
                self.enter(LINGERING)
                self.watch.wait_for(READ, self.readable)
                return
        except BlockingIOError:
            self.watch.wait_for(WRITE | (READ if self.state is STREAMING else 0), self._either)
            return
        except OSError as error:
            log.debug("%s: %s", self.gate.name, printable(str(error)))
            self.close()
            return
        if self.persists:
            self._begin_again()
        else:
            self.close()

    def _either(self, mask: int) -> None:
        """A stream whose client does not take all: it may be ready for more, or have ended."""
        if mask & ~READ:
            self.writable()
        if mask & READ and self.state is STREAMING:
            self.readable()

    def _begin_again(self) -> None:
        """Wait for the next request, some of which may be there already."""
        self.head = self.plan = None
        self.body.clear()
        self.unread = True
        self.enter(KEPT)
        self.watch.wait_for(READ, self.readable)
        if self.data:
            data = bytes(self.data)
            self.data.clear()
            self.gate.door.soon.put((self, data))


def asker(sock: socket.socket) -> str:
    """Who is at the other end, for the log: the user and process at a unix socket (socket(7)), else an address."""
    try:
        if sock.family != socket.AF_UNIX:
            return show_address(sock.getpeername()[:2])
        pid, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"uid {uid}, pid {pid}"
    except (OSError, AttributeError):  # it is gone; SO_PEERCRED is Linux's
        return "somebody at the admin's address"


# -- an address --------------------------------------------------------------------------------


class Gate:
    """An address: its listener, which it owns, its callers, its threads `<name>-<n>`.

    All runs in the Door's thread.  Its own threads run Caller.perform.

    Args:
        decide: says what is done for a request, and never waits; it raises Declined.
        threads: how many there may be for Plans by THREAD.
        keeps: connections carry one request after another.
        most: clients at a time; 0 for CALLERS_MAX.
        unread_max: bytes of a stream that a client may leave unread; 0 for STREAM_MAX.
    """

    def __init__(self, door: Door, name: str, listener: socket.socket, decide: Callable[[Head], Plan], threads: int,
                 keeps: bool = False, most: int = 0, unread_max: int = 0):
        self.door = door
        self.keeps = keeps
        self.most = most or CALLERS_MAX
        self.unread_max = unread_max or STREAM_MAX
        self.name = name
        self.listener = listener
        self.decide = decide
        self.callers: dict[Caller, None] = {}  # the oldest first
        self.free = collections.deque(range(threads, 0, -1))  # the numbers n of threads that are not running
        self.live: dict[int, threading.Thread] = {}  # those that are; their keys are not in `free`
        self.waiting: collections.deque[Caller] = collections.deque()  # for a thread
        self.reserve = -1  # a descriptor that is given up for a caller where there is no other
        self.save()
        listener.setblocking(False)  # another process on this listener may accept a client that we were told of
        self.watch = Watch(door.loop.poller, listener.fileno())
        self.pause = door.loop.timer(self._resume)
        self._resume()

    def _resume(self) -> None:
        self.watch.wait_for(READ, self.accept)

    def accept(self, mask: int) -> None:
        """Accept who is there, and read what they have sent."""
        for accepted in range(ACCEPT_MAX):
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                self.save()  # it may have been spent for one who had left
                return
            except OSError as error:
                if accepted and error.errno in CAPACITY_ERRNOS:
                    return  # accept(2) looks for a descriptor first: perhaps nobody else is there
                if error.errno in CAPACITY_ERRNOS and self.spend():
                    continue  # at once: else a client of the router might have it
                if error.errno not in CAPACITY_ERRNOS or not self._make_room():
                    self.rest()
                return
            sock.setblocking(False)
            if len(self.callers) >= self.most:
                self._make_room()
            Caller(self, sock).readable()

    def save(self) -> None:
        """Have a descriptor in reserve, if there is one."""
        if self.reserve < 0:
            with contextlib.suppress(OSError):
                self.reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def spend(self) -> bool:
        """Give it up; whether there was one."""
        kept, self.reserve = self.reserve, -1
        if kept >= 0:
            os.close(kept)
        return kept >= 0

    def rest(self) -> None:
        """Accept nobody for a moment."""
        self.watch.wait_for(0)
        self.pause.set(time.monotonic() + ACCEPT_PAUSE)

    def _make_room(self) -> bool:
        """Close the connection of one client, in the order of YIELDING, the oldest first; whether there is one."""
        for states in YIELDING:
            for caller in self.callers:
                if caller.state in states and not (caller.state is KEPT and caller.at_end):
                    caller.close()
                    return True
        return False

    def work(self, caller: Caller) -> None:
        """Have a thread do what is asked, as soon as one is free."""
        if sum(each.state in (WAITING, WORKING) for each in self.callers) >= WORK_MAX:
            caller.answer(BUSY.answer)
            return
        caller.enter(WAITING)
        self.waiting.append(caller)
        self._begin()

    def give_up(self, caller: Caller) -> None:
        """No thread was free in time."""
        self.waiting.remove(caller)
        caller.answer(BUSY.answer)

    def _begin(self) -> None:
        """Give those that wait a thread, as long as there are some."""
        while self.waiting and self.free:
            caller = self.waiting.popleft()
            number = self.free.pop()
            caller.enter(WORKING)
            try:
                self.live[number] = begin_errand(caller.perform, functools.partial(self._end, number, caller),
                                                 self.door.loop.call, f"{self.name}-{number}")
            except (RuntimeError, MemoryError) as error:  # the system has no thread to spare
                self.door.is_short(str(error))
                self.free.append(number)
                caller.answer(Declined(503, str(error), Retry_After="1").answer)

    def _end(self, number: int, caller: Caller, answer: Answer | Exception) -> None:
        """A thread has an answer, or had no memory for one, and ends."""
        del self.live[number]
        self.free.append(number)
        try:
            if isinstance(answer, Exception):
                self.door.loop.failed(answer)
                answer = SHORT.answer
            if caller.state is WORKING:
                caller.answer(answer)
        except Exception:
            caller.close()
            raise
        finally:
            self._begin()


BUSY = Declined(503, "too many ask at once", Retry_After="1")
SHORT = Declined(503, SHORT_OF_MEMORY, Retry_After="1")


class Door:
    """One loop for all gates, in the thread `name`, from `open` to `close`.

    `tick` is called each `every` seconds, however many clients there are.
    """

    def __init__(self, tick: Callable[[], None], every: float, name: str = "admin"):
        self.name = name
        self.loop = Loop(self._fault)
        self.gates: list[Gate] = []
        self.short_said = Paced()  # that this host is short of something
        self.tick = tick
        self.every = every
        self.timer = self.loop.timer(self._tick)
        self.late = {state: self.loop.queue(seconds, act) for state, seconds, act in (
            (READING, REQUEST_TIME, Caller.close), (WAITING, WAIT_TIME, lambda caller: caller.gate.give_up(caller)),
            (ANSWERING, ANSWER_TIME, Caller.close), (KEPT, KEEP_TIME, Caller.close),
            (LINGERING, LINGER, Caller.close))}
        self.soon = self.loop.queue(0.0, lambda each: each[0].state is KEPT and each[0]._take(each[1]))
        self.thread = threading.Thread(target=self.loop.run, name=name, daemon=True)

    def open(self) -> None:
        """Begin to serve the gates."""
        self.timer.set(0.0)
        self.thread.start()

    def close(self) -> None:
        """Cut all requests short, and wait up to CLOSE_TIME for their threads.  Any thread but the Door's, and once."""
        if self.thread.is_alive():
            self.loop.call(self.loop.stop)
            self.thread.join()
        for gate in self.gates:
            gate.listener.close()
            for caller in list(gate.callers):
                caller.close()
            gate.spend()
        self.loop.close()
        deadline = time.monotonic() + CLOSE_TIME
        for gate in self.gates:
            for thread in list(gate.live.values()):
                if thread is not threading.current_thread():
                    thread.join(max(0.0, deadline - time.monotonic()))

    def is_short(self, why: str) -> None:
        """This host is short of something: say so, now and then.  Any thread."""
        if self.short_said.is_due(why):
            log.warning("%s: %s", self.name, why)

    def _tick(self) -> None:
        self.timer.set(time.monotonic() + self.every)
        self.tick()

    def _fault(self, owner: Any) -> None:
        """Something raised an exception: a caller ends, and all others go on.  Where memory is short, that is no fault."""
        if ran_out(sys.exc_info()[1]):
            self.is_short(SHORT_OF_MEMORY)
        else:
            log.error("%s: %s", self.name, FAULT, exc_info=sys.exc_info())
        if isinstance(owner, Caller):
            owner.close()
        elif isinstance(owner, Gate):
            owner.rest()


# -- listening ---------------------------------------------------------------------------------


def listen(where: str | tuple[str, int]) -> tuple[socket.socket, tuple[int, int] | None]:
    """Listen on (host, port), where the host `*` is every address, or at the path of a unix socket.

    Returns the socket, and for a unix one its file's (device, inode).  Raises OSError with a sentence for people.
    """
    try:
        return listen_unix(where) if isinstance(where, str) else (listen_tcp(*where), None)
    except (OSError, UnicodeError) as error:
        shown = where if isinstance(where, str) else show_address(where)
        errno = getattr(error, "errno", None) or 0  # below zero: of getaddrinfo
        words = os.strerror(errno) if errno > 0 else getattr(error, "strerror", None) or error
        raise OSError(f"{shown}: {words}") from None


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen on one address, or on all of `*`.  Raises OSError."""
    if host in ("*", "::"):
        both = socket.has_dualstack_ipv6()
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=BACKLOG,
                                    dualstack_ipv6=both)
    host = "127.0.0.1" if host == "localhost" else host  # a resolver may give it any address
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family, backlog=BACKLOG)


def listen_unix(path: str) -> tuple[socket.socket, tuple[int, int]]:
    """Listen at `path`, and replace a socket that an earlier process left there.  Raises OSError.

    Returns the socket, and its file's (device, inode).  It is made under another name and renamed when it listens and
    has its mode: nobody can connect to it before that.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError("there is a file that is no socket: remove it, or name another path")
    early = f"{path}.{os.getpid()}"
    with contextlib.ExitStack() as undo:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(early)
        listener = undo.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(early)
        undo.callback(os.unlink, early)
        os.chmod(early, 0o660)
        listener.listen(BACKLOG)
        identity = os.stat(early)
        os.rename(early, path)
        undo.pop_all()
    return listener, (identity.st_dev, identity.st_ino)
