"""sniroute_sqlite: claims and their history in a file that outlives the router.

    the registry's loop                                the thread `sqlite`
    Sqlite.write(changes, done) ---- a queue --------> one transaction for all that wait: claims, history
      done(None | StoreError) <----- Loop.call -------
    Sqlite.history(..., done) ------------------------> rows of the last 30 days

What is kept of a claim is a text, by its key; what that means, only its owner knows.  A renewal is not written: after
a restart each claim has a whole ttl anyway, so nothing is lost by that, and a renewal costs no disk.

`write` tells `done` once the change is on the disk (WAL, synchronous=FULL: a commit survives a power cut).  All that
waits goes into one commit: so it takes thousands of claims a second, though a disk has some hundred commits.

One process has the file (locking_mode=EXCLUSIVE): two registries on one file would each believe to know all claims.
A file system without locks, as some NFS, is refused by SQLite itself, or not at all: keep it on a local disk.

Threads: `open` and `close` are for the thread that attaches; all else is the loop's, but for what is below "the thread".
The connection belongs to the thread; no lock.

Seams: I want to ...
    keep more of a change     Change, and a column of `history`; FORMAT counts up
    keep it for longer        HISTORY_DAYS

This room imports sniroute_loop.

Sources: sqlite.org: "Write-Ahead Logging", "PRAGMA locking_mode", "PRAGMA synchronous".
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from typing import Any, Callable, Iterable, NamedTuple, Sequence

from sniroute_loop import Loop

__version__ = "0.1.0"

# Limits, each with its reason.
FORMAT = 1  # of the file: `user_version`
BUSY_TIME = 5.0  # seconds that a predecessor has to let go of the file
WAITING_MAX = 10000  # changes that wait for the disk: some seconds of a slow one; one more is refused
BATCH = 2000  # orders of one commit: some tens of milliseconds for those that wait
HISTORY_DAYS = 30
PRUNE_EVERY = 3600.0  # seconds between two looks at what is too old
ROWS_MAX = 1000  # of one answer about the history

TABLES = """
CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS history (number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, event TEXT NOT NULL,
                                    key TEXT NOT NULL, owner TEXT NOT NULL, detail TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS history_at ON history (at);
"""


class StoreError(Exception):
    """The file cannot be used, in words for people."""


class Change(NamedTuple):
    """What has become of a key."""

    key: str
    record: str | None  # None: it is gone
    event: str  # claimed, changed, released, expired ...: for the history
    owner: str
    detail: str = ""


class Row(NamedTuple):
    """What has happened."""

    number: int
    at: float  # seconds since 1970
    event: str
    key: str
    owner: str
    detail: str


Written = tuple[Sequence[Change], Callable[[StoreError | None], None]]  # what is to be written, and who is told


def said(error: sqlite3.Error) -> str:
    """What SQLite says, for people."""
    return str(error) or type(error).__name__


class Sqlite:
    """The file.  See above for who calls what."""

    def __init__(self, path: str, loop: Loop, clock: Callable[[], float] = time.time):
        self.path = path
        self.loop = loop
        self.clock = clock
        self.fault = ""  # why the last commit failed; "" where it did not
        self.waiting = 0  # changes that are not on the disk yet
        self.orders: queue.SimpleQueue[Written | Callable[[], Any] | None] = queue.SimpleQueue()  # None: the last
        self.connection: sqlite3.Connection | None = None
        self.pruned = 0.0
        self.thread = threading.Thread(target=self._run, name="sqlite", daemon=True)

    # -- the thread that attaches ----------------------------------------------------------------

    def open(self) -> list[tuple[str, str]]:
        """All claims: key and record.  Raises StoreError."""
        try:
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
            rows = run("SELECT key, record FROM claims").fetchall()
        except sqlite3.Error as error:
            self._close()
            busy = "locked" in str(error)
            raise StoreError(f"{self.path}: {'another process has it open' if busy else said(error)}") from None
        except StoreError:
            self._close()
            raise
        self.thread.start()
        return rows

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

    # -- the loop --------------------------------------------------------------------------------

    def write(self, changes: Sequence[Change], done: Callable[[StoreError | None], None]) -> None:
        """Keep these, all or none: `done(None)` once they are on the disk, else `done(StoreError)`; perhaps at once."""
        if self.waiting + len(changes) > WAITING_MAX:
            done(StoreError(f"{self.path}: {self.waiting} changes wait for the disk"))
            return
        self.waiting += len(changes)
        self.orders.put((changes, done))

    def history(self, done: Callable[[list[Row] | StoreError], None], key: str = "", before: int = 0,
                limit: int = 100) -> None:
        """What has happened, the newest first: to one key, or to all; before that number, where it is not 0."""
        where = [("key = ?", key)] * bool(key) + [("number < ?", before)] * bool(before)
        text = f"SELECT * FROM history {'WHERE ' * bool(where)}{' AND '.join(each for each, _ in where)} " \
               "ORDER BY number DESC LIMIT ?"
        values = [value for _, value in where] + [min(limit, ROWS_MAX)]

        def look() -> None:
            result: list[Row] | StoreError
            try:
                result = [Row(*row) for row in self.connection.execute(text, values)]
            except sqlite3.Error as error:
                result = StoreError(f"{self.path}: {said(error)}")
            self.loop.call(lambda: done(result))

        self.orders.put(look)

    def _written(self, group: Iterable[Written], error: StoreError | None) -> None:
        self.fault = str(error or "")
        for changes, done in group:
            self.waiting -= len(changes)
            done(error)

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            orders = [self.orders.get()]
            while len(orders) < BATCH and not self.orders.empty():
                orders.append(self.orders.get())
            group: list[Written] = []
            for order in orders:
                if isinstance(order, tuple):
                    group.append(order)
                    continue
                self._finish(group)
                group = []
                if order is None:
                    return
                order()
            self._finish(group)

    def _finish(self, group: list[Written]) -> None:
        """Commit all of these at once."""
        if group:
            error = self._commit([change for changes, _ in group for change in changes])
            self.loop.call(lambda: self._written(group, error))

    def _commit(self, changes: Sequence[Change]) -> StoreError | None:
        """All of these, or none."""
        now = self.clock()
        connection = self.connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for change in changes:
                if change.record is None:
                    connection.execute("DELETE FROM claims WHERE key = ?", (change.key,))
                else:
                    connection.execute("INSERT OR REPLACE INTO claims VALUES (?, ?)", (change.key, change.record))
            connection.executemany("INSERT INTO history (at, event, key, owner, detail) VALUES (?, ?, ?, ?, ?)",
                                   [(now, each.event, each.key, each.owner, each.detail) for each in changes])
            if now >= self.pruned + PRUNE_EVERY or now < self.pruned:
                self.pruned = now
                connection.execute("DELETE FROM history WHERE at < ?", (now - HISTORY_DAYS * 86400,))
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                try:
                    connection.execute("ROLLBACK")
                except sqlite3.Error:
                    pass  # the disk takes no journal either; the next BEGIN tells
            return StoreError(f"{self.path}: {said(error)}")
        return None
