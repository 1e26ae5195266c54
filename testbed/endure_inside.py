"""endure_inside: runs a program with a hand inside, which turns its wall clock and its log; for testbed/endure.py.

    python3 testbed/endure_inside.py sniroute.py -c FILE ...       its stdin has orders, a line each, until it ends:

    clock SECONDS     the wall clock jumps, to so many seconds from the right time; the monotonic clock does not
    log PATH          what is written to stderr goes there from now on: /dev/full is a disk without room
    log               it goes where it went at first

A thread waits for orders.  The program has stdin from /dev/null, and its children have nothing of all this.
"""

import os
import runpy
import sys
import threading
import time


class Hand:
    """What has been taken in hand."""

    def __init__(self) -> None:
        self.ahead = 0.0  # seconds, of the wall clock
        self.orders = os.fdopen(os.dup(0))  # no child inherits it
        self.stderr = os.dup(2)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        real, real_ns = time.time, time.time_ns
        time.time = lambda: real() + self.ahead
        time.time_ns = lambda: real_ns() + int(self.ahead * 1e9)
        threading.Thread(target=self.obey, name="hand", daemon=True).start()

    def obey(self) -> None:
        """Do what the lines say."""
        for line in self.orders:
            what, *given = line.split()
            if what == "clock":
                self.ahead = float(*given)
            elif given:
                fd = os.open(given[0], os.O_WRONLY | os.O_APPEND)
                os.dup2(fd, 2)
                os.close(fd)
            else:
                os.dup2(self.stderr, 2)


if __name__ == "__main__":
    Hand()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
