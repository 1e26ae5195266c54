#!/usr/bin/env python3
"""sniroute_kubernetes: what `kubectl port-forward` does, with nothing installed, for many services in one process.

It listens on local ports.  For each client it chooses a ready pod behind a service, has a session to that pod
(sniroute_links), and carries bytes both ways.

    client --- Listener --- Client --- Link --- API server --- node --- pod
     psql      127.0.0.1       |
               :20000          +--- Pods (sniroute_pods): which pod, which port

    port-forward TARGET --listen HOST:PORT    one target, as NAMESPACE/svc/NAME:PORT
    exec NAMESPACE/pod/NAME -- COMMAND ...    one command, between stdin and stdout
    get TARGET                                what would be chosen now, and why
    forwarders                                any number of targets, told on stdin

A target is the words of sniroute's `kubernetes:`, or behind `jump:` those of its `jump:`.

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

Threads: `main` runs the one loop, which owns every socket.  What blocks has threads of its own: names (sniroute_dial),
credential plugins (sniroute_credentials).  There are no locks.

Seams: I want to ...
    another command                 COMMANDS, and a function beside `forwarders`
    another tool that jumps         a row in TOOLS
    another text of a node          UNTOUCHED
    another reason                  REASONS here, or those of the rooms below

sniroute starts this program, and never imports it.  This room imports sniroute_links, sniroute_pods, sniroute_objects
(targets), sniroute_api, sniroute_kubeconfig, sniroute_channels (what became of a command), sniroute_forwarder,
sniroute_dial, sniroute_host, sniroute_loop, sniroute_names and sniroute_refusals.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import ssl
import sys
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from sniroute_api import REASONS as API_REASONS
from sniroute_api import Apis
from sniroute_channels import read_outcome
from sniroute_dial import Failed, set_options
from sniroute_forwarder import LEVELS, Control, Forwarder, Listener, Log, bridge, parse_listen, reset
from sniroute_host import open_standard_streams, raise_descriptor_limit
from sniroute_kubeconfig import kubeconfig_paths
from sniroute_links import Errand, Forward, Link, Links, Opening, Place, Run
from sniroute_loop import READ, WRITE, Watch, monotonic, unsent
from sniroute_names import printable, show_address
from sniroute_objects import REASONS as POD_REASONS
from sniroute_objects import Choice, KubeTarget, none_ready, parse_argument, parse_target, with_option
from sniroute_pods import Alarms, Pods
from sniroute_refusals import Malformed, SettingsError

__version__ = "0.1.0"

CHUNK = 32760  # bytes of one read of a client: with SPDY's header two TLS records
TURN = 8  # reads from one client before the others have their turn
HELD_MAX = 1 << 16  # bytes of a client that are kept until an answer comes, and before there is a pod
PIECES_MAX = 64  # buffers in one write: far under the kernel's 1,024
START = 30.0  # seconds from accept until the node has taken the call: naming to upgrade, the other tries too
TRIES = 4  # sessions for one client: two pods that have just gone, and two transports
ACCEPT = 2.0  # seconds that a spare session has to take a call, before it counts as dead
GRACE = 2.0  # seconds of silence from a far end that cannot be told of the client's end, before we close
HALF_LAST = 3600.0  # seconds that a client which has ended waits for a far end that says nothing
LINGER = 5.0  # seconds that a client has to leave after the far end has ended
SETTLE = 0.05  # seconds between two looks whether a client that is to be reset has got its last bytes
TOOLS_MAX = 1000  # images of which it is known what they have
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
    ("refused", re.compile(r"connection refused")),
    ("pod", re.compile(r"failed to connect to|no route to host|i/o timeout|[Tt]imed out waiting for|"
                       r"unable to do port forwarding")),
)


def untouched(text: str) -> str:
    """The reason in a text that says that nobody in the pod has got a byte; "" where it does not say so."""
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


def guarded(method: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """A callback of a client that other rooms call for several: a fault of ours ends this client, and not their work."""
    @functools.wraps(method)
    def call(client: Client, result: Any) -> None:
        try:
            method(client, result)
        except Exception:
            client.program.fault(client)
    return call


class Client:
    """One client, and its way to a pod.  All methods run in the loop."""

    __slots__ = ("program", "listener", "client", "address", "watch", "state", "choice", "opening", "link", "deadline",
                 "tries", "avoid", "waits", "held", "ended", "deaf", "is_answered", "far_ended", "rest", "broken",
                 "still_unsent", "up", "down")

    def __init__(self, program: Kubernetes, listener: Listener, client: socket.socket, address: str):
        self.program = program
        self.listener = listener
        self.client = client
        self.address = address
        self.watch = Watch(program.loop.poller, client.fileno())
        self.state = FINDING
        self.choice: Choice | None = None
        self.opening: Opening | None = None  # what is asked while FINDING: Pods, or the upgrade
        self.link: Link | None = None
        self.deadline = 0.0
        self.tries = 0  # sessions so far
        self.avoid = ""  # the pod that has refused the connection
        self.waits = False  # OPEN: nothing is sent before the node has taken the call
        self.held: bytearray | None = bytearray()  # what the client has said, until an answer comes; None: no more
        self.ended = False  # the client has ended
        self.deaf = False  # the client takes no more
        self.is_answered = False  # bytes have come
        self.far_ended = False  # the pod says nothing more
        self.rest = b""  # on its way to the client
        self.broken = False  # the far end broke off: the client is to see a reset
        self.still_unsent = 1 << 62  # bytes that the kernel held for the client at the last `on_linger`
        self.up = self.down = 0  # bytes

    # -- to a pod

    def start(self) -> None:
        """Look for a pod at once: where the service speaks first, the client waits for that."""
        try:
            set_options(self.client)
        except OSError:
            self.close()  # it has left already
            return
        self.deadline = monotonic() + START
        self.program.starting.put(self)
        self.watch.wait_for(READ, self.on_client)
        self.find()

    def find(self) -> None:
        """Ask for a pod."""
        self.state = FINDING
        self.opening = self.listener.target.pods.ask(self.on_choice, self.deadline)

    @guarded
    def on_choice(self, result: Choice | Failed) -> None:
        """There is a pod, or there is none."""
        self.opening = None
        if isinstance(result, Failed):
            self.fail(result)
            return
        self.choice = result
        self.connect()

    @property
    def place(self) -> Place:
        """The pod."""
        return Place(self.listener.target.pods.feed.api, self.choice.namespace, self.choice.pod, self.choice.uid)

    def errand(self) -> Errand:
        """What is asked of the pod."""
        return Forward(self.choice.port)

    def connect(self) -> None:
        """Take a spare session, or make one."""
        self.tries += 1
        errand = self.errand()
        link = self.program.links.take(self.place) if isinstance(errand, Forward) else None
        if link is not None:
            self.begin(link, errand)
        else:
            self.opening = self.program.links.open(self.place, errand, self.on_link, self.deadline)

    @guarded
    def on_link(self, result: Link | Failed) -> None:
        """There is a session, or there will be none."""
        self.opening = None
        if isinstance(result, Link):
            self.begin(result, result.errand)
        elif result.reason in ("gone", "node") and self.tries < TRIES:
            self.again(result)
        else:
            self.fail(result)

    def begin(self, link: Link, errand: Errand) -> None:
        """Open the call, and say what the client has said."""
        self.link = link
        self.state = OPEN
        self.waits = not link.is_fresh or not self.program.links.is_proven(link)
        if self.waits:
            self.program.accepting.put(self)
        link.begin(self, errand)
        self.program.tell(self, "debug", "open", f"open to {self.choice.pod}, by {link.transport.name}")
        self.say_held()

    def say_held(self) -> None:
        """Send what was kept; go on reading."""
        if not self.waits:
            if self.held:
                self.link.send(bytes(self.held))
            if self.ended:
                self._client_ended()
            else:
                self.pump_up()
        self._rewatch()

    # -- another try

    @property
    def may_go_again(self) -> bool:
        """Whether the client has lost nothing yet, and there is a try left."""
        return not self.is_answered and self.held is not None and self.tries < TRIES and monotonic() < self.deadline

    def again(self, why: Failed) -> None:
        """The pod was none: the next one, if there is another."""
        pods = self.listener.target.pods
        if why.reason == "gone":
            pods.gone(self.choice)
            self.program.links.leave({self.choice.uid})
        else:
            pods.failed(self.choice)
        self.program.tell(self, "info", "again", f"{self.choice.pod}: {REASONS[why.reason]}; once more", error=str(why))
        self.let_go()
        self.find()

    def let_go(self) -> None:
        """Release the link and the pod."""
        for queue in (self.program.accepting, self.program.graced, self.program.halved):
            queue.drop(self)
        if self.link is not None:
            link, self.link = self.link, None
            link.release()
        if self.choice is not None:
            choice, self.choice = self.choice, None
            self.listener.target.pods.ended(choice)

    def on_no_accept(self) -> None:
        """A spare session does not answer: it is dead, and nothing was sent on it."""
        link, self.link = self.link, None
        link.owner = None
        link.lose(Failed("dead", "a spare session does not answer"))
        self.reconnect()

    def reconnect(self) -> None:
        """Another session to the same pod."""
        self.state = FINDING
        self.program.accepting.drop(self)
        self.connect()

    def on_late(self) -> None:
        """The deadline has come."""
        phase = getattr(self.opening, "phase", "choosing a pod") if self.state is FINDING else "waiting for the node"
        self.fail(Failed("timeout", f"{START:g} s, {phase}"))

    def on_hurry(self) -> None:
        """The client has ended, and what it said cannot be delivered in time."""
        if self.state is FINDING:
            self.fail(Failed("timeout", f"{LINGER:g} s after the client's end"))

    def fail(self, why: Failed) -> None:
        """The client cannot be served: say why, and let it see a failure."""
        self.program.tell(self, "error", "failed", REASONS.get(why.reason, why.reason), reason=why.reason,
                          error=str(why))
        self.abort()

    # -- what the link tells

    def on_accepted(self) -> None:
        """The node has the call."""
        self.program.starting.drop(self)
        if self.waits:
            self.waits = False
            self.program.accepting.drop(self)
            self.say_held()

    def on_data(self, name: str, pieces: list[memoryview]) -> None:
        """Bytes from the pod."""
        if not self.is_answered:
            self.answered()
        if self.state is HALF:
            self.program.stay(self)
        if not self.deaf:
            self._hand_down(pieces)
            self._rewatch()

    def answered(self) -> None:
        """The pod has said something: no other try is made, and the next client may come."""
        self.is_answered = True
        self.held = None
        self.program.starting.drop(self)
        if isinstance(self.link.errand, Forward):
            self.program.links.prepare(self.place, self.link.errand)

    def on_ended(self, name: str) -> None:
        """The pod says nothing more; it may still listen."""
        self.far_ended = True
        if not self.rest:
            self._far_ended()

    def on_over(self) -> None:
        """The pod neither says nor hears anything more."""
        self.link.end()
        self.finish(False)

    def on_told(self, text: str) -> None:
        """Why the connection was cut."""
        text = printable(text.strip(), WORDS_MAX)
        reason = untouched(text)
        if not self.is_answered and (reason or not self.up):
            why = Failed(reason or "cut", text)
            if self.may_go_again and self.choice.uid != self.avoid:
                self.avoid = self.choice.uid
                self.again(why)
            else:
                self.fail(why)
            return
        self.cut(Failed("cut", text))

    def on_cut(self, why: Failed) -> None:
        """The session is lost, or the node has reset the call."""
        link = self.link
        if not link.is_accepted and not link.is_used:
            self.program.links.doubt(link)
        if self.may_go_again and (self.waits or not self.up):
            self.link = None
            link.release()
            self.reconnect()
        elif not self.is_answered and not self.ended:
            self.fail(why)
        else:
            self.cut(why)

    def on_room(self) -> None:
        """More may be sent."""
        self.pump_up()
        self._rewatch()

    def cut(self, why: Failed) -> None:
        """The far end broke off."""
        self.program.tell(self, "debug" if self.ended else "info", "reset", REASONS[why.reason], reason=why.reason,
                          error=str(why))
        self.program.failed = self.program.failed or not self.ended
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
            if self.ended or not self._listens():
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
                if len(self.held) > HELD_MAX and self.state is OPEN and not self.waits:
                    self.held = None  # there is no other try from here on
            if self.state is OPEN and not self.waits:
                self.link.send(data)

    def _listens(self) -> bool:
        """Whether what the client says can go somewhere."""
        if self.state is FINDING or self.state is OPEN and self.waits:
            return len(self.held) < HELD_MAX
        return self.state is OPEN and not self.link.is_full

    def _hear(self) -> bytes | None:
        """What the client says: None for nothing yet, b'' at its end."""
        try:
            return self.client.recv(CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            self.deaf = True
            return b""

    def _hand_down(self, pieces: list[memoryview]) -> None:
        """Write to the client; keep what it does not take now, and read no more meanwhile."""
        if self.rest:
            pieces = [memoryview(self.rest), *pieces]
        elif len(pieces) > PIECES_MAX:
            pieces = [memoryview(b"".join(pieces))]
        try:
            sent = self.client.sendmsg(pieces)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.deaf = True
            self.rest = b""
            self.close()  # nobody hears the answer
            return
        self.down += sent
        total = sum(map(len, pieces))
        self.rest = b"".join(pieces)[sent:] if sent < total else b""
        if self.link is not None:
            if self.rest:
                self.link.pause()
            else:
                self.link.resume()
        if not self.rest:
            if self.state is ENDING:
                self._farewell()
            elif self.far_ended:
                self._far_ended()

    def _rewatch(self) -> None:
        """Watch for what can be done now: this is the whole of backpressure."""
        if self.state in (FINDING, OPEN, HALF):
            hears = READ if not self.ended and self._listens() else 0
            self.watch.wait_for(hears | (WRITE if self.rest else 0), self.on_client)

    # -- the end

    def _client_ended(self) -> None:
        """The client has said all, or has broken off."""
        self.ended = True
        if self.deaf:
            self.close()
        elif self.state is FINDING or self.waits:
            if self.listener.sock is None:
                return  # the end of stdin does not mean that somebody has left
            if not self.held:
                self.close()
                return
            # It may be a whole upload, or a client that has lost patience: so there is less time.
            self.program.hurried.put(self)
        elif self.state is OPEN:
            self.state = HALF
            told = self.link.end()
            if self.far_ended and not self.rest:
                self.finish(False)
            else:
                (self.program.halved if told else self.program.graced).put(self)

    def _far_ended(self) -> None:
        """The pod has ended, and the client has its last bytes."""
        if self.ended:
            self.finish(False)
            return
        try:
            self.client.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def on_grace(self) -> None:
        """The client has ended, the far end does not know it, and has said nothing for a while."""
        if self.rest:
            self.program.graced.put(self)  # the client is slow
        else:
            self.close()

    def on_half(self) -> None:
        """The client has ended, and the far end has said nothing for very long."""
        self.on_grace()

    def finish(self, broken: bool) -> None:
        """Nothing more comes from the pod: the client gets its last bytes, then a reset or an end."""
        self.broken = broken
        for queue in (self.program.starting, self.program.hurried):
            queue.drop(self)
        self.state = ENDING
        self.let_go()
        if self.rest:
            self.watch.wait_for(WRITE, self.on_client)
        else:
            self._farewell()

    def _farewell(self) -> None:
        """The kernel has the client's last bytes.  A reset, or a close with unread bytes, would destroy them."""
        if self.broken and unsent(self.client) != 0:  # None, where the kernel does not tell: it waits for LINGER
            self.watch.wait_for(0)
            self.program.settling.put(self)
            if self not in self.program.lingering.due:
                self.program.lingering.put(self)
            return
        if self.broken or self.ended:
            self.close()
            return
        try:
            self.client.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self.program.lingering.put(self)
        self.watch.wait_for(READ, self.on_farewell)

    def on_farewell(self, mask: int) -> None:
        """Read and forget what the client still says."""
        try:
            if self.client.recv(CHUNK):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self.close()

    def on_linger(self) -> None:
        """The client does not leave.  While the kernel still gets rid of what it has to send, there is more time."""
        waiting = unsent(self.client) or 0
        if 0 < waiting < self.still_unsent:
            self.still_unsent = waiting
            self.program.lingering.put(self)
        else:
            self.close()

    def abort(self) -> None:
        """Close everything so that the client sees a reset."""
        self.broken = self.program.failed = True
        self.close()

    def dismiss(self) -> None:
        """The listener is closing: reset the client, whose stream is cut."""
        self.broken = self.broken or self.state is not ENDING
        self.close()

    def close(self) -> None:
        """Close everything, once."""
        if self.state is CLOSED:
            return
        self.state = CLOSED
        try:
            for queue in self.program.queues:
                queue.drop(self)
            if self.opening is not None:
                self.opening.cancel()
                self.opening = None
            self.let_go()
        finally:  # a fault of ours above must not keep the client waiting
            self.watch.closing()
            if self.broken:
                reset(self.client)
            else:
                self.client.close()
            self.program.closed(self)


# -- jumps -------------------------------------------------------------------------------------

# What bash does without a tool.  Host and port are its arguments, and no part of the line.  It cannot tell the far end
# that the client has ended: that gets two seconds for the rest of its answer, or it would stay in the pod for ever.
BASH = ('exec 3<>"/dev/tcp/$1/$2" 4<&0 || exit 1; { cat <&4 >&3; sleep 2; kill $$; } & cat <&3; code=$?; '
        "kill $! 2>/dev/null; exit $code")

# The tools that carry bytes to HOST:PORT, the best one first: (host, port) -> words.
TOOLS: tuple[Callable[[str, int], tuple[str, ...]], ...] = (
    # By default socat leaves half a second after stdin's end, whatever the far end still has to say.
    lambda host, port: ("socat", "-t", "60", "-", f"TCP:{show_address((host, port))},connect-timeout=10"),
    lambda host, port: ("nc", host, str(port)),
    lambda host, port: ("bash", "-c", BASH, "sniroute", host, str(port)),
)
NO_TOOL = re.compile(r"executable file not found|no such file or directory", re.ASCII | re.I)
NOT_FOUND = (126, 127)  # exit codes of what cannot be run, POSIX 2.8.2


class Jump(Client):
    """A client whose bytes are carried by a command in the pod."""

    __slots__ = ("words",)

    def __init__(self, program: Kubernetes, listener: Listener, client: socket.socket, address: str):
        super().__init__(program, listener, client, address)
        self.words = b""  # the last ones on stderr

    @property
    def tool(self) -> int:
        """The number of the tool that images like this one have, as far as it is known."""
        return self.program.tools.get(self.choice.image or self.choice.uid, 0)

    def errand(self) -> Errand:
        """The tool that this container has, as far as it is known."""
        target = self.listener.target.pods.target
        return Run(TOOLS[self.tool](target.host, target.port), self.choice.container)

    def on_data(self, name: str, pieces: list[memoryview]) -> None:
        """Bytes from the far end, or words of the command."""
        if name == "stdout":
            super().on_data(name, pieces)
        else:
            self.words = (self.words + b"".join(pieces))[-WORDS_MAX:]

    def on_ended(self, name: str) -> None:
        """How it has ended is not known yet: the status tells."""

    def on_told(self, text: str) -> None:
        """What came of the command."""
        outcome = read_outcome(text)
        if outcome.code == 0:
            self.finish(False)
            return
        words = printable(self.words.decode("utf-8", "replace").strip().rpartition("\n")[2], WORDS_MAX)
        if self.is_answered:
            self.cut(Failed("cut", words or outcome.words))
        elif outcome.code in NOT_FOUND or outcome.code is None and NO_TOOL.search(outcome.words):
            self.next_tool()
        else:
            self.fail(Failed("command", f"{self.link.errand.words[0]}: {words or outcome.words}"))

    def next_tool(self) -> None:
        """This container does not have it: nobody has read what the client has said."""
        tool = self.tool + 1
        if tool == len(TOOLS) or self.held is None:
            self.fail(Failed("tool", "neither socat nor nc nor bash" if tool == len(TOOLS) else "socat"))
            return
        tools = self.program.tools
        tools[self.choice.image or self.choice.uid] = tool
        if len(tools) > TOOLS_MAX:
            del tools[next(iter(tools))]
        self.tries -= 1
        link, self.link = self.link, None
        link.release()
        self.reconnect()


class Running(Jump):
    """`exec`: one command between stdin, stdout and stderr."""

    __slots__ = ()

    def errand(self) -> Errand:
        """The command as it was given."""
        return Run(self.program.command, self.choice.container)

    def on_data(self, name: str, pieces: list[memoryview]) -> None:
        """What the command says, where it says it."""
        if name == "stdout":
            super().on_data(name, pieces)
        else:
            os.write(2, b"".join(pieces))

    def on_told(self, text: str) -> None:
        """What came of the command is what comes of us."""
        outcome = read_outcome(text)
        self.program.code = 1 if outcome.code is None else outcome.code
        if outcome.code is None:
            self.fail(Failed("command", outcome.words))
        else:
            self.finish(False)


# -- the program -------------------------------------------------------------------------------


class Settings(NamedTuple):
    """The options that all commands have."""

    kubeconfig: str = ""
    context: str = ""  # of targets that name none
    exec_path: str = ""
    ping: float = 15.0
    loglevel: str = "info"
    log: str = "text"


class Kubernetes(Forwarder):
    """What all clients share."""

    called = "the Kubernetes program"

    def __init__(self, log: Log, settings: Settings, environ: Mapping[str, str]):
        """Raises SettingsError."""
        super().__init__(log, Client, self.parse_target)
        self.settings = settings
        self.apis = Apis(self.loop, kubeconfig_paths(settings.kubeconfig, environ), environ,
                         [each for each in settings.exec_path.split(":") if each])
        self.links = Links(self.loop, settings.ping)
        self.alarms = Alarms(self.loop)
        self.pods: dict[str, Pods] = {}  # by target, as text
        self.tools: dict[str, int] = {}  # by image, or where that is not known by the uid of a pod: the tool's number
        self.command: tuple[str, ...] = ()  # of `exec`
        self.code = 0  # of that command
        self.starting = self.loop.queue(START, Client.on_late)
        self.accepting = self.loop.queue(ACCEPT, Client.on_no_accept)
        self.hurried = self.loop.queue(LINGER, Client.on_hurry)
        self.graced = self.loop.queue(GRACE, Client.on_grace)
        self.halved = self.loop.queue(HALF_LAST, Client.on_half)
        self.lingering = self.loop.queue(LINGER, Client.on_linger)
        self.settling = self.loop.queue(SETTLE, Client._farewell)
        self.queues = (self.starting, self.accepting, self.hurried, self.graced, self.halved, self.lingering,
                       self.settling)

    def parse_target(self, text: str) -> Target:
        """A listener's argument.  Raises ValueError."""
        return self.target_of(text, parse_argument(text))

    def target_of(self, text: str, targets: Sequence[KubeTarget]) -> Target:
        """A target with the pods behind it, which all listeners of that target share."""
        targets = [each._replace(context=each.context or self.settings.context) for each in targets]
        pods = self.pods.get(text)
        if pods is None:
            pods = self.pods[text] = Pods(self.alarms, self.apis.of(targets[0].context), targets)
            pods.on_out = lambda uid: self.links.leave({uid})
        return Target(text, pods)

    def add(self, listener: Listener, client: socket.socket, address: str) -> None:
        """Serve one client, as its target wants it."""
        self.serve = Running if self.command else Jump if listener.target.pods.target.host else Client
        super().add(listener, client, address)
        self.serve = Client  # the others are such, too

    def unlisten(self, address: str) -> None:
        """Close a listener and its clients; forget its pods, unless another one leads there."""
        target = self.listeners[address].target
        super().unlisten(address)
        if not any(each.target.pods is target.pods for each in self.listeners.values()):
            self.pods.pop(target.text, None)
            self.links.leave({choice.uid for choice in target.pods.choices})
            target.pods.close()

    def stay(self, client: Client) -> None:
        """A client that has ended still gets an answer."""
        for queue in (self.graced, self.halved):
            if client in queue.due:
                queue.put(client)

    def closed(self, connection: Client) -> None:
        """A client is gone."""
        super().closed(connection)
        self.tell(connection, "debug", "end", "closed", up=str(connection.up), down=str(connection.down))

    def stop(self) -> None:
        """End everything, the clients too."""
        super().stop()
        for pods in self.pods.values():
            pods.close()
        self.links.close()
        self.apis.close()


# -- commands ----------------------------------------------------------------------------------

USAGE = """\
usage: sniroute_kubernetes.py port-forward TARGET --listen HOST:PORT [options]
       sniroute_kubernetes.py exec NAMESPACE/pod/NAME [options] -- COMMAND ...
       sniroute_kubernetes.py get TARGET [options]        what would be chosen now, and why
       sniroute_kubernetes.py forwarders [options]        told on stdin what to listen for, as sniroute does
       sniroute_kubernetes.py --version

A TARGET is NAMESPACE/svc/NAME:PORT[@CONTEXT]; instead of svc: service, deploy, sts, rs, pod, or pods/LABEL=VALUE.
jump:NAMESPACE/svc/NAME/HOST:PORT leads from that pod to HOST:PORT, by socat, nc or bash in it.

options:
  --kubeconfig PATH[:PATH ...]   instead of KUBECONFIG and ~/.kube/config
  --context NAME                 of targets that name none; the current one by default
  --exec-path DIR[:DIR ...]      where credential plugins are looked for, beside PATH
  --ping SECONDS                 how often a session is asked whether it is there (15)
  --loglevel LEVEL               debug, info, warn, error (info)
  --log text|json                how the log looks (text)

Also read: HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE, SSL_CERT_DIR, TUNNEL_LOG_OUTPUT=json.
"""


def seconds(text: str) -> float:
    """`15`, or `15s`.  Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,4}(?:\.[0-9]{1,3})?s?", text, re.ASCII) or not float(text.rstrip("s")):
        raise ValueError(f"{printable(text, 40)!r} is no number of seconds")
    return float(text.rstrip("s"))


def one_of(*words: str) -> Callable[[str], str]:
    """A reader of one of these words."""
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"{printable(text, 40)!r} is none of {', '.join(words)}")
        return text
    return read


OPTIONS: dict[str, Callable[[str], Any]] = {
    "kubeconfig": str, "context": str, "exec-path": str, "ping": seconds, "loglevel": one_of(*LEVELS),
    "log": one_of("text", "json")}


def parse_words(words: list[str], environ: Mapping[str, str], **more: Callable[[str], Any]
                ) -> tuple[list[str], Settings, dict[str, Any]]:
    """Arguments, settings, and the options in `more`.  Raises SettingsError.

    argparse would be a megabyte of each process.
    """
    arguments, wrong, given = [], [], {}
    readers = {**OPTIONS, **more}
    rest = iter(words)
    for word in rest:
        if word == "--":
            break
        if not word.startswith("--"):
            arguments.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if name not in readers:
            wrong.append(f"unknown option {printable(word, 80)!r}")
            continue
        if not equals:
            value = next(rest, None)
        try:
            if value is None:
                raise ValueError("it needs a value")
            given[name.replace("-", "_")] = readers[name](value)
        except ValueError as error:
            wrong.append(f"--{name}: {error}")
    arguments += rest
    if wrong:
        raise SettingsError(*wrong)
    settings = Settings(**{"log": "json" if environ.get("TUNNEL_LOG_OUTPUT") == "json" else "text",
                           **{name: value for name, value in given.items() if name in Settings._fields}})
    return arguments, settings, given


def make(settings: Settings, environ: Mapping[str, str]) -> Kubernetes:
    """A Kubernetes with its settings, which ends at SIGTERM and SIGINT.  Raises SettingsError."""
    raise_descriptor_limit()
    program = Kubernetes(Log(settings.loglevel, settings.log == "json"), settings, environ)
    program.leave_at_signals()
    return program


def target_of(program: Kubernetes, text: str) -> Target:
    """A target on the command line.  Raises SettingsError."""
    try:
        return program.parse_target(text)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def port_forward(words: list[str], environ: Mapping[str, str]) -> int:
    """`port-forward`."""
    arguments, settings, given = parse_words(words, environ, listen=parse_listen)
    if len(arguments) != 1 or "listen" not in given:
        raise SettingsError("port-forward takes one TARGET, and --listen HOST:PORT")
    program = make(settings, environ)
    target = target_of(program, arguments[0])
    try:
        program.listen(target, given["listen"])
    except OSError as error:
        program.log("error", f"cannot listen on {show_address(given['listen'])}: "
                             f"{(error.strerror or str(error)).lower()}")
        return 1
    program.run()
    return 0


def execute(words: list[str], environ: Mapping[str, str]) -> int:
    """`exec`.  Returns the exit code of the command."""
    dashes = words.index("--") if "--" in words else len(words)
    arguments, settings, given = parse_words(words[:dashes], environ, container=str)
    command = tuple(words[dashes + 1:])
    if len(arguments) != 1 or not command:
        raise SettingsError("exec takes one pod, `--`, and the command")
    place, at, context = arguments[0].partition("@")
    try:
        target = parse_target(f"{place}/localhost:1{at}{context}", jump=True)  # with a host no port of a pod is needed
        if given.get("container"):
            target = with_option(target, "container", given["container"])
    except Malformed as error:
        raise SettingsError(str(error)) from None
    program = make(settings, environ)
    program.command = command
    failed = bridge(program, program.target_of(arguments[0], [target]))
    return program.code or failed


def get(words: list[str], environ: Mapping[str, str]) -> int:
    """`get`: what a client would get now, and what the pods do."""
    arguments, settings, _ = parse_words(words, environ)
    if len(arguments) != 1:
        raise SettingsError("get takes one TARGET")
    program = make(settings, environ)
    pods = target_of(program, arguments[0]).pods
    answers: list[Choice | Failed] = []

    def told(answer: Choice | Failed) -> None:
        answers.append(answer)
        program.loop.stop()

    feed = pods.feed
    pods.ask(told, monotonic() + START)
    while not program.loop.stopping:
        program.loop.turn()
        program.log.flush()
        if feed.items is not None and not answers:  # all is known, and nobody is ready: a client would wait
            answers.append(none_ready(pods.target, feed.plan, feed.pods))
            program.loop.stop()
    seen = [f"  {pod}" for pod in feed.pods]
    program.stop()
    program.loop.close()
    answer = answers[0] if answers else Failed("timeout", "it was stopped")
    if isinstance(answer, Failed):
        if settings.log == "json":  # for sniroute's `explain`
            program.log("error", pods.target.text, reason=answer.reason, error=str(answer))
        lines = [f"{REASONS.get(answer.reason, answer.reason)}: {printable(str(answer), 1000)}"]
    else:
        port = f" port {answer.port}" if answer.port else f" container {answer.container}"
        lines = [f"pod {answer.namespace}/{answer.pod}{port}"]
    print("\n".join([*lines, *seen]))
    return 1 if isinstance(answer, Failed) else 0


def forwarders(words: list[str], environ: Mapping[str, str]) -> int:
    """`forwarders`: what varies comes by stdin."""
    arguments, settings, _ = parse_words(words, environ)
    if arguments:
        raise SettingsError(f"unexpected {printable(arguments[0])!r}")
    program = make(settings, environ)
    Control(program)
    program.run()
    return 0


COMMANDS = {"port-forward": port_forward, "exec": execute, "get": get, "forwarders": forwarders}


def main(argv: list[str] | None = None) -> int:
    """The command line, by default the process's.  Returns the exit code: 0 clean, 1 failed, 2 wrong settings."""
    open_standard_streams()
    words = sys.argv[1:] if argv is None else argv
    if words in (["--version"], ["-v"], ["version"]):
        print(f"sniroute_kubernetes {__version__} (Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION})")
        return 0
    if words and words[0] in COMMANDS and not {"-h", "--help"}.intersection(words[1:2]):
        try:
            return COMMANDS[words[0]](words[1:], os.environ)
        except SettingsError as error:
            for line in error.lines:
                print(f"sniroute_kubernetes: {line}", file=sys.stderr)
            return 2
    wants_help = bool({"-h", "--help"}.intersection(words[:2]))
    print(USAGE, end="", file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else 2


if __name__ == "__main__":
    sys.exit(main())
