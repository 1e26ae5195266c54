"""Tests of sniroute_duplex.py, in its order: real sockets, both ends in one loop or the other end in a thread."""

from __future__ import annotations

import itertools
import os
import random
import socket
import ssl
import subprocess
import traceback

import pytest

import sniroute_duplex
from conftest import FakeClock, connect
from sniroute_duplex import (STEP, Certificates, DuplexOpening, TcpWire, TlsWire, WebSocketWire, accept_tls,
                             client_context, fingerprint, make_pair, server_context)
from sniroute_layers import PIECE, Place, Wires
from sniroute_loop import Loop, monotonic
from sniroute_refusals import Failed, SettingsError
from sniroute_upgrade import frame
from testbed.ports import free_port
from testbed.running import read_all, reset

NOISE = random.Random(7).randbytes(1 << 20)
KINDS = ["tcp", "tls", "ws", "wss"]


class Turned:
    """A loop that a test turns, and its wires."""

    def __init__(self):
        self.faults = []
        self.loop = Loop(lambda owner: self.faults.append(traceback.format_exc()))
        self.wires = Wires(self.loop)
        self.tick = self.loop.timer(lambda: None)

    def turn(self, count=1):
        for _ in range(count):
            self.tick.set(monotonic() + 0.01)
            self.loop.turn()
            assert not self.faults, self.faults[0]

    def until(self, predicate, timeout=10.0):
        """Turn until `predicate` is true; its value."""
        deadline = monotonic() + timeout
        while not (result := predicate()):
            assert monotonic() < deadline, "not within the time"
            self.turn()
        return result

    def close(self):
        self.wires.close()
        self.loop.close()


class Owner:
    """Whoever has a wire: what it was told."""

    def __init__(self, wire):
        self.wire = wire
        self.heard = bytearray()
        self.ends = []
        wire.on_data, wire.on_end = self.heard.extend, self.ends.append


@pytest.fixture
def turned():
    turned = Turned()
    yield turned
    turned.close()


def sockets():
    """Two connected TCP sockets that do not block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for sock in (near, far):
        sock.setblocking(False)
    return near, far


class Chopped(TcpWire):
    """A TcpWire that tells what has come in pieces of any sizes."""

    __slots__ = ("sizes",)

    def __init__(self, wires, sock, peer=None):
        self.sizes = itertools.cycle(random.Random(5).choices((1, 2, 3, 7, 100, 5000, 20000), k=50))
        super().__init__(wires, sock, peer)

    def _read(self):
        try:
            data = self.sock.recv(60000)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(Failed("reset", str(error)))
            return
        if not data:
            self._end(None)
        while data and self.sock.fileno() >= 0:
            size = next(self.sizes)
            self.on_data(data[:size])
            data = data[size:]


@pytest.fixture(scope="module")
def certificate():
    return Certificates(None, "nodepass.example.com")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def pair(turned, kind, certificate):
    """pair(tcp) -> two Owners, of the two ends of one connection: the client's, and the server's."""
    sockets_made = []

    def make(tcp=TcpWire):
        socks = sockets()
        sockets_made.extend(socks)
        near, far = (tcp(turned.wires, sock) for sock in socks)
        if kind in ("tls", "wss"):
            done = []
            near = TlsWire(near, client_context(False))
            far = TlsWire(far, certificate.context, server_side=True)
            near.shake(done.append)
            far.shake(done.append)
            assert turned.until(lambda: len(done) == 2) and done == [None, None]
        if kind in ("ws", "wss"):
            near, far = WebSocketWire(near, True), WebSocketWire(far, False)
        return Owner(near), Owner(far)

    yield make
    for sock in sockets_made:
        sock.close()


only = pytest.mark.parametrize
tcp = only("kind", ["tcp"], indirect=True)
layered = only("kind", ["tls", "ws", "wss"], indirect=True)


def bottom(wire):
    """The TcpWire below."""
    while not isinstance(wire, TcpWire):
        wire = wire.below
    return wire


def is_gone(*owners):
    """Whether all sockets are closed."""
    return all(bottom(owner.wire).sock.fileno() < 0 for owner in owners)


# -- TCP ---------------------------------------------------------------------------------------


@only("tcp", [TcpWire, Chopped])
@only("uses", [0, 1, 3])
def test_bytes_pass_both_ways_as_they_are(turned, pair, tcp, uses):
    near, far = pair(tcp)
    buffers = [memoryview(bytearray(PIECE)) for _ in range(uses)]
    sizes = random.Random(3)
    for owner in (near, far):
        if uses:
            owner.wire.use(buffers)
    sent = bytearray()
    while len(sent) < 3 << 20:
        at = sizes.randrange(1000)
        piece = NOISE[at:at + sizes.choice((1, 100, 125, 126, 16376, 16384, 16385, 70000, 300000))]
        sent += piece
        near.wire.send(piece)
        data = bytearray(piece)
        far.wire.send(memoryview(data))
        data[:] = bytes(len(data))  # it is not kept
        if sizes.random() < 0.5:
            turned.turn()
    turned.until(lambda: len(near.heard) == len(far.heard) == len(sent))
    assert near.heard == sent and far.heard == sent
    near.wire.finish()
    far.wire.finish()
    turned.until(lambda: is_gone(near, far))
    assert near.ends in ([None], []) and far.ends in ([None], []) and near.ends + far.ends


def test_one_direction_ends_and_the_other_goes_on(turned, pair):
    near, far = pair()
    near.wire.send(b"question")
    near.wire.finish()
    turned.until(lambda: far.ends)
    assert far.ends == [None] and far.heard == b"question" and far.wire.is_open
    far.wire.send(NOISE)
    far.wire.finish()
    turned.until(lambda: near.ends)
    assert near.ends == [None] and near.heard == NOISE
    turned.until(lambda: is_gone(near, far))  # both directions are over: they have closed by themselves
    assert not near.wire.is_open and not far.wire.is_open and far.ends == [None] and near.ends == [None]


def test_the_end_comes_behind_what_is_unsent(turned, pair):
    near, far = pair()
    far.wire.pause()
    while near.wire.unsent < 1 << 20:
        near.wire.send(NOISE)
    near.wire.finish()
    assert near.wire.raw() is None
    turned.turn(3)
    assert not far.ends and near.wire.unsent
    far.wire.resume()
    turned.until(lambda: far.ends)
    assert far.ends == [None] and len(far.heard) % len(NOISE) == 0 and near.wire.is_open
    far.wire.pause()
    far.wire.resume()  # there is nothing to be read any more: it must not turn for ever
    far.wire.finish()
    turned.until(lambda: not near.wire.is_open)
    assert near.ends == [None]


def test_a_peer_that_breaks_off_behind_its_end_is_told(turned):
    near, far = sockets()
    owner = Owner(TcpWire(turned.wires, near))
    far.shutdown(socket.SHUT_WR)
    turned.until(lambda: owner.ends)
    reset(far)
    owner.wire.send(b"x")
    owner.wire.send(b"x")
    turned.until(lambda: len(owner.ends) == 2)
    assert owner.ends[0] is None and isinstance(owner.ends[1], Failed) and not owner.wire.is_open


@pytest.mark.parametrize("ended", [False, True])
def test_a_reset_is_told_once(turned, ended):
    near, far = sockets()
    owner = Owner(TcpWire(turned.wires, near))
    if ended:
        owner.wire.finish()
    reset(far)
    turned.until(lambda: owner.ends)
    turned.turn(3)
    assert [type(end) for end in owner.ends] == [Failed] and not owner.wire.is_open


@tcp
def test_the_socket_can_be_had_while_nothing_is_on_its_way(turned, pair):
    near, far = pair()
    near.wire.send(b"first")
    turned.until(lambda: far.heard == b"first")
    with far.wire.raw() as sock:
        assert not far.wire.is_open and far.wire.raw() is None
        far.wire.close()
        far.wire.reset()  # they are the wire's, which has nothing any more
        near.wire.send(b"second")
        turned.turn(3)
        assert far.heard == b"first" and sock.recv(100) == b"second"
        sock.send(b"back")
        turned.until(lambda: near.heard == b"back")
    turned.until(lambda: near.ends)
    assert not far.ends


@tcp
def test_the_socket_cannot_be_had_with_something_unsent(turned, pair):
    near, far = pair()
    far.wire.pause()
    while not near.wire.unsent:
        near.wire.send(NOISE)
    assert near.wire.raw() is None and near.wire.is_open


def test_close_ends_both_directions_and_what_was_sent_arrives(turned):
    near, far = sockets()
    owner = Owner(TcpWire(turned.wires, near))
    owner.wire.send(b"last words")
    owner.wire.close()
    far.setblocking(True)
    with far:
        assert read_all(far) == b"last words"
    turned.until(lambda: near.fileno() < 0)
    assert not owner.ends


def test_a_closed_wire_waits_for_a_slow_peer_and_not_for_one_that_takes_nothing(turned):
    turned.wires.lingering.seconds = 0.05
    near, far = sockets()
    owner, total = Owner(TcpWire(turned.wires, near)), 0
    while owner.wire.unsent < 8 << 20:
        owner.wire.send(NOISE)
        total += len(NOISE)
    owner.wire.close()
    began, taken = monotonic(), 0
    while taken < total // 2:
        taken += len(far.recv(1 << 17))
        turned.turn()
    slow = monotonic() - began > 0.05
    assert near.fileno() >= 0 or not slow
    turned.until(lambda: near.fileno() < 0)  # nothing more is taken
    far.close()


def test_the_address_of_the_peer_is_known(turned, pair):
    near, far = pair()
    assert near.wire.peer == bottom(far.wire).sock.getsockname()[:2]
    assert far.wire.peer == bottom(near.wire).sock.getsockname()[:2] and far.wire.fingerprint() == ""


# -- TLS, and WebSocket over it ----------------------------------------------------------------


@layered
def test_an_end_below_without_the_layers_own_end_is_a_cut(turned, pair):
    near, far = pair()
    near.wire.send(b"half of it")
    turned.until(lambda: far.heard)
    bottom(near.wire).finish()
    turned.until(lambda: far.ends)
    assert isinstance(far.ends[0], Failed) and "without" in str(far.ends[0]) and not far.wire.is_open
    turned.until(lambda: is_gone(far))


@layered
def test_a_reset_below_is_told_once(turned, pair):
    near, far = pair()
    near.wire.reset()
    turned.until(lambda: far.ends)
    turned.turn(3)
    assert len(far.ends) == 1 and isinstance(far.ends[0], Failed) and not near.ends


def test_the_end_may_be_said_while_bytes_are_told(turned, pair):
    near, far = pair()
    far.wire.on_data = lambda data: (far.heard.extend(data), far.wire.finish())
    near.wire.send(NOISE)
    turned.until(lambda: len(far.heard) == len(NOISE))
    turned.until(lambda: near.ends)
    assert near.ends == [None] and not far.ends
    near.wire.send(b"more")
    turned.until(lambda: far.heard.endswith(b"more"))
    near.wire.close()
    turned.until(lambda: far.ends)
    assert far.ends == [None]


@only("how", ["close", "reset"])
def test_an_owner_may_leave_while_bytes_are_told(turned, pair, how):
    near, far = pair(Chopped)
    told = []
    far.wire.on_data = lambda data: (told.append(len(data)), getattr(far.wire, how)())
    near.wire.send(NOISE[:100000])
    turned.until(lambda: near.ends)
    assert len(told) == 1 and not far.ends


@only("how", ["finish", "close"])
def test_two_that_end_at_once_are_over(turned, pair, how):
    near, far = pair()
    near.wire.send(b"a")
    far.wire.send(b"b")
    for owner in (near, far):
        getattr(owner.wire, how)()
    turned.until(lambda: is_gone(near, far))
    if how == "finish":
        assert (near.heard, far.heard) == (b"b", b"a")


def test_a_paused_wire_tells_nothing_more(turned, pair):
    near, far = pair()
    far.wire.pause()
    near.wire.send(b"x")
    near.wire.finish()
    turned.turn(5)
    assert not far.heard and not far.ends
    far.wire.resume()
    turned.until(lambda: far.ends)
    assert far.heard == b"x" and far.ends == [None]


@only("junk", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\x16\x03\x01\x40\x01" + bytes(17000), b"\x16\x03\x01\0\5junk!",
               b"\x15\x03\x01\0\2\2\x28"])
def test_a_handshake_of_junk_fails(turned, certificate, junk):
    near, far = sockets()
    done = []
    accept_tls(turned.wires, far, certificate.context, done.append)
    near.send(junk)
    near.shutdown(socket.SHUT_WR)
    assert isinstance(turned.until(lambda: done)[0], Failed) and len(done) == 1
    near.close()
    turned.until(lambda: far.fileno() < 0)


def test_a_handshake_without_end_fails(turned, certificate):
    near, far = sockets()
    done = []
    accept_tls(turned.wires, far, certificate.context, done.append)
    hello = b"\x16\x03\x01\x40\0\1\0\x40\0\3\3" + bytes(16000)  # a ClientHello of 4 MiB, in records of 16 KiB
    while not done:
        try:
            near.send(hello)
        except BlockingIOError:
            pass
        except OSError:
            break
        turned.turn()
    assert isinstance(turned.until(lambda: done)[0], Failed)
    near.close()


def test_tls_older_than_1_3_is_refused(turned, certificate):
    near, far = sockets()
    done = []
    accept_tls(turned.wires, far, certificate.context, done.append)
    old = client_context(False)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    TlsWire(TcpWire(turned.wires, near), old).shake(done.append)
    turned.until(lambda: len(done) == 2)
    assert all(isinstance(result, Failed) for result in done)
    turned.until(lambda: far.fileno() < 0 and near.fileno() < 0)


@only("kind", ["tls"], indirect=True)
def test_the_certificate_of_the_server_is_known_by_its_fingerprint(turned, pair, certificate):
    near, far = pair()
    assert near.wire.fingerprint() == certificate.fingerprint and far.wire.fingerprint() == ""
    bottom(near.wire).finish()
    turned.until(lambda: far.ends)
    far.wire.reset()
    turned.until(lambda: near.ends)
    assert near.wire.fingerprint() == certificate.fingerprint  # when it is over, too


@only("kind", ["tls"], indirect=True)
def test_an_idle_connection_is_small_and_bulk_does_not_stay_in_it(turned, pair):
    near, far = pair()
    far.wire.use([memoryview(bytearray(PIECE)) for _ in range(2)])
    for _ in range(20):
        near.wire.send(NOISE)
        turned.until(lambda: near.wire.unsent < 1 << 20)
    turned.until(lambda: len(far.heard) == 20 * len(NOISE))
    # The memory itself is OpenSSL's; what bounds it is how much was ever in its buffers.
    assert near.wire.outgoing.pending == far.wire.incoming.pending == 0 and STEP <= 1 << 15


# -- foreign peers -----------------------------------------------------------------------------


@pytest.fixture
def openssl(tmp_path):
    """openssl(words...) -> a running `openssl` with pipes; skips without it."""
    started = []

    def start(*words):
        try:
            process = subprocess.Popen(["openssl", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL)
        except FileNotFoundError:
            pytest.skip("needs openssl (Debian: openssl)")
        started.append(process)
        os.set_blocking(process.stdout.fileno(), False)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_openssl_as_a_client_hears_and_says_the_end_of_tls(turned, certificate, openssl):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = openssl("s_client", "-connect", f"127.0.0.1:{listener.getsockname()[1]}", "-quiet", "-nocommands",
                         "-no_ign_eof")
        sock, _ = listener.accept()
    sock.setblocking(False)
    done = []
    accept_tls(turned.wires, sock, certificate.context, done.append)
    wire = turned.until(lambda: done)[0]
    owner = Owner(wire)
    wire.send(b"id")
    assert turned.until(client.stdout.read) == b"id"
    client.stdin.write(b"hello\n")
    client.stdin.flush()
    turned.until(lambda: owner.heard == b"hello\n")
    client.stdin.close()  # s_client says close_notify then, and closes
    turned.until(lambda: owner.ends)
    assert owner.ends == [None] and wire.is_open
    wire.finish()
    turned.until(lambda: is_gone(owner))
    assert owner.ends == [None]


def test_openssl_as_a_server_hears_the_end_of_tls(turned, openssl, tmp_path):
    made = make_pair("nodepass.example.com")
    path = tmp_path / "both.pem"
    path.write_bytes(made.certificate_pem + made.key_pem)
    port = free_port()
    server = openssl("s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(path), "-quiet", "-naccept", "1",
                     "-tls1_3", "-rev")
    deadline = monotonic() + 10
    while True:
        try:
            sock = connect(("127.0.0.1", port))
            break
        except OSError:
            assert monotonic() < deadline
    sock.setblocking(False)
    wire, done = TlsWire(TcpWire(turned.wires, sock), client_context(False)), []
    wire.shake(done.append)
    assert turned.until(lambda: done) == [None]
    owner = Owner(wire)
    assert wire.fingerprint() == fingerprint(made.certificate)
    wire.send(b"olleh\n")
    turned.until(lambda: owner.heard == b"hello\n")
    wire.finish()
    turned.until(lambda: owner.ends)
    assert not wire.is_open
    server.wait(10)


# -- WebSocket ---------------------------------------------------------------------------------


@pytest.fixture
def socketed(turned):
    """socketed(is_client) -> an Owner of a WebSocketWire, and the socket of its peer."""
    made = []

    def make(is_client=True):
        near, far = sockets()
        made.extend((near, far))
        far.settimeout(10)
        return Owner(WebSocketWire(TcpWire(turned.wires, near), is_client)), far

    yield make
    for sock in made:
        sock.close()


def test_messages_are_as_the_original_has_them(turned, socketed):
    owner, far = socketed(is_client=False)
    owner.wire.send(b"\1\2\3\4")
    assert far.recv(100) == b"\x82\4\1\2\3\4"
    owner.wire.send(bytes(20000))
    turned.turn()
    assert far.recv(4) == b"\x82\x7e\x3f\xf8"  # 16,376 bytes, the first of two
    owner.wire.finish()
    data = read_until(turned, far, b"\x88\2\x03\xe8")
    assert data.endswith(b"\x88\2\x03\xe8")  # unmasked, 1000
    far.sendall(frame(8, b"\x03\xe8"))
    turned.until(lambda: is_gone(owner) or owner.ends)
    assert owner.ends == [None]


def read_until(turned, sock, end):
    data = b""
    while not data.endswith(end):
        turned.turn()
        data += sock.recv(65536)
    return data


@only("code, clean", [(b"\x03\xe8", True), (b"\x03\xe9bye", True), (b"", True), (b"\x03\xf3", False),
                      (b"\x03\xea", False)])
def test_what_a_close_means(turned, socketed, code, clean):
    owner, far = socketed()
    far.sendall(b"\x82\1x" + bytes((0x88, len(code))) + code + b"\x82\1y")
    turned.until(lambda: owner.ends)
    assert owner.heard == b"x" and (owner.ends == [None]) is clean and owner.wire.is_open is clean
    if clean:
        owner.wire.send(b"late words")
        owner.wire.finish()
    assert far.recv(2)[0] == (0x82 if clean else 0x88)
    turned.until(lambda: not owner.wire.is_open)


@only("is_client, data, code", [
    (True, b"\x81\1x", 1003), (False, frame(1, b"x"), 1003), (True, b"\x82\x81xxxxx", 1002), (False, b"\x82\1x", 1002),
    (True, b"\x00\1x", 1002), (True, b"\x02\1x\x82\1x", 1002), (True, b"\xc2\1x", 1002), (True, b"\x83\1x", 1002),
    (True, b"\x8b\0", 1002), (True, b"\x09\0", 1002), (True, b"\x89\x7e\0\x80" + bytes(128), 1002),
    (True, b"\x88\1x", 1002), (True, b"\x82\x7f\xff" + bytes(7), 1002)])
@only("step", [1, 1000])
def test_frames_that_break_the_rules_end_the_connection(turned, socketed, is_client, data, code, step):
    owner, far = socketed(is_client)
    for at in range(0, len(data), step):
        far.sendall(data[at:at + step])
        turned.turn()
    turned.until(lambda: owner.ends)
    assert isinstance(owner.ends[0], Failed) and len(owner.ends) == 1 and not owner.wire.is_open
    said = far.recv(100)
    key = said[2:6] if is_client else bytes(4)
    payload = said[6:8] if is_client else said[2:4]
    assert said[0] == 0x88 and bytes(a ^ b for a, b in zip(payload, key)) == code.to_bytes(2, "big")


def test_a_ping_is_answered_and_a_flood_of_them_bounded(turned, socketed):
    owner, far = socketed()
    far.sendall(b"\x82\1a\x89\2hi\x82\1b\x8a\0")
    turned.until(lambda: owner.heard == b"ab")
    answer = far.recv(100)
    assert answer[0] == 0x8a and bytes(a ^ b for a, b in zip(answer[6:], answer[2:6])) == b"hi"
    far.setblocking(False)
    flood, at = (b"\x89\x7d" + bytes(125)) * 200000, 0
    while at < len(flood):
        try:
            at += far.send(flood[at:at + 1000000])
        except BlockingIOError:
            pass
        turned.turn()
        assert owner.wire.unsent < 1 << 20
    assert owner.wire.is_open


def test_messages_in_fragments_are_one_stream(turned, socketed):
    owner, far = socketed(is_client=False)
    parts = [(0x02, b"one "), (0x89, b""), (0x00, b""), (0x00, b"two "), (0x80, b"three"), (0x82, b""),
             (0x82, b" four")]
    data = b""
    for first, payload in parts:
        masked = bytearray(frame(2, payload))
        masked[0] = first
        data += masked
    for at in range(len(data)):
        far.sendall(data[at:at + 1])
        turned.turn()
    turned.until(lambda: owner.heard == b"one two three four")


# -- contexts, and who we are ------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """files(name) writes a new certificate and its key; their paths, and the fingerprint."""

    def write(name="a.example.com", key=None):
        made = make_pair(name)
        paths = tmp_path / "cert.pem", tmp_path / "key.pem"
        for path, content in zip(paths, (made.certificate_pem, key if key is not None else made.key_pem)):
            new = path.with_suffix(".new")
            new.write_bytes(content)
            new.rename(path)
        return tuple(map(str, paths)), fingerprint(made.certificate)

    return write


def test_files_are_read_again_when_they_change(files):
    clock, told = FakeClock(), []
    paths, first = files()
    certificates = Certificates(paths, tell=told.append, clock=clock)
    certificates.speak(["h2"])
    context = certificates.context
    assert certificates.fingerprint == first
    _, second = files("b.example.com")
    assert certificates.context is context  # it looks once a second
    clock.jump(1)
    assert certificates.context is not context and certificates.fingerprint == second
    assert told == [f"the certificate in {paths[0]} was read again"]
    clock.jump(1)
    assert certificates.context is certificates.context and len(told) == 1


@only("spoil, words", [
    (lambda paths, write: os.unlink(paths[0]), "no such file"),
    (lambda paths, write: write(key=b"junk"), "it is no PEM"),
    (lambda paths, write: write(key=make_pair("x.example.com").key_pem), "key values mismatch"),
    (lambda paths, write: open(paths[0], "w").close(), "")])
def test_files_that_cannot_be_used_leave_the_certificate_before(files, spoil, words):
    clock, told = FakeClock(), []
    paths, first = files()
    certificates = Certificates(paths, tell=told.append, clock=clock)
    context = certificates.context
    spoil(paths, files)
    for _ in range(3):
        clock.jump(1)
        assert certificates.context is context and certificates.fingerprint == first
    assert len(told) == 1 and words in told[0] and "still in use" in told[0]
    _, second = files()
    clock.jump(1)
    assert certificates.context is not context and certificates.fingerprint == second and len(told) == 2
    with pytest.raises(SettingsError, match="crt, key: .*"):
        spoil(paths, files)
        Certificates(paths)


@only("name", ["nodepass.example.com", "192.0.2.1", "2001:db8::1", "none", "", "*.example.com",
                "a" * 70 + ".example.com"])
def test_a_certificate_is_made_for_any_name(name):
    made = Certificates(None, name)
    assert made.fingerprint.startswith("sha256:") and len(made.fingerprint) == 71


@only("name, good", [("nodepass.example.com", True), ("other.example.com", False), ("127.0.0.1", False)])
def test_a_certificate_is_checked_where_that_is_asked_for(turned, tmp_path, name, good):
    made = make_pair("nodepass.example.com")
    path = tmp_path / "ca.pem"
    path.write_bytes(made.certificate_pem)
    near, far = sockets()
    done = []
    accept_tls(turned.wires, far, server_context(made), done.append)
    wire = TlsWire(TcpWire(turned.wires, near), client_context(True, authorities=str(path)), name)
    wire.shake(done.append)
    turned.until(lambda: len(done) == 2 or not good and done)
    assert (None in done) is good
    if not good:
        assert any(isinstance(result, Failed) and result.reason == "certificate" for result in done)
    wire.reset()
    turned.until(lambda: len(done) == 2)
    for result in done:
        if isinstance(result, TlsWire):
            result.reset()
    turned.until(lambda: far.fileno() < 0)


@only("secure", [False, True])
def test_an_opening_gives_a_wire_with_two_directions(turned, certificate, secure):
    from sniroute_dial import WayOut

    way, done = WayOut(turned.loop, None, ""), []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = Place("127.0.0.1", listener.getsockname()[1], client_context(False) if secure else None, "")
        DuplexOpening(turned.wires, way, place, done.append).start()
        turned.turn(3)
        sock, address = listener.accept()
    sock.setblocking(False)
    accepted = []
    if secure:
        accept_tls(turned.wires, sock, certificate.context, accepted.append, address)
    else:
        accepted.append(TcpWire(turned.wires, sock, address))
    wire = turned.until(lambda: done and accepted and done)[0]
    assert isinstance(wire, TlsWire if secure else TcpWire)
    near, far = Owner(wire), Owner(accepted[0])
    near.wire.finish()
    turned.until(lambda: far.ends)
    far.wire.send(b"late")
    far.wire.close()
    turned.until(lambda: near.ends and is_gone(near, far))
    assert near.heard == b"late" and near.ends == [None]


def test_closed_wires_that_wait_for_their_peers_are_bounded(turned, monkeypatch):
    monkeypatch.setattr(sniroute_duplex, "LINGERING_MAX", 5)
    made = [sockets() for _ in range(8)]
    for near, _ in made:
        TcpWire(turned.wires, near).close()
    assert [near.fileno() < 0 for near, _ in made] == [True] * 3 + [False] * 5
    for _, far in made:
        far.close()
    turned.until(lambda: all(near.fileno() < 0 for near, _ in made))
