"""What all tests share.

    HERE, CORE, OPTIONS    where the files are, and which of them serve
    wait_until             wait for an event, never for a time
    exit_code              wait for the end of a child
    FakeClock              a clock that a test moves
    no_leaks               each test leaves no thread, process or descriptor behind; always on
    connect                a client; where it fails, nothing stays open
    serve, echo_server     a far end in a thread: a handler is given a socket
    deaf                   the address of a listener that takes no more connections
    free_ports, ports      blocks of TCP ports
    single_loop_echo       a far end for crowds

The modules of testbed/ have more fixtures, each for one area.  pytest finds all of them by name.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import queue
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator

import pytest

pytest.register_assert_rewrite("testbed")  # an assert in a helper shows its values

from testbed.ports import free_block  # noqa: E402: its asserts too

pytest_plugins = [f"testbed.{module}" for module in ("standins", "running", "program", "tunnels", "carrier", "admin",
                                                      "clients", "web", "streams", "cluster", "apis", "passage",
                                                      "any_cluster", "registry", "redis", "named", "nodepass",
                                                      "foreign", "aside",
                                                      "masters")]

HERE = pathlib.Path(__file__).resolve().parent
HOST = "127.0.0.1"
DOCTOR = "sniroute_doctor.py"
OPTIONS = {  # files that an installation may leave out
    DOCTOR, "sniroute_commands.py", "sniroute_backends.py", "sniroute_book.py", "sniroute_groups.py",
    "sniroute_balance.py", "sniroute_warm.py", "sniroute_reuse.py", "sniroute_conversations.py", "sniroute_checks.py",
    "sniroute_probes.py", "sniroute_web.py", "sniroute_requests.py", "sniroute_bodies.py", "sniroute_spares.py",
    "sniroute_gateway.py", "sniroute_answers.py",
    "sniroute_tls.py", "sniroute_browsers.py", "sniroute_certificate.py", "sniroute_http2.py", "sniroute_hpack.py",
    "sniroute_http.py", "sniroute_kubernetes.py", "sniroute_jumps.py", "sniroute_passage.py",
    "sniroute_links.py", "sniroute_transports.py", "sniroute_pods.py",
    "sniroute_objects.py", "sniroute_api.py", "sniroute_credentials.py", "sniroute_plugins.py", "sniroute_layers.py",
    "sniroute_kubeconfig.py", "sniroute_yaml.py", "sniroute_channels.py", "sniroute_spdy.py",
    "sniroute_clusters.py",
    "sniroute_registrar.py", "sniroute_rest.py", "sniroute_registry.py", "sniroute_owners.py", "sniroute_claims.py",
    "sniroute_sqlite.py", "sniroute_shared.py", "sniroute_redis.py", "sniroute_resp.py", "sniroute_claim.py",
    "sniroute_rfc2136.py", "sniroute_dns.py",
    "sniroute_nodepass.py", "sniroute_master.py", "sniroute_panel.py", "sniroute_mcp.py", "sniroute_instances.py",
    "sniroute_children.py", "sniroute_dialin.py", "sniroute_dialout.py", "sniroute_ends.py",
    "sniroute_single.py", "sniroute_callers.py", "sniroute_datagrams.py", "sniroute_peering.py",
    "sniroute_lanes.py", "sniroute_streams.py", "sniroute_h2.py", "sniroute_pool.py", "sniroute_upstreams.py",
    "sniroute_offload.py", "sniroute_duplex.py", "sniroute_guards.py", "sniroute_signals.py", "sniroute_nodeurl.py",
    "sniroute_nat.py",
    "sniroute_admin.py", "sniroute_door.py", "sniroute_metrics.py", "sniroute_page.py",
    "sniroute_carrier.py", "sniroute_dial.py", "sniroute_edge.py", "sniroute_forwarder.py", "sniroute_upgrade.py",
}
CORE = sorted({path.name for path in HERE.glob("sniroute*.py")} - OPTIONS)  # the files that serve
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the tests start programs a hundred times: compile them once
sys.dont_write_bytecode = False  # and the tests themselves, with what pytest writes into them: that takes eight seconds
Address = tuple[str, int]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")


def wait_until(predicate: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """Wait until `predicate` is true, and return its value.  Fails after `timeout` seconds, naming `what`."""
    deadline, pause = time.monotonic() + timeout, 0.0005
    while not (result := predicate()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what or predicate}"
        time.sleep(pause)
        pause = min(pause * 1.2, 0.005)  # most events come within a few milliseconds
    return result


def exit_code(process: subprocess.Popen[Any], timeout: float) -> int:
    """The exit code of a child, as soon as it ends; `Popen.wait` with a time-out looks only now and then.

    Raises subprocess.TimeoutExpired.
    """
    if process.poll() is None and hasattr(os, "pidfd_open"):
        fd = os.pidfd_open(process.pid)
        try:
            if select.select([fd], [], [], timeout)[0]:
                return process.wait()
        finally:
            os.close(fd)
        timeout = 0
    return process.wait(timeout)


class FakeClock:
    """A clock that moves only by `jump`.

    It begins as on a host that has just been started: no time of the past is long ago there, and 0 is not.  A real loop
    has reached these times already, where a test sets its timers by this clock.
    """

    def __init__(self, now: float = 3.0):
        self.now = now

    def __call__(self) -> float:
        return self.now

    def jump(self, seconds: float) -> None:
        self.now += seconds


# -- leaks -------------------------------------------------------------------------------------


lasting: set[int] = set()  # children that all tests have in common: they live to the end of the run


def own_children() -> set[int]:
    """The children of this process, zombies too, but for `lasting`; empty without /proc."""
    pids: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ChildProcessError):
        tasks = os.listdir("/proc/self/task")
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # fails where there is none, which is most often
        for task in tasks:
            with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
                pids.update(map(int, file.read().split()))  # the thread may have ended meanwhile
    return pids - lasting


def own_fds() -> dict[str, str]:
    """The open descriptors of this process and what they are; empty without /proc."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # listdir() has closed the descriptor that it used itself
                found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def fd_numbers() -> set[str]:
    """The numbers of the open descriptors, without a look at what they are; empty without /proc."""
    with contextlib.suppress(FileNotFoundError):
        lowest = os.open("/proc/self/fd", os.O_RDONLY)
        os.close(lowest)
        return set(os.listdir("/proc/self/fd")) - {str(lowest)}  # which listdir() has used itself
    return set()


def count_fds() -> int:
    """How many descriptors are open, and the one that counts them; 0 without /proc."""
    with contextlib.suppress(FileNotFoundError):
        return len(os.listdir("/proc/self/fd"))
    return 0


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Each test ends with the threads, the children and the descriptors that it began with."""
    def state() -> tuple[set[threading.Thread], set[int], int]:
        return set(threading.enumerate()), own_children(), count_fds()

    numbers, before = fd_numbers(), state()
    yield
    if (now := state()) != before:
        gc.collect()  # closes what only a cycle keeps alive; its ResourceWarning fails the test
        with contextlib.suppress(AssertionError):  # the comparisons below say what has leaked
            wait_until(lambda: state() == before, timeout=5)
        now = state()
    threads, children, count = now
    assert threads == before[0], "threads"
    assert children == before[1], "child processes"
    if count != before[2]:
        new = {number: what for number, what in own_fds().items() if number not in numbers}
        pytest.fail(f"descriptors: {new}, of {count} now and {before[2]} before")


def pytest_configure() -> None:
    """Let the programs of the tests hear SIGINT, which a shell has ignored by what it starts in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection() -> None:
    """No collection of garbage while the tests are found: they all live to the end."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let collections of garbage leave out what lives to the end: the tests themselves, a million objects."""
    gc.enable()
    gc.collect()
    gc.freeze()


# -- clients -----------------------------------------------------------------------------------


def connect(address: Address | str, said: bytes = b"", timeout: float = 20.0) -> socket.socket:
    """A client that has sent `said`; `address` may be the path of a unix socket.  Its time-out ends a failing test.

    Raises OSError, and has closed the socket then.  A server that refuses a client may reset it at any moment: the
    connect fails, or the sending, or only what the caller reads.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(address, str):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(timeout)
            client.connect(address)
        else:
            client = stack.enter_context(socket.create_connection(address, timeout))
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a second write does not wait for an ACK
        if said:  # to send nothing fails, too, where there was a reset
            client.sendall(said)
        stack.pop_all()
    return client


# -- far ends ----------------------------------------------------------------------------------


class Server:
    """A TCP server, on a free port by default; `handler` serves each connection in a thread of its own.

    Used with `with`; leaving the block closes every connection.  `accepted` counts connections.  A handler that raises
    OSError has lost its client, which is no failure.  A handler returns what it has heard, and the test waits for that
    with `result()`: the handler may end later than the test sees the connection end.
    """

    def __init__(self, handler: Callable[[socket.socket], object], address: Address = (HOST, 0)):
        self.handler = handler
        self.accepted = 0
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.listener = socket.create_server(address)
        self.address: Address = self.listener.getsockname()[:2]
        self.lock = threading.Lock()  # guards what follows
        self.live: set[socket.socket] = set()
        self.closed = False
        self.threads = [threading.Thread(target=self.accept, name="far-accept")]
        self.threads[0].start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.closed = True
            for sock in self.live:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):  # one more client wakes the thread in accept()
            socket.create_connection(self.address, 5).close()
        for thread in self.threads:
            thread.join()
        self.listener.close()

    def accept(self) -> None:
        while True:
            sock, _ = self.listener.accept()
            with contextlib.suppress(OSError):  # it has left already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a second write does not wait for an ACK
            with self.lock:
                if self.closed:
                    sock.close()
                    return
                self.accepted += 1
                self.live.add(sock)
                self.threads.append(threading.Thread(target=self.serve, args=(sock,), name="far"))
                self.threads[-1].start()

    def serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                self.results.put(self.handler(sock))
            except OSError as error:
                self.results.put(error)
        with self.lock:
            self.live.discard(sock)

    def result(self) -> Any:
        """What the next handler to end returned, or the OSError it ended with; fails after ten seconds."""
        return self.results.get(timeout=10)


def echo(sock: socket.socket) -> None:
    """A handler that sends everything back until its client ends."""
    while data := sock.recv(65536):
        sock.sendall(data)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """serve(handler, address=a free port) -> Server, until the test ends.  `handler` gets each connection's socket."""
    with contextlib.ExitStack() as stack:
        yield lambda *words: stack.enter_context(Server(*words))


@pytest.fixture
def echo_server(serve) -> Server:
    """A far end that sends everything back: `.address`, `.accepted`."""
    return serve(echo)


@contextlib.contextmanager
def deaf_listener(address: Address = (HOST, 0)) -> Iterator[Address]:
    """The address of a listener whose backlog is full: the kernel drops further SYNs, so a connect hangs."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind(address)
        full.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield full.getsockname()


@pytest.fixture
def deaf() -> Iterator[Address]:
    """The address of a `deaf_listener`."""
    with deaf_listener() as address:
        yield address


# -- ports -------------------------------------------------------------------------------------

@pytest.fixture
def free_ports() -> Iterator[Callable[..., tuple[int, int]]]:
    """free_ports(count=20) -> (first, last): consecutive ports that nobody holds, of this test alone until it ends."""
    with contextlib.ExitStack() as stack:
        yield lambda count=20: stack.enter_context(free_block(count))


@pytest.fixture
def ports(free_ports) -> str:
    """The option --ports, with thirty free ones."""
    first, last = free_ports(30)
    return f"--ports={first}-{last}"


# -- a far end for crowds ----------------------------------------------------------------------


@pytest.fixture
def single_loop_echo() -> Iterator[Address]:
    """The address of a far end that echoes to any number of clients from one thread."""
    selector = selectors.DefaultSelector()
    stop_reader, stop_writer = socket.socketpair()
    listener = socket.create_server((HOST, 0), backlog=4096)
    listener.setblocking(False)

    def loop() -> None:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(stop_reader, selectors.EVENT_READ)
        clients = set()
        while True:
            for key, _ in selector.select():
                if key.fileobj is stop_reader:
                    for client in clients:
                        client.close()
                    return
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    clients.add(client)
                    selector.register(client, selectors.EVENT_READ)
                    continue
                data = b""
                with contextlib.suppress(OSError):
                    data = key.fileobj.recv(65536)
                    key.fileobj.sendall(data)
                if not data:
                    selector.unregister(key.fileobj)
                    clients.discard(key.fileobj)
                    key.fileobj.close()

    thread = threading.Thread(target=loop, name="far-loop")
    thread.start()
    yield listener.getsockname()[:2]
    stop_writer.close()
    thread.join()
    for sock in (stop_reader, listener):
        sock.close()
    selector.close()
