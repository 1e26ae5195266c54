"""Tests of sniroute_h2.py: its two ends with each other and with PyPI's h2, what is refused, floods, mutations."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest

import sniroute_h2
from conftest import FakeClock
from sniroute_h2 import (BLOCK_MAX, CANCEL, CLOSED, CONTROL_MAX, FLOOD_SECONDS, FLOODS, H2, INTERNAL_ERROR, LOCAL_ENDED,
                         NO_ERROR, OPEN, PEER_ENDED, RESETS_KEPT, STREAM_CLOSED, WINDOW_MAX, WINDOW_START, Answered,
                         Data, Ended, GoneAway, Opened, Pong, Reset, Room, Settled, Stream)
from sniroute_hpack import encode, write_string
from sniroute_http2 import (ACK, COMPRESSION_ERROR, CONTINUATION, CONTINUATIONS_MAX, DATA, END_HEADERS,
                            ENHANCE_YOUR_CALM, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, GOAWAY, HAS_PRIORITY, HEADERS,
                            PADDED, PING, PREFACE, PRIORITY, PROTOCOL_ERROR, PUSH_PROMISE, REFUSED_STREAM, RST_STREAM,
                            SETTINGS, WINDOW_UPDATE, Broken, make_frame)
from testbed.clients import PSYCOPG, paths_of

with paths_of("h2"):
    try:
        import h2.config
        import h2.connection
        import h2.events
        import h2.settings
    except ImportError:
        h2 = None  # type: ignore[assignment]
needs_h2 = pytest.mark.skipif(h2 is None, reason=f"h2 is not here (PyPI package h2; {PSYCOPG} names a Python with it)")

POST = [(b":authority", b"none"), (b":method", b"POST"), (b":path", b"/stream"), (b":scheme", b"https"),
        (b"accept-encoding", b"gzip"), (b"user-agent", b"Go-http-client/2.0")]
OK = [(b":status", b"200"), (b"content-type", b"application/octet-stream")]
HEAD, ANSWER = encode(POST), encode(OK)
START = PREFACE + make_frame(SETTINGS)
END = 1  # END_STREAM
# POST as Go and hyper compress it: in Huffman's code, with a table; and behind two changes of its size.
COMPRESSED = [bytes.fromhex(block) for block in (
    "4183a8f5178344856109b0a3a78750839bd9ab7a8dc475a74a6b589418b525812e0f",
    "3fe1073fe11f4183a8f5178344856109b0a3a78750839bd9ab7a8dc475a74a6b589418b525812e0f")]


def head(stream: int = 1, flags: int = END_HEADERS, block: bytes = HEAD) -> bytes:
    return make_frame(HEADERS, block, flags, stream)


def window(more: int, stream: int = 0) -> bytes:
    return make_frame(WINDOW_UPDATE, struct.pack(">I", more), 0, stream)


def setting(number: int, value: int) -> bytes:
    return make_frame(SETTINGS, struct.pack(">HI", number, value))


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """All frames of some bytes: type, flags, stream, payload."""
    found, at = [], len(PREFACE) if data.startswith(PREFACE) else 0
    while at < len(data):
        size, kind, flags, stream = int.from_bytes(data[at:at + 3], "big"), *struct.unpack_from(">BBI", data, at + 3)
        found.append((kind, flags, stream, bytes(data[at + 9:at + 9 + size])))
        at += 9 + size
    return found


def server(said: bytes = b"", **more) -> H2:
    """A server whose client has said its SETTINGS, and this; what it says itself is taken."""
    end = H2(False, **more)
    end.feed(START + said)
    end.data_to_send()
    return end


def client(said: bytes = b"", streams: int = 1) -> H2:
    """A client with an open stream, whose server has said its SETTINGS, and this."""
    end = H2(True)
    for _ in range(streams):
        end.open(POST)
    end.feed(make_frame(SETTINGS) + said)
    end.data_to_send()
    return end


class Both:
    """The two ends; bytes go each way in portions of `size`."""

    def __init__(self, size: int = 1 << 20):
        self.client, self.server = H2(True), H2(False)
        self.size = size
        self.got: dict[tuple[H2, int], bytearray] = {}

    def run(self, consume: bool = True) -> list[tuple[H2, object]]:
        """What happens until nobody says anything more.  DATA goes into `got`."""
        happened = []
        while self.client.out or self.server.out:
            for source, sink in ((self.client, self.server), (self.server, self.client)):
                said = source.data_to_send()
                for at in range(0, len(said), self.size):
                    for event in sink.feed(said[at:at + self.size]):
                        if isinstance(event, Data):
                            self.got.setdefault((sink, event.stream.id), bytearray()).extend(event.data)
                            if consume:
                                sink.consume(event.stream, len(event.data))
                        else:
                            happened.append((sink, event))
        return happened

    def open(self) -> tuple[Stream, Stream]:
        """A stream, as both see it, answered."""
        ours = self.client.open(POST)
        self.run()
        theirs = self.server.streams[ours.id]
        self.server.head(theirs, OK)
        self.run()
        return ours, theirs


# -- the two ends with each other --------------------------------------------------------------


def test_what_each_end_says_first_is_what_the_ends_of_nodepass_say():
    assert frames(bytes(H2(True).data_to_send())) == [
        (SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in (
            (2, 0), (4, 4194304), (5, 16384), (6, 10485760)))), (WINDOW_UPDATE, 0, 0, struct.pack(">I", 1073741824))]
    assert bytes(H2(True).data_to_send()).startswith(PREFACE)
    assert frames(bytes(H2(False, 77).data_to_send())) == [
        (SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in (
            (5, 1048576), (3, 77), (6, 1048896), (1, 4096), (4, 1048576), (9, 1)))),
        (WINDOW_UPDATE, 0, 0, struct.pack(">I", 983041))]


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_stream_from_its_head_to_both_ends(size):
    both = Both(size)
    ours, theirs = both.open()
    assert both.client.send(ours, b"\0abc") == 4 and both.server.send(theirs, b"\1\2\3\4") == 4
    both.run()
    assert both.got == {(both.server, 1): b"\0abc", (both.client, 1): b"\1\2\3\4"}
    both.client.end(ours)
    assert (both.server, Ended(theirs)) in both.run()
    assert (ours.state, theirs.state) == (LOCAL_ENDED, PEER_ENDED)
    assert both.server.send(theirs, b"late") == 4 and both.client.send(ours, b"no") == 0
    both.server.end(theirs)
    assert (both.client, Ended(ours)) in both.run()
    assert both.got[both.client, 1] == b"\1\2\3\4late"
    assert (ours.state, theirs.state) == (CLOSED, CLOSED) and not both.client.streams and not both.server.streams


def test_both_know_what_was_asked_and_answered():
    both = Both()
    ours = both.client.open(POST)
    assert both.run()[:2] == [(both.server, Settled()), (both.server, Opened(both.server.streams[1], POST))]
    both.server.head(both.server.streams[1], OK)
    assert both.run() == [(both.client, Answered(ours, 200, OK))]


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_bulk_passes_whole_and_as_few_frames(down, size):
    both, noise = Both(size), random.Random(3).randbytes(6 << 20)
    ours, theirs = both.open()
    (source, stream), sink = ((both.server, theirs), both.client) if down else ((both.client, ours), both.server)
    at = 0
    while at < len(noise):
        at += source.send(stream, memoryview(noise)[at:at + 300000])
        said = source.data_to_send()
        assert len([kind for kind, *_ in frames(bytes(said)) if kind == DATA]) <= (20 if down else 1)
        source.out += said
        both.run()
    assert both.got[sink, 1] == noise and sink.held == 0


def test_a_stream_that_is_not_consumed_stops_at_its_window_and_not_the_others():
    both = Both()
    (ours, theirs), (second, _) = both.open(), both.open()
    sent = 0
    while count := both.client.send(ours, bytes(100000)):
        sent += count
        both.run(consume=False)
    assert sent == 1 << 20 == both.server.held and ours.sendable == 0
    assert both.client.send(second, b"hello") == 5
    both.run()
    assert both.got[both.server, 3] == b"hello"
    both.server.consume(theirs, 1 << 19)
    assert both.run() == [(both.client, Room(ours))] and ours.sendable == 1 << 19


def test_windows_are_given_back_when_half_is_used():
    both = Both()
    ours, theirs = both.open()
    for _ in range(7):
        both.client.send(ours, bytes(1 << 16))
        both.server.feed(both.client.data_to_send())
        both.server.consume(theirs, 1 << 16)
        assert not both.server.out
    both.client.send(ours, bytes(1 << 16))
    both.server.feed(both.client.data_to_send())
    both.server.consume(theirs, 1 << 16)
    said = frames(both.server.out)
    assert [(kind, stream) for kind, _, stream, _ in said] == [(WINDOW_UPDATE, 0), (WINDOW_UPDATE, 1)]


def test_pieces_of_one_stream_are_one_event():
    events = server(head()).feed(b"".join(make_frame(DATA, bytes((65 + at,)) * 3, 0, 1) for at in range(5)))
    assert [event.data for event in events] == [b"AAABBBCCCDDDEEE"]


def test_a_frame_is_told_as_it_comes():
    end, said = server(head()), make_frame(DATA, bytes(range(200)) * 1000, END, 1)
    assert [len(event.data) for event in end.feed(said[:1009])] == [1000]
    assert [len(event.data) for event in end.feed(said[1009:2000])] == [991]
    rest = end.feed(said[2000:])
    assert len(rest[0].data) == 200000 - 1991 and rest[1:] == [Ended(end.streams[1])]


@pytest.mark.parametrize("size", [1, 5, 1 << 20])
@pytest.mark.parametrize("text, padding, ends", [
    (b"hello", 0, True), (b"hello", 200, False), (b"", 3, True), (b"", 0, False)])
def test_padding_is_no_data_and_counts_for_the_window(size, text, padding, ends):
    end, got = server(head()), bytearray()
    said = make_frame(DATA, bytes((padding,)) + text + bytes(padding), PADDED | END * ends, 1)
    stream = end.streams[1]
    for at in range(0, len(said), size):
        for event in end.feed(said[at:at + size]):
            if isinstance(event, Data):
                got += event.data
            else:
                assert event == Ended(stream) and ends
    assert got == text and (stream.state is PEER_ENDED) == ends
    assert stream.window == (1 << 20) - len(text) - padding - 1 and stream.used == padding + 1
    assert end.feed(make_frame(PING, bytes(8))) == [] and frames(end.out)[-1] == (PING, ACK, 0, bytes(8))


def test_a_reset_ends_both_directions_and_what_was_on_its_way_is_nothing():
    both = Both()
    ours, theirs = both.open()
    both.client.reset(ours)
    both.server.send(theirs, b"on its way")
    assert both.run() == [(both.server, Reset(theirs, CANCEL))]
    assert not both.got and not both.client.streams and not both.server.streams and both.client.held == 0
    both.client.reset(ours)  # once more does no harm
    assert not both.client.out


def test_a_ping_is_answered():
    both = Both()
    both.client.ping(b"12345678")
    assert both.run()[1:] == [(both.client, Settled()), (both.client, Pong(b"12345678"))]


def test_a_server_that_goes_away_takes_no_more_and_resets_what_it_has_not_seen():
    end = client(streams=2)
    first, second = end.streams.values()
    events = end.feed(make_frame(GOAWAY, struct.pack(">II", 1, 11) + b"too\nmuch"))
    assert events == [GoneAway(1, 11, "too\nmuch"), Reset(second, REFUSED_STREAM)]
    assert not end.may_open and first.state is OPEN


def test_a_client_opens_as_many_as_the_server_takes():
    end = H2(True)
    assert [end.open(POST).id for _ in range(sniroute_h2.UNSETTLED_MAX) if end.may_open][-1] == 199 and not end.may_open
    end.feed(setting(3, 101))
    assert end.open(POST).id == 201 and not end.may_open
    end.reset(end.streams[1])
    assert end.may_open


def test_ids_come_to_an_end():
    end = H2(True)
    end.next_id = sniroute_h2.ID_MAX
    end.open(POST)
    assert not end.may_open


@pytest.mark.parametrize("block", COMPRESSED)
def test_a_head_as_go_compresses_it(block):
    end = server()
    assert end.feed(head(1, END_HEADERS, block))[0].fields == POST
    assert end.feed(head(3, END_HEADERS, bytes.fromhex("c183c087bfbe")))[0].fields == POST


def test_a_head_in_several_frames_with_padding_and_priority():
    end = server()
    first = make_frame(HEADERS, b"\3" + bytes(5) + HEAD[:7] + bytes(3), PADDED | HAS_PRIORITY | END, 1)
    said = first + make_frame(CONTINUATION, HEAD[7:9], 0, 1) + make_frame(CONTINUATION, HEAD[9:], END_HEADERS, 1)
    opened, ended = end.feed(said)
    assert opened.fields == POST and ended == Ended(opened.stream)


def test_answers_before_the_answer_and_fields_behind_it_are_not_told():
    early = head(1, END_HEADERS, encode([(b":status", b"103"), (b"link", b"x")]))
    end = client(early + early)
    late = head(1, END_HEADERS | END, encode([(b"grpc-status", b"0")]))
    stream = end.streams[1]
    assert end.feed(head(1, END_HEADERS, ANSWER) + late) == [Answered(stream, 200, OK), Ended(stream)]


def test_a_change_of_the_window_of_all_streams():
    end = client(streams=2)
    first, second = end.streams.values()
    assert end.send(first, bytes(70000)) == WINDOW_START
    end.feed(window(1 << 20))
    assert end.feed(setting(4, 10)) == [Settled()] and (first.sendable, second.sendable) == (10 - WINDOW_START, 10)
    assert end.send(first, b"x") == 0 and end.send(second, bytes(20)) == 10
    assert end.feed(window(WINDOW_START - 10, 1)) == []  # it is 0 now
    assert end.feed(setting(4, 11)) == [Room(first), Room(second), Settled()]


def test_the_window_of_the_connection():
    end = client()
    stream = end.streams[1]
    end.feed(window(1 << 20, 1))
    assert end.send(stream, bytes(100000)) == WINDOW_START and end.sendable == 0
    assert end.feed(window(7)) == [Room(None)] and end.feed(window(1)) == []
    assert end.send(stream, bytes(100)) == 8


def test_a_larger_frame_where_the_peer_takes_it():
    end = client()
    end.feed(setting(5, 1 << 20) + setting(4, 1 << 20) + window(1 << 20))
    end.data_to_send()
    assert end.send(end.streams[1], bytes(300000)) == 300000 and len(frames(end.out)) == 1


# -- what is refused ---------------------------------------------------------------------------

BAD_AT_SERVER = {
    "a frame that is too large": (make_frame(DATA, b"", 0, 1).replace(b"\0\0\0", b"\x10\0\1", 1), FRAME_SIZE_ERROR),
    "a head that is too large": (b"\0\x40\1\1\4\0\0\0\1", FRAME_SIZE_ERROR),
    "a head on stream 0": (head(0), PROTOCOL_ERROR),
    "a head on an even stream": (head(2), PROTOCOL_ERROR),
    "a stream id that goes back": (head(5) + head(3), STREAM_CLOSED),
    "a head on a closed stream": (head(1) + make_frame(RST_STREAM, bytes(4), 0, 1) + head(1), STREAM_CLOSED),
    "DATA on a closed stream": (head(1) + make_frame(RST_STREAM, bytes(4), 0, 1) + make_frame(DATA, b"x", 0, 1),
                                STREAM_CLOSED),
    "DATA on a stream that nobody has opened": (make_frame(DATA, b"x", 0, 1), PROTOCOL_ERROR),
    "DATA on stream 0": (make_frame(DATA, b"x"), PROTOCOL_ERROR),
    "DATA that is all padding, and more": (head() + make_frame(DATA, b"\6abcde", PADDED, 1), PROTOCOL_ERROR),
    "DATA without room for padding": (head() + make_frame(DATA, b"", PADDED, 1), FRAME_SIZE_ERROR),
    "a head that is interrupted": (head(flags=0) + make_frame(PING, bytes(8)), PROTOCOL_ERROR),
    "a head that goes on elsewhere": (head(flags=0) + make_frame(CONTINUATION, b"", 4, 3), PROTOCOL_ERROR),
    "a CONTINUATION of nothing": (make_frame(CONTINUATION, b"", 4, 1), PROTOCOL_ERROR),
    "a head in too many frames": (head(flags=0) + make_frame(CONTINUATION, b"", 0, 1) * (CONTINUATIONS_MAX + 1),
                                  ENHANCE_YOUR_CALM),
    "a block that is too large": (head(flags=0) + make_frame(CONTINUATION, bytes(CONTROL_MAX), 0, 1) * (
        BLOCK_MAX // CONTROL_MAX + 1), ENHANCE_YOUR_CALM),
    "more fields than there is room": (head(block=b"\x3f\xe1\x1f" + HEAD[1:] + b"\x40\1a" + write_string(
        bytes(4000)) + b"\xbe" * 20), ENHANCE_YOUR_CALM),
    "a block that is none": (head(block=b"\xff\xff\xff\xff\xff\xff"), COMPRESSION_ERROR),
    "padding in a head beyond its frame": (head(flags=4 | PADDED, block=b"\xff" + HEAD), PROTOCOL_ERROR),
    "SETTINGS on a stream": (make_frame(SETTINGS, b"", 0, 1), PROTOCOL_ERROR),
    "SETTINGS of no length": (make_frame(SETTINGS, bytes(5)), FRAME_SIZE_ERROR),
    "an acknowledgement with settings": (make_frame(SETTINGS, bytes(6), ACK), FRAME_SIZE_ERROR),
    "a push that is neither": (setting(2, 2), PROTOCOL_ERROR),
    "a frame size that is too small": (setting(5, 100), PROTOCOL_ERROR),
    "a window that is too large, at the start": (setting(4, 1 << 31), FLOW_CONTROL_ERROR),
    "a window of the connection that is too large": (window(WINDOW_MAX), FLOW_CONTROL_ERROR),
    "a WINDOW_UPDATE of 0": (window(0), PROTOCOL_ERROR),
    "a window of a stream that nobody has opened": (window(1, 7), PROTOCOL_ERROR),
    "a window of no length": (make_frame(WINDOW_UPDATE, bytes(5)), FRAME_SIZE_ERROR),
    "a ping of no length": (make_frame(PING, bytes(7)), FRAME_SIZE_ERROR),
    "a ping on a stream": (make_frame(PING, bytes(8), 0, 1), PROTOCOL_ERROR),
    "a reset of a stream that nobody has opened": (make_frame(RST_STREAM, bytes(4), 0, 1), PROTOCOL_ERROR),
    "a reset of the connection": (make_frame(RST_STREAM, bytes(4)), PROTOCOL_ERROR),
    "a reset of no length": (head() + make_frame(RST_STREAM, bytes(3), 0, 1), FRAME_SIZE_ERROR),
    "a priority of no length": (make_frame(PRIORITY, bytes(4), 0, 1), FRAME_SIZE_ERROR),
    "a priority of the connection": (make_frame(PRIORITY, bytes(5)), PROTOCOL_ERROR),
    "a GOAWAY of no length": (make_frame(GOAWAY, bytes(7)), FRAME_SIZE_ERROR),
    "a GOAWAY of a stream": (make_frame(GOAWAY, bytes(8), 0, 1), PROTOCOL_ERROR),
    "a push to a server": (make_frame(PUSH_PROMISE, bytes(4), 4, 1), PROTOCOL_ERROR),
    "more DATA than the connection's window": (head() + head(3) + make_frame(DATA, bytes(400000), 0, 1) + make_frame(
        DATA, bytes(1 << 20), 0, 3), FLOW_CONTROL_ERROR),
}


def broken(end: H2, said: bytes, code: int) -> None:
    """`end` says GOAWAY with this code when it is fed this, and is over."""
    with pytest.raises(Broken) as raised:
        end.feed(said)
    assert raised.value.code == code, raised.value
    kind, _, _, payload = frames(end.data_to_send())[-1]
    assert kind == GOAWAY and payload[4:8] == struct.pack(">I", code) and payload[8:].decode("ascii")
    assert end.feed(said) == [] and not end.out


@pytest.mark.parametrize("name", BAD_AT_SERVER)
def test_a_client_that_breaks_a_rule_is_told_go_away(name):
    said, code = BAD_AT_SERVER[name]
    broken(server(), said, code)
    end = server()
    with pytest.raises(Broken):
        for at in range(0, len(said), size := 1 if len(said) < 9000 else 1000):
            end.feed(said[at:at + size])


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n", PREFACE[:-1] + b"x", PREFACE + make_frame(PING, bytes(8)),
                                  PREFACE + head(), PREFACE + make_frame(SETTINGS, b"", ACK),
                                  PREFACE + make_frame(DATA, b"", 0, 1), PREFACE + make_frame(77, b"")])
def test_a_beginning_that_is_none(said):
    broken(H2(False), said, PROTOCOL_ERROR)


BAD_AT_CLIENT = {
    "a beginning without SETTINGS": (None, PROTOCOL_ERROR),
    "a push": (make_frame(PUSH_PROMISE, bytes(4), 4, 1), PROTOCOL_ERROR),
    "a push on the server's own stream": (head(2, block=ANSWER), PROTOCOL_ERROR),
    "an answer to nothing": (head(3, block=ANSWER), PROTOCOL_ERROR),
    "DATA of nothing": (make_frame(DATA, b"x", 0, 3), PROTOCOL_ERROR),
    "a server that wants to be pushed to": (setting(2, 1), PROTOCOL_ERROR),
    "DATA behind both ends": (head(block=ANSWER, flags=5) + b"", 0),
    "a frame beyond what was said": (b"\0\x40\1\0\0\0\0\0\1", FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize("name", BAD_AT_CLIENT)
def test_a_server_that_breaks_a_rule_is_told_go_away(name):
    said, code = BAD_AT_CLIENT[name]
    if said is None:
        broken(H2(True), make_frame(PING, bytes(8)), code)
    elif code:
        broken(client(), said, code)
    else:
        end = client()
        end.end(end.streams[1])
        assert isinstance(end.feed(said)[-1], Ended) and not end.streams
        broken(end, make_frame(DATA, b"x", 0, 1), STREAM_CLOSED)


def head_with(*changes: tuple[bytes, bytes | None]) -> bytes:
    """POST with some fields changed, added, or taken away."""
    said = dict(POST) | dict(changes)
    return head(block=encode([pair for pair in said.items() if pair[1] is not None]))


BAD_STREAMS = {
    "no method": (head_with((b":method", None)), PROTOCOL_ERROR),
    "no path": (head_with((b":path", None)), PROTOCOL_ERROR),
    "a name with capitals": (head_with((b"Host", b"x")), PROTOCOL_ERROR),
    "a name that is none": (head_with((b"a b", b"x")), PROTOCOL_ERROR),
    "a line end in a value": (head_with((b"a", b"x\r\nb: y")), PROTOCOL_ERROR),
    "an unknown pseudo field": (head_with((b":status", b"200")), PROTOCOL_ERROR),
    "a pseudo field behind others": (head(block=encode([*POST, (b":method", b"POST")])), PROTOCOL_ERROR),
    "DATA behind its end": (head(flags=5) + make_frame(DATA, b"x", 0, 1), STREAM_CLOSED),
    "a head behind its end": (head(flags=5) + head(), STREAM_CLOSED),
    "a second head that ends nothing": (head() + head(block=encode([(b"a", b"b")])), PROTOCOL_ERROR),
    "DATA beyond the window": (head() + make_frame(DATA, bytes(1 << 20), 0, 1) + make_frame(DATA, b"x", 0, 1),
                               FLOW_CONTROL_ERROR),
    "a window of 0": (head() + window(0, 1), PROTOCOL_ERROR),
    "a window that is too large": (head() + window(WINDOW_MAX, 1), FLOW_CONTROL_ERROR),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_a_fault_of_one_stream_is_a_reset_of_it_and_the_others_go_on(name):
    said, code = BAD_STREAMS[name]
    end = server()
    events = end.feed(said)
    opened = [event for event in events if isinstance(event, Opened)]
    assert (RST_STREAM, 0, 1, struct.pack(">I", code)) in frames(end.data_to_send()) and 1 not in end.streams
    resets = [event for event in events if isinstance(event, Reset)]
    assert resets == [Reset(each.stream, code, True) for each in opened]
    assert end.feed(make_frame(DATA, b"on its way", END, 1)) == []
    assert isinstance(end.feed(head(3))[0], Opened)


@pytest.mark.parametrize("said", [
    make_frame(DATA, b"x", 0, 1), head(block=encode([(b":status", b"abc")])), head(block=encode([(b"a", b"b")])),
    head(block=HEAD), head(flags=5, block=encode([(b":status", b"100")]))], ids=range(5))
def test_an_answer_that_is_none(said):
    end = client()
    stream = end.streams[1]
    assert end.feed(said) == [Reset(stream, PROTOCOL_ERROR, True)] and not end.streams


def test_streams_beyond_what_was_said_are_refused_and_may_be_tried_again():
    end = server(streams_max=2)
    assert len(end.feed(head(1) + head(3) + head(5))) == 2
    assert frames(end.data_to_send()) == [(RST_STREAM, 0, 5, struct.pack(">I", REFUSED_STREAM))]
    assert end.feed(make_frame(DATA, b"on its way", 0, 5)) == []
    end.reset(end.streams[1])
    assert isinstance(end.feed(head(7))[0], Opened)


def test_streams_that_are_not_read_hold_so_much_and_no_more(monkeypatch):
    monkeypatch.setattr(sniroute_h2, "HELD_MAX", 2500000)
    end = server(head(1) + head(3) + head(5))
    piece = make_frame(DATA, bytes(1 << 20), 0, 1)
    events = end.feed(piece + piece.replace(b"\0\0\0\1", b"\0\0\0\3", 1))
    third = end.streams[5]
    assert [type(event) for event in events] == [Data, Data]
    piece = make_frame(DATA, bytes(1 << 19), 0, 5)
    assert end.feed(piece) == [Reset(third, ENHANCE_YOUR_CALM, True)] and end.held == 2 << 20
    for event in events:
        end.consume(event.stream, len(event.data))
    assert end.held == 0


def test_only_so_many_resets_are_remembered():
    end = H2(True)
    end.peer_max = 1 << 20
    for _ in range(RESETS_KEPT + 10):
        end.reset(end.open(POST))
    assert len(end.resets) == RESETS_KEPT and not end.streams


# -- floods ------------------------------------------------------------------------------------

FLOOD = {
    "SETTINGS": lambda at: make_frame(SETTINGS),
    "PING": lambda at: make_frame(PING, bytes(8)),
    "PRIORITY": lambda at: make_frame(PRIORITY, bytes(5), 0, 1),
    "empty DATA": lambda at: make_frame(DATA, *((b"\1\0", PADDED) if at % 2 else (b"", 0)), 1),
    "early resets": lambda at: head(2 * at + 3) + make_frame(RST_STREAM, bytes(4), 0, 2 * at + 3),
    "resets": lambda at: make_frame(RST_STREAM, bytes(4), 0, 2 * at + 3),
    "refused streams": lambda at: head(2 * at + 3),
    "stream errors": lambda at: head(2 * at + 3, block=encode([(b"a", b"b")])),
    "unknown frames": lambda at: make_frame(99, b"x", 0, at),
    "GOAWAY": lambda at: make_frame(GOAWAY, bytes(8)),
}


@pytest.mark.parametrize("what", FLOOD)
def test_a_flood_ends_the_connection(what, monkeypatch):
    monkeypatch.setitem(FLOODS, what, min(FLOODS[what], 1000))
    clock = FakeClock()
    end = server(head(1), clock=clock, streams_max=1 if what == "refused streams" else 1 << 20)
    clock.jump(FLOOD_SECONDS)

    def flood(at: int) -> bytes:
        if what == "resets":
            (opened,) = end.feed(head(2 * at + 3))
            end.head(opened.stream, OK)
        return FLOOD[what](at)

    first = 0
    for _ in range(2):  # so many in that time, and again
        for at in range(first, first + FLOODS[what]):
            end.feed(flood(at))
        first += FLOODS[what]
        clock.jump(FLOOD_SECONDS)
        assert len(end.data_to_send()) <= 100 * FLOODS[what]
    for at in range(first, first + FLOODS[what]):
        end.feed(flood(at))
    broken(end, flood(first + FLOODS[what]), ENHANCE_YOUR_CALM)


def test_a_flood_of_early_answers_ends_the_connection():
    end = client()
    early = head(1, block=encode([(b":status", b"103")]))
    end.feed(early * FLOODS["answers of 1xx"])
    broken(end, early, ENHANCE_YOUR_CALM)
    assert set(FLOOD) | {"answers of 1xx"} == set(FLOODS)


def test_streams_that_end_by_a_reset_are_no_flood_once_they_were_answered():
    """The original's client ends each of its streams so."""
    end = server(clock=FakeClock())
    for number in range(1, 4 * FLOODS["early resets"], 2):
        (opened,) = end.feed(head(number))
        end.head(opened.stream, OK)
        assert end.feed(make_frame(RST_STREAM, struct.pack(">I", CANCEL), 0, number)) == [Reset(opened.stream, CANCEL)]


def test_a_thousand_changes_of_all_windows_are_one():
    end = server(b"".join(head(number) for number in range(1, 2001, 2)))
    said = b"".join(struct.pack(">HI", 4, value) for value in range(2000))
    end.feed(make_frame(SETTINGS, said))
    assert {stream.sendable for stream in end.streams.values()} == {1999}


# -- mutations ---------------------------------------------------------------------------------


def conversation() -> tuple[bytes, bytes]:
    """What a client and a server say to each other, all kinds of frames."""
    both, said = Both(), {}
    for end in (both.client, both.server):
        said[end] = bytearray()

    def run():
        while both.client.out or both.server.out:
            for source, sink in ((both.client, both.server), (both.server, both.client)):
                data = source.data_to_send()
                said[source] += data
                for event in sink.feed(data):
                    if isinstance(event, Data):
                        sink.consume(event.stream, len(event.data))

    for number in range(1, 14, 2):
        ours = both.client.open(POST)
        run()
        theirs = both.server.streams[number]
        both.server.head(theirs, OK)
        both.client.send(ours, b"hello" * number)
        both.server.send(theirs, b"world" * 20 * number)
        both.client.ping(b"12345678")
        run()
        for act in random.Random(number).sample([
                lambda ours=ours: both.client.end(ours), lambda theirs=theirs: both.server.end(theirs),
                lambda ours=ours: both.client.reset(ours), lambda theirs=theirs: both.server.reset(theirs)], 2):
            act()
            run()
    both.server.go_away()
    run()
    extra = (make_frame(HEADERS, b"\2" + bytes(5) + HEAD[:5] + bytes(2), PADDED | HAS_PRIORITY, 15) +
             make_frame(CONTINUATION, HEAD[5:], END_HEADERS, 15) +
             make_frame(DATA, b"\4text" + bytes(4), PADDED | END, 15) +
             make_frame(PRIORITY, bytes(5), 0, 3) + make_frame(99, b"what") + setting(4, 100000))
    return bytes(said[both.client]) + extra, bytes(said[both.server])


CLIENT_SAYS, SERVER_SAYS = conversation()


@pytest.mark.parametrize("is_client", [False, True])
def test_mutated_conversations_end_in_broken_or_not_at_all(is_client):
    said, rng = (SERVER_SAYS if is_client else CLIENT_SAYS), random.Random(is_client)
    outcomes = set()
    for turn in range(1500):
        data = bytearray(said)
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            at = rng.randrange(0 if is_client else len(PREFACE), len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at] = rng.randrange(256)
            elif kind == 2:
                del data[at:at + rng.randrange(1, 30)]
            else:
                other = rng.randrange(len(said))
                data[at:at] = said[other:other + rng.randrange(1, 60)]
        end = H2(is_client, 8)
        for _ in range(8 * is_client):
            end.open(POST)
        at = 0
        try:
            while at < len(data):
                size = rng.choice((1, 3, 9, 10, 50, 5000))
                for event in end.feed(data[at:at + size]):
                    if isinstance(event, Data):
                        end.consume(event.stream, len(event.data))
                    elif isinstance(event, Opened) and rng.random() < 0.7:
                        end.head(event.stream, OK)
                        end.send(event.stream, bytes(rng.randrange(100)))
                        rng.choice((end.end, end.reset))(event.stream)
                at += size
            outcomes.add("whole")
        except Broken as error:
            outcomes.add(error.code)
        assert len(end.partial) <= CONTROL_MAX and len(end.block) <= BLOCK_MAX and len(end.streams) <= 8
        assert len(end.out) < 50000 and end.window <= WINDOW_MAX and end.held >= 0
    assert {"whole", PROTOCOL_ERROR, FRAME_SIZE_ERROR} <= outcomes, outcomes


def test_a_peer_that_says_half_of_everything_costs_little():
    end = server()
    tracemalloc.start()
    try:
        for number in range(1, 2 * sniroute_h2.STREAMS_MAX, 2):
            end.feed(head(number))
            end.head(end.streams[number], OK)
            end.data_to_send()
        end.feed(head(2 * sniroute_h2.STREAMS_MAX + 1, 0, bytes(CONTROL_MAX - 100))[:-1])
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


# -- with the h2 of PyPI -----------------------------------------------------------------------


def relay(ours: H2, theirs, events: list, heard: list) -> None:
    """Bytes go both ways until nobody says more; each DATA is consumed, and acknowledged."""
    while True:
        said, answer = bytes(ours.data_to_send()), theirs.data_to_send()
        if not said and not answer:
            return
        for event in theirs.receive_data(said):
            heard.append(event)
            if isinstance(event, h2.events.DataReceived):
                theirs.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        for event in ours.feed(answer):
            if isinstance(event, Data):
                events.append((event.stream.id, bytes(event.data)))
                ours.consume(event.stream, len(event.data))
            else:
                events.append(event)


def push(theirs, number: int, data: bytes) -> int:
    """Send what the windows allow."""
    sent = 0
    while sent < len(data) and (room := theirs.local_flow_control_window(number)):
        piece = data[sent:sent + min(room, theirs.max_outbound_frame_size)]
        theirs.send_data(number, piece)
        sent += len(piece)
    return sent


@needs_h2
@pytest.mark.parametrize("is_client", [True, False])
def test_bulk_both_ways_with_another_implementation(is_client):
    noise = random.Random(9).randbytes(3 << 20)
    theirs = h2.connection.H2Connection(h2.config.H2Configuration(client_side=not is_client, header_encoding=None))
    theirs.initiate_connection()
    ours, events, heard = H2(is_client), [], []
    relay(ours, theirs, events, heard)
    if is_client:
        stream = ours.open(POST)
        relay(ours, theirs, events, heard)
        theirs.send_headers(1, OK)
        relay(ours, theirs, events, heard)
        assert Answered(stream, 200, OK) in events
        assert [tuple(pair) for pair in next(event for event in heard if isinstance(
            event, h2.events.RequestReceived)).headers] == POST
    else:
        theirs.send_headers(1, POST)
        relay(ours, theirs, events, heard)
        stream = ours.streams[1]
        assert Opened(stream, POST) in events
        ours.head(stream, OK)
    up = down = 0
    while up < len(noise) or down < len(noise):
        up += ours.send(stream, noise[up:up + 200000])
        down += push(theirs, 1, noise[down:down + 200000])
        relay(ours, theirs, events, heard)
    ours.end(stream)
    theirs.end_stream(1)
    relay(ours, theirs, events, heard)
    assert b"".join(event[1] for event in events if type(event) is tuple) == noise
    assert b"".join(event.data for event in heard if isinstance(event, h2.events.DataReceived)) == noise
    assert Ended(stream) in events and any(isinstance(event, h2.events.StreamEnded) for event in heard)
    assert stream.state is CLOSED


@needs_h2
@pytest.mark.parametrize("is_client", [True, False])
def test_many_streams_resets_pings_and_settings_with_another_implementation(is_client):
    rng = random.Random(is_client)
    theirs = h2.connection.H2Connection(h2.config.H2Configuration(client_side=not is_client, header_encoding=None))
    theirs.initiate_connection()
    ours, events, heard = H2(is_client, 50), [], []
    relay(ours, theirs, events, heard)
    alive, last = {}, -1
    for turn in range(600):
        act = rng.randrange(8)
        if act < 2 and len(alive) < 40:
            last += 2
            if is_client:
                assert ours.may_open and ours.open(POST).id == last
                relay(ours, theirs, events, heard)
                theirs.send_headers(last, OK)
                alive[last] = ours.streams[last]
            else:
                theirs.send_headers(last, POST)
                relay(ours, theirs, events, heard)
                ours.head(ours.streams[last], OK)
                alive[last] = ours.streams[last]
        elif act == 2 and alive:
            ours.reset(alive.pop(rng.choice(list(alive))), rng.choice((NO_ERROR, CANCEL, INTERNAL_ERROR)))
        elif act == 3 and alive:
            theirs.reset_stream(number := rng.choice(list(alive)), 8)
            del alive[number]
        elif act == 4:
            ours.ping(b"12345678")
            theirs.ping(b"87654321")
        elif act == 5:
            theirs.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: rng.choice((65535, 100000, 1 << 20))})
        elif alive:
            number = rng.choice(list(alive))
            ours.send(alive[number], bytes(rng.randrange(3000)))
            push(theirs, number, bytes(rng.randrange(3000)))
        relay(ours, theirs, events, heard)
    assert set(ours.streams) == set(alive)
    assert not any(isinstance(event, h2.events.ConnectionTerminated) for event in heard)
