"""Tests of sniroute_log.py: what a line looks like, how many there are, and streams that fail or are stuck."""

from __future__ import annotations

import collections
import io
import json
import logging
import os
import pathlib
import re
import threading
import types
from typing import Any, Iterator

import pytest

import sniroute_log
from sniroute_log import Access, Ending, Journal, log_access, under_journald
from conftest import FakeClock, wait_until
from testbed.hellos import NAME

WHEN = 1_700_000_000.0625
FORGED = "x\n<3>forged line\r\n2023-11-14T22:13:20.062Z error forged\x1b[2J\x1b]0;title\x07 " \
    "\u2028 \u202e \x85 \x9b31m \0 \x7f \u00e9 \udcff"


def said(message: str, *args: object, level: int = logging.INFO,
         error: BaseException | None = None) -> logging.LogRecord:
    """A log record, as a logger makes it."""
    record = logging.LogRecord("sniroute", level, __file__, 1, message, args, None)
    record.exc_info = (type(error), error, error.__traceback__) if error else None
    record.created = WHEN
    return record


def ended(**changes: Any) -> Ending:
    row = Ending(logging.INFO, WHEN, ("192.0.2.1", 1111), NAME, "*.example.com", "127.0.0.1:20000", 10, 20, 1.23456,
                 "client_closed", None)
    return row._replace(**changes)


def asked(**changes: Any) -> Access:
    row = Access(WHEN, ("192.0.2.1", 1111), "GET", NAME, "/a/b", 200, 10, 20, 0.00123, 0.01234, "*.example.com",
                 "tcp:127.0.0.1:80", "", None)
    return row._replace(**changes)


def written(style: str, *rows: Any, stream: Any = None) -> str:
    """What the log has of these rows."""
    stream = stream or io.StringIO()
    journal = Journal(stream, style)
    for row in rows:
        journal.emit(row)
    journal.stop()
    return stream.getvalue()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy host may stop the thread that writes for longer than a router waits for it at its end."""
    monkeypatch.setattr(sniroute_log, "LAST_WRITE", 10.0)


@pytest.fixture
def journald(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stream that looks like journald's."""
    class Stream(io.StringIO):
        def fileno(self) -> int:
            return file.fileno()

    with open(tmp_path / "journal", "w") as file:
        state = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{state.st_dev}:{state.st_ino}")
        yield Stream()


def test_a_line_of_the_log():
    assert written("text", said("listening on %s", ":1")) == "2023-11-14T22:13:20.062Z info listening on :1\n"
    assert json.loads(written("json", said("it's %d", 1, level=logging.WARNING))) == \
        {"time": "2023-11-14T22:13:20.062Z", "level": "warning", "message": "it's 1"}


def test_a_line_under_journald_has_a_level_for_it_and_no_time(journald):
    levels = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
    text = written("text", *(said("x", level=level) for level in levels), ended(level=logging.DEBUG), stream=journald)
    assert re.findall("^<(.)>", text, re.MULTILINE) == ["7", "6", "4", "3", "7"] and text.startswith("<7>x\n")


def test_a_line_of_json_has_a_level_for_journald_too(journald):
    text = written("json", said("x", level=logging.WARNING), stream=journald)
    assert text.startswith("<4>{") and json.loads(text[3:])["message"] == "x"


def test_an_event_has_the_same_fields_in_text_and_json():
    event = said("tunnel ready", level=logging.INFO)
    event.fields = {"tunnel": "cf:x.test", "seconds": 0.117, "reason": "two \"words\"\x1b", "pid": 7}
    assert written("text", event) == "2023-11-14T22:13:20.062Z info tunnel ready tunnel=cf:x.test seconds=0.117 " \
        'reason="two \\"words\\"?" pid=7\n'
    assert json.loads(written("json", event)) == {
        "time": "2023-11-14T22:13:20.062Z", "level": "info", "message": "tunnel ready", "tunnel": "cf:x.test",
        "seconds": 0.117, "reason": "two \"words\"?", "pid": 7}


@pytest.mark.parametrize("row, limit, kind", [
    (ended(reason="no_name"), sniroute_log.LOG_REFUSALS, "no_name"),
    (ended(), sniroute_log.LOG_ENDINGS, "client_closed"),
    (asked(), sniroute_log.LOG_ACCESSES, "request"),
    (asked(reason="cut"), sniroute_log.LOG_ACCESSES, "request:cut"),
    (asked(reason="no_route"), sniroute_log.LOG_REFUSALS, "request:no_route"),
    (said("an event of %d", 1), sniroute_log.LOG_EVENTS, '"an event of %d"'),
], ids=["refusals", "endings", "requests", "cut requests", "refused requests", "events"])
def test_a_class_of_lines_has_a_limit_and_what_was_suppressed_is_said(row, limit, kind, monkeypatch):
    monkeypatch.setattr(sniroute_log, "LOG_LINES_MAX", 1 << 20)
    monkeypatch.setattr(sniroute_log, "LOG_PERIOD", 0.05)
    clock, stream = FakeClock(), io.StringIO()
    journal = Journal(stream, "text", clock)
    def lines() -> list[str]:
        return stream.getvalue().splitlines()
    for _ in range(limit + 5):
        journal.emit(row)
    journal.emit(said("something else"))
    wait_until(lambda: lines()[-1:] and "something else" in lines()[-1], what="all of them")
    assert len(lines()) == limit + 1
    clock.jump(1)
    wait_until(lambda: len(lines()) == limit + 2, what="the word of what is missing, though nothing follows")
    assert lines()[-1].partition("Z ")[2] == f"warning 5 suppressed suppressed=5 class={kind}"
    journal.emit(row)
    wait_until(lambda: len(lines()) == limit + 3, what="the class's next period")
    journal.stop()
    assert len(lines()) == limit + 3


def test_what_is_suppressed_at_the_end_is_said_there(monkeypatch):
    monkeypatch.setattr(sniroute_log, "LOG_EVENTS", 1)
    lines = written("json", said("x"), said("x"), said("x")).splitlines()
    assert [json.loads(line).get("suppressed") for line in lines] in ([None, 2], [None, None, 1])


def test_the_line_of_a_connection():
    assert written("text", ended()) == \
        "2023-11-14T22:13:20.062Z info client=192.0.2.1:1111 name=db.example.com route=*.example.com " \
        "backend=127.0.0.1:20000 up=10 down=20 seconds=1.235 reason=client_closed\n"
    assert json.loads(written("json", ended())) == {
        "time": "2023-11-14T22:13:20.062Z", "level": "info", "client": "192.0.2.1:1111", "name": NAME,
        "route": "*.example.com", "backend": "127.0.0.1:20000", "up": 10, "down": 20, "seconds": 1.235,
        "reason": "client_closed"}


def test_the_line_of_a_connection_that_came_to_nothing():
    row = ended(name=None, route=None, backend=None, client=("2001:db8::1", 5), reason="malformed",
                detail='a "bad" hello')
    assert written("text", row).endswith(
        "client=[2001:db8::1]:5 name=- route=- backend=- up=10 down=20 seconds=1.235 "
        'reason=malformed detail="a \\"bad\\" hello"\n')
    fields = json.loads(written("json", row))
    assert fields["detail"] == 'a "bad" hello' and not {"name", "route", "backend"} & fields.keys()


def test_the_line_of_a_request():
    assert written("text", asked()) == \
        "2023-11-14T22:13:20.062Z info client=192.0.2.1:1111 method=GET host=db.example.com path=/a/b status=200 " \
        "up=10 down=20 first=0.0012 seconds=0.0123 route=*.example.com backend=tcp:127.0.0.1:80 reason=-\n"
    assert json.loads(written("json", asked())) == {
        "time": "2023-11-14T22:13:20.062Z", "level": "info", "client": "192.0.2.1:1111", "method": "GET", "host": NAME,
        "path": "/a/b", "status": 200, "up": 10, "down": 20, "first": 0.0012, "seconds": 0.0123,
        "route": "*.example.com", "backend": "tcp:127.0.0.1:80"}


def test_the_line_of_a_request_that_could_not_be_read():
    row = asked(client=("2001:db8::1", 5), method="", host="", path="", status=0, up=0, down=0, first=None, route=None,
                backend=None, reason="bad_request", detail="a \"bad\" line")
    assert written("text", row).endswith(
        "Z debug client=[2001:db8::1]:5 method=- host=- path=- status=- up=0 down=0 first=- seconds=0.0123 route=- "
        'backend=- reason=bad_request detail="a \\"bad\\" line"\n')
    fields = json.loads(written("json", row))
    assert (fields["reason"], fields["detail"]) == ("bad_request", 'a "bad" line')
    assert not {"method", "host", "path", "status", "first", "route", "backend"} & fields.keys()


@pytest.mark.parametrize("reason, word", [
    ("", "info"), ("client_left", "info"), ("cut", "info"), ("no_route", "info"), ("bad_request", "debug"),
    ("backend", "warning"), ("internal", "error")])
def test_the_line_of_a_request_has_the_level_of_its_refusal(reason, word):
    assert f"Z {word} client=" in written("text", asked(reason=reason))
    assert json.loads(written("json", asked(reason=reason)))["level"] == word


def test_a_path_is_one_word_in_the_line_whatever_is_in_it():
    """A reader that splits at blanks finds the fields of the router alone."""
    for path in ("/x status=500 reason=forged", '/x" status=500 "', "/\t", "/\u00e9", "-"):
        text = written("text", asked(path=path))
        assert re.findall(r' (status|reason)=(\S+)', re.sub(r'"(?:[^"\\]|\\.)*"', "", text)) == [
            ("status", "200"), ("reason", "-")]
    assert ' path="/x\\" status=500 \\"" ' in written("text", asked(path='/x" status=500 "'))
    assert " path=/a=[c]\\d " in written("text", asked(path="/a=[c]\\d"))


def router_of(level: int, admin: bool = True) -> Any:
    """What `log_access` wants of a Router, and what it has told the journal."""
    told: list[Access] = []
    return types.SimpleNamespace(
        counters=collections.defaultdict(int), level=level, accesses=collections.deque() if admin else None,
        hooks=types.SimpleNamespace(journal=told.append), told=told)


def test_a_request_is_counted_by_the_class_of_its_status():
    router = router_of(logging.INFO, admin=False)
    for status in (200, 204, 101, 304, 404, 502, 599, 0, 999):
        log_access(router, asked(status=status))
    assert router.counters == {"http_requests": 9, "http_2xx": 2, "http_1xx": 1, "http_3xx": 1, "http_4xx": 1,
                               "http_5xx": 2, "http_none": 1, "http_9xx": 1}
    assert len(router.told) == 9 and router.accesses is None


def test_a_request_is_logged_where_the_level_asks_for_it_and_always_counted():
    for level, reasons in ((logging.DEBUG, ["", "bad_request", "no_route", "backend"]),
                           (logging.INFO, ["", "no_route", "backend"]), (logging.WARNING, ["backend"])):
        router = router_of(level)
        for reason in ("", "bad_request", "no_route", "backend"):
            log_access(router, asked(reason=reason))
        assert [row.reason for row in router.told] == reasons
        assert len(router.accesses) == router.counters["http_requests"] == 4


def test_a_long_path_is_not_kept_and_is_shown_to_go_on():
    router = router_of(logging.INFO)
    for length in (500, 501, 8192):
        log_access(router, asked(path="/" * length))
    assert [len(row.path) for row in router.told] == [500, 501, 501] and list(router.accesses) == router.told
    shown = [json.loads(written("json", row))["path"] for row in router.told]
    assert shown == ["/" * 500, "/" * 497 + "...", "/" * 497 + "..."]


@pytest.mark.parametrize("style", ["text", "json", "journald"])
@pytest.mark.parametrize("row", [
    said("%s", FORGED), said(FORGED), ended(detail=FORGED),
    *(asked(**{field: FORGED}) for field in ("method", "host", "path", "backend", "detail"))],
    ids=["argument", "message", "detail", "method", "host", "path", "a request's backend", "a request's detail"])
def test_what_a_client_sends_never_makes_a_line_or_moves_a_terminal(style, row, request):
    stream = request.getfixturevalue("journald") if style == "journald" else None
    text = written("json" if style == "json" else "text", row, stream=stream)
    assert text.endswith("\n") and text.count("\n") == 1 and re.fullmatch("[ -~]+", text[:-1])
    assert "forged" in text


@pytest.mark.parametrize("style", ["text", "json", "journald"])
def test_a_traceback_is_indented_or_a_field_whatever_is_in_it(style, request):
    stream = request.getfixturevalue("journald") if style == "journald" else None
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        row = said("a fault", level=logging.ERROR, error=error)
    first, *rest = written("json" if style == "json" else "text", row, stream=stream)[:-1].split("\n")
    assert all(re.fullmatch("[ -~]+", line) for line in (first, *rest))
    if style == "json":
        trace = json.loads(first)["traceback"]
        assert not rest and trace.startswith("Traceback") and FORGED in trace
    else:
        assert first.endswith("a fault") and rest[0] == "  Traceback (most recent call last):"
        assert all(line.startswith("  ") for line in rest) and len(rest) >= 5


def test_a_line_is_not_longer_than_it_may_be():
    assert len(written("text", said("x" * 100_000))) < 2100
    assert len(written("text", ended(detail="\\" * 100_000))) < 1300
    assert len(written("text", asked(path="/" + "\\" * 100_000, detail="\\" * 100_000))) < 2300


def test_a_log_of_many_threads_has_every_line(monkeypatch):
    monkeypatch.setattr(sniroute_log, "LOG_EVENTS", 400)
    stream = io.StringIO()
    journal = Journal(stream, "text")
    barrier = threading.Barrier(4)

    def speak(number: int) -> None:
        barrier.wait()
        for line in range(100):
            journal.emit(said("%s", f"{number}-{line}"))

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.stop()
    words = [line.split()[-1] for line in stream.getvalue().splitlines()]
    for number in range(4):
        of_one = [word for word in words if word.startswith(f"{number}-")]
        assert of_one == [f"{number}-{line}" for line in range(100)]


class Stuck(io.StringIO):
    """A stream whose writes wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.free = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.free.wait(30)
        return super().write(text)


def test_a_log_that_is_stuck_drops_lines_and_counts_them(monkeypatch):
    monkeypatch.setattr(sniroute_log, "LOG_LINES_MAX", 5)
    stream = Stuck()
    journal = Journal(stream, "text")
    journal.emit(said("first"))
    assert stream.entered.wait(10)
    for number in range(8):
        journal.emit(said("line %d", number))
    assert (journal.dropped, len(journal.lines)) == (3, 5)
    stream.free.set()
    journal.stop()
    words = [line.split(" ", 2)[1:] for line in stream.getvalue().splitlines()]
    assert words == [["info", "first"], *(["info", f"line {number}"] for number in range(5)),
                     ["warning", "the log was too slow: 3 lines dropped"]]


def test_a_log_that_stays_stuck_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(sniroute_log, "LAST_WRITE", 0.1)
    stream = Stuck()
    journal = Journal(stream, "text")
    journal.emit(said("first"))
    assert stream.entered.wait(10)
    journal.stop()
    assert journal.thread.is_alive() and journal.thread.daemon
    stream.free.set()
    journal.thread.join()
    journal.pipe.close()


@pytest.mark.parametrize("failure", [
    OSError(28, "no space left on device"), BrokenPipeError(), ValueError("closed file"),
], ids=["full", "broken-pipe", "closed"])
def test_a_log_that_fails_goes_on(failure):
    class Failing(io.StringIO):
        failures = [failure]

        def flush(self) -> None:
            if self.failures:
                self.entered.set()
                raise self.failures.pop()

    stream = Failing()
    stream.entered = threading.Event()
    journal = Journal(stream, "text")
    journal.emit(said("first"))
    assert stream.entered.wait(10)
    journal.emit(said("second"))
    journal.stop()
    assert stream.getvalue().endswith(" second\n")


def test_a_line_that_cannot_be_shown_costs_no_other():
    """A fault of ours: the thread that writes has to outlive it."""
    text = written("text", said("%d clients", "three"), said("next"))
    first, second = text.splitlines()
    assert " error a log line that cannot be shown: TypeError(" in first and second.endswith(" info next")


def test_a_log_whose_thread_meets_a_fault_says_so_and_goes_on(monkeypatch, capfd, journald):
    """The router would go on in any case: unseen."""
    monkeypatch.setattr(sniroute_log, "LOG_REST", 0.01)
    for stream, mark in ((io.StringIO(), ""), (journald, "<3>")):
        journal = Journal(stream, "text")
        settle, faults = journal._settle, [MemoryError("planted\x1b"), ZeroDivisionError("planted")]

        def fail(now: float) -> list[str]:
            if faults:
                raise faults.pop()
            return settle(now)

        journal._settle = fail
        journal.emit(said("first"))
        wait_until(lambda: not faults, what="both faults")
        journal.emit(said("second"))
        journal.stop()
        lines = stream.getvalue().splitlines()
        assert lines[-1].endswith("second") and lines[0].endswith("first"), "a line that was still in the queue is written later"
        assert capfd.readouterr().err == "".join(
            f"{mark}sniroute: the log goes on after a fault, please report it: {fault}\n"
            for fault in ("ZeroDivisionError('planted')", "MemoryError('planted\\x1b')"))


def test_a_log_that_fails_for_ever_does_not_spin_and_ends(monkeypatch, capfd):
    naps: list[float] = []
    monkeypatch.setattr(sniroute_log, "time", types.SimpleNamespace(sleep=naps.append))
    journal = Journal(io.StringIO(), "text", FakeClock())
    journal._settle = lambda now: 1 / 0
    journal.emit(said("x"))
    wait_until(lambda: len(naps) > 3)
    journal.stop()
    assert not journal.thread.is_alive() and set(naps) == {sniroute_log.LOG_REST}, "a nap after each fault"
    assert capfd.readouterr().err.count("the log goes on after a fault") >= 4


def test_a_log_without_a_stream_is_silent():
    journal = Journal(None, "text")
    journal.emit(said("x"))
    journal.stop()
    assert not journal.lines


def test_journald_is_recognised_by_its_inode(journald, tmp_path, monkeypatch):
    assert under_journald(journald)
    with open(tmp_path / "other", "w") as file:
        assert not under_journald(file)
    assert not under_journald(file), "closed"
    assert not under_journald(None) and not under_journald(io.StringIO())
    monkeypatch.delenv("JOURNAL_STREAM")
    assert not under_journald(journald)
