"""sniroute_passage: one client's passage to a pod, from accept to close.

    client --- Client ------ Link ----> the pod
                 |
                Way ----> which pod (sniroute_pods), which session to it (sniroute_links)

A Client's bytes go to a port of the pod.  The kinds of Client that a command in the pod serves are in sniroute_jumps.

The life of a client is `Client.state`:

    FINDING -> OPEN -> HALF            the client has ended: the far end may still say something
    OPEN, HALF -> FINDING              the pod was gone, and nothing was lost by that: once more, perhaps elsewhere
    OPEN, HALF -> ENDING               the far end has ended, or broke off: its last bytes, then the client is told so
    any -> CLOSED

A pod may be gone although it was ready a moment ago.  So what a client says first is kept (`Client.held`) until an
answer comes.  If the node says instead that nobody has got it (UNTOUCHED), it goes to the next pod.  What a program in
a pod may have read is never sent twice.  A spare session may be dead although nobody has noticed: on one that has been
silent for a moment, nothing is sent before the node has taken the call; and so with the first one of its kind.

A stream that was cut must not look whole.  The client is reset, behind its last bytes, where the pod resets, where the
session is lost, or a command fails.  Each error text ends its own client only: a pod's reset is routine (PostgreSQL
makes one at the end of each TLS session).

Threads: all runs in the loop.

Seams: I want to ...
    understand another text of a node   a row in UNTOUCHED
    tell another reason                 REASONS here, or those of the rooms below
    serve a client in another way       a subclass of Client, as in sniroute_jumps

This room imports sniroute_links, sniroute_transports (Forward, PodRef), sniroute_pods, sniroute_objects (Choice),
sniroute_api (REASONS), sniroute_forwarder (Listener, reset), sniroute_dial (Failed), sniroute_loop and sniroute_names.
"""

from __future__ import annotations

import functools
import re
import socket
from typing import TYPE_CHECKING, Any, Callable

from sniroute_api import REASONS as API_REASONS
from sniroute_dial import Failed, set_options
from sniroute_forwarder import Listener, reset
from sniroute_links import Link, Negotiation
from sniroute_loop import READ, WRITE, Queue, Watch, monotonic, unsent
from sniroute_names import printable
from sniroute_objects import REASONS as POD_REASONS
from sniroute_objects import Choice
from sniroute_pods import Asked, Pods
from sniroute_transports import Errand, Forward, PodRef

if TYPE_CHECKING:
    from sniroute_kubernetes import Kubernetes

__version__ = "0.1.0"

CHUNK = 32760  # bytes of one read of a client: with SPDY's header two TLS records
TURN = 8  # reads from one client before the others have their turn
HELD_MAX = 1 << 16  # bytes of a client that are kept until an answer comes, and before there is a pod
PIECES_MAX = 64  # buffers in one write: far under the kernel's 1,024
START = 15.0  # seconds from accept until the node has taken the call, other tries too; the router gives up after 20
TRIES = 4  # sessions for one client: two pods that have just gone, and two transports
ACCEPT = 2.0  # seconds that a spare session has to take a call, before it counts as dead
GRACE = 2.0  # seconds of silence from a far end that cannot be told of the client's end, before we close
HALF_LAST = 3600.0  # seconds that a client which has ended waits for a far end that says nothing, and we for its reads
LINGER = 5.0  # seconds that a client has to leave after the far end has ended
SETTLE = 0.05  # seconds between two looks whether a client that is to be reset has got its last bytes
WORDS_MAX = 400  # bytes of stderr that are kept: the last words of a command
# Why a client could not be served: a word for programs, and a sentence for people.
REASONS = {
    **API_REASONS,
    **POD_REASONS,
    "gone": "the pod is not there any more",
    "node": "the node of the pod cannot be reached",
    "refused": "nobody listens on that port of the pod",
    "pod": "the node could not connect to the pod",
    "lost": "the session to the pod was lost",
    "dead": "the API server gives no sign of life",
    "cut": "the pod has broken off",
    "broken": "the API server broke the protocol",
    "tool": "the container has no tool that could carry the bytes",
    "command": "the command in the pod failed",
}

# What the error stream says where nobody in the pod has got a byte: the texts of containerd, CRI-O and the kubelet.
UNTOUCHED = (
    ("gone", re.compile(r"failed to find sandbox|[Nn]o such (?:container|pod)|container not found|not running|"
                        r"(?:sandbox|container|pod) .{0,200}(?:not found|does not exist)", re.ASCII)),
    ("refused", re.compile(r"[Cc]onnection refused")),
    ("pod", re.compile(r"failed to connect to|no route to host|i/o timeout|[Tt]imed out waiting for|"
                       r"unable to do port forwarding")),
)


TOUCHED = re.compile(r"\b(?:read|write)(?: tcp|: )")  # Go's words for what went wrong on a connection that there was


def untouched(text: str) -> str:
    """The reason in a text of the node which says that nobody in the pod has got a byte; "" where it does not."""
    if TOUCHED.search(text):
        return ""
    return next((reason for reason, pattern in UNTOUCHED if pattern.search(text)), "")


# -- targets -----------------------------------------------------------------------------------


class Target:
    """Where a listener leads: what was asked for, and the pods behind it."""

    __slots__ = ("text", "pods")

    def __init__(self, text: str, pods: Pods):
        self.text = text
        self.pods = pods

    def __str__(self) -> str:
        return self.text


# -- clients -----------------------------------------------------------------------------------

# The states of a client.
FINDING, OPEN, HALF, ENDING, CLOSED = "finding", "open", "half", "ending", "closed"
CARRYING = frozenset((OPEN, HALF))


def guarded(method: Callable[[Way, Any], None]) -> Callable[[Way, Any], None]:
    """A callback of a Way that other rooms call: a fault of ours ends its client, and not what they do."""
    @functools.wraps(method)
    def call(way: Way, result: Any) -> None:
        try:
            method(way, result)
        except Exception:
            way.program.fault(way.client)
    return call


class Way:
    """The way of one client: which pod, and which session to it; and another one, where that was none."""

    __slots__ = ("client", "program", "pods", "deadline", "choice", "awaited", "link", "tries", "avoid")

    def __init__(self, client: Client):
        self.client = client
        self.program = client.program
        self.pods = client.listener.target.pods
        self.deadline = monotonic() + START
        self.choice: Choice | None = None
        self.awaited: Asked | Negotiation | None = None  # what is waited for: a pod, or a session
        self.link: Link | None = None
        self.tries = 0  # sessions so far
        self.avoid = ""  # the pod that has refused the connection

    @property
    def phase(self) -> str:
        """What is waited for, in words for people."""
        if self.link is not None:
            return "waiting for the node"
        return self.awaited.phase if isinstance(self.awaited, Negotiation) else "choosing a pod"

    @property
    def pod(self) -> PodRef:
        """The pod."""
        return PodRef(self.pods.feed.api, self.choice.namespace, self.choice.pod, self.choice.uid)

    @property
    def may_go_on(self) -> bool:
        """Whether the client has lost nothing yet, and there is a try left."""
        client = self.client
        return (not client.is_answered and client.held is not None
                and self.tries < TRIES and monotonic() < self.deadline)

    def find(self) -> None:
        """Ask for a pod."""
        asked = self.pods.ask(self.on_choice, self.deadline)
        if self.choice is None and self.client.state is FINDING:  # else the answer was there at once
            self.awaited = asked

    @guarded
    def on_choice(self, result: Choice | Failed) -> None:
        """There is a pod, or there is none."""
        self.awaited = None
        if isinstance(result, Failed):
            self.client.fail(result)
            return
        self.choice = result
        self.connect()

    def connect(self) -> None:
        """Take a spare session, or make one."""
        self.tries += 1
        errand = self.client.errand()
        link = self.program.links.take(self.pod) if isinstance(errand, Forward) else None
        if link is not None:
            self.link = link
            self.client.begin(link, errand)
        else:
            self.awaited = self.program.links.open(self.pod, errand, self.on_link, self.deadline)

    @guarded
    def on_link(self, result: Link | Failed) -> None:
        """There is a session, or there will be none."""
        self.awaited = None
        if isinstance(result, Link):
            self.link = result
            self.client.begin(result, result.errand)
        elif result.reason in ("gone", "node") and self.may_go_on:
            self.again(result)
        else:
            self.client.fail(result)

    def again(self, why: Failed) -> None:
        """This pod was none: the next one, if there is another."""
        if why.reason == "gone":
            self.pods.gone(self.choice)
            self.program.links.close_spares({self.choice.uid})
        else:
            self.pods.failed(self.choice)
        self.program.tell(self.client, "info", "again", f"{REASONS[why.reason]}; once more", error=str(why))
        self.end()
        self._begin_again()
        self.find()

    def reconnect(self) -> None:
        """Another session to the same pod."""
        self.end_link()
        self._begin_again()
        self.connect()

    def _begin_again(self) -> None:
        """Wait for the node anew, and no more for a far end: those waits belong to the call before."""
        client, program = self.client, self.program
        client.state = FINDING
        program.graced.drop(client)
        program.halved.drop(client)
        if client not in program.starting.due:
            program.starting.put(client)

    def end_link(self) -> None:
        """Release the session."""
        self.program.accepting.drop(self.client)
        if self.link is not None:
            link, self.link = self.link, None
            link.release()

    def end(self) -> None:
        """Release all."""
        if self.awaited is not None:
            self.awaited.cancel()
            self.awaited = None
        self.end_link()
        if self.choice is not None:
            choice, self.choice = self.choice, None
            self.pods.ended(choice)


class Client:
    """One client, and its way to a pod.  All methods run in the loop."""

    __slots__ = ("program", "listener", "sock", "address", "watch", "state", "way", "has_ended", "is_deaf",
                 "is_answered", "far_has_ended", "is_broken", "awaits_node", "held", "rest", "still_unsent", "slow",
                 "up", "down")

    is_proven = True  # whether somebody hears what is sent: `held` may be forgotten then; a Jump may not know

    def __init__(self, program: Kubernetes, listener: Listener, client: socket.socket, address: str):
        self.program = program
        self.listener = listener
        self.sock = client
        self.address = address
        self.watch = Watch(program.loop.poller, client.fileno())
        self.state = FINDING
        self.way = Way(self)
        # What has happened so far, whatever the state.
        self.has_ended = False  # the client says nothing more
        self.is_deaf = False  # the client takes no more
        self.is_answered = False  # the pod has said something
        self.far_has_ended = False  # the pod says nothing more
        self.is_broken = False  # the far end broke off: the client is to see a reset
        # What is kept.
        self.awaits_node = False  # OPEN: the client's bytes stay in `held` until the node has taken the call
        self.held: bytearray | None = bytearray()  # what the client has said, until an answer comes; None: kept no more
        self.rest = b""  # bytes for the client that its kernel has not taken yet
        self.still_unsent = 1 << 62  # bytes that the kernel held for the client at the last `linger`
        self.slow = (-1, 0.0)  # `down`, and the clock time, when it was first seen that this client is slow
        self.up = self.down = 0  # bytes that came from the client, and that went to it

    # -- to a pod

    def start(self) -> None:
        """Look for a pod at once: where the service speaks first, the client waits for that."""
        try:
            set_options(self.sock)
        except OSError:
            self.close()  # it has left already
            return
        self.program.starting.put(self)
        self.watch.wait_for(READ, self.on_client)
        self.way.find()

    def errand(self) -> Errand:
        """What is asked of the pod."""
        return Forward(self.way.choice.port)

    def begin(self, link: Link, errand: Errand) -> None:
        """Open the call on a session, and say what the client has said."""
        self.state = OPEN
        self.awaits_node = not link.is_fresh or not self.program.links.is_proven(link)
        if not link.is_fresh:
            self.program.accepting.put(self)
        link.begin(self, errand)
        self.program.tell(self, "debug", "open", f"open to {self.way.choice.pod}, by {link.transport.name}")
        self.say_held()

    def say_held(self) -> None:
        """Send what was kept; go on reading."""
        if not self.awaits_node:
            if self.held:
                self.way.link.send(bytes(self.held))
            if self.has_ended:
                self._client_ended()
            else:
                self.pump_up()
        self._rewatch()

    def on_no_accept(self) -> None:
        """A spare session does not answer: it is dead, and nothing was sent on it.  The others are no better."""
        self.program.links.close_spares({self.way.choice.uid})
        self.way.link.lose(Failed("dead", "a spare session does not answer"))

    def on_late(self) -> None:
        """The deadline has come."""
        self.fail(Failed("timeout", f"{START:g} s, {self.way.phase}"))

    def fail(self, why: Failed) -> None:
        """The client cannot be served: say why, and let it see a failure."""
        self.program.tell(self, "error", "failed", REASONS.get(why.reason, why.reason), reason=why.reason,
                          error=str(why))
        self.abort()

    # -- what the link tells

    def on_accepted(self) -> None:
        """The node has the call."""
        self.program.starting.drop(self)
        if self.awaits_node:
            self.awaits_node = False
            self.program.accepting.drop(self)
            self.say_held()

    def on_data(self, name: str, pieces: list[memoryview]) -> None:
        """Bytes from the pod."""
        if not self.is_answered:
            self.answered()
        if self.state is HALF:
            self.program.stay(self)
        if not self.is_deaf:
            self._hand_down(pieces)
            self._rewatch()

    def answered(self) -> None:
        """The pod has said something: no other try is made, and the next client may come."""
        self.is_answered = True
        self.held = None
        self.program.starting.drop(self)
        if isinstance(self.way.link.errand, Forward):
            self.program.links.prepare(self.way.pod, self.way.link.errand)

    def on_ended(self, name: str) -> None:
        """The pod says nothing more; it may still listen."""
        self.far_has_ended = True
        if not self.rest:
            self._far_ended()

    def on_over(self) -> None:
        """The pod neither says nor hears anything more."""
        self.finish(False)

    def on_told(self, text: str) -> None:
        """Why the connection was cut."""
        text = printable(text.strip(), WORDS_MAX)
        reason, choice = untouched(text), self.way.choice
        if self.is_answered or not reason and self.up:
            self.cut(Failed("cut", text))
            return
        why = Failed(reason or "cut", f"{choice.pod}, port {choice.port}" if reason == "refused" else text)
        if self.way.may_go_on and choice.uid != self.way.avoid:
            self.way.avoid = choice.uid
            self.way.again(why)
        else:
            self.fail(why)

    def on_cut(self, why: Failed) -> None:
        """The session is lost, or the node has reset the call."""
        link = self.way.link
        if not link.is_accepted and not link.is_used:
            self.program.links.doubt(link)
        if self.way.may_go_on and (self.awaits_node or not self.up):
            self.way.reconnect()
        elif self.is_answered or self.has_ended:
            self.cut(why)
        else:
            self.fail(why)

    def on_room(self) -> None:
        """More may be sent."""
        self.pump_up()
        self._rewatch()

    def cut(self, why: Failed) -> None:
        """The far end broke off."""
        self.program.tell(self, "debug" if self.has_ended else "info", "reset", REASONS[why.reason], reason=why.reason,
                          error=str(why))
        self.program.failed = self.program.failed or not self.has_ended
        self.finish(True)

    # -- carrying

    def on_client(self, mask: int) -> None:
        """The client has said something, or takes more; an error or a hang-up may be either."""
        if self.rest and mask & ~READ:
            self._hand_down([])
        if mask & ~WRITE:
            self.pump_up()
        self._rewatch()

    def pump_up(self) -> None:
        """From the client to the pod; or, before there is one, into `held`."""
        for _ in range(TURN):
            if self.has_ended or not self._listens():
                break
            data = self._hear()
            if data is None:
                break
            if not data:
                self._client_ended()
                break
            self.up += len(data)
            if self.held is not None:
                self.held += data
                if len(self.held) > HELD_MAX and self.state is OPEN and not self.awaits_node and self.is_proven:
                    self.held = None  # there is no other try from here on
            if self.state is OPEN and not self.awaits_node:
                self.way.link.send(data)

    def _listens(self) -> bool:
        """Whether what the client says can go somewhere."""
        if self.state is FINDING or self.state is OPEN and self.awaits_node:
            return len(self.held) < HELD_MAX
        return self.state is OPEN and not self.way.link.is_full

    def _hear(self) -> bytes | None:
        """What the client says: None for nothing yet, b'' at its end."""
        try:
            return self.sock.recv(CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            self.is_deaf = True
            return b""

    def _hand_down(self, pieces: list[memoryview]) -> None:
        """Write to the client; keep what it does not take now, and read no more meanwhile."""
        if self.rest:
            pieces = [memoryview(self.rest), *pieces]
        if len(pieces) > PIECES_MAX:
            pieces = [memoryview(b"".join(pieces))]
        try:
            sent = self.sock.sendmsg(pieces)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.is_deaf = True
            self.rest = b""
            self.close()  # nobody hears the answer
            return
        self.down += sent
        total = sum(map(len, pieces))
        self.rest = b"".join(pieces)[sent:] if sent < total else b""
        if self.way.link is not None:
            if self.rest:
                self.way.link.pause()
            else:
                self.way.link.resume()
        if not self.rest:
            if self.state is ENDING:
                farewell(self)
            elif self.far_has_ended:
                self._far_ended()

    def _rewatch(self) -> None:
        """Watch for what can be done now: this is the whole of backpressure."""
        if self.state in (FINDING, OPEN, HALF):
            hears = READ if not self.has_ended and self._listens() else 0
            self.watch.wait_for(hears | (WRITE if self.rest else 0), self.on_client)

    # -- the end

    def _client_ended(self) -> None:
        """The client has said all, or has broken off."""
        self.has_ended = True
        if self.is_deaf:
            self.close()
        elif self.state is FINDING or self.awaits_node:
            if self.listener.sock is None:
                return  # the end of stdin does not mean that somebody has left
            if not self.held:
                self.close()
                return
            # It may be a whole upload, or a client that has lost patience: so there is less time.
            self.program.hurried.put(self)
        elif self.state is OPEN:
            self.state = HALF
            told = self.way.link.end()
            if self.far_has_ended and not self.rest:
                self.finish(False)
            else:
                (self.program.halved if told else self.program.graced).put(self)

    def _far_ended(self) -> None:
        """The pod has ended, and the client has its last bytes."""
        if self.has_ended:
            self.finish(False)
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def on_grace(self, queue: Queue) -> None:
        """The client has ended, and the far end says nothing: for HALF_LAST, or for GRACE where it cannot be told.

        It may have had more to say, so this is a cut.  `queue`: where the client has waited.  Or the client does not
        take what is left, although it was looked at twice.
        """
        if self.rest and still_takes(self):
            queue.put(self)
        elif self.rest:
            self.is_broken = True
            self.close()
        else:
            self.cut(Failed("cut", "nothing came for a while after the client's end"))

    def finish(self, broken: bool) -> None:
        """Nothing more comes from the pod: the client gets its last bytes, then a reset or an end."""
        self.is_broken = broken
        program = self.program
        for queue in (program.starting, program.hurried, program.graced, program.halved):
            queue.drop(self)
        self.state = ENDING
        self.way.end()
        if self.rest:
            program.halved.put(self)
            self.watch.wait_for(WRITE, self.on_client)
        else:
            farewell(self)

    def abort(self) -> None:
        """Close everything so that the client sees a reset."""
        self.is_broken = self.program.failed = True
        self.close()

    def dismiss(self) -> None:
        """The listener is closing: reset the client, whose stream is cut."""
        self.is_broken = self.is_broken or self.state is not ENDING
        self.close()

    def close(self) -> None:
        """Close everything, once."""
        if self.state is CLOSED:
            return
        self.state = CLOSED
        try:
            for queue in self.program.queues:
                queue.drop(self)
            self.way.end()
        finally:  # a fault of ours above must not keep the client waiting
            self.watch.closing()
            if self.is_broken:
                reset(self.sock)
            else:
                self.sock.close()
            self.program.closed(self)


# -- the end of a client ------------------------------------------------------------------------


def hurry(client: Client) -> None:
    """The client has ended, and what it said cannot be delivered in time."""
    if client.state is FINDING or client.awaits_node:
        client.fail(Failed("timeout", f"{LINGER:g} s after the client's end, {client.way.phase}"))


def still_takes(client: Client) -> bool:
    """Whether a client that is slow takes something from time to time."""
    now = monotonic()
    if client.down != client.slow[0]:
        client.slow = client.down, now
    return now - client.slow[1] < HALF_LAST


def farewell(client: Client) -> None:
    """The kernel has the client's last bytes.  A reset, or a close with unread bytes, would destroy them."""
    program = client.program
    program.halved.drop(client)
    has_left = client.is_broken and client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    # None, where the kernel does not tell: it waits for LINGER.
    if client.is_broken and not has_left and unsent(client.sock) != 0:
        client.watch.wait_for(0)
        program.settling.put(client)
        if client not in program.lingering.due:
            program.lingering.put(client)
        return
    if client.is_broken or client.has_ended:
        client.close()
        return
    try:
        client.sock.shutdown(socket.SHUT_WR)
    except OSError:
        client.close()
        return
    program.lingering.put(client)
    client.watch.wait_for(READ, functools.partial(hear_last, client))


def hear_last(client: Client, mask: int) -> None:
    """Read and forget what the client still says."""
    try:
        if client.sock.recv(CHUNK):
            return
    except BlockingIOError:
        return
    except OSError:
        pass
    client.close()


def linger(client: Client) -> None:
    """The client does not leave.  While the kernel still gets rid of what it has to send, there is more time."""
    waiting = unsent(client.sock) or 0
    if 0 < waiting < client.still_unsent:
        client.still_unsent = waiting
        client.program.lingering.put(client)
    else:
        client.close()
