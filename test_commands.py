"""Tests of sniroute_commands.py, and of `unix:` targets: programs and sockets of this host as targets."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import sys
import threading
from typing import Any, Iterator

import pytest

import sniroute_commands
import sniroute_settings
import sniroute_targets
from sniroute_commands import words_of
from sniroute_launchers import TunnelKey, Variable
from sniroute_refusals import Malformed, SettingsError
from sniroute_routes import Routes, parse_route
from sniroute_wire import SSL_REQUEST_BYTES
from conftest import HOST, linux, wait_until
from testbed.hellos import HELLO, genuine
from testbed.program import command
from testbed.running import Running, alert, read_all, read_exactly, reset, toml
from testbed.tunnels import runs

PYTHON = sys.executable


def script(tmp_path: pathlib.Path, text: str, name: str = "program.py") -> str:
    """The words of a command that runs this Python text."""
    path = tmp_path / name
    path.write_text(text)
    return f"{PYTHON} -u -S {path}"


def led(target: str, name: str = "db.example.com", **options: Any) -> str:
    """Where `*.example.com` leads a name with this target."""
    return Routes([parse_route(f"*.example.com={target}")._replace(**options)]).decide(name).target


# -- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target, filled", [
    ("exec:ssh -W {label}:22 bastion.example.com", "exec:ssh -W db:22 bastion.example.com"),
    ("exec:prog 'two words {label}' \"$HOME\" ;", "exec:prog 'two words db' \"$HOME\" ;"),
    ("exec:/bin/prog -o{label} --name={name}", "exec:/bin/prog -odb --name=db.example.com"),
    ("command:ssh -N -L {address}:{label}:5432 bastion", "command:ssh -N -L {address}:db:5432 bastion"),
    ("command:kubectl port-forward svc/{label} {port}:80", "command:kubectl port-forward svc/db {port}:80"),
])
def test_a_field_fills_a_part_of_one_word(target, filled):
    assert led(target) == filled
    assert len(words_of(target.partition(":")[2])) == len(words_of(filled.partition(":")[2]))


def test_words_are_those_of_a_shell_that_is_never_run():
    assert words_of("prog 'two words' \"$HOME\" ; `x` a\\ b # c") == (
        "prog", "two words", "$HOME", ";", "`x`", "a b", "#", "c")
    assert sniroute_commands.argv("ssh -N -L {address}:db:1 -p {port}", 20000) == [
        "-N", "-L", "127.0.0.1:20000:db:1", "-p", "20000"]


@pytest.mark.parametrize("target, sentence", [
    ("exec:", "a command has 1 to"),
    ("exec:''", "names no program"),
    ("exec:prog 'open", "No closing quotation"),
    ("exec:./prog", "is relative to a folder"),
    ("exec:bin/prog", "is relative to a folder"),
    ("exec:{label} x", "cannot name the program"),
    ("exec:/srv/{label}/run", "cannot name the program"),
    ("exec:prog -{label}", "would let clients choose the option"),
    ("exec:prog --{label}=1", "would let clients choose the option"),
    ("exec:prog {port}", "has a field other than"),
    ("exec:prog \u00e9", "printable ASCII"),
    ("exec:prog " + "x" * 1000, "a command has 1 to"),
    ("command:ssh -N bastion", "is not told where to listen"),
    ("command:{address} x", "is not told where to listen"),
    ("command:ssh -N -L {address}:{host}:1 x", "has a field other than"),
    ("unix:", "is not the absolute path"),
    ("unix:x.sock", "is not the absolute path"),
    ("unix:/run/../x", "no . or .. in it"),
    ("unix:/run/./x", "no . or .. in it"),
    ("unix://x", "is not the absolute path"),
    ("unix:/run/x/", "is not the absolute path"),
    ("unix:/run/a b", "no spaces"),
    ("unix:/" + "x" * 100, "at most 100 characters"),
])
def test_a_target_that_no_name_could_make_good_stops_the_start(target, sentence):
    with pytest.raises(SettingsError) as fault:
        sniroute_settings.load_settings([f"--route=*.example.com={target}"], {})
    (line,) = fault.value.lines
    assert line.startswith("--route: ") and sentence in line


@pytest.mark.parametrize("template, filled", [
    ("prog {a}", "prog -rf"), ("prog {a}{b}", "prog --x"), ("prog {a}", "prog"), ("prog {a}", "prog a b"),
    ("prog x{a}", "prog y1"), ("prog '{a}'", "prog ';x'"), ("prog {a}", "prog A"), ("prog {a} c", "prog 'a' d"),
    ("prog {a}", "prog '$(x)'"), ("prog {a}", "other a"), ("prog {a}", "prog a/b"),
    ("sh -c 'grep {a} /etc/motd'", "sh -c 'grep -rf /etc/motd'"),
])
def test_whatever_a_field_may_hold_it_makes_no_option_and_no_other_word(template, filled):
    """A field of a pattern may begin with a dash, where a name cannot."""
    with pytest.raises(Malformed) as fault:
        sniroute_commands.fits((), template, filled)
    assert fault.value.kind == "bad_name"


@pytest.mark.parametrize("template, filled", [
    ("prog {a}", "prog a-b_c.d"), ("prog x{a}", "prog xa-"), ("sh -c 'grep {a} /etc/motd'", "sh -c 'grep a-b /etc/motd'"),
])
def test_a_dash_inside_a_word_is_only_a_dash(template, filled):
    sniroute_commands.fits((), template, filled)


@pytest.mark.parametrize("template, filled", [
    ("/run/{a}/s", "/run/x/y/s"), ("/run/{a}", "/run/x/../y"),
])
def test_a_field_never_leaves_the_folder_of_its_socket(template, filled):
    with pytest.raises(Malformed):
        sniroute_targets.keeps_its_folder(template, filled)


@pytest.mark.parametrize("filled", ["/run/..", "/run/.", "/run//s", "/run/../s"])
def test_a_field_is_a_whole_part_of_a_path_and_no_step_up(filled):
    with pytest.raises(Malformed):
        sniroute_targets.check_unix(filled)


def test_a_name_of_one_label_has_no_domain_to_make_a_path_of():
    route = parse_route("db=unix:/run/{label}.sock")._replace(target="unix:/run/{domain}/s")
    with pytest.raises(Malformed):
        Routes([route]).decide("db")


# -- unix: -------------------------------------------------------------------------------------


@pytest.fixture
def folder(free_ports) -> Iterator[pathlib.Path]:
    """A folder whose path is short: a unix socket's may have 100 characters."""
    path = pathlib.Path(f"/tmp/sniroute-test-{free_ports(1)[0]}")
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


class UnixEcho:
    """An echo on a unix socket, in a thread."""

    def __init__(self, path: pathlib.Path, backlog: int = 16, accepting: bool = True):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(backlog)
        self.threads = [threading.Thread(target=self.accept)]
        if accepting:
            self.threads[0].start()

    def begin(self) -> None:
        self.threads[0].start()

    def accept(self) -> None:
        try:
            while True:
                sock, _ = self.listener.accept()
                thread = threading.Thread(target=self.echo, args=(sock,))
                self.threads.append(thread)
                thread.start()
        except OSError:
            pass

    @staticmethod
    def echo(sock: socket.socket) -> None:
        with sock:
            while data := sock.recv(1 << 16):
                sock.sendall(data)

    def __enter__(self) -> UnixEcho:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            if thread.ident is not None:
                thread.join()


def test_a_client_reaches_a_unix_socket_with_its_name_in_the_path(run, folder, flow):
    running = run(f"--route=*.example.com=unix:{folder}/{{label}}.sock")
    with UnixEcho(folder / "db.sock"):
        with running.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
            blob = os.urandom(1 << 20)
            thread = threading.Thread(target=client.sendall, args=(blob,))
            thread.start()
            assert read_exactly(client, len(blob)) == blob
            thread.join()
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b"", "the half-close came back"
    ending = running.ending()
    assert (ending.reason, ending.backend) == ("client_closed", f"unix:{folder}/db.sock")


@pytest.mark.parametrize("there", [False, True], ids=["no socket", "nobody listens"])
def test_a_unix_socket_that_nobody_serves_is_refused_with_the_reason(run, folder, there):
    running = run(f"--route=*.example.com=unix:{folder}/{{label}}.sock")
    if there:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(folder / "db.sock"))
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    ending = running.ending()
    assert ending.reason == "backend"
    assert ("Connection refused" if there else "No such file or directory") in ending.detail


@linux
def test_a_full_backlog_is_waited_for_and_nobody_is_refused(run, folder):
    """unix(7) fails at once where TCP would try on."""
    running = run(f"--route=*.example.com=unix:{folder}/{{label}}.sock")
    with UnixEcho(folder / "db.sock", backlog=0, accepting=False) as far:
        clients = [running.connect(HELLO) for _ in range(20)]
        wait_until(lambda: len(running.router.deadlines.backlog.due) >= 18)
        clients.pop().close()
        assert running.ending().reason == "client_left", "who waits may leave"
        far.begin()
        for client in clients:
            with client:
                assert read_exactly(client, len(HELLO)) == HELLO
    assert {ending.reason for ending in running.endings} <= {"client_left", "client_closed"}


@linux
def test_a_backlog_that_stays_full_is_refused_in_the_end(run, folder, monkeypatch):
    monkeypatch.setattr(sniroute_targets, "BACKLOG_PATIENCE", 0.1)
    running = run(f"--route=*.example.com=unix:{folder}/{{label}}.sock")
    with UnixEcho(folder / "db.sock", backlog=0, accepting=False), running.connect(HELLO) as first:
        with running.connect(HELLO) as second:
            assert read_all(second) == alert(80)
        ending = running.ending()
        assert ending.reason == "backend" and "its backlog was full for 0.1 s" in ending.detail
        first.close()


@pytest.mark.parametrize("link", ["", "symlink", "hard link"])
def test_a_name_never_leads_to_the_routers_own_socket(run, folder, link):
    admin = folder / "admin.sock"
    running = run(f"--route=*.example.com=unix:{folder}/{{label}}.sock", f"--admin=unix:{admin}")
    with UnixEcho(admin):
        name = "admin"
        if link:
            name = "other"
            (os.symlink if link == "symlink" else os.link)(admin, folder / "other.sock")
        with running.connect(genuine(name=f"{name}.example.com")) as client:
            assert read_all(client) == alert(112)
        assert running.ending().reason == "forbidden"
        assert "is this router's own" in running.ending().detail


def test_a_route_to_the_routers_own_socket_stops_the_start(folder):
    with pytest.raises(SettingsError, match="leads back to --admin"):
        sniroute_settings.load_settings([f"--admin=unix:{folder}/a.sock", f"--route=a.b=unix:{folder}/a.sock"], {})


def test_a_symlink_in_the_folder_is_followed(run, folder):
    """Whoever may write in the folder decides where its names lead."""
    running = run(f"--route=*.example.com=unix:{folder}/{{label}}.sock")
    with UnixEcho(folder / "real"):
        os.symlink(folder / "real", folder / "db.sock")
        with running.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO


# -- exec: -------------------------------------------------------------------------------------

ECHO = """
import os
while data := os.read(0, 65536):
    while data:
        data = data[os.write(1, data):]
"""


def test_each_connection_has_a_process_whose_stdin_and_stdout_it_is(run, tmp_path, flow):
    running = run(f"--route=*.example.com=exec:{script(tmp_path, ECHO)}")
    blob = os.urandom(1 << 20)
    with running.connect(HELLO) as one, running.connect(HELLO) as two:
        for client in (one, two):
            assert read_exactly(client, len(HELLO)) == HELLO
        assert len(running.tunnels.processes.running) == 2
        thread = threading.Thread(target=one.sendall, args=(blob,))
        thread.start()
        assert read_exactly(one, len(blob)) == blob
        thread.join()
        two.shutdown(socket.SHUT_WR)
        assert two.recv(1) == b"", "the end of the client was the end of stdin"
    assert {running.ending(2).reason, running.ending(1).reason} == {"client_closed"}
    wait_until(lambda: not running.tunnels.processes.running)
    wait_until(lambda: not running.tunnels.guest.live and not running.tunnels.guest.by_child)  # told a moment later
    tally = running.router.routes.tallies["*.example.com"]
    assert (tally.total, tally.refused, tally.active) == (2, 0, 0)


def hear_out(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have clients of a program that has ended wait until the reaper has told how, instead of for 50 ms."""
    words, exited = running.router.deadlines.words, sniroute_commands.Runs.exited
    words.seconds = 60.0

    def expire() -> None:
        for connection in words.due:
            words.due[connection] = running.router.loop.next_check = 0.0

    def tell(*ended: Any) -> None:
        exited(*ended)
        running.router.call(expire)

    monkeypatch.setattr(sniroute_commands.Runs, "exited", tell)


def test_a_program_that_ends_without_a_byte_is_a_refusal_with_its_words(run, tmp_path, monkeypatch):
    program = script(tmp_path, "import sys\nprint('first', file=sys.stderr)\nsys.exit('no such \\x1b[31mbastion')")
    running = run(f"--route=*.example.com=exec:{program} {{label}}")
    hear_out(running, monkeypatch)
    for _ in range(3):
        with running.connect(HELLO) as client:
            assert read_all(client) == alert(80)
    ending = running.ending(3)
    assert ending.reason == "command_failed"
    assert ending.detail == f"{ending.backend}: it ended (exit 1): no such ?[31mbastion"
    assert running.counter("command_failed") == 3 and running.counter("retries") == 0, "it may have acted on the bytes"


def test_a_program_that_says_much_on_stderr_is_drained_and_bounded(run, tmp_path):
    program = script(tmp_path, "import sys\nsys.stderr.write('x' * 3000000 + '\\nlast words\\n')\n" + ECHO)
    running = run(f"--route=*.example.com=exec:{program}")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        (process,) = running.tunnels.processes.running
        wait_until(lambda: process.tail.endswith(b"last words\n"))
        assert len(process.tail) <= 4096


@pytest.mark.parametrize("words, sentence", [
    ("no-such-program-here x", "it did not start: no-such-program-here is not there: install it"),
    ("/nonexistent/program", "it did not start: /nonexistent/program is not there: install it"),
])
def test_a_program_that_is_not_there_is_a_refusal_that_says_so(run, words, sentence):
    running = run(f"--route=*.example.com=exec:{words}")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "command_failed" and running.ending().detail.endswith(sentence)
    wait_until(lambda: not running.tunnels.guest.live)


def test_a_program_that_another_user_may_change_is_not_run(run, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\ncat\n")
    program.chmod(0o777)
    running = run(f"--route=*.example.com=exec:{program}")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert "is not run, since" in running.ending().detail


def test_a_program_that_is_silent_is_refused_in_time(run, tmp_path):
    program = script(tmp_path, "import sys, time\nprint('dialling', file=sys.stderr)\ntime.sleep(100)")
    running = run(f"--route=*.example.com=exec:{program}")
    first_byte, processes = running.router.deadlines.first_byte, running.tunnels.processes
    first_byte.seconds = 60.0

    def expire() -> None:
        for connection in first_byte.due:
            first_byte.due[connection] = running.router.loop.next_check = 0.0

    with running.connect(HELLO) as client:
        wait_until(lambda: [each for each in list(processes.running) if each.tail == b"dialling\n"], what="its word")
        running.router.call(expire)
        assert read_all(client) == alert(80)
    assert running.ending().detail.endswith("no answer within 20 s: dialling")
    wait_until(lambda: not running.tunnels.processes.running)


@pytest.mark.parametrize("end, reason, whole", [
    ("sys.exit(0)", "backend_closed", True),
    ("os.close(0); os.close(1); time.sleep(0.2)", "backend_closed", True),
    ("sys.exit(3)", "backend_reset", False),
    ("os.kill(os.getpid(), 9)", "backend_reset", False),
])
def test_a_stream_whose_program_died_does_not_look_whole(run, tmp_path, flow, end, reason, whole):
    program = script(tmp_path, f"import os, sys, time\ndata = os.read(0, 65536)\nos.write(1, data + b'end')\n{end}")
    running = run(f"--route=*.example.com=exec:{program}")
    for number in range(1, 4):
        with running.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO) + 3) == HELLO + b"end"
            if whole:
                assert client.recv(1) == b""
            else:
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
        assert running.ending(number).reason == reason


@pytest.mark.parametrize("end, looks, reason", [
    ("sys.exit(0)", 5, "backend_closed"),
    ("sys.exit(3)", 5, "backend_reset"),
    ("os.kill(os.getpid(), 9)", 5, "backend_reset"),
    ("sys.exit(0)", 1000, "backend_reset"),  # how it ended is never found out
])
def test_a_process_that_is_long_in_exiting_is_waited_for(run, tmp_path, flow, monkeypatch, end, looks, reason):
    """A busy kernel closes its descriptors, and has its exit code some time later."""
    monkeypatch.setattr(sniroute_commands, "EXIT_LOOKS", 10)
    left, code = [looks], sniroute_commands.Run.code

    def late(exec_run: Any) -> int | None:
        found = code(exec_run)
        left[0] -= found is not None
        return None if left[0] >= 0 else found

    monkeypatch.setattr(sniroute_commands.Run, "code", late)
    monkeypatch.setattr(sniroute_commands.Run, "is_exiting", lambda exec_run: code(exec_run) is not None)
    program = script(tmp_path, f"import os, sys\ndata = os.read(0, 65536)\nos.write(1, data + b'end')\n{end}")
    running = run(f"--route=*.example.com=exec:{program}")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO) + 3) == HELLO + b"end"
        if reason == "backend_closed":
            assert client.recv(1) == b""
        else:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    assert running.ending().reason == reason


def test_an_end_between_two_questions_about_a_process_is_not_missed(run, tmp_path, flow, monkeypatch):
    """It ends, and the reaper notes how, when it has just been asked for its exit code."""
    is_exiting, asked = sniroute_commands.Run.is_exiting, []

    def late(exec_run: Any) -> bool:
        asked.append(exec_run)
        if len(asked) == 2:
            os.kill(exec_run.child.process.pid, signal.SIGTERM)
            wait_until(lambda: exec_run.exit is not None)
        return is_exiting(exec_run)

    monkeypatch.setattr(sniroute_commands.Run, "is_exiting", late)
    program = script(tmp_path, "import os, signal\ndata = os.read(0, 65536)\nos.write(1, data + b'end')\n"
                               "os.close(0)\nos.close(1)\nsignal.pause()")
    running = run(f"--route=*.example.com=exec:{program}")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO) + 3) == HELLO + b"end"
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert running.ending().reason == "backend_reset"


@pytest.mark.parametrize("code", [0, 3])
def test_a_client_that_still_speaks_when_its_program_ends_is_reset_at_once(run, tmp_path, flow, code):
    program = script(tmp_path, f"import os\nos.write(1, os.read(0, 65536))\nos.read(0, 1)\nos._exit({code})")
    running = run(f"--route=*.example.com=exec:{program}")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        with pytest.raises(OSError):
            while True:
                client.sendall(b"x" * 65536)
    assert running.ending().reason == "backend_reset" and running.ending().seconds < 5
    wait_until(lambda: not running.tunnels.guest.live)


def test_psql_is_refused_when_the_program_ends_before_it_says_yes(run, tmp_path, monkeypatch):
    """PostgreSQL's question for TLS goes to the program first."""
    text = "import os, sys\nassert os.read(0, 100) == bytes((0, 0, 0, 8, 4, 210, 22, 47))\nsys.exit('no route')"
    program = script(tmp_path, text)
    running = run(f"--route=*.example.com=exec:{program}")
    hear_out(running, monkeypatch)
    with running.connect(SSL_REQUEST_BYTES) as client:
        assert client.recv(1) == b"S"
        client.sendall(HELLO)
        assert read_all(client) == alert(80)
    assert running.ending().reason == "command_failed" and running.ending().detail.endswith("(exit 1): no route")


CHILD = """
import os, signal, subprocess, sys
NULL = subprocess.DEVNULL
child = subprocess.Popen(["sleep", "1000"], stdin=NULL, stdout=NULL, stderr=NULL)
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[1] == "stubborn" else signal.SIG_DFL)
os.read(0, 65536)
os.write(1, b"%d %d\\n" % (os.getpid(), child.pid))
while True:
    signal.pause()
"""


@pytest.mark.parametrize("manners", ["polite", "stubborn"])
@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
def test_a_program_and_all_that_it_started_end_with_the_connection(run, tmp_path, manners, leave, monkeypatch):
    monkeypatch.setattr("sniroute_processes.STOP_GRACE", 0.15)
    monkeypatch.setattr("sniroute_router.HALF_CLOSED_IDLE", 1.0)  # and it may take longer than that to begin
    running = run(f"--route=*.example.com=exec:{script(tmp_path, CHILD)} {manners}")
    client = running.connect(HELLO)
    said = b""
    while not said.endswith(b"\n"):
        said += client.recv(100)
    pids = [int(word) for word in said.split()]
    assert all(map(runs, pids))
    leave(client)
    wait_until(lambda: not any(map(runs, pids)))
    wait_until(lambda: not running.tunnels.processes.running)


def test_a_router_that_is_stopped_leaves_no_program(launch, tmp_path):
    program = launch(f"--route=*.example.com=exec:{script(tmp_path, CHILD)} polite", "--drain=100ms")
    with program.connect(HELLO) as client:
        said = b""
        while not said.endswith(b"\n"):
            said += client.recv(100)
        program.stop()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    wait_until(lambda: not any(runs(int(word)) for word in said.split()))  # both were told, and the one waited for


def test_a_client_that_leaves_early_leaves_no_process(run, tmp_path):
    running = run(f"--route=*.example.com=exec:{script(tmp_path, 'import time; time.sleep(100)')}")
    for _ in range(10):
        running.connect(HELLO).close()
    running.ending(10)
    wait_until(lambda: not running.tunnels.guest.live and not running.tunnels.processes.running)
    assert {ending.reason for ending in running.endings} == {"client_left"}


def test_as_many_programs_run_at_once_as_there_may_be_tunnels(run, tmp_path):
    running = run(f"--route=*.example.com=exec:{script(tmp_path, ECHO)}", "--max-tunnels=2")
    with running.connect(HELLO) as one, running.connect(HELLO) as two:
        for client in (one, two):
            assert read_exactly(client, len(HELLO)) == HELLO
        with running.connect(HELLO) as third:
            assert read_all(third) == alert(80)
        assert running.ending().reason == "busy" and "raise --max-tunnels" in running.ending().detail
    wait_until(lambda: not running.tunnels.guest.live)
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO


ENVIRONMENT = """
import os
data = os.read(0, 65536)
os.write(1, repr(sorted(os.environ.items())).encode())
"""


def test_a_program_gets_its_routes_variables_and_none_of_the_routers(
        run, tmp_path, settings_file, monkeypatch, caplog):
    monkeypatch.setenv("SNIROUTE_ADMIN_TOKEN", "a-secret-of-the-router")
    monkeypatch.setenv("TUNNEL_SERVICE_TOKEN_SECRET", "another")
    monkeypatch.setenv("TUNNEL_SERVICE_TOKEN_ID", "asked for")
    monkeypatch.setenv("BASTION_TOKEN", "top-secret")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    file = settings_file(f"""[routes."db.example.com"]
target = {toml('exec:' + script(tmp_path, ENVIRONMENT))}
env = {{ MODE = "quiet", DEPTH = 3, LANG = "C" }}
env_from = ["BASTION_TOKEN", "NOT_SET", "TUNNEL_SERVICE_TOKEN_ID"]
""")
    running = run("-c", file)
    with running.connect(HELLO) as client:
        found = dict(eval(read_all(client)))
    home = found.pop("HOME")
    assert found.pop("LC_CTYPE", None) in (None, "C.UTF-8")  # Python's own doing
    assert home.startswith(("/tmp/", "/run/")) and "sniroute-" in home
    found.pop("PWD", None), found.pop("_", None), found.pop("SHLVL", None), found.pop("OLDPWD", None)  # a shell's
    assert found == {"MODE": "quiet", "DEPTH": "3", "LANG": "C", "BASTION_TOKEN": "top-secret", "TZ": "UTC",
                     "TUNNEL_SERVICE_TOKEN_ID": "asked for"}
    assert "top-secret" not in caplog.text + str(running.ending()) and "quiet" not in caplog.text


@pytest.mark.parametrize("options, fault", [
    ('env = "A=1"', "env: is no table of variables"),
    ('env = { "A-B" = "1" }', "env: A-B: is no variable"),
    ('env = { A = "hidden\\u0000" }', "env: A: is no variable"),
    ('env_from = ["A B"]', "env_from: 'A B' is not the name of a variable"),
    ('idle = "1m"', "idle: is for tunnels"),
])
def test_wrong_options_of_a_program_are_told_with_their_key_and_no_value(settings_file, options, fault):
    file = settings_file(f'[routes."a.example.com"]\ntarget = "exec:cat"\n{options}\n')
    with pytest.raises(SettingsError) as found:
        sniroute_settings.load_settings(["-c", file], {})
    (line,) = found.value.lines
    assert f'routes."a.example.com".{fault}' in line and "hidden" not in line


def test_env_is_for_programs_alone(settings_file):
    file = settings_file('[routes]\n"a.b" = { target = "tcp:192.0.2.1:1", env = { A = "1" }, env_from = ["B"] }\n')
    with pytest.raises(SettingsError) as found:
        sniroute_settings.load_settings(["-c", file], {})
    assert [line.partition(".env")[2] for line in found.value.lines] == [
        ": is for exec: and command:", "_from: is for exec: and command:"]


@linux
def test_a_program_has_no_descriptor_of_the_routers(run, echo_server):
    """No client's, no listener's, no other program's."""
    running = run("--route=*.example.com=exec:/bin/ls /proc/self/fd", f"--route=other.test=tcp:{HOST}:{echo_server.address[1]}")
    with running.connect(genuine(name="other.test")) as other:
        assert other.recv(1)
        with running.connect(HELLO) as client:
            assert read_all(client).split() == [b"0", b"1", b"2", b"3"], "3 is the folder that ls reads"


# -- command: ----------------------------------------------------------------------------------

LISTENER = """
import os, socket, sys, threading
host, _, port = sys.argv[1].rpartition(":")
listener = socket.create_server((host, int(port)))
print("listening for", sys.argv[2:], file=sys.stderr)
def serve(sock):
    with sock:
        while data := sock.recv(65536):
            if b"die" in data:
                print("told to die", file=sys.stderr)
                os._exit(4)
            if b"mode" in data:
                data = os.environ.get("MODE", "none").encode()
            sock.sendall(data)
while True:
    sock, _ = listener.accept()
    threading.Thread(target=serve, args=(sock,), daemon=True).start()
"""


@pytest.mark.parametrize("words", ["{address}", "127.0.0.1:{port}"])
def test_a_command_runs_once_for_all_its_clients_and_stops_when_idle(run, tmp_path, ports, words):
    running = run(f"--route=*.example.com=command:{script(tmp_path, LISTENER)} {words} {{label}}", ports,
                  "--idle=1s")
    with running.connect(HELLO) as one, running.connect(HELLO) as two:
        with running.connect(genuine(name="other.example.com")) as other:
            for client in (one, two, other):
                assert client.recv(1)
            assert len(running.tunnels.processes.running) == 2
            (key, _) = sorted(map(str, running.tunnels.tunnels))
            assert key.startswith("command:") and key.endswith(" db")
    wait_until(lambda: not running.tunnels.processes.running)
    assert running.tunnels.counters["idle_stops"] == 2


def test_a_command_that_dies_is_started_again_and_its_last_words_are_kept(run, tmp_path, ports, caplog):
    running = run(f"--route=*.example.com=command:{script(tmp_path, LISTENER)} {{address}}", ports)
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        client.sendall(b"die")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    wait_until(lambda: "told to die" in caplog.text)
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    assert running.tunnels.counters["starts"] == 2


def test_a_command_that_does_not_start_is_refused_with_its_words(run, tmp_path, ports):
    program = script(tmp_path, "import sys; sys.exit('Permission denied (publickey).')")
    running = run(f"--route=*.example.com=command:{program} {{address}}", ports)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    ending = running.ending()
    assert ending.reason == "tunnel_failed" and ending.detail.endswith("(exit 1): Permission denied (publickey).")


def test_a_command_whose_port_was_taken_is_tried_on_another(run, tmp_path, ports):
    program = script(tmp_path, """
import os, sys
mark = sys.argv[0] + ".once"
if not os.path.exists(mark):
    open(mark, "w").close()
    sys.exit("bind [127.0.0.1]: Address already in use")
""" + LISTENER)
    running = run(f"--route=*.example.com=command:{program} {{address}}", ports)
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO


def test_two_routes_with_other_variables_have_processes_of_their_own(run, tmp_path, ports, settings_file):
    target = toml(f"command:{script(tmp_path, LISTENER)} {{address}}")
    file = settings_file(f"""[routes]
"a.example.com" = {{ target = {target}, env = {{ MODE = "hush-1" }} }}
"b.example.com" = {{ target = {target}, env = {{ MODE = "hush-2" }} }}
"c.example.com" = {target}
"d.example.com" = {target}
""")
    running = run("-c", file, ports)
    for name, said in (("a", b"hush-1"), ("b", b"hush-2"), ("c", b"none"), ("d", b"none")):
        hello = genuine(name=f"{name}.example.com")
        with running.connect(hello) as client:
            assert read_exactly(client, len(hello)) == hello
            client.sendall(b"mode")
            assert client.recv(10) == said
    keys = sorted(map(str, running.tunnels.tunnels))
    assert len(keys) == len(set(keys)) == 3 and sum(key.endswith("]") for key in keys) == 2
    assert not any("hush" in key for key in keys)


@pytest.mark.parametrize("kind", ["exec", "command"])
def test_a_field_stands_in_the_value_of_a_variable_too(run, tmp_path, ports, settings_file, kind):
    """What else stands in braces stays as it is."""
    program = script(tmp_path, LISTENER) if kind == "command" else "/bin/sh"
    target = f"command:{program} {{address}}" if kind == "command" else "exec:/bin/sh -c 'head -c 517; echo $MODE; cat'"
    file = settings_file(f"""[routes]
"{{who}}.example.com" = {{ target = {toml(target)}, env = {{ MODE = '{{who}}-{{"a":{{b}}}}' }} }}
""")
    running = run("-c", file, ports)
    for who in ("one", "two"):
        hello = genuine(name=f"{who}.example.com")
        with running.connect(hello) as client:
            assert read_exactly(client, len(hello)) == hello
            if kind == "command":
                client.sendall(b"mode")
            assert client.recv(30).strip() == b'%s-{"a":{b}}' % who.encode()


def test_a_command_is_never_given_the_access_token(monkeypatch):
    monkeypatch.setenv("TUNNEL_SERVICE_TOKEN_ID", "id")
    monkeypatch.setenv("CF_ACCESS_TOKEN", "token")
    routes = Routes([parse_route("*=command:prog {address} {name}")], identified=True)
    key = routes.decide("a.example.com").tunnel
    assert str(key) == "command:prog {address} a.example.com", "there is nothing to be anonymous about"
    row = sniroute_commands.COMMAND.row(key)
    assert row.program == "prog" and not {"TUNNEL_SERVICE_TOKEN_ID", "CF_ACCESS_TOKEN"} & row.environment.keys()


def test_the_key_of_a_command_shows_no_value():
    secret, own = Variable("KEY", "hush"), Variable("OWN")
    key = TunnelKey("command", "prog {address}", variables=(secret, own))
    assert "hush" not in f"{key} {key!r} {secret} {secret!r}"
    assert str(key) != str(key._replace(variables=(own,))) != str(key._replace(variables=()))


def test_the_key_of_a_long_command_is_bounded_and_its_own():
    """It is a name for people: in the log, on the page, and in an order to stop it."""
    long = "prog {address} " + "x" * 900
    shown = {str(TunnelKey("command", long + end)) for end in "ab"}
    assert len(shown) == 2 and all(len(key) <= 253 for key in shown)


def test_a_program_may_speak_first_behind_a_listener_with_one_target(run, tmp_path):
    program = script(tmp_path, "import os\nos.write(1, b'220 hello')\n" + ECHO)
    running = run(f"--route=x.example.com=exec:{program}")
    (listener,) = running.router.listeners
    listener.decision = running.router.routes.decide("x.example.com")
    with running.connect() as client:
        assert read_exactly(client, 9) == b"220 hello"
        client.sendall(b"EHLO")
        assert read_exactly(client, 4) == b"EHLO"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""


def test_a_reload_adds_programs_and_cuts_nobody(launch, settings_file, echo_server, tmp_path, ports):
    first = "[routes]\n" + f'"db.example.com" = "tcp:{HOST}:{echo_server.address[1]}"\n'
    program = launch("-c", settings_file(first), ports)
    with program.connect(HELLO) as kept:
        assert read_exactly(kept, len(HELLO)) == HELLO
        settings_file(first + f'"a.example.com" = {toml("exec:" + script(tmp_path, ECHO))}\n'
                      f'"b.example.com" = {toml("command:" + script(tmp_path, LISTENER, "l.py") + " {address}")}\n')
        program.signal(signal.SIGHUP)
        program.wait_for("reload: done, routes: 3")
        for name in ("a", "b"):
            hello = genuine(name=f"{name}.example.com")
            with program.connect(hello) as client:
                assert read_exactly(client, len(hello)) == hello
        kept.sendall(b"still")
        assert read_exactly(kept, 5) == b"still"


# -- what people are told ----------------------------------------------------------------------


@pytest.mark.parametrize("target", ["unix:/tmp/x.sock", "exec:cat", f"command:{PYTHON} {{address}}"])
@pytest.mark.parametrize("listen, allow, warned", [
    ("0.0.0.0:1", "", True), (":1", "", True), ("192.0.2.1:1", "", True), ("127.0.0.1:1", "", False),
    ("[::1]:1", "", False), ("localhost:1", "", False), (":1", 'allow = "192.0.2.0/24"', False),
])
def test_a_way_into_this_host_that_is_open_to_all_warns_at_the_start(
        settings_file, caplog, target, listen, allow, warned):
    file = settings_file(f'listen = {toml(listen)}\n[routes."a.example.com"]\ntarget = {toml(target)}\n{allow}\n')
    sniroute_settings.warn(sniroute_settings.load_settings(["-c", file], {}))
    assert ("name its clients in `allow`" in caplog.text) is warned


def test_check_and_explain_show_programs_and_no_value_of_a_variable(settings_file, tmp_path):
    file = settings_file(f"""listen = "127.0.0.1:0"
[routes."a.example.com"]
target = "exec:no-such-program -W {{label}}:22"
env = {{ KEY = "hush" }}
env_from = ["NOT_SET_HERE"]
[routes."b.example.com"]
target = "command:{PYTHON} {{address}} {{label}}"
[routes]
"c.example.com" = "unix:/tmp/{{label}}.sock"
""".replace('[routes]\n"c.example.com" =', '[routes."c.example.com"]\ntarget ='))
    checked = command("check", "-c", file)
    assert checked.returncode == 0 and "hush" not in checked.stdout + checked.stderr
    assert ("a.example.com=exec:no-such-program -W {label}:22 (env KEY; env_from NOT_SET_HERE)\n"
            f"b.example.com=command:{PYTHON} {{address}} {{label}}\nc.example.com=unix:/tmp/{{label}}.sock\n"
            ) == checked.stdout
    assert "no-such-program is not there: install it; names that need it are refused until then" in checked.stderr
    assert "NOT_SET_HERE of env_from is not set" in checked.stderr
    explained = command("explain", "a.example.com", "-c", file)
    assert explained.returncode == 1 and "target:  exec:no-such-program -W a:22\n" in explained.stdout
    assert "refused: no-such-program is not there: install it (command_failed" in explained.stdout
    explained = command("explain", "b.example.com", "-c", file)
    assert explained.returncode == 0 and f"runs:    {PYTHON} 127.0.0.1:20000 b\n" in explained.stdout
    assert command("explain", "c.example.com", "-c", file).stdout.endswith("target:  unix:/tmp/c.sock\n")


def test_a_missing_file_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr("sniroute_routes.is_here", lambda room: False)
    for scheme in ("exec", "command"):
        monkeypatch.delitem(sniroute_targets.SCHEMES, scheme, raising=False)
        with pytest.raises(SettingsError, match="sniroute_commands.py, which is not beside sniroute.py: copy it there"):
            sniroute_settings.load_settings([f"--route=a.b={scheme}:cat {{address}}"], {})
