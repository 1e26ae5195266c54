#!/usr/bin/env python3
"""fake_cloudflared: a stand-in for `cloudflared access tcp`, and for a carrier, for tests.

It has the real program's command line and its habits: it logs before it listens, it listens
whether or not there is a far end, it accepts before it dials, it dials once per client, it closes
a client that it cannot serve without a byte, it ends both sides at the first end of either,
SIGTERM kills it, and wrong usage ends it with exit code 0.

With the word `forwarders` it behaves as `sniroute_carrier.py forwarders`: it serves the hostnames
that its stdin names ("Shared processes" in sniroute_processes.py), each with switches of its own.

A test copies or wraps the program file.  JSON files beside that file say where a hostname leads,
and what goes wrong; the program records there what it did, a JSON line for each event:

    far.json       {"hostname": ["127.0.0.1", port], "*": the default}
    faults.json    {"hostname": {switch: value, ...}, "*": the default}
    starts.jsonl   one line per start of a hostname: pid, argv, environment, open descriptors, time
    clients.jsonl  one line per client: pid, hostname, its number in this process, time

Switches.  At the start of a hostname (those with * only where a process serves one hostname):
    exit: CODE           end at once with this code, after the line `words`
    in_use: K            claim on the first K starts for this hostname that the port is taken
    listen_delay: MS     listen late
    never_listen: true   run, but do not listen
    wrong_port: true     * listen on another port
    wrong_owner: true    * a detached process listens; `detached` in starts.jsonl is its pid
    child_listens: true  * a child process listens and serves, as under a wrapper script
    ignore_term: true    SIGTERM does nothing
    flood: MB            write that much output, after listening and before serving
    stop: true           stop itself (SIGSTOP) once it listens
    exit_after: MS       end that long after it listens, with `code` (default 1) and `words`
    ignore_close: true   (shared process) ignore the order to close this listener
For each client, looked up anew each time:
    refuse: true or K    close every client, or this process's first K, with no byte sent
    error: TEXT          log this error when a client cannot be served
    reason: WORD         (shared process) give this reason with it (default down)
    hang: true           accept, and never answer
    login: true          ask for a login in plain text, and never answer
    exit_on_client: true end at the first client, with `code` and `words`
    exit_after_bytes: N  end once N bytes have passed, with `code` and `words`

It imports little and uses one thread, so that it starts fast: all tests together start it a thousand times.  That is
why it uses the C modules below `json`, `selectors`, `signal` and `socket`: what those import takes as long as Python
itself.
"""

import _json
import _signal as signal
import _socket
import heapq
import itertools
import os
import select
import sys
import time

CHUNK = 16384  # bytes that the real one reads from a client at a time
DETACHED_LIFE = 60  # seconds; a detached process ends by itself, should a test forget it
NO_SIGNAL = getattr(_socket, "MSG_NOSIGNAL", 0)  # SIGPIPE is for a closed log only; a closed socket is an error

FLAGS = {
    "--hostname": "hostname", "-T": "hostname", "--tunnel-host": "hostname",
    "--url": "url", "-L": "url", "--listener": "url",
    "--header": "header", "-H": "header", "--destination": "destination",
    "--service-token-id": "id", "--id": "id", "--service-token-secret": "secret", "--secret": "secret",
    "--loglevel": "loglevel", "--log-level": "loglevel", "--logfile": "logfile",
}
HELP = """NAME:
   cloudflared access tcp - stand-in

USAGE:
   cloudflared access tcp [command options]
"""


class Reading:
    """How JSON is read: what `json.JSONDecoder` tells the scanner."""

    strict, object_hook, object_pairs_hook = True, None, None
    parse_float, parse_int, parse_constant = float, int, None


SCAN = _json.make_scanner(Reading)
ENCODE = _json.make_encoder(None, None, _json.encode_basestring_ascii, None, ": ", ", ", False, False, True)


def from_json(text: str):
    return SCAN(text, 0)[0]


def to_json(value) -> str:
    return "".join(ENCODE(value, 0))


class Socket(_socket.socket):
    """What `socket.socket` adds, as far as it is used here."""

    def accept(self):
        fd, peer = self._accept()
        return Socket(fileno=fd), peer

    @classmethod
    def listening(cls, port: int, backlog: int):
        """A listener; raises OSError."""
        sock = cls()
        try:
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            sock.listen(backlog)
        except OSError:
            sock.close()
            raise
        return sock

    @classmethod
    def connected(cls, address: tuple):
        """A client; raises OSError."""
        sock = cls(_socket.AF_INET6 if ":" in address[0] else _socket.AF_INET)
        try:
            sock.settimeout(5)
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock


def parse_words(words: list) -> dict:
    """The options of `access tcp`, by name; None for wrong usage."""
    options = {"header": []}
    rest = list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        name = FLAGS.get(flag)
        if name is None or not equals and not rest:
            return None
        value = value if equals else rest.pop(0)
        if name == "header":
            options["header"].append(value)
        else:
            options[name] = value
    return options


def log(level: str, message: str, **fields) -> None:
    """Write one log line, as JSON or as text for people."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if os.environ.get("TUNNEL_LOG_OUTPUT") == "json":
        line = to_json({"level": level, **fields, "time": now, "message": message})
    else:
        shown = "".join(f" {key}={to_json(value)}" for key, value in fields.items())
        line = f"{now} {level[:3].upper()} {message}{shown}"
    say(line)


def say(line: str) -> None:
    """Write one plain line to stderr."""
    os.write(2, line.encode() + b"\n")


def open_fds() -> dict:
    """The descriptors that are open, and what they are; empty without /proc."""
    found = {}
    try:
        for fd in os.listdir("/proc/self/fd"):
            try:
                found[fd] = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                pass  # listdir() has closed the descriptor that it used itself
    except OSError:
        pass
    return found


def own_environment() -> dict:
    """The environment that the process was started with.  Not os.environ: Python adds LC_CTYPE to that."""
    try:
        with open("/proc/self/environ", "rb") as file:
            words = file.read().decode("utf-8", "replace").split("\0")
        return dict(word.split("=", 1) for word in words if "=" in word)
    except OSError:
        return dict(os.environ)


class Loop:
    """What the listeners of a process share: one selector, and a heap of timers."""

    def __init__(self):
        self.poller, self.second = (select.epoll(), 1) if hasattr(select, "epoll") else (select.poll(), 1000)
        self.watched = {}  # what is called, by descriptor
        self.later = []  # a heap of (time, number, function)
        self.numbers = itertools.count()

    def at(self, milliseconds: float, act) -> None:
        """Call `act` that long from now."""
        heapq.heappush(self.later, (time.monotonic() + milliseconds / 1000, next(self.numbers), act))

    def watch(self, sock, events: int, act) -> None:
        """Call `act(events)` when the socket has one of these events, or has failed; with 0, stop to watch it."""
        fd = sock.fileno()
        if events:
            (self.poller.modify if fd in self.watched else self.poller.register)(fd, events)
            self.watched[fd] = act
        elif self.watched.pop(fd, None) is not None:
            self.poller.unregister(fd)

    def run(self) -> None:
        """Run the timers that are due, then the callbacks of sockets, until the process ends."""
        while True:
            while self.later and self.later[0][0] <= time.monotonic():
                heapq.heappop(self.later)[2]()
            timeout = max(0, self.later[0][0] - time.monotonic()) * self.second if self.later else None
            for fd, events in self.poller.poll(timeout):
                if fd in self.watched:  # an earlier event may have closed it
                    self.watched[fd](events)


class Side:
    """One end of a client's connection: what is to be sent to it, and the opposite end."""

    __slots__ = ("sock", "faults", "other", "out", "ended")

    def __init__(self, sock, faults):
        self.sock = sock
        self.faults = faults  # the switches, as they were when the client came
        self.other = None  # the opposite Side
        self.out = b""  # bytes that wait to be sent to this end
        self.ended = False  # nothing more is read from either end


class Fake:
    """One hostname on one port: the whole program, or one listener of a shared process."""

    def __init__(self, directory: str, hostname: str, port: int, loop: Loop | None = None):
        self.directory = directory
        self.hostname = hostname
        self.port = port
        self.loop = loop  # else run() makes one, after the descriptors of the start are recorded
        self.shared = loop is not None
        self.listener = None
        self.clients = set()  # the sockets of clients and of their far ends
        self.served = 0  # clients so far
        self.bytes = 0  # passed so far, both ways

    # -- the files -----------------------------------------------------------------------------

    def look_up(self, name: str, default):
        """This hostname's entry in a JSON file."""
        try:
            with open(os.path.join(self.directory, name)) as file:
                entries = from_json(file.read())
        except FileNotFoundError:
            return default
        return entries.get(self.hostname, entries.get("*", default))

    def faults(self) -> dict:
        """The switches of this hostname."""
        return self.look_up("faults.json", {})

    def write(self, name: str, **fields) -> None:
        """Append a line; O_APPEND keeps the lines of several processes apart."""
        fd = os.open(os.path.join(self.directory, name), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, to_json({"hostname": self.hostname, "pid": os.getpid(),
                              "time": time.monotonic(), **fields}).encode() + b"\n")
        os.close(fd)

    def earlier_starts(self) -> int:
        """How often this hostname has been started before."""
        with open(os.path.join(self.directory, "starts.jsonl")) as file:
            return sum(from_json(line)["hostname"] == self.hostname
                       for line in file if line.endswith("\n")) - 1  # the last line may be incomplete

    # -- the start -----------------------------------------------------------------------------

    def begin(self) -> dict:
        """Record the start, and act on the first switches.  Returns all of them."""
        fds, environment = open_fds(), own_environment()
        faults = self.faults()
        if faults.get("ignore_term"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        detached = self.detach() if faults.get("wrong_owner") else 0
        self.write("starts.jsonl", argv=sys.argv, environment=environment, fds=fds, port=self.port,
                   detached=detached)
        if "exit" in faults:
            os._exit(self.end(faults, faults["exit"]))
        return faults

    def run(self) -> int:
        """Serve one hostname as a process of its own.  Returns the exit code."""
        faults = self.begin()
        if faults.get("child_listens"):
            child = os.fork()
            if child:
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF
        log("info", "Start Websocket listener", host=f"127.0.0.1:{self.port}")  # as the real one, before it listens
        if faults.get("never_listen") or faults.get("wrong_owner"):
            keep = Socket()  # real programs hold sockets that do not listen
            signal.pause()
            keep.close()
        time.sleep(faults.get("listen_delay", 0) / 1000)
        if self.listen(faults):
            return self.taken()
        self.loop = Loop()
        self.serve(faults)
        self.loop.run()

    def open(self) -> None:
        """In a shared process: begin to listen, now or after `listen_delay`."""
        faults = self.begin()
        if not faults.get("never_listen"):
            self.loop.at(faults.get("listen_delay", 0), lambda: self.opened(faults))

    def opened(self, faults: dict) -> None:
        """In a shared process: listen, and report it."""
        error = self.listen(faults)
        if error:
            self.say_event("error", "cannot listen", "closed", error=error)
        else:
            self.say_event("info", f"listening for {self.hostname}", "listening")
            self.serve(faults)

    def say_event(self, level: str, message: str, event: str, **fields) -> None:
        """In a shared process: report an event of this listener."""
        log(level, message, event=event, listener=f"127.0.0.1:{self.port}", **fields)

    def listen(self, faults: dict) -> str:
        """Listen on the port.  Returns what went wrong, or ""."""
        if self.earlier_starts() < faults.get("in_use", 0):
            return "address already in use"
        try:
            port = 0 if faults.get("wrong_port") else self.port
            self.listener = Socket.listening(port, 4096)  # as Go does: what the kernel allows
        except OSError as error:
            return error.strerror.lower()
        return ""

    def close(self) -> None:
        """In a shared process: obey the order to close this listener."""
        for sock in (self.listener, *self.clients):
            if sock is not None:
                self.loop.watch(sock, 0, None)
                sock.close()
        self.say_event("info", f"closed {self.hostname}", "closed")

    def taken(self) -> int:
        """Say that the port is in use.  Returns the exit code."""
        error = f"listen tcp 127.0.0.1:{self.port}: bind: address already in use"
        log("error", "Error on Websocket listener", error=error)
        say(f"failed to start forwarding server: {error}")
        return 1

    def end(self, faults: dict, code: int) -> int:
        """Say the last words of the switch `words`.  Returns the exit code."""
        if "words" in faults:
            log("error", faults["words"])
        return code

    def detach(self) -> int:
        """Let a grandchild listen, which nobody can trace to us since its parent has ended.  Returns its pid."""
        reader, writer = os.pipe()
        if not os.fork():
            os.setsid()
            parent = os.getpid()
            if not os.fork():
                signal.alarm(DETACHED_LIFE)
                while os.getppid() == parent:  # until then it is a descendant of ours
                    time.sleep(0.001)
                self.listener = Socket.listening(self.port, 128)
                os.write(writer, str(os.getpid()).encode())
                for fd in (0, 1, 2, writer):
                    os.close(fd)
                signal.pause()
            os._exit(0)
        os.wait()
        pid = int(os.read(reader, 20))
        os.close(reader)
        os.close(writer)
        return pid

    # -- serving -------------------------------------------------------------------------------

    def serve(self, faults: dict) -> None:
        """Serve clients from now on, as the switches say."""
        if "exit_after" in faults:
            self.loop.at(faults["exit_after"], lambda: os._exit(self.end(faults, faults.get("code", 1))))
        if faults.get("stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        flood = b"x" * 1023 + b"\n"
        for _ in range(1024 * faults.get("flood", 0)):
            os.write(2, flood)
        self.loop.watch(self.listener, select.POLLIN, lambda _: self.accept())

    def accept(self) -> None:
        """Accept a client, and dial its far end."""
        client, peer = self.listener.accept()
        self.served += 1
        self.write("clients.jsonl", number=self.served)
        faults = self.faults()
        if faults.get("exit_on_client"):
            os._exit(self.end(faults, faults.get("code", 1)))
        if faults.get("login"):
            say("Please open the following URL and log in with your Cloudflare account:\n\n"
                f"https://{self.hostname}/cdn-cgi/access/cli\n\n"
                "Leave cloudflared running to download the token automatically.")
        if faults.get("login") or faults.get("hang"):
            self.clients.add(client)
            return
        error = faults.get("error", "websocket: bad handshake")
        address = self.look_up("far.json", None)
        refuse = faults.get("refuse", 0)
        far = None
        if address is not None and refuse is not True and self.served > refuse:
            try:
                far = Socket.connected(tuple(address))
            except OSError as failure:
                if "error" not in faults:
                    error = f"dial tcp: {failure.strerror}"
        if far is None:
            message = "failed to connect to origin"
            if self.shared:
                self.say_event("error", message, "failed", client=f"{peer[0]}:{peer[1]}", error=error,
                               reason=faults.get("reason", "down"))
            else:
                log("error", message, error=error, originURL=f"https://{self.hostname}")
            client.close()
            return
        ends = Side(client, faults), Side(far, faults)
        ends[0].other, ends[1].other = ends[1], ends[0]
        for side in ends:
            side.sock.setblocking(False)
            side.sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
            self.clients.add(side.sock)
            self.rewatch(side)

    def rewatch(self, side: Side) -> None:
        """Read from an end if nothing waits for the other one; write to it if something waits for it."""
        reads = select.POLLIN if not side.ended and not side.other.out else 0
        events = reads | (select.POLLOUT if side.out else 0)
        self.loop.watch(side.sock, events, lambda events: self.on_side(side, events))

    def on_side(self, side: Side, events: int) -> None:
        """One end can be read, or written."""
        if events & ~select.POLLIN:  # an error is found out by what is tried then
            self.send(side)
        if events & ~select.POLLOUT and side.sock.fileno() >= 0 and not side.ended:
            self.receive(side)

    def receive(self, side: Side) -> None:
        """Pass on bytes of one end.  When it ends, both are closed."""
        try:
            data = side.sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # as the real one: no half-close.  Bytes for the other end are still sent, then both are closed
            side.ended = side.other.ended = True
            side.out = b""
        side.other.out += data
        self.send(side.other)
        self.bytes += len(data)
        if 0 < side.faults.get("exit_after_bytes", 0) <= self.bytes:
            os._exit(self.end(side.faults, side.faults.get("code", 1)))

    def send(self, side: Side) -> None:
        """Send bytes that wait for this end; then read on from the other one, or close both."""
        try:
            side.out = side.out[side.sock.send(side.out, NO_SIGNAL):] if side.out else b""
        except BlockingIOError:
            pass
        except OSError:
            side.out = b""
            side.ended = side.other.ended = True
        over = side.ended and not side.out and not side.other.out
        for end in (side, side.other):
            if over:
                self.loop.watch(end.sock, 0, None)
                self.clients.discard(end.sock)
                end.sock.close()
            else:
                self.rewatch(end)


class Forwarders:
    """A shared process, which opens and closes listeners as its stdin says."""

    def __init__(self, directory: str):
        self.directory = directory
        self.loop = Loop()
        self.fakes = {}  # the Fake of each listener, by its address
        self.part = b""  # a line that is not complete
        self.loop.watch(sys.stdin, select.POLLIN, lambda _: self.hear())

    def hear(self) -> None:
        """Obey the lines on stdin; when stdin ends, the process ends."""
        data = os.read(0, 65536)
        if not data:
            os._exit(0)
        *lines, self.part = (self.part + data).split(b"\n")
        for line in lines:
            order, listener, *hostname = line.decode().split()
            if order == "listen":
                port = int(listener.removeprefix("127.0.0.1:"))
                self.fakes[listener] = Fake(self.directory, *hostname, port, self.loop)
                self.fakes[listener].open()
            elif not self.fakes[listener].faults().get("ignore_close"):
                self.fakes.pop(listener).close()


def main() -> int:
    """The command lines of `cloudflared access tcp` and of a carrier, and their exit codes."""
    for number in (signal.SIGPIPE, signal.SIGINT):  # the real program dies of these two; Python would handle them
        signal.signal(number, signal.SIG_DFL)
    words = sys.argv[1:]
    directory = os.path.dirname(os.path.abspath(sys.argv[0]))
    if words in (["--version"], ["version"]):
        print("cloudflared version 2026.8.2 (stand-in)")
        return 0
    if words == ["forwarders"]:
        Forwarders(directory).loop.run()
    if words[:2] != ["access", "tcp"]:
        say("stand-in: the real program would start a tunnel to the internet now")
        return 99
    options = parse_words(words[2:])
    if options is None or not options.get("hostname"):
        print(HELP)
        return 0
    host, _, port = options.get("url", "").removeprefix("tcp://").rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        say("failed to start forwarding server: bad --url")
        return 1
    return Fake(directory, options["hostname"], int(port)).run()


if __name__ == "__main__":
    sys.exit(main())
