"""Tests of sniroute_door.py where it keeps connections, answers later, and streams; test_admin.py has the rest."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_door
from conftest import HOST, connect, wait_until
from sniroute_door import LOOP, OWNER, THREAD, Answer, Caller, Declined, Door, Gate, Head, Plan, listen
from testbed.running import read_all
from testbed.web import Cut, Talk, request

ROUTES: dict[str, Callable[[Caller], Answer | None]] = {
    "/echo": lambda caller: Answer(200, bytes(caller.body)), "/fault": lambda caller: 1 / 0}  # type: ignore[dict-item]


class Served:
    """A Door with one gate, which keeps connections."""

    def __init__(self, keeps: bool, **options: Any):
        self.pending: list[Caller] = []
        self.ended: list[str] = []
        self.door = Door(lambda: None, 10.0, "served")
        listener, _ = listen((HOST, 0))
        self.address = listener.getsockname()
        self.gate = Gate(self.door, "served", listener, self.decide, 2, keeps=keeps, **options)
        self.door.gates.append(self.gate)
        self.door.open()

    def decide(self, head: Head) -> Plan:
        if head.path == "/declined":
            raise Declined(403, "no")
        if head.path == "/later":
            return Plan(self.later, head.body_length(), OWNER)
        return Plan(ROUTES[head.path], head.body_length(), THREAD if head.query == "thread" else LOOP)

    def later(self, caller: Caller) -> None:
        caller.when_over(lambda: self.ended.append(caller.state))
        self.pending.append(caller)

    def answer(self, *answers: Answer) -> None:
        """Answer the next ones that wait."""
        for answer in answers:
            caller = wait_until(lambda: self.pending and self.pending.pop(0))
            self.door.loop.call(lambda caller=caller, answer=answer: caller.answer(answer))

    @property
    def states(self) -> list[str]:
        return [caller.state for caller in list(self.gate.callers)]


@pytest.fixture
def served() -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(keeps: bool = True, **options: Any) -> Served:
        made.append(Served(keeps, **options))
        return made[-1]

    yield make
    for each in made:
        each.door.close()


def post(path: str, body: bytes = b"", *fields: str, version: str = "1.1") -> bytes:
    return request("POST", path, f"Content-Length: {len(body)}", *fields, version=version) + body


@pytest.mark.parametrize("query", ["", "?thread"])
def test_one_request_after_another(served, query):
    with Talk(connect(served().address)) as client:
        for body in (b"one", b"", b"x" * 65536):
            client.say(post("/echo" + query, body))
            answer = client.answer()
            assert (answer.status, answer.body, answer.get("Connection")) == (200, body, "keep-alive")
        client.say(post("/fault" + query), post("/echo" + query, b"still here"))
        assert [client.answer().status for _ in range(2)] == [500, 200]


def test_requests_that_come_together_are_answered_in_order(served):
    """Also where the first is answered later than the others could be."""
    there = served()
    with Talk(connect(there.address)) as client:
        client.say(post("/later", b"x") + post("/echo", b"two") + post("/echo", b"three"))
        there.answer(Answer(200, b"one"))
        assert [client.answer().body for _ in range(3)] == [b"one", b"two", b"three"]
        client.say(post("/later") + post("/echo", b"y" * 60000))
        there.answer(Answer(200, b""))
        assert [len(client.answer().body) for _ in range(2)] == [0, 60000]


@pytest.mark.parametrize("keeps, fields, version", [
    (False, (), "1.1"), (True, ("Connection: close",), "1.1"), (True, ("Connection: x, CLOSE",), "1.1"),
    (True, ("Connection: x", "Connection: Close"), "1.1"), (True, (), "1.0")])
def test_a_connection_that_is_not_kept(served, keeps, fields, version):
    with Talk(connect(served(keeps).address)) as client:
        client.say(post("/echo", b"x", *fields, version=version))
        answer = client.answer()
        assert (answer.body, answer.get("Connection")) == (b"x", "close")
        assert client.rest() == b"" and client.how == "end"


def test_a_request_that_is_declined_before_it_is_whole_is_the_last_one(served):
    """Where the next one begins is not known."""
    with Talk(connect(served().address)) as client:
        client.say(request("POST", "/declined", "Content-Length: 5"))
        answer = client.answer()
        assert (answer.status, answer.get("Connection")) == (403, "close") and client.rest() == b""


def test_who_says_nothing_more_is_closed_but_for_those_whose_end_is_waited_for(served, monkeypatch):
    monkeypatch.setattr(sniroute_door, "KEEP_TIME", 0.1)
    there = served()
    with Talk(connect(there.address)) as idle, Talk(connect(there.address)) as held:
        held.say(post("/later"))
        there.answer(Answer(200, b""))
        held.answer()
        idle.say(post("/echo"))
        idle.answer()
        assert idle.rest() == b"" and idle.how == "end"
        held.say(post("/echo", b"x"))
        assert held.answer().body == b"x" and there.ended == []
    wait_until(lambda: there.ended == ["closed"])


def test_the_end_of_a_client_that_waits_is_noticed_at_once(served):
    there = served()
    with Talk(connect(there.address)) as client:
        client.say(post("/later"))
        wait_until(lambda: there.pending)
    wait_until(lambda: there.ended == ["closed"])
    there.answer(Answer(200, b"nobody hears it"))
    with Talk(connect(there.address)) as client:
        client.say(post("/echo", b"x"))
        assert client.answer().body == b"x"


def test_a_stream_goes_on_until_its_client_leaves(served):
    there = served()
    with Talk(connect(there.address)) as client:
        client.say(request("GET", "/later"))
        caller = wait_until(lambda: there.pending and there.pending[0])
        there.answer(Answer(200, b"first\n", "text/event-stream", has_end=False))
        head = client.head()
        assert (head.get("Content-Length"), head.get("Connection")) == (None, "close")
        assert client.exactly(6) == b"first\n"
        for number in range(3):
            there.door.loop.call(lambda number=number: caller.push(b"%d\n" % number))
            assert client.exactly(2) == b"%d\n" % number
        client.say(b"what nobody asked for")
    wait_until(lambda: there.ended == ["closed"] and not there.gate.callers)


def test_who_does_not_read_a_stream_is_cut_off(served):
    there = served()
    with Talk(connect(there.address)) as client:
        client.say(request("GET", "/later"))
        caller = wait_until(lambda: there.pending and there.pending[0])
        there.answer(Answer(200, b"", "text/event-stream", has_end=False))
        client.head()
        while not there.ended:
            done = threading.Event()
            there.door.loop.call(lambda: (caller.push(b"x" * 30000), done.set()))
            assert done.wait(5)
        with pytest.raises(Cut):
            while True:
                client.exactly(1 << 20)


def test_a_client_more_takes_the_place_of_one_that_is_idle(served):
    there = served(most=3)
    with Talk(connect(there.address)) as idle, Talk(connect(there.address)) as waits, \
            Talk(connect(there.address)) as other:
        waits.say(post("/later"))
        wait_until(lambda: there.pending)
        for client in (idle, other):
            client.say(post("/echo"))
            client.answer()
        with Talk(connect(there.address)) as new:
            new.say(post("/echo", b"x"))
            assert new.answer().body == b"x"
        assert idle.rest() == b""
        there.answer(Answer(200, b"y"))
        assert waits.answer().body == b"y"


def test_a_head_that_never_ends_behind_a_request_that_waits_takes_no_memory(served):
    there = served()
    with connect(there.address) as client:
        client.sendall(post("/later"))
        wait_until(lambda: there.pending)
        client.settimeout(0.2)
        with pytest.raises((TimeoutError, OSError)):
            while True:
                client.sendall(b"x" * 65536)
        client.settimeout(10)
        (caller,) = there.gate.callers
        assert len(caller.data) <= sniroute_door.HEAD_MAX + 65536
        there.answer(Answer(200, b""))
        assert b"414" in read_all(client)


def test_what_comes_on_a_stream_is_not_kept(served):
    """A client that sends while it listens: each event made room for another piece of it."""
    there = served()
    with Talk(connect(there.address)) as client:
        client.say(request("GET", "/later"))
        caller = wait_until(lambda: there.pending and there.pending[0])
        there.answer(Answer(200, b"", "text/event-stream", has_end=False))
        client.head()
        client.sock.settimeout(0.2)
        for _ in range(20):
            try:
                client.sock.sendall(b"x" * 65536)
            except OSError:
                break
            there.door.loop.call(lambda: caller.push(b"e"))
        assert len(caller.data) <= sniroute_door.HEAD_MAX + 65536
    wait_until(lambda: not there.gate.callers)


def test_a_stream_that_begins_with_much_is_not_cut_off_by_the_next_event(served):
    """Who comes again gets all that it has missed, which may be more than the kernel takes at once."""
    there = served()
    with Talk(connect(there.address)) as client:
        client.say(request("GET", "/later"))
        caller = wait_until(lambda: there.pending and there.pending[0])
        caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        there.answer(Answer(200, b"x" * (8 << 20), "text/event-stream", has_end=False))
        wait_until(lambda: caller.state == "streaming")
        assert caller.out
        there.door.loop.call(lambda: [caller.push(b"e" * 500) for _ in range(8)])
        client.head()
        assert client.exactly((8 << 20) + 4000).endswith(b"xeeee" + b"e" * 3996)


def test_the_end_of_a_client_that_is_gone_already_is_told_at_once(served):
    """Its owner answered something else first, or waits for a store."""
    there = served()
    with Talk(connect(there.address)) as client:
        client.say(post("/later"))
        caller = wait_until(lambda: there.pending and there.pending[0])
    wait_until(lambda: there.ended)
    ended: list[str] = []
    there.door.loop.call(lambda: caller.when_over(lambda: ended.append("now")))
    wait_until(lambda: ended == ["now"])


def test_a_plan_that_has_answered_and_then_fails_answers_once(served, monkeypatch):
    there = served()

    def later(caller: Caller) -> None:
        caller.answer(Answer(200, b"done"))
        raise Declined(500, "too late")
    monkeypatch.setattr(there, "later", later)
    with Talk(connect(there.address)) as client:
        client.say(post("/later") + post("/echo", b"next"))
        assert [client.answer().body for _ in range(2)] == [b"done", b"next"]


def test_clients_that_are_waited_for_do_not_yield_to_strangers(served):
    """Those that only say nothing do: else whoever opens many connections ends the claims of others."""
    there = served(most=3)
    with Talk(connect(there.address)) as held:
        held.say(post("/later"))
        there.answer(Answer(200, b""))
        held.answer()
        with contextlib.ExitStack() as strangers:
            for _ in range(8):
                strangers.enter_context(connect(there.address))
            wait_until(lambda: len(there.gate.callers) == 3 and there.states.count("reading") == 2)
            assert there.ended == []
            held.say(post("/echo", b"x"))
            assert held.answer().body == b"x"
    wait_until(lambda: there.ended == ["closed"])


@pytest.mark.parametrize("text, statuses", [
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [411]),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [411]),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\r\nContent-Length: 0\r\n\r\n", [411]),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 0\r\n\r\nx", [400]),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: +0\r\n\r\n", [400]),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 0, 0\r\n\r\n", [400]),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length : 0\r\n\r\n", [400]),
    (b"POST /echo HTTP/1.1\r\nHost: x\r\nA: b\r\n Content-Length: 0\r\n\r\n", [400]),
    (b"POST /declined HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n", [403]),
])
def test_where_the_next_request_begins_is_never_guessed(served, text, statuses):
    """What is behind a request that is refused for its length is no request."""
    with connect(served().address) as client:
        client.sendall(text + post("/echo", b"smuggled"))
        said = read_all(client)
    assert b"smuggled" not in said
    assert [int(line.split()[1]) for line in said.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")] == statuses


def test_an_answer_without_a_body_has_no_length(served, monkeypatch):
    """RFC 9110 section 8.6; and the next one begins where it should."""
    monkeypatch.setitem(ROUTES, "/none", lambda caller: Answer(204, b""))
    with connect(served().address) as client:
        client.sendall(post("/none") + post("/echo", b"next", "Connection: close"))
        said = read_all(client)
    head, _, rest = said.partition(b"\r\n\r\n")
    assert b"204" in head and b"content-length" not in head.lower() and rest.endswith(b"\r\n\r\nnext")
