"""sniroute_metrics: the numbers of a running router: collected, copied, and shown as /metrics and /status.

    Router.endings ------+  every 0.25 s
    Router.accesses -----+
    TunnelTable.started -+--------------> Collector: histograms, rates, most refused names, last refusals and requests
    Router.last_reload --+                    |
                                              v
    Router and TunnelTable --- copies ----> Facts ---+---> expose(facts): Prometheus' text, a row of METRICS each
                                                     +---> status(facts): a dict for JSON, with what the page shows

Two kinds of numbers.  The router keeps counters and lists of what is there now: `Facts` copies them when somebody
asks.  Some numbers are lost unless they are taken in time: how long each connection lasted, how many were accepted
in a second.  `Collector.collect` takes these, whether anybody asks or not.

Threads.  The admin's thread `admin` calls `collect`, and is the only one that writes to the Collector.  Any thread may
make Facts and show them.  There is no lock here, and none is shared with the router's loop: what the loop changes
is copied in one step of the interpreter (see `copied`).  `TunnelTable.snapshot` and `failed` take the table's
lock, which the loop never takes.

What strangers can do.  They choose the names that are refused, so TopNames is bounded, and so are all lists in
/status.  Labels of metrics are configured routes and fixed words: a client cannot add one, and none names a client or a
tunnel, since --admin-public shows /metrics to everybody.  Each text in /status is one line of printable ASCII.
Where no route serves HTTP (Router.web is None), no metric tells of requests.

Seams: I want to ...
    export another number                        a row in METRICS
    measure each connection, or tunnel start     a row in HISTOGRAMS
    measure each request in plain HTTP           a row in REQUEST_HISTOGRAMS
    show something in /status and on the page    a field in `status`, and an element in sniroute_page

It imports sniroute_names, sniroute_log (the words for endings, the classes of requests) and sniroute_refusals (the
words for refusals).  The router and its tunnel table are arguments: their classes are not imported.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import heapq
import os
import platform
import resource
import time
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

from sniroute_log import COUNTER_OF, ENDINGS, STATUS_CLASSES, VALUE_MAX
from sniroute_names import printable, show_address
from sniroute_refusals import REFUSALS

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
ENDINGS_MAX = 65536  # endings kept until `collect` takes them: ten times what a full load ends in 0.25 s
ACCESSES_MAX = 16384  # requests kept until then: more than a full load has in 0.25 s; 20 MB with the longest of paths
REQUEST_ROUTES = 200  # routes whose requests are measured one by one: 4 KB of /metrics for each status class of each
SAMPLE = 1.0  # between two samples of the rates
SAMPLES = 120  # kept: two minutes, which is what the page plots
COPY_TRIES = 100  # of a copy that may fail while the original changes: in CPython the first one succeeds
CLAIMS_SHOWN = 100  # in /status, in the order of their names
NAMES_KEPT = 512  # refused names that TopNames counts: strangers choose them, so they need a bound
NAMES_SHOWN = 20  # rows of the lists in /status, from here on: as many as a person may want to read
REFUSALS_SHOWN = 50
REQUESTS_SHOWN = 100
STARTS_SHOWN = 10
CONNECTIONS_SHOWN = 200  # the oldest ones
TUNNELS_SHOWN = 1000
ROUTES_SHOWN = 1000
BACKENDS_SHOWN = 1000

TUNNEL_STATES = ("queued", "starting", "ready", "stopping", "backoff", "failed")  # as a tunnel's View has them
RESULTS = (*ENDINGS, *sorted(REFUSALS))  # how a connection can end; the router counts each by this name


# -- copies ------------------------------------------------------------------------------------


def copied(live: Any, kind: Callable[[Any], Any] = list) -> Any:
    """A copy of a container that another thread may change at the same time; `kind` is list or dict.

    While list() and dict() copy a built-in container they run no Python code, so CPython does it in one step.  Another
    interpreter may be interrupted: it raises RuntimeError when it finds the container changed, and the copy is tried
    again.  Raises RuntimeError after COPY_TRIES.
    """
    for _ in range(COPY_TRIES - 1):
        with contextlib.suppress(RuntimeError):
            return kind(live)
    return kind(live)


def passed_on(connection: Any) -> tuple[int, int]:
    """The bytes (up, down) that a connection has passed on so far; (0, 0) unless it is open.

    When it ends, the loop adds its bytes to the router's counters and to its route's Tally.
    """
    up, down = connection.up, connection.down
    return (up.total, down.total) if up is not None and down is not None else (0, 0)


# -- the collector -----------------------------------------------------------------------------


class Histogram:
    """How many values were observed in each bucket.  Written by one thread."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds  # upper bounds, ascending; a bucket contains its bound
        self.counts = [0] * (len(bounds) + 1)  # the last bucket is for values above all bounds
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


class TopNames:
    """The most frequent of any number of names, in bounded space.

    Source: Misra and Gries, "Finding repeated elements", 1982.  With `limit` names kept, a count is too low by at most
    a (limit + 1)th of all names that were added.  Adding costs constant time on average, even if somebody chooses
    the names to make it slow: to go through the table lowers each of `limit` counts by one, so at least as many
    names were added before.  The "space-saving" algorithm would search the table for each new name.
    """

    def __init__(self, limit: int = NAMES_KEPT):
        self.limit = limit
        self.counts: dict[str, int] = {}  # replaced as a whole when names are dropped

    def add(self, name: str) -> None:
        """Count a name."""
        if name in self.counts or len(self.counts) < self.limit:
            self.counts[name] = self.counts.get(name, 0) + 1
        else:
            self.counts = {kept: count - 1 for kept, count in self.counts.items() if count > 1}


class HistogramRow(NamedTuple):
    """A histogram, as a row: one value of each connection that ended, or of each tunnel that started."""

    help: str  # its HELP line in /metrics
    bounds: tuple[float, ...]  # of its buckets, see Histogram
    value: Callable[[Any], float | None]  # takes the Ending or Start; returns seconds, or None: do not count it
    of: str = "ending"  # "ending": observes each Ending of sniroute_log; "start": each Start of sniroute_tunnels


HISTOGRAMS = {
    "sniroute_route_wait_seconds": HistogramRow(
        "Time from a connection's accept to the dial of its backend, waiting for a tunnel or resolver included.",
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0),
        lambda ending: ending.waited),
    "sniroute_connection_duration_seconds": HistogramRow(
        "Time from a connection's accept to its end, refused ones included.",
        (0.01, 0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 3600.0, 14400.0, 86400.0), lambda ending: ending.seconds),
    "sniroute_tunnel_start_seconds": HistogramRow(
        "Time from a tunnel's start until it listens.",
        (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 15.0, 30.0), lambda start: start.seconds, "start"),
}


REQUEST_HISTOGRAMS = {  # `value` takes an Access; each route has one for each class of its statuses
    "sniroute_http_first_byte_seconds": HistogramRow(
        "Time from the first byte of a request to the first one of its answer, by route and status class.",
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
        lambda access: access.first, "request"),
    "sniroute_http_request_duration_seconds": HistogramRow(
        "Time from the first byte of a request to the last one of its answer, by route and status class.",
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0),
        lambda access: access.seconds, "request"),
}
NO_ROUTE, OTHER_ROUTE = "-", "other"  # instead of a pattern: the request was led nowhere; one of too many routes


class Measured:
    """The requests of one route whose status is of one class."""

    __slots__ = ("count", "histograms")

    def __init__(self) -> None:
        self.count = 0
        self.histograms = {name: Histogram(row.bounds) for name, row in REQUEST_HISTOGRAMS.items()}

    def observe(self, access: Any) -> None:
        """Count a request."""
        self.count += 1
        for name, row in REQUEST_HISTOGRAMS.items():
            seen = row.value(access)
            if seen is not None:
                self.histograms[name].observe(seen)


class Requests:
    """The requests in plain HTTP, measured by route and status class, in bounded space.

    `router` is a Router.  The first REQUEST_ROUTES of its configured routes that are asked have rows of their own;
    further ones share OTHER_ROUTE.  After a reload those that are gone have made room.  Written by the thread `admin`.
    """

    def __init__(self, router: Any):
        self.router = router
        self.routes: Any = None  # those of the router that the rest is for
        self.labels: dict[str | None, str] = {}  # by pattern: what its rows are called
        self.room = REQUEST_ROUTES  # how many more patterns may have a label of their own
        self.rows: dict[tuple[str, str], Measured] = {}  # by label, and one of STATUS_CLASSES
        self.last: collections.deque[Any] = collections.deque(maxlen=REQUESTS_SHOWN)  # Accesses

    def add(self, access: Any) -> None:
        """Measure a request."""
        if self.routes is not self.router.routes:
            self._follow()
        self.last.append(access)
        key = self.labels.get(access.route) or self._name(access.route), STATUS_CLASSES[access.status // 100]
        measured = self.rows.get(key)
        if measured is None:
            measured = self.rows[key] = Measured()
        measured.observe(access)

    def _follow(self) -> None:
        """Forget the routes that a reload has taken out."""
        self.routes = self.router.routes
        own = {pattern: label for pattern, label in self.labels.items()
               if pattern == label and pattern in self.routes.tallies}
        self.room = REQUEST_ROUTES - len(own)
        self.labels = {None: NO_ROUTE, **own}
        # One assignment: other threads read it.
        self.rows = {key: row for key, row in self.rows.items() if key[0] in own or key[0] in (NO_ROUTE, OTHER_ROUTE)}

    def _name(self, pattern: str) -> str:
        """The label of a pattern that has none."""
        if pattern not in self.routes.tallies:
            return OTHER_ROUTE  # the request outlived its route
        self.labels[pattern] = pattern if self.room > 0 else OTHER_ROUTE
        self.room -= 1
        return self.labels[pattern]


class Totals(NamedTuple):
    """What happened since the router started; bytes of open connections are included."""

    accepted: int
    refused: int
    up: int  # bytes to backends
    down: int  # bytes to clients
    requests: int  # in plain HTTP


class Rates(NamedTuple):
    """A sample: what happened in each second since the sample before."""

    accepted: float
    refused: float
    up: float  # bytes to backends
    down: float  # bytes to clients
    requests: float  # in plain HTTP
    active: int  # connections at the moment of the sample


class Collector:
    """Takes in time the numbers that the router does not keep.

    `router` is a Router.  Its loop appends an Ending for each connection to `endings`, and an Access for each request
    to `accesses`, once the admin has assigned these to `router.endings` and `router.accesses`.  The thread `admin`
    calls `collect`; other threads only read copies.
    """

    def __init__(self, router: Any, clock: Callable[[], float] = time.monotonic):
        self.router = router
        self.clock = clock
        self.endings: collections.deque[Any] = collections.deque(maxlen=ENDINGS_MAX)
        self.accesses: collections.deque[Any] = collections.deque(maxlen=ACCESSES_MAX)
        self.histograms = {name: Histogram(row.bounds) for name, row in HISTOGRAMS.items()}
        self.observers = {of: [(self.histograms[name].observe, row.value) for name, row in HISTOGRAMS.items()
                               if row.of == of] for of in ("ending", "start")}
        self.names = TopNames()  # of refused clients
        self.refusals: collections.deque[Any] = collections.deque(maxlen=REFUSALS_SHOWN)  # Endings
        self.requests = Requests(router)
        self.samples: collections.deque[Rates] = collections.deque(maxlen=SAMPLES)
        self.last_start: Any = None  # the newest Start that was observed
        self.last_success: float = router.started  # wall time of the last reload that succeeded
        self.sampled = clock()
        self.totals = self._totals()  # at the time of the last sample

    def collect(self) -> None:
        """Take what is new, and sample the rates if SAMPLE has passed."""
        for _ in range(len(self.endings)):  # those there now; under load "until it is empty" may never be
            ending = self.endings.popleft()
            self._observe("ending", ending)
            if ending.reason in REFUSALS:
                self.refusals.append(ending)
                if ending.name is not None:
                    self.names.add(ending.name)
        for _ in range(len(self.accesses)):
            self.requests.add(self.accesses.popleft())
        for start in self._new_starts():
            self._observe("start", start)
            self.last_start = start
        succeeded, when = self.router.last_reload
        if succeeded:
            self.last_success = when
        passed = self.clock() - self.sampled
        if passed >= SAMPLE:
            self._sample(passed)

    def _new_starts(self) -> list[Any]:
        """The Starts behind `last_start`, oldest first; all, if the table has dropped that one already."""
        starts = copied(self.router.tunnels.started)
        for at in range(len(starts), 0, -1):
            if starts[at - 1] is self.last_start:  # not ==: two starts may be alike
                return starts[at:]
        return starts

    def _observe(self, of: str, what: Any) -> None:
        """Count an Ending or a Start in all histograms of that kind."""
        for observe, value in self.observers[of]:
            seen = value(what)
            if seen is not None:
                observe(seen)

    def _totals(self) -> Totals:
        """What happened so far.

        The counters are copied before the connections.  So the bytes of a connection that ends between the two copies
        are missed this time; in the other order they would be counted twice.
        """
        counters = copied(self.router.counters, dict)
        up, down = counters.get("bytes_up", 0), counters.get("bytes_down", 0)
        for connection in copied(self.router.connections):
            more = passed_on(connection)
            up += more[0]
            down += more[1]
        return Totals(counters.get("accepted", 0), sum(counters.get(kind, 0) for kind in REFUSALS), up, down,
                      counters.get("http_requests", 0))

    def _sample(self, passed: float) -> None:
        """Add a sample; `passed` is the seconds since the one before.

        A total that fell had missed some bytes (see `_totals`): it stays as it was, and the next sample has them.
        """
        self.sampled += passed
        totals = Totals(*map(max, self.totals, self._totals()))
        rates = ((after - before) / passed for before, after in zip(self.totals, totals))
        self.samples.append(Rates(*rates, active=len(self.router.connections)))
        self.totals = totals


class Facts:
    """Copies of what the router has at one moment.

    All numbers of one answer come from one Facts, so that they fit together.  Any thread makes it.
    """

    def __init__(self, router: Any, collector: Collector):
        self.router = router
        self.collector = collector
        self.now = time.time()
        self.routes = router.routes
        self.port_routes: tuple[Any, ...] = router.ports.routes  # those of listeners with one target
        # By pattern: `port ADDRESS` for these, which is no name.
        # Names and ports that are claimed are none of these: their owners choose them.
        self.tallies: dict[str, Any] = {**router.routes.tallies, **copied(router.ports.layer.tallies, dict)}
        for pattern in copied(router.claimed_ports):
            self.tallies.pop(pattern, None)
        self.counters: dict[str, int] = copied(router.counters, dict)
        self.tunnel_counters: dict[str, int] = copied(router.tunnels.counters, dict)
        self.connections: list[Any] = copied(router.connections)
        self.tunnels: list[Any] = router.tunnels.snapshot()  # Views
        self.failed: list[Any] = router.tunnels.failed()  # Views of starts that failed
        self.starts: list[Any] = copied(router.tunnels.started)
        book = router.targets.book  # None: no route has several backends
        self.groups: list[Any] = copied(book, lambda book: book.listed()) if book is not None else []
        # Each a Group, a Member, and how it stands, in a word.
        self.backends: list[tuple[Any, Any, str]] = [
            (group, *row) for group in self.groups for row in copied(group, lambda group: group.states()).items()]
        # By route and status class; None: no route serves HTTP.
        self.requests: dict[tuple[str, str], Measured] | None = \
            None if router.web is None else copied(collector.requests.rows, dict)
        # What a registry tells; None: there is none.
        self.registry: dict[str, Any] | None = None if router.registrar is None else router.registrar.facts()
        self.states = collections.Counter(view.state for view in (*self.tunnels, *self.failed))
        first, last = router.settings.ports
        self.ports = last - first + 1  # local ports that tunnels may have
        self.ports_used = sum(view.port > 0 for view in self.tunnels)


# -- /metrics ----------------------------------------------------------------------------------
#
# Source: Prometheus, "Exposition formats", text format 0.0.4; "Metric and label naming" for the names.


class Sample(NamedTuple):
    """One value of a metric: one line of /metrics."""

    value: float
    labels: dict[str, str] = {}
    suffix: str = ""  # behind the metric's name; a histogram has `_bucket`, `_sum` and `_count`


class Metric(NamedTuple):
    """One metric, as a row."""

    name: str  # ends with `_total` if it is a counter, else with its unit, if it has one
    kind: str  # its TYPE line: counter, gauge or histogram
    help: str  # its HELP line
    read: Callable[[Facts], Iterable[Sample]]


def one(value: Callable[[Facts], float | None]) -> Callable[[Facts], Iterable[Sample]]:
    """Read a metric without labels.  Where `value` returns None, this system cannot tell: there is no sample."""
    return lambda facts: [Sample(found) for found in (value(facts),) if found is not None]


def each(label: str, values: Callable[[Facts], dict[str, float]]) -> Callable[[Facts], Iterable[Sample]]:
    """Read a metric with one label; `values` returns {label's value: sample's value}."""
    return lambda facts: [Sample(value, {label: name}) for name, value in values(facts).items()]


def each_route(value: Callable[[Any], float], **labels: str) -> Callable[[Facts], Iterable[Sample]]:
    """Read a metric that each configured route has, and each port with one target.

    `value` takes its Tally; `labels` are further labels.
    """
    return lambda facts: [Sample(value(tally), {"route": pattern, **labels})
                          for pattern, tally in facts.tallies.items()]


def each_backend(value: Callable[[Any], float | None], **labels: str) -> Callable[[Facts], Iterable[Sample]]:
    """Read a metric that each configured backend of several has; None: it has none.

    `value` takes its Member; `labels` are further labels.
    """
    return lambda facts: [Sample(found, {"route": group.pattern, "backend": member.target, **labels})
                          for group, member, _ in facts.backends if (found := value(member)) is not None]


def by_word(label: str, **values: Callable[[Any], float | None]) -> Callable[[Facts], Iterable[Sample]]:
    """As each_backend, with one more label: a word, and the value for it."""
    reads = [each_backend(value, **{label: word}) for word, value in values.items()]
    return lambda facts: [sample for read in reads for sample in read(facts)]


def if_warm(value: Callable[[Any], float]) -> Callable[[Any], float | None]:
    """A number of a backend's pool of warm connections, from its Member; None where it has no pool."""
    def read(member: Any) -> float | None:
        """As each_backend's `value`."""
        pool = member.pool  # once: the loop may take it away
        return None if pool is None else value(pool)
    return read


def if_checked(value: Callable[[Any], float]) -> Callable[[Any], float | None]:
    """A number of a backend, from its Member; None where it is not checked actively."""
    return lambda member: value(member) if member.is_checked else None


def registered(label: str, values: Callable[[dict[str, Any]], dict[str, float]]) -> Callable[[Facts], Iterable[Sample]]:
    """Read a metric of the registry, with one label, or with none; `values` takes what it tells."""
    return lambda facts: [] if facts.registry is None else [
        Sample(float(value), {label: name} if label else {}) for name, value in values(facts.registry).items()]


def buckets(bounds: Sequence[float], counts: list[int], total_of_values: float, labels: dict[str, str] = {}
            ) -> Iterator[Sample]:
    """The samples of one histogram: cumulative buckets, the sum, and the count.  See Histogram."""
    total = 0
    for bound, count in zip((*bounds, float("inf")), copied(counts)):
        total += count
        yield Sample(total, {**labels, "le": show_number(bound)}, "_bucket")
    yield Sample(total_of_values, labels, "_sum")
    yield Sample(total, labels, "_count")


def connect_seconds(facts: Facts) -> Iterator[Sample]:
    """As Metric.read: a histogram for each configured backend of several."""
    for group, member, _ in facts.backends:
        yield from buckets(member.bounds, member.counts, member.sum, {"route": group.pattern, "backend": member.target})


def queue_seconds(facts: Facts) -> Iterator[Sample]:
    """As Metric.read: a histogram for each configured route with several backends."""
    for group in facts.groups:
        yield from buckets(group.bounds, group.waits, group.waits_sum, {"route": group.pattern})


def counted(name: str) -> Callable[[Facts], Iterable[Sample]]:
    """Read one of the router's counters."""
    return one(lambda facts: facts.counters.get(name, 0))


def tunnels_counted(name: str) -> Callable[[Facts], Iterable[Sample]]:
    """Read one of the tunnel table's counters."""
    return one(lambda facts: facts.tunnel_counters.get(name, 0))


def read_histogram(name: str) -> Callable[[Facts], Iterable[Sample]]:
    """Read a row of HISTOGRAMS."""
    def read(facts: Facts) -> Iterator[Sample]:
        """As Metric.read."""
        histogram = facts.collector.histograms[name]
        return buckets(histogram.bounds, histogram.counts, histogram.sum)
    return read


def requests_counted(facts: Facts) -> Iterator[Sample]:
    """As Metric.read: the requests of each route, by status class."""
    for (route, status), measured in (facts.requests or {}).items():
        yield Sample(measured.count, {"route": route, "status": status})


def read_requests(name: str) -> Callable[[Facts], Iterable[Sample]]:
    """Read a row of REQUEST_HISTOGRAMS."""
    def read(facts: Facts) -> Iterator[Sample]:
        """As Metric.read."""
        for (route, status), measured in (facts.requests or {}).items():
            histogram = measured.histograms[name]
            yield from buckets(histogram.bounds, histogram.counts, histogram.sum, {"route": route, "status": status})
    return read


def resident_memory() -> int | None:
    """Bytes of this process that are in memory (proc(5), statm); None without /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return None


def open_descriptors() -> int | None:
    """How many descriptors this process has open; None without /proc."""
    try:
        # Linux 6.2 and later give the number as the folder's size; before that it is 0, and they are listed.
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


def process_started(otherwise: float) -> float:
    """When this process began, as wall time (proc(5), field 22 of stat); `otherwise` without /proc."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # the name in brackets may contain blanks
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return otherwise


METRICS = (
    Metric("sniroute_build_info", "gauge", "What runs, as labels; always 1.", lambda facts: [
        Sample(1, {"version": __version__, "python": platform.python_version()})]),
    Metric("sniroute_up_since_timestamp_seconds", "gauge", "When the router started.",
           one(lambda facts: facts.router.started)),
    Metric("sniroute_draining", "gauge", "Whether the router accepts no more because it is about to end.",
           one(lambda facts: int(facts.router.phase not in ("running", "lameduck")))),
    Metric("sniroute_paused", "gauge", "Whether it accepts nobody for now: connections or descriptors are short.",
           one(lambda facts: int(facts.router.paused))),
    Metric("sniroute_connections_active", "gauge", "Connections now.", one(lambda facts: len(facts.connections))),
    Metric("sniroute_max_connections", "gauge", "Connections that there may be (--max-connections).",
           one(lambda facts: facts.router.max_connections)),
    Metric("sniroute_accepted_total", "counter", "Connections accepted.", counted("accepted")),
    Metric("sniroute_connections_total", "counter", "Connections that are over, by how they ended.",
           each("result", lambda facts: {result: facts.counters.get(result, 0) for result in RESULTS})),
    Metric("sniroute_retries_total", "counter", "Connections that were dialled again, unnoticed by the client.",
           counted("retries")),
    Metric("sniroute_bytes_total", "counter", "Bytes passed on, as of the last second.",
           each("direction", lambda facts: {"up": facts.collector.totals.up, "down": facts.collector.totals.down})),
    Metric("sniroute_route_connections_active", "gauge", "Connections of a route now.",
           each_route(lambda tally: tally.active)),
    Metric("sniroute_route_connections_total", "counter", "Connections of a route that are over.",
           each_route(lambda tally: tally.total)),
    Metric("sniroute_route_refused_total", "counter", "Connections of a route that were refused.",
           each_route(lambda tally: tally.refused)),
    Metric("sniroute_route_bytes_total", "counter", "Bytes of a route's connections that are over.",
           lambda facts: (*each_route(lambda tally: tally.up, direction="up")(facts),
                          *each_route(lambda tally: tally.down, direction="down")(facts))),
    Metric("sniroute_backend_up", "gauge", "Whether a backend of several is not down.",
           each_backend(lambda member: int(not member.why))),
    Metric("sniroute_backend_drained", "gauge", "Whether an operator wants no new client led to a backend.",
           each_backend(lambda member: int(member.is_drained))),
    Metric("sniroute_backend_connections", "gauge", "Connections of a backend now.",
           each_backend(lambda member: member.active)),
    Metric("sniroute_backend_connect_seconds", "histogram", "Time that a client's connect to a backend took.",
           connect_seconds),
    Metric("sniroute_backend_failures_total", "counter",
           "Clients that a backend did not serve, and connects to it ahead of clients that failed.",
           each_backend(lambda member: member.failures)),
    Metric("sniroute_backend_checks_total", "counter", "Active checks of a backend, by how they went.",
           by_word("result", good=if_checked(lambda member: member.checks_good),
                   bad=if_checked(lambda member: member.checks_bad))),
    Metric("sniroute_backend_warm", "gauge",
           "Connections to a backend that wait for a client now, and those being dialled for that.",
           by_word("state", idle=if_warm(lambda pool: len(pool.idle)),
                   dialling=if_warm(lambda pool: len(pool.dialling)))),
    Metric("sniroute_backend_warm_used_total", "counter",
           "Clients that got a warm connection (hit) or found none (miss); warm ones found ended by then (dead).",
           by_word("result", hit=if_warm(lambda pool: pool.hit), miss=if_warm(lambda pool: pool.miss),
                   dead=if_warm(lambda pool: pool.dead))),
    Metric("sniroute_backend_queue_length", "gauge", "Clients of a route that wait for a backend with room.",
           lambda facts: [Sample(len(group.waiting), {"route": group.pattern}) for group in facts.groups]),
    Metric("sniroute_backend_queue_seconds", "histogram",
           "Time that clients of a route have waited for a backend with room, until their turn or in vain.",
           queue_seconds),
    Metric("sniroute_tunnels", "gauge", "Tunnels by state; a failed one is not tried again for a while.",
           each("state", lambda facts: {state: facts.states[state] for state in TUNNEL_STATES})),
    Metric("sniroute_max_tunnels", "gauge", "Tunnels that there may be (--max-tunnels).",
           one(lambda facts: facts.router.tunnels.max_tunnels)),
    Metric("sniroute_tunnel_starts_total", "counter", "Starts of tunnels, by how they went.",
           each("result", lambda facts: {"ready": facts.tunnel_counters.get("ready", 0),
                                         "failed": facts.tunnel_counters.get("failures", 0)})),
    Metric("sniroute_tunnel_launches_total", "counter", "Tries to start a tunnel: one start may take several.",
           tunnels_counted("starts")),
    Metric("sniroute_tunnel_processes_total", "counter", "Processes of tunnel programs that were started.",
           tunnels_counted("processes")),
    Metric("sniroute_tunnel_restarts_total", "counter", "Ready tunnels whose process ended by itself.",
           tunnels_counted("crashes")),
    Metric("sniroute_tunnel_stops_total", "counter", "Tunnels stopped for want of use, or to make room.",
           each("reason", lambda facts: {"idle": facts.tunnel_counters.get("idle_stops", 0),
                                         "evicted": facts.tunnel_counters.get("evictions", 0)})),
    Metric("sniroute_tunnels_linked", "gauge", "Tunnels whose far end has dialled in: NodePass clients.",
           one(lambda facts: sum(view.link is not None for view in facts.tunnels))),
    Metric("sniroute_tunnel_links_total", "counter", "Times that the far end of a tunnel has dialled in.",
           tunnels_counted("links")),
    Metric("sniroute_port_pool_size", "gauge", "Local ports for tunnels (--ports).", one(lambda facts: facts.ports)),
    Metric("sniroute_port_pool_used", "gauge", "Local ports that tunnels have.", one(lambda facts: facts.ports_used)),
    *(Metric(name, "histogram", row.help, read_histogram(name)) for name, row in HISTOGRAMS.items()),
    Metric("sniroute_http_requests_total", "counter",
           "Requests in plain HTTP that are over, by route and status class.", requests_counted),
    *(Metric(name, "histogram", row.help, read_requests(name)) for name, row in REQUEST_HISTOGRAMS.items()),
    Metric("sniroute_registry_claims", "gauge", "Names and ports in the registry: claimed, or held for their owners.",
           registered("state", lambda facts: {"live": facts["claims"], "held": facts["held"]})),
    Metric("sniroute_registry_events_total", "counter", "What has happened to claims.",
           registered("event", lambda facts: facts["events"])),
    Metric("sniroute_registry_refusals_total", "counter", "Requests of owners that were refused, by why.",
           registered("reason", lambda facts: facts["refusals"])),
    Metric("sniroute_registry_store_up", "gauge", "Whether the registry's store can be written to.",
           registered("", lambda facts: {"": facts["store_up"]})),
    Metric("sniroute_registry_store_last_contact_timestamp_seconds", "gauge",
           "When the registry's store, a Redis, has answered or told something last.",
           registered("", lambda facts: {} if facts["heard_at"] is None else {"": facts["heard_at"]})),
    Metric("sniroute_registry_store_writes_total", "counter", "Writes to the registry's store that are over.",
           registered("", lambda facts: {"": facts["writes"]})),
    Metric("sniroute_registry_store_write_seconds_total", "counter", "Seconds that these took together.",
           registered("", lambda facts: {"": facts["write_seconds"]})),
    Metric("sniroute_reloads_total", "counter", "Reloads of the settings, by how they went.",
           each("result", lambda facts: {result: facts.router.reloads[result] for result in ("ok", "failed")})),
    Metric("sniroute_config_last_reload_successful", "gauge", "Whether the last reload went well.",
           one(lambda facts: int(facts.router.last_reload[0]))),
    Metric("sniroute_config_last_reload_success_timestamp_seconds", "gauge", "When settings were last taken over.",
           one(lambda facts: facts.collector.last_success)),
    Metric("process_start_time_seconds", "gauge", "When the process began.",
           one(lambda facts: process_started(facts.router.started))),
    Metric("process_cpu_seconds_total", "counter", "CPU time of the process; tunnels are processes of their own.",
           one(lambda facts: time.process_time())),
    Metric("process_resident_memory_bytes", "gauge", "Memory of the process; without that of the tunnels.",
           one(lambda facts: resident_memory())),
    Metric("process_open_fds", "gauge", "Open descriptors.", one(lambda facts: open_descriptors())),
    Metric("process_max_fds", "gauge", "Descriptors that may be open.",
           one(lambda facts: resource.getrlimit(resource.RLIMIT_NOFILE)[0])),
)


def escape_label(value: str) -> str:
    """A label's value, as it stands between quotes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def show_number(value: float) -> str:
    """A sample's value, or a bucket's bound."""
    return "+Inf" if value == float("inf") else repr(value)


def expose(facts: Facts) -> bytes:
    """All metrics in Prometheus' text format, version 0.0.4."""
    lines = []
    for metric in METRICS:
        samples = list(metric.read(facts))
        if not samples:
            continue  # a system that cannot tell, no route with several backends, no request in plain HTTP
        lines.append(f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}\n")
        for sample in samples:
            labels = ",".join(f'{name}="{escape_label(value)}"' for name, value in sample.labels.items())
            lines.append(f"{metric.name}{sample.suffix}{labels and f'{{{labels}}}'} {show_number(sample.value)}\n")
    return "".join(lines).encode()


# -- /status -----------------------------------------------------------------------------------


def show_connection(connection: Any, now: float) -> dict[str, Any]:
    """A row of `oldest_connections`; `now` is a time of the monotonic clock."""
    decision, way = connection.decision, connection.backend
    up, down = passed_on(connection)
    return {"client": printable(show_address(connection.address)), "name": printable(connection.name or ""),
            "route": printable(decision.route.pattern if decision else ""),
            "backend": printable(way.target if way else decision.target if decision else ""), "state": connection.state,
            "seconds": round(now - connection.began, 3), "up": up, "down": down}


def show_tunnel(view: Any) -> dict[str, Any]:
    """A row of `tunnels`: the fields of a View."""
    row = view._asdict()
    return {**row, "key": printable(str(view.key)), "words": printable(view.words, 300),
            "age": round(view.age, 3), "next": round(view.next, 3),
            "link": None if view.link is None else view.link._asdict()}


def show_refusal(ending: Any) -> dict[str, Any]:
    """A row of `last_refusals`."""
    return {"when": round(ending.when, 3), "client": printable(show_address(ending.client)),
            "name": printable(ending.name or ""), "route": printable(ending.route or ""), "reason": ending.reason,
            "detail": printable(ending.detail or "", 300)}


def show_request(access: Any) -> dict[str, Any]:
    """A row of `last_requests`."""
    return {"when": round(access.when, 3), "client": printable(show_address(access.client)),
            "method": printable(access.method), "host": printable(access.host),
            "path": printable(access.path, VALUE_MAX), "status": access.status or None,
            "up": access.up, "down": access.down,
            "first": None if access.first is None else round(access.first, 4), "seconds": round(access.seconds, 4),
            "route": printable(access.route or ""), "backend": printable(access.backend or ""),
            "reason": access.reason, "detail": printable(access.detail or "", 300)}


def show_requests(counters: dict[str, int]) -> dict[str, Any]:
    """What `http` says: how many requests there were, and how many of each status class."""
    return {"requests": counters.get("http_requests", 0), "statuses": {
        each: counters[name] for each, name in zip(STATUS_CLASSES, COUNTER_OF) if counters.get(name)}}


def show_route(route: Any, tally: Any, up: int, down: int) -> dict[str, Any]:
    """A row of `routes`; `up` and `down` are the bytes of its open connections, which its Tally lacks."""
    return {"pattern": printable(route.pattern), "target": printable(route.target), "active": tally.active,
            "total": tally.total, "refused": tally.refused, "up": tally.up + up, "down": tally.down + down}


def show_backend(group: Any, member: Any, state: str, now: float) -> dict[str, Any]:
    """A row of `backends`; `now` is a time of the monotonic clock."""
    pool = member.pool
    return {"route": printable(group.pattern), "backend": printable(member.target), "state": state,
            "why": printable(member.why, 300), "since": round(max(now - member.since, 0.0), 3),
            "next": round(max(member.until - now, 0.0), 3) if member.why else 0,
            "active": member.active, "limit": group.options.max_backend_connections, "waiting": len(group.waiting),
            "near": member.is_near, "results": member.results(), "failures": member.failures,
            "connect_seconds": member.seconds and round(member.seconds, 6),
            "checks": {"good": member.checks_good, "bad": member.checks_bad} if member.is_checked else None,
            "warm": None if pool is None else {"idle": len(pool.idle), "dialling": len(pool.dialling),
                                               "hit": pool.hit, "miss": pool.miss, "dead": pool.dead}}


def shown_backends(backends: list[tuple[Any, Any, str]]) -> list[tuple[Any, Any, str]]:
    """As many as are shown, in their order; where there are more, first those that are not good."""
    if len(backends) <= BACKENDS_SHOWN:
        return backends
    return sorted(backends, key=lambda row: row[2] == "good")[:BACKENDS_SHOWN]


def status(facts: Facts) -> dict[str, Any]:
    """What /status says of the router, ready for JSON.

    Times are seconds: `started`, `now` and all named `when` or `last` are wall time; the rest are durations.
    Every long list is a member of the outermost dict, as the admin encodes such a list row by row.
    The admin adds a field of its own: `control`, whether it takes orders.
    """
    router, collector, counters = facts.router, facts.collector, facts.counters
    now = time.monotonic()
    live: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])  # pattern: bytes up and down
    for connection in facts.connections:
        if connection.decision is not None:
            up, down = passed_on(connection)
            row = live[connection.decision.route.pattern]
            row[0] += up
            row[1] += down
    oldest = heapq.nsmallest(CONNECTIONS_SHOWN, facts.connections, key=lambda connection: connection.began)
    results = {result: counters[result] for result in RESULTS if counters.get(result)}
    names = heapq.nlargest(NAMES_SHOWN, collector.names.counts.items(), key=lambda item: item[1])
    samples = copied(collector.samples)
    return {
        "version": __version__, "pid": os.getpid(), "started": router.started, "now": facts.now,
        "uptime": round(facts.now - router.started, 3), "phase": router.phase, "paused": router.paused,
        "listening": [show_address(address) for address in router.targets.own],
        "limits": {"connections": router.max_connections, "tunnels": router.tunnels.max_tunnels, "ports": facts.ports},
        "connections": {
            "active": len(facts.connections), "accepted": counters.get("accepted", 0),
            "states": collections.Counter(connection.state for connection in facts.connections),
            "results": results, "retries": counters.get("retries", 0)},
        "http": None if facts.requests is None else show_requests(counters),
        "registry": facts.registry,
        "bytes": {"up": collector.totals.up, "down": collector.totals.down},
        "reloads": {"ok": router.reloads["ok"], "failed": router.reloads["failed"],
                    "last_ok": router.last_reload[0], "last": router.last_reload[1]},
        "backend_states": collections.Counter(state for _, _, state in facts.backends),
        "tunnel_states": {state: facts.states[state] for state in TUNNEL_STATES},
        "tunnel_counters": facts.tunnel_counters, "ports_used": facts.ports_used,
        "refusals": {kind: count for kind, count in results.items() if kind in REFUSALS},
        "rates": {"every": SAMPLE, **{name: [round(getattr(sample, name), 3) for sample in samples]
                                      for name in Rates._fields}},
        "refused_names": [{"name": printable(name), "count": count} for name, count in names],
        "last_refusals": [show_refusal(ending) for ending in reversed(copied(collector.refusals))],
        "last_requests": [] if facts.requests is None else [
            show_request(access) for access in reversed(copied(collector.requests.last))],
        "slowest_starts": [
            {"key": printable(str(start.key)), "when": round(start.when, 3), "seconds": round(start.seconds, 3)}
            for start in heapq.nlargest(STARTS_SHOWN, facts.starts, key=lambda start: start.seconds)],
        "tunnels": list(map(show_tunnel, (*facts.tunnels, *facts.failed)[:TUNNELS_SHOWN])),
        "routes": [show_route(route, facts.tallies[route.pattern], *live[route.pattern])
                   for route in (*facts.port_routes, *facts.routes.routes)[:ROUTES_SHOWN]
                   if route.pattern in facts.tallies],  # a reload may have taken it out since
        "backends": [show_backend(*row, now) for row in shown_backends(facts.backends)],
        "claims": [] if facts.registry is None else router.registrar.shown(CLAIMS_SHOWN),
        "oldest_connections": [show_connection(connection, now) for connection in oldest],
    }
