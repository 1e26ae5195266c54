"""HTTP that two programs may read in two ways, as rows; and a forwarder that is only bytes.

    REQUESTS     what a client may say, each with the status that refuses it, or 0
    EVIL         a request that is said behind each, and must not get through behind one that is refused
    SHAPES       public ones, by their names: refused.  NEUTRAL: those that mean one thing to all readers
    RESPONSES    what a backend may say
    Wire         the grammar of sniroute_http, used as a forwarder uses it: bytes in, bytes out

The rows are shared: any program that forwards HTTP has to refuse the same.
"""

from __future__ import annotations

from typing import Iterable, NamedTuple

import sniroute_http
from sniroute_http import AUTHORITY, CHUNKED, Counted, Request, Response
from sniroute_refusals import Malformed

EVIL = b"GET /evil HTTP/1.1\r\nHost: a\r\n\r\n"


class Row(NamedTuple):
    """Something that a client says."""

    name: str
    data: bytes
    status: int = 0  # of the refusal; 0: it gets through
    heard: tuple[tuple[str, str, str, bytes], ...] = ()  # then: method, path, host name and body of each request
    is_cut: bool = False  # what came is right, but not all: the end of the connection is the fault


GET, POST = b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKS = POST + b"Transfer-Encoding: chunked\r\n\r\n"
ONE = (("POST", "/", "a", b"hello"),)
EMPTY = (("GET", "/", "a", b""),)


def chunk_lines() -> Iterable[Row]:
    """The line before a chunk."""
    end = b"hello\r\n0\r\n\r\n"
    for name, line in [
            ("a bare LF in an extension", b"5;\n"), ("a bare CR in an extension", b"5;a\rb\r\n"),
            ("a NUL in an extension", b"5;\x00x\r\n"), ("a bare LF at its end", b"5\n"),
            ("a bare LF behind an extension", b"5;a\n"), ("a bare CR at its end", b"5\r"),
            ("a blank before", b" 5\r\n"), ("a blank behind", b"5 \r\n"), ("a tab behind", b"5\t\r\n"),
            ("a plus", b"+5\r\n"), ("a minus", b"-5\r\n"), ("0x", b"0x5\r\n"), ("an underscore", b"5_0\r\n"),
            ("CR before", b"\r0\r\n"), ("empty", b"\r\n"), ("only an extension", b";a\r\n"), ("no digit", b"G\r\n"),
            ("17 digits", b"00000000000000005\r\n"), ("what wraps to 0", b"10000000000000000\r\n"),
            ("16 digits", b"ffffffffffffffff\r\n"), ("Arabic digits", "\u0665".encode() + b"\r\n"),
            ("a comma", b"5,5\r\n"), ("a point", b"5.0\r\n"), ("CR CR LF", b"5\r\r\n"),
            ("64 KiB of extension", b"5;" + b"x" * 65536 + b"\r\n")]:
        yield Row(f"chunk line: {name}", CHUNKS + line + end, 400)
    for name, line in [("an extension", b"5;a=b\r\n"), ("a quoted one", b'5;a="b;c"\r\n'),
                       ("blanks before it", b"5 \t;a\r\n"),
                       ("leading zeros", b"0005\r\n"), ("plain", b"5\r\n")]:
        yield Row(f"chunk line: {name}, which is dropped", CHUNKS + line + end, heard=ONE)


def chunk_data() -> Iterable[Row]:
    """What is in a chunk, and behind it."""
    for name, said in [
            ("two bytes too many", b"5\r\nhello!!\r\n0\r\n\r\n"),
            ("other bytes than CRLF behind it", b"5\r\nhelloXY0\r\n\r\n"),
            ("nothing behind it", b"5\r\nhello0\r\n\r\n"), ("LF behind it", b"5\r\nhello\n0\r\n\r\n"),
            ("CR behind it", b"5\r\nhello\r0\r\n\r\n"), ("a byte too few", b"5\r\nhell\r\n0\r\n\r\n"),
            ("a length as trailer", b"0\r\nContent-Length: 5\r\n\r\n"), ("a host as trailer", b"0\r\nHost: b\r\n\r\n"),
            ("a coding as trailer", b"0\r\nTransfer_Encoding: chunked\r\n\r\n"),
            ("a forwarding field as trailer", b"0\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n"),
            ("a trailer that ends in LF", b"0\r\nX: y\n\r\n"), ("a trailer without a colon", b"0\r\nX y\r\n\r\n"),
            ("a folded trailer", b"0\r\nX: y\r\n z\r\n\r\n"), ("LF at the very end", b"0\r\nX: y\r\n\n"),
            ("LF behind the last chunk", b"0\n\r\n"), ("101 trailers", b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n")]:
        yield Row(f"chunk: {name}", CHUNKS + said, 400)
    yield Row("chunk: the end of the connection within a trailer", CHUNKS + b"0\r\n", 400, is_cut=True)
    yield Row("chunk: trailers, which are dropped", CHUNKS + b"5\r\nhello\r\n0\r\nX: y\r\nDigest: z\r\n\r\n", heard=ONE)
    yield Row("chunk: 1 and then 4 bytes", CHUNKS + b"1\r\nh\r\n04\r\nello\r\n000\r\n\r\n", heard=ONE)


def lengths() -> Iterable[Row]:
    """Content-Length."""
    for name, value in [
            ("empty", b""), ("+1", b"+1"), ("-0", b"-0"), ("0_1", b"0_1"), ("1 1", b"1 1"), ("0x1", b"0x1"),
            ("1,1", b"1,1"), ("1, 2", b"1, 2"), ("over 64 bits", b"18446744073709551617"), ("VT behind", b"1\x0b"),
            ("Arabic digits", "\u0661".encode()), ("octal", b"01"), ("a point", b"1.0"), ("1e0", b"1e0"),
            ("19 digits", b"1" * 19), ("a NUL", b"1\x00"), ("a semicolon", b"1;"), ("quoted", b'"1"'),
            ("chunked", b"chunked"),
            ("no-break space", b"\xa01"), ("folded", b"\r\n 1")]:
        yield Row(f"length: {name}", POST + b"Content-Length: " + value + b"\r\n\r\nx", 400)
    for name, lines in [("twice the same", b"Content-Length: 1\r\nContent-Length: 1\r\n"),
                        ("twice, not the same", b"Content-Length: 1\r\nX: y\r\nContent-length: 2\r\n")]:
        yield Row(f"length: {name}", POST + lines + b"\r\nx", 400)
    yield Row("length: a tab before it", POST + b"Content-Length:\t5 \r\n\r\nhello", heard=ONE)
    yield Row("length: HTTP/1.0", b"POST / HTTP/1.0\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", heard=ONE)
    yield Row("length: HTTP/1.0 and none", b"POST / HTTP/1.0\r\nHost: a\r\n\r\n", 411)
    yield Row("length: its twin, which is dropped", POST + b"Content_Length: 40\r\nContent-Length: 5\r\n\r\nhello",
              heard=ONE)
    for method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        yield Row(f"length: a body of {method} that looks like a request",
                  b"%b / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (method.encode(), len(EVIL), EVIL),
                  heard=((method, "/", "a", EVIL),))
    for method in (b"TRACE /", b"CONNECT a:443"):
        yield Row(f"length: a body of {method.decode()}",
                  method + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx", 400)
    yield Row("length: the end of the connection within the body", POST + b"Content-Length: 50\r\n\r\nhello", 400,
              is_cut=True)


def codings() -> Iterable[Row]:
    """Transfer-Encoding."""
    body = b"\r\n5\r\nhello\r\n0\r\n\r\n"
    for name, lines in [("behind a length", b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
                        ("before a length", b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"),
                        ("before a length of 0", b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n"),
                        ("twice", b"Transfer-Encoding: chunked\r\n" * 2),
                        ("twice, and one is identity",
                         b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n"),
                        ("a blank before the colon", b"Transfer-Encoding : chunked\r\n"),
                        ("a tab before the colon", b"Transfer-Encoding\t: chunked\r\n"),
                        ("a line end before the colon", b"Transfer-Encoding\r\n: chunked\r\n"),
                        ("folded", b"Transfer-Encoding:\r\n chunked\r\n"),
                        ("folded with LF", b"Transfer-Encoding:\n chunked\r\n"),
                        ("a blank before it", b" Transfer-Encoding: chunked\r\n"),
                        ("behind a bare CR", b"X: y\rTransfer-Encoding: chunked\r\n"),
                        ("behind a bare LF", b"X: y\nTransfer-Encoding: chunked\r\n"),
                        ("behind CR CR", b"X: y\r\r\nTransfer-Encoding: chunked\r\n"),
                        ("a VT in its name", b"Transfer\x0bEncoding: chunked\r\n"),
                        ("a NUL in its name", b"Transfer-Encoding\x00: chunked\r\n")]:
        yield Row(f"coding: {name}", POST + lines + body, 400)
    for name, value, status in [
            ("xchunked", b"xchunked", 501), ("chunked, chunked", b"chunked, chunked", 400),
            (", chunked", b", chunked", 400),
            ("chunked,", b"chunked,", 400), ("chunked;x=1", b"chunked;x=1", 400), ("identity", b"identity", 501),
            ("gzip, chunked", b"gzip, chunked", 501), ("chunked, gzip", b"chunked, gzip", 501), ("empty", b"", 400),
            ("VT chunked", b"\x0bchunked", 400), ("NUL behind", b"chunked\x00", 400), ("quoted", b'"chunked"', 400),
            ("the Kelvin sign", "chun\u212aed".encode(), 400), ("cow", b"cow", 501),
            ("a blank inside", b"chunked x", 400),
            ("no-break space", b"\xa0chunked", 400)]:
        yield Row(f"coding: {name}", POST + b"Transfer-Encoding: " + value + b"\r\n" + body, status)
    yield Row("coding: HTTP/1.0", b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + body, 400)
    yield Row("coding: Chunked with blanks", POST + b"transfer-encoding: \t Chunked\t\r\n" + body, heard=ONE)
    for name in (b"Transfer_Encoding", b"Transfer.Encoding", b"TRANSFER~ENCODING"):
        yield Row(f"coding: its twin {name.decode()}, which is dropped",
                  POST + name + b": chunked\r\nContent-Length: 5\r\n\r\nhello", heard=ONE)


def lines() -> Iterable[Row]:
    """Lines of a head, and their ends."""
    for name, said in [
            ("LF behind the request line", b"GET / HTTP/1.1\nHost: a\r\n\r\n"),
            ("LF behind a field", GET + b"X: y\n\r\n"),
            ("LF at the end", GET + b"\n"), ("LF everywhere", b"GET / HTTP/1.1\nHost: a\n\n"),
            ("a bare CR in a value", GET + b"X: y\rz\r\n\r\n"), ("CR CR LF", GET + b"X: y\r\r\n\r\n"),
            ("a bare CR in the request line", b"GET /\r HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("LF first", b"\n" + GET + b"\r\n"),
            ("100 empty lines first", b"\r\n" * 100 + GET + b"\r\n"),
            ("two empty lines first", b"\r\n\r\n" + GET + b"\r\n"),
            ("a bare CR first", b"\r" + GET + b"\r\n"),
            ("a folded line", GET + b"X: y\r\n z\r\n\r\n"), ("a line folded with a tab", GET + b"X: y\r\n\tz\r\n\r\n"),
            ("a folded line of OPTIONS", b"OPTIONS / HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n"),
            ("a blank before the first field", b"GET / HTTP/1.1\r\n X: y\r\nHost: a\r\n\r\n"),
            ("no colon", GET + b"X y\r\n\r\n"),
            ("no name", GET + b": y\r\n\r\n"), ("only a colon", GET + b":\r\n\r\n"),
            ("a NUL in a name", GET + b"X\x00: y\r\n\r\n"),
            ("a NUL in a value", GET + b"X: \x00\r\n\r\n"), ("0x7f in a value", GET + b"X: \x7f\r\n\r\n"),
            ("FF in a value", GET + b"X: \x0c\r\n\r\n"), ("0xa0 in a name", GET + b"X\xa0: y\r\n\r\n"),
            ("0xa0 before a colon", GET + b"Host\xa0: b\r\n\r\n"), ("a parenthesis in a name", GET + b"X(: y\r\n\r\n"),
            ("0xa0 in the target", b"GET /\xa0 HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("a blank before a colon", GET + b"X : y\r\n\r\n"),
            ("two blanks", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("a tab for a blank", b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n"),
            ("a blank at the end", b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n"),
            ("a blank first", b" GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("a blank in the target", b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("HTTP/1.10", b"GET / HTTP/1.10\r\nHost: a\r\n\r\n"),
            ("HTTP/01.1", b"GET / HTTP/01.1\r\nHost: a\r\n\r\n"), ("HTTP/1", b"GET / HTTP/1\r\nHost: a\r\n\r\n"),
            ("http/1.1", b"GET / http/1.1\r\nHost: a\r\n\r\n"), ("HTTP/1,1", b"GET / HTTP/1,1\r\nHost: a\r\n\r\n"),
            ("an Arabic digit", "GET / HTTP/1.\u0661\r\nHost: a\r\n\r\n".encode()),
            ("no version (HTTP/0.9)", b"GET /\r\n"),
            ("no target", b"GET HTTP/1.1\r\nHost: a\r\n\r\n"), ("a fragment", b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n")]:
        yield Row(f"line: {name}", said, 400)
    for version in (b"2.0", b"1.2", b"0.9", b"3.0", b"9.9"):
        yield Row(f"line: HTTP/{version.decode()}", b"GET / HTTP/" + version + b"\r\nHost: a\r\n\r\n", 505)
    yield Row("line: one empty line first, which is skipped", b"\r\n" + GET + b"\r\n", heard=EMPTY)
    yield Row("line: a field of 64 KiB", GET + b"X: " + b"y" * 65536 + b"\r\n\r\n", 431)
    yield Row("line: 101 fields", GET + b"X: y\r\n" * 100 + b"\r\n", 431)
    yield Row("line: 10,000 fields", GET + b"X: y\r\n" * 10000 + b"\r\n", 431)
    yield Row("line: 100 fields", GET + b"X: y\r\n" * 99 + b"\r\n", heard=EMPTY)
    yield Row("line: a target of 8,193 bytes", b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"x" * 8192), 414)
    yield Row("line: a target of 64 KiB", b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"x" * 65536), 414)
    yield Row("line: a target of 8,192 bytes", b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"x" * 8191),
              heard=(("GET", "/" + "x" * 8191, "a", b""),))
    yield Row("line: what is no ASCII in a value", GET + b"X: \xe9\xff\r\n\r\n", heard=EMPTY)


def hosts() -> Iterable[Row]:
    """Host, and the forms of a target."""
    for name, lines in [
            ("none", b""), ("twice", b"Host: a\r\nHost: a\r\n"), ("two", b"Host: a\r\nHost: b\r\n"),
            ("a,b", b"Host: a,b\r\n"),
            ("a b", b"Host: a b\r\n"), ("a/b", b"Host: a/b\r\n"), ("u@a", b"Host: u@a\r\n"),
            ("no port", b"Host: a:\r\n"),
            ("a:x", b"Host: a:x\r\n"), ("a:99999", b"Host: a:99999\r\n"), ("a:0", b"Host: a:0\r\n"),
            ("a:080", b"Host: a:080\r\n"),
            ("a:+80", b"Host: a:+80\r\n"), ("a:80:80", b"Host: a:80:80\r\n"), ("[::1]:80", b"Host: [::1]:80\r\n"),
            ("an address", b"Host: 192.0.2.1\r\n"), ("254 bytes", b"Host: " + b".".join([b"a" * 63] * 4) + b"\r\n"),
            ("%61", b"Host: %61\r\n"), ("a#b", b"Host: a#b\r\n"), ("a?b", b"Host: a?b\r\n"),
            ("a\\b", b"Host: a\\b\r\n"),
            ("empty", b"Host:\r\n"), ("dots", b"Host: a..b\r\n"), ("only a dot", b"Host: .\r\n"),
            ("no ASCII", b"Host: \xe4\r\n"),
            ("its twin alone", b"Ho_st: a\r\n"), ("a blank before", b" Host: a\r\n")]:
        yield Row(f"host: {name}", b"GET / HTTP/1.1\r\n" + lines + b"\r\n", 400)
    for name, value, host in [("a port", b"a:80", "a"), ("a dot at the end", b"A.", "a"),
                              ("xn--", b"XN--Mnchen-3ya.Example", "xn--mnchen-3ya.example"),
                              ("253 bytes", b".".join([b"a" * 63] * 3 + [b"a" * 61]),
                               ".".join(["a" * 63] * 3 + ["a" * 61])),
                              ("blanks around", b"\t a.example.com \t", "a.example.com")]:
        yield Row(f"host: {name}", b"GET / HTTP/1.1\r\nHost:" + value + b"\r\n\r\n", heard=(("GET", "/", host, b""),))
    yield Row("host: none in HTTP/1.0", b"GET / HTTP/1.0\r\n\r\n", heard=(("GET", "/", "", b""),))
    for name, line in [("another host", b"GET http://b/"), ("another port", b"GET http://a:8080/"),
                       ("a user", b"GET http://u@a/"),
                       ("another scheme", b"GET ftp://a/"), ("no host", b"GET http:///x"), ("no path", b"GET a"),
                       ("a path without /", b"GET x/y"), ("* of GET", b"GET *"), ("a fragment", b"GET http://a/#x"),
                       ("authority of GET", b"GET a:443"), ("a backslash", b"GET http://a\\@b/"),
                       ("CONNECT of a path", b"CONNECT /"), ("CONNECT without a port", b"CONNECT a"),
                       ("CONNECT of a URL", b"CONNECT http://a:443/")]:
        yield Row(f"target: {name}", line + b" HTTP/1.1\r\nHost: a\r\n\r\n", 400)
    yield Row("target: https", b"GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 421)
    yield Row("target: CONNECT", b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 405)
    yield Row("target: absolute, and no Host", b"GET http://a/ HTTP/1.1\r\n\r\n", 400)
    for name, line, heard in [
            ("absolute", b"GET http://a/x?y", ("GET", "/x?y")),
            ("absolute, port 80", b"GET HTTP://A.:80/x", ("GET", "/x")),
            ("absolute, no path", b"GET http://a", ("GET", "/")),
            ("absolute, only a query", b"GET http://a?x", ("GET", "/?x")),
            ("OPTIONS *", b"OPTIONS *", ("OPTIONS", "*")), ("OPTIONS, absolute", b"OPTIONS http://a", ("OPTIONS", "*")),
            ("two slashes", b"GET //b/x", ("GET", "//b/x")), ("what browsers send", b'GET /?q={"|"}^`', ("GET",
                                                                                                         '/?q={"|"}^`'))]:
        yield Row(f"target: {name}", line + b" HTTP/1.1\r\nHost: a\r\n\r\n", heard=((*heard, "a", b""),))


def starts() -> Iterable[Row]:
    """What else a connection may begin with."""
    yield Row("start: HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505)
    for name, said in [("a method of 17 bytes", b"ABCDEFGHIJKLMNOPQ / HTTP/1.1\r\nHost: a\r\n\r\n"),
                       ("SSTP",
                        b"SSTP_DUPLEX_POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551615\r\n\r\n"),
                       ("a method in lower case", b"get / HTTP/1.1\r\nHost: a\r\n\r\n"),
                       ("RTSP", b"DESCRIBE rtsp://a/ RTSP/1.0\r\nCSeq: 1\r\n\r\n"),
                       ("TLS", b"\x16\x03\x01\x02\x00\x01"), ("SSH", b"SSH-2.0-OpenSSH_9\r\n"), ("SMTP", b"EHLO a\r\n"),
                       ("an answer", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
                       ("no method", b" / HTTP/1.1\r\n\r\n"), ("a NUL", b"\0")]:
        yield Row(f"start: {name}", said, 400)
    yield Row("start: one byte and silence", b"G", 400, is_cut=True)
    yield Row("start: half a head", GET, 400, is_cut=True)
    for method in ("PROPFIND", "M-SEARCH", "BASELINE-CONTROL", "QUERY"):
        yield Row(f"start: {method}", b"%b / HTTP/1.1\r\nHost: a\r\n\r\n" % method.encode(),
                  heard=((method, "/", "a", b""),))


def others() -> Iterable[Row]:
    """Expect, Connection, Upgrade."""
    for name, lines in [("another value", b"Expect: 200-ok\r\n"), ("with a prefix", b"Expect: y 100-continue\r\n"),
                        ("a list", b"Expect: 100-continue, 100-continue\r\n"),
                        ("twice", b"Expect: 100-continue\r\n" * 2),
                        ("empty", b"Expect:\r\n")]:
        yield Row(f"expect: {name}", POST + lines + b"Content-Length: 5\r\n\r\nhello", 417)
    yield Row("expect: 100-Continue", POST + b"Expect: 100-Continue\r\nContent-Length: 5\r\n\r\nhello", heard=ONE)
    for name, value in [("Host", b"close, Host"), ("Content-Length", b"Content-Length"),
                        ("X-Forwarded-For", b"x-forwarded-for"),
                        ("X_Forwarded_Proto", b"X_Forwarded_Proto"), ("Transfer_Encoding", b"Transfer_Encoding"),
                        ("Cookie", b"Cookie"), ("no token", b"close; x"), ("a blank", b"keep alive")]:
        yield Row(f"connection: {name}", GET + b"Connection: " + value + b"\r\n\r\n", 400)
    yield Row("connection: empty elements", GET + b"Connection: ,, keep-alive ,X-Foo,\r\nX-Foo: y\r\n\r\n", heard=EMPTY)
    yield Row("upgrade: no list", GET + b"Connection: upgrade\r\nUpgrade: a b\r\n\r\n", 400)


REQUESTS = [*chunk_lines(), *chunk_data(), *lengths(), *codings(), *lines(), *hosts(), *starts(), *others()]


# -- shapes that are known ---------------------------------------------------------------------

PREFIX = b"POST / HTTP/1.1\r\nHost: a\r\n"
SMUGGLED = b"GET /evil HTTP/1.1\r\nHost: a\r\n\r\n"
SHAPES = {  # public ones, by their names; what is a request to one reader only is SMUGGLED
    "CL.TE": PREFIX + b"Content-Length: 35\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE.CL": PREFIX + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n1e\r\n" + SMUGGLED + b"\r\n0\r\n\r\n",
    "TE.TE: xchunked": PREFIX + b"Content-Length: 4\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE.TE: two lines": PREFIX + b"Transfer-Encoding: chunked\r\nTransfer-encoding: x\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE.TE: a tab": PREFIX + b"Content-Length: 5\r\nTransfer-Encoding:\tchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE.TE: a blank before the colon": PREFIX + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE.TE: behind a bare LF": PREFIX + b"X: X\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE.TE: folded": PREFIX + b"Transfer-Encoding\r\n : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE.TE: VT (gunicorn 2018)": PREFIX + b"Content-Length: 5\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE in HTTP/1.0 (pingora CVE-2026-2835)": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": PREFIX + b"Content-Length: 0\r\nContent-Length: 30\r\n\r\n" + SMUGGLED,
    "an empty length (HAProxy CVE-2023-40225)": PREFIX + b"Content-Length:\r\nContent-Length: 30\r\n\r\n" + SMUGGLED,
    "an empty name (HAProxy CVE-2023-25725)": PREFIX + b":\r\nContent-Length: 30\r\n\r\n" + SMUGGLED,
    "a sign (Node.js, llhttp)": PREFIX + b"Content-Length: +0\r\n\r\n" + SMUGGLED,
    "an underscore (Python's int)": PREFIX + b"Content-Length: 3_0\r\n\r\n" + SMUGGLED,
    "CR for CRLF (llhttp CVE-2023-30589)": PREFIX + b"X: y\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TERM.EXT (Go CVE-2025-22871)": CHUNKS + b"1e;\n" + SMUGGLED + b"\r\n0\r\n\r\n" + SMUGGLED,
    "EXT.TERM (Kestrel CVE-2025-55315)": CHUNKS + b"5;x\rhello\r\n0\r\n\r\n" + SMUGGLED,
    "TERM.SPILL (h11 CVE-2025-43859)": CHUNKS + b"5\r\nhelloXX1e\r\n" + SMUGGLED + b"\r\n0\r\n\r\n",
    "a chunk whose size wraps": CHUNKS + b"10000000000000000\r\n\r\n" + SMUGGLED,
    "a length as trailer": CHUNKS + b"0\r\nContent-Length: 30\r\n\r\n" + SMUGGLED,
    "0.CL by Expect": PREFIX + b"Expect: y 100-continue\r\nContent-Length: 30\r\n\r\n" + SMUGGLED,
    "two hosts": b"GET /evil HTTP/1.1\r\nHost: a\r\nHost: internal\r\n\r\n",
    "absolute form against Host": b"GET http://internal/evil HTTP/1.1\r\nHost: a\r\n\r\n",
    "a user in Host": b"GET /evil HTTP/1.1\r\nHost: a@internal\r\n\r\n",
    "a blank in the target": b"GET /evil HTTP/1.1\r\nX: y HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
    "HTTP/0.9": b"GET /evil\r\n\r\n",
    "HTTP/2 by prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED,
    "hop-by-hop abuse (traefik GHSA-62c8)": b"GET /evil HTTP/1.1\r\nHost: a\r\nConnection: close, X-Forwarded-For\r\n\r\n",
    "NUL (web cache poisoning)": b"GET /evil HTTP/1.1\r\nHost: a\0.example.com\r\n\r\n",
}
NEUTRAL = {  # those that get through, as one thing to all readers
    "TE by a twin (CGI)": (PREFIX + b"Transfer_Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello", ONE, b"ransfer"),
    "CL by a twin (CGI)": (PREFIX + b"Content_Length: 0\r\nContent-Length: 5\r\n\r\nhello", ONE, b"Content_"),
    "h2c (Bishop Fox)": (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
                         b"HTTP2-Settings: AAMAAABk\r\n\r\n", (("GET", "/", "a", b""),), b"h2c"),
    "a forged address": (GET + b"X-Forwarded-For: 127.0.0.1\r\nX_Forwarded_For: 127.0.0.1\r\n\r\n",
                         (("GET", "/", "a", b""),), b"127"),
    "GET with a body that is a request": (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 31\r\n\r\n" + SMUGGLED,
                                          (("GET", "/", "a", SMUGGLED),), b"nothing of it is left out"),
    "an encoded line end": (b"GET /%0d%0aX:%20y HTTP/1.1\r\nHost: a\r\n\r\n", (("GET", "/%0d%0aX:%20y", "a", b""),),
                            b"\r\nX: y"),
}


# -- answers -----------------------------------------------------------------------------------


class Said(NamedTuple):
    """Something that a backend says, once the request with `method` was sent."""

    name: str
    data: bytes
    method: str = "GET"
    heard: tuple[tuple[int, bytes], ...] | None = None  # status and body of each answer; None: it is refused
    upgrades: tuple[bytes, ...] = ()
    is_cut: bool = False  # the end of the connection is what is wrong
    left: bytes = b""  # what nobody asked for


OK = b"HTTP/1.1 200 OK\r\n"
WEBSOCKET = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"


def answers() -> Iterable[Said]:
    """What is right."""
    yield Said("100 and 103 first", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
               + OK + b"Content-Length: 2\r\n\r\nok", heard=((100, b""), (103, b""), (200, b"ok")))
    yield Said("five 1xx first", b"HTTP/1.1 102 Processing\r\n\r\n" * 5 + OK + b"Content-Length: 0\r\n\r\n",
               heard=((102, b""),) * 5 + ((200, b""),))
    for status in (204, 304):
        yield Said(f"{status} with a body", b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nok" % status,
                   heard=((status, b""),), left=b"ok")
    yield Said("204 with chunks", b"HTTP/1.1 204 X\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", heard=((204, b""),),
               left=b"0\r\n\r\n")
    yield Said("HEAD with a body", OK + b"Content-Length: 2\r\n\r\nok", "HEAD", heard=((200, b""),), left=b"ok")
    yield Said("HEAD with chunks", OK + b"Transfer-Encoding: chunked\r\n\r\n", "HEAD", heard=((200, b""),))
    yield Said("chunks", OK + b"Transfer-Encoding: chunked\r\n\r\n2;x\r\nok\r\n0\r\nX: y\r\n\r\n",
               heard=((200, b"ok"),))
    yield Said("until the end", OK + b"\r\nhello", heard=((200, b"hello"),))
    yield Said("until the end, HTTP/1.0", b"HTTP/1.0 200 OK\r\n\r\nhello", heard=((200, b"hello"),))
    yield Said("Connection: close with a length", OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nok",
               heard=((200, b"ok"),))
    yield Said("a second answer, which nobody asked for", OK + b"Content-Length: 2\r\n\r\nok" + OK + b"\r\n",
               heard=((200, b"ok"),), left=OK + b"\r\n")
    yield Said("no reason", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", heard=((200, b""),))
    yield Said("a reason that is no ASCII", b"HTTP/1.1 200 \xe9\r\nContent-Length: 0\r\n\r\n", heard=((200, b""),))
    yield Said("999", b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n", heard=((999, b""),))
    yield Said("an upgrade, and 4 KiB behind it", WEBSOCKET + b"\r\n" + b"x" * 4096, heard=((101, b"x" * 4096),),
               upgrades=(b"websocket",))
    yield Said("an upgrade in capitals", WEBSOCKET.upper().replace(b"HTTP/1.1 101 SWITCHING PROTOCOLS",
                                                                   b"HTTP/1.1 101 X") + b"\r\n",
               heard=((101, b""),), upgrades=(b"websocket",))
    yield Said("200 to an upgrade", OK + b"Content-Length: 2\r\n\r\nok", heard=((200, b"ok"),),
               upgrades=(b"websocket",))
    yield Said("a twin of the coding", OK + b"Transfer_Encoding: chunked\r\nContent-Length: 2\r\n\r\nok",
               heard=((200, b"ok"),))


def bad_answers() -> Iterable[Said]:
    """What is wrong."""
    for name, said in [
            ("a length and chunks",
             OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
            ("two lengths", OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok"),
            ("a length that is none", OK + b"Content-Length: +2\r\n\r\nok"),
            ("another coding", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n"),
            ("chunks in HTTP/1.0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
            ("a bad chunk", OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nokXX"),
            ("a head of 1 MiB", OK + b"X: " + b"y" * (1 << 20) + b"\r\n\r\n"),
            ("101 fields", OK + b"X: y\r\n" * 101 + b"\r\n"), ("status 99", b"HTTP/1.1 99 X\r\n\r\n"),
            ("status 099", b"HTTP/1.1 099 X\r\n\r\n"),
            ("status 1000", b"HTTP/1.1 1000 X\r\n\r\n"), ("status 2OO", b"HTTP/1.1 2OO X\r\n\r\n"),
            ("LF", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
            ("LF at the end", OK + b"\n"), ("a folded line", OK + b"X: y\r\n z\r\n\r\n"),
            ("a blank before a colon", OK + b"Content-Length : 0\r\n\r\n"),
            ("HTTP/2", b"HTTP/2 200\r\n\r\n"), ("no HTTP", b"220 smtp\r\n"), ("TLS", b"\x15\x03\x03\x00\x02"),
            ("an empty line first", b"\r\n" + OK + b"\r\n"),
            ("a NUL", OK + b"X: \0\r\n\r\n"), ("a bare CR", OK + b"X: y\rSet-Cookie: z\r\n\r\n"),
            ("101 that was not asked for", WEBSOCKET + b"\r\n"),
            ("a Connection that names the length", OK + b"Connection: Content-Length\r\nContent-Length: 0\r\n\r\n")]:
        yield Said(name, said)
    for name, said in [("without a token", b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\n\r\n"),
                       ("another token", WEBSOCKET.replace(b"websocket", b"h2c") + b"\r\n"),
                       ("two tokens", WEBSOCKET + b"Upgrade: foo\r\n\r\n"),
                       ("no Connection", b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\n\r\n"),
                       ("HTTP/1.0", WEBSOCKET.replace(b"1.1", b"1.0") + b"\r\n")]:
        yield Said(f"101: {name}", said, upgrades=(b"websocket",))
    yield Said("an end within the head", OK + b"Content-", is_cut=True)
    yield Said("an end within the body", OK + b"Content-Length: 5\r\n\r\nhell", is_cut=True)
    yield Said("an end within a chunk", OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhell", is_cut=True)
    yield Said("an end before the last chunk", OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", is_cut=True)
    yield Said("an end within the last chunk", OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", is_cut=True)


RESPONSES = [*answers(), *bad_answers()]


# -- a forwarder without sockets ---------------------------------------------------------------


class Wire:
    """One direction of one connection: what came is fed, `out` is what passes on, `heard` the messages so far."""

    def __init__(self, answers_to: str = "", upgrades: tuple[bytes, ...] = ()):
        self.answers_to = answers_to  # the method that is answered; "": these are requests
        self.upgrades = upgrades
        self.data, self.seen = bytearray(), 0
        self.body: Counted | None = None
        self.is_over = False  # the one answer was heard
        self.heard: list[Request | Response] = []
        self.bodies: list[bytearray] = []  # beside `heard`: what is in them
        self.out = bytearray()

    def feed(self, piece: bytes) -> None:
        """Some bytes came.  Raises Malformed."""
        self.data += piece
        while self.data and not self.is_over:
            if self.body is None:
                message = self.parse()
                if message is None:
                    self.seen = len(self.data)
                    return
                self.begin(message)
            else:
                parts, used = self.body.feed(bytes(self.data))
                self.out += b"".join(parts)
                inner, same = self.inner.feed(bytes(self.data))
                assert used == same
                self.bodies[-1] += b"".join(inner)
                del self.data[:used]
            if self.body.is_done:
                self.body = None
                self.is_over = bool(self.answers_to) and not self.heard[-1].is_interim

    def parse(self) -> Request | Response | None:
        if self.answers_to:
            return sniroute_http.parse_response(self.data, self.answers_to, self.upgrades, self.seen)
        return sniroute_http.parse_request(self.data, self.seen)

    def begin(self, message: Request | Response) -> None:
        """A head is whole."""
        if isinstance(message, Response):
            self.out += sniroute_http.pass_response(message)
        elif message.form == AUTHORITY:
            raise Malformed("no tunnels here", kind="bad_request", status=405)
        else:
            self.out += sniroute_http.pass_request(message)
        self.heard.append(message)
        self.bodies.append(bytearray())
        self.body = sniroute_http.open_body(message)
        self.inner = sniroute_http.open_body(message, unframed=message.framing.kind == CHUNKED)
        del self.data[:message.head.end]
        self.seen = 0

    def end(self) -> None:
        """No more comes.  Raises Malformed where something is not whole."""
        if self.body is not None:
            self.body.end()
        elif self.data and not self.is_over:
            raise Malformed("the connection ended within a head", kind="bad_request")
