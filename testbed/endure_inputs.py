"""endure_inputs: mutated inputs for every parser, for testbed/endure.py; a part of them in a process of its own.

    python3 -m testbed.endure_inputs COUNT SEED      prints what came of it, as JSON

    a corpus of good inputs, and of nearly good ones --- mutated ---> a Check --- a fault ---> a line with the input

Each Check asks a parser about the whole, and about the same bytes in pieces.  What may come: its result, None, or
Malformed (Refused).  Anything else is a fault, and so is another answer in pieces; of HelloMemory, another answer than
that of a parser without a memory.  The seed determines every input.
"""

from __future__ import annotations

import collections
import json
import random
import struct
import sys
import traceback
from typing import Any, Callable, Iterator, NamedTuple

import sniroute_upgrade
from sniroute_http import parse_request
from sniroute_names import normalise
from sniroute_refusals import REFUSALS, Refused
from sniroute_upgrade import Answer, FrameReader
from sniroute_wire import (CANCEL_REQUEST, Hello, HelloMemory, HelloReader, Prelude, ProxyHeader, parse_client_hello,
                           parse_proxy_v1, parse_proxy_v2, parse_startup, whole_hello)
from testbed.hellos import (ASK_GSS, ASK_TLS, BAD_NAMES, GOOD_NAMES, GROUPS, HEADER, HEADER6, INET, INET6, LINE, LOCAL,
                            SIGNATURES, SNI, VERSIONS, alpn, body, extension, genuine, handshake, hello, host_name,
                            named, record, records, server_name, settled, summed, tlv, v1, v2, vector)
from testbed.smuggling import REQUESTS, Wire

FAULTS_MAX = 20  # faults that are reported: the first ones say enough


class Fault(Exception):
    """A parser did what it must not.  The message says what."""


class Bad(NamedTuple):
    """A refusal."""

    kind: str
    alert: int | None


def verdict(parse: Callable[[Any], Any], data: Any) -> Any:
    """What a parser says: its result, None, or a Bad.  Any other exception passes."""
    try:
        return parse(data)
    except Refused as error:
        if error.kind not in REFUSALS:
            raise Fault(f"refused as {error.kind!r}, which is no row of REFUSALS") from None
        return Bad(error.kind, error.alert)


# -- inputs ------------------------------------------------------------------------------------

# Bytes that mean something in one of the languages.
TELLING = b"\0\1\2\3\4\5\b\n\r\x10\x16 -.:~\x7f\x80\x81\x82\x88\xfe\xff"


def mutated(seeds: list[bytes], rng: random.Random) -> bytes:
    """A seed with one to four faults."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 16)))
        what = rng.randrange(9)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at:at] = rng.randbytes(rng.choice((1, 1, 2, 5)))
        elif what == 2:
            del data[at:end]
        elif what == 3:
            data[at:at] = data[at:end]
        elif what == 4 and rng.randrange(4) == 0:
            del data[at:]
        elif what == 5:
            other = rng.choice(seeds)
            data[at:] = other[rng.choice((at, rng.randrange(len(other) + 1))):]
        elif what == 6 and at + 1 < len(data):  # a length, a little wrong
            size = int.from_bytes(data[at:at + 2], "big") + rng.choice((-2, -1, 1, 2, 256))
            data[at:at + 2] = (size & 0xFFFF).to_bytes(2, "big")
        elif what == 7 and at < len(data) and chr(data[at]).isalpha():
            data[at] ^= 0x20
        elif at < len(data):
            data[at] = rng.choice(TELLING)
    return bytes(data)


def pieces(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """`data` in pieces: a few, or of one byte."""
    if len(data) < 600 and rng.randrange(8) == 0:
        cuts = list(range(1, len(data)))
    else:
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((1, 1, 2, 4))))
    for start, end in zip([0, *cuts], [*cuts, len(data)]):
        if start < end:
            yield data[start:end]


# -- checks ------------------------------------------------------------------------------------


def check_prefixes(parse: Callable[[bytes], Any], kind: type) -> Callable[[bytes, random.Random], Any]:
    """A check of a parser that is given all bytes so far: each prefix gives None, or what the whole gives."""
    def check(data: bytes, rng: random.Random) -> Any:
        whole = verdict(parse, data)
        if whole is not None and not isinstance(whole, (kind, Bad)):
            raise Fault(f"it says {whole!r}")
        end, decided = 0, None
        for piece in pieces(data, rng):
            end += len(piece)
            found = verdict(parse, data[:end])
            if decided is not None and found != decided:
                raise Fault(f"after {end} bytes {found!r}, and {decided!r} before")
            decided = found
        if decided != whole:
            raise Fault(f"in pieces {decided!r}, whole {whole!r}")
        return whole
    return check


def check_name(data: bytes, rng: random.Random) -> Any:
    """A name: a canonical one stays as it is."""
    found = verdict(normalise, data)
    if isinstance(found, str) and verdict(normalise, found.encode("ascii")) != found:
        raise Fault(f"{found!r} is not canonical")
    if not isinstance(found, (str, Bad)):
        raise Fault(f"it says {found!r}")
    return found


def check_body(data: bytes, rng: random.Random) -> Any:
    """The body of a hello, alone and inside a record."""
    if not 41 <= len(data) <= 16380:
        return None  # its callers never ask that
    found = verdict(parse_client_hello, data)
    if not isinstance(found, (tuple, Bad)):
        raise Fault(f"it says {found!r}")
    wire = record(handshake(data))
    inside = verdict(whole_hello, wire)
    if (inside[:2] if isinstance(inside, Hello) else inside) != found:
        raise Fault(f"alone {found!r}, in a record {inside!r}")
    return found


class Hellos:
    """Checks of hellos: with a memory, whole, and in pieces have to give the same."""

    def __init__(self) -> None:
        self.memory = HelloMemory()

    def check(self, data: bytes, rng: random.Random) -> Any:
        """As `check_prefixes`, and against the memory."""
        plain = verdict(HelloReader().read, data)
        if isinstance(plain, Hello):
            if not 0 < plain.end <= len(data) or plain.alpn is not None and not all(plain.alpn):
                raise Fault(f"it says {plain!r}")
        elif plain is not None and not isinstance(plain, Bad):
            raise Fault(f"it says {plain!r}")
        for name, read in (("whole_hello", whole_hello), ("the memory", self.memory.find)):
            found = verdict(read, data)
            if found is not None and found != plain:  # None leaves it to HelloReader
                raise Fault(f"{name} says {found!r}, and the reader {plain!r}")
        reader, end, found = HelloReader(), 0, None
        for piece in pieces(data, rng):
            end += len(piece)
            found = verdict(reader.read, data[:end])
            if found is not None:
                break
        if found != plain:
            raise Fault(f"in pieces {found!r}, whole {plain!r}")
        return plain

    def check_prelude(self, data: bytes, rng: random.Random) -> Any:
        """A prelude: with a memory and without, whole and in pieces."""
        policy, local = rng.choice(("allow", "allow", "refuse", "require")), rng.random() < 0.5
        first = Prelude(policy, local)
        whole = verdict(first.feed, data)
        if whole is not None and not isinstance(whole, (Hello, bytes, Bad)):
            raise Fault(f"it says {whole!r}")
        if verdict(Prelude(policy, local, self.memory).feed, data) != whole:
            raise Fault(f"with a memory something else than {whole!r}")
        if isinstance(whole, Hello) and first.header + first.data != data:
            raise Fault("what is forwarded is not what came")
        told = first.language()
        if not isinstance(told, tuple) or not 0 <= told[1] <= 255:
            raise Fault(f"language() says {told!r}")
        prelude, answers, found = Prelude(policy, local, rng.choice((None, self.memory))), 0, None
        for piece in pieces(data, rng):
            found = verdict(prelude.feed, piece)
            if isinstance(found, bytes):
                answers += 1  # S or N: had it waited, the rest would be another story
            elif found is not None:
                break
        if not answers and found != whole:
            raise Fault(f"policy {policy}, local {local}: in pieces {found!r}, whole {whole!r}")
        return whole


KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 section 1.3


def check_answer(data: bytes, rng: random.Random) -> Any:
    """The head of an HTTP answer, and whether it is the upgrade."""
    found = check_head(data, rng)
    if isinstance(found, Answer):
        if not 0 < found.end <= len(data):
            raise Fault(f"an end at {found.end}")
        upgraded = verdict(lambda answer: sniroute_upgrade.check_upgrade(answer, KEY), found)
        if upgraded is not None and not isinstance(upgraded, Bad):
            raise Fault(f"check_upgrade says {upgraded!r}")
    return found


check_head = check_prefixes(sniroute_upgrade.parse_answer, Answer)


def read_frames(parts: Iterator[bytes]) -> tuple[bytes, list[tuple[int, bytes]], Any]:
    """The payload, the control frames, and how it stands: inside a frame or not; or a Bad."""
    reader, payload, controls = FrameReader(), bytearray(), []
    for part in parts:
        found = verdict(reader.read, memoryview(part))
        if isinstance(found, Bad):
            return bytes(payload), controls, found
        for piece in found[0]:
            payload += piece
        controls += found[1]
        if any(opcode == sniroute_upgrade.CLOSE for opcode, _ in found[1]):
            return bytes(payload), controls, None  # nothing behind it is looked at
    return bytes(payload), controls, reader.is_inside()


def check_frames(data: bytes, rng: random.Random) -> Any:
    """Frames of a server."""
    payload, controls, stands = read_frames(iter([data]))
    in_pieces = read_frames(pieces(data, rng))
    if isinstance(stands, Bad):  # whole, what came before the fault is not handed out
        if in_pieces[2] != stands:
            raise Fault(f"in pieces {in_pieces[2]!r}, whole {stands!r}")
        return stands
    if in_pieces != (payload, controls, stands):
        raise Fault(f"in pieces {in_pieces!r}, whole {(payload, controls, stands)!r}")
    return bytes(payload)


# -- the corpus --------------------------------------------------------------------------------


def check_request(data: bytes, rng: random.Random) -> Any:
    """A request, all that is behind it, and the same in pieces: nothing that is refused in one way is taken in the other."""
    whole = verdict(parse_request, data)
    said = Wire()
    refused = verdict(said.feed, data)
    pieced = Wire()
    again = next(filter(None, (verdict(pieced.feed, piece) for piece in pieces(data, rng))), None)
    if (again is None) != (refused is None):
        raise Fault(f"in pieces {again!r}, whole {refused!r}")
    if pieced.heard != said.heard or refused is None and pieced.bodies != said.bodies:
        raise Fault("in pieces it is another")
    return whole


def server_frame(first: int, data: bytes) -> bytes:
    """A frame as a server sends it."""
    if len(data) < 126:
        return bytes((first, len(data))) + data
    return struct.pack("!BBH", first, 126, len(data)) + data if len(data) < 65536 else \
        struct.pack("!BBQ", first, 127, len(data)) + data


def corpus() -> dict[str, list[bytes]]:
    """Good inputs for each language, and some that are nearly good."""
    message = handshake(body(SNI, alpn(b"h2", b"http/1.1"), VERSIONS, GROUPS, SIGNATURES))
    hellos = [hello(), settled(genuine()), settled(genuine(("h2", "http/1.1"), "TLSv1_2")),
              settled(genuine(name=None)), record(message), records(message, 5, 60), records(message, *[1] * 40),
              hello(alpn(b"h2"), SNI), hello(named(b"DB.Example.COM"), extension(21, bytes(40))),
              hello(server_name(host_name(b"a.example.com"), host_name(b"b.example.com"))), hello(SNI, SNI),
              hello() + b"\x14\3\3\0\1\1", hello(named(b"192.0.2.1")), hello(session=vector(1, bytes(32)))]
    lines = [LINE, v1("UNKNOWN"), v1("UNKNOWN ffff::1 x y z"), v1("TCP6 2001:db8::1 2001:db8::2 1111 443"),
             v1("TCP4 255.255.255.255 255.255.255.255 65535 65535"), v1("TCP4 127.0.0.1 192.0.2.1 0 1")]
    blocks = [HEADER, HEADER6, LOCAL, summed(HEADER), summed(HEADER6, tlv(4, b"x")), v2(0x20, 0, b"healthy"),
              v2(0x21, 0x11, INET + tlv(2, b"db.example.com") + tlv(5, bytes(16))),
              v2(0x21, 0x21, INET6 + tlv(0x20, b"\7" + bytes(4) + tlv(0x21, b"TLSv1.3")))]
    startup = b"user\0me\0database\0db\0\0"
    postgres = [ASK_TLS, ASK_GSS, struct.pack(">IIII", 16, CANCEL_REQUEST, 1, 2),
                struct.pack(">II", 8 + len(startup), 0x30000) + startup,
                struct.pack(">II", 8 + len(startup), 0x30002) + startup]
    names = [name.encode() for name in GOOD_NAMES.values()] + [raw for raw in BAD_NAMES.values() if len(raw) < 300]
    preludes = [header + asked + wire for header in (b"", LINE, HEADER, LOCAL, summed(HEADER))
                for asked in (b"", ASK_TLS, ASK_GSS) for wire in hellos[:6]]
    preludes += [b"GET / HTTP/1.1\r\n\r\n", b"PUT / HTTP/1.0\r\n\r\n", b"SSH-2.0-x\r\n", *postgres, *lines, *blocks]
    upgrade = ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
               "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n").encode()
    answers = [upgrade + b"\r\n", upgrade + b"CF-RAY: 1-X\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\n\r\n\x82\5hello",
               b"HTTP/1.1 302 Found\r\nLocation: https://x.example.com/\r\nContent-Length: 0\r\n\r\n",
               b"HTTP/1.0 200 Connection established\r\n\r\n", b"HTTP/1.1 530\r\n\r\n",
               b"HTTP/1.1 502 Bad Gateway\r\nX: \xff\r\nY:\r\n\r\nbody"]
    one = server_frame(0x82, b"hello")
    frames = [one * 3, server_frame(0x82, bytes(126)) + one, server_frame(0x02, b"a") + server_frame(0x80, b"b"),
              server_frame(0x89, b"ping") + one + server_frame(0x88, b"\3\xe8bye"), server_frame(0x82, b"") + one,
              server_frame(0x02, b"a") + server_frame(0x8A, b"") + server_frame(0, b"c") + server_frame(0x80, b"d"),
              server_frame(0x82, bytes(300)), b"\x82\x7f" + (5).to_bytes(8, "big") + b"hello" + one]
    bodies = [wire[9:] for wire in hellos if wire[3:5] == (len(wire) - 5).to_bytes(2, "big")]
    return {"hellos": hellos, "bodies": bodies, "lines": lines, "blocks": blocks, "postgres": postgres, "names": names,
            "preludes": preludes, "answers": answers, "frames": frames,
            "requests": [row.data for row in REQUESTS if len(row.data) < 600]}


class Check(NamedTuple):
    """One parser's part of the inputs, as a row."""

    name: str
    seeds: str  # of the corpus
    share: int  # of the inputs; all shares add up to 100
    check: Callable[[bytes, random.Random], Any]


def checks() -> list[Check]:
    """All of them."""
    hellos = Hellos()
    return [
        Check("Prelude", "preludes", 22, hellos.check_prelude),
        Check("hellos", "hellos", 22, hellos.check),
        Check("parse_client_hello", "bodies", 8, check_body),
        Check("parse_proxy_v1", "lines", 8, check_prefixes(parse_proxy_v1, ProxyHeader)),
        Check("parse_proxy_v2", "blocks", 8, check_prefixes(parse_proxy_v2, ProxyHeader)),
        Check("parse_startup", "postgres", 6, check_prefixes(parse_startup, int)),
        Check("normalise", "names", 6, check_name),
        Check("parse_answer", "answers", 7, check_answer),
        Check("FrameReader", "frames", 7, check_frames),
        Check("parse_request", "requests", 6, check_request),
    ]


def run(count: int, seed: int) -> dict[str, Any]:
    """So many inputs.  Returns how many of each parser's were taken, refused and not decided, and the faults."""
    rng = random.Random(seed)
    seeds = corpus()
    report: dict[str, Any] = {"inputs": 0, "verdicts": {}, "faults": []}
    for row in checks():
        verdicts = collections.Counter()
        for _ in range(count * row.share // 100):
            data = mutated(seeds[row.seeds], rng)
            try:
                found = row.check(data, rng)
            except Exception as error:
                if len(report["faults"]) < FAULTS_MAX:
                    what = str(error) if isinstance(error, Fault) else traceback.format_exc(limit=-3)
                    report["faults"].append(f"{row.name}: {what}: input {data.hex()}")
                continue
            verdicts["refused" if isinstance(found, Bad) else "more" if found is None else "read"] += 1
        report["inputs"] += count * row.share // 100
        report["verdicts"][row.name] = verdicts
    return report


def main(words: list[str]) -> int:
    """The command line."""
    count, seed = map(int, words)
    print(json.dumps(run(count, seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
