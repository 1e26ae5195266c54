"""Tests of sniroute_tunnels.py, in its order; see testbed/tunnels.py for `bench`, `both` and `shared`."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import json
import logging
import os
import pathlib
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from typing import Any, Callable

import pytest

import sniroute_launchers
import sniroute_ports
import sniroute_processes
import sniroute_tunnels
from sniroute_launchers import TunnelError, TunnelKey
from sniroute_tunnels import BACKOFF, FAILED, QUEUED, READY, STARTING, STOPPING, StartBudget, Tunnel, TunnelTable
from conftest import HOST, FakeClock, linux, own_children, wait_until
from testbed.hellos import genuine
from testbed.program import namespace
from testbed.running import read_exactly
from testbed.tunnels import Bench, ask, both, event, events, key, listening, port_of, runs, shared

# -- start budget ------------------------------------------------------------------------------


def test_start_budget_bursts_then_refills_with_the_clock():
    clock = FakeClock()
    budget = StartBudget(clock)
    burst = sniroute_tunnels.STARTS_BURST
    assert [budget.spend("a") for _ in range(burst + 2)] == [True] * burst + [False] * 2
    assert budget.spend("b"), "another client has its own"
    assert all(budget.spend(None) for _ in range(100))
    clock.jump(1 / sniroute_tunnels.STARTS_REFILL)
    assert [budget.spend("a"), budget.spend("a")] == [True, False]
    clock.jump(1e6)
    assert [budget.spend("a") for _ in range(burst + 1)] == [True] * burst + [False], "never more than a burst"


def test_start_budget_forgets_the_least_recent_client(monkeypatch):
    monkeypatch.setattr(sniroute_tunnels, "BUDGETS_KEPT", 3)
    budget = StartBudget(FakeClock())
    for client in "abcad":
        budget.spend(client)
    assert list(budget.buckets) == ["c", "a", "d"]


def test_a_client_that_asks_for_too_many_cold_tunnels_is_refused(bench):
    table = bench().table
    for number in range(sniroute_tunnels.STARTS_BURST):
        with pytest.raises(TunnelError) as caught:
            table.wait(key(f"{number}.test"), "192.0.2.1", table.clock())
        assert caught.value.kind == "timeout"
    for _ in range(3):
        with pytest.raises(TunnelError, match="192.0.2.1 asked for too many cold tunnels") as caught:
            table.wait(key("more.test"), "192.0.2.1", table.clock())
        assert caught.value.kind == "budget"
    assert key("more.test") not in table.tunnels
    with pytest.raises(TunnelError, match="not ready in time .it is queued"):  # it joins: no cold start
        table.wait(key("0.test"), "192.0.2.1", table.clock())
    table.clock.jump(1)
    with pytest.raises(TunnelError, match="not ready in time"):
        table.wait(key("more.test"), "192.0.2.1", table.clock())


# -- starting ----------------------------------------------------------------------------------


@both
def test_fifty_clients_of_one_cold_name_start_one_process(bench, cloudflared):
    table = bench(live=True).table
    barrier = threading.Barrier(50)

    def come() -> None:
        barrier.wait()
        table.wait(key("app.test"), None, time.monotonic() + 30)

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        for future in [pool.submit(come) for _ in range(50)]:
            future.result()
    assert len(cloudflared.starts()) == 1
    assert table.tunnels[key("app.test")].waiters == 0
    wait_until(lambda: table.counters["ready"])  # it is counted once they have been told
    assert table.counters["starts"] == table.counters["ready"] == 1


@both
def test_twenty_names_start_two_at_a_time(bench, cloudflared, monkeypatch):
    cloudflared.fault("*", listen_delay=10)
    monkeypatch.setattr(sniroute_tunnels, "EVICT_AGE", 60.0)  # each start that ends makes room for the next by itself
    peak = 0
    enter = TunnelTable._enter

    def entered(self, tunnel, state):
        nonlocal peak
        enter(self, tunnel, state)
        peak = max(peak, sum(t.state is STARTING for t in self.tunnels.values()))

    monkeypatch.setattr(TunnelTable, "_enter", entered)
    made = bench(live=True, max_starting=2)
    for future in [made.ask(f"{number}.test") for number in range(20)]:
        assert future.result(30) is None
    assert peak == 2
    assert len(cloudflared.starts()) == len(set(made.states())) == 20


@both
def test_names_are_started_in_the_order_in_which_they_were_asked_for(bench, cloudflared):
    made = bench(max_starting=1)
    futures = []
    for name in ("c.test", "a.test", "b.test"):
        made.clock.jump(0.1)
        futures.append(made.ask(name))
        wait_until(lambda: name in made.states())
    assert [made.outcome(future) for future in futures] == [None] * 3
    assert [start["hostname"] for start in cloudflared.starts()] == ["c.test", "a.test", "b.test"]


@both
def test_a_byte_goes_through_and_back(bench, cloudflared, echo_server, proc):
    cloudflared.far("app.test", echo_server.address)
    tunnel = bench(live=True, proc=proc).ready("app.test")
    assert ask(tunnel.child.address, b"x" * 100_000) == b"x" * 100_000


@both
@pytest.mark.parametrize("delay", [50, 200])
def test_the_first_client_of_a_program_that_listens_late_is_served(delay, bench, cloudflared, echo_server, proc):
    cloudflared.far("app.test", echo_server.address)
    cloudflared.fault("app.test", listen_delay=delay)
    made = bench(live=True, proc=proc)
    tunnel = made.ready("app.test")
    assert ask(tunnel.child.address) == b"hello", "it is not refused, and it is the only one"
    assert len(cloudflared.clients()) == 1, "nothing has connected to find out"
    assert made.table.counters["starts"] == 1


def test_the_first_client_is_served_where_there_is_no_proc_at_all(launch, cloudflared, echo_server, ports):
    """A chroot, say: the real program, and the first client of each of three names."""
    program = launch(f"--cloudflared={cloudflared.path}", ports, "--route=*=cloudflared:{name}",
                     python=(*namespace("--mount", "mount -t tmpfs none /proc"), sys.executable))
    for delay, name in enumerate(("a.example.com", "b.example.com", "c.example.com")):
        cloudflared.far(name, echo_server.address)
        cloudflared.fault(name, listen_delay=100 * delay)
        said = genuine(name=name)
        with program.connect(said) as client:
            assert read_exactly(client, len(said)) == said
    assert len(cloudflared.starts()) == 3 and "tunnel_failed" not in program.log()


@linux
def test_a_program_whose_descriptors_are_not_ours_to_see_is_ready_once_somebody_listens(bench, monkeypatch):
    """It runs as another user, under a wrapper, say."""
    real = os.listdir

    def listdir(path: str) -> list[str]:
        if str(path).endswith("/fd"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr(sniroute_ports.os, "listdir", listdir)
    bench().ready("app.test")


NOT_IN_TIME = "it did not listen within 15 s"

START_FAILURES = [
    *[pytest.param(kind, *values, id=f"{kind}, {name}") for kind in ("own", "shared") for name, *values in (
        ("exit 0", {"exit": 0, "words": "no such flag"}, "it ended (exit 0): no such flag"),
        ("exit 3", {"exit": 3, "words": "bad luck"}, "it ended (exit 3): bad luck"),
        ("no words", {"exit": 1}, "it ended (exit 1)"))],
    pytest.param("own", {"never_listen": True}, f"{NOT_IN_TIME}: Start Websocket listener", id="own, never listens"),
    pytest.param("own", {"never_listen": True, "ignore_term": True}, f"{NOT_IN_TIME}: Start Websocket listener",
                 id="own, never listens and ignores TERM"),
    pytest.param("own", {"wrong_port": True}, f"{NOT_IN_TIME}: Start Websocket listener", id="own, wrong port"),
    pytest.param("shared", {"never_listen": True}, NOT_IN_TIME, id="shared, never listens"),
    pytest.param("shared", {"never_listen": True, "ignore_term": True}, NOT_IN_TIME,
                 id="shared, never listens and ignores TERM"),
]

@pytest.mark.parametrize("kind, switches, message", START_FAILURES, indirect=["kind"])
def test_a_start_that_fails_says_why(kind, switches, message, bench, cloudflared, proc):
    cloudflared.fault("app.test", **switches)
    made = bench(proc=proc)
    future = made.ask("app.test", timeout=1000)
    made.turn(cloudflared.starts)
    made.turn(lambda: future.done() or "exit" not in switches and (
        kind == "shared" or b"Start" in made.table.tunnels[key("app.test")].child.process.tail))
    made.clock.jump(15)  # start_timeout
    made.table.step()
    made.clock.jump(sniroute_processes.STOP_GRACE)
    error = made.outcome(future)
    assert error.kind == "failed"
    assert str(error) == f"cf:app.test did not start: {message}"
    assert made.table.tunnels == {}
    made.turn(lambda: not made.table.processes.running)
    assert made.table.children == {}
    assert made.table.counters["failures"] == 1
    if sys.platform == "linux":
        assert own_children() == set()


@pytest.mark.parametrize("words, kind_of", [("Waiting for login...", "denied"), ("no such host", "unknown")])
def test_a_start_that_fails_for_a_known_reason_has_its_kind_also_from_memory(words, kind_of, bench, cloudflared):
    cloudflared.fault("app.test", exit=1, words=words)
    made = bench()
    assert made.failed("app.test").kind == made.failed("app.test").kind == kind_of
    assert len(cloudflared.starts()) == 1


@linux
def test_a_port_that_a_stranger_listens_on_is_not_ready(bench, cloudflared):
    cloudflared.fault("app.test", wrong_owner=True)
    made = bench()
    error = made.failed("app.test")
    assert "address already in use by another process" in str(error)
    ports = [start["port"] for start in cloudflared.starts()]
    assert len(ports) == len(set(ports)) == sniroute_tunnels.PORT_TRIES + 1, "another port each time, bounded"


def test_without_proc_a_stranger_that_listens_cannot_be_told(bench, cloudflared):
    cloudflared.fault("app.test", wrong_owner=True)
    bench(proc=False).ready("app.test")


@linux
def test_a_listener_of_a_descendant_is_own(bench, cloudflared, echo_server, proc):
    cloudflared.fault("app.test", child_listens=True)
    cloudflared.far("app.test", echo_server.address)
    made = bench(proc=proc)
    tunnel = made.ready("app.test")
    assert ask(tunnel.child.address) == b"hello"
    pids = {tunnel.child.process.pid, cloudflared.clients()[0]["pid"]}
    assert len(pids) == 2
    os.kill(tunnel.child.process.pid, signal.SIGKILL)  # the wrapper alone
    made.turn(lambda: not made.table.children)
    wait_until(lambda: not any(map(runs, pids)), timeout=2)


@both
def test_address_in_use_is_tried_on_another_port(bench, cloudflared, proc):
    cloudflared.fault("app.test", in_use=2)
    made = bench(proc=proc)
    tunnel = made.ready("app.test")
    first = made.table.pool.free and min(start["port"] for start in cloudflared.starts())
    assert [start["port"] for start in cloudflared.starts()] == [first, first + 1, first + 2]
    assert tunnel.tries == 0 and made.table.failures == {}


@both
def test_address_in_use_is_not_tried_for_ever(bench, cloudflared):
    cloudflared.fault("app.test", in_use=1000)
    made = bench()
    error = made.failed("app.test")
    assert error.kind == "failed" and "address already in use" in str(error)
    assert len(cloudflared.starts()) == sniroute_tunnels.PORT_TRIES + 1
    assert key("app.test") in made.table.failures


@both
def test_a_port_stolen_between_the_look_and_the_start_is_tried_on_another(bench, cloudflared, monkeypatch):
    made = bench()
    pool = made.table.pool
    with contextlib.ExitStack() as stack:
        def robbed() -> int | None:
            monkeypatch.setattr(pool, "take", take)
            port = take()
            stack.enter_context(listening(port))
            return port

        take = pool.take
        monkeypatch.setattr(pool, "take", robbed)
        tunnel = made.ready("app.test")
    ports = [start["port"] for start in cloudflared.starts()]
    assert ports[-1] == tunnel.child.address[1]
    assert len(ports) <= 2


@both
def test_ports_that_others_hold_are_passed_over(bench, cloudflared):
    made = bench(count=4)
    first = made.table.pool.free[0]
    with listening(first), listening(first + 1), listening(first + 3):
        assert made.ready("a.test").child.address == (HOST, first + 2)
        future = made.ask("b.test", timeout=1000)
        made.turn(lambda: made.states().get("b.test") is QUEUED and not made.table.pool.free)
        assert made.states()["a.test"] is READY, "it is too fresh to be evicted"
        made.clock.jump(sniroute_tunnels.EVICT_AGE)
        made.turn(lambda: "a.test" not in made.states())
        made.clock.jump(sniroute_ports.QUARANTINE)
        assert made.outcome(future) is None
    assert made.states() == {"b.test": READY}


def test_no_port_at_all_is_a_timeout(bench, monkeypatch):
    monkeypatch.setattr(sniroute_tunnels, "EVICT_AGE", 0.4)  # so long the reaper sleeps
    made = bench(live=True, count=1)
    turns, step = [], made.table.step
    made.table.step = lambda timeout: turns.append(step(timeout))
    with listening(made.table.pool.free[0]):
        error = made.failed("a.test", timeout=0.3)
    assert error.kind == "timeout"
    assert len(turns) < 30, "the reaper does not spin meanwhile"
    wait_until(lambda: made.states() == {})  # nobody waits for it any more


def test_a_change_of_one_tunnel_wakes_nobody_who_waits_for_another(bench, cloudflared):
    """32 threads that wake for each change of 500 keep the interpreter from the loop."""
    cloudflared.fault("slow.test", never_listen=True)
    made = bench()
    made.ask("slow.test")
    made.turn(lambda: made.states().get("slow.test") is STARTING)
    looked, clock = [], made.clock
    made.table.clock = lambda: looked.append(threading.current_thread().name) or clock()
    for name in ("a.test", "b.test", "c.test"):
        made.ready(name)
    assert looked.count("ask-slow.test") <= 1  # of its own start


def test_a_waiter_that_gives_up_takes_a_queued_name_out(bench):
    made = bench()
    assert made.table.lease(key("a.test")) is None
    with pytest.raises(TunnelError) as caught:
        made.table.wait(key("a.test"), None, made.clock())
    assert caught.value.kind == "timeout"
    made.table.step()
    assert made.states() == {} and not made.table.children


# -- failures that are remembered --------------------------------------------------------------


@both
def test_a_failed_start_is_refused_from_memory_and_then_tried_once(bench, cloudflared):
    cloudflared.fault("app.test", exit=1, words="bad luck")
    made = bench()
    made.failed("app.test")
    for _ in range(1000):
        with pytest.raises(TunnelError, match="bad luck; next try in 5 s") as caught:
            made.table.wait(key("app.test"), "192.0.2.1", made.clock() + 60)
        assert caught.value.kind == "failed"
    assert len(cloudflared.starts()) == 1
    made.clock.jump(sniroute_tunnels.FAILURE_FIRST)
    futures = [made.ask("app.test") for _ in range(20)]
    assert all(made.outcome(future).kind == "failed" for future in futures)
    assert len(cloudflared.starts()) == 2


@pytest.mark.parametrize("jitter, share", [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_the_memory_of_failures_grows_to_its_bound(jitter, share, bench):
    made = bench(program="/bin/false", jitter=lambda: jitter)
    for wait in (5, 10, 20, 40, 80, 160, 300, 300):
        made.failed("app.test")
        failure = made.table.failures[key("app.test")]
        assert failure.until - made.clock() == pytest.approx(wait * share)
        made.clock.jump(wait * share)


@both
def test_a_start_that_works_forgets_the_failures_before(bench, cloudflared):
    made = bench()
    for wait in (5, 10):
        cloudflared.fault("app.test", exit=1)
        made.failed("app.test")
        made.clock.jump(wait)
    cloudflared.fault("app.test")
    tunnel = made.ready("app.test")
    assert made.table.failures == {} and tunnel.failures == 0


def test_remembered_failures_are_bounded(bench, monkeypatch):
    monkeypatch.setattr(sniroute_tunnels, "FAILURES_KEPT", 3)
    made = bench(program="/bin/false")
    for name in "abcd":
        made.failed(name)
    made.clock.jump(5)
    made.failed("b")
    made.failed("e")
    assert list(made.table.failures) == [key("d"), key("b"), key("e")]


@both
def test_a_program_that_is_not_there_is_no_failure_of_the_name(bench, tmp_path, cloudflared):
    program = tmp_path / "later"
    made = bench(program=str(program))
    error = made.failed("app.test")
    assert error.kind == "failed" and "is not there: install it" in str(error)
    assert made.table.failures == {}
    program.symlink_to(cloudflared.path)
    made.ready("app.test")


def test_a_program_that_others_may_change_is_refused_at_each_start(bench, cloudflared):
    """Its folder may have been opened since the last one."""
    made = bench()
    made.ready("a.test")
    cloudflared.directory.chmod(0o777)
    error = made.failed("b.test")
    assert error.kind == "failed" and str(error) == (
        f"cf:b.test did not start: {cloudflared.path} is not run, since {cloudflared.directory} can be changed by "
        f"other users: chmod o-w {cloudflared.directory}")
    assert made.table.failures == {} and len(cloudflared.starts()) == 1
    cloudflared.directory.chmod(0o755)
    made.ready("b.test")


@both
def test_a_program_that_the_kernel_cannot_run_is_no_failure_of_the_name(bench, tmp_path):
    program = tmp_path / "empty"
    program.touch(0o700)
    made = bench(program=str(program))
    made.table.processes.guard = []  # without one, Popen itself meets the error
    ports = sorted(made.table.pool.free)
    error = made.failed("app.test")
    assert error.kind == "failed" and "Exec format error" in str(error)
    assert made.table.failures == {} and made.table.children == {}
    assert sorted(made.table.pool.free + [port for _, port in made.table.pool.resting]) == ports


@both
@pytest.mark.parametrize("left", range(4))
def test_too_few_descriptors_are_no_failure_of_the_name_and_none_is_lost(bench, left):
    """Popen of Debian 12's Python opens /dev/null first, and leaves it open where there is no pipe to be had."""
    made = bench()
    future = made.ask("app.test")
    wait_until(lambda: made.table.tunnels)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno() + 1 + left, hard))
        try:
            made.table.step()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    error = made.outcome(future)
    assert error.kind == "failed" and "Too many open files" in str(error)
    assert made.table.failures == {}
    made.ready("app.test")


def test_the_reaper_outlives_an_operating_system_error(bench, monkeypatch, caplog):
    real, errors = sniroute_ports.listens, [OSError(24, "Too many open files")] * 2

    def listens(*args: int) -> str:
        if errors:
            raise errors.pop()
        return real(*args)

    monkeypatch.setattr(sniroute_tunnels, "listens", listens)
    bench(live=True).ready("app.test")
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "tunnels: [Errno 24] Too many open files"], "said once, however often it is met"


def test_the_reaper_outlives_a_lack_of_memory_and_loses_no_name(bench, monkeypatch, caplog):
    real, faults = sniroute_processes.Processes.launch, [MemoryError()] * 2

    def launch(*words: Any, **more: Any) -> Any:
        if faults:
            raise faults.pop()
        return real(*words, **more)

    monkeypatch.setattr(sniroute_processes.Processes, "launch", launch)
    bench(live=True).ready("app.test")
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "tunnels: memory is short"], "no traceback"


def test_a_start_that_an_operator_stops_while_memory_is_short_loses_no_name(bench, monkeypatch):
    """The row is STOPPING then, and has no process whose end would take it out."""
    made = bench()
    real, stopped = sniroute_processes.Processes.launch, []

    def launch(*words: Any, **more: Any) -> Any:
        if not stopped:
            stopped.append(made.table.stop(key("app.test")))
            raise MemoryError
        return real(*words, **more)

    monkeypatch.setattr(sniroute_processes.Processes, "launch", launch)
    future = made.ask("app.test")
    wait_until(lambda: made.table.tunnels and made.table.tunnels[key("app.test")].waiters)
    with pytest.raises(MemoryError):
        made.table.step()
    assert stopped == [True] and made.outcome(future) is None


@pytest.mark.parametrize("number, says", [(errno.EMFILE, "Too many open files"), (errno.ENOMEM, "Cannot allocate"),
                                          (errno.EAGAIN, "no process can be started (")])
def test_what_is_to_stand_is_tried_again_soon_while_this_host_is_short(bench, monkeypatch, caplog, number, says):
    """However long that lasts: the pause does not grow, as it does for a far end; and it is said once."""
    caplog.set_level(logging.INFO)
    table = (made := bench()).table
    def launch(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(sniroute_processes.Processes, "launch", launch)
    sniroute_tunnels.stand(table, "settings", [key("app.test")])
    for _ in range(20):
        table.step()
        table.step()
        assert table.failures[key("app.test")].until - made.clock() <= sniroute_tunnels.SHORT_RETRY
        made.clock.jump(sniroute_tunnels.SHORT_RETRY)
    said, = [fields["reason"] for what, fields in events(caplog) if what == "tunnel did not start"]
    assert says in said
    monkeypatch.undo()
    table.step()
    assert table.children, "it starts"


def test_the_reaper_outlives_a_fault_of_ours_and_loses_no_name(bench, monkeypatch, caplog):
    """If it ended, every child would end with it."""
    real, faults = sniroute_processes.Processes.launch, [ZeroDivisionError("planted")] * 2

    def launch(*words: Any, **more: Any) -> Any:
        if faults:
            raise faults.pop()
        return real(*words, **more)

    monkeypatch.setattr(sniroute_processes.Processes, "launch", launch)
    bench(live=True).ready("app.test")
    assert caplog.text.count("a fault in the reaper: please report it") == 2
    assert caplog.text.count("ZeroDivisionError: planted") == 2


# -- leases, idle stop, eviction ---------------------------------------------------------------


@both
def test_an_idle_tunnel_is_stopped_by_the_clock(bench):
    made = bench(idle=300)
    made.leased("used.test")
    made.ready("idle.test")
    made.clock.jump(299)
    made.table.step()
    assert made.states() == {"used.test": READY, "idle.test": READY}
    made.clock.jump(1)
    made.turn(lambda: len(made.table.children) == 1)
    assert made.states() == {"used.test": READY}
    assert made.table.counters["idle_stops"] == 1


def test_an_idle_tunnel_that_somebody_waits_for_is_not_stopped(bench):
    made = bench(idle=300)
    tunnel = made.ready("app.test")
    with made.table.lock:
        tunnel.waiters += 1  # a thread on its way out of wait(), say
    made.clock.jump(1000)
    made.table.step()
    assert tunnel.state is READY
    with made.table.lock:
        tunnel.waiters -= 1
    made.turn(lambda: not made.table.tunnels)


def test_a_release_starts_the_idle_time_anew(bench):
    made = bench(idle=300)
    tunnel = made.leased("app.test")
    made.clock.jump(1000)
    made.table.release(tunnel)
    made.table.step()
    assert tunnel.state is READY
    made.clock.jump(300)
    made.turn(lambda: not made.table.tunnels)


def turned(made: Bench) -> None:
    """Wait until the reaper, in its thread, has turned with what there is now."""
    for _ in range(2):  # it hears the second after a whole turn
        made.table.wake()
        wait_until(lambda: not select.select([made.table.pipe.reader], [], [], 0)[0])


@both
def test_the_reaper_wakes_for_an_idle_tunnel_by_itself(bench):
    made = bench(live=True)
    tunnel = made.leased("app.test")
    made.table.idle = 0.15  # only now: the lease might come later than that
    turned(made)
    started = time.monotonic()
    made.table.release(tunnel)
    wait_until(lambda: not made.table.tunnels, timeout=5)
    assert time.monotonic() - started >= 0.15


def test_a_very_long_idle_time_does_not_end_the_reaper(bench):
    """The system call behind the selector takes no more than 24 days."""
    made = bench(live=True, idle=1e9)
    made.ready("a.test")
    made.ready("b.test")
    assert made.table.reaper.is_alive()


@both
def test_all_tunnels_in_use_is_a_limit(bench, cloudflared):
    made = bench(max_tunnels=2)
    made.leased("a.test")
    tunnel = made.leased("b.test")
    with pytest.raises(TunnelError, match="all 2 tunnels are in use: raise --max-tunnels") as caught:
        made.table.wait(key("c.test"), None, made.clock() + 60)
    assert caught.value.kind == "limit"
    assert len(cloudflared.starts()) == 2
    made.table.release(tunnel)
    made.clock.jump(sniroute_tunnels.EVICT_AGE)
    made.ready("c.test")
    assert made.states() == {"a.test": READY, "c.test": READY}


@both
@pytest.mark.parametrize("options", [dict(max_tunnels=3), dict(count=3)], ids=["tunnels", "ports"])
def test_the_longest_idle_tunnel_makes_room(options, bench):
    made = bench(**options)
    for name in ("a.test", "b.test", "c.test"):
        made.leased(name)
    for name in ("b.test", "a.test", "c.test"):
        made.clock.jump(2)
        made.table.release(made.table.tunnels[key(f"{name}")])
    future = made.ask("d.test")
    made.turn(lambda: "b.test" not in made.states())
    made.clock.jump(sniroute_ports.QUARANTINE)
    assert made.outcome(future) is None
    assert made.states() == {"a.test": READY, "c.test": READY, "d.test": READY}
    assert made.table.counters["evictions"] == 1


def killed(made: Bench, *names: str) -> None:
    """Tunnels that were in use and whose processes have died: all of them back off."""
    tunnels = [made.leased(name) for name in names]
    for pid in {tunnel.child.process.pid for tunnel in tunnels}:
        os.kill(pid, signal.SIGKILL)
    made.turn(lambda: all(tunnel.state is BACKOFF for tunnel in tunnels))
    for tunnel in tunnels:
        made.table.release(tunnel)


@both
def test_ports_of_tunnels_that_have_died_are_for_who_waits(bench, monkeypatch):
    made = bench(count=2)
    killed(made, "a.test", "b.test")
    future = made.ask("c.test")
    made.turn(lambda: made.states().get("c.test") is QUEUED)
    made.clock.jump(sniroute_ports.QUARANTINE)  # by now the others would be started again
    with monkeypatch.context() as patch:
        patch.setattr(sniroute_tunnels, "listens", lambda *_: "nobody")  # it may listen before this turn ends
        made.table.step()
    assert made.states() == {"a.test": BACKOFF, "b.test": BACKOFF, "c.test": STARTING}
    assert made.outcome(future) is None


@both
def test_a_name_waits_for_the_place_of_a_tunnel_that_stops(bench, cloudflared):
    cloudflared.fault("a.test", ignore_term=True, ignore_close=True)
    made = bench(max_tunnels=1)
    made.ready("a.test")
    made.clock.jump(made.table.idle)
    made.turn(lambda: made.states() == {"a.test": STOPPING})
    future = made.ask("b.test", timeout=1000)
    made.turn(lambda: made.states().get("b.test") is QUEUED)
    made.clock.jump(sniroute_processes.STOP_GRACE)
    assert made.outcome(future) is None and made.states() == {"b.test": READY}


@both
def test_tunnels_that_have_died_make_room_for_a_third(bench):
    """They were refused as `all 2 tunnels are in use`, and no process ran."""
    made = bench(max_tunnels=2)
    killed(made, "a.test", "b.test")
    assert made.outcome(made.ask("c.test")) is None, "at once: no clock has moved"
    assert sorted(made.states().items())[1:] == [("c.test", READY)] and len(made.states()) == 2
    assert made.table.counters["evictions"] == 1


@both
def test_a_name_waits_for_its_turn_beside_dead_tunnels_that_others_wait_for(bench):
    made = bench(max_tunnels=2, max_starting=1, start_timeout=1000)  # the clock moves faster than a start
    killed(made, "a.test", "b.test")
    first = [made.ask("a.test", timeout=1000), made.ask("b.test", timeout=1000)]
    wait_until(lambda: all(tunnel.waiters for tunnel in made.table.tunnels.values()))
    third = made.ask("c.test", timeout=1000)
    made.turn(lambda: len(made.states()) == 3)
    futures = [*first, third]  # after the back-off of both, and once there is one that may be evicted
    made.turn(lambda: made.clock.jump(0.05) or all(future.done() for future in futures))
    assert [made.outcome(future) for future in futures] == [None] * 3
    assert sum(state in sniroute_tunnels.LIVE for state in made.states().values()) <= 2


@both
def test_a_tunnel_in_back_off_that_nobody_waits_for_takes_no_slot_from_a_client(bench):
    """Nor does it have an idle tunnel stopped."""
    made = bench(max_tunnels=1)
    killed(made, "a.test")
    made.ready("b.test")
    made.clock.jump(sniroute_tunnels.BACKOFF_LAST)
    for _ in range(3):
        made.table.step()
    assert made.states() == {"b.test": READY}


def test_a_dead_tunnel_beside_all_slots_waits_without_spinning(bench):
    made = bench(max_tunnels=2)
    killed(made, "a.test")
    made.leased("b.test")
    made.table.max_tunnels = 1  # a reload
    made.clock.jump(sniroute_tunnels.BACKOFF_LAST)
    made.table.step()
    assert made.states() == {"a.test": BACKOFF, "b.test": READY}
    assert made.table._timeout(made.clock()) >= sniroute_tunnels.POLL_LAST
    made.table.release(made.table.tunnels[key("b.test")])
    made.clock.jump(sniroute_tunnels.EVICT_AGE)
    made.table.step()
    assert made.states()["b.test"] is READY, "nobody waits for the other"


def test_names_that_queue_are_no_tunnels_in_use(bench, cloudflared):
    """The third comes while the second waits for its turn: it waits, too, and gets the turn of one that fails."""
    cloudflared.fault("a.test", exit=1)
    made = bench(max_tunnels=2, max_starting=1)
    futures = []
    for name in ("a.test", "b.test", "c.test"):
        futures.append(made.ask(name))
        wait_until(lambda: name in made.states())  # in this order: the last would wait for an eviction
    assert [getattr(made.outcome(future), "kind", None) for future in futures] == ["failed", None, None]


@both
def test_what_crashes_and_is_not_asked_for_again_piles_up_to_a_bound(bench):
    made = bench(max_tunnels=2)
    for number in range(6):
        made.clock.jump(0.1)
        killed(made, f"{number}.test")
        assert len(made.states()) <= 2


def test_a_fresh_tunnel_is_not_evicted(bench):
    made = bench(max_tunnels=1)
    made.ready("a.test")
    future = made.ask("b.test")
    made.turn(lambda: "b.test" in made.states())
    made.table.step()
    assert made.states() == {"a.test": READY, "b.test": QUEUED}
    made.clock.jump(sniroute_tunnels.EVICT_AGE)
    assert made.outcome(future) is None
    assert made.states() == {"b.test": READY}


def test_the_reaper_evicts_by_itself_once_a_lease_is_released(bench, monkeypatch):
    monkeypatch.setattr(sniroute_tunnels, "EVICT_AGE", 60.0)
    made = bench(live=True, max_tunnels=1)
    tunnel = made.ready("a.test")
    future = made.ask("b.test")
    wait_until(lambda: made.states().get("b.test") is QUEUED)  # asked for beside a leased one it were refused
    assert made.table.lease(key("a.test")) is tunnel
    monkeypatch.setattr(sniroute_tunnels, "EVICT_AGE", 0.3)
    turned(made)  # with the lease
    assert made.states() == {"a.test": READY, "b.test": QUEUED}
    made.table.release(tunnel)
    assert future.result(10) is None
    assert made.states() == {"b.test": READY}


class Watched(Tunnel):
    """A tunnel that calls `hook` just before every look at, or change of, its state or leases."""

    __slots__ = ("hook",)

    def __init__(self, key: TunnelKey, now: float, lock: threading.RLock):
        object.__setattr__(self, "hook", None)
        super().__init__(key, now, lock)

    def __getattribute__(self, name: str) -> Any:
        if name in ("state", "leases") and (hook := object.__getattribute__(self, "hook")):
            hook()
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("state", "leases") and (hook := object.__getattribute__(self, "hook")):
            hook()
        object.__setattr__(self, name, value)


def bare_tunnel(table: TunnelTable, kind: type[Tunnel] = Tunnel) -> Any:
    """A ready tunnel without a process, long idle."""
    tunnel = kind(key("app.test"), table.clock(), table.lock)
    tunnel.state = READY
    tunnel.last_used = table.clock() - table.idle
    table.tunnels = {tunnel.key: tunnel}
    return tunnel


def stopper(table: TunnelTable, tunnel: Tunnel, way: str) -> Callable[[], object]:
    """One way in which the other threads stop a tunnel that nobody uses."""
    if way == "idle":
        return lambda: table._decide(table.clock())
    if way == "eviction":
        def evict() -> None:
            with table.lock:
                table._evict(table.clock())
        return evict
    process = types.SimpleNamespace(is_full=lambda now: True)  # nobody looks at its backlog
    child = types.SimpleNamespace(process=process, alive=lambda: True, proven=True, address=(HOST, 1), link=None,
                                  ready=table.clock() - 1000)
    object.__setattr__(tunnel, "child", child)

    def doubt() -> None:
        with table.lock:
            table._doubt(tunnel, child, None)
    return doubt


def watched(table: TunnelTable, way: str) -> tuple[Any, Callable[[], object]]:
    """A Watched tunnel, and what stops it."""
    tunnel = bare_tunnel(table, Watched)
    stop = stopper(table, tunnel, way)
    tunnel.child = getattr(tunnel, "child", None)
    return tunnel, stop


@pytest.mark.parametrize("inner", ["lease", "stop"])
@pytest.mark.parametrize("way", ["idle", "eviction", "doubt"])
def test_a_lease_at_the_instant_of_a_stop_wins_or_is_refused_at_every_interleaving(way, inner, bench):
    """One side runs whole between any two steps of the other; a tunnel is leased or stopped, never both."""
    table = bench().table
    seen = set()
    for at in range(1000):
        tunnel, stop = watched(table, way)
        got: list[Tunnel | None] = []

        def lease() -> None:
            got.append(table.lease(key("app.test")))

        steps = at
        outer, between = (stop, lease) if inner == "lease" else (lease, stop)

        def hook() -> None:
            nonlocal steps
            if steps == 0:
                tunnel.hook = None
                between()
            steps -= 1

        tunnel.hook = hook
        try:
            outer()
        finally:
            table.tunnels = {}
        if tunnel.hook:  # it had fewer steps than that: all are done
            break
        assert tunnel.state in (READY, STOPPING)
        assert (got[0] is tunnel) == (tunnel.state is READY), f"step {at}"
        assert tunnel.leases == (got[0] is tunnel)
        seen.add(tunnel.state)
    assert at > 2
    assert seen == {READY, STOPPING}


@pytest.mark.parametrize("way", ["idle", "eviction", "doubt"])
def test_where_a_lease_and_a_stop_both_give_way_the_client_need_not_wait(way, bench):
    """The loop has seen the stop when the stop sees its lease.  Two cores do that by themselves now and then."""
    table = bench().table
    seen = set()
    for at in range(1000):
        tunnel, stop = watched(table, way)
        got: list[Tunnel | None] = []
        looked, go, looked_again, stopped = (threading.Event() for _ in range(4))
        loop = threading.Thread(target=lambda: (got.append(table.lease(key("app.test"))), looked_again.set()))
        pauses = {(loop, 1): (looked, go), (loop, 4): (looked_again, stopped),  # after each look at the state
                  (threading.current_thread(), at): (go, looked_again)}
        steps: collections.Counter[threading.Thread] = collections.Counter()

        def hook() -> None:
            me = threading.current_thread()
            reached, goes_on = pauses.get((me, steps[me]), (None, None))
            steps[me] += 1
            if reached is not None:
                reached.set()
                assert goes_on.wait(10)

        tunnel.hook = hook
        loop.start()
        assert looked.wait(10)
        stop()
        tunnel.hook = None
        ended = not go.is_set()  # it had fewer steps than that: all are done
        go.set()
        stopped.set()
        loop.join()
        if ended:
            break
        state, leases = tunnel.state, tunnel.leases
        assert leases == (got[0] is tunnel) and (got[0] is None or state is READY)
        if got[0] is None and state is READY:
            assert table.wait(key("app.test"), None, table.clock()) is None, "it is there: at once"
        seen.add((got[0] is tunnel, state))
    table.tunnels = {}
    assert (False, READY) in seen


def test_four_thousand_leases_at_the_instant_of_an_idle_stop(bench):
    table = bench(idle=0).table
    barrier = threading.Barrier(2)
    interval = sys.getswitchinterval()
    rounds, outcomes = 4_000, set()

    def reap() -> None:
        for _ in range(rounds):
            barrier.wait()
            table._decide(table.clock())
            barrier.wait()

    reaper = threading.Thread(target=reap, name="reap")
    logging.getLogger("sniroute").setLevel(logging.ERROR)  # thousands of lines otherwise
    sys.setswitchinterval(1e-6)
    reaper.start()
    try:
        for _ in range(rounds):
            tunnel = bare_tunnel(table)
            barrier.wait()
            got = table.lease(key("app.test"))
            barrier.wait()
            if got is None and tunnel.state is READY:  # both gave way
                got = table.lease(key("app.test"))
            assert (got is tunnel) == (tunnel.state is READY)
            assert tunnel.leases == (got is tunnel)
            outcomes.add(tunnel.state)
    finally:
        barrier.abort() if sys.exc_info()[0] else None
        sys.setswitchinterval(interval)
        logging.getLogger("sniroute").setLevel(logging.NOTSET)
        reaper.join()
    table.tunnels = {}
    assert outcomes <= {READY, STOPPING}


@both
def test_a_lease_holds_while_the_reaper_stops_all_that_is_idle(bench, cloudflared, echo_server):
    """The same race with processes: whoever has a lease gets an answer."""
    cloudflared.far("*", echo_server.address)
    made = bench(live=True, idle=0.001)
    answers = 0
    deadline = time.monotonic() + 30
    while answers < 15:
        assert time.monotonic() < deadline
        made.table.wait(key("app.test"), None, time.monotonic() + 30)
        tunnel = made.table.lease(key("app.test"))
        if tunnel is not None:
            assert ask(tunnel.child.address) == b"hello"
            answers += 1
            made.table.release(tunnel)


# -- crashes -----------------------------------------------------------------------------------


def crash(made: Bench, tunnel: Tunnel) -> float:
    """Kill the child of a tunnel in use; the pause before its next start."""
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGKILL)
    made.turn(lambda: tunnel.child is not child)
    assert tunnel.state is BACKOFF and tunnel.child is None
    return tunnel.until - made.clock()


@both
def test_a_tunnel_that_dies_in_use_comes_back_by_itself_later_and_later(bench):
    made = bench()
    tunnel = made.leased("app.test")
    for wait in (1, 2, 4, 8):
        assert crash(made, tunnel) == wait
        made.clock.jump(wait - 0.1)
        made.table.step()
        assert tunnel.state is BACKOFF
        made.clock.jump(0.1)
        made.turn(lambda: tunnel.state is READY)
    made.clock.jump(sniroute_tunnels.HEALTHY)
    assert crash(made, tunnel) == 1, "it was healthy for a minute"
    tunnel.crashes = 1000
    made.clock.jump(1)
    made.turn(lambda: tunnel.state is READY)
    assert crash(made, tunnel) == sniroute_tunnels.BACKOFF_LAST
    assert made.table.counters["crashes"] == 6


def test_the_reaper_wakes_for_a_tunnel_in_back_off_by_itself(bench):
    made = bench(live=True, jitter=lambda: 0.1)
    tunnel = made.leased("app.test")
    pid = tunnel.child.process.pid
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: any(view.state is READY and view.pid != pid for view in made.table.snapshot()))


def test_a_tunnel_that_dies_unused_is_forgotten(bench, cloudflared, caplog):
    made = bench()
    tunnel = made.ready("app.test")
    os.kill(tunnel.child.process.pid, signal.SIGTERM)
    made.turn(lambda: not made.table.tunnels)
    assert tunnel.state is FAILED
    assert ("tunnel ended", {"tunnel": "cf:app.test", "reason": "it ended (signal 15): Start Websocket listener",
                             "then": "the next client starts it again"}) in events(caplog)
    assert made.table.failures == {}
    made.ready("app.test")
    assert len(cloudflared.starts()) == 2


def test_nobody_waits_out_a_back_off_that_is_longer_than_the_deadline(bench):
    made = bench()
    tunnel = made.leased("app.test")
    assert crash(made, tunnel) == 1
    error = made.failed("app.test", timeout=0.5)
    assert error.kind == "timeout" and "it is backoff" in str(error)
    future = made.ask("app.test", timeout=60)
    made.turn(lambda: tunnel.waiters)
    made.clock.jump(1)
    assert made.outcome(future) is None


@both
def test_a_program_that_ends_at_its_first_client_says_why(bench, cloudflared, caplog):
    cloudflared.fault("app.test", exit_on_client=True, code=2, words="goroutine panic")
    made = bench()
    tunnel = made.leased("app.test")
    child = tunnel.child
    assert ask(child.address) == b""
    made.turn(lambda: tunnel.state is BACKOFF)
    assert ("tunnel ended", {"tunnel": "cf:app.test", "reason": "it ended (exit 2): goroutine panic",
                             "then": "starting it again in 1.0 s"}) in events(caplog)
    assert made.table.words(child, 0.0, 0).text == "it ended (exit 2): goroutine panic"


@pytest.mark.parametrize("switches", [dict(exit_after=1000), dict(exit_after_bytes=5)], ids=["time", "bytes"])
def test_a_program_that_ends_later_is_started_again(switches, bench, cloudflared, echo_server):
    cloudflared.fault("app.test", code=4, **switches)
    cloudflared.far("app.test", echo_server.address)
    made = bench()
    tunnel = made.leased("app.test")
    if "exit_after_bytes" in switches:
        ask(tunnel.child.address, b"hello")
    made.turn(lambda: tunnel.state is BACKOFF)
    cloudflared.fault("app.test")
    made.clock.jump(1)
    made.turn(lambda: tunnel.state is READY)


@both
def test_a_start_after_a_crash_that_fails_is_remembered(bench, cloudflared):
    made = bench()
    tunnel = made.leased("app.test")
    crash(made, tunnel)
    cloudflared.fault("app.test", exit=1)
    made.clock.jump(1)
    made.turn(lambda: not made.table.tunnels)
    assert tunnel.state is FAILED and key("app.test") in made.table.failures
    made.table.release(tunnel)  # its clients are gone by and by, which disturbs nobody


# -- doubt -------------------------------------------------------------------------------------


@both
def test_a_dead_child_that_is_doubted_is_started_again(bench):
    made = bench(jitter=lambda: 0.0)
    tunnel = made.ready("app.test")
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGKILL)
    wait_until(lambda: not child.alive())  # the reaper does not know yet
    future = made.ask("app.test", doubted=child)
    wait_until(lambda: tunnel.waiters)  # nor will it before somebody asks
    assert made.outcome(future) is None
    assert tunnel.state is READY and tunnel.child is not child


@both
def test_a_hung_child_is_started_again_even_when_others_hold_leases(bench):
    made = bench()
    tunnel = made.leased("app.test")
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGSTOP)
    with socket.create_connection(child.address):  # the kernel accepts it, the process does not
        future = made.ask("app.test", doubted=child)
        assert made.outcome(future) is None  # at once: it would not hear TERM
    assert tunnel.state is READY and tunnel.child is not child and tunnel.leases == 1


@shared
def test_a_shared_process_that_is_full_is_not_taken_for_a_hung_one(bench):
    """It says so: to kill it would cost the connections that fill it."""
    made = bench()
    tunnel = made.leased("app.test")
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGSTOP)
    with socket.create_connection(child.address):
        made.table.processes._heard(child.process, b'{"event": "paused", "message": "not accepting for now"}')
        assert made.outcome(made.ask("app.test", doubted=child)) is None
        assert tunnel.child is child
        made.clock.jump(sniroute_processes.PAUSED)
        assert made.outcome(made.ask("app.test", doubted=child)) is None
        assert tunnel.child is not child


def test_a_busy_child_is_not_taken_for_a_hung_one(bench, cloudflared, echo_server):
    """Clients that come all the time are in the backlog now and then, but never stay there."""
    cloudflared.far("*", echo_server.address)
    made = bench(live=True)
    tunnel = made.leased("app.test")
    child = tunnel.child
    stop = threading.Event()

    def come() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                ask(child.address)

    clients = [threading.Thread(target=come, name="client") for _ in range(2)]
    for client in clients:
        client.start()
    try:
        for _ in range(5):
            made.table.wait(key("app.test"), None, time.monotonic() + 10, child)
            assert tunnel.child is child
    finally:
        stop.set()
        for client in clients:
            client.join()


@both
def test_a_live_child_that_serves_others_is_left_alone(bench):
    made = bench()
    tunnel = made.leased("app.test")
    made.clock.jump(100_000)
    assert not made.doubt(tunnel)


def test_doubt_restarts_an_unused_child_only_from_a_growing_age_on(bench):
    made = bench(idle=1e6)
    tunnel = made.ready("app.test")
    for age in (5, 10, 20):
        made.clock.jump(age - 0.5)
        assert not made.doubt(tunnel), f"fresh: {age - 0.5} s"
        made.clock.jump(0.5)
        assert made.doubt(tunnel), f"old: {age} s"
    tunnel.doubts = 1000
    made.clock.jump(299)
    assert not made.doubt(tunnel)
    made.clock.jump(1)
    assert made.doubt(tunnel)
    tunnel.child.proven = True  # a byte came through: what fails now is hardly the process
    made.clock.jump(299)
    assert not made.doubt(tunnel)
    made.clock.jump(1)
    assert made.doubt(tunnel)
    assert tunnel.doubts == 1, "the old doubts were about something else"


@linux
@both
def test_child_that_is_dying_is_not_taken_for_one_that_serves_others(bench, monkeypatch):
    """Its clients see the end of their connections before the kernel says that it has ended."""
    made = bench(idle=1e6, jitter=lambda: 0.0)
    tunnel = made.leased("app.test")
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGKILL)
    wait_until(lambda: not sniroute_ports.listeners(child.address[1]))
    monkeypatch.setattr(os, "waitid", lambda *_: None)  # its parent has not been told yet
    future = made.ask("app.test", doubted=child)
    assert made.outcome(future) is None
    assert tunnel.child is not child and tunnel.state is READY
    made.table.release(tunnel)


def test_descriptors_that_run_out_do_not_make_a_good_child_look_bad(bench, monkeypatch):
    """Then nothing can be read of it, which is our trouble and not its."""
    made = bench(idle=1e6)
    tunnel = made.leased("app.test")
    child = tunnel.child
    monkeypatch.setattr(sniroute_tunnels, "STOP_GRACE", 0.1)
    with monkeypatch.context() as patch:
        def none_left(path, *_, **__):
            raise OSError(24, "Too many open files", path)
        patch.setattr(sniroute_processes, "open", none_left, raising=False)
        made.ready("app.test", doubted=child)
    assert tunnel.child is child and tunnel.state is READY
    made.table.release(tunnel)


def test_restart_for_doubt_is_charged_to_the_client(bench):
    """A client can make a good tunnel look bad; it cannot do so for ever."""
    made = bench(idle=1e6)
    tunnel = made.ready("app.test")
    made.clock.jump(1000)
    made.table.budget.buckets["192.0.2.1"] = (0.0, made.clock())
    child = tunnel.child
    made.ready("app.test", client="192.0.2.1", doubted=child)
    assert tunnel.child is child
    made.ready("app.test", client="192.0.2.2", doubted=child)
    assert tunnel.child is not child


@both
def test_child_that_ends_while_it_is_doubted_leaves_no_row_behind(bench):
    """The doubt sets STOPPING between the exit and the reaper's look at the state."""
    made = bench(idle=1e6)
    tunnel = made.leased("app.test")
    child = tunnel.child
    give = made.table.pool.give

    def doubt_then_give(*port):
        with made.table.lock:
            made.table._enter(tunnel, STOPPING)
        give(*port)

    made.table.pool.give = doubt_then_give
    os.kill(child.process.pid, signal.SIGKILL)
    wait_until(lambda: made.table.step() or tunnel.child is None)
    assert made.table.snapshot() == []
    made.table.release(tunnel)
    made.table.pool.give = give
    assert made.ready("app.test").child is not child


def test_doubt_of_an_earlier_child_does_nothing(bench):
    made = bench(idle=1e6)
    tunnel = made.ready("app.test")
    old = tunnel.child
    made.clock.jump(5)
    assert made.doubt(tunnel)
    made.clock.jump(100)
    child = tunnel.child
    made.ready("app.test", doubted=old)
    assert tunnel.child is child


@both
def test_clients_that_doubt_together_cause_one_restart(bench, cloudflared):
    made = bench(idle=1e6)
    tunnel = made.ready("app.test")
    made.clock.jump(5)
    futures = [made.ask("app.test", doubted=tunnel.child) for _ in range(20)]
    assert all(made.outcome(future) is None for future in futures)
    assert len(cloudflared.starts()) == 2


@both
def test_doubt_during_close_ends_at_once(bench):
    made = bench(live=True)
    tunnel = made.leased("app.test")
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGSTOP)
    with socket.create_connection(child.address):
        future = made.ask("app.test", doubted=child)
        wait_until(lambda: tunnel.waiters)
        made.table.close(now=True)
        error = made.outcome(future)
    assert error is None or error.kind == "stopping"


# -- stopping ----------------------------------------------------------------------------------


@both
def test_close_leaves_no_child_and_releases_all_who_wait(bench, cloudflared):
    cloudflared.fault("slow.test", never_listen=True)
    made = bench(live=True, max_starting=1)
    made.leased("used.test")
    made.ready("idle.test")
    waiting = [made.ask("slow.test"), made.ask("queued.test"), made.ask("slow.test")]
    wait_until(lambda: len(cloudflared.starts()) == 3 and "queued.test" in made.states())
    started = time.monotonic()
    made.table.close()
    assert time.monotonic() - started < sniroute_processes.STOP_GRACE, "TERM is enough"
    for future in waiting:
        error = made.outcome(future)
        assert (error.kind, str(error)) == ("stopping", "sniroute is stopping")
    assert made.table.children == {} and own_children() == set()
    assert not any(runs(start["pid"]) for start in cloudflared.starts())
    with pytest.raises(TunnelError, match="sniroute is stopping"):
        made.table.wait(key("more.test"), None, time.monotonic() + 10)
    made.table.close()  # again: it has ended
    made.table.wake()


def test_close_without_any_tunnel_returns(bench):
    bench(live=True).table.close()


@both
@pytest.mark.parametrize("moment", ["queued", "claimed", "launched", "in back-off"])
def test_close_during_a_launch_leaves_no_process(moment, bench, cloudflared, monkeypatch):
    cloudflared.fault("app.test", listen_delay=0 if moment == "in back-off" else 60_000)
    made = bench()
    table = made.table
    if moment == "in back-off":
        crash(made, made.leased("app.test"))
    future = made.ask("app.test")
    wait_until(lambda: table.tunnels and table.tunnels[key("app.test")].waiters)
    if moment == "claimed":
        spawn = table._spawn
        monkeypatch.setattr(table, "_spawn", lambda *args: setattr(table, "closing", "drain") or spawn(*args))
        table.step()
        assert len(table.children) == 1
    elif moment == "launched":
        made.turn(cloudflared.starts)
    table.start()
    table.close()
    assert made.outcome(future).kind == "stopping"
    assert table.children == {} and own_children() == set()


@both
def test_a_child_that_ignores_term_is_killed_after_the_grace(bench, cloudflared):
    cloudflared.fault("app.test", ignore_term=True)
    made = bench()
    tunnel = made.ready("app.test")
    child = tunnel.child
    made.clock.jump(made.table.idle)
    made.table.step()
    made.clock.jump(sniroute_processes.STOP_GRACE - 0.1)
    made.table.step(0.05)
    assert tunnel.state is STOPPING and child.process.alive() and not child.process.killed
    made.clock.jump(0.1)
    made.turn(lambda: not made.table.children)
    assert child.process.popen.returncode == -signal.SIGKILL


@both
def test_close_kills_what_ignores_term_and_at_once_when_hurried(bench, cloudflared, monkeypatch):
    monkeypatch.setattr(sniroute_processes, "STOP_GRACE", 30.0)
    cloudflared.fault("*", ignore_term=True)
    made = bench(live=True)
    made.ready("a.test")
    made.ready("b.test")
    closer = threading.Thread(target=made.table.close, name="close")
    closer.start()
    wait_until(lambda: all(process.kill_at for process in made.table.processes.running))
    assert set(made.states().values()) == {STOPPING}
    started = time.monotonic()
    made.table.close(now=True)
    closer.join()
    assert time.monotonic() - started < 5
    assert own_children() == set()


@both
def test_close_now_does_not_wait_for_term(bench, cloudflared):
    cloudflared.fault("app.test", ignore_term=True)
    made = bench(live=True)
    made.ready("app.test")
    started = time.monotonic()
    made.table.close(now=True)
    assert time.monotonic() - started < sniroute_processes.STOP_GRACE


@both
def test_a_client_that_comes_while_a_tunnel_stops_has_it_started_again(bench, cloudflared):
    cloudflared.fault("app.test", ignore_term=True)
    made = bench()
    tunnel = made.ready("app.test")
    made.clock.jump(made.table.idle)
    made.table.step()
    assert tunnel.state is STOPPING and made.table.lease(key("app.test")) is None
    future = made.ask("app.test", timeout=1000)
    wait_until(lambda: tunnel.waiters)
    made.clock.jump(sniroute_processes.STOP_GRACE)
    assert made.outcome(future) is None
    assert len(cloudflared.starts()) == 2


# -- shared processes --------------------------------------------------------------------------


def pids(*tunnels: Tunnel) -> set[int]:
    return {tunnel.child.process.pid for tunnel in tunnels}

@shared
def test_sixteen_names_share_a_process_and_the_next_has_another(bench, cloudflared):
    made = bench(max_starting=20)
    names = [f"{number}.test" for number in range(17)]
    assert [made.outcome(future) for future in [made.ask(name) for name in names]] == [None] * 17
    sizes = sorted(len(process.children) for process in made.table.processes.running)
    assert sizes == [1, 16] and sniroute_launchers.CARRIES == 16
    assert (made.table.counters["starts"], made.table.counters["processes"]) == (17, 2)
    assert {row[4] for row in made.table.snapshot()} == {start["pid"] for start in cloudflared.starts()}
    full = next(process for process in made.table.processes.running if len(process.children) == 16)
    leaver, = [made.table.children[child] for child in list(full.children.values())[:1]]
    for name in names:
        if made.table.tunnels[key(f"{name}")] is not leaver:
            made.table.lease(key(f"{name}"))
    made.clock.jump(made.table.idle)
    made.turn(lambda: leaver.state is FAILED)
    assert made.ready("more.test").child.process is full, "there is room again"
    assert made.table.counters["processes"] == 2


@shared
def test_schemes_with_the_same_launcher_share_processes(bench):
    table = bench(live=True).table
    for each in (key("app.test"), TunnelKey("too", "app.test")):
        table.wait(each, None, time.monotonic() + 30)
    assert len(table.tunnels) == 2 and len(table.processes.running) == 1


@shared
def test_a_tunnel_without_the_token_has_a_process_of_its_own_that_does_not_know_it(bench, cloudflared):
    made = bench(live=True, environ={"TUNNEL_SERVICE_TOKEN_ID": "id", "LANG": "C"})
    for each in (key("app.test"), key("app.test")._replace(identified=False), key("more.test")):
        made.table.wait(each, None, time.monotonic() + 30)
    assert len(made.table.processes.running) == 2
    own, stranger, more = cloudflared.starts()
    assert own["pid"] == more["pid"] != stranger["pid"]
    assert own["environment"]["TUNNEL_SERVICE_TOKEN_ID"] == "id"
    assert "TUNNEL_SERVICE_TOKEN_ID" not in stranger["environment"] and stranger["environment"]["LANG"] == "C"


@shared
def test_two_clients_that_come_at_the_same_instant_share_one_new_process(bench):
    table = bench(live=True).table
    barrier = threading.Barrier(2)

    def come(name: str) -> None:
        barrier.wait()
        table.wait(key(f"{name}"), None, time.monotonic() + 30)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(come, name) for name in ("a.test", "b.test")]:
            future.result()
    assert (table.counters["starts"], table.counters["processes"]) == (2, 1)


@shared
def test_all_that_a_dead_process_carried_comes_back_in_one_new_process(bench):
    made = bench()
    tunnels = [made.leased(f"{number}.test") for number in range(5)]
    unused = made.ready("unused.test")
    old, = pids(*tunnels, unused)
    os.kill(old, signal.SIGKILL)
    made.turn(lambda: not made.table.processes.running)
    assert {tunnel.state for tunnel in tunnels} == {BACKOFF} and unused.state is FAILED
    assert made.table.counters["crashes"] == 6 and made.table.failures == {}
    made.clock.jump(1)
    made.turn(lambda: all(tunnel.state is READY for tunnel in tunnels))
    assert len(pids(*tunnels)) == 1 and pids(*tunnels) != {old}
    assert [tunnel.leases for tunnel in tunnels] == [1] * 5
    assert made.table.counters["processes"] == 2


@shared
def test_closing_one_name_leaves_the_connections_of_the_others(bench, cloudflared, echo_server):
    cloudflared.far("*", echo_server.address)
    made = bench()
    used, idle = made.leased("used.test"), made.ready("idle.test")
    child = idle.child
    with socket.create_connection(used.child.address, 10) as client, \
            socket.create_connection(child.address, 10) as other:
        client.sendall(b"a")
        other.sendall(b"a")
        assert client.recv(1) == other.recv(1) == b"a"
        made.clock.jump(made.table.idle)
        made.turn(lambda: idle.state is FAILED)
        assert other.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(child.address).close()
        client.sendall(b"b")
        assert client.recv(1) == b"b"
    assert not child.alive() and used.child.alive() and used.state is READY
    assert child.address[1] in [port for _, port in made.table.pool.resting]


@shared
def test_the_process_ends_with_its_last_name(bench):
    made = bench()
    first, second = made.leased("a.test"), made.ready("b.test")
    process = second.child.process
    made.clock.jump(made.table.idle)
    made.turn(lambda: second.state is FAILED)
    assert process.alive() and not process.kill_at
    made.table.release(first)
    made.clock.jump(made.table.idle)
    made.turn(lambda: not made.table.processes.running)
    assert process.popen.returncode == -signal.SIGTERM


@shared
def test_the_process_ends_where_all_that_is_left_is_to_close(bench, cloudflared):
    cloudflared.fault("a.test", ignore_close=True)
    cloudflared.fault("b.test", never_listen=True)
    made = bench(start_timeout=1000)
    closing = made.ready("a.test").child
    future = made.ask("b.test", timeout=1000)
    made.turn(lambda: cloudflared.starts("b.test"))
    made.clock.jump(made.table.idle)
    made.table.step()
    assert closing.close_at and not closing.process.kill_at
    other = made.table.tunnels[key("b.test")].child
    made.table.processes._heard(other.process, event(other, "closed", error="permission denied"))
    assert "permission denied" in str(made.outcome(future))
    made.turn(lambda: not made.table.processes.running)
    assert closing.process.popen.returncode == -signal.SIGTERM


@shared
def test_the_process_of_a_name_that_does_not_start_ends_too(bench, cloudflared):
    cloudflared.fault("app.test", never_listen=True)
    made = bench()
    future = made.ask("app.test")
    made.turn(cloudflared.starts)
    child = made.table.tunnels[key("app.test")].child
    line = event(child, "closed", message="cannot listen", error="permission denied")
    made.table.processes._heard(child.process, line)
    assert str(made.outcome(future)) == "cf:app.test did not start: cannot listen: permission denied"
    assert key("app.test") in made.table.failures
    made.turn(lambda: not made.table.processes.running)


@shared
def test_the_process_of_a_name_that_tries_another_port_is_kept(bench, cloudflared):
    cloudflared.fault("app.test", in_use=2)
    made = bench()
    made.ready("app.test")
    assert (made.table.counters["starts"], made.table.counters["processes"]) == (3, 1)


@shared
def test_a_process_that_is_to_end_takes_no_new_name(bench, cloudflared):
    cloudflared.fault("a.test", ignore_term=True)
    made = bench()
    old = made.ready("a.test").child.process
    made.clock.jump(made.table.idle)
    made.table.step()
    assert old.kill_at and old.alive()
    assert made.ready("b.test").child.process is not old


@shared
def test_a_process_that_does_not_close_is_killed_and_the_others_come_back(bench, cloudflared, caplog):
    cloudflared.fault("deaf.test", ignore_close=True)
    made = bench()
    used, deaf = made.leased("used.test"), made.ready("deaf.test")
    process = deaf.child.process
    made.clock.jump(made.table.idle)
    made.table.step()
    assert deaf.state is STOPPING
    made.clock.jump(sniroute_processes.STOP_GRACE - 0.1)
    made.table.step(0.05)
    assert not process.killed
    made.clock.jump(0.1)
    made.turn(lambda: process not in made.table.processes.running)
    assert deaf.state is FAILED and used.state is BACKOFF
    assert "it did not close 127.0.0.1:" in str(events(caplog))
    made.clock.jump(1)
    made.turn(lambda: used.state is READY)


@shared
def test_a_stopped_process_is_found_hung_and_all_its_names_come_back(bench, monkeypatch):
    monkeypatch.setattr(sniroute_processes, "STOP_GRACE", 30.0)
    made = bench(live=True, jitter=lambda: 0.0)
    tunnels = [made.leased("a.test"), made.leased("b.test")]
    child = tunnels[0].child
    os.kill(child.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with socket.create_connection(child.address):  # the kernel accepts it, the process does not
        assert made.outcome(made.ask("a.test", doubted=child)) is None
    made.turn(lambda: all(tunnel.state is READY and tunnel.child.alive() for tunnel in tunnels))
    assert len(pids(*tunnels)) == 1 and pids(*tunnels) != {child.process.pid}
    assert time.monotonic() - started < sniroute_processes.STOP_GRACE, "TERM is not waited for"


@shared
def test_doubt_of_one_name_opens_its_listener_anew_and_no_other(bench):
    made = bench(idle=1e6)
    tunnel, other = made.ready("a.test"), made.ready("b.test")
    process, port, child = tunnel.child.process, tunnel.child.address[1], other.child
    made.clock.jump(5)
    assert made.doubt(tunnel)
    assert tunnel.child.process is process and tunnel.child.address[1] != port
    assert other.child is child and child.alive() and made.table.counters["processes"] == 1


@shared
def test_a_listener_that_closes_by_itself_is_a_crash_of_that_name(bench):
    made = bench()
    tunnel, other = made.leased("a.test"), made.leased("b.test")
    child = tunnel.child
    made.table.processes._heard(child.process, event(child, "closed", message="closed", error="bad luck"))
    assert tunnel.state is BACKOFF and tunnel.child is None and other.child.alive()
    assert made.table.words(child, 0.0, 1) == ("failed", "closed: bad luck", False)


@shared
def test_a_start_that_is_never_answered_kills_the_process_and_begins_anew(bench, cloudflared, caplog):
    cloudflared.fault("new.test", never_listen=True)
    made = bench()
    used = made.leased("used.test")
    process = used.child.process
    future = made.ask("new.test", timeout=1000)
    made.turn(lambda: cloudflared.starts("new.test"))
    cloudflared.fault("new.test")
    made.clock.jump(15)  # start_timeout
    assert made.outcome(future) is None
    assert process not in made.table.processes.running and made.table.failures == {}
    assert "it did not listen within 15 s" in str(events(caplog))
    made.clock.jump(1)
    made.turn(lambda: used.state is READY)


@shared
def test_a_name_is_not_to_blame_for_a_process_that_dies_while_it_starts(bench, cloudflared):
    cloudflared.fault("new.test", never_listen=True)
    made = bench()
    used = made.leased("used.test")
    future = made.ask("new.test", timeout=1000)
    made.turn(lambda: cloudflared.starts("new.test"))
    cloudflared.fault("new.test")
    os.kill(used.child.process.pid, signal.SIGKILL)
    assert made.outcome(future) is None
    assert made.table.failures == {} and made.table.counters["failures"] == 0


@shared
def test_a_name_that_kills_every_process_is_found_out_in_one_of_its_own(bench, cloudflared):
    cloudflared.fault("evil.test", exit=1, words="assertion failed")
    made = bench()
    used = made.leased("used.test")
    error = made.failed("evil.test")
    assert str(error) == "cf:evil.test did not start: it ended (exit 1): assertion failed"
    assert len(cloudflared.starts("evil.test")) == 2 and key("evil.test") in made.table.failures
    made.clock.jump(1)
    made.turn(lambda: used.state is READY)


@shared
def test_fifty_clients_that_fail_together_have_each_its_own_reason(bench, cloudflared):
    words = {"a.test": "denied", "b.test": "name", "c.test": "down", "d.test": "certificate", "e.test": "timeout"}
    for name, word in words.items():
        cloudflared.fault(name, refuse=True, reason=word, error=f"{word} of {name}")
    made = bench(live=True)
    children = {name: made.ready(name).child for name in words}
    assert len(made.table.processes.running) == 1

    def come(name: str) -> tuple[str, int]:
        with socket.create_connection(children[name].address, 10) as client:
            port = port_of(client)
            assert client.recv(1) == b""
        return name, port

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        came = list(pool.map(come, [name for name in words for _ in range(10)]))
    for name, port in came:
        wait_until(lambda: made.table.words(children[name], 0.0, port).text)
        kind_of, final = sniroute_launchers.CARRIER_REASONS.get(words[name], ("failed", False))
        reason = (kind_of, f"failed to connect to origin: {words[name]} of {name}", final)
        assert made.table.words(children[name], 0.0, port) == reason
    name, port = came[0]
    assert made.table.words(children[name], time.monotonic(), port).text == "", "it was an earlier client"
    os.kill(children[name].process.pid, signal.SIGKILL)
    wait_until(lambda: not made.table.children)
    assert made.table.words(children[name], 0.0, port).text.endswith(f"denied of {name}")
    assert made.table.words(children[name], 0.0, 1).text == "it ended (signal 9)", "no other client's words"


def test_the_carrier_itself_opens_and_closes(cloudflared, free_ports):
    """The two sides of the protocol, but for what needs an edge."""
    launcher = sniroute_launchers.carrier_launcher({})
    made = Bench(TunnelTable({"cf": launcher}, free_ports(), clock=FakeClock()), False)
    try:
        used, idle = made.leased("a.example.test"), made.ready("b.example.test")
        child = idle.child
        assert len(pids(used, idle)) == 1
        assert sniroute_ports.listens(used.child.process.pid, used.child.address[1]) == "own"
        made.clock.jump(made.table.idle)
        made.turn(lambda: idle.state is FAILED)
        assert used.child.alive() and not sniroute_ports.listeners(child.address[1])
        pool = made.table.pool
        with listening(min(pool.free)) as thief:
            pool.take = types.MethodType(lambda self: self.__dict__.pop("take") and port_of(thief), pool)
            made.ready("c.example.test")
        assert made.table.counters["starts"] == 4, "one of them found its port taken"
    finally:
        made.close()
    assert made.table.processes.running == []


# -- looking and steering ----------------------------------------------------------------------


def test_words_are_the_reason_for_the_last_refusal(bench, cloudflared, echo_server):
    cloudflared.far("app.test", echo_server.address)
    cloudflared.fault("app.test", refuse=1)
    made = bench(live=True)
    child = made.ready("app.test").child
    assert ask(child.address, b"") == b""
    wait_until(lambda: made.table.words(child, 0.0, 0).text.startswith("the edge refused it"))
    assert made.table.words(child, time.monotonic(), 0).text == "", "it has said nothing since"
    assert ask(child.address) == b"hello", "the second client is served"


@both
def test_a_snapshot_names_state_leases_port_and_pid(bench):
    made = bench(live=True)
    tunnel = made.leased("app.test")
    with pytest.raises(TunnelError):
        made.table.wait(key("other.test"), None, 0.0)
    rows = {row[0]: row[1:5] for row in made.table.snapshot()}
    assert rows[key("app.test")] == (READY, 1, tunnel.child.address[1], tunnel.child.process.pid)
    assert rows.get(key("other.test"), ("queued", 0, 0, 0))[1] == 0


@both
def test_a_view_has_the_time_to_the_idle_stop_and_the_last_words(bench, cloudflared):
    made = bench()
    tunnel = made.ready("app.test")
    view = made.table.snapshot()[0]
    assert (view.key, view.state, view.leases, view.waiters, view.next) == (key("app.test"), READY, 0, 0, 300.0)
    assert made.table.lease(key("app.test")) is tunnel
    made.clock.jump(7)
    assert (view := made.table.snapshot()[0]).age == 7.0 and view.next == 0.0 and view.leases == 1
    made.table.release(tunnel)
    assert made.table.failed() == []
    cloudflared.fault("evil.test", exit=1, words="goroutine panic")
    made.failed("evil.test")
    made.clock.jump(1)
    (failed,) = made.table.failed()
    assert (failed.key, failed.state, failed.crashes) == (key("evil.test"), FAILED, 1)
    assert "evil.test did not start" in failed.words and "goroutine panic" in failed.words and 1 < failed.next < 5


@both
def test_starts_are_remembered_for_who_asks(bench):
    made = bench()
    made.ready("app.test")
    (start,) = made.table.started
    assert start.key == key("app.test") and start.seconds >= 0 and abs(start.when - time.time()) < 60


@both
def test_who_used_a_tunnel_last_says_how_long_it_may_idle(bench):
    made = bench()
    tunnel = made.leased("app.test")
    made.table.release(tunnel, 20.0)
    made.clock.jump(19)
    made.table.step()
    assert tunnel.state is READY and made.table.snapshot()[0].next == 1.0
    assert made.table.lease(key("app.test")) is tunnel
    made.table.release(tunnel, 400.0)
    made.clock.jump(399)
    made.table.step()
    assert tunnel.state is READY, "longer than the table's own"
    made.clock.jump(1)
    made.turn(lambda: not made.table.tunnels)


def test_a_shorter_idle_time_wakes_the_reaper(bench):
    made = bench(live=True)
    tunnel = made.leased("app.test")
    made.table.release(tunnel, 3600.0)
    assert made.table.lease(key("app.test")) is tunnel
    made.table.release(tunnel, 0.05)
    wait_until(lambda: not made.table.tunnels, timeout=2)


@both
def test_who_retires_keeps_no_tunnel_that_nobody_uses(bench):
    made = bench()
    used, unused = made.leased("used.test"), made.ready("unused.test")
    made.table.retiring = True
    made.turn(lambda: list(made.table.tunnels.values()) == [used])
    assert unused.state is FAILED and used.state is READY
    assert made.table._timeout(made.clock()) >= sniroute_tunnels.POLL_LAST, "it does not spin over what is in use"
    made.table.release(used)
    made.turn(lambda: not made.table.tunnels)


def test_settings_that_a_reload_changes_hold_for_tunnels_that_run(bench):
    made = bench(live=True, idle=3600.0)
    made.ready("app.test")
    made.table.adopt(types.SimpleNamespace(idle=0.05, start_timeout=7.0, max_tunnels=3, max_starting=2, ports=None))
    wait_until(lambda: not made.table.tunnels, timeout=2)  # nobody else wakes the reaper
    table = made.table
    assert (table.idle, table.start_timeout, table.max_tunnels, table.max_starting) == (0.05, 7.0, 3, 2)


def test_a_cold_start_says_it_too(bench):
    made = bench()
    with contextlib.suppress(TunnelError):
        made.table.wait(key("app.test"), None, 0.0, None, 7.0)
    assert made.table.tunnels[key("app.test")].idle == 7.0


@both
def test_an_operator_stops_a_tunnel_that_is_in_use(bench, cloudflared, echo_server):
    cloudflared.far("*", echo_server.address)
    made = bench()
    tunnel = made.leased("app.test")
    pid = tunnel.child.process.pid
    with socket.create_connection(tunnel.child.address, 10) as client:
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
        assert made.table.stop(key("app.test"))
        assert made.table.lease(key("app.test")) is None, "nobody new"
        made.turn(lambda: not made.table.tunnels)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    made.table.release(tunnel)
    made.turn(lambda: not runs(pid))
    made.ready("app.test")
    assert len(cloudflared.starts("app.test")) == 2


@both
def test_an_operator_stops_what_starts_and_what_waits(bench, cloudflared):
    cloudflared.fault("app.test", never_listen=True)
    made = bench(max_starting=1)
    starting = made.ask("app.test")
    made.turn(lambda: cloudflared.starts("app.test"))
    queued = made.ask("late.test")
    made.turn(lambda: made.states().get("late.test") == "queued")
    assert made.table.stop(key("late.test"))
    assert "was stopped" in str(made.outcome(queued))
    cloudflared.fault("app.test")
    assert made.table.stop(key("app.test"))
    assert made.outcome(starting) is None, "somebody waits for it: it is started again"
    assert len(cloudflared.starts("app.test")) == 2


@both
def test_a_stop_at_the_instant_of_ready_is_a_stop(bench):
    made = bench()
    future = made.ask("app.test")
    look = made.table._look

    def stop_first(child: Any, tunnel: Tunnel, now: float) -> None:
        alive = child.alive
        made.table._look = look
        if child.look_at != float("inf"):
            made.table.stop(tunnel.key)
        look(child, tunnel, now)
        assert tunnel.state == "stopping" and alive is not None

    made.table._look = stop_first
    assert made.outcome(future) is None, "it waits: so it is started again"
    assert made.table.counters["starts"] == 2 and made.table.counters["ready"] == 1


@both
def test_who_comes_after_a_stop_has_a_tunnel_of_its_own(bench):
    """The operator removes the row between the process's end and what becomes of it."""
    made = bench()
    tunnel = made.ready("app.test")
    crashed = made.table._crashed
    asked = []

    def stop_first(of: Tunnel, child: Any) -> None:
        made.table._crashed = crashed
        made.table.stop(of.key)
        asked.append(made.ask("app.test"))
        wait_until(lambda: made.table.tunnels.get(key("app.test")) not in (None, tunnel))
        crashed(of, child)

    made.table._crashed = stop_first
    os.kill(tunnel.child.process.pid, signal.SIGKILL)
    made.turn(lambda: asked)
    assert made.outcome(asked[0]) is None
    assert made.table.tunnels[key("app.test")] is not tunnel


@both
def test_an_operator_may_have_a_failure_forgotten(bench, cloudflared):
    cloudflared.fault("app.test", exit=1)
    made = bench()
    made.failed("app.test")
    cloudflared.fault("app.test")
    assert "next try in" in str(made.failed("app.test"))
    assert made.table.stop(key("app.test")) and not made.table.stop(key("app.test"))
    made.ready("app.test")


# -- all together ------------------------------------------------------------------------------


@both
def test_random_ends_leave_no_zombie_and_lose_no_port(bench, cloudflared):
    dice = random.Random(20)
    made = bench(count=8, jitter=lambda: 0.0)
    table = made.table
    everything = sorted(table.pool.free)
    for _ in range(15):
        name = dice.choice(["a.test", "b.test", "c.test", "d.test"])
        tunnel = made.ready(name)
        child = tunnel.child
        leased = dice.random() < 0.5 and table.lease(tunnel.key)
        way = dice.choice(["kill", "term", "idle"])
        if way != "idle":
            os.kill(child.process.pid, signal.SIGKILL if way == "kill" else signal.SIGTERM)
        if leased:
            made.turn(lambda: way == "idle" or tunnel.child is not child and tunnel.state is READY)
            table.release(tunnel)
        if way == "idle":
            made.clock.jump(table.idle)
        made.turn(lambda: child not in table.children)
        made.clock.jump(0.5)
    made.clock.jump(table.idle)
    made.turn(lambda: not table.children)
    assert table.tunnels == {}
    assert sorted(table.pool.free + [port for _, port in table.pool.resting]) == everything
    assert own_children() == set()


@both
def test_one_process_is_started_in_a_turn(bench, cloudflared):
    made = bench(max_starting=4)
    futures = [made.ask(f"app{number}.test") for number in range(3)]
    wait_until(lambda: len(made.table.tunnels) == 3)
    for count in range(1, 4):
        made.table.step()
        assert made.table.counters["starts"] == count
    made.turn(lambda: all(future.done() for future in futures))


@both
def test_a_program_that_ends_while_it_starts_is_not_ready(bench, cloudflared, proc):
    cloudflared.fault("app.test", never_listen=True)
    made = bench(proc=proc)
    future = made.ask("app.test")
    made.turn(cloudflared.starts)
    os.kill(cloudflared.starts()[0]["pid"], signal.SIGKILL)
    assert "it ended (signal 9)" in str(made.outcome(future))
    assert made.table.counters["ready"] == 0


@both
def test_a_hung_program_is_found_without_proc_too(bench):
    """The kernel tells how many clients wait, where it can be asked."""
    made = bench(proc=False)
    tunnel = made.leased("app.test")
    if not sniroute_ports.ask_for_listener(tunnel.child.address[1]):
        pytest.skip("no sock_diag here")
    os.kill(tunnel.child.process.pid, signal.SIGSTOP)
    with socket.create_connection(tunnel.child.address):
        assert made.doubt(tunnel)


# -- the stand-in itself -----------------------------------------------------------------------


@pytest.mark.parametrize("words, code, says", [
    pytest.param(["access", "tcp", "--hostname", "a.test", "--no-autoupdate", "true"], 0, "USAGE", id="unknown flag"),
    pytest.param(["access", "tcp", "--url", "127.0.0.1:1"], 0, "USAGE", id="no hostname"),
    pytest.param(["access", "tcp", "--hostname", "a.test", "--url", ":1"], 1, "failed to start", id="bad listener"),
    pytest.param(["acess", "tcp", "--hostname", "a.test"], 99, "to the internet", id="misspelt command"),
    pytest.param(["--version"], 0, "cloudflared version", id="version"),
])
def test_the_stand_in_takes_wrong_usage_as_the_real_one_does(words, code, says, cloudflared):
    done = subprocess.run([cloudflared.path, *words], capture_output=True, text=True)
    assert done.returncode == code
    assert says in done.stdout + done.stderr


def test_the_stand_in_logs_before_it_fails_to_listen(cloudflared):
    with listening() as listener:
        words = ["access", "tcp", "--hostname", "a.test", "--url", f"127.0.0.1:{port_of(listener)}", "--loglevel=info"]
        done = subprocess.run([cloudflared.path, *words], capture_output=True, text=True,
                              env={"TUNNEL_LOG_OUTPUT": "json"})
    first, second, third = done.stderr.splitlines()
    assert done.returncode == 1
    assert json.loads(first)["message"] == "Start Websocket listener"
    assert json.loads(second)["error"].endswith("bind: address already in use")
    assert third.startswith("failed to start forwarding server")


def test_the_stand_in_flushes_and_ends_both_sides_at_the_first_end(bench, cloudflared, serve):
    far = serve(lambda sock: sum(iter(lambda: len(sock.recv(65536)), 0)))
    cloudflared.far("a.test", far.address)
    cloudflared.far("b.test", serve(lambda sock: sock.sendall(b"x" * 3_000_000)).address)
    made = bench(live=True)
    with socket.create_connection(made.ready("a.test").child.address, 10) as client:
        client.sendall(b"x" * 3_000_000)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert far.result() == 3_000_000
    with socket.create_connection(made.ready("b.test").child.address, 10) as client:
        assert sum(iter(lambda: len(client.recv(65536)), 0)) == 3_000_000


def test_the_stand_in_dies_of_a_closed_log(cloudflared, free_ports):
    port = free_ports()[0]
    words = ["access", "tcp", "--hostname", "a.test", "--url", f"127.0.0.1:{port}"]
    with subprocess.Popen([cloudflared.path, *words], stderr=subprocess.PIPE) as process:
        assert b"Start Websocket listener" in process.stderr.readline()
        process.stderr.close()

        def refused() -> bool:  # it has no far end, which it logs
            with contextlib.suppress(OSError):
                ask((HOST, port))
            return process.poll() is not None

        wait_until(refused)
    assert process.returncode == -signal.SIGPIPE


def test_the_stand_in_can_stop_hang_and_ask_for_a_login(bench, cloudflared, echo_server):
    cloudflared.far("*", echo_server.address)
    cloudflared.fault("stop.test", stop=True)
    cloudflared.fault("hang.test", hang=True)
    cloudflared.fault("login.test", login=True)
    made = bench(live=True)
    child = made.ready("login.test").child
    with socket.create_connection(child.address):
        wait_until(lambda: made.table.words(child, 0.0, 0).text.startswith("Access wants a login"))
    with socket.create_connection(made.ready("hang.test").child.address) as client:
        client.sendall(b"hello")
        wait_until(lambda: cloudflared.clients("hang.test"))
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
    child = made.ready("stop.test").child
    with socket.create_connection(child.address):
        stat = pathlib.Path(f"/proc/{child.process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(") ")[2][0] == "T")  # it listens a moment before that
        wait_until(lambda: any(sniroute_ports.listeners(child.address[1]).values()))
    assert len(cloudflared.clients()) == 2
