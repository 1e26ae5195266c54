"""Tests of sniroute_race.py: the order of addresses, and what a client meets where one of them is silent."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import threading
import types
from typing import Any, Callable, Iterator

import pytest

import sniroute_race
import sniroute_targets
from conftest import HOST, Address, FakeClock, linux, own_fds, wait_until
from sniroute_names import show_address
from sniroute_race import ADDRESSES_MAX, Laggards, Race, alternate
from testbed.carrier import resolve_as
from testbed.hellos import HELLO
from testbed.running import Running, alert, answer, read_all, read_exactly

TARGET = "--route=db.example.com=tcp:backend.test:5432"
KEY = "db.example.com=tcp:backend.test:5432"
FOR_EVER = 1000.0  # seconds; a client of these tests gives up after 20


# -- the order -------------------------------------------------------------------------------


@pytest.mark.parametrize("families, order", [
    pytest.param("", "", id="none"),
    pytest.param("6", "6", id="one"),
    pytest.param("4444", "4444", id="one family"),
    pytest.param("6644", "6464", id="as many of each"),
    pytest.param("666644", "646466", id="more of the first"),
    pytest.param("64444", "64444", id="more of the other"),
    pytest.param("4666", "4666", id="the first stays first"),
])
def test_families_take_turns(families, order):
    rows = [(int(family), number) for number, family in enumerate(families)]
    mixed = alternate(rows)
    assert "".join(str(family) for family, _ in mixed) == order
    for kind in (4, 6):
        numbers = [number for family, number in mixed if family == kind]
        assert numbers == sorted(numbers)


def test_laggards_are_tried_last_for_a_while(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(sniroute_race, "monotonic", clock)
    a, b, c = rows = [(4, letter) for letter in "abc"]
    laggards = Laggards()
    assert laggards.last(rows) == (a, b, c)
    assert laggards.learn([a], b)
    assert laggards.last(rows) == (b, c, a) and laggards.last([c, b, a]) == (c, b, a), "good ones stay as they came"
    clock.jump(sniroute_race.WORSE_FOR - 1)
    assert not laggards.learn([a], b), "that is no news"
    clock.jump(2)
    assert laggards.last(rows) == (b, c, a), "it was worse again"
    assert laggards.learn([b], a), "the dead one has come back, and the other is dead"
    assert laggards.last(rows) == (a, c, b)
    clock.jump(sniroute_race.WORSE_FOR)
    assert laggards.last(rows) == (a, b, c) and laggards.learn([b], a)


def test_laggards_are_limited(monkeypatch):
    monkeypatch.setattr(sniroute_race, "LAGGARDS_MAX", 3)
    laggards = Laggards()
    for number in range(10):
        laggards.learn([(4, number)], (4, "good"))
    assert list(laggards.until) == [(4, 7), (4, 8), (4, 9)], "the oldest is forgotten"


# -- black holes -----------------------------------------------------------------------------


class BlackHole:
    """An address that is silent until it comes back: the backlog of its listener is full, so SYNs are dropped."""

    def __init__(self, host: str):
        self.listener = socket.socket()
        self.listener.bind((host, 0))
        self.listener.listen(0)
        self.address: Address = self.listener.getsockname()
        self.fillers = [socket.socket() for _ in range(3)]
        for filler in self.fillers:
            filler.setblocking(False)
            filler.connect_ex(self.address)
        self.thread = threading.Thread(target=self.serve, name="black-hole")

    def come_back(self) -> None:
        """Take connections, and say `back` to each."""
        for filler in self.fillers:
            filler.close()
        self.listener.listen(16)
        self.thread.start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                with client, contextlib.suppress(OSError):
                    client.settimeout(5)
                    if read_exactly(client, len(HELLO)):  # a filler has left, or an attempt that lost
                        client.sendall(b"back")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # ends accept()
        if self.thread.ident:
            self.thread.join()
        for sock in (self.listener, *self.fillers):
            sock.close()


@pytest.fixture
def black_hole() -> Iterator[Callable[..., BlackHole]]:
    """black_hole(host="127.0.0.2") -> BlackHole, until the test ends."""
    with contextlib.ExitStack() as stack:
        def make(host: str = "127.0.0.2") -> BlackHole:
            made = BlackHole(host)
            stack.callback(made.close)
            return made

        yield make


class Site:
    """A router whose one target has the addresses that a test gives."""

    def __init__(self, running: Running, asked: list[str]):
        self.running = running
        self.router = running.router
        self.asked = asked  # the names that were resolved

    def set(self, queue: str, seconds: float) -> None:
        """Use another time for a queue of the router's Deadlines, or of its Races."""
        deadlines = self.router.deadlines
        owner = deadlines if hasattr(deadlines, queue) else deadlines.races
        getattr(owner, queue).seconds = seconds

    def stagger(self, seconds: float) -> None:
        for queue in ("stagger", "staggered"):
            self.set(queue, seconds)

    def client(self) -> bytes:
        """What a client hears; it has left, and its connection is over."""
        count = len(self.running.endings)
        with self.running.connect(HELLO) as client:
            heard = client.recv(7)
        wait_until(lambda: len(self.running.endings) > count)
        return heard

    @property
    def detail(self) -> str | None:
        """Of the line of the last connection."""
        return self.running.endings[-1].detail

    def expire(self) -> None:
        """Let the addresses be resolved again."""
        resolved = self.router.targets.resolved
        for key, found in list(resolved.items()):
            resolved[key] = found._replace(until=0.0)

    def attempts(self) -> int:
        """How many connects are under way in races."""
        return sum(len(connection.backend.race.attempts) for connection in list(self.router.connections)
                   if connection.backend is not None and connection.backend.race is not None)

    def is_racing(self, attempts: int = 2) -> None:
        wait_until(lambda: self.attempts() == attempts, what=f"{attempts} attempts")


@pytest.fixture
def site(run, monkeypatch) -> Callable[..., Site]:
    """site(*addresses) -> Site.  A list of addresses may be changed later."""
    def make(*addresses: Address, found: list[Address] | None = None) -> Site:
        asked = resolve_as(monkeypatch, lambda: list(addresses) if found is None else found)
        return Site(run(TARGET), asked)
    return make


@pytest.fixture
def shut_port() -> Iterator[Callable[[], Address]]:
    """shut_port() -> an address that refuses: it is held until the test ends, and nobody listens there."""
    with contextlib.ExitStack() as stack:
        def make() -> Address:
            held = stack.enter_context(socket.socket())
            held.bind((HOST, 0))
            return held.getsockname()

        yield make


@pytest.fixture
def good(serve) -> Address:
    return serve(answer(b"x")).address


def told(row: Address, what: str) -> str:
    return f"{show_address(row)}: {what}"


# -- what a client meets ---------------------------------------------------------------------

pytestmark = linux  # elsewhere a full backlog may answer otherwise


def test_a_silent_first_address_holds_nobody_up(flow, site, black_hole, good):
    """The next one is tried beside it, and is the first for all that come later; the line says so once."""
    silent = black_hole().address
    there = site(silent, good)
    there.set("connect", FOR_EVER)
    there.stagger(0.05)
    assert there.client() == b"x"
    assert re.fullmatch(re.escape(told(silent, "no answer in ")) + r"0\.\d+ s; " + re.escape(told(good, "took it")),
                        there.detail)
    there.stagger(FOR_EVER)
    for _ in range(2):
        assert there.client() == b"x" and there.detail is None
    assert there.asked == ["backend.test"]


def test_three_addresses_of_which_two_are_silent(site, black_hole, good):
    silent = [black_hole().address, black_hole("127.0.0.3").address]
    there = site(*silent, good)
    there.stagger(0.05)
    assert there.client() == b"x"
    assert there.detail.startswith(told(silent[0], "no answer in 0.")) and f"; {told(silent[1], 'no')}" in there.detail
    there.stagger(FOR_EVER)
    assert there.client() == b"x" and there.detail is None


def test_what_it_waited_for_is_the_time_until_the_dial_that_was_answered(site, black_hole, good):
    there = site(black_hole().address, good)
    there.stagger(0.1)
    assert there.client() == b"x" and 0.1 <= there.running.endings[-1].waited <= there.running.endings[-1].seconds


@pytest.mark.parametrize("again", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1)])
def test_a_name_that_is_resolved_again_brings_no_dead_address_to_the_front(site, black_hole, serve, good, again):
    addresses = [black_hole().address, good, serve(answer(b"y")).address]
    found = addresses.copy()
    there = site(found=found)
    there.stagger(0.05)
    assert there.client() == b"x"
    found[:] = [addresses[number] for number in again]
    there.stagger(FOR_EVER)
    there.expire()
    first = [address for address in found if address in addresses[1:]][0]
    assert there.client() == (b"x" if first == good else b"y"), "good ones come as the resolver gives them"
    assert there.detail is None and there.asked == ["backend.test"] * 2


def test_a_dead_address_that_comes_back_serves_when_the_other_dies(site, black_hole, serve):
    first, second = black_hole(), black_hole("127.0.0.3")
    there = site(first.address, second.address)
    there.stagger(0.01)
    with there.running.connect(HELLO) as client:
        there.is_racing()
        second.come_back()
        assert client.recv(7) == b"back"
    there.running.ending()
    assert told(second.address, "took it") in there.detail
    second.close()
    first.come_back()
    there.stagger(FOR_EVER)
    assert there.client() == b"back"
    assert there.detail == "; ".join([told(second.address, "Connection refused"), told(first.address, "took it")])
    assert there.client() == b"back" and there.detail is None


@pytest.mark.parametrize("again", [False, True])
def test_a_refused_address_is_no_reason_to_wait(site, good, shut_port, again):
    """Nor is one that cannot be reached; and neither is tried first again."""
    refused, unreachable = shut_port(), ("255.255.255.255", 1)
    there = site(refused, unreachable, good)
    there.stagger(FOR_EVER)
    assert there.client() == b"x"
    said = there.detail.split("; ")  # which words the second has depends on this host's network
    assert said[0] == told(refused, "Connection refused") and said[1].startswith(told(unreachable, ""))
    assert said[2:] == [told(good, "took it")]
    if again:
        there.expire()
    assert there.client() == b"x" and there.detail is None


def test_refused_then_silent_then_good(site, black_hole, good, shut_port):
    addresses = [shut_port(), black_hole().address, shut_port(), good]
    there = site(*addresses)
    there.stagger(0.05)
    assert there.client() == b"x"
    said = there.detail.split("; ")
    assert [line.rpartition(": ")[0] for line in said] == [show_address(address) for address in addresses]
    assert said[0].endswith("refused") and "no answer in 0." in said[1] and said[2].endswith("refused")


def test_a_failure_in_a_race_brings_the_next_address_at_once(site, black_hole, good, shut_port):
    silent, refused = black_hole(), shut_port()
    there = site(silent.address, refused, good)
    there.set("stagger", 0.01)
    there.set("staggered", FOR_EVER)
    assert there.client() == b"x"


def test_all_addresses_dead_are_named_with_what_became_of_them(site, black_hole, shut_port, monkeypatch):
    monkeypatch.setattr(sniroute_race, "CONNECT_TIMEOUT", 0.2)
    addresses = [black_hole().address, shut_port(), black_hole("127.0.0.3").address]
    there = site(*addresses)
    there.stagger(0.05)
    with there.running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    end = there.running.ending()
    assert end.reason == "backend"
    assert end.detail == "tcp:backend.test:5432: " + "; ".join([
        told(addresses[0], "no answer in 0.2 s"), told(addresses[1], "Connection refused"),
        told(addresses[2], "no answer in 0.2 s")])
    assert not there.router.targets.resolved, "perhaps it has moved"


def test_all_addresses_refuse_and_are_named(site, shut_port):
    addresses = [shut_port(), shut_port()]
    there = site(*addresses)
    with there.running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert there.running.ending().detail == "tcp:backend.test:5432: " + "; ".join(
        told(address, "Connection refused") for address in addresses)


def test_one_address_is_named_where_the_target_does_not_say_it(site, run, shut_port):
    address = shut_port()
    for there, says in ((site(address).running, "tcp:backend.test:5432: " + told(address, "Connection refused")),
                        (run("--route=db.example.com=tcp:" + show_address(address)),
                         "tcp:" + told(address, "Connection refused"))):
        with there.connect(HELLO) as client:
            assert read_all(client) == alert(80)
        assert there.ending().detail == says


def test_all_addresses_together_have_a_bound(site, black_hole):
    there = site(*(black_hole(f"127.0.0.{number}").address for number in range(2, 6)))
    there.stagger(0.02)
    there.set("budget", FOR_EVER)
    budget = there.router.deadlines.budget
    with there.running.connect(HELLO) as client:
        there.is_racing(4)
        there.set("budget", 0.1)  # it begins when all are tried: else it might be over before
        there.router.call(lambda: [budget.put(connection) for connection in list(budget.due)])
        assert read_all(client) == alert(80)
    assert there.running.ending().detail.count("no answer in 0.") == 4 and there.running.ending().reason == "backend"


def test_a_slow_first_address_still_wins(site, black_hole):
    """Nothing is said of the second, which had less time."""
    slow, silent = black_hole(), black_hole("127.0.0.3")
    there = site(slow.address, silent.address)
    there.stagger(0.01)
    with there.running.connect(HELLO) as client:
        there.is_racing()
        slow.come_back()
        assert client.recv(7) == b"back"
    assert there.running.ending().detail is None
    assert there.router.targets.resolved[KEY].addresses[0][1] == slow.address


def test_postgres_and_proxy_header_are_for_the_winner(run, monkeypatch, black_hole, serve):
    silent = black_hole()
    ssl_request = bytes.fromhex("0000000804d2162f")

    def postgres(sock: socket.socket) -> bytes:
        heard = b""
        while not heard.endswith(ssl_request):
            heard += sock.recv(1024)
        sock.sendall(b"S")
        heard += read_exactly(sock, len(HELLO))
        sock.sendall(b"x")
        return heard

    far = serve(postgres)
    resolve_as(monkeypatch, lambda: [silent.address, far.address])
    there = Site(run(TARGET, "--proxy-from=127.0.0.1"), [])
    there.stagger(0.02)
    header = b"PROXY TCP4 192.0.2.7 198.51.100.1 1000 443\r\n"
    with there.running.connect(header + ssl_request) as client:
        assert client.recv(1) == b"S"
        client.sendall(HELLO)
        assert client.recv(1) == b"x"
    assert far.result() == header + ssl_request + HELLO


# -- ends of a race --------------------------------------------------------------------------


def test_a_client_that_leaves_in_the_race_leaves_no_descriptor(flow, site, black_hole):
    silent = [black_hole(f"127.0.0.{number}").address for number in (2, 3, 4)]
    there = site(*silent)
    there.stagger(0.01)
    before = len(own_fds())
    with there.running.connect(HELLO):
        there.is_racing(3)
        assert len(own_fds()) == before + 2 + 3, "the client's two ends, and the attempts"
    end = there.running.ending()
    assert end.reason == "client_left" and all(told(row, "no answer in 0.") in end.detail for row in silent)
    assert len(own_fds()) == before and not there.router.deadlines.races.extra
    assert not any(queue.due for queue in there.router.loop.queues)


def test_bytes_that_a_client_says_in_the_race_arrive(site, black_hole, serve):
    silent, far = black_hole(), serve(lambda sock: read_exactly(sock, len(HELLO) + 5))
    there = site(silent.address, far.address)
    with there.running.connect(HELLO) as client:
        client.sendall(b"early")
        assert far.result() == HELLO + b"early"


@pytest.mark.parametrize("how", ["stop", "drain", "drain in time"])
def test_a_router_that_ends_in_the_race(site, black_hole, how):
    first, second = black_hole(), black_hole("127.0.0.3")
    there = site(first.address, second.address)
    there.stagger(0.01)
    with there.running.connect(HELLO) as client:
        there.is_racing()
        attempts = [attempt.sock for connection in list(there.router.connections)
                    for attempt in connection.backend.race.attempts]
        if how == "drain in time":
            there.router.drain(FOR_EVER)
            wait_until(there.router.deaf.is_set)
            second.come_back()
            assert client.recv(7) == b"back"
        elif how == "drain":
            there.router.drain(0.05)
        else:
            there.router.shutdown()
        if how != "drain in time":
            assert read_all(client) == b""
    assert (there.running.ending().reason == "stopped") is (how != "drain in time")
    there.running.thread.join(10)
    assert [sock.fileno() for sock in attempts] == [-1, -1]


def test_a_fault_of_ours_in_the_race_ends_one_connection(site, black_hole, good, monkeypatch, caplog):
    there = site(black_hole().address, good)
    there.stagger(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(Race, "_win", lambda race, winner: 1 // 0)
        with there.running.connect(HELLO) as client:
            assert read_all(client) == b""
    assert there.running.ending().reason == "internal" and "ZeroDivisionError" in caplog.text
    assert there.client() == b"x" and not there.router.deadlines.races.extra


# -- descriptors -----------------------------------------------------------------------------


@pytest.fixture
def scarce(monkeypatch) -> Callable[[Callable[[], bool]], list[int]]:
    """scarce(short) -> calls: sockets for backends cannot be had while `short()` is true; each failure is counted."""
    def make(short: Callable[[], bool]) -> list[int]:
        failures: list[int] = []

        def new(*words: Any) -> socket.SocketType:
            if short():
                failures.append(errno.EMFILE)
                raise OSError(errno.EMFILE, "Too many open files")
            return real(*words)

        real = socket.SocketType
        monkeypatch.setattr(sniroute_targets, "socket", types.SimpleNamespace(**{**vars(socket), "SocketType": new}))
        return failures

    return make


def test_descriptors_that_run_out_in_the_race_leave_the_first_attempt(site, black_hole, good, scarce):
    slow = black_hole()
    there = site(slow.address, good)
    there.stagger(0.01)
    failures = scarce(lambda: there.attempts() > 0 or bool(failures))
    with there.running.connect(HELLO) as client:
        wait_until(lambda: len(failures) > 3)
        slow.come_back()
        assert client.recv(7) == b"back"
    assert there.running.ending().detail is None


def test_a_descriptor_that_is_there_again_is_used(site, black_hole, good, scarce):
    there = site(black_hole().address, good)
    there.stagger(0.01)
    failures = scarce(lambda: there.attempts() > 0 and len(failures) < 3)
    assert there.client() == b"x" and len(failures) == 3


def test_descriptors_that_stay_short_until_the_first_attempt_is_over(site, black_hole, good, scarce, monkeypatch):
    monkeypatch.setattr(sniroute_race, "CONNECT_TIMEOUT", 0.1)
    there = site(black_hole().address, good)
    there.stagger(0.01)
    failures = scarce(lambda: there.attempts() > 0 or bool(failures))
    with there.running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert (there.running.ending().reason, there.detail) == ("busy", "Too many open files")


def test_sockets_of_races_are_limited(site, black_hole, good, monkeypatch):
    """Then a race goes on when its first attempt has had its time."""
    monkeypatch.setattr(sniroute_race, "EXTRA_MAX", 0)
    monkeypatch.setattr(sniroute_race, "CONNECT_TIMEOUT", 0.2)
    silent = black_hole().address
    there = site(silent, good)
    there.stagger(0.01)
    assert there.client() == b"x" and there.detail.startswith(told(silent, "no answer in 0.2 s"))


def test_addresses_are_limited_and_the_last_of_them_is_reached_in_time():
    assert (ADDRESSES_MAX - 1) * sniroute_race.STAGGER + sniroute_race.CONNECT_TIMEOUT < sniroute_race.CONNECT_BUDGET
