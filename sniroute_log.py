"""sniroute_log: the journal: log lines from any thread, written by one that may wait for its reader.

    any thread --- log.info(...), log_event(...) ---+
    loop ------- one Ending for each connection ----+---> Journal.emit --> a bounded queue --> thread `log` --> stderr

A slow disk or a pipe that nobody reads never stops traffic: what does not fit is dropped and counted.  Nor does
one kind of event drown the others: each has a limit for a second, and a line says how many were suppressed.
Text and JSON lines have the same fields; both are printable ASCII, whatever a client sent.

Threads: `Journal.emit` is for any thread and takes no lock of ours; formatting and writing is done by `log`.

Seams: I want to ...
    log another event              log_event(level, "words that never change", field=value)
    end a connection otherwise     a row in ENDINGS, and in OPERATING.md
    add a field to every line      `Ending` and `Journal.ending`
"""

from __future__ import annotations

import collections
import functools
import json
import logging
import os
import re
import select
import threading
import time
from typing import Any, Callable, NamedTuple

from sniroute_loop import WakePipe
from sniroute_names import printable, show_address
from sniroute_refusals import REFUSALS

__version__ = "0.1.0"

log = logging.getLogger("sniroute")

# Limits, each with its reason.  Times in seconds.
LOG_LINES_MAX = 10000  # lines that wait for a slow log; over it they are dropped and counted
LOG_PERIOD = 1.0  # in which a class of lines may have so many:
LOG_ENDINGS = 10000  # connections that ended by themselves: more than a core serves
LOG_REFUSALS = 100  # connections refused for one reason: strangers can cause them
LOG_EVENTS = 250  # events of one kind; a dump has a limit of its own
LOG_NAP = 0.02  # between two writes of the log: one system call for many lines
LAST_WRITE = 1.0  # for what is left when the program ends

# How a connection ends that was not refused: the word in its line, and what it means.
CLIENT_CLOSED, BACKEND_CLOSED = "client_closed", "backend_closed"
CLIENT_RESET, BACKEND_RESET, CLIENT_LEFT, IDLE, STOPPED = "client_reset", "backend_reset", "client_left", "idle", "stopped"
ENDINGS = {
    CLIENT_CLOSED: "both sides have ended, the client first",
    BACKEND_CLOSED: "both sides have ended, the backend first",
    CLIENT_RESET: "the client broke off",
    BACKEND_RESET: "the backend broke off",
    CLIENT_LEFT: "the client ended before the backend had answered",
    IDLE: "no byte for as long as --connection-idle allows",
    STOPPED: "the router stopped",
}


def log_event(level: int, what: str, **fields: object) -> None:
    """Log an event: `what` in words that are always the same, and its particulars as fields of the line."""
    log.log(level, what, extra={"fields": fields})


class Ending(NamedTuple):
    """What the log says of a connection when it is over."""

    level: int
    when: float
    client: tuple[str, int]
    name: str | None
    route: str | None
    backend: str | None
    up: int
    down: int
    seconds: float
    reason: str
    detail: str | None
    waited: float | None = None  # seconds from its accept to its last dial


class Pace:
    """How many lines there were of one class in a period."""

    __slots__ = ("limit", "began", "lines")

    def __init__(self, limit: int, now: float):
        self.limit = limit  # of those that are written
        self.began = now
        self.lines = 0


class Journal(logging.Handler):
    """Takes log records and Endings from any thread, and writes them from a thread of its own.

    So a slow disk or a pipe that nobody reads never stops traffic: what does not fit into
    LOG_LINES_MAX is dropped and counted.  Nor does one kind of event drown the others: each has a limit
    for a second, and a line says how many were suppressed.  Lines are printable ASCII, whatever a client sent.
    """

    def __init__(self, stream: Any, style: str, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self.clock = clock
        self.paces: dict[str, Pace] = {}  # by class: how a connection ended, or the words of an event
        self.stream = stream
        self.style = style
        self.journald = under_journald(stream)
        self.lines: collections.deque[logging.LogRecord | Ending] = collections.deque()
        self.dropped = 0
        self.asleep = False  # whether `emit` has to wake the thread
        self.stopping = False
        self.pipe = WakePipe()
        self.thread = threading.Thread(target=self._run, name="log", daemon=True)
        self.thread.start()

    def emit(self, record: logging.LogRecord | Ending) -> None:
        """Queue a line.  Any thread; no lock, one system call at most."""
        if len(self.lines) >= LOG_LINES_MAX:
            self.dropped += 1
            return
        self.lines.append(record)
        if self.asleep:  # it set this first and looked at `lines` then, so one of us sees the other
            self.asleep = False
            self.pipe.wake()

    def stop(self) -> None:
        """Write what is left, if the stream takes it within a second."""
        self.stopping = True
        self.pipe.wake()
        self.thread.join(LAST_WRITE)
        if not self.thread.is_alive():
            self.pipe.close()
        self.close()

    def _run(self) -> None:
        while not self.stopping:
            if self.lines:
                self._write()
                time.sleep(LOG_NAP)  # under load a line finds us awake, and costs no system call
                continue
            self.asleep = True
            if not self.lines and not self.stopping:
                owing = any(pace.lines > pace.limit for pace in self.paces.values())
                if select.select([self.pipe.reader], [], [], LOG_PERIOD if owing else None)[0]:
                    self.pipe.clear()
                else:
                    self._write()  # nothing but what is owed
            self.asleep = False
        self._write()

    def _write(self) -> None:
        now = self.clock()
        texts = self._settle(now)
        paces = self.paces
        for _ in range(len(self.lines)):  # not "while there are": they may come as fast as they go
            line = self.lines.popleft()
            try:
                is_ending = type(line) is Ending
                kind = line.reason if is_ending else str(line.msg)
                pace = paces.get(kind)
                if pace is None:
                    limit = LOG_EVENTS if not is_ending else LOG_REFUSALS if kind in REFUSALS else LOG_ENDINGS
                    pace = paces[kind] = Pace(limit, now)
                pace.lines += 1
                if pace.lines <= pace.limit:
                    texts.append(self.ending(line) if is_ending else self.format(line))
            except Exception as error:  # this thread has to outlive any line
                texts.append(self.line(logging.ERROR, time.time(), f"a log line that cannot be shown: {error!r}", {}))
        if self.stopping:
            texts += self._settle(now)
        if self.dropped:
            dropped, self.dropped = self.dropped, 0
            texts.append(self.line(logging.WARNING, time.time(), f"the log was too slow: {dropped} lines dropped", {}))
        if texts:
            try:
                self.stream.write("".join(texts))
                self.stream.flush()
            except (OSError, ValueError, AttributeError):
                pass  # full, gone, or never there: traffic goes on

    def _settle(self, now: float) -> list[str]:
        """Begin anew with classes whose period is over; the lines that are owed for what was suppressed in it."""
        texts = []
        for kind, pace in self.paces.items():
            if now - pace.began >= LOG_PERIOD or self.stopping:
                suppressed = pace.lines - pace.limit
                pace.began, pace.lines = now, 0
                if suppressed > 0:
                    texts.append(self.line(logging.WARNING, time.time(), f"{suppressed} suppressed",
                                           {"suppressed": suppressed, "class": printable(kind)}))
        return texts

    def format(self, record: logging.LogRecord) -> str:
        """A log record as one line, its traceback as indented lines behind it."""
        text = printable(record.getMessage(), 2000)
        fields = {name: printable(value, 2000) if isinstance(value, str) else value
                  for name, value in getattr(record, "fields", {}).items()}
        if record.exc_info:
            trace = self.formatter_for_tracebacks.formatException(record.exc_info)
            if self.style == "json":
                fields["traceback"] = trace
            else:
                text += "".join("\n  " + printable(line, 2000) for line in trace.split("\n"))
        return self.line(record.levelno, record.created, text, fields)

    formatter_for_tracebacks = logging.Formatter()

    def ending(self, end: Ending) -> str:
        """The one line of a connection."""
        level, when, address, name, route, backend, up, down, seconds, reason, detail, _ = end
        client = show_address(address)
        detail = detail and printable(detail, 500)
        if self.style == "json":
            fields = {"client": client, "name": name, "route": route, "backend": backend, "up": up,
                      "down": down, "seconds": round(seconds, 3), "reason": reason, "detail": detail}
            return self.line(level, when, "", {k: v for k, v in fields.items() if v is not None})
        text = f"client={client} name={name or '-'} route={route or '-'} backend={backend or '-'} " \
               f"up={up} down={down} seconds={seconds:.3f} reason={reason}"
        return self.line(level, when, f"{text} detail={json.dumps(detail)}" if detail else text, {})

    def line(self, level: int, when: float, text: str, fields: dict[str, Any]) -> str:
        """A finished line, its fields behind its text.  Under journald it begins with a syslog level (sd-daemon(3))."""
        word, syslog_level = LEVELS[level]
        priority = f"<{syslog_level}>" if self.journald else ""
        stamp = timestamp(int(when * 1000))
        if self.style == "json":
            record = {"time": stamp, "level": word, **({"message": text} if text else {}), **fields}
            return f"{priority}{json.dumps(record)}\n"
        if fields:  # a connection's line has its own in the text
            first, newline, trace = text.partition("\n")
            text = first + "".join(f" {name}={as_field(value)}" for name, value in fields.items()) + newline + trace
        return f"{priority}{text}\n" if priority else f"{stamp} {word} {text}\n"


def as_field(value: object) -> str:
    """The value of a field in a text line: quoted where it is more than one word."""
    text = str(value)
    return text if re.fullmatch(r"[!#-~]+", text) else json.dumps(text)


@functools.lru_cache(maxsize=8)
def timestamp(millisecond: int) -> str:
    """A millisecond since 1970 in RFC 3339 form, UTC; made once for all its lines."""
    second, rest = divmod(millisecond, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{rest:03d}Z"


# the word in a line, and syslog's number (RFC 5424 6.2.1)
LEVELS = {logging.DEBUG: ("debug", 7), logging.INFO: ("info", 6), logging.WARNING: ("warning", 4),
          logging.ERROR: ("error", 3)}


def under_journald(stream: Any) -> bool:
    """Whether this stream goes to journald (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        state = os.fstat(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{state.st_dev}:{state.st_ino}"
