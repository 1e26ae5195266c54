"""Tests of sniroute_daemon.py with the real program (`launch` of testbed/program.py).

Signals, a reload, a log that nobody takes, a successor, sockets that systemd passes on, the admin's address, and
what systemd is told.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from typing import Any, Iterator

import pytest

import sniroute_daemon
import sniroute_doctor
import sniroute_loop
import sniroute_router
from conftest import HERE, HOST, Address, linux, wait_until
from testbed.hellos import HELLO, genuine
from testbed.program import (BARE, BARE_PYTHON, PROGRAM, STOP_GRACE, command, counter, cpu_seconds, environment,
                             execute, ipv6, is_pending)
from testbed.running import TUNNEL, alert, answer, read_all, read_exactly, route


# -- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_lets_connections_end_and_stops_the_tunnels_last(launch, cloudflared, ports, echo_server, number):
    cloudflared.far("*", echo_server.address)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}")
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        program.signal(number)
        program.wait_for("draining: 1 connections")
        with pytest.raises(ConnectionRefusedError):
            program.connect()
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
    assert program.wait() == 0
    assert "reason=client_closed" in program.lines[-2]
    assert program.lines[-1].endswith(" info stopped\n")
    assert not cloudflared.runs(cloudflared.starts()[0]["pid"])


@pytest.mark.parametrize("stubborn", [False, True], ids=["tunnel that ends", "tunnel that ignores TERM"])
def test_second_signal_ends_at_once(launch, cloudflared, ports, echo_server, stubborn):
    cloudflared.far("*", echo_server.address)
    cloudflared.fault("*", ignore_term=stubborn)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}")
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        program.signal(signal.SIGTERM)
        program.wait_for("draining: 1 connections")
        began = time.monotonic()
        program.signal(signal.SIGTERM)
        assert read_all(client) == b""
        assert program.wait() == 0
    assert time.monotonic() - began < STOP_GRACE
    assert not cloudflared.runs(cloudflared.starts()[0]["pid"])


def test_second_signal_hurries_tunnels_that_are_being_stopped(launch, cloudflared, ports, serve):
    """No connection is left, and a child ignores TERM."""
    cloudflared.far("*", serve(answer(b"x")).address)
    cloudflared.fault("*", ignore_term=True)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}")
    with program.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    program.wait_for("reason=client_closed")
    began = time.monotonic()
    program.signal(signal.SIGTERM)
    program.wait_for("draining: 0 connections")
    program.signal(signal.SIGINT)
    assert program.wait() == 0
    assert time.monotonic() - began < STOP_GRACE
    assert not cloudflared.runs(cloudflared.starts()[0]["pid"])


def test_signals_that_keep_coming_do_not_break_the_end(launch):
    """One came while the last lines were being written: exit code 1 and a traceback."""
    for _ in range(3):
        program = launch()
        deadline = time.monotonic() + 15
        while program.process.poll() is None:
            assert time.monotonic() < deadline
            program.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.process.wait(0.001)
        program.stop()


def test_usr1_tells_counters_tunnels_and_connections(launch, cloudflared, ports, serve):
    cloudflared.far("*", serve(answer(b"x")).address)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}")
    with program.connect(HELLO) as client, program.connect(HELLO[:9]) as silent:
        assert client.recv(1) == b"x"
        assert counter(program, "accepted") == 2
        row = cloudflared.starts()[0]
        program.wait_for(f" 1 connections, port {row['port']}, pid ")
        assert re.search(r" info tunnel cloudflared:db\.example\.com: ready for \d+ s, 1 connections, ", program.log())
        program.wait_for(f" info connection {HOST}:", 2)
        open_one, silent_one = (f"connection {HOST}:{sock.getsockname()[1]}: " for sock in (client, silent))
        assert re.search(rf"{open_one}open for \d+\.\d s, name db\.example\.com, {len(HELLO)} bytes up, 1 down\n",
                         program.log())
        assert re.search(rf"{silent_one}prelude for \d+\.\d s, name None, 0 bytes up, 0 down\n", program.log())


@linux
def test_tunnels_die_with_a_router_that_is_killed(launch, cloudflared, ports, serve):
    """Ready, starting, and deaf to TERM: the kernel sees to all of them."""
    cloudflared.far("*", serve(answer(b"x")).address)
    cloudflared.fault("*", ignore_term=True)
    cloudflared.fault("late.example.com", never_listen=True)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}")
    with program.connect(HELLO) as client, program.connect(genuine(name="late.example.com")):
        assert client.recv(1) == b"x"
        wait_until(lambda: len(cloudflared.starts()) == 2, what="both starts")
        pids = [row["pid"] for row in cloudflared.starts()]
        assert all(map(cloudflared.runs, pids))
        program.code = -signal.SIGKILL
        program.signal(signal.SIGKILL)
        wait_until(lambda: not any(map(cloudflared.runs, pids)), timeout=2, what="the end of its children")


def test_a_dump_is_bounded_and_comes_whatever_the_log_level(launch, free_ports, single_loop_echo):
    address = HOST, free_ports(1)[0]
    program = launch(f"--listen={address[0]}:{address[1]}", route(single_loop_echo), "--log-level=error", listeners=0)

    def connect() -> socket.socket | None:
        with contextlib.suppress(ConnectionRefusedError):
            return program.connect(HELLO, address)
        return None

    with contextlib.ExitStack() as stack:
        for _ in range(sniroute_daemon.DUMP_MAX + 3):
            client = stack.enter_context(wait_until(connect))
            assert read_exactly(client, len(HELLO)) == HELLO
        program.signal(signal.SIGUSR1)
        program.wait_for(" error and 3 connections more\n")
        assert program.log().count(" error connection ") == sniroute_daemon.DUMP_MAX


# -- reload ------------------------------------------------------------------------------------


def test_hangup_changes_nothing(launch, echo_server):
    program = launch(route(echo_server.address))
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        program.signal(signal.SIGHUP)
        program.wait_for(" warning reload: there is no file of settings to read again; options and variables are for the next start\n")
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
        with program.connect(HELLO) as other:
            assert read_exactly(other, len(HELLO)) == HELLO


def test_hangup_brings_other_settings_and_cuts_nothing(launch, settings_file, echo_server, serve):
    port, other = echo_server.address[1], serve(answer(b"new", len(HELLO))).address[1]
    path = settings_file(f'log_level = "debug"\nports = "11000-11001"\n[routes]\n"db.example.com" = "tcp:{HOST}:{port}"\n')
    program = launch("-c", path)
    new_hello = genuine(name="new.example.com")
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        with program.connect(new_hello) as early:
            assert read_all(early) == alert(112)
        settings_file('log_level = "info"\nports = "12000-12001"\nmax_per_client = 7\nlisten = ":1"\n'
                      f'[routes]\n"new.example.com" = "tcp:{HOST}:{other}"\n')
        program.signal(signal.SIGHUP)
        program.wait_for(" info reload: done, routes: 1\n")
        assert f" warning reload: {path}: ports: is for the next start; it stays as it is\n" in program.log()
        assert " listen: is for" not in program.log(), "that one is on the command line"
        with program.connect(new_hello) as late:
            assert late.recv(3) == b"new"
        with program.connect(HELLO) as gone:
            assert read_all(gone) == alert(112)
        client.sendall(b"still here")
        assert read_exactly(client, 10) == b"still here"


def test_a_bad_file_changes_nothing_and_says_why(launch, settings_file, echo_server):
    good = f'[routes]\n"db.example.com" = "tcp:{HOST}:{echo_server.address[1]}"\n'
    path = settings_file(good)
    program = launch("-c", path)
    for number, (text, complaint) in enumerate((
            ("[routes]\n'db.example.com' = 'tcp:h'\n", "is not HOST:PORT"), ("idle = ", "Invalid value"),
            ("idel = 1\nmax_tunnels = 'x'\n", "did you mean idle?"), (None, "No such file or directory")), 1):
        os.unlink(path) if text is None else settings_file(text)
        program.signal(signal.SIGHUP)
        program.wait_for(" error reload: nothing has changed\n", number)
        assert re.search(f" error reload: {path}: .*{re.escape(complaint)}", program.log())
        with program.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
    settings_file(good)
    program.signal(signal.SIGHUP)
    program.wait_for(" info reload: done, routes: 1\n")


# -- a log that nobody takes -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["closed", "broken", "full"])
def test_log_that_cannot_be_written_stops_nothing_and_reaches_no_client(launch, free_ports, echo_server, kind):
    """stderr is closed before the start, a pipe without a reader, or a disk without room."""
    address = HOST, free_ports(1)[0]
    python = (sys.executable,)
    with contextlib.ExitStack() as stack:
        popen: dict[str, Any] = {}
        if kind == "closed":
            python = ("/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable)
        elif kind == "broken":
            reader, writer = os.pipe()
            os.close(reader)
            popen["stderr"] = stack.enter_context(open(writer, "wb"))
        elif os.path.exists("/dev/full"):
            popen["stderr"] = stack.enter_context(open("/dev/full", "wb"))
        else:
            pytest.skip("no /dev/full here")
        program = launch(f"--listen={HOST}:{address[1]}", route(echo_server.address), "--log-level=debug",
                         python=python, listeners=0, **popen)
    def connect() -> socket.socket | None:
        with contextlib.suppress(ConnectionRefusedError):
            return program.connect(address=address)
        return None
    with wait_until(connect) as client:
        client.sendall(HELLO)
        assert read_exactly(client, len(HELLO)) == HELLO
        for _ in range(20):
            with program.connect(genuine(name="other.example.com"), address) as other:
                assert read_all(other) == alert(112)
        program.signal(signal.SIGUSR1)
        client.sendall(b"still")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"still"
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_log_that_nobody_reads_holds_up_neither_clients_nor_the_end(launch, single_loop_echo):
    """30,000 lines into a pipe that is full after 500."""
    program = launch(route(single_loop_echo), "--log-level=debug")
    program.log_is_read.clear()
    with contextlib.ExitStack() as stack:
        for _ in range(200):  # each is a line in every dump
            client = stack.enter_context(program.connect(HELLO))
            assert read_exactly(client, len(HELLO)) == HELLO
        for _ in range(150):
            program.signal(signal.SIGUSR1)
            client.sendall(b"?")
            assert client.recv(1) == b"?"
        with program.connect(HELLO) as late:
            assert read_exactly(late, len(HELLO)) == HELLO
    program.signal(signal.SIGTERM)
    assert program.process.wait(10) == 0


@linux
def test_log_that_is_read_again_says_how_much_is_missing(launch, single_loop_echo):
    program = launch(route(single_loop_echo))
    program.log_is_read.clear()
    def written() -> int:
        return sum(program.log().count(f" info {text}") for text in ("counters: ", "connection ", "draining: "))
    def dropped() -> int:
        return sum(map(int, re.findall(r" warning the log was too slow: (\d+) lines dropped\n", program.log())))
    def suppressed() -> int:
        return sum(map(int, re.findall(r" suppressed=(\d+) class=", program.log())))
    def refused() -> bool:
        try:
            program.connect().close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            pass  # it was in the backlog when the listener closed
        return False
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            client = stack.enter_context(program.connect(HELLO))
            assert read_exactly(client, len(HELLO)) == HELLO
        for _ in range(70):  # more lines than wait, are being written, and fit into the pipe
            program.signal(signal.SIGUSR1)
            wait_until(lambda: not is_pending(program.pid, signal.SIGUSR1))
        program.signal(signal.SIGTERM)
        wait_until(refused, what="the drain, which comes behind all dumps")
        program.log_is_read.set()
        wait_until(lambda: written() + dropped() + suppressed() == 70 * 201 + 1, what="word of every line")
    assert written() > 200 and suppressed()


# -- a successor -------------------------------------------------------------------------------


class Customers:
    """Clients that come one after the other, in several threads, and note who was refused or cut."""

    def __init__(self, address: Address, threads: int = 4):
        self.address = address
        self.served = 0
        self.failures: list[str] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._come, name="customer") for _ in range(threads)]

    def __enter__(self) -> Customers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _come(self) -> None:
        while not self.stop.is_set():
            try:
                with socket.create_connection(self.address, 20) as client:
                    client.sendall(HELLO)
                    assert read_exactly(client, len(HELLO)) == HELLO
                self.served += 1
            except (OSError, AssertionError) as error:
                self.failures.append(repr(error))
                return


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
        curious.connect(sniroute_daemon.Handover.name((HOST, port)))
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
    monkeypatch.setattr(sniroute_daemon, "HANDOVER_TIMEOUT", 1.0)
    monkeypatch.setattr(sniroute_loop, "CAPACITY_PAUSE", 0.01)
    asked: list[Address] = []
    name = sniroute_daemon.Handover.name
    monkeypatch.setattr(sniroute_daemon.Handover, "name", staticmethod(lambda address: asked.append(address) or name(address)))
    first, last = free_ports(8)
    addresses = [(HOST, port) for port in range(first, last + 1)]
    with contextlib.ExitStack() as stack:
        silent, taker = (stack.enter_context(contextlib.closing(sniroute_daemon.Handover())) for _ in range(2))
        assert silent.offer(addresses) == []
        asked.clear()
        began = time.monotonic()
        assert taker.take(reversed(addresses)) == [] and time.monotonic() - began < 4
    assert asked == addresses


@linux
def test_who_fills_the_backlog_of_a_name_only_holds_a_successor_up(free_ports, monkeypatch):
    """Any user of the host may connect to it; the kernel then tells a successor to try again."""
    address = HOST, free_ports(1)[0]
    found: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        giver, taker = (stack.enter_context(contextlib.closing(sniroute_daemon.Handover())) for _ in range(2))
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
    with contextlib.closing(sniroute_daemon.Handover()) as taker, socket.socket(socket.AF_UNIX) as waiting:
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
@pytest.mark.parametrize("giver_sees, taker_sees, taken", [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_sockets_are_neither_given_to_nor_taken_from_another_user(giver_sees, taker_sees, taken, monkeypatch, free_ports):
    address = HOST, free_ports(1)[0]
    found: list[socket.socket] = []
    with contextlib.closing(sniroute_daemon.Handover()) as giver, contextlib.closing(sniroute_daemon.Handover()) as taker, \
            socket.create_server(address) as listener:
        assert giver.offer([address]) == [] and taker.offer([address]) == [address], "the name has one owner"
        monkeypatch.setattr(giver, "is_ours", lambda peer: not giver_sees)
        monkeypatch.setattr(taker, "is_ours", lambda peer: not taker_sees)
        monkeypatch.setattr(sniroute_daemon, "HANDOVER_TIMEOUT", 0.3)
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
        assert sniroute_daemon.Handover.is_ours(one)
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
        assert not sniroute_daemon.Handover.is_ours(one)


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
        first, second, third = (stack.enter_context(contextlib.closing(sniroute_daemon.Handover())) for _ in range(3))
        listener = stack.enter_context(socket.create_server(address))
        assert first.offer([other, address]) == []
        def give(giver: sniroute_daemon.Handover, taker: sniroute_daemon.Handover, name: int) -> None:
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
        waiting.connect(sniroute_daemon.Handover.name(address))  # in the backlog of whoever comes
        assert second.offer([address]) == [] and len(second.names) == 1 and not second.inherited
        assert stack.enter_context(second.accept(second.names[0])) is not None
        give(second, third, 0)
        assert third.offer([other, address]) == [], "the one that nobody wanted is free"


@linux
def test_a_name_that_another_process_has_is_taken_later(launch, free_ports, echo_server, monkeypatch):
    address = HOST, free_ports(1)[0]
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(sniroute_daemon.Handover.name(address))
        squatter.listen()
        with contextlib.closing(sniroute_daemon.Handover()) as taker:
            monkeypatch.setattr(sniroute_daemon, "HANDOVER_TIMEOUT", 0.1)
            assert taker.take([address]) == [], "it says nothing: that is no predecessor"
    with contextlib.closing(sniroute_daemon.Handover()) as handover:
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


# -- sockets of systemd ------------------------------------------------------------------------

SYSTEMD = """
import fcntl, os, sys
names, fds, command = sys.argv[1], [int(fd) for fd in sys.argv[2].split(",")], sys.argv[3:]
for number, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]):
    os.dup2(fd, 3 + number)
    os.close(fd)
os.execve(command[0], command, {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)),
                                "LISTEN_FDNAMES": names})
"""


def activated(*sockets: tuple[str, Any]) -> dict[str, Any]:
    """What starts a program with these named sockets, as systemd passes them: words before it, and for Popen."""
    fds = [sock.fileno() for _, sock in sockets]
    return {"python": (sys.executable, "-S", "-c", SYSTEMD, ":".join(name for name, _ in sockets),
                       ",".join(map(str, fds)), sys.executable), "pass_fds": fds}


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """A listening socket that systemd would hold."""
    with socket.create_server((HOST, 0), backlog=512) as listener:
        os.set_inheritable(listener.fileno(), True)
        yield listener


def test_five_restarts_below_systemd_refuse_nobody(launch, held, single_loop_echo):
    """The socket is systemd's: who comes while nobody runs waits in its backlog."""
    with Customers(held.getsockname()) as customers:
        for _ in range(5):
            program = launch("--listen=192.0.2.1:9", route(single_loop_echo), **activated(("sniroute", held)))
            assert program.address == held.getsockname()
            goal = customers.served + 40
            wait_until(lambda: customers.served >= goal or customers.failures, timeout=20, what="forty customers")
            cpu = cpu_seconds(program.pid)
            program.signal(signal.SIGTERM)
            assert program.wait() == 0 and cpu < 5
        program = launch(route(single_loop_echo), **activated(("sniroute", held)))
        customers.stop.set()
    assert customers.failures == [] and customers.served >= 200


@linux
def test_a_draining_router_does_not_spin_over_a_socket_that_systemd_holds(launch, held, echo_server):
    program = launch(route(echo_server.address), **activated(("", held)))
    with program.connect(HELLO) as client, contextlib.ExitStack() as stack:
        assert read_exactly(client, len(HELLO)) == HELLO
        program.signal(signal.SIGTERM)
        program.wait_for(" info draining: 1 ")
        stack.enter_context(socket.create_connection(held.getsockname()))  # it waits in the backlog
        before = cpu_seconds(program.pid)
        for _ in range(50):
            client.sendall(b"?")
            assert client.recv(1) == b"?"
            time.sleep(0.005)
        assert cpu_seconds(program.pid) - before < 0.15


@pytest.mark.parametrize("kind", ["datagrams", "connected", "file", "beyond"])
def test_what_is_no_listening_socket_is_refused(kind, held, tmp_path):
    with contextlib.ExitStack() as stack:
        if kind == "datagrams":
            wrong: Any = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        elif kind == "connected":
            wrong = stack.enter_context(socket.create_connection(held.getsockname()))
        else:
            wrong = stack.enter_context(open(tmp_path / "file", "w"))
        made = activated(("", held), ("x\x1b", wrong))
        if kind == "beyond":
            made = activated(("", held))
            made["python"] = tuple(word.replace("str(len(fds))", "'2'") for word in made["python"])
        ended = execute(*made["python"], str(PROGRAM), "--route=a.b=tcp:h:1", env=environment(), text=True,
                        said="", pass_fds=made["pass_fds"])
    shown = "no name" if kind == "beyond" else "x?"
    assert ended.returncode == 1
    assert f"LISTEN_FDS: descriptor 4 ({shown}) is no listening TCP socket\n" in ended.stderr


NO_SOCKETS = {"": [], "admin": [], "admin-public": []}


def test_sockets_for_another_process_are_left_alone(monkeypatch):
    assert sniroute_daemon.activated_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "3"}) == NO_SOCKETS
    assert sniroute_daemon.activated_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}) == NO_SOCKETS


# -- the admin's address -----------------------------------------------------------------------


@linux
def test_the_admin_address_goes_to_the_successor(launch, free_ports, echo_server, admin_path):
    options = f"--listen={HOST}:{free_ports(1)[0]}", route(echo_server.address), f"--admin=unix:{admin_path}"
    first = launch(*options)
    with first.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        second = launch(*options)
        second.wait_for(" info admin on ")
        first.wait_for(" info draining: ")
        assert sniroute_doctor.ask_admin(admin_path)["pid"] == second.pid
    assert first.wait() == 0
    assert sniroute_doctor.ask_admin(admin_path)["pid"] == second.pid, "the first one left the second's socket alone"
    second.stop()
    assert not os.path.exists(admin_path)


def test_the_admin_address_may_be_systemd_s(launch, held, echo_server):
    with socket.create_server((HOST, 0)) as admin:
        launch(route(echo_server.address), **activated(("sniroute", held), ("admin", admin)))
        assert sniroute_doctor.ask_admin(admin.getsockname())["listening"] == ["%s:%d" % held.getsockname()]


def test_an_admin_address_that_is_taken_stops_the_start(launch, echo_server, held):
    ended = command(f"--listen={HOST}:0", route(echo_server.address), "--admin=%s:%d" % held.getsockname())
    assert ended.returncode == 1 and " error --admin: " in ended.stderr and "Traceback" not in ended.stderr


def probe(port: int, path: str = "/healthz") -> str:
    """The status line of the public address."""
    with socket.create_connection((HOST, port), 10) as sock:
        sock.sendall(b"GET %b HTTP/1.1\r\nHost: sniroute.example.com\r\n\r\n" % path.encode())
        return read_all(sock).partition(b"\r\n")[0].decode()


@linux
def test_the_public_address_goes_to_the_successor(launch, free_ports, echo_server):
    port, public = free_ports(2)
    options = f"--listen={HOST}:{port}", route(echo_server.address), f"--admin-public={HOST}:{public}"
    first = launch(*options)
    first.wait_for(f" info metrics and probes on {HOST}:{public}\n")
    assert probe(public) == "HTTP/1.1 200 OK" and " admin on " not in first.log()
    with first.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        second = launch(*options)
        second.wait_for(f" info metrics and probes on {HOST}:{public}\n")
        first.wait_for(" info draining: ")
        assert probe(public, "/readyz") == "HTTP/1.1 200 OK", "it is the second one's, which does not drain"
    assert first.wait() == 0
    assert probe(public, "/readyz") == "HTTP/1.1 200 OK"
    second.stop()


@linux
def test_a_successor_without_the_public_address_goes_on_with_the_admin_s(launch, free_ports, echo_server, held):
    port, admin = free_ports(2)
    options = f"--listen={HOST}:{port}", route(echo_server.address), f"--admin={HOST}:{admin}"
    first = launch(*options)
    second = launch(*options, "--admin-public=%s:%d" % held.getsockname())
    second.wait_for(" error --admin-public: %s:%d: Address already in use: going on without it\n" % held.getsockname())
    second.wait_for(f" info admin on {HOST}:{admin}\n")
    assert first.wait() == 0 and sniroute_doctor.ask_admin((HOST, admin))["pid"] == second.pid


def test_the_public_address_may_be_systemd_s(launch, held, echo_server):
    with socket.create_server((HOST, 0)) as public:
        program = launch(route(echo_server.address), **activated(("sniroute", held), ("admin-public", public)))
        assert probe(public.getsockname()[1], "/metrics") == "HTTP/1.1 200 OK"
        assert probe(public.getsockname()[1], "/status") == "HTTP/1.1 404 Not Found"
        program.wait_for(" info metrics and probes on %s:%d\n" % public.getsockname())


def test_a_public_address_that_is_taken_stops_the_start(launch, echo_server, held):
    ended = command(f"--listen={HOST}:0", route(echo_server.address), "--admin-public=%s:%d" % held.getsockname())
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert " error --admin-public: %s:%d: Address already in use\n" % held.getsockname() in ended.stderr


def test_an_admin_address_needs_the_admin_s_file(two_files):
    ended = execute(*BARE_PYTHON, str(two_files), "check", "--admin=127.0.0.1:1", env=BARE, text=True, said="")
    assert ended.returncode == 2
    assert ended.stderr == "".join(f"sniroute: --admin: {file} is not beside sniroute.py: copy it there\n"
                                   for file in ("sniroute_admin.py", "sniroute_door.py", "sniroute_metrics.py",
                                                "sniroute_page.py"))


def planted(where: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end, after this text of Python."""
    code = f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{where}\nimport sniroute\nsys.exit(sniroute.main())"
    return execute(sys.executable, "-c", code, f"--listen={HOST}:0", *words, env=environment(), text=True, said="")


def test_a_loop_that_ends_by_a_fault_ends_the_program():
    """A service manager starts it again."""
    ended = planted("import sniroute_router\ndef fault(self): raise ZeroDivisionError('planted')\n"
                    "sniroute_router.Router.serve_forever = fault")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert " error the loop ended: please report it\n" in ended.stderr and "ZeroDivisionError: planted" in ended.stderr
    assert ended.stderr.endswith(" info stopped\n")


@pytest.mark.parametrize("option", ["--admin", "--admin-public"])
@pytest.mark.parametrize("where, says", [
    ("import sniroute_page\ndel sniroute_page.PAGE",
     f"sniroute_admin.py: cannot import name 'PAGE' from 'sniroute_page' ({HERE}/sniroute_page.py)"),
    ("import sniroute_admin\nsniroute_admin.attach = None", "'NoneType' object is not callable"),
], ids=["import", "start"])
def test_an_admin_that_is_broken_stops_the_start_in_one_line(where, says, option):
    """Before anybody is dismissed, where that can be known."""
    ended = planted(where, f"{option}=127.0.0.1:0")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    errors = [line for line in ended.stderr.splitlines() if " error " in line]
    assert len(errors) == 1 and errors[0].endswith(f" error {option}: {says}")


def test_a_successor_whose_admin_is_broken_goes_on_without_it(launch, free_ports, echo_server):
    """Its predecessor is dismissed already: there is nobody to go back to."""
    options = route(echo_server.address), f"--listen={HOST}:{free_ports(1)[0]}"
    first = launch(*options)
    code = (f"import sys; sys.path.insert(0, {str(HERE)!r}); del sys.argv[0]; import sniroute_admin, sniroute; "
            "sniroute_admin.attach = None; sys.exit(sniroute.main())")
    second = launch(*options, "--admin=127.0.0.1:0", python=(sys.executable, "-c", code))
    second.wait_for(" error --admin: 'NoneType' object is not callable: going on without it\n")
    assert first.wait() == 0
    with second.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO


def test_a_fault_of_ours_in_a_reload_changes_nothing(caplog):
    """It is no reason to end."""
    def again(running: Any) -> Any:
        raise ZeroDivisionError("planted")
    told: list[str] = []
    settings = types.SimpleNamespace(again=again)
    router = types.SimpleNamespace(reloads=collections.Counter(), last_reload=(True, 0.0))
    supervisor = types.SimpleNamespace(tell=lambda *words: told.extend(words), ready=lambda router: told.append("READY=1"))
    daemon = types.SimpleNamespace(reloading=threading.Lock(), supervisor=supervisor, settings=settings, router=router)
    assert sniroute_daemon.Daemon.reload(daemon) == ["ZeroDivisionError('planted')"]
    assert daemon.settings is settings and router.reloads == {"failed": 1} and not router.last_reload[0]
    assert told[0] == "RELOADING=1" and told[-1] == "READY=1", "a manager would wait for ever"
    assert "please report it" in caplog.text and "reload: nothing has changed" in caplog.text


def test_a_successor_that_cannot_be_accepted_for_want_of_descriptors_does_not_make_it_spin(monkeypatch):
    monkeypatch.setattr(sniroute_daemon, "CAPACITY_PAUSE", 0.01)
    naps: list[float] = []
    monkeypatch.setattr(sniroute_daemon.time, "sleep", naps.append)
    with contextlib.closing(sniroute_daemon.Handover()) as handover:
        for number, napped in ((errno.EMFILE, [0.01]), (errno.ECONNABORTED, [])):
            def accept(number: int = number) -> Any:
                raise OSError(number, "short")
            naps.clear()
            assert handover.accept(types.SimpleNamespace(accept=accept)) is None and naps == napped


# -- systemd -----------------------------------------------------------------------------------


class Manager:
    """A service manager's end of NOTIFY_SOCKET."""

    def __init__(self, address: str):
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(10)
        self.words: list[str] = []

    def hear(self, beginning: str) -> str:
        """The next assignment that begins so."""
        while True:
            for number, word in enumerate(self.words):
                if word.startswith(beginning):
                    del self.words[:number + 1]
                    return word
            self.words += self.socket.recv(4096).decode().split("\n")


@pytest.fixture
def manager(tmp_path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    with made.socket:
        yield made


def test_systemd_is_told_how_it_goes(launch, manager, echo_server, settings_file):
    path = settings_file(f'[routes]\n"db.example.com" = "tcp:{HOST}:{echo_server.address[1]}"\n')
    program = launch("-c", path, "--drain=30s", env=environment(
        NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="200000"))
    manager.hear("READY=1")
    assert manager.hear("STATUS=") == "STATUS=running: 0 connections, 0 tunnels"
    for _ in range(3):
        manager.hear("WATCHDOG=1")
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        assert manager.hear("STATUS=") == "STATUS=running: 1 connections, 0 tunnels"
        before = time.monotonic_ns() // 1000
        program.signal(signal.SIGHUP)
        manager.hear("RELOADING=1")
        assert before <= int(manager.hear("MONOTONIC_USEC=").partition("=")[2]) <= time.monotonic_ns() // 1000
        manager.hear("READY=1")
        program.signal(signal.SIGTERM)
        manager.hear("STOPPING=1")
        assert int(manager.hear("EXTEND_TIMEOUT_USEC=").partition("=")[2]) > 10e6
        assert manager.hear("STATUS=") == "STATUS=draining: 1 connections, 0 tunnels"
        manager.hear("EXTEND_TIMEOUT_USEC=")
        client.sendall(b"on")
        assert read_exactly(client, 2) == b"on"
    assert program.wait() == 0


def test_a_loop_that_hangs_does_not_feed_the_watchdog(run, echo_server):
    running = run(route(echo_server.address))
    beats, stuck, let_go = [], threading.Event(), threading.Event()

    def beat(router: sniroute_router.Router) -> float:
        beats.append(time.monotonic())
        return 0.02

    running.router.hooks = running.router.hooks._replace(beat=beat)
    running.router.call(lambda: running.router.heartbeat.set(0.0))
    wait_until(lambda: len(beats) >= 3, what="a few beats")
    running.router.call(lambda: (stuck.set(), let_go.wait(20)))
    stuck.wait(10)
    count = len(beats)
    with running.connect(HELLO) as client:
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert len(beats) == count
        let_go.set()
        client.settimeout(20)
        assert read_exactly(client, len(HELLO)) == HELLO
    wait_until(lambda: len(beats) > count)


@pytest.mark.parametrize("address", ["/nonexistent/notify", "@nobody", "x" * 200], ids=["gone", "nobody", "long"])
def test_a_manager_that_is_not_there_is_no_reason_to_fail(address, caplog):
    supervisor = sniroute_daemon.Supervisor({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "x"})
    assert f"NOTIFY_SOCKET {address[:20]}" in caplog.text
    supervisor.tell("READY=1")
    supervisor.close()


def test_a_watchdog_for_another_process_is_not_fed():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind("")
        address = "@" + ear.getsockname()[1:].decode()
        for environ, watchdog in (({"WATCHDOG_PID": "1", "WATCHDOG_USEC": "1000"}, False),
                                  ({"WATCHDOG_PID": str(os.getpid()), "WATCHDOG_USEC": "1000"}, True),
                                  ({"WATCHDOG_USEC": "0"}, False), ({}, False)):
            with contextlib.closing(sniroute_daemon.Supervisor({"NOTIFY_SOCKET": address, **environ})) as supervisor:
                assert supervisor.watchdog is watchdog
                assert supervisor.every == (0.0005 if watchdog else sniroute_daemon.STATUS_EVERY)
