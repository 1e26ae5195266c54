"""Tests of sniroute_handover.py, most with the real program (`launch` of testbed/program.py)."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import socket
import threading
import time
import types
from typing import Any

import pytest

import sniroute_handover
import sniroute_names
from conftest import HOST, Address, linux, wait_until
from testbed.hellos import HELLO, genuine
from testbed.program import Customers, command, ipv6
from testbed.running import TUNNEL, answer, read_exactly, route


# -- a successor -------------------------------------------------------------------------------


@linux
def test_ten_restarts_refuse_nobody_and_cut_nobody(launch, free_ports, single_loop_echo):
    """Each is a second process with the same --listen, which takes over."""
    port = free_ports(1)[0]
    options = f"--listen={HOST}:{port}", route(single_loop_echo), "--drain=60s"
    programs = [launch(*options)]
    with Customers((HOST, port)) as customers, programs[0].connect(HELLO) as old:
        assert read_exactly(old, len(HELLO)) == HELLO
        for _ in range(10):
            programs.append(launch(*options))
            programs[-1].wait_for(" info another sniroute listened there: it drains, and ends\n")
            goal = customers.served + 100
            wait_until(lambda: customers.served >= goal or customers.failures, timeout=20, what="a hundred customers")
        for program in programs[1:-1]:
            assert program.wait() == 0
        old.sendall(b"the first is still there for me")
        assert read_exactly(old, 31) == b"the first is still there for me"
    assert customers.failures == [] and customers.served >= 1000
    assert programs[0].wait() == 0
    assert programs[0].log().count(" reason=client_closed") >= 1


@linux
def test_a_successor_that_fails_changes_nothing(launch, free_ports, echo_server):
    port = free_ports(1)[0]
    program = launch(f"--listen={HOST}:{port}", route(echo_server.address))
    ended = command(f"--listen={HOST}:{port}", f"--listen=192.0.2.1:{port}", route(echo_server.address))
    assert ended.returncode == 1 and f"--listen 192.0.2.1:{port}: Cannot assign requested address" in ended.stderr
    with socket.socket(socket.AF_UNIX) as curious:
        curious.connect(sniroute_handover.Handover.name((HOST, port)))
        assert socket.recv_fds(curious, 16, 0)[0] == b"sockets"
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    assert "another sniroute" not in program.log()


@linux
@pytest.mark.parametrize("host", ["", "0.0.0.0", pytest.param("[::]", marks=ipv6), pytest.param("[::1]", marks=ipv6)])
def test_a_successor_of_any_address_takes_over(launch, free_ports, echo_server, host):
    """The default, every address, is one of two families."""
    options = f"--listen={host}:{free_ports(1)[0]}", route(echo_server.address)
    first = launch(*options)
    second = launch(*options)
    assert first.wait() == 0 and " info another sniroute listens here now\n" in first.log()
    with second.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO


@linux
@ipv6
@pytest.mark.parametrize("first, second, opened", [
    (["0.0.0.0:P", "[::]:P"], [":P"], ["0.0.0.0:P", "[::]:P"]),
    ([":P"], ["0.0.0.0:P", "[::]:P"], ["[::]:P"]),
    (["0.0.0.0:P"], [":P"], ["0.0.0.0:P", "[::]:P"]),
    (["0.0.0.0:P", "[::]:P"], ["[::]:P"], ["0.0.0.0:P", "[::]:P"]),
    (["[::]:P"], ["[::]:P", "127.0.0.1:P"], ["[::]:P"]),
    (["127.0.0.1:P", "[::]:P"], ["127.0.0.1:P", "[::]:P"], ["127.0.0.1:P", "[::]:P"]),
    (["127.0.0.1:P"], ["127.0.0.1:P", "[::1]:P"], ["127.0.0.1:P", "[::1]:P"]),
], ids=lambda value: "+".join(value))
def test_a_successor_with_other_addresses_refuses_nobody_of_either_family(launch, free_ports, single_loop_echo, first,
                                                                          second, opened):
    """One socket for both families, or two: a predecessor's are taken as they are, and what is missing is opened."""
    port = free_ports(1)[0]
    def options(listen: list[str]) -> list[str]:
        return [*(f"--listen={text.replace('P', str(port))}" for text in listen), route(single_loop_echo)]
    old = launch(*options(first), listeners=len(first))
    with Customers((HOST, port)) as customers:
        new = launch(*options(second), listeners=len(opened))
        assert old.wait() == 0
        goal = customers.served + 20
        wait_until(lambda: customers.served >= goal or customers.failures)
    assert customers.failures == []
    assert sorted(map(sniroute_names.show_address, new.addresses)) == sorted(text.replace("P", str(port)) for text in opened)
    with new.connect(HELLO, ("::1", port)) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    last = launch(*options(second), listeners=len(opened))
    assert new.wait() == 0
    for host in (HOST, "::1"):
        with last.connect(HELLO, (host, port)) as client:
            assert read_exactly(client, len(HELLO)) == HELLO


@linux
def test_more_addresses_than_can_be_handed_over_stop_the_start(free_ports, echo_server):
    port = free_ports(1)[0]
    ended = command(*(f"--listen=127.0.1.{n}:{port}" for n in range(127)), route(echo_server.address))
    assert ended.returncode == 1
    assert ended.stderr.endswith("--listen: 127 addresses, and only 126 can be handed over to a successor: "
                                 "name fewer, or all of them as :PORT\n")


@linux
def test_as_many_addresses_as_that_are_handed_over(launch, free_ports, echo_server):
    port = free_ports(1)[0]
    options = *(f"--listen=127.0.1.{n}:{port}" for n in range(126)), route(echo_server.address)
    first = launch(*options, listeners=126)
    second = launch(*options, listeners=126)
    assert first.wait() == 0 and "not handed over" not in second.log()


@linux
def test_silent_owners_of_many_names_cost_one_time_out_in_all_and_are_asked_in_one_order(free_ports, monkeypatch):
    """Two successors that asked in two orders could each have what the other waits for."""
    monkeypatch.setattr(sniroute_handover, "HANDOVER_TIMEOUT", 0.2)
    monkeypatch.setattr(sniroute_handover, "CAPACITY_PAUSE", 0.01)
    asked: list[Address] = []
    name = sniroute_handover.Handover.name
    monkeypatch.setattr(sniroute_handover.Handover, "name", staticmethod(lambda address: asked.append(address) or name(address)))
    first, last = free_ports(8)
    addresses = [(HOST, port) for port in range(first, last + 1)]
    with contextlib.ExitStack() as stack:
        silent, taker = (stack.enter_context(contextlib.closing(sniroute_handover.Handover())) for _ in range(2))
        assert silent.offer(addresses) == []
        asked.clear()
        began = time.monotonic()
        assert taker.take(reversed(addresses)) == [] and time.monotonic() - began < 3
    assert asked == addresses


@linux
def test_who_fills_the_backlog_of_a_name_only_holds_a_successor_up(free_ports, monkeypatch):
    """Any user of the host may connect to it; the kernel then tells a successor to try again."""
    address = HOST, free_ports(1)[0]
    found: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        giver, taker = (stack.enter_context(contextlib.closing(sniroute_handover.Handover())) for _ in range(2))
        listener = stack.enter_context(socket.create_server(address))
        assert giver.offer([address]) == []
        with contextlib.suppress(BlockingIOError):
            while True:
                filler = stack.enter_context(socket.socket(socket.AF_UNIX))
                filler.setblocking(False)
                filler.connect(giver.name(address))
                filler.close()
        again, sleep = threading.Event(), time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: again.set() or sleep(seconds))
        thread = threading.Thread(target=lambda: found.extend(taker.take([address])))
        thread.start()
        assert again.wait(10)
        while thread.is_alive():
            channel = giver.accept(giver.names[0])
            if channel is not None:
                giver.give(channel, [listener])
            sleep(0.001)
        thread.join()
        assert [sock.getsockname() for sock in found] == [address]
        found[0].close()


@linux
def test_an_address_is_free_once_its_name_is(launch, free_ports, echo_server):
    """Of two that share a router's addresses, the second finds no name then, and listens itself."""
    first, last = free_ports(3)
    mine, free, admin = ((HOST, port) for port in range(first, last + 1))
    program = launch(f"--listen={HOST}:{mine[1]}", f"--listen={HOST}:{free[1]}", f"--admin={HOST}:{admin[1]}",
                     route(echo_server.address), listeners=2)
    program.wait_for(" info admin on ")
    with contextlib.closing(sniroute_handover.Handover()) as taker, socket.socket(socket.AF_UNIX) as waiting:
        taken, = taker.take([mine])
        waiting.connect(taker.name(free))
        thread = threading.Thread(target=taker.dismiss)
        thread.start()
        with taken, pytest.raises(ConnectionResetError):
            waiting.recv(1)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(free)
            listener.listen()
        thread.join()
    assert program.wait() == 0


@linux
def test_a_successor_may_come_while_the_first_drains(launch, free_ports, echo_server):
    options = *(f"--listen={HOST}:{port}" for port in free_ports(2)), route(echo_server.address)
    launch = functools.partial(launch, listeners=2)
    first = launch(*options)
    with first.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        first.signal(signal.SIGTERM)
        first.wait_for(" info draining: ")
        second = launch(*options)
        with second.connect(HELLO) as other:
            assert read_exactly(other, len(HELLO)) == HELLO
        client.sendall(b"on")
        assert read_exactly(client, 2) == b"on"
    assert first.wait() == 0
    third = launch(*options)
    with third.connect(HELLO) as other:
        assert read_exactly(other, len(HELLO)) == HELLO
    assert second.wait() == 0
    assert "not handed over" not in second.log() + third.log()


@linux
def test_a_lame_duck_hands_its_listeners_over_and_drains_at_once(launch, free_ports, single_loop_echo):
    """Nobody is refused: its successor is there, so nobody has to be sent elsewhere."""
    port = free_ports(1)[0]
    options = f"--listen={HOST}:{port}", route(single_loop_echo), "--lameduck=60s"
    first = launch(*options)
    with Customers((HOST, port)) as customers:
        first.signal(signal.SIGTERM)
        first.wait_for(" info lameduck: ")
        second = launch(*options)
        second.wait_for(" info another sniroute listened there: it drains, and ends\n")
        assert first.wait() == 0
        goal = customers.served + 20
        wait_until(lambda: customers.served >= goal or customers.failures)
    assert customers.failures == [] and "another sniroute listens here now" in first.log()
    second.signal(signal.SIGTERM)
    second.wait_for(" info lameduck: ")
    second.signal(signal.SIGTERM)


@linux
@pytest.mark.parametrize("giver_sees, taker_sees, taken", [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_sockets_are_neither_given_to_nor_taken_from_another_user(giver_sees, taker_sees, taken, monkeypatch, free_ports):
    address = HOST, free_ports(1)[0]
    found: list[socket.socket] = []
    with contextlib.closing(sniroute_handover.Handover()) as giver, contextlib.closing(sniroute_handover.Handover()) as taker, \
            socket.create_server(address) as listener:
        assert giver.offer([address]) == [] and taker.offer([address]) == [address], "the name has one owner"
        monkeypatch.setattr(giver, "is_ours", lambda peer: not giver_sees)
        monkeypatch.setattr(taker, "is_ours", lambda peer: not taker_sees)
        monkeypatch.setattr(sniroute_handover, "HANDOVER_TIMEOUT", 10.0 if taken else 0.3)
        thread = threading.Thread(target=lambda: found.extend(taker.take([address])))
        thread.start()
        while thread.is_alive():
            channel = giver.accept(giver.names[0])
            if channel is not None:
                given = giver.give(channel, [listener])
                assert given or taker_sees, "one that has seen who this is may have left"
            time.sleep(0.001)
        thread.join()
        assert [sock.getsockname() for sock in found] == [address] * taken
        for sock in found:
            sock.close()


@linux
def test_it_is_told_whose_process_the_other_is(monkeypatch):
    one, other = socket.socketpair()
    with one, other:
        assert sniroute_handover.Handover.is_ours(one)
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
        assert not sniroute_handover.Handover.is_ours(one)


@linux
def test_of_two_successors_at_once_the_second_follows_the_first(launch, free_ports, single_loop_echo):
    port = free_ports(1)[0]
    options = f"--listen={HOST}:{port}", route(single_loop_echo)
    first = launch(*options)
    with Customers((HOST, port)) as customers:
        both = [launch(*options, listeners=0) for _ in range(2)]
        for program in both:
            program.wait_for(" info another sniroute listened there: it drains, and ends\n")
        wait_until(lambda: any(program.process.poll() == 0 for program in both), what="the end of the one between")
        goal = customers.served + 20
        wait_until(lambda: customers.served >= goal or customers.failures)
    assert first.wait() == 0 and customers.failures == []
    assert sum(program.process.poll() is None for program in both) == 1


@linux
def test_there_is_no_moment_without_a_name_between_two_owners(free_ports):
    """Who came then found nobody, and the address in use."""
    address, other = ((HOST, port) for port in free_ports(2))
    with contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(contextlib.closing(sniroute_handover.Handover())) for _ in range(3))
        listener = stack.enter_context(socket.create_server(address))
        assert first.offer([other, address]) == []
        def give(giver: sniroute_handover.Handover, taker: sniroute_handover.Handover, name: int) -> None:
            found: list[socket.socket] = []
            thread = threading.Thread(target=lambda: found.extend(taker.take([address])))
            thread.start()
            channel = wait_until(lambda: giver.accept(giver.names[name]))
            assert giver.give(channel, [listener])
            thread.join()
            assert [sock.getsockname() for sock in found] == [address]
            found[0].close()
            giver.withdraw()
        give(first, second, 1)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(sniroute_handover.Handover.name(address))  # in the backlog of whoever comes
        assert second.offer([address]) == [] and len(second.names) == 1 and not second.inherited
        assert stack.enter_context(second.accept(second.names[0])) is not None
        give(second, third, 0)
        assert third.offer([other, address]) == [], "the one that nobody wanted is free"


@linux
def test_a_name_that_another_process_has_is_taken_later(launch, free_ports, echo_server, monkeypatch):
    address = HOST, free_ports(1)[0]
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(sniroute_handover.Handover.name(address))
        squatter.listen()
        with contextlib.closing(sniroute_handover.Handover()) as taker:
            monkeypatch.setattr(sniroute_handover, "HANDOVER_TIMEOUT", 0.1)
            assert taker.take([address]) == [], "it says nothing: that is no predecessor"
    with contextlib.closing(sniroute_handover.Handover()) as handover:
        assert handover.offer([address]) == []


@linux
def test_a_predecessor_that_drains_hears_a_signal_and_lets_idle_tunnels_go(launch, free_ports, cloudflared, ports, serve):
    """Its first SIGTERM is no second one, and the ports of tunnels that nobody uses are free for the successor."""
    cloudflared.far("*", serve(answer(b"x")).address)
    options = f"--listen={HOST}:{free_ports(1)[0]}", TUNNEL, ports, f"--cloudflared={cloudflared.path}"
    first = launch(*options)
    with first.connect(HELLO) as client:
        with first.connect(genuine(name="idle.example.com")) as other:
            assert client.recv(1) == other.recv(1) == b"x"
        idle = cloudflared.starts("idle.example.com")[0]["pid"]
        second = launch(*options)
        wait_until(lambda: not cloudflared.runs(idle), what="the end of the tunnel that nobody uses")
        first.signal(signal.SIGTERM)
        with second.connect(HELLO) as new:
            assert new.recv(1) == b"x"
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
        first.signal(signal.SIGTERM)
        assert first.wait() == 0


def test_a_successor_that_cannot_be_accepted_for_want_of_descriptors_does_not_make_it_spin(monkeypatch):
    monkeypatch.setattr(sniroute_handover, "CAPACITY_PAUSE", 0.01)
    naps: list[float] = []
    monkeypatch.setattr(sniroute_handover.time, "sleep", naps.append)
    with contextlib.closing(sniroute_handover.Handover()) as handover:
        for number, napped in ((errno.EMFILE, [0.01]), (errno.ECONNABORTED, [])):
            def accept(number: int = number) -> Any:
                raise OSError(number, "short")
            naps.clear()
            assert handover.accept(types.SimpleNamespace(accept=accept)) is None and naps == napped
