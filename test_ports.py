"""Tests of sniroute_ports.py, in its order."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import socket
import subprocess

import pytest

import sniroute_ports
from sniroute_ports import PortPool
from conftest import HOST, FakeClock, linux, wait_until
from testbed.program import ipv6
from testbed.tunnels import listening, port_of

# -- who listens -------------------------------------------------------------------------------


@pytest.fixture(params=["asked for", "read"])
def looked(request, monkeypatch):
    """Listeners are found by sock_diag, and where that cannot be had, in /proc/net."""
    def sandbox(port: int) -> dict[str, int]:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    if request.param == "read":
        monkeypatch.setattr(sniroute_ports, "ask_for_listener", sandbox)


@linux
def test_a_listener_of_this_process_is_own(looked):
    with listening() as listener:
        assert sniroute_ports.listens(os.getpid(), port_of(listener)) == "own"


@linux
def test_nobody_listens_on_a_port_that_is_only_bound(free_ports, looked):
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        assert sniroute_ports.listens(os.getpid(), port_of(bound)) == "nobody"


@linux
@pytest.mark.parametrize("family, host, port_is_reachable", [
    pytest.param(socket.AF_INET, "127.0.0.1", True, id="loopback"),
    pytest.param(socket.AF_INET, "0.0.0.0", True, id="any"),
    pytest.param(socket.AF_INET, "127.0.0.2", False, id="another loopback address"),
    pytest.param(socket.AF_INET6, "::", True, id="any, dual stack"),
    pytest.param(socket.AF_INET6, "::ffff:127.0.0.1", True, id="mapped loopback"),
    pytest.param(socket.AF_INET6, "::1", False, id="IPv6 loopback"),
])
def test_listeners_finds_what_a_connect_reaches(family, host, port_is_reachable, looked):
    if family == socket.AF_INET6 and not pathlib.Path("/proc/self/net/tcp6").exists():
        pytest.skip("no IPv6 here")
    try:
        listener = listening(0, host, family)
    except OSError:
        pytest.skip(f"cannot bind {host} here")
    with listener:
        inode = os.readlink(f"/proc/self/fd/{listener.fileno()}")[8:-1]
        assert sniroute_ports.listeners(port_of(listener)) == ({inode: 0} if port_is_reachable else {})


@linux
def test_listeners_counts_who_waits_to_be_accepted_beside_many_connections(echo_server, looked):
    with contextlib.ExitStack() as stack:
        for _ in range(20):  # rows of other states, on the same port too
            stack.enter_context(socket.create_connection(echo_server.address))
        wait_until(lambda: list(sniroute_ports.listeners(echo_server.address[1]).values()) == [0])
        listener = stack.enter_context(listening())
        for number in range(1, 4):
            stack.enter_context(socket.create_connection(listener.getsockname()))
            wait_until(lambda: list(sniroute_ports.listeners(port_of(listener)).values()) == [number])


@linux
def test_the_kernel_is_asked_for_one_listener_where_it_can_be():
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, sniroute_ports.SOCK_DIAG).close()
    except OSError:
        pytest.skip("no sock_diag here")
    with listening() as listener:
        inode = os.readlink(f"/proc/self/fd/{listener.fileno()}")[8:-1]
        assert sniroute_ports.ask_for_listener(port_of(listener)) == {inode: 0}
    assert sniroute_ports.ask_for_listener(1) == {}


@linux
def test_a_kernel_without_ipv6_is_asked_about_ipv4_only(monkeypatch):
    real = open

    def old_kernel(path, *rest, **options):
        if str(path).endswith("tcp6"):
            raise FileNotFoundError(path)
        return real(path, *rest, **options)

    monkeypatch.setattr(sniroute_ports, "open", old_kernel, raising=False)
    with listening() as listener:
        assert sniroute_ports.listens(os.getpid(), port_of(listener)) == "own"


@linux
def test_a_process_without_sockets_is_nobody_even_where_another_listens(looked):
    with listening() as listener, subprocess.Popen(["sleep", "60"]) as child:
        try:
            assert sniroute_ports.listens(child.pid, port_of(listener)) == "nobody"
        finally:
            child.kill()


@linux
def test_a_process_that_is_gone_is_nobody():
    with subprocess.Popen(["true"]) as child:
        child.wait()
    with listening() as listener:
        assert sniroute_ports.listens(child.pid, port_of(listener)) == "nobody"


@linux
def test_a_listener_that_opens_during_the_look_is_not_taken_for_a_stranger(monkeypatch, free_ports):
    """The child's sockets, then the listeners: what it opened in between seemed to be another's."""
    port = free_ports()[0]
    real = sniroute_ports.socket_inodes
    with contextlib.ExitStack() as stack:
        stack.enter_context(socket.socket())  # it holds another socket already

        looks = []

        def look_then_open(pids):
            found = real(pids)
            looks.append(found)
            if len(looks) == 2:  # the first only asks whether there is any socket
                stack.enter_context(listening(port))
            return found

        monkeypatch.setattr(sniroute_ports, "socket_inodes", look_then_open)
        assert sniroute_ports.listens(os.getpid(), port) != "other"


@linux
def test_a_descriptor_that_closes_during_the_look_hides_no_other(monkeypatch):
    """One closed descriptor ended the look at that process, and its listener seemed another's."""
    with socket.socket() as before, open(os.devnull) as closing, listening() as listener:
        assert before.fileno() < closing.fileno() < listener.fileno()
        real = os.readlink

        def readlink(path, *rest, **options):
            if path == f"/proc/{os.getpid()}/fd/{closing.fileno()}":
                raise FileNotFoundError(path)
            return real(path, *rest, **options)

        monkeypatch.setattr(os, "readlink", readlink)
        assert sniroute_ports.listens(os.getpid(), port_of(listener)) == "own"


@linux
def test_a_listener_for_ipv6_only_is_in_nobodys_way():
    """It looks like one on every address, but a connect to 127.0.0.1 never reaches it."""
    with listening() as own, socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            other.bind(("::", port_of(own)))
        except OSError:
            pytest.skip("no IPv6 here")
        other.listen()
        inode = os.readlink(f"/proc/self/fd/{own.fileno()}")[8:-1]
        assert sniroute_ports.listeners(port_of(own)) == {inode: 0}


@linux
def test_no_descriptor_left_to_look_with_is_no_answer(monkeypatch):
    """The look is made by threads that promise to raise TunnelError only."""
    def exhausted(*_: object, **__: object):
        raise OSError(24, "Too many open files")

    with listening() as listener:
        monkeypatch.setattr(sniroute_ports, "open", exhausted, raising=False)
        monkeypatch.setattr(sniroute_ports.socket, "socket", exhausted)
        assert sniroute_ports.listeners(port_of(listener)) == {}


@pytest.mark.parametrize("backlog, hung", [
    pytest.param([1] * 10, True, id="one client stays"),
    pytest.param([1, 2, 3, 3, 4, 5, 6, 7, 8, 9], True, id="it grows"),
    pytest.param([0], False, id="nobody waits"),
    pytest.param([1, 0], False, id="it was only late"),
    pytest.param([1] * 9 + [0], False, id="it was very late"),
    pytest.param([5, 6, 4], False, id="it gets shorter"),
])
def test_a_backlog_that_never_gets_shorter_is_a_hung_process(backlog, hung, monkeypatch):
    rest = list(backlog)
    monkeypatch.setattr(sniroute_ports, "listeners", lambda port: {"7": rest.pop(0)})
    assert sniroute_ports.leaves_waiting(1, lambda seconds: False) is hung
    assert rest == []


def test_the_look_at_a_backlog_ends_when_it_is_told_to(monkeypatch):
    """The router stops meanwhile, say."""
    monkeypatch.setattr(sniroute_ports, "listeners", lambda port: {"7": 1})
    pauses = iter([False, False, True])
    assert sniroute_ports.leaves_waiting(1, lambda seconds: next(pauses)) is False
    assert next(pauses, None) is None


# -- ports -------------------------------------------------------------------------------------


def test_ports_are_given_lowest_first(free_ports):
    first, last = free_ports(5)
    pool = PortPool(first, last, FakeClock())
    assert [pool.take() for _ in range(6)] == [*range(first, last + 1), None]
    assert pool.next_free() == float("inf")


def test_a_port_rests_before_it_is_given_again(free_ports):
    first, last = free_ports(2)
    clock = FakeClock()
    pool = PortPool(first, last, clock)
    assert pool.take() == first
    pool.give(first)
    assert pool.next_free() == clock() + sniroute_ports.QUARANTINE
    assert pool.take() == last
    assert pool.take() is None
    clock.jump(sniroute_ports.QUARANTINE)
    assert pool.take() == first


def test_a_port_that_another_holds_is_passed_over_and_rests_longer(free_ports):
    first, last = free_ports(3)
    clock = FakeClock()
    pool = PortPool(first, last, clock)
    with listening(first), listening(first + 1, "0.0.0.0"):
        assert pool.take() == last
        assert pool.take() is None
    clock.jump(sniroute_ports.TAKEN_REST - 1)
    assert pool.take() is None
    clock.jump(1)
    assert [pool.take(), pool.take()] == [first, first + 1]


def test_time_wait_does_not_count_as_taken(free_ports):
    first, _ = free_ports(1)
    with listening(first) as listener, socket.create_connection(listener.getsockname()):
        listener.accept()[0].close()  # the side that closes first is left in TIME_WAIT
    with socket.socket() as probe, pytest.raises(OSError):
        probe.bind((HOST, first))  # it is: without SO_REUSEADDR the bind fails
    assert PortPool(first, first, FakeClock()).take() == first


def test_a_host_that_cannot_make_sockets_loses_no_port(free_ports, monkeypatch):
    first, last = free_ports(2)
    pool = PortPool(first, last, FakeClock())

    class Broken(socket.socket):
        def bind(self, *_: object) -> None:
            raise OSError(23, "Too many open files in system")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(socket, "socket", Broken)
        pool.take()
    assert [pool.take(), pool.take()] == [first, last]


# -- who has a port ------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("host", [HOST, "", pytest.param("::1", marks=ipv6)])
def test_the_holder_of_a_port_is_named_for_people(host, monkeypatch):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        number = listener.getsockname()[1]
        assert sniroute_ports.holder(number) == "sniroute itself"
        monkeypatch.setattr(sniroute_ports.os, "getpid", lambda: 0)
        assert re.fullmatch(r"pid [0-9]+ \(.+\)", sniroute_ports.holder(number))
        monkeypatch.setattr(sniroute_ports, "socket_inodes", lambda pids: set())  # as those of another user
        assert sniroute_ports.holder(number) == f"a process of user {os.geteuid()}"
    assert sniroute_ports.holder(number) == ""
