"""sniroute_http: HTTP/1.0 and 1.1 as bytes, both directions: heads, where a body ends, what is passed on.

    what came from a client  --- parse_request ---> Request ---+--- open_body ---> Counted, Chunked, UntilClose
    what came from a backend --- parse_response --> Response --+
                                                               +--- pass_request, pass_response ---> the head to send

A parser takes all bytes received so far, from where a message begins.  It returns its result, or None for "I need
more", or raises Malformed with the status it deserves (`Malformed.status`).  It looks at nothing behind a head.
A body is a machine: it is fed with what came, and says which bytes pass on, and where the message ends.

Two programs that read one message in two ways are a weapon (request smuggling, RFC 9112 section 11.2).  So whatever has
two readings is refused, also where a standard would have it repaired: two lengths (even equal ones), a length beside
chunks, a coding that is not plainly `chunked`, line ends other than CRLF, folded lines, NUL, blanks before a colon, two
hosts.  What passes on has one reading:

    heads      the original bytes of each line, in their order; lines that are for this connection only are left out,
               and those that decide (Host, lengths) have no blanks but one
    chunks     as they came, but extensions, leading zeros of sizes and trailers are left out: no two programs agree
               about them, and nobody uses them
    spellings  a name that becomes a guarded one where all that is no letter or digit is read as `-` is left out with
               it: CGI and its heirs (RFC 3875 section 4.1.18) take `Transfer_Encoding` for `Transfer-Encoding`

Nothing here reads text as Python does: no int(), no strip() of more than SP and HTAB, no line ends but CRLF.

Threads: any.  A body has a state; it belongs to one connection.  What was read of lines is remembered for all
(REMEMBERED, `Lines.made`), without a lock: what two threads make of the same lines is the same.

Seams: I want to ...
    refuse another form of a request    parse_request
    remove another line on the way      HOP_BY_HOP, or is_forwarding
    guard another name                  GUARDED
    frame a body in another way         a row in BODIES

This room imports sniroute_names (host names) and sniroute_refusals (Malformed).
"""

from __future__ import annotations

import functools
import re
from typing import Any, Callable, Collection, Iterable, Mapping, NamedTuple, Sequence

from sniroute_names import normalise
from sniroute_refusals import Malformed

__version__ = "0.1.0"

# Limits, in bytes where nothing else is said.  nginx and Apache take 8 KiB of a line, Node.js 16 KiB of a head.
HEAD_MAX = 32768  # from the first line to the empty one
TARGET_MAX = 8192  # RFC 9112 section 3: at least 8,000
FIELDS_MAX = 100  # lines of a head, and of a trailer; Apache's limit, too
METHOD_MAX = 16  # the longest that is used is BASELINE-CONTROL
LINE_MAX = METHOD_MAX + 1 + TARGET_MAX + len(" HTTP/1.1\r\n")  # a request line
CHUNK_LINE_MAX = 4096  # the line before a chunk, and one of a trailer
REMEMBERED = 128  # heads whose lines were read: so many clients and backends say the same again and again at a time
REMEMBERED_MAX = 1024  # of one.  With 100 fields it takes 30 KiB (an ordinary one 4), so all of them 4 MiB at most
MADE_MAX = 8  # what is made of one head: it is passed on in a way or two
ADDED_MAX = 1024  # lists of fields that are added: there is one for each client and name
FIRST_LINES = 128  # first lines of answers that were read, of FIRST_LINE_MAX bytes at most
FIRST_LINE_MAX = 64
EXTENSIONS_MAX = 16384  # what lines before chunks may cost more than what the chunks hold allows: `Chunked.size_line`

# -- the grammar -------------------------------------------------------------------------------

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 section 5.6.2
_TEXT = rb"[\t -~\x80-\xff]*"  # RFC 9110 section 5.5; obs-text is passed on as it is
TOKEN = re.compile(_TOKEN)
TEXT = re.compile(_TEXT)
FIELD = re.compile(rb"(%b):(%b)\r\n" % (_TOKEN, _TEXT))  # RFC 9112 section 5
# Registered methods are capitals and hyphens.  Those with `_` (SSTP_DUPLEX_POST, RPC_IN_DATA) are tunnels whose
# Content-Length is no length.
METHOD = re.compile(rb"[A-Z-]{1,%d}" % METHOD_MAX)
REQUEST_LINE = re.compile(rb"([A-Z-]{1,%d}) ([!-~]+) HTTP/([0-9])\.([0-9])\r\n" % METHOD_MAX)  # RFC 9112 section 3
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9])([0-9])([0-9])(?: %b)?\r\n" % _TEXT)  # RFC 9112 section 4
ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?]*)(.*)")  # RFC 9112 section 3.2.2
PORT = re.compile(rb"[1-9][0-9]{0,4}")
# A leading zero is octal to some.  18 digits fit into 63 bits, 15 hexadecimal ones into 60.
LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[\t ]*;%b)?\r\n" % _TEXT)  # RFC 9112 section 7.1
PROTOCOL = re.compile(rb"%b(?:/%b)?" % (_TOKEN, _TOKEN))  # RFC 9110 section 7.8
# In a head that is not whole yet: what no further byte can save.
BAD_LINE_END = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|\0")

DIGITS = {ord(digit): int(digit, 16) for digit in "0123456789abcdefABCDEF"}
# A name as the most careless reader takes it: in lower case, and `-` for all that is no letter or digit.
KEY = bytes(ord(chr(code).lower()) if chr(code).isascii() and chr(code).isalnum() else ord("-") for code in range(256))


def number(digits: bytes, base: int) -> int:
    """The value of digits that a pattern has checked."""
    value = 0
    for digit in digits:
        value = value * base + DIGITS[digit]
    return value


def bad(message: str, status: int = 400) -> Malformed:
    """What is raised for a message that is refused; `parse_response` makes a bad answer of it."""
    return Malformed(message, kind="bad_request", status=status)


# -- names -------------------------------------------------------------------------------------

# Fields that decide where a message ends, or where it leads: one spelling of each reaches a backend.
FRAMING = frozenset((b"content-length", b"transfer-encoding"))
# Fields for this connection only, RFC 9110 section 7.6.1 and 11.7.  `Transfer-Encoding` is not here: a body that comes
# in chunks passes on in chunks.
HOP_BY_HOP = frozenset((b"connection", b"http2-settings", b"keep-alive", b"proxy-authenticate",
                        b"proxy-authentication-info", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
                        b"upgrade"))
GUARDED = FRAMING | HOP_BY_HOP | {b"expect", b"host", b"via"}
# Fields that are meant for the far end: who names one in `Connection` wants it to vanish on the way.
FOR_THE_FAR_END = FRAMING | {b"authorization", b"content-encoding", b"content-range", b"content-type", b"cookie",
                             b"expect", b"host", b"origin", b"range", b"set-cookie", b"via"}
# What no trailer may say, RFC 9110 section 6.5.1.
NO_TRAILER = GUARDED | FOR_THE_FAR_END | {b"cache-control", b"max-forwards"}
READ_HERE = FRAMING | {b"connection", b"expect", b"host", b"upgrade"}


def is_forwarding(key: bytes) -> bool:
    """Whether a field says who asks, and for what, on behalf of another: RFC 7239, and what came before it."""
    return key.startswith(b"x-forwarded") or key in (b"forwarded", b"x-real-ip")


# -- heads -------------------------------------------------------------------------------------


class Field(NamedTuple):
    """A line of a head."""

    name: bytes  # as it came
    key: bytes  # the name as the most careless reader takes it: KEY
    value: bytes  # without the blanks around it
    is_twin: bool  # whether it is none of those that are guarded, and some program takes it for one
    start: int  # where its line is in Head.block: block[start:end], with its CRLF
    end: int


class Lines(NamedTuple):
    """The lines of a head, read."""

    fields: tuple[Field, ...]
    said: Mapping[bytes, tuple[bytes, ...]]  # the values of what is READ_HERE; where there is one
    made: dict[Any, Any]  # what was made of these lines before, by what it depends on beside them (`remember`):
    # a version: what `read_said` returned; (b"answer", version): the same of an answer; (b"request", ...) and
    # (b"response", ...): the lines that are passed on


class Head(NamedTuple):
    """A head, as it came."""

    first: bytes  # the request line or status line, with its CRLF
    block: bytes  # the lines behind it, and the empty one
    fields: tuple[Field, ...]  # of `block`
    options: frozenset[bytes]  # what Connection says, in lower case
    end: int  # where what follows begins, in what was parsed: an empty line may have come before `first`
    made: dict[Any, Any]  # that of its Lines

    def values(self, key: bytes) -> list[bytes]:
        """All values of a field, in their order; not those of its twins."""
        return [field.value for field in self.fields if field.key == key and not field.is_twin]


class Framing(NamedTuple):
    """Where a body ends, RFC 9112 section 6.3."""

    kind: str  # a row of BODIES
    length: int = 0  # bytes, of LENGTH


NONE, COUNTED, CHUNKED, UNTIL_CLOSE = "none", "counted", "chunked", "until close"
TUNNEL = "tunnel"  # what follows is no HTTP: raw bytes, both ways
NO_BODY = Framing(NONE)

# Forms of a target, RFC 9112 section 3.2.
ORIGIN, ABSOLUTE_FORM, AUTHORITY, ASTERISK = "origin", "absolute", "authority", "asterisk"


class Request(NamedTuple):
    """A request without its body."""

    method: str
    target: bytes  # as it came
    form: str  # of the target
    version: int  # the minor one: 0 or 1
    name: str  # the host it is for, normalised; "" where HTTP/1.0 names none
    port: int  # the port beside it, 0 for none
    path: bytes  # the target in origin form (or `*`), query included; b"" for CONNECT
    head: Head
    framing: Framing
    keeps: bool  # whether the client wants to ask again on this connection
    upgrades: tuple[bytes, ...]  # the protocols that the client offers, in lower case; none beside a body
    expects_continue: bool  # whether the client waits for 100 before it sends the body


class Response(NamedTuple):
    """An answer without its body."""

    status: int
    version: int  # the minor one: 0 or 1
    head: Head
    framing: Framing
    keeps: bool  # whether the backend will answer again on this connection
    upgrade: bytes  # with 101: the protocol that is spoken from here on, in lower case

    @property
    def is_interim(self) -> bool:
        """Whether the final answer is still to come (RFC 9110 section 15.2)."""
        return self.status < 200 and self.status != 101


def read_lines(block: bytes) -> Lines:
    """The lines of a whole head, up to the empty one that ends `block`.  Raises Malformed."""
    fields = []
    said: dict[bytes, tuple[bytes, ...]] = {}
    at, stop = 0, len(block) - 2
    match = FIELD.match
    while at < stop:
        found = match(block, at)
        if found is None:
            raise bad(field_fault(block[at:stop]))
        name, value = found.groups()
        end = found.end()
        key, value = name.translate(KEY), value.strip(b" \t")
        is_twin = (key in GUARDED or is_forwarding(key)) and name.lower() != key
        fields.append(Field(name, key, value, is_twin, at, end))
        if key in READ_HERE and not is_twin:
            said[key] = (*said.get(key, ()), value)
        at = end
    if len(fields) > FIELDS_MAX:
        raise bad(f"a head of more than {FIELDS_MAX} fields", 431)
    return Lines(tuple(fields), said, {})


remembered_lines = functools.lru_cache(REMEMBERED)(read_lines)


def parse_lines(block: bytes) -> Lines:
    """As `read_lines`.  A client says the same lines with each request of a connection: they are read once."""
    return remembered_lines(block) if len(block) <= REMEMBERED_MAX else read_lines(block)


def remember(made: dict[Any, Any], key: Any, value: Any) -> Any:
    """Keep what was made of a head's lines: 12 us of a request whose lines came before."""
    if len(made) >= MADE_MAX:
        made.clear()
    made[key] = value
    return value


def field_fault(lines: bytes) -> str:
    """What is wrong with the first of these lines.  Its value is not repeated: it may be a secret."""
    line = lines.partition(b"\r\n")[0]
    name, colon, value = line.partition(b":")
    if line[:1] in (b" ", b"\t"):
        return "a folded line in a head"
    if not colon:
        return "a line in a head without a colon"
    if name and TOKEN.fullmatch(name.rstrip(b" \t")):
        return "a blank before a colon" if name[-1:] in (b" ", b"\t") else "a character that no field may have"
    return "a field whose name is none"


def find_end(data: bytes | bytearray, start: int, first: int, seen: int, most: int) -> int:
    """Where a head ends that begins at `start`, and whose first line ends at `first`; -1: need more.

    `data[:seen]` was looked at before.  Raises Malformed where the head is larger than `most`, or can never be right.
    """
    end = data.find(b"\r\n\r\n", max(start, first - 2, seen - 3), start + most)
    if end >= 0:
        return end + 4
    if BAD_LINE_END.search(data, max(first, seen - 1), start + most):
        raise bad("a line that does not end in CRLF, or a NUL")
    if len(data) - start >= most:
        raise bad(f"a head of more than {most} bytes", 431)
    return -1


def list_of(values: Iterable[bytes], pattern: re.Pattern[bytes], what: str) -> list[bytes]:
    """The elements of a list, in lower case.  Raises Malformed.  Source: RFC 9110 section 5.6.1."""
    elements = []
    for value in values:
        for element in value.lower().split(b","):
            element = element.strip(b" \t")
            if element and not pattern.fullmatch(element):
                raise bad(f"{what} that is no list of words")
            if element:
                elements.append(element)
    return elements


# What nearly all say.
OPTIONS_OF: dict[tuple[bytes, ...], frozenset[bytes]] = {
    (): frozenset(), (b"close",): frozenset((b"close",)),
    (b"keep-alive",): frozenset((b"keep-alive",)), (b"Keep-Alive",): frozenset((b"keep-alive",)),
}


def connection_options(values: tuple[bytes, ...]) -> frozenset[bytes]:
    """What Connection says.  Raises Malformed.  Source: RFC 9110 section 7.6.1."""
    known = OPTIONS_OF.get(values)
    if known is not None:
        return known
    options = frozenset(list_of(values, TOKEN, "a Connection"))
    for option in options:
        key = option.translate(KEY)
        if key in FOR_THE_FAR_END or is_forwarding(key):
            raise bad(f"a Connection that names {key.decode('ascii')}, which is for the far end")
    return options


def find_framing(lengths: Sequence[bytes], codings: Sequence[bytes], version: int) -> Framing | None:
    """What Content-Length and Transfer-Encoding say; None where there is neither.  Raises Malformed.

    Source: RFC 9112 section 6.  Where that would have a message repaired, it is refused.
    """
    if codings:
        if lengths:
            raise bad("a Content-Length beside a Transfer-Encoding")
        if not version:
            raise bad("a Transfer-Encoding in HTTP/1.0")
        if len(codings) > 1:
            raise bad("two lines of Transfer-Encoding")
        coding = codings[0].lower()
        if coding != b"chunked":
            known = [word.strip(b" \t") for word in coding.split(b",")]
            if all(map(TOKEN.fullmatch, known)) and set(known) != {b"chunked"}:
                raise bad("a Transfer-Encoding other than chunked", 501)
            raise bad("a broken Transfer-Encoding")
        return Framing(CHUNKED)
    if lengths:
        if len(lengths) > 1:
            raise bad("two lines of Content-Length")
        if not LENGTH.fullmatch(lengths[0]):
            raise bad("a Content-Length that is no number")
        return Framing(COUNTED, number(lengths[0], 10))
    return None


# -- requests ----------------------------------------------------------------------------------


def parse_request(data: bytes | bytearray, seen: int = 0) -> Request | None:
    """The head of a request at the beginning of `data`; None: need more.  Raises Malformed, with a status.

    `seen`: how much of `data` an earlier call has had, which returned None; so a head that comes byte by byte is not
    searched again and again.  One empty line before a request is skipped, since old browsers send one behind a body.
    Source: RFC 9112 section 2 and 3.
    """
    start = 0
    if data[:1] == b"\r":
        if len(data) < 2:
            return None
        if data[1:2] != b"\n":
            raise bad("a line that does not end in CRLF, or a NUL")
        start = 2
    line = data.find(b"\n", start, start + LINE_MAX) + 1
    if not line:
        check_beginning(data, start, min(len(data), start + LINE_MAX), seen)
        return None
    first = parse_request_line(data, start, line) if line > seen else None  # as soon as it is there
    end = find_end(data, start, line, seen, HEAD_MAX)
    if end < 0:
        return None
    method, target, version = first or parse_request_line(data, start, line)
    lines = parse_lines(block := bytes(data[line:end]))
    name, port, form, path = find_place(method, target, lines.said.get(b"host", ()), version)
    options, framing, keeps, upgrades, expects = \
        lines.made.get(version) or remember(lines.made, version, read_said(lines.said, version))
    if framing is None:
        if not version and method in (b"POST", b"PUT", b"PATCH"):  # RFC 1945 section 8.3: some read until the end
            raise bad("a body without a length in HTTP/1.0", 411)
        framing = NO_BODY
    elif method in (b"CONNECT", b"TRACE"):  # RFC 9110 section 9.3.6 and 9.3.8
        raise bad(f"a body in a {method.decode('ascii')}")
    return Request(
        method.decode("ascii"), target, form, version, name, port, path,
        Head(bytes(data[start:line]), block, lines.fields, options, end, lines.made), framing, keeps, upgrades, expects)


def read_said(said: Mapping[bytes, tuple[bytes, ...]], version: int
              ) -> tuple[frozenset[bytes], Framing | None, bool, tuple[bytes, ...], bool]:
    """What the lines of a request mean, whatever its first line says but for the version.  Raises Malformed.

    What Connection says; the framing; whether the connection is kept; the protocols that are offered; whether the
    client waits for 100.
    """
    options = connection_options(said.get(b"connection", ()))
    framing = find_framing(said.get(b"content-length", ()), said.get(b"transfer-encoding", ()), version)
    has_body = framing is not None and (framing.kind == CHUNKED or framing.length > 0)
    expects = said.get(b"expect", ())
    if expects and (len(expects) > 1 or expects[0].lower() != b"100-continue"):
        raise bad("an Expect other than 100-continue", 417)
    upgrades = list_of(said.get(b"upgrade", ()), PROTOCOL, "an Upgrade")
    offers = version == 1 and b"upgrade" in options and not has_body  # RFC 9110 section 7.8
    return (options, framing, is_kept(version, options), tuple(upgrades) if offers else (),
            bool(expects) and version == 1 and has_body)


def parse_request_line(data: bytes | bytearray, start: int, end: int) -> tuple[bytes, bytes, int]:
    """Method, target and minor version in data[start:end].  Raises Malformed.  Source: RFC 9112 section 3."""
    found = REQUEST_LINE.fullmatch(data, start, end)
    if found is None:
        check_beginning(data, start, end, 0)
        raise bad("a request line that is none")
    method, target, major, minor = found.groups()
    if major != b"1" or minor not in (b"0", b"1"):
        raise bad("a version of HTTP other than 1.0 and 1.1", 505)
    if len(target) > TARGET_MAX:
        raise bad(f"a target of more than {TARGET_MAX} bytes", 414)
    return method, target, minor[0] - 48


def check_beginning(data: bytes | bytearray, start: int, end: int, seen: int) -> None:
    """Raise Malformed where data[start:end], which is no request line, is not the beginning of one either."""
    begun = bytes(data[start:min(end, start + METHOD_MAX + 1)])
    method, blank, _ = begun.partition(b" ")
    if begun and not METHOD.fullmatch(method) or len(begun) > METHOD_MAX and not blank:
        raise bad("a method that is none")
    if BAD_LINE_END.search(data, max(start, seen - 1), end):
        raise bad("a line that does not end in CRLF, or a NUL")
    if end - start >= LINE_MAX:
        raise bad(f"a target of more than {TARGET_MAX} bytes", 414)


def is_kept(version: int, options: Collection[bytes]) -> bool:
    """Whether a connection goes on behind this message.  Source: RFC 9112 section 9.3."""
    return b"close" not in options and (version == 1 or b"keep-alive" in options)


@functools.lru_cache(1024)  # a few names are asked for again and again
def parse_place(place: bytes) -> tuple[str, int]:
    """`NAME` or `NAME:PORT`: the name, normalised, and the port, 0 for none.  Raises Malformed."""
    name, colon, port = place.partition(b":")
    if colon and (not PORT.fullmatch(port) or number(port, 10) > 65535):
        raise bad("a host with a port that is none")
    return normalise(name), number(port, 10)


def find_place(method: bytes, target: bytes, hosts: Sequence[bytes], version: int) -> tuple[str, int, str, bytes]:
    """Where a request leads: name, port, the form of its target, and its path.  Raises Malformed.

    Source: RFC 9112 section 3.2 and 3.3.  A target in absolute form has to name the same host as Host does, though
    the standard lets a proxy replace the one by the other: a program behind us may look at either.
    """
    if len(hosts) > 1:
        raise bad("two lines of Host")
    if version and not hosts:
        raise bad("no Host")
    if b"#" in target:
        raise bad("a target with a fragment")
    name, port = parse_place(hosts[0]) if hosts else ("", 0)
    if target[:1] == b"/":
        if method == b"CONNECT":
            raise bad("a CONNECT to a path")
        return name, port, ORIGIN, target
    if method == b"CONNECT":
        place = parse_place(target)
        if not place[1]:
            raise bad("a CONNECT without a port")
        return *place, AUTHORITY, b""
    if target == b"*" and method == b"OPTIONS":
        return name, port, ASTERISK, target
    found = ABSOLUTE.fullmatch(target)
    if found is None:
        raise bad("a target that is none")
    scheme = found[1].lower()
    if scheme == b"https":
        raise bad("a request for https in plain HTTP", 421)  # RFC 9110 section 7.4
    if scheme != b"http":
        raise bad("a target of another scheme than http")
    place = parse_place(found[2])
    if hosts and (name, port or 80) != (place[0], place[1] or 80):
        raise bad("a target for another host than Host names")
    path = found[3]
    if not path:
        path = b"*" if method == b"OPTIONS" else b"/"  # RFC 9112 section 3.2.4
    return *place, ABSOLUTE_FORM, path if path[:1] != b"?" else b"/" + path


# -- answers -----------------------------------------------------------------------------------


def parse_status(data: bytes | bytearray, seen: int = 0, most: int = HEAD_MAX
                 ) -> tuple[int, int, bytes, bytes] | None:
    """Status, minor version, first line and the lines behind it of an answer; None: need more.  Raises Malformed.

    `seen` is as in `parse_request`; `most`: bytes that the head may have.  Source: RFC 9112 section 4.
    """
    if data[:7] != b"HTTP/1."[:len(data)]:
        raise bad("it is no HTTP")
    line = data.find(b"\n", 0, most) + 1
    if not line:
        find_end(data, 0, 0, seen, most)
        return None
    first = bytes(data[:line])
    status, version = (remembered_status if line <= FIRST_LINE_MAX else read_status)(first)
    end = find_end(data, 0, line, seen, most)
    return None if end < 0 else (status, version, first, bytes(data[line:end]))


def read_status(line: bytes) -> tuple[int, int]:
    """Status and minor version of a first line.  Raises Malformed."""
    found = STATUS_LINE.fullmatch(line)
    if found is None:
        raise bad("it is no HTTP")
    version, *digits = found.groups()
    status = number(b"".join(digits), 10)
    if version == b"0" and status == 101:
        raise bad("HTTP/1.0, which has no 101")
    return status, version[0] - 48


remembered_status = functools.lru_cache(FIRST_LINES)(read_status)


def parse_response(data: bytes | bytearray, method: str, upgrades: Collection[bytes] = (), seen: int = 0
                   ) -> Response | None:
    """The head of the answer to a request with this method; None: need more.  Raises Malformed, with status 502.

    `upgrades`: the protocols that the backend was offered, in lower case; a 101 for any other is refused.  `seen` is as
    in `parse_request`.
    """
    try:
        return judge_response(data, method, upgrades, seen)
    except Malformed as error:
        raise Malformed(str(error), kind="bad_answer") from None


def judge_response(data: bytes | bytearray, method: str, upgrades: Collection[bytes], seen: int) -> Response | None:
    """As `parse_response`, but what it raises is a bad request.  Source: RFC 9112 section 6.3."""
    found = parse_status(data, seen)
    if found is None:
        return None
    status, version, first, block = found
    lines = parse_lines(block)
    said, key = lines.said.get, (b"answer", version)
    read = lines.made.get(key)
    if read is None:
        options = connection_options(said(b"connection", ()))
        framing = find_framing(said(b"content-length", ()), said(b"transfer-encoding", ()), version)
        read = remember(lines.made, key, (options, framing, is_kept(version, options)))
    options, framing, keeps = read
    upgrade = b""
    if status == 101:
        words = list_of(said(b"upgrade", ()), PROTOCOL, "an Upgrade")
        if len(words) != 1 or words[0] not in upgrades or b"upgrade" not in options:
            raise bad("a 101 that was not asked for")
        upgrade, framing, keeps = words[0], Framing(TUNNEL), False
    elif method == "CONNECT" and 200 <= status < 300:
        framing, keeps = Framing(TUNNEL), False
    elif method == "HEAD" or status < 200 or status in (204, 304):
        framing = NO_BODY
    elif framing is None:
        framing, keeps = Framing(UNTIL_CLOSE), False
    head = Head(first, block, lines.fields, options, len(first) + len(block), lines.made)
    return Response(status, version, head, framing, keeps, upgrade)


# -- bodies ------------------------------------------------------------------------------------

# What a body says of a piece: the parts of it that pass on, in order, and how many bytes of the piece were its own.
Fed = tuple[list[memoryview], int]


class Counted:
    """A body of a known length.

    `left`: bytes that pass on as they are, which the caller may move without showing them here (splice), if it says so
    with `passed`; None: without an end.  All bodies have `left`, `is_done`, `feed`, `passed` and `end`, and are made of
    the same three (see BODIES), of which each takes what it needs: the length, the refusal for one that is broken,
    `unframed`.
    """

    __slots__ = ("left", "kind")

    def __init__(self, length: int, kind: str, unframed: bool):
        self.left: int | None = length
        self.kind = kind

    @property
    def is_done(self) -> bool:
        """Whether the message has ended."""
        return self.left == 0

    def feed(self, data: bytes | bytearray | memoryview) -> Fed:
        """Some bytes came.  The parts are views of `data`; what is behind the body belongs to the next message."""
        piece = memoryview(data)[:self.left]
        self.passed(len(piece))
        return ([piece] if piece else []), len(piece)

    def passed(self, count: int) -> None:
        """The caller has moved so many bytes, `left` at most."""
        self.left -= count

    def fault(self, message: str) -> Malformed:
        """What is raised for a body that is broken."""
        return Malformed(message, kind=self.kind)

    def end(self) -> None:
        """No more will come.  Raises Malformed where the body is not whole: what was passed on must not look whole."""
        if not self.is_done:
            raise self.fault("the connection ended within a body")


class UntilClose(Counted):
    """A body that ends with the connection, and never before."""

    __slots__ = ("has_ended",)

    def __init__(self, length: int, kind: str, unframed: bool):
        super().__init__(0, kind, unframed)
        self.left = None
        self.has_ended = False

    @property
    def is_done(self) -> bool:
        return self.has_ended

    def passed(self, count: int) -> None:
        pass

    def end(self) -> None:
        self.has_ended = True


class Chunked(Counted):
    """A body in chunks.  Source: RFC 9112 section 7.1.

    `unframed`: only what is in the chunks passes on, for a client that knows no chunks (HTTP/1.0).
    No line passes on before it is whole: at most CHUNK_LINE_MAX bytes of one are kept.
    """

    __slots__ = ("step", "part", "unframed", "excess", "room", "lines")

    def __init__(self, length: int, kind: str, unframed: bool):
        super().__init__(0, kind, unframed)
        self.unframed = unframed
        self.step: Callable[[Chunked, bytes], bytes] | None = Chunked.size_line  # what reads the next line; None: done
        self.part = b""  # a line, as far as it has come
        self.excess = 0
        self.room = HEAD_MAX  # bytes that the trailer may still have
        self.lines = 0  # of the trailer

    @property
    def is_done(self) -> bool:
        return self.step is None

    def feed(self, data: bytes | bytearray | memoryview) -> Fed:
        """As `Counted.feed`.  A part may also be the end of a line that came in pieces, or that is written anew."""
        source, data = bytes(data), memoryview(data)  # bytes are not copied, and can be searched
        parts: list[memoryview] = []
        kept = at = 0  # data[kept:at] passes on as it came
        end = len(data)
        while at < end and self.step is not None:
            if self.left:
                size = min(self.left, end - at)
                self.left -= size
                at += size
                continue
            start, most = at, at + CHUNK_LINE_MAX + 1 - len(self.part)
            at = source.find(b"\n", at, most) + 1
            written = b""
            if not at:
                at = min(most, end)
                self.part += source[start:at]
                self.check_part()
            else:
                line, self.part = self.part + source[start:at], b""
                written = self.step(self, line)
                if written == line and len(line) == at - start:
                    continue
            if start > kept:
                parts.append(data[kept:start])
            if written:
                parts.append(memoryview(written))
            kept = at
        if at > kept:
            parts.append(data[kept:at])
        return parts, at

    def check_part(self) -> None:
        """Raise Malformed where the line that has begun can never be right."""
        if len(self.part) > CHUNK_LINE_MAX:
            raise self.fault(f"a line of more than {CHUNK_LINE_MAX} bytes beside a chunk")
        if self.step is Chunked.chunk_end and self.part != b"\r":
            raise self.fault("a chunk that does not end where it should")

    def size_line(self, line: bytes) -> bytes:
        """The line before a chunk, as it passes on.  Raises Malformed, as the other two steps do.

        A chunk pays for its line: with 16 bytes, and with 2 for each byte that it holds.  So a sender of honest
        extensions goes on for ever, and one that sends nothing else does not (Go's net/http has the same rule).
        """
        found = CHUNK_LINE.fullmatch(line)
        if found is None:
            raise self.fault("a line before a chunk that is none")
        digits = found[1].lstrip(b"0")
        self.left = number(digits, 16)
        self.excess = max(0, self.excess + len(line) - 16 - 2 * self.left)
        if self.excess > EXTENSIONS_MAX:
            raise self.fault("chunks that are mostly extensions")
        self.step = Chunked.chunk_end if self.left else Chunked.trailer_line
        return b"" if self.unframed or not self.left else digits + b"\r\n"

    def chunk_end(self, line: bytes) -> bytes:
        """What is behind the bytes of a chunk: exactly CRLF."""
        if line != b"\r\n":
            raise self.fault("a chunk that does not end where it should")
        self.step = Chunked.size_line
        return b"" if self.unframed else line

    def trailer_line(self, line: bytes) -> bytes:
        """A line behind the last chunk, which is dropped, or the empty one, which ends the message."""
        if line == b"\r\n":
            self.step = None
            return b"" if self.unframed else b"0\r\n\r\n"
        self.room -= len(line)
        self.lines += 1
        found = FIELD.fullmatch(line)
        if found is None:
            raise self.fault("a line in a trailer that is none")
        key = found[1].translate(KEY)
        if key in NO_TRAILER or is_forwarding(key):
            raise self.fault("a trailer with what belongs into a head")
        if self.room < 0 or self.lines > FIELDS_MAX:
            raise self.fault("a trailer that is too long")
        return b""


# What reads the body of each kind of Framing.
BODIES: dict[str, Callable[[int, str, bool], Counted]] = {
    NONE: Counted, COUNTED: Counted, CHUNKED: Chunked, UNTIL_CLOSE: UntilClose, TUNNEL: UntilClose,
}


def open_body(message: Request | Response, unframed: bool = False) -> Counted:
    """The machine for the body of a message: `feed`, `left`, `passed`, `is_done`, `end`.

    `unframed`: of chunks, pass on only what is in them.  One without a body is done from the beginning.
    """
    kind = "bad_request" if isinstance(message, Request) else "bad_answer"
    return BODIES[message.framing.kind](message.framing.length, kind, unframed)


# -- heads that are passed on ------------------------------------------------------------------

More = tuple[tuple[bytes, bytes], ...]  # names and values of fields that are added
UNFRAMED = frozenset((b"transfer-encoding",))  # what a body without chunks does not say
PLAIN = {b"transfer-encoding": b"chunked"}  # what no parser lets pass with another meaning


def dropped(head: Head) -> frozenset[bytes]:
    """The keys of fields that are for this connection only: what Connection names, then the list of HOP_BY_HOP."""
    return HOP_BY_HOP.union(option.translate(KEY) for option in head.options)


def keep_lines(head: Head, drop: Callable[[Field], bool], values: Mapping[bytes, bytes] | None = None) -> bytes:
    """The lines of a head, without those for which `drop` says so, and without the empty one.

    All others keep their bytes and their order, but what is READ_HERE is written plainly: Python's http.server keeps a
    blank behind `chunked`, and then knows no such coding.  `values`: new values of fields of READ_HERE, by key, where
    they stand.  Raises ValueError where a line would be none: no value of ours may begin another line.
    """
    block = head.block
    new = PLAIN if values is None else {**PLAIN, **values}
    return b"".join([block[field.start:field.end] if field.key not in READ_HERE
                     else make_line(field.name, new.get(field.key, field.value))
                     for field in head.fields if not drop(field)])


def make_lines(add: More) -> bytes:
    """These fields, and the empty line that ends a head.  Raises ValueError."""
    return b"".join([make_line(name, value) for name, value in add]) + b"\r\n"


remembered_additions = functools.lru_cache(ADDED_MAX)(make_lines)  # for those in which no stranger has much to say


def make_line(name: bytes, value: bytes) -> bytes:
    """A field.  Raises ValueError."""
    if not TOKEN.fullmatch(name) or not TEXT.fullmatch(value):
        raise ValueError(f"no field: {name!r}")
    return b"%b: %b\r\n" % (name, value)


def switch_to(upgrade: bytes) -> More:
    """The fields that offer, or accept, another protocol; none without one."""
    return ((b"Connection", b"Upgrade"), (b"Upgrade", upgrade)) if upgrade else ()


def pass_request(request: Request, add: More = (), *, host: bytes = b"", believes: bool = False, upgrade: bytes = b""
                 ) -> bytes:
    """The head of a request as the backend gets it: in HTTP/1.1 and origin form.

    What Connection names is gone, then what is for one connection only, then (unless `believes`) what claims to speak
    for another, then all that some program takes for a field of these; then `add` is added.  With `believes`, such a
    field of the client gives way to one of `add` with its name, so that there is one line.  `host`: the Host instead
    of the client's.  HTTP/1.1 needs one, so where HTTP/1.0 has none it is added.  `upgrade`: the one protocol that is
    offered to the backend.  Source: RFC 9110 section 7.6.
    """
    head, expects = request.head, request.expects_continue
    ours = frozenset(name.lower() for name, _ in add) if believes else None
    key = b"request", host, expects, ours
    lines = head.made.get(key)
    if lines is None:
        drop = dropped(head)

        def goes(field: Field) -> bool:
            name = field.key
            return (name in drop or field.is_twin or name == b"expect" and not expects
                    or is_forwarding(name) and (ours is None or name in ours))

        lines = keep_lines(head, goes, {b"host": host} if host else None)
        if len(head.block) <= REMEMBERED_MAX:  # else nobody finds it again, and it stays as long as the request does
            remember(head.made, key, lines)
    if not request.version and not head.values(b"host"):
        place = request.name.encode("ascii") + (b":%d" % request.port if request.port else b"")
        add = ((b"Host", host or place), *add)
    make = make_lines if believes or upgrade else remembered_additions
    return b"%b %b HTTP/1.1\r\n%b%b" % (request.method.encode("ascii"), request.path or request.target, lines,
                                        make((*add, *switch_to(upgrade))))


def pass_response(response: Response, add: More = (), *, unframed: bool = False) -> bytes:
    """The head of an answer as the client gets it, in HTTP/1.1.

    `unframed` as in `open_body`: it says nothing of chunks.  1xx and 204 say nothing of a body either (RFC 9112 section
    6.1, RFC 9110 section 8.6); to HEAD and with 304 the length stays, which is that of another answer.
    """
    head = response.head
    more: frozenset[bytes] = FRAMING if response.status < 200 or response.status == 204 else UNFRAMED if unframed \
        else frozenset()
    key = b"response", more
    lines = head.made.get(key)
    if lines is None:
        drop = dropped(head) | more
        lines = remember(head.made, key, keep_lines(head, lambda field: field.key in drop or field.is_twin))
    make = make_lines if response.upgrade else remembered_additions
    return b"HTTP/1.1%b%b%b" % (head.first[8:], lines, make((*add, *switch_to(response.upgrade))))
