"""Real clients of plain HTTP, as users bring them: curl, Python's own, a browser, wrk; and real servers behind TLS.

All names are asked for on one port, as in the quick start.  testbed/web.py has the backends.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import random
import re
import ssl
import subprocess
import urllib.error
import urllib.request
from typing import Any, Callable

import pytest

from conftest import HOST, Address, wait_until
from testbed.clients import Certificate, page, program_path
from testbed.program import Program, execute
from testbed.running import route
from testbed.web import (TEXT, UPGRADE, WEB, Chat, Talk, answering, call, check_refusal, chunks, frame, pixels,
                         read_frame, reply, request, table, telling)

FORWARD = "--http=forward"


@pytest.fixture
def program(launch, origin) -> Program:
    """The real program, which leads WEB to a backend that tells what it was asked."""
    return launch(FORWARD, route(origin(telling).address, WEB))


# -- curl --------------------------------------------------------------------------------------


def curl(program: Program, *words: str, said: bytes = b"", name: str = WEB, path: str = "/",
         code: tuple[int, ...] = (0,)) -> bytes:
    """What curl shows; `code` has the exit codes that will do."""
    port = program.address[1]
    ended = execute(program_path("curl", "curl"), "-sS", "--noproxy", "*", "--max-time", "20", "--resolve",
                    f"{name}:{port}:{HOST}", *words, f"http://{name}:{port}{path}", said=said)
    assert ended.returncode in code, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2", "--http0.9"])
def test_curl_of_each_version(program, version):
    """--http2 offers h2c in an upgrade, and goes on in HTTP/1.1."""
    heard = curl(program, version, path="/a?b=c")
    assert heard.startswith(b"GET /a?b=c HTTP/1.1\r\nHost: web.example.com") and b"curl/" in heard
    assert b"\r\nX-Forwarded-For: 127.0.0.1\r\n" in heard and b"pgrade" not in heard


def test_curl_by_prior_knowledge_of_http2_is_told(program):
    """In HTTP/2's own words: curl ends with an error of that protocol at once, instead of waiting."""
    assert curl(program, "--http2-prior-knowledge", code=(16, 56, 92)) == b""


@pytest.mark.parametrize("words", [["-H", "Transfer-Encoding: chunked"],
                                   ["--expect100-timeout", "30", "-H", "Expect: 100-continue"], [], ["-H", "Expect:"]],
                         ids=["chunked", "100-continue", "as it likes", "at once"])
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_curl_uploads(launch, origin, words, size):
    def script(talk: Talk) -> None:
        head = talk.head()
        if head.get("Expect"):
            talk.say(b"HTTP/1.1 100 Continue\r\n\r\n")
        talk.say(reply(talk.body(head)))

    payload = random.Random(18).randbytes(size)
    program = launch(FORWARD, route(origin(script).address, WEB))
    assert curl(program, "-X", "PUT", "--data-binary", "@-", *words, said=payload) == payload


def test_curl_asks_for_a_head(program):
    assert curl(program, "--head").startswith(b"HTTP/1.1 200 OK\r\n")


def test_curl_asks_several_times_on_one_connection(launch, origin):
    backend = origin(telling)
    program = launch(FORWARD, route(backend.address, WEB))
    port = program.address[1]
    heard = curl(program, f"http://{WEB}:{port}/1", "-w", "|%{num_connects}|", f"http://{WEB}:{port}/2", "-d", "x=y")
    assert heard.count(b"HTTP/1.1\r\n") == 3 and re.findall(rb"\|(\d)\|", heard) == [b"1", b"0", b"0"]
    assert len(backend.talks) == 1


def test_curl_gets_the_whole_of_a_large_answer_and_an_error_for_one_that_is_cut(launch, origin):
    body = random.Random(19).randbytes(5_000_000)

    def script(talk: Talk) -> None:
        asked = talk.request()
        if asked.target == "/whole":
            talk.say(reply(body))
        elif asked.target == "/chunks":
            talk.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(body[:9], body[9:]))
        else:
            talk.say(reply(body)[:-1])
            talk.finish()

    program = launch(FORWARD, route(origin(script).address, WEB))
    for version in ("--http1.0", "--http1.1"):
        assert curl(program, version, path="/whole") == body == curl(program, version, path="/chunks")
    assert len(curl(program, path="/cut", code=(18, 56))) < len(body)


def test_curl_is_told_why_it_is_refused(program):
    heard = curl(program, "-i", name="other.example.org").decode()
    assert heard.startswith("HTTP/1.1 404 ") and "no route fits the name" in heard.partition("\r\n\r\n")[2]
    assert "Proxy-Status: sniroute; error=" in heard and "<html" not in heard
    heard = curl(program, "-i", "-H", "Accept: text/html", name="other.example.org").decode()
    assert "Content-Type: text/html" in heard and "<html" in heard and "No route fits the name" in heard


def test_curl_follows_a_redirect_to_tls_on_the_same_port(launch, serve, certificate):
    """One listener is both addresses."""
    program = launch("--http=redirect", route(serve(page(certificate)).address, WEB))
    heard = curl(program, "--location", "--cacert", str(certificate.file), "-w", "%{url_effective}", path="/a?b=c")
    assert heard == f"<p>This is {WEB} indeed</p>https://{WEB}:{program.address[1]}/a?b=c".encode()


def test_curl_through_a_route_that_passes(launch, origin):
    program = launch("--http=pass", route(origin(telling).address, WEB))
    heard = curl(program, "-H", "X-Forwarded-For: 192.0.2.1", "-d", "x=y")
    assert b"\r\nX-Forwarded-For: 192.0.2.1\r\n" in heard and b"Via" not in heard and heard.endswith(b"\r\n\r\nx=y")


NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{ worker_connections 64; }}
http {{
    access_log off; client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
    uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
    server {{ listen {host}:{port} http2; location / {{ return 200 "$server_protocol $host $request_uri"; }} }}
}}
"""


def test_curl_in_http2_through_a_route_that_passes(launch, free_ports, tmp_path):
    """By prior knowledge; the name is in its first HEADERS."""
    port = free_ports(1)[0]
    (tmp_path / "conf").write_text(NGINX.format(folder=tmp_path, host=HOST, port=port))
    words = [program_path("nginx", "nginx"), "-e", "stderr", "-p", str(tmp_path), "-c", str(tmp_path / "conf")]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE) as process:
        try:
            def is_up() -> bool:
                assert process.poll() is None, process.stderr.read()
                with contextlib.suppress(OSError):
                    call((HOST, port)).__exit__()
                    return True
                return False

            wait_until(is_up, what="nginx")
            program = launch("--http=pass", route((HOST, port), WEB))
            assert curl(program, "--http2-prior-knowledge", path="/a?b=c") == f"HTTP/2.0 {WEB} /a?b=c".encode()
            assert curl(program, "--http2-prior-knowledge", name="other.example.org", code=(16, 56, 92)) == b""
        finally:
            process.terminate()
            process.communicate(timeout=20)


# -- Python's own ------------------------------------------------------------------------------


def test_http_client_on_a_connection_that_is_kept(program):
    with contextlib.closing(http.client.HTTPConnection(*program.address, timeout=20)) as client:
        for body in (None, b"hello", iter([b"hel", b"lo"]), io.BytesIO(b"x" * 300_000)):
            client.request("POST" if body else "GET", "/p", body, {"Host": WEB}, encode_chunked=not isinstance(
                body, (bytes, io.BytesIO, type(None))))
            with client.getresponse() as answer:
                heard = answer.read()
            assert answer.status == 200 and heard.startswith(b"POST /p" if body else b"GET /p")
        client.request("HEAD", "/p", headers={"Host": WEB})
        with client.getresponse() as answer:
            assert (answer.status, answer.read()) == (200, b"")


def test_urllib_asks_and_is_refused(program):
    host, port = program.address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    asked = urllib.request.Request(f"http://{host}:{port}/a", b"x=y", {"Host": WEB})
    with opener.open(asked, timeout=20) as answer:
        assert answer.read().endswith(b"\r\n\r\nx=y")
    with pytest.raises(urllib.error.HTTPError) as caught:
        opener.open(urllib.request.Request(f"http://{host}:{port}/", headers={"Host": "other.example.org"}), timeout=20)
    with contextlib.closing(caught.value) as answer:
        assert answer.code == 404 and b"no route fits the name" in answer.read()


def test_a_chat_by_websocket_between_two_clients(launch, origin):
    """Messages of all sizes, whole or cut anywhere; and each says goodbye."""
    chat = Chat()
    program = launch(FORWARD, route(origin(chat).address, WEB))
    texts = [b"hello", b"x" * 125, b"y" * 126, b"z" * 60_000]
    with call(program.address) as one, call(program.address) as two:
        for client in (one, two):
            client.say(request("GET", "/chat", *UPGRADE))
            assert client.answer().status == 101
        for text in texts:
            said = frame(text, masked=True)
            one.say(said[:1])
            one.say(said[1:])
            assert read_frame(one) == read_frame(two) == (TEXT, text)
        for client in (one, two):
            client.say(frame(b"", 8, masked=True))
            assert read_frame(client) == (8, b"")
            assert client.rest() == b"" and client.how == "end"
    assert chat.said == dict.fromkeys(texts, 1)


# -- a browser ---------------------------------------------------------------------------------

CHAT_PAGE = b"<!DOCTYPE html><title>chat</title><p id=said>"
SAY = """new Promise((done, failed) => {
    const chat = new WebSocket(`ws://${location.host}/chat`), heard = [];
    chat.onopen = () => ["good", "day"].forEach(text => chat.send(text));
    chat.onmessage = event => { heard.push(event.data); if (heard.length == 2) chat.close(); };
    chat.onclose = event => done([...heard, event.wasClean]);
    chat.onerror = failed;
})"""


def visit(browser: Any, url: str) -> str:
    """What a page shows, once it is there."""
    failed = browser.call("Page.navigate", url=url).get("errorText", "")
    browser.evaluate("""new Promise(done => document.readyState == "complete" ? done()
                                            : addEventListener("load", () => done()))""")
    return failed or browser.evaluate("document.body.innerText")


def test_a_browser_asks_for_three_names_on_one_port(launch, origin, serve, certificate, browser, settings_file):
    """One over TLS, by the name in its hello; two in plain, by Host; one of those is a chat by WebSocket."""
    chat = Chat(CHAT_PAGE)
    pages = answering(lambda asked: reply(f"<p>This is {asked.get('Host')}{asked.target}</p>".encode(),
                                          "Content-Type: text/html"))
    backends = {name: "tcp:%s:%d" % far.address for name, far in
                (("safe", serve(page(certificate))), ("web", origin(pages)), ("chat", origin(chat)))}
    program = launch("--config=" + settings_file("[routes]\n" + "\n".join([
        f'"safe.localhost" = {table(backends["safe"])}',
        f'"web.localhost" = {table(backends["web"], http="forward")}',
        f'"chat.localhost" = {table(backends["chat"], http="forward")}', ""])))
    port = program.address[1]
    browser.call("Security.setIgnoreCertificateErrors", ignore=True)
    assert visit(browser, f"https://safe.localhost:{port}/") == "This is safe.localhost indeed"
    assert visit(browser, f"http://web.localhost:{port}/a?b=c") == f"This is web.localhost:{port}/a?b=c"
    visit(browser, f"http://chat.localhost:{port}/")
    assert browser.evaluate(SAY) == ["good", "day", True]
    assert chat.said == {b"good": 1, b"day": 1}
    assert visit(browser, f"http://web.localhost:{port}/again").endswith("/again")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_error_page_is_a_page_to_look_at(launch, origin, browser, scheme):
    """It says the name, the reason and what to do; and there is something to see in its screenshot."""
    program = launch(FORWARD, route(origin(telling).address, "web.localhost"))
    browser.call("Emulation.setDeviceMetricsOverride", width=500, height=400, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    shown = visit(browser, f"http://nobody.localhost:{program.address[1]}/<b>x</b>?<script>")
    assert "nobody.localhost" in shown and "no route fits the name" in shown.lower(), shown
    assert browser.evaluate("document.scripts.length") == 0 and browser.evaluate("document.title")
    assert browser.evaluate("getComputedStyle(document.body).fontSize") >= "16px"
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    png = browser.call("Page.captureScreenshot", format="png")["data"]
    picture = base64.b64decode(png)
    colours = pixels(picture)
    total = sum(colours.values())
    (ground, most), *_ = colours.most_common(1)
    assert total > 100_000 and 0.5 * total < most < 0.999 * total and len(colours) > 10, colours.most_common(5)
    assert (sum(ground) < 3 * 128) == (scheme == "dark"), ground
    assert any(abs(sum(colour) - sum(ground)) > 3 * 128 for colour in colours), "text that can be read"


def test_a_page_of_another_site_cannot_have_the_browser_post(launch, origin, browser, settings_file):
    """With `cross_site = "refuse"`; the user who follows a link is served."""
    outside, inside = origin(answering(reply(b"<p>outside</p>", "Content-Type: text/html"))), origin(answering(
        reply(b"<p>inside</p>", "Content-Type: text/html")))
    program = launch("--config=" + settings_file("[routes]\n" + "\n".join([
        f'"outside.localhost" = {table("tcp:%s:%d" % outside.address, http="forward")}',
        f'"inside.localhost" = {table("tcp:%s:%d" % inside.address, http="forward", cross_site="refuse")}', ""])))
    port = program.address[1]
    assert visit(browser, f"http://outside.localhost:{port}/") == "outside"
    there = f"http://inside.localhost:{port}/"
    browser.evaluate(f'fetch("{there}evil", {{method: "POST", body: "x", mode: "no-cors"}}).then(() => 1)')
    browser.evaluate(f'new Promise(done => {{ const picture = new Image(); picture.onerror = () => done(1); '
                     f'picture.src = "{there}evil"; }})')
    browser.evaluate(f'document.body.innerHTML = `<a id=link href="{there}">x</a>`')
    assert visit(browser, there) == "inside"
    assert b"evil" not in inside.heard and b"GET / " in inside.heard


# -- a crowd -----------------------------------------------------------------------------------

COUNTING = """
done = function(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format("%d %d\\n", summary.requests, errors.connect + errors.read + errors.write + errors.status
                           + errors.timeout))
end
"""


@pytest.mark.parametrize("lines", [[], ["Connection: close"]], ids=["kept", "new"])
def test_wrk_gets_its_answers(launch, origin, tmp_path, lines):
    """Each is served, and each is counted."""
    backend = origin(answering(reply(b"hello")))
    program = launch(FORWARD, route(backend.address, WEB))
    script = tmp_path / "count.lua"
    script.write_text(COUNTING)
    ended = execute(program_path("wrk", "wrk"), "-t1", "-c4", "-d1s", "-s", str(script), "-H", f"Host: {WEB}",
                    *(word for line in lines for word in ("-H", line)), "http://%s:%d/" % program.address)
    served, failed = map(int, ended.stdout.decode().splitlines()[-1].split())
    assert (ended.returncode, failed) == (0, 0) and served > 50, ended.stdout


# -- forward-tls -------------------------------------------------------------------------------


@pytest.fixture
def secure(certificate: Certificate, origin) -> Callable[..., Address]:
    """secure(asks=False) -> (address, names): a backend that speaks HTTPS as *.example.com.

    `names`: what it was asked for; `asks`: it wants a certificate of its client, too.
    """
    def start(asks: bool = False) -> tuple[Address, list[str | None]]:
        names: list[str | None] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        context.sni_callback = lambda sock, name, context: names.append(name)
        if asks:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(certificate.file)

        def script(talk: Talk) -> None:
            with context.wrap_socket(talk.sock, server_side=True) as tls:
                telling(Talk(tls))
        return origin(script).address, names

    return start


def secured(launch: Callable[..., Program], settings_file: Callable[[str], str], address: Address, name: str = WEB,
            **options: Any) -> Program:
    return launch("--config=" + settings_file(
        f'[routes]\n"{name}" = {table("tcp:%s:%d" % address, http="forward-tls", **options)}\n'))


def test_plain_requests_go_on_over_tls_that_is_verified(launch, settings_file, secure, certificate):
    address, names = secure()
    program = secured(launch, settings_file, address, verify=str(certificate.file))
    with call(program.address) as client:
        for size in (0, 10, 300_000):
            client.say(request("POST", "/p", body=b"x" * size))
            heard = client.answer()
            assert heard.status == 200 and heard.body.endswith(b"\r\n\r\n" + b"x" * size)
            assert b"X-Forwarded-Proto: http\r\n" in heard.body
    assert names == [WEB], "one handshake for a client that stays"


def test_the_name_that_is_asked_for_and_verified_is_that_of_host(launch, settings_file, secure, certificate):
    address, names = secure()
    program = secured(launch, settings_file, address, verify=str(certificate.file), name="other.example.org",
                      host="inner.example.com")
    with call(program.address, request(host="other.example.org")) as client:
        assert b"\r\nHost: inner.example.com\r\n" in client.answer().body
    assert names == ["inner.example.com"]


@pytest.mark.parametrize("options, name", [({}, WEB), ({"verify": True}, WEB),
                                           ({"verify": "own"}, "other.example.org")],
                         ids=["by default", "by the system", "another name"])
def test_a_backend_that_cannot_be_verified_is_not_asked(launch, settings_file, secure, certificate, options, name):
    address, _ = secure()
    if options.get("verify") == "own":
        options = {"verify": str(certificate.file)}
    program = secured(launch, settings_file, address, name, **options)
    with call(program.address, request("GET", "/secret", host=name)) as client:
        check_refusal(client.answer(), 502)
    program.wait_for("certificate")


def test_without_verification_any_certificate_will_do(launch, settings_file, secure):
    address, names = secure()
    program = secured(launch, settings_file, address, "other.example.org", verify=False)
    with call(program.address, request(host="other.example.org")) as client:
        assert client.answer().status == 200
    assert names == ["other.example.org"]


def test_a_backend_that_wants_a_certificate_of_its_client_is_502(launch, settings_file, secure, certificate):
    address, _ = secure(asks=True)
    program = secured(launch, settings_file, address, verify=str(certificate.file))
    with call(program.address, request()) as client:
        check_refusal(client.answer(), 502)


def test_a_backend_that_speaks_no_tls_is_502(launch, settings_file, origin, certificate):
    plain = origin(lambda talk: talk.say(b"HTTP/1.1 400 Bad Request\r\n\r\n") or talk.finish())
    program = secured(launch, settings_file, plain.address, verify=str(certificate.file))
    with call(program.address, request()) as client:
        check_refusal(client.answer(), 502)


def test_an_answer_over_tls_that_ends_without_a_goodbye_is_never_whole(launch, settings_file, certificate, origin):
    """Without a length only TLS can say where the body ends (RFC 8446 section 6.1)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def script(talk: Talk) -> None:
        tls = context.wrap_socket(talk.sock, server_side=True, suppress_ragged_eofs=False)
        with tls:
            asked = Talk(tls).request()
            tls.sendall(b"HTTP/1.1 200 OK\r\n\r\nhello")
            if asked.target == "/whole":
                tls.unwrap()

    program = secured(launch, settings_file, origin(script).address, verify=str(certificate.file))
    with call(program.address, request("GET", "/whole")) as client:
        assert client.answer().body == b"hello"
    with call(program.address, request("GET", "/cut")) as client:
        client.rest()
        assert client.how == "reset"


def test_a_websocket_goes_on_over_tls(launch, settings_file, certificate, origin):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    chat = Chat()

    def script(talk: Talk) -> None:
        with context.wrap_socket(talk.sock, server_side=True) as tls:
            chat(Talk(tls))

    program = secured(launch, settings_file, origin(script).address, verify=str(certificate.file))
    with call(program.address, request("GET", "/", *UPGRADE) + frame(b"hello", masked=True)) as client:
        assert client.answer().status == 101 and read_frame(client) == (TEXT, b"hello")
