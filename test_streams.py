"""Tests of sniroute_streams.py: both ends over real sockets, the original's ways to end, other programs."""

from __future__ import annotations

import random
import shutil
import socket
import ssl
import struct
import subprocess
import traceback

import pytest

import sniroute_streams
from conftest import HOST
from sniroute_h2 import CANCEL, H2, INTERNAL_ERROR, NO_ERROR, STREAM_CLOSED, Answered, Data, Ended, Opened, Reset
from sniroute_http2 import GOAWAY, PING, make_frame
from sniroute_layers import Plain, Secure, Wires
from sniroute_loop import READ, Loop, Watch, monotonic
from sniroute_refusals import Failed
from sniroute_streams import HELLO, OPEN, REQUEST, H2Client, H2Server, Streams, StreamWire

NOISE = random.Random(5).randbytes(6 << 20)
ID = b"\1\2\3\4"
POST = [(b":authority", b"none"), *REQUEST]
OK = [(b":status", b"200")]


class Owner:
    """Whoever has a wire: what it was told."""

    def __init__(self, wire: StreamWire):
        self.wire = wire
        self.heard = bytearray()
        self.ends: list[Failed | None] = []
        self.rooms = 0
        wire.on_data, wire.on_end, wire.on_room = self.hear, self.ends.append, self.room

    def hear(self, data):
        assert len(data) and self.ends == []
        self.heard += data

    def room(self):
        self.rooms += 1


class ServerSecure(Secure):
    """The server's side of TLS."""

    __slots__ = ()

    def __init__(self, below, context):
        super().__init__(below, ssl.create_default_context(), HOST)
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)


class Counted:
    """A wire whose writes are kept, too."""

    def __init__(self, wire):
        self.wire = wire
        self.writes: list[bytes] = []

    def __getattr__(self, name):
        return getattr(self.wire, name)

    def send(self, data):
        self.writes.append(bytes(data))
        self.wire.send(data)


class Far:
    """The other end of a connection as a socket with an H2, whose every word is the test's."""

    def __init__(self, sock: socket.socket, is_client: bool):
        self.sock = sock
        self.h2 = H2(is_client)
        self.reads = True
        self.events: list = []
        self.heard: dict[int, bytearray] = {}
        self.said = bytearray()  # all bytes that have come

    def turn(self) -> None:
        """Say what there is to be said, and hear."""
        self.sock.setblocking(False)
        try:
            self.sock.sendall(self.h2.data_to_send())
            while data := self.sock.recv(1 << 20):
                self.said += data
                for event in self.h2.feed(data):
                    if isinstance(event, Data):
                        self.heard.setdefault(event.stream.id, bytearray()).extend(event.data)
                        if self.reads:
                            self.h2.consume(event.stream, len(event.data))
                    else:
                        self.events.append(event)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass
        self.sock.setblocking(True)


class Turner:
    """A loop that turns in `until`, in the test's own thread, with connections in it."""

    def __init__(self):
        self.faults: list[str] = []
        self.loop = Loop(lambda owner: self.faults.append(traceback.format_exc()))
        self.tick = self.loop.timer(lambda: None)
        self.wires, self.streams = Wires(self.loop), Streams(self.loop)
        self.streams.lingering.seconds = 60.0  # a busy host may let us wait for longer than that usually is
        self.carriers, self.fars = [], []
        self.arrived: list[Owner] = []
        self.ended: list[tuple[object, Failed]] = []

    def until(self, predicate, timeout: float = 10.0, what: str = ""):
        deadline = monotonic() + timeout
        while True:
            assert self.faults == [], self.faults[0]
            for far in self.fars:
                far.turn()
            if result := predicate():
                return result
            assert monotonic() < deadline, f"not within {timeout:g} s: {what or predicate}"
            self.tick.set(monotonic() + 0.002)
            self.loop.turn()

    def settle(self) -> None:
        """Turn until all that was said has been heard."""
        for _ in range(20):
            for far in self.fars:
                far.turn()
            self.tick.set(monotonic() + 0.0005)
            self.loop.turn()
        assert self.faults == [], self.faults[0]

    def wire(self, sock) -> Plain:
        sock.setblocking(False)
        return Plain(self.wires, sock)

    def arrive(self, wire: StreamWire) -> None:
        self.arrived.append(Owner(wire))
        wire.send(ID)

    def client(self, wire, **more) -> H2Client:
        self.carriers.append(H2Client(self.streams, wire, "none", lambda failed: self.ended.append(("client", failed)),
                                      **more))
        return self.carriers[-1]

    def server(self, wire, **more) -> H2Server:
        more.setdefault("arrived", self.arrive)
        self.carriers.append(H2Server(self.streams, wire, ended=lambda failed: self.ended.append(("server", failed)),
                                      **more))
        return self.carriers[-1]

    def both(self, tls=None, **more) -> tuple[H2Client, H2Server]:
        """The two ends of a connection."""
        wires = [self.wire(sock) for sock in socket.socketpair()]
        if tls is not None:
            wires = [Secure(wires[0], tls[0], HOST), ServerSecure(wires[1], tls[1])]
            shaken: list = []
            for wire in wires:
                wire.shake(shaken.append, lambda session: None)
            assert self.until(lambda: len(shaken) == 2 and shaken) == [None, None]
        return self.client(wires[0]), self.server(wires[1], **more)

    def far(self, is_client: bool, **more) -> tuple[Far, H2Client | H2Server]:
        """One end of a connection, whose other one is the test's."""
        ours, theirs = socket.socketpair()
        self.fars.append(Far(theirs, is_client))
        return self.fars[-1], (self.server if is_client else self.client)(self.wire(ours), **more)

    def open(self, client: H2Client) -> tuple[Owner, Owner]:
        """A stream, as both of its owners have it; its id has been heard."""
        count, got = len(self.arrived), []
        client.open(lambda wire: got.append(Owner(wire)))
        ours = self.until(lambda: got)[0]
        self.until(lambda: len(ours.heard) == len(ID))
        assert ours.heard == ID and len(self.arrived) == count + 1
        ours.heard.clear()
        return ours, self.arrived[-1]

    def close(self) -> None:
        for carrier in self.carriers:
            carrier.close()
        for far in self.fars:
            far.sock.close()
        self.wires.close()
        self.loop.close()
        assert self.faults == [], self.faults[0]


@pytest.fixture
def turner():
    made = Turner()
    yield made
    made.close()


@pytest.fixture
def tls(certificates):
    """The contexts of client and server."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificates / "edge.pem", certificates / "edge.key")
    return ssl.create_default_context(cafile=certificates / "ca.pem"), server_side


# -- bytes -------------------------------------------------------------------------------------


def test_bytes_pass_both_ways_over_tls(turner, tls):
    client, _ = turner.both(tls)
    ours, theirs = turner.open(client)
    for owner, data in ((ours, NOISE), (theirs, NOISE[::-1])):
        owner.wire.send(data)
        owner.wire.finish()
    turner.until(lambda: ours.ends == theirs.ends == [None])
    assert ours.heard == NOISE[::-1] and theirs.heard == NOISE
    assert not ours.wire.is_open and not theirs.wire.is_open, "both directions are over"
    assert client.h2.held == 0 and not client.h2.streams


@pytest.mark.parametrize("first", [0, 1], ids=["client", "server"])
def test_one_direction_ends_and_the_other_goes_on(turner, first):
    client, _ = turner.both()
    pair = turner.open(client)
    one, other = pair[first], pair[1 - first]
    one.wire.send(b"request")
    one.wire.finish()
    turner.until(lambda: other.ends)
    assert other.heard == b"request" and other.wire.is_open and one.wire.is_open and one.ends == []
    one.wire.send(b"too late")
    other.wire.send(NOISE)
    other.wire.finish()
    turner.until(lambda: one.ends)
    assert one.heard == NOISE and one.ends == [None] == other.ends and other.heard == b"request"
    assert not one.wire.is_open and not other.wire.is_open


def test_a_view_is_not_kept(turner):
    client, _ = turner.both()
    ours, theirs = turner.open(client)
    buffer = bytearray(NOISE[:1 << 19])
    for at in range(0, len(NOISE), len(buffer)):
        buffer[:] = NOISE[at:at + len(buffer)]
        ours.wire.send(memoryview(buffer))
        buffer[:] = bytes(len(buffer))
    turner.until(lambda: len(theirs.heard) == len(NOISE))
    assert theirs.heard == NOISE


@pytest.mark.parametrize("down", [True, False])
def test_a_paused_wire_stops_its_peer_and_nobody_else(turner, down):
    client, _ = turner.both()
    pair, others = turner.open(client), turner.open(client)
    source, sink = pair[::-1] if down else pair
    sink.wire.pause()
    source.wire.send(NOISE)
    source.wire.finish()
    window = (4 if down else 1) << 20
    turner.until(lambda: sum(map(len, sink.wire.inbox)) > window - 100)
    turner.settle()
    assert sum(map(len, sink.wire.inbox)) <= window and sink.heard == b""
    assert len(NOISE) - window <= source.wire.unsent < len(NOISE) - window + 100 and source.rooms == 0
    others[0].wire.send(b"hello")
    others[1].wire.send(b"hello")
    turner.until(lambda: others[0].heard == others[1].heard == b"hello")
    sink.wire.resume()
    assert sink.heard == b"", "no callback before it returns"
    turner.until(lambda: sink.ends)
    assert sink.heard == NOISE and sink.ends == [None] and source.rooms == 1 and source.wire.unsent == 0


def test_an_end_behind_a_pause_is_told_behind_the_bytes(turner):
    client, _ = turner.both()
    ours, theirs = turner.open(client)
    theirs.wire.pause()
    ours.wire.send(b"last words")
    ours.wire.finish()
    turner.settle()
    assert theirs.heard == b"" and theirs.ends == []
    theirs.wire.resume()
    turner.until(lambda: theirs.ends)
    assert theirs.heard == b"last words"


def test_one_that_pauses_while_it_is_told_hears_no_more(turner):
    client, _ = turner.both()
    ours, theirs = turner.open(client)
    theirs.wire.pause()
    ours.wire.send(NOISE[:1 << 20])
    turner.settle()
    theirs.wire.on_data = lambda data: (theirs.hear(data), theirs.wire.pause())
    theirs.wire.resume()
    turner.settle()
    heard = len(theirs.heard)
    assert 0 < heard < 1 << 20
    while len(theirs.heard) < 1 << 20:
        theirs.wire.resume()
        turner.settle()
    assert theirs.heard == NOISE[:1 << 20]


def test_bulk_does_not_stand_between_another_stream_and_the_wire(turner):
    client, _ = turner.both()
    bulk, small = turner.open(client), turner.open(client)
    bulk[1].wire.send(NOISE * 4)
    small[1].wire.send(b"hello")
    turner.until(lambda: small[0].heard == b"hello")
    assert bulk[1].wire.unsent > len(NOISE)
    turner.until(lambda: len(bulk[0].heard) == 4 * len(NOISE))
    assert bulk[0].heard == NOISE * 4


def test_many_streams_share_the_connection(turner):
    client, _ = turner.both()
    pairs = [turner.open(client) for _ in range(20)]
    for _, theirs in pairs:
        theirs.wire.send(NOISE[:1 << 20])
    turner.until(lambda: min(len(ours.heard) for ours, _ in pairs) >= 1 << 19)
    assert sum(len(ours.heard) == 1 << 20 for ours, _ in pairs) < 10, "in turn, not one after another"
    turner.until(lambda: all(len(ours.heard) == 1 << 20 for ours, _ in pairs))
    assert all(ours.heard == NOISE[:1 << 20] for ours, _ in pairs)


def test_what_is_said_in_one_turn_is_one_write(turner):
    far, server = turner.far(True)
    for _ in range(8):
        far.h2.send(far.h2.open(POST), HELLO)
    turner.until(lambda: len(turner.arrived) == 8)
    turner.settle()
    server.wire = Counted(server.wire)
    for owner in turner.arrived:
        owner.wire.send(b"hello")
    turner.loop.turn()
    assert len(server.wire.writes) == 1
    turner.until(lambda: sum(data == ID + b"hello" for data in far.heard.values()) == 8)


def test_random_conversations_arrive_whole(turner):
    """Sends, pauses, ends in any order on forty streams; each stream has what was sent, and its end."""
    rng = random.Random(11)
    client, _ = turner.both()
    pairs = [turner.open(client) for _ in range(40)]
    sent = {owner: bytearray() for pair in pairs for owner in pair}
    alive = list(sent)
    while alive:
        owner = rng.choice(alive)
        act = rng.randrange(12)
        if act < 6:
            at = rng.randrange(len(NOISE) - 300000)
            piece = NOISE[at:at + rng.choice((1, 100, 5000, 300000))]
            sent[owner] += piece
            owner.wire.send(piece)
        elif act < 8:
            owner.wire.pause()
        elif act < 10:
            owner.wire.resume()
        elif act == 10:
            owner.wire.finish()
            alive.remove(owner)
        else:
            turner.loop.hurry()
            turner.loop.turn()
    for owner in sent:
        owner.wire.resume()
    turner.until(lambda: all(owner.ends for owner in sent), 20)
    for ours, theirs in pairs:
        assert ours.heard == sent[theirs] and theirs.heard == sent[ours] and ours.ends == theirs.ends == [None]
    assert all(carrier.h2.held == 0 and not carrier.h2.streams for carrier in turner.carriers)


# -- ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["client", "server"])
def test_a_reset_breaks_the_other_side(turner, which):
    client, _ = turner.both()
    pair = turner.open(client)
    pair[which].wire.send(b"something")
    pair[which].wire.reset()
    turner.until(lambda: pair[1 - which].ends)
    (failed,) = pair[1 - which].ends
    assert failed.reason == "reset" and not pair[1 - which].wire.is_open and pair[which].ends == []


@pytest.mark.parametrize("which", [0, 1], ids=["client", "server"])
def test_a_closed_wire_sends_what_is_unsent_and_lets_the_other_side_end(turner, which):
    client, _ = turner.both()
    pair = turner.open(client)
    one, other = pair[which], pair[1 - which]
    one.wire.send(NOISE)
    one.wire.close()
    one.wire.close()
    turner.until(lambda: other.ends)
    assert other.heard == NOISE and other.ends == [None] and other.wire.is_open
    other.wire.finish()
    turner.until(lambda: not client.h2.streams)
    turner.settle()
    assert other.ends == [None] and not other.wire.is_open and one.ends == []
    assert not turner.streams.lingering.due and not turner.streams.closing.due


def test_what_comes_for_a_closed_wire_resets_it(turner):
    client, _ = turner.both()
    ours, theirs = turner.open(client)
    ours.wire.close()
    turner.until(lambda: theirs.ends)
    theirs.wire.send(b"nobody reads this")
    turner.until(lambda: theirs.ends[1:])
    assert theirs.ends[0] is None and theirs.ends[1].reason == "reset" and str(STREAM_CLOSED) in str(theirs.ends[1])


def test_a_closed_stream_does_not_wait_for_ever_for_the_other_side(turner):
    turner.streams.lingering.seconds = 0.02
    client, server = turner.both()
    ours, theirs = turner.open(client)
    ours.wire.close()
    turner.until(lambda: theirs.ends and not client.h2.streams and not server.h2.streams)
    assert theirs.ends == [None] and theirs.wire.is_open, "it has not ended yet, and hears of it when it sends"
    theirs.wire.send(b"late")
    turner.until(lambda: theirs.ends[1:])
    assert theirs.ends[1].reason == "reset"


def test_a_closed_stream_whose_peer_takes_nothing_is_closed_in_the_end(turner):
    turner.streams.closing.seconds = 0.02
    client, _ = turner.both()
    ours, theirs = turner.open(client)
    theirs.wire.pause()
    ours.wire.send(NOISE)
    turner.settle()
    ours.wire.close()
    turner.until(lambda: not client.h2.streams)
    theirs.wire.resume()
    turner.until(lambda: theirs.ends)
    assert theirs.ends[0].reason == "reset"


def test_a_connection_that_is_lost_breaks_its_streams(turner):
    client, server = turner.both()
    pairs = [turner.open(client) for _ in range(3)]
    got: list = []
    whole = pairs[2][0]  # it has an end behind a pause
    whole.wire.pause()
    pairs[2][1].wire.send(b"all of it")
    pairs[2][1].wire.finish()
    turner.settle()
    server.wire.reset()
    client.open(got.append)
    turner.until(lambda: turner.ended and got)
    assert [type(one) for one in (got[0], *pairs[0][0].ends, *pairs[1][0].ends)] == [Failed] * 3
    assert [name for name, _ in turner.ended] == ["client"]
    whole.wire.resume()
    turner.until(lambda: whole.ends[1:])
    assert whole.heard == b"all of it" and whole.ends[0] is None and isinstance(whole.ends[1], Failed)
    client.open(got.append)
    assert got[1].reason == "busy"


def test_a_connection_that_is_closed_says_go_away(turner):
    far, server = turner.far(True)
    far.h2.send(far.h2.open(POST), HELLO)
    turner.until(lambda: turner.arrived)
    server.close()
    server.close()
    turner.until(lambda: any(type(event).__name__ == "GoneAway" for event in far.events))
    assert [failed.reason for failed in turner.arrived[0].ends] == ["closed"] and turner.ended == []


def test_a_peer_that_breaks_a_rule_hears_why(turner):
    far, _ = turner.far(True)
    far.h2.out += make_frame(PING, bytes(7))
    turner.until(lambda: turner.ended)
    turner.settle()
    assert turner.ended[0][1].reason == "broken" and "HTTP/2" in str(turner.ended[0][1])
    (gone,) = [event for event in far.events if type(event).__name__ == "GoneAway"]
    assert gone.code == 6 and "7 bytes" in gone.words


def test_one_that_asks_and_never_reads_the_answers_is_dropped(turner, monkeypatch):
    monkeypatch.setitem(sniroute_streams.H2.__init__.__globals__["FLOODS"], "PING", 1 << 30)
    far, server = turner.far(True)
    turner.settle()
    turner.fars.clear()
    turner.carriers.append(far.sock)  # closed at the end
    far.sock.setblocking(False)
    pings = make_frame(PING, bytes(8)) * 1000

    def ask():
        try:
            far.sock.send(pings)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass
        return turner.ended

    turner.until(ask)
    assert "does not read" in str(turner.ended[0][1])
    far.sock.close()


# -- the original's ways -----------------------------------------------------------------------


def test_a_client_that_ends_by_cancel_has_ended(turner):
    far, server = turner.far(True)
    stream = far.h2.open(POST)
    far.h2.send(stream, HELLO + b"all of it")
    turner.until(lambda: far.heard)
    far.h2.reset(stream, CANCEL)
    turner.until(lambda: turner.arrived[0].ends)
    owner = turner.arrived[0]
    assert owner.heard == b"all of it" and owner.ends == [None] and owner.wire.is_open
    owner.wire.finish()
    assert not owner.wire.is_open and not server.h2.streams
    turner.settle()
    assert owner.ends == [None]


def test_a_client_that_ends_by_cancel_is_heard_out_behind_a_pause(turner):
    far, _ = turner.far(True)
    stream = far.h2.open(POST)
    far.h2.send(stream, HELLO)
    owner = turner.until(lambda: turner.arrived)[0]
    owner.wire.pause()
    far.h2.send(stream, b"all of it")
    far.h2.reset(stream, NO_ERROR)
    turner.settle()
    assert owner.ends == []
    owner.wire.resume()
    turner.until(lambda: owner.ends)
    assert owner.heard == b"all of it" and owner.ends == [None]


def test_what_is_sent_to_one_that_has_cancelled_breaks_off(turner):
    far, _ = turner.far(True)
    stream = far.h2.open(POST)
    far.h2.send(stream, HELLO)
    owner = turner.until(lambda: turner.arrived)[0]
    far.h2.reset(stream, CANCEL)
    turner.until(lambda: owner.ends)
    owner.wire.send(b"an endless answer")
    assert owner.ends == [None], "no callback before it returns"
    turner.until(lambda: owner.ends[1:])
    assert owner.ends[1].reason == "reset" and not owner.wire.is_open


@pytest.mark.parametrize("code, unsent", [(CANCEL, True), (INTERNAL_ERROR, False), (STREAM_CLOSED, True)])
def test_a_reset_that_cannot_be_an_end_is_a_break(turner, code, unsent):
    far, _ = turner.far(True)
    stream = far.h2.open(POST)
    far.h2.send(stream, HELLO)
    owner = turner.until(lambda: turner.arrived)[0]
    if unsent:
        owner.wire.send(NOISE + NOISE[:1 << 20])  # more than the window
        turner.settle()
        assert owner.wire.unsent
    far.h2.reset(stream, code)
    turner.until(lambda: owner.ends)
    assert owner.ends[0].reason == "reset" and owner.wire.unsent == 0


def test_a_server_that_never_ends_a_stream_has_ended_it_behind_us(turner):
    turner.streams.grace.seconds = 60.0
    far, client = turner.far(False, ends=False)
    got: list = []
    client.open(lambda wire: got.append(Owner(wire)))
    turner.until(lambda: far.h2.streams)
    stream = far.h2.streams[1]
    far.h2.head(stream, OK)
    far.h2.send(stream, ID + b"hello")
    owner = turner.until(lambda: got)[0]
    turner.until(lambda: owner.heard == ID + b"hello")
    owner.wire.finish()
    turner.until(lambda: Ended(stream) in far.events)
    far.h2.send(stream, b", still")
    turner.until(lambda: owner.heard == ID + b"hello, still")
    assert owner.ends == [] and [*turner.streams.grace.due] == [owner.wire]
    turner.streams.grace.seconds = 0.05
    turner.streams.grace.put(owner.wire)
    turner.until(lambda: owner.ends)
    assert owner.heard == ID + b"hello, still" and owner.ends == [None] and not owner.wire.is_open
    turner.until(lambda: Reset(stream, CANCEL) in far.events)
    assert far.heard[1] == HELLO and not client.h2.streams


@pytest.mark.parametrize("reader", ["has left", "is slow"])
def test_a_server_that_leaves_a_stream_without_a_word_is_noticed_when_we_send(turner, reader):
    turner.streams.pinging.seconds = 0.02
    far, client = turner.far(False, ends=False)
    far.h2.role = far.h2.role._replace(grown=1 << 20)  # as the original's
    if reader == "is slow":
        far.h2.used = -1 << 40  # it gives back neither window
    got: list = []
    client.open(lambda wire: got.append(Owner(wire)))
    turner.until(lambda: far.h2.streams)
    stream = far.h2.streams[1]
    far.reads = False
    far.h2.head(stream, OK)
    owner = turner.until(lambda: got)[0]
    turner.streams.pinging.put(client)
    owner.wire.send(NOISE[:200000])
    turner.until(lambda: far.said.count(make_frame(PING, bytes(8))) > 5 or owner.ends)
    assert owner.ends == []  # it may be read yet
    owner.wire.send(NOISE[:3 << 20])
    if reader == "is slow":
        pings = far.said.count(make_frame(PING, bytes(8)))
        turner.until(lambda: far.said.count(make_frame(PING, bytes(8))) > pings + 5)
        assert owner.ends == [] and owner.wire.unsent
    else:
        turner.until(lambda: owner.ends)
        assert "has left" in str(owner.ends[0])
        turner.until(lambda: Reset(stream, CANCEL) in far.events)


def test_what_a_client_asks_is_what_the_original_asks(turner):
    far, client = turner.far(False)
    client.open(lambda wire: None)
    (opened,) = turner.until(lambda: [event for event in far.events if isinstance(event, Opened)])
    assert dict(opened.fields) == {
        b":authority": b"none", b":method": b"POST", b":path": b"/stream", b":scheme": b"https",
        b"accept-encoding": b"gzip", b"user-agent": b"Go-http-client/2.0"}
    turner.until(lambda: far.heard)
    assert far.heard[1] == HELLO


def test_what_a_server_answers_is_what_the_original_answers(turner):
    far, _ = turner.far(True)
    far.h2.send(far.h2.open(POST), HELLO)
    (answered,) = turner.until(lambda: [event for event in far.events if isinstance(event, Answered)])
    assert answered.status == 200
    assert [name for name, _ in answered.fields] == [b":status", b"content-type", b"date"]
    turner.until(lambda: far.heard)
    assert far.heard[1] == ID


# -- opening -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 404])
def test_a_wire_that_is_refused(turner, status):
    client, server = turner.both(arrived=lambda wire: wire.refuse(status))
    got: list = []
    client.open(got.append)
    turner.until(lambda: got)
    assert got[0].reason == "refused" and str(status) in str(got[0])
    turner.until(lambda: not client.h2.streams and not server.h2.streams)


@pytest.mark.parametrize("change", [(b":method", b"GET"), (b":path", b"/"), (b":path", b"/stream/")])
def test_another_request_is_answered_404(turner, change):
    far, server = turner.far(True)
    stream = far.h2.open([pair if pair[0] != change[0] else change for pair in POST])
    far.h2.send(stream, HELLO + b"and more")
    turner.until(lambda: not server.h2.streams and far.heard and stream.state == "closed")
    assert far.events[1].status == 404 and far.heard[1] == b"not found\n" and turner.arrived == []


def test_a_stream_without_a_first_byte_is_over_after_a_while(turner):
    turner.streams.greeting.seconds = 0.02
    far, server = turner.far(True)
    ended, silent = far.h2.open(POST), far.h2.open(POST)
    far.h2.end(ended)
    turner.until(lambda: Reset(ended, CANCEL) in far.events and Reset(silent, CANCEL) in far.events)
    assert not server.h2.streams and turner.arrived == [] and not turner.streams.greeting.due
    silent = far.h2.open(POST)
    far.h2.reset(silent)
    turner.settle()
    assert turner.arrived == []


def test_openings_wait_until_the_server_takes_more(turner):
    client, server = turner.both(streams_max=3)
    pairs = [turner.open(client) for _ in range(3)]
    got: list = []
    asks = [client.open(got.append) for _ in range(3)]
    turner.settle()
    assert got == [] and len(client.h2.streams) == 3
    asks[0].cancel()
    for owner in pairs[0]:
        owner.wire.finish()
    turner.until(lambda: got)
    turner.settle()
    assert len(got) == 1 and got[0] is asks[1].wire
    client.close()
    assert isinstance(got[1], Failed) and len(got) == 2


def test_an_opening_that_is_cancelled_before_its_answer(turner):
    far, client = turner.far(False)
    got: list = []
    ask = client.open(got.append)
    turner.until(lambda: far.h2.streams)
    stream = far.h2.streams[1]
    ask.cancel()
    ask.cancel()
    far.h2.head(stream, OK)
    turner.until(lambda: not far.h2.streams)
    turner.settle()
    assert got == [] and not client.h2.streams


def test_a_stream_that_is_reset_before_its_answer(turner):
    far, client = turner.far(False)
    got: list = []
    client.open(got.append)
    turner.until(lambda: far.h2.streams)
    far.h2.reset(far.h2.streams[1], CANCEL)
    assert turner.until(lambda: got)[0].reason == "reset"


def test_only_so_many_openings_wait(turner, monkeypatch):
    monkeypatch.setattr(sniroute_streams, "ASKS_MAX", 2)
    far, client = turner.far(False)
    client.h2.peer_max = 0
    got: list = []
    for _ in range(3):
        client.open(got.append)
    assert [failed.reason for failed in got] == ["busy"]


def test_a_server_that_goes_away_takes_no_more(turner):
    far, client = turner.far(False)
    client.h2.peer_max = 1
    turner.settle()
    client.h2.peer_max = 1
    got: list = []
    client.open(got.append)
    turner.until(lambda: far.h2.streams)
    client.open(got.append)
    far.h2.out += make_frame(GOAWAY, struct.pack(">II", 1, 0) + b"bye")
    turner.until(lambda: got)
    client.open(got.append)
    assert [failed.reason for failed in got] == ["busy", "busy"] and "bye" in str(got[0])
    stream = far.h2.streams[1]
    far.h2.head(stream, OK)
    assert turner.until(lambda: got[2:])[0].says is OPEN


# -- pings -------------------------------------------------------------------------------------


def test_a_client_pings_now_and_then(turner):
    turner.streams.pinging.seconds = 0.02
    turner.streams.silent.seconds = 0.5
    far, client = turner.far(False)
    turner.streams.pinging.put(client)
    turner.until(lambda: far.said.count(make_frame(PING, bytes(8))) > 3)
    assert turner.ended == []


def test_a_server_that_answers_no_ping_is_lost(turner):
    turner.streams.pinging.seconds = 0.02
    turner.streams.silent.seconds = 0.1
    far, client = turner.far(False)
    far.turn()
    turner.fars.clear()
    turner.carriers.append(far.sock)
    turner.streams.pinging.put(client)
    turner.until(lambda: turner.ended)
    assert turner.ended[0][1].reason == "timeout"


# -- other programs ----------------------------------------------------------------------------


@pytest.fixture
def listening(turner):
    """A port whose connections are HTTP/2 without TLS; each stream answers what it hears."""

    def echo(wire):
        wire.on_data, wire.on_end = wire.send, lambda error: wire.finish()

    def accept(mask):
        turner.server(turner.wire(listener.accept()[0]), arrived=echo)

    listener = socket.create_server((HOST, 0))
    watch = Watch(turner.loop.poller, listener.fileno())
    watch.wait_for(READ, accept)
    yield listener.getsockname()[1]
    watch.closing()
    listener.close()


def run(turner, words, **more) -> bytes:
    """The output of a program, while the loop turns."""
    program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **more)
    output = bytearray()
    watch = Watch(turner.loop.poller, program.stdout.fileno())

    def read(mask):
        data = program.stdout.read1(1 << 20)
        output.extend(data)
        if not data:
            watch.wait_for(0)

    watch.wait_for(READ, read)
    try:
        turner.until(lambda: not watch.events and program.poll() is not None)
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
    assert program.returncode == 0
    return bytes(output)


def test_curl_gets_its_body_back(turner, listening, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not here (Debian package curl)")
    (tmp_path / "body").write_bytes(HELLO + NOISE)
    words = ["curl", "-s", "--http2-prior-knowledge", "--data-binary", "@body", f"http://{HOST}:{listening}/stream"]
    assert run(turner, words, cwd=tmp_path) == NOISE


def test_nghttp_gets_its_body_back(turner, listening, tmp_path):
    """It sends PRIORITY, and compresses with a table."""
    if shutil.which("nghttp") is None:
        pytest.skip("nghttp is not here (Debian package nghttp2-client)")
    (tmp_path / "body").write_bytes(HELLO + NOISE)
    words = ["nghttp", "-d", "body", f"http://{HOST}:{listening}/stream"]
    assert run(turner, words, cwd=tmp_path) == NOISE
