"""sniroute_children: one server or client of a master: its URL, its figures, its process; the file that keeps all.

    a URL as it is given --- role_of ---> "server", "client"        filled, changed: a URL again
    a CHECK_POINT line ----- count -----> Instance --- show ------> a row of the API
                                          record_of, instance_of -> a record of State, and back
    Child: a process --- heard(line), ended(code) ---> its owner

An Instance is a server or a client of NodePass, whether it runs or not.  A process counts its bytes from zero.
`Instance.base` is what its predecessors carried, so the figures go on.

Threads: the master's loop runs all of it, but State: `State.load` and `State.close` are for the thread that opens the
master, `State._run` is the thread `state`.  The lock of State guards what waits to be written.

Seams: I want to ...
    keep another field of an instance     `Instance.show`, `record_of`, `instance_of`
    let people change another field       Change, `parse_change`
    give a URL another default            DEFAULTS

This room imports sniroute_nodeurl (whether a URL is one), sniroute_loop, sniroute_host (`make_private`) and
sniroute_refusals.

Sources: docs/api.md of NodePass, and what the program was seen to do; sqlite.org: "Write-Ahead Logging".
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import urllib.parse
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from sniroute_host import make_private
from sniroute_loop import READ, Alarm, Loop, Watch, monotonic
from sniroute_nodeurl import parse_url
from sniroute_refusals import SettingsError

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds, sizes in bytes.
VALUE_MAX = 256  # characters of an alias, of a tag: the original's
TAGS_MAX = 100  # tags of one instance: people read them
URL_MAX = 4096  # characters: a hundred targets
LINE = 4096  # of one line of a child: a longer one is cut
PIECE = 65536  # read from a child at a time: a pipe holds no more, and others have their turn then
LAST_PIECES = 16  # read from a child that has ended: the rest is what its own children say
LINES_RATE = 50.0  # log lines of one child in a second, and in a burst; more are counted, and left out
BUSY_TIME = 1.0  # that a predecessor has to let go of the file
WRITE_PAUSE = 5.0  # until a write that failed is tried again

FORMAT = 1  # of the file, in `user_version`: a file of a larger one is refused

STOPPED, RUNNING, ERROR = "stopped", "running", "error"  # of an Instance
RUN, STOP, GONE = "run", "stop", "gone"  # what has been asked for
GAUGES = ("mode", "ping", "pool", "tcps", "udps")
TRAFFIC = ("tcprx", "tcptx", "udprx", "udptx")
PEER = ("sid", "type", "alias")


class NotDone(Exception):
    """What was asked is not done; the text says why, `status` is that of HTTP."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


# -- URLs --------------------------------------------------------------------------------------

# What `config` adds, as the original writes it.
BOTH = {"dns": "5m0s", "lbs": "0", "mode": "0", "dial": "auto", "read": "0s", "rate": "0", "slot": "65536",
        "proxy": "0", "block": "0", "notcp": "0", "noudp": "0"}
DEFAULTS = {"client": {**BOTH, "sni": "none", "min": "64"}, "server": {**BOTH, "max": "1024", "type": "0"}}


class Inherited(NamedTuple):
    """What URLs of instances get from the master's own URL, where they do not say otherwise."""

    log: str = ""
    tls: str = "0"  # and with 2 the files, all three for servers only
    crt: str = ""
    key: str = ""

    def for_role(self, role: str) -> dict[str, str]:
        """The parameters for a server, or for a client."""
        given = {"log": self.log}
        if role == "server" and self.tls != "0":
            given["tls"] = self.tls
            if self.tls == "2":
                given |= {"crt": self.crt, "key": self.key}
        return {name: value for name, value in given.items() if value}


def split(url: str) -> urllib.parse.SplitResult:
    """A URL of an instance in its parts.  Raises NotDone for what is none."""
    if not url.isprintable() or len(url) > URL_MAX:  # urlsplit would leave control characters out
        raise NotDone(400, "Invalid URL format")
    try:
        return urllib.parse.urlsplit(url)
    except ValueError:
        raise NotDone(400, "Invalid URL format") from None


def parameters(parts: urllib.parse.SplitResult) -> list[tuple[str, str]]:
    """The query, in order."""
    return urllib.parse.parse_qsl(parts.query, keep_blank_values=True)


def joined(parts: urllib.parse.SplitResult, query: Sequence[tuple[str, str]]) -> str:
    """The URL with this query, sorted by its names."""
    return parts._replace(query=urllib.parse.urlencode(sorted(query, key=lambda pair: pair[0]))).geturl()


def filled(url: str, given: Mapping[str, str]) -> str:
    """The URL with each of these parameters that it has not, or has empty."""
    parts = split(url)
    query = parameters(parts)
    first = dict(reversed(query))
    missing = {name: value for name, value in given.items() if not first.get(name)}
    return joined(parts, [pair for pair in query if pair[0] not in missing] + list(missing.items()))


def role_of(url: str) -> str:
    """`server` or `client`.  Raises NotDone for a URL that no instance can have, with the reason."""
    role = split(url).scheme
    if role not in DEFAULTS:
        raise NotDone(400, "Invalid URL scheme")
    try:
        parse_url(url)
    except SettingsError as error:
        raise NotDone(400, f"Invalid URL format: {'; '.join(error.lines)}") from None
    return role


def hidden(url: str) -> str:
    """The URL without its key, for the log."""
    parts = split(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def changed(url: str, updates: Mapping[str, str]) -> str:
    """The URL with other parts.  Keys are those of ADDRESSES, or names of parameters; an empty one goes."""
    parts = split(url)
    query = parameters(parts)
    for name, value in updates.items():
        if name in ADDRESSES:
            parts = ADDRESSES[name](parts, value)
        else:
            query = [pair for pair in query if pair[0] != name] + [(name, value)] * bool(value)
    return joined(parts, query)


def _with_place(parts: urllib.parse.SplitResult, host: str | None = None,
                port: str | None = None) -> urllib.parse.SplitResult:
    """Another tunnel address, or another port of it."""
    key, at, place = parts.netloc.rpartition("@")
    old_host, _, old_port = place.rpartition(":")
    host = old_host if host is None else f"[{host}]" if ":" in host and not host.startswith("[") else host
    return parts._replace(netloc=f"{key}{at}{host}:{old_port if port is None else port}")


def _with_key(parts: urllib.parse.SplitResult, key: str) -> urllib.parse.SplitResult:
    place = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{urllib.parse.quote(key, safe='')}@{place}" if key else place)


def _with_target(parts: urllib.parse.SplitResult, host: str | None = None,
                 port: str | None = None) -> urllib.parse.SplitResult:
    """Another host, or port, of the first target, which is the only one then."""
    old_host, _, old_port = parts.path.strip("/").partition(",")[0].rpartition(":")
    return parts._replace(path=f"/{old_host if host is None else host}:{old_port if port is None else port}")


ADDRESSES: dict[str, Callable[[urllib.parse.SplitResult, str], urllib.parse.SplitResult]] = {
    "role": lambda parts, value: parts._replace(scheme=value),
    "password": _with_key,
    "tunnel_address": lambda parts, value: _with_place(parts, host=value),
    "tunnel_port": lambda parts, value: _with_place(parts, port=value),
    "target_address": lambda parts, value: _with_target(parts, host=value),
    "target_port": lambda parts, value: _with_target(parts, port=value),
    "targets": lambda parts, value: parts._replace(path=f"/{value}"),
}


# -- one instance ------------------------------------------------------------------------------


class Instance:
    """A server or a client, whether it runs or not; or the entry with the API key.  The master's loop."""

    __slots__ = ("id", "alias", "type", "status", "url", "config", "restart", "peer", "tags", "figures", "base", "own",
                 "child", "wish", "waiting", "failures", "retry", "checked", "dirty")

    def __init__(self, ident: str, kind: str, url: str, config: str):
        self.id = ident
        self.alias = ""
        self.type = kind  # "server", "client"; "" for the key
        self.status = STOPPED if kind else ""
        self.url = url
        self.config = config
        self.restart = bool(kind)  # started with the master, and after a failure
        self.peer = dict.fromkeys(PEER, "")
        self.tags: dict[str, str] = {}
        self.figures = dict.fromkeys(GAUGES + TRAFFIC, 0)  # as they are shown
        self.base = dict.fromkeys(TRAFFIC, 0)  # what is shown is this and what its process has carried
        self.own = dict.fromkeys(TRAFFIC, 0)  # what its process has said last
        self.child: Child | None = None
        self.wish = STOP
        self.waiting: list[Callable[[], None]] = []  # what is done once its process has ended
        self.failures = 0  # ends in a row that nobody asked for
        self.retry: Alarm | None = None  # what starts it again after the last one
        self.checked = 0.0  # when its process said last how it is; 0: it has not yet
        self.dirty = False  # its counters are not in the file

    def show(self) -> dict[str, Any]:
        """As the API shows it, in the original's order."""
        return {"id": self.id, "alias": self.alias, "type": self.type, "status": self.status, "url": self.url,
                "config": self.config, "restart": self.restart, "meta": {"peer": self.peer, "tags": self.tags},
                **self.figures}

    def count(self, figures: Mapping[str, int]) -> None:
        """Its process has said how it is."""
        for name in GAUGES:
            self.figures[name] = figures[name]
        for name in TRAFFIC:
            if figures[name] < self.own[name]:  # it counts anew
                self.base[name] += self.own[name]
            self.own[name] = figures[name]
            self.figures[name] = self.base[name] + figures[name]
        self.dirty = True

    def rest(self) -> None:
        """Its process serves nobody: no connections, no ping."""
        for name in ("ping", "pool", "tcps", "udps"):
            self.figures[name] = 0

    def settle(self) -> None:
        """Its process has ended: the next one counts from zero."""
        self.rest()
        self.base = {name: self.figures[name] for name in TRAFFIC}
        self.own = dict.fromkeys(TRAFFIC, 0)

    def reset(self) -> None:
        """Count traffic from zero on."""
        self.base = {name: -self.own[name] for name in TRAFFIC}
        self.figures |= dict.fromkeys(TRAFFIC, 0)


def record_of(instance: Instance) -> str:
    """What the file has of an instance."""
    shown = instance.show()
    return json.dumps({name: shown[name] for name in ("alias", "type", "url", "config", "restart", "meta", *TRAFFIC)})


def instance_of(ident: str, record: str) -> Instance:
    """The same as an Instance.  Raises ValueError, KeyError, TypeError for what `record_of` never writes."""
    try:
        fields = json.loads(record)
    except RecursionError:
        raise ValueError("brackets in brackets, by the thousand") from None
    texts = [fields[name] for name in ("type", "url", "config", "alias")]
    texts += [each for table in (fields["meta"]["peer"], fields["meta"]["tags"]) for pair in dict(table).items()
              for each in pair]
    if not all(isinstance(text, str) for text in texts) or not all(type(fields[name]) is int for name in TRAFFIC):
        raise ValueError("a text, or a number, that is none")
    made = Instance(ident, fields["type"], fields["url"], fields["config"])
    made.alias, made.restart = fields["alias"], bool(fields["restart"])
    made.peer |= fields["meta"]["peer"]
    made.tags = dict(fields["meta"]["tags"])
    for name in TRAFFIC:
        made.figures[name] = fields[name]
    made.settle()
    return made


class Child:
    """One process, and what it says.  The master's loop.

    Args:
        heard: is called with each line.
        ended: is called once, with the exit code (below zero: a signal), when all that it said has been heard.
    """

    def __init__(self, popen: subprocess.Popen[bytes], loop: Loop, heard: Callable[[bytes], None],
                 ended: Callable[[int], None]):
        self.popen = popen
        self.heard = heard
        self.ended = ended
        self.began = monotonic()
        self.asked = False  # to end
        self.rest = b""  # a line of which the end has not come yet
        self.left = LINES_RATE  # log lines that it may still say, and when that was counted
        self.counted = self.began
        self.omitted = 0  # lines since the last word about them
        self.output = popen.stdout
        os.set_blocking(self.output.fileno(), False)
        self.watch = Watch(loop.poller, self.output.fileno())
        self.watch.wait_for(READ, self._readable)
        self.pidfd = -1  # without one (macOS) `poll` looks
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.pidfd = os.pidfd_open(popen.pid)
        self.end = Watch(loop.poller, self.pidfd)
        if self.pidfd >= 0:
            self.end.wait_for(READ, self.poll)

    def signal(self, number: int) -> None:
        """Signal it, and all that it has started.  Not after its end: then the number may be another's."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended; macOS says EPERM for zombies
            os.killpg(self.popen.pid, number)

    def may_say(self) -> bool:
        """Whether one more log line of it is passed on."""
        now = monotonic()
        self.left = min(LINES_RATE, self.left + (now - self.counted) * LINES_RATE)
        self.counted = now
        if self.left < 1:
            self.omitted += 1
            return False
        self.left -= 1
        return True

    def _readable(self, mask: int = 0) -> bool:
        """Hear what it says; whether there may be more."""
        try:
            data = os.read(self.output.fileno(), PIECE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:  # it has closed its output, which is no failure
            self.watch.closing()
            self.output.close()
            return False
        *lines, rest = (self.rest + data).split(b"\n")
        self.rest = rest[:LINE]
        for line in lines:
            self.heard(line[:LINE])
        return True

    def poll(self, mask: int = 0) -> None:
        """It has ended, or, without a pidfd, may have."""
        if self.pidfd < 0 and self.popen.poll() is None:
            return
        for _ in range(LAST_PIECES):
            if self.output.closed or not self._readable():
                break
        if self.rest:
            self.heard(self.rest)
        self.watch.closing()
        self.output.close()
        if self.pidfd >= 0:
            self.signal(signal.SIGKILL)  # what it has started: its number is its own until `wait`
            self.end.closing()
            os.close(self.pidfd)
        self.ended(self.popen.wait())


# -- what people change -----------------------------------------------------------------------


class Change(NamedTuple):
    """What a PATCH asks for; None: it stays."""

    alias: str | None = None
    action: str | None = None
    restart: bool | None = None
    peer: Mapping[str, str] | None = None
    tags: Mapping[str, str] | None = None


def check_value(what: str, text: str) -> str:
    """A text that people give, as it can be kept.  Raises NotDone where it is too long."""
    if len(text) > VALUE_MAX:
        raise NotDone(400, f"{what} exceeds maximum length {VALUE_MAX}")
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no character


def parse_change(fields: Any) -> Change:
    """A body of JSON as a Change.  A field that is missing, or null, changes nothing.

    Raises NotDone where one has another type than the API says.
    """
    def field(table: Mapping[str, Any], name: str, kind: type) -> Any:
        value = table.get(name)
        if value is not None and type(value) is not kind:
            raise NotDone(400, "Invalid request body")
        return value

    def texts(table: Any) -> dict[str, str] | None:
        if table is None:
            return None
        found = {name: "" if value is None else value for name, value in table.items()}
        if not all(isinstance(value, str) for value in found.values()):
            raise NotDone(400, "Invalid request body")
        return found

    if not isinstance(fields, dict):
        raise NotDone(400, "Invalid request body")
    meta = field(fields, "meta", dict) or {}
    peer = field(meta, "peer", dict)
    peer = None if peer is None else texts({name: peer.get(name) for name in PEER})
    return Change(field(fields, "alias", str) or None, field(fields, "action", str) or None,
                  field(fields, "restart", bool), peer, texts(field(meta, "tags", dict)))


def apply(instance: Instance, change: Change) -> bool:
    """All of a Change but its action; whether anything is another then.  Raises NotDone."""
    before = instance.alias, instance.restart, instance.peer, instance.tags
    alias = instance.alias if change.alias is None else check_value("Instance alias", change.alias)
    peer, tags = instance.peer, instance.tags
    if change.peer is not None:
        peer = {name: check_value(f"Meta peer.{name}", change.peer.get(name, "")) for name in PEER}
    if change.tags is not None:
        if len(change.tags) > TAGS_MAX:
            raise NotDone(400, f"There are over {TAGS_MAX} meta tags")
        tags = {check_value("Meta tag key", name): check_value("Meta tag value", value)
                for name, value in change.tags.items()}
    instance.alias, instance.peer, instance.tags = alias, peer, tags
    if change.restart is not None:
        instance.restart = change.restart
    return (instance.alias, instance.restart, instance.peer, instance.tags) != before


# -- what is kept ------------------------------------------------------------------------------


class State:
    """A file of records by their ids, in the order in which they were made.  See above for who calls what.

    What is put is on the disk some milliseconds later.  Where the disk refuses, it is tried again until it takes it;
    `complain` is told why, once, in the thread `state`.
    """

    def __init__(self, path: str, complain: Callable[[str], None]):
        self.path = path
        self.complain = complain
        self.lock = threading.Condition()  # guards `pending`, `jobs` and `is_over`; held for single steps
        self.pending: dict[str, str | None] = {}  # records by their ids; None: it goes
        self.jobs: list[Callable[[], None]] = []  # what else touches the disk
        self.is_over = False
        self.connection: Any = None
        self.thread = threading.Thread(target=self._run, name="state", daemon=True)

    def load(self) -> list[tuple[str, str]]:
        """Open the file, which is made where there is none, and start the thread.  Returns (id, record).

        Raises SettingsError.
        """
        try:
            import sqlite3  # imported late: some Pythons are built without it
        except ImportError as error:
            raise SettingsError(f"master://: this Python has no SQLite, where a master keeps its instances ({error})"
                                ) from None
        try:
            make_private(self.path)  # the API key is in it
            self.connection = sqlite3.connect(self.path, timeout=BUSY_TIME, isolation_level=None,
                                              check_same_thread=False)
            run = self.connection.execute
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
                run(f"PRAGMA {pragma}")
            run("BEGIN IMMEDIATE")  # takes the lock, and keeps it
            (version,) = run("PRAGMA user_version").fetchone()
            if version > FORMAT:
                raise SettingsError(f"--state: {self.path} is of a newer sniroute (format {version})")
            run("CREATE TABLE IF NOT EXISTS instances (id TEXT PRIMARY KEY, record TEXT NOT NULL)")
            run(f"PRAGMA user_version={FORMAT}")
            run("COMMIT")
            rows = run("SELECT id, record FROM instances ORDER BY rowid").fetchall()
        except (OSError, sqlite3.Error) as error:
            self._close()
            why = "another master has it open" if "locked" in str(error) else getattr(error, "strerror", None) or error
            raise SettingsError(f"--state: {self.path}: {why}") from None
        except SettingsError:
            self._close()
            raise
        self.thread.start()
        return rows

    def put(self, ident: str, record: str | None) -> None:
        """Keep this; None: forget it."""
        with self.lock:
            self.pending[ident] = record
            self.lock.notify()

    def run(self, job: Callable[[], None]) -> None:
        """Have the thread do something that waits for the disk."""
        with self.lock:
            self.jobs.append(job)
            self.lock.notify()

    def close(self) -> None:
        """Write what waits, and let go of the file."""
        if self.thread.is_alive():
            with self.lock:
                self.is_over = True
                self.lock.notify()
            self.thread.join()
        self._close()

    def _close(self) -> None:
        if self.connection is not None:
            connection, self.connection = self.connection, None
            connection.close()

    def _run(self) -> None:
        """Write what is put, all at once that waits, until it is over."""
        fault = ""
        while True:
            with self.lock:
                if fault and not self.is_over:
                    self.lock.wait(WRITE_PAUSE)
                elif not (self.pending or self.jobs or self.is_over):
                    self.lock.wait()
                pending, self.pending = self.pending, {}
                jobs, self.jobs = self.jobs, []
                is_over = self.is_over
            said, fault = fault, self._commit(pending)
            if fault:
                with self.lock:
                    self.pending = pending | self.pending
                if fault != said:
                    self.complain(f"the state is not kept: {self.path}: {fault}")
            for job in jobs:
                job()
            if is_over:
                return

    def _commit(self, pending: Mapping[str, str | None]) -> str:
        """All of these, or none.  Returns why not; "" where they are on the disk."""
        import sqlite3
        run = self.connection.execute
        try:
            run("BEGIN IMMEDIATE")
            for ident, record in pending.items():
                if record is None:
                    run("DELETE FROM instances WHERE id = ?", (ident,))
                else:
                    run("INSERT INTO instances VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                        (ident, record))
            run("COMMIT")
        except (sqlite3.Error, MemoryError) as error:
            with contextlib.suppress(sqlite3.Error, MemoryError):
                if self.connection.in_transaction:
                    run("ROLLBACK")
            return str(error) or type(error).__name__
        return ""
