"""Tests of sniroute_sqlite.py: a real file, its thread, and a loop."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_sqlite
from conftest import HERE, FakeClock, wait_until
from sniroute_claims import OK, Claim, Table
from sniroute_loop import Loop
from sniroute_registry import CLAIMED, EXPIRED, RELEASED, UNAVAILABLE, Memory, Registry, Written
from sniroute_sqlite import FORMAT, HISTORY_DAYS, Sqlite, StoreError

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who may give files away")


class Caller:
    """A loop in a thread, and what the file tells it."""

    def __init__(self) -> None:
        self.faults = 0
        self.loop = Loop(self.fault)
        self.stores: list[Sqlite] = []
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def fault(self, owner: Any) -> None:
        self.faults += 1

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
def open_file(caller, tmp_path) -> Callable[..., Sqlite]:
    def make(path: str = "", **options: Any) -> Sqlite:
        store = Sqlite(path or str(tmp_path / "names.db"), caller.loop, **options)
        store.load()
        caller.stores.append(store)
        return store
    return make


def claim(key: str, **fields: Any) -> Claim:
    return Claim(key, f"id-{key}", "alice", "tcp:192.0.2.1:80", "lease", 1, 60.0, 600.0, 0.0)._replace(**fields)


def write(caller: Caller, store: Sqlite, *claims: Claim, what: str = CLAIMED) -> Written:
    """The last of what it says."""
    return [caller.ask(lambda done, each=each: store.write(what, None, each, done)) for each in claims][-1]


def end(caller: Caller, store: Sqlite, *claims: Claim, what: str = RELEASED) -> None:
    for each in claims:
        assert caller.ask(lambda done, each=each: store.write(what, each, None, done)).word == OK


def history(caller: Caller, store: Sqlite, **options: Any) -> Any:
    return caller.ask(lambda done: store.history(done, **options))


def table(store: Sqlite, clock: Callable[[], float] = FakeClock()) -> Table:
    """What a registry knows that begins with this file."""
    loop = Loop(lambda owner: None)
    registry = Registry(loop, Table(clock), Memory(), lambda key: None)
    store.open(registry)
    loop.close()
    return registry.table


def test_who_waits_for_the_disk_is_told_though_memory_is_short(caller, open_file, monkeypatch):
    """And what is written is written once."""
    store = open_file()
    call, left = caller.loop.call, [1, 1, 1]
    def no_call(act: Any) -> None:
        if left and threading.current_thread() is store.thread:
            left.pop()
            raise MemoryError
        call(act)
    caller.loop.call = no_call
    assert write(caller, store, claim("a")) == Written(OK) and not left
    left.append(1)
    assert [row.key for row in history(caller, store)] == ["a"] and not left
    assert write(caller, store, claim("b")) == Written(OK) and store.thread.is_alive()


class Narrow(list):
    """A list for which there is no memory now and then."""

    left = 3

    def append(self, item: Any) -> None:
        if self.left:
            self.left -= 1
            raise MemoryError
        super().append(item)


def test_no_order_is_lost_where_memory_is_short_and_the_last_one_ends_the_thread(caller, open_file):
    store = open_file()
    assert write(caller, store, claim("a")) == Written(OK)
    wait_until(lambda: not store.taken)
    store.taken = Narrow()
    assert write(caller, store, claim("b")) == Written(OK)
    assert [row.key for row in history(caller, store)] == ["b", "a"]
    wait_until(lambda: not store.taken)
    store.taken = Narrow()
    store.close()
    assert not store.thread.is_alive()


def test_what_is_written_is_there_after_a_restart_with_its_leases(caller, open_file):
    store = open_file()
    assert len(table(store)) == 0
    first, second, third = (claim(name, allow=("192.0.2.0/24",), meta={"x": [1]}, http="forward") for name in "abc")
    assert write(caller, store, first, second, third) == Written(OK)
    write(caller, store, second._replace(target="tcp:192.0.2.9:1", generation=2), what="changed")
    end(caller, store, third)
    store.close()
    clock = FakeClock()
    found = table(open_file(), clock)
    assert list(found.live) == ["a", "b"]
    assert found.find("a") == first._replace(expires=clock() + 60)
    assert (found.find("b").target, found.find("b").generation) == ("tcp:192.0.2.9:1", 2)
    assert found.judge("c", "bob").word == "held" and found.judge("c", "alice").word == "new"


def test_each_claim_has_a_ttl_to_be_renewed_at_least_half_a_minute(caller, open_file):
    store = open_file()
    write(caller, store, claim("short", ttl=5.0), claim("long", ttl=300.0))
    store.close()
    clock = FakeClock()
    found = table(open_file(), clock)
    clock.jump(29.9)
    assert found.expire() == [] and found.find("short")
    clock.jump(0.2)
    assert [each.key for each in found.expire()] == ["short"]


@pytest.mark.parametrize("passed, word", [(599, "held"), (601, "new")])
def test_a_name_is_held_over_a_restart_for_what_is_left(caller, open_file, passed, word):
    wall = FakeClock(1e9)
    store = open_file(clock=wall)
    write(caller, store, claim("a"))
    end(caller, store, claim("a"), what=EXPIRED)
    store.close()
    wall.jump(passed)
    clock = FakeClock()
    found = table(open_file(clock=wall), clock)
    assert found.judge("a", "bob").word == word
    clock.jump(2)
    assert found.judge("a", "bob").word == "new"


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_wall_clock_that_jumps_ends_no_claim(caller, open_file, jump):
    wall = FakeClock(1e9)
    store = open_file(clock=wall)
    write(caller, store, claim("a"))
    wall.jump(jump)
    write(caller, store, claim("b"))
    store.close()
    assert set(table(open_file(clock=wall)).live) == {"a", "b"}


def test_what_was_acknowledged_survives_kill_9(tmp_path):
    """Of a process that is killed in the middle of its writing."""
    path = str(tmp_path / "names.db")
    child = subprocess.Popen([sys.executable, "-c", f"""
import sys, threading
sys.path.insert(0, {str(HERE)!r})
from sniroute_claims import Claim
from sniroute_loop import Loop
from sniroute_sqlite import Sqlite
loop = Loop(lambda owner: None)
store = Sqlite({path!r}, loop)
store.load()
def again(number):
    def done(said):
        sys.stdout.write(f"n{{number}}\\n")
        sys.stdout.flush()
        again(number + 1)
    store.write("claimed", None, Claim(f"n{{number}}", "id", "alice", "tcp:x:1", "lease", 1, 60.0, 60.0, 0.0), done)
loop.call(lambda: again(0))
loop.run()
"""], stdout=subprocess.PIPE, text=True)
    with child:
        said = [child.stdout.readline().strip() for _ in range(50)]
        child.kill()
        said += child.stdout.read().split()
    connection = sqlite3.connect(path)
    rows = {key for (key,) in connection.execute("SELECT key FROM claims")}
    connection.close()
    assert set(said) <= rows and len(rows) - len(said) <= 1


def test_changes_that_come_together_are_one_commit(caller, open_file, monkeypatch):
    store = open_file()
    commits = []
    commit = store._commit
    monkeypatch.setattr(store, "_commit", lambda changes: (commits.append(len(changes)), commit(changes))[1])
    go, told = threading.Event(), threading.Semaphore(0)
    store.orders.put(go.wait)
    caller.ask(lambda done: done([store.write(CLAIMED, None, claim(f"n{number}"), lambda said: told.release())
                                  for number in range(500)]))
    go.set()
    for _ in range(500):
        assert told.acquire(timeout=10)
    assert len(commits) < 10 and sum(commits) == 500


def test_a_disk_that_is_too_slow_is_told_before_memory_is_gone(caller, open_file, monkeypatch):
    monkeypatch.setattr(sniroute_sqlite, "WAITING_MAX", 3)
    store = open_file()
    go = threading.Event()
    store.orders.put(go.wait)
    caller.ask(lambda done: done([store.write(CLAIMED, None, claim(key), lambda said: None) for key in "abc"]))
    said = write(caller, store, claim("d"))
    assert said.word == UNAVAILABLE and "3 changes wait for the disk" in said.sentence
    go.set()
    assert {row.key for row in history(caller, store)} == {"a", "b", "c"}
    assert write(caller, store, claim("d")).word == OK


def test_a_disk_that_is_full_fails_the_write_and_not_the_next_one(caller, open_file):
    """SQLite's own limit of pages is as a disk that is full."""
    store = open_file()
    pages, = store.connection.execute("PRAGMA page_count").fetchone()
    store.orders.put(lambda: store.connection.execute(f"PRAGMA max_page_count={pages + 2}"))
    said = write(caller, store, claim("big", meta={"x": "x" * 100_000}))
    assert said.word == UNAVAILABLE and "full" in said.sentence and store.fault in said.sentence
    store.orders.put(lambda: store.connection.execute(f"PRAGMA max_page_count={pages + 200}"))
    assert write(caller, store, claim("small")).word == OK and store.fault == ""
    assert {row.key for row in history(caller, store)} == {"small"}, "all or nothing"


def test_two_registries_on_one_file_are_refused(open_file, caller, monkeypatch):
    monkeypatch.setattr(sniroute_sqlite, "BUSY_TIME", 0.1)
    store = open_file()
    with pytest.raises(StoreError, match="another process has it open"):
        Sqlite(store.path, caller.loop).load()
    assert write(caller, store, claim("a")).word == OK
    store.close()
    assert list(table(open_file()).live) == ["a"]


def newer(path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version={FORMAT + 1}")
    connection.close()


@pytest.mark.parametrize("make, sentence", [
    (lambda path: path.write_text("x" * 5000), "not a database"), (lambda path: path.mkdir(), "Is a directory"),
    (newer, "of a newer sniroute")])
def test_a_file_that_cannot_be_used_is_told(caller, tmp_path, make, sentence):
    path = tmp_path / "names.db"
    make(path)
    with pytest.raises(StoreError, match=sentence) as caught:
        Sqlite(str(path), caller.loop).load()
    assert str(path) in str(caught.value)


def test_the_file_is_for_its_user_alone(caller, open_file, tmp_path):
    """Also one that an earlier version has made, and what SQLite keeps beside it: leases and keys are in them."""
    path = tmp_path / "names.db"
    path.touch()
    path.chmod(0o644)
    write(caller, open_file(), claim("a.example.com"))
    found = {each.name: stat.S_IMODE(each.stat().st_mode) for each in tmp_path.glob("names.db*")}
    assert found == {"names.db": 0o600, "names.db-wal": 0o600}


@pytest.mark.parametrize("spoil, sentence", [
    (lambda path: path.chmod(0o666), "can be changed by other users: chmod o-w"),
    (lambda path: path.parent.chmod(0o777), "can be changed by other users: chmod o-w"),
    (lambda path: (path.unlink(), os.mkfifo(path, 0o600)), "is no file"),
    (lambda path: (path.unlink(), path.symlink_to("/nonexistent/x")), "No such file"),
    pytest.param(lambda path: os.chown(path, 4321, -1), "belongs to another user", marks=root),
    pytest.param(lambda path: (path.unlink(), path.symlink_to("x"), os.chown(path, 4321, -1, follow_symlinks=False)),
                 "belongs to another user", marks=root),
    pytest.param(lambda path: (path.with_name("names.db-wal").touch(0o600), os.chown(f"{path}-wal", 4321, -1)),
                 "names.db-wal belongs to another user", marks=root)])
def test_a_file_that_another_user_may_have_written_is_refused(caller, tmp_path, spoil, sentence):
    """It would claim names, and hold others.  A FIFO would keep the start waiting."""
    path = tmp_path / "folder" / "names.db"
    path.parent.mkdir()
    path.touch(0o600)
    spoil(path)
    with pytest.raises(StoreError, match=sentence) as caught:
        Sqlite(str(path), caller.loop).load()
    assert str(path) in str(caught.value)


def test_a_row_of_another_hand_is_left_alone(caller, open_file):
    store = open_file()
    write(caller, store, claim("a"))
    store.close()
    connection = sqlite3.connect(store.path)
    connection.executemany("INSERT INTO claims VALUES (?, ?, NULL)", [("x", "{}"), ("y", "["), ("z", '{"allow": 1}')])
    connection.commit()
    connection.close()
    assert list(table(open_file()).live) == ["a"]


def test_the_history_comes_in_pages_of_one_key_or_all(caller, open_file):
    store = open_file()
    write(caller, store, *(claim(f"n{number % 2}", owner="bob") for number in range(6)))
    rows = history(caller, store, limit=4)
    assert [row.key for row in rows] == ["n1", "n0", "n1", "n0"] and rows[0].owner == "bob"
    assert [row.number for row in history(caller, store, before=rows[-1].number)] == [2, 1]
    assert [row.key for row in history(caller, store, key="n0")] == ["n0"] * 3


def test_what_is_too_old_is_forgotten(caller, open_file):
    wall = FakeClock(1e9)
    store = open_file(clock=wall)
    write(caller, store, claim("old"), claim("gone"))
    end(caller, store, claim("gone"))
    wall.jump(HISTORY_DAYS * 86400 - 10)
    write(caller, store, claim("young"))
    wall.jump(4000)
    write(caller, store, claim("new"))
    assert [row.key for row in history(caller, store)] == ["new", "young"]
    rows = caller.ask(lambda done: store.orders.put(
        lambda: done(store.connection.execute("SELECT key FROM claims ORDER BY key").fetchall())))
    assert rows == [("new",), ("old",), ("young",)], "the claims are kept, but for those that have ended"


# -- at its ends -------------------------------------------------------------------------------


def test_a_fault_of_one_who_is_told_keeps_nothing_from_the_others(caller, open_file):
    store = open_file()
    go, told = threading.Event(), threading.Event()
    store.orders.put(go.wait)

    def fault(said: Written) -> None:
        raise RuntimeError("of the test")
    caller.ask(lambda done: done([store.write(CLAIMED, None, claim("a"), fault),
                                  store.write(CLAIMED, None, claim("b"), lambda said: told.set())]))
    go.set()
    assert told.wait(10)
    assert caller.faults == 1 and write(caller, store, claim("c")).word == OK


def test_ends_are_written_however_many_wait(caller, open_file, monkeypatch):
    """Or they would come back at the next start: a crowd that expires at once is larger than what may wait."""
    monkeypatch.setattr(sniroute_sqlite, "WAITING_MAX", 3)
    store = open_file()
    write(caller, store, *map(claim, "abcdef"))
    go = threading.Event()
    store.orders.put(go.wait)
    caller.ask(lambda done: done([store.write(EXPIRED, claim(key), None, lambda said: None) for key in "abcdef"]))
    assert write(caller, store, claim("g")).word == UNAVAILABLE
    go.set()
    assert len(history(caller, store)) == 12
    store.close()
    assert list(table(open_file()).live) == []


def test_what_waits_when_it_is_closed_is_written(caller, open_file):
    """Also where the loop that is told has ended before."""
    store = open_file()
    go = threading.Event()
    store.orders.put(go.wait)
    caller.ask(lambda done: done([store.write(CLAIMED, None, claim(f"n{number}"), lambda said: None)
                                  for number in range(50)]))
    loop, store.loop = store.loop, Loop(lambda owner: None)
    store.loop.close()
    go.set()
    store.close()
    store.close()
    store.loop = loop
    assert len(table(open_file()).live) == 50


@pytest.mark.parametrize("ttl", [3600.0, 5.0])
def test_a_renewal_for_another_ttl_survives(caller, open_file, ttl):
    """Its owner renews at a third of that: after a restart it must live as long."""
    store, clock = open_file(), FakeClock()
    registry = caller.ask(lambda done: done(Registry(caller.loop, Table(clock), store, lambda key: None)))
    caller.ask(lambda done: done(store.open(registry)))
    made = caller.ask(lambda done: registry.claim("a", "alice", "tcp:192.0.2.1:80", 60.0, 600.0, done)).claim
    for each in (ttl, None):
        assert caller.ask(lambda done: registry.renew("a", "alice", made.lease, each, done)).word == OK
    assert [row.event for row in history(caller, store)] == ["renewed", "claimed"], "the same once more is not written"
    store.close()
    assert table(open_file()).live["a"].ttl == ttl
