"""Tests of sniroute_tunnels.py, in its order.

Processes and sockets are real; the tunnel program is the stand-in of fake_cloudflared.py, which can
be a process for each tunnel (`own`) or for several (`shared`).  A test that has to hold for both is
marked `both`, one about the second `shared`; the others have the first.  Most
tests turn the reaper by hand (`Bench.turn`) under a clock that they move; where waiting itself is
the subject, the reaper's own thread runs (`live=True`).
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import json
import logging
import math
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from typing import Any, Callable, Iterator

import pytest

import sniroute
import sniroute_names
import sniroute_tunnels
from sniroute_tunnels import (BACKOFF, FAILED, QUEUED, READY, STARTING, STOPPING, PortPool, StartBudget, Tunnel,
                              TunnelError, TunnelTable)
from conftest import HERE, HOST, FakeClock, own_children, wait_until

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's /proc")
both = pytest.mark.parametrize("kind", ["own", "shared"], indirect=True)
shared = pytest.mark.parametrize("kind", ["shared"], indirect=True)


def listening(port: int = 0, host: str = HOST, family: int = socket.AF_INET, backlog: int = 5) -> socket.socket:
    """A listener that is in nobody's way once it is closed."""
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((host, port))
    listener.listen(backlog)
    return listener


def port_of(sock: socket.socket) -> int:
    return sock.getsockname()[1]


def runs(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(") ")[2][0] not in "ZX"


def ask(address: tuple[str, int], question: bytes = b"hello") -> bytes:
    """What a far end that echoes answers through a tunnel; b"" where it refuses."""
    with socket.create_connection(address, 10) as client:
        answer = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            client.sendall(question)
            while len(answer) < len(question) and (data := client.recv(65536)):
                answer += data
        return answer


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, dict[str, Any]]]:
    """What was logged: (what happened, its fields)."""
    return [(record.getMessage(), getattr(record, "fields", {})) for record in caplog.records]


class Bench:
    """A table under test, and the threads that wait on it."""

    def __init__(self, table: TunnelTable, live: bool):
        self.table = table
        self.clock = table.clock
        self.threads: list[threading.Thread] = []
        if live:
            table.start()

    def ask(self, name: str, client: str | None = None, timeout: float = 60.0,
            doubted: sniroute_tunnels.Child | None = None) -> concurrent.futures.Future[None]:
        """wait() in a thread of its own."""
        future: concurrent.futures.Future[None] = concurrent.futures.Future()

        def run() -> None:
            try:
                self.table.wait(f"cf:{name}", client, self.clock() + timeout, doubted)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self.threads.append(threading.Thread(target=run, name=f"ask-{name}"))
        self.threads[-1].start()
        return future

    def turn(self, until: Callable[[], Any], timeout: float = 10.0) -> Any:
        """Let the reaper work until something is true."""
        if self.table.reaper.ident is not None:
            return wait_until(until, timeout)
        return wait_until(lambda: self.table.step(0.005) or until(), timeout)

    def outcome(self, future: concurrent.futures.Future[None]) -> TunnelError | None:
        """What became of an ask()."""
        self.turn(future.done)
        error = future.exception()
        assert error is None or isinstance(error, TunnelError), error
        return error

    def ready(self, name: str, **options: Any) -> Tunnel:
        """A tunnel that is ready, without a lease."""
        error = self.outcome(self.ask(name, **options))
        assert error is None, error
        return self.table.tunnels[f"cf:{name}"]

    def leased(self, name: str) -> Tunnel:
        self.ready(name)
        tunnel = self.table.lease(f"cf:{name}")
        assert tunnel is not None
        return tunnel

    def failed(self, name: str, **options: Any) -> TunnelError:
        error = self.outcome(self.ask(name, **options))
        assert error is not None
        return error

    def doubt(self, tunnel: Tunnel) -> bool:
        """Whether doubt has the tunnel's child started again.  Returns when it is ready again."""
        child = tunnel.child
        future = self.ask(tunnel.key.partition(":")[2], doubted=child)
        wait_until(lambda: tunnel.state is not READY or future.done())
        assert self.outcome(future) is None
        assert tunnel.state is READY
        return tunnel.child is not child

    def states(self) -> dict[str, str]:
        return {key.partition(":")[2]: state for key, state, *_ in self.table.snapshot()}

    def close(self) -> None:
        if self.table.reaper.ident is None:
            self.table.start()  # it ends at once, with all that the table holds
        self.table.close(now=True)
        for thread in self.threads:
            thread.join()


@pytest.fixture
def kind(request) -> str:
    """How many tunnels a process carries: `own`, or `shared`."""
    return getattr(request, "param", "own")


def stand_in(kind: str, program: str, environ: dict[str, str]) -> sniroute_tunnels.Launcher:
    """The row for the stand-in."""
    launcher = sniroute_tunnels.cloudflared_launcher(program, environ)
    if kind == "shared":
        launcher = launcher._replace(shared=("forwarders",), reason=sniroute_tunnels.carrier_reason, carries=16)
    return launcher


@pytest.fixture
def bench(kind, cloudflared, free_ports) -> Iterator[Callable[..., Bench]]:
    """bench(live=False, count=20, program=..., **options of TunnelTable) -> Bench."""
    with contextlib.ExitStack() as stack:
        def make(live: bool = False, count: int = 20, program: str = cloudflared.path,
                 environ: dict[str, str] | None = None, **options: Any) -> Bench:
            if not live:
                options.setdefault("clock", FakeClock())
            options.setdefault("jitter", lambda: 1.0)
            options.setdefault("ports", free_ports(count))
            launcher = stand_in(kind, program, environ or {})
            made = Bench(TunnelTable({"cf": launcher, "too": launcher}, **options), live)
            stack.callback(made.close)
            return made

        yield make


# -- words for people --------------------------------------------------------------------------


@pytest.mark.parametrize("text, limit, line", [
    pytest.param("plain", 10, "plain", id="short"),
    pytest.param("exactly ten"[:10], 10, "exactly te", id="as long as the limit"),
    pytest.param("eleven long", 10, "eleven ...", id="one too long"),
    pytest.param("a\nb\rc\x1b[31m\x7f\0", 20, "a?b?c?[31m??", id="control characters"),
    pytest.param("t\u00e9l\u202e\U0001f600", 20, "t?l??", id="not ASCII"),
    pytest.param("", 10, "", id="empty"),
    pytest.param("x" * 10_000_000, 10, "xxxxxxx...", id="huge"),
])
def test_printable(text, limit, line):
    assert sniroute_names.printable(text, limit) == line


@pytest.mark.parametrize("tail, words", [
    pytest.param(b"", "", id="nothing"),
    pytest.param(b" \n\t\r\n\n", "", id="only blanks"),
    pytest.param(b"one\ntwo\n\n", "two", id="the last line that says something"),
    pytest.param(b"one\ntwo", "two", id="no newline at the end"),
    pytest.param(b'{"level":"error","message":"failed","error":"refused"}\n', "failed: refused",
                 id="message and error"),
    pytest.param(b'{"message":"failed"}', "failed", id="message alone"),
    pytest.param(b'{"error":"refused"}', "refused", id="error alone"),
    pytest.param(b'{"message":"a\\nb"}', "a?b", id="newline inside JSON"),
    pytest.param(b'{"message":7,"error":null}', "7: None", id="not strings"),
    pytest.param(b'{"level":"info"}', '{"level":"info"}', id="JSON that says nothing"),
    pytest.param(b'{"message":"cut', '{"message":"cut', id="JSON cut short"),
    pytest.param(b'or":"x"}', 'or":"x"}', id="JSON cut at its start"),
    pytest.param(b'["message"]', '["message"]', id="a JSON list"),
    pytest.param(b'"a message"', '"a message"', id="a JSON string"),
    pytest.param(b"17", "17", id="a JSON number"),
    pytest.param(b"9" * 4096, "9" * 197 + "...", id="a number beyond int()"),
    pytest.param(b"[" * 4096, "[" * 197 + "...", id="deep nesting"),
    pytest.param(b"\xff\xfe caf\xc3\xa9\x1b[0m", "?? caf??[0m", id="not UTF-8, and an escape"),
    pytest.param(b"windows\r\n", "windows", id="CR LF"),
])
def test_last_words(tail, words):
    assert sniroute_tunnels.last_words(tail) == words


@pytest.mark.parametrize("tail, kind_of, text", [
    pytest.param(b'{"message":"failed to connect to origin","error":"websocket: bad handshake"}', "failed",
                 "the edge refused it: access denied, no such tunnel, or its connector is down"
                 " (failed to connect to origin: websocket: bad handshake)", id="refused"),
    pytest.param(b'{"message":"m","error":"tls: failed to verify certificate: x509: unknown authority"}', "failed",
                 "the edge's certificate is not trusted"
                 " (m: tls: failed to verify certificate: x509: unknown authority)", id="certificate"),
    pytest.param(b"lookup app.example.test: no such host", "unknown",
                 "the name does not resolve (lookup app.example.test: no such host)", id="DNS"),
    pytest.param(b"connect: network is unreachable", "failed",
                 "the network is unreachable (connect: network is unreachable)", id="network"),
    pytest.param(b"connect: connection refused", "failed",
                 "the edge refused the connection (connect: connection refused)", id="connection refused"),
    pytest.param(b"read: connection reset by peer", "failed",
                 "the edge reset the connection (read: connection reset by peer)", id="reset"),
    pytest.param(b"bind: address already in use", "failed",
                 "its local port was taken (bind: address already in use)", id="port"),
    pytest.param(b"Another cloudflared process (pid 7) is already waiting for authentication.", "denied",
                 "Access wants a login: give the router a service token"
                 " (Another cloudflared process (pid 7) is already waiting for authentication.)", id="login lock"),
    pytest.param(b"something new", "failed", "something new", id="unknown words are shown as they came"),
    pytest.param(b"", "failed", "", id="nothing"),
])
def test_cloudflared_reason(tail, kind_of, text):
    assert sniroute_tunnels.cloudflared_reason(tail) == (kind_of, text, False)


@pytest.mark.parametrize("prompt", [
    pytest.param("Please open the following URL and log in with your Cloudflare account:\n\n"
                 "https://app.example.test/cdn-cgi/access/cli?token=x\n\n"
                 "Leave cloudflared running to download the token automatically.\n", id="no browser"),
    pytest.param("A browser window should have opened at the following URL:\n\n"
                 "https://app.example.test/cdn-cgi/access/cli?token=x\n\n"
                 "If the browser failed to open, please visit the URL above directly in your browser.\n", id="browser"),
    pytest.param('{"level":"info","message":"Waiting for login..."}\n', id="waiting"),
])
def test_a_login_prompt_is_recognised_by_its_last_line(prompt):
    reason = sniroute_tunnels.cloudflared_reason(prompt.encode())
    assert reason.kind == "denied" and reason.text.startswith("Access wants a login")


@pytest.mark.parametrize("fields, reason", [
    ({"reason": "name"}, ("unknown", "m: e", True)),
    ({"reason": "not_found"}, ("unknown", "m: e", True)),
    ({"reason": "login"}, ("denied", "m: e", True)),
    ({"reason": "denied"}, ("denied", "m: e", True)),
    ({"reason": "certificate"}, ("failed", "m: e", True)),
    *[({"reason": word}, ("failed", "m: e", False))
      for word in ("refused", "timeout", "tls", "reset", "proxy", "origin", "down", "other", "new", "", None, 7, [])],
    ({}, ("failed", "m: e", False)),
    ({"message": "a\nb\x1b", "error": "x" * 300}, ("failed", ("a?b?: " + "x" * 300)[:197] + "...", False)),
])
def test_carrier_reason(fields, reason):
    line = json.dumps({"message": "m", "error": "e", **fields}).encode()
    assert sniroute_tunnels.carrier_reason(b"before\n" + line + b"\n") == reason


@pytest.mark.parametrize("tail, text", [(b"", ""), (b"{", "{"), (b'["reason"]', '["reason"]'), (b"\xff", "?")])
def test_what_is_no_line_of_the_carrier_is_shown_as_it_came(tail, text):
    assert sniroute_tunnels.carrier_reason(tail) == ("failed", text, False)


# -- the launcher ------------------------------------------------------------------------------


def test_argv_names_an_ipv4_listener_and_holds_no_secret():
    assert sniroute_tunnels.cloudflared_argv("app.example.test", 20000) == [
        "access", "tcp", "--hostname", "app.example.test", "--url", "127.0.0.1:20000", "--loglevel", "info"]


def test_environment_is_built_from_nothing():
    environ = {name: "x" for name in sniroute_tunnels.TUNNEL_ENVIRONMENT}
    more = {"PATH": "/bin", "HOME": "/root", "TUNNEL_SERVICE_HOSTNAME": "evil", "TUNNEL_LOG_OUTPUT": "text",
            "LD_PRELOAD": "x", "HTTP_PROXY": "x"}
    launcher = sniroute_tunnels.cloudflared_launcher("cloudflared", {**environ, **more})
    assert launcher.environment == {**environ, "TUNNEL_LOG_OUTPUT": "json"}
    assert sniroute_tunnels.cloudflared_launcher("cloudflared", more).environment == {"TUNNEL_LOG_OUTPUT": "json"}


def test_the_program_is_found_on_path_or_by_its_path(cloudflared, monkeypatch, tmp_path):
    def found(program: str) -> str:
        return sniroute_tunnels.cloudflared_launcher(program, {}).find()

    assert found(cloudflared.path) == cloudflared.path
    monkeypatch.setenv("PATH", str(cloudflared.directory))
    assert found("cloudflared") == cloudflared.path
    monkeypatch.chdir(cloudflared.directory)
    assert found("./cloudflared") == cloudflared.path
    (tmp_path / "plain").write_text("no program")
    for missing in ("cloudflared2", str(tmp_path), str(tmp_path / "plain")):
        with pytest.raises(TunnelError, match="is not there: install it") as caught:
            found(missing)
        assert caught.value.kind == "failed"


def test_the_carrier_can_also_be_run_for_one_tunnel():
    """As `explain` shows it."""
    carrier = sniroute_tunnels.carrier_launcher({})
    assert carrier.argv("app.test", 20000) == [carrier.script, *sniroute_tunnels.cloudflared_argv("app.test", 20000)]
    done = subprocess.run([carrier.find(), carrier.script, "access", "tcp"], env={}, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"") and b"--hostname is missing" in done.stderr


def test_the_carrier_is_run_by_this_python_with_nothing_but_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(sniroute_tunnels, "__file__", str(tmp_path / "sniroute_tunnels.py"))
    environ = {name: "x" for name in sniroute_tunnels.TUNNEL_ENVIRONMENT}
    launcher = sniroute_tunnels.carrier_launcher({**environ, "PATH": "/bin", "TUNNEL_SERVICE_HOSTNAME": "evil"})
    assert launcher.environment == {**environ, "TUNNEL_LOG_OUTPUT": "json"}
    assert not launcher.is_there()
    with pytest.raises(TunnelError, match="sniroute_carrier.py is not beside sniroute.py: copy it there") as caught:
        launcher.find()
    assert caught.value.kind == "failed"
    (tmp_path / "sniroute_carrier.py").write_text(
        "import sys\ndef main():\n    print(sys.argv, sys.flags.isolated, sys.flags.no_site)\n    return 7\n")
    assert launcher.is_there() and launcher.find() == os.path.abspath(sys.executable)
    for words, seen in ((launcher.shared, ["forwarders"]),
                        (launcher.trial("a.test"), ["access", "tcp", "--hostname", "a.test"])):
        done = subprocess.run([launcher.find(), *words], cwd="/", env=launcher.environment, capture_output=True)
        assert (done.returncode, done.stdout.decode()) == (7, f"{['sniroute_carrier', *seen]} 1 1\n"), done.stderr


# -- the death guard ---------------------------------------------------------------------------


def without_setpriv(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **rest: None if name == "setpriv" else which(name, **rest))


@pytest.fixture(params=["setpriv", "python"])
def guard(request, monkeypatch) -> list[str]:
    """Both forms of the words before a child's argv."""
    if sys.platform != "linux":
        pytest.skip("PR_SET_PDEATHSIG is Linux's")
    if request.param == "python":
        without_setpriv(monkeypatch)
    words = sniroute_tunnels.death_guard()
    if (words[0] == sys.executable) != (request.param == "python"):
        pytest.skip("no setpriv with --pdeathsig here")
    return words


def test_the_guard_runs_the_program_with_its_words_as_they_are(guard):
    words = ["--", "$HOME", "a b", "", "-c", "'\""]
    program = [sys.executable, "-IS", "-c", "import sys; print(sys.argv[1:], end='')", *words]
    assert subprocess.run([*guard, *program], capture_output=True, text=True, check=True).stdout == str(words)


def test_the_guard_runs_nothing_when_the_router_has_died_meanwhile(guard):
    done = subprocess.run([*guard[:-1], "999999999", "/bin/echo", "ran"], capture_output=True)
    assert done.stdout == b""


def test_a_setpriv_that_knows_no_pdeathsig_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "setpriv").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "setpriv").chmod(0o700)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, path=None: which(name, path=str(tmp_path)))
    monkeypatch.setattr(sys, "platform", "linux")
    assert sniroute_tunnels.death_guard()[0] == sys.executable


def test_no_guard_where_the_kernel_has_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert sniroute_tunnels.death_guard() == []


ROUTER = """
import sys, time
import sniroute_tunnels
path, first, form, kind = sys.argv[1:]
if form == "python":
    sniroute_tunnels.shutil.which = lambda name, path=None: name if "/" in name else None
launcher = sniroute_tunnels.cloudflared_launcher(path, {})
if kind == "shared":
    launcher = launcher._replace(shared=("forwarders",), reason=sniroute_tunnels.carrier_reason, carries=16)
table = sniroute_tunnels.TunnelTable({"cf": launcher}, (int(first), int(first) + 9))
table.start()
for name in "abc":
    table.wait(f"cf:{name}.test", None, time.monotonic() + 20)
assert (table.guard[0] == sys.executable) == (form == "python"), table.guard
print(*(row[4] for row in table.snapshot()), flush=True)
sys.stdin.read()
"""


@linux
@pytest.mark.parametrize("form, kind", [("setpriv", "own"), ("python", "own"), ("setpriv", "shared")],
                         indirect=["kind"])
def test_sigkill_of_the_router_leaves_no_process(form, kind, cloudflared, free_ports, tmp_path):
    if form == "setpriv" and (not shutil.which("setpriv") or sniroute_tunnels.death_guard()[0] == sys.executable):
        pytest.skip("no setpriv with --pdeathsig here")
    cloudflared.fault("a.test", ignore_term=True)
    words = [sys.executable, "-c", ROUTER, cloudflared.path, str(free_ports()[0]), form, kind]
    router = subprocess.Popen(words, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={**os.environ, "TMPDIR": str(tmp_path)})
    with router:
        pids = [int(word) for word in router.stdout.readline().split()]
        assert len(pids) == 3 and len(set(pids)) == (1 if kind == "shared" else 3) and all(map(runs, pids))
        router.kill()
    wait_until(lambda: not any(map(runs, pids)), timeout=2)


# -- who listens -------------------------------------------------------------------------------


@pytest.fixture(params=["asked for", "read"])
def looked(request, monkeypatch):
    """Listeners are found by sock_diag, and where that cannot be had, in /proc/net."""
    def sandbox(port: int) -> dict[str, int]:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    if request.param == "read":
        monkeypatch.setattr(sniroute_tunnels, "ask_for_listener", sandbox)


@linux
def test_a_listener_of_this_process_is_own(looked):
    with listening() as listener:
        assert sniroute_tunnels.listens(os.getpid(), port_of(listener)) == "own"


@linux
def test_nobody_listens_on_a_port_that_is_only_bound(free_ports, looked):
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        assert sniroute_tunnels.listens(os.getpid(), port_of(bound)) == "nobody"


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
        assert sniroute_tunnels.listeners(port_of(listener)) == ({inode: 0} if port_is_reachable else {})


@linux
def test_listeners_counts_who_waits_to_be_accepted_beside_many_connections(echo_server, looked):
    with contextlib.ExitStack() as stack:
        for _ in range(20):  # rows of other states, on the same port too
            stack.enter_context(socket.create_connection(echo_server.address))
        wait_until(lambda: list(sniroute_tunnels.listeners(echo_server.address[1]).values()) == [0])
        listener = stack.enter_context(listening())
        for number in range(1, 4):
            stack.enter_context(socket.create_connection(listener.getsockname()))
            assert list(sniroute_tunnels.listeners(port_of(listener)).values()) == [number]


@linux
def test_the_kernel_is_asked_for_one_listener_where_it_can_be():
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, sniroute_tunnels.SOCK_DIAG).close()
    except OSError:
        pytest.skip("no sock_diag here")
    with listening() as listener:
        inode = os.readlink(f"/proc/self/fd/{listener.fileno()}")[8:-1]
        assert sniroute_tunnels.ask_for_listener(port_of(listener)) == {inode: 0}
    assert sniroute_tunnels.ask_for_listener(1) == {}


@linux
def test_a_kernel_without_ipv6_is_asked_about_ipv4_only(monkeypatch):
    real = open

    def old_kernel(path, *rest, **options):
        if str(path).endswith("tcp6"):
            raise FileNotFoundError(path)
        return real(path, *rest, **options)

    monkeypatch.setattr(sniroute_tunnels, "open", old_kernel, raising=False)
    with listening() as listener:
        assert sniroute_tunnels.listens(os.getpid(), port_of(listener)) == "own"


@linux
def test_a_process_without_sockets_is_nobody_even_where_another_listens(looked):
    with listening() as listener, subprocess.Popen(["sleep", "60"]) as child:
        try:
            assert sniroute_tunnels.listens(child.pid, port_of(listener)) == "nobody"
        finally:
            child.kill()


@linux
def test_a_process_that_is_gone_is_nobody():
    with subprocess.Popen(["true"]) as child:
        child.wait()
    with listening() as listener:
        assert sniroute_tunnels.listens(child.pid, port_of(listener)) == "nobody"


@linux
def test_a_listener_that_opens_during_the_look_is_not_taken_for_a_stranger(monkeypatch, free_ports):
    """The child's sockets, then the listeners: what it opened in between seemed to be another's."""
    port = free_ports()[0]
    real = sniroute_tunnels.socket_inodes
    with contextlib.ExitStack() as stack:
        stack.enter_context(socket.socket())  # it holds another socket already

        looks = []

        def look_then_open(pids):
            found = real(pids)
            looks.append(found)
            if len(looks) == 2:  # the first only asks whether there is any socket
                stack.enter_context(listening(port))
            return found

        monkeypatch.setattr(sniroute_tunnels, "socket_inodes", look_then_open)
        assert sniroute_tunnels.listens(os.getpid(), port) != "other"


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
        assert sniroute_tunnels.listens(os.getpid(), port_of(listener)) == "own"


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
        assert sniroute_tunnels.listeners(port_of(own)) == {inode: 0}


@linux
def test_no_descriptor_left_to_look_with_is_no_answer(monkeypatch):
    """The look is made by threads that promise to raise TunnelError only."""
    def exhausted(*_: object, **__: object):
        raise OSError(24, "Too many open files")

    with listening() as listener:
        monkeypatch.setattr(sniroute_tunnels, "open", exhausted, raising=False)
        monkeypatch.setattr(sniroute_tunnels.socket, "socket", exhausted)
        assert sniroute_tunnels.listeners(port_of(listener)) == {}


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
    assert pool.next_free() == clock() + sniroute_tunnels.QUARANTINE
    assert pool.take() == last
    assert pool.take() is None
    clock.jump(sniroute_tunnels.QUARANTINE)
    assert pool.take() == first


def test_a_port_that_another_holds_is_passed_over_and_rests_longer(free_ports):
    first, last = free_ports(3)
    clock = FakeClock()
    pool = PortPool(first, last, clock)
    with listening(first), listening(first + 1, "0.0.0.0"):
        assert pool.take() == last
        assert pool.take() is None
    clock.jump(sniroute_tunnels.TAKEN_REST - 1)
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


# -- start budget ------------------------------------------------------------------------------


def test_start_budget_bursts_then_refills_with_the_clock():
    clock = FakeClock()
    budget = StartBudget(clock)
    burst = sniroute_tunnels.STARTS_BURST
    assert [budget.spend("a") for _ in range(burst + 2)] == [True] * burst + [False] * 2
    assert budget.spend("b"), "another client has its own"
    assert all(budget.spend(None) for _ in range(100))
    clock.jump(1 / sniroute_tunnels.STARTS_REFILL)
    assert [budget.spend("a"), budget.spend("a")] == [True, False]
    clock.jump(1e6)
    assert [budget.spend("a") for _ in range(burst + 1)] == [True] * burst + [False], "never more than a burst"


def test_start_budget_forgets_the_least_recent_client(monkeypatch):
    monkeypatch.setattr(sniroute_tunnels, "BUDGETS_KEPT", 3)
    budget = StartBudget(FakeClock())
    for client in "abcad":
        budget.spend(client)
    assert list(budget.buckets) == ["c", "a", "d"]


def test_a_client_that_asks_for_too_many_cold_tunnels_is_refused(bench):
    table = bench().table
    for number in range(sniroute_tunnels.STARTS_BURST):
        with pytest.raises(TunnelError) as caught:
            table.wait(f"cf:{number}.test", "192.0.2.1", table.clock())
        assert caught.value.kind == "timeout"
    for _ in range(3):
        with pytest.raises(TunnelError, match="192.0.2.1 asked for too many cold tunnels") as caught:
            table.wait("cf:more.test", "192.0.2.1", table.clock())
        assert caught.value.kind == "budget"
    assert "cf:more.test" not in table.tunnels
    with pytest.raises(TunnelError, match="not ready in time .it is queued"):  # it joins: no cold start
        table.wait("cf:0.test", "192.0.2.1", table.clock())
    table.clock.jump(1)
    with pytest.raises(TunnelError, match="not ready in time"):
        table.wait("cf:more.test", "192.0.2.1", table.clock())


# -- starting ----------------------------------------------------------------------------------


@both
def test_fifty_clients_of_one_cold_name_start_one_process(bench, cloudflared):
    table = bench(live=True).table
    barrier = threading.Barrier(50)

    def come() -> None:
        barrier.wait()
        table.wait("cf:app.test", None, time.monotonic() + 30)

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        for future in [pool.submit(come) for _ in range(50)]:
            future.result()
    assert len(cloudflared.starts()) == 1
    assert table.tunnels["cf:app.test"].waiters == 0
    assert table.counters["starts"] == table.counters["ready"] == 1


@both
def test_twenty_names_start_two_at_a_time(bench, cloudflared, monkeypatch):
    cloudflared.fault("*", listen_delay=10)
    monkeypatch.setattr(sniroute_tunnels, "EVICT_AGE", 60.0)  # each start that ends makes room for the next by itself
    peak = 0
    enter = TunnelTable._enter

    def entered(self, tunnel, state):
        nonlocal peak
        enter(self, tunnel, state)
        peak = max(peak, sum(t.state is STARTING for t in self.tunnels.values()))

    monkeypatch.setattr(TunnelTable, "_enter", entered)
    made = bench(live=True, max_starting=2)
    for future in [made.ask(f"{number}.test") for number in range(20)]:
        assert future.result(30) is None
    assert peak == 2
    assert len(cloudflared.starts()) == len(set(made.states())) == 20


@both
def test_names_are_started_in_the_order_in_which_they_were_asked_for(bench, cloudflared):
    made = bench(max_starting=1)
    futures = []
    for name in ("c.test", "a.test", "b.test"):
        made.clock.jump(0.1)
        futures.append(made.ask(name))
        wait_until(lambda: name in made.states())
    assert [made.outcome(future) for future in futures] == [None] * 3
    assert [start["hostname"] for start in cloudflared.starts()] == ["c.test", "a.test", "b.test"]


@both
def test_a_byte_goes_through_and_back(bench, cloudflared, echo_server):
    cloudflared.far("app.test", echo_server.address)
    tunnel = bench(live=True).ready("app.test")
    assert ask(tunnel.child.address, b"x" * 100_000) == b"x" * 100_000


def test_a_child_gets_nothing_but_what_it_needs(bench, cloudflared):
    secret = "s3cret"
    environ = {**os.environ, "TUNNEL_SERVICE_TOKEN_ID": "id", "TUNNEL_SERVICE_TOKEN_SECRET": secret,
               "HTTPS_PROXY": "http://proxy.test:3128", "TUNNEL_SERVICE_URL": "evil", "LD_PRELOAD": ""}
    made = bench(environ=environ, program=cloudflared.path)
    made.ready("app.test")
    start, = cloudflared.starts()
    assert start["argv"][1:] == ["access", "tcp", "--hostname", "app.test", "--url", f"127.0.0.1:{start['port']}",
                                 "--loglevel", "info"]
    assert secret not in " ".join(start["argv"])
    environment = start["environment"]
    for noise in ("PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"):  # /bin/sh and Python add these themselves
        environment.pop(noise, None)
    home = environment.pop("HOME")
    for name in ("TZ", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", "NO_PROXY", "no_proxy", "https_proxy"):
        assert environment.pop(name, None) == os.environ.get(name)
    assert environment == {"TUNNEL_SERVICE_TOKEN_ID": "id", "TUNNEL_SERVICE_TOKEN_SECRET": secret,
                           "HTTPS_PROXY": "http://proxy.test:3128", "TUNNEL_LOG_OUTPUT": "json"}
    if start["fds"]:
        assert start["fds"].keys() == {"0", "1", "2"}
        assert start["fds"]["0"] == "/dev/null"
        assert start["fds"]["1"].startswith("pipe:")
    assert os.getpgid(start["pid"]) == start["pid"], "Ctrl-C in the router's terminal must not reach it"
    assert home != os.environ.get("HOME")
    assert os.stat(home).st_mode & 0o777 == 0o700
    made.close()
    assert not os.path.exists(home)


def test_a_shared_process_gets_nothing_but_what_it_needs(cloudflared, free_ports):
    """As above, but for its stdin."""
    launcher = stand_in("shared", cloudflared.path, {"TUNNEL_SERVICE_TOKEN_SECRET": "s3cret", "LD_PRELOAD": ""})
    made = Bench(TunnelTable({"cf": launcher}, free_ports(), clock=FakeClock()), False)
    try:
        made.ready("app.test")
    finally:
        made.close()
    start, = cloudflared.starts()
    assert start["argv"][1:] == ["forwarders"]
    assert start["environment"].keys() - {"PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"} == {
        "HOME", "TUNNEL_SERVICE_TOKEN_SECRET", "TUNNEL_LOG_OUTPUT"}
    if start["fds"]:
        pipes = [start["fds"][fd] for fd in "012"]
        assert all(pipe.startswith("pipe:") for pipe in pipes) and pipes[0] != pipes[1] == pipes[2]
        assert sum("pipe:" in what for what in start["fds"].values()) == 3


NOT_IN_TIME = "it did not listen within 15 s"
START_FAILURES = [
    *[pytest.param(kind, *values, id=f"{kind}, {name}") for kind in ("own", "shared") for name, *values in (
        ("exit 0", {"exit": 0, "words": "no such flag"}, "it ended (exit 0): no such flag"),
        ("exit 3", {"exit": 3, "words": "bad luck"}, "it ended (exit 3): bad luck"),
        ("no words", {"exit": 1}, "it ended (exit 1)"))],
    pytest.param("own", {"never_listen": True}, f"{NOT_IN_TIME}: Start Websocket listener", id="own, never listens"),
    pytest.param("own", {"never_listen": True, "ignore_term": True}, f"{NOT_IN_TIME}: Start Websocket listener",
                 id="own, never listens and ignores TERM"),
    pytest.param("own", {"wrong_port": True}, f"{NOT_IN_TIME}: Start Websocket listener", id="own, wrong port"),
    pytest.param("shared", {"never_listen": True}, NOT_IN_TIME, id="shared, never listens"),
    pytest.param("shared", {"never_listen": True, "ignore_term": True}, NOT_IN_TIME,
                 id="shared, never listens and ignores TERM"),
]


@pytest.mark.parametrize("kind, switches, message", START_FAILURES, indirect=["kind"])
def test_a_start_that_fails_says_why(kind, switches, message, bench, cloudflared):
    cloudflared.fault("app.test", **switches)
    made = bench()
    future = made.ask("app.test", timeout=1000)
    made.turn(cloudflared.starts)
    made.turn(lambda: future.done() or "exit" not in switches and (
        kind == "shared" or b"Start" in made.table.tunnels["cf:app.test"].child.process.tail))
    made.clock.jump(15)  # start_timeout
    made.table.step()
    made.clock.jump(sniroute_tunnels.STOP_GRACE)
    error = made.outcome(future)
    assert error.kind == "failed"
    assert str(error) == f"cf:app.test did not start: {message}"
    assert made.table.tunnels == {}
    made.turn(lambda: not made.table.processes)
    assert made.table.children == {}
    assert made.table.counters["failures"] == 1
    if sys.platform == "linux":
        assert own_children() == set()


@pytest.mark.parametrize("words, kind_of", [("Waiting for login...", "denied"), ("no such host", "unknown")])
def test_a_start_that_fails_for_a_known_reason_has_its_kind_also_from_memory(words, kind_of, bench, cloudflared):
    cloudflared.fault("app.test", exit=1, words=words)
    made = bench()
    assert made.failed("app.test").kind == made.failed("app.test").kind == kind_of
    assert len(cloudflared.starts()) == 1


@linux
def test_a_port_that_a_stranger_listens_on_is_not_ready(bench, cloudflared):
    cloudflared.fault("app.test", wrong_owner=True)
    made = bench()
    error = made.failed("app.test")
    assert "address already in use by another process" in str(error)
    ports = [start["port"] for start in cloudflared.starts()]
    assert len(ports) == len(set(ports)) == sniroute_tunnels.PORT_TRIES + 1, "another port each time, bounded"


@linux
def test_a_listener_of_a_descendant_is_own(bench, cloudflared, echo_server):
    cloudflared.fault("app.test", child_listens=True)
    cloudflared.far("app.test", echo_server.address)
    made = bench()
    tunnel = made.ready("app.test")
    assert ask(tunnel.child.address) == b"hello"
    pids = {tunnel.child.process.pid, cloudflared.clients()[0]["pid"]}
    assert len(pids) == 2
    os.kill(tunnel.child.process.pid, signal.SIGKILL)  # the wrapper alone
    made.turn(lambda: not made.table.children)
    wait_until(lambda: not any(map(runs, pids)), timeout=2)


@both
def test_address_in_use_is_tried_on_another_port(bench, cloudflared):
    cloudflared.fault("app.test", in_use=2)
    made = bench()
    tunnel = made.ready("app.test")
    first = made.table.pool.free and min(start["port"] for start in cloudflared.starts())
    assert [start["port"] for start in cloudflared.starts()] == [first, first + 1, first + 2]
    assert tunnel.tries == 0 and made.table.failures == {}


@both
def test_address_in_use_is_not_tried_for_ever(bench, cloudflared):
    cloudflared.fault("app.test", in_use=1000)
    made = bench()
    error = made.failed("app.test")
    assert error.kind == "failed" and "address already in use" in str(error)
    assert len(cloudflared.starts()) == sniroute_tunnels.PORT_TRIES + 1
    assert "cf:app.test" in made.table.failures


@both
def test_a_port_stolen_between_the_look_and_the_start_is_tried_on_another(bench, cloudflared, monkeypatch):
    made = bench()
    pool = made.table.pool
    with contextlib.ExitStack() as stack:
        def robbed() -> int | None:
            monkeypatch.setattr(pool, "take", take)
            port = take()
            stack.enter_context(listening(port))
            return port

        take = pool.take
        monkeypatch.setattr(pool, "take", robbed)
        tunnel = made.ready("app.test")
    ports = [start["port"] for start in cloudflared.starts()]
    assert ports[-1] == tunnel.child.address[1]
    assert len(ports) <= 2


@both
def test_ports_that_others_hold_are_passed_over(bench, cloudflared):
    made = bench(count=4)
    first = made.table.pool.free[0]
    with listening(first), listening(first + 1), listening(first + 3):
        assert made.ready("a.test").child.address == (HOST, first + 2)
        future = made.ask("b.test", timeout=1000)
        made.turn(lambda: made.states().get("b.test") is QUEUED and not made.table.pool.free)
        assert made.states()["a.test"] is READY, "it is too fresh to be evicted"
        made.clock.jump(sniroute_tunnels.EVICT_AGE)
        made.turn(lambda: "a.test" not in made.states())
        made.clock.jump(sniroute_tunnels.QUARANTINE)
        assert made.outcome(future) is None
    assert made.states() == {"b.test": READY}


def test_no_port_at_all_is_a_timeout(bench):
    made = bench(live=True, count=1)
    turns, step = [], made.table.step
    made.table.step = lambda timeout: turns.append(step(timeout))
    with listening(made.table.pool.free[0]):
        error = made.failed("a.test", timeout=0.3)
    assert error.kind == "timeout"
    assert len(turns) < 30, "the reaper does not spin meanwhile"
    wait_until(lambda: made.states() == {})  # nobody waits for it any more


def test_a_change_of_one_tunnel_wakes_nobody_who_waits_for_another(bench, cloudflared):
    """32 threads that wake for each change of 500 keep the interpreter from the loop."""
    cloudflared.fault("slow.test", never_listen=True)
    made = bench()
    made.ask("slow.test")
    made.turn(lambda: made.states().get("slow.test") is STARTING)
    looked, clock = [], made.clock
    made.table.clock = lambda: looked.append(threading.current_thread().name) or clock()
    for name in ("a.test", "b.test", "c.test"):
        made.ready(name)
    assert looked.count("ask-slow.test") <= 1  # of its own start


def test_a_waiter_that_gives_up_takes_a_queued_name_out(bench):
    made = bench()
    assert made.table.lease("cf:a.test") is None
    with pytest.raises(TunnelError) as caught:
        made.table.wait("cf:a.test", None, made.clock())
    assert caught.value.kind == "timeout"
    made.table.step()
    assert made.states() == {} and not made.table.children


# -- failures that are remembered --------------------------------------------------------------


@both
def test_a_failed_start_is_refused_from_memory_and_then_tried_once(bench, cloudflared):
    cloudflared.fault("app.test", exit=1, words="bad luck")
    made = bench()
    made.failed("app.test")
    for _ in range(1000):
        with pytest.raises(TunnelError, match="bad luck; next try in 5 s") as caught:
            made.table.wait("cf:app.test", "192.0.2.1", made.clock() + 60)
        assert caught.value.kind == "failed"
    assert len(cloudflared.starts()) == 1
    made.clock.jump(sniroute_tunnels.FAILURE_FIRST)
    futures = [made.ask("app.test") for _ in range(20)]
    assert all(made.outcome(future).kind == "failed" for future in futures)
    assert len(cloudflared.starts()) == 2


@pytest.mark.parametrize("jitter, share", [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_the_memory_of_failures_grows_to_its_bound(jitter, share, bench):
    made = bench(program="/bin/false", jitter=lambda: jitter)
    for wait in (5, 10, 20, 40, 80, 160, 300, 300):
        made.failed("app.test")
        failure = made.table.failures["cf:app.test"]
        assert failure.until - made.clock() == pytest.approx(wait * share)
        made.clock.jump(wait * share)


@both
def test_a_start_that_works_forgets_the_failures_before(bench, cloudflared):
    made = bench()
    for wait in (5, 10):
        cloudflared.fault("app.test", exit=1)
        made.failed("app.test")
        made.clock.jump(wait)
    cloudflared.fault("app.test")
    tunnel = made.ready("app.test")
    assert made.table.failures == {} and tunnel.failures == 0


def test_remembered_failures_are_bounded(bench, monkeypatch):
    monkeypatch.setattr(sniroute_tunnels, "FAILURES_KEPT", 3)
    made = bench(program="/bin/false")
    for name in "abcd":
        made.failed(name)
    made.clock.jump(5)
    made.failed("b")
    made.failed("e")
    assert list(made.table.failures) == ["cf:d", "cf:b", "cf:e"]


@both
def test_a_program_that_is_not_there_is_no_failure_of_the_name(bench, tmp_path, cloudflared):
    program = tmp_path / "later"
    made = bench(program=str(program))
    error = made.failed("app.test")
    assert error.kind == "failed" and "is not there: install it" in str(error)
    assert made.table.failures == {}
    program.symlink_to(cloudflared.path)
    made.ready("app.test")


@both
def test_a_program_that_the_kernel_cannot_run_is_no_failure_of_the_name(bench, tmp_path):
    program = tmp_path / "empty"
    program.touch(0o700)
    made = bench(program=str(program))
    made.table.guard = []  # without one, Popen itself meets the error
    ports = sorted(made.table.pool.free)
    error = made.failed("app.test")
    assert error.kind == "failed" and "Exec format error" in str(error)
    assert made.table.failures == {} and made.table.children == {}
    assert sorted(made.table.pool.free + [port for _, port in made.table.pool.resting]) == ports


@both
def test_no_descriptors_left_is_no_failure_of_the_name(bench):
    made = bench()
    future = made.ask("app.test")
    wait_until(lambda: made.table.tunnels)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno() + 1, hard))
        try:
            made.table.step()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    error = made.outcome(future)
    assert error.kind == "failed" and "Too many open files" in str(error)
    assert made.table.failures == {}
    made.ready("app.test")


@both
@pytest.mark.parametrize("calls", [1, 2])
def test_a_child_that_cannot_be_watched_is_not_left_behind(calls, bench, monkeypatch):
    made = bench()
    register = made.table.selector.register

    def full(*args: object) -> object:
        nonlocal calls
        calls -= 1
        if not calls:
            raise OSError(28, "No space left on device")
        return register(*args)

    monkeypatch.setattr(made.table.selector, "register", full)
    error = made.failed("app.test")
    assert "No space left" in str(error)
    assert made.table.children == {} and made.table.failures == {}
    assert len(made.table.selector.get_map()) == 1, "its own wake pipe"
    made.ready("app.test")


def test_the_reaper_outlives_an_operating_system_error(bench, monkeypatch, caplog):
    real, errors = sniroute_tunnels.listens, [OSError(24, "Too many open files")] * 2

    def listens(*args: int) -> str:
        if errors:
            raise errors.pop()
        return real(*args)

    monkeypatch.setattr(sniroute_tunnels, "listens", listens)
    bench(live=True).ready("app.test")
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "tunnels: [Errno 24] Too many open files"] * 2


# -- leases, idle stop, eviction ---------------------------------------------------------------


@both
def test_an_idle_tunnel_is_stopped_by_the_clock(bench):
    made = bench(idle=300)
    made.leased("used.test")
    made.ready("idle.test")
    made.clock.jump(299)
    made.table.step()
    assert made.states() == {"used.test": READY, "idle.test": READY}
    made.clock.jump(1)
    made.turn(lambda: len(made.table.children) == 1)
    assert made.states() == {"used.test": READY}
    assert made.table.counters["idle_stops"] == 1


def test_an_idle_tunnel_that_somebody_waits_for_is_not_stopped(bench):
    made = bench(idle=300)
    tunnel = made.ready("app.test")
    with made.table.lock:
        tunnel.waiters += 1  # a thread on its way out of wait(), say
    made.clock.jump(1000)
    made.table.step()
    assert tunnel.state is READY
    with made.table.lock:
        tunnel.waiters -= 1
    made.turn(lambda: not made.table.tunnels)


def test_a_release_starts_the_idle_time_anew(bench):
    made = bench(idle=300)
    tunnel = made.leased("app.test")
    made.clock.jump(1000)
    made.table.release(tunnel)
    made.table.step()
    assert tunnel.state is READY
    made.clock.jump(300)
    made.turn(lambda: not made.table.tunnels)


@both
def test_the_reaper_wakes_for_an_idle_tunnel_by_itself(bench):
    made = bench(live=True, idle=0.3)
    tunnel = made.leased("app.test")
    started = time.monotonic()
    made.table.release(tunnel)
    wait_until(lambda: not made.table.tunnels, timeout=5)
    assert time.monotonic() - started >= 0.3


def test_a_very_long_idle_time_does_not_end_the_reaper(bench):
    """The system call behind the selector takes no more than 24 days."""
    made = bench(live=True, idle=1e9)
    made.ready("a.test")
    made.ready("b.test")
    assert made.table.reaper.is_alive()


@both
def test_all_tunnels_in_use_is_a_limit(bench, cloudflared):
    made = bench(max_tunnels=2)
    made.leased("a.test")
    tunnel = made.leased("b.test")
    with pytest.raises(TunnelError, match="all 2 tunnels are in use: raise --max-tunnels") as caught:
        made.table.wait("cf:c.test", None, made.clock() + 60)
    assert caught.value.kind == "limit"
    assert len(cloudflared.starts()) == 2
    made.table.release(tunnel)
    made.clock.jump(sniroute_tunnels.EVICT_AGE)
    made.ready("c.test")
    assert made.states() == {"a.test": READY, "c.test": READY}


@both
@pytest.mark.parametrize("options", [dict(max_tunnels=3), dict(count=3)], ids=["tunnels", "ports"])
def test_the_longest_idle_tunnel_makes_room(options, bench):
    made = bench(**options)
    for name in ("a.test", "b.test", "c.test"):
        made.leased(name)
    for name in ("b.test", "a.test", "c.test"):
        made.clock.jump(2)
        made.table.release(made.table.tunnels[f"cf:{name}"])
    future = made.ask("d.test")
    made.turn(lambda: "b.test" not in made.states())
    made.clock.jump(sniroute_tunnels.QUARANTINE)
    assert made.outcome(future) is None
    assert made.states() == {"a.test": READY, "c.test": READY, "d.test": READY}
    assert made.table.counters["evictions"] == 1


def test_a_fresh_tunnel_is_not_evicted(bench):
    made = bench(max_tunnels=1)
    made.ready("a.test")
    future = made.ask("b.test")
    made.turn(lambda: "b.test" in made.states())
    made.table.step()
    assert made.states() == {"a.test": READY, "b.test": QUEUED}
    made.clock.jump(sniroute_tunnels.EVICT_AGE)
    assert made.outcome(future) is None
    assert made.states() == {"b.test": READY}


def test_the_reaper_evicts_by_itself_once_a_lease_is_released(bench):
    made = bench(live=True, max_tunnels=1)
    tunnel = made.ready("a.test")
    future = made.ask("b.test")
    wait_until(lambda: made.states().get("b.test") is QUEUED)  # asked for beside a leased one it were refused
    assert made.table.lease("cf:a.test") is tunnel
    for _ in range(2):  # it hears the second after a whole turn with the lease
        made.table.wake()
        wait_until(lambda: not select.select([made.table.wake_reader], [], [], 0)[0])
    assert made.states() == {"a.test": READY, "b.test": QUEUED}
    made.table.release(tunnel)
    assert future.result(10) is None
    assert made.states() == {"b.test": READY}


class Watched(Tunnel):
    """A tunnel that calls `hook` just before every look at, or change of, its state or leases."""

    __slots__ = ("hook",)

    def __init__(self, key: str, now: float, lock: threading.RLock):
        object.__setattr__(self, "hook", None)
        super().__init__(key, now, lock)

    def __getattribute__(self, name: str) -> Any:
        if name in ("state", "leases") and (hook := object.__getattribute__(self, "hook")):
            hook()
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("state", "leases") and (hook := object.__getattribute__(self, "hook")):
            hook()
        object.__setattr__(self, name, value)


def bare_tunnel(table: TunnelTable, kind: type[Tunnel] = Tunnel) -> Any:
    """A ready tunnel without a process, long idle."""
    tunnel = kind("cf:app.test", table.clock(), table.lock)
    tunnel.state = READY
    tunnel.last_used = table.clock() - table.idle
    table.tunnels = {tunnel.key: tunnel}
    return tunnel


def stopper(table: TunnelTable, tunnel: Tunnel, way: str) -> Callable[[], object]:
    """One way in which the other threads stop a tunnel that nobody uses."""
    if way == "idle":
        return lambda: table._decide(table.clock())
    if way == "eviction":
        def evict() -> None:
            with table.lock:
                table._evict(table.clock())
        return evict
    child = types.SimpleNamespace(alive=lambda: True, proven=True, ready=0.0, started=0.0, address=(HOST, 1))
    object.__setattr__(tunnel, "child", child)

    table.proc = False  # the child above listens nowhere

    def doubt() -> None:
        with table.lock:
            table._doubt(tunnel, child, None)
    return doubt


def watched(table: TunnelTable, way: str) -> tuple[Any, Callable[[], object]]:
    """A Watched tunnel, and what stops it."""
    tunnel = bare_tunnel(table, Watched)
    stop = stopper(table, tunnel, way)
    tunnel.child = getattr(tunnel, "child", None)
    return tunnel, stop


@pytest.mark.parametrize("inner", ["lease", "stop"])
@pytest.mark.parametrize("way", ["idle", "eviction", "doubt"])
def test_a_lease_at_the_instant_of_a_stop_wins_or_is_refused_at_every_interleaving(way, inner, bench):
    """One side runs whole between any two steps of the other; a tunnel is leased or stopped, never both."""
    table = bench().table
    seen = set()
    for at in range(1000):
        tunnel, stop = watched(table, way)
        got: list[Tunnel | None] = []

        def lease() -> None:
            got.append(table.lease("cf:app.test"))

        steps = at
        outer, between = (stop, lease) if inner == "lease" else (lease, stop)

        def hook() -> None:
            nonlocal steps
            if steps == 0:
                tunnel.hook = None
                between()
            steps -= 1

        tunnel.hook = hook
        try:
            outer()
        finally:
            table.tunnels = {}
        if tunnel.hook:  # it had fewer steps than that: all are done
            break
        assert tunnel.state in (READY, STOPPING)
        assert (got[0] is tunnel) == (tunnel.state is READY), f"step {at}"
        assert tunnel.leases == (got[0] is tunnel)
        seen.add(tunnel.state)
    assert at > 2
    assert seen == {READY, STOPPING}


@pytest.mark.parametrize("way", ["idle", "eviction", "doubt"])
def test_where_a_lease_and_a_stop_both_give_way_the_client_need_not_wait(way, bench):
    """The loop has seen the stop when the stop sees its lease.  Two cores do that by themselves now and then."""
    table = bench().table
    seen = set()
    for at in range(1000):
        tunnel, stop = watched(table, way)
        got: list[Tunnel | None] = []
        looked, go, looked_again, stopped = (threading.Event() for _ in range(4))
        loop = threading.Thread(target=lambda: (got.append(table.lease("cf:app.test")), looked_again.set()))
        pauses = {(loop, 1): (looked, go), (loop, 4): (looked_again, stopped),  # after each look at the state
                  (threading.current_thread(), at): (go, looked_again)}
        steps: collections.Counter[threading.Thread] = collections.Counter()

        def hook() -> None:
            me = threading.current_thread()
            reached, goes_on = pauses.get((me, steps[me]), (None, None))
            steps[me] += 1
            if reached is not None:
                reached.set()
                assert goes_on.wait(10)

        tunnel.hook = hook
        loop.start()
        assert looked.wait(10)
        stop()
        tunnel.hook = None
        ended = not go.is_set()  # it had fewer steps than that: all are done
        go.set()
        stopped.set()
        loop.join()
        if ended:
            break
        state, leases = tunnel.state, tunnel.leases
        assert leases == (got[0] is tunnel) and (got[0] is None or state is READY)
        if got[0] is None and state is READY:
            assert table.wait("cf:app.test", None, table.clock()) is None, "it is there: at once"
        seen.add((got[0] is tunnel, state))
    table.tunnels = {}
    assert (False, READY) in seen


def test_ten_thousand_leases_at_the_instant_of_an_idle_stop(bench):
    table = bench(idle=0).table
    barrier = threading.Barrier(2)
    interval = sys.getswitchinterval()
    rounds, outcomes = 10_000, set()

    def reap() -> None:
        for _ in range(rounds):
            barrier.wait()
            table._decide(table.clock())
            barrier.wait()

    reaper = threading.Thread(target=reap, name="reap")
    logging.getLogger("sniroute").setLevel(logging.ERROR)  # ten thousand lines otherwise
    sys.setswitchinterval(1e-6)
    reaper.start()
    try:
        for _ in range(rounds):
            tunnel = bare_tunnel(table)
            barrier.wait()
            got = table.lease("cf:app.test")
            barrier.wait()
            if got is None and tunnel.state is READY:  # both gave way
                got = table.lease("cf:app.test")
            assert (got is tunnel) == (tunnel.state is READY)
            assert tunnel.leases == (got is tunnel)
            outcomes.add(tunnel.state)
    finally:
        barrier.abort() if sys.exc_info()[0] else None
        sys.setswitchinterval(interval)
        logging.getLogger("sniroute").setLevel(logging.NOTSET)
        reaper.join()
    table.tunnels = {}
    assert outcomes <= {READY, STOPPING}


@both
def test_a_lease_holds_while_the_reaper_stops_all_that_is_idle(bench, cloudflared, echo_server):
    """The same race with processes: whoever has a lease gets an answer."""
    cloudflared.far("*", echo_server.address)
    made = bench(live=True, idle=0.001)
    answers = 0
    deadline = time.monotonic() + 30
    while answers < 15:
        assert time.monotonic() < deadline
        made.table.wait("cf:app.test", None, time.monotonic() + 30)
        tunnel = made.table.lease("cf:app.test")
        if tunnel is not None:
            assert ask(tunnel.child.address) == b"hello"
            answers += 1
            made.table.release(tunnel)


# -- crashes -----------------------------------------------------------------------------------


def crash(made: Bench, tunnel: Tunnel) -> float:
    """Kill the child of a tunnel in use; the pause before its next start."""
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGKILL)
    made.turn(lambda: tunnel.child is not child)
    assert tunnel.state is BACKOFF and tunnel.child is None
    return tunnel.until - made.clock()


@both
def test_a_tunnel_that_dies_in_use_comes_back_by_itself_later_and_later(bench):
    made = bench()
    tunnel = made.leased("app.test")
    for wait in (1, 2, 4, 8):
        assert crash(made, tunnel) == wait
        made.clock.jump(wait - 0.1)
        made.table.step()
        assert tunnel.state is BACKOFF
        made.clock.jump(0.1)
        made.turn(lambda: tunnel.state is READY)
    made.clock.jump(sniroute_tunnels.HEALTHY)
    assert crash(made, tunnel) == 1, "it was healthy for a minute"
    tunnel.crashes = 1000
    made.clock.jump(1)
    made.turn(lambda: tunnel.state is READY)
    assert crash(made, tunnel) == sniroute_tunnels.BACKOFF_LAST
    assert made.table.counters["crashes"] == 6


def test_the_reaper_wakes_for_a_tunnel_in_back_off_by_itself(bench):
    made = bench(live=True, jitter=lambda: 0.1)
    tunnel = made.leased("app.test")
    pid = tunnel.child.process.pid
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: tunnel.state is READY and tunnel.child.process.pid != pid)


def test_a_tunnel_that_dies_unused_is_forgotten(bench, cloudflared, caplog):
    made = bench()
    tunnel = made.ready("app.test")
    os.kill(tunnel.child.process.pid, signal.SIGTERM)
    made.turn(lambda: not made.table.tunnels)
    assert tunnel.state is FAILED
    assert ("tunnel ended", {"tunnel": "cf:app.test", "reason": "it ended (signal 15): Start Websocket listener",
                             "then": "the next client starts it again"}) in events(caplog)
    assert made.table.failures == {}
    made.ready("app.test")
    assert len(cloudflared.starts()) == 2


def test_nobody_waits_out_a_back_off_that_is_longer_than_the_deadline(bench):
    made = bench()
    tunnel = made.leased("app.test")
    assert crash(made, tunnel) == 1
    error = made.failed("app.test", timeout=0.5)
    assert error.kind == "timeout" and "it is backoff" in str(error)
    future = made.ask("app.test", timeout=60)
    made.turn(lambda: tunnel.waiters)
    made.clock.jump(1)
    assert made.outcome(future) is None


@both
def test_a_program_that_ends_at_its_first_client_says_why(bench, cloudflared, caplog):
    cloudflared.fault("app.test", exit_on_client=True, code=2, words="goroutine panic")
    made = bench()
    tunnel = made.leased("app.test")
    child = tunnel.child
    assert ask(child.address) == b""
    made.turn(lambda: tunnel.state is BACKOFF)
    assert ("tunnel ended", {"tunnel": "cf:app.test", "reason": "it ended (exit 2): goroutine panic",
                             "then": "starting it again in 1.0 s"}) in events(caplog)
    assert made.table.words(child, 0.0, 0).text == "it ended (exit 2): goroutine panic"


@both
def test_last_words_are_heard_when_the_end_is_noticed_first(bench, cloudflared):
    cloudflared.fault("app.test", exit_on_client=True, words="goroutine panic")
    made = bench()
    child = made.leased("app.test").child
    made.table.step()
    ask(child.address)
    wait_until(lambda: not child.alive())
    made.table._exited(child.process)
    assert child.verdict.text == "it ended (exit 1): goroutine panic"


@pytest.mark.parametrize("switches", [dict(exit_after=500), dict(exit_after_bytes=5)], ids=["time", "bytes"])
def test_a_program_that_ends_later_is_started_again(switches, bench, cloudflared, echo_server):
    cloudflared.fault("app.test", code=4, **switches)
    cloudflared.far("app.test", echo_server.address)
    made = bench()
    tunnel = made.leased("app.test")
    if "exit_after_bytes" in switches:
        ask(tunnel.child.address, b"hello")
    made.turn(lambda: tunnel.state is BACKOFF)
    cloudflared.fault("app.test")
    made.clock.jump(1)
    made.turn(lambda: tunnel.state is READY)


@both
def test_a_start_after_a_crash_that_fails_is_remembered(bench, cloudflared):
    made = bench()
    tunnel = made.leased("app.test")
    crash(made, tunnel)
    cloudflared.fault("app.test", exit=1)
    made.clock.jump(1)
    made.turn(lambda: not made.table.tunnels)
    assert tunnel.state is FAILED and "cf:app.test" in made.table.failures
    made.table.release(tunnel)  # its clients are gone by and by, which disturbs nobody


# -- doubt -------------------------------------------------------------------------------------


@both
def test_a_dead_child_that_is_doubted_is_started_again(bench):
    made = bench(jitter=lambda: 0.0)
    tunnel = made.ready("app.test")
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGKILL)
    wait_until(lambda: not child.alive())  # the reaper does not know yet
    future = made.ask("app.test", doubted=child)
    wait_until(lambda: tunnel.waiters)  # nor will it before somebody asks
    assert made.outcome(future) is None
    assert tunnel.state is READY and tunnel.child is not child


@both
def test_a_hung_child_is_started_again_even_when_others_hold_leases(bench):
    made = bench()
    tunnel = made.leased("app.test")
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGSTOP)
    with socket.create_connection(child.address):  # the kernel accepts it, the process does not
        future = made.ask("app.test", doubted=child)
        assert made.outcome(future) is None  # at once: it would not hear TERM
    assert tunnel.state is READY and tunnel.child is not child and tunnel.leases == 1


@pytest.mark.parametrize("backlog, hung", [
    pytest.param([1] * 10, True, id="one client stays"),
    pytest.param([1, 2, 3, 3, 4, 5, 6, 7, 8, 9], True, id="it grows"),
    pytest.param([0], False, id="nobody waits"),
    pytest.param([1, 0], False, id="it was only late"),
    pytest.param([1] * 9 + [0], False, id="it was very late"),
    pytest.param([5, 6, 4], False, id="it gets shorter"),
])
def test_a_backlog_that_never_gets_shorter_is_a_hung_process(backlog, hung, bench, monkeypatch):
    table = bench(proc=True).table
    rest = list(backlog)
    monkeypatch.setattr(sniroute_tunnels, "listeners", lambda port: {"7": rest.pop(0)})
    with table.lock:
        child = types.SimpleNamespace(address=(HOST, 1), process=types.SimpleNamespace(paused=-math.inf))
        assert table._hung(bare_tunnel(table), child) is hung
    assert rest == []


@shared
def test_a_shared_process_that_is_full_is_not_taken_for_a_hung_one(bench):
    """It says so: to kill it would cost the connections that fill it."""
    made = bench()
    tunnel = made.leased("app.test")
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGSTOP)
    with socket.create_connection(child.address):
        made.table._heard(child.process, b'{"event": "paused", "message": "not accepting for now"}')
        assert made.outcome(made.ask("app.test", doubted=child)) is None
        assert tunnel.child is child
        made.clock.jump(sniroute_tunnels.PAUSED)
        assert made.outcome(made.ask("app.test", doubted=child)) is None
        assert tunnel.child is not child


def test_a_busy_child_is_not_taken_for_a_hung_one(bench, cloudflared, echo_server):
    """Clients that come all the time are in the backlog now and then, but never stay there."""
    cloudflared.far("*", echo_server.address)
    made = bench(live=True)
    tunnel = made.leased("app.test")
    child = tunnel.child
    stop = threading.Event()

    def come() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                ask(child.address)

    clients = [threading.Thread(target=come, name="client") for _ in range(2)]
    for client in clients:
        client.start()
    try:
        for _ in range(5):
            made.table.wait("cf:app.test", None, time.monotonic() + 10, child)
            assert tunnel.child is child
    finally:
        stop.set()
        for client in clients:
            client.join()


@both
def test_a_live_child_that_serves_others_is_left_alone(bench):
    made = bench()
    tunnel = made.leased("app.test")
    made.clock.jump(100_000)
    assert not made.doubt(tunnel)


def test_doubt_restarts_an_unused_child_only_from_a_growing_age_on(bench):
    made = bench(idle=1e6)
    tunnel = made.ready("app.test")
    for age in (5, 10, 20):
        made.clock.jump(age - 0.5)
        assert not made.doubt(tunnel), f"fresh: {age - 0.5} s"
        made.clock.jump(0.5)
        assert made.doubt(tunnel), f"old: {age} s"
    tunnel.doubts = 1000
    made.clock.jump(299)
    assert not made.doubt(tunnel)
    made.clock.jump(1)
    assert made.doubt(tunnel)
    tunnel.child.proven = True  # a byte came through: what fails now is hardly the process
    made.clock.jump(299)
    assert not made.doubt(tunnel)
    made.clock.jump(1)
    assert made.doubt(tunnel)
    assert tunnel.doubts == 1, "the old doubts were about something else"


@linux
@both
def test_child_that_is_dying_is_not_taken_for_one_that_serves_others(bench, monkeypatch):
    """Its clients see the end of their connections before the kernel says that it has ended."""
    made = bench(idle=1e6, jitter=lambda: 0.0)
    tunnel = made.leased("app.test")
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGKILL)
    wait_until(lambda: not sniroute_tunnels.listeners(child.address[1]))
    monkeypatch.setattr(os, "waitid", lambda *_: None)  # its parent has not been told yet
    future = made.ask("app.test", doubted=child)
    assert made.outcome(future) is None
    assert tunnel.child is not child and tunnel.state is READY
    made.table.release(tunnel)


def test_descriptors_that_run_out_do_not_make_a_good_child_look_bad(bench, monkeypatch):
    """Then nothing can be read of it, which is our trouble and not its."""
    made = bench(idle=1e6)
    tunnel = made.leased("app.test")
    child = tunnel.child
    monkeypatch.setattr(sniroute_tunnels, "STOP_GRACE", 0.1)
    with monkeypatch.context() as patch:
        def none_left(path, *_, **__):
            raise OSError(24, "Too many open files", path)
        patch.setattr(sniroute_tunnels, "open", none_left, raising=False)
        made.ready("app.test", doubted=child)
    assert tunnel.child is child and tunnel.state is READY
    made.table.release(tunnel)


def test_restart_for_doubt_is_charged_to_the_client(bench):
    """A client can make a good tunnel look bad; it cannot do so for ever."""
    made = bench(idle=1e6)
    tunnel = made.ready("app.test")
    made.clock.jump(1000)
    made.table.budget.buckets["192.0.2.1"] = (0.0, made.clock())
    child = tunnel.child
    made.ready("app.test", client="192.0.2.1", doubted=child)
    assert tunnel.child is child
    made.ready("app.test", client="192.0.2.2", doubted=child)
    assert tunnel.child is not child


@both
def test_child_that_ends_while_it_is_doubted_leaves_no_row_behind(bench):
    """The doubt sets STOPPING between the exit and the reaper's look at the state."""
    made = bench(idle=1e6)
    tunnel = made.leased("app.test")
    child = tunnel.child
    give = made.table.pool.give

    def doubt_then_give(*port):
        with made.table.lock:
            made.table._enter(tunnel, STOPPING)
        give(*port)

    made.table.pool.give = doubt_then_give
    os.kill(child.process.pid, signal.SIGKILL)
    wait_until(lambda: made.table.step() or tunnel.child is None)
    assert made.table.snapshot() == []
    made.table.release(tunnel)
    made.table.pool.give = give
    assert made.ready("app.test").child is not child


@pytest.mark.parametrize("change", ["removed", "opened", "replaced"])
def test_home_that_is_no_longer_ours_is_made_anew(bench, tmp_path, change):
    made = bench()
    made.ready("one.test")
    home = pathlib.Path(made.table.home)
    if change == "opened":
        home.chmod(0o777)
    else:
        shutil.rmtree(home)
    if change == "replaced":
        home.symlink_to(tmp_path)
    made.ready("two.test")
    assert made.table.home != str(home)
    shutil.rmtree(home) if change == "opened" else home.unlink(missing_ok=True)


def test_doubt_of_an_earlier_child_does_nothing(bench):
    made = bench(idle=1e6)
    tunnel = made.ready("app.test")
    old = tunnel.child
    made.clock.jump(5)
    assert made.doubt(tunnel)
    made.clock.jump(100)
    child = tunnel.child
    made.ready("app.test", doubted=old)
    assert tunnel.child is child


@both
def test_clients_that_doubt_together_cause_one_restart(bench, cloudflared):
    made = bench(idle=1e6)
    tunnel = made.ready("app.test")
    made.clock.jump(5)
    futures = [made.ask("app.test", doubted=tunnel.child) for _ in range(20)]
    assert all(made.outcome(future) is None for future in futures)
    assert len(cloudflared.starts()) == 2


@both
def test_doubt_during_close_ends_at_once(bench):
    made = bench(live=True)
    tunnel = made.leased("app.test")
    child = tunnel.child
    os.kill(child.process.pid, signal.SIGSTOP)
    with socket.create_connection(child.address):
        future = made.ask("app.test", doubted=child)
        wait_until(lambda: tunnel.waiters)
        made.table.close(now=True)
        error = made.outcome(future)
    assert error is None or error.kind == "stopping"


# -- stopping ----------------------------------------------------------------------------------


@both
def test_close_leaves_no_child_and_releases_all_who_wait(bench, cloudflared):
    cloudflared.fault("slow.test", never_listen=True)
    made = bench(live=True, max_starting=1)
    made.leased("used.test")
    made.ready("idle.test")
    waiting = [made.ask("slow.test"), made.ask("queued.test"), made.ask("slow.test")]
    wait_until(lambda: len(cloudflared.starts()) == 3 and "queued.test" in made.states())
    started = time.monotonic()
    made.table.close()
    assert time.monotonic() - started < sniroute_tunnels.STOP_GRACE, "TERM is enough"
    for future in waiting:
        error = made.outcome(future)
        assert (error.kind, str(error)) == ("stopping", "sniroute is stopping")
    assert made.table.children == {} and own_children() == set()
    assert not any(runs(start["pid"]) for start in cloudflared.starts())
    with pytest.raises(TunnelError, match="sniroute is stopping"):
        made.table.wait("cf:more.test", None, time.monotonic() + 10)
    made.table.close()  # again: it has ended
    made.table.wake()


def test_close_without_any_tunnel_returns(bench):
    bench(live=True).table.close()


@both
@pytest.mark.parametrize("moment", ["queued", "claimed", "launched", "in back-off"])
def test_close_during_a_launch_leaves_no_process(moment, bench, cloudflared, monkeypatch):
    cloudflared.fault("app.test", listen_delay=0 if moment == "in back-off" else 60_000)
    made = bench()
    table = made.table
    if moment == "in back-off":
        crash(made, made.leased("app.test"))
    future = made.ask("app.test")
    wait_until(lambda: table.tunnels and table.tunnels["cf:app.test"].waiters)
    if moment == "claimed":
        spawn = table._spawn
        monkeypatch.setattr(table, "_spawn", lambda *args: setattr(table, "closing", "drain") or spawn(*args))
        table.step()
        assert len(table.children) == 1
    elif moment == "launched":
        made.turn(cloudflared.starts)
    table.start()
    table.close()
    assert made.outcome(future).kind == "stopping"
    assert table.children == {} and own_children() == set()


@both
def test_a_child_that_ignores_term_is_killed_after_the_grace(bench, cloudflared):
    cloudflared.fault("app.test", ignore_term=True)
    made = bench()
    tunnel = made.ready("app.test")
    child = tunnel.child
    made.clock.jump(made.table.idle)
    made.table.step()
    made.clock.jump(sniroute_tunnels.STOP_GRACE - 0.1)
    made.table.step(0.05)
    assert tunnel.state is STOPPING and child.process.alive() and not child.process.killed
    made.clock.jump(0.1)
    made.turn(lambda: not made.table.children)
    assert child.process.popen.returncode == -signal.SIGKILL


@both
def test_close_kills_what_ignores_term_and_at_once_when_hurried(bench, cloudflared, monkeypatch):
    monkeypatch.setattr(sniroute_tunnels, "STOP_GRACE", 30.0)
    cloudflared.fault("*", ignore_term=True)
    made = bench(live=True)
    made.ready("a.test")
    made.ready("b.test")
    closer = threading.Thread(target=made.table.close, name="close")
    closer.start()
    wait_until(lambda: all(process.kill_at for process in made.table.processes))
    assert set(made.states().values()) == {STOPPING}
    started = time.monotonic()
    made.table.close(now=True)
    closer.join()
    assert time.monotonic() - started < 5
    assert own_children() == set()


@both
def test_close_now_does_not_wait_for_term(bench, cloudflared):
    cloudflared.fault("app.test", ignore_term=True)
    made = bench(live=True)
    made.ready("app.test")
    started = time.monotonic()
    made.table.close(now=True)
    assert time.monotonic() - started < sniroute_tunnels.STOP_GRACE


@both
def test_a_client_that_comes_while_a_tunnel_stops_has_it_started_again(bench, cloudflared):
    cloudflared.fault("app.test", ignore_term=True)
    made = bench()
    tunnel = made.ready("app.test")
    made.clock.jump(made.table.idle)
    made.table.step()
    assert tunnel.state is STOPPING and made.table.lease("cf:app.test") is None
    future = made.ask("app.test", timeout=1000)
    wait_until(lambda: tunnel.waiters)
    made.clock.jump(sniroute_tunnels.STOP_GRACE)
    assert made.outcome(future) is None
    assert len(cloudflared.starts()) == 2


@both
def test_a_child_that_does_not_die_is_given_up(bench, monkeypatch, caplog):
    monkeypatch.setattr(sniroute_tunnels.Process, "signal", lambda *_: None)  # as one that hangs in the kernel
    made = bench()
    tunnel = made.ready("app.test")
    child = tunnel.child
    try:
        made.clock.jump(made.table.idle)
        made.table.step()
        made.clock.jump(sniroute_tunnels.STOP_GRACE)
        made.table.step()
        assert child.process.killed and tunnel.state is STOPPING
        made.clock.jump(sniroute_tunnels.KILL_GRACE)
        made.table.step()
        assert made.table.children == {} and made.table.tunnels == {}
        assert f"process {child.process.pid} does not die" in caplog.text
    finally:
        child.process.popen.kill()
        child.process.popen.wait()


# -- shared processes --------------------------------------------------------------------------


def pids(*tunnels: Tunnel) -> set[int]:
    return {tunnel.child.process.pid for tunnel in tunnels}


def fill(process: sniroute_tunnels.Process) -> None:
    """Write to a stopped process until its stdin takes no more."""
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(process.popen.stdin.fileno(), b"\n" * 4096)


def event(child: sniroute_tunnels.Child, event: str, **fields: Any) -> bytes:
    """A line that concerns a child's listener."""
    return json.dumps({"level": "info", "event": event, "listener": child.listener, **fields}).encode()


@shared
def test_sixteen_names_share_a_process_and_the_next_has_another(bench, cloudflared):
    made = bench(max_starting=20)
    names = [f"{number}.test" for number in range(17)]
    assert [made.outcome(future) for future in [made.ask(name) for name in names]] == [None] * 17
    sizes = sorted(len(process.children) for process in made.table.processes)
    assert sizes == [1, 16] and sniroute_tunnels.CARRIES == 16
    assert (made.table.counters["starts"], made.table.counters["processes"]) == (17, 2)
    assert {row[4] for row in made.table.snapshot()} == {start["pid"] for start in cloudflared.starts()}
    full = next(process for process in made.table.processes if len(process.children) == 16)
    leaver, = [made.table.children[child] for child in list(full.children.values())[:1]]
    for name in names:
        if made.table.tunnels[f"cf:{name}"] is not leaver:
            made.table.lease(f"cf:{name}")
    made.clock.jump(made.table.idle)
    made.turn(lambda: leaver.state is FAILED)
    assert made.ready("more.test").child.process is full, "there is room again"
    assert made.table.counters["processes"] == 2


@shared
def test_schemes_with_the_same_launcher_share_processes(bench):
    table = bench(live=True).table
    for key in ("cf:app.test", "too:app.test"):
        table.wait(key, None, time.monotonic() + 30)
    assert len(table.tunnels) == 2 and len(table.processes) == 1


@shared
def test_two_clients_that_come_at_the_same_instant_share_one_new_process(bench):
    table = bench(live=True).table
    barrier = threading.Barrier(2)

    def come(name: str) -> None:
        barrier.wait()
        table.wait(f"cf:{name}", None, time.monotonic() + 30)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(come, name) for name in ("a.test", "b.test")]:
            future.result()
    assert (table.counters["starts"], table.counters["processes"]) == (2, 1)


@shared
def test_all_that_a_dead_process_carried_comes_back_in_one_new_process(bench):
    made = bench()
    tunnels = [made.leased(f"{number}.test") for number in range(5)]
    unused = made.ready("unused.test")
    old, = pids(*tunnels, unused)
    os.kill(old, signal.SIGKILL)
    made.turn(lambda: not made.table.processes)
    assert {tunnel.state for tunnel in tunnels} == {BACKOFF} and unused.state is FAILED
    assert made.table.counters["crashes"] == 6 and made.table.failures == {}
    made.clock.jump(1)
    made.turn(lambda: all(tunnel.state is READY for tunnel in tunnels))
    assert len(pids(*tunnels)) == 1 and pids(*tunnels) != {old}
    assert [tunnel.leases for tunnel in tunnels] == [1] * 5
    assert made.table.counters["processes"] == 2


@shared
def test_closing_one_name_leaves_the_connections_of_the_others(bench, cloudflared, echo_server):
    cloudflared.far("*", echo_server.address)
    made = bench()
    used, idle = made.leased("used.test"), made.ready("idle.test")
    child = idle.child
    with socket.create_connection(used.child.address, 10) as client, \
            socket.create_connection(child.address, 10) as other:
        client.sendall(b"a")
        other.sendall(b"a")
        assert client.recv(1) == other.recv(1) == b"a"
        made.clock.jump(made.table.idle)
        made.turn(lambda: idle.state is FAILED)
        assert other.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(child.address).close()
        client.sendall(b"b")
        assert client.recv(1) == b"b"
    assert not child.alive() and used.child.alive() and used.state is READY
    assert child.address[1] in [port for _, port in made.table.pool.resting]


@shared
def test_a_listener_is_no_longer_its_own_before_anybody_tells_it_to_close(bench, monkeypatch):
    """The process lives on, and a stranger may have the port before the answer is read."""
    made = bench()
    made.leased("used.test")
    child = made.ready("idle.test").child
    told, tell = [], sniroute_tunnels.Process.tell

    def watched(process: sniroute_tunnels.Process, words: str) -> None:
        told.append((words, child.alive(), process.alive()))
        tell(process, words)

    monkeypatch.setattr(sniroute_tunnels.Process, "tell", watched)
    assert child.alive()
    made.clock.jump(made.table.idle)
    made.turn(lambda: child not in made.table.children)
    assert told == [(f"close {child.listener}", False, True)]


@shared
def test_the_process_ends_with_its_last_name(bench):
    made = bench()
    first, second = made.leased("a.test"), made.ready("b.test")
    process = second.child.process
    made.clock.jump(made.table.idle)
    made.turn(lambda: second.state is FAILED)
    assert process.alive() and not process.kill_at
    made.table.release(first)
    made.clock.jump(made.table.idle)
    made.turn(lambda: not made.table.processes)
    assert process.popen.returncode == -signal.SIGTERM


@shared
def test_the_process_ends_where_all_that_is_left_is_to_close(bench, cloudflared):
    cloudflared.fault("a.test", ignore_close=True)
    cloudflared.fault("b.test", never_listen=True)
    made = bench(start_timeout=1000)
    closing = made.ready("a.test").child
    future = made.ask("b.test", timeout=1000)
    made.turn(lambda: cloudflared.starts("b.test"))
    made.clock.jump(made.table.idle)
    made.table.step()
    assert closing.close_at and not closing.process.kill_at
    other = made.table.tunnels["cf:b.test"].child
    made.table._heard(other.process, event(other, "closed", error="permission denied"))
    assert "permission denied" in str(made.outcome(future))
    made.turn(lambda: not made.table.processes)
    assert closing.process.popen.returncode == -signal.SIGTERM


@shared
def test_the_process_of_a_name_that_does_not_start_ends_too(bench, cloudflared):
    cloudflared.fault("app.test", never_listen=True)
    made = bench()
    future = made.ask("app.test")
    made.turn(cloudflared.starts)
    child = made.table.tunnels["cf:app.test"].child
    made.table._heard(child.process, event(child, "closed", message="cannot listen", error="permission denied"))
    assert str(made.outcome(future)) == "cf:app.test did not start: cannot listen: permission denied"
    assert "cf:app.test" in made.table.failures
    made.turn(lambda: not made.table.processes)


@shared
def test_the_process_of_a_name_that_tries_another_port_is_kept(bench, cloudflared):
    cloudflared.fault("app.test", in_use=2)
    made = bench()
    made.ready("app.test")
    assert (made.table.counters["starts"], made.table.counters["processes"]) == (3, 1)


@shared
def test_a_process_that_is_to_end_takes_no_new_name(bench, cloudflared):
    cloudflared.fault("a.test", ignore_term=True)
    made = bench()
    old = made.ready("a.test").child.process
    made.clock.jump(made.table.idle)
    made.table.step()
    assert old.kill_at and old.alive()
    assert made.ready("b.test").child.process is not old


@shared
def test_a_process_that_does_not_close_is_killed_and_the_others_come_back(bench, cloudflared, caplog):
    cloudflared.fault("deaf.test", ignore_close=True)
    made = bench()
    used, deaf = made.leased("used.test"), made.ready("deaf.test")
    process = deaf.child.process
    made.clock.jump(made.table.idle)
    made.table.step()
    assert deaf.state is STOPPING
    made.clock.jump(sniroute_tunnels.STOP_GRACE - 0.1)
    made.table.step(0.05)
    assert not process.killed
    made.clock.jump(0.1)
    made.turn(lambda: process not in made.table.processes)
    assert deaf.state is FAILED and used.state is BACKOFF
    assert "it did not close 127.0.0.1:" in str(events(caplog))
    made.clock.jump(1)
    made.turn(lambda: used.state is READY)


@shared
def test_a_stopped_process_is_found_hung_and_all_its_names_come_back(bench):
    made = bench(live=True, jitter=lambda: 0.0)
    tunnels = [made.leased("a.test"), made.leased("b.test")]
    child = tunnels[0].child
    os.kill(child.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with socket.create_connection(child.address):  # the kernel accepts it, the process does not
        assert made.outcome(made.ask("a.test", doubted=child)) is None
    made.turn(lambda: all(tunnel.state is READY and tunnel.child.alive() for tunnel in tunnels))
    assert len(pids(*tunnels)) == 1 and pids(*tunnels) != {child.process.pid}
    assert time.monotonic() - started < sniroute_tunnels.STOP_GRACE, "TERM is not waited for"


@shared
def test_doubt_of_one_name_opens_its_listener_anew_and_no_other(bench):
    made = bench(idle=1e6)
    tunnel, other = made.ready("a.test"), made.ready("b.test")
    process, port, child = tunnel.child.process, tunnel.child.address[1], other.child
    made.clock.jump(5)
    assert made.doubt(tunnel)
    assert tunnel.child.process is process and tunnel.child.address[1] != port
    assert other.child is child and child.alive() and made.table.counters["processes"] == 1


@shared
def test_a_listener_that_closes_by_itself_is_a_crash_of_that_name(bench):
    made = bench()
    tunnel, other = made.leased("a.test"), made.leased("b.test")
    child = tunnel.child
    made.table._heard(child.process, event(child, "closed", message="closed", error="bad luck"))
    assert tunnel.state is BACKOFF and tunnel.child is None and other.child.alive()
    assert made.table.words(child, 0.0, 1) == ("failed", "closed: bad luck", False)


@shared
def test_a_start_that_is_never_answered_kills_the_process_and_begins_anew(bench, cloudflared, caplog):
    cloudflared.fault("new.test", never_listen=True)
    made = bench()
    used = made.leased("used.test")
    process = used.child.process
    future = made.ask("new.test", timeout=1000)
    made.turn(lambda: cloudflared.starts("new.test"))
    cloudflared.fault("new.test")
    made.clock.jump(15)  # start_timeout
    assert made.outcome(future) is None
    assert process not in made.table.processes and made.table.failures == {}
    assert "it did not listen within 15 s" in str(events(caplog))
    made.clock.jump(1)
    made.turn(lambda: used.state is READY)


@shared
def test_a_name_is_not_to_blame_for_a_process_that_dies_while_it_starts(bench, cloudflared):
    cloudflared.fault("new.test", never_listen=True)
    made = bench()
    used = made.leased("used.test")
    future = made.ask("new.test", timeout=1000)
    made.turn(lambda: cloudflared.starts("new.test"))
    cloudflared.fault("new.test")
    os.kill(used.child.process.pid, signal.SIGKILL)
    assert made.outcome(future) is None
    assert made.table.failures == {} and made.table.counters["failures"] == 0


@shared
def test_a_name_that_kills_every_process_is_found_out_in_one_of_its_own(bench, cloudflared):
    cloudflared.fault("evil.test", exit=1, words="assertion failed")
    made = bench()
    used = made.leased("used.test")
    error = made.failed("evil.test")
    assert str(error) == "cf:evil.test did not start: it ended (exit 1): assertion failed"
    assert len(cloudflared.starts("evil.test")) == 2 and "cf:evil.test" in made.table.failures
    made.clock.jump(1)
    made.turn(lambda: used.state is READY)


@shared
@pytest.mark.parametrize("order", ["close", "listen"])
def test_a_process_that_reads_no_orders_is_killed(order, bench, caplog):
    made = bench()
    used, idle = made.leased("used.test"), made.ready("idle.test")
    process = used.child.process
    os.kill(process.pid, signal.SIGSTOP)
    fill(process)
    if order == "close":
        made.clock.jump(made.table.idle)
        made.turn(lambda: idle.state is FAILED)
    else:
        made.ready("new.test")
        assert made.table.failures == {}
    assert process not in made.table.processes
    killed = [fields for what, fields in events(caplog) if what == "process killed"]
    assert [fields["pid"] for fields in killed] == [process.pid] and "it takes no orders" in killed[0]["reason"]
    made.clock.jump(1)
    made.turn(lambda: used.state is READY)


@shared
def test_what_ended_by_itself_was_not_killed(bench, cloudflared, caplog):
    """Its stdin breaks an instant before its end is known."""
    cloudflared.fault("used.test", exit_on_client=True, code=3, words="bad luck")
    made = bench()
    used, idle = made.leased("used.test"), made.ready("idle.test")
    ask(used.child.address)
    process = used.child.process
    wait_until(lambda: not runs(process.pid))
    process.tell("close 127.0.0.1:1")
    assert process.verdict.startswith("it takes no orders")
    made.turn(lambda: not made.table.processes)
    assert used.state is BACKOFF and idle.state is FAILED
    assert ("cf:used.test", "it ended (exit 3): bad luck") in [
        (fields["tunnel"], fields["reason"]) for what, fields in events(caplog) if what == "tunnel ended"]


@shared
def test_fifty_clients_that_fail_together_have_each_its_own_reason(bench, cloudflared):
    words = {"a.test": "denied", "b.test": "name", "c.test": "down", "d.test": "certificate", "e.test": "timeout"}
    for name, word in words.items():
        cloudflared.fault(name, refuse=True, reason=word, error=f"{word} of {name}")
    made = bench(live=True)
    children = {name: made.ready(name).child for name in words}
    assert len(made.table.processes) == 1

    def come(name: str) -> tuple[str, int]:
        with socket.create_connection(children[name].address, 10) as client:
            port = port_of(client)
            assert client.recv(1) == b""
        return name, port

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        came = list(pool.map(come, [name for name in words for _ in range(10)]))
    for name, port in came:
        wait_until(lambda: made.table.words(children[name], 0.0, port).text)
        kind_of, final = sniroute_tunnels.CARRIER_REASONS.get(words[name], ("failed", False))
        reason = (kind_of, f"failed to connect to origin: {words[name]} of {name}", final)
        assert made.table.words(children[name], 0.0, port) == reason
    name, port = came[0]
    assert made.table.words(children[name], time.monotonic(), port).text == "", "it was an earlier client"
    os.kill(children[name].process.pid, signal.SIGKILL)
    wait_until(lambda: not made.table.children)
    assert made.table.words(children[name], 0.0, port).text.endswith(f"denied of {name}")
    assert made.table.words(children[name], 0.0, 1).text == "it ended (signal 9)", "no other client's words"


@shared
def test_remembered_refusals_are_bounded(bench, monkeypatch):
    monkeypatch.setattr(sniroute_tunnels, "REFUSALS_KEPT", 3)
    made = bench()
    child = made.ready("app.test").child
    for number, port in enumerate((1, 2, 3, 1, 4)):
        line = event(child, "failed", client=f"{HOST}:{port}", reason="down", error=str(number))
        made.table._heard(child.process, line)
    assert [made.table.words(child, 0.0, port).text for port in (1, 2, 3, 4)] == ["3", "", "2", "4"]


@shared
@pytest.mark.parametrize("size", [7, 65536])
def test_output_of_any_shape_is_understood_or_kept_in_bounds(size, bench):
    made = bench()
    child = made.ready("app.test").child
    process, output = child.process, child.process.output
    text = b"".join(line + b"\n" for line in (
        b"", b"\xff\xfe", b"{", b'{"listener"', b'["listener"]', b'"listener"', b'{"listener": null}',
        b'{"listener": ["x"], "event": "closed"}', b'{"listener": "127.0.0.1:1", "event": "closed"}',
        event(child, "new"), event(child, "listening"), event(child, "failed"), event(child, "failed", client=[7]),
        b'{"listener": ' + b"[" * 5000, b'{"listener": ' + b"9" * 5000 + b"}",
        event(child, "closed", message="x" * sniroute_tunnels.LINE),  # longer than a line may be: it is cut
        event(child, "failed", client=f"{HOST}:7", reason="down", message="in between"),
        b"y" * 20_000, b"its last words")) + event(child, "closed")[:-1]  # half a line
    chunks = [text[at:at + size] for at in range(0, len(text), size)]

    class Chunks:
        closed, fileno, close = False, output.fileno, output.close

        def read(self, _: int) -> bytes:
            return chunks.pop(0)

    process.output = Chunks()
    while chunks:
        made.table._drain(process)
        assert len(process.tail) <= sniroute_tunnels.TAIL and len(process.line) <= sniroute_tunnels.LINE
    process.output = output
    assert made.table.words(child, 0.0, 7).text == "in between"
    assert sniroute_tunnels.last_words(process.tail) == "its last words"
    assert child in made.table.children and made.states() == {"app.test": READY}


def test_the_carrier_itself_opens_and_closes(cloudflared, free_ports):
    """The two sides of the protocol, but for what needs an edge."""
    launcher = sniroute_tunnels.carrier_launcher({})
    made = Bench(TunnelTable({"cf": launcher}, free_ports(), clock=FakeClock()), False)
    try:
        used, idle = made.leased("a.example.test"), made.ready("b.example.test")
        child = idle.child
        assert len(pids(used, idle)) == 1
        assert sniroute_tunnels.listens(used.child.process.pid, used.child.address[1]) == "own"
        made.clock.jump(made.table.idle)
        made.turn(lambda: idle.state is FAILED)
        assert used.child.alive() and not sniroute_tunnels.listeners(child.address[1])
        pool = made.table.pool
        with listening(min(pool.free)) as thief:
            pool.take = types.MethodType(lambda self: self.__dict__.pop("take") and port_of(thief), pool)
            made.ready("c.example.test")
        assert made.table.counters["starts"] == 4, "one of them found its port taken"
    finally:
        made.close()
    assert made.table.processes == []


# -- output ------------------------------------------------------------------------------------


@both
def test_a_chatty_child_does_not_block_and_only_its_end_is_kept(bench, cloudflared, echo_server, caplog):
    caplog.set_level(logging.DEBUG, "sniroute")
    cloudflared.fault("app.test", flood=20)
    cloudflared.far("app.test", echo_server.address)
    tunnel = bench(live=True).ready("app.test")
    assert ask(tunnel.child.address) == b"hello"  # it serves only when all is written
    wait_until(lambda: tunnel.child.process.tail.endswith(b"x\n"))
    assert len(tunnel.child.process.tail) == sniroute_tunnels.TAIL
    assert f"pid {tunnel.child.process.pid}: xxx" in caplog.text


def test_words_are_the_reason_for_the_last_refusal(bench, cloudflared, echo_server):
    cloudflared.far("app.test", echo_server.address)
    cloudflared.fault("app.test", refuse=1)
    made = bench(live=True)
    child = made.ready("app.test").child
    assert ask(child.address, b"") == b""
    wait_until(lambda: made.table.words(child, 0.0, 0).text.startswith("the edge refused it"))
    assert made.table.words(child, time.monotonic(), 0).text == "", "it has said nothing since"
    assert ask(child.address) == b"hello", "the second client is served"


def test_a_child_may_close_its_output(bench, tmp_path, cloudflared):
    program = tmp_path / "quiet"
    program.write_text(f'#!/bin/sh\nexec {cloudflared.path} "$@" >/dev/null 2>&1\n')
    program.chmod(0o700)
    made = bench(program=str(program))
    tunnel = made.ready("app.test")
    made.turn(lambda: tunnel.child.process.output.closed)
    assert tunnel.state is READY
    made.clock.jump(made.table.idle)
    made.turn(lambda: not made.table.children)


def test_an_output_that_fails_is_closed(bench, monkeypatch):
    made = bench()
    tunnel = made.ready("app.test")
    output = tunnel.child.process.output

    class Broken:
        closed = property(lambda self: output.closed)
        fileno, close = output.fileno, output.close

        def read(self, _: int) -> bytes:
            raise OSError(5, "Input/output error")

    tunnel.child.process.output = Broken()
    made.table._drain(tunnel.child.process)
    assert output.closed and tunnel.state is READY


@both
def test_a_snapshot_names_state_leases_port_and_pid(bench):
    made = bench(live=True)
    tunnel = made.leased("app.test")
    with pytest.raises(TunnelError):
        made.table.wait("cf:other.test", None, 0.0)
    rows = {row[0]: row[1:5] for row in made.table.snapshot()}
    assert rows["cf:app.test"] == (READY, 1, tunnel.child.address[1], tunnel.child.process.pid)
    assert rows.get("cf:other.test", ("queued", 0, 0, 0))[1] == 0


@both
def test_a_view_has_the_time_to_the_idle_stop_and_the_last_words(bench, cloudflared):
    made = bench()
    tunnel = made.ready("app.test")
    view = made.table.snapshot()[0]
    assert (view.key, view.state, view.leases, view.waiters, view.next) == ("cf:app.test", READY, 0, 0, 300.0)
    assert made.table.lease("cf:app.test") is tunnel
    made.clock.jump(7)
    assert (view := made.table.snapshot()[0]).age == 7.0 and view.next == 0.0 and view.leases == 1
    made.table.release(tunnel)
    assert made.table.failed() == []
    cloudflared.fault("evil.test", exit=1, words="goroutine panic")
    made.failed("evil.test")
    made.clock.jump(1)
    (failed,) = made.table.failed()
    assert (failed.key, failed.state, failed.crashes) == ("cf:evil.test", FAILED, 1)
    assert "evil.test did not start" in failed.words and "goroutine panic" in failed.words and 1 < failed.next < 5


@both
def test_starts_are_remembered_for_who_asks(bench):
    made = bench()
    made.ready("app.test")
    (start,) = made.table.started
    assert start.key == "cf:app.test" and start.seconds >= 0 and abs(start.when - time.time()) < 60


@both
def test_who_used_a_tunnel_last_says_how_long_it_may_idle(bench):
    made = bench()
    tunnel = made.leased("app.test")
    made.table.release(tunnel, 20.0)
    made.clock.jump(19)
    made.table.step()
    assert tunnel.state is READY and made.table.snapshot()[0].next == 1.0
    assert made.table.lease("cf:app.test") is tunnel
    made.table.release(tunnel, 400.0)
    made.clock.jump(399)
    made.table.step()
    assert tunnel.state is READY, "longer than the table's own"
    made.clock.jump(1)
    made.turn(lambda: not made.table.tunnels)


def test_a_shorter_idle_time_wakes_the_reaper(bench):
    made = bench(live=True)
    tunnel = made.leased("app.test")
    made.table.release(tunnel, 3600.0)
    assert made.table.lease("cf:app.test") is tunnel
    made.table.release(tunnel, 0.05)
    wait_until(lambda: not made.table.tunnels, timeout=2)


@both
def test_who_retires_keeps_no_tunnel_that_nobody_uses(bench):
    made = bench()
    used, unused = made.leased("used.test"), made.ready("unused.test")
    made.table.retiring = True
    made.turn(lambda: list(made.table.tunnels.values()) == [used])
    assert unused.state is FAILED and used.state is READY
    assert made.table._timeout(made.clock()) >= sniroute_tunnels.POLL_LAST, "it does not spin over what is in use"
    made.table.release(used)
    made.turn(lambda: not made.table.tunnels)


def test_a_cold_start_says_it_too(bench):
    made = bench()
    with contextlib.suppress(TunnelError):
        made.table.wait("cf:app.test", None, 0.0, None, 7.0)
    assert made.table.tunnels["cf:app.test"].idle == 7.0


@both
def test_an_operator_stops_a_tunnel_that_is_in_use(bench, cloudflared, echo_server):
    cloudflared.far("*", echo_server.address)
    made = bench()
    tunnel = made.leased("app.test")
    pid = tunnel.child.process.pid
    with socket.create_connection(tunnel.child.address, 10) as client:
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
        assert made.table.stop("cf:app.test")
        assert made.table.lease("cf:app.test") is None, "nobody new"
        made.turn(lambda: not made.table.tunnels)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    made.table.release(tunnel)
    made.turn(lambda: not runs(pid))
    made.ready("app.test")
    assert len(cloudflared.starts("app.test")) == 2


@both
def test_an_operator_stops_what_starts_and_what_waits(bench, cloudflared):
    cloudflared.fault("app.test", never_listen=True)
    made = bench(max_starting=1)
    starting = made.ask("app.test")
    made.turn(lambda: cloudflared.starts("app.test"))
    queued = made.ask("late.test")
    made.turn(lambda: made.states().get("late.test") == "queued")
    assert made.table.stop("cf:late.test")
    assert "was stopped" in str(made.outcome(queued))
    cloudflared.fault("app.test")
    assert made.table.stop("cf:app.test")
    assert made.outcome(starting) is None, "somebody waits for it: it is started again"
    assert len(cloudflared.starts("app.test")) == 2


@both
def test_a_stop_at_the_instant_of_ready_is_a_stop(bench):
    made = bench()
    future = made.ask("app.test")
    look = made.table._look

    def stop_first(child: Any, tunnel: Tunnel, now: float) -> None:
        alive = child.alive
        made.table._look = look
        if child.look_at != float("inf"):
            made.table.stop(tunnel.key)
        look(child, tunnel, now)
        assert tunnel.state == "stopping" and alive is not None

    made.table._look = stop_first
    assert made.outcome(future) is None, "it waits: so it is started again"
    assert made.table.counters["starts"] == 2 and made.table.counters["ready"] == 1


@both
def test_who_comes_after_a_stop_has_a_tunnel_of_its_own(bench):
    """The operator removes the row between the process's end and what becomes of it."""
    made = bench()
    tunnel = made.ready("app.test")
    crashed = made.table._crashed
    asked = []

    def stop_first(of: Tunnel, child: Any) -> None:
        made.table._crashed = crashed
        made.table.stop(of.key)
        asked.append(made.ask("app.test"))
        wait_until(lambda: made.table.tunnels.get("cf:app.test") not in (None, tunnel))
        crashed(of, child)

    made.table._crashed = stop_first
    os.kill(tunnel.child.process.pid, signal.SIGKILL)
    made.turn(lambda: asked)
    assert made.outcome(asked[0]) is None
    assert made.table.tunnels["cf:app.test"] is not tunnel


@both
def test_an_operator_may_have_a_failure_forgotten(bench, cloudflared):
    cloudflared.fault("app.test", exit=1)
    made = bench()
    made.failed("app.test")
    cloudflared.fault("app.test")
    assert "next try in" in str(made.failed("app.test"))
    assert made.table.stop("cf:app.test") and not made.table.stop("cf:app.test")
    made.ready("app.test")


# -- all together ------------------------------------------------------------------------------


@both
def test_random_ends_leave_no_zombie_and_lose_no_port(bench, cloudflared):
    dice = random.Random(20)
    made = bench(count=8, jitter=lambda: 0.0)
    table = made.table
    everything = sorted(table.pool.free)
    for _ in range(15):
        name = dice.choice(["a.test", "b.test", "c.test", "d.test"])
        tunnel = made.ready(name)
        child = tunnel.child
        leased = dice.random() < 0.5 and table.lease(tunnel.key)
        way = dice.choice(["kill", "term", "idle"])
        if way != "idle":
            os.kill(child.process.pid, signal.SIGKILL if way == "kill" else signal.SIGTERM)
        if leased:
            made.turn(lambda: way == "idle" or tunnel.child is not child and tunnel.state is READY)
            table.release(tunnel)
        if way == "idle":
            made.clock.jump(table.idle)
        made.turn(lambda: child not in table.children)
        made.clock.jump(0.5)
    made.clock.jump(table.idle)
    made.turn(lambda: not table.children)
    assert table.tunnels == {}
    assert sorted(table.pool.free + [port for _, port in table.pool.resting]) == everything
    assert own_children() == set()


def test_a_process_that_cannot_be_watched_is_not_used(bench, monkeypatch):
    """Without descriptors nobody can tell later whether its port is still its own."""
    real = os.open
    def exhausted(path: str, *rest: Any) -> int:
        if str(path).endswith("statm"):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *rest)
    made = bench()
    with monkeypatch.context() as patch:
        patch.setattr(sniroute_tunnels.os, "open", exhausted)
        future = made.ask("app.test")
        made.turn(lambda: future.done())
    assert "it cannot be watched (Too many open files)" in str(made.outcome(future))


@linux
@pytest.mark.parametrize("told_by", ["statm", "pidfd", "wait"])
def test_a_process_is_alive_until_it_ends_however_that_is_told(told_by, monkeypatch):
    real = os.open
    def no_proc(path: str, *rest: Any) -> int:
        if str(path).endswith("/statm"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return real(path, *rest)
    if told_by != "statm":
        monkeypatch.setattr(os, "open", no_proc)
    if told_by == "wait":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    launcher = sniroute_tunnels.cloudflared_launcher("cat", {})
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as popen:
        process = sniroute_tunnels.Process(launcher, popen)
        try:
            assert (process.statm >= 0, process.pidfd >= 0) == (told_by == "statm", told_by != "wait")
            assert process.alive()
            popen.stdin.close()
            wait_until(lambda: popen.poll() is not None if told_by == "wait" else not process.alive())
            assert not process.alive()
        finally:
            process.close()
            assert (process.statm, process.pidfd) == (-1, -1)


@both
def test_one_process_is_started_in_a_turn(bench, cloudflared):
    made = bench(max_starting=4)
    futures = [made.ask(f"app{number}.test") for number in range(3)]
    wait_until(lambda: len(made.table.tunnels) == 3)
    for count in range(1, 4):
        made.table.step()
        assert made.table.counters["starts"] == count
    made.turn(lambda: all(future.done() for future in futures))


@both
def test_without_pidfd_children_are_polled(bench, monkeypatch):
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    made = bench(live=True, idle=0.2, jitter=lambda: 0.0)
    tunnel = made.leased("app.test")
    child = tunnel.child
    assert child.process.pidfd == -1 and child.alive()
    os.kill(child.process.pid, signal.SIGKILL)
    wait_until(lambda: tunnel.state is READY and tunnel.child is not child)
    assert not child.alive()
    made.table.release(tunnel)
    wait_until(lambda: not made.table.tunnels)


def test_without_proc_a_start_counts_as_ready_and_doubt_is_patient(bench, cloudflared, echo_server):
    cloudflared.far("app.test", echo_server.address)
    made = bench(proc=False, idle=1e6)
    tunnel = made.ready("app.test")
    child = tunnel.child
    assert not made.doubt(tunnel), "perhaps it does not listen yet"

    def connected() -> bytes:
        try:
            return ask(child.address)
        except ConnectionRefusedError:
            return b""

    assert wait_until(connected) == b"hello"
    made.clock.jump(15)  # start_timeout
    assert made.doubt(tunnel)
    tunnel.child.proven = True
    made.clock.jump(300)
    assert made.doubt(tunnel), "it did listen: no patience"


def test_a_process_that_is_gone_is_not_alive_and_is_not_signalled():
    launcher = sniroute_tunnels.cloudflared_launcher("true", {})
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as popen:
        process = sniroute_tunnels.Process(launcher, popen)
        try:
            popen.wait()
            assert not process.alive()
            process.signal(signal.SIGKILL)  # its group has ended
        finally:
            process.close()


# -- the stand-in itself -----------------------------------------------------------------------


@pytest.mark.parametrize("words, code, says", [
    pytest.param(["access", "tcp", "--hostname", "a.test", "--no-autoupdate", "true"], 0, "USAGE", id="unknown flag"),
    pytest.param(["access", "tcp", "--url", "127.0.0.1:1"], 0, "USAGE", id="no hostname"),
    pytest.param(["access", "tcp", "--hostname", "a.test", "--url", ":1"], 1, "failed to start", id="bad listener"),
    pytest.param(["acess", "tcp", "--hostname", "a.test"], 99, "to the internet", id="misspelt command"),
    pytest.param(["--version"], 0, "cloudflared version", id="version"),
])
def test_the_stand_in_takes_wrong_usage_as_the_real_one_does(words, code, says, cloudflared):
    done = subprocess.run([cloudflared.path, *words], capture_output=True, text=True)
    assert done.returncode == code
    assert says in done.stdout + done.stderr


def test_the_stand_in_logs_before_it_fails_to_listen(cloudflared):
    with listening() as listener:
        words = ["access", "tcp", "--hostname", "a.test", "--url", f"127.0.0.1:{port_of(listener)}", "--loglevel=info"]
        done = subprocess.run([cloudflared.path, *words], capture_output=True, text=True,
                              env={"TUNNEL_LOG_OUTPUT": "json"})
    first, second, third = done.stderr.splitlines()
    assert done.returncode == 1
    assert json.loads(first)["message"] == "Start Websocket listener"
    assert json.loads(second)["error"].endswith("bind: address already in use")
    assert third.startswith("failed to start forwarding server")


def test_the_stand_in_flushes_and_ends_both_sides_at_the_first_end(bench, cloudflared, serve):
    far = serve(lambda sock: sum(iter(lambda: len(sock.recv(65536)), 0)))
    cloudflared.far("a.test", far.address)
    cloudflared.far("b.test", serve(lambda sock: sock.sendall(b"x" * 3_000_000)).address)
    made = bench(live=True)
    with socket.create_connection(made.ready("a.test").child.address, 10) as client:
        client.sendall(b"x" * 3_000_000)
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert far.result() == 3_000_000
    with socket.create_connection(made.ready("b.test").child.address, 10) as client:
        assert sum(iter(lambda: len(client.recv(65536)), 0)) == 3_000_000


def test_the_stand_in_dies_of_a_closed_log(cloudflared, free_ports):
    port = free_ports()[0]
    words = ["access", "tcp", "--hostname", "a.test", "--url", f"127.0.0.1:{port}"]
    with subprocess.Popen([cloudflared.path, *words], stderr=subprocess.PIPE) as process:
        assert b"Start Websocket listener" in process.stderr.readline()
        process.stderr.close()

        def refused() -> bool:  # it has no far end, which it logs
            with contextlib.suppress(OSError):
                ask((HOST, port))
            return process.poll() is not None

        wait_until(refused)
    assert process.returncode == -signal.SIGPIPE


def test_the_stand_in_can_stop_hang_and_ask_for_a_login(bench, cloudflared, echo_server):
    cloudflared.far("*", echo_server.address)
    cloudflared.fault("stop.test", stop=True)
    cloudflared.fault("hang.test", hang=True)
    cloudflared.fault("login.test", login=True)
    made = bench(live=True)
    child = made.ready("login.test").child
    with socket.create_connection(child.address):
        wait_until(lambda: made.table.words(child, 0.0, 0).text.startswith("Access wants a login"))
    with socket.create_connection(made.ready("hang.test").child.address) as client:
        client.sendall(b"hello")
        wait_until(lambda: cloudflared.clients("hang.test"))
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
    child = made.ready("stop.test").child
    with socket.create_connection(child.address):
        wait_until(lambda: any(sniroute_tunnels.listeners(child.address[1]).values()))
        assert pathlib.Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(") ")[2][0] == "T"
    assert len(cloudflared.clients()) == 2
