"""sniroute_instances: a master's servers and clients: child processes, and what is kept of them.

    REST, MCP --> Instances -----> Instance: a row             Child: its process, behind the death guard
                  create, change,   URL, alias, counters  <---  CHECK_POINT lines
                  set_url, order    running|stopped|error <---  that it has begun, failed, ended
                      |                                         all other lines ---> `tell`, the log
                      +--- State: rows of a file                (all three: sniroute_children)

The process of an Instance is `sniroute_nodepass.py` without a word on the command line: the URL, which has the key in
it, is in the environment (URL_VARIABLE), where no other user reads it.

    Instance.status   STOPPED   its process has ended, or was never started
                      RUNNING   it has one, which says how it is
                      ERROR     it has one that fails, or is silent; or its process has ended with a fault

What has been asked for last is its `wish`.  A process that is to end gets TERM, and KILL after NP_SHUTDOWN_TIMEOUT.
What waits for its end (a new URL, the removal) is done then, before the next process begins.  One that ends by itself
with a fault is started again, where `restart` is set: after NP_SERVICE_COOLDOWN, and each time twice that, up to
RETRY_MAX.  Whatever is in state `error` is started again each NP_RELOAD_INTERVAL, as the original does it.  No two
processes begin within START_GAP, so a thousand of them do not take the host's cores at once.

An entry of its own (KEY_ID) has the API key as its URL and the id of the master as its config, as in the original.

Threads: the master's loop runs all of it, and forks: the kernel kills each child when that thread ends, be it by
SIGKILL.  `load` is for the thread that opens the master, before the loop runs; `close` for the same, after it.

Seams: I want to ...
    read another line of a child          `Instances.heard`
    start something else                  the words that Instances is given
    tell of something else                an event, and `tell`

This room imports sniroute_children, sniroute_nodeurl (URL_VARIABLE), sniroute_signals, sniroute_loop, sniroute_host
(`changed_by_others`, `death_guard`) and sniroute_names.

Sources: docs/api.md of NodePass, and what the program was seen to do.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import secrets
import signal
import subprocess
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

from sniroute_children import (DEFAULTS, ERROR, GONE, LINE, LINES_RATE, RUN, RUNNING, STOP, STOPPED, TRAFFIC, Change,
                               Child, Inherited, Instance, NotDone, State, apply, check_value, filled, hidden,
                               instance_of, parse_change, record_of, role_of, split)
from sniroute_host import changed_by_others, death_guard
from sniroute_loop import Alarms, Loop, monotonic
from sniroute_names import printable
from sniroute_nodeurl import URL_VARIABLE
from sniroute_signals import parse_checkpoint

if TYPE_CHECKING:
    from sniroute_forwarder import Log
    from sniroute_nodeurl import Times

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds, sizes in bytes.
INSTANCES_MAX = 1000  # each is a process of some 20 MB, and takes two descriptors here
START_GAP = 0.05  # between two starts: a Python takes half of that of a core
RETRY_MAX = 300.0  # between two starts of one that fails: it may be mended by then
STEADY = 60.0  # a process that lived so long has not failed at its start
SILENT = 3  # report intervals without a CHECK_POINT line: then it is in state `error`, as in the original
SAVE_EVERY = 60.0  # between two looks at counters that have changed: so many seconds of them are lost by a power cut
IMPORT_MAX = 8 << 20  # of a file of instances: a thousand with all their tags

KEY_ID = "*" * 8  # of the entry that has the API key: the original's
EXPORT = "nodepass.json"  # the original's name for it, beside the state

ACTIONS = ("start", "stop", "restart", "reset")
CREATE, UPDATE, DELETE, LOG = "create", "update", "delete", "log"  # events
FAULT = b"  ERROR  "  # in a line of a child: its end does not work, and begins again


class Instances:
    """The instances of one master.  The master's loop; `load` before it runs, `close` after it.

    Args:
        words: of a child's command line.
        environ: of a child, beside URL_VARIABLE.
        given: what their URLs get from the master's.
        tell: an event: (what, Instance, line of its log).
        log: the master's own, which never waits: lines of children go there, too.
    """

    def __init__(self, loop: Loop, state: State, words: Sequence[str], environ: Mapping[str, str], times: Times,
                 given: Inherited, tell: Callable[[str, Instance, str], None], log: Log):
        self.loop = loop
        self.state = state
        self.words = list(words)
        self.environ = dict(environ)
        self.times = times
        self.given = given
        self.tell = tell
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
                self.log("error", f"the state has an instance that cannot be read, and is left alone: {ident}")
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
        apply(instance, change)
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
        if apply(instance, change):
            self.keep(instance)
            self.tell(UPDATE, instance, "")
        if change.action is not None:
            self.order(instance, change.action)

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
        is_same = filled(url, self.given.for_role(split(url).scheme)) == instance.url
        if is_same and not instance.waiting:  # else it is about to have another one
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
                self._launch(instance)
                self.next_start = monotonic() + START_GAP
                break
        if self.due:
            self.starter.set(self.next_start)

    def _launch(self, instance: Instance) -> None:
        """Start its process."""
        self.log("info", f"Instance starting: {hidden(instance.url)} [{instance.id}]")
        instance.checked = 0.0
        if instance.retry is not None:  # somebody was faster, and a failure of this process has its own
            instance.retry.cancel()
            instance.retry = None
        try:
            # Use this instead of DEVNULL, because Popen opens that first, and leaves it open where there is no pipe.
            with open(os.devnull, "rb") as nothing:
                popen = subprocess.Popen([*self.guard, *self.words], stdin=nothing, stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT, bufsize=0, process_group=0,
                                         env={**self.environ, URL_VARIABLE: instance.url})
        except OSError as error:
            self.log("error", f"Instance does not start: {error.strerror} [{instance.id}]")
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
            self.log("warn", f"Instance force killed [{instance.id}]")

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
            self.log("info", f"Instance stopped [{instance.id}]")
            instance.failures = 0
            self._set(instance, STOPPED)
            if not child.asked:
                instance.wish = STOP
        else:
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            self.log("error", f"Instance error: {how} [{instance.id}]")
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
            instance.retry = self.alarms.at(monotonic() + wait, lambda: self._retry(instance))

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
        if FAULT in line and instance.status == RUNNING:
            instance.rest()
            self._set(instance, ERROR)
        if instance.child.may_say():
            self._pass_on(instance, line.decode("utf-8", "replace").rstrip("\r"))

    def _pass_on(self, instance: Instance, line: str) -> None:
        """A line of its log, for whoever listens."""
        self.log.write(f"{printable(line, LINE)} [{instance.id}]")
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
            for instance in [each for each in self.table.values() if each.status == ERROR and each.wish is RUN]:
                self.order(instance, "restart")  # not one that is being stopped

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


# -- files -------------------------------------------------------------------------------------


def export_path(instances: Instances) -> str:
    """Where `export` writes, and `bring_in` reads."""
    return os.path.join(os.path.dirname(os.path.abspath(instances.state.path)), EXPORT)


def export(instances: Instances, done: Callable[[int | str], None]) -> None:
    """Write all instances to `export_path`, which only we can read; `done` gets how many, or why not."""
    rows = [{"alias": each.alias, "url": each.url, "restart": each.restart,
             "meta": {"peer": each.peer, "tags": each.tags}, **{name: each.figures[name] for name in TRAFFIC}}
            for each in instances.table.values()]
    path, text = export_path(instances), json.dumps(rows, indent=2) + "\n"

    def write() -> None:
        result: int | str = len(rows)
        early = f"{path}.{os.getpid()}"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(early)  # in /tmp another user may have made it, to read what is written to it
            with open(os.open(early, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
            os.replace(early, path)
        except OSError as error:
            result = f"{path}: {error.strerror}"
        instances.loop.call(lambda: done(result))

    instances.state.run(write)


def bring_in(instances: Instances, done: Callable[[int | str], None]) -> None:
    """Create what `export_path` has; `done` gets how many, or why not.  What cannot be read is passed over.

    A file that another user may change is not read: in /tmp it may be anybody's.
    """
    path = export_path(instances)

    def read() -> None:
        try:
            if fault := changed_by_others(path):
                raise PermissionError(errno.EPERM, fault)
            with open(path, "rb") as file:
                rows = json.loads(file.read(IMPORT_MAX))
        except OSError as error:
            why = f"{path}: {error.strerror}"
            instances.loop.call(lambda: done(why))
        except (ValueError, RecursionError):
            instances.loop.call(lambda: done(f"{path}: it is no JSON, or over {IMPORT_MAX >> 20} MiB"))
        else:
            rows = rows if isinstance(rows, list) else []
            instances.loop.call(lambda: done(sum(_bring(instances, row) for row in rows)))

    instances.state.run(read)


def _bring(instances: Instances, row: Any) -> bool:
    """Create one of a file; whether it could be."""
    if not isinstance(row, dict) or not isinstance(row.get("url"), str):
        return False
    restart, alias = row.get("restart") is not False, row.get("alias")
    traffic = {name: row[name] for name in TRAFFIC if type(row.get(name)) is int and row[name] >= 0}
    try:
        instances.create(row["url"], alias if isinstance(alias, str) else "",
                         parse_change({"restart": restart, "meta": row.get("meta")}), restart, traffic)
    except NotDone as error:
        instances.log("warn", f"an instance of {export_path(instances)} is left out: {error}")
        return False
    return True
