"""sniroute_instances: a master's servers and clients: child processes, and what is kept of them.

    REST, MCP --> Instances -----> Instance: a row             Child: its process, behind the death guard
                  create, change,   URL, alias, counters  <---  CHECK_POINT lines
                  set_url, order    running|stopped|error <---  that it has begun, failed, ended
                      |                                         all other lines ---> `tell`, `say`
                      +--- State: rows of a file, written by the thread `state`

An Instance is a server or a client of NodePass.  Its process is `sniroute_nodepass.py` without a word on the command
line: the URL, which has the key in it, is in the environment (URL_VARIABLE), where no other user reads it.

What has been asked for last is its `wish`.  A process that is to end gets TERM, and KILL after NP_SHUTDOWN_TIMEOUT.
What waits for its end (a new URL, the removal) is done then, before the next process begins.  One that ends by itself
with a fault is started again, where `restart` is set: after NP_SERVICE_COOLDOWN, and each time twice that, up to
RETRY_MAX.  Whatever is in state `error` is started again each NP_RELOAD_INTERVAL, as the original does it.  No two
processes begin within START_GAP, so a thousand of them do not take the host's cores at once.

A process counts its bytes from zero.  `Instance.base` is what its predecessors carried, so the figures go on.

An entry of its own (KEY_ID) has the API key as its URL and the id of the master as its config, as in the original.

Threads: the master's loop runs all of it, and forks: the kernel kills each child when that thread ends, be it by
SIGKILL.  `State.load` and `State.close` are for the thread that opens the master; `State._run` is the thread `state`.
The lock of State guards what waits to be written.

Seams: I want to ...
    keep another field of an instance     FIELDS of `Instance.show`, `record_of`, `instance_of`
    read another line of a child          `Instances.heard`
    give a URL another default            DEFAULTS
    start something else                  the words that Instances is given

This room imports sniroute_nodeurl, sniroute_signals, sniroute_processes (the death guard), sniroute_loop, sniroute_names
and sniroute_refusals.

Sources: docs/api.md of NodePass, and what the program was seen to do.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import threading
import urllib.parse
from typing import TYPE_CHECKING, Any, Callable, Mapping, NamedTuple, Sequence

from sniroute_loop import READ, Alarms, Loop, Watch, monotonic
from sniroute_names import printable
from sniroute_nodeurl import parse_url
from sniroute_processes import death_guard
from sniroute_refusals import SettingsError
from sniroute_signals import parse_checkpoint

if TYPE_CHECKING:
    from sniroute_nodeurl import Times

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds, sizes in bytes.
INSTANCES_MAX = 1000  # each is a process of some 20 MB, and takes two descriptors here
VALUE_MAX = 256  # characters of an alias, of a tag: the original's
TAGS_MAX = 100  # tags of one instance: people read them
URL_MAX = 4096  # characters: a hundred targets
START_GAP = 0.05  # between two starts: a Python takes half of that of a core
RETRY_MAX = 300.0  # between two starts of one that fails: as long as cloudflared waits
STEADY = 60.0  # a process that lived so long has not failed at its start
LINE = 4096  # of one line of a child: a longer one is cut
PIECE = 65536  # read from a child at a time: a pipe holds no more, and others have their turn then
LAST_PIECES = 16  # read from a child that has ended: the rest is what its own children say
LINES_RATE = 50.0  # log lines of one child in a second, and in a burst; more are counted, and left out
SILENT = 3  # report intervals without a CHECK_POINT line: then it is in state `error`, as in the original
SAVE_EVERY = 60.0  # between two looks at counters that have changed: so many seconds of them are lost by a power cut
BUSY_TIME = 1.0  # that a predecessor has to let go of the file
WRITE_PAUSE = 5.0  # until a write that failed is tried again
IMPORT_MAX = 8 << 20  # of a file of instances: a thousand with all their tags

FORMAT = 1  # of the file, in `user_version`: a file of a larger one is refused
KEY_ID = "*" * 8  # of the entry that has the API key: the original's
URL_VARIABLE = "SNIROUTE_NODEPASS_URL"  # where a child finds its URL
EXPORT = "nodepass.json"  # the original's name for it, beside the state

STOPPED, RUNNING, ERROR = "stopped", "running", "error"  # of an Instance
RUN, STOP, GONE = "run", "stop", "gone"  # what has been asked for
ACTIONS = ("start", "stop", "restart", "reset")
CREATE, UPDATE, DELETE, LOG = "create", "update", "delete", "log"  # events
GAUGES = ("mode", "ping", "pool", "tcps", "udps")
TRAFFIC = ("tcprx", "tcptx", "udprx", "udptx")
PEER = ("sid", "type", "alias")
FAULTS = b"Server error:", b"Client error:"  # in a line that says that an end has failed, and begins again


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
        parts = urllib.parse.urlsplit(url)
        parts.port  # which it looks at only when it is asked
        return parts
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
                 "child", "wish", "waiting", "failures", "checked", "dirty")

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
    fields = json.loads(record)
    made = Instance(ident, fields["type"], fields["url"], fields["config"])
    made.alias, made.restart = str(fields["alias"]), bool(fields["restart"])
    made.peer |= fields["meta"]["peer"]
    made.tags = dict(fields["meta"]["tags"])
    for name in TRAFFIC:
        made.figures[name] = int(fields[name])
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


# -- what is kept ------------------------------------------------------------------------------


class State:
    """A file of records by their ids, in the order in which they were made.  See above for who calls what.

    What is put is on the disk some milliseconds later.  Where the disk refuses, it is tried again until it takes it.
    """

    def __init__(self, path: str, log: logging.Logger):
        self.path = path
        self.log = log
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
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.fchmod(descriptor, 0o600)  # the API key is in it; what SQLite puts beside it gets the same mode
            os.close(descriptor)
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
                    self.log.error("the state is not kept: %s: %s", self.path, fault)
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
                    run("INSERT INTO instances VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET record = ?2",
                        (ident, record))
            run("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                if self.connection.in_transaction:
                    run("ROLLBACK")
            return str(error) or type(error).__name__
        return ""


# -- all of them -------------------------------------------------------------------------------


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


class Instances:
    """The instances of one master.  The master's loop; `load` before it runs, `close` after it.

    Args:
        words: of a child's command line.
        environ: of a child, beside URL_VARIABLE.
        given: what their URLs get from the master's.
        tell: an event: (what, Instance, line of its log).
        say: a line of a child, for the master's own output.
    """

    def __init__(self, loop: Loop, state: State, words: Sequence[str], environ: Mapping[str, str], times: Times,
                 given: Inherited, tell: Callable[[str, Instance, str], None], say: Callable[[str], None],
                 log: logging.Logger):
        self.loop = loop
        self.state = state
        self.words = list(words)
        self.environ = dict(environ)
        self.times = times
        self.given = given
        self.tell = tell
        self.say = say
        self.log = log
        self.key = Instance(KEY_ID, "", "", "")
        self.table: dict[str, Instance] = {}  # without the key
        self.leaving: set[Instance] = set()  # removed, and its process has not ended
        self.guard: list[str] = []
        self.alarms = Alarms(loop)
        self.due: collections.deque[Instance] = collections.deque()  # to be started, one after another
        self.starter = loop.timer(self._start_next)
        self.next_start = 0.0
        self.saved = self.revived = monotonic()  # when counters were written last; when errors were started again
        self.all_gone: Callable[[], None] | None = None  # the master ends: what is done when no child is left

    def load(self) -> bool:
        """Read the file, and have those started that are to start with the master.

        Returns whether there was an API key; if not, there is one now.  Raises SettingsError.
        """
        self.guard = death_guard()
        for ident, record in self.state.load():
            try:
                instance = instance_of(ident, record)
            except (ValueError, KeyError, TypeError):
                self.log.error("the state has an instance that cannot be read, and is left alone: %s", printable(ident))
                continue
            if ident == KEY_ID:
                self.key = instance
                continue
            self.table[ident] = instance
            if instance.restart:
                self._begin(instance)
        was_there = bool(self.key.url)
        if not was_there:
            self.key.url, self.key.config = secrets.token_hex(16), secrets.token_hex(8)
            self.keep(self.key)
        return was_there

    # -- what is asked -------------------------------------------------------------------------

    def all(self) -> list[Instance]:
        """All, the entry with the key first."""
        return [self.key, *self.table.values()]

    def find(self, ident: str) -> Instance | None:
        """The one with this id."""
        return self.key if ident == KEY_ID else self.table.get(ident)

    def keep(self, instance: Instance) -> None:
        """Write it to the file."""
        instance.dirty = False
        self.state.put(instance.id, record_of(instance))

    def create(self, url: str, alias: str = "", change: Change = Change(), runs: bool = True,
               traffic: Mapping[str, int] = {}) -> Instance:
        """A new one, which starts in a moment, unless `runs` is False.  Raises NotDone."""
        alias = check_value("Instance alias", alias)
        role = role_of(url)
        if len(self.table) >= INSTANCES_MAX:
            raise NotDone(409, f"There are {INSTANCES_MAX} instances already")
        while (ident := secrets.token_hex(4)) in self.table:
            pass
        instance = Instance(ident, role, "", "")
        self._point(instance, url)
        instance.alias = alias
        self._apply(instance, change)
        instance.figures |= traffic
        instance.settle()
        self.table[ident] = instance
        self.keep(instance)
        self.tell(CREATE, instance, "")
        if runs:
            self._begin(instance)
        return instance

    def change(self, instance: Instance, change: Change) -> None:
        """Do what a PATCH asks for, all or nothing.  Raises NotDone."""
        if change.action is not None and change.action not in ACTIONS:
            raise NotDone(400, f"Invalid action: {printable(change.action)}")
        if self._apply(instance, change):
            self.keep(instance)
            self.tell(UPDATE, instance, "")
        if change.action is not None:
            self.order(instance, change.action)

    def _apply(self, instance: Instance, change: Change) -> bool:
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

    def order(self, instance: Instance, action: str) -> None:
        """Do one of ACTIONS.  A stop, or a restart, is over when its process has ended."""
        if action == "reset":
            instance.reset()
            self.keep(instance)
            self.tell(UPDATE, instance, "")
        elif action == "stop":
            instance.wish = STOP
            self._halt(instance)
        elif action == "restart" and instance.child is not None:
            instance.wish = RUN
            self._halt(instance)
        else:
            self._begin(instance)

    def set_url(self, instance: Instance, url: str, done: Callable[[], None]) -> None:
        """Another URL, with which it is started; `done` is called before that, once its process has ended.

        Raises NotDone.
        """
        role_of(url)
        if filled(url, self.given.for_role(split(url).scheme)) == instance.url:
            raise NotDone(409, "Instance URL conflict")

        def then() -> None:
            self._point(instance, url)
            self.keep(instance)
            done()
            self.tell(UPDATE, instance, "")

        self._after(instance, RUN, then)

    def delete(self, instance: Instance, done: Callable[[], None]) -> None:
        """Remove it; `done` is called once its process has ended, so its ports are free then."""
        del self.table[instance.id]
        self.leaving.add(instance)

        def then() -> None:
            self.leaving.discard(instance)
            self.state.put(instance.id, None)
            done()
            self.tell(DELETE, instance, "")

        self._after(instance, GONE, then)

    def new_key(self) -> None:
        """Another API key: the old one is good for nothing from now on."""
        self.key.url = secrets.token_hex(16)
        self.keep(self.key)

    def _point(self, instance: Instance, url: str) -> None:
        """Let it have this URL, which has been looked at."""
        instance.type = split(url).scheme
        instance.url = filled(url, self.given.for_role(instance.type))
        instance.config = filled(instance.url, DEFAULTS[instance.type])

    # -- files ---------------------------------------------------------------------------------

    @property
    def export_path(self) -> str:
        """Where `export` writes, and `read_export` reads."""
        return os.path.join(os.path.dirname(os.path.abspath(self.state.path)), EXPORT)

    def export(self, done: Callable[[int | str], None]) -> None:
        """Write all instances to `export_path`, which only we can read; `done` gets how many, or why not."""
        rows = [{"alias": each.alias, "url": each.url, "restart": each.restart,
                 "meta": {"peer": each.peer, "tags": each.tags}, **{name: each.figures[name] for name in TRAFFIC}}
                for each in self.table.values()]
        text = json.dumps(rows, indent=2) + "\n"

        def write() -> None:
            result: int | str = len(rows)
            early = f"{self.export_path}.{os.getpid()}"
            try:
                with open(os.open(early, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
                    file.write(text)
                os.replace(early, self.export_path)
            except OSError as error:
                result = f"{self.export_path}: {error.strerror}"
            self.loop.call(lambda: done(result))

        self.state.run(write)

    def bring_in(self, done: Callable[[int | str], None]) -> None:
        """Create what `export_path` has; `done` gets how many, or why not.  What cannot be read is passed over."""
        def read() -> None:
            try:
                with open(self.export_path, "rb") as file:
                    rows = json.loads(file.read(IMPORT_MAX))
            except OSError as error:
                why = f"{self.export_path}: {error.strerror}"
                self.loop.call(lambda: done(why))
            except (ValueError, RecursionError):
                self.loop.call(lambda: done(f"{self.export_path}: it is no JSON, or over {IMPORT_MAX >> 20} MiB"))
            else:
                self.loop.call(lambda: done(sum(map(self._bring, rows if isinstance(rows, list) else ()))))

        self.state.run(read)

    def _bring(self, row: Any) -> bool:
        """Create one of a file; whether it could be."""
        if not isinstance(row, dict) or not isinstance(row.get("url"), str):
            return False
        restart, alias = row.get("restart") is not False, row.get("alias")
        traffic = {name: row[name] for name in TRAFFIC if type(row.get(name)) is int and row[name] >= 0}
        try:
            self.create(row["url"], alias if isinstance(alias, str) else "",
                        parse_change({"restart": restart, "meta": row.get("meta")}), restart, traffic)
        except NotDone as error:
            self.log.warning("an instance of %s is left out: %s", self.export_path, printable(str(error)))
            return False
        return True

    # -- processes -----------------------------------------------------------------------------

    def _begin(self, instance: Instance) -> None:
        """Have it started as soon as it is its turn."""
        instance.wish = RUN
        if instance.child is None and instance not in self.due:
            self.due.append(instance)
            self.starter.set(max(self.next_start, monotonic()))

    def _start_next(self) -> None:
        """Start the next one that still is to run."""
        while self.due:
            instance = self.due.popleft()
            if instance.wish is RUN and instance.child is None and self.all_gone is None:
                self.next_start = monotonic() + START_GAP
                self._launch(instance)
                break
        if self.due:
            self.starter.set(self.next_start)

    def _launch(self, instance: Instance) -> None:
        """Start its process."""
        self.log.info("Instance starting: %s [%s]", printable(hidden(instance.url), URL_MAX), instance.id)
        instance.checked = 0.0
        try:
            # Use this instead of DEVNULL, because Popen opens that first, and leaves it open where there is no pipe.
            with open(os.devnull, "rb") as nothing:
                popen = subprocess.Popen([*self.guard, *self.words], stdin=nothing, stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT, bufsize=0, process_group=0,
                                         env={**self.environ, URL_VARIABLE: instance.url})
        except OSError as error:
            self.log.error("Instance does not start: %s [%s]", error.strerror, instance.id)
            self._failed(instance)
            return
        instance.child = Child(popen, self.loop, lambda line: self.heard(instance, line),
                               lambda code: self._ended(instance, code))
        self._set(instance, RUNNING)

    def _set(self, instance: Instance, status: str) -> None:
        """It is in this state from now on."""
        instance.status = status
        if instance.wish is not GONE:
            self.tell(UPDATE, instance, "")

    def _halt(self, instance: Instance) -> None:
        """Have its process end, and killed where it does not."""
        child = instance.child
        if child is None:
            if instance.status != STOPPED:
                self._set(instance, STOPPED)
        elif not child.asked:
            child.asked = True
            child.signal(signal.SIGTERM)
            self.alarms.at(monotonic() + self.times.shutdown, lambda: self._kill(instance, child))

    def _kill(self, instance: Instance, child: Child) -> None:
        """It has not ended in time."""
        if instance.child is child:
            child.signal(signal.SIGKILL)
            self.log.warning("Instance force killed [%s]", instance.id)

    def _after(self, instance: Instance, wish: str, act: Callable[[], None]) -> None:
        """Have its process end, do this then, and what has been asked for last."""
        instance.wish = wish
        if instance.child is not None:
            instance.waiting.append(act)
            self._halt(instance)
        else:
            self._halt(instance)
            act()
            if instance.wish is RUN:
                self._begin(instance)

    def _ended(self, instance: Instance, code: int) -> None:
        """Its process has ended."""
        child, instance.child = instance.child, None
        self._confess(instance, child)
        instance.settle()
        if child.asked or not code:
            self.log.info("Instance stopped [%s]", instance.id)
            instance.failures = 0
            self._set(instance, STOPPED)
            if not child.asked:
                instance.wish = STOP
        else:
            self.log.error("Instance error: %s [%s]", f"signal {-code}" if code < 0 else f"exit status {code}",
                           instance.id)
            if monotonic() - child.began > STEADY:
                instance.failures = 0
            self._failed(instance)
        if instance.wish is not GONE:
            self.keep(instance)
        waiting, instance.waiting = instance.waiting, []
        for act in waiting:
            act()
        if child.asked and instance.wish is RUN:
            self._begin(instance)
        if self.all_gone is not None and not self._running():
            self.all_gone()

    def _failed(self, instance: Instance) -> None:
        """It could not be started, or has ended with a fault: try again later, where that is wanted."""
        if instance.wish is GONE:
            return
        self._set(instance, ERROR)
        if instance.wish is RUN and instance.restart:
            wait = min(RETRY_MAX, self.times.cooldown * 2 ** min(instance.failures, 20))
            instance.failures += 1
            self.alarms.at(monotonic() + wait, lambda: self._retry(instance))

    def _retry(self, instance: Instance) -> None:
        if instance.wish is RUN and instance.status == ERROR and instance.restart:
            self._begin(instance)

    def _running(self) -> list[Instance]:
        return [each for each in (*self.table.values(), *self.leaving) if each.child is not None]

    def heard(self, instance: Instance, line: bytes) -> None:
        """A line of its process."""
        at = line.find(b"CHECK_POINT|")
        figures = parse_checkpoint(line[at:].decode("utf-8", "replace").strip()) if at >= 0 else None
        if figures is not None:
            instance.checked = monotonic()
            instance.count(figures)
            if not instance.child.asked:  # one that is to end may say how it was, and still counts
                self._set(instance, RUNNING)
            return
        if any(fault in line for fault in FAULTS) and instance.status == RUNNING:
            instance.rest()
            self._set(instance, ERROR)
        if instance.child.may_say():
            self._pass_on(instance, line.decode("utf-8", "replace").rstrip("\r"))

    def _pass_on(self, instance: Instance, line: str) -> None:
        """A line of its log, for whoever listens."""
        self.say(f"{printable(line, LINE)} [{instance.id}]")
        if instance.wish is not GONE:
            self.tell(LOG, instance, line)

    def _confess(self, instance: Instance, child: Child) -> None:
        """Say how many lines were left out."""
        if child.omitted:
            count, child.omitted = child.omitted, 0
            self._pass_on(instance, f"{count} lines were left out: it says more than {LINES_RATE:g} in a second")

    # -- time ----------------------------------------------------------------------------------

    def tick(self) -> None:
        """Once a second."""
        now = monotonic()
        for instance in (*self.table.values(), *self.leaving):
            child = instance.child
            if child is None:
                continue
            if child.pidfd < 0:
                child.poll()
            self._confess(instance, child)
            if instance.status == RUNNING and instance.checked and not child.asked and \
                    now - instance.checked > SILENT * self.times.report:
                self._set(instance, ERROR)
        if now - self.saved >= SAVE_EVERY:
            self._save(now)
        if now - self.revived >= self.times.reload:
            self.revived = now
            for instance in [each for each in self.table.values() if each.status == ERROR]:
                self.order(instance, "restart")

    def _save(self, now: float) -> None:
        """Write the counters that have changed."""
        self.saved = now
        for instance in self.table.values():
            if instance.dirty:
                self.keep(instance)

    def stop_all(self, done: Callable[[], None]) -> None:
        """Have all processes end, and start none any more; `done` is called when none is left."""
        self.all_gone = done
        for instance in self._running():
            self._halt(instance)
        if not self._running():
            done()

    def close(self) -> None:
        """Write what is left.  The loop has ended, and its thread with it."""
        self._save(monotonic())
        for instance in self._running():  # it did not die even when killed
            instance.child.signal(signal.SIGKILL)
            instance.child.output.close()
        self.state.close()


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
