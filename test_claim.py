"""Tests of sniroute_claim.py: `sniroute.py claim` as a process beside a service, and its Claimer alone."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_claim
from conftest import HOST, FakeClock, exit_code, wait_until
from sniroute_claim import (LOST, OURS, OVER, REFUSED, RETRY_LAST, SEEKING, Beside, Claimer, Place, Registry, Unable,
                            keep, parse_place, say)
from sniroute_owners import digest_of
from testbed.program import PROGRAM, command, environment
from testbed.registry import ALICE, BOB, DOMAIN, Served, table_of

SHOP = f"shop.{DOMAIN}"
TARGET = "tcp:192.0.2.1:80"
FOR_EVER = sys.executable, "-c", "import signal; signal.pause()"


# -- the process ---------------------------------------------------------------------------------


class Child:
    """`sniroute.py claim`, as users run it."""

    def __init__(self, url: str, words: tuple[str, ...], token: str | None):
        env = environment(**({"SNIROUTE_REGISTRY_TOKEN": token} if token is not None else {}))
        self.process = subprocess.Popen((sys.executable, str(PROGRAM), "claim", f"--registry={url}", *words), env=env,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.said: list[str] = []
        self.printed: list[str] = []
        self.threads = [threading.Thread(target=self._read, args=each, name="reader")
                        for each in ((self.process.stdout, self.printed), (self.process.stderr, self.said))]
        for thread in self.threads:
            thread.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        with stream:
            for line in stream:
                lines.append(line.decode().rstrip("\n"))

    def wait(self) -> int:
        """Its exit code, once all that it has said is there."""
        code = exit_code(self.process, 20)
        for thread in self.threads:
            thread.join()
        return code

    def prints(self, text: str, count: int = 1) -> None:
        wait_until(lambda: self.printed.count(text) >= count, what=f"{text!r}; {self.printed}, {self.said}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.wait()


@pytest.fixture
def claim() -> Iterator[Callable[..., Child]]:
    """claim(registry or URL, *words, token=...) -> Child."""
    with contextlib.ExitStack() as stack:
        def begin(where: Any, *words: str, token: str | None = ALICE) -> Child:
            url = where if isinstance(where, str) else f"http://{HOST}:{where.address[1]}"
            child = Child(url, words, token)
            stack.callback(lambda: (child.process.kill(), child.wait()))
            return child

        yield begin


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_name_is_printed_kept_and_given_back(registry, claim, number):
    there = registry()
    child = claim(there, "shop", TARGET, "--ttl=60s", "--allow", "192.0.2.0/24", "--meta", "version=1.2")
    child.prints(SHOP)
    found = there.registry.table.find(SHOP)
    assert (found.ttl, found.allow, found.meta) == (60, ("192.0.2.0/24",), {"version": "1.2"})
    assert child.stop(number) == 0
    assert there.registry.table.find(SHOP) is None and child.said == []


@pytest.mark.parametrize("words, name", [
    (("-", TARGET), rf"[a-z0-9]{{10}}\.{DOMAIN}"), (("tcp:49003", TARGET), "tcp:49003"),
    (("tcp", TARGET), r"tcp:490\d\d"),
    ((f"X.{DOMAIN}.", TARGET), f"x.{DOMAIN}")])
def test_what_may_be_claimed(registry, claim, words, name):
    child = claim(registry(), *words)
    wait_until(lambda: child.printed, what="the name")
    assert re.fullmatch(name, child.printed[0])
    assert child.stop() == 0


def test_a_command_runs_beside_the_claim(registry, claim):
    """It knows the name, not the token; its end is the end of the claim, and its exit code ours."""
    there = registry()
    child = claim(there, "shop", TARGET, "--", sys.executable, "-c",
                  "import json, os, sys; print(json.dumps(dict(os.environ))); sys.exit(7)")
    assert child.wait() == 7
    assert child.printed[0] == SHOP
    environ = json.loads(child.printed[1])
    assert environ["SNIROUTE_NAME"] == SHOP and not [key for key, value in environ.items() if ALICE in value]
    assert there.registry.table.find(SHOP) is None and there.registry.events.counts["claimed"] == 1


@pytest.mark.parametrize("code, ended", [
    ("import signal; print('up', flush=True); signal.pause()", 128 + signal.SIGTERM),
    ("import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nprint('up', flush=True)\n"
     "signal.pause()", 5)])
def test_a_signal_ends_the_command_too(registry, claim, code, ended):
    there = registry()
    child = claim(there, "shop", TARGET, "--", sys.executable, "-c", code)
    child.prints("up")
    assert child.stop() == ended
    assert there.registry.table.find(SHOP) is None


def test_a_command_that_is_not_there_is_told_and_the_name_given_back(registry, claim):
    there = registry()
    child = claim(there, "shop", TARGET, "--", "/nonexistent/program")
    assert child.wait() == 1 and child.said == [
        "sniroute claim: the command /nonexistent/program cannot be started: no such file or directory"]
    assert there.registry.table.find(SHOP) is None


TAKES_IT = """
import http.client, json, signal, sys
registry = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
registry.request("POST", "/routes", json.dumps({"name": "shop", "target": sys.argv[2]}),
                 {"Host": "localhost", "Authorization": "Bearer " + sys.argv[3]})
assert registry.getresponse().status == 200
signal.pause()
"""


def test_a_name_that_is_taken_over_is_not_taken_back(registry, monkeypatch, capfd):
    """The command is ended, and the exit code says that it did not end by itself."""
    monkeypatch.setattr(sniroute_claim, "SHARE", 10_000)
    monkeypatch.setattr(sniroute_claim, "SHORTEST", 0.02)
    there = registry()
    claimer = Claimer(Registry(Place("http", HOST, there.address[1]), ALICE), {"name": "shop", "target": TARGET}, say)
    code = (sys.executable, "-c", TAKES_IT, str(there.address[1]), TARGET, ALICE)
    assert keep(claimer, Beside(list(code), claimer.woken), []) == 1
    assert capfd.readouterr() == (f"{SHOP}\n",
                                  f"sniroute claim: {SHOP}: another client of this owner has taken it over\n")
    assert there.registry.table.find(SHOP).generation == 2


@pytest.mark.parametrize("words, token, said", [
    (("www", TARGET), ALICE, f"www: name: www.{DOMAIN} is reserved"),
    (("shop", "tcp:10.0.0.1:1"), ALICE, "shop: target: 10.0.0.1 is in none of the networks"),
    (("shop", TARGET), "wrong", "shop: the token is missing or wrong"),
    (("taken", TARGET), ALICE, f"taken: taken.{DOMAIN} is another owner's"),
    (("mine", TARGET, "--no-takeover"), ALICE, f"mine: mine.{DOMAIN} is yours already"),
    (("shop", TARGET, "--ttl=1"), ALICE, "shop: ttl: 1 is not a whole number of seconds from 5"),
    (("shop", TARGET, "--http=maybe"), ALICE, "shop: http: 'maybe' is none of"),
])
def test_a_claim_that_is_refused_says_why(registry, claim, words, token, said):
    there = registry()
    assert there.claim("taken", token=BOB).status == there.claim("mine").status == 201
    child = claim(there, *words, token=token)
    assert child.wait() == 1 and child.printed == []
    assert len(child.said) == 1 and child.said[0].startswith(f"sniroute claim: {said}")


@pytest.mark.parametrize("words, token, said", [
    ((), "x", "claim takes a NAME and a TARGET"),
    (("shop",), "x", "claim takes a NAME and a TARGET"),
    (("shop", TARGET, "more"), "x", "claim takes a NAME and a TARGET"),
    (("shop", TARGET), "", "put the token into SNIROUTE_REGISTRY_TOKEN"),
    (("shop", TARGET), "a b", "put the token into SNIROUTE_REGISTRY_TOKEN"),
    (("shop", TARGET, "--what=1"), "x", "unknown option '--what=1'"),
    (("shop", TARGET, "--ttl"), "x", "--ttl:  needs a value"),
    (("shop", TARGET, "--ttl=1h"), "x", "--ttl: 1h is no number of seconds"),
    (("shop", TARGET, "--meta=x"), "x", "--meta: x is not KEY=VALUE"),
    (("shop", TARGET, "--registry=ftp://host"), "x", "--registry: 'ftp://host' is not http://HOST:PORT"),
    (("shop", TARGET, "--registry=http://u:p@host"), "x", "is not http://HOST:PORT"),
])
def test_a_wrong_command_line_is_told(monkeypatch, capsys, words, token, said):
    monkeypatch.setenv("SNIROUTE_REGISTRY_TOKEN", token)
    assert sniroute_claim.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_a_wrong_command_line_is_told_by_the_program():
    ended = command("claim", "shop")
    assert (ended.returncode, ended.stdout) == (2, "") and "claim takes a NAME and a TARGET" in ended.stderr
    assert command("claim", "--help").stdout == sniroute_claim.USAGE


def test_a_token_and_its_hash_fit_each_other():
    ended = command("token")
    secret, digest = re.findall(r"SNIROUTE_REGISTRY_TOKEN=(\S+)\n.*\"sha256:(\w+)\"", ended.stdout)[0]
    assert ended.returncode == 0 and digest_of(secret).hex() == digest
    assert command("token", "more").returncode == 2


def test_by_a_unix_socket(routed, claim, admin_path):
    there = routed(listen=f"unix:{admin_path}")
    child = claim(f"unix:{admin_path}", "shop", "tcp:127.0.0.1:1")
    child.prints(SHOP)
    assert there.registrar.table.find(SHOP)
    assert child.stop() == 0 and there.registrar.table.find(SHOP) is None


def test_a_router_that_has_begun_anew_gets_the_name_again(launch, claim, free_ports, tmp_path):
    """The command goes on meanwhile; the name is printed again."""
    port = free_ports(1)[0]
    path = tmp_path / "sniroute.toml"
    path.write_text(table_of(listen=f"{HOST}:{port}"))
    child = claim(f"http://{HOST}:{port}", "shop", "tcp:127.0.0.1:1", "--ttl=5", "--", *FOR_EVER)
    wait_until(lambda: child.said == [f"sniroute claim: http://{HOST}:{port}: Connection refused: trying again"])
    for count in (1, 2):
        router = launch("-c", str(path))
        child.prints(SHOP, count)
        router.code = -signal.SIGKILL
        router.signal(signal.SIGKILL)
        router.wait()
    assert child.process.poll() is None
    assert child.stop() == 128 + signal.SIGTERM
    assert child.said[-1] == (f"sniroute claim: {SHOP}: not released, since http://{HOST}:{port}: Connection refused; "
                              "it is free in 5 s")


# -- the Claimer ---------------------------------------------------------------------------------


class Claiming(Claimer):
    """A Claimer with a clock of the test."""

    def __init__(self, there: Served, **wish: Any):
        self.time = FakeClock()
        self.lines: list[str] = []
        super().__init__(Registry(Place("http", HOST, there.address[1]), ALICE),
                         {"name": "shop", "target": TARGET, **wish}, self.lines.append, self.time)


@pytest.fixture
def claiming() -> Iterator[Callable[..., Claiming]]:
    with contextlib.ExitStack() as stack:
        yield lambda *words, **wish: stack.enter_context(contextlib.closing(Closed(Claiming(*words, **wish)))).claimer


class Closed:
    def __init__(self, claimer: Claiming):
        self.claimer = claimer

    def close(self) -> None:
        self.claimer.registry.close()


def test_it_renews_at_a_third_of_the_time(registry, claiming):
    there = registry()
    claimer = claiming(there, ttl=60)
    assert claimer.step() == 20 and claimer.state is OURS
    for count in range(1, 4):
        assert claimer.step() == 20
        assert there.registry.events.counts["renewed"] == count
    assert len(there.gate.callers) == 1, "one connection is kept"
    claimer.release()
    assert there.registry.table.find(SHOP) is None and claimer.state is OVER and claimer.lines == []


def test_what_the_registry_has_forgotten_is_claimed_again(registry, claiming, capsys):
    there = registry()
    claimer = claiming(there)
    claimer.step()
    there.registry.table.drop(SHOP)
    assert claimer.step() == 0.0 and claimer.state is SEEKING
    assert claimer.step() > 0 and claimer.state is OURS and there.registry.table.find(SHOP).lease == claimer.lease
    assert claimer.lines == [f"{SHOP}: the registry does not know the claim any more: claiming it again"]
    assert capsys.readouterr().out == f"{SHOP}\n" * 2


def test_a_random_name_stays_the_same_when_it_is_claimed_again(registry, claiming):
    there = registry()
    claimer = claiming(there, name=None)
    claimer.step()
    name = claimer.name
    there.registry.table.drop(name)
    claimer.step()
    claimer.step()
    assert claimer.name == name and there.registry.table.find(name)


def test_who_has_taken_it_over_while_the_registry_was_away_keeps_it(registry, claiming):
    there = registry()
    claimer = claiming(there)
    claimer.step()
    there.registry.table.drop(SHOP)
    claimer.step()
    again = there.claim()
    with pytest.raises(Unable, match="is yours already"):
        claimer.step()
    assert claimer.state is REFUSED
    claimer.release()
    assert there.registry.table.find(SHOP).lease == again.json["lease"]


def test_a_claim_that_has_outlived_a_long_absence_is_still_ours(registry, claiming):
    """As of a file that is read again, or behind an outage of the store: the registry gives each claim another ttl."""
    there = registry()
    claimer = claiming(there, ttl=60)
    claimer.step()
    made, ask = there.registry.table.find(SHOP), claimer.registry.ask
    claimer.registry.ask = lambda *_: sniroute_claim.Answer(503, {}, 0.0)
    claimer.time.jump(61)
    claimer.step()
    assert claimer.state is SEEKING
    claimer.registry.ask = ask
    assert claimer.step() == 0.0
    assert claimer.step() == 20 and claimer.state is OURS
    assert there.registry.table.find(SHOP).lease == made.lease == claimer.lease
    claimer.release()
    assert there.registry.table.find(SHOP) is None


def test_who_has_taken_it_over_in_a_long_absence_keeps_it(registry, claiming):
    there = registry()
    claimer = claiming(there, ttl=60)
    claimer.step()
    again = there.claim()
    claimer.state = SEEKING
    assert claimer.step() == 0.0
    with pytest.raises(Unable, match="another client of this owner has taken it over"):
        claimer.step()
    assert claimer.state is LOST and there.registry.table.find(SHOP).lease == again.json["lease"]


def test_a_name_that_another_owner_has_meanwhile_is_waited_for(registry, claiming):
    there = registry(hold="off")
    claimer = claiming(there)
    claimer.step()
    there.registry.table.drop(SHOP, hold=False)
    claimer.step()
    other = there.claim(token=BOB)
    assert other.status == 201
    assert claimer.step() > 0 and claimer.state is SEEKING and f"{SHOP} is another owner's" in claimer.lines[-1]
    assert there.ask("DELETE", "/routes/shop", token=BOB, Sniroute_Lease=other.json["lease"]).status == 204
    claimer.step()
    assert claimer.state is OURS and claimer.lines[-1] == f"{SHOP}: all is well again"


def test_a_signal_while_the_registry_is_asked_starts_no_command(registry, claiming):
    there, signals = registry(), []
    claimer = claiming(there)
    ask = claimer.registry.ask
    claimer.registry.ask = lambda *words: (signals.append(signal.SIGTERM), claimer.woken.put(None), ask(*words))[2]
    beside = Beside(list(FOR_EVER), claimer.woken)
    assert keep(claimer, beside, signals) == 0
    assert beside.process is None and there.registry.table.find(SHOP) is None and claimer.state is OVER


def test_a_registry_that_is_away_is_asked_later_each_time(registry, claiming):
    there = registry()
    claimer = claiming(there, ttl=60)
    claimer.step()
    there.close()
    pauses = [claimer.step() for _ in range(8)]
    assert claimer.state is OURS and pauses[0] <= 0.5 and pauses[4] > pauses[1] and max(pauses) <= RETRY_LAST
    claimer.time.jump(61)
    claimer.step()
    assert claimer.state is SEEKING, "it may be another's by now"
    assert len(claimer.lines) == 1 and claimer.lines[0].endswith(": trying again"), "it is said once"
    claimer.release()
    assert claimer.state is OVER


def test_a_registry_that_is_too_busy_says_when(registry, claiming):
    there = registry()
    claimer = claiming(there)
    claimer.step()
    there.rest.is_ending = lambda: True
    there.registry.table.drop(SHOP)
    assert claimer.step() == 0.0
    assert claimer.step() >= 5 and claimer.state is SEEKING and "about to end" in claimer.lines[-1]
    there.rest.is_ending = lambda: False
    claimer.step()
    assert claimer.state is OURS


@pytest.mark.parametrize("after", [5.0, 0.0], ids=["with Retry-After", "silent"])
def test_a_name_that_is_ours_is_renewed_in_time_though_the_registry_has_asked_for_patience(registry, claiming, monkeypatch, after):
    """A store that is away says 5 seconds; two of these, and ten seconds are over."""
    there = registry()
    claimer = claiming(there, ttl=10)
    claimer.time.jump(claimer.step())
    busy = sniroute_claim.Answer(503, {"error": "the store does not answer"}, after)
    monkeypatch.setattr(claimer.registry, "ask", lambda *_: busy)
    tries = []
    while claimer.time() < claimer.until:
        claimer.time.jump(claimer.step())
        tries.append(claimer.until - claimer.time())
    assert len([left for left in tries if 0 < left]) >= 4, tries
    assert claimer.step() >= after, "it is nobody's now: no hurry"


def test_a_lease_that_is_void_is_lost(registry, claiming):
    there = registry()
    claimer = claiming(there)
    claimer.step()
    again = there.claim()
    with pytest.raises(Unable, match="another client of this owner has taken it over"):
        claimer.step()
    assert claimer.state is LOST
    claimer.release()
    assert there.registry.table.find(SHOP).lease == again.json["lease"]


def test_what_is_no_registry_is_told(serve):
    def handler(sock: Any) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    registry = Registry(Place("http", HOST, serve(handler).address[1]), ALICE)
    claimer = Claimer(registry, {"name": "shop", "target": TARGET}, lambda text: None)
    with contextlib.closing(claimer.registry), pytest.raises(Unable, match="is no registry of names"):
        claimer.step()


@pytest.mark.parametrize("text, place", [
    ("http://127.0.0.1:19002", Place("http", "127.0.0.1", 19002)), ("http://host", Place("http", "host", 80)),
    ("https://host/prefix/", Place("https", "host", 443, "/prefix")), ("http://[::1]:1", Place("http", "::1", 1)),
    ("unix:/run/x", Place("unix", "/run/x", 0)),
])
def test_where_a_registry_may_be(text, place):
    assert parse_place(text) == place
    assert parse_place(str(place)) == place


def test_signals_that_come_at_any_moment_end_it(registry, claim):
    """An interrupted wait must not keep the lock that the handler wants."""
    there = registry()
    children = [claim(there, f"n{number}", TARGET) for number in range(3)]
    for number, child in enumerate(children):
        child.prints(f"n{number}.{DOMAIN}")
    for child in children:
        for _ in range(5):
            child.process.send_signal(signal.SIGTERM)
    assert [child.wait() for child in children] == [0, 0, 0]
    assert not there.registry.table.live


GOOD = {"name": SHOP, "lease": "l" * 32, "ttl": 60}


@pytest.mark.parametrize("status", ["200 OK", "409 Conflict", "503 Busy", "301 Moved", "999 x"])
@pytest.mark.parametrize("body", [
    *(json.dumps({**GOOD, "ttl": value}) for value in (float("nan"), float("inf"), 1e308, True, -1, 0, "60", None, [])),
    *(json.dumps({**GOOD, "name": value}) for value in ("a\nb", "\x1b[31m", "a\0b", "x" * 5000, "", "a b", "é", None, 5)),
    *(json.dumps({**GOOD, "lease": value}) for value in ("a\r\nX: y", "", "é", 5)),
    *(json.dumps({"errors": value, "detail": "\x1b[31m"}) for value in (5, {"a": 1}, [5], None, [{"field": []}])),
    json.dumps({"detail": {"a": 1}, "title": None}), "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "<html>", "",
    '{"ttl": 1e999}', "\ufeff{}"])
def test_a_registry_that_answers_garbage_is_told_and_no_more(serve, status, body):
    """No traceback, nothing that changes a terminal, and the command beside it is not left behind."""
    def handler(sock: Any) -> None:
        sock.recv(65536)
        data = body.encode()
        sock.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\nRetry-After: 99999\r\n\r\n".encode() + data)
    lines: list[str] = []
    claimer = Claimer(Registry(Place("http", HOST, serve(handler).address[1]), ALICE), {"name": "shop", "target": TARGET},
                      lines.append)
    with contextlib.closing(claimer.registry):
        try:
            pause = claimer.step()
        except Unable as error:
            lines.append(str(error))
        else:
            assert 0 < pause <= sniroute_claim.AFTER_MAX, "a registry that is back is not waited for till tomorrow"
    assert lines and all(line.isprintable() and len(line) < 1000 and ALICE not in line for line in lines)
    assert claimer.state is not OURS


@pytest.mark.parametrize("said", [
    b"", b"\0" * 100, b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n{}", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}",
    b"HTTP/1.1 \r\n\r\n", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n", b"HTTP/1.1 " + b"2" * 70000,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"])
def test_what_speaks_no_http_is_tried_again(serve, said):
    def handler(sock: Any) -> None:
        sock.recv(65536)
        sock.sendall(said)
    lines: list[str] = []
    claimer = Claimer(Registry(Place("http", HOST, serve(handler).address[1]), ALICE), {"name": "shop", "target": TARGET},
                      lines.append)
    with contextlib.closing(claimer.registry):
        try:
            assert 0 < claimer.step() <= RETRY_LAST
        except Unable as error:
            lines.append(str(error))
    assert lines and all(line.isprintable() and ALICE not in line for line in lines)
