"""A process that has imported programs, and forks one for each test: they are there in milliseconds.

To start Python and to import what a program needs takes a tenth of a second of a processor, and there are hundreds of
starts.  Each is a process of its own all the same, with the modules as they are after their import: nothing is ever
run here.  It reads orders from its standard input, a socket of whole messages: JSON, with the descriptors that are to
be the standard streams.

    module    whose main() is the program; one that was imported at the start
    words     its command line: sys.argv
    prepare   statements that run first
    environ   all its variables, or null: those of this process
    cwd       its working directory, or null
    child     whether it is to be a child of the test's process, which asks for its exit code

It answers with the process, and a descriptor of it (pidfd_open(2)).  A child of the test's process is a grandchild of
this one whose parent ends at once: the test's process has said that it takes orphans (PR_SET_CHILD_SUBREAPER, prctl(2)).

The test's side is `Nursery` in standins.py.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import socket
import sys


def fork_orphan() -> int:
    """Fork a grandchild whose parent has ended.  Returns 0 in it, and its process here."""
    reader, writer = os.pipe()
    if not (between := os.fork()):
        if pid := os.fork():
            os.write(writer, str(pid).encode())
            os._exit(0)
    os.close(writer)
    if between:
        os.waitpid(between, 0)
        pid = int(os.read(reader, 64))
    os.close(reader)
    return pid


def main(*modules: str) -> None:
    """Serve orders until there are no more; each child returns from here, and runs what it was made for."""
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # a collection in a child need not look at, and so copy, what all have
    orders = socket.socket(fileno=0)
    while True:
        text, fds, *_ = socket.recv_fds(orders, 1 << 17, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # bury those that have ended since the last order
        if not text:
            return
        order = json.loads(text)
        pid = fork_orphan() if order["child"] else os.fork()
        if not pid:
            break
        pidfd = os.pidfd_open(pid)
        socket.send_fds(orders, [str(pid).encode()], [pidfd])
        for fd in (*fds, pidfd):
            os.close(fd)
    gc.unfreeze()
    orders.detach()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    if order["environ"] is not None:
        os.environ.clear()
        os.environ.update(order["environ"])
    if order["cwd"] is not None:
        os.chdir(order["cwd"])
    sys.argv = order["words"]
    exec(order["prepare"], {})
    sys.exit(sys.modules[order["module"]].main())
