"""Tests of sniroute_spdy.py: header blocks, frames, the session; a far end of our own, and kubectl."""

from __future__ import annotations

import collections
import hashlib
import pathlib
import random
import re
import socket
import struct
import subprocess
import zlib
from typing import Iterator

import pytest

from conftest import HOST
from sniroute_refusals import Malformed
from sniroute_spdy import (CANCEL, CONTROL_MAX, DICTIONARY, FIN, FORGOTTEN_MAX, FRAME_DATA, GOAWAY, HEADERS,
                           OPEN_MAX, PING, PROTOCOL_ERROR, REFUSED_STREAM, REPLIES_MAX, RST_STREAM,
                           SETTINGS, STREAM_ALREADY_CLOSED, STREAM_LAST, SYN_REPLY, SYN_STREAM, TEXT_MAX,
                           WINDOW_UPDATE, Accepted, Call, Data, Deflater, Ended, Event, Full, GoneAway,
                           Pong, Reset, Session, Told)
from testbed.program import execute
from testbed.streams import (ECHO, REFUSAL, REFUSED, SILENT, SUCCESS, TALK, TALKER, Blocks, Far, StreamServer,
                             data_frame, frame, kubectl_path, status)

# What kubectl 1.27 and 1.37 send for a port-forward to port 7: two SYN_STREAMs, taken from their wire.
KUBECTL_SAID = {
    "1.27": "800300010000003c0000000100000000000078f9e3c6a7c202253a060606ce2248fc6482d22da30138e59514a526e6420b17d654"
            "50d0430aea2250a2663407000000ffff0000000101000000800300010000001800000003000000000000225227a8584a44d10800"
            "0000ffff",
    "1.37": "800300010000003c0000000100000000000078f9e3c6a7c202253a703a2b294a4dcc851625aca9a0808614cb45a024cc68cec0c0"
            "c0590489c34c50da663400000000ffff0000000101000000800300010000001800000003000000000000c2aa1354082512d00800"
            "0000ffff",
}


class Wire:
    """A Session and its far end.  Bytes go each way in portions of `size`."""

    def __init__(self, size: int = 1 << 20, command: list[str] | None = None):
        self.session = Session()
        self.said = bytearray()
        self.far = Far(self.said.extend, command)
        self.size = size

    def run(self) -> list[Event]:
        """What happens until nobody says anything more; pieces of one stream are joined."""
        events: list[Event] = []
        while self.session.pending or self.said:
            self.far.feed(bytes(self.session.take()))
            said = bytes(self.said)
            self.said.clear()
            for at in range(0, len(said), self.size):
                events += joined(self.session.receive(said[at:at + self.size]))
        return joined(events)


def joined(events: list[Event]) -> list[Event]:
    """The events, with neighbouring pieces of one stream as one, in bytes."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, Data):
            event = event._replace(data=bytes(event.data))
            if found and isinstance(found[-1], Data) and found[-1][:2] == event[:2]:
                event = event._replace(data=found.pop().data + event.data)
        found.append(event)
    return found


def opened() -> tuple[Session, Call]:
    """A session with a forward, whose streams are 1 (error) and 3 (data)."""
    session = Session()
    call = session.forward(ECHO)
    session.take()
    return session, call


def frames(data: bytes) -> list[tuple[int, int, bytes]]:
    """What was sent: (type, or stream with a sign; flags; payload)."""
    found = []
    while data:
        first, second = struct.unpack_from(">II", data)
        size = second & 0xFFFFFF
        found.append((first & 0xFFFF if first >> 31 else -first, second >> 24, data[8:8 + size]))
        data = data[8 + size:]
    return found


def rst(stream: int, code: int = CANCEL) -> bytes:
    """An RST_STREAM."""
    return frame(RST_STREAM, struct.pack(">II", stream, code))


def reply(stream: int, blocks: Blocks, flags: int = 0, kind: int = SYN_REPLY) -> bytes:
    """A SYN_REPLY."""
    return frame(kind, struct.pack(">I", stream) + blocks.make({}), flags)


# -- header blocks -----------------------------------------------------------------------------


def test_the_dictionary_is_that_of_the_draft():
    """Its Adler-32 is on the wire, in front of each session's first block (RFC 1950 section 2.2)."""
    assert (len(DICTIONARY), zlib.adler32(DICTIONARY)) == (1423, 0xE3C6A7C2)
    assert hashlib.sha256(DICTIONARY).hexdigest() == "51d27341373f923f3cd88e1eb7162aeaa3723d7585ff2399201dc06498407f02"
    assert Deflater().block([])[2:6].hex() == "e3c6a7c2"


@pytest.mark.parametrize("version", KUBECTL_SAID)
def test_what_kubectl_has_said_is_read(version):
    """One stream of zlib goes through all blocks, and the frame between them is no block."""
    blocks = Blocks()
    said = [(flags, payload) for kind, flags, payload in frames(bytes.fromhex(KUBECTL_SAID[version]))
            if kind == SYN_STREAM]
    expected = {"streamtype": "error", "port": "7", "requestid": "0"}
    assert [blocks.read(payload[10:]) for _, payload in said] == [expected, {**expected, "streamtype": "data"}]


def test_a_forward_is_two_streams():
    session = Session()
    call = session.forward(8080)
    inflater = zlib.decompressobj(zdict=DICTIONARY)
    plain = []
    for kind, flags, payload in (said := frames(bytes(session.take()))):
        assert (kind, payload[4:10]) == (SYN_STREAM, bytes(6)), "no associated stream, priority 0, slot 0"
        plain.append(inflater.decompress(payload[10:]))
    assert [flags for _, flags, _ in said] == [FIN, 0], "we never write on the error stream"
    assert [payload[:4].hex() for _, _, payload in said] == ["00000001", "00000003"]
    assert plain[1] == (b"\0\0\0\3" b"\0\0\0\x0astreamtype" b"\0\0\0\4data" b"\0\0\0\4port" b"\0\0\0\x048080"
                        b"\0\0\0\x09requestid" b"\0\0\0\1" b"1")
    assert plain[0] == plain[1].replace(b"\4data", b"\5error")
    assert not call.is_over and call.sends


def test_a_command_is_four_streams():
    wire = Wire(command=["cat"])
    wire.session.command()
    assert [event for event in wire.run() if not isinstance(event, Accepted)] == []
    assert [headers for headers in wire.far.streams.values()] == [
        {"streamtype": name} for name in ("error", "stdin", "stdout", "stderr")]
    assert wire.far.ended == set()


def test_blocks_of_any_headers_in_their_order():
    dice = random.Random(19)
    deflater, blocks = Deflater(), Blocks()
    for _ in range(300):
        names = ["".join(dice.choices("abcdefghij-:", k=dice.randrange(1, 30))) for _ in range(dice.randrange(12))]
        headers = {name: dice.randbytes(dice.randrange(60)).hex() for name in names}
        block = deflater.block([(name.encode(), value.encode()) for name, value in headers.items()])
        assert blocks.read(block) == headers


def plain_block(*texts: bytes, count: int | None = None) -> bytes:
    """A block that says this."""
    return struct.pack(">I", len(texts) // 2 if count is None else count) + b"".join(
        struct.pack(">I", len(text)) + text for text in texts)


def packed(plain: bytes, end: int = zlib.Z_SYNC_FLUSH) -> bytes:
    """The same, compressed."""
    stream = zlib.compressobj(9, zdict=DICTIONARY)
    return stream.compress(plain) + stream.flush(end)


@pytest.mark.parametrize("block", [
    b"", b"x", packed(plain_block(b"a", b"b")), packed(plain_block(b"a", bytes(10_000_000))),
], ids=["none", "garbage", "a header", "a bomb"])
def test_what_a_reply_says_is_not_read(block):
    session, call = opened()
    said = frame(SYN_REPLY, struct.pack(">I", 3) + block) + data_frame(3, b"hello")
    assert joined(session.receive(said)) == [Accepted(call), Data(call, "data", b"hello")]


# -- a forward ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 100, 1 << 20])
def test_a_forward_carries_both_ways_wherever_it_is_cut(size):
    wire = Wire(size)
    call = wire.session.forward(ECHO)
    said = random.Random(size).randbytes(3000)
    wire.session.send(call, said[:1])  # at once: there is no need to wait
    wire.session.send(call, said[1:])
    assert wire.session.end(call)
    assert wire.run() == [Accepted(call), Data(call, "data", said), Ended(call, "data")]
    assert call.is_over and not wire.session.streams and not wire.session.calls and not wire.far.streams


def test_the_end_of_our_side_leaves_the_other_open():
    wire = Wire()
    call = wire.session.forward(SILENT)
    wire.session.end(call)
    assert wire.run() == [Accepted(call)]
    assert not call.is_over and not call.sends and wire.far.ended == {1, 3}
    wire.session.send(call, b"too late")
    wire.session.end(call)
    assert not wire.session.pending
    assert joined(wire.session.receive(data_frame(3, b"late") + data_frame(3, b"st", FIN))) == [
        Data(call, "data", b"latest"), Ended(call, "data")]
    assert not call.is_over, "the error stream may still say something"
    assert wire.session.receive(data_frame(1, b"", FIN)) == [] and call.is_over


def test_the_end_of_the_far_side_leaves_ours_open():
    session, call = opened()
    assert session.receive(data_frame(3, b"", FIN)) == [Ended(call, "data")]
    session.send(call, b"more")
    session.end(call)
    assert frames(bytes(session.take())) == [(-3, 0, b"more"), (-3, FIN, b"")]
    assert session.receive(data_frame(1, b"", FIN)) == [] and call.is_over


def test_much_is_sent_in_frames():
    session, call = opened()
    data = random.Random(1).randbytes(3 * FRAME_DATA + 5)
    session.send(call, b"")
    assert session.pending == 0
    session.send(call, data)
    session.send(call, memoryview(data)[:2])
    found = frames(bytes(session.take()))
    assert [len(payload) for _, _, payload in found] == [FRAME_DATA, FRAME_DATA, FRAME_DATA, 5, 2]
    assert b"".join(payload for _, _, payload in found) == data + data[:2]


def test_an_error_text_ends_its_own_forward_only():
    wire = Wire()
    stays = wire.session.forward(ECHO)
    refused = wire.session.forward(REFUSED)
    wire.session.send(stays, b"before")
    assert wire.run() == [Accepted(stays), Accepted(refused), Told(refused, REFUSAL), Data(stays, "data", b"before")]
    assert refused.is_over and not stays.is_over and wire.session.calls == [stays]
    wire.session.send(refused, b"x")
    assert not wire.session.pending
    wire.session.send(stays, b"after")
    assert wire.run() == [Data(stays, "data", b"after")]


@pytest.mark.parametrize("size", [100, 1000, 1 << 20])
def test_what_came_before_an_error_text_counts(size):
    wire = Wire(size)
    call = wire.session.forward(TALKER)
    assert wire.run() == [Accepted(call), Data(call, "data", bytes(TALK)), Told(call, "read: connection reset by peer")]
    assert call.is_over


@pytest.mark.parametrize("behind", [
    data_frame(1, b"", FIN), rst(1), rst(3), rst(1) + rst(3), data_frame(3, b"", FIN) + rst(1),
    data_frame(1, b"", FIN) + data_frame(3, b"", FIN), frame(GOAWAY, struct.pack(">II", 0, 0)),
], ids=lambda frames: frames.hex())
def test_a_text_is_told_once_however_its_stream_ends(behind):
    session, call = opened()
    events = session.receive(data_frame(1, b"wh") + data_frame(1, b"") + data_frame(1, b"y") + behind)
    assert [event for event in events if isinstance(event, (Told, Reset))] == [Told(call, "why")]
    assert call.is_over and not session.streams


def test_a_text_that_comes_when_data_has_ended():
    """PostgreSQL resets at the end of each TLS session, behind a whole answer."""
    session, call = opened()
    assert session.receive(data_frame(3, b"", FIN) + data_frame(1, b"reset by peer", FIN)) == [
        Ended(call, "data"), Told(call, "reset by peer")]


def test_a_long_text_is_cut_off_and_a_broken_one_is_mended():
    session, call = opened()
    assert session.receive(data_frame(1, b"x" * TEXT_MAX) + data_frame(1, b"y" * 100_000)) == []
    assert session.receive(data_frame(1, b"z", FIN)) == [Told(call, "x" * TEXT_MAX)]
    session, call = opened()
    assert session.receive(data_frame(1, b"a\xff\n", FIN)) == [Told(call, "a\ufffd\n")]


def test_a_reset_without_a_text():
    session, call = opened()
    other = session.forward(ECHO)
    session.take()
    assert session.receive(rst(3, PROTOCOL_ERROR)) == [Reset(call, PROTOCOL_ERROR)]
    assert call.is_over and session.calls == [other]
    assert session.receive(rst(1) + rst(3) + rst(99) + rst(2)) == [], "of streams that are over, or never were"


def test_an_error_stream_that_is_reset_without_a_text_takes_nothing_with_it():
    session, call = opened()
    assert joined(session.receive(rst(1) + data_frame(3, b"still here", FIN))) == [
        Data(call, "data", b"still here"), Ended(call, "data")]
    session.end(call)
    assert call.is_over


def test_a_forward_that_we_break_off():
    """What is in flight is thrown away, in silence, and the next one does not wait for it."""
    session, call = opened()
    assert joined(session.receive(data_frame(3, b"x" * 100)[:50])) == [Data(call, "data", b"x" * 42)]
    session.reset(call)
    session.reset(call)
    assert frames(bytes(session.take())) == [(RST_STREAM, 0, struct.pack(">II", stream, CANCEL)) for stream in (1, 3)]
    after = session.forward(ECHO)
    session.take()
    flood = data_frame(3, bytes(1 << 16)) * 100
    assert joined(session.receive(b"x" * 58 + flood + data_frame(3, b"", FIN) + rst(3) + data_frame(7, b"good"))) == [
        Data(after, "data", b"good")]
    assert not session.pending and call.is_over


def test_data_behind_the_end_resets_the_call():
    session, call = opened()
    assert session.receive(data_frame(3, b"", FIN) + data_frame(3, b"more")) == [
        Ended(call, "data"), Reset(call, STREAM_ALREADY_CLOSED)]
    assert call.is_over


def test_data_for_a_stream_that_is_over_is_answered_once():
    wire = Wire()
    call = wire.session.forward(ECHO)
    wire.session.end(call)
    wire.run()
    session = wire.session
    assert call.is_over and session.receive(data_frame(3, b"x") * 1000) == []
    assert frames(bytes(session.take())) == [(RST_STREAM, 0, struct.pack(">II", 3, STREAM_ALREADY_CLOSED))]


def test_nothing_is_kept_of_what_is_over():
    """Thousands of forwards, one after another, in each way in which one ends."""
    wire = Wire()
    session = wire.session
    for number in range(3000):
        call = session.forward((ECHO, REFUSED, ECHO, SILENT)[number % 4])
        session.send(call, b"x")
        if number % 4 == 0:
            session.end(call)
        wire.run()
        if number % 4 > 1:
            session.reset(call)
        assert call.is_over and not session.streams
        wire.run()
    assert not wire.far.streams and len(session.forgotten) <= FORGOTTEN_MAX and not session.part and session.takes_more


def test_two_hundred_at_once():
    wire = Wire(1000)
    calls = [wire.session.forward(ECHO) for _ in range(200)]
    said = {number: random.Random(number).randbytes(500) for number in range(200)}
    for number, call in enumerate(calls):
        wire.session.send(call, said[number])
        if number % 2:
            wire.session.end(call)
    heard = collections.defaultdict(bytes)
    for event in wire.run():
        if isinstance(event, Data):
            heard[event.call] += event.data
    assert [heard[call] for call in calls] == list(said.values())
    assert wire.session.calls == calls[::2]


# -- a command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command, told", [(["cat"], SUCCESS), (["exit", "7"], status(["exit", "7"]))])
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_command(command, told, size):
    wire = Wire(size, command)
    call = wire.session.command()
    wire.session.send(call, b"abc")
    assert wire.run() == [Accepted(call), Data(call, "stdout", b"abc")]
    assert wire.session.end(call)
    assert wire.run() == [Ended(call, "stdout"), Data(call, "stderr", b"bye\n"), Ended(call, "stderr"),
                          Told(call, told)]
    assert wire.far.ended == {1, 3, 5, 7}, "we end what the far end has ended"
    assert not call.is_over and list(call.streams) == ["stdin"], "it may say more there, or nothing"
    assert wire.session.receive(data_frame(3, b"nobody hears this", FIN)) == [] and call.is_over


def test_a_command_that_ends_in_the_middle():
    """Its status is told, and what is reset behind it is no news."""
    session = Session()
    call = session.command()
    events = session.receive(data_frame(5, b"out") + data_frame(1, b"status", FIN) + rst(3) + rst(5) + rst(7))
    assert joined(events) == [Data(call, "stdout", b"out"), Told(call, "status"), Reset(call, CANCEL)]
    assert call.is_over


# -- the session -------------------------------------------------------------------------------


def test_numbers_run_out():
    session = Session()
    session.number = STREAM_LAST - 6
    assert session.takes_more
    call = session.forward(1)
    assert call.streams["data"].number == STREAM_LAST - 4
    assert not session.takes_more
    session.reset(call)
    assert not session.takes_more
    with pytest.raises(Full):
        session.forward(1)


def test_no_more_are_open_than_may_be():
    session = Session()
    while session.takes_more:
        session.forward(1)
    assert OPEN_MAX - 4 < len(session.streams) <= OPEN_MAX
    with pytest.raises(Full):
        session.command()


@pytest.mark.parametrize("value, takes", [(4, False), (6, True), (0, False), (0xFFFFFFFF, True)])
def test_the_peer_says_how_many_it_takes(value, takes):
    session, call = opened()
    session.receive(frame(SETTINGS, struct.pack(">IIIII", 2, 1 << 24 | 4, value, 7, 1 << 16)))
    assert session.takes_more is takes and session.limit <= OPEN_MAX


def test_a_peer_that_goes_away():
    session, first = opened()
    second = session.forward(ECHO)
    assert session.receive(frame(GOAWAY, struct.pack(">II", 3, 0))) == [GoneAway(0), Reset(second, REFUSED_STREAM)]
    assert not session.takes_more and session.calls == [first] and second.is_over
    assert joined(session.receive(data_frame(3, b"the rest", FIN))) == [
        Data(first, "data", b"the rest"), Ended(first, "data")]


def test_we_go_away():
    session, _ = opened()
    session.leave()
    assert frames(bytes(session.take())) == [(GOAWAY, 0, bytes(8))] and not session.takes_more


def test_a_connection_that_is_lost():
    """Each one that is open is told, with its text where there was one."""
    session, cut = opened()
    told = session.forward(ECHO)
    over = session.forward(ECHO)
    session.reset(over)
    session.receive(data_frame(5, b"last words"))
    assert session.lost() == [Reset(cut, 0), Told(told, "last words")]
    assert session.lost() == [] and not session.takes_more


def test_pings():
    session = Session()
    assert [session.ping(), session.ping()] == [1, 3]
    said = bytes(session.take())
    assert said == frame(PING, b"\0\0\0\1") + frame(PING, b"\0\0\0\3")
    assert session.receive(said) == [Pong(1), Pong(3)] and not session.pending
    assert session.receive(frame(PING, b"\0\0\0\2")) == []
    assert bytes(session.take()) == frame(PING, b"\0\0\0\2")
    session.pings = 1 << 31
    assert session.ping() == 1, "they begin again"


def test_what_means_nothing_here():
    session, call = opened()
    data = (frame(WINDOW_UPDATE, struct.pack(">II", 3, 1)) + frame(5, b"") + frame(10, bytes(10)) + frame(0xFFFF, b"?")
            + frame(SETTINGS, bytes(4)) + reply(99, blocks := Blocks()) + reply(3, blocks, kind=HEADERS)
            + data_frame(3, b""))
    assert session.receive(data) == [] and not session.pending


def test_streams_end_with_headers_too():
    session, call = opened()
    blocks = Blocks()
    assert session.receive(reply(1, blocks, FIN) + reply(3, blocks) + reply(3, blocks, FIN, HEADERS)
                           + reply(3, blocks, FIN, HEADERS)) == [Accepted(call), Ended(call, "data")]


def test_the_peer_opens_no_streams():
    """They are refused, and their headers inflated: later blocks go on from there."""
    session, call = opened()
    blocks = Blocks()
    syn = frame(SYN_STREAM, struct.pack(">IIH", 2, 0, 0) + blocks.make({"a": "b" * 50}))
    assert session.receive(syn + data_frame(2, b"ignored") + reply(3, blocks)) == [Accepted(call)]
    assert frames(bytes(session.take())) == [(RST_STREAM, 0, struct.pack(">II", 2, REFUSED_STREAM))]
    for again in (frame(SYN_STREAM, struct.pack(">IIH", 2, 0, 0) + blocks.make({})), data_frame(4, b"x")):
        with pytest.raises(Malformed):
            session.receive(again)


# -- what breaks a session ---------------------------------------------------------------------


@pytest.mark.parametrize("data", [
    b"HTTP/1.1 400 Bad Request\r\n\r\n", data_frame(0, b"x"), data_frame(5, b"x"), data_frame(STREAM_LAST),
    struct.pack(">HHI", 0x8002, PING, 4) + bytes(4), struct.pack(">HHI", 0x8004, PING, 4),
    struct.pack(">HHI", 0xFFFF, PING, 4),
    struct.pack(">HHI", 0x8003, 0xFFFF, CONTROL_MAX + 1), struct.pack(">HHI", 0x8003, SYN_REPLY, 0xFFFFFF),
    frame(PING, bytes(3)), frame(PING, bytes(5)), frame(RST_STREAM, bytes(7)), frame(RST_STREAM, bytes(12)),
    frame(GOAWAY, bytes(4)), frame(WINDOW_UPDATE, bytes(4)), frame(SETTINGS, b""), frame(SETTINGS, bytes(5)),
    frame(SETTINGS, b"\0\0\0\1" + bytes(7)), frame(SETTINGS, b"\xff\xff\xff\xff"), frame(SYN_STREAM, bytes(9)),
    frame(SYN_REPLY, bytes(3)), frame(HEADERS, bytes(3)),
    frame(SYN_STREAM, struct.pack(">IIH", 1, 0, 0) + packed(plain_block())),
    frame(SYN_STREAM, struct.pack(">IIH", 0, 0, 0) + packed(plain_block())),
], ids=lambda data: f"{data[:12].hex()}-{len(data)}")
def test_what_breaks_a_session(data):
    for size in (1, 3, len(data)):
        session, call = opened()
        with pytest.raises(Malformed, match="^SPDY: "):
            for at in range(0, len(data), size):
                session.receive(data[at:at + size])
        assert session.lost() == [Reset(call, 0)]


@pytest.mark.parametrize("flood", [
    frame(PING, b"\0\0\0\2"), data_frame(3, b""), frame(SYN_STREAM, b"?"),
], ids=["pings", "data for many that are over", "streams"])
def test_a_flood_of_what_has_to_be_answered(flood):
    """It is answered for as long as our answers are taken.  What nobody takes is not made."""
    def flooded(takes: bool) -> None:
        session, blocks = Session(), Blocks()
        session.number = 1_000_001
        for number in range(2, 10_000, 2):
            data = (frame(SYN_STREAM, struct.pack(">IIH", number, 0, 0) + blocks.make({})) if flood[3:4] == b"\1"
                    else data_frame(number + 1) if not flood[0] else flood)
            session.receive(data)
            assert session.pending <= REPLIES_MAX
            if takes:
                session.take()
    flooded(True)
    with pytest.raises(Malformed, match="flood"):
        flooded(False)


def test_a_frame_of_sixteen_megabytes_is_not_kept():
    session, call = opened()
    session.receive(struct.pack(">II", 3, 0xFFFFFF))
    left, piece = 0xFFFFFF, bytes(1 << 20)
    while left:
        (event,) = session.receive(piece[:left])
        assert not session.part
        left -= len(event.data)
    assert joined(session.receive(data_frame(3, b"next"))) == [Data(call, "data", b"next")]


def good_bytes() -> bytes:
    """What a server may say to two forwards and a command."""
    blocks, said = Blocks(), b""
    for number in range(1, 16, 2):
        said += reply(number, blocks)
    said += data_frame(3, b"hello") + frame(PING, b"\0\0\0\2") + data_frame(13, b"out") + data_frame(5, b"text", FIN)
    said += rst(7) + data_frame(3, b"", FIN) + data_frame(1, b"", FIN) + frame(SETTINGS, struct.pack(">III", 1, 4, 100))
    said += data_frame(15, b"err", FIN) + data_frame(13, b"", FIN) + data_frame(9, SUCCESS.encode(), FIN)
    return said + frame(GOAWAY, struct.pack(">II", 15, 0))


def mutations(dice: random.Random) -> Iterator[bytes]:
    """What becomes of them where bytes are changed, doubled, swapped or lost."""
    for _ in range(1500):
        data = bytearray(good_bytes())
        for _ in range(dice.choice((1, 1, 2, 5, 20))):
            at = dice.randrange(len(data))
            how = dice.randrange(5)
            if how == 0:
                data[at] = dice.randrange(256)
            elif how == 1:
                data[at] ^= 1 << dice.randrange(8)
            elif how == 2:
                del data[at:at + dice.randrange(1, 12)]
            elif how == 3:
                data[at:at] = data[at:at + dice.randrange(1, 40)]
            else:
                data[at:at] = dice.randbytes(dice.randrange(1, 9))
            if not data:
                break
        yield bytes(data)


def test_mutations_end_in_events_or_in_malformed():
    """And in nothing else; what is kept stays within its limits; wherever it is cut, the same comes of it."""
    dice, broken = random.Random(1906), 0
    for data in mutations(dice):
        outcomes = []
        for size in (len(data) or 1, dice.randrange(1, 30)):
            session = Session()
            names = {id(call): number for number, call in enumerate((session.forward(7), session.forward(7),
                                                                     session.command()))}
            heard, fault = [], ""
            try:
                for at in range(0, len(data), size):
                    heard += session.receive(data[at:at + size])
                    assert len(session.part) < CONTROL_MAX + 8
            except Malformed as error:
                fault = str(error)
            over = [event.call for event in session.lost()]
            assert not session.streams and len(set(map(id, over))) == len(over)
            outcomes.append((fault, None if fault else [(type(event), *(names.get(id(field), field) for field in event))
                                                        for event in joined(heard)]))
        assert outcomes[0] == outcomes[1]
        broken += bool(outcomes[0][0])
    assert 300 < broken < 1400


def test_noise():
    dice = random.Random(7)
    for _ in range(2000):
        session, _ = opened()
        data = dice.choice((b"", b"\x80\x03\0", b"\0\0\0\3")) + dice.randbytes(dice.randrange(1, 200))
        try:
            session.receive(data)
        except Malformed:
            pass
        session.lost()


def test_a_session_is_small():
    """A spare one waits for each pod in use.  The compressor would take 268 KiB with the usual window."""
    import tracemalloc
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        sessions = [opened() for _ in range(10)]
        size = (tracemalloc.get_traced_memory()[0] - before) / len(sessions)
    finally:
        tracemalloc.stop()
    assert size < 20_480


# -- kubectl -----------------------------------------------------------------------------------


class OurBlocks(Blocks):
    """Header blocks as the program makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.deflater = Deflater()

    def make(self, headers: dict[str, str]) -> bytes:
        """A block, which says something, so that one builds on the other."""
        return self.deflater.block([(b"server", b"testbed"), *((a.encode(), b.encode()) for a, b in headers.items())])


@pytest.fixture(params=["Python's blocks", "our blocks"])
def kubectl(request: pytest.FixtureRequest, stream_server: StreamServer, tmp_path: pathlib.Path):
    """The words of a kubectl that asks our server, with SPDY by POST; its environment."""
    if request.param == "our blocks":
        stream_server.blocks = OurBlocks
    environ = {"HOME": str(tmp_path), "PATH": "", "KUBECONFIG": "/dev/null", "KUBECTL_PORT_FORWARD_WEBSOCKETS": "false",
               "KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "false"}
    address = "http://{}:{}".format(*stream_server.address)
    return (kubectl_path(), "--server", address, "--namespace", "default"), environ


def test_kubectl_forwards_through_our_frames(kubectl, stream_server):
    """20 connections in one session: each has its streams, and gets its own bytes."""
    words, environ = kubectl
    with subprocess.Popen([*words, "port-forward", "pod/web", f":{ECHO}", "--address", HOST], env=environ,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        try:
            port = int(re.search(r":(\d+) -> 7", child.stdout.readline())[1])
            for number in range(20):
                said = random.Random(number).randbytes(50_000)
                with socket.create_connection((HOST, port), timeout=10) as client:
                    client.sendall(said)
                    client.shutdown(socket.SHUT_WR)
                    with client.makefile("rb") as file:
                        assert file.read() == said
        finally:
            child.kill()
    ((protocol, far),) = stream_server.upgrades
    assert protocol == "SPDY/3.1" and sum(kind == SYN_STREAM for kind, _, _ in far.log) == 40
    blocks = Blocks()
    said = [payload for kind, _, payload in frames(bytes(stream_server.said)) if kind == SYN_STREAM]
    assert {"streamtype", "port", "requestid"} == set().union(*(blocks.read(payload[10:]) for payload in said))


@pytest.mark.parametrize("command, code", [("cat", 0), ("exit 7", 7)])
def test_kubectl_runs_a_command_through_our_frames(kubectl, command, code):
    words, environ = kubectl
    ended = execute(*words, "exec", "-i", "pod/web", "--", *command.split(), env=environ, said=b"abc" * 10_000)
    assert (ended.returncode, ended.stdout) == (code, b"abc" * 10_000), ended.stderr
    assert ended.stderr.startswith(b"bye\n")
