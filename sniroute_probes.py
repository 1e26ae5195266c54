"""sniroute_probes: what an active health check asks a backend, in the words of its protocol.

    parse_health --> Health          what `health` of a route says
    Dialogue                         one talk: bytes in, bytes to send, then a Verdict.  No I/O
      KINDS                          tls, postgres, redis, mysql, http, https, a generator each; `connect` says nothing

What keeps a backend's log silent, as measured.  The check (sniroute_checks) leaves in order: what the protocol has for
an end (close_notify, COM_QUIT), then a FIN, and no RST.

    PostgreSQL 15   nothing is logged for a connect without a byte, for SSLRequest answered with N, or for a finished
                    handshake with close_notify.  An end between S and the handshake is logged, so is a bare FIN behind
                    the handshake, and each RST
    Redis 7.0       nothing, with the default loglevel
    MariaDB 10.11   who leaves without a login, whatever the bytes, counts as a connect error, and max_connect_errors of
                    them block the host (error 1129); each is a warning in the log.  A login that is refused does not
                    count, but is a warning, too.  A login as an account that is locked (CREATE USER sniroute ACCOUNT
                    LOCK) does not count and is not logged.  One as an account without a password is neither, and it
                    sets the count to 0.  So `mysql` logs in as `sniroute`, without a password; every answer to that
                    shows a server that works, but for those of MYSQL_UNFIT.  From 127.0.0.1 nothing counts

No check proves that queries are answered: none has an account.  None checks a certificate: clients do that, for the
name that they know.

Threads: none of its own; a Dialogue belongs to its check.

Seams: I want to ...
    check another protocol    a generator as `redis` is, and a row in KINDS; with a port and a path, WITH_PATH, too

It imports wire, names and refusals; `ssl` only where a check needs it.
"""

from __future__ import annotations

import functools
import re
import struct
from typing import TYPE_CHECKING, Any, Callable, Generator, NamedTuple

from sniroute_names import parse_port, printable
from sniroute_refusals import Malformed
from sniroute_wire import SSL_REQUEST_BYTES

if TYPE_CHECKING:
    import ssl

__version__ = "0.1.0"

# Limits, each with its reason.  Sizes in bytes.
HEARD_MAX = 1 << 18  # bytes of a backend that a check reads: OpenSSL takes certificates of 100 KB, and no more
HEAD_MAX = 1 << 14  # bytes of an HTTP answer's head: what most servers send at most
LINE_MAX = 1024  # bytes of a Redis answer to PING
PACKET_MAX = 4096  # bytes of a MySQL packet up to the end of a login: an error has 512 and some at most
LOGIN_STEPS = 8  # packets of a MySQL server from its greeting to the end of the login: it needs four
READ_SIZE = 1 << 14  # a TLS record


# -- what is asked -----------------------------------------------------------------------------


class Health(NamedTuple):
    """The route option `health`."""

    kind: str  # `off`, `passive`, or a row of KINDS
    port: int = 0  # of http and https; 0: the backend's own
    path: str = ""  # of http and https, query included


def parse_health(text: str) -> Health:
    """A value of the route option `health`.  Raises ValueError."""
    kind, colon, rest = text.partition(":")
    if kind not in WITH_PATH:
        if text in KINDS or text in ("off", "passive"):
            return Health(text)
        raise ValueError(f"{printable(text)!r} is none of off, passive, {', '.join(sorted(KINDS.keys() - WITH_PATH))}, "
                         "http:PORT/PATH, https:PORT/PATH")
    port, slash, path = rest.partition("/")
    try:
        number = parse_port(port)
    except ValueError:
        number = 0
    if not number or not slash:
        raise ValueError(f"{printable(text)!r} is not {kind}:PORT/PATH, as {kind}:8008/primary")
    if not re.fullmatch(r"[!\"$-~]*", path):
        raise ValueError(f"{printable(text)!r}: a path has no spaces, no #, and no letters beyond ASCII: write %XX")
    return Health(kind, number, f"/{path}")


class Question(NamedTuple):
    """What a protocol has to know."""

    health: Health
    name: str  # by which clients ask for the backend: SNI and Host; "" where they say none
    host: str  # its address, for Host where there is no name


class Verdict(NamedTuple):
    """How a dialogue has ended."""

    why: str  # what is wrong, for people; "" where the backend is good
    goodbye: bytes = b""  # to be sent before the FIN


# A protocol: yields what is to be sent, perhaps nothing; is given what has come, b"" for the end of the stream.  Where
# more was needed then, it may yield once more: Dialogue says that the backend has closed.
Talk = Generator[bytes, bytes, Verdict]
GOOD = Verdict("")


class Dialogue:
    """What is said in one check, as a machine without I/O: `begin`, then `receive` until there is a `verdict`."""

    def __init__(self, question: Question):
        self.talk = KINDS[question.health.kind].talk(question)
        self.heard = 0
        self.verdict: Verdict | None = None

    def begin(self) -> bytes:
        """What is sent first."""
        return next(self.talk)

    def receive(self, data: bytes) -> bytes:
        """What is sent next, perhaps nothing, now that `data` has come; b"" is the end of the stream."""
        self.heard += len(data)
        try:
            if self.heard > HEARD_MAX:
                raise Malformed("its answer has no end")
            answer = self.talk.send(data)
            if data:
                return answer
            raise closed(self.heard)
        except StopIteration as ended:
            self.verdict = Verdict(printable(ended.value.why), ended.value.goodbye)
        except Malformed as error:
            self.verdict = Verdict(printable(str(error)))
        self.talk.close()
        return self.verdict.goodbye


def closed(heard: int) -> Malformed:
    """The stream has ended, after so many bytes, and more was needed."""
    return Malformed("it closed in the middle of its answer" if heard else "it closed without an answer")


# -- TLS ---------------------------------------------------------------------------------------


@functools.cache
def tls_context() -> ssl.SSLContext:
    """Any certificate is taken: whether it is the right one is for clients to say."""
    import ssl  # imported late: it takes three megabytes
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def tls(question: Question, inner: Talk | None = None) -> Talk:
    """A finished handshake; inside it what `inner` says, if there is one.  Source: RFC 8446."""
    import ssl
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = tls_context().wrap_bio(incoming, outgoing, server_hostname=question.name or None)

    def shake(step: Callable[[], Any]) -> Generator[bytes, bytes, Any]:
        """Do a step of OpenSSL's, which may need more bytes first."""
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                came = yield outgoing.read()
                if came:
                    incoming.write(came)
                else:
                    incoming.write_eof()
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):  # the latter from Debian 12's Python
                return None

    def farewell() -> bytes:
        """close_notify, which PostgreSQL misses (RFC 8446 section 6.1)."""
        try:
            session.unwrap()
        except ssl.SSLError:
            pass  # the other side's has not come yet: it need not
        return outgoing.read()

    try:
        yield from shake(session.do_handshake)
        if session.version() is None:
            raise Malformed("it closed in the TLS handshake")
        if inner is None:
            return Verdict("", farewell())
        said, heard = next(inner), 0
        while True:
            if said:
                session.write(said)
            data = (yield from shake(functools.partial(session.read, READ_SIZE))) or b""
            heard += len(data)
            said = inner.send(data)
            if not data:
                raise closed(heard)
    except StopIteration as ended:
        if ended.value.goodbye:
            session.write(ended.value.goodbye)
        return Verdict(ended.value.why, farewell())
    except ssl.SSLError as error:
        raise Malformed(f"TLS failed: {(error.reason or 'unknown').replace('_', ' ').lower()}") from None


def as_clients(talk: Callable[[Question], Talk]) -> Callable[[Question], Talk]:
    """A protocol that does not ask for TLS: spoken inside TLS where clients say a name, since they do so in TLS."""
    return lambda question: tls(question, talk(question)) if question.name else talk(question)


# -- PostgreSQL --------------------------------------------------------------------------------


def postgres(question: Question) -> Talk:
    """SSLRequest, and a finished handshake, or N.  Source: "Message Flow" of its documentation, section SSL."""
    said = yield SSL_REQUEST_BYTES
    if said[:1] == b"S":
        if len(said) > 1:
            raise Malformed("bytes behind its answer to SSLRequest")  # CVE-2021-23222
        return (yield from tls(question))
    if said == b"N":
        return GOOD
    if said[:1] == b"E":
        return Verdict("it answered SSLRequest with an error")
    return (yield from strange(said, "PostgreSQL"))


def strange(said: bytes, protocol: str) -> Talk:
    """What came is no answer of this protocol; no bytes: Dialogue has the words."""
    if not said:
        yield b""
    raise Malformed(f"it does not speak {protocol}: it said {said[:24]!r}")


# -- Redis -------------------------------------------------------------------------------------

PING = b"*1\r\n$4\r\nPING\r\n"
# Errors that are about who asks, or come from a proxy that does not know PING.  Redis gives others to PING on purpose:
# LOADING, MASTERDOWN, MISCONF, BUSY, and, without having been asked, DENIED and "ERR max number of clients reached".
REDIS_SPEAKS = re.compile(rb"-(?:NOAUTH|NOPERM|WRONGPASS|ERR (?:operation not permitted|unknown command))\b", re.I)


def redis(question: Question) -> Talk:
    """PING, and +PONG.  Source: "Redis serialization protocol specification", section Simple strings."""
    heard = bytearray((yield PING))
    while (end := heard.find(b"\r\n", 0, LINE_MAX)) < 0:
        if heard[:1] not in (b"+", b"-", b""):
            return (yield from strange(bytes(heard), "Redis"))
        if len(heard) >= LINE_MAX:
            raise Malformed(f"answered PING with a line of more than {LINE_MAX} bytes")
        heard += yield b""
    line = bytes(heard[:end])
    if line == b"+PONG" or REDIS_SPEAKS.match(line):
        return GOOD
    if line[:1] not in (b"+", b"-"):
        return (yield from strange(line, "Redis"))
    return Verdict(f"answered PING with {line.decode('latin-1')}")


# -- MySQL and MariaDB -------------------------------------------------------------------------

MYSQL_USER = b"sniroute"
COM_QUIT = b"\x01\x00\x00\x00\x01"
OK, MORE, SWITCH, ERROR = 0x00, 0x01, 0xFE, 0xFF  # the first byte of an answer during a login
# Capabilities: CLIENT_LONG_PASSWORD, CLIENT_PROTOCOL_41, CLIENT_SECURE_CONNECTION; and CLIENT_PLUGIN_AUTH.
CAPABILITIES, PLUGIN_AUTH = 0x1 | 0x200 | 0x8000, 0x80000
UTF8MB4 = 45
# Answers to a login that concern everybody: too many connections, out of memory, the server stops, the host is blocked.
MYSQL_UNFIT = frozenset((1040, 1041, 1053, 1129, 1130))


def mysql(question: Question) -> Talk:
    """The greeting, and a login as `sniroute` without a password, whatever its answer.

    Source: "Client/Server Protocol" of MySQL's internals, Connection Phase; the same of MariaDB's documentation.
    """
    heard = bytearray((yield b""))
    sequence, greeting = yield from packet(heard)
    if greeting[0] == ERROR:
        return mysql_error(greeting)
    if greeting[0] != 10:
        raise Malformed(f"it does not speak MySQL: it greets with protocol {greeting[0]}")
    has_plugins, plugin = mysql_plugin(greeting)
    capabilities = CAPABILITIES | PLUGIN_AUTH * has_plugins
    word = no_password(plugin)
    answer = (struct.pack("<IIB23x", capabilities, 1 << 24, UTF8MB4) + MYSQL_USER + b"\0" + bytes((len(word),)) + word
              + (plugin + b"\0") * has_plugins)
    for _ in range(LOGIN_STEPS):
        sequence, said = yield from packet(heard, framed(answer, sequence + 1) if answer is not None else b"")
        answer = None
        if said[0] == OK:
            return Verdict("", COM_QUIT)
        if said[0] == ERROR:
            verdict = mysql_error(said)
            return verdict if error_code(said) in MYSQL_UNFIT else GOOD
        if said[0] == SWITCH:
            answer = no_password(said[1:].partition(b"\0")[0])
        elif said[0] != MORE:
            raise Malformed(f"it answered a MySQL login with a packet of type {said[0]}")
        elif said[1:] == b"\x04":
            answer = b"\0"  # caching_sha2_password asks for the whole password
    raise Malformed("its MySQL login has no end")


def packet(heard: bytearray, say: bytes = b"") -> Generator[bytes, bytes, tuple[int, bytes]]:
    """The next packet, taken out of `heard`: its sequence number and what it holds, a byte at least.

    `say` is sent before.
    """
    if say:
        heard += yield say
    while len(heard) < 4 or len(heard) < 4 + int.from_bytes(heard[:3], "little"):
        if len(heard) >= 4 and not 0 < int.from_bytes(heard[:3], "little") <= PACKET_MAX:
            break
        heard += yield b""
    size, sequence = int.from_bytes(heard[:3], "little"), heard[3]
    if not 0 < size <= PACKET_MAX:
        return (yield from strange(bytes(heard), "MySQL"))
    payload = bytes(heard[4:4 + size])
    del heard[:4 + size]
    return sequence, payload


def framed(payload: bytes, sequence: int) -> bytes:
    """A packet of MySQL: size, sequence number, payload."""
    return len(payload).to_bytes(3, "little") + bytes((sequence & 0xFF,)) + payload


def mysql_plugin(greeting: bytes) -> tuple[bool, bytes]:
    """Whether a greeting names a plugin that checks passwords, and which.  Raises Malformed."""
    fixed = greeting.find(b"\0") + 1  # behind the version
    if not fixed or len(greeting) < fixed + 31:
        raise Malformed("its MySQL greeting is too short")
    low, high, salt = struct.unpack_from("<13xH3xHB", greeting, fixed)
    if not (low | high << 16) & PLUGIN_AUTH:
        return False, b""
    return True, greeting[fixed + 31 + max(13, salt - 8):].partition(b"\0")[0]


def no_password(plugin: bytes) -> bytes:
    """How a plugin is told that there is no password."""
    return b"\0" if plugin in (b"caching_sha2_password", b"sha256_password") else b""


def error_code(said: bytes) -> int:
    """The number in an error."""
    return int.from_bytes(said[1:3], "little")


def mysql_error(said: bytes) -> Verdict:
    """An error, for people.  SQLSTATE, `#` and five letters, is left out."""
    text = said[9:] if said[3:4] == b"#" else said[3:]
    return Verdict(f"error {error_code(said)}: {text.decode('latin-1')}")


# -- HTTP --------------------------------------------------------------------------------------

STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])(?: [^\r\n]*)?\r\n")  # RFC 9112 section 4


def http(question: Question) -> Talk:
    """GET, and an answer with 2xx or 3xx, whose head is read whole.  Source: RFC 9112, RFC 9110 section 15."""
    health = question.health
    host = question.name or question.host
    if health.port != (443 if health.kind == "https" else 80):
        host = f"{host}:{health.port}"
    heard = bytearray((yield (f"GET {health.path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: sniroute\r\nAccept: */*\r\n"
                              "Connection: close\r\n\r\n").encode("ascii")))
    while True:
        end = heard.find(b"\r\n\r\n")
        if end < 0:
            if heard[:7] != b"HTTP/1."[:len(heard)]:
                return (yield from strange(bytes(heard), "HTTP/1.1"))
            if len(heard) >= HEAD_MAX:
                raise Malformed(f"an HTTP head of more than {HEAD_MAX} bytes")
            heard += yield b""
            continue
        line = STATUS_LINE.match(heard)
        if line is None:
            return (yield from strange(bytes(heard), "HTTP/1.1"))
        status = int(line[1])
        if status >= 200:
            return GOOD if status < 400 else Verdict(f"HTTP {status}")
        del heard[:end + 4]  # RFC 9110 section 15.2: any number of these may come first


def https(question: Question) -> Talk:
    """As `http`, inside TLS."""
    return tls(question, http(question))


# -- kinds -------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of check, as a row."""

    talk: Callable[[Question], Talk] | None  # None: that it takes the connect is enough
    needs_name: bool = True  # what it asks depends on the name; else routes with other names share its checks


KINDS = {
    "connect": Kind(None, False),
    "tls": Kind(tls),
    "postgres": Kind(postgres),
    "redis": Kind(as_clients(redis)),
    "mysql": Kind(as_clients(mysql)),
    "http": Kind(http),
    "https": Kind(https),
}
WITH_PATH = frozenset(("http", "https"))
