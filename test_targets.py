"""Tests of sniroute_targets.py: kinds of target, and backends."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
import types
from typing import Any, Callable

import pytest

import sniroute_refusals
import sniroute_settings
import sniroute_targets
from sniroute_launchers import Reason
from sniroute_names import parse_host_port
from sniroute_refusals import Refused
from sniroute_routes import Route, Routes, parse_route
from sniroute_targets import (NO_PORT, Backend, Doubt, Retry, Targets, TcpBackend, TunnelBackend, Unreachable, check_tcp,
                              check_tunnel)
from conftest import HOST, Address, wait_until
from testbed.hellos import (HELLO, Bad, genuine, verdict)
from testbed.running import alert, answer, read_all, read_exactly, route


# -- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("check, rest, good", [
    (check_tcp, "h:1", True), (check_tcp, "[::1]:1", True), (check_tcp, "h:0", False), (check_tcp, "h", False),
    (check_tcp, "a/b:1", False), (check_tcp, "h\n:1", False), (check_tcp, "[fe80::1%eth0]:1", False),
    (check_tunnel, "db.example.com", True), (check_tunnel, "--url.x", False),
    (check_tunnel, "localhost", False), (check_tunnel, "localhost.", False), (check_tunnel, "a.b..", False),
    (check_tcp, "db.example.com.:1", True), (check_tcp, "127.0.0.1.:1", False), (check_tcp, "[::ffff:192.0.2.1]:1", True),
])
def test_a_target_is_checked(check, rest, good):
    assert verdict(check, rest) == (rest if good else Bad("bad_name", 112))


def test_a_trailing_dot_of_a_tunnel_is_one_name():
    assert check_tunnel("DB.example.com.") == "db.example.com"


def resolve(monkeypatch: pytest.MonkeyPatch, target: str, found: list[str] | OSError, targets: Targets,
            allowed: Callable[[tuple], bool] = lambda address: True) -> Any:
    """Prepare a tcp target while the resolver answers `found`."""
    def answer(host: str, port: int, **_: Any) -> list[tuple]:
        if isinstance(found, OSError):
            raise found
        return [(socket.AF_INET6 if ":" in text else socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, port))
                for text in found]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    targets.may_dial = lambda decision, address: allowed(address)
    decision = Routes([Route("a.b", target)]).decide("a.b")
    sniroute_targets.tcp_prepare(targets, types.SimpleNamespace(decision=decision))
    return sniroute_targets.tcp_ready(targets, decision)


def addresses(backend: sniroute_targets.Backend) -> list[tuple]:
    """Those that it would try, in order."""
    return list(backend.addresses)


def test_a_host_is_resolved_once_and_stays_while_the_resolver_is_down(monkeypatch):
    targets = Targets(None)
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, "tcp:h:1", OSError("down"), targets)
    assert (caught.value.kind, caught.value.alert) == ("unresolved", 80)
    backend = resolve(monkeypatch, "tcp:h:1", ["192.0.2.1", "192.0.2.1", "2001:db8::1"], targets)
    assert not backend.local
    for known in (backend, resolve(monkeypatch, "tcp:h:1", OSError("down"), targets)):
        assert addresses(known) == [(socket.AF_INET, ("192.0.2.1", 1)), (socket.AF_INET6, ("2001:db8::1", 1))]
    now = time.monotonic()
    decision = Routes([Route("a.b", "tcp:h:1", resolve_interval=30.0)]).decide("a.b")
    asked: list[Any] = []
    targets.ask = asked.append
    monkeypatch.setattr(sniroute_targets, "monotonic", lambda: now + 31)
    assert addresses(sniroute_targets.tcp_ready(targets, decision)) == addresses(known), "it is resolved beside this"
    assert asked == [decision]
    monkeypatch.setattr(sniroute_targets, "monotonic", lambda: now + 61)
    assert sniroute_targets.tcp_ready(targets, decision) is None, "nobody has used it for long"
    assert sniroute_targets.tcp_ready(targets, Routes([Route("a.b", "tcp:other:1")]).decide("a.b")) is None


@pytest.mark.parametrize("target, family, address, local", [
    ("tcp:127.0.0.1:1", socket.AF_INET, ("127.0.0.1", 1), True),
    ("tcp:192.0.2.1:2", socket.AF_INET, ("192.0.2.1", 2), False),
    ("tcp:[::1]:3", socket.AF_INET6, ("::1", 3, 0, 0), True),
    ("tcp:[::ffff:127.0.0.1]:4", socket.AF_INET, ("127.0.0.1", 4), True),
    ("tcp:[::FFFF:c000:201]:5", socket.AF_INET, ("192.0.2.1", 5), False),
], ids=["loopback", "elsewhere", "v6", "IPv4-in-v6", "IPv4-in-v6-in-hex"])
def test_an_address_is_never_resolved(target, family, address, local):
    targets = Targets(None)
    decision = Routes([Route("a.b", target)]).decide("a.b")
    for _ in range(2):
        backend = sniroute_targets.tcp_ready(targets, decision)
        assert (addresses(backend), backend.local) == ([(family, address)], local)
    assert list(targets.resolved) == [decision.key]


def test_an_address_that_the_route_does_not_lead_to_is_not_ready_and_never_will_be(monkeypatch):
    targets = Targets(None)
    targets.own = [("127.0.0.1", 19000)]
    decision = Routes([Route("a.b", "tcp:127.0.0.1:19000")]).decide("a.b")
    with pytest.raises(Refused) as caught:
        sniroute_targets.tcp_ready(targets, decision)
    assert caught.value.kind == "forbidden", "at once: no thread is needed to say so"
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, decision.target, ["127.0.0.1"], targets, lambda address: False)
    assert caught.value.kind == "forbidden" and not targets.resolved


def test_only_addresses_that_the_route_leads_to_are_dialled(monkeypatch):
    targets = Targets(None)
    with pytest.raises(Refused) as caught:
        resolve(monkeypatch, "tcp:h:1", ["10.0.0.1"], targets, lambda address: False)
    assert (caught.value.kind, caught.value.alert) == ("forbidden", 112)
    backend = resolve(monkeypatch, "tcp:h:1", ["10.0.0.1", "192.0.2.1"], targets,
                      lambda address: address[0] != "10.0.0.1")
    assert [address[0] for _, address in addresses(backend)] == ["192.0.2.1"]


def test_resolved_hosts_and_their_addresses_are_limited(monkeypatch):
    monkeypatch.setattr(sniroute_targets, "RESOLVED_MAX", 2)
    targets = Targets(None)
    for number in range(5):
        backend = resolve(monkeypatch, f"tcp:h{number}:1", [f"192.0.2.{n}" for n in range(1, 99)], targets)
        assert len(addresses(backend)) == sniroute_targets.ADDRESSES_MAX and len(targets.resolved) <= 2
    targets.make_room(3)
    for number in range(6):
        resolve(monkeypatch, f"tcp:h{number}:1", ["192.0.2.1"], targets)
    assert len(targets.resolved) == 6, "there is room for those of all routes"


def test_families_take_turns_among_the_addresses_that_are_tried(monkeypatch):
    """Many of one family do not push the other out."""
    found = [f"2001:db8::{n}" for n in range(1, 21)] + ["192.0.2.1", "192.0.2.2"]
    backend = resolve(monkeypatch, "tcp:h:1", found, Targets(None))
    assert [address[0] for _, address in addresses(backend)] == [
        "2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2", *(f"2001:db8::{n}" for n in range(3, 15))]


def found_row(host: str) -> tuple[int, tuple]:
    """An address as `resolve` has it."""
    return socket.AF_INET, (host, 1)


def test_addresses_that_lost_come_last_whatever_the_resolver_says(monkeypatch):
    targets = Targets(None)
    found = [f"192.0.2.{n}" for n in range(1, 20)]
    backend = resolve(monkeypatch, "tcp:h:1", found, targets)
    backend.row = backend.addresses[2]
    for row in backend.addresses[:2]:
        backend.tell(row, "Connection refused")
    assert backend.settled() is backend, "it is news"
    assert backend.remark() == "192.0.2.1:1: Connection refused; 192.0.2.2:1: Connection refused; 192.0.2.3:1: took it"
    later = TcpBackend(targets, backend.key, backend.target, targets.resolved[backend.key])
    later.row, later.told = found_row(found[2]), {found_row(found[0]): "Connection refused"}
    assert later.settled() is None, "and is said once"
    known = sniroute_targets.tcp_ready(targets, Routes([Route("a.b", "tcp:h:1")]).decide("a.b"))
    assert [address[0] for _, address in addresses(known)] == found[2:16] + found[:2]
    again = resolve(monkeypatch, "tcp:h:1", found, targets)
    assert [address[0] for _, address in addresses(again)] == found[2:18]
    other = resolve(monkeypatch, "tcp:other:1", found[:3], targets)
    assert [address[0] for _, address in addresses(other)] == [found[2], *found[:2]], "a name for the same host, too"


# -- backends ----------------------------------------------------------------------------------


def test_a_backend_goes_on_to_the_next_address_where_one_refuses_at_once(echo_server):
    """No such family here, and an address to which nothing may be sent; then the echo."""
    nobody = socket.AF_INET, ("255.255.255.255", 1)
    backend = Backend("tcp:h:1", [(9999, ("", 0)), nobody, (socket.AF_INET, echo_server.address)], True)
    server = backend.open()
    try:
        assert server.gettimeout() == 0.0, "it never blocks"
        server.settimeout(10)
        assert server.getpeername() == echo_server.address
        with pytest.raises(Unreachable, match="what became of the last one"):
            backend.open("what became of the last one")
    finally:
        server.close()


def test_a_socket_never_blocks_where_it_cannot_be_born_so(echo_server, monkeypatch):
    """macOS has no SOCK_NONBLOCK."""
    monkeypatch.setattr(sniroute_targets, "STREAM", socket.SOCK_STREAM)
    server = Backend("tcp:h:1", [(socket.AF_INET, echo_server.address)], False).open()
    try:
        assert server.gettimeout() == 0.0
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), "it is not on loopback, as far as is known"
    finally:
        server.close()


def test_a_backend_without_an_address_says_so():
    with pytest.raises(Unreachable, match="No route to host"):
        Backend("tcp:h:1", [], True).open()


def test_addresses_that_cannot_be_reached_are_forgotten():
    """Perhaps the host has moved: the next client has it resolved again."""
    targets = Targets(None)
    decision = Routes([Route("a.b", "tcp:192.0.2.1:1")]).decide("a.b")
    found = targets.remember(decision, sniroute_targets.Resolved((), True, sniroute_targets.NEVER))
    for _ in range(2):  # two clients had the same
        with pytest.raises(Unreachable):
            TcpBackend(targets, decision.key, decision.target, found).open()
        assert not targets.resolved


@pytest.mark.parametrize("told, reason", [
    ((NO_PORT,), "busy"), ((NO_PORT, NO_PORT), "busy"), ((NO_PORT, "Connection refused"), "backend"),
    (("Connection refused", NO_PORT), "backend"), ((), "backend")], ids=str)
def test_a_host_is_to_blame_where_it_could_dial_no_address(told, reason):
    """Where IPv6 is switched off ::1 cannot be dialled either, and localhost is down all the same."""
    way = Backend("tcp:localhost:1", [(socket.AF_INET6, ("::1", 1, 0, 0)), (socket.AF_INET, (HOST, 1))], True)
    for row, what in zip(way.addresses, told):
        way.tell(row, what)
    assert (way.is_ours(), way.failed("why", None, True).kind) == (reason == "busy", reason)


@pytest.mark.parametrize("last", [False, True])
def test_a_backend_of_addresses_is_not_tried_again(last):
    verdict = Backend("tcp:h:1", [], True).failed("Connection refused", None, last)
    assert (verdict.kind, str(verdict)) == ("backend", "tcp:h:1: Connection refused")


class Lessor:
    """A table of tunnels, as a backend sees it."""

    def __init__(self, *reasons: Reason):
        self.reasons = list(reasons)  # what the program has said each time it is asked
        self.asked: list[tuple[float, int]] = []
        self.given_back: list[tuple[Any, float | None]] = []

    def words(self, child: Any, since: float, port: int) -> Reason:
        self.asked.append((since, port))
        return self.reasons.pop(0)

    def release(self, tunnel: Any, idle: float | None) -> None:
        self.given_back.append((tunnel, idle))


def leased(lessor: Lessor, address: Address = (HOST, 1), names_clients: bool = False) -> TunnelBackend:
    """A backend with a lease."""
    child = types.SimpleNamespace(alive=lambda: True, address=address, names_clients=names_clients, proven=False)
    return TunnelBackend(lessor, "carrier:t.example.com", 7.0, types.SimpleNamespace(child=child), child)


SILENT, SAID, FINAL = Reason(), Reason("denied", "Access denied it"), Reason("unknown", "no such name", True)
WAIT, AGAIN, DOUBT = "wait for its words", "try again", "try again, once the process was looked at"
LOOK = "look at the process all the same"


@pytest.mark.parametrize("names_clients, last, reasons, verdicts", [
    (False, False, [SILENT], [DOUBT]),
    (False, False, [SAID], [DOUBT]),  # it does not say for whom: it may have been another client
    (False, True, [SAID], [("tunnel_denied", "Access denied it", LOOK)]),
    (False, True, [SILENT, SILENT], [WAIT, ("tunnel_failed", "why", LOOK)]),
    (False, True, [SILENT, SAID], [WAIT, ("tunnel_denied", "Access denied it", LOOK)]),
    (True, True, [SAID], [("tunnel_denied", "Access denied it")]),
    (True, True, [FINAL], [("tunnel_unknown", "no such name")]),
    (True, False, [SAID], [AGAIN]),
    (True, False, [SILENT, SAID], [WAIT, AGAIN]),
    (True, False, [SILENT, SILENT], [WAIT, DOUBT]),
    (True, False, [FINAL], [("tunnel_unknown", "no such name")]),
    (True, False, [SILENT, FINAL], [WAIT, ("tunnel_unknown", "no such name")]),
    (True, True, [SILENT, SILENT], [WAIT, ("tunnel_failed", "why", LOOK)]),
])
def test_a_tunnel_that_failed_is_asked_for_its_words_at_most_twice(names_clients, last, reasons, verdicts, echo_server):
    lessor = Lessor(*reasons)
    backend = leased(lessor, echo_server.address, names_clients)
    server = backend.open()
    try:
        port = server.getsockname()[1]
        found = []
        for why, sock in (("why", server), ("", None))[:len(verdicts)]:
            verdict = backend.failed(why, sock, last)
            if isinstance(verdict, Retry):
                assert verdict.doubted in (None, backend.child)
                found.append(AGAIN if verdict.doubted is None else DOUBT)
            elif isinstance(verdict, Doubt):
                assert verdict.doubted is backend.child
                found.append((verdict.refusal.kind, str(verdict.refusal).partition(": ")[2], LOOK))
            else:
                assert verdict is None or str(verdict).startswith("carrier:t.example.com: ")
                found.append(WAIT if verdict is None else (verdict.kind, str(verdict).partition(": ")[2]))
            backend.release()  # as a connection does: the lease is not needed for the words
    finally:
        server.close()
    assert found == verdicts and not lessor.reasons
    assert lessor.asked == [(backend.dialled, port)] * len(verdicts), "the port it was dialled from is remembered"
    assert lessor.given_back == [(backend.tunnel, 7.0)], "one lease, once"


def test_a_tunnel_that_could_not_be_dialled_has_no_port():
    lessor = Lessor(SAID)
    assert leased(lessor).failed("Connection refused", None, True).refusal.kind == "tunnel_denied"
    closed = socket.socket()
    closed.close()
    lessor.reasons.append(SAID)
    assert leased(lessor).failed("Connection reset by peer", closed, True).refusal.kind == "tunnel_denied"
    assert lessor.asked == [(0.0, 0), (0.0, 0)]


def test_a_tunnel_that_answered_is_proven():
    backend = leased(Lessor())
    assert not backend.proven_by_connect and not backend.child.proven
    backend.answered()
    assert backend.child.proven


def test_a_tunnel_whose_process_has_ended_is_not_the_one_that_was_meant(echo_server):
    for alive, is_its_child in ((False, True), (True, False)):
        backend = leased(Lessor(), echo_server.address)
        backend.child.alive = lambda alive=alive: alive
        if not is_its_child:
            backend.tunnel.child = None  # the reaper took it away
        server = backend.open()
        try:
            server.setblocking(True)
            with pytest.raises(Unreachable, match="its process ended"):
                backend.connected(server)
        finally:
            server.close()


@pytest.mark.parametrize("kind", [TunnelBackend, Backend])
def test_only_a_tunnel_learns_by_a_reset_that_its_client_has_left(kind, serve):
    """It may still dial for it."""
    def far(sock: socket.socket) -> str:
        sock.settimeout(10)
        return repr(sock.recv(1))

    listening = serve(far)
    backend = leased(Lessor(), listening.address) if kind is TunnelBackend else Backend(
        "tcp:h:1", [(socket.AF_INET, listening.address)], True)
    server = backend.open()
    backend.abandon(server)
    server.close()
    heard = listening.result()
    assert isinstance(heard, ConnectionResetError) if kind is TunnelBackend else heard == "b''"
    backend.abandon(server)  # closed already: nothing to say


def test_a_tunnel_that_is_taken_away_in_the_instant_of_its_lease_is_given_back():
    """The reaper sets its state next; until then a client waits."""
    tunnel = types.SimpleNamespace(child=None)
    given_back = []
    targets = Targets(types.SimpleNamespace(lease=lambda key: tunnel, release=given_back.append))
    assert sniroute_targets.tunnel_ready(targets, Routes([parse_route("*=carrier:{name}")]).decide("a.b.c")) is None
    assert given_back == [tunnel]


def test_tunnels_backend_tells_a_connect_that_is_not_over_from_one_that_failed(deaf, free_ports):
    def backend(address: Address) -> sniroute_targets.Backend:
        child = types.SimpleNamespace(alive=lambda: True, address=address)
        return sniroute_targets.TunnelBackend(None, "", None, types.SimpleNamespace(child=child), child)
    with socket.socket() as server:
        server.setblocking(False)
        assert server.connect_ex(deaf) == errno.EINPROGRESS
        with pytest.raises(BlockingIOError):
            backend(deaf).connected(server)
    nobody = HOST, free_ports(1)[0]
    with socket.socket() as server:
        server.setblocking(False)
        server.connect_ex(nobody)
        assert select.select([], [server], [], 10)[1], "its answer has come"
        with pytest.raises(ConnectionRefusedError):
            backend(nobody).connected(server)


# -- tcp targets -------------------------------------------------------------------------------


def test_host_name_is_resolved_once_and_kept(run, serve, monkeypatch):
    far = serve(answer(b"x"))
    asked = []
    real = socket.getaddrinfo
    def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        return real(host, *args, **kwargs)
    running = run(f"--route=db.example.com=tcp:localhost:{far.address[1]}")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for _ in range(3):
        with running.connect(HELLO) as client:
            assert client.recv(1) == b"x"
    assert asked.count("localhost") == 1


def test_a_name_in_use_is_resolved_again_beside_its_clients(run, serve, settings_file, monkeypatch):
    """An address that is gone gets no new client, and cuts nobody."""
    before, after = serve(answer(b"1")), serve(answer(b"2"))
    found, genuine_look = [before.address], socket.getaddrinfo
    looks = []

    def look(host: str, *words: Any, **more: Any) -> Any:
        if host != "db.internal":
            return genuine_look(host, *words, **more)
        looks.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", found[0])]

    monkeypatch.setattr(socket, "getaddrinfo", look)
    running = run("-c", settings_file('[routes."db.example.com"]\ntarget = "tcp:db.internal:1"\n'
                                      'resolve_interval = "100ms"\n'))
    with socket.create_connection(running.address, 20) as first:
        first.sendall(HELLO)
        assert first.recv(1) == b"1"
        found[0] = after.address
        said = b"1"
        while said == b"1":
            with socket.create_connection(running.address, 20) as client:
                client.sendall(HELLO)
                said = client.recv(1)
        assert said == b"2" and len(looks) >= 2
        assert not running.endings or first not in running.endings
        first.sendall(b"more")
        wait_until(lambda: any(each.up.total > len(HELLO) for each in list(running.router.connections)))


def test_host_that_does_not_resolve_is_refused_with_its_reason(run, monkeypatch):
    genuine_look = socket.getaddrinfo

    def look(host: str, *words: Any, **more: Any) -> Any:
        if host == "nothing.invalid":  # a resolver that cannot be reached would take its time
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return genuine_look(host, *words, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look)
    running = run("--route=db.example.com=tcp:nothing.invalid:1")
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    assert running.ending().reason == "unresolved"
    assert "nothing.invalid" in running.ending().detail


def test_resolver_that_is_down_for_a_moment_cuts_nobody(run, serve, settings_file, monkeypatch):
    far = serve(answer(b"x"))
    running = run("-c", settings_file(f'[routes."db.example.com"]\ntarget = "tcp:localhost:{far.address[1]}"\n'
                                      'resolve_interval = "100ms"\n'))
    with running.connect(HELLO) as client:
        assert client.recv(1) == b"x"
    wait_until(lambda: all(found.until + 0.1 < time.monotonic() for found in running.router.targets.resolved.values()))
    def broken(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", broken)
        with socket.socket() as client:  # create_connection would resolve
            client.settimeout(20)
            client.connect(running.address)
            client.sendall(HELLO)
            assert client.recv(1) == b"x"


@pytest.mark.parametrize("pattern, target, address, allowed", [
    ("*", "tcp:{name}:443", ("10.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("127.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("fd00::1", 443), False),
    ("*", "tcp:{name}:443", ("8.8.8.8", 443), True),
    ("*", "tcp:10.0.0.1:443", ("10.0.0.1", 443), True),
    ("*.example.com", "tcp:{name}:443", ("10.0.0.1", 443), True),
    ("*.example.com", "tcp:{label}:443", ("10.0.0.1", 443), False),
    ("*.example.com", "tcp:{label}.internal.example.net:443", ("10.0.0.1", 443), True),
    ("*", "tcp:{label}.{domain}:443", ("10.0.0.1", 443), False),
    ("*", "tcp:cft-{name}:443", ("192.168.0.1", 443), False),
    ("*", "tcp:{name}.:443", ("127.0.0.1", 443), False),
    ("*.example.com", "tcp:{label}-{domain}:443", ("10.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("::ffff:10.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("::10.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("64:ff9b::10.0.0.1", 443), False),
    ("*", "tcp:{name}:443", ("2002:a00:1::1", 443), False),
    ("*", "tcp:{name}:443", ("2001:0:808:808::f5ff:fffe", 443), False),
    ("*", "tcp:{name}:443", ("fe80::1%eth0", 443), False),
    ("*", "tcp:{name}:443", ("64:ff9b::8.8.8.8", 443), True),
    ("*.example.com", "tcp:{name}:443", ("64:ff9b::10.0.0.1", 443), True),
])
def test_stranger_cannot_point_a_name_at_the_private_network(run, pattern, target, address, allowed):
    running = run(f"--route={pattern}={target}")
    decision = running.router.routes.decide("a.example.com")
    assert running.router.targets.may_dial(decision, address) is allowed


@pytest.mark.parametrize("label", ["2130706433", "0x7f000001", "017700000001", "0"])
def test_number_is_no_host(run, label):
    """A resolver takes it for an address."""
    running = run("--route=*.example.com=tcp:{label}:443")
    with running.connect(genuine(name=f"{label}.example.com")) as client:
        assert read_all(client) == alert(112)
    assert running.ending().reason == "bad_name"


def test_router_that_listens_everywhere_knows_its_addresses(run):
    running = run("--route=db.example.com=tcp:localhost:1")
    decision = running.router.routes.decide("db.example.com")
    running.router.targets.own = [("::", 19000)]
    for address in ("127.0.0.1", "127.0.0.2", "::1", "0.0.0.0", "::ffff:127.0.0.1", "::"):
        assert not running.router.targets.may_dial(decision, (address, 19000)), address
    assert running.router.targets.may_dial(decision, ("127.0.0.1", 19001))
    assert running.router.targets.may_dial(decision, ("192.0.2.1", 19000))


@pytest.mark.parametrize("route, address, allowed", [
    ("{a}-{port}.example.com=tcp:127.0.0.1:{port}", ("127.0.0.1", 21005), False),
    ("{a}-{port}.example.com=tcp:127.0.0.1:{port}", ("127.0.0.1", 21010), True),
    ("{a}-{port}.example.com=tcp:db.internal:{port}", ("::ffff:127.0.0.1", 21005), False),
    ("{a}-{port}.example.com=tcp:db.internal:{port}", ("0.0.0.0", 21005), False),
    ("{a}-{port}.example.com=tcp:db.internal:210{port}", ("127.0.0.1", 21005), False),
    ("*.example.com=tcp:127.0.0.1:{label}", ("127.0.0.1", 21005), False),
    ("{a}-{port}.example.com=tcp:db.internal:{port}", ("192.0.2.1", 21005), True),
    ("{a}.example.com=tcp:127.0.0.1:21005", ("127.0.0.1", 21005), True),
])
def test_a_client_that_chooses_the_port_cannot_choose_that_of_a_tunnel(run, route, address, allowed):
    """It would go around what the tunnel's own route allows."""
    running = run(f"--route={route}", "--ports=21000-21009")
    decision = running.router.routes.decide("7.example.com" if route.startswith("*") else
                                            "x-05.example.com" if ":210{" in route else "x-7.example.com")
    assert running.router.targets.may_dial(decision, address) is allowed


@pytest.mark.parametrize("own", ["127.0.0.1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1", "::ffff:7f00:1"])
def test_router_knows_its_address_in_either_form(own, address):
    targets = Targets(None)
    targets.own = [(own, 19000)]
    decision = Routes([parse_route("db.example.com=tcp:localhost:1")]).decide("db.example.com")
    assert not targets.may_dial(decision, (address, 19000))
    assert targets.may_dial(decision, (address, 19001)) and targets.may_dial(decision, ("127.0.0.2", 19000))


@pytest.mark.parametrize("target", ["127.0.0.1:19999", "[::ffff:127.0.0.1]:19999"])
@pytest.mark.parametrize("listen", ["127.0.0.1:19999", "[::ffff:7f00:1]:19999"])
def test_a_circle_is_seen_in_either_form(target, listen):
    with pytest.raises(sniroute_refusals.SettingsError, match="leads back"):
        sniroute_settings.load_settings([f"--listen={listen}", f"--route=a.example.com=tcp:{target}"], {})


@pytest.mark.parametrize("target, listen, circle", [
    ("0.0.0.0:19999", "127.0.0.1:19999", True), ("[::ffff:0.0.0.0]:19999", "127.0.0.1:19999", True),
    ("[::]:19999", "[::1]:19999", True), ("127.0.0.1:19999", ":19999", True), ("[::1]:19999", ":19999", True),
    ("0.0.0.0:19999", "192.0.2.1:19999", False), ("192.0.2.1:19999", "127.0.0.1:19999", False),
    ("0.0.0.0:19998", "127.0.0.1:19999", False),
])
def test_a_circle_by_the_address_of_nobody_is_seen_at_the_start_and_at_each_dial(target, listen, circle):
    """A connect to 0.0.0.0 goes to loopback: one client's hello would come back until no descriptor is left."""
    words = [f"--listen={listen}", f"--route=a.example.com=tcp:{target}"]
    targets = Targets(None)
    host, port = parse_host_port(listen, "*")
    targets.own = [("::" if host == "*" else host, port)]
    decision = Routes([parse_route(f"a.example.com=tcp:{target}")]).decide("a.example.com")
    address = parse_host_port(target)
    if circle:
        with pytest.raises(sniroute_refusals.SettingsError, match="leads back"):
            sniroute_settings.load_settings(words, {})
    else:
        sniroute_settings.load_settings(words, {})
    assert targets.may_dial(decision, address) is not circle


def test_router_does_not_dial_itself(run):
    running = run("--route=db.example.com=tcp:localhost:1")
    decision = running.router.routes.decide("db.example.com")
    assert not running.router.targets.may_dial(decision, running.address)
    assert running.router.targets.may_dial(decision, (HOST, 1))
    with pytest.raises(sniroute_refusals.SettingsError, match="leads back"):
        sniroute_settings.load_settings(["--listen=127.0.0.1:19999", "--route=a.example.com=tcp:127.0.0.1:19999"], {})


def test_forbidden_address_is_refused(run, monkeypatch):
    running = run("--route=*=tcp:{name}:443")
    private = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", 443))]
    with running.connect() as client:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: private)
        client.sendall(HELLO)
        assert read_all(client) == alert(112)
    assert running.ending().reason == "forbidden"


def test_an_address_that_leads_nowhere_is_refused_at_once(run):
    """By `ready`, in the loop: no thread is needed to say so."""
    running = run("--route=db.example.com=tcp:127.0.0.1:1")
    running.router.targets.own.append(("127.0.0.1", 1))
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(112)
    assert running.ending().reason == "forbidden" and not running.router.waits.threads
    assert "127.0.0.1 is 127.0.0.1, which this route does not lead to" in running.ending().detail
    assert running.router.routes.tallies["db.example.com"].active == 0


def test_own_name_needs_a_route_of_its_own(run, echo_server):
    running = run(route(echo_server.address, "*"), route(echo_server.address, "own.example.com"))
    running.router.own_names |= {"db.example.com", "own.example.com"}
    with running.connect(HELLO) as client:
        assert read_all(client) == alert(112)
    own = genuine(name="own.example.com")
    with running.connect(own) as client:
        assert read_exactly(client, len(own)) == own


@pytest.mark.parametrize("asked", ["db.example.com", "db.example.com."])
def test_own_name_is_one_with_and_without_a_trailing_dot(run, echo_server, asked, monkeypatch):
    """As `uname` may say it, and as a client may."""
    names = os.uname()
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(nodename="DB.example.com.", release=names.release))
    running = run(route(echo_server.address, "*"))
    with running.connect(genuine(name=asked)) as client:
        assert read_all(client) == alert(112)
    assert running.ending().reason == "no_route" and "is this router itself" in running.ending().detail


@pytest.mark.parametrize("asked, name", [
    ("web.example.com.", "web.example.com"), ("WEB.Example.com.", "web.example.com"), ("db", "db"), ("DB.", "db"),
])
def test_a_name_as_programs_send_it_is_served_and_the_backend_gets_its_bytes(run, echo_server, asked, name):
    """Browsers and libpq send a trailing dot; Compose and Kubernetes have names of one label."""
    running = run(route(echo_server.address, "*.example.com."), route(echo_server.address, "db"))
    said = genuine(name=asked)
    with running.connect(said) as client:
        assert read_exactly(client, len(said)) == said
    assert running.ending().name == name and running.ending().reason == "client_closed"


def test_a_name_of_one_label_without_a_route_is_named_in_the_log(run, echo_server):
    running = run(route(echo_server.address, "*"), route(echo_server.address, "db"))
    with running.connect(genuine(name="web")) as client:
        assert read_all(client) == alert(112)
    ending = running.ending()
    assert (ending.reason, ending.name, ending.detail) == ("no_route", "web", "no route for web")


def test_an_order_for_a_tunnel_may_have_a_trailing_dot(run):
    running = run("--route=*.example.com=cloudflared:cft-{name}.")
    assert str(running.router.tunnel_of("DB.example.com.")) == "cloudflared:cft-db.example.com"
    assert running.router.tunnel_of("db.example.com.") == running.router.tunnel_of("db.example.com")
    with pytest.raises(ValueError, match="; write xn--mnchen-3ya.example.com, which is its form in DNS and TLS$"):
        running.router.tunnel_of("m\u00fcnchen.example.com")


