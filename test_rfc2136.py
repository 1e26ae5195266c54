"""Tests of sniroute_rfc2136.py: with BIND, and with a stand-in that loses messages and says what BIND never says."""

from __future__ import annotations

import collections
import contextlib
import functools
import ipaddress
import logging
import random
import re
import signal
import socket
import struct
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute_dns as dns
import sniroute_rfc2136
from conftest import HOST
from sniroute_dns import A, IN, NONE, TXT, Key, Mark, Record, parse_url, text_data
from sniroute_loop import NEVER, READ, Loop, Watch, monotonic
from sniroute_rfc2136 import REASONS, SERVER_FAILURES, Updater
from testbed.carrier import resolve_as
from testbed.named import KEYS, ZONE
from testbed.ports import free_port

KEY, HUMAN = KEYS["router"], KEYS["human"]
ID, OTHER = "7f" * 16, "5e" * 16
FOO = f"foo.{ZONE}"
V4, V6 = ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("2001:db8::1")


class Made:
    """A loop and what runs in it."""

    def __init__(self) -> None:
        self.loop = Loop(self.fault)
        self.limit = self.loop.timer(self.loop.hurry)  # a test that waits for ever fails
        self.told: list[tuple[int, str]] = []
        self.open: list[Any] = []  # to be closed

    def fault(self, owner: Any) -> None:
        raise  # noqa: PLE0704: `fault` is called inside `except`

    def updater(self, url: str, key: Key = KEY, **more: Any) -> Updater:
        """A new one."""
        made = Updater(self.loop, parse_url(url), key, lambda level, text: self.told.append((level, text)), **more)
        self.open.append(made)
        return made

    def turn_until(self, predicate: Callable[[], Any], timeout: float = 10.0) -> None:
        """Turn the loop until something is so."""
        end = monotonic() + timeout
        while not predicate():
            assert monotonic() < end, (self.told, [made.state for made in self.open if isinstance(made, Updater)])
            self.limit.set(end)
            self.loop.turn()

    def settle(self, updater: Updater) -> None:
        """Turn until nothing is left to be done."""
        self.turn_until(lambda: not updater.state.pending)

    @property
    def lines(self) -> list[str]:
        return [text for _, text in self.told]

    def close(self) -> None:
        for made in self.open:
            made.close()
        self.loop.close()


@pytest.fixture
def made() -> Iterator[Made]:
    harness = Made()
    yield harness
    harness.close()


@pytest.fixture(autouse=True)
def hurried(monkeypatch) -> None:
    """Nothing rests for long."""
    monkeypatch.setattr(sniroute_rfc2136, "AGAIN", (0.02, 0.03))
    monkeypatch.setattr(sniroute_rfc2136, "RESTS", (0.02, 0.03))


@pytest.fixture
def impatient(monkeypatch) -> None:
    """No answer is waited for long."""
    monkeypatch.setattr(sniroute_rfc2136, "SENDS", (0.05, 0.05, 0.05))
    monkeypatch.setattr(sniroute_rfc2136, "TCP_LAST", 0.3)


# -- a stand-in for a server -------------------------------------------------------------------


RESET = b"\1"  # what it says by TCP before it breaks off


class Server:
    """A name server in the loop of the test.  Its zone is a dictionary."""

    def __init__(self, made: Made, port: int = 0):
        self.loop = made.loop
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.port = port or free_port()
        self.udp.bind((HOST, self.port))
        self.tcp: socket.socket | None = None
        self.records: dict[str, set[tuple[int, bytes]]] = collections.defaultdict(set)
        self.protected: set[tuple[str, int, bytes]] = set()  # a human's
        self.heard: list[dns.Message] = []
        self.by_tcp = 0
        self.clock = time.time
        self.lost = self.answer_lost = lambda: False  # whether a datagram, and its answer, is lost
        self.forge: Callable[[bytes, dns.Message], list[bytes]] = lambda answer, message: [answer]
        self.code: Callable[[], int] = lambda: dns.NOERROR  # instead of what was asked for
        self.is_slow = False  # it answers what it is asked, and does updates later: those of `late`
        self.late: list[dns.Message] = []
        self.is_cut = False
        self.tcp_says: Callable[[bytes], bytes | None] = dns.frame  # of an answer; None: nothing, and it stays open
        self.clients: list[tuple[socket.socket, Watch]] = []
        self.watch = Watch(self.loop.poller, self.udp.fileno())
        self.watch.wait_for(READ, self.on_datagram)
        self.tcp_watch: Watch | None = None
        made.open.append(self)

    @property
    def url(self) -> str:
        return f"rfc2136://{HOST}:{self.port}/{ZONE}?key=router&address={V4}"

    def listen(self) -> None:
        """Serve TCP, too."""
        self.tcp = socket.create_server((HOST, self.port))
        self.tcp_watch = Watch(self.loop.poller, self.tcp.fileno())
        self.tcp_watch.wait_for(READ, self.on_connect)

    def close(self) -> None:
        for sock, watch in ((self.udp, self.watch), (self.tcp, self.tcp_watch), *self.clients):
            if sock is not None:
                watch.closing()
                sock.close()

    def on_datagram(self, mask: int) -> None:
        data, client = self.udp.recvfrom(65536)
        if self.lost():
            return
        message = dns.parse(data)
        if self.is_slow and message.opcode == dns.UPDATE:
            self.late.append(message)
            return
        answer = self.answer(message, data, self.is_cut)
        if self.answer_lost():
            return
        for each in self.forge(answer, message):
            self.udp.sendto(each, client)

    def on_connect(self, mask: int) -> None:
        sock = self.tcp.accept()[0]
        watch = Watch(self.loop.poller, sock.fileno())
        self.clients.append((sock, watch))
        watch.wait_for(READ, functools.partial(self.on_request, sock, watch, bytearray()))

    def on_request(self, sock: socket.socket, watch: Watch, data: bytearray, mask: int) -> None:
        data += sock.recv(65536)
        request = dns.unframe(data)
        if request is None:
            return
        watch.wait_for(0)
        self.by_tcp += 1
        said = self.tcp_says(self.answer(dns.parse(request), request, False))
        if said is not None:
            with contextlib.suppress(OSError):  # it has left
                sock.sendall(said)
                if said == RESET:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.close()
                else:
                    sock.shutdown(socket.SHUT_WR)

    def answer(self, message: dns.Message, data: bytes, is_cut: bool) -> bytes:
        """What it says; what was asked for is done."""
        assert dns.is_signed(data, message.signature, KEY)
        self.heard.append(message)
        code, records = self.code(), []
        if abs(self.clock() - message.signature.time) > dns.FUDGE:
            code = dns.BADTIME
        if not code and message.opcode == dns.UPDATE:
            code = self.update(message)
        elif not code:
            name = dns.read_name(data, 12)[0]
            records = [Record(name, kind, IN, 60, each) for kind, each in self.records[name] if kind == TXT]
        return self.make(message, code, records[:1] if is_cut else records, is_cut)

    def make(self, message: dns.Message, code: int = 0, records: Any = (), is_cut: bool = False, key: Key = KEY,
             flags: int = dns.RESPONSE) -> bytes:
        """An answer."""
        error, rcode = (code, dns.NOTAUTH) if code > 15 else (0, code)
        writer = dns.Writer(message.number, flags | message.opcode << 11 | dns.TRUNCATED * is_cut | rcode,
                            (0, len(records), 0, 0))
        for record in records:
            writer.record(record)
        told = int(self.clock()).to_bytes(6, "big") if error == dns.BADTIME else b""
        return dns.sign(bytes(writer.out), key, message.signature.time, error=error, other=told,
                        asked=message.signature.mac)[0]

    def update(self, message: dns.Message) -> int:
        """Source: RFC 2136 sections 3.2 and 3.4."""
        texts = {(record.kind, record.data) for record in message.answers if record.group == IN}
        for record in message.answers:
            there = self.records[record.name]
            if record.group == NONE and there:
                return dns.YXDOMAIN
            if record.group == IN and {row for row in there if row[0] == TXT} != texts:
                return dns.NXRRSET
        for record in message.others:
            row = record.kind, record.data
            if record.group == NONE:
                assert (record.name, *row) not in self.protected, "a human's record"
                self.records[record.name].discard(row)
            else:
                assert record.group == IN
                self.records[record.name].add(row)
        return dns.NOERROR

    def has(self, name: str, ident: str) -> bool:
        """Whether all of a name is there, by this id."""
        mark = Mark(ident, (V4,))
        return {(record.kind, record.data) for record in mark.records(name, 60)} <= self.records[name]


@pytest.fixture
def server(made) -> Server:
    return Server(made)


# -- with BIND ---------------------------------------------------------------------------------


def test_a_claimed_name_is_in_dns_until_it_is_released(made, named):
    updater = made.updater(f"{named.url},{V6}&ttl=7")
    assert updater.want(FOO, ID)
    made.settle(updater)
    assert named.addresses(FOO) == {str(V4), str(V6)}
    assert named.texts(FOO) == {(f"sniroute={ID}".encode(), b"192.0.2.1", b"2001:db8::1")}
    state = updater.state
    assert state[:4] == (1, 1, 0, 0) and abs(state.last_contact - time.time()) < 10 and state.failure is None
    updater.unwant(FOO)
    made.settle(updater)
    assert not named.addresses(FOO) and not named.texts(FOO) and updater.state[:4] == (0, 0, 0, 0)
    assert updater.state.done == {"claim": 1, "replace": 0, "remove": 1, "look up": 0} and not made.told
    assert updater.sock is None, "nothing is left open where nothing is to be done"


def test_what_a_human_has_stays_as_it_is_and_is_ours_when_he_has_left(made, named):
    name = f"human.{ZONE}"
    updater = made.updater(named.url)
    updater.want(name, ID)
    made.turn_until(lambda: updater.state.failed)
    assert named.addresses(name) == {"192.0.2.200"} and not named.texts(name)
    assert made.lines == [f"the DNS record of {name} is not written: the name is in use, and its records are not ours: "
                          f"they stay as they are ({HOST}:{named.port}: YXDOMAIN)"]
    assert updater.tell_of(name) == (f"its record in DNS waits to be tried again: {REASONS['taken']} "
                                     f"({HOST}:{named.port}: YXDOMAIN)")
    his = Record(name, A, IN, 60, bytes((192, 0, 2, 200)))
    named.write(dns.removal(his))
    made.turn_until(lambda: updater.state.kept)
    assert named.addresses(name) == {str(V4)} and updater.state.failed == 0 and len(made.told) == 1, "it is told once"
    assert updater.tell_of(name) == "its record in DNS is there"
    updater.unwant(name)
    made.settle(updater)
    named.write(his)


def test_a_name_that_others_have_is_left_alone_when_it_is_released(made, named):
    name = f"human.{ZONE}"
    updater = made.updater(named.url)
    updater.want(name, ID)
    made.turn_until(lambda: updater.state.failed)
    updater.unwant(name)
    made.settle(updater)
    assert named.addresses(name) == {"192.0.2.200"} and updater.state.failed == 0 and not updater.entries


def test_what_a_human_adds_beside_ours_stays_and_long_messages_go_by_tcp(made, named, monkeypatch):
    calls = []
    monkeypatch.setattr(sniroute_rfc2136.Flight, "call", lambda *words, call=sniroute_rfc2136.Flight.call: (
        calls.append(words[0].act), call(*words)))
    updater = made.updater(named.url)
    updater.want(FOO, ID)
    made.settle(updater)
    his = [Record(FOO, A, IN, 60, bytes((192, 0, 2, 9))),
           *(Record(FOO, TXT, IN, 60, text_data((b"%d" % number * 120, b"x" * 100))) for number in range(4))]
    named.write(*his)
    updater.unwant(FOO)
    made.settle(updater)
    assert named.addresses(FOO) == {"192.0.2.9"}
    assert sorted(named.ask(FOO, TXT)) == sorted(record.data for record in his[1:])
    assert updater.state.done == {"claim": 1, "replace": 0, "remove": 1, "look up": 1}
    assert calls == ["look up", "remove"], "the answer was too long for a datagram, and then the request"
    named.write(*map(dns.removal, his))


def test_after_a_restart_the_same_id_is_the_same_owner(made, named):
    first = made.updater(named.url)
    first.want(FOO, ID)
    made.settle(first)
    first.close()
    other = made.updater(named.url)
    other.want(FOO, OTHER)
    made.turn_until(lambda: other.state.failed)
    other.unwant(FOO)
    made.settle(other)
    assert named.texts(FOO) == {(f"sniroute={ID}".encode(), b"192.0.2.1")}
    same = made.updater(named.url.replace("192.0.2.1", "192.0.2.2"))
    same.want(FOO, ID)
    made.settle(same)
    assert named.addresses(FOO) == {"192.0.2.2"}, "and the address of before is gone"
    assert named.texts(FOO) == {(f"sniroute={ID}".encode(), b"192.0.2.2")}
    same.close()
    late = made.updater(named.url)
    late.unwant(FOO)
    assert not late.entries, "nobody knows whose it is"
    late.unwant(FOO, ID)
    made.settle(late)
    assert not named.addresses(FOO) and not named.texts(FOO)


def test_another_claim_of_a_name_that_is_ours_takes_its_place(made, named):
    updater = made.updater(named.url)
    updater.want(FOO, ID)
    made.settle(updater)
    updater.unwant(FOO)
    updater.want(FOO, OTHER)
    made.settle(updater)
    assert named.texts(FOO) == {(f"sniroute={OTHER}".encode(), b"192.0.2.1")} and named.addresses(FOO) == {str(V4)}
    updater.unwant(FOO)
    made.settle(updater)
    assert not named.texts(FOO)


def test_a_server_that_is_away_holds_nobody_up_and_gets_the_newest_wishes(made, new_named):
    server = new_named()
    server.start()
    updater = made.updater(server.url)
    names = [f"n{number}.{ZONE}" for number in range(5)]
    updater.want(names[0], ID)
    updater.want(names[1], ID)
    made.settle(updater)
    server.stop()
    updater.unwant(names[0])
    for _ in range(50):
        updater.want(names[2], OTHER)
        updater.unwant(names[2])
        updater.want(names[3], OTHER)
        updater.want(names[3], ID)
    assert len(updater.entries) == 4
    made.turn_until(lambda: updater.state.failures.get("unreachable", 0) > 3)
    assert updater.state[:4] == (2, 1, 3, 0) and updater.state.failure.reason == "unreachable"
    assert updater.tell_of(names[3]).startswith(
        "its record in DNS waits for its turn: the DNS server cannot be reached (")
    server.start()
    made.settle(updater)
    assert [server.addresses(name) for name in names] == [set(), {str(V4)}, set(), {str(V4)}, set()]
    assert server.texts(names[3]) == {(f"sniroute={ID}".encode(), b"192.0.2.1")}
    assert [level for level, _ in made.told] == [logging.WARNING, logging.INFO], "an outage is told twice, not each try"
    assert made.lines == [
        f"DNS records of {ZONE} at {HOST}:{server.port} are not written: the DNS server cannot be reached "
        "(Connection refused); what waits is tried again",
        f"DNS records of {ZONE} at {HOST}:{server.port} are written again"]


def test_a_server_that_stands_still_does_later_what_it_has_in_its_queue(made, new_named, impatient, monkeypatch):
    """BIND answers queries at once when it goes on, and does updates then."""
    monkeypatch.setattr(sniroute_rfc2136, "RESTS", (1.0, 1.0))
    server = new_named()
    server.start()
    updater = made.updater(server.url)
    server.process.send_signal(signal.SIGSTOP)
    updater.want(FOO, ID)
    made.turn_until(lambda: updater.state.failures.get("timeout"))
    updater.unwant(FOO)
    updater.want(f"bar.{ZONE}", ID)
    made.turn_until(lambda: any(flight.act == "look up" for flight in updater.flights.values()))
    server.process.send_signal(signal.SIGCONT)
    made.settle(updater)
    assert not server.texts(FOO) and server.addresses(f"bar.{ZONE}") == {str(V4)}


@pytest.mark.parametrize("key, zone, word, told", [
    (Key("router", b"another secret of ours"), ZONE, "badsig", "BADSIG"),
    (Key("nobody", KEY.secret), ZONE, "badkey", "BADKEY"),
    (KEYS["guest"], ZONE, "refused", "REFUSED"),
    (KEY, "example.org", "notauth", "NOTAUTH"),
], ids=["secret", "key", "rights", "zone"])
def test_a_server_that_does_not_do_it_is_told_in_words_and_tried_again(made, named, key, zone, word, told):
    updater = made.updater(named.url.replace(ZONE, zone).replace("router", key.name), key)
    updater.want(f"foo.{zone}", ID)
    made.turn_until(lambda: updater.state.failures.get(word, 0) > 1)
    (line,) = made.lines
    assert line.partition(" not written: ")[2].startswith(f"{REASONS[word]} ({HOST}:{named.port}: {told})")
    assert updater.state.pending == 1 and not named.texts(f"foo.{ZONE}")
    assert str(key.secret) not in line and not updater.state.kept


@pytest.mark.parametrize("difference", [-4001, 3999], ids=["-4000", "4000"])
def test_clocks_that_differ_are_told_and_the_servers_is_used(made, named, difference):
    """The server's time is of a whole second, and a moment old when it comes."""
    updater = made.updater(named.url, clock=lambda: time.time() + difference)
    for number in range(20):
        updater.want(f"n{number}.{ZONE}", ID)
    made.settle(updater)
    assert updater.state.kept == 20 and updater.state.failures == {}
    (line,) = made.lines
    assert re.fullmatch("the clock of this host and that of the DNS server of .* differ by (4000|4001|3999) s: its "
                        "updates are signed with the server's time; set the clock that is wrong", line)
    for number in range(20):
        updater.unwant(f"n{number}.{ZONE}")
    made.settle(updater)
    assert len(made.told) == 1


def test_many_names_at_once(made, named):
    updater = made.updater(named.url)
    names = [f"many-{number}.{ZONE}" for number in range(40)]
    for name in names:
        updater.want(name, ID)
    made.turn_until(lambda: updater.state.kept)
    assert len(updater.flights) <= sniroute_rfc2136.WINDOW
    made.settle(updater)
    assert all(named.addresses(name) == {str(V4)} for name in names)
    for name in names:
        updater.unwant(name)
    made.settle(updater)
    assert not any(named.addresses(name) for name in names) and not updater.entries


def test_a_host_that_nobody_else_can_reach_by_the_address_in_use_needs_one_named(made, named):
    updater = made.updater(named.url.partition("&")[0])
    updater.want(FOO, ID)
    made.turn_until(lambda: updater.state.failures.get("address"))
    assert "from an address that nobody else can use: name one with &address= (127.0.0.1)" in made.lines[0]


# -- with the stand-in -------------------------------------------------------------------------


def test_a_name_that_is_released_is_gone_though_its_claim_was_late(made, server, impatient):
    """A slow server says that nothing is there, and writes it then."""
    server.is_slow = True
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.turn_until(lambda: updater.state.failures.get("timeout"))
    updater.unwant(FOO)
    made.turn_until(lambda: updater.state.done["look up"])
    server.is_slow = False
    for message in server.late:
        server.update(message)
    assert server.has(FOO, ID) and updater.state.pending == 1
    made.settle(updater)
    assert not server.records[FOO] and updater.state.done["remove"] == 1


@pytest.mark.parametrize("wishes", ["unwant", "want, unwant"])
def test_a_late_claim_is_looked_for_again_whatever_is_wished_meanwhile(made, server, impatient, monkeypatch, wishes):
    """Between the look that has found nothing and the second one, which is still to be had then."""
    monkeypatch.setattr(sniroute_rfc2136, "RESTS", (0.3, 0.3))
    server.is_slow = True
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.turn_until(lambda: updater.state.failures.get("timeout"))
    updater.unwant(FOO, ID)
    made.turn_until(lambda: updater.state.done["look up"])
    if wishes != "unwant":
        updater.want(FOO, ID)
    updater.unwant(FOO, ID)
    made.turn_until(lambda: not updater.ready and not updater.flights)
    server.is_slow = False
    for message in server.late:
        server.update(message)
    made.settle(updater)
    assert not server.records[FOO] and updater.state.done["remove"] == 1


def test_what_is_lost_is_sent_again(made, server, monkeypatch):
    monkeypatch.setattr(sniroute_rfc2136, "SENDS", (0.05, 0.05, 5.0))  # the last one gets its answer
    lost = iter([True, True])
    server.lost = lambda: next(lost, False)
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.settle(updater)
    assert server.has(FOO, ID) and updater.state.done["claim"] == 1 and not made.told


def test_an_answer_that_is_lost_is_no_stranger_on_the_name(made, server, impatient):
    """The name is in use, because it was written before: by us."""
    lost = iter([True])
    server.answer_lost = lambda: next(lost, False)
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.settle(updater)
    assert server.has(FOO, ID) and updater.state.done == {"claim": 0, "replace": 1, "remove": 0, "look up": 1}
    assert not made.told and updater.state.failures == {}


def test_a_removal_whose_answer_is_lost_is_done(made, server, impatient):
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.settle(updater)
    lost = iter([True])
    server.answer_lost = lambda: next(lost, False)
    updater.unwant(FOO)
    made.settle(updater)
    assert not server.records[FOO] and not made.told and not updater.entries


def test_what_was_done_though_the_server_seemed_to_be_away_is_no_quarrel(made, server, impatient):
    """The mark was asked for, then replaced; no answer said so, and now it is not as it was."""
    lost = iter([True, False, False])
    server.answer_lost = lambda: next(lost, True)
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.turn_until(lambda: updater.losses)
    server.records[FOO] = {(TXT, text_data((b"a human's",))), *server.records[FOO]}
    server.answer_lost = lambda: False
    made.settle(updater)
    assert updater.state.failures == {"timeout": 1} and server.has(FOO, ID)


@pytest.mark.parametrize("wish", ["another", "none"])
def test_a_wish_that_comes_while_the_one_before_is_under_way(made, server, wish):
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.turn_until(lambda: updater.flights)
    if wish == "another":
        updater.want(FOO, OTHER)
    else:
        updater.unwant(FOO)
    made.settle(updater)
    assert not server.has(FOO, ID) and server.has(FOO, OTHER) == (wish == "another")
    assert updater.state.done == {"claim": 1, "replace": wish == "another", "remove": wish == "none", "look up": 0}


def test_the_default_address_is_the_one_that_reaches_the_server(made, server, monkeypatch):
    monkeypatch.setattr(sniroute_rfc2136, "parse_ip", lambda text: ipaddress.ip_address({HOST: "192.0.2.1"}[text]))
    updater = made.updater(server.url.partition("&")[0])
    updater.want(FOO, ID)
    made.settle(updater)
    assert server.has(FOO, ID)


def test_an_answer_that_is_cut_is_asked_for_by_tcp(made, server):
    server.listen()
    server.is_cut = True
    server.forge = lambda answer, message: [answer, answer]
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.settle(updater)
    assert server.has(FOO, ID) and server.by_tcp == 3, "the claim, which was done already; the look-up; the mark again"


@pytest.mark.parametrize("says, reason, detail", [
    (None, "unreachable", "by TCP: Connection refused"),
    (lambda answer: b"", "reset", "by TCP: before the end of its answer"),
    (lambda answer: dns.frame(answer)[:-1], "reset", "by TCP: before the end of its answer"),
    (lambda answer: dns.frame(answer[:-1]), "answer", "by TCP: a record that is cut"),
    (lambda answer: dns.frame(answer[:-7] + bytes(7)), "answer", "by TCP: "),
    (lambda answer: RESET, "reset", "by TCP: Connection reset by peer"),
    (lambda answer: b"\0\0", "answer", "by TCP: a DNS message that is cut"),
    (lambda answer: None, "timeout", "claim"),
], ids=["refused", "closed", "cut", "shorter", "forged", "reset", "empty", "silent"])
def test_tcp_that_fails_is_tried_again(made, server, impatient, monkeypatch, says, reason, detail):
    if reason != "timeout":
        monkeypatch.setattr(sniroute_rfc2136, "TCP_LAST", 10.0)
    server.is_cut = True
    if says is not None:
        server.listen()
        server.tcp_says = says
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.turn_until(lambda: made.told)
    assert updater.state.failure.reason == reason and str(updater.state.failure).startswith(detail)
    server.is_cut = False
    made.settle(updater)
    assert server.has(FOO, ID) and updater.state.failure is None


def test_what_proves_nothing_is_not_believed_and_what_comes_behind_it_is(made, server):
    def forge(answer: bytes, message: dns.Message) -> list[bytes]:
        wrong = Key("router", b"x" * 32)
        unsigned = dns.Writer(message.number, dns.RESPONSE | message.opcode << 11, (0, 0, 0, 0)).out
        return [b"", b"nonsense", bytes(unsigned), server.make(message, key=wrong), answer[:-1], answer, answer]

    server.forge = forge
    server.code = iter([dns.YXDOMAIN, *[dns.NOERROR] * 9]).__next__
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.settle(updater)
    assert server.has(FOO, ID) and updater.state.done["look up"] == 1, "the forged ones said that the claim was done"


def test_unsigned_success_is_no_answer(made, server, impatient):
    server.forge = lambda answer, message: [bytes(dns.Writer(message.number, dns.RESPONSE | message.opcode << 11,
                                                             (0, 0, 0, 0)).out)]
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.turn_until(lambda: updater.state.failures.get("timeout"))
    assert not updater.state.kept and updater.state.last_contact is None


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 16, 17, 22])
def test_each_refusal_is_told_and_tried_again(made, server, code):
    codes = iter([code] * 4)
    server.code = lambda: next(codes, dns.NOERROR)
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.turn_until(lambda: made.told)
    (line,) = made.lines
    word = next(word for word, sentence in REASONS.items() if f": {sentence} (" in line)
    assert word == dns.Answer(code, False, (), 0).reason and f": {dns.RCODES.get(code, f'RCODE {code}')})" in line
    assert (updater.state.failure is not None) == (word in SERVER_FAILURES) == (updater.state.failed == 0)
    made.settle(updater)
    assert server.has(FOO, ID) and updater.state.failed == 0 and updater.state.failure is None


def test_a_name_with_more_texts_than_a_message_takes_is_told_and_left(made, server):
    """They can be told in an answer, but not asked for in an update with what is to be removed."""
    server.listen()
    updater = made.updater(f"{server.url},2001:db8::1,2001:db8::2")
    updater.want(FOO, ID)
    made.settle(updater)
    his = [(TXT, text_data((b"%03d" % number + b"x" * 252,))) for number in range(243)]
    server.records[FOO].update(his, [(TXT, text_data((b"y" * 99,)))])
    server.is_cut = True
    updater.unwant(FOO)
    made.turn_until(lambda: updater.state.failed)
    assert made.lines == [f"the DNS record of {FOO} is not removed: {REASONS['long']} (245 of them)"]
    server.records[FOO].difference_update(his)
    made.settle(updater)
    assert len(server.records[FOO]) == 1 and updater.state.failures["long"]


def test_a_server_with_another_view_for_questions_makes_no_endless_talk(made, server):
    """It says that the name is in use, and when it is asked that there is nothing; each try is four messages."""
    server.records[FOO].add((A, b"1234"))
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.turn_until(lambda: updater.state.failures.get("taken", 0) > 2)
    assert len(server.heard) <= 3 * (updater.state.failures["taken"] + 1)


def test_somebody_who_changes_the_texts_all_the_time_makes_no_endless_talk(made, server):
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.settle(updater)
    server.code = lambda: server.records[FOO].add((TXT, b"\1%c" % (len(server.heard) % 256))) or 0
    updater.unwant(FOO)
    made.turn_until(lambda: updater.state.failed)
    assert made.lines[-1] == (f"the DNS record of {FOO} is not removed: {REASONS['changed']} "
                              f"({HOST}:{server.port}: NXRRSET)")
    server.code = lambda: 0
    made.settle(updater)
    assert not server.has(FOO, ID) and len(server.records[FOO]) > 2 and (A, V4.packed) not in server.records[FOO]


def test_a_clock_that_is_set_is_found_out_again(made, server):
    """First the host's clock is wrong, then it is right."""
    wrong = 5000.0
    updater = made.updater(server.url, clock=lambda: time.time() + wrong)
    updater.want(FOO, ID)
    made.settle(updater)
    wrong = 0.0
    updater.unwant(FOO)
    made.settle(updater)
    assert [level for level, _ in made.told] == [logging.WARNING, logging.INFO]
    assert made.lines[1] == (f"the clock of this host and that of the DNS server of {ZONE} at {HOST}:{server.port} "
                             "agree again")
    assert updater.offset == 0


@pytest.mark.parametrize("between", ["lost", "an answer"])
def test_a_clock_that_is_set_before_the_server_has_done_anything_is_found_out_too(made, server, impatient, between):
    """The server told its time; then it was away, or said something else, while the host's clock was set."""
    wrong, told = 5000.0, []
    updater = made.updater(server.url, clock=lambda: time.time() + wrong)

    def lost() -> bool:
        return bool(updater.offset) and not told

    def code() -> int:
        return 5 if updater.offset and not told else dns.NOERROR  # REFUSED

    server.lost, server.code = (lost, server.code) if between == "lost" else (server.lost, code)
    updater.want(FOO, ID)
    made.turn_until(lambda: updater.state.failures.get("timeout" if between == "lost" else "refused"))
    told.append(True)
    wrong = 0.0
    made.settle(updater)
    assert server.has(FOO, ID) and updater.offset == 0


def test_a_server_that_never_agrees_about_the_time_is_left_alone(made, server):
    times = iter(range(10**9, 10**10, 1000))
    server.clock = lambda: next(times)
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    made.turn_until(lambda: updater.state.failures.get("badtime", 0) > 1)
    assert REASONS["badtime"] in made.lines[1] and updater.state.failure.reason == "badtime"


def test_after_a_failure_one_message_is_under_way_and_then_more(made, server, impatient):
    server.lost = lambda: True
    updater = made.updater(server.url)
    for number in range(30):
        updater.want(f"n{number}.{ZONE}", ID)
    made.turn_until(lambda: updater.flights)
    assert len(updater.flights) == sniroute_rfc2136.WINDOW
    made.turn_until(lambda: updater.losses == 1)
    made.turn_until(lambda: updater.flights)
    assert len(updater.flights) == 1
    server.lost = lambda: False
    made.turn_until(lambda: len(updater.flights) == sniroute_rfc2136.WINDOW)
    made.settle(updater)
    assert all(server.has(f"n{number}.{ZONE}", ID) for number in range(30))


def test_the_next_address_of_a_server_is_tried_where_one_is_away(made, server, monkeypatch):
    resolve_as(monkeypatch, lambda: [("127.0.0.2", server.port), (HOST, server.port)])
    updater = made.updater(server.url.replace(HOST, "ns.example.com", 1))
    updater.want(FOO, ID)
    made.settle(updater)
    assert server.has(FOO, ID) and updater.state.failures == {"unreachable": 1}


@pytest.mark.parametrize("error, reason", [
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "name"),
    (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), "resolver")])
def test_a_server_whose_name_does_not_resolve_is_told(made, server, monkeypatch, error, reason):
    def fail(*words: Any, **more: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", fail)
        updater = made.updater(server.url)
        updater.want(FOO, ID)
        made.turn_until(lambda: updater.state.failure)
        assert updater.state.failure.reason == reason and REASONS[reason] in made.lines[0]
    made.settle(updater)
    assert server.has(FOO, ID)


def test_a_host_without_a_way_there_says_so(made, server, monkeypatch):
    resolve_as(monkeypatch, lambda: [("255.255.255.255", server.port)])
    updater = made.updater(server.url.replace(HOST, "ns.example.com", 1))
    updater.want(FOO, ID)
    made.turn_until(lambda: updater.state.failure)
    assert updater.state.failure.reason == "unreachable"


def test_what_the_zone_does_not_hold_is_not_wished(made, server):
    updater = made.updater(server.url)
    assert not updater.want("foo.example.org", ID) and not updater.want(ZONE, ID)
    updater.unwant("foo.example.org", ID)
    updater.unwant(FOO)
    for wrong in ("", "a b", "x" * 65, "\u00e9", "a\n"):
        with pytest.raises(ValueError, match="is not an id"):
            updater.want(FOO, wrong)
    assert not updater.entries and updater.tell_of(FOO) == ""


def test_the_same_wish_again_is_no_work(made, server):
    updater = made.updater(server.url)
    for _ in range(3):
        assert updater.want(FOO, ID)
        made.settle(updater)
    assert len(server.heard) == 1 and updater.state.wanted == 1


def test_a_name_that_was_never_written_is_looked_for_before_it_is_forgotten(made, server):
    """An earlier process may have written it, with the same id."""
    for record in Mark(ID, (V4,)).records(FOO, 60):
        server.records[FOO].add((record.kind, record.data))
    updater = made.updater(server.url)
    updater.want(FOO, ID)
    updater.unwant(FOO)
    made.settle(updater)
    assert not server.records[FOO] and updater.state.done == {"claim": 0, "replace": 0, "remove": 1, "look up": 1}


def test_ids_of_a_name_are_few_however_often_it_changes_hands(made, server):
    updater = made.updater(server.url)
    for number in range(100):
        updater.want(FOO, f"{number}")
    (entry,) = updater.entries.values()
    assert list(entry.ids) == [f"{number}" for number in range(92, 100)]
    made.settle(updater)
    assert list(entry.ids) == ["99"] and server.has(FOO, "99")


@pytest.mark.parametrize("moment", ["at once", "while it resolves", "under way", "by TCP", "left alone", "kept"])
def test_it_may_be_closed_at_any_moment(made, server, impatient, moment):
    server.listen()
    server.tcp_says = lambda answer: None
    server.is_cut = moment == "by TCP"
    server.lost = lambda: moment in ("under way", "left alone")
    updater = made.updater(server.url.replace(HOST, "localhost") if moment == "while it resolves" else server.url)
    updater.want(FOO, ID)
    made.turn_until({"at once": lambda: True, "while it resolves": lambda: updater.phase != "idle",
                     "under way": lambda: updater.flights, "by TCP": lambda: server.by_tcp,
                     "left alone": lambda: updater.losses, "kept": lambda: updater.state.kept}[moment])
    heard = len(server.heard)
    updater.close()
    updater.close()
    assert not updater.want(FOO, ID) and updater.state[:4] == (0, 0, 0, 0) and updater.sock is None
    updater.unwant(FOO, ID)
    made.turn_until(lambda: not updater.way.names.waiting)
    made.loop.hurry()
    made.loop.turn()
    assert len(server.heard) == heard and updater.timer.when == NEVER


def test_a_datagram_that_the_kernel_does_not_take_is_lost_and_no_more(made, server):
    updater = made.updater(server.url)

    class Full:
        """A socket whose buffer is full, once."""

        def __init__(self, sock: socket.socket):
            self.sock = sock
            self.times = 0

        def send(self, data: bytes) -> int:
            self.times += 1
            if self.times == 1:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            return self.sock.send(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

    opened = updater._open
    updater._open = lambda: (opened(), setattr(updater, "sock", Full(updater.sock)))
    updater.want(FOO, ID)
    made.settle(updater)
    assert server.has(FOO, ID) and not made.told


# -- anything, in any order --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_the_last_wish_is_what_is_there_and_no_human_loses_a_record(made, server, monkeypatch, seed):
    """Messages and answers are lost, the server fails, a human writes and removes, a router starts anew."""
    monkeypatch.setattr(sniroute_rfc2136, "SENDS", (0.002, 0.002))
    monkeypatch.setattr(sniroute_rfc2136, "AGAIN", (0.001, 0.002))
    monkeypatch.setattr(sniroute_rfc2136, "RESTS", (0.001, 0.002))
    randoms = random.Random(seed)
    server.listen()
    server.lost = lambda: randoms.random() < 0.15
    server.answer_lost = lambda: randoms.random() < 0.15
    server.code = lambda: randoms.choice((0, 0, 0, 0, 0, 0, 2, 5, 17))
    names = [f"n{number}.{ZONE}" for number in range(8)]
    wishes: dict[str, str] = {}
    updater = made.updater(server.url)
    for _ in range(1500):
        name, choice = randoms.choice(names), randoms.random()
        if choice < 0.35:
            wishes[name] = randoms.choice((ID, OTHER))
            updater.want(name, wishes[name])
        elif choice < 0.65:
            wishes.pop(name, None)
            updater.unwant(name)
        elif choice < 0.75:
            row = randoms.choice(((A, bytes((192, 0, 2, 200))), (TXT, text_data((b"v=%d" % randoms.randrange(3),)))))
            server.records[name].add(row)
            server.protected.add((name, *row))
        elif choice < 0.9:
            for row in [row for row in server.protected if row[0] == name]:
                server.protected.discard(row)
                server.records[name].discard(row[1:])
        elif choice < 0.91:  # it starts anew, and is told which ids were in use
            updater.close()
            updater = made.updater(server.url)
            for each in names:
                updater.unwant(each, ID)
                updater.unwant(each, OTHER)
                if each in wishes:
                    updater.want(each, wishes[each])
        server.is_cut = randoms.random() < 0.1
        made.loop.hurry()
        made.loop.turn()
    server.lost = server.answer_lost = lambda: False
    server.code = lambda: 0
    for name, *row in list(server.protected):
        assert tuple(row) in server.records[name]
        server.records[name].discard(tuple(row))
    made.settle(updater)
    for name in names:
        ours = {(record.kind, record.data) for record in Mark(wishes[name], (V4,)).records(name, 60)} if (
            name in wishes) else set()
        assert server.records[name] == ours, (name, wishes.get(name))
    assert updater.state.wanted == updater.state.kept == len(wishes) and updater.state.failed == 0
