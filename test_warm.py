"""Tests of sniroute_warm.py: connections that are dialled ahead, by what their clients and their backend see.

The loop runs in the thread of the test, a turn at a time (Lab.turn), and its queues follow a clock that the test moves.
Sockets are real: the far ends are threads.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import random
import resource
import select
import signal
import socket
import struct
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute_loop
import sniroute_targets
import sniroute_warm
from conftest import HOST, Address, FakeClock, echo, linux, own_fds, wait_until
from sniroute_loop import NEVER, Loop, Queue
from sniroute_race import Row
from sniroute_refusals import Refused
from sniroute_targets import NO_PORT, Backend, TunnelBackend, UnixBackend, Unreachable
from sniroute_warm import DIALS_MAX, GREETING_MAX, PAUSE_SPREAD, PAUSES, RESTING, STEADY, Warm, WarmOptions, WarmPool
from testbed.tunnels import key, listening

OPTIONS = WarmOptions(size=3, max_idle=55.0, max_age=0.0, jitter=0.1, order="lifo", greets=False, connect_timeout=5.0)
RESET = struct.pack("ii", 1, 0)


class Way(Backend):
    """A way that tells how often it was released, and whether its socket was closed then."""

    __slots__ = ("server", "released", "is_gone")

    def __init__(self, rows: list[Row], local: bool):
        super().__init__("tcp:db.example.com:5432", rows, local)
        self.server: Any = None
        self.released: list[bool] = []
        self.is_gone = False

    def begin(self):
        self.server = super().begin()
        return self.server

    def connected(self, server):
        if self.is_gone:
            raise Unreachable("its process ended")

    def release(self):
        self.released.append(self.server is None or self.server.fileno() == -1)
        super().release()


class Lab:
    """A loop whose clock the test moves, and pools on it."""

    def __init__(self, clock: FakeClock):
        self.clock = clock
        self.faults: list[Any] = []
        self.loop = Loop(self.fault)
        self.queues: dict[tuple[float, Any], Queue] = {}
        self.ways: list[Way] = []
        self.dialled: list[float] = []  # when `make_way` was asked
        self.told: list[str] = []
        self.pools: list[WarmPool] = []
        self.local = True
        self.dice = random.Random(1)

    def fault(self, owner: Any) -> None:
        self.faults.append(owner)
        raise  # noqa: PLE0704 - inside `except`

    def queue(self, seconds: float, act: Callable[[Any], Any]) -> Queue:
        if (seconds, act) not in self.queues:
            self.queues[seconds, act] = self.loop.queue(seconds, act)
        return self.queues[seconds, act]

    def way(self, *addresses: Address) -> Callable[[], Way]:
        """A `make_way` that leads to these addresses."""
        def make() -> Way:
            self.dialled.append(self.clock())
            self.ways.append(Way([(socket.AF_INET, address) for address in addresses], self.local))
            return self.ways[-1]

        return make

    def pool(self, make_way: Callable[[], Any] | Address, chance: Callable[[], float] | None = None,
             told: Callable[[str], Any] | None = None, **options: Any) -> WarmPool:
        made = WarmPool(self.loop, self.queue, make_way if callable(make_way) else self.way(make_way),
                        OPTIONS._replace(**options), told or self.told.append, self.clock,
                        chance or self.dice.random)
        self.pools.append(made)
        made.schedule()
        return made

    def full(self, make_way: Callable[[], Any] | Address, **options: Any) -> WarmPool:
        """A pool that has all its connections."""
        made = self.pool(make_way, **options)

        def is_full() -> bool:
            if made in made.breath.due:
                self.clock.jump(sniroute_warm.BREATH)
            return len(made.idle) == made.size

        self.until(is_full, "the pool is full")
        return made

    def turn(self) -> None:
        """One turn, which does not wait."""
        self.loop.call(lambda: None)
        self.loop.turn()

    def settle(self) -> None:
        """Do all that can be done now."""
        for _ in range(5):
            self.turn()

    def until(self, predicate: Callable[[], Any], what: str = "") -> None:
        """Turn until it is so."""
        wait_until(lambda: self.turn() or predicate(), what=what)

    def pass_by(self, seconds: float, step: float = 0.25) -> None:
        """Let so much time pass."""
        end = self.clock() + seconds
        while self.clock() < end:
            self.clock.jump(min(step, end - self.clock()))
            self.settle()

    def close(self) -> None:
        for pool in self.pools:
            pool.close()
        self.turn()
        waiting = [item for queue in self.loop.queues for item in queue.due]
        waiting += [item for batch, _ in self.loop.batches for item in batch]
        watched = sum(callback is not sniroute_loop.ignore for callback in self.loop.poller.callbacks.values())
        self.loop.close()
        assert (waiting, watched) == ([], 1), "nothing but the loop's own pipe"
        assert all(way.released and way.released[0] for way in self.ways), "each way is released, behind its socket"


@pytest.fixture
def lab(monkeypatch) -> Iterator[Lab]:
    clock = FakeClock(1000.0)
    monkeypatch.setattr(sniroute_loop, "monotonic", clock)
    made = Lab(clock)
    yield made
    made.close()
    assert not made.faults


def use(warm: Warm) -> bytes:
    """What a client hears on a connection that it has taken, behind the greeting; it ends it as a client does."""
    with contextlib.closing(warm.sock) as sock:
        assert not sock.getblocking()
        sock.settimeout(5)
        sock.sendall(b"hello")
        heard = b""
        while not heard.endswith(b"hello") and (data := sock.recv(65536)):
            heard += data
    warm.way.release()
    return heard


def drop(warm: Warm | None) -> None:
    if warm is not None:
        warm.sock.close()
        warm.way.release()


class Site:
    """A far end whose connections the test holds in its hands."""

    def __init__(self, port: int, first: bytes = b""):
        self.listener = listening(port, backlog=128)
        self.address: Address = self.listener.getsockname()
        self.first = first
        self.clients: list[socket.socket] = []  # as they came
        self.thread = threading.Thread(target=self.accept, name="far-accept")
        self.thread.start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                with contextlib.suppress(OSError):
                    client.sendall(self.first)
                self.clients.append(client)

    def of(self, warm: Warm) -> socket.socket:
        """The far end of a connection."""
        name = warm.sock.getsockname()
        return wait_until(lambda: next((each for each in list(self.clients) if peer(each) == name), None))

    def stop(self) -> None:
        """Listen no more, and end all connections."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        for sock in (self.listener, *self.clients):
            sock.close()


def peer(sock: socket.socket) -> Any:
    with contextlib.suppress(OSError):
        return sock.getpeername()


@pytest.fixture
def site(free_ports) -> Iterator[Callable[..., Site]]:
    """site(first=b"") -> Site, which says `first` to each client at once, on a port that is the test's to its end."""
    with contextlib.ExitStack() as stack:
        def make(*words: Any) -> Site:
            made = Site(free_ports(1)[0], *words)
            stack.callback(made.stop)
            return made

        yield make


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def shut(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


# -- clients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [True, False], ids=["this host", "another host"])
def test_connections_are_ready_and_each_serves_one_client(lab, echo_server, local):
    lab.local = local
    pool = lab.full(echo_server.address, size=3)
    assert not lab.told and len(lab.ways) == 3
    taken = [pool.take() for _ in range(3)]
    assert len({warm.sock.getsockname() for warm in taken}) == 3 and pool.take() is None
    assert (pool.hit, pool.miss, pool.dead) == (3, 1, 0)
    assert [(use(warm), warm.greeting) for warm in taken] == [(b"hello", b"")] * 3
    lab.until(lambda: len(pool.idle) == 3, "refilled at once")
    assert lab.clock() == 1000, "no time has passed"
    assert [len(way.released) for way in lab.ways] == [1, 1, 1, 0, 0, 0]


def test_a_pool_does_nothing_before_it_is_told_to(lab, echo_server):
    pool = WarmPool(lab.loop, lab.queue, lab.way(echo_server.address), OPTIONS, lab.told.append, lab.clock)
    lab.pools.append(pool)
    lab.settle()
    assert not lab.ways and pool.take() is None
    pool.resize(2)
    lab.until(lambda: len(pool.idle) == 2)


def test_a_connection_that_is_taken_is_its_clients_alone(lab, site):
    """Nothing of the pool reads it, closes it, or waits for it."""
    far = site()
    pool = lab.full(far.address, size=1, max_age=90.0)
    warm = pool.take()
    pool.resize(0)
    far.of(warm).sendall(b"a late word")
    lab.pass_by(200.0, 10.0)
    assert warm.sock.recv(100) == b"a late word" and not warm.events and warm.way.released == []
    assert warm.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert not any(warm in queue.due for queue in lab.loop.queues)
    drop(warm)


def test_who_takes_a_connection_may_go_on_watching_it(lab, site):
    """What comes before it says what is to be called back, is not lost, and is nobody else's."""
    far = site()
    pool = lab.full(far.address, size=1)
    flow = sniroute_loop.Watch(lab.loop.poller, -1)
    warm = pool.take(flow)
    assert (flow.fd, flow.events, warm.events) == (warm.sock.fileno(), sniroute_loop.READ, 0)
    far.of(warm).sendall(b"hello")
    wait_until(lambda: arrived(warm.sock))
    lab.settle()
    heard: list[bytes] = []
    flow.wait_for(sniroute_loop.READ, lambda mask: heard.append(warm.sock.recv(10)))
    lab.until(lambda: heard == [b"hello"])
    flow.closing()
    drop(warm)


@pytest.mark.parametrize("order, wanted", [("fifo", [0, 1, 2]), ("lifo", [2, 1, 0])])
def test_the_first_or_the_last_is_taken(lab, echo_server, order, wanted):
    pool = lab.full(echo_server.address, order=order)
    pool.resize(1)  # nothing is dialled meanwhile
    pool.resize(3)
    lab.until(lambda: len(pool.idle) == 3)
    dialled = list(pool.idle)
    taken = [pool.take() for _ in range(3)]
    assert [dialled.index(warm) for warm in taken] == wanted
    for warm in taken:
        drop(warm)


# -- a backend that ends them, or speaks -------------------------------------------------------


@pytest.mark.parametrize("does", [shut, reset, lambda sock: sock.sendall(b"x")], ids=["ends", "resets", "speaks"])
@pytest.mark.parametrize("is_seen", [True, False], ids=["watched", "under way"])
def test_what_the_backend_does_to_an_idle_connection_no_client_sees(lab, site, does, is_seen):
    far = site()
    pool = lab.full(far.address, size=2)
    lab.pass_by(10.0, 5.0)
    victim = list(pool.idle)[-1]  # the one that would be taken
    sock = victim.sock
    does(far.of(victim))
    if is_seen:
        lab.until(lambda: sock.fileno() == -1)
        lab.until(lambda: len(pool.idle) == 2, "refilled at once")
    else:
        wait_until(lambda: arrived(sock))
    warm = pool.take()
    assert warm is not victim and (pool.hit, pool.dead) == (1, 0 if is_seen else 1)
    assert far.of(warm) and victim.way.released == [True]
    drop(warm)


def arrived(sock: socket.socket) -> bool:
    """Whether there is something to read.  A recv would not do: the kernel tells of a reset once."""
    return bool(select.select([sock], [], [], 0)[0])


def test_where_all_have_ended_a_client_gets_none(lab, site):
    far = site()
    pool = lab.full(far.address, size=3)
    for warm in pool.idle:
        shut(far.of(warm))
    for warm in pool.idle:
        wait_until(lambda: arrived(warm.sock))
    assert pool.take() is None and (pool.hit, pool.miss, pool.dead) == (0, 1, 3)


def test_a_tunnel_whose_process_has_ended_gives_no_connection(lab, echo_server):
    pool = lab.full(echo_server.address, size=2)
    first, last = pool.idle
    last.way.is_gone = True
    warm = pool.take()
    assert warm is first and pool.dead == 1
    drop(warm)


class Impatient:
    """A far end that ends each connection after a while, `0.1 to 0.5 s`, unless its client has said something.

    It does so with `lock` held: whoever holds it knows that nothing ends now.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.listener = listening(backlog=128)
        self.listener.setblocking(False)
        self.address: Address = self.listener.getsockname()
        self.ends: dict[socket.socket, float] = {}
        self.accepted = self.ended = 0
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, name="far-impatient")
        self.thread.start()

    def run(self) -> None:
        dice = random.Random(7)
        while not self.stopping.wait(0.002):
            with self.lock, contextlib.suppress(BlockingIOError):
                while True:
                    client, _ = self.listener.accept()
                    self.accepted += 1
                    self.ends[client] = time.monotonic() + dice.uniform(0.1, 0.5)
            with self.lock:
                for client, when in list(self.ends.items()):
                    with contextlib.suppress(BlockingIOError, ConnectionResetError):
                        data = client.recv(100, socket.MSG_DONTWAIT)
                        client.sendall(data)
                        if not data:
                            del self.ends[client]
                            client.close()
                            continue
                        self.ends[client] = when = NEVER
                    if time.monotonic() >= when:
                        self.ended += 1
                        del self.ends[client]
                        client.close()

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join()
        for sock in (self.listener, *self.ends):
            sock.close()


def test_200_clients_in_a_row_get_no_connection_that_has_ended():
    """The backend ends idle connections after 0.1 to 0.5 s.  Time is real here."""
    faults: list[Any] = []
    loop = Loop(faults.append)
    queues: dict[Any, Queue] = {}

    def queue(seconds: float, act: Callable[[Any], Any]) -> Queue:
        if (seconds, act) not in queues:
            queues[seconds, act] = loop.queue(seconds, act)
        return queues[seconds, act]

    tick = loop.timer(lambda: tick.set(sniroute_loop.monotonic() + 0.0025))
    tick.act()
    far = Impatient()
    try:
        pool = WarmPool(loop, queue, lambda: Backend("", ((socket.AF_INET, far.address),), True),
                        OPTIONS._replace(size=20), lambda why: None)
        pool.schedule()
        wait_until(lambda: loop.turn() or len(pool.idle) == 20)
        for number in range(200):
            if number % 3 == 0:  # between the others the pool has seen nothing yet
                loop.run(range(6))  # about 15 ms
            with far.lock:
                warm = pool.take()
                if warm is not None:
                    with pytest.raises(BlockingIOError):
                        warm.sock.recv(1)  # nothing ends here while the lock is held
                    warm.sock.send(b"hello")
            if warm is not None:
                with contextlib.closing(warm.sock) as sock:
                    sock.settimeout(5)
                    assert sock.recv(100) == b"hello"
                warm.way.release()
        assert pool.hit + pool.miss == 200 and pool.hit >= 3 and far.ended > 0
        assert far.accepted < 200 + 60 and not faults
        pool.close()
    finally:
        far.stop()
        loop.close()


# -- servers that speak first ------------------------------------------------------------------

GREETING = b"220 mail.example.com ESMTP\r\n"


def test_a_greeting_is_delivered_once_and_to_one_client(lab, serve):
    def smtp(sock: socket.socket) -> None:
        sock.sendall(GREETING)
        echo(sock)

    far = serve(smtp)
    pool = lab.full(far.address, size=2, greets=True)
    lab.until(lambda: all(warm.greeting == GREETING for warm in pool.idle))
    first, second = pool.take(), pool.take()
    assert [first.greeting, second.greeting] == [GREETING, GREETING]
    assert [use(first), use(second)] == [b"hello", b"hello"], "and not again"
    lab.until(lambda: len(pool.idle) == 2)


def test_a_greeting_that_was_not_heard_yet_comes_too(lab, site):
    far = site()
    pool = lab.full(far.address, size=1, greets=True)
    warm = next(iter(pool.idle))
    far.of(warm).sendall(b"SSH-2.0-Open")
    lab.until(lambda: warm.greeting)
    far.of(warm).sendall(b"SSH_9.2\r\n")
    wait_until(lambda: arrived(warm.sock))
    assert pool.take() is warm and warm.greeting == b"SSH-2.0-OpenSSH_9.2\r\n" and pool.dead == 0
    drop(warm)


def test_a_connection_whose_news_cannot_be_read_for_lack_of_memory_is_given_up(lab, site):
    """It would wake the loop all the while."""
    far = site()
    pool = lab.full(far.address, size=1)
    warm = next(iter(pool.idle))

    class Starving:
        def __init__(self, sock: Any):
            self.sock = sock

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

        def recv(self, *_: int) -> bytes:
            raise MemoryError

    warm.sock = Starving(warm.sock)
    far.of(warm).sendall(b"news")
    lab.until(lambda: warm.way.released)
    assert warm not in pool.idle


def test_a_server_that_says_goodbye_has_ended(lab, site):
    """Some say so before they close: a greeting does not make an end alive."""
    far = site(b"421 too many connections\r\n")
    pool = lab.full(far.address, size=1, greets=True)
    warm = next(iter(pool.idle))
    lab.until(lambda: warm.greeting)
    far.of(warm).sendall(b"451 idle for too long\r\n")
    shut(far.of(warm))
    lab.until(lambda: warm.way.released)
    assert not pool.idle and pool.take() is None

    again = lab.full(far.address, size=1, greets=True)
    warm = next(iter(again.idle))
    far.of(warm).sendall(b"bye")
    shut(far.of(warm))
    wait_until(lambda: arrived(warm.sock))
    assert again.take() is None and again.dead == 1, "also where the end is still under way behind a byte"


@pytest.mark.parametrize("size, is_kept", [(GREETING_MAX, True), (GREETING_MAX + 1, False), (10 * GREETING_MAX, False)])
def test_a_greeting_has_a_limit(lab, site, size, is_kept):
    far = site(b"x" * size)
    pool = lab.full(far.address, size=1, greets=True)
    warm = next(iter(pool.idle))
    lab.until(lambda: len(warm.greeting) >= GREETING_MAX)
    lab.settle()
    assert (warm in pool.idle) is is_kept


# -- a backend that fails ----------------------------------------------------------------------


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def test_a_backend_that_is_killed_is_dialled_once_a_second_at_most(lab, site):
    far = site()
    pool = lab.full(far.address, size=20)
    lab.pass_by(10.0, 5.0)
    lab.dialled.clear()
    began = time.monotonic()
    far.stop()
    lab.until(lambda: not pool.idle)
    assert time.monotonic() - began < 1
    lab.pass_by(120.0)
    assert lab.dialled[0] == 1010, "one asks at once"
    assert min(gaps(lab.dialled)) >= 1 and 7 <= len(lab.dialled) <= 9, "then ever more seldom"
    assert set(lab.told) == {"Connection refused"} and len(lab.told) == len(lab.dialled)
    assert not pool.idle and not pool.dialling and pool.take() is None


def test_a_backend_that_comes_back_is_tried_with_one_and_then_all_are_there(lab, site, serve):
    far = site()
    pool = lab.full(far.address, size=20)
    far.stop()
    lab.until(lambda: not pool.idle)
    lab.pass_by(10.0)
    assert pool.state is RESTING
    back = serve(echo, far.address)
    before = len(lab.dialled)
    while pool.state is RESTING:
        lab.pass_by(0.25)
    lab.until(lambda: len(pool.idle) == 1)
    wait_until(lambda: back.accepted == 1)
    lab.pass_by(sniroute_warm.PROVEN_AFTER)
    lab.until(lambda: len(pool.idle) == 20)
    assert len(lab.dialled) == before + 20 and pool.setbacks == 0
    drop(pool.take())
    lab.until(lambda: len(pool.idle) == 20, "refilled at once, as before")


def test_a_backend_that_ends_its_silent_connections_at_once_is_no_storm(lab, serve):
    far = serve(lambda sock: None)
    pool = lab.pool(far.address, size=20)
    lab.until(lambda: pool.state is RESTING)
    lab.until(lambda: not pool.idle)
    assert len(lab.dialled) <= 21, "it connects: so the first time all are dialled"
    del lab.dialled[:-1]
    for _ in range(1200):
        lab.clock.jump(0.25)
        lab.settle()
        if pool.idle:
            lab.until(lambda: not pool.idle)
    assert min(gaps(lab.dialled)) >= 1 and len(lab.dialled) <= 16
    assert max(gaps(lab.dialled)) >= 30


def test_a_backend_that_ends_a_connection_now_and_then_is_refilled_at_once(lab, site):
    far = site()
    pool = lab.full(far.address, size=3)
    for _ in range(5):
        lab.pass_by(2.5, 2.5)
        victim = next(iter(pool.idle))
        shut(far.of(victim))
        lab.until(lambda: victim.way.released)
        lab.until(lambda: len(pool.idle) == 3)
    assert pool.state is STEADY and pool.setbacks == 0


def test_clients_that_take_each_one_do_not_hide_that_they_would_have_ended(lab, serve):
    """What was taken says nothing of what idle ones do: the next rest is longer all the same."""
    far = serve(lambda sock: sock.recv(1))
    pool = lab.full(far.address, size=1)
    pool.setbacks = 3
    drop(pool.take())
    lab.until(lambda: len(pool.idle) == 1)
    pool.state = sniroute_warm.PROVING
    drop(pool.take())
    pool.proven()
    assert (pool.state, pool.setbacks) == (STEADY, 3)
    lab.until(lambda: len(pool.idle) == 1)
    pool.proven()
    assert pool.setbacks == 0


@pytest.mark.parametrize("dice, longer", [(0.0, 0.0), (0.9999, PAUSE_SPREAD * 3 / 4)])
def test_pauses_grow_and_are_never_shorter(lab, free_ports, dice, longer):
    lab.pool((HOST, free_ports(1)[0]), chance=lambda: dice)
    lab.settle()
    lab.pass_by(200.0, 0.0625)
    wanted = [seconds * (1 + longer) for seconds in (*PAUSES, 30.0, 30.0)]
    assert gaps(lab.dialled)[:8] == pytest.approx(wanted, abs=0.125)


def test_pools_that_failed_together_do_not_all_come_back_together(lab, free_ports):
    address = HOST, free_ports(1)[0]
    dice = random.Random(5)
    for _ in range(40):
        lab.pool(address, size=1, chance=dice.random)
    lab.settle()
    lab.dialled.clear()
    lab.pass_by(1.3, 0.01)
    assert max(collections.Counter(lab.dialled).values()) <= 25 and len(lab.dialled) == 40


# -- dials -------------------------------------------------------------------------------------


def test_few_are_dialled_at_once(lab, deaf, echo_server):
    """A thousand, one of which has connected; the others are silent."""
    good, silent = lab.way(echo_server.address), lab.way(deaf)
    pool = lab.pool(lambda: (good if not lab.ways else silent)(), size=1000)
    lab.local = False
    lab.until(lambda: pool.state is STEADY)
    lab.pass_by(4.0, 0.5)
    assert len(pool.dialling) == DIALS_MAX and len(lab.ways) <= DIALS_MAX + 1
    lab.pass_by(1.0, 0.5)
    assert pool.state is RESTING and set(lab.told) == {"no answer in 5 s"}


def test_few_are_dialled_in_one_turn(lab, single_loop_echo):
    pool = lab.pool(single_loop_echo, size=150)
    before, most, turns = 0, 0, 0
    while len(pool.idle) < 150:
        lab.turn()
        most, before, turns = max(most, len(pool.idle) - before), len(pool.idle), turns + 1
        lab.clock.jump(sniroute_warm.BREATH / 2)
        assert turns < 100
    assert most == DIALS_MAX


def test_addresses_are_tried_one_after_another(lab, deaf, echo_server, free_ports):
    lab.local = False
    pool = lab.pool(lab.way((HOST, free_ports(1)[0]), deaf, echo_server.address), size=1)
    lab.settle()
    lab.pass_by(4.5)
    assert not pool.idle and len(pool.dialling) == 1
    lab.pass_by(1.0)
    lab.until(lambda: pool.idle)
    assert not lab.told and len(lab.ways) == 1
    assert lab.ways[0].account() == "Connection refused; no answer in 5 s"
    warm = pool.take()
    assert use(warm) == b"hello"


def test_a_dial_to_an_address_that_the_backend_no_longer_has_is_given_up(lab, echo_server, serve):
    """A connect is under way while the name is resolved anew: what comes of it would be kept for as long as any."""
    lab.local = False
    other = serve(echo)
    pool = lab.pool(lambda: lab.way((other if lab.ways else echo_server).address)(), size=1)
    lab.turn()
    assert len(pool.dialling) == 1
    pool.keep_only([(socket.AF_INET, other.address)])
    lab.until(lambda: pool.idle and not pool.dialling)
    assert [warm.way.row for warm in pool.idle] == [(socket.AF_INET, other.address)]


@pytest.mark.parametrize("local", [True, False], ids=["this host", "another host"])
def test_where_no_address_answers_health_hears_why(lab, deaf, free_ports, local):
    lab.local = local
    pool = lab.pool(lab.way((HOST, free_ports(1)[0]), deaf), size=1)
    lab.settle()
    lab.pass_by(5.5)
    assert lab.told == ["Connection refused; no answer in 5 s"] and pool.state is RESTING


def test_a_unix_socket_whose_backlog_is_full_is_waited_for(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(sniroute_targets, "monotonic", lab.clock)
    path = str(tmp_path / "db.sock")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        fillers = []
        with contextlib.suppress(BlockingIOError):
            while True:
                fillers.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
                fillers[-1].setblocking(False)
                fillers[-1].connect(path)

        def make() -> UnixBackend:
            return UnixBackend(f"unix:{path}", ((socket.AF_UNIX, path),), True)

        pool = lab.pool(make, size=1)
        lab.pass_by(1.0)
        assert not pool.idle and len(pool.dialling) == 1 and not lab.told
        for _ in fillers[:-1]:
            listener.accept()[0].close()
        lab.pass_by(0.25)
        assert len(pool.idle) == 1 and not lab.told

        given_up = lab.pool(make, size=1)  # the backlog has one again
        lab.pass_by(6.0)
        assert not given_up.idle and lab.told == ["its backlog was full for 5 s"]


def test_a_program_is_kept_warm_too(lab):
    """Its connection is a pair of sockets: there is no address, and no connect."""
    far: list[socket.socket] = []

    class Program(Way):
        __slots__ = ()

        def begin(self):
            self.server, other = socket.socketpair()
            self.server.setblocking(False)
            far.append(other)
            return self.server

    def make() -> Program:
        lab.ways.append(Program([], True))
        return lab.ways[-1]

    pool = lab.full(make, size=1)
    warm = pool.take()
    warm.sock.sendall(b"hello")
    assert far[0].recv(10) == b"hello"
    drop(warm)
    lab.until(lambda: len(pool.idle) == 1)
    for sock in far:
        sock.close()
    lab.until(lambda: not pool.idle)
    assert [way.released for way in lab.ways] == [[True], [True]] and pool.state is RESTING


@pytest.mark.parametrize("answer", [None, Refused("forbidden", "db.example.com is 192.0.2.1, which is forbidden")],
                         ids=["not ready", "refused"])
def test_a_backend_that_is_not_ready_is_asked_for_again(lab, echo_server, answer):
    make, asked = lab.way(echo_server.address), []

    def ready() -> Way | None:
        asked.append(lab.clock())
        if len(asked) > 2:
            return make()
        if answer is not None:
            raise answer
        return None

    pool = lab.pool(ready, size=2, chance=lambda: 0.0)
    lab.settle()
    lab.pass_by(3.2, 0.025)
    assert asked[:3] == pytest.approx([1000, 1000.05, 1000.15] if answer is None else [1000, 1001, 1003], abs=0.06)
    assert lab.told == ([] if answer is None else [str(answer)] * 2)
    lab.pass_by(2.0)
    lab.until(lambda: len(pool.idle) == 2)


@linux
def test_where_descriptors_are_short_it_waits_and_blames_nobody(lab, echo_server):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    pool = lab.full(echo_server.address, size=1)
    wait_until(lambda: echo_server.accepted == 1)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    drop(pool.take())
    wait_until(lambda: not echo_server.live, what="its end is closed, too: later it would make room for a dial")
    spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]  # what has just become free
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, own_fds())) + 1, limit[1]))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(spare[0]))
    try:
        lab.settle()
        lab.pass_by(0.75)
        assert pool.state is RESTING and not pool.idle and not lab.told and pool.setbacks == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for fd in (*taken, *spare):
            os.close(fd)
    lab.pass_by(1.0)
    lab.until(lambda: len(pool.idle) == 1)


def test_where_ports_to_dial_from_are_short_it_waits_and_blames_nobody(lab, echo_server, monkeypatch):
    pool = lab.full(echo_server.address, size=1)
    with monkeypatch.context() as short:
        short.setattr(Backend, "begin", lambda way: way.tell(way.addresses[0], NO_PORT))
        drop(pool.take())
        lab.settle()
        lab.pass_by(0.75)
        assert pool.state is RESTING and not pool.idle and not lab.told and pool.setbacks == 0
    lab.pass_by(1.0)
    lab.until(lambda: len(pool.idle) == 1)


def test_a_tunnel_whose_process_ends_during_the_connect_is_a_failure(lab, echo_server):
    make = lab.way(echo_server.address)

    def ended() -> Way:
        way = make()
        way.is_gone = True
        return way

    pool = lab.pool(ended, size=1)
    lab.settle()
    assert lab.told == ["its process ended"] and pool.state is RESTING


# -- time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["max_idle", "max_age"])
def test_what_began_together_does_not_end_together(lab, single_loop_echo, option):
    dice = random.Random(3)
    pool = lab.full(single_loop_echo, size=100, chance=dice.random, **{"max_idle": 0.0, option: 60.0})
    lab.dialled.clear()
    lab.pass_by(53.9, 5.39)
    assert not lab.dialled, "none before"
    lab.pass_by(12.2, 0.2)
    first = lab.dialled[:100]  # each end is refilled at once
    assert 1053.9 <= min(first) < 1056 and 1064 < max(first) <= 1066.2
    assert max(collections.Counter(int(when) for when in first).values()) < 25
    lab.until(lambda: len(pool.idle) == 100)
    assert pool.dead == 0 and pool.state is STEADY


def test_without_limits_a_connection_stays(lab, echo_server):
    pool = lab.full(echo_server.address, size=2, max_idle=0.0, max_age=0.0)
    lab.pass_by(100_000.0, 10_000.0)
    assert len(pool.idle) == len(lab.ways) == 2


@pytest.mark.parametrize("greets", [False, True])
def test_a_connection_that_is_closed_unused_ends_orderly(lab, serve, greets):
    """The server reads an end, no reset: that is what it does not log."""
    def wait_for_end(sock: socket.socket) -> bytes:
        sock.sendall(GREETING if greets else b"")
        return sock.recv(100)

    far = serve(wait_for_end)
    pool = lab.full(far.address, size=1, greets=greets)
    lab.until(lambda: not greets or next(iter(pool.idle)).greeting)
    lab.pass_by(70.0, 10.0)
    assert far.result() == b""


def test_who_speaks_unasked_hears_an_end_too(lab, serve):
    def speak(sock: socket.socket) -> bytes:
        sock.sendall(b"x" * 4000)
        return sock.recv(100)

    far = serve(speak)
    lab.pool(far.address, size=1)
    lab.until(lambda: lab.ways and lab.ways[0].released)
    assert far.result() == b""


# -- given back --------------------------------------------------------------------------------


def dial(lab: Lab, address: Address) -> tuple[Way, socket.socket]:
    """A client's own connection."""
    way = lab.way(address)()
    sock = way.open()
    wait_until(lambda: peer(sock))
    return way, sock


def test_a_connection_that_comes_back_serves_another_client(lab, echo_server):
    pool = lab.pool(echo_server.address, size=0)
    way, sock = dial(lab, echo_server.address)
    pool.put(way, sock, pool.birth())
    lab.settle()
    warm = pool.take()
    assert (warm.way, warm.sock, pool.hit) == (way, sock, 1) and use(warm) == b"hello"


@pytest.mark.parametrize("is_seen", [True, False], ids=["watched", "under way"])
def test_an_answer_that_comes_late_reaches_no_other_client(lab, site, is_seen):
    """Also where servers may speak first."""
    far = site()
    pool = lab.full(far.address, size=1, greets=True)
    warm = pool.take()
    pool.resize(0)
    pool.put(warm.way, warm.sock, warm.began)
    far.of(warm).sendall(b"the former client's")
    if is_seen:
        lab.until(lambda: not pool.idle)
    else:
        wait_until(lambda: arrived(warm.sock))
    assert pool.take() is None and warm.way.released == [True]


def test_a_connection_that_ends_soon_after_it_came_back_is_no_setback(lab, site):
    """HTTP servers end theirs whenever they like."""
    far = site()
    pool = lab.full(far.address, size=1)
    way, sock = dial(lab, far.address)
    pool.put(way, sock, pool.birth())
    shut(wait_until(lambda: next((each for each in far.clients if peer(each) == sock.getsockname()), None)))
    lab.until(lambda: way.released)
    assert pool.setbacks == 0 and len(pool.idle) == 1


def test_the_age_of_a_connection_is_that_since_its_birth(lab, echo_server):
    pool = lab.full(echo_server.address, size=1, max_idle=1000.0, max_age=160.0, chance=lambda: 0.9999)
    warm = pool.take()
    pool.resize(0)
    assert warm.began == 1016, "its share of jitter is in it"
    for _ in range(10):
        lab.pass_by(15.0, 5.0)
        pool.put(warm.way, warm.sock, warm.began)
        lab.settle()
        assert pool.take() is not None
    lab.pass_by(14.0, 5.0)  # 164 s of 176, and the rest is rounded down to a sixteenth of 160
    pool.put(warm.way, warm.sock, warm.began)
    lab.pass_by(9.0)
    assert len(pool.idle) == 1
    lab.pass_by(3.0)
    assert not pool.idle and warm.way.released == [True]


def test_a_connection_that_is_too_old_does_not_come_back(lab, echo_server):
    pool = lab.pool(echo_server.address, size=0, max_age=60.0)
    way, sock = dial(lab, echo_server.address)
    born = pool.birth()
    lab.pass_by(70.0, 10.0)
    pool.put(way, sock, born)
    assert not pool.idle and way.released == [True]


def test_being_idle_begins_anew(lab, echo_server):
    pool = lab.full(echo_server.address, size=1, max_idle=60.0, jitter=0.0)
    warm = pool.take()
    lab.until(lambda: pool.idle)
    for _ in range(5):
        lab.pass_by(50.0, 10.0)
        pool.put(warm.way, warm.sock, warm.began)
        assert pool.take() is not None
    pool.put(warm.way, warm.sock, warm.began)
    lab.pass_by(61.0, 10.0)
    assert warm.way.released == [True]


@pytest.mark.parametrize("size, kept", [(0, 2), (4, 4)])
def test_of_too_many_the_longest_idle_one_is_closed(lab, echo_server, monkeypatch, size, kept):
    monkeypatch.setattr(sniroute_warm, "REUSED_MAX", 2)
    pool = lab.pool(echo_server.address, size=size)
    lab.until(lambda: len(pool.idle) == size)
    given = [dial(lab, echo_server.address) for _ in range(5)]
    for way, sock in given:
        pool.put(way, sock, pool.birth())
    assert [warm.sock for warm in pool.idle] == [sock for _, sock in given[-kept:]]
    lab.settle()
    assert len(lab.dialled) == size + 5, "where there are enough nothing is dialled"


# -- the owner ---------------------------------------------------------------------------------


def test_the_number_follows_the_share_of_the_backend(lab, echo_server):
    pool = lab.full(echo_server.address, size=5)
    oldest = list(pool.idle)[:3]
    pool.resize(2)
    assert [len(warm.way.released) for warm in oldest] == [1, 1, 1] and len(pool.idle) == 2
    pool.resize(4)
    lab.until(lambda: len(pool.idle) == 4)
    assert len(lab.ways) == 7


def test_a_backend_that_is_down_keeps_none_and_is_tried_at_once_when_it_is_back(lab, deaf, echo_server):
    way = [lab.way(echo_server.address)]
    pool = lab.full(lambda: way[0](), size=3)
    lab.local = False
    way[0] = lab.way(deaf)
    drop(pool.take())
    lab.until(lambda: pool.dialling)
    lab.pass_by(5.25)
    assert pool.state is RESTING
    way[0] = lab.way(deaf)
    lab.pass_by(1.5)
    assert len(pool.idle) == 2 and len(pool.dialling) == 1
    pool.resize(0)
    assert not pool.idle and not pool.dialling
    lab.pass_by(100.0, 10.0)
    count = len(lab.ways)
    assert count == 5, "nothing is dialled meanwhile"
    way[0] = lab.way(echo_server.address)
    pool.resize(2)
    lab.pass_by(0.25)
    lab.until(lambda: pool.idle)
    lab.pass_by(sniroute_warm.PROVEN_AFTER)
    lab.until(lambda: len(pool.idle) == 2)


def test_a_smaller_share_gives_up_dials_first(lab, deaf, echo_server):
    good, silent = lab.way(echo_server.address), lab.way(deaf)
    pool = lab.pool(lambda: (good if not lab.ways else silent)(), size=5)
    lab.local = False
    lab.until(lambda: len(pool.dialling) == 4)
    pool.resize(3)
    assert (len(pool.idle), len(pool.dialling)) == (1, 2)
    pool.resize(1)
    assert (len(pool.idle), len(pool.dialling)) == (1, 0)
    pool.resize(1)
    lab.settle()
    assert (len(pool.idle), len(pool.dialling), len(lab.ways)) == (1, 0, 5)


@pytest.mark.parametrize("does", [lambda pool: pool.resize(0), lambda pool: pool.close()], ids=["resize", "close"])
def test_whoever_hears_of_a_dial_may_end_it_all(lab, free_ports, does):
    told: list[str] = []

    def hear(why: str) -> None:
        told.append(why)
        does(pool)

    pool = lab.pool((HOST, free_ports(1)[0]), told=hear, size=3)
    lab.settle()
    lab.pass_by(60.0, 5.0)
    assert told == ["Connection refused"] and not pool.idle and not pool.dialling


def test_where_a_client_is_sent_again_the_last_look_is_left_out(lab, echo_server):
    """Whoever takes it sends the same bytes elsewhere if it has ended."""
    pool = lab.pool(echo_server.address, size=1)
    lab.until(lambda: len(pool.idle) == 1)
    warm, = pool.idle
    warm.sock.shutdown(socket.SHUT_RDWR)
    taken = pool.take(is_replayable=True)
    assert taken is warm and (pool.hit, pool.dead) == (1, 0)
    taken.discard()


@pytest.mark.parametrize("is_resting", [False, True])
def test_the_end_closes_everything_once(lab, deaf, echo_server, free_ports, is_resting):
    ways = [lab.way(echo_server.address), lab.way(echo_server.address), lab.way(deaf)]
    pool = lab.pool(lambda: ways[min(len(lab.ways), 2)](), size=3)
    lab.local = False
    lab.until(lambda: len(pool.idle) == 2 and pool.dialling)
    if is_resting:
        pool.failed(next(iter(pool.dialling)), "a failure")
        assert pool.state is RESTING
    told = lab.told.copy()
    pool.close()
    pool.close()
    way, sock = dial(lab, echo_server.address)
    pool.put(way, sock, pool.birth())
    assert [each.released for each in lab.ways] == [[True]] * 4
    pool.resize(7)
    pool.schedule()
    lab.pass_by(100.0, 10.0)
    assert pool.take() is None and lab.told == told and len(lab.ways) == 4


def test_an_event_for_nothing_ends_nothing(lab, deaf, echo_server):
    """The poller may name a number for what it was before."""
    pool = lab.full(echo_server.address, size=1)
    warm = next(iter(pool.idle))
    lab.loop.poller.callbacks[warm.fd](sniroute_loop.READ)
    assert pool.take() is warm
    drop(warm)

    silent = lab.pool(deaf, size=1)
    lab.until(lambda: silent.dialling)
    dialled = next(iter(silent.dialling))
    lab.loop.poller.callbacks[dialled.fd](sniroute_loop.WRITE)
    assert list(silent.dialling) == [dialled] and silent.state is sniroute_warm.TRYING


# -- tunnels -----------------------------------------------------------------------------------


def test_a_warm_connection_keeps_its_tunnel_and_ends_with_it(lab, bench, cloudflared, echo_server):
    cloudflared.far("a.example.com", echo_server.address)
    made = bench(idle=100.0)
    tunnel = made.ready("a.example.com")

    def make() -> TunnelBackend | None:
        leased = made.table.lease(key("a.example.com"))
        return None if leased is None else TunnelBackend(made.table, "cf:a.example.com", None, leased, leased.child)

    pool = lab.pool(make, size=2)
    lab.until(lambda: len(pool.idle) == 2)
    assert tunnel.leases == 2 and not lab.told
    made.clock.jump(1000)
    made.table.step(0.005)
    assert tunnel.child is not None, "it is not idle"
    warm = pool.take()
    lab.until(lambda: len(pool.idle) == 2)
    assert tunnel.leases == 3
    drop(warm)
    os.kill(tunnel.child.process.popen.pid, signal.SIGKILL)
    lab.until(lambda: not pool.idle)
    lab.until(lambda: tunnel.leases == 0)
