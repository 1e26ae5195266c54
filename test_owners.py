"""Tests of sniroute_owners: who may claim names, which ones, where they may lead; what a body says."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from typing import Any

import pytest

import sniroute_owners
from sniroute_claims import Claim
from sniroute_names import embedded, parse_ip, parse_network
from sniroute_options import HTTP_MODES
from sniroute_owners import (ALLOW_MAX, CHANGES, FAULTS_MAX, FIELDS, KINDS, META_MAX, OWNERS, RENEWAL,
                             RESERVED, RULES, TARGET_MAX, TOKENS_MAX, Fault, Own, Owner, Rules, Unfit, Wish,
                             address_fault, check_target, claim_name, fits, narrowed, new_token, parse_change,
                             parse_wish, punycode_fault, random_space, read_registry, read_rules, standing, who)
from sniroute_refusals import SettingsError

DOMAIN = "tun.example.com"
HASH = "sha256:" + "0a" * 32
NETS = tuple(map(parse_network, ("192.0.2.0/24", "2001:db8::/32")))
RULES_HERE = Rules((DOMAIN,), targets=("tcp", "carrier", "cloudflared", "nodepass"), networks=NETS,
                   ports=(49000, 49100))
ALICE = Owner("alice", (b"a" * 32,))
LIMITED = ALICE._replace(names=(f"*.alice.{DOMAIN}", f"shop.{DOMAIN}", f"team-*.{DOMAIN}", f"**.deep.{DOMAIN}"))


def kept(key: str, target: str = "tcp:192.0.2.10:8080") -> Claim:
    """A claim of alice as a store has it."""
    return Claim(key, "1", "alice", target, "2", 1, 60.0, 600.0, 0.0)


def fault(call: Any, *words: Any) -> Fault:
    """The one fault that a call finds."""
    with pytest.raises(Unfit) as raised:
        call(*words)
    (found,) = raised.value.faults
    assert found.sentence.isprintable() and "\n" not in found.sentence and str(found) in str(raised.value)
    assert raised.value.kind == found.kind
    return found


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


# -- who it is ---------------------------------------------------------------------------------


def test_a_token_is_known_by_its_hash_alone():
    token, text = new_token()
    other, _ = new_token()
    assert re.fullmatch(r"sniroute_[A-Za-z0-9_-]{43}", token) and token != other
    _, owners = read_registry({"domains": [DOMAIN], "owners": {"alice": {"token": text}, "bob": {"token": HASH}}})
    assert text == f"sha256:{hashlib.sha256(token.encode()).hexdigest()}" and token not in repr(owners)
    assert who(token, owners.values()) == owners["alice"]
    for wrong in (other, "", token[:-1], token + " ", token.upper(), text, "\udcff", "\u0430" * 10000):
        assert who(wrong, owners.values()) is None
    assert who(token, ()) is None


def test_a_token_and_the_next_one_are_both_right_while_it_is_rotated():
    (old, old_hash), (new, new_hash) = new_token(), new_token()
    _, owners = read_registry({"domains": [DOMAIN], "owners": {"alice": {"token": [old_hash, new_hash]}}})
    assert who(old, owners.values()) == who(new, owners.values()) == owners["alice"]


@pytest.mark.parametrize("which", [0, 1, 2, None])
def test_every_token_is_compared_whichever_is_right(monkeypatch, which):
    """How long it takes tells nobody which one was nearly right."""
    tokens = [new_token()[0] for _ in range(3)]
    owners = [Owner(str(number), (sniroute_owners.digest_of(token), b"x" * 32)) for number, token in enumerate(tokens)]
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    assert who("wrong" if which is None else tokens[which], owners) == (None if which is None else owners[which])
    assert len(compared) == 6 and all(len(one) == len(other) == 32 for one, other in compared)


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, name", [
    ("a", "a"), ("A", "a"), ("a.", "a"), ("a_b", "a_b"), ("12", "12"), ("0x1", "0x1"), ("a" * 63, "a" * 63),
    (f"Foo.Tun.Example.COM", "foo"), (f"foo.{DOMAIN}.", "foo"), ("xn--bcher-kva", "xn--bcher-kva"),
    ("xn--strae-oqa", "xn--strae-oqa"), ("xn--e1afmkfd", "xn--e1afmkfd"), ("XN--BCHER-KVA", "xn--bcher-kva"),
    ("xn--fiqs8s", "xn--fiqs8s"), ("xn--wgv71a119e", "xn--wgv71a119e"), ("r3---sn", "r3---sn"),
])
def test_a_name_is_one_label_below_the_domain_and_has_one_form(text, name):
    assert claim_name(text, RULES_HERE, ALICE) == f"{name}.{DOMAIN}"


@pytest.mark.parametrize("text, kind, said", [
    ("a" * 64, "fault", "is not a name"), ("-a", "fault", "is not a name"), ("a-", "fault", "is not a name"),
    ("a b", "fault", "is not a name"), ("a/b", "fault", "is not a name"), ("a..b", "fault", "is not a name"),
    (".", "fault", "is not a name"), ("..", "fault", "is not a name"), ("a\n", "fault", "is not a name"),
    ("a\0", "fault", "is not a name"), ("a" * 10000, "fault", "is not a name"), ("a@b", "fault", "is not a name"),
    (f"a:443", "fault", "is not a name"), ("%61", "fault", "is not a name"), ("{name}", "fault", "is not a name"),
    ("", "fault", "null for a random name"), (12, "fault", "has to be a text"), (True, "fault", "has to be a text"),
    (["a"], "fault", "has to be a text"), ({}, "fault", "has to be a text"), (None, "fault", "has to be a text"),
    ("*", "fault", "is not one name"), (f"*.{DOMAIN}", "fault", "is not one name"), ("a*", "fault", "is not one name"),
    ("192.0.2.1", "fault", "an address"), ("::1", "fault", "an address"), ("[::1]", "fault", "an address"),
    ("::ffff:192.0.2.1", "fault", "an address"), ("1.2.3", "fault", "is not a name"),
    (DOMAIN, "reserved", "the domain itself"), (f"{DOMAIN}.".upper(), "reserved", "the domain itself"),
    ("foo.example.com", "fault", f"not below {DOMAIN}"), ("xtun.example.com", "fault", "not below"),
    (f"foo{DOMAIN}", "fault", "not below"), (f"{DOMAIN}.evil.example.net", "fault", "not below"),
    (f"a.b.{DOMAIN}", "forbidden", "2 labels"), (f"www.a.{DOMAIN}", "forbidden", "2 labels"),
    ("www", "reserved", f"www.{DOMAIN} is reserved"), ("WWW.", "reserved", "is reserved"),
    (f"admin.{DOMAIN}", "reserved", "is reserved"), ("_dmarc", "reserved", "is reserved"),
    ("_acme-challenge", "reserved", "is reserved"),
    (f"a.{DOMAIN}..", "fault", "is not a name"), ("a..", "fault", "not a name"), (f"a..{DOMAIN}", "fault", "is not a name"),
    ("\u0430pi", "fault", "other letters than a-z; write xn--pi-6kc"), ("\u00e4", "fault", "write xn--4ca"),
    ("\u3002", "fault", "other letters"), ("a\u200db", "fault", "other letters"), ("\ud800", "fault", "other letters"),
    ("xn--a", "fault", "neither letters nor digits"), ("xn--0", "fault", "does not decode"),
    ("xn--zzzzzzzzz99999999", "fault", "does not decode"), ("xn--ab-c-", "fault", "is not a name"),
    ("xn--pi-6kc", "fault", "looks like api"),
    ("xn--80ak6aa92e", "fault", "looks like apple"), ("xn--pple-43d", "fault", "looks like apple"),
])
def test_a_name_that_is_none_is_refused_in_words(text, kind, said):
    found = fault(claim_name, text, RULES_HERE, ALICE)
    assert (found.field, found.kind) == ("name", kind) and said in found.sentence
    assert len(found.sentence) < 300


@pytest.mark.parametrize("text, said", [
    ("\u0455\u0441\u043e\u0440\u0435", "looks like scope"), ("\u03bfk", "looks like ok"),
    ("b\u0131g", "looks like big"),
    ("\u0430\u0431c", "mixes alphabets"), ("sh\u03c9p", "mixes alphabets"),
    ("e\u0301", "another spelling"), ("\u00c4b", "another spelling"), ("\ufb01n", "another spelling"),
    ("a\u3000b", "neither letters"), ("a\u2044b", "neither letters"), ("\u202ea", "neither letters"),
    ("\u0431\u044e\u0440\u043e", ""), ("caf\u00e9", ""), ("\u65e5\u672cweb", ""), ("\u05e9\u05dc\u05d5\u05dd", ""),
])
def test_a_name_in_other_letters_may_not_be_taken_for_another_one(text, said):
    found = punycode_fault("xn--" + text.encode("punycode").decode())
    assert said in found and bool(said) == bool(found)
    assert "does not decode" in punycode_fault("xn--abc-") and "does not decode" in punycode_fault("xn--")
    assert punycode_fault("abc") == ""


def test_a_fault_in_a_whole_name_is_found_in_each_label():
    owner = ALICE._replace(names=(f"**.{DOMAIN}",))
    assert claim_name(f"a.b.{DOMAIN}", RULES_HERE, owner) == f"a.b.{DOMAIN}"
    assert "looks like api" in fault(claim_name, f"a.xn--pi-6kc.{DOMAIN}", RULES_HERE, owner).sentence
    long = ".".join(["a" * 60] * 4)
    assert "253 with the domain" in fault(claim_name, f"{long}.{DOMAIN}", RULES_HERE, owner).sentence


@pytest.mark.parametrize("name, allowed", [
    ("shop", True), (f"x.alice.{DOMAIN}", True), ("team-", None), ("team-a", True), (f"a.b.deep.{DOMAIN}", True),
    (f"a.deep.{DOMAIN}", True), (f"deep.{DOMAIN}", False), (f"x.y.alice.{DOMAIN}", False), (f"alice.{DOMAIN}", False),
    ("shops", False), ("tea", False), (f"x.team-a.{DOMAIN}", False), (f"x.alicia.{DOMAIN}", False),
    (f"xalice.{DOMAIN}", False), (f"www.alice.{DOMAIN}", True),
])
def test_an_owner_claims_in_its_own_name_space(name, allowed):
    if allowed is None:
        assert "neither begin nor end with -" in fault(claim_name, name, RULES_HERE, LIMITED).sentence
    elif allowed:
        assert claim_name(name, RULES_HERE, LIMITED).startswith(name)
    else:
        found = fault(claim_name, name, RULES_HERE, LIMITED)
        assert found.kind == "forbidden" and f"*.alice.{DOMAIN}, shop.{DOMAIN}" in found.sentence


@pytest.mark.parametrize("glob, fitting, others", [
    ("*.example.com", ["a.example.com"], ["example.com", "a.b.example.com", "a.example.com.net", ".example.com.x"]),
    ("**.example.com", ["a.example.com", "a.b.example.com"], ["example.com", "xexample.com"]),
    ("a*b.example.com", ["ab.example.com", "axb.example.com"], ["a.example.com", "b.example.com", "ab.c.example.com"]),
    ("aba*aba.example.com", ["abaaba.example.com"], ["aba.example.com", "ababa.example.com"]),
    ("x.*.example.com", ["x.y.example.com"], ["x.example.com", "y.x.example.com"]),
    ("**.*.example.com", [], []),
])
def test_globs_of_name_spaces(glob, fitting, others):
    assert all(fits(name, glob) for name in fitting) and not any(fits(name, glob) for name in others)


def test_a_hostile_name_costs_no_time():
    assert not fits("a" * 63 + "." + DOMAIN, "a*b." + DOMAIN)


def test_a_reserved_word_may_be_given_to_an_owner_by_name():
    owner = ALICE._replace(names=(f"www.{DOMAIN}", f"*.{DOMAIN}"))
    assert claim_name("www", RULES_HERE, owner) == f"www.{DOMAIN}"
    assert fault(claim_name, "api", RULES_HERE, owner).kind == "reserved"
    rules = RULES_HERE._replace(reserved=("shop",))
    assert claim_name("www", rules, ALICE) and fault(claim_name, "shop", rules, ALICE).kind == "reserved"


def test_a_name_that_the_settings_give_to_an_owner_is_kept_for_it():
    rules, owners = read_registry({"domains": [DOMAIN], "owners": {
        "alice": {"token": HASH, "names": [f"shop.{DOMAIN}", f"a-*.{DOMAIN}"]},
        "bob": {"token": "sha256:" + "0b" * 32}}})
    assert claim_name("shop", rules, owners["alice"]) == f"shop.{DOMAIN}"
    assert fault(claim_name, "shop", rules, owners["bob"]).kind == "reserved"
    assert claim_name("a-1", rules, owners["bob"])  # a glob keeps nothing: who wants that gives `names` to all


def test_with_several_domains_a_label_is_meant_where_its_owner_may_have_it():
    rules = RULES_HERE._replace(domains=(DOMAIN, "dev.example.net", "in.tun.example.com"))
    assert claim_name("a", rules, ALICE) == f"a.{DOMAIN}"
    assert claim_name("a", rules, ALICE._replace(names=("*.dev.example.net",))) == "a.dev.example.net"
    assert claim_name("a.in.tun.example.com", rules, ALICE) == "a.in.tun.example.com"
    assert fault(claim_name, "in", rules, ALICE).kind == "reserved"  # a domain itself
    assert fault(claim_name, "www.in.tun.example.com", rules, ALICE).kind == "reserved"


def test_a_random_name_goes_where_its_owner_may_have_any():
    assert random_space(RULES_HERE, ALICE) == DOMAIN
    assert random_space(RULES_HERE, LIMITED) == f"alice.{DOMAIN}"
    assert random_space(RULES_HERE, ALICE._replace(names=(f"a.{DOMAIN}", f"**.b.{DOMAIN}"))) == f"b.{DOMAIN}"
    found = fault(random_space, RULES_HERE, ALICE._replace(names=(f"a.{DOMAIN}", f"team-*.{DOMAIN}")))
    assert found.kind == "forbidden" and "say which" in found.sentence
    assert fault(random_space, RULES_HERE, ALICE._replace(names=(f"*.x-*.{DOMAIN}",))).kind == "forbidden"


# -- targets -----------------------------------------------------------------------------------

OWN = Own((("192.0.2.7", 19000), ("::", 19001), ("2001:db8::7", 19002)), range(20000, 20100))


@pytest.mark.parametrize("text", [
    "tcp:192.0.2.10:8080", "tcp:192.0.2.7:19003", "tcp:[2001:db8::1]:8080", "tcp:db.example.com:5432",
    "tcp:192.0.2.10:1024", "tcp:192.0.2.10:65535", "tcp:[::ffff:192.0.2.10]:8080", "tcp:[64:ff9b::192.0.2.10]:8080",
    "tcp:[2002:c000:20a::1]:8080", "tcp:localhost:8080", "tcp:192.0.2.7:20000",
])
def test_a_target_in_a_network_that_is_allowed(text):
    assert check_target(text, RULES_HERE, ALICE, OWN) == text


@pytest.mark.parametrize("text, kind, said", [
    ("tcp:198.51.100.1:8080", "forbidden", "in none of the networks"), ("tcp:[2001:db9::1]:80", "forbidden", "port 80"),
    ("tcp:127.0.0.1:8080", "forbidden", "this host's own"), ("tcp:[::1]:8080", "forbidden", "this host's own"),
    ("tcp:[::ffff:127.0.0.1]:8080", "forbidden", "127.0.0.1 is this host's own"),
    ("tcp:[::ffff:a9fe:a9fe]:8080", "forbidden", "metadata"), ("tcp:169.254.169.254:8080", "forbidden", "metadata"),
    ("tcp:[64:ff9b::127.0.0.1]:8080", "forbidden", "this host's own"),
    ("tcp:[2002:7f00:1::]:8080", "forbidden", "this host's own"), ("tcp:[::127.0.0.1]:8080", "forbidden", "own"),
    ("tcp:[64:ff9b::198.51.100.1]:8080", "forbidden", "in none of the networks"),
    ("tcp:0.0.0.0:8080", "forbidden", "no address of a host"), ("tcp:[::]:8080", "forbidden", "no address of a host"),
    ("tcp:224.0.0.1:8080", "forbidden", "no address"), ("tcp:255.255.255.255:8080", "forbidden", "no address"),
    ("tcp:[ff02::1]:8080", "forbidden", "no address"), ("tcp:[fe80::1]:8080", "forbidden", "link-local"),
    ("tcp:192.0.2.10:1023", "forbidden", "not between 1024 and 65535"),
    ("tcp:db.example.com:22", "forbidden", "port 22"),
    ("tcp:192.0.2.7:19000", "forbidden", "the router's own"), ("tcp:[2001:db8::7]:19002", "forbidden", "router's own"),
    ("tcp:[::ffff:192.0.2.7]:19000", "forbidden", "the router's own"),
    ("tcp:192.0.2.10:0", "fault", "HOST:PORT"), ("tcp:192.0.2.10:65536", "fault", "HOST:PORT"),
    ("tcp:192.0.2.10", "fault", "HOST:PORT"), ("tcp:2001:db8::1:8080", "fault", "brackets"),
    ("tcp:127.1:8080", "fault", "HOST:PORT"), ("tcp:0x7f000001:8080", "fault", "HOST:PORT"),
    ("tcp:2130706433:8080", "fault", "HOST:PORT"), ("tcp:0177.0.0.1:8080", "fault", "HOST:PORT"),
    ("tcp:192.0.2.1:8080,192.0.2.2:8080", "fault", "leads to one target"),
    ("tcp:[fe80::1%eth0]:8080", "fault", "HOST:PORT"),
    ("tcp:a@192.0.2.10:8080", "fault", "HOST:PORT"), ("tcp:192.0.2.10:+80", "fault", "HOST:PORT"),
    ("tcp:{name}:8080", "fault", "nothing is filled in"), ("nodepass:$SECRET@192.0.2.1:1", "fault", "filled in"),
    ("carrier:$HOME.example.com", "fault", "filled in"),
    ("exec:/bin/sh", "forbidden", "no kind of target that you may name"),
    ("unix:/run/docker.sock", "forbidden", "kind"),
    ("command:ssh a", "fault", "SCHEME:REST"), ("kubernetes:a/svc/b:80", "forbidden", "kind"),
    ("TCP:192.0.2.10:8080", "forbidden", "kind"), ("http://192.0.2.10:8080", "forbidden", "kind"),
    ("192.0.2.10:8080", "forbidden", "kind"), ("192.0.2.10", "fault", "SCHEME:REST"), ("", "fault", "SCHEME:REST"),
    ("tcp:192.0.2.10:8080\n", "fault", "SCHEME:REST"), ("tcp:\u0430:8080", "fault", "SCHEME:REST"),
    ("tcp:" + "a" * TARGET_MAX, "fault", "512 characters"), (None, "fault", "has to be a text"),
    (8080, "fault", "has to be a text"), (["tcp:192.0.2.10:8080"], "fault", "has to be a text"),
])
def test_a_target_that_an_owner_may_not_have(text, kind, said):
    found = fault(check_target, text, RULES_HERE, ALICE, OWN)
    assert (found.field, found.kind) == ("target", kind) and said in found.sentence


def test_nobody_names_the_hosts_of_tunnels_but_who_may():
    """They get the router's own Access token."""
    owner = ALICE._replace(hosts=("*.alice.example.org", "db.example.org"))
    for scheme in ("carrier", "cloudflared"):
        assert check_target(f"{scheme}:A.alice.example.org.", RULES_HERE, owner) == f"{scheme}:a.alice.example.org"
        assert check_target(f"{scheme}:db.example.org", RULES_HERE, owner) == f"{scheme}:db.example.org"
        for host in ("alice.example.org", "a.b.alice.example.org", "db.example.org.example.net", "example.org"):
            assert fault(check_target, f"{scheme}:{host}", RULES_HERE, owner).kind == "forbidden"
        assert "of which you have none" in fault(check_target, f"{scheme}:db.example.org", RULES_HERE, ALICE).sentence


def test_the_ports_that_a_target_may_have():
    rules = RULES_HERE._replace(target_ports=(2000, 3000))
    allowed = [port for port in (1999, 2000, 3000, 3001)
               if standing(kept(f"a.{DOMAIN}", f"tcp:192.0.2.10:{port}"), rules, ALICE) == ""]
    assert allowed == [2000, 3000]


def test_by_default_owners_name_no_address():
    rules = Rules((DOMAIN,))
    assert fault(check_target, "tcp:192.0.2.10:8080", rules, ALICE).sentence.endswith("there is nodepass")


@pytest.mark.parametrize("address, networks, allowed", [
    ("127.0.0.1", ["0.0.0.0/0"], False), ("127.0.0.1", ["127.0.0.0/8"], True), ("127.0.0.2", ["127.0.0.1/32"], False),
    ("::ffff:127.0.0.1", ["127.0.0.0/8"], True), ("::ffff:127.0.0.1", ["::/0"], False), ("::1", ["::/0"], False),
    ("::1", ["::1/128"], True), ("::1", ["127.0.0.0/8"], False), ("192.0.2.1", ["0.0.0.0/0"], True),
    ("169.254.169.254", ["0.0.0.0/0"], False), ("169.254.169.254", ["169.254.0.0/16"], False),
    ("169.254.169.254", ["169.254.169.254/32"], True), ("169.254.169.254", ["169.254.0.0/16", "169.254.0.0/24"], False),
    ("169.254.1.1", ["169.254.0.0/16"], True), ("169.254.1.1", ["169.254.1.0/24"], True),
    ("169.254.1.1", ["128.0.0.0/1"], False), ("fe80::1", ["fe80::/10"], True), ("fe80::1%eth0", ["::/0"], False),
    ("100.100.100.200", ["100.64.0.0/10"], False), ("168.63.129.16", ["0.0.0.0/0"], False),
    ("fd00:ec2::254", ["fd00::/8"], False), ("fd00:ec2::1", ["fd00::/8"], True), ("10.1.2.3", ["10.0.0.0/8"], True),
    ("10.1.2.3", ["192.0.2.0/24"], False), ("10.1.2.3", [], False), ("0.0.0.0", ["0.0.0.0/8"], False),
    ("64:ff9b::10.1.2.3", ["10.0.0.0/8"], True), ("64:ff9b::10.1.2.3", ["64:ff9b::/96"], True),
    ("64:ff9b::169.254.169.254", ["::/0"], False), ("64:ff9b::7f00:1", ["64:ff9b::/96"], False),
    ("::ffff:0:7f00:1", ["::/0"], False), ("::ffff:0:7f00:1", ["::ffff:0:0:0/96"], True),
    ("64:ff9b:1::7f00:1", ["::/0"], False), ("64:ff9b:1::7f00:1", ["64:ff9b:1::/48"], True),
    ("2002:a01:203::1", ["10.0.0.0/8"], True), ("2002:a9fe:a9fe::1", ["2002::/16"], False),
    ("2001:0:a01:203::f5fe:fdfc", ["10.0.0.0/8"], True),
    ("2001:0:a01:203::80ff:fffe", ["2001::/32", "10.0.0.0/8"], False),
    ("2001:0:a01:203::39cc:9bfe", ["10.0.0.0/8"], False),
    ("::a01:203", ["10.0.0.0/8"], True), ("::7f00:1", ["::/0"], False), ("2001:db8::1", ["0.0.0.0/0"], False),
])
def test_an_address_is_judged_as_what_it_leads_to(address, networks, allowed):
    """At each dial: what a name means may change after its claim."""
    rules = RULES_HERE._replace(networks=tuple(map(parse_network, networks)))
    found = address_fault((address, 8080), rules)
    assert (found == "") == allowed
    assert address_fault((address, 8080, 0, 0), rules) == found  # as IPv6 has it


def test_the_routers_own_ports_are_refused_however_they_are_written():
    rules = RULES_HERE._replace(networks=tuple(map(parse_network, ("127.0.0.0/8", "::1/128"))))
    own = Own((("127.0.0.1", 19000), ("0.0.0.0", 19001)), range(20000, 20100))
    for host in ("127.0.0.1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1"):
        assert "the router's own" in address_fault((host, 19000), rules, own)
    assert address_fault(("127.0.0.1", 19003), rules, own) == ""
    assert "the router's own" in address_fault(("127.0.0.2", 19001), rules, own)  # each address of this host
    assert address_fault(("127.0.0.2", 19000), rules, own) == ""
    assert "tunnels" in address_fault(("127.0.0.5", 20099), rules, own)
    assert address_fault(("127.0.0.5", 20100), rules, own) == ""
    assert "the router's own" in address_fault(("::1", 19001), rules, Own((("::", 19001),)))


def test_ipv4_inside_ipv6_is_found():
    def inside(text: str) -> list[str]:
        return list(map(str, embedded(parse_ip(text))))

    assert inside("64:ff9b::192.0.2.1") == inside("::192.0.2.1") == inside("2002:c000:201::") == ["192.0.2.1"]
    assert inside("2001:0:c000:201::3fff:fdfd") == ["192.0.2.1", "192.0.2.2"]  # Teredo: its server, and the host
    assert inside("192.0.2.1") == inside("::ffff:192.0.2.1") == inside("::1") == inside("::") == []
    assert inside("2001:db8::192.0.2.1") == []


def test_the_kinds_that_owners_may_name_run_no_program_of_the_operator():
    assert "exec" not in KINDS and "command" not in KINDS and "unix" not in KINDS and "kubernetes" not in KINDS


# -- what a body says --------------------------------------------------------------------------

TARGET = "tcp:192.0.2.10:8080"


def wish(**fields: Any) -> Wish:
    return parse_wish(body(**{"name": "shop", "target": TARGET, **fields}), RULES_HERE, ALICE, OWN)


def test_the_least_that_a_claim_has_to_say():
    assert wish() == Wish(f"shop.{DOMAIN}", False, "", TARGET, 60.0)
    assert wish(name=None) == Wish(None, False, DOMAIN, TARGET, 60.0)
    assert parse_wish(body(port=49000, target=TARGET), RULES_HERE, ALICE) == Wish("tcp:49000", True, "", TARGET, 60.0)
    assert parse_wish(body(port=None, target=TARGET), RULES_HERE, ALICE) == Wish(None, True, "", TARGET, 60.0)


def test_all_that_a_claim_may_say():
    asked = wish(ttl=300, allow=["192.0.2.0/24", "::ffff:198.51.100.1"], http="forward", meta={"a": [1, None, 1.5]},
                 while_connected=True, takeover=False)
    assert asked == Wish(f"shop.{DOMAIN}", False, "", TARGET, 300.0, ("192.0.2.0/24", "198.51.100.1/32"), "forward",
                         {"a": [1, None, 1.5]}, True, False)
    assert wish(allow=None, http=None) == wish()


def test_a_claim_holds_what_a_wish_has():
    assert set(Wish._fields) - {"is_port", "space", "takeover"} <= set(Claim._fields)
    assert {*FIELDS} - {"name", "port"} <= set(Wish._fields) and {*CHANGES, *RENEWAL} <= set(Claim._fields)
    assert Wish._field_defaults == {**Wish._field_defaults, **{
        field: default for field, default in Claim._field_defaults.items() if field in Wish._fields}}


@pytest.mark.parametrize("field, values", {
    "ttl": [0, -1, 1e9, 10 ** 9, 86401, 4, "60", 60.5, 60.0, True, None, [], {}, 10 ** 400],
    "port": [0, -1, 48999, 49101, 49000.0, "49000", True, [], {}],
    "allow": ["", [], "none", ["none"], ["192.0.2.1/24"], ["a"], [1], [None], {}, 1, True,
              ["192.0.2.0/24,198.51.100.0/24"],
              ["192.0.2.1"] * (ALLOW_MAX + 1), [["192.0.2.0/24"]]],
    "http": ["", "FORWARD", "x", 1, [], {}, True, "forward "],
    "meta": [None, [], "a", 1, True, {"a": "x" * META_MAX}, {"a": {"b": {"c": {"d": {}}}}}, {"a": [[[[]]]]}],
    "while_connected": [0, 1, "true", None, [], {}], "takeover": [0, 1, "false", None, [], {}],
}.items())
def test_a_field_of_the_wrong_kind_is_refused(field, values):
    for value in values:
        fields = {"target": TARGET, field: value} | ({} if field == "port" else {"name": "a"})
        with pytest.raises(Unfit) as raised:
            parse_wish(body(**fields), RULES_HERE, ALICE)
        assert [found.field for found in raised.value.faults] == [field], value
        assert len(str(raised.value)) < 400


def test_the_limits_of_a_field_are_inside():
    assert wish(ttl=5).ttl == 5 and wish(ttl=86400).ttl == 86400
    assert wish(meta={"a": {"b": {"c": {"d": 1}}}}) and wish(meta={"a": [[[1]]]}) and wish(meta={}).meta == {}
    assert wish(meta={"a": "x" * (META_MAX - 8)}) and wish(meta={"a": "\u00e4" * (META_MAX // 2 - 4)})
    assert fault(parse_wish, body(name="a", target=TARGET, meta={"a": "x" * (META_MAX - 7)}), RULES_HERE, ALICE)
    assert len(wish(allow=["192.0.2.1"] * ALLOW_MAX).allow) == 1
    assert {wish(http=mode).http for mode in HTTP_MODES} == HTTP_MODES.keys()


def test_each_field_that_is_wrong_is_told_at_once():
    with pytest.raises(Unfit) as raised:
        parse_wish(body(name="*", target="exec:/bin/sh", ttl=0, met={}, colour="red"), RULES_HERE, ALICE)
    found = {each.field: each.sentence for each in raised.value.faults}
    assert found.keys() == {"name", "target", "ttl", "met", "colour"} and raised.value.kind == "fault"
    assert "did you mean meta?" in found["met"] and "did you mean" not in found["colour"]
    with pytest.raises(Unfit) as raised:
        parse_wish(body(name="www", target="tcp:198.51.100.1:80"), RULES_HERE, ALICE)
    assert [each.kind for each in raised.value.faults] == ["reserved", "forbidden"] and raised.value.kind == "forbidden"
    with pytest.raises(Unfit) as raised:
        parse_wish(body(**{f"x\n{number}": 1 for number in range(1000)}), RULES_HERE, ALICE)
    assert len(raised.value.faults) <= FAULTS_MAX + 2 and "\n" not in str(raised.value)


@pytest.mark.parametrize("fields, field", [
    ({"target": TARGET}, "name"), ({"name": "a", "port": 49000, "target": TARGET}, "name"), ({"name": "a"}, "target"),
    ({"port": 49000, "target": TARGET, "http": "forward"}, "http"),
])
def test_what_does_not_go_together(fields, field):
    assert fault(parse_wish, body(**fields), RULES_HERE, ALICE).field == field


def test_where_no_ports_are_none_can_be_claimed():
    found = fault(parse_wish, body(port=None, target=TARGET), RULES_HERE._replace(ports=None), ALICE)
    assert (found.field, found.kind) == ("port", "forbidden")


def test_a_random_name_that_has_no_place_is_a_fault_of_the_name():
    found = fault(parse_wish, body(name=None, target=TARGET), RULES_HERE, ALICE._replace(names=(f"shop.{DOMAIN}",)))
    assert (found.field, found.kind) == ("name", "forbidden")


@pytest.mark.parametrize("data", [
    b"", b" ", b"null", b"[]", b"1", b'"a"', b"{", b"{}}", b"{'name': 1}", b'{"name": "a",}', b"\xff",
    b"\xef\xbb\xbf{}",
    '{"name": "a"}'.encode("utf-16"), b'{"name": "a", "name": "b"}', b'{"meta": {"a": 1, "a": 2}}', b'{"ttl": NaN}',
    b'{"ttl": Infinity}', b'{"meta": {"a": -Infinity}}', b'{"meta": {"a": 1e999}}', b'{"name": "\\ud800"}',
    b'{"meta": {"\\udfff": 1}}', b"[" * 60000, b'{"meta":' * 8000, b'{"a":' + b"[" * 50000 + b"]" * 50000 + b"}",
    b'{"ttl": ' + b"1" * 5000 + b"}", b"name=a&target=b", b'{"name": "a\x00"}', b"\0",
], ids=lambda data: repr(data[:16]))
def test_a_body_that_is_no_json_object_is_refused(data):
    found = fault(parse_wish, data, RULES_HERE, ALICE)
    assert (found.field, found.kind) == ("", "fault") and found.sentence.startswith("the body ")


def test_what_may_be_changed_later():
    owner = ALICE
    changed = parse_change(body(target=TARGET, ttl=30, allow=["192.0.2.1"], http="pass", meta={"b": 2}), CHANGES,
                           RULES_HERE, owner, OWN)
    assert changed == {"target": TARGET, "ttl": 30.0, "allow": ("192.0.2.1/32",), "http": "pass", "meta": {"b": 2}}
    assert parse_change(b'{"ttl": 30}', RENEWAL, RULES_HERE, owner) == {"ttl": 30.0}
    assert parse_change(b"", RENEWAL, RULES_HERE, owner) == parse_change(b" {} ", CHANGES, RULES_HERE, owner) == {}
    for field in ("name", "port", "while_connected", "takeover", "lease"):
        assert fault(parse_change, body(**{field: "a"}), CHANGES, RULES_HERE, owner).field == field
    assert fault(parse_change, body(target=TARGET), RENEWAL, RULES_HERE, owner).field == "target"
    assert fault(parse_change, body(target="tcp:127.0.0.1:8080"), CHANGES, RULES_HERE, owner).kind == "forbidden"


# -- who may use a route -----------------------------------------------------------------------


@pytest.mark.parametrize("allow, clients, found", [
    (None, None, None), (None, ["192.0.2.0/24"], ["192.0.2.0/24"]), (["192.0.2.0/24"], None, ["192.0.2.0/24"]),
    (["192.0.2.0/25"], ["192.0.2.0/24"], ["192.0.2.0/25"]), (["0.0.0.0/0"], ["192.0.2.0/24"], ["192.0.2.0/24"]),
    (["0.0.0.0/0"], ["192.0.2.0/24", "2001:db8::/32"], ["192.0.2.0/24"]), (["198.51.100.0/24"], ["192.0.2.0/24"], []),
    (["::/0"], ["192.0.2.0/24"], []),
    (["::/0", "0.0.0.0/0"], ["2001:db8::/32", "192.0.2.1"], ["2001:db8::/32", "192.0.2.1/32"]),
    (["192.0.2.0/24"], [], []), (None, [], []),
])
def test_a_claim_only_narrows_who_may_come(allow, clients, found):
    owner = ALICE._replace(allow_clients=None if clients is None else tuple(map(parse_network, clients)))
    result = narrowed(allow, owner)
    assert (None if result is None else list(map(str, result))) == found


def test_a_claim_that_would_let_nobody_in_is_refused():
    owner = ALICE._replace(allow_clients=NETS)
    found = fault(parse_wish, body(name="a", target=TARGET, allow=["198.51.100.0/24"]), RULES_HERE, owner)
    assert (found.field, found.kind) == ("allow", "forbidden")


# -- settings ----------------------------------------------------------------------------------

TABLE = {
    "domains": [DOMAIN], "ttl": "60s", "max_ttl": "24h", "hold": "10m", "targets": ["nodepass", "tcp"],
    "networks": ["127.0.0.0/8"], "target_ports": "1024-65535", "ports": "49000-49100", "listen": "127.0.0.1:19002",
    "store": "memory",
    "owners": {"alice": {"token": HASH, "names": [f"*.alice.{DOMAIN}", f"shop.{DOMAIN}"], "hosts": [], "max_names": 100,
                         "allow_clients": ["192.0.2.0/24"], "admin": False},
               "root": {"token": "sha256:" + "0b" * 32, "admin": True}},
}
OTHERS = ("listen", "store", "dns", "stale_max")


def test_a_table_of_settings_is_read():
    rules, owners = read_registry(TABLE, OTHERS)
    assert rules == Rules((DOMAIN,), 60.0, 86400.0, 600.0, ("nodepass", "tcp"), (parse_network("127.0.0.0/8"),),
                          (1024, 65535), (49000, 49100), RESERVED, frozenset({f"shop.{DOMAIN}"}))
    assert owners == {
        "alice": Owner("alice", (bytes([10]) * 32,), (f"*.alice.{DOMAIN}", f"shop.{DOMAIN}"), (), 100,
                       (parse_network("192.0.2.0/24"),), False),
        "root": Owner("root", (bytes([11]) * 32,), admin=True)}
    assert read_registry({"domains": DOMAIN}) == (Rules((DOMAIN,)), {})
    assert read_rules({"domains": [DOMAIN], "hold": "off", "reserved": []}).hold == 0
    assert read_rules({"domains": [DOMAIN], "reserved": ["www", "shop"]}).reserved == ("www", "shop")


def test_each_option_is_a_field():
    assert {*RULES} == {*Rules._fields} - {"kept"} and {*OWNERS} - {"token"} == {*Owner._fields} - {"name", "tokens"}


@pytest.mark.parametrize("table, line", [
    ({"domains": None}, "registry.domains: say below which"), ({"domains": []}, "registry.domains: is an empty list"),
    ({"domains": ["example"]}, "registry.domains: 'example' has one label"),
    ({"domains": ["192.0.2.1"]}, "registry.domains: not a host name"),
    ({"domains": ["*.example.com"]}, "registry.domains: "),
    ({"domains": ["b\u00fccher.example.com"]}, "write xn--bcher-kva.example.com"),
    ({"ttl": "4s"}, "registry.ttl: 4 s is not between 5 s and max_ttl, 86400 s"),
    ({"ttl": 60}, "registry.ttl: '60' is not"),
    ({"max_ttl": "30s"}, "registry.ttl: 60 s is not between"),
    ({"max_ttl": "1s"}, "registry.max_ttl: 1 s is less than"),
    ({"hold": "x"}, "registry.hold: 'x' is not a duration"), ({"hold": {"a": 1}}, "registry.hold: has to be a text"),
    ({"targets": ["exec"]}, "registry.targets: 'exec' is not for owners"),
    ({"targets": []}, "registry.targets: is an empty"),
    ({"targets": ["tcp"], "networks": []}, '"tcp" leads nowhere without networks'),
    ({"targets": ["nodepass"]}, 'add "tcp" to targets'), ({"networks": ["192.0.2.1/24"]}, "registry.networks: "),
    ({"target_ports": "0-5"}, "registry.target_ports: "), ({"ports": "5"}, "registry.ports: "),
    ({"reserved": ["a.b"]}, "registry.reserved: 'a.b' is not one label"),
    ({"domain": [DOMAIN]}, "registry.domain: no such option; did you mean domains?"),
    ({"x\n": 1}, "registry.x?: no such"),
    ({"owners": []}, "registry.owners: has to be a table"),
    ({"owners": {"a": 1}}, "registry.owners.a: has to be a table"),
    ({"owners": {"a b": {"token": HASH}}}, "registry.owners.a b: a name of an owner has"),
    ({"owners": {"": {"token": HASH}}}, "registry.owners.: a name of an owner has"),
    ({"owners": {"a": {}}}, "registry.owners.a.token: has to be there"),
    ({"owners": {"a": {"token": []}}}, "registry.owners.a.token: is an empty list"),
    ({"owners": {"a": {"token": "sha256:" + "0A" * 32}}}, "registry.owners.a.token: is no hash"),
    ({"owners": {"a": {"token": [HASH] * (TOKENS_MAX + 1)}}}, "registry.owners.a.token: has 5 hashes"),
    ({"owners": {"a": {"token": HASH}, "b": {"token": HASH}}}, "registry.owners.b.token: is that of a, too"),
    ({"owners": {"a": {"token": HASH, "names": [f"a.{DOMAIN}", "a.example.com"]}}},
     f"a.example.com is not below {DOMAIN}"),
    ({"owners": {"a": {"token": HASH, "names": [DOMAIN]}}}, f"{DOMAIN} is not below"),
    ({"owners": {"a": {"token": HASH, "names": ["*"]}}}, "registry.owners.a.names: '*' is neither"),
    ({"owners": {"a": {"token": HASH, "names": [f"a**.{DOMAIN}"]}}}, "registry.owners.a.names: "),
    ({"owners": {"a": {"token": HASH, "names": []}}}, "registry.owners.a.names: is an empty list"),
    ({"owners": {"a": {"token": HASH, "allow_clients": []}}}, "registry.owners.a.allow_clients: is an empty list"),
    ({"owners": {"a": {"token": HASH, "max_names": 0}}}, "registry.owners.a.max_names: "),
    ({"owners": {"a": {"token": HASH, "admin": "yes"}}}, "registry.owners.a.admin: "),
    ({"owners": {"a": {"token": HASH, "tokens": HASH}}},
     "registry.owners.a.tokens: no such option; did you mean token?"),
])
def test_a_wrong_setting_is_told_in_one_line(table, line):
    merged = {key: value for key, value in {**TABLE, **table}.items() if value is not None}
    with pytest.raises(SettingsError) as raised:
        read_registry(merged, OTHERS)
    (said,) = raised.value.lines
    assert line in said and said.startswith("registry.") and said.isprintable()


def test_all_wrong_settings_are_told_at_once():
    with pytest.raises(SettingsError) as raised:
        read_registry({**TABLE, "owners": {"a": {}, "b": {"token": "x"},
                                           "c": {"token": HASH, "max_names": -1}}}, OTHERS)
    assert [line.partition(": ")[0] for line in raised.value.lines] == [
        "registry.owners.a.token", "registry.owners.b.token", "registry.owners.c.max_names"]


def test_a_token_in_the_place_of_its_hash_is_never_shown():
    token, _ = new_token()
    with pytest.raises(SettingsError) as raised:
        read_registry({**TABLE, "owners": {"a": {"token": token}}}, OTHERS)
    assert token not in str(raised.value) and "sniroute.py token" in str(raised.value)


# -- reload ------------------------------------------------------------------------------------


def test_after_a_reload_claims_are_held_against_the_new_settings():
    key = f"shop.{DOMAIN}"
    assert standing(kept(key), RULES_HERE, ALICE) == standing(kept("tcp:49000"), RULES_HERE, ALICE) == ""
    assert "name space" in standing(kept(key), RULES_HERE, ALICE._replace(names=(f"a.{DOMAIN}",)))
    assert "not below" in standing(kept(key), RULES_HERE._replace(domains=("other.example.com",)), ALICE)
    assert "networks" in standing(kept(key), RULES_HERE._replace(networks=()), ALICE)
    assert "kind" in standing(kept(key), RULES_HERE._replace(targets=("nodepass",)), ALICE)
    assert "ports" in standing(kept("tcp:49000"), RULES_HERE._replace(ports=None), ALICE)
    assert "49001" in standing(kept("tcp:49000"), RULES_HERE._replace(ports=(49001, 49002)), ALICE)


@pytest.mark.parametrize("key, more, what", [
    ("tcp:x", {}, "port: 'x' is not a port"), ("tcp:", {}, "port: '' is not a port"), ("tcp:\u0662", {}, "port: "),
    ("tcp:049000", {}, "port: "), (f"shop.{DOMAIN}", {"allow": ("x\x1b",)}, "allow: 'x"),
    (f"shop.{DOMAIN}", {"allow": ("192.0.2.1/24",)}, "allow: "), (f"shop.{DOMAIN}", {"http": "sing"}, "http: 'sing' is none"),
    ("shop\u00e9", {}, "name: "), (f"shop.{DOMAIN}", {"target": "tcp"}, "target: ")])
def test_a_claim_that_another_program_has_kept_does_not_stand_and_breaks_nothing(key, more, what):
    """A store is another program's, too.  What stands has a route."""
    said = standing(kept(key)._replace(**more), RULES_HERE, ALICE)
    assert said.startswith(what) and said.isprintable()
