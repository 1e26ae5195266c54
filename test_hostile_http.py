"""Plain HTTP with hostile clients and hostile backends: each fault that an attack has found.

What the two sides do here is a race as a rule.  `held` makes it a certainty: it stops the router's loop while both act.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import sys
import threading
import time
import tracemalloc
from typing import Any, Callable, Iterator

import pytest

import sniroute_settings
from conftest import HOST, wait_until
from sniroute_gateway import Policy, choose_upgrade, hop
from sniroute_http import Chunked, parse_request, parse_response, pass_request, pass_response
from sniroute_loop import unsent
from sniroute_tls import TlsClients
from testbed.running import Running, reset, route
from testbed.web import (UPGRADE, WEB, Talk, answering, call, check_refusal, chunks, reply, request, shake, table,
                         telling)

FORWARD = "--http=forward"


@contextlib.contextmanager
def held(running: Running) -> Iterator[None]:
    """The router's loop stands still in here; what happens meanwhile it finds in one turn."""
    stands, goes = threading.Event(), threading.Event()
    running.router.call(lambda: (stands.set(), goes.wait(10)))
    assert stands.wait(10)
    try:
        yield
    finally:
        goes.set()


def settle() -> None:
    """Until what was sent by loopback is there: the kernel delivers it within the call, but for what it has queued."""
    time.sleep(0.02)


# -- what a slow client has not taken ----------------------------------------------------------


def test_answers_with_1xx_come_through_in_order_though_the_client_is_slow(web):
    """Several of them are in one piece, and the client's side is full in the middle of it."""
    size = 20_000
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: <%d-%d>" + b"; x" * 100 + b"\r\n\r\n"

    def script(talk: Talk) -> None:
        for number in itertools.count():
            if not talk.request():
                return
            talk.say(b"".join(hint % (number, part) for part in range(size // 350)) + reply(b"%d" % number))

    served = web(script)
    with contextlib.closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect(served.address)
        client = Talk(sock)
        count = 500  # 10 MB: more than all sockets between them hold
        client.say(request() * count)
        wait_until(lambda: served.running.router.pipes.pending, what="a client's side that is full")
        for number in range(count):
            answer = client.answer()
            links = [each.get("Link").partition(";")[0] for each in answer.interim]
            assert links == [f"<{number}-{part}>" for part in range(size // 350)]
            assert answer.body == b"%d" % number
    wait_until(lambda: not served.running.router.connections)
    assert served.running.router.pipes.pending == 0


# -- bytes of one request, and of another ------------------------------------------------------


def test_a_body_that_comes_while_its_backend_is_dialled_is_its_body(run, origin):
    """The request waited behind another one, and leads to another backend."""
    goes, answered = threading.Event(), threading.Event()

    def first(talk: Talk) -> None:
        talk.request()
        goes.wait(10)
        talk.say(reply(b"first"))
        answered.set()

    one, two = origin(first), origin(telling)
    running = run(FORWARD, route(one.address, "a.example.com"), route(two.address, "b.example.com"))
    with call(running.address, request(host="a.example.com")
              + request("POST", "/", "Content-Length: 35", host="b.example.com")) as client:
        one.wait_heard(b"\r\n\r\n")
        settle()
        with held(running):
            goes.set()
            assert answered.wait(10)
            client.say(b"GET /evil HTTP/1.1\r\nHost: b.example")
            settle()
        assert client.answer().body == b"first"
        assert client.answer().body.endswith(b"\r\n\r\nGET /evil HTTP/1.1\r\nHost: b.example")
        client.say(request("GET", "/next", host="b.example.com"))
        assert client.answer().body.startswith(b"GET /next ")
    assert len(two.talks) == 1


@pytest.mark.parametrize("is_clients", [False, True])
def test_a_body_that_comes_while_a_kept_connection_has_just_died_goes_to_the_new_one(web, is_clients):
    """And to nobody else: the number of the dead connection's descriptor may be a stranger's by then."""
    def script(talk: Talk) -> None:
        number = len(served.origin.talks)
        if number > 1:
            return telling(talk)
        talk.request()
        talk.say(reply(b"first"))
        talk.head()
        told.set()
        goes.wait(10)
        talk.sock.close()
        gone.set()

    told, goes, gone = (threading.Event() for _ in range(3))
    served = web(script)
    client = served.connect(request())
    assert client.answer().body == b"first"
    client.say(request("PUT", "/", "Content-Length: 10"))
    assert told.wait(10)
    settle()
    stranger = None
    with held(served.running):
        goes.set()
        assert gone.wait(10)
        if is_clients:
            stranger = served.connect()
            settle()
        client.say(b"0123456789")
        settle()
    assert client.answer().body.endswith(b"\r\n\r\n0123456789")
    if stranger:
        stranger.say(request("GET", "/stranger"))
        assert stranger.answer().body.startswith(b"GET /stranger ")
        assert b"0123456789" not in stranger.heard


# -- connections that serve another client -----------------------------------------------------


@pytest.mark.parametrize("last", [(), ("Connection: close",)], ids=["keeps", "close"])
@pytest.mark.parametrize("behind", [False, True], ids=["with", "behind"])
def test_a_backend_that_says_more_than_it_was_asked_serves_nobody_else(web, last, behind):
    """Such bytes are perhaps half of the answer to a request that was hidden in another; the rest comes later."""
    def script(talk: Talk) -> None:
        while asked := talk.request():
            answer = reply(asked.target.encode())
            if asked.target == "/more" and not behind:
                answer += b"HTTP/1.1 200 OK\r\n"
            talk.say(answer)
            if asked.target == "/more" and behind:
                assert goes.wait(10)
                talk.say(b"HTTP/1.1 200 OK\r\n")
                said.set()

    goes, said = threading.Event(), threading.Event()
    served = web(script, http_reuse="safe")
    with served.connect(request("GET", "/more", *last)) as client:
        assert client.answer().body == b"/more"
        goes.set()
        if not last and behind:
            assert said.wait(10)
            settle()
    wait_until(lambda: not served.running.router.connections)
    wait_until(lambda: not served.running.router.web.spares.by_key, 1.0)


def test_what_a_backend_says_behind_an_answer_is_not_the_next_answer(web):
    """Also where the next request has come before: the bytes are in the kernel, and no event has told of them."""
    def script(talk: Talk) -> None:
        while asked := talk.request():
            head = reply(asked.target.encode(), "X: ")
            answer = head.replace(b"X: ", b"X: " + b"x" * (4096 - len(head)))  # as much as is read in one go
            talk.say(answer + (reply(b"evil") if asked.target == "/1" else b""))

    served = web(script)
    client = served.connect(request("GET", "/1") + request("GET", "/2"))
    assert [client.answer().body for _ in range(2)] == [b"/1", b"/2"]


def test_a_backend_that_ends_its_connection_serves_nobody_else(web):
    served = web(answering(lambda asked: reply(b"x", "Connection: close")), http_reuse="safe")
    with served.connect(request("GET", "/1", "Connection: close")) as client:
        client.answer()
        client.rest()
    wait_until(lambda: not served.running.router.connections)
    assert not served.running.router.web.spares.by_key


# -- what was cut ------------------------------------------------------------------------------


def early(told: threading.Event) -> Callable[[Talk], None]:
    """A script that answers without a length in the middle of an upload, and breaks off."""
    def script(talk: Talk) -> None:
        talk.head()
        talk.say(b"HTTP/1.1 200 OK\r\n\r\nhello")
        told.wait(10)
        talk.reset()
    return script


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_answer_that_breaks_off_during_an_upload_is_not_whole(web, version):
    """The upload meets the reset first; what is read then looks like an end."""
    told = threading.Event()
    served = web(early(told))
    client = served.connect(request("PUT", "/", "Content-Length: 1000000", version=version))
    client.head()
    client.until(b"hello")
    with held(served.running):
        client.say(b"x" * 1000)
        settle()
        told.set()
        served.origin.wait_over(1)
    client.rest()
    assert client.how == "reset"


def test_an_answer_that_breaks_off_while_its_client_is_slow_is_not_whole(web):
    """Nobody reads from the backend then: it is found by the look for silent connections."""
    def script(talk: Talk) -> None:
        talk.request()
        talk.say(b"HTTP/1.1 200 OK\r\n\r\n")
        talk.sock.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            while True:
                talk.say(b"x" * 100_000)
        talk.reset()

    served = web(script)
    client = served.connect(request())
    served.origin.wait_over(1)
    looked, router = threading.Event(), served.running.router
    router.call(lambda: (router._sweep(), looked.set()))
    assert looked.wait(10)
    client.head()
    client.rest()
    assert client.how == "reset"


def test_an_answer_that_had_ended_before_the_upload_broke_off_is_whole(web):
    def script(talk: Talk) -> None:
        talk.head()
        talk.say(b"HTTP/1.1 200 OK\r\n\r\nhello")
        talk.finish()
        told.wait(10)
        talk.reset()

    told = threading.Event()
    served = web(script)
    client = served.connect(request("PUT", "/", "Content-Length: 1000000"))
    client.head()
    with contextlib.suppress(ConnectionError):
        client.say(b"x" * 1000)
        told.set()
    assert (client.rest(), client.how) == (b"hello", "end")


def test_a_program_that_dies_within_an_answer_without_a_length_has_not_ended_it(run, tmp_path, settings_file):
    """The kernel ends its stream as if it had said all."""
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\nimport os\n"
                       "died = os.read(0, 65536).startswith(b'GET /died')\n"
                       "os.write(1, b'HTTP/1.1 200 OK\\r\\n\\r\\nhello')\n"
                       "os._exit(9 * died)\n")
    program.chmod(0o700)
    running = run("--config=" + settings_file(f'[routes]\n"{WEB}" = {table(f"exec:{program}", http="forward")}\n'))
    for target, how in ("/whole", "end"), ("/died", "reset"):
        with call(running.address, request("GET", target)) as client:
            client.until(b"hello")
            client.rest()
            assert client.how == how, target


# -- a request that is asked again -------------------------------------------------------------


def test_a_body_goes_on_while_its_request_is_asked_again(web):
    """The connection that was kept is reset in the middle of it; no byte is lost, however the pieces come."""
    def script(talk: Talk) -> None:
        if len(served.origin.talks) > 1:
            return telling(talk)
        talk.request()
        talk.say(reply(b"first"))
        talk.until(b"A")
        told.set()
        goes.wait(10)
        talk.reset()

    for pause in 0, 1, 2, 3:
        told, goes = threading.Event(), threading.Event()
        served = web(script)
        client = served.connect(request())
        client.answer()
        client.say(request("PUT", "/", "Content-Length: 28000") + b"A")
        assert told.wait(10)
        rest = bytes(range(97, 124)) * 1000
        with held(served.running):
            client.say(rest[:9000])
            goes.set()
        for part in range(1, 3):
            time.sleep(0.001 * pause)
            client.say(rest[9000 * part:9000 * part + 9000])
        client.say(b"B" * 999)
        assert client.answer().body.endswith(b"\r\n\r\nA" + rest + b"B" * 999)


def test_a_101_that_comes_before_the_request_is_whole_is_no_answer(web):
    """What the client says next would go in the middle of it."""
    def script(talk: Talk) -> None:
        talk.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        talk.say(shake())
        talk.rest()

    served = web(script)
    client = served.connect(request("GET", "/", *UPGRADE, "X: " + "x" * 30_000) + b"frame")
    client.answer()  # of either kind: it depends on the kernel whether it takes all of the request
    client.sock.close()
    wait_until(lambda: not served.running.router.connections)
    assert served.running.router.pipes.pending == 0


# -- settings that change ----------------------------------------------------------------------


def reload(running: Running, *argv: str) -> None:
    """As SIGHUP, with these options."""
    settings = sniroute_settings.load_settings(["--listen", f"{HOST}:0", *argv], {})
    done = threading.Event()
    running.router.call(lambda: (running.router.adopt(settings), done.set()))
    assert done.wait(10)


def test_a_reload_without_http_is_no_fault_for_a_client_whose_head_is_not_whole(run, origin):
    backend = origin()
    running = run(FORWARD, route(backend.address, WEB))
    with call(running.address, b"GET / HT") as client:
        wait_until(lambda: running.router.deadlines.prelude.due)
        reload(running, route(backend.address, WEB))
        client.say(b"TP/1.1\r\nHost: " + WEB.encode() + b"\r\n\r\n")
        client.rest()
    assert running.ending().reason == "not_tls"
    assert not backend.talks


def test_a_reload_without_http_is_for_clients_that_are_kept_too(run, origin):
    backend = origin()
    running = run(FORWARD, route(backend.address, WEB))
    with call(running.address, request()) as client:
        client.answer()
        reload(running, route(backend.address, WEB))
        client.say(request("GET", "/later"))
        check_refusal(client.answer(), 421)
    assert b"/later" not in backend.heard


def test_a_reload_that_believes_others_is_for_clients_that_are_kept_too(run, origin):
    backend = origin()
    running = run(FORWARD, route(backend.address, WEB))
    with call(running.address) as client:
        for networks, heard in ([], "127.0.0.1"), (["127.0.0.0/8"], "192.0.2.9, 127.0.0.1"), ([], "127.0.0.1"):
            reload(running, FORWARD, route(backend.address, WEB), *(f"--forwarded-from={each}" for each in networks))
            client.say(request("GET", "/", "X-Forwarded-For: 192.0.2.9"))
            assert f"\r\nX-Forwarded-For: {heard}\r\n".encode() in client.answer().body


# -- TLS to backends ---------------------------------------------------------------------------


@pytest.fixture
def secure(certificate, origin) -> Callable[[Callable[[Talk], None]], Any]:
    """secure(script) -> Origin: as `origin`, by TLS, with a certificate of *.example.com."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def start(script: Callable[[Talk], None]) -> Any:
        def handle(talk: Talk) -> None:
            with context.wrap_socket(talk.sock, server_side=True) as tls:
                script(Talk(tls))
        return origin(handle)

    return start


def test_a_connection_by_tls_serves_no_client_that_asks_for_another_name(run, settings_file, secure, certificate):
    """Its certificate was checked for the name of the first one."""
    backend = secure(answering(lambda asked: reply(asked.get("Host").encode())))
    running = run("--config=" + settings_file('[routes]\n"*.example.com" = ' + table(
        "tcp:%s:%d" % backend.address, http="forward-tls", http_reuse="safe", verify=str(certificate.file)) + "\n"))
    with call(running.address, request(host="a.example.com")) as client:
        client.answer()
    wait_until(lambda: running.router.web.spares.by_key)
    for name, count in ("b.example.com", 2), ("a.example.com", 2):
        with call(running.address, request(host="c.example.com")) as client:
            client.answer()
            before = len(backend.talks)
            client.say(request(host=name))
            assert client.answer().body == name.encode()
            assert len(backend.talks) - before == (name == "b.example.com")
    running.router.call(running.router.web.spares.close)  # else its far end waits for them


def test_the_certificate_of_a_backend_with_an_ipv6_address_is_held_against_that(run, settings_file, secure, certificate):
    """Not against a piece of it."""
    asked = []
    backend = secure(telling)
    running = run("--config=" + settings_file(f'[routes]\n"{WEB}" = ' + table(
        "tcp:[::1]:%d" % backend.address[1], http="forward-tls", host="backend", verify=str(certificate.file)) + "\n"))
    router = running.router
    router.web.tls_clients = tls_clients = TlsClients()
    begin = tls_clients.begin
    tls_clients.begin = lambda name, verify: asked.append(name) or begin(name, verify)
    with contextlib.closing(socket.create_server(("::1", backend.address[1]), family=socket.AF_INET6)) as listener:
        with call(running.address, request()) as client:
            with listener.accept()[0]:
                assert client.sock.fileno() >= 0
            client.answer()
    assert asked == ["::1"]


# -- what strangers have kept for them ---------------------------------------------------------


@pytest.mark.parametrize("believes", [False, True])
def test_what_strangers_say_is_not_kept_for_them(believes):
    """A thousand of them would have 60 MiB."""
    tracemalloc.start()
    try:
        for number in range(1100):
            long = b"websocket/%d-" % number + b"x" * 30_000
            line = b"X-Forwarded-For: " if believes else b"Connection: upgrade\r\nUpgrade: "
            asked = parse_request(b"GET / HTTP/1.1\r\nHost: a\r\n" + line + long + b"\r\n\r\n")
            upgrade = choose_upgrade(asked, Policy())
            pass_request(asked, hop(asked, "192.0.2.1", 80, believes), believes=believes, upgrade=upgrade)
            if upgrade:
                answer = b"HTTP/1.1 101 \r\nConnection: upgrade\r\nUpgrade: " + long + b"\r\n\r\n"
                pass_response(parse_response(answer, "GET", (upgrade,)))
        assert tracemalloc.get_traced_memory()[0] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_large_head_is_not_kept_a_second_time():
    """Its client may wait for a long time, and ten thousand may do so."""
    asked = parse_request(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 30_000 + b"\r\n\r\n")
    assert len(pass_request(asked)) > 30_000
    assert not any(isinstance(made, bytes) for made in asked.head.made.values())


def test_tiny_chunks_are_read_little_at_a_time(web, monkeypatch):
    """64 KiB of them take the loop 35 ms, in which nobody else is served."""
    sizes, feed = [], Chunked.feed
    monkeypatch.setattr(Chunked, "feed", lambda body, data: (sizes.append(len(data)), feed(body, data))[1])
    body = [b"x"] * 50_000
    served = web(answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(*body)))
    client = served.connect(b"PUT / HTTP/1.1\r\nHost: " + WEB.encode() + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
                            + chunks(*body))
    assert client.answer().body == b"".join(body)
    assert len(sizes) > 20 and max(sizes) <= 1 << 14


# -- the look for silent connections -----------------------------------------------------------


def test_a_backend_that_breaks_off_behind_its_answer_spoils_no_request_of_a_slow_client(web):
    """It is found while the answer waits; what the client says then is not taken for a part of a later body."""
    def script(talk: Talk) -> None:
        if len(served.origin.talks) > 1:
            return telling(talk)
        talk.request()
        talk.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        held_back = 0
        while held_back < 5:  # and not only for a moment
            if not served.running.router.pipes.pending:
                talk.say(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                held_back = 0
            settle()
            held_back += 1
        talk.say(b"0\r\n\r\n")
        wait_until(lambda: unsent(talk.sock) == 0)
        talk.reset()

    served = web(script)
    router = served.running.router
    with contextlib.closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(10)
        sock.connect(served.address)
        router.call(lambda: [each.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                             for each in router.connections])
        client = Talk(sock)
        client.say(request())
        served.origin.wait_over(1)
        client.say(request("PUT", "/", "Content-Length: 20") + b"0123456789")
        settle()
        router.call(router._sweep)
        settle()
        client.say(b"abcdefghij")
        client.finish()
        assert set(client.answer().body) == set(b"x")
        client.rest()
    for talk in served.origin.talks[1:]:
        assert talk.heard.endswith(b"0123456789abcdefghij")


def test_a_client_that_breaks_off_in_the_turn_of_that_look_is_no_fault(run):
    """It was accepted, and nobody has read from it."""
    running = run()
    with held(running):
        reset(running.connect(b"GET"))
        settle()
        running.router.call(lambda: running.router.sweeping.set(0.0))
    wait_until(lambda: running.counter("accepted") and not running.router.connections)
    assert not any(peer.count for peer in running.router.peers.known.values())
