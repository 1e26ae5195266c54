"""Tests of sniroute_names.py: names, addresses, and text that is shown."""

from __future__ import annotations

import ipaddress
import random
import re

import pytest

import sniroute_names
from sniroute_names import (ascii_advice, has_owner, is_number, is_public, normalise, normalise_whole, parse_host_port,
                            parse_network, printable, show_address, site_of)
from sniroute_refusals import Malformed
from testbed.hellos import BAD_NAMES, GOOD_NAMES, Bad, verdict


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD_NAMES.values(), ids=GOOD_NAMES)
def test_a_name_in_any_case_becomes_its_lower_case(name):
    assert normalise(name.encode()) == name
    assert normalise(name.upper().encode()) == name


@pytest.mark.parametrize("name", GOOD_NAMES.values(), ids=GOOD_NAMES)
def test_a_trailing_dot_is_one_name(name):
    """253 characters and the dot, too."""
    assert normalise(name.encode() + b".") == name == normalise(name.upper().encode() + b".")
    with pytest.raises(Malformed):
        normalise(name.encode() + b"..")


@pytest.mark.parametrize("name", GOOD_NAMES.values(), ids=GOOD_NAMES)
def test_a_name_for_everywhere_has_two_labels(name):
    for raw in (name.encode(), name.encode() + b"."):
        assert verdict(normalise_whole, raw) == (name if "." in name else Bad("bad_name", 112))


@pytest.mark.parametrize("raw", BAD_NAMES.values(), ids=BAD_NAMES)
def test_what_is_no_name_is_refused_as_one(raw):
    with pytest.raises(Malformed) as caught:
        normalise(raw)
    assert (caught.value.kind, caught.value.alert) == ("bad_name", 112)
    assert re.fullmatch("[ -~]{1,120}", str(caught.value)), "fit for a log, whatever the name"


def test_only_letters_digits_hyphen_underscore_and_dot_are_in_names_T36_T37():
    allowed = b"abcdefghijklmnopqrstuvwxyz0123456789-_."
    for byte in range(256):
        raw = b"a" + bytes([byte]) + b"b.example.com"
        if bytes([byte]).lower() in [allowed[i:i + 1] for i in range(len(allowed))]:
            assert normalise(raw) == raw.lower().decode()
        else:
            assert verdict(normalise, raw) == Bad("bad_name", 112), byte


# -- addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("h:1", ("h", 1)), ("[::1]:443", ("::1", 443)), ("[2001:DB8::0]:0", ("2001:db8::", 0)), ("*:65535", ("*", 65535)),
    ("10.0.0.1:80", ("10.0.0.1", 80)), (":80", None), ("", None), ("h", None), ("h:", None), ("h:65536", None),
    ("h:080", None), ("h:+80", None), ("h:\u0661", None), ("::1:80", None), ("[]:80", None), ("[::g]:80", None),
    ("[h]:80", None), ("h\u00e4:80", None), ("h:8\udcff", None),
])
def test_a_host_and_a_port(text, expected):
    if expected is None:
        with pytest.raises(ValueError):
            parse_host_port(text)
    else:
        assert parse_host_port(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("[::ffff:127.0.0.1]:443", ("127.0.0.1", 443)), ("[::FFFF:7f00:1]:443", ("127.0.0.1", 443)),
    ("[::ffff:0.0.0.0]:1", ("0.0.0.0", 1)), ("[::127.0.0.1]:443", ("::7f00:1", 443)),
])
def test_an_ipv4_address_in_ipv6_is_ipv4(text, expected):
    host, port = parse_host_port(text)
    assert (ipaddress.ip_address(host), port) == (ipaddress.ip_address(expected[0]), expected[1])


@pytest.mark.parametrize("text, network", [
    ("::ffff:127.0.0.0/104", "127.0.0.0/8"), ("::ffff:7f00:0/104", "127.0.0.0/8"), ("::ffff:192.0.2.7", "192.0.2.7/32"),
    ("::ffff:0:0/96", "0.0.0.0/0"), ("::ffff:192.0.2.7/128", "192.0.2.7/32"),
    ("::/0", "::/0"), ("::fffe:0:0/95", "::fffe:0:0/95"), ("::/80", "::/80"), ("2001:db8::/32", "2001:db8::/32"),
    ("192.0.2.0/24", "192.0.2.0/24"), ("::1", "::1/128"),
])
def test_a_network_of_ipv4_in_ipv6_is_ipv4_and_a_wider_one_is_ipv6_alone(text, network):
    found = parse_network(text)
    assert found == ipaddress.ip_network(network)
    assert (ipaddress.ip_address("127.0.0.1") in found) is (network in ("127.0.0.0/8", "0.0.0.0/0"))


@pytest.mark.parametrize("text", ["::ffff:127.0.0.0/8", "::ffff:127.0.0.1/104", "192.0.2.1/24", "x", ""])
def test_what_is_no_network(text):
    with pytest.raises(ValueError):
        parse_network(text)


def in_ipv6(address: str) -> dict[str, str]:
    """An IPv4 address in each form that IPv6 has for it."""
    packed = ipaddress.IPv4Address(address).packed
    teredo = b"\x20\1\0\0" + bytes((8, 8, 8, 8)) + bytes(4) + bytes(byte ^ 255 for byte in packed)
    forms = {"mapped": bytes(10) + b"\xff\xff" + packed, "compatible": bytes(12) + packed,
             "NAT64": b"\0\x64\xff\x9b" + bytes(8) + packed, "6to4": b"\x20\2" + packed + bytes(9) + b"\1",
             "Teredo": teredo}
    return {form: str(ipaddress.IPv6Address(bits)) for form, bits in forms.items()}


@pytest.mark.parametrize("address, public", [
    ("8.8.8.8", True), ("1.1.1.1", True), ("100.63.255.255", True), ("172.32.0.0", True), ("223.255.255.255", True),
    ("0.0.0.0", False), ("10.1.2.3", False), ("100.64.0.1", False), ("127.0.0.1", False), ("169.254.169.254", False),
    ("172.16.0.1", False), ("172.31.255.255", False), ("192.0.0.9", False), ("192.0.2.1", False),
    ("192.88.99.1", False), ("192.168.1.1", False), ("198.18.0.1", False), ("203.0.113.5", False),
    ("224.0.0.1", False), ("240.0.0.1", False), ("255.255.255.255", False),
])
def test_an_address_is_public_or_not_in_whatever_form(address, public):
    assert is_public(ipaddress.ip_address(address)) is public
    for form, text in in_ipv6(address).items():
        assert is_public(ipaddress.ip_address(text)) is public, form


@pytest.mark.parametrize("address, public", [
    ("2606:4700::1111", True), ("2a00::1", True), ("::", False), ("::1", False), ("fe80::1", False), ("fd00::1", False),
    ("fec0::1", False), ("ff02::1", False), ("2001:db8::1", False), ("3fff::1", False), ("2001:2::1", False),
    ("64:ff9b:1::808:808", False), ("100::1", False), ("5f00::1", False), ("4000::1", False),
    ("2001:0:a00:1::f7f7:f7f7", False),  # Teredo to 8.8.8.8 by a server with a private address
])
def test_what_is_public_in_ipv6_is_the_same_in_every_python(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize("host, number", [
    ("127.1", True), ("127.1.", True), ("0x7f000001.", True), ("1.2.3.4", False), ("::1", False), ("db1.", False),
    ("db.1", True), ("db", False), ("1.db", False),
])
def test_a_number_is_no_host_with_a_trailing_dot_either(host, number):
    assert is_number(host) is number


@pytest.mark.parametrize("address, text", [(("192.0.2.1", 1), "192.0.2.1:1"), (("::1", 2), "[::1]:2"),
                                           (("fe80::1%eth0", 3, 0, 2), "[fe80::1%eth0]:3")])
def test_an_address_for_people(address, text):
    assert show_address(address) == text


# -- whose a domain is -------------------------------------------------------------------------


@pytest.fixture
def suffixes() -> bytes:
    """A Public Suffix List, as publicsuffix.org makes it."""
    return "\n// no\nno\nvestre-toten.no\nøvre-eiker.no\n\n// jp\njp\n*.kobe.jp\n!city.kobe.jp\n".encode()


@pytest.mark.parametrize("domain", [
    "example.com", "Example.COM", "example.com.", "a.b.example.com", "example.co.uk", "example.org.br", "example.de",
    "foo.github.io", "cluster.local", "svc.cluster.local", "internal", "x.internal", "lan", "home.arpa",
    "tail1234.ts.net", "example.ca.us",
])
@pytest.mark.parametrize("listed", [True, False], ids=["with a list", "without"])
def test_a_domain_with_an_owner(domain, listed, monkeypatch, suffixes):
    monkeypatch.setattr(sniroute_names, "listed_suffixes", lambda: suffixes if listed else b"")
    assert has_owner(domain)


@pytest.mark.parametrize("domain", [
    "", ".", "com", "uk", "local", "db", "co.uk", "CO.UK", "co.uk.", "com.au", "or.jp", "ac.uk", "gov.br", "ca.us",
    "mi.it", "example.ck", "github.io", "GitHub.io", "pages.dev", "eu.org", "uk.com", "duckdns.org", "ts.net",
    "amazonaws.com", "eu-west-1.elb.amazonaws.com", "nip.io", "10-0-0-1.nip.io", "a.b.sslip.io", "a..com", ".com",
    "lviv.ua", "kharkov.ua", "blog.br", "app.br", "kiwi.nz", "geek.nz", "nsw.au", "ind.in", "law.za", "bel.tr", "desa.id",
    "poznan.pl", "sklep.pl", "aichi.jp", "oslo.no", "xn--55qx5d.cn", "devtunnels.ms", "ngrok.pro", "zrok.io", "r2.dev",
    "hf.space", "supabase.co", "dedyn.io", "no-ip.biz", "dynv6.net", "myfritz.net", "ddnss.de", "translate.goog",
])
@pytest.mark.parametrize("listed", [True, False], ids=["with a list", "without"])
def test_a_domain_that_is_everybodys_or_in_doubt(domain, listed, monkeypatch, suffixes):
    monkeypatch.setattr(sniroute_names, "listed_suffixes", lambda: suffixes if listed else b"")
    assert not has_owner(domain)


@pytest.mark.parametrize("domain, owner", [
    ("vestre-toten.no", False), ("a.kobe.jp", False), ("city.kobe.jp", True), ("xn--vre-eiker-k8a.no", False),
    ("a.vestre-toten.no", True), ("example.museum", True), ("xn--a.no", False), ("b.a.kobe.jp", True),
])
def test_the_list_of_the_host_knows_more(domain, owner, monkeypatch, suffixes):
    monkeypatch.setattr(sniroute_names, "listed_suffixes", lambda: suffixes)
    assert has_owner(domain) is owner


def test_the_list_of_the_host_is_read_where_there_is_one(tmp_path, monkeypatch):
    for path, read in ((tmp_path / "none", b""), (tmp_path / "list", b"\nexample\n")):
        if read:
            path.write_bytes(read[1:])
        monkeypatch.setattr(sniroute_names, "LISTED", str(path))
        assert sniroute_names.listed_suffixes.__wrapped__() == read


# -- letters that are not in ASCII -------------------------------------------------------------


@pytest.mark.parametrize("text, written", [
    ("m\u00fcnchen.example", "xn--mnchen-3ya.example"), ("*.M\u00dcNCHEN.example", "*.xn--mnchen-3ya.example"),
    ("m\u00fcnchen.example.", "xn--mnchen-3ya.example."), ("a.\u4f8b\u3048.\u30c6\u30b9\u30c8", "a.xn--r8jz45g.xn--zckzah"),
    ("tcp:m\u00fcnchen.example:443", "tcp:xn--mnchen-3ya.example:443"), ("m\u00fcnchen:1", "xn--mnchen-3ya:1"),
    ("cloudflared:cft-{label}.m\u00fcnchen.example", "cloudflared:cft-{label}.xn--mnchen-3ya.example"),
    ("\uff44\uff42.example.com", "db.example.com"),
])
def test_the_form_to_write_instead_is_in_the_sentence(text, written):
    assert ascii_advice(text) == f"; write {written}, which is its form in DNS and TLS"


@pytest.mark.parametrize("text", [
    "", "db.example.com", "db example", "\udcff.example.com", "\u00fc" * 80 + ".example", "\u00fc" * 10_000_000,
    "{label}-m\u00fcnchen.example", "\u200d.example", "fa\u00df.example", "\u0301.example\x1b\u00fc", "\u00a0\u00fc b",
    "\ufeff", "\u00fc b.example",
])
def test_what_has_no_such_form_is_left_alone(text):
    """A sharp s is `ss` in one version of IDNA and another letter in the next: no guess."""
    assert ascii_advice(text) == ""


def test_no_text_is_too_strange_for_advice():
    rng = random.Random(20261129)
    for _ in range(5_000):
        text = "".join(chr(rng.choice((rng.randrange(0x250), rng.randrange(0xD800, 0xE000), rng.randrange(0x110000),
                                       0x2E, 0x3002, 0x200D))) for _ in range(rng.randrange(1, 9)))
        assert re.fullmatch("[ -~]*", ascii_advice(text)), ascii(text)


# -- text that is shown ------------------------------------------------------------------------


@pytest.mark.parametrize("text, limit, line", [
    pytest.param("plain", 10, "plain", id="short"),
    pytest.param("exactly ten"[:10], 10, "exactly te", id="as long as the limit"),
    pytest.param("eleven long", 10, "eleven ...", id="one too long"),
    pytest.param("a\nb\rc\x1b[31m\x7f\0", 20, "a?b?c?[31m??", id="control characters"),
    pytest.param("t\u00e9l\u202e\U0001f600", 20, "t?l??", id="not ASCII"),
    pytest.param("", 10, "", id="empty"),
    pytest.param("x" * 10_000_000, 10, "xxxxxxx...", id="huge"),
])
def test_printable(text, limit, line):
    assert printable(text, limit) == line


def test_a_site_is_one_ipv4_address_or_a_64_of_ipv6():
    assert site_of("192.0.2.1") == site_of("::ffff:192.0.2.1") != site_of("192.0.2.2")
    assert site_of("2001:db8::1") == site_of("2001:db8::2%eth0") != site_of("2001:db8:0:1::1")
    assert site_of("") == ""  # of a socket that is gone already
