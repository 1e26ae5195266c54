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
