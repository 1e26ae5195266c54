"""Tests of sniroute_page.py: what its policy allows, and the page itself in a real browser."""

from __future__ import annotations

import base64
import hashlib
import re
import time

import pytest

import sniroute_tunnels
from conftest import HOST, echo, wait_until
from testbed.admin import DB, HOSTILE, TOKEN, TUNNEL, Browser, ask, hostile_ending, hostile_request, request
from testbed.running import read_all

pytestmark = pytest.mark.usefixtures("hurry")


def test_policy_names_what_the_page_has(run_admin):
    page = ask(run_admin().admin, "/")
    text = page.body.decode()
    for tag in ("style", "script"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page.headers["Content-Security-Policy"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\son[a-z]+=|style=", text)
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", text) == []


def test_page_in_a_browser(browser, run_admin, serve, cloudflared, ports, monkeypatch):
    """It shows what is there, as text; its orders are followed; it asks nobody else, and complains of nothing."""
    monkeypatch.setattr(sniroute_tunnels, "FAILURE_FIRST", 300.0)  # what failed is shown for as long as this takes
    cloudflared.far("*", serve(echo).address)
    cloudflared.fault("bad.example.com", exit=1, words="lookup bad.example.com: no such host")
    running = run_admin(TUNNEL, ports)
    origin = f"http://{HOST}:{running.admin.address[1]}"
    with running.connect("db.example.com") as client:
        assert client.recv(1)
        running.refused("bad.example.com")
        running.refused("scan.test.test")
        running.refused("<img/src=x/onerror=alert(1)>.test")
        running.router.endings.append(hostile_ending(name="<img src=x onerror=alert(2)>"))
        wait_until(lambda: len(running.admin.collector.refusals) == 4, what="refusals")
        running.admin.status.forget()
        browser.call("Page.navigate", url=origin + "/")
        wait_until(lambda: browser.evaluate("document.getElementById('phase')?.innerText") == "running",
                   what="the page")
        assert "db.example.com" in browser.text("connections")
        assert DB in browser.text("tunnels") and "ready" in browser.text("tunnels")
        assert "no such host" in browser.text("tunnels") and "no such host" in browser.text("troubles")
        assert "no route for scan.test.test" in browser.text("refusals") and "no route" in browser.text("reasons")
        assert "scan.test.test" in browser.text("names")
        assert "<img src=x onerror=alert(2)>" in browser.text("refusals")
        assert "<img/src=x/onerror=alert(1)>" in browser.text("refusals")
        assert browser.evaluate("document.images.length") == 0
        assert "*.example.com" in browser.text("routes") and DB in browser.text("starts")
        assert browser.text("tile-active").split("\n")[1] == "1"

        colours = {}
        for scheme in ("light", "dark"):
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            colours[scheme] = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colours["light"] != colours["dark"]
        browser.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=True)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400
        browser.call("Emulation.clearDeviceMetricsOverride")

        def press(row: str, verb: str, token: str | None) -> None:
            browser.evaluate(f"[...document.querySelectorAll('#tunnels button')]"
                             f".find((one) => one.ariaLabel === {verb + ' ' + row!r}).click()")
            assert browser.evaluate("document.getElementById('ask').open")
            assert browser.evaluate("document.getElementById('ask-label').hidden") is (token is None)
            browser.evaluate(f"document.getElementById('ask-token').value = {token or ''!r};"
                             "document.getElementById('ask-go').click()")

        def said(what: str) -> None:
            wait_until(lambda: what in browser.text("said"), what=what)

        press(DB, "Stop", "not the token of it")
        said("the token is missing or wrong")
        assert running.tunnels.snapshot()[0].state == "ready"
        press(DB, "Stop", TOKEN)
        said(f"{DB} is stopped.")
        read_all(client)
    wait_until(lambda: browser.evaluate("refresh()") or DB not in browser.text("tunnels"), what="its end")
    cloudflared.fault("bad.example.com")
    press("cloudflared:bad.example.com", "Start", None)
    said("cloudflared:bad.example.com is ready.")
    assert browser.evaluate("Object.values(sessionStorage).concat(Object.values(localStorage))") == [TOKEN]
    assert TOKEN not in browser.evaluate("document.documentElement.outerHTML")

    complaints = browser.happened("Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    complaints += [event for event in browser.happened("Log.entryAdded") if event["entry"]["source"] != "network"]
    assert complaints == []  # but for the 401 that it was given
    asked = {event["request"]["url"] for event in browser.happened("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith((origin + "/", "data:"))} == set()
    running.admin.close()
    wait_until(lambda: browser.evaluate("refresh()") or browser.text("phase") == "no answer", what="the page to notice")


def press(browser: Browser, label: str) -> None:
    """Press the button with this name, and then the one that confirms it."""
    browser.evaluate(f"[...document.querySelectorAll('td button')].find((one) => one.ariaLabel === {label!r}).click()")
    browser.evaluate(f"document.getElementById('ask-token').value = {TOKEN!r};"
                     "document.getElementById('ask-go').click()")


def cells(browser: Browser) -> list[list[str]]:
    """The words of the table of backends: state, route, backend, what its strip tells, the button."""
    return browser.evaluate(
        "[...document.querySelectorAll('#backends tbody tr')].map((line) => [line.cells[0].innerText,"
        " line.cells[1].innerText, line.cells[2].innerText, line.querySelector('svg')?.ariaLabel || '',"
        " line.querySelector('button').innerText])")


def test_backends_in_a_browser(browser, run_admin, serve):
    """Each stands there in words, with a strip of its last results; a button drains it, and another one enables it."""
    good = f"tcp:{HOST}:{serve(echo).address[1]}"
    running = run_admin(f"--route=db.example.com={good},{HOST}:1", f"--port={HOST}:0={good},192.0.2.1:1",
                        "--route=b.example.org=tcp:192.0.2.1:1")
    named, port = running.router.targets.book.listed()
    for member, results in zip(named.members.values(), ("+++", "+-" * 20 + "-"), strict=True):
        for each in results:
            member.mark(each == "+")
    bad = list(named.members.values())[1]
    running.router.call(lambda: named.went_down(bad, HOSTILE, "as the test says"))
    wait_until(lambda: bad.why)
    browser.call("Page.navigate", url=f"http://{HOST}:{running.admin.address[1]}/")
    wait_until(lambda: browser.evaluate("document.querySelectorAll('#backends tbody tr').length") == 4, what="rows")
    rows = cells(browser)
    place = f"port {HOST}:0"
    assert rows[0] == ["good", "db.example.com", good, "of the last 3 0 failed", "Drain"]
    assert rows[1][:2] == ["down", "db.example.com"]
    assert rows[1][3:] == ["of the last 30 16 failed, the latest, too", "Drain"]
    assert rows[1][2].startswith(f"tcp:{HOST}:1\ndown for ") and '<b>x</b>"' in rows[1][2]
    assert [row[:2] for row in rows[2:]] == [["good", place]] * 2 and rows[2][3] == "nobody was there yet"
    assert browser.text("backends-count") == "3 good, 1 down"
    assert f"db.example.com: tcp:{HOST}:1 is down for " in browser.text("troubles")
    drawn = browser.evaluate("[...document.querySelectorAll('#backends tr:nth-child(2) path')].map((one) =>"
                             " one.getAttribute('d').split('M').length - 1)")
    assert drawn == [14, 16]

    press(browser, f"Drain {good} of {place}")
    wait_until(lambda: browser.text("said") == f"{place}: backend {good} is drained.", what="the answer")
    wait_until(lambda: browser.evaluate("refresh()") or cells(browser)[2][0] == "drained", what="the row")
    row = cells(browser)[2]
    assert row[2] == f"{good}\nan operator wants no new client led there" and row[4] == "Enable"
    assert port.members[good].is_drained and not named.members[good].is_drained
    press(browser, f"Enable {good} of {place}")
    wait_until(lambda: not port.members[good].is_drained, what="the order")

    browser.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400
    assert browser.evaluate("document.querySelectorAll('main b').length") == 0
    complaints = browser.happened("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert complaints == []


def lines(browser: Browser, table: str) -> list[list[str]]:
    """The words of the cells of a table."""
    return browser.evaluate(f"[...document.querySelectorAll('#{table} tbody tr')].map((line) =>"
                            " [...line.cells].map((cell) => cell.innerText))")


def test_requests_in_a_browser(browser, run_admin):
    """Where no route serves HTTP nothing of it is there; then the last requests, as text, how many, and a rate."""
    running = run_admin("--route=web.example.com=tcp:192.0.2.1:80")
    browser.call("Page.navigate", url=f"http://{HOST}:{running.admin.address[1]}/")
    wait_until(lambda: browser.evaluate("document.getElementById('phase')?.innerText") == "running", what="the page")
    shown = "['requests-card', 'tile-requests'].map((id) => document.getElementById(id).offsetHeight > 0)"
    assert browser.evaluate(shown) == [False, False]

    alike = request(when=time.time(), path="/again")
    running.serve_web(
        request(path="/\u00e9", up=1500, down=20_000_000, seconds=12.0), alike, alike, hostile_request(),
        request(status=404), request(method="", host="", path="", status=0, first=None, backend=None,
                                     reason="bad_request", detail="<img src=x onerror=alert(3)>"))
    running.collected()
    wait_until(lambda: browser.evaluate("refresh()") or browser.evaluate(shown) == [True, True], what="the requests")
    rows = lines(browser, "requests")
    assert [row[1:] for row in rows] == [
        [f"{HOST}:4711", "could not be read\nbad request: <img src=x onerror=alert(3)>", "", "none", "", "4 ms", "0 B",
         "2 B"],
        [f"{HOST}:4711", "GET web.example.com/a", "tcp:192.0.2.1:80", "404", "3 ms", "4 ms", "0 B", "2 B"],
        rows[2][1:],
        *[[f"{HOST}:4711", "GET web.example.com/again", "tcp:192.0.2.1:80", "200", "3 ms", "4 ms", "0 B", "2 B"]] * 2,
        [f"{HOST}:4711", "GET web.example.com/?", "tcp:192.0.2.1:80", "200", "3 ms", "12 s", "1.5 kB", "20.0 MB"]]
    assert rows[2][2].startswith('<b>x</b>"') and rows[2][4] == "502"
    assert browser.evaluate("document.querySelectorAll('main b').length + document.images.length") == 0
    assert browser.evaluate("[...document.querySelectorAll('#requests td.number:nth-child(5)')].map((cell) =>"
                            " cell.className)") == ["number bad", "number warn", "number bad", *["number "] * 3]
    assert browser.text("requests-count") == "1 unanswered, 3 2xx, 1 4xx, 1 5xx"
    wait_until(lambda: browser.evaluate("refresh()") or browser.text("tile-requests").split("\n")[2] == "6 in all",
               what="the tile")
    assert re.fullmatch(r"[\d.]+/s", browser.text("tile-requests").split("\n")[1])

    for width in (1300, 800, 400):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
                     mobile=width < 500)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    complaints = browser.happened("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert complaints == []


def test_claimed_names_in_a_browser(browser, claiming, run_admin):
    """Where there is no registry nothing of it is there; then the names, as text, whose they are and until when."""
    card = "document.getElementById('claims-card').offsetHeight > 0"
    browser.call("Page.navigate", url=f"http://{HOST}:{run_admin().admin.address[1]}/")
    wait_until(lambda: browser.evaluate("document.getElementById('phase')?.innerText") == "running", what="the page")
    assert browser.evaluate(card) is False

    there = claiming()
    there.claim("shop.tun.example.com", owner="<b>alice</b>")
    there.claim("bad.tun.example.com", "tcp:<img src=x onerror=alert(1)>:80")
    there.suspend("bad.tun.example.com")
    there.claim(there.port, while_connected=True)
    there.claim("gone.tun.example.com")
    there.release("gone.tun.example.com")
    browser.call("Page.navigate", url=f"http://{HOST}:{there.running.admin.address[1]}/")
    wait_until(lambda: len(lines(browser, "claims")) == 3, what="the names")
    assert browser.evaluate(card) is True and browser.text("claims-count") == "3, 1 held, in memory"
    rows = lines(browser, "claims")
    assert [row[:4] for row in rows] == [
        ["suspended", "bad.tun.example.com", "alice", "tcp:<img src=x onerror=alert(1)>:80"],
        ["claimed", "shop.tun.example.com", "<b>alice</b>", "tcp:192.0.2.1:80"],
        ["claimed", there.port, "alice", "tcp:192.0.2.1:80"]]
    assert re.fullmatch("(59|60) min|1 h", rows[1][4]) and rows[2][4] == "while connected"
    there.registrar.door.loop.call(lambda: there.registrar.registry.freeze(True))
    wait_until(lambda: browser.evaluate("refresh()") or browser.text("claims-count").endswith(", which is away"),
               what="the store's end")
    for width in (1300, 400):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
                     mobile=width < 500)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelectorAll('main b').length + document.images.length") == 0
    complaints = browser.happened("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert complaints == []
