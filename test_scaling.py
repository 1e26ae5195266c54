"""Tests of SCALING.md: two routers behind a real HAProxy, on a real Redis, set up as the page says."""

from __future__ import annotations

import signal
import socket
import subprocess
import tomllib
from typing import Callable, Iterator

import pytest

from conftest import HOST, wait_until
from sniroute_settings import load_settings
from test_documents import SCALING, marked, with_ports
from testbed.clients import program_path
from testbed.hellos import genuine
from testbed.ports import free_port
from testbed.program import Program
from testbed.registry import ALICE, Asked, digest_of
from testbed.running import read_exactly

NAME = "shop.tun.example.com"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # of a PROXY header, version 2


def echo_behind_proxy(sock: socket.socket) -> None:
    """A far end that expects a PROXY header, and sends everything behind it back."""
    head = read_exactly(sock, 16)
    if head[:12] != SIGNATURE:
        return
    read_exactly(sock, int.from_bytes(head[14:], "big"))
    while data := sock.recv(65536):
        sock.sendall(data)


class Host(Asked):
    """One of the two hosts: a router, with addresses of its own on this one."""

    def __init__(self, launch: Callable[..., Program], path: str):
        self.port, self.probes, self.registry = free_port(), free_port(), free_port()
        self.address = HOST, self.registry
        self.program = launch("-c", path, f"--listen={HOST}:{self.port}", f"--admin-public={HOST}:{self.probes}",
                              f"--registry={HOST}:{self.registry}")

    def is_closed(self) -> bool:
        """Whether nobody can connect to its main port."""
        with socket.socket() as sock:
            return sock.connect_ex((HOST, self.port)) != 0

    def kill(self) -> None:
        """It dies.  The kernel takes connects for it until it is gone."""
        self.program.code = -signal.SIGKILL
        self.program.signal(signal.SIGKILL)
        assert self.program.wait() == self.program.code


class Cluster:
    """Two hosts, a Redis, a balancer."""

    def __init__(self, hosts: list[Host], port: int):
        self.hosts = hosts
        self.port = port

    def client(self) -> socket.socket:
        """A client that has been answered."""
        hello = genuine(name=NAME)
        client = socket.create_connection((HOST, self.port), timeout=10)
        client.sendall(hello)
        answered = read_exactly(client, len(hello))
        if answered != hello:
            client.close()
            raise ConnectionError(f"{len(answered)} bytes of {len(hello)}")
        return client


def goes_on(client: socket.socket) -> bool:
    """Whether a connection still carries bytes both ways."""
    try:
        client.sendall(b"more")
        return read_exactly(client, 4) == b"more"
    except OSError:
        return False


@pytest.fixture
def cluster(launch, settings_file, redis_server, serve, tmp_path) -> Iterator[Cluster]:
    haproxy = program_path("haproxy", "haproxy")
    far, redis = serve(echo_behind_proxy), redis_server()
    text = marked(SCALING, "router")
    for said, instead in (("192.0.2.1/32", f"{HOST}/32"), ("redis://sniroute@192.0.2.20:6379", redis.url),
                          ('lameduck = "5s"', 'lameduck = "1s"'), ("198.51.100.0/24", "127.0.0.0/8"),
                          (tomllib.loads(text)["registry"]["owners"]["alice"]["token"], f"sha256:{digest_of(ALICE).hex()}")):
        assert said in text, said
        text = text.replace(said, instead)
    hosts = [Host(launch, settings_file(text)) for _ in range(2)]
    port = free_port()
    balancer = with_ports(marked(SCALING, "haproxy"), {
        ":443": f"{HOST}:{port}", "maxconn 20000": "maxconn 200", "inter 1s": "inter 200ms",
        "timeout connect 2s": "timeout connect 2s\n    timeout check 5s",  # else that of `inter`: a busy host would be down
        **{f"192.0.2.1{number}:19000 check port 9100": f"{HOST}:{host.port} check port {host.probes}"
           for number, host in enumerate(hosts, 1)}})
    (tmp_path / "haproxy.cfg").write_text(balancer)
    with open(tmp_path / "haproxy.log", "wb") as log, subprocess.Popen(
            [haproxy, "-db", "-f", str(tmp_path / "haproxy.cfg")], stdout=log, stderr=log) as process:
        try:
            made = Cluster(hosts, port)
            wait_until(lambda: hosts[0].claim("shop", "tcp:%s:%d" % far.address).status in (200, 201), what="a claim")
            wait_until(lambda: all(host.program.log().count(f"{NAME}: claimed") for host in hosts), what="at both")
            wait_until(lambda: answers(made), what="the balancer")
            yield made
        finally:
            process.kill()


def answers(cluster: Cluster) -> bool:
    """Whether a client is served."""
    try:
        cluster.client().close()
    except OSError:
        return False
    return True


def test_the_settings_of_the_page_are_some(settings_file):
    settings = load_settings(["-c", settings_file(marked(SCALING, "router"))], {"SNIROUTE_STORE_PASSWORD": "s3cret"})
    assert settings.claims is not None and settings.admin_public and settings.lameduck < settings.drain


def test_haproxy_takes_the_file_of_the_page_as_it_is(tmp_path):
    path = tmp_path / "haproxy.cfg"
    path.write_text(marked(SCALING, "haproxy"))
    done = subprocess.run([program_path("haproxy", "haproxy"), "-c", "-f", str(path)], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0 and "[WARNING]" not in done.stdout + done.stderr, done.stdout + done.stderr


def test_a_host_that_drains_loses_nothing_and_one_that_dies_only_what_ran_through_it(cluster):
    first, second = cluster.hosts
    clients = [cluster.client() for _ in range(8)]
    old = first.program

    # SIGTERM: nobody is sent there any more, and what is open goes on.
    old.signal(signal.SIGTERM)
    old.wait_for("lameduck: new clients are served for 1 s yet")
    wait_until(lambda: cluster.client().close() or first.is_closed(), what="the end of its listener")
    assert all(map(goes_on, clients))
    assert [answers(cluster) for _ in range(10)] == [True] * 10

    # The other one dies: its connections are cut, those of the one that drains go on.
    second.kill()
    wait_until(lambda: not all(map(goes_on, clients)), what="the end of some")
    left = [client for client in clients if goes_on(client)]
    assert 0 < len(left) < len(clients), "both had some"
    for client in clients:
        client.close()
    assert old.wait() == 0, "the last one has left, so it ends"


def test_a_claim_outlives_the_host_that_took_it_and_clients_are_led_to_the_other(cluster):
    first, second = cluster.hosts
    first.kill()
    assert [answers(cluster) for _ in range(10)] == [True] * 10, "the balancer tries the other one"
    said = second.ask("GET", "/routes/shop")
    assert said.status == 200 and said.json["name"] == NAME
    assert second.claim("other", "tcp:127.0.0.1:5432").status == 201
