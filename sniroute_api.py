"""sniroute_api: requests to an API server, in a loop: lists, watches, upgrades, changes.

    Apis.of("prod") ---> Api:  get      a whole answer         ---> Reply
                               watch    lines of JSON, on and on
                               upgrade  another protocol       ---> Upgraded, with its Wire
                              send     an object, or its end  ---> Reply

    a Job (a request):   who are we?       a connection            ask             judge
                         Identity ------- an idle Line, or ------ Line.ask ------ 401: once more, as somebody new
                         (credentials)    Opening (layers)          |             429, 503 with Retry-After: later
                              ^                                     |             an idle Line was dead: a new one
                              +-------------------------------------+             else: tell

A Job is one request until its answer; `Job.phase` says in words what it waits for, and that is in the reason where its
time is over.  A Line is a connection that carries one request after another, and may end with an upgrade: then its
Wire is handed over, and the bytes behind the 101 with it.  So a client that nobody has served yet has its two lists
and its upgrade on one connection.

What a Line reads is HTTP/1.1 as sniroute_http has it; what that refuses is no answer.

    Apis      what the APIs of one loop share: where kubeconfigs are, the way out, times that come
    Api       one context: its Identity, and its idle Lines
    Job       one request to its answer: a GET by itself; Watch, Upgrade and Change are kinds of it

Threads: the loop's only; see sniroute_credentials for those that look for credentials.

Seams: I want to ...
    ask in another way           a subclass of Job: `begun`, `part`, `judge`
    tell a failure apart         a row in REASONS, and in STATUS_REASONS or where Failed is raised
    add a field to each request  `Api.head`

Sources: kubernetes.io, "Kubernetes API Concepts"; RFC 9110, RFC 9112.

This room imports sniroute_credentials (Identity), sniroute_plugins (Plugins, Sources), sniroute_layers (Wire, Opening),
sniroute_kubeconfig (Context), sniroute_http (answers), sniroute_dial, sniroute_loop, sniroute_names and
sniroute_refusals.
"""

from __future__ import annotations

import collections
import json
import re
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Sequence

from sniroute_credentials import Access, Identity
from sniroute_dial import Failed, WayOut, find_proxy
from sniroute_http import Counted, Response, make_line, open_body, parse_response
from sniroute_kubeconfig import Cluster, Context
from sniroute_layers import Opening, Place, Wire, Wires, unheard
from sniroute_loop import Alarm, Alarms, Loop, monotonic
from sniroute_names import printable
from sniroute_plugins import Plugins, Sources
from sniroute_refusals import Malformed

__version__ = "0.1.0"

# Limits, each with its reason.  Bytes, or seconds.
BODY_MAX = 16 << 20  # an answer: a list of a thousand pods has 10 MiB
EVENT_MAX = 4 << 20  # a line of a watch: an object has 1.5 MiB at most (etcd's limit), and its managed fields beside
INTERIMS_MAX = 100  # answers of 1xx in one piece: nobody sends more than one or two
REFUSAL_MAX = 1 << 16  # the body of a refused upgrade: a Status, or some words of the node's
WORDS_MAX = 300  # characters of the server's words in a reason
IDLE_MAX = 4  # idle connections of an API: a client needs one, and few come at the same moment
IDLE_FOR = 30.0  # an idle connection is closed: balancers before API servers forget theirs after a minute or more
ASKING_MAX = 64  # lists and upgrades of an API at a time; more wait.  API servers queue more than some 100 of a user
WATCH_START = 30.0  # until a watch has its head; from then on it may be silent
SILENT = 3.0  # without an answer on a connection that was idle: a new one is tried.  The other end may have left
AGAIN_LEAST = 0.2  # until a request that was told to come back is sent again: nobody is to be asked in a loop
AGAIN_USUAL = 1.0  # the same, where Retry-After is a date, or nonsense
APIS_MAX = 256  # APIs that are known by name: a name may come from a stranger, where the operator allows that

PATH = re.compile(r"/[!-~]*")
USER_AGENT = b"sniroute/" + __version__.encode()
PROTOCOLS = (b"websocket", b"spdy/3.1")  # that `upgrade` may be answered with

# Why an API server could not be asked: a word for programs, and a sentence for people.
REASONS = {
    "config": "the kubeconfig cannot be used",
    "context": "the kubeconfig has no such context",
    "name": "the API server's name does not resolve",
    "resolver": "the host's resolver gives no answer",
    "unreachable": "the API server cannot be reached",
    "reset": "the API server closed the connection",
    "timeout": "the API server gave no answer in time",
    "proxy": "the proxy to the API server cannot be reached, or refused",
    "certificate": "the API server's certificate is not trusted",
    "tls": "TLS with the API server failed",
    "plugin": "the credential plugin failed",
    "login": "the API server does not know us (401)",
    "forbidden": "the API server does not allow it (403)",
    "unknown": "the cluster has no such object (404)",
    "expired": "what was asked for is too old (410)",
    "busy": "the API server has too much to do (429)",
    "answer": "the API server answered something else",
}
STATUS_REASONS = {401: "login", 403: "forbidden", 404: "unknown", 410: "expired", 429: "busy"}
DIAL_REASONS = {"refused": "unreachable", "timeout": "unreachable"}  # as this room calls them

# The phases of a job, beside those of its Identity and its Opening.
QUEUED, ASKING, LATER = "waiting for its turn", "waiting for the API server's answer", "told to ask again later"
STARTING, OVER = "beginning", "over"


# -- results -----------------------------------------------------------------------------------


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]  # names in lower case; values of one name joined by commas
    body: bytes

    def json(self) -> dict[str, Any]:
        """The object in the body.  Raises Failed, `answer`, where there is none."""
        return parse_object(self.body)


class Upgraded(NamedTuple):
    """A connection that speaks another protocol now.  Its owner sets the callbacks of `wire` before `done` returns."""

    headers: Mapping[str, str]  # of the 101
    wire: Wire
    rest: bytes  # what came behind the 101: the first bytes of the other protocol


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object.  Raises Failed, `answer`."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Failed("answer", "it is no object in JSON")
    return found


def headers_of(response: Response) -> dict[str, str]:
    """The fields of a head."""
    headers: dict[str, str] = {}
    for field in response.head.fields:
        name, value = field.name.decode("ascii").lower(), field.value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def words_of(reply: Reply) -> str:
    """What the server says: the message of a Status, else the first line."""
    try:
        said = reply.json().get("message")
    except Failed:
        lines = reply.body[:WORDS_MAX * 4].decode("utf-8", "replace").split("\n")
        said = next((line.strip() for line in lines if line.strip()), "")
    return printable(said if isinstance(said, str) else "", WORDS_MAX)


# What RBAC says; the verbs that a path means where it does not.
FORBIDDEN = re.compile(r'User "[^"]*" cannot (?P<verb>[a-z]+) resource "(?P<resource>[^"]+)" in API group '
                       r'"(?P<group>[^"]*)"(?: in the namespace "(?P<namespace>[^"]*)")?')
API_PATH = re.compile(r"/(?:api/v1|apis/(?P<group>[^/?]+)/[^/?]+)(?:/namespaces/(?P<namespace>[^/?]+))?"
                      r"/(?P<resource>[^/?]+)(?:/(?P<name>[^/?]+)(?:/(?P<sub>[^/?]+))?)?(?P<query>\?.*)?")


def grant(message: str, method: str, path: str) -> str:
    """The line of a role that would allow what was refused, as the end of a sentence.

    Source: kubernetes.io, "Using RBAC Authorization"; the message is what its authorizer says.
    """
    said, asked = FORBIDDEN.search(message), API_PATH.fullmatch(path)
    if said is None and message.partition(" is forbidden: ")[2].strip():  # a quota, or another rule for objects: no role would help
        return ""
    if said is not None:
        verb, resource, group, namespace = said.group("verb", "resource", "group", "namespace")
    elif asked is not None:
        group, namespace, resource, name, sub, query = asked.group("group", "namespace", "resource", "name", "sub",
                                                                   "query")
        resource = f"{resource}/{sub}" if sub else resource
        watches = re.search(r"[?&]watch=(?:true|1)\b", query or "")
        verb = {"POST": "create", "DELETE": "delete"}.get(method, "watch" if watches else "get" if name else "list")
    else:
        return ""
    where = f"a Role in the namespace {namespace}" if namespace else "a ClusterRole"
    rule = f'{{apiGroups: ["{group or ""}"], resources: ["{resource}"], verbs: ["{verb}"]}}'
    return printable(f"; {where} grants it with {rule}", WORDS_MAX)


def failure(reply: Reply, method: str, path: str) -> Failed:
    """Why an answer is none that helps: a word of REASONS, the server's own words, and with 403 what would grant it."""
    message = words_of(reply)
    detail = f"HTTP {reply.status}{': ' if message else ''}{message}"
    if reply.status == 403:
        detail += grant(message, method, path)
    return Failed(STATUS_REASONS.get(reply.status, "answer"), detail)


def retry_after(reply: Reply) -> float | None:
    """Seconds until it may be asked again; None where it does not say so.  Source: RFC 9110 section 10.2.3."""
    text = reply.headers.get("retry-after")
    if reply.status not in (429, 503) or text is None:
        return None
    seconds = float(text) if text.isascii() and text.isdigit() and len(text) < 7 else AGAIN_USUAL
    return max(seconds, AGAIN_LEAST)


# -- a connection that asks --------------------------------------------------------------------


class Line:
    """A connection that carries requests, one after another.  It owns its wire, until that is handed over.

    While it is idle, whatever comes on it ends it.
    """

    __slots__ = ("api", "place", "wire", "job", "method", "data", "seen", "response", "body", "is_used", "keeps")

    def __init__(self, api: Api, place: Place, wire: Wire):
        self.api = api
        self.place = place
        self.wire = wire
        self.job: Job | None = None  # that asks; None: idle
        self.method = ""
        self.data = b""  # of a head that is not whole
        self.seen = 0  # bytes of it that were looked at
        self.response: Response | None = None
        self.body: Counted | None = None
        self.is_used = False  # it has carried a request before this one
        self.keeps = False  # after this answer it may carry another request
        wire.on_data = self._on_data
        wire.on_end = self._on_end

    def ask(self, job: Job, method: str, head: bytes) -> None:
        """Send a request, `head` and what is behind it, and tell `job` what comes: `begun`, `part`, `answered`, or `broke`."""
        self.job, self.method = job, method
        self.response = self.body = None
        self.wire.send(head)

    def close(self) -> None:
        """It is of no more use."""
        self.job = None
        self.wire.close()

    @property
    def is_silent(self) -> bool:
        """Whether no byte of the answer has come."""
        return self.response is None and not self.data

    def _on_data(self, data: bytes) -> None:
        if self.job is None:  # nobody has asked: a 408 of a proxy, or nonsense
            self.api.drop(self)
            return
        try:
            if self.body is None:
                data = self._read_head(self.data + data if self.data else data)
            while self.body is not None and self.job is not None:
                parts, taken = self.body.feed(data)
                for part in parts:
                    if self.job is not None:
                        self.job.part(part)
                if self.job is None or not self.body.is_done:
                    return
                data = data[taken:]
                self._over(data)
        except Malformed as error:
            self._broke(Failed("answer", str(error)))
        except Failed as failed:  # a job does not want more of it
            self._broke(failed)

    def _read_head(self, data: bytes) -> bytes:
        """The head, as soon as it is whole.  Returns what is behind it.  Raises Malformed."""
        for _ in range(INTERIMS_MAX):
            response = parse_response(data, self.method, PROTOCOLS, self.seen)
            if response is None:
                self.data, self.seen = data, len(data)
                return b""
            data, self.data, self.seen = data[response.head.end:], b"", 0
            if not response.is_interim:
                break
        else:
            raise Malformed("interim answers without an end")
        self.response = response
        if response.status == 101:
            job, wire, self.job = self.job, self.wire, None
            wire.on_data = wire.on_end = wire.on_room = unheard
            job.switched(self, Upgraded(headers_of(response), wire, data))
            return b""
        self.body = open_body(response, unframed=True)
        self.job.begun(response)
        return data

    def _over(self, rest: bytes) -> None:
        """The answer is whole."""
        job, response = self.job, self.response
        self.job = self.body = None
        self.is_used = True
        self.keeps = response.keeps and not rest
        job.answered(response)

    def _on_end(self, error: Failed | None) -> None:
        if self.job is None:
            self.api.drop(self)
            return
        if self.body is not None and error is None:
            try:
                self.body.end()
            except Malformed:
                pass  # it was cut
            else:
                self._over(b"")
                return
        self._broke(error or Failed("reset", "before the end of its answer" if self.response or self.data
                                    else "before its answer"))

    def _broke(self, failed: Failed) -> None:
        job, self.job = self.job, None
        self.wire.reset()
        if job is not None:
            job.broke(self, failed)


# -- requests ----------------------------------------------------------------------------------


class Job:
    """A request that is under way.  `phase` says in words what it waits for."""

    body_max = BODY_MAX
    content = b""  # what is sent: JSON

    __slots__ = ("api", "method", "path", "headers", "done", "deadline", "state", "alarm", "access", "opening", "line",
                 "silence", "body", "has_a_turn", "was_refused", "may_reuse")

    def __init__(self, api: Api, method: str, path: str, headers: Sequence[tuple[str, str]],
                 done: Callable[[Any], None], deadline: float):
        if not PATH.fullmatch(path):
            raise ValueError("no path of an API")
        self.api = api
        self.method = method
        self.path = path
        self.headers = b"".join(make_line(name.encode("ascii"), value.encode("latin-1")) for name, value in headers)
        self.done: Callable[[Any], None] | None = done
        self.deadline = deadline
        self.state = STARTING
        self.access: Access | None = None
        self.opening: Opening | None = None
        self.line: Line | None = None
        self.silence: Alarm | None = None  # it rings where nothing comes on a connection that was idle
        self.body = bytearray()  # or of a watch the line that is not whole.  A list of pieces could take 20 times that
        self.has_a_turn = False
        self.was_refused = False  # by a 401
        self.may_reuse = True  # on an idle connection, and once more on a new one where that one was dead
        self.alarm: Alarm | None = api.apis.alarms.at(deadline, self._late)
        api.jobs.add(self)
        api.apis.soon.put(self)

    @property
    def phase(self) -> str:
        """What it waits for, in words."""
        if self.opening is not None:
            return self.opening.phase
        return self.api.identity.phase or self.state if self.state is STARTING else self.state

    def cancel(self) -> None:
        """Break it off; its callbacks are called no more.  Does nothing where it is over."""
        if self.state is not OVER:
            self._leave()

    # -- its way, step by step -----------------------------------------------------------------

    def begin(self) -> None:
        """Wait for a turn."""
        if self.state is OVER:
            return
        if not self.has_a_turn and not self.api.take_turn(self):
            self.state = QUEUED
            return
        self.state = STARTING
        self.api.identity.ask(self._known)

    def _known(self, access: Access | Failed) -> None:
        """Who we are."""
        if self.state is not STARTING:
            return  # cancelled meanwhile
        if isinstance(access, Failed):
            self.finish(access)
            return
        self.access = access
        self.api.adopt(access)
        line = self.api.idle_line() if self.may_reuse else None
        if line is not None:
            self._ask(line)
            return
        self.opening = Opening(self.api.apis.wires, self.api.apis.way_to(access.place), access.place, self._opened)
        self.opening.start()

    def _opened(self, wire: Wire | Failed) -> None:
        self.opening = None
        if isinstance(wire, Failed):
            reason = DIAL_REASONS.get(wire.reason, wire.reason)
            where = "" if reason == "proxy" else f"{self.access.context.cluster.authority}: "
            self.finish(Failed(reason, f"{where}{wire}"))
            return
        self._ask(Line(self.api, self.access.place, wire))

    def _ask(self, line: Line) -> None:
        self.state = ASKING
        self.line = line
        self.body = bytearray()
        if line.is_used:
            self.silence = self.api.apis.alarms.at(monotonic() + SILENT, self._silent)
        line.ask(self, self.method, self.api.head(self.access, self.method, self.path, self.headers, self.content))

    def _silent(self) -> None:
        """Nothing has come on a connection that was idle: perhaps nobody is there any more."""
        line = self.line
        if line is not None and line.is_silent:
            line.job = None
            line.wire.reset()
            self.broke(line, Failed("reset", "before its answer"))

    # -- what its line says --------------------------------------------------------------------

    def begun(self, response: Response) -> None:
        """The head of the answer is there."""

    def part(self, data: memoryview) -> None:
        """Some of the body came.  Raises Failed, where it is too much."""
        self.body += data
        if len(self.body) > self.body_max:
            raise Failed("answer", f"an answer of more than {self.body_max >> 10} KiB")

    def switched(self, line: Line, upgraded: Upgraded) -> None:
        """The connection speaks another protocol."""
        upgraded.wire.reset()
        self.line = None
        self.finish(Failed("answer", "HTTP 101 that was not asked for"))

    def answered(self, response: Response) -> None:
        """The answer is whole."""
        line, self.line = self.line, None
        reply = Reply(response.status, headers_of(response), bytes(self.body))
        self.api.keep(line)
        self._end_silence()
        seconds = retry_after(reply)
        if reply.status == 401 and not self.was_refused:
            self.was_refused = True
            self.state = STARTING
            self.api.identity.refused(self.access, lambda access: self._renewed(access, reply))
        elif seconds is not None and monotonic() + seconds < self.deadline:
            self.state = LATER
            self._give_turn()
            self.api.apis.alarms.at(monotonic() + seconds, self.begin)
        else:
            self.judge(reply)

    def _renewed(self, access: Access | Failed | None, reply: Reply) -> None:
        """After a 401: there is another proof, or there is none."""
        if self.state is not STARTING:
            return
        if access is None:
            self.judge(reply)
        else:
            self._known(access)

    def broke(self, line: Line, failed: Failed) -> None:
        """The connection is over, before the end of the answer."""
        self.line = None
        self._end_silence()
        if line.is_used and line.is_silent and self.may_reuse:
            self.may_reuse = False  # once more, on a new connection
            self.state = STARTING
            self.api.identity.ask(self._known)  # anew: others may know of another cluster by now
        else:
            self.finish(Failed(failed.reason, f"{self.access.context.cluster.authority}: {failed}"))

    # -- its end -------------------------------------------------------------------------------

    def judge(self, reply: Reply) -> None:
        """Tell what came of it."""
        self.finish(failure(reply, self.method, self.path) if reply.status in (401, 403) else reply)

    def finish(self, result: Any) -> None:
        """Tell the result."""
        done = self.done
        self._leave()
        if done is not None:
            done(result)

    def _late(self) -> None:
        """The deadline has come."""
        phase = self.phase
        where = f" ({self.access.context.cluster.authority})" if self.access is not None else ""
        self.finish(Failed("timeout", f"{phase}{where}"))

    def _leave(self) -> None:
        """It is over: nothing of it is left, and the next one has its turn."""
        if self.state is QUEUED and self not in self.api.queue:
            self.api.call_next()  # its own turn has come, and it does not take it
        self.state = OVER
        self.done = None
        if self.alarm is not None:
            self.alarm.cancel()
        self._end_silence()
        if self.opening is not None:
            self.opening.cancel()
        if self.line is not None:
            self.line.job = None
            self.line.wire.reset()
        self.opening = self.line = None
        self.body = bytearray()
        self.api.jobs.discard(self)
        self.api.queue.pop(self, None)
        self._give_turn()

    def _end_silence(self) -> None:
        """Something has come, or nothing is waited for any more."""
        if self.silence is not None:
            self.silence.cancel()
            self.silence = None

    def _give_turn(self) -> None:
        if self.has_a_turn:
            self.has_a_turn = False
            self.api.give_turn()


class Watch(Job):
    """A stream of JSON lines.  `done` is its `on_end`."""

    __slots__ = ("on_event", "is_streaming")

    def __init__(self, api: Api, path: str, on_event: Callable[[dict[str, Any]], None],
                 on_end: Callable[[Failed | None], None]):
        super().__init__(api, "GET", path, (), on_end, monotonic() + WATCH_START)
        self.on_event = on_event
        self.is_streaming = False

    def begun(self, response: Response) -> None:
        self._end_silence()
        if response.status == 200:
            self.is_streaming = True
            self.alarm.cancel()
            self._give_turn()

    def part(self, data: memoryview) -> None:
        if not self.is_streaming:
            super().part(data)
            return
        first, *rest = bytes(data).split(b"\n")
        self.body += first
        if len(self.body) > EVENT_MAX:
            raise Failed("answer", f"a line of more than {EVENT_MAX >> 20} MiB")
        for more in rest:
            line, self.body = bytes(self.body), bytearray(more)
            if line.strip():
                self.on_event(parse_object(line))
            if self.state is OVER:  # cancelled by what it has told
                return

    def judge(self, reply: Reply) -> None:
        self.finish(None if self.is_streaming else failure(reply, self.method, self.path))


class Upgrade(Job):
    """A connection that is to speak another protocol."""

    __slots__ = ()

    body_max = REFUSAL_MAX

    def switched(self, line: Line, upgraded: Upgraded) -> None:
        self.line = None
        self.finish(upgraded)

    def judge(self, reply: Reply) -> None:
        self.finish(failure(reply, self.method, self.path) if reply.status == 401 else reply)


class Change(Job):
    """An object that is to be made, or removed."""

    __slots__ = ("content",)

    def __init__(self, api: Api, method: str, path: str, thing: Mapping[str, Any],
                 done: Callable[[Reply | Failed], None], deadline: float):
        super().__init__(api, method, path, (("Content-Type", "application/json"),), done, deadline)
        self.content = json.dumps(thing).encode("ascii")


# -- API servers -------------------------------------------------------------------------------


class Api:
    """An API server, by a context of the kubeconfig.  All methods run in the loop.

    Get one from `Apis.of`.  It stays while the kubeconfig changes: the next request uses the new one.

    Deadlines are clock times of `time.monotonic`.  Callbacks are never called before the method returns.
    Paths are those of the API, with their query (`/api/v1/namespaces/default/pods?limit=1`), percent-encoded.
    """

    def __init__(self, apis: Apis, name: str):
        self.apis = apis
        self.name = name  # of the context; "" for the current one
        self.context: Context | None = None  # as it was read last; None before the first request
        self.identity = Identity(apis.loop, apis.plugins, apis.sources, name)
        self.place: Place | None = None  # where idle lines lead to
        self.idle: list[Line] = []  # the one that was used last comes last
        self.jobs: set[Job] = set()
        self.turns = ASKING_MAX  # that are free
        self.queue: collections.OrderedDict[Job, None] = collections.OrderedDict()  # jobs that wait for one

    def get(self, path: str, done: Callable[[Reply | Failed], None], deadline: float) -> Job:
        """GET: `done(Reply)` for each status but 401 (Failed, `login`) and 403 (Failed, `forbidden`)."""
        return Job(self, "GET", path, (), done, deadline)

    def watch(self, path: str, on_event: Callable[[dict[str, Any]], None],
              on_end: Callable[[Failed | None], None]) -> Job:
        """GET a stream of JSON lines; `path` has `watch=true`.

        `on_event(object)` for each; `on_end(None)` where the server has ended it, else Failed: also for a status other
        than 200 (`failure` has made it: 410 is `expired`).  A watch may be silent for ever: put `timeoutSeconds` into
        the path.  An event of the type ERROR is a line like others.
        """
        return Watch(self, path, on_event, on_end)

    def upgrade(self, method: str, path: str, headers: Sequence[tuple[str, str]],
                done: Callable[[Upgraded | Reply | Failed], None], deadline: float, once: bool = False) -> Job:
        """Ask for another protocol: `done(Upgraded)`, or Reply where the answer is no 101 (403, too; never 401).

        `headers` name the protocol: Connection, Upgrade, Sec-WebSocket-*, X-Stream-Protocol-Version ...  What the 101
        says of it is the caller's to check.  `once`: the request may do something, so it is never sent again where
        no answer has come; it has a connection of its own, which is not dead already.
        """
        job = Upgrade(self, method, path, headers, done, deadline)
        job.may_reuse = not once
        return job

    def send(self, method: str, path: str, thing: Mapping[str, Any], done: Callable[[Reply | Failed], None],
             deadline: float) -> Job:
        """POST or DELETE, with this object: `done` as with `get`.  It may be done twice: so name what is meant."""
        return Change(self, method, path, thing, done, deadline)

    def close(self) -> None:
        """End its jobs and its idle connections."""
        for job in list(self.jobs):
            job.cancel()
        for line in self.idle.copy():
            self.drop(line)

    # -- for its jobs --------------------------------------------------------------------------

    def adopt(self, access: Access) -> None:
        """What was found now is what the next requests use."""
        before, self.context = self.context, access.context
        if before is not None and before is not access.context and before != access.context:
            self.apis.moving.put(self)
        if self.place is not access.place:
            self.place = access.place
            self.apis.look_at(access.context.cluster)
            for line in self.idle.copy():
                self.drop(line)

    def head(self, access: Access, method: str, path: str, headers: bytes, content: bytes) -> bytes:
        """A request: its head, which has a secret, and its content."""
        cluster = access.context.cluster
        length = b"" if method == "GET" else b"Content-Length: %d\r\n" % len(content)
        return b"%b %b HTTP/1.1\r\nHost: %b\r\nUser-Agent: %b\r\nAccept: application/json\r\n%b%b%b\r\n%b" % (
            method.encode("ascii"), (cluster.prefix + path).encode("ascii"), cluster.authority.encode("ascii"),
            USER_AGENT, access.proof, headers, length, content)

    def idle_line(self) -> Line | None:
        """An idle connection, which is the caller's from here on."""
        if not self.idle:
            return None
        line = self.idle.pop()
        self.apis.idling.drop(line)
        return line

    def keep(self, line: Line) -> None:
        """An answer is whole: the connection waits for the next request, if it may."""
        if not line.keeps or line.place is not self.place or not line.wire.is_open:
            line.close()
            return
        self.idle.append(line)
        self.apis.idling.put(line)
        if len(self.idle) > IDLE_MAX:
            self.drop(self.idle[0])

    def drop(self, line: Line) -> None:
        """Close an idle connection."""
        if line in self.idle:
            self.idle.remove(line)
        self.apis.idling.drop(line)
        line.close()

    def take_turn(self, job: Job) -> bool:
        """Whether a job may ask now; else it begins again when another one is over."""
        if not self.turns:
            self.queue[job] = None
            return False
        self.turns -= 1
        job.has_a_turn = True
        return True

    def give_turn(self) -> None:
        """A job needs its turn no more: the next one begins."""
        self.turns += 1
        self.call_next()

    def call_next(self) -> None:
        """There is a turn that nobody has taken."""
        if self.queue:
            self.apis.soon.put(self.queue.popitem(False)[0])


class Apis:
    """All API servers of one loop.

    Args:
        paths: of kubeconfigs (`kubeconfig_paths`).
        environ: for the in-cluster account, HTTPS_PROXY, and plugins.
        exec_path: folders in which plugins are looked for, beside PATH.
        way: how connections leave this host; by default, as `environ` has it.  Raises SettingsError then.

    `warn(text)` is called with what an operator has to know, and `moved(api)` when a context is no longer what it was:
    what the API server has said may be that of another cluster.
    """

    def __init__(self, loop: Loop, paths: Iterable[str], environ: Mapping[str, str], exec_path: Iterable[str] = (),
                 way: WayOut | None = None):
        self.loop = loop
        self.sources = Sources(tuple(paths), environ, tuple(exec_path))
        self.way = way or WayOut(loop, *find_proxy(environ))
        self.direct = WayOut(loop, None, "")  # to a proxy that the kubeconfig names
        self.wires = Wires(loop)
        self.plugins = Plugins(loop)
        self.alarms = Alarms(loop)
        self.soon = loop.queue(0.0, Job.begin)
        self.idling = loop.queue(IDLE_FOR, lambda line: line.api.drop(line))
        self.known: collections.OrderedDict[str, Api] = collections.OrderedDict()  # the one that was used last is last
        self.moved: Callable[[Api], None] = lambda api: None
        self.moving = loop.queue(0.0, lambda api: self.moved(api))
        self.warn: Callable[[str], None] = lambda text: None
        self.warned: set[str] = set()  # names of clusters; a kubeconfig has so many

    def of(self, context: str) -> Api:
        """The Api of a context; "" for the current one.  The same one for a name, as a rule; nothing is read here."""
        api = self.known.get(context)
        if api is None:
            api = self.known[context] = Api(self, context)
        self.known.move_to_end(context)
        if len(self.known) > APIS_MAX:
            self.known.popitem(False)  # whoever has it may use it on
        return api

    @property
    def is_changing(self) -> bool:
        """Whether an object is being made or removed: that should not be broken off."""
        return any(isinstance(job, Change) for api in self.known.values() for job in api.jobs)

    def look_at(self, cluster: Cluster) -> None:
        """Warn of a cluster that may be anybody, once."""
        if cluster.is_tls and not cluster.verifies and cluster.name not in self.warned:
            self.warned.add(cluster.name)
            self.warn(f"insecure-skip-tls-verify: the certificate of cluster {printable(cluster.name, 60)} is not "
                      "checked, so whoever is between reads and changes all, and has our credentials")

    def way_to(self, place: Place) -> WayOut:
        """How connections to a place leave this host."""
        return self.way if place.proxy is None else self.direct

    def close(self) -> None:
        """End all jobs, idle connections and plugins.

        Wires that were handed over are their owners', who close them before: sockets of closed wires close now.
        """
        for api in self.known.values():
            api.close()
        self.plugins.close()
        self.wires.close()
