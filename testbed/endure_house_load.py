"""endure_house_load: the clients of `house`, and what they keep of what they were told.

    Ledger     the faults so far: from when to when, and which parts of the house each has touched
    Lane       a kind of client on one way through the house: one attempt after another, in a thread
    Streams, Psql, Download, Upload, Page, Reach      the kinds (LANES says which ways there are)
    Load       all lanes, from `start` to `stop`; then perhaps again

A part is a word, as "postgres" or "router one".  A lane knows the parts that its bytes pass.  An attempt that fails is
excused where a fault touched one of these parts in its time of life, or CALM before it; or where no attempt of the lane
was served since that fault, and it is over for less than BACK.  Every other failure is a fault of the product, and so is
a wrong byte, always.

What has to be acknowledged (rows, uploads) is tried again until it is, also once the load has been stopped.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import zlib
from typing import Callable, Iterator, NamedTuple

from testbed.endure_house_web import WORDS, content
from testbed.endure_router import HOST
from testbed.endure_streams import (ENDS_FIRST, PATTERN, PERIOD, Cut, Opening, Wrong, exactly, hello_for, log_uniform,
                                    open_stream, pass_stream)

CALM = 4.0  # seconds behind a fault, for what was on its way: a connection that was ready before, and is found dead now
BACK = 30.0  # seconds behind a fault within which each lane is served again
SILENCE = 15  # seconds without a byte after which an attempt has failed
LARGEST = 1 << 19  # bytes of a direction of a stream
PROBLEMS_MAX = 200  # that are kept: a lane that is broken for an hour says the same again and again
ALERT = b"\x15"  # the first byte of what a refused client reads
FOR_EVER = float("inf")


class Entry:
    """A fault."""

    def __init__(self, what: str, parts: frozenset[str]):
        self.what = what
        self.parts = parts
        self.began = time.monotonic()
        self.over = FOR_EVER


class Ledger:
    """The faults so far.  Any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards what follows
        self.entries: list[Entry] = []

    @contextlib.contextmanager
    def broken(self, what: str, *parts: str) -> Iterator[Entry]:
        """For the time of the block these parts are broken."""
        entry = Entry(what, frozenset(parts))
        with self.lock:
            self.entries.append(entry)
        try:
            yield entry
        finally:
            entry.over = time.monotonic()

    def last(self, parts: frozenset[str], before: float = FOR_EVER) -> float:
        """When the last fault was over that touched one of these and began `before`: infinite while there is one."""
        with self.lock:
            return max((entry.over for entry in self.entries if entry.parts & parts and entry.began <= before),
                       default=-FOR_EVER)

    def told(self, parts: frozenset[str], count: int = 3) -> str:
        """The last faults that touched one of these, for people."""
        now = time.monotonic()
        with self.lock:
            rows = [entry for entry in self.entries if entry.parts & parts][-count:]
        return "; ".join(f"{row.what}, {now - row.began:.1f} to {max(0.0, now - row.over):.1f} s ago" for row in rows) or "none"


class Place(NamedTuple):
    """Where a router is, for its clients."""

    word: str  # "one", "two"
    listen: tuple[str, int]
    registry: tuple[str, int]


class Lane:
    """A kind of client on one way.  A subclass has `attempt`; it may have `begin`, which makes what is tried again."""

    kind = ""
    pause = 0.1  # seconds between two attempts: the host has two cores
    is_measured = True  # whether it says how soon a way is open again

    def __init__(self, load: Load, name: Callable[[], str], place: Place, *parts: str):
        self.load = load
        self.name = name  # the name that it asks for now
        self.place = place
        self.parts = frozenset([f"router {place.word}", *parts] if place.word else parts)
        self.well = -FOR_EVER  # when the last attempt began that was served
        self.failed = -FOR_EVER  # when one ended last that was not
        self.said = ""  # how the last one ended that was not
        self.served = 0

    def attempt(self, rng: random.Random) -> str:
        """One client.  Returns "" where it was served, else how it ended; "refused" or "cut" comes first.  Raises Wrong."""
        raise NotImplementedError

    def begin(self, rng: random.Random) -> None:
        """A new item, for one or several attempts."""

    def run(self, rng: random.Random) -> None:
        """Come again and again.  An item is tried until it is served; once the load is stopped, for BACK at most."""
        load, until, pause = self.load, FOR_EVER, 0.0
        while not load.stopping.wait(pause if load.turns == 1 or pause else self.pause * rng.random()):
            pause = self.pause * load.pace * rng.uniform(0.5, 1.5)
            self.begin(rng)
            while not self.tried(rng):
                if load.stopping.is_set():
                    until = min(until, time.monotonic() + BACK)
                    if time.monotonic() > until:
                        load.problem(f"{self}: it was not served any more, {BACK:g} s after the end of all faults")
                        return
                time.sleep(0.1)

    def tried(self, rng: random.Random) -> bool:
        """One attempt, and what it means.  Returns whether it was served."""
        load, name, began = self.load, self.name(), time.monotonic()
        try:
            said = self.attempt(rng)
        except Wrong as wrong:
            load.problem(f"{self}: {wrong}")
            said = "cut: a wrong byte"
        except (Cut, OSError) as error:
            said = f"cut: {error or type(error).__name__}"
        ended = time.monotonic()
        last = load.ledger.last(self.parts, ended)
        if not said:
            if self.failed > self.well and self.well < last <= began:
                if self.is_measured:
                    load.recovered(self.kind, ended - last)
                if began > last + BACK:
                    load.problem(f"{self}: served again {began - last:.1f} s after: {load.ledger.told(self.parts)}")
            self.well, self.served = began, self.served + 1
            load.count(f"{self.kind} served")
            return True
        load.count(f"{self.kind} {said.partition(':')[0]}")
        if began > last + CALM and (self.well > last or ended > last + BACK):
            load.problem(f"{self}: {said} after {ended - began:.1f} s; faults there: {load.ledger.told(self.parts)}; "
                         f"the log: {load.log_of(self.place.word, name)}")
        self.failed, self.said = ended, said
        return False

    def __str__(self) -> str:
        return f"{self.kind} {self.name()} by {', '.join(sorted(self.parts))}"

    # -- what attempts are made of

    def connect(self) -> socket.socket:
        """A socket whose reads and writes fail after a while."""
        sock = socket.create_connection(self.place.listen, SILENCE)
        sock.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", SILENCE, 0))
        return sock

    def program(self, *words: str, said: bytes = b"", patience: float = SILENCE + 5) -> subprocess.CompletedProcess[bytes]:
        """Run a client to its end, or until it has taken too long: then its exit code is that of a signal."""
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   start_new_session=True, env=self.load.environ)
        try:
            out, err = process.communicate(said, patience)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        return subprocess.CompletedProcess(words, process.returncode, out, err)


class Streams(Lane):
    """Checked streams (endure_streams).  `may_end_first`: the way carries a half-close."""

    kind = "streams"

    def __init__(self, *args: object, shelf: int, kind: str, may_end_first: bool = False):
        super().__init__(*args)
        self.shelf, self.kind, self.may_end_first = shelf, kind, may_end_first

    def attempt(self, rng: random.Random) -> str:
        start = rng.randrange(PERIOD)
        while PATTERN.startswith(ALERT, start):
            start = rng.randrange(PERIOD)  # so that the first byte tells a refusal from the backend's bytes
        opening = Opening(flags=ENDS_FIRST if self.may_end_first and rng.random() < 0.5 else 0, shelf=self.shelf,
                          seed=rng.randrange(1 << 32), start_up=rng.randrange(PERIOD), size_up=log_uniform(rng, LARGEST),
                          start_down=start, size_down=log_uniform(rng, LARGEST))
        with self.connect() as sock:
            open_stream(sock, hello_for(self.name(), rng), opening)
            first = sock.recv(1, socket.MSG_PEEK)
            if first in (b"", ALERT):
                return f"refused: {first!r}"
            pass_stream(sock, opening)
        return ""


class Psql(Lane):
    """psql writes rows, and reads something."""

    kind = "psql"
    pause = 0.4

    def begin(self, rng: random.Random) -> None:
        with self.load.lock:
            first = self.load.rows
            self.load.rows += (count := rng.choice((1, 2, 20)))
        self.ids = [f"{self.load.seed}-{number}" for number in range(first, first + count)]
        self.load.sent.update(self.ids)

    def attempt(self, rng: random.Random) -> str:
        load = self.load
        values = ", ".join(f"('{key}', md5('{key}'))" for key in self.ids)
        times = rng.choice((1, 100, 20_000))
        ended = self.program(
            "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", f"insert into rows values {values} on conflict do nothing",
            "-c", f"select repeat(md5('{self.ids[0]}'), {times})",
            f"host={self.name()} hostaddr={HOST} port={self.place.listen[1]} user=postgres dbname=postgres "
            f"sslmode=verify-full sslrootcert={load.folder / 'ca.pem'} connect_timeout={SILENCE}")
        if ended.returncode:
            return f"cut: {ended.returncode} {ended.stderr.decode(errors='replace').strip()}"
        if ended.stdout.decode() != hashlib.md5(self.ids[0].encode()).hexdigest() * times + "\n":
            raise Wrong(f"psql has read {ended.stdout[:80]!r}, {len(ended.stdout)} bytes")
        with load.lock:
            load.acknowledged["rows"].update(dict.fromkeys(self.ids, ""))
        return ""


class Curl(Lane):
    """What curl is told; `scheme` is https, or http where the router reads the Host."""

    pause = 0.3

    def __init__(self, *args: object, scheme: str = "https"):
        super().__init__(*args)
        self.scheme = scheme

    def curl(self, path: str, *words: str, said: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        name, port = self.name(), self.place.listen[1]
        return self.program(
            "curl", "-q", "-sSf", "-m", str(SILENCE), "--noproxy", "*", "--cacert", str(self.load.folder / "ca.pem"),
            "--resolve", f"{name}:{port}:{HOST}", *words, f"{self.scheme}://{name}:{port}{path}", said=said)


class Download(Curl):
    """curl reads bytes that are known."""

    kind = "curl"

    def attempt(self, rng: random.Random) -> str:
        size, seed = log_uniform(rng, 1 << 20), rng.randrange(1 << 32)
        ended = self.curl(f"/bytes/{size}/{seed}")
        if ended.returncode:
            return f"cut: {ended.returncode} {ended.stderr.decode(errors='replace').strip()}"
        if hashlib.sha256(ended.stdout).digest() != hashlib.sha256(content(size, seed)).digest():
            raise Wrong(f"curl was content with {len(ended.stdout)} bytes, which are not the {size} of {seed}")
        return ""


class Upload(Curl):
    """curl sends bytes, and the far end says their checksum.  Each attempt has an ID of its own: it may come once."""

    kind = "upload"

    def begin(self, rng: random.Random) -> None:
        with self.load.lock:
            self.load.uploads += 1
            self.item = f"{self.load.seed}-{self.load.uploads}"
        self.body = rng.randbytes(log_uniform(rng, 1 << 20))
        self.tries = 0

    def attempt(self, rng: random.Random) -> str:
        self.tries += 1
        key = f"{self.item}.{self.tries}"
        ended = self.curl(f"/up/{key}", "-H", "Expect:", "--data-binary", "@-", said=self.body)
        if ended.returncode:
            return f"cut: {ended.returncode} {ended.stderr.decode(errors='replace').strip()}"
        digest = hashlib.sha256(self.body).hexdigest()
        if ended.stdout.decode(errors="replace") != digest:
            raise Wrong(f"curl has sent {digest}, and heard {ended.stdout[:80]!r}")
        with self.load.lock:
            self.load.acknowledged["uploads"][key] = digest
        return ""


class Page(Lane):
    """A browser shows a page."""

    kind = "chromium"
    pause = 12.0

    def attempt(self, rng: random.Random) -> str:
        profile = self.load.folder / "browser"
        ended = self.program(
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-extensions", "--disable-background-networking", "--ignore-certificate-errors", "--enable-logging=stderr",
            f"--user-data-dir={profile}", f"--host-resolver-rules=MAP *.example.test {HOST}", "--dump-dom",
            f"https://{self.name()}:{self.place.listen[1]}/page", patience=40)
        shutil.rmtree(profile, ignore_errors=True)
        text = ended.stdout.decode(errors="replace")
        shown = re.search(r'<p id="said">(.*?)</p>', text)
        if ended.returncode or shown is None or shown[1].split() != list(WORDS):
            errors = ended.stderr.decode(errors="replace").strip().splitlines()[-3:]
            return f"cut: {ended.returncode}, a page of {len(text)} bytes that says {shown and shown[1]!r}, {errors}"
        return ""


class Reach(Lane):
    """Who is reached under a claimed name."""

    kind = "names"

    def __init__(self, *args: object, owner: str):
        super().__init__(*args)
        self.owner = owner

    def attempt(self, rng: random.Random) -> str:
        said = self.asked(self.name(), rng)
        if said != self.owner and not said.startswith(("refused", "cut")):
            raise Wrong(f"{said} is there instead of {self.owner}")
        return "" if said == self.owner else said

    def asked(self, name: str, rng: random.Random) -> str:
        """The owner's word; or "refused: ...", "cut: ...".  Raises Wrong."""
        wire = hello_for(name, rng)
        try:
            with self.connect() as sock:
                sock.sendall(wire)
                said = exactly(sock, 1)
                if said in (b"", ALERT):
                    return f"refused: {said!r}" if said else "cut: no answer"
                while not said.endswith(b"\n") and (more := sock.recv(100)):
                    said += more
        except OSError as error:
            return f"cut: {error}"
        if not said.endswith(b"\n"):
            return f"cut: behind {said!r}"
        owner, heard = said.decode().split()
        if int(heard) != zlib.crc32(wire):
            raise Wrong(f"{owner} has heard another hello")
        return owner


class Load:
    """All lanes.  What they keep is guarded by `lock`.  `pace`: their pauses are so many times as long."""

    def __init__(self, folder: pathlib.Path, ledger: Ledger, seed: int, pace: float):
        self.folder = folder
        self.ledger = ledger
        self.seed = seed
        self.pace = pace
        self.environ = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "HOME": str(folder)}
        self.lanes: list[Lane] = []
        self.log_of: Callable[[str, str], str] = lambda place, name: ""  # what a router's log said last of a name
        self.stopping = threading.Event()
        self.threads: list[threading.Thread] = []
        self.turns = 0
        self.lock = threading.Lock()  # guards what follows
        self.counts: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.waits: dict[str, list[float]] = collections.defaultdict(list)  # by kind: seconds from a fault's end
        self.rows = self.uploads = 0  # made so far
        self.sent: set[str] = set()  # ids of rows
        self.acknowledged: dict[str, dict[str, str]] = {"rows": {}, "uploads": {}}

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def problem(self, what: str) -> None:
        with self.lock:
            if len(self.problems) < PROBLEMS_MAX:
                self.problems.append(what)

    def recovered(self, kind: str, seconds: float) -> None:
        with self.lock:
            self.waits[kind].append(seconds)

    def start(self) -> None:
        """Begin."""
        self.stopping.clear()
        self.turns += 1
        self.threads = [threading.Thread(target=self.run, args=(lane, random.Random(f"{self.seed} {number} {self.turns}")),
                                         name="house-load") for number, lane in enumerate(self.lanes)]
        for thread in self.threads:
            thread.start()

    def run(self, lane: Lane, rng: random.Random) -> None:
        """A lane's thread."""
        try:
            lane.run(rng)
        except Exception as error:  # a fault of the test: it must not pass for a success
            self.problem(f"{lane}: {type(error).__name__}: {error}")

    def stop(self) -> None:
        """End, and wait for it."""
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        self.threads = []
