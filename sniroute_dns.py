"""sniroute_dns: DNS messages that change a zone, and what proves who sent them, without I/O.

    "rfc2136://ns.example.com/tun.example.com?key=router" --- parse_url ---> Zone    where, and what is written
    SNIROUTE_DNS_KEY ---------------------------------------- parse_key ---> Key     which is never shown

    claim, replace, remove, look_up ---> Request    a signed message; what it asks for is in the table below
    what came ---- read_answer --------> Answer     or Malformed: not an answer to this request, or not a proven one
    TCP: frame, unframe                             a length in front; None for "need more"

Each name that is ours has addresses, and one TXT record, a Mark: it says whose the name is, and which addresses were
written for it:

    foo.tun.example.com.  60  A    192.0.2.1
    foo.tun.example.com.  60  TXT  "sniroute=<id>" "192.0.2.1"

    request    the server does it only where                 then it
    claim      the name is not in use                        adds addresses and mark
    replace    the TXT records are exactly those we know     removes what the old mark names, adds addresses and mark
    remove     the same                                      removes the mark, and what it names
    look_up    -                                             tells the TXT records

So two writers never delete each other's records, nor a human's: the server compares and writes in one step.  What a
human adds beside ours stays, and the addresses of an earlier start are known, though this process did not write them.

The answer has to prove itself by the same key.  One that reports a failure may be unsigned: a server that does not know
the key cannot sign.  It is taken as a failure, and nothing else.

Threads: none.

Seams: I want to ...
    write another record    `Mark.records`; what removes it again has to be in the mark
    name another failure    a row in REASONS, and in RCODES
    another digest          ALGORITHM and `digest`

Sources: RFC 1035 (messages), RFC 2136 (updates), RFC 8945 (TSIG).

This room imports sniroute_names and sniroute_refusals (Malformed).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re
import struct
import urllib.parse
from typing import Iterable, NamedTuple, Sequence

from sniroute_names import Address, normalise, parse_host_port, printable, show_address, unmapped
from sniroute_refusals import Malformed

__version__ = "0.1.0"

# Types and classes, RFC 1035 section 3.2, RFC 2136 section 2.4.
A, SOA, TXT, AAAA, TSIG, ANY_KIND = 1, 6, 16, 28, 250, 255
IN, NONE, ANY = 1, 254, 255
QUERY, UPDATE = 0, 5  # opcodes
RESPONSE, TRUNCATED = 0x8000, 0x0200  # flags
NOERROR, YXDOMAIN, NXRRSET, NXDOMAIN, NOTAUTH, BADTIME = 0, 6, 8, 3, 9, 18

UDP_MAX = 512  # bytes that every server takes in a datagram, RFC 1035 section 4.2.1
MESSAGE_MAX = 65535  # bytes by TCP: what a length of two bytes can say
NAME_BYTES = 255  # of a name on the wire, section 3.1
FUDGE = 300  # seconds that two clocks may differ, RFC 8945 section 10
ADDRESSES_MAX = 8  # of a name: a client tries no more of them before it gives up
TTL_DEFAULT, TTL_MAX = 60, 86400  # seconds.  Names come and go, so nobody is to remember them for long
SECRET_LEAST = 16  # bytes: a shorter one can be guessed from what is on the wire
ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")  # of a mark: whose a name is

_header = struct.Struct(">6H")
_question = struct.Struct(">HH")
_record = struct.Struct(">HHIH")
_two = struct.Struct(">H")
_tsig = struct.Struct(">HIHH")  # the time in two parts (48 bits), fudge, the MAC's length
_tsig_end = struct.Struct(">HHH")  # the request's id, the error, the length of what follows

KEY_VARIABLE = "SNIROUTE_DNS_KEY"
FORM = "rfc2136://SERVER[:PORT]/ZONE?key=NAME"

# Why a server did not do it: a word for programs, and a sentence for people.
REASONS = {
    "formerr": "the server does not understand the update",
    "servfail": "the server could not do it: its log says why, often a zone file or a journal that it cannot write",
    "nxdomain": "the server says that there is no such name",
    "notimp": "the server takes no updates",
    "refused": "the server does not allow it: allow-update or update-policy of the zone has to name the key",
    "taken": "the name is in use, and its records are not ours: they stay as they are",
    "changed": "somebody changes the same records at the same time",
    "yxrrset": "the server says that there are such records already",
    "notauth": "the server is not the primary server of the zone",
    "notzone": "the server says that the name is not in the zone",
    "badsig": "the server has another secret for the key, or something between changes the messages",
    "badkey": "the server does not know the key: its name and algorithm (hmac-sha256) have to be the same there",
    "badtime": "the clocks of this host and of the server differ by more than 5 minutes",
    "badtrunc": "the server wants a longer signature",
    "rcode": "the server answered with a failure of another kind",
}
# Sources: RFC 1035 section 4.1.1, RFC 2136 section 2.2, RFC 8945 section 5.3.
RCODES = {1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED", 6: "YXDOMAIN", 7: "YXRRSET",
          8: "NXRRSET", 9: "NOTAUTH", 10: "NOTZONE", 16: "BADSIG", 17: "BADKEY", 18: "BADTIME", 22: "BADTRUNC"}
MEANINGS = {"YXDOMAIN": "taken", "NXRRSET": "changed"}  # the words of REASONS for these; any other is its own, in small


# -- what an operator writes -------------------------------------------------------------------


class Zone(NamedTuple):
    """Where names are written, and how."""

    host: str  # of the primary server
    port: int
    name: str  # of the zone
    key: str  # the name of the key
    ttl: int  # of the records, in seconds
    addresses: tuple[Address, ...]  # (): the one from which this host reaches the server

    def __str__(self) -> str:
        return f"{self.name} at {show_address((self.host, self.port))}"

    def holds(self, name: str) -> bool:
        """Whether a name belongs into the zone: the zone's own name does not."""
        return name.endswith(f".{self.name}")


class Key:
    """A key that this host and the server share.  It shows its name only."""

    __slots__ = ("name", "secret")

    def __init__(self, name: str, secret: bytes):
        self.name = name
        self.secret = secret

    def __repr__(self) -> str:
        return f"Key({self.name!r})"


def parse_url(text: str) -> Zone:
    """`rfc2136://SERVER[:PORT]/ZONE?key=NAME[&ttl=60][&address=192.0.2.1,2001:db8::1]`.

    Raises ValueError with a sentence, which never repeats what may be a secret.
    """
    scheme, colon, rest = text.partition("://")
    if not colon or scheme.lower() != "rfc2136":
        raise ValueError(f"it is not {FORM}")
    place, _, query = rest.partition("?")
    server, slash, path = place.partition("/")
    if "@" in place:
        raise ValueError(f"the server has no user and no password: the secret of the key goes into {KEY_VARIABLE}")
    if "#" in rest or not text.isprintable():
        raise ValueError(f"it is not {FORM}")
    try:
        host, port = parse_host_port(server if re.search(r":\d*\Z", server.rpartition("]")[2]) else f"{server}:53")
    except ValueError:
        raise ValueError(f"{printable(server, 80)!r} is no server: HOST, HOST:PORT or [::1]:PORT") from None
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,253}", host) or not port:
        raise ValueError(f"{printable(server, 80)!r} is no server: HOST, HOST:PORT or [::1]:PORT")
    if not slash or not path:
        raise ValueError(f"it names no zone: {FORM}")
    zone = _parse_name(path, "zone")
    found = _parse_query(query)
    if "key" not in found:
        raise ValueError(f"it names no key: {FORM}")
    ttl = found.get("ttl", str(TTL_DEFAULT))
    if not re.fullmatch(r"[0-9]{1,5}", ttl, re.ASCII) or not 1 <= int(ttl) <= TTL_MAX:
        raise ValueError(f"ttl: {printable(ttl, 40)!r} is not a number of seconds from 1 to {TTL_MAX}")
    addresses = _parse_addresses(found["address"]) if "address" in found else ()
    return Zone(host, port, zone, _parse_name(found["key"], "key"), int(ttl), addresses)


def _parse_query(query: str) -> dict[str, str]:
    """What is behind the `?`.  Raises ValueError."""
    found: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if name not in ("key", "ttl", "address"):
            raise ValueError(f"{printable(name, 40)!r} is none of key, ttl and address"
                             f" (the secret of the key goes into {KEY_VARIABLE})")
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = urllib.parse.unquote(value)
        if not found[name]:
            raise ValueError(f"{name} is empty")
    return found


def _parse_name(text: str, what: str) -> str:
    try:
        return normalise(text.encode("ascii"))
    except (UnicodeError, Malformed):
        raise ValueError(f"{what}: {printable(text, 80)!r} is not a name in DNS") from None


def _parse_addresses(text: str) -> tuple[Address, ...]:
    addresses = []
    for word in text.split(","):
        try:
            address = unmapped(ipaddress.ip_address(word.strip()))
        except ValueError:
            raise ValueError(f"address: {printable(word, 60)!r} is not an IPv4 or IPv6 address") from None
        if address.is_unspecified or address.is_multicast or "%" in word:
            raise ValueError(f"address: nobody can connect to {address}")
        if address not in addresses:
            addresses.append(address)
    if len(addresses) > ADDRESSES_MAX:
        raise ValueError(f"address: {len(addresses)} addresses; {ADDRESSES_MAX} are the most")
    return tuple(addresses)


def parse_key(name: str, text: str) -> Key:
    """The key of this name; `text` is its secret in base64, as KEY_VARIABLE has it.  Raises ValueError, without it."""
    try:
        secret = base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, binascii.Error):
        raise ValueError(f"{KEY_VARIABLE}: it is not base64, as `tsig-keygen -a hmac-sha256 {name}` prints it"
                         ) from None
    if not secret:
        raise ValueError(f"{KEY_VARIABLE}: it is empty: it has the secret of the key {name} in base64")
    if len(secret) < SECRET_LEAST:
        raise ValueError(f"{KEY_VARIABLE}: the secret has {len(secret)} bytes; it needs {SECRET_LEAST}:"
                         f" `tsig-keygen -a hmac-sha256 {name}` makes one")
    return Key(name, secret)


# -- names and records -------------------------------------------------------------------------


class Record(NamedTuple):
    """One resource record.  Source: RFC 1035 section 4.1.3."""

    name: str  # as `read_name` has it
    kind: int  # its type
    group: int  # its class
    ttl: int  # seconds
    data: bytes


def write_name(name: str) -> bytes:
    """A name on the wire, uncompressed.  It has passed `normalise`."""
    return b"".join(bytes((len(label),)) + label for label in name.encode("ascii").split(b".")) + b"\0"


def read_name(data: bytes, at: int) -> tuple[str, int]:
    """The name that begins there, and where it ends.  Letters are small; what no host name has is `\\ddd`.

    Raises Malformed.  A pointer leads back, always to before where the last one led: so there is no loop.
    Source: RFC 1035 section 4.1.4.
    """
    labels: list[str] = []
    size, first, end = 1, at, 0
    while True:
        if at >= len(data):
            raise Malformed("a name that is cut")
        length = data[at]
        if length >= 0xC0:
            if at + 2 > len(data):
                raise Malformed("a name that is cut")
            to = _two.unpack_from(data, at)[0] & 0x3FFF
            end = end or at + 2
            if to >= first:
                raise Malformed("a name that points to itself, or forwards")
            at = first = to
            continue
        if length > 63:
            raise Malformed("a label of an unknown kind")
        at += 1
        if not length:
            return ".".join(labels), end or at
        size += length + 1
        if size > NAME_BYTES:
            raise Malformed("a name that is too long")
        if at + length > len(data):
            raise Malformed("a name that is cut")
        labels.append("".join(_ESCAPED[byte] for byte in data[at:at + length]))
        at += length


_ESCAPED = [chr(byte).lower() if 0x21 <= byte <= 0x7E and byte not in b".\\\"" else f"\\{byte:03}"
            for byte in range(256)]


def text_data(strings: Iterable[bytes]) -> bytes:
    """The data of a TXT record; a string has 255 bytes at most.  Source: RFC 1035 section 3.3.14."""
    return b"".join(bytes((len(string),)) + string for string in strings)


def read_text(data: bytes) -> tuple[bytes, ...]:
    """The strings of a TXT record.  Raises Malformed."""
    strings, at = [], 0
    while at < len(data):
        end = at + 1 + data[at]
        if end > len(data):
            raise Malformed("a TXT record that is cut")
        strings.append(data[at + 1:end])
        at = end
    return tuple(strings)


class Mark(NamedTuple):
    """Whose a name is, and what was written for it."""

    id: str  # of ID; whoever has the same one is the same owner
    addresses: tuple[Address, ...]

    @property
    def data(self) -> bytes:
        """The TXT record that says so."""
        return text_data(word.encode("ascii") for word in (f"sniroute={self.id}", *map(str, self.addresses)))

    def records(self, name: str, ttl: int) -> list[Record]:
        """All that is written."""
        return [*(address_record(name, address, ttl) for address in self.addresses),
                Record(name, TXT, IN, ttl, self.data)]


def read_mark(data: bytes) -> Mark | None:
    """The mark that the data of a TXT record has; None where it is somebody else's record."""
    try:
        first, *rest = [string.decode("ascii") for string in read_text(data)]
        addresses = tuple(map(ipaddress.ip_address, rest))
    except (Malformed, ValueError):  # of which UnicodeError is one
        return None
    prefix, equals, number = first.partition("=")
    if prefix != "sniroute" or not ID.fullmatch(number):
        return None
    mark = Mark(number, addresses)
    return mark if mark.data == data else None  # in another spelling it is not what we write


def address_record(name: str, address: Address, ttl: int) -> Record:
    """The A or AAAA record of an address."""
    return Record(name, A if address.version == 4 else AAAA, IN, ttl, address.packed)


def removal(record: Record) -> Record:
    """What removes exactly this record.  Source: RFC 2136 section 2.5.4."""
    return record._replace(group=NONE, ttl=0)


# -- messages ----------------------------------------------------------------------------------


class Writer:
    """A message in the making.  A name that was written before, or the end of one, becomes a pointer.

    Args:
        number: the message's id.
        flags: with the opcode.
        counts: of the records in its four sections.
    """

    __slots__ = ("out", "known")

    def __init__(self, number: int, flags: int, counts: Sequence[int]):
        self.out = bytearray(_header.pack(number, flags, *counts))
        self.known: dict[str, int] = {}  # names, and where they stand

    def name(self, name: str) -> None:
        """Write a name.  Source: RFC 1035 section 4.1.4."""
        while name:
            if name in self.known:
                self.out += _two.pack(0xC000 | self.known[name])
                return
            self.known[name] = len(self.out)  # the zone and one name: a pointer reaches both
            label, _, name = name.partition(".")
            self.out.append(len(label))
            self.out += label.encode("ascii")
        self.out.append(0)

    def question(self, name: str, kind: int) -> None:
        """Write a question, or the zone of an update."""
        self.name(name)
        self.out += _question.pack(kind, IN)

    def record(self, record: Record) -> None:
        """Write a record."""
        self.name(record.name)
        self.out += _record.pack(record.kind, record.group, record.ttl, len(record.data)) + record.data


class Signature(NamedTuple):
    """A TSIG record.  Source: RFC 8945 section 4.2."""

    key: str  # its name
    algorithm: str
    time: int  # seconds since 1970
    fudge: int  # seconds
    mac: bytes
    number: int  # the id that the message had when it was signed
    error: int
    other: bytes  # with BADTIME the server's time
    at: int  # where it begins in the message


class Message(NamedTuple):
    """A message, taken to pieces."""

    number: int
    flags: int
    answers: tuple[Record, ...]  # of an update: its prerequisites
    others: tuple[Record, ...]  # of the sections behind it, without the signature
    signature: Signature | None

    @property
    def opcode(self) -> int:
        return self.flags >> 11 & 15

    @property
    def rcode(self) -> int:
        return self.flags & 15


def parse(data: bytes) -> Message:
    """Take a whole message to pieces.  Raises Malformed.  Source: RFC 1035 section 4.1."""
    if len(data) < _header.size:
        raise Malformed("a DNS message that is cut")
    number, flags, questions, *counts = _header.unpack_from(data)
    at = _header.size
    for _ in range(questions):
        _, at = read_name(data, at)
        at += _question.size
        if at > len(data):
            raise Malformed("a question that is cut")
    sections: list[list[Record]] = []
    signature = None
    for count in counts:
        sections.append([])
        for _ in range(count):
            if signature is not None:
                raise Malformed("a record behind the signature")
            start = at
            record, at = _read_record(data, at)
            if record.kind == TSIG:
                if len(sections) != 3:
                    raise Malformed("a signature in the wrong section")
                signature = _read_signature(data, record, start, at)
            else:
                sections[-1].append(record)
    if at != len(data):
        raise Malformed("bytes behind the message")
    return Message(number, flags, tuple(sections[0]), (*sections[1], *sections[2]), signature)


def _read_record(data: bytes, at: int) -> tuple[Record, int]:
    name, at = read_name(data, at)
    if at + _record.size > len(data):
        raise Malformed("a record that is cut")
    kind, group, ttl, length = _record.unpack_from(data, at)
    at += _record.size
    if at + length > len(data):
        raise Malformed("a record that is cut")
    return Record(name, kind, group, ttl, data[at:at + length]), at + length


def _read_signature(data: bytes, record: Record, start: int, end: int) -> Signature:
    algorithm, at = read_name(data[:end], end - len(record.data))
    if record.group != ANY or record.ttl or at + _tsig.size > end:
        raise Malformed("a signature that is cut, or has another class or a TTL")
    high, low, fudge, length = _tsig.unpack_from(data, at)
    at += _tsig.size
    if at + length + _tsig_end.size > end:
        raise Malformed("a signature that is cut")
    number, error, size = _tsig_end.unpack_from(data, at + length)
    if at + length + _tsig_end.size + size != end:
        raise Malformed("a signature whose length is wrong")
    return Signature(record.name, algorithm, high << 32 | low, fudge, data[at:at + length], number, error,
                     data[end - size:end], start)


# -- signatures --------------------------------------------------------------------------------

ALGORITHM = "hmac-sha256"


def _times(time: int, fudge: int) -> bytes:
    return struct.pack(">HIH", time >> 32, time & 0xFFFFFFFF, fudge)


def digest(key: Key, message: bytes, time: int, fudge: int, error: int, other: bytes, asked: bytes) -> bytes:
    """The MAC of a message.  `asked`: the MAC of the request, where this is its answer; else empty.

    Source: RFC 8945 section 4.3.
    """
    head = _two.pack(len(asked)) + asked if asked else b""
    variables = b"".join((write_name(key.name), _question.pack(ANY, 0), b"\0\0", write_name(ALGORITHM),
                          _times(time, fudge), _question.pack(error, len(other)), other))
    return hmac.digest(key.secret, head + message + variables, "sha256")


def sign(message: bytes, key: Key, time: int, fudge: int = FUDGE, error: int = 0, other: bytes = b"",
         asked: bytes = b"") -> tuple[bytes, bytes]:
    """The message with its signature, and the MAC.  `time`: seconds since 1970.  Source: RFC 8945 section 5.1."""
    mac = digest(key, message, time, fudge, error, other, asked)
    data = b"".join((write_name(ALGORITHM), _times(time, fudge), _two.pack(len(mac)), mac, message[:2],
                     _question.pack(error, len(other)), other))
    more, = _two.unpack_from(message, 10)
    return b"".join((message[:10], _two.pack(more + 1), message[12:], write_name(key.name),
                     _record.pack(TSIG, ANY, 0, len(data)), data)), mac


def is_signed(data: bytes, signature: Signature, key: Key, asked: bytes = b"") -> bool:
    """Whether a message, whose signature was read from it, is signed by this key.  Source: RFC 8945 section 5.2."""
    if signature.key != key.name or signature.algorithm != ALGORITHM:
        return False
    more, = _two.unpack_from(data, 10)
    message = b"".join((_two.pack(signature.number), data[2:10], _two.pack(more - 1), data[12:signature.at]))
    mac = digest(key, message, signature.time, signature.fudge, signature.error, signature.other, asked)
    return hmac.compare_digest(mac, signature.mac)


# -- requests ----------------------------------------------------------------------------------


class Request(NamedTuple):
    """A signed message, ready to be sent."""

    number: int  # its id: the answer has the same
    wire: bytes
    mac: bytes  # by which its answer is proven


def update(zone: Zone, key: Key, number: int, now: float, prerequisites: Sequence[Record], changes: Sequence[Record],
           ) -> Request:
    """An update of the zone.  `now`: seconds since 1970.  Source: RFC 2136 section 2."""
    writer = Writer(number, UPDATE << 11, (1, len(prerequisites), len(changes), 0))
    writer.question(zone.name, SOA)
    for record in (*prerequisites, *changes):
        writer.record(record)
    return Request(number, *sign(bytes(writer.out), key, int(now)))


def claim(zone: Zone, key: Key, number: int, now: float, name: str, mark: Mark) -> Request:
    """Write a name that is not in use.  YXDOMAIN where it is.  Source: RFC 2136 section 2.4.5."""
    return update(zone, key, number, now, [Record(name, ANY_KIND, NONE, 0, b"")], mark.records(name, zone.ttl))


def replace(zone: Zone, key: Key, number: int, now: float, name: str, texts: Sequence[bytes], old: Sequence[Mark],
            mark: Mark | None) -> Request:
    """Put `mark` in the place of what is there, with all that belongs to each; None: remove it.

    `texts`: the data of all TXT records of the name, ours and others'.  NXRRSET where the server has others by now.
    Source: RFC 2136 sections 2.4.2, 2.5.1, 2.5.4.
    """
    new = mark.records(name, zone.ttl) if mark is not None else []
    kept = {(record.kind, record.data) for record in new}
    gone = dict.fromkeys(removal(record) for each in old for record in each.records(name, 0)
                         if (record.kind, record.data) not in kept)
    return update(zone, key, number, now, [Record(name, TXT, IN, 0, text) for text in texts], [*gone, *new])


def look_up(key: Key, number: int, now: float, name: str) -> Request:
    """Ask for the TXT records of a name."""
    writer = Writer(number, QUERY << 11, (1, 0, 0, 0))
    writer.question(name, TXT)
    return Request(number, *sign(bytes(writer.out), key, int(now)))


# -- answers -----------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What became of a request.  It is proven, unless `reason` says that it failed."""

    code: int  # RCODE, or the error of the signature
    is_cut: bool  # it did not fit into a datagram: ask by TCP
    records: tuple[Record, ...]
    time: int  # seconds since 1970: the server's clock, with BADTIME; else 0

    @property
    def reason(self) -> str:
        """A word of REASONS; "" where it was done."""
        name = RCODES.get(self.code, "rcode") if self.code else ""
        return MEANINGS.get(name, name.lower())


def number_of(data: bytes) -> int:
    """The id of a message, by which its request is found; -1 where there is none."""
    return _two.unpack_from(data)[0] if len(data) >= _header.size else -1


def read_answer(data: bytes, request: Request, key: Key) -> Answer:
    """The answer to a request.  Raises Malformed for what is none, or says without proof that all is well.

    The time in it is not compared with the clock: the MAC holds the request's, so an old answer cannot be sent again.
    """
    message = parse(data)
    if message.number != request.number or not message.flags & RESPONSE:
        raise Malformed("no answer to this request")
    if message.opcode != request.wire[2] >> 3 & 15:
        raise Malformed("an answer of another kind")
    signature = message.signature
    code = signature.error if signature is not None and signature.error else message.rcode
    if signature is None or not signature.mac:
        if code in (NOERROR, BADTIME):
            raise Malformed("the answer is not signed")
        return Answer(code, False, (), 0)
    if not is_signed(data, signature, key, request.mac):
        raise Malformed("the signature of the answer is wrong")
    time = int.from_bytes(signature.other, "big") if signature.error == BADTIME and len(signature.other) == 6 else 0
    return Answer(code, bool(message.flags & TRUNCATED), message.answers, time)


def texts_of(answer: Answer, name: str) -> tuple[bytes, ...]:
    """The data of all TXT records that a look-up has found at the name itself, in a fixed order."""
    return tuple(sorted({record.data for record in answer.records
                         if (record.name, record.kind, record.group) == (name, TXT, IN)}))


# -- TCP ---------------------------------------------------------------------------------------


def frame(wire: bytes) -> bytes:
    """A message as TCP carries it.  Source: RFC 1035 section 4.2.2."""
    return _two.pack(len(wire)) + wire


def unframe(data: bytes | bytearray) -> bytes | None:
    """The first message in what came by TCP; None: more is needed.  Raises Malformed where none can come of it."""
    if len(data) < 2:
        return None
    size, = _two.unpack_from(data)
    if size < _header.size:
        raise Malformed("a DNS message that is cut")
    return bytes(data[2:2 + size]) if len(data) >= 2 + size else None
