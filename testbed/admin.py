"""What the tests of admin, metrics and page share.

    run_admin                    run_admin(*options) -> Running: a router and its admin
    claiming                     claiming(*options) -> Claiming: the same with a registry, and claims in it
    ask, tell, metrics           send a request to the admin, read the answer
    parse_metrics                a strict reader of Prometheus' text format
    browser                      a headless Chromium with one page
    hurry                        shorter pauses in the admin

A test module asks for `hurry` once for all its tests: `pytestmark = pytest.mark.usefixtures("hurry")`.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import math
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple

import pytest

import sniroute_admin
import sniroute_log
import sniroute_metrics
import sniroute_registrar
import sniroute_router
import sniroute_settings
from sniroute_admin import Admin, attach
from sniroute_doctor import sample_hello
from sniroute_launchers import cloudflared_launcher
from sniroute_registry import Registry, Result
from sniroute_tunnels import TunnelTable
from sniroute_web import Web
from conftest import HOST, Address, connect, lasting, wait_until
from testbed.standins import Cloudflared

TOKEN = "a-token-of-the-tests"  # a request that changes something needs it
HOSTILE = "<b>x</b>\"\\\x1b[31m\n\r\u202e\u00e9{}"
TUNNEL = "--route=*.example.com=cloudflared:{name}"
DB = "cloudflared:db.example.com"


# -- a router and its admin --------------------------------------------------------------------


class Running:
    """A Router and its admin, with the router's loop in a thread of this process.  Used with `with`."""

    def __init__(self, *argv: str, program: str, token: str | None = TOKEN, listener: socket.socket | None = None,
                 admin: str | None = f"{HOST}:0"):
        settings = sniroute_settings.load_settings(["--listen", f"{HOST}:0", *([f"--admin={admin}"] if admin else []),
                                                    *argv], {"SNIROUTE_ADMIN_TOKEN": token} if token else {})
        self.tunnels = TunnelTable({"cloudflared": cloudflared_launcher(program, {})}, settings.ports,
                                   idle=settings.idle, start_timeout=settings.start_timeout,
                                   max_tunnels=settings.max_tunnels, max_starting=settings.max_starting)
        self.settings = settings
        self.listener = listener
        self.router = sniroute_router.Router(settings, self.tunnels)
        self.thread = threading.Thread(target=self.router.serve_forever, name="loop")

    def __enter__(self) -> Running:
        self.tunnels.start()
        self.thread.start()
        try:
            self.admin = attach(self.router, self.settings, {"admin": self.listener} if self.listener else {})
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.admin.close()
        self.stop()

    def stop(self) -> None:
        self.router.shutdown()
        self.thread.join()
        self.tunnels.close(now=True)
        self.router.server_close()

    def connect(self, name: str) -> socket.socket:
        """A client that has sent its hello for `name`."""
        return connect(self.router.server_address, sample_hello(name))

    def refused(self, name: str) -> None:
        """Ask for a name as a client, and wait for the refusal."""
        with self.connect(name) as client:
            with contextlib.suppress(ConnectionResetError):
                while client.recv(4096):
                    pass

    def serve_web(self, *accesses: sniroute_log.Access) -> None:
        """From now on the router serves plain HTTP, as far as the admin can tell; these requests are over."""
        done = threading.Event()

        def act() -> None:
            self.router.web = Web(self.router, self.router.settings)
            for access in accesses:
                sniroute_log.log_access(self.router, access)
            done.set()

        self.router.call(act)
        assert done.wait(10)

    def collected(self) -> None:
        """Wait until all connections have ended and the admin has counted them; then drop its cached answers."""
        admin = self.admin
        wait_until(lambda: not self.router.connections, what="the end of all connections")
        wait_until(lambda: not admin.collector.endings and not admin.collector.accesses, what="the collector")
        turn = admin.due
        wait_until(lambda: admin.due != turn, what="the collector's next turn")
        turn = admin.due
        wait_until(lambda: admin.due != turn, what="the collector's next turn")
        admin.status.forget()
        admin.metrics.forget()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the admin collect and sample more often: to close it takes until its next turn."""
    monkeypatch.setattr(sniroute_admin, "COLLECT", 0.02)
    monkeypatch.setattr(sniroute_metrics, "SAMPLE", 0.1)


@pytest.fixture
def run_admin(cloudflared: Cloudflared) -> Iterator[Callable[..., Running]]:
    """run_admin(*options, program=..., token=..., listener=..., admin=...) -> Running, until the test ends.

    `cloudflared` is torn down after this fixture, and then checks that all stand-ins have ended.
    """
    with contextlib.ExitStack() as stack:
        yield lambda *argv, program=cloudflared.path, **more: stack.enter_context(
            Running(*argv, program=program, **more))


NAMES = f"""
[registry]
listen = "{HOST}:0"
domains = ["tun.example.com"]
targets = ["tcp"]
networks = ["192.0.2.0/24"]
ports = "49000-49009"
[registry.owners.alice]
token = "sha256:{'0' * 64}"
"""


class Claiming:
    """A router with an admin and a registry."""

    def __init__(self, running: Running, path: str, port: str):
        self.running = running
        self.port = port  # the key of one that may be claimed
        self.path = path  # of its file of settings
        self.registrar = sniroute_registrar.attach(running.router, running.settings.claims)

    def do(self, act: Callable[[Registry, Callable[[Result], None]], None]) -> Result:
        """Ask the registry in its thread, and wait for what comes of it."""
        results: list[Result] = []
        self.registrar.door.loop.call(lambda: act(self.registrar.registry, results.append))
        return wait_until(lambda: results, what="the registry")[0]

    def claim(self, key: str, target: str = "tcp:192.0.2.1:80", owner: str = "alice", **more: Any) -> Result:
        """Claim a name for an hour."""
        return self.do(lambda registry, done: registry.claim(key, owner, target, 3600.0, 600.0, done, **more))

    def release(self, key: str) -> Result:
        return self.do(lambda registry, done: registry.release(key, "alice", None, done, admin=True))

    def suspend(self, key: str) -> Result:
        return self.do(lambda registry, done: registry.suspend(key, True, done))

    def forget(self) -> None:
        """Drop the admin's cached answers."""
        self.running.admin.status.forget()
        self.running.admin.metrics.forget()


@pytest.fixture
def claiming(run_admin: Callable[..., Running], settings_file: Callable[[str], str],
             free_ports: Callable[..., tuple[int, int]]) -> Iterator[Callable[..., Claiming]]:
    """claiming(*options) -> Claiming, until the test ends."""
    with contextlib.ExitStack() as stack:
        def start(*options: str) -> Claiming:
            first, last = free_ports(10)
            path = settings_file(NAMES.replace("49000-49009", f"{first}-{last}"))
            claiming = Claiming(run_admin("-c", path, *options), path, f"tcp:{first}")
            stack.callback(claiming.registrar.close)
            return claiming
        yield start


# -- a client of the admin ---------------------------------------------------------------------


class Reply(NamedTuple):
    """An answer of the admin."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def read_reply(sock: socket.socket, method: str = "GET") -> Reply:
    """Read one answer.  `method` is that of the request: an answer to HEAD has no body."""
    response = http.client.HTTPResponse(sock, method=method)
    try:
        response.begin()
        return Reply(response.status, response.headers, response.read())
    finally:
        response.close()


def tell(address: Address | str, text: str | bytes, method: str = "GET") -> Reply:
    """Send these bytes, and read the answer."""
    with connect(address, text.encode("latin-1") if isinstance(text, str) else text) as sock:
        return read_reply(sock, method)


def ask(admin: Admin, path: str, method: str = "GET", host: str | None = "localhost", token: str | None = TOKEN,
        public: bool = False, **fields: str) -> Reply:
    """Send one request, and read its answer.  `fields` are further header fields, with `_` instead of `-`.

    `public`: at --admin-public, as a stranger does.
    """
    lines = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host is not None else [])]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return tell(admin.public if public else admin.address, "\r\n".join([*lines, "", ""]), method)


# -- what it answers ---------------------------------------------------------------------------

NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")


def parse_metrics(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Read Prometheus' text format, version 0.0.4, strictly: {sample name: {labels: value}}."""
    assert text.endswith("\n")
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = collections.defaultdict(dict)
    kinds: dict[str, str] = {}
    helped = name = ""
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            _, _, helped, words = line.split(" ", 3)
            assert helped not in kinds and words
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == helped and kind in ("counter", "gauge", "histogram")
            kinds[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            family = re.sub("_(bucket|sum|count)$", "", match[1]) if kinds[name] == "histogram" else match[1]
            assert family == name, f"{line}: not behind its TYPE"
            labels = tuple((key, re.sub(r"\\(.)", lambda escaped: {"n": "\n"}.get(escaped[1], escaped[1]), value))
                           for key, value in re.findall(LABEL, match[2] or ""))
            assert len(dict(labels)) == len(labels) and labels not in samples[match[1]], line
            samples[match[1]][labels] = float(match[match.re.groups])
    for name, kind in kinds.items():
        assert kind != "counter" or name.endswith("_total"), name
        if kind == "histogram":
            several: dict[tuple[tuple[str, str], ...], dict[float, float]] = collections.defaultdict(dict)
            for (*labels, (last, bound)), count in samples[f"{name}_bucket"].items():
                assert last == "le"
                several[tuple(labels)][float(bound)] = count
            assert set(several) == set(samples[f"{name}_count"]) == set(samples[f"{name}_sum"])
            for labels, buckets in several.items():
                assert list(buckets) == sorted(buckets) and math.isinf(max(buckets))
                assert list(buckets.values()) == sorted(buckets.values()), "cumulative"
                assert buckets[math.inf] == samples[f"{name}_count"][labels] and samples[f"{name}_sum"][labels] >= 0
        else:
            assert all(value >= 0 for value in samples[name].values())
    return dict(samples)


def metrics(running: Running) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Ask for /metrics, and parse the answer with `parse_metrics`."""
    reply = ask(running.admin, "/metrics")
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse_metrics(reply.body.decode())


def value(samples: dict, name: str, **labels: str) -> float:
    """One sample out of `metrics`; its labels have to be in the order of the text."""
    return samples[name][tuple(labels.items())]


def hostile_ending(reason: str = "no_route", name: str | None = HOSTILE) -> sniroute_log.Ending:
    """The Ending of a connection with HOSTILE in every field that holds text."""
    return sniroute_log.Ending(20, time.time(), (HOST, 4711), name, HOSTILE, HOSTILE, 1, 2, 3.0, reason, HOSTILE, None)


def request(**changes: Any) -> sniroute_log.Access:
    """The Access of a request that went well, but for the changes."""
    row = sniroute_log.Access(time.time(), (HOST, 4711), "GET", "web.example.com", "/a", 200, 0, 2, 0.003, 0.004,
                              "web.example.com", "tcp:192.0.2.1:80", "", None)
    return row._replace(**changes)


def hostile_request(**changes: Any) -> sniroute_log.Access:
    """An Access with HOSTILE in every field that holds text."""
    return request(method=HOSTILE, host=HOSTILE, path=HOSTILE, backend=HOSTILE, detail=HOSTILE, status=502,
                   reason="backend")._replace(**changes)


# -- a browser ---------------------------------------------------------------------------------

# Chromium reads DevTools requests from descriptor 3, and writes answers and events to 4.
ON_3_AND_4 = ("import fcntl, os, sys; "
              "reader, writer = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]); "
              "os.dup2(reader, 3); os.dup2(writer, 4); os.execv(sys.argv[3], sys.argv[3:])")


SILENCE = 40  # seconds in which a browser has to say something
STARTS = 3  # of a browser


class Browser:
    """A headless Chromium with one page, driven by the DevTools protocol over pipes.  *.example.com is this host."""

    def __init__(self, program: str, directory: pathlib.Path):
        orders, self.writer = os.pipe()
        self.reader, answers = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", ON_3_AND_4, str(orders), str(answers), program, "--headless=new",
             "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
             "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={directory}",
             f"--host-resolver-rules=MAP *.example.com {HOST}, MAP *.example.com. {HOST}"],
            pass_fds=(orders, answers), start_new_session=True, env={**os.environ, "HOME": str(directory)},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(orders)
        os.close(answers)
        self.said = b""
        self.number = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []

    def starts(self) -> bool:
        """Whether it answers at all.  One Chromium in many hangs while it starts, on a host that is busy."""
        try:
            self.call("Browser.getVersion")
        except AssertionError:
            return False
        return True

    @contextlib.contextmanager
    def page(self) -> Iterator[Browser]:
        """While the block runs, it has one page, which is empty: no cookie, no storage and no event of another one."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        yield self
        self.session = None
        self.call("Target.disposeBrowserContext", browserContextId=context)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.reader)
        os.close(self.writer)

    def read(self) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self.said:
            assert select.select([self.reader], [], [], SILENCE)[0], "the browser says nothing"
            data = os.read(self.reader, 1 << 20)
            assert data, "the browser has ended"
            self.said += data
        message, _, self.said = self.said.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result.  Events that come before it are kept in `events`."""
        self.number += 1
        order = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            order["sessionId"] = self.session
        os.write(self.writer, json.dumps(order).encode() + b"\0")
        while (message := self.read()).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def visit(self, url: str) -> str:
        """The page at an address, whatever its certificate, once it is there: its HTML, or why there is none."""
        self.call("Security.setIgnoreCertificateErrors", ignore=True)
        failed = self.call("Page.navigate", url=url).get("errorText", "")
        self.evaluate("""new Promise(done => document.readyState == "complete" ? done()
                                             : addEventListener("load", () => done()))""")
        return failed or self.evaluate("document.documentElement.outerHTML")

    def text(self, element: str) -> str:
        """The text of the element with this id, as it is shown."""
        return self.evaluate(f"document.getElementById({element!r}).innerText")

    def happened(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of all events so far that have one of these names."""
        return [event["params"] for event in self.events if event["method"] in methods]


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    """A browser without a page; without a Chromium the test is skipped."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not here (Debian package chromium)")
    for _ in range(STARTS):
        with contextlib.closing(Browser(program, tmp_path_factory.mktemp("browser"))) as found:
            if found.starts():
                lasting.add(found.process.pid)
                yield found
                return
    pytest.fail(f"{program} has not started in {STARTS} tries")


@pytest.fixture
def browser(chromium) -> Iterator[Browser]:
    """A browser with an empty page."""
    with chromium.page():
        yield chromium
