"""endure_house_web: what stands behind web names in `house`, a process of its own.

    python3 -m testbed.endure_house_web FOLDER

    GET /bytes/SIZE/SEED    so many bytes, which `content` makes of the seed
    GET /page               a page with three scripts, each of which writes a word of WORDS
    POST /up/ID             the SHA-256 of what was uploaded; before that it is in FOLDER/uploads, a line for each

FOLDER has server.pem (certificate and key), and ports.json, which says where it is to listen: tls, plain, and one port
for each of OWNERS, which answers a ClientHello with its owner's word and the checksum of what it was told.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import random
import socket
import ssl
import sys
import threading
import zlib

HOST = "127.0.0.1"
OWNERS = ("alice", "bob")
WORDS = ("first", "second", "third")
SILENCE = 20  # seconds


def content(size: int, seed: int) -> bytes:
    """What a download has to be."""
    return random.Random(seed).randbytes(size)


def page() -> bytes:
    scripts = "".join(f'<script src="/script/{word}"></script>' for word in WORDS)
    return f"<!doctype html><title>house</title><p id=said></p>{scripts}".encode()


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = SILENCE

    def log_message(self, *_: object) -> None:
        pass

    def setup(self) -> None:
        """TLS belongs to the connection's own thread: a client that says nothing holds up nobody."""
        if isinstance(self.request, ssl.SSLSocket):
            self.request.settimeout(SILENCE)
            self.request.do_handshake()
        super().setup()

    def answer(self, body: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        _, what, *words = self.path.split("/")
        if what == "bytes":
            self.answer(content(int(words[0]), int(words[1])))
        elif what == "page":
            self.answer(page(), "text/html")
        elif what == "script" and words[0] in WORDS:
            self.answer(f"document.getElementById('said').append('{words[0]} ')".encode(), "text/javascript")
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        body = self.rfile.read(size)
        if len(body) < size:
            self.close_connection = True  # half of it is not taken
            return
        digest = hashlib.sha256(body).hexdigest()
        line = f"{self.path.removeprefix('/up/')} {digest}\n".encode()
        os.write(self.server.uploads, line)
        self.answer(digest.encode(), "text/plain")


class Server(http.server.ThreadingHTTPServer):
    """Plain, or with TLS."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int, uploads: int, context: ssl.SSLContext | None):
        super().__init__((HOST, port), Handler)
        self.uploads = uploads
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, *_: object) -> None:
        """A client that was cut is no fault of this server's."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(*_)


def who(sock: socket.socket, owner: str) -> None:
    """Say whose this is, and what was heard."""
    with sock, contextlib.suppress(OSError), sock.makefile("rb") as reader:
        sock.settimeout(SILENCE)
        head = reader.read(5)
        hello = head + reader.read(int.from_bytes(head[3:5], "big"))
        sock.sendall(f"{owner} {zlib.crc32(hello)}\n".encode())
        reader.read(1)


def attend(listener: socket.socket, owner: str) -> None:
    while True:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            threading.Thread(target=who, args=(sock, owner), daemon=True).start()


def main(folder: str) -> int:
    """The command line."""
    place = pathlib.Path(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "server.pem")
    uploads = os.open(place / "uploads", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    ports = json.loads((place / "ports.json").read_text())
    for name, secured in (("tls", context), ("plain", None)):
        server = Server(ports[name], uploads, secured)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    for owner in OWNERS:
        listener = socket.create_server((HOST, ports[owner]), backlog=1024)
        threading.Thread(target=attend, args=(listener, owner), daemon=True).start()
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
