"""Tests of sniroute_hpack.py: the examples of RFC 7541, what is refused, mutations."""

from __future__ import annotations

import hashlib
import random
import sys

import pytest

from conftest import HERE
from sniroute_hpack import (FIELD_COST, INTEGER_MAX, LIST_MAX, STATIC, TABLE_MAX, UPDATES_MAX, Decoder, Pair, cost,
                            decode_huffman, encode, huffman_codes, read_integer, read_string, write_integer,
                            write_string)
from sniroute_refusals import Malformed
from testbed.program import execute

CODES = {symbol: f"{code:0{bits}b}" for symbol, code, bits in huffman_codes()}
EOS = 256


def compress(symbols: bytes | list[int], padding: str = "1111111") -> bytes:
    """These in the Huffman code, written as text: a second way, beside that of the room."""
    code = "".join(CODES[symbol] for symbol in symbols)
    code += padding[:-len(code) % 8]
    return int("1" + code, 2).to_bytes(len(code) // 8 + 1, "big")[1:] if code else b""


def as_huffman(data: bytes) -> bytes:
    """A string of a block, compressed."""
    return write_integer(len(data), 7, 0x80) + data


def pairs(text: str) -> list[Pair]:
    """The fields of a text that has one in each line, as the RFC shows them."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return [(name.encode(), value.encode()) for name, value in (line.rsplit(": ", 1) if line.count(": ") == 1
                                                                 else line.split(": ", 1) for line in lines)]


# -- the examples of the RFC -------------------------------------------------------------------


@pytest.mark.parametrize("value, bits, written", [(10, 5, "0a"), (1337, 5, "1f9a0a"), (42, 8, "2a")])
def test_the_numbers_of_appendix_c_1(value, bits, written):
    data = bytes.fromhex(written)
    assert write_integer(value, bits, 0) == data
    assert read_integer(data, 0, bits) == (value, len(data))
    if bits < 8:  # what stands before it in the byte is no part of it
        assert read_integer(b"x" + bytes((data[0] | 0xE0,)) + data[1:] + b"\xff", 1, bits) == (value, len(data) + 1)


@pytest.mark.parametrize("block, field, is_kept", [
    ("400a637573746f6d2d6b65790d637573746f6d2d686561646572", (b"custom-key", b"custom-header"), True),
    ("040c2f73616d706c652f70617468", (b":path", b"/sample/path"), False),
    ("100870617373776f726406736563726574", (b"password", b"secret"), False),
    ("82", (b":method", b"GET"), False),
], ids=["kept", "not kept", "never kept", "indexed"])
def test_the_fields_of_appendix_c_2(block, field, is_kept):
    decoder = Decoder()
    assert decoder.decode(bytes.fromhex(block)) == [field]
    assert list(decoder.table) == ([field] if is_kept else []) and decoder.size == (55 if is_kept else 0)


DATE_1, DATE_2 = "Mon, 21 Oct 2013 20:13:21 GMT", "Mon, 21 Oct 2013 20:13:22 GMT"
COOKIE = "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"
GET = ":method: GET\n:scheme: http\n:path: /\n:authority: www.example.com\n"
REQUESTS = [
    (GET, ":authority: www.example.com", 57),
    (GET + "cache-control: no-cache", "cache-control: no-cache\n:authority: www.example.com", 110),
    (":method: GET\n:scheme: https\n:path: /index.html\n:authority: www.example.com\ncustom-key: custom-value",
     "custom-key: custom-value\ncache-control: no-cache\n:authority: www.example.com", 164),
]
ANSWER = "cache-control: private\ndate: %s\nlocation: https://www.example.com"
ANSWERS = [
    (":status: 302\n" + ANSWER % DATE_1,
     f"location: https://www.example.com\ndate: {DATE_1}\ncache-control: private\n:status: 302", 222),
    (":status: 307\n" + ANSWER % DATE_1,
     f":status: 307\nlocation: https://www.example.com\ndate: {DATE_1}\ncache-control: private", 222),
    (":status: 200\n" + ANSWER % DATE_2 + f"\ncontent-encoding: gzip\nset-cookie: {COOKIE}",
     f"set-cookie: {COOKIE}\ncontent-encoding: gzip\ndate: {DATE_2}", 215),
]
SIZE_256 = "3fe101"  # the examples of answers have a table of 256 bytes


@pytest.mark.parametrize("blocks, rows", [
    (["828684410f7777772e6578616d706c652e636f6d",
      "828684be58086e6f2d6361636865",
      "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565"], REQUESTS),
    (["828684418cf1e3c2e5f23a6ba0ab90f4ff",
      "828684be5886a8eb10649cbf",
      "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf"], REQUESTS),
    ([SIZE_256 + "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d54"
      "6e1768747470733a2f2f7777772e6578616d706c652e636f6d",
      "4803333037c1c0bf",
      "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f3d4153444a4b48514b"
      "425a584f5157454f50495541585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31"], ANSWERS),
    ([SIZE_256 + "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8"
      "e9ae82ae43d3",
      "4883640effc1c0bf",
      "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b3960d5af2708"
      "7f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007"], ANSWERS),
], ids=["C.3", "C.4", "C.5", "C.6"])
def test_the_connections_of_appendix_c_3_to_6(blocks, rows):
    """Each block, and the table behind it."""
    decoder = Decoder()
    for block, (fields, table, size) in zip(blocks, rows, strict=True):
        assert decoder.decode(bytes.fromhex(block)) == pairs(fields)
        assert list(decoder.table) == pairs(table) and decoder.size == size


def test_the_code_is_that_of_appendix_b():
    """The digest is of the RFC's table: a line `SYMBOL CODE BITS` for each, the code in hexadecimal."""
    lines = "".join(f"{symbol} {code:x} {bits}\n" for symbol, code, bits in sorted(huffman_codes()))
    assert hashlib.sha256(lines.encode()).hexdigest() == (
        "83d3e71d59b887a6b1329636bb3230aea58e89cc668aefbde9139061f5a0fc9c")


def test_the_static_table_is_that_of_appendix_a():
    """The digest is of the RFC's table: a line `NAME: VALUE` for each."""
    lines = b"".join(b"%b: %b\n" % pair for pair in STATIC)
    assert hashlib.sha256(lines).hexdigest() == "e068ed84a5a3d28824dc910d55e700af8236a5744b77f384fb67b7f06b72fbb3"
    assert len(STATIC) == 61 and STATIC[1] == (b":method", b"GET") and STATIC[60] == (b"www-authenticate", b"")


def test_nothing_is_made_before_the_first_string():
    """Most routers never see HTTP/2."""
    code = "import sniroute_hpack as hpack; print(hpack.huffman_states.cache_info().currsize)"
    execute(sys.executable, "-S", "-E", "-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); {code}", text=True,
            said="0\n")


# -- strings -----------------------------------------------------------------------------------


def test_each_byte_is_decoded_behind_each_other():
    for first in range(256):
        data = bytes(byte for second in range(256) for byte in (first, second))
        assert decode_huffman(compress(data)) == data
    assert decode_huffman(b"") == b""


def test_a_string_of_each_length():
    """So each number of bits is the padding once."""
    chance = random.Random(7541)
    for size in range(300):
        data = chance.randbytes(size) if size % 2 else bytes(chance.choice(b"aeiou0123:XZ&") for _ in range(size))
        assert read_string(as_huffman(compress(data)) + b"behind", 0) == (data, len(as_huffman(compress(data))))
        assert read_string(write_string(data) + b"behind", 0) == (data, len(write_string(data)))


@pytest.mark.parametrize("data", [
    compress(b"a", "000"), compress(b"a", "110"), compress(b"a", "011"), compress(b"www", "101"),
    compress(b"a") + b"\xff", compress(b"12345678") + b"\xff", b"\xff", b"\xff\xff", b"\xff" * 4, b"\xff" * 100,
    compress([EOS]), compress([*b"ab", EOS, *b"cd"]), compress([*b"12345678", EOS]),
    compress(b"\n")[:-1], compress(b"\xff")[:2],
], ids=lambda data: data[:6].hex())
def test_a_string_that_no_encoder_makes(data):
    """Zeros at its end, a byte of padding, EOS, half a code."""
    with pytest.raises(Malformed) as caught:
        decode_huffman(data)
    assert caught.value.kind == "bad_request" and caught.value.status == 400


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_come_back(bits):
    for value in [*range(300), 1 << 14, (1 << 16) - 1, 1 << 20, (1 << 28) - 1]:
        written = write_integer(value, bits, 0)
        assert read_integer(written + b"\xff", 0, bits) == (value, len(written))
        for size in range(len(written)):
            with pytest.raises(Malformed, match="end within"):
                read_integer(written[:size], 0, bits)


@pytest.mark.parametrize("behind", [
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\xff" * 8 + b"\x7f", b"\x80" * 4 + b"\x01", b"\x80" * 1000 + b"\0",
    b"\xff" * INTEGER_MAX + b"\0",
], ids=["64 bits", "63 bits", "29 bits", "zeros", "one too many"])
@pytest.mark.parametrize("first, bits", [(b"\xff", 7), (b"\x7f", 6), (b"\x3f", 5), (b"\x0f", 4)])
def test_a_number_that_is_too_large(first, bits, behind):
    with pytest.raises(Malformed, match="too large"):
        read_integer(first + behind, 0, bits)
    with pytest.raises(Malformed):
        Decoder().decode(first + behind)


# -- blocks ------------------------------------------------------------------------------------

KEEP = b"\x40" + write_string(b"a") + write_string(b"b")
SIZE_0 = b"\x20"


@pytest.mark.parametrize("block", [
    b"\x80", b"\xbe", KEEP + b"\xbf", b"\xff\x80\x7f", SIZE_0 + KEEP + b"\xbe",  # places that there are not
    b"\x7f" + write_string(b"b"), b"\x0f\x2f" + write_string(b"b"), b"\x1f\x2f" + write_string(b"b"),
    b"\x40", b"\x40\x01", b"\x40\x01a", b"\x40\x01a\x02b", b"\x41", b"\x00\x7f\xff\xff\x7f", b"\x10\xff\xff\xff\x7f",
    b"\x82" + SIZE_0, KEEP + b"\x3f\x21", SIZE_0 * 3, b"\x3f\xe2\x1f", b"\x3f\xff\xff\xff\x7f",  # sizes
    b"\x40\x81\x00\x01b", b"\x40\x01a\x81\xff",  # strings
], ids=lambda block: block[:8].hex())
def test_a_block_that_is_broken(block):
    with pytest.raises(Malformed) as caught:
        Decoder().decode(block)
    assert caught.value.kind == "bad_request" and caught.value.status == 400
    assert str(caught.value).startswith("compressed fields: ")


def test_an_empty_block_and_one_that_only_changes_the_table():
    assert Decoder().decode(b"") == [] == Decoder().decode(SIZE_0)
    assert Decoder().decode(b"\x3f\xe1\x1f" + b"\x82") == [(b":method", b"GET")]  # Go says 4096 before its first


def test_the_table_is_made_smaller_and_larger_again():
    decoder = Decoder()
    decoder.decode(KEEP * 3)
    assert decoder.size == 3 * 34
    decoder.decode(b"\x3f\x26")  # 69: two fields fit
    assert len(decoder.table) == 2 and decoder.size == 68
    assert decoder.decode((SIZE_0 + b"\x3f\x26") + KEEP + b"\xbe") == [(b"a", b"b")] * 2
    assert UPDATES_MAX == 2 and len(decoder.table) == 1
    assert decoder.decode(SIZE_0 + KEEP) == [(b"a", b"b")] and not decoder.table and not decoder.size


def test_a_field_that_is_larger_than_the_table_empties_it():
    decoder = Decoder()
    large = b"v" * (TABLE_MAX - FIELD_COST)
    decoder.decode(KEEP)
    assert decoder.decode(b"\x40" + write_string(b"n") + write_string(large)) == [(b"n", large)]
    assert not decoder.table and not decoder.size
    decoder.decode(KEEP + b"\x40" + write_string(b"n") + write_string(large[1:]))
    assert list(decoder.table) == [(b"n", large[1:])] and decoder.size == TABLE_MAX


def test_a_name_whose_own_field_makes_it_leave_the_table():
    """RFC 7541 section 4.4: the name is read before the oldest fields go."""
    decoder = Decoder()
    decoder.decode(b"\x40" + write_string(b"n" * 2000) + write_string(b"v" * 2000))
    assert decoder.decode(b"\x7e" + write_string(b"w" * 2000)) == [(b"n" * 2000, b"w" * 2000)]
    assert list(decoder.table) == [(b"n" * 2000, b"w" * 2000)]


def test_a_bomb_is_refused_before_it_has_grown():
    """One field of 4,000 bytes, and a byte for each time that it comes again."""
    decoder = Decoder()
    field = b"\x40" + write_string(b"n") + write_string(b"v" * 4000)
    fit = LIST_MAX // (1 + 4000 + FIELD_COST)
    assert len(decoder.decode(field + b"\xbe" * (fit - 1))) == fit
    with pytest.raises(Malformed, match="bytes of fields") as caught:
        Decoder().decode(field + b"\xbe" * fit)
    assert caught.value.status == 431
    assert len(Decoder().decode(KEEP + b"\xbe" * (LIST_MAX // 34 - 1))) == LIST_MAX // 34
    with pytest.raises(Malformed, match="bytes of fields"):  # empty fields cost something, too
        Decoder().decode(b"\x40\0\0" + b"\xbe" * (LIST_MAX // FIELD_COST))


def test_what_is_encoded_is_decoded():
    fields = [(b":status", b"200"), (b":status", b"403"), (b"content-type", b"text/plain"), (b"x-own", b"a" * 300),
              (b"accept-encoding", b"gzip, deflate"), (b"x-own", b"")]
    block = encode(fields)
    assert block[:3] == b"\x20\x88\x08" and encode([]) == SIZE_0
    decoder = Decoder()
    for _ in range(2):
        assert decoder.decode(block) == fields
        assert not decoder.table
    request = encode([(b":method", b"POST"), (b":scheme", b"https"), (b":path", b"/"), (b":path", b"/stream")])
    assert request == b"\x20\x83\x87\x84\x04\x07/stream"


# -- mutations ---------------------------------------------------------------------------------


def some_block(chance: random.Random) -> bytes:
    """Fields in all ways in which they can be written."""
    parts = [write_integer(chance.choice((0, 34, 100, 4096)), 5, 0x20) for _ in range(chance.choice((0, 0, 0, 1, 2)))]
    for _ in range(chance.randrange(1, 9)):
        first, bits = chance.choice(((0x80, 7), (0x40, 6), (0x40, 6), (0, 4), (0x10, 4)))
        number = chance.choice((0, *(chance.randrange(1, 62) for _ in range(9)), 62)) or (first >> 7)
        parts.append(write_integer(number, bits, first))
        if first != 0x80:
            for _ in range(1 if number else 2):
                text = chance.choice((b"", b"host", b"www.example.com", chance.randbytes(chance.randrange(40))))
                parts.append(chance.choice((write_string(text), as_huffman(compress(text)))))
    return b"".join(parts)


def test_mutated_blocks_are_fields_or_refused():
    """And whatever comes, the table is within its bounds, and is what its size says."""
    chance = random.Random(18)
    decoded = 0
    for _ in range(3000):
        decoder = Decoder()
        for _ in range(3):
            block = bytearray(some_block(chance))
            for _ in range(chance.choice((0, 0, 1, 2))):
                block[chance.randrange(len(block))] = chance.randrange(256)
            if chance.random() < 0.1:
                del block[chance.randrange(len(block)):]
            try:
                fields = decoder.decode(bytes(block))
            except Malformed:
                break
            decoded += 1
            assert sum(map(cost, fields)) <= LIST_MAX
            assert sum(map(cost, decoder.table)) == decoder.size <= decoder.most <= TABLE_MAX
            assert all(type(part) is bytes for field in fields for part in field)
    assert decoded > 2000


def test_no_two_strings_decode_to_one():
    """The code is complete: a mutated string that is taken is what an encoder would have made."""
    chance = random.Random(5)
    taken = 0
    for _ in range(20_000):
        data = chance.randbytes(chance.randrange(1, 6))
        try:
            decoded = decode_huffman(data)
        except Malformed:
            continue
        taken += 1
        assert compress(decoded) == data
    assert taken > 500
