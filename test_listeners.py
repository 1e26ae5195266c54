"""Tests of sniroute_listeners.py: ports with one target.  What `arrange` does for --listen is in test_router.py.

The router runs in a thread (`run` of testbed/running.py); where the start, a reload or a restart is the subject, it is
the real program (`launch` of testbed/program.py).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Iterator

import pytest

import sniroute_header
import sniroute_deadlines
from sniroute_listeners import Ports
from sniroute_refusals import SettingsError
from sniroute_registrar import close_claimed, open_claimed
from sniroute_routes import Route, parse_port_route
from sniroute_settings import load_settings
from conftest import HOST, Address, connect, linux, wait_until
from testbed.admin import ask, metrics, run_admin, value  # noqa: F401 - a fixture
from testbed.clients import program_path, psql
from testbed.hellos import HELLO
from testbed.program import PROGRAM, Customers, activated, command, environment, ipv6
from testbed.running import Running, answer, read_all, read_exactly, reset, route

BANNER = b"220 hello\r\n"
V1 = b"PROXY TCP4 192.0.2.7 192.0.2.1 51234 3306\r\n"
V2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\2\7\xc0\0\2\1\xc8\x22\x0c\xea"
NOWHERE = f"--route=x.example.com=tcp:{HOST}:1"


def banner(sock: socket.socket) -> None:
    """A far end that speaks first, as those of SMTP and MySQL do, and then sends everything back."""
    sock.sendall(BANNER)
    while data := sock.recv(65536):
        sock.sendall(data)


def tcp(address: Address) -> str:
    """A target."""
    return "tcp:{}:{}".format(*address)


def port(target: str, number: int = 0) -> str:
    """The option --port: a port of loopback leads to this target."""
    return f"--port={HOST}:{number}={target}"


def come(running: Running, said: bytes = b"") -> socket.socket:
    """A client of the running router's last port."""
    return connect(running.router.listeners[-1].getsockname(), said)


def wait_for_state(running: Running, state: str) -> None:
    wait_until(lambda: [each for each in list(running.router.connections) if each.state == state], what=state)


# -- what a client of a port meets ---------------------------------------------------------------


def test_a_server_that_speaks_first_is_heard_at_once(run, serve):
    running = run(NOWHERE, port(tcp(serve(banner).address)))
    running.router.deadlines.header.seconds = 10.0  # a busy host may take the usual time without any wait
    began = time.monotonic()
    with come(running) as client:
        assert read_exactly(client, 11) == BANNER
        assert time.monotonic() - began < running.router.deadlines.header.seconds
        client.sendall(b"EHLO")
        assert read_exactly(client, 4) == b"EHLO"
    end = running.ending()
    assert (end.reason, end.name, end.route, end.up, end.down) == ("client_closed", None, f"port {HOST}:0", 4, 15)


def test_each_port_counts_for_itself_and_the_main_port_still_reads_names(run, serve, echo_server):
    running = run(route(echo_server.address), f"--port=127.0.0.1:0={tcp(serve(banner).address)}",
                  f"--port=localhost:0={tcp(echo_server.address)}")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    for said in (HELLO, b"GET / HTTP/1.1\r\n\r\n", b"\x16", b"P", b"\r\n"):
        with come(running, said) as client:
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == said, "nothing is read as TLS"
    running.ending(6)
    tallies = running.router.ports.layer.tallies
    assert {name: (tally.total, tally.refused) for name, tally in tallies.items()} == {
        "port 127.0.0.1:0": (0, 0), "port localhost:0": (5, 0)}
    assert running.router.routes.tallies["db.example.com"].total == 1


TRUSTED, OTHERS = "--proxy-from=127.0.0.0/8", "--proxy-from=192.0.2.0/24"
CLIENT = ("192.0.2.7", 51234)


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("mode, trusted, taken", [
    ("off", TRUSTED, False), ("off", OTHERS, False), ("auto", TRUSTED, True), ("auto", OTHERS, False),
    ("required", TRUSTED, True)])
def test_a_proxy_header_is_believed_or_data(run, serve, mode, trusted, taken, header):
    """As received, it is passed on in any case where the client is let in: what differs is whose the connection is."""
    running = run(NOWHERE, port(tcp(serve(read_all).address)), f"--proxy-protocol={mode}", trusted)
    with come(running) as client:
        client.sendall(header + b"PING\r\n")
        own = client.getsockname()
        client.shutdown(socket.SHUT_WR)
        read_all(client)
    end = running.ending()
    assert (end.client, end.up) == (CLIENT if taken else own, len(header) + 6)


def test_where_a_header_is_required_strangers_are_closed_unread(run, serve):
    far = serve(read_all)
    running = run(NOWHERE, port(tcp(far.address)), "--proxy-protocol=required", OTHERS)
    with pytest.raises(ConnectionResetError):  # perhaps the connect has it
        with come(running, V1) as client:
            client.recv(1)
    assert (running.ending().reason, running.ending().route, far.accepted) == ("proxy", f"port {HOST}:0", 0)


def test_where_a_header_is_required_those_that_wait_are_bounded(run, serve, monkeypatch):
    monkeypatch.setattr(sniroute_header, "PRELUDES_MAX", 2)
    running = run(NOWHERE, port(tcp(serve(banner).address)), "--proxy-protocol=required", TRUSTED)
    with come(running) as first, come(running) as second, come(running):
        with pytest.raises(ConnectionResetError):
            first.recv(1)
        second.sendall(V1)
        assert read_exactly(second, 11) == BANNER
    assert running.endings[0].reason == "shed"


@pytest.mark.parametrize("options, said, reason", [
    ((), b"PING\r\n", "proxy"), ((), b"\x16\3\1", "proxy"), ((), b"", "truncated"), ((), b"PROXY", "truncated"),
    (("--prelude-timeout=100ms",), None, "proxy"), (("--prelude-timeout=100ms",), b"PROX", "proxy"),
    ((), b"PROXY TCP4 nobody\r\n", "proxy"), ((), V1.replace(b"192.0.2.7", b"::1"), "proxy")])
def test_where_a_header_is_required_all_else_is_refused_by_a_reset(run, serve, options, said, reason):
    far = serve(read_all)
    running = run(NOWHERE, port(tcp(far.address)), "--proxy-protocol=required", TRUSTED, *options)
    with pytest.raises(ConnectionResetError), come(running, said or b"") as client:
        if reason == "truncated":
            client.shutdown(socket.SHUT_WR)
        client.recv(1)
        client.recv(1)
    assert running.ending().reason == reason and far.accepted == 0
    tally, = running.router.ports.layer.tallies.values()
    assert (tally.active, tally.total, tally.refused) == (0, 1, 1)


def test_a_header_may_come_in_pieces_and_what_follows_is_the_targets(run, serve):
    far = serve(read_all)
    running = run(NOWHERE, port(tcp(far.address)), "--proxy-protocol=required", TRUSTED)
    with come(running) as client:
        for at in range(len(V2)):
            client.sendall(V2[at:at + 1])
            wait_for_state(running, "header") if at < len(V2) - 1 else None
        wait_for_state(running, "open")
        client.sendall(b"\0\1\2")
    assert far.result() == V2 + b"\0\1\2"


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("when", ["parked", "open", "unanswered"])
def test_a_header_behind_the_connect_is_believed_and_no_server_waits_for_it(run, serve, cloudflared, ports, monkeypatch,
                                                                           when, header):
    far, real, go = serve(read_all).address, socket.getaddrinfo, threading.Event()
    cloudflared.far("*", far)

    def slow(*args: Any, **more: Any) -> Any:
        assert go.wait(10)
        return real(*args, **more)

    target = "cloudflared:db.example.com" if when == "unanswered" else f"tcp:localhost:{far[1]}"
    running = run(NOWHERE, port(target), ports, TRUSTED)
    monkeypatch.setattr(socket, "getaddrinfo", slow) if when == "parked" else None
    with contextlib.closing(socket.socket()) as client:
        client.connect(running.router.listeners[-1].getsockname())
        wait_for_state(running, when)
        client.sendall(header)
        wait_until(lambda: [each for each in list(running.router.connections) if each.address == CLIENT], what="it")
        go.set()
        wait_for_state(running, "open")
        client.sendall(b"x")
    end = running.ending()
    assert (end.client, end.up) == (CLIENT, len(header) + 1), "passed on once"


def test_a_client_behind_a_balancer_is_limited_whenever_its_header_comes(run, serve):
    running = run(NOWHERE, port(tcp(serve(banner).address)), TRUSTED, "--max-per-client=1")
    with come(running) as first, come(running) as second:
        for client in (first, second):
            assert read_exactly(client, 11) == BANNER
        first.sendall(V1)
        assert read_exactly(first, len(V1)) == V1
        second.sendall(V2)
        with pytest.raises(ConnectionResetError):
            second.recv(1)
    assert running.ending().reason == "client_limit"


def test_a_broken_header_behind_the_connect_is_refused(run, serve):
    running = run(NOWHERE, port(tcp(serve(banner).address)), TRUSTED)
    with come(running) as client:
        assert read_exactly(client, 11) == BANNER
        client.sendall(b"PROXY TCP4 nobody\r\n")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert running.ending().reason == "proxy"


def with_options(text: str) -> str:
    """A file with one port that has options."""
    return f'[routes]\n"x.example.com" = "tcp:{HOST}:1"\n[ports]\n"{HOST}:0" = {{ {text} }}\n'


def test_allow_asks_for_the_address_in_the_header_and_waits_a_moment_for_it(run, serve, settings_file):
    far = serve(banner)
    path = settings_file(with_options(f'target = "{tcp(far.address)}", allow = ["192.0.2.7"]'))
    running = run("-c", path, TRUSTED)
    grace, running.router.deadlines.header.seconds = running.router.deadlines.header.seconds, 10.0  # on a busy host
    with come(running, V1) as client:
        assert read_exactly(client, 11) == BANNER
    with come(running) as client:  # the header comes behind the connect
        wait_for_state(running, "header")
        client.sendall(V1)
        assert read_exactly(client, 11) == BANNER
    running.router.deadlines.header.seconds = grace
    for said in (b"", b"hello", V1.replace(b"2.7", b"2.8")):
        with pytest.raises(ConnectionResetError), come(running, said) as client:
            client.recv(1)
    running.ending(5)
    assert [end.client for end in running.endings[:2]] == [CLIENT] * 2
    assert [end.reason for end in running.endings[2:]] == ["not_allowed"] * 3


@pytest.mark.parametrize("kind, said, expected", [
    ("v1", V1 + b"x", V1 + b"x"), ("none", V1 + b"x", b"x"), ("v2", V1 + b"x", V2 + b"x"), ("none", b"x", b"x")])
def test_send_proxy_says_who_the_client_is_and_takes_away_what_it_said(run, serve, settings_file, kind, said, expected):
    far = serve(read_all)
    running = run("-c", settings_file(with_options(f'target = "{tcp(far.address)}", send_proxy = "{kind}"')), TRUSTED)
    running.router.deadlines.header.seconds = 10.0  # on a busy host it may come late behind the connect
    with come(running, said) as client:
        client.shutdown(socket.SHUT_WR)
        read_all(client)
    assert far.result() == expected


def test_a_strangers_header_stands_behind_the_one_that_the_router_writes(run, serve, settings_file):
    far = serve(read_all)
    running = run("-c", settings_file(with_options(f'target = "{tcp(far.address)}", send_proxy = "v1"')), OTHERS)
    with come(running, V1) as client:
        own = client.getsockname()
        client.shutdown(socket.SHUT_WR)
        read_all(client)
    first, second, rest = far.result().split(b"\r\n")
    assert first.split()[2:5:2] == [HOST.encode(), str(own[1]).encode()] and second + b"\r\n" == V1 and rest == b""


# -- through a tunnel ----------------------------------------------------------------------------


def test_a_pool_that_connects_and_is_silent_is_not_cut(run, serve, cloudflared, ports, monkeypatch):
    """It may be its turn to speak, and nobody knows."""
    monkeypatch.setattr(sniroute_deadlines, "FIRST_BYTE_TIMEOUT", 0.2)
    cloudflared.far("*", serve(answer(b"+PONG\r\n", 6)).address)
    running = run(NOWHERE, port("cloudflared:redis.example.com"), ports)
    with come(running) as client:
        wait_for_state(running, "unanswered")
        connection, = running.router.connections
        assert connection.queue is None, "no deadline"
        time.sleep(0.3)
        client.sendall(b"PING\r\n")
        assert read_exactly(client, 7) == b"+PONG\r\n"
    assert running.ending().reason == "client_closed"


def test_a_client_that_spoke_before_the_tunnel_was_up_has_a_deadline(run, serve, cloudflared, ports, monkeypatch):
    monkeypatch.setattr(sniroute_deadlines, "FIRST_BYTE_TIMEOUT", 0.2)
    cloudflared.far("*", serve(read_all).address)
    running = run(NOWHERE, port("cloudflared:redis.example.com"), ports)
    running.tunnels.max_starting = 0  # none, until it has spoken
    with pytest.raises(ConnectionResetError), come(running, b"PING\r\n") as client:
        running.tunnels.max_starting = 1
        running.tunnels.wake()
        client.recv(1)
    assert running.ending().reason.startswith("tunnel_")


def test_what_a_client_has_said_is_not_sent_twice(run, serve, cloudflared, ports):
    """INCR is done once, or not at all."""
    cloudflared.far("*", serve(read_all).address)
    cloudflared.fault("*", refuse=1)
    running = run(NOWHERE, port("cloudflared:redis.example.com"), ports)
    with pytest.raises(ConnectionResetError), come(running, b"INCR a\r\n") as client:
        client.recv(1)
    assert running.ending().reason.startswith("tunnel_") and running.counter("retries") == 0


@pytest.mark.parametrize("early", [True, False], ids=["while it is resolved", "when it is open"])
def test_a_client_that_says_all_and_ends_its_side_gets_its_answer(run, serve, monkeypatch, early):
    def whois(sock: socket.socket) -> None:
        said = read_all(sock)
        sock.sendall(b"about " + said)

    real, go = socket.getaddrinfo, threading.Event()

    def slow(*args: Any, **more: Any) -> Any:
        assert go.wait(10)
        return real(*args, **more)

    running = run(NOWHERE, port("tcp:localhost:{}".format(serve(whois).address[1])))
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with contextlib.closing(socket.socket()) as client:
        client.connect(running.router.listeners[-1].getsockname())
        wait_for_state(running, "parked")
        if not early:
            go.set()
            wait_for_state(running, "open")
        client.sendall(b"example.com\r\n")
        client.shutdown(socket.SHUT_WR)
        if early:
            wait_until(lambda: [each for each in list(running.router.connections) if not each.up.events])
            go.set()
        client.settimeout(20)
        assert read_all(client) == b"about example.com\r\n"


def test_a_port_probe_leaves_nothing_behind(run, serve, cloudflared, ports):
    cloudflared.far("*", serve(read_all).address)
    running = run(NOWHERE, port("cloudflared:redis.example.com"), ports)
    for _ in range(3):
        come(running).close()
        reset(come(running))
    running.ending(6)
    assert not running.router.connections
    wait_until(lambda: not running.router.waits.by_key, what="the tunnel")


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, said", [
    (["--port=5433"], "'5433' is not ADDRESS=TARGET, as"),
    (["--port=:5433=here"], "':5433=here' is not ADDRESS=TARGET, as"),
    (["--port=x=tcp:h:1"], "'x' is not HOST:PORT"),
    (["--port=:1=tcp:{label}:1"], "'tcp:{label}:1': a port has no name, so nothing can stand for {label}"),
    (["--port=:1=cloudflared:{name}"], "'cloudflared:{name}': a port has no name, so nothing can stand for {name}"),
    (["--port=:1=smtp:h:1"], "'smtp' is no kind of target: there are "),
    (["--port=:1=tcp:h"], "'tcp:h': 'h' is not HOST:PORT"),
    (["--port=:8=tcp:h:1", "--port=127.0.0.1:8=tcp:h:2"], "port 127.0.0.1:8 is a part of port *:8, or all of it"),
    (["--port=127.0.0.1:8=tcp:h:1", "--port=localhost:8=tcp:h:2"],
     "port localhost:8 is a part of port 127.0.0.1:8, or all of it"),
    (["--port=127.0.0.1:9=tcp:h:1", "--listen=:9"], "port 127.0.0.1:9 is a part of --listen *:9, or all of it"),
    (["--port=:9=tcp:h:1", "--admin=127.0.0.1:9"], "port :9 is a part of --admin 127.0.0.1:9, or all of it"),
    (["--port=:9=tcp:h:1", "--admin-public=192.0.2.1:9"], "port :9 is a part of --admin-public 192.0.2.1:9, or all of"),
    (["--port=127.0.0.1:9=tcp:127.0.0.1:9"], "port 127.0.0.1:9=tcp:127.0.0.1:9 leads back to port 127.0.0.1:9"),
    (["--port=127.0.0.1:9=tcp:127.0.0.1:8", "--listen=127.0.0.1:8"], "leads back to --listen 127.0.0.1:8"),
])
def test_a_port_that_cannot_be_stops_the_start_in_one_line(options, said):
    with pytest.raises(SettingsError) as caught:
        load_settings([NOWHERE, *options], {})
    line, = caught.value.lines
    assert line.startswith("--port: ") and said in line


def test_a_route_that_leads_to_a_port_leads_back(settings_file):
    with pytest.raises(SettingsError, match="--route: a.b=tcp:127.0.0.1:9 leads back to port 127.0.0.1:9"):
        load_settings(["--port=127.0.0.1:9=tcp:h:1", "--route=a.b=tcp:127.0.0.1:9"], {})


def test_ports_in_the_file_have_the_options_of_routes_and_all_faults_are_told_at_once(settings_file):
    path = settings_file("""
tunnel_ports = "30000-30001"
[ports]
"127.0.0.1:5433" = "tcp:192.0.2.1:5432"
":6380" = { target = "carrier:redis.example.com", allow = ["192.0.2.0/24"], max_connections = 5, idle = "1h", \
connection_idle = "2h", send_proxy = "v2" }
""")
    settings = load_settings(["-c", path], {})
    assert settings.ports == (30000, 30001)
    assert [port.pattern for port in settings.port] == ["port 127.0.0.1:5433", "port :6380"]
    redis = settings.port[1]
    assert (redis.send_proxy, redis.max_connections, redis.idle, redis.connection_idle) == ("v2", 5, 3600.0, 7200.0)
    assert [str(network) for network in redis.allow] == ["192.0.2.0/24"]
    assert load_settings(["-c", path, "--port=:1=tcp:h:1"], {}).covered == [
        f"{path}: [ports] is not used: --port goes first"]
    settings_file('tunnel_ports = "9"\n[ports]\n5433 = "tcp:h:1"\n":1" = { allow = "x" }\n'
                  '":2" = { target = "tcp:h:1", idle = "1h", balanc = "first" }\n')
    with pytest.raises(SettingsError) as caught:
        load_settings(["-c", path], {})
    lines = [line.removeprefix(f"{path}: ") for line in caught.value.lines]
    assert [line.partition(":")[0] for line in lines[:1]] == ["tunnel_ports"]
    assert [line.partition(": ")[0] for line in lines[1:]] == [
        'ports."5433"', 'ports.":1"', 'ports.":2".idle', 'ports.":2".balanc']


def test_ports_as_text_are_still_those_of_the_tunnels(settings_file):
    path = settings_file('ports = "30000-30001"\n')
    settings = load_settings(["-c", path], {})
    assert settings.ports == (30000, 30001) and settings.port == []
    settings_file('ports = "30000-30001"\ntunnel_ports = "30000-30001"\n')
    with pytest.raises(SettingsError, match="tunnel_ports: is another name of ports"):
        load_settings(["-c", path], {})


@pytest.mark.parametrize("link", ["tcp://10.96.0.1:19000", "udp://[fd00::1]:53"])
def test_the_variable_that_kubernetes_sets_for_a_service_called_sniroute_is_no_port(link):
    assert load_settings([], {"SNIROUTE_PORT": link}).port == []


def test_ports_that_could_not_be_handed_over_are_too_many():
    ended = command(f"--listen={HOST}:0", NOWHERE, *(f"--port={HOST}:0=tcp:h:{number}" for number in range(1, 253)))
    assert ended.returncode == 1 and "--port: 252 ports, and only 251 can be handed over" in ended.stderr


# -- the program ---------------------------------------------------------------------------------


@contextlib.contextmanager
def another() -> Iterator[tuple[int, int]]:
    """Another process that listens: its port and its pid."""
    code = ("import socket, sys; s = socket.create_server((sys.argv[1], 0));"
            "print(s.getsockname()[1], flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, HOST], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        yield int(process.stdout.readline()), process.pid
        process.stdin.close()


def test_a_port_that_is_taken_stops_the_start_and_says_by_whom(free_ports):
    with another() as (number, pid):
        ended = command(f"--listen={HOST}:0", NOWHERE, f"--port={HOST}:{number}=tcp:192.0.2.1:1")
    assert ended.returncode == 1
    assert re.fullmatch(rf"\S+ error port {HOST}:{number}: Address already in use: pid {pid} \(.+\) has it\n",
                        ended.stderr), ended.stderr


def test_a_reload_opens_and_closes_ports_and_cuts_nobody(launch, settings_file, serve, free_ports, echo_server):
    kept = free_ports(3)[0]
    left, new = kept + 1, kept + 2
    routes = f'[routes]\n"db.example.com" = "{tcp(echo_server.address)}"\n[ports]\n'
    far, other = serve(banner).address, serve(banner).address
    program = launch("-c", settings_file(f'{routes}"{HOST}:{kept}" = "{tcp(far)}"\n"{HOST}:{left}" = "{tcp(far)}"\n'))
    program.wait_for(" leads to ", 2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((HOST, number), 20)) for number in (kept, left)]
        assert [read_exactly(client, 11) for client in clients] == [BANNER] * 2
        settings_file(f'{routes}"{HOST}:{kept}" = "{tcp(other)}"\n":{new}" = "{tcp(far)}"\n')
        program.signal(signal.SIGHUP)
        program.wait_for(" info reload: done")
        assert f" info port {HOST}:{left} is closed\n" in program.log()
        for client in clients:
            client.sendall(b"still here")
            assert read_exactly(client, 10) == b"still here"
        for number in (kept, new):
            with socket.create_connection((HOST, number), 20) as client:
                assert read_exactly(client, 11) == BANNER
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, left), 20)
        settings_file(f'{routes}"{HOST}:{left}" = "{tcp(far)}"\n')  # it comes back at once, and the others go
        program.signal(signal.SIGHUP)
        program.wait_for(" info reload: done", 2)
        with socket.create_connection((HOST, left), 20) as client:
            assert read_exactly(client, 11) == BANNER
    program.stop()
    assert f"route=\"port {HOST}:{kept}\" backend={tcp(other)}" in program.log(), "where the new settings lead"


def test_a_reload_with_a_port_that_is_taken_changes_nothing(launch, settings_file, serve, free_ports):
    kept, new = free_ports(2)
    routes = f'[routes]\n"db.example.com" = "tcp:{HOST}:1"\n[ports]\n'
    old = f'"{HOST}:{kept}" = "{tcp(serve(banner).address)}"\n'
    path = settings_file(routes + old)
    program = launch("-c", path)
    with another() as (taken, pid):
        settings_file(f'{routes}"{HOST}:{new}" = "tcp:192.0.2.1:1"\n"{HOST}:{taken}" = "tcp:192.0.2.1:1"\n')
        program.signal(signal.SIGHUP)
        program.wait_for(" error reload: nothing has changed\n")
        said = rf" error reload: port {HOST}:{taken}: Address already in use: pid {pid} \(.+\) has it\n"
        assert re.search(said, program.log())
        with socket.create_connection((HOST, kept), 20) as client:
            assert read_exactly(client, 11) == BANNER
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, new), 20)
        settings_file(f'{routes}":{kept}" = "tcp:192.0.2.1:1"\n')
        program.signal(signal.SIGHUP)
        program.wait_for(" error reload: nothing has changed\n", 2)
        assert "Address already in use: sniroute itself has it" in program.log()


def test_a_port_counts_on_after_a_reload_and_is_no_target_of_ours(run, serve, free_ports):
    number = free_ports(1)[0]
    far = serve(banner)
    running = run(f"--route=x.example.com=tcp:{HOST}:{number}")
    router = running.router

    def reload(*options: str) -> None:
        settings = load_settings([f"--listen={HOST}:0", *options], {})
        opened, done = router.ports.open(settings.port), threading.Event()
        router.call(lambda: (router.adopt(settings, opened), done.set()))
        assert done.wait(10)

    with running.connect(HELLO.replace(b"db.example.com", b"x.example.com\0"[:14])):
        pass
    reload(f"--route=y.example.com=tcp:{HOST}:1", port(tcp(far.address), number))
    assert (HOST, number) in router.targets.own and not router.targets.resolved
    with socket.create_connection((HOST, number), 20) as client:
        assert read_exactly(client, 11) == BANNER
        reload(f"--route=y.example.com=tcp:{HOST}:1")
        assert (HOST, number) not in router.targets.own
        reload(f"--route=y.example.com=tcp:{HOST}:1", port(tcp(far.address), number))
        tally, = router.ports.layer.tallies.values()
        assert tally.active == 1, "a limit still counts those that came before"
    wait_until(lambda: tally.total == 1)
    assert tally.active == 0


def test_one_more_port_that_is_claimed_leaves_the_others_as_they_are(run, monkeypatch, free_ports):
    """What it costs does not grow with their number: only its own route is decided."""
    first, last = free_ports(8)
    router = run("--route=x.example.com=tcp:192.0.2.1:1").router
    routes = [parse_port_route(f"{HOST}:{number}=tcp:192.0.2.1:{number}") for number in range(first, last + 1)]
    own, decided, done = list(router.targets.own), [], threading.Event()
    decide = Route.decide

    def counted(route, *words, **more):
        decided.append(route.pattern)
        return decide(route, *words, **more)

    monkeypatch.setattr(Route, "decide", counted)

    def change(act) -> None:
        done.clear()
        router.call(lambda: (act(), done.set()))
        assert done.wait(10)

    for route in routes:
        opened = Ports().open([route])
        change(lambda: open_claimed(router, route, opened[route.pattern]))
    assert decided == [route.pattern for route in routes]
    assert router.targets.own == own + [(HOST, number) for number in range(first, last + 1)]
    other = routes[0]._replace(target="tcp:192.0.2.2:2")
    change(lambda: open_claimed(router, other, []))
    assert decided[len(routes):] == [other.pattern] and other in router.ports.routes
    assert router.ports.listeners[other.pattern][0].decision.target == "tcp:192.0.2.2:2"
    for route in routes[::-1]:
        change(lambda: close_claimed(router, route.pattern, lambda: None))
    assert len(decided) == len(routes) + 1 and router.targets.own == own
    assert router.ports.routes == () and not router.ports.listeners and not router.ports.layer.tallies


@pytest.mark.parametrize("after, reason", [
    (("--proxy-from=127.0.0.0/8", "198.51.100.0/24"), "not_allowed"),
    (("--proxy-from=192.0.2.0/24", "203.0.113.0/24"), "proxy"), (("--proxy-from=127.0.0.0/8", ""), "no_route"),
], ids=["another allow", "not trusted any more", "no such port any more"])
def test_a_client_that_waits_for_its_header_meets_the_new_settings(run, serve, settings_file, free_ports, after, reason):
    number, far = free_ports(1)[0], serve(banner)

    def options(trusted: str, allow: str) -> list[str]:
        ports = f'"{HOST}:{number}" = {{ target = "{tcp(far.address)}", allow = "{allow}" }}\n' if allow else ""
        path = settings_file(f'[routes]\n"x.example.com" = "tcp:{HOST}:1"\n[ports]\n{ports}')
        return ["-c", path, "--proxy-protocol=required", trusted]

    running = run(*options("--proxy-from=127.0.0.0/8", "203.0.113.0/24"))
    router = running.router
    with socket.create_connection((HOST, number), 20) as client:
        wait_until(lambda: router.connections)
        settings = load_settings([f"--listen={HOST}:0", *options(*after)], {})
        opened, done = router.ports.open(settings.port), threading.Event()
        router.call(lambda: (router.adopt(settings, opened), done.set()))
        assert done.wait(10)
        with contextlib.suppress(OSError):  # it is refused already, or by what it says
            client.sendall(b"PROXY TCP4 203.0.113.9 192.0.2.1 1 2\r\nhello")
            assert client.recv(1) == b""
    assert (running.ending().reason, far.accepted) == (reason, 0)


def test_a_port_that_leads_to_itself_by_a_name_is_refused(run, free_ports):
    number = free_ports(1)[0]
    running = run(NOWHERE, port(f"tcp:localhost:{number}", number))
    with pytest.raises(ConnectionResetError), come(running) as client:
        client.recv(1)
    assert running.ending().reason == "forbidden"


def test_a_reload_that_comes_to_a_lame_duck_still_opens_ports(run, serve, free_ports):
    number, far = free_ports(1)[0], serve(banner)
    running = run(NOWHERE)
    router = running.router
    router.lameduck(20)
    wait_until(lambda: router.phase == "lameduck")
    settings = load_settings([f"--listen={HOST}:0", NOWHERE, port(tcp(far.address), number)], {})
    opened = router.ports.open(settings.port)
    router.call(lambda: router.adopt(settings, opened))
    with connect((HOST, number)) as client:
        assert read_exactly(client, 11) == BANNER


def test_a_reload_that_comes_while_it_drains_opens_nothing(run, free_ports):
    number = free_ports(1)[0]
    running = run(NOWHERE)
    router = running.router
    with running.connect(b"\x16"):
        wait_until(lambda: router.connections)
        router.drain(20)
        assert router.deaf.wait(10)
        settings = load_settings([f"--listen={HOST}:0", NOWHERE, port(f"tcp:{HOST}:1", number)], {})
        opened, done = router.ports.open(settings.port), threading.Event()
        router.call(lambda: (router.adopt(settings, opened), done.set()))
        assert done.wait(10)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, number), 20)


@linux
def test_restarts_hand_ports_over(launch, free_ports, single_loop_echo):
    main, number = free_ports(2)
    options = (f"--listen={HOST}:{main}", NOWHERE, port(tcp(single_loop_echo), number), "--drain=60s")
    programs = [launch(*options)]
    with Customers((HOST, number)) as customers:
        for _ in range(4):
            programs.append(launch(*options))
            programs[-1].wait_for(" info another sniroute listened there: it drains, and ends\n")
            goal = customers.served + 100
            wait_until(lambda: customers.served >= goal or customers.failures, timeout=20, what="a hundred customers")
    assert customers.failures == []
    assert [program.wait() for program in programs[:-1]] == [0] * 4


@linux
def test_a_port_that_a_reload_has_opened_is_handed_over_too(launch, settings_file, free_ports, single_loop_echo):
    main = free_ports(2)[0]
    text = f'listen = "{HOST}:{main}"\n[routes]\n"x.example.com" = "tcp:{HOST}:1"\n'
    path = settings_file(text)
    first = launch(env=environment(SNIROUTE_CONFIG=path, SNIROUTE_LISTEN=f"{HOST}:{main}"))
    settings_file(f'{text}[ports]\n"{HOST}:{main + 1}" = "{tcp(single_loop_echo)}"\n')
    first.signal(signal.SIGHUP)
    first.wait_for(" info reload: done")
    with Customers((HOST, main + 1)) as customers:
        wait_until(lambda: customers.served >= 20 or customers.failures)
        launch(env=environment(SNIROUTE_CONFIG=path, SNIROUTE_LISTEN=f"{HOST}:{main}"))
        assert first.wait() == 0
        goal = customers.served + 100
        wait_until(lambda: customers.served >= goal or customers.failures, timeout=20, what="a hundred customers")
    assert customers.failures == []


@linux
def test_a_successor_without_the_port_gives_it_up(launch, free_ports, echo_server):
    main, number = free_ports(2)
    first = launch(f"--listen={HOST}:{main}", NOWHERE, port(tcp(echo_server.address), number))
    launch(f"--listen={HOST}:{main}", NOWHERE)
    assert first.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, number), 20)


def test_systemd_holds_a_port_that_is_known_by_its_address(launch, held, free_ports, serve, settings_file):
    number = held.getsockname()[1]
    routes = f'[routes]\n"db.example.com" = "tcp:{HOST}:1"\n'
    ports = f'[ports]\n"{HOST}:{number}" = "{tcp(serve(banner).address)}"\n'
    program = launch("-c", settings_file(routes + ports), **activated(("port", held)))
    assert "systemd holds the sockets" not in program.log(), "the main port is our own"
    assert program.address[1] != number
    for turn in (1, 2):
        with socket.create_connection((HOST, number), 20) as client:
            assert read_exactly(client, 11) == BANNER
        settings_file(routes)
        program.signal(signal.SIGHUP)
        program.wait_for(" is closed\n", turn)
        settings_file(routes + ports)
        program.signal(signal.SIGHUP)
        program.wait_for(" leads to ", turn + 1)
    program.stop()
    with socket.create_connection((HOST, number), 20):
        pass  # systemd has it still


def test_a_socket_that_systemd_calls_port_is_no_main_port(held, tmp_path):
    words = activated(("port", held))
    ended = subprocess.run([*words["python"], str(PROGRAM), NOWHERE], pass_fds=words["pass_fds"], text=True,
                           capture_output=True, timeout=30, env={"PATH": os.environ["PATH"]})
    assert ended.returncode == 1
    assert f"LISTEN_FDS: {HOST}:{held.getsockname()[1]} is called port, and no --port" in ended.stderr


@ipv6
def test_a_port_of_every_address_takes_both_families(launch, free_ports, serve):
    number = free_ports(1)[0]
    target = tcp(serve(banner).address)
    launch(NOWHERE, f"--port=:{number}={target}").wait_for(" leads to ")
    for host in (HOST, "::1"):
        with socket.create_connection((host, number), 20) as client:
            assert read_exactly(client, 11) == BANNER


# -- what people see -----------------------------------------------------------------------------


def test_check_and_explain_tell_of_ports():
    options = (NOWHERE, "--port=127.0.0.1:5433=tcp:192.0.2.10:5432", "--port=:6380=tcp:192.0.2.10:6379",
               "--port=192.0.2.1:5433=tcp:192.0.2.11:5432")
    told = command("check", *options)
    assert told.stdout.splitlines()[1:] == ["port 127.0.0.1:5433=tcp:192.0.2.10:5432", "port :6380=tcp:192.0.2.10:6379",
                                            "port 192.0.2.1:5433=tcp:192.0.2.11:5432"]
    rows = (("tcp:5433", "192.0.2.10:5432"), ("127.0.0.1:5433", "192.0.2.10:5432"),
            ("192.0.2.1:5433", "192.0.2.11:5432"), (":6380", "192.0.2.10:6379"), ("tcp:6380", "192.0.2.10:6379"))
    with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:  # each waits for the addresses of its target
        explained = list(pool.map(lambda row: command("explain", row[0], *options), rows))
    for (asked, target), told in zip(rows, explained):
        assert told.returncode == 0 and f"\ntarget:  tcp:{target}\n" in told.stdout, told
        assert ("also: " in told.stdout) is (asked == "tcp:5433")
    told = command("explain", "tcp:1", *options)
    assert told.returncode == 1 and "no port with one target is tcp:1; there are: 127.0.0.1:5433, :6380" in told.stdout


def test_a_port_has_its_row_in_metrics_and_status(run_admin, serve):  # noqa: F811
    running = run_admin(NOWHERE, port(tcp(serve(banner).address)))
    with socket.create_connection(running.router.listeners[-1].getsockname(), 20) as client:
        assert read_exactly(client, 11) == BANNER
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        samples = metrics(running)
        assert value(samples, "sniroute_route_connections_active", route=f"port {HOST}:0") == 1
        status = ask(running.admin, "/status").json
        rows = {row["pattern"]: row for row in status["routes"]}
        row = rows[f"port {HOST}:0"]
        assert (row["active"], row["up"], row["down"], rows["x.example.com"]["active"]) == (1, 1, 12, 0)
        assert len(status["listening"]) == 2
    wait_until(lambda: value(metrics(running), "sniroute_route_bytes_total", route=f"port {HOST}:0",
                             direction="down") == 12)


# -- real clients --------------------------------------------------------------------------------


def test_redis_in_clear_through_a_port(launch, free_ports, tmp_path):
    server, client = program_path("redis-server", "redis-server"), program_path("redis-cli", "redis-tools")
    number, inner = free_ports(2)
    process = subprocess.Popen([server, "--port", str(inner), "--bind", HOST, "--save", "", "--dir", str(tmp_path)],
                               stdout=subprocess.DEVNULL)
    try:
        launch(NOWHERE, port(f"tcp:{HOST}:{inner}", number)).wait_for(" leads to ")

        def cli(*words: str) -> str:
            return subprocess.run([client, "-h", HOST, "-p", str(number), *words], capture_output=True, text=True,
                                  timeout=20).stdout.strip()
        wait_until(lambda: cli("PING") == "PONG")
        assert [cli("INCR", "a"), cli("INCR", "a")] == ["1", "2"]
    finally:
        process.kill()  # it has nothing to save
        process.wait()


def test_psql_in_clear_through_a_port(launch, free_ports, postgres):
    number = free_ports(1)[0]
    launch(NOWHERE, port(tcp(postgres), number)).wait_for(" leads to ")
    for mode in ("disable", "require"):
        ended = psql((HOST, number), ["SELECT 6 * 7"], f"sslmode={mode}")
        assert ended.returncode == 0 and b"42" in ended.stdout, ended
