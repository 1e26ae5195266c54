"""Tests of sniroute_browsers.py: who is a browser, what a refused one is shown, and what that may cost.

OpenSSL's s_client becomes a browser where it sends the extensions that only Firefox has (`-serverinfo`): it shakes
hands in earnest.  Chromium is the real one.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from typing import Any, Callable

import pytest

import sniroute_browsers
from sniroute_browsers import (ALPN, BROWSERS, COURTESY, DELEGATED, GREASE, PAGES, RECORD_SIZE, SCT, STATUS_REQUEST,
                               THREADS, VISITS, WAITING, body_of, is_browser)
from sniroute_certificate import SIGNATURES, Leafs
from sniroute_refusals import REFUSALS
from sniroute_settings import Settings, load_settings
from sniroute_wire import HelloReader, whole_hello
from conftest import HERE, HOST, Address, FakeClock, connect, wait_until
from testbed.clients import program_path
from testbed.hellos import (ASK_TLS, GROUPS, HELLO, LINE, NAME, SIGNATURES as ALGORITHMS, SNI, VERSIONS, alpn,
                            extension, genuine, hello, named, records, vector)
from testbed.program import Program, execute
from testbed.running import TUNNEL, Running, alert, read_all, read_exactly, reset, route

OTHER = "other.example.com"
UNKNOWN = alert(112)
ASK = b"GET /a?b=c HTTP/1.1\r\nHost: %b\r\nAccept: text/html\r\n\r\n" % OTHER.encode()
PROTOCOLS = alpn(b"h2", b"http/1.1")


# -- who is a browser --------------------------------------------------------------------------


def suites(*values: int) -> bytes:
    return vector(2, b"".join(value.to_bytes(2, "big") for value in values))


def empty(*kinds: int) -> tuple[bytes, ...]:
    """Extensions whose content nobody looks at here."""
    return tuple(extension(kind, b"") for kind in kinds)


class Layout:
    """Extensions and cipher suites of a hello, which may be changed one by one."""

    def __init__(self, extensions: tuple[bytes, ...], *values: int):
        self.extensions = extensions
        self.suites = values

    def but(self, *changes: bytes | int) -> bytes:
        """The hello, where each odd one of `changes` is replaced by the one behind it."""
        other = dict(zip(changes[::2], changes[1::2]))
        assert other.keys() <= {*self.extensions, *self.suites}
        return hello(*(other.get(each, each) for each in self.extensions),
                     suites=suites(*(other.get(each, each) for each in self.suites)))


# Layouts as uTLS has published them (u_parrots.go); what is in extensions that play no part here is left out.
CHROME = Layout((*empty(0x4A4A), SNI, *empty(23, 65281), GROUPS, *empty(11, 35), PROTOCOLS, *empty(5), ALGORITHMS,
                 *empty(18, 51, 45), VERSIONS, *empty(27, 17613, 65037, 0xDADA)),
                0x1A1A, 0x1301, 0x1302, 0x1303, 0xC02B, 0xC02F)
SAFARI = Layout((*empty(0xEAEA), SNI, *empty(23, 65281), GROUPS, *empty(11), PROTOCOLS, *empty(5), ALGORITHMS,
                 *empty(18, 51, 45), VERSIONS, *empty(27, 0x0A0A)), 0xFAFA, 0x1301, 0x1302, 0xC02C)
FIREFOX = Layout((SNI, *empty(23, 65281), GROUPS, *empty(11, 35), PROTOCOLS, *empty(5, 34, 18, 51), VERSIONS,
                  ALGORITHMS, *empty(45, 28, 27, 65037)), 0x1301, 0x1303, 0x1302, 0xC02B)
GO = Layout((SNI, *empty(5), GROUPS, *empty(11), ALGORITHMS, *empty(65281, 23), PROTOCOLS, *empty(18), VERSIONS,
             *empty(51)), 0xC02B, 0xC02F, 0x1301)
LAYOUTS = {"chrome": CHROME, "safari": SAFARI, "firefox": FIREFOX}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_browser_is_known_by_its_hello(name):
    assert is_browser(body_of(LAYOUTS[name].but()))
    assert is_browser(body_of(LAYOUTS[name].but(PROTOCOLS, alpn(b"http/1.1")))), "for a WebSocket it offers no h2"


(UNLIKE,) = empty(0x6001)  # an extension that nobody has


@pytest.mark.parametrize("said", [
    GO.but(), FIREFOX.but(PROTOCOLS, UNLIKE), CHROME.but(PROTOCOLS, UNLIKE), hello(), hello(block=b""), HELLO,
    genuine(("h2", "http/1.1")), genuine(("http/1.1",), "TLSv1_2"),
    CHROME.but(0x1A1A, 0x1304), CHROME.but(*empty(0x4A4A), UNLIKE, *empty(0xDADA, 0x6002)),
    CHROME.but(*empty(SCT), UNLIKE), CHROME.but(PROTOCOLS, alpn(b"h2")), CHROME.but(PROTOCOLS, *empty(ALPN)),
    CHROME.but(PROTOCOLS, extension(ALPN, PROTOCOLS[4:-1])),
    FIREFOX.but(*empty(DELEGATED), UNLIKE), FIREFOX.but(*empty(RECORD_SIZE), UNLIKE),
    FIREFOX.but(*empty(STATUS_REQUEST), UNLIKE), FIREFOX.but(VERSIONS, UNLIKE),
], ids=["go", "a mail program with Firefox's TLS", "one with Chrome's", "the least", "no extensions", "python",
        "python with ALPN", "python with TLS 1.2", "no GREASE among its suites", "none among its extensions", "no SCT",
        "h2 only", "empty ALPN", "broken ALPN", "no delegated credentials", "no limit of records", "no status request",
        "TLS 1.2 only"])
def test_all_else_is_none(said):
    assert whole_hello(said), "it is a hello"
    assert not is_browser(body_of(said))


def test_grease_is_what_the_standard_says():
    """RFC 8701 section 2: both bytes are the same, and end in 0xA."""
    assert GREASE == {value for value in range(1 << 16) if value >> 8 == value & 0xFF and value & 0xF == 0xA}
    assert len(GREASE) == 16 and len(BROWSERS) == 2


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (4,), (5, 1, 1), (200,), (1,) * 400])
def test_a_hello_in_several_records_is_the_same_browser(sizes):
    message = CHROME.but()[5:]
    assert body_of(CHROME.but()) == body_of(CHROME.but() + b"more") == message[4:]
    assert body_of(records(message, *sizes)) == body_of(records(message, *sizes) + b"more") == message[4:]


PORT = "{port}"
PROGRAMS = {  # words of a program that asks the port over TLS, and its Debian package
    "curl": (["curl", "-sk", "--noproxy", "*", f"https://localhost:{PORT}/"], "curl"),
    "curl 1.1": (["curl", "-sk", "--http1.1", "--noproxy", "*", f"https://localhost:{PORT}/"], "curl"),
    "git": (["git", "-c", "http.proxy=", "ls-remote", f"https://localhost:{PORT}/x"], "git"),
    "wget": (["wget", "-qO-", "--tries=1", "--no-proxy", "--no-check-certificate", f"https://localhost:{PORT}/"],
             "wget"),
    "openssl": (["openssl", "s_client", "-connect", f"{HOST}:{PORT}", "-servername", NAME, "-alpn", "h2,http/1.1",
                 "-status"], "openssl"),
    "node": (["node", "-e", f"fetch('https://localhost:{PORT}/').catch(() => 0)"], "nodejs"),
    "node h2": (["node", "-e", f"require('http2').connect('https://localhost:{PORT}/').on('error', () => 0)"],
                "nodejs"),
    "java": (["keytool", "-printcert", "-sslserver", f"localhost:{PORT}"], "default-jre-headless"),
    "gnutls": (["gnutls-cli", "--insecure", "--alpn=http/1.1", "-p", PORT, "localhost"], "gnutls-bin"),
    "python": ([sys.executable, "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({}))"
                                      f".open('https://localhost:{PORT}/')"], "python3"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_real_program_is_no_browser(serve, program):
    words, package = PROGRAMS[program]
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not here (Debian package {package})")
    far = serve(said_by)
    execute(*(word.replace(PORT, str(far.address[1])) for word in words))
    said = far.result()
    assert whole_hello(said), "it has said a hello"
    assert not is_browser(body_of(said))


def said_by(sock: socket.socket) -> bytes:
    """A handler that reads a hello, and ends."""
    reader, data = HelloReader(), b""
    while more := sock.recv(65536):
        data += more
        if reader.read(data) is not None:
            break
    return data


def test_chromium_is_a_browser(serve, browser):
    far = serve(said_by)
    browser.visit(f"https://{OTHER}:{far.address[1]}/")
    said = far.result()
    assert HelloReader().read(said).name == OTHER and is_browser(body_of(said))


def chrome(name: str = OTHER) -> bytes:
    """Chromium's hello for another name, with a key that a server can use."""
    share = extension(51, vector(2, b"\0\x1d" + vector(2, bytes(31) + b"\x09")))
    return hello(*empty(0x4A4A), named(name.encode()), extension(10, vector(2, b"\0\x1d\0\x17")), PROTOCOLS,
                 extension(5, b"\1\0\0\0\0"), ALGORITHMS, *empty(18, 0xDADA), share, VERSIONS,
                 session=vector(1, bytes(32)), suites=suites(0x1A1A, 0x1301, 0x1302, 0x1303))


# -- what it is shown --------------------------------------------------------------------------


@pytest.fixture
def courteous(run) -> Callable[..., Running]:
    """courteous(*options): a router that has a page for browsers; by default it has a route for NAME alone."""
    def start(*options: str) -> Running:
        routed = any(option.startswith(("--route", "-c")) for option in options)
        return run("--error-pages=on", *options, *(() if routed else ("--route=db.example.com=tcp:192.0.2.1:1",)))
    return start


@pytest.fixture
def all_browsers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own TLS is a browser, too."""
    monkeypatch.setattr(sniroute_browsers, "is_browser", lambda body: True)


def trusting(*protocols: str, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """A client that takes any certificate, as a user does who goes on behind the warning."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = newest
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def ask(address: Address, request: bytes = ASK, name: str | None = OTHER, before: bytes = b"",
        context: ssl.SSLContext | None = None) -> bytes:
    """What a client is answered; `before` is said in front of its hello."""
    with connect(address, before) as sock, (context or trusting()).wrap_socket(sock, server_hostname=name) as client:
        client.sendall(request)
        return read_all(client)


def by_openssl(running: Running | Program, *options: str, name: str = OTHER, said: bytes = ASK) -> tuple[bytes, bytes]:
    """What s_client, looking as Firefox does, hears and says of that."""
    ended = execute(program_path("openssl", "openssl"), "s_client", "-connect", "{}:{}".format(*running.address),
                    "-servername", name, "-alpn", "h2,http/1.1", "-status", "-serverinfo", f"{DELEGATED},{RECORD_SIZE}",
                    "-ign_eof", *options, said=said)
    return ended.stdout, ended.stderr


def is_over(running: Running, kind: str, shown: int = 1, number: int = 1) -> Any:
    """Wait for the end of all; check what was counted.  Returns the last ending."""
    end = running.ending(number)
    router = running.router
    wait_until(lambda: not router.connections and not router.courtesy.served, what="the end of all")
    assert end.reason == kind and len(running.endings) == number
    assert running.counter(kind) == sum(each.reason == kind for each in running.endings)
    assert running.counter("error_pages") == shown
    assert not any(peer.count for peer in router.peers.known.values()) and not router.courtesy.waiting
    return end


def test_openssl_sees_the_page(courteous):
    running = courteous()
    heard, errors = by_openssl(running)
    assert b"ALPN protocol: http/1.1" in heard and b"subject=O = sniroute, CN = other.example.com" in heard
    page = heard[heard.index(b"HTTP/1.1 404 Not Found\r\n"):]
    assert b"\r\nContent-Type: text/html" in page and b"No route fits the name" in page and OTHER.encode() in page
    assert b"alert" not in errors
    end = is_over(running, "no_route")
    assert (end.name, end.up, end.down, end.detail) == (OTHER, 0, 0, f"no route for {OTHER}")


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("protocols, chosen", [
    (("h2", "http/1.1"), "http/1.1"), (("http/1.1",), "http/1.1"), ((), None)], ids=["h2 too", "http/1.1", "none"])
def test_the_page_is_http_1(courteous, all_browsers, newest, protocols, chosen):
    running = courteous()
    with (running.connect() as sock,
          trusting(*protocols, newest=newest).wrap_socket(sock, server_hostname=OTHER) as client):
        assert client.selected_alpn_protocol() == chosen
        client.sendall(ASK)
        assert read_all(client).startswith(b"HTTP/1.1 404 Not Found\r\n")
        client.unwrap()  # close_notify has come: it was not cut
    is_over(running, "no_route")


def test_the_certificate_is_for_the_name_and_signed_by_the_routers_root(courteous, all_browsers, tmp_path):
    running = courteous()
    ask(running.address)
    trusted = tmp_path / "root.pem"
    trusted.write_bytes(running.router.courtesy.leafs.authority.root.certificate_pem)
    context = ssl.create_default_context(cafile=str(trusted))
    assert ask(running.address, context=context).startswith(b"HTTP/1.1 404 ")
    assert len(running.router.courtesy.leafs.made) == 1, "the second client gets the same leaf"
    is_over(running, "no_route", 2, 2)


def test_a_client_that_does_not_trust_it_sees_no_page(courteous, all_browsers):
    running = courteous()
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(running.address, context=ssl.create_default_context())
    is_over(running, "no_route", 0)


@pytest.mark.parametrize("request_", [
    ASK, b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\n\r\nhello",
    b"HEAD / HTTP/1.1\r\nHost: a.example\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\1\2\3" * 10,
    b"GET / HTTP/1.1\r\nCookie: " + b"x" * 40000 + b"\r\n\r\n",
], ids=["GET", "POST", "HEAD", "HTTP/2", "no HTTP", "too large"])
def test_whatever_is_asked_the_answer_is_the_refusal(courteous, all_browsers, request_):
    running = courteous()
    said = ask(running.address, request_)
    assert said.startswith(b"HTTP/1.1 404 Not Found\r\n") and b"\r\nConnection: close\r\n" in said
    assert b"\r\nCache-Control: no-store\r\n" in said
    assert said.endswith(b"\r\n\r\n") == request_.startswith(b"HEAD")
    is_over(running, "no_route")


def test_a_backend_that_is_gone_is_told_by_a_page(courteous, all_browsers):
    with socket.socket() as nobody:
        nobody.bind((HOST, 0))  # and does not listen: nobody else gets the port
        gone = nobody.getsockname()
        running = courteous(route(gone, OTHER))
        said = ask(running.address)
        assert said.startswith(b"HTTP/1.1 502 Bad Gateway\r\n") and HOST.encode() not in said
        assert str(gone[1]) in is_over(running, "backend").detail


def test_a_tunnel_that_fails_is_told_by_a_page(courteous, cloudflared, ports, all_browsers):
    cloudflared.fault("*", refuse=True)
    running = courteous(TUNNEL, ports)
    with running.connect() as sock, trusting().wrap_socket(sock, server_hostname=OTHER) as client:
        assert not any(view.leases for view in running.tunnels.snapshot()), "the tunnel is not held for a page"
        client.sendall(ASK)
        assert read_all(client).startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
    assert is_over(running, "tunnel_failed").backend == f"cloudflared:{OTHER}"


@pytest.mark.parametrize("options, kind, status", [
    ('allow = ["192.0.2.0/24"]', "not_allowed", 403), ("max_connections = 1", "route_limit", 503)])
def test_what_a_route_forbids_is_told_by_a_page(courteous, echo_server, settings_file, all_browsers, options, kind,
                                                status):
    running = courteous("-c", settings_file(
        f'[routes."*.example.com"]\ntarget = "tcp:{HOST}:{echo_server.address[1]}"\n{options}\n'))
    with running.connect(HELLO) as first:
        if kind == "route_limit":
            assert read_exactly(first, len(HELLO)) == HELLO
        assert ask(running.address).startswith(b"HTTP/1.1 %d " % status)
    running.ending(2)
    assert kind in {end.reason for end in running.endings} and running.counter("error_pages") == 1


def test_a_browser_that_asks_for_an_address_is_told_to_ask_by_name(courteous, all_browsers):
    running = courteous()
    said = ask(running.address, ASK.replace(OTHER.encode(), HOST.encode()), name=None)
    assert said.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"Ask by name." in said
    assert [str(name) for name in running.router.courtesy.leafs.cache] == [HOST]
    is_over(running, "no_name")


def test_no_name_ok_is_answered_as_ever(courteous, all_browsers):
    running = courteous("--no-name=ok")
    with running.connect(genuine(name=None)) as client:
        assert read_all(client) == b"OK\n"
    is_over(running, "no_name", 0)


def test_behind_a_balancer_the_page_is_the_clients(courteous, all_browsers):
    running = courteous(f"--proxy-from={HOST}")
    assert ask(running.address, before=LINE).startswith(b"HTTP/1.1 404 ")
    assert is_over(running, "no_route").client == ("192.0.2.1", 1111)


def test_behind_a_balancer_an_address_is_the_balancers(courteous, all_browsers):
    running = courteous(f"--proxy-from={HOST}")
    assert ask(running.address, name=None, before=LINE).startswith(b"HTTP/1.1 400 ")
    assert [str(name) for name in running.router.courtesy.leafs.cache] == ["192.0.2.2"]
    is_over(running, "no_name")


def in_memory(address: Address, wrap: Callable[[bytes], bytes], request: bytes = ASK) -> bytes:
    """As `ask`, with a hello that `wrap` has changed on the wire."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting().wrap_bio(incoming, outgoing, server_hostname=OTHER)
    heard = b""
    with connect(address) as sock:
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        sock.sendall(wrap(outgoing.read()))

        def exchange(act: Callable[[], Any]) -> Any:
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    try:
                        return act()
                    finally:
                        if outgoing.pending:
                            sock.sendall(outgoing.read())
                data = sock.recv(65536)
                assert data, "it has ended"
                incoming.write(data)
        exchange(tls.do_handshake)
        exchange(lambda: tls.write(request))
        with contextlib.suppress(ssl.SSLError):  # close_notify is an error for SSLObject
            while data := exchange(lambda: tls.read(65536)):
                heard += data
    return heard


@pytest.mark.parametrize("sizes", [(1,), (100, 100), (1,) * 400], ids=["one byte first", "three", "one byte each"])
def test_a_hello_in_several_records_gets_the_page(courteous, all_browsers, sizes):
    running = courteous()
    assert in_memory(running.address, lambda said: records(said[5:], *sizes)).startswith(b"HTTP/1.1 404 ")
    is_over(running, "no_route")


# -- who is not --------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [genuine(("h2", "http/1.1"), name=OTHER), GO.but(SNI, named(OTHER.encode()))],
                         ids=["openssl", "go"])
def test_a_program_gets_the_alert_as_ever(courteous, said):
    running = courteous()
    with running.connect(said) as client:
        assert read_all(client) == UNKNOWN
    is_over(running, "no_route", 0)
    assert running.router.courtesy.leafs.authority is None and not running.router.courtesy.begun


def test_without_the_option_a_browser_gets_the_alert(run):
    running = run("--route=other.example.com=tcp:192.0.2.1:1")
    assert running.router.courtesy is None
    with running.connect(chrome("a.example.com")) as client:
        assert read_all(client) == UNKNOWN
    assert running.ending().reason == "no_route"


def test_behind_postgresqls_request_there_is_never_a_page(courteous):
    running = courteous(f"--route={OTHER}=tcp:192.0.2.1:1")
    with running.connect(ASK_TLS) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(chrome("a.example.com"))
        assert read_all(client) == UNKNOWN
    is_over(running, "no_route", 0)


@pytest.mark.parametrize("said, heard, kind", [
    (b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", b"", "not_tls"),
    (CHROME.but()[:-4] + b"\0\0\0\1", alert(47), "malformed"),
    (CHROME.but(SNI, named(b"-b.example.com")), UNKNOWN, "bad_name"),
    (CHROME.but(SNI, named(HOST.encode())), UNKNOWN, "bad_name"),
], ids=["HTTP", "broken", "a bad name", "an address as name"])
def test_what_names_nothing_gets_no_page(courteous, said, heard, kind):
    running = courteous()
    with running.connect(said) as client:
        assert read_all(client) == heard
    is_over(running, kind, 0)


def test_what_a_backend_has_had_cannot_be_answered(courteous, serve, all_browsers):
    """Bytes behind the hello went to a backend that then broke off: a handshake without them would fail."""
    more = b"\x17\3\3\0\5early"

    def breaks_off(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO) + len(more))
        reset(sock)

    far = serve(breaks_off)
    running = courteous("--route={}=tcp:{}:{},{}:{}".format(NAME, *far.address, *far.address))
    with running.connect(HELLO) as client:
        wait_until(lambda: [each for each in list(running.router.connections) if each.state == "unanswered"])
        client.sendall(more)
        assert read_all(client) == alert(80)
    is_over(running, "backend", 0)


def test_early_data_that_came_with_the_hello_is_no_hindrance(courteous, tmp_path, free_ports, certificate):
    """0-RTT: the client has a ticket of the server that is now gone, and sends its request at once."""
    openssl = program_path("openssl", "openssl")
    port, session, request = free_ports(1)[0], tmp_path / "session", tmp_path / "request"
    request.write_bytes(ASK)
    server = subprocess.Popen([openssl, "s_server", "-accept", str(port), "-cert", certificate.file, "-key",
                               certificate.key, "-early_data", "-quiet"], stdin=subprocess.PIPE,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: execute(openssl, "s_client", "-connect", f"{HOST}:{port}", "-sess_out", str(session),
                                   "-servername", OTHER, "-alpn", "http/1.1", said=b"x\n").returncode == 0
                   and session.exists(), what="a session")
    finally:
        server.stdin.close()
        server.kill()
        server.wait()
    running = courteous()
    heard, _ = by_openssl(running, "-sess_in", str(session), "-early_data", str(request))
    assert b"Early data was rejected" in heard and b"HTTP/1.1 404 Not Found\r\n" in heard
    is_over(running, "no_route")


# -- bounds ------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> float:
    """A visit may take so many seconds."""
    monkeypatch.setattr(sniroute_browsers, "VISIT_TIME", 1.5)  # time for a hello in answer, also where the host is busy
    monkeypatch.setattr(sniroute_browsers, "WAIT_TIME", 1.5)
    return 1.5


def test_a_hello_that_tls_refuses_gets_tlss_alert(courteous):
    """A layout that looks right, and has no keys in it."""
    running = courteous()
    with running.connect(CHROME.but(SNI, named(OTHER.encode()))) as client:
        assert read_all(client)[:1] == b"\x15"
    is_over(running, "no_route", 0)


@pytest.mark.parametrize("how", ["after its hello", "after the handshake", "in its request"])
def test_a_client_that_stalls_ends_in_time(courteous, all_browsers, hasty, how):
    running = courteous()
    began = time.monotonic()
    if how == "after its hello":
        with running.connect(chrome()) as client:
            assert read_all(client)[:1] == b"\x16", "the server's hello"
    else:
        with running.connect() as sock, trusting().wrap_socket(sock, server_hostname=OTHER) as client:
            client.sendall(ASK[:-2] if how == "in its request" else b"")
            with contextlib.suppress(ssl.SSLEOFError):
                assert read_all(client) == b""
    assert hasty <= time.monotonic() - began < 5
    is_over(running, "no_route", 0)


def test_a_client_that_leaves_is_let_go(courteous, all_browsers):
    running = courteous()
    running.connect(chrome()).close()
    with running.connect(chrome()) as client:
        client.recv(1)
        reset(client)
    is_over(running, "no_route", 0, 2)


def test_who_waits_too_long_for_a_thread_gets_the_alert(courteous, hasty, monkeypatch):
    monkeypatch.setattr(sniroute_browsers, "THREADS", 1)
    monkeypatch.setattr(sniroute_browsers, "WAIT_TIME", hasty / 2)
    running = courteous()
    with running.connect(chrome()) as slow, running.connect(chrome()) as next_:
        assert read_all(next_) == UNKNOWN
        assert read_all(slow)[:1] == b"\x16"
    is_over(running, "no_route", 0, 2)


@pytest.mark.parametrize("limit, served", [("WAITING", 5), ("VISITS", 2)])
def test_beyond_its_limits_there_is_the_alert_at_once(courteous, monkeypatch, limit, served):
    monkeypatch.setattr(sniroute_browsers, "THREADS", 4 if limit == "WAITING" else 1)
    monkeypatch.setattr(sniroute_browsers, limit, served - 4 if limit == "WAITING" else served)
    monkeypatch.setattr(sniroute_browsers, "monotonic", FakeClock())  # all come in one second
    running = courteous()
    with contextlib.ExitStack() as stack:
        first = []
        for number in range(served):
            first.append(stack.enter_context(running.connect(chrome())))
            wait_until(lambda: running.counter("accepted") == number + 1
                       and len(running.router.courtesy.served) + len(running.router.courtesy.waiting) == number + 1)
        for _ in range(3):
            with running.connect(chrome()) as client:
                assert read_all(client) == UNKNOWN
        assert sum(each.state is COURTESY for each in list(running.router.connections)) == served
    is_over(running, "no_route", 0, served + 3)


def test_a_thousand_browsers_at_once_get_an_answer_each(courteous, monkeypatch):
    """As many as there is room for are served; no thread more than allowed; nothing is left behind."""
    running = courteous("--max-connections=2000")
    running.part_early()
    threads, router = 0, running.router
    heard: list[bytes] = []
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(1000)]
        for client in clients:
            client.sendall(chrome())
        for client in clients:
            threads = max(threads, sum(each.name.startswith("courtesy-") for each in threading.enumerate()))
            assert len(router.courtesy.served) <= THREADS and len(router.courtesy.waiting) <= WAITING
            heard.append(client.recv(7))
            client.shutdown(socket.SHUT_WR)
    assert 1 <= threads <= 2 * THREADS, "one that has handed its visit back may not have ended yet"
    kinds = [said == UNKNOWN for said in heard]
    assert all(said == UNKNOWN or said[:1] == b"\x16" for said in heard)
    assert 1 <= kinds.count(False) <= 10 * VISITS and kinds.count(True) > 0
    is_over(running, "no_route", 0, 1000)
    assert not router.courtesy.waiting


def test_six_names_in_a_second_are_five_certificates_and_one_alert(courteous, all_browsers):
    running = courteous()
    running.router.courtesy.leafs = Leafs(FakeClock())
    for number in range(SIGNATURES):
        name = f"{number}.example.com"
        assert ask(running.address, name=name).startswith(b"HTTP/1.1 404 ")
    with running.connect(chrome("six.example.com")) as client:
        assert read_all(client) == UNKNOWN
    assert ask(running.address, name="0.example.com").startswith(b"HTTP/1.1 404 "), "a name that has one"
    is_over(running, "no_route", SIGNATURES + 1, SIGNATURES + 2)


@pytest.mark.parametrize("short", ["threads", "descriptors", "the certificate"])
def test_a_host_that_is_short_of_something_sends_the_alert(courteous, monkeypatch, short):
    running = courteous()

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def no_file(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        if short == "threads":
            patch.setattr(threading.Thread, "start", no_thread)
        elif short == "descriptors":
            patch.setattr(os, "dup", no_file)
        else:
            patch.setattr(sniroute_browsers, "load", no_file)
        with running.connect(chrome()) as client:
            assert read_all(client) == UNKNOWN
    is_over(running, "no_route", 0)


# -- the end -----------------------------------------------------------------------------------


def visited(running: Running) -> None:
    """Wait until one visit has a thread."""
    wait_until(lambda: running.router.courtesy.served, what="a visit")


def test_a_router_that_stops_leaves_no_thread(courteous):
    """`no_leaks` looks for threads and descriptors; they end now, and not five seconds later."""
    running = courteous()
    began = time.monotonic()
    with running.connect(chrome()) as client:
        visited(running)
        assert client.recv(1) == b"\x16"
        running.router.shutdown()
        running.thread.join()
        wait_until(lambda: not any(each.name.startswith("courtesy-") for each in threading.enumerate()))
        assert time.monotonic() - began < 4
        read_all(client)  # an end or a reset
    assert [end.reason for end in running.endings] == ["no_route"]
    assert not running.router.connections


def test_a_router_that_drains_waits_for_a_page(courteous, all_browsers):
    running = courteous()
    with running.connect() as sock, trusting().wrap_socket(sock, server_hostname=OTHER) as client:
        running.router.drain(30)
        assert running.router.deaf.wait(10)
        client.sendall(ASK)
        assert read_all(client).startswith(b"HTTP/1.1 404 ")
    running.thread.join(10)
    assert not running.thread.is_alive()
    is_over(running, "no_route")


def test_a_sweep_leaves_a_visit_alone(courteous, all_browsers):
    running = courteous("--connection-idle=8s")
    with running.connect() as sock, trusting().wrap_socket(sock, server_hostname=OTHER) as client:
        done = threading.Event()
        running.router.call(lambda: (running.router._sweep(), done.set()))
        assert done.wait(10)
        client.sendall(ASK)
        assert read_all(client).startswith(b"HTTP/1.1 404 ")
    is_over(running, "no_route")


def test_a_reload_begins_and_ends_it_and_lets_a_visit_finish(run, all_browsers):
    options = "--listen", f"{HOST}:0", "--route=db.example.com=tcp:192.0.2.1:1"
    off, on = (load_settings([*options, f"--error-pages={value}"], {}) for value in ("off", "on"))
    running = run(*options[2:])
    router = running.router

    def reload(settings: Settings) -> None:
        done = threading.Event()
        router.call(lambda: (router.adopt(settings), done.set()))
        assert done.wait(10)

    with running.connect(chrome()) as client:
        assert read_all(client) == UNKNOWN
    reload(on)
    courtesy = router.courtesy
    with running.connect() as sock, trusting().wrap_socket(sock, server_hostname=OTHER) as client:
        reload(on)
        assert router.courtesy is courtesy, "with the certificates that it has made"
        reload(off)
        client.sendall(ASK)
        assert read_all(client).startswith(b"HTTP/1.1 404 ")
    with running.connect(chrome()) as client:
        assert read_all(client) == UNKNOWN
    running.ending(3)
    wait_until(lambda: not router.connections and not courtesy.served)
    assert running.counter("error_pages") == 1


def test_a_fault_of_ours_ends_the_visit_and_no_more(courteous, all_browsers, monkeypatch, caplog):
    running = courteous()

    def fault(*_: Any) -> bytes:
        raise ZeroDivisionError("of a test")

    with monkeypatch.context() as patch:
        patch.setattr(sniroute_browsers, "refusal", fault)
        with contextlib.suppress(ssl.SSLEOFError):
            assert ask(running.address) == b""
        is_over(running, "no_route", 0)
    assert "a fault in sniroute" in caplog.text and "ZeroDivisionError" in caplog.text
    assert ask(running.address).startswith(b"HTTP/1.1 404 ")


def test_the_program_shows_pages_and_ends_in_the_middle_of_one(launch):
    program = launch(f"--route={NAME}=tcp:192.0.2.1:1", "--error-pages=on", "--drain=100ms")
    heard, _ = by_openssl(program)
    assert b"HTTP/1.1 404 Not Found\r\n" in heard
    program.wait_for(f"name={OTHER} ")
    with program.connect(chrome()) as client:
        assert client.recv(1) == b"\x16"
        began = time.monotonic()
        program.stop()
        assert time.monotonic() - began < 4, "it does not wait for who is slow"


def test_each_refusal_with_a_page_has_an_alert_for_the_others():
    assert PAGES < REFUSALS.keys()
    assert all(REFUSALS[kind].alert is not None for kind in PAGES)
    said = (HERE / "OPERATING.md").read_text().partition("- It gets a page for ")[2].partition("; never")[0]
    assert {*re.findall("`([a-z_]+[a-z])`", said)} == {kind for kind in PAGES if not kind.startswith("tunnel_")}
    assert "`tunnel_`" in said and {kind for kind in REFUSALS if kind.startswith("tunnel_")} < PAGES
    before = {kind for kind, row in REFUSALS.items() if row.alert is None} | {"client_limit", "shed"}
    assert not before & PAGES and {"no_route", "backend", "tunnel_failed"} < PAGES


# -- the real one ------------------------------------------------------------------------------


def test_chromium_shows_the_page(courteous, browser):
    running = courteous()
    shown = browser.visit(f"https://{OTHER}:{running.address[1]}/")
    assert "<title>404 Not Found</title>" in shown and "No route fits the name" in shown
    assert "Check the address for a typing error." in shown and OTHER in shown
    wait_until(lambda: running.counter("error_pages") >= 1, what="a page that is counted")  # behind the last byte of it
    running.ending()
    assert {end.reason for end in running.endings} == {"no_route"}


def colours(data: bytes) -> set[bytes]:
    """The colours of an 8-bit PNG without interlace, three bytes each.  Source: PNG, section 9."""
    at, packed = 8, b""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8:at + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour, *_, interlace = struct.unpack(">IIBBBBB", content)
            assert depth == 8 and colour in (2, 6) and not interlace
        elif kind == b"IDAT":
            packed += content
        at += 12 + size
    step = 3 if colour == 2 else 4
    rows, stride, found, before = zlib.decompress(packed), width * step + 1, set(), bytearray(width * step)
    for top in range(0, height * stride, stride):
        how, row = rows[top], bytearray(rows[top + 1:top + stride])
        for x in range(len(row) if how else 0):
            left, above = row[x - step] if x >= step else 0, before[x]
            if how == 4:
                corner = before[x - step] if x >= step else 0
                guess = left + above - corner
                row[x] = row[x] + min((left, above, corner), key=lambda value: abs(guess - value)) & 0xFF
            else:
                row[x] = row[x] + (0, left, above, (left + above) // 2)[how] & 0xFF
        found.update(zip(row[::step], row[1::step], row[2::step]))
        before = row
    return {bytes(colour) for colour in found}


def test_chromium_paints_the_page(courteous, browser):
    """As the style says: a light ground, a white card, and the colour of the line above it."""
    running = courteous()
    browser.call("Emulation.setDeviceMetricsOverride", width=600, height=400, deviceScaleFactor=1, mobile=False)
    browser.visit(f"https://{OTHER}:{running.address[1]}/")
    picture = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
    assert {bytes.fromhex(colour) for colour in ("f4f5f7", "ffffff", "2459c4")} <= colours(picture)
