"""Tests of sniroute_ends.py: two ends, linked in all ways, and what becomes of them when something goes wrong."""

from __future__ import annotations

import socket

import pytest

from conftest import HOST, connect, echo, wait_until
from sniroute_peering import CONTROL
from sniroute_signals import Signal, ask, parse_terms, token_of
from testbed.nodepass import KINDS, QUICK, Tunnel, how_many_wait, is_refused, read_all, send_all, show, trip
from testbed.ports import free_port

@pytest.mark.parametrize("flow", ["-", "+"], ids=["server accepts", "client accepts"])
@pytest.mark.parametrize("query", [query for query, _ in KINDS], ids=[name for _, name in KINDS])
def test_each_kind_of_pool_carries_both_ways(query, flow, tunnel, echo_server, tls_files):
    """Small and large, and ends that are passed on one by one."""
    server, client, host = tls_files(query)
    made = tunnel(echo_server.address, flow, server, client, host=host)
    assert trip(made.address) == b"hello"
    data = bytes(range(256)) * 8192
    with connect(made.address) as caller:
        thread = send_all(caller, data)
        assert read_all(caller) == data
        thread.join()
    wait_until(lambda: not made.server.program.connections and not made.client.program.connections
               and not made.dialling.end.callees)
    assert made.accepting.end.slots.tcp == made.dialling.end.slots.tcp == 0


def test_a_hundred_callers_at_once(tunnel, echo_server):
    """More than the pool has: it is dialled ahead of them."""
    made = tunnel(echo_server.address, client="min=4")
    callers = [made.call(f"{number}".encode()) for number in range(100)]
    for number, caller in enumerate(callers):
        with caller:
            assert caller.recv(10) == f"{number}".encode()
    assert made.client.end.sizer.capacity > 4


def test_a_target_that_is_not_there_ends_its_caller_at_once(tunnel):
    made = tunnel((HOST, free_port()))
    assert is_refused(made.address)
    made.client.has_said("no target for")


def test_what_one_side_cuts_looks_cut_at_the_other(tunnel, serve):
    """A reset of the target is a reset for the caller, behind the bytes that came before."""
    def cut(sock: socket.socket) -> None:
        sock.recv(10)
        sock.sendall(b"half")
        assert sock.recv(10) == b"more"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()

    made = tunnel(serve(cut).address)
    with made.call(b"hello") as caller:
        assert caller.recv(10) == b"half"
        caller.sendall(b"more")
        with pytest.raises(ConnectionResetError):
            caller.recv(10)


@pytest.mark.parametrize("query", ["", "tls=1"])
def test_a_connection_of_the_pool_that_dies_is_not_handed_out(query, tunnel, echo_server):
    """And another takes its place."""
    made = tunnel(echo_server.address, server=query, client="min=3")
    server, client = made.server.end, made.client.end
    for _ in range(3):
        wait_until(lambda: client.idle >= 3)
        ids = set(client.pool.idle)
        made.client.call(lambda: next(iter(client.pool.idle.values())).wire.close())
        wait_until(lambda: set(server.pool.idle) <= set(client.pool.idle) and not ids <= set(server.pool.idle))
    assert [trip(made.address) for _ in range(4)] == [b"hello"] * 4


@pytest.mark.parametrize("flow", ["-", "+"])
def test_running_connections_outlive_the_link(flow, tunnel, echo_server):
    made = tunnel(echo_server.address, flow)
    with made.call(b"before") as caller:
        assert caller.recv(10) == b"before"
        made.server.call(lambda: made.server.end.link.end("a test"))
        made.client.has_said("the link is over")
        caller.sendall(b"behind")
        assert caller.recv(10) == b"behind"
        made.linked_again()
        assert trip(made.address) == b"hello"


def test_callers_wait_for_a_client(tunnel, echo_server, lone):
    """As long as for a connection; and a client that comes meanwhile serves them."""
    server = lone().begin(f"server://key@{HOST}:1/{HOST}:2?mode=1", port=0, targets=((HOST, 0),))
    with connect(server.callers, b"early") as caller:
        wait_until(lambda: how_many_wait(server.end.pool))
        client = lone().begin(f"client://key@{HOST}:1/{HOST}:2?mode=2", port=server.end.listener.getsockname()[1],
                               targets=(echo_server.address,))
        assert caller.recv(10) == b"early"
    assert client.end.link is not None


def test_a_caller_without_a_client_is_told(lone):
    server = lone(times=QUICK._replace(pool_get=0.05)).begin(f"server://key@{HOST}:1/{HOST}:2?mode=1", port=0,
                                                              targets=((HOST, 0),))
    assert is_refused(server.callers)
    row, = [row for row in server.log.rows if row.get("event") == "failed"]
    assert row["reason"] == "away" and "no client has dialled in to 127.0.0.1:" in row["message"]


def test_a_wrong_key_gets_no_link(lone):
    server = lone().begin(f"server://right@{HOST}:1/{HOST}:2?mode=1", port=0, targets=((HOST, 0),))
    client = lone().begin(f"client://wrong@{HOST}:1/{HOST}:2?mode=2", port=server.end.listener.getsockname()[1])
    assert "the key is wrong" in client.has_said("the handshake has failed")
    assert "has asked with a wrong key" in server.has_said("wrong key")
    wait_until(lambda: client.end.failures >= 3)
    assert sum("wrong key" in line for line in server.messages) == 1, "once in a while"
    assert not any(word in line for line in (*server.messages, *client.messages)
                   for word in ("right", token_of("right"), token_of("wrong")))


def test_a_second_client_gets_no_link(tunnel, echo_server, lone):
    """It is told so, and the first one does not notice."""
    made = tunnel(echo_server.address, server="tls=1")
    other = lone().begin(f"client://key@{HOST}:1/{HOST}:2?mode=2", port=made.server.end.listener.getsockname()[1])
    wait_until(lambda: other.end.failures >= 2)
    assert other.end.link is None
    assert [trip(made.address) for _ in range(5)] == [b"hello"] * 5
    assert made.server.end.link is not None


def test_a_client_that_has_gone_without_a_word_makes_room(tunnel, echo_server, lone):
    """A second client that knocks has the first one asked for a sign of life."""
    made = tunnel(echo_server.address, server="tls=1", times=QUICK._replace(report=0.1))
    made.client.call(lambda: setattr(made.client.end.link, "due", []))  # it says nothing any more
    made.server.has_said("has said nothing for 0.3 s")
    made.client.has_said("the link is over")
    made.linked_again()
    assert trip(made.address) == b"hello"


def test_strangers_of_the_same_address_do_not_join_the_pool(tunnel, echo_server):
    """Where both ends are ours each connection is proven; one that is not gets no caller."""
    made = tunnel(echo_server.address, times=QUICK._replace(handshake=60.0))  # for which a stranger may be silent
    address = made.server.end.listener.getsockname()
    strangers = [connect(address) for _ in range(8)]
    for sock in strangers:
        assert len(sock.recv(4)) == 4
    strangers[0].sendall(b"x" * 16)
    made.server.has_said("has not proven the key")
    for _ in range(80):
        assert trip(made.address) == b"hello"
    for sock in strangers[1:]:
        sock.settimeout(0.01)
        with pytest.raises(TimeoutError):
            sock.recv(1)
    for sock in strangers:
        sock.close()


def test_the_server_lets_nobody_in_before_a_handshake(lone):
    server = lone().begin(f"server://key@{HOST}:1/{HOST}:2?mode=1", port=0, targets=((HOST, 0),))
    with connect(server.end.listener.getsockname()) as sock:
        sock.settimeout(0.2)
        with pytest.raises((TimeoutError, ConnectionError)):
            assert sock.recv(4), "it ended"
            raise AssertionError("an id")


def test_an_unknown_id_is_refused_at_once(tunnel, echo_server):
    """The other end is told, and its caller does not wait."""
    made = tunnel(echo_server.address, times=QUICK._replace(pool_get=0.1))
    made.server.call(lambda: made.server.end.link.send(Signal("tcp", "192.0.2.1:5", "0badcafe")))
    made.client.has_said("not there (0badcafe)")
    assert trip(made.address) == b"hello"


@pytest.mark.parametrize("query", ["notcp=1", ""])
def test_a_dialling_end_that_serves_no_tcp_says_so(query, tunnel, echo_server):
    """In the original the caller hangs for ever."""
    made = tunnel(echo_server.address, client=query)
    assert is_refused(made.address) if query else trip(made.address) == b"hello"


def test_slots_are_given_back(tunnel, echo_server):
    made = tunnel(echo_server.address, server="slot=2")
    with made.call(b"a") as one, made.call(b"b") as two:
        assert (one.recv(1), two.recv(1)) == (b"a", b"b")
        assert is_refused(made.address, b"c")
    wait_until(lambda: made.server.end.slots.tcp == 0)
    assert trip(made.address) == b"hello"


@pytest.mark.parametrize("said, passes", [
    (b"\5\1\0", False), (b"\4\1\0\x50\xc0\0\2\1\0", False), (b"GET / HTTP/1.1\r\n", False), (b"\x16\3\1\2\0\1\0\1", False),
    (b"hi", True), (b"hello, world", True), (b"", True)])
def test_block_has_an_end(said, passes, tunnel, serve):
    """Short greetings, and protocols in which the server speaks first, do not hang as in the original."""
    def server(sock: socket.socket) -> None:
        sock.sendall(b"welcome")
        echo(sock)

    made = tunnel(serve(server).address, server="block=123")
    if not passes:
        assert is_refused(made.address, said)
        return
    with made.call(said) as caller:
        got = b""
        while len(got) < 7 + len(said):
            got += caller.recv(100)
        assert got == b"welcome" + said


@pytest.mark.parametrize("flow", ["-", "+"])
def test_rate_slows_and_does_not_stop(flow, tunnel, echo_server):
    """In the original it stops for ever after a second's worth."""
    made = tunnel(echo_server.address, flow, server="rate=40")  # 5 MB a second
    data = b"x" * 7_000_000
    with connect(made.address) as caller:
        thread = send_all(caller, data)
        assert read_all(caller) == data
        thread.join()


def test_an_idle_connection_is_cut(tunnel, echo_server):
    made = tunnel(echo_server.address, server="read=200ms")
    with made.call(b"hello") as caller:
        assert caller.recv(10) == b"hello"
        with pytest.raises(ConnectionResetError):
            caller.recv(1)


def test_with_a_read_timeout_an_end_is_passed_on_at_once(tunnel, echo_server):
    """In the original only when the time is over."""
    made = tunnel(echo_server.address, server="read=1h", client="read=1h")
    with made.call(b"hello") as caller:
        caller.shutdown(socket.SHUT_WR)
        assert read_all(caller) == b"hello"


@pytest.mark.parametrize("version, start", [(1, b"PROXY TCP4 127.0.0.1 127.0.0.1 "), (2, b"\r\n\r\n\0\r\nQUIT\n")])
def test_the_target_learns_who_calls(version, start, tunnel, serve):
    heard = serve(lambda sock: sock.recv(200))
    made = tunnel(heard.address, client=f"proxy={version}")
    with made.call(b"hello") as caller:
        said = heard.result()
        assert said.startswith(start)
        if version == 1:
            assert said.split(b" ")[4:] == [str(caller.getsockname()[1]).encode(), b"%d\r\nhello" % heard.address[1]] \
                or said.endswith(b"\r\n")


def test_tls_1_finds_who_is_between(tunnel, echo_server):
    """A wrong fingerprint ends the link at once, on either side."""
    made = tunnel(echo_server.address, server="tls=1")
    made.client.call(lambda: made.client.end.link.send(Signal("verify", "", "0badcafe", "sha256:" + "0" * 64)))
    made.server.has_said("the certificates differ")
    made.linked_again()
    made.server.call(lambda: made.server.end.link.send(Signal("verify", "", "0badcafe", "sha256:" + "0" * 64)))
    made.client.has_said("the certificates differ")
    made.linked_again(3)
    assert trip(made.address) == b"hello"


def test_a_flush_renews_the_pool(tunnel, echo_server):
    made = tunnel(echo_server.address, client="min=4")
    before = set(made.client.end.pool.idle)
    made.server.call(lambda: made.server.end.link.send(Signal("flush")))
    wait_until(lambda: made.client.end.idle >= 4 and not before & set(made.client.end.pool.idle))
    assert trip(made.address) == b"hello"


def test_the_terms_are_the_originals(lone):
    """Byte for byte, for a client that does not say that it is ours."""
    server = lone().begin(f"server://capkey@{HOST}:1/{HOST}:2?mode=1&max=7", port=0, targets=((HOST, 0),))
    import ssl
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with connect(server.end.listener.getsockname()) as plain, context.wrap_socket(plain) as sock:
        sock.sendall(ask("none", token_of("capkey"), False))
        said = read_all(sock)
    assert said.endswith(b'\r\n\r\n{"flow":"-","max":7,"tls":"0","type":"0"}\n')
    assert parse_terms(said, True).nonce == ""


def test_a_port_that_is_taken_is_tried_again(lone, echo_server):
    """The tunnel's and the callers'."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        server = lone().begin(f"server://key@{HOST}:{port}/{HOST}:2?mode=1", targets=((HOST, 0),))
        server.has_said(f"cannot listen on 127.0.0.1:{port}")
    server.has_said(f"listening for a client on 127.0.0.1:{port}")


def test_mode_0_of_a_server_dials_a_target_whose_address_is_taken(lone, echo_server):
    server = lone().begin(f"server://key@{HOST}:1/{show(echo_server.address)}", port=0)
    wait_until(lambda: server.program.ends and server.end.listener)
    client = lone().begin(f"client://key@{HOST}:1/{HOST}:2?mode=2", port=server.end.listener.getsockname()[1],
                           targets=((HOST, 0),))
    made = Tunnel(server, client).linked()
    assert made.accepting is client
    assert trip(made.address) == b"hello"


def test_a_server_that_comes_back_with_the_other_flow_finds_no_callers_at_the_client(lone, echo_server):
    """A client that goes on listening at its target's address would keep that from the service, and dial itself."""
    service = HOST, free_port()
    server = lone().begin(f"server://key@{HOST}:1/{HOST}:2?mode=2", port=0, targets=(echo_server.address,))
    port = wait_until(lambda: server.program.ends and server.end.listener).getsockname()[1]
    client = lone().begin(f"client://key@{HOST}:1/{show(service)}?mode=2", port=port)
    made = Tunnel(server, client).linked()
    assert made.accepting is client and trip(service) == b"hello"
    server.call(server.end.close)
    other = lone().begin(f"server://key@{HOST}:1/{HOST}:2?mode=1", port=port, targets=((HOST, 0),))
    made = Tunnel(other, client)
    wait_until(lambda: other.program.ends and made.is_linked())
    assert not client.program.listeners and client.end.datagrams.port is None
    with socket.create_server(service) as listener, made.call(b"hello"), listener.accept()[0] as target:
        assert target.recv(10) == b"hello"


def test_nothing_of_a_link_stays_behind(tunnel, echo_server):
    """Twenty links, one after another: connections, timers and tables are as before."""
    made = tunnel(echo_server.address, client="min=4", times=QUICK._replace(cooldown=0.01))

    def state() -> tuple[int, ...]:
        return tuple(count for each in (made.server, made.client) for count in (
            len(each.program.loop.queues), len(each.program.loop.timers), len(each.program.connections),
            len(each.end.pool.wanted), len(each.end.callees), len(each.end.carried)))

    before = state()
    for count in range(20):
        made.server.call(lambda: made.server.end.link.end("a test"))
        made.linked_again(count + 2)
        assert trip(made.address) == b"hello"
    wait_until(lambda: state() == before)
    assert len(made.client.program.alarms.heap) < 400
    assert CONTROL == "00000000"
