"""Tests of sniroute_sqlite.py: a real file, its thread, and a loop."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_sqlite
from conftest import HERE, FakeClock
from sniroute_loop import Loop
from sniroute_sqlite import FORMAT, HISTORY_DAYS, Change, Sqlite, StoreError


class Caller:
    """A loop in a thread, and what the file tells it."""

    def __init__(self) -> None:
        self.loop = Loop(lambda owner: None)
        self.stores: list[Sqlite] = []
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def ask(self, begin: Callable[[Callable[[Any], None]], None]) -> Any:
        """Begin something in the loop, and wait for what it tells."""
        told, results = threading.Event(), []
        self.loop.call(lambda: begin(lambda result: (results.append(result), told.set())))
        assert told.wait(10)
        return results[0]

    def close(self) -> None:
        for store in self.stores:
            store.close()
        self.loop.call(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def caller() -> Iterator[Caller]:
    made = Caller()
    yield made
    made.close()


@pytest.fixture
def open_file(caller, tmp_path) -> Callable[..., tuple[Sqlite, dict[str, str]]]:
    def make(path: str = "", **options: Any) -> tuple[Sqlite, dict[str, str]]:
        store = Sqlite(path or str(tmp_path / "names.db"), caller.loop, **options)
        rows = dict(store.open())
        caller.stores.append(store)
        return store, rows
    return make


def change(key: str, record: str | None = "{}", event: str = "claimed", owner: str = "alice") -> Change:
    return Change(key, record, event, owner, "detail")


def write(caller: Caller, store: Sqlite, *changes: Change) -> StoreError | None:
    return caller.ask(lambda done: store.write(changes, done))


def history(caller: Caller, store: Sqlite, **options: Any) -> Any:
    return caller.ask(lambda done: store.history(done, **options))


def test_what_is_written_is_there_after_a_restart(caller, open_file):
    store, rows = open_file()
    assert rows == {}
    for number in range(3):
        assert write(caller, store, change(f"n{number}", f'{{"number": {number}}}')) is None
    assert write(caller, store, change("n1", None, "released"), change("n2", "new", "changed")) is None
    store.close()
    _, rows = open_file()
    assert rows == {"n0": '{"number": 0}', "n2": "new"}


def test_what_was_acknowledged_survives_kill_9(tmp_path):
    """Of a process that is killed in the middle of its writing."""
    path = str(tmp_path / "names.db")
    child = subprocess.Popen([sys.executable, "-c", f"""
import sys, threading
sys.path.insert(0, {str(HERE)!r})
from sniroute_loop import Loop
from sniroute_sqlite import Change, Sqlite
loop = Loop(lambda owner: None)
store = Sqlite({path!r}, loop)
store.open()
def again(number):
    def done(error):
        sys.stdout.write(f"n{{number}}\\n")
        sys.stdout.flush()
        again(number + 1)
    store.write([Change(f"n{{number}}", "x", "claimed", "alice")], done)
loop.call(lambda: again(0))
loop.run()
"""], stdout=subprocess.PIPE, text=True)
    with child:
        said = [child.stdout.readline().strip() for _ in range(50)]
        child.kill()
        said += child.stdout.read().split()
    rows = {key for (key,) in sqlite3.connect(path).execute("SELECT key FROM claims")}
    assert set(said) <= rows and len(rows) - len(said) <= 1


def test_changes_that_come_together_are_one_commit(caller, open_file, monkeypatch):
    store, _ = open_file()
    commits = []
    commit = store._commit
    monkeypatch.setattr(store, "_commit", lambda changes: (commits.append(len(changes)), commit(changes))[1])
    go, told = threading.Event(), threading.Semaphore(0)
    store.orders.put(go.wait)
    caller.ask(lambda done: done([store.write([change(f"n{number}")], lambda error: told.release())
                                  for number in range(500)]))
    go.set()
    for _ in range(500):
        assert told.acquire(timeout=10)
    assert len(commits) < 10 and sum(commits) == 500


def test_a_disk_that_is_too_slow_is_told_before_memory_is_gone(caller, open_file, monkeypatch):
    monkeypatch.setattr(sniroute_sqlite, "WAITING_MAX", 3)
    store, _ = open_file()
    go = threading.Event()
    store.orders.put(go.wait)
    caller.ask(lambda done: done(store.write([change("a"), change("b"), change("c")], lambda error: None)))
    assert "3 changes wait for the disk" in str(write(caller, store, change("d")))
    go.set()
    assert {row.key for row in history(caller, store)} == {"a", "b", "c"}
    assert write(caller, store, change("d")) is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_disk_that_is_full_fails_the_write_and_not_the_next_one(caller, open_file):
    """SQLite's own limit of pages is as a disk that is full."""
    store, _ = open_file()
    pages, = store.connection.execute("PRAGMA page_count").fetchone()
    store.orders.put(lambda: store.connection.execute(f"PRAGMA max_page_count={pages + 2}"))
    error = write(caller, store, change("big", "x" * 100_000))
    assert isinstance(error, StoreError) and "full" in str(error) and store.fault == str(error)
    store.orders.put(lambda: store.connection.execute(f"PRAGMA max_page_count={pages + 200}"))
    assert write(caller, store, change("small")) is None and store.fault == ""
    assert {row.key for row in history(caller, store)} == {"small"}, "all or nothing"


def test_two_registries_on_one_file_are_refused(open_file, tmp_path, caller, monkeypatch):
    monkeypatch.setattr(sniroute_sqlite, "BUSY_TIME", 0.1)
    store, _ = open_file()
    with pytest.raises(StoreError, match="another process has it open"):
        Sqlite(store.path, caller.loop).open()
    assert write(caller, store, change("a")) is None
    store.close()
    assert open_file()[1] == {"a": "{}"}


@pytest.mark.parametrize("make, sentence", [
    (lambda path: path.write_text("x" * 5000), "not a database"), (lambda path: path.mkdir(), "unable to open"),
    (lambda path: sqlite3.connect(path).execute(f"PRAGMA user_version={FORMAT + 1}").connection.close(), "newer")])
def test_a_file_that_cannot_be_used_is_told(caller, tmp_path, make, sentence):
    path = tmp_path / "names.db"
    make(path)
    with pytest.raises(StoreError, match=sentence) as caught:
        Sqlite(str(path), caller.loop).open()
    assert str(path) in str(caught.value)


def test_the_history_comes_in_pages_of_one_key_or_all(caller, open_file):
    store, _ = open_file()
    for number in range(6):
        write(caller, store, change(f"n{number % 2}", owner="bob"))
    rows = history(caller, store, limit=4)
    assert [row.key for row in rows] == ["n1", "n0", "n1", "n0"] and rows[0].owner == "bob"
    assert [row.number for row in history(caller, store, before=rows[-1].number)] == [2, 1]
    assert [row.key for row in history(caller, store, key="n0")] == ["n0"] * 3


def test_what_is_too_old_is_forgotten(caller, open_file):
    clock = FakeClock(1e9)
    store, _ = open_file(clock=clock)
    write(caller, store, change("old"))
    clock.jump(HISTORY_DAYS * 86400 - 10)
    write(caller, store, change("young"))
    clock.jump(4000)
    write(caller, store, change("new"))
    assert [row.key for row in history(caller, store)] == ["new", "young"]
    store.close()
    assert set(open_file()[1]) == {"old", "young", "new"}, "the claims are kept"
