#!/usr/bin/env python3
"""fake_edge: the far end of a tunnel, for tests: Cloudflare's edge, and cloudflared behind it.

    python3 -I -S testbed/fake_edge.py DIRECTORY

A TLS server that answers an upgrade to WebSocket, dials the hostname's target and passes bytes:
the client's binary messages to the target, the target's bytes in binary messages to the client.
A CONNECT proxy in front of it leads here, whatever host it is asked for.  The program runs until
SIGTERM, or until its standard input ends, so it never outlives a test.

It has the habits of the real far end.  It silently drops what a message has beyond 16384 bytes.
It drops text messages.  A client's Ping ends the connection (the real one's answer may land inside
a data frame).  The first end of either side ends both.  A Close is answered with its own code.

The directory has the certificates (see make_certificates() in testbed/standins.py) and two JSON files, which are
read anew for each connection.  The hostname is the SNI, or without one the host of the Host header.

    far.json           {"hostname": ["127.0.0.1", port], "*": the default}; without an entry: 502
    faults.json        {"hostname": {switch: value, ...}, "*": the default}

It writes:

    edge.json          once both ports listen: tls, proxy, pid; the ports in one that is there already are taken again
    proxy.jsonl        event "request" for each CONNECT: hostname, target, headers;
                       event "end" for a client that did not get through to the edge: how
    connections.jsonl  each line with the connection's number, and its hostname once that is known:
      accepted         a TCP connection has come: proxied (it has come through the proxy)
      tls              the handshake is done: sni, tls, alpn, session_reused
      request          the request is read: the fields of "tls", host, method, path,
                       headers ([name, value] each)
      end              the connection is over:
        bytes_up, frames_up, messages_up (binary ones), largest_up, cut (a message was too long),
        texts, masks (distinct keys, counted up to 1000), client_pings
        bytes_down, pings, pongs (with a Ping's payload), unsolicited (other pongs)
        close          the code in the client's Close; 1005: a Close without a code; 1006: the client
                       left without a Close; null: it had not left
        left           how the client left: "close_notify", "eof", "reset", "tls: ..."; null: it had not
        how            who or what ended it: "client", "origin" (the target), "fault" (a switch),
                       "refused" (an answer other than 101), "protocol" (the client broke the rules)
        error          more about that

Switches.  At the proxy, by the host of the CONNECT:
    proxy_status: N      answer this instead of 200
    proxy_hang: true     never answer
    proxy_rst: true      reset the connection
    proxy_garbage: true  answer bytes that are no HTTP
Three switches act at a point of the connection's life.  The points are "accept" (before a byte is read; without
the proxy a hostname's own switches act only once its hello is there, those of "*" at once), "tls" (after the
hello) and "upgrade" (after the request):
    hang: POINT          say nothing more; also "head": after half of the answer's head
    rst: POINT           reset the connection; also "open": after `rst_after` bytes down
    eof: POINT           end it without a close_notify; also "open": after `eof_after` bytes down
TLS:
    cert: NAME           "untrusted", "expired" or "wrong_name"
    tls_max: "1.2"       no newer version
The answer:
    delay: MS            answer that late
    status: N            answer this instead of 101, with `body: TEXT` and `location: URL`
    split_body: MS       send its body that long after its head
    service_token: [ID, SECRET], token: JWT
                         let in only clients with one of these, as Access does; send others to the login (302)
    deny: 401 or 403     refuse as Access does
    answer: KIND         send a wrong 101: "bad_accept", "no_upgrade", "no_connection", "extensions",
                         "http10", "garbage" (no HTTP), "huge" (its head never ends)
    together: true       wait for the target's first bytes, and send the answer in one record with them
Frames down:
    drip: true           send the first 200 bytes of answer and frames in a TLS record each
    text: true           send text messages
    empty: true          send an empty message before each message
    frame: N             send messages of N bytes (default: up to 16384); a shorter one after 20 ms of silence
    fragment: N          send messages in frames of up to N bytes
    ping: N              send a Ping with N bytes after every message, and between its frames
    ping_every: MS       send a Ping that often, with `ping` bytes (default 0), and none after messages
    ping_waits: true     the same, but none while one has no Pong yet
    bad_frame: KIND      send this after `bad_after` bytes down (default 0): "rsv", "masked", "opcode",
                         "long_control", "fragmented_control", "continuation" or "close_1"
    close: CODE          send a Close after `close_after` bytes down, with `close_reason`; 0: without a code
    no_close: true       when the target ends, end TLS without a Close
Reading:
    slow_reads: true     read nothing after the upgrade
    no_read_after: N     read no more after N bytes up, or a few more

One thread for each connection owns its two sockets.  TLS is done in memory (ssl.MemoryBIO): so this program
decides which byte leaves when, and one system call moves many records.
"""

import base64
import collections
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import resource
import select
import socket
import ssl
import struct
import sys
import termios
import threading
import time

CHUNK = 16384  # bytes that cloudflared reads from its target at a time, and that it takes of a message
SPACE = 65536  # bytes read from a socket at a time
HEAD = 65536  # bytes of a request's head at most
LINGER = 2.0  # seconds that the other side may take to end, too
DELIVERY = 10.0  # seconds that the target may take for the last bytes, after the client has ended
GATHER = 0.02  # seconds of silence after which a message is sent that is shorter than `frame`
DRIP, DRIP_PAUSE = 200, 0.0005  # bytes; the pause after each, in seconds, so that most arrive alone
KEYS = 1000  # distinct mask keys that are counted
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
CLIENT_LEFT = getattr(select, "POLLRDHUP", 0)  # tells the client's end without reading; only Linux has it

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
FIN = 0x80
BAD_FRAMES = {
    "rsv": b"\xc2\x01x",
    "masked": b"\x82\x81\0\0\0\0x",
    "opcode": b"\x83\x01x",
    "long_control": b"\x89\x7e\x00\x7e" + bytes(126),
    "fragmented_control": b"\x09\x01x",
    "continuation": b"\x80\x01x",
    "close_1": b"\x88\x01\x03",
}
GARBAGE = b"\x15\x03\x03\x00\x02garbage\r\n\r\n"
REASONS = {200: "OK", 301: "Moved Permanently", 302: "Found", 400: "Bad Request", 401: "Unauthorized",
           403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 502: "Bad Gateway",
           407: "Proxy Authentication Required", 431: "Request Header Fields Too Large"}


class Ended(Exception):
    """The connection is over.  Arguments: the fields `how` and, if there is one, `error` of its record."""


@functools.cache
def xor_table(key: int) -> bytes:
    """A table for bytes.translate() that XORs every byte with `key`."""
    return bytes(byte ^ key for byte in range(256))


def unmasked(data: bytes, start: int, size: int) -> bytes:
    """The payload at `start`; its key is the four bytes before.  Each byte of the key XORs every fourth byte."""
    if data.startswith(b"\0\0\0\0", start - 4):
        return data[start:start + size]
    payload, end = bytearray(size), start + size
    for lane in range(4):
        payload[lane::4] = data[start + lane:end:4].translate(xor_table(data[start - 4 + lane]))
    return payload


def frame_head(first: int, size: int) -> bytes:
    """The head of a server's frame (RFC 6455 section 5.2); `first` has FIN and the opcode."""
    if size < 126:
        return bytes((first, size))
    return struct.pack("!BBH", first, 126, size) if size < 65536 else struct.pack("!BBQ", first, 127, size)


def read_head(data: bytes) -> tuple:
    """The words of a request's first line, and its headers, [name, value] each."""
    first, *lines = data.decode("latin-1").split("\r\n")
    pairs = [line.partition(":") for line in lines]
    return first.split(" "), [[name, value.strip()] for name, _, value in pairs]


def host_of(authority: str) -> str:
    """The host in HOST, HOST:PORT, [HOST] or [HOST]:PORT."""
    host, bracket, _ = authority.rpartition("]")
    return host[1:] if bracket else authority.partition(":")[0]


def answer_head(status: int, *lines: str) -> bytes:
    """The head of an answer, its empty line included."""
    return "\r\n".join((f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}", *lines, "", "")).encode("latin-1")


def reset(sock) -> None:
    """Close with RST; the other end may lose bytes that it has not read yet."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Connection:
    """One client: TLS, the request, and the bytes between it and its target."""

    def __init__(self, edge, number: int, sock, host, early: bytes):
        self.edge = edge
        self.number = number
        self.sock = sock
        self.early = early  # bytes that came right behind the CONNECT
        self.sni = None
        self.facts = {}  # the fields of the record `tls`
        self.space = memoryview(bytearray(SPACE))  # every read goes here first
        # Down
        self.tls = None
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()  # encrypted bytes from and to the client
        self.plain = []  # pieces that have to be encrypted
        self.waiting = memoryview(b"")  # encrypted bytes that wait to be sent
        self.deaf = False  # sending to the client has failed
        self.said_close = False
        self.gathered = bytearray()  # a part of a message of `frame` bytes
        self.drip = 0  # so many further bytes get a record of their own
        self.triggers = []  # see find_triggers()
        self.expected = collections.deque()  # payloads of Pings that have no Pong yet
        # Up
        self.input = b""  # decrypted bytes that are no whole frame yet
        self.skip = 0  # so many further bytes of a frame's payload are dropped
        self.message = None  # the parts of a message that is not complete; below, its size and kind
        self.size = 0
        self.is_text = False
        self.up = memoryview(b"")  # bytes that wait to be sent to the target
        self.target = None
        self.masks = set()
        # Ends
        self.left = None  # how the client left: the field of the record
        self.over = None  # "client" after its Close, "protocol" after it broke the rules
        self.error = None
        self.counts = dict.fromkeys(("bytes_up", "frames_up", "messages_up", "largest_up", "texts", "client_pings",
                                     "bytes_down", "pings", "pongs", "unsolicited"), 0)
        self.cut = False
        self.close_code = None
        self.know(host)

    def know(self, hostname) -> None:
        """The client wants this hostname: look up its switches."""
        self.hostname = hostname
        self.faults = self.edge.look_up("faults.json", hostname, {})

    def write(self, event: str, **fields) -> None:
        """Record an event of this connection."""
        self.edge.write("connections.jsonl", event=event, number=self.number, hostname=self.hostname, **fields)

    def run(self) -> None:
        """Serve the connection to its end, and record that."""
        self.write("accepted", proxied=self.hostname is not None)
        try:
            self.sock.setblocking(False)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.serve()
        except Ended as ended:
            how, *error = ended.args
            self.error = error[0] if error else self.error
        finally:
            self.sock.close()
            if self.target is not None:
                self.target.close()
        if self.left is not None and self.close_code is None:
            self.close_code = 1006
        self.write("end", how=how, left=self.left, close=self.close_code, error=self.error, cut=self.cut,
                   masks=len(self.masks), **self.counts)

    def serve(self) -> None:
        """The connection's life, step by step.  Always raises Ended."""
        self.point("accept")
        self.hello()
        self.point("accept")
        self.point("tls")
        self.handshake()
        self.request()
        self.point("upgrade")
        self.pause(self.faults.get("delay", 0) / 1000)
        self.judge()
        self.dial()
        self.upgrade()
        how = self.carry()
        self.part(how)
        raise Ended(how)

    def point(self, name: str) -> None:
        """Hang, reset or end the connection if a switch names this point."""
        if self.faults.get("hang") == name:
            self.hold(reads=name != "accept")
        if self.faults.get("rst") == name:
            reset(self.sock)
            raise Ended("fault")
        if self.faults.get("eof") == name:
            self.finish(notify=False)
            raise Ended("fault")

    # -- bytes from and to the client ----------------------------------------------------------

    def watch(self, client: int, target: int = 0, timeout=None) -> tuple:
        """Wait for these events of the two sockets, at most `timeout` seconds.  Returns the events of each."""
        poll = select.poll()
        if client:
            poll.register(self.sock, client)
        if target:
            poll.register(self.target, target)
        found = dict(poll.poll(None if timeout is None else max(0, timeout * 1000)))
        return found.get(self.sock.fileno(), 0), target and found.get(self.target.fileno(), 0)

    def take(self) -> memoryview:
        """Read encrypted bytes of the client.  Empty: there is nothing now, or it has left (`left`)."""
        try:
            count = self.sock.recv_into(self.space)
            self.left = None if count else "eof"
        except BlockingIOError:
            count = 0
        except OSError:
            count, self.left = 0, "reset"
        return self.space[:count]

    def receive(self) -> None:
        """Read and decrypt: adds to `input`, or notes in `left` that the client has left."""
        self.incoming.write(self.take())
        parts = [self.input]
        try:
            while piece := self.tls.read(CHUNK):
                parts.append(piece)
            self.left = "close_notify"
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.left = f"tls: {error.reason}"
        self.input = b"".join(parts)

    def push(self) -> None:
        """Encrypt the pieces in `plain`."""
        if not self.plain:
            return
        data = memoryview(b"".join(self.plain))
        self.plain.clear()
        with contextlib.suppress(ssl.SSLError):  # the client broke TLS: the next read says so
            while data:
                if self.drip:
                    self.drip -= self.tls.write(data[:1])
                    self.flush_all()
                    time.sleep(DRIP_PAUSE)
                    data = data[1:]
                else:
                    data = data[self.tls.write(data):]

    def flush(self) -> bool:
        """Send encrypted bytes, as many as the socket takes now.  Returns whether all are sent."""
        while True:
            if not self.waiting:
                self.waiting = memoryview(self.outgoing.read())
                if not self.waiting:
                    return True
            try:
                self.waiting = self.waiting[self.sock.send(self.waiting, NO_SIGNAL):]
            except BlockingIOError:
                return False
            except OSError:  # go on reading: its earlier bytes are still there
                self.deaf, self.waiting = True, memoryview(b"")

    def flush_all(self) -> None:
        """Send all encrypted bytes, however long the client takes to read them."""
        while not self.flush():
            self.watch(select.POLLOUT)

    def pause(self, seconds: float) -> None:
        """Wait; raises Ended if the client leaves meanwhile."""
        if seconds and self.watch(CLIENT_LEFT, timeout=seconds)[0]:
            self.left = "eof"
            raise Ended("client", "left while it waited")

    def hold(self, reads: bool) -> None:
        """Say nothing more until the client has left, then raise Ended."""
        while not self.left:
            if reads:
                self.watch(select.POLLIN)
                self.take()
            elif self.watch(CLIENT_LEFT)[0]:
                self.left = "eof"
        raise Ended("client")

    def finish(self, notify: bool = True, expects_close: bool = False) -> None:
        """Send all that is left, and end our side.  Then read until the client ends: close() before could reset it."""
        if self.left == "close_notify":  # the client may wait for our close_notify
            with contextlib.suppress(ssl.SSLError):
                self.tls.unwrap()
            self.flush()
        deadline, ended = None, False
        while not self.left:
            flushed = self.flush()
            if flushed and deadline is None:
                deadline = time.monotonic() + LINGER
            late = deadline is not None and time.monotonic() >= deadline
            if flushed and not ended and (late or not expects_close or self.close_code is not None):
                if notify:
                    with contextlib.suppress(ssl.SSLError):  # unwrap() sends ours, then wants the client's
                        self.tls.unwrap()
                self.flush()
                with contextlib.suppress(OSError):
                    self.sock.shutdown(socket.SHUT_WR)
                deadline, ended = time.monotonic() + LINGER, True
            elif late:
                return
            self.watch(select.POLLIN | (0 if flushed else select.POLLOUT), timeout=deadline and
                       deadline - time.monotonic())
            if notify:
                self.receive()
                self.take_frames()
                self.up = memoryview(b"")
            else:
                self.take()

    # -- TLS and the request -------------------------------------------------------------------

    def hello(self) -> None:
        """Read the ClientHello and learn the name, before a byte is answered: the switches depend on the name."""
        hello = ssl.MemoryBIO()
        reader = self.edge.reader.wrap_bio(hello, ssl.MemoryBIO(), server_side=True)
        data = self.early
        while True:
            hello.write(data)
            self.incoming.write(data)
            try:
                reader.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:  # note_name() has ended the handshake, or this is not TLS
                break
            self.watch(select.POLLIN)
            data = self.take()
            if self.left:
                raise Ended("client", "no hello")
        self.sni = getattr(reader, "asked", None)
        if self.sni is not None:
            self.know(self.sni.lower())

    def handshake(self) -> None:
        """The TLS handshake, with the certificate and the version that the switches name."""
        context = self.edge.context(self.faults.get("cert", "edge"), self.faults.get("tls_max"))
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                self.finish(notify=False)
                raise Ended("client", error.reason)
            self.flush_all()
            self.watch(select.POLLIN)
            self.incoming.write(self.take())
            if self.left:
                raise Ended("client", "left in the handshake")
        self.flush_all()
        self.facts = {"sni": self.sni, "tls": self.tls.version(), "alpn": self.tls.selected_alpn_protocol(),
                      "session_reused": self.tls.session_reused}
        self.write("tls", **self.facts)

    def request(self) -> None:
        """Read the request's head, and record it."""
        while b"\r\n\r\n" not in self.input:
            if len(self.input) > HEAD:
                self.answer(431)
            if self.left:
                self.finish()
                raise Ended("client", "no request")
            self.receive()
            if b"\r\n\r\n" not in self.input and not self.left:
                self.watch(select.POLLIN)
        head, _, self.input = self.input.partition(b"\r\n\r\n")
        self.words, pairs = read_head(head)
        self.headers = {name.lower(): value for name, value in pairs}
        if self.sni is None:
            self.know(host_of(self.headers.get("host", "")) or self.hostname)
        method, path = (*self.words, "")[:2]
        self.write("request", host=self.headers.get("host"), method=method, path=path, headers=pairs, **self.facts)

    def answer(self, status: int, *lines: str, body: str = "") -> None:
        """Send an answer other than 101, and raise Ended."""
        content = body.encode()
        self.plain.append(answer_head(status, *lines, f"Content-Length: {len(content)}", "Connection: close"))
        if "split_body" in self.faults:
            self.push()
            self.flush_all()
            time.sleep(self.faults["split_body"] / 1000)
        self.plain.append(content)
        self.push()
        self.finish()
        raise Ended("refused", f"{status} {body}".strip())

    def judge(self) -> None:
        """Refuse the client, if a switch or its request says so."""
        faults, headers = self.faults, self.headers
        if "status" in faults:
            self.answer(faults["status"], *([f"Location: {faults['location']}"] if "location" in faults else []),
                        body=faults.get("body", ""))
        wrong = self.wrong_in_request()
        if wrong:
            self.answer(400, body=wrong)
        if "deny" in faults:
            self.answer(faults["deny"])
        wanted = [faults[name] for name in ("service_token", "token") if name in faults]
        given = [[headers.get("cf-access-client-id"), headers.get("cf-access-client-secret")],
                 headers.get("cf-access-token")]
        if wanted and not any(token in given for token in wanted):
            self.answer(302, f"Location: https://team.cloudflareaccess.test/cdn-cgi/access/login/{self.hostname}"
                             "?kid=stand-in&redirect_url=%2F")

    def wrong_in_request(self) -> str:
        """What is wrong with the request for an upgrade; "" if nothing."""
        def tokens(name: str) -> list:
            return [token.strip().lower() for token in self.headers.get(name, "").split(",")]

        if len(self.words) != 3 or self.words[0] != "GET" or self.words[2] != "HTTP/1.1":
            return "not GET over HTTP/1.1"
        if not self.headers.get("host"):
            return "no Host"
        if "websocket" not in tokens("upgrade") or "upgrade" not in tokens("connection"):
            return "not an upgrade to WebSocket"
        if self.headers.get("sec-websocket-version") != "13":
            return "not Sec-WebSocket-Version 13"
        try:
            key = base64.b64decode(self.headers.get("sec-websocket-key", ""), validate=True)
        except ValueError:
            key = b""
        return "" if len(key) == 16 else "not a Sec-WebSocket-Key"

    def dial(self) -> None:
        """Connect to the hostname's target, or answer 502."""
        address = self.edge.look_up("far.json", self.hostname, None)
        if address is None:
            self.answer(502, body="no target")
        try:
            self.target = socket.create_connection(tuple(address), 5)
        except OSError as failure:
            self.answer(502, body=f"dial tcp: {failure.strerror or failure}")
        self.target.setblocking(False)
        self.target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def upgrade(self) -> None:
        """Answer 101, or the wrong answer that a switch asks for."""
        kind = self.faults.get("answer")
        digest = hashlib.sha1(self.headers["sec-websocket-key"].encode() + GUID).digest()
        accept = base64.b64encode(digest[::-1] if kind == "bad_accept" else digest).decode()
        lines = ["HTTP/1.0" if kind == "http10" else "HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade",
                 f"Sec-WebSocket-Accept: {accept}", "CF-Ray: stand-in"]
        lines[0] += " 101 Switching Protocols"
        if kind == "no_upgrade":
            del lines[1]
        if kind == "no_connection":
            del lines[2]
        if kind == "extensions":
            lines.append("Sec-WebSocket-Extensions: permessage-deflate")
        head = "\r\n".join((*lines, "", "")).encode()
        self.drip = DRIP if self.faults.get("drip") else 0
        self.triggers = self.find_triggers()
        if kind == "garbage":
            head = GARBAGE
        if self.faults.get("hang") == "head":
            head = head[:len(head) // 2]
        self.plain.append(head[:-2] if kind == "huge" else head)
        while kind == "huge" and not self.deaf:
            self.plain.append(b"X-Fill: " + b"x" * 1000 + b"\r\n")
            self.push()
            self.flush_all()
        if self.faults.get("together"):
            self.watch(CLIENT_LEFT, select.POLLIN, timeout=LINGER)
            self.take_target()
        self.push()
        self.flush_all()
        if kind in ("garbage", "huge") or self.faults.get("hang") == "head":
            self.hold(reads=True)

    # -- frames up -----------------------------------------------------------------------------

    def take_frames(self) -> None:
        """Take the whole frames out of `input`.  Their payload goes to `up`."""
        data, at, parts, counts = self.input, 0, [], self.counts
        while self.over is None:
            if self.skip:
                skipped = min(self.skip, len(data) - at)
                at += skipped
                self.skip -= skipped
            if len(data) - at < 2:
                break
            first, size = data[at], data[at + 1] & 0x7F
            start = at + {126: 8, 127: 14}.get(size, 6)
            if not data[at + 1] & 0x80:
                self.break_off("an unmasked frame")
                break
            if len(data) < start:
                break
            if size > 125:
                size = int.from_bytes(data[at + 2:start - 4], "big")
            if len(data) < start + min(size, CHUNK):
                break
            if len(self.masks) < KEYS:
                self.masks.add(data[start - 4:start])
            payload = unmasked(data, start, min(size, CHUNK))
            at = start + len(payload)
            self.skip = size - len(payload)
            counts["frames_up"] += 1
            opcode = first & 0x0F
            if first & 0x70 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
                self.break_off("reserved bits or opcode")
            elif opcode >= CLOSE:
                if size > 125 or not first & FIN:
                    self.break_off("a control frame that is long or in fragments")
                else:
                    self.take_control(opcode, bytes(payload))
            elif (opcode == CONTINUATION) == (self.message is None):
                self.break_off("a continuation of nothing, or a message within another")
            else:
                if self.message is None:
                    self.message, self.size, self.is_text = [], 0, opcode == TEXT
                self.message.append(payload)
                self.size += size
                if first & FIN:
                    parts.append(self.take_message())
        self.input = data[at:]
        self.up = memoryview(b"".join(parts))

    def take_message(self) -> bytes:
        """The message that has become complete: the bytes of it that go to the target."""
        data = self.message[0] if len(self.message) == 1 else b"".join(self.message)
        self.message, counts = None, self.counts
        if self.is_text:
            counts["texts"] += 1
            return b""
        counts["messages_up"] += 1
        counts["largest_up"] = max(counts["largest_up"], self.size)
        if self.size > CHUNK:
            self.cut, data = True, data[:CHUNK]
        counts["bytes_up"] += len(data)
        return data

    def take_control(self, opcode: int, payload: bytes) -> None:
        """Act on a Close, Ping or Pong of the client."""
        if opcode == PING:
            self.counts["client_pings"] += 1
            self.over, self.error = "protocol", "a Ping"
        elif opcode == PONG:
            self.counts["pongs" if payload in self.expected else "unsolicited"] += 1
            while payload in self.expected:  # one Pong may stand for all Pings before its own
                if self.expected.popleft() == payload:
                    break
        elif len(payload) == 1:
            self.break_off("a Close with half a code")
        else:
            self.over = "client"
            self.close_code = int.from_bytes(payload[:2], "big") if payload else 1005
            self.say_close(payload[:2])

    def break_off(self, error: str) -> None:
        """The client broke the rules: end the connection with a Close of code 1002."""
        self.over, self.error = "protocol", error
        self.say_close(struct.pack("!H", 1002))

    def deliver(self) -> None:
        """Send the target bytes that wait, as many as it takes now."""
        try:
            while self.up:
                self.up = self.up[self.target.send(self.up, NO_SIGNAL):]
        except BlockingIOError:
            pass
        except OSError:  # the target has ended: take_target() sees that
            self.up = memoryview(b"")

    # -- frames down ---------------------------------------------------------------------------

    def say(self, opcode: int, payload) -> None:
        """Queue one whole frame for the client."""
        self.plain += (frame_head(FIN | opcode, len(payload)), payload)

    def say_close(self, payload: bytes) -> None:
        """Queue a Close, unless we have said one: then the client's is the answer to it."""
        if not self.said_close:
            self.said_close = True
            self.say(CLOSE, payload)

    def ping(self, size: int) -> None:
        """Queue a Ping with a payload of its own."""
        number = self.counts["pings"]
        self.counts["pings"] = number + 1
        payload = (number.to_bytes(4, "little") * 32)[:size]
        self.expected.append(payload)
        self.say(PING, payload)

    def say_message(self, data) -> None:
        """Queue one message for the client, in the shape that the switches ask for."""
        faults = self.faults
        opcode = TEXT if faults.get("text") else BINARY
        size = faults.get("fragment", len(data))
        pings = "ping" in faults and "ping_every" not in faults
        if faults.get("empty"):
            self.say(opcode, b"")
        for start in range(0, len(data), size):
            part = data[start:start + size]
            fin = FIN if start + size >= len(data) else 0
            self.plain += (frame_head(fin | (CONTINUATION if start else opcode), len(part)), part)
            if pings:
                self.ping(faults["ping"])

    def take_target(self) -> bool:
        """Read from the target, and make messages of that.  Returns False when the target has ended."""
        room = self.triggers[0][0] - self.counts["bytes_down"] if self.triggers else SPACE
        try:
            count = self.target.recv_into(self.space[:room])
        except BlockingIOError:
            return True
        except OSError:
            count = 0
        data = self.space[:count]
        self.counts["bytes_down"] += count
        frame = self.faults.get("frame")
        if frame:
            self.gathered += data
            while len(self.gathered) >= frame or not count and self.gathered:
                self.say_gathered(frame)
        else:
            for start in range(0, count, CHUNK):
                self.say_message(data[start:start + CHUNK])
        self.push()  # now: the next read overwrites `data`
        self.fire()
        return count > 0

    def say_gathered(self, size: int) -> None:
        """Queue a message of the first `size` bytes that have gathered."""
        self.say_message(bytes(self.gathered[:size]))
        del self.gathered[:size]

    def find_triggers(self) -> list:
        """(bytes down, what then happens) for each switch with a count of bytes, in order."""
        faults = self.faults
        actions = (("bad", "bad_frame" in faults), ("close", "close" in faults),
                   ("rst", faults.get("rst") == "open"), ("eof", faults.get("eof") == "open"))
        return sorted((faults.get(f"{name}_after", 0), name) for name, wanted in actions if wanted)

    def fire(self) -> None:
        """Act on the triggers whose count of bytes has gone down."""
        while self.triggers and self.triggers[0][0] <= self.counts["bytes_down"]:
            _, name = self.triggers.pop(0)
            if self.gathered:
                self.say_gathered(len(self.gathered))
            if name == "bad":
                self.plain.append(BAD_FRAMES[self.faults["bad_frame"]])
                continue
            if name == "close":
                code = self.faults["close"]
                reason = self.faults.get("close_reason", "").encode()
                self.say_close(struct.pack("!H", code) + reason if code else b"")
            self.push()
            self.flush_all()
            if name == "close":
                self.finish(expects_close=True)
            elif name == "eof":
                self.finish(notify=False)
            else:
                limit = time.monotonic() + LINGER
                while fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)) != bytes(4) and time.monotonic() < limit:
                    time.sleep(0.001)  # a reset drops what has not arrived
                reset(self.sock)
            raise Ended("fault")

    # -- both ways -----------------------------------------------------------------------------

    def carry(self) -> str:
        """Pass bytes both ways until one side ends it.  Returns the field `how` of the record."""
        faults = self.faults
        limit = 0 if faults.get("slow_reads") else faults.get("no_read_after")
        every = faults.get("ping_every", 0) / 1000
        ping_at = time.monotonic() + every
        self.take_frames()
        self.fire()
        while True:
            if self.left and self.over is None:
                self.over = "client"
            if self.over is not None:
                return self.over
            self.deliver()
            self.push()
            flushed = self.flush()
            stopped = limit is not None and self.counts["bytes_up"] >= limit
            if stopped and self.deaf:
                self.left = "reset"
                continue
            from_client = CLIENT_LEFT if stopped else 0 if self.up else select.POLLIN
            from_target = select.POLLIN if flushed and not self.deaf else 0
            timeout = ping_at - time.monotonic() if every else None
            if self.gathered:
                timeout = GATHER if timeout is None else min(timeout, GATHER)
            client, target = self.watch(from_client | (0 if flushed else select.POLLOUT),
                                        from_target | (select.POLLOUT if self.up else 0), timeout)
            if stopped and client & CLIENT_LEFT:
                self.left = "eof"
            elif client and from_client:
                self.receive()
                self.take_frames()
            if target and from_target and not self.take_target():
                return "origin"
            if self.gathered and not target and flushed:
                self.say_gathered(len(self.gathered))
            if every and flushed and time.monotonic() >= ping_at:
                if not (self.expected and faults.get("ping_waits")):
                    self.ping(faults.get("ping", 0))
                ping_at = time.monotonic() + every

    def part(self, how: str) -> None:
        """End both sides; first the one that has not ended, so that it gets all bytes for it."""
        if how == "origin":
            if not self.faults.get("no_close"):
                self.say_close(struct.pack("!H", 1000))
            self.push()
            self.finish(expects_close=not self.faults.get("no_close"))
            return
        deadline, going = time.monotonic() + DELIVERY, True
        while self.up and going and (rest := deadline - time.monotonic()) > 0:
            if self.watch(0, select.POLLIN | select.POLLOUT, rest)[1] & ~select.POLLOUT:
                going = self.drop_target()
            self.deliver()
        with contextlib.suppress(OSError):
            self.target.shutdown(socket.SHUT_WR)
        self.push()
        self.finish()
        deadline = time.monotonic() + LINGER
        while going and (rest := deadline - time.monotonic()) > 0:
            going = self.drop_target() if self.watch(0, select.POLLIN, rest)[1] else False

    def drop_target(self) -> bool:
        """Read from the target, and drop that: one that cannot send may not read either.  Returns False at its end."""
        try:
            return self.target.recv_into(self.space) > 0
        except BlockingIOError:
            return True
        except OSError:
            return False


class Proxied:
    """A client of the CONNECT proxy, until it gets through to the edge."""

    def __init__(self, edge, sock):
        self.edge = edge
        self.sock = sock
        self.hostname = None
        self.early = b""  # bytes that came right behind the CONNECT

    def run(self) -> None:
        """Answer the CONNECT, and hand the client to the edge; or record how it ended here."""
        try:
            how = self.answer()
        except OSError:
            how = "client"
        if how is None:
            self.edge.connect(self.sock, self.hostname, self.early)
            return
        self.sock.close()
        self.edge.write("proxy.jsonl", event="end", hostname=self.hostname, how=how)

    def answer(self):
        """Read the request and answer it.  Returns None if the client gets through, else how it ended."""
        head = b""
        while b"\r\n\r\n" not in head:
            data = self.sock.recv(4096)
            head += data
            if not data or len(head) > HEAD:
                return "client"
        head, _, self.early = head.partition(b"\r\n\r\n")
        words, headers = read_head(head)
        method, target = (*words, "")[:2]
        self.hostname = host_of(target).lower()
        self.edge.write("proxy.jsonl", event="request", hostname=self.hostname, method=method, target=target,
                        headers=headers)
        faults = self.edge.look_up("faults.json", self.hostname, {})
        if faults.get("proxy_rst"):
            reset(self.sock)
            return "fault"
        if faults.get("proxy_hang"):
            return self.hold("client")
        if faults.get("proxy_garbage"):
            self.sock.sendall(GARBAGE)
            return self.hold("fault")
        status = faults.get("proxy_status", 200 if method == "CONNECT" else 405)
        if status != 200:
            self.sock.sendall(answer_head(status, "Content-Length: 0", "Connection: close"))
            self.sock.shutdown(socket.SHUT_WR)
            return self.hold("refused")
        self.sock.sendall(answer_head(200))
        return None

    def hold(self, how: str) -> str:
        """Say nothing more until the client has left.  Returns `how`."""
        while self.sock.recv(4096):
            pass
        return how


class Edge:
    """One run of the program."""

    def __init__(self, directory: str):
        self.directory = directory
        self.lock = threading.Lock()  # guards what follows
        self.accepted = 0
        self.contexts = {}
        self.reader = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.reader.sni_callback = note_name
        self.files = {name: os.open(os.path.join(directory, name), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                      for name in ("connections.jsonl", "proxy.jsonl")}

    # -- the files -----------------------------------------------------------------------------

    def look_up(self, name: str, hostname, default):
        """A hostname's entry in a JSON file, or that of "*"."""
        try:
            with open(os.path.join(self.directory, name)) as file:
                entries = json.load(file)
        except FileNotFoundError:
            return default
        return entries.get(hostname, entries.get("*", default))

    def write(self, name: str, **fields) -> None:
        """Append a line; O_APPEND keeps the lines of several threads apart."""
        os.write(self.files[name], json.dumps({"time": time.monotonic(), **fields}).encode() + b"\n")

    def context(self, name: str, newest) -> ssl.SSLContext:
        """The TLS context with this certificate.  Kept, so that sessions are resumed."""
        with self.lock:
            if (name, newest) not in self.contexts:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(os.path.join(self.directory, f"{name}.pem"))
                context.set_alpn_protocols(["h2", "http/1.1"])
                if newest is not None:
                    context.maximum_version = ssl.TLSVersion[f"TLSv{newest.replace('.', '_')}"]
                self.contexts[name, newest] = context
            return self.contexts[name, newest]

    # -- the clients ---------------------------------------------------------------------------

    def connect(self, sock, host=None, early: bytes = b"") -> None:
        """Serve a client of the edge.  `host`: the host of its CONNECT, if it came through the proxy."""
        with self.lock:
            self.accepted += 1
            number = self.accepted
        Connection(self, number, sock, host, early).run()

    def run(self) -> None:
        """Serve until the standard input ends."""
        serving = {}
        path = os.path.join(self.directory, "edge.json")
        wanted = {}
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            wanted = json.load(file)
        for name, serve in (("tls", self.connect), ("proxy", lambda sock: Proxied(self, sock).run())):
            listener = socket.create_server(("127.0.0.1", wanted.get(name, 0)), backlog=4096)
            serving[listener.fileno()] = name, listener, serve
        ports = {name: listener.getsockname()[1] for name, listener, _ in serving.values()}
        with open(f"{path}.new", "w") as file:
            json.dump({**ports, "pid": os.getpid()}, file)
        os.replace(f"{path}.new", path)
        poll = select.poll()
        for fd in (0, *serving):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd:
                    _, listener, serve = serving[fd]
                    threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()
                elif not os.read(0, 4096):
                    return


def note_name(reader, name, _context) -> int:
    """SNI callback of a handshake that only serves to learn the name: note it, and end the handshake."""
    reader.asked = name
    return ssl.ALERT_DESCRIPTION_USER_CANCELLED


def main() -> None:
    """The command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: fake_edge.py DIRECTORY")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    Edge(sys.argv[1]).run()
    os._exit(0)  # without waiting for the threads


if __name__ == "__main__":
    main()
