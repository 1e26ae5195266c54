"""Tests of one client's passage to a pod (sniroute_passage): which pod, the end of each side, what is lost, jumps.

The program runs in a thread of the test, before a stand-in for a cluster.
"""

from __future__ import annotations

import socket
import struct
import threading
import time

import pytest

from conftest import HOST, wait_until
from sniroute_passage import untouched
from testbed.carrier import beside, echoed, receive, receive_all, refused
from testbed.clients import program_path
from testbed.running import reset

NOISE = bytes(range(256)) * 4096  # 1 MiB
TRANSPORTS = pytest.mark.parametrize("broken", [(), ("websocket",), ("websocket", "spdy")],
                                     ids=["tunnel", "spdy", "channels"])


def refuse(kube, *transports: str) -> None:
    for transport in transports:
        kube.fault("refuse", transport=transport)


def named(name: bytes):
    """A server that says who it is, and then what it hears."""
    def handler(sock: socket.socket) -> None:
        sock.sendall(name)
        while data := sock.recv(65536):
            sock.sendall(data)
    return handler


# -- which pod ---------------------------------------------------------------------------------


def test_a_service_may_speak_first(app, forward, serve):
    there = app(serve(lambda sock: sock.sendall(b"banner")).address)
    with forward(there.target).connect() as client:
        assert receive_all(client) == (b"banner", "FIN")


def test_clients_are_spread_over_the_pods(app, forward, serve):
    run = forward(app(serve(named(b"1")).address, serve(named(b"2")).address).target)
    with run.connect() as first, run.connect() as second:
        assert {receive(first, 1), receive(second, 1)} == {b"1", b"2"}


def test_a_pod_that_was_replaced_serves_the_next_client(kube, app, forward, serve):
    there = app(serve(named(b"1")).address)
    run = forward(there.target)
    assert echoed(run, b"x") == b"1"
    kube.replace(there.pods[0], {8080: serve(named(b"2")).address})
    for _ in range(3):
        with run.connect() as client:
            client.sendall(b"x")
            assert receive(client, 2) == b"2x"
    assert not run.rows("failed")


def test_a_client_whose_pod_is_gone_gets_another(kube, app, forward, serve):
    """The list of pods still has it, and so has its spare session."""
    there = app(serve(named(b"1")).address, serve(named(b"2")).address)
    run = forward(there.target)
    texts = 'failed to find sandbox "abc" in store: not found', "error forwarding: connection refused"
    for text in texts:
        kube.fault("error", "stream", pod=there.pods[0], message=text)
        for _ in range(2):
            with run.connect() as client:
                client.sendall(b"x")
                assert receive(client, 2) == b"2x"
        kube.heal()
    assert not run.rows("failed")


def test_a_client_is_held_until_a_pod_is_ready(kube, app, forward, echo_server):
    there = app(echo_server.address)
    kube.ready(there.pods[0], False)
    run = forward(there.target)
    with run.connect() as client:
        client.sendall(b"hello")
        run.reaches("finding")
        kube.ready(there.pods[0])
        assert receive(client, 5) == b"hello"


def test_a_port_where_nobody_listens_is_a_reason(app, forward, echo_server):
    there = app(echo_server.address)
    row = refused(forward(f"default/pod/{there.pods[0]}:81"))
    assert row["reason"] == "refused" and row["error"] == f"{there.pods[0]}, port 81"


def test_one_pod_that_refuses_is_left_out(app, forward, deaf, serve):
    there = app((HOST, 1), serve(named(b"2")).address)
    run = forward(there.target)
    for _ in range(4):
        with run.connect() as client:
            assert receive(client, 1) == b"2"


@pytest.mark.parametrize("fault, reason", [
    ({"action": "refuse", "resource": "services"}, "forbidden"),
    ({"action": "status", "code": 404, "resource": "services"}, "unknown"),
    ({"action": "hang", "resource": "services"}, "timeout"),
    ({"action": "hang", "resource": "pods/portforward"}, "timeout"),
    ({"action": "hang", "at": "upgraded"}, "timeout"),
    ({"action": "hang", "at": "stream"}, "timeout"),
    ({"action": "node", "resource": "pods/portforward"}, "node"),
], ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value)
def test_reasons_of_failures(kube, app, forward, echo_server, fault, reason):
    there = app(echo_server.address)
    kube.fault(**fault)
    run = forward(there.target, START=0.4, REQUEST_TIME=0.1)
    with run.connect() as client:
        client.sendall(b"hello")
        assert receive_all(client) == (b"", "RST")
    assert run.failure()["reason"] == reason, run.failure()
    kube.heal()
    assert echoed(run) == b"hello"


def test_a_second_pod_has_a_deadline_too(kube, app, forward, echo_server):
    """The first one's node has taken the call, and then nobody listened there."""
    there = app((HOST, 1), echo_server.address)
    kube.fault("hang", "stream", pod=there.pods[1])
    run = forward(there.target, START=0.5)
    with run.connect() as client:
        client.sendall(b"hello")
        assert receive_all(client) == (b"", "RST")
    assert run.failure()["reason"] == "timeout" and run.rows("again")


# -- what is lost ------------------------------------------------------------------------------


@pytest.mark.parametrize("text, reason", [
    ('failed to find sandbox "x" in store: not found', "gone"),
    ("container not running (abc)", "gone"),
    ('pod not found ("x_y")', "gone"),
    ("dial tcp4 127.0.0.1:1: connect: connection refused", "refused"),
    ("failed to connect to localhost:80 inside namespace: i/o timeout", "pod"),
    ("socat[7] E connect(5, AF=2 127.0.0.1:80, 16): Connection refused", "refused"),
    ("read tcp4 127.0.0.1:1->127.0.0.1:2: i/o timeout", ""),
    ("write tcp4 127.0.0.1:1->127.0.0.1:2: write: no route to host", ""),
    ("read tcp4 127.0.0.1:1->127.0.0.1:2: read: connection reset by peer", ""),
    ("", ""),
    ("x" * 400, ""),
])
def test_texts_that_say_that_nobody_has_got_a_byte(text, reason):
    assert untouched(text) == reason


def test_what_a_pod_may_have_read_is_not_sent_twice(kube, app, forward, serve):
    heard = []

    def handler(sock: socket.socket) -> None:
        heard.append(sock.recv(100))
        reset(sock)

    there = app(serve(handler).address, serve(handler).address)
    with forward(there.target).connect() as client:
        client.sendall(b"INSERT")
        assert receive_all(client) == (b"", "RST")
    assert heard == [b"INSERT"]


def test_an_error_text_behind_bytes_leaves_them_whole(kube, app, forward, serve):
    """A stream that was cut does not look whole."""
    def handler(sock: socket.socket) -> None:
        sock.sendall(NOISE)
        sock.recv(1)
        reset(sock)

    there = app(serve(handler).address)
    with forward(there.target).connect() as client:
        assert receive(client, len(NOISE)) == NOISE
        client.sendall(b"x")
        assert receive_all(client) == (b"", "RST")


@TRANSPORTS
@pytest.mark.parametrize("how", ["rst", "eof", "end"])
def test_a_session_that_is_lost_resets_its_client(kube, app, forward, echo_server, broken, how):
    refuse(kube, *broken)
    there = app(echo_server.address)
    run = forward(there.target)
    with run.connect() as client:
        client.sendall(b"hello")
        assert receive(client, 5) == b"hello"
        kube.end_sessions(how, pod=there.pods[0])
        assert receive_all(client) == (b"", "RST")
    run.reaches()
    assert echoed(run) == b"hello"


def test_goaway_lets_a_client_go_on(kube, app, forward, echo_server):
    there = app(echo_server.address)
    run = forward(there.target)
    with run.connect() as client:
        client.sendall(b"x")
        receive(client, 1)
        kube.end_sessions("goaway", pod=there.pods[0])
        client.sendall(b"y")
        assert receive(client, 1) == b"y"
    assert echoed(run) == b"hello"


# -- the end of each side ----------------------------------------------------------------------


@pytest.mark.parametrize("broken", [(), ("websocket",)], ids=["tunnel", "spdy"])
def test_the_clients_end_reaches_the_pod_and_the_answer_the_client(kube, app, forward, serve, broken):
    refuse(kube, *broken)

    def handler(sock: socket.socket) -> None:
        data = b""
        while more := sock.recv(65536):
            data += more
        sock.sendall(b"%d bytes" % len(data))

    there = app(serve(handler).address)
    with forward(there.target).connect() as client:
        client.sendall(NOISE)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == (b"1048576 bytes", "FIN")


def test_a_runtime_without_half_close_ends_the_connection(kube, app, forward, echo_server):
    kube.set(runtime="containerd", grace=0.2)
    there = app(echo_server.address)
    run = forward(there.target)
    with run.connect() as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == (b"hello", "FIN")
    wait_until(lambda: run.rows("end"))


def test_a_far_end_that_cannot_be_told_of_the_clients_end_looks_cut(kube, app, forward, serve):
    """It may have had more to say; and a client that reads late gets all that it has said."""
    refuse(kube, "websocket", "spdy")
    go = threading.Event()

    def handler(sock: socket.socket) -> None:
        sock.sendall(NOISE * 8)
        go.wait(20)

    there = app(serve(handler).address)
    run = forward(there.target)
    with run.connect() as client:
        assert receive(client, 1) == NOISE[:1]
        client.shutdown(socket.SHUT_WR)
        run.reaches("half")
        wait_until(lambda: not run.program.graced.due or all(
            each.rest for each in run.program.connections.copy()), what="a client that is slow")
        data, end = receive_all(client)
        assert (len(data), end) == (len(NOISE) * 8 - 1, "RST")
    go.set()


def test_channels_have_no_half_close(kube, app, forward, echo_server):
    refuse(kube, "websocket", "spdy")
    there = app(echo_server.address)
    with forward(there.target).connect() as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client)[0] == b"hello"
    wait_until(lambda: not there.sessions(ended=None))


@TRANSPORTS
def test_the_pods_end_reaches_the_client(kube, app, forward, serve, broken):
    refuse(kube, *broken)
    there = app(serve(lambda sock: sock.sendall(NOISE)).address)
    with forward(there.target).connect() as client:
        assert receive_all(client) == (NOISE, "FIN")


@TRANSPORTS
def test_a_client_that_breaks_off_ends_its_connection_in_the_pod(kube, app, forward, serve, broken):
    refuse(kube, *broken)
    ended = threading.Event()

    def handler(sock: socket.socket) -> None:
        try:
            while sock.recv(100):
                sock.sendall(b"x")
        except OSError:
            pass
        ended.set()

    there = app(serve(handler).address)
    run = forward(there.target)
    with run.connect() as client:
        client.sendall(b"x")
        receive(client, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ended.wait(10)
    wait_until(lambda: run.rows("end"))


def test_a_client_that_leaves_in_mid_download_stops_nobody(app, forward, serve):
    """Its session ends with it: the pod would go on for long."""
    there = app(serve(lambda sock: [sock.sendall(NOISE) for _ in range(100) if sock.recv(1) or True]).address)
    run = forward(there.target)
    for _ in range(4):
        with run.connect() as client:
            client.sendall(b"x" * 100)
            assert receive(client, 1000) == NOISE[:1000]
    with run.connect() as client:
        client.sendall(b"x" * 2)
        assert receive(client, len(NOISE)) == NOISE


# -- backpressure ------------------------------------------------------------------------------


@TRANSPORTS
def test_a_client_that_does_not_read_stops_its_pod_and_no_other(kube, app, forward, serve, broken):
    refuse(kube, *broken)
    sent = []

    def handler(sock: socket.socket) -> None:
        for _ in range(64):
            sock.sendall(NOISE)
            sent.append(1)

    there, other = app(serve(handler).address), app(serve(named(b"x")).address)
    run = forward(there.target)
    with run.connect() as client:
        receive(client, 1)
        wait_until(lambda: there.streams()[-1]["down"] > 1 << 20)
        size = 0
        assert echoed(forward(other.target), b"x") == b"x"
        assert len(sent) < 40, "all that is kept between has an end"
        while data := client.recv(1 << 20):
            size += len(data)
    assert size == len(NOISE) * 64 - 1


@pytest.mark.parametrize("broken", [False, True], ids=["end", "reset"])
@pytest.mark.parametrize("reads", [False, True], ids=["reads nothing", "reads slowly"])
def test_a_client_that_never_takes_its_last_bytes_is_let_go(app, forward, serve, reads, broken):
    go = threading.Event()
    run = forward(app(serve(lambda sock: (sock.sendall(b"x"), go.wait(20))).address).target, HALF_LAST=0.15)
    with run.connect() as client:
        receive(client, 1)
        there, = run.program.connections

        def hand_down() -> None:
            there.on_data("data", [memoryview(NOISE * 16)])
            there.finish(broken)
            go.set()

        run.program.loop.call(hand_down)
        run.reaches("ending")
        if reads:
            for _ in range(10):
                receive(client, len(NOISE))
                time.sleep(0.05)
            data, end = receive_all(client)
            assert (data, end) == ((NOISE * 6), "RST" if broken else "FIN")
        else:
            run.reaches()
    run.reaches()


def test_many_small_pieces_for_a_client_that_is_slow(app, forward, serve):
    """The kernel takes 1,024 buffers in a write."""
    go = threading.Event()
    run = forward(app(serve(lambda sock: (sock.sendall(b"x"), go.wait(20))).address).target)
    with run.connect() as client:
        receive(client, 1)
        there, = run.program.connections

        def hand_down() -> None:
            there.on_data("data", [memoryview(NOISE * 16)])
            assert there.rest
            there.on_data("data", [memoryview(b"y")] * 3000)
            go.set()

        run.program.loop.call(hand_down)
        data, end = receive_all(client)
        assert data == NOISE * 16 + b"y" * 3000 and end == "FIN"


@TRANSPORTS
def test_a_pod_that_does_not_read_stops_its_client(kube, app, forward, serve, broken):
    refuse(kube, *broken)
    go = threading.Event()

    def handler(sock: socket.socket) -> None:
        go.wait(20)
        size = 0
        while size < len(NOISE) * 32 and (data := sock.recv(1 << 20)):
            size += len(data)
        sock.sendall(struct.pack(">I", size))

    there = app(serve(handler).address)
    run = forward(there.target)
    with run.connect() as client:
        taken = []

        def send() -> None:
            for _ in range(32):
                client.sendall(NOISE)
                taken.append(1)

        with beside(send):
            wait_until(lambda: taken)
            wait_until(lambda: any(each.way.link is not None and each.way.link.is_full
                                   for each in run.program.connections.copy()))
            assert len(taken) < 30
            go.set()
            assert receive(client, 4) == struct.pack(">I", len(NOISE) * 32)


# -- jumps -------------------------------------------------------------------------------------


def tools(tmp_path, *names: str) -> str:
    """A folder with these programs, as a container's PATH."""
    for name in names:
        (tmp_path / name).symlink_to(program_path(name, {"cat": "coreutils", "sleep": "coreutils"}.get(name, name)))
    return str(tmp_path)


def jump(there, address) -> str:
    return f"jump:default/svc/{there.name}/{address[0]}:{address[1]}"


@pytest.mark.parametrize("version, broken", [("1.36", ()), ("1.28", ()), ("1.36", ("websocket",))],
                         ids=["v5", "v4", "spdy"])
@pytest.mark.parametrize("names", [("socat",), ("bash", "cat", "sleep")], ids=["socat", "bash"])
def test_a_jump_carries_bytes(kube, app, forward, echo_server, tmp_path, version, broken, names):
    kube.set(version=version)
    refuse(kube, *broken)
    there = app(path=tools(tmp_path, *names))
    kube.pod(f"{there.name}-1", {}, labels={"app": there.name}, path=str(tmp_path))
    run = forward(jump(there, echo_server.address))
    for _ in range(2):
        assert echoed(run, NOISE[:300_000]) == NOISE[:300_000]
    argv = [row["argv"][0] for row in kube.executions()][-2:]
    assert argv == [names[0]] * 2


def test_a_jump_ends_as_its_far_end_does(kube, app, forward, serve):
    there = app((HOST, 1))
    with forward(jump(there, serve(lambda sock: sock.sendall(NOISE)).address)).connect() as client:
        assert receive_all(client) == (NOISE, "FIN")


def test_a_jump_to_a_port_where_nobody_listens(app, forward):
    row = refused(forward(jump(app((HOST, 1)), (HOST, 1))))
    assert row["reason"] == "command" and "refused" in row["error"]


def test_a_container_without_a_tool(app, forward, tmp_path):
    row = refused(forward(jump(app((HOST, 1), path=str(tmp_path)), (HOST, 1))))
    assert row["reason"] == "tool"


def test_what_a_client_says_while_a_tool_turns_out_not_to_be_there_is_kept(app, forward, echo_server, tmp_path):
    path = tools(tmp_path, "bash", "cat", "sleep")
    (tmp_path / "socat").write_text("#!/bin/sh\n/bin/sleep 0.5\nexit 127\n")
    (tmp_path / "socat").chmod(0o755)
    run = forward(jump(app((HOST, 1), path=path), echo_server.address))
    run.program.links.proven.add(("", "exec"))  # so it waits for no word of the node
    with run.connect() as client:
        client.sendall(NOISE[:1000])
        run.reaches("open")
        with beside(lambda: client.sendall(NOISE[1000:400_000])):
            assert receive(client, 400_000) == NOISE[:400_000]
    assert not run.rows("failed")


def test_the_end_of_a_client_ends_its_command(kube, app, forward, echo_server):
    there = app((HOST, 1))
    run = forward(jump(there, echo_server.address))
    with run.connect() as client:
        client.sendall(b"hello")
        assert receive(client, 5) == b"hello"
    wait_until(lambda: kube.executions()[-1]["code"] is not None)
    assert not run.rows("failed")


@pytest.mark.parametrize("seconds, end", [(0.0, "FIN"), (2.0, "RST")])
def test_a_far_end_that_the_tool_does_not_wait_for_looks_cut(app, forward, serve, seconds, end):
    go = threading.Event()

    def handler(sock: socket.socket) -> None:
        sock.sendall(b"hello")
        while sock.recv(100):
            pass
        go.wait(seconds)

    there = app((HOST, 1))
    with forward(jump(there, serve(handler).address)).connect() as client:
        assert receive(client, 5) == b"hello"
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == (b"", end)
    go.set()
