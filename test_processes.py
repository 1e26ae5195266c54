"""Tests of sniroute_processes.py, in its order; see testbed/tunnels.py for `bench`, `both` and `shared`."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any, Callable, Iterator

import pytest

import sniroute_launchers
import sniroute_processes
from sniroute_launchers import Launcher, Reason
from sniroute_loop import WakePipe
from sniroute_processes import LOST, NO_FAULT, OWN_FAULT, Child, Ends, Home, Process, Processes, reap_orphans
from sniroute_tunnels import BACKOFF, FAILED, READY, STOPPING, TunnelTable
from conftest import HERE, HOST, FakeClock, linux, wait_until
from testbed.tunnels import Bench, ask, both, event, events, runs, shared, stand_in

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
    words = sniroute_processes.death_guard()
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
    assert sniroute_processes.death_guard()[0] == sys.executable


@pytest.mark.parametrize("account", ["root", "nobody"])
def test_a_child_has_no_capability_of_the_router_s(guard, account):
    """Those that systemd gives a service so that it may bind port 443 are inherited, unless they are given up."""
    if not os.path.exists("/usr/bin/setpriv"):
        pytest.skip("setpriv is not here (Debian package util-linux)")
    if os.geteuid() != 0:
        pytest.skip("needs root, who may give capabilities")
    identity = [] if account == "root" else ["--reuid=65534", "--regid=65534", "--clear-groups"]
    router = ["setpriv", *identity, "--inh-caps=+net_bind_service", "--ambient-caps=+net_bind_service", "--"]
    if subprocess.run([*router, sys.executable, "-c", ""], capture_output=True).returncode:
        pytest.skip("this Python is not for everybody, or this container has not the capability")

    def capabilities(*words: str) -> dict[str, int]:
        status = subprocess.run([*router, *words, "/bin/cat", "/proc/self/status"], capture_output=True, text=True)
        assert status.returncode == 0, status.stderr
        return {name: int(value, 16) for name, value in re.findall(r"^(Cap\w+):\s+(\w+)$", status.stdout, re.M)}

    assert capabilities()["CapAmb"] == 1 << 10, "CAP_NET_BIND_SERVICE: the router has it"
    child = capabilities(*guard)
    assert child["CapAmb"] == 0
    if account == "nobody":
        assert child["CapEff"] == child["CapPrm"] == 0


def test_no_guard_where_the_kernel_has_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert sniroute_processes.death_guard() == []


ROUTER = """
import shutil, sys, time
import sniroute_launchers, sniroute_tunnels
path, first, form, kind = sys.argv[1:]
if form == "python":
    shutil.which = lambda name, path=None: name if "/" in name else None
launcher = sniroute_launchers.cloudflared_launcher(path, {})
if kind == "shared":
    launcher = launcher._replace(shared=("forwarders",), reason=sniroute_launchers.carrier_reason, carries=16)
table = sniroute_tunnels.TunnelTable({"cf": launcher}, (int(first), int(first) + 9))
table.start()
for name in "abc":
    table.wait(sniroute_launchers.TunnelKey("cf", f"{name}.test"), None, time.monotonic() + 20)
assert (table.processes.guard[0] == sys.executable) == (form == "python"), table.processes.guard
print(*(row[4] for row in table.snapshot()), flush=True)
sys.stdin.read()
"""


@linux
@pytest.mark.parametrize("form, kind", [("setpriv", "own"), ("python", "own"), ("setpriv", "shared")],
                         indirect=["kind"])
def test_sigkill_of_the_router_leaves_no_process(form, kind, cloudflared, free_ports, tmp_path):
    if form == "setpriv" and (not shutil.which("setpriv") or sniroute_processes.death_guard()[0] == sys.executable):
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


# -- their home --------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch) -> pathlib.Path:
    """The folder for temporary files."""
    path = tmp_path / "place"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    return path


@pytest.mark.parametrize("change", ["removed", "opened", "replaced"])
def test_home_that_is_no_longer_ours_is_made_anew(bench, tmp_path, change):
    made = bench()
    made.ready("one.test")
    home = pathlib.Path(made.table.processes.home.path)
    if change == "opened":
        home.chmod(0o777)
    else:
        shutil.rmtree(home)
    if change == "replaced":
        home.symlink_to(tmp_path)
    made.ready("two.test")
    assert made.table.processes.home.path != str(home)
    shutil.rmtree(home) if change == "opened" else home.unlink(missing_ok=True)


KILLED = """
import os, signal, sniroute_processes
print(sniroute_processes.Home().get(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_homes_of_killed_routers_go_with_the_next_start(place):
    for _ in range(3):
        subprocess.run([sys.executable, "-c", KILLED], cwd=HERE, env={**os.environ, "TMPDIR": str(place)},
                       stdout=subprocess.DEVNULL)
        left, = place.iterdir()  # each start removes the one before
    (left / ".cloudflared").mkdir()
    (left / ".cloudflared" / "lock").touch()
    home = Home()
    path = pathlib.Path(home.get())
    assert list(place.iterdir()) == [path]
    home.close()
    assert list(place.iterdir()) == []


def test_the_home_of_a_router_that_lives_stays(place):
    first, second = Home(), Home()
    assert first.get() != second.get() and first.get() == first.get()
    assert len(list(place.iterdir())) == 2
    first.close()
    assert list(place.iterdir()) == [pathlib.Path(second.get())]
    second.close()


def test_what_is_not_a_left_home_is_not_touched(place, tmp_path):
    """Somebody's own folder, one that is being made, a symlink, a file, another user's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    for folder in (elsewhere, place / "sniroute-open", place / "sniroute-other"):
        folder.mkdir(0o700, exist_ok=True)
        (folder / sniroute_processes.HOME_MARK).touch()
    home = Home()  # of which somebody makes a copy
    shutil.copytree(home.get(), place / "sniroute-copy")
    (place / "sniroute-copy").chmod(0o700)
    home.close()
    (place / "sniroute-waits").mkdir(0o700)
    os.mkfifo(place / "sniroute-waits" / sniroute_processes.HOME_MARK)  # whoever opens it to read would wait
    (place / "sniroute-open").chmod(0o755)
    (place / "sniroute-own").mkdir(0o700)
    (place / "sniroute-link").symlink_to(elsewhere)
    (place / "sniroute-file").touch()
    if os.geteuid() == 0:
        os.chown(place / "sniroute-other", 4321, -1)
    else:
        shutil.rmtree(place / "sniroute-other")
    before = set(place.iterdir())
    home = Home()
    home.get()
    home.close()
    assert set(place.iterdir()) == before and list(elsewhere.iterdir())


def test_a_folder_is_not_a_left_home_before_it_is_locked(place, monkeypatch):
    """Another router looks in every instant of the making; it never removes it."""
    home = Home()
    flock, opened = sniroute_processes.fcntl.flock, os.open
    looks = []

    def look(inner: Callable[..., Any], *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(sniroute_processes.fcntl, "flock", flock)
            patch.setattr(os, "open", opened)
            sniroute_processes.remove_left_homes(str(place))
            looks.append(len(list(place.iterdir())))
        return inner(*args)

    with monkeypatch.context() as patched:
        patched.setattr(sniroute_processes.fcntl, "flock", lambda *args: look(flock, *args))
        patched.setattr(os, "open", lambda *args: look(opened, *args))
        path = home.get()
    assert looks == [1] * 3 and os.path.isdir(path)
    home.close()


def test_a_folder_that_another_process_locks_is_not_taken(place, monkeypatch):
    """A router that starts in the same instant looks at it."""
    def locked(path: str) -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    home = Home()
    with monkeypatch.context() as patch:
        patch.setattr(sniroute_processes, "lock_folder", locked)
        assert home.get() == sniroute_processes.NO_HOME and list(place.iterdir()) == []
    assert home.get() != sniroute_processes.NO_HOME
    home.close()


def test_a_file_system_without_locks_has_homes_too(place, monkeypatch):
    def none(path: str) -> int:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sniroute_processes, "lock_folder", none)
    home, another = Home(), Home()
    assert os.path.isdir(home.get()) and os.path.isdir(another.get()) and os.path.isdir(home.path)
    home.close()
    another.close()
    assert list(place.iterdir()) == []


def test_a_service_s_own_folder_is_taken_before_the_one_for_all(place, tmp_path, monkeypatch):
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{runtime}:{tmp_path}/second")
    home = Home()
    assert os.path.dirname(home.get()) == str(runtime)
    home.close()
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "gone"))
    assert os.path.dirname(home.get()) == str(place)
    home.close()


@both
def test_tunnels_start_where_no_folder_can_be_made(bench, cloudflared, place, caplog):
    """A root that is read-only, and no /tmp: they were refused with `No usable temporary directory found`."""
    place.rmdir()
    made = bench()
    for name in ("a.test", "b.test"):
        made.ready(name)
    assert {start["environment"]["HOME"] for start in cloudflared.starts()} == {sniroute_processes.NO_HOME}
    assert caplog.text.count("tunnel programs get no home folder") == 1
    assert f"({place}: No such file or directory)" in caplog.text


def test_a_program_that_needs_no_home_makes_no_folder(cloudflared, free_ports, place):
    """The carrier's row says so."""
    assert not sniroute_launchers.carrier_launcher({}).home
    launcher = stand_in("shared", cloudflared.path, {})._replace(home=False)
    made = Bench(TunnelTable({"cf": launcher}, free_ports(), clock=FakeClock()), False)
    try:
        made.ready("app.test")
        assert list(place.iterdir()) == []
    finally:
        made.close()
    start, = cloudflared.starts()
    assert "HOME" not in start["environment"]


# -- orphans -----------------------------------------------------------------------------------


def children_of(parent: int) -> list[int]:
    """The children of a process, by whichever thread."""
    return [int(pid) for task in pathlib.Path(f"/proc/{parent}/task").glob("*/children")
            for pid in task.read_text().split()]


def zombies(parent: int) -> list[int]:
    """The children of a process that have ended and that nobody has reaped."""
    return [pid for pid in children_of(parent) if not runs(pid)]


@linux
def test_orphans_are_reaped_and_the_router_s_own_processes_are_not():
    with subprocess.Popen(["true"]) as own, subprocess.Popen(["false"]) as orphan:
        wait_until(lambda: {own.pid, orphan.pid} <= set(zombies(os.getpid())))
        reap_orphans({own.pid, orphan.pid})
        assert {own.pid, orphan.pid} <= set(zombies(os.getpid()))
        reap_orphans({own.pid})  # `own` comes first in the kernel's list
        assert own.wait() == 0, "its exit code was not stolen"
        reap_orphans(set())
        assert orphan.pid not in zombies(os.getpid())
        with pytest.raises(ChildProcessError):
            os.waitpid(orphan.pid, 0)
    reap_orphans(set())  # no child at all


def test_only_process_1_looks_for_orphans(owner, monkeypatch):
    assert owner.processes.due(0.0) == []
    monkeypatch.setattr(os, "getpid", lambda: 1)
    clock = FakeClock()
    processes = Processes(owner, owner.pipe, clock)
    try:
        assert processes.due(clock()) == [clock()]
        processes.turn(0.0)
        assert processes.due(clock()) == [clock() + sniroute_processes.ORPHANS_LOOK]
    finally:
        processes.close()


# -- start and watch ---------------------------------------------------------------------------


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


@both
@pytest.mark.parametrize("calls", [1, 2])
def test_a_child_that_cannot_be_watched_is_not_left_behind(calls, bench, monkeypatch):
    made = bench()
    register = made.table.processes.selector.register

    def full(*args: object) -> object:
        nonlocal calls
        calls -= 1
        if not calls:
            raise OSError(28, "No space left on device")
        return register(*args)

    monkeypatch.setattr(made.table.processes.selector, "register", full)
    error = made.failed("app.test")
    assert "No space left" in str(error)
    assert made.table.children == {} and made.table.failures == {}
    assert len(made.table.processes.selector.get_map()) == 1, "its own wake pipe"
    made.ready("app.test")


def test_a_process_that_cannot_be_watched_is_not_used(bench, monkeypatch):
    """Without descriptors nobody can tell later whether its port is still its own."""
    real = os.open
    def exhausted(path: str, *rest: Any) -> int:
        if str(path).endswith("statm"):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *rest)
    made = bench()
    with monkeypatch.context() as patch:
        patch.setattr(sniroute_processes.os, "open", exhausted)
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
    launcher = sniroute_launchers.cloudflared_launcher("cat", {})
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as popen:
        process = Process(launcher, True, popen)
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
def test_without_pidfd_children_are_polled(bench, monkeypatch):
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    made = bench(live=True, jitter=lambda: 0.0)
    tunnel = made.leased("app.test")
    child = tunnel.child
    assert child.process.pidfd == -1 and child.alive()
    os.kill(child.process.pid, signal.SIGKILL)
    wait_until(lambda: tunnel.state is READY and tunnel.child is not child)
    assert not child.alive()
    made.table.release(tunnel, 0.2)  # not before: it would be idle between its start and its lease
    wait_until(lambda: not made.table.tunnels)


def test_a_process_that_is_gone_is_not_alive_and_is_not_signalled():
    launcher = sniroute_launchers.cloudflared_launcher("true", {})
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as popen:
        process = Process(launcher, True, popen)
        try:
            popen.wait()
            assert not process.alive()
            process.signal(signal.SIGKILL)  # its group has ended
        finally:
            process.close()


# -- stop --------------------------------------------------------------------------------------


def fill(process: Process) -> None:
    """Write to a stopped process until its stdin takes no more."""
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(process.popen.stdin.fileno(), b"\n" * 4096)


@shared
def test_a_listener_is_no_longer_its_own_before_anybody_tells_it_to_close(bench, monkeypatch):
    """The process lives on, and a stranger may have the port before the answer is read."""
    made = bench()
    made.leased("used.test")
    child = made.ready("idle.test").child
    told, tell = [], Process.tell

    def watched(process: Process, words: str) -> None:
        told.append((words, child.alive(), process.alive()))
        tell(process, words)

    monkeypatch.setattr(Process, "tell", watched)
    assert child.alive()
    made.clock.jump(made.table.idle)
    made.turn(lambda: child not in made.table.children)
    assert told == [(f"close {child.listener}", False, True)]


@both
def test_a_child_that_does_not_die_is_given_up(bench, monkeypatch, caplog):
    monkeypatch.setattr(Process, "signal", lambda *_: None)  # as one that hangs in the kernel
    made = bench()
    tunnel = made.ready("app.test")
    child = tunnel.child
    try:
        made.clock.jump(made.table.idle)
        made.table.step()
        made.clock.jump(sniroute_processes.STOP_GRACE)
        made.table.step()
        assert child.process.killed and tunnel.state is STOPPING
        made.clock.jump(sniroute_processes.KILL_GRACE)
        made.table.step()
        assert made.table.children == {} and made.table.tunnels == {}
        assert f"process {child.process.pid} does not die" in caplog.text
    finally:
        child.process.popen.kill()
        child.process.popen.wait()


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
    assert process not in made.table.processes.running
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
    made.turn(lambda: not made.table.processes.running)
    assert used.state is BACKOFF and idle.state is FAILED
    assert ("cf:used.test", "it ended (exit 3): bad luck") in [
        (fields["tunnel"], fields["reason"]) for what, fields in events(caplog) if what == "tunnel ended"]


# -- hear --------------------------------------------------------------------------------------


@both
def test_last_words_are_heard_when_the_end_is_noticed_first(bench, cloudflared):
    cloudflared.fault("app.test", exit_on_client=True, words="goroutine panic")
    made = bench()
    child = made.leased("app.test").child
    made.table.step()
    ask(child.address)
    wait_until(lambda: not child.alive())
    made.table.processes._exited(child.process)
    assert child.verdict.text == "it ended (exit 1): goroutine panic"


@shared
def test_remembered_refusals_are_bounded(bench, monkeypatch):
    monkeypatch.setattr(sniroute_processes, "REFUSALS_KEPT", 3)
    made = bench()
    child = made.ready("app.test").child
    for number, port in enumerate((1, 2, 3, 1, 4)):
        line = event(child, "failed", client=f"{HOST}:{port}", reason="down", error=str(number))
        made.table.processes._heard(child.process, line)
    assert [made.table.words(child, 0.0, port).text for port in (1, 2, 3, 4)] == ["3", "", "2", "4"]


@shared
def test_a_warning_of_a_program_is_logged_and_is_not_its_last_words(bench, caplog):
    made = bench()
    process = made.ready("app.test").child.process
    tail = process.tail
    made.table.processes._heard(process, b'{"event": "warning", "message": "this may be anybody"}')
    assert ("tunnel program warns", {"pid": process.pid, "text": "this may be anybody"}) in events(caplog)
    assert process.tail == tail


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
        event(child, "closed", message="x" * sniroute_processes.LINE),  # longer than a line may be: it is cut
        event(child, "failed", client=f"{HOST}:7", reason="down", message="in between"),
        b"y" * 20_000, b"its last words")) + event(child, "closed")[:-1]  # half a line
    chunks = [text[at:at + size] for at in range(0, len(text), size)]

    class Chunks:
        closed, fileno, close = False, output.fileno, output.close

        def read(self, _: int) -> bytes:
            return chunks.pop(0)

    process.output = Chunks()
    while chunks:
        made.table.processes._drain(process)
        assert len(process.tail) <= sniroute_processes.TAIL and len(process.line) <= sniroute_processes.LINE
    process.output = output
    assert made.table.words(child, 0.0, 7).text == "in between"
    assert sniroute_launchers.last_words(process.tail) == "its last words"
    assert child in made.table.children and made.states() == {"app.test": READY}


@both
def test_a_chatty_child_does_not_block_and_only_its_end_is_kept(bench, cloudflared, echo_server, caplog):
    caplog.set_level(logging.DEBUG, "sniroute")
    cloudflared.fault("app.test", flood=100)
    cloudflared.far("app.test", echo_server.address)
    tunnel = bench(live=True).ready("app.test")
    assert ask(tunnel.child.address) == b"hello"  # it serves only when all is written
    wait_until(lambda: tunnel.child.process.tail.endswith(b"x\n"))
    assert len(tunnel.child.process.tail) == sniroute_processes.TAIL
    assert f"pid {tunnel.child.process.pid}: xxx" in caplog.text


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
    made.table.processes._drain(tunnel.child.process)
    assert output.closed and tunnel.state is READY


# -- what the owner is told --------------------------------------------------------------------


class Told:
    """An owner that writes down what it is told, and whether the descriptors were open then."""

    def __init__(self) -> None:
        self.pipe = WakePipe()
        self.processes = Processes(self, self.pipe)
        self.heard: list[tuple[Any, ...]] = []
        self.fault = False

    def closed(self, child: Child, reason: Reason) -> None:
        self.heard.append(("closed", child, reason))

    def exited(self, process: Process, ends: Ends) -> None:
        self.heard.append(("exited", process, ends, process.statm >= 0))
        if self.fault:
            raise RuntimeError("a fault of the owner")

    def turn_until(self, done: Callable[[], Any]) -> None:
        wait_until(lambda: self.processes.turn(0.005) or done())

    def start(self, launcher: Launcher, program: str, *names: str, first: int) -> list[Child]:
        """A process with a child for each name, on ports from `first` on."""
        process = self.processes.launch(launcher, True, [program, *launcher.shared])
        children = [process.seat(first + number, 0.0) for number in range(len(names))]
        for child, name in zip(children, names):
            process.listen(child, name)
        return children


@pytest.fixture
def owner() -> Iterator[Told]:
    told = Told()
    yield told
    for process in told.processes.running:
        process.signal(signal.SIGKILL)
    told.fault = False
    told.turn_until(lambda: not told.processes.running)
    told.processes.close()
    told.pipe.close()


def plain(program: str) -> Launcher:
    return stand_in("own", program, {})


def test_the_owner_is_told_of_a_listener_that_closes(cloudflared, free_ports, owner):
    launcher = stand_in("shared", cloudflared.path, {})
    first, second = owner.start(launcher, cloudflared.path, "a.test", "b.test", first=free_ports()[0])
    owner.turn_until(lambda: first.look_at == second.look_at == 0.0)  # both have said that they listen
    owner.processes.stop(first, "", 10.0)
    assert first.close_at == 10.0 + sniroute_processes.STOP_GRACE and not first.alive() and second.alive()
    owner.turn_until(lambda: owner.heard)
    (what, child, reason), = owner.heard
    assert (what, child, reason) == ("closed", first, first.verdict)
    assert first.process.children == {second.listener: second} and owner.processes.running == [first.process]


@linux
def test_the_owner_is_told_of_an_end_before_the_descriptors_are_closed(owner):
    child, = owner.start(plain("false"), "/bin/false", "a.test", first=1)
    process = child.process
    owner.turn_until(lambda: owner.heard)
    assert owner.heard == [("exited", process, [(child, OWN_FAULT)], True)]
    assert child.verdict.text == "it ended (exit 1)"
    assert process.popen.stdout.closed and (process.pidfd, process.statm) == (-1, -1)
    assert owner.processes.running == [] and process.children == {}


def test_a_fault_of_the_owner_leaves_no_process_half_watched(owner):
    owner.fault = True
    child, = owner.start(plain("false"), "/bin/false", "a.test", first=1)
    with pytest.raises(RuntimeError):
        owner.turn_until(lambda: False)
    assert owner.processes.running == [] and child.process.popen.stdout.closed
    owner.processes.turn(0.0)  # and nothing is told twice
    assert len(owner.heard) == 1


@pytest.mark.parametrize("ready, words, fault", [
    pytest.param(False, "bad luck", OWN_FAULT, id="it starts alone"),
    pytest.param(True, "bad luck", NO_FAULT, id="it starts beside one that is ready"),
    pytest.param(False, "bind: address already in use", NO_FAULT, id="its port was taken"),
])
def test_the_owner_is_told_whose_fault_an_end_was(ready, words, fault, owner):
    launcher = plain("sh")._replace(shared=("-c", f"read line; read line; echo {words}"))  # it takes both orders
    first, second = owner.start(launcher, "/bin/sh", "", "", first=1)
    first.ready = 1.0 if ready else 0.0
    owner.turn_until(lambda: owner.heard)
    (_, _, ends, _), = owner.heard
    assert (second, fault) in ends
    assert second.verdict.text.startswith("it ended (exit 0): ") and words in second.verdict.text


def test_the_owner_is_told_of_a_process_that_does_not_die(owner, monkeypatch, caplog):
    child, = owner.start(plain("sleep")._replace(shared=("60",)), "/bin/sleep", "a.test", first=1)
    popen = child.process.popen
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Process, "signal", lambda *_: None)  # as one that hangs in the kernel
            now = 10.0
            owner.processes.stop(child, "", now)
            for grace in (sniroute_processes.STOP_GRACE, sniroute_processes.KILL_GRACE):
                assert owner.heard == [] and owner.processes.due(now) == [now + grace]
                now += grace
                owner.processes.tend(now, False)
        assert [heard[:3] for heard in owner.heard] == [("exited", child.process, [(child, LOST)])]
        assert f"process {popen.pid} does not die" in caplog.text
    finally:
        popen.kill()
        popen.wait()
