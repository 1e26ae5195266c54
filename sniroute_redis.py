"""sniroute_redis: a Redis that is asked, in a loop: one connection, kept up for ever.

    owner --- ask(words, done) ---> Redis ------ Line ------ Wire ------ a server
          <-- on_up, on_down                  questions and answers     TCP, TLS (layers)
                                              in order (resp)
    owner --- Redis.subscribe ----> Subscription: the same on a connection of its own
          <-- on_message, on_up, on_down

    the life of a Link, of which there are these two kinds:

        RESTING ---> [LOOKING] ---> OPENING ---> GREETING ---> UP       any ---> CLOSED
           ^          Sentinels      TCP, TLS     login, role   |
           +----------------------------------------------------+
             after a failure: again, 0.1 to 5 s later

A question is asked once.  Where its connection breaks nobody knows whether the server has done it, so `done` gets
Failed, and its owner decides.  A question that comes during the first try of all, or the first one after a loss, waits
for that try; while the server is known to be away, it fails at once, with the reason of that.

A server that says nothing is lost, too.  A question whose time is over ends the connection: an answer that came later
would be taken for that of the next question.  A server that is idle is asked PING.

With Sentinels each try asks them, one after another, the one that answered last first; the server has to say itself
that it is the master.  While a link is up they are asked again now and then: a master that a failover has left behind
a broken network may go on to answer us.

Failures are Failed with a word of sniroute_resp.REASONS, and the server's own words.  This room knows nothing of what
is kept in Redis.

Threads: the loop's only, beside those of the resolver (sniroute_dial).  A callback is never called before the method
that it was given to has returned.

Seams: I want to ...
    ask otherwise              `Redis.ask`; a Script, where it has to be done in one step
    wait longer, or less       the limits below
    another kind of link       a subclass of Link: `greeted`, `unasked`, `lost`

This room imports sniroute_resp, sniroute_layers (Wire, Opening), sniroute_dial (WayOut), sniroute_loop, sniroute_names
and sniroute_refusals.
"""

from __future__ import annotations

import collections
import hashlib
import random
import ssl
from typing import Any, Callable, Generator, Sequence

from sniroute_dial import WayOut
from sniroute_layers import Opening, Place as Peer, Wire, Wires
from sniroute_loop import NEVER, Loop, monotonic, owner_of
from sniroute_names import show_address
from sniroute_refusals import Failed, Malformed
from sniroute_resp import (ErrorReply, Place, Push, Reader, Server, Value, Word, Words, encode, failure, find_master,
                           greet)

__version__ = "0.1.0"

# Limits, each with its reason.  Seconds where nothing else is said.
ANSWER_MAX = 2.0  # until an answer has to be there, by default: Redis needs less than a millisecond
TRY_MAX = 5.0  # for a connection with its greeting: a SYN is sent three times in that
SENTINEL_MAX = 1.0  # for one Sentinel: a dead one holds up a failover that takes some seconds anyway
IDLE = 5.0  # without a word from the server, until it is asked PING
CHECK = 10.0  # between questions whether the master is another one
AGAIN_FIRST, AGAIN_LAST = 0.1, 5.0  # until the next try; each one doubles it
STEADY = 5.0  # a loss after this begins with AGAIN_FIRST; an earlier one does not, or it would be a loop
ASKED_MAX = 10_000  # questions without an answer: 0.1 s of what a server can do
PEERS_MAX = 32  # addresses that are remembered, with their TLS session: masters come and go
UNSENT_MAX = 8 << 20  # bytes of questions that the kernel has not taken: the server does not read any more

# What a link is doing, in words for people.
RESTING, LOOKING, OPENING, GREETING, UP, CLOSED = (
    "waiting for the next try", "asking the Sentinels", "connecting", "logging in", "up", "closed")
DIAL_REASONS = {"refused": "unreachable", "proxy": "unreachable"}  # as sniroute_resp calls them

Done = Callable[[Any], None]  # gets a Value, or Failed


def ignore(*what: Any) -> None:
    """The callback where nobody waits for an answer."""


class Script:
    """A script in Lua, which a server knows by its digest."""

    __slots__ = ("text", "digest")

    def __init__(self, text: str):
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Ask:
    """A question: the bytes to send, who gets the answer, and until when (by the loop's clock)."""

    __slots__ = ("data", "done", "deadline")

    def __init__(self, data: bytes, done: Done, deadline: float):
        self.data = data
        self.done = done
        self.deadline = deadline


# -- what links share --------------------------------------------------------------------------


class Net:
    """What the links of one Redis share: the way out, TLS, and what is done once a turn."""

    def __init__(self, loop: Loop, place: Place, context: ssl.SSLContext | None, way: WayOut | None):
        self.loop = loop
        self.way = way or WayOut(loop, None, "")  # HTTPS_PROXY is for the web
        self.wires = Wires(loop)
        self.context = (context or ssl.create_default_context()) if place.is_tls else None
        self.sending = loop.batch(Line.flush)  # lines that have something to send in this turn
        self.soon = loop.queue(0.0, lambda act: act())  # what is called in the next turn
        self.peers: collections.OrderedDict[tuple[str, int], Peer] = collections.OrderedDict()

    def peer(self, host: str, port: int) -> Peer:
        """Where connections lead to: the same one each time, for the sake of its TLS session."""
        if len(self.peers) >= PEERS_MAX:
            self.peers.popitem(False)
        if (host, port) not in self.peers:
            self.peers[host, port] = Peer(host, port, self.context, host)
        return self.peers[host, port]

    def tell(self, done: Done, result: Any) -> None:
        """Call back.  A fault there is its owner's, not the connection's."""
        try:
            done(result)
        except Exception:
            self.loop.fault(owner_of(done))


class Line:
    """A connection to a Redis, or a Sentinel: questions, and answers in the same order.  It owns its wire.

        unasked(value)   what came without a question: a Push, and in RESP2 what a subscription says
        lost(Failed)     it is over, by the other side; `asks` are those without an answer
    """

    __slots__ = ("net", "wire", "reader", "asks", "out", "heard", "pinged", "unasked", "lost")

    def __init__(self, net: Net, wire: Wire, unasked: Callable[[Value], None], lost: Callable[[Failed], None]):
        self.net = net
        self.wire = wire
        self.reader = Reader()
        self.asks: collections.deque[Ask] = collections.deque()  # without an answer, the oldest first
        self.out: list[bytes] = []  # what is sent at the end of this turn
        self.heard = monotonic()  # when something came last
        self.pinged = -NEVER  # when it was asked for a sign of life last
        self.unasked = unasked
        self.lost = lost
        wire.on_data = self._on_data
        wire.on_end = self._on_end

    @property
    def is_full(self) -> bool:
        """Whether nothing more is to be asked now."""
        return len(self.asks) >= ASKED_MAX or self.wire.unsent > UNSENT_MAX

    def ask(self, ask: Ask) -> None:
        """Send a question."""
        self.asks.append(ask)
        self.say(ask.data)

    def say(self, data: bytes) -> None:
        """Send something at the end of this turn: what many ask in a turn leaves in one write."""
        if not self.out:
            self.net.sending.append(self)
            self.net.loop.hurry()  # whoever asks may be a batch behind this one
        self.out.append(data)

    def flush(self) -> None:
        """Send it."""
        data, self.out = b"".join(self.out), []
        self.wire.send(data)

    def close(self) -> None:
        """End it; what was asked before is still sent."""
        if self.out:
            self.flush()
        self.wire.close()

    def reset(self) -> None:
        """Break it off; nothing more is sent."""
        self.wire.reset()

    def _on_data(self, data: bytes) -> None:
        self.heard = monotonic()
        try:
            for value in self.reader.feed(data):
                self._hear(value)
                if not self.wire.is_open:
                    return
        except Malformed as error:
            self._break(Failed("answer", str(error)))

    def _hear(self, value: Value) -> None:
        if isinstance(value, Push) or not self.asks:
            self.unasked(value)
        else:
            ask = self.asks.popleft()
            self.net.tell(ask.done, value)

    def _on_end(self, failed: Failed | None) -> None:
        self.lost(failed or Failed("reset", "it has ended the connection"))

    def _break(self, failed: Failed) -> None:
        self.wire.reset()
        self.lost(failed)


def talk(line: Line, steps: Generator[Words, Value, Any], done: Done) -> None:
    """Have a talk of sniroute_resp (`greet`, `find_master`) over a line: `done` gets what it returns, or Failed."""
    def step(answer: Value) -> None:
        try:
            words = steps.send(answer)
        except StopIteration as end:
            done(end.value)
        except Failed as failed:
            done(failed)
        else:
            line.ask(Ask(encode(*words), step, NEVER))

    step(None)


def failed_at(address: tuple[str, int], failed: Failed) -> Failed:
    """Why a server does not help, in the words of this room, and which one."""
    return Failed(DIAL_REASONS.get(failed.reason, failed.reason), f"{show_address(address)}: {failed}")


# -- Sentinels ---------------------------------------------------------------------------------


class Search:
    """Asks the Sentinels where the master is, one after another.  `done` gets (host, port), or Failed."""

    def __init__(self, net: Net, place: Place, done: Done):
        self.net = net
        self.place = place
        self.done = done
        self.order = list(place.hosts)  # the one that answered last comes first
        self.left: list[tuple[str, int]] = []  # that are still to be asked
        self.words: list[str] = []  # of those that did not help
        self.opening: Opening | None = None
        self.line: Line | None = None
        self.timer = net.loop.timer(self._late)

    def start(self) -> None:
        """Begin with the first one."""
        self.cancel()
        self.left, self.words = self.order.copy(), []
        self._next()

    def cancel(self) -> None:
        """Ask nobody any more."""
        self.timer.set(NEVER)
        if self.opening is not None:
            self.opening.cancel()
        if self.line is not None:
            self.line.reset()
        self.opening = self.line = None

    @property
    def is_over(self) -> bool:
        """Whether nobody is being asked."""
        return self.opening is None and self.line is None

    def _next(self) -> None:
        self.timer.set(monotonic() + SENTINEL_MAX)
        self.opening = Opening(self.net.wires, self.net.way, self.net.peer(*self.left[0]), self._opened)
        self.opening.start()

    def _opened(self, wire: Wire | Failed) -> None:
        self.opening = None
        if isinstance(wire, Failed):
            self._answered(wire)
            return
        self.line = Line(self.net, wire, ignore, self._answered)
        talk(self.line, find_master(self.place), self._answered)

    def _late(self) -> None:
        """The time of this Sentinel is over."""
        self._answered(Failed("timeout", f"no answer within {SENTINEL_MAX:g} s"))

    def _answered(self, result: tuple[str, int] | Failed) -> None:
        """One of them has answered, or will not."""
        self.cancel()
        asked = self.left.pop(0)
        if isinstance(result, Failed):
            failed = failed_at(asked, result)
            self.words.append(str(failed))
            if self.left:
                self._next()
                return
            result = Failed(failed.reason, f"no Sentinel helps: {'; '.join(self.words)}")
        else:
            self.order.remove(asked)
            self.order.insert(0, asked)
        self.done(result)


# -- links -------------------------------------------------------------------------------------


class Link:
    """A connection to the server of a Place, kept up for ever.

        on_up(server)    it is up
        on_down(Failed)  it is lost, or cannot be had; again only where the reason changes
    """

    def __init__(self, net: Net, place: Place, on_up: Callable[[Server], None], on_down: Callable[[Failed], None]):
        self.net = net
        self.place = place
        self.on_up = on_up
        self.on_down = on_down
        self.state = RESTING
        self.since = monotonic()  # when that state has begun
        self.failed: Failed | None = None  # why the last try failed; None: none has failed since the link was up
        self.told = ""  # the reason that `on_down` has heard last; "" since the link was up
        self.server: Server | None = None  # once it has greeted, until the link is lost
        self.master = place.hosts[0]  # the address that is used
        self.delay = AGAIN_FIRST  # seconds until the next try, if this one fails
        self.opening: Opening | None = None
        self.line: Line | None = None
        self.search = Search(net, place, self._found) if place.master else None
        self.check_at = NEVER  # when the Sentinels are asked again
        self.last_heard = NEVER  # of the line before this one: see `heard`
        self.timer = net.loop.timer(self._ring)  # of the state: the next try, its deadline, or `_watch`
        self.timer.set(self.since)

    @property
    def heard(self) -> float:
        """When the server has said something, by the loop's clock; NEVER, where it has said nothing yet."""
        return self.line.heard if self.line is not None else self.last_heard

    @property
    def peer(self) -> tuple[str, int] | None:
        """The IP address and the port of the server; None where there is no connection."""
        wire: Any = self.line and self.line.wire
        wire = getattr(wire, "below", wire)  # of TLS
        try:
            return wire and wire.sock.getpeername()[:2]
        except OSError:  # it has just ended
            return None

    def close(self) -> None:
        """End it.  No callback is called any more."""
        self._set(CLOSED)
        self.timer.set(NEVER)
        self._clear(Line.close)

    # -- what the kinds of link do otherwise -----------------------------------------------------

    def greeted(self) -> None:
        """The server has greeted: the kind does what it needs, and calls `up`."""
        raise NotImplementedError

    def unasked(self, value: Value) -> None:
        """Something came without a question."""
        raise NotImplementedError

    def lost(self, asks: Sequence[Ask], failed: Failed) -> None:
        """The connection, or the try, is over; `asks` had no answer."""

    # -- a try -----------------------------------------------------------------------------------

    def _set(self, state: str) -> None:
        self.state, self.since = state, monotonic()

    def _ring(self) -> None:
        """The time of the state is over."""
        if self.state is RESTING:
            self._begin()
        elif self.state is UP:
            self._watch()
        else:
            self._broke(Failed("timeout", self.state))

    def _begin(self) -> None:
        """Begin a try."""
        if self.search is None:
            self._open()
        else:
            self._set(LOOKING)  # Search has a timer of its own
            self.search.start()

    def _found(self, result: tuple[str, int] | Failed) -> None:
        """The Sentinels have answered."""
        if self.state is LOOKING:
            if isinstance(result, Failed):
                self.drop(result)
            else:
                self.master = result
                self._open()
        elif self.state is UP and not isinstance(result, Failed) and result != self.master:
            self.drop(Failed("changed", f"{show_address(result)} instead of {show_address(self.master)}"))

    def _open(self) -> None:
        self._set(OPENING)
        self.timer.set(monotonic() + TRY_MAX)
        self.opening = Opening(self.net.wires, self.net.way, self.net.peer(*self.master), self._opened)
        self.opening.start()

    def _opened(self, wire: Wire | Failed) -> None:
        self.opening = None
        if isinstance(wire, Failed):
            self._broke(wire)
            return
        self._set(GREETING)
        self.line = Line(self.net, wire, self.unasked, self._broke)
        talk(self.line, greet(self.place), self._greeted)

    def _broke(self, failed: Failed) -> None:
        """The try, or the connection, has failed at this server."""
        self.drop(failed_at(self.master, failed))

    def _greeted(self, result: Server | Failed) -> None:
        if isinstance(result, Failed):
            self._broke(result)
        else:
            self.server = result
            self.greeted()

    # -- up, and down ----------------------------------------------------------------------------

    def up(self) -> None:
        """The link can be used: the kind calls this once it has done what it needs."""
        self._set(UP)
        self.failed = None
        self.told = ""
        self.check_at = self.since + CHECK if self.search is not None else NEVER
        self._watch()
        self.net.tell(self.on_up, self.server)

    def _watch(self) -> None:
        """While the link is up: see that the server is there, and that it is still the master."""
        now = monotonic()
        line = self.line
        if now >= self.check_at:
            self.check_at = now + CHECK
            if self.search.is_over:
                self.search.start()
        if line.pinged > line.heard:  # and not only silent: this process may have stood still, too
            if now >= line.pinged + ANSWER_MAX:
                self._broke(Failed("timeout", "it does not answer PING"))
                return
        elif now >= line.heard + IDLE:
            line.pinged = now
            self.ping()
        due = line.pinged + ANSWER_MAX if line.pinged > line.heard else line.heard + IDLE
        self.timer.set(min(due, self.check_at))

    def ping(self) -> None:
        """Ask for a sign of life."""
        self.line.ask(Ask(encode("PING"), ignore, NEVER))

    def drop(self, failed: Failed) -> None:
        """The connection, or the try, is over; the next one comes."""
        if self.state is CLOSED:
            return
        was_up, was_steady = self.state is UP, self.state is UP and monotonic() - self.since >= STEADY
        asks = self.line.asks if was_up else ()  # before that they are those of a talk
        self._clear(Line.reset)
        self._set(RESTING)
        self.server = None
        self.failed = None if was_up else failed  # the first try after a loss may be waited for
        if was_steady:
            self.delay = AGAIN_FIRST
        self.timer.set(self.since + self.delay * random.uniform(0.5, 1.0))
        self.delay = min(self.delay * 2, AGAIN_LAST)
        is_news, self.told = self.told != failed.reason, failed.reason
        if is_news:
            self.net.tell(self.on_down, failed)
        self.lost(asks, failed)

    def _clear(self, end: Callable[[Line], None]) -> None:
        """Nothing is under way any more."""
        if self.search is not None:
            self.search.cancel()
        if self.opening is not None:
            self.opening.cancel()
        line, self.line, self.opening = self.line, None, None
        if line is not None:
            self.last_heard = line.heard
            end(line)


class Redis(Link):
    """A Redis that is asked.  All methods run in the loop.

    Args:
        place: of `parse_url`.
        on_up, on_down: see Link.
        context: of TLS; by default it trusts what this host trusts (SSL_CERT_FILE names others).
        way: how connections leave this host; by default straight.
    """

    def __init__(self, loop: Loop, place: Place, on_up: Callable[[Server], None] = ignore,
                 on_down: Callable[[Failed], None] = ignore, context: ssl.SSLContext | None = None,
                 way: WayOut | None = None):
        self.waiting: collections.deque[Ask] = collections.deque()  # questions that wait for a connection
        self.deadlines = loop.timer(self._late)  # at the earliest deadline of a question
        self.subscriptions: list[Subscription] = []
        super().__init__(Net(loop, place, context, way), place, on_up, on_down)

    def ask(self, *words: Word, done: Done, timeout: float = ANSWER_MAX) -> None:
        """Have one command done: `done(value)`, or `done(Failed)`.  An error of the server is Failed, too.

        What was asked together is sent together, and done in this order.  `timeout`: seconds until an answer has to be
        there.
        """
        self._ask(Ask(encode(*words), self._with_failures(done), monotonic() + timeout))

    def run(self, script: Script, keys: Sequence[Word], words: Sequence[Word], done: Done,
            timeout: float = ANSWER_MAX) -> None:
        """Have a script done, as `ask`; its text is sent only where the server does not know it yet."""
        deadline = monotonic() + timeout
        rest = len(keys), *keys, *words

        def known(answer: Any) -> None:
            if isinstance(answer, Failed) and answer.reason == "script":
                self._ask(Ask(encode("EVAL", script.text, *rest), self._with_failures(done), deadline))
            else:
                done(answer)

        self._ask(Ask(encode("EVALSHA", script.digest, *rest), self._with_failures(known), deadline))

    def subscribe(self, channel: str, on_message: Callable[[bytes], None], on_up: Callable[[Server], None] = ignore,
                  on_down: Callable[[Failed], None] = ignore) -> Subscription:
        """Hear what is published, on a connection of its own; until it is closed, or this is."""
        self.subscriptions.append(Subscription(self.net, self.place, channel, on_message, on_up, on_down))
        return self.subscriptions[-1]

    def close(self) -> None:
        """End it, with its subscriptions.  No callback is called any more."""
        self.waiting.clear()
        self.deadlines.set(NEVER)
        for subscription in self.subscriptions:
            subscription.close()
        super().close()
        self.net.soon.due.clear()
        self.net.wires.close()

    def _with_failures(self, done: Done) -> Done:
        """What calls `done` with an answer, and with Failed instead of an ErrorReply."""
        def answered(answer: Value) -> None:
            if isinstance(answer, ErrorReply):
                answer = failure(answer)
            done(answer)
            if isinstance(answer, Failed) and answer.reason in ("readonly", "login") and self.state is UP:
                self.drop(answer)  # the name, or the Sentinels, may lead to another server by now
        return answered

    def _ask(self, ask: Ask) -> None:
        """Send a question; or have it wait for a connection, or fail, as the room's docstring says."""
        if self.state is CLOSED:
            return
        if self.state is UP and not self.line.is_full:
            self.line.ask(ask)
        elif self.state is UP or len(self.waiting) >= ASKED_MAX:
            count = len(self.waiting) or len(self.line.asks)
            self._fail(ask, Failed("full", f"{count:,} questions wait for an answer"))
            return
        elif self.failed is not None:
            self._fail(ask, self.failed)
            return
        else:
            self.waiting.append(ask)
        if ask.deadline < self.deadlines.when:
            self.deadlines.set(ask.deadline)

    def _fail(self, ask: Ask, failed: Failed) -> None:
        """Tell that it will not be done: in the next turn, since no callback comes before `ask` returns."""
        self.net.soon.put(lambda: self.net.tell(ask.done, failed))

    def _late(self) -> None:
        """The time of a question may be over: where it was sent, the connection ends."""
        now = monotonic()
        late = [ask for ask in self.waiting if ask.deadline <= now]
        self.waiting = collections.deque(ask for ask in self.waiting if ask.deadline > now)
        for ask in late:
            self.net.tell(ask.done, failed_at(self.master, Failed("timeout", self.state)))
        if self.state is UP and any(ask.deadline <= now for ask in self.line.asks):
            self._broke(Failed("timeout", "it does not answer"))
        asks = (*self.waiting, *(self.line.asks if self.state is UP else ()))
        self.deadlines.set(min((ask.deadline for ask in asks), default=NEVER))

    def greeted(self) -> None:
        self.up()
        waiting, self.waiting = self.waiting, collections.deque()
        for ask in waiting:
            self._ask(ask)

    def unasked(self, value: Value) -> None:
        if not isinstance(value, Push):
            self._broke(failure(value) if isinstance(value, ErrorReply) else Failed("answer", "an answer to nothing"))

    def lost(self, asks: Sequence[Ask], failed: Failed) -> None:
        asks = list(asks)
        if self.failed is not None:  # a try has failed, so nobody waits any more
            asks += self.waiting
            self.waiting.clear()
        for ask in asks:
            self.net.tell(ask.done, failed)


class Subscription(Link):
    """Hears what is published on a channel.

    `on_up` comes when the server has confirmed that.  What was published before is not heard, so whoever needs it reads
    then what is there.
    """

    def __init__(self, net: Net, place: Place, channel: str, on_message: Callable[[bytes], None],
                 on_up: Callable[[Server], None], on_down: Callable[[Failed], None]):
        self.channel = channel.encode()
        self.on_message = on_message
        super().__init__(net, place, on_up, on_down)

    def greeted(self) -> None:
        self.line.say(encode("SUBSCRIBE", self.channel))  # in RESP3 no answer comes, but a push

    def ping(self) -> None:
        self.line.say(encode("PING"))  # in RESP2 the answer looks like a message

    def unasked(self, value: Value) -> None:
        if isinstance(value, ErrorReply):
            self._broke(failure(value))
            return
        kind, *rest = value if isinstance(value, list) and value else (None,)
        if kind == b"message" and rest[:1] == [self.channel] and len(rest) == 2 and self.state is UP:
            self.net.tell(self.on_message, rest[1])
        elif kind == b"subscribe" and self.state is not UP:
            self.up()
