"""sniroute_signals: what the two ends of a NodePass tunnel say to each other, without I/O.

    client                                        server
    ask(name, token) -------------------------->  parse_ask            the handshake, HTTP inside TLS
    parse_terms  <------------------------------  answer, REFUSED
    proof(key, nonce, id) --------------------->  proof                each pool connection, where both ends are ours

    encode(Signal("tcp", remote, id), key) ---->  SignalReader.feed    the control channel, a line each, both ways
    frame_datagram(data) ---------------------->  DatagramReader.feed  UDP over a pool connection, both ways

    checkpoint(...) ---> a line of the log  ---> parse_checkpoint      what a master reads of its instances

The key is in no message that crosses a network: the token is an HMAC of it.  But the token is the same each time, and
the XOR of the control channel is a disguise, no cipher: the wire is NodePass's, version 2, and cannot be bettered where
the other end is the original.  Where both ends are ours, the header `Sniroute` in the handshake says so; the server
then gives a nonce, and takes no pool connection without the proof that its client knows the key.

A parser returns its result, None for "I need more", or raises Malformed.  A reader is fed any cut of the bytes, and
reads none twice.  No value of a key, a token or a nonce is in an error.

Threads: any; each reader belongs to one.

Seams: I want to ...
    say something else on the control channel   a field of Signal; what an action means is for its reader
    ask for more in the handshake               a header in `ask` and `read_ask`; a key of the answer in Terms
    refuse in another way                       a row in REFUSED

Sources: runs of the original, and its documents at https://github.com/NodePassProject/nodepass-core; RFC 9112 for the
handshake; HAProxy's specification of the PROXY protocol.

This room imports sniroute_http (heads, bodies), sniroute_names (HOST:PORT) and sniroute_refusals (Malformed); and
sniroute_wire where there are PROXY headers.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import time
from typing import Any, Callable, NamedTuple

from sniroute_http import (Response, check_beginning, find_end, open_body, parse_request_line, parse_response,
                           read_lines)
from sniroute_names import parse_host_port
from sniroute_refusals import Malformed

# `hashlib` and `hmac` bring OpenSSL, 3.6 MB of an end that speaks no TLS otherwise.  The interpreter has its own.
try:
    from _sha2 import sha256
except ImportError:
    try:
        from _sha256 import sha256  # before Python 3.12
    except ImportError:
        from hashlib import sha256

__version__ = "0.1.0"

# Limits, each with its reason.
LINE_MAX = 4096  # bytes of a signal: the longest that the original sends, a verify, has 152
REMOTE_MAX = 256  # characters of a caller's address: an IPv6 one with its port and scope has 65
ACTION_MAX = 32  # characters; the longest known one is `verify`
FINGERPRINT_MAX = 128  # characters; sha256: and 64 digits are 71, with colons 102
ASK_MAX = 8192  # bytes of the handshake's request: the original's has 190
TERMS_MAX = 16384  # bytes of its answer, head and body: the original's has 180
POOL_MAX = 1 << 20  # connections: what a server may ask a client to keep ready
DATAGRAM_MAX = 65535  # bytes: the length of a frame has 16 bits

ID_SIZE = 4  # bytes of a connection's id on the wire
PROOF_SIZE = 16  # bytes of HMAC-SHA256: 128 bits that nobody guesses
OURS = "Sniroute"  # the header by which our client says that it knows proofs

INNER, OUTER = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))  # tables of `authenticate`
NOBODYS = os.urandom(32)  # a key: see `same_token`

DAYS = "Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"
MONTHS = "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"

ID = re.compile(r"[0-9a-f]{8}")
NONCE = re.compile(r"[0-9a-f]{16,128}")


# -- the key -----------------------------------------------------------------------------------


def key_of_port(port: int | str) -> str:
    """The key where a URL has none: the 32-bit FNV-1a of the port's digits, in eight hex digits.

    Anybody can compute it: it keeps out who knocks by mistake, and nobody else.
    """
    hashed = 0x811C9DC5
    for byte in str(port).encode("ascii"):
        hashed = (hashed ^ byte) * 0x01000193 & 0xFFFFFFFF
    return f"{hashed:08x}"


def authenticate(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256, 32 bytes.  Source: RFC 2104 section 2."""
    key = (sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
    return sha256(key.translate(OUTER) + sha256(key.translate(INNER) + message).digest()).digest()


def token_of(key: str) -> str:
    """What the handshake shows instead of the key: HMAC-SHA256 of nothing, in hex."""
    return authenticate(key.encode(), b"").hex()


def same_secret(a: bytes, b: bytes) -> bool:
    """Whether two secrets are equal, in a time that does not say where they differ.

    What is compared is their HMACs under a key that nobody knows: where those differ says nothing of the secrets.
    """
    return authenticate(NOBODYS, a) == authenticate(NOBODYS, b)


def same_token(a: str, b: str) -> bool:
    """The same for text."""
    return same_secret(a.encode("utf-8", "replace"), b.encode("utf-8", "replace"))


def proof(key: str, nonce: str, id: bytes) -> bytes:
    """What shows that whoever opens the pool connection `id` knows the key, without showing it.

    `nonce` is the server's, new with each handshake, so a proof is good for one connection of one link.
    """
    message = b"sniroute pool " + nonce.encode() + b" " + id
    return authenticate(key.encode(), message)[:PROOF_SIZE]


# -- the control channel -----------------------------------------------------------------------


class Signal(NamedTuple):
    """One line of the control channel."""

    action: str  # tcp, udp, verify, ping, pong, flush; a peer may say others, which mean nothing here
    remote: str = ""  # the caller's address, HOST:PORT
    id: str = ""  # the pool connection's, eight hex digits
    fp: str = ""  # a certificate's fingerprint, sha256: and hex digits


to_json = json.JSONEncoder(separators=(",", ":")).encode


def disguise(data: bytes, key: bytes) -> bytes:
    """`data` XOR the key, repeated from its start; twice is the data again."""
    stream = (key * (len(data) // len(key) + 1))[:len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(data), "big")


def encode(signal: Signal, key: bytes) -> bytes:
    """A signal as its line: base64 (RFC 4648 section 4) of JSON in disguise, and LF."""
    text = to_json({name: value for name, value in zip(Signal._fields, signal) if value})
    return base64.b64encode(disguise(text.encode(), key)) + b"\n"


def decode(line: bytes, key: bytes) -> Signal:
    """The signal of a line, without its LF.  Raises Malformed.

    JSON as Go reads it: any order, keys in either case, the last of two counts, null is as nothing, keys that are
    unknown are left out.
    """
    try:
        text = disguise(base64.b64decode(line.replace(b"\r", b""), validate=True), key).decode("utf-8", "replace")
    except binascii.Error:
        raise Malformed("a signal that is no base64") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # brackets in brackets, by the thousand
        raise Malformed("a signal that is no JSON: the other end may have another key") from None
    if not isinstance(found, dict):
        raise Malformed("a signal that is no object")
    said = {name.lower(): value for name, value in found.items() if value is not None}
    values = [said.get(name, "") for name in Signal._fields]
    for value, (name, fits) in zip(values, SHAPES.items()):
        if not isinstance(value, str) or not fits(value):
            raise Malformed(f"a signal whose {name} is none")
    return Signal(*values)


SHAPES: dict[str, Callable[[str], Any]] = {  # in the order of Signal's fields
    "action": re.compile("[!-~]{1,%d}" % ACTION_MAX).fullmatch,
    "remote": re.compile("[ -~]{0,%d}" % REMOTE_MAX).fullmatch,
    "id": re.compile("(?:[0-9a-f]{8})?").fullmatch,
    "fp": re.compile("[!-~]{0,%d}" % FINGERPRINT_MAX).fullmatch,
}


class SignalReader:
    """The signals of a control channel, one after another."""

    def __init__(self, key: bytes):
        self.key = key
        self.rest = bytearray()  # the beginning of a line; without LF

    def feed(self, data: bytes) -> list[Signal | Malformed]:
        """What `data` completes.  A line that is no signal is one Malformed in the list: the link goes on.

        Raises Malformed for a line of more than LINE_MAX bytes: whoever sends that speaks something else.
        """
        if b"\n" not in data:
            lines: list[bytes] = []
            self.rest += data
        else:
            *lines, rest = (bytes(self.rest) + data).split(b"\n")
            self.rest = bytearray(rest)
        if len(self.rest) > LINE_MAX or any(len(line) > LINE_MAX for line in lines):
            raise Malformed(f"a signal of more than {LINE_MAX} bytes")
        return [self.read(line) for line in lines]

    def read(self, line: bytes) -> Signal | Malformed:
        """One line."""
        try:
            return decode(line, self.key)
        except Malformed as error:
            return error


# -- the handshake -----------------------------------------------------------------------------


class Ask(NamedTuple):
    """What a client asks in the handshake."""

    method: str
    path: str  # without what is behind `?`
    token: str  # of `Authorization: Bearer`; "": none
    proxy_target: tuple[str, int] | None  # where a CONNECT leads
    proxy_key: str  # the user of `Proxy-Authorization: Basic`; "": none
    ours: bool  # it knows proofs
    end: int  # the request's size in bytes: what follows begins there


def ask(server_name: str, token: str, ours: bool) -> bytes:
    """The request for the terms of a tunnel, byte for byte the original's; `ours` adds a line, which that ignores."""
    lines = ["GET / HTTP/1.1", f"Host: {server_name}", "User-Agent: Go-http-client/1.1",
             f"Authorization: Bearer {token}", "Accept-Encoding: gzip"]
    if ours:
        lines.append(f"{OURS}: 1")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def parse_ask(data: bytes | bytearray) -> Ask | None:
    """The request at the beginning of `data`; None: need more.  Raises Malformed.  Source: RFC 9112.

    What it has beside is not looked at: it is refused or answered by its path, its token and its method alone.
    """
    line = data.find(b"\n", 0, ASK_MAX) + 1
    if not line:
        check_beginning(data, 0, min(len(data), ASK_MAX), 0)
        if len(data) >= ASK_MAX:
            raise Malformed(f"a request of more than {ASK_MAX} bytes")
        return None
    method, target, _ = parse_request_line(data, 0, line)
    end = find_end(data, 0, line, 0, ASK_MAX)
    return None if end < 0 else read_ask(method.decode("ascii"), target.decode("ascii"), bytes(data[line:end]), end)


def read_ask(method: str, target: str, block: bytes, end: int) -> Ask:
    """The request whose head is whole.  `block` has its lines."""
    said: dict[bytes, str] = {}
    for field in read_lines(block).fields:
        said.setdefault(field.name.lower(), field.value.decode("latin-1"))  # the first of several, as in the original
    scheme, _, token = said.get(b"authorization", "").partition(" ")
    place = None
    if method == "CONNECT":
        try:
            place = parse_host_port(target)
        except ValueError:
            raise Malformed("a CONNECT to no HOST:PORT") from None
    return Ask(method, target.partition("?")[0], token if scheme == "Bearer" else "", place,
               read_basic(said.get(b"proxy-authorization", "")), said.get(OURS.lower().encode()) == "1", end)


def read_basic(value: str) -> str:
    """The user of `Basic ...` (RFC 7617); "" where it is something else."""
    try:
        user, colon, _ = base64.b64decode(value.removeprefix("Basic "), validate=True).decode().partition(":")
    except ValueError:
        return ""
    return user if colon else ""


class Terms(NamedTuple):
    """What a server answers: how its tunnel is to be used."""

    flow: str  # "-": the server takes callers, "+": the client does
    max: int  # connections in the pool at most
    tls: int  # 0, 1 or 2, of the pool
    type: int  # of the pool: 0 TCP, 1 QUIC, 2 WebSocket, 3 HTTP/2
    nonce: str = ""  # hex digits, where a proof is asked for


def http_date(now: float) -> str:
    """A Unix time as HTTP writes it (RFC 9110 section 5.6.7).  `email.utils` has that, too, and takes 0.8 MB."""
    at = time.gmtime(now)
    return (f"{DAYS[at.tm_wday]}, {at.tm_mday:02} {MONTHS[at.tm_mon - 1]} {at.tm_year} "
            f"{at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02} GMT")


def answer(terms: Terms, date: str) -> bytes:
    """The terms as an HTTP answer.  `date` is for its header (RFC 9110 section 5.6.7)."""
    said = {"flow": terms.flow, "max": terms.max, "tls": str(terms.tls), "type": str(terms.type)}
    if terms.nonce:
        said["nonce"] = terms.nonce
    body = json.dumps(said, separators=(",", ":")) + "\n"
    return (f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\nDate: {date}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}").encode("ascii")


def refusal(status: int, words: str, more: str = "") -> bytes:
    """A refusal in the original's words.  All close the connection: what a request has behind its head is not read."""
    body = f"{words}\n"
    return (f"HTTP/1.1 {status} {words}\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n{more}"
            f"X-Content-Type-Options: nosniff\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode("ascii")


REFUSED = {
    401: refusal(401, "Unauthorized"),
    404: refusal(404, "Not Found"),
    405: refusal(405, "Method Not Allowed", "Allow: GET\r\n"),
    407: refusal(401, "Unauthorized", 'WWW-Authenticate: Basic realm="Restricted"\r\n'),  # what a CONNECT gets
    409: refusal(409, "Conflict"),  # ours: one client has the tunnel
}

FAULTS = {  # the status of an answer -> what it means
    401: "the key is wrong: it is not the server's",
    404: "there is no tunnel: something else answers",
    405: "there is no tunnel: something else answers",
    409: "another client has the tunnel",
}


def parse_terms(data: bytes | bytearray, ended: bool) -> Terms | None:
    """The terms in an answer; None: need more.  Raises Malformed, with the status of an answer that says no.

    `ended`: no more will come.
    """
    if not data and ended:
        raise Malformed("the server closed the connection without an answer")
    try:
        response = parse_response(data, "GET")
        whole = None
        if response is not None and response.status == 200:
            whole = read_body(response, bytes(data[response.head.end:]), ended)
    except Malformed as error:
        raise Malformed(f"the server's answer is broken: {error}") from None
    if response is not None and response.status != 200:
        raise Malformed(FAULTS.get(response.status) or meaning_of(response.status), status=response.status)
    if whole is not None:
        return read_terms(whole)
    if ended:
        raise Malformed("the server closed the connection in the middle of its answer")
    if len(data) > TERMS_MAX:
        raise Malformed(f"an answer of more than {TERMS_MAX} bytes")
    return None


def read_body(response: Response, data: bytes, ended: bool) -> bytes | None:
    """The body of an answer, without its chunks; None: it is not whole.  Raises Malformed for chunks that are none."""
    body = open_body(response, unframed=True)
    parts, _ = body.feed(data)
    return b"".join(parts) if body.is_done or ended and body.left is None else None


def meaning_of(status: int) -> str:
    """What a status means that no NodePass server sends."""
    if 300 <= status < 400:
        return f"something answers with HTTP {status}, which leads elsewhere: that is not followed"
    return f"something answers with HTTP {status}"


def read_terms(body: bytes) -> Terms:
    """The terms of a whole body.  Raises Malformed."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        raise Malformed("an answer that is no JSON") from None
    if not isinstance(said, dict):
        raise Malformed("an answer that is no object")
    flow, most, tls, kind = (said.get(name) for name in ("flow", "max", "tls", "type"))
    nonce = said.get("nonce", "")
    if flow not in ("+", "-"):
        raise Malformed("an answer without the direction of the tunnel (flow)")
    if type(most) is not int or not 0 <= most <= POOL_MAX:
        raise Malformed("an answer without the size of the pool (max)")
    if tls not in ("0", "1", "2"):
        raise Malformed("an answer without a known mode of TLS (tls)")
    if kind not in ("0", "1", "2", "3"):
        raise Malformed("an answer without a known kind of pool (type)")
    if kind == "1":
        raise Malformed("the server's pool is QUIC (type=1), which Python's standard library cannot speak: "
                        "start the server with type=0, 2 or 3")
    if not isinstance(nonce, str) or nonce and not NONCE.fullmatch(nonce):
        raise Malformed("an answer with a nonce that is none")
    return Terms(flow, max(1, most), int(tls), int(kind), nonce)


# -- datagrams ---------------------------------------------------------------------------------


def frame_datagram(data: bytes) -> bytes:
    """A datagram as it travels: its length in two bytes, and itself.  Raises Malformed for one that is too long."""
    if len(data) > DATAGRAM_MAX:
        raise Malformed(f"a datagram of more than {DATAGRAM_MAX} bytes")
    return len(data).to_bytes(2, "big") + data


class DatagramReader:
    """The datagrams of a pool connection, one after another.  `most`: bytes that one may have."""

    def __init__(self, most: int = DATAGRAM_MAX):
        self.most = most
        self.rest = bytearray()  # a frame, as far as it has come

    def feed(self, data: bytes) -> list[bytes]:
        """What `data` completes; an empty one is one, too.  Raises Malformed for one that is too long."""
        rest = self.rest
        rest += data
        found: list[bytes] = []
        at, end = 0, len(rest)
        while end - at >= 2:
            size = rest[at] << 8 | rest[at + 1]
            if size > self.most:
                raise Malformed(f"a datagram of {size} bytes, where {self.most} are the most")
            if end - at < 2 + size:
                break
            found.append(bytes(rest[at + 2:at + 2 + size]))
            at += 2 + size
        del rest[:at]
        return found


# -- what is told to others --------------------------------------------------------------------

CHECKPOINT = re.compile("CHECK_POINT" + "".join(
    rf"\|{name.upper()}=(?P<{name}>[0-9]{{1,20}}){'ms' if name == 'ping' else ''}"
    for name in ("mode", "ping", "pool", "tcps", "udps", "tcprx", "tcptx", "udprx", "udptx")))


def checkpoint(mode: int, ping_ms: int, pool: int, tcps: int, udps: int, tcprx: int, tcptx: int, udprx: int, udptx: int
               ) -> str:
    """The line by which an instance tells its numbers: the pool's idle connections, those of callers, and bytes."""
    return (f"CHECK_POINT|MODE={mode}|PING={ping_ms}ms|POOL={pool}|TCPS={tcps}|UDPS={udps}"
            f"|TCPRX={tcprx}|TCPTX={tcptx}|UDPRX={udprx}|UDPTX={udptx}")


def parse_checkpoint(text: str) -> dict[str, int] | None:
    """The numbers of such a line, wherever it is in `text`, by their names in lower case; None where there is none."""
    found = CHECKPOINT.search(text)
    return {name: int(value) for name, value in found.groupdict().items()} if found else None


def proxy_header(version: int, source: tuple[str, int] | None, destination: tuple[str, int]) -> bytes:
    """A PROXY header, version 1 or 2, for a target at `destination`.  Raises ValueError where a host is no address."""
    from sniroute_wire import proxy_v1, proxy_v2  # 0.3 MB, for who writes such headers
    return {1: proxy_v1, 2: proxy_v2}[version](source, destination)
