"""A process that has imported the stand-ins, and forks one for each test: they are there in milliseconds.

To start Python and to import asyncio and ssl takes a tenth of a second of a processor, and there are 200 stand-ins.
Each is a process of its own all the same, with the modules as they are after their import: nothing is ever run here.
It reads orders from its standard input, a socket of whole messages: the module and its words in JSON, with the
descriptors that are to be its standard streams.  It answers with the process, and a descriptor of it (pidfd_open(2)).

The test's side is `Nursery` in standins.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys

import fake_cluster
import fake_edge

MODULES = {"fake_cluster": fake_cluster, "fake_edge": fake_edge}


def main() -> None:
    """Serve orders until there are no more; each child returns from here, and runs what it was made for."""
    orders = socket.socket(fileno=0)
    while True:
        order, fds, *_ = socket.recv_fds(orders, 65536, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # bury those that have ended since the last order
        if not order:
            return
        module, *words = json.loads(order)
        pid = os.fork()
        if not pid:
            break
        pidfd = os.pidfd_open(pid)
        socket.send_fds(orders, [str(pid).encode()], [pidfd])
        for fd in (*fds, pidfd):
            os.close(fd)
    orders.detach()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    sys.argv = [f"{module}.py", *words]
    MODULES[module].main()
