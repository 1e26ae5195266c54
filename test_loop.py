"""Tests of sniroute_loop.py: first its parts alone, then the turn of a router that runs."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute_connection
import sniroute_flow
import sniroute_loop
import sniroute_router
from sniroute_loop import NEVER, READ, WRITE, Loop, WakePipe, Watch
from conftest import HOST, FakeClock, wait_until
from testbed.hellos import HELLO, genuine
from testbed.running import TUNNEL, answer, read_all, read_exactly, route


class Bench:
    """A loop that a test turns by hand, under a clock that it moves, and the faults that it met."""

    def __init__(self, clock: FakeClock):
        self.clock = clock
        self.faults: list[Any] = []
        self.loop = Loop(self.faults.append)
        self.turn()  # the first one looks at all timers and queues

    def turn(self, seconds: float = 0.0) -> None:
        """So many seconds later, turn once, whether something is due or not."""
        self.clock.jump(seconds)
        self.loop.call(lambda: None)
        self.loop.turn()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    clock = FakeClock()
    monkeypatch.setattr(sniroute_loop, "monotonic", clock)
    made = Bench(clock)
    yield made
    made.loop.close()


@pytest.fixture
def live() -> Iterator[Loop]:
    """A loop that runs in a thread of its own; a fault there fails the test."""
    faults: list[Any] = []
    loop = Loop(faults.append)
    thread = threading.Thread(target=loop.run, name="loop")
    thread.start()
    yield loop
    loop.call(loop.stop)
    thread.join()
    loop.close()
    assert not faults


# -- timers ------------------------------------------------------------------------------------


def test_a_timer_acts_once_at_its_time_and_not_before(bench):
    acted = []
    timer = bench.loop.timer(lambda: acted.append(bench.clock()))
    bench.turn(10_000)
    assert not acted and timer.when == NEVER, "a new one is not set"
    began = bench.clock()
    timer.set(began + 5)
    bench.turn(4.9)
    assert not acted
    bench.turn(0.1)
    bench.turn(100)
    assert acted == [began + 5] and timer.when == NEVER


@pytest.mark.parametrize("again", [3, 7], ids=["sooner", "later"])
def test_a_timer_that_is_set_again_forgets_its_time_before(bench, again):
    acted = []
    timer = bench.loop.timer(lambda: acted.append(bench.clock()))
    began = bench.clock()
    timer.set(began + 5)
    bench.turn(1)
    timer.set(began + again)
    for _ in range(10):
        bench.turn(1)
    assert acted == [began + again]


def test_a_timer_that_sets_itself_acts_again_and_again(bench):
    acted = []
    def act() -> None:
        acted.append(bench.clock())
        timer.set(bench.clock() + 2)
    timer = bench.loop.timer(act)
    began = bench.clock()
    timer.set(began)
    for _ in range(8):
        bench.turn(1)
    assert acted == [began + seconds for seconds in (1, 3, 5, 7)]
    timer.set(NEVER)
    bench.turn(100)
    assert len(acted) == 4


def test_the_loop_wakes_by_itself_for_what_is_due(live):
    """A timer, and a queue whose item puts itself again."""
    timed, queued = threading.Event(), []
    done = threading.Event()
    def again(item: str) -> None:
        queued.append(item)
        queue.put(item) if len(queued) < 3 else done.set()
    def begin() -> None:
        live.timer(timed.set).set(time.monotonic() + 0.02)
        queue.put("item")
    queue = live.queue(0.01, again)
    live.call(begin)
    assert timed.wait(10) and done.wait(10)
    assert queued == ["item"] * 3 and not queue.due


# -- queues ------------------------------------------------------------------------------------


def test_items_of_a_queue_are_due_in_the_order_in_which_they_came(bench):
    acted = []
    queue = bench.loop.queue(5, acted.append)
    for item in ("a", "b", "c"):
        queue.put(item)
        bench.turn(1)
    queue.drop("b")
    queue.drop("b")  # what does not wait is dropped without a word
    bench.turn(2)
    assert acted == ["a"]
    bench.turn(2)
    assert acted == ["a", "c"] and not queue.due


def test_an_item_that_is_put_again_waits_anew_behind_the_others(bench):
    acted = []
    queue = bench.loop.queue(5, acted.append)
    queue.put("a")
    queue.put("b")
    bench.turn(4)
    queue.put("a")
    bench.turn(1)
    assert acted == ["b"] and list(queue.due) == ["a"]
    bench.turn(4)
    assert acted == ["b", "a"]


def test_an_item_that_puts_itself_again_while_it_is_due_acts_once_in_a_turn(bench):
    """As a deadline that finds that it is not time to act yet."""
    acted = []
    queue = bench.loop.queue(5, lambda item: (acted.append(item), queue.put(item)))
    queue.put("a")
    queue.put("b")
    bench.turn(5)
    assert acted == ["a", "b"] and list(queue.due) == ["a", "b"]
    bench.turn(4.9)
    assert len(acted) == 2
    bench.turn(0.1)
    assert acted == ["a", "b"] * 2


def test_an_item_that_another_one_drops_while_both_are_due_does_not_act(bench):
    acted = []
    queue = bench.loop.queue(5, lambda item: (acted.append(item), queue.drop("b")))
    queue.put("a")
    queue.put("b")
    bench.turn(5)
    assert acted == ["a"] and not queue.due


def test_other_seconds_hold_for_what_is_put_from_then_on(bench):
    acted = []
    queue = bench.loop.queue(5, acted.append)
    queue.put("a")
    queue.seconds = 60
    queue.put("b")
    bench.turn(5)
    assert acted == ["a"]
    bench.turn(55)
    assert acted == ["a", "b"]


def test_a_deadline_that_another_one_sets_is_not_forgotten():
    """What is due in a later queue may put an item into an earlier one."""
    loop = sniroute_loop.Loop(lambda owner: None)
    try:
        earlier = loop.queue(60, lambda item: None)
        later = loop.queue(0, earlier.put)
        loop.next_check = time.monotonic() + 3600
        later.put("item")
        loop.turn()
        assert list(earlier.due) == ["item"] and not later.due
        assert loop.next_check <= earlier.due["item"]
    finally:
        loop.close()


# -- faults ------------------------------------------------------------------------------------


class Owner:
    """Something of ours that meets a fault."""

    def fail(self, *_: Any) -> None:
        raise ZeroDivisionError("planted")


def fail(*_: Any) -> None:
    """A fault that is nobody's."""
    raise ZeroDivisionError("planted")


def test_where_it_stood_still_what_has_come_is_heard_before_anything_is_due(bench, monkeypatch):
    """More has come than one turn reads."""
    monkeypatch.setattr(sniroute_loop, "EVENTS", 4)
    late: list[int] = []
    woken: list[float] = []
    queue = bench.loop.queue(5.0, late.append)
    bench.loop.woken.append(lambda: woken.append(bench.clock()))
    with contextlib.ExitStack() as stack:
        pairs = [tuple(map(stack.enter_context, socket.socketpair())) for _ in range(20)]
        for number, (ours, theirs) in enumerate(pairs):
            def heard(mask: int, number: int = number, ours: socket.socket = ours) -> None:
                queue.drop(number)
                ours.recv(1)
            queue.put(number)
            if number:
                bench.loop.poller.watch(ours.fileno(), READ, heard)
                theirs.sendall(b"x")
        began = bench.clock()
        bench.loop.call(lambda: bench.clock.jump(60))
        for _ in range(8):
            bench.turn()
        assert (late, list(queue.due), woken) == ([], [0], [began + 60])
        bench.turn(sniroute_loop.WAKING)
    assert late == [0], "who has said nothing has its deadline a moment later"


def test_a_loop_that_is_always_late_has_deadlines_all_the_same(bench):
    """Each turn takes longer than a standstill, as where the host swaps: what is due is done, a second later at most."""
    acted: list[float] = []
    timer = bench.loop.timer(lambda: acted.append(bench.clock()))
    timer.set(bench.clock() + 1)
    for _ in range(3):
        bench.loop.call(lambda: bench.clock.jump(4))
        bench.turn()
    assert acted == [bench.clock() - 4], "not in the first late turn, and in the next one"


@pytest.mark.parametrize("place", ["descriptor", "call", "timer"])
@pytest.mark.parametrize("how", ["method", "partial", "partial of a partial", "function", "lambda"])
def test_a_fault_names_its_owner(bench, place, how):
    """The object whose method it was; None for what belongs to nobody."""
    owner = Owner()
    act = {"method": owner.fail, "partial": functools.partial(owner.fail, 1), "function": fail,
           "partial of a partial": functools.partial(functools.partial(owner.fail, 1), 2),
           "lambda": lambda *_: fail()}[how]
    loop, after = bench.loop, []
    if place == "descriptor":
        pipe = WakePipe()
        pipe.wake()
        loop.poller.watch(pipe.reader, READ, act)
    elif place == "call":
        loop.call(act)
    else:
        loop.timer(act).set(bench.clock())
    loop.call(lambda: after.append("calls"))
    loop.timer(lambda: after.append("timers")).set(bench.clock())
    bench.turn()
    assert bench.faults == [owner if how in ("method", "partial", "partial of a partial") else None]
    assert after == ["calls", "timers"], "the others have their turn"
    if place == "descriptor":
        loop.poller.forget(pipe.reader)
        pipe.close()


def test_a_fault_of_a_queue_or_a_batch_is_its_items(bench):
    loop, other = bench.loop, []
    queue = loop.queue(5, lambda item: fail() if item == "bad" else other.append(item))
    batch = loop.batch(lambda item: fail() if item == "worse" else other.append(item))
    for item in ("bad", "good"):
        queue.put(item)
    batch += ["worse", "better"]
    bench.turn(5)
    assert bench.faults == ["bad", "worse"] and other == ["good", "better"]
    assert not queue.due and not batch


def test_a_lack_of_memory_ends_nothing(bench, monkeypatch):
    """In a callback its owner is told, with the reserve at hand; where the loop has none for itself, it rests."""
    loop, owner, rested = bench.loop, Owner(), []
    monkeypatch.setattr(sniroute_loop.time, "sleep", rested.append)
    def starve(*_: Any) -> None:
        raise MemoryError
    reserves = []
    loop.fault = lambda owner: (reserves.append(loop.reserve.kept), bench.faults.append(owner), starve())
    owner.fail = starve
    loop.call(functools.partial(starve, owner))
    bench.turn()
    assert bench.faults == [owner] and reserves == [None], "what `fault` meets itself is no reason to end"
    bench.turn()
    assert loop.reserve.kept is not None, "it is taken back"
    assert rested == [sniroute_loop.CAPACITY_PAUSE], "no spinning"
    rested.clear()
    real, failing = loop.poller.poll, [1, 1]
    def poll(timeout: float) -> list[tuple[int, int]]:
        if failing:
            failing.pop()
            starve()
        return real(timeout)
    monkeypatch.setattr(loop.poller, "poll", poll)
    done: list[int] = []
    for number in range(5):
        loop.call(functools.partial(done.append, number))
        loop.turn()
    assert done == list(range(5)) and rested == [sniroute_loop.CAPACITY_PAUSE] * 2


@pytest.mark.parametrize("error", [MemoryError, ZeroDivisionError])
def test_what_fails_and_stays_ready_is_tried_ten_times_a_second(bench, monkeypatch, error):
    """Its owner may have no way to end: 75 % of a core, while a check waited for its backend's end without memory."""
    rested: list[float] = []
    monkeypatch.setattr(sniroute_loop.time, "sleep", rested.append)
    tried: list[int] = []

    class Owner:
        def on_ready(self, mask: int) -> None:
            tried.append(mask)
            watch.wait_for(READ, self.on_ready)  # the same, and another object
            raise error

    owner = Owner()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        watch = Watch(bench.loop.poller, ours.fileno())
        watch.wait_for(READ, owner.on_ready)
        for _ in range(20):
            bench.loop.turn()
        assert len(tried) >= 10 and set(rested) == {sniroute_loop.CAPACITY_PAUSE}
        assert len(rested) >= len(tried) - 1, "the first of our own faults may be one of many clients'"
        bench.loop.fault = lambda owner: watch.wait_for(0)
        rested.clear()
        for _ in range(20):
            bench.turn()
        assert len(rested) <= 1, "its owner has ended it"


def test_what_has_failed_in_another_thread_is_told_as_a_fault_of_our_own(bench):
    told: list[Any] = []
    bench.loop.fault = lambda owner: told.append((owner, sys.exc_info()[1]))
    owner, error = Owner(), ZeroDivisionError("planted")
    bench.loop.failed(error, owner)
    assert told == [(owner, error)]


def test_a_fault_of_ours_that_each_client_meets_holds_up_nobody_else(bench, monkeypatch):
    """A listener stays ready behind it, as is right; what a stranger can lead to must not make all others wait."""
    rested: list[float] = []
    monkeypatch.setattr(sniroute_loop.time, "sleep", rested.append)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watch = Watch(bench.loop.poller, ours.fileno())
        watch.wait_for(READ, lambda mask: ours.recv(1) and fail())
        for _ in range(20):
            theirs.send(b"x")
            bench.turn(0.02)
        assert len(bench.faults) == 20 and not rested
        watch.wait_for(0)


def test_a_timer_that_found_no_memory_acts_as_soon_as_there_is_some(bench, monkeypatch):
    """Most set themselves again last: a registry's claims would never end, and systemd would miss our beat."""
    rested: list[float] = []
    monkeypatch.setattr(sniroute_loop.time, "sleep", rested.append)
    left, acted = [1, 1], []
    def act() -> None:
        if left:
            left.pop()
            raise MemoryError
        acted.append(bench.clock())
    timer = bench.loop.timer(act)
    timer.set(bench.clock() + 5)
    bench.turn(5)
    assert not acted and len(left) == 1 and not rested
    bench.turn()
    bench.turn()
    bench.turn()
    assert len(acted) == 1 and timer.when == NEVER and rested == [sniroute_loop.CAPACITY_PAUSE] * 2


@pytest.mark.parametrize("poller", [sniroute_loop.Poller, sniroute_loop.EpollPoller])
def test_a_descriptor_that_cannot_be_watched_for_lack_of_memory_wakes_nobody(poller):
    """An event that finds no callback would end the loop."""
    class Full(dict):
        def __setitem__(self, key: int, value: Any) -> None:
            raise MemoryError

    ours, theirs = socket.socketpair()
    with ours, theirs:
        made = poller()
        theirs.send(b"x")
        made.callbacks = Full()
        with pytest.raises(MemoryError):
            made.watch(ours.fileno(), READ, lambda mask: None)
        assert not made.poll(0.0)
        made.close()


def test_calls_of_other_threads_are_not_lost_in_a_turn_that_ends_early(bench):
    """Each is done, though the loop has no memory even for the fault."""
    def worse(owner: Any) -> None:
        raise KeyError
    done: list[int] = []
    bench.loop.fault = worse
    bench.loop.call(fail)
    bench.loop.call(lambda: done.append(1))
    with pytest.raises(KeyError):
        bench.loop.turn()
    bench.loop.turn()
    assert done == [1]


# -- batches -----------------------------------------------------------------------------------


def test_batches_are_done_in_order_and_may_fill_those_behind_them(bench):
    """In one turn; what comes into an earlier one is for the next turn."""
    done: list[str] = []
    first = bench.loop.batch(lambda item: (done.append(item), second.append("second")))
    second = bench.loop.batch(lambda item: (done.append(item), first.append("late")))
    first.append("first")
    bench.turn()
    assert done == ["first", "second"] and (first, second) == (["late"], [])


# -- other threads -----------------------------------------------------------------------------


def test_a_call_of_another_thread_wakes_the_loop(live):
    """Which has nothing else to do for an hour."""
    for _ in range(3):
        heard = []
        done = threading.Event()
        live.call(lambda: (heard.append(threading.current_thread().name), done.set()))
        assert done.wait(10) and heard == ["loop"]


def test_what_a_call_asks_for_is_for_the_next_turn(bench):
    """Else one that asks for itself would keep the turn from ending."""
    done = []
    def again() -> None:
        done.append(1)
        bench.loop.call(again)
    bench.loop.call(again)
    for count in (1, 2, 3):
        bench.turn()
        assert len(done) == count


def test_calls_of_many_threads_are_all_made(live):
    made: list[int] = []
    done = threading.Event()
    def ask(number: int) -> None:
        for each in range(200):
            live.call(functools.partial(made.append, number * 200 + each))
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    live.call(done.set)
    assert done.wait(10) and sorted(made) == list(range(800))


def test_a_loop_may_be_closed_while_another_thread_still_wakes_it():
    loop = Loop(lambda owner: None)
    enough, errors, calls = threading.Event(), [], []
    def hammer() -> None:
        try:
            while not enough.is_set():
                loop.call(lambda: None)
                calls.append(1)
        except BaseException as error:
            errors.append(error)
    thread = threading.Thread(target=hammer)
    thread.start()
    wait_until(lambda: calls)
    loop.close()
    count = len(calls)
    wait_until(lambda: len(calls) > count + 10)
    enough.set()
    thread.join()
    assert not errors


def test_a_pipe_that_is_closed_wakes_nobody_who_has_its_number_next():
    pipe, other = WakePipe(), os.pipe()
    number = pipe.writer
    pipe.close()
    os.dup2(other[1], number)
    try:
        os.set_blocking(other[0], False)
        pipe.wake()
        pipe.close()  # as often as you like
        with pytest.raises(BlockingIOError):
            os.read(other[0], 1)
    finally:
        for end in (*other, number):
            os.close(end)


def test_a_pipe_that_is_full_still_wakes():
    pipe = WakePipe()
    try:
        for _ in range(1 << 17):  # more than a pipe holds
            pipe.wake()
        while True:
            before = os.read(pipe.reader, 1)
            assert before == b"\0"
            pipe.clear()
    except BlockingIOError:
        pipe.clear()  # nothing is there to clear
    finally:
        pipe.close()


# -- what is watched ----------------------------------------------------------------------------


class Recorder:
    """A poller that notes what it is told."""

    def __init__(self) -> None:
        self.callbacks: dict[int, Callable[[int], None]] = {}
        self.told: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *words: self.told.append((name, *words))


def test_a_watch_tells_the_poller_only_what_changes():
    poller = Recorder()
    watch = Watch(poller, 7)
    watch.wait_for(0)
    watch.closing()
    assert poller.told == []
    watch.wait_for(READ, print)
    watch.wait_for(READ, repr)
    assert poller.told == [("watch", 7, READ, print)] and poller.callbacks == {7: repr}
    watch.wait_for(READ | WRITE, print)
    watch.wait_for(0)
    watch.wait_for(0)
    watch.wait_for(WRITE, print)
    watch.closing()
    watch.closing()
    assert poller.told[1:] == [("change", 7, READ | WRITE, print), ("forget", 7), ("watch", 7, WRITE, print),
                               ("closing", 7)]


# -- a turn ------------------------------------------------------------------------------------


def test_connections_of_a_turn_take_each_step_together(run, serve):
    """Three that come in one turn: all are read, then all dial, then all speak."""
    running = run(route(serve(answer(b"x")).address))
    router, taken = running.router, []
    def noted(step: Callable[..., None]) -> Callable[..., None]:
        def take(connection: sniroute_connection.Connection, *args: Any) -> None:
            taken.append(step.__name__)
            step(connection, *args)
        return take
    router.loop.batches[:] = [(waiting, noted(step)) for waiting, step in router.loop.batches]
    held, go = threading.Event(), threading.Event()
    router.call(lambda: (held.set(), go.wait(20)))
    assert held.wait(20)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect(HELLO)) for _ in range(3)]
        go.set()
        assert [client.recv(1) for client in clients] == [b"x"] * 3
    assert taken[:9] == ["on_prelude"] * 3 + ["dial"] * 3 + ["speak"] * 3


@pytest.mark.parametrize("step", ["_admit", "connect"])
def test_connection_that_ends_between_two_steps_of_a_turn_takes_no_further_one(run, echo_server, monkeypatch, step):
    running = run(route(echo_server.address))
    real = getattr(sniroute_connection.Connection, step)
    monkeypatch.setattr(sniroute_connection.Connection, step, lambda self, *why: (real(self, *why), self.close("shed")))
    with running.connect(HELLO) as client:
        assert read_all(client) == b""
    assert running.ending().reason == "shed" and running.ending().up == 0
    wait_until(lambda: not running.router.to_dial and not running.router.to_speak)


def test_callback_bears_being_called_for_nothing(run, serve, caplog):
    """epoll reports a socket that is closed here and held by a child between fork and exec."""
    running = run(route(serve(answer(b"x")).address))
    def call_all(connection: sniroute_connection.Connection, flows: tuple[sniroute_flow.Flow, ...]) -> None:
        for mask in (sniroute_loop.READ, sniroute_loop.WRITE, sniroute_loop.READ | sniroute_loop.WRITE | 16):  # EPOLLHUP
            for name in ("on_prelude", "on_waiting", "speak", "on_ssl_answer", "on_linger"):
                getattr(connection, name)(mask)
            for flow in flows:
                running.router.loop.poller.callbacks[flow.fd](mask), flow.on_writable(mask)
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        connection, = running.router.connections
        flows = connection.up, connection.down
        running.router.call(lambda: call_all(connection, flows))
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
    assert running.ending().reason == "client_closed"
    done = threading.Event()
    callbacks = running.router.loop.poller.callbacks
    assert [callbacks[flow.fd] for flow in flows] == [sniroute_loop.ignore] * 2
    running.router.call(lambda: (call_all(connection, flows), done.set()))
    assert done.wait(20) and "please report it" not in caplog.text and len(running.endings) == 1


@pytest.mark.parametrize("where", ["_accept", "on_prelude", "pump"])
def test_a_lack_of_memory_refuses_or_cuts_one_client_and_pauses(run, serve, monkeypatch, caplog, where):
    """One line says it, and no traceback; then new clients are served again."""
    far = serve(answer(b"x"))
    running = run(route(far.address))
    room, name = {"_accept": (sniroute_router.Router, "_accept"), "on_prelude": (sniroute_connection.Connection, where),
                  "pump": (sniroute_flow.Flow, where)}[where]
    real, left = getattr(room, name), [1, 1, 1]
    def starve(self: Any, *words: Any) -> Any:
        if left:
            left.pop()
            raise MemoryError
        return real(self, *words)
    with running.connect(HELLO) as other:
        assert other.recv(1) == b"x"
        monkeypatch.setattr(room, name, starve)
        if where == "on_prelude":  # a batch has the function itself
            running.router.call(lambda: running.router.loop.batches.__setitem__(
                slice(None), [(batch, starve if step is real else step) for batch, step in running.router.loop.batches]))
        elif where == "_accept":
            running.router.call(lambda: (running.router.loop.poller.forget(running.router.listeners[0].fileno()),
                                         running.router._resume()))
        served = 0
        while served < 2:
            with contextlib.suppress(ConnectionError), running.connect(HELLO) as client:
                data = client.recv(1)
                assert data in (b"x", b"\x15", b"")
                served += data == b"x"
        assert not left
    assert "report it" not in caplog.text
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == [
        "not accepting for now: memory is short"]
    assert running.router.counters["busy"] == (0 if where == "_accept" else 3)
    assert running.router.loop.reserve.kept is not None


def test_fault_in_the_loop_ends_only_the_connection_that_met_it(run, serve, monkeypatch, caplog):
    far = serve(answer(b"x"))
    running = run(route(far.address))
    with running.connect(HELLO) as other:
        assert other.recv(1) == b"x"
        def fault(*_: Any) -> None:
            raise ZeroDivisionError("planted")
        with monkeypatch.context() as patch:
            patch.setattr(sniroute_connection.Connection, "_route", fault)
            with running.connect() as victim:
                wait_until(lambda: len(running.router.connections) == 2)
                victim.sendall(HELLO)
                assert victim.recv(1) == b""
        assert running.ending().reason == "internal"
        other.sendall(b"y")
        assert other.recv(1) == b"y"
    assert "planted" in caplog.text


def test_connection_that_meets_a_fault_while_it_closes_is_over_all_the_same(run, monkeypatch, caplog):
    """Its client sees the end, and nobody counts it any more: a drain would wait for it."""
    running = run(route((HOST, 9)))
    def fault(*_: Any) -> None:
        raise ZeroDivisionError("planted")
    with running.connect(b"\x16") as client:
        wait_until(lambda: running.router.deadlines.prelude.due)
        connection, = running.router.connections
        monkeypatch.setattr(sniroute_connection.Connection, "leave_queue", fault)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
    wait_until(lambda: "planted" in caplog.text and not running.router.connections)
    assert connection.peer.count == 0 and running.ending().reason == "truncated"


def test_fault_in_a_step_or_after_a_wait_ends_that_connection_only(run, serve, cloudflared, ports, monkeypatch, caplog):
    far = serve(answer(b"x"))
    cloudflared.far("*", far.address)
    running = run(TUNNEL, route(far.address, "ok.example.com"), ports)
    def fault(*_: Any) -> None:
        raise ZeroDivisionError("planted")
    real = sniroute_connection.Connection.resume
    with monkeypatch.context() as patch:
        patch.setattr(sniroute_connection.Connection, "resume", lambda self: fault() if self.name == "db.example.com" else real(self))
        with running.connect(HELLO) as client:
            assert read_all(client) == b""
    for step in ("_parse", "connect", "_open"):  # each is called by another of the loop's steps
        with monkeypatch.context() as patch:
            patch.setattr(sniroute_connection.Connection, step, fault)
            with running.connect(genuine(name="ok.example.com")) as client:
                assert read_all(client) == b""
    running.router.call(fault)
    with running.connect(genuine(name="ok.example.com")) as client:
        assert client.recv(1) == b"x"
    wait_until(lambda: not running.router.connections)
    assert caplog.text.count("ZeroDivisionError: planted") == 5


def test_what_is_retired_within_its_own_turn_costs_nobody_else_a_turn(bench):
    """A queue that left the list while the loop went through it would hide the next one, until it looks again."""
    loop = bench.loop
    told: list[str] = []
    first = loop.queue(0.0, lambda item: loop.retire(first))
    second = loop.queue(0.0, told.append)
    timer = loop.timer(lambda: loop.retire(timer))
    for queue in (first, second):
        queue.put("x")
    timer.set(0.0)
    for _ in range(2):
        loop.hurry()
        loop.turn()
    assert told == ["x"] and loop.queues == [second] and timer not in loop.timers
