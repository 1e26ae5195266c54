"""Tests of sniroute_page.py: what its policy allows, and the page itself in a real browser."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from conftest import HOST, echo, wait_until
from testbed.admin import DB, TOKEN, TUNNEL, ask, hostile_ending
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


def test_page_in_a_browser(browser, run_admin, serve, cloudflared, ports):
    """It shows what is there, as text; its orders are followed; it asks nobody else, and complains of nothing."""
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
