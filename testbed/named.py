"""A name server for a test: BIND, which everybody has.

    named       a Named for all tests of a module: it has the zone ZONE, and stops with the module
    new_named   makes one for one test, which may end and start it
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import time
from typing import Callable, Iterator

import pytest

import sniroute_dns as dns
from conftest import HOST, exit_code, wait_until
from sniroute_dns import Key, Record, Zone
from testbed.ports import free_port

ZONE = "tun.example.com"
KEYS = {  # by name: each has its secret, and each but `guest` may change the zone
    name: Key(name, secret.encode()) for name, secret in (
        ("router", "the router's own secret"), ("human", "a human's own secret"), ("guest", "a secret of no use"))}

KEY = 'key %s { algorithm hmac-sha256; secret "%s"; };'
CONFIG = """
options {
    directory "%(folder)s"; pid-file none; session-keyfile none;
    listen-on port %(port)d { %(host)s; }; listen-on-v6 { none; };
    recursion no; dnssec-validation no; empty-zones-enable no; notify no; minimal-responses yes;
};
controls { };
%(keys)s
zone "%(zone)s" { type primary; file "zone"; allow-update { key router; key human; }; };
"""
RECORDS = """
$TTL 60
@ IN SOA ns hostmaster 1 3600 600 86400 1
@ IN NS ns
ns IN A 192.0.2.53
human IN A 192.0.2.200
"""


class Named:
    """BIND, as a child; it runs after `start`."""

    def __init__(self, program: str, folder: pathlib.Path):
        self.folder = folder
        # Debian's AppArmor knows it by its path, and would let it read /etc and /var only.
        self.program = shutil.copy(program, folder / "named-of-a-test")
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "zone").write_text(RECORDS)

    @property
    def log(self) -> str:
        """What it has said since it was started."""
        return (self.folder / "log").read_text(errors="replace")

    @property
    def url(self) -> str:
        """What `dns` would be in the settings."""
        return f"rfc2136://{HOST}:{self.port}/{ZONE}?key=router&address=192.0.2.1"

    def start(self) -> None:
        """Start it, and wait until it answers; on the same port each time."""
        for _ in range(1 if self.port else 10):
            port = self.port or free_port()
            keys = "\n".join(KEY % (name, base64.b64encode(key.secret).decode()) for name, key in KEYS.items())
            (self.folder / "config").write_text(
                CONFIG % {"folder": self.folder, "host": HOST, "port": port, "zone": ZONE, "keys": keys})
            with open(self.folder / "log", "wb") as log:
                self.process = subprocess.Popen(
                    (self.program, "-g", "-n", "1", "-c", str(self.folder / "config")), stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log)
            wait_until(lambda: " running\n" in self.log or self.process.poll() is not None, what="named")
            if self.process.poll() is None and "could not listen" not in self.log and "address in use" not in self.log:
                self.port = port
                return
            self.stop()
        raise AssertionError(self.log)

    def stop(self) -> None:
        """End it at once, as a power failure does.  What it has acknowledged is on its disk."""
        if self.process is not None:
            self.process.kill()
            exit_code(self.process, 10)
            self.process = None

    def texts(self, name: str) -> set[tuple[bytes, ...]]:
        """The TXT records of a name."""
        return {dns.read_text(data) for data in self.ask(name, dns.TXT)}

    def addresses(self, name: str) -> set[str]:
        """The addresses of a name."""
        return {str(ipaddress.ip_address(data)) for kind in (dns.A, dns.AAAA) for data in self.ask(name, kind)}

    def ask(self, name: str, kind: int) -> list[bytes]:
        """The data of a name's records of one kind, by TCP, where they are whole."""
        writer = dns.Writer(secrets.randbelow(1 << 16), dns.QUERY << 11, (1, 0, 0, 0))
        writer.question(name, kind)
        message = dns.parse(self.tell(bytes(writer.out)))
        assert message.rcode in (dns.NOERROR, dns.NXDOMAIN)
        return [record.data for record in message.answers if (record.name, record.kind) == (name, kind)]

    def write(self, *records: Record) -> None:
        """Change the zone, as a human does: no question is asked."""
        request = dns.update(Zone(HOST, self.port, ZONE, "human", 60, ()), KEYS["human"], secrets.randbelow(1 << 16),
                             time.time(), (), records)
        assert dns.read_answer(self.tell(request.wire), request, KEYS["human"]).code == dns.NOERROR

    def tell(self, message: bytes) -> bytes:
        """Its answer."""
        with socket.create_connection((HOST, self.port), 10) as sock:
            sock.sendall(dns.frame(message))
            heard = b""
            while (found := dns.unframe(heard)) is None:
                data = sock.recv(65536)
                assert data, "it ended"
                heard += data
            return found


def named_path() -> str:
    """Where BIND is; without it the test is skipped."""
    found = shutil.which("named", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))
    if found is None:
        pytest.skip("named is not here (Debian package bind9)")
    return found


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Named]:
    """A name server for all tests of a module."""
    server = Named(named_path(), tmp_path_factory.mktemp("named"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def new_named(tmp_path: pathlib.Path) -> Iterator[Callable[[], Named]]:
    """Makes a name server for one test, which has to start it."""
    with contextlib.ExitStack() as stack:
        def make() -> Named:
            server = Named(named_path(), tmp_path)
            stack.callback(server.stop)
            return server

        yield make
