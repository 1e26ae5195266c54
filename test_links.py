"""Tests of sessions to pods (sniroute_links): kinds of upgrade, spare sessions, signs of life.

The program runs in a thread of the test, before a stand-in for a cluster.
"""

from __future__ import annotations

import struct
import threading
import time

import pytest

import sniroute_credentials
import sniroute_links
from conftest import HOST, connect, wait_until
from sniroute_links import MISSES, SPARE, SPARES
from sniroute_loop import monotonic
from sniroute_refusals import Malformed
from sniroute_transports import TRANSPORTS, protocol_of
from sniroute_upgrade import new_key
from testbed.carrier import beside, echoed, parallel, receive, receive_all, refused, server_frame

NOISE = bytes(range(256)) * 4096  # 1 MiB


def refuse(kube, *transports: str, **fault) -> None:
    for transport in transports:
        kube.fault(**{"action": "refuse", **fault}, transport=transport)


# -- kinds of upgrade --------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [
    {"action": "refuse"},
    {"action": "status", "code": 400, "message": "unable to upgrade"},
    {"action": "text", "code": 502, "message": "a proxy's words"},
    {"action": "strip"},
    {"action": "bad_upgrade", "message": "protocol"},
    {"action": "bad_upgrade", "message": "upgrade"},
    {"action": "rst"},
    {"action": "eof"},
], ids=lambda fault: "-".join(map(str, fault.values())))
@pytest.mark.parametrize("broken, served", [
    ((), "websocket"), (("websocket",), "spdy"), (("websocket", "spdy"), "channels")], ids=["all", "spdy", "channels"])
def test_where_one_kind_of_upgrade_is_refused_the_next_is_tried(kube, app, forward, echo_server, fault, broken, served):
    refuse(kube, *broken, **fault)
    there = app(echo_server.address)
    assert echoed(forward(there.target)) == b"hello"
    assert [row["transport"] for row in there.sessions() if row["streams"]] == [served]
    assert there.upgrades()[:len(broken) + 1] == [*broken, served]


def test_the_kind_that_has_worked_is_tried_first_from_then_on(kube, app, forward, echo_server):
    refuse(kube, "websocket")
    there, other = app(echo_server.address), app(echo_server.address)
    run = forward(there.target)
    assert echoed(run) == b"hello"
    assert there.upgrades().count("websocket") == 1
    listener = run.program.parse(other.target)
    run.program.loop.call(lambda: run.program.listen(listener, ("127.0.0.1", 0)))
    second, = wait_until(lambda: [each for each in run.program.listeners.values() if each.target is listener])
    with connect(second.sock.getsockname()) as client:
        client.sendall(b"x")
        assert receive(client, 1) == b"x"
    assert set(other.upgrades()) == {"spdy"}


def test_where_all_are_refused_the_first_refusal_is_the_reason(kube, app, forward, echo_server):
    refuse(kube, "websocket", "spdy", "channels")
    there = app(echo_server.address)
    row = refused(forward(there.target))
    assert row["reason"] == "forbidden" and 'cannot get resource "pods/portforward"' in row["error"]
    assert there.upgrades() == ["websocket", "spdy", "channels"]


@pytest.mark.parametrize("code, reason", [(404, "pods"), (429, "busy"), (500, "answer"), (503, "answer")])
def test_a_refusal_that_is_about_the_pod_ends_the_search(kube, app, forward, echo_server, code, reason):
    there = app(echo_server.address)
    kube.fault("status", code=code, resource="pods/portforward", name=there.pods[0], retry_after=None)
    row = refused(forward(there.target, TRIES=2, START=1.0))
    assert len(set(there.upgrades())) == 1
    assert row["reason"] in (reason, "gone", "timeout"), row


@pytest.mark.parametrize("fault", [
    {"action": "eof", "at": "upgraded"},
    {"action": "raw", "at": "upgraded", "message": "ff" * 32},
    {"action": "raw", "at": "stream", "message": "ff" * 32},
], ids=lambda fault: "-".join(list(fault.values())[:2]))
def test_a_session_that_ends_before_it_takes_a_call_counts_against_its_kind(kube, app, forward, echo_server, fault):
    kube.fault(**fault, transport="websocket")
    there = app(echo_server.address)
    run = forward(there.target)
    assert echoed(run) == b"hello"
    assert there.upgrades()[:2] == ["websocket", "spdy"]
    assert echoed(run) == b"hello" and "websocket" not in there.upgrades()[2:]


def test_what_one_cluster_has_taken_is_not_known_of_the_next_one(
        kube, make_cluster, app, forward, echo_server, monkeypatch):
    """The kubeconfig leads to another cluster, with a proxy before it that breaks off WebSockets."""
    monkeypatch.setattr(sniroute_credentials, "LOOK_EVERY", 0)
    there, other, moved = app(echo_server.address), make_cluster(), []
    path = kube.kubeconfig("next")
    run = forward(there.target, kubeconfig=str(path))
    assert echoed(run) == b"hello" and there.upgrades()[0] == "websocket"
    other.pod("web-1", {8080: echo_server.address}, labels={"app": "other"})
    other.service(there.name, {80: 8080}, {"app": "other"})
    other.fault("eof", "upgraded", transport="websocket")
    on_moved = run.program.apis.moved
    run.program.apis.moved = lambda api: moved.append(on_moved(api))
    other.kubeconfig().replace(path)
    run.program.loop.call(lambda: run.program.apis.of("").get("/version", lambda reply: None, monotonic() + 5))
    wait_until(lambda: moved)
    assert echoed(run) == b"hello"
    assert not run.rows("failed")


def test_a_text_counts_though_the_session_is_lost_before_its_end(kube, app, forward, serve):
    """It says that nobody listens, so the client goes to the next pod, or to this one again."""
    refuse(kube, "websocket")
    text = b"dial tcp4 127.0.0.1:8080: connect: connection refused"
    frame = struct.pack(">II", 1, len(text)) + text  # on the error stream
    fault = kube.fault("raw", "stream", message=frame.hex(), times=1, transport="spdy")
    heard, go = [], threading.Event()

    def handler(sock):
        heard.append(sock.recv(100))
        if len(heard) == 1:
            go.wait(20)
        else:
            sock.sendall(heard[-1])

    there = app(serve(handler).address)
    run = forward(there.target)
    with run.connect() as client:
        client.sendall(b"hello")
        wait_until(lambda: kube.hits(fault) and heard)
        kube.end_sessions("eof", pod=there.pods[0])
        assert receive(client, 5) == b"hello"
    go.set()
    assert run.rows("again")[0]["error"] == f"{there.pods[0]}, port 8080"


def test_what_comes_together_is_told_apart(app, forward, echo_server):
    """Words of a command, and what it carries."""
    there = app((HOST, 1))
    run = forward(f"jump:default/svc/{there.name}/{echo_server.address[0]}:{echo_server.address[1]}")
    with run.connect() as client:
        client.sendall(b"x")
        assert receive(client, 1) == b"x"
        at, = run.program.connections
        said = b"".join(server_frame(2, data) for data in (b"\1one", b"\1two", b"\2words", b"\1three"))
        run.program.loop.call(lambda: at.way.link.on_data(said))
        assert receive(client, 11) == b"onetwothree" and at.words == b"words"


def test_an_old_cluster_has_no_tunnel(kube, app, forward, echo_server):
    kube.set(version="1.28")
    there = app(echo_server.address)
    assert echoed(forward(there.target)) == b"hello"
    assert there.sessions()[0]["transport"] == "spdy"


def test_an_upgrade_to_something_else_is_none():
    for transport, headers in ((TRANSPORTS["portforward"][1], {"upgrade": "websocket"}),
                               (TRANSPORTS["portforward"][1], {"upgrade": "SPDY/3.1"}),
                               (TRANSPORTS["portforward"][0], {"upgrade": "SPDY/3.1"})):
        with pytest.raises(Malformed):
            protocol_of(transport, new_key(), headers)


# -- bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fragment", [0, 1000])
@pytest.mark.parametrize("broken", [(), ("websocket",), ("websocket", "spdy")], ids=["tunnel", "spdy", "channels"])
def test_a_mebibyte_both_ways_byte_for_byte(kube, app, forward, echo_server, broken, fragment):
    refuse(kube, *broken)
    kube.set(fragment=fragment)
    assert echoed(forward(app(echo_server.address).target), NOISE) == NOISE


def test_100_clients_at_once_have_sessions_of_their_own(app, forward, single_loop_echo):
    there = app(single_loop_echo)
    payloads = [number.to_bytes(4, "big") + NOISE[number:number + 20_000] for number in range(100)]
    answers = parallel(forward(there.target).address, payloads)
    assert [got == sent for got, sent in zip(answers, payloads)] == [True] * 100
    assert all(row["most_live"] <= 2 for row in there.sessions()), "two streams are one client"


# -- spare sessions ----------------------------------------------------------------------------


def test_a_spare_session_that_takes_no_more_streams_serves_nobody(kube, app, forward, echo_server):
    """The server has said so meanwhile: SETTINGS, with no stream at a time."""
    there = app(echo_server.address)
    run = forward(there.target)
    assert echoed(run) == b"hello"
    there.has_spare()
    for link in list(run.program.links.all):
        link.machine.limit = 0
    assert echoed(run) == b"hello"
    assert not run.rows("fault") and not run.rows("failed")


def test_a_second_client_takes_a_session_that_is_there(app, forward, echo_server):
    there = app(echo_server.address)
    run = forward(there.target)
    assert echoed(run) == b"hello"
    there.has_spare()
    with run.connect() as first, run.connect() as second:
        for client in (first, second):
            client.sendall(b"x")
            assert receive(client, 1) == b"x"
    assert len(there.sessions(ended=None)) <= 2 + SPARES


def test_sessions_serve_one_client_after_another(kube, app, forward, serve):
    """Each program ends with a reset, as PostgreSQL does with TLS: that ends its own client only."""
    kube.set(runtime="resetting")
    there = app(serve(lambda sock: sock.sendall(sock.recv(100))).address)
    run = forward(there.target)
    for number in range(30):
        with run.connect() as client:
            client.sendall(b"hello")
            assert receive(client, 5) == b"hello"
        wait_until(lambda: len(run.rows("end")) == number + 1)  # else the next one may find no session that is free
    assert len(there.sessions()) <= 4 and not run.rows("failed")
    assert sum(row["streams"] for row in there.sessions()) == 30


@pytest.mark.parametrize("how", ["rst", "eof", "end", "close", "goaway"])
def test_a_spare_session_that_ends_is_no_trouble(kube, app, forward, echo_server, how):
    there = app(echo_server.address)
    run = forward(there.target)
    assert echoed(run) == b"hello"
    there.has_spare()
    run.reaches()
    kube.end_sessions(how, pod=there.pods[0])
    wait_until(lambda: not run.program.links.all, what="the end of the spare sessions")
    for _ in range(3):
        assert echoed(run) == b"hello"
    assert not run.rows("failed")


def test_a_spare_session_that_is_silent_is_replaced(kube, app, forward, echo_server):
    there = app(echo_server.address)
    run = forward(there.target, FRESH=0.0, ACCEPT=0.2)
    assert echoed(run) == b"hello"
    there.has_spare()
    run.reaches()
    kube.end_sessions("freeze", pod=there.pods[0])
    assert echoed(run) == b"hello"
    kube.end_sessions("thaw", pod=there.pods[0])


def test_spare_sessions_are_closed_when_nobody_needs_them(app, forward, echo_server):
    there = app(echo_server.address)
    run = forward(there.target)
    assert echoed(run) == b"hello"
    there.has_spare()
    run.reaches()
    links = run.program.links
    wait_until(lambda: {link.state for link in links.all.copy()} == {SPARE}, what="the end of the clients")
    run.program.loop.call(lambda: run.program.unlisten(next(iter(run.program.listeners))))
    wait_until(lambda: not there.sessions(ended=None), what="the end of all sessions")


@pytest.mark.parametrize("how", ["the pod", "the program"])
def test_a_spare_session_in_the_making_ends_with(kube, app, forward, serve, how):
    go = threading.Event()
    there = app(serve(lambda sock: (go.wait(20), sock.sendall(b"x"), sock.recv(1))).address)
    run = forward(there.target)
    with run.connect() as client:
        wait_until(lambda: there.streams())
        fault = kube.fault("hang", resource="pods/portforward")
        go.set()
        assert receive(client, 1) == b"x"
        wait_until(lambda: kube.hits(fault) and run.program.links.negotiations)
        if how == "the pod":
            kube.terminate(there.pods[0])
            wait_until(lambda: not run.program.links.negotiations)
        else:
            run.close()
            assert not run.program.links.negotiations


def test_no_more_spare_sessions_are_kept_than_may_be(app, forward, echo_server):
    run = forward(app(echo_server.address).target, SPARES_MAX=0)
    for _ in range(2):
        assert echoed(run) == b"hello"
    run.reaches()
    assert not run.program.links.spares


def test_spare_sessions_end_with_their_pod(kube, app, forward, echo_server):
    there = app(echo_server.address)
    run = forward(there.target)
    assert echoed(run) == b"hello"
    there.has_spare()
    run.reaches()
    kube.terminate(there.pods[0])
    wait_until(lambda: not there.sessions(ended=None), what="the end of all sessions")


# -- signs of life -----------------------------------------------------------------------------


def test_sessions_are_pinged(app, forward, echo_server):
    there = app(echo_server.address)
    run = forward(there.target, ping=0.05, MISSES=40)  # the stand-in may be stopped for a while
    with run.connect() as client:
        client.sendall(b"x")
        receive(client, 1)
        wait_until(lambda: all(row["pings"] > 5 for row in there.sessions(ended=None)))
        client.sendall(b"y")
        assert receive(client, 1) == b"y"


@pytest.mark.parametrize("transport", ["websocket", "spdy", "channels"])
def test_a_session_without_a_sign_of_life_is_dead(kube, app, forward, echo_server, transport, monkeypatch):
    refuse(kube, *[row for row in ("websocket", "spdy", "channels") if row != transport])
    there = app(echo_server.address)
    run = forward(there.target, ping=0.05, MISSES=40)
    with run.connect() as client:
        client.sendall(b"x")
        receive(client, 1)
        with monkeypatch.context() as patch:
            patch.setattr(sniroute_links, "MISSES", MISSES)  # only now: the stand-in may be stopped for a while before
            kube.end_sessions("freeze", pod=there.pods[0])
            assert receive_all(client) == (b"", "RST")
    row, = run.rows("reset")
    assert row["reason"] == "dead"
    assert echoed(run) == b"hello"
    kube.end_sessions("thaw", pod=there.pods[0])


def test_a_pod_that_does_not_read_is_not_dead(kube, app, forward, serve):
    """It keeps its session from answering, so there is more patience."""
    def slow(sock):
        time.sleep(1.2)
        while data := sock.recv(1 << 20):
            del data

    there = app(serve(slow).address)
    run = forward(there.target, ping=0.3)
    with run.connect() as client:
        with beside(lambda: client.sendall(NOISE * 8)):
            pass
        client.shutdown(1)
        assert receive_all(client) == (b"", "FIN")
    assert not run.rows("reset")


def test_after_a_sleep_of_the_host_every_session_is_probed(kube, app, forward, echo_server):
    there = app(echo_server.address)
    run = forward(there.target, ping=0.2, MISSES=40)
    with run.connect() as client:
        client.sendall(b"x")
        receive(client, 1)
        there.has_spare()
        kube.end_sessions("freeze", pod=there.pods[0])

        def wake() -> None:
            run.program.ticked -= 1000
            run.program.on_tick()

        run.program.loop.call(wake)
        assert receive_all(client) == (b"", "RST")
    assert run.rows("away") and run.rows("reset")[0]["reason"] == "dead"
    assert echoed(run) == b"hello"
    kube.end_sessions("thaw", pod=there.pods[0])


def test_every_errand_has_its_kinds_of_upgrade():
    assert {name: [row.method for row in rows] for name, rows in TRANSPORTS.items()} == {
        "portforward": ["GET", "POST", "GET"], "exec": ["GET", "POST"]}
