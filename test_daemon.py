"""Tests of sniroute_daemon.py with the real program (`launch` of testbed/program.py).

Signals, a reload, a log that nobody takes, and the admin's address.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from typing import Any, Callable, Iterator

import pytest

import sniroute_daemon
import sniroute_doctor
import sniroute_registrar
from sniroute_host import stamp
from sniroute_owners import Rules, Where
from sniroute_refusals import SettingsError
from sniroute_settings import load_settings
from conftest import HERE, HOST, linux, exit_code, wait_until
from testbed.admin import TOKEN, Reply, tell
from testbed.hellos import HELLO, genuine
from testbed.program import (BARE, BARE_PYTHON, STOP_GRACE, Program, activated, changed, command, counter, environment,
                             execute, is_pending)
from testbed.running import TUNNEL, alert, answer, read_all, read_exactly, route


# -- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number, whole_group", [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)],
                         ids=["TERM", "INT", "Ctrl-C, which a terminal sends to the whole group"])
def test_first_signal_lets_connections_end_and_stops_the_tunnels_last(launch, cloudflared, ports, echo_server, number,
                                                                      whole_group):
    cloudflared.far("*", echo_server.address)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}",
                     **({"start_new_session": True} if whole_group else {}))
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        os.killpg(program.pid, number) if whole_group else program.signal(number)
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


def served(program: Program) -> bool:
    """Whether a new client is served."""
    with program.connect(HELLO) as client:
        return read_exactly(client, len(HELLO)) == HELLO


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_lame_duck_serves_new_clients_for_its_time_and_then_drains(launch, echo_server, admin_path, number):
    program = launch(route(echo_server.address), "--lameduck=1200ms", f"--admin=unix:{admin_path}")
    program.wait_for(" info admin on ")
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        began = time.monotonic()
        program.signal(number)
        program.wait_for(" info lameduck: new clients are served for 1.2 s yet, while /readyz says 503\n")
        assert " draining: " not in program.log() and served(program)
        program.wait_for(" info draining: 1 connections have 30 s to end\n")
        assert time.monotonic() - began >= 1.2
        with pytest.raises(ConnectionRefusedError):
            program.connect()
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
    assert program.wait() == 0


@pytest.mark.parametrize("reload", ["SIGHUP", "POST"])
def test_a_lame_duck_is_not_ready_from_the_first_and_a_reload_changes_its_time(launch, echo_server, settings_file,
                                                                               admin_path, reload):
    def text(seconds: int) -> str:
        return f'lameduck = "{seconds}s"\n[routes]\n"*.example.com" = "tcp:{HOST}:{echo_server.address[1]}"\n'

    def asked(words: str) -> Reply:
        return tell(admin_path, f"{words} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n")

    program = launch("-c", settings_file(text(60)), f"--admin=unix:{admin_path}",
                     env=environment(SNIROUTE_ADMIN_TOKEN=TOKEN))
    program.wait_for(" info admin on ")
    assert asked("GET /readyz").status == 200
    program.signal(signal.SIGTERM)
    program.wait_for(" info lameduck: ")
    ready = asked("GET /readyz")
    assert (ready.status, ready.body, asked("GET /healthz").status) == (503, b"lameduck\n", 200)
    assert asked("GET /status").json["phase"] == "lameduck" and served(program)
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        for count, seconds in enumerate((50, 0), 1):
            settings_file(text(seconds))
            if reload == "SIGHUP":
                program.signal(signal.SIGHUP)
            else:
                assert asked("POST /reload").status == 200
            program.wait_for("reload: done", count)
            assert not seconds or served(program)
        program.wait_for(" info draining: 1 connections ")
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
    assert program.wait() == 0


def test_a_second_signal_ends_a_lame_duck_at_once(launch, echo_server):
    program = launch(route(echo_server.address), "--lameduck=8784h")
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        program.signal(signal.SIGTERM)
        program.wait_for(" info lameduck: ")
        program.signal(signal.SIGINT)
        assert read_all(client) == b""
        assert program.wait() == 0
    assert " draining: " not in program.log()


def test_a_lame_duck_keeps_its_tunnels(launch, cloudflared, ports, serve):
    """A tunnel that nobody uses just then is stopped by the drain only: the next client needs it."""
    cloudflared.far("*", serve(answer(b"x")).address)
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}", "--lameduck=60s")
    for count in range(1, 3):
        with program.connect(HELLO) as client:
            assert client.recv(1) == b"x"
        program.wait_for("reason=client_closed", count)
        if count == 1:
            program.signal(signal.SIGTERM)
            program.wait_for(" info lameduck: ")
    assert len(cloudflared.starts()) == 1
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


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


@pytest.fixture
def at_its_start(launch, tmp_path) -> Iterator[Callable[..., tuple[Program, Callable[[str], None]]]]:
    """at_its_start(*options) -> (a program that reads its settings for now, what hands them to it)."""
    path = tmp_path / "settings"
    os.mkfifo(path)

    def start(*options: str, **more: Any) -> tuple[Program, Callable[[str], None]]:
        program = launch("-c", str(path), *options, listeners=0, **more)
        writer = os.open(path, os.O_WRONLY)  # returns once it has opened the file: it has no handlers yet

        def go_on(text: str) -> None:
            os.write(writer, text.encode())
            os.close(writer)

        return program, go_on

    yield start


def test_a_signal_that_comes_while_the_router_starts_waits_and_does_not_end_it(at_its_start, echo_server):
    """`systemctl reload`, or a log rotation, right after the start."""
    program, go_on = at_its_start()
    program.signal(signal.SIGHUP)
    program.signal(signal.SIGUSR1)
    go_on(f'[routes]\n"db.example.com" = "tcp:{HOST}:{echo_server.address[1]}"\n')
    program.wait_for(" info counters: ")
    program.wait_for(" error reload: nothing has changed\n")
    assert "is no regular file, and cannot be read again" in program.log()
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_that_comes_while_the_router_starts_ends_it_without_a_word(at_its_start, number):
    program, go_on = at_its_start()
    program.code = -number
    program.signal(number)
    assert program.wait() == -number and program.log() == ""
    go_on("")


@linux
@pytest.mark.skipif(os.getuid() != 0, reason="only root may make a namespace of processes")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs the Debian package util-linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_process_of_a_container_does_not_miss_its_end(at_its_start, number, echo_server):
    """The kernel drops what such a process leaves to the default."""
    program, go_on = at_its_start(python=("unshare", "--pid", "--fork", "--kill-child", sys.executable))
    (router,) = wait_until(lambda: children(program.pid))
    os.kill(router, number)
    go_on(f'[routes]\n"db.example.com" = "tcp:{HOST}:{echo_server.address[1]}"\n')
    assert program.wait() == 0 and program.log().endswith(" info stopped\n")


def children(pid: int) -> list[int]:
    """The processes that a process of one thread has started."""
    return list(map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@linux
def test_neither_the_router_nor_a_child_has_a_signal_blocked(launch, cloudflared, ports, serve):
    """Whatever the program that starts the router has blocked, and whatever the router itself had for its start."""
    cloudflared.far("*", serve(answer(b"x")).address)
    blocks = ("import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGHUP]); "
              "os.execv(sys.argv[1], sys.argv[1:])")
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}",
                     python=(sys.executable, "-c", blocks, sys.executable))
    with program.connect(HELLO) as client:
        assert client.recv(1) == b"x"
        ours = sum(1 << number - 1 for number in sniroute_daemon.SIGNALS)
        for pid in (program.pid, cloudflared.starts()[0]["pid"]):
            status = pathlib.Path(f"/proc/{pid}/status").read_text()
            assert not int(re.search(r"SigBlk:\s+(\w+)", status)[1], 16) & ours, pid


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


def test_every_beginning_of_a_file_is_taken_whole_or_not_at_all(launch, settings_file, echo_server):
    """As an editor may leave it, when its disk is full: the routes are those of one file, never of two."""
    names = ["a.example.com", "b.example.com", "c.example.com"]
    lines = [f'"{name}" = "tcp:{HOST}:{echo_server.address[1]}"\n' for name in names]
    path = settings_file("".join(["[routes]\n", *lines]))
    program, served = launch("-c", path), names

    def answers(name: str) -> bool:
        with program.connect(hello := genuine(name=name)) as client:
            return client.recv(len(hello)) == hello

    whole = "".join(["# a comment\n[routes]\n", *reversed(lines)])
    failed = taken = 0
    for end in sorted({*range(0, len(whole), 3), *(at.end() for at in re.finditer("\n", whole))}):
        path = settings_file(whole[:end])
        try:
            routes = load_settings(["-c", path], {}).routes.routes
            expected = [name for name in names if name in {route.pattern for route in routes}]
        except SettingsError:
            expected = []
        if not expected:  # without routes every name would be served: that is no reload
            expected = served
        program.signal(signal.SIGHUP)
        if expected is served:
            failed += 1
            program.wait_for(" error reload: nothing has changed\n", failed)
        else:
            taken += 1
            program.wait_for(" info reload: done, ", taken)
        served = expected
        assert [name for name in names if answers(name)] == served
    assert taken >= 3 and failed > 30


def test_a_reload_finds_a_file_whose_path_was_relative_and_whose_folder_comes_and_goes(launch, tmp_path, echo_server):
    """As are the other paths that the router was started with."""
    folder = tmp_path / "folder"
    folder.mkdir()
    program_file = folder / "tunnel"
    program_file.write_text("#!/bin/sh\n")
    program_file.chmod(0o755)
    text = f'[routes]\n"db.example.com" = "tcp:{HOST}:{echo_server.address[1]}"\n'
    (folder / "sniroute.toml").write_text(text)
    with tempfile.TemporaryDirectory(prefix="sniroute-admin-") as short:  # a path that a socket may have
        os.symlink(folder, f"{short}/f")
        program = launch("-c", "sniroute.toml", "--cloudflared=./tunnel", f"--admin=unix:{short}/admin", cwd=folder)
        program.signal(signal.SIGHUP)
        program.wait_for(" info reload: done, routes: 1\n")
        shutil.rmtree(folder)
        program.signal(signal.SIGHUP)
        program.wait_for(" error reload: nothing has changed\n")
        assert f" error reload: {folder}/sniroute.toml: No such file or directory\n" in program.log()
        folder.mkdir()  # another one of that name: the process is still in the one that has gone
        (folder / "sniroute.toml").write_text(text)
        program.signal(signal.SIGHUP)
        program.wait_for(" info reload: done, routes: 1\n", 2)
        with program.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
        program.stop()


def test_a_reload_after_a_mistake_in_the_file_does_not_also_miss_its_routes(launch, settings_file):
    path = settings_file(f'[routes]\n"db.example.com" = "tcp:{HOST}:1"\n')
    program = launch("-c", path)
    settings_file("[routes\n")
    program.signal(signal.SIGHUP)
    program.wait_for(" error reload: nothing has changed\n")
    assert program.log().count(" error reload: ") == 2 and "no routes any more" not in program.log()
    settings_file("")
    program.signal(signal.SIGHUP)
    program.wait_for(" error reload: there are no routes any more: every name would be served\n")


# -- watch -------------------------------------------------------------------------------------


def test_a_file_is_read_when_it_has_rested():
    watch = sniroute_daemon.Watch(1)
    assert not watch.is_due(1, 10.0)
    assert not watch.is_due(2, 10.0) and not watch.is_due(2, 10.4), "it may be half written"
    assert not watch.is_due(3, 10.4) and not watch.is_due(3, 10.8)
    assert watch.is_due(3, 10.9) and watch.is_due(3, 11.0), "until somebody reads it"
    watch.known = 3
    assert not watch.is_due(3, 20.0)


def test_a_file_that_was_changed_and_is_as_before_is_not_read():
    watch = sniroute_daemon.Watch(1)
    assert not watch.is_due(2, 10.0)
    assert not watch.is_due(1, 10.2) and not watch.is_due(1, 99.0)


def test_a_file_that_goes_for_a_moment_is_not_missed():
    """As editors do that write it anew."""
    watch = sniroute_daemon.Watch(1)
    assert not watch.is_due(2, 10.0)  # the errno of no such file
    assert not watch.is_due(3, 10.3) and not watch.is_due(3, 10.7) and watch.is_due(3, 10.8)


def config(port: int, *lines: str) -> str:
    """A file that is watched, with a route to a port of this host."""
    return "\n".join(("watch = true", *lines, "[routes]", f'"db.example.com" = "tcp:{HOST}:{port}"', ""))


# A file is looked at more often, and need not rest so long.
QUICK = changed("sniroute_daemon.WATCH_EVERY, sniroute_daemon.WATCH_RESTS = 0.05, 0.1")


def written_in_place(path: pathlib.Path, text: str) -> None:
    path.write_text(text)


def renamed(path: pathlib.Path, text: str) -> None:
    new = path.with_name(".new")
    new.write_text(text)
    os.replace(new, path)


def moved_away_first(path: pathlib.Path, text: str) -> None:
    path.rename(path.with_name("sniroute.toml~"))
    path.write_text(text)


def with_the_times_and_size_of_the_old(path: pathlib.Path, text: str) -> None:
    state = path.stat()
    path.write_text(text.ljust(state.st_size, "#")[:state.st_size])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("change", [written_in_place, renamed, moved_away_first, with_the_times_and_size_of_the_old],
                         ids=lambda change: change.__name__)
def test_a_file_that_is_watched_is_read_when_it_changes(launch, tmp_path, echo_server, serve, change):
    path = tmp_path / "sniroute.toml"
    path.write_text(config(echo_server.address[1], "#" * 20))
    program = launch("-c", str(path), python=QUICK)
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        change(path, config(serve(answer(b"new", len(HELLO))).address[1]))
        program.wait_for(" info reload: done, routes: 1\n")
        with program.connect(HELLO) as other:
            assert other.recv(3) == b"new"
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"


def test_a_config_map_that_is_watched_is_read_when_its_links_are_swapped(launch, tmp_path, echo_server, serve):
    """sniroute.toml -> ..data/sniroute.toml, and ..data -> a folder for each version: what Kubernetes swaps."""
    def version(name: str, text: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "sniroute.toml").write_text(text)
        os.symlink(name, tmp_path / "..new")
        os.replace(tmp_path / "..new", tmp_path / "..data")

    version("..1", config(echo_server.address[1]))
    os.symlink("..data/sniroute.toml", tmp_path / "sniroute.toml")
    program = launch("-c", str(tmp_path / "sniroute.toml"), python=QUICK)
    assert served(program)
    version("..2", config(serve(answer(b"new", len(HELLO))).address[1]))
    shutil.rmtree(tmp_path / "..1")
    program.wait_for(" info reload: done, routes: 1\n")
    with program.connect(HELLO) as client:
        assert client.recv(3) == b"new"


def test_a_watched_file_that_is_gone_empty_or_faulty_changes_nothing_and_says_so(launch, tmp_path, echo_server):
    path = tmp_path / "sniroute.toml"
    good = config(echo_server.address[1])
    path.write_text(good)
    program = launch("-c", str(path), python=QUICK)
    for number, (text, complaint) in enumerate((
            (None, f"{path}: No such file or directory"), ("", "there are no routes any more: every name would be served"),
            (config(1, "idle = 1"), f"{path}: idle: '1' is not a duration such as 300s, 5m, 1h30m or 500ms"),
            (good[:-3], f"{path}: ")), 1):
        path.unlink() if text is None else renamed(path, text)
        program.wait_for(" error reload: nothing has changed\n", number)
        assert f" error reload: {complaint}" in program.log() and served(program)
    renamed(path, good)
    program.wait_for(" info reload: done, routes: 1\n")


def stand_in(path: pathlib.Path) -> Any:
    """What Daemon.reload needs of a Daemon, with settings that are never right."""
    def again(running: Any) -> Any:
        raise SettingsError("a fault", "and another")

    return types.SimpleNamespace(
        reloading=threading.Lock(), supervisor=types.SimpleNamespace(tell=lambda *words: None, ready=lambda router: None),
        settings=types.SimpleNamespace(again=again, config=str(path)), watch=sniroute_daemon.Watch(0), faults=[],
        router=types.SimpleNamespace(reloads=collections.Counter(), last_reload=(True, 0.0)))


def test_the_faults_of_a_watched_file_are_told_once_until_they_are_others(tmp_path, caplog):
    daemon = stand_in(tmp_path / "sniroute.toml")
    told = ["reload: a fault", "reload: and another", "reload: nothing has changed"]
    for _ in range(3):
        sniroute_daemon.Daemon.reload(daemon, said=daemon.faults)
    assert caplog.messages == told
    sniroute_daemon.Daemon.reload(daemon)
    assert caplog.messages == told * 2, "who asks for it is told each time"
    daemon.faults = ["a fault"]
    sniroute_daemon.Daemon.reload(daemon, said=daemon.faults)
    assert caplog.messages == told * 3 and daemon.router.reloads == {"failed": 5}


def test_a_reload_by_hand_is_not_done_again(tmp_path):
    path = tmp_path / "sniroute.toml"
    path.write_text("idle = 1")
    daemon = stand_in(path)
    sniroute_daemon.Daemon.reload(daemon)
    found = stamp(str(path))
    assert not daemon.watch.is_due(found, 10.0) and not daemon.watch.is_due(found, 20.0)


def test_a_reload_while_the_registry_waits_for_its_store_is_not_lost(monkeypatch):
    """A successor's admin takes orders before that, and a predecessor's file is let go of later."""
    where = {name: Where((HOST, 1), "memory", 0.0, "", Rules((f"{name}.example.com",)), {}) for name in ("old", "new")}
    adopted: list[Where] = []
    registrar = types.SimpleNamespace(adopt=adopted.append, address=(HOST, 1), wait_for_store=lambda: None)
    routes = types.SimpleNamespace(routes=())
    settings = {name: types.SimpleNamespace(claims=claims, kept=(), log_level="info", config="x", routes=routes)
                for name, claims in where.items()}
    daemon = types.SimpleNamespace(
        settings=settings["old"], registrar=None, tunnels=types.SimpleNamespace(adopt=lambda settings: None),
        pipe=types.SimpleNamespace(wake=lambda what: None),
        router=types.SimpleNamespace(listeners=[], call=lambda act: act(), adopt=lambda settings, opened: None))
    monkeypatch.setattr(sniroute_daemon, "warn", lambda settings: None)

    def attach(router: Any, claims: Where) -> Any:
        assert claims is where["old"]
        sniroute_daemon.Daemon._adopt(daemon, settings["new"], {})  # in a thread of the admin
        return registrar

    monkeypatch.setattr(sniroute_registrar, "attach", attach)
    sniroute_daemon.Daemon._serve_registry(daemon, alone=False)
    assert daemon.registrar is registrar and adopted == [where["new"]]


def test_watch_begins_and_ends_with_a_reload(launch, tmp_path, echo_server):
    path = tmp_path / "sniroute.toml"
    plain = config(echo_server.address[1]).replace("watch = true", "watch = false")
    path.write_text(plain)
    program = launch("-c", str(path), python=QUICK)
    renamed(path, config(echo_server.address[1]))
    program.signal(signal.SIGHUP)
    program.wait_for(" info reload: done, ")
    renamed(path, plain)
    program.wait_for(" info reload: done, ", 2)
    renamed(path, "idle = 1")
    time.sleep(0.4)  # twice as long as a watch would take: nothing tells that nothing is done
    assert " error " not in program.log() and served(program)


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
    """14,000 lines, more than wait, into a pipe that is full after 500."""
    program = launch(route(single_loop_echo), "--log-level=debug", python=changed("sniroute_log.LAST_WRITE = 0.2"))
    program.log_is_read.clear()
    with contextlib.ExitStack() as stack:
        for _ in range(200):  # each is a line in every dump
            client = stack.enter_context(program.connect(HELLO))
            assert read_exactly(client, len(HELLO)) == HELLO
        for _ in range(70):
            program.signal(signal.SIGUSR1)
            client.sendall(b"?")
            assert client.recv(1) == b"?"
        with program.connect(HELLO) as late:
            assert read_exactly(late, len(HELLO)) == HELLO
    program.signal(signal.SIGTERM)
    assert exit_code(program.process, 10) == 0


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


def test_a_lack_of_memory_in_a_reload_changes_nothing_and_is_told_in_words(caplog):
    """Also where another fault came of it, as in argparse."""
    def again(running: Any) -> Any:
        try:
            raise MemoryError
        finally:
            raise AttributeError("save_required")
    settings = types.SimpleNamespace(again=again, config=None)
    router = types.SimpleNamespace(reloads=collections.Counter(), last_reload=(True, 0.0))
    daemon = types.SimpleNamespace(reloading=threading.Lock(), settings=settings, router=router,
                                   supervisor=types.SimpleNamespace(tell=lambda *_: None, ready=lambda _: None))
    said, = sniroute_daemon.Daemon.reload(daemon)
    assert said.startswith("memory is short (") and daemon.settings is settings and router.reloads == {"failed": 1}
    assert "report it" not in caplog.text and "Traceback" not in caplog.text


def no_memory(*_: Any) -> Any:
    raise MemoryError


@pytest.mark.parametrize("mute", [None, no_memory], ids=["told", "no memory for telling"])
def test_a_lack_of_memory_in_the_main_thread_loses_no_signal(monkeypatch, mute):
    """It goes on, and what it was about to do is done then."""
    monkeypatch.setattr(sniroute_daemon, "MEMORY_PAUSE", 0.0)
    left, done = [1, 1], []
    pipe = sniroute_daemon.WakePipe()
    def stop() -> None:
        if left:
            left.pop()
            try:
                raise MemoryError
            finally:
                raise AttributeError("came of it")
        done.append("stop")
    daemon = types.SimpleNamespace(pipe=pipe, stop=stop)
    def turn() -> None:
        sniroute_daemon.Daemon._on_signals(daemon, pipe.reader)
    daemon._start, daemon._close, daemon._turn, daemon.failed = lambda: None, pipe.close, turn, False
    daemon._serve = functools.partial(sniroute_daemon.Daemon._serve, daemon)
    daemon._short = functools.partial(sniroute_daemon.Daemon._short, daemon)
    daemon.thread = types.SimpleNamespace(is_alive=lambda: not done)
    if mute:
        monkeypatch.setattr(sniroute_daemon, "Paced", lambda: types.SimpleNamespace(is_due=mute))
    pipe.wake(bytes((sniroute_daemon.signal.SIGTERM,)))
    assert sniroute_daemon.Daemon.run(daemon) == 0 and done == ["stop"] and not left


def test_a_fault_of_ours_in_a_reload_changes_nothing(caplog):
    """It is no reason to end."""
    def again(running: Any) -> Any:
        raise ZeroDivisionError("planted")
    told: list[str] = []
    settings = types.SimpleNamespace(again=again, config=None)
    router = types.SimpleNamespace(reloads=collections.Counter(), last_reload=(True, 0.0))
    supervisor = types.SimpleNamespace(tell=lambda *words: told.extend(words), ready=lambda router: told.append("READY=1"))
    daemon = types.SimpleNamespace(reloading=threading.Lock(), supervisor=supervisor, settings=settings, router=router)
    assert sniroute_daemon.Daemon.reload(daemon) == ["ZeroDivisionError('planted')"]
    assert daemon.settings is settings and router.reloads == {"failed": 1} and not router.last_reload[0]
    assert told[0] == "RELOADING=1" and told[-1] == "READY=1", "a manager would wait for ever"
    assert "please report it" in caplog.text and "reload: nothing has changed" in caplog.text
