"""Ports for programs that must be told one: below the range from which the kernel takes those it chooses itself.

A port that was bound to 0 and let go is in that range: before the program binds it, the kernel may give it to any
connection of another test.  These here are tried at all addresses and without SO_REUSEADDR, so none is held, by anybody,
nor in TIME_WAIT.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator

SINGLE_FIRST, SINGLE_COUNT = 7000, 3000  # behind those which chromium refuses, and before the blocks
BLOCK = 32  # ports per block
TUNNELS = range(20000, 20101)  # the default of --ports: settings that name one of these for something else are refused
BLOCKS_FIRST, BLOCKS_COUNT = 10112, 677  # blocks from port 10112 to 31775
_counts: dict[int, itertools.count[int]] = {}  # by process: a fork goes its own way


def _numbers() -> Iterator[int]:
    """The numbers of this process, which others begin elsewhere."""
    return _counts.setdefault(os.getpid(), itertools.count(os.getpid() * 37))


def is_free(port: int) -> bool:
    """Whether nobody holds it, at any address, in TCP or in UDP."""
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        try:
            tcp.bind(("", port))
            udp.bind(("", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port for TCP and UDP that nobody holds; not the same again for a long while."""
    ports = (SINGLE_FIRST + number % SINGLE_COUNT for number in itertools.islice(_numbers(), SINGLE_COUNT))
    return next(filter(is_free, ports))


@contextlib.contextmanager
def free_block(count: int = 20) -> Iterator[tuple[int, int]]:
    """The first and the last of `count` consecutive ports that nobody holds.

    Each has blocks of its own, also where several test runs go on at once: a UDP socket on a block's first port marks it
    as taken until the end.
    """
    blocks = -(-count // BLOCK)
    for number in itertools.islice(_numbers(), BLOCKS_COUNT):
        first = BLOCKS_FIRST + BLOCK * (number % (BLOCKS_COUNT - blocks))
        with contextlib.ExitStack() as marks:
            whole = range(first, first + blocks * BLOCK)
            if set(whole) & set(TUNNELS) or not all(map(is_free, whole)):
                continue
            try:
                for port in range(first, first + blocks * BLOCK, BLOCK):
                    marks.enter_context(socket.socket(type=socket.SOCK_DGRAM)).bind(("", port))
            except OSError:
                continue  # another run was quicker
            yield first, first + count - 1
            return
    raise AssertionError("no free block of ports")
