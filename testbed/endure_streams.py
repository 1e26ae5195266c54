"""endure_streams: checked bytes, for testbed/endure.py: a backend, and clients, each a process of its own.

    python3 -m testbed.endure_streams backend SHELVES      prints the ports it listens on; runs until its stdin ends
    python3 -m testbed.endure_streams clients ORDERS       ORDERS is JSON, see `run_clients`; prints what came of it

The position of a byte determines its value: both sides know PATTERN, and a stream begins somewhere in it.  So a byte
that is lost, repeated, changed or another connection's shows, and to check costs one memcmp() for each read.

    client   [SSLRequest] hello  Opening              `size_up` bytes of the pattern   [end]
    backend  [S]                                      `size_down` bytes of the pattern, DONE and the count   end

Both directions go on at once, in writes of random sizes.  The Opening says what both sides are to do: how much, how
slowly, who ends how; and the checksum of the hello before it, which has to be the one that was sent.  A backend has
several ports, "shelves": an Opening names the shelf it is meant for, so that a connection that was led elsewhere shows.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import select
import socket
import struct
import sys
import threading
import time
import zlib
from typing import Any, Callable, NamedTuple

from sniroute_wire import SSL_REQUEST_BYTES
from testbed.hellos import genuine, hello, named

HOST = "127.0.0.1"
Address = tuple[str, int]

PERIOD = (1 << 20) + 7  # a prime: no size of a buffer or of a read divides it
WRITE_MAX = 1 << 20  # bytes of one write at most
READ_MAX = 1 << 18
SLOW_READ, SLOW_PAUSE = 1 << 16, 0.004  # a slow reader: bytes at a time, and seconds between two reads
PATTERN = random.Random(20261129).randbytes(PERIOD)
PATTERN += PATTERN[:WRITE_MAX]  # so that no write has to be put together
VIEW = memoryview(PATTERN)
SILENCE = 120  # seconds without a byte after which a stream has failed: far more than a busy host needs

MAGIC, DONE = b"flow", b"done"
# What a backend does with a stream, as a client asks for it.
SERVE, RESET, STALL, LEAVE = range(4)  # serve it; after some bytes down: break off, fall silent, end without reading
ENDS_FIRST = 1  # flag: the client ends its direction when it has sent all; else only when all has come
SLOW_BACKEND, SLOW_CLIENT = 2, 4  # flags: this side reads slowly
# Flag: the backend sends all at once, and ends its direction; only then the client sends.  Not through a tunnel, which
# has no half-close.  The client does not hear whether its bytes have come: a backend that lacks some says it is wrong.
BACKEND_ENDS_FIRST = 8
SLICED = 16  # flag: both sides write 1 to SLICE_MAX bytes at a time, as far as SLICED_MAX
EARLY = 32  # flag: the client's first bytes, EARLY_MAX at most, are in one write with the hello
SHUT_BACKEND, SHUT_CLIENT = 64, 128  # flags: this side has a window of zero for SHUT_TIME; `SHUT_SIZE` bytes fill it
SLICE_MAX, SLICED_MAX = 1400, 1 << 18
EARLY_MAX = 1 << 15
SHUT_TIME = 0.3  # seconds: TCP asks again after 0.2
SHUT_SIZE = 1 << 23  # bytes of a direction, so that it stops: more than the kernel keeps for both sockets on the way


class Opening(NamedTuple):
    """The first bytes behind the hello."""

    manner: int = SERVE
    flags: int = 0
    shelf: int = 0
    hello: int = 0  # the CRC-32 of the hello
    seed: int = 0  # of the sizes of writes
    start_up: int = 0  # where in the pattern the stream up begins
    size_up: int = 0
    start_down: int = 0
    size_down: int = 0
    cut: int = 0  # bytes down after which the manner applies

    def packed(self) -> bytes:
        """As it is sent."""
        return MAGIC + OPENING.pack(*self)


OPENING = struct.Struct("!BBHLLLQLQQ")
TRAILER = struct.Struct("!4sQ")


class Wrong(Exception):
    """Bytes that nobody has sent: a fault of the product.  The message says which."""


class Refused(Wrong):
    """An alert instead of the first byte: the router has refused the client."""


class Cut(Exception):
    """The stream ended early.  The message says where."""


def bounded(sock: socket.socket) -> None:
    """Let reads and writes fail after SILENCE.  Not by settimeout(), which costs a poll() for each call."""
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", SILENCE, 0))


def broken_off(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def exactly(sock: socket.socket, count: int) -> bytes:
    """`count` bytes, or fewer where the peer has ended."""
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def log_uniform(rng: random.Random, most: int) -> int:
    """A size from 1 to `most`; each order of magnitude is as likely as the next."""
    return int(2 ** rng.uniform(0, most.bit_length() - 1))


def send_pattern(sock: socket.socket, start: int, size: int, rng: random.Random, flags: int = 0, sent: int = 0) -> None:
    """Send `size` bytes of the pattern from position `start` on, in writes of 1 byte to 1 MiB; so many are `sent`."""
    while sent < size:
        at = (start + sent) % PERIOD
        count = rng.randint(1, SLICE_MAX) if flags & SLICED and sent < SLICED_MAX else log_uniform(rng, WRITE_MAX)
        count = min(count, size - sent)
        sock.sendall(VIEW[at:at + count])
        sent += count


def read_pattern(sock: socket.socket, start: int, size: int, slow: bool, shut: bool = False) -> None:
    """Read `size` bytes, and check each.  Raises Wrong or Cut."""
    if shut:
        time.sleep(SHUT_TIME)  # who reads nothing has a small buffer, which is full soon
    space = memoryview(bytearray(SLOW_READ if slow else READ_MAX))
    taken = 0
    while taken < size:
        count = sock.recv_into(space[:min(len(space), size - taken)])
        if not count:
            raise Cut(f"after {taken} of {size} bytes")
        if not PATTERN.startswith(space[:count], (start + taken) % PERIOD):
            if not taken and space[:2] == b"\x15\x03":  # RFC 8446, section 5.1
                raise Refused("an alert")
            raise Wrong(f"a wrong byte within {count} behind {taken} of {size} that began at {start}")
        taken += count
        if slow:
            time.sleep(SLOW_PAUSE)


# -- the backend -------------------------------------------------------------------------------


def receive_opening(sock: socket.socket, shelf: int) -> Opening | None:
    """Read the hello and the Opening, and check both.  None: the client has left before.  Raises Wrong."""
    head = exactly(sock, 5)
    if head == SSL_REQUEST_BYTES[:5]:
        if exactly(sock, 3) != SSL_REQUEST_BYTES[5:]:
            return None
        sock.sendall(b"S")
        head = exactly(sock, 5)
    if len(head) < 5:
        return None
    if head[:2] != b"\x16\x03":
        raise Wrong(f"a stream to shelf {shelf} that begins with {head!r}")
    wire = head + exactly(sock, int.from_bytes(head[3:5], "big"))
    words = exactly(sock, len(MAGIC) + OPENING.size)
    if len(words) < len(MAGIC) + OPENING.size:
        return None
    if not words.startswith(MAGIC):
        raise Wrong(f"behind the hello comes {words[:16]!r}")
    opening = Opening(*OPENING.unpack(words[len(MAGIC):]))
    if opening.hello != zlib.crc32(wire):
        raise Wrong(f"a hello of {len(wire)} bytes that was not sent like this")
    if opening.shelf != shelf:
        raise Wrong(f"a stream for shelf {opening.shelf} came to {shelf}")
    return opening


def send_down(sock: socket.socket, opening: Opening, heard: threading.Event) -> None:
    """The backend's direction down, in a thread of its own."""
    rng = random.Random(opening.seed ^ 1)
    size = opening.size_down if opening.manner == SERVE else min(opening.cut, opening.size_down)
    with contextlib.suppress(OSError):
        send_pattern(sock, opening.start_down, size, rng, opening.flags)
        if opening.manner == SERVE and (opening.flags & BACKEND_ENDS_FIRST or heard.wait(SILENCE)):
            sock.sendall(TRAILER.pack(DONE, opening.size_up))
        if opening.flags & BACKEND_ENDS_FIRST:
            sock.shutdown(socket.SHUT_WR)


def serve_stream(sock: socket.socket, shelf: int) -> None:
    """One connection of the backend.  Raises Wrong; a client that leaves early is no fault of the backend's."""
    opening = receive_opening(sock, shelf)
    if opening is None:
        return
    if opening.manner != SERVE:
        send_down(sock, opening, threading.Event())
        if opening.manner == RESET:
            broken_off(sock)
        elif opening.manner == STALL:
            poll = select.poll()
            poll.register(sock, select.POLLRDHUP)  # not to read is a part of it
            poll.poll(SILENCE * 1000)
        return
    heard = threading.Event()
    sender = threading.Thread(target=send_down, args=(sock, opening, heard), daemon=True)
    sender.start()
    try:
        read_pattern(sock, opening.start_up, opening.size_up, bool(opening.flags & SLOW_BACKEND),
                     bool(opening.flags & SHUT_BACKEND))
        heard.set()
        if opening.flags & (ENDS_FIRST | BACKEND_ENDS_FIRST) and sock.recv(1):
            raise Wrong(f"a byte too many behind {opening.size_up}")
    except (Cut, OSError) as fault:
        if opening.flags & BACKEND_ENDS_FIRST:
            raise Wrong(f"a stream that was cut {fault}, behind an end of its own: {opening}") from None
        raise
    finally:
        if not heard.is_set():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # ends the sender, too
            heard.set()
        sender.join()
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
    if sock.recv(1):
        raise Wrong(f"a byte too many behind {opening.size_up}")


def echo(sock: socket.socket, shelf: int) -> None:
    """Send everything back, whatever it is; SSLRequest is answered."""
    data = sock.recv(65536)
    if data.startswith(SSL_REQUEST_BYTES):
        sock.sendall(b"S")
        data = data[8:] or sock.recv(65536)
    while data:
        sock.sendall(data)
        data = sock.recv(65536)


def run_backend(shelves: int) -> int:
    """Listen on so many shelves, and on one more port that echoes.  A line `wrong: ...` for each fault."""
    def attend(listener: socket.socket, shelf: int, handler: Callable[[socket.socket, int], None]) -> None:
        while True:
            with contextlib.suppress(OSError):  # that client is gone, or descriptors are short for a moment
                sock = listener.accept()[0]
                threading.Thread(target=serve, args=(sock, shelf, handler), daemon=True).start()

    def serve(sock: socket.socket, shelf: int, handler: Callable[[socket.socket, int], None]) -> None:
        bounded(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock:
            try:
                handler(sock, shelf)
            except Wrong as fault:
                print(f"wrong: the backend has {fault}", flush=True)
            except (OSError, Cut):
                pass  # the client knows

    listeners = [socket.create_server((HOST, 0), backlog=1024) for _ in range(shelves + 1)]
    for shelf, listener in enumerate(listeners):
        threading.Thread(target=attend, args=(listener, shelf, serve_stream if shelf < shelves else echo),
                         daemon=True).start()
    print(json.dumps([listener.getsockname()[1] for listener in listeners]), flush=True)
    sys.stdin.read()
    return 0


# -- clients -----------------------------------------------------------------------------------


def hello_for(name: str, rng: random.Random) -> bytes:
    """A hello that asks for `name`: OpenSSL's, or one that is built."""
    return genuine(name=name) if rng.random() < 0.5 else hello(named(name.encode()))


def early_of(opening: Opening) -> int:
    """How many bytes up are in the write of the hello."""
    return min(EARLY_MAX, opening.size_up) if opening.flags & EARLY else 0


def open_stream(sock: socket.socket, wire: bytes, opening: Opening, preface: bytes = b"") -> None:
    """Say the preface, the hello and the Opening, and with EARLY what fits behind it.

    Raises Cut where SSLRequest, as a preface, is not answered S.
    """
    words = wire + opening._replace(hello=zlib.crc32(wire)).packed()
    words += VIEW[opening.start_up:opening.start_up + early_of(opening)]
    if preface == SSL_REQUEST_BYTES:
        sock.sendall(preface)
        if (said := exactly(sock, 1)) != b"S":
            raise Cut(f"SSLRequest is answered {said!r}")
        preface = b""
    sock.sendall(preface + words)


def pass_stream(sock: socket.socket, opening: Opening, at_once: bool = True) -> None:
    """Both directions of a stream that was opened, `at_once` or one after the other.  Raises Wrong, Cut, OSError."""
    def send_up() -> None:
        with contextlib.suppress(OSError):  # the reader sees it, too
            send_pattern(sock, opening.start_up, opening.size_up, random.Random(opening.seed), opening.flags,
                         early_of(opening))
            if opening.flags & (ENDS_FIRST | BACKEND_ENDS_FIRST):
                sock.shutdown(socket.SHUT_WR)

    sender = None
    if opening.flags & BACKEND_ENDS_FIRST:
        pass  # its turn comes behind the backend's end
    elif at_once:
        sender = threading.Thread(target=send_up, daemon=True)
        sender.start()
    else:
        send_up()
    try:
        read_pattern(sock, opening.start_down, opening.size_down, bool(opening.flags & SLOW_CLIENT),
                     bool(opening.flags & SHUT_CLIENT))
        trailer = exactly(sock, TRAILER.size)
        if len(trailer) < TRAILER.size:
            raise Cut(f"behind {opening.size_down} bytes")
        if TRAILER.unpack(trailer) != (DONE, opening.size_up):
            raise Wrong(f"the end of a stream is {trailer!r}")
    except BaseException:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # ends the sender, too
        raise
    finally:
        if sender is not None:
            sender.join()
    if not opening.flags & (ENDS_FIRST | BACKEND_ENDS_FIRST):
        with contextlib.suppress(OSError):  # a tunnel has no half-close: it has ended both directions
            sock.shutdown(socket.SHUT_WR)
    if sock.recv(1):
        raise Wrong(f"a byte too many behind {opening.size_down}")
    if opening.flags & BACKEND_ENDS_FIRST:
        send_up()


class Share:
    """What is left to do for all clients of a process."""

    def __init__(self, orders: dict[str, Any]):
        self.orders = orders
        self.rng = random.Random(orders["seed"])
        self.lock = threading.Lock()  # guards what follows
        self.left: int = orders["bytes"]
        # "bytes": as the router counts them, with what goes before and behind those of the pattern.
        self.report = {"connections": 0, "served": 0, "up": 0, "down": 0, "bytes up": 0, "bytes down": 0, "wrong": []}

    def next(self) -> tuple[Opening, str, bytes] | None:
        """What the next client does: its Opening, its name, and its hello."""
        orders, rng = self.orders, self.rng
        with self.lock:
            if self.left <= 0 or self.report["wrong"]:
                return None
            flags = rng.choice((0, ENDS_FIRST, ENDS_FIRST, BACKEND_ENDS_FIRST)) if orders["ends_first"] else 0
            flags |= rng.choice((0, 0, 0, SLICED, EARLY, SLICED | EARLY))
            slow = rng.choice((0, 0, 0, 0, 0, 0, SLOW_BACKEND, SLOW_CLIENT)) if not orders["all_slow"] \
                else SLOW_BACKEND | SLOW_CLIENT
            flags |= slow
            most = min(orders["largest"], self.left) // (8 if slow else 1) + 1
            up, down = (most if orders["all_slow"] else log_uniform(rng, most) for _ in range(2))
            self.left -= up + down
            shelf = rng.randrange(len(orders["names"]))
            name = orders["names"][shelf]
            return Opening(SERVE, flags, shelf, 0, rng.randrange(1 << 32), rng.randrange(PERIOD), up,
                           rng.randrange(PERIOD), down), name, hello_for(name, rng)

    def work(self) -> None:
        """One client after another."""
        while (turn := self.next()) is not None:
            opening, name, wire = turn
            try:
                with socket.create_connection(tuple(self.orders["address"])) as sock:
                    bounded(sock)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    open_stream(sock, wire, opening)
                    pass_stream(sock, opening)
            except (Wrong, Cut, OSError) as fault:
                with self.lock:
                    self.report["wrong"].append(f"a client of {name}: {fault or type(fault).__name__}: {opening}")
                return
            with self.lock:
                self.report["connections"] += 1
                self.report["up"] += opening.size_up
                self.report["down"] += opening.size_down
                self.report["served"] += 1
                self.report["bytes up"] += len(wire) + len(opening.packed()) + opening.size_up
                self.report["bytes down"] += opening.size_down + TRAILER.size


def run_clients(orders: dict[str, Any]) -> int:
    """Carry so many bytes, and check each.

    Orders: address, of the router; names, one for each shelf; bytes, both directions added; largest, of a direction;
    at_once, connections; ends_first, whether one side may end its direction first; all_slow, whether all
    of them read slowly, on both sides, and carry an eighth of `largest` each way; seed.
    """
    share = Share(orders)
    workers = [threading.Thread(target=share.work) for _ in range(orders["at_once"])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(json.dumps(share.report), flush=True)
    return 0


def main(words: list[str]) -> int:
    """The command line."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    what, given = words
    return run_backend(int(given)) if what == "backend" else run_clients(json.loads(given))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
