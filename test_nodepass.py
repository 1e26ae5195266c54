"""Tests of sniroute_nodepass.py: the program as people start it, and as sniroute does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from conftest import HERE, HOST, connect, exit_code, wait_until
from sniroute_nodepass import USAGE, StatusLog, main
from sniroute_nodeurl import PARAMETERS
from testbed.nodepass import QUICK, Forwarders, show
from testbed.ports import free_port

PROGRAM = [sys.executable, str(HERE / "sniroute_nodepass.py")]


def trips(port: int, count: int = 3) -> bool:
    """Whether callers are served."""
    for _ in range(count):
        try:
            with connect((HOST, port), b"hello") as caller:
                if caller.recv(10) != b"hello":
                    return False
        except OSError:
            return False
    return True


def test_two_processes_carry(processes, echo_server):
    """The status line is the original's, and TERM ends both with 0."""
    tunnel, callers = free_port(), free_port()
    quick = {**os.environ, "NP_REPORT_INTERVAL": "100ms"}
    server = processes(f"server://key@{HOST}:{tunnel}/{HOST}:{callers}?mode=1", env=quick)
    server.has_said("INFO  listening for a client on")
    client = processes(f"client://key@{HOST}:{tunnel}/{show(echo_server.address)}?mode=2", env=quick)
    wait_until(lambda: trips(callers))
    line = server.has_said(r"CHECK_POINT\|MODE=1\|.*TCPS=0\|.*TCPRX=1[5-9]")  # the last of them has ended, too
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  EVENT  CHECK_POINT\|MODE=1\|PING=\d+ms\|POOL=\d+\|"
                        r"TCPS=0\|UDPS=0\|TCPRX=15\|TCPTX=15\|UDPRX=0\|UDPTX=0", line)
    client.has_said(r"CHECK_POINT\|MODE=2\|.*TCPRX=15\|TCPTX=15")
    for each in (client, server):
        each.process.send_signal(signal.SIGTERM)
        assert exit_code(each.process, 10) == 0
        each.has_said("shutdown complete")


def test_flags_say_what_a_url_says(processes, echo_server):
    tunnel, callers = free_port(), free_port()
    processes("server", "--password", "key", "--tunnel-addr", HOST, "--tunnel-port", str(tunnel), "--target-addr", HOST,
              "--target-port", str(callers), "--mode", "1").has_said("listening for a client")
    processes("client", "--password", "key", "--tunnel-addr", HOST, "--tunnel-port", str(tunnel), "--target-addr", HOST,
              "--target-port", str(echo_server.address[1]), "--mode", "2")
    wait_until(lambda: trips(callers))


def test_a_url_in_the_environment_is_not_on_the_command_line(processes, echo_server):
    """Where everybody on this host could read it."""
    tunnel, callers = free_port(), free_port()
    url = f"server://secret@{HOST}:{tunnel}/{HOST}:{callers}?mode=1"
    server = processes(env={**os.environ, "SNIROUTE_NODEPASS_URL": url})
    assert "secret" not in server.has_said("listening for a client")
    with open(f"/proc/{server.process.pid}/cmdline", "rb") as file:
        assert b"secret" not in file.read()


@pytest.mark.parametrize("words, code, said", [
    (["--help"], 0, "usage: sniroute_nodepass.py server://"),
    (["--version"], 0, "sniroute_nodepass 0.1.0 (Python"),
    ([], 1, "usage: sniroute_nodepass.py server://"),
    ([f"server://key@{HOST}:1/{HOST}:2?type=1"], 1, "QUIC"),
    ([f"server://key@{HOST}:1/{HOST}:2?type=1&lbs=9"], 1, "lbs"),
    ([f"server://key@{HOST}:1/{HOST}:2", "more"], 1, "unexpected 'more'"),
    ([f"gopher://key@{HOST}:1/{HOST}:2"], 1, "none of server://, client://, master://"),
    (["gopher"], 1, "none of server"),
    (["forwarders", "more"], 1, "unexpected 'more'"),
])
def test_wrong_words_are_told_in_one_line_each(words, code, said, capfd, monkeypatch):
    monkeypatch.delenv("SNIROUTE_NODEPASS_URL", raising=False)
    assert main(words) == code
    output = "".join(capfd.readouterr())
    assert said in output
    assert "Traceback" not in output
    if words and code:
        assert all(line.startswith("sniroute_nodepass: ") for line in output.splitlines())


def test_the_usage_has_each_parameter():
    assert {name for name in PARAMETERS if not re.search(rf"\b{name}=", USAGE)} == set()


def test_a_log_has_levels_and_colours_on_a_terminal_only(capfd):
    log = StatusLog("warn")
    for level in ("debug", "info", "warn", "error", "event"):
        log(level, f"{level}\33[31m!")
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ", 2)[1] for line in lines] == ["WARN", "ERROR", "EVENT"]
    assert not any("\33" in line for line in lines), "what strangers say is printable"


def test_sniroute_tells_it_what_to_open(echo_server):
    """Lines on stdin, JSON on stderr; a key is a variable; a link and its state are told."""
    environ = {**os.environ, "NP_REPORT_INTERVAL": "100ms", "KEY_OF_SHOP": "secret"}
    tunnel = free_port()
    with subprocess.Popen([*PROGRAM, "forwarders"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environ,
                          text=True) as program:
        def tell(line: str) -> None:
            program.stdin.write(line + "\n")
            program.stdin.flush()

        def event(*words: str) -> dict[str, str]:
            while (row := json.loads(program.stderr.readline())).get("event") not in words:
                pass
            return row

        tell(f"listen {HOST}:0 $NOT_THERE@{HOST}:{tunnel}")
        assert "NOT_THERE is not set" in event("closed")["error"]
        tell(f"listen {HOST}:0 $KEY_OF_SHOP@{HOST}:{tunnel}?lbs=9")
        assert "lbs" in event("closed")["error"]
        tell(f"listen {HOST}:0 $KEY_OF_SHOP@{HOST}:{tunnel}?max=8")
        where = event("listening")["listener"]
        with subprocess.Popen([*PROGRAM, f"client://secret@{HOST}:{tunnel}/{show(echo_server.address)}?mode=2"],
                              stdout=subprocess.DEVNULL) as client:
            row = event("linked")
            assert (row["listener"], row["client"], row["type"], row["tls"]) == (where, HOST, "0", "0")
            row = event("state")
            assert row["listener"] == where and row["pool"].isdecimal() and float(row["ping"]) >= 0
            assert trips(int(where.rpartition(":")[2]))
            client.kill()
            assert event("unlinked")["listener"] == where
        tell(f"close {where}")
        assert event("closed")["listener"] == where
        with pytest.raises(OSError), socket.create_connection((HOST, tunnel), 5):
            pass
        program.stdin.close()
        assert exit_code(program, 10) == 0


def test_a_caller_is_told_by_a_line_that_sniroute_reads(lone):
    """Where no client has dialled in."""
    made = lone(kind=Forwarders, times=QUICK._replace(pool_get=0.05), environ={"KEY": "secret"})
    listener = made.program.listen(made.program.parse(f"$KEY@{HOST}:{free_port()}"), (HOST, 0))
    made.start()
    with pytest.raises(ConnectionError), connect(listener.sock.getsockname(), b"hello") as caller:
        assert caller.recv(1) == b"x", "an end"
    row, = [row for row in made.log.rows if row.get("event") == "failed"]
    assert (row["reason"], row["listener"]) == ("away", listener.address)
    assert not any("secret" in text for row in made.log.rows for text in row.values())


def test_the_end_of_a_listener_is_the_end_of_its_server(lone):
    made = lone(kind=Forwarders)
    loop = made.program.loop
    before = len(loop.queues), len(loop.timers)
    for _ in range(20):
        listener = made.program.listen(made.program.parse(f"{HOST}:{free_port()}"), (HOST, 0))
        made.program.unlisten(listener.address)
        loop.hurry()
        loop.turn()
    assert (len(loop.queues), len(loop.timers)) == before and not made.program.ends


def test_a_listener_that_cannot_be_opened_leaves_no_server(lone):
    """Its server is made first, of the argument."""
    made = lone(kind=Forwarders)
    loop = made.program.loop
    before = len(loop.queues), len(loop.timers)
    with socket.create_server((HOST, 0)) as taken:
        for _ in range(3):
            with pytest.raises(OSError):
                made.program.listen(made.program.parse(f"{HOST}:{free_port()}"), taken.getsockname())
            loop.hurry()
            loop.turn()
    assert (len(loop.queues), len(loop.timers)) == before and not made.program.ends
