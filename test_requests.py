"""Tests of sniroute_requests.py and sniroute_bodies.py with the router in the test's process: what is counted, bounded,
tried again, and left behind.

What clients and backends see of each other is in test_web.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_connection
import sniroute_loop
import sniroute_requests
import sniroute_web
from conftest import HOST, linux, own_fds, wait_until
from sniroute_requests import AHEAD_MAX, INTERIM_MAX, REPLAYED_MAX, HttpConnection
from testbed.running import Running
from testbed.web import (UPGRADE, Cut, Talk, answering, call, check_refusal, chunks, reply, request, saying, shake,
                         table, telling)

A, B, C = "a.example.com", "b.example.com", "c.example.com"
Start = Callable[..., Running]


@pytest.fixture
def routed(run: Start, settings_file: Callable[[str], str]) -> Callable[..., Running]:
    """routed({name: (origin or target, {option: value})}, *options) -> Running; each route has http = "forward"."""
    def start(routes: dict[str, Any], *options: str) -> Running:
        return run(f"--config={settings_file(file_of(routes))}", *options)
    return start


def file_of(routes: dict[str, Any]) -> str:
    """A file of settings with these routes."""
    lines = []
    for name, (far, more) in routes.items():
        target = far if isinstance(far, (str, list)) else "tcp:%s:%d" % far.address
        lines.append(f'"{name}" = {table(target, **{"http": "forward", **more})}')
    return "\n".join(["[routes]", *lines, ""])


def reload(running: Running, settings_file: Callable[[str], str], routes: dict[str, Any]) -> None:
    """Have the router go on with other routes."""
    settings_file(file_of(routes))
    router = running.router
    settings = router.settings.again(router.settings)
    done = threading.Event()
    router.call(lambda: (router.adopt(settings), done.set()))
    assert done.wait(10)


def client_of(running: Running, *said: bytes) -> Talk:
    """A client that has said this."""
    return call(running.address, *said)


def only(running: Running) -> HttpConnection:
    """The one connection that there is, once it has asked."""
    wait_until(lambda: [type(each) for each in running.router.connections.copy()] == [HttpConnection],
               what="one client that asks")
    (connection,) = running.router.connections
    return connection


def tally(running: Running, name: str) -> Any:
    return running.router.routes.decide(name).tally


def get(target: str = "/", *lines: str, host: str = A) -> bytes:
    return request("GET", target, *lines, host=host)


def post(body: bytes, target: str = "/", *lines: str, host: str = A) -> bytes:
    return request("POST", target, *lines, host=host, body=body)


# -- one client, several routes ----------------------------------------------------------------


def test_each_route_counts_its_own_part_of_a_connection(routed, origin):
    a, b = origin(answering(reply(b"12345"))), origin(answering(reply(b"1234567")))
    running = routed({A: (a, {}), B: (b, {})})
    with client_of(running) as client:
        for host, active in ((A, (1, 0)), (A, (1, 0)), (B, (0, 1)), (A, (1, 0))):
            client.say(get(host=host))
            client.answer()
            assert (tally(running, A).active, tally(running, B).active) == active
    running.ending()
    of_a, of_b = tally(running, A), tally(running, B)
    assert (of_a.active, of_b.active, of_a.total, of_b.total) == (0, 0, 2, 1)
    up, down = 3 * len(get()) + len(get(host=B)), 3 * len(reply(b"12345")) + len(reply(b"1234567"))
    assert (of_a.up + of_b.up, of_a.down + of_b.down) == (up, down)
    assert of_b.down == len(reply(b"1234567"))
    assert (running.counter("bytes_up"), running.counter("bytes_down")) == (up, down)
    assert [(each.host, each.route) for each in running.accesses] == [(A, A), (A, A), (B, B), (A, A)]


def test_a_route_that_is_full_is_full_for_a_later_request_too(routed, origin):
    told = threading.Event()

    def script(talk: Talk) -> None:
        while talk.request():
            told.wait(10)
            talk.say(reply(b"b"))

    a, b = origin(answering(reply(b"a"))), origin(script)
    running = routed({A: (a, {}), B: (b, {"max_connections": 1})})
    with client_of(running, get(host=B)) as first, client_of(running, get()) as second:
        b.wait_heard(b"GET")
        assert second.answer().body == b"a"
        second.say(get(host=B))
        check_refusal(second.answer(), 503)
        assert second.rest() == b""
        told.set()
        assert first.answer().body == b"b"
        first.say(get())  # which makes room
        assert first.answer().body == b"a"
        with client_of(running, get(host=B)) as third:
            assert third.answer().body == b"b"
    assert len(b.talks) == 2


def test_who_may_not_use_a_route_may_not_in_a_later_request(routed, origin):
    a, b = origin(answering(reply(b"a"))), origin()
    running = routed({A: (a, {}), B: (b, {"allow": ["192.0.2.0/24"]})})
    with client_of(running, get()) as client:
        client.answer()
        client.say(get("/evil", host=B))
        check_refusal(client.answer(), 403)
        assert client.rest() == b""
    assert b.heard == b"" and tally(running, B).active == 0 and tally(running, A).active == 0


CHANGES: dict[str, tuple[dict[str, Any], int]] = {
    "nothing": ({}, 200), "allow": ({"allow": ["192.0.2.0/24"]}, 403), "redirect": ({"http": "redirect"}, 308),
    "refuse": ({"http": "refuse"}, 421), "pass": ({"http": "pass"}, 421),
    "full": ({"max_connections": 1}, 200), "host": ({"host": "other.example.com"}, 200),
}


@pytest.mark.parametrize("change, status", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("reuse", ["client", "safe"])
def test_the_next_request_meets_the_settings_of_now(routed, origin, settings_file, change, status, reuse):
    """Whatever the settings were when its connection, or that to its backend, began."""
    a = origin()
    keeps = {"http_reuse": reuse} if change.get("http", "forward") == "forward" else {}
    running = routed({A: (a, {"http_reuse": reuse}), B: (a, {})})
    with client_of(running, get()) as client, client_of(running, get(host=B)) as other, \
            client_of(running, get()) as leaves:
        client.answer(), other.answer(), leaves.answer()
        reload(running, settings_file, {A: (a, {**keeps, **change}), B: (a, {})})
        leaves.sock.close()  # what it leaves behind is decided by settings that are no more
        wait_until(lambda: len(running.router.connections) == 2)
        client.say(get("/next"))
        answer = client.answer()
        assert answer.status == status
        if "host" in change:
            assert b"\r\nHost: other.example.com\r\n" in answer.body
        if status != 200:
            assert client.rest() == b""
        other.say(get("/next"))
        assert other.answer().status == (503 if "max_connections" in change else status)


def test_a_request_that_is_under_way_when_the_settings_change_goes_on(routed, origin, settings_file):
    told = threading.Event()
    a = origin(lambda talk: (talk.request(), told.wait(10), talk.say(reply(b"late")), talk.request()))
    running = routed({A: (a, {})})
    with client_of(running, get()) as client:
        a.wait_heard(b"GET")
        reload(running, settings_file, {B: (a, {})})
        told.set()
        assert client.answer().body == b"late"
        client.say(get())
        check_refusal(client.answer(), 404)


# -- ends --------------------------------------------------------------------------------------


def test_a_drain_lets_an_upload_go_on_and_closes_behind_its_answer(routed, origin):
    a = origin(answering(lambda asked: reply(b"%d" % len(asked.body))))
    running = routed({A: (a, {})})
    said = post(b"x" * 100_000)
    with client_of(running, said[:50_000]) as busy, client_of(running, get()) as idle, \
            client_of(running, get()) as begun, client_of(running, get() + get("/sec")[:10]) as second:
        idle.answer(), begun.answer(), second.answer()
        begun.say(get("/next")[:10])
        a.wait_heard(b"POST")
        wait_until(lambda: len(running.router.web.heads.due) == 2)
        running.router.drain(30)
        assert idle.rest() == b"" and idle.how == "end"
        busy.say(said[50_000:])
        for client, rest in ((busy, b""), (begun, get("/next")[10:]), (second, get("/sec")[10:])):
            client.say(rest)
            answer = client.answer()
            assert (answer.status, answer.get("Connection")) == (200, "close")
            assert client.rest() == b"" and client.how == "end"
    running.thread.join(10)
    assert not running.thread.is_alive()


@pytest.mark.parametrize("count", [1, 2, 20])
def test_a_client_that_says_all_and_ends_gets_all_its_answers(routed, origin, count):
    """As `printf ... | nc`: its end says that it asks no more, and not that it has left."""
    told = threading.Event()

    def script(talk: Talk) -> None:
        while asked := talk.request():
            told.wait(10)
            talk.say(reply(asked.target.encode() + asked.body))

    a, b = origin(script), origin(script)
    running = routed({A: (a, {}), B: (b, {})})
    said = [post(b"x", f"/{number}", host=(A, B)[number % 2]) for number in range(count)]
    with client_of(running, *said) as client:
        client.finish()
        a.wait_heard(b"POST")
        wait_until(lambda: only(running).has_ended)
        told.set()
        for number in range(count):
            answer = client.answer()
            assert answer.body == b"/%dx" % number
            assert answer.get("Connection") == ("close" if number == count - 1 else None)
        assert client.rest() == b"" and client.how == "end"
    assert running.ending().reason == "client_closed"


def test_a_client_that_ends_within_a_request_has_its_answer_before_that(routed, origin):
    a = origin()
    running = routed({A: (a, {})})
    with client_of(running, get() + get("/cut")[:-4]) as client:
        client.finish()
        assert client.answer().status == 200
        assert client.rest() == b""
    assert b"/cut" not in a.heard


@pytest.mark.parametrize("ends", ["end", "reset"])
def test_a_client_that_ends_within_its_body_has_asked_nothing(routed, origin, ends):
    a = origin(telling)
    running = routed({A: (a, {})})
    with client_of(running, post(b"x" * 1000)[:-1]) as client:
        a.wait_heard(b"xxx")
        client.finish() if ends == "end" else client.reset()
        a.wait_over(1)
        assert isinstance(a.server.result(), Cut)
    access = wait_until(lambda: running.accesses)[0]
    assert access.reason in ("client_left", "client_reset") and access.status == 0


def test_a_client_that_ends_and_gets_no_answer_is_not_waited_for_for_ever(routed, origin, monkeypatch):
    monkeypatch.setattr(sniroute_web, "LEFT_PATIENCE", 0.1)
    a = origin(lambda talk: talk.rest())
    running = routed({A: (a, {})})
    with client_of(running, get()) as client:
        a.wait_heard(b"GET")
        client.finish()
        assert client.rest() == b""
    assert running.ending().reason == "client_left"


def test_a_client_that_has_ended_while_it_waited_is_not_waited_for_for_ever_either(routed, cloudflared, origin, ports,
                                                                                    monkeypatch):
    monkeypatch.setattr(sniroute_web, "LEFT_PATIENCE", 0.1)
    a = origin(lambda talk: talk.rest())
    cloudflared.far("*", a.address)
    cloudflared.fault("*", listen_delay=100)
    running = routed({"*.example.com": ("cloudflared:{name}", {})}, ports)
    with client_of(running, get()) as client:
        client.finish()
        assert client.rest() == b""
    assert running.ending().reason == "client_left"
    a.wait_heard(b"GET")


# -- bounds ------------------------------------------------------------------------------------


def test_what_a_client_asks_ahead_is_bounded_and_answered(routed, origin):
    told = threading.Event()

    def script(talk: Talk) -> None:
        while asked := talk.request():
            told.wait(10)
            talk.say(reply(asked.target.encode()))

    running = routed({A: (origin(script), {})})
    said = b"".join(get(f"/{number}", "X: " + "y" * 2000) for number in range(200))
    with client_of(running) as client:
        sender = threading.Thread(target=client.say, args=(said,))
        sender.start()
        wait_until(lambda: len(only(running).ahead) >= AHEAD_MAX)
        assert len(only(running).ahead) < AHEAD_MAX + 4096
        told.set()
        for number in range(200):
            assert client.answer().body == b"/%d" % number
        sender.join()


def held_back(running: Running) -> HttpConnection | None:
    """The one connection, where its backend is not there, and its client is not read any more."""
    for connection in running.router.connections.copy():
        if isinstance(connection, HttpConnection) and connection.state == "dialing" and not connection.up.events:
            return connection
    return None


@pytest.mark.parametrize("way", ["length", "chunks"])
def test_what_a_client_says_to_a_backend_that_is_not_there_yet_is_bounded(routed, deaf, way):
    running = routed({A: ("tcp:%s:%d" % deaf, {})})
    body = post(b"x" * 1_000_000) if way == "length" else request(
        "POST", "/", "Transfer-Encoding: chunked", host=A) + chunks(*[b"x" * 1000] * 1000)
    with client_of(running) as client:
        client.sock.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            client.say(body)
        connection = wait_until(lambda: held_back(running))
        assert REPLAYED_MAX <= len(connection.hello) < REPLAYED_MAX + 4096 and not connection.ahead
        client.reset()


def test_requests_behind_one_that_waits_are_bounded_too(routed, deaf):
    running = routed({A: ("tcp:%s:%d" % deaf, {})})
    with client_of(running) as client:
        client.sock.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            client.say(get() + b"".join(get("/more", "X: " + "y" * 4000) for _ in range(1000)))
        connection = wait_until(lambda: held_back(running))
        assert AHEAD_MAX <= len(connection.ahead) < AHEAD_MAX + 4096 and len(connection.hello) < 1000
        client.reset()


@pytest.mark.parametrize("size", [REPLAYED_MAX // 2, REPLAYED_MAX * 2])
def test_a_request_is_kept_to_be_sent_again_up_to_a_size(routed, origin, size):
    told = threading.Event()
    a = origin(lambda talk: (talk.say(reply()) if talk.request() else None, talk.head(), told.wait(10),
                             talk.sock.close()))
    running = routed({A: (a, {})})
    said = request("PUT", "/", host=A, body=b"x" * size)
    with client_of(running, get()) as client:
        client.answer()
        client.say(said[:-1])
        a.wait_heard(b"PUT")
        wait_until(lambda: only(running).exchange.up == size - 1)
        kept = only(running).hello
        assert (kept is None) == (size > REPLAYED_MAX) and len(kept or b"") <= REPLAYED_MAX
        told.set()
        if kept is None:
            check_refusal(client.answer(), 502)


def test_an_upload_to_a_backend_that_does_not_read_is_held_back(routed, origin, flow):
    """Whatever moves its bytes; with splice(2) they are in a pipe."""
    told = threading.Event()

    def script(talk: Talk) -> None:
        talk.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        head = talk.head()
        told.wait(20)
        talk.say(reply(b"%d" % len(talk.body(head))))

    size = 24 << 20
    running = routed({A: (origin(script), {})})
    with client_of(running) as client:
        sender = threading.Thread(target=client.say, args=(post(b"x" * size),))
        sender.start()
        wait_until(lambda: only(running).up.state == "blocked")
        up, pipes = only(running).up, running.router.pipes
        assert up.total < size and pipes.pending <= 1 << 16
        assert up.lent is not None or len(up.pending) <= 1 << 16
        told.set()
        sender.join()
        assert client.answer().body == b"%d" % size
        assert pipes.pending == 0


# -- what happens in one turn of the loop ------------------------------------------------------


@contextlib.contextmanager
def one_turn(running: Running) -> Iterator[None]:
    """The loop waits meanwhile: it meets all that happens in one turn, in this order."""
    waits, go = threading.Event(), threading.Event()
    running.router.call(lambda: (waits.set(), go.wait(10)))
    assert waits.wait(10)
    try:
        yield
    finally:
        go.set()


def test_a_body_that_comes_in_the_turn_of_the_answer_before_it_is_no_request(routed, origin):
    """Its backend is not there yet."""
    told = threading.Event()
    a = origin(lambda talk: (talk.request(), told.wait(10), talk.say(reply(b"a")), said.set(), talk.rest()))
    b = origin(answering(lambda asked: reply(asked.body)))
    said, evil = threading.Event(), get("/evil")
    running = routed({A: (a, {}), B: (b, {})})
    with client_of(running, get(), post(b"x" + evil, host=B)[:-len(evil)]) as client:
        a.wait_heard(b"GET")
        wait_until(lambda: only(running).ahead)
        with one_turn(running):
            told.set()
            assert said.wait(10)
            client.say(evil)
        assert client.answer().body == b"a"
        assert client.answer().body == b"x" + evil
        client.say(get("/last"))
        assert client.answer().status == 200 and b"/evil" not in a.heard


@linux
def test_a_body_whose_backend_has_gone_reaches_nobody_who_comes_in_the_same_turn(routed, origin, monkeypatch):
    """Who has the descriptor that its backend had.  The kernel may tell of the three in any order: this one is bad."""
    first: list[int] = []
    right = sniroute_loop.EpollPoller.poll

    def poll(self: sniroute_loop.EpollPoller, timeout: float) -> list[tuple[int, int]]:
        return sorted(right(self, timeout), key=lambda event: first.index(event[0]) if event[0] in first else 9)

    monkeypatch.setattr(sniroute_loop.EpollPoller, "poll", poll)
    told, gone = threading.Event(), threading.Event()

    def script(talk: Talk) -> None:
        talk.request()
        talk.say(reply(b"first"))
        if len(a.talks) == 1:
            talk.head()
            told.wait(10)
            talk.finish()  # the number of its own descriptor stays in use
            gone.set()
        elif asked := talk.request():
            talk.say(reply(asked.body))

    a = origin(script)
    running = routed({A: (a, {})})
    with client_of(running, get()) as client:
        client.answer()
        a.script = answering(lambda asked: reply(asked.body))
        client.say(request("PUT", "/", host=A, body=b"x" * 1000)[:-500])
        a.wait_heard(b"x" * 500)
        with contextlib.ExitStack() as stack:
            first += only(running).down.fd, running.router.listeners[0].fileno()
            with one_turn(running):
                while (filler := os.dup(0)) < first[0]:  # the next one that is free will be that
                    stack.callback(os.close, filler)
                os.close(filler)
                told.set()
                assert gone.wait(10)
                other = stack.enter_context(client_of(running))
                client.say(b"x" * 500)
            assert client.answer().body == b"x" * 1000
            other.say(get())
            assert other.answer().first == "HTTP/1.1 200 OK"


# -- answers with 1xx --------------------------------------------------------------------------

HINT = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


@pytest.mark.parametrize("count, status", [(INTERIM_MAX, 200), (INTERIM_MAX + 1, 502)])
@pytest.mark.parametrize("pieces", [True, False])
def test_a_backend_may_say_often_that_it_still_works_and_not_for_ever(routed, origin, count, status, pieces):
    def script(talk: Talk) -> None:
        talk.request()
        said = HINT * count + reply(b"done")
        talk.say(*([said[at:at + 1000] for at in range(0, len(said), 1000)] if pieces else [said]))

    running = routed({A: (origin(script), {})})
    with client_of(running, get()) as client:
        answer = client.answer()
        assert len(answer.interim) == INTERIM_MAX and answer.status == status


def test_hints_and_an_answer_reach_a_client_that_does_not_read_for_a_while(routed, origin):
    """All of them: what it has not taken yet is not replaced by what comes next."""
    large = b"HTTP/1.1 103 Early Hints\r\nLink: <%b>\r\n\r\n" % (b"x" * 30_000)
    running = routed({A: (origin(saying(reply(b"first"), large * 90 + reply(b"done" * 10_000), reply(b"next"))), {})})
    with client_of(running, get()) as client:
        client.answer()
        down = only(running).down
        only(running).client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        client.say(get("/hints"))
        wait_until(lambda: down.state == "blocked")
        answer = client.answer()
        assert answer.body == b"done" * 10_000 and len(answer.interim) == 90
        assert {len(each.head) for each in answer.interim} == {len(large)}
        client.say(get("/next"))
        assert client.answer().body == b"next"
    wait_until(lambda: running.router.pipes.pending == 0)


# -- several backends, tunnels -----------------------------------------------------------------


def closing(talk: Talk) -> None:
    """A script that closes without an answer."""
    if talk.request():
        talk.sock.close()


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "POST", "PATCH"])
@pytest.mark.parametrize("first", ["down", "closes"])
def test_where_the_first_of_several_backends_fails_the_next_is_asked(routed, origin, free_ports, method, first):
    """But what was sent, and may have been done, is not sent to another."""
    bad, good = origin(closing), origin(telling)
    dead = "tcp:%s:%d" % (bad.address if first == "closes" else (HOST, free_ports(1)[0]))
    running = routed({A: ([dead, "tcp:%s:%d" % good.address], {"balance": "first"})})
    body = b"hello" if method[0] == "P" else None
    with client_of(running, request(method, "/x", host=A, body=body)) as client:
        answer = client.answer(method)
        if first == "closes" and method in ("POST", "PATCH"):
            check_refusal(answer, 502)
            assert not good.talks
        else:
            assert answer.status == 200 and good.heard.count(b"/x") == 1
            assert method == "HEAD" or answer.body.endswith(b"\r\n\r\n" + (body or b""))
            client.say(get("/again"))
            assert client.answer().body.startswith(b"GET /again")
            assert len(good.talks) == 1
    assert bad.heard.count(b"/x") == (first == "closes")


def test_a_request_in_pieces_reaches_the_next_backend_whole(routed, origin):
    """Its body comes while the first backend has it; that closes in the middle."""
    def script(talk: Talk) -> None:
        talk.until(b"one")
        talk.sock.close()

    bad, good = origin(script), origin(telling)
    running = routed({A: (["tcp:%s:%d" % each.address for each in (bad, good)], {"balance": "first"})})
    said = request("PUT", "/", host=A, body=b"one-two-three")
    with client_of(running, said[:-10]) as client:
        good.wait_heard(b"one")
        client.say(b"-two-", b"three")
        answer = client.answer()
        assert answer.status == 200 and answer.body.endswith(b"\r\n\r\none-two-three")


@pytest.mark.parametrize("ends", ["end", "reset"])
def test_an_upload_whose_kept_connection_ends_in_the_middle_is_sent_again_whole(routed, origin, ends):
    """While the client goes on to send it: none of it is lost between the two connections."""
    seen = threading.Event()

    def script(talk: Talk) -> None:
        talk.request()
        talk.say(reply(b"first"))
        if len(a.talks) > 1:
            return
        talk.head()
        talk.finish() if ends == "end" else talk.reset()
        seen.set()

    a = origin(script)
    running = routed({A: (a, {})})
    pieces = [b"%05d" % number for number in range(2000)]
    with client_of(running, get()) as client:
        client.answer()
        a.script = lambda talk: talk.say(reply(talk.request().body))
        client.say(request("PUT", "/", f"Content-Length: {5 * len(pieces)}", host=A))
        assert seen.wait(10)
        client.say(*pieces)
        assert client.answer().body == b"".join(pieces)


def test_a_cold_name_waits_for_its_tunnel_and_is_answered(routed, cloudflared, origin, ports):
    a = origin(telling)
    cloudflared.far("*", a.address)
    cloudflared.fault("*", listen_delay=200)
    running = routed({"*.example.com": ("cloudflared:{name}", {})}, ports)
    held, wait = threading.Event(), running.tunnels.wait
    running.tunnels.wait = lambda *words: held.wait(20) and wait(*words)  # until all that is asked is asked
    said = post(b"hello" * 1000)
    with client_of(running, said[:300]) as client, client_of(running, get("/one") + get("/two")) as second, \
            client_of(running, get("/half")) as half:
        half.finish()
        wait_until(lambda: len(running.router.connections) == 3 and running.router.waits.by_key)
        client.say(said[300:], get("/next"))
        held.set()
        assert client.answer().body.endswith(b"hello" * 1000)
        assert client.answer().body.startswith(b"GET /next")
        assert second.answer().body.startswith(b"GET /one") and second.answer().body.startswith(b"GET /two")
        assert half.answer().body.startswith(b"GET /half") and half.rest() == b""
    assert len(cloudflared.starts()) == 1


@pytest.mark.parametrize("dies", [True, False], ids=["its process", "its client"])
@pytest.mark.parametrize("method, behind, status", [("GET", b"", 200), ("GET", get("/next"), 200), ("PUT", b"", 200),
                                                    ("POST", b"", 502)], ids=["GET", "GET, GET", "PUT", "POST"])
def test_a_request_whose_tunnel_fails_is_asked_once_more_where_that_may_be(routed, cloudflared, origin, ports, dies,
                                                                            method, behind, status, monkeypatch):
    a = origin()
    cloudflared.far("*", a.address)
    cloudflared.fault("*", **({"exit_on_client": True} if dies else {"refuse": 1}))
    running = routed({"*.example.com": ("cloudflared:{name}", {})}, ports)
    right = running.tunnels.wait

    def wait(*words: Any) -> None:
        if cloudflared.starts() and dies:
            cloudflared.fault("*")
        right(*words)

    monkeypatch.setattr(running.tunnels, "wait", wait)
    body = b"hello" if method[0] == "P" else None
    with client_of(running, request(method, "/x", host=A, body=body) + behind) as client:
        answer = client.answer(method)
        if method == "POST" and dies and answer.status == 200:  # it died before it was told a byte
            assert a.heard.count(b"POST /x") == 1
            return
        assert answer.status == status
        if status == 200:
            assert answer.body.startswith(f"{method} /x".encode()) and answer.body.endswith(body or b"")
            assert len(cloudflared.starts()) == 1 + dies
        else:
            check_refusal(answer, 502)
            assert a.heard == b""
        if behind:
            assert client.answer().body.startswith(b"GET /next")


def test_a_tunnel_that_never_works_is_asked_twice(routed, cloudflared, ports):
    cloudflared.fault("*", refuse=True)
    running = routed({"*.example.com": ("cloudflared:{name}", {})}, ports)
    with client_of(running, get()) as client:
        check_refusal(client.answer(), 502)
    assert len(cloudflared.clients()) == 2


# -- deadlines ---------------------------------------------------------------------------------


def test_a_body_that_stops_is_late_also_behind_other_requests(routed, origin):
    """While the router looks for idle connections, too: each has a memory of its own."""
    a = origin()
    running = routed({A: (a, {"connection_idle": "2s"})}, "--http-idle=300ms")
    running.router.web.idle.seconds = 60.0  # between the two requests
    with client_of(running, get()) as client:
        client.answer()
        client.say(post(b"x" * 100)[:-1])
        check_refusal(client.answer(), 408)


def test_an_upload_may_pause_once_its_answer_has_begun(routed, origin):
    """As where both sides talk at a time; the limit for idle connections is for that."""
    def script(talk: Talk) -> None:
        head = talk.head()
        talk.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\nbegun\r\n")
        talk.say(chunks(talk.body(head)))

    running = routed({A: (origin(script), {})}, "--http-idle=100ms")
    running.router.web.bodies.seconds = 60.0  # until then
    said = post(b"hello")
    with client_of(running, said[:-2]) as client:
        client.until(b"begun\r\n")
        assert only(running).queue is None
        client.say(said[-2:])
        assert client.until(b"0\r\n\r\n").startswith(b"5\r\nhello\r\n")
        assert client.rest() == b""


def test_a_body_that_trickles_is_not_late(routed, origin):
    a = origin()
    running = routed({A: (a, {})}, "--http-idle=50s")
    queue = running.router.web.bodies
    said = post(b"x" * 8)

    def expire() -> None:
        for connection in queue.due:
            queue.due[connection] = running.router.loop.next_check = 0.0

    with client_of(running, said[:-8]) as client:
        for at in range(8):
            wait_until(lambda: queue.due)
            before = next(iter(queue.due.values()))
            client.say(b"x")
            if at < 7:
                wait_until(lambda: only(running).exchange.up == at + 1)
                running.router.call(expire)
                wait_until(lambda: max(list(queue.due.values()), default=0.0) > before)
        assert client.answer().status == 200


def test_the_time_for_an_answer_begins_when_all_is_asked_and_ends_with_its_head(routed, origin):
    turn = threading.Semaphore(0)

    def script(talk: Talk) -> None:
        talk.request()
        for part in (b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 4\r\n\r\nab", b"cd"):
            turn.acquire()
            talk.say(part)

    running = routed({A: (origin(script), {})}, "--http-response-timeout=60s", "--http-idle=50s")
    web = running.router.web
    said = post(b"hello")
    with client_of(running, said[:-2]) as client:
        wait_until(lambda: len(web.bodies.due) == 1)
        assert not web.answers.due
        client.say(said[-2:])
        wait_until(lambda: len(web.answers.due) == 1)
        assert not web.bodies.due
        turn.release()
        wait_until(lambda: only(running).stash)
        assert len(web.answers.due) == 1, "a part of a head is no answer"
        turn.release()
        client.until(b"ab")
        assert not web.answers.due and not web.idle.due
        turn.release()
        client.until(b"cd")
        wait_until(lambda: len(web.idle.due) == 1)
        client.say(b"GET")
        wait_until(lambda: len(web.heads.due) == 1 and not web.idle.due)


# -- what is left behind -----------------------------------------------------------------------


def talk_of_all_kinds(running: Running) -> None:
    """Clients that end in every way."""
    with client_of(running, get()) as client:
        client.answer()
        client.say(post(b"x" * 70_000), get(host=B), b"nonsense")
        for _ in range(2):
            assert client.answer().status == 200
        client.rest()
    for said in (get(host="unknown.example.com"), get(host=C), b"GET / HTTP/1.1\r\n\r\n", get("/", *UPGRADE),
                 get("/cut"), get("/bad"), request("OPTIONS", "/", "Max-Forwards: 0", host=A)):
        with client_of(running, said) as client:
            client.head()
            with contextlib.suppress(OSError):  # it was cut
                client.finish()
            client.rest()
    for said in (b"GET / HT", get("/hang"), post(b"x")[:-1], get("/large")):
        with client_of(running, said) as client:
            wait_until(lambda: running.router.connections)
            client.reset()
    wait_until(lambda: not running.router.connections)


def of_all_kinds(talk: Talk) -> None:
    while asked := talk.request():
        if asked.get("Upgrade"):
            talk.say(shake(asked.get("Sec-WebSocket-Key")))
            return
        said = {"/cut": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", "/bad": b"SSH-2.0\r\n\r\n", "/hang": b"",
                "/large": reply(b"x" * 3_000_000)}.get(asked.target, reply(b"x"))
        talk.say(said)
        if asked.target in ("/cut", "/bad"):
            return talk.sock.close()


def test_nothing_is_left_to_the_collector_and_no_descriptor_is_left(routed, origin):
    a, b = origin(of_all_kinds), origin(of_all_kinds)
    running = routed({A: (a, {"http_reuse": "safe"}), B: (b, {}), C: (a, {"http": "redirect"})})
    running.part_early()
    talk_of_all_kinds(running)
    running.router.call(running.router.web.spares.close)
    wait_until(lambda: a.over == len(a.talks) and b.over == len(b.talks) and not running.router.connections)
    gc.collect()
    pipes = running.router.pipes

    def held() -> int:  # without pipes, of which some are kept
        return len(own_fds()) - 2 * pipes.made

    fds = held()
    gc.disable()
    try:
        for _ in range(3):
            talk_of_all_kinds(running)
        done = threading.Event()
        running.router.call(lambda: (running.router.web.spares.close(), running.router.call(done.set)))
        assert done.wait(10)
        left = [each for each in gc.get_objects()
                if isinstance(each, (sniroute_connection.Connection, sniroute_requests.Exchange))]
        assert len(left) <= 1, "the loop may still have one in its hands"
    finally:
        gc.enable()
    wait_until(lambda: a.over == len(a.talks) and b.over == len(b.talks))
    # Perhaps something of before was still to be closed when they were counted: three talks would leave more than that.
    wait_until(lambda: held() <= fds, what="all descriptors closed")
    assert pipes.pending == 0 and not running.counter("internal")


FAULTS = "hop", "choose_upgrade", "pass_request", "open_body", "parse_response", "pass_response"


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("name", [*FAULTS, "tell"])
def test_a_fault_of_ours_ends_one_connection_only(routed, origin, monkeypatch, name, is_first):
    a = origin()
    running = routed({A: (a, {})})
    owner = sniroute_web.Web if name == "tell" else sniroute_requests
    right = getattr(owner, name)

    def wrong(*words: Any) -> None:
        monkeypatch.setattr(owner, name, right)
        raise ZeroDivisionError("on purpose")

    with client_of(running, get("/one")) as other, client_of(running) as client:
        other.answer()
        if not is_first:
            client.say(get())
            client.answer()
        wait_until(lambda: len(running.accesses) == 2 - is_first)
        monkeypatch.setattr(owner, name, lambda *words, **more: wrong())
        client.say(post(b"hello", "/evil"))
        client.rest()
        other.say(get("/two"))
        assert other.answer().body.startswith(b"GET /two")
        assert running.ending().reason == "internal"
        a.wait_over(len(a.talks) - 1)
