"""sniroute_api: requests to an API server, in a loop: lists, watches, upgrades.
"""

from __future__ import annotations

import ssl
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from sniroute_dial import Failed, WayOut
from sniroute_kubeconfig import Context
from sniroute_loop import Loop

__version__ = "0.1.0"

ROOM = 1 << 16  # bytes: `Wire.on_room` is called when `unsent` falls to this, having been above it

# Why an API server could not be asked: a word for programs, and a sentence for people.
REASONS = {
    "config": "the kubeconfig cannot be used",
    "context": "the kubeconfig has no such context",
    "name": "the API server's name does not resolve",
    "resolver": "the host's resolver gives no answer",
    "unreachable": "the API server cannot be reached",
    "timeout": "the API server gave no answer in time",
    "proxy": "the proxy to the API server cannot be reached, or refused",
    "certificate": "the API server's certificate is not trusted",
    "tls": "the TLS handshake with the API server failed",
    "plugin": "the credential plugin failed",
    "login": "the API server does not know us (401)",
    "forbidden": "the API server does not allow it (403)",
    "unknown": "the cluster has no such object (404)",
    "gone": "what was asked for is too old (410)",
    "busy": "the API server has too much to do (429)",
    "answer": "the API server answered something else",
}


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]  # names in lower case; values of one name joined by commas
    body: bytes

    def json(self) -> dict[str, Any]:
        """The object in the body.  Raises Failed, `answer`, where there is none."""
        raise NotImplementedError


class Upgraded(NamedTuple):
    """A connection that speaks another protocol now.  Its owner assigns the callbacks of `wire` before `done` returns."""

    headers: Mapping[str, str]  # of the 101
    wire: Wire
    rest: bytes  # what came behind the 101: the first bytes of the other protocol


class Wire:
    """A connection to an API server, as bytes: TLS or plain.  All methods run in the loop.

    The owner assigns the callbacks; whoever assigns them next is the next owner:

        on_data(data)    bytes came, up to 256 KiB at a time
        on_end(error)    the other side has ended: None, or Failed where it broke off.  It is called once; nothing comes
                         after it, the wire is closed by then
        on_room()        `unsent` has fallen to ROOM or less, having been above it

    `unsent`: bytes that the kernel has not taken yet.  There is no limit: the owner stops when it grows.
    """

    unsent: int
    on_data: Callable[[bytes], None]
    on_end: Callable[[Failed | None], None]
    on_room: Callable[[], None]

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send now what the kernel takes, and the rest as soon as it does.  Put many small pieces into one call.

        Never raises for the connection: a failure is told to `on_end`, in the next turn.  `data` is not kept.
        """
        raise NotImplementedError

    def pause(self) -> None:
        """Read no more, until `resume`.  A piece that is on its way to `on_data` still comes."""
        raise NotImplementedError

    def resume(self) -> None:
        """Read again."""
        raise NotImplementedError

    def close(self) -> None:
        """Send what is unsent, end TLS, and close; no callback is called any more.  More than once does no harm."""
        raise NotImplementedError

    def reset(self) -> None:
        """Break off at once, with an RST; no callback is called any more.  More than once does no harm."""
        raise NotImplementedError


class Job:
    """A request that is under way.  `phase` says in words what it waits for."""

    phase: str

    def cancel(self) -> None:
        """Break it off; its callbacks are called no more.  Does nothing where it is over."""
        raise NotImplementedError


class Api:
    """An API server, by a context of the kubeconfig.  All methods run in the loop.

    Get one from `Apis.of`.  It stays while the kubeconfig changes: the next request uses the new one.

    Deadlines are clock times of `time.monotonic`.  Callbacks are never called before the method returns.
    Paths are those of the API, with their query (`/api/v1/namespaces/default/pods?limit=1`), percent-encoded.
    """

    name: str  # of the context; "" for the current one
    context: Context | None  # as it was read last; None before the first request

    def get(self, path: str, done: Callable[[Reply | Failed], None], deadline: float) -> Job:
        """GET: `done(Reply)` for each status but 401 (Failed, `login`) and 403 (Failed, `forbidden`)."""
        raise NotImplementedError

    def watch(self, path: str, on_line: Callable[[dict[str, Any]], None],
              on_end: Callable[[Failed | None], None]) -> Job:
        """GET a stream of JSON lines; `path` has `watch=true`.

        `on_line(object)` for each; `on_end(None)` where the server has ended it, else Failed: also for a status other
        than 200 (`failure` has made it: 410 is `gone`).  A watch may be silent for ever: put `timeoutSeconds` into
        the path.  An event of the type ERROR is a line like others.
        """
        raise NotImplementedError

    def upgrade(self, method: str, path: str, headers: Sequence[tuple[str, str]],
                done: Callable[[Upgraded | Reply | Failed], None], deadline: float) -> Job:
        """Ask for another protocol: `done(Upgraded)`, or Reply where the answer is no 101 (403, too; never 401).

        `headers` name the protocol: Connection, Upgrade, Sec-WebSocket-*, X-Stream-Protocol-Version ...  What the 101
        says of it is the caller's to check.
        """
        raise NotImplementedError


class Apis:
    """All API servers of one loop.

    Args:
        paths: of kubeconfigs (`kubeconfig_paths`).
        environ: for the in-cluster account, HTTPS_PROXY, and plugins.
        exec_path: folders in which plugins are looked for, beside PATH.
        way: how connections leave this host; by default, as `environ` has it.
    """

    def __init__(self, loop: Loop, paths: Sequence[str], environ: Mapping[str, str], exec_path: Sequence[str] = (),
                 way: WayOut | None = None):
        raise NotImplementedError

    def of(self, context: str) -> Api:
        """The Api of a context; "" for the current one.  Always the same one for a name; nothing is read here."""
        raise NotImplementedError

    def close(self) -> None:
        """End all jobs, idle connections and plugins.  Wires that were handed over are their owners'."""
        raise NotImplementedError


def failure(reply: Reply, method: str, path: str) -> Failed:
    """Why an answer is none that helps: a word of REASONS, the server's own words, and with 403 what would grant it."""
    raise NotImplementedError
