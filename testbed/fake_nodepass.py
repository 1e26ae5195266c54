<<<<<<< HEAD
"""A stand-in for sniroute_nodepass.py as a master starts it: it says CHECK_POINT lines, and does what its URL says.

The user part of the URL, a key elsewhere, is what it does:

    good        a CHECK_POINT line each 20 ms; the number of bytes that it has received grows by 10 each time
    listens     the same, and it listens on its tunnel's port until it ends
    once        one such line, then none
    waits       no such line
    fails       a line of an error, and exit 3
    ends        exit 0
    sick        an error of its server in a line; a CHECK_POINT line once the file beside the state, `well`, is there
    deaf        as good, but it does not end at SIGTERM
    floods      short lines, as many as it can; and now and then a CHECK_POINT line
    hostile     a line with control characters, HTML, and no UTF-8
    parent      a child of its own, whose pid it says, and that outlives it unless it is killed
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse

URL = urllib.parse.urlsplit(os.environ["SNIROUTE_NODEPASS_URL"])
DOES = URL.username
received = 0


def say(line):
    os.write(1, line + b"\n")


def check(ping=3):
    global received
    received += 10
    say(b"2026-11-30 00:00:00.000  EVENT  CHECK_POINT|MODE=2|PING=%dms|POOL=5|TCPS=1|UDPS=4|TCPRX=%d|TCPTX=7|UDPRX=8"
        b"|UDPTX=9" % (ping, received))


if DOES == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif DOES != "parent":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
say(b"begun: pid=%d argv=%d" % (os.getpid(), len(sys.argv)))
if DOES == "fails":
    say(b"nodepass: it is broken")
    sys.exit(3)
if DOES == "ends":
    sys.exit(0)
if DOES == "listens":
    listener = socket.create_server((URL.hostname, URL.port))
if DOES in ("once", "waits"):
    if DOES == "once":
        check()
    while True:
        time.sleep(60)
if DOES == "sick":
    say(b"2026-11-30 00:00:00.000  ERROR  Server error: handshake timeout")
    while not os.path.exists(os.environ["WELL"]):
        time.sleep(0.01)
if DOES == "hostile":
    say(b"\x1b[31m<script>alert(1)</script>\x00\xff\r")
if DOES == "parent":
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    say(b"child=%d" % child.pid)
if DOES == "floods":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    check()
    while True:
        for _ in range(2000):
            os.write(1, b"word\n" * 800)
        check()
while True:
    check()
    time.sleep(0.02)
=======
"""fake_nodepass: a stand-in for `sniroute_nodepass.py forwarders`, for tests: its orders, its events, and no NodePass.

    stdin: "listen 127.0.0.1:20000 [$VARIABLE@]HOST:PORT[?QUERY]"     a server on HOST:PORT, callers on 127.0.0.1:20000
           "close 127.0.0.1:20000"

What dials in says one line, "KEY HOST:PORT": its key, and the service that it dials.  With the right key it is linked as
long as its connection lasts; further lines, "POOL PING", are its state.  A caller is led to the service; while nobody is
linked, it waits PATIENCE, and is told off as `away`.  A key that begins with "!" has the process end.
"""

import contextlib
import json
import os
import socket
import sys
import threading

PATIENCE = 0.05  # seconds


def say(event: str, **fields: object) -> None:
    os.write(2, json.dumps({"event": event, "message": "fake", **fields}).encode() + b"\n")


def place_of(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]") or "0.0.0.0", int(port)


def copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class Tunnel:
    def __init__(self, listener: str, argument: str):
        target, _, self.query = argument.partition("?")
        variable, at, place = target.rpartition("@")
        self.listener, self.place = listener, place
        self.key = os.environ[variable.removeprefix("$")] if at else ""
        self.server = socket.create_server(place_of(place))
        try:
            self.local = socket.create_server(place_of(listener))
        except OSError:
            self.server.close()
            raise
        self.service: tuple[str, int] | None = None
        self.linked = threading.Event()
        self.open: list[socket.socket] = [self.server, self.local]
        for sock, serve in ((self.server, self.meet), (self.local, self.lead)):
            threading.Thread(target=self.accept, args=(sock, serve), daemon=True).start()

    def accept(self, sock: socket.socket, serve) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, address = sock.accept()
                threading.Thread(target=serve, args=(client, f"{address[0]}:{address[1]}"), daemon=True).start()

    def meet(self, client: socket.socket, address: str) -> None:
        """One that dials in."""
        self.open.append(client)
        with client, contextlib.suppress(OSError), client.makefile("rw") as lines:
            key, _, service = lines.readline().strip().rpartition(" ")
            if key.startswith("!"):
                os._exit(3)
            if key != self.key:
                return
            self.service = place_of(service)
            say("linked", listener=self.listener, client=address, type="0", tls="1")
            say("state", listener=self.listener, client=address, pool="64", ping="2")
            self.linked.set()
            lines.write("in\n")
            lines.flush()
            for line in lines:
                pool, ping = line.split()
                say("state", listener=self.listener, client=address, pool=pool, ping=ping)
        if self.linked.is_set():
            self.linked.clear()
            say("unlinked", listener=self.listener, error="it has closed the control channel")

    def lead(self, caller: socket.socket, address: str) -> None:
        """One that wants the service."""
        with caller:
            if not self.linked.wait(PATIENCE):
                say("failed", listener=self.listener, client=address, reason="away",
                    error=f"no NodePass client has dialled in to {self.place}")
                return
            with socket.create_connection(self.service, 5) as service:
                there = threading.Thread(target=copy, args=(caller, service), daemon=True)
                there.start()
                copy(service, caller)
                there.join()

    def close(self) -> None:
        for sock in self.open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def main() -> None:
    assert sys.argv[1:] == ["forwarders"], sys.argv
    tunnels: dict[str, Tunnel] = {}
    for line in sys.stdin:
        order, listener, *rest = line.split()
        if order == "close":
            tunnels.pop(listener).close()
            say("closed", listener=listener)
            continue
        try:
            tunnels[listener] = Tunnel(listener, *rest)
        except OSError as error:
            say("closed", listener=listener, error=str(error.strerror).lower())
        else:
            say("listening", listener=listener)


if __name__ == "__main__":
    main()
>>>>>>> np-router
