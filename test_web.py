"""Plain HTTP by Host: a router, clients that say exactly what a test says, and backends that do what a script does.

Smuggling, answers that are none, upgrades, connections that are kept, early answers, limits in time and in size.
testbed/web.py has both ends; the tables of what is refused are testbed/smuggling.py.  Real clients are those of
test_web_clients.py.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import random
import re
import signal
import socket
import threading
from typing import Callable, Iterable, Iterator

import pytest

from conftest import HOST, Address, connect, linux, wait_until
from testbed.hellos import HELLO, NAME, v1
from testbed.running import Running, route
from testbed.smuggling import EVIL, NEUTRAL, REQUESTS, RESPONSES, SHAPES
from testbed.web import (PATIENCE, TEXT, UPGRADE, WEB, Cut, Message, Origin, Talk, Web, answering, call, check_refusal,
                         chunks, frame, read_frame, reply, request, saying, shake, table, telling)

FORWARD = "--http=forward"
LATER = b"GET /later HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
FIRST = b"GET /first HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(autouse=True)
def no_faults(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The router finds no fault in itself, also where its clients were served all the same."""
    yield
    assert "report it" not in caplog.text, caplog.text


@contextlib.contextmanager
def one_turn(running: Running) -> Iterator[None]:
    """What comes within the block is all there when the loop takes its next turn."""
    stopped, go = threading.Event(), threading.Event()

    def hold() -> None:
        stopped.set()
        go.wait(20)

    running.router.call(hold)
    assert stopped.wait(20)
    yield
    go.set()


# -- bytes that two programs may read in two ways ----------------------------------------------


class Noting:
    """A script that notes the requests that it finds, and answers each with its target."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, str, bytes]] = []  # method, target, Host, body

    def __call__(self, talk: Talk) -> None:
        while asked := talk.request():
            self.found.append((asked.method, asked.target, asked.get("Host"), asked.body))
            talk.say(reply(asked.target.encode()) if asked.method != "HEAD" else reply())


@pytest.fixture
def noted(run, origin) -> Iterator[tuple[Running, Origin, Noting]]:
    """A router that leads all names to one backend, that backend, and what it has noted."""
    script = Noting()
    backend = origin(script)
    names = "a", "internal", "*"  # one label is enough only where it is named
    yield run(FORWARD, *(route(backend.address, each) for each in names)), backend, script


def exchange(address: Address, pieces: Iterable[bytes], first: bool = False, ends: bool = False) -> bytes:
    """All that a client hears that sends these pieces, whatever becomes of them.

    `first`: another request comes first, and its answer is not in what is returned; `ends`: it says that no more comes.
    """
    with call(address) as client:
        if first:
            client.say(FIRST)
            assert client.answer().body == b"/first"
        with contextlib.suppress(ConnectionError):
            client.say(*pieces)
            if ends:
                client.finish()
        return client.rest()


def statuses(said: bytes) -> list[int]:
    """Those of all answers in it."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([1-9][0-9]{2}) ", said)]


def pieces_of(data: bytes) -> list[bytes]:
    """A dozen pieces."""
    step = len(data) // 12 + 1
    return [data[at:at + step] for at in range(0, len(data), step)]


@pytest.mark.parametrize("data", SHAPES.values(), ids=SHAPES)
def test_a_known_shape_reaches_no_backend(noted, data):
    """Neither does what is hidden in it; and another client's request gets its own answer."""
    running, backend, script = noted
    for pieces in ([data], pieces_of(data)):
        for first in (False, True):
            heard = exchange(running.address, pieces, first)
            if heard or first:  # HTTP/2 is told in its own words
                assert len(found := statuses(heard)) == 1 and 400 <= found[0] < 600 or heard[3:4] == b"\4", heard
            assert exchange(running.address, [LATER]).endswith(b"\r\n\r\n/later")
    assert b"evil" not in backend.heard.lower() and b"SM\r\n" not in backend.heard
    assert {target for _, target, _, _ in script.found} == {"/first", "/later"}


@pytest.mark.parametrize("data, expected, gone", NEUTRAL.values(), ids=NEUTRAL)
def test_a_known_shape_is_one_thing_to_the_backend(noted, data, expected, gone):
    running, backend, script = noted
    assert statuses(exchange(running.address, [data, LATER])) == [200, 200]
    assert script.found == [*expected, ("GET", "/later", "a", b"")]
    assert gone not in backend.heard.replace(b"X-Forwarded-For: 127.0.0.1", b"").replace(b"X-Real-IP: 127.0.0.1", b"")


REFUSED = [row for row in REQUESTS if row.status and not row.is_cut]
IN_TWO_WAYS = pytest.mark.parametrize("cut", [lambda data: [data], pieces_of], ids=["whole", "in pieces"])


@IN_TWO_WAYS
def test_what_is_refused_is_refused_once_and_reaches_no_backend(noted, cut):
    """Each row of the table, first on its connection and second, and with a request behind it."""
    running, backend, script = noted
    for row in REFUSED:
        for first in (False, True):
            if not first and not row.data[:1].isupper():
                continue  # it is no HTTP to begin with
            heard = exchange(running.address, cut(row.data + EVIL), first)
            if not first and heard[3:4] == b"\4":
                assert row.data.startswith(b"PRI * HTTP/2.0"), "it is told in its own words"
                continue
            assert statuses(heard) == [row.status], (row.name, first, heard[:300])
            check_refusal(parsed(heard), row.status)
    assert b"evil" not in backend.heard
    assert {target for _, target, _, _ in script.found} == {"/first"}


def parsed(heard: bytes) -> Message:
    """One whole answer, and nothing behind it."""
    ours, theirs = socket.socketpair()
    with theirs, Talk(ours) as talk:
        theirs.sendall(heard)
        theirs.shutdown(socket.SHUT_WR)
        answer = talk.answer()
        assert talk.rest() == b""
        return answer


@IN_TWO_WAYS
def test_what_gets_through_is_what_the_backend_finds(noted, cut):
    running, backend, script = noted
    for row in REQUESTS:
        if row.status or not row.heard[0][2]:
            continue
        script.found.clear()
        first = not row.data[:1].isupper()
        heard = exchange(running.address, cut(row.data + LATER), first)
        is_old = b" HTTP/1.0\r\n" in row.data
        assert statuses(heard) == [200] * (2 - is_old), (row.name, heard[:300])
        found = [(method, target, body) for method, target, _, body in script.found[first:]]
        expected = [(method, path, body) for method, path, _, body in row.heard]
        assert found == expected + [("GET", "/later", b"")][is_old:]
    assert backend.heard


def test_what_is_cut_is_never_whole_to_the_backend(noted):
    running, backend, script = noted
    for row in REQUESTS:
        if row.is_cut:
            assert statuses(exchange(running.address, [row.data], ends=True)) in ([], [400], [408]), row.name
    assert script.found == []


def test_an_old_client_that_names_no_host_has_no_route(noted):
    running, backend, _ = noted
    heard = exchange(running.address, [b"GET / HTTP/1.0\r\n\r\n"])
    assert statuses(heard) == [400] and backend.heard == b""


# -- answers -----------------------------------------------------------------------------------


def rows(said: threading.Semaphore, talk: Talk) -> None:
    """A script that says the row of RESPONSES that the target asks for, by its number; in pieces with X-Cut.

    `said` is released behind each row.
    """
    while asked := talk.request():
        number = asked.target[1:]
        if not number.isdecimal():
            talk.say(reply(number.encode()))
            continue
        row = RESPONSES[int(number)]
        try:
            talk.say(*(pieces_of(row.data) if asked.get("X-Cut") else [row.data]))
        finally:  # the router may have hung up
            said.release()
        if row.is_cut or b"\r\n\r\nhello" in row.data:
            return talk.finish()


@pytest.mark.parametrize("number", range(len(RESPONSES)), ids=[row.name for row in RESPONSES])
def test_an_answer_is_passed_on_or_refused_but_never_looks_whole_where_it_is_not(run, origin, number):
    row = RESPONSES[number]
    said = threading.Semaphore(0)
    backend = origin(functools.partial(rows, said))
    running = run(FORWARD, route(backend.address, WEB))
    for version, cut in (("1.1", []), ("1.1", ["X-Cut: yes"]), ("1.0", [])):
        if version == "1.0" and row.upgrades:
            continue
        with call(running.address) as client:
            client.say(request(row.method, f"/{number}", *(UPGRADE if row.upgrades else ()), *cut, version=version))
            try:
                answer = client.answer(row.method)
            except Cut as error:
                assert not row.heard, error
                assert version == "1.1" or error.how == "reset", "to an old client an end is the end of the body"
                continue
            if not row.heard:
                check_refusal(answer, 502)
                continue
            if row.left:  # what comes behind the next request is an answer to that, as far as anybody can tell
                assert said.acquire(timeout=PATIENCE)
            (*interim, (status, body)) = row.heard
            if version == "1.0":  # it knows nothing of 1xx, and of chunks
                assert (answer.status, answer.interim, answer.all("Transfer-Encoding")) == (status, (), [])
            else:
                assert [each.status for each in answer.interim] == [status for status, _ in interim]
            assert answer.status == status
            if status == 101:
                assert client.exactly(len(body)) == body
                continue
            assert answer.body == body
            if answer.get("Connection") == "close" or version == "1.0":
                assert client.rest() == b""
            else:
                client.say(request("GET", "/next"))
                assert client.answer().body == b"next", "nothing that was not asked for is the next answer"
    if row.left:
        assert backend.over or len(backend.talks) > 1, "a connection with bytes that nobody asked for is not used again"


def test_a_head_is_passed_on_before_its_body_and_each_event_as_it_comes(web):
    """So that server-sent events open at once."""
    turn = threading.Semaphore(0)

    def script(talk: Talk) -> None:
        talk.request()
        talk.say(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(3):
            turn.acquire()
            talk.say(chunks(b"data: %d\n\n" % number).removesuffix(b"0\r\n\r\n"))
        turn.acquire()
        talk.say(b"0\r\n\r\n")

    client = web(script).connect(request())
    assert client.head().get("Content-Type") == "text/event-stream"
    for number in range(3):
        turn.release()
        assert client.until(b"\n\n\r\n").endswith(b"data: %d\n\n\r\n" % number)
    turn.release()
    assert client.until(b"0\r\n\r\n") == b"0\r\n\r\n"


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_stream_of_events_that_falls_silent_is_cut_and_one_that_goes_on_is_not(web, version):
    """By the limit for idle connections; in chunks a client sees the cut, and HTTP/1.0 sees it by the reset."""
    def script(talk: Talk) -> None:
        talk.request()
        talk.say(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
                 b"3\r\nan \r\n")

    served = web(script, connection_idle="200ms")
    client = served.connect(request(version=version))
    with pytest.raises(Cut) as caught:
        client.answer()
    assert version == "1.1" or caught.value.how == "reset"
    served.origin.wait_over(1)


@pytest.mark.parametrize("first, lines, body", [
    ("HTTP/1.0 200 OK", "", b"hello"), ("HTTP/1.1 200 OK", "Connection: close\r\n", b"hello"),
    ("HTTP/1.1 200 OK", "", b"x" * 300_000)])
def test_a_body_without_a_length_ends_with_its_connection(web, first, lines, body):
    def script(talk: Talk) -> None:
        talk.request()
        talk.say(f"{first}\r\n{lines}\r\n".encode(), body)
        talk.finish()

    client = web(script).connect(request())
    assert client.answer().body == body and client.how in ("", "end")


def test_a_body_without_a_length_that_is_reset_never_looks_whole(web):
    told = threading.Event()

    def script(talk: Talk) -> None:
        talk.request()
        talk.say(b"HTTP/1.1 200 OK\r\n\r\nhello")
        assert told.wait(20)
        talk.reset()

    client = web(script).connect(request())
    client.head()
    client.until(b"hello")
    told.set()
    client.rest()
    assert client.how == "reset"


@pytest.mark.parametrize("keeps", [True, False], ids=["keep-alive", "once"])
def test_chunks_are_taken_apart_for_a_client_that_knows_none(web, keeps):
    """And the end of the connection is the end of the body."""
    served = web(answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(b"hel", b"lo")))
    client = served.connect(request("GET", "/", *["Connection: keep-alive"] * keeps, version="1.0"))
    answer = client.answer()
    assert (answer.body, answer.get("Transfer-Encoding"), client.how) == (b"hello", None, "end")


def test_an_old_client_that_asks_for_it_is_kept(web):
    """HTTP/1.0 with keep-alive: the answer has to say so, and a length."""
    client = web(telling).connect()
    for number in range(3):
        client.say(request("GET", f"/{number}", "Connection: keep-alive", version="1.0"))
        answer = client.answer()
        assert answer.body.startswith(b"GET /%d HTTP/1.1\r\n" % number)
        assert answer.get("Connection").lower() == "keep-alive"
    client.say(request(version="1.0"))
    client.answer()
    assert client.rest() == b"" and client.how == "end"


@pytest.mark.parametrize("status, lines, method", [
    ("200 OK", ["Content-Length: 7"], "HEAD"), ("200 OK", ["Transfer-Encoding: chunked"], "HEAD"),
    ("200 OK", [], "HEAD"), ("204 No Content", [], "GET"), ("304 Not Modified", ["Content-Length: 7"], "GET"),
    ("304 Not Modified", [], "GET")])
def test_an_answer_without_a_body_stays_without_one_and_says_of_it_what_it_said(web, status, lines, method):
    served = web(answering("\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()))
    client = served.connect()
    for _ in range(2):
        client.say(request(method))
        answer = client.answer(method)
        assert answer.first == f"HTTP/1.1 {status}"
        assert [f"{name}: {value}" for name, value in answer.lines if "ength" in name or "oding" in name] == lines
    assert len(served.origin.talks) == 1


def test_a_backend_that_says_more_than_its_length_is_heard_to_its_length(web):
    """What is more reaches nobody, and its connection serves no other request."""
    served = web(answering(lambda asked: reply(asked.target.encode()) + b"HTTP/1.1 200 OK\r\n\r\nevil"))
    client = served.connect()
    for number in range(3):
        client.say(request("GET", f"/{number}"))
        assert client.answer().body == b"/%d" % number
    assert len(served.origin.talks) == 3
    client.say(request("GET", "/last", "Connection: close"))
    assert client.answer().body == b"/last" and client.rest() == b""
    served.origin.wait_over(4)


def test_what_a_backend_says_of_one_connection_goes_no_further_and_all_else_stays(web):
    lines = ["Server: x", "set-cookie: a=1", "X-B:  2 ", "Set-Cookie: b=2", "X-Latin: \xe9\xff", "Date: today",
             "Vary: a", "X-Long: " + "y" * 30_000]
    own = ["Connection: keep-alive, X-Mine", "Keep-Alive: timeout=5", "X-Mine: z", "Proxy-Authenticate: Basic",
           "Upgrade: h2c", "Trailer: X"]
    said = "\r\n".join(["HTTP/1.1 200 Very Well", *own[:3], *lines, *own[3:], "Content-Length: 2", "", "ok"])
    answer = web(answering(said.encode("latin-1"))).ask(request())
    head = answer.head.decode("latin-1").split("\r\n")
    assert (head[0], answer.body) == ("HTTP/1.1 200 Very Well", b"ok")
    assert [line for line in head if line in lines] == lines
    assert not [line for line in head if line in own]


def test_trailers_of_an_answer_are_dropped(web):
    served = web(answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nX: y\r\n\r\n"))
    client = served.connect(request() + request())
    assert client.answer().body == client.answer().body == b"hello"
    assert len(served.origin.talks) == 1


# -- upgrades ----------------------------------------------------------------------------------


def test_nothing_reaches_a_backend_before_its_101_and_all_of_it_behind(web):
    """The frame comes in one segment with the request.  A 103 and its answer prove that it had its chance to go on."""
    looked = threading.Event()
    early = []

    def script(talk: Talk) -> None:
        asked = talk.request()
        talk.say(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
        assert looked.wait(20)
        early.append(bytes(talk.heard[talk.at:]))
        talk.say(shake(asked.get("Sec-WebSocket-Key")) + frame(b"hello"))
        talk.say(frame(read_frame(talk)[1][::-1]))

    served = web(script)
    client = served.connect(request("GET", "/chat", *UPGRADE) + frame(b"abc", masked=True))
    assert client.head().status == 103
    looked.set()
    answer = client.answer()
    assert (answer.status, answer.get("Upgrade").lower()) == (101, "websocket")
    assert "upgrade" in answer.get("Connection").lower() and answer.get("Sec-WebSocket-Accept")
    assert read_frame(client) == (TEXT, b"hello") and read_frame(client) == (TEXT, b"cba")
    assert early == [b""]


@pytest.mark.parametrize("connection", ["Upgrade", "keep-alive, Upgrade", "UPGRADE", "upgrade, keep-alive"])
@pytest.mark.parametrize("offers", [["websocket"], ["WebSocket"], ["websocket", "foo"], ["foo, websocket"],
                                    ["h2c, websocket"]])
def test_an_upgrade_is_offered_as_one_protocol_however_the_client_writes_it(web, connection, offers):
    def script(talk: Talk) -> None:
        asked = talk.request()
        assert asked.get("Upgrade").lower() == "websocket" and asked.get("Connection").lower() == "upgrade"
        talk.say(shake(asked.get("Sec-WebSocket-Key")))

    lines = [f"Connection: {connection}", *(f"Upgrade: {each}" for each in offers), *UPGRADE[2:]]
    assert web(script).ask(request("GET", "/chat", *lines)).status == 101


def test_what_comes_behind_a_101_comes_through(web, flow):
    """4 KiB in one segment with the head; then 1 MiB while the client has already said its last."""
    down = bytes(range(256)) * 4096

    def script(talk: Talk) -> None:
        asked = talk.request()
        talk.say(shake(asked.get("Sec-WebSocket-Key")) + b"x" * 4096)
        assert talk.rest() == b"the last"
        talk.say(down)
        talk.finish()

    client = web(script).connect(request("GET", "/", *UPGRADE))
    assert client.answer().status == 101
    client.say(b"the last")
    client.finish()
    assert client.rest() == b"x" * 4096 + down and client.how == "end"


@pytest.mark.parametrize("behind", [frame(b"evil", masked=True), request("GET", "/evil")], ids=["frame", "request"])
@pytest.mark.parametrize("status", ["200 OK", "403 Forbidden", "426 Upgrade Required"])
def test_a_backend_that_does_not_upgrade_is_heard_and_then_left(web, status, behind):
    """Its answer is an ordinary one.  What the client sent meanwhile may be frames or a request: it goes nowhere."""
    told = threading.Event()

    def script(talk: Talk) -> None:
        talk.request()
        assert told.wait(20)
        talk.say(reply(b"no", status=status))

    served = web(script)
    client = served.connect(request("GET", "/chat", *UPGRADE) + behind)
    told.set()
    answer = client.answer()
    assert (answer.first, answer.body) == (f"HTTP/1.1 {status}", b"no")
    assert client.rest() == b""
    served.origin.wait_over(1)
    assert behind not in served.origin.heard and b"/evil" not in served.origin.heard


def test_an_upgrade_with_a_body_is_an_ordinary_request(web):
    served = web(telling)
    answer = served.ask(request("POST", "/", *UPGRADE, body=b"hello"))
    assert answer.status == 200 and answer.body.endswith(b"\r\n\r\nhello") and b"pgrade:" not in answer.body


@pytest.mark.parametrize("lines", [
    ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"],
    ["Connection: Upgrade", "Upgrade: foo"], ["Connection: Upgrade", "Upgrade: TLS/1.0"], ["Upgrade: websocket"]])
def test_a_protocol_that_is_not_forwarded_is_not_offered(web, lines):
    """The request goes on as HTTP/1.1, and so does the next one on the connection."""
    client = web(telling).connect(request("GET", "/one", *lines) + request("GET", "/two"))
    for target in (b"/one", b"/two"):
        answer = client.answer()
        assert answer.status == 200 and answer.body.startswith(b"GET " + target)
        assert not re.search(rb"(?im)^(upgrade|connection|http2-settings):", answer.body), answer.body


def test_another_protocol_is_offered_where_the_route_names_it(web):
    def script(talk: Talk) -> None:
        asked = talk.request()
        assert asked.get("Upgrade") == "foo"
        talk.say(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\nhello")

    client = web(script, upgrades=["foo"]).connect(request("GET", "/", "Connection: Upgrade", "Upgrade: foo"))
    assert client.answer().status == 101 and client.exactly(5) == b"hello"


# -- what a backend is told --------------------------------------------------------------------


def told(body: bytes) -> Message:
    """The request that a backend was sent, in an answer of `telling`."""
    ours, theirs = socket.socketpair()
    with theirs, Talk(ours) as talk:
        theirs.sendall(body)
        theirs.shutdown(socket.SHUT_WR)
        return talk.request()


FORGED = ["X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https", "X-Forwarded-Host: evil", "X-Forwarded-Port: 1",
          "X-Forwarded-Prefix: /evil", "X_Forwarded_For: 192.0.2.1", "x-forwarded.for: 192.0.2.1",
          "X-Real-IP: 192.0.2.1", "X_REAL_IP: 192.0.2.1", "Forwarded: for=192.0.2.1;proto=https"]


def test_what_a_stranger_says_of_itself_is_replaced(web):
    served = web()
    port = served.address[1]
    asked = told(served.ask(request("GET", "/", "Accept: */*", *FORGED)).body)
    assert "192.0.2.1" not in asked.head.decode() and "evil" not in asked.head.decode()
    assert (asked.get("X-Forwarded-For"), asked.get("X-Real-IP")) == (HOST, HOST)
    assert (asked.get("X-Forwarded-Proto"), asked.get("X-Forwarded-Host")) == ("http", WEB)
    assert (asked.get("X-Forwarded-Port"), asked.get("Via")) == (str(port), "1.1 sniroute")


def test_a_proxy_that_is_believed_is_added_to(web):
    served = web(telling, f"--forwarded-from={HOST}")
    asked = told(served.ask(request("GET", "/", "X-Forwarded-For: 192.0.2.1, 192.0.2.2", "X-Forwarded-Proto: https",
                                    "X-Forwarded-Host: outside.example.com", "X-Forwarded-Port: 443",
                                    "X-Real-IP: 192.0.2.1", "Via: 1.1 other")).body)
    assert ", ".join(asked.all("X-Forwarded-For")) == f"192.0.2.1, 192.0.2.2, {HOST}"
    assert asked.get("X-Forwarded-Proto") == "https" and asked.get("X-Forwarded-Host") == "outside.example.com"
    assert asked.get("X-Forwarded-Port") == "443" and asked.get("X-Real-IP") == "192.0.2.1"
    assert ", ".join(asked.all("Via")) == "1.1 other, 1.1 sniroute"


def test_a_proxy_that_is_not_in_the_list_is_a_stranger(web):
    asked = told(web(telling, "--forwarded-from=192.0.2.0/24").ask(request("GET", "/", *FORGED)).body)
    assert asked.get("X-Forwarded-For") == HOST and asked.get("X-Forwarded-Proto") == "http"


@pytest.mark.parametrize("named", ["X-Forwarded-For", "x_forwarded_proto", "Host", "Content-Length", "Forwarded",
                                   "X-Real-IP"])
def test_a_client_cannot_have_our_fields_taken_away(web, named):
    served = web()
    check_refusal(served.ask(request("GET", "/", f"Connection: close, {named}")), 400)
    assert served.origin.heard == b""


def test_a_loop_is_found(web):
    served = web()
    check_refusal(served.ask(request("GET", "/", "Via: 1.0 other, 1.1 sniroute")), 508)
    assert served.origin.heard == b""


def test_a_route_that_leads_back_to_the_router_is_a_loop(run, free_ports):
    port, _ = free_ports(1)
    running = run(FORWARD, f"--listen={HOST}:{port}", f"--route={WEB}=tcp:localhost:{port}")
    with call((HOST, port), request()) as client:
        assert client.answer().status in (403, 502, 508)


def test_other_lines_keep_their_bytes_and_their_order(web):
    lines = ["X-B: 2", "x-a:  1 \t", "Cookie: a=b; c=d", "X-B: 3", "X-Latin: \xe9\xff", "User-Agent: x/1 (\xa7)",
             "Accept-Encoding: gzip, br", "Authorization: Basic eDp5", "Referer: http://x/?a#b"]
    asked = told(web().ask(request("GET", "/p?a=%20&b=//../c", *lines)).body)
    assert asked.first == "GET /p?a=%20&b=//../c HTTP/1.1"
    head = asked.head.decode("latin-1").split("\r\n")
    assert head[1:11] == [f"Host: {WEB}", *lines]


@pytest.mark.parametrize("line", ["TE: trailers", "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive",
                                  "Proxy-Authorization: Basic eDp5", "Trailer: X", "X-Mine: y"])
def test_what_is_for_one_connection_only_goes_no_further(web, line):
    asked = told(web().ask(request("GET", "/", line, "Connection: keep-alive, x-mine")).body)
    name = line.partition(":")[0]
    assert asked.all(name) == [] and asked.all("Connection") == []


@pytest.mark.parametrize("option, expected", [({}, WEB), ({"host": "other.example.org"}, "other.example.org"),
                                              ({"host": "backend"}, "backend")])
def test_the_host_that_the_backend_hears_is_the_one_that_the_route_says(web, option, expected):
    served = web(telling, **option)
    asked = told(served.ask(request(host=f"{WEB.upper()}.:80")).body)
    if expected == "backend":
        expected = "%s:%d" % served.origin.address
    assert asked.get("Host").lower().removesuffix(":80").removesuffix(".") == expected
    assert asked.get("X-Forwarded-Host") in (WEB, f"{WEB.upper()}.:80", f"{WEB}:80")


@pytest.mark.parametrize("count", [1, 150])
@pytest.mark.parametrize("host", ["Web.Example.COM", "web.example.com.", "WEB.example.com:8080", "web.example.com:80"])
def test_a_name_is_one_name_however_it_is_written_and_among_however_many(run, origin, count, host):
    backend = origin()
    running = run(FORWARD, route(backend.address, WEB),
                  *(f"--route=n{number}.example.com=tcp:192.0.2.1:9" for number in range(count)))
    with call(running.address, request(host=host)) as client:
        assert client.answer().status == 200
    with call(running.address, request("GET", f"http://{host}/x", host=host)) as client:
        assert client.answer().body.startswith(b"GET /x HTTP/1.1\r\n")


def test_trace_and_connect_are_not_for_us(web):
    served = web()
    for said in (request("TRACE"), request("TRACE", "/", "Max-Forwards: 0"),
                 request("CONNECT", f"{WEB}:443", host=f"{WEB}:443")):
        answer = served.ask(said)
        check_refusal(answer, 405)
        assert "GET" in answer.get("Allow")
    assert served.origin.heard == b""


def test_options_goes_as_far_as_it_says(web):
    served = web()
    answer = served.ask(request("OPTIONS", "/", "Max-Forwards: 0"))
    assert answer.status in (200, 204) and "GET" in answer.get("Allow") and served.origin.heard == b""
    assert told(served.ask(request("OPTIONS", "*", "Max-Forwards: 3")).body).get("Max-Forwards") == "2"
    assert told(served.ask(request("GET", "/", "Max-Forwards: 0")).body).first == "GET / HTTP/1.1", "for two methods only"


# -- bodies ------------------------------------------------------------------------------------

WAYS = {"length": lambda body: b"Content-Length: %d\r\n\r\n" % len(body) + body,
        "chunks": lambda body: b"Transfer-Encoding: chunked\r\n\r\n" + chunks(*(body[at:at + 70_000] for at in
                                                                                range(0, len(body), 70_000)))}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_a_body_is_the_same_at_the_other_side_both_ways(web, flow, way, size):
    body = (bytes(range(251)) * (size // 251 + 1))[:size]
    back = answering(lambda asked: b"HTTP/1.1 200 OK\r\n" + WAYS[way](asked.body))
    client = web(back).connect()
    for _ in range(2):
        client.say(request("POST").removesuffix(b"\r\n") + WAYS[way](body))
        answer = client.answer()
        assert answer.body == body and (answer.get("Transfer-Encoding") == "chunked") == (way == "chunks")


def test_pipelined_requests_are_answered_in_order_each_by_its_own_host(run, origin):
    """A hundred in one segment, to two backends by turns; the second waits for the whole of the first."""
    a, b = origin(answering(lambda asked: reply(b"a" + asked.target.encode()))), origin(
        answering(lambda asked: reply(b"b" + asked.target.encode() + asked.body)))
    running = run(FORWARD, route(a.address, "a.example.com"), route(b.address, "b.example.com"))
    said = b"".join(request("GET", f"/{number}", host=f"{'ab'[number % 2]}.example.com") for number in range(100))
    with call(running.address, said) as client:
        for number in range(100):
            assert client.answer().body == b"%c/%d" % (b"ab"[number % 2], number)
        client.say(request("POST", "/long", host="b.example.com", body=b"x" * 100_000)
                   + request("GET", "/last", host="a.example.com"))
        assert client.answer().body == b"b/long" + b"x" * 100_000
        assert client.answer().body == b"a/last"


@pytest.mark.parametrize("behind", [request("POST", "/two", body=b"y" * 1_000_000),
                                    request("POST", "/two", "Transfer-Encoding: chunked") + chunks(*[b"y" * 9999] * 99),
                                    request("GET", "/two", "X: " + "y" * 31_000) + request("GET", "/three")])
def test_more_than_is_read_ahead_waits_for_its_turn(web, behind):
    """Whatever it is: it is kept in the client's socket, and is not lost."""
    turn = threading.Event()

    def script(talk: Talk) -> None:
        while asked := talk.request():
            if asked.target == "/one":
                assert turn.wait(20)
            talk.say(reply(asked.target.encode() + asked.body))

    served = web(script)
    client = served.connect(request("GET", "/one"))
    served.origin.wait_heard(b"/one")
    sender = threading.Thread(target=client.say, args=(behind,))
    sender.start()
    turn.set()
    assert client.answer().body == b"/one"
    assert client.answer().body.rstrip(b"y") == b"/two"
    sender.join()
    if b"/three" in behind:
        assert client.answer().body == b"/three"


@pytest.mark.parametrize("lines", [[], ["Connection: close"]], ids=["the same connection", "a new one"])
@pytest.mark.parametrize("way", WAYS)
def test_a_body_that_comes_in_one_turn_with_the_answer_before_it_is_whole(web, way, lines):
    """None of it is taken for the next request, which is behind it."""
    answer, body = threading.Event(), EVIL * 300
    found = []

    def script(talk: Talk) -> None:
        while asked := talk.request():
            found.append((asked.target, asked.body))
            if asked.target == "/one":
                assert answer.wait(20)
            talk.say(reply(asked.target.encode(), *lines))
            if asked.target == "/one":
                told.set()
            if lines:
                return

    told = threading.Event()
    served = web(script)
    head = request("POST", "/two").removesuffix(b"\r\n")
    said = WAYS[way](body)
    split = said.index(b"\r\n\r\n") + 4
    client = served.connect(request("GET", "/one") + head + said[:split])
    served.origin.wait_heard(b"/one")
    with one_turn(served.running):
        answer.set()
        assert told.wait(20)
        client.say(said[split:split + 4096])
    assert client.answer().body == b"/one"
    client.say(said[split + 4096:] + request("GET", "/three"))
    assert [client.answer().body for _ in range(2)] == [b"/two", b"/three"]
    assert found == [("/one", b""), ("/two", body), ("/three", b"")]


def test_answers_wait_for_a_client_that_reads_late(web, flow):
    """A hundred, of 100 KB each: in order, whole, and not all at once in the router's memory."""
    body = bytes(range(250)) * 400

    def answer(asked: Message) -> bytes:
        way = WAYS["length" if int(asked.target[1:]) % 2 else "chunks"]
        return b"HTTP/1.1 200 OK\r\n" + way(asked.target.encode() + body)

    served = web(answering(answer))
    client = served.connect(b"".join(request("GET", f"/{number}") for number in range(100)))
    served.origin.wait_heard(b"GET /20 ")
    for number in range(100):
        assert client.answer().body == b"/%d" % number + body


def test_a_client_that_says_no_more_gets_its_answers(web):
    """As `printf ... | nc -N` does."""
    client = web(telling).connect(request("GET", "/one") + request("POST", "/two", body=b"hello"))
    client.finish()
    assert client.answer().body.startswith(b"GET /one") and client.answer().body.endswith(b"\r\n\r\nhello")
    assert client.rest() == b"" and client.how == "end"


def test_a_crowd_of_pipelined_requests_is_held_back(web):
    """A client that sends requests and reads no answer is not read for ever."""
    told = threading.Event()

    def script(talk: Talk) -> None:
        while talk.request():
            assert told.wait(20)
            talk.say(reply(b"x"))

    served = web(script)
    client = served.connect()
    client.sock.settimeout(0.2)
    one, sent = request("GET", "/", "X: " + "y" * 4000), 0
    with contextlib.suppress(TimeoutError):
        while sent < 40_000:
            client.sock.sendall(one)
            sent += 1
    assert sent < 40_000 and len(served.origin.heard) < 10_000
    told.set()


def test_a_request_behind_connection_close_is_not_served(web):
    served = web()
    client = served.connect(request("GET", "/one", "Connection: close") + request("GET", "/evil"))
    assert client.answer().body.startswith(b"GET /one")
    assert client.rest() == b"" and client.how == "end"
    assert b"/evil" not in served.origin.heard


def test_a_body_is_never_the_next_request(web):
    """An answer that comes before the body is read: what is left of the body is not taken for a request."""
    def script(talk: Talk) -> None:
        talk.head()
        talk.say(reply(b"enough"))

    served = web(script)
    client = served.connect(request("POST", "/", f"Content-Length: {len(EVIL) + 5}") + b"hello")
    assert client.answer().body == b"enough"
    with contextlib.suppress(ConnectionError):
        client.say(EVIL + request("GET", "/next"))
    assert b"/evil" not in client.rest()
    assert b"GET /next" not in served.origin.heard


@pytest.mark.parametrize("how", ["stays", "end", "reset"])
@pytest.mark.parametrize("way", WAYS)
def test_an_early_answer_reaches_the_client_in_the_middle_of_its_upload(web, way, how):
    """413 from a backend that reads no further: nobody waits for the rest."""
    def script(talk: Talk) -> None:
        talk.head()
        talk.say(reply(b"too much", "Connection: close", status="413 Content Too Large"))
        if how == "end":
            talk.finish()
        elif how == "reset":
            told.wait(20)
            talk.reset()
        told.wait(20)

    told = threading.Event()
    served = web(script)
    client = served.connect(request("POST").removesuffix(b"\r\n") + WAYS[way](b"x" * 10_000_000)[:200_000])
    answer = client.answer()
    told.set()
    assert (answer.status, answer.body) == (413, b"too much")
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            client.say(b"x" * 100_000)
    client.rest()


# -- Expect ------------------------------------------------------------------------------------

EXPECTS = request("PUT", "/", "Expect: 100-continue", "Content-Length: 5")


@pytest.mark.parametrize("interim", [[100], [103, 100], [100, 100], [100, 102, 103]])
def test_a_client_that_waits_for_100_gets_the_backends(web, interim):
    def script(talk: Talk) -> None:
        asked = talk.head()
        assert asked.get("Expect").lower() == "100-continue"
        assert talk.at == len(talk.heard)
        talk.say(*(b"HTTP/1.1 %d X\r\n\r\n" % status for status in interim))
        talk.say(reply(talk.exactly(5)))
        assert talk.request().target == "/next"
        talk.say(reply(b"next"))

    client = web(script).connect(EXPECTS)
    assert [client.head().status for _ in interim] == interim
    client.say(b"hello")
    assert client.answer().body == b"hello"
    client.say(request("GET", "/next"))
    assert client.answer().body == b"next"


def test_a_body_that_does_not_wait_for_100_is_passed_on(web):
    served = web(answering(lambda asked: reply(asked.body)))
    client = served.connect(EXPECTS + b"hello" + request("GET", "/next"))
    assert client.answer().body == b"hello" and client.answer().body == b""


def test_a_final_answer_instead_of_100_ends_both_connections(web):
    """The client may send its body or not: nobody can tell where the next request begins."""
    def script(talk: Talk) -> None:
        talk.head()
        talk.say(reply(b"no", status="403 Forbidden"))

    served = web(script)
    client = served.connect(EXPECTS)
    answer = client.answer()
    assert (answer.status, answer.body, answer.get("Connection")) == (403, b"no", "close")
    assert client.rest() == b"" and client.how == "end"
    served.origin.wait_over(1)


def test_an_old_client_gets_no_100(web):
    """It cannot wait for one, so the backend is not asked to send one."""
    asked = told(web().ask(request("PUT", "/", "Expect: 100-continue", body=b"hello", version="1.0")).body)
    assert asked.all("Expect") == [] and asked.body == b"hello"


# -- connections that are kept -----------------------------------------------------------------


def test_one_connection_to_the_backend_serves_a_client_that_stays(web):
    served = web()
    with served.connect() as client:
        for number in range(5):
            client.say(request("GET", f"/{number}"))
            client.answer()
    served.origin.wait_over(1)
    assert len(served.origin.talks) == 1


def test_no_connection_to_a_backend_serves_two_clients(web):
    served = web()
    for number in range(3):
        with served.connect(request()) as client:
            client.answer()
    assert len(served.origin.talks) == 3


def test_without_reuse_each_request_has_a_connection(web):
    served = web(http_reuse="off")
    client = served.connect()
    for number in range(3):
        client.say(request())
        client.answer()
    assert len(served.origin.talks) == 3


def test_safe_reuse_shares_idle_connections_but_never_for_a_first_request_or_a_body(web):
    served = web(http_reuse="safe")
    with served.connect(request("GET", "/1")) as client:
        client.answer()
        client.say(request("POST", "/2", body=b"x"))
        client.answer()
    with served.connect(request("GET", "/3")) as client:
        client.answer()
        assert [talk.heard.count(b"GET /3") for talk in served.origin.talks] == [0, 1]


def dying(*, at: int, answered: bytes = b"", ends: str = "end") -> Callable[[Talk], None]:
    """A script whose connection ends when request number `at` comes on it, with `answered` said of its answer."""
    def script(talk: Talk) -> None:
        for _ in range(at):
            if not (asked := talk.request()):
                return
            talk.say(reply(asked.method.encode() + asked.target.encode() + asked.body))
        if talk.request():
            talk.say(answered)
            talk.finish() if ends == "end" else talk.reset()
    return script


@pytest.mark.parametrize("ends", ["end", "reset"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"])
def test_a_request_on_a_kept_connection_that_ends_just_then_is_asked_once_more(web, method, ends):
    body = b"hello" * 1000 if method == "PUT" else None
    served = web(dying(at=1, ends=ends))
    client = served.connect(request("GET", "/first"))
    client.answer()
    client.say(request(method, "/again", body=body))
    answer = client.answer(method)
    assert answer.status == 200
    if method != "HEAD":
        assert answer.body == f"{method}/again".encode() + (body or b"")
    assert served.origin.heard.count(b"/again") == 2 and len(served.origin.talks) == 2


@pytest.mark.parametrize("method, body, said", [("POST", b"x", b""), ("PATCH", b"x", b""), ("PUT", b"x" * 70_000, b""),
                                                ("GET", None, b"HTTP/1.1 ")])
def test_what_may_have_been_done_is_not_done_twice(web, method, body, said):
    served = web(dying(at=1, answered=said))
    client = served.connect(request("GET", "/first"))
    client.answer()
    client.say(request(method, "/again", body=body))
    check_refusal(client.answer(), 502)
    assert served.origin.heard.count(b"/again") == 1


def test_a_new_connection_that_ends_is_no_reason_to_ask_again(web):
    served = web(dying(at=0))
    check_refusal(served.ask(request("GET", "/again")), 502)
    assert served.origin.heard.count(b"/again") == 1


def test_a_backend_that_ends_each_time_is_asked_twice_and_no_more(web):
    number = [0]

    def script(talk: Talk) -> None:
        number[0] += 1
        dying(at=1 if number[0] == 1 else 0)(talk)

    served = web(script)
    client = served.connect(request("GET", "/first"))
    client.answer()
    client.say(request("GET", "/again"))
    check_refusal(client.answer(), 502)
    assert served.origin.heard.count(b"/again") == 2


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_connection_that_has_ended_while_it_was_idle_is_not_used(web, method):
    """So a POST is not lost either: nothing of it was sent."""
    served = web(saying(reply(b"one"), ends="end"))
    client = served.connect(request("GET", "/first"))
    client.answer()
    served.origin.wait_over(1)
    client.say(request(method, "/again", body=b"x" if method == "POST" else None))
    assert client.answer().body == b"one" and len(served.origin.talks) == 2


class Steps:
    """A script that takes its steps when a test says so: `answers` has one for each request, b"" for the end."""

    def __init__(self, *answers: bytes):
        self.answers = list(answers)
        self.may, self.did = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, talk: Talk) -> None:
        while talk.request() and self.answers:
            answer = self.answers.pop(0)
            assert self.may.acquire(timeout=20)
            talk.say(answer)
            if self.answers and not self.answers[0]:
                self.answers.pop(0)
                talk.finish()
                self.did.release()
                return
            self.did.release()

    def step(self) -> None:
        """Have it take one, and wait until it is taken."""
        self.may.release()
        assert self.did.acquire(timeout=20)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_backend_that_ends_in_one_turn_with_the_next_request(web, method):
    """Its end was there before a byte was written, so nothing is lost; what may be said twice needs no look at that."""
    go, went = threading.Event(), threading.Event()

    def script(talk: Talk) -> None:
        talk.request()
        talk.say(reply(b"served"))
        if len(served.origin.talks) == 1:
            assert go.wait(20)
            talk.finish()
            went.set()

    served = web(script)
    client = served.connect(request())
    assert client.answer().body == b"served"
    with one_turn(served.running):
        client.say(request(method, "/next", body=b"x" if method == "POST" else None))
        go.set()
        assert went.wait(20)
    assert client.answer().body == b"served"
    assert served.origin.heard.count(b"/next") == 1 or method == "GET"


def test_an_answer_its_end_and_the_next_request_in_one_turn(web):
    script = Steps(reply(b"one"), b"", reply(b"two"), b"", reply(b"three"))
    served = web(script)
    client = served.connect(request("GET", "/1"))
    served.origin.wait_heard(b"/1")
    with one_turn(served.running):
        client.say(request("POST", "/2", body=b"x" * 1000) + request("GET", "/3"))
        script.step()
    assert client.answer().body == b"one"
    script.step()
    assert client.answer().body == b"two"
    script.step()
    assert client.answer().body == b"three"


def test_a_101_and_a_frame_that_did_not_wait_for_it_in_one_turn(web):
    script = Steps(shake() + frame(b"hello"))
    first, second = (frame(each, masked=True) for each in (b"first", b"second"))
    served = web(script)
    client = served.connect(request("GET", "/", *UPGRADE))
    served.origin.wait_heard(b"Upgrade")
    with one_turn(served.running):
        client.say(first)
        script.step()
    assert client.answer().status == 101 and read_frame(client) == (TEXT, b"hello")
    client.say(second)
    wait_until(lambda: served.origin.heard.endswith(b"\r\n\r\n" + first + second), what="both frames")


@pytest.mark.parametrize("ends", [[], [b""]], ids=["stays", "ends"])
def test_an_early_answer_and_the_rest_of_the_body_in_one_turn(web, ends):
    """The body may be whole by then: then the connection may go on, and the next request is answered, or it closes."""
    def script(talk: Talk) -> None:
        talk.head()
        assert go.wait(20)
        talk.say(reply(b"early"))
        went.set()
        if ends:
            return talk.finish()
        talk.exactly(50_000)
        while talk.request():
            talk.say(reply(b"next"))

    go, went = threading.Event(), threading.Event()
    served = web(script)
    client = served.connect(request("POST", "/", body=b"x" * 50_000)[:-40_000])
    served.origin.wait_heard(b"POST")
    with one_turn(served.running):
        go.set()
        assert went.wait(20)
        client.say(b"x" * 40_000 + request("GET", "/next"))
    assert client.answer().body == b"early"
    with contextlib.suppress(Cut):
        assert client.answer().status in (200, 502)


def test_a_client_that_is_gone_in_one_turn_with_its_answer(web):
    script = Steps(reply(b"one"), reply(b"two"))
    served = web(script)
    client = served.connect(request())
    served.origin.wait_heard(b"GET")
    with one_turn(served.running):
        script.step()
        client.reset()
    served.origin.wait_over(1)
    wait_until(lambda: served.running.endings, what="its end")


# -- routes ------------------------------------------------------------------------------------


def test_each_request_meets_its_own_route(run, origin, settings_file):
    """Its target, its `allow` and its `http`; a kept connection changes nothing."""
    a, b = origin(answering(reply(b"a"))), origin(answering(reply(b"b")))
    to_a, to_b = ("tcp:%s:%d" % each.address for each in (a, b))
    path = settings_file("[routes]\n" + "\n".join([
        f'"a.example.com" = {table(to_a, http="forward")}',
        f'"b.example.com" = {table(to_b, http="forward")}',
        f'"narrow.example.com" = {table(to_b, http="forward", allow=["192.0.2.0/24"])}',
        f'"*.example.com" = {table(to_b, http="redirect")}',
        f'"tls.example.com" = {table(to_b)}', ""]))
    running = run(f"--config={path}")

    def ask(host: str) -> Message:
        with call(running.address) as client:
            for name, body in (("a", b"a"), ("b", b"b"), ("a", b"a")):
                client.say(request("GET", "/", "Connection: keep-alive", host=f"{name}.example.com"))
                assert client.answer().body == body
            client.say(request("GET", "/evil", host=host) + request("GET", "/evil", host="a.example.com"))
            answer = client.answer()
            assert client.rest() == b""
            return answer

    check_refusal(ask("narrow.example.com"), 403)
    check_refusal(ask("nobody.example.org"), 404)
    assert ask("other.example.com").status == 308
    with call(running.address) as client:
        client.say(request("GET", "/", host="a.example.com"))
        client.answer()
        client.say(request("GET", "/evil", host="tls.example.com"))
        client.rest()
    assert b"evil" not in a.heard + b.heard
    rows = {(access.host, access.status, access.reason) for access in running.accesses}
    assert rows >= {("a.example.com", 200, ""), ("narrow.example.com", 403, "not_allowed"),
                    ("nobody.example.org", 404, "no_route"), ("other.example.com", 308, "")}


def test_a_route_without_http_closes_as_ever(run, origin):
    backend = origin()
    for options in ((), ("--http=refuse",)):
        running = run(route(backend.address, WEB), *options)
        with call(running.address, request()) as client:
            assert client.rest() == b""
    assert backend.heard == b"" and backend.talks == []


def test_tls_goes_through_beside_plain_http(run, origin):
    """On the same port, by the same route; not a byte of it is changed."""
    backend = origin(lambda talk: talk.say(b"a server hello") if talk.exactly(len(HELLO)) == HELLO else None)
    running = run(FORWARD, route(backend.address, NAME))
    with call(running.address, HELLO) as client:
        assert client.exactly(14) == b"a server hello"


def test_a_reload_takes_a_route_from_a_connection_that_is_kept(launch, origin, settings_file):
    a, b = origin(answering(reply(b"a"))), origin(answering(reply(b"b")))
    both = {f"{name}.example.com": table("tcp:%s:%d" % each.address, http="forward") for name, each in
            (("a", a), ("b", b))}

    def write(*names: str) -> str:
        return settings_file("[routes]\n" + "".join(f'"{name}" = {both[name]}\n' for name in names))

    program = launch(f"--config={write(*both)}")
    with call(program.address) as client:
        for name in ("a", "b", "a"):
            client.say(request(host=f"{name}.example.com"))
            assert client.answer().body == name.encode()
        write("a.example.com")
        program.signal(signal.SIGHUP)
        program.wait_for("reload: done")
        client.say(request(host="a.example.com"))
        assert client.answer().body == b"a"
        client.say(request(host="b.example.com"))
        check_refusal(client.answer(), 404)
        assert client.rest() == b""


def test_a_drain_ends_idle_connections_at_once_and_others_behind_their_answer(launch, origin):
    """Upgrades go on for as long as the drain lets them."""
    turn = threading.Event()

    def script(talk: Talk) -> None:
        while asked := talk.request():
            if asked.get("Upgrade"):
                talk.say(shake(asked.get("Sec-WebSocket-Key")))
                return talk.say(frame(read_frame(talk)[1]))
            if asked.target == "/slow":
                turn.wait(20)
            talk.say(reply(asked.target.encode()))

    backend = origin(script)
    program = launch(FORWARD, route(backend.address, WEB), "--drain=30s")
    with call(program.address, request()) as idle, call(program.address, request("GET", "/", *UPGRADE)) as chat, \
            call(program.address, request("GET", "/slow")) as busy:
        assert idle.answer().body == b"/" and chat.answer().status == 101
        backend.wait_heard(b"/slow")
        program.signal(signal.SIGTERM)
        assert idle.rest() == b"" and idle.how == "end"
        turn.set()
        answer = busy.answer()
        assert (answer.body, answer.get("Connection")) == (b"/slow", "close") and busy.rest() == b""
        chat.say(frame(b"still", masked=True))
        assert read_frame(chat) == (TEXT, b"still")
    assert program.wait() == 0


@pytest.mark.parametrize("kept", [False, True], ids=["first", "second"])
def test_a_request_waits_for_its_tunnel_and_its_body_with_it(run, origin, cloudflared, ports, kept):
    """What comes meanwhile belongs to it, whatever it looks like."""
    script, body = Noting(), EVIL * 10_000
    backend = origin(script)
    cloudflared.far("*", backend.address)
    running = run(FORWARD, ports, route(backend.address, WEB), "--route=cold.example.com=cloudflared:{name}")
    with call(running.address) as client:
        if kept:
            client.say(request())
            client.answer()
        said = request("POST", "/cold", host="cold.example.com", body=body)
        client.say(*(said[at:at + 20_000] for at in range(0, len(said), 20_000)))
        assert client.answer().body == b"/cold"
    assert script.found[kept:] == [("POST", "/cold", "cold.example.com", body)]


def test_a_tunnel_that_does_not_start_is_told(run, cloudflared, ports):
    cloudflared.fault("*", exit=1)
    running = run(FORWARD, ports, f"--route={WEB}=cloudflared:{{name}}", "--start-timeout=300ms")
    with call(running.address, request() + EVIL) as client:
        answer = client.answer()
        assert answer.status in (502, 504)
        check_refusal(answer, answer.status)
        assert client.rest() == b"" and b"127.0.0.1" not in answer.body


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("bad", ["refuses", "ends", "resets"])
def test_the_next_backend_is_asked_where_one_does_not_answer(run, origin, free_ports, method, bad):
    """A POST only where nothing of it can have been heard."""
    dead = origin(lambda talk: talk.more() and (talk.reset() if bad == "resets" else talk.finish()))
    good = origin(answering(lambda asked: reply(asked.body)))
    first = (HOST, free_ports(1)[0]) if bad == "refuses" else dead.address
    running = run(FORWARD, f"--route={WEB}=tcp:%s:%d,%s:%d" % (*first, *good.address))
    asked = 0
    for _ in range(4):
        with call(running.address, request(method, body=b"hello" if method == "POST" else None)) as client:
            answer = client.answer()
            if method == "POST" and bad != "refuses" and answer.status == 502:
                asked += 1
                continue
            assert (answer.status, answer.body) == (200, b"hello" if method == "POST" else b"")
    assert good.heard.count(b"\r\nVia: ") + asked == 4


def test_a_proxy_header_before_http_says_who_asks(web):
    client = web().connect(v1("TCP4 192.0.2.7 192.0.2.1 4711 80") + request())
    asked = told(client.answer().body)
    assert asked.get("X-Forwarded-For") == "192.0.2.7" == asked.get("X-Real-IP")


def test_a_request_that_comes_byte_by_byte(web):
    served = web()
    client = served.connect()
    for byte in request("POST", "/slow", body=b"hello"):
        client.say(bytes((byte,)))
    answer = client.answer()
    assert answer.body.startswith(b"POST /slow") and answer.body.endswith(b"\r\n\r\nhello")


@pytest.mark.parametrize("lines, status", [
    (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"], 403), (["Origin: http://evil.example.org"], 403),
    (["Origin: null"], 403), (["Sec-Fetch-Site: same-origin"], 200), ([f"Origin: http://{WEB}"], 200), ([], 200),
    (["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"], 200)])
def test_another_sites_page_asks_for_nothing_where_the_route_says_so(web, lines, status):
    served = web(cross_site="refuse")
    answer = served.ask(request("GET", "/", *lines))
    assert answer.status == status, answer
    if status == 403:
        check_refusal(answer, 403)
        assert served.origin.heard == b""


# A browser keeps a 308 for good: the option is for names that will not serve plain HTTP again.
@pytest.mark.parametrize("options, port", [({}, "own"), ({"redirect_port": 443}, ""),
                                           ({"redirect_port": 8443}, ":8443")])
@pytest.mark.parametrize("method, target", [("GET", "/"), ("POST", "/a/b?c=d&e=%20"), ("GET", "//evil.example.org/x"),
                                            ("HEAD", "/%0d%0aX:%20y"), ("GET", "/\\evil")])
def test_a_redirect_keeps_name_path_and_query_and_leads_nowhere_else(web, options, port, method, target):
    served = web(telling, http="redirect", **options)
    body = b"x" if method == "POST" else None
    answer = served.ask(request(method, target, host=f"{WEB.upper()}.", body=body), method)
    where = answer.get("Location")
    port = f":{served.address[1]}" if port == "own" else port
    assert answer.status == 308 and where.startswith(f"https://{WEB}{port}/"), where
    assert where.removeprefix(f"https://{WEB}{port}") == target
    assert served.origin.talks == []


def test_pass_leads_by_the_first_request_and_passes_every_byte(web):
    served = web(telling, http="pass")
    said = request("POST", "/", "X-Forwarded-For: 192.0.2.1", "Connection: keep-alive", body=b"hello")
    client = served.connect(said)
    assert client.answer().body == said
    other = request("GET", "/", host="unknown.example.org")
    client.say(other)
    assert client.answer().body == other, "which is what it is documented to be"


def test_a_refusal_of_head_has_no_body(web):
    with web().connect(request("HEAD", host="nobody.example.org") + EVIL) as client:
        check_refusal(client.answer("HEAD"), 404)
        assert client.rest() == b""


# -- a crowd -----------------------------------------------------------------------------------

CROWD, ROUNDS = 6, 40


def behave(talk: Talk) -> None:
    """A script that answers as it is told, with the number that it is told."""
    while asked := talk.request():
        body = f"{asked.get('X-Id')} ".encode() + asked.body
        way = asked.get("X-Way")
        if way == "chunks":
            talk.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(body[:1], body[1:]))
        elif way == "end":
            talk.say(b"HTTP/1.1 200 OK\r\n\r\n" + body)
            return talk.finish()
        elif way == "cut":
            talk.say(reply(body)[:-1])
            return talk.finish()
        else:
            talk.say(reply(body, *["Connection: close"] * (way == "close")))
            if way in ("close", "leaves"):  # it may leave at any moment, with a word or without
                return talk.finish()


@pytest.mark.parametrize("reuse", ["client", "safe", "off"])
def test_no_answer_is_anothers(web, reuse):
    """Clients in threads, each with a seed: pipelined, whole and cut, some that leave in the middle."""
    served = web(behave, http_reuse=reuse)
    faults: list[object] = []
    whole = [0] * CROWD

    def come(number: int) -> None:
        chance = random.Random(number)
        for turn in range(ROUNDS):
            asked = []
            for place in range(chance.randrange(1, 5)):
                way = chance.choice(("length", "length", "chunks", "chunks", "end", "cut", "close", "leaves"))
                method = chance.choice(("GET", "POST"))
                body = b"x" * chance.choice((0, 1, 5000, 200_000)) if method == "POST" else b""
                asked.append((f"{number}.{turn}.{place}", way, method, body))
            said = b"".join(request(method, "/", f"X-Id: {name}", f"X-Way: {way}").removesuffix(b"\r\n")
                            + WAYS[chance.choice(("length", "chunks"))](body) if method == "POST" else
                            request(method, "/", f"X-Id: {name}", f"X-Way: {way}") for name, way, method, body in asked)
            with call(served.address) as client, contextlib.suppress(ConnectionError):
                if chance.random() < 0.1:
                    client.say(said[:chance.randrange(len(said))])
                    client.reset()
                    continue
                sender = threading.Thread(target=talks, args=(client, said))
                sender.start()
                try:
                    for name, way, method, body in asked:
                        try:
                            answer = client.answer(method)
                        except TimeoutError:
                            faults.append((name, "nothing comes", asked))
                            break
                        except Cut as error:
                            if way != "cut" and error.part:
                                faults.append((name, way, error))
                            break
                        if answer.status != 200:  # the backend had just left
                            if answer.status != 502 or answer.get("Proxy-Status") is None:
                                faults.append((name, way, answer.head))
                            break
                        if way == "cut" or answer.body != name.encode() + b" " + body:
                            faults.append((name, way, answer.head, answer.body[:50]))
                        whole[number] += 1
                finally:
                    with contextlib.suppress(OSError):
                        client.sock.shutdown(socket.SHUT_RDWR)
                    sender.join()

    def talks(client: Talk, said: bytes) -> None:
        with contextlib.suppress(OSError):
            client.say(said)

    threads = [threading.Thread(target=come, args=(number,)) for number in range(CROWD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and min(whole) > ROUNDS // 2, (faults[:5], whole)
    wait_until(lambda: not served.running.router.connections, what="the end of all connections")


# -- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"G", b"GET / HT", request().removesuffix(b"\r\n"),
                                  request("GET", "/", "X: " + "y" * 20_000).removesuffix(b"\r\n")])
def test_a_slow_head_has_an_answer_in_time(web, said):
    served = web(telling, "--prelude-timeout=200ms", "--http-head-timeout=200ms")
    with one_turn(served.running):  # what they say first is there before their time begins
        client, second = served.connect(said), served.connect(request())
    second.answer()
    second.say(said)
    heard = client.rest()
    if said != b"G":
        check_refusal(parsed(heard), 408)
    check_refusal(second.answer(), 408)
    assert second.rest() == b""


def test_a_connection_that_asks_nothing_more_is_closed_without_a_word(web):
    """408 there would be taken for the answer to a request that is on its way."""
    served = web(telling, "--http-idle=200ms")
    client = served.connect(request())
    client.answer()
    assert client.rest() == b"" and client.how == "end"
    served.origin.wait_over(1)


@pytest.mark.parametrize("said", [request("POST", "/", "Content-Length: 50") + b"hello",
                                  request("POST", "/", "Transfer-Encoding: chunked") + b"32\r\nhello",
                                  request("POST", "/", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n"])
def test_a_slow_body_has_an_answer_in_time(web, said):
    """The backend never takes it for a whole one."""
    served = web(telling, "--http-idle=200ms")
    client = served.connect(said)
    check_refusal(client.answer(), 408)
    assert client.rest() == b""
    served.origin.wait_over(1)
    assert isinstance(served.origin.server.result(), Cut)


@pytest.mark.parametrize("answered", [b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_a_backend_that_hangs_has_an_answer_in_time(web, answered):
    served = web(lambda talk: talk.say(talk.request() and answered), "--http-response-timeout=200ms")
    client = served.connect(request())
    check_refusal(client.answer(), 504)
    assert client.rest() == b""
    served.origin.wait_over(1)


def test_a_backend_that_is_not_there_is_502(run, free_ports):
    running = run(FORWARD, route((HOST, free_ports(1)[0]), WEB))
    with call(running.address, request()) as client:
        check_refusal(client.answer(), 502)


@pytest.mark.parametrize("line", [b"5;" + b"x" * 5000, b"5" * 5000, b"0\r\n" + b"X: " + b"y" * 5000,
                                  b"0\r\n" + b"X: y\r\n" * 200, b"1;" + b"x" * 1000 + b"\r\nx\r\n"])
def test_an_endless_chunk_line_is_refused_before_it_ends(web, line):
    """So are chunks that are mostly extensions, without an end."""
    script = Noting()
    client = web(script).connect(request("POST", "/", "Transfer-Encoding: chunked"))
    with contextlib.suppress(ConnectionError):
        client.say(*([line] * 100 if line.startswith(b"1;") else [line]))
    check_refusal(client.answer(), 400)
    assert script.found == []


def test_ten_thousand_fields_are_refused(web):
    served = web()
    said = b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000
    check_refusal(served.ask(said), 431)
    assert served.origin.heard == b""


def resident(pid: int) -> int:
    """KiB of memory that a process has."""
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1])


@linux
@pytest.mark.parametrize("way", ["up", "up, in chunks", "down", "down, in one chunk", "down, without a length"])
def test_a_body_that_never_ends_takes_no_memory_while_its_reader_is_slow(launch, origin, way):
    """What is under way is what fits into the sockets; and all of it arrives once somebody reads."""
    piece, most = b"x" * 65536, 160 << 20  # the kernel gives a socket that is read quickly 32 MiB, and each side 4
    go = threading.Event()
    taken: list[int] = []

    def push(talk: Talk, frame_it: bool) -> int:
        """Send until nobody takes more."""
        talk.sock.settimeout(0.15)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < most:
                part = b"%x\r\n%b\r\n" % (len(piece), piece) if frame_it else piece
                sent += talk.sock.send(part)
        return sent

    def script(talk: Talk) -> None:
        if way.startswith("up"):
            talk.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            talk.head()
        else:
            talk.request()
            talk.say({"down": b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n",
                      "down, in one chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffff\r\n",
                      "down, without a length": b"HTTP/1.1 200 OK\r\n\r\n"}[way])
            taken.append(push(talk, False))
        go.wait(20)
        if not way.startswith("up"):
            talk.reset()

    backend = origin(script)
    program = launch(FORWARD, route(backend.address, WEB))
    with call(program.address) as client:
        client.say(request("GET", "/ready"))
        backend.wait_heard(b"/ready")
        before = resident(program.pid)
        if way.startswith("up"):
            with call(program.address) as sender:
                sender.say(request("POST", "/", "Content-Length: 100000000000") if way == "up" else
                           request("POST", "/", "Transfer-Encoding: chunked"))
                taken.append(push(sender, way != "up"))
        wait_until(lambda: taken, what="a sender that is held back")
        assert taken[0] < most // 2
        assert resident(program.pid) - before < 8 << 10
        go.set()


def test_a_client_that_leaves_takes_its_backend_connection_along(web):
    told = threading.Event()

    def script(talk: Talk) -> None:
        talk.request()
        told.set()
        talk.rest()

    served = web(script)
    client = served.connect(request())
    assert told.wait(20)
    client.reset()
    served.origin.wait_over(1)
    (access,) = wait_until(lambda: served.running.accesses, what="its line")
    assert (access.status, access.reason) == (0, "client_reset")


def test_a_request_is_written_down(web):
    served = web(answering(reply(b"12345")))
    served.ask(request("POST", "/a?secret=1", body=b"abc"))
    (access,) = wait_until(lambda: served.running.accesses, what="its line")
    assert (access.method, access.host, access.path, access.status) == ("POST", WEB, "/a", 200)
    assert (access.up, access.down, access.route, access.reason) == (3, 5, WEB, "")
    assert access.backend == "tcp:%s:%d" % served.origin.address or access.backend == "%s:%d" % served.origin.address
    assert 0 <= access.first <= access.seconds and access.client[0] == HOST


def test_limits_for_one_client_say_when_to_come_again(web):
    served = web(telling, "--max-per-client=1")
    who = v1("TCP4 192.0.2.7 192.0.2.1 4711 80")  # loopback is exempt
    first = served.connect(who + request())
    first.answer()
    answer = served.ask(who + request())
    check_refusal(answer, 429)
    assert int(answer.get("Retry-After")) > 0


def test_limits_of_a_route_count_connections_to_its_backend(web):
    go = threading.Event()

    def script(talk: Talk) -> None:
        talk.request()
        go.wait(20)
        talk.say(reply(b"served"))

    served = web(script, max_connections=1)
    first = served.connect(request("GET", "/one"))
    served.origin.wait_heard(b"/one")
    answer = served.ask(request())
    check_refusal(answer, 503)
    assert int(answer.get("Retry-After")) > 0
    go.set()
    assert first.answer().body == b"served"
