"""Tests of sniroute_flow.py, with a router in a thread (`run`) and each way of moving bytes (`flow`)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import random
import socket
import threading
from typing import Any, Callable

import pytest

import sniroute_flow
import sniroute_loop
from conftest import wait_until
from testbed.hellos import HELLO
from testbed.running import read_all, read_exactly, reset, route


# -- bytes -------------------------------------------------------------------------------------


def test_bytes_arrive_as_they_were_sent_and_the_end_comes_behind_them(run, serve, flow):
    """8 MiB each way in pieces of any size; then the client's end, then the answer to it."""
    def digest(sock: socket.socket) -> None:
        seen = hashlib.sha256()
        while data := sock.recv(65536):
            seen.update(data)
            sock.sendall(data)
        sock.sendall(seen.digest())
    far = serve(digest)
    running = run(route(far.address))
    seeded = random.Random(7)
    payload = seeded.randbytes(8 << 20)
    received = []
    with running.connect(HELLO) as client:
        reader = threading.Thread(target=lambda: received.append(read_all(client)))
        reader.start()
        at = 0
        while at < len(payload):
            size = seeded.choice((1, 60, 1400, 16384, 100_000, 1 << 20))
            client.sendall(payload[at:at + size])
            at += size
        client.shutdown(socket.SHUT_WR)
        reader.join()
    sent = HELLO + payload
    assert received[0] == sent + hashlib.sha256(sent).digest()
    end = running.ending()
    assert (end.up, end.down, end.reason) == (len(sent), len(received[0]), "client_closed")


def test_backend_that_ends_first_is_passed_on_and_the_client_may_still_speak(run, serve, flow):
    def handler(sock: socket.socket) -> bytes:
        read_exactly(sock, len(HELLO))
        sock.sendall(b"goodbye")
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)
    far = serve(handler)
    running = run(route(far.address))
    with running.connect(HELLO) as client:
        assert read_all(client) == b"goodbye"
        client.sendall(b"one more thing")
    assert running.ending().reason == "backend_closed"
    assert far.result() == b"one more thing"


def test_client_that_resets_ends_the_backend_too(run, serve, flow):
    ended = threading.Event()
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(b"x")
        read_all(sock)
        ended.set()
    running = run(route(serve(handler).address))
    client = running.connect(HELLO)
    assert client.recv(1) == b"x"
    reset(client)
    assert running.ending().reason == "client_reset"
    assert ended.wait(10)


def test_backend_that_resets_loses_nothing_it_had_said(run, serve, flow):
    said = threading.Event()
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(b"last words")
        said.wait(10)
        reset(sock)
    running = run(route(serve(handler).address))
    with running.connect(HELLO) as client:
        assert read_exactly(client, 10) == b"last words"
        said.set()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert running.ending().reason == "backend_reset"


# -- backpressure ------------------------------------------------------------------------------


@pytest.mark.parametrize("flow, pipes", [("splice", 0), ("splice", 2), ("splice", 32), ("copy", 32), ("selectors", 32)],
                         ids=["no pipe to lend", "two pipes", "pipes for all", "copy", "selectors"], indirect=["flow"])
def test_readers_that_stop_cost_no_memory_and_lose_nothing(run, serve, flow, monkeypatch, pipes):
    """Twelve clients ask for 8 MiB each and read nothing; then they read, and all of it is there."""
    monkeypatch.setattr(sniroute_flow, "PIPES_MAX", pipes)
    monkeypatch.setattr(sniroute_flow, "PENDING_MAX", 1 << 19)
    payload = random.Random(8).randbytes(8 << 20)
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(payload)
    running = run(route(serve(handler).address))
    router = running.router
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect(HELLO)) for _ in range(12)]
        wait_until(lambda: len(router.connections) == 12 and all(
            c.state == "open" and c.down.state == "blocked" for c in list(router.connections)), what="all blocked")
        assert router.pipes.pending <= (1 << 19) + sniroute_flow.BULK + 12 * sniroute_flow.CAREFUL
        for client in clients:
            assert hashlib.sha256(read_all(client)).digest() == hashlib.sha256(payload).digest()
    running.ending(12)
    wait_until(lambda: router.pipes.pending == 0)
    assert router.pipes.bulk == sniroute_flow.BULK
    assert router.pipes.made <= max(1, pipes)


def test_backend_that_stops_reading_holds_the_client_back(run, serve, flow):
    """The other direction; when the backend goes on, every byte is there."""
    go = threading.Event()
    def handler(sock: socket.socket) -> bytes:
        go.wait(20)
        return hashlib.sha256(read_all(sock)).digest()
    far = serve(handler)
    running = run(route(far.address))
    payload = random.Random(9).randbytes(1 << 20)
    sent = hashlib.sha256(HELLO)
    with running.connect(HELLO) as client:
        client.settimeout(0.15)
        count = 0
        with contextlib.suppress(TimeoutError):
            while True:
                sent_now = client.send(payload)
                sent.update(payload[:sent_now])
                count += sent_now
                assert count < 1 << 28, "nothing holds the client back"
        go.set()
    assert far.result() == sent.digest()


# -- small reads -------------------------------------------------------------------------------


def way(flow: sniroute_flow.Flow) -> str:
    """How it moves bytes: its state, or `small` where it reads little at a time."""
    return "small" if flow.state == "open" and flow.size == sniroute_flow.SMALL_READ else flow.state


def test_a_flow_of_small_messages_makes_small_reads_until_there_is_a_larger_one(run, echo_server, flow):
    running = run(route(echo_server.address))
    payload = random.Random(5).randbytes(1 << 18)
    def say(client: socket.socket, size: int) -> str:
        sender = threading.Thread(target=client.sendall, args=(payload[:size],))
        sender.start()
        assert read_exactly(client, size) == payload[:size]
        sender.join()
        return way(connection.up)
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        [connection] = running.router.connections
        for larger in (sniroute_flow.SMALL_READ, sniroute_flow.SMALL_READ + 1, sniroute_flow.MESSAGE - 1, len(payload)):
            say(client, sniroute_flow.SMALL_READ)  # counting begins
            for _ in range(sniroute_flow.SMALL_AFTER - 1):
                assert say(client, 64) == "open"
            assert say(client, 64) == say(client, sniroute_flow.SMALL_READ - 1) == say(client, 1) == "small"
            assert say(client, larger) != "small"
            say(client, sniroute_flow.MESSAGE - 1)  # nor bulky
        for _ in range(2):  # it is counted from the beginning, each time
            states = [say(client, size) for size in [64] * sniroute_flow.SMALL_AFTER + [sniroute_flow.SMALL_READ]]
            assert states == ["open"] * (sniroute_flow.SMALL_AFTER - 1) + ["small", "open"]
    assert running.ending().down == running.ending().up


def test_flow_of_small_messages_goes_on_while_the_other_direction_is_blocked(run, serve, flow):
    """Its client does not read a download, and speaks: in small messages, larger ones, small ones."""
    download = random.Random(6).randbytes(8 << 20)
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    def server(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sender = threading.Thread(target=sock.sendall, args=(download,))
        sender.start()
        while data := sock.recv(65536):
            heard.put(data)
        sender.join()
    running = run(route(serve(server).address))
    with socket.socket() as client:
        client.settimeout(20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(running.address)
        client.sendall(HELLO)
        wait_until(lambda: running.router.connections)
        connection, = running.router.connections
        wait_until(lambda: connection.down is not None and connection.down.state is sniroute_flow.BLOCKED)
        up = connection.up
        def say(size: int) -> str:
            data, got = random.Random(size).randbytes(size), b""
            client.sendall(data)
            while len(got) < size:
                got += heard.get(timeout=20)
            assert got == data
            turned = threading.Event()
            running.router.call(turned.set)
            assert turned.wait(20)  # the server hears of a message before the loop is done with it
            return way(up)
        def chat() -> None:
            states = [say(64) for _ in range(sniroute_flow.SMALL_AFTER + 1)]
            assert states[-1] == "small" and connection.down.state == "blocked"
        for larger in (sniroute_flow.SMALL_READ, sniroute_flow.MESSAGE - 1, 70_000):
            chat()
            assert say(larger) != "small"
        chat()
        assert read_exactly(client, len(download)) == download
        assert say(64) == "small"
    running.ending()


def test_flow_of_small_messages_whose_sink_is_full_waits_and_goes_on(run, serve, flow, monkeypatch):
    """Small messages to a server that does not read: all arrive, in order, once it does."""
    held, hold = [], sniroute_flow.Flow.hold
    monkeypatch.setattr(sniroute_flow.Flow, "hold", lambda self, rest: (held.append(way(self)), hold(self, rest)))
    go = threading.Event()
    def server(sock: socket.socket) -> bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert read_exactly(sock, len(HELLO)) == HELLO
        sock.sendall(b"!")
        go.wait(20)
        heard = hashlib.sha256(read_all(sock)).digest()
        sock.sendall(b"all")
        return heard
    far = serve(server)
    running = run(route(far.address))
    said = hashlib.sha256()
    with running.connect(HELLO) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert client.recv(1) == b"!"
        connection, = running.router.connections
        up = connection.up
        def say(size: int) -> None:
            data, before = random.Random(up.total).randbytes(size), up.total
            client.sendall(data)
            said.update(data)
            wait_until(lambda: up.total > before or held)
        while way(up) != "small":
            say(64)
        connection.down.source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        while not held:
            say(sniroute_flow.SMALL_READ - 1)
        assert held == ["small"]
        go.set()
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"all"
    assert far.result() == said.digest() and running.ending().reason == "client_closed"


@pytest.mark.parametrize("size", [1, sniroute_flow.MESSAGE], ids=["small", "bulky"])
@pytest.mark.parametrize("fault", ["nothing to read", "client resets", "sink is full", "sink is gone"])
def test_flow_of_messages_of_one_size_meets_what_any_flow_does(run, serve, size, fault, caplog):
    expected = "small" if size == 1 else "bulky"
    if expected == "bulky" and not sniroute_flow.can_splice():
        pytest.skip("no splice(2) here")
    def server(sock: socket.socket) -> bytes:
        assert read_exactly(sock, len(HELLO)) == HELLO
        sock.sendall(b"!")
        assert go.wait(20)
        heard = read_all(sock)
        if fault != "client resets":
            sock.sendall(b"bye")
        return heard
    go = threading.Event()
    far = serve(server)
    running = run(route(far.address))
    with running.connect(HELLO) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert client.recv(1) == b"!"
        connection, = running.router.connections
        up, filled = connection.up, 0
        while way(up) != expected:
            before = up.total
            client.sendall(b"x" * size)
            wait_until(lambda: up.total == before + size)
        said = up.total - len(HELLO)
        def prepare() -> None:
            nonlocal filled
            if fault == "nothing to read":
                running.router.loop.poller.callbacks[up.fd](sniroute_loop.READ)
            elif fault == "sink is gone":
                connection.down.source.shutdown(socket.SHUT_WR)
            elif fault == "sink is full":
                with contextlib.suppress(BlockingIOError):
                    while True:
                        filled += os.write(connection.down.fd, b"x" * 4096)
        def in_the_loop(act: Callable[[], Any]) -> None:
            done = threading.Event()
            running.router.call(lambda: (act(), done.set()))
            assert done.wait(20)
        def say() -> None:
            nonlocal said
            said += size
            client.sendall(b"x" * size)
            wait_until(lambda: up.total == len(HELLO) + said)
            in_the_loop(lambda: None)  # it is done with that
        in_the_loop(prepare)
        if fault == "client resets":
            reset(client)
        else:
            say()
            if fault == "sink is gone":
                assert up.state is sniroute_flow.BROKEN
                said -= size
            elif fault == "sink is full":
                while up.state is not sniroute_flow.BLOCKED:  # the kernel made room meanwhile
                    in_the_loop(prepare)
                    say()
                in_the_loop(lambda: running.router.loop.poller.callbacks[connection.down.fd](sniroute_loop.WRITE))
            client.shutdown(socket.SHUT_WR)
        go.set()
        if fault != "client resets":
            assert read_all(client) == b"bye"
    reason = running.ending().reason
    assert reason == {"client resets": "client_reset", "sink is gone": "backend_reset"}.get(fault, "client_closed")
    if fault != "client resets":
        assert far.result() == b"x" * (said + filled)
    assert running.router.pipes.pending == 0 and "a fault" not in caplog.text


# -- splice ------------------------------------------------------------------------------------


def test_sink_that_breaks_while_full_gives_its_pipe_back(run, serve, flow):
    """The client resets with megabytes on the way to it."""
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        with contextlib.suppress(OSError):
            sock.sendall(bytes(32 << 20))
    running = run(route(serve(handler).address))
    for number in range(1, 4):
        client = running.connect(HELLO)
        wait_until(lambda: [c for c in list(running.router.connections) if c.down and c.down.state == "blocked"])
        reset(client)
        assert running.ending(number).reason == "client_reset"
    assert running.router.pipes.pending == 0
    assert running.router.pipes.made <= 2


def test_a_flow_that_has_much_to_move_is_spliced_and_goes_back_to_messages(run, echo_server):
    if not sniroute_flow.can_splice():
        pytest.skip("no splice here")
    running = run(route(echo_server.address))
    payload = random.Random(4).randbytes(1 << 20)
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        [connection] = running.router.connections
        for size in (1, sniroute_flow.MESSAGE - 1, sniroute_flow.MESSAGE, sniroute_flow.MESSAGE + 1, 1 << 20, 1, 64):
            sender = threading.Thread(target=client.sendall, args=(payload[:size],))
            sender.start()
            assert read_exactly(client, size) == payload[:size]
            sender.join()
            assert connection.up.state in ("open", "bulky")
            if size == sniroute_flow.MESSAGE:
                assert connection.up.state == "bulky"
        assert connection.up.state == connection.down.state == "open"
    assert running.ending().up == len(HELLO) + 3 * sniroute_flow.MESSAGE + (1 << 20) + 66


def test_a_flow_without_splice_reads_less_from_the_moment_that_much_is_kept(run, serve, monkeypatch):
    """65536 bytes at a time, and 16384 while many clients do not read."""
    monkeypatch.setattr(sniroute_flow, "can_splice", lambda: False)
    asked: list[tuple[int, int]] = []
    real = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: asked.append((fd, size)) or real(fd, size))
    def talk(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(bytes(1 << 20))
    running = run(route(serve(talk).address))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"\0"
        connection, = running.router.connections
        source = connection.down.fd
        def sizes() -> set[int]:
            read_exactly(client, 1 << 20)
            return {size for fd, size in asked if fd == source}
        wait_until(lambda: sniroute_flow.READ_MAX in sizes())
        held = threading.Event()
        def congest() -> None:
            running.router.pipes.keep(sniroute_flow.PENDING_MAX)
            asked.clear()
            held.set()
        running.router.call(congest)
        assert held.wait(20)
        wait_until(lambda: sniroute_flow.CAREFUL in sizes())
        assert max(sizes()) == sniroute_flow.CAREFUL
        reset(client)
    running.ending()


def test_pipe_that_cannot_be_replaced_is_emptied(run, echo_server, monkeypatch):
    """A sink broke with bytes in the shared pipe, and there are no descriptors for another."""
    running = run(route(echo_server.address))
    router = running.router
    if router.pipes.shared is None:
        pytest.skip("no splice(2) here")
    os.write(router.pipes.shared[1], b"somebody else's bytes")
    def short() -> None:
        raise OSError(errno.EMFILE, "Too many open files")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe", short)
        router.pipes.replace()
        assert router.pipes.lend() is None, "none is left to be shared"
    with pytest.raises(BlockingIOError):
        os.read(router.pipes.shared[0], 1)


def test_splice_is_tried_before_it_is_used(monkeypatch):
    def refused(*_: Any, **__: Any) -> int:
        raise OSError(22, "Invalid argument")
    monkeypatch.setattr(os, "splice", refused, raising=False)
    assert not sniroute_flow.can_splice()
    monkeypatch.delattr(os, "splice")
    assert not sniroute_flow.can_splice()
