"""The defects that the original NodePass has, by what a user sees of them: ours has none, and copes with them.

    what a user sees in the original                        here, and elsewhere
 1  a start that takes eight seconds, now and then          test_each_start_is_quick; an original that loses its answer:
                                                            test_an_answer_that_never_comes_costs_a_moment
 2  with type=3 callers, or targets, that hang for ever,     ends both ways: test_ends, test_each_kind_of_pool_carries...;
    and ends of downloads that are missing                  an original at the other end: test_with_type_3_...
 3  with tls=1 a start that takes 20 seconds                test_both_ends_may_show_their_certificate_on_one_connection
 4  rate= stops a connection for ever                       test_ends, test_rate_slows_and_does_not_stop
 5  block= lets short greetings hang                        test_ends, test_block_has_an_end
 6  half-closed connections lose the answer; read= delays   test_ends, test_each_kind_of_pool_carries_both_ways,
    every end                                               test_with_a_read_timeout_an_end_is_passed_on_at_once
 7  strangers' bytes in a caller's connection, and callers  test_ends, test_strangers_of_the_same_address_do_not_join...,
    that get a dead one                                     test_a_connection_of_the_pool_that_dies_is_not_handed_out;
                                                            an original that hands one out: test_a_dead_connection_...
 8  callers that wait for ever for one who does not serve   test_ends, test_an_unknown_id_is_refused_at_once,
                                                            test_a_dialling_end_that_serves_no_tcp_says_so; UDP here
 9  large datagrams are cut                                 test_a_large_datagram_comes_whole,
                                                            test_an_original_gets_no_datagram_that_it_would_cut
10  lbs=1 never changes its mind in a LAN                   test_upstreams, test_the_fastest_is_chosen_also_below...
11  a master without an id, that kills its instances, and   test_master, test_instances
    whose events fall silent
12  a check of the certificate that stands for another      test_a_certificate_is_compared_in_each_link
13  the key goes to whoever answers                         test_a_redirect_is_not_followed, test_with_tls_2_...; who
                                                            replays a handshake: test_nodepass_hostile
14  a burst of callers waits for a clock                    test_a_burst_is_dialled_ahead_of

`test_the_original_at_one_end` has the original program itself at one end: see SNIROUTE_TEST_NODEPASS.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any, Callable

import pytest

import sniroute_lanes
from conftest import HOST, connect, wait_until
from sniroute_h2 import CANCEL
from sniroute_signals import Signal, ask, frame_datagram
from sniroute_streams import H2Client, H2Server
from testbed.foreign import Original, read_exactly
from testbed.nodepass import KINDS, QUICK, Local, read_all, send_all, trip
from testbed.ports import free_port

TLS_KINDS = [query for query, _ in KINDS if "tls=2" not in query]


@pytest.fixture
def as_original(monkeypatch) -> None:
    """Our client asks as the original's does, so neither end takes the other for one of ours."""
    monkeypatch.setattr(sniroute_lanes, "ask", lambda name, token, ours: ask(name, token, False))


@pytest.fixture
def udp_echo() -> Any:
    """A UDP socket that a test reads, and answers from."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind((HOST, 0))
        sock.settimeout(10)
        yield sock


def client_of(lone: Callable[..., Local], server: Original, behind: Any = (HOST, 1), **times: Any) -> Local:
    """Our client of such a server: with a target (flow "-"), or an address for callers."""
    return lone(times=QUICK._replace(**times)).begin(f"client://key@{HOST}:1/{HOST}:2?mode=2&min=4",
                                                      port=server.address[1], targets=(behind,))


# -- 1: starts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("query", TLS_KINDS)
def test_each_start_is_quick(query, tunnel, echo_server):
    """The first handshake gets its answer each time, and no end waits for a clock of the other."""
    for _ in range(3):
        began = time.monotonic()
        made = tunnel(echo_server.address, server=query, client="min=8")
        assert trip(made.address) == b"hello" and made.client.end.failures == 0
        assert not any("again in" in line for line in made.client.messages)
        assert time.monotonic() - began < 3, "the original takes 8 to 40 s where it loses the race"
        made.client.call(made.client.end.close)
        made.server.call(made.server.end.close)


def test_an_answer_that_never_comes_costs_a_moment(lone, served, echo_server):
    """The original's server loses it, and then takes the next handshake for its control channel."""
    server = served(Original, loses=1)
    began = time.monotonic()
    client = client_of(lone, server, echo_server.address)
    assert server.ready.wait(10) and time.monotonic() - began < 4
    number, sock = server.slot()
    server.channel.say("tcp", "192.0.2.1:5", number)
    sock.sendall(b"hello")
    assert read_exactly(sock, 5) == b"hello"
    assert client.end.link is not None


# -- 2: ends with type=3 -----------------------------------------------------------------------


def never_end(monkeypatch) -> None:
    """Our server ends no stream, as the original's."""
    monkeypatch.setattr(H2Server, "end", lambda self, wire: None)


@pytest.mark.parametrize("flow", ["-", "+"])
def test_with_type_3_a_server_that_never_ends_a_stream_leaves_nothing_open(flow, as_original, monkeypatch, tunnel, serve):
    """As soon as our side has ended, too, all is over: the caller, the target, and the stream."""
    def answer(sock: socket.socket) -> bytes:
        said = sock.recv(10)
        sock.sendall(b"bye")
        return said

    never_end(monkeypatch)
    made = tunnel(serve(answer).address, flow, server="type=3&tls=1", client="min=4")
    for _ in range(3):
        with made.call(b"hello") as caller:
            assert read_exactly(caller, 3) == b"bye"
            if flow == "-":
                assert caller.recv(10) == b"", "an end that came from the target"
    wait_until(lambda: not made.client.end.relays.open and not made.server.end.relays.open)
    wait_until(lambda: made.client.end.slots.tcp == made.server.end.slots.tcp == 0)  # given back a moment later


@pytest.mark.parametrize("flow", ["-", "+"])
def test_with_type_3_a_client_that_ends_by_a_reset_has_ended_well(flow, as_original, monkeypatch, tunnel, serve):
    """The last bytes come, and then an end: no failure."""
    data = bytes(range(256)) * 4096
    made = tunnel(serve(lambda sock: sock.sendall(data)).address, flow, server="type=3&tls=1", client="min=4")
    if flow == "-":
        monkeypatch.setattr(H2Client, "end", lambda self, wire: self.reset(wire.stream, CANCEL))
    for _ in range(3):
        with made.call() as caller:
            assert read_all(caller) == data
    wait_until(lambda: not made.server.end.relays.open)


# -- 3: the certificate with tls=1 -------------------------------------------------------------


@pytest.mark.parametrize("flow", ["-", "+"])
def test_both_ends_may_show_their_certificate_on_one_connection(flow, lone, served, echo_server):
    """In the original each waits for the other then, and both give the link up."""
    server = served(Original, flow=flow, tls=1)
    client = client_of(lone, server, echo_server.address if flow == "-" else (HOST, 0))
    assert server.ready.wait(10)
    same = server.channel.hear("verify")
    assert same.fp == server.fingerprint
    server.channel.say("verify", "", same.id, server.fingerprint)
    if flow == "-":
        number, sock = server.slot()
        if number == same.id:
            number, sock = server.slot()
        server.channel.say("tcp", "192.0.2.1:5", number)
        sock.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"
    else:
        with connect(client.callers, b"hello") as caller:
            number, sock = server.slot(server.channel.hear("tcp").id)
            sock.sendall(read_exactly(sock, 5))
            assert caller.recv(10) == b"hello"
    assert client.end.link is not None and client.end.verified


# -- 7: dead connections -----------------------------------------------------------------------


@pytest.mark.parametrize("when", ["long ago", "just now"])
def test_a_dead_connection_that_is_handed_out_costs_one_caller_and_no_target(when, lone, served, echo_server):
    """An original that does not watch its idle connections: the next caller is served, and none waits for ever."""
    server = served(Original)
    client = client_of(lone, server, echo_server.address, pool_get=0.2)
    assert server.ready.wait(10)
    number, sock = server.slot()
    if when == "long ago":
        wait_until(lambda: number in client.end.pool.idle)  # the server has sent its id, and the client may not have it
        client.call(lambda: client.end.pool.pick(number).wire.reset())
    server.channel.say("tcp", "192.0.2.1:5", number)
    with contextlib.suppress(ConnectionError):
        sock.sendall(b"hello")
        if when == "just now":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        else:
            assert sock.recv(10) == b""
    number, sock = server.slot()
    server.channel.say("tcp", "192.0.2.1:6", number)
    sock.sendall(b"hello")
    assert read_exactly(sock, 5) == b"hello"
    wait_until(lambda: client.end.idle >= 4, what="others in their place")
    wait_until(lambda: len(client.end.relays.open) == 1, what="the end of the dead one's target")


# -- 8: who does not serve ---------------------------------------------------------------------


def test_a_dialling_end_that_serves_no_udp_keeps_no_connection(tunnel, udp_echo):
    made = tunnel(udp_echo.getsockname(), client="noudp=1&min=4")
    with socket.socket(type=socket.SOCK_DGRAM) as caller:
        caller.sendto(b"hello", made.udp)
        wait_until(lambda: made.server.end.counts.udps == 0 and made.server.end.datagrams.waiting == 0)
    wait_until(lambda: made.client.end.idle >= 4 and made.server.end.idle >= 4)


# -- 9: datagrams ------------------------------------------------------------------------------


@pytest.mark.parametrize("query", TLS_KINDS)
def test_a_large_datagram_comes_whole(query, tunnel, udp_echo):
    made = tunnel(udp_echo.getsockname(), server=query, client="min=4")
    with socket.socket(type=socket.SOCK_DGRAM) as caller:
        caller.settimeout(10)
        for size in (0, 1, 16_384, 16_385, 65_507):
            caller.sendto(bytes(size), made.udp)
            data, address = udp_echo.recvfrom(65536)
            assert len(data) == size
            udp_echo.sendto(data, address)
            assert len(caller.recv(65536)) == size


def test_an_original_gets_no_datagram_that_it_would_cut(as_original, tunnel, udp_echo):
    """Nor one for which it would end the flow: it is dropped, and that is said."""
    made = tunnel(udp_echo.getsockname(), client="min=4")
    with socket.socket(type=socket.SOCK_DGRAM) as caller:
        for said in (b"first", bytes(20_000), b"last"):
            caller.sendto(said, made.udp)
        assert [udp_echo.recv(65536) for _ in range(2)] == [b"first", b"last"]
    made.server.has_said("too large for the way")


def test_an_original_whose_large_datagram_was_cut_is_understood(lone, served, udp_echo):
    """What it sends is whole for its length: 16,384 bytes of 20,000."""
    server = served(Original)
    client = client_of(lone, server, udp_echo.getsockname())
    assert server.ready.wait(10)
    number, sock = server.slot()
    server.channel.say("udp", "192.0.2.1:5", number)
    for size in (16_384, 5):
        frame = frame_datagram(bytes(size))
        sock.sendall(frame[:2])  # two writes, as the original's
        sock.sendall(frame[2:])
        data, address = udp_echo.recvfrom(65536)
        assert len(data) == size
    udp_echo.sendto(b"answer", address)
    assert read_exactly(sock, 8) == b"\0\6answer"
    assert client.end.link is not None


# -- 12, 13: whom one talks to -----------------------------------------------------------------


def test_a_certificate_is_compared_in_each_link(tunnel, echo_server):
    """What the other end has said of it twice in one link does not count for the next."""
    made = tunnel(echo_server.address, server="tls=1", client="min=4")
    client = made.client.end
    made.client.call(lambda: [client.link.send(client_verify(client)) for _ in range(3)])
    assert trip(made.address) == b"hello"
    made.client.call(lambda: setattr(client, "say_verify", lambda: None))  # it does not show it in the next link
    made.server.call(lambda: made.server.end.link.end("a test"))
    wait_until(lambda: client.link is not None and made.server.end.link is not None and made.server.end.idle)
    time.sleep(0.1)
    assert not made.server.end.verified and not made.server.end.pool.is_open


def client_verify(client: Any) -> Any:
    """What a client says of the certificate that it sees, of a connection that is not there."""
    return Signal("verify", "", "0badcafe", client.fingerprint)


def test_a_redirect_is_not_followed(lone, served):
    """The token is for the server of the URL, and for nobody else."""
    other = served(lambda sock, number: sock.recv(1000))

    def script(sock: socket.socket, number: int) -> None:
        wrapped = server.shake(sock)
        wrapped.sendall(b"HTTP/1.1 302 Found\r\nLocation: https://%s:%d/\r\nContent-Length: 0\r\n\r\n"
                        % (HOST.encode(), other.address[1]))

    server = served(script)
    client = client_of(lone, server)
    assert "302, which leads elsewhere" in client.has_said("the handshake has failed")
    wait_until(lambda: client.end.failures >= 3)
    assert other.count == 0 and client.end.link is None


def test_with_tls_2_a_server_that_nobody_vouches_for_hears_no_token(lone, served):
    """The handshake itself is checked, and not only the pool."""
    heard: list[bytes] = []

    def script(sock: socket.socket, number: int) -> None:
        wrapped = server.wrap(sock)
        heard.append(wrapped.recv(1000))

    server = served(script)
    client = lone().begin(f"client://key@{HOST}:1/{HOST}:2?mode=2&tls=2&sni=example.com", port=server.address[1],
                           targets=((HOST, 1),))
    client.has_said("the handshake has failed")
    wait_until(lambda: client.end.failures >= 2 and server.count >= 2)
    assert not any(heard)


# -- 14: bursts --------------------------------------------------------------------------------


def test_a_burst_is_dialled_ahead_of(tunnel, single_loop_echo):
    """A pool of four, and 400 callers at once: by the original's clock they would take some seconds."""
    made = tunnel(single_loop_echo, client="min=4")
    began = time.monotonic()
    callers = [made.call(b"hello") for _ in range(400)]
    for caller in callers:
        assert caller.recv(10) == b"hello"
        caller.close()
    assert time.monotonic() - began < 5


# -- the original itself -----------------------------------------------------------------------


@pytest.mark.parametrize("flow", ["-", "+"])
@pytest.mark.parametrize("query", [query for query, _ in KINDS])
@pytest.mark.parametrize("ours", ["server", "client"])
def test_the_original_at_one_end(ours, query, flow, original, processes, tls_files, echo_server, udp_echo):
    """TCP, large and small, and UDP, with each kind of pool.  The original itself may take 40 s to start."""
    server_query, client_query, host = tls_files(query)
    tunnel_port, callers = free_port(), free_port()
    behind = f"{HOST}:{echo_server.address[1]}"
    ends = (f"{HOST}:{callers}", behind)
    first, second = ends if flow == "-" else ends[::-1]
    urls = {"server": f"server://key@{host}:{tunnel_port}/{first}?mode={1 if flow == '-' else 2}&{server_query}",
            "client": f"client://key@{host}:{tunnel_port}/{second}?mode=2&min=8&{client_query}"}
    for end in ("server", "client"):
        (processes if end == ours else original)(urls[end])

    def is_up() -> bool:
        with contextlib.suppress(OSError, AssertionError):
            return trip((HOST, callers)) == b"hello"
        return False

    wait_until(is_up, 60, "a first caller that is served")
    for _ in range(30):
        assert trip((HOST, callers)) == b"hello"
    data = bytes(range(256)) * 4096
    with connect((HOST, callers)) as caller:
        send_all(caller, b"").join()
    with connect((HOST, callers)) as caller:  # a half-close is lost in the original: end when all is there
        caller.sendall(data[:100_000])
        assert read_exactly(caller, 100_000) == data[:100_000]
    with socket.socket(type=socket.SOCK_DGRAM) as target, socket.socket(type=socket.SOCK_DGRAM) as caller:
        target.bind((HOST, echo_server.address[1]))
        target.settimeout(10)
        caller.settimeout(10)
        for size in (5, 0, 1_400, 16_000):
            caller.sendto(bytes(size), (HOST, callers))
            said, address = target.recvfrom(65536)
            assert len(said) == size
            target.sendto(said, address)
            assert len(caller.recv(65536)) == size
