"""Tests of sniroute_nodeurl.py, in its order."""

from __future__ import annotations

import random
import string
import urllib.parse
from typing import Any, Callable

import pytest

from sniroute_nodeurl import (
    FLAGS, PARAMETERS, TARGETS_MAX, VARIABLES, Options, Times, parse_duration, parse_flags, parse_url, read_times, show,
    show_duration,
)
from sniroute_refusals import SettingsError

HEX = "0123456789abcdef" * 4
HERE = "server://127.0.0.1:10101/127.0.0.1:8080"


def faults(call: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """The lines that stop a start."""
    with pytest.raises(SettingsError) as raised:
        call(*args)
    assert all("\n" not in line and line.isprintable() for line in raised.value.lines)
    return raised.value.lines


def fault(call: Callable[..., Any], *args: Any) -> str:
    """The one line that stops a start."""
    (line,) = faults(call, *args)
    return line


def given(query: str, scheme: str = "server") -> Options:
    """The options of a URL with this query."""
    return parse_url(f"{scheme}://127.0.0.1:10101/127.0.0.1:8080?{query}")


# -- options -----------------------------------------------------------------------------------


def test_the_shortest_url_has_the_originals_defaults():
    assert parse_url("client://:10101/:8080") == Options(
        "client", "", "", 10101, "", (("", 8080),), log="info", dns=300.0, sni="", lbs=0, min=64, max=1024, mode=0,
        type=0, tls=0, crt="", key_file="", dial="", read=0.0, rate=0, slot=65536, proxy=0, block=frozenset(),
        notcp=False, noudp=False, pin="")


def test_a_key_makes_the_secret_and_without_one_the_port_does():
    assert parse_url("server://KEY@:10101/:8080").secret == "KEY"
    assert parse_url("server://:10101/:8080").secret == parse_url("server://@:10101/:8080").secret == "e68be2b4"


def test_a_key_is_in_no_repr():
    options = parse_url("server://s3cret@:10101/:8080?rate=5")
    assert repr(options) == str(options) == "Options('server://********@:10101/:8080?rate=5')"


@pytest.mark.parametrize("url, name", [
    ("client://tunnel.example.com:1/:2", "tunnel.example.com"), ("client://Tunnel:1/:2", "Tunnel"),
    ("client://:1/:2", "none"), ("client://192.0.2.1:1/:2", "none"), ("client://[2001:db8::1]:1/:2", "none"),
    ("client://[fe80::1%25eth0]:1/:2", "none"), ("client://192.0.2.1:1/:2?sni=a.example.com", "a.example.com"),
    ("client://a.example.com:1/:2?sni=none", "none"),
])
def test_the_server_name_is_that_of_sni_or_the_hosts(url, name):
    assert parse_url(url).server_name == name


def test_rates_are_in_megabits():
    assert given("rate=40").byte_rate == 5_000_000 and given("").byte_rate == 0


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, seconds", [
    ("5s", 5.0), ("1h", 3600.0), ("100ms", 0.1), ("1m30s", 90.0), ("0", 0.0), ("+0", 0.0), ("0s", 0.0),
    ("1.5h", 5400.0), (".5s", 0.5), ("2.s", 2.0), ("1h2m3s4ms5us6ns", 3723.004005006), ("7\u00b5s", 7e-6),
    ("7\u03bcs", 7e-6), ("+3s", 3.0), ("30s1m", 90.0), ("8784h", 8784 * 3600.0),
])
def test_a_duration_is_written_as_in_go(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", [
    "", "5", "-5s", "5 s", "s", "5sec", "1d", "1e3s", "5s ", "--5s", "+", ".s", "8785h", "9" * 30 + "s", "0.0", "5S",
    "\u0665s", "5s\n", "nan", "inf",
])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="is not a duration|is longer"):
        parse_duration(text)


@pytest.mark.parametrize("seconds, text", [
    (300.0, "5m0s"), (0.0, "0s"), (0.1, "100ms"), (3600.0, "1h0m0s"), (90.0, "1m30s"), (1.5, "1.5s"),
    (5400.25, "1h30m0.25s"), (0.0015, "1.5ms"), (7e-6, "7\u00b5s"), (5e-9, "5ns"), (60.0, "1m0s"), (10.0, "10s"),
    (36000.0, "10h0m0s"),
])
def test_a_duration_is_shown_as_in_go(seconds, text):
    assert show_duration(seconds) == text and parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("query, field, value", [
    *[(f"log={level}", "log", level) for level in ("none", "debug", "info", "warn", "error", "event")],
    ("dns=30s", "dns", 30.0), ("dns=0", "dns", 0.0), ("sni=A.example.com", "sni", "a.example.com"), ("lbs=1", "lbs", 1),
    ("lbs=2", "lbs", 2), ("lbs=roundrobin", "lbs", 0), ("lbs=random", "lbs", 0), ("lbs=leastconn", "lbs", 0),
    ("min=128", "min", 128), ("max=1", "max", 1), ("max=65536", "max", 65536), ("mode=2", "mode", 2),
    ("type=2", "type", 2), ("tls=1", "tls", 1), ("tls=2&crt=/a%20b.pem&key=/k.pem", "crt", "/a b.pem"),
    ("tls=2&crt=/c.pem&key=/k%2Bk.pem", "key_file", "/k+k.pem"), ("crt=a+b", "crt", "a b"), ("dial=auto", "dial", ""),
    ("dial=192.0.2.1", "dial", "192.0.2.1"), ("dial=2001:DB8::1", "dial", "2001:db8::1"), ("read=1h", "read", 3600.0),
    ("read=0", "read", 0.0), ("rate=0", "rate", 0), ("rate=50", "rate", 50), ("slot=0", "slot", 0),
    ("slot=%2B5", "slot", 5), ("proxy=0", "proxy", 0), ("proxy=1", "proxy", 1), ("proxy=2", "proxy", 2),
    ("block=0", "block", frozenset()), ("block=31", "block", frozenset("13")), ("block=2222", "block", frozenset("2")),
    ("block=102", "block", frozenset("12")), ("block=http,https", "block", frozenset("23")),
    ("block=socks5", "block", frozenset("1")), ("notcp=1", "notcp", True), ("noudp=1", "noudp", True),
    ("noudp=0", "noudp", False), ("rate=", "rate", 0), ("&&log=warn&", "log", "warn"), ("log", "log", "info"),
])
def test_a_parameter_is_read(query, field, value):
    assert getattr(given(query), field) == value
    assert getattr(given(query, "client"), field) == value


@pytest.mark.parametrize("query, name", [
    ("log=INFO", "log"), ("log=trace", "log"), ("dns=5", "dns"), ("dns=-1s", "dns"), ("sni=a_b..c", "sni"),
    ("sni=192.0.2.1", "sni"), ("sni=b%C3%BCcher.example.com", "sni"), ("lbs=3", "lbs"), ("min=0", "min"),
    ("min=-1", "min"), ("min=1e3", "min"), ("max=65537", "max"), ("max=1OO", "max"), ("mode=3", "mode"),
    ("mode=auto", "mode"), ("type=4", "type"), ("type=quic", "type"), ("tls=3", "tls"), ("tls=true", "tls"),
    ("crt=a%00b", "crt"), ("dial=eth0", "dial"), ("dial=192.0.2.256", "dial"), ("read=10", "read"),
    ("rate=5.5", "rate"), ("rate=-1", "rate"), ("slot=x", "slot"), ("slot=2147483648", "slot"), ("proxy=3", "proxy"),
    ("proxy=v2", "proxy"), ("block=4", "block"), ("block=tcp", "block"), ("block=1,2", "block"), ("block=-", "block"),
    ("notcp=yes", "notcp"), ("noudp=2", "noudp"), ("rate=%zz", "rate"), ("rate=1&rate=2", "rate"),
    ("rate=1&rate=1", "rate"), ("notcp=1&noudp=1", "noudp"), ("rates=1", "query"), ("Rate=1", "query"),
    ("password=x", "query"), ("rate%3D1", "query"), ("=1", "query"), ("pin=" + HEX, "pin"), ("slot=\u0665", "slot"),
    ("mode=\u00b2", "mode"),
])
def test_what_is_no_parameter_stops_the_start_by_its_name(query, name):
    line = fault(given, query)
    assert line.startswith(f"{name}: ")


def test_quic_is_refused_in_words():
    for scheme in ("server", "client"):
        line = fault(given, "type=1&tls=1", scheme)
        assert line.startswith("type: '1' is QUIC, which Python's standard library cannot speak")


def test_each_fault_has_a_line():
    names = [line.partition(":")[0] for line in faults(parse_url, "server://h/t?rate=x&tls=9&oops=1&mode=5")]
    assert sorted(names) == ["mode", "query", "rate", "target", "tls", "tunnel address"]


def test_http2_is_over_tls_always():
    assert given("type=3").tls == 1 and given("type=3&tls=0").tls == 1
    assert given("type=3&tls=2&crt=c&key=k").tls == 2 and given("type=2").tls == 0


@pytest.mark.parametrize("scheme, query, names", [
    ("server", "tls=2", ["crt", "key"]), ("server", "tls=2&crt=/c.pem", ["key"]),
    ("client", "tls=2&key=/k.pem", ["crt"]), ("client", "tls=2&mode=1", ["crt", "key"]),
])
def test_a_certificate_of_files_needs_both(scheme, query, names):
    assert [line.partition(":")[0] for line in faults(given, query, scheme)] == names


def test_a_client_of_a_server_shows_no_certificate():
    assert given("tls=2&mode=2", "client").tls == 2


@pytest.mark.parametrize("text", [HEX, HEX.upper(), f"sha256:{HEX}", f"SHA256:{HEX}",
                                  "sha256:" + ":".join(HEX[at:at + 2] for at in range(0, 64, 2)).upper()])
def test_a_pin_is_written_as_programs_print_it(text):
    assert given(f"pin={text}", "client").pin == f"sha256:{HEX}"


@pytest.mark.parametrize("text", [HEX[:-1], HEX + "0", "sha1:" + HEX[:40], "x" * 64, "sha256:"])
def test_a_pin_that_is_none_is_refused(text):
    assert fault(given, f"pin={text}", "client").startswith("pin: ")


# -- addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("url, tunnel, targets", [
    ("server://KEY@:10101/:8080", ("", 10101), [("", 8080)]),
    ("server://0.0.0.0:10101/127.0.0.1:8080", ("0.0.0.0", 10101), [("127.0.0.1", 8080)]),
    ("server://[::]:10101/[::1]:8080", ("::", 10101), [("::1", 8080)]),
    ("client://a.example.com:1/b.example.com:2,[2001:DB8::1]:3,192.0.2.1:4", ("a.example.com", 1),
     [("b.example.com", 2), ("2001:db8::1", 3), ("192.0.2.1", 4)]),
    ("client://127.0.0.1:1/%20a:2%2C b:3 ,,c:4,", ("127.0.0.1", 1), [("a", 2), ("b", 3), ("c", 4)]),
    ("client://127.0.0.1:1/%5B::1%5D:2", ("127.0.0.1", 1), [("::1", 2)]),
    ("client://[fe80::1%25eth0]:1/[fe80::2%25eth0]:2", ("fe80::1%eth0", 1), [("fe80::2%eth0", 2)]),
    ("client://[::ffff:192.0.2.1]:1/a_b:2", ("192.0.2.1", 1), [("a_b", 2)]),
    ("CLIENT://127.0.0.1:1/localhost:2", ("127.0.0.1", 1), [("localhost", 2)]),
])
def test_addresses_are_read(url, tunnel, targets):
    options = parse_url(url)
    assert (options.host, options.port) == tunnel and options.targets == tuple(targets)
    assert options.scheme in ("server", "client")


@pytest.mark.parametrize("place", [
    "", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:x", "127.0.0.1:080", "127.0.0.1:-1",
    "::1:80", "[::1]", "[::1", "[::g]:80", "[127.0.0.1]:80", "*:80", "a b:80", "b\u00fccher.example.com:80", "127.1:80",
    "0x7f000001:80", "2130706433:80", "a%2Fb:80", "a'b:80", "a:80:80", "a;b:80", "%00:80",
    ".:80", "a..b:80", "-a:80", "a-.b:80", "x" * 64 + ":80",
])
def test_an_address_that_is_none_stops_the_start(place):
    assert fault(parse_url, f"server://{place}/127.0.0.1:8080").startswith("tunnel address: ")
    if place:
        assert fault(parse_url, f"server://127.0.0.1:10101/127.0.0.1:8080,{place}").startswith("target: ")
    assert fault(parse_url, f"master://{place}").startswith("tunnel address: ")


@pytest.mark.parametrize("between", ["?", "/", "@?", "?@", "@/", "/@", "?=", "&?", "@x?y@", "#", "@#", ":", "@:"])
def test_a_key_that_is_cut_by_what_a_url_has_elsewhere_is_in_no_fault(between):
    """Whatever part of it stands where: in the address, a target, the name of a parameter or its value."""
    key = f"hunter{between}secret{between}passed"
    for said in faults(parse_url, f"client://{key}@nat.example.com:10101/127.0.0.1:8080?min=x"):
        assert not any(part in said for part in ("hunter", "secret", "passed")), said


def test_a_name_with_other_letters_is_shown_as_dns_has_it():
    assert "xn--bcher-kva.example.com" in fault(parse_url, "client://127.0.0.1:1/b\u00fccher.example.com:80")


@pytest.mark.parametrize("path", ["", "/", "/,", "/%20", "/ , ,"])
def test_an_end_without_a_target_does_not_start(path):
    for scheme in ("server", "client"):
        assert fault(parse_url, f"{scheme}://127.0.0.1:10101{path}").startswith("target: there is none")


def test_there_is_a_most_of_targets():
    some = ",".join(f"127.0.0.1:{number}" for number in range(1, TARGETS_MAX + 1))
    assert len(parse_url(f"client://127.0.0.1:10101/{some}").targets) == TARGETS_MAX
    assert str(TARGETS_MAX) in fault(parse_url, f"client://127.0.0.1:10101/{some},:9")


@pytest.mark.parametrize("url, loops", [
    ("server://127.0.0.1:80/127.0.0.1:80", True), ("server://192.0.2.1:80/127.9.9.9:80", True),
    ("server://192.0.2.1:80/[::1]:80", True), ("server://:80/192.0.2.1:80", True),
    ("server://0.0.0.0:80/192.0.2.1:80", True), ("server://[::]:80/192.0.2.1:80", True), ("server://:80/:80", True),
    ("client://a.example.com:80/LOCALHOST.:80", True), ("client://A.example.com:80/a.example.com:80", True),
    ("client://a.example.com:80/192.0.2.1:81,127.0.0.1:80", True),
    ("client://a.example.com:80/[::ffff:127.0.0.1]:80", True), ("server://127.0.0.1:80/127.0.0.1:81", False),
    ("server://192.0.2.1:80/192.0.2.2:80", False), ("client://a.example.com:80/b.example.com:80", False),
    ("client://a.example.com:80/:80", False),
])
def test_a_target_that_would_be_the_tunnel_is_refused(url, loops):
    if loops:
        assert "would lead to itself" in fault(parse_url, url)
    else:
        assert parse_url(url)


# -- URLs and flags ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "", "server", "server:", "server:/a:1", "server:127.0.0.1:1", "://127.0.0.1:1/:2", "tcp://127.0.0.1:1/:2",
    "https://127.0.0.1:1/:2", "servers://127.0.0.1:1/:2", " server://127.0.0.1:1/:2", "server://127.0.0.1:1/:2\n",
    "server://127.0.0.1:1/\t:2", "server://127.0.0.1:1/:2\0", "server://127.0.0.1:1/:2#",
    "server://127.0.0.1:1/:2?log=info#x", "s\u00e9rver://127.0.0.1:1/:2", "server://" + "a" * 70_000,
])
def test_what_is_no_url_is_refused_in_one_line(text):
    assert fault(parse_url, text).startswith("URL: ")


@pytest.mark.parametrize("user, key", [
    ("KEY", "KEY"), ("a%40b", "a@b"), ("a@b", "a@b"), ("%F0%9F%98%80", "\U0001f600"),
    ("a%2Fb%3Fc%23d%3Ae", "a/b?c#d:e"), ("a+b", "a+b"), ("!$&'()*,;=~-._", "!$&'()*,;=~-._"), ("100%25", "100%"),
])
def test_a_key_is_the_user_of_the_url(user, key):
    options = parse_url(f"client://{user}@127.0.0.1:1/:2")
    assert options.key == options.secret == key and parse_url(show(options, False, True)) == options


@pytest.mark.parametrize("url", [
    # In each of these `s3cret` is the key, or a piece of it, and something is wrong.
    "server://s3cret:more@127.0.0.1:1/:2", "server://user:s3cret@127.0.0.1:1/:2", "server://s3 cret@127.0.0.1:1/:2",
    "server://s3cret%FF@127.0.0.1:1/:2", 'server://s3cret"@127.0.0.1:1/:2', "server://s3cr\u00e9t@127.0.0.1:1/:2",
    "server://s3cret/more@127.0.0.1:1/:2", "server://more/s3cret@127.0.0.1:1/:2", "server://s3cret?more@127.0.0.1:1/:2",
    "server://more?s3cret@127.0.0.1:1/:2", "server://more?log=s3cret@127.0.0.1:1/:2",
    "server://more?s3cret=1&x@127.0.0.1:1/:2", "server://s3cret#more@127.0.0.1:1/:2",
    "server://more#s3cret@127.0.0.1:1/:2", "tcp://s3cret@127.0.0.1:1/:2", "server:s3cret@127.0.0.1:1/:2",
    "server://s3cret@127.0.0.1/:2", "server://s3cret@127.0.0.1:1/x@s3cret",
    "server://s3cret@127.0.0.1:1/:2?rate=s3cret@", "server://127.0.0.1:1/s3cret@127.0.0.1",
    "server://127.0.0.1:1/:2?s3cret@=1", "server://s3cret@127.0.0.1:1/:2?rate=x&oops=1&type=1",
    "server://s3cret@127.0.0.1:1/\n",
])
def test_a_key_is_in_no_fault(url):
    assert not any("s3" in line or "cret" in line for line in faults(parse_url, url))


@pytest.mark.parametrize("words, url", [
    ("server --tunnel-addr 127.0.0.1 --tunnel-port 10101 --target-addr 127.0.0.1 --target-port 8080", HERE),
    ("server --password=KEY --tunnel-port=10101 --target-port=8080 --tls=1", "server://KEY@:10101/:8080?tls=1"),
    ("client -tunnel-addr a.example.com -tunnel-port 1 -targets 127.0.0.1:2,[::1]:3 -lbs 2",
     "client://a.example.com:1/127.0.0.1:2,[::1]:3?lbs=2"),
    ("client --tunnel-addr ::1 --tunnel-port 1 --target-addr 2001:db8::1 --target-port 2",
     "client://[::1]:1/[2001:db8::1]:2"),
    ("client --tunnel-addr [::1] --tunnel-port 1 --target-addr x --targets y:2", "client://[::1]:1/y:2"),
    ("client --tunnel-port 1 --target-port 2 --min 8 --dns 1m --sni a.example.com --pin " + HEX,
     f"client://:1/:2?min=8&dns=1m&sni=a.example.com&pin={HEX}"),
    ("server --tunnel-port 1 --target-port 2 --type 3 --max 5 --mode 2 --dial auto --read 1s --rate 1 --slot 0 "
     "--proxy 1 --block 12 --notcp 1",
     "server://:1/:2?type=3&max=5&mode=2&dial=auto&read=1s&rate=1&slot=0&proxy=1&block=12&notcp=1"),
    ("server --tunnel-port 1 --target-port 2 --tls 2 --crt /c.pem --key /k.pem --log ",
     "server://:1/:2?tls=2&crt=/c.pem&key=/k.pem"),
    ("master --tunnel-addr 127.0.0.1 --tunnel-port 9090 --tls 1 --log debug",
     "master://127.0.0.1:9090?tls=1&log=debug"),
])
def test_flags_say_what_a_url_says(words, url):
    scheme, *flags = words.split(" ")
    assert parse_flags(scheme, flags) == parse_url(url)


def test_a_password_may_be_anything():
    words = ["--tunnel-port", "1", "--target-port", "2", "--password"]
    assert fault(parse_flags, "client", [*words, "s3cret\udcff"]) == "key: it is not UTF-8"
    for password in ("-x", "--log", "a@b:c/d?e#f", "\u00e9 \n", "="):
        assert parse_flags("client", [*words, password]).secret == password
        assert parse_flags("client", [*words[:-1], f"--password={password}"]).secret == password


@pytest.mark.parametrize("words, name", [
    ("server --tunnel-port 1 --target-port 2 s3cret", "server"), ("server s3cret", "server"),
    ("server --passwords s3cret", "server"), ("server --passwords=s3cret", "server"), ("server --password", "password"),
    ("server --password s3cret --password s3cret", "password"), ("master --tunnel-port 1 --password s3cret", "master"),
    ("master --tunnel-port 1 --targets a:1", "master"), ("server ---log info", "server"), ("server -", "server"),
    ("server --", "server"), ("server --tunnel-port 1 --target-port 2 --rate x", "rate"),
    ("server --tunnel-port 1", "target"), ("server --tunnel-port 1 --target-addr a", "target"),
    ("server --tunnel-addr a --target-port 2", "tunnel address"), ("server --target-port 2", "tunnel address"),
    ("server --tunnel-addr s3cret@a --tunnel-port 1 --target-port 2", "tunnel address"),
    ("server --tunnel-port 1 --target-port 2 --pin " + HEX, "pin"),
    ("server --tunnel-port 1 --target-port 1", "target"),
])
def test_what_is_no_flag_stops_the_start(words, name):
    scheme, *flags = words.split(" ")
    line = fault(parse_flags, scheme, flags)
    assert line.startswith(f"{name}: ") and "s3cret" not in line


@pytest.mark.parametrize("url, prefix", [
    ("master://127.0.0.1:9090", ""), ("master://127.0.0.1:9090/", ""), ("master://:9090/admin", "/admin"),
    ("master://:9090/a/b//?log=warn", "/a/b"),
])
def test_a_master_has_an_address_and_a_prefix(url, prefix):
    options = parse_url(url)
    assert options.prefix == prefix and options.targets == () and options.port == 9090


@pytest.mark.parametrize("path", ["/a b", "/%00", "/\u00e9", "/" + "a" * 300])
def test_a_prefix_that_is_none_is_refused(path):
    assert fault(parse_url, f"master://:9090{path}").startswith("prefix: ")


# -- a URL again -------------------------------------------------------------------------------


@pytest.mark.parametrize("url, full", [
    ("server://127.0.0.1:1/127.0.0.1:2?mode=1",
     "server://127.0.0.1:1/127.0.0.1:2?block=0&dial=auto&dns=5m0s&lbs=0&log=info&max=1024&mode=1&notcp=0&noudp=0"
     "&proxy=0&rate=0&read=0s&slot=65536&type=0"),
    ("client://127.0.0.1:1/127.0.0.1:2?mode=2",
     "client://127.0.0.1:1/127.0.0.1:2?block=0&dial=auto&dns=5m0s&lbs=0&log=info&min=64&mode=2&notcp=0&noudp=0"
     "&proxy=0&rate=0&read=0s&slot=65536&sni=none"),
])
def test_a_full_url_is_the_originals_config(url, full):
    assert show(parse_url(url), full=True, secret=False) == full
    assert show(parse_url(url), full=False, secret=False) == url


def test_a_key_is_hidden_and_nothing_else_is():
    options = parse_url("server://s3%40cret@:10101/:8080?tls=2&crt=/etc/c.pem&key=/etc/k.pem")
    assert show(options, False, False) == "server://********@:10101/:8080?crt=%2Fetc%2Fc.pem&key=%2Fetc%2Fk.pem&tls=2"
    assert show(options, False, True) == "server://s3%40cret@:10101/:8080?crt=%2Fetc%2Fc.pem&key=%2Fetc%2Fk.pem&tls=2"
    assert len(show(options._replace(key="x"), True, False)) == len(show(options._replace(key="y" * 99), True, False))


SAMPLES = {
    "log": ["warn", "none"], "dns": ["0", "1m30s"], "sni": ["a.example.com"], "lbs": ["1", "2"], "min": ["1", "9"],
    "max": ["7"], "mode": ["1", "2"], "type": ["2", "3"], "tls": ["1"], "crt": ["/a b&c=d/\u00e9.pem", b"/\xff.pem"],
    "key": ["/k#?.pem"], "dial": ["192.0.2.1", "2001:db8::1"], "read": ["1.5s"], "rate": ["100"], "slot": ["0", "5"],
    "proxy": ["1", "2"], "block": ["13"], "notcp": ["1"], "noudp": ["0"], "pin": [HEX],
}


def test_a_url_that_is_shown_says_the_same():
    assert SAMPLES.keys() == PARAMETERS.keys() and not SAMPLES.keys() & set(FLAGS)
    dice = random.Random(5)
    for _ in range(400):
        names = [name for name in PARAMETERS if dice.random() < 0.4]
        scheme = "client" if "pin" in names else dice.choice(["client", "server"])
        query = urllib.parse.urlencode({name: dice.choice(SAMPLES[name]) for name in names})
        key = urllib.parse.quote("".join(dice.choices(string.printable + "\u00e9", k=dice.randrange(5))), safe="")
        options = parse_url(f"{scheme}://{key}@[fe80::1%25e0]:1/[fe80::b%25e0]:2,192.0.2.1:3?{query}")
        assert parse_url(show(options, False, True)) == options
        whole = parse_url(show(options, True, True))
        assert whole._replace(sni=options.sni) == options and whole.server_name == options.server_name


# -- variables ---------------------------------------------------------------------------------


def test_without_variables_times_are_the_originals():
    assert read_times({}) == (Times(), [])
    assert Times() == (16384, 16384, 65536, 5.0, 5.0, 5.0, 30.0, 5.0, 0.1, 1.0, 5.0, 300.0, 3.0, 5.0, 3600.0)
    assert {field for field, _ in VARIABLES.values()} == set(Times._fields)


def test_each_variable_sets_its_time():
    for name, (field, _) in VARIABLES.items():
        is_count = isinstance(getattr(Times(), field), int)
        text, value = ("4096", 4096) if is_count else ("500ms", 0.5)
        assert read_times({name: text}) == (Times()._replace(**{field: value}), [])
        times, lines = read_times({name: "\x1b[2Joops"})
        assert times == Times() and len(lines) == 1 and lines[0].startswith(f"{name}: ") and lines[0].isprintable()
        assert read_times({name: ""}) == (Times(), [])


@pytest.mark.parametrize("name, text", [
    ("NP_REPORT_INTERVAL", "0"), ("NP_SERVICE_COOLDOWN", "0s"), ("NP_HANDSHAKE_TIMEOUT", "1us"),
    ("NP_TCP_DATA_BUF_SIZE", "0"), ("NP_SEMAPHORE_LIMIT", "-1"), ("NP_REPORT_INTERVAL", "5"),
    ("NP_UDP_DATA_BUF_SIZE", "16k"), ("NP_MIN_POOL_INTERVAL", "2s"), ("NP_MAX_POOL_INTERVAL", "50ms"),
])
def test_a_variable_that_is_none_leaves_the_default_and_is_told(name, text):
    times, lines = read_times({name: text})
    assert times == Times() and len(lines) == 1 and "default" in lines[0]


def test_never_and_at_once_are_times_where_they_mean_something():
    names = ("NP_UDP_READ_TIMEOUT", "NP_FALLBACK_INTERVAL", "NP_SHUTDOWN_TIMEOUT", "NP_RELOAD_INTERVAL")
    times = Times(udp_read=0.0, fallback=0.0, shutdown=0.0, reload=0.0)
    assert read_times({name: "0" for name in names}) == (times, [])


# -- anything at all ---------------------------------------------------------------------------


def test_any_url_is_options_or_faults_in_lines():
    dice, refused = random.Random(6), 0
    pieces = [
        "server://", "client://", "master://", "KEY@", ":10101", "/:8080", "127.0.0.1", "[::1]", "/a.example.com:80",
        ",", "?", "&", "=", "#", "@", "%", "%40", "%5B", "log=warn", "tls=2", "block=12", "rate=", "\u00e9", "\udcff",
        "%FF", "crt=", "\0", " ", "[", "]", ":", "0", "+", *PARAMETERS,
    ]
    urls = [
        HERE, "client://KEY@a.example.com:10101/127.0.0.1:80,[::1]:81?mode=2&dns=1m&pin=" + HEX,
        "master://:9090/x?log=warn",
    ]
    for number in range(4000):
        if number % 3 == 0:
            text = "".join(dice.choices(pieces, k=dice.randrange(10)))
        else:
            text = dice.choice(urls)
            for _ in range(dice.randrange(1, 4)):
                at = dice.randrange(len(text) + 1)
                new = dice.choice(["", dice.choice(pieces), chr(dice.randrange(0x250))])
                text = text[:at] + new + text[at + dice.randrange(3):]
        try:
            options = parse_url(text)
            assert options == parse_url(show(options, False, True))
            assert all(0 < port < 65536 for _, port in (*options.targets, ("", options.port)))
        except SettingsError as error:
            refused += 1
            assert error.lines, text
            assert all(line.isprintable() and line.isascii() and len(line) < 400 for line in error.lines), text
    assert 2000 < refused < 3990


def test_any_flags_are_options_or_faults_in_lines():
    dice, refused = random.Random(7), 0
    for _ in range(2000):
        words = ["--tunnel-port", "1", "--target-port", "2"] if dice.random() < 0.7 else []
        for _ in range(dice.randrange(5)):
            name = dice.choice([*FLAGS, *PARAMETERS, "x"])
            value = dice.choice(["1", "0", "5s", "", "-", "x", "\u00e9\0", HEX, "127.0.0.1", "[::1]"])
            words += dice.choice([[f"--{name}", value], [f"-{name}={value}"], [name], [f"--{name}"]])
        try:
            assert isinstance(parse_flags(dice.choice(["server", "client", "master"]), words), Options)
        except SettingsError as error:
            refused += 1
            assert error.lines and all(line.isprintable() for line in error.lines)
    assert refused < 1990
