"""Every parser without I/O, on inputs that nobody has written: `python3 -m testbed.fuzz`, short and with a seed.

A target is a function of bytes; it raises for what its parser must not do.
"""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

import pytest

import sniroute_dns
import sniroute_hpack
import sniroute_http
import sniroute_kubeconfig
import sniroute_resp
from conftest import HERE
from sniroute_spdy import Session
from testbed import fuzz, fuzz_oracles, referees
from testbed.clients import PSYCOPG, paths_of
from testbed.endure_inputs import Fault
from testbed.fuzz import NO_TARGET, TARGETS
from testbed.program import execute

RUNS = 200
LESS = {"settings": 120, "settings-tree": 60, "options": 100, "h2-pair": 60, "signals": 120}  # each takes milliseconds


def forgets(session: Session, data: bytes) -> list:
    """`receive` of a session that loses the beginning of a frame."""
    events = RECEIVE(session, data)
    session.part = b""
    return events


def twice(data: bytes, at: int) -> tuple[str, int]:
    """`read_name` that takes time for nothing."""
    for _ in range(50_000):
        pass
    return READ_NAME(data, at)


def elsewhere(request: sniroute_http.Request, *more: Any, **others: Any) -> bytes:
    """`pass_request` that changes the path."""
    return PASS_REQUEST(request, *more, **others).replace(b" /", b" /x", 1)


RECEIVE, READ_NAME, PASS_REQUEST = Session.receive, sniroute_dns.read_name, sniroute_http.pass_request
FAULTS = {  # what a target finds: where, what stands there instead, the target, what it says then
    "a beginning that is lost": (Session, "receive", forgets, "spdy", "in pieces"),
    "an exception that nobody documents": (sniroute_resp, "SIZE", re.compile(rb".*"), "redis", "ValueError"),
    "a table that grows": (sniroute_hpack.Decoder, "evict", lambda *_: None, "hpack", "the table's size"),
    "a path that is another behind us": (sniroute_http, "pass_request", elsewhere, "request", "passed on"),
    "a secret in a message": (sniroute_kubeconfig, "check_key", lambda key, fault: fault(key.decode()), "kubeconfig",
                              ""),
    "too many steps for few bytes": (sniroute_dns, "read_name", twice, "dns", "lines of Python"),
}
load = functools.cache(fuzz.load)


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_says_its_result_or_refuses_in_words(name):
    report = fuzz.run(load(name), LESS.get(name, RUNS), 5)
    assert not report.faults, report.faults[0]


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_what_it_is_for_and_what_is_empty(name):
    target = load(name)
    assert target.seeds
    target.run(b"")
    before = sys.gettrace()
    target.run(target.seeds[0])
    assert sys.gettrace() is before


def rooms_without_io() -> set[str]:
    """Those whose row in CONTRIBUTING's table says so."""
    table = (HERE / "CONTRIBUTING.md").read_text().partition("| room | what lives there |")[2].partition("\n\n")[0]
    return set(re.findall(r"^\| (\w+) \|[^|]*without I/O", table, re.MULTILINE))


def test_each_room_without_io_has_a_target_or_a_reason():
    rooms = rooms_without_io()
    covered = {room for row in TARGETS.values() for room in row.rooms.split()}
    assert len(rooms) > 15 and not rooms - covered - NO_TARGET.keys()
    assert NO_TARGET.keys() <= rooms - covered, "a reason that nobody needs"
    assert all((HERE / f"sniroute_{room}.py").exists() for room in covered)


def test_the_same_seed_makes_the_same_inputs():
    def inputs(seed: int, name: str = "claim") -> list[bytes]:
        heard: list[bytes] = []
        fuzz.run(load(name)._replace(run=heard.append), 200, seed)
        return heard
    assert inputs(3) == inputs(3) != inputs(4)
    assert all(len(data) <= fuzz.SIZE_MAX for data in inputs(3, "yaml"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_parser_is_found(monkeypatch, fault):
    """A tool that finds nothing has to show that it can."""
    where, name, wrong, target, words = FAULTS[fault]
    monkeypatch.setattr(where, name, wrong)
    monkeypatch.setattr(fuzz, "SHOWN", 1)
    monkeypatch.setattr(fuzz_oracles, "COUNTED", 1)
    said = []
    for seed in range(40):  # what a seed makes differs from Python to Python
        said += [what for _, what in fuzz.run(load(target), 300, seed).faults]
        if any(words in what for what in said):
            return
    raise AssertionError(said[:1])


def test_an_input_with_a_fault_is_made_smaller():
    def run(data: bytes) -> None:
        if b"\r\n" in data:
            raise Fault("found")
    target = fuzz.Target("x", run, [b"a" * 50 + b"\r\n" + b"b" * 70], ())
    (data, what), *_ = fuzz.run(target, 1, 1).faults
    assert what == "found" and fuzz.smaller(target, data) == b"\r\n"


def test_an_input_that_takes_for_ever_is_a_fault(monkeypatch):
    monkeypatch.setattr(fuzz, "ENDS", 0.2)
    pattern = re.compile(r"(?:a*a*\.)+b")
    target = load("hello")._replace(seeds=[b"a." * 40], run=lambda data: pattern.fullmatch(data.decode()))
    (data, what), *_ = fuzz.run(target, 1, 1).faults
    assert data == b"a." * 40 and "it takes more than 0.2 s of CPU" in what


def test_lines_are_counted_and_whoever_counted_before_goes_on():
    def lines(count: int) -> int:
        for _ in range(count):
            pass
        return count
    seen: list[str] = []
    before = sys.gettrace()
    sys.settrace(lambda frame, event, what: seen.append(frame.f_code.co_name))
    try:
        assert fuzz_oracles.counted(1, lines, 1000) == 1000
        with pytest.raises(Fault, match="lines of Python for 1 bytes"):
            fuzz_oracles.counted(1, lines, 50_000)
        lines(1)
    finally:
        sys.settrace(before)
    assert seen[-1] == "lines"


def test_the_command_tells_what_it_did_and_runs_one_input_again(tmp_path):
    done = execute(sys.executable, "-m", "testbed.fuzz", "datagrams,startup", "--runs", "30", cwd=HERE)
    assert done.returncode == 0 and re.findall(rb"^(\w+) +30 inputs, .* 0 faults$", done.stdout, re.MULTILINE) == [
        b"datagrams", b"startup"], done.stdout + done.stderr
    (tmp_path / "input").write_bytes(b"\0\1a")
    assert fuzz.main(["datagrams", "--input", str(tmp_path / "input")]) == 0


@pytest.mark.parametrize("words, said", [(["nobody"], "there is no target nobody"),
                                         (["hello,name", "--atheris"], "--atheris takes one target")])
def test_a_command_line_that_is_none_is_told_why(capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        fuzz.main(words)
    assert caught.value.code == 2 and said in capsys.readouterr().err


# -- referees ----------------------------------------------------------------------------------

PACKAGES = {"pyyaml": "yaml", "hpack": "hpack", "h2": "h2"}


@pytest.mark.parametrize("name", [name for name in referees.REFEREES if name != "kubectl"])
def test_what_both_read_they_read_the_same(name):
    with paths_of(PACKAGES.get(name, "sys")):
        try:
            kinds, faults = referees.compare(name, 300, 5)
        except referees.Missing as missing:
            pytest.skip(f"{name} is not here ({missing}; {PSYCOPG} names a Python that has it)")
    assert not faults and kinds["same"] > 10, (kinds, faults)


def test_kubectl_reads_the_same():
    try:
        kinds, faults = referees.compare("kubectl", 2, 5)
    except referees.Missing as missing:
        pytest.skip(f"kubectl is not here ({missing})")
    assert not faults and kinds["same"], (kinds, faults)
