"""Tests of sniroute_nat.py: targets that dial in, as the router sees them.

The program that speaks NodePass is a stand-in here, testbed/fake_nodepass.py: it has the orders and the events.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import logging
import pathlib
import socket
import subprocess
import sys
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_doctor
import sniroute_nat
import sniroute_tunnels
from conftest import HERE, HOST, Address, wait_until
from sniroute_admin import attach
from sniroute_claim import Unable, with_key
from sniroute_claims import Claim
from sniroute_doctor import sample_hello
from sniroute_launchers import Secret, TunnelKey
from sniroute_loop import monotonic
from sniroute_names import HIDDEN, without_key
from sniroute_processes import Link, number_of
from sniroute_refusals import REFUSALS, SettingsError
from sniroute_settings import load_settings, warn
from sniroute_tunnels import READY, in_use, stand
from test_documents import marked
from testbed.program import environment
from testbed.registry import ADMIN, BOB, DOMAIN, Routed, table_of
from testbed.running import Running, alert, read_all, read_exactly
from testbed.tunnels import events, runs, shared

NAME = "db.example.com"
SECRET = "s3cret-of-nobody"
HELLO = sample_hello(NAME)
FAKE = str(HERE / "testbed" / "fake_nodepass.py")


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in, in the place of sniroute_nodepass.py."""
    monkeypatch.setattr(sniroute_nat, "our_words", lambda room, *words: ["-I", "-S", FAKE, *words])
    monkeypatch.setattr(sniroute_tunnels, "FAILURE_FIRST", 0.1)


@pytest.fixture
def place(free_ports: Callable[..., tuple[int, int]]) -> str:
    """An address that is free, for a server."""
    return f"{HOST}:{free_ports(1)[0]}"


@pytest.fixture
def ports(free_ports: Callable[..., tuple[int, int]]) -> str:
    """The router's own ports for tunnels."""
    return "--ports={}-{}".format(*free_ports())


@pytest.fixture
def dial_in(serve: Callable[..., Any]) -> Iterator[Callable[..., socket.socket]]:
    """dial_in(place, key="", service=a new one that says "hello") -> the connection of a client that is linked."""
    with contextlib.ExitStack() as stack:
        def dial(place: str, key: str = SECRET, service: Address | None = None, says: bytes = b"hello") -> socket.socket:
            def answer(sock: socket.socket) -> None:
                sock.recv(65536)
                sock.sendall(says)
            host, port = service or serve(answer).address
            address = place.rpartition(":")[0] or HOST, int(place.rpartition(":")[2])
            said = f"{key} {host}:{port}\n".encode()
            return stack.enter_context(wait_until(lambda: try_link(address, said)))
        yield dial


def try_connect(address: Address) -> socket.socket | None:
    try:
        return socket.create_connection(address, 5)
    except OSError:
        return None


def try_link(address: Address, said: bytes) -> socket.socket | None:
    """A connection that is linked; None where nobody listens, or where a server that is ending has taken it."""
    sock = try_connect(address)
    if sock is None:
        return None
    try:
        sock.sendall(said)
        if sock.recv(3) == b"in\n":
            return sock
    except OSError:
        pass
    sock.close()
    return None


def faults(*options: str, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(list(options), environ)
    return list(caught.value.lines)


def key_of(target: str, **environ: str) -> TunnelKey:
    """The key of a target's tunnel."""
    return load_settings([f"--route={NAME}={target}"], environ).routes.decide(NAME).tunnel


def tunnel(running: Running, number: int = 0) -> Any:
    """The view of a tunnel, once it is ready."""
    return wait_until(lambda: [view for view in running.tunnels.snapshot() if view.state == READY])[number]


def linked(running: Running) -> Any:
    """The view of a tunnel, once its client is there, and has said how it is."""
    return wait_until(lambda: [view for view in running.tunnels.snapshot() if view.link and view.link.pool])[0]


def environment_of(pid: int) -> str:
    return pathlib.Path(f"/proc/{pid}/environ").read_text()


def reached(running: Running, name: str = NAME) -> bytes:
    """What a client gets from the service."""
    with running.connect(sample_hello(name)) as client:
        return read_exactly(client, 5)


# -- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target, shown, argument", [
    ("127.0.0.1:10101", "127.0.0.1:10101", "127.0.0.1:10101"),
    (":10101", ":10101", ":10101"),
    ("*:10101", ":10101", ":10101"),
    ("[2001:db8::1]:10101", "[2001:db8::1]:10101", "[2001:db8::1]:10101"),
    ("$KEY@0.0.0.0:10101?tls=1&max=8", "$KEY@0.0.0.0:10101?tls=1&max=8", "$KEY@0.0.0.0:10101?tls=1&max=8"),
    ("tunnel.example.com:10101?type=2&slot=5&rate=8&read=1m&block=12",) * 3,
    (f"{SECRET}@:10101", f"{HIDDEN}@:10101", "$NODEPASS_KEY__10101@:10101"),
    ("a%40b@192.0.2.1:10101?tls=2&crt=/etc/a@b.crt&key=/etc/a.key",
     f"{HIDDEN}@192.0.2.1:10101?tls=2&crt=/etc/a@b.crt&key=/etc/a.key",
     "$NODEPASS_KEY_192_0_2_1_10101@192.0.2.1:10101?tls=2&crt=/etc/a%40b.crt&key=/etc/a.key"),
])
def test_a_target_is_told_to_the_program_without_its_key(target, shown, argument):
    settings = load_settings([f"--route={NAME}=nodepass:{target}"], {"KEY": f" {SECRET}\n"})
    decision = settings.routes.decide(NAME)
    launcher = settings.launchers["nodepass"].row(decision.tunnel)
    assert decision.target == str(decision.tunnel) == f"nodepass:{shown}"
    assert launcher.told(decision.tunnel) == argument and len(launcher.shared) and launcher.carries > 100
    name = argument.partition("@")[0].removeprefix("$") if argument.startswith("$") else ""
    assert not name or launcher.environment[name] == {"a%40b": "a@b"}.get(target.partition("@")[0], SECRET)
    assert SECRET not in " ".join([repr(decision), repr(settings.routes.routes), argument, *launcher.argv(decision.tunnel.hostname, 1)])


@pytest.mark.parametrize("target, sentence", [
    ("127.0.0.1", "is not [KEY@]HOST:PORT[?QUERY]"),
    ("127.0.0.1:0", "is not [KEY@]HOST:PORT[?QUERY]"),
    ("127.0.0.1:65536", "is not [KEY@]HOST:PORT[?QUERY]"),
    (f"{SECRET}?@127.0.0.1:1", "is not [KEY@]HOST:PORT[?QUERY]"),
    (f"{SECRET}/@127.0.0.1:1", "anything else is escaped as in a URL"),
    (f"{SECRET}:x@127.0.0.1:1", "anything else is escaped as in a URL"),
    (f"{SECRET}\u00e9@127.0.0.1:1", "of printable ASCII"),
    ("@127.0.0.1:1", "the key has 1 to 256"),
    ("x" * 257 + "@127.0.0.1:1", "the key has 1 to 256"),
    (f"${SECRET}@127.0.0.1:1", "the name of a variable"),
    (f"{SECRET}%00@127.0.0.1:1", "control characters"),
    (f"{SECRET}%ff@127.0.0.1:1", "no UTF-8"),
    (f"{HIDDEN}@127.0.0.1:1", "is how a key is shown"),
    ("127.0.0.1:1?mode=2", "mode: is always 1 here"),
    ("127.0.0.1:1?notcp=1", "notcp: would refuse all clients"),
    ("127.0.0.1:1?log=debug", "log: is said for all with --log-level"),
    ("127.0.0.1:1?min=8", "min: is for the client"),
    ("127.0.0.1:1?proxy=1", "proxy: is for the client"),
    ("127.0.0.1:1?type=1", "QUIC"),
    ("127.0.0.1:1?max=many", "max: 'many' is not a whole number"),
    ("127.0.0.1:1?blocks=1", "'blocks' is no parameter"),
    ("127.0.0.1:1?tls=2", "crt: tls=2 needs it"),
    ("127.0.0.1:1?tls=2&crt=a.crt&key=/a.key", "crt: write its whole path"),
    ("127.0.0.1:{label}", "a client would choose among the ports of this host"),
    ("{label}:1", "a client would choose among the ports of this host"),
    (f"{SECRET}@127.0.0.1:1?slot={{label}}", "a client would choose among the ports of this host"),
    ("127.0.0.1:1?crt=/" + "x" * 800, "1 to 800 characters"),
])
def test_a_target_that_is_none_stops_the_start_and_its_key_is_not_repeated(target, sentence, settings_file):
    lines = faults(f"--route=*.example.com=nodepass:{target}")
    lines += faults("-c", settings_file(f'[routes]\n"*.example.com" = {{ target = {json.dumps(f"nodepass:{target}")} }}\n'))
    assert len(lines) == 2 and all(sentence in line and SECRET not in line for line in lines)


@pytest.mark.parametrize("text", [f"nodepass:{SECRET}@{HOST}:1", f"{NAME}nodepass:{SECRET}@{HOST}:1"])
def test_a_key_in_an_option_that_is_no_route_is_not_repeated(text):
    (line,) = faults("--route", text)
    assert SECRET not in line and "is not PATTERN=TARGET" in line


def test_a_port_has_no_fields_and_its_key_is_not_repeated():
    (line,) = faults(f"--port={HOST}:5432=nodepass:{SECRET}@{{name}}:1")
    assert "a port has no name" in line and SECRET not in line


def test_a_variable_that_is_not_there_stops_the_start_and_is_named():
    (line,) = faults(f"--route={NAME}=nodepass:$TUNNEL_KEY@:10101", TUNNEL_KEY=" ")
    assert line == f"--route: {NAME}=nodepass:$TUNNEL_KEY@:10101: $TUNNEL_KEY is not in the environment: set it to the " \
        "key of this server"


@pytest.mark.parametrize("options, sentence", [
    (["--listen=127.0.0.1:10101"], "--listen 127.0.0.1:10101 has that address"),
    (["--listen=:10101"], "--listen *:10101 has that address"),
    (["--admin=127.0.0.1:10101"], "--admin 127.0.0.1:10101 has that address"),
    (["--port=127.0.0.1:10101=tcp:192.0.2.1:1"], "port 127.0.0.1:10101 has that address"),
    (["--ports=10000-10200"], "port 10101 is one of --ports 10000-10200"),
    (["--route=x.example.com=nodepass:k@127.0.0.1:10101?max=2"], "with another key or other parameters"),
    (["--route=x.example.com=nodepass:other@127.0.0.1:10101"], "with another key or other parameters"),
    (["--route=x.example.com=nodepass:k@:10101"], "with another key or other parameters"),
    (["--port=127.0.0.1:5432=nodepass:$K@localhost:10101"], "with another key or other parameters"),
])
def test_a_server_has_an_address_and_a_key_of_its_own(options, sentence):
    lines = faults(f"--route={NAME}=nodepass:k@127.0.0.1:10101", *options, K="k")
    assert len(lines) == 1 and sentence in lines[0]


def test_names_share_a_server():
    settings = load_settings([f"--route={name}.example.com=nodepass:k@127.0.0.1:10101" for name in "ab"], {})
    assert len({settings.routes.decide(f"{name}.example.com").tunnel for name in "ab"}) == 1


def test_what_is_likely_not_meant_is_said(caplog, monkeypatch):
    options = [f"--route={NAME}=nodepass:{HOST}:10101", f"--port={HOST}:5432=nodepass:{SECRET}@{HOST}:10102",
               "--listen=0.0.0.0:19000", "--max-tunnels=1"]
    monkeypatch.setattr(sys, "argv", ["sniroute.py", *options])
    with caplog.at_level(logging.WARNING):
        warn(load_settings(options, {}))
    said = [record.getMessage() for record in caplog.records]
    assert any("without a key anybody who knows the port can dial in" in line for line in said)
    assert any("its key is on the command line" in line for line in said)
    assert any("2 nodepass targets, and only 1 tunnels" in line for line in said)
    assert SECRET not in caplog.text and "`allow`" not in caplog.text
    caplog.clear()
    monkeypatch.setattr(sys, "argv", ["sniroute.py"])
    warn(load_settings([f"--route={NAME}=nodepass:{SECRET}@:10101"], {}))
    assert "nodepass" not in caplog.text


def test_a_missing_file_is_named(monkeypatch):
    monkeypatch.setattr("sniroute_routes.is_here", lambda room: room != "sniroute_pool")
    monkeypatch.delitem(sniroute_doctor.Route.decide.__globals__["SCHEMES"], "nodepass", raising=False)
    (line,) = faults(f"--route={NAME}=nodepass:{HOST}:1")
    assert line == "--route: nodepass: needs sniroute_pool.py, which is not beside sniroute.py: copy it there"


@pytest.mark.parametrize("text, shown", [
    (f"a=nodepass:{SECRET}@h:1", f"a=nodepass:{HIDDEN}@h:1"), ("a=nodepass:$KEY@h:1", "a=nodepass:$KEY@h:1"),
    (f"nodepass:$KEY{SECRET}@h:1", f"nodepass:{HIDDEN}@h:1"), ("nodepass:h:1", "nodepass:h:1"),
    (f"nodepass:{SECRET}?{SECRET}@h:1?a=b@c", f"nodepass:{HIDDEN}@c"), ("tcp:h:1", "tcp:h:1"),
])
def test_a_target_is_shown_without_its_key(text, shown):
    assert without_key(text) == shown


# -- the program -------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, reason", [
    ({"reason": "away", "error": "no client has dialled in to :1", "message": "x"},
     ("away", "no NodePass client has dialled in to :1", True)),
    ({"reason": "away", "message": "x"}, ("away", "no NodePass client has dialled in", True)),
    ({"reason": "refused", "error": "slot"}, ("failed", "slot", True)),
    ({"reason": "lost", "error": "the client has gone"}, ("failed", "the client has gone", False)),
    ({"error": "address already in use"}, ("failed", "address already in use", False)),
    ({"message": "it ends"}, ("failed", "it ends", False)),
])
def test_a_reason_is_what_the_program_says(fields, reason):
    assert tuple(sniroute_nat.reason(json.dumps(fields).encode() + b"\n")) == reason


def test_a_process_gets_keys_and_what_nodepass_knows_and_nothing_else():
    environ = {"K": "one", "NP_REPORT_INTERVAL": "1s", "TUNNEL_SERVICE_TOKEN_ID": "id", "HOME": "/root", "AWS_KEY": "x"}
    key = key_of("nodepass:$K@:10101", **environ)
    launcher = load_settings([f"--route={NAME}=nodepass:$K@:10101"], environ).launchers["nodepass"]
    assert launcher.row(key).environment == {"K": "one", "NP_REPORT_INTERVAL": "1s", "TUNNEL_LOG_OUTPUT": "json"}


def test_keys_of_the_settings_are_in_one_process_and_a_new_one_begins_another():
    launcher = load_settings([f"--route={name}.example.com=nodepass:key-{name}@:1010{name}" for name in "123"],
                             {}).launchers["nodepass"]
    row = launcher.row(key_of("nodepass:key-2@:10102"))
    assert all(launcher.row(key_of(f"nodepass:key-{name}@:1010{name}")) is row for name in "123")
    assert launcher.row(key_of("nodepass::10109")) is row  # without a key
    later = launcher.row(key_of("nodepass:another@:10101"))
    assert later is not row and later.environment["NODEPASS_KEY__10101"] == "another" != \
        row.environment["NODEPASS_KEY__10101"]
    assert launcher.row(key_of("nodepass:key-3@:10103")) is later


def test_the_environment_of_a_process_does_not_grow_for_ever(monkeypatch):
    monkeypatch.setattr(sniroute_nat, "KEYS_KEPT", 3)
    launcher = sniroute_nat.nodepass_launcher({})
    for port in range(10101, 10110):
        place = f"{HIDDEN}@:{port}"
        row = launcher.row(TunnelKey("nodepass", place, variables=(Secret(place, f"key-{port}"),)))
        assert row.environment[f"NODEPASS_KEY__{port}"] == f"key-{port}"
    assert sorted(row.environment) == [f"NODEPASS_KEY__{port}" for port in (10107, 10108, 10109)] + ["TUNNEL_LOG_OUTPUT"]


# -- what stands -------------------------------------------------------------------------------


def test_a_server_is_up_before_a_client_comes_and_clients_get_what_has_dialled_in(run, place, ports, dial_in, caplog):
    with caplog.at_level(logging.DEBUG):
        running = run(f"--route={NAME}=nodepass:{SECRET}@{place}?tls=1", ports)
        view = tunnel(running)
        assert view.link is None and view.stands and view.next == 0.0
        client = dial_in(place)
        assert linked(running).link[1:] == ("type 0, tls 1", 64, 2.0)
        assert linked(running).link.client == "{}:{}".format(*client.getsockname())
        assert reached(running) == reached(running) == b"hello"
        client.sendall(b"12 7\n")
        wait_until(lambda: linked(running).link[2:] == (12, 7.0))
        assert running.tunnels.counters["links"] == 1
        client.close()
        wait_until(lambda: tunnel(running).link is None)
        wait_until(lambda: any(line == "far end has gone" for line, _ in events(caplog)))
    said = events(caplog)
    assert ("far end has dialled in", {"tunnel": f"nodepass:{HIDDEN}@{place}?tls=1",
                                       "client": "{}:{}".format(*view_address(said))}) in said
    assert any(line == "far end has gone" and fields["reason"] == "it has closed the control channel" for line, fields in said)
    assert SECRET not in caplog.text and SECRET not in str(said)
    assert f"NODEPASS_KEY_{place.translate(str.maketrans('.:', '__'))}={SECRET}" in environment_of(view.pid).split("\0")
    assert SECRET not in pathlib.Path(f"/proc/{view.pid}/cmdline").read_text()


def view_address(said: list[tuple[str, dict[str, Any]]]) -> tuple[str, str]:
    (client,) = [fields["client"] for line, fields in said if line == "far end has dialled in"]
    return tuple(client.rsplit(":", 1))


def test_a_client_of_a_name_whose_far_end_is_away_is_told_so(run, place, ports):
    running = run(f"--route={NAME}=nodepass:{SECRET}@{place}", ports, "--http=forward")
    tunnel(running)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(REFUSALS["tunnel_away"].alert)
    ending = running.ending()
    assert ending.reason == "tunnel_away"
    assert ending.detail == f"nodepass:{HIDDEN}@{place}: no NodePass client has dialled in to {place}"
    with running.connect(f"GET / HTTP/1.1\r\nHost: {NAME}\r\nAccept: text/html\r\n\r\n".encode()) as client:
        page = read_all(client)
    assert page.startswith(b"HTTP/1.1 503 ") and b"No NodePass client has dialled in" in page
    assert SECRET.encode() not in page and place.encode() not in page
    assert tunnel(running).state == READY and tunnel(running).crashes == 0


def test_another_backend_is_used_while_the_far_end_is_away(run, place, ports, dial_in, serve, settings_file):
    def answer(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"other")
    path = settings_file(f"""
[routes]
"{NAME}" = {{ target = ["nodepass:{SECRET}@{place}", "tcp:{HOST}:{serve(answer).address[1]}"], balance = "first", fallback_interval = "100ms" }}
""")
    running = run("-c", path, ports)
    tunnel(running)
    assert reached(running) == b"other"
    dial_in(place)
    wait_until(lambda: reached(running) == b"hello")
    assert SECRET not in str([ending for ending in running.endings])


def test_a_server_is_neither_idled_nor_evicted(run, place, ports, dial_in, echo_server):
    running = run(f"--route={NAME}=nodepass:{SECRET}@{place}", "--route=a.example.com=cloudflared:a.example.com", ports,
                  "--idle=100ms", "--max-tunnels=1")
    pid = tunnel(running).pid
    dial_in(place)
    with running.connect(sample_hello("a.example.com")) as client:
        assert read_all(client) == alert(REFUSALS["tunnel_limit"].alert)
    assert reached(running) == b"hello"
    used = running.tunnels.tunnels[key_of(f"nodepass:{SECRET}@{place}")]
    wait_until(lambda: running.tunnels.clock() - used.last_used > 0.4)  # four times as long as others may be unused
    assert running.tunnels.counters["idle_stops"] == 0
    assert tunnel(running).pid == pid and tunnel(running).link is not None
    assert in_use(running.tunnels) == 1


def test_a_server_that_has_died_is_up_again(run, place, ports, dial_in):
    running = run(f"--route={NAME}=nodepass:{SECRET}@{place}", ports)
    pid = tunnel(running).pid
    with contextlib.closing(wait_until(lambda: try_connect((HOST, int(place.rpartition(":")[2]))))) as client:
        client.sendall(b"!die x:1\n")
        wait_until(lambda: not runs(pid))
    wait_until(lambda: running.tunnels.counters["crashes"] == 1 and tunnel(running).pid != pid)
    dial_in(place)
    assert reached(running) == b"hello"


def test_a_server_whose_address_is_taken_is_up_once_that_is_free(run, place, ports, dial_in):
    host, port = place.split(":")
    with socket.create_server((host, int(port))):
        running = run(f"--route={NAME}=nodepass:{SECRET}@{place}", ports)
        view = wait_until(running.tunnels.failed)[0]
        assert view.stands and "address already in use" in view.words
        with running.connect(HELLO) as client:
            assert read_all(client) == alert(REFUSALS["tunnel_failed"].alert)
    dial_in(place)
    assert reached(running) == b"hello"


def test_an_operator_stops_a_server_and_it_is_started_again(run, place, ports, dial_in):
    running = run(f"--route={NAME}=nodepass:{SECRET}@{place}", ports)
    first = tunnel(running)
    dial_in(place)
    assert running.tunnels.stop(first.key)
    wait_until(lambda: running.tunnels.counters["ready"] == 2)
    dial_in(place)
    assert reached(running) == b"hello"


def test_servers_go_at_the_end_and_none_is_started_while_it_drains(run, place, ports, dial_in):
    running = run(f"--route={NAME}=nodepass:{SECRET}@{place}", ports)
    dial_in(place)
    linked(running)
    running.tunnels.retiring = True
    running.tunnels.wake()
    wait_until(lambda: not running.tunnels.snapshot())
    with socket.create_server((HOST, int(place.rpartition(":")[2]))):  # for a successor
        assert running.tunnels.counters["starts"] == 1


def reload(running: Running, *options: str) -> None:
    """Go on with other settings, as the daemon does."""
    former = running.router.settings
    settings = load_settings(["--listen", f"{HOST}:0", *options], {}, former)
    running.tunnels.adopt(settings)
    done = threading.Event()
    running.router.call(lambda: (running.router.adopt(settings, {}), done.set()))
    assert done.wait(10)


def test_a_reload_starts_servers_and_ends_them_when_their_last_connection_has_gone(run, place, ports, dial_in, free_ports):
    other = f"{HOST}:{free_ports(1)[0]}"
    running = run(f"--route={NAME}=nodepass:{SECRET}@{place}", ports)
    dial_in(place, service=None)
    pid = linked(running).pid
    with running.connect(HELLO) as client:
        assert read_exactly(client, 5) == b"hello"
        reload(running, f"--route={NAME}=nodepass:{SECRET}@{other}", ports)
        dial_in(other, says=b"other")
        assert reached(running) == b"other"
        assert len(running.tunnels.snapshot()) == 2
    wait_until(lambda: [str(view.key) for view in running.tunnels.snapshot()] == [f"nodepass:{HIDDEN}@{other}"])
    wait_until(lambda: not runs(pid))  # the key of the other one was not in its environment


def test_another_key_for_a_server_counts_from_the_reload_on(run, place, ports, dial_in):
    running = run(f"--route={NAME}=nodepass:{SECRET}@{place}", ports)
    old = dial_in(place)
    reload(running, f"--route={NAME}=nodepass:another-key@{place}", ports)
    assert old.recv(1) == b""
    with contextlib.suppress(OSError), contextlib.closing(wait_until(
            lambda: try_connect((HOST, int(place.rpartition(":")[2]))))) as wrong:
        wrong.sendall(f"{SECRET} {HOST}:1\n".encode())
        assert wrong.recv(3) == b""
    dial_in(place, key="another-key", says=b"newer")
    wait_until(lambda: any(view.link for view in running.tunnels.snapshot()))
    assert reached(running) == b"newer"


@shared
def test_a_doubt_does_not_part_a_server_from_its_client(bench):
    made = bench()
    child = made.ready("a").child
    child.link = Link("192.0.2.1:1", "type 0")
    made.clock.now += 10.0
    assert not made.doubt(made.table.tunnels[TunnelKey("cf", "a")])
    child.link = None
    assert made.doubt(made.table.tunnels[TunnelKey("cf", "a")])


@shared
def test_as_many_servers_stand_as_there_may_be_tunnels(bench):
    made = bench(max_tunnels=2)
    made.table.launchers = {"cf": made.table.launchers["cf"]._replace(stands=True), "too": made.table.launchers["too"]}
    keys = [TunnelKey("cf", name) for name in "abc"]
    stand(made.table, "one", keys[:1])
    stand(made.table, "two", keys[1:])
    made.turn(lambda: list(made.states().values()) == ["ready", "ready"])
    assert set(made.states()) == {"a", "b"}
    assert made.failed("x").kind == "limit"
    stand(made.table, "one", [])
    made.turn(lambda: made.states() == {"b": "ready", "c": "ready"})
    made.clock.now += 100_000.0
    made.table.step()
    assert made.states() == {"b": "ready", "c": "ready"}
    stand(made.table, "two", [])
    made.turn(lambda: not made.states())


@pytest.mark.parametrize("said", ["x", "-1", "nan", "1e99", None, [1], 10 ** 400])
def test_a_number_that_is_none_is_zero(said):
    assert number_of(said) == 0.0


# -- the program itself ------------------------------------------------------------------------


@contextlib.contextmanager
def client_of(place: str, service: Address, key: str = SECRET) -> Iterator[subprocess.Popen]:
    """The other end: our program as a client of NodePass."""
    url = "client://{}@{}/{}:{}?mode=2".format(key, place, *service)
    process = subprocess.Popen([sys.executable, str(HERE / "sniroute_nodepass.py"), url], stdout=subprocess.DEVNULL,
                               env=environment(NP_SERVICE_COOLDOWN="200ms"))
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("query", ["", "?tls=1", "?type=2", "?type=3"])
def test_a_name_leads_to_what_has_dialled_in(launch, place, ports, echo_server, query):
    variables = {"NP_POOL_GET_TIMEOUT": "1s", "NP_REPORT_INTERVAL": "200ms", "NP_SERVICE_COOLDOWN": "200ms"}
    router = launch(f"--route={NAME}=nodepass:$TEST_KEY@{place}{query}", ports,
                    env=environment(TEST_KEY=SECRET, **variables))
    router.wait_for("tunnel ready")
    with router.connect(HELLO) as client:
        assert read_all(client) == alert(REFUSALS["tunnel_away"].alert)
    router.wait_for(f"no NodePass client has dialled in to {place}")
    for count in (1, 2):  # the other end comes, goes, and comes again
        with client_of(place, echo_server.address):
            router.wait_for("far end has dialled in", count)
            with router.connect(HELLO) as client:
                assert read_exactly(client, len(HELLO)) == HELLO
        router.wait_for("far end has gone", count)
    with client_of(place, echo_server.address, "a-guess"):
        with router.connect(HELLO) as client:
            assert read_all(client) == alert(REFUSALS["tunnel_away"].alert)
    assert SECRET not in router.log()


def test_a_successor_has_the_server_once_its_predecessor_has_no_connection_there(launch, place, free_ports, echo_server):
    options = f"--route={NAME}=nodepass:$TEST_KEY@{place}", "--drain=20s"
    env = environment(TEST_KEY=SECRET, NP_SERVICE_COOLDOWN="200ms")
    first = launch(*options, "--ports={}-{}".format(*free_ports()), env=env)
    with client_of(place, echo_server.address):
        first.wait_for("far end has dialled in")
        with first.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
            second = launch(*options, "--ports={}-{}".format(*free_ports()), "--listen={}:{}".format(*first.address), env=env)
            first.wait_for("draining: 1 connections")
            client.sendall(b"more")
            assert read_exactly(client, 4) == b"more"
        assert first.wait() == 0
        second.wait_for("far end has dialled in")
        with second.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO


# -- what people see ---------------------------------------------------------------------------


def get(admin: Any, path: str) -> str:
    connection = http.client.HTTPConnection(*admin.address, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read().decode()


@pytest.mark.usefixtures("hurry")
def test_explain_status_and_metrics_show_the_client_and_never_the_key(run, place, ports, dial_in, capsys):
    options = [f"--route={NAME}=nodepass:{SECRET}@{place}", ports]
    running = run(*options)
    admin = attach(running.router, running.router.settings._replace(admin=(HOST, 0)), {})
    try:
        options.append(f"--admin={HOST}:{admin.address[1]}")
        tunnel(running)
        assert sniroute_doctor.explain(load_settings(["explain", NAME, *options], {})) == 0
        assert "client:  none has dialled in\nto do:   start the client behind NAT, with the key and the address" in (
            said := capsys.readouterr().out)
        assert f"target:  nodepass:{HIDDEN}@{place}\n" in said and f"server://{HIDDEN}@{place}/127.0.0.1:" in said
        client = dial_in(place)
        client.sendall(b"48 3.5\n")
        wait_until(lambda: linked(running).link.pool == 48)
        wait_until(lambda: '"pool": 48' in get(admin, "/status"))  # which is made anew after a while
        assert sniroute_doctor.explain(load_settings(["explain", NAME, *options], {})) == 0
        assert "client:  {}:{}, type 0, tls 1, 48 connections in its pool, ping 3.5 ms\n".format(
            *client.getsockname()) in (again := capsys.readouterr().out)
        status, metrics = get(admin, "/status"), wait_until(
            lambda: "\nsniroute_tunnels_linked 1\n" in (found := get(admin, "/metrics")) and found)
        (row,) = json.loads(status)["tunnels"]
        assert row["link"] == {"client": "{}:{}".format(*client.getsockname()), "kind": "type 0, tls 1", "pool": 48,
                               "ping": 3.5} and row["stands"] is True
        assert "\nsniroute_tunnels_linked 1\n" in metrics and "\nsniroute_tunnel_links_total 1\n" in metrics
        assert SECRET not in said + again + status + metrics + get(admin, "/")
    finally:
        admin.close()


def test_check_shows_no_key(capsys):
    assert sniroute_doctor.check(load_settings(["check", f"--route={NAME}=nodepass:{SECRET}@:10101"], {})) == 0
    shown = capsys.readouterr()
    assert f"{NAME}=nodepass:{HIDDEN}@:10101\n" in shown.out and SECRET not in shown.out + shown.err


# -- what owners claim -------------------------------------------------------------------------


SHOP = f"shop.{DOMAIN}"


@pytest.fixture
def owned(routed: Callable[..., Routed], ports: str) -> Callable[..., Routed]:
    """owned(*options, **options of [registry]) -> Routed: a router whose owners may have servers."""
    return lambda *argv, **options: routed(*argv, ports, **{"targets": ["nodepass"], "networks": None, **options})


def test_a_claim_has_a_server_of_its_own_that_goes_with_it(owned, place, dial_in, caplog):
    made = owned(f"--route={NAME}=tcp:{HOST}:1")
    with caplog.at_level(logging.DEBUG):
        said = made.claim("shop", f"nodepass:{SECRET}@{place}?tls=1")
        assert said.status == 201 and said.json["target"] == f"nodepass:{HIDDEN}@{place}?tls=1"
        with contextlib.closing(dial_in(place)):
            assert linked(made.running).stands
            assert reached(made.running, SHOP) == b"hello"
            wait_until(lambda: not made.running.router.connections)
            assert made.claim("second", f"nodepass:{SECRET}@{place}?tls=1").status == 201  # another name for it
            for path in ("/routes", "/routes/shop", f"/routes/{SHOP}"):
                assert SECRET not in made.ask("GET", path, token=ADMIN).body.decode()
            assert made.ask("DELETE", "/routes/second", token=ADMIN).status == 204
            made.settle()
            assert made.running.tunnels.snapshot()[0].link
            assert made.ask("POST", f"/routes/{SHOP}/suspend", token=ADMIN).status == 200
            wait_until(lambda: not made.running.tunnels.snapshot())
        assert made.ask("POST", f"/routes/{SHOP}/resume", token=ADMIN).status == 200
        dial_in(place)
        assert reached(made.running, SHOP) == b"hello"
        assert made.ask("DELETE", f"/routes/{SHOP}", Sniroute_Lease=said.json["lease"]).status == 204
        wait_until(lambda: not made.running.tunnels.snapshot())
    assert SECRET not in caplog.text + str(events(caplog)) and not made.registrar.servers
    assert SECRET not in str(made.registrar.shown(10)) + str(made.registrar.find(SHOP))


@pytest.mark.parametrize("target, status, sentence", [
    ("nodepass:{place}", 400, "has to have your key"),
    (f"nodepass:{HIDDEN}@{{place}}", 400, "is how a key is shown"),
    (f"nodepass:$HOME{SECRET}@{{place}}", 400, "nothing is filled in"),
    (f"nodepass:{SECRET}/@{{place}}", 400, "anything else is escaped as in a URL"),
    (f"nodepass:{SECRET} @{{place}}", 400, "is not SCHEME:REST"),
    (f"nodepass:{SECRET}@192.0.2.1:10101", 403, "192.0.2.1 is no address of this router's"),
    (f"nodepass:{SECRET}@db.example.com:10101", 403, "db.example.com is no address of this router's"),
    (f"nodepass:{SECRET}@{HOST}:1023", 403, "port 1023 is not between 1024 and 65535"),
    (f"nodepass:{SECRET}@:{{own}}", 403, "is the router's own"),
    (f"nodepass:{SECRET}@{HOST}:{{registry}}", 403, "is the router's own"),
    (f"nodepass:{SECRET}@:{{server}}", 403, "is the router's own"),
    (f"nodepass:{SECRET}@:{{tunnel}}", 403, "is for the router's tunnels"),
    (f"nodepass:{SECRET}@:49005", 403, "is one of those that may be claimed"),
    (f"nodepass:{SECRET}@{{place}}?tls=2&crt=/etc/passwd&key=/etc/shadow", 403, "no files of the router's host"),
    (f"nodepass:{SECRET}@{{place}}?crt=/etc/passwd", 403, "no files of the router's host"),
    (f"nodepass:{SECRET}@{{place}}?type=1", 400, "QUIC"),
])
def test_what_owners_may_not_have_is_refused_and_no_key_is_repeated(owned, place, free_ports, caplog, target, status,
                                                                   sentence):
    server = free_ports(1)[0]
    made = owned(f"--route={NAME}=nodepass:own@{HOST}:{server}",
                 target_ports="1024-65535", ports="49000-49009")
    with caplog.at_level(logging.DEBUG):
        said = made.claim("shop", target.format(
            place=place, own=made.router.server_address[1], registry=made.address[1], server=server,
            tunnel=made.router.targets.tunnel_ports[1]))
    assert (said.status, sentence in said.json["detail"]) == (status, True), said.json
    assert SECRET not in said.body.decode() + caplog.text
    assert not made.registrar.servers


def test_owners_do_not_get_the_servers_of_others(owned, place, dial_in):
    made = owned(f"--route={NAME}=tcp:{HOST}:1", "--max-tunnels=1")
    port = int(place.rpartition(":")[2])
    mine = made.claim("shop", f"nodepass:{SECRET}@{place}")
    assert mine.status == 201
    for target in (f"nodepass:{SECRET}@{place}", f"nodepass:a-guess@{place}", f"nodepass:a-guess@:{port}"):
        said = made.claim("other", target, BOB)
        assert said.status == 409 and "another owner's server" in said.json["detail"]
        assert SECRET not in said.body.decode()
    said = made.claim("more", f"nodepass:a-guess@{place}")
    assert said.status == 409 and "with another key or other parameters" in said.json["detail"]
    said = made.claim("more", f"nodepass:{SECRET}@{HOST}:{port + 1}")
    assert said.status == 409 and "there are 1 servers already" in said.json["detail"]
    # The claim itself may have another key, from now on.
    first = dial_in(place)
    change = {"Sniroute_Lease": mine.json["lease"]}
    assert made.ask("PUT", "/routes/shop", {"target": f"nodepass:newer@{place}"}, **change).status == 200
    assert first.recv(1) == b""
    dial_in(place, "newer", says=b"newer")
    assert wait_until(lambda: reached(made.running, SHOP)) == b"newer"
    assert made.ask("DELETE", "/routes/shop", **change).status == 204
    wait_until(lambda: not made.running.tunnels.snapshot())
    assert made.claim("other", f"nodepass:a-guess@{place}", BOB).status == 201


@pytest.mark.parametrize("most, target, sentence", [
    (10, "nodepass:a-guess@{place}", "another owner's server"),
    (1, f"nodepass:a-guess@{HOST}:{{other}}", "there are 1 servers already")], ids=["another owner's", "one too many"])
@pytest.mark.parametrize("how", ["claim", "change"])
def test_of_two_that_want_a_server_at_once_one_gets_it(owned, place, monkeypatch, how, most, target, sentence):
    """The store has not answered to the first when the second asks."""
    made = owned(f"--route={NAME}=tcp:{HOST}:1", f"--max-tunnels={most}", targets=["nodepass", "tcp"],
                 networks=["192.0.2.0/24"])
    orders: list[Callable[[], None]] = []
    write = made.registrar.store.write
    target = target.format(place=place, other=int(place.rpartition(":")[2]) + 1)
    first = made.claim("shop", "tcp:192.0.2.1:1024") if how == "change" else None
    monkeypatch.setattr(made.registrar.store, "write", lambda *words: orders.append(lambda: write(*words)))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        if first is not None:
            asked = pool.submit(made.ask, "PUT", "/routes/shop", {"target": f"nodepass:{SECRET}@{place}"},
                                Sniroute_Lease=first.json["lease"])
        else:
            asked = pool.submit(made.claim, "shop", f"nodepass:{SECRET}@{place}")
        wait_until(lambda: len(orders) == 1)
        other = pool.submit(made.claim, "other", target, BOB)
        wait_until(lambda: other.done() or len(orders) == 2)
        for order in orders:
            made.registrar.door.loop.call(order)
        assert asked.result(10).status in (200, 201) and other.result(10).status == 409
    assert sentence in other.result().json["detail"] and SECRET not in other.result().body.decode()
    assert len(made.registrar.servers) == 1 and not made.registrar.rest.coming


@pytest.mark.usefixtures("hurry")
def test_explain_shows_the_server_of_a_claim(owned, place, dial_in, capsys):
    made = owned(f"--route={NAME}=tcp:{HOST}:1")
    assert made.claim("shop", f"nodepass:{SECRET}@{place}").status == 201
    client = dial_in(place)
    linked(made.running)
    admin = attach(made.router, made.router.settings._replace(admin=(HOST, 0)), {})
    with contextlib.closing(admin):
        settings = load_settings(["explain", SHOP, "-c", made.router.settings.config, f"--admin={HOST}:{admin.address[1]}"], {})
        assert sniroute_doctor.explain(settings) == 0
    said = capsys.readouterr().out
    assert f"target:  nodepass:{HIDDEN}@{place}\n" in said and SECRET not in said
    assert "client:  {}:{}, type 0, tls 1, 64 connections in its pool, ping 2 ms\n".format(*client.getsockname()) in said


def test_a_claim_that_another_router_has_let_in_and_that_is_none_leads_nowhere(owned):
    made = owned(f"--route={NAME}=tcp:{HOST}:1")
    registry = made.registrar.registry
    done = threading.Event()
    made.registrar.door.loop.call(lambda: registry.claim(
        SHOP, "alice", f"nodepass:{SECRET}/@nowhere", 60.0, 60.0, lambda result: done.set()))
    assert done.wait(10)
    made.settle()
    with made.running.connect(sample_hello(SHOP)) as client:
        assert read_all(client) == alert(REFUSALS["no_route"].alert)
    assert not made.running.tunnels.snapshot()


def test_a_claim_that_a_reload_lets_in_has_its_server_at_once(owned, place, dial_in):
    """Another router of the store has let it in before: no claim comes, changes or goes."""
    options: dict[str, Any] = {"targets": ["nodepass"], "networks": None}
    made = owned(f"--route={NAME}=tcp:{HOST}:1", owners={"bob": {}})
    registry, done = made.registrar.registry, threading.Event()
    claim = Claim(SHOP, "0" * 32, "alice", f"nodepass:{SECRET}@{place}", "1" * 32, 1, 600.0, 600.0, monotonic() + 600)
    made.registrar.door.loop.call(lambda: (registry.learn(SHOP, claim), done.set()))
    assert done.wait(10)
    made.settle()
    assert not made.running.tunnels.standing
    made.reload(table_of(owners={"alice": {}, "bob": {}}, **options))
    assert made.running.tunnels.standing
    dial_in(place)
    assert reached(made.running, SHOP) == b"hello"


def test_events_and_the_audit_show_no_key(owned, place, tmp_path):
    made = owned(f"--route={NAME}=tcp:{HOST}:1", store=f"sqlite:{tmp_path}/names.db")
    listener = made.ask  # each request has a connection of its own
    with contextlib.closing(http.client.HTTPConnection(*made.address, timeout=10)) as connection:
        connection.request("GET", "/events", headers={"Authorization": f"Bearer {ADMIN}"})
        stream = connection.getresponse()
        assert made.claim("shop", f"nodepass:{SECRET}@{place}").status == 201
        heard = b""
        while b"event: claimed" not in heard or not heard.endswith(b"\n\n"):
            heard += stream.read1()
    assert f"nodepass:{HIDDEN}@{place}".encode() in heard and SECRET.encode() not in heard
    audit = wait_until(lambda: (said := listener("GET", "/audit", token=ADMIN)).json["changes"] and said)
    assert f"nodepass:{HIDDEN}@{place}" in audit.body.decode() and SECRET not in audit.body.decode()


def test_a_server_of_a_claim_is_up_again_after_a_restart(owned, routed, place, ports, tmp_path, dial_in):
    options = {"targets": ["nodepass"], "networks": None, "store": f"sqlite:{tmp_path}/names.db"}
    made = routed(ports, **options)
    assert made.claim("shop", f"nodepass:{SECRET}@{place}").status == 201
    tunnel(made.running)
    made.close()
    made.running.tunnels.stop(tunnel(made.running).key)
    made.running.tunnels.retiring = True
    made.running.tunnels.wake()
    wait_until(lambda: not made.running.tunnels.snapshot())
    again = routed(ports, **options)
    dial_in(place)
    assert reached(again.running, SHOP) == b"hello"


def test_a_claim_of_a_port_has_a_server_too(owned, place, dial_in, free_ports):
    first, last = free_ports(1)
    made = owned(f"--route={NAME}=tcp:{HOST}:1", ports=f"{first}-{last}")
    assert made.ask("POST", "/routes", {"port": None, "target": f"nodepass:{SECRET}@{place}"}).status == 201
    dial_in(place)
    with wait_until(lambda: try_connect((HOST, first))) as client:
        client.sendall(b"?")
        assert read_exactly(client, 5) == b"hello"


def test_a_claim_is_given_the_key_by_the_environment(monkeypatch):
    assert with_key("nodepass:$K@:10103?tls=1", {"K": "a b@c\n"}) == "nodepass:a%20b%40c@:10103?tls=1"
    assert with_key(f"nodepass:{SECRET}@:1", {}) == f"nodepass:{SECRET}@:1"
    with pytest.raises(Unable, match="^\\$K is not in the environment"):
        with_key("nodepass:$K@:10103", {"K": ""})


def test_the_file_of_the_document_has_two_servers(settings_file):
    path = settings_file(marked((HERE / "OPERATING.md").read_text(), "nodepass"))
    settings = load_settings(["-c", path], {"SHOP_KEY": "one", "DB_KEY": "two"})
    assert [route.target for route in (*settings.routes.routes, *settings.port)] == [
        "nodepass:$SHOP_KEY@0.0.0.0:10101?tls=1", "nodepass:$DB_KEY@0.0.0.0:10102?tls=1"]


def test_the_start_says_what_owners_lack(caplog, monkeypatch, settings_file):
    path = settings_file("""
[registry]
domains = ["tun.example.com"]
owners = { alice = { token = "sha256:%s" } }
""" % ("0" * 64))
    warn(load_settings(["-c", path], {}))
    assert "registry.targets" not in caplog.text
    monkeypatch.setattr("sniroute_settings.is_here", lambda room: room != "sniroute_pool")
    warn(load_settings(["-c", path], {}))
    assert "registry.targets: nothing can be claimed: nodepass needs sniroute_pool.py beside sniroute.py" in caplog.text
