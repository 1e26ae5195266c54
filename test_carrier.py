"""Tests of sniroute_carrier.py, in its order.  What the tests of all its rooms share is in testbed/carrier.py."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import pathlib
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zipfile
from typing import Any, Callable, Iterator

import pytest

import sniroute_carrier
import sniroute_names
from conftest import HERE, HOST, echo, linux, wait_until
from sniroute_carrier import Carrier
from sniroute_dial import Dial
from sniroute_edge import Target, was_reset
from sniroute_forwarder import Listener
from sniroute_loop import READ, WRITE, Watch
from sniroute_upgrade import BINARY, CHUNK, CLOSE, PING, PONG, frame
from testbed.carrier import (NOISE, PHASES, Local, Notes, beside, blocks, digest, digest_upload, echoed, end_of,
                             parallel, read_frames, receive, receive_all, send_blocks, server_frame,
                             wait_for_end, with_buffers)
from testbed.running import reset


# -- what comes through ----------------------------------------------------------------------


def test_bytes_are_carried_in_messages_that_the_far_end_takes(edge, hostname, carrier, echo_server):
    edge.far(hostname, echo_server.address)
    run = carrier(hostname)
    data = NOISE[:700_000]
    assert echoed(run, data) == data
    end = end_of(edge, hostname)
    assert end["bytes_up"] == end["bytes_down"] == len(data)
    assert end["largest_up"] <= CHUNK and not end["cut"] and end["texts"] == 0
    assert end["frames_up"] == end["messages_up"] + 1, "whole messages, and a Close"
    assert end["masks"] == end["frames_up"], "a fresh key for each"
    assert end["client_pings"] == end["unsolicited"] == 0
    assert (end["how"], end["close"]) == ("client", 1000)
    request, = edge.requests(hostname)
    assert (request["host"], request["method"], request["path"]) == (hostname, "GET", "/")
    assert (request["sni"], request["alpn"], request["tls"]) == (hostname, None, "TLSv1.3")
    assert [header[0] for header in request["headers"]] == [
        "Host", "User-Agent", "Connection", "Sec-WebSocket-Key", "Sec-WebSocket-Version", "Upgrade"]
    row, = run.ends() if run.rows("end") else [{}]
    assert row == {} or (row["up"], row["down"]) == ("700000", "700000")


def test_a_service_may_speak_first(edge, hostname, local, serve):
    edge.far(hostname, serve(lambda sock: sock.sendall(b"banner")).address)
    with local(hostname).connect() as client:
        assert receive_all(client) == (b"banner", "FIN")


@pytest.mark.parametrize("switches", [
    pytest.param({"text": True}, id="text"),
    pytest.param({"empty": True}, id="empty messages"),
    pytest.param({"fragment": 1000}, id="fragments"),
    pytest.param({"fragment": 1000, "ping": 125, "empty": True}, id="pings between fragments"),
    pytest.param({"ping": 0}, id="pings without a payload"),
    pytest.param({"frame": 1 << 20}, id="messages of 1 MiB"),
    pytest.param({"frame": 125}, id="short messages"),
    pytest.param({"frame": 65535}, id="16-bit lengths"),
    pytest.param({"drip": True, "ping": 3, "fragment": 5}, id="byte by byte"),
    pytest.param({"together": True}, id="in one record with the answer"),
    pytest.param({"tls_max": "1.2"}, id="TLS 1.2"),
])
def test_shapes_of_what_comes_down(edge, hostname, local, serve, switches):
    edge.fault(hostname, **switches)
    data = NOISE[:40_000 if switches.get("fragment") == 5 or switches.get("frame") == 125 else len(NOISE)]
    edge.far(hostname, serve(lambda sock: sock.sendall(data)).address)
    with local(hostname).connect() as client:
        assert receive_all(client) == (data, "FIN")
    end = end_of(edge, hostname)
    assert (end["how"], end["close"], end["client_pings"], end["unsolicited"]) == ("origin", 1000, 0, 0)
    assert "ping" not in switches or end["pings"] > 0


def test_pings_are_answered_between_whole_frames(edge, hostname, local, echo_server):
    """The edge understands every frame, and finds the payload of its Pings in the Pongs."""
    edge.fault(hostname, ping=100, ping_every=1)
    edge.far(hostname, echo_server.address)
    run = local(hostname)
    data = NOISE * 4
    with run.connect() as client:
        with beside(lambda: client.sendall(data)):
            assert receive(client, len(data)) == data
        client.sendall(b"last")
        assert receive(client, 4) == b"last"
    end = end_of(edge, hostname)
    assert end["pongs"] > 0 and end["unsolicited"] == 0 and (end["how"], end["close"]) == ("client", 1000)
    assert end["bytes_up"] == len(data) + 4 and end["frames_up"] == end["messages_up"] + end["pongs"] + 1


def test_an_idle_connection_answers_each_ping(edge, hostname, local, echo_server, monkeypatch):
    """One at a time: of several that a busy host hands over at once, the last is answered."""
    edge.fault(hostname, ping=4, ping_every=20, ping_waits=True)
    edge.far(hostname, echo_server.address)
    made: list[int] = []
    monkeypatch.setattr(sniroute_carrier, "frame", lambda opcode, data: made.append(opcode) or frame(opcode, data))
    with local(hostname).connect() as client:
        client.sendall(b"x")
        receive(client, 1)
        wait_until(lambda: made.count(PONG) >= 8, what="some pings")
        client.sendall(b"y")
        receive(client, 1)
    end = end_of(edge, hostname)
    assert end["pongs"] >= end["pings"] - 1 >= 3 and end["unsolicited"] == 0


def test_64_mib_up(edge, hostname, carrier, serve):
    edge.far(hostname, serve(digest_upload).address)
    run = carrier(hostname)
    with run.connect() as client:
        client.sendall((64 << 20).to_bytes(8, "big"))
        for block in blocks(64):
            client.sendall(block)
        assert receive(client, 32) == digest(64)
    end = end_of(edge, hostname)
    assert not end["cut"] and end["masks"] == 1000


def test_64_mib_down(edge, hostname, carrier, serve):
    edge.far(hostname, serve(send_blocks(64)).address)
    run = carrier(hostname)
    whole, size = hashlib.sha256(), 0
    with run.connect() as client:
        while data := client.recv(1 << 20):
            whole.update(data)
            size += len(data)
    assert (size, whole.digest()) == (64 << 20, digest(64))


def test_both_ways_at_once_byte_for_byte(edge, hostname, local, serve):
    def backend(sock: socket.socket) -> bytes:
        with beside(lambda: send_blocks(6)(sock)):
            return receive(sock, 6 << 20)

    far = serve(backend)
    edge.far(hostname, far.address)
    edge.fault(hostname, fragment=5000, ping=7)
    data = NOISE * 6
    with local(hostname).connect() as client, beside(lambda: client.sendall(data)):
        answer = receive_all(client)
    assert answer == (b"".join(blocks(6)), "FIN") and far.result() == data


def test_200_connections_at_once(edge, hostname, carrier, single_loop_echo):
    edge.far(hostname, single_loop_echo)
    run = carrier(hostname)
    payloads = [number.to_bytes(4, "big") + NOISE[number:number + (128 << 10)] for number in range(200)]
    answers = parallel(run.address, payloads)
    assert [got == sent for got, sent in zip(answers, payloads)] == [True] * 200
    wait_until(lambda: len(edge.ends(hostname)) == 200)
    assert {(end["how"], end["cut"]) for end in edge.ends(hostname)} == {("client", False)}


def test_what_is_set_on_both_legs(edge, hostname, local, echo_server):
    edge.far(hostname, echo_server.address)
    run = local(hostname)
    with run.connect():
        run.reaches("open")
        connection, = run.carrier.connections
        for sock in (connection.client, connection.edge):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 9)):
                if hasattr(socket, option):
                    assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, option)) == value, option
            assert not sock.getblocking()


# -- backpressure ----------------------------------------------------------------------------


def sleeps(pid: int) -> bool:
    """Whether no thread of a process wants a processor.  One that a busy host lets wait does."""
    with contextlib.suppress(OSError):  # one of them has just ended
        return {pathlib.Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(") ")[2][0]
                for task in os.listdir(f"/proc/{pid}/task")} == {"S"}
    return False


def settled(count: Callable[[], int], *pids: int) -> int:
    """A count, once it has not moved for a while, in which these processes had nothing to do."""
    deadline, last, looks = time.monotonic() + 20, -1, 0
    while looks < 11:
        assert time.monotonic() < deadline
        now = count()
        looks = looks + 1 if now == last and all(map(sleeps, pids)) else 0
        last = now
        time.sleep(0.02)
    return last


@linux
def test_an_edge_that_does_not_read_stops_the_client_and_costs_nothing(edge, hostname, carrier, echo_server):
    edge.far(hostname, echo_server.address)
    run = carrier(hostname)
    assert echoed(run) == b"hello"
    edge.fault(hostname, slow_reads=True)
    sent = 0
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(run.connect()) for _ in range(4)]
        memory = run.memory()

        def push() -> int:
            nonlocal sent
            for client in clients:
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent += client.send(NOISE)
            return sent

        assert settled(push, run.pid) > 4 << 16
        cpu = run.cpu()
        assert settled(push) == sent
        assert run.cpu() - cpu <= 0.05, "it spins"
        assert run.memory() - memory < 8192


@linux
def test_a_client_that_does_not_read_stops_the_service_and_loses_nothing(edge, hostname, carrier, serve):
    sent = 0

    def far(sock: socket.socket) -> None:
        nonlocal sent
        for block in blocks(256):
            for at in range(0, len(block), 1 << 16):
                sent += sock.send(block[at:at + (1 << 16)])

    edge.far(hostname, serve(far).address)
    run = carrier(hostname)
    with run.connect() as client:
        assert receive(client, 8) == bytes(8)
        memory = run.memory()
        assert settled(lambda: sent, edge.process.pid, run.pid) < 100 << 20
        cpu = run.cpu()
        time.sleep(0.3)
        assert run.cpu() - cpu <= 0.05, "it spins"
        assert run.memory() - memory < 8192
        expected = b"".join(blocks(24))
        assert receive(client, (24 << 20) - 8) == expected[8:]


def was_cut(end: dict[str, Any]) -> bool:
    """Whether the edge saw a client that broke off: no Close, no close_notify.  A write may have taken the reset."""
    return (end["how"], end["close"]) == ("client", 1006) and end["left"] in ("reset", "eof")


# -- who leaves early ------------------------------------------------------------------------


@pytest.mark.parametrize("switches, phase", PHASES)
@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["FIN", "RST"])
def test_a_client_that_leaves_while_we_dial_is_dropped_at_once(edge, hostname, local, switches, phase, leave):
    edge.far(hostname, edge.proxy)
    edge.fault(hostname, **switches)
    run = local(hostname)
    client = run.connect()
    run.reaches(phase)
    wait_until(lambda: edge.proxied(hostname))
    leave(client)
    run.reaches()
    wait_until(lambda: edge.ends(hostname) or edge.lines("proxy.jsonl", hostname)[-1]["event"] == "end", timeout=2)
    assert not run.rows("failed")


@linux
def test_clients_that_leave_take_their_descriptors_along(edge, hostname, carrier):
    edge.far(hostname, edge.proxy)
    run = carrier(hostname)
    edge.fault(hostname, hang="tls")
    with run.connect() as client:
        wait_until(lambda: edge.accepted(hostname))
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == (b"", "FIN"), "it closes the client's socket behind the edge's"
    edge.fault(hostname, hang="upgrade")
    wait_until(lambda: edge.ends(hostname))
    before = run.fds()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(run.connect())
        wait_until(lambda: len(edge.requests(hostname)) == 20)
        assert run.fds() == before + 40
    wait_until(lambda: run.fds() == before, what="the descriptors")
    wait_until(lambda: len(edge.ends(hostname)) == 21)
    assert run.memory() < 64 << 10 and not run.rows("failed")


def test_a_port_probe_costs_no_upgrade(edge, hostname, local, echo_server):
    edge.far(hostname, echo_server.address)
    edge.fault(hostname, hang="accept")  # the edge is slow enough to see who has left
    run = local(hostname)
    for leave in (socket.socket.close, reset) * 5:
        with contextlib.suppress(ConnectionResetError):
            leave(run.connect())
    run.reaches()
    edge.fault(hostname)
    assert echoed(run) == b"hello"
    assert len(edge.requests(hostname)) == echo_server.accepted == 1


def test_a_client_that_has_gone_before_it_is_accepted(local, deaf):
    """The kernel hands out such a socket; whatever is done with it fails."""
    run = local("{}:{}".format(*deaf), proxy=False)
    for _ in range(20):
        with contextlib.suppress(ConnectionResetError):  # the carrier was faster
            reset(run.connect())
    run.reaches()


@pytest.mark.parametrize("size", [1, 60_000])
def test_an_upload_that_ends_while_we_dial_is_delivered(edge, hostname, local, echo_server, size):
    edge.far(hostname, echo_server.address)
    edge.fault(hostname, delay=100)
    with local(hostname, GRACE=2.0).connect() as client:
        client.sendall(NOISE[:size])
        client.shutdown(socket.SHUT_WR)
        assert receive(client, size) == NOISE[:size]


def test_a_large_upload_waits_in_the_kernel_while_we_dial(edge, hostname, local, serve):
    def far(sock: socket.socket) -> None:
        looked.wait(10)
        sock.sendall(b"!")  # the edge's answer waits for that
        digest_upload(sock)

    looked = threading.Event()
    edge.far(hostname, serve(far).address)
    edge.fault(hostname, together=True)
    run = local(hostname)
    with run.connect() as client:
        with beside(lambda: client.sendall((4 << 20).to_bytes(8, "big") + b"".join(blocks(4)))):
            run.reaches("upgrade")
            connection, = run.carrier.connections
            assert len(connection.early) <= sniroute_carrier.EARLY_MAX
            looked.set()
            assert receive(client, 33) == b"!" + digest(4)


def test_an_upload_that_cannot_be_delivered_is_a_failure(edge, hostname, local):
    """Its client has ended, and would take FIN for success."""
    edge.fault(hostname, hang="upgrade")
    with local(hostname, LINGER=0.15).connect() as client:
        client.sendall(b"hello")
        wait_until(lambda: edge.requests(hostname))  # it may take longer than we linger
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == (b"", "RST")


def test_the_log_of_an_upload_that_cannot_be_delivered(edge, hostname, local):
    edge.fault(hostname, hang="upgrade")
    run = local(hostname, LINGER=0.15)
    with run.connect() as client:
        client.sendall(b"hello")
        run.reaches("upgrade")
        client.shutdown(socket.SHUT_WR)
        row = run.failure()
    assert (row["reason"], row["error"]) == ("timeout", "0.15 s after the client's end, upgrade")


# -- the end ---------------------------------------------------------------------------------


def test_an_upload_arrives_whole(edge, hostname, local, serve):
    """Nothing comes down: the grace, then Close 1000, and only behind the last byte."""
    far = serve(lambda sock: receive_all(sock)[0])
    edge.far(hostname, far.address)
    run = local(hostname)
    data = NOISE * 4
    with run.connect() as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == (b"", "FIN")
    end = end_of(edge, hostname)
    assert far.result() == data
    assert (end["how"], end["close"], end["bytes_up"]) == ("client", 1000, len(data))


def test_an_upload_arrives_whole_while_data_comes_down(edge, hostname, local, serve):
    """6 of 6: a close with unread bytes would reset, and destroy the last megabytes."""
    def backend(sock: socket.socket) -> bytes:
        with beside(lambda: send_blocks(2)(sock)):
            return hashlib.sha256(receive(sock, 5 << 20)).digest()

    far = serve(backend)
    edge.far(hostname, far.address)
    edge.fault(hostname, frame=1000)
    run = local(hostname, GRACE=20.0)  # what a busy host may make the far end pause is no silence
    data = NOISE * 4
    expected = hashlib.sha256(data).digest()
    down = b"".join(blocks(2))

    def upload() -> None:
        with run.connect() as client:
            def send() -> None:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)

            with beside(send):
                assert receive(client, len(down)) == down
            run.reaches("half")
            run.carrier.loop.call(lambda: [connection.on_grace() for connection in run.carrier.connections.copy()])
            assert receive_all(client) == (b"", "FIN")

    for _ in range(6):
        upload()
    assert [far.result() for _ in range(6)] == [expected] * 6


def test_an_upload_arrives_whole_from_a_client_that_does_not_listen(edge, hostname, local, serve):
    """It closes with bytes unread, which resets it; what it had sent still counts."""
    def backend(sock: socket.socket) -> bytes:
        sock.sendall(NOISE)
        return receive_all(sock)[0]

    far = serve(backend)
    edge.far(hostname, far.address)
    run = local(hostname)
    client = run.connect()
    client.sendall(NOISE[:100_000])
    assert receive(client, 10) == NOISE[:10]
    wait_until(lambda: [connection.up for connection in run.carrier.connections.copy()] == [100_000])
    client.close()
    assert far.result() == NOISE[:100_000]
    assert was_cut(end_of(edge, hostname))


def test_a_request_and_its_end_get_their_answer(edge, hostname, local, serve):
    """As `nc -N` does it: there is no half-close on the wire, so Close waits for the answer."""
    def far(sock: socket.socket) -> None:
        assert receive(sock, 7) == b"request"
        for at in range(0, len(NOISE), 1 << 18):
            go.acquire(timeout=10)
            sock.sendall(NOISE[at:at + (1 << 18)])
        assert receive_all(sock)[0] == b""
        done.set()

    def note_end() -> None:
        """When the grace is over, unless more comes."""
        ends.append(next(iter(run.carrier.graced.due.values())))

    go, done, ends = threading.Semaphore(0), threading.Event(), []
    edge.far(hostname, serve(far).address)
    run = local(hostname, GRACE=20.0)
    with run.connect() as client:
        client.sendall(b"request")
        client.shutdown(socket.SHUT_WR)
        run.reaches("half")
        for at in range(0, len(NOISE), 1 << 18):
            run.carrier.loop.call(note_end)
            wait_until(lambda: len(ends) == 1 + at // (1 << 18))
            go.release()
            assert receive(client, 1 << 18) == NOISE[at:at + (1 << 18)]
        run.carrier.loop.call(lambda: (note_end(), next(iter(run.carrier.connections)).on_grace()))
        assert receive_all(client) == (b"", "FIN")
    assert len(ends) == 5 and ends == sorted(set(ends)), "the grace begins anew with each part"
    assert done.wait(5) and end_of(edge, hostname)["close"] == 1000


def test_a_client_that_has_ended_and_reads_slowly_gets_everything(edge, hostname, local, serve):
    edge.far(hostname, serve(send_blocks(16)).address)
    run = local(hostname, GRACE=20.0, LINGER=0.1)  # what a busy host may make the far end pause is no silence
    graces: list[bool] = []
    run.carrier.graced.act = lambda connection: (graces.append(bool(connection.rest)), connection.on_grace())

    def last(seconds: float) -> None:
        """Let the grace be so long from now on."""
        run.carrier.graced.seconds = seconds
        run.carrier.graced.put(connection)

    with run.connect() as client:
        assert receive(client, 8) == bytes(8)
        client.shutdown(socket.SHUT_WR)
        run.reaches("half")
        connection, = run.carrier.connections
        wait_until(lambda: connection.rest and settled(lambda: connection.down) and connection.rest)
        run.carrier.loop.call(lambda: last(0.05))
        wait_until(lambda: len(graces) >= 3)
        run.carrier.loop.call(lambda: last(20.0))
        wait_until(lambda: run.carrier.graced.seconds == 20.0)
        assert all(graces) and run.states() == ["half"]
        whole = hashlib.sha256(bytes(8))
        while data := client.recv(1 << 18):
            whole.update(data)
            time.sleep(0.005)
        assert whole.digest() == digest(16)


@pytest.mark.parametrize("no_close", [False, True], ids=["Close", "no Close"])
def test_the_service_ends_first(edge, hostname, local, serve, no_close):
    """The client gets everything, and then FIN, even while it is sending."""
    def far(sock: socket.socket) -> None:
        receive(sock, 1 << 16)
        send_blocks(4)(sock)
        sock.shutdown(socket.SHUT_WR)
        receive_all(sock)

    edge.far(hostname, serve(far).address)
    edge.fault(hostname, **({"no_close": True} if no_close else {}))
    with local(hostname).connect() as client, beside(lambda: [client.sendall(NOISE) for _ in range(1000)]):
        assert receive(client, 4 << 20) == b"".join(blocks(4))
        assert client.recv(1) == b"", "FIN"
        client.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("code, how", [(1000, "FIN"), (0, "FIN"), (1001, "RST"), (1011, "RST"), (4999, "RST")])
def test_a_close_is_answered_with_its_code_and_is_an_end_only_where_it_says_so(edge, hostname, local, echo_server, code,
                                                                               how):
    edge.far(hostname, echo_server.address)
    edge.fault(hostname, close=code, close_reason="going away" if code else "", close_after=5)
    with local(hostname).connect() as client:
        client.sendall(b"hello")
        assert receive_all(client) == (b"hello", how)
    end = end_of(edge, hostname)
    assert (end["how"], end["close"]) == ("fault", code or 1005)


@pytest.mark.parametrize("size", [0, 1, 3 << 20])
def test_an_edge_that_resets(edge, hostname, local, serve, size):
    """The client gets what came, and then RST."""
    data = (NOISE * 3)[:size]
    edge.far(hostname, serve(lambda sock: sock.sendall(data) or sock.recv(1)).address)
    edge.fault(hostname, rst="open", rst_after=size)
    run = local(hostname)
    with contextlib.suppress(ConnectionResetError) if not size else contextlib.nullcontext():
        with run.connect() as client:
            assert receive_all(client) == (data, "RST")
    assert len(run.rows("reset")) == 1 or not size


def test_a_slow_client_gets_what_came_before_the_reset(edge, hostname, local, serve):
    """A reset destroys what is still under way to the client, so it waits until nothing is."""
    data = NOISE
    edge.far(hostname, serve(lambda sock: sock.sendall(data) or sock.recv(1)).address)
    edge.fault(hostname, rst="open", rst_after=len(data))
    run = local(hostname)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.settimeout(10)
        client.connect(run.address)
        assert receive(client, 1 << 16) == data[:1 << 16]
        run.reaches("ending")
        assert receive_all(client) == (data[1 << 16:], "RST")


def test_a_client_that_never_reads_is_reset_in_the_end(edge, hostname, local, serve):
    edge.far(hostname, serve(lambda sock: sock.sendall(NOISE[:500_000]) or sock.recv(1)).address)
    edge.fault(hostname, rst="open", rst_after=500_000)
    run = local(hostname, LINGER=0.1, SETTLE=0.01)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        client.connect(run.address)
        run.ends()
        assert receive_all(client)[1] == "RST"


def test_an_edge_that_ends_tls_in_the_middle_is_a_reset(edge, hostname, local, serve):
    """Without a close_notify (RFC 8446 section 6.1), anybody on the way may have cut it."""
    edge.far(hostname, serve(lambda sock: sock.sendall(NOISE) or sock.recv(1)).address)
    edge.fault(hostname, eof="open", eof_after=len(NOISE))
    with local(hostname).connect() as client:
        assert receive_all(client) == (NOISE, "RST")


@pytest.mark.parametrize("kind", ["rsv", "masked", "opcode", "long_control", "fragmented_control", "continuation",
                                  "close_1"])
def test_an_edge_that_breaks_the_rules(edge, hostname, local, echo_server, kind):
    edge.far(hostname, echo_server.address)
    edge.fault(hostname, bad_frame=kind, bad_after=5)
    run = local(hostname)
    with run.connect() as client:
        client.sendall(b"hello")
        received, end = receive_all(client)
    assert end == "RST" and received in (b"", b"hello")
    assert end_of(edge, hostname)["close"] == 1002
    row, = run.rows("broken")
    assert row["reason"] == "other" and row["error"]


@pytest.mark.parametrize("stream, received, frames", [
    pytest.param(server_frame(BINARY, b"half", fin=False) + server_frame(CLOSE, b"\x03\xe9"), (b"half", "RST"),
                 [(CLOSE, b"\x03\xe9")], id="a Close within a message"),
    pytest.param(server_frame(BINARY, b"whole") + server_frame(CLOSE, b"\x03\xe8bye") + b"\xff" * 100,
                 (b"whole", "FIN"), [(CLOSE, b"\x03\xe8")], id="garbage behind a Close"),
    pytest.param(server_frame(BINARY, b"x" * 100)[:50], (b"x" * 48, "RST"), [], id="an end within a frame"),
    pytest.param(server_frame(PING, b"1") + server_frame(PING, b"2") + server_frame(PING, b"3")
                 + server_frame(CLOSE, b""), (b"", "FIN"), [(CLOSE, b"")], id="Pings and a Close"),
    pytest.param(server_frame(BINARY, b"") * 3000 + server_frame(BINARY, b"x") * 3000 + server_frame(CLOSE, b""),
                 (b"x" * 3000, "FIN"), [(CLOSE, b"")], id="many tiny messages"),
])
def test_ends_that_no_connector_makes(local, raw_edge, stream, received, frames):
    said: list[tuple[int, bytes]] = []
    ended = threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        try:
            tls.sendall(stream)
            if not frames:
                tls.unwrap()
            read_frames(tls, said)
        finally:
            ended.set()

    with local(raw_edge(script), proxy=False).connect() as client:
        assert receive_all(client) == received
    assert ended.wait(5) and said == frames


def test_of_many_pings_the_last_is_answered(local, raw_edge):
    said: list[tuple[int, bytes]] = []

    def script(tls: ssl.SSLSocket) -> None:
        tls.sendall(b"".join(server_frame(PING, bytes([number])) for number in range(20)))
        read_frames(tls, said)

    with local(raw_edge(script), proxy=False).connect():
        wait_until(lambda: said)
    assert (PONG, b"\x13") in said and all(opcode == PONG for opcode, _ in said[:1])


def test_no_pong_follows_our_close(local, raw_edge):
    """What is behind a Close nobody reads; the edge may take it for an error."""
    said: list[tuple[int, bytes]] = []
    closed, ended = threading.Event(), threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        data = b""
        while len(data) < 8:
            data += tls.recv(8)
        closed.set()
        tls.sendall(server_frame(PING, b"1") + server_frame(BINARY, b"late") + server_frame(CLOSE, b"\x03\xe8"))
        read_frames(tls, said)
        ended.set()

    run = local(raw_edge(script), proxy=False, GRACE=0.02)
    with run.connect() as client:
        client.shutdown(socket.SHUT_WR) if run.reaches("open") is None else None
        assert receive_all(client) == (b"late", "FIN")
    assert closed.is_set() and ended.wait(5) and said == []


def test_a_client_that_resets_while_data_comes_down(edge, hostname, local, serve):
    def far(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            send_blocks(1000)(sock)
        gone.set()

    gone = threading.Event()
    edge.far(hostname, serve(far).address)
    run = local(hostname)
    client = run.connect()
    receive(client, 1000)
    reset(client)
    run.reaches()
    assert gone.wait(10)
    assert was_cut(end_of(edge, hostname))


def test_a_client_that_resets_while_nothing_happens(edge, hostname, local, echo_server):
    edge.far(hostname, echo_server.address)
    run = local(hostname, GRACE=60.0)
    client = run.connect()
    run.reaches("open")
    reset(client)
    run.reaches()
    assert was_cut(end_of(edge, hostname))


def test_a_client_that_resets_while_its_answer_comes(local, raw_edge):
    """It has ended, then it goes: the grace ends with it."""
    go, frames = threading.Event(), []

    def script(tls: ssl.SSLSocket) -> None:
        go.wait(10)
        while run.states() == ["half"]:
            tls.sendall(server_frame(BINARY, b"answer"))
            time.sleep(0.01)
        read_frames(tls, frames, last=CLOSE)

    run = local(raw_edge(script), proxy=False, GRACE=60.0, LINGER=60.0)
    client = run.connect()
    client.shutdown(socket.SHUT_WR) if run.reaches("open") is None else None
    run.reaches("half")
    client.close()
    go.set()
    run.reaches()
    wait_until(lambda: frames)
    assert frames == [(CLOSE, b"\x03\xe8")]


def test_an_edge_that_never_answers_a_close_is_left(local, raw_edge):
    left = threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        with contextlib.suppress(OSError):
            wait_for_end(tls)
        left.set()

    run = local(raw_edge(script), proxy=False, GRACE=0.05, LINGER=0.1)
    with run.connect() as client:
        client.shutdown(socket.SHUT_WR) if run.reaches("open") is None else None
        assert receive_all(client) == (b"", "FIN")
        run.reaches()
    assert left.wait(5)


def test_a_client_that_never_ends_is_left(edge, hostname, local, serve):
    edge.far(hostname, serve(lambda sock: sock.sendall(b"bye")).address)
    run = local(hostname, LINGER=0.1)
    with run.connect() as client:
        assert receive_all(client) == (b"bye", "FIN")
        run.ends()


def test_a_slow_edge_gets_a_whole_upload_though_it_takes_longer_than_we_linger(local, raw_edge):
    """What the kernel holds when the client has ended is still on its way."""
    frames: list[tuple[int, bytes]] = []
    ended = threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        paced = tls.recv

        def recv(size: int) -> bytes:
            time.sleep(0.005)
            return paced(size)

        tls.recv = recv
        with contextlib.suppress(OSError):
            read_frames(tls, frames)
        ended.set()

    run = local(raw_edge(script), proxy=False, GRACE=0.02, LINGER=0.1)
    with run.connect() as client:
        client.sendall(NOISE)
        client.shutdown(socket.SHUT_WR)
        assert ended.wait(20)
    assert b"".join(data for opcode, data in frames if opcode == BINARY) == NOISE
    assert frames[-1] == (CLOSE, b"\x03\xe8")


def test_an_edge_that_stops_reading_an_upload_is_left(local, raw_edge):
    stop = threading.Event()
    run = local(raw_edge(lambda tls: stop.wait(20)), proxy=False, GRACE=0.02, LINGER=0.1)
    with run.connect() as client:
        client.sendall(NOISE[:200_000])
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client)[0] == b""
        run.reaches()
    stop.set()


def test_one_connection_that_is_busy_leaves_the_others_their_turn(edge, hostname, local, serve):
    def far(sock: socket.socket) -> None:
        if receive(sock, 4) == b"echo":
            echo(sock)
        else:
            receive_all(sock)

    edge.far(hostname, serve(far).address)
    run = local(hostname)
    stop = threading.Event()

    def flood(client: socket.socket) -> None:
        while not stop.is_set():
            client.sendall(NOISE[:1 << 16])

    with run.connect() as busy, run.connect() as quiet, beside(lambda: flood(busy)):
        quiet.sendall(b"echo")
        for number in range(20):
            quiet.sendall(bytes([number]))
            assert receive(quiet, 1) == bytes([number])
        stop.set()


@pytest.mark.parametrize("leave", [False, True], ids=["reads", "resets"])
def test_last_bytes_that_the_client_does_not_take_at_once(local, raw_edge, monkeypatch, leave):
    with_buffers(monkeypatch, SO_SNDBUF=4096, SO_RCVBUF=1 << 20)
    data = NOISE[:120_000]
    holding, sent = threading.Event(), threading.Event()

    def script(tls: ssl.SSLSocket) -> None:
        holding.wait(10)
        tls.sendall(server_frame(BINARY, data) + server_frame(CLOSE, b""))
        wait_until(lambda: not sniroute_carrier.unsent(tls), what="it has arrived")
        sent.set()
        tls.recv(99)

    run = local(raw_edge(script), proxy=False)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(run.address)
        run.reaches("open")
        run.carrier.loop.call(lambda: (holding.set(), sent.wait(10)))  # what is read at once includes the Close
        run.reaches("ending")
        if leave:
            reset(client)
        else:
            assert receive_all(client) == (data, "FIN")
    run.reaches()


def test_a_client_that_resets_after_the_service_has_ended(edge, hostname, local, serve):
    edge.far(hostname, serve(lambda sock: sock.sendall(b"bye")).address)
    run = local(hostname, LINGER=60.0)
    with run.connect() as client:
        assert receive_all(client) == (b"bye", "FIN")
        client.sendall(b"more")
        run.reaches("ending")
        reset(client)
        run.reaches()


class Stuck(socket.socket):
    """An edge that takes nothing more."""

    def send(self, *_: Any) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@contextlib.contextmanager
def bare(state: str) -> Iterator[tuple[sniroute_carrier.Connection, socket.socket]]:
    """A connection in this state without a loop, whose edge takes nothing; and its client."""
    carrier = Carrier(Notes(), [], None, "")
    with socket.create_server((HOST, 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        inner, outer = socket.socketpair()
        connection = sniroute_carrier.Connection(
            carrier, Listener(Target("app", 443, "/"), listener), listener.accept()[0], "")
        carrier.connections.add(connection)
        sniroute_carrier.set_options(connection.client)
        connection.edge = Stuck(fileno=inner.detach())
        connection.edge_watch = Watch(carrier.loop.poller, connection.edge.fileno())
        connection.state = state
        try:
            with outer:
                yield connection, client
        finally:
            connection.close()
            carrier.loop.stop()
            carrier.run()


def test_a_fault_on_the_way_out_lets_the_client_go_all_the_same(monkeypatch):
    with bare("dialling") as (connection, client):
        connection.dial = Dial(connection.carrier.way, "app", 443, connection.on_dialled)
        monkeypatch.setattr(Dial, "cancel", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            connection.close()
        assert connection not in connection.carrier.connections and receive_all(client) == (b"", "FIN")
        connection.edge.close()


@linux
@pytest.mark.parametrize("leaves", [True, False], ids=["and leaves", "and stays"])
def test_a_client_of_an_edge_that_takes_nothing(edge, hostname, local, leaves, echo_server):
    """While its bytes are not taken nobody listens to it: whether it is still there is asked now and then."""
    edge.far(hostname, echo_server.address)
    edge.fault(hostname, slow_reads=True)
    run = local(hostname, STALL=0.1, LINGER=0.2)
    client = run.connect()
    with client:
        client.setblocking(False)
        carried = [0]
        def full() -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.send(bytes(1 << 20))
            carried.append(sum(each.up for each in run.carrier.connections.copy() if each.out))
            return run.states() == ["open"] and carried[-1] > 0 and len(set(carried[-20:])) == 1
        wait_until(full)
        connection, = run.carrier.connections
        if leaves:
            reset(client)  # the end of one that only closes comes behind its bytes: keepalive sees to it
            run.reaches()
        else:
            wait_until(lambda: connection.stalled_at[0] == connection.up)
            connection.stalled_at = connection.up, -1
            wait_until(lambda: connection.stalled_at[1] != -1, what="another look")
            assert run.states() == ["open"]


@pytest.mark.parametrize("act", [
    pytest.param(lambda connection: connection.pump_up(), id="a message"),
    pytest.param(lambda connection: connection._take(memoryview(server_frame(PING, b""))), id="a Pong"),
])
def test_an_edge_that_takes_nothing_more(act):
    with bare("open") as (connection, client):
        client.sendall(b"hello")
        assert select.select([connection.client], [], [], 10)[0]
        act(connection)
        assert connection.state == "draining" and connection in connection.carrier.lingering.due
        assert not connection.out and connection.pong is None and not connection.carrier.graced.due
        for _ in range(2):  # who tries again does no harm
            act(connection)
        assert connection.state == "draining"
        connection.on_linger()
        assert connection.state == "closed" and len([row for row in connection.carrier.log.rows
                                                     if row["event"] == "reset"]) == 1
        assert receive_all(client) == (b"", "RST")


def test_an_edge_that_does_not_take_our_close():
    """The client had ended, and gets no reset for that."""
    for act in ("_leave", "close"):
        with bare("half") as (connection, client):
            connection._say_close(b"")
            getattr(connection, act)()
            assert connection.state == ("closed" if act == "close" else "leaving") and not connection.out
            if act == "_leave":  # it may still have said something
                connection.on_linger()
            assert connection.state == "closed" and receive_all(client) == (b"", "FIN")


def test_what_an_edge_says_that_takes_nothing_gives_it_time():
    with bare("draining") as (connection, client):
        for said in (b"late", b"later"):
            connection.carrier.lingering.due[connection] = 0.0
            connection._take(memoryview(server_frame(BINARY, said)))
            assert connection.carrier.lingering.due[connection] > time.monotonic()
            assert receive(client, len(said)) == said
        connection.carrier.lingering.due[connection] = 0.0
        connection._take(memoryview(server_frame(PING, b"") + server_frame(BINARY, b"")))
        assert connection.carrier.lingering.due[connection] == 0.0 and connection.pong is None
        connection._take(memoryview(server_frame(CLOSE, b"\x03\xe8")))
        assert connection.state == "ending" and receive_all(client) == (b"", "FIN")


LAST = NOISE[:140_000]  # more than the carrier reads in one go, and as much as the kernel holds
keeps_what_came = pytest.mark.skipif(sys.platform != "linux", reason="there, a reset destroys what came before it")


class Refused:
    """The edge says something and resets; the carrier, which was busy, finds first that it cannot send."""

    def __init__(self, raw_edge: Callable[..., str], monkeypatch: pytest.MonkeyPatch, stream: bytes):
        with_buffers(monkeypatch, SO_RCVBUF=1 << 20)
        self.stream = stream
        self.go = threading.Event()
        self.hostname = raw_edge(self.script)
        self.states: list[str] = []

    def script(self, tls: ssl.SSLSocket) -> None:
        self.go.wait(10)
        tls.sendall(self.stream)
        wait_until(lambda: not sniroute_carrier.unsent(tls), what="it has arrived")
        tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def happen(self, run: Local, upload: Callable[[], Any] = lambda: None) -> None:
        """In the loop."""
        def act() -> None:
            connection, = run.carrier.connections
            self.states.append(connection.state)
            self.go.set()
            wait_until(lambda: was_reset(connection.edge))
            upload()
            select.select([connection.client], [], [], 10)
            if connection.state == "open":
                connection.on_client(READ)
            else:
                connection.on_edge(READ)
            self.states.append(connection.state)

        run.carrier.loop.call(act)


@keeps_what_came
@pytest.mark.parametrize("behind, end", [
    pytest.param(server_frame(CLOSE, b"\x03\xe8"), "FIN", id="Close"),
    pytest.param(b"", "RST", id="no Close"),
    pytest.param(server_frame(BINARY, b"x")[:2], "RST", id="half a frame"),
])
@pytest.mark.parametrize("phase", ["open", "half"])
def test_an_edge_that_resets_while_we_send_has_said_what_it_has_said(local, raw_edge, monkeypatch, phase, behind, end):
    """An upload that nobody takes any more, or a Pong, loses nothing of what came before."""
    far = Refused(raw_edge, monkeypatch, server_frame(PING, b"1") + server_frame(BINARY, LAST) + behind)
    run = local(far.hostname, proxy=False, GRACE=60.0, LINGER=60.0)
    with run.connect() as client:
        run.reaches("open")
        if phase == "half":
            client.shutdown(socket.SHUT_WR)
            run.reaches("half")
        far.happen(run, lambda: client.sendall(NOISE[:1 << 16]) if phase == "open" else None)
        assert receive_all(client) == (LAST, end)
        assert far.states == [phase, "draining"]
        assert len(run.rows("reset")) == (end == "RST")
    run.reaches()
    assert not run.rows("broken") and not run.rows("failed")


@keeps_what_came
def test_a_slow_client_gets_what_an_edge_said_that_takes_nothing_more(local, raw_edge, monkeypatch):
    """It may take longer than we linger."""
    with_buffers(monkeypatch, SO_SNDBUF=4096)
    far = Refused(raw_edge, monkeypatch, server_frame(BINARY, LAST) + server_frame(CLOSE, b"\x03\xe8"))
    run = local(far.hostname, proxy=False, LINGER=0.05)
    lingered = []
    run.carrier.lingering.act = lambda connection: (lingered.append(connection.state), connection.on_linger())
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(run.address)
        run.reaches("open")
        far.happen(run, lambda: client.sendall(b"hello"))
        wait_until(lambda: len(lingered) >= 3)
        assert set(lingered) == {"draining"}
        assert receive_all(client) == (LAST, "FIN")
    run.reaches()


@pytest.mark.parametrize("linger", [0.1, 60.0], ids=["is left", "is left when we end"])
def test_an_edge_that_neither_takes_anything_nor_ends(local, raw_edge, linger):
    run = local(raw_edge(wait_for_end), proxy=False, LINGER=linger)
    with run.connect() as client:
        run.reaches("open")
        connection, = run.carrier.connections
        connection.edge.send = functools.partial(Stuck.send, connection.edge)
        began = time.monotonic()
        client.sendall(b"hello")
        if linger > 1:
            run.reaches("draining")
            run.close()
        assert receive_all(client) == (b"", "RST")
        assert linger > 1 or linger <= time.monotonic() - began < 5.0
        run.reaches()
    assert len(run.rows("reset")) == (linger < 1)


@keeps_what_came
def test_a_client_that_has_gone_too_while_the_edge_takes_nothing_more(local, raw_edge, monkeypatch):
    far = Refused(raw_edge, monkeypatch, server_frame(BINARY, LAST) + server_frame(CLOSE, b"\x03\xe8"))
    run = local(far.hostname, proxy=False, LINGER=60.0)
    client = run.connect()
    run.reaches("open")
    far.happen(run, lambda: (client.sendall(b"hello"), reset(client)))
    run.reaches()
    assert far.states == ["open", "draining"]


def test_events_that_come_too_late_do_nothing():
    """A turn may have an event for a connection that one before it has closed."""
    with bare("open") as (connection, client):
        loop = connection.carrier.loop
        near, far = connection.client.fileno(), connection.edge.fileno()
        connection._rewatch()
        connection.close()
        for fd in (near, far):
            loop.poller.callbacks[fd](READ | WRITE)
        for late in (connection.pump_up, connection.close, lambda: connection._edge_ended(True)):
            late()
        assert connection.state == "closed" and not connection.edge_watch.events and not connection.client_watch.events
        assert receive_all(client) == (b"", "FIN")


def test_one_event_closes_and_the_other_of_the_same_turn_does_nothing():
    with bare("open") as (connection, client):
        loop = connection.carrier.loop
        calls = []
        for watch in (connection.client_watch, connection.edge_watch):
            watch.wait_for(READ | WRITE, lambda mask: calls.append(mask) or connection.close())
        loop.turn()
        assert len(calls) == 1 and connection.state == "closed" and receive_all(client) == (b"", "FIN")


def test_events_that_were_for_nothing_do_nothing():
    """The loop may also be wrong."""
    with bare("open") as (connection, _):
        for state, late in (("dialling", connection.on_early), ("ending", connection.on_farewell),
                            ("open", connection.on_client)):
            connection.state = state
            late(READ)
            assert connection.state == state


def test_a_socket_that_cannot_be_set_up_is_closed(monkeypatch):
    """macOS refuses options of a client that has left already."""
    def refuse(sock: socket.socket) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with bare("dialling") as (connection, client):
        monkeypatch.setattr(sniroute_carrier, "set_options", refuse)
        connection.start()
        assert connection.state == "closed" and receive_all(client) == (b"", "FIN")


def test_what_the_kernel_does_not_tell():
    with socket.socket() as sock:
        assert was_reset(sock)
        fileno = sock.detach()
        os.close(fileno)
    reader, writer = os.pipe()
    with open(reader), open(writer, "w") as end:
        assert sniroute_carrier.unsent(end) is None


# -- the program -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_and_everything(edge, hostname, carrier, echo_server, number):
    edge.far(hostname, echo_server.address)
    run = carrier(hostname)
    edge.fault(hostname, hang="upgrade")
    with run.connect() as dialling:
        wait_until(lambda: edge.requests(hostname))
        edge.fault(hostname)
        with run.connect() as client:
            client.sendall(b"hello")
            assert receive(client, 5) == b"hello"
            assert run.end(number) == 0
            assert receive_all(client)[0] == receive_all(dialling)[0] == b""
    with pytest.raises(ConnectionRefusedError):
        run.connect()
    ends = wait_until(lambda: len(edge.ends(hostname)) == 2 and edge.ends(hostname))
    assert sorted(row["close"] for row in ends) == [1001, 1006]


def test_variables_in_place_of_options(edge, hostname, program, echo_server):
    edge.far(hostname, echo_server.address)
    run = program("access", "ssh", environ={**edge.environ, "TUNNEL_SERVICE_HOSTNAME": f"http://{hostname}/x",
                                            "TUNNEL_SERVICE_URL": "tcp://localhost:0"})
    run.listening()
    assert echoed(run) == b"hello"
    assert edge.requests(hostname)[0]["path"] == "/x"


@pytest.mark.parametrize("words", [
    pytest.param(["access", "tcp", "--hostname", "{}", "--url", "127.0.0.1:0"], id="tcp"),
    pytest.param(["access", "rdp", "-T", "{}", "-L", "127.0.0.1:0", "--log-level", "warn"], id="short"),
    pytest.param(["access", "smb", "--tunnel-host", "{}", "--listener", "[::1]:0"], id="aliases"),
])
def test_words(hostname, words, monkeypatch, edge):
    monkeypatch.setenv("SSL_CERT_FILE", edge.environ["SSL_CERT_FILE"])
    command, given = words[:2], [word.format(hostname) for word in words[2:]]
    parsed = sniroute_carrier.parse_words(given, {})
    assert sniroute_carrier.COMMANDS[tuple(command)] is sniroute_carrier.access
    assert parsed.hostname.host == hostname and parsed.url[1] == 0
    assert parsed.loglevel == ("warn" if "warn" in words else "info")


@pytest.mark.parametrize("words, environ, lines", [
    pytest.param(["access", "tcp"], {}, ["--hostname is missing (or TUNNEL_SERVICE_HOSTNAME)"],
                 id="no hostname"),
    pytest.param(["access", "tcp", "--hostname", "a b", "--url", ":1", "--header", "X: s3cret\n"], {},
                 ["--hostname: 'a b' is not a hostname, HOST:PORT, or a URL",
                  "--url: ':1' is not HOST:PORT, with an address or localhost as HOST",
                  "--header: the value of X has characters that no header may have"], id="one line each"),
    pytest.param(["access", "tcp"], {"TUNNEL_SERVICE_HOSTNAME": "a b", "TUNNEL_SERVICE_URL": "20000"},
                 ["TUNNEL_SERVICE_HOSTNAME: 'a b' is not a hostname, HOST:PORT, or a URL",
                  "TUNNEL_SERVICE_URL: '20000' is not HOST:PORT, with an address or localhost as HOST"],
                 id="variables"),
    pytest.param(["access", "tcp", "--hostname", "a"], {"HTTPS_PROXY": "http://u:s3cret/@p:1"},
                 ["HTTPS_PROXY: it is not http://[USER:PASSWORD@]HOST[:PORT]"], id="proxy"),
    pytest.param(["access", "tcp", "--hostname", "a"], {"TUNNEL_SERVICE_TOKEN_SECRET": "s3cret\r\nX: y"},
                 ["TUNNEL_SERVICE_TOKEN_SECRET: the value of Cf-Access-Client-Secret has characters that no header"
                  " may have"], id="secret"),
    pytest.param(["access", "tcp", "--hostname", "a"], {"SSL_CERT_FILE": "/nowhere"},
                 ["SSL_CERT_FILE: /nowhere cannot be read"], id="certificates"),
    pytest.param(["access", "tcp", "--hostname", "a"], {"SSL_CERT_FILE": "/dev/null"},
                 ["SSL_CERT_FILE: there is no certificate in /dev/null"], id="no certificate"),
    pytest.param(["forwarders"], {"SSL_CERT_FILE": str(HERE / "pyproject.toml")},
                 [f"SSL_CERT_FILE: there is no certificate in {HERE / 'pyproject.toml'}"],
                 id="forwarders, no certificate"),
    pytest.param(["forwarders", "x"], {}, ["unexpected 'x'"], id="forwarders has no words"),
    pytest.param(["forwarders"], {"https_proxy": "https://u:s3cret@p"},
                 ["HTTPS_PROXY: a proxy is reached by http://, not by https://"], id="forwarders"),
])
def test_wrong_settings(program, words, environ, lines):
    run = program(*words, environ=environ)
    assert run.end(None) == 2
    assert run.errors.decode().splitlines() == [f"sniroute_carrier: {line}" for line in lines]
    assert b"s3cret" not in run.errors


@pytest.mark.parametrize("words", [[], ["access"], ["access", "kubectl"], ["tunnel"], ["access", "tcp", "--host", "a"],
                                   ["access", "tcp", "--help"], ["--version"], *sniroute_carrier.HELP])
def test_usage(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sniroute_carrier.py", *words])
    try:
        code = sniroute_carrier.main()
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    good = words[-1:] in (["--help"], ["-h"], ["--version"])
    assert code == (0 if good else 2)
    text, nothing = (out, err) if good else (err, out)
    assert nothing == "" and text.startswith("sniroute_carrier 0." if words == ["--version"] else "usage: ")


def test_the_words_may_be_given_by_another_program(capsys):
    assert sniroute_carrier.main(["forwarders", "x"]) == 2
    assert capsys.readouterr().err == "sniroute_carrier: unexpected 'x'\n"


def test_it_runs_inside_a_zip_file(tmp_path):
    """These are all the files that it needs."""
    rooms = ("carrier", "edge", "forwarder", "dial", "upgrade", "http", "race", "host", "loop", "scarcity", "names",
             "refusals")
    with zipfile.ZipFile(tmp_path / "sniroute.pyz", "w") as archive:
        for room in rooms:
            archive.write(HERE / f"sniroute_{room}.py", f"sniroute_{room}.py")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import sniroute_carrier; sniroute_carrier.main(['--version'])"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, tmp_path / "sniroute.pyz"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("sniroute_carrier 0.")


def test_it_runs_as_a_script_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, "-S", "-E", HERE / "sniroute_carrier.py", "--version"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"sniroute_carrier {sniroute_names.__version__} (Python {sys.version.split()[0]}")
