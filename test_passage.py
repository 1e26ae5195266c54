"""Tests of one client's passage to a pod (sniroute_passage): which pod, the end of each side, what is lost.

The program runs in a thread of the test, before a stand-in for a cluster.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import socket
import struct
import subprocess
import threading

import pytest

import sniroute_credentials
import sniroute_passage
from conftest import HOST, FakeClock, connect, wait_until
from sniroute_loop import monotonic
from sniroute_passage import REASONS, Client, untouched
from testbed.carrier import beside, digest, echoed, receive, receive_all, refused, send_blocks
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


@pytest.mark.parametrize("state", ["not ready", "terminating"])
def test_a_client_is_held_until_a_pod_is_ready(kube, app, forward, echo_server, state):
    there = app(echo_server.address)
    if state == "terminating":
        kube.terminate(there.pods[0])
    else:
        kube.ready(there.pods[0], False)
    run = forward(there.target)
    with run.connect() as client:
        client.sendall(b"hello")
        run.reaches("finding")
        if state == "terminating":
            kube.replace(there.pods[0])
        else:
            kube.ready(there.pods[0])
        assert receive(client, 5) == b"hello"
    assert not run.rows("failed")


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


def of(resource: str, action: str = "status", **fault) -> dict:
    """A fault of the requests for a resource."""
    return {"action": action, "resource": resource, **fault}


FORWARD = "pods/portforward"
# What goes wrong; the reason, and a part of its words.  Where one kind of upgrade fails another is tried (test_links),
# what a pod says is above, and what ends in mid-stream is below.
FAULTS = {
    "401": (of("services", code=401, message="Unauthorized"), "login", "HTTP 401: Unauthorized"),
    "401 for the upgrade": (of(FORWARD, code=401, message="Unauthorized"), "login", "HTTP 401: Unauthorized"),
    "403 for the service": (of("services", "refuse"), "forbidden", 'resources: ["services"], verbs: ["get"]'),
    "403 for pods": (of("pods", "refuse"), "forbidden", 'resources: ["pods"], verbs: ["list"]'),
    "403 for all upgrades": (of(FORWARD, "refuse"), "forbidden", 'resources: ["pods/portforward"], verbs: ["get"]'),
    "404": (of("services", code=404, message="no such thing"), "unknown", "no such thing"),
    "404 for the upgrade": (of(FORWARD, code=404, message="no such pod"), "gone", "no such pod"),
    "410": (of("pods", code=410, message="too old"), "expired", "HTTP 410: too old"),
    "429": (of("services", code=429, message="too many"), "busy", "HTTP 429: too many"),
    "429 that asks for too much time": (of("services", code=429, retry_after=60), "busy", "HTTP 429"),
    "429 for the upgrade": (of(FORWARD, code=429, message="too many"), "busy", "HTTP 429: too many"),
    "500": (of("services", code=500, message="etcd"), "answer", "HTTP 500: etcd"),
    "500 for the upgrade": (of(FORWARD, code=500, message="etcd"), "answer", "HTTP 500: etcd"),
    "503": (of("services", code=503, message="starting"), "answer", "HTTP 503: starting"),
    "a page of a proxy": (of("services", "text", code=502, message="Bad Gateway"), "answer", "HTTP 502: Bad Gateway"),
    "no HTTP": (of("services", "garbage"), "answer", ""),
    "a node that is away": (of(FORWARD, "node"), "node", "connection refused"),
    **{f"{how} {at}": ({"action": how, "at": at}, "reset", words)
       for how, at, words in (("eof", "accept", "in the TLS handshake"), ("eof", "tls", ": "), ("rst", "request", ": "),
                              ("end", "request", "before its answer"), ("eof", "head", ": "),
                              ("end", "body", "before the end of its answer"))},
    **{f"it hangs: {phase} ({at})": ({"action": "hang", "at": at}, "timeout", phase)
       for at, phase in (("accept", "TLS handshake"), ("request", "waiting for the API server's answer"),
                         ("head", "the API server's answer"), ("body", "the API server's answer"),
                         ("upgraded", "waiting for the node"), ("stream", "waiting for the node"))},
    "it hangs: upgrading": (of(FORWARD, "hang"), "timeout", "waiting for"),
}


@pytest.mark.parametrize("fault, reason, words", FAULTS.values(), ids=FAULTS)
def test_each_fault_has_its_reason_and_the_next_client_is_served(kube, app, forward, echo_server, fault, reason, words):
    there = app(echo_server.address)
    kube.fault(**fault)
    # A busy host may stop the cluster for half a second: it has to get as far as that.
    run = forward(there.target, START=1.0 if fault["action"] == "hang" else 10.0, REQUEST_TIME=0.1)
    with run.connect() as client:
        client.sendall(b"hello")
        assert receive_all(client) == (b"", "RST")
    failure = run.failure()
    assert failure["reason"] == reason and words in failure["error"], failure
    assert failure["message"].endswith(REASONS[reason])
    kube.heal()
    assert echoed(run) == b"hello"


def test_an_api_server_that_has_too_much_to_do_is_asked_again(kube, app, forward, echo_server):
    """The client is held meanwhile, whichever request it was."""
    there = app(echo_server.address)
    for resource in ("services", "pods", FORWARD):
        kube.fault("status", code=429, retry_after=0, resource=resource, times=1)
    run = forward(there.target, AGAIN_LEAST=0.05)
    assert echoed(run) == b"hello" and not run.rows("failed")
    assert [row["status"] for row in kube.requests(name=there.pods[0])][:2] == [429, 101]


def test_an_api_server_that_is_down_and_comes_back(kube, app, forward, echo_server):
    there = app(echo_server.address)
    run = forward(there.target)
    assert echoed(run) == b"hello"
    with run.connect() as client:
        client.sendall(b"x")
        receive(client, 1)
        kube.down()
        assert receive_all(client) == (b"", "RST")
    assert refused(run)["reason"] == "unreachable"
    kube.up()
    assert echoed(run) == b"hello"


def test_20_names_at_once_are_too_many_for_the_api_server(kube, app, kubernetes, single_loop_echo):
    """Its priority and fairness lets a few through, and has the others come back."""
    there = [app(single_loop_echo) for _ in range(20)]
    for resource in ("services", "pods", FORWARD):
        kube.fault("status", code=429, retry_after=0, resource=resource, times=15)
    run = kubernetes("forwarders", stdin=subprocess.PIPE,
                     prepare="import sniroute_api; sniroute_api.AGAIN_LEAST = 0.05")
    run.tell(*(f"listen {HOST}:0 {each.target}" for each in there))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(address)) for address in run.listening(20)]
        for client in clients:
            client.sendall(b"hello")
        assert [receive(client, 5) for client in clients] == [b"hello"] * 20
    assert not run.rows("failed")


@pytest.mark.parametrize("what", ["token", "token file", "cluster"])
def test_a_login_that_is_renewed_ends_nobody_and_serves_the_next_client(kube, make_cluster, app, forward, serve,
                                                                        tmp_path, monkeypatch, what):
    """As `gcloud`, `aws` and `kubectl config use-context` do it: the file is replaced."""
    monkeypatch.setattr(sniroute_credentials, "LOOK_EVERY", 0)
    there, token = app(serve(named(b"1")).address), tmp_path / "token"
    kube.user("jane", token="old")
    token.write_text("old")
    user = {"tokenFile": str(token)} if what == "token file" else {"token": "old"}
    path = kube.kubeconfig("renewed", user=user)
    run = forward(there.target, kubeconfig=str(path))
    with run.connect() as first:
        assert receive(first, 1) == b"1"
        there.has_spare()
        if what == "cluster":
            other = make_cluster()
            other.pod(there.pods[0], {8080: serve(named(b"2")).address}, labels={"app": "other"})
            other.service(there.name, {80: 8080}, {"app": "other"})
            other.kubeconfig().replace(path)
        elif what == "token":
            kube.user("john", token="new")
            kube.kubeconfig("renewed", user={"token": "new"})
        else:
            kube.user("john", token="new")
            token.write_text("new")
        run.program.loop.call(lambda: run.program.apis.of("").get("/version", lambda reply: None, monotonic() + 5))
        if what != "token file":
            wait_until(lambda: not run.program.links.spares, what="the end of what was made ahead")
        for _ in range(3):
            with run.connect() as client:
                assert receive(client, 1) == (b"2" if what == "cluster" else b"1")
        first.sendall(b"x")
        assert receive(first, 1) == b"x"
    if what != "cluster":
        assert there.sessions()[-1]["user"] == "john"
    assert not run.rows("failed")


def test_a_session_that_outlives_its_login_serves_nobody_after_its_client(kube, app, forward, serve, monkeypatch):
    """The kubeconfig names another user while a client has the session; then it leaves, with nothing left."""
    monkeypatch.setattr(sniroute_credentials, "LOOK_EVERY", 0)
    there = app(serve(named(b"1")).address)
    kube.user("jane", token="old")
    run = forward(there.target, kubeconfig=str(kube.kubeconfig("outlived", user={"token": "old"})))
    with run.connect() as first:
        assert receive(first, 1) == b"1"
        there.has_spare()
        kube.user("john", token="new")
        kube.kubeconfig("outlived", user={"token": "new"})
        run.program.loop.call(lambda: run.program.apis.of("").get("/version", lambda reply: None, monotonic() + 5))
        wait_until(lambda: not run.program.links.spares, what="the end of what was made ahead")
        first.shutdown(socket.SHUT_WR)
        assert receive_all(first) == (b"", "FIN")
    wait_until(lambda: not run.program.connections and all(link.state == "spare" for link in run.program.links.all))
    with run.connect() as client:
        assert receive(client, 1) == b"1"
        assert [row["user"] for row in there.sessions() if row["streams"]] == ["jane", "john"]


def test_a_second_pod_has_a_deadline_too(kube, app, forward, echo_server):
    """The first one's node has taken the call, and then nobody listened there."""
    there = app((HOST, 1), echo_server.address)
    kube.fault("hang", "stream", pod=there.pods[1])
    run = forward(there.target, START=1.0)
    with run.connect() as client:
        client.sendall(b"hello")
        assert receive_all(client) == (b"", "RST")
    assert run.failure()["reason"] == "timeout" and run.rows("again")


def test_a_fault_of_ours_on_the_way_ends_that_client_at_once(app, forward, echo_server):
    run = forward(app(echo_server.address).target)
    opens = run.program.links.open

    def fault(*_):
        run.program.links.open = opens
        raise ZeroDivisionError

    run.program.links.open = fault
    with run.connect() as client:
        assert receive_all(client) == (b"", "RST")  # long before its deadline
    assert echoed(run) == b"hello"
    row, = run.rows("fault")
    assert "ZeroDivisionError" in row["error"] and not run.rows("failed")
    run.log.rows.remove(row)  # it was wanted


# -- what is lost ------------------------------------------------------------------------------


@pytest.mark.parametrize("text, reason", [
    ('failed to find sandbox "x" in store: not found', "gone"),
    ("container not running (abc)", "gone"),
    ('pod not found ("x_y")', "gone"),
    ("dial tcp4 127.0.0.1:1: connect: connection refused", "refused"),
    ("failed to connect to localhost:80 inside namespace: i/o timeout", "pod"),
    ("error forwarding port 80 to pod 1a, uid : failed to execute portforward in network namespace "
     '"/var/run/netns/cni-2b": failed to connect to localhost:80 inside namespace "1a", '
     "IPv4: dial tcp4 127.0.0.1:80: connect: connection refused "
     "IPv6 dial tcp6 [::1]:80: connect: connection refused", "refused"),
    ('failed to connect to localhost:80 inside namespace "1a", '
     "IPv4: dial tcp4 127.0.0.1:80: connect: connection refused "
     "IPv6 dial tcp6: address localhost: no suitable address found", "refused"),
    ('failed to connect to localhost:80 inside namespace "1a", IPv4: dial tcp4 127.0.0.1:80: i/o timeout '
     "IPv6 dial tcp6 [::1]:80: connect: cannot assign requested address", "pod"),
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


def test_100_downloads_of_which_half_are_broken_off_and_the_others_are_whole(app, forward, serve):
    """Two services.  SNIROUTE_TEST_TRANSFER makes them longer: some tools hang where many are broken off."""
    size = max(2, int(os.environ.get("SNIROUTE_TEST_TRANSFER", "0")) // 32)  # MiB
    runs = [forward(app(serve(send_blocks(size)).address).target) for _ in range(2)]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(run.connect()) for run in runs for _ in range(50)]
        heads = [receive(client, 100_000) for client in clients]
        for client in clients[::2]:
            client.close()

        def rest(client: socket.socket, head: bytes) -> tuple[bytes, str]:
            whole = hashlib.sha256(head)
            try:
                while data := client.recv(1 << 18):
                    whole.update(data)
            except ConnectionError:
                return whole.digest(), "RST"
            return whole.digest(), "FIN"

        with concurrent.futures.ThreadPoolExecutor(50, thread_name_prefix="far-down") as pool:
            found = list(pool.map(rest, clients[1::2], heads[1::2]))
        assert found == [(digest(size), "FIN")] * 50
        for run in runs:
            with run.connect() as client:
                assert len(receive(client, 1000)) == 1000


def test_an_api_server_that_stands_still_and_goes_on(kube, app, forward, echo_server):
    """Who is there is told so; who comes meanwhile is served behind it."""
    there = app(echo_server.address)
    run = forward(there.target)
    pinging = run.program.links.pinging

    def ping(seconds: float) -> None:
        pinging.seconds = seconds
        for link in list(pinging.due):
            pinging.put(link)

    with run.connect() as first:
        first.sendall(b"x")
        receive(first, 1)
        there.has_spare()
        kube.freeze_process()
        run.program.loop.call(lambda: ping(0.1))
        try:
            assert receive_all(first) == (b"", "RST")
            assert run.rows("reset")[0]["reason"] == "dead"
            run.program.loop.call(lambda: ping(15.0))  # a cluster that is only slow is not dead
            with run.connect() as second:
                second.sendall(b"hello")
                run.reaches("finding")
                kube.thaw_process()
                assert receive(second, 5) == b"hello"
        finally:
            kube.thaw_process()
    assert echoed(run) == b"hello" and not run.rows("failed")


def test_connections_that_nobody_has_noticed_are_dead_delay_the_next_client_only(kube, app, forward, echo_server):
    """As after a sleep of the host, or another network: kept ones for requests, watches, and spare sessions."""
    there = app(echo_server.address)
    run = forward(there.target, FRESH=0.0, ACCEPT=0.2, SILENT=0.2)
    assert echoed(run) == b"hello"
    there.has_spare()
    run.reaches()
    kube.end_connections("freeze")
    assert echoed(run) == b"hello" and not run.rows("failed")
    kube.end_connections("thaw")


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


def test_a_session_that_is_lost_before_the_answer_is_a_reason(kube, app, forward, serve):
    """The pod may have read what the client said, so nobody else is asked."""
    heard, go = [], threading.Event()
    there = app(serve(lambda sock: (heard.append(sock.recv(100)), go.wait(20))).address)
    run = forward(there.target)
    with run.connect() as client:
        client.sendall(b"INSERT")
        wait_until(lambda: heard)
        kube.end_sessions("rst", pod=there.pods[0])
        assert receive_all(client) == (b"", "RST")
    assert run.failure()["reason"] == "reset" and heard == [b"INSERT"]
    go.set()


def test_a_node_that_resets_the_call_cuts_it(kube, app, forward, echo_server):
    kube.fault("rst_stream", "open", after=1, times=1)
    run = forward(app(echo_server.address).target)
    with run.connect() as client:
        client.sendall(b"hello")
        assert receive_all(client) == (b"h", "RST")
    assert {row["reason"] for row in run.rows("reset") + run.rows("failed")} == {"cut"}
    assert echoed(run) == b"hello"


@pytest.mark.parametrize("method", ["on_data", "begin"])
def test_a_fault_of_ours_ends_one_client(app, forward, echo_server, monkeypatch, method):
    run = forward(app(echo_server.address).target)
    with run.connect() as other:
        other.sendall(b"x")
        receive(other, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Client, method, lambda *_: 1 // 0)
            with pytest.raises(ConnectionError), run.connect() as client:  # even the connect may see it
                client.sendall(b"hello")
                client.recv(1)
        run.reaches("open")
        other.sendall(b"y")
        assert receive(other, 1) == b"y"
    assert "ZeroDivisionError" in run.rows("fault")[0]["error"]
    run.log.rows = [row for row in run.log.rows if row.get("event") != "fault"]


@pytest.mark.parametrize("method", ["on_cut", "on_room"])
def test_a_fault_of_ours_in_what_a_session_tells_ends_one_client(kube, app, forward, echo_server, monkeypatch, method):
    there = app(echo_server.address)
    run = forward(there.target)
    with run.connect() as client:
        client.sendall(b"hello")
        assert receive(client, 5) == b"hello"
        at, = run.program.connections
        monkeypatch.setattr(Client, method, lambda *_: 1 // 0)
        if method == "on_cut":
            kube.end_sessions("rst", pod=there.pods[0])
        else:
            run.program.loop.call(at.way.link.on_room)
        assert receive_all(client) == (b"", "RST")
    assert "ZeroDivisionError" in run.rows("fault")[0]["error"]
    run.log.rows = [row for row in run.log.rows if row.get("event") != "fault"]
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


def test_a_client_that_has_left_is_not_waited_for(kube, app, forward, serve):
    """What it never got is unsent for ever, as the kernel counts; here is nobody who could still get it."""
    kube.set(runtime="resetting")

    def handler(sock: socket.socket) -> None:
        while sock.recv(1):
            pass
        sock.sendall(b"bye")

    run = forward(app(serve(handler).address).target, LINGER=60.0)
    with run.connect() as client:
        client.sendall(b"x")
    run.reaches()
    assert not run.program.settling.due and not run.program.lingering.due


def test_a_runtime_without_half_close_ends_the_connection(kube, app, forward, echo_server):
    kube.set(runtime="containerd", grace=1.0)
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
    run = forward(there.target, GRACE=1.0)
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
    with forward(there.target, GRACE=1.0).connect() as client:
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


@pytest.mark.parametrize("leaves", ["stays", "reset"])
def test_a_client_that_does_not_leave_behind_the_pods_end_is_let_go(app, forward, serve, leaves):
    run = forward(app(serve(lambda sock: sock.sendall(b"hello")).address).target, LINGER=60.0)
    lingering = run.program.lingering

    def expire() -> None:
        for each in lingering.due:
            lingering.due[each] = run.program.loop.next_check = 0.0

    with run.connect() as client:
        assert receive_all(client) == (b"hello", "FIN")
        run.reaches("ending")
        client.sendall(b"x")
        if leaves == "reset":
            reset(client)
        else:
            run.program.loop.call(expire)
        run.reaches()
    assert not run.rows("failed")


def test_a_client_that_is_slow_sees_the_pods_end_behind_its_last_byte(app, forward, serve):
    go = threading.Event()
    run = forward(app(serve(lambda sock: (sock.sendall(b"x"), go.wait(20))).address).target)
    with run.connect() as client:
        receive(client, 1)
        there, = run.program.connections

        def hand_down() -> None:
            there.on_data("data", [memoryview(NOISE * 16)])
            there.on_ended("data")

        run.program.loop.call(hand_down)
        data, end = receive_all(client)
        assert (len(data), end) == (len(NOISE) * 16, "FIN")
        go.set()


@pytest.mark.parametrize("said", [b"", b"hello"], ids=["silent", "said something"])
def test_a_client_that_leaves_before_there_is_a_pod(kube, app, forward, echo_server, said):
    """What it has said may be all that it wanted to say, so there is a little time for that."""
    there = app(echo_server.address)
    kube.ready(there.pods[0], False)
    run = forward(there.target)
    run.program.hurried.seconds = 0.2
    with run.connect() as client:
        client.sendall(said)
        run.reaches("finding")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == (b"", "RST" if said else "FIN")
    assert bool(said) == bool(run.rows("failed"))
    assert not said or run.failure()["error"] == "5 s after the client's end, choosing a pod"


def test_a_client_that_has_said_all_before_there_is_a_pod_is_served(kube, app, forward, echo_server):
    there = app(echo_server.address)
    kube.ready(there.pods[0], False)
    run = forward(there.target)
    with run.connect() as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: run.program.hurried.due)
        kube.ready(there.pods[0])
        assert receive_all(client) == (b"hello", "FIN")


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


@pytest.mark.parametrize("reads, broken", [(False, False), (False, True), (True, False)],
                         ids=["end", "reset", "reads slowly"])
def test_a_client_that_never_takes_its_last_bytes_is_let_go(app, forward, serve, reads, broken, monkeypatch):
    go, clock = threading.Event(), FakeClock(monotonic())
    monkeypatch.setattr(sniroute_passage, "monotonic", clock)
    run = forward(app(serve(lambda sock: (sock.sendall(b"x"), go.wait(20))).address).target, HALF_LAST=0.1)
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
            for _ in range(2):
                receive(client, len(NOISE))
                wait_until(lambda: there.slow[0] == there.down, what="a look at it")
                clock.jump(0.08)
            assert receive_all(client) == (NOISE * 14, "FIN")
        else:
            wait_until(lambda: there.slow[0] == there.down, what="a look at it")
            clock.jump(0.2)
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
        assert go.wait(10)  # a client that reads meanwhile may be as fast as that
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
