"""The main job of NodePass targets, as users see it: services in a network without a way in, reached by name.

    outside                                                       behind: nobody can connect to it
    curl, psql --- sniroute --- sniroute_nodepass.py forwarders <--- dials out --- sniroute_nodepass.py client://...
                                                                                   a web server, a PostgreSQL

Both are network namespaces of their own, with a link between them.  Needs root, and programs of Debian.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any, Iterator

import pytest

from conftest import HERE, exit_code, linux, wait_until
from testbed.clients import Database, execute, namespaces, program_path

pytestmark = [linux, pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for network namespaces")]

OUTSIDE, BEHIND = "198.51.100.1", "198.51.100.2"


class Network:
    """A network namespace, and the programs that run there."""

    def __init__(self, folder: pathlib.Path, name: str):
        self.folder = folder
        self.name = name
        self.stack = contextlib.ExitStack()
        self.holder = subprocess.Popen([*namespaces("--net"), "sleep", "600"], stdin=subprocess.DEVNULL)
        own = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{self.holder.pid}/ns/net") != own)
        self.within = (program_path("nsenter", "util-linux"), "-t", str(self.holder.pid), "-n")

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end."""
        return execute(*self.within, *words, **options)

    def start(self, name: str, *words: str, **environ: str) -> tuple[subprocess.Popen[bytes], pathlib.Path]:
        """Start a program; what it prints is in a file."""
        path = self.folder / f"{name}.log"
        with open(path, "ab") as log:
            process = subprocess.Popen([*self.within, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       cwd=self.folder, env={**os.environ, "PYTHONUNBUFFERED": "1", **environ})

        def end() -> None:
            process.terminate()
            exit_code(process, 20)

        self.stack.callback(end)
        return process, path

    def close(self) -> None:
        try:
            self.stack.close()
        finally:
            self.holder.kill()
            self.holder.wait()


@pytest.fixture
def networks(tmp_path: pathlib.Path) -> Iterator[tuple[Network, Network]]:
    """Two networks with a link between them: outside, and behind."""
    ip = program_path("ip", "iproute2")
    with contextlib.ExitStack() as stack:
        outside, behind = (Network(tmp_path, name) for name in ("outside", "behind"))
        for each in (behind, outside):  # outside ends first: it waits for what is on its way from behind
            stack.callback(each.close)
        commands = [(outside, f"link add link0 type veth peer name link0 netns {behind.holder.pid}")]
        for each, address in ((outside, OUTSIDE), (behind, BEHIND)):
            commands += [(each, f"addr add {address}/30 dev link0"), (each, "link set link0 up"),
                         (each, "link set lo up")]
        for each, words in commands:
            ended = each.run(ip, *words.split())
            assert ended.returncode == 0, ended.stderr
        yield outside, behind


def test_a_web_server_and_a_database_behind_nat_are_reached_by_name(networks, certificate, initdb, tmp_path):
    """And again after the client, the link and the router's program have gone and come back."""
    outside, behind = networks
    curl, psql = program_path("curl", "curl"), program_path("psql", "postgresql-client")
    web = tmp_path / "web"
    web.mkdir()
    (web / "index.html").write_text("it is behind NAT\n")
    behind.start("web", sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(web), "8080")
    with contextlib.closing(Database(certificate, initdb, behind.within)) as database:
        routes = [f"web.example.com=nodepass:$WEB_KEY@{OUTSIDE}:10101?tls=1",
                  f"db.example.com=nodepass:$DB_KEY@{OUTSIDE}:10102"]
        _, log = outside.start("router", sys.executable, str(HERE / "sniroute.py"), "--listen", "127.0.0.1:19000",
                               "--http", "forward", *(word for route in routes for word in ("--route", route)),
                               WEB_KEY="key of web", DB_KEY="key-of-db")
        clients = {}

        def start_client(name: str, key: str, port: int, target: int) -> None:
            clients[name], _ = behind.start(
                f"client-{name}", sys.executable, str(HERE / "sniroute_nodepass.py"),
                SNIROUTE_NODEPASS_URL=f"client://{key}@{OUTSIDE}:{port}/127.0.0.1:{target}")

        def fetch() -> bytes:
            return outside.run(curl, "-sS", "-m", "10", "--resolve", "web.example.com:19000:127.0.0.1",
                               "http://web.example.com:19000/").stdout

        def ask() -> bytes:
            return outside.run(psql, "-AtX", "-c", "SELECT 6 * 7",
                               "host=db.example.com hostaddr=127.0.0.1 port=19000 user=postgres dbname=postgres "
                               "sslmode=require connect_timeout=10").stdout

        start_client("web", "key%20of%20web", 10101, 8080)
        start_client("db", "key-of-db", 10102, database.address[1])
        wait_until(lambda: fetch() == b"it is behind NAT\n", 30, "the web server")
        wait_until(lambda: ask() == b"42\n", 30, "the database")
        assert outside.run(curl, "-sS", "-m", "2", f"http://{BEHIND}:8080/").returncode, "there is no way in"

        clients["web"].kill()
        clients["web"].wait()
        start_client("web", "key%20of%20web", 10101, 8080)
        wait_until(lambda: fetch() == b"it is behind NAT\n", 30, "after the client")

        program = re.search(r"tunnel ready .*pid=(\d+)", log.read_text())
        os.kill(int(program[1]), signal.SIGKILL)
        wait_until(lambda: fetch() == b"it is behind NAT\n" and ask() == b"42\n", 30, "after the program")

        ip = program_path("ip", "iproute2")
        assert behind.run(ip, "link", "set", "link0", "down").returncode == 0
        time.sleep(0.2)
        assert behind.run(ip, "link", "set", "link0", "up").returncode == 0
        wait_until(lambda: fetch() == b"it is behind NAT\n" and ask() == b"42\n", 60, "after the link")

        said = log.read_text()
        assert "far end has dialled in" in said and "Traceback" not in said
        assert not any(key in said for key in ("key of web", "key%20of%20web", "key-of-db"))
