"""The real program as a child process.

    namespace        the words that run a program in namespaces of its own
    launch           launch(*options) -> Program that listens, until the test ends
    changed          the words that run the program with other times
    command          run sniroute to its end
    two_files        the path of sniroute.py in a folder with the files that serve, and the doctor
    three_files      the path of sniroute.py in a folder with those files, and the carrier's
    form             the path of each form in which it is handed on, complete: `cp sniroute*.py`, and sniroute.pyz
    no_variables     the test's own environment has no SNIROUTE_ variable
    admin_path       a path for a unix socket
    held             a listening socket that systemd would hold; `activated` passes it on
    Customers        clients that come one after the other, and note who was refused
"""

from __future__ import annotations

import contextlib
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
from typing import Any, Callable, Iterator

import pytest

from sniroute_names import OPTIONS
from conftest import CORE, DOCTOR, HERE, HOST, Address, connect, exit_code, wait_until
from testbed.hellos import HELLO
from testbed.running import read_exactly
from testbed.standins import Child, Nursery, nursery_of


PROGRAM = HERE / "sniroute.py"
STOP_GRACE = 2.0  # seconds that a tunnel may take to end by itself


def environment(**more: str) -> dict[str, str]:
    """The environment for a router: without variables that change Python or sniroute; coverage's stay."""
    kept = {key: value for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "SNIROUTE_", "TUNNEL_", "JOURNAL_"))}
    return {**kept, "PYTHONWARNINGS": "default::ResourceWarning", **more}


def namespace(options: str, prepare: str = "true") -> tuple[str, ...]:
    """The words before a program that run it in namespaces of its own, after a line of shell; skips where that fails.

    `options` are those of unshare(1).
    """
    words = ("unshare", *options.split(), "/bin/sh", "-c", f'{prepare} && exec "$@"', "sh")
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not here (Debian package util-linux)")
    if subprocess.run([*words, "/bin/true"], capture_output=True).returncode:
        pytest.skip("namespaces are root's, and not every container's")
    return words


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the SNIROUTE_ variables of the user who runs the tests."""
    for name in os.environ:
        if name.startswith("SNIROUTE_"):
            monkeypatch.delenv(name)


class Program:
    """A router that is a process of its own.  A thread reads its log, unless a test clears `log_is_read`."""

    def __init__(self, command: list[str], started: Child | None = None, **popen: Any):
        self.lines: list[str] = []
        self.code = 0  # the exit code that `stop` expects
        self.process = started or subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                                   **{"stderr": subprocess.PIPE, **popen})
        self.pid = self.process.pid
        self.log_is_read = threading.Event()
        self.log_is_read.set()
        self.reader = threading.Thread(target=self._read, name="log-reader")
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.lines.append(line.decode())
            self.log_is_read.wait()

    def log(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until the log has this text `count` times."""
        wait_until(lambda: self.log().count(text) >= count or not self.reader.is_alive(), what=f"{text!r} in the log")
        assert self.log().count(text) >= count, f"it ended without {text!r}:\n{self.log()}"

    @property
    def addresses(self) -> list[Address]:
        """Where it listens, by its log."""
        found = re.findall(r" listening on (\S+):(\d+)$", self.log(), re.MULTILINE)
        return [(host.strip("[]"), int(port)) for host, port in found]

    @property
    def address(self) -> Address:
        return self.addresses[0]

    def connect(self, said: bytes = b"", address: Address | None = None) -> socket.socket:
        """A client that has sent `said`, as conftest's `connect`."""
        return connect(address or self.address, said)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 15) -> int:
        """Wait for its end, and read the rest of its log.  Returns the exit code."""
        code = exit_code(self.process, timeout)
        self.log_is_read.set()
        self.reader.join()
        return code

    def stop(self) -> None:
        """End it, if it has not ended.  Check its exit code, and that its log reports no fault of ours."""
        self.log_is_read.set()
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
            assert self.wait() == self.code, self.log()
        finally:
            self.process.kill()
            self.wait()
            if self.process.stderr is not None:
                self.process.stderr.close()
        for word in ("Traceback", "report it", "ResourceWarning"):
            assert word not in self.log(), self.log()


SAME = ("PYTHON", "LC_", "LANG")  # variables that Python reads at its start


forks: list[Nursery] = []  # the one of `session_programs`, for `command`


@pytest.fixture(scope="session", autouse=True)
def session_programs() -> Iterator[Nursery | None]:
    """What forks routers; None without Linux, and where coverage has to see each of them begin."""
    if not hasattr(os, "pidfd_open") or any(name.startswith("COVERAGE") for name in os.environ):
        yield None
        return
    with nursery_of("sniroute", *(room.removesuffix(".py") for room in CORE), python=(sys.executable,),
                    environ=environment()) as made:
        forks.append(made)
        yield made
        forks.clear()


@pytest.fixture
def programs(session_programs: Nursery | None) -> Nursery | None:
    """What forks the routers of `launch`.  Files whose subject is the start have a fixture of this name with None."""
    return session_programs


def can_fork(programs: Nursery | None, env: dict[str, str]) -> bool:
    """Whether a router with this environment is the same if it is forked."""
    return programs is not None and all(env.get(name) == programs.environ.get(name)
                                        for name in {*env, *programs.environ} if name.startswith(SAME))


@pytest.fixture
def launch(tmp_path: pathlib.Path, cloudflared, programs: Nursery | None) -> Iterator[Callable[..., Program]]:
    """launch(*options, env=, python=, program=, listeners=1, ...) -> Program.

    It listens on a free port unless the options name one.  `python` is the command that runs the file `program`, `env`
    its whole environment.  The call waits until the log names so many `listeners`.  Further arguments go to Popen.

    A router with none of `python`, `program` and further arguments is forked: 75 ms of a processor less.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    running_ones = []
    with contextlib.ExitStack() as stack:
        def start(*options: str, env: dict[str, str] | None = None, python: tuple[str, ...] = (),
                  program: pathlib.Path = PROGRAM, listeners: int = 1, **popen: Any) -> Program:
            env = environment() if env is None else env
            if "SNIROUTE_LISTEN" not in env and not any(option.startswith("--listen") for option in options):
                options = (f"--listen={HOST}:0", *options)
            words, env = [str(program), *options], {**env, "TMPDIR": str(scratch)}
            if program == PROGRAM and not python and not popen and can_fork(programs, env):
                running = Program(words, programs.child("sniroute", words, env))
            else:
                running = Program([*(python or (sys.executable,)), *words], env=env, **popen)
            running_ones.append(running)
            stack.callback(running.stop)
            running.wait_for(" listening on ", listeners) if listeners else None
            return running

        yield start
    if not any(program.code for program in running_ones):  # a killed one cannot remove its files
        assert list(scratch.iterdir()) == []


def changed(*statements: str) -> tuple[str, ...]:
    """The words of `launch(python=...)` for a program that runs these statements first: they change its times.

    They may name any room: `sniroute_daemon.WATCH_EVERY = 0.05`.
    """
    rooms = sorted(set(re.findall(r"\bsniroute_\w+", " ".join(statements))))
    lines = (f"import sys; sys.path.insert(0, {str(HERE)!r}); del sys.argv[0]",
             f"import {', '.join([*rooms, 'sniroute'])}", *statements, "sys.exit(sniroute.main())")
    return sys.executable, "-c", "\n".join(lines)


def execute(*words: str, said: bytes = b"", **more: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end, with an environment that has nothing of the user's but PATH."""
    return subprocess.run(words, **{"input": said, "capture_output": True, "timeout": 60, "env": plain_environment(),
                                    **more})


def plain_environment() -> dict[str, str]:
    """Nothing of the user's but PATH."""
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent", "LC_ALL": "C"}


def command(*options: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run sniroute to its end.  It is forked as `launch` does: what a start is, is asked by `execute`."""
    env = environment(**more)
    if not forks or not can_fork(forks[0], env):
        return execute(sys.executable, str(PROGRAM), *options, env=env, said="", text=True)
    child = forks[0].child("sniroute", [str(PROGRAM), *options], env, stdout=subprocess.PIPE)
    code, stdout, stderr = child.ended()
    return subprocess.CompletedProcess([str(PROGRAM), *options], code, stdout.decode(), stderr.decode())


def resident(pid: int) -> float:
    """The resident memory of a process, in MiB."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal still waits for the process.  Until it is delivered, a second one like it would be lost."""
    mask = re.search(r"ShdPnd:\s+(\w+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(mask, 16) >> number - 1 & 1)


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process, user and system: fields 14 and 15 of its stat (proc(5))."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def counter(program: Program, name: str) -> int:
    """The value of a counter, from the dump that SIGUSR1 asks for; 0 where it is not there yet."""
    seen = len(re.findall("counters: ", program.log()))
    program.signal(signal.SIGUSR1)
    program.wait_for("counters: ", seen + 1)
    last = re.findall(r"counters: (\{.*\})\n", program.log())[-1]
    found = re.search(rf"'{name}': (\d+)", last)
    return int(found[1]) if found else 0


def has_ipv6() -> bool:
    """Whether this host has the address ::1, and sockets for both families."""
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return socket.has_dualstack_ipv6()
    return False


ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


BARE = {"PATH": ""}  # an environment in which no program is found
BARE_PYTHON = (sys.executable, "-S", "-E")  # without installed packages and PYTHON variables


def installed(folder: pathlib.Path, *names: str) -> pathlib.Path:
    """Copy the files that serve, the doctor and `names` into a folder.  Returns the path of sniroute.py there."""
    for name in (*CORE, DOCTOR, *names):
        shutil.copy(HERE / name, folder)
    return folder / "sniroute.py"


@pytest.fixture(scope="session")  # one folder, so that the files are compiled once
def two_files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The path of sniroute.py in a folder with the files that serve, and the doctor."""
    return installed(tmp_path_factory.mktemp("two files"))


@pytest.fixture(scope="session")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The path of sniroute.py in a folder with those files, and the carrier's."""
    return installed(tmp_path_factory.mktemp("three files"), *(f"{room}.py" for room in OPTIONS["carrier"]))


@pytest.fixture(scope="session")
def all_files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What `cp sniroute*.py FOLDER` gives."""
    folder = tmp_path_factory.mktemp("all files")
    for path in HERE.glob("sniroute*.py"):
        shutil.copy(path, folder)
    return folder / "sniroute.py"


@pytest.fixture(scope="session")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What `sniroute.py bundle --with all` gives, alone in its folder."""
    path = tmp_path_factory.mktemp("one file") / "sniroute.pyz"
    ended = command("bundle", "-o", str(path), "--with", "all")
    assert (ended.returncode, ended.stderr) == (0, "")
    return path


@pytest.fixture(params=["all_files", "one_file"])
def form(request: pytest.FixtureRequest) -> pathlib.Path:
    """What is run, in each form in which it is handed on."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def admin_path() -> Iterator[str]:
    """A path for a unix socket.  Not in tmp_path: that may be too long for one (unix(7), sun_path)."""
    with tempfile.TemporaryDirectory(prefix="sniroute-admin-") as folder:
        yield os.path.join(folder, "socket")


# -- sockets of systemd, and customers -----------------------------------------------------------

SYSTEMD = """
import fcntl, os, sys
names, fds, command = sys.argv[1], [int(fd) for fd in sys.argv[2].split(",")], sys.argv[3:]
for number, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]):
    os.dup2(fd, 3 + number)
    os.close(fd)
os.execve(command[0], command, {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)),
                                "LISTEN_FDNAMES": names})
"""


def activated(*sockets: tuple[str, Any]) -> dict[str, Any]:
    """What starts a program with these named sockets, as systemd passes them: words before it, and for Popen."""
    fds = [sock.fileno() for _, sock in sockets]
    return {"python": (sys.executable, "-S", "-c", SYSTEMD, ":".join(name for name, _ in sockets),
                       ",".join(map(str, fds)), sys.executable), "pass_fds": fds}


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """A listening socket that systemd would hold."""
    with socket.create_server((HOST, 0), backlog=512) as listener:
        os.set_inheritable(listener.fileno(), True)
        yield listener


class Customers:
    """Clients that come one after the other, in several threads, and note who was refused or cut."""

    def __init__(self, address: Address, threads: int = 4, said: bytes = HELLO):
        self.address = address
        self.said = said  # they want it back
        self.served = 0
        self.failures: list[str] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._come, name="customer") for _ in range(threads)]

    def __enter__(self) -> Customers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _come(self) -> None:
        while not self.stop.is_set():
            try:
                with connect(self.address, self.said) as client:
                    assert read_exactly(client, len(self.said)) == self.said
                self.served += 1
            except (OSError, AssertionError) as error:
                self.failures.append(repr(error))
                return
