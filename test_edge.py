"""Tests of sniroute_edge.py, in its order; the way there is the carrier's."""

from __future__ import annotations

import base64
import random
import re
import socket
import ssl
import struct
import subprocess
import threading
import time

import pytest

import sniroute_edge
import sniroute_names
from conftest import HOST, wait_until
from sniroute_dial import Failed
from sniroute_edge import REASONS, Upgrade
from sniroute_forwarder import Listener
from sniroute_loop import READ, WRITE, Loop
from sniroute_refusals import SettingsError
from sniroute_upgrade import Answer
from testbed.carrier import PHASES, echoed, receive_all, refused, wait_for_end, with_buffers

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # and its answer: RFC 6455 section 1.3
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


# -- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("text, target, shown", [
    pytest.param("app.example.com", ("app.example.com", 443, "/"), "app.example.com", id="host"),
    pytest.param("APP.Example.com", ("app.example.com", 443, "/"), "app.example.com", id="upper case"),
    pytest.param("app:8443", ("app", 8443, "/"), "app:8443", id="port"),
    pytest.param("https://app.example.com", ("app.example.com", 443, "/"), "app.example.com", id="URL"),
    pytest.param("http://app/x/y?a=1#z", ("app", 443, "/x/y?a=1"), "app", id="another scheme, path and query"),
    pytest.param("app?a=1", ("app", 443, "/?a=1"), "app", id="query without a path"),
    pytest.param("https://user:word@app:1/", ("app", 1, "/"), "app:1", id="userinfo is dropped"),
    pytest.param("127.0.0.1:9", ("127.0.0.1", 9, "/"), "127.0.0.1:9", id="IPv4"),
    pytest.param("[0:0::1]:9", ("::1", 9, "/"), "[::1]:9", id="IPv6"),
    pytest.param("[::1]", ("::1", 443, "/"), "::1", id="IPv6 without a port"),
    pytest.param("_a_b.example.com", ("_a_b.example.com", 443, "/"), "_a_b.example.com", id="underscores"),
    pytest.param("DB.example.com.", ("db.example.com", 443, "/"), "db.example.com", id="a trailing dot"),
    pytest.param("https://db.example.com.:9/x", ("db.example.com", 9, "/x"), "db.example.com:9",
                 id="a trailing dot in a URL"),
    pytest.param("[::ffff:192.0.2.1]:9", ("192.0.2.1", 9, "/"), "192.0.2.1:9", id="IPv4 in IPv6"),
    pytest.param("a" * 63 + ".com", ("a" * 63 + ".com", 443, "/"), "a" * 63 + ".com", id="the longest label"),
])
def test_parse_target(text, target, shown):
    parsed = sniroute_edge.parse_target(text)
    assert parsed == target and str(parsed) == shown


@pytest.mark.parametrize("text", [
    "", " ", "a b", "a\nb", "caf\udce9.example.com", "https://", "a..b", ".a", "a..", ".", "-a", "a-", "a/ b", "a:x", "a:0",
    "a:65536", "::1", "[::1", "[x]", "a" * 64, ".".join(["a" * 63] * 4), "a,b", "a%20b", "https:///x"])
def test_what_is_no_target(text):
    with pytest.raises(ValueError, match="is not a hostname, HOST:PORT, or a URL$"):
        sniroute_edge.parse_target(text)


def test_a_hostname_with_other_letters_is_told_its_form_for_dns():
    with pytest.raises(ValueError, match="; write xn--caf-dma.example.com, which is its form in DNS and TLS$"):
        sniroute_edge.parse_target("caf\u00e9.example.com")


def test_white_space_around_an_identity_goes():
    environ = dict.fromkeys(("TUNNEL_SERVICE_TOKEN_ID", "TUNNEL_SERVICE_TOKEN_SECRET", "CF_ACCESS_TOKEN"), "\ts3cret\r\n")
    assert {value for _, value in sniroute_edge.identity(environ, {"service_token_id": "s3cret\n"})} == {"s3cret"}
    assert sniroute_edge.identity(dict.fromkeys(environ, "\n"), {}) == []


def test_identity_takes_options_first_then_variables():
    environ = {"TUNNEL_SERVICE_TOKEN_ID": "id", "TUNNEL_SERVICE_TOKEN_SECRET": "secret", "CF_ACCESS_TOKEN": "jwt",
               "TUNNEL_SERVICE_DESTINATION": "db:5432"}
    everything = [("Cf-Access-Jump-Destination", "db:5432"), ("Cf-Access-Client-Id", "id"),
                  ("Cf-Access-Client-Secret", "secret"), ("Cf-Access-Token", "jwt")]
    assert sniroute_edge.identity(environ, {}) == everything
    assert sniroute_edge.identity({"TUNNEL_SERVICE_TOKEN_ID": ""}, {}) == []
    given = {"service_token_id": "other", "destination": None}
    assert sniroute_edge.identity(environ, given)[1] == ("Cf-Access-Client-Id", "other")


@pytest.mark.parametrize("environ, given, source", [
    pytest.param({"TUNNEL_SERVICE_TOKEN_SECRET": "s3cret\nX: y"}, {}, "TUNNEL_SERVICE_TOKEN_SECRET", id="variable"),
    pytest.param({}, {"service_token_secret": "s3cret\nX: y"}, "--service-token-secret", id="option"),
    pytest.param({"TUNNEL_SERVICE_TOKEN_ID": "id"}, {"service_token_id": "s3\ncret"}, "--service-token-id", id="both"),
    pytest.param({"CF_ACCESS_TOKEN": "s3cret\u00e9"}, {}, "CF_ACCESS_TOKEN", id="not ASCII"),
    pytest.param({"CF_ACCESS_TOKEN": "s3cret\x7f"}, {}, "CF_ACCESS_TOKEN", id="a control character"),
])
def test_an_identity_that_is_wrong_is_named_and_not_repeated(environ, given, source):
    with pytest.raises(SettingsError, match=f"^{source}: ") as caught:
        sniroute_edge.identity(environ, given)
    assert "s3" not in str(caught.value)


# -- the edge's answer -----------------------------------------------------------------------


@pytest.mark.parametrize("status, length, wanted", [
    pytest.param(200, "100", 0, id="no error"),
    pytest.param(404, "100", 0, id="the client's error"),
    pytest.param(530, "100", 100, id="a short page"),
    pytest.param(530, "1000000", 8192, id="a long page"),
    pytest.param(530, "9" * 60_000, 8192, id="more digits than int() takes"),
    pytest.param(530, "-1", 0, id="no length"),
    pytest.param(530, "\u00b2", 0, id="no digits"),
    pytest.param(530, None, 0, id="none said"),
])
def test_wants_body(status, length, wanted):
    headers = {} if length is None else {"content-length": length}
    assert sniroute_edge.wants_body(Answer(status, headers, 0)) == wanted


UPGRADED = {"upgrade": "websocket", "connection": "Upgrade", "sec-websocket-accept": ACCEPT}


@pytest.mark.parametrize("headers", [
    pytest.param({}, id="usual"),
    pytest.param({"upgrade": "WebSocket", "connection": "keep-alive, UPGRADE"}, id="case, and more words"),
    pytest.param({"sec-websocket-extensions": "", "sec-websocket-protocol": "p"}, id="no extension"),
])
def test_judge_lets_an_upgrade_through(headers):
    sniroute_edge.judge(Answer(101, {**UPGRADED, **headers}, 0), b"", KEY)


@pytest.mark.parametrize("status, headers, body, reason, detail", [
    pytest.param(101, {**UPGRADED, "upgrade": "h2c"}, b"", "other", "HTTP 101 that is no upgrade to websocket",
                 id="another upgrade"),
    pytest.param(101, {**UPGRADED, "connection": "upgraded"}, b"", "other", "HTTP 101 that is no upgrade to websocket",
                 id="another connection"),
    pytest.param(101, {}, b"", "other", "HTTP 101 that is no upgrade to websocket", id="no headers"),
    pytest.param(101, {**UPGRADED, "sec-websocket-accept": ACCEPT.lower()}, b"", "other",
                 "HTTP 101 with a wrong Sec-WebSocket-Accept", id="wrong accept"),
    pytest.param(101, {**UPGRADED, "sec-websocket-extensions": "x"}, b"", "other",
                 "HTTP 101 with an extension that was not asked for", id="an extension"),
    pytest.param(302, {"location": "https://t.example.com/cdn-cgi/access/login/app?kid=s3cret"}, b"", "login",
                 "HTTP 302", id="login"),
    pytest.param(302, {"location": "/cdn-cgi/access/login"}, b"", "login", "HTTP 302", id="login, relative"),
    pytest.param(301, {"location": "https://t.example.com/cdn-cgi/access/login"}, b"", "other",
                 "HTTP 301 to https://t.example.com/cdn-cgi/access/login: a web application?",
                 id="only 302 is a login"),
    pytest.param(302, {"location": "https://app.example.com/x?token=s3cret"}, b"", "other",
                 "HTTP 302 to https://app.example.com/x: a web application?", id="another redirect"),
    pytest.param(307, {}, b"", "other", "HTTP 307 to ://: a web application?", id="a redirect to nowhere"),
    pytest.param(302, {"location": "https://[x/"}, b"", "other", "HTTP 302 to what is no URL", id="no URL"),
    pytest.param(401, {}, b"", "denied", "HTTP 401", id="401"),
    pytest.param(403, {}, b"", "denied", "HTTP 403", id="403"),
    pytest.param(404, {}, b"", "not_found", "HTTP 404", id="404"),
    pytest.param(502, {}, b"Bad gateway", "origin", "HTTP 502", id="502"),
    pytest.param(530, {}, b"error code: 1033", "down", "HTTP 530, error 1033", id="530"),
    pytest.param(530, {}, b"<h1>Error\n1016</h1>", "down", "HTTP 530", id="an error across lines is none"),
    pytest.param(530, {}, b"<title>Error 1033</title>", "down", "HTTP 530, error 1033", id="530 as a page"),
    pytest.param(500, {}, b"", "other", "HTTP 500", id="500"),
    pytest.param(200, {}, b"", "other", "HTTP 200", id="200"),
    pytest.param(426, {}, b"", "other", "HTTP 426", id="426"),
])
def test_judge(status, headers, body, reason, detail):
    with pytest.raises(Failed) as caught:
        sniroute_edge.judge(Answer(status, headers, 0), body, KEY)
    assert (caught.value.reason, str(caught.value)) == (reason, detail)
    assert reason in REASONS and "s3cret" not in detail


def test_no_answer_but_an_upgrade_is_let_through_and_none_breaks_the_program():
    """An exception other than Failed would end every connection of the process."""
    chance = random.Random(2)
    for _ in range(3000):
        status = chance.choice((101, 200, 302, 404, 530))
        words = ("location", "upgrade", "connection", "sec-websocket-accept", "content-length")
        headers = {name: "".join(chance.choices("/:[]@?#%.a0\u00e9\x7f\t", k=chance.randrange(12))) for name in words}
        answer = Answer(status, headers, 0)
        sniroute_edge.wants_body(answer)
        with pytest.raises(Failed):
            sniroute_edge.judge(answer, chance.randbytes(20), KEY)


# -- why a client cannot be served -----------------------------------------------------------


@pytest.mark.parametrize("switches, reason, error", [
    pytest.param({"cert": "untrusted"}, "certificate", "unable to get local issuer certificate", id="untrusted"),
    pytest.param({"cert": "expired"}, "certificate", "certificate has expired", id="expired"),
    pytest.param({"cert": "wrong_name"}, "certificate", "Hostname mismatch.*", id="wrong name"),
    pytest.param({"rst": "accept"}, "reset", "in the TLS handshake|.*Connection reset by peer",
                 id="reset before the hello",  # where it falls into wrap_socket(), Python 3.11 forgets to close
                 marks=pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")),
    pytest.param({"rst": "tls"}, "reset", "in the TLS handshake", id="reset in the handshake"),
    pytest.param({"rst": "upgrade"}, "reset", "before its answer.*", id="reset in the upgrade"),
    pytest.param({"eof": "accept"}, "reset", "in the TLS handshake", id="end before the hello"),
    pytest.param({"eof": "tls"}, "reset", "in the TLS handshake", id="end in the handshake"),
    pytest.param({"eof": "upgrade"}, "reset", "before its answer", id="end in the upgrade"),
    pytest.param({"proxy_rst": True}, "reset", "the proxy: Connection reset by peer", id="the proxy resets"),
    pytest.param({"proxy_status": 407}, "proxy", "HTTP 407", id="proxy 407"),
    pytest.param({"proxy_status": 502}, "proxy", "HTTP 502", id="proxy 502"),
    pytest.param({"proxy_garbage": True}, "proxy", "it is no HTTP", id="proxy garbage"),
    pytest.param({"service_token": ["id", "other"]}, "login", "HTTP 302", id="login"),
    pytest.param({"deny": 401}, "denied", "HTTP 401", id="401"),
    pytest.param({"deny": 403}, "denied", "HTTP 403", id="403"),
    pytest.param({"status": 404}, "not_found", "HTTP 404", id="404"),
    pytest.param({"far": None}, "origin", "HTTP 502", id="502"),
    pytest.param({"status": 530, "body": "error code: 1033"}, "down", "HTTP 530, error 1033", id="530"),
    pytest.param({"status": 530, "body": "error code: 1033", "split_body": 50}, "down", "HTTP 530, error 1033",
                 id="530, its body later"),
    pytest.param({"status": 301, "location": "https://app.example.com/x?s3cret"}, "other",
                 "HTTP 301 to https://app.example.com/x: a web application\\?", id="301"),
    pytest.param({"status": 302, "location": "https://[x"}, "other", "HTTP 302 to what is no URL", id="302 to no URL"),
    pytest.param({"status": 500, "body": "x" * 20_000}, "other", "HTTP 500", id="500, a long page"),
    pytest.param({"status": 426}, "other", "HTTP 426", id="426"),
    pytest.param({"answer": "bad_accept"}, "other", "HTTP 101 with a wrong Sec-WebSocket-Accept", id="bad accept"),
    pytest.param({"answer": "no_upgrade"}, "other", "HTTP 101 that is no upgrade to websocket", id="no Upgrade"),
    pytest.param({"answer": "no_connection"}, "other", "HTTP 101 that is no upgrade to websocket", id="no Connection"),
    pytest.param({"answer": "extensions"}, "other", "HTTP 101 with an extension that was not asked for",
                 id="extensions"),
    pytest.param({"answer": "http10"}, "other", "HTTP/1.0, which has no 101", id="HTTP/1.0"),
    pytest.param({"answer": "garbage"}, "other", "it is no HTTP", id="garbage"),
    pytest.param({"answer": "huge"}, "other", "a head of more than 65536 bytes", id="a head without end"),
])
def test_failures_are_told_apart(edge, hostname, local, echo_server, switches, reason, error):
    if "far" not in switches:
        edge.far(hostname, echo_server.address)
    edge.fault(hostname, **switches)
    run = local(hostname, headers=[("Cf-Access-Client-Id", "id"), ("Cf-Access-Client-Secret", "s3cret")])
    row = refused(run)
    assert row["reason"] == reason and re.fullmatch(error, row["error"]), row
    assert row["message"] == f"{hostname}: {REASONS[reason]}" and row["level"] == "error"
    assert row["listener"] == sniroute_names.show_address(run.address) and row["client"].startswith(HOST)
    assert "s3cret" not in str(run.log.rows)


def test_a_failure_is_seen_also_by_a_client_that_has_spoken(edge, hostname, local):
    edge.fault(hostname, deny=403)
    run, said = local(hostname), threading.Event()
    run.carrier.loop.call(lambda: said.wait(10))  # its loop cannot fail before the client has spoken
    with run.connect() as client:
        client.sendall(b"hello")
        said.set()
        assert receive_all(client) == (b"", "RST")


def test_what_speaks_no_tls(local, serve):
    plain = serve(lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n") or sock.recv(4096))
    row = refused(local(f"localhost:{plain.address[1]}", proxy=False))
    assert row["reason"] == "tls" and re.fullmatch("[A-Z_]+", row["error"])


@pytest.mark.parametrize("switches, phase", PHASES)
def test_timeout(edge, hostname, local, switches, phase):
    edge.far(hostname, edge.proxy)
    edge.fault(hostname, **switches)
    run = local(hostname, DIAL_TIMEOUT=0.15)
    run.carrier.dialling.seconds = 60.0  # on a busy host it takes a while to come so far
    with run.connect() as client:
        run.reaches(phase)
        connection, = run.carrier.connections
        began, run.carrier.dialling.seconds = time.monotonic(), 0.15
        run.carrier.loop.call(lambda: run.carrier.dialling.put(connection))
        assert receive_all(client) == (b"", "RST")
    row = run.failure()
    assert (row["reason"], row["error"]) == ("timeout", f"0.15 s, {phase}") and time.monotonic() - began >= 0.15
    wait_until(lambda: edge.proxied(hostname))
    wait_until(lambda: edge.ends(hostname) or edge.lines("proxy.jsonl", hostname)[-1]["event"] == "end")


def test_timeout_of_an_error_page_tells_what_is_known(edge, hostname, local):
    """The status has come, and only the words behind it have not."""
    edge.fault(hostname, status=530, body="error code: 1033", split_body=20_000)
    run = local(hostname, DIAL_TIMEOUT=0.15)
    run.carrier.dialling.seconds = 60.0  # on a busy host it takes a while until the status has come
    with run.connect() as client:
        run.reaches("upgrade")
        connection, = run.carrier.connections
        wait_until(lambda: connection.dial.answer)
        run.carrier.dialling.seconds = 0.15
        run.carrier.loop.call(lambda: run.carrier.dialling.put(connection))
        assert receive_all(client) == (b"", "RST")
    row = run.failure()
    assert (row["reason"], row["error"]) == ("down", "HTTP 530")


def test_an_answer_with_an_error_page_that_breaks_off(local, raw_edge):
    """530, half a page, and a reset: the page is judged as it is."""
    def script(tls: ssl.SSLSocket) -> None:
        tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        time.sleep(0.05)  # so that the reset does not overtake it

    hostname = raw_edge(script, b"HTTP/1.1 530 x\r\nContent-Length: 1000\r\n\r\nerror code: 1033")
    row = refused(local(hostname, proxy=False))
    assert (row["reason"], row["error"]) == ("down", "HTTP 530, error 1033")


class Dripping(socket.socket):
    """An edge whose records have one byte each, and come without end."""

    reads = 0

    def recv(self, size: int) -> bytes:
        self.reads += 1
        return b"HTTP/1.1 101 "[self.reads - 1:self.reads] or b"x"


def test_a_head_that_drips_leaves_others_their_turn():
    loop, results = Loop(lambda owner: None), []
    listener = Listener(sniroute_edge.parse_target("app"))
    upgrade = Upgrade(loop, sniroute_edge.make_context(), [], listener, Dripping(socket.AF_UNIX), results.append)
    try:
        for turns in (1, 2):
            upgrade.on_upgrade(WRITE if turns == 1 else READ)
            assert upgrade.sock.reads == turns * sniroute_edge.READS and not results
    finally:
        upgrade.cancel()
        loop.close()
    assert not results


def test_a_long_request_waits_for_an_edge_that_reads_slowly(edge, local, serve, monkeypatch):
    with_buffers(monkeypatch, SO_SNDBUF=4096)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(edge.directory / "edge.pem")
    read, heads = threading.Event(), []

    def handler(sock: socket.socket) -> None:
        with context.wrap_socket(sock.dup(), server_side=True) as tls:
            read.wait(10)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += tls.recv(1 << 20)
            heads.append(head)
            tls.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            wait_for_end(tls)

    far = serve(handler)
    far.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    values = [(f"X-{number}", "x" * 10_000) for number in range(100)]
    run = local(f"localhost:{far.address[1]}", proxy=False, headers=values)
    with run.connect() as client:
        connection = wait_until(lambda: next(iter(run.carrier.connections.copy()), None))
        wait_until(lambda: run.states() == ["upgrade"] and connection.dial.out)
        read.set()
        assert receive_all(client) == (b"", "RST")
    assert run.failure()["reason"] == "denied"
    assert all(f"{name}: {value}".encode() in heads[0] for name, value in values)


# -- who the client is, and the way there ----------------------------------------------------


@pytest.mark.parametrize("words, environ, wanted", [
    pytest.param([], {"TUNNEL_SERVICE_TOKEN_ID": "s3cret-id", "TUNNEL_SERVICE_TOKEN_SECRET": "s3cret-word"},
                 {"service_token": ["s3cret-id", "s3cret-word"]}, id="variables"),
    pytest.param([], {"CF_ACCESS_TOKEN": "s3cret-jwt"}, {"token": "s3cret-jwt"}, id="a token"),
    pytest.param([], {"TUNNEL_SERVICE_TOKEN_ID": "s3cret-id\n", "TUNNEL_SERVICE_TOKEN_SECRET": " s3cret-word\r\n"},
                 {"service_token": ["s3cret-id", "s3cret-word"]}, id="white space around them"),
    pytest.param(["--id", "s3cret-id", "--secret", "s3cret-word"], {"TUNNEL_SERVICE_TOKEN_ID": "s3cret-other"},
                 {"service_token": ["s3cret-id", "s3cret-word"]}, id="options win"),
    pytest.param(["--service-token-id=s3cret-id", "--service-token-secret=s3cret-word", "--destination", "db:1"], {},
                 {"service_token": ["s3cret-id", "s3cret-word"]}, id="long options"),
    pytest.param(["-H", "CF-Access-Token: s3cret-jwt", "--header", "X: a,b"], {"TUNNEL_SERVICE_DESTINATION": "db:1"},
                 {"token": "s3cret-jwt"}, id="headers"),
])
def test_access_lets_us_through_and_no_secret_is_told(edge, hostname, carrier, echo_server, words, environ, wanted):
    edge.far(hostname, echo_server.address)
    edge.fault(hostname, **wanted)
    run = carrier(hostname, "--loglevel", "debug", *words, environ={**edge.environ, **environ})
    assert echoed(run) == b"hello"
    headers = dict(edge.requests(hostname)[0]["headers"])
    assert ("X" in headers) == ("-H" in words) and headers.get("X", "a,b") == "a,b"
    assert headers.get("Cf-Access-Jump-Destination") == ("db:1" if "db:1" in str((words, environ)) else None)
    edge.fault(hostname, service_token=["x", "y"])
    assert refused(run)["reason"] == "login"
    assert run.rows("open") and run.end() == 0
    assert b"s3cret" not in run.errors


@pytest.mark.parametrize("variable", ["TUNNEL_SERVICE_TOKEN_ID", "TUNNEL_SERVICE_TOKEN_SECRET"])
def test_half_of_a_service_token_is_said(edge, hostname, carrier, echo_server, variable):
    edge.far(hostname, echo_server.address)
    run = carrier(hostname, environ={**edge.environ, variable: "s3cret"})
    assert echoed(run) == b"hello"
    assert run.end() == 0
    assert b"the ID or the secret of the service token is not set" in run.errors and b"s3cret" not in run.errors


def test_a_hostname_with_a_trailing_dot_is_one_name(edge, hostname, carrier, echo_server):
    """TLS, the certificate and Host have it without the dot."""
    edge.far(hostname, echo_server.address)
    run = carrier(f"{hostname}.", environ=edge.environ)
    assert echoed(run) == b"hello"
    assert dict(edge.requests(hostname)[0]["headers"])["Host"] == hostname
    assert run.end() == 0


def test_a_proxy_with_credentials(edge, hostname, carrier, echo_server):
    edge.far(hostname, echo_server.address)
    url = edge.environ["HTTPS_PROXY"].replace("//", "//user:s3cret%40x@")
    run = carrier(hostname, "--loglevel", "debug", environ={**edge.environ, "HTTPS_PROXY": "", "https_proxy": url})
    assert echoed(run) == b"hello"
    row, = edge.proxied(hostname)
    assert row["target"] == f"{hostname}:443"
    assert row["headers"] == [["Host", f"{hostname}:443"],
                              ["Proxy-Authorization", "Basic " + base64.b64encode(b"user:s3cret@x").decode()]]
    edge.fault(hostname, proxy_status=407)
    assert refused(run)["reason"] == "proxy"
    assert run.end() == 0 and b"s3cret" not in run.errors and b"dXNlc" not in run.errors


def test_loopback_needs_no_proxy_and_the_port_is_said(edge, carrier, echo_server):
    edge.far("localhost", echo_server.address)
    run = carrier(f"https://localhost:{edge.port}/some/path?x=1")
    assert echoed(run) == b"hello"
    request, = edge.requests("localhost")
    assert (request["host"], request["sni"]) == (f"localhost:{edge.port}", "localhost")
    assert request["path"] == "/some/path?x=1"
    assert not edge.proxied("localhost")


def test_an_address_has_no_sni_and_its_certificate_is_checked(edge, local, echo_server):
    edge.far(HOST, echo_server.address)
    run = local(f"{HOST}:{edge.port}")
    assert echoed(run) == b"hello"
    request = edge.requests(HOST)[-1]
    assert (request["sni"], request["host"]) == (None, f"{HOST}:{edge.port}")


@pytest.mark.parametrize("newest", ["1.2", "1.3"])
def test_the_second_connection_resumes_tls(edge, hostname, local, echo_server, newest):
    edge.far(hostname, echo_server.address)
    edge.fault(hostname, tls_max=newest)
    run = local(hostname)
    for _ in range(3):
        assert echoed(run) == b"hello"
    assert [(row["tls"], row["session_reused"]) for row in edge.handshakes(hostname)] == [
        (f"TLSv{newest}", reused) for reused in (False, True, True)]
    assert [row.get("error") for row in run.rows("open")] == [None, "resumed", "resumed"]


def test_a_session_is_read_once_and_replaced_when_the_edge_has_forgotten_it(edge, hostname, local, monkeypatch,
                                                                            echo_server):
    """Reading one costs more than all else; one that is not taken up is no failure."""
    edge.far(hostname, echo_server.address)
    reads, session = [], ssl.SSLSocket.session
    monkeypatch.setattr(ssl.SSLSocket, "session", property(lambda tls: reads.append(tls) or session.fget(tls),
                                                           session.fset))
    run = local(hostname)
    listener, = run.carrier.listeners.values()
    kept = []
    for newest in ("1.3", "1.3", "1.3", "1.2", "1.2"):
        edge.fault(hostname, tls_max=newest)
        assert echoed(run) == b"hello"
        kept.append((listener.kept, len(reads)))
    first, last = kept[0][0], kept[-1][0]
    assert first.has_ticket and last.has_ticket and first != last
    assert kept == [(first, 1)] * 3 + [(last, 2)] * 2
    assert [row["session_reused"] for row in edge.handshakes(hostname)] == [False, True, True, False, True]


def test_no_tls_before_1_2_is_offered(local, serve):
    far = serve(lambda sock: sock.recv(4096))
    run = local(f"localhost:{far.address[1]}", proxy=False)
    assert refused(run)["reason"] == "reset"
    assert run.carrier.context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert b"\x00\x2b\x00\x05\x04\x03\x04\x03\x03" in far.result(), "supported_versions: 1.3, 1.2 (RFC 8446 4.2.1)"


def test_no_edge_can_begin_a_handshake_anew():
    """With TLS 1.2 a send would wait for its answer, and the loop spin meanwhile."""
    assert sniroute_edge.make_context().options & ssl.OP_NO_RENEGOTIATION


def test_certificates_in_a_directory(edge, hostname, carrier, certificates, tmp_path, echo_server):
    edge.far(hostname, echo_server.address)
    run = carrier(hostname, environ={"HTTPS_PROXY": edge.environ["HTTPS_PROXY"], "SSL_CERT_DIR": str(tmp_path)})
    assert refused(run)["reason"] == "certificate"
    number = subprocess.run(["openssl", "x509", "-hash", "-noout", "-in", certificates / "ca.pem"],
                            capture_output=True, text=True, timeout=20).stdout.strip()
    (tmp_path / f"{number}.0").symlink_to(certificates / "ca.pem")
    assert echoed(run) == b"hello"
