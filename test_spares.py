"""Tests of sniroute_spares.py: connections to backends that serve another client (`http_reuse = "safe"`).

First by hand: the loop runs in the thread of the test, a turn at a time, and its clock is moved.  Then a router between
clients and backends, which know each connection by its number.
"""

from __future__ import annotations

import socket
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_loop
import sniroute_spares
from conftest import FakeClock, wait_until
from sniroute_loop import Loop
from sniroute_spares import SPARE_IDLE, Spares
from sniroute_targets import Backend
from testbed.hellos import v1
from testbed.running import Running
from testbed.web import UPGRADE, Message, Origin, Talk, reply, request, shake, table

KEY, OTHER = ("a", None), ("b", None)


# -- by hand -----------------------------------------------------------------------------------


class Way(Backend):
    """A way that tells how often it was released."""

    def __init__(self) -> None:
        super().__init__("tcp:web.example.com:80", (), True)
        self.released = 0

    def release(self) -> None:
        self.released += 1


class Lab:
    """A loop, its spares, and the other ends of those."""

    def __init__(self, clock: FakeClock):
        self.clock = clock
        self.faults: list[Any] = []
        self.loop = Loop(self.faults.append)
        self.spares = Spares(self.loop)
        self.ends: list[socket.socket] = []
        self.ways: list[Way] = []

    def give(self, key: Any = KEY) -> socket.socket:
        """Give one; returns its backend's end."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.settimeout(5)
        self.ends.append(theirs)
        self.ways.append(Way())
        self.spares.give(key, ours, self.ways[-1], None)
        return theirs

    def taken(self, key: Any = KEY) -> socket.socket | None:
        """The backend's end of one that is taken; it is closed then."""
        spare = self.spares.take(key)
        if spare is None:
            return None
        with spare.sock:
            assert not spare.events and spare.sock.send(b"hello") == 5
            end = self.ends[self.ways.index(spare.backend)]
            assert end.recv(5) == b"hello" and not spare.backend.released
        spare.backend.release()
        return end

    def turn(self) -> None:
        self.loop.call(lambda: None)
        self.loop.turn()

    def closed(self) -> list[bool]:
        """Of each backend's end in turn: whether ours is closed and its way released, once."""
        found = []
        for end, way in zip(self.ends, self.ways):
            end.setblocking(False)
            try:
                is_closed = not end.recv(1)
            except ConnectionResetError:  # it had said what nobody read
                is_closed = True
            except BlockingIOError:
                is_closed = False
            assert way.released == is_closed
            found.append(is_closed)
        return found

    def close(self) -> None:
        self.spares.close()
        assert all(self.closed()) and not self.spares.by_key and not self.faults
        self.loop.close()
        for end in self.ends:
            end.close()


@pytest.fixture
def lab(monkeypatch) -> Iterator[Lab]:
    clock = FakeClock()
    monkeypatch.setattr(sniroute_loop, "monotonic", clock)
    made = Lab(clock)
    yield made
    made.close()


def test_the_one_that_was_used_last_is_taken_first_and_by_its_key_only(lab):
    first, second = lab.give(), lab.give()
    assert lab.taken(OTHER) is None
    third = lab.give(OTHER)
    assert [lab.taken(), lab.taken(), lab.taken()] == [second, first, None]
    assert lab.taken(OTHER) is third


def test_one_that_is_idle_for_long_is_closed(lab):
    lab.give()
    lab.clock.jump(SPARE_IDLE / 2)
    lab.turn()
    lab.give(OTHER)
    lab.turn()
    assert lab.closed() == [False, False]
    lab.clock.jump(SPARE_IDLE / 2)
    lab.turn()
    assert lab.closed() == [True, False] and lab.taken() is None
    lab.clock.jump(SPARE_IDLE / 2)
    lab.turn()
    assert lab.closed() == [True, True]


def test_there_are_so_many_and_the_longest_idle_goes(lab, monkeypatch):
    monkeypatch.setattr(sniroute_spares, "SPARES_MAX", 3)
    for number in range(5):
        lab.give(OTHER if number == 1 else KEY)
    assert lab.closed() == [True, True, False, False, False]
    assert lab.taken(OTHER) is None and lab.taken() is lab.ends[4]


@pytest.mark.parametrize("said", [None, b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
@pytest.mark.parametrize("is_noticed", [True, False])
def test_one_whose_backend_ends_it_or_says_something_is_closed(lab, said, is_noticed):
    """`is_noticed`: not in the same turn in which somebody wants it."""
    good, bad = lab.give(), lab.give()
    if said:
        bad.send(said)
    elif said is None:
        bad.close()
    else:
        bad.shutdown(socket.SHUT_WR)
    if is_noticed:
        lab.turn()
        assert lab.spares.by_key == {KEY: list(lab.spares.queue.due)} and len(lab.spares.queue.due) == 1
    if said is None:
        assert lab.ways[1].released == is_noticed
        lab.ends[1], ours = socket.socketpair()
        ours.close()
    assert lab.taken() is good and lab.ways[1].released == 1


# -- a router between --------------------------------------------------------------------------


class Numbered:
    """A script: each answer says on which connection it comes, counted from 1, and what was asked."""

    def __init__(self) -> None:
        self.count = 0
        self.ends: set[int] = set()  # connections whose next request is not answered
        self.live = 0

    def __call__(self, talk: Talk) -> None:
        self.count += 1
        self.live += 1
        number = self.count
        try:
            while asked := talk.request():
                if number in self.ends:
                    return talk.sock.close()
                if asked.get("Upgrade"):
                    return talk.say(shake(asked.get("Sec-WebSocket-Key")))
                talk.say(self.answer(asked, b"%d %b" % (number, asked.target.encode())))
        finally:
            self.live -= 1

    def answer(self, asked: Message, body: bytes) -> bytes:
        return reply(b"" if asked.method == "HEAD" else body)


class Site:
    """A router with two backends, `a` and `b`, that may share connections."""

    def __init__(self, run: Callable[..., Running], origin: Callable[..., Origin],
                 settings_file: Callable[[str], str], *options: str, **more: Any):
        self.a, self.b = Numbered(), Numbered()
        self.origins = [origin(each) for each in (self.a, self.b)]
        self.settings_file = settings_file
        self.running = run(f"--config={self.write(**more)}", *options)
        self.spares = self.running.router.web.spares

    def write(self, **more: Any) -> str:
        """The file of settings."""
        lines = [f'"{name}" = ' + table("tcp:%s:%d" % each.address, **{"http": "forward", "http_reuse": "safe", **more})
                 for name, each in zip(("a.example.com", "b.example.com"), self.origins)]
        return self.settings_file("\n".join(["[routes]", *lines, ""]))

    def client(self, *said: bytes) -> Talk:
        return Talk(self.running.connect(b"".join(said)))

    def leave(self, said: bytes = b"", first: bytes = b"") -> None:
        """A client asks `a`, and leaves; wait until the router knows it."""
        before = self.running.counter("client_closed")
        with self.client(first + (said or ask("/left"))) as client:
            for _ in range(1 + bool(first)):
                client.answer("HEAD" if said.startswith(b"HEAD") else "GET")
        wait_until(lambda: self.running.counter("client_closed") > before)

    def second(self, said: bytes, method: str = "GET") -> Message:
        """The answer to a request that is a client's second; its first was for `b`."""
        with self.client(ask("/first", host="b.example.com")) as client:
            client.answer()
            client.say(said)
            return client.answer(method)


def ask(target: str, *lines: str, method: str = "GET", host: str = "a.example.com", body: bytes | None = None) -> bytes:
    return request(method, target, *lines, host=host, body=body)


@pytest.fixture
def site(run, origin, settings_file) -> Callable[..., Site]:
    """site(*options, **options of its routes) -> Site."""
    return lambda *options, **more: Site(run, origin, settings_file, *options, **more)


def test_another_client_is_served_on_the_connection_that_is_left(site):
    found = site()
    found.leave()
    assert found.second(ask("/again")).body == b"1 /again"
    wait_until(lambda: found.running.counter("client_closed") == 2)
    assert found.second(ask("/more", method="HEAD"), "HEAD").status == 200
    assert found.a.count == 1


def test_a_clients_first_request_is_never_sent_on_it(site):
    """Were that connection dead, only the client could ask again, and some do not."""
    found = site()
    found.leave()
    with found.client(ask("/first")) as client:
        assert client.answer().body == b"2 /first"


@pytest.mark.parametrize("said", [ask("/x", method="POST", body=b"x"), ask("/x", body=b"x"),
                                  ask("/x", method="PUT", body=b""), ask("/x", method="DELETE"),
                                  ask("/x", method="OPTIONS"), ask("/x", *UPGRADE)])
def test_only_get_and_head_without_a_body_are_sent_on_it(site, said):
    found = site()
    found.leave()
    answer = found.second(said)
    assert answer.status == 101 or answer.body == b"2 /x"


@pytest.mark.parametrize("reuse", ["client", "off"])
def test_nothing_is_shared_unless_the_route_says_so(site, reuse):
    found = site(http_reuse=reuse)
    found.leave()
    assert found.second(ask("/again")).body == b"2 /again"
    wait_until(lambda: found.a.live == 0)
    assert not found.spares.by_key


@pytest.mark.parametrize("scheme", ["NTLM", "Negotiate", "ntlm", "NEGOTIATE"])
@pytest.mark.parametrize("who", ["client", "backend"])
def test_a_connection_that_may_be_one_users_is_left_to_nobody(site, scheme, who):
    """Also where that was some requests ago."""
    found = site()
    first = ask("/first", *[f"Authorization: {scheme} YII="] * (who == "client"))
    if who == "backend":
        found.a.answer = lambda asked, body: reply(body, f"WWW-Authenticate: {scheme}", status="401 Unauthorized")
    with found.client(first) as client:
        client.answer()
        found.a.answer = lambda asked, body: reply(body)
        client.say(ask("/later"))
        assert client.answer().body == b"1 /later"
    wait_until(lambda: found.a.live == 0)
    assert found.second(ask("/again")).body == b"2 /again"


def test_other_ways_to_say_who_asks_are_for_one_request(site):
    found = site()
    found.leave(ask("/left", "Authorization: Basic eDp5"))
    assert found.second(ask("/again")).body == b"1 /again"


def test_one_that_its_backend_has_closed_costs_nobody_an_error(site):
    """It is seen at once; and where it is not yet, the request is asked again."""
    found = site()
    found.leave()
    talk, = found.origins[0].talks
    talk.finish()
    wait_until(lambda: not found.spares.by_key)
    assert found.second(ask("/again")).body == b"2 /again"
    wait_until(lambda: found.spares.by_key)
    found.a.ends.add(2)
    assert found.second(ask("/more")).body == b"3 /more"


def test_what_a_backend_says_unasked_reaches_nobody(site):
    found = site()
    found.leave()
    found.origins[0].talks[0].say(reply(b"evil"))
    wait_until(lambda: not found.spares.by_key)
    assert found.second(ask("/again")).body == b"2 /again"


@pytest.mark.parametrize("lines", [["Connection: close"], []])
@pytest.mark.parametrize("answer", [
    lambda body: reply(body, "Connection: close"), lambda body: reply(body) + b"HTTP/1.1 200 OK\r\n\r\n",
    lambda body: reply(body, version="1.0"), lambda body: b"HTTP/1.1 200 OK\r\n\r\n" + body])
def test_a_connection_that_is_not_clean_is_left_to_nobody(site, answer, lines):
    found = site()

    def script(talk: Talk) -> None:
        asked = talk.request()
        talk.say(answer(asked.target.encode()))
        talk.finish()

    found.origins[0].script = script
    with found.client(ask("/left", *lines)) as client:
        client.answer()
    found.origins[0].wait_over(1)
    assert not found.spares.by_key


def test_a_client_that_leaves_before_its_answer_leaves_nothing_behind(site):
    found = site()
    told = threading.Event()
    found.origins[0].script = lambda talk: (talk.request(), told.set(), talk.rest())
    with found.client(ask("/left")) as client:
        assert told.wait(10)
        client.reset()
    found.origins[0].wait_over(1)
    assert not found.spares.by_key


def test_a_connection_with_a_proxy_header_is_one_clients(site):
    """The header says who that is: such a client leaves none, and takes none."""
    found, header = site(), v1("TCP4 192.0.2.7 192.0.2.1 4711 80")
    with found.client(header + ask("/left")) as client:
        assert client.answer().body == b"1 TCP4"  # the backend's script knows no such header
    wait_until(lambda: found.a.live == 0)
    assert not found.spares.by_key
    found.leave()
    with found.client(header + ask("/first", host="b.example.com")) as client:
        client.answer()
        client.say(ask("/second"))
        assert client.answer().body == b"3 TCP4"


def test_a_client_that_goes_to_another_host_leaves_its_connection_at_once(site):
    found = site()
    with found.client(ask("/left")) as client:
        client.answer()
        client.say(ask("/there", host="b.example.com"))
        assert client.answer().body == b"1 /there"
        assert found.second(ask("/again")).body == b"1 /again"
        client.say(ask("/back"))
        wait_until(lambda: len(found.running.router.connections) == 1)
        assert client.answer().body == b"1 /back"


def test_a_reload_closes_those_that_are_idle(site, monkeypatch):
    found = site()
    found.leave()
    assert found.spares.by_key
    router = found.running.router
    with found.client(ask("/stays")) as client:
        assert client.answer().body == b"2 /stays"
        found.write(http_reuse="safe", max_connections=7)
        router.call(lambda: router.adopt(router.settings.again(router.settings)))
        wait_until(lambda: found.a.live == 1)
        assert not found.spares.by_key
    wait_until(lambda: found.a.live == 0)
    assert not found.spares.by_key, "a connection that older settings have decided"


def test_a_reload_without_http_closes_them(site):
    found = site()
    found.leave()
    found.settings_file('[routes]\n"a.example.com" = "tcp:192.0.2.1:80"\n')
    router = found.running.router
    router.call(lambda: router.adopt(router.settings.again(router.settings)))
    wait_until(lambda: found.a.live == 0)


def test_a_drain_closes_them_and_takes_no_more(site):
    found = site()
    found.leave()
    told = threading.Event()
    found.origins[0].script = lambda talk: (talk.request(), told.wait(10), talk.say(reply(b"late")))
    with found.client(ask("/slow")) as client:
        found.origins[0].wait_heard(b"/slow")
        found.running.router.drain(30)
        wait_until(lambda: found.a.live == 0)
        told.set()
        assert client.answer().get("Connection") == "close"
    found.running.thread.join(10)
    assert not found.spares.by_key


def test_a_tunnel_is_in_use_while_a_connection_through_it_is_kept_and_no_longer(run, cloudflared, origin, ports,
                                                                                  settings_file):
    backend = origin(Numbered())
    cloudflared.far("*", backend.address)
    path = settings_file('[routes]\n"*.example.com" = ' + table("cloudflared:{name}", http="forward", http_reuse="safe")
                         + "\n")
    running = run(f"--config={path}", ports)
    spares = running.router.web.spares
    spares.queue.seconds = 60.0
    with Talk(running.connect(ask("/left"))) as client:
        assert client.answer().body == b"1 /left"
    tunnel, = running.tunnels.tunnels.values()
    wait_until(lambda: spares.by_key)
    assert tunnel.leases == 1
    with Talk(running.connect(ask("/first", host="b.example.com"))) as client:
        client.answer()
        client.say(ask("/again"))
        assert client.answer().body == b"1 /again"
        assert tunnel.leases == 1
    wait_until(lambda: len(spares.queue.due) == 2)
    running.router.call(spares.close)
    wait_until(lambda: tunnel.leases == 0)
    backend.wait_over(2)
