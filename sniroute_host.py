"""sniroute_host: what this host allows a process.

    descriptors    how many there may be; 0 to 2 are never a client's

Threads: main, at the start.

Seams: I want to ...
    derive a setting from the host     a function here, and `derived` of sniroute_settings

This room imports the standard library only.
"""

from __future__ import annotations

import os
import resource

__version__ = "0.1.0"


def open_standard_streams() -> None:
    """Open those of descriptors 0 to 2 that are closed: else a socket would get the number, and the log with it."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def descriptor_limits() -> tuple[int, int]:
    """How many descriptors this process may have now, and at most; a million where there is no limit."""
    return tuple(1 << 20 if limit == resource.RLIM_INFINITY else limit
                 for limit in resource.getrlimit(resource.RLIMIT_NOFILE))


def raise_descriptor_limit() -> None:
    """Allow as many as there may be: a connection takes two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass  # macOS has a lower limit of its own; a sandbox may forbid it
