"""Tests of sniroute_layers.py, in its order: real sockets, TLS and proxies."""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
import threading

import pytest

import sniroute_layers
from conftest import HOST, connect
from sniroute_dial import OVER, Failed, WayOut
from sniroute_kubeconfig import Proxy, Secret
from sniroute_layers import ROOM, Opening, Place, Plain, Secure
from testbed.apis import SPDY, Caller
from testbed.running import read_all, read_exactly, reset

SERVICE = "/api/v1/namespaces/default/services/web"
NOISE = random.Random(7).randbytes(1 << 20)


@pytest.fixture(params=["plain", "TLS"])
def layer(request):
    return request.param


class Owner:
    """Whoever has a wire: what it was told."""

    def __init__(self, wire):
        self.wire = wire
        self.heard = bytearray()
        self.ends = []
        self.rooms = 0
        wire.on_data, wire.on_end, wire.on_room = self.heard.extend, self.ends.append, self.room

    def room(self):
        self.rooms += 1


@pytest.fixture
def own(serve, call, certificates, layer):
    """own(handler) -> Owner, Caller: of a wire to a far end, whose handler gets the other end, out of its TLS."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificates / "edge.pem", certificates / "edge.key")
    server_side.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # Debian 12's Python sets it
    client_side = ssl.create_default_context(cafile=certificates / "ca.pem")

    def make(handler):
        def secured(sock):
            if layer == "plain":
                return handler(sock)
            with server_side.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as secure:
                return handler(secure)

        server = serve(secured)
        caller = call()
        sock = connect(server.address)
        sock.setblocking(False)
        wire = Plain(caller.apis.wires, sock)
        if layer == "TLS":
            wire, shaken = Secure(wire, client_side, HOST), []
            wire.shake(shaken.append, lambda session: None)
            assert caller.until(lambda: shaken) == [None]
        return Owner(wire), caller, server

    return make


# -- wires -------------------------------------------------------------------------------------


def test_bytes_pass_both_ways_as_they_are(own):
    def echo(sock):
        while data := sock.recv(65536):
            sock.sendall(data)

    owner, caller, _ = own(echo)
    sent = 0
    digest, heard = hashlib.sha256(), hashlib.sha256()
    count = 0

    def take(data):
        nonlocal count
        assert isinstance(data, bytes)
        heard.update(data)
        count += len(data)

    owner.wire.on_data = take
    sizes = random.Random(3)
    while sent < 10 << 20:
        piece = NOISE[:sizes.choice((1, 100, 16384, 16385, 70000, 1 << 20))]
        for form in (bytes, bytearray, memoryview):
            data = form(piece)
            owner.wire.send(data)
            if form is bytearray:
                data[:] = bytes(len(data))  # it is not kept
            digest.update(piece)
            sent += len(piece)
        caller.until(lambda: owner.wire.unsent < 1 << 20)
    caller.until(lambda: count == sent)
    assert heard.digest() == digest.digest()
    owner.wire.close()


def test_what_the_other_side_does_not_take_is_counted_and_room_is_told(own):
    go = threading.Event()

    def handler(sock):
        go.wait(10)
        return len(read_exactly(sock, total))

    total = 0
    owner, caller, server = own(handler)
    while owner.wire.unsent <= 4 * ROOM:
        owner.wire.send(NOISE)
        total += len(NOISE)
    assert not owner.rooms
    go.set()
    caller.until(lambda: owner.rooms)
    assert owner.wire.unsent <= ROOM
    caller.until(lambda: not owner.wire.unsent)
    assert owner.rooms == 1 and server.result() == total
    owner.wire.close()


def test_a_paused_wire_reads_nothing(own):
    owner, caller, _ = own(lambda sock: (sock.sendall(NOISE), read_all(sock)))
    caller.until(lambda: owner.heard)
    owner.wire.pause()
    before = len(owner.heard)
    for _ in range(20):
        caller.tick.set(0)
        caller.loop.turn()
    assert len(owner.heard) == before < len(NOISE)
    owner.wire.resume()
    caller.until(lambda: len(owner.heard) == len(NOISE))
    assert owner.heard == NOISE
    owner.wire.close()


def test_what_is_unsent_is_sent_before_a_close(own):
    go = threading.Event()

    def handler(sock):
        go.wait(10)
        count = 0
        while data := sock.recv(65536):
            count += len(data)
        return count

    owner, caller, server = own(handler)
    total = 0
    while owner.wire.unsent <= ROOM:
        owner.wire.send(NOISE)
        total += len(NOISE)
    owner.wire.close()
    owner.wire.close()
    owner.wire.send(b"more")
    go.set()
    below = getattr(owner.wire, "below", owner.wire)
    caller.until(lambda: below.sock.fileno() < 0)
    assert server.result() == total and owner.ends == []


def test_a_closed_wire_whose_other_side_takes_nothing_is_closed_in_the_end(own):
    go = threading.Event()
    owner, caller, _ = own(lambda sock: go.wait(10))
    while owner.wire.unsent <= ROOM:
        owner.wire.send(NOISE)
    caller.apis.wires.lingering.seconds = 0.02
    owner.wire.close()
    below = getattr(owner.wire, "below", owner.wire)
    caller.until(lambda: below.sock.fileno() < 0)
    go.set()


@pytest.mark.parametrize("state", ["reads", "paused", "closed"])
def test_a_wire_that_breaks_with_unsent_bytes_keeps_nothing(own, state):
    go = threading.Event()
    owner, caller, _ = own(lambda sock: (go.wait(10), reset(sock)))
    while owner.wire.unsent <= ROOM:
        owner.wire.send(NOISE)
    if state == "paused":
        owner.wire.pause()
    elif state == "closed":
        owner.wire.close()
    go.set()
    below = getattr(owner.wire, "below", owner.wire)
    caller.until(lambda: below.sock.fileno() < 0)
    assert [error.reason for error in owner.ends] == ([] if state == "closed" else ["reset"])
    assert not owner.wire.unsent


def test_a_reset_is_a_reset(own, layer):
    owner, caller, server = own(lambda sock: sock.recv(1))
    owner.wire.reset()
    owner.wire.reset()
    owner.wire.close()
    assert isinstance(server.result(), ConnectionResetError if layer == "plain" else OSError)


def test_an_end_is_told_once_behind_what_came_before(own, layer):
    def handler(sock):
        sock.sendall(NOISE)
        if layer == "TLS":
            sock.unwrap()

    owner, caller, _ = own(handler)
    caller.until(lambda: owner.ends)
    assert owner.heard == NOISE and owner.ends == [None] and not owner.wire.is_open
    owner.wire.send(b"more")
    owner.wire.close()


@pytest.mark.parametrize("paused", [False, True])
def test_a_cut_is_told_behind_what_came_before(own, paused):
    def handler(sock):
        sock.sendall(b"last words")
        sock.recv(1)
        reset(sock)

    owner, caller, _ = own(handler)
    caller.until(lambda: owner.heard == b"last words")
    if paused:
        owner.wire.pause()
    owner.wire.send(b"x")
    while not owner.ends:
        owner.wire.send(b"y")
        caller.until(lambda: True)
        caller.tick.set(0)
        caller.loop.turn()
    assert [error.reason for error in owner.ends] == ["reset"]


@pytest.mark.parametrize("layer", ["TLS"], indirect=True)
def test_an_end_without_the_end_of_tls_is_a_cut(own):
    owner, caller, _ = own(lambda sock: sock.shutdown(socket.SHUT_RDWR))
    caller.until(lambda: owner.ends)
    assert str(owner.ends[0]) == "it ended without the end of TLS"


@pytest.mark.parametrize("layer", ["TLS"], indirect=True)
def test_garbage_in_tls_is_a_failure(own):
    def handler(sock):
        with socket.socket(fileno=sock.detach()) as below:
            below.sendall(b"x" * 100)

    owner, caller, _ = own(handler)
    caller.until(lambda: owner.ends)
    assert owner.ends[0].reason == "tls" and str(owner.ends[0]) == "wrong version number"


@pytest.mark.parametrize("layer", ["TLS"], indirect=True)
def test_a_new_owner_gets_what_comes_from_then_on(own):
    owner, caller, _ = own(lambda sock: (sock.sendall(b"first"), sock.recv(1), sock.sendall(b"second"), sock.recv(1)))
    caller.until(lambda: owner.heard == b"first")
    second = Owner(owner.wire)
    owner.wire.send(b".")
    caller.until(lambda: second.heard == b"second")
    assert owner.heard == b"first"
    owner.wire.close()


def test_a_handshake_has_an_end(call, serve):
    """A server that sends a handshake without end."""
    def handler(sock):
        sock.recv(65536)
        record = b"\x16\x03\x03\x40\x00" + b"\x02\x00\xff\xff" + bytes(16380)
        for _ in range(20):
            sock.sendall(record)
        read_all(sock)

    told(open_place(call(), serve(handler).address, ssl.create_default_context()), "tls")


def test_a_handshake_is_no_longer_than_a_chain_of_certificates(call, serve, monkeypatch):
    """Of pieces that each make sense."""
    monkeypatch.setattr(sniroute_layers, "FLIGHT_MAX", 100)

    def handler(sock):
        sock.recv(65536)
        sock.sendall(b"\x16\x03\x03\x01\x00" + b"\x02\x00\xff\xff" + bytes(252))
        read_all(sock)

    assert told(open_place(call(), serve(handler).address, ssl.create_default_context()), "tls") \
        == "its handshake has no end"


@pytest.mark.parametrize("name", ["", ".example.com", "a" * 70 + ".example.com"])
def test_a_name_that_tls_cannot_ask_for(call, serve, name):
    told(open_place(call(), serve(read_all).address, ssl.create_default_context(), name=name), "tls")


def test_a_session_saves_a_part_of_the_next_handshake(serve, call, certificates):
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificates / "edge.pem", certificates / "edge.key")

    def handler(sock):
        with server_side.wrap_socket(sock, server_side=True) as secure:
            secure.sendall(b"hello")
            secure.recv(1)
            return secure.session_reused

    server, caller = serve(handler), call()
    place = Place(*server.address, ssl.create_default_context(cafile=certificates / "ca.pem"), HOST)
    for is_reused in (False, True, True):
        owner = Owner(open_it(caller, place))
        caller.until(lambda: owner.heard)
        owner.wire.send(b"x")
        assert server.result() is is_reused
        owner.wire.close()


# -- openings, and proxies ---------------------------------------------------------------------


def open_it(caller: Caller, place: Place):
    """What comes of an opening."""
    got = []
    opening = Opening(caller.apis.wires, WayOut(caller.loop, None, ""), place, got.append)
    opening.start()
    return caller.until(lambda: got)[0]


def open_place(caller, address, context=None, proxy=None, name=HOST):
    return open_it(caller, Place(*address, context, name, proxy))


def told(result, reason: str) -> str:
    """The words of a Failed with this reason."""
    assert isinstance(result, Failed) and result.reason == reason, (result, getattr(result, "reason", ""))
    return str(result)


@pytest.mark.parametrize("kind, userinfo, login, host", [
    ("http", "", "", HOST), ("http", "me:p%40ss@", "Basic bWU6cEBzcw==", "localhost"),
    ("http", "me@", "Basic bWU6", HOST), ("https", "", "", HOST), ("socks5", "", "", HOST),
    ("socks5", "me:p%40ss@", "me:p@ss", "localhost"), ("socks5h", "me@", "me:", HOST)])
def test_a_proxy_of_the_kubeconfig(cluster, call, proxy, certificates, monkeypatch, kind, userinfo, login, host):
    """A list and an upgrade, and with a proxy that is itself reached by TLS one TLS is in another."""
    context = None
    if kind == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "edge.pem", certificates / "edge.key")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    between = proxy("socks5" if "socks" in kind else "http", login=login, context=context)
    cluster.pod("web-1", {8080: (HOST, 1)})
    caller = call(cluster.kubeconfig(cluster={
        "proxy-url": f"{kind}://{userinfo}{HOST}:{between.address[1]}", "server": f"https://{host}:{cluster.port}"}))
    assert caller.get("/version").status == 200
    caller.upgrade("POST", "/api/v1/namespaces/default/pods/web-1/portforward", SPDY).wire.close()
    assert between.asked == [(host, cluster.port, login)]


def test_a_proxy_of_the_environment(cluster, call, proxy, monkeypatch):
    """As HTTPS_PROXY has it everywhere: loopback goes straight."""
    def none(host, *words, **more):  # the proxy looks the name up: a resolver that nothing answers would keep it too long
        if host == "api.example.com":
            raise socket.gaierror(socket.EAI_NONAME, "it does not resolve")
        return look(host, *words, **more)

    look = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", none)
    between = proxy("http")
    environ = {"HTTPS_PROXY": f"http://{HOST}:{between.address[1]}"}
    caller = call(cluster.kubeconfig(), environ=environ)
    assert caller.get("/version").status == 200 and between.asked == []
    caller = call(cluster.kubeconfig("other", cluster={"server": "https://api.example.com"}), environ=environ)
    assert caller.get("/version").reason in ("proxy", "reset") and between.asked == [("api.example.com", 443, "")]


@pytest.mark.parametrize("kind, says, words", [
    ("http", b"HTTP/1.1 403 no\r\n\r\n", "HTTP 403"),
    ("http", b"SSH-2.0\r\n", "it is no HTTP"),
    ("http", b"HTTP/1.1 200 yes\r\n\r\nmore", "it said more than its answer"),
    ("http", b"HTTP/1.1 200 yes\r\n", "it closed the connection"),
    ("http", b"", "it closed the connection"),
    ("http", b"HTTP/1.1 200 yes\r\n" + b"X: y\r\n" * 20000, "a head of more than 65536 bytes"),
    ("socks5", b"HTTP/1.1 400 no\r\n\r\n", "it is no SOCKS5"),
    ("socks5", b"\5\xff", "it wants another login"),
    ("socks5", b"\5\2", "it wants another login"),
    ("socks5", b"\5\0\5\5\0\1\0\0\0\0\0\0", "connection refused"),
    ("socks5", b"\5\0\5\x63\0\1\0\0\0\0\0\0", "SOCKS5 failure 99"),
    ("socks5", b"\5\0\5\0\0\1\0\0\0\0\0\0more", "it said more than its answer"),
    ("socks5", b"\5\0\5\0", "it closed the connection"),
])
def test_a_proxy_that_does_not_let_us_through(call, proxy, kind, says, words):
    between = proxy(kind, says=says)
    said = told(open_place(call(), ("192.0.2.1", 443), None, Proxy(kind, *between.address, None, Secret(b""))), "proxy")
    assert words in said


@pytest.mark.parametrize("login, words", [(b"me:wrong", "it refused the login"), (b"x" * 256, "255 bytes at most")])
def test_a_login_that_a_socks_proxy_does_not_take(call, proxy, login, words):
    between = proxy("socks5", login="me:right")
    place = Proxy("socks5", *between.address, Secret(login), Secret(b""))
    assert words in told(open_place(call(), ("192.0.2.1", 443), None, place), "proxy")


def test_a_name_that_is_too_long_for_socks(call, proxy):
    between = proxy("socks5")
    place = Proxy("socks5", *between.address, None, Secret(b""))
    assert "255 bytes" in told(open_place(call(), ("a" * 256, 443), None, place), "proxy")


@pytest.mark.parametrize("address, written", [
    ("192.0.2.1", b"\1\xc0\0\2\1\1\xbb"), ("2001:db8::1", b"\4\x20\1\x0d\xb8" + bytes(11) + b"\1\1\xbb"),
    ("a.example.com", b"\3\x0da.example.com\1\xbb")])
def test_an_address_for_socks(address, written):
    assert sniroute_layers.socks_address(address, 443) == written


def test_a_proxy_that_cannot_be_reached(call, free_ports):
    port, _ = free_ports(1)
    said = told(open_place(call(), ("192.0.2.1", 443), None, Proxy("http", HOST, port, None, Secret(b""))), "proxy")
    assert said == f"{HOST}:{port}: Connection refused"


def test_a_proxy_whose_certificate_is_not_trusted(call, serve, certificates):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "edge.pem", certificates / "edge.key")

    def handler(sock):
        context.wrap_socket(sock, server_side=True).close()

    proxy = Proxy("https", *serve(handler).address, None, Secret(b""))
    place = Place("192.0.2.1", 443, None, HOST, proxy, ssl.create_default_context())
    assert told(open_it(call(), place), "proxy").startswith("TLS to the proxy: ")


@pytest.mark.parametrize("phase", ["connecting", "asking the proxy", "TLS handshake"])
def test_an_opening_that_is_cancelled_leaves_nothing(call, serve, deaf, phase):
    caller, got = call(), []
    silent = serve(read_all).address
    proxy = Proxy("http", *silent, None, Secret(b"")) if phase == "asking the proxy" else None
    place = Place(*(deaf if phase == "connecting" else silent), ssl.create_default_context(), HOST, proxy)
    opening = Opening(caller.apis.wires, WayOut(caller.loop, None, ""), place, got.append)
    opening.start()
    caller.until(lambda: opening.phase == phase)
    opening.cancel()
    opening.cancel()
    caller.until(lambda: opening.phase in (OVER, phase))
    assert got == [] and opening.wire is None or not opening.wire.is_open
