"""Tests of sniroute_router.py: whom it accepts, what it limits, what waits, what it sweeps, and how it ends.

The router runs in a thread (`run` of testbed/running.py); where an address is the subject, it is the real program
(`launch` of testbed/program.py).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import os
import re
import signal
import socket
import threading
import time
from typing import Any, Callable

import pytest

import sniroute_connection
import sniroute_resets
import sniroute_deadlines
import sniroute_loop
import sniroute_listeners
import sniroute_router
import sniroute_targets
from sniroute_refusals import SettingsError
from sniroute_routes import Decision, parse_route
from sniroute_settings import load_settings
from conftest import HOST, connect, wait_until
from testbed.hellos import HELLO, ROUTED_HEADER, V1, genuine
from testbed.program import command, has_ipv6, ipv6
from testbed.running import DB, TUNNEL, Running, alert, answer, read_all, read_exactly, reset, route


# -- listeners ---------------------------------------------------------------------------------


def test_options_of_the_listener_are_those_of_its_connections(run, serve):
    """Set once, inherited: no system call for each client."""
    running = run(route(serve(answer(b"x")).address))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        connection, = running.router.connections
        for sock in (connection.client, connection.down.source):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert not sock.getblocking()
        assert connection.client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert connection.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # it would end clients that are alive and do not read
            assert connection.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


ALL4, ALL6, LOCAL4, LOCAL6 = "0.0.0.0:P", "[::]:P", "127.0.0.1:P", "[::1]:P"


@ipv6
@pytest.mark.parametrize("listen, opened, left, reached", [
    ([ALL4, ALL6], [ALL4, ALL6], [], [LOCAL4, LOCAL6]),
    ([ALL6, ALL4], [ALL4, ALL6], [], [LOCAL4, LOCAL6]),
    ([":P", LOCAL4], [ALL6], [LOCAL4], [LOCAL4, LOCAL6]),
    ([LOCAL4, ":P"], [ALL6], [LOCAL4], [LOCAL4, LOCAL6]),
    ([":P", ALL4, LOCAL6], [ALL6], [ALL4, LOCAL6], [LOCAL4, LOCAL6]),
    ([":P", ALL6], [ALL6], [ALL6], [LOCAL4, LOCAL6]),
    ([ALL6], [ALL6], [], [LOCAL4, LOCAL6]),
    ([ALL6, LOCAL4], [LOCAL4, ALL6], [], [LOCAL4, LOCAL6]),
    ([LOCAL6, ALL6], [ALL6], [LOCAL6], [LOCAL4, LOCAL6]),
    ([ALL4, LOCAL4, LOCAL6], [ALL4, LOCAL6], [LOCAL4], [LOCAL4, LOCAL6]),
    ([LOCAL4, LOCAL4], [LOCAL4], [LOCAL4], [LOCAL4]),
    (["localhost:P", LOCAL4], None, [LOCAL4], [LOCAL4]),
    (["[::ffff:127.0.0.1]:P"], [LOCAL4], [], [LOCAL4]),
    (["[::ffff:0.0.0.0]:P", ALL6], [ALL4, ALL6], [], [LOCAL4, LOCAL6]),
    (["[::ffff:127.0.0.1]:P", ":P"], [ALL6], [LOCAL4], [LOCAL4, LOCAL6]),
], ids=lambda value: "+".join(value) if isinstance(value, list) else "any")
def test_addresses_that_include_each_other_are_listened_on_in_any_order(launch, free_ports, echo_server, listen, opened,
                                                                        left, reached):
    port = str(free_ports(1)[0])
    program = launch(*(f"--listen={text.replace('P', port)}" for text in listen), route(echo_server.address),
                     listeners=len(opened or [LOCAL4]))
    for text in reached:
        host = "::1" if text is LOCAL6 else HOST
        with program.connect(HELLO, (host, int(port))) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
    program.stop()
    found = sorted(re.findall(r" listening on (\S+)$", program.log(), re.MULTILINE))
    assert opened is None or found == sorted(text.replace("P", port) for text in opened)
    said = re.findall(r" warning --listen: left out, since another address takes their clients: (.*)$", program.log(),
                      re.MULTILINE)
    assert len(said) == bool(left), program.log()
    for text, line in zip(left, "".join(said).split(", ")):
        assert line.startswith(f"{text.replace('P', port)} ("), said


def test_port_zero_is_another_port_each_time(launch, echo_server):
    program = launch("--listen=:0", f"--listen={HOST}:0", f"--listen={HOST}:0", route(echo_server.address), listeners=3)
    assert len({port for _, port in program.addresses}) == 3 and "left out" not in program.log()


def test_a_name_that_has_an_address_twice_is_listened_on_once(monkeypatch):
    """As where /etc/hosts has two lines for it."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: 2 * [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOST, 0))])
    assert sniroute_listeners.arrange([("localhost", 0)]) == ([(socket.AF_INET, (HOST, 0))], "")


@pytest.mark.parametrize("host, wanted", [("*", ["::", "0.0.0.0"]), ("::", ["::", "0.0.0.0"]), ("127.0.0.1", ["127.0.0.1"])])
def test_a_predecessor_is_asked_for_both_sockets_that_may_take_a_port(host, wanted, monkeypatch):
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: True)
    assert sniroute_listeners.wanted_addresses([(host, 7)]) == [(each, 7) for each in wanted]
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    assert sniroute_listeners.wanted_addresses([("*", 7)]) == [("0.0.0.0", 7)]


def test_port_alone_is_every_address(launch, echo_server):
    program = launch("--listen=:0", route(echo_server.address))
    hosts = [HOST, "::1"] if has_ipv6() else [HOST]
    for host in hosts:
        with program.connect(HELLO, (host, program.address[1])) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
    program.stop()
    clients = re.findall(r"client=(\S+):\d+ ", program.log())
    assert sorted(clients) == sorted(f"[{host}]" if ":" in host else host for host in hosts)


@ipv6
def test_ipv6_address_alone_is_not_reached_by_ipv4(launch, echo_server):
    program = launch("--listen=[::1]:0", route(echo_server.address))
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    with pytest.raises(ConnectionRefusedError):
        program.connect(address=(HOST, program.address[1]))


def test_several_addresses_are_one_service(launch, echo_server):
    program = launch(f"--listen={HOST}:0", f"--listen={HOST}:0", route(echo_server.address), listeners=2)
    assert len(set(program.addresses)) == 2
    for address in program.addresses:
        with program.connect(HELLO, address) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_address_that_is_taken_is_named_in_one_line(echo_server):
    ended = command(f"--listen={HOST}:{echo_server.address[1]}", route(echo_server.address, "*"),
                    SNIROUTE_LISTEN=":1")
    assert ended.returncode == 2, "that would be a circle"
    ended = command(f"--listen={HOST}:{echo_server.address[1]}", route((HOST, 1)))
    assert ended.returncode == 1
    assert re.fullmatch(rf"\S+ error --listen {HOST}:\d+: Address already in use: pid {os.getpid()} \(.+\) has it\n",
                        ended.stderr), ended.stderr


@ipv6
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", ""])
def test_a_port_that_another_process_has_is_not_left_out(echo_server, host):
    port = echo_server.address[1]
    ended = command(f"--listen={host}:{port}", f"--listen={HOST}:{port}", route((HOST, 1)))
    assert ended.returncode == 1 and ended.stderr.count("Address already in use") == 1, ended.stderr


def test_address_of_another_machine_is_named_in_one_line():
    ended = command("--listen=192.0.2.1:19000", route((HOST, 1)))
    assert ended.returncode == 1
    assert re.fullmatch(r"\S+ error --listen 192.0.2.1:19000: .+\n", ended.stderr), ended.stderr


def test_listen_address_that_does_not_resolve_is_named_in_one_line(monkeypatch):
    def getaddrinfo(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(SettingsError, match="^--listen no-such-host:1: Name or service not known$"):
        sniroute_listeners.listen_addresses("no-such-host", 1)


def test_client_that_is_gone_before_its_accept_holds_up_nobody(run, echo_server, monkeypatch, caplog):
    """ECONNABORTED; EPERM is a firewall's."""
    real, errors = sniroute_listeners.Listener.accept, [errno.ECONNABORTED, errno.EPERM]
    def accept(self: sniroute_listeners.Listener) -> Any:
        if errors:
            raise OSError(errors.pop(), "gone")
        return real(self)
    monkeypatch.setattr(sniroute_listeners.Listener, "accept", accept)
    running = run(route(echo_server.address))
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    assert not errors and not running.router.paused and "not accepting" not in caplog.text


# -- listeners with one target -----------------------------------------------------------------


def lead(running: Running, target: str, **options: Any) -> Decision:
    """Have the listener lead all its clients to one target, by a route with these options."""
    decision = parse_route(f"x.example.com={target}")._replace(**options).decide("x.example.com")
    listener, = running.router.listeners
    listener.decision = decision
    return decision


def greeting(sock: socket.socket) -> None:
    """A far end that speaks first, as those of SMTP and MySQL do, and then sends everything back."""
    sock.sendall(b"220 hello\r\n")
    while data := sock.recv(65536):
        sock.sendall(data)


def tcp(address: tuple[str, int]) -> str:
    """A target."""
    return "tcp:{}:{}".format(*address)


def is_reset(running: Running) -> bool:
    """Whether a client that says nothing is reset without a byte: an end might be its answer."""
    try:
        with running.connect() as client:
            client.recv(1)
    except ConnectionResetError:
        return True
    return False


def test_client_of_a_listener_with_one_target_need_not_speak_first(run, serve):
    running = run(route((HOST, 1)), "--proxy-protocol=off")
    decision = lead(running, tcp(serve(greeting).address))
    with running.connect() as client:
        assert read_exactly(client, 11) == b"220 hello\r\n"
        assert decision.tally.active == 1
        client.sendall(b"EHLO")
        assert read_exactly(client, 4) == b"EHLO"
    end = running.ending()
    assert (end.reason, end.name, end.route, end.backend) == (
        "client_closed", None, "x.example.com", decision.target)
    assert (end.up, end.down) == (4, 15) and decision.tally.active == 0


def test_client_that_speaks_first_there_is_not_read_as_tls(run, echo_server):
    running = run(route((HOST, 1)))
    lead(running, tcp(echo_server.address))
    for said in (b"GET / HTTP/1.1\r\n", HELLO, b"\x16", V1):
        with running.connect(said) as client:
            assert read_exactly(client, len(said)) == said


def test_options_of_the_route_hold_there_too(run, serve):
    far = serve(greeting)
    running = run(route((HOST, 1)))
    lead(running, tcp(far.address), allow=(ipaddress.ip_network("192.0.2.0/24"),))
    assert is_reset(running), "nobody knows what it speaks"
    assert running.ending().reason == "not_allowed" and far.accepted == 0
    decision = lead(running, tcp(far.address), max_connections=1)
    with running.connect() as client:
        assert client.recv(1) == b"2" and is_reset(running)
        assert running.ending(2).reason == "route_limit"
    running.ending(3)
    assert (decision.tally.active, decision.tally.total, decision.tally.refused) == (0, 2, 1)
    lead(running, tcp(serve(lambda sock: sock.sendall(sock.recv(100))).address), send_proxy="v1")
    with running.connect() as client:
        said = "PROXY TCP4 {} {} {} {}\r\n".format(HOST, HOST, client.getsockname()[1], running.address[1])
        assert read_all(client).decode() == said


@pytest.mark.parametrize("target", [f"tcp:{HOST}:1", "tcp:no-such-host.example.com:1"], ids=["address", "name"])
def test_target_that_is_down_closes_its_clients(run, monkeypatch, target):
    running = run(route((HOST, 1)))
    monkeypatch.setattr(socket, "getaddrinfo", unresolved(go := threading.Event()))
    go.set()
    lead(running, target)
    assert is_reset(running)
    assert running.ending().reason == ("backend" if HOST in target else "unresolved")


def test_tunnel_of_one_target_need_not_answer_a_client_that_speaks(run, serve, cloudflared, ports, monkeypatch):
    """Nobody knows whose turn it is: a byte of either side shows that the way is open."""
    monkeypatch.setattr(sniroute_deadlines, "FIRST_BYTE_TIMEOUT", 0.3)
    far = serve(read_all)
    cloudflared.far("*", far.address)
    running = run(TUNNEL, ports)
    lead(running, DB)
    with running.connect() as client:
        wait_until(lambda: [each for each in list(running.router.connections) if each.state == "unanswered"])
        client.sendall(b"one line of a log\n")
        wait_until(lambda: [each for each in list(running.router.connections) if each.state == "open"])
        time.sleep(0.5)  # no deadline comes
        client.sendall(b"another\n")
    assert far.result() == b"one line of a log\nanother\n"
    assert running.ending().reason == "client_closed"


def test_doubts_are_bounded_as_waits_are(run, cloudflared, ports, monkeypatch):
    """A doubt that finds no room is dropped, and refuses nobody."""
    monkeypatch.setattr(sniroute_router, "WAITS_MAX", 0)
    running = run(TUNNEL, ports)
    waits, router = running.router.waits, running.router
    with running.connect() as client:
        wait_until(lambda: router.connections)
        connection, = router.connections
        done = threading.Event()
        def doubt() -> None:
            connection.decision = router.decide("db.example.com")
            waits.doubt(connection, object())
            connection.decision = None
            done.set()
        router.call(doubt)
        assert done.wait(10)
        assert not waits.by_key and not running.endings
        client.sendall(b"GET ")


def test_tunnel_of_one_target_that_fails_once_is_tried_again(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(greeting).address)
    cloudflared.fault("*", refuse=1)
    running = run(TUNNEL, ports)
    lead(running, DB)
    with running.connect() as client:
        assert read_exactly(client, 11) == b"220 hello\r\n"
    assert len(cloudflared.clients()) == 2 and running.counter("retries") == 1
    assert running.ending().reason == "client_closed"
    assert sum(view.leases for view in running.tunnels.snapshot()) == 0


@pytest.mark.parametrize("said, heard", [
    (b"", b""), (b"\x16", b""), (b"EHLO x\r\n", b""), (HELLO, alert(80)), (b"\x16\x03", b""),
], ids=["nothing", "a byte of TLS", "clear text", "TLS", "two bytes of TLS"])
def test_client_that_speaks_while_its_tunnel_fails_is_told_what_it_can_read(run, cloudflared, ports, caplog, said, heard):
    cloudflared.fault("*", exit=0, words="no such flag", never_listen=True)
    running = run(TUNNEL, ports)
    lead(running, DB)
    held = threading.Event()
    wait = running.tunnels.wait
    running.tunnels.wait = lambda *words: held.wait(20) and wait(*words)
    with running.connect(said) as client:
        wait_until(lambda: said in [connection.hello for connection in list(running.router.connections)])
        held.set()
        assert read_all(client) == heard
    assert running.ending().reason == "tunnel_failed" and "please report it" not in caplog.text


# -- limits ------------------------------------------------------------------------------------


def test_oldest_prelude_goes_when_there_are_too_many(run, echo_server, monkeypatch):
    monkeypatch.setattr(sniroute_connection, "PRELUDES_MAX", 5)
    running = run(route(echo_server.address))
    with contextlib.ExitStack() as stack:
        silent = []
        for number in range(8):
            silent.append(stack.enter_context(running.connect()))
            wait_until(lambda: running.counter("accepted") == number + 1)
        for client in silent[:3]:
            assert client.recv(1) == b""
        wait_until(lambda: running.counter("shed") == 3)  # it is counted behind the close
        silent[-1].sendall(HELLO)
        assert read_exactly(silent[-1], len(HELLO)) == HELLO


def test_accepting_stops_at_max_connections_and_goes_on(run, serve, caplog):
    running = run(route(serve(answer(b"x")).address), "--max-connections=3")
    with contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(running.connect(HELLO)) for _ in range(3)]
        for client in open_ones:
            assert client.recv(1) == b"x"
        late = stack.enter_context(running.connect(HELLO))
        wait_until(lambda: running.router.paused)
        open_ones[0].close()
        assert late.recv(1) == b"x"
    assert sum("not accepting" in r.message for r in caplog.records) == 1


def test_accepting_goes_on_when_a_deadline_made_the_room(run, serve):
    """Refused clients linger and are closed by the clock: nothing else would wake the listener."""
    running = run(route(serve(answer(b"x")).address), "--max-connections=3")
    linger = running.router.deadlines.linger
    linger.seconds = 60.0
    def expire() -> None:
        for connection in linger.due:
            linger.due[connection] = running.router.loop.next_check = 0.0
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            assert stack.enter_context(running.connect(HELLO)).recv(1) == b"x"
        refused = stack.enter_context(running.connect(genuine(name="other.example.com")))
        assert read_exactly(refused, 7) == alert(112)
        late = stack.enter_context(running.connect(HELLO))
        wait_until(lambda: running.router.paused)
        running.router.call(expire)
        assert late.recv(1) == b"x"


@pytest.mark.parametrize("method", ["watch", "forget"])
@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")], ids=repr)
def test_a_pause_that_fails_in_part_is_over_all_the_same(run, serve, monkeypatch, method, error):
    """epoll(7) finds no memory: for one of two listeners, as the router stops accepting, or goes on."""
    running = run(route(serve(answer(b"x")).address), f"--listen={HOST}:0")
    router, failed = running.router, []
    real = getattr(sniroute_loop.EpollPoller, method)

    def fails_once(poller, fd: int, *more: Any) -> None:
        if not failed and fd == router.listeners[-1].fileno():
            failed.append(fd)
            raise error
        real(poller, fd, *more)

    monkeypatch.setattr(sniroute_loop.EpollPoller, method, fails_once)
    router.call(functools.partial(router.run_short, "a test"))
    wait_until(lambda: failed and not router.paused)
    for listener in router.listeners:
        with connect(listener.getsockname()[:2], HELLO) as client:
            assert client.recv(1) == b"x"


def test_descriptors_that_run_out_pause_accepting_and_do_not_spin(run, serve, caplog, monkeypatch):
    """accept() fails with EMFILE: one log line, no spinning, and all is well when there are some again."""
    running = run(route(serve(answer(b"x")).address))
    calls, broken = [], threading.Event()
    broken.set()
    class Listener:
        """The real one, but for accept."""
        def __init__(self, real: socket.socket):
            self.real = real
        def accept(self) -> Any:
            calls.append(1)
            if broken.is_set():
                raise OSError(errno.EMFILE, "Too many open files")
            return self.real.accept()
        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)
    router = running.router
    def swap() -> None:
        router.loop.poller.forget(router.listeners[0].fileno())
        router.listeners[0] = Listener(router.listeners[0])
        router._resume()
    router.call(swap)
    wait_until(lambda: isinstance(router.listeners[0], Listener))
    with running.connect(HELLO) as client:
        wait_until(lambda: len(calls) >= 3)
        assert len(calls) < 50
        broken.clear()
        assert client.recv(1) == b"x"
    assert sum("not accepting" in r.message for r in caplog.records) == 1


def test_silent_clients_of_one_turn_are_shed_at_the_other_listener_too(run):
    """They have been accepted and not been read yet, when the second listener finds the table full."""
    running = run(route((HOST, 9)), f"--listen={HOST}:0", "--max-connections=8")
    router, held = running.router, threading.Event()
    addresses = [listener.getsockname() for listener in router.listeners]
    router.call(lambda: held.wait(20))
    with contextlib.ExitStack() as stack:
        for address in [addresses[0]] * 8 + [addresses[1]]:
            stack.enter_context(socket.create_connection(address, 20))
        held.set()
        with running.connect(genuine(name="nope.example.org")) as client:
            assert read_all(client) == alert(112)
    assert router.counters.get("shed", 0) >= 1 and not router.paused


# -- peers -------------------------------------------------------------------------------------


def test_clients_are_limited_by_address_and_a_balancer_is_not_one_client(run, echo_server):
    running = run(route(echo_server.address), "--max-per-client=2")
    with contextlib.ExitStack() as stack:
        def from_address(last: int) -> bytes:
            client = stack.enter_context(running.connect(V1.replace(b"192.0.2.7", b"192.0.2.%d" % last) + HELLO))
            return client.recv(1)
        for last in (1, 1, 2, 2):
            assert from_address(last) == b"P"
        assert from_address(1) == alert(80)[:1]
        assert from_address(3) == b"P"
        for _ in range(4):  # loopback itself is exempt
            client = stack.enter_context(running.connect(HELLO))
            assert client.recv(1) == HELLO[:1]
    wait_until(lambda: running.counter("client_limit") == 1)


def test_client_over_its_limit_is_closed_at_accept(run, echo_server, monkeypatch):
    running = run(route(echo_server.address), "--max-per-client=1")
    running.router.peers.known[HOST] = sniroute_router.Peer("192.0.2.9", "refuse", False, False)
    with running.connect(HELLO) as first:
        assert first.recv(1) == HELLO[:1]
        with running.connect() as second:
            assert second.recv(1) == b""
    running.ending(2)
    assert running.counter("client_limit") == 1


def test_peers_are_forgotten_when_there_are_many(run, echo_server, monkeypatch):
    monkeypatch.setattr(sniroute_router, "PEERS_MAX", 10)
    running = run(route(echo_server.address))
    router = running.router
    for last in range(200):
        router.peers.find(f"198.51.100.{last}")
    assert len(router.peers.known) <= 11
    one, other = router.peers.find("2001:db8::1"), router.peers.find("2001:db8::2")
    assert one is other, "a /64 is one client"
    assert router.peers.find("::ffff:198.51.100.9").key == "198.51.100.9"
    assert router.peers.find("fe80::1%lo").key


# -- waits -------------------------------------------------------------------------------------


def unresolved(go: threading.Event) -> Callable[..., Any]:
    """A getaddrinfo that does not find example.com, and takes until `go` to find out."""
    real = socket.getaddrinfo
    def getaddrinfo(host: str, *rest: Any, **options: Any) -> Any:
        if not host.endswith(".example.com"):
            return real(host, *rest, **options)
        go.wait(20)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return getaddrinfo


def test_threads_for_names_that_wait_are_started_one_in_a_turn(run, monkeypatch):
    """Each start waits for the interpreter, and with it all who are served."""
    turns, starts, go = [], [], threading.Event()
    real = sniroute_loop.EpollPoller.poll
    monkeypatch.setattr(sniroute_loop.EpollPoller, "poll", lambda self, timeout: turns.append(1) or real(self, timeout))
    running = run("--route=*.example.com=tcp:{name}:443", "--max-per-client=100")
    monkeypatch.setattr(socket, "getaddrinfo", unresolved(go))
    begin = sniroute_router.begin_errand
    monkeypatch.setattr(sniroute_router, "begin_errand", lambda *wait: starts.append(len(turns)) or begin(*wait))
    running.part_early()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(20)]
        wait_until(lambda: len(running.router.connections) == 20)
        held = threading.Event()
        running.router.call(lambda: held.wait(20))
        for number, client in enumerate(clients):
            client.sendall(genuine(name=f"n{number}.example.com"))
        held.set()
        wait_until(lambda: len(starts) == 20)
        assert len(set(starts)) == 20
        go.set()
        running.ending(20)


def test_who_leaves_while_its_name_waits_for_a_thread_is_forgotten(run, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(sniroute_router, "WAIT_THREADS", 1)
    router = (running := run("--route=*.example.com=tcp:{name}:443")).router
    running.part_early()
    monkeypatch.setattr(socket, "getaddrinfo", unresolved(go))
    with running.connect(genuine(name="first.example.com")):
        wait_until(lambda: router.waits.threads == 1)
        with running.connect(genuine(name="second.example.com")):
            wait_until(lambda: len(router.waits.queued) == 1)
        wait_until(lambda: len(router.connections) == 1)
        assert not router.waits.queued and len(router.waits.by_key) == 1
        go.set()
        running.ending(2)


def test_resolver_that_hangs_holds_nobody_for_ever(run, monkeypatch):
    release = threading.Event()
    running = run("--route=db.example.com=tcp:slow.example.net:1", "--start-timeout=100ms")
    monkeypatch.setattr(running.router.deadlines.parked, "seconds", 0.3)
    with running.connect() as client:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and [])
        client.sendall(HELLO)
        assert read_all(client) == alert(80)
    assert "its address" in running.ending().detail
    monkeypatch.undo()
    release.set()
    wait_until(lambda: not running.router.waits.by_key)


def test_client_that_was_refused_while_it_waited_is_not_dialled_later(run, echo_server, monkeypatch):
    """It still reads its alert when the target is ready at last."""
    monkeypatch.setattr(sniroute_deadlines, "LINGER", 5.0)
    release = threading.Event()
    running = run(f"--route=db.example.com=tcp:slow.example.net:{echo_server.address[1]}")
    monkeypatch.setattr(running.router.deadlines.parked, "seconds", 0.1)
    found = socket.getaddrinfo(*echo_server.address, type=socket.SOCK_STREAM)
    with running.connect() as client:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and found)
        client.sendall(HELLO)
        assert read_exactly(client, 7) == alert(80)
        release.set()
        wait_until(lambda: not running.router.waits.by_key)
        assert [c.state for c in running.router.connections] == ["lingering"]
        assert echo_server.accepted == 0


def test_names_that_wait_are_bounded(run, cloudflared, ports, monkeypatch):
    """Two threads, three names: the third waits for a thread, a fourth is refused."""
    monkeypatch.setattr(sniroute_router, "WAIT_THREADS", 2)
    monkeypatch.setattr(sniroute_router, "WAITS_MAX", 3)
    cloudflared.fault("*", listen_delay=250)
    cloudflared.fault("n3.example.com", exit=1)
    running = run(TUNNEL, ports)
    held, wait = threading.Event(), running.tunnels.wait
    running.tunnels.wait = lambda *words: held.wait(20) and wait(*words)  # none is ready before the fourth has come
    with contextlib.ExitStack() as stack:
        for number in range(3):
            stack.enter_context(running.connect(genuine(name=f"n{number}.example.com")))
            wait_until(lambda: len(running.router.waits.by_key) == number + 1)
        assert running.router.waits.threads == 2
        with running.connect(genuine(name="n3.example.com")) as client:
            assert read_all(client) == alert(80)
        assert running.ending().reason == "busy"
        held.set()
        wait_until(lambda: not running.router.waits.by_key)


def test_names_of_clients_that_left_wait_for_nothing(run, monkeypatch):
    """One thread, held by a resolver; names whose clients have left give their places back."""
    monkeypatch.setattr(sniroute_router, "WAIT_THREADS", 1)
    release = threading.Event()
    running = run("--route=*.example.com=tcp:{label}.example.net:1")
    waits = running.router.waits.by_key
    with running.connect() as first:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and [])
        first.sendall(HELLO)
        wait_until(lambda: len(waits) == 1)
        for number in range(5):
            with socket.socket() as client:
                client.connect(running.address)
                client.sendall(genuine(name=f"n{number}.example.com"))
                wait_until(lambda: len(waits) == 2)
            wait_until(lambda: len(waits) == 1)
        release.set()
        wait_until(lambda: not waits and not running.router.waits.threads)


def test_one_client_cannot_fill_the_queue_of_names(run, monkeypatch):
    monkeypatch.setattr(sniroute_router, "WAIT_THREADS", 1)
    monkeypatch.setattr(sniroute_router, "WAITS_PER_CLIENT", 2)
    release = threading.Event()
    running = run("--route=*.example.com=tcp:{label}.example.net:1")
    running.part_early()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(5)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(20) and [])
        for number, client in enumerate(clients):
            client.sendall(V1 + genuine(name=f"n{number}.example.com"))
            wait_until(lambda: len(running.router.waits.by_key) == min(number + 1, 3))
        assert read_all(clients[3]) == read_all(clients[4]) == alert(80)
        wait_until(lambda: running.counter("busy") == 2)
        release.set()
        wait_until(lambda: not running.router.waits.by_key)


def test_budget_that_is_spent_is_not_the_next_clients(run, serve, cloudflared, ports):
    """Both wait for one cold name; the first has no start left, the second has."""
    cloudflared.far("*", serve(lambda sock: (read_exactly(sock, len(V1)), sock.sendall(b"x"), read_all(sock))).address)
    running = run(TUNNEL, ports)
    running.part_early()
    running.tunnels.budget.buckets["192.0.2.7"] = (-100.0, time.monotonic())
    held = threading.Event()
    real = running.tunnels.wait
    running.tunnels.wait = lambda *args: (held.wait(10), real(*args))
    with running.connect(V1 + HELLO) as spender, running.connect() as other:
        wait_until(lambda: running.router.waits.by_key)
        other.sendall(V1.replace(b"192.0.2.7", b"192.0.2.6") + HELLO)
        wait_until(lambda: len(running.router.waits.by_key["*=" + DB].connections) == 2)
        held.set()
        assert read_all(spender) == alert(80)
        assert other.recv(1) == b"x"
        assert running.ending().reason == "tunnel_budget"  # the other one is still there


def test_thread_that_cannot_start_refuses_and_leaves_nothing_behind(run, cloudflared, ports, monkeypatch):
    running = run(TUNNEL, ports)
    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(sniroute_router, "begin_errand", no_thread)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "busy"
    assert running.router.waits.threads == 0 and not running.router.waits.by_key


def test_fault_in_a_waiting_thread_ends_its_clients_only(run, cloudflared, ports, serve, monkeypatch, caplog):
    far = serve(answer(b"x"))
    running = run(TUNNEL, route(far.address, "ok.example.com"), ports)
    def fault(*_: Any) -> None:
        raise ZeroDivisionError("planted")
    monkeypatch.setattr(running.tunnels, "wait", fault)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "internal"
    with running.connect(genuine(name="ok.example.com")) as client:
        assert client.recv(1) == b"x"
    assert "planted" in caplog.text


def test_a_waiting_thread_without_memory_hands_its_clients_back(run, cloudflared, ports, monkeypatch):
    """Also where it finds none for saying so; then the same name is served."""
    running = run(TUNNEL, ports)
    real, call, left = running.tunnels.wait, running.router.call, [1, 1]
    def starve(*words: Any) -> Any:
        running.tunnels.wait = real
        raise MemoryError
    def no_call(act: Any) -> None:
        if left and threading.current_thread().name.startswith("wait-"):
            left.pop()
            raise MemoryError
        call(act)
    running.tunnels.wait = starve
    running.router.call = no_call
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "busy"
    assert running.router.waits.threads == 0 and not running.router.waits.by_key and not left
    with running.connect(HELLO) as client:
        assert client.recv(1)


# -- sweeps ------------------------------------------------------------------------------------


def test_idle_connections_are_closed_and_busy_ones_are_not(run, echo_server):
    running = run(route(echo_server.address), "--connection-idle=1s")  # a busy host stops this thread for a moment
    with running.connect(HELLO) as idle, running.connect(HELLO) as busy:
        for client in (idle, busy):
            assert read_exactly(client, len(HELLO)) == HELLO
        idle.settimeout(0.02)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            busy.sendall(b"x")
            assert busy.recv(1) == b"x"
            try:
                idle.recv(1)
            except ConnectionResetError:
                break
            except TimeoutError:
                continue
            raise AssertionError("an end, which looks whole")
        assert running.ending().reason == "idle"
        busy.sendall(b"y")
        assert busy.recv(1) == b"y"


def test_half_closed_connection_that_is_silent_does_not_stay_for_ever(run, serve, monkeypatch):
    """The client is gone, the backend says nothing and never ends."""
    monkeypatch.setattr(sniroute_router, "HALF_CLOSED_IDLE", 0.2)
    done = threading.Event()
    far = serve(lambda sock: done.wait(20))
    running = run(route(far.address))
    with running.connect(HELLO):  # who leaves while its backend is dialled is not waited for
        wait_until(lambda: [each.state for each in list(running.router.connections)] == ["open"])
    assert running.ending().reason == "idle"
    done.set()


def test_client_that_resets_while_nobody_reads_it_is_found(run, serve, flow, monkeypatch):
    """Its bytes wait for a backend that does not read, so its socket is not watched."""
    monkeypatch.setattr(sniroute_router, "SWEEP_LAST", 0.05)
    monkeypatch.setattr(sniroute_resets, "RESET_STALL", 0.1)
    done = threading.Event()
    running = run(route(serve(lambda sock: done.wait(20)).address))
    client = running.connect(HELLO)
    client.settimeout(0.15)
    def is_blocked() -> bool:
        with contextlib.suppress(TimeoutError):
            while True:
                client.send(bytes(1 << 20))
        return [each.up.state for each in list(running.router.connections)] == ["blocked"]
    wait_until(is_blocked)  # a loop that stands still for a moment takes no more, either
    reset(client)
    assert running.ending().reason == "client_reset"
    done.set()


# -- drain -------------------------------------------------------------------------------------


def test_drain_ends_when_a_deadline_ends_the_last_connection(run, echo_server):
    running = run(route(echo_server.address), "--prelude-timeout=60s")
    prelude = running.router.deadlines.prelude
    def expire() -> None:
        for connection in prelude.due:
            prelude.due[connection] = running.router.loop.next_check = 0.0
    with running.connect():
        wait_until(lambda: prelude.due)
        running.router.drain(3600)
        running.router.call(expire)  # behind the drain
        running.thread.join(10)
        assert not running.thread.is_alive()


def test_listener_event_of_the_turn_that_drains_is_ignored(run, echo_server):
    running = run(route(echo_server.address))
    router = running.router
    router.call(lambda: (router._drain(0.2), router._accept(router.listeners[0], sniroute_loop.READ)))
    running.thread.join(10)
    assert not running.thread.is_alive() and not router.paused


def test_drain_lets_connections_end_and_accepts_no_more(run, serve, caplog):
    caplog.set_level("INFO")
    running = run(route(serve(answer(b"x")).address))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        running.router.drain(20)
        wait_until(lambda: running.router.phase == "draining")
        with pytest.raises(OSError):
            running.connect()
        running.router.drain(20)  # twice is once
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
    running.thread.join(10)
    assert not running.thread.is_alive()


def test_drain_is_bounded(run, serve):
    running = run(route(serve(answer(b"x")).address))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        running.router.drain(0.1)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert running.ending().reason == "stopped"
    running.thread.join(10)
    assert not running.thread.is_alive()


# -- other settings for a router that runs -----------------------------------------------------


def adopted(running: Running, *argv: str) -> None:
    """Have the router go on with other settings."""
    done = threading.Event()
    settings = load_settings(["--listen", f"{HOST}:0", *argv], {}, running.router.settings)
    running.router.call(lambda: (running.router.adopt(settings), done.set()))
    assert done.wait(10)


def test_other_settings_apply_from_the_next_connection_on(run, echo_server):
    running = run(route(echo_server.address), "--no-name=refuse")
    with running.connect(HELLO) as client, running.connect(ROUTED_HEADER + HELLO) as proxied:
        assert read_exactly(client, len(HELLO)) == HELLO
        assert read_exactly(proxied, len(ROUTED_HEADER + HELLO)) == ROUTED_HEADER + HELLO
        tally = running.router.routes.tallies["db.example.com"]
        adopted(running, route(echo_server.address), "--no-name=ok", "--proxy-protocol=off", "--prelude-timeout=300ms",
                "--max-per-client=3")
        assert running.router.routes.tallies["db.example.com"] is tally and tally.active == 2
        with running.connect(genuine(name=None)) as nameless:
            assert read_all(nameless) == b"OK\n"
        with running.connect(ROUTED_HEADER + HELLO) as refused:
            assert read_all(refused) == b""
        wait_until(lambda: running.counter("proxy") == 1)
        with running.connect() as silent:
            assert read_all(silent) == b""
        wait_until(lambda: running.counter("prelude_timeout") == 1)
        for each in (client, proxied):
            each.sendall(b"on")
            assert read_exactly(each, 2) == b"on"
        counts = {peer.key: peer.count for peer in running.router.peers.known.values()}
        assert counts["192.0.2.1"] == 1, "who is connected counts on"
    wait_until(lambda: not running.router.connections)
    assert all(peer.count == 0 for peer in running.router.peers.known.values()) and tally.active == 0


def test_who_is_silent_meets_the_new_rules_for_proxy_headers(run, echo_server, monkeypatch):
    running = run(route(echo_server.address), "--proxy-from=192.0.2.0/24")
    with running.connect() as silent:
        wait_until(lambda: running.counter("accepted") == 1)
        adopted(running, route(echo_server.address), "--proxy-protocol=required", "--proxy-from=192.0.2.0/24")
        assert read_all(silent) == b"" and running.ending().reason == "proxy"


def test_a_route_that_comes_back_has_its_connections_still(run, echo_server):
    running = run(route(echo_server.address))
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        tally = running.router.routes.tallies["db.example.com"]
        adopted(running, "--route=x.example.com=tcp:127.0.0.1:1")
        adopted(running, route(echo_server.address))
        assert running.router.routes.tallies["db.example.com"] is tally and tally.active == 1
        adopted(running, "--route=x.example.com=tcp:127.0.0.1:1")
    wait_until(lambda: not running.router.connections)
    adopted(running, "--route=x.example.com=tcp:127.0.0.1:1")
    assert set(running.router.routes.tallies) == {"x.example.com"}


def test_more_connections_are_taken_at_once_when_more_may_be(run, echo_server):
    running = run(route(echo_server.address), "--max-connections=1")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        with running.connect(HELLO) as waiting:
            wait_until(lambda: running.router.paused, what="the pause")
            adopted(running, route(echo_server.address), "--max-connections=2")
            assert read_exactly(waiting, len(HELLO)) == HELLO


def test_what_a_reload_decides_for_several_backends_is_done_before_the_loop_has_it(run, settings_file, monkeypatch):
    text = '[routes]\n' + "".join(f'"r{n}.example.com" = "tcp:192.0.2.1:{n},192.0.2.2:{n}"\n' for n in range(1, 20))
    running = run("--route=x.example.com=tcp:192.0.2.1:1")
    settings = load_settings(["-c", settings_file(text)], {})
    sniroute_router.prepare(settings)
    tcp, checked = sniroute_targets.SCHEMES["tcp"], []
    monkeypatch.setitem(sniroute_targets.SCHEMES, "tcp", tcp._replace(
        check=lambda rest: checked.append(rest) or tcp.check(rest)))
    done = threading.Event()
    running.router.call(lambda: (running.router.adopt(settings), done.set()))
    assert done.wait(10) and len(running.router.targets.book.groups) == 19
    assert checked == []
