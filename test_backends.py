"""Tests of sniroute_backends.py, and of all that a route with several backends is for its users."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import ssl
import statistics
import struct
import sys
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute_loop
import sniroute_options
import sniroute_settings
import sniroute_warm
from sniroute_balance import slot_of
from sniroute_groups import Group, Several
from sniroute_loop import Queue
from sniroute_refusals import SettingsError
from sniroute_wire import SSL_REQUEST_BYTES
from conftest import HERE, HOST, Address, FakeClock, Server, deaf_listener, linux, wait_until
from testbed.clients import Database, certificate, psql
from testbed.hellos import HELLO, NAME, genuine, v2
from testbed.ports import free_block
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


marks = contextlib.ExitStack()  # of the ports of `refusing`


@pytest.fixture(autouse=True)
def unmarked() -> Iterator[None]:
    yield
    marks.close()


def refusing() -> Address:
    """An address at which nobody listens, of this test alone until it ends."""
    return HOST, marks.enter_context(free_block(1))[0]


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


def hurry(running: Running, seconds: float, *queues: Queue) -> None:
    """Let who waits in these queues of the loop wait for so long from now on."""
    def put() -> None:
        for queue in queues:
            queue.seconds = seconds
            for item in list(queue.due):
                queue.put(item)
    on_loop(running, put)


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


@pytest.mark.parametrize("target, options, said", [
    ('["exec:/bin/cat"]', 'health = "connect"', "health: connect is not for exec:/bin/cat: a check would start the program"),
    ('["unix:/run/x"]', 'health = "http:80/"', "health: http:80/ is not for unix:/run/x: a unix socket has no ports"),
    ('["tcp:{label}:1"]', 'health = "tls"', "health: tls is for targets without fields"),
    ('["tcp:{label}:1"]', "warm = 1", "warm: is for targets without fields"),
    ('["unix:/run/x", "exec:/bin/cat"]', 'health = "connect"', ""), ('["exec:/bin/cat", "tcp:h:1"]', "warm = 1", ""),
    ('["command:/bin/cat {address}", "tcp:h:1"]', 'health = "connect"\nwarm = 2', ""),
], ids=["exec", "unix", "fields, checks", "fields, warm", "beside", "warm program", "the fields of a command"])
def test_what_cannot_be_checked_or_kept_warm_is_told(target, options, said, settings_file):
    path = settings_file(f'[routes."*.a.b"]\ntarget = {target}\n{options}\n')
    with pytest.raises(SettingsError, match=re.escape(said)) if said else contextlib.nullcontext():
        sniroute_settings.load_settings(["-c", path], {})


def test_the_own_listener_in_a_list_stops_the_start():
    with pytest.raises(SettingsError, match="leads back to --listen 127.0.0.1:19000"):
        sniroute_settings.load_settings(
            ["--listen=127.0.0.1:19000", "--route=a.b=tcp:192.0.2.1:443,127.0.0.1:19000"], {})


def test_all_options_that_do_not_fit_a_route_are_said_at_once(settings_file):
    path = settings_file('[routes."*.b.c"]\ntarget = ["tcp:{label}:1", "tcp:{label}:2"]\n'
                         'warm = 1\nreuse = "redis"\nsend_proxy = "v2"\nhealth = "tls"\n')
    with pytest.raises(SettingsError) as raised:
        sniroute_settings.load_settings(["-c", path], {})
    told = str(raised.value).split("\n")
    assert [line.partition('routes."*.b.c": ')[2].partition(":")[0] for line in told] == ["warm", "reuse", "reuse", "health"]


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
    running = several_of([refusing(), deaf, good.address], connect_timeout="100ms")
    for _ in range(300):
        assert said_by(running) == b"g"
    silent = group_of(running).members[f"tcp:{HOST}:{deaf[1]}"]
    assert silent.failures <= 3, "the black hole costs three clients its time-out"
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


def test_a_client_that_is_on_its_way_during_a_reload_finds_the_backend_that_works(
        several_of, serve, settings_file, deaf):
    """Those that have failed it before are not in the list any more: they do not count."""
    good, gone = serve(named(b"g")), [refusing(), refusing()]
    running = several_of([*gone, deaf, good.address], balance="first", connect_timeout="10s")
    patience = group_of(running).patience
    with running.connect(HELLO) as client:
        wait_until(lambda: [member.failures for member in group_of(running).members.values()] == [1, 1, 0, 0])
        settings_file(table([deaf, good.address], balance="first", connect_timeout="300ms"))
        reload(running)
        hurry(running, 0.15, *patience)
        assert read_exactly(client, 1) == b"g"


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
    running = several_of([place, two.address], balance="first", health_fail=1, fallback_interval="1m")
    with running.connect(HELLO) as held:
        assert read_exactly(held, 1) == b"2"
        with Server(named(b"1"), place):
            assert said_by(running) == b"2", "it rests"
            member = group_of(running).members[f"tcp:{HOST}:{place[1]}"]
            on_loop(running, lambda: setattr(member, "until", 0.0))
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
        owner = on_loop(running, lambda: group.balancer.owner(slot_of(address)).target)
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
    running = several_of([far.address], max_backend_connections=1, queue="10s", queue_length=1)
    running.part_early()
    with running.connect(HELLO) as first, running.connect(HELLO) as second:
        assert read_exactly(first, 1) == b"y"
        wait_until(lambda: group_of(running).waiting)
        with running.connect(HELLO) as third:
            assert read_all(third) == alert(80)
        assert running.ending(1).reason == "queue_full"
        hurry(running, 0.3, group_of(running).turns)  # not before: the second has to wait still when the third comes
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
    running = several_of([deaf, refusing(), refusing()], connect_timeout="200ms", connect_budget="100ms",
                         balance="first")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().detail.endswith("no answer in 0.2 s; connect_budget (0.1 s) is over")


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


def test_equal_lifetimes_do_not_end_together(several_of, serve, monkeypatch):
    """The loop's clock is moved by the test: where the host is busy, all of them end late, and together."""
    far, clock = serve(named(b"g")), FakeClock(time.monotonic())
    monkeypatch.setattr(sniroute_loop, "monotonic", clock)
    running = several_of([far.address], max_lifetime="400ms")
    seconds: list[float] = []  # of each, by that clock
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect(HELLO)) for _ in range(40)]
        for client in clients:
            assert read_exactly(client, 1) == b"g"
        began = clock()
        while len(seconds) < 40:
            clock.jump(0.005)
            for _ in range(2):  # the second one comes behind the turn in which they end
                on_loop(running, lambda: None)
            seconds += [clock() - began] * (len(running.endings) - len(seconds))
            assert clock() - began < 0.9
    assert {ending.reason for ending in running.endings} == {"lifetime"}
    assert 0.34 < min(seconds) and max(seconds) < 0.9 and max(seconds) - min(seconds) > 0.03


def test_a_list_may_mix_a_tunnel_and_a_host(run, settings_file, serve, cloudflared, ports):
    good = serve(named(b"g"))
    cloudflared.fault("*", never_listen=True)
    path = settings_file(f'[routes."{NAME}"]\ntarget = ["cloudflared:db.example.com", "{listed(good.address)}"]\n'
                         'balance = "first"\n')
    running = run("-c", path, ports, "--start-timeout=200ms")
    assert said_by(running) == b"g", "the tunnel does not start: the host serves"
    assert "took it" in running.ending().detail


def test_a_tunnel_serves_where_the_host_is_down(run, settings_file, serve, cloudflared, ports):
    far = serve(named(b"t"))
    cloudflared.far("*", far.address)
    path = settings_file(f'[routes."{NAME}"]\ntarget = ["{listed(refusing())}", "cloudflared:db.example.com"]\n')
    running = run("-c", path, ports)
    for _ in range(4):
        assert said_by(running) == b"t"


def none_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no name in `invalid`, which is known at once: a host without a network takes seconds to know of none."""
    genuine_look = socket.getaddrinfo

    def look(host: str, *words: Any, **more: Any) -> Any:
        if str(host).endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return genuine_look(host, *words, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look)


def test_names_of_a_list_are_resolved_and_one_that_does_not_is_passed_over(run, settings_file, serve, monkeypatch):
    good = serve(named(b"g"))
    none_is_invalid(monkeypatch)
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


def test_a_short_connect_timeout_leaves_time_for_another_address(run, settings_file, serve, deaf, monkeypatch):
    good, other = serve(named(b"g")), serve(named(b"o"))
    resolved_to(monkeypatch, deaf, good.address)
    running = run("-c", settings_file(
        f'[routes."{NAME}"]\ntarget = "tcp:several.example.net:1,{listed(other.address)[4:]}"\nbalance = "first"\n'
        'connect_timeout = "200ms"\n'))
    for _ in range(3):
        assert said_by(running) == b"g"
    assert other.accepted == 0


def test_the_addresses_of_one_host_have_one_connect_timeout(run, settings_file, serve, deaf, monkeypatch):
    other = serve(named(b"o"))
    with deaf_listener() as more:
        resolved_to(monkeypatch, deaf, more)
        path = settings_file(f'[routes."{NAME}"]\ntarget = "tcp:several.example.net:1,{listed(other.address)[4:]}"\n'
                             'balance = "first"\nconnect_timeout = "300ms"\n')
        running = run("-c", path)
        began = time.monotonic()
        assert said_by(running) == b"o"
        assert 0.25 < time.monotonic() - began < 2
        assert not running.router.deadlines.races.extra


def test_backends_that_fail_at_once_leave_a_turn_to_others(several_of, serve):
    good = serve(named(b"g"))
    running = several_of([("255.255.255.255", port) for port in range(1, 30)] + [good.address], balance="first")
    assert said_by(running) == b"g"


def test_names_that_clients_choose_have_groups_of_their_own_and_not_too_many(run, settings_file, serve, monkeypatch):
    good = serve(named(b"g"))
    none_is_invalid(monkeypatch)
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


def test_of_long_lists_fewer_are_kept_for_names_that_clients_choose(run, settings_file):
    long = ",".join(f"{{label}}.invalid:{at}" for at in range(1, 1001))
    running = run("-c", settings_file(f'[routes."*.example.com"]\ntarget = "tcp:{long}"\n'))
    book = running.router.targets.book
    for at in range(20):
        on_loop(running, lambda: book.group(running.router.decide(f"x{at}.example.com")))
        assert sum(len(group.members) for group in book.groups.values()) <= 4096


def test_a_route_that_a_reload_takes_out_is_forgotten(several_of, serve, settings_file):
    good = serve(named(b"g"))
    running = several_of([refusing(), good.address])
    settings_file('[routes]\n"other.example.com" = "tcp:192.0.2.1:1"\n')
    settings = running.router.settings.again(running.router.settings)
    on_loop(running, lambda: running.router.adopt(settings))
    assert not running.router.targets.book.groups


# -- one of several hangs, refuses, closes, goes away ----------------------------------------------


@pytest.mark.parametrize("balance", ["round-robin", "least", "random", "latency", "first"])
def test_while_one_of_many_works_all_clients_are_served(several_of, serve, deaf, balance):
    """One hangs, one refuses, one resets, one closes without a byte, one goes away in the middle and comes back."""
    good = serve(named(b"g"))
    resets = serve(lambda sock: (read_exactly(sock, len(HELLO)), reset(sock)))
    closes = serve(lambda sock: read_exactly(sock, len(HELLO)))
    place = refusing()
    running = several_of([deaf, place, refusing(), resets.address, closes.address, good.address], balance=balance,
                         connect_timeout="50ms", fallback_interval="5s")
    heads, count = b"", 90
    with contextlib.ExitStack() as there:
        there.enter_context(Server(named(b"c"), place))
        for number in range(count):
            if number == count // 3:
                there.close()
            elif number == count // 3 * 2:
                there.enter_context(Server(named(b"c"), place))
            heads += said_by(running)
    assert set(heads) <= set(b"gc") and len(heads) == count
    silent = group_of(running).members[f"tcp:{HOST}:{deaf[1]}"]
    assert silent.failures <= 4, "the one that hangs costs few clients its connect_timeout"
    wait_until(lambda: len(running.endings) == count)
    assert {ending.reason for ending in running.endings} <= {"client_closed", "backend_closed"}, "nobody is refused"


def test_a_unix_socket_whose_backlog_is_full_has_connect_timeout(run, settings_file, serve, admin_path):
    good = serve(named(b"g"))
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket(socket.AF_UNIX))
        full.bind(admin_path)
        full.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(admin_path)
        running = run("-c", settings_file(f'[routes."{NAME}"]\nbalance = "first"\nconnect_timeout = "200ms"\n'
                                          f'target = ["unix:{admin_path}", "{listed(good.address)}"]\n'))
        assert said_by(running) == b"g"
        assert running.ending().detail.startswith(f"unix:{admin_path}: its backlog was full for 0.2 s; ")
        assert 0.2 <= running.ending().seconds < 2


# -- lists of all kinds ----------------------------------------------------------------------------

LISTENS = """
import socket, sys, threading
host, port = sys.argv[1].split(":")
listener = socket.create_server((host, int(port)))
while True:
    client = listener.accept()[0]
    client.recv(10000)
    client.sendall(b"p")
    client.close()
"""


@pytest.fixture
def unix_server(admin_path) -> Any:
    """The path of a unix socket whose far end says `u`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(admin_path)
        listener.listen(10)

        def accept() -> None:
            while True:
                client, _ = listener.accept()
                with client:
                    if not client.recv(10000):
                        return
                    client.sendall(b"u")
        thread = threading.Thread(target=accept, name="far-unix")
        thread.start()
        yield admin_path
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(admin_path)
            last.shutdown(socket.SHUT_WR)
            thread.join()


def test_a_list_of_all_kinds_serves_and_each_takes_over_for_the_one_before(
        run, settings_file, serve, cloudflared, ports, unix_server, tmp_path):
    tcp, far = serve(named(b"t")), serve(named(b"c"))
    (tmp_path / "listens.py").write_text(LISTENS)
    (tmp_path / "fails.py").write_text("import sys; sys.exit(3)")
    python, command_of = sys.executable, f"command:{sys.executable} -S {tmp_path}/listens.py {{address}}"
    good = [listed(tcp.address), f"unix:{unix_server}", "exec:/bin/cat", command_of, "cloudflared:good.example.com"]
    bad = [listed(refusing()), f"unix:{tmp_path}/none", f"exec:{python} -S {tmp_path}/fails.py",
           f"command:{python} -S {tmp_path}/fails.py {{address}}", "cloudflared:bad.example.com"]
    heads = [b"t", b"u", HELLO[:1], b"p", b"c"]
    cloudflared.far("good.example.com", far.address)
    cloudflared.fault("bad.example.com", exit=1, words="no such host")
    def text(targets: list[str]) -> str:
        return f'[routes."{NAME}"]\ntarget = {json.dumps(targets)}\nbalance = "first"\n'
    running = run("-c", settings_file(text(good)), ports, "--start-timeout=5s")
    for at, head in enumerate(heads):
        settings_file(text(good[at:] + good[:at]))
        reload(running)
        assert said_by(running) == head, good[at]
    settings_file(text([*bad, good[0]]))
    reload(running)
    running.ending(len(heads))
    assert said_by(running) == b"t"
    detail = running.ending(len(heads) + 1).detail
    assert all(target.removeprefix("tcp:").split(" ")[0] in detail for target in bad), detail
    assert [member.failures for member in group_of(running).members.values()] == [1] * len(bad) + [0]


def reload(running: Running) -> None:
    """As SIGHUP does."""
    settings = running.router.settings.again(running.router.settings)
    opened = running.router.ports.open(settings.port)
    on_loop(running, lambda: running.router.adopt(settings, opened))


ALL_OPTIONS = {
    "balance": "least", "health": "connect", "health_interval": "1s", "health_timeout": "1s", "health_fail": 2,
    "health_pass": 1, "fallback_interval": "1s", "slow_start": "1s", "on_down": "cut", "connect_timeout": "1s",
    "tries": 2, "connect_budget": "3s", "max_backend_connections": 5, "queue": "1s", "queue_length": 5,
    "max_lifetime": "1m", "warm": 2, "warm_max_idle": "30s", "warm_max_age": "1m", "warm_jitter": "0.2",
    "warm_order": "fifo", "allow": "127.0.0.0/8", "max_connections": 10, "connection_idle": "1m", "send_proxy": "none",
    "resolve_interval": "10s",
}
REUSE = [name for name in sniroute_options.SEVERAL_OPTIONS if name.startswith("reuse")]  # test_reuse.py


@pytest.fixture
def port(free_ports) -> int:
    """A port with one target may listen there."""
    return free_ports(1)[0]


def a_port(port: int, *targets: str, **options: Any) -> str:
    """Settings with a port that leads to these targets."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    return "\n".join([f'[ports."{HOST}:{port}"]', f"target = {json.dumps(targets)}", *lines, ""])


def test_a_port_may_lead_to_a_list_with_all_options(run, settings_file, echo_server, port):
    assert set(ALL_OPTIONS) >= {*sniroute_options.SEVERAL_OPTIONS} - {*REUSE}
    options = {**ALL_OPTIONS, "warm_jitter": 0.2, "allow": ["127.0.0.0/8"]}
    running = run("-c", settings_file(a_port(port, listed(refusing()), listed(echo_server.address), **options)),
                  "--route", f"{NAME}=tcp:192.0.2.1:1")
    for _ in range(3):
        with socket.create_connection((HOST, port), 20) as client:
            client.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"
    reload(running)
    with socket.create_connection((HOST, port), 20) as client:
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"





def test_a_field_leads_each_name_to_its_own_list(run, settings_file, serve, unix_server):
    good = serve(named(b"g"))
    folder, _, name = unix_server.rpartition("/")
    path = settings_file(f'[routes."*.example.com"]\ntarget = ["unix:{folder}/{{label}}", "{listed(good.address)}"]\n'
                         'balance = "first"\n')
    running = run("-c", path)
    wanted = ((name, b"u", "unix"), ("db", b"g", "tcp"), (name, b"u", "unix"))
    for number, (label, head, scheme) in enumerate(wanted, 1):
        with running.connect(HELLO if label == "db" else genuine(name=f"{label}.example.com")) as client:
            assert read_exactly(client, 1) == head
        assert running.ending(number).backend.partition(":")[0] == scheme


# -- warm connections ------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Pools that dial again soon."""
    monkeypatch.setattr(sniroute_warm, "PAUSES", (0.05,))
    monkeypatch.setattr(sniroute_warm, "PROVEN_AFTER", 0.001)


def idle(running: Running) -> int:
    """How many warm connections are ready."""
    return sum(len(member.pool.idle) for member in group_of(running).members.values())


def pool_of(running: Running) -> Any:
    """The warm connections of the first backend."""
    return next(iter(group_of(running).members.values())).pool


def test_a_client_gets_a_connection_that_was_made_before_it_came(several_of, serve, flow):
    far = serve(named(b"g"))
    running = several_of([far.address], warm=2)
    for number in range(1, 6):
        wait_until(lambda: idle(running) == 2 and far.accepted == number + 1)
        with running.connect(HELLO) as client:
            assert read_exactly(client, 1) == b"g"
            client.sendall(b"more")
            assert read_exactly(client, 4) == b"more"
        ending = running.ending(number)
        assert (ending.up, ending.down, ending.reason) == (len(HELLO) + 4, 5, "client_closed")
    assert (pool_of(running).hit, pool_of(running).miss, pool_of(running).dead) == (5, 0, 0)


def test_a_postgres_client_gets_one_too(several_of, serve):
    def speaks_tls(sock: socket.socket) -> None:
        if read_exactly(sock, 8) == SSL_REQUEST_BYTES:
            sock.sendall(b"S")
            named(b"g")(sock)
    far = serve(speaks_tls)
    running = several_of([far.address], warm=1)
    wait_until(lambda: idle(running) == 1)
    with running.connect(SSL_REQUEST_BYTES) as client:
        assert read_exactly(client, 1) == b"S"
        client.sendall(HELLO)
        assert read_exactly(client, 1) == b"g"
    assert pool_of(running).hit == 1


def test_behind_a_port_the_greeting_comes_first_and_once(run, settings_file, serve, port):
    def greets(sock: socket.socket) -> None:
        sock.sendall(b"220 hello\r\n")
        while data := sock.recv(100):
            sock.sendall(data)
    far = serve(greets)
    running = run("-c", settings_file(a_port(port, listed(far.address), warm=2)), "--route", f"{NAME}=tcp:192.0.2.1:1")
    for number in range(1, 6):
        wait_until(lambda: idle(running) == 2 and all(warm.greeting for warm in list(pool_of(running).idle)))
        with socket.create_connection((HOST, port), 20) as client:
            assert read_exactly(client, 11) == b"220 hello\r\n"
            client.sendall(b"EHLO")
            assert read_exactly(client, 4) == b"EHLO"
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b""
        assert running.ending(number).down == 15
    assert pool_of(running).hit == 5


@pytest.mark.parametrize("way", ["a name", "a port"])
def test_the_proxy_header_is_sent_when_the_client_comes(run, settings_file, serve, port, way):
    heard: list[bytes] = []
    def handler(sock: socket.socket) -> None:
        heard.append(sock.recv(28, socket.MSG_WAITALL))
        sock.sendall(b"g")
        sock.recv(10000)
    far = serve(handler)
    text = table([far.address], warm=1, send_proxy="v2") if way == "a name" else \
        a_port(port, listed(far.address), warm=1, send_proxy="v2")
    running = run("-c", settings_file(text), *(["--route", f"{NAME}=tcp:192.0.2.1:1"] if way == "a port" else []))
    wait_until(lambda: idle(running) == 1)
    assert not heard
    with socket.create_connection(running.address if way == "a name" else (HOST, port), 20) as client:
        client.sendall(HELLO)
        assert read_exactly(client, 1) == b"g"
        source, destination = client.getsockname(), client.getpeername()
    assert heard == [v2(0x21, 0x11, socket.inet_aton(HOST) * 2 + struct.pack("!HH", source[1], destination[1]))]
    assert pool_of(running).hit == 1


class EndsTheFirst:
    """A handler that ends the first connection behind the client's first bytes, and serves all others."""

    def __init__(self, how: str, asks: bytes = HELLO):
        self.how = how
        self.asks = asks
        self.count = 0

    def __call__(self, sock: socket.socket) -> None:
        self.count += 1
        if self.count > 1:
            if self.asks is not HELLO:
                read_exactly(sock, len(self.asks))
                sock.sendall(b"S")
            named(b"g")(sock)
        elif read_exactly(sock, len(self.asks)) and self.how == "reset":
            reset(sock)


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("asks", [HELLO, bytes.fromhex("0000000804d2162f")], ids=["TLS", "PostgreSQL"])
def test_a_warm_connection_whose_end_is_under_way_costs_the_client_nothing(several_of, serve, how, asks, flow):
    far = serve(EndsTheFirst(how, asks))
    running = several_of([far.address, refusing()], warm=1, balance="first")
    wait_until(lambda: idle(running) == 1)
    with running.connect(asks) as client:
        if asks is not HELLO:
            assert read_exactly(client, 1) == b"S"
            client.sendall(HELLO)
        assert read_exactly(client, 1) == b"g"
        client.sendall(b"more")
        assert read_exactly(client, 4) == b"more"
    member = next(iter(group_of(running).members.values()))
    assert (member.failures, member.fails, member.why) == (0, 0, ""), "it is no failure of the backend"
    assert running.ending().down == 5 and running.ending().up == len(HELLO) + 4


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("way", ["a name", "a port"])
def test_a_warm_connection_that_has_just_ended_costs_the_client_nothing(
        run, settings_file, serve, port, monkeypatch, how, way):
    """Its end has come, and the loop was not told yet."""
    monkeypatch.setattr(sniroute_warm.Warm, "on_news", lambda self, mask: None)
    ends, ended = threading.Event(), threading.Event()
    def handler(sock: socket.socket) -> None:
        if far.accepted > 1:
            named(b"g")(sock)
            return
        ends.wait(10)
        reset(sock) if how == "reset" else sock.close()
        ended.set()
    far = serve(handler)
    text = table([far.address], warm=1) if way == "a name" else a_port(port, listed(far.address), warm=1)
    running = run("-c", settings_file(text), *(["--route", f"{NAME}=tcp:192.0.2.1:1"] if way == "a port" else []))
    wait_until(lambda: idle(running) == 1)
    ends.set()
    assert ended.wait(10)
    with socket.create_connection(running.address if way == "a name" else (HOST, port), 20) as client:
        client.sendall(HELLO)
        assert read_exactly(client, 1) == b"g"
    assert (pool_of(running).hit, pool_of(running).dead) == (0, 1)
    assert next(iter(group_of(running).members.values())).failures == 0


@pytest.mark.parametrize("when", ["before", "together", "behind"])
@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("header", ["as-received", "v1"])
def test_a_silent_client_of_a_port_does_not_notice_that_its_warm_connection_ends(
        run, settings_file, serve, port, when, how, header):
    ends, ended = threading.Event(), threading.Event()
    def handler(sock: socket.socket) -> None:
        if far.accepted > 1:
            while header == "v1" and (byte := sock.recv(1)) and byte != b"\n":
                pass
            while data := sock.recv(100):
                sock.sendall(data)
            return
        ends.wait(10)
        reset(sock) if how == "reset" else sock.close()
        ended.set()
    far = serve(handler)
    running = run("-c", settings_file(a_port(port, listed(far.address), warm=1, send_proxy=header)),
                  "--route", f"{NAME}=tcp:192.0.2.1:1")
    wait_until(lambda: idle(running) == 1)
    with socket.create_connection((HOST, port), 20) as client:
        wait_until(lambda: pool_of(running).hit == 1)
        wait_until(lambda: far.accepted == 2, what="the next one is dialled at once, however silent all are")
        if when == "before":
            ends.set()
            wait_until(lambda: running.counter("retries") == 1)
            client.sendall(b"hello")
        elif when == "together":
            on_loop(running, lambda: (ends.set(), ended.wait(10), client.sendall(b"hello")))
        else:
            on_loop(running, lambda: (client.sendall(b"hello"), ends.set(), ended.wait(10)))
        assert read_exactly(client, 5) == b"hello"
    assert running.counter("retries") == 1


def test_200_clients_in_a_row_do_not_notice_that_a_backend_ends_idle_connections(several_of, serve, hasty):
    """It ends each after 5 to 50 ms: so a hundred ends fall in the time of this test, some while a client comes.

    One that was dialled for a client is not idle: it does not end where a busy host lets its hello come late.
    """
    dice = random.Random(3)
    pools: list[Any] = []
    def is_idle(place: Address) -> bool:
        with contextlib.suppress(OSError, AttributeError):  # one is closed meanwhile
            return any(warm.sock.getsockname() == place for pool in pools for warm in list(pool.idle))
        return False
    def impatient(sock: socket.socket) -> None:
        sock.settimeout(dice.uniform(0.005, 0.05))
        place = sock.getpeername()
        while True:
            with contextlib.suppress(TimeoutError):
                sock.recv(1, socket.MSG_PEEK)
                break
            if is_idle(place):
                return
        sock.settimeout(20)
        named(b"g")(sock)
    far = serve(impatient)
    running = several_of([far.address], warm=10)
    pools.append(pool_of(running))
    for _ in range(200):
        with running.connect(HELLO) as client:
            assert read_exactly(client, 1) == b"g"
            client.sendall(b"x")
            assert read_exactly(client, 1) == b"x"
    pool = pool_of(running)
    member = next(iter(group_of(running).members.values()))
    assert pool.hit > 100 and member.failures == 0 and far.accepted > 220
    wait_until(lambda: len(running.endings) == 200)
    assert {ending.reason for ending in running.endings} == {"client_closed"}


def test_what_a_backend_needs_until_it_serves_is_over_when_the_client_comes(several_of, serve):
    """A stand-in for a connect that takes 50 ms, as to another continent: here it is the backend's accept that does."""
    ready: list[int] = []
    def slow(sock: socket.socket) -> None:
        threading.Event().wait(0.05)
        ready.append(1)
        named(b"g")(sock)
    far = serve(slow)
    medians = []
    for warm in (0, 8):
        running = several_of([far.address], warm=warm, max_lifetime="1h")
        times = []
        for number in range(3):
            if warm:
                wait_until(lambda: idle(running) == warm and len(ready) == 3 + warm + number, what="all are accepted")
            began = time.monotonic()
            assert said_by(running) == b"g"
            times.append(time.monotonic() - began)
        medians.append(statistics.median(times))
    assert medians[1] < 0.05 <= medians[0]


@pytest.mark.parametrize("asks", [HELLO, bytes.fromhex("0000000804d2162f")], ids=["TLS", "PostgreSQL"])
def test_a_backend_that_hangs_behind_a_warm_connection_is_not_asked_twice(several_of, serve, asks):
    """It would cost the client the time-out twice."""
    asked = threading.Event()
    def hangs(sock: socket.socket) -> bytes:
        data = sock.recv(10000)
        asked.set()
        sock.recv(1)
        return data
    far, good = serve(hangs), serve(EndsTheFirst("end", asks))
    good.handler.count = 1
    running = several_of([far.address, good.address], warm=1, balance="first", connect_timeout="150ms")
    running.router.deadlines.first_byte.seconds = 0.15
    wait_until(lambda: idle(running) == 1)
    def be_patient() -> None:
        """With the next one, which answers: it may be late where the host is busy."""
        running.router.deadlines.first_byte.seconds = group_of(running).patience[1].seconds = 20.0
    with running.connect(asks) as client:
        if asks is not HELLO:
            assert read_exactly(client, 1) == b"S"
            client.sendall(HELLO)
        assert asked.wait(10)
        on_loop(running, be_patient)
        assert read_exactly(client, 1) == b"g"
    assert far.result() == asks and far.results.empty(), "one connection was asked"
    member = next(iter(group_of(running).members.values()))
    assert member.failures == 1
    assert running.ending().seconds < 1.5


def test_warm_connections_and_clients_together_keep_the_limit_of_a_backend(several_of, serve):
    far = serve(named(b"g"))
    running = several_of([far.address], warm=2, max_backend_connections=3, queue="10s")
    def numbers() -> tuple[int, int]:
        (member,) = group_of(running).members.values()
        return member.active, len(member.pool.idle) + len(member.pool.dialling)
    wait_until(lambda: idle(running) == 2)
    for _ in range(5):
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(running.connect(HELLO)) for _ in range(3)]
            assert [read_exactly(client, 1) for client in clients] == [b"g"] * 3
            waiting = stack.enter_context(running.connect(HELLO))
            wait_until(lambda: group_of(running).waiting)
            assert on_loop(running, numbers) == (3, 0)
            clients[0].close()
            assert read_exactly(waiting, 1) == b"g"
            assert on_loop(running, numbers) == (3, 0)
            clients[1].close()
            wait_until(lambda: on_loop(running, numbers) == (2, 1))
        wait_until(lambda: idle(running) == 2)


def test_a_client_that_is_sent_again_keeps_the_limit_of_a_backend(several_of, serve):
    """Who waits for room gets it where its warm connection ends; then it waits itself."""
    go, first = threading.Event(), EndsTheFirst("end")
    far = serve(lambda sock: (first(sock), go.wait(10)) if first.count == 0 else first(sock))
    running = several_of([far.address], warm=1, max_backend_connections=1, queue="10s")
    group = group_of(running)
    (member,) = group.members.values()
    wait_until(lambda: idle(running) == 1)
    with running.connect(HELLO) as client:
        wait_until(lambda: member.active == 1)
        with running.connect(HELLO) as waiting:
            wait_until(lambda: group.waiting)
            go.set()
            assert read_exactly(waiting, 1) == b"g"
            assert member.active == 1 and len(group.waiting) == 1
        assert read_exactly(client, 1) == b"g"


def test_a_backend_that_goes_loses_its_warm_connections_and_has_them_again_when_it_is_back(
        several_of, serve, hasty):
    good, place = serve(named(b"g")), refusing()
    with Server(named(b"b"), place):
        running = several_of([place, good.address], warm=4, health_fail=1, health_pass=1, fallback_interval="200ms")
        wait_until(lambda: idle(running) == 4)
    bad = next(iter(group_of(running).members.values()))
    wait_until(lambda: bad.why and good.accepted == 4, what="all are with the other one: no client has come yet")
    for _ in range(10):
        assert said_by(running) == b"g"
    with Server(named(b"b"), place):
        wait_until(lambda: said_by(running) in b"gb" and not bad.why)
        wait_until(lambda: len(bad.pool.idle) == 2)


def test_warm_connections_to_an_address_that_a_name_no_longer_has_are_closed(
        run, settings_file, serve, monkeypatch, hasty):
    old = serve(named(b"o"), ("127.0.1.1", 0))
    new = serve(named(b"n"), ("127.0.1.2", old.address[1]))
    resolved_to(monkeypatch, old.address)
    running = run("-c", settings_file(f'[routes."{NAME}"]\ntarget = "tcp:several.example.net:{old.address[1]}"\n'
                                      'warm = 2\nresolve_interval = "100ms"\n'))
    wait_until(lambda: idle(running) == 2 and len(old.live) == 2)
    resolved_to(monkeypatch, new.address)
    wait_until(lambda: said_by(running) == b"n")
    wait_until(lambda: not old.live and idle(running) == 2)
    assert said_by(running) == b"n"


def test_a_router_that_drains_lets_its_warm_connections_go(several_of, serve):
    far = serve(named(b"g"))
    running = several_of([far.address], warm=3, health="connect", health_interval="50ms")
    wait_until(lambda: idle(running) == 3)
    with running.connect(HELLO) as client:
        assert read_exactly(client, 1) == b"g"
        wait_until(lambda: idle(running) == 3)
        running.router.drain(30)
        wait_until(lambda: len(far.live) == 1, what="only the client's is left")
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
    wait_until(lambda: not running.thread.is_alive())


def test_a_reload_ends_the_warm_connections_of_a_route_that_is_gone(several_of, serve, settings_file):
    far = serve(named(b"g"))
    running = several_of([far.address], warm=3)
    wait_until(lambda: idle(running) == 3)
    with running.connect(HELLO) as client:
        assert read_exactly(client, 1) == b"g"
        wait_until(lambda: idle(running) == 3)
        settings_file('[routes]\n"other.example.com" = "tcp:192.0.2.1:1"\n')
        reload(running)
        wait_until(lambda: len(far.live) == 1)
        client.sendall(b"x")
        assert read_exactly(client, 1) == b"x", "its own goes on"


def test_a_warm_connection_through_a_tunnel(run, settings_file, serve, cloudflared, ports, hasty):
    far = serve(named(b"t"))
    cloudflared.far("*", far.address)
    running = run("-c", settings_file(f'[routes."{NAME}"]\ntarget = "cloudflared:db.example.com"\nwarm = 2\n'), ports)
    wait_until(lambda: idle(running) == 2 and far.accepted == 2, what="the tunnel is started for that")
    for _ in range(3):
        wait_until(lambda: idle(running) == 2)
        assert said_by(running) == b"t"
    assert pool_of(running).hit == 3


# -- active checks ---------------------------------------------------------------------------------


class Patient:
    """A far end behind a port: it answers `who` with its letter, and checks in the words of each protocol.

    While it is `sick` it ends each connection without an answer.
    """

    def __init__(self, letter: bytes, context: ssl.SSLContext | None = None):
        self.letter = letter
        self.context = context
        self.sick = False

    def __call__(self, sock: socket.socket) -> None:
        head = sock.recv(4, socket.MSG_PEEK)
        if self.sick or not head:
            return
        if head[0] == 0x16:
            sock.settimeout(5)
            with self.context.wrap_socket(sock, server_side=True) as tls:
                tls.unwrap()
            return
        said = sock.recv(1000)
        if head == b"who\n":
            sock.sendall(self.letter)
        elif said == SSL_REQUEST_BYTES:
            sock.sendall(b"N")
        elif said.endswith(b"PING\r\n"):
            sock.sendall(b"+PONG\r\n")
        elif said.startswith(b"GET /primary HTTP/1.1\r\n"):
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        sock.recv(1)


@pytest.mark.parametrize("health", ["connect", "tls", "postgres", "redis", "http"])
def test_a_backend_that_fails_its_checks_goes_down_without_a_client_and_comes_back(
        run, settings_file, serve, certificate, port, health):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    sick, fine = Patient(b"s", context), Patient(b"f", context)
    place = refusing()
    with contextlib.ExitStack() as there:
        there.enter_context(Server(sick, place))
        other = ("127.0.0.2", place[1]) if health == "http" else (HOST, 0)
        good = serve(fine, other)
        said = f"http:{place[1]}/primary" if health == "http" else health
        running = run("-c", settings_file(a_port(port, listed(place), listed(good.address), health=said,
                                                 health_interval="50ms", health_timeout="5s", health_fail=2)),
                      "--route", f"{NAME}=tcp:192.0.2.1:1")

        def who() -> bytes:
            with socket.create_connection((HOST, port), 20) as client:
                client.sendall(b"who\n")
                return read_exactly(client, 1)

        bad, other = group_of(running).members.values()
        wait_until(lambda: bad.is_proven and other.is_proven)
        assert {who() for _ in range(4)} == {b"s", b"f"}
        ends = len(running.endings)
        if health == "connect":
            there.close()
        sick.sick = True
        wait_until(lambda: bad.why)
        assert len(running.endings) in (ends, 4) and not other.why
        assert [who() for _ in range(4)] == [b"f"] * 4
        sick.sick = False
        if health == "connect":
            there.enter_context(Server(sick, place))
        wait_until(lambda: not bad.why)
        assert {who() for _ in range(4)} == {b"s", b"f"}
        assert bad.checks_bad >= 2 and not other.checks_bad


def test_a_check_of_another_port_never_reaches_the_router_itself(run, settings_file, serve, free_ports):
    far, own = serve(named(b"g")), free_ports(1)[0]
    running = run("-c", settings_file(table([far.address], health=f"http:{own}/", health_interval="50ms")),
                  "--port", f"{HOST}:{own}=tcp:{HOST}:{far.address[1]}")
    member = next(iter(group_of(running).members.values()))
    wait_until(lambda: member.why)
    assert "this router's own" in member.why and not running.counter("accepted") and not far.accepted


def test_a_tunnel_beside_hosts_is_not_started_for_a_check(run, settings_file, serve, cloudflared, ports):
    far = serve(named(b"g"))
    targets = json.dumps([listed(far.address), "cloudflared:db.example.com"])
    running = run("-c", settings_file(f'[routes."{NAME}"]\ntarget = {targets}\n'
                                      'health = "connect"\nhealth_interval = "20ms"\nbalance = "first"\n'), ports)
    wait_until(lambda: next(iter(group_of(running).members.values())).checks_good >= 5)
    assert said_by(running) == b"g" and not cloudflared.starts()


# -- zones -----------------------------------------------------------------------------------------


def test_clients_are_led_to_the_own_zone_while_one_of_it_works(run, settings_file, serve):
    far, place = serve(named(b"f"), ("127.0.2.1", 0)), ("127.0.1.1", refusing()[1])
    text = ('zone = "a"\n[zones]\na = ["127.0.1.0/24"]\nb = ["127.0.2.0/24"]\n'
            + table([far.address, place], health_fail=1, health_pass=1, fallback_interval="100ms"))
    with Server(named(b"n"), place):
        running = run("-c", settings_file(text))
        assert {said_by(running) for _ in range(6)} == {b"n"}
    assert {said_by(running) for _ in range(6)} == {b"f"}, "its only backend has died"
    with Server(named(b"n"), place):
        wait_until(lambda: said_by(running) == b"n")
        assert {said_by(running) for _ in range(6)} == {b"n"}, "and has come back"
        settings_file(text.replace('zone = "a"', 'zone = "b"'))
        reload(running)
        assert {said_by(running) for _ in range(6)} == {b"f"}, "a reload may move the router"


@pytest.mark.parametrize("own, wanted", [("127.0.1.77", b"n"), ("127.0.2.77", b"f"), ("127.0.3.77", b"nf")])
def test_the_zone_of_the_own_address_counts(run, settings_file, serve, own, wanted):
    near, far = serve(named(b"n"), ("127.0.1.1", 0)), serve(named(b"f"), ("127.0.2.1", 0))
    running = run("-c", settings_file(f'own_address = "{own}"\n[zones]\na = ["127.0.1.0/24"]\nb = ["127.0.2.0/24"]\n'
                                      + table([near.address, far.address])))
    assert {said_by(running) for _ in range(6)} == {bytes([each]) for each in wanted}


def test_of_one_host_the_addresses_of_the_own_zone_are_used(run, settings_file, serve, monkeypatch):
    near = serve(named(b"n"), ("127.0.1.1", 0))
    far = serve(named(b"f"), ("127.0.2.1", near.address[1]))
    resolved_to(monkeypatch, far.address, near.address)
    running = run("-c", settings_file('zone = "a"\n[zones]\na = ["127.0.1.0/24"]\n'
                                      f'[routes."{NAME}"]\ntarget = ["tcp:several.example.net:{near.address[1]}"]\n'
                                      'max_lifetime = "1h"\n'))
    assert [said_by(running) for _ in range(6)] == [b"n"] * 6


# -- an operator -----------------------------------------------------------------------------------


def test_a_drained_backend_gets_no_new_client_and_keeps_those_that_it_has(several_of, serve):
    one, two = serve(named(b"1")), serve(named(b"2"))
    running = several_of([one.address, two.address], warm=2, balance="first")
    book = running.router.targets.book
    address = listed(one.address)[4:]
    with running.connect(HELLO) as client:
        assert read_exactly(client, 1) == b"1"
        assert on_loop(running, lambda: [book.drain(NAME, address, True)]) == [listed(one.address)]
        assert [said_by(running) for _ in range(3)] == [b"2"] * 3
        reload(running)
        assert [said_by(running) for _ in range(3)] == [b"2"] * 3
        client.sendall(b"still")
        assert read_exactly(client, 5) == b"still"
        wait_until(lambda: len(one.live) == 1, what="its warm connections have ended")
    on_loop(running, lambda: [book.drain(NAME, listed(two.address), True)])
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    wait_until(lambda: any("an operator has drained all its backends" in (ending.detail or "") for ending in
                           list(running.endings)))
    on_loop(running, lambda: [book.drain(NAME, address, False)])
    assert said_by(running) == b"1"


# -- three real databases ------------------------------------------------------------------------


def test_psql_is_never_refused_while_one_of_three_databases_stops_and_starts(databases, launch, settings_file):
    for options in ({}, {"warm": 6},
                    {"balance": "first", "warm": 2, "health": "postgres", "health_interval": "200ms"}):
        program = launch("-c", settings_file(table([each.address for each in databases], **options,
                                                   health_fail=1, fallback_interval="200ms")))
        loop_of_psql(program, databases[0])
        assert program.log().count(" is down: ") == program.log().count(" is back, after ") == 1
        program.stop()


def loop_of_psql(program: Program, database: Database) -> None:
    """Sessions, one after another, while a database stops and starts again."""
    port = str(database.address[1])

    def session() -> str:
        ended = psql(program.address, ["select inet_server_port()"], "sslmode=require")
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.decode().strip()

    wait_until(lambda: session() == port)
    database.stop()
    for _ in range(6):
        assert session() != port
    assert database.start()
    wait_until(lambda: session() and " is back, after " in program.log())
    wait_until(lambda: session() == port)


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
    example, warm, zones = (part.partition("```")[0] for part in text.split("```toml\n")[1:])
    settings = sniroute_settings.load_settings(["-c", settings_file(example)], {})
    assert [len(route.members) for route in settings.routes.routes] == [2, 2, 3]
    assert settings.port[0].several.warm == 4
    assert sniroute_settings.load_settings(["-c", settings_file(warm)], {}).routes.routes[0].several.warm == 4
    settings = sniroute_settings.load_settings(["-c", settings_file(zones)], {})
    assert settings.own_zones.own == "a"


# -- strangers -------------------------------------------------------------------------------------


def kept_by(running: Running) -> list[str]:
    """Of each backend why it is down; "" where it is good."""
    return [member.why for member in group_of(running).members.values()]


@pytest.mark.parametrize("answer", [b"", b"\x15\x03\x01\x00\x02\x02\x0a", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"N"],
                         ids=["an end", "an alert", "HTTP", "N"])
def test_who_asks_for_postgres_where_there_is_none_makes_no_backend_rest(several_of, serve, answer):
    def web(sock: socket.socket) -> None:
        head = read_exactly(sock, 8)
        if head == SSL_REQUEST_BYTES:
            sock.sendall(answer)
        elif head:
            read_exactly(sock, len(HELLO) - 8)
            sock.sendall(b"w")
            sock.recv(1)
    one, two = serve(web), serve(web)
    running = several_of([one.address, two.address], on_down="cut")
    running.part_early()
    with running.connect(HELLO) as client:
        assert read_exactly(client, 1) == b"w"
        for _ in range(5):
            with running.connect(SSL_REQUEST_BYTES) as stranger:
                assert read_exactly(stranger, 1) == b"S"
                stranger.sendall(HELLO)
                read_all(stranger)
        assert kept_by(running) == ["", ""]
        assert running.router.connections, "and cuts nobody's connection"


def test_a_client_that_no_other_backend_answered_to_does_not_prolong_the_rest(several_of, serve):
    """A stranger, who may be there again and again, is led to the one that has rested."""
    def handler(sock: socket.socket) -> None:
        if read_exactly(sock, len(HELLO)) == HELLO:
            sock.sendall(b"g")
            sock.recv(1)
    one, two = serve(handler), serve(handler)
    running = several_of([one.address, two.address], health_fail=1, health_pass=1, fallback_interval="1s")
    group = group_of(running)
    member = next(iter(group.members.values()))
    on_loop(running, lambda: (group.bad_news(member, "it was", False), setattr(member, "until", 0.0)))
    with running.connect(genuine(name=NAME)) as stranger:
        read_all(stranger)
    assert one.accepted, "the stranger is led there"
    assert said_by(running) == b"g" and not member.why


@pytest.mark.parametrize("times", [1, 2])
def test_what_a_client_of_a_port_has_said_is_given_to_one_program_only(run, settings_file, port, tmp_path, times):
    log = tmp_path / "done"
    log.touch()
    (tmp_path / "does.py").write_text(
        "import os, sys\nsaid = os.read(0, 100)\nopen(sys.argv[1], 'a').write(said.decode())\n")
    program = f"exec:{sys.executable} -S {tmp_path}/does.py {log}"
    running = run("-c", settings_file(a_port(port, program, program + "".join(" more" for _ in range(times)))),
                  "--route", f"{NAME}=tcp:192.0.2.1:1")
    with on_loop(running, lambda: connected_with((HOST, port), b"once\n")) as client:
        assert read_all(client) == b""
    running.ending()
    assert log.read_text() == "once\n"


def connected_with(address: Address, said: bytes) -> socket.socket:
    """A client whose first bytes are there when it is accepted: to be called in the loop's thread."""
    client = socket.create_connection(address, 20)
    client.sendall(said)
    return client


def test_who_waits_for_room_is_dialled_at_once_when_another_one_fails(run, settings_file, port):
    running = run("-c", settings_file(a_port(port, listed(refusing()), max_backend_connections=1)),
                  "--route", f"{NAME}=tcp:192.0.2.1:1")
    began = time.monotonic()
    clients = on_loop(running, lambda: [connected_with((HOST, port), b"") for _ in range(4)])
    running.ending(4)
    assert time.monotonic() - began < 1.0
    for client in clients:
        client.close()


def test_programs_that_are_too_many_are_no_fault_of_a_backend(run, settings_file, serve):
    good = serve(named(b"g"))
    path = settings_file(f'[routes."{NAME}"]\ntarget = ["exec:/bin/cat", "{listed(good.address)}"]\n'
                         'balance = "first"\non_down = "cut"\n')
    running = run("-c", path, "--max-tunnels=1")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
        for _ in range(5):
            assert said_by(running) == b"g"
        assert kept_by(running) == ["", ""]
        client.sendall(b"x")
        assert read_exactly(client, 1) == b"x"


@pytest.mark.parametrize("warm", [0, 1])
def test_a_client_of_a_port_that_ends_without_a_word_gets_the_answer_to_that(run, settings_file, serve, port, warm):
    far = serve(lambda sock: (read_all(sock), sock.sendall(b"bye")))
    running = run("-c", settings_file(a_port(port, listed(far.address), warm=warm, connect_timeout="5s")),
                  "--route", f"{NAME}=tcp:192.0.2.1:1")
    wait_until(lambda: not warm or idle(running) == 1)
    with socket.create_connection((HOST, port), 20) as client:
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"bye"


def test_a_greeting_of_a_warm_program_comes_first(run, settings_file, port, tmp_path):
    (tmp_path / "greets.py").write_text(
        "import os\nos.write(1, b'220 hello')\nwhile said := os.read(0, 100):\n    os.write(1, said)\n")
    running = run("-c", settings_file(a_port(port, f"exec:{sys.executable} -S {tmp_path}/greets.py", warm=1)),
                  "--route", f"{NAME}=tcp:192.0.2.1:1")
    for _ in range(3):
        wait_until(lambda: idle(running) == 1 and all(warm.greeting for warm in list(pool_of(running).idle)))
        with socket.create_connection((HOST, port), 20) as client:
            assert read_exactly(client, 9) == b"220 hello"
            client.sendall(b"EHLO")
            assert read_exactly(client, 4) == b"EHLO"


def test_a_program_whose_clients_speak_first_is_good_again_while_one_of_them_stays(run, settings_file, serve, port):
    good = serve(lambda sock: sock.sendall(b"g"))
    running = run("-c", settings_file(a_port(port, "exec:/bin/cat", listed(good.address), balance="first",
                                             health_fail=1, health_pass=2, fallback_interval="50ms")),
                  "--route", f"{NAME}=tcp:192.0.2.1:1")
    group = group_of(running)
    member = next(iter(group.members.values()))
    on_loop(running, lambda: group.bad_news(member, "it was", False))
    with contextlib.ExitStack() as stack:
        def one_more() -> bool:
            client = stack.enter_context(socket.create_connection((HOST, port), 20))
            wait_until(lambda: any(each.address == client.getsockname() and each.state in ("unanswered", "open")
                                   for each in list(running.router.connections)))
            client.sendall(b"c")
            read_exactly(client, 1)
            return not member.why
        wait_until(one_more)


def test_a_connection_of_before_a_reload_that_ends_reuse_serves_nobody_else(run, settings_file, serve, port):
    def redis(sock: socket.socket) -> bytes:
        heard = b""
        while data := sock.recv(1000):
            heard += data
            sock.sendall(b"+PONG\r\n")
        return heard
    far = serve(redis)
    def text(**options: Any) -> str:
        return settings_file(a_port(port, listed(far.address), warm=2, **options))
    ping = b"*1\r\n$4\r\nPING\r\n"
    running = run("-c", text(reuse="redis"), "--route", f"{NAME}=tcp:192.0.2.1:1")
    with socket.create_connection((HOST, port), 20) as stays, socket.create_connection((HOST, port), 20) as leaves:
        for client in (stays, leaves):
            client.sendall(ping)
            assert read_exactly(client, 7) == b"+PONG\r\n"
        leaves.close()
        running.ending()
        text(reuse="off", send_proxy="v1")
        reload(running)
        stays.close()
        running.ending(2)
    assert far.result().count(b"PING") == far.result().count(b"PING") == 1
    for number in range(3):
        with socket.create_connection((HOST, port), 20) as client:
            client.sendall(ping)
            assert read_exactly(client, 7) == b"+PONG\r\n"
        running.ending(3 + number)
        assert far.result().startswith(b"PROXY TCP4 ")


def test_a_connection_to_an_address_that_a_name_no_longer_has_serves_nobody_else(
        run, settings_file, serve, port):
    far = serve(lambda sock: [sock.sendall(b"+PONG\r\n") for _ in iter(lambda: sock.recv(100), b"")])
    running = run("-c", settings_file(a_port(port, listed(far.address), reuse="redis")),
                  "--route", f"{NAME}=tcp:192.0.2.1:1")
    member = next(iter(group_of(running).members.values()))
    for number, idles in ((1, 1), (2, 0)):
        with socket.create_connection((HOST, port), 20) as client:
            client.sendall(b"*1\r\n$4\r\nPING\r\n")
            assert read_exactly(client, 7) == b"+PONG\r\n"
            if number == 2:
                on_loop(running, lambda: group_of(running).locate(member, ((socket.AF_INET, ("192.0.2.1", 1)),)))
        running.ending(number)
        assert len(member.pool.idle) == idles


def test_a_reload_from_cut_to_keep_holds_for_connections_that_were_there(several_of, serve, settings_file):
    far = serve(named(b"g"))
    running = several_of([far.address, far.address], on_down="cut")
    group = group_of(running)
    with running.connect(HELLO) as client:
        assert read_exactly(client, 1) == b"g"
        settings_file(table([far.address, far.address], on_down="keep"))
        reload(running)
        for _ in range(3):
            on_loop(running, lambda: group.bad_news(group.entries[0], "it was", True))
        assert group.entries[0].why
        client.sendall(b"x")
        assert read_exactly(client, 1) == b"x"


def test_connections_that_rest_until_the_next_client_count_as_the_backend_s(run, settings_file, echo_server, port):
    running = run("-c", settings_file(a_port(port, listed(echo_server.address), reuse="quiet",
                                             max_backend_connections=1)), "--route", f"{NAME}=tcp:192.0.2.1:1")
    (member,), warmth = group_of(running).members.values(), group_of(running).warmth
    for number in range(1, 5):
        with socket.create_connection((HOST, port), 20) as client:
            client.sendall(b"x")
            assert read_exactly(client, 1) == b"x"
            assert on_loop(running, lambda: member.active + len(member.pool.idle) + len(warmth.asides)) == 1
        running.ending(number)
        assert len(warmth.asides) == 1


@linux
def test_warm_connections_that_take_all_descriptors_make_way_for_clients(launch, settings_file, single_loop_echo):
    path = settings_file(table([single_loop_echo], warm=500))
    program = launch("-c", path, python=("/bin/sh", "-c", 'ulimit -n 200 && exec "$@"', "sh", sys.executable))
    wait_until(lambda: len(os.listdir(f"/proc/{program.pid}/fd")) == 200)
    for _ in range(20):
        with program.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
