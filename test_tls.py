"""Tests of sniroute_tls.py: TLS to a backend.

First a TlsClient against OpenSSL's own server, piece by piece, in the thread of the test; then a router with `forward-tls`
in front of servers that speak TLS.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import socket
import ssl
import subprocess
import threading
import types
from typing import Any, Callable, Iterator

import pytest

import sniroute_deadlines
import sniroute_edge
import sniroute_tls
from conftest import HOST, Address, wait_until
from sniroute_refusals import Refused
from sniroute_gateway import Policy
from sniroute_requests import Exchange
from sniroute_routes import parse_route
from sniroute_settings import load_settings
from sniroute_tls import TlsClient, TlsClients, context
from sniroute_web import Web
from testbed.clients import program_path
from testbed.running import Running, read_all, reset
from testbed.web import (UPGRADE, WEB, Cut, Talk, answering, check_refusal, chunks, reply, request, shake, table,
                         telling)

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
NAME = "db.example.com"
both_versions = pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])


def server_context(certificates: pathlib.Path, certificate: str = "edge",
                   version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """A server's settings: one of the certificates, and this version only."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(certificates / f"{certificate}.pem")
    if version is not None:
        made.minimum_version = made.maximum_version = version
    return made


# -- a conversation, piece by piece ------------------------------------------------------------


class Far:
    """OpenSSL's server, without a socket."""

    def __init__(self, made: ssl.SSLContext):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = made.wrap_bio(self.incoming, self.outgoing, server_side=True)

    def hear(self, data: bytes) -> bytes:
        """Go on with the handshake; what it says.  Raises SSLError."""
        self.incoming.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()

    def read(self, data: bytes) -> bytes:
        """All that this means."""
        self.incoming.write(data)
        parts = []
        with contextlib.suppress(ssl.SSLWantReadError):
            while part := self.tls.read(1 << 16):
                parts.append(part)
        return b"".join(parts)

    def say(self, data: bytes) -> bytes:
        """What is sent for these bytes."""
        at = 0
        while at < len(data):
            at += self.tls.write(data[at:])
        return self.outgoing.read()


def shaken(client: TlsClient, far: Far, step: int = 1 << 16) -> None:
    """Finish the handshake; what the server says comes in pieces of `step` bytes."""
    said = far.hear(client.hello())
    while not client.is_ready:
        assert said, "both wait"
        answered = b"".join(client.answer(said[at:at + step]) for at in range(0, len(said), step))
        said = far.hear(answered)
    if said:  # sessions, with TLS 1.3
        pour(client, said)


def pour(client: TlsClient, data: bytes) -> None:
    """Have the TlsClient take this from a socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for at in range(0, len(data), sniroute_tls.RECORDS):
            theirs.sendall(data[at:at + sniroute_tls.RECORDS])
            client.fill(ours)


def drained(client: TlsClient) -> bytes:
    """All that can be read now."""
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := client.read(1 << 16):
            parts.append(part)
    return b"".join(parts)


def verified(certificates: pathlib.Path) -> str:
    """The value of `verify` that trusts the tests' own authority."""
    return str(certificates / "ca.pem")


@both_versions
@pytest.mark.parametrize("step", [1, 100, 1 << 16])
def test_a_handshake_and_bytes_both_ways(certificates, version, step):
    far, client = Far(server_context(certificates, version=version)), TlsClients().begin(NAME, verified(certificates))
    shaken(client, far, step)
    assert far.tls.version() == {TLS12: "TLSv1.2", TLS13: "TLSv1.3"}[version]
    assert far.read(client.seal(b"hello")) == b"hello"
    pour(client, far.say(b"world"))
    assert drained(client) == b"world" and client.is_dry


@both_versions
@pytest.mark.parametrize("size", [1, 16384, 16385, 65536, 300_000])
def test_bytes_of_any_number_are_sealed_and_read(certificates, version, size):
    """A record holds 16 KiB; OpenSSL writes one at a time."""
    far, client = Far(server_context(certificates, version=version)), TlsClients().begin(NAME, verified(certificates))
    shaken(client, far)
    data = os.urandom(size)
    assert far.read(client.seal(data)) == data
    pour(client, far.say(data))
    assert drained(client) == data


@both_versions
def test_records_that_came_together_are_read_one_after_another(certificates, version):
    """And so is one that came in pieces: `is_dry` says when the socket has to be asked again."""
    far, client = Far(server_context(certificates, version=version)), TlsClients().begin(NAME, verified(certificates))
    shaken(client, far)
    drained(client)
    assert client.is_dry
    first, second = far.say(b"one"), far.say(b"two")
    pour(client, first + second[:10])
    assert not client.is_dry
    assert client.read(100) == b"one" and not client.is_dry
    with pytest.raises(BlockingIOError):
        client.read(100)
    assert client.is_dry
    pour(client, second[10:])
    assert client.read(2) == b"tw" and not client.is_dry and client.read(2) == b"o"


@both_versions
def test_a_session_is_used_again_for_the_same_name_and_settings_only(certificates, version):
    made, clients = server_context(certificates, version=version), TlsClients()

    def is_reused(name: str, verify: str | bool) -> bool:
        far, client = Far(made), clients.begin(name, verify)
        shaken(client, far)
        pour(client, far.say(b"x"))
        assert drained(client) == b"x"
        assert far.tls.session_reused == client.tls.session_reused
        return far.tls.session_reused

    right = verified(certificates)
    assert [is_reused(NAME, right), is_reused(NAME, right), is_reused(NAME, right)] == [False, True, True]
    assert not is_reused("other.example.com", right) and not is_reused(NAME, False)
    assert is_reused(NAME, False)
    clients = TlsClients()  # the settings were read again
    assert not is_reused(NAME, right)


def test_sessions_are_kept_up_to_a_number(certificates, monkeypatch):
    monkeypatch.setattr(sniroute_tls, "SESSIONS_MAX", 2)
    made, clients = server_context(certificates), TlsClients()
    for name in ("a.example.com", "b.example.com", "c.example.com"):
        far, client = Far(made), clients.begin(name, False)
        shaken(client, far)
        pour(client, far.say(b"x"))
        drained(client)
    assert [name for name, _ in clients.sessions] == ["b.example.com", "c.example.com"]


def test_the_name_is_sent_and_an_address_is_not(certificates):
    """RFC 6066 section 3; the certificate has to have the address."""
    for name, sent in ((NAME, NAME), (HOST, None)):
        made, names = server_context(certificates), []
        made.sni_callback = lambda tls, name, _: names.append(name)
        shaken(TlsClients().begin(name, verified(certificates)), Far(made))
        assert names == [sent]


def test_http_1_1_is_offered_and_no_other_protocol(certificates):
    made = server_context(certificates)
    made.set_alpn_protocols(["h2", "http/1.1"])
    far = Far(made)
    shaken(TlsClients().begin(NAME, False), far)
    assert far.tls.selected_alpn_protocol() == "http/1.1"


BROKEN = {  # certificate, name, whether the test's authority is trusted: what is said
    "another name": ("wrong_name", NAME, True, "Hostname mismatch"),
    "another address": ("edge", "192.0.2.1", True, "IP address mismatch"),
    "over": ("expired", NAME, True, "certificate has expired"),
    "of a stranger": ("untrusted", NAME, True, "unable to get local issuer certificate"),
    "of nobody that this host trusts": ("edge", NAME, False, "unable to get local issuer certificate"),
}


@both_versions
@pytest.mark.parametrize("certificate, name, trusts, said", BROKEN.values(), ids=BROKEN)
def test_a_wrong_certificate_is_refused_unless_none_is_verified(certificates, version, certificate, name, trusts, said):
    made = server_context(certificates, certificate, version)
    with pytest.raises(Refused, match=said) as caught:
        shaken(TlsClients().begin(name, verified(certificates) if trusts else True), Far(made))
    assert caught.value.kind == "backend_tls" and caught.value.status == 502
    shaken(TlsClients().begin(name, False), Far(made))


@pytest.mark.parametrize("text, said", [(None, "No such file"), ("", "no certificate or crl found"),
                                        ("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n", "ca.pem")])
def test_a_file_of_certificates_that_is_none_is_said(tmp_path, text, said):
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OSError):
        context(str(path))
    with pytest.raises(Refused, match=said) as caught:
        TlsClients().begin(NAME, str(path))
    assert caught.value.kind == "backend_tls" and str(path) in str(caught.value)


def test_a_file_of_certificates_that_has_changed_is_read_again(certificates, tmp_path):
    path = tmp_path / "ca.pem"
    path.write_bytes((certificates / "stranger.pem").read_bytes())
    made = server_context(certificates)
    with pytest.raises(Refused):
        shaken(TlsClients().begin(NAME, str(path)), Far(made))
    assert context(str(path)) is context(str(path))
    path.write_bytes((certificates / "ca.pem").read_bytes())
    shaken(TlsClients().begin(NAME, str(path)), Far(made))


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"\0" * 100,
                                  b"\x15\x03\x01\0\2\2\x28", b"\x16\x03\x03\xff\xff" + b"x" * 100])
def test_a_peer_that_speaks_no_tls_is_refused(said):
    client = TlsClients().begin(NAME, False)
    client.hello()
    with pytest.raises(Refused) as caught:
        client.answer(said)
    assert caught.value.kind == "backend_tls" and str(caught.value)


def test_a_handshake_without_an_end_is_refused(certificates, monkeypatch):
    monkeypatch.setattr(sniroute_tls, "FLIGHT_MAX", 500)
    far, client = Far(server_context(certificates)), TlsClients().begin(NAME, False)
    said = far.hear(client.hello())
    with pytest.raises(Refused, match="no end"):
        for at in range(0, 600, 10):
            client.answer(said[at:at + 10])


@pytest.mark.parametrize("room", [sniroute_tls, sniroute_edge], ids=lambda room: room.__name__)
def test_an_end_is_one_only_where_tls_says_so_whatever_this_python_thinks(room, monkeypatch):
    """Some Pythons have OpenSSL take any end for one."""
    ignoring = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)

    class Lax(ssl.SSLContext):
        def __new__(cls, *words: Any) -> ssl.SSLContext:
            made = ssl.SSLContext.__new__(cls, *words)
            made.options |= ignoring
            return made

    lax = types.SimpleNamespace(**{**vars(ssl), "SSLContext": Lax,
                                   "create_default_context": lambda: Lax(ssl.PROTOCOL_TLS_CLIENT)})
    monkeypatch.setattr(room, "ssl", lax)
    sniroute_tls.made_context.cache_clear()
    made = context(False) if room is sniroute_tls else sniroute_edge.make_context()
    sniroute_tls.made_context.cache_clear()
    assert isinstance(made, Lax) and not made.options & ignoring


@both_versions
def test_an_end_is_one_only_where_tls_says_so(certificates, version):
    """Else somebody between may have cut it."""
    for is_said in (True, False):
        far, client = Far(server_context(certificates, version=version)), TlsClients().begin(NAME, False)
        shaken(client, far)
        last = far.say(b"last")
        if is_said:
            with contextlib.suppress(ssl.SSLWantReadError):
                far.tls.unwrap()
            last += far.outgoing.read()
        pour(client, last)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.close()
            client.fill(ours)
        assert client.read(100) == b"last"
        if is_said:
            assert client.read(100) == b"" and client.is_dry
        else:
            with pytest.raises(ConnectionResetError):
                client.read(100)
            assert client.is_dry


@both_versions
def test_a_record_that_was_changed_on_the_way_is_a_cut(certificates, version):
    far, client = Far(server_context(certificates, version=version)), TlsClients().begin(NAME, False)
    shaken(client, far)
    drained(client)
    said = bytearray(far.say(b"hello"))
    said[-1] ^= 1
    pour(client, said)
    with pytest.raises(ConnectionResetError, match="decryption failed or bad record mac"):
        client.read(100)
    with pytest.raises(OSError):
        client.seal(b"more")


@both_versions
def test_what_is_said_at_the_end_is_an_end_to_the_server_and_it_may_go_on(certificates, version):
    far, client = Far(server_context(certificates, version=version)), TlsClients().begin(NAME, False)
    shaken(client, far)
    drained(client)
    far.incoming.write(client.seal(b"last") + client.close())
    assert far.tls.read(100) == b"last"
    with contextlib.suppress(ssl.SSLZeroReturnError):
        assert far.tls.read(100) == b""
    said = far.say(b"x" * 40_000)
    for at in range(0, len(said), 9999):
        pour(client, said[at:at + 9999])
    assert drained(client) == b"x" * 40_000


# -- a router in front -------------------------------------------------------------------------


class Secure:
    """A backend that speaks TLS, and a router that leads to it.  `shakes`: of each handshake, the name and whether a
    session was used again; or the error.
    """

    def __init__(self, made: ssl.SSLContext, script: Callable[[Talk], object]):
        self.made = made
        self.script = script
        self.shakes: list[Any] = []
        self.talks: list[Talk] = []
        self.over = 0
        self.running: Running
        made.sni_callback = lambda tls, name, _: setattr(tls, "asked_for", name)

    def handle(self, sock: socket.socket) -> None:
        sock.settimeout(10)
        try:
            tls = self.made.wrap_socket(sock, server_side=True)
        except OSError as error:
            self.shakes.append(error)
            return
        with tls, Talk(tls) as talk:
            self.shakes.append((getattr(tls, "asked_for", None), tls.session_reused))
            self.talks.append(talk)
            try:
                self.script(talk)
                with contextlib.suppress(ssl.SSLError):
                    talk.rest()
            finally:
                self.over += 1

    def connect(self, *said: bytes) -> Talk:
        """A client that has said this, for a `with`."""
        return Talk(self.running.connect(b"".join(said)))

    def ask(self, said: bytes, method: str = "GET") -> Any:
        """The answer to the one request of a client."""
        with self.connect(said) as client:
            return client.answer(method)


@pytest.fixture
def secure(run, serve, settings_file, certificates) -> Callable[..., Secure]:
    """secure(script, certificate, version, options=(), **options of the route) -> Secure."""
    def start(script: Callable[[Talk], object] = telling, certificate: str = "edge",
              version: ssl.TLSVersion | None = None, options: tuple[str, ...] = (), **more: Any) -> Secure:
        made = Secure(server_context(certificates, certificate, version), script)
        made.running = start_router(run, settings_file, serve(made.handle).address,
                                    **{"verify": verified(certificates), **more}, options=options)
        return made
    return start


def start_router(run: Callable[..., Running], settings_file: Callable[[str], str], address: Address,
                 options: tuple[str, ...] = (), **more: Any) -> Running:
    """A router that leads to a backend by TLS."""
    target = table("tcp:%s:%d" % address, **{"http": "forward-tls", "verify": False, **more})
    return run(f"--config={settings_file(f'[routes]{chr(10)}{chr(34)}*.example.com{chr(34)} = {target}{chr(10)}')}",
               *options)


def reason(running: Running) -> str:
    """What the log says of the first connection that is over."""
    return running.ending().detail


WAYS = {"length": lambda body: b"Content-Length: %d\r\n\r\n" % len(body) + body,
        "chunks": lambda body: b"Transfer-Encoding: chunked\r\n\r\n" + chunks(*(
            body[at:at + 70_000] for at in range(0, len(body), 70_000)))}


@both_versions
@pytest.mark.parametrize("way", WAYS)
def test_bodies_of_any_size_go_both_ways_on_one_connection(secure, version, way):
    served = secure(answering(lambda asked: b"HTTP/1.1 200 OK\r\n" + WAYS[way](asked.body)), version=version)
    with served.connect() as client:
        for size in (0, 1, 70_000, 3_000_000, 5):
            body = (bytes(range(251)) * (size // 251 + 1))[:size]
            client.say(request("POST").removesuffix(b"\r\n") + WAYS[way](body))
            answer = client.answer()
            assert answer.body == body and (answer.get("Transfer-Encoding") == "chunked") == (way == "chunks")
    assert served.shakes == [(WEB, False)]


@both_versions
def test_pipelined_requests_over_tls_are_answered_in_order(secure, version):
    served = secure(answering(lambda asked: reply(asked.target.encode())), version=version)
    with served.connect(*(request("GET", f"/{number}") for number in range(50))) as client:
        for number in range(50):
            assert client.answer().body == b"/%d" % number
    assert len(served.talks) == 1


def test_a_kept_connection_that_takes_nothing_more_is_replaced(secure, monkeypatch):
    """TLS says so before the kernel does: nothing of the request was sent."""
    served = secure(answering(lambda asked: reply(asked.target.encode())))
    with served.connect(request("POST", "/one")) as client:
        assert client.answer().body == b"/one"
        (connection,) = served.running.router.connections

        def broken(data: bytes) -> bytes:
            raise ConnectionResetError(errno.ECONNRESET, "bad record mac")

        monkeypatch.setattr(TlsClient, "seal", lambda tls, data, right=TlsClient.seal:
                            broken(data) if tls is kept else right(tls, data))
        kept = connection.tls
        client.say(request("POST", "/two"))
        assert client.answer().body == b"/two"
    assert len(served.shakes) == 2 and not served.running.counter("internal")


@both_versions
def test_the_server_sees_that_a_session_is_used_again(secure, version):
    served = secure(version=version)
    for _ in range(3):
        assert served.ask(request()).status == 200
    other = request(host="other.example.com")
    assert served.ask(other).status == 200
    assert served.shakes == [(WEB, False), (WEB, True), (WEB, True), ("other.example.com", False)]


@pytest.mark.parametrize("host, sent", [("inside.example.com", "inside.example.com"), ("backend", None)])
def test_the_name_is_the_routes_host_where_it_has_one(secure, host, sent):
    """`backend`: its address, which is no name; the certificate has it."""
    served = secure(host=host)
    asked = served.ask(request()).body
    assert served.shakes == [(sent, False)]
    assert (b"\r\nHost: %b" % (host.encode() if sent else HOST.encode())) in asked


@both_versions
@pytest.mark.parametrize("certificate, said", [("wrong_name", "Hostname mismatch"), ("untrusted", "local issuer"),
                                               ("expired", "expired")])
def test_a_client_of_a_backend_with_a_wrong_certificate_is_told_502(secure, version, certificate, said):
    served = secure(certificate=certificate, version=version)
    answer = served.ask(request("GET", "/secret"))
    check_refusal(answer, 502)
    ending = served.running.ending()
    assert (ending.reason, said in ending.detail) == ("backend_tls", True), ending
    assert not served.talks, "no byte of the request is sent"


def test_without_verification_any_certificate_will_do(secure):
    assert secure(certificate="expired", verify=False).ask(request()).status == 200


@both_versions
def test_a_backend_that_asks_for_a_certificate_is_told_that_there_is_none(secure, version, certificates):
    """With TLS 1.3 it says so only behind the handshake."""
    for mode, status in ((ssl.CERT_OPTIONAL, 200), (ssl.CERT_REQUIRED, 502)):
        served = secure(version=version)
        served.made.load_verify_locations(certificates / "ca.pem")
        served.made.verify_mode = mode
        answer = served.ask(request())
        assert answer.status == status
        if status == 502:
            assert "tlsv13 alert certificate required" in reason(served.running) \
                or "sslv3 alert handshake failure" in reason(served.running), reason(served.running)


def test_a_backend_that_speaks_no_tls_is_502(run, origin, settings_file):
    backend = origin(lambda talk: talk.say(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    running = start_router(run, settings_file, backend.address)
    with Talk(running.connect(request("GET", "/secret"))) as client:
        check_refusal(client.answer(), 502)
    assert running.ending().reason == "backend_tls" and b"secret" not in backend.heard


@pytest.mark.parametrize("ends", ["end", "reset"])
def test_a_backend_that_leaves_the_handshake_is_502(run, origin, settings_file, ends):
    backend = origin(lambda talk: talk.exactly(5) and (talk.reset() if ends == "reset" else talk.finish()))
    running = start_router(run, settings_file, backend.address)
    with Talk(running.connect(request())) as client:
        check_refusal(client.answer(), 502)
    assert running.ending().reason == "backend"


def test_a_backend_that_hangs_in_the_handshake_is_502_in_time(run, origin, settings_file, monkeypatch):
    monkeypatch.setattr(sniroute_deadlines, "GREETING_TIMEOUT", 0.1)
    backend = origin(lambda talk: talk.rest())
    running = start_router(run, settings_file, backend.address)
    with Talk(running.connect(request())) as client:
        check_refusal(client.answer(), 502)
    assert "PostgreSQL" not in reason(running) and "SSLRequest" not in reason(running)
    backend.wait_over(1)


@both_versions
def test_an_answer_that_is_cut_never_looks_whole(secure, version):
    """The end of the connection is the end of the body only where TLS says so."""
    def script(talk: Talk) -> None:
        is_whole = talk.request().target == "/whole"
        talk.say(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_000)
        if is_whole:
            talk.sock.unwrap()
        else:
            socket.socket(fileno=talk.sock.detach()).close()  # the bare one

    served = secure(script, version=version)
    with served.connect(request("GET", "/whole")) as client:
        assert client.answer().body == b"x" * 100_000 and client.how == "end"
    with served.connect(request("GET", "/cut")) as client:
        with pytest.raises(Cut) as caught:
            client.answer()
        assert caught.value.how == "reset"


def early(made: ssl.SSLContext, said: bytes) -> Callable[[socket.socket], bytes]:
    """A backend that sends its answer in one piece with the end of the handshake; returns what it has heard."""
    def handler(sock: socket.socket) -> bytes:
        sock.settimeout(10)
        far = Far(made)
        while True:
            answer = far.hear(sock.recv(65536))
            if far.tls.version() is not None:
                try:
                    answer += far.say(said)
                except ssl.SSLError:
                    pass
                else:
                    sock.sendall(answer)
                    return read_all(sock)
            sock.sendall(answer)
    return handler


def test_an_answer_that_comes_with_the_end_of_the_handshake_is_heard(run, serve, settings_file, certificates):
    """No event tells of it: it was read with the handshake.  A server may say 408 or 503 before it is asked."""
    backend = serve(early(server_context(certificates, version=TLS12), reply(b"early", status="503 Busy")))
    running = start_router(run, settings_file, backend.address)
    with Talk(running.connect(request())) as client:
        answer = client.answer()
    assert (answer.status, answer.body) == (503, b"early")


@both_versions
def test_two_answers_in_one_record_are_one(secure, version):
    """What nobody has asked for spoils the connection, whether it comes in the same record or in the next."""
    def script(talk: Talk) -> None:
        asked = talk.request()
        one, evil = reply(b"one" + asked.target.encode()), reply(b"evil")
        if asked.target == "/same":
            talk.say(one + evil)
        else:
            talk.say(one, evil)

    served = secure(script, version=version)
    for target in ("/same", "/next"):
        with served.connect(request("GET", target)) as client:
            assert client.answer().body == b"one" + target.encode()
            wait_until(lambda: served.over >= len(served.talks))
            client.say(request("GET", "/again"))
            assert client.answer().body == b"one/again"
    assert len(served.talks) == 4


@both_versions
def test_a_connection_that_was_proven_for_one_name_serves_that_name_only(secure, version):
    """Also where one route leads both names to one address, and connections are shared."""
    served = secure(answering(lambda asked: reply(asked.get("Host").encode())), version=version, http_reuse="safe")
    hosts = [f"{name}.example.com" for name in "aabbab"]
    served.running.router.web.spares.queue.seconds = 60.0
    with served.connect() as first, served.connect() as second:
        for client in (first, second):
            for host in hosts:
                client.say(request(host=host))
                assert client.answer().body == host.encode()
    assert [name for name, _ in served.shakes] == ["a.example.com", "b.example.com"] * 2
    served.running.router.call(served.running.router.web.spares.close)


def test_a_backend_at_an_address_of_ipv6_has_to_prove_that_address(certificates):
    """Its brackets and its port are for Host."""
    route = parse_route("*.example.com=tcp:[::1]:8443")._replace(http="forward-tls", host="backend")
    settings = load_settings(["--route=*.example.com=tcp:[::1]:8443"], {})
    web, exchange = Web.__new__(Web), Exchange(None, 0.0)
    web.settings, exchange.decision, exchange.policy = settings, route.decide(WEB), Policy()
    assert web.host(exchange.decision) == b"[::1]:8443" and web.key(exchange) == ("::1", Policy().verify)


# -- behind a 101 ------------------------------------------------------------------------------


@both_versions
def test_what_comes_behind_a_101_comes_through_tls(secure, version):
    """4 KiB in one record with the head; then a megabyte each way; then what is left when the client has ended."""
    data = bytes(range(256)) * 4096

    def script(talk: Talk) -> None:
        asked = talk.request()
        talk.say(shake(asked.get("Sec-WebSocket-Key")) + b"x" * 4096)
        assert talk.exactly(len(data)) == data
        talk.say(data)
        assert talk.rest() == b"the last"
        talk.say(data, data)
        with contextlib.suppress(OSError):
            talk.sock.unwrap()

    served = secure(script, version=version)
    with served.connect(request("GET", "/", *UPGRADE)) as client:
        assert client.answer().status == 101
        sender = threading.Thread(target=client.say, args=(data,))
        sender.start()
        assert client.exactly(4096) == b"x" * 4096 and client.exactly(len(data)) == data
        sender.join()
        client.say(b"the last")
        client.finish()
        assert client.rest() == data + data and client.how == "end"
    assert served.running.ending().reason == "client_closed"


@both_versions
def test_an_end_of_the_client_waits_for_what_the_backend_has_said(secure, version):
    """The client reads late: what the backend said is in the router then, and is not lost when the client has ended."""
    told = threading.Event()
    most = 16 << 20

    def script(talk: Talk) -> None:
        asked = talk.request()
        talk.say(shake(asked.get("Sec-WebSocket-Key")))
        talk.sock.settimeout(0.2)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < most:
                sent += talk.sock.send(b"x" * 16384)
        told.set()
        talk.sock.settimeout(10)
        assert talk.rest() == b""
        talk.say(b"the last")
        with contextlib.suppress(OSError):
            talk.sock.unwrap()

    served = secure(script, version=version)
    with served.connect(request("GET", "/", *UPGRADE)) as client:
        assert client.answer().status == 101
        assert told.wait(20)
        client.finish()
        wait_until(lambda: all(each.has_ended for each in served.running.router.connections))
        heard = client.rest()
        assert client.how == "end" and heard.endswith(b"xthe last") and set(heard[:-8]) == {ord("x")}


@both_versions
def test_a_chat_that_is_cut_is_reset(secure, version):
    told = threading.Event()

    def script(talk: Talk) -> None:
        asked = talk.request()
        talk.say(shake(asked.get("Sec-WebSocket-Key")) + b"hello")
        assert told.wait(10)
        reset(socket.socket(fileno=talk.sock.detach()))

    with secure(script, version=version).connect(request("GET", "/", *UPGRADE)) as client:
        assert client.answer().status == 101 and client.exactly(5) == b"hello"
        told.set()
        assert client.rest() == b"" and client.how == "reset"


# -- what only OpenSSL's own server says -------------------------------------------------------


@pytest.fixture
def s_server(certificates, free_ports) -> Iterator[Callable[..., Any]]:
    """s_server(*words) -> the process and its port, until the test ends: what is written to it goes to its client."""
    program = program_path("openssl", "openssl")
    with contextlib.ExitStack() as stack:
        def start(*words: str) -> tuple[subprocess.Popen[bytes], int]:
            port = free_ports(1)[0]
            process = stack.enter_context(subprocess.Popen(
                [program, "s_server", "-accept", f"{HOST}:{port}", "-cert", str(certificates / "edge.pem"), *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
            stack.callback(process.kill)
            heard(process, b"ACCEPT")
            return process, port
        yield start


def heard(process: subprocess.Popen[bytes], mark: bytes) -> bytes:
    """What it writes, up to this."""
    said = b""
    while mark not in said:
        more = os.read(process.stdout.fileno(), 65536)
        assert more, said
        said += more
    return said


def order(process: subprocess.Popen[bytes], said: bytes) -> None:
    os.write(process.stdin.fileno(), said)


@pytest.mark.parametrize("word", [b"K", b"k"])
def test_keys_that_the_server_changes_are_followed(run, settings_file, s_server, word):
    """`K`: and the router has to change its own, too.  Source: RFC 8446 section 4.6.3."""
    process, port = s_server("-tls1_3", "-msg")
    running = start_router(run, settings_file, (HOST, port))
    with Talk(running.connect(request("GET", "/one"))) as client:
        heard(process, b"GET /one")
        order(process, word + b"\n")
        heard(process, b"KeyUpdate")
        order(process, reply(b"1"))
        assert client.answer().body == b"1"
        client.say(request("GET", "/two"))
        heard(process, b"GET /two")
        order(process, reply(b"2"))
        assert client.answer().body == b"2"


@pytest.mark.parametrize("word", [b"r", b"R"])
def test_a_server_that_wants_to_begin_anew_is_told_no(run, settings_file, s_server, word):
    """Renegotiation, which TLS 1.3 has no more."""
    process, port = s_server("-tls1_2", "-msg")
    running = start_router(run, settings_file, (HOST, port))
    with Talk(running.connect(request("GET", "/one"))) as client:
        heard(process, b"GET /one")
        order(process, word + b"\n")
        check_refusal(client.answer(), 502)
