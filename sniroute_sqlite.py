"""sniroute_sqlite: claims and their history in a file that outlives the router.

    the registry's loop                                the thread `sqlite`
    Sqlite.write(what, former, claim, done) -- orders --> one transaction for all that wait: claims, history
      done(Written) <------- Loop.call ----------------
    Sqlite.history(done, ...) ------------ orders ------> rows of the last 30 days

A Store of sniroute_registry.  A renewal for the same ttl is not written: after a restart each claim has a whole ttl
anyway, so nothing is lost by that, and a renewal costs no disk.  A claim that has ended stays in the file until its
name is held no more.

`write` tells `done` once the change is on the disk (WAL, synchronous=FULL: a commit survives a power cut).  All that
waits goes into one commit: so it takes thousands of claims a second, though a disk does some hundred commits in that
time.

One process has the file (locking_mode=EXCLUSIVE): two registries on one file would each believe to know all claims.
A file system without locks, as some NFS, is refused by SQLite itself, or not at all: keep it on a local disk.

Threads: `load`, `open` and `close` are for the thread that attaches: the first two before the loop runs, `close` after
it.  What is below "the thread" is for the thread `sqlite`; all else is the loop's.  The connection belongs to that
thread from the end of `load` to its own end.  No lock: orders go by a queue, answers by `Loop.call`.

Seams: I want to ...
    keep more of a change     Change, and a column of `history`; FORMAT counts up
    keep it for longer        HISTORY_DAYS

This room imports sniroute_registry (Written, claims as texts), sniroute_claims, sniroute_loop,
sniroute_scarcity, sniroute_host
(`make_private`) and sniroute_names.

Sources: sqlite.org: "Write-Ahead Logging", "PRAGMA locking_mode", "PRAGMA synchronous".
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import queue
import sqlite3
import threading
import time
from typing import Any, Callable, NamedTuple, Sequence

from sniroute_claims import OK, Claim, Table
from sniroute_host import make_private
from sniroute_loop import Loop, owner_of
from sniroute_names import without_key
from sniroute_registry import RENEWED, UNAVAILABLE, Registry, Written, from_text, to_text
from sniroute_scarcity import SHORT_OF_MEMORY, outlast

__version__ = "0.1.0"

# Limits, each with its reason.
FORMAT = 1  # of the file, in `user_version`: a file of a larger one is refused
BUSY_TIME = 5.0  # seconds that a predecessor has to let go of the file
WAITING_MAX = 10000  # changes that wait for the disk: some seconds of a slow one; one more is refused
BATCH = 2000  # orders of one commit: some tens of milliseconds for those that wait
HISTORY_DAYS = 30  # for which changes are kept: somebody may ask weeks later who had a name
PRUNE_EVERY = 3600.0  # seconds between two looks at what is too old
ROWS_MAX = 1000  # of one answer about the history

NOTHING = object()  # no order; None is one

TABLES = """
CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, record TEXT NOT NULL, held_until REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS history (number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, event TEXT NOT NULL,
                                    key TEXT NOT NULL, owner TEXT NOT NULL, detail TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS history_at ON history (at);
"""


class StoreError(Exception):
    """The file cannot be used, in words for people."""


class Change(NamedTuple):
    """What has become of a key: the row of `claims`, then what `history` has beside its key."""

    key: str
    record: str  # the claim, as `to_text` has it
    held_until: float | None  # seconds since 1970: it has ended, and its name is held until then; None: it lives
    event: str  # for the history
    owner: str
    detail: str


class Row(NamedTuple):
    """A row of `history`: what has happened to a claim."""

    number: int  # counts up
    at: float  # seconds since 1970
    event: str
    key: str
    owner: str
    detail: str


Order = tuple[Change, Callable[[Written], None]]  # what is to be written, and who is told


def said(error: sqlite3.Error | MemoryError) -> str:
    """What SQLite says, for people."""
    return SHORT_OF_MEMORY if isinstance(error, MemoryError) else str(error) or type(error).__name__


class Sqlite:
    """The file.  See above for who calls what.

    Args:
        path: of the file, which is made where there is none.
        loop: of the registry: `done` is called there.
        clock: seconds since 1970, for the history and for names that are held.
    """

    name, is_shared, addresses = "sqlite", False, ()

    def __init__(self, path: str, loop: Loop, clock: Callable[[], float] = time.time):
        self.path = path
        self.loop = loop
        self.clock = clock
        self.fault = ""  # why the last commit failed; "" where it did not
        self.waiting = 0  # changes that are not on the disk yet
        # Changes, and what looks into the history; None: the last.
        self.orders: queue.SimpleQueue[Order | Callable[[], Any] | None] = queue.SimpleQueue()
        # Orders that are not done yet, as the thread has them: a list, as slices of it are taken.
        self.taken: list[Order | Callable[[], Any] | None] = []
        self.hand: Any = NOTHING  # one that is in neither
        self.connection: sqlite3.Connection | None = None
        self.pruned = 0.0  # when old rows were removed last, in seconds since 1970
        self.rows: list[tuple[str, float | None]] = []  # records and `held_until`, from `load` to `open`
        self.table: Table | None = None  # of the registry
        self.thread = threading.Thread(target=self._run, name="sqlite", daemon=True)

    # -- the thread that attaches ----------------------------------------------------------------

    def load(self) -> None:
        """Open the file, read all claims, and start the thread.  Raises StoreError."""
        try:
            make_private(self.path)  # leases are in it, and keys of NodePass
            self.connection = sqlite3.connect(self.path, timeout=BUSY_TIME, isolation_level=None,
                                              check_same_thread=False)
            run = self.connection.execute
            run("PRAGMA locking_mode=EXCLUSIVE")
            run("PRAGMA journal_mode=WAL")
            run("PRAGMA synchronous=FULL")
            run("BEGIN IMMEDIATE")  # takes the lock, and keeps it
            (version,) = run("PRAGMA user_version").fetchone()
            if version > FORMAT:
                raise StoreError(f"{self.path} is of a newer sniroute (format {version}, and this one knows {FORMAT})")
            for statement in filter(str.strip, TABLES.split(";")):
                run(statement)
            run(f"PRAGMA user_version={FORMAT}")
            run("COMMIT")
            self._prune(self.clock())
            self.rows = run("SELECT record, held_until FROM claims").fetchall()
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror or error}") from None
        except sqlite3.Error as error:
            self._close()
            busy = "locked" in str(error)
            raise StoreError(f"{self.path}: {'another process has it open' if busy else said(error)}") from None
        except StoreError:
            self._close()
            raise
        self.thread.start()

    def close(self) -> None:
        """Write what waits, and let go of the file."""
        if self.thread.is_alive():
            self.orders.put(None)
            self.thread.join()
        self._close()

    def _close(self) -> None:
        if self.connection is not None:
            connection, self.connection = self.connection, None
            connection.close()

    def open(self, registry: Registry) -> None:
        """See Store: all is known since `load`.  Each claim that lived has the time of a ttl to be renewed."""
        table, now, wall = registry.table, registry.table.clock(), self.clock()
        self.table = table
        rows, self.rows = self.rows, []
        live = []
        for record, held_until in rows:
            with contextlib.suppress(ValueError):  # another program has written it: it stays in the file
                claim = from_text(record, now)
                if held_until is None:
                    live.append(claim)
                else:
                    table.put(claim._replace(expires=now + min(held_until - wall - claim.hold, 0.0)))
        table.freeze()
        for claim in live:
            table.put(claim)
        registry.freeze(False)

    # -- the loop --------------------------------------------------------------------------------

    def write(self, what: str, former: Claim | None, claim: Claim | None, done: Callable[[Written], None]) -> None:
        """See Store.  It is told once the change is on the disk."""
        # An end is never refused: it must not be lost, and there are no more ends than claims.
        if self.waiting >= WAITING_MAX and claim is not None:
            done(Written(UNAVAILABLE, sentence=f"{self.waiting} changes wait for the disk"))
            return
        now = claim or former
        assert now is not None
        self.waiting += 1
        self.orders.put((Change(now.key, to_text(now), None if claim is not None else self.clock() + now.hold, what,
                                now.owner, f"{without_key(now.target)} {now.id}"), done))

    def renew(self, claim: Claim, done: Callable[[Written], None]) -> None:
        """See Store.  Only another ttl than before is written: the owner counts on it after a restart."""
        former = self.table.live.get(claim.key) if self.table is not None else None
        if former is not None and former.ttl != claim.ttl:
            self.write(RENEWED, former, claim, done)
        else:
            done(Written(OK))

    def stop(self) -> None:
        """See Store: `close` writes what waits."""

    def history(self, done: Callable[[list[Row] | StoreError], None], key: str = "", before: int = 0,
                limit: int = 100) -> None:
        """Have `done` get what has happened, the newest first, or why that is not to be had.

        Args:
            key: what has happened to this one; "": to all.
            before: only rows with a smaller number; 0: all.
            limit: rows at most; ROWS_MAX is the most.
        """
        where = [("key = ?", key)] * bool(key) + [("number < ?", before)] * bool(before)
        text = f"SELECT * FROM history {'WHERE ' * bool(where)}{' AND '.join(each for each, _ in where)} " \
               "ORDER BY number DESC LIMIT ?"
        values = [value for _, value in where] + [min(limit, ROWS_MAX)]

        def look() -> None:
            result: list[Row] | StoreError
            try:
                result = [Row(*row) for row in self.connection.execute(text, values)]
            except (sqlite3.Error, MemoryError) as error:
                result = StoreError(f"{self.path}: {said(error)}")
            self.loop.call(lambda: done(result))

        self.orders.put(look)

    def _written(self, group: Sequence[Order], said: Sequence[str]) -> None:
        """The thread has committed these, or not: `said` has why not, or ""."""
        self.fault = fault = said[0]
        self.waiting -= len(group)
        written = Written(UNAVAILABLE, sentence=f"the claim cannot be kept: {fault}") if fault else Written(OK)
        for _, done in group:
            try:
                done(written)
            except Exception:  # its own: the others wait to be told, too
                self.loop.met(owner_of, done)

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        """Do orders, as many in one commit as wait, until the last one.  None is lost where memory is short."""
        outlast(self._serve)

    def _serve(self) -> None:
        """Do orders until the last one.  Raises MemoryError: called again, it goes on where it was."""
        while True:
            if not self.taken:
                self._take()
            while len(self.taken) < BATCH and not self.orders.empty():
                self._take()
            if self.taken[0] is None:
                return
            group = list(itertools.takewhile(lambda order: isinstance(order, tuple), self.taken))
            if group:
                self._finish(group)
            else:
                self.taken[0]()
                del self.taken[0]

    def _take(self) -> None:
        """Take an order; it is in `hand` until it is in `taken`, which may need memory."""
        if self.hand is NOTHING:
            self.hand = self.orders.get()
        self.taken.append(self.hand)
        self.hand = NOTHING

    def _finish(self, group: list[Order]) -> None:
        """Commit all of these at once, and have the loop tell.  What needs memory comes before the commit."""
        left = self.taken[len(group):]
        said = [""]  # what `_written` is told: a list, since the report is made before the commit
        tell = functools.partial(self.loop.call, functools.partial(self._written, group, said))
        said[0] = self._commit([change for change, _ in group])
        self.taken = left
        outlast(tell)  # the commit stands, so it has to be told

    def _commit(self, changes: Sequence[Change]) -> str:
        """All of these, or none.  Returns why not; "" where they are on the disk."""
        now = self.clock()
        connection = self.connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", [change[:3] for change in changes])
            connection.executemany("INSERT INTO history (at, event, key, owner, detail) VALUES (?, ?, ?, ?, ?)",
                                   [(now, each.event, each.key, each.owner, each.detail) for each in changes])
            if not 0 <= now - self.pruned < PRUNE_EVERY:
                self._prune(now)
            connection.execute("COMMIT")
        except (sqlite3.Error, MemoryError) as error:
            # The disk may take no journal either; the next BEGIN tells.
            with contextlib.suppress(sqlite3.Error, MemoryError):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            return said(error)
        return ""

    def _prune(self, now: float) -> None:
        """Remove changes that are too old, and names that are held no more."""
        self.pruned = now
        self.connection.execute("DELETE FROM history WHERE at < ?", (now - HISTORY_DAYS * 86400,))
        self.connection.execute("DELETE FROM claims WHERE held_until < ?", (now,))
