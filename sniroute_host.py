"""sniroute_host: what this host allows a process.

    descriptors    how many there may be; 0 to 2 are never a client's
    files          who else may change one that we run, or whose settings we follow

Threads: main, at the start; `changed_by_others` also the reaper, before it starts a program.

Seams: I want to ...
    derive a setting from the host     a function here, and `derived` of sniroute_settings
    trust somebody else, too           `changed_by_others`, ROOTS_GROUPS

This room imports the standard library only.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import sys

__version__ = "0.1.0"

PATHS_MAX = 1000  # characters of a sentence about a file: it names paths three times
ROOTS_GROUPS = frozenset((0, 80) if sys.platform == "darwin" else (0,))  # wheel or root, and admin in macOS
LINKS_MAX = 40  # symlinks in one path: what the kernel follows (path_resolution(7))


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


# -- files -------------------------------------------------------------------------------------


def changed_by_others(path: str) -> str:
    """Why another user may change what `path` names, and what to do, as the end of a sentence; '' where nobody may.

    The file, each folder above it, each symlink on the way and all that they lead through have to belong to root or to
    this user, and to be writable by nobody else.  What is in a sticky folder (as /tmp) only its owner can replace.
    A group may write where it is root's (in macOS admin's, whose members may become root), or this user's own: its
    number is the user's, as Debian and Fedora make them.  Whoever owns `/` counts as root: in a user namespace root may
    have another number.
    Raises OSError where there is no such file.
    """
    here, links = "/", 0
    state = os.lstat(here)
    trusted = {0, os.geteuid(), state.st_uid}
    fault = fault_of(here, state, trusted)
    rest = (path if path.startswith("/") else os.path.join(os.getcwd(), path)).split("/")[::-1]
    while rest and not fault:
        name = rest.pop()
        if name in ("", "."):
            continue
        if name == "..":  # of where the symlinks before it have led
            here = os.path.dirname(here)
            continue
        step = os.path.join(here, name)
        state = os.lstat(step)
        fault = fault_of(step, state, trusted)
        if stat.S_ISLNK(state.st_mode):
            links += 1
            if links > LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(step)
            here = "/" if target.startswith("/") else here
            rest += target.split("/")[::-1]
        else:
            here = step
    return fault


def fault_of(path: str, state: os.stat_result, trusted: set[int]) -> str:
    """What `changed_by_others` says of one step on the way."""
    if os.getpid() == 1 and os.statvfs(path).f_flag & os.ST_RDONLY:
        return ""  # a volume of a container, whose numbers and modes are the host's: all users here are ours
    if state.st_uid not in trusted:
        link = "-h " if stat.S_ISLNK(state.st_mode) else ""
        return f"{path} belongs to another user ({state.st_uid}): chown {link}root {path}"
    mode = state.st_mode
    if stat.S_ISLNK(mode) or stat.S_ISDIR(mode) and mode & stat.S_ISVTX:
        return ""
    if mode & stat.S_IWOTH:
        return f"{path} can be changed by other users: chmod o-w {path}"
    if mode & stat.S_IWGRP and (state.st_gid not in ROOTS_GROUPS | {os.geteuid()} or has_acl(path)):
        return f"{path} can be changed by a group ({state.st_gid}): chmod g-w {path}"
    return ""


def has_acl(path: str) -> bool:
    """Whether more than its group may use a file's group bits (acl(5)): they are the mask of its list then."""
    try:
        return bool(os.getxattr(path, "system.posix_acl_access"))
    except (OSError, AttributeError):  # no list, or no such file system; macOS has no getxattr here
        return False
