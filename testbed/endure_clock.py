"""endure_clock: run a program whose wall clock can be put forward or back from outside.

    python3 testbed/endure_clock.py FILE PROGRAM ARGUMENT ...

FILE holds a double, in seconds: what time.time() and its like add to the host's clock, as they are asked.  `Clock` is
the side that changes it.  time.monotonic() stays as it is, as it does when a host's clock is set.
"""

from __future__ import annotations

import mmap
import pathlib
import runpy
import struct
import sys
import time

OFFSET = struct.Struct("d")


class Clock:
    """The offset in a file, which programs read while they run."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        path.write_bytes(OFFSET.pack(0.0))

    def put(self, seconds: float) -> None:
        """From now on, the wall clock is so many seconds ahead of the host's."""
        with open(self.path, "r+b") as file:
            file.write(OFFSET.pack(seconds))


def follow(path: str) -> None:
    """Let this process have the clock of the file."""
    with open(path, "r+b") as file:
        kept = mmap.mmap(file.fileno(), OFFSET.size, access=mmap.ACCESS_READ)
    real, in_ns, formatted = time.time, time.time_ns, time.strftime
    zones = {name: getattr(time, name) for name in ("gmtime", "localtime", "ctime")}

    def now() -> float:
        return real() + OFFSET.unpack_from(kept)[0]

    time.time = now
    time.time_ns = lambda: in_ns() + int(OFFSET.unpack_from(kept)[0] * 1e9)
    for name, asked in zones.items():
        setattr(time, name, lambda seconds=None, asked=asked: asked(now() if seconds is None else seconds))
    time.strftime = lambda form, *when: formatted(form, *(when or (time.localtime(),)))


def main() -> None:
    """The command line."""
    follow(sys.argv[1])
    del sys.argv[:2]
    sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
