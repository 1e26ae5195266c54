"""sniroute_conversations: protocols that are watched, to know when a connection to a backend may serve another client.

    client_said(data), server_said(data) ---> a Machine: clean?  spoilt?

The one rule: an answer to a client never reaches another one.  An answer that comes after its client has left would
(redis-py had that: CVE-2023-28858).  So a machine counts requests and whole answers.  What it does not understand, what
can be read in two ways, and what the backend remembers for this connection spoil the conversation, for ever.

    Redis   the protocol RESP2, and a list of commands after which the server remembers nothing of the connection
    Http    HTTP/1.1 between whole answers
    Quiet   an unknown protocol: the backend has spoken last
    Lines   what the first two are made of: lines, and payloads that are passed over by their size

Nothing but the beginning of one line is kept, so a conversation takes a few hundred bytes, and LINE_MAX at most.

Threads: none of its own.  A machine belongs to its connection, and does no I/O.

Seams: I want to ...
    allow a command of Redis       STATELESS
    allow a way to authenticate    PER_REQUEST
    another protocol               a subclass of Conversation, and a row in REUSES of sniroute_reuse

It imports the standard library only.
"""

from __future__ import annotations

import collections
import re
from typing import Any, Callable, Mapping, Protocol

__version__ = "0.1.0"

# Limits, each with its reason.  Sizes in bytes.
LINE_MAX = 8192  # of a line, which is kept until it is whole: a header field as long as most HTTP servers take
HEAD_MAX = 32768  # of an HTTP head, or its trailers: more is nothing that is worth sharing
PIPELINED_MAX = 100  # HTTP requests without an answer: a flag is kept for each
WORDS_MAX = 1 << 20  # words of a Redis command: Redis's own limit
BULK_MAX = 1 << 29  # of one word or one value of Redis: its own limit, proto-max-bulk-len
VALUES_MAX = 1 << 32  # values in an array of Redis's answer: no key holds more


class Spoilt(Exception):
    """The conversation cannot be followed, or leaves something behind: this connection serves nobody else."""


# -- machines ----------------------------------------------------------------------------------


class Machine(Protocol):
    """Watches a conversation.  Told of each piece, in the order in which they pass; it never raises."""

    is_spoilt: bool  # it is never clean again, and need not be told of anything

    @property
    def clean(self) -> bool:
        """Whether another client may go on here, as far as the bytes tell that have passed."""

    def client_said(self, data: bytes) -> None:
        """A piece on its way to the backend."""

    def server_said(self, data: bytes) -> None:
        """A piece on its way to the client."""


class Quiet:
    """An unknown protocol: clean where the backend has spoken last.  Whether that was all, nobody knows.

    A backend that speaks first is spoilt: the next client would wait for its greeting.
    """

    __slots__ = ("clean", "is_spoilt", "was_asked")

    def __init__(self) -> None:
        self.clean = self.is_spoilt = self.was_asked = False

    def client_said(self, data: bytes) -> None:
        """As Machine says."""
        if data:
            self.was_asked, self.clean = True, False

    def server_said(self, data: bytes) -> None:
        """As Machine says."""
        if data:
            self.is_spoilt |= not self.was_asked
            self.clean = not self.is_spoilt


class Lines:
    """One direction: lines that end in CRLF, and payloads.

    `step` is what reads the next line, a function of this class; it may set `skip`, the size of a payload that comes
    before the line after it.  A step raises Spoilt.
    """

    __slots__ = ("part", "skip", "step")
    begin: Callable[[Any, bytes], None]  # the step that reads the first line of a message

    def __init__(self) -> None:
        self.part = b""  # the beginning of a line
        self.skip = 0  # bytes of a payload that are still to come
        self.step: Callable[[Any, bytes], None] = type(self).begin

    def may_begin(self) -> bool:
        """Whether it is this side's turn."""
        return True

    def is_between(self) -> bool:
        """Whether all messages so far are whole."""
        return not self.skip and not self.part and self.step is type(self).begin

    def feed(self, data: bytes) -> None:
        """Read a piece.  Raises Spoilt."""
        at, end = 0, len(data)
        while at < end:
            if self.skip:
                passed = min(self.skip, end - at)
                self.skip -= passed
                at += passed
                continue
            if not self.part and self.step is type(self).begin and not self.may_begin():
                raise Spoilt  # at its first byte: it could be taken for a part of the answer to what is asked next
            stop = data.find(b"\n", at)
            if stop < 0:
                self.part += data[at:]
                if len(self.part) > LINE_MAX:
                    raise Spoilt
                return
            line = self.part + data[at:stop]
            if len(line) > LINE_MAX or line.find(b"\r") != len(line) - 1:  # some take CR or LF alone for an end
                raise Spoilt
            self.part = b""
            at = stop + 1
            self.step(self, line[:-1])


class Conversation:
    """A Machine for requests and answers in order, each in a direction of its own."""

    __slots__ = ("up", "down", "is_spoilt")

    def __init__(self, up: Lines, down: Lines):
        self.up = up
        self.down = down  # it knows what was asked
        self.is_spoilt = False

    @property
    def clean(self) -> bool:
        """As Machine says."""
        return not self.is_spoilt and self.up.is_between() and self.down.is_between() and not self.down.may_begin()

    def client_said(self, data: bytes) -> None:
        """As Machine says."""
        self._hear(self.up, data)

    def server_said(self, data: bytes) -> None:
        """As Machine says."""
        self._hear(self.down, data)

    def _hear(self, side: Lines, data: bytes) -> None:
        if self.is_spoilt:
            return
        try:
            side.feed(data)
        except Spoilt:
            self.is_spoilt = True
            self.up.part = self.down.part = b""  # not needed any more


# -- Redis -------------------------------------------------------------------------------------

# Source: the Redis serialization protocol specification, https://redis.io/docs/latest/develop/reference/protocol-spec/
COUNT = re.compile(rb"\*([1-9][0-9]{0,6})")
NAME_SIZE = re.compile(rb"\$([1-9][0-9]?)")
SIZE = re.compile(rb"\$(0|[1-9][0-9]{0,9})")
VALUES = re.compile(rb"\*(0|[1-9][0-9]{0,9})")
INTEGER = re.compile(rb":[+-]?[0-9]{1,20}")
NULLS = (b"$-1", b"*-1")

# Commands of Redis 7 that leave nothing behind in the connection, and have one answer each.  Not here are those that
# set something for it (AUTH, SELECT, HELLO, CLIENT, READONLY, ASKING, MULTI, WATCH, SUBSCRIBE, MONITOR, SCRIPT DEBUG),
# those that use what was set (EXEC, WAIT), and scripts: some servers keep the database that a script has selected.
STATELESS = frozenset(b"""
    append bitcount bitfield bitfield_ro bitop bitpos decr decrby get getbit getdel getex getrange getset incr incrby
    incrbyfloat lcs mget mset msetnx psetex set setbit setex setnx setrange strlen substr
    copy del dump exists expire expireat expiretime keys object persist pexpire pexpireat pexpiretime pttl randomkey
    rename renamenx restore scan sort sort_ro touch ttl type unlink
    hdel hexists hget hgetall hincrby hincrbyfloat hkeys hlen hmget hmset hrandfield hscan hset hsetnx hstrlen hvals
    blmove blmpop blpop brpop brpoplpush lindex linsert llen lmove lmpop lpop lpos lpush lpushx lrange lrem lset ltrim
    rpop rpoplpush rpush rpushx
    sadd scard sdiff sdiffstore sinter sintercard sinterstore sismember smembers smismember smove spop srandmember srem
    sscan sunion sunionstore
    bzmpop bzpopmax bzpopmin zadd zcard zcount zdiff zdiffstore zincrby zinter zintercard zinterstore zlexcount zmpop
    zmscore zpopmax zpopmin zrandmember zrange zrangebylex zrangebyscore zrangestore zrank zrem zremrangebylex
    zremrangebyrank zremrangebyscore zrevrange zrevrangebylex zrevrangebyscore zrevrank zscan zscore zunion zunionstore
    geoadd geodist geohash geopos georadius georadius_ro georadiusbymember georadiusbymember_ro geosearch geosearchstore
    pfadd pfcount pfmerge
    xack xadd xautoclaim xclaim xdel xgroup xinfo xlen xpending xrange xread xreadgroup xrevrange xtrim
    publish pubsub spublish
    command dbsize echo flushall flushdb info lastsave ping time
""".split())


def number(pattern: re.Pattern[bytes], line: bytes, largest: int) -> int:
    """The number in a line.  Raises Spoilt."""
    found = pattern.fullmatch(line)
    if found is None or int(found[1]) > largest:
        raise Spoilt
    return int(found[1])


class Commands(Lines):
    """What a client of Redis says: arrays of bulk strings, whose first word is a command of STATELESS."""

    __slots__ = ("asked", "words", "size")

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0  # whole commands without a whole answer
        self.words = 0  # words of this command that are still to come
        self.size = 0  # of the command's name

    def begin(self, line: bytes) -> None:
        self.words = number(COUNT, line, WORDS_MAX)
        self.step = Commands.name_size

    def name_size(self, line: bytes) -> None:
        """`$3`"""
        self.size = number(NAME_SIZE, line, LINE_MAX)
        self.step = Commands.name

    def name(self, line: bytes) -> None:
        """`GET`"""
        if len(line) != self.size or line.lower() not in STATELESS:
            raise Spoilt
        self.next_word()

    def next_word(self) -> None:
        """A word is whole."""
        self.words -= 1
        if self.words:
            self.step = Commands.word_size
        else:
            self.asked += 1
            self.step = Commands.begin

    def word_size(self, line: bytes) -> None:
        """The size of any other word."""
        self.skip = number(SIZE, line, BULK_MAX)
        self.step = Commands.word_end

    def word_end(self, line: bytes) -> None:
        """What is left of the line behind a word."""
        if line:
            raise Spoilt
        self.next_word()


class Replies(Lines):
    """What Redis says: in RESP2, and only what it was asked for.  Arrays in arrays are counted, not nested."""

    __slots__ = ("commands", "left")

    def __init__(self, commands: Commands):
        super().__init__()
        self.commands = commands
        self.left = 0  # values of this answer that are still to come, as far as is known

    def may_begin(self) -> bool:
        return self.left > 0 or self.commands.asked > 0

    def begin(self, line: bytes) -> None:
        """As Lines.begin."""
        self.left = self.left or 1
        kind = line[:1]
        if kind == b"$" and line not in NULLS:
            self.skip = number(SIZE, line, BULK_MAX)
            self.step = Replies.bulk_end
            return
        if kind == b"*" and line not in NULLS:
            self.left += number(VALUES, line, VALUES_MAX)
        elif kind == b":":
            if not INTEGER.fullmatch(line):
                raise Spoilt
        elif kind not in (b"+", b"-", b"$", b"*"):
            raise Spoilt
        self.next_value()

    def next_value(self) -> None:
        """A value is whole; of an array, its head is."""
        self.left -= 1
        if not self.left:
            self.commands.asked -= 1

    def bulk_end(self, line: bytes) -> None:
        """What is left of the line behind a bulk string."""
        if line:
            raise Spoilt
        self.step = Replies.begin
        self.next_value()


class Redis(Conversation):
    """Redis, RESP2.  Clean between whole answers, as long as all commands were of STATELESS."""

    __slots__ = ()

    def __init__(self) -> None:
        commands = Commands()
        super().__init__(commands, Replies(commands))


# -- HTTP --------------------------------------------------------------------------------------

# Source: RFC 9112.  A method that is not here may have a body that only its servers know of.
REQUEST = re.compile(rb"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) [!-~]+ HTTP/1\.1")
STATUS = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9])(?: [\t -~\x80-\xff]*)?")
TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
VALUE = re.compile(rb"[\t -~\x80-\xff]*")  # RFC 9110 section 5.5
LENGTH = re.compile(rb"0|[1-9][0-9]{0,14}")
CHUNK = re.compile(rb"[0-9A-Fa-f]{1,15}")  # extensions (`;`) are nothing that clients use
BODILESS = (b"GET", b"HEAD", b"DELETE")  # a body of theirs is read by some and not by others: RFC 9110 section 9.3.1
KEEPS = (b"keep-alive", b"te")  # options of Connection that keep it
# Schemes that say who asks with each request.  Others (NTLM, Negotiate) do that for a connection: RFC 4559 section 6.
PER_REQUEST = (b"basic", b"bearer", b"digest", b"apikey", b"token", b"aws4-hmac-sha256")
PER_CONNECTION = re.compile(rb"ntlm|negotiate|kerberos|nego2")
# The server speaks another protocol from here on, or had trouble to read the request: perhaps it read it otherwise.
TROUBLE = frozenset((101, 400, 408, 411, 413, 414, 417, 421, 426, 431, 501, 505))
NO_ANSWER_BODY, WAITS = 1, 2  # of a request: it was HEAD; it waits for 100 (Expect)


class Messages(Lines):
    """One direction of HTTP/1.1."""

    __slots__ = ("room", "length", "chunked")
    judges: Mapping[bytes, Callable[[Any, bytes], None]]  # by the name of a field: what is made of its value
    head_ended: Callable[[Any], None]  # the head is whole: what comes then?

    def __init__(self) -> None:
        super().__init__()
        self.room = 0  # bytes that the head may still have
        self.length: int | None = None
        self.chunked = False

    def head_begins(self) -> None:
        """Forget the message before."""
        self.room = HEAD_MAX
        self.length, self.chunked = None, False
        self.step = type(self).field

    def body(self) -> None:
        """A body comes next, if there is any.  Source: RFC 9112 section 6.3."""
        if self.chunked:
            self.step = type(self).chunk_size
        else:
            self.skip = self.length or 0
            self.step = type(self).begin

    def is_in_body(self) -> bool:
        """Whether a head is whole, and its body is not."""
        return bool(self.skip) or self.step not in (type(self).begin, type(self).field)

    def field(self, line: bytes) -> None:
        """A field of the head, or the empty line behind the last."""
        if not line:
            if self.chunked and self.length is not None:
                raise Spoilt
            self.head_ended()
            return
        name, value = self.parse(line)
        judge = self.judges.get(name)
        if judge is not None:
            judge(self, value)

    def parse(self, line: bytes) -> tuple[bytes, bytes]:
        """The name, in lower case and with `-` for `_`, as some servers read it, and the value.  Raises Spoilt."""
        self.room -= len(line)
        name, colon, value = line.partition(b":")
        if self.room < 0 or not colon or not TOKEN.fullmatch(name) or not VALUE.fullmatch(value):
            raise Spoilt
        return name.lower().replace(b"_", b"-"), value.strip(b" \t")

    def chunk_size(self, line: bytes) -> None:
        """The size of a chunk.  Source: RFC 9112 section 7.1."""
        if not CHUNK.fullmatch(line):
            raise Spoilt
        self.skip = int(line, 16)
        self.step = type(self).chunk_end
        if not self.skip:
            self.room = HEAD_MAX
            self.step = type(self).trailer

    def chunk_end(self, line: bytes) -> None:
        """What is left of the line behind a chunk."""
        if line:
            raise Spoilt
        self.step = type(self).chunk_size

    def trailer(self, line: bytes) -> None:
        """A field behind the last chunk, or the empty line behind all."""
        if not line:
            self.step = type(self).begin
        elif self.parse(line)[0] in self.judges:
            raise Spoilt

    # -- fields on which it depends where a message ends, and for how long what it says is meant

    def says_length(self, value: bytes) -> None:
        """Content-Length: once, and one number."""
        if self.length is not None or not LENGTH.fullmatch(value):
            raise Spoilt
        self.length = int(value)

    def says_coding(self, value: bytes) -> None:
        """Transfer-Encoding: chunked, once."""
        if self.chunked or value.lower() != b"chunked":
            raise Spoilt
        self.chunked = True

    def says_options(self, value: bytes) -> None:
        """Connection."""
        for option in value.lower().split(b","):
            if option.strip(b" \t") not in KEEPS:
                raise Spoilt

    def says_who(self, value: bytes) -> None:
        """Authorization."""
        if value.partition(b" ")[0].lower() not in PER_REQUEST:
            raise Spoilt

    def asks_who(self, value: bytes) -> None:
        """WWW-Authenticate."""
        if PER_CONNECTION.search(value.lower()):
            raise Spoilt

    def says_never(self, value: bytes) -> None:
        """A field behind which nothing is as before."""
        raise Spoilt

    judges = {
        b"content-length": says_length,
        b"transfer-encoding": says_coding,
        b"connection": says_options,
        b"proxy-connection": says_options,
        b"authorization": says_who,
        b"proxy-authorization": says_who,
        b"www-authenticate": asks_who,
        b"proxy-authenticate": asks_who,
        b"persistent-auth": says_never,  # Microsoft's: who asks is known for the connection
        b"upgrade": says_never,
        b"http2-settings": says_never,
    }


class Requests(Messages):
    """What an HTTP client says."""

    __slots__ = ("asked", "method", "hosts", "waits")

    def __init__(self) -> None:
        super().__init__()
        self.asked: collections.deque[int] = collections.deque()  # requests without a final answer: flags of each
        self.method = b""
        self.hosts = 0
        self.waits = 0

    def begin(self, line: bytes) -> None:
        found = REQUEST.fullmatch(line)
        if found is None or len(self.asked) >= PIPELINED_MAX:
            raise Spoilt
        self.method = found[1]
        self.hosts = self.waits = 0
        self.head_begins()

    def says_host(self, value: bytes) -> None:
        self.hosts += 1

    def says_expect(self, value: bytes) -> None:
        if value.lower() != b"100-continue":
            raise Spoilt
        self.waits = WAITS

    judges = {**Messages.judges, b"host": says_host, b"expect": says_expect}

    def head_ended(self) -> None:
        if self.hosts != 1 or self.method in BODILESS and (self.chunked or self.length):
            raise Spoilt
        self.asked.append(self.waits | (NO_ANSWER_BODY if self.method == b"HEAD" else 0))
        self.body()


class Answers(Messages):
    """What an HTTP server says."""

    __slots__ = ("requests", "status")

    def __init__(self, requests: Requests):
        super().__init__()
        self.requests = requests
        self.status = 0

    def may_begin(self) -> bool:
        return bool(self.requests.asked)

    def begin(self, line: bytes) -> None:
        """As Lines.begin."""
        found = STATUS.fullmatch(line)
        if found is None:
            raise Spoilt
        self.status = int(found[1])
        requests = self.requests
        if self.status in TROUBLE:
            raise Spoilt
        if self.status >= 200 and len(requests.asked) == 1 and requests.is_in_body():
            raise Spoilt  # it has not read all of the request, and perhaps never will
        self.head_begins()

    def head_ended(self) -> None:
        """Source: RFC 9112 section 6.3."""
        asked = self.requests.asked
        has_body = self.chunked or bool(self.length)
        if self.status < 200:
            if has_body:
                raise Spoilt
            if self.status == 100:
                asked[0] &= ~WAITS
            self.step = Answers.begin
            return
        flags = asked.popleft()
        if flags & WAITS:
            raise Spoilt  # has it read the body, or will it take that for a request?
        if self.status in (204, 205) and has_body or self.status == 304 and self.chunked:
            raise Spoilt
        if flags & NO_ANSWER_BODY or self.status in (204, 304):
            self.step = Answers.begin
        elif self.chunked or self.length is not None:
            self.body()
        else:
            raise Spoilt  # its end is that of the connection


class Http(Conversation):
    """HTTP/1.1.  Clean between whole answers, as long as nothing was said for the connection.

    Where two servers could read a message in two ways, the conversation is spoilt: RFC 9112 section 11.2.
    """

    __slots__ = ()

    def __init__(self) -> None:
        requests = Requests()
        super().__init__(requests, Answers(requests))
