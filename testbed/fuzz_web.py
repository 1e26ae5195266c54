"""fuzz_web: targets of testbed/fuzz.py for HTTP of all versions, and for WebSocket.

What a forwarder passes on is read again: it has to be the same messages, and to be passed on as it is.
"""

from __future__ import annotations

import struct
from typing import Any, Iterable, Iterator

import sniroute_answers
import sniroute_door as door
import sniroute_gateway as gateway
import sniroute_h2 as h2
import sniroute_hpack as hpack
import sniroute_http as http
import sniroute_http2 as http2
import sniroute_upgrade as upgrade
from sniroute_refusals import Refused
from testbed import endure_inputs, smuggling
from testbed.endure_inputs import pieces, server_frame
from testbed.fuzz_oracles import No, Told, choice_of, dice_of, expect, measured, outcome, same, sliced
from testbed.smuggling import Wire

# -- HTTP/1 ------------------------------------------------------------------------------------


def head_of(message: Any) -> Any:
    """What two readers have to agree on.  The version is each hop's own."""
    if isinstance(message, http.Request):
        return message.method, bytes(message.path), message.name, message.port or 80
    return message.status


def pieced(make: Any, data: bytes) -> tuple[Wire, Any]:
    """A Wire that was fed in pieces, and its No."""
    wire = make()
    return wire, next(filter(None, (outcome(wire.feed, piece) for piece in pieces(data, dice_of(data)))), None)


def messages(data: bytes, make: Any) -> Wire:
    """Messages whole and in pieces, and what is passed on, which a second reader takes as the same."""
    whole = make()
    refused = measured(data, lambda: outcome(whole.feed, data))
    cut, again = pieced(make, data)
    same(again, refused, "in pieces, and whole")
    same(cut.heard, whole.heard, "heard in pieces, and whole")
    if refused is None:
        same(cut.bodies, whole.bodies, "bodies in pieces, and whole")
        same(bytes(cut.out), bytes(whole.out), "passed on in pieces, and whole")
        same(outcome(cut.end), outcome(whole.end), "at the end")
    if not all(getattr(message, "name", "a") for message in whole.heard):
        return whole  # HTTP/1.0 without Host is passed on with the Host of its route
    second = make()
    same(outcome(second.feed, bytes(whole.out)), None, "what is passed on is refused")
    same([head_of(each) for each in second.heard], [head_of(each) for each in whole.heard], "passed on, and heard")
    if refused is None:
        same(second.bodies, whole.bodies, "bodies that are passed on, and heard")
        same(bytes(second.out), bytes(whole.out), "passed on twice, and once")
    return whole


POLICY = gateway.Policy("forward", cross_site=True, upgrades=frozenset((b"websocket", b"irc")))
FORGED = (b"x-forwarded-for", b"x-real-ip", b"x-forwarded-host", b"forwarded", b"x-forwarded-proto",
          b"x-forwarded-port")


def request(data: bytes) -> None:
    """Requests of a client, and what a gateway makes of them."""
    try:
        http.parse_request(data)
    except Refused as error:
        expect(sniroute_answers.refusal(error, None).startswith((b"HTTP/1.1 ", b"\0")), "no answer to a refusal")
    for message in messages(data, Wire).heard:
        outcome(gateway.check, message, POLICY)
        less = outcome(gateway.max_forwards, message)
        if isinstance(less, http.Request) and less is not message:
            expect(http.parse_lines(less.head.block).fields == less.head.fields, "the fields of another block")
        for believes in (False, True):
            said = gateway.hop(message, "192.0.2.7", 8080, believes)
            if not message.name:
                continue
            passed = http.pass_request(message, said, believes=believes,
                                       upgrade=gateway.choose_upgrade(message, POLICY))
            if passed.count(b"\r\n") - 2 > http.FIELDS_MAX:
                continue  # with those of ours there are too many for another router behind this one: it says so
            again = http.parse_request(passed)
            expect(again is not None and again.head.end == len(passed), "a head that is passed on is not whole")
            same((*head_of(again), again.framing.kind), (*head_of(message), message.framing.kind), "passed on")
            keys = [field.key for field in again.head.fields]
            if not believes:
                expect(all(keys.count(key) <= 1 for key in FORGED), f"a field that is there twice: {keys}")
                fors = again.head.values(b"x-forwarded-for")
                same(fors, [b"192.0.2.7"], "who asks")
        if message.name:
            expect(b"\r\n\r\n" in sniroute_answers.redirect(message, message.name, 80, None),
                   "an answer without an end")


def response(data: bytes) -> None:
    """Answers of a backend to a GET, a HEAD, or an upgrade."""
    method, upgrades = (("GET", ()), ("HEAD", ()), ("GET", (b"websocket",)))[choice_of(data, 3)]
    messages(data, lambda: Wire(method, upgrades))
    endure_inputs.check_answer(data, dice_of(data))


CHUNKED = http.parse_request(smuggling.CHUNKS)


def chunks(data: bytes) -> None:
    """A body in chunks: passed on as chunks, and taken out of them; both read the same bytes of it."""
    def hear(parts: Iterable[bytes]) -> Told:
        framed, inner = http.open_body(CHUNKED), http.open_body(CHUNKED, unframed=True)
        said, payload, rest = b"", b"", b""
        for part in parts:
            rest += part
            while rest and not framed.is_done:
                found, found2 = outcome(framed.feed, rest), outcome(inner.feed, rest)
                if isinstance(found, No) or isinstance(found2, No):
                    same(found, found2, "with chunks and without")
                    return Told(None, found)
                same(found[1], found2[1], "how much was used")
                expect(found[1] > 0, "nothing was used")
                said, payload, rest = said + b"".join(found[0]), payload + b"".join(found2[0]), rest[found[1]:]
        return Told((said, payload, rest), framed.is_done)

    told = sliced(data, hear)
    if not isinstance(told.stands, No):
        again = http.open_body(CHUNKED, unframed=True)
        payload, said = b"", told.events[0]
        while said:
            parts, used = again.feed(said)
            payload, said = payload + b"".join(parts), said[used:]
        same(payload, told.events[1], "what is in the chunks that are passed on")


def door_head(data: bytes) -> None:
    """The head of a request to admin, registry or master; `start` says how much was looked through before."""
    whole = measured(data, lambda: outcome(door.parse_head, data, allowed=(door.Declined,)))
    end, found = 0, None
    for piece in pieces(data, dice_of(data)):
        found = outcome(door.parse_head, data[:end + len(piece)], end, allowed=(door.Declined,))
        end += len(piece)
        if found is not None:
            break
    if isinstance(whole, No) and whole.words.startswith("the head is over"):
        expect(isinstance(found, No), "too large, and taken in pieces")
    elif data:
        same(found, whole, "in pieces, and whole")
    if whole is not None and not isinstance(whole, No):
        head, body = whole
        expect(0 < body <= len(data), f"a body at {body}")
        size = outcome(head.body_length, allowed=(door.Declined,))
        expect(isinstance(size, No) or 0 <= size <= door.BODY_MAX, f"a body of {size}")
        for name in (*head.fields, "host", "authorization"):
            outcome(head.field, name, allowed=(door.Declined,))
        expect(head.persists in (True, False), "neither")


# -- WebSocket ---------------------------------------------------------------------------------


def client_frame(first: int, data: bytes, key: bytes = b"\1\2\3\4") -> bytes:
    """A frame as a client sends it."""
    plain = server_frame(first, data)
    start = len(plain) - len(data)
    return bytes((plain[0], plain[1] | 0x80)) + plain[2:start] + key + upgrade.mask(data, key)


def heard_by(reader: upgrade.FrameReader | upgrade.EitherReader, parts: Iterable[bytes]) -> Told:
    """The payload and the control frames; what is behind a Close is not looked at."""
    payload, controls = bytearray(), []
    for part in parts:
        found = outcome(reader.read, memoryview(part))
        if isinstance(found, No):
            return Told(None, found)
        for piece in found[0]:
            payload += piece
        controls += found[1]
        expect(len(reader.part) <= 14 + upgrade.CONTROL_MAX, f"{len(reader.part)} bytes are kept")
        if any(opcode == upgrade.CLOSE for opcode, _ in found[1]):
            return Told((bytes(payload), controls), (0, b"closed"))
    return Told((bytes(payload), controls), (reader.left, reader.part))


def frames(data: bytes) -> None:
    """Frames of a server, to both readers: what EitherReader takes means the same to FrameReader."""
    said = sliced(data, lambda parts: heard_by(upgrade.FrameReader(), parts))
    either = sliced(data, lambda parts: heard_by(upgrade.EitherReader(False), parts))
    if not isinstance(either.stands, No):
        same(either, said, "EitherReader, and FrameReader")
    elif not isinstance(said.stands, No) and said.stands[1] == b"":  # it asks for a whole header first
        expect("text" in either.stands.words, f"only one of both readers says {either.stands.words}")


def masked_frames(data: bytes) -> None:
    """Frames of a client; and any payload in a frame of ours."""
    sliced(data, lambda parts: heard_by(upgrade.EitherReader(True), parts))
    payload = data[:65535]
    told = heard_by(upgrade.EitherReader(True), [upgrade.frame(upgrade.BINARY, payload)])
    same(told, Told((payload, []), (0, b"")), "a frame of ours")
    told = heard_by(upgrade.EitherReader(True), pieces(client_frame(0x82, payload), dice_of(data)))
    same(told, Told((payload, []), (0, b"")), "a frame in pieces")


# -- HTTP/2 ------------------------------------------------------------------------------------


def blocks_of(data: bytes) -> Iterator[bytes]:
    """Header blocks, each behind its length in two bytes."""
    at = 0
    while at + 2 <= len(data):
        size = int.from_bytes(data[at:at + 2], "big")
        yield data[at + 2:at + 2 + size]
        at += 2 + size


def in_blocks(*blocks: bytes) -> bytes:
    """The same, written."""
    return b"".join(struct.pack(">H", len(block)) + block for block in blocks)


CODES = {symbol: (code, bits) for symbol, code, bits in hpack.huffman_codes()}


def huffman(data: bytes) -> bytes:
    """A string in the Huffman code: the other direction, beside the room's own table."""
    number = size = 0
    for byte in data:
        code, bits = CODES[byte]
        number, size = number << bits | code, size + bits
    padding = -size % 8
    return (number << padding | (1 << padding) - 1).to_bytes((size + padding) // 8, "big")


def header_blocks(data: bytes) -> None:
    """Blocks of one connection, and any string in the Huffman code."""
    decoder, whole = hpack.Decoder(), b""
    for block in blocks_of(data):
        found = measured(data, lambda: outcome(decoder.decode, block))
        if isinstance(found, No):
            break
        expect(decoder.size == sum(map(hpack.cost, decoder.table)) <= decoder.most <= hpack.TABLE_MAX,
               "the table's size")
        expect(sum(map(hpack.cost, found)) <= hpack.LIST_MAX, "a list that is too large")
        same(hpack.Decoder().decode(hpack.encode(found)), found, "written and read")
    whole = outcome(hpack.decode_huffman, data)
    if not isinstance(whole, No):
        same(huffman(whole), data, "written in the Huffman code again")
    number = outcome(hpack.read_integer, data, 0, 5)
    if not isinstance(number, No):
        value, end = number
        expect(end <= len(data) and hpack.read_integer(hpack.write_integer(value, 5, 0), 0, 5)[0] == value, "a number")


def prior_knowledge(data: bytes) -> None:
    """The first request of a connection that begins with HTTP/2; what was looked at is not looked at again."""
    greeted = bool(choice_of(data, 2))
    whole = measured(data, lambda: outcome(http2.parse_authority, data, 0, greeted))
    buffer, seen, found = bytearray(), 0, None
    for piece in pieces(data, dice_of(data)):
        buffer += piece
        found = outcome(http2.parse_authority, buffer, seen, greeted)
        if found is not None:
            break
        expect(http2.awaits_settings(buffer) in (True, False), "neither") if len(buffer) > len(http2.PREFACE) else None
        seen = len(buffer)
    if data:
        same(found, whole, "in pieces, and whole")
    if isinstance(whole, http2.Authority):
        expect(len(http2.PREFACE) < whole.end <= min(len(data), http.HEAD_MAX) and 0 <= whole.port < 65536,
               f"{whole!r}")


def shown(events: Iterable[Any]) -> list[Any]:
    """Events of HTTP/2 or SPDY, as they are compared: streams by their numbers, neighbouring data joined."""
    found: list[Any] = []
    for event in events:
        if isinstance(event, h2.Data):
            if found and found[-1][:2] == ("Data", event.stream.id):
                found[-1] = "Data", event.stream.id, found[-1][2] + bytes(event.data)
            else:
                found.append(("Data", event.stream.id, bytes(event.data)))
        else:
            found.append((type(event).__name__, *(part.id if isinstance(part, h2.Stream) else part for part in event)))
    return found


POST = [(b":authority", b"none"), (b":method", b"POST"), (b":path", b"/stream"), (b":scheme", b"https")]
WINDOW_UPDATE = 8


def said_frames(data: bytes) -> list[bytes]:
    """What an end says, without the windows: those depend on how the bytes came."""
    found, at = [], len(http2.PREFACE) if data.startswith(http2.PREFACE) else 0
    while at < len(data):
        end = at + 9 + int.from_bytes(data[at:at + 3], "big")
        if data[at + 3] != WINDOW_UPDATE:
            found.append(bytes(data[at:end]))
        at = end
    return found


def hear_h2(is_client: bool, parts: Iterable[bytes]) -> Told:
    """One end of HTTP/2, whose owner reads nothing."""
    end = h2.H2(is_client, 5, clock=lambda: 0.0)
    for _ in range(3 * is_client):
        end.open(POST)
    events: list[Any] = []
    for part in parts:
        found = outcome(end.feed, part)
        most = 8 if is_client else 5
        expect(len(end.streams) <= most, f"{len(end.streams)} streams")
        expect(len(end.partial) <= h2.CONTROL_MAX + 9 and len(end.block) <= h2.BLOCK_MAX, "what is kept")
        expect(len(end.resets) <= h2.RESETS_KEPT and end.held <= h2.HELD_MAX, "resets, or what is held")
        if isinstance(found, No):
            said = said_frames(end.data_to_send())
            expect(said and said[-1][3] == http2.GOAWAY and end.is_over, "no GOAWAY at the end")
            same(end.feed(b"more"), [], "an end that is over, and hears more")
            return Told(None, found)
        events = shown_more(events, found)
    states = [(stream.id, stream.state, stream.has_head) for stream in end.streams.values()]
    return Told((events, said_frames(end.data_to_send())), (states, end.is_leaving, end.held))


def shown_more(events: list[Any], more: list[Any]) -> list[Any]:
    """Joined with those that were there."""
    for event in shown(more):
        if event[0] == "Data" and events and events[-1][:2] == event[:2]:
            event = *event[:2], events.pop()[2] + event[2]
        events.append(event)
    return events


def h2_server(data: bytes) -> None:
    """What a client says to a server."""
    sliced(data, lambda parts: hear_h2(False, parts))


def h2_client(data: bytes) -> None:
    """What a server says to a client that has three streams."""
    sliced(data, lambda parts: hear_h2(True, parts))


def h2_pair(data: bytes) -> None:
    """Two ends that do what the bytes say: all that was sent on a stream comes, in order, and no end has a fault."""
    ends = h2.H2(True, clock=lambda: 0.0), h2.H2(False, 5, clock=lambda: 0.0)
    streams: tuple[dict[int, h2.Stream], dict[int, h2.Stream]] = {}, {}
    sent: dict[tuple[int, int], bytearray] = {}
    got: dict[tuple[int, int], bytearray] = {}
    unread: dict[tuple[int, int], int] = {}
    broken = set()

    def carry() -> None:
        for _ in range(40):
            if not any(end.out for end in ends):
                return
            for at in (0, 1):
                for event in ends[1 - at].feed(ends[at].data_to_send()):
                    if isinstance(event, (h2.Data, h2.Opened, h2.Answered)):
                        streams[1 - at].setdefault(event.stream.id, event.stream)
                    if isinstance(event, h2.Opened):
                        ends[1].head(event.stream, [(b":status", b"200")])
                    if isinstance(event, h2.Data):
                        got.setdefault((at, event.stream.id), bytearray()).extend(event.data)
                        unread[1 - at, event.stream.id] = unread.get((1 - at, event.stream.id), 0) + len(event.data)
                    if isinstance(event, h2.Reset):
                        broken.add(event.stream.id)

    carry()
    for op, size in zip(data[:256:2], data[1:256:2]):
        at = op & 1
        end, known = ends[at], [stream for stream in streams[at].values()]
        stream = known[op >> 4 & 7] if op >> 4 & 7 < len(known) and len(known) > (op >> 4 & 7) else None
        what = op >> 1 & 7
        if what == 0 and not at and end.may_open:
            stream = end.open(POST)
            streams[0][stream.id] = stream
        elif what in (1, 2) and stream is not None:
            wants = bytes((size,)) * (size * 129 if what == 2 else size)
            count = end.send(stream, wants)
            sent.setdefault((at, stream.id), bytearray()).extend(wants[:count])
        elif what == 3 and stream is not None:
            end.end(stream)
        elif what == 4 and stream is not None and size < 64:
            broken.add(stream.id)
            end.reset(stream)
        elif what == 5 and stream is not None:
            end.consume(stream, unread.pop((at, stream.id), 0))
        elif what == 6:
            end.ping(bytes((size,)) * 8)
        elif what == 7:
            carry()
    carry()
    for (at, number), said in sent.items():
        heard = got.get((at, number), b"")
        expect(said == heard or number in broken and said.startswith(heard), f"stream {number}: {len(heard)} bytes of "
                                                                            f"{len(said)} came")


# -- seeds -------------------------------------------------------------------------------------

REQUESTS = tuple(row.data for row in smuggling.REQUESTS if len(row.data) < 600)
RESPONSES = tuple(row.data for row in smuggling.RESPONSES if len(row.data) < 600)
FULL = (b"POST /a?b HTTP/1.1\r\nHost: a.example.com:8080\r\nConnection: upgrade, x-a\r\nUpgrade: websocket\r\nX-A: "
        b"1\r\n"
        b"X-Forwarded-For: 192.0.2.1, 192.0.2.2\r\nX_Real_IP: 192.0.2.3\r\nForwarded: for=a\r\nVia: 1.1 x\r\n"
        b"Origin: http://b\r\nSec-Fetch-Site: cross-site\r\nContent-Length: 3\r\n\r\nabc",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\nMax-Forwards: 7\r\n\r\n", b"GET http://a.example.com:80/x HTTP/1.0\r\n\r\n")
HTTP_WORDS = (b"Host: ", b"Content-Length: ", b"Transfer-Encoding: ", b"chunked", b"\r\n\r\n", b"\r\n", b"HTTP/1.1",
              b"HTTP/1.0", b"Connection: ", b"close", b"Upgrade: ", b"websocket", b"Expect: 100-continue\r\n",
              b"0\r\n\r\n",
              b"X-Forwarded-For: ", b"Via: ", b"Max-Forwards: ", b"GET ", b"HEAD ", b"CONNECT ", b"OPTIONS ",
              b"http://",
              b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"0", b"ffffffff", b"%00", b"\t", b"*", b",")
CHUNK_SEEDS = (b"5\r\nhello\r\n0\r\n\r\n", b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
               b"1\r\nh\r\n04\r\nello\r\n000\r\n\r\nmore",
               b'5;a="b;c"\r\nhello\r\nA\r\n0123456789\r\n0\r\n\r\n', b"0\r\n\r\n",
               *(row.data.partition(b"\r\n\r\n")[2] for row in smuggling.REQUESTS
                 if row.data.startswith(smuggling.CHUNKS) and len(row.data) < 600))
HEAD_SEEDS = (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"POST /routes?x=y HTTP/1.1\r\nHost: a\r\nContent-Length: "
                                                            b"2\r\n\r\n{}",
              b"PUT /a HTTP/1.0\nHost: a\nConnection: close, x\n\n", b"GET / HTTP/2.0\r\n\r\n",
              b"DELETE /routes/a HTTP/1.1\r\nAuthorization: Bearer x\r\nTransfer-Encoding: chunked\r\n\r\n", *FULL)

FRAME_SEEDS = endure_inputs.corpus()["frames"]
CLIENT_FRAMES = (client_frame(0x82, b"hello") * 2, client_frame(0x82, bytes(126)) + client_frame(0x88, b"\3\xe8bye"),
                 client_frame(0x02, b"a") + client_frame(0x89, b"ping") + client_frame(0x80, b"b", bytes(4)),
                 client_frame(0x82, b"") + client_frame(0x8A, b"1"), client_frame(0x82, bytes(range(256)) * 3),
                 b"\x82\xff" + (5).to_bytes(8, "big") + b"keyshello", client_frame(0x81, b"text"))

GET = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"web.example.com"), (b":path", b"/a?b=c"),
       (b"user-agent", b"x")]
C4 = tuple(map(bytes.fromhex, ("828684418cf1e3c2e5f23a6ba0ab90f4ff", "828684be5886a8eb10649cbf",
                               "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf")))  # RFC 7541 appendix C.4
C3 = tuple(map(bytes.fromhex, ("828684410f7777772e6578616d706c652e636f6d", "828684be58086e6f2d6361636865",
                               "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565")))
SIZES = bytes.fromhex("3fe1073fe11f4183a8f5178344856109b0a3a78750839bd9ab7a8dc475a74a6b589418b525812e0f")
HPACK_SEEDS = (in_blocks(*C4), in_blocks(*C3), in_blocks(hpack.encode(GET)), in_blocks(SIZES, hpack.encode(POST)),
               huffman(b"www.example.com"), huffman(bytes(range(256))), in_blocks(b"\x20" + C3[0], C3[1]),
               b"\x1f\x9a\x0a")


def head(block: bytes, stream: int = 1, flags: int = http2.END_HEADERS) -> bytes:
    """A HEADERS frame."""
    return http2.make_frame(http2.HEADERS, block, flags, stream)


def settings(*pairs: tuple[int, int]) -> bytes:
    """A SETTINGS frame."""
    return http2.make_frame(http2.SETTINGS, b"".join(struct.pack(">HI", *pair) for pair in pairs))


ACKED = http2.make_frame(http2.SETTINGS, flags=http2.ACK)
SOME = (http2.make_frame(http2.PING, b"12345678") + http2.make_frame(WINDOW_UPDATE, b"\0\0\1\0")
        + http2.make_frame(http2.PRIORITY, b"\0\0\0\3\x0f", 0, 5) + http2.make_frame(0xB, b"grease", 0xFF, 7))
START = http2.PREFACE + settings((1, 65536), (4, 1 << 20), (5, 16384))
DATA_FRAMES = (http2.make_frame(http2.DATA, b"hello", 0, 1) + http2.make_frame(http2.DATA, b"\2more\0\0", 8, 1)
               + http2.make_frame(http2.DATA, b"", 1, 1))
BLOCK, ANSWER = hpack.encode(GET), hpack.encode([(b":status", b"200"), (b"content-type", b"x")])
PRIOR_SEEDS = (START + head(BLOCK), http2.PREFACE + settings() + SOME + head(BLOCK, 13) + b"behind",
               START + ACKED + head(BLOCK), START + head(BLOCK) + ACKED,
               START + head(b"\5" + BLOCK + bytes(5), 1, http2.END_HEADERS | http2.PADDED),
               START + head(b"\0\0\0\3\x0f" + BLOCK, 1, http2.END_HEADERS | http2.HAS_PRIORITY),
               START + head(BLOCK[:3], 1, 0) + http2.make_frame(http2.CONTINUATION, BLOCK[3:], http2.END_HEADERS, 1),
               START + head(C4[0]))
SERVER_SEEDS = (START + head(BLOCK) + DATA_FRAMES, START + SOME + head(BLOCK, 1, 5) + head(C4[0], 3) + head(C4[1], 5)
                + http2.make_frame(http2.RST_STREAM, b"\0\0\0\x08", 0, 3) + DATA_FRAMES,
                START + head(BLOCK[:4], 1, 0) + http2.make_frame(http2.CONTINUATION, BLOCK[4:], 4, 1) + DATA_FRAMES
                + head(hpack.encode([(b"x-trailer", b"y")]), 1, 5), START
                + http2.make_frame(http2.GOAWAY, bytes(8) + b"bye"),
                START + b"".join(head(BLOCK, number) for number in range(1, 15, 2)) + ACKED)
CLIENT_SEEDS = (settings((3, 100)) + head(ANSWER) + DATA_FRAMES, settings() + ACKED
                + head(hpack.encode([(b":status", b"103")]))
                + head(ANSWER, 3, 5) + SOME + http2.make_frame(http2.RST_STREAM, b"\0\0\0\0", 0, 5),
                settings((4, 0)) + http2.make_frame(http2.GOAWAY, struct.pack(">II", 1, 0) + b"bye") + head(ANSWER),
                settings((3, 1), (5, 16384), (1, 4096)) + http2.make_frame(http2.PING, b"12345678", 1) + DATA_FRAMES)
PAIR_SEEDS = (bytes((0, 0, 0x0E, 0, 0x02, 9, 0x0E, 0, 0x03, 200, 0x0E, 0, 0x0A, 0, 0x0B, 0, 6, 0, 7, 0)),
              bytes((0, 0, 0, 0, 0, 0, 0x0E, 0, 0x12, 250, 0x14, 250, 0x15, 255, 0x14, 255, 0x1A, 0, 0x1B, 0, 0x1E, 0,
                     0x16, 0)),
              bytes((0, 0, 0x0E, 0, *(0x04, 255) * 40, 0x0E, 0, 0x0B, 0, *(0x04, 255) * 30, 0x0E, 0, 0x08, 1)))
