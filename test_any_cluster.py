"""Tests of the Kubernetes program before any cluster: a real one where SNIROUTE_TEST_KUBECONFIG names it, else the
stand-in.  What only a stand-in can be told to do is in the tests of the rooms.
"""

from __future__ import annotations

import socket
import subprocess

import pytest

from conftest import HOST, connect
from testbed.carrier import beside, parallel, receive_all, refused

NOISE = bytes(range(256)) * 1024  # 256 KiB


def test_a_service_is_reached_by_the_name_of_its_port(place, launched):
    run = launched("port-forward", place.target("svc/web:http"), "--listen", f"{HOST}:0")
    address, = run.listening()
    for _ in range(2):
        payloads = [bytes([number]) + NOISE for number in range(10)]
        assert [got == sent for got, sent in zip(parallel(address, payloads), payloads)] == [True] * 10
    assert not run.rows("failed") and run.end() == 0


def test_the_end_of_a_client_loses_no_byte(place, launched):
    """Where the runtime passes it on, the pod's own end comes back; another one breaks the connection off then."""
    run = launched("port-forward", place.target("pod/echo:echo"), "--listen", f"{HOST}:0")
    address, = run.listening()
    with connect(address) as client:
        def send() -> None:
            client.sendall(NOISE)
            client.shutdown(socket.SHUT_WR)

        with beside(send):
            data, end = receive_all(client)
    assert data == NOISE and end in (("FIN",) if place.cluster is not None else ("FIN", "RST"))


@pytest.mark.parametrize("command, said, out, code", [
    (("cat",), NOISE, NOISE, 0), (("sh", "-c", "echo hello; exit 3"), b"", b"hello\n", 3),
    (("no-such-word",), b"", b"", 1)],
    ids=["cat", "exit", "nothing"])
def test_a_command_runs_in_a_pod(place, launched, command, said, out, code):
    run = launched("exec", place.target("pod/echo"), "--", *command, stdin=subprocess.PIPE)

    def send() -> None:
        with run.process.stdin as stdin:
            stdin.write(said)

    with beside(send):
        assert run.process.stdout.read() == out
    assert run.process.wait(20) == code


def test_a_pod_is_the_way_to_another_host(place, launched):
    target = f"jump:{place.target('svc/web')}/{place.far[0]}:{place.far[1]}"
    run = launched("port-forward", target, "--listen", f"{HOST}:0")
    assert parallel(run.listening()[0], [NOISE]) == [NOISE]


def test_what_would_be_chosen(place, launched):
    run = launched("get", place.target("svc/web:80"))
    out = run.process.stdout.read().decode().splitlines()
    assert out == [f"pod {place.namespace}/echo port 8080", "  echo ready"]
    assert run.process.wait(20) == 0


@pytest.mark.parametrize("target, user, reason, words", [
    ("svc/nothing:80", {}, "unknown", 'services "nothing" not found'),
    ("svc/web:81", {}, "port", "81"),
    ("svc/empty:80", {}, "pods", "empty"),
    ("pod/echo:81", {}, "refused", "echo, port 81"),
    ("svc/web:80@no-such-context", {}, "context", "no-such-context"),
    ("svc/web:80", {"as": "sniroute-test-nobody"}, "forbidden", 'resources: ["services"], verbs: ["get"]'),
], ids=["service", "port", "pods", "nobody listens", "context", "rights"])
def test_what_cannot_be_had_is_a_reason(place, launched, target, user, reason, words):
    run = launched("port-forward", place.target(target), "--listen", f"{HOST}:0", kubeconfig=place.write("other", user),
                   start=0.5 if reason == "pods" else 10.0)
    run.listening()
    row = refused(run)
    assert row["reason"] == reason and words in row["error"], row
