"""Tests of sniroute_backends.py and sniroute_balance.py: several backends behind one route."""

from __future__ import annotations

import collections
import contextlib
import json
import random
import re
import socket
import statistics
import sys
import time
import types
from typing import Any, Callable

import pytest

import sniroute_options
import sniroute_settings
from sniroute_backends import SEVERAL
from sniroute_balance import WAYS, Member, slot_of
from sniroute_book import Book
from sniroute_groups import Group, Several
from sniroute_refusals import SettingsError
from sniroute_routes import parse_route
from conftest import HERE, HOST, Address, FakeClock, Server, deaf_listener, wait_until
from testbed.clients import Database, psql
from testbed.hellos import HELLO, NAME, genuine, v2
from testbed.program import Program, command, execute
from testbed.running import Running, alert, read_all, read_exactly, reset


# -- helpers -----------------------------------------------------------------------------------


def named(text: bytes) -> Callable[[socket.socket], None]:
    """A handler that answers the hello with its name, and then sends everything back."""
    def handler(sock: socket.socket) -> None:
        if read_exactly(sock, len(HELLO)) != HELLO:
            return
        sock.sendall(text)
        while data := sock.recv(65536):
            sock.sendall(data)
    return handler


def refusing() -> Address:
    """An address at which nobody listens."""
    with socket.create_server((HOST, 0)) as sock:
        return sock.getsockname()


def listed(*addresses: Address) -> str:
    return "tcp:" + ",".join(f"{host}:{port}" for host, port in addresses)


@pytest.fixture
def several_of(run, settings_file) -> Callable[..., Running]:
    """several_of(addresses, option=value ...) -> a router with these backends behind NAME."""
    def start(addresses: list[Address], *words: str, **options: Any) -> Running:
        return run("-c", settings_file(table(addresses, **options)), *words)
    return start


def table(addresses: list[Address], **options: Any) -> str:
    lines = [f'{name} = {value if isinstance(value, int) else chr(34) + value + chr(34)}' for name, value in options.items()]
    return "\n".join([f'[routes."{NAME}"]', f'target = "{listed(*addresses)}"', *lines, ""])


def said_by(running: Running, count: int = 1) -> bytes:
    """What answers a client."""
    with running.connect(HELLO) as client:
        return read_exactly(client, count)


def group_of(running: Running) -> Group:
    (group,) = running.router.targets.book.groups.values()
    return group


def on_loop(running: Running, act: Callable[[], Any]) -> Any:
    """Run something in the loop's thread, and return what it returns."""
    found: list[Any] = []
    running.router.call(lambda: found.append(act()))
    wait_until(lambda: found)
    return found[0]


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value, members", [
    ('"tcp:192.0.2.1:1,192.0.2.2:2"', ("tcp:192.0.2.1:1", "tcp:192.0.2.2:2")),
    ('["tcp:192.0.2.1:1", "cloudflared:a.example.com"]', ("tcp:192.0.2.1:1", "cloudflared:a.example.com")),
    ('["tcp:h:1,h:2", "tcp:[::1]:3"]', ("tcp:h:1", "tcp:h:2", "tcp:[::1]:3")),
    ('"tcp:h:1,h:1"', ("tcp:h:1", "tcp:h:1")),
    ('["tcp:h:1"]', ()), ('"tcp:h:1"', ()),
], ids=["with commas", "of two kinds", "both", "twice", "a list of one", "one"])
def test_a_list_of_targets_is_one_route(value, members, settings_file):
    settings = sniroute_settings.load_settings(["-c", settings_file(f'[routes]\n"a.b" = {value}\n')], {})
    assert settings.routes.routes[0].members == members
    assert (settings.routes.routes[0].several is not None) == bool(members)


def test_a_list_on_the_command_line():
    settings = sniroute_settings.load_settings(["--route", "a.b=tcp:192.0.2.1:1,[::1]:2"], {})
    (route,) = settings.routes.routes
    assert route.members == ("tcp:192.0.2.1:1", "tcp:[::1]:2") and route.several.balance == "round-robin"
    assert str(route) == "a.b=tcp:192.0.2.1:1,[::1]:2"


@pytest.mark.parametrize("line, said", [
    ('balance = "fastest"', "balance: 'fastest' is none of round-robin, least, random, hash, first, latency"),
    ('health = "connects"', "health: 'connects' is none of"), ('health = "http:99999/"', "health: "),
    ('health_fail = 0', "health_fail: '0' is not a whole number"),
    ('connect_timeout = "0s"', "connect_timeout: '0s' is not a duration"),
    ('warm = 1001', "warm: '1001' is not a whole number from 0 to 1000"), ('warm_jitter = 1.5', "warm_jitter: '1.5' is"),
    ('lameduck = "5s"', "lameduck: there is no such option"),
    ('health_interval = 5', "health_interval: '5' is not a duration"),
    ('ballance = "first"', "ballance: there is no such option; did you mean balance?"),
    ('idle = "5s"', "idle: is for tunnels"),
])
def test_a_bad_option_is_told_with_its_key(line, said, settings_file):
    path = settings_file(f'[routes."a.b"]\ntarget = "tcp:h:1,h:2"\nqueue = "never"\n{line}\n')
    with pytest.raises(SettingsError) as caught:
        sniroute_settings.load_settings(["-c", path], {})
    assert len(caught.value.lines) == 2, "all of them at once"
    assert any(f'routes."a.b".{said}' in text for text in caught.value.lines), caught.value.lines


@pytest.mark.parametrize("value, said", [
    ('"tcp:h:1,"', "is not HOST:PORT"), ('[]', "is not SCHEME:REST"), ('["tcp:h:1", "ftp:h"]', "is no kind of target"),
    ('["tcp:h:1", "tcp:h:99999"]', "tcp:h:99999"), ('["tcp:h:1", "tcp:{nme}:1"]', "has a field other than"),
])
def test_each_target_of_a_list_is_checked(value, said, settings_file):
    with pytest.raises(SettingsError) as caught:
        sniroute_settings.load_settings(["-c", settings_file(f'[routes]\n"a.b" = {value}\n')], {})
    assert said in str(caught.value)


def test_the_own_listener_in_a_list_stops_the_start():
    with pytest.raises(SettingsError, match="leads back to --listen 127.0.0.1:19000"):
        sniroute_settings.load_settings(
            ["--listen=127.0.0.1:19000", "--route=a.b=tcp:192.0.2.1:443,127.0.0.1:19000"], {})


def test_the_file_is_opened_only_where_a_route_has_several(tmp_path):
    code = ("import sys, sniroute_settings as s; s.load_settings(sys.argv[1:], {}); "
            "print([m for m in ('backends', 'book', 'groups', 'balance', 'warm', 'checks') if f'sniroute_{m}' in sys.modules])")
    for target, found in (("tcp:192.0.2.1:1", "[]"), ("tcp:192.0.2.1:1,192.0.2.2:1", "['backends', 'book', 'groups', 'balance']")):
        ended = execute(sys.executable, "-c", code, f"--route=a.b={target}", cwd=HERE, text=True, said="")
        assert ended.stdout.strip() == found, ended.stderr


@pytest.mark.parametrize("gone", ["sniroute_backends", "sniroute_checks"])
def test_a_missing_file_is_one_sentence(gone, monkeypatch):
    here = sniroute_options.is_here
    monkeypatch.setattr(sniroute_options, "is_here", lambda room: room != gone and here(room))
    with pytest.raises(SettingsError) as caught:
        sniroute_settings.load_settings(["--route=a.b=tcp:192.0.2.1:1,192.0.2.2:1"], {})
    assert caught.value.lines == (
        f"--route: a.b has several backends, or an option for them, and {gone}.py is not beside sniroute.py: copy it there",)
    assert sniroute_settings.load_settings(["--route=a.b=tcp:192.0.2.1:1"], {}).routes.routes


# -- with real sockets ---------------------------------------------------------------------------


def test_while_one_backend_is_good_everybody_is_served_at_once(several_of, serve, deaf):
    """One refuses, one is a black hole, one is good."""
    good = serve(named(b"g"))
    running = several_of([refusing(), deaf, good.address], connect_timeout="300ms")
    times = []
    for _ in range(300):
        began = time.monotonic()
        assert said_by(running) == b"g"
        times.append(time.monotonic() - began)
    assert statistics.median(times) < 0.005 and max(times) < 1.0
    assert sum(seconds > 0.2 for seconds in times) <= 3, "the black hole costs three clients its time-out"
    assert [bool(member.why) for member in group_of(running).members.values()] == [True, True, False]


@pytest.mark.parametrize("way", ["reset", "end"])
def test_the_next_backend_gets_the_same_bytes_where_one_takes_the_connect_and_closes(several_of, serve, way, flow):
    bad = serve(lambda sock: (read_exactly(sock, len(HELLO)), reset(sock) if way == "reset" else sock.close()))
    good = serve(named(b"g"))
    running = several_of([bad.address, good.address], balance="first")
    for _ in range(5):
        with running.connect(HELLO) as client:
            assert read_exactly(client, 1) == b"g"
            client.sendall(b"more")
            assert read_exactly(client, 4) == b"more"
    member = group_of(running).members[f"tcp:{HOST}:{bad.address[1]}"]
    assert bad.accepted == member.failures == 3 and member.why, "after three failures in a row it rests"
    assert running.counter("retries") == 3
    assert "took it" in running.ending(1).detail and running.ending(1).up == len(HELLO) + 4


def test_a_hello_that_no_backend_answers_makes_none_of_them_rest(several_of, serve):
    """Who sends nonsense to all of them is to blame himself."""
    bad = [serve(lambda sock: read_exactly(sock, len(HELLO))) for _ in range(2)]
    running = several_of([each.address for each in bad])
    for number in range(5):
        with running.connect(HELLO) as client:
            assert read_all(client) == alert(80)
        assert running.ending(number + 1).detail.count("closed the connection without a byte") == 2
    assert not any(member.why for member in group_of(running).members.values())
    assert [each.accepted for each in bad] == [5, 5]


def test_bytes_behind_the_hello_are_sent_to_one_backend_only(several_of, serve):
    """They might be 0-RTT data: what they ask for is not done twice."""
    bad = serve(lambda sock: read_exactly(sock, len(HELLO) + 5))
    good = serve(named(b"g"))
    running = several_of([bad.address, good.address], balance="first")
    with running.connect(HELLO + b"early") as client:
        assert read_all(client) == b""
    assert (bad.accepted, good.accepted) == (1, 0)


def test_when_all_are_down_each_is_tried_once_and_the_refusal_names_them(several_of, serve):
    addresses = [refusing() for _ in range(3)]
    running = several_of(addresses)
    for number in range(5):
        with running.connect(HELLO) as client:
            assert read_all(client) == alert(80)
        ending = running.ending(number + 1)
        assert ending.reason == "backend"
        for host, port in addresses:
            assert ending.detail.count(f"{host}:{port}: Connection refused") == 1
    assert all(member.why and member.failures == 5 for member in group_of(running).members.values())
    with Server(named(b"b"), addresses[1]):
        assert said_by(running) == b"b", "the first that is back serves the next client"


def test_a_reload_keeps_who_is_down(several_of, serve, settings_file):
    good, bad = serve(named(b"g")), refusing()
    running = several_of([bad, good.address])
    while not (member := group_of(running).members[f"tcp:{HOST}:{bad[1]}"]).why:
        assert said_by(running) == b"g"
    failures = member.failures
    for at in range(50):
        settings_file(table([good.address, bad] if at % 2 else [bad, good.address]))
        settings = running.router.settings.again(running.router.settings)
        on_loop(running, lambda: running.router.adopt(settings))
        assert said_by(running) == b"g"
    assert group_of(running).members[f"tcp:{HOST}:{bad[1]}"] is member and member.failures == failures


def test_a_backend_that_a_reload_takes_out_keeps_its_connections(several_of, serve, settings_file):
    one, two = serve(named(b"1")), serve(named(b"2"))
    running = several_of([one.address, two.address], balance="first")
    with running.connect(HELLO) as client:
        assert read_exactly(client, 1) == b"1"
        settings_file(table([two.address], balance="first"))
        settings = running.router.settings.again(running.router.settings)
        on_loop(running, lambda: running.router.adopt(settings))
        assert said_by(running) == b"2"
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"


def test_first_moves_no_session(several_of, serve):
    two = serve(named(b"2"))
    place = refusing()
    running = several_of([place, two.address], balance="first", health_fail=1, fallback_interval="200ms")
    with running.connect(HELLO) as held:
        assert read_exactly(held, 1) == b"2"
        with Server(named(b"1"), place):
            assert said_by(running) == b"2", "it rests"
            wait_until(lambda: said_by(running) == b"1")
            wait_until(lambda: said_by(running) == b"1" and not group_of(running).members[f"tcp:{HOST}:{place[1]}"].why)
        assert said_by(running) == b"2", "nobody is refused"
        held.sendall(b"x")
        assert read_exactly(held, 1) == b"x"


def test_hash_takes_the_address_of_the_proxy_header(several_of, serve):
    servers = [serve(named(bytes([48 + at]))) for at in range(3)]
    running = several_of([each.address for each in servers], balance="hash", send_proxy="none")
    def led(address: str) -> bytes:
        data = socket.inet_aton(address) + socket.inet_aton("192.0.2.1") + bytes(4)
        with running.connect(v2(0x21, 0x11, data) + HELLO) as client:
            head = read_exactly(client, 1)
        return head
    group = group_of(running)
    for address in ("198.51.100.1", "198.51.100.2", "198.51.100.3", "198.51.100.4"):
        owner = on_loop(running, lambda: group.way.owner(slot_of(address)).target)
        led(address)
        wait_until(lambda: running.endings and running.endings[-1].client[0] == address)
        assert running.endings[-1].backend == owner


def test_who_waits_for_room_is_served_in_order_and_who_leaves_is_never_dialled(several_of, serve):
    order: list[bytes] = []
    def handler(sock: socket.socket) -> None:
        head = read_exactly(sock, len(HELLO) + 1)
        order.append(head[-1:])
        sock.sendall(b"y")
        sock.recv(1)
    far = serve(handler)
    running = several_of([far.address], max_backend_connections=2)
    group = group_of(running)
    with contextlib.ExitStack() as stack:
        clients = []
        for at in range(10):
            client = stack.enter_context(running.connect(HELLO + b"%d" % at))
            clients.append(client)
            if at < 2:
                assert read_exactly(client, 1) == b"y"
            else:
                wait_until(lambda: len(group.waiting) == at - 1)
        for at in (3, 5, 9):
            clients[at].close()
        wait_until(lambda: len(group.waiting) == 5)
        stay = (0, 1, 2, 4, 6, 7, 8)
        for place, at in enumerate(stay):
            assert at < 2 or read_exactly(clients[at], 1) == b"y"
            assert set(order) <= {b"%d" % each for each in stay[:place + 2]}, "nobody goes before his turn"
            clients[at].close()
    wait_until(lambda: len(running.endings) == 10)
    assert sorted(order) == [b"%d" % at for at in stay] and far.accepted == 7
    wait_until(lambda: not next(iter(group.members.values())).active)


def test_who_waits_too_long_and_who_is_one_too_many_are_told_so(several_of, serve):
    far = serve(named(b"y"))
    running = several_of([far.address], max_backend_connections=1, queue="300ms", queue_length=1)
    with running.connect(HELLO) as first, running.connect(HELLO) as second:
        assert read_exactly(first, 1) == b"y"
        wait_until(lambda: group_of(running).waiting)
        with running.connect(HELLO) as third:
            assert read_all(third) == alert(80)
        assert running.ending(1).reason == "queue_full"
        assert read_all(second) == alert(80)
        assert running.ending(2).reason == "queue_timeout"
    assert far.accepted == 1


def test_a_backend_that_hangs_behind_its_connect_does_not_collect_the_clients(several_of, serve):
    hangs, good = serve(lambda sock: sock.recv(1 << 20) and sock.recv(1)), serve(named(b"g"))
    running = several_of([hangs.address, good.address], balance="least")
    with contextlib.ExitStack() as stack:
        stuck = stack.enter_context(running.connect(HELLO))
        wait_until(lambda: hangs.accepted)
        for _ in range(10):
            assert said_by(running) == b"g"
            wait_until(lambda: len(running.router.connections) == 1)
        assert hangs.accepted == 1 and stuck.fileno() > 0


def test_a_limit_that_a_reload_lowers_below_what_is_open_cuts_nobody(several_of, serve, settings_file):
    far = serve(named(b"g"))
    running = several_of([far.address], max_backend_connections=3)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect(HELLO)) for _ in range(3)]
        assert [read_exactly(client, 1) for client in clients] == [b"g"] * 3
        settings_file(table([far.address], max_backend_connections=1, queue="10s"))
        settings = running.router.settings.again(running.router.settings)
        on_loop(running, lambda: running.router.adopt(settings))
        waits = stack.enter_context(running.connect(HELLO))
        wait_until(lambda: group_of(running).waiting)
        for client in clients:
            assert far.accepted == 3
            client.sendall(b"x")
            assert read_exactly(client, 1) == b"x"
            client.close()
        assert read_exactly(waits, 1) == b"g"


def test_the_next_backend_gets_the_same_bytes_where_a_tunnel_gives_no_answer(
        run, settings_file, serve, cloudflared, ports):
    good = serve(named(b"g"))
    cloudflared.far("*", refusing())
    path = settings_file(f'[routes."{NAME}"]\ntarget = ["cloudflared:db.example.com", "{listed(good.address)}"]\n'
                         'balance = "first"\n')
    running = run("-c", path, ports)
    for number in range(1, 4):
        assert said_by(running) == b"g"
        assert "cloudflared:db.example.com: " in running.ending(number).detail
    assert len(cloudflared.clients()) == 3, "it is not asked twice where another one can serve"


def test_a_tunnel_that_ends_without_a_byte_is_tried_once_more_where_no_other_backend_is_left(
        run, settings_file, cloudflared, ports):
    cloudflared.far("*", refusing())
    path = settings_file(f'[routes."{NAME}"]\ntarget = ["{listed(refusing())}", "cloudflared:db.example.com"]\n'
                         'balance = "first"\n')
    running = run("-c", path, ports)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    detail = running.ending().detail
    assert "Connection refused" in detail and "cloudflared:db.example.com: " in detail
    assert running.ending().reason == "backend" and len(cloudflared.clients()) == 2


def test_all_tries_together_have_a_limit(several_of, deaf):
    running = several_of([deaf, refusing(), refusing()], connect_timeout="400ms", connect_budget="200ms",
                         balance="first")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().detail.endswith("no answer in 0.4 s; connect_budget (0.2 s) is over")


def test_tries_limits_how_many(several_of):
    running = several_of([refusing() for _ in range(5)], tries=2)
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().detail.count("Connection refused") == 2


def test_a_thousand_backends_that_refuse_do_not_stop_the_loop(several_of, serve):
    good = serve(named(b"g"))
    place = refusing()
    running = several_of([(f"127.1.{at // 250}.{1 + at % 250}", place[1]) for at in range(1000)] + [good.address],
                         balance="first", connect_budget="1m")
    assert said_by(running) == b"g"


def test_on_down_cut_ends_the_connections_of_a_backend(several_of, serve):
    two = serve(named(b"2"))
    one = serve(lambda sock: named(b"1")(sock) if one.accepted == 1 else read_exactly(sock, len(HELLO)))
    running = several_of([one.address, two.address], balance="first", on_down="cut", health_fail=1)
    with running.connect(HELLO) as held:
        assert read_exactly(held, 1) == b"1"
        assert said_by(running) == b"2"
        assert read_all(held) == b""
    wait_until(lambda: any(ending.reason == "backend_down" for ending in running.endings))


def test_equal_lifetimes_do_not_end_together(several_of, serve):
    far = serve(named(b"g"))
    running = several_of([far.address], max_lifetime="1s")
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        clients = [stack.enter_context(running.connect(HELLO)) for _ in range(40)]
        for client in clients:
            assert read_exactly(client, 1) == b"g"
        wait_until(lambda: len(running.endings) == 40)
    assert {ending.reason for ending in running.endings} == {"lifetime"}
    seconds = [ending.seconds for ending in running.endings]
    assert 0.85 < min(seconds) and max(seconds) < 1.6 and max(seconds) - min(seconds) > 0.08


def test_a_list_may_mix_a_tunnel_and_a_host(run, settings_file, serve, cloudflared, ports):
    good = serve(named(b"g"))
    cloudflared.fault("*", never_listen=True)
    path = settings_file(f'[routes."{NAME}"]\ntarget = ["cloudflared:db.example.com", "{listed(good.address)}"]\n'
                         'balance = "first"\n')
    running = run("-c", path, ports, "--start-timeout=500ms")
    assert said_by(running) == b"g", "the tunnel does not start: the host serves"
    assert "took it" in running.ending().detail


def test_a_tunnel_serves_where_the_host_is_down(run, settings_file, serve, cloudflared, ports):
    far = serve(named(b"t"))
    cloudflared.far("*", far.address)
    path = settings_file(f'[routes."{NAME}"]\ntarget = ["{listed(refusing())}", "cloudflared:db.example.com"]\n')
    running = run("-c", path, ports)
    for _ in range(4):
        assert said_by(running) == b"t"


def test_names_of_a_list_are_resolved_and_one_that_does_not_is_passed_over(run, settings_file, serve):
    good = serve(named(b"g"))
    path = settings_file(f'[routes."{NAME}"]\ntarget = "tcp:does-not-exist.invalid:1,localhost:{good.address[1]}"\n')
    running = run("-c", path)
    for _ in range(4):
        assert said_by(running) == b"g"


def test_a_postgres_backend_without_tls_is_passed_over(several_of, serve):
    plain = serve(lambda sock: (read_exactly(sock, 8), sock.sendall(b"N"), sock.recv(1)))
    def speaks_tls(sock: socket.socket) -> None:
        read_exactly(sock, 8)
        sock.sendall(b"S")
        read_exactly(sock, len(HELLO))
        sock.sendall(b"g")
        sock.recv(1)
    good = serve(speaks_tls)
    running = several_of([plain.address, good.address], balance="first")
    with running.connect(bytes.fromhex("0000000804d2162f")) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_exactly(client, 1) == b"g"


def resolved_to(monkeypatch: pytest.MonkeyPatch, *addresses: Address) -> None:
    """Every name has these addresses."""
    real = socket.getaddrinfo
    def answer(host: str, *words: Any, **more: Any) -> list[tuple]:
        if host != "several.example.net":
            return real(host, *words, **more)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", answer)


def test_the_addresses_of_one_host_are_tried_beside_each_other(run, settings_file, serve, deaf, monkeypatch):
    good, other = serve(named(b"g")), serve(named(b"o"))
    resolved_to(monkeypatch, deaf, good.address)
    path = settings_file(f'[routes."{NAME}"]\ntarget = "tcp:several.example.net:1,{listed(other.address)[4:]}"\n'
                         'balance = "first"\n')
    running = run("-c", path)
    for _ in range(3):
        assert said_by(running) == b"g"
    assert other.accepted == 0
    member, _ = group_of(running).members.values()
    assert member.failures == 0 and member.seconds < 0.2, "of the connect that won"


def test_the_addresses_of_one_host_have_one_connect_timeout(run, settings_file, serve, deaf, monkeypatch):
    other = serve(named(b"o"))
    with deaf_listener() as more:
        resolved_to(monkeypatch, deaf, more)
        path = settings_file(f'[routes."{NAME}"]\ntarget = "tcp:several.example.net:1,{listed(other.address)[4:]}"\n'
                             'balance = "first"\nconnect_timeout = "600ms"\n')
        running = run("-c", path)
        began = time.monotonic()
        assert said_by(running) == b"o"
        assert 0.5 < time.monotonic() - began < 2
        assert not running.router.deadlines.races.extra


def test_backends_that_fail_at_once_leave_a_turn_to_others(several_of, serve):
    good = serve(named(b"g"))
    running = several_of([("255.255.255.255", port) for port in range(1, 30)] + [good.address], balance="first")
    assert said_by(running) == b"g"


def test_names_that_clients_choose_have_groups_of_their_own_and_not_too_many(run, settings_file, serve):
    good = serve(named(b"g"))
    path = settings_file(f'[routes."*.example.com"]\ntarget = ["tcp:{{label}}.invalid:1", "{listed(good.address)}"]\n')
    running = run("-c", path)
    book = running.router.targets.book
    assert not book.groups and said_by(running) == b"g"
    (group,) = book.groups.values()
    assert list(group.members) == ["tcp:db.invalid:1", listed(good.address)]
    assert not list(book.rows()), "no metric"
    wait_until(lambda: not running.router.connections)
    book.full = 1
    with running.connect(genuine(name="other.example.com")) as client:
        client.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            client.recv(1)
    wait_until(lambda: len(book.groups) == 1 and group not in book.groups.values())


def test_a_route_that_a_reload_takes_out_is_forgotten(several_of, serve, settings_file):
    good = serve(named(b"g"))
    running = several_of([refusing(), good.address])
    settings_file('[routes]\n"other.example.com" = "tcp:192.0.2.1:1"\n')
    settings = running.router.settings.again(running.router.settings)
    on_loop(running, lambda: running.router.adopt(settings))
    assert not running.router.targets.book.groups


# -- three real databases ------------------------------------------------------------------------


def test_psql_is_never_refused_while_one_of_three_databases_stops_and_starts(databases, launch, settings_file):
    for balance in ("round-robin", "least", "first"):
        program = launch("-c", settings_file(table([each.address for each in databases], balance=balance,
                                                   health_fail=1, fallback_interval="200ms")))
        loop_of_psql(program, databases[0])
        assert program.log().count(" is down: ") == program.log().count(" is back, after ") == 1
        program.stop()


def loop_of_psql(program: Program, database: Database) -> None:
    """Sessions, one after another, while a database stops and starts again."""
    port, served = str(database.address[1]), set()

    def session() -> str:
        ended = psql(program.address, ["select inet_server_port()"], "sslmode=require")
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.decode().strip()

    wait_until(lambda: session() == port)
    database.stop()
    for _ in range(12):
        assert session() != port
    assert database.start()
    wait_until(lambda: served.add(session()) or " is back, after " in program.log())
    assert port in served


# -- insight -------------------------------------------------------------------------------------


def test_metrics_status_and_explain_tell_of_each_backend(launch, settings_file, serve, admin_path):
    good, bad = serve(named(b"g")), refusing()
    path = settings_file(table([bad, good.address], balance="least", health_fail=1) + '[routes."*.example.org"]\n'
                         f'target = "tcp:{{label}}:1,{{label}}:2"\n')
    program = launch("-c", path, f"--admin=unix:{admin_path}")
    for _ in range(4):
        with program.connect(HELLO) as client:
            assert read_exactly(client, 1) == b"g"
    text = asked(admin_path, "/metrics")
    places = [f'{{route="{NAME}",backend="tcp:{host}:{port}"' for host, port in (bad, good.address)]
    for place, up, failures, connects in zip(places, (0, 1), (1, 0), (0, 4)):
        assert f"sniroute_backend_up{place}}} {up}\n" in text
        assert f"sniroute_backend_failures_total{place}}} {failures}\n" in text
        assert f"sniroute_backend_connect_seconds_count{place}}} {connects}\n" in text
        assert f'sniroute_backend_connect_seconds_bucket{place},le="+Inf"}} {connects}\n' in text
    assert text.count("\nsniroute_backend_up{") == 2, "no label for what a client chooses"
    rows = json.loads(asked(admin_path, "/status"))["backends"]
    assert [(row["state"], row["why"], row["failures"]) for row in rows] == [
        ("down", "Connection refused", 1), ("good", "", 0)]
    said = command("explain", NAME, "-c", path, f"--admin=unix:{admin_path}").stdout
    assert re.search(rf"^backend: tcp:{HOST}:{bad[1]}, down for \d+ s: Connection refused; tried again in \d+ s$", said, re.MULTILINE)
    assert re.search(rf"^backend: tcp:{HOST}:{good.address[1]}, good, \d connections$", said, re.MULTILINE)
    assert f"taken:   tcp:{HOST}:{good.address[1]}, since no other one is as good\n" in said


def asked(path: str, what: str) -> str:
    """The body of an answer of the admin."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(f"GET {what} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        return read_all(sock).decode().partition("\r\n\r\n")[2]


@pytest.mark.parametrize("style", ["json", "text"])
def test_one_line_says_that_a_backend_is_down_and_one_that_it_is_back(style, launch, settings_file, serve, free_ports):
    """However many clients meet it; in either format."""
    address = HOST, free_ports(1)[0]
    place, good = refusing(), serve(named(b"g"))
    path = settings_file(table([place, good.address], health_fail=2, health_pass=1, fallback_interval="200ms"))
    program = launch("-c", path, f"--log-format={style}", f"--listen={HOST}:{address[1]}", listeners=0)
    program.wait_for("listening on ")

    def ask() -> bytes:
        with program.connect(HELLO, address) as client:
            return read_exactly(client, 1)

    for _ in range(20):
        assert ask() == b"g"
    program.wait_for(" is down: ")
    with Server(named(b"b"), place):
        wait_until(lambda: ask() == b"b" and " is back, after " in program.log())
        for _ in range(10):
            assert ask() in (b"g", b"b")
    program.stop()
    lines = [line for line in program.log().split("\n") if "backend tcp:" in line]
    if style == "json":
        lines = [f"{record['time']} {record['level']} {record['message']}" for record in map(json.loads, lines)]
    shown = f"{NAME}: backend tcp:{HOST}:{place[1]}"
    assert len(lines) == 2, lines
    assert lines[0].endswith(f" warning {shown} is down: Connection refused (2 failures in a row; the next try is in 0.2 s)")
    assert re.search(f" info {re.escape(shown)} is back, after \\d+ s$", lines[1])


def test_explain_without_a_router_tells_the_list(settings_file):
    said = command("explain", NAME, "--route", f"{NAME}=tcp:192.0.2.1:1,192.0.2.2:2").stdout
    assert "\nbackend: tcp:192.0.2.1:1\nbackend: tcp:192.0.2.2:2\ntaken:   not known here" in said


def test_check_prints_the_options_that_are_not_the_default(settings_file):
    path = settings_file(table([("192.0.2.1", 1), ("192.0.2.2", 2)], balance="least", queue="1s", warm=2,
                               warm_max_idle="off", warm_jitter=".2"))
    assert command("check", "-c", path).stdout == (
        f"{NAME}=tcp:192.0.2.1:1,192.0.2.2:2 (balance least; queue 1 s; warm 2; warm_max_idle off; warm_jitter 0.2)\n")



def test_a_long_list_is_shortened_for_people(settings_file):
    addresses = [("192.0.2.1", port) for port in range(1, 1001)]
    said = command("check", "-c", settings_file(table(addresses))).stdout
    assert said.endswith("192.0.2.1:8 and 992 more\n") and len(said) < 200


# -- documents -----------------------------------------------------------------------------------


def test_the_options_and_the_examples_of_the_documents_are_the_programs(settings_file):
    text = (HERE / "OPERATING.md").read_text().partition("### Several backends")[2].partition("### Whose domain?")[0]
    table = text.partition("| option | values | default |\n|---|---|---|\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]
    assert sorted(name.strip("`") for name, *_ in rows) == sorted(sniroute_options.SEVERAL_OPTIONS)
    for name, _, default in rows:
        name, words = name.strip("`"), re.findall("`([^`]+)`", default)
        value = sniroute_options.SEVERAL_OPTIONS[name](words[0]) if words else None
        assert value == Several._field_defaults[name], name
    example, zones = (part.partition("```")[0] for part in text.split("```toml\n")[1:])
    settings = sniroute_settings.load_settings(["-c", settings_file(example)], {})
    assert [len(route.members) for route in settings.routes.routes] == [2, 2, 3]
    assert settings.port[0].several.warm == 4
    settings = sniroute_settings.load_settings(["-c", settings_file(zones)], {})
    assert settings.own_zones.own == "a"
