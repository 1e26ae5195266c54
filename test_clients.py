"""Real clients and real servers, as users bring them: the main job on real input.

psql, psycopg, node-postgres, curl, openssl, a browser and redis-cli go through the program, by way of an address, of
the stand-in for cloudflared, and of the carrier.  They write names as they like, and end as they like.  The hosts are
real, too: a first address that swallows packets, a tunnel that hangs under early data, a container whose process 1 the
router is.  testbed/clients.py says what is needed; a test whose program is missing is skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import random
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
from typing import Callable, Iterator

import pytest

import sniroute_deadlines
from conftest import HERE, HOST, Address, exit_code, deaf_listener, linux, wait_until
from testbed.clients import (Certificate, backwards, endings, namespaces, page, post, program_path, psql,
                             version_of, with_pg)
from testbed.hellos import HELLO, NAME
from testbed.ports import free_port
from testbed.program import Program, changed, environment, execute
from testbed.running import TUNNEL, read_all, read_exactly, route


# -- ssh ---------------------------------------------------------------------------------------


@pytest.fixture(params=["exec", "command"])
def through_ssh(request, launch, ports, sshd) -> Callable[..., Program]:
    """through_ssh(address, *options): a router that leads each name to an address by way of a real sshd."""
    def start(address: Address, *options: str, ssh: str = sshd, python: tuple[str, ...] = ()) -> Program:
        far = f"{address[0]}:{address[1]}"
        way = {"exec": f"exec:{ssh} -W {far}", "command": f"command:{ssh} -N -L {{address}}:{far}"}[request.param]
        return launch(ports, f"--route=*.example.com={way}", *options, env=environment(), python=python)
    return start


PATIENT = changed("sniroute_deadlines.WORDS_TIMEOUT = 1.0")  # the last words of ssh may come later on a busy host


def test_curl_goes_through_a_real_sshd_and_back(through_ssh, serve, certificate):
    program = through_ssh(serve(backwards(certificate)).address)
    payload = random.Random(17).randbytes(3_000_000)
    for _ in range(3):
        assert post(program, certificate, payload) == payload[::-1]
    assert {end["reason"] for end in endings(program, 3)} <= {"client_closed", "backend_closed"}


def test_psql_goes_through_a_real_sshd(through_ssh, postgres):
    program = through_ssh(postgres)
    for _ in range(2):
        ended = psql(program.address, ["select repeat('x', 2000000)"], "sslmode=require")
        assert (ended.returncode, ended.stderr, len(ended.stdout)) == (0, b"", 2_000_001)
    # psql says goodbye and leaves.  Its kernel resets where bytes of the way back come later; the server may be faster.
    assert {end["reason"] for end in endings(program, 2)} <= {"client_closed", "client_reset", "backend_closed"}


def test_what_ssh_says_is_the_reason_of_the_refusal(through_ssh, free_ports, sshd):
    nobody = HOST, free_ports(1)[0]
    wrong = through_ssh(nobody, ssh=sshd.replace("/user ", "/host "), python=PATIENT)  # a key that sshd does not know
    with wrong.connect(HELLO) as client:
        assert read_all(client)[:2] == b"\x15\3"
    (end,) = endings(wrong, 1)
    assert end["reason"] in ("command_failed", "tunnel_failed") and "Permission denied (publickey)" in end["detail"]


@pytest.mark.parametrize("through_ssh", ["exec"], indirect=True)
def test_ssh_that_finds_nobody_at_the_far_end_says_so(through_ssh, free_ports):
    program = through_ssh((HOST, free_ports(1)[0]), python=PATIENT)
    with program.connect(HELLO) as client:
        assert read_all(client)[:2] == b"\x15\3"
    (end,) = endings(program, 1)
    assert end["reason"] == "command_failed" and "stdio forwarding failed" in end["detail"]


@pytest.mark.parametrize("through_ssh", ["exec"], indirect=True)
@pytest.mark.parametrize("how, whole", [("end", True), ("kill", False)])
def test_an_end_behind_ssh_is_an_end_and_a_killed_ssh_is_a_reset(through_ssh, serve, how, whole):
    def far(sock: socket.socket) -> None:
        sock.sendall(read_exactly(sock, len(HELLO)) + b"whole")
        if how == "end":
            sock.shutdown(socket.SHUT_WR)
        sock.recv(1)

    program = through_ssh(serve(far).address)
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO) + 5) == HELLO + b"whole"
        if whole:
            assert client.recv(1) == b""
        else:
            family = pathlib.Path(f"/proc/{program.process.pid}/task").glob("*/children")
            (pid,) = " ".join(path.read_text() for path in family).split()
            os.kill(int(pid), signal.SIGKILL)
            with pytest.raises(ConnectionResetError):
                client.recv(1)


# -- psql --------------------------------------------------------------------------------------


@pytest.fixture
def database(launch, tunnel_program, ports, postgres) -> Program:
    """A router with the default route, in front of PostgreSQL."""
    for name in ("cft-db.example.com", "cft-db.example.org"):
        tunnel_program.far(name, postgres)
    return launch(ports, *tunnel_program.options, env=environment(**tunnel_program.environ))


def started(program: Program) -> list[str]:
    """The hostnames whose tunnels were ready, in that order."""
    program.wait_for(" tunnel ready ")
    return re.findall(r" tunnel ready tunnel=cloudflared:(\S+) ", program.log())


def test_psql_reads_megabytes_on_a_cold_name_and_on_the_warm_one(database, certificate):
    query = ["select ssl from pg_stat_ssl where pid = pg_backend_pid()",
             "select repeat(md5(n::text), 32) from generate_series(1, 6000) n"]
    for options in ("sslmode=require", f"sslmode=verify-full sslrootcert={certificate.file}"):
        ended = psql(database.address, query, options)
        assert (ended.returncode, ended.stderr) == (0, b"")
        lines = ended.stdout.decode().splitlines()
        assert lines[0] == "t"
        assert lines[1:] == [hashlib.md5(b"%d" % n).hexdigest() * 32 for n in range(1, 6001)]
    assert started(database) == ["cft-db.example.com"]


@pytest.mark.parametrize("tunnel_program", ["stand-in", "carrier"], indirect=True)
def test_psql_copies_megabytes_up(database):
    rows = [b"%x" % n * 100 for n in random.Random(12).sample(range(1 << 28, 1 << 32), 8_000)]
    query = ["create temp table t (row text)", r"\copy t from pstdin",
             "select count(*), sum(length(row)), min(row), max(row) from t"]
    ended = psql(database.address, query, "sslmode=require", b"".join(row + b"\n" for row in rows))
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.split() == [b"|".join((b"8000", b"6400000", min(rows), max(rows)))]
    assert started(database) == ["cft-db.example.com"]


@pytest.mark.parametrize("tunnel_program", ["stand-in"], indirect=True)
def test_psql_meets_the_certificate_of_the_server_itself(database, certificate):
    """sniroute has none: under another name it is the server's that does not fit."""
    options = f"sslmode=verify-full sslrootcert={certificate.file} host=db.example.org"
    ended = psql(database.address, ["select 1"], options)
    assert ended.returncode == 2
    assert b'server certificate for "*.example.com" does not match host name "db.example.org"' in ended.stderr


@pytest.mark.parametrize("tunnel_program", ["stand-in"], indirect=True)
def test_psql_without_tls_is_told_what_to_do(database):
    ended = psql(database.address, ["select 1"], "sslmode=disable")
    assert ended.returncode == 2
    assert b"FATAL:  sniroute routes by the TLS server name: a connection without TLS has none" in ended.stderr
    assert b"HINT:  Connect with sslmode=require." in ended.stderr


@pytest.mark.parametrize("tunnel_program", ["stand-in"], indirect=True)
def test_psql_that_begins_with_tls_at_once(database):
    for name, package in (("psql", "postgresql-client"), ("postgres", "postgresql")):
        version = execute(program_path(name, package), "--version").stdout.decode()
        if version_of(version) < 17:
            pytest.skip(f"{name} is older than 17: {version.strip()}")
    ended = psql(database.address, ["select 7"], "sslmode=require sslnegotiation=direct")
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, b"", b"7\n")


STOP_SERVER = rb"""
select pg_backend_pid() as pid \gset
\setenv PID :pid
\! kill -STOP $PID
\echo :pid
"""


def plain_end(program: Program, postgres: Address) -> str:
    """How a session ends that psql says goodbye in, by the log.

    psql does not wait for the server.  The server is stopped until psql has left, else it may be faster under load.
    Then it closes without reading all: its last word is a reset.
    """
    ended = psql(program.address, [], "sslmode=require", STOP_SERVER)
    assert (ended.returncode, ended.stderr) == (0, b"")
    def left() -> bool:  # CLOSE_WAIT, by the number that proc(5) has for it
        rows = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return any(row[1].endswith(f":{postgres[1]:04X}") and row[3] == "08" for row in rows)
    try:
        wait_until(left, what="the end of psql, at the server")
    finally:
        os.kill(int(ended.stdout), signal.SIGCONT)
    return endings(program, 1)[0]["reason"]


@linux
def test_a_plain_psql_session_is_ended_by_its_client(launch, postgres):
    assert plain_end(launch(route(postgres)), postgres) == "client_closed"


@linux
@pytest.mark.parametrize("tunnel_program", ["stand-in", "hasty carrier"], indirect=True)
def test_a_plain_psql_session_through_a_tunnel_is_ended_by_its_client(database, postgres):
    assert plain_end(database, postgres) == "client_closed"


@pytest.mark.parametrize("tunnel_program", ["stand-in", "carrier"], indirect=True)
def test_psql_with_a_trailing_dot_uses_the_tunnel_of_the_name_without(database):
    for host in ("db.example.com.", "db.example.com", "DB.Example.COM."):
        ended = psql(database.address, ["select 7"], f"sslmode=require host={host}")
        assert (ended.returncode, ended.stderr, ended.stdout) == (0, b"", b"7\n")
    assert started(database) == ["cft-db.example.com"]
    assert {end["name"] for end in endings(database, 3)} == {"db.example.com"}


# -- psycopg and node-postgres -----------------------------------------------------------------

# How a client names the server, and the route's name for it.
NAMES = pytest.mark.parametrize("host, name", [("db.example.com", "db.example.com"),
                                               ("db.example.com.", "db.example.com"), ("db", "db"), ("db.", "db")],
                                ids=["name", "trailing dot", "one label", "one label and a dot"])


def conninfo(program: Program, host: str, **options: str) -> str:
    """What libpq needs to reach `host` through the router."""
    address, port = program.address
    more = "".join(f" {name}={value}" for name, value in options.items())
    return f"host={host} hostaddr={address} port={port} user=postgres dbname=postgres sslmode=require{more}"


def modern(found: dict) -> dict:
    """The rest of what a step of psycopg found, where its libpq is that of PostgreSQL 17 or later."""
    if found["libpq"] < 170000:
        pytest.skip(f"the libpq of psycopg is {found['libpq']}, older than 17 (PyPI package psycopg[binary])")
    return {name: value for name, value in found.items() if name != "libpq"}


@NAMES
def test_psycopg_connects(with_psycopg, launch, postgres, host, name):
    program = launch(route(postgres, name))
    assert with_psycopg("query", conninfo(program, host))["encrypted"]
    end, = endings(program, 1)
    assert (end["name"], end["route"]) == (name, name)


def test_psycopg_copies_megabytes_up_and_down(with_psycopg, launch, postgres):
    program = launch(route(postgres))
    found = with_psycopg("copy", conninfo(program, "db.example.com."))
    assert (found["rows"], found["same"]) == (4096, True)
    end, = endings(program, 1)
    assert min(int(end["up"]), int(end["down"])) > 4 << 20


@NAMES
def test_psycopg_cancels_a_query(with_psycopg, launch, postgres, host, name):
    """Since PostgreSQL 17 the request for it comes over TLS, with a name that can be routed."""
    program = launch(route(postgres, name))
    assert modern(with_psycopg("cancel", conninfo(program, host))) == {"state": "57014", "still": 7}
    ends = endings(program, 3)  # two sessions and the request
    assert len(ends) == 3 and {end["name"] for end in ends} == {name}


@pytest.mark.parametrize("tunnel_program", ["stand-in", "carrier"], indirect=True)
def test_psycopg_cancels_a_query_through_a_tunnel(with_psycopg, database):
    assert modern(with_psycopg("cancel", conninfo(database, "db.example.com."))) == {"state": "57014", "still": 7}
    assert started(database) == ["cft-db.example.com"]


def unwrapped(certificate: Certificate, address: Address) -> Callable[[socket.socket], None]:
    """A handler that takes the TLS off, as a PostgreSQL from 17 on takes it without being asked: for an older one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.set_alpn_protocols(["postgresql"])
    def handler(sock: socket.socket) -> None:
        sock.settimeout(20)
        with context.wrap_socket(sock, server_side=True) as tls, socket.create_connection(address, 20) as plain:
            other = {tls: plain, plain: tls}
            while True:
                for source in [tls] if tls.pending() else select.select(list(other), [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    other[source].sendall(data)
    return handler


@NAMES
def test_psycopg_that_begins_with_tls_at_once(with_psycopg, launch, serve, postgres, certificate, host, name):
    program = launch(route(serve(unwrapped(certificate, postgres)).address, name))
    found = modern(with_psycopg("query", conninfo(program, host, sslnegotiation="direct")))
    assert found == {"encrypted": False}, "behind the handler that takes the TLS off"
    assert endings(program, 1)[0]["name"] == name


@NAMES
def test_node_postgres_connects(launch, postgres, host, name):
    program = launch(route(postgres, name))
    found = with_pg(host, program.address[1])
    assert found == {"looked": [host], "encrypted": True, "large": 1_000_000, "code": "57014"}
    end, = endings(program, 1)
    assert (end["name"], end["route"]) == (name, name)


# -- the web -----------------------------------------------------------------------------------


def test_curl_posts_megabytes_on_a_cold_name_and_on_the_warm_one(launch, tunnel_program, ports, serve, certificate):
    tunnel_program.far("cft-web.example.com", serve(backwards(certificate)).address)
    program = launch(ports, *tunnel_program.options, env=environment(**tunnel_program.environ))
    payload = random.Random(13).randbytes(4 << 20)
    for _ in range(2):
        assert post(program, certificate, payload) == payload[::-1]
    assert started(program) == ["cft-web.example.com"]


def test_openssl_shows_the_alert_for_a_name_without_a_route(launch, echo_server):
    program = launch(route(echo_server.address))
    ended = execute(program_path("openssl", "openssl"), "s_client", "-servername", "other.example.com", "-connect",
                    "{}:{}".format(*program.address))
    assert ended.returncode == 1
    assert b"unrecognized name" in ended.stderr and b"SSL alert number 112" in ended.stderr


def by_curl(name: str, port: int) -> bytes:
    """What curl shows of https://NAME:PORT/."""
    return execute(program_path("curl", "curl"), "-sSk", "--noproxy", "*", "--connect-to", f"::{HOST}:{port}",
                   f"https://{name}:{port}/").stdout


def by_openssl(name: str, port: int) -> bytes:
    """What `openssl s_client` shows."""
    return execute(program_path("openssl", "openssl"), "s_client", "-quiet", "-servername", name,
                   "-connect", f"{HOST}:{port}", said=b"GET / HTTP/1.0\r\n\r\n").stdout


@pytest.mark.parametrize("name", ["web.example.com", "web.example.com."], ids=["name", "trailing dot"])
@pytest.mark.parametrize("visit, keeps_the_dot", [(by_curl, False), (by_openssl, True)], ids=["curl", "openssl"])
def test_a_trailing_dot_shows_the_same_page(launch, serve, certificate, visit, keeps_the_dot, name):
    """The server hears the name as the client wrote it: sniroute changes no byte."""
    program = launch(route(serve(page(certificate)).address, "web.example.com"))
    shown = visit(name, program.address[1])
    assert b"<p>This is %s indeed</p>" % (name if keeps_the_dot else name.rstrip(".")).encode() in shown
    end = endings(program, 1)[0]
    assert (end["name"], end["route"]) == ("web.example.com", "web.example.com")


@pytest.mark.parametrize("name", ["web.example.com", "web.example.com."], ids=["name", "trailing dot"])
def test_a_trailing_dot_shows_the_same_page_in_a_browser(launch, serve, certificate, browser, name):
    program = launch(route(serve(page(certificate)).address, "web.example.com"))
    assert f"<p>This is {name} indeed</p>" in browser.visit(f"https://{name}:{program.address[1]}/")
    end = endings(program, 1)[0]
    assert (end["name"], end["route"]) == ("web.example.com", "web.example.com")


# -- redis-cli ---------------------------------------------------------------------------------


@pytest.fixture
def redis(certificate, tmp_path, free_ports) -> Iterator[Address]:
    """The address of a Redis that speaks TLS only."""
    address = HOST, free_ports(1)[0]
    words = {"port": 0, "bind": HOST, "tls-port": address[1], "tls-cert-file": certificate.file,
             "tls-key-file": certificate.key, "tls-auth-clients": "no", "save": "", "dir": tmp_path}
    with open(tmp_path / "redis.log", "wb") as log:
        process = subprocess.Popen([program_path("redis-server", "redis-server"),
                                    *(word for name, value in words.items() for word in (f"--{name}", str(value)))],
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    def ready() -> bool:
        assert process.poll() is None, (tmp_path / "redis.log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(address, 5):
            return True
        return False
    try:
        wait_until(ready, what="Redis")
        yield address
    finally:
        process.kill()  # it has nothing to save
        process.wait()


def redis_cli(program: Program, certificate: Certificate, *words: str, said: bytes = b"") -> tuple[int, bytes]:
    """Run a command of redis-cli through the router.  Returns its exit code and its output."""
    host, port = program.address
    ended = execute(program_path("redis-cli", "redis-tools"), "-h", host, "-p", str(port), "--tls", "--cacert",
                    str(certificate.file), *words, said=said)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize("name", ["cache.example.com", "cache.example.com.", "cache"],
                         ids=["name", "trailing dot", "one label"])
def test_redis_cli_is_served_where_it_is_given_the_name(launch, redis, certificate, name):
    program = launch(route(redis, name.rstrip(".")))
    large = random.Random(15).randbytes(500_000).hex().encode()
    assert redis_cli(program, certificate, "--sni", name, "-x", "set", "key", said=large) == (0, b"OK\n")
    assert redis_cli(program, certificate, "--sni", name, "get", "key") == (0, large + b"\n")
    assert {end["name"] for end in endings(program, 2)} == {name.rstrip(".")}


def test_redis_cli_without_the_name_is_told_why(launch, redis, certificate):
    """By the host alone it sends none: `--sni` is what OPERATING.md says."""
    program = launch(route(redis, "cache.example.com"))
    code, said = redis_cli(program, certificate, "ping")
    assert code == 1 and b"unrecognized name" in said
    assert endings(program, 1)[0]["reason"] == "no_name"


# -- an address that swallows packets ----------------------------------------------------------

GOOD = "127.0.0.9"  # further from the sender than those that are dead, so the resolver sorts it behind them


def saying(word: bytes) -> Callable[[socket.socket], None]:
    """A handler that answers a hello with a word."""
    def handler(sock: socket.socket) -> None:
        read_exactly(sock, len(HELLO))
        sock.sendall(word)
        read_all(sock)
    return handler


@pytest.mark.parametrize("dead", [("127.0.0.2",), ("127.0.0.2", "127.0.0.3")], ids=["one", "two"])
def test_a_black_holed_address_costs_the_first_client_a_moment_and_the_next_nothing(launch, serve, tmp_path, dead):
    """A name with several addresses in /etc/hosts, which only the router sees; the first ones swallow each SYN."""
    port = free_port()  # at each of these addresses
    serve(saying(b"good"), (GOOD, port))
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} service.example.com\n" for address in (*dead, GOOD)))
    python = (*namespaces("--mount"), "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(hosts),
              sys.executable)
    resolved = execute(*python, "-c", "import socket; print(*[row[4][0] for row in socket.getaddrinfo("
                                      "'service.example.com', 1, type=socket.SOCK_STREAM)])")
    assert resolved.stdout.decode().split() == [*dead, GOOD], "else the test shows nothing"
    program = launch(f"--route={NAME}=tcp:service.example.com:{port}", python=python)
    with contextlib.ExitStack() as stack:
        for address in dead:
            stack.enter_context(deaf_listener((address, port)))
        began = time.monotonic()
        with program.connect(HELLO) as client:
            assert read_exactly(client, 4) == b"good"
        assert time.monotonic() - began < 2
        first, = endings(program, 1)
    for address in dead:
        assert address in first.get("detail", ""), first
    awake = [serve(saying(b"dead"), (address, port)) for address in dead]  # a client that goes there is found out
    with program.connect(HELLO) as client:
        assert read_exactly(client, 4) == b"good"
    second = endings(program, 2)[1]
    assert [server.accepted for server in awake] == [0] * len(dead)
    assert not any(address in second.get("detail", "") for address in dead), second


# -- early data --------------------------------------------------------------------------------


@pytest.fixture
def early(certificate, free_ports, tmp_path) -> Iterator[Address]:
    """The address of an OpenSSL server that takes TLS 1.3's early data, and whose stdin stays open."""
    address = HOST, free_ports(1)[0]
    process = subprocess.Popen(
        [program_path("openssl", "openssl"), "s_server", "-accept", "{}:{}".format(*address), "-cert",
         str(certificate.file), "-key", str(certificate.key), "-tls1_3", "-early_data"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said = b""
        while b"ACCEPT" not in said:
            data = os.read(process.stdout.fileno(), 65536)
            assert data, said
            said += data
        yield address
    finally:
        process.kill()
        process.communicate()


def s_client(address: Address, until: Callable[[bytes], bool], *words: str) -> bytes:
    """Run `openssl s_client` until it has said enough, or has ended.  Returns what it said."""
    process = subprocess.Popen(
        [program_path("openssl", "openssl"), "s_client", "-tls1_3", "-servername", NAME,
         "-connect", "{}:{}".format(*address), *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = bytearray()
    def enough() -> bool:
        data = True
        while data and select.select([process.stdout], [], [], 0)[0]:
            data = os.read(process.stdout.fileno(), 65536)
            said.extend(data)
        return not data or until(bytes(said))
    try:
        wait_until(enough, 8, "enough of s_client")
        process.stdin.close()  # it says goodbye to the server, which forgets the session of a client that did not
        exit_code(process, 8)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    return bytes(said)


@pytest.mark.parametrize("size", [6, 12_000], ids=["a little", "much"])
@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "silent"])
def test_early_data_into_a_tunnel_that_hangs_is_refused_in_time(run, cloudflared, ports, early, tmp_path, monkeypatch,
                                                                stopped, size):
    """What a client says before the answer cannot be said again, but it is no answer.

    A process that leaves its clients waiting is replaced.  One that takes them and is silent may wait for its far end.
    """
    cloudflared.far("*", early)
    running = run(TUNNEL, ports)
    first_byte = running.router.deadlines.first_byte
    session, data = tmp_path / "session", tmp_path / "data"
    data.write_bytes(b"early\n" * (size // 6))
    resumed = "-sess_in", str(session), "-early_data", str(data)
    s_client(running.address, lambda said: session.exists() and b"-----END SSL SESSION" in session.read_bytes(),
             "-sess_out", str(session))
    running.ending()

    patience = first_byte.seconds
    monkeypatch.setattr(sniroute_deadlines, "FIRST_BYTE_TIMEOUT", 0.3)
    first_byte.seconds = 0.3
    pid = cloudflared.starts()[0]["pid"]
    os.kill(pid, signal.SIGSTOP) if stopped else cloudflared.fault("*", hang=True)
    said = s_client(running.address, lambda said: False, *resumed)
    assert b"SSL alert number 80" in said, said
    refused = running.ending(2)
    assert refused.reason == "tunnel_failed" and "no answer within 0.3 s" in refused.detail

    first_byte.seconds = patience
    cloudflared.fault("*")
    wait_until(lambda: not (stopped and cloudflared.runs(pid)), what="the end of the process that hung")
    said = s_client(running.address, lambda said: b"Early data was" in said, *resumed)
    assert b"Early data was accepted" in said, said


# -- process 1 ---------------------------------------------------------------------------------


def children(pid: int) -> dict[int, str]:
    """The children of a process, zombies too: {pid: name}."""
    found = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            before, _, after = stat.read_text().rpartition(") ")
            if int(after.split()[1]) == pid:
                found[int(before.split()[0])] = before.partition("(")[2]
    return found


def test_as_process_1_it_buries_orphans_keeps_its_tunnels_and_drains(launch, cloudflared, ports, echo_server, tmp_path):
    """As in a container without an init: what a health check leaves behind becomes a child of the router."""
    nsenter = program_path("nsenter", "util-linux")
    world = namespaces("--pid", "--fork", "--kill-child", "--mount-proc")
    cloudflared.far("*", echo_server.address)
    hasty = tmp_path / "hasty.py"  # it looks for orphans every two seconds otherwise
    hasty.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport sniroute, sniroute_processes\n"
                     "sniroute_processes.ORPHANS_LOOK = 0.2\nsys.exit(sniroute.main())\n")
    program = launch(TUNNEL, ports, f"--cloudflared={cloudflared.path}", python=(*world, sys.executable), program=hasty)
    router, = children(program.pid)
    def served() -> None:
        with program.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
    try:
        served()
        tunnel, = children(router)
        ended = execute(nsenter, "--target", str(router), "--pid", "sh", "-c",
                        "for _ in 1 2 3; do (sleep 300 >/dev/null 2>&1 &); done")
        assert (ended.returncode, ended.stderr) == (0, b"")
        def orphans() -> list[int]:
            return sorted(pid for pid, name in children(router).items() if name == "sleep")
        *ends, stays = wait_until(lambda: len(orphans()) == 3 and orphans(), what="the orphans")
        for pid in (*ends, tunnel):  # together, so that one signal may tell of all
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not {*ends, tunnel} & children(router).keys(), what="the burial")
        served()
        program.wait_for("it ended (signal 9)")
        assert stays in children(router)

        with program.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
            os.kill(router, signal.SIGTERM)
            program.wait_for(" draining: ")
            client.sendall(b"still")
            assert read_exactly(client, 5) == b"still"
        assert program.wait() == 0
        assert not any(os.path.exists(f"/proc/{pid}") for pid in (router, tunnel, stays, *ends))
    finally:
        if program.process.poll() is None:  # unshare itself does not pass SIGTERM on
            os.kill(router, signal.SIGTERM)
            program.wait()
