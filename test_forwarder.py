"""Tests of sniroute_forwarder.py, in its order; the program that stands on it is the carrier."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Iterator

import pytest

import sniroute_carrier
import sniroute_dial
import sniroute_edge
import sniroute_forwarder
import sniroute_names
from conftest import HOST, linux, wait_until
from sniroute_carrier import Carrier
from sniroute_edge import Target
from sniroute_forwarder import LINES_MAX, Log
from testbed.carrier import (NOISE, Notes, Program, beside, echoed, end_of, numbers, receive, receive_all,
                             send_blocks)
from testbed.running import reset


# -- the log ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text, limit, line", [
    pytest.param("plain", 10, "plain", id="short"),
    pytest.param("exactly te", 10, "exactly te", id="as long as the limit"),
    pytest.param("eleven long", 10, "eleven ...", id="one too long"),
    pytest.param("a\nb\x1b\x7f\u00e9", 10, "a?b???", id="not printable ASCII"),
])
def test_printable(text, limit, line):
    assert sniroute_names.printable(text, limit) == line


@contextlib.contextmanager
def captured() -> Iterator[int]:
    """A pipe instead of stderr: its reading end."""
    reader, writer = os.pipe()
    kept = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    try:
        yield reader
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        with contextlib.suppress(OSError):  # the test has closed it
            os.close(reader)


def test_lines_for_people_and_for_programs():
    with captured() as stderr:
        log = Log("info", as_json=False)
        log("debug", "not this one")
        log("info", "a\nb", event="e", client="1.2.3.4:5", listener="", error='x"\u00e9\n')
        log("error", "x" * 500)
        Log("debug", as_json=True)("warn", "m\n", event="e", client="", error="q\"\\")
        first, second, third, rest = os.read(stderr, 65536).split(b"\n")
        assert re.fullmatch(rb'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INF a\?b client="1.2.3.4:5" error="x\\"\?\?"', first)
        assert second.endswith(b" ERR " + b"x" * 397 + b"...") and rest == b""
        row = json.loads(third)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row.pop("time"))
        assert row == {"level": "warn", "event": "e", "error": "q\"\\", "message": "m?"}


def test_the_longest_line_is_whole_and_is_json():
    with captured() as stderr:
        worst = "\\" * 100_000
        Log("info", as_json=True)("error", worst, event="closed", listener=worst, error=worst)
        line = os.read(stderr, 65536)
        assert json.loads(line)["event"] == "closed" and len(line) <= 4096


def test_a_log_that_nobody_reads_neither_waits_nor_grows():
    with captured() as stderr:
        log = Log("info", as_json=True)
        for number in range(3 * LINES_MAX):
            log("info", f"line {number} " + "x" * 200)
        assert len(log.lines) == LINES_MAX and log.lost > 0
        lost, read = log.lost, b""
        while log.lines:
            read += os.read(stderr, 65536)
            log.flush()
        read += os.read(stderr, 65536)
        rows = [json.loads(line)["message"] for line in read.splitlines()]
        assert rows[-1] == f"{lost} lines were lost: nobody read the log"
        assert [row.split()[1] for row in rows[:-1]] == [str(number) for number in range(3 * LINES_MAX - lost)]
        assert log.lost == 0


def test_a_log_that_nobody_can_read_forgets():
    with captured() as stderr:
        os.close(stderr)
        log = Log("info", as_json=True)
        for number in range(10):
            log("info", f"line {number}")
        assert not log.lines


def test_a_log_that_nobody_reads_holds_up_nobody(edge, hostname, program, echo_server):
    edge.far(hostname, echo_server.address)
    with contextlib.ExitStack() as stack:
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        run = program("access", "tcp", "--hostname", hostname, "--url", f"{HOST}:0", "--loglevel", "debug",
                      prepare=f"import os; os.dup2({writer}, 2)", pass_fds=[writer])
        line = os.read(reader, 4096)
        run.address = HOST, int(json.loads(line)["listener"].rpartition(":")[2])
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        for _ in range(10):
            assert echoed(run) == b"hello"
        cpu = run.cpu() if sys.platform == "linux" else 0.0
        time.sleep(0.3)
        assert sys.platform != "linux" or run.cpu() - cpu <= 0.05, "it spins"
        assert run.end() == 0


def test_a_log_whose_reader_has_gone_holds_up_nobody(edge, hostname, carrier, echo_server):
    edge.far(hostname, echo_server.address)
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, writer)
        run = carrier(hostname, "--loglevel", "debug", pass_fds=[writer],
                      prepare="import os; listen = carrier.Carrier.listen; carrier.Carrier.listen = "
                              f"lambda self, *rest: (listen(self, *rest), os.dup2({writer}, 2))[0]")
        os.close(reader)
        assert echoed(run) == echoed(run) == b"hello"
        assert run.end() == 0


def test_text_lines_unless_json_is_asked_for(edge, program):
    run = program("access", "tcp", "--hostname", "app.example.test", "--url", f"{HOST}:0",
                  environ={**edge.environ, "TUNNEL_LOG_OUTPUT": "default"})
    wait_until(lambda: run.errors.endswith(b"\n"))
    assert run.end() == 0
    assert re.fullmatch(rb'\S+Z INF listening on 127\.0\.0\.1:\d+ for app\.example\.test listener="127\.0\.0\.1:\d+"\n',
                        run.errors)


# -- listeners and clients -------------------------------------------------------------------


@pytest.mark.parametrize("text, address", [
    pytest.param("127.0.0.1:20000", ("127.0.0.1", 20000), id="IPv4"),
    pytest.param("localhost:20000", ("127.0.0.1", 20000), id="localhost"),
    pytest.param("[::1]:20000", ("::1", 20000), id="IPv6"),
    pytest.param("tcp://127.0.0.1:20000", ("127.0.0.1", 20000), id="scheme"),
    pytest.param("http://127.0.0.1:20000/x", ("127.0.0.1", 20000), id="path"),
    pytest.param("0.0.0.0:0", ("0.0.0.0", 0), id="any"),
])
def test_parse_listen(text, address):
    assert sniroute_forwarder.parse_listen(text) == address


@pytest.mark.parametrize("text", ["", ":1", "127.0.0.1", "20000", "unix:/x", "host.example.com:1", "127.0.0.1:x",
                                  "127.0.0.1:65536", "127.0.0.1:-1", "[::1:1", "\n:1"])
def test_what_is_no_place_to_listen(text):
    with pytest.raises(ValueError, match="is not HOST:PORT, with an address or localhost as HOST$"):
        sniroute_forwarder.parse_listen(text)


def test_no_address_is_shown_as_none():
    show = sniroute_forwarder.show_client
    assert [show(("1.2.3.4", 5)), show(("::1", 5, 0, 0)), show(""), show(None)] == ["1.2.3.4:5", "[::1]:5", "", ""]


def test_ports_stay_ours_until_the_end(monkeypatch):
    """A process that ends and has closed a port cannot be told from one that listens there."""
    kept: list[int] = []
    dup = os.dup
    monkeypatch.setattr(os, "dup", lambda fd: kept.append(dup(fd)) or kept[-1])
    carrier = Carrier(Notes(), [], None, "")
    address = carrier.listen(Target("app.example.test", 443, "/"), (HOST, 0)).sock.getsockname()
    carrier.leave()
    carrier.run()
    try:
        with pytest.raises(OSError, match="in use"), socket.socket() as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stranger.bind(address)
    finally:
        os.close(*kept)


def test_a_port_that_is_taken(program, edge, echo_server):
    run = program("access", "tcp", "--hostname", "app.example.test", "--url", f"{HOST}:{echo_server.address[1]}")
    assert run.end(None) == 1
    row, = run.all_rows()
    assert row["message"] == f"cannot listen on {HOST}:{echo_server.address[1]}: address already in use"


# -- descriptors -----------------------------------------------------------------------------


@linux
def test_who_comes_when_it_is_full_waits_and_is_served(edge, hostname, carrier, echo_server):
    edge.far(hostname, echo_server.address)
    limit = sniroute_forwarder.SPARE_FDS + 2 * 3
    run = carrier(hostname, prepare=f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(run.connect()) for _ in range(5)]
        for client in clients[:3]:
            client.sendall(b"hello")
            assert receive(client, 5) == b"hello"
        row, = wait_until(lambda: run.rows("paused"))
        assert row["message"] == "not accepting for now: 3 connections are open"
        cpu = run.cpu()
        for client in clients[3:]:
            client.sendall(b"later")
        clients[2].sendall(b"again")
        assert receive(clients[2], 5) == b"again"
        time.sleep(0.2)
        assert run.cpu() - cpu <= 0.05, "it spins"
        assert len(edge.requests(hostname)) == 3
        for at in (0, 1):
            reset(clients[at])
            assert receive(clients[3 + at], 5) == b"later"
    assert len(run.rows("paused")) == 1, "once in a while is enough"


@linux
def test_descriptors_that_are_really_gone(edge, hostname, carrier, echo_server):
    """As when other programs have taken them all (ENFILE): accept() fails, and so does the socket to the edge."""
    edge.far(hostname, echo_server.address)
    run = carrier(hostname, prepare="import sniroute_forwarder; sniroute_forwarder.PAUSE = 0.05; carrier.GRACE = 0.1")
    limits = resource.prlimit(run.pid, resource.RLIMIT_NOFILE)
    with run.connect() as live:
        live.sendall(b"hello")
        assert receive(live, 5) == b"hello"
        taken = max(map(int, os.listdir(f"/proc/{run.pid}/fd"))) + 1
        resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (taken, limits[1]))
        with run.connect() as waits, run.connect() as too:
            waits.sendall(b"later")
            too.sendall(b"later")
            row, = wait_until(lambda: run.rows("paused"))
            assert row["message"] == "not accepting for now: Too many open files"
            cpu = run.cpu()
            live.sendall(b"again")
            assert receive(live, 5) == b"again"
            time.sleep(0.3)
            assert run.cpu() - cpu <= 0.06, "it spins"
            resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (taken + 1, limits[1]))  # for a client, not for the edge
            wait_until(lambda: run.fds() == taken + 1, what="the client's descriptor")
            time.sleep(0.15)  # some tries
            assert not run.rows("failed")
            resource.prlimit(run.pid, resource.RLIMIT_NOFILE, limits)
            assert receive(waits, 5) == receive(too, 5) == b"later"


def test_other_errors_of_accept_cost_one_client_and_not_the_listener(edge, hostname, local, echo_server):
    edge.far(hostname, echo_server.address)
    run = local(hostname)
    listener, = run.carrier.listeners.values()
    real = listener.sock
    errors = iter([OSError(errno.ECONNABORTED, "gone"), OSError(errno.EPROTO, "broken")])

    class Listening:
        def accept(self) -> Any:
            for error in errors:
                raise error
            return real.accept()

        def __getattr__(self, attribute: str) -> Any:
            return getattr(real, attribute)

    listener.sock = Listening()
    assert echoed(run) == b"hello"
    listener.sock = real


def test_a_listener_that_comes_while_accepting_pauses(edge, hostname, local, echo_server):
    edge.far(hostname, echo_server.address)
    run = local(hostname, PAUSE=0.1)
    run.carrier.loop.call(lambda: run.carrier._pause("of the test"))
    target = sniroute_edge.parse_target(hostname)
    opened: list[Any] = []
    run.carrier.loop.call(lambda: opened.append(run.carrier.listen(target, (HOST, 0))))
    run.carrier.loop.call(lambda: opened.append(run.carrier.listen(target, (HOST, 0))))
    wait_until(lambda: len(opened) == 2)
    run.carrier.loop.call(lambda: run.carrier.unlisten(opened[0].address))
    for address in (run.address, opened[1].sock.getsockname()):
        run.address = address
        assert echoed(run) == b"hello"
    assert len(run.rows("paused")) == 1


# -- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize("room, act", [
    pytest.param(sniroute_dial, "connect_request", id="in its Dial"),
    pytest.param(sniroute_edge, "upgrade_request", id="in its Upgrade"),
    pytest.param(sniroute_carrier, "Dial", id="in its start"),
])
def test_a_fault_of_ours_ends_one_connection_and_is_told(edge, hostname, local, monkeypatch, echo_server, room, act):
    edge.far(hostname, echo_server.address)
    run = local(hostname)
    with run.connect() as live:
        live.sendall(b"hello")
        assert receive(live, 5) == b"hello"
        with monkeypatch.context() as patch:
            patch.setattr(room, act, lambda *_: 1 // 0)
            with contextlib.suppress(ConnectionResetError), run.connect() as client:
                assert receive_all(client) == (b"", "RST")
            wait_until(lambda: run.rows("fault"))
        live.sendall(b"again")
        assert receive(live, 5) == b"again"
    assert echoed(run) == b"hello"
    row, = run.rows("fault")
    assert "ZeroDivisionError" in row["error"]
    run.log.rows.remove(row)


def test_a_fault_in_what_another_thread_asked_for(edge, hostname, local, echo_server):
    edge.far(hostname, echo_server.address)
    run = local(hostname)
    run.carrier.loop.call(lambda: 1 // 0)
    done = threading.Event()
    run.carrier.loop.call(done.set)
    assert echoed(run) == b"hello" and done.wait(5)
    row, = run.rows("fault")
    run.log.rows.remove(row)


def test_a_call_to_a_loop_that_is_full_or_over_is_no_error(local):
    run = local("nothing.invalid", proxy=False)
    done = threading.Event()

    def flood() -> None:
        for _ in range(5000):
            run.carrier.loop.call(lambda: None)
        run.carrier.loop.call(done.set)

    run.carrier.loop.call(flood)
    assert done.wait(10)
    run.close()
    run.carrier.loop.call(lambda: None)
    run.close()


# -- many hostnames --------------------------------------------------------------------------


@pytest.fixture
def forwarders(program) -> Program:
    return program("forwarders", stdin=subprocess.PIPE)


def test_sixteen_names_in_one_process(edge, forwarders, echo_server):
    names = [f"app-{next(numbers)}.example.test" for _ in range(16)]
    for hostname in names:
        edge.far(hostname, echo_server.address)
    forwarders.tell(*(f"listen {HOST}:0 {hostname}" for hostname in names))
    addresses = forwarders.listening(16)
    assert len(set(addresses)) == 16
    for address in addresses:
        forwarders.address = address
        assert echoed(forwarders) == b"hello"
    assert [len(edge.requests(hostname)) for hostname in names] == [1] * 16
    messages = [row["message"] for row in forwarders.rows("listening")]
    assert messages == [f"listening on {HOST}:{port} for {hostname}"
                        for (_, port), hostname in zip(addresses, names)]
    forwarders.process.stdin.close()
    assert forwarders.end(None) == 0


def test_closing_one_name_leaves_the_others(edge, hostname, forwarders, echo_server, free_ports):
    other = f"other-{hostname}"
    for each in (hostname, other):
        edge.far(each, echo_server.address)
    forwarders.tell(f"listen {HOST}:{free_ports(1)[0]} {hostname}", f"listen [::1]:0 {other}")
    first, (_, port) = forwarders.listening(2)
    with socket.create_connection(first) as one, socket.create_connection(("::1", port)) as two:
        for client in (one, two):
            client.sendall(b"hello")
            assert receive(client, 5) == b"hello"
        forwarders.tell(f"close {HOST}:{first[1]}")
        row, = wait_until(lambda: forwarders.rows("closed"))
        assert (row["listener"], row["level"], row.get("error")) == (f"{HOST}:{first[1]}", "info", None)
        assert receive_all(one)[0] == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(first)
        two.sendall(b"again")
        assert receive(two, 5) == b"again"
        assert end_of(edge, hostname)["close"] == 1000
        forwarders.tell(f"listen {HOST}:{first[1]} {other}")
        assert forwarders.listening(3)[2] == first
        with socket.create_connection(first) as third:
            third.sendall(b"third")
            assert receive(third, 5) == b"third"
        forwarders.process.stdin.close()
        assert forwarders.end(None) == 0
        assert receive_all(two)[0] == b""
    wait_until(lambda: len(edge.ends(other)) == 2)


@pytest.mark.parametrize("line, listener, error", [
    pytest.param("listen", None, "it is neither .*", id="one word"),
    pytest.param("listen 127.0.0.1:0", "127.0.0.1:0", "it is neither .*", id="no hostname"),
    pytest.param("listen 127.0.0.1:0 a b", "127.0.0.1:0", "it is neither .*", id="a word too many"),
    pytest.param("listen 127.0.0.1:0 a..b", "127.0.0.1:0", "'a..b' is not a hostname, .*", id="no such hostname"),
    pytest.param("listen nowhere:1 app", "nowhere:1", "'nowhere:1' is not HOST:PORT, with an address .*",
                 id="no address"),
    pytest.param("listen 127.0.0.1:99999 app", "127.0.0.1:99999", "'127.0.0.1:99999' is not HOST:PORT, .*",
                 id="no port"),
    pytest.param("listen 192.0.2.1:1 app", "192.0.2.1:1", "cannot assign requested address", id="not ours"),
    pytest.param("close 127.0.0.1:1", "127.0.0.1:1", "it is neither .*", id="what is not open"),
    pytest.param("fetch 127.0.0.1:1", "127.0.0.1:1", "it is neither .*", id="another word"),
    pytest.param("listen 127.0.0.1:0 caf\u00e9", "127.0.0.1:0", "'caf..' is not a hostname, .*", id="not ASCII"),
    pytest.param("listen " + "\\" * 900 + " x", "\\" * 900, ".*", id="a long one"),
])
def test_lines_that_cannot_be_obeyed_are_answered(control, line, listener, error):
    control.tell(line)
    row, = wait_until(lambda: control.rows("closed"))
    assert row.get("listener") == listener and row["level"] == "error" and re.fullmatch(error, row["error"])
    control.tell(f"listen {HOST}:0 app.example.test")
    wait_until(lambda: control.rows("listening"))


class Controlled:
    """`forwarders` in a thread of the test: stdin is a pipe of its own."""

    def __init__(self) -> None:
        self.log = Notes()
        self.carrier = Carrier(self.log, [], None, "")
        reader, self.writer = os.pipe()
        self.stdin = os.dup(0)
        os.dup2(reader, 0)
        os.close(reader)
        self.carrier.leave = self.carrier.stop  # this process does not end: see test_ports_stay_ours_until_the_end
        sniroute_forwarder.Control(self.carrier)
        self.thread = threading.Thread(target=self.carrier.run, name="carrier")
        self.thread.start()

    def rows(self, event: str) -> list[dict[str, str]]:
        return [row for row in self.log.rows if row.get("event") == event]

    def tell(self, line: str) -> None:
        os.write(self.writer, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self.writer)
        self.thread.join(10)
        os.dup2(self.stdin, 0)
        os.close(self.stdin)
        assert not self.thread.is_alive() and not self.carrier.listeners
        assert not self.rows("fault")


@pytest.fixture
def control() -> Iterator[Controlled]:
    made = Controlled()
    yield made
    made.close()


def test_lines_in_any_portions(control):
    """Blank ones are nothing."""
    for byte in b"\nlisten 127.0.0.1:0 a.example.test\r\n \r\nlisten 127.0.0.1:0 b.example.test\n":
        os.write(control.writer, bytes([byte]))
    wait_until(lambda: len(control.rows("listening")) == 2)
    assert not control.rows("closed")


def test_a_port_that_is_taken_is_told_and_nothing_else_suffers(edge, hostname, forwarders, echo_server):
    edge.far(hostname, echo_server.address)
    port = echo_server.address[1]
    forwarders.tell(f"listen {HOST}:{port} {hostname}", f"listen {HOST}:0 {hostname}")
    forwarders.listening()
    row, = forwarders.rows("closed")
    assert (row["listener"], row["error"]) == (f"{HOST}:{port}", "address already in use")
    assert echoed(forwarders) == b"hello"


def test_the_answer_to_a_long_line_is_whole(forwarders):
    """In the log as it is written: three fields of what was said, each character escaped."""
    forwarders.tell("listen " + "\\" * 450 + " " + '"' * 450)
    row, = wait_until(lambda: forwarders.rows("closed"))
    assert row["listener"] == "\\" * 397 + "..." and row["error"]


def test_a_line_without_end_ends_it(forwarders):
    with contextlib.suppress(BrokenPipeError):
        forwarders.tell(f"listen {HOST}:0 app.example.test")
        forwarders.listening()
        forwarders.process.stdin.write(b"x" * 5000)
        forwarders.process.stdin.flush()
    assert forwarders.end(None) == 0
    assert [row["message"] for row in forwarders.rows("end")] == ["stdin: a line of more than 1024 bytes"]


def test_signals_end_forwarders(forwarders):
    forwarders.tell(f"listen {HOST}:0 app.example.test")
    forwarders.listening()
    assert forwarders.end() == 0


def test_forwarders_want_a_pipe(program, tmp_path, edge):
    (tmp_path / "file").write_text("")
    with open(tmp_path / "file") as file:
        run = program("forwarders", stdin=file)
        assert run.end(None) == 2
    assert run.errors == b"sniroute_carrier: stdin cannot be waited for: give it a pipe\n"


def test_forwarders_give_their_identity(edge, hostname, program, echo_server):
    edge.far(hostname, echo_server.address)
    edge.fault(hostname, service_token=["s3cret-id", "s3cret-word"])
    run = program("forwarders", stdin=subprocess.PIPE,
                  environ={**edge.environ, "TUNNEL_SERVICE_TOKEN_ID": "s3cret-id",
                           "TUNNEL_SERVICE_TOKEN_SECRET": "s3cret-word"})
    run.tell(f"listen {HOST}:0 {hostname}")
    run.listening()
    assert echoed(run) == b"hello"
    run.process.stdin.close()
    assert run.end(None) == 0 and b"s3cret" not in run.errors


# -- between stdin and stdout ----------------------------------------------------------------


@linux
def test_closed_standard_streams_do_not_become_sockets(edge, hostname, program, echo_server):
    """A log written to descriptor 2 would else land in somebody's connection."""
    edge.far(hostname, echo_server.address)
    run = program("access", "tcp", "--hostname", hostname, "--url", f"{HOST}:0", "--loglevel", "debug",
                  prepare="import os, threading; kept = os.dup(2); [os.close(fd) for fd in range(3)]; listen = "
                          "carrier.Carrier.listen; carrier.Carrier.listen = lambda self, *rest: (lambda listener: "
                          "os.write(kept, b'{\"event\": \"listening\", \"listener\": \"%s\"}\\n' "
                          "% listener.address.encode()) and listener)(listen(self, *rest))")
    run.listening()
    assert echoed(run, NOISE) == NOISE
    assert {os.readlink(f"/proc/{run.pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
    assert run.end() == 0


def test_one_connection_between_stdin_and_stdout(edge, hostname, program, echo_server):
    edge.far(hostname, echo_server.address)
    run = program("access", "tcp", "--hostname", hostname, stdin=subprocess.PIPE, prepare="carrier.GRACE = 1.0")
    with beside(lambda: (run.process.stdin.write(NOISE), run.process.stdin.close())):
        assert run.process.stdout.read() == NOISE
    assert run.end(None) == 0 and run.errors == b""
    assert end_of(edge, hostname)["close"] == 1000


@pytest.mark.parametrize("switches, code", [
    ({}, 0), ({"eof": "open", "eof_after": 6}, 1), ({"close": 1011, "close_after": 6}, 1),
], ids=["ends", "ends TLS in the middle", "says that something went wrong"])
def test_exit_code_tells_a_stream_that_the_edge_cuts_from_a_whole_one(edge, hostname, program, serve, switches, code):
    """A pipe cannot be reset."""
    edge.far(hostname, serve(lambda sock: sock.sendall(b"banner")).address)
    edge.fault(hostname, **switches)
    run = program("access", "tcp", "--hostname", hostname, stdin=subprocess.PIPE)
    assert run.process.stdout.read() == b"banner"
    assert run.end(None) == code


def test_without_stdin_it_waits_for_the_banner(edge, hostname, program, serve):
    edge.far(hostname, serve(lambda sock: sock.sendall(b"banner")).address)
    edge.fault(hostname, delay=200)
    run = program("access", "tcp", "--hostname", hostname, prepare="")
    assert run.process.stdout.read() == b"banner"
    assert run.end(None) == 0


def test_without_an_edge_it_fails(edge, hostname, program):
    edge.fault(hostname, deny=403)
    run = program("access", "tcp", "--hostname", hostname, stdin=subprocess.PIPE)
    assert run.process.stdout.read() == b""
    assert run.end(None) == 1
    row, = run.rows("failed")
    assert row["reason"] == "denied"


def test_a_service_that_ends_ends_it_though_stdin_goes_on(edge, hostname, program, serve):
    edge.far(hostname, serve(lambda sock: sock.sendall(NOISE)).address)
    run = program("access", "tcp", "--hostname", hostname, stdin=subprocess.PIPE, prepare="carrier.LINGER = 0.1")
    assert run.process.stdout.read() == NOISE
    assert run.end(None) == 0


@pytest.mark.parametrize("phase", ["dialling", "open", "nobody reads stdout", "nobody reads stdout any more"])
def test_signals_end_it_between_stdin_and_stdout(edge, hostname, program, serve, phase):
    edge.far(hostname, serve(lambda sock: [sock.sendall(NOISE[:1 << 17]), "any more" in phase or sock.recv(1)]).address)
    if phase == "dialling":
        edge.fault(hostname, hang="upgrade")
    run = program("access", "tcp", "--hostname", hostname, "--loglevel", "debug", stdin=subprocess.PIPE)
    wait_until(lambda: edge.requests(hostname) if phase == "dialling" else run.rows("open"))
    if phase == "open":
        assert len(run.process.stdout.read(1 << 17)) == 1 << 17
    if "any more" in phase:  # half of it is in the pipe, and the connection is over
        run.process.stdin.close()
        run.ends()
    assert run.end() in ((0, -signal.SIGTERM) if "any more" in phase else (0,))


def test_a_stdout_that_is_closed_ends_it(edge, hostname, program, serve):
    edge.far(hostname, serve(send_blocks(50)).address)
    run = program("access", "tcp", "--hostname", hostname, stdin=subprocess.PIPE, prepare="carrier.GRACE = 0.1")
    run.process.stdout.read(1000)
    run.process.stdout.close()
    run.process.stdin.close()
    assert run.end(None) == 0
