"""Tests of sniroute_registrar.py: routers with a registry, their clients, and what both see."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import logging
import os
import re
import select
import signal
import socket
import threading
import time
from typing import Any, Callable

import pytest

import sniroute_loop
import sniroute_owners
import sniroute_registrar
import sniroute_sqlite
from conftest import HOST, Address, connect, linux, wait_until
from sniroute_dns import KEY_VARIABLE
from sniroute_doctor import sample_hello
from sniroute_names import show_address
from sniroute_owners import new_token
from sniroute_refusals import SettingsError
from sniroute_registrar import STORE_PASSWORD, attach
from testbed.clients import page, program_path
from testbed.hellos import HELLO, v1
from testbed.named import KEYS, ZONE
from testbed.program import Customers, command, execute
from testbed.redis import USER
from testbed.registry import ADMIN, ALICE, BOB, DOMAIN, Asked, Routed, table_of
from testbed.running import alert, answer, read_all, read_exactly, route

SHOP = f"shop.{DOMAIN}"
KEPT = "--appendonly", "yes", "--appendfsync", "always"  # what Redis has said is on its disk


def hello(routed: Any, name: str = SHOP, before: bytes = b"") -> socket.socket:
    """A client of the router that has said this name."""
    return connect(routed.router.server_address, before + sample_hello(name))


def lease(said: Any) -> dict[str, str]:
    return {"Sniroute_Lease": said.json["lease"]}


def get(address: Address, host: str, path: str = "/") -> tuple[int, bytes]:
    """A request in plain HTTP: the status, and all that has come."""
    with connect(address, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()) as client:
        data = read_all(client)
    return int(data.split(b" ", 2)[1]) if data.startswith(b"HTTP/1.1 ") else 0, data


def web(text: bytes) -> Callable[[socket.socket], None]:
    """A handler that answers each request with this page."""
    def handler(sock: socket.socket) -> None:
        data = b""
        while more := sock.recv(65536):
            data += more
            while b"\r\n\r\n" in data:
                data = data.partition(b"\r\n\r\n")[2]
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
                             b"Content-Length: %d\r\n\r\n" % len(text) + text)
    return handler


def refused(routed: Routed, name: str = SHOP, before: bytes = b"") -> str:
    """Why a client is refused."""
    with hello(routed, name, before) as client:
        port = int(before.split()[4]) if before else client.getsockname()[1]
        read_all(client)
    return wait_until(lambda: [each for each in routed.running.endings if each.client[1] == port])[0].reason


def reached(routed: Routed, name: str = SHOP, before: bytes = b"") -> bytes:
    """The first byte of the far end."""
    with hello(routed, name, before) as client:
        return client.recv(1)


# -- real programs -----------------------------------------------------------------------------


class Started(Asked):
    """A router that is a process of its own, with a registry."""

    def __init__(self, program: Any):
        self.program = program
        self.pid = program.pid
        host, port = re.findall(r" registry on (\S+):(\d+), below", program.log())[0]
        self.address = (host, int(port))

    def kill(self) -> None:
        self.program.code = -signal.SIGKILL
        self.program.signal(signal.SIGKILL)
        self.program.wait()


@pytest.fixture
def begin(launch, tmp_path) -> Callable[..., Started]:
    """begin(*words, name=..., **options of [registry]) -> Started."""
    def start(*words: str, name: str = "router", more: str = "", **options: Any) -> Started:
        path = tmp_path / f"{name}.toml"
        path.write_text(more + table_of(**options))
        program = launch("-c", str(path), *words)
        program.wait_for(" registry on ")
        return Started(program)
    return start


@linux
def test_a_service_claims_on_one_router_and_a_browser_comes_through_the_other(begin, redis_server, browser, serve,
                                                                              certificate):
    curl, openssl = program_path("curl", "curl"), program_path("openssl", "openssl")
    options = {"store": redis_server().url, "domains": ["tun.localhost"]}  # where browsers look on this host
    first, second = (begin("--http=forward", name=name, **options) for name in ("first", "second"))

    def claim(name: str, address: Address, **more: Any) -> Any:
        ended = execute(curl, "-sS", "-H", f"Authorization: Bearer {ALICE}", "--json", "@-",
                        f"http://{HOST}:{first.address[1]}/routes",
                        said=json.dumps({"name": name, "target": f"tcp:{HOST}:{address[1]}", **more}).encode())
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    def is_known(name: str) -> None:
        """Wait until the other router has heard of it."""
        wait_until(lambda: second.ask("GET", f"/routes/{name}").status == 200, what=name)

    wait_until(lambda: claim("shop", serve(web(b"<p id=p>all is sold</p>")).address).get("lease"))
    is_known("shop")
    host, port = second.program.address
    browser.call("Page.navigate", url=f"http://shop.tun.localhost:{port}/")
    wait_until(lambda: browser.evaluate("document.getElementById('p')?.innerText") == "all is sold", what="the page")
    claim("tls", serve(page(certificate)).address)
    is_known("tls")
    ended = execute(openssl, "s_client", "-connect", f"{host}:{port}", "-servername", "tls.tun.localhost", "-quiet",
                    said=b"GET / HTTP/1.0\r\n\r\n")
    assert b"This is tls.tun.localhost indeed" in ended.stdout


@linux
@pytest.mark.parametrize("killed", ["redis", "router", "both"])
def test_what_was_acknowledged_survives_kill_9(begin, redis_server, serve, killed):
    redis = redis_server(*KEPT)
    far = serve(answer(b"x", 1))
    first, second = (begin(name=name, store=redis.url) for name in ("first", "second"))
    wait_until(lambda: first.claim("ready", f"tcp:{HOST}:{far.address[1]}").status == 201)
    made = {number: first.claim(f"n{number}", f"tcp:{HOST}:{far.address[1]}") for number in range(30)}
    assert {each.status for each in made.values()} == {201}
    if killed != "router":
        redis.stop()
    if killed != "redis":
        first.kill()
    if killed != "router":
        redis.start()
    wait_until(lambda: len(second.ask("GET", "/routes?limit=100").json.get("routes", ())) > len(made), what="what it was told")
    for number in made:
        name = f"n{number}.{DOMAIN}"
        with connect(second.program.address, sample_hello(name)) as client:
            assert client.recv(1) == b"x", name
    third = begin(name="third", store=redis.url)
    wait_until(lambda: third.ask("GET", "/routes?limit=100").json.get("routes", [])[30:])
    for number, said in made.items():
        wait_until(lambda: third.ask("POST", f"/routes/n{number}/renew", **lease(said)).status == 200)


@linux
def test_nothing_that_has_expired_is_routed_for_long(begin, redis_server, serve):
    """The router that took the claim is gone, and so is Redis' own word about its end: there is none."""
    redis = redis_server()
    far = serve(answer(b"x", 1))
    first, second = (begin(name=name, store=redis.url) for name in ("first", "second"))
    began = 0.0

    def claim() -> bool:
        nonlocal began
        began = time.monotonic()
        return first.claim(target=f"tcp:{HOST}:{far.address[1]}", ttl=5).status == 201

    wait_until(claim)
    first.kill()

    def is_routed() -> bool:
        with connect(second.program.address, sample_hello(SHOP)) as client:
            return client.recv(1) == b"x"

    wait_until(is_routed)
    wait_until(lambda: not is_routed())
    assert 4.5 < time.monotonic() - began < 7


@linux
def test_a_successor_takes_address_file_and_ports(begin, free_ports, serve, tmp_path):
    port, claimed, own = free_ports(1)[0], free_ports(1)[0], free_ports(1)[0]
    far = serve(answer(b"x", 1))
    options = {"store": f"sqlite:{tmp_path}/names.db", "listen": f"{HOST}:{own}", "ports": f"{claimed}-{claimed}"}
    first = begin(f"--listen={HOST}:{port}", **options)
    target = f"tcp:{HOST}:{far.address[1]}"
    made, other = first.claim(target=target), first.ask("POST", "/routes", {"port": claimed, "target": target})
    assert (made.status, other.status) == (201, 201)
    second = begin(f"--listen={HOST}:{port}", **options)
    assert first.program.wait() == 0 and second.address == first.address
    for address, said in (((HOST, port), sample_hello(SHOP)), ((HOST, claimed), b"?")):
        with connect(address, said) as client:
            assert client.recv(1) == b"x"
    assert second.ask("POST", "/routes/shop/renew", **lease(made)).status == 200
    assert second.ask("POST", f"/routes/tcp:{claimed}/renew", **lease(other)).status == 200


@linux
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_restarts_refuse_nobody_who_asks_for_a_claimed_name(begin, free_ports, redis_server, single_loop_echo, tmp_path, kind):
    """A successor accepts once it knows what is claimed, which its predecessor has to give away first."""
    port, own = free_ports(1)[0], free_ports(1)[0]
    store = f"sqlite:{tmp_path}/names.db" if kind == "sqlite" else redis_server().url
    options = {"store": store, "listen": f"{HOST}:{own}"}
    words = f"--listen={HOST}:{port}", "--drain=60s"
    started = [begin(*words, **options)]
    target = f"tcp:{show_address(single_loop_echo)}"
    wait_until(lambda: started[0].claim(target=target).status == 201)
    with Customers((HOST, port), said=sample_hello(SHOP)) as customers:
        for _ in range(5):
            started.append(begin(*words, **options))
            goal = customers.served + 100
            wait_until(lambda: customers.served >= goal or customers.failures, timeout=20, what="a hundred customers")
    assert customers.failures == []
    for each in started[:-1]:
        assert each.program.wait() == 0


@linux
def test_a_successor_that_cannot_know_what_is_claimed_serves_all_other_names(begin, free_ports, redis_server, echo_server,
                                                                          launch, tmp_path):
    redis, port, own = redis_server(), free_ports(1)[0], free_ports(1)[0]
    options = {"store": redis.url, "listen": f"{HOST}:{own}"}
    words = f"--listen={HOST}:{port}", route(echo_server.address)
    first = begin(*words, **options)
    redis.process.send_signal(signal.SIGSTOP)
    try:
        second = launch("-c", str(tmp_path / "router.toml"), *words)
        second.wait_for(" info another sniroute listened there: it drains, and ends\n")
        with connect((HOST, port), HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
        second.wait_for("until then claimed names are refused\n")
    finally:
        redis.process.send_signal(signal.SIGCONT)
    assert first.program.wait() == 0


@linux
def test_what_a_file_has_kept_is_routed_for_the_first_client(begin, serve, tmp_path):
    far = serve(answer(b"x", 1))
    options = {"store": f"sqlite:{tmp_path}/names.db"}
    first = begin(**options)
    assert first.claim(target=f"tcp:{HOST}:{far.address[1]}").status == 201
    first.kill()
    again = begin(**options)
    with connect(again.program.address, sample_hello(SHOP)) as client:
        assert client.recv(1) == b"x"
    assert re.search(r" registry on .*\n(.*\n)*?.* listening on ", again.program.log())


@linux
def test_what_redis_has_kept_is_routed_for_the_first_client(begin, redis_server, serve, free_ports):
    """It comes before Redis has told anything: the port is open, and nobody is taken yet."""
    redis, far, port = redis_server(), serve(answer(b"x", 1)), free_ports(1)[0]
    first = begin(store=redis.url)
    wait_until(lambda: first.claim(target=f"tcp:{HOST}:{far.address[1]}").status == 201)
    first.kill()
    redis.process.send_signal(signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        again = pool.submit(begin, f"--listen={HOST}:{port}", store=redis.url)
        client = wait_until(lambda: dialled((HOST, port)))
        with client:
            client.sendall(sample_hello(SHOP))
            is_taken = select.select([client], [], [], 0.3)[0]
            redis.process.send_signal(signal.SIGCONT)
            assert not is_taken and client.recv(1) == b"x"
        again.result()


def dialled(address: Address) -> socket.socket | None:
    """A connection, where somebody listens."""
    try:
        return connect(address)
    except ConnectionRefusedError:
        return None


@linux
@pytest.mark.parametrize("store", ["away", "silent"])
def test_a_store_that_tells_nothing_holds_nobody_up_for_long(begin, redis_server, serve, store):
    redis, far = redis_server(), serve(answer(b"x", 1))
    if store == "away":
        redis.stop()
    else:
        redis.process.send_signal(signal.SIGSTOP)
    router = begin(f"--route=a.test=tcp:{HOST}:{far.address[1]}", store=redis.url)
    assert ("has not told within 2 s what is claimed" in router.program.log()) == (store == "silent")
    with connect(router.program.address, sample_hello("a.test")) as client:
        assert client.recv(1) == b"x"


@linux
def test_while_it_drains_nothing_is_claimed_and_what_is_may_be_renewed(begin, serve):
    far = serve(lambda sock: (sock.sendall(b"x"), read_all(sock)))
    there = begin("--drain=30s")
    made = there.claim(target=f"tcp:{HOST}:{far.address[1]}")
    with connect(there.program.address, sample_hello(SHOP)) as client:
        assert client.recv(1) == b"x"
        there.program.signal(signal.SIGTERM)
        there.program.wait_for(" draining: ")
        said = there.claim("other", "tcp:127.0.0.1:1")
        assert (said.status, said.headers["Retry-After"]) == (503, "5") and "about to end" in said.json["detail"]
        assert there.ask("POST", "/routes/shop/renew", **lease(made)).status == 200
        assert there.ask("DELETE", "/routes/shop?cut=1", **lease(made)).status == 204
        assert read_all(client) == b""
    assert there.program.wait() == 0 and " reason=released" in there.program.log()


@linux
def test_what_a_reload_cannot_change_is_said(begin, tmp_path):
    there = begin()
    for text, lines in (
            (table_of(listen=f"{HOST}:1", store="redis://app:geheim@127.0.0.1:1"), [
                "router.toml: registry.listen: is for the next start; it stays as it is",
                "registry.store: is for the next start; it stays as it is"]),
            (f'[routes]\n"x.example.com" = "tcp:{HOST}:1"\n', [
                "--registry: is for the next start; it stays as it is"])):
        (tmp_path / "router.toml").write_text(text)
        seen = there.program.log().count("reload: done")
        there.program.signal(signal.SIGHUP)
        there.program.wait_for("reload: done", seen + 1)
        for line in lines:
            assert line in there.program.log(), line
        assert there.claim(target="tcp:127.0.0.1:1").status in (200, 201)
    assert "geheim" not in there.program.log()


# -- a start that fails --------------------------------------------------------------------------


@pytest.mark.parametrize("options, line", [
    ({"domains": None}, "registry.domains: say below which domains names may be claimed"),
    ({"owners": {}}, "registry.owners: nobody may claim a name"),
    ({"owners": {"alice": {"token": "geheim"}}}, "registry.owners.alice.token: is no hash of a token"),
    ({"owners": {"alice": {"names": ["shop.example.org"]}}},
     "registry.owners.alice.names: shop.example.org is not below"),
    ({"store": "postgres:geheim"}, "registry.store: 'postgres' is none of memory, sqlite:PATH"),
    ({"store": "redis://app:geheim@127.0.0.1:99999"}, "registry.store: "),
    ({"store": "redis://app:geheim@127.0.0.1/x"}, "registry.store: "),
    ({"store": "sqlite:/nonexistent/names.db"}, "registry.store: /nonexistent/names.db: No such file or directory"),
    ({"ttl": "1s"}, "registry.ttl: 1 s is not between 5 s and max_ttl"),
    ({"networks": None}, 'registry.targets: "tcp" leads nowhere without networks'),
    ({"dns": f"rfc2136://127.0.0.1/{ZONE}?key=router"}, f"registry.dns: {KEY_VARIABLE}: "),
    ({"listen": "192.0.2.1:1"}, "--registry: 192.0.2.1:1: Cannot assign requested address"),
    ({"listen": "unix:/nonexistent/socket"}, "--registry: /nonexistent/socket: No such file or directory"),
    ({"hole": "1"}, "registry.hole: no such option"),
], ids=lambda value: "".join(value) if isinstance(value, dict) else "")
def test_a_wrong_setting_stops_the_start_with_its_name(settings_file, options, line):
    ended = command("-c", settings_file(table_of(**options)), f"--listen={HOST}:0")
    assert ended.returncode in (1, 2) and line in ended.stderr, ended.stderr
    said = [each for each in ended.stderr.split("\n") if " error " in each or each.startswith("sniroute: ")]
    assert len(said) == 1, ended.stderr
    assert "geheim" not in ended.stderr and "Traceback" not in ended.stderr


def test_a_registry_without_a_file_of_settings_is_told():
    ended = command(f"--registry={HOST}:0", f"--listen={HOST}:0")
    assert ended.returncode in (1, 2) and "which names, and whose, is said in a file of settings" in ended.stderr


def test_two_routers_with_one_file_are_refused(routed, monkeypatch, tmp_path):
    monkeypatch.setattr(sniroute_sqlite, "BUSY_TIME", 0.1)
    first = routed(store=f"sqlite:{tmp_path}/names.db")
    with pytest.raises(SettingsError, match="names.db: another process has it open"):
        routed(store=f"sqlite:{tmp_path}/names.db")
    assert first.claim(target="tcp:127.0.0.1:1").status == 201


def test_a_start_that_fails_leaves_the_file_to_the_next_one(run, routed, settings_file, monkeypatch, tmp_path,
                                                            admin_path):
    """A successor tries again and again."""
    monkeypatch.setattr(sniroute_sqlite, "BUSY_TIME", 0.1)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    store = f"sqlite:{tmp_path}/names.db"
    for options in ({"dns": f"rfc2136://127.0.0.1/{ZONE}?key=router"}, {"listen": "192.0.2.1:1"}):
        running = run("-c", settings_file(table_of(store=store, **options)))
        for _ in range(2):
            with pytest.raises((SettingsError, OSError), match="SNIROUTE_DNS_KEY|Cannot assign"):
                attach(running.router, running.router.settings.claims)
    there = routed(store=store, listen=f"unix:{admin_path}")
    assert there.claim(target="tcp:127.0.0.1:1").status == 201
    there.close()
    there.close()
    assert not os.path.exists(admin_path)


def test_a_reload_in_the_moment_of_the_start_does_not_lose_the_claims(routed, serve):
    """Routes are swapped whole: whoever adds a layer has to add it to those that are there by then."""
    there, far = routed(), serve(answer(b"x", 1))
    there.registrar.close()
    go, settings = threading.Event(), there.router.settings.again(there.router.settings)
    there.router.call(lambda: go.wait(10))
    there.router.call(lambda: there.router.adopt(settings, {}))
    there.registrar = attach(there.router, settings.claims)
    there.address = there.registrar.address
    go.set()
    there.claim(target=there.target(far))
    assert reached(there) == b"x"


# -- names ---------------------------------------------------------------------------------------


def test_a_claim_is_routed_from_its_answer_on_until_its_end(routed, serve):
    there, far = routed(), serve(answer(b"x", 1))
    assert refused(there) == "no_route"
    made = there.claim(target=there.target(far))
    assert reached(there) == reached(there, "SHOP.TUN.example.com") == b"x"
    assert there.ask("DELETE", "/routes/shop", **lease(made)).status == 204
    there.settle()
    assert refused(there) == "no_route"


def test_a_registry_that_stood_still_ends_no_claim_before_it_could_be_renewed(routed, serve, monkeypatch):
    """As where its host is suspended: longer than a ttl, and than what is renewed late."""
    monkeypatch.setattr(sniroute_owners, "TTL_MIN", 1.0)
    monkeypatch.setattr(sniroute_loop, "STOOD_STILL", 0.5)
    there, far = routed(), serve(answer(b"x", 1))
    made = there.claim(target=there.target(far), ttl=1)
    there.registrar.door.loop.call(lambda: time.sleep(1.4))  # the loop stands still, and no more than that
    there.settle()
    assert reached(there) == b"x"
    assert there.ask("POST", "/routes/shop/renew", **lease(made)).status == 200


def test_connections_go_on_when_a_claim_ends_unless_they_are_cut(routed, serve):
    there, far = routed(), serve(answer(b"x", 1))
    for cut, after in (("0", b"!"), ("1", b"")):
        made = there.claim(target=there.target(far))
        with hello(there) as client:
            first = read_exactly(client, 1)
            assert there.ask("DELETE", f"/routes/shop?cut={cut}", **lease(made)).status == 204
            there.settle()
            assert refused(there) == "no_route"
            if cut == "0":
                client.sendall(b"and more")
                assert read_all_of(client, b"and more")
            else:
                assert not read_all_of(client, b"and more")
        assert first == b"x"
    wait_until(lambda: any(each.reason == "released" for each in there.running.endings))


def read_all_of(client: socket.socket, end: bytes) -> bool:
    """Read until this has come; whether it has."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while end not in data and (more := client.recv(65536)):
            data += more
    return end in data


def test_who_may_come_is_narrowed_by_owner_and_claim(routed, serve):
    far = serve(answer(b"x", 1))
    there = routed(owners={"alice": {"allow_clients": ["192.0.2.0/24"]}, "bob": {}})
    target = there.target(far)
    assert there.claim(target=target).status == there.claim("narrow", target, allow=["192.0.2.7"]).status == 201
    assert there.claim("open", target, token=BOB).status == 201
    assert there.claim("wide", target, allow=["198.51.100.0/24"]).status == 403
    home, near, away = "192.0.2.7", "192.0.2.8", "198.51.100.1"
    for number, (name, ip, comes) in enumerate((
            (SHOP, home, True), (SHOP, near, True), (SHOP, away, False), (SHOP, "", False),
            (f"narrow.{DOMAIN}", home, True), (f"narrow.{DOMAIN}", near, False),
            (f"open.{DOMAIN}", away, True), (f"open.{DOMAIN}", "", True))):
        header = v1(f"TCP4 {ip} 192.0.2.1 {number + 1} 443") if ip else b""
        if comes:
            assert reached(there, name, header) in (b"x", header[:1])
        else:
            assert refused(there, name, header) == "not_allowed"


def test_a_name_that_is_suspended_has_no_clients_until_it_is_resumed(routed, serve):
    there, far = routed(), serve(answer(b"x", 1))
    made = there.claim(target=there.target(far))
    for _ in range(2):
        assert reached(there) == b"x"
        assert there.ask("POST", "/routes/shop/suspend", token=ADMIN).status == 200
        there.settle()
        assert refused(there) == "no_route"
        assert there.ask("POST", "/routes/shop/renew", **lease(made)).status == 200
        assert there.ask("POST", "/routes/shop/resume", token=ADMIN).status == 200
        there.settle()


def test_each_claim_says_what_plain_http_gets(routed, serve):
    there, far = routed(), serve(web(b"hello"))
    for mode in ("forward", "redirect", "refuse"):
        assert there.claim(mode, there.target(far), http=mode).status == 201
    address = there.router.server_address
    status, data = get(address, f"forward.{DOMAIN}")
    assert status == 200 and data.endswith(b"hello")
    status, data = get(address, f"redirect.{DOMAIN}", "/a?b")
    assert status in (301, 307, 308) and f"Location: https://redirect.{DOMAIN}".encode() in data
    assert get(address, f"refuse.{DOMAIN}")[0] not in (200, 301, 307, 308) and far.accepted == 1


def test_a_browser_that_stays_connected_is_refused_once_the_name_is_gone(routed, serve):
    """Each request is decided for itself."""
    there, far = routed(), serve(web(b"hello"))
    made = there.claim(target=there.target(far), http="forward")
    request = f"GET / HTTP/1.1\r\nHost: {SHOP}\r\n\r\n".encode()
    with connect(there.router.server_address, request) as client:
        assert read_all_of(client, b"hello")
        assert there.ask("DELETE", "/routes/shop", **lease(made)).status == 204
        there.settle()
        client.sendall(request)
        assert b"200 OK" not in client.recv(65536)


# -- where targets lead --------------------------------------------------------------------------


@pytest.mark.parametrize("found", [
    "127.0.0.1", "::ffff:127.0.0.1", "::ffff:7f00:1", "64:ff9b::7f00:1", "169.254.169.254", "::ffff:169.254.169.254",
    "0.0.0.0", "::", "::1", "10.0.0.1", "fe80::1"])
def test_a_host_that_leads_elsewhere_by_now_is_not_dialled(routed, serve, monkeypatch, found):
    far = serve(answer(b"x", 1), ("127.0.0.2", 0))
    there = routed(networks=["127.0.0.2/32"])
    look, rows = socket.getaddrinfo, ["127.0.0.2"]

    def steered(host: str, port: Any, *words: Any, **more: Any) -> Any:
        if host != "app.internal":
            return look(host, port, *words, **more)
        family = socket.AF_INET6 if ":" in rows[0] else socket.AF_INET
        address = (rows[0], port, 0, 0) if ":" in rows[0] else (rows[0], port)
        return [(family, socket.SOCK_STREAM, 6, "", address)]

    monkeypatch.setattr(socket, "getaddrinfo", steered)
    assert there.claim("before", f"tcp:app.internal:{far.address[1]}").status == 201
    assert reached(there, f"before.{DOMAIN}") == b"x"
    rows[0] = found
    assert there.claim(target=f"tcp:app.internal:{far.address[1]}").status == 201, "names are judged at the dial"
    assert refused(there) == "forbidden"


def test_no_claim_leads_to_the_router_itself_or_to_its_store(routed, redis_server, free_ports, monkeypatch):
    redis = redis_server()
    port = free_ports(1)[0]
    there = routed(f"--port={HOST}:{port}=tcp:192.0.2.1:1", store=f"redis://localhost:{redis.port}")
    wait_until(lambda: there.claim("ready", "tcp:127.0.0.1:1").status == 201)
    there.router.targets.own_admin = [(HOST, port + 1)]
    for own in (there.router.server_address[1], there.address[1], redis.port, port, port + 1):
        for host in ("127.0.0.1", "[::ffff:127.0.0.1]", "0.0.0.0"):
            said = there.claim(target=f"tcp:{host}:{own}")
            assert said.status == 403, (host, own, said)
        assert there.claim("by-name", f"tcp:localhost:{own}").status in (200, 201)
        there.settle()
        assert refused(there, f"by-name.{DOMAIN}") == "forbidden"


def test_the_password_of_a_store_may_be_in_the_environment(routed, redis_server, monkeypatch):
    redis = redis_server(*USER)
    monkeypatch.setenv(STORE_PASSWORD, " secret\n")
    there = routed(store=f"redis://app@{HOST}:{redis.port}")
    wait_until(lambda: there.claim(target="tcp:127.0.0.1:1").status == 201)
    assert b"user=app" in redis.tell("CLIENT", "LIST")
    monkeypatch.delenv(STORE_PASSWORD)
    with pytest.raises(SettingsError, match=f"put that into {STORE_PASSWORD}") as caught:
        routed(store=f"redis://perhaps-a-password@{HOST}:{redis.port}")
    assert "perhaps" not in str(caught.value)


# -- ports ---------------------------------------------------------------------------------------


def is_open(port: int) -> bool:
    try:
        connect((HOST, port)).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture
def port(free_ports) -> int:
    return free_ports(1)[0]


def claim_port(there: Asked, port: int | None, target: str, token: str = ALICE, **more: Any) -> Any:
    return there.ask("POST", "/routes", {"port": port, "target": target, **more}, token)


def test_a_port_is_open_as_long_as_it_is_claimed(routed, serve, port):
    there = routed(ports=f"{port}-{port}")
    first, second = serve(answer(b"1", 1)), serve(answer(b"2", 1))
    assert not is_open(port)
    made = claim_port(there, port, there.target(first))
    assert made.status == 201
    there.settle()
    with connect((HOST, port), b"?") as client:
        assert client.recv(1) == b"1"
        changed = there.ask("PUT", f"/routes/tcp:{port}", {"target": there.target(second)}, **lease(made))
        assert changed.status == 200
        there.settle()
        with connect((HOST, port), b"?") as other:
            assert other.recv(1) == b"2", "a change leads new clients elsewhere"
        again = claim_port(there, port, there.target(first))
        assert again.status == 200 and again.json["taken_over"]
        there.settle()
        with connect((HOST, port), b"?") as other:
            assert other.recv(1) == b"1", "so does who takes it over"
        assert there.ask("DELETE", f"/routes/tcp:{port}", **lease(again)).status == 204
        there.settle()
        assert not is_open(port)
        client.sendall(b"!")
        assert client.recv(1) == b"!", "connections go on"
    for _ in range(5):  # it is still being closed
        again = claim_port(there, port, there.target(second))
        assert again.status == 201, again
        assert there.ask("DELETE", f"/routes/tcp:{port}", **lease(again)).status == 204
    again = claim_port(there, port, there.target(second))
    there.settle()
    with connect((HOST, port), b"?") as client:
        assert client.recv(1) == b"2"
        assert there.ask("DELETE", f"/routes/tcp:{port}?cut=1", **lease(again)).status == 204
        assert read_all(client) == b""
    wait_until(lambda: [each for each in there.running.endings if each.reason == "released"])


def test_a_port_that_is_suspended_is_closed(routed, serve, port):
    there, far = routed(ports=f"{port}-{port}"), serve(answer(b"x", 1))
    made = claim_port(there, port, there.target(far))
    for _ in range(3):
        assert there.ask("POST", f"/routes/tcp:{port}/suspend", token=ADMIN).status == 200
        assert there.ask("POST", f"/routes/tcp:{port}/resume", token=ADMIN).status == 200
    assert there.ask("POST", f"/routes/tcp:{port}/suspend", token=ADMIN).status == 200
    there.settle()
    assert not is_open(port)
    assert there.ask("POST", f"/routes/tcp:{port}/resume", token=ADMIN).status == 200
    there.settle()
    assert is_open(port)
    assert there.ask("POST", f"/routes/tcp:{port}/renew", **lease(made)).status == 200


def test_a_port_of_another_process_is_refused(routed, free_ports):
    first, last = free_ports(2)
    there = routed(ports=f"{first}-{last}")
    with socket.create_server((HOST, first)):
        said = claim_port(there, first, "tcp:127.0.0.1:1")
        assert said.status == 409 and "Address already in use" in said.json["detail"]
        assert claim_port(there, None, "tcp:127.0.0.1:1").json["name"] == f"tcp:{last}", "another one will do"
    assert claim_port(there, first, "tcp:127.0.0.1:1").status == 201


def test_a_port_survives_a_reload_and_the_settings_come_first(routed, serve, port):
    there = routed(ports=f"{port}-{port}")
    first, second = serve(answer(b"1", 1)), serve(answer(b"2", 1))
    made = claim_port(there, port, there.target(first))
    there.settle()
    text = table_of(ports=f"{port}-{port}")
    for more, byte in (("", b"1"), (f'[ports]\n":{port}" = {json.dumps(there.target(second))}\n', b"2"), ("", b"1")):
        there.reload(more + text)
        with connect((HOST, port), b"?") as client:
            assert client.recv(1) == byte
    there.reload(table_of())
    wait_until(lambda: not is_open(port))
    assert there.ask("GET", f"/routes/tcp:{port}").status == 404, "no ports may be claimed any more"
    assert made.status == 201


def test_a_port_is_open_on_every_router_that_may_and_released_where_one_cannot(routed, redis_server, serve, port,
                                                                               caplog):
    """Two on one host cannot have the same port."""
    redis, far = redis_server(), serve(answer(b"x", 1))
    first, second = routed(store=redis.url, ports=f"{port}-{port}"), routed(store=redis.url)
    target = first.target(far)
    wait_until(lambda: claim_port(first, port, target).status in (200, 201))
    wait_until(lambda: second.registrar.table.find(f"tcp:{port}"))
    second.settle()
    with connect((HOST, port), b"?") as client:
        assert client.recv(1) == b"x"
    assert f"tcp:{port}" not in second.registrar.ports.given, "it has no `ports`"
    second.reload(table_of(store=redis.url, ports=f"{port}-{port}"))
    wait_until(lambda: first.registrar.table.find(f"tcp:{port}") is None, what="the release")
    assert f"tcp:{port} is released, since this router cannot open it: port" in caplog.text
    wait_until(lambda: not is_open(port))


def test_a_port_that_could_not_be_opened_for_the_claim_before_is_not_released_for_that(routed, serve, port, monkeypatch):
    """The owner has it again, and it is free by now, when the release has its turn."""
    there, far = routed(ports=f"{port}-{port}"), serve(answer(b"x", 1))
    registrar, orders, key = there.registrar, [], f"tcp:{port}"
    write = registrar.store.write
    with monkeypatch.context() as patch, socket.create_server((HOST, port)):
        patch.setattr(registrar.store, "write", lambda *words: orders.append(lambda: write(*words)))
        for _ in range(2):  # as if another router had let them in: nobody opens the port first
            registrar.door.loop.call(lambda: registrar.registry.claim(
                key, "alice", there.target(far), 60.0, 60.0, lambda result: None))
        wait_until(lambda: orders)
        registrar.door.loop.call(orders.pop())
        wait_until(lambda: orders)
        before = registrar.table.find(key)
    registrar.door.loop.call(orders.pop())
    wait_until(lambda: key not in registrar.registry.turns)
    there.settle()
    assert registrar.table.find(key).lease != before.lease
    with connect((HOST, port), b"?") as client:
        assert client.recv(1) == b"x"


@linux
def test_a_successor_does_not_get_claimed_ports(begin, free_ports):
    """There may be more of them than can be handed over at once."""
    port, (first, last) = free_ports(1)[0], free_ports(300)
    options = {"ports": f"{first}-{last}", "owners": {"alice": {"max_names": 1000}}}
    there = begin(f"--listen={HOST}:{port}", **options)
    for number in range(first, last):
        assert claim_port(there, number, "tcp:127.0.0.1:1").status == 201
    begin(f"--listen={HOST}:{port}", name="second", **options)
    assert there.program.wait() == 0 and "another sniroute listens here now" in there.program.log()


# -- reload --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, why", [
    ({"owners": {"bob": {}, "root": {}}}, "owner alice is gone from the settings, and with it 1 claims"),
    ({"owners": {"alice": {"names": ["other.tun.example.com"]}, "bob": {}, "root": {}}}, "is not in your name space"),
    ({"owners": {"alice": {}, "bob": {"names": [SHOP, f"x.{DOMAIN}"]}, "root": {}}}, "is kept for an owner"),
    ({"domains": ["new.example.com", f"x.{DOMAIN}"]}, f"{SHOP} is not below"),
    ({"networks": ["127.0.0.2/32"]}, "127.0.0.1 is this host's own"),
    ({"target_ports": "1-2"}, "is not between 1 and 2"),
    ({"reserved": ["shop"]}, "is reserved"),
    ({"targets": ["nodepass"], "networks": None}, "is no kind of target that you may name"),
], ids=["owner", "names", "kept", "domain", "network", "port", "reserved", "kind"])
@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_what_the_settings_do_not_allow_any_more_ends_at_once(routed, serve, caplog, tmp_path, options, why, store):
    there = routed(store="memory" if store == "memory" else f"sqlite:{tmp_path}/names.db")
    far = serve(answer(b"x", 1))
    made = there.claim(target=there.target(far))
    assert reached(there) == b"x"
    there.reload(table_of(store=there.registrar.where.store, **options))
    wait_until(lambda: there.registrar.table.find(SHOP) is None)
    there.settle()
    assert refused(there) == "no_route" and why in caplog.text
    assert there.registrar.table.find_held(SHOP) is None, "nobody has to wait for it"
    assert there.ask("POST", "/routes/shop/renew", **lease(made)).status in (401, 404)


def test_what_the_settings_still_allow_stays(routed, serve, caplog):
    there, far = routed(), serve(answer(b"x", 1))
    made = there.claim(target=there.target(far))
    there.reload(table_of(owners={"alice": {"names": ["s*.tun.example.com"], "max_names": 1}, "bob": {}}, ttl="30s"))
    assert reached(there) == b"x" and "ends" not in caplog.text
    assert there.ask("POST", "/routes/shop/renew", **lease(made)).status == 200


def test_a_file_of_another_time_is_held_against_the_settings_of_now(routed, caplog, tmp_path):
    store = f"sqlite:{tmp_path}/names.db"
    first = routed(store=store)
    for name, token in (("shop", ALICE), ("x", BOB), ("y", ALICE)):
        assert first.claim(name, "tcp:127.0.0.1:1", token).status == 201
    first.close()
    second = routed(store=store, owners={"alice": {"names": [SHOP]}, "root": {}})
    assert refused(second, f"x.{DOMAIN}") == refused(second, f"y.{DOMAIN}") == "no_route"
    wait_until(lambda: len(second.registrar.table.live) == 1)
    assert second.registrar.table.find(SHOP) and "there is no owner bob" in caplog.text


def test_what_another_router_has_let_in_is_not_ended_but_not_routed_either(routed, redis_server, serve):
    redis, far = redis_server(), serve(answer(b"x", 1))
    first, second = routed(store=redis.url), routed(store=redis.url, networks=["127.0.0.2/32"])
    wait_until(lambda: first.claim(target=first.target(far)).status in (200, 201))
    wait_until(lambda: second.registrar.table.find(SHOP))
    assert reached(first) == b"x" and refused(second) == "no_route"
    second.reload(table_of(store=redis.url, networks=["127.0.0.2/32"], ttl="30s"))
    assert second.registrar.table.find(SHOP) and reached(first) == b"x"


def test_a_token_is_rotated_without_an_interruption(routed, serve):
    there, far = routed(), serve(answer(b"x", 1))
    made = there.claim(target=there.target(far))
    old, (token, digest) = re.search(r"sha256:\w+", table_of())[0], new_token()
    for hashes, ways in (([old, digest], {ALICE: 200, token: 200}), ([digest], {ALICE: 401, token: 200})):
        there.reload(table_of(owners={"alice": {"token": hashes}}))
        for each, status in ways.items():
            assert there.ask("POST", "/routes/shop/renew", token=each, **lease(made)).status == status
        assert reached(there) == b"x"


@pytest.mark.parametrize("pattern", [SHOP, f"*.{DOMAIN}", "**.example.com"])
def test_a_route_of_the_settings_comes_first_and_the_claim_comes_back(routed, serve, caplog, pattern):
    caplog.set_level(logging.INFO)
    there = routed()
    far, other = serve(answer(b"c", 1)), serve(answer(b"s", 1))
    made = there.claim(target=there.target(far))
    assert reached(there) == b"c"
    for _ in range(2):
        there.reload(f"[routes]\n{json.dumps(pattern)} = {json.dumps(there.target(other))}\n" + table_of())
        assert reached(there) == b"s"
    assert caplog.text.count("has a route of the settings, too, which comes first") == 1
    assert there.ask("POST", "/routes/shop/renew", **lease(made)).status == 200
    said = there.claim("shop", token=BOB, target="tcp:127.0.0.1:1")
    assert (said.status, said.json["class"]) == (409, "configured")
    there.reload(table_of())
    assert reached(there) == b"c" and "has no route of the settings any more" in caplog.text


def test_a_claim_behind_a_route_of_the_settings_does_not_cut_its_clients(routed, serve):
    there = routed()
    far, other = serve(answer(b"c", 1)), serve(answer(b"s", 1))
    made = there.claim(target=there.target(far))
    with hello(there) as claimed:
        assert claimed.recv(1) == b"c"
        there.reload(f"[routes]\n{json.dumps(SHOP)} = {json.dumps(there.target(other))}\n" + table_of())
        with hello(there) as configured:
            assert configured.recv(1) == b"s"
            assert there.ask("DELETE", "/routes/shop?cut=1", **lease(made)).status == 204
            assert not read_all_of(claimed, b"and more")
            configured.sendall(b"and more")
            assert read_all_of(configured, b"and more")


def test_who_listens_to_events_does_so_by_the_settings_of_now(routed):
    there = routed()
    connections = {token: connect(there.address, f"GET /events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
                                  f"{token}\r\n\r\n".encode()) for token in (ADMIN, ALICE, BOB)}
    with contextlib.ExitStack() as stack:
        for client in connections.values():
            stack.enter_context(client)
            assert read_all_of(client, b"the events of")
        there.reload(table_of(owners={"alice": {}, "root": {"admin": False}}))
        assert not read_all_of(connections[ADMIN], b"claimed") and not read_all_of(connections[BOB], b"claimed")
        assert there.claim(target="tcp:127.0.0.1:1").status == 201
        assert read_all_of(connections[ALICE], b"claimed")


# -- stores that are away ------------------------------------------------------------------------


def test_while_redis_is_away_names_are_routed_for_as_long_as_the_settings_say(routed, redis_server, serve, monkeypatch):
    monkeypatch.setattr(sniroute_registrar, "TICK", 0.05)
    redis, far = redis_server(*KEPT), serve(answer(b"x", 1))
    there = routed(store=redis.url, stale_max="1h")
    wait_until(lambda: there.claim(target=there.target(far)).status in (200, 201))
    redis.stop()
    wait_until(lambda: there.registrar.table.frozen_since is not None)
    assert reached(there) == b"x"
    assert there.claim("other", "tcp:127.0.0.1:1").status == 503
    there.reload(table_of(store=redis.url, stale_max="500ms"))  # only now: this thread may have been stopped for that long
    wait_until(lambda: there.registrar.layer.is_stale)
    there.settle()
    assert refused(there) == "no_route"
    redis.start()
    wait_until(lambda: not there.registrar.layer.is_stale)
    there.settle()
    assert reached(there) == b"x"


# -- DNS -----------------------------------------------------------------------------------------


class Recorded:
    """A name server, and a registry that writes to it; SHOP is claimed there, and its record is written."""

    def __init__(self, named: Any, begin: Callable[[], Any]):
        self.named, self.begin = named, begin
        named.start()
        self.there = begin()
        self.made = self.there.claim(target="tcp:127.0.0.1:1")
        wait_until(lambda: named.addresses(SHOP) == {"192.0.2.1"})


@pytest.fixture
def recorded(routed, new_named, monkeypatch, tmp_path) -> Recorded:
    named = new_named()
    monkeypatch.setenv(KEY_VARIABLE, base64.b64encode(KEYS["router"].secret).decode())
    return Recorded(named, lambda: routed(store=f"sqlite:{tmp_path}/names.db", dns=named.url))


def test_each_name_has_its_record_and_a_server_that_is_away_holds_nothing_up(recorded):
    named, there, made = recorded.named, recorded.there, recorded.made
    assert there.ask("DELETE", "/routes/shop", **lease(made)).status == 204
    wait_until(lambda: not named.addresses(SHOP))
    named.stop()
    try:
        began = time.monotonic()
        assert there.claim("late", "tcp:127.0.0.1:1").status == 201
        assert time.monotonic() - began < 1
        there.close()
    finally:
        named.start()
    recorded.begin()
    wait_until(lambda: named.addresses(f"late.{DOMAIN}") == {"192.0.2.1"}, what="what a restart has to catch up with")


def test_a_name_that_was_released_while_the_server_was_away_has_no_record_after_a_restart(recorded):
    named, there = recorded.named, recorded.there
    named.stop()
    try:
        assert there.ask("DELETE", "/routes/shop", **lease(recorded.made)).status == 204
        there.close()
    finally:
        named.start()
    recorded.begin()
    wait_until(lambda: not named.addresses(SHOP), what="what a restart has to catch up with")
