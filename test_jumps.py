"""Tests of clients that a command in a pod serves (sniroute_jumps): which tool, what it says, how it ends.

The program runs in a thread of the test, before a stand-in for a cluster.  `exec` is in test_kubernetes.py.
"""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest

from conftest import HOST, wait_until
from testbed.carrier import beside, echoed, receive, receive_all, refused
from testbed.clients import program_path
from testbed.running import read_exactly

NOISE = bytes(range(256)) * 4096  # 1 MiB


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
    for transport in broken:
        kube.fault("refuse", transport=transport)
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


def test_a_jump_whose_command_is_killed_looks_cut(kube, app, forward, echo_server):
    run = forward(jump(app((HOST, 1)), echo_server.address), TOOLS_MAX=0)
    for _ in range(2):
        with run.connect() as client:
            client.sendall(b"hello")
            assert receive(client, 5) == b"hello"
            os.kill(kube.executions()[-1]["pid"], signal.SIGKILL)
            assert receive_all(client) == (b"", "RST")
    assert not run.program.tools and {row["reason"] for row in run.rows("reset")} == {"cut"}


def test_a_container_without_a_tool(app, forward, tmp_path):
    row = refused(forward(jump(app((HOST, 1), path=str(tmp_path)), (HOST, 1))))
    assert row["reason"] == "tool"


def test_what_a_client_says_while_a_tool_turns_out_not_to_be_there_is_kept(app, forward, echo_server, tmp_path):
    path = tools(tmp_path, "bash", "cat", "sleep")
    (tmp_path / "socat").write_text("#!/bin/sh\n/bin/sleep 0.5\nexit 127\n")
    (tmp_path / "socat").chmod(0o755)
    run = forward(jump(app((HOST, 1), path=path), echo_server.address))
    run.program.links.proven.add(("", "exec"))  # so it waits for no word of the node
    run.program.proving.seconds = 20.0  # a busy host may take longer than a second to find out
    with run.connect() as client:
        client.sendall(NOISE[:1000])
        run.reaches("open")
        with beside(lambda: client.sendall(NOISE[1000:400_000])):
            assert receive(client, 400_000) == NOISE[:400_000]
    assert not run.rows("failed")


def test_an_upgrade_that_takes_longer_than_a_tool_to_fail_stops_no_upload(kube, app, forward, serve):
    """The far end answers when it has all, and more of it comes than is kept for the next tool."""
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(NOISE))
        sock.sendall(b"thanks")

    run = forward(jump(app((HOST, 1)), serve(handler).address))
    run.program.proving.seconds = 0.1
    fault = kube.fault("freeze", resource="pods/exec", times=1)
    with run.connect() as client, beside(lambda: client.sendall(NOISE)):
        wait_until(lambda: kube.hits(fault) and not run.program.proving.due)
        kube.end_connections("thaw")
        assert receive(client, 6) == b"thanks"


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
