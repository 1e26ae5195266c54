"""Tests of sniroute_answers.py: what a client is told in HTTP, what it is not told, and the page in a real browser."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import re
import socket
import subprocess
from typing import Callable, NamedTuple

import pytest

import sniroute_names
from sniroute_answers import LINK_MAX, PHRASES, WORDS, html_page, options, page, redirect, refusal
from sniroute_http import COUNTED, NONE, Request, parse_request, parse_response
from sniroute_refusals import REFUSALS, Malformed, Refused
from conftest import HERE, HOST, wait_until
from testbed.clients import program_path

NAME = "web.example.com"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
HTML, TEXT = "text/html; charset=utf-8", "text/plain; charset=utf-8"
HOSTILE = "<script>alert(1)</script>\"'&"
SECRET = "tcp:10.1.2.3:8080: dial tcp 10.1.2.3:8080: connect: no route to host"

# RFC 9209 section 2.3
RFC_9209 = set("""dns_timeout dns_error destination_not_found destination_unavailable destination_ip_prohibited
    destination_ip_unroutable connection_refused connection_terminated connection_timeout connection_read_timeout
    connection_write_timeout connection_limit_reached tls_protocol_error tls_certificate_error tls_alert_received
    http_request_error http_request_denied http_response_incomplete http_response_header_section_size
    http_response_header_size http_response_body_size http_response_trailer_section_size http_response_trailer_size
    http_response_transfer_coding http_response_content_coding http_response_timeout http_upgrade_failed
    http_protocol_error proxy_internal_response proxy_internal_error proxy_configuration_error
    proxy_loop_detected""".split())


class Answer(NamedTuple):
    """An answer, read."""

    status: int
    fields: dict[str, str]
    text: str


def read(data: bytes, method: str = "GET") -> Answer:
    """What these bytes say.  They are one whole answer, behind which the connection closes."""
    response = parse_response(data, method)
    assert response is not None and not response.keeps and b"close" in response.head.options
    assert response.framing.kind == (NONE if method == "HEAD" else COUNTED)
    assert len(data) == response.head.end + response.framing.length
    keys = [field.key for field in response.head.fields]
    assert len(keys) == len(set(keys)), "no field is there twice"
    phrase = response.head.first.decode().rstrip("\r\n").split(" ", 2)[2]
    assert phrase == PHRASES[response.status]
    return Answer(response.status, {field.name.decode(): field.value.decode() for field in response.head.fields},
                  data[response.head.end:].decode())


def ask(*lines: str, method: str = "GET", target: str = "/", version: int = 1, host: str | None = NAME) -> Request:
    """A request with these lines."""
    named = () if host is None else (f"Host: {host}",)
    request = parse_request("\r\n".join((f"{method} {target} HTTP/1.{version}", *named, *lines, "", "")).encode())
    assert request is not None
    return request


def shown(text: str) -> str:
    """The text of a page, without its markup and its style."""
    body = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", body)))


# -- refusals ----------------------------------------------------------------------------------


def test_every_refusal_has_words():
    """Those of PostgreSQL's clients, too: a row that is missing would be a fault within a refusal."""
    assert list(WORDS) == list(REFUSALS)
    assert {words.error for words in WORDS.values()} <= RFC_9209
    assert {row.status for row in REFUSALS.values()} <= PHRASES.keys()
    source = (HERE / "sniroute_http.py").read_text()
    assert {int(status) for status in re.findall(r"bad\(.*, (\d{3})\)", source)} <= PHRASES.keys()


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_says_what_happened_and_what_to_do(kind):
    """To a browser and to a program, the same; and never what is for the log."""
    row, words = REFUSALS[kind], WORDS[kind]
    refused = Refused(kind, SECRET if kind != "bad_request" else "two lines of Host")
    for accept, form in ((BROWSER, HTML), ("*/*", TEXT)):
        answer = read(refusal(refused, ask(f"Accept: {accept}")))
        assert answer.status == row.status
        assert answer.fields["Content-Type"] == form
        assert answer.fields["Cache-Control"] == "no-store"
        assert answer.fields["X-Content-Type-Options"] == "nosniff"
        assert answer.fields["Proxy-Status"] == f"sniroute; error={words.error}"
        assert ("Retry-After" in answer.fields) == (row.status in (429, 503))
        assert ("Allow" in answer.fields) == (row.status == 405)
        text = shown(answer.text)
        reason = row.meaning if kind != "bad_request" else "two lines of Host"
        for said in (str(row.status), PHRASES[row.status], reason[1:], NAME, words.visitor):
            assert said in text
        assert ("For whoever runs this router: " in text) == (row.advice.rstrip(".") in text) == words.for_operator
        assert "10.1.2.3" not in answer.text and "dial tcp" not in answer.text
        assert sniroute_names.__version__ not in answer.text + str(answer.fields)
    assert answer.text.count("\n") == 1 and answer.text.endswith("\n"), "one line"


@pytest.mark.parametrize("kind", ["no_route", "bad_request"])
def test_a_head_that_could_not_be_read_gets_a_line(kind):
    answer = read(refusal(Refused(kind, "a folded line in a head"), None))
    assert answer.fields["Content-Type"] == TEXT
    assert answer.text.startswith(f"{REFUSALS[kind].status} ") and NAME not in answer.text


def test_a_bad_request_says_what_is_bad():
    """Its words are about what the client itself has sent."""
    with pytest.raises(Malformed) as caught:
        parse_request(b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    answer = read(refusal(caught.value, None))
    assert answer.text == (
        "414 URI Too Long: a target of more than 8192 bytes. Ask with a shorter address. For whoever runs this router: "
        f"{REFUSALS['bad_request'].advice}.\n")


@pytest.mark.parametrize("status, said", [
    (431, "Delete the cookies of this site"), (421, "http://"), (400, "Update the program"), (417, "Update the program")])
def test_a_bad_request_says_what_to_do_by_its_status(status, said):
    answer = read(refusal(Malformed("x", kind="bad_request", status=status), None))
    assert (answer.status, said in answer.text) == (status, True)


def test_a_status_of_its_own_is_kept():
    assert read(refusal(Refused("no_route", "", status=421), ask())).status == 421
    assert read(refusal(Refused("busy", "", status=429), ask())).fields["Retry-After"] == "5"


def test_a_farewell_goes_first():
    assert refusal(Refused("no_name", "", farewell=b"OK\n"), ask()) == b"OK\n"


def test_what_anybody_says_is_text():
    """Also where a table, or the message of a bad request, should hold markup one day."""
    answer = read(refusal(Malformed(HOSTILE, kind="bad_request"), ask(f"Accept: {BROWSER}")))
    assert HOSTILE in shown(answer.text)
    text = html_page(*[HOSTILE] * 6)
    for data in (answer.text, text):
        assert "<script" not in data and not re.search("alert\\(1\\)[^&]", data)
    assert re.findall('href="([^"]*)"', text) == [html.escape(HOSTILE)]


def test_head_gets_the_head_alone():
    whole = refusal(Refused("no_route", ""), ask(f"Accept: {BROWSER}"))
    head = refusal(Refused("no_route", ""), ask(f"Accept: {BROWSER}", method="HEAD"))
    assert whole.startswith(head) and head.endswith(b"\r\n\r\n") and whole.endswith(b"</html>\n")
    assert int(read(head, "HEAD").fields["Content-Length"]) == len(whole) - len(head)
    assert redirect(ask(), NAME, 80, None).startswith(redirect(ask(method="HEAD"), NAME, 80, None))


@pytest.mark.parametrize("lines, form", [
    ([], TEXT), (["*/*"], TEXT), (["text/*"], TEXT), (["text/plain"], TEXT), ([""], TEXT), (["application/json"], TEXT),
    ([BROWSER], HTML), (["text/html"], HTML), (["TEXT/HTML ; charset=utf-8"], HTML), (["image/png", "text/html"], HTML),
    (["text/html;q=0"], TEXT), (["text/html; Q=0.000"], TEXT), (["text/html;q=0.001"], HTML), (["text/html;q="], HTML),
    (["text/html;q=0, text/html;level=1"], HTML), (["application/text/html"], TEXT), ([",,;,"], TEXT)])
def test_a_page_is_for_who_asks_for_one(lines, form):
    answer = read(refusal(Refused("no_route", ""), ask(*(f"Accept: {line}" for line in lines))))
    assert answer.fields["Content-Type"] == form
    assert ("Content-Security-Policy" in answer.fields) == (form == HTML)


def test_the_page_is_whole_by_itself_and_its_policy_allows_no_more():
    answer = read(page(502, HOSTILE, HOSTILE, name=HOSTILE, operator=HOSTILE, accept=[b"text/html"], error="dns_error"))
    (style,) = re.findall("<style>(.*?)</style>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = answer.fields["Content-Security-Policy"].split("; ")
    assert policy[:2] == ["default-src 'none'", f"style-src 'sha256-{digest}'"] and "frame-ancestors 'none'" in policy
    assert not re.search(r"<script|<img|<link|http-equiv|url\(|@import|\ssrc=|\sstyle=|\son[a-z]+=", answer.text)
    assert len(answer.text) < 4096, "it goes out in one piece"


# -- redirects ---------------------------------------------------------------------------------


@pytest.mark.parametrize("listener, port, place", [
    (80, None, NAME), (443, None, NAME), (8443, None, f"{NAME}:8443"), (80, 8443, f"{NAME}:8443"), (8080, 443, NAME)])
def test_a_redirect_goes_to_tls_on_the_right_port(listener, port, place):
    answer = read(redirect(ask(target="/a?b=c&d=//e"), NAME, listener, port))
    assert (answer.status, answer.fields["Location"]) == (308, f"https://{place}/a?b=c&d=//e")
    assert answer.fields["Cache-Control"] == "no-store", "or browsers keep it for good"
    assert answer.fields["Proxy-Status"] == "sniroute; error=proxy_internal_response"
    assert f"https://{place}/a" in answer.text and "For whoever" not in answer.text


@pytest.mark.parametrize("method, target, path", [
    ("GET", "//evil.example.org/", "//evil.example.org/"), ("GET", "/\\evil.example.org", "/\\evil.example.org"),
    ("GET", "/%0d%0aSet-Cookie:x", "/%0d%0aSet-Cookie:x"), ("GET", f"http://{NAME}", "/"),
    ("GET", f"http://{NAME}?x", "/?x"), ("GET", f"http://{NAME}//evil.example.org", "//evil.example.org"),
    ("GET", "/@evil.example.org", "/@evil.example.org"), ("OPTIONS", "*", "/"), ("POST", "/form", "/form"),
    ("GET", "/?\"'<>", "/?\"'<>")])
def test_a_redirect_never_leads_elsewhere(method, target, path):
    answer = read(redirect(ask("Accept: text/html", method=method, target=target), NAME, 80, None))
    assert answer.fields["Location"] == f"https://{NAME}{path}"
    assert html.unescape(re.findall('href="([^"]*)"', answer.text)[0]) == f"https://{NAME}{path}"


def test_a_redirect_names_the_host_in_its_one_form():
    assert read(redirect(ask(host="WEB.Example.com.:80"), NAME, 80, None)).fields["Location"] == f"https://{NAME}/"


def test_a_redirect_of_a_long_address_is_short():
    target = "/" + "'" * 8000
    data = redirect(ask("Accept: text/html", target=target), NAME, 80, None)
    assert read(data).fields["Location"] == f"https://{NAME}{target}" and "href" not in read(data).text
    short = redirect(ask("Accept: text/html", target=target[:LINK_MAX - 30]), NAME, 80, None)
    assert "href" in read(short).text and max(len(short), len(data)) < 16384


def test_options_that_go_no_further_say_what_may_be_asked():
    answer = read(options())
    assert (answer.status, answer.text) == (200, "")
    assert {"GET", "HEAD", "OPTIONS"} <= set(answer.fields["Allow"].split(", ")) and "TRACE" not in answer.fields["Allow"]


# -- clients -----------------------------------------------------------------------------------


def answering(data: bytes) -> Callable[[socket.socket], None]:
    """A handler that reads a head, and gives this answer."""
    def handler(sock: socket.socket) -> None:
        heard = b""
        while b"\r\n\r\n" not in heard:
            piece = sock.recv(65536)
            if not piece:
                return
            heard += piece
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            sock.recv(1)
    return handler


@pytest.mark.parametrize("words, version", [(["--http1.0"], 0), ([], 1), (["--head"], 1)])
def test_curl_reads_it(words, version, serve):
    curl = program_path("curl", "curl")
    refused = Refused("no_route", "")
    method = "HEAD" if words == ["--head"] else "GET"
    port = serve(answering(refusal(refused, ask(method=method, version=version)))).address[1]
    said = subprocess.run([curl, "-sS", "-i", "--max-time", "20", *words, f"http://{HOST}:{port}/"], capture_output=True,
                          text=True, check=True).stdout
    assert said.startswith("HTTP/1.1 404 Not Found")
    assert said.endswith("\n\n") if method == "HEAD" else "no route fits the name. Check the address" in said


LONG = ask(f"Accept: {BROWSER}", host="a-very-long-label-" * 3 + "a." + "b" * 63 + ".example.com")
PAGES = {
    "not found": refusal(Refused("no_route", SECRET), LONG),
    "moved": page(308, "this name is served over TLS", "Ask again over TLS.", name=NAME, accept=[b"text/html"],
                  error="dns_error", link=f"https://{HOST}/" + "x" * 400),
}


@pytest.mark.parametrize("data", PAGES.values(), ids=PAGES)
def test_the_page_in_a_browser(data, browser, serve):
    """It fits a phone, follows light and dark, can be read in both, and the browser has nothing to complain of."""
    port = serve(answering(data)).address[1]
    browser.call("Page.navigate", url=f"http://{HOST}:{port}/")
    wait_until(lambda: browser.evaluate("document.readyState === 'complete' && document.querySelector('h1') !== null"),
               what="the page")
    assert browser.evaluate("document.querySelector('h1').innerText") in ("No route fits the name",
                                                                         "This name is served over TLS")
    colours = {}
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        ground, inks = browser.evaluate(
            "[getComputedStyle(document.querySelector('main')).backgroundColor,"
            " [...document.querySelectorAll('main *')].map((each) => getComputedStyle(each).color)]")
        colours[scheme] = ground
        assert len(inks) >= 3 and min(contrast(ground, ink) for ink in inks) >= 4.5, "WCAG 2 section 1.4.3"
    assert colours["light"] != colours["dark"]
    browser.call("Emulation.setDeviceMetricsOverride", width=320, height=600, deviceScaleFactor=1, mobile=True)
    assert browser.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [320, 320]
    complaints = [event["entry"]["text"] for event in browser.happened("Log.entryAdded")
                  if "favicon" not in event["entry"].get("url", "") and "status of 404" not in event["entry"]["text"]]
    assert complaints == []


def contrast(one: str, other: str) -> float:
    """The contrast of two colours as `rgb(1, 2, 3)`.  Source: WCAG 2, "contrast ratio"."""
    bright = []
    for colour in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        bright.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(bright) + 0.05) / (min(bright) + 0.05)
