"""Tests of sniroute_scarcity.py: threads that do not begin, and memory that is not there."""

from __future__ import annotations

import functools
import gc
import mmap
import queue
import threading
import time
import weakref
from typing import Any, Callable

import pytest

import sniroute_scarcity
from sniroute_loop import owner_of
from sniroute_scarcity import RESERVE, Paced, Reserve, begin_errand, begin_thread, outlast, ran_out
from conftest import FakeClock, linux, wait_until


def test_a_thread_does_what_it_is_for():
    done = threading.Event()
    names: list[str] = []
    thread = begin_thread(lambda: (names.append(threading.current_thread().name), done.set()), "worker")
    assert done.wait(10) and names == ["worker"] and thread.daemon
    thread.join()


def test_a_thread_that_ends_before_its_first_step_is_not_waited_for(monkeypatch):
    """As one does that finds no memory for its stack of frames: Thread.start would wait for ever."""
    monkeypatch.setattr(sniroute_scarcity, "BEGINS", 0.05)
    monkeypatch.setattr(sniroute_scarcity, "RESTS", 0.0)
    monkeypatch.setattr(threading.Thread, "_bootstrap", lambda self: None)
    with pytest.raises(RuntimeError, match="can't start new thread: it did not begin within 0.05 s"):
        begin_thread(lambda: None, "lost")
    for thread in [each for each in threading._limbo if each.name == "lost"]:
        del threading._limbo[thread]  # Thread.start has left it there


def test_after_a_thread_that_did_not_begin_none_is_tried_for_a_moment(monkeypatch):
    """Each try holds the loop up."""
    monkeypatch.setattr(sniroute_scarcity, "rests_until", time.monotonic() + 60)
    with pytest.raises(RuntimeError, match="can't start new thread: memory is short"):
        begin_thread(lambda: None, "none")


def test_a_lack_of_memory_before_the_thread_is_a_thread_too_few(monkeypatch):
    def none(*words: object, **more: object) -> None:
        raise MemoryError
    monkeypatch.setattr(threading, "Thread", none)
    with pytest.raises(RuntimeError, match="can't start new thread: memory is short"):
        begin_thread(lambda: None, "none")


def test_a_thread_that_begins_too_late_does_nothing(monkeypatch):
    """Its owner was told that there is none, and has gone on without."""
    monkeypatch.setattr(sniroute_scarcity, "BEGINS", 0.05)
    monkeypatch.setattr(sniroute_scarcity, "RESTS", 0.0)
    real, go, over, done = threading.Thread._bootstrap, threading.Event(), threading.Event(), []

    def late(self: threading.Thread) -> None:
        go.wait(10)
        real(self)
        over.set()

    monkeypatch.setattr(threading.Thread, "_bootstrap", late)
    with pytest.raises(RuntimeError):
        begin_thread(lambda: done.append(1), "late")
    go.set()
    assert over.wait(10) and not done
    wait_until(lambda: not any(each.name == "late" for each in threading.enumerate()))


@linux
def test_no_thread_is_tried_where_there_is_no_memory_for_one(monkeypatch):
    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")
    monkeypatch.setattr(mmap, "mmap", full)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="can't start new thread: memory is short"):
        begin_thread(lambda: None, "none")
    assert time.monotonic() - began < sniroute_scarcity.BEGINS, "nobody waited"


def test_what_came_of_a_lack_of_memory_is_none_of_our_faults():
    def caught(*errors: Exception) -> Exception:
        error = None
        for each in errors:
            each.__context__ = error
            error = each
        return error

    assert ran_out(MemoryError()) and ran_out(caught(MemoryError(), AttributeError()))
    assert not ran_out(AttributeError()) and not ran_out(None) and not ran_out(caught(KeyError(), ValueError()))
    first = ValueError()
    first.__context__ = KeyError()
    first.__context__.__context__ = first
    assert not ran_out(first), "a circle has an end"


def test_what_goes_on_is_said_once_in_a_while(monkeypatch):
    paced, clock = Paced(), FakeClock()
    monkeypatch.setattr(sniroute_scarcity.time, "monotonic", clock)
    assert [paced.is_due(what) for what in ("a", "a", "b", "a", "b")] == [True, False, True, False, False]
    clock.jump(sniroute_scarcity.SAID_AGAIN)
    assert paced.is_due("a") and not paced.is_due("a")
    for number in range(100):
        assert paced.is_due(f"what a stranger says {number}")
    assert len(paced.said) <= sniroute_scarcity.SAID_MAX


def test_a_reserve_comes_back_when_there_is_memory(monkeypatch):
    reserve = Reserve()
    assert len(reserve.kept) == RESERVE
    reserve.spend()
    monkeypatch.setattr(sniroute_scarcity, "RESERVE", 1 << 62)
    assert not reserve.restore() and reserve.kept is None
    monkeypatch.undo()
    assert reserve.restore() and len(reserve.kept) == RESERVE


def starving(*then: Any) -> Callable[..., Any]:
    """A function that finds no memory twice, and then returns each of these, or raises it."""
    left = [MemoryError(), MemoryError(), *then]

    def act(*_: Any) -> Any:
        came = left.pop(0)
        if isinstance(came, BaseException):
            raise came
        return came

    return act


def test_what_has_to_be_done_is_tried_until_there_is_memory(monkeypatch):
    """Also where there is none for telling, or for the handler of a signal that comes in the pause."""
    rested: list[float] = []
    monkeypatch.setattr(sniroute_scarcity.time, "sleep", rested.append)
    assert outlast(starving("done")) == "done" and rested == [sniroute_scarcity.PAUSE] * 2
    assert outlast(starving("done"), tell=starving(), pause=3.0) == "done" and rested[2:] == [3.0] * 2
    monkeypatch.setattr(sniroute_scarcity.time, "sleep", starving(None, None))
    assert outlast(starving("done")) == "done"


def test_a_fault_ends_what_has_to_be_done_unless_it_is_met():
    with pytest.raises(ZeroDivisionError):
        outlast(starving(ZeroDivisionError()), pause=0.0)
    assert outlast(starving(ZeroDivisionError(), "done"), tell=lambda error: None, pause=0.0) == "done"
    with pytest.raises(KeyError):
        outlast(starving(), tell=starving(KeyError()), pause=0.0)


@pytest.mark.parametrize("came", ["a result", MemoryError(), ZeroDivisionError("planted")], ids=repr)
def test_who_waits_for_an_errand_hears_of_it_whatever_became_of_it(monkeypatch, came):
    """Also where the thread finds no memory for telling."""
    monkeypatch.setattr(sniroute_scarcity, "PAUSE", 0.0)
    calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    none, told = starving(None), []

    def work() -> Any:
        if isinstance(came, Exception):
            raise came
        return came

    def call(act: Callable[[], None]) -> None:
        none()
        calls.put(act)

    thread = begin_errand(work, told.append, call, "errand")
    act = calls.get(timeout=10)
    act()
    assert told == [came] and calls.empty()
    assert owner_of(act) is told, "a fault in `append` would be its"
    thread.join()


def test_a_report_has_an_owner_and_leaves_no_cycle():
    """What a failed work had in its hands is given back at once: that is when memory is short."""
    class Owner:
        def done(self, number: int, result: Any) -> None:
            self.result = result

    class Large:
        pass

    def work() -> None:
        large = Large()
        alive.append(weakref.ref(large))
        raise MemoryError

    owner, alive = Owner(), []
    calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    gc.collect()
    gc.disable()
    try:
        thread = begin_errand(work, functools.partial(owner.done, 1), calls.put, "errand")
        act = calls.get(timeout=10)
        thread.join()
        assert owner_of(act) is owner
        act()
        assert ran_out(owner.result) and alive[0]() is not None
        del owner.result
        assert alive[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_thread_that_has_begun_is_one_though_the_wait_for_that_has_failed(monkeypatch, error):
    """Else its owner would be told twice: that there is no thread, and what came of it."""
    real, done = threading.Event.wait, threading.Event()

    def fail(self: threading.Event, timeout: float | None = None) -> bool:
        assert real(self, timeout)
        real(done, 10)
        raise error

    monkeypatch.setattr(threading.Event, "wait", fail)
    thread = begin_thread(done.set, "begun")
    monkeypatch.undo()
    thread.join()
    assert done.is_set()
