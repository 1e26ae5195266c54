"""Tests of sniroute_lanes.py, in its order: a client and a server in one loop, over real sockets."""

from __future__ import annotations

import json
import socket
import threading

import pytest

import sniroute_lanes
from sniroute_dial import WayOut
from sniroute_duplex import Certificates, WebSocketWire, client_context, make_pair
from sniroute_lanes import KINDS, LANES, Reception, shake, upgrade_key
from sniroute_loop import READ, Alarms
from sniroute_nodeurl import Options, Times
from sniroute_refusals import Failed
from sniroute_signals import REFUSED, Terms, answer, token_of
from sniroute_streams import Streams, StreamWire
from sniroute_upgrade import frame
from test_duplex import NOISE, Owner, Turned

KEY = "secret"
DATE = "Mon, 30 Nov 2026 00:00:00 GMT"
CELLS = [(kind, tls) for kind in sorted(LANES) for tls in (0, 1, 2)]
HELLO = b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3"  # the beginning of a ClientHello
PLAIN_GET = f"GET / HTTP/1.1\r\nHost: none\r\nAuthorization: Bearer {token_of(KEY)}\r\n\r\n".encode()


class Program(Turned):
    """What both ends have in a process."""

    def __init__(self):
        super().__init__()
        self.way = WayOut(self.loop, None, "")
        self.alarms = Alarms(self.loop)
        self.streams = Streams(self.loop)


class Server:
    """As the server of sniroute_ends, as far as a Reception asks."""

    def __init__(self, program, kind=0, tls=0, files=None, handshake=5.0, most=8):
        self.program = program
        self.options = Options("server", key=KEY, host="127.0.0.1", max=most, type=kind, tls=tls)
        self.terms = Terms("-", most, tls, kind)
        self.times = Times(handshake=handshake)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.certificates = Certificates(files)
        self.expects_pool = False
        self.is_full = False
        self.joins = True
        self.peer = ""
        self.asks = []
        self.arrived = []
        self.told = []
        self.reception = Reception(self, self.certificates, self.on_ask, self.on_arrival)
        program.loop.poller.watch(self.listener.fileno(), READ, self.accept)

    def accept(self, mask):
        while True:
            try:
                sock, address = self.listener.accept()
            except BlockingIOError:
                return
            self.reception.receive(sock, address)

    def may_join(self, address):
        return self.joins

    def knows(self, address):
        return self.expects_pool and address[0] == self.peer

    def nuisance(self, kind, words):
        self.told.append(words)

    def on_ask(self, ask, wire):
        self.asks.append((ask, wire))
        good = ask.token == token_of(KEY)
        wire.send(answer(self.terms, DATE) if good else REFUSED[401])
        wire.close()
        if good:
            self.expects_pool, self.peer = True, wire.peer[0]

    def on_arrival(self, wire, address):
        self.arrived.append(Owner(wire))
        wire.send(b"%04d" % (len(self.arrived) - 1))

    def connect(self, data=b""):
        sock = socket.create_connection(("127.0.0.1", self.port))
        sock.settimeout(10)
        sock.sendall(data)
        return sock

    @property
    def guests(self):
        return len(self.reception.strangers) + len(self.reception.friends)

    def close(self):
        self.program.loop.poller.forget(self.listener.fileno())
        self.listener.close()
        self.reception.close()
        for owner in self.arrived:
            owner.wire.reset()


class Client:
    """As the client of sniroute_ends."""

    def __init__(self, program, port, **options):
        self.program = program
        self.options = Options("client", **{"key": KEY, "host": "127.0.0.1", "port": port, **options})
        self.times = Times()
        self.lost = []
        self.opened = []

    def shake(self):
        """The terms, or Failed."""
        done = []
        shake(self, done.append)
        return self.program.until(lambda: done)[0]

    def lanes(self, terms):
        return LANES[terms.type](self, terms, self.lost.append)

    def open(self, lanes, count=1):
        """So many connections: Owners, or Failed."""
        done, until = [], len(self.opened) + count

        def opened(result):  # the id may come at once
            done.append(result if isinstance(result, Failed) else Owner(result))
            self.opened.append(done[-1])

        for _ in range(count):
            lanes.open(opened)
        self.program.until(lambda: len(self.opened) == until)
        return done


@pytest.fixture
def program():
    program = Program()
    yield program
    program.turn(3)
    program.close()


@pytest.fixture
def serve_ends(program):
    """serve_ends(...) -> a Server, until the test ends."""
    made = []

    def make(*args, **options):
        made.append(Server(program, *args, **options))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The certificate of a server with tls=2, for 127.0.0.1 and trusted by this host."""
    made = make_pair("127.0.0.1")
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    paths[0].write_bytes(made.certificate_pem)
    paths[1].write_bytes(made.key_pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(paths[0]))
    return tuple(map(str, paths))


def until_closed(program, sock):
    """All that still comes; b"RST" for a reset."""
    sock.setblocking(False)
    data = bytearray()

    def ended():
        try:
            while piece := sock.recv(65536):
                data.extend(piece)
            return True
        except BlockingIOError:
            return False
        except ConnectionError:
            data.extend(b"RST")
            return True

    program.until(ended)
    sock.close()
    return bytes(data)


# -- both sides --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, tls", CELLS)
def test_a_client_asks_and_opens_connections_of_the_pool(program, serve_ends, files, kind, tls):
    server = serve_ends(kind, tls, files if tls == 2 else None)
    client = Client(program, server.port)
    terms = client.shake()
    assert terms == server.terms and server.asks[0][0].ours
    lanes = client.lanes(terms)
    owners = client.open(lanes, 5)
    program.until(lambda: all(len(owner.heard) == 4 for owner in owners))
    assert sorted(bytes(owner.heard) for owner in owners) == [b"%04d" % number for number in range(5)]
    assert not server.guests
    for near in owners:
        far = server.arrived[int(near.heard)]
        near.heard.clear()
        near.wire.send(NOISE[:70000])
        near.wire.finish()
        program.until(lambda: far.ends)
        assert far.heard == NOISE[:70000] and far.ends == [None]
        far.wire.send(b"late")
        far.wire.finish()
        program.until(lambda: near.ends)
        assert near.heard == b"late" and near.ends == [None] and not near.wire.is_open
        assert near.wire.fingerprint() == (server.certificates.fingerprint if tls or kind == 3 else "")
    assert not server.told and not client.lost
    lanes.close()


@pytest.mark.parametrize("kind, tls", CELLS)
def test_a_handshake_is_told_from_the_pool_while_there_is_a_link(program, serve_ends, files, kind, tls):
    server = serve_ends(kind, tls, files if tls == 2 else None)
    client = Client(program, server.port)
    lanes = client.lanes(client.shake())
    client.open(lanes, 2)
    program.until(lambda: len(server.arrived) == 2)
    silence, server.reception.silent.seconds = server.reception.silent.seconds, 5.0  # its hello comes late on a busy host
    assert client.shake() == server.terms
    server.reception.silent.seconds = silence
    assert len(server.asks) == 2 and len(server.arrived) == 2
    client.open(lanes, 1)  # and the pool goes on
    program.until(lambda: len(server.arrived) == 3)
    lanes.close()


def test_a_hello_that_comes_late_on_a_silent_pool_is_data(program, serve_ends):
    server = serve_ends()
    server.expects_pool = True
    with server.connect() as sock:
        program.until(lambda: server.arrived)
        assert sock.recv(4) == b"0000"
        sock.sendall(HELLO)
        program.until(lambda: server.arrived[0].heard == HELLO)


def test_the_recorded_handshake_of_the_original(program, serve_ends):
    server = serve_ends()
    with server.connect() as sock:
        context = client_context(False)
        done = []

        def talk():
            with context.wrap_socket(sock.dup()) as secure:
                secure.sendall(b"GET / HTTP/1.1\r\nHost: none\r\nUser-Agent: Go-http-client/1.1\r\n"
                               b"Authorization: Bearer %b\r\nAccept-Encoding: gzip\r\n\r\n" % token_of(KEY).encode())
                said = b""
                while data := secure.recv(1000):
                    said += data
                done.append(said)

        thread = threading.Thread(target=talk)
        thread.start()
        program.until(lambda: done)
        thread.join()
    head, _, body = done[0].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK") and json.loads(body) == {"flow": "-", "max": 8, "tls": "0", "type": "0"}
    assert not server.asks[0][0].ours


# -- the client's side -------------------------------------------------------------------------


@pytest.mark.parametrize("options, terms, words", [
    ({"key": "wrong"}, {}, "the key is wrong"),
    ({"pin": "sha256:" + "0" * 64}, {"tls": 1}, "not the one of pin="),
    ({"tls": 2}, {"tls": 1}, "self-signed certificate"),
    ({}, {"type": 1}, "QUIC")])
def test_a_handshake_that_fails_says_why(program, serve_ends, options, terms, words):
    server = serve_ends(0, 1)
    server.terms = server.terms._replace(**terms)
    result = Client(program, server.port, **options).shake()
    assert isinstance(result, Failed) and words in str(result)
    if "pin" in options or "tls" in options:
        assert not server.asks  # the token was not said


@pytest.mark.parametrize("kind, tls", CELLS)
def test_the_pin_is_asked_for_on_every_connection(program, serve_ends, files, kind, tls):
    server = serve_ends(kind, tls, files if tls == 2 else None)
    client = Client(program, server.port, pin=server.certificates.fingerprint, sni="another.example.com")
    terms = client.shake()
    if not tls and kind != 3:
        assert isinstance(terms, Failed) and "has no TLS" in str(terms) and not server.arrived
        return
    lanes = client.lanes(terms)
    owner = client.open(lanes)[0]
    program.until(lambda: len(owner.heard) == 4)
    lanes.close()
    client.options = client.options._replace(pin="sha256:" + "1" * 64)
    assert "not the one of pin=" in str(client.open(client.lanes(terms))[0])
    program.turn(5)
    assert all(not owner.heard for owner in server.arrived)  # nothing was sent


@pytest.mark.parametrize("kind", sorted(LANES))
def test_with_tls_2_the_name_of_the_server_is_checked(program, serve_ends, files, kind):
    server = serve_ends(kind, 2, files)
    client = Client(program, server.port, sni="another.example.com")
    terms = client.shake()
    result = client.open(client.lanes(terms))[0]
    if kind == 2:  # its name is the tunnel's host
        program.until(lambda: len(result.heard) == 4)
        result.wire.reset()
    else:
        assert isinstance(result, Failed) and result.reason == "certificate"


@pytest.mark.parametrize("kind, tls", CELLS)
def test_what_is_cancelled_or_closed_calls_nobody_and_leaves_nothing(program, serve_ends, files, kind, tls):
    server = serve_ends(kind, tls, files if tls == 2 else None)
    client = Client(program, server.port)
    results = []
    asked = shake(client, results.append)
    program.turn(2)
    asked.cancel()
    lanes = client.lanes(client.shake())
    for turns in range(8):
        asked = lanes.open(results.append)
        program.turn(turns)
        told = len(results)
        asked.cancel()
        program.turn(2)
        assert len(results) == told
    lanes.open(results.append).cancel()
    lanes.close()
    for result in results:
        result.reset()
    program.until(lambda: not server.guests)


@pytest.mark.parametrize("kind", sorted(LANES))
def test_a_server_that_is_not_there_is_told(program, serve_ends, kind):
    server = serve_ends(kind, 1)
    client = Client(program, server.port)
    lanes = client.lanes(client.shake())
    server.port = 0
    program.loop.poller.forget(server.listener.fileno())
    server.listener.close()
    results = client.open(lanes, 3)
    assert all(isinstance(result, Failed) and result.reason == "refused" for result in results)
    assert client.shake().reason == "refused"
    lanes.close()
    server.listener = socket.create_server(("127.0.0.1", 0))  # for the end of the test
    program.loop.poller.watch(server.listener.fileno(), READ, lambda mask: None)


def test_a_handshake_without_an_answer_has_an_end(program):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Client(program, listener.getsockname()[1])
        client.times = Times(tcp_dial=0.05, handshake=0.05)
        result = client.shake()
    assert result.reason == "timeout" and "TLS handshake" in str(result)


def test_a_broken_http2_connection_is_told_once_and_all_its_streams_fail(program, serve_ends):
    server = serve_ends(3, 1)
    client = Client(program, server.port)
    lanes = client.lanes(client.shake())
    owners = client.open(lanes, 3)
    next(iter(server.reception.sessions)).wire.reset()
    program.until(lambda: client.lost and all(owner.ends for owner in owners))
    assert len(client.lost) == 1 and all(isinstance(owner.ends[0], Failed) for owner in owners)
    assert isinstance(client.open(lanes)[0], Failed)
    lanes.close()


def test_an_http2_connection_that_takes_no_more_streams_has_a_successor(program, serve_ends, monkeypatch):
    """A proxy on the way lets go of it, and waits for the streams that there are, the control channel among them."""
    monkeypatch.setattr(sniroute_lanes, "CARRIERS_MAX", 3)
    server = serve_ends(3, 1)
    client = Client(program, server.port)
    lanes = client.lanes(client.shake())
    owners = []
    for count in range(3):
        owners += client.open(lanes)
        assert isinstance(owners[-1], Owner) and len(server.reception.sessions) == count + 1
        session = list(server.reception.sessions)[-1]
        session.h2.go_away()
        session.touch()
        program.until(lambda: lanes.clients[-1].h2.is_leaving)
    assert "no more streams" in str(client.open(lanes)[0]) and len(server.reception.sessions) == 3
    second = list(server.reception.sessions)[1]  # not the one with the control channel
    del server.reception.sessions[second]
    second.wire.reset()
    program.until(lambda: owners[1].ends and len(lanes.clients) == 2)
    owners += client.open(lanes)
    assert isinstance(owners[-1], Owner) and not client.lost and not owners[0].ends and not owners[2].ends
    lanes.close()
    program.until(lambda: not server.reception.sessions)


@pytest.mark.parametrize("said, words", [
    (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 10\r\n\r\npool full\n", "HTTP 503 pool full"),
    (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
     b"Sec-WebSocket-Accept: x\r\n\r\n", "Accept"),
    (b"junk\r\n\r\n", ""), (b"", "closed"), (b"HTTP/1.1 200 OK\r\nx: " + bytes(9000), "")])
def test_an_upgrade_that_is_refused_says_why(program, said, words):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Client(program, listener.getsockname()[1])
        results = []
        client.lanes(Terms("-", 8, 0, 2)).open(results.append)
        program.turn(5)
        sock, _ = listener.accept()
        with sock:
            request = sock.recv(1000)
            assert request.startswith(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: Go-http-client/1.1\r\n"
                                      b"Connection: Upgrade\r\nSec-Websocket-Key: ")
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            result = program.until(lambda: results)[0]
    assert isinstance(result, Failed) and words in str(result) and len(results) == 1


def test_the_id_may_come_with_the_answer_to_the_upgrade(program, serve_ends):
    server = serve_ends(2)
    server.expects_pool = True
    client = Client(program, server.port)
    for _ in range(20):
        owner = client.open(client.lanes(server.terms))[0]
        program.until(lambda: len(owner.heard) == 4)
        owner.wire.close()


# -- the server's side -------------------------------------------------------------------------


@pytest.mark.parametrize("data, answered", [
    (b"", b""), (b"\x16", b""), (HELLO, b""), (b"junk", b"HTTP/1.0 400"), (b"\0\0\0\0", b""),
    (PLAIN_GET, b"HTTP/1.0 400"), (b"SSH-2.0-x\r\n", b"HTTP/1.0 400"), (b"\x05\x01\x00", b"")])
def test_what_speaks_something_else_is_closed_in_time(program, serve_ends, data, answered):
    server = serve_ends(handshake=0.1)
    said = until_closed(program, server.connect(data))
    assert said.startswith(answered) and (answered or not said.strip(b"RST") or said[0] == 0x15)
    program.until(lambda: not server.guests)
    assert not server.asks and not server.arrived and server.told


@pytest.mark.parametrize("kind, tls", [(2, 0), (0, 1), (2, 1), (3, 1)])
def test_a_request_that_drips_ends_at_the_deadline(program, serve_ends, kind, tls):
    server = serve_ends(kind, tls, handshake=1.0)
    client = Client(program, server.port)
    done = []
    sniroute_lanes.Approach(client, client_context(False) if tls else None, "", done.append).start()
    owner = Owner(program.until(lambda: done)[0])
    for byte in PLAIN_GET[:-2]:
        owner.wire.send(bytes((byte,)))
        program.turn()
    assert server.guests == 1
    program.until(lambda: owner.ends)
    assert isinstance(owner.ends[0], Failed) and not server.guests and not server.asks
    assert "not ready in time" in server.told[0]


@pytest.mark.parametrize("kind", sorted(LANES))
def test_a_request_that_is_none_is_refused(program, serve_ends, kind):
    server = serve_ends(kind, 1)
    client = Client(program, server.port)
    for request, answered in ((b"GET / HTTP/1.1\nx\r\n\r\n", b"HTTP/1.1 400"), (b"x" * 9000, b"HTTP/1.1 400"),
                              (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 401")):
        done = []
        sniroute_lanes.Approach(client, client_context(False), "", done.append).start()
        owner = Owner(program.until(lambda: done)[0])
        owner.wire.send(request)
        program.until(lambda: owner.ends)
        assert owner.heard.startswith(answered)
        owner.wire.close()


def test_half_handshakes_in_thousands_are_bounded_and_the_pool_goes_on(program, serve_ends, monkeypatch):
    monkeypatch.setattr(sniroute_lanes, "SITE_MAX", 10_000)
    server = serve_ends(0, 1)
    client = Client(program, server.port)
    terms = client.shake()
    server.peer = "192.0.2.1"  # so that these are strangers
    socks = []
    for count in range(1, 601):
        socks.append(server.connect(HELLO if count % 2 else b""))
        if count % 100 == 0:
            program.turn(3)
    program.until(lambda: len(server.told) >= 600 - sniroute_lanes.STRANGERS_MAX)
    assert server.guests == len(server.reception.late.due) == sniroute_lanes.STRANGERS_MAX
    owner = client.open(client.lanes(terms))[0]  # the newest always gets in
    program.until(lambda: len(owner.heard) == 4)
    owner.wire.reset()
    for sock in socks:
        sock.close()
    program.until(lambda: not server.guests)
    assert not server.reception.sites


def test_one_address_has_less_room_than_all_and_the_client_of_the_tunnel_its_own(program, serve_ends):
    server = serve_ends(0, 1)
    strangers = [server.connect() for _ in range(40)]
    program.until(lambda: len(server.told) == 8)
    assert server.guests == sniroute_lanes.SITE_MAX and "more than 32 from this address" in server.told[0]
    server.expects_pool, server.peer = True, "127.0.0.1"
    friends = [server.connect() for _ in range(100)]
    program.until(lambda: len(server.reception.friends) == 100)
    assert len(server.reception.strangers) == 32 and len(server.told) == 8
    for sock in strangers + friends:
        sock.close()
    program.until(lambda: not server.guests)


def test_a_whole_pool_that_is_opened_at_once_gets_in(program, serve_ends):
    server = serve_ends(0, 1, most=100)
    client = Client(program, server.port)
    owners = client.open(client.lanes(client.shake()), 100)
    program.until(lambda: all(len(owner.heard) == 4 for owner in owners))
    assert not server.told
    for owner in owners:
        owner.wire.reset()


@pytest.mark.parametrize("kind, state, words", [
    (2, {"is_full": True}, "HTTP 503 pool full"), (2, {"expects_pool": False}, "HTTP 503"),
    (2, {"joins": False}, "HTTP 503"),
    (3, {"is_full": True}, "HTTP 404"), (3, {"expects_pool": False}, "HTTP 404"), (3, {"joins": False}, "HTTP 403")])
def test_a_connection_that_may_not_join_is_told(program, serve_ends, kind, state, words):
    server = serve_ends(kind, 1)
    client = Client(program, server.port)
    lanes = client.lanes(client.shake())
    for name, value in state.items():
        setattr(server, name, value)
    assert words in str(client.open(lanes)[0]) and not server.arrived
    lanes.close()


@pytest.mark.parametrize("change, status", [
    (b"", b"101"), (b"Sec-Websocket-Version: 12", b"400"), (b"Sec-Websocket-Key: \xe9", b"400")])
def test_an_upgrade_of_the_original_is_answered(program, serve_ends, change, status):
    server = serve_ends(2)
    server.expects_pool = True
    lines = [b"GET /any HTTP/1.1", b"Host: 127.0.0.1", b"User-Agent: Go-http-client/1.1", b"Connection: Upgrade",
             b"Sec-Websocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-Websocket-Version: 13", b"Upgrade: websocket"]
    lines = [change if change and line.split(b":")[0] == change.split(b":")[0] else line for line in lines]
    with server.connect(b"\r\n".join([*lines, b"", b""]) + frame(2, b"early")) as sock:
        program.until(lambda: server.arrived or server.told)
        program.turn(3)
        head, _, rest = sock.recv(1000).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status)
        if status == b"101":
            assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head and rest == b"\x82\x040000"
            program.until(lambda: server.arrived[0].heard == b"early")
            assert isinstance(server.arrived[0].wire, WebSocketWire)


def test_what_a_request_for_websocket_is():
    head = b"GET / HTTP/1.1\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: k\r\nSec-WebSocket-Version: 13\r\n\r\n"
    assert upgrade_key(head) == "k"
    assert upgrade_key(head.replace(b"13", b"8")) == ""
    assert upgrade_key(head.replace(b"Key", b"Kez")) == ""
    assert upgrade_key(PLAIN_GET) is None


def test_a_server_has_so_many_http2_connections_and_keeps_those_that_carry(program, serve_ends, monkeypatch):
    monkeypatch.setattr(sniroute_lanes, "SESSIONS_MAX", 3)
    server = serve_ends(3, 1)
    client = Client(program, server.port)
    terms = client.shake()
    all_lanes = []
    for count in range(6):
        all_lanes.append(client.lanes(terms))
        owner = client.open(all_lanes[-1])[0]
        program.until(lambda: owner.heard)
        assert isinstance(owner.wire, StreamWire)
        if count:
            owner.wire.reset()
            program.until(lambda: sum(bool(each.h2.streams) for each in server.reception.sessions) == 1)
        else:
            first = owner
    assert len(server.reception.sessions) == 3 and not first.ends
    program.until(lambda: len(client.lost) == 3)
    for lanes in all_lanes:
        lanes.close()
    program.until(lambda: not server.reception.sessions)


def test_each_kind_of_pool_has_both_sides():
    assert LANES.keys() == KINDS.keys()
