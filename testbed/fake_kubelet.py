"""The node's half of the stand-in for a cluster: port-forwards and commands, as a kubelet and its container runtime.

    the API server ---- upgrade ---- SpdySession ------ Forwarding ---- 127.0.0.1:PORT, the program "in the pod"
    (fake_cluster)            \\            \\---------- Command --------- a program of this machine
                               \\--- WebSocket: the same SPDY inside, or plain channels (Channels, CommandChannels)

It is a part of testbed/fake_cluster.py, and runs in its process, in one asyncio loop.  It shares no line with the
program: its SPDY and its WebSocket are written a second time, so that each checks the other.

What it is faithful to, as measured on a real API server with the kubelet's own streaming library:

- SYN_REPLY comes for each stream.  A pair of streams (`error`, `data`) with one `requestid` is a connection to a port.
- The end is FIN on both.  Trouble is a text on the error stream, then RST_STREAM on both; the session goes on.
- There is no flow control.  A program that does not read stops the whole session, and a client that does not read, too.
- PINGs with odd ids are echoed.  Blocks of headers share one deflate stream in each direction.
- A pod that is gone has no sandbox: its streams end, and the session to its node stays up.

A container runtime is a row of RUNTIMES: whether the client's FIN reaches the program, what happens after one side's
end, and whether every end is a reset.
"""

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import ssl
import struct
import traceback
import zlib

CHUNK = 32768  # bytes of a data frame at most: what Go's io.Copy reads at a time
SPACE = 1 << 18  # bytes that are read at a time here; the frames of them leave in one write
QUEUED = 20  # frames that a stream holds before its session stops reading: about what the real library has
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
MESSAGE_MAX = 1 << 24  # bytes of a WebSocket message, or of a SPDY frame

SYN_STREAM, SYN_REPLY, RST_STREAM, PING, GOAWAY, FIN = 1, 2, 3, 6, 7, 1
PROTOCOL_ERROR, CANCEL = 1, 5
CONTINUATION, TEXT, BINARY, CLOSE, WS_PING, WS_PONG = 0, 1, 2, 8, 9, 10

LOST = (OSError, ssl.SSLError, asyncio.IncompleteReadError, EOFError)  # the client has left, or broke the rules


class Runtime:
    """How a container runtime carries a forwarded connection."""

    def __init__(self, passes_fin: bool, grace, resets: bool):
        self.passes_fin = passes_fin  # the client's FIN reaches the program in the pod
        self.grace = grace  # seconds that one direction gets after the other has ended; None: it is told at once
        self.resets = resets  # the program's every end is "connection reset by peer"


RUNTIMES = {
    "cri-o": Runtime(passes_fin=True, grace=None, resets=False),
    "containerd": Runtime(passes_fin=False, grace=1.0, resets=False),
    "resetting": Runtime(passes_fin=True, grace=None, resets=True),
}


# -- SPDY/3.1 ----------------------------------------------------------------------------------


def words(text: str) -> bytes:
    """The first part of the dictionary: each word with its length before it."""
    return b"".join(struct.pack("!I", len(word)) + word.encode() for word in text.split("|"))


# SPDY protocol draft 3.1, section 2.6.10.1.  Its Adler-32 is in each zlib header that it serves.
DICTIONARY = words(
    "options|head|post|put|delete|trace|accept|accept-charset|accept-encoding|accept-language|accept-ranges|age|allow|"
    "authorization|cache-control|connection|content-base|content-encoding|content-language|content-length|"
    "content-location|content-md5|content-range|content-type|date|etag|expect|expires|from|host|if-match|"
    "if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|location|max-forwards|pragma|"
    "proxy-authenticate|proxy-authorization|range|referer|retry-after|server|te|trailer|transfer-encoding|upgrade|"
    "user-agent|vary|via|warning|www-authenticate|method|get|status|200 OK|version|HTTP/1.1|url|public|set-cookie|"
    "keep-alive|origin") + (
    b"100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    b"203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    b"403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    b"Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    b"chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    b"text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.")


def control(kind: int, body: bytes, flags: int = 0) -> bytes:
    """A control frame of version 3."""
    return struct.pack("!HHI", 0x8003, kind, flags << 24 | len(body)) + body


def headers_of(block: bytes) -> dict:
    """The headers of a block that is inflated.  Raises struct.error for one that is cut short."""
    count, at, found = struct.unpack_from("!I", block)[0], 4, {}
    for _ in range(count):
        pair = []
        for _ in range(2):
            size = struct.unpack_from("!I", block, at)[0]
            pair.append(block[at + 4:at + 4 + size].decode("latin-1"))
            at += 4 + size
        found[pair[0]] = pair[1]
    return found


class Reset(Exception):
    """The client has reset this stream, or the session has ended."""


class Stream:
    """One stream of a session: what the client sent waits here, a few frames of it."""

    def __init__(self, session, number: int, headers: dict):
        self.session = session
        self.number = number
        self.headers = headers
        self.pieces = []
        self.ended = self.broken = False  # after the client's FIN; after a reset of either side
        self.sent_fin = False
        self.deaf = False  # nobody reads it any more: what still comes is dropped
        self.arrived, self.room = asyncio.Event(), asyncio.Event()

    async def feed(self, data: bytes) -> None:
        """Data has come.  Returns when there is room for more: until then the session reads nothing."""
        if self.broken or self.ended or self.deaf:
            return
        self.pieces.append(data)
        self.arrived.set()
        while len(self.pieces) > QUEUED and not (self.broken or self.deaf):
            self.room.clear()
            await self.room.wait()

    def end(self) -> None:
        """The client's FIN."""
        self.ended = True
        self.arrived.set()

    def break_off(self) -> None:
        """The stream is no more: who reads it, or waits for room in it, hears of that."""
        self.broken = True
        self.arrived.set()
        self.room.set()

    async def read(self) -> bytes:
        """What has come; b"" after FIN.  Raises Reset."""
        while not self.pieces:
            if self.broken:
                raise Reset
            if self.ended:
                return b""
            self.arrived.clear()
            await self.arrived.wait()
        data = b"".join(self.pieces)
        self.pieces.clear()
        self.room.set()
        return data

    async def write(self, data: bytes) -> None:
        """Send data.  Returns when the client has taken enough of it.  Raises Reset, or OSError."""
        if self.broken:
            raise Reset
        pieces = [data[at:at + CHUNK] for at in range(0, len(data), CHUNK)]
        await self.session.send([struct.pack("!II", self.number, len(piece)) + piece for piece in pieces])

    def finish(self) -> None:
        """Send FIN, once."""
        if not self.sent_fin and not self.broken:
            self.sent_fin = True
            self.session.post(struct.pack("!II", self.number, FIN << 24))
            if self.ended:
                self.session.forget(self)

    def reset(self, status: int = CANCEL) -> None:
        """Send RST_STREAM."""
        if not self.broken:
            self.session.post(control(RST_STREAM, struct.pack("!II", self.number, status)))
            self.session.forget(self)
            self.break_off()


class SpdySession:
    """The server's half of SPDY/3.1, on anything with `readexactly`, `write` and `drain`.  A subclass has `opened`."""

    def __init__(self, conn, wire, record: dict):
        self.conn = conn
        self.wire = wire
        self.record = record  # what the test sees of the session
        self.streams = {}
        self.last = 0  # the highest id of the client's streams
        self.last_taken = None  # after a GOAWAY: no stream behind this one is answered
        self.answers_pings = True
        self.inflate = zlib.decompressobj(zdict=DICTIONARY)
        self.deflate = zlib.compressobj(zdict=DICTIONARY)
        self.tasks = set()

    def opened(self, stream: Stream) -> None:
        """The client has opened a stream."""
        raise NotImplementedError

    # -- to the client -------------------------------------------------------------------------

    def post(self, data: bytes) -> None:
        """Send, and wait for nothing.  Frames leave in the order of these calls."""
        self.wire.write(data)

    async def send(self, frames: list) -> None:
        """Send when the client takes something.  Raises OSError where it has left."""
        await self.conn.thawed.wait()
        if self.conn.closed:
            raise ConnectionResetError
        self.wire.writelines(frames)
        await self.wire.drain()

    def reply(self, stream: Stream) -> None:
        """SYN_REPLY.  The block is compressed here, so in the order in which it is sent."""
        block = self.deflate.compress(struct.pack("!I", 0)) + self.deflate.flush(zlib.Z_SYNC_FLUSH)
        self.post(control(SYN_REPLY, struct.pack("!I", stream.number) + block))

    def goaway(self) -> None:
        """Take no further stream; end when the last one has ended."""
        self.last_taken = self.last
        self.post(control(GOAWAY, struct.pack("!II", self.last, 0)))
        self.end_if_idle()

    def close(self, code: int) -> None:
        """Where SPDY is in a WebSocket: close that."""
        if isinstance(self.wire, WebSocket):
            self.wire.close(code)

    def ping(self, number: int = 2) -> None:
        """A PING of the server's; the client has to echo it."""
        self.post(control(PING, struct.pack("!I", number)))

    def forget(self, stream: Stream) -> None:
        """Both sides have ended this stream."""
        self.streams.pop(stream.number, None)
        self.record["live"] = len(self.streams)
        self.end_if_idle()

    def end_if_idle(self) -> None:
        """After a GOAWAY the session ends with its last stream."""
        if self.last_taken is not None and not self.streams:
            self.conn.cut("end")

    # -- from the client -----------------------------------------------------------------------

    async def run(self) -> str:
        """Serve the session to its end.  Returns how that came."""
        try:
            while True:
                first, second = struct.unpack("!II", await self.wire.readexactly(8))
                flags, size = second >> 24, second & 0xFFFFFF
                body = await self.wire.readexactly(size)
                await self.conn.thawed.wait()
                if first >> 31 == 0:
                    await self.data(first, body, flags)
                elif first >> 16 != 0x8003:
                    return "protocol: a frame of another version"
                else:
                    self.control(first & 0xFFFF, body, flags)
        except LOST:
            return self.conn.left()
        except (zlib.error, struct.error) as error:
            return f"protocol: {error}"
        finally:
            for stream in list(self.streams.values()):
                stream.break_off()
            self.streams.clear()
            self.record["live"] = 0
            for task in self.tasks:
                task.cancel()

    async def data(self, number: int, body: bytes, flags: int) -> None:
        """A data frame.  One for a stream that has ended is dropped: it was on its way."""
        self.record["bytes_up"] += len(body)
        stream = self.streams.get(number)
        if stream is None:
            return
        if body:
            await stream.feed(body)
        if flags & FIN:
            stream.end()
            if stream.sent_fin:
                self.forget(stream)

    def control(self, kind: int, body: bytes, flags: int) -> None:
        """A control frame."""
        if kind == SYN_STREAM:
            self.syn_stream(body, flags)
        elif kind == PING:
            (number,) = struct.unpack("!I", body)
            self.record["pings" if number % 2 else "pongs"] += 1
            if number % 2 and self.answers_pings:
                self.post(control(PING, body))
        elif kind == RST_STREAM:
            stream = self.streams.get(struct.unpack_from("!I", body)[0])
            self.record["resets"] += 1
            if stream is not None:
                stream.break_off()
                self.forget(stream)
        elif kind == GOAWAY:
            self.record["goaway"] = True

    def syn_stream(self, body: bytes, flags: int) -> None:
        """A new stream.  Headers are inflated even where they are of no interest: all blocks are one deflate stream."""
        (number,) = struct.unpack_from("!I", body)
        headers = headers_of(self.inflate.decompress(body[10:]))
        if number % 2 == 0 or number <= self.last:
            self.post(control(RST_STREAM, struct.pack("!II", number, PROTOCOL_ERROR)))
            self.record["faulty"] += 1  # ids have to grow
            return
        self.last = number
        if self.last_taken is not None:
            return
        stream = Stream(self, number, headers)
        self.streams[number] = stream
        self.record["live"] = len(self.streams)
        self.record["most_live"] = max(self.record["most_live"], len(self.streams))
        if flags & FIN:
            stream.end()
        self.opened(stream)

    def start(self, coroutine) -> None:
        """Run something for a stream, until the session ends."""
        task = asyncio.ensure_future(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


# -- WebSocket (RFC 6455) ----------------------------------------------------------------------


@functools.cache
def xor_table(key: int) -> bytes:
    """A table for bytes.translate() that XORs each byte with `key`."""
    return bytes(byte ^ key for byte in range(256))


class WebSocket:
    """The server's half of a WebSocket.  As a carrier of SPDY it has `readexactly`, `write` and `drain`."""

    def __init__(self, conn):
        self.conn = conn
        self.buffer = bytearray()
        self.said_close = False
        self.pongs = 0

    def send(self, payload: bytes, opcode: int = BINARY) -> None:
        """Send a message, and wait for nothing."""
        if not self.said_close:
            self.conn.write(self.packed(payload, opcode))

    def packed(self, payload: bytes, opcode: int = BINARY) -> bytes:
        """A message: one frame, or by the setting `fragment` several, with a Ping before each but the first."""
        size, most = len(payload), self.conn.cluster.settings["fragment"]
        if most and opcode == BINARY and size > most:
            parts = [payload[at:at + most] for at in range(0, size, most)]
            frames = [self.frame_of(part, CONTINUATION if at else BINARY) for at, part in enumerate(parts)]
            last = bytes((0x80 | frames[-1][0],)) + frames[-1][1:]
            return self.frame_of(b"p", 0x80 | WS_PING).join([*frames[:-1], last])
        return self.frame_of(payload, 0x80 | opcode)

    @staticmethod
    def frame_of(payload: bytes, first: int) -> bytes:
        """A frame; `first` has FIN and the opcode."""
        size = len(payload)
        head = (bytes((first, size)) if size < 126 else struct.pack("!BBH", first, 126, size) if size < 65536
                else struct.pack("!BBQ", first, 127, size))
        return head + payload

    def close(self, code: int = 1000) -> None:
        """Send a Close, once."""
        self.send(struct.pack("!H", code), CLOSE)
        self.said_close = True

    async def read_frame(self) -> tuple:
        """The first byte of the next frame, and its payload.  Raises EOFError for what is not masked."""
        read = self.conn.reader.readexactly
        first, second = await read(2)
        size = second & 0x7F
        if size > 125:
            size = int.from_bytes(await read(2 if size == 126 else 8), "big")
        if not second & 0x80 or size > MESSAGE_MAX:
            self.close(1002)
            raise EOFError("a frame without a mask, or too long")
        key, payload = await read(4), await read(size)
        if any(key):  # each byte of the key is for every fourth byte
            masked, payload = payload, bytearray(size)
            for lane in range(4):
                payload[lane::4] = masked[lane::4].translate(xor_table(key[lane]))
        return first, payload

    async def message(self):
        """The next message; None after a Close.  Raises one of LOST."""
        parts = []
        while True:
            first, payload = await self.read_frame()
            await self.conn.thawed.wait()
            opcode = first & 15
            if opcode == CLOSE:
                self.close(int.from_bytes(payload[:2], "big") or 1000)
                return None
            if opcode == WS_PING:
                self.send(payload, WS_PONG)
            elif opcode == WS_PONG:
                self.pongs += 1
            elif opcode in (CONTINUATION, TEXT, BINARY):
                parts.append(payload)
                if first & 0x80:
                    return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)
            else:
                self.close(1002)
                raise EOFError("an unknown opcode")

    async def readexactly(self, count: int) -> bytes:
        """Bytes of messages; their borders mean nothing."""
        while len(self.buffer) < count:
            message = await self.message()
            if message is None:
                raise EOFError("closed")
            self.buffer += message
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    def write(self, data: bytes) -> None:
        self.send(data)

    def writelines(self, frames: list) -> None:
        """A message for each frame."""
        if not self.said_close:
            self.conn.write(b"".join(map(self.packed, frames)))

    async def drain(self) -> None:
        await self.conn.writer.drain()


# -- port-forward ------------------------------------------------------------------------------


class Sandbox:
    """A pod on its node: the ports on which its programs listen, and where its commands are found."""

    def __init__(self, uid: str, name: str, ports: dict, path: str):
        self.id = (uid.replace("-", "") * 2)[:64]
        self.netns = f"/var/run/netns/cni-{uid}"
        self.name = name
        self.ports = ports  # {port in the pod: (host, port) here}
        self.path = path
        self.forwardings = set()
        self.gone = False


class PodReader(asyncio.StreamReader):
    """What a program in a pod sends.  asyncio's own reader drops what it has when a reset comes; a kernel does not."""

    reset = None  # the OSError that ended it

    def set_exception(self, exc) -> None:
        self.reset = exc
        self.feed_eof()

    async def read(self, n: int = -1) -> bytes:
        data = await super().read(n)
        if not data and self.reset:
            raise self.reset
        return data


async def dial(host: str, port: int) -> tuple:
    """A connection to a program: its reader and writer.  Raises OSError."""
    loop, reader = asyncio.get_running_loop(), PodReader(limit=SPACE)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.create_connection(lambda: protocol, host, port)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class Trouble(Exception):
    """A connection to a pod's port failed.  Argument: the text for the error stream, or none."""


class Forwarding:
    """One connection to a port of a pod.

    `client` has `read`, `write`; `record` is what the test sees.
    """

    def __init__(self, conn, sandbox: Sandbox, port: int, record: dict):
        self.conn = conn
        self.sandbox = sandbox
        self.port = port
        self.record = record
        self.runtime = RUNTIMES[conn.cluster.settings["runtime"]]
        self.grace = conn.cluster.settings["grace"]
        self.pod = None  # the reader and the writer of the program's socket
        self.killed = asyncio.Event()  # the pod has been removed

    def text(self, why: str) -> str:
        """The kubelet's words around those of the runtime."""
        return f"error forwarding port {self.port} to pod {self.sandbox.id}, uid : {why}"

    def inside(self, why: str) -> str:
        """The runtime's words about what failed in the pod's network."""
        return f'failed to execute portforward in network namespace "{self.sandbox.netns}": {why}'

    async def run(self, client) -> None:
        """Carry the connection to its end.  Raises Trouble, or what `client` raises."""
        if self.sandbox.gone:
            raise Trouble(self.text(f'failed to find sandbox "{self.sandbox.id}" in store: not found'))
        try:
            host, port = self.sandbox.ports[self.port]
            self.pod = await dial(host, port)
        except (KeyError, OSError):
            raise Trouble(self.text(self.inside(
                f'failed to connect to localhost:{self.port} inside namespace "{self.sandbox.id}", '
                f"IPv4: dial tcp4 127.0.0.1:{self.port}: connect: connection refused "
                "IPv6 dial tcp6: address localhost: no suitable address found "))) from None
        sock = self.pod[1].get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        near = sock.getsockname()[1]
        self.sandbox.forwardings.add(self)
        tasks = [asyncio.ensure_future(way) for way in (self.up(client), self.down(client), self.killed.wait())]
        try:
            await self.carry(*tasks)
        except OSError:
            raise Trouble(self.text(self.inside(f"read tcp4 127.0.0.1:{near}->127.0.0.1:{self.port}: "
                                                "read: connection reset by peer"))) from None
        finally:
            self.sandbox.forwardings.discard(self)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.pod[1].close()

    async def carry(self, up, down, killed) -> None:
        """Wait for the end, as the runtime does.  Raises OSError where the program has reset its connection."""
        waiting = {up, down, killed}
        while down in waiting and killed in waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {killed}:
                task.result()
            if killed in done or self.runtime.grace is not None:
                break
        if killed not in waiting:
            raise ConnectionResetError
        if self.runtime.grace is not None and waiting != {killed}:
            done, _ = await asyncio.wait(waiting, timeout=self.runtime.grace if self.grace is None else self.grace,
                                         return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        if self.runtime.resets:
            raise ConnectionResetError

    async def up(self, client) -> None:
        """From the client to the program."""
        writer = self.pod[1]
        while data := await client.read():
            self.record["up"] += len(data)
            writer.write(data)
            await writer.drain()
        self.record["client_fin"] = True
        if self.runtime.passes_fin:
            with contextlib.suppress(OSError):
                writer.write_eof()

    async def down(self, client) -> None:
        """From the program to the client."""
        reader = self.pod[0]
        while True:
            data = await reader.read(SPACE)
            if not data:
                return
            if fault := self.conn.fault("open", self.record["down"] + len(data), **self.record):
                left = max(0, fault.after - self.record["down"])
                await self.tell(client, data[:left])
                await self.conn.act(fault, self)
                data = data[left:]
            await self.tell(client, data)

    async def tell(self, client, data: bytes) -> None:
        """Send to the client."""
        self.record["down"] += len(data)
        try:
            if data:
                await client.write(data)
        except OSError:  # not the program's: the client has left
            raise Reset from None


class PortForward(SpdySession):
    """A session of port-forwards: pairs of streams."""

    def __init__(self, conn, wire, record: dict, sandbox: Sandbox):
        super().__init__(conn, wire, record)
        self.sandbox = sandbox
        self.pairs = {}  # {requestid: {streamtype: stream}}, of one stream each
        self.timers = {}  # {requestid: when it is too late for the second}

    def opened(self, stream: Stream) -> None:
        kind, port = stream.headers.get("streamtype"), stream.headers.get("port", "")
        if kind not in ("data", "error") or not port.isdecimal() or not 0 < int(port) < 65536:
            self.record["faulty"] += 1
            stream.reset()
            return
        request = stream.headers.get("requestid", str(stream.number - 2 * (kind == "data")))  # old clients have none
        pair = self.pairs.setdefault(request, {})
        pair[kind] = stream
        if len(pair) == 2:
            self.pairs.pop(request)
            self.timers.pop(request).cancel()
            self.start(self.serve(pair["error"], pair["data"], stream, int(port)))
        else:
            self.reply(stream)
            self.timers[request] = asyncio.get_running_loop().call_later(
                self.conn.cluster.settings["pair_timeout"], self.too_late, request, stream)

    def too_late(self, request: str, stream: Stream) -> None:
        """A stream has stayed alone for too long."""
        del self.pairs[request], self.timers[request]
        if stream.headers["streamtype"] == "error" and not stream.broken:
            text = f"(conn=0x0, request={request}) timed out waiting for streams".encode()
            self.post(struct.pack("!II", stream.number, len(text)) + text)
        stream.reset()

    async def serve(self, error: Stream, data: Stream, second: Stream, port: int) -> None:
        """One connection; `second` is the stream that has no SYN_REPLY yet."""
        record = self.conn.cluster.note_stream(self.record, port, data.headers.get("requestid"))
        self.record["streams"] += 1
        forwarding = Forwarding(self.conn, self.sandbox, port, record)
        try:
            if fault := self.conn.fault("stream", **record):
                await self.conn.act(fault, forwarding)
            self.reply(second)
            await forwarding.run(data)
            record["ended"] = "fin"
            data.finish()
            error.finish()
        except Trouble as trouble:
            record["ended"], record["error"] = "error", str(trouble)
            with contextlib.suppress(Reset, OSError):
                if trouble.args:
                    await error.write(str(trouble).encode())
            data.reset()
            error.reset()
        except Reset:
            record["ended"] = "reset"
            error.finish()
        except OSError:
            record["ended"] = "lost"
        except Exception:  # a fault of ours: the test fails for what is on stderr
            traceback.print_exc()
        finally:
            record["ended"] = record["ended"] or "lost"
            data.deaf = error.deaf = True
            data.room.set()


class Channel:
    """Two channels of a WebSocket, as a Forwarding's client: data, and the text of an error."""

    def __init__(self, owner, number: int):
        self.owner = owner
        self.number = number
        self.stream = Stream(None, number, {})

    async def read(self) -> bytes:
        return await self.stream.read()

    async def write(self, data: bytes) -> None:
        await self.owner.send(self.number, data)


class Channels:
    """Port-forward by plain channels (v4.channel.k8s.io): a WebSocket for each upgrade, no half-close."""

    def __init__(self, conn, record: dict, sandbox: Sandbox, ports: list):
        self.conn = conn
        self.socket = WebSocket(conn)
        self.record = record
        self.sandbox = sandbox
        self.ports = ports
        self.channels = [Channel(self, 2 * index) for index in range(len(ports))]

    async def send(self, channel: int, data: bytes) -> None:
        await self.conn.thawed.wait()
        self.socket.send(bytes((channel,)) + data)
        await self.socket.drain()

    async def serve(self, channel: Channel, port: int) -> None:
        """One port."""
        record = self.conn.cluster.note_stream(self.record, port, None)
        self.record["streams"] += 1
        forwarding = Forwarding(self.conn, self.sandbox, port, record)
        try:
            if fault := self.conn.fault("stream", **record):
                await self.conn.act(fault, forwarding)
            await forwarding.run(channel)
            record["ended"] = "fin"
        except Trouble as trouble:
            record["ended"], record["error"] = "error", str(trouble)
            await self.send(channel.number + 1, str(trouble).encode())
        except (Reset, OSError):
            record["ended"] = "lost"

    async def run(self) -> str:
        """Serve until all ports have ended, or the client has."""
        for channel, port in zip(self.channels, self.ports):
            for number in (channel.number, channel.number + 1):
                self.socket.send(bytes((number,)) + struct.pack("<H", port))
        work = asyncio.gather(*map(self.serve, self.channels, self.ports))
        hearing = asyncio.ensure_future(self.hear())
        self.record["live"] = len(self.ports)
        try:
            await asyncio.wait([work, hearing], return_when=asyncio.FIRST_COMPLETED)
            return self.conn.left() if hearing.done() else "fin"
        finally:
            for channel in self.channels:
                channel.stream.break_off()
            hearing.cancel()
            await asyncio.gather(work, hearing, return_exceptions=True)
            self.record["live"] = 0
            self.socket.close()

    async def hear(self) -> None:
        """Sort the client's messages by their first byte."""
        with contextlib.suppress(*LOST):
            while (message := await self.socket.message()) is not None:
                self.record["bytes_up"] += max(0, len(message) - 1)
                if message and message[0] % 2 == 0 and message[0] // 2 < len(self.channels) and message[1:]:
                    await self.channels[message[0] // 2].stream.feed(message[1:])


# -- exec --------------------------------------------------------------------------------------


SUCCESS = {"metadata": {}, "status": "Success"}


def failure(argv: list, code: int) -> dict:
    """The status of a command that has said no."""
    return {"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": "command terminated with non-zero exit code: "
                       f"error executing command [{' '.join(argv)}], exit code {code}",
            "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]}}


def internal_error(why: str) -> dict:
    """The status of a command that did not start."""
    why = f"error executing command in container: {why}"
    return {"metadata": {}, "status": "Failure", "message": f"Internal error occurred: {why}",
            "reason": "InternalError", "details": {"causes": [{"message": why}]}, "code": 500}


class Command:
    """A command in a container: a program of this machine, found on the pod's own PATH.

    It outlives its client, as with containerd; its stdin ends then.  The stand-in kills it at its own end.
    """

    def __init__(self, cluster, sandbox: Sandbox, argv: list, record: dict):
        self.cluster = cluster
        self.sandbox = sandbox
        self.argv = argv
        self.record = record
        self.process = None

    async def run(self, stdin, out) -> dict:
        """Run it.  `stdin` has `read`, or is None; `await out(1 or 2, data)` takes its words.  Returns its status."""
        program = shutil.which(self.argv[0], path=self.sandbox.path)
        if self.sandbox.gone:
            return internal_error(f'container not found ("{self.sandbox.name}")')
        if program is None:
            why = (f"stat {self.argv[0]}: no such file or directory" if "/" in self.argv[0]
                   else "executable file not found in $PATH")
            return internal_error(
                "failed to exec in container: failed to start exec: OCI runtime exec failed: exec failed: unable to "
                f'start container process: exec: "{self.argv[0]}": {why}: unknown')
        self.process = await asyncio.create_subprocess_exec(
            program, *self.argv[1:], stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=CHUNK, start_new_session=True,
            env={"PATH": self.sandbox.path, "HOSTNAME": self.sandbox.name, "LC_ALL": "C"})
        self.record["pid"] = self.process.pid
        self.cluster.commands.add(self)
        feeding = asyncio.ensure_future(self.feed(stdin)) if stdin is not None else None
        try:
            await asyncio.gather(self.drain(self.process.stdout, 1, out), self.drain(self.process.stderr, 2, out))
            code = await self.process.wait()
        finally:
            self.cluster.commands.discard(self)
            if feeding is not None:
                feeding.cancel()
                with contextlib.suppress(OSError):  # what could not be written to a command that has ended
                    self.process.stdin.close()
                    await self.process.stdin.wait_closed()
        self.record["code"] = code = code if code >= 0 else 128 - code
        return SUCCESS if code == 0 else failure(self.argv, code)

    async def feed(self, stdin) -> None:
        """The client's stdin.  A client that has left is an end, too."""
        writer = self.process.stdin
        with contextlib.suppress(Reset, OSError):
            while data := await stdin.read():
                writer.write(data)
                await writer.drain()
        self.record["stdin_ended"] = True
        writer.close()

    async def drain(self, pipe, channel: int, out) -> None:
        """What the command says; it is read on where nobody hears it."""
        while data := await pipe.read(CHUNK):
            with contextlib.suppress(Reset, OSError):
                await out(channel, data)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class CommandStreams(SpdySession):
    """A command by SPDY: it starts when all of its streams are there."""

    def __init__(self, conn, wire, record: dict, command: Command, wanted: set):
        super().__init__(conn, wire, record)
        self.command = command
        self.wanted = wanted  # the kinds of streams
        self.by_kind = {}

    def opened(self, stream: Stream) -> None:
        kind = stream.headers.get("streamtype")
        if kind not in self.wanted or kind in self.by_kind:
            self.record["faulty"] += 1
            stream.reset()
            return
        self.record["streams"] += 1
        self.reply(stream)
        self.by_kind[kind] = stream
        if len(self.by_kind) == len(self.wanted):
            self.conn.cluster.start(self.serve())

    async def serve(self) -> None:
        """The command, its status, and the end of all streams."""
        async def out(channel: int, data: bytes) -> None:
            stream = self.by_kind.get("stdout" if channel == 1 else "stderr")
            if stream is not None:
                await stream.write(data)

        status = await self.command.run(self.by_kind.get("stdin"), out)
        with contextlib.suppress(Reset, OSError):
            await self.by_kind["error"].write(json.dumps(status).encode())
        for stream in self.by_kind.values():
            stream.finish()


class CommandChannels:
    """A command by WebSocket: channels 0 to 4, and in version 5 the end of stdin (FF 00)."""

    def __init__(self, conn, record: dict, command: Command, wanted: set, version: int):
        self.conn = conn
        self.socket = WebSocket(conn)
        self.record = record
        self.command = command
        self.wanted = wanted
        self.version = version
        self.stdin = Stream(None, 0, {})

    async def run(self) -> str:
        """Serve until the command has ended, or the client has.  A command goes on where its client has left."""
        self.socket.send(b"\1")  # the streams are there; it says nothing about the program
        work = self.conn.cluster.start(self.command.run(self.stdin if "stdin" in self.wanted else None, self.out))
        hearing = asyncio.ensure_future(self.hear())
        self.record["live"] = 1
        try:
            await asyncio.wait([work, hearing], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return self.conn.left()
            await self.out(3, json.dumps(work.result()).encode())
            self.socket.close()
            return "fin"
        finally:
            self.stdin.break_off()
            self.record["live"] = 0
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)

    async def out(self, channel: int, data: bytes) -> None:
        """To the client, where it has asked for that channel."""
        if self.conn.closed:
            raise ConnectionResetError
        if {1: "stdout", 2: "stderr", 3: "error"}[channel] in self.wanted:
            await self.conn.thawed.wait()
            self.socket.send(bytes((channel,)) + data)
            await self.socket.drain()

    async def hear(self) -> None:
        """The client's messages."""
        with contextlib.suppress(*LOST):
            while (message := await self.socket.message()) is not None:
                if message[:1] == b"\0":
                    self.record["bytes_up"] += len(message) - 1
                    await self.stdin.feed(message[1:])
                elif message == b"\xff\0" and self.version == 5:
                    self.stdin.end()
