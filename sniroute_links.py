"""sniroute_links: one session to one pod, for one client; spare ones.

    open(pod, errand) ---> Negotiation --- one transport after another is asked for ---> Link ---> done
    take(pod) -------------------------------------------------------------------------> a spare Link, if there is one
    prepare(pod) --------> Negotiation ---------------------------> a spare Link, for the next client

    A PodRef names the pod.  A spare Link saves its client the upgrade: only the streams are still to be opened.

    owner --- begin, send, end, pause ---> Link ---> machine (sniroute_spdy, _channels) ---> Wire (sniroute_layers)
          <--- on_data, on_ended, ... ----      <---                                     <---

An errand is what is asked of a pod, and a transport is a kind of upgrade for it (sniroute_transports).  Servers, roles
(RBAC) and proxies on the way differ in which they take.  So each is tried where the one before was refused; what has
worked is tried first from then on, for each context (`Links.orders`).

The life of a Link is `Link.state`:

    SPARE <---> BUSY        `begin` gives it a client; `release` takes it away, and keeps it if the call is over
    either ---> CLOSED      the wire has ended, a rule was broken, no sign of life came, or nobody needs it

A Link carries one client at a time, because SPDY has no flow control here: one that does not read would stop all.  So
backpressure is that of the wire: `pause` stops reading it, and `is_full` says that it takes no more.

Both sides ping.  A wire on which nothing comes, although it was asked MISSES times, is dead.  While we read nothing
ourselves (`pause`) that means nothing; and a pod that does not read what a client sends keeps its whole session from
answering, so after a lot was sent there is more patience.

Threads: all runs in the loop.

Seams: I want to ...
    another kind of upgrade            a row in TRANSPORTS (sniroute_transports)
    another sign that a pod is gone    sniroute_passage, UNTOUCHED
    keep more spare links              SPARES

This room imports sniroute_transports, sniroute_api (Api, Job), sniroute_layers (Wire), sniroute_channels and
sniroute_spdy (their events), sniroute_upgrade (new_key), sniroute_dial (Failed), sniroute_loop, sniroute_names and
sniroute_refusals.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any, Callable, Protocol

from sniroute_api import Api, Job, Reply, Upgraded
from sniroute_channels import Closed
from sniroute_dial import Failed
from sniroute_layers import PIECE, RECORD, ROOM, Wire
from sniroute_loop import Loop
from sniroute_names import printable
from sniroute_refusals import Malformed
from sniroute_spdy import (ERROR, HALF_CLOSED_REMOTE, Accepted, Call, Data, Ended, Event, GoneAway, Reset, Session,
                           Told)
from sniroute_transports import (TRANSPORTS, Errand, Forward, Machine, PodRef, Transport, headers_of, is_final,
                                 protocol_of, refused)
from sniroute_upgrade import new_key

if TYPE_CHECKING:
    from sniroute_kubeconfig import Context

__version__ = "0.1.0"

SPARES = 2  # links to one pod that are kept for the next clients; each costs 30 to 70 KiB
SPARES_MANY = 32  # spare links of all pods together, above which a pod keeps one: so that more pods have one
SPARES_MAX = 64  # spare links of all pods together
SETTLE = 5.0  # seconds that the node has to end a call which both sides have ended
SPARE_FOR = 300.0  # seconds for which a spare link waits for a client
OPEN_AHEAD = 15.0  # seconds that the upgrade of a spare link may take
MISSES = 2  # pings without a sign of life, after which a wire is dead
PATIENCE = 8  # the same, after a lot was sent: a pod that does not read it keeps the session from answering
BULK = 1 << 16  # bytes since the last sign of life that are a lot: less fits into what the far ends keep
FRESH = 1.0  # seconds: a link of which something was heard since then is alive


def clock() -> float:
    """Seconds, which pass while the host sleeps, too (where the system has such a clock)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


# -- a link in the making ----------------------------------------------------------------------


class Negotiation:
    """A link in the making: one transport after another is asked for, until one is taken.

    `done(Link)` or `done(Failed)` is called once, unless it is cancelled.
    A Link that `done` is given is to be begun at once, or parked.  `deadline` is of time.monotonic.
    """

    __slots__ = ("links", "pod", "errand", "done", "deadline", "todo", "job", "first")

    def __init__(self, links: Links, pod: PodRef, errand: Errand, done: Callable[[Link | Failed], None],
                 deadline: float):
        self.links = links
        self.pod = pod
        self.errand = errand
        self.done = done
        self.deadline = deadline
        self.todo = list(links.order(pod, errand.resource))
        if errand.once:
            # With SPDY a command begins when we have opened its streams; with WebSocket before its 101, which may be
            # lost.  And SPDY's can always be told that its input has ended.
            self.todo.sort(key=lambda transport: transport.is_websocket)
        self.job: Job | None = None
        self.first: Failed | None = None  # the first refusal: the others are often only about the transport

    @property
    def phase(self) -> str:
        """What it waits for, in words for people."""
        return f"upgrading, {self.job.phase}" if self.job is not None else "upgrading"

    def start(self) -> None:
        """Ask for the next transport."""
        transport = self.todo.pop(0)
        query = [("ports", str(self.errand.port))] if transport.by_query else self.errand.query()
        path = self.pod.path(self.errand.resource, query)
        key = new_key() if transport.is_websocket else ""
        self.job = self.pod.api.upgrade(transport.method, path, headers_of(transport, key),
                                        functools.partial(self.on_answer, transport, path, key), self.deadline,
                                        once=self.errand.once and transport.is_websocket)

    def cancel(self) -> None:
        """Break it off."""
        if self.job is not None:
            self.job.cancel()

    def on_answer(self, transport: Transport, path: str, key: str, answer: Upgraded | Reply | Failed) -> None:
        """The API server has answered, or there is no answer."""
        access, self.job = self.job.access, None
        if isinstance(answer, Upgraded):
            try:
                protocol = protocol_of(transport, key, answer.headers)
            except Malformed as error:
                answer.wire.reset()
                why, is_over = Failed("answer", str(error)), False
            else:
                self._open(transport, protocol, answer, access.context)
                return
        elif isinstance(answer, Reply):
            why, is_over = refused(answer, transport, path), is_final(answer)
        else:
            # A proxy on the way may break off what it does not know.
            why, is_over = answer, answer.reason not in ("reset", "answer", "forbidden")
        self.first = self.first or why
        if is_over or not self.todo:
            self.done(why if is_over else self.first)
        else:
            self.start()

    def _open(self, transport: Transport, protocol: str, upgraded: Upgraded, context: Context) -> None:
        """There is a session; `context`: as whom we have asked for it."""
        machine = transport.machine(protocol, context.cluster.is_tls, self.errand)
        link = Link(self.links, self.pod, transport, self.errand, upgraded.wire, machine, context)
        self.done(link)
        if upgraded.rest and link.state is not CLOSED:
            link.on_data(upgraded.rest)


# -- links -------------------------------------------------------------------------------------


class Owner(Protocol):
    """Whom a Link serves: a client.  Its methods are called in the loop, and may release or break off the link.

    Behind on_told (of a Forward), on_cut and on_over nothing more is called.
    """

    def on_accepted(self) -> None:
        """The node has taken the call; whether anybody listens on its port is not known yet."""

    def on_data(self, name: str, pieces: list[memoryview]) -> None:
        """Bytes came on a stream.  Use them, or copy them: they are not kept."""

    def on_ended(self, name: str) -> None:
        """Nothing more comes on this stream."""

    def on_told(self, text: str) -> None:
        """What the error stream says: why a Forward was cut, or what came of a command.  A stranger's words."""

    def on_cut(self, why: Failed) -> None:
        """The call was reset, or its session is lost."""

    def on_over(self) -> None:
        """The far end neither sends nor takes anything more."""

    def on_room(self) -> None:
        """More may be sent: `is_full` was true."""


class Nobody:
    """The owner of a link whose client has left, while the node still ends the call."""

    def ignore(self, *_: Any) -> None:
        """Nobody needs to know."""

    on_accepted = on_data = on_ended = on_told = on_cut = on_over = on_room = ignore


NOBODY = Nobody()
SPARE, BUSY, CLOSED = "spare", "busy", "closed"  # the states of a Link


class Link:
    """One upgraded connection to one pod.  All methods run in the loop."""

    __slots__ = ("links", "pod", "transport", "errand", "wire", "machine", "context", "state", "call", "owner",
                 "is_accepted", "is_used", "is_paused", "heard_at", "missed", "bulk")

    def __init__(self, links: Links, pod: PodRef, transport: Transport, errand: Errand, wire: Wire,
                 machine: Machine, context: Context):
        self.links = links
        self.pod = pod
        self.transport = transport
        self.errand = errand  # for which it was made; `begin` may be given another port
        self.wire = wire
        self.machine = machine
        self.context = context
        self.state = SPARE
        self.call: Call | None = None
        self.owner: Owner | None = None
        self.is_accepted = False  # the call
        self.is_used = False  # it has carried a call before this one
        self.is_paused = False
        self.heard_at = clock()
        self.missed = 0  # pings since then
        self.bulk = 0  # bytes sent since then
        wire.use(links.buffers)
        wire.on_data, wire.on_end, wire.on_room = self.on_data, self.on_end, self.on_room
        links.opened(self)

    # -- for its client

    @property
    def is_fresh(self) -> bool:
        """Whether something was heard a moment ago: what is sent now arrives, as far as one can know."""
        return clock() - self.heard_at < FRESH

    @property
    def is_full(self) -> bool:
        """Whether the wire takes no more for now; `on_room` comes when it does."""
        return self.wire.unsent > ROOM

    def begin(self, owner: Owner, errand: Errand) -> None:
        """Open the call for `owner`, on a link that is spare or new."""
        self.links.unpark(self)
        self.state, self.owner, self.is_accepted = BUSY, owner, False
        if not isinstance(self.machine, Session):
            self.call = self.machine.call  # the upgrade has opened it
        elif isinstance(errand, Forward):
            self.call = self.machine.forward(errand.port)
        else:
            self.call = self.machine.command()
        self.flush()

    def send(self, data: bytes | memoryview) -> None:
        """Send the client's bytes."""
        self.bulk += len(data)
        self.machine.send(self.call, data)
        self.flush()

    def end(self) -> bool:
        """The client has ended.  Returns whether the far end is told so; where not, all that is left is to close."""
        told = self.machine.end(self.call)
        self.flush()
        return told

    def pause(self) -> None:
        """Read nothing for now: the client takes no more."""
        if not self.is_paused and self.state is not CLOSED:
            self.is_paused = True
            self.wire.pause()

    def resume(self) -> None:
        """Read again."""
        if self.is_paused and self.state is not CLOSED:
            self.is_paused = False
            self.missed = 0
            self.wire.resume()

    def release(self) -> None:
        """The client needs it no more.  It serves another one where nothing is left of the call; else it is closed.

        A call that is reset may have much in flight, and the server's library goes on sending until it notices: so the
        connection ends with it.
        """
        self.owner = NOBODY
        if self.state is CLOSED:
            return
        self.resume()
        if self.call is None or self.call.is_over:
            self._free()
        elif self.call.kind.is_ended_by_text and set(self.call.streams) == {ERROR}:
            self.links.settling.put(self)  # both have ended, and the node says so in a moment
        else:
            self.machine.reset(self.call)
            self.close()

    def _free(self) -> None:
        """Nothing is left of the call."""
        self.call = self.owner = None
        self.is_used = True
        if not (self.machine.takes_more and self.links.park(self)):
            self.close()

    # -- from the wire

    def on_data(self, data: bytes | memoryview) -> None:
        """Bytes came.  A fault of ours in what they mean ends this client, and no other."""
        self.heard_at = clock()
        self.missed = self.bulk = 0
        try:
            self._hear(data)
        except Malformed as error:
            self.lose(Failed("broken", str(error)))
        except Exception:
            self._fault()

    def _fault(self) -> None:
        """Inside `except`: tell, and end."""
        self.links.loop.fault(self.owner)
        self.owner = None
        self.close()

    def _hear(self, data: bytes | memoryview) -> None:
        """Tell the client what the bytes mean: what comes together on one stream, together."""
        name, pieces = "", []
        for event in self.machine.receive(data):
            kind = type(event)
            if kind is Data:
                if event.call is not self.call:
                    continue
                if event.name != name and pieces:
                    self.owner.on_data(name, pieces)
                    pieces = []
                name = event.name
                pieces.append(event.data)
                continue
            if pieces and self.call is not None:
                self.owner.on_data(name, pieces)
            pieces = []
            act = MEANINGS.get(kind)
            if act is not None:
                act(self, event)
        if pieces and self.call is not None:
            self.owner.on_data(name, pieces)
        if self.state is CLOSED:
            return
        self.flush()
        if self.owner is NOBODY:
            if self.call is None or self.call.is_over:
                self.links.settling.drop(self)
                self._free()
        elif self.call is not None and is_over_there(self.call):
            self.end()
            self.owner.on_over()

    def on_end(self, error: Failed | None) -> None:
        """The wire has ended."""
        self.lose(error or Failed("lost", "the API server has ended the connection"))

    def on_room(self) -> None:
        """The wire takes more."""
        try:
            self.flush()
            if self.owner is not None and not self.is_full:
                self.owner.on_room()
        except Exception:
            self._fault()

    def flush(self) -> None:
        """Hand on what is to be sent, unless much waits already: `on_room` comes back here then."""
        if self.machine.pending and self.wire.unsent <= ROOM and self.state is not CLOSED:
            self.wire.send(self.machine.take())

    # -- its life

    def on_ping(self) -> None:
        """It is time to ask whether the other side is there."""
        if not self.is_paused:
            if self.missed >= (PATIENCE if self.bulk > BULK else MISSES):
                self.links.close_spares({self.pod.uid})  # they are no better
                self.lose(Failed("dead", f"no sign of life for {clock() - self.heard_at:.0f} s"))
                return
            self.missed += 1
            self.machine.ping()
            self.flush()
        self.links.pinging.put(self)

    def probe(self) -> None:
        """Much may have happened meanwhile: be dead at the next ping, unless there is a sign of life before."""
        if self.state is SPARE:
            self.close()
            return
        self.missed = MISSES
        self.machine.ping()
        self.flush()
        self.links.pinging.put(self)

    def lose(self, why: Failed) -> None:
        """The connection has ended, or has to; the client hears what that means for its call."""
        call, owner = self.call, self.owner
        events = self.machine.lost()
        self.call = self.owner = None
        self.close(at_once=True)
        if owner is None or call is None:
            return
        told = [event.text for event in events if isinstance(event, Told) and event.call is call]
        try:
            if told:
                owner.on_told(told[0])
            else:
                owner.on_cut(why)
        except Exception:
            self.links.loop.fault(owner)

    def close(self, at_once: bool = False) -> None:
        """End the connection, once.  `at_once`: it is broken."""
        if self.state is CLOSED:
            return
        if not at_once:
            self.machine.leave()
            if self.wire.unsent <= ROOM:
                self.wire.send(self.machine.take())
        self.state = CLOSED
        self.links.closed(self)
        if at_once:
            self.wire.reset()
        else:
            self.wire.close()


def is_over_there(call: Call) -> bool:
    """Whether a Forward is over at its far end: it sends nothing more, and its error stream has ended without a word.

    What we still sent would go nowhere.
    """
    data = call.streams.get("data")
    return call.kind.is_ended_by_text and ERROR not in call.streams and (
        data is None or data.state == HALF_CLOSED_REMOTE)


# What an event means: a function of (link, event).  It is called while the link has been read, so it may close it.


def hear_accepted(link: Link, event: Accepted) -> None:
    """The node has the call."""
    if event.call is link.call:
        link.is_accepted = True
        link.links.prefer(link)
        link.owner.on_accepted()


def hear_ended(link: Link, event: Ended) -> None:
    """A stream has ended."""
    if event.call is link.call:
        link.owner.on_ended(event.name)


def hear_told(link: Link, event: Told) -> None:
    """The error stream has said something."""
    if event.call is link.call:
        if event.call.kind.is_ended_by_text:
            link.call = None
        link.owner.on_told(event.text)


def hear_reset(link: Link, event: Reset) -> None:
    """The call is over, without a word."""
    if event.call is link.call:
        link.call = None
        link.owner.on_cut(Failed("cut", "the node has reset the stream"))


def hear_closed(link: Link, event: Closed) -> None:
    """The WebSocket ends; what is not over is cut."""
    call, owner = link.call, link.owner
    if call is not None and call.is_over:
        link.call = None
        link.close()
        owner.on_over()
    else:
        words = f"{event.code} {printable(event.reason, 200)}".strip()
        link.lose(Failed("lost", f"the API server has closed the WebSocket ({words})"))


def hear_goaway(link: Link, event: GoneAway) -> None:
    """It takes no more calls: a spare one is of no use.  `takes_more` of the machine says so for the others."""
    if link.state is SPARE:
        link.close()


MEANINGS: dict[type[Event] | type[Closed], Callable[[Link, Any], None]] = {
    Accepted: hear_accepted, Ended: hear_ended, Told: hear_told, Reset: hear_reset, Closed: hear_closed,
    GoneAway: hear_goaway}


class Links:
    """All links of one program.

    `ping`: seconds between two questions whether the other side is there.
    """

    def __init__(self, loop: Loop, ping: float):
        self.loop = loop
        # For what comes in clear text, and in TLS: a piece of TLS, and what was left of the one before, is one piece.
        self.buffers = [memoryview(bytearray(size)) for size in (PIECE + 2 * RECORD, PIECE)]
        self.pinging = loop.queue(ping, Link.on_ping)
        self.parked = loop.queue(SPARE_FOR, Link.close)
        self.settling = loop.queue(SETTLE, Link.close)
        self.all: set[Link] = set()
        self.spares: dict[PodRef, list[Link]] = {}  # the one that was heard last at the end
        self.count = 0  # of spares
        self.negotiations: dict[PodRef, Negotiation] = {}  # of spares
        self.orders: dict[tuple[str, str], tuple[Transport, ...]] = {}  # by context and resource
        self.proven: set[tuple[str, str]] = set()  # those whose first transport has taken a call

    # -- which transport

    def order(self, pod: PodRef, resource: str) -> tuple[Transport, ...]:
        """The transports in the order in which they are tried."""
        return self.orders.get((pod.api.name, resource), TRANSPORTS[resource])

    def is_proven(self, link: Link) -> bool:
        """Whether this transport has taken a call before, and was not in doubt since."""
        key = link.pod.api.name, link.errand.resource
        return key in self.proven and self.order(link.pod, link.errand.resource)[0] is link.transport

    def prefer(self, link: Link) -> None:
        """A call was taken by this transport: try it first from now on."""
        self.proven.add((link.pod.api.name, link.errand.resource))
        self._move(link, 0)

    def doubt(self, link: Link) -> None:
        """A new session has ended before it took a call: try its transport last."""
        self.proven.discard((link.pod.api.name, link.errand.resource))
        self._move(link, len(TRANSPORTS[link.errand.resource]))

    def forget(self, api: Api) -> None:
        """Its context is another cluster, or user: which transports that takes is not known."""
        for resource in TRANSPORTS:
            self.orders.pop((api.name, resource), None)
            self.proven.discard((api.name, resource))

    def _move(self, link: Link, index: int) -> None:
        """Put the transport of this link at this place of its order."""
        order = list(self.order(link.pod, link.errand.resource))
        if index < len(order) and order[index] is link.transport:
            return
        order.remove(link.transport)
        order.insert(index, link.transport)
        self.orders[link.pod.api.name, link.errand.resource] = tuple(order)

    # -- which link

    def open(self, pod: PodRef, errand: Errand, done: Callable[[Link | Failed], None], deadline: float) -> Negotiation:
        """Begin to make a new link."""
        negotiation = Negotiation(self, pod, errand, done, deadline)
        negotiation.start()
        return negotiation

    def take(self, pod: PodRef) -> Link | None:
        """A spare link to a pod's ports; `begin` it."""
        for link in self.spares.get(pod, ())[::-1]:
            if link.machine.takes_more:
                return link
            link.close()  # the other side has said so since
        return None

    def prepare(self, pod: PodRef, errand: Errand) -> None:
        """See that there is a spare link to this pod."""
        first = self.order(pod, errand.resource)[0]
        if pod in self.spares or pod in self.negotiations or first.by_query or self.count >= SPARES_MAX:
            return
        self.negotiations[pod] = negotiation = Negotiation(
            self, pod, errand, functools.partial(self._prepared, pod), time.monotonic() + OPEN_AHEAD)
        negotiation.start()

    def _prepared(self, pod: PodRef, result: Link | Failed) -> None:
        """There is a spare link, or none: the next client finds out why."""
        self.negotiations.pop(pod, None)
        if isinstance(result, Link) and not (result.machine.takes_more and self.park(result)):
            result.close()

    def park(self, link: Link) -> bool:
        """Keep a link for the next client.  Returns whether there is room for it.

        None for one that was made as somebody else, or in another cluster, than the kubeconfig names now.
        """
        context = link.pod.api.context
        if link.context is not context and link.context != context:
            return False
        spares = self.spares.setdefault(link.pod, [])
        if len(spares) >= (SPARES if self.count < SPARES_MANY else 1) or self.count >= SPARES_MAX:
            if not spares:
                del self.spares[link.pod]
            return False
        link.state = SPARE
        spares.append(link)
        self.count += 1
        self.parked.put(link)
        return True

    def unpark(self, link: Link) -> None:
        """A link is spare no more."""
        spares = self.spares.get(link.pod)
        if spares and link in spares:
            spares.remove(link)
            self.count -= 1
            self.parked.drop(link)
            if not spares:
                del self.spares[link.pod]

    def close_spares(self, uids: set[str]) -> None:
        """Close the spare links to these pods: nobody needs them, or they are gone."""
        for link in [link for spares in self.spares.values() for link in spares if link.pod.uid in uids]:
            link.close()
        for negotiation in [negotiation for pod, negotiation in self.negotiations.items() if pod.uid in uids]:
            negotiation.cancel()
            del self.negotiations[negotiation.pod]

    def opened(self, link: Link) -> None:
        """A link is there: it is watched for life."""
        self.all.add(link)
        self.pinging.put(link)

    def closed(self, link: Link) -> None:
        """A link is closed: nothing here knows it any more."""
        self.all.discard(link)
        self.unpark(link)
        self.pinging.drop(link)
        self.settling.drop(link)

    def close(self) -> None:
        """The program ends."""
        for negotiation in self.negotiations.values():
            negotiation.cancel()
        self.negotiations.clear()
        for link in list(self.all):
            link.close()
