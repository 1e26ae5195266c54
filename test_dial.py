"""Tests of sniroute_dial.py, in its order: first what it promises by itself, then as the carrier uses it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute_dial
from conftest import HOST, echo, linux, wait_until
from sniroute_dial import Dial, Failed, Proxy, WayOut
from sniroute_edge import REASONS
from sniroute_loop import Loop, ignore
from sniroute_refusals import SettingsError
from testbed.carrier import Address, echoed, parallel, receive_all, refused, resolve_as


# -- the proxy -------------------------------------------------------------------------------


@pytest.mark.parametrize("text, proxy", [
    pytest.param("http://proxy:3128", Proxy("proxy", 3128, ""), id="URL"),
    pytest.param("proxy:3128", Proxy("proxy", 3128, ""), id="no scheme"),
    pytest.param("http://proxy/", Proxy("proxy", 80, ""), id="no port"),
    pytest.param("http://[::1]:1", Proxy("::1", 1, ""), id="IPv6"),
    pytest.param("http://u:p@proxy:1", Proxy("proxy", 1, "Basic dTpw"), id="credentials"),
    pytest.param("http://u@proxy:1", Proxy("proxy", 1, "Basic dTo="), id="no password"),
    pytest.param("http://u%40x:p%3Aq@proxy:1", Proxy("proxy", 1, "Basic dUB4OnA6cQ=="), id="quoted"),
    pytest.param("http://u:p@q@proxy:1", Proxy("proxy", 1, "Basic dTpwQHE="), id="an @ in the password"),
])
def test_parse_proxy(text, proxy):
    assert sniroute_dial.parse_proxy(text) == proxy


@pytest.mark.parametrize("text", [
    "https://u:s3cret@proxy:1", "socks5://u:s3cret@proxy", "http://", "http://u:s3cret@:1", "http://u:s3cret@proxy:x",
    "http://u:s3cret/x@proxy:1", "http://u:s3cret#x@proxy:1", "http://u:s3cret?x@p:1", "http://u:s3cret\u2100@proxy",
    "http://u:s3cret@caf\u00e9:1", "http://u:s3cret@[::1", "http://u:s3cret@proxy:65536"])
def test_what_is_no_proxy_is_not_repeated(text):
    with pytest.raises(ValueError) as caught:
        sniroute_dial.parse_proxy(text)
    assert "s3cret" not in str(caught.value)
    with pytest.raises(SettingsError, match="^HTTPS_PROXY: ") as wrong:
        sniroute_dial.find_proxy({"https_proxy": text})
    assert "s3cret" not in str(wrong.value)


def test_find_proxy_reads_both_cases_and_upper_wins():
    find = sniroute_dial.find_proxy
    one, two = Proxy("one", 1, ""), Proxy("two", 2, "")
    assert find({}) == (None, "")
    assert find({"HTTPS_PROXY": "one:1", "https_proxy": "two:2", "NO_PROXY": "a", "no_proxy": "b"}) == (one, "a")
    assert find({"HTTPS_PROXY": " one:1\n"}) == (one, "")
    assert find({"HTTPS_PROXY": "", "https_proxy": "two:2", "NO_PROXY": "", "no_proxy": "b"}) == (two, "b")
    assert find({"ALL_PROXY": "one:1", "HTTP_PROXY": "one:1"}) == (None, "")


@pytest.mark.parametrize("host, port, no_proxy, direct", [
    pytest.param("app.example.com", 443, "", False, id="nothing"),
    pytest.param("localhost", 443, "", True, id="localhost"),
    pytest.param("127.8.9.1", 443, "", True, id="loopback"),
    pytest.param("::1", 443, "", True, id="IPv6 loopback"),
    pytest.param("app.example.com", 443, "*", True, id="everything"),
    pytest.param("app.example.com", 443, "a, *", True, id="everything, in a list"),
    pytest.param("app.example.com", 443, "example.com", True, id="a subdomain"),
    pytest.param("example.com", 443, "example.com", True, id="the domain itself"),
    pytest.param("badexample.com", 443, "example.com", False, id="only looks like a subdomain"),
    pytest.param("example.com", 443, ".example.com", False, id="a leading dot: not itself"),
    pytest.param("a.example.com", 443, ".example.com", True, id="a leading dot: subdomains"),
    pytest.param("a.example.com", 443, "*.example.com", True, id="a star and a dot: subdomains"),
    pytest.param("example.com", 443, "*.example.com", False, id="a star and a dot: not itself"),
    pytest.param("example.com", 443, "*example.com", False, id="a star without a dot fits nothing"),
    pytest.param("APP.Example.com", 443, "EXAMPLE.COM", True, id="case"),
    pytest.param("app.example.com", 443, "example.com:443", True, id="its port"),
    pytest.param("app.example.com", 443, "example.com:8443", False, id="another port"),
    pytest.param("app.example.com", 443, ":443", False, id="a port without a host"),
    pytest.param("10.0.0.1", 443, "10.0.0.1", True, id="an address"),
    pytest.param("10.0.0.1", 443, "10.0.0.1:443", True, id="an address and its port"),
    pytest.param("10.0.0.1", 443, "10.0.0.1:80", False, id="an address and another port"),
    pytest.param("10.0.0.1", 443, "10.0.0.2", False, id="another address"),
    pytest.param("10.1.2.3", 443, "10.0.0.0/8", True, id="a network"),
    pytest.param("11.1.2.3", 443, "10.0.0.0/8", False, id="another network"),
    pytest.param("10.1.2.3", 443, "10.0.0.0/x", False, id="no network"),
    pytest.param("app.example.com", 443, "10.0.0.0/8", False, id="a name is in no network"),
    pytest.param("2001:db8::1", 443, "2001:db8::/32", True, id="an IPv6 network"),
    pytest.param("2001:db8::1", 443, "2001:db8::1", True, id="an IPv6 address"),
    pytest.param("2001:db8::1", 443, "2001:0DB8:0::1", True, id="an IPv6 address, written otherwise"),
    pytest.param("2001:db8::1", 443, "[2001:db8::1]", True, id="an IPv6 address in brackets"),
    pytest.param("2001:db8::1", 443, "[2001:db8::1]:443", True, id="an IPv6 address and its port"),
    pytest.param("2001:db8::1", 443, "[2001:db8::1]:80", False, id="an IPv6 address and another port"),
    pytest.param("app.example.com", 443, " a.com ,, example.com ", True, id="blanks and empty words"),
    pytest.param("app.example.com", 443, "example.com.", True, id="a word with a trailing dot"),
    pytest.param("app.example.com.", 443, ".example.com.:443", True, id="trailing dots, and a port"),
    pytest.param("app.example.com", 443, ".", False, id="a dot alone fits nothing"),
    pytest.param("10.1.2.3", 443, "::ffff:10.0.0.0/104", True, id="a network of IPv4 in IPv6"),
    pytest.param("::ffff:10.1.2.3", 443, "10.0.0.0/8", True, id="an address of IPv4 in IPv6"),
    pytest.param("10.1.2.3", 443, "::/0", False, id="all of IPv6 is not IPv4"),
])
def test_goes_direct(host, port, no_proxy, direct):
    assert sniroute_dial.goes_direct(host, port, no_proxy) is direct


# -- connections -----------------------------------------------------------------------------


@pytest.mark.parametrize("proxy, reason, text", [
    pytest.param(None, "timeout", "no answer", id="edge"),
    pytest.param(Proxy("proxy", 3128, "Basic s3cret"), "proxy", "proxy:3128: no answer", id="proxy"),
])
def test_a_connect_that_the_kernel_gives_up_is_a_timeout(proxy, reason, text):
    failure = sniroute_dial.connect_failure(OSError(errno.ETIMEDOUT, "no answer"), proxy)
    assert (failure.reason, str(failure)) == (reason, text)


class Dials:
    """A loop that this thread turns, its way out, and what the dials on it have told."""

    def __init__(self, proxy: Proxy | None = None, no_proxy: str = ""):
        self.faults: list[Any] = []
        self.loop = Loop(self.faults.append)
        self.tick = self.loop.timer(lambda: None)
        self.way = WayOut(self.loop, proxy, no_proxy)
        self.results: list[socket.socket | Failed] = []

    def dial(self, host: str, port: int) -> Dial:
        """Begin one."""
        dial = Dial(self.way, host, port, self.results.append)
        dial.start()
        return dial

    def turn(self) -> None:
        """Turn once, within a moment."""
        self.tick.set(time.monotonic() + 0.02)
        self.loop.turn()

    def turn_until(self, predicate: Callable[[], Any]) -> None:
        wait_until(lambda: predicate() or self.turn())

    def result(self) -> socket.socket | Failed:
        """What the one dial tells; nothing more comes after it."""
        self.turn_until(lambda: self.results)
        for _ in range(3):
            self.turn()
        result, = self.results
        return result

    def close(self) -> None:
        for result in self.results:
            if isinstance(result, socket.socket):
                result.close()
        assert not self.faults and not any(queue.due for queue in self.loop.queues)
        assert {fd for fd, act in self.loop.poller.callbacks.items() if act is not ignore} == {self.loop.pipe.reader}
        self.loop.close()


@pytest.fixture
def dials() -> Iterator[Callable[..., Dials]]:
    """dials(proxy=None, no_proxy="") -> Dials."""
    with contextlib.ExitStack() as stack:
        def make(*words: Any, **options: Any) -> Dials:
            made = Dials(*words, **options)
            stack.callback(made.close)
            return made

        yield make


def failure(dials: Dials) -> tuple[str, str]:
    result = dials.result()
    assert isinstance(result, Failed)
    return result.reason, str(result)


def test_a_dial_hands_over_a_socket_and_forgets_it(dials, echo_server):
    made = dials()
    dial = made.dial("localhost", echo_server.address[1])
    phases = [dial.phase]
    made.turn_until(lambda: phases.append(dial.phase) or made.results)
    sock = made.result()
    assert list(dict.fromkeys(phases)) == ["resolving the name", "connecting", "over"]
    assert not sock.getblocking() and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    dial.cancel()  # is too late: the socket is ours
    sock.settimeout(10)
    sock.sendall(b"hello")
    assert sock.recv(9) == b"hello"


def test_all_addresses_are_refused(dials, monkeypatch, free_ports):
    port, _ = free_ports(3)
    asked = resolve_as(monkeypatch, lambda: [(HOST, port), (HOST, port + 1), (HOST, port + 2)])
    made = dials()
    dial = made.dial("app.example.test", 443)
    assert failure(made) == ("refused", "Connection refused")
    assert (asked, dial.phase, dial.attempts, dial.todo) == (["app.example.test"], "over", {}, [])


@linux
def test_a_refusal_brings_the_next_address_at_once(dials, monkeypatch, free_ports, echo_server):
    monkeypatch.setattr(sniroute_dial, "STAGGER", 60.0)
    resolve_as(monkeypatch, lambda: [(HOST, free_ports(1)[0]), echo_server.address])
    made = dials()
    made.dial("app.example.test", 443)
    assert made.result().getpeername() == echo_server.address


@linux
def test_silence_brings_the_next_address_after_a_while_and_the_first_answer_wins(dials, monkeypatch, deaf, echo_server):
    monkeypatch.setattr(sniroute_dial, "STAGGER", 0.1)
    resolve_as(monkeypatch, lambda: [deaf, echo_server.address])
    made = dials()
    dial = made.dial("app.example.test", 443)
    began: list[float] = []  # before each turn: the last one is the one in which it connects
    made.turn_until(lambda: dial.attempts or began.append(time.monotonic()))
    first, = dial.attempts
    assert made.result().getpeername() == echo_server.address
    assert time.monotonic() - began[-1] >= 0.1 and first.fileno() == -1, "the others are closed"


@linux
@pytest.mark.parametrize("proxied", [False, True], ids=["edge", "proxy"])
@pytest.mark.parametrize("first", ["silent", "refuses"])
def test_an_address_that_took_no_connect_is_tried_last_from_then_on(dials, monkeypatch, deaf, free_ports, serve,
                                                                    proxied, first):
    """Also once the name is resolved again, and for a proxy's addresses."""
    def proxy(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        receive_all(sock)

    good = serve(proxy if proxied else echo).address
    addresses = [deaf if first == "silent" else (HOST, free_ports(1)[0]), good]
    asked = resolve_as(monkeypatch, lambda: addresses)
    made = dials(Proxy("proxy.example.test", 3128, "") if proxied else None)
    made.way.staggered.seconds = 0.01
    for number in range(3):
        made.dial("app.example.test", 443)
        made.turn_until(lambda: made.results)
        with made.results.pop() as sock:
            assert sock.getpeername() == good
        made.way.staggered.seconds = 1000.0  # from here on the first has to be the good one
        addresses.reverse()
        if number == 1:
            made.way.names.known.clear()
    assert len(asked) == 2


@linux
def test_a_refusal_beside_a_silence_waits_for_the_silent_one(dials, monkeypatch, deaf, free_ports):
    monkeypatch.setattr(sniroute_dial, "STAGGER", 0.01)
    resolve_as(monkeypatch, lambda: [deaf, (HOST, free_ports(1)[0])])
    made = dials()
    dial = made.dial("app.example.test", 443)
    made.turn_until(lambda: dial.error is not None and dial.error.errno == errno.ECONNREFUSED)
    made.turn()
    assert dial.phase == "connecting" and len(dial.attempts) == 1 and not made.results
    dial.cancel()


@linux
@pytest.mark.parametrize("phase", ["resolving the name", "connecting", "asking the proxy"])
def test_a_cancelled_dial_closes_everything_and_tells_nothing(dials, monkeypatch, serve, deaf, phase):
    release, hung_up = threading.Event(), threading.Event()
    proxy = serve(lambda sock: receive_all(sock) and hung_up.set())
    place = proxy.address if phase == "asking the proxy" else deaf
    resolve_as(monkeypatch, lambda: [place] if phase != "resolving the name" or release.wait(10) else [])
    made = dials(Proxy("proxy.example.test", 3128, ""))
    dial = made.dial("app.example.test", 443)
    made.turn_until(lambda: dial.phase == phase and (phase == "resolving the name" or dial.attempts))
    attempts = dial.attempts.copy()
    dial.cancel()
    dial.cancel()
    release.set()
    made.turn_until(lambda: not made.way.names.waiting)
    assert dial.phase == "over" and not made.results and all(sock.fileno() == -1 for sock in attempts)
    assert phase != "asking the proxy" or hung_up.wait(10)


def test_a_cancelled_dial_leaves_others_that_wait_for_the_same_name(dials, monkeypatch, echo_server):
    release = threading.Event()
    asked = resolve_as(monkeypatch, lambda: [echo_server.address] if release.wait(10) else [])
    made = dials()
    first, second = made.dial("app.example.test", 443), made.dial("app.example.test", 443)
    first.cancel()
    release.set()
    assert made.result().getpeername() == echo_server.address
    assert (first.phase, second.phase, asked) == ("over", "over", ["app.example.test"])


def test_a_proxy_is_asked_and_the_socket_leads_through_it(dials, serve):
    def proxy(sock: socket.socket) -> bytes:
        request = b""
        while b"\r\n\r\n" not in request:
            request += sock.recv(4096)
        for byte in b"HTTP/1.1 200 Connection established\r\n\r\n":
            sock.sendall(bytes([byte]))
        echo(sock)
        return request

    far = serve(proxy)
    made = dials(Proxy(*far.address, "Basic dTpw"))
    dial = made.dial("nothing.invalid", 5432)  # only the proxy resolves it
    made.turn_until(lambda: dial.phase == "asking the proxy")
    sock = made.result()
    sock.settimeout(10)
    sock.sendall(b"hello")
    assert sock.recv(9) == b"hello"
    sock.close()
    assert far.result() == (b"CONNECT nothing.invalid:5432 HTTP/1.1\r\nHost: nothing.invalid:5432\r\n"
                            b"Proxy-Authorization: Basic dTpw\r\n\r\n")


@pytest.mark.parametrize("answer, reason, error", [
    pytest.param(b"HTTP/1.1 407 Who?\r\n\r\n", "proxy", "HTTP 407", id="no"),
    pytest.param(b"SSH-2.0-x\r\n", "proxy", "it is no HTTP", id="something else"),
    pytest.param(b"HTTP/1.1 200 OK\r\n\r\nx", "proxy", "it said more than its answer", id="more"),
    pytest.param(b"HTTP/1.1 200 OK\r\n", "reset", "the proxy closed the connection", id="less"),
])
def test_a_proxy_that_does_not_connect(dials, serve, answer, reason, error):
    def proxy(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(answer)
        sock.shutdown(socket.SHUT_WR)
        receive_all(sock)

    made = dials(Proxy(*serve(proxy).address, ""))
    made.dial("app.example.test", 443)
    assert failure(made) == (reason, error)


def test_no_proxy_means_straight(dials, echo_server):
    made = dials(Proxy("proxy.invalid", 1, ""), "192.0.2.1")
    assert made.way.proxy_for("192.0.2.2", 443) and not made.way.proxy_for("192.0.2.1", 443)
    made.dial(*echo_server.address)
    assert made.result().getpeername() == echo_server.address


def test_a_dial_without_a_descriptor_waits_for_one(dials, monkeypatch, echo_server):
    monkeypatch.setattr(sniroute_dial, "SHORT_OF_FDS", 0.01)
    made = dials()
    dial = made.dial(*echo_server.address)
    real, left = socket.socket, [errno.EMFILE, errno.ENFILE]

    def scarce(*words: Any, **options: Any) -> socket.socket:
        if left:
            code = left.pop()
            raise OSError(code, os.strerror(code))
        return real(*words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", scarce)
        made.turn_until(lambda: dial.attempts)
    assert not left and made.result().getpeername() == echo_server.address


def test_a_fault_when_a_name_is_resolved_is_told_of_each_dial(dials, monkeypatch):
    def fail() -> list[Address]:
        raise socket.gaierror(socket.EAI_NONAME, "why not")

    resolve_as(monkeypatch, fail)
    monkeypatch.setattr(sniroute_dial, "name_failure", lambda *_: 1 // 0)
    made = dials()
    both = [made.dial("app.example.test", 443), made.dial("app.example.test", 443)]
    made.turn_until(lambda: len(made.faults) == 2)
    assert made.faults == both and not made.results
    made.faults.clear()


def test_no_socket_is_opened_in_the_first_phase_of_a_turn(dials, echo_server):
    """There its number could be that of an event which is still to come: it would count as the answer."""
    made = dials()
    made.way.names.known[echo_server.address] = [(socket.AF_INET, echo_server.address)], time.monotonic() + 60
    opened: list[dict[socket.socket, Any]] = []
    made.loop.call(lambda: opened.append(made.dial(*echo_server.address).attempts.copy()))
    made.result()
    assert opened == [{}]


# -- as the carrier uses it ------------------------------------------------------------------


def test_a_name_that_does_not_resolve(local):
    row = refused(local("nothing.invalid", proxy=False))
    assert row["reason"] in ("name", "resolver") and row["error"], "the second where nobody is there to be asked"


@pytest.mark.parametrize("code, reason", [(socket.EAI_NONAME, "name"), (socket.EAI_AGAIN, "resolver")])
@pytest.mark.parametrize("proxied", [False, True], ids=["edge", "proxy"])
def test_a_name_that_is_not_there_and_a_resolver_that_is_not(local, monkeypatch, code, reason, proxied):
    def fail() -> list[Address]:
        raise socket.gaierror(code, "why not")

    asked = resolve_as(monkeypatch, fail)
    run = local("app.example.test", proxy=("proxy.example.test", 3128) if proxied else False)
    row = refused(run)
    if proxied:
        reason, error = "proxy", "proxy.example.test:3128: why not"
        assert asked == ["proxy.example.test"]
    else:
        error = "why not"
        assert asked == ["app.example.test"]
    assert (row["reason"], row["error"]) == (reason, error)
    assert row["message"] == f"app.example.test: {REASONS[reason]}"
    with contextlib.suppress(ConnectionResetError), run.connect() as client:  # a failure is not remembered
        assert receive_all(client) == (b"", "RST")
    wait_until(lambda: len(asked) == 2)


def test_what_is_no_name_for_the_resolver(local, monkeypatch):
    """getaddrinfo() raises UnicodeError for some; the program goes on."""
    resolve = socket.getaddrinfo

    def strange(host: str, *rest: Any, **options: Any) -> Any:
        if host == "strange.example.test":
            raise UnicodeError("label too long")
        return resolve(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", strange)
    assert refused(local("strange.example.test", proxy=False))["error"] == "it is no name"


def test_a_thread_too_few_is_no_end(local, monkeypatch):
    run = local("nothing.invalid", proxy=False)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert refused(run)["error"] == "can't start new thread"


@pytest.mark.parametrize("proxied", [False, True], ids=["edge", "proxy"])
def test_refused(local, free_ports, proxied):
    port, _ = free_ports(1)
    run = local("app.example.test", proxy=(HOST, port)) if proxied else local(f"localhost:{port}", proxy=False)
    row = refused(run)
    assert (row["reason"], row["error"]) == (("proxy", f"{HOST}:{port}: Connection refused") if proxied else
                                             ("refused", "Connection refused"))


@pytest.mark.parametrize("answer, reason, error", [
    pytest.param(b"HTTP/1.1 200 OK\r\n\r\nx", "proxy", "it said more than its answer", id="more"),
    pytest.param(b"HTTP/1.1 200 OK\r\n", "reset", "the proxy closed the connection", id="less"),
    pytest.param(b"", "reset", "the proxy closed the connection", id="nothing"),
])
def test_answers_that_no_proxy_may_give(local, serve, answer, reason, error):
    def proxy(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(answer)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(4096)

    row = refused(local("app.example.test", proxy=serve(proxy).address))
    assert (row["reason"], row["error"]) == (reason, error)


@linux
def test_timeout_of_the_connect(local, deaf):
    run = local(f"localhost:{deaf[1]}", proxy=False, DIAL_TIMEOUT=0.15)
    run.carrier.way.names.known["localhost", deaf[1]] = [(socket.AF_INET, deaf)], time.monotonic() + 60  # at once
    row = refused(run)
    assert (row["reason"], row["error"]) == ("timeout", "0.15 s, connecting")


def test_timeout_of_the_name(local, monkeypatch):
    release = threading.Event()
    resolve_as(monkeypatch, lambda: [] if release.wait(10) else [])
    run = local("app.example.test", proxy=False, DIAL_TIMEOUT=0.15)
    row = refused(run)
    release.set()
    assert (row["reason"], row["error"]) == ("timeout", "0.15 s, resolving the name")
    wait_until(lambda: not run.carrier.way.names.waiting)


def test_no_proxy(edge, hostname, local, monkeypatch, echo_server):
    edge.far(hostname, echo_server.address)
    resolve_as(monkeypatch, lambda: [(HOST, edge.port)])
    assert echoed(local(hostname, no_proxy="example.test")) == b"hello"
    assert not edge.proxied(hostname) and edge.requests(hostname)[0]["sni"] == hostname


def test_a_name_is_resolved_once_for_many_and_forgotten_in_time(edge, hostname, local, monkeypatch, echo_server):
    edge.far(hostname, echo_server.address)
    asked = resolve_as(monkeypatch, lambda: [(HOST, edge.port)])
    run = local(hostname, proxy=False, RESOLVED_FOR=1000.0)
    payloads = [b"hello"] * 10
    assert parallel(run.address, payloads) == payloads and asked == [hostname]
    monkeypatch.setattr(sniroute_dial, "RESOLVED_FOR", 0.0)
    run.carrier.loop.call(run.carrier.way.names.known.clear)
    assert echoed(run) == echoed(run) == b"hello" and asked == [hostname] * 3


@linux
def test_an_address_that_does_not_answer_does_not_hold_up_the_next(edge, hostname, local, monkeypatch, echo_server,
                                                                   deaf):
    edge.far(hostname, echo_server.address)
    resolve_as(monkeypatch, lambda: [deaf, ("::1", 1, 0, 0), (HOST, edge.port)])
    run = local(hostname, proxy=False, STAGGER=0.05)
    assert echoed(run) == b"hello"
    run.reaches()
    assert len(edge.handshakes(hostname)) == 1 and not run.rows("failed")


def test_all_addresses_are_tried_and_the_last_failure_is_told(hostname, local, monkeypatch, free_ports):
    port, _ = free_ports(2)
    resolve_as(monkeypatch, lambda: [(HOST, port), (HOST, port + 1)])
    row = refused(local(hostname, proxy=False))
    assert (row["reason"], row["error"]) == ("refused", "Connection refused")


def test_no_address_at_all(hostname, local, monkeypatch):
    resolve_as(monkeypatch, lambda: [])
    assert refused(local(hostname, proxy=False))["reason"] == "refused"


def test_an_address_that_the_kernel_refuses_at_once(edge, hostname, local, monkeypatch, echo_server):
    """A broadcast address is refused in connect() itself; a family that is not here, in socket()."""
    edge.far(hostname, echo_server.address)
    resolve = socket.getaddrinfo
    rows = [(0xFFFF, socket.SOCK_STREAM, 6, "", ("::1", 1, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("255.255.255.255", 1)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOST, edge.port))]
    monkeypatch.setattr(socket, "getaddrinfo",
                        lambda host, *rest, **options: rows if host == hostname else resolve(host, *rest, **options))
    run = local(hostname, proxy=False)
    assert echoed(run) == b"hello"
    del rows[2]
    run.carrier.loop.call(run.carrier.way.names.known.clear)
    assert refused(run)["reason"] == "refused"


@linux
def test_a_client_that_leaves_while_we_connect_or_resolve(local, monkeypatch, deaf):
    release = threading.Event()
    resolve_as(monkeypatch, lambda: [deaf] if release.wait(10) else [])
    run = local("app.example.test", proxy=False)
    for phase in ("resolving the name", "connecting"):
        with run.connect():
            run.reaches(phase)
        run.reaches()
        release.set()
        wait_until(lambda: not run.carrier.way.names.waiting)
    assert not run.rows("failed")
