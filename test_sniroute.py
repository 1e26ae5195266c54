"""What users are promised, with the real program: `launch` of testbed/program.py.

A copy of some files runs with a bare Python, in every form.  Thousands of clients cost little, and few descriptors are
no crash.  The carrier does without cloudflared.  test_clients.py has the clients that users bring.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from typing import Callable, Iterable, Iterator

import pytest

import sniroute_routes
from sniroute_refusals import REFUSALS
from sniroute_settings import load_settings
from conftest import HOST, linux, wait_until
from testbed.admin import tell
from testbed.clients import backwards, post, program_path, psql
from testbed.hellos import HELLO, NAME, genuine
from testbed.program import (BARE, BARE_PYTHON, Program, activated, changed, command, counter, cpu_seconds, environment,
                             execute, installed, namespace, resident)
from testbed.running import TUNNEL, alert, read_all, read_exactly, route
from testbed.standins import Edge


# -- the program -------------------------------------------------------------------------------


@pytest.fixture
def programs() -> None:
    """No fork: a start as users know it is what these tests are about."""


@pytest.mark.parametrize("start", ["symlink", "other name", "-m"])
def test_program_starts_under_any_name(tmp_path, start):
    installed(tmp_path)
    command = [str(tmp_path / "router.py")]
    if start == "symlink":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "router").symlink_to(tmp_path / "sniroute.py")
        command = [str(tmp_path / "bin" / "router")]
    elif start == "-m":
        command = ["-m", "sniroute"]
    else:
        (tmp_path / "sniroute.py").rename(tmp_path / "router.py")
    done = subprocess.run([sys.executable, *command, "explain", "tcp.example.com", "--route=*=tcp:{name}:443"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert "tcp:tcp.example.com:443" in done.stdout


SECRETS = {"TUNNEL_SERVICE_TOKEN_ID": "s3cret-id.access", "TUNNEL_SERVICE_TOKEN_SECRET": "s3cret-of-access",
           "SNIROUTE_ADMIN_TOKEN": "s3cret-of-the-admin", "BASTION_TOKEN": "s3cret-of-a-program", "KEY": "s3cret-key"}


@linux
@pytest.mark.parametrize("style", ["text", "json"])
def test_no_secret_is_in_the_log_or_on_a_command_line(launch, cloudflared, ports, echo_server, settings_file, free_ports,
                                                      style):
    """Whatever is logged, asked for, or goes wrong; any user of the host may read a command line."""
    cloudflared.far("*", echo_server.address)
    cloudflared.fault("broken.test", exit=1, words="bad luck")
    path = settings_file(f"""[routes]
"*.example.com" = "cloudflared:{{name}}"
"broken.example.net" = "cloudflared:broken.test"
"shop.example.net" = "nodepass:$KEY@{HOST}:{free_ports(1)[0]}"
[routes."exec.example.net"]
target = "exec:/bin/cat"
env_from = ["BASTION_TOKEN"]
""")
    program = launch("-c", path, ports, f"--cloudflared={cloudflared.path}", "--log-level=debug", f"--log-format={style}",
                     f"--admin={HOST}:0", env=environment(**SECRETS), listeners=0)
    address = wait_until(lambda: re.search(r"listening on (127.0.0.1):(\d+)\b(?!.*admin)", program.log()))
    address = address[1], int(address[2])
    words: set[bytes] = set()

    def look() -> set[bytes]:
        for task in pathlib.Path(f"/proc/{program.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it ends meanwhile
                for pid in (task / "children").read_text().split():
                    words.add(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
        return words

    for name in (NAME, "exec.example.net", "broken.example.net", "shop.example.net"):
        with program.connect(genuine(name=name), address) as client:
            if name != "shop.example.net":  # whose server has nobody to lead it to, for seconds
                client.recv(1)
            look()
    wait_until(lambda: all(any(word in each for each in look()) for word in (b"--hostname", b"nodepass")))
    program.signal(signal.SIGHUP)
    program.wait_for("reload")
    counter(program, "accepted")
    said = [program.log(), *(command(*way, "-c", path, **SECRETS) for way in (["check"], ["explain", "shop.example.net"]))]
    assert "s3cret" not in f"{said}{words}"


def test_a_tunnel_program_that_others_may_change_is_refused_and_named(launch, cloudflared, ports):
    """By the start, `check`, `explain`, and to its clients; another one, or the carrier, does not take its place."""
    cloudflared.directory.chmod(0o777)
    path = f"{cloudflared.directory}:{os.environ['PATH']}"
    said = (f"{cloudflared.path} is not run, since {cloudflared.directory} can be changed by other users: "
            f"chmod o-w {cloudflared.directory}")
    program = launch(ports, "--route=*=cloudflared:{name}", env=environment(PATH=path))
    program.wait_for(f" warning {said}; names that need it are refused until then\n")
    with program.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    program.wait_for("reason=tunnel_failed")
    assert program.log().count(said) == 3, "at the start, by the tunnel, and for the client"
    assert cloudflared.starts() == []
    assert said in command("check", "--route=*=cloudflared:{name}", PATH=path).stderr
    explained = command("explain", NAME, "--route=*=cloudflared:{name}", PATH=path)
    assert explained.returncode == 1 and f"refused: {said} (tunnel_failed, " in explained.stdout
    named = command("check", f"--cloudflared={cloudflared.path}")
    assert named.returncode == 2 and f"{cloudflared.directory} can be changed by other users" in named.stderr
    cloudflared.directory.chmod(0o755)
    with program.connect(HELLO):
        program.wait_for("tunnel ready")


def test_two_files_and_a_bare_python_are_all_it_takes(launch, two_files):
    """No packages, no PATH, no environment, no settings."""
    began = time.monotonic()
    program = launch(program=two_files, python=BARE_PYTHON, env=BARE)
    assert time.monotonic() - began < 3
    missing = "cloudflared is not there: install it, or name it with --cloudflared"
    assert f" warning {missing}; names that need it are refused until then\n" in program.log()
    assert " warning no --route: every name is served, " in program.log()
    with program.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    program.wait_for(missing, 2)


def test_two_files_route_bytes(launch, two_files, echo_server):
    program = launch(route(echo_server.address), program=two_files, python=BARE_PYTHON, env=BARE)
    with program.connect(HELLO + b"!") as client:
        assert read_exactly(client, len(HELLO) + 1) == HELLO + b"!"


def test_a_name_with_fields_is_led_to_its_service_and_port(launch, cloudflared, settings_file, echo_server, ports):
    """By a file of settings, through a port and through a tunnel; what is no port is refused, and nothing is dialled."""
    host, port = echo_server.address
    cloudflared.far("cft-web-eu.example.net", echo_server.address)
    program = launch("-c", settings_file(f"""[routes]
"{{service}}--{{port}}.svc.example.com" = "tcp:{host}:{{port}}"
"{{service}}.{{env}}.tun.example.com" = "cloudflared:cft-{{service}}-{{env}}.example.net"
"""), ports, f"--cloudflared={cloudflared.path}")
    for name in (f"my-api--{port}.svc.example.com", "web.eu.tun.example.com"):
        hello = genuine(name=name)
        with program.connect(hello) as client:
            assert read_exactly(client, len(hello)) == hello
    assert echo_server.accepted == 2
    for name in (f"my-api--{port}x.svc.example.com", "my-api--70000.svc.example.com", "my-api--https.svc.example.com"):
        with program.connect(genuine(name=name)) as client:
            assert read_all(client) == alert(112)
    program.wait_for(" reason=bad_name ", 3)
    assert echo_server.accepted == 2
    assert f" backend=tcp:{host}:{port} " in program.log()


@linux
def test_router_that_has_just_started_is_small(launch, two_files):
    """Not at its first start, when Python compiles it: that leaves up to 3 MiB more."""
    assert execute(*BARE_PYTHON, str(two_files), "check", env=BARE).returncode == 0
    sizes = []
    for _ in range(3):  # what the allocator takes varies by some MiB under load: the smallest is the program's
        program = launch(program=two_files, python=BARE_PYTHON, env=BARE)
        sizes.append(resident(program.pid))
        program.stop()
    limit = 20
    if sys.version_info >= (3, 14):  # its logging imports inspect; without the interpreter's lock, it is larger still
        limit = 26 if sysconfig.get_config_var("Py_GIL_DISABLED") else 22
    assert min(sizes) < limit, sizes


# -- many clients ------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("options, says", [([], "--max-connections (16) are open"),
                                           (["--max-connections=1000"], "Too many open files")],
                         ids=["limit that fits", "limit that does not"])
def test_few_descriptors_and_many_clients(launch, single_loop_echo, options, says):
    """64 descriptors, 100 clients that stay: no crash, no spinning; when they leave it goes on."""
    program = launch(route(single_loop_echo), *options,
                     python=("/bin/sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", sys.executable))
    assert ("raise LimitNOFILE" in program.log()) is bool(options)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(program.connect(HELLO)) for _ in range(100)]
        assert read_exactly(clients[0], len(HELLO)) == HELLO
        program.wait_for(says)
        before = cpu_seconds(program.pid)
        clients[0].settimeout(0.3)  # which is the time that is measured
        with pytest.raises(TimeoutError):
            clients[0].recv(1)
        assert cpu_seconds(program.pid) - before < 0.15
    assert program.log().count("not accepting") <= 1
    def served() -> bool:
        with contextlib.suppress(ConnectionResetError), program.connect(HELLO) as client:
            return read_exactly(client, len(HELLO)) == HELLO
        return False
    wait_until(served, timeout=5)


@linux
@pytest.mark.parametrize("options, says", [([], " are open"), (["--max-connections=1000"], "Too many open files")],
                         ids=["limit that fits", "limit that does not"])
def test_the_admin_answers_while_clients_take_all_that_there_is(launch, single_loop_echo, admin_path, options, says):
    """64 descriptors, 200 clients: half of them say half a hello, the others stay.  One is kept for the admin."""
    program = launch(route(single_loop_echo), f"--admin=unix:{admin_path}", "--prelude-timeout=60s", *options,
                     python=("/bin/sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", sys.executable))
    with contextlib.ExitStack() as stack:
        for number in range(200):
            stack.enter_context(program.connect(HELLO[:100] if number % 2 else HELLO))
        program.wait_for(says)
        for path in ("/healthz", "/metrics", "/status") * 3:
            reply = tell(admin_path, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert reply.status == 200, path


@linux
def test_a_router_that_stood_still_takes_nobody_for_silent(launch, single_loop_echo):
    """SIGSTOP for longer than the deadline of a prelude, as where a host is suspended; more speak than a turn reads."""
    program = launch(route(single_loop_echo), "--prelude-timeout=1500ms",
                     python=changed("sniroute_loop.STOOD_STILL = 0.4", "sniroute_loop.EVENTS = 4"))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(program.connect(HELLO[:100])) for _ in range(40)]
        wait_until(lambda: counter(program, "accepted") == 40)
        program.signal(signal.SIGSTOP)
        for client in clients:
            client.sendall(HELLO[100:])
        time.sleep(2.0)  # which is what is tested
        program.signal(signal.SIGCONT)
        for client in clients:
            assert read_exactly(client, len(HELLO)) == HELLO


def test_a_wall_clock_that_jumps_ends_nothing(launch, single_loop_echo):
    """Each look at the wall clock is a day later or earlier than the one before: the log has that, and nobody else."""
    program = launch(route(single_loop_echo), "--connection-idle=1h", "--prelude-timeout=1h", "--log-level=debug",
                     python=changed("import itertools, time", "days, real = itertools.cycle((0, 1, -1)), time.time",
                                    "time.time = lambda: real() + 86400 * next(days)"))
    with program.connect(HELLO) as early, program.connect(HELLO[:100]) as half:
        assert read_exactly(early, len(HELLO)) == HELLO
        for _ in range(20):
            with program.connect(HELLO) as client:
                assert read_exactly(client, len(HELLO)) == HELLO
            early.sendall(b"x")
            assert early.recv(1) == b"x"
        half.sendall(HELLO[100:])
        assert read_exactly(half, len(HELLO)) == HELLO
        wait_until(lambda: len(set(re.findall(r"^(\d+-\d+-\d+)T", program.log(), re.MULTILINE))) >= 3, what="three days")


LISTENER = """
import socket, sys, threading
def serve(sock):
    with sock:
        while data := sock.recv(65536):
            sock.sendall(data)
listener = socket.create_server(("0.0.0.0", int(sys.argv[1])))
while True:
    threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()
"""


@linux
def test_local_ports_that_run_out_blame_nobody_and_are_told(launch, held, tmp_path, free_ports):
    """Four ports to dial from, in a network of its own: the fifth client is refused in words, or is led elsewhere.

    The tunnel is not started again, and no backend rests: it is this host that is short.
    """
    (tmp_path / "listener.py").write_text(LISTENER)
    port, _ = free_ports()
    listener = f"command:{sys.executable} -S {tmp_path}/listener.py {{port}}"
    (tmp_path / "routes.toml").write_text(f"""
[routes]
"{NAME}" = "{listener}"
"b.example.com" = {{ target = ["tcp:127.0.0.1:{port}", "{listener} other"], balance = "first" }}
""")
    made = activated(("sniroute", held))
    made["python"] = (*namespace("--net", "ip link set lo up && echo 61000 61003 > "
                                           "/proc/sys/net/ipv4/ip_local_port_range"), *made["python"])
    program = launch("-c", f"{tmp_path}/routes.toml", f"--ports={port}-{port + 1}", **made)
    with contextlib.ExitStack() as stack:
        def ask(name: str = NAME) -> bytes:
            hello = genuine(name=name)
            client = stack.enter_context(program.connect(hello))
            said = client.recv(len(hello))
            if said != hello:
                client.close()
            return b"served" if said == hello else said
        assert [ask() for _ in range(4)] == [b"served"] * 4
        assert [ask()[:1] for _ in range(4)] == [b"\x15"] * 4, "alerts"
        assert [ask("b.example.com") for _ in range(4)] == [b"served"] * 4, "the fifth way is another backend's"
        wait_until(lambda: counter(program, "busy") == 4)
    assert program.log().count("tunnel ready") == 2 and " is down" not in program.log()
    assert "no local port left to dial it from" in program.log()


@linux
def test_a_backend_whose_host_has_gone_without_a_word_is_found_out(launch, held, tmp_path, free_ports):
    """A firewall that drops all is as a cable that is pulled: nothing comes back, and nothing says so."""
    nft = program_path("nft", "nftables")
    (tmp_path / "listener.py").write_text(LISTENER)
    port, _ = free_ports(1)
    made = activated(("sniroute", held))
    made["python"] = (*namespace("--net", "ip link set lo up && ip addr add 198.51.100.1/32 dev lo"), *made["python"][:-1],
                      *changed("sniroute_targets.KEEPALIVE = (1, 1, 1)"))
    program = launch(f"--route=t.example.com=command:{sys.executable} -S {tmp_path}/listener.py {{port}}",
                     f"--route={NAME}=tcp:198.51.100.1:{port}", f"--ports={port}-{port}", **made)
    with program.connect(hello := genuine(name="t.example.com")) as client:
        assert read_exactly(client, len(hello)) == hello  # so the listener is up
        with program.connect(HELLO) as idle:
            assert read_exactly(idle, len(HELLO)) == HELLO
            subprocess.run(["nsenter", f"--net=/proc/{program.pid}/ns/net", nft, "-f", "-"], check=True, input=b"""
                table ip test { chain input { type filter hook input priority 0; ip daddr 198.51.100.1 drop; }; }""")
            with pytest.raises(ConnectionResetError):  # no end, which would look whole
                idle.recv(1)
        client.sendall(b"x")
        assert client.recv(1) == b"x"


@pytest.fixture
def descriptors() -> Iterator[Callable[[int], None]]:
    """descriptors(count): let this process open so many files, or skip."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def need(count: int) -> None:
        if hard != resource.RLIM_INFINITY and hard < count:
            pytest.skip(f"RLIMIT_NOFILE is {hard}, and {count} are needed")
        if soft != resource.RLIM_INFINITY and soft < count:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))

    yield need
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@linux
def test_thousands_of_idle_connections_are_cheap_and_leave_nothing(launch, two_files, single_loop_echo, descriptors):
    descriptors(4500)
    program = launch(route(single_loop_echo), program=two_files, python=BARE_PYTHON, env=BARE)
    with program.connect(HELLO) as client:  # so that what comes once is there
        assert read_exactly(client, len(HELLO)) == HELLO
    wait_until(lambda: counter(program, "client_closed") == 1)
    before = len(os.listdir(f"/proc/{program.pid}/fd"))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(program.connect(HELLO)) for _ in range(2000)]
        for client in clients:
            assert read_exactly(client, len(HELLO)) == HELLO
        assert resident(program.pid) < 40
    wait_until(lambda: counter(program, "client_closed") == 2001, timeout=5, what="the end of all connections")
    assert len(os.listdir(f"/proc/{program.pid}/fd")) == before
    assert " connections more" not in program.log().rpartition("counters: ")[2]
    assert " connection " not in program.log().rpartition("counters: ")[2]


@pytest.mark.parametrize("tunnel_program", ["stand-in", "carrier"], indirect=True)
def test_tunnel_that_is_killed_under_a_crowd_costs_only_those_it_was_answering(launch, tunnel_program, ports, serve):
    """Twenty clients come again and again: whoever had received nothing is served."""
    payload = random.Random(11).randbytes(1 << 16)
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(payload)
        read_all(sock)
    tunnel_program.far("*", serve(handler).address)
    program = launch(TUNNEL, ports, *tunnel_program.options, env=environment(**tunnel_program.environ))
    enough = threading.Event()
    served, errors, cut = [0] * 20, [], []
    def come_again(number: int) -> None:
        while not enough.is_set():
            try:
                with program.connect(HELLO) as client:
                    data = read_exactly(client, len(payload))
            except OSError as error:
                errors.append(error)
                continue
            if data == payload:
                served[number] += 1
            else:
                cut.append(len(data))
    threads = [threading.Thread(target=come_again, args=(number,), name="client") for number in range(20)]
    for thread in threads:
        thread.start()
    try:
        for kills in range(2):
            goal = [count + 2 for count in served]
            wait_until(lambda: all(count >= wanted for count, wanted in zip(served, goal, strict=True)), 20,
                       f"service for everybody after {kills} kills")
            program.wait_for(" tunnel ready ", kills + 1)
            pids = re.findall(r" tunnel ready .* pid=(\d+)$", program.log(), re.MULTILINE)
            assert len(pids) == kills + 1
            if kills < 1:
                os.kill(int(pids[-1]), signal.SIGKILL)
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    resets = [error for error in errors if not isinstance(error, ConnectionResetError)]
    assert not resets and 0 not in cut, (errors, cut)
    assert len(cut) + len(errors) <= len(threads)
    program.wait_for("it ended (signal 9)")


# -- in every form, with nothing else ----------------------------------------------------------


def test_every_form_carries_psql(form, launch, own_edge, postgres, ports):
    own_edge.far("db.example.com", postgres)
    program = launch(ports, CARRIED, program=form, python=BARE_PYTHON, env={**BARE, **own_edge.environ})
    ended = psql(program.address, ["select repeat('x', 1000000)", "select 7"], "sslmode=require")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout == b"x" * 1_000_000 + b"\n7\n"


def test_every_form_serves_curl(form, launch, serve, certificate):
    program = launch(route(serve(backwards(certificate)).address, "web.example.com"), program=form,
                     python=BARE_PYTHON, env=BARE)
    assert post(program, certificate, b"stressed") == b"desserts"


def test_every_form_shows_its_page_in_a_browser(form, launch, echo_server, browser, free_ports):
    port, _ = free_ports(2)
    program = launch(route(echo_server.address), f"--admin={HOST}:{port}", program=form, python=BARE_PYTHON, env=BARE)
    program.wait_for(f" info admin on {HOST}:{port}\n")
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        browser.call("Page.navigate", url=f"http://{HOST}:{port}/")
        wait_until(lambda: browser.evaluate("document.getElementById('phase')?.innerText") == "running",
                   what="the page")
        wait_until(lambda: browser.evaluate("refresh()") or NAME in browser.text("connections"), what="the connection")


def test_every_form_has_every_command(form, own_edge, serve):
    """In a folder that it may not write to, and where nothing is left behind."""
    own_edge.far("db.example.com", serve(lambda sock: None).address)  # it ends at once; for more the carrier would wait
    before = sorted(path.name for path in form.parent.iterdir() if path.name != "__pycache__")
    def run(*words: str) -> str:
        ended = execute(*BARE_PYTHON, "-B", str(form), *words, env={**BARE, **own_edge.environ}, said="", text=True)
        assert (ended.returncode, ended.stderr) == (0, ""), words
        return ended.stdout
    orders = (("explain", NAME, CARRIED), ("check", "--route=a.b=tcp:h:1"), ("selftest",), ("--version",),
              ("carrier", "--version"), ("--help",), ("carrier", "--help"))
    with concurrent.futures.ThreadPoolExecutor(len(orders)) as pool:  # some wait most of their time
        explained, checked, tested, version, carrier, usage, access = pool.map(lambda words: run(*words), orders)
    assert explained.endswith("\nfar end: it answers\n")
    assert checked == "a.b=tcp:h:1\n"
    assert re.search(r"^(\d+) of \1 went well", tested, re.MULTILINE)
    assert version.endswith("; with doctor, admin, carrier, commands, backends, web, kubernetes, registry, nodepass)\n")
    assert carrier.startswith("sniroute_carrier ")
    assert "--route" in usage and "access tcp" in access
    assert sorted(path.name for path in form.parent.iterdir() if path.name != "__pycache__") == before


def test_one_file_serves_where_nothing_can_be_written(one_file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    copy = pathlib.Path(shutil.copy(one_file, folder))
    folder.chmod(0o555)
    as_others = ()
    if os.geteuid() == 0:  # root may write anywhere, unless it gives that up
        as_others = program_path("setpriv", "util-linux"), "--bounding-set=-dac_override,-dac_read_search"
    try:
        may = execute(*as_others, sys.executable, "-c", "import os, sys; open(sys.argv[1], 'w')", str(folder / "x"))
        assert b"PermissionError" in may.stderr, "else the test shows nothing"
        ended = execute(*as_others, *BARE_PYTHON, str(copy), "selftest", cwd=folder, env=BARE, said="", text=True)
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
        assert os.listdir(folder) == ["sniroute.pyz"]
    finally:
        folder.chmod(0o755)


# -- with the carrier, and nothing else --------------------------------------------------------

TRANSFER = int(os.environ.get("SNIROUTE_TEST_TRANSFER", "16"))  # MiB each way; more is for those who have the time
BLOCK = random.Random(14).randbytes((1 << 20) - 8)


def blocks() -> Iterator[bytes]:
    """TRANSFER blocks of 1 MiB, no two the same."""
    return (struct.pack(">Q", number) + BLOCK for number in range(TRANSFER))


def digest(parts: Iterable[bytes]) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.digest()


def depot(sock: socket.socket) -> None:
    """A far end: behind the hello, `d` asks for the blocks, `u` brings them and asks for their digest.  Then it ends,
    or the carrier would wait for more.
    """
    read_exactly(sock, len(HELLO))
    if sock.recv(1) == b"d":
        for block in blocks():
            sock.sendall(block)
    else:
        left = TRANSFER << 20
        def parts() -> Iterator[bytes]:
            nonlocal left
            while left and (data := sock.recv(min(left, 1 << 18))):
                left -= len(data)
                yield data
        sock.sendall(digest(parts()))


@pytest.fixture
def carried(launch, three_files, own_edge, ports) -> Callable[..., Program]:
    """carried(*options) -> a router with the carrier, an empty PATH, and the edge's proxy and certificate."""
    return lambda *options: launch(ports, *options, program=three_files, python=BARE_PYTHON,
                                   env={**BARE, **own_edge.environ})


CARRIED = "--route=*.example.com=cloudflared:{name}"


def test_three_files_and_an_empty_path_carry_psql(carried, own_edge, postgres):
    own_edge.far("db.example.com", postgres)
    program = carried(CARRIED)
    ended = psql(program.address, ["select repeat('x', 1000000)", "select 7"], "sslmode=require")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout == b"x" * 1_000_000 + b"\n7\n"
    assert program.log().count("cloudflared is not on PATH: the carrier beside sniroute.py does its work") == 1


def test_three_files_and_an_empty_path_carry_many_bytes_each_way(carried, own_edge, serve):
    own_edge.far("db.example.com", serve(depot).address)
    program = carried(CARRIED)
    with program.connect(HELLO + b"d") as client:
        def parts() -> Iterator[bytes]:
            left = TRANSFER << 20
            while left and (data := client.recv(min(left, 1 << 18))):
                left -= len(data)
                yield data
        assert digest(parts()) == digest(blocks())
    with program.connect(HELLO + b"u") as client:
        for block in blocks():
            client.sendall(block)
        assert read_exactly(client, 32) == digest(blocks())
    ends = wait_until(lambda: len(found := own_edge.ends()) == 2 and found)
    assert all(end["largest_up"] <= 16384 and not end["cut"] and not end["client_pings"] for end in ends)


def test_names_of_both_schemes_share_one_carrier(carried, own_edge, echo_server):
    own_edge.far("*", echo_server.address)
    program = carried(CARRIED, "--route=*.example.org=carrier:{name}")
    hellos = [genuine(name=f"n{number}.example.{top}") for number in range(3) for top in ("com", "org")]
    for hello in hellos:
        with program.connect(hello) as client:
            assert read_exactly(client, len(hello)) == hello
    program.wait_for(" tunnel ready ", 6)
    assert len(set(re.findall(r" tunnel ready .* pid=(\d+)$", program.log(), re.MULTILINE))) == 1


TOKEN = {"TUNNEL_SERVICE_TOKEN_ID": "the-id", "TUNNEL_SERVICE_TOKEN_SECRET": "s3cret", "CF_ACCESS_TOKEN": "jwt.jwt"}


@pytest.mark.parametrize("pattern, target, own", [
    ("*", "cft-{name}", False),
    ("*", "{label}.com", False),
    ("*", "one.example.com", True),
    ("*", "{label}.tunnels.example.net", True),
    ("*.example.com", "{name}", True),
    ("**.example.com", "cft-{name}", True),
    ("*.example.com", "cft-{label}-{domain}", False),
    ("**.example.com", "cft-{label}-{domain}", False),
    ("**.corp.example.com", "cft-{label}-{domain}", True),
    ("*.example.com", "{label}.{label}", False),
    ("a.example.com", "cft-{label}-{domain}", True),
])
def test_token_is_shown_only_where_the_operator_has_chosen_the_domain(pattern, target, own):
    """Whoever owns the domain that a route leads to reads what the router shows there."""
    route = sniroute_routes.parse_route(f"{pattern}=carrier:{target}")
    assert route.is_of_one_domain() is own
    settings = load_settings([f"--route={route}", "--route=x.example.org=carrier:{name}"], TOKEN)
    decision = settings.routes.decide(pattern.replace("**", "a").replace("*", "a") if "." in pattern else "a.b.c")
    environment = settings.launchers[decision.tunnel.launcher].environment_for(decision.tunnel.identified)
    assert TOKEN.items() <= environment.items() if own else not TOKEN.keys() & environment.keys()


def test_stranger_with_a_domain_does_not_learn_the_token(launch, three_files, own_edge, ports):
    own_edge.far("*", (HOST, 1))
    program = launch(ports, "--route=*.example.com=carrier:{name}", "--route=*=carrier:{name}", program=three_files,
                     python=BARE_PYTHON, env={**BARE, **own_edge.environ, **TOKEN})
    shown = {}
    for name in ("db.example.com", "db.example.org"):
        with program.connect(genuine(name=name)) as client:
            read_all(client)
        shown[name] = {key.lower(): value for key, value in own_edge.requests(name)[0]["headers"]}
    assert shown["db.example.com"]["cf-access-client-secret"] == "s3cret"
    assert shown["db.example.com"]["cf-access-token"] == "jwt.jwt"
    assert not [key for key in shown["db.example.org"] if key.startswith("cf-")]
    assert program.log().count("the Access token is not shown there") == 1


FAULTS = {  # what goes wrong at the edge -> reason, alert, words, dials
    "login": ({"service_token": ["id", "secret"]}, "tunnel_denied", 49, "Access wants a login", 1),
    "403": ({"deny": 403}, "tunnel_denied", 49, "Access denied it", 1),
    "404": ({"status": 404}, "tunnel_unknown", 112, "the edge knows no such application", 1),
    "certificate": ({"cert": "expired"}, "tunnel_failed", 80, "the edge's certificate is not trusted: certificate has expired",
                    1),
    "502": ({"status": 502}, "tunnel_failed", 80, "its connector runs, but cannot reach the service", 2),
    "530": ({"status": 530, "body": "error code: 1033"}, "tunnel_failed", 80,
            "its tunnel is down (does its connector run?): HTTP 530, error 1033", 2),
    "reset": ({"rst": "tls"}, "tunnel_failed", 80, "the edge closed the connection: in the TLS handshake", 2),
}


def test_refusal_says_what_the_carrier_met(carried, own_edge):
    """Each fault has a name of its own; one router meets them all."""
    program = carried(CARRIED)
    for what, (fault, reason, description, words, dials) in FAULTS.items():
        name = f"{what}.example.com"
        own_edge.fault(name, **fault)
        with program.connect(genuine(name=name)) as client:
            assert read_all(client) == alert(description), what
        program.wait_for(f" name={name} ")
        line, = [line for line in program.lines if f" name={name} " in line]
        assert f" reason={reason} " in line and f"{name}: {words}" in line
        wait_until(lambda: len(own_edge.ends(name)) >= dials)
        assert len(own_edge.ends(name)) == dials, what


def test_reasons_of_clients_that_come_together_are_not_mixed_up(carried, own_edge):
    """Three names, fifteen clients at once: each line has the words for its own name."""
    words = {"a": "Access denied it", "b": "the edge knows no such application", "c": "its tunnel is down"}
    for label, status in zip(words, (403, 404, 530), strict=True):
        own_edge.fault(f"{label}.example.com", status=status)
    program = carried(CARRIED)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(program.connect(genuine(name=f"{label}.example.com")))
                   for _ in range(5) for label in words]
        for client in clients:
            assert read_all(client)[:1] == b"\x15"
    program.wait_for(" reason=tunnel_", 15)
    for line in program.log().splitlines():
        if " reason=tunnel_" in line:
            assert words[re.search(r" name=(.)\.", line)[1]] in line


def test_client_that_leaves_while_the_edge_hangs_is_let_go_at_once(carried, own_edge):
    own_edge.fault("db.example.com", hang="upgrade")
    program = carried(CARRIED)
    with program.connect(HELLO):
        wait_until(own_edge.requests)
    end, = wait_until(own_edge.ends, timeout=3)
    assert end["left"] in ("eof", "reset", "close_notify")
    program.wait_for(" reason=client_left")


def explained(three_files: pathlib.Path, own_edge: Edge) -> subprocess.CompletedProcess[str]:
    return execute(*BARE_PYTHON, str(three_files), "explain", "db.example.com", CARRIED, text=True, said="",
                   env={**BARE, **own_edge.environ})


def test_explain_dials_the_far_end_once(three_files, own_edge, echo_server, tmp_path):
    """One that is silent: the carrier waits a while for its answer, here not for two seconds."""
    own_edge.far("db.example.com", echo_server.address)
    hasty = pathlib.Path(shutil.copytree(three_files.parent, tmp_path / "hasty"))
    text = (hasty / "sniroute_carrier.py").read_text()
    assert text.count("\nGRACE = 2.0 ") == 1
    (hasty / "sniroute_carrier.py").write_text(text.replace("\nGRACE = 2.0 ", "\nGRACE = 0.2 "))
    ended = explained(hasty / three_files.name, own_edge)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert (lines[2], lines[4:]) == ("target:  cloudflared:db.example.com", ["far end: it answers"])
    assert len(own_edge.requests()) == 1


def test_explain_says_what_the_far_end_says(three_files, own_edge):
    own_edge.fault("db.example.com", deny=403)
    ended = explained(three_files, own_edge)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.endswith("refused: db.example.com: Access denied it (is the token right, and does the "
                                 "application's policy allow it?): HTTP 403 (tunnel_denied, TLS alert 49)\n"
                                 f"to do:   {REFUSALS['tunnel_denied'].advice}\n")
