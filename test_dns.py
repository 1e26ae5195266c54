"""Tests of sniroute_dns.py: what an operator writes, messages, signatures, and what is no answer."""

from __future__ import annotations

import ipaddress
import random
import struct
from typing import Any

import pytest

import sniroute_dns as dns
from sniroute_dns import (AAAA, ANY_KIND, IN, NONE, RCODES, REASONS, RESPONSE, TRUNCATED, TXT, A, Key, Mark, Message,
                          Record, Zone, claim, frame, look_up, number_of, parse, parse_key, parse_url, read_answer,
                          read_mark, read_name, read_text, replace, sign, text_data, texts_of, unframe, write_name)
from sniroute_refusals import Malformed

SECRET = "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2U="
KEY = parse_key("router", SECRET)
URL = "rfc2136://ns.example.com/tun.example.com?key=router"
NAME = "foo.tun.example.com"
V4, V6 = ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("2001:db8::1")
ZONE = parse_url(f"{URL}&address={V4},{V6}")
MARK = Mark("7f", ZONE.addresses)
NOW = 1_700_000_000.0


# -- what an operator writes -------------------------------------------------------------------


@pytest.mark.parametrize("text, zone", [
    (URL, Zone("ns.example.com", 53, "tun.example.com", "router", 60, ())),
    ("RFC2136://ns.example.com:5353/Tun.Example.com.?key=Router.",
     Zone("ns.example.com", 5353, "tun.example.com", "router", 60, ())),
    ("rfc2136://[2001:db8::53]/lan?key=a_b.example", Zone("2001:db8::53", 53, "lan", "a_b.example", 60, ())),
    ("rfc2136://[::1]:5353/lan?key=k", Zone("::1", 5353, "lan", "k", 60, ())),
    ("rfc2136://192.0.2.53/lan?ttl=1&key=k", Zone("192.0.2.53", 53, "lan", "k", 1, ())),
    ("rfc2136://ns/lan?key=k&address=192.0.2.1,%202001:DB8::1,192.0.2.1&ttl=86400",
     Zone("ns", 53, "lan", "k", 86400, (V4, V6))),
    ("rfc2136://ns/lan?key=k&address=::ffff:192.0.2.1", Zone("ns", 53, "lan", "k", 60, (V4,))),
])
def test_a_zone(text, zone):
    assert parse_url(text) == zone


@pytest.mark.parametrize("text, said", [
    ("", "it is not rfc2136://SERVER[:PORT]/ZONE?key=NAME"),
    ("https://ns/lan?key=k", "it is not rfc2136://"),
    ("rfc2136:ns/lan?key=k", "it is not rfc2136://"),
    (URL + "#x", "it is not rfc2136://"),
    (URL + "\n", "it is not rfc2136://"),
    ("rfc2136://router:s3cret@ns/lan?key=k", "the secret of the key goes into SNIROUTE_DNS_KEY"),
    ("rfc2136:///lan?key=k", "'' is no server"),
    ("rfc2136://ns:0/lan?key=k", "'ns:0' is no server"),
    ("rfc2136://ns:99999/lan?key=k", "'ns:99999' is no server"),
    ("rfc2136://::1/lan?key=k", "'::1' is no server"),
    ("rfc2136://n s/lan?key=k", "'n s' is no server"),
    ("rfc2136://ns?key=k", "it names no zone"),
    ("rfc2136://ns/?key=k", "it names no zone"),
    ("rfc2136://ns/a/b?key=k", "zone: 'a/b' is not a name in DNS"),
    ("rfc2136://ns/*.lan?key=k", "zone: '*.lan' is not a name in DNS"),
    ("rfc2136://ns/caf\u00e9?key=k", "zone: 'caf?' is not a name in DNS"),
    ("rfc2136://ns/lan", "it names no key"),
    ("rfc2136://ns/lan?ttl=5", "it names no key"),
    ("rfc2136://ns/lan?key=", "key is empty"),
    ("rfc2136://ns/lan?key=a&key=b", "key is there twice"),
    ("rfc2136://ns/lan?key=-", "key: '-' is not a name in DNS"),
    ("rfc2136://ns/lan?key=k&secret=s3cret", "'secret' is none of key, ttl and address"),
    ("rfc2136://ns/lan?key=k&&ttl=5", "'' is none of key, ttl and address"),
    *((f"{URL}&ttl={ttl}", f"ttl: '{ttl}' is not a number of seconds from 1 to 86400")
      for ttl in ("0", "-1", "86401", "60s", "1e3", "1234567")),
    (URL + "&address=ns.example.com", "address: 'ns.example.com' is not an IPv4 or IPv6 address"),
    (URL + "&address=192.0.2.1,", "address: '' is not"),
    (URL + "&address=0.0.0.0", "address: nobody can connect to 0.0.0.0"),
    (URL + "&address=ff02::1", "address: nobody can connect to ff02::1"),
    (URL + "&address=fe80::1%25eth0", "address: nobody can connect to fe80::1%eth0"),
    (URL + "&address=" + ",".join(f"192.0.2.{number}" for number in range(9)), "9 addresses; 8 are the most"),
])
def test_what_is_no_zone_is_told_in_a_sentence(text, said):
    with pytest.raises(ValueError) as caught:
        parse_url(text)
    assert said in str(caught.value) and str(caught.value).isprintable() and "s3cret" not in str(caught.value)


@pytest.mark.parametrize("text, said", [
    ("", "it is empty"), (" \n", "it is empty"), ("s3cret!", "it is not base64"), ("c2VjcmV0cw", "it is not base64"),
    ("caf\u00e9", "it is not base64"), ("czNjcmV0", "the secret has 6 bytes; it needs 16"),
])
def test_what_is_no_secret_is_told_without_it(text, said):
    with pytest.raises(ValueError) as caught:
        parse_key("router", text)
    assert f"SNIROUTE_DNS_KEY: {said}" in str(caught.value)
    assert not text.strip() or text not in str(caught.value)


def test_a_key_shows_its_name_only():
    assert (repr(KEY), str(KEY), f"{[KEY]}") == ("Key('router')", "Key('router')", "[Key('router')]")
    assert parse_key("router", f" {SECRET[:20]}\n{SECRET[20:]}\n").secret == KEY.secret == b"secret" * 5 + b"se"


def test_a_zone_holds_what_is_below_it():
    assert ZONE.holds(NAME) and ZONE.holds("a.b.tun.example.com")
    assert not any(map(ZONE.holds, ("tun.example.com", "example.com", "xtun.example.com", "foo.tun.example.org")))


# -- names and records -------------------------------------------------------------------------


@pytest.mark.parametrize("data, at, name, end", [
    (b"\0", 0, "", 1),
    (b"\3Foo\2XN\0", 0, "foo.xn", 8),
    (b"\2lan\0\3foo\xc0\0", 5, None, None),
    (b"\3lan\0\3foo\xc0\0", 5, "foo.lan", 11),
    (b"\3lan\0\xc0\0\xc0\5", 7, "lan", 9),
    (b"\4a.b\"\1\xff\0", 0, "a\\046b\\034.\\255", 8),
    (b"\x3f" + b"a" * 63 + b"\0", 0, "a" * 63, 65),
])
def test_a_name_is_read(data, at, name, end):
    if name is None:
        with pytest.raises(Malformed):
            read_name(data, at)
    else:
        assert read_name(data, at) == (name, end)


@pytest.mark.parametrize("data, at, said", [
    (b"", 0, "cut"), (b"\3fo", 0, "cut"), (b"\3foo", 0, "cut"), (b"\xc0", 0, "cut"),
    (b"\xc0\0", 0, "to itself"), (b"\1a\xc0\0", 0, "to itself"), (b"\1a\xc0\4\1b\xc0\0", 4, "forwards"),
    (b"\xc0\2\xc0\0", 2, "forwards"), (b"\1a\xc0\2", 0, "forwards"), (b"\x40a\0", 0, "unknown kind"),
    (b"\x80a\0", 0, "unknown kind"), (b"\1a" * 127 + b"\1a\0", 0, "too long"),
])
def test_a_name_that_is_none_is_refused(data, at, said):
    with pytest.raises(Malformed, match=said):
        read_name(data, at)


def test_the_longest_name():
    name = ".".join(["a"] * 127)
    assert read_name(write_name(name), 0) == (name, 255)


def test_a_long_chain_of_pointers_ends():
    """Each leads to the one before it: a reader that only counts labels would go on."""
    data = b"\0" + b"".join(struct.pack(">H", 0xC000 | max(2 * number - 1, 0)) for number in range(8000))
    assert read_name(data, len(data) - 2) == ("", len(data))


@pytest.mark.parametrize("strings", [(), (b"",), (b"a", b"", b"\xff" * 255)])
def test_the_strings_of_a_text(strings):
    assert read_text(text_data(strings)) == strings
    if strings:
        with pytest.raises(Malformed):
            read_text(text_data(strings) + b"\1")


def test_a_mark_says_whose_a_name_is_and_what_was_written():
    assert MARK.data == b"\x0bsniroute=7f\t192.0.2.1\x0b2001:db8::1" and read_mark(MARK.data) == MARK
    assert read_mark(Mark("7f", ()).data) == Mark("7f", ())


@pytest.mark.parametrize("strings", [
    (), (b"",), (b"v=spf1 -all",), (b"sniroute=",), (b"sniroute",), (b"Sniroute=7f",), (b"sniroute=7 f",),
    (b"sniroute=7\xff",), (b"sniroute=7f", b"x"), (b"sniroute=7f", b"192.0.2.1 "), (b"sniroute=7f", b"2001:DB8::1"),
    (b"heritage=x", b"sniroute=7f"), (b"sniroute=" + b"a" * 65,),
])
def test_what_others_have_written_is_no_mark(strings):
    assert read_mark(text_data(strings)) is None and read_mark(text_data(strings) + b"\5") is None


# -- messages ----------------------------------------------------------------------------------

# The update and its answer as dnspython 2.9 makes them, with the same id, key and time.
CLAIM = bytes.fromhex(
    "1234280000010001000300010374756e076578616d706c6503636f6d000006000103666f6fc00c00ff00fe000000000000c021000100010000"
    "003c0004c0000201c021001c00010000003c001020010db8000000000000000000000001c021001000010000003c00220b736e69726f757465"
    "3d3766093139322e302e322e310b323030313a6462383a3a3106726f757465720000fa00ff00000000003d0b686d61632d7368613235360000"
    "006553f100012c00201dc36549c848fff82d1bc335904393a88d17c44acb5c5cde8d5e6b01e9b5abba123400000000")
IN_USE = bytes.fromhex(
    "1234a80600010000000000010374756e076578616d706c6503636f6d000006000106726f757465720000fa00ff00000000003d0b686d61632d"
    "7368613235360000006553f100012c00200ab965801f474a34165303e9f0c682ca17140d44129508053e0a72736f901aad123400000000")


def test_a_claim_is_what_another_implementation_makes_of_it():
    request = claim(ZONE, KEY, 0x1234, NOW, NAME, MARK)
    assert request.wire == CLAIM and request.number == number_of(CLAIM) == 0x1234


def test_an_answer_of_another_implementation_is_believed():
    answer = read_answer(IN_USE, claim(ZONE, KEY, 0x1234, NOW, NAME, MARK), KEY)
    assert (answer.code, answer.reason, answer.is_cut, answer.records) == (6, "taken", False, ())


def changes(request: dns.Request) -> tuple[list[Record], list[Record]]:
    """What an update asks for, and what it changes."""
    message = parse(request.wire)
    assert message.opcode == dns.UPDATE and message.signature is not None
    assert dns.is_signed(request.wire, message.signature, KEY)
    return list(message.answers), list(message.others)


def test_a_claim_asks_that_the_name_is_not_in_use():
    asked, changed = changes(claim(ZONE, KEY, 1, NOW, NAME, MARK))
    assert asked == [Record(NAME, ANY_KIND, NONE, 0, b"")]
    assert changed == [Record(NAME, A, IN, 60, V4.packed), Record(NAME, AAAA, IN, 60, V6.packed),
                       Record(NAME, TXT, IN, 60, MARK.data)]


def test_a_removal_names_each_record_that_was_written_and_no_other():
    human = text_data((b"v=spf1 -all",))
    asked, changed = changes(replace(ZONE, KEY, 1, NOW, NAME, (human, MARK.data), [MARK], None))
    assert asked == [Record(NAME, TXT, IN, 0, human), Record(NAME, TXT, IN, 0, MARK.data)]
    assert changed == [Record(NAME, A, NONE, 0, V4.packed), Record(NAME, AAAA, NONE, 0, V6.packed),
                       Record(NAME, TXT, NONE, 0, MARK.data)]


def test_other_addresses_take_the_place_of_the_old_ones():
    old = Mark("7e", (V4, ipaddress.ip_address("192.0.2.9")))
    asked, changed = changes(replace(ZONE, KEY, 1, NOW, NAME, (old.data,), [old], MARK))
    assert asked == [Record(NAME, TXT, IN, 0, old.data)]
    assert changed == [Record(NAME, A, NONE, 0, bytes((192, 0, 2, 9))), Record(NAME, TXT, NONE, 0, old.data),
                       *MARK.records(NAME, 60)]


def test_a_long_name_with_few_addresses_fits_into_a_datagram():
    zone = parse_url(f"rfc2136://ns/{'z' * 60}.example.com?key={'k' * 63}&address="
                     + ",".join(f"2001:db8:aaaa:bbbb:cccc:dddd:eeee:{number:04}" for number in range(1000, 1008)))
    name = f"{'a' * 63}.{zone.name}"
    mark = Mark("f" * 32, zone.addresses)
    assert dns.UDP_MAX < len(claim(zone, KEY, 1, NOW, name, mark).wire) < 1000, "else by TCP"
    few = Mark("f" * 32, zone.addresses[:2])
    assert len(claim(zone, KEY, 1, NOW, name, few).wire) <= dns.UDP_MAX


def reply(request: dns.Request, code: int = 0, flags: int = 0, records: tuple[Record, ...] = (), key: Key | None = KEY,
          error: int = 0, other: bytes = b"", number: int | None = None, asked: bytes | None = None) -> bytes:
    """A server's answer."""
    message = parse(request.wire)
    writer = dns.Writer(request.number if number is None else number,
                        RESPONSE | message.opcode << 11 | flags | code, (0, len(records), 0, 0))
    for record in records:
        writer.record(record)
    if key is None:
        return bytes(writer.out)
    return sign(bytes(writer.out), key, int(NOW), error=error, other=other,
                asked=request.mac if asked is None else asked)[0]


def unsigned(request: dns.Request, error: int) -> bytes:
    """An answer with an empty signature, RFC 8945 section 5.3.2."""
    data = reply(request, 9, error=error)
    signature = parse(data).signature
    return data.replace(b"\0\x20" + signature.mac, b"\0\0").replace(b"\0\0\0\0\0\x3d\x0b", b"\0\0\0\0\0\x1d\x0b")


@pytest.mark.parametrize("code", range(16))
def test_each_answer_has_a_word_and_the_word_a_sentence(code):
    request = look_up(KEY, 7, NOW, NAME)
    for key in (KEY, None) if code else (KEY,):
        answer = read_answer(reply(request, code, key=key), request, KEY)
        assert answer.code == code and bool(answer.reason) == bool(code)
        assert not code or answer.reason in REASONS


def test_no_row_of_the_reasons_is_left_over():
    words = {dns.Answer(code, False, (), 0).reason for code in (*RCODES, 15)}
    assert words == REASONS.keys()


@pytest.mark.parametrize("error, word", [(16, "badsig"), (17, "badkey"), (22, "badtrunc")])
def test_a_server_that_cannot_sign_is_understood(error, word):
    request = look_up(KEY, 7, NOW, NAME)
    assert read_answer(unsigned(request, error), request, KEY) == dns.Answer(error, False, (), 0)
    assert dns.Answer(error, False, (), 0).reason == word


def test_the_server_tells_its_time_and_signs_it():
    request = look_up(KEY, 7, NOW, NAME)
    told = (int(NOW) + 5000).to_bytes(6, "big")
    answer = read_answer(reply(request, 9, error=18, other=told), request, KEY)
    assert (answer.reason, answer.time) == ("badtime", NOW + 5000)
    with pytest.raises(Malformed, match="not signed"):
        read_answer(unsigned(request, 18), request, KEY)
    assert read_answer(reply(request, 9, error=18, other=b"abc"), request, KEY).time == 0


def test_the_texts_of_a_name():
    request = look_up(KEY, 7, NOW, NAME)
    records = (Record(NAME, TXT, IN, 60, b"\1b"), Record(NAME, TXT, IN, 9, b"\1a"), Record(NAME, A, IN, 60, V4.packed),
               Record("x.tun.example.com", TXT, IN, 60, b"\1c"), Record(NAME, TXT, 3, 60, b"\1d"))
    answer = read_answer(reply(request, records=records, flags=TRUNCATED), request, KEY)
    assert texts_of(answer, NAME) == (b"\1a", b"\1b") and answer.is_cut and answer.records == records


@pytest.mark.parametrize("more, said", [
    ({"key": None}, "not signed"),
    ({"key": Key("router", b"x" * 32)}, "wrong"),
    ({"key": Key("other", KEY.secret)}, "wrong"),
    ({"asked": b""}, "wrong"),
    ({"asked": b"x" * 32}, "wrong"),
    ({"number": 8}, "no answer to this"),
], ids=["unsigned", "another secret", "another key", "to nothing", "to another request", "another id"])
def test_what_proves_nothing_is_not_believed(more, said):
    request = look_up(KEY, 7, NOW, NAME)
    with pytest.raises(Malformed, match=said):
        read_answer(reply(request, **more), request, KEY)


def test_a_request_is_no_answer_and_an_answer_of_another_kind_neither():
    request, update = look_up(KEY, 7, NOW, NAME), claim(ZONE, KEY, 7, NOW, NAME, MARK)
    for data in (request.wire, reply(update)):
        with pytest.raises(Malformed, match="answer"):
            read_answer(data, request, KEY)


def test_a_changed_bit_is_found_wherever_it_is():
    request = claim(ZONE, KEY, 0x1234, NOW, NAME, MARK)
    data = reply(request, records=(Record(NAME, TXT, IN, 60, MARK.data),))
    read_answer(data, request, KEY)
    for at in range(len(data)):
        for bit in (1, 0x80, 0x20):
            other = bytearray(data)
            other[at] ^= bit
            try:
                answer = read_answer(bytes(other), request, KEY)
            except Malformed:
                continue
            in_name = data.index(write_name("router")) <= at < data.index(write_name("router")) + 7 or (
                data.rindex(write_name("hmac-sha256")) <= at < data.rindex(write_name("hmac-sha256")) + 13)
            assert in_name and bit == 0x20, "a letter of the key's name or of the algorithm: case means nothing, RFC 4343"
            assert answer.code == 0


def test_a_forwarder_may_change_the_id():
    """The signature has the one that was signed.  Source: RFC 8945 section 5.2."""
    request = look_up(KEY, 7, NOW, NAME)
    data = reply(request, number=99)
    assert read_answer(struct.pack(">H", 7) + data[2:], request, KEY).code == 0


def test_no_record_follows_a_signature():
    data = CLAIM[:10] + b"\0\2" + CLAIM[12:] + CLAIM[CLAIM.rindex(b"\6router"):]
    with pytest.raises(Malformed, match="behind the signature"):
        parse(data)
    with pytest.raises(Malformed, match="wrong section"):
        parse(CLAIM[:8] + b"\0\4\0\0" + CLAIM[12:])
    with pytest.raises(Malformed, match="bytes behind"):
        parse(CLAIM + b"\0")


@pytest.mark.parametrize("data", [CLAIM, IN_USE], ids=["request", "answer"])
def test_a_message_that_is_cut_is_refused_wherever(data):
    for end in range(len(data)):
        with pytest.raises(Malformed):
            parse(data[:end])


def test_nonsense_is_malformed_and_nothing_else():
    request = claim(ZONE, KEY, 0x1234, NOW, NAME, MARK)
    randoms = random.Random(20)
    samples = [CLAIM, IN_USE, reply(request, records=(Record(NAME, TXT, IN, 60, MARK.data),)), unsigned(request, 17)]
    refused = 0
    for _ in range(6000):
        data = bytearray(randoms.choice(samples))
        for _ in range(randoms.choice((1, 1, 2, 5))):
            at = randoms.randrange(len(data))
            data[at:at + randoms.choice((0, 1, 1, 2))] = randoms.choice(
                (b"", b"\xc0", b"\xff", b"\0", randoms.randbytes(1), randoms.randbytes(4), b"\xc0\x0c"))
        for function, more in ((parse, ()), (read_answer, (request, KEY))):
            try:
                found: Any = function(bytes(data), *more)
            except Malformed as error:
                refused += 1
                assert str(error).isprintable()
            else:
                assert isinstance(found, (Message, dns.Answer))
                assert function is parse or found.code or bytes(data) in samples or "router" in str(parse(bytes(data)))
    assert refused > 4000


# -- TCP ---------------------------------------------------------------------------------------


def test_a_message_by_tcp_may_come_in_pieces():
    data = frame(CLAIM)
    for end in range(len(data)):
        assert unframe(data[:end]) is None
    assert unframe(data) == unframe(bytearray(data + b"more")) == CLAIM


@pytest.mark.parametrize("data", [b"\0\0", b"\0\x0b"])
def test_a_length_of_nothing_is_malformed(data):
    with pytest.raises(Malformed):
        unframe(data)


def test_the_id_of_what_is_no_message():
    assert number_of(b"") == number_of(b"\x12\x34") == -1
