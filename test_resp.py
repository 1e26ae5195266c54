"""Tests of sniroute_resp.py, in its order.  The real servers are in test_redis.py."""

from __future__ import annotations

import math
import random

import pytest

import sniroute_resp
from sniroute_refusals import Failed, Malformed
from sniroute_resp import (CODES, COUNT_MAX, DEPTH_MAX, LINE_MAX, REASONS, SCHEMES, SIZE_MAX, TEXTS, ErrorReply, Login,
                           Place, Push, Reader, Server, encode, failure, find_master, greet, parse_url, words_of)

SECRET = "s3cr:et/@%?#x"
SECRET_QUOTED = "s3cr%3Aet%2F%40%25%3F%23x"


def read(*pieces: bytes) -> list:
    """The values in them, and Malformed behind them where that is the end."""
    reader, found = Reader(), []
    try:
        for piece in pieces:
            found.extend(reader.feed(piece))
    except Malformed:
        found.append(Malformed)
    return found


def in_cuts(data: bytes, *, at: list[int]) -> list[bytes]:
    """Some bytes in pieces."""
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)])]


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, reason", [
    ("NOAUTH Authentication required.", "login"), ("WRONGPASS invalid username-password pair", "login"),
    ("ERR invalid password", "login"), ("ERR AUTH <password> called without any password configured", "login"),
    ("NOPERM this user has no permissions to run the 'get' command", "forbidden"),
    ("DENIED Redis is running in protected mode", "forbidden"),
    ("READONLY You can't write against a read only replica.", "readonly"),
    ("LOADING Redis is loading the dataset in memory", "loading"), ("MASTERDOWN Link with MASTER is down", "loading"),
    ("OOM command not allowed when used memory > 'maxmemory'.", "oom"),
    ("MISCONF Errors writing to the AOF file", "disk"),
    ("BUSY Redis is busy running a script.", "busy"), ("NOSCRIPT No matching script.", "script"),
    ("MOVED 3999 127.0.0.1:6381", "moved"), ("ASK 3999 127.0.0.1:6381", "moved"),
    ("CLUSTERDOWN Hash slot not served", "moved"), ("ERR max number of clients reached", "full"),
    ("ERR DB index is out of range", "database"), ("ERR SELECT is not allowed in cluster mode", "database"),
    ("ERR syntax error", "answer"), ("WRONGTYPE Operation against a key", "answer"), ("", "answer"),
    ("OOMER", "answer"),
    ("ERR Error running script (call to f_ab): @user_script:1: @user_script: 1: -OOM command not allowed", "oom"),
    ("ERR Error running script (call to f_ab): @user_script:1: -READONLY You can't write", "readonly"),
])
def test_an_error_has_a_reason_and_the_words_of_the_server(text, reason):
    failed = failure(ErrorReply(text))
    assert failed.reason == reason and str(failed) == text


def test_all_reasons_have_a_sentence():
    assert {*CODES.values(), *TEXTS.values()} <= REASONS.keys()


def test_an_error_does_not_repeat_what_it_was_told():
    """As Redis answers to a command that it does not know."""
    said = f"ERR unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'app' '{SECRET}' "
    assert words_of(ErrorReply(said)) == "ERR unknown command 'HELLO'"
    assert words_of(ErrorReply("ERR \x1b[1m\n" + "x" * 999)) == "ERR ?[1m?" + "x" * 188 + "..."


def test_the_code_of_an_error():
    assert [ErrorReply(text).code for text in ("OOM x", "MOVED 1 a:1", "ERR", "no", "", "E", "-OOM")] == [
        "OOM", "MOVED", "ERR", "ERR", "ERR", "ERR", "ERR"]


# -- writing -----------------------------------------------------------------------------------


def test_a_command_is_an_array_of_bulk_strings():
    assert encode("SET", b"\r\n\0", "é", 12) == b"*4\r\n$3\r\nSET\r\n$3\r\n\r\n\0\r\n$2\r\n\xc3\xa9\r\n$2\r\n12\r\n"
    assert read(encode("SET", b"\r\n\0", "é", 12)) == [[b"SET", b"\r\n\0", "é".encode(), b"12"]]


# -- reading -----------------------------------------------------------------------------------

VALUES = [
    (b"+OK\r\n", "OK"), (b"+\r\n", ""), (b"+\xff\r\n", "\ufffd"), (b"-ERR no\r\n", ErrorReply("ERR no")),
    (b":0\r\n", 0), (b":-12\r\n", -12), (b":+12\r\n", 12), (b"$0\r\n\r\n", b""), (b"$2\r\n\r\n\r\n", b"\r\n"),
    (b"$-1\r\n", None), (b"*-1\r\n", None), (b"_\r\n", None), (b"*0\r\n", []), (b"*2\r\n:1\r\n$1\r\na\r\n", [1, b"a"]),
    (b"*1\r\n*1\r\n*0\r\n", [[[]]]), (b"*3\r\n$-1\r\n*-1\r\n-OOM x\r\n", [None, None, ErrorReply("OOM x")]),
    (b"#t\r\n", True), (b"#f\r\n", False), (b",1.5\r\n", 1.5), (b",10\r\n", 10.0), (b",-1.5e3\r\n", -1500.0),
    (b",inf\r\n", math.inf), (b",-inf\r\n", -math.inf), (b"(34928903284092385094\r\n", 34928903284092385094),
    (b"!5\r\nERR a\r\n", ErrorReply("ERR a")), (b"=8\r\ntxt:some\r\n", b"some"),
    (b"%2\r\n+a\r\n:1\r\n$1\r\nb\r\n*1\r\n:2\r\n", {"a": 1, b"b": [2]}), (b"%0\r\n", {}),
    (b"~2\r\n:1\r\n*0\r\n", [1, []]), (b">2\r\n$7\r\nmessage\r\n:1\r\n", Push([b"message", 1])), (b">0\r\n", Push()),
    (b"|1\r\n+ttl\r\n:3600\r\n:7\r\n", 7), (b"|0\r\n:7\r\n", 7), (b"*2\r\n|1\r\n+a\r\n+b\r\n:1\r\n:2\r\n", [1, 2]),
    (b"*1\r\n%1\r\n+a\r\n|1\r\n+b\r\n+c\r\n+d\r\n", [{"a": "d"}]),
]
GARBAGE = [
    b"HTTP/1.1 400 Bad Request\r\n", b"\0", b"\r\n", b"OK\r\n", b"PING\r\n", b"\x15\x03\x01\0\x02\x02\x46", b"?\r\n",
    b"+OK\n", b"+O\rK\r\n", b"+O\rK\n", b":\r\n", b":1.5\r\n", b":1 \r\n", b":0x1\r\n", b":1_0\r\n",
    b":" + b"1" * 1001 + b"\r\n", b":\xd9\xa1\r\n",
    b"$\r\n", b"$-2\r\n", b"$-0\r\n", b"$01\r\nab\r\n", b"$+1\r\na\r\n", b"$1\r\nab\r\n", b"$1\r\na\n\n", b"$?\r\n",
    b"*?\r\n", b"*-2\r\n", b"*1000000000000\r\n", b"*%d\r\n" % (COUNT_MAX + 1), b"$%d\r\n" % (SIZE_MAX + 1),
    b"%%%d\r\n" % (COUNT_MAX + 1), b"#\r\n", b"#true\r\n", b"_x\r\n", b",\r\n", b",1,5\r\n", b",0x1p3\r\n",
    b",1_0\r\n", b",infinity\r\n", b"=2\r\nab\r\n", b"=4\r\ntext\r\n", b"%1\r\n*0\r\n:1\r\n", b"%-1\r\n", b">-1\r\n",
    b"*1\r\n>0\r\n", b"*1\r\n" * (DEPTH_MAX + 1), b"|-1\r\n", b".\r\n", b";4\r\n", b"!-1\r\n",
]


@pytest.mark.parametrize("data, value", VALUES)
def test_a_value(data, value):
    (found,) = read(data)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("data, value", VALUES)
def test_a_value_that_is_not_whole_is_none(data, value):
    for end in range(len(data)):
        assert read(data[:end]) == []
    assert read(*(data[at:at + 1] for at in range(len(data)))) == [value]


def test_not_a_number_is_a_number():
    assert all(math.isnan(read(data)[0]) for data in (b",nan\r\n", b",-nan\r\n"))


@pytest.mark.parametrize("data", GARBAGE)
def test_what_is_no_value(data):
    """Also where it comes behind good ones, which are not lost."""
    assert read(data) == [Malformed]
    assert read(b":1\r\n" + data) == [1, Malformed]
    assert read(b"*2\r\n:1\r\n" + data) == [Malformed]


def test_behind_what_is_no_value_nothing_is_read():
    reader = Reader()
    for data in (b"+OK\n", b":1\r\n", b""):
        with pytest.raises(Malformed, match="CRLF"):
            list(reader.feed(data))


def test_whoever_stops_early_gets_the_rest_later():
    reader = Reader()
    assert next(reader.feed(b":1\r\n:2\r\n:3")) == 1
    assert list(reader.feed(b"\r\n")) == [2, 3]


def test_a_line_has_an_end():
    assert read(b"+" + b"x" * (LINE_MAX - 2) + b"\r\n") == ["x" * (LINE_MAX - 2)]
    assert read(b"+" + b"x" * LINE_MAX) == [Malformed] == read(b"+" + b"x" * LINE_MAX + b"\r\n")


def test_a_value_of_all_sizes_together_has_a_limit(monkeypatch):
    monkeypatch.setattr(sniroute_resp, "SIZE_MAX", 1000)
    monkeypatch.setattr(sniroute_resp, "COUNT_MAX", 100)
    half = b"$400\r\n" + b"x" * 400 + b"\r\n"
    assert read(b"*2\r\n" + half + half, half) == [[b"x" * 400] * 2, b"x" * 400]
    assert read(b"*3\r\n" + half + half + b"$400\r\n") == [Malformed], "before the rest of it has come"
    assert read(b"*1\r\n*98\r\n" + b":1\r\n" * 98, b":1\r\n" * 200) == [[[1] * 98], *[1] * 200]
    assert read(b"*2\r\n*50\r\n" + b":1\r\n" * 50 + b"*50\r\n" + b":1\r\n" * 50) == [Malformed]
    assert read(b"|1\r\n:1\r\n:2\r\n" * 200) == [Malformed], "attributes without an end"


def some_value(dice: random.Random, depth: int = 0) -> bytes:
    """The bytes of a value."""
    kind = dice.choice("+-:$_#,(!=" + ("*~%>|" if depth < 4 else ""))
    if kind in "*~%>|":
        count = dice.randrange(5)
        values = [some_value(dice, depth + 1) for _ in range(count * (2 if kind in "%|" else 1))]
        if kind == ">" and depth:
            kind = "*"
        if kind in "%|":
            values[::2] = [b":%d\r\n" % number for number in range(count)]
        behind = some_value(dice, depth) if kind == "|" else b""
        return b"%b%d\r\n%b%b" % (kind.encode(), count, b"".join(values), behind)
    data = bytes(dice.choices(b"ab\r\n$*:", k=dice.choice((0, 1, 3, 40))))
    if kind in "$!=":
        data = b"txt:" * (kind == "=") + data
        return b"%b%d\r\n%b\r\n" % (kind.encode(), len(data), data)
    line = {"+": b"OK", "-": b"ERR x", ":": b"%d" % dice.randrange(-9, 99), "_": b"", "#": b"t", ",": b"1.5",
            "(": b"9" * 30}
    return kind.encode() + line[kind] + b"\r\n"


def test_any_cut_of_the_bytes_gives_the_same_values():
    """Good ones, and such that were damaged: those end in Malformed, or wait for more, and in nothing else."""
    dice = random.Random(20)
    seen = {"good": 0, "bad": 0, "waits": 0}
    for number in range(1500):
        count = dice.randrange(1, 6)
        data = b"".join(some_value(dice) for _ in range(count))
        if number % 2:
            damaged = bytearray(data)
            for _ in range(dice.randrange(1, 4)):
                at = dice.randrange(len(damaged) + 1)
                noise = dice.choices(b"*$%~>|+-:,#_(!=\r\n0123456789 ?x\xff", k=dice.randrange(3))
                damaged[at:at + dice.randrange(3)] = bytes(noise)
            data = bytes(damaged)
        whole = read(data)
        assert number % 2 or len(whole) == count and Malformed not in whole
        seen["bad" if Malformed in whole else "good" if len(whole) == count else "waits"] += 1
        for _ in range(4):
            cuts = sorted(dice.choices(range(len(data) + 1), k=dice.randrange(1, 9)))
            assert repr(read(*in_cuts(data, at=cuts))) == repr(whole), (data, cuts)
        assert repr(read(*in_cuts(data, at=list(range(1, len(data)))))) == repr(whole), data
    assert min(seen.values()) > 50, seen


def test_noise_is_no_exception():
    dice = random.Random(21)
    for _ in range(3000):
        read(bytes(dice.choices(b"*$%~>|+-:,#_(!=\r\n0123456789\0\xff", k=dice.randrange(40))))


# -- where a Redis is --------------------------------------------------------------------------


@pytest.mark.parametrize("text, place, shown", [
    ("redis://redis.example.com", Place("redis", (("redis.example.com", 6379),), "", 0, None),
     "redis://redis.example.com:6379/0"),
    ("REDIS://h:1/2/", Place("redis", (("h", 1),), "", 2, None), "redis://h:1/2"),
    ("rediss://[2001:db8::1]/15", Place("rediss", (("2001:db8::1", 6379),), "", 15, None),
     "rediss://[2001:db8::1]:6379/15"),
    ("redis://:pass@h", Place("redis", (("h", 6379),), "", 0, Login("", "pass")), "redis://h:6379/0"),
    (f"redis://app:{SECRET_QUOTED}@h/1", Place("redis", (("h", 6379),), "", 1, Login("app", SECRET)),
     "redis://h:6379/1"),
    ("redis://a:p@ss/w?o#rd@h", Place("redis", (("h", 6379),), "", 0, Login("a", "p@ss/w?o#rd")), "redis://h:6379/0"),
    ("redis://a:b:c@h", Place("redis", (("h", 6379),), "", 0, Login("a", "b:c")), "redis://h:6379/0"),
    ("redis+sentinel://s1,s2:7,[::1]:8/main",
     Place("redis+sentinel", (("s1", 26379), ("s2", 7), ("::1", 8)), "main", 0, None),
     "redis+sentinel://s1:26379,s2:7,[::1]:8/main/0"),
    ("redis+sentinel://u:p@s1/main/3", Place("redis+sentinel", (("s1", 26379),), "main", 3, Login("u", "p")),
     "redis+sentinel://s1:26379/main/3"),
])
def test_a_url(text, place, shown):
    found = parse_url(text)
    assert found == place and str(found) == shown
    assert hash(found) == hash(place) and found.is_tls == text.startswith("rediss:")
    if found.login is not None:
        assert found.login.password not in f"{found!r}{found}{found.login}{found.login!r}"


@pytest.mark.parametrize("text, says", [
    ("", "begins with none of redis://, rediss://, redis"), ("h:6379", "begins with none of"),
    ("http://h", "begins with none of"),
    ("redis:h", "begins with none of"), ("unix:///run/redis.sock", "begins with none of"),
    ("redis://", "a host is"), ("redis://h:x", "a host is"), ("redis://h:70000", "a host is"),
    ("redis://::1", "a host is"),
    ("redis://a:1:2", "a host is"), ("redis://h,i", "too many hosts"), ("redis://h/x", "a number"),
    ("redis://h/1/2", "a number"),
    ("redis://h/-1", "a number"), ("redis://h/123456", "a number"), ("redis://h?db=1", "it is not"),
    ("redis://h#1", "it is not"),
    ("redis://h\n", "it is not"), ("redis://h x", "it is not"), ("redis://hé", "it is not"),
    ("redis://@h", "USER:PASSWORD"), ("redis://SECRET:@h", "USER:PASSWORD"), ("redis://a:SECRET%@h", "%25"),
    ("redis://a:SECRET%zz@h", "%25"), ("redis://a:SECRET%ff@h", "%25"), ("redis://a:SECRET@h:x", "a host is"),
    ("redis://a:SECRET@", "a host is"), ("redis://a:SECRET", "a host is"), ("redis://a:SECRET/x", "a number"),
    ("redis+sentinel://h", "name the master"), ("redis+sentinel://h/", "name the master"),
    ("redis+sentinel://h,/m", "a host is"),
    ("redis+sentinel://h/m/x", "a number"), (f"redis+sentinel://{'h,' * 16}h/m", "too many hosts"),
])
def test_a_url_that_is_wrong_is_explained_without_its_secret(text, says):
    with pytest.raises(ValueError) as caught:
        parse_url(text)
    said = f"{caught.value} {caught.value.__cause__}"
    assert says in said and "SECRET" not in said


def test_each_kind_of_url_has_its_form():
    assert all(form.form.startswith(f"{name}://") for name, form in SCHEMES.items())


# -- a greeting --------------------------------------------------------------------------------

HELLO = {b"server": b"redis", b"version": b"7.0.15", b"proto": 3, b"mode": b"standalone"}
MASTER = [b"master", 0, []]
UNKNOWN = ErrorReply("ERR unknown command 'HELLO', with args beginning with: '3' ")


def have(talk, *answers):
    """What was asked in a talk with these answers, and what came of it: a result, or Failed."""
    asked = [next(talk)]
    try:
        for answer in answers:
            asked.append(talk.send(answer))
    except StopIteration as end:
        return asked, end.value
    except Failed as failed:
        return asked, failed
    raise AssertionError(f"it asks for more: {asked[-1]}")


@pytest.mark.parametrize("url, answers, asked", [
    ("redis://h", [HELLO, "PONG", MASTER], [("HELLO", 3, "SETNAME", "sniroute"), ("PING",), ("ROLE",)]),
    ("redis://a:b@h/2", [HELLO, "OK", "PONG", MASTER],
     [("HELLO", 3, "AUTH", "a", "b", "SETNAME", "sniroute"), ("SELECT", 2), ("PING",), ("ROLE",)]),
    ("redis://:b@h", [HELLO, "PONG", MASTER],
     [("HELLO", 3, "AUTH", "default", "b", "SETNAME", "sniroute"), ("PING",), ("ROLE",)]),
])
def test_a_greeting_in_resp_3(url, answers, asked):
    assert have(greet(parse_url(url)), *answers) == (asked, Server("7.0.15", 3, "standalone"))


@pytest.mark.parametrize("first", [UNKNOWN, ErrorReply("NOPROTO unsupported protocol version"),
                                   ErrorReply("NOPERM User a has no permissions to run the 'hello' command")])
@pytest.mark.parametrize("url, answers, asked", [
    ("redis://h", ["OK", "PONG", MASTER], [("CLIENT", "SETNAME", "sniroute"), ("PING",), ("ROLE",)]),
    ("redis://:b@h/1", ["OK", "OK", "OK", "PONG", MASTER],
     [("AUTH", "b"), ("CLIENT", "SETNAME", "sniroute"), ("SELECT", 1), ("PING",), ("ROLE",)]),
    ("redis://a:b@h", ["OK", ErrorReply("NOPERM no"), "PONG", ErrorReply("NOPERM no")],
     [("AUTH", "a", "b"), ("CLIENT", "SETNAME", "sniroute"), ("PING",), ("ROLE",)]),
])
def test_a_greeting_in_resp_2(first, url, answers, asked):
    talked, result = have(greet(parse_url(url)), first, *answers)
    assert (talked[1:], result) == (asked, Server("", 2, ""))


@pytest.mark.parametrize("answers, reason", [
    ([ErrorReply("WRONGPASS invalid username-password pair or user is disabled.")], "login"),
    ([ErrorReply("NOAUTH HELLO must be called with the client already authenticated")], "login"),
    ([ErrorReply("DENIED Redis is running in protected mode")], "forbidden"),
    ([ErrorReply("ERR max number of clients reached")], "full"),
    ([ErrorReply("LOADING Redis is loading")], "loading"),
    ([UNKNOWN, ErrorReply("ERR invalid password")], "login"),
    ([UNKNOWN, ErrorReply("ERR Client sent AUTH, but no password is set")], "login"),
    ([UNKNOWN, ErrorReply("ERR wrong number of arguments for 'auth' command")], "login"),
    ([UNKNOWN, "QUEUED"], "answer"), (["OK"], "answer"), ([None], "answer"), ([[]], "answer"), ([b"x"], "answer"),
    ([HELLO, ErrorReply("ERR DB index is out of range")], "database"),
    ([HELLO, "OK", ErrorReply("LOADING Redis is loading")], "loading"),
    ([HELLO, "OK", ErrorReply("MASTERDOWN Link with MASTER is down")], "loading"), ([HELLO, "OK", "PANG"], "answer"),
    ([HELLO, "OK", "PONG", [b"slave", b"h", 6379]], "readonly"), ([HELLO, "OK", "PONG", [b"sentinel", []]], "answer"),
])
def test_a_greeting_that_fails_has_a_reason(answers, reason):
    _, failed = have(greet(parse_url("redis://app:SECRET@h/2")), *answers)
    assert failed.reason == reason and reason in REASONS and "SECRET" not in str(failed)


@pytest.mark.parametrize("role", [MASTER, ErrorReply("ERR unknown command"), None, [], 7, [[]]])
def test_a_server_that_says_nothing_of_its_role_is_taken(role):
    assert have(greet(parse_url("redis://h")), HELLO, "PONG", role)[1].protocol == 3


@pytest.mark.parametrize("hello", [{}, {b"version": 7, b"mode": None}])
def test_a_server_that_says_nothing_of_itself_is_taken(hello):
    assert have(greet(parse_url("redis://h")), hello, "PONG", MASTER)[1] == Server("", 3, "")


SENTINEL = "redis+sentinel://a:SECRET@s/main"
QUESTION = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")


@pytest.mark.parametrize("answers, result", [
    ([[b"192.0.2.1", b"6380"]], ("192.0.2.1", 6380)),
    ([[b"redis-1.example.com", b"6379"]], ("redis-1.example.com", 6379)),
    ([ErrorReply("NOAUTH Authentication required."), "OK", [b"::1", b"1"]], ("::1", 1)),
])
def test_a_sentinel_knows_the_master(answers, result):
    asked, found = have(find_master(parse_url(SENTINEL)), *answers)
    assert found == result and asked[0] == asked[-1] == QUESTION


@pytest.mark.parametrize("answers, reason", [
    ([None], "master"), ([ErrorReply("ERR unknown command `SENTINEL`")], "master"),
    ([ErrorReply("IDONTKNOW I have not enough information")], "answer"),
    ([ErrorReply("NOAUTH x"), ErrorReply("WRONGPASS x")], "login"), ([ErrorReply("NOAUTH x"), 7], "answer"),
    *(([garbage], "answer") for garbage in (
        7, b"ab", "ab", [], [b"h"], [b"h", b"0x1"], [b"h", b"99999"], [b"", b"1"], [b"h\n", b"1"], [b"\xff", b"1"],
        [b"h", b"1", b"2"], [7, 7], {b"h": 1, b"i": 2})),
])
def test_a_sentinel_that_does_not_help_has_a_reason(answers, reason):
    _, failed = have(find_master(parse_url(SENTINEL)), *answers)
    assert isinstance(failed, Failed) and failed.reason == reason and "SECRET" not in str(failed)
