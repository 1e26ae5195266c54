"""sniroute_resp: the protocol of Redis: RESP2 and RESP3, the URL of a server, how one is greeted; without I/O.

    encode("GET", "key") ---> bytes          bytes --- Reader.feed ---> values, one after another, or Malformed

    parse_url("rediss://app:...@redis.example.com/2") ---> Place

    greet(place) -----------> yields what is to be asked, is sent each answer, returns a Server
    find_master(place) -----> the same with a Sentinel, returns a host and a port

What a value is in Python:

    + status             str               :  ( numbers         int               % map         dict
    $ = text             bytes             ,  double            float             ~ set         list
    - ! an error         ErrorReply        #  true, false       bool              > push        Push
    _ $-1 *-1 nothing    None              *  array             list              | attribute   left out

An error inside an array is a value.  The Reader takes any cut of the bytes, and reads none of them twice.  Of what a
server says nothing grows without a limit, and nothing is trusted: each number has one spelling, each line its CRLF.

Secrets: a login is shown by no `str`, no `repr` and no error.  A server may repeat what it was told in its error
(`unknown command 'HELLO', with args beginning with: ...`), so `words_of` cuts that off.

Seams: I want to ...
    read another type            a row in LINES, or in GROUPS where it holds other values
    tell an error apart          a row in CODES, and a word in REASONS
    another kind of URL          a row in SCHEMES
    another step of a greeting   `greet`

Sources: the specification of RESP, https://redis.io/docs/latest/develop/reference/protocol-spec/;
HELLO, AUTH, ROLE at https://redis.io/docs/latest/commands/; "Guidelines for Redis clients with support for Redis
Sentinel", https://redis.io/docs/latest/develop/reference/sentinel-clients/.

This room imports sniroute_names (ports, hosts, what may be shown) and sniroute_refusals (Malformed, Failed).
"""

from __future__ import annotations

import re
import urllib.parse
from typing import Any, Callable, Generator, Iterator, NamedTuple

from sniroute_names import ascii_advice, parse_host_port, parse_port, printable, show_address
from sniroute_refusals import Failed, Malformed

__version__ = "0.1.0"

# Limits, each with its reason.
LINE_MAX = 1 << 16  # bytes of a line: errors and statuses have some hundred
SIZE_MAX = 64 << 20  # bytes of one whole value, all that is in it: pages of a large table have some MiB
COUNT_MAX = 1 << 20  # values in one whole value: pages again.  A million take 60 MiB
DEPTH_MAX = 16  # values in values: COMMAND, which nests most, has 7
DIGITS_MAX = 1000  # of a number: Python itself refuses 4,300
HOSTS_MAX = 16  # Sentinels in a URL: there are three or five
SAMPLE = 40  # bytes that are repeated in a fault
WORDS_SHOWN = 200  # characters of a server's words that are shown to people

# Why a Redis could not be asked, or did not do it: a word for programs, and a sentence for people.
REASONS = {
    "name": "the name of the Redis does not resolve",
    "resolver": "the host's resolver gives no answer",
    "unreachable": "the Redis cannot be reached",
    "reset": "the Redis closed the connection",
    "timeout": "the Redis gave no answer in time",
    "certificate": "the certificate of the Redis is not trusted",
    "tls": "TLS with the Redis failed",
    "login": "the Redis does not take the user and the password",
    "forbidden": "the Redis does not allow that to this user",
    "database": "the Redis has no such database",
    "readonly": "the Redis is a replica: it can be read only",
    "loading": "the Redis is reading its data still, or has lost its master",
    "busy": "the Redis is busy with somebody's script",
    "full": "too much waits for the Redis, or it has too many clients",
    "oom": "the Redis has no memory left (maxmemory)",
    "disk": "the Redis cannot write to its disk",
    "moved": "the Redis is a part of a Cluster, and another part has this key",
    "master": "the Sentinels know no master of this name",
    "changed": "the Sentinels have another master now",
    "script": "the Redis does not know the script",
    "answer": "the Redis answered something else",
}
CODES = {  # the first word of an error -> a key of REASONS
    "NOAUTH": "login", "WRONGPASS": "login", "NOPERM": "forbidden", "DENIED": "forbidden",  # DENIED: protected mode
    "READONLY": "readonly", "LOADING": "loading", "MASTERDOWN": "loading", "NOREPLICAS": "disk", "MISCONF": "disk",
    "BUSY": "busy", "OOM": "oom", "MOVED": "moved", "ASK": "moved", "CLUSTERDOWN": "moved", "CROSSSLOT": "moved",
    "TRYAGAIN": "moved", "NOSCRIPT": "script", "UNBLOCKED": "readonly", "NOMASTERLINK": "master",
}
TEXTS = {  # how an error begins whose first word says nothing (ERR), without that word -> a key of REASONS
    "max number of clients": "full", "max number of clients + cluster": "full",
    "invalid password": "login", "AUTH ": "login", "Client sent AUTH": "login",
    "DB index": "database", "invalid DB index": "database", "SELECT is not allowed": "database",
}


# -- values ------------------------------------------------------------------------------------


class ErrorReply(str):
    """An error that a server has answered: `READONLY You can't write against a read only replica.`"""

    __slots__ = ()

    @property
    def code(self) -> str:
        """Its first word, where that is one for programs; else ERR."""
        word = self.partition(" ")[0]
        return word if re.fullmatch("[A-Z][A-Z0-9]+", word) else "ERR"

    def __repr__(self) -> str:
        return f"ErrorReply({str(self)!r})"


class Push(list):  # type: ignore[type-arg]
    """What a server says unasked (RESP3): `[b"message", b"channel", b"text"]`."""

    __slots__ = ()


Value = Any  # None, str, bytes, int, float, bool, list, dict, Push or ErrorReply


def words_of(error: ErrorReply) -> str:
    """An error for people, without what it repeats of a command: that may be a secret."""
    said = re.split(r",? with args beginning with|, called with", error)[0]
    return printable(said, WORDS_SHOWN)


# What servers before Redis 7 put around the error of a command in a script.
IN_SCRIPT = re.compile(r"ERR Error running script .*?: -?([A-Z][A-Z0-9]+) ")


def failure(error: ErrorReply) -> Failed:
    """Why a server has not done what it was asked: a word of REASONS, and its own words."""
    inside = IN_SCRIPT.match(error)
    reason = CODES.get(inside[1] if inside else error.code)
    if reason is None:
        text = error.removeprefix("ERR ")
        reason = next((why for start, why in TEXTS.items() if text.startswith(start)), "answer")
    return Failed(reason, words_of(error))


# -- writing -----------------------------------------------------------------------------------

Word = bytes | str | int


def encode(*words: Word) -> bytes:
    """A command as a server takes it: an array of bulk strings.  Text is UTF-8."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


# -- reading -----------------------------------------------------------------------------------

INTEGER = re.compile(rb"[+-]?[0-9]{1,%d}" % DIGITS_MAX)
SIZE = re.compile(rb"0|[1-9][0-9]{0,11}")
DOUBLE = re.compile(rb"[+-]?(?:[0-9]{1,400}(?:\.[0-9]{0,400})?(?:[eE][+-]?[0-9]{1,5})?|inf|nan)")


def integer(line: bytes) -> int:
    """`:12`, and `(12` for large ones."""
    if not INTEGER.fullmatch(line):
        raise Malformed(f"no number: {line[:SAMPLE]!r}")
    return int(line)


def double(line: bytes) -> float:
    """`,1.5`"""
    if not DOUBLE.fullmatch(line):
        raise Malformed(f"no number: {line[:SAMPLE]!r}")
    return float(line)


def truth(line: bytes) -> bool:
    """`#t`"""
    if line not in (b"t", b"f"):
        raise Malformed(f"neither true nor false: {line[:SAMPLE]!r}")
    return line == b"t"


def nothing(line: bytes) -> None:
    """`_`"""
    if line:
        raise Malformed(f"not nothing: {line[:SAMPLE]!r}")


def parse_size(line: bytes, largest: int) -> int:
    """The size of a text, or the count of a group: `largest` at most.  Raises Malformed."""
    if not SIZE.fullmatch(line):
        raise Malformed(f"no size: {line[:SAMPLE]!r}")
    if int(line) > largest:
        raise Malformed(f"{int(line):,} of what may be {largest:,}")
    return int(line)


def status(line: bytes) -> str:
    """A line for people."""
    return line.decode("utf-8", "replace")


def verbatim(data: bytes) -> bytes:
    """`=8` and `txt:some`: what is behind the kind of text."""
    if data[3:4] != b":":
        raise Malformed(f"a text without its kind: {data[:SAMPLE]!r}")
    return data[4:]


def pairs(items: list[Value]) -> dict[Value, Value]:
    """A map.  Raises Malformed, where a key is a group."""
    try:
        return dict(zip(items[::2], items[1::2]))
    except TypeError:
        raise Malformed("the key of a map is a group") from None


LINES: dict[bytes, Callable[[bytes], Value]] = {  # values of one line
    b"+": status, b"-": lambda line: ErrorReply(status(line)), b":": integer, b"(": integer, b",": double, b"#": truth,
    b"_": nothing,
}
SIZED: dict[bytes, Callable[[bytes], Value]] = {  # a size, and so many bytes
    b"$": bytes, b"!": lambda data: ErrorReply(status(data)), b"=": verbatim,
}
ATTRIBUTE = b"|"
GROUPS: dict[bytes, tuple[int, Callable[[list[Value]], Value]]] = {  # values for each one of the count; what they make
    b"*": (1, list), b"~": (1, list), b">": (1, Push), b"%": (2, pairs), ATTRIBUTE: (2, pairs),
}


KINDS = {*LINES, *SIZED, *GROUPS}


class Group:
    """A value whose values are still to come."""

    __slots__ = ("kind", "items", "left")

    def __init__(self, kind: bytes, left: int):
        self.kind = kind
        self.items: list[Value] = []
        self.left = left  # values that are still to come


class State:
    """What reading a piece has come to, where that is no value."""


MORE, BEGUN = State(), State()  # more bytes are needed; a text or a group has begun


class Reader:
    """Reads what a server says.  Once it has raised Malformed it raises the same again: nothing behind it is good."""

    __slots__ = ("data", "at", "seen", "groups", "kind", "need", "size", "count", "fault")

    def __init__(self) -> None:
        self.data = bytearray()  # what has come, and is not read yet; behind `at`
        self.at = 0  # bytes of `data` that are read
        self.seen = 0  # from where the end of a line is looked for
        self.groups: list[Group] = []  # that are open: the outermost first
        self.kind = b""  # of a text that is on its way
        self.need = 0  # its size
        self.size = self.count = 0  # bytes and values of the whole value so far
        self.fault: Malformed | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Value]:
        """Take some bytes; each value that is whole, as far as the caller asks for them.

        The iterator raises Malformed behind the values before it.  Whoever stops early gets the rest with the next
        piece.
        """
        del self.data[:self.at]
        self.seen -= self.at
        self.at = 0
        self.data += data
        return self._values()

    def _values(self) -> Iterator[Value]:
        while self.fault is None:
            try:
                found = self._next()
            except Malformed as fault:
                self.fault = fault
                break
            if found is MORE:
                return
            self.size = self.count = 0
            yield found
        raise self.fault

    def _next(self) -> Value | State:
        """The next whole value of the outermost level, or MORE.  Raises Malformed."""
        while True:
            found = self._text() if self.kind else self._line()
            if found is MORE:
                return MORE
            if found is not BEGUN:
                found = self._close(found)
                if found is not BEGUN:
                    return found

    def _line(self) -> Value | State:
        """The next line: a value; BEGUN where it begins one; or MORE."""
        end = self.data.find(b"\n", self.seen)
        if end < 0:
            self.seen = end = len(self.data)
            self._check_kind()
        if end - self.at > LINE_MAX:
            raise Malformed("a line without an end")
        if end == len(self.data):
            return MORE
        line = bytes(self.data[self.at:end])
        if line.find(b"\r") != len(line) - 1:
            raise Malformed("a line that does not end in CRLF")
        kind, rest = line[:1], line[1:-1]
        if kind not in KINDS:
            self._check_kind()
        self.at = self.seen = end + 1
        self.count += 1
        self._grow(len(line) + 1, 0)
        if kind in LINES:
            return LINES[kind](rest)
        if rest == b"-1" and kind in (b"$", b"*"):  # RESP2
            return None
        if kind in GROUPS:
            return self._open(kind, rest)
        self.kind, self.need = kind, parse_size(rest, SIZE_MAX)
        self._grow(0, self.need)
        return BEGUN

    def _check_kind(self) -> None:
        """Whether the byte that a value begins with is one of ours.  Raises Malformed."""
        kind = bytes(self.data[self.at:self.at + 1])
        if kind and kind not in KINDS:
            raise Malformed(f"it does not speak Redis: {bytes(self.data[self.at:self.at + SAMPLE])!r}")

    def _grow(self, size: int, need: int) -> None:
        """So much more is read of a value, and so much more is needed.  Raises Malformed."""
        self.size += size
        if self.size + need > SIZE_MAX:
            raise Malformed(f"a value of more than {SIZE_MAX >> 20} MiB")
        if self.count > COUNT_MAX:
            raise Malformed(f"a value of more than {COUNT_MAX:,} values")

    def _text(self) -> Value | State:
        """A text, as soon as all of it is there; else MORE."""
        end = self.at + self.need
        if len(self.data) < end + 2:
            return MORE
        if self.data[end:end + 2] != b"\r\n":
            raise Malformed("a text that does not end in CRLF")
        kind, data = self.kind, bytes(self.data[self.at:end])
        self.at = self.seen = end + 2
        self._grow(self.need + 2, 0)
        self.kind = b""
        return SIZED[kind](data)

    def _open(self, kind: bytes, rest: bytes) -> Value | State:
        """A group begins: BEGUN, or the value where it is empty."""
        each, make = GROUPS[kind]
        left = parse_size(rest, COUNT_MAX) * each
        if kind == b">" and self.groups:
            raise Malformed("a push inside of a value")
        if not left:
            return BEGUN if kind == ATTRIBUTE else make([])
        if len(self.groups) >= DEPTH_MAX:
            raise Malformed(f"values in values, more than {DEPTH_MAX} deep")
        self.groups.append(Group(kind, left))
        return BEGUN

    def _close(self, found: Value) -> Value | State:
        """A value is whole: it belongs to the group around it, which may be whole with it.

        Returns the outermost value; BEGUN where that is not whole yet.
        """
        while self.groups:
            group = self.groups[-1]
            group.items.append(found)
            group.left -= 1
            if group.left:
                return BEGUN
            self.groups.pop()
            found = GROUPS[group.kind][1](group.items)
            if group.kind == ATTRIBUTE:  # it says something of the value behind it, which nobody here asks
                return BEGUN
        return found


# -- where a Redis is --------------------------------------------------------------------------

REDIS_PORT, SENTINEL_PORT = 6379, 26379
DATABASES = re.compile(r"[0-9]{1,5}")


class Scheme(NamedTuple):
    """A kind of URL."""

    is_tls: bool
    is_sentinels: bool
    form: str  # for people
    port: int


SCHEMES = {
    "redis": Scheme(False, False, "redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE]", REDIS_PORT),
    "rediss": Scheme(True, False, "rediss://[USER:PASSWORD@]HOST[:PORT][/DATABASE]", REDIS_PORT),
    "redis+sentinel": Scheme(
        False, True, "redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/MASTER[/DATABASE]", SENTINEL_PORT),
}


class Login:
    """Who we are there.  Shown to nobody."""

    __slots__ = ("user", "password")

    def __init__(self, user: str, password: str):
        self.user = user  # "" for the default one
        self.password = password

    def __repr__(self) -> str:
        return "<login>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Login) and (self.user, self.password) == (other.user, other.password)

    def __hash__(self) -> int:
        return hash((self.user, self.password))


class Place(NamedTuple):
    """Where a Redis is, and who asks it."""

    scheme: str  # a key of SCHEMES
    hosts: tuple[tuple[str, int], ...]  # one; or the Sentinels
    master: str  # the master's name, where Sentinels are asked for it; else ""
    database: int
    login: Login | None

    @property
    def is_tls(self) -> bool:
        """Whether it speaks TLS."""
        return SCHEMES[self.scheme].is_tls

    def __str__(self) -> str:
        """For people: without the login."""
        master = f"/{self.master}" if self.master else ""
        return f"{self.scheme}://{','.join(map(show_address, self.hosts))}{master}/{self.database}"


def parse_url(text: str) -> Place:
    """A URL of SCHEMES.  Raises ValueError, which repeats nothing but the scheme: the rest may be a part of a secret.

    What stands in front of the last `@` is the login: `:PASSWORD`, or `USER:PASSWORD`, each percent-encoded where that
    is needed.
    """
    name, colon, rest = text.partition("://")
    scheme = SCHEMES.get(name.lower())
    if not colon or scheme is None:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise ValueError(f"it begins with none of {known}")
    userinfo, at, rest = rest.rpartition("@")
    login = parse_login(userinfo) if at else None
    if any(letter in rest for letter in "?#%") or not rest.isascii() or not rest.isprintable() or " " in rest:
        raise ValueError(f"it is not {scheme.form}{ascii_advice(rest) if rest.isprintable() else ''}")
    authority, *path = rest.split("/")
    if path[-1:] == [""]:
        path.pop()
    master = path.pop(0) if scheme.is_sentinels and path else ""
    if scheme.is_sentinels and not master:
        raise ValueError(f"it does not name the master: {scheme.form}")
    if len(path) > 1 or path and not DATABASES.fullmatch(path[0]):
        raise ValueError(f"the database is a number: {scheme.form}")
    hosts = authority.split(",")
    if len(hosts) > (HOSTS_MAX if scheme.is_sentinels else 1):
        raise ValueError(f"too many hosts: {scheme.form}")
    return Place(name.lower(), tuple(parse_host(host, scheme) for host in hosts), master, int(path[0]) if path else 0,
                 login)


def parse_host(text: str, scheme: Scheme) -> tuple[str, int]:
    """`HOST[:PORT]`.  Raises ValueError."""
    try:
        has_port = ":" in text.rpartition("]")[2]
        return parse_host_port(text if has_port else f"{text}:{scheme.port}")
    except ValueError:  # it repeats what it was given
        raise ValueError(f"a host is HOST or HOST:PORT, an IPv6 address in brackets: {scheme.form}") from None


def parse_login(userinfo: str) -> Login:
    """`USER:PASSWORD`, percent-encoded.  Raises ValueError, which does not repeat it.

    `USER` alone: whoever asks has the password from elsewhere.
    """
    user, colon, password = userinfo.partition(":")
    if colon and not password or not colon and not user:
        raise ValueError("a login is USER:PASSWORD, or :PASSWORD alone, or USER, whose password is in the environment")
    try:
        if re.search("%(?![0-9A-Fa-f]{2})", userinfo):
            raise ValueError
        return Login(*(urllib.parse.unquote(word, errors="strict") for word in (user, password)))
    except ValueError:
        raise ValueError("a % in a user or a password is written %25") from None


# -- a greeting --------------------------------------------------------------------------------

CLIENT = "sniroute"  # what CLIENT LIST calls us
# A talk is a generator: it yields the words of a question, is sent the answer, and returns what came of it.  It raises
# Failed, a reason of REASONS.
Words = tuple[Word, ...]


class Server(NamedTuple):
    """Who has answered."""

    version: str  # "" where it does not say
    protocol: int  # 2 or 3
    mode: str  # standalone, cluster, sentinel; "" where it does not say


def greet(place: Place) -> Generator[Words, Value, Server]:
    """Log in, choose the database, and see that it is a master that can be asked.

    RESP3 where the server knows it (6.0 and newer, and the user may HELLO), else RESP2.
    """
    login = place.login
    auth: Words = () if login is None else ("AUTH", login.user or "default", login.password)
    answer = yield ("HELLO", 3, *auth, "SETNAME", CLIENT)
    if isinstance(answer, dict):
        server = Server(shown(answer.get(b"version")), 3, shown(answer.get(b"mode")))
    elif isinstance(answer, ErrorReply) and answer.code in ("ERR", "NOPERM", "NOPROTO"):
        raise_if(answer, "full", "login")
        server = yield from greet_2(login)
    else:
        raise refusal(answer)
    if place.database:
        answer = yield ("SELECT", place.database)
        if answer != "OK":
            raise refusal(answer)
    answer = yield ("PING",)
    if answer != "PONG":
        raise_unless(answer, "forbidden")
    role = yield ("ROLE",)  # a proxy has none, and not each user may ask
    kind = role[0] if isinstance(role, list) and role else b""
    if kind == b"slave":
        raise Failed("readonly", "it says that it is a replica")
    if kind == b"sentinel":
        raise Failed("answer", "it is a Sentinel, whose URL is redis+sentinel://")
    return server


def greet_2(login: Login | None) -> Generator[Words, Value, Server]:
    """Log in by RESP2, as `greet` does by RESP3."""
    if login is not None:
        answer = yield ("AUTH", *((login.user,) if login.user else ()), login.password)
        if isinstance(answer, ErrorReply) and "wrong number of arguments" in answer:
            raise Failed("login", "it is older than 6.0 and knows no users: write redis://:PASSWORD@HOST")
        if answer != "OK":
            raise refusal(answer)
    yield ("CLIENT", "SETNAME", CLIENT)  # not each user may
    return Server("", 2, "")


def find_master(place: Place) -> Generator[Words, Value, tuple[str, int]]:
    """Ask a Sentinel where the master is.  Sentinels with a password take that of the servers."""
    question = "SENTINEL", "GET-MASTER-ADDR-BY-NAME", place.master
    answer = yield question
    login = place.login
    if isinstance(answer, ErrorReply) and answer.code == "NOAUTH" and login is not None:
        answer = yield ("AUTH", *((login.user,) if login.user else ()), login.password)
        if answer != "OK":
            raise refusal(answer)
        answer = yield question
    if isinstance(answer, ErrorReply):
        raise failure(answer) if answer.code != "ERR" else Failed("master", words_of(answer))
    if answer is None:
        raise Failed("master", f"it knows no master {printable(place.master, WORDS_SHOWN)}")
    try:
        host, port = (word.decode("ascii") for word in answer)
        if not re.fullmatch("[!-~]+", host):
            raise ValueError
        return host, parse_port(port)
    except (TypeError, ValueError, AttributeError):
        raise Failed("answer", "it gives no address for the master") from None


def refusal(answer: Value) -> Failed:
    """Why a step of a greeting has failed."""
    if isinstance(answer, ErrorReply):
        return failure(answer)
    return Failed("answer", "it answered something else to a greeting")


def raise_if(answer: ErrorReply, *reasons: str) -> None:
    """Raise the Failed of an error whose reason is one of these."""
    failed = failure(answer)
    if failed.reason in reasons:
        raise failed


def raise_unless(answer: Value, reason: str) -> None:
    """Raise the Failed of an answer, unless its reason is this one."""
    failed = refusal(answer)
    if failed.reason != reason:
        raise failed


def shown(word: Value) -> str:
    """What a server says of itself, for people."""
    return printable(word.decode("utf-8", "replace"), WORDS_SHOWN) if isinstance(word, bytes) else ""
