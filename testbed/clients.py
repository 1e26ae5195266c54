"""Real clients and real servers, and what it takes to run them.

    program_path        where a program is; without it the test is skipped
    certificate         a certificate for *.example.com, in files
    postgres, psql      a PostgreSQL that speaks TLS, and its own client
    backwards, post     an HTTPS server, and curl
    page                an HTTPS server whose page says which name it was asked for
    sshd                a real sshd, and the words of an ssh that may log in there
    with_psycopg        run with_psycopg.py in a Python that has psycopg
    with_pyyaml         what PyYAML reads in texts, by the same Python
    with_pg             run with_pg.js in a node that has pg
    kubectl_view        what kubectl reads in kubeconfigs
    namespaces          the words that run a program in Linux namespaces of its own
    endings             what the log says of connections that are over

The servers stop with the test module: other modules count the children of this process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import pwd
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from conftest import HERE, HOST, Address, lasting, wait_until
from testbed.ports import free_port
from testbed.program import Program, execute, plain_environment
from testbed.standins import nursery_of
from testbed.streams import kubectl_path


# -- programs ---------------------------------------------------------------------------------


def program_path(name: str, package: str) -> str:
    """Where a program is; without it the test is skipped."""
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    places += sorted(map(str, pathlib.Path("/usr/lib/postgresql").glob("*/bin")), key=version_of, reverse=True)
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip(f"{name} is not here (Debian package {package})")
    return found


def version_of(text: str) -> float:
    """The first number in it."""
    return float(re.search(r"\d+(\.\d+)?", text)[0])


def kubectl_view(*configs: pathlib.Path, words: tuple[str, ...] = ()) -> Any:
    """What kubectl reads in these kubeconfigs, merged.  The test is skipped without one."""
    program = kubectl_path()
    ended = execute(program, "config", "view", "--raw", "-o", "json", *words, said="", text=True,
                    env={"KUBECONFIG": os.pathsep.join(map(str, configs)), "HOME": str(configs[0].parent)})
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


class Certificate(NamedTuple):
    """A certificate for *.example.com that vouches for itself, in files."""

    file: pathlib.Path
    key: pathlib.Path


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    folder = tmp_path_factory.mktemp("certificate")
    made = Certificate(folder / "server.crt", folder / "server.key")
    ended = execute(program_path("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=sniroute test",
                    "-addext", "subjectAltName=DNS:*.example.com", "-keyout", str(made.key), "-out", str(made.file))
    assert ended.returncode == 0, ended.stderr
    return made


# -- PostgreSQL --------------------------------------------------------------------------------


def postgres_user() -> dict[str, Any]:
    """As whom PostgreSQL runs, for Popen.  It does not run as root, so root lends it a user."""
    if os.geteuid():
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = names.get("postgres") or names["nobody"]
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


class DataFiles:
    """The files of a PostgreSQL that has never run.  Each Database begins with a copy: to make them takes longer."""

    def __init__(self) -> None:
        initdb = program_path("initdb", "postgresql")
        self.place = tempfile.TemporaryDirectory(prefix="sniroute-pg-")
        self.data = pathlib.Path(self.place.name) / "data"
        user = postgres_user()
        if user:
            os.chown(self.place.name, user["user"], user["group"])
        ended = execute(initdb, "-D", str(self.data), "-U", "postgres", "-A", "trust", "--no-sync", "--no-locale", "--wal-segsize=1",
                        "-E", "UTF8", cwd=self.place.name, **user)
        assert ended.returncode == 0, ended.stderr

    def close(self) -> None:
        self.place.cleanup()


@pytest.fixture(scope="session")
def initdb() -> Iterator[DataFiles]:
    """What `initdb` makes."""
    with contextlib.closing(DataFiles()) as made:
        yield made


class Database:
    """A PostgreSQL that speaks TLS, on a port that it keeps.

    `within`: words in front of its command that run it in a network of its own, as root.
    """

    def __init__(self, certificate: Certificate, initdb: DataFiles, within: tuple[str, ...] = ()):
        self.within = within
        self.server = program_path("postgres", "postgresql")
        program_path("psql", "postgresql-client")
        # Not below pytest's folder, which is closed to other users; and short, for the socket's sake.
        self.place = tempfile.TemporaryDirectory(prefix="sniroute-pg-")
        self.folder = pathlib.Path(self.place.name)
        self.user = postgres_user()
        self.process: subprocess.Popen[bytes] | None = None
        for file in certificate:
            shutil.copy(file, self.folder)
            (self.folder / file.name).chmod(0o600)
        if self.user:
            for path in (self.folder, *self.folder.iterdir()):
                os.chown(path, self.user["user"], self.user["group"])
        self.data = self.folder / "data"
        ended = execute("cp", "-a", str(initdb.data), str(self.data))
        assert ended.returncode == 0, ended.stderr
        for _ in range(5):  # somebody may be faster at taking the port
            self.address: Address = HOST, free_port()
            if self.start():
                return
        raise AssertionError((self.folder / "log").read_text())

    def start(self) -> bool:
        """Run it; whether it is ready."""
        status = self.data / "postmaster.pid"
        user = {} if self.within else self.user
        within = [*self.within, "setpriv", f"--reuid={self.user['user']}", f"--regid={self.user['group']}",
                  "--clear-groups"] if self.within else []
        with open(self.folder / "log", "ab") as log:
            self.process = process = subprocess.Popen(
                [*within, self.server, "-D", str(self.data), "-h", HOST, "-p", str(self.address[1]), "-k", str(self.folder),
                 "-c", "fsync=off", "-c", "ssl=on", "-c", f"ssl_cert_file={self.folder}/server.crt",
                 "-c", f"ssl_key_file={self.folder}/server.key"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                env={"LC_ALL": "C", "PATH": os.environ["PATH"]} if within else {"LC_ALL": "C"}, **user)

        def ready() -> bool:  # the eighth line of that file says it
            with contextlib.suppress(FileNotFoundError):
                return "ready" in "".join(status.read_text().splitlines()[7:]) or process.poll() is not None
            return process.poll() is not None
        wait_until(ready, timeout=30, what="PostgreSQL")
        return process.poll() is None

    def stop(self) -> None:
        """End it without waiting for clients."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait()

    def close(self) -> None:
        """Leave nothing behind."""
        self.stop()
        self.place.cleanup()


@pytest.fixture(scope="session")
def postgres(certificate: Certificate, initdb: DataFiles) -> Iterator[Address]:
    """The address of a PostgreSQL that speaks TLS.  All tests have it in common: what they keep there is temporary."""
    with contextlib.closing(Database(certificate, initdb)) as database:
        lasting.add(database.process.pid)
        yield database.address


@pytest.fixture
def databases(certificate: Certificate, initdb: DataFiles) -> Iterator[list[Database]]:
    """Three of them, for a test that stops and starts them."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        made = [pool.submit(Database, certificate, initdb) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for each in made:
            if not each.exception():
                stack.enter_context(contextlib.closing(each.result()))
        yield [each.result() for each in made]


def psql(address: Address, query: list[str], options: str, said: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run queries in one session, through `address`, as db.example.com."""
    where = f"host=db.example.com hostaddr={address[0]} port={address[1]} user=postgres dbname=postgres {options}"
    commands = [word for line in query for word in ("-c", line)]
    program = program_path("psql", "postgresql-client")
    return execute(program, "-XAtq", "-v", "ON_ERROR_STOP=1", *commands, where, said=said)


# -- ssh ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real sshd with keys of its own, for this user; gives the words of an ssh that may log in, but for the rest."""
    server, client = program_path("sshd", "openssh-server"), program_path("ssh", "openssh-client")
    keygen = program_path("ssh-keygen", "openssh-client")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        assert execute(keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)).returncode == 0
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", 0o755, exist_ok=True)  # the package has it made when the host starts
    log = folder / "log"
    for _ in range(5):  # somebody may be faster at taking the port
        port = free_port()
        options = [f"Port={port}", f"ListenAddress={HOST}", f"HostKey={folder}/host", "PidFile=none", "UsePAM=no",
                   f"AuthorizedKeysFile={folder}/user.pub", "StrictModes=no", "PasswordAuthentication=no", "KbdInteractiveAuthentication=no",
                   "PermitRootLogin=prohibit-password", "AllowTcpForwarding=yes", "MaxStartups=100"]
        words = [server, "-D", "-f", "/dev/null", "-E", str(log), *(word for each in options for word in ("-o", each))]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"})
        try:
            wait_until(lambda: process.poll() is not None or log.exists() and "listening" in log.read_text(), what="sshd")
            if process.poll() is None:
                user = pwd.getpwuid(os.geteuid()).pw_name
                yield (f"{client} -p {port} -i {folder}/user -o BatchMode=yes -o StrictHostKeyChecking=no "
                       f"-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ExitOnForwardFailure=yes {user}@{HOST}")
                return
        finally:
            process.terminate()
            process.wait()
    raise AssertionError(log.read_text())


# -- the web -----------------------------------------------------------------------------------


def backwards(certificate: Certificate) -> Callable[[socket.socket], None]:
    """A handler that speaks HTTPS and answers a POST with its body, backwards."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    def handler(sock: socket.socket) -> None:
        sock.settimeout(20)
        with context.wrap_socket(sock, server_side=True) as tls, tls.makefile("rb") as lines:
            size = 0
            while (line := lines.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split()[1])
            body = lines.read(size)[::-1]
            tls.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            lines.read()  # until the client closes
    return handler


def post(program: Program, certificate: Certificate, payload: bytes) -> bytes:
    """What curl gets when it posts that to web.example.com."""
    port = program.address[1]
    ended = execute(program_path("curl", "curl"), "-sS", "--noproxy", "*", "--cacert", str(certificate.file),
                    "--resolve", f"web.example.com:{port}:{HOST}", "--data-binary", "@-", "-H", "Expect:",
                    f"https://web.example.com:{port}/", said=payload)
    assert (ended.returncode, ended.stderr) == (0, b"")
    return ended.stdout


def page(certificate: Certificate) -> Callable[[socket.socket], None]:
    """A handler that speaks HTTPS; its page says which name the client's TLS asked for."""
    def note(tls: ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        tls.asked = name
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.sni_callback = note
    def handler(sock: socket.socket) -> None:
        sock.settimeout(20)
        with context.wrap_socket(sock, server_side=True) as tls, tls.makefile("rb") as lines:
            while lines.readline() not in (b"\r\n", b""):
                pass
            body = f"<p>This is {tls.asked} indeed</p>".encode()
            tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
                        b"Content-Length: %d\r\n\r\n" % len(body) + body)
            tls.unwrap()
    return handler


# -- clients that are libraries ----------------------------------------------------------------

PSYCOPG = "SNIROUTE_TEST_PSYCOPG"  # the variable that names a Python with psycopg, PyYAML and h2, if not that of the tests


@contextlib.contextmanager
def paths_of(package: str) -> Iterator[None]:
    """While the block runs, a package in nothing but Python can be imported from where PSYCOPG has it, too."""
    before = list(sys.path)
    if PSYCOPG in os.environ:
        code = f"import importlib.util as u; s = u.find_spec({package!r}); print(s.submodule_search_locations[0] if s else '')"
        found = execute(os.environ[PSYCOPG], "-c", code).stdout.decode().strip()
        if found:
            sys.path.append(os.path.dirname(found))
    try:
        yield
    finally:
        sys.path[:] = before


@functools.cache
def goes_well(*words: str, **env: str) -> bool:
    """Whether a command that shows what is here ends with 0."""
    return execute(*words, **({"env": env} if env else {})).returncode == 0


@pytest.fixture(scope="module")
def with_psycopg() -> Iterator[Callable[[str, str], dict[str, Any]]]:
    """with_psycopg(step, conninfo): run a step of with_psycopg.py, and return what it found.  Each is a fork."""
    python = os.environ.get(PSYCOPG, sys.executable)
    if not goes_well(python, "-c", "import psycopg"):
        pytest.skip("psycopg is not here (PyPI package psycopg[binary])")
    with nursery_of("with_psycopg", python=(python,), environ=plain_environment()) as forks:
        def run(step: str, conninfo: str) -> dict[str, Any]:
            client = forks.child("with_psycopg", ["with_psycopg.py", step, conninfo], plain_environment(),
                                 stdout=subprocess.PIPE)
            code, stdout, stderr = client.ended()
            assert code == 0, stderr.decode()
            return json.loads(stdout)

        yield run


def with_pyyaml(texts: list[str]) -> list[list[Any]]:
    """What PyYAML reads in each text, with all scalars as they were written, as a list of one; [] where it refuses."""
    python = os.environ.get(PSYCOPG, sys.executable)
    if not goes_well(python, "-c", "import yaml"):
        pytest.skip(f"PyYAML is not here (PyPI package PyYAML; {PSYCOPG} names a Python that has it)")
    ended = execute(python, "-c", """
import json, sys, yaml
def read(text):
    try:
        return [yaml.load(text, yaml.BaseLoader)]
    except yaml.YAMLError:
        return []
json.dump([read(text) for text in json.load(sys.stdin)], sys.stdout)
""", said=json.dumps(texts).encode())
    assert ended.returncode == 0, ended.stderr.decode()
    return json.loads(ended.stdout)


def with_pg(host: str, port: int) -> dict[str, Any]:
    """Run with_pg.js, and return what it found.  Debian's pg is where Debian's node looks; NODE_PATH adds others."""
    node = program_path("node", "nodejs")
    env = {"PATH": os.environ.get("PATH", os.defpath),
           "NODE_PATH": os.pathsep.join(filter(None, (os.environ.get("NODE_PATH"), "/usr/share/nodejs")))}
    if not goes_well(node, "-e", "require('pg')", **env):
        pytest.skip("pg is not here (npm's package pg, or the Debian package node-pg)")
    ended = execute(node, str(HERE / "testbed" / "with_pg.js"), host, str(port), env=env)
    assert ended.returncode == 0, ended.stderr.decode()
    return json.loads(ended.stdout)


# -- other worlds ------------------------------------------------------------------------------


def namespaces(*options: str) -> tuple[str, ...]:
    """The words in front of a command that run it in namespaces of its own, by the options of unshare(1)."""
    words = (program_path("unshare", "util-linux"), *([] if os.geteuid() == 0 else ["--map-root-user"]), *options)
    ended = execute(*words, "true")
    if ended.returncode:
        pytest.skip(f"no namespaces for this user: {ended.stderr.decode().strip()}")
    return words


def endings(program: Program, count: int) -> list[dict[str, str]]:
    """The fields of the lines about connections that are over, once there are `count` of them."""
    def lines() -> list[str]:
        return re.findall(r"^\S+ \w+ (client=.*)\n", program.log(), re.MULTILINE)
    wait_until(lambda: len(lines()) >= count, what=f"{count} connections that are over")
    return [dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)) for line in lines()]
