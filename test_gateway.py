"""Tests of sniroute_gateway.py: what is added to a request, what is refused, and what a browser's other pages may ask."""

from __future__ import annotations

import re

import pytest

from sniroute_gateway import HOPS_REMEMBERED, Policy, check, choose_upgrade, fields_of, hop, max_forwards, may_ask_again
from sniroute_http import Request, parse_request, parse_response, pass_request
from sniroute_refusals import Malformed, Refused

NAME = "web.example.com"
CLIENT = "192.0.2.1"
GUARDED = Policy(mode="forward", cross_site=True)
OPEN = Policy(mode="forward")


def ask(*lines: str, method: str = "GET", target: str = "/", version: int = 1, host: str | None = NAME) -> Request:
    """A request with these lines."""
    named = () if host is None else (f"Host: {host}",)
    head = "\r\n".join((f"{method} {target} HTTP/1.{version}", *named, *lines, "", "")).encode("latin-1")
    request = parse_request(head)
    assert request is not None
    return request


def sent(request: Request, believes: bool = False, client: str = CLIENT, port: int = 80) -> dict[str, list[str]]:
    """What the backend gets: the values of each field, by its name."""
    head = pass_request(request, hop(request, client, port, believes), believes=believes).decode("latin-1")
    fields: dict[str, list[str]] = {}
    for line in head.split("\r\n")[1:-2]:
        name, _, value = line.partition(": ")
        fields.setdefault(name.lower(), []).append(value)
    return fields


def refused(request: Request, policy: Policy = GUARDED) -> str:
    """The kind of the refusal; "" where there is none."""
    try:
        check(request, policy)
    except Refused as error:
        return error.kind
    return ""


# -- who asks ----------------------------------------------------------------------------------


def test_the_backend_learns_who_asks_and_for_what():
    assert sent(ask("X: 1", host="WEB.example.com.:8080"), port=443) == {
        "host": ["WEB.example.com.:8080"], "x": ["1"], "via": ["1.1 sniroute"], "x-forwarded-for": [CLIENT],
        "x-forwarded-proto": ["http"], "x-forwarded-host": [f"{NAME}:8080"], "x-forwarded-port": ["443"],
        "x-real-ip": [CLIENT]}


def test_an_old_client_that_names_no_host_is_not_given_one():
    fields = sent(ask(version=0, host=None))
    assert "x-forwarded-host" not in fields and fields["via"] == ["1.0 sniroute"]


@pytest.mark.parametrize("client, shown", [
    ("2001:db8::1", "2001:db8::1"), ("fe80::1%eth0", "fe80::1"), ("::ffff:192.0.2.7", "192.0.2.7")])
def test_an_address_is_shown_as_backends_read_it(client, shown):
    fields = sent(ask(), client=client)
    assert fields["x-forwarded-for"] == fields["x-real-ip"] == [shown]


FORGED = ("X-Forwarded-For", "x_forwarded_for", "X-Forwarded_Proto", "X-Forwarded-Host", "X-Forwarded-Port", "X-Real-IP",
          "X_Real_IP", "X-Forwarded-Prefix", "Forwarded", "X.Forwarded.For")


@pytest.mark.parametrize("name", FORGED)
def test_what_a_stranger_says_of_others_is_gone(name):
    fields = sent(ask(f"{name}: 203.0.113.9"))
    assert "203.0.113.9" not in str(fields) and fields["x-forwarded-for"] == [CLIENT]
    assert fields == sent(ask())


@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Forwarded-Proto", "X-Real-IP", "X_Forwarded_For", "Via", "Forwarded"])
def test_a_connection_that_names_ours_is_refused(name):
    """It would have them vanish on the way."""
    with pytest.raises(Malformed):
        ask(f"Connection: close, {name}")


def test_what_a_connection_names_goes_before_ours_are_set():
    fields = sent(ask("Connection: x-secret", "X-Secret: 1"))
    assert "x-secret" not in fields and fields["x-real-ip"] == [CLIENT]


def test_a_believed_proxy_is_the_last_of_a_list():
    fields = sent(ask("X-Forwarded-For: 203.0.113.9, 198.51.100.2", "X-Forwarded-For: 198.51.100.3", "X-Forwarded-For:",
                      "X-Real-IP: 203.0.113.9", "X-Forwarded-Proto: https", "X-Forwarded-Host: shop.example.com",
                      "X-Forwarded-Port: 443", "Forwarded: for=203.0.113.9", "X-Forwarded-Prefix: /shop",
                      "Via: 1.1 edge", "X_Real_IP: 203.0.113.66"), believes=True)
    assert fields == {
        "host": [NAME], "x-forwarded-for": [f"203.0.113.9, 198.51.100.2, 198.51.100.3, {CLIENT}"],
        "x-real-ip": ["203.0.113.9"], "x-forwarded-proto": ["https"], "x-forwarded-host": ["shop.example.com"],
        "x-forwarded-port": ["443"], "forwarded": ["for=203.0.113.9"], "x-forwarded-prefix": ["/shop"],
        "via": ["1.1 edge", "1.1 sniroute"]}


def test_a_believed_client_that_says_nothing_is_as_any_other():
    assert sent(ask("X: 1"), believes=True) == sent(ask("X: 1"))


def test_an_empty_list_of_a_believed_proxy_is_begun():
    assert sent(ask("X-Forwarded-For:"), believes=True) == sent(ask())


def test_our_port_does_not_go_with_the_proto_of_another():
    """Else backends make links to https://web.example.com:80/."""
    fields = sent(ask("X-Forwarded-Proto: https"), believes=True)
    assert fields["x-forwarded-proto"] == ["https"] and "x-forwarded-port" not in fields


@pytest.mark.parametrize("said, real", [
    ("203.0.113.9", ["203.0.113.9"]), ("198.51.100.1, 203.0.113.9", ["203.0.113.9"]), ("2001:db8::1", ["2001:db8::1"]),
    ("unknown", None), ("203.0.113.9, _hidden", None)])
def test_the_believed_proxy_itself_is_not_taken_for_the_client(said, real):
    """It may sit on an address for which backends have other rules, as 127.0.0.1."""
    fields = sent(ask(f"X-Forwarded-For: {said}"), believes=True, client="127.0.0.1")
    assert fields.get("x-real-ip") == real
    assert fields["x-forwarded-for"] == [f"{said}, 127.0.0.1"]


def test_what_is_remembered_has_a_bound():
    for number in range(HOPS_REMEMBERED + 10):
        hop(ask(host=f"n{number}.example.com"), CLIENT, 80, False)
    assert fields_of.cache_info().currsize == HOPS_REMEMBERED


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("method, target", [("CONNECT", f"{NAME}:443"), ("TRACE", "/")])
def test_a_method_that_is_for_proxies_is_refused(method, target):
    request = ask(method=method, target=target, host=f"{NAME}:443" if method == "CONNECT" else NAME)
    with pytest.raises(Refused) as caught:
        check(request, OPEN)
    assert (caught.value.kind, caught.value.status) == ("no_method", 405)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "BASELINE-CONTROL"])
def test_other_methods_pass(method):
    assert not refused(ask(method=method)) and not refused(ask(method=method), OPEN)


@pytest.mark.parametrize("lines, loops", [
    (["1.1 sniroute"], True), (["1.0 edge, 1.1 sniroute"], True), (["1.1 edge", "1.1 sniroute, 1.1 other"], True),
    (["HTTP/1.1 SNIROUTE"], True), (["1.1\tsniroute (a comment)"], True), (["1.1 edge,1.1 sniroute,"], True),
    (["2 sniroute"], True),
    (["1.1 edge"], False), (["1.1 sniroute.example.com"], False), (["1.1 my-sniroute"], False),
    (["1.1 edge (sniroute)"], False), (["sniroute"], False), ([""], False), (["1.1 edge, sniroute"], False)])
def test_a_request_that_has_come_through_here_is_a_loop(lines, loops):
    request = ask(*(f"Via: {line}" for line in lines))
    assert refused(request, OPEN) == ("loop" if loops else "")


def test_what_we_send_is_what_we_know_again():
    again = parse_request(pass_request(ask("Via: 1.1 edge"), hop(ask(), CLIENT, 80, False)))
    with pytest.raises(Refused) as caught:
        check(again, OPEN)
    assert (caught.value.kind, caught.value.status) == ("loop", 508)


def test_a_via_that_is_a_puzzle_takes_no_time():
    for value in ("1.1" + " " * 30000, "a/" * 15000, "," * 30000, "a" * 30000, "(" * 30000, "1.1 sniroute" * 2500):
        assert refused(ask(f"Via: {value}"), OPEN) in ("", "loop")


# -- pages of other sites ----------------------------------------------------------------------

SAME, EVIL = f"Origin: http://{NAME}", "Origin: https://evil.example.org"
CROSS = "Sec-Fetch-Site: cross-site"
WINDOW = ("Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document")
WEBSOCKET = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: x")


@pytest.mark.parametrize("method, lines", [
    ("GET", ()), ("POST", ()),  # a program
    ("GET", ("Sec-Fetch-Site: none", *WINDOW)),  # typed
    ("GET", (CROSS, *WINDOW)), ("HEAD", (CROSS, *WINDOW)),  # a link
    ("GET", ("Sec-Fetch-Site: same-site",)), ("GET", ("Sec-Fetch-Site: same-origin",)),
    ("POST", (SAME,)), ("POST", ("Sec-Fetch-Site: same-origin", SAME)),
    ("POST", (SAME + ":8080",)), ("POST", (f"Origin: https://{NAME.upper()}",)), ("POST", (SAME + ".",)),
    ("GET", (SAME, *WEBSOCKET)),
    ("POST", ("Sec-Fetch-Site: same-origin", "Origin: null")),  # a page with Referrer-Policy: no-referrer
    ("GET", ("Sec-Fetch-Site: a-word-of-tomorrow",)),
])
def test_a_browser_may_ask_for_its_own_page(method, lines):
    assert refused(ask(*lines, method=method)) == ""


@pytest.mark.parametrize("method, lines", [
    ("POST", (EVIL,)), ("GET", (EVIL,)), ("HEAD", (EVIL,)), ("PUT", (EVIL,)),  # a form; fetch; without Sec-Fetch-*
    ("OPTIONS", (EVIL, "Access-Control-Request-Method: PUT")),  # its preflight
    ("GET", (EVIL, *WEBSOCKET)), ("GET", ("Origin: null", *WEBSOCKET)),
    ("GET", (EVIL, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: websocket", "Sec-Fetch-Dest: websocket", *WEBSOCKET)),
    ("GET", (CROSS, "Sec-Fetch-Mode: no-cors", "Sec-Fetch-Dest: image")),
    ("GET", (CROSS, "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe")),
    ("GET", (CROSS, "Sec-Fetch-Mode: cors", "Sec-Fetch-Dest: document")),
    ("GET", (CROSS,)), ("GET", ("Sec-Fetch-Site: Cross-Site",)), ("GET", (CROSS, "Sec-Fetch-Site: same-origin")),
    ("POST", (CROSS, *WINDOW)), ("POST", (CROSS, EVIL, *WINDOW)),  # a form over the whole window
    ("POST", (CROSS, SAME)),
    ("POST", ("Sec-Fetch-Site: same-site", "Origin: http://other.example.com")),
    ("POST", ("Sec-Fetch-Site: none", EVIL)),
    ("POST", ("Origin: null",)), ("POST", ("Origin: NULL", "Sec-Fetch-Site: same-origin")),
    ("POST", ("Origin: null", "Sec-Fetch-Site: same-site")),
    ("POST", ("Origin:",)), ("POST", (f"Origin: {NAME}",)), ("POST", ("Origin: file://",)),
    ("POST", ("Origin: chrome-extension://abcdefgh",)), ("POST", (SAME, EVIL)), ("POST", (SAME, SAME)),
    ("POST", (f"{SAME} http://evil.example.org",)), ("POST", (f"{SAME}.evil.example.org",)),
    ("POST", (f"Origin: http://evil.example.org:80/{NAME}",)), ("POST", (f"Origin: http://{NAME}@evil.example.org",)),
    ("POST", (f"Origin: http://{NAME}, http://evil.example.org",)), ("POST", ("Origin: http://[::1]:80",)),
    ("GET", (CROSS, "Sec_Fetch_Mode: navigate", "Sec_Fetch_Dest: document")),  # what a page may set
    ("GET", (CROSS, *WINDOW, "Sec-Fetch-Dest: image")),
])
def test_another_sites_page_may_not_ask(method, lines):
    request = ask(*lines, method=method)
    with pytest.raises(Refused) as caught:
        check(request, GUARDED)
    assert (caught.value.kind, caught.value.status) == ("cross_site", 403)
    assert not refused(request, OPEN), "the route allows it"


def test_the_log_says_whose_page_it_was():
    with pytest.raises(Refused, match=r": https://evil\.example\.org$"):
        check(ask(EVIL), GUARDED)
    with pytest.raises(Refused, match="it does not say which$"):
        check(ask(CROSS), GUARDED)
    with pytest.raises(Refused) as caught:
        check(ask("Origin: \x80" + "x" * 1000), GUARDED)
    assert re.fullmatch("[ -~]{,400}", str(caught.value))


def test_who_names_no_host_owns_no_page():
    assert refused(ask("Origin: http://", version=0, host=None)) == "cross_site"
    assert refused(ask(SAME, version=0, host=None)) == "cross_site"


# -- other protocols, hops, and a second try ---------------------------------------------------


@pytest.mark.parametrize("offered, allowed, chosen", [
    ("websocket", {b"websocket"}, b"websocket"), ("WebSocket", {b"websocket"}, b"websocket"),
    ("websocket", set(), b""), ("h2c", {b"websocket"}, b""), ("h2c, websocket", {b"websocket"}, b"websocket"),
    ("h2c", {b"h2c"}, b""), ("h2c/1", {b"h2c/1", b"h2c"}, b""), ("irc/6.9, websocket", {b"websocket", b"irc"}, b"irc/6.9"),
    ("tls/1.0", {b"websocket"}, b""), ("spdy/3.1", {b"spdy/3.1"}, b"spdy/3.1"), ("spdy/3", {b"spdy/3.1"}, b"")])
def test_one_protocol_is_offered_that_the_route_allows(offered, allowed, chosen):
    request = ask("Connection: keep-alive, Upgrade", f"Upgrade: {offered}", "HTTP2-Settings: AAMAAABk")
    assert choose_upgrade(request, OPEN._replace(upgrades=frozenset(allowed))) == chosen
    head = pass_request(request, upgrade=chosen)
    assert re.findall(rb"Upgrade: (.*)\r\n", head) == [chosen] * bool(chosen)
    if chosen:
        answer = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %b\r\n\r\n" % chosen
        assert parse_response(answer, "GET", (chosen,)).upgrade == chosen


def test_an_upgrade_with_a_body_is_not_offered():
    assert choose_upgrade(ask(*WEBSOCKET, "Content-Length: 5"), OPEN) == b""


def test_a_hop_is_counted():
    request = ask("A: 1", "max-forwards: 10", "Max_Forwards: x", "B: 2", method="OPTIONS")
    with pytest.raises(Malformed, match="Max-Forwards"):
        max_forwards(request)
    passed = max_forwards(ask("A: 1", "max-forwards:10", "B: 2", method="OPTIONS", target="*"))
    assert pass_request(passed) == (
        f"OPTIONS * HTTP/1.1\r\nHost: {NAME}\r\nA: 1\r\nmax-forwards: 9\r\nB: 2\r\n\r\n".encode())
    assert passed.head.values(b"max-forwards") == [b"9"] and passed.head.values(b"b") == [b"2"]
    assert max_forwards(max_forwards(ask("Max-Forwards: 1", method="OPTIONS"))) is None


@pytest.mark.parametrize("value", ["0", "00"])
def test_the_last_hop_answers_itself(value):
    assert max_forwards(ask(f"Max-Forwards: {value}", method="OPTIONS")) is None


@pytest.mark.parametrize("method, lines", [("OPTIONS", ()), ("GET", ("Max-Forwards: 0",)), ("POST", ("Max-Forwards: x",))])
def test_what_counts_no_hops_stays(method, lines):
    request = ask(*lines, method=method)
    assert max_forwards(request) is request


@pytest.mark.parametrize("lines", [
    ("Max-Forwards:",), ("Max-Forwards: -1",), ("Max-Forwards: +1",), ("Max-Forwards: 1_0",), ("Max-Forwards: 1, 1",),
    ("Max-Forwards: 1", "Max-Forwards: 1"), ("Max-Forwards: " + "9" * 19,), ("Max-Forwards: \xb2",)])
def test_a_count_of_hops_that_is_none_is_refused(lines):
    with pytest.raises(Malformed) as caught:
        max_forwards(ask(*lines, method="OPTIONS"))
    assert (caught.value.kind, caught.value.status) == ("bad_request", 400)


def test_only_what_changes_nothing_twice_is_asked_again():
    assert [method for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "POST", "PATCH", "PROPFIND", "QUERY")
            if may_ask_again(ask(method=method))] == ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"]
