"""Tests of sniroute_upstreams.py: which target a connection goes to, and what is done where that one fails."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple

import pytest

import sniroute_upstreams
from conftest import HOST, Address, FakeClock, linux, wait_until
from sniroute_dial import Dial, WayOut
from sniroute_loop import Loop, ignore
from sniroute_refusals import Failed
from sniroute_upstreams import Upstreams
from testbed.carrier import resolve_as


class Options(NamedTuple):
    """What an Upstreams reads of a URL."""

    targets: tuple[Address, ...]
    lbs: int = 0
    dns: float = 300.0
    dial: str = ""


class Times(NamedTuple):
    """What it reads of the environment."""

    tcp_dial: float = 5.0
    udp_dial: float = 5.0
    fallback: float = 300.0
    report: float = 5.0


class Made:
    """A loop that this thread turns, and the targets on it."""

    def __init__(self, options: Options, times: Times = Times()):
        self.faults: list[Any] = []
        self.loop = Loop(self.faults.append)
        self.tick = self.loop.timer(lambda: None)
        self.clock = FakeClock()
        self.upstreams = Upstreams(self.loop, WayOut(self.loop, None, ""), options, times, self.clock)
        self.results: list[socket.socket | Failed] = []
        self.kept: list[socket.socket] = []

    def turn(self) -> None:
        self.tick.set(time.monotonic() + 0.02)
        self.loop.turn()

    def turn_until(self, predicate: Callable[[], Any]) -> None:
        wait_until(lambda: predicate() or self.turn())

    def dial(self, udp: bool = False) -> socket.socket | Failed:
        """What became of one connection."""
        self.upstreams.dial(self.results.append, udp)
        self.turn_until(lambda: self.results)
        result, = self.results
        self.results.clear()
        if isinstance(result, socket.socket):
            self.kept.append(result)
        return result

    def port(self, udp: bool = False) -> int:
        """To which port it led; 0: to none."""
        result = self.dial(udp)
        return 0 if isinstance(result, Failed) else result.getpeername()[1]

    def ports(self, count: int) -> list[int]:
        return [self.port() for _ in range(count)]

    def is_measured(self) -> bool:
        return all(target.latency < 1 for target in self.upstreams.targets)

    def close(self) -> None:
        self.upstreams.close()
        self.turn()
        for sock in self.kept:
            sock.close()
        assert not self.faults and not self.upstreams.attempts
        assert not any(queue.due for queue in self.loop.queues) and len(self.loop.queues) == 3  # those of the WayOut
        assert self.loop.timers == [self.tick]
        assert {fd for fd, act in self.loop.poller.callbacks.items() if act is not ignore} == {self.loop.pipe.reader}
        self.loop.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Made]]:
    """make(targets, times, lbs=...) -> Made."""
    with contextlib.ExitStack() as stack:
        def make_one(targets: list[Address], times: Times = Times(), **options: Any) -> Made:
            made = Made(Options(tuple(targets), **options), times)
            stack.callback(made.close)
            return made

        yield make_one


@pytest.fixture
def listening() -> Iterator[Callable[..., socket.socket]]:
    """listening(port=0) -> a listener: the kernel takes the connects."""
    with contextlib.ExitStack() as stack:
        def listen(port: int = 0, host: str = HOST) -> socket.socket:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = stack.enter_context(socket.socket(family))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen()
            return sock

        yield listen


@pytest.fixture
def three(listening, free_ports) -> list[socket.socket]:
    """Three that listen; nobody else gets the port of one that is closed."""
    first, last = free_ports(3)
    return [listening(port) for port in range(first, last + 1)]


def places(listeners: list[socket.socket]) -> list[Address]:
    return [sock.getsockname() for sock in listeners]


def ports_of(listeners: list[socket.socket]) -> list[int]:
    return [port for _, port in places(listeners)]


# -- in turn -------------------------------------------------------------------------------------


def test_targets_take_turns(make, three):
    made = make(places(three))
    a, b, c = ports_of(three)
    assert made.ports(7) == [a, b, c, a, b, c, a]


def test_the_turn_of_a_dead_target_goes_to_the_next(make, three):
    a, b, c = ports_of(three)
    made = make(places(three))
    three[1].close()
    assert made.ports(6) == [a, c, c, a, c, c]
    assert f"{HOST}:{b} (Connection refused)" in made.upstreams.status()


def test_a_result_is_a_connected_socket_that_never_waits(make, three):
    sock = make(places(three)).dial()
    assert isinstance(sock, socket.socket) and not sock.getblocking()
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_where_all_targets_fail_each_reason_is_told(make, free_ports):
    port, _ = free_ports(2)
    result = make([(HOST, port), (HOST, port + 1)]).dial()
    assert isinstance(result, Failed) and result.reason == "refused"
    assert str(result) == f"{HOST}:{port}: Connection refused; {HOST}:{port + 1}: Connection refused"


@linux
def test_a_silent_target_has_its_time_and_is_tried_last_for_a_while(make, three, deaf, monkeypatch):
    port = three[0].getsockname()[1]
    dialled: list[int] = []
    monkeypatch.setattr(sniroute_upstreams, "Dial", lambda way, host, port, done: (
        dialled.append(port) or Dial(way, host, port, done)))
    made = make([deaf, (HOST, port)], Times(tcp_dial=0.5))
    began = time.monotonic()
    assert made.port() == port and time.monotonic() - began >= 0.5
    assert dialled == [deaf[1], port]
    dialled.clear()
    assert made.ports(4) == [port] * 4 and dialled == [port] * 4, "nobody waits for the silent one"
    assert "(no answer in 0.5 s, connecting)" in made.upstreams.status()
    made.clock.jump(sniroute_upstreams.REST)
    began = time.monotonic()
    assert made.ports(2) == [port] * 2 and time.monotonic() - began >= 0.5


@linux
def test_a_silent_target_alone_is_a_timeout(make, deaf):
    result = make([deaf], Times(tcp_dial=0.05)).dial()
    assert isinstance(result, Failed) and result.reason == "timeout"
    assert str(result) == f"{HOST}:{deaf[1]}: no answer in 0.05 s, connecting"


@linux
def test_a_dial_that_is_cancelled_tells_nothing(make, deaf):
    made = make([deaf])
    attempt = made.upstreams.dial(made.results.append)
    made.turn()
    made.turn()
    attempt.cancel()
    attempt.cancel()
    made.turn()
    assert not made.results and not made.upstreams.attempts


@linux
def test_what_is_under_way_ends_with_the_end(make, deaf):
    made = make([deaf], lbs=1)
    made.upstreams.dial(made.results.append)
    made.turn()
    made.upstreams.close()
    made.turn()
    assert not made.results
    made.upstreams.close = lambda: None  # the fixture's turn


def test_a_port_that_connects_to_itself_is_nobody(make):
    """On Linux a connect to a free port of one's own range may get that port as its own end."""
    with socket.socket() as own:
        own.bind((HOST, 0))
        place = own.getsockname()
        made = make([place])
        made.upstreams.way.open = lambda family: own  # its port is chosen already
        result = made.dial()
    assert isinstance(result, Failed) and str(result) == f"{HOST}:{place[1]}: Connection refused"


# -- the fastest -----------------------------------------------------------------------------------


def test_the_fastest_is_chosen_also_below_a_millisecond(make, three):
    a, b, c = ports_of(three)
    made = make(places(three), lbs=1)
    made.turn_until(made.is_measured)
    for target, seconds in zip(made.upstreams.targets, (0.0009, 0.0001, 0.0005)):
        target.latency = seconds
    assert made.port() == b
    made.upstreams.targets[1].latency = 0.0007
    assert made.port() == c
    assert made.upstreams.ping < 0.001 and "0.9 ms" in made.upstreams.status()


def test_all_targets_are_probed_and_one_that_is_dead_is_not_chosen(make, three):
    a, b, c = ports_of(three)
    made = make(places(three), Times(report=0.01), lbs=1)
    three[0].close()
    made.turn_until(lambda: made.upstreams.targets[0].error and made.upstreams.targets[2].latency < 1)
    assert made.port() in (b, c)
    three[1].close()
    made.turn_until(lambda: made.upstreams.targets[1].error)
    assert made.ports(3) == [c] * 3


def test_one_target_is_not_probed(make, three):
    made = make(places(three)[:1], Times(report=0.0), lbs=1)
    made.turn()
    made.turn()
    assert not made.upstreams.attempts and made.upstreams.targets[0].latency == float("inf")


@linux
def test_probes_of_a_silent_target_do_not_pile_up(make, deaf, three):
    made = make([deaf, three[0].getsockname()], Times(report=0.0), lbs=1)
    for _ in range(10):
        made.turn()
    assert len(made.upstreams.attempts) <= 2


def test_a_probe_says_nothing_and_ends(make, three):
    made = make(places(three), lbs=1)
    made.turn_until(made.is_measured)
    for listener in three:
        listener.settimeout(10)
        sock, _ = listener.accept()
        with sock:
            assert sock.recv(1) == b""


# -- the first ---------------------------------------------------------------------------------------


def test_the_first_is_used_while_it_works_and_again_when_it_is_back(make, three, listening):
    a, b, c = ports_of(three)
    made = make(places(three), Times(fallback=300), lbs=2)
    assert made.ports(3) == [a] * 3
    three[0].close()
    assert made.ports(3) == [b] * 3
    listening(a)
    made.clock.jump(299)
    assert made.ports(3) == [b] * 3
    made.clock.jump(1)
    assert made.ports(3) == [a] * 3


def test_the_next_one_is_kept_until_it_fails(make, three, listening):
    a, b, c = ports_of(three)
    made = make(places(three), lbs=2)
    three[0].close()
    assert made.port() == b
    three[1].close()
    assert made.ports(2) == [c, c]
    listening(b)
    assert made.ports(2) == [c, c]


@linux
def test_one_connection_finds_out_whether_the_first_is_back(make, three, deaf):
    """The others do not wait for it."""
    b = three[1].getsockname()[1]
    made = make([deaf, (HOST, b)], Times(tcp_dial=0.2, fallback=300), lbs=2)
    assert made.port() == b
    made.clock.jump(300)
    slow: list[Any] = []
    made.upstreams.late[False].seconds = 30.0
    attempt = made.upstreams.dial(slow.append)
    assert made.ports(5) == [b] * 5 and not slow
    attempt.expire()  # as after its time
    made.turn_until(lambda: slow)
    assert slow[0].getpeername()[1] == b
    slow[0].close()
    assert made.port() == b


def test_many_failures_at_once_are_one_step(make, three):
    a, b, c = ports_of(three)
    made = make(places(three), lbs=2)
    three[0].close()
    results: list[Any] = []
    for _ in range(5):
        made.upstreams.dial(results.append)
    made.turn_until(lambda: len(results) == 5)
    made.kept += results
    assert {sock.getpeername()[1] for sock in results} == {b} and made.upstreams.current == 1


# -- names -------------------------------------------------------------------------------------------


def test_a_name_is_asked_again_after_its_time(make, three, monkeypatch):
    a, b, c = ports_of(three)
    found = [(HOST, a)]
    asked = resolve_as(monkeypatch, lambda: found)
    made = make([("db.example.com", 1)], dns=300.0)
    assert made.ports(3) == [a] * 3 and len(asked) == 1
    found[:] = [(HOST, b)]
    made.clock.jump(299)
    assert made.port() == a
    made.clock.jump(1)
    assert made.port() == b and len(asked) == 2


def test_old_addresses_are_used_where_the_resolver_has_none(make, three, monkeypatch):
    a = ports_of(three)[0]
    fails = []

    def found() -> list[Address]:
        if fails:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(HOST, a)]

    asked = resolve_as(monkeypatch, found)
    made = make([("db.example.com", 1)], dns=10.0)
    fails.append(True)
    result = made.dial()
    assert isinstance(result, Failed) and result.reason == "resolver"
    fails.clear()
    assert made.port() == a
    fails.append(True)
    made.clock.jump(1000)
    assert made.ports(3) == [a] * 3 and len(asked) == 3  # and it is not asked for each of them
    made.clock.jump(sniroute_upstreams.RETRY)
    assert made.port() == a and len(asked) == 4


def test_a_resolver_for_which_memory_is_short_leaves_no_trace(make, three, monkeypatch):
    """What it has met is no address, to be kept for five minutes."""
    a = ports_of(three)[0]
    short = [True]

    def found() -> list[Address]:
        if short:
            raise MemoryError
        return [(HOST, a)]

    resolve_as(monkeypatch, found)
    made = make([("db.example.com", 1)])
    result = made.dial()
    assert isinstance(result, Failed) and result.reason == "resolver"
    made.faults.clear()
    short.clear()
    assert made.port() == a
    short.append(True)
    made.clock.jump(1000)
    assert made.port() == a
    made.faults.clear()


def test_old_addresses_are_used_where_the_resolver_is_silent(make, three, monkeypatch):
    a, b, c = ports_of(three)
    monkeypatch.setattr(sniroute_upstreams, "PATIENCE", 0.02)
    release, hangs = threading.Event(), []

    def found() -> list[Address]:
        if hangs:
            release.wait(10)
            return [(HOST, b)]
        return [(HOST, a)]

    asked = resolve_as(monkeypatch, found)
    made = make([("db.example.com", 1)], dns=10.0)
    assert made.port() == a
    hangs.append(True)
    made.clock.jump(10)
    assert made.ports(3) == [a] * 3
    wait_until(lambda: len(asked) == 2)  # by a thread
    release.set()
    made.turn_until(lambda: not made.upstreams.names.waiting)
    assert made.port() == b and len(asked) == 2


def test_a_name_that_does_not_resolve_is_the_next_targets_turn(make, three, monkeypatch):
    def found() -> list[Address]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    resolve_as(monkeypatch, found)
    made = make([("gone.example.com", 1), three[0].getsockname()])
    assert made.ports(2) == [three[0].getsockname()[1]] * 2
    assert "gone.example.com:1 (Name or service not known)" in made.upstreams.status()


def test_an_address_is_not_resolved(make, three, monkeypatch):
    asked = resolve_as(monkeypatch, list)
    monkeypatch.setattr(threading.Thread, "start", lambda *_: pytest.fail("a thread"))
    assert make(places(three)).port() and not asked


@linux
def test_addresses_of_one_name_are_tried_beside_each_other(make, three, deaf, monkeypatch):
    good = three[0].getsockname()
    resolve_as(monkeypatch, lambda: [deaf, good])
    made = make([("db.example.com", 1)])
    began = time.monotonic()
    assert made.port() == good[1] and time.monotonic() - began < 2
    made.upstreams.way.staggered.seconds = 1000.0  # nobody would come to the second
    assert made.port() == good[1], "it is the first now"


# -- where from --------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("udp", [False, True])
def test_connections_leave_from_the_address_that_is_chosen(make, three, udp):
    made = make(places(three), dial="127.0.0.9")
    sock = made.dial(udp)
    assert isinstance(sock, socket.socket) and sock.getsockname()[0] == "127.0.0.9"


@pytest.mark.parametrize("udp", [False, True])
def test_a_source_that_is_none_of_ours_is_named(make, three, udp):
    result = make(places(three)[:1], dial="192.0.2.9").dial(udp)
    assert isinstance(result, Failed)
    assert str(result) == f"{HOST}:{three[0].getsockname()[1]}: cannot leave from 192.0.2.9: " \
        "Cannot assign requested address"


def test_a_source_of_another_family_is_named(make, three):
    result = make(places(three)[:1], dial="::1").dial()
    assert isinstance(result, Failed)
    assert str(result).endswith("this target has no address that ::1 can reach")


def test_only_addresses_of_the_sources_family_are_used(make, three, listening, monkeypatch):
    try:
        six = listening(host="::1")
    except OSError:
        pytest.skip("needs IPv6 on loopback")
    good = three[0].getsockname()
    resolve_as(monkeypatch, lambda: [six.getsockname(), good])
    assert make([("db.example.com", 1)], dial=HOST).port() == good[1]
    assert make([("db.example.com", 1)], dial="::1").port() == six.getsockname()[1]


# -- UDP ---------------------------------------------------------------------------------------------


def test_udp_takes_turns_with_tcp(make, three):
    a, b, c = ports_of(three)
    made = make(places(three))
    assert [made.port(), made.port(True), made.port(), made.port(True)] == [a, b, c, a]
    sock = made.dial(True)
    assert isinstance(sock, socket.socket) and sock.type == socket.SOCK_DGRAM and not sock.getblocking()


def test_udp_is_not_led_to_another_target_by_a_dead_one(make, three):
    a, b, c = ports_of(three)
    made = make(places(three))
    three[1].close()
    assert [made.port(True) for _ in range(3)] == [a, b, c]


def test_a_target_that_refuses_datagrams_is_left_as_one_that_refuses_connections(make, three):
    a, b, c = ports_of(three)
    made = make(places(three), lbs=2)
    attempt = made.upstreams.dial(made.kept.append, True)
    assert made.kept[0].getpeername()[1] == a
    attempt.refused()
    assert [made.port(True), made.port()] == [b, b]


def test_udp_skips_a_name_that_does_not_resolve(make, three, monkeypatch):
    def found() -> list[Address]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    resolve_as(monkeypatch, found)
    made = make([("gone.example.com", 1), three[0].getsockname()])
    assert made.port(True) == three[0].getsockname()[1]


def test_udp_without_a_way_there_is_told(make):
    result = make([("255.255.255.255", 9)]).dial(True)  # broadcast, which nobody has asked for
    assert isinstance(result, Failed) and str(result) == "255.255.255.255:9: Permission denied"


def test_a_fault_of_one_caller_is_not_the_next_ones(make, three, monkeypatch):
    resolve_as(monkeypatch, lambda: [three[0].getsockname()])
    made = make([("db.example.com", 1)])
    made.upstreams.dial(lambda result: result.close() or 1 // 0, True)
    attempt = made.upstreams.dial(made.results.append, True)
    made.turn_until(lambda: made.results)
    assert len(made.faults) == 1
    made.kept.append(made.results.pop())
    made.faults.clear()
    assert attempt not in made.upstreams.attempts


def test_a_silent_resolver_is_a_timeout_for_udp(make, monkeypatch):
    release = threading.Event()
    resolve_as(monkeypatch, lambda: [] if release.wait(10) else [])
    made = make([("db.example.com", 1)], Times(udp_dial=0.05))
    result = made.dial(True)
    release.set()
    made.turn_until(lambda: not made.upstreams.names.waiting)
    assert isinstance(result, Failed) and str(result) == "db.example.com:1: no answer in 0.05 s, resolving the name"
