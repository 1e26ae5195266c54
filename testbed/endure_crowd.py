"""endure_crowd: clients that come again and again, for the parts of testbed/endure.py that end routers.

    Crowd           threads of clients, each client with a small checked stream
    prepare_crowd   five names for it: two behind `tcp:`, three behind tunnels

Each stream is checked to the last byte (endure_streams).  One that ends early is counted (`broken`): the router may be
killed in that moment.  A byte that nobody has sent is a problem, whatever else happens.
"""

from __future__ import annotations

import collections
import random
import socket
import threading
import time
from typing import Callable, Sequence

from sniroute_wire import SSL_REQUEST_BYTES
from testbed.endure_router import HOST, Backend, Folder
from testbed.endure_streams import (ENDS_FIRST, PERIOD, Cut, Opening, Refused, Wrong, bounded, hello_for,
                                    log_uniform, open_stream, pass_stream)


class Crowd:
    """Clients that come again and again, each with a small checked stream.

    The shelves of `names` are those of the backend in this order, or `shelves`.

    Only behind `tcp:` a client may end first: a tunnel has no half-close, and who ends before a backend has answered
    SSLRequest has left, for the router (`client_left`).
    """

    def __init__(self, folder: Folder, names: Sequence[str], seed: int, at_once: int = 6,
                 shelves: Sequence[int] | None = None, pause: float = 0.005):
        self.folder = folder
        self.names = names
        self.shelves = range(len(names)) if shelves is None else shelves
        self.may_be_refused: Callable[[str], bool] = lambda name: False
        self.pause = pause  # seconds between two clients of a thread
        self.stopping = threading.Event()
        self.going = threading.Event()  # cleared: nobody comes for now
        self.going.set()
        self.lock = threading.Lock()  # guards what follows
        self.served = 0
        self.by_name: collections.Counter[str] = collections.Counter()  # the same, for each name
        self.problems: list[str] = []  # wrong bytes: never allowed
        self.broken: collections.Counter[str] = collections.Counter()  # streams that ended early, and how
        self.threads = [threading.Thread(target=self.come_again, args=(random.Random(f"{seed} {number}"),),
                                         name="crowd") for number in range(at_once)]

    def __enter__(self) -> Crowd:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End, and wait for it.  A second call does nothing."""
        self.stopping.set()
        self.going.set()
        for thread in self.threads:
            thread.join()

    def come_again(self, rng: random.Random) -> None:
        """A thread's clients."""
        while not self.stopping.is_set():
            at = rng.randrange(len(self.names))
            name, shelf = self.names[at], self.shelves[at]
            fault, wrong = "", False
            try:
                stream(self.folder, name, shelf, rng)
            except Wrong as error:
                fault, wrong = f"{name}: {error}", not (isinstance(error, Refused) and self.may_be_refused(name))
            except (Cut, OSError) as error:
                fault = f"{name}: {type(error).__name__} {error}"
            with self.lock:
                self.served += not fault
                self.by_name[name] += not fault
                if wrong:
                    self.problems.append(f"a client of {fault}")
                elif fault:
                    self.broken[fault] += 1
            time.sleep(self.pause if not fault else 0.05)
            self.going.wait()


def stream(folder: Folder, name: str, shelf: int, rng: random.Random, size: int = 1 << 16) -> None:
    """One small checked stream of `name`, to its end.  Raises Wrong, Cut, OSError."""
    flags = ENDS_FIRST if name == "tcp.example.test" and rng.random() < 0.5 else 0
    opening = Opening(flags=flags, shelf=shelf, seed=rng.randrange(1 << 32),
                      start_up=rng.randrange(PERIOD), size_up=log_uniform(rng, size),
                      start_down=rng.randrange(PERIOD), size_down=log_uniform(rng, size))
    with socket.create_connection(folder.listen) as sock:
        bounded(sock)
        open_stream(sock, hello_for(name, rng), opening, SSL_REQUEST_BYTES if "pg" in name else b"")
        pass_stream(sock, opening, at_once=False)


CROWD = ["tcp.example.test", "tcp-pg.example.test", "t1.example.test", "t2.example.test", "t3.example.test"]


def prepare_crowd(folder: Folder, backend: Backend) -> None:
    """Write settings by which the names of CROWD lead to their shelves: two at once, three through tunnels."""
    rows = [f'"{name}" = "tcp:{HOST}:{port}"' for name, port in zip(CROWD, backend.shelves[:2])]
    folder.write_settings("\n".join([*rows, '"*.example.test" = "cloudflared:{name}"']),
                          f'cloudflared = "{folder.cloudflared}"')
    for name, port in zip(CROWD[2:], backend.shelves[2:]):
        folder.set("far.json", name, [HOST, port])
