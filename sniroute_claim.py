"""sniroute_claim: claim a name, keep it, and give it back at the end: `sniroute.py claim`.

    sniroute.py claim shop tcp:127.0.0.1:8080 -- python3 -m http.server 8080
                       |                                   |
          Claimer ---- POST /routes ----> a registry       | a command beside it: it runs while the name is ours,
             |    ---- POST .../renew     (of a router)    | and its end is the end of the claim
             |    ---- DELETE                              |
             +-- prints the name, each time that it has become ours

What becomes of a claim is `Claimer.state`:

    SEEKING -> OURS          claimed; renewed at a third of its ttl
    OURS -> SEEKING          the registry was away for too long, or has forgotten the claim: claimed again
    SEEKING -> OURS          the registry has kept the claim all the same: whose it is tells the next renewal
    OURS -> LOST             another client of the same owner has taken it over: we do not take it back
    SEEKING -> REFUSED       the registry says no, and would say so again
    any -> OVER              a signal, or the end of the command: released

A registry that is away, or too busy, is asked again, later each time, for ever.  Where the name was ours, and another
has it by now, we ask for it again, too: the other may leave.

This is a process of its own; sniroute_claims, with an s, is the table of claims in the router.

Threads: `main` does all; the thread `command` waits for the command's end, and wakes it.

Seams: I want to ...
    give a claim another field         OPTIONS and USAGE; `wish_of` where it is not called as in the body of a POST
    do otherwise at some answer        `Claimer.step`

The token comes from SNIROUTE_REGISTRY_TOKEN, and the key of a NodePass server from a variable that its target names, so
that no user of this host reads them on a command line.

This room imports sniroute_names (printable), the standard library, and for `token` late sniroute_owners.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from typing import Any, Callable, Mapping, NamedTuple

from sniroute_names import printable

__version__ = "0.1.0"

USAGE = """\
usage: sniroute.py claim NAME TARGET [options] [-- COMMAND ...]

Claims NAME in the registry of a router, so that the router leads it to TARGET.  Prints the name, and keeps it until
COMMAND ends, or this program does.

  NAME      shop, or shop.tun.example.com; "-" for one at random; tcp:PORT for a port, tcp for any port
  TARGET    where the name leads, as tcp:192.0.2.10:8080
  COMMAND   is started once the name is claimed, and has it in SNIROUTE_NAME

options:
  --registry URL       where the registry is: http://HOST:PORT, https://HOST, or unix:PATH (default:
                       SNIROUTE_REGISTRY_URL, else http://127.0.0.1:19002)
  --ttl SECONDS        the claim ends so long after its last renewal (default: what the registry says)
  --allow CIDR,...     only these clients may use the name
  --http MODE          what plain HTTP gets: refuse, forward, forward-tls, redirect or pass
  --meta KEY=VALUE     a note on the claim; repeatable
  --no-takeover        fail where another client of yours has the name; by default it is taken over

The token is read from SNIROUTE_REGISTRY_TOKEN; the operator of the router gives it to you.

exit code: that of COMMAND; else 0 released, 1 the name is not to be had, 2 a wrong command line
"""
URL = "http://127.0.0.1:19002"

# Limits, each with its reason.  Seconds.
ASK_TIME = 10.0  # for one answer: longer than a registry waits for its store
RETRY_FIRST, RETRY_LAST = 0.5, 15.0  # between two tries where the registry is away; a third of it is left to chance
SHARE = 3  # renewed at a third of its ttl: two renewals may be lost
AFTER_MAX = 60.0  # of what Retry-After asks for: else a registry that is back would not be asked before tomorrow
TTL_MAX = 10 * 365 * 86400.0  # in an answer: what says more is no registry
SHORTEST = 1.0  # between two renewals: else a ttl that is very short would have us ask without a pause
STOP_TIME = 10.0  # for the command to end after SIGTERM; then it is killed
BODY_MAX = 1 << 20  # bytes of an answer
ENDING = signal.SIGTERM, signal.SIGINT, signal.SIGHUP  # release the name, and end
WORD = re.compile(r"[!-~]{1,512}")  # a name or a lease, which goes into heads, terminals and the environment

SEEKING, OURS, LOST, REFUSED, OVER = "seeking", "ours", "lost", "refused", "over"


class Unable(Exception):
    """The name is not to be had, or the command line is wrong; in words for people."""


class Place(NamedTuple):
    """Where a registry is."""

    scheme: str  # http, https, unix
    host: str  # for unix the path of the socket
    port: int  # for unix 0
    prefix: str = ""  # in front of the registry's paths, where a proxy has the registry below a path

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix:{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"


def parse_place(text: str) -> Place:
    """`http://HOST:PORT`, `https://HOST`, `unix:PATH`.  Raises Unable."""
    if text.startswith("unix:") and len(text) > 5:
        return Place("unix", text[5:], 0)
    try:
        url = urllib.parse.urlsplit(text)
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        if not url.hostname or url.username or url.query or url.fragment:
            raise ValueError
    except (ValueError, KeyError):
        raise Unable(f"--registry: {printable(text, 120)!r} is not http://HOST:PORT, https://HOST or "
                     "unix:PATH") from None
    return Place(url.scheme, url.hostname, port, url.path.rstrip("/"))


class UnixConnection(http.client.HTTPConnection):
    """HTTP by a unix socket."""

    def __init__(self, path: str, timeout: float):
        super().__init__("sniroute", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Answer(NamedTuple):
    """What a registry says."""

    status: int
    body: dict[str, Any]  # {} where it is no JSON object
    retry_after: float  # seconds; 0: it does not say

    @property
    def words(self) -> str:
        """Its sentence, for people.  `detail` has all faults in it, so `errors` would only say them again."""
        return printable(str(self.body.get("detail") or self.body.get("title") or f"HTTP {self.status}"), 500)


class Registry:
    """The registry, over one connection that is kept.  Raises OSError where it is away."""

    def __init__(self, place: Place, token: str):
        self.place = place
        self.token = token
        self.connection: http.client.HTTPConnection | None = None

    def ask(self, method: str, path: str, body: Any = None, lease: str = "") -> Answer:
        """One request.  Where a connection that was kept has ended meanwhile, it is made anew, once."""
        for fresh in (self.connection is None, True):
            try:
                return self._ask(method, path, body, lease)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if fresh:
                    raise error if isinstance(error, OSError) else OSError(f"it broke off: {error!r}") from None
        raise AssertionError

    def _ask(self, method: str, path: str, body: Any, lease: str) -> Answer:
        if self.connection is None:
            place = self.place
            self.connection = UnixConnection(place.host, ASK_TIME) if place.scheme == "unix" else \
                {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}[place.scheme](
                    place.host, place.port, timeout=ASK_TIME)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        if lease:
            headers["Sniroute-Lease"] = lease
        self.connection.request(method, self.place.prefix + path, None if body is None else json.dumps(body), headers)
        response = self.connection.getresponse()
        data = response.read(BODY_MAX)
        try:
            found = json.loads(data or b"{}")
        except (ValueError, RecursionError):
            found = {}
        after = response.headers.get("Retry-After", "")
        return Answer(response.status, found if isinstance(found, dict) else {},
                      float(after) if re.fullmatch(r"[0-9]{1,5}", after) else 0.0)

    def close(self) -> None:
        """Close the connection."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class Claimer:
    """One claim, from the first request to its release.  Thread `main`, but for `wake`."""

    def __init__(self, registry: Registry, wish: dict[str, Any], say: Callable[[str], None],
                 clock: Callable[[], float] = time.monotonic):
        self.registry = registry
        self.wish = wish
        self.say = say
        self.clock = clock
        self.state = SEEKING
        self.name = ""  # whole, or tcp:PORT, as the registry has it; "" until it was ours once
        self.lease = ""  # of the claim; "" where the registry does not know it any more
        self.ttl = 0.0  # seconds
        self.until = 0.0  # clock time: from then on it may be another's
        self.pause = 0.0  # seconds until the next try, where the last one failed
        self.trouble = ""  # what was said last of such a failure: each is said once
        # What `keep` is woken by.  Use a SimpleQueue instead of an Event because a handler of a signal puts into it: an
        # Event's lock may be held by the very code that the signal has interrupted.
        self.woken: queue.SimpleQueue[None] = queue.SimpleQueue()

    @property
    def path(self) -> str:
        """Where the claim is."""
        return f"/routes/{urllib.parse.quote(self.name, safe=':')}"

    def step(self) -> float:
        """Claim, or renew.  Returns the seconds until there is something to do again.

        Raises Unable where the name is not to be had (REFUSED), or another client has it now (LOST).
        """
        try:
            answer = self._claim() if self.state is SEEKING else self._renew()
        except OSError as error:
            return self._later(f"{self.registry.place}: {error.strerror or error}")
        if answer.status == 429 or answer.status >= 500:
            return self._later(f"{self.registry.place}: {answer.words}", answer.retry_after)
        self.pause = 0.0
        if answer.status in (200, 201):
            self._have(answer.body)
            return max(self.ttl / SHARE, SHORTEST)
        if self.state is OURS and answer.status == 404:
            self.say(f"{self.name}: the registry does not know the claim any more: claiming it again")
            self.state, self.lease = SEEKING, ""
            return 0.0
        if self.state is OURS and answer.status == 409:
            self.state = LOST
            raise Unable(f"{self.name}: another client of this owner has taken it over")
        if self.name and answer.status == 409 and answer.body.get("class") != "own":
            return self._later(f"{self.name}: {answer.words}")
        if self.lease and answer.status == 409:  # a registry that was away gives claims more time: it may be ours
            self.state = OURS
            return 0.0
        self.state = REFUSED
        raise Unable(f"{self.wish.get('name') or self.wish.get('port') or 'a name'}: {answer.words}")

    def _claim(self) -> Answer:
        wish = self.wish
        if self.name:  # the same one again; another client of ours that has it by now keeps it
            key = "port" if self.name.startswith("tcp:") else "name"
            wish = {**wish, key: int(self.name[4:]) if key == "port" else self.name, "takeover": False}
        return self.registry.ask("POST", "/routes", wish)

    def _renew(self) -> Answer:
        body = {"ttl": self.wish["ttl"]} if "ttl" in self.wish else {}
        return self.registry.ask("POST", f"{self.path}/renew", body, self.lease)

    def _have(self, body: dict[str, Any]) -> None:
        """The registry has answered with the claim: it is ours, or still ours.  Raises Unable for anything else."""
        name, lease, ttl = body.get("name"), body.get("lease", self.lease), body.get("ttl")
        texts = all(isinstance(each, str) and WORD.fullmatch(each) for each in (name, lease))
        if not texts or type(ttl) not in (int, float) or not 0 < ttl <= TTL_MAX:
            raise Unable(f"{self.registry.place} is no registry of names: its answer has no name, lease and ttl")
        is_new = self.state is SEEKING
        self.name, self.lease, self.ttl, self.until = name, lease, float(ttl), self.clock() + ttl
        self.state = OURS
        if self.trouble:
            self.say(f"{self.name}: all is well again")
            self.trouble = ""
        if is_new:
            print(self.name, flush=True)

    def _later(self, trouble: str, after: float = 0.0) -> float:
        """Try again later, not before `after` seconds; say why, once.  Returns the seconds until then.

        While the name is ours, sooner: a registry asks to be spared for seconds, which may be all that is left of it.
        """
        if trouble != self.trouble:
            self.trouble = trouble
            self.say(trouble + ": trying again")
        if self.state is OURS and self.clock() >= self.until:
            self.state = SEEKING
        self.pause = min(self.pause * 2, RETRY_LAST) or RETRY_FIRST
        pause = max(self.pause * random.uniform(2 / 3, 1), min(after, AFTER_MAX))
        return min(pause, max((self.until - self.clock()) / SHARE, RETRY_FIRST)) if self.state is OURS else pause

    def release(self) -> None:
        """Give it back, if it is ours."""
        if self.state is OURS:
            try:
                self.registry.ask("DELETE", self.path, None, self.lease)
            except OSError as error:
                self.say(f"{self.name}: not released, since {self.registry.place}: {error.strerror or error}; "
                         f"it is free in {self.ttl:g} s")
        self.state = OVER
        self.registry.close()


# -- the command line --------------------------------------------------------------------------


def parse_meta(text: str) -> tuple[str, str]:
    """`KEY=VALUE`.  Raises ValueError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError("is not KEY=VALUE")
    return key, value


def parse_ttl(text: str) -> int:
    """Seconds, `60` or `60s`: the registry takes whole ones only.  Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,6}s?", text, re.ASCII):
        raise ValueError("is no number of seconds")
    return int(text.rstrip("s"))


# Options with a value: what is made of it.  `meta` may be repeated.
OPTIONS: dict[str, Callable[[str], Any]] = {
    "registry": str, "ttl": parse_ttl, "allow": lambda text: [each.strip() for each in text.split(",")], "http": str,
    "meta": parse_meta}


def parse_words(words: list[str]) -> tuple[list[str], dict[str, Any], list[str]]:
    """Arguments, options, and the command behind `--`.  Raises Unable."""
    arguments: list[str] = []
    given: dict[str, Any] = {}
    at = words.index("--") if "--" in words else len(words)
    rest, command = iter(words[:at]), words[at + 1:]
    for word in rest:
        name, equals, value = word[2:].partition("=")
        if word == "--no-takeover":
            given["takeover"] = False
        elif not word.startswith("--"):
            arguments.append(word)
        elif name not in OPTIONS:
            raise Unable(f"unknown option {printable(word, 80)!r}")
        else:
            text = value if equals else next(rest, None)
            try:
                if text is None:
                    raise ValueError("needs a value")
                found = OPTIONS[name](text)
            except ValueError as error:
                raise Unable(f"--{name}: {printable(text or '', 80)} {error}") from None
            if name == "meta":
                given.setdefault("meta", {})[found[0]] = found[1]
            else:
                given[name] = found
    return arguments, given, command


def with_key(target: str, environ: Mapping[str, str]) -> str:
    """A target as the registry gets it: `$NAME` in `nodepass:$NAME@HOST:PORT` is filled in.  Raises Unable."""
    found = re.fullmatch(r"nodepass:\$(\w+)@(.*)", target, re.ASCII | re.DOTALL)
    if found is None:
        return target
    key = environ.get(found[1], "").strip()
    if not key:
        raise Unable(f"${found[1]} is not in the environment: set it to the key of the server")
    return f"nodepass:{urllib.parse.quote(key, safe='')}@{found[2]}"


def wish_of(name: str, target: str, given: dict[str, Any]) -> dict[str, Any]:
    """The body of a POST: NAME, TARGET and the options that are given."""
    port = re.fullmatch(r"tcp(?::([0-9]{1,5}))?", name)
    wish: dict[str, Any] = {"port": int(port[1]) if port[1] else None} if port else \
        {"name": None if name == "-" else name}
    return {**wish, "target": target, **{key: value for key, value in given.items() if key != "registry"}}


def say(text: str) -> None:
    """One line for people."""
    print(f"sniroute claim: {text}", file=sys.stderr, flush=True)


class Beside:
    """The command that runs while the name is ours.  `words` are its own; without any there is none."""

    def __init__(self, words: list[str], woken: queue.SimpleQueue[None]):
        self.words = words
        self.woken = woken
        self.process: subprocess.Popen[bytes] | None = None
        self.ended = False

    def begin(self, name: str) -> None:
        """Start it, once.  Raises Unable."""
        if not self.words or self.process is not None:
            return
        environ = {key: value for key, value in os.environ.items() if key != "SNIROUTE_REGISTRY_TOKEN"}
        try:
            self.process = subprocess.Popen(self.words, env={**environ, "SNIROUTE_NAME": name})
        except OSError as error:
            raise Unable(f"the command {printable(self.words[0], 120)} cannot be started: "
                         f"{(error.strerror or str(error)).lower()}") from None
        threading.Thread(target=self._wait, name="command", daemon=True).start()

    def _wait(self) -> None:
        """What the thread `command` runs."""
        self.process.wait()
        self.ended = True
        self.woken.put(None)

    def end(self, number: int) -> int:
        """Send it this signal, and wait for its end.  Returns its exit code, as a shell has it; 0 without a command."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(STOP_TIME)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return 128 - code if code < 0 else code


def main(words: list[str]) -> int:
    """`claim`.  Returns the exit code, as USAGE has it."""
    if {"-h", "--help"}.intersection(words[:words.index("--")] if "--" in words else words):
        print(USAGE, end="")
        return 0
    try:
        arguments, given, command = parse_words(words)
        if len(arguments) != 2:
            raise Unable("claim takes a NAME and a TARGET: `sniroute.py claim --help` says more")
        token = os.environ.get("SNIROUTE_REGISTRY_TOKEN", "").strip()
        if not re.fullmatch(r"[!-~]+", token):
            raise Unable("put the token into SNIROUTE_REGISTRY_TOKEN: the operator of the router gives it to you")
        place = parse_place(given.get("registry") or os.environ.get("SNIROUTE_REGISTRY_URL") or URL)
        arguments[1] = with_key(arguments[1], os.environ)
        claimer = Claimer(Registry(place, token), wish_of(*arguments, given), say)
    except Unable as error:
        say(str(error))
        return 2
    signals: list[int] = []
    for number in ENDING:
        signal.signal(number, lambda number, frame: (signals.append(number), claimer.woken.put(None)))
    try:
        return keep(claimer, Beside(command, claimer.woken), signals)
    finally:
        for number in ENDING:  # Python gives a handler back as it ends: one more signal would change the exit code then
            signal.signal(number, signal.SIG_IGN)


def token(words: list[str]) -> int:
    """`token`: prints a new token for an owner, and its hash for the file of settings.  Returns the exit code."""
    if words:
        say("`sniroute.py token` takes nothing behind it: it prints a new token, and its hash for the settings")
        return 2
    from sniroute_owners import new_token  # imported late: much of the router
    secret, digest = new_token()
    print(f"for the owner, who keeps it secret:  SNIROUTE_REGISTRY_TOKEN={secret}\n"
          f"for [registry.owners.NAME]:          token = \"{digest}\"")
    return 0


def keep(claimer: Claimer, beside: Beside, signals: list[int]) -> int:
    """Keep the claim until a signal, or the end of the command.  Returns the exit code."""
    code = 0
    try:
        while not signals and not beside.ended:
            pause = claimer.step()
            if claimer.state is OURS and not signals:  # one may have come while the registry was asked
                beside.begin(claimer.name)
            with contextlib.suppress(queue.Empty):
                claimer.woken.get(timeout=pause)
    except Unable as error:
        say(str(error))
        code = 1
    claimer.release()
    ended = beside.end(signals[0] if signals else signal.SIGTERM)
    return code or ended
