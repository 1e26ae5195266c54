"""Tests of sniroute_certificate.py, in its order.  OpenSSL is the judge: its programs, curl, and Python's ssl."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import itertools
import os
import pathlib
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from typing import Any, Callable, Iterator

import pytest

import sniroute_certificate
from conftest import HOST, FakeClock, linux
from sniroute_certificate import (
    B, DAY, EARLIER, G, INFINITY, LEAF_LIFE, LEAF_SPARE, LEAFS_MAX, N, P, ROOT_LIFE, SIGNATURES, Authority, Key, Leafs,
    Pair, Point, der, key_of, load, multiply, new_key, nonces, pem, self_signed, sign)
from sniroute_refusals import Malformed
from testbed.program import execute

NOW = 1_800_000_000.0  # a day in January 2027: for what no client looks at
NAME = "db-123.example.com"
ADDRESSES = [ipaddress.ip_address(text) for text in ("192.0.2.7", "2001:db8::7")]


def long_name(size: int) -> str:
    """A host name of so many characters, of labels as long as they may be."""
    labels, left = [], size
    while left > 63:
        take = 63 if left - 64 > 0 else 62  # no label is empty
        labels.append("a" * take)
        left -= take + 1
    return ".".join([*labels, "b" * left])


NAMES = [NAME, "localhost", "_dmarc.example.com", "xn--bcher-kva.example", long_name(64), long_name(65), long_name(253),
         *ADDRESSES]


@pytest.fixture
def openssl() -> Callable[..., str]:
    """openssl(words...) -> what it said; it must succeed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here (Debian package openssl)")

    def run(*words: Any, said: bytes = b"") -> str:
        ended = execute("openssl", *map(str, words), said=said)
        assert ended.returncode == 0, ended
        return ended.stdout.decode()

    return run


@pytest.fixture(scope="module")
def authority() -> Authority:
    """A root that is valid now."""
    return Authority(time.time())


@pytest.fixture
def root_file(authority: Authority, tmp_path: pathlib.Path) -> pathlib.Path:
    """The root as a client has it."""
    path = tmp_path / "root.pem"
    path.write_bytes(authority.root.certificate_pem)
    return path


def at_once(count: int, act: Callable[[int], Any]) -> list[Any]:
    """What `act(number)` returns in so many threads that all begin together."""
    barrier, found = threading.Barrier(count), {}

    def run(number: int) -> None:
        barrier.wait()
        found[number] = act(number)

    threads = [threading.Thread(target=run, args=(number,), name=f"asks-{number}") for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(count)]


# -- the curve ---------------------------------------------------------------------------------


def is_on_the_curve(point: Point) -> bool:
    x, y = point
    return 0 <= x < P and 0 <= y < P and (y * y - x ** 3 + 3 * x - B) % P == 0


# Scalars and their multiples of G: small ones, and those next to N, from the list of P-256's multiples that is known as
# NIST's; RFC 5903 section 8.1, both sides; RFC 6979 appendix A.2.5.
MULTIPLES = [
    (1, G[0], G[1]),
    (2, 0x7CF27B188D034F7E8A52380304B51AC3C08969E277F21B35A60B48FC47669978,
        0x07775510DB8ED040293D9AC69F7430DBBA7DADE63CE982299E04B79D227873D1),
    (3, 0x5ECBE4D1A6330A44C8F7EF951D4BF165E6C6B721EFADA985FB41661BC6E7FD6C,
        0x8734640C4998FF7E374B06CE1A64A2ECD82AB036384FB83D9A79B127A27D5032),
    (112233445566778899,
        0x339150844EC15234807FE862A86BE77977DBFB3AE3D96F4C22795513AEAAB82F,
        0xB1C14DDFDC8EC1B2583F51E85A5EB3A155840F2034730E9B5ADA38B674336A21),
    (112233445566778899112233445566778899,
        0x1B7E046A076CC25E6D7FA5003F6729F665CC3241B5ADAB12B498CD32F2803264,
        0xBFEA79BE2B666B073DB69A2A241ADAB0738FE9D2DD28B5604EB8C8CF097C457B),
    (0xC88F01F510D9AC3F70A292DAA2316DE544E9AAB8AFE84049C62A9C57862D1433,
        0xDAD0B65394221CF9B051E1FECA5787D098DFE637FC90B9EF945D0C3772581180,
        0x5271A0461CDB8252D61F1C456FA3E59AB1F45B33ACCF5F58389E0577B8990BB3),
    (0xC6EF9C5D78AE012A011164ACB397CE2088685D8F06BF9BE0B283AB46476BEE53,
        0xD12DFB5289C8D4F81208B70270398C342296970A0BCCB74C736FC7554494BF63,
        0x56FBF3CA366CC23E8157854C13C58D6AAC23F046ADA30F8353E74F33039872AB),
    (0xC9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721,
        0x60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6,
        0x7903FE1008B8BC99A41AE9E95628BC64F2F1B20C2D7E9F5177A3C294D4462299),
    (N - 2, 0x7CF27B188D034F7E8A52380304B51AC3C08969E277F21B35A60B48FC47669978,
            P - 0x07775510DB8ED040293D9AC69F7430DBBA7DADE63CE982299E04B79D227873D1),
    (N - 1, G[0], P - G[1]),
]


@pytest.mark.parametrize("scalar, x, y", MULTIPLES, ids=[f"{scalar:x}"[:12] for scalar, _, _ in MULTIPLES])
@pytest.mark.parametrize("blind", [0, 1, (1 << 64) - 1, None], ids=["none", "least", "most", "random"])
def test_multiples_of_the_generator_are_those_of_nist_however_they_are_blinded(scalar, x, y, blind, monkeypatch):
    if blind is not None:
        monkeypatch.setattr(secrets, "randbits", lambda bits: blind)
    assert multiply(scalar) == (x, y)


def test_two_runs_with_one_secret_take_different_steps(monkeypatch):
    steps: list[list[Point]] = []
    add = sniroute_certificate._add
    monkeypatch.setattr(sniroute_certificate, "_add", lambda point, other: steps[-1].append(other) or add(point, other))
    found = set()
    for _ in range(2):
        steps.append([])
        found.add(multiply(12345))
    assert len(found) == 1 and steps[0] != steps[1] and len(steps[0]) > 50


def test_equal_and_opposite_points_can_be_added():
    """The formula for others would divide by zero."""
    double, affine = sniroute_certificate._double, sniroute_certificate._affine
    for point in (multiply(1), multiply(77)):
        x, y = point
        for z in (1, 5, P - 2):
            same = x * z * z % P, y * z ** 3 % P, z
            assert affine([sniroute_certificate._add(same, point)]) == affine([double(same)])
            assert sniroute_certificate._add(same, (x, P - y))[2] == 0
    assert sniroute_certificate._add(INFINITY, G) == (*G, 1)
    assert double(INFINITY)[2] == 0


# -- keys and signatures -----------------------------------------------------------------------


def test_a_thousand_keys_are_on_the_curve_and_in_range():
    keys = [new_key() for _ in range(1000)]
    assert all(0 < key.scalar < N and is_on_the_curve(key.point) for key in keys)
    assert len({key.scalar for key in keys}) == len({key.point for key in keys}) == 1000


@pytest.mark.parametrize("chance, scalar", [(0, 1), (N - 2, N - 1)], ids=["least", "most"])
def test_the_first_and_the_last_key_are_keys(chance, scalar, monkeypatch):
    monkeypatch.setattr(secrets, "randbelow", {N - 1: chance}.get)
    assert new_key() == key_of(scalar) and is_on_the_curve(key_of(scalar).point)


def test_openssl_finds_keys_and_their_points_right(openssl, tmp_path):
    for key in (key_of(1), key_of(N - 1), *(new_key() for _ in range(10))):
        said = openssl("pkey", "-check", "-noout", "-text", said=Pair(NAME, b"", key, 0, 0).key_pem)
        assert "Key is valid\n" in said and "ASN1 OID: prime256v1\n" in said
        numbers = re.sub(r"[\s:]", "", said)
        assert f"priv{key.scalar:064x}pub{key.public.hex()}" in numbers


def test_a_key_does_not_show_its_secret():
    key, pair = key_of(0xC0FFEE), self_signed(NAME, NOW)
    assert f"{key}" == f"{key!r}" == f"Key of {key.identifier.hex()}"
    assert str(pair.key.scalar) not in repr(pair) and f"{pair.key.scalar:x}" not in repr(pair)


# RFC 6979 appendix A.2.5, with SHA-256.
SIGNER = 0xC9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721
SIGNATURES_6979 = [
    (b"sample", 0xA6E3C57DD01ABE90086538398355DD4C3B17AA873382B0F24D6129493D8AAD60,
     0xEFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716,
     0xF7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8),
    (b"test", 0xD16B6AE827F17175E040871A1C7EC3500192C4C92677336EC2537ACAEE0008E0,
     0xF1ABB023518351CD71D881567B1EA663ED3EFCF6C5132B354F28D3B0B7D38367,
     0x019F4113742A2B14BD25926B49C649155F267E60D3814B4C0CC84250E46F0083),
]


@pytest.mark.parametrize("message, nonce, r, s", SIGNATURES_6979, ids=["sample", "test"])
def test_signatures_are_those_of_rfc_6979(message, nonce, r, s):
    assert next(nonces(SIGNER, hashlib.sha256(message).digest())) == nonce
    numbers = sniroute_certificate._integer(r) + sniroute_certificate._integer(s)
    assert {sign(key_of(SIGNER), message) for _ in range(5)} == {der(0x30, numbers)}


def nonces_of_the_rfc(scalar: int, digest: bytes, order: int) -> Iterator[int]:
    """RFC 6979 section 3.2, step by step, for an order of 256 bits; the ones that are too large, too."""
    x, h = scalar.to_bytes(32, "big"), (int.from_bytes(digest, "big") % order).to_bytes(32, "big")
    value, key = b"\x01" * 32, b"\x00" * 32
    key = hmac.new(key, value + b"\x00" + x + h, "sha256").digest()
    value = hmac.new(key, value, "sha256").digest()
    key = hmac.new(key, value + b"\x01" + x + h, "sha256").digest()
    value = hmac.new(key, value, "sha256").digest()
    while True:
        value = hmac.new(key, value, "sha256").digest()
        yield int.from_bytes(value, "big")
        key = hmac.new(key, value + b"\x00", "sha256").digest()
        value = hmac.new(key, value, "sha256").digest()


@pytest.mark.parametrize("order", [N, 1 << 253], ids=["of the curve", "an eighth"])
def test_a_nonce_that_is_too_large_is_passed_over(order, monkeypatch):
    """With the curve's order that is one in four thousand million."""
    monkeypatch.setattr(sniroute_certificate, "N", order)
    digest = hashlib.sha256(b"x").digest()
    fitting = (nonce for nonce in nonces_of_the_rfc(7, digest, order) if nonce < order)
    assert list(itertools.islice(nonces(7, digest), 5)) == list(itertools.islice(fitting, 5))


def test_openssl_accepts_signatures(openssl, tmp_path):
    key, public, signature = new_key(), tmp_path / "public.pem", tmp_path / "signature"
    public.write_text(openssl("pkey", "-pubout", said=Pair(NAME, b"", key, 0, 0).key_pem))
    for message in (b"", b"a", *(secrets.token_bytes(1000) for _ in range(20))):
        signature.write_bytes(sign(key, message))
        assert openssl("dgst", "-sha256", "-verify", public, "-signature", signature, said=message) == "Verified OK\n"


# -- DER ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, head", [
    (0, "0400"), (1, "0401"), (127, "047f"), (128, "048180"), (255, "0481ff"), (256, "04820100"), (65535, "0482ffff"),
    (65536, "0483010000")])
def test_a_length_takes_as_few_bytes_as_it_needs(size, head):
    assert der(4, bytes(size)) == der(4, bytes(size // 2), bytes(size - size // 2)) == bytes.fromhex(head) + bytes(size)


@pytest.mark.parametrize("number, made", [
    (0, "020100"), (1, "020101"), (127, "02017f"), (128, "02020080"), (255, "020200ff"), (256, "02020100"),
    (0x7FFF, "02027fff"), (0x8000, "0203008000")])
def test_a_number_is_never_negative_and_never_too_long(number, made):
    assert sniroute_certificate._integer(number).hex() == made


@pytest.mark.parametrize("dotted, made", [
    ("2.5.29.17", "0603551d11"), ("1.2.840.10045.2.1", "06072a8648ce3d0201"),
    ("1.2.840.10045.4.3.2", "06082a8648ce3d040302"), ("1.3.6.1.5.5.7.3.1", "06082b06010505070301"),
    ("1.2.127.128.16383.16384", "06092a7f8100ff7f818000")])
def test_object_identifiers(dotted, made):
    assert sniroute_certificate._object(dotted).hex() == made


@pytest.mark.parametrize("seconds, tag, text", [
    (-631152001, 24, b"19491231235959Z"), (-631152000, 23, b"500101000000Z"), (0.9, 23, b"700101000000Z"),
    (2524607999, 23, b"491231235959Z"), (2524608000, 24, b"20500101000000Z")])
def test_the_year_has_four_digits_from_2050_on(seconds, tag, text):
    assert sniroute_certificate._time(seconds) == der(tag, text)


@pytest.mark.parametrize("size", [1, 47, 48, 49, 96, 97])
def test_pem_is_as_python_writes_it(size):
    content = secrets.token_bytes(size)
    assert pem("CERTIFICATE", content).decode() == ssl.DER_cert_to_PEM_cert(content)
    assert ssl.PEM_cert_to_DER_cert(pem("CERTIFICATE", content).decode()) == content


# -- certificates ------------------------------------------------------------------------------


def text_of(openssl: Callable[..., str], pair: Pair) -> str:
    """What `openssl x509 -text` says of it, in lines without white space around them."""
    said = openssl("x509", "-noout", "-text", "-nameopt", "RFC2253", "-certopt", "ext_error", said=pair.certificate_pem)
    return "\n".join(line.strip() for line in said.split("\n"))


def date(seconds: float) -> str:
    return time.strftime("%b %e %H:%M:%S %Y GMT", time.gmtime(seconds))


def colons(data: bytes) -> str:
    return ":".join(f"{byte:02X}" for byte in data)


def test_a_leaf_is_what_a_browser_asks_for(openssl):
    authority = Authority(NOW - 5)
    pair = authority.leaf(NAME, NOW)
    text = text_of(openssl, pair)
    assert (pair.name, pair.not_before, pair.not_after) == (NAME, NOW - EARLIER, NOW + LEAF_LIFE)
    for part in ("Version: 3 (0x2)", "Signature Algorithm: ecdsa-with-SHA256\nIssuer: ",
                 f"Issuer: CN={authority.root.name},O=sniroute\n", f"Subject: CN={NAME},O=sniroute\n",
                 f"Not Before: {date(NOW - EARLIER)}\nNot After : {date(NOW + LEAF_LIFE)}\n",
                 "Public Key Algorithm: id-ecPublicKey\nPublic-Key: (256 bit)\n", "ASN1 OID: prime256v1\n",
                 "X509v3 Basic Constraints: critical\nCA:FALSE\n",
                 "X509v3 Key Usage: critical\nDigital Signature\n",
                 "X509v3 Extended Key Usage:\nTLS Web Server Authentication\n",
                 f"X509v3 Subject Alternative Name:\nDNS:{NAME}\n",
                 f"X509v3 Subject Key Identifier:\n{colons(pair.key.identifier)}\n",
                 f"X509v3 Authority Key Identifier:\n{colons(authority.root.key.identifier)}\n"):
        assert part in text, part
    assert text.count("X509v3 ") == 7  # with "X509v3 extensions:"


def test_the_root_signs_leafs_and_nothing_else(openssl):
    root = Authority(NOW).root
    text = text_of(openssl, root)
    for part in (f"Issuer: CN={root.name},O=sniroute\n", f"Subject: CN={root.name},O=sniroute\n",
                 f"Not Before: {date(NOW - DAY)}\nNot After : {date(NOW - DAY + ROOT_LIFE)}\n",
                 "X509v3 Basic Constraints: critical\nCA:TRUE, pathlen:0\n",
                 "X509v3 Key Usage: critical\nCertificate Sign\n",
                 f"X509v3 Subject Key Identifier:\n{colons(root.key.identifier)}\n"):
        assert part in text, part
    assert text.count("X509v3 ") == 4 and ROOT_LIFE < 10 * 365.25 * DAY
    assert Authority(NOW).root.name != root.name


def test_key_usages_have_no_bit_more_than_they_need():
    """OpenSSL reads other spellings; DER has one (X.690 section 11.2)."""
    authority = Authority(NOW)
    assert bytes.fromhex("0603551d0f 0101ff 0404 03020780") in authority.leaf(NAME, NOW).certificate
    assert bytes.fromhex("0603551d0f 0101ff 0404 03020780") in self_signed(NAME, NOW).certificate
    assert bytes.fromhex("0603551d0f 0101ff 0404 03020204") in authority.root.certificate


def test_a_certificate_that_signs_itself_is_no_authority(openssl):
    pair = self_signed(NAME, NOW, life=400)
    text = text_of(openssl, pair)
    for part in (f"Issuer: CN={NAME},O=sniroute\n", f"Subject: CN={NAME},O=sniroute\n", "CA:FALSE\n", f"DNS:{NAME}\n",
                 f"Not Before: {date(NOW - EARLIER)}\nNot After : {date(NOW + 400)}\n",
                 "Digital Signature\n", "TLS Web Server Authentication\n"):
        assert part in text, part
    assert "Authority Key" not in text and (pair.not_before, pair.not_after) == (NOW - EARLIER, NOW + 400)


@pytest.mark.parametrize("name, subject, says", [
    (long_name(64), f"CN={long_name(64)},O=sniroute", f"DNS:{long_name(64)}"),
    (long_name(65), "O=sniroute", f"DNS:{long_name(65)}"),
    (long_name(253), "O=sniroute", f"DNS:{long_name(253)}"),
    ("xn--bcher-kva.example", "CN=xn--bcher-kva.example,O=sniroute", "DNS:xn--bcher-kva.example"),
    ("WWW.Example.COM.", "CN=www.example.com,O=sniroute", "DNS:www.example.com"),
    (ADDRESSES[0], "CN=192.0.2.7,O=sniroute", "IP Address:192.0.2.7"),
    (ADDRESSES[1], "CN=2001:db8::7,O=sniroute", "IP Address:2001:DB8:0:0:0:0:0:7"),
    (ipaddress.ip_address("::ffff:192.0.2.7"), "CN=192.0.2.7,O=sniroute", "IP Address:192.0.2.7"),
    (ipaddress.ip_address("fe80::1%eth0"), "CN=fe80::1,O=sniroute", "IP Address:FE80:0:0:0:0:0:0:1"),
], ids=["64", "65", "253", "xn--", "upper case, dot", "IPv4", "IPv6", "mapped", "scope"])
def test_a_name_is_in_the_alternative_name_and_where_it_fits_in_the_subject(openssl, name, subject, says):
    for pair in (Authority(NOW).leaf(name, NOW), self_signed(name, NOW)):
        text = text_of(openssl, pair)
        assert f"Subject: {subject}\n" in text and f"X509v3 Subject Alternative Name:\n{says}\n" in text


def test_names_of_all_lengths_make_certificates_that_openssl_reads(openssl, authority, root_file, tmp_path):
    """The lengths of what is around a name pass 127 and 255, one after the other."""
    names = [long_name(size) for size in range(1, 254)]
    assert [len(name) for name in names] == [*range(1, 254)]
    pairs = [authority.leaf(name, time.time()) for name in names]
    files = [tmp_path / f"{len(pair.name)}.pem" for pair in pairs]
    for pair, file in zip(pairs, files):
        file.write_bytes(pair.certificate_pem)
    assert openssl("verify", "-x509_strict", "-CAfile", root_file, *files) == "".join(f"{file}: OK\n" for file in files)
    together = tmp_path / "all.pem"
    together.write_bytes(b"".join(pair.certificate_pem for pair in pairs))
    assert re.findall(r"DNS:(\S+)", openssl("storeutl", "-noout", "-text", "-certs", together)) == names


@pytest.mark.parametrize("name", NAMES, ids=lambda name: str(name)[:12])
def test_openssl_verifies_a_leaf_by_its_root_alone(openssl, authority, root_file, tmp_path, name):
    leaf, other = tmp_path / "leaf.pem", tmp_path / "other.pem"
    leaf.write_bytes(authority.leaf(name, time.time()).certificate_pem)
    other.write_bytes(Authority(time.time()).root.certificate_pem)
    which = "-verify_hostname" if isinstance(name, str) else "-verify_ip"
    common = "verify", "-x509_strict", "-purpose", "sslserver", which, name
    assert openssl(*common, "-CAfile", root_file, leaf) == f"{leaf}: OK\n"
    assert execute("openssl", *map(str, common), "-CAfile", str(other), str(leaf)).returncode == 2
    assert openssl("verify", "-x509_strict", "-check_ss_sig", "-CAfile", root_file, root_file) == f"{root_file}: OK\n"


@pytest.mark.parametrize("name", NAMES, ids=lambda name: str(name)[:12])
def test_openssl_verifies_a_certificate_that_signed_itself(openssl, tmp_path, name):
    path = tmp_path / "own.pem"
    path.write_bytes(self_signed(name, time.time()).certificate_pem)
    assert openssl("verify", "-purpose", "sslserver", "-CAfile", path, path) == f"{path}: OK\n"


def test_a_leaf_cannot_sign_another(openssl, authority, root_file, tmp_path):
    leaf, forged = authority.leaf(NAME, time.time()), tmp_path / "forged.pem"
    forger = Authority(time.time())
    forger.root, forger.subject = (leaf._replace(not_before=0, not_after=1 << 40),
                                   sniroute_certificate._distinguished(NAME))
    forged.write_bytes(forger.leaf("bank.example.com", time.time()).certificate_pem)
    between = tmp_path / "leaf.pem"
    between.write_bytes(leaf.certificate_pem)
    ended = execute("openssl", "verify", "-CAfile", str(root_file), "-untrusted", str(between), str(forged))
    assert ended.returncode == 2 and b"invalid CA certificate" in ended.stderr


def test_no_two_certificates_have_one_serial_number(openssl, authority):
    numbers = [int(openssl("x509", "-noout", "-serial", said=pair.certificate_pem).partition("=")[2], 16)
               for pair in [authority.leaf(NAME, NOW) for _ in range(5)] + [self_signed(NAME, NOW), authority.root]]
    assert len(set(numbers)) == 7 and all(1 << 64 < number < 1 << 159 for number in numbers)


NO_NAMES = {
    "nothing": "", "a dot": ".", "an empty label": "a..example.com", "a wildcard": "*.example.com", "IPv4": "192.0.2.1",
    "IPv4 in hex": "0x7f.1", "IPv6": "2001:db8::1", "a space": "a b.example.com", "a letter": "b\u00fccher.example",
    "half a letter": "\udc80.example.com", "NUL": "bank.example.com\0.example.org", "a line": "a.example.com\n",
    "two": "a.example.com,DNS:b.example.com", "a slash": "a/CN=b.example.com", "a hyphen": "-a.example.com",
    "a long label": f"{'a' * 64}.example.com", "254": long_name(253) + "c"}


@pytest.mark.parametrize("name", NO_NAMES.values(), ids=NO_NAMES)
def test_what_is_no_name_gets_no_certificate_and_no_key(name, authority, monkeypatch):
    monkeypatch.setattr(sniroute_certificate, "new_key", None)
    leafs = Leafs()
    for make in (lambda: self_signed(name, NOW), lambda: authority.leaf(name, time.time()), lambda: leafs.get(name)):
        with pytest.raises(Malformed, match="not a host name") as caught:
            make()
        assert caught.value.kind == "bad_name"
    assert not leafs.cache and not leafs.made


@pytest.mark.parametrize("late", [-DAY, ROOT_LIFE - LEAF_LIFE, ROOT_LIFE * 2],
                         ids=["before", "the end is near", "over"])
def test_a_root_signs_nothing_that_would_outlive_it(late):
    authority = Authority(NOW)
    assert authority.may_sign(NOW) and not authority.may_sign(NOW + late)
    with pytest.raises(ValueError, match="not valid"):
        authority.leaf(NAME, NOW + late)


# -- handshakes --------------------------------------------------------------------------------


@pytest.fixture
def tls_server(serve) -> Callable[[Pair], tuple[str, int]]:
    """tls_server(pair) -> the address of a server that shows it, and answers each request over HTTP."""
    def start(pair: Pair) -> tuple[str, int]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        load(context, pair)

        def handle(sock: socket.socket) -> None:
            with context.wrap_socket(sock, server_side=True) as tls:
                tls.recv(4096)
                tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
                tls.unwrap()  # close_notify: without it s_client calls it an error

        return serve(handle).address

    return start


def client_context(trusted: pathlib.Path, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """A client that checks all that OpenSSL can, as Python does by default from 3.13 on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(trusted)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.minimum_version = context.maximum_version = version
    return context


def ask(address: tuple[str, int], context: ssl.SSLContext, name: str | ipaddress.IPv4Address) -> ssl.SSLSocket:
    """A connection, over which the name was verified and an answer has come; it is closed."""
    with (socket.create_connection(address, 20) as sock,
          context.wrap_socket(sock, server_hostname=str(name)) as client):
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        return client


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: str(name)[:12])
def test_a_client_that_trusts_the_root_verifies_each_name(tls_server, authority, root_file, name, version):
    address = tls_server(authority.leaf(name, time.time()))
    ask(address, client_context(root_file, version), name)


def test_a_client_verifies_a_certificate_that_signed_itself(tls_server, tmp_path):
    pair, path = self_signed(NAME, time.time()), tmp_path / "own.pem"
    path.write_bytes(pair.certificate_pem)
    context = client_context(path)
    address = tls_server(pair)
    ask(address, context, NAME)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        ask(address, context, "other.example.com")


def test_a_client_refuses_another_name_another_root_and_another_time(tls_server, authority, root_file, tmp_path):
    address = tls_server(authority.leaf(NAME, time.time()))
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        ask(address, client_context(root_file), "db-124.example.com")
    other = tmp_path / "other.pem"
    other.write_bytes(Authority(time.time()).root.certificate_pem)
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer|signature failure"):
        ask(address, client_context(other), NAME)
    late = Authority(time.time() - 30 * DAY)
    other.write_bytes(late.root.certificate_pem)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        ask(tls_server(late.leaf(NAME, time.time() - 8 * DAY)), client_context(other), NAME)


@pytest.mark.parametrize("name", [NAME, long_name(253), "xn--bcher-kva.example"], ids=lambda name: name[:12])
def test_openssl_s_client_verifies_the_name(openssl, tls_server, authority, root_file, name):
    host, port = tls_server(authority.leaf(name, time.time()))
    said = openssl("s_client", "-connect", f"{host}:{port}", "-servername", name, "-verify_hostname", name,
                   "-verify_return_error", "-CAfile", root_file, said=b"GET / HTTP/1.1\r\n\r\n")
    assert "Verification: OK\n" in said and f"Verified peername: {name}\n" in said
    ended = execute("openssl", "s_client", "-connect", f"{host}:{port}", "-verify_hostname", "other.example.com",
                    "-verify_return_error", "-CAfile", str(root_file))
    assert ended.returncode == 1 and b"hostname mismatch" in (ended.stdout + ended.stderr).lower()


@pytest.mark.parametrize("name", [NAME, "localhost", long_name(240), ipaddress.ip_address(HOST)],
                         ids=lambda name: str(name)[:12])
def test_curl_verifies_the_name(tls_server, authority, root_file, name):
    if shutil.which("curl") is None:
        pytest.skip("curl is not here (Debian package curl)")
    host, port = tls_server(authority.leaf(name, time.time()))
    common = "curl", "--silent", "--show-error", "--noproxy", "*", "--connect-to", f"::{host}:{port}"
    ended = execute(*common, "--cacert", str(root_file), f"https://{name}/")
    assert (ended.returncode, ended.stdout) == (0, b"hello"), ended.stderr
    assert execute(*common, f"https://{name}/").returncode == 60  # its own trust store
    assert execute(*common, "--cacert", str(root_file), "https://other.example.com/").returncode == 60


# -- the cache ---------------------------------------------------------------------------------


class Clocks:
    """A Leafs, with the clocks that it looks at; `clock.jump` moves one alone."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.wall = FakeClock(NOW)
        self.leafs = Leafs(self.clock, self.wall)

    def get(self, name: str) -> Pair:
        """A leaf, at a time when the limit allows it."""
        self.clock.jump(1.0)
        pair = self.leafs.get(name)
        assert pair is not None
        return pair


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def test_a_leaf_is_made_once(clocks):
    first = clocks.get(NAME)
    assert all(clocks.get(name) is first for name in (NAME, NAME.upper(), f"{NAME}."))
    assert clocks.get("other.example.com").key != first.key
    assert first.name == NAME and clocks.leafs.authority.root.name


def test_an_address_and_its_other_spellings_are_one(clocks):
    one = clocks.get(ipaddress.ip_address("192.0.2.1"))
    assert clocks.get(ipaddress.ip_address("::ffff:192.0.2.1")) is one
    assert clocks.get(ipaddress.ip_address("fe80::1%eth0")) is clocks.get(ipaddress.ip_address("fe80::1"))


def test_the_leaf_that_was_used_longest_ago_makes_room(clocks, monkeypatch):
    monkeypatch.setattr(sniroute_certificate, "LEAFS_MAX", 3)
    first, second, third = map(clocks.get, "abc")
    assert clocks.get("a") is first
    clocks.get("d")
    assert list(clocks.leafs.cache) == ["c", "a", "d"]
    assert clocks.get("a") is first and clocks.get("c") is third and clocks.get("b") is not second


def test_the_cache_has_a_thousand_leafs_and_no_more(clocks):
    leafs = [clocks.get(f"{number}.example.com") for number in range(LEAFS_MAX + 1)]
    assert LEAFS_MAX == 1000 == len(clocks.leafs.cache)
    assert "0.example.com" not in clocks.leafs.cache and clocks.get("1.example.com") is leafs[1]


def test_at_most_five_leafs_are_made_in_any_second(clocks):
    made = []
    for step in range(400):  # six and a quarter seconds; the seventh has begun
        if clocks.leafs.get(f"{step}.example.com") is not None:
            made.append(clocks.clock.now)
        clocks.clock.jump(1 / 64)
    assert SIGNATURES == 5 and len(made) == 7 * SIGNATURES
    assert all(late - early >= 1.0 for early, late in zip(made, made[SIGNATURES:]))


def test_names_in_the_cache_are_served_where_no_new_one_is(clocks):
    first = clocks.get(NAME)
    clocks.clock.jump(10.0)
    assert all(clocks.leafs.get(f"{number}.example.com") for number in range(SIGNATURES))
    for _ in range(100):
        assert clocks.leafs.get("late.example.com") is None and clocks.leafs.get(NAME) is first
    clocks.clock.jump(0.999)
    assert clocks.leafs.get("late.example.com") is None, "a refusal is not counted, and moves nothing"
    clocks.clock.jump(0.001)
    assert all(clocks.leafs.get(f"late-{number}.example.com") for number in range(SIGNATURES))
    assert clocks.leafs.get("late.example.com") is None


def test_a_leaf_is_replaced_a_day_before_it_ends(clocks):
    first = clocks.get(NAME)
    clocks.wall.jump(LEAF_LIFE - LEAF_SPARE - 1)
    assert clocks.get(NAME) is first
    clocks.wall.jump(1)
    second = clocks.get(NAME)
    assert second is not first and second.not_after == clocks.wall.now + LEAF_LIFE
    assert clocks.get(NAME) is second and len(clocks.leafs.cache) == 1


@pytest.mark.parametrize("seconds, kept", [
    (-50 * 365 * DAY, False), (-DAY, False), (-EARLIER, True), (-1, True), (1, True), (20 * 365 * DAY, False)])
def test_a_host_whose_clock_is_put_right_makes_a_new_root(clocks, seconds, kept):
    first, authority = clocks.get(NAME), clocks.leafs.authority
    clocks.wall.jump(seconds)
    second = clocks.get(NAME)
    assert (second is first, clocks.leafs.authority is authority) == (kept, kept)
    assert second.not_before <= clocks.wall.now < second.not_after
    assert clocks.leafs.authority.root.not_before <= second.not_before < second.not_after <= (
        clocks.leafs.authority.root.not_after)


def test_a_leaf_of_the_future_is_replaced_also_under_a_root_that_stays(clocks):
    clocks.get("first.example.com")
    clocks.wall.jump(5 * DAY)
    first, authority = clocks.get(NAME), clocks.leafs.authority
    clocks.wall.jump(-3 * DAY)
    second = clocks.get(NAME)
    assert second is not first and second.not_after == clocks.wall.now + LEAF_LIFE
    assert clocks.leafs.authority is authority


def test_leafs_of_an_old_root_do_not_come_back(clocks):
    first = clocks.get(NAME)
    clocks.wall.jump(-40 * 365 * DAY)
    clocks.get("other.example.com")
    clocks.wall.jump(40 * 365 * DAY)
    assert clocks.get(NAME) is not first and list(clocks.leafs.cache) == [NAME]


def test_twenty_who_ask_for_one_name_at_once_get_one_leaf():
    sniroute_certificate._multiples.cache_clear()  # as in a new process
    leafs = Leafs()
    pairs = at_once(20, lambda number: leafs.get(NAME))
    assert all(pair is pairs[0] for pair in pairs) and len(leafs.made) == 1


def test_twenty_who_ask_for_different_names_at_once_get_five_leafs(root_file, tmp_path, openssl):
    leafs = Leafs(clock=FakeClock())
    pairs = [pair for pair in at_once(20, lambda number: leafs.get(f"{number}.example.com")) if pair]
    assert len(pairs) == SIGNATURES and len({pair.name for pair in pairs}) == SIGNATURES
    root_file.write_bytes(leafs.authority.root.certificate_pem)
    for pair in pairs:
        path = tmp_path / pair.name
        path.write_bytes(pair.certificate_pem)
        assert openssl("verify", "-verify_hostname", pair.name, "-CAfile", root_file, path) == f"{path}: OK\n"


def test_many_threads_make_and_load_certificates_at_once(authority):
    sniroute_certificate._multiples.cache_clear()

    def make(number: int) -> list[Key]:
        pairs = [self_signed(f"{number}.example.com", NOW), authority.leaf(f"{number}.example.org", time.time())]
        for pair in pairs:
            load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), pair)  # it compares the key with the certificate
        return [pair.key for pair in pairs]

    keys = sum(at_once(16, make), [])
    assert len(set(keys)) == 32 and all(is_on_the_curve(key.point) for key in keys)
    assert multiply(N - 1) == (G[0], P - G[1])


# -- for OpenSSL -------------------------------------------------------------------------------


class Watcher:
    """A context that notes the file it is given; `fails` raises in place of reading it."""

    def __init__(self, fails: bool = False, see: Callable[[str], object] = lambda path: None):
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.fails = fails
        self.see = see
        self.paths: list[str] = []
        self.modes: list[int] = []

    def load_cert_chain(self, path: str) -> None:
        self.paths.append(path)
        self.modes.append(os.stat(path).st_mode & 0o7777)
        self.see(path)
        if self.fails:
            raise ssl.SSLError("no such luck")
        self.context.load_cert_chain(path)


@pytest.fixture
def open_umask() -> Iterator[None]:
    """The umask that takes no right away."""
    before = os.umask(0)
    yield
    os.umask(before)


def no_memory_file(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what a file without a name needs."""
    if kind == "an interpreter without it":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif kind == "a kernel that refuses it":
        def refuse(name: str) -> int:
            raise PermissionError(13, "Permission denied")
        monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    else:
        exists = os.path.exists
        monkeypatch.setattr(os.path, "exists", lambda path: not str(path).startswith("/proc/") and exists(path))


@linux
@pytest.mark.parametrize("fails", [False, True], ids=["loads", "fails"])
def test_the_key_is_on_no_disk(fails, tmp_path, monkeypatch, open_umask):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    watcher = Watcher(fails)
    with pytest.raises(ssl.SSLError, match="luck") if fails else contextlib.nullcontext():
        load(watcher, self_signed(NAME, NOW))
    assert watcher.paths[0].startswith("/proc/self/fd/") and watcher.modes == [0o600]


@pytest.mark.parametrize("fails", [False, True], ids=["loads", "fails"])
@pytest.mark.parametrize("kind", ["an interpreter without it", "a kernel that refuses it", "no /proc"])
def test_where_there_must_be_a_file_it_is_private_and_removed_at_once(kind, fails, tmp_path, monkeypatch, open_umask):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    no_memory_file(kind, monkeypatch)
    watcher = Watcher(fails)
    with pytest.raises(ssl.SSLError, match="luck") if fails else contextlib.nullcontext():
        load(watcher, self_signed(NAME, NOW))
    assert watcher.paths[0].startswith(f"{tmp_path}/sniroute-") and watcher.modes == [0o600]
    assert not list(tmp_path.iterdir())


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("kind", ["", "an interpreter without it"], ids=["memory", "a file"])
def test_another_user_cannot_read_the_key(kind, monkeypatch, open_umask):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # others may look into this one
        os.chmod(folder, 0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        if kind:
            no_memory_file(kind, monkeypatch)
        said = []

        def look(path: str) -> None:
            path = path.replace("/self/", f"/{os.getpid()}/")
            said.extend(subprocess.run(["cat", path], capture_output=True, timeout=60, **user)
                        for user in ({}, {"user": 65534, "group": 65534, "extra_groups": []}))

        load(Watcher(see=look), self_signed(NAME, NOW))
    ours, theirs = said
    assert b"PRIVATE KEY" in ours.stdout
    assert theirs.returncode == 1 and theirs.stdout == b"" and b"Permission denied" in theirs.stderr


def test_a_folder_that_cannot_be_written_to_is_an_oserror(tmp_path, monkeypatch):
    no_memory_file("an interpreter without it", monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self_signed(NAME, NOW))
