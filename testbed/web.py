"""HTTP on the wire: backends that do exactly what a script says, clients that say exactly what a test says.

    Talk         one end of a connection, ours: bytes, heads, whole messages; it writes down all that it hears
    Origin       a backend: each connection runs a script, which is given a Talk
    call                call(address, *bytes) -> Talk: a client
    request, reply, chunks       messages as bytes
    answering, telling, saying   scripts
    shake, frame, read_frame, Chat     WebSocket, as far as a chat needs it
    origin       origin(script) -> Origin, until the test ends
    web          web(script, *options, **options of the route) -> Web: a router with one route, and its backend
    pixels       the colours of a screenshot

What reads messages here is simple and believes what it is told: it reads what the router has written.  It shares
nothing with the router's own grammar.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import json
import os
import socket
import struct
import threading
import zlib
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from conftest import Address, Server, connect, wait_until
from testbed.running import Running, reset

WEB = "web.example.com"
PATIENCE = 10.0  # seconds until silence fails a test
Lines = list[tuple[str, str]]


class Cut(OSError):
    """The other side ended within a message; `how`: "end", "reset".  A Server takes it for a client that left."""

    def __init__(self, how: str, part: bytes):
        super().__init__(f"{how} within {part[-100:]!r}")
        self.how, self.part = how, part


# -- messages ----------------------------------------------------------------------------------


def request(method: str = "GET", target: str = "/", *lines: str, host: str | None = WEB, body: bytes | None = None,
            version: str = "1.1") -> bytes:
    """A request; a `body` goes with its length."""
    said = [f"{method} {target} HTTP/{version}", *([f"Host: {host}"] if host is not None else []), *lines]
    if body is not None:
        said.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*said, "", ""]).encode("latin-1") + (body or b"")


def reply(body: bytes = b"", *lines: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    """An answer with a length."""
    return "\r\n".join([f"HTTP/{version} {status}", *lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def chunks(*parts: bytes) -> bytes:
    """A body in chunks, with its end."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


class Message(NamedTuple):
    """A message that has come: a request, or an answer."""

    first: str  # its first line
    lines: Lines  # as they came, in latin-1
    body: bytes
    head: bytes  # all of that but the body, as it came
    interim: tuple[Message, ...] = ()  # answers of 1xx before this one

    @property
    def status(self) -> int:
        return int(self.first.split(" ")[1])

    @property
    def method(self) -> str:
        return self.first.split(" ")[0]

    @property
    def target(self) -> str:
        return self.first.split(" ")[1]

    def all(self, name: str) -> list[str]:
        """The values of all lines with this name."""
        return [value for key, value in self.lines if key.lower() == name.lower()]

    def get(self, name: str) -> str | None:
        """The value of the one line with this name; None: there is none."""
        found = self.all(name)
        assert len(found) < 2, self.lines
        return found[0] if found else None


class Talk:
    """One end of a connection.  `heard`: all bytes that have come; used by one thread at a time."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.heard = bytearray()
        self.at = 0  # heard[at:] was not used yet
        self.how = ""  # the other side's end: "end", "reset"

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    # -- bytes --

    def say(self, *parts: bytes) -> None:
        """Send each of these; one that ends the connection meanwhile raises OSError."""
        for part in parts:
            self.sock.sendall(part)

    def finish(self) -> None:
        """Say that no more comes; the other side may go on."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Break off."""
        reset(self.sock)

    def more(self) -> bool:
        """Wait for some bytes; whether any came."""
        if not self.how:
            try:
                data = self.sock.recv(1 << 18)
                self.how = "" if data else "end"
            except ConnectionError:
                data, self.how = b"", "reset"
            self.heard += data
        return not self.how

    def exactly(self, count: int) -> bytes:
        """So many bytes.  Raises Cut."""
        while len(self.heard) - self.at < count:
            if not self.more():
                raise Cut(self.how, bytes(self.heard[self.at:]))
        self.at += count
        return bytes(self.heard[self.at - count:self.at])

    def until(self, mark: bytes) -> bytes:
        """Everything up to this mark, and the mark.  Raises Cut."""
        while (found := self.heard.find(mark, self.at)) < 0:
            if not self.more():
                raise Cut(self.how, bytes(self.heard[self.at:]))
        return self.exactly(found + len(mark) - self.at)

    def rest(self) -> bytes:
        """Everything up to the end; `how` says which."""
        while self.more():
            pass
        return self.exactly(len(self.heard) - self.at)

    # -- messages --

    def head(self) -> Message:
        """A head, without what is behind it.  Raises Cut."""
        head = self.until(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        pairs = [line.partition(":") for line in lines]
        return Message(first, [(name, value.strip(" \t")) for name, _, value in pairs], b"", head)

    def body(self, message: Message, until_end: bool = False) -> bytes:
        """The body behind this head; `until_end`: without any length it goes on to the end.  Raises Cut."""
        size = message.get("Content-Length")
        if coding := message.get("Transfer-Encoding"):
            assert coding == "chunked" and size is None, message.lines
            parts = []
            while count := int(self.until(b"\r\n"), 16):
                parts.append(self.exactly(count))
                assert self.exactly(2) == b"\r\n"
            assert self.exactly(2) == b"\r\n", "a trailer"
            return b"".join(parts)
        if size is not None:
            return self.exactly(int(size))
        if not until_end:
            return b""
        body = self.rest()
        if self.how != "end":
            raise Cut(self.how, body)
        return body

    def request(self) -> Message | None:
        """A whole request; None: the other side has ended before it.  Raises Cut."""
        if self.at == len(self.heard) and not self.more():
            return None
        head = self.head()
        return head._replace(body=self.body(head))

    def answer(self, method: str = "GET") -> Message:
        """The whole answer to a request with this method, and those of 1xx before it.  Raises Cut."""
        interim: list[Message] = []
        while (head := self.head()).status < 200 and head.status != 101:
            interim.append(head)
        has_none = method == "HEAD" or head.status in (101, 204, 304)
        return head._replace(body=b"" if has_none else self.body(head, True), interim=tuple(interim))


def call(address: Address, *said: bytes) -> Talk:
    """A client that has said this."""
    with contextlib.ExitStack() as stack:
        talk = stack.enter_context(Talk(connect(address, timeout=PATIENCE)))
        talk.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is said in pieces goes in pieces
        talk.say(*said)
        stack.pop_all()
    return talk


# -- backends ----------------------------------------------------------------------------------

Script = Callable[[Talk], object]


class Origin:
    """A backend.  Each connection runs the script in a thread of its own; what is left then is read to its end.

    `talks` has the connections in the order in which they came, `requests` what scripts have noted.
    """

    def __init__(self, serve: Callable[..., Server], script: Script):
        self.script = script
        self.talks: list[Talk] = []
        self.over = 0  # connections that have ended
        self.server = serve(self.handle)
        self.address: Address = self.server.address

    def handle(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        talk = Talk(sock)
        self.talks.append(talk)
        try:
            self.script(talk)
            if sock.fileno() >= 0:
                talk.rest()
        finally:
            self.over += 1

    @property
    def heard(self) -> bytes:
        """All bytes of all connections so far."""
        return b"".join(bytes(talk.heard) for talk in self.talks)

    def wait_over(self, count: int) -> None:
        """Wait until so many connections have ended."""
        wait_until(lambda: self.over >= count, what=f"the end of {count} connections to the backend")

    def wait_heard(self, mark: bytes) -> None:
        """Wait until it has heard this."""
        wait_until(lambda: mark in self.heard, what=f"{mark!r} at the backend, which has heard {self.heard[-300:]!r}")


def answering(answer: bytes | Callable[[Message], bytes], last: bool = False) -> Script:
    """A script that answers each request so; `last`: it ends behind the first."""
    def script(talk: Talk) -> None:
        while asked := talk.request():
            talk.say(answer(asked) if callable(answer) else answer)
            if last:
                return talk.sock.close()
    return script


# A script that answers with what it has heard of the request, head and body.
telling = answering(lambda asked: reply(asked.head + asked.body) if asked.method != "HEAD" else reply())


def saying(*answers: bytes, ends: str = "") -> Script:
    """A script that has an answer for each request; behind the last it ends so: "end", "reset", or waits."""
    def script(talk: Talk) -> None:
        for answer in answers:
            if not talk.request():
                return
            talk.say(answer)
        if ends == "end":
            talk.finish()
        elif ends == "reset":
            talk.reset()
    return script


@pytest.fixture
def origin(serve: Callable[..., Server]) -> Callable[[Script], Origin]:
    """origin(script) -> Origin, until the test ends."""
    return lambda script=telling: Origin(serve, script)


# -- a router ----------------------------------------------------------------------------------


class Web:
    """A router with a route for plain HTTP, its backend, and its clients."""

    def __init__(self, running: Running, origin: Origin, stack: contextlib.ExitStack):
        self.running, self.origin, self.stack = running, origin, stack
        self.address = running.address

    def connect(self, *said: bytes) -> Talk:
        """A client that has said this; it is closed when the test ends, if not before."""
        return self.stack.enter_context(call(self.address, *said))

    def ask(self, said: bytes, method: str = "GET") -> Message:
        """The answer to the one request of a client."""
        with self.connect(said) as talk:
            return talk.answer(method)


def table(target: str, **options: Any) -> str:
    """The options of a route in TOML."""
    pairs = {"target": target, **options}
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in pairs.items()) + " }"


def routes_of(**routes: Any) -> str:
    """A file of settings with these routes, each a text in TOML; `__` in a name stands for a dot."""
    lines = [f'"{name.replace("__", ".")}" = {value}' for name, value in routes.items()]
    return "\n".join(["[routes]", *lines, ""])


@pytest.fixture
def web(run: Callable[..., Running], origin: Callable[..., Origin],
        settings_file: Callable[[str], str]) -> Iterator[Callable[..., Web]]:
    """web(script, *options, **options of the route) -> Web.  Its route is WEB's; `http` is "forward" by default."""
    with contextlib.ExitStack() as stack:
        def start(script: Script = telling, *options: str, **more: Any) -> Web:
            backend = origin(script)
            target = "tcp:%s:%d" % backend.address
            path = settings_file(f'[routes]\n"{WEB}" = {table(target, **{"http": "forward", **more})}\n')
            return Web(run(f"--config={path}", *options), backend, stack)
        yield start


def check_refusal(answer: Message, status: int, error: str | None = None) -> None:
    """It is an answer of the router's own: what all those have; `error`: the word of RFC 9209."""
    assert answer.status == status, answer
    assert answer.get("Connection") == "close" and answer.get("Cache-Control") == "no-store", answer
    said = answer.get("Proxy-Status") or ""
    assert said.startswith("sniroute; error=") and (error is None or f"error={error}" in said), said
    assert answer.get("Content-Length") is not None and answer.get("Content-Type", ), answer
    assert "0.1.0" not in answer.head.decode("latin-1") + answer.body.decode()


# -- WebSocket, RFC 6455 -----------------------------------------------------------------------

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {KEY}"
TEXT, CLOSE = 1, 8


def shake(key: str = KEY, *lines: str) -> bytes:
    """The server's answer to an upgrade."""
    accept = base64.b64encode(hashlib.sha1((key + GUID).encode()).digest()).decode()
    return "\r\n".join(["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade",
                        f"Sec-WebSocket-Accept: {accept}", *lines, "", ""]).encode()


def frame(payload: bytes, opcode: int = TEXT, masked: bool = False) -> bytes:
    """A whole message; a client has to mask it."""
    size = len(payload)
    mask = os.urandom(4) if masked else b""
    first = bytes((0x80 | opcode,))
    if size < 126:
        first += bytes((0x80 * masked | size,))
    else:
        first += bytes((0x80 * masked | 126,)) + struct.pack(">H", size)
    return first + mask + (unmask(payload, mask) if masked else payload)


def unmask(payload: bytes, mask: bytes) -> bytes:
    """With its mask, and without: the same again."""
    return bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))


def read_frame(talk: Talk) -> tuple[int, bytes]:
    """Opcode and payload of the next message.  Raises Cut."""
    opcode, size = talk.exactly(2)
    is_masked, size = size & 0x80, size & 0x7f
    if size == 126:
        size = struct.unpack(">H", talk.exactly(2))[0]
    mask = talk.exactly(4) if is_masked else b"\0\0\0\0"
    return opcode & 0xf, unmask(talk.exactly(size), mask)


class Chat:
    """A script: a room in which each says something to all, the one who says it among them.

    What is no WebSocket gets `page`.
    """

    def __init__(self, page: bytes = b""):
        self.page = page
        self.lock = threading.Lock()  # guards what follows, and what is said
        self.room: list[Talk] = []
        self.said: collections.Counter[bytes] = collections.Counter()

    def __call__(self, talk: Talk) -> None:
        while (asked := talk.request()) and asked.get("Sec-WebSocket-Key") is None:
            talk.say(reply(self.page, "Content-Type: text/html"))
        if asked is None:
            return
        with self.lock:
            talk.say(shake(asked.get("Sec-WebSocket-Key")))
            self.room.append(talk)
        try:
            while (message := read_frame(talk))[0] == TEXT:
                with self.lock:
                    self.said[message[1]] += 1
                    for each in self.room:
                        each.say(frame(message[1]))
            talk.say(frame(message[1], CLOSE))
        finally:
            with self.lock:
                self.room.remove(talk)
        talk.finish()


# -- screenshots -------------------------------------------------------------------------------


def pixels(png: bytes) -> collections.Counter[tuple[int, ...]]:
    """How often each colour is there.

    Source: PNG, sections 5.3, 9.2 and 11.2.  Eight bits, no palette, no interlacing.
    """
    at, data, width, size = 8, b"", 0, 0
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at:at + 8])
        piece = png[at + 8:at + 8 + length]
        if kind == b"IHDR":
            width, _, depth, colours, _, _, turns = struct.unpack(">IIBBBBB", piece)
            assert (depth, turns) == (8, 0)
            size = {2: 3, 6: 4}[colours]
        elif kind == b"IDAT":
            data += piece
        at += length + 12
    data = zlib.decompress(data)
    found: collections.Counter[tuple[int, ...]] = collections.Counter()
    stride = width * size
    above = bytearray(stride)
    for begin in range(0, len(data), stride + 1):
        way, row = data[begin], bytearray(data[begin + 1:begin + 1 + stride])
        if way == 2:
            row = bytearray((byte + up) & 255 for byte, up in zip(row, above))
        elif way:
            for place in range(stride):
                left = row[place - size] if place >= size else 0
                corner = above[place - size] if place >= size else 0
                row[place] = (row[place] + predicted(way, left, above[place], corner)) & 255
        found.update(zip(*(row[colour::size] for colour in range(3))))
        above = row
    return found


def predicted(way: int, left: int, up: int, corner: int) -> int:
    """What a filter of PNG takes for the next byte."""
    if way == 1:
        return left
    if way == 3:
        return (left + up) // 2
    guess = left + up - corner
    distances = abs(guess - left), abs(guess - up), abs(guess - corner)
    return (left, up, corner)[distances.index(min(distances))]
