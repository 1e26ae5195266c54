"""sniroute_hpack: header compression of HTTP/2 (RFC 7541), without I/O.

    the header block of a message --- Decoder.decode ---> [(b":authority", b"example.com"), ...]
    [(b":status", b"200"), ...]   --- encode -----------> a header block

A Decoder belongs to one direction of one connection: each block may add to its table, and the next one refers to that.
So blocks are given to it in their order, and all of them.  `encode` keeps no table and uses no Huffman code: what we
say is short, and is said once for each connection.

A block is compressed, so a small one can say much (RFC 7541 section 7.3).  Three limits stand against that: of a block,
which is the caller's (he knows the frames), of the list that comes out of it, and of the table.

Threads: none.

Seams: I want to ...
    allow larger heads         LIST_MAX
    compress what we say       a table in an object beside Decoder; `encode` then has its state

This room imports sniroute_refusals (Malformed).
"""

from __future__ import annotations

import collections
import functools
from array import array
from typing import Iterable

from sniroute_refusals import Malformed

__version__ = "0.1.0"

Pair = tuple[bytes, bytes]  # name and value of a field

# Limits, in bytes where nothing else is said.
TABLE_MAX = 4096  # the dynamic table, as section 4.1 counts: what all peers start with (SETTINGS_HEADER_TABLE_SIZE)
LIST_MAX = 32768  # the fields of one block, counted in the same way: as much as a head of HTTP/1.1 may have
FIELD_COST = 32  # what each field costs beside its name and value: section 4.1, and RFC 9113 section 6.5.2
INTEGER_MAX = 4  # bytes behind the first one of an integer: 28 bits are more than any size here, and no zeros for ever
UPDATES_MAX = 2  # changes of the table's size before a block: the smallest and the last, section 4.2

# -- strings -----------------------------------------------------------------------------------

# The Huffman code of appendix B: the bytes whose code has so many bits.  The code is canonical: shorter codes come
# first, and those of one length are in the order of their bytes, so the lengths say all.  EOS, which no string may
# have, is the last one of 30 bits.
HUFFMAN = {
    5: b"012aceiost",
    6: b" %-./3456789=A_bdfghlmnpru",
    7: b":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz",
    8: b"&*,;XZ",
    10: b"!\"()?",
    11: b"'+|",
    12: b"#>",
    13: b"\0$@[]~",
    14: b"^}",
    15: b"<`{",
    19: b"\\\xc3\xd0",
    20: b"\x80\x82\x83\xa2\xb8\xc2\xe0\xe2",
    21: b"\x99\xa1\xa7\xac\xb0\xb1\xb3\xd1\xd8\xd9\xe3\xe5\xe6",
    22: b"\x81\x84\x85\x86\x88\x92\x9a\x9c\xa0\xa3\xa4\xa9\xaa\xad\xb2\xb5\xb9\xba\xbb\xbd\xbe\xc4\xc6\xe4\xe8\xe9",
    23: b"\x01\x87\x89\x8a\x8b\x8c\x8d\x8f\x93\x95\x96\x97\x98\x9b\x9d\x9e\xa5\xa6\xa8\xae\xaf\xb4\xb6\xb7\xbc\xbf\xc5"
        b"\xe7\xef",
    24: b"\t\x8e\x90\x91\x94\x9f\xab\xce\xd7\xe1\xec\xed",
    25: b"\xc7\xcf\xea\xeb",
    26: b"\xc0\xc1\xc8\xc9\xca\xcd\xd2\xd5\xda\xdb\xee\xf0\xf2\xf3\xff",
    27: b"\xcb\xcc\xd3\xd4\xd6\xdd\xde\xdf\xf1\xf4\xf5\xf6\xf7\xf8\xfa\xfb\xfc\xfd\xfe",
    28: b"\x02\x03\x04\x05\x06\x07\x08\x0b\x0c\x0e\x0f\x10\x11\x12\x13\x14\x15\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f\x7f"
        b"\xdc\xf9",
    30: b"\n\r\x16",
}
EOS = 256
# A state is a place in the tree of codes, at the end of half a byte.  What half a byte does to one is a number:
STATE = 0xFFF  # the state that follows, times 16; states along the path of ones, which leads to EOS, are the first ones
SYMBOL = 12  # above so many bits: the byte that was decoded, plus one; or 0.  A code has 5 bits at least: there is one
PADDING_MAX = 7  # bits of a code, all of them ones, that a string may end with: section 5.2


def huffman_codes() -> list[tuple[int, int, int]]:
    """The code as (symbol, code, bits), EOS last."""
    codes, code, before = [], 0, 0
    for bits, symbols in HUFFMAN.items():
        code <<= bits - before
        before = bits
        for symbol in (*symbols, EOS) if bits == 30 else symbols:
            codes.append((symbol, code, bits))
            code += 1
    return codes


@functools.cache
def huffman_states() -> array[int]:
    """What each half byte does to each state: 16 numbers for each of 256.  Made when the first string comes.

    It takes 16 KiB, and 3 ms.  Whole bytes would be twice as fast, and take 16 times as much.
    """
    tree = [[0, 0] for _ in range(256)]  # for each state: the next one for 0 and for 1; or ~symbol, which is negative
    states = 0
    for symbol, code, bits in reversed(huffman_codes()):  # EOS first: its path has the first states
        at = 0
        for shift in range(bits - 1, 0, -1):
            bit = code >> shift & 1
            if not tree[at][bit]:
                states += 1
                tree[at][bit] = states
            at = tree[at][bit]
        tree[at][code & 1] = ~symbol
    table = array("I")
    for start in range(256):
        for nibble in range(16):
            at, symbol = start, -1
            for shift in (3, 2, 1, 0):
                at = tree[at][nibble >> shift & 1]
                if at < 0:
                    symbol, at = ~at, 0
            table.append((symbol + 1) << SYMBOL | at << 4)
    return table


def decode_huffman(data: bytes) -> bytes:
    """A string that was written in the Huffman code.  Raises Malformed.  Source: RFC 7541 section 5.2."""
    table, state, decoded = huffman_states(), 0, bytearray()
    for byte in data:
        for nibble in (byte >> 4, byte & 15):
            does = table[state | nibble]
            state = does & STATE
            symbol = does >> SYMBOL
            if symbol:
                if symbol > EOS:
                    raise broken("a string with an end inside")
                decoded.append(symbol - 1)
    if state >> 4 > PADDING_MAX:
        raise broken("a string that ends within a code")
    return bytes(decoded)


def broken(message: str, status: int = 400) -> Malformed:
    """What is raised for a block that is refused.  No later block of its connection can be read."""
    return Malformed(f"compressed fields: {message}", kind="bad_request", status=status)


# -- parts of a block --------------------------------------------------------------------------


def read_integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """The integer that begins in the last `bits` of block[at], and where it ends.  Raises Malformed.

    Source: RFC 7541 section 5.1.
    """
    if at >= len(block):
        raise broken("they end within a field")
    most = (1 << bits) - 1
    value = block[at] & most
    at += 1
    if value < most:
        return value, at
    for place, byte in enumerate(block[at:at + INTEGER_MAX]):
        value += (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise broken("a number that is too large" if at + INTEGER_MAX <= len(block) else "they end within a number")


def read_string(block: bytes, at: int) -> tuple[bytes, int]:
    """The string that begins at `at`, and where it ends.  Raises Malformed.  Source: RFC 7541 section 5.2."""
    size, start = read_integer(block, at, 7)
    end = start + size
    if end > len(block):
        raise broken("they end within a string")
    data = block[start:end]
    return (decode_huffman(data) if block[at] & 0x80 else data), end


def write_integer(value: int, bits: int, first: int) -> bytes:
    """An integer whose first byte has `bits` for it, and `first` in the others."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((first | value,))
    written = bytearray((first | most,))
    value -= most
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)


def write_string(data: bytes) -> bytes:
    """A string as it is."""
    return write_integer(len(data), 7, 0) + data


# -- blocks ------------------------------------------------------------------------------------

# The static table, appendix A: one name for each line, with its values.  It is counted from 1.
_STATIC = b"""
:authority
:method GET|POST
:path /|/index.html
:scheme http|https
:status 200|204|206|304|400|404|500
accept-charset
accept-encoding gzip, deflate
accept-language\naccept-ranges\naccept\naccess-control-allow-origin\nage\nallow\nauthorization\ncache-control
content-disposition\ncontent-encoding\ncontent-language\ncontent-length\ncontent-location\ncontent-range\ncontent-type
cookie\ndate\netag\nexpect\nexpires\nfrom\nhost
if-match\nif-modified-since\nif-none-match\nif-range\nif-unmodified-since
last-modified\nlink\nlocation\nmax-forwards\nproxy-authenticate\nproxy-authorization\nrange\nreferer\nrefresh
retry-after\nserver\nset-cookie\nstrict-transport-security\ntransfer-encoding\nuser-agent\nvary\nvia\nwww-authenticate
"""
STATIC: tuple[Pair, ...] = tuple(
    (name, value) for name, _, values in (line.partition(b" ") for line in _STATIC.split(b"\n") if line)
    for value in values.split(b"|"))
NUMBERS = {pair: number for number, pair in enumerate(STATIC, 1)}
NAMES = {name: number for number, (name, _) in reversed([*enumerate(STATIC, 1)])}  # the first of each name

# The first bits of a field, section 6.  What none of them has is a literal that is not kept, with 4 bits of an index.
INDEXED, KEPT, UPDATE = 0x80, 0x40, 0x20


class Decoder:
    """Reads the blocks of one direction of a connection.

    Once it has raised Malformed it is of no use: its table is no longer the sender's, and the connection has to end
    (RFC 9113 section 4.3, COMPRESSION_ERROR).
    """

    __slots__ = ("table", "size", "most")

    def __init__(self) -> None:
        self.table: collections.deque[Pair] = collections.deque()  # the newest first; 128 at most, by FIELD_COST
        self.size = 0  # of the table, in bytes as section 4.1 counts
        self.most = TABLE_MAX  # what the sender lets it have

    def decode(self, block: bytes) -> list[Pair]:
        """The fields of a whole block, in their order.  Raises Malformed, with status 431 where they are too many.

        `block` is what the frames of one head hold, joined: the caller has a limit for it.  Nothing is asked of names
        and values.  Source: RFC 7541 section 3 and 6.
        """
        fields: list[Pair] = []
        room, at, updates = LIST_MAX, 0, 0
        while at < len(block):
            first = block[at]
            if first & INDEXED:
                number, at = read_integer(block, at, 7)
                field = self.find(number)
            elif first & KEPT or not first & UPDATE:
                number, at = read_integer(block, at, 6 if first & KEPT else 4)
                name, at = (self.find(number)[0], at) if number else read_string(block, at)
                value, at = read_string(block, at)
                field = name, value
                if first & KEPT:
                    self.keep(field)
            else:
                updates += 1
                if fields or updates > UPDATES_MAX:
                    raise broken("a change of the table where none belongs")
                size, at = read_integer(block, at, 5)
                self.resize(size)
                continue
            room -= cost(field)
            if room < 0:
                raise broken(f"more than {LIST_MAX} bytes of fields", 431)
            fields.append(field)
        return fields

    def find(self, number: int) -> Pair:
        """The field at a place of both tables, the static one first.  Raises Malformed.  Source: section 2.3.3."""
        if 0 < number <= len(STATIC):
            return STATIC[number - 1]
        if len(STATIC) < number <= len(STATIC) + len(self.table):
            return self.table[number - len(STATIC) - 1]
        raise broken("a place that the table does not have")

    def keep(self, field: Pair) -> None:
        """Put a field into the table, where it has room; one that is larger than the table empties it.  Section 4.4."""
        self.evict(self.most - cost(field))
        if cost(field) <= self.most:
            self.table.appendleft(field)
            self.size += cost(field)

    def resize(self, most: int) -> None:
        """The sender changes the size of the table.  Raises Malformed.  Source: section 6.3."""
        if most > TABLE_MAX:
            raise broken("a larger table than was offered")
        self.most = most
        self.evict(most)

    def evict(self, most: int) -> None:
        """Drop the oldest fields, until the table has at most so many bytes.  Source: section 4.3."""
        while self.table and self.size > most:
            self.size -= cost(self.table.pop())


def cost(field: Pair) -> int:
    """What a field takes of a table, or of a list, in bytes.  Source: RFC 7541 section 4.1."""
    return len(field[0]) + len(field[1]) + FIELD_COST


def encode(fields: Iterable[Pair]) -> bytes:
    """A block with these fields, names in lower case, those with a colon first.

    It begins with a table of no bytes, which is right whatever the peer's SETTINGS_HEADER_TABLE_SIZE says or becomes
    (RFC 7541 section 4.2); so each block stands for itself.
    """
    block = [write_integer(0, 5, UPDATE)]
    for name, value in fields:
        number = NUMBERS.get((name, value))
        if number:
            block.append(write_integer(number, 7, INDEXED))
            continue
        number = NAMES.get(name, 0)
        block += write_integer(number, 4, 0), (b"" if number else write_string(name)), write_string(value)
    return b"".join(block)
