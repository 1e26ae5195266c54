"""Tests of sniroute_systemd.py, most with the real program (`launch` of testbed/program.py)."""

from __future__ import annotations

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

import sniroute_router
import sniroute_systemd
from conftest import HERE, HOST, linux, wait_until
from testbed.hellos import HELLO, NAME
from testbed.program import PROGRAM, Customers, activated, command, cpu_seconds, environment, execute, namespace
from testbed.running import read_exactly, route


@pytest.fixture
def programs() -> None:
    """No fork: what systemd says to a start is what these tests are about."""


# -- sockets of systemd ------------------------------------------------------------------------

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


LISTENER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    sock, _ = listener.accept()
    with sock:
        while data := sock.recv(65536):
            sock.sendall(data)
"""


@linux
def test_in_a_network_of_its_own_no_other_user_of_the_host_reaches_a_tunnel(launch, held, tmp_path, free_ports):
    """Clients come by the socket, which is in the host's network; the port of a tunnel is in the router's own."""
    (tmp_path / "listener.py").write_text(LISTENER)
    first, last = free_ports()
    made = activated(("sniroute", held))
    made["python"] = (*namespace("--net", "ip link set lo up"), *made["python"])
    program = launch(f"--route={NAME}=command:{sys.executable} -S {tmp_path}/listener.py {{port}}", f"--ports={first}-{last}",
                     "--log-level=debug", **made)
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        program.wait_for(f"127.0.0.1:{first}")  # its port
        with pytest.raises(ConnectionRefusedError):
            program.connect(address=(HOST, first))


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


NO_SOCKETS = {"": [], "admin": [], "admin-public": [], "port": []}


def test_sockets_for_another_process_are_left_alone(monkeypatch):
    assert sniroute_systemd.activated_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "3"}) == NO_SOCKETS
    assert sniroute_systemd.activated_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}) == NO_SOCKETS


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
    assert manager.hear("STATUS=") == "STATUS=stopped: 0 connections, 0 tunnels", "the unit shows the last one"


def test_systemd_hears_at_once_that_it_drains(launch, manager, echo_server):
    """Not with the next beat, which may be ten seconds away."""
    program = launch(route(echo_server.address), env=environment(NOTIFY_SOCKET=manager.address))
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        began = time.monotonic()
        program.signal(signal.SIGTERM)
        manager.hear("EXTEND_TIMEOUT_USEC=")
        assert manager.hear("STATUS=") == "STATUS=draining: 1 connections, 0 tunnels"
        assert time.monotonic() - began < sniroute_systemd.STATUS_EVERY / 2
    assert program.wait() == 0


def test_systemd_is_asked_for_the_time_of_a_lame_duck(launch, manager, echo_server):
    program = launch(route(echo_server.address), "--lameduck=60s", env=environment(
        NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="200000"))
    manager.hear("READY=1")
    program.signal(signal.SIGTERM)
    manager.hear("STOPPING=1")
    assert int(manager.hear("EXTEND_TIMEOUT_USEC=").partition("=")[2]) > 10e6
    assert manager.hear("STATUS=") == "STATUS=lameduck: 0 connections, 0 tunnels"
    for _ in range(3):  # again and again, for as long as it takes
        manager.hear("EXTEND_TIMEOUT_USEC=")
    program.signal(signal.SIGTERM)
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
    supervisor = sniroute_systemd.Supervisor({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "x"})
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
            with contextlib.closing(sniroute_systemd.Supervisor({"NOTIFY_SOCKET": address, **environ})) as supervisor:
                assert supervisor.watchdog is watchdog
                assert supervisor.every == (0.0005 if watchdog else sniroute_systemd.STATUS_EVERY)


# -- the units ---------------------------------------------------------------------------------

Unit = dict[str, list[tuple[str, str]]]


def read_unit(name: str) -> Unit:
    """The sections of a unit: each assignment in its order, since some may be there twice (systemd.syntax(7))."""
    unit: Unit = {}
    for line in (HERE / name).read_text().splitlines():
        if re.match(r"[#;]|$", line):
            continue
        if header := re.fullmatch(r"\[(\w+)\]", line):
            entries = unit.setdefault(header[1], [])
        else:
            key, equals, value = line.partition("=")
            assert equals and re.fullmatch("[A-Za-z0-9]+", key), line
            entries.append((key, value))
    return unit


def values(unit: Unit, section: str, key: str) -> list[str]:
    return [value for name, value in unit[section] if name == key]


SERVICE, SOCKET = read_unit("sniroute.service"), read_unit("sniroute.socket")


def comments(name: str) -> str:
    """The comments of a unit, as one text."""
    return " ".join(" ".join(re.findall("^# ?(.*)$", (HERE / name).read_text(), re.MULTILINE)).split())


def test_wrong_settings_do_not_close_the_port_for_good():
    """A waiting client triggers the service again and again: a limit of starts would fail the socket unit, too."""
    assert values(SERVICE, "Unit", "StartLimitIntervalSec") == ["0"]
    assert values(SERVICE, "Service", "RestartPreventExitStatus") == []
    assert values(SERVICE, "Service", "Restart") == ["on-failure"] and values(SERVICE, "Service", "RestartSec") == ["2"]


def test_the_service_brings_its_socket():
    """After `systemctl stop` of both, and after a failure; and it does without one that is not installed."""
    wanted = " ".join(values(SERVICE, "Unit", "Wants")).split()
    assert "sniroute.socket" in wanted
    assert not values(SERVICE, "Unit", "Requires") and not values(SERVICE, "Service", "Sockets")
    assert values(SOCKET, "Install", "WantedBy") == ["sockets.target"]


def test_the_socket_unit_says_how_it_is_added_to_a_service_that_runs():
    recipe = "systemctl daemon-reload; systemctl stop sniroute.socket sniroute; systemctl enable --now sniroute.socket sniroute"
    assert recipe in comments("sniroute.socket") and f"\n{recipe}\n" in (HERE / "OPERATING.md").read_text()
    assert "systemctl edit sniroute.socket" in comments("sniroute.socket")


def test_a_tunnel_that_takes_too_much_memory_does_not_end_the_router():
    assert values(SERVICE, "Service", "OOMPolicy") == ["continue"]


def test_a_reload_checks_the_settings_first_and_prints_no_routes():
    check, reload = values(SERVICE, "Service", "ExecReload")
    (start,) = values(SERVICE, "Service", "ExecStart")
    assert check == f"{start} check --quiet" and reload == "/bin/kill -HUP $MAINPID"
    assert values(SERVICE, "Service", "Type") == ["notify"]
    said = comments("sniroute.service")
    assert "`notify-reload` works, too" in said and "keep the `check` line" in said and "drop the `kill` line" in said


def test_the_journal_knows_it_by_its_name():
    assert values(SERVICE, "Service", "SyslogIdentifier") == ["sniroute"]


def test_the_sandbox_of_the_unit_is_closed():
    for key, value in (("DynamicUser", "yes"), ("NoNewPrivileges", "yes"), ("ProtectSystem", "strict"),
                       ("ProcSubset", "pid"), ("PrivateTmp", "yes"), ("WatchdogSec", "30"), ("KillMode", "mixed"),
                       ("CapabilityBoundingSet", "CAP_NET_BIND_SERVICE")):
        assert values(SERVICE, "Service", key) == [value], key
    assert values(SOCKET, "Socket", "BindIPv6Only") == ["both"] and values(SOCKET, "Socket", "ListenStream") == ["19000"]


# -- journald ----------------------------------------------------------------------------------


def journalled(*words: str, code: str = "", **variables: str) -> tuple[int, list[str]]:
    """Run sniroute with a stderr that JOURNAL_STREAM says is journald's.  Returns its exit code, and the lines."""
    reader, writer = os.pipe()
    with open(reader) as lines:
        state = os.fstat(writer)
        program = [sys.executable, "-c", code] if code else [sys.executable, str(PROGRAM)]
        try:
            done = subprocess.run([*program, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=writer,
                                  env=environment(JOURNAL_STREAM=f"{state.st_dev}:{state.st_ino}", **variables), timeout=60)
        finally:
            os.close(writer)
        return done.returncode, lines.read().splitlines()


@pytest.mark.parametrize("words, code, line", [
    (["serve", "--idle=soon"], 2, "<3>sniroute: --idle: 'soon' is not a duration such as 300s, 5m, 1h30m or 500ms"),
    (["check", "--idle=soon"], 2, "<3>sniroute: --idle: 'soon' is not a duration such as 300s, 5m, 1h30m or 500ms"),
    (["-c", "/nonexistent/file"], 2, "<3>sniroute: /nonexistent/file: No such file or directory"),
    (["check", "--quiet", "-c", "/nonexistent/file"], 2, "<3>sniroute: /nonexistent/file: No such file or directory"),
    (["--bogus"], 2, "<3>sniroute: error: unrecognized arguments: --bogus"),
    (["--listen=192.0.2.1:9", "--route=a.b=tcp:h:1"], 1, "<3>--listen 192.0.2.1:9: Cannot assign requested address"),
    (["check", "--ports=32000-33000", "--route=a.b=tcp:h:1"], 0, "<4>sniroute: --ports 32000-33000 overlap the kernel's own"),
], ids=["setting", "check", "no-file", "no-file-to-check", "no-option", "address", "warning"])
def test_why_a_start_or_a_reload_failed_has_its_priority_in_the_journal(words, code, line):
    """`journalctl -p warning` shows it."""
    ended, lines = journalled(*words)
    assert ended == code and lines[-1 if code else 0].startswith(line)
    assert all(re.match("<[34]>", each) for each in lines), lines


def test_each_of_several_mistakes_has_its_priority(settings_file):
    path = settings_file('idle = "x"\nidel = 1\n[routes]\n"a" = "b"\n')
    for words in ([], ["check", "--quiet"]):
        ended, lines = journalled(*words, "-c", path)
        assert ended == 2 and len(lines) == 3 and all(line.startswith(f"<3>sniroute: {path}: ") for line in lines)


def test_a_fault_before_the_log_begins_has_its_priority_whole():
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import sniroute, sniroute_settings; " \
        "sniroute_settings.load_settings = lambda *_: 1 / 0; sniroute.main([])"
    ended, lines = journalled(code=code)
    assert ended == 1 and lines[-1] == "<3>ZeroDivisionError: division by zero"
    assert lines[0] == "<3>Traceback (most recent call last):" and all(line.startswith("<3>") for line in lines)


def test_without_journald_nothing_has_a_priority():
    ended = command("--idle=soon")
    assert ended.returncode == 2 and ended.stderr.startswith("sniroute: --idle: ")
    ended = command("--bogus", JOURNAL_STREAM="1:2")
    assert ended.returncode == 2 and "<3>" not in ended.stderr
