"""sniroute_jumps: clients that are served by a command in a pod.

    client --- Jump --- Link ----> socat, nc or bash in the pod ----> HOST:PORT, as the pod sees it
    shell ---- Exec --- Link ----> one command in the pod

Each is a Client (sniroute_passage) whose errand is a Run: what the client says goes to the command's stdin, and what
the command prints goes to the client.  Its status tells at the end what came of it.

Nobody tells which tools a container has.  So a Jump tries one after another (TOOLS).  What the client has said is kept
(`Client.held`) until a tool is proven to be there: it has printed a byte, or has not failed for PROOF.  The other
clients of that image begin with this tool (`Kubernetes.tools`).

Threads: all runs in the loop.

Seams: I want to ...
    another tool that jumps         a row in TOOLS
    another text of a missing tool  NO_TOOL, NOT_FOUND

This room imports sniroute_passage (Client), sniroute_transports (Run), sniroute_channels (what became of a command),
sniroute_forwarder (Listener), sniroute_dial (Failed), sniroute_loop and sniroute_names.
"""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING, Callable

from sniroute_channels import read_outcome
from sniroute_dial import Failed
from sniroute_forwarder import Listener
from sniroute_loop import Queue, monotonic
from sniroute_names import printable, show_address
from sniroute_passage import CARRYING, HELD_MAX, WORDS_MAX, Client
from sniroute_transports import Errand, Run

if TYPE_CHECKING:
    from sniroute_kubernetes import Kubernetes

__version__ = "0.1.0"

TOOL_GRACE = 0.5  # seconds for which socat waits for the other end's last bytes: its default
PROOF = 1.0  # seconds in which a command fails that cannot be run
TOOLS_MAX = 1000  # images of which it is known which tool they have

# -- tools -------------------------------------------------------------------------------------

# What bash does without a tool.  Host and port are its arguments, and no part of the line.  It cannot tell the far end
# that the client has ended: that gets two seconds for the rest of its answer, or it would stay in the pod for ever.
BASH = ('exec 3<>"/dev/tcp/$1/$2" 4<&0 || exit 1; { cat <&4 >&3; sleep 2; kill $$; } & cat <&3; code=$?; '
        "kill $! 2>/dev/null; exit $code")

# The tools that carry bytes to HOST:PORT, the best one first: (host, port) -> words.
TOOLS: tuple[Callable[[str, int], tuple[str, ...]], ...] = (
    # socat leaves when nothing has come for TOOL_GRACE after either end.  A longer time would delay each end that the
    # far side makes: what socat does then, it does for both.
    lambda host, port: ("socat", "-", f"TCP:{show_address((host, port))},connect-timeout=10"),
    lambda host, port: ("nc", host, str(port)),
    lambda host, port: ("bash", "-c", BASH, "sniroute", host, str(port)),
)
NO_TOOL = re.compile(r"executable file not found|no such file or directory", re.ASCII | re.I)
NOT_FOUND = (126, 127)  # exit codes of what cannot be run, POSIX 2.8.2


# -- clients -----------------------------------------------------------------------------------


class Jump(Client):
    """A client whose bytes are carried by a command in the pod."""

    __slots__ = ("words", "tool", "is_proven", "heard_at")

    def __init__(self, program: Kubernetes, listener: Listener, client: socket.socket, address: str):
        super().__init__(program, listener, client, address)
        self.words = b""  # the last ones on stderr
        self.tool = 0  # the number of the tool
        self.is_proven = True  # whether this container is known to have it
        self.heard_at = 0.0  # clock time of the last bytes, or of the client's end

    @property
    def image(self) -> str:
        """What is common to all containers that have the same tools."""
        return self.way.choice.image or self.way.choice.uid

    def errand(self) -> Errand:
        """The tool that this container has, or the first that it is not known not to have."""
        self.is_proven = self.image in self.program.tools
        self.tool = self.program.tools.get(self.image, self.tool)
        self.program.proving.drop(self)  # that was for another call
        target = self.listener.target.pods.target
        return Run(TOOLS[self.tool](target.host, target.port), self.way.choice.container)

    def on_accepted(self) -> None:
        """The node begins to run the tool: only from here on it can fail."""
        if not self.is_proven:
            self.program.proving.put(self)
        super().on_accepted()

    def on_proven(self) -> None:
        """The container has the tool: it would have said otherwise by now."""
        if not self.is_proven and self.state in CARRYING:
            self.is_proven = True
            tools = self.program.tools
            tools[self.image] = self.tool
            if len(tools) > TOOLS_MAX:
                del tools[next(iter(tools))]
            self.on_room()

    def _listens(self) -> bool:
        """No more than is kept for the next tool, while this one may not be there."""
        return super()._listens() and (self.is_proven or self.held is None or len(self.held) < HELD_MAX)

    def on_data(self, name: str, pieces: list[memoryview]) -> None:
        """Bytes from the far end, or words of the command."""
        if name == "stdout":
            self.on_proven()
            self.heard_at = monotonic()
            super().on_data(name, pieces)
        else:
            self.words = (self.words + b"".join(pieces))[-WORDS_MAX:]

    def _client_ended(self) -> None:
        self.heard_at = monotonic()
        super()._client_ended()

    def on_ended(self, name: str) -> None:
        """How it has ended is not known yet: the status tells."""

    def on_told(self, text: str) -> None:
        """What came of the command."""
        outcome = read_outcome(text)
        if outcome.code == 0:
            # After the client's end the tool may have left because nothing came for a while: that was no end.
            if self.has_ended and monotonic() - self.heard_at > 0.8 * TOOL_GRACE:
                self.cut(Failed("cut", "the far end had not ended"))
            else:
                self.finish(False)
            return
        words = printable(self.words.decode("utf-8", "replace").strip().rpartition("\n")[2], WORDS_MAX)
        if self.is_answered:
            self.cut(Failed("cut", words or outcome.words))
        elif outcome.code in NOT_FOUND or outcome.code is None and NO_TOOL.search(outcome.words):
            self.next_tool()
        else:
            self.fail(Failed("command", f"{self.way.link.errand.words[0]}: {words or outcome.words}"))

    def next_tool(self) -> None:
        """This container does not have it: nobody has read what the client has said."""
        if self.is_proven or self.tool + 1 == len(TOOLS):
            self.program.tools.pop(self.image, None)
            self.fail(Failed("tool", "neither socat nor nc nor bash"))
            return
        self.tool += 1
        self.way.tries -= 1
        self.way.reconnect()


class Exec(Jump):
    """`exec`: one command between stdin, stdout and stderr.  It is run once, whatever becomes of its session."""

    __slots__ = ()

    def errand(self) -> Errand:
        """The command as it was given."""
        return Run(self.program.command, self.way.choice.container, once=True)

    def on_cut(self, why: Failed) -> None:
        """The session is lost.  The command may have run, and what it has said may not be all."""
        self.program.code = 1
        if self.is_answered:
            self.cut(why)
        else:
            self.fail(why)

    def on_grace(self, queue: Queue) -> None:
        """A command may be silent for long, but one that waits for the end of its input would do so for ever."""
        if queue is self.program.halved:
            queue.put(self)
        else:
            self.on_cut(Failed("command", "this cluster cannot tell a command that its input has ended"))

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
