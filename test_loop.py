"""Tests of sniroute_loop.py: first its parts alone, then the turn of a router that runs."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, Callable

import pytest

import sniroute_connection
import sniroute_flow
import sniroute_loop
from sniroute_loop import READ, WRITE, Watch
from conftest import wait_until
from testbed.hellos import HELLO, genuine
from testbed.running import TUNNEL, answer, read_all, read_exactly, route


# -- queues ------------------------------------------------------------------------------------


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
            assert client.recv(1) == b""
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
