"""sniroute_log: the journal: any thread hands in log lines, one thread writes them.

    any thread --- log.info(...), log_event(...) ---+
    loop ------- one Ending for each connection ----+---> Journal.emit --> a bounded queue --> thread `log` --> stderr
    loop ------- one Access for each HTTP request --+     (log_access)

The thread `log` may be stopped by a slow disk, or by a pipe that nobody reads; traffic goes on.  The lines that do not
fit into the queue meanwhile are dropped and counted.  Each kind of event has a limit for a second, so that one cannot
drown the others; a line says how many were suppressed.  Text and JSON lines have the same fields.  Both are printable
ASCII, whatever a client sent.

Threads: any thread may call `Journal.emit`, which takes no lock of ours.  The thread `log` formats and writes.

Seams: I want to ...
    log another event                      log_event(level, "words that never change", field=value)
    add a way for a connection to end      a row in ENDINGS, and in OPERATING.md
    add a way for a request to end         a row in REQUEST_ENDINGS, and in OPERATING.md
    add a field to each connection's line  `Ending` and `Journal.ending`
    add a field to each request's line     `Access` and `Journal.access`

It imports the loop (for WakePipe), the host (whether journald reads), names and refusals.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import logging
import os
import re
import select
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from sniroute_host import under_journald
from sniroute_loop import WakePipe
from sniroute_names import printable, show_address
from sniroute_refusals import REFUSALS

if TYPE_CHECKING:
    from sniroute_router import Router

__version__ = "0.1.0"

log = logging.getLogger("sniroute")

# Limits, each with its reason.  Times in seconds.
LOG_LINES_MAX = 10000  # lines in the queue: some MB at most; more are dropped and counted
LOG_PERIOD = 1.0  # the four limits below count the lines of one class in such a period
LOG_ENDINGS = 10000  # connections that ended in one way, refusals aside: more than a core serves
LOG_ACCESSES = 10000  # requests that ended in one way, refusals aside: to write more would cost the loop its core
LOG_REFUSALS = 100  # connections, or requests, refused for one reason: strangers can cause them
LOG_EVENTS = 250  # events with the same words: a dump has at most 200 lines of a kind
LOG_NAP = 0.02  # between two writes: one system call for many lines
LOG_REST = 0.5  # after a fault of ours in the thread `log`, which would be there again at once
LAST_WRITE = 1.0  # for the lines that are left when the program ends
VALUE_MAX = 500  # characters of a path, of what a detail says: a longer one ends with `...`

# The ways a connection can end, refusals aside: the word in its line, and what it means.
CLIENT_CLOSED, BACKEND_CLOSED = "client_closed", "backend_closed"
CLIENT_RESET, BACKEND_RESET, CLIENT_LEFT = "client_reset", "backend_reset", "client_left"
IDLE, STOPPED, LIFETIME, BACKEND_DOWN, RELEASED = "idle", "stopped", "lifetime", "backend_down", "released"
ENDINGS = {
    CLIENT_CLOSED: "the client ended first; the backend then ended, or broke off",
    BACKEND_CLOSED: "the backend ended first; the client then ended, or broke off",
    CLIENT_RESET: "the client broke off, and neither side had ended before",
    BACKEND_RESET: "the backend broke off, and neither side had ended before",
    CLIENT_LEFT: "the client ended or broke off before the backend had answered",
    IDLE: "no byte for as long as --connection-idle allows",
    STOPPED: "the router stopped",
    LIFETIME: "as old as the route's max_lifetime allows",
    BACKEND_DOWN: "its backend went down, and the route says on_down = cut",
    RELEASED: "its name was released in the registry, with cut=1",
}
# The ways a request can end that is neither refused nor answered in whole.  Where all went well, the word is "".
CUT = "cut"
REQUEST_ENDINGS = {
    CLIENT_LEFT: "the client ended or broke off before it had its answer in whole",
    CUT: "the answer ended too early: the backend broke off, or the router cut it",
}
LEVEL_OF = {kind: row.level for kind, row in REFUSALS.items()}  # of a line with this reason; others are for info
# What requests are counted by: the first digit of their status.  Index 0: the client has had no answer.
STATUS_CLASSES = ("none", *(f"{digit}xx" for digit in range(1, 10)))
COUNTER_OF = tuple(f"http_{each}" for each in STATUS_CLASSES)  # the router's counter of each


def log_event(level: int, what: str, **fields: object) -> None:
    """Log an event.  `what` never changes, so that it can be searched for and counted; the fields hold what does."""
    log.log(level, what, extra={"fields": fields})


def log_access(router: Router, access: Access) -> None:
    """A request in plain HTTP is over: count it, log it, and hand it to the admin.  The router's loop.

    It runs once for each request, so it formats nothing.
    """
    counters = router.counters
    counters["http_requests"] += 1
    counters[COUNTER_OF[access.status // 100]] += 1
    if len(access.path) > VALUE_MAX:  # one character more than is shown, so that the line says that it goes on
        access = access._replace(path=access.path[:VALUE_MAX + 1])  # thousands are kept, and a stranger has 8 KiB
    if LEVEL_OF.get(access.reason, logging.INFO) >= router.level:
        router.hooks.journal(access)
    if router.accesses is not None:
        router.accesses.append(access)


class Ending(NamedTuple):
    """What the log says of a connection that is over."""

    level: int  # of logging
    when: float  # it ended: seconds since 1970
    client: tuple[str, int]  # address and port; those of a believed PROXY header
    name: str | None  # these three: None where it did not get so far
    route: str | None
    backend: str | None
    up: int  # bytes
    down: int  # bytes
    seconds: float  # from its accept to its end
    reason: str  # a key of ENDINGS or of REFUSALS
    detail: str | None  # more about the reason, for people; or which addresses did not take the connect
    waited: float | None = None  # seconds from its accept to its last dial; for the metrics, not in the line


class Access(NamedTuple):
    """What the log says of one request in plain HTTP."""

    when: float  # it was over: seconds since 1970
    client: tuple[str, int]  # address and port; those of a believed PROXY header
    method: str  # these three: "" where the request could not be read
    host: str
    path: str  # without its query, which may hold secrets
    status: int  # of the answer; 0: the client has had none
    up: int  # bytes of the request's body
    down: int  # bytes of the answer's body
    first: float | None  # seconds from the first byte of the request to the first of the answer; None: there was none
    seconds: float  # from the first byte of the request to the last of the answer
    route: str | None  # these two: None where it did not get so far
    backend: str | None
    reason: str  # "": it went well; a key of REFUSALS, or of REQUEST_ENDINGS
    detail: str | None  # more about the reason, for people


class Pace:
    """Counts the lines of one class in a period."""

    __slots__ = ("limit", "began", "lines")

    def __init__(self, limit: int, now: float):
        self.limit = limit  # lines that are written; more are only counted
        self.began = now  # when the period began
        self.lines = 0


class Journal(logging.Handler):
    """Takes log records, Endings and Accesses from any thread, and writes them from a thread of its own.

    `stream` is a text stream, `style` is "text" or "json".  `stop` ends the thread; the stream stays open.
    """

    def __init__(self, stream: Any, style: str, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self.clock = clock
        # By class: how a connection ended; "request", and how that ended; the words of an event.
        self.paces: dict[str, Pace] = {}
        self.stream = stream
        self.style = style
        self.journald = under_journald(stream)
        self.lines: collections.deque[logging.LogRecord | Ending | Access] = collections.deque()
        self.dropped = 0
        self.asleep = False  # the thread waits in select, or is about to: `emit` has to wake it
        self.stopping = False
        self.pipe = WakePipe()
        self.thread = threading.Thread(target=self._run, name="log", daemon=True)
        self.thread.start()

    def emit(self, record: logging.LogRecord | Ending | Access) -> None:
        """Put a line into the queue.  Any thread; no lock, one system call at most."""
        if len(self.lines) >= LOG_LINES_MAX:
            self.dropped += 1
            return
        self.lines.append(record)
        if self.asleep:  # `_run` sets this and then looks at `lines`, we do it the other way round: no line is missed
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
        """The thread `log`: whatever happens in it, it goes on; the router does, too, and would do so unseen."""
        last = False
        while True:
            try:
                return self._serve()
            except Exception as error:
                # Straight to stderr, instead of through what has just failed.
                with contextlib.suppress(OSError, MemoryError):
                    said = f"{'<3>' if self.journald else ''}sniroute: the log goes on after a fault, please report it: "
                    os.write(2, f"{said}{printable(repr(error), 500)}\n".encode())
                if last:
                    return
                last = self.stopping  # one more try: lines are left
                time.sleep(LOG_REST)

    def _serve(self) -> None:
        """Write what comes until `stop`."""
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
                    self._write()  # the queue is empty; this writes how many lines the last period suppressed
            self.asleep = False
        self._write()

    def _write(self) -> None:
        """Write all that is in the queue, as far as each class has not reached its limit."""
        now = self.clock()
        texts = self._settle(now)
        paces = self.paces
        for _ in range(len(self.lines)):  # instead of `while self.lines`: lines may come as fast as we take them
            line = self.lines.popleft()
            try:
                if type(line) is Ending:
                    kind, most, show = line.reason, LOG_ENDINGS, self.ending
                elif type(line) is Access:
                    kind = f"request:{line.reason}" if line.reason else "request"
                    most, show = LOG_ACCESSES, self.access
                else:
                    kind, most, show = str(line.msg), LOG_EVENTS, self.format
                pace = paces.get(kind)
                if pace is None:
                    is_refusal = show != self.format and line.reason in REFUSALS
                    pace = paces[kind] = Pace(LOG_REFUSALS if is_refusal else most, now)
                pace.lines += 1
                if pace.lines <= pace.limit:
                    texts.append(show(line))
            except Exception as error:  # a line that cannot be formatted must not end this thread
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
                pass  # the disk is full, the pipe closed, or there never was a stream: traffic goes on

    def _settle(self, now: float) -> list[str]:
        """Begin a new period for each class whose last one is over.

        Returns a line for each class that had suppressed lines.
        """
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
        """A log record as one line.  A traceback follows it in indented lines, or is a field of the JSON."""
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
        """The line of a connection that is over."""
        level, when, address, name, route, backend, up, down, seconds, reason, detail, _ = end
        client = show_address(address)
        detail = detail and printable(detail, VALUE_MAX)
        if self.style == "json":
            fields = {"client": client, "name": name, "route": route, "backend": backend, "up": up,
                      "down": down, "seconds": round(seconds, 3), "reason": reason, "detail": detail}
            return self.line(level, when, "", {k: v for k, v in fields.items() if v is not None})
        if route is not None and " " in route:  # that of a port
            route = json.dumps(route)
        text = f"client={client} name={name or '-'} route={route or '-'} backend={backend or '-'} " \
               f"up={up} down={down} seconds={seconds:.3f} reason={reason}"
        return self.line(level, when, f"{text} detail={json.dumps(detail)}" if detail else text, {})

    def access(self, said: Access) -> str:
        """The line of a request that is over."""
        when, address, method, host, path, status, up, down, first, seconds, route, backend, reason, detail = said
        level = LEVEL_OF.get(reason, logging.INFO)
        client = show_address(address)
        if self.style == "json":
            fields = {
                "client": client, "method": as_value(method), "host": as_value(host), "path": as_value(path),
                "status": status or None, "up": up, "down": down, "first": None if first is None else round(first, 4),
                "seconds": round(seconds, 4), "route": route, "backend": backend, "reason": reason or None,
                "detail": as_value(detail or "")}
            return self.line(level, when, "", {k: v for k, v in fields.items() if v is not None})
        shown = "-" if first is None else f"{first:.4f}"
        text = f"client={client} method={as_word(method)} host={as_word(host)} path={as_word(path)} " \
               f"status={status or '-'} up={up} down={down} first={shown} seconds={seconds:.4f} " \
               f"route={route or '-'} backend={as_word(backend or '')} reason={reason or '-'}"
        return self.line(level, when, f"{text} detail={json.dumps(as_value(detail))}" if detail else text, {})

    def line(self, level: int, when: float, text: str, fields: dict[str, Any]) -> str:
        """A finished line: its text, then its fields.  `level` is one of logging's, `when` in seconds since 1970.

        Under journald it begins with a syslog level (sd-daemon(3)) and has no time stamp: journald adds one.
        """
        word, syslog_level = LEVELS[level]
        priority = f"<{syslog_level}>" if self.journald else ""
        stamp = timestamp(int(when * 1000))
        if self.style == "json":
            record = {"time": stamp, "level": word, **({"message": text} if text else {}), **fields}
            return f"{priority}{json.dumps(record)}\n"
        if fields:  # none for the line of a connection or a request: its method has put them into the text
            first, newline, trace = text.partition("\n")
            text = first + "".join(f" {name}={as_field(value)}" for name, value in fields.items()) + newline + trace
        return f"{priority}{text}\n" if priority else f"{stamp} {word} {text}\n"


def as_field(value: object) -> str:
    """The value of a field in a text line: quoted where it is more than one word."""
    text = str(value)
    return text if re.fullmatch(r"[!#-~]+", text) else json.dumps(text)


WORD = re.compile(r"[!#-~]{1,%d}" % VALUE_MAX)  # what needs no quotes; nearly all that clients ask for is such a word


def as_value(text: str) -> str | None:
    """A stranger's text as printable ASCII, VALUE_MAX characters of it at most; None where it is empty."""
    return text if WORD.fullmatch(text) else printable(text, VALUE_MAX) or None


def as_word(text: str) -> str:
    """As `as_value`, and as it stands in a text line: quoted where it is more than one word, `-` where it is empty."""
    return text if WORD.fullmatch(text) else json.dumps(printable(text, VALUE_MAX)) if text else "-"


@functools.lru_cache(maxsize=8)
def timestamp(millisecond: int) -> str:
    """A time in RFC 3339 form, UTC; `millisecond` counts since 1970.  Cached: many lines have the same one."""
    second, rest = divmod(millisecond, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{rest:03d}Z"


# A level of logging, its word in a line, and syslog's number for it (RFC 5424 6.2.1).
LEVELS = {logging.DEBUG: ("debug", 7), logging.INFO: ("info", 6), logging.WARNING: ("warning", 4),
          logging.ERROR: ("error", 3)}
