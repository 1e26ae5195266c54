"""sniroute_host: what this host allows: descriptors, tasks, memory, ports; and who may change a file.

    getrlimit(2) ------------------+      what a setting is derived from        descriptor_limits, memory_allowed
    /proc/self/cgroup              |      what is too little, at the start      require_descriptors, too_little
      --> /sys/fs/cgroup/...  -----+--->  why a start failed, in one sentence   shortage
    /proc/sys ---------------------+      which ports the kernel gives away     local_ports

    owners and modes of files --------->  who else may change one that we use   changed_by_others
                                          a database that is ours alone         make_private
    a file's state ------------------->  whether it is another than before      stamp
    JOURNAL_STREAM -------------------->  whether journald reads stderr         under_journald
    prctl(2), by setpriv or Python ---->  children that end with their parent   death_guard

A cgroup has the limits of all cgroups above it, too, and a container sees its own as the root, so every folder from
the process's own up to the root is asked.  Functions that read files take the folder `root`, so that tests can give
them other files.

A task is a thread or a process: RLIMIT_NPROC and pids.max count both.

Threads: main, at the start and at a reload; `changed_by_others` also the reaper, before it starts a program; `stamp`
any that reloads; `make_private` the one that opens the database; `death_guard` any that starts a program.

Seams: I want to ...
    derive a setting from the host     a function here, and `derived` of sniroute_settings
    say that something is too little   a line in `too_little`: at the start, and in `check`
    explain another failed start       a branch in `shortage`
    trust somebody else, too           `changed_by_others`, ROOTS_GROUPS

It imports scarcity.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import sys
from typing import Any, Iterator, NamedTuple

from sniroute_scarcity import SHORT_OF_MEMORY, ran_out

__version__ = "0.1.0"

PATHS_MAX = 1000  # characters of a sentence about a file: it names paths three times
ROOTS_GROUPS = frozenset((0, 80) if sys.platform == "darwin" else (0,))  # wheel or root, and admin in macOS
INTERPRETER_MAX = 256  # bytes of a script's first line that the kernel reads (BINPRM_BUF_SIZE)
LINKS_MAX = 40  # symlinks in one path: what the kernel follows (path_resolution(7))
# What a start takes, and the least that is of use.
START_DESCRIPTORS = 20  # streams, log, signals, systemd, loop, tunnels, the admin's address
LISTENER_DESCRIPTORS = 2  # for each address: its listener, and its name for a successor
CLIENT_DESCRIPTORS = 6  # a client, its backend, the three of a tunnel, and one to look something up
START_TUNNEL_DESCRIPTORS = 5  # for each tunnel that starts: its three, its client, and the connection to it
START_TASKS = 4  # the threads main, log, reaper and loop
ADMIN_TASKS = 2  # `admin`, and one of its workers
START_TUNNEL_TASKS = 2  # for each tunnel that starts: its process, and the thread that waits for it
START_MEMORY = 128 << 20  # bytes of address space: the stacks of threads are most of it
TUNNEL_MEMORY = 64 << 20  # bytes of the host for each process of a tunnel program: cloudflared takes about 28 MB
LINUX_PORTS = 32768, 60999  # net.ipv4.ip_local_port_range, where nobody has changed it (ip(7))
MIB = 1 << 20
MEMORY_LIMITS = ("RLIMIT_AS", "ulimit -v, LimitAS"), ("RLIMIT_DATA", "ulimit -d, LimitDATA")


# -- the death guard ---------------------------------------------------------------------------

PR_SET_PDEATHSIG, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 1, 47, 4  # prctl(2)
SIGKILL = 9  # signal(7); the room `signal` brings `enum`, and those who start nothing can do without
# The guard runs between fork and exec, in a process of its own, since preexec_fn is unsafe beside threads.
# Both forms ask again who the parent is: it may have died before prctl took hold.
# Both give up the ambient capabilities, which is how a service may bind port 443 without being root: a tunnel program
# needs none.  The inheritable ones may stay: alone they mean nothing to a program (capabilities(7)), and a sandbox
# may forbid capset(2).
PYTHON_GUARD = (
    "import ctypes, os, sys\n"
    "prctl = ctypes.CDLL(None).prctl\n"
    f"prctl({PR_CAP_AMBIENT}, {PR_CAP_AMBIENT_CLEAR_ALL}, 0, 0, 0)\n"
    f"prctl({PR_SET_PDEATHSIG}, {SIGKILL})\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])\n"
)
SHELL_GUARD = '[ "$PPID" = "$0" ] && exec "$@"'


def death_guard() -> list[str]:
    """Words to put before a process's argv so that it runs without capabilities, and ends with this one.

    The kernel kills it when the thread that has started it ends, so that thread has to wait for it.  util-linux's
    setpriv takes 3 ms and Python itself 24 ms, so setpriv is preferred where it works (busybox's has no --pdeathsig).
    Empty where there is no PR_SET_PDEATHSIG.  Raises OSError.
    """
    if sys.platform != "linux":
        return []
    import shutil  # these are imported late: the carrier, which starts nothing, can do without
    import subprocess
    setpriv = [shutil.which("setpriv", path="/usr/bin:/bin") or "", "--ambient-caps", "-all", "--pdeathsig", "KILL",
               "--"]
    if setpriv[0] and os.access("/bin/sh", os.X_OK):
        # Use this instead of DEVNULL, because Popen opens that first, and leaves it open where there is no pipe.
        with open(os.devnull, "r+b", buffering=0) as nothing:
            works = subprocess.run([*setpriv, "/bin/sh", "-c", ":"], stdin=nothing, stdout=nothing, stderr=nothing)
        if works.returncode == 0:
            return [*setpriv, "/bin/sh", "-c", SHELL_GUARD, str(os.getpid())]
    return [sys.executable, "-I", "-S", "-c", PYTHON_GUARD, str(os.getpid())]


# -- standard streams --------------------------------------------------------------------------


def open_standard_streams() -> None:
    """Open those of descriptors 0 to 2 that are closed: else a socket would get the number, and the log with it."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def under_journald(stream: Any) -> bool:
    """Whether this stream goes to journald (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        state = os.fstat(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{state.st_dev}:{state.st_ino}"


class ErrorStream:
    """Stands in for sys.stderr below journald: a line that has no priority gets that of an error (sd-daemon(3)).

    So whatever a command prints there, argparse's usage and a traceback, too, is found by `journalctl -p err`.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.within = False  # the last write ended in the middle of a line

    def write(self, text: str) -> int:
        """Write it, with `<3>` before each line that begins here and has no priority of its own."""
        for line in text.splitlines(keepends=True):
            if not self.within and not (line[:1] == "<" and line[1:2].isdecimal() and line[2:3] == ">"):
                self.stream.write("<3>")
            self.stream.write(line)
            self.within = not line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def mark_errors() -> None:
    """Have all that is printed to stderr from now on bear a priority, where journald takes it."""
    if under_journald(sys.stderr):
        sys.stderr = ErrorStream(sys.stderr)


# -- limits ------------------------------------------------------------------------------------


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


def cgroup_limits(controller: str, file: str, old_file: str, root: str = "/") -> Iterator[int]:
    """The numbers that a file has in this process's cgroup and in all above it (cgroups(7)).

    `file` is that of version 2, `old_file` that of the `controller` in version 1; a host may have both versions.
    """
    mounts = os.path.join(root, "sys/fs/cgroup")
    try:
        with open(os.path.join(root, "proc/self/cgroup"), encoding="utf-8", errors="surrogateescape") as table:
            rows = [row.rstrip("\n").split(":", 2) for row in table]
    except OSError:
        return  # no Linux, no /proc
    for row in rows:
        number, controllers, path = row if len(row) == 3 else ("", "", "")
        if number == "0" and not controllers:
            folders, name = (mounts, os.path.join(mounts, "unified")), file
        elif controller in controllers.split(","):
            folders, name = (os.path.join(mounts, controllers), os.path.join(mounts, controller)), old_file
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for folder in folders:
            for depth in range(len(parts), -1, -1):
                try:
                    with open(os.path.join(folder, *parts[:depth], name)) as limit:
                        yield int(limit.read())
                except (OSError, ValueError):
                    pass  # no such limit here; "max": there is none


def memory_allowed(root: str = "/") -> int:
    """Bytes of memory that this process and its children may have: the host's, or less where a cgroup says so."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([host, *cgroup_limits("memory", "memory.max", "memory.limit_in_bytes", root)])


def task_limits(root: str = "/") -> list[tuple[str, int]]:
    """What limits the number of tasks here, and to how many: (for people, number).  Empty where nothing does."""
    limits = []
    allowed = list(cgroup_limits("pids", "pids.max", "pids.max", root))
    if allowed:
        limits.append(("pids.max of its cgroup (TasksMax)", min(allowed)))
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if processes != resource.RLIM_INFINITY and os.getuid():  # root is exempt (getrlimit(2))
        limits.append(("RLIMIT_NPROC (ulimit -u, LimitNPROC)", processes))
    return limits


def local_ports(root: str = "/") -> tuple[int, int, bool] | None:
    """The first and the last port that the kernel gives to whoever asks for any, and whether it has said so.

    A sandbox may hide the file (ProcSubset of systemd.exec(5)): then it is Linux's default.  None on another system.
    """
    try:
        with open(os.path.join(root, "proc/sys/net/ipv4/ip_local_port_range")) as file:
            first, last = map(int, file.read().split())
            return first, last, True
    except (OSError, ValueError):
        return (*LINUX_PORTS, False) if sys.platform == "linux" else None


# -- too little --------------------------------------------------------------------------------


class TooLittle(RuntimeError):
    """The host allows less than a start needs.  The message is one sentence for people."""


def few_descriptors(needed: int) -> str:
    """The sentence for a limit of open files that is too low."""
    _, hard = descriptor_limits()
    return f"RLIMIT_NOFILE is {hard} (ulimit -n, LimitNOFILE), and {needed} open files are needed at least"


def require_descriptors(listeners: int) -> None:
    """Raise TooLittle where this many listeners and one client cannot have their descriptors."""
    needed = START_DESCRIPTORS + LISTENER_DESCRIPTORS * listeners + CLIENT_DESCRIPTORS
    if descriptor_limits()[1] < needed:
        raise TooLittle(few_descriptors(needed))


def too_little(tunnels: bool, admin: bool, max_starting: int, root: str = "/") -> Iterator[str]:
    """What this host has too little of to serve as it is asked to, a line each.

    `tunnels`: whether a route needs them; `max_starting`: how many may start at once.
    """
    descriptors = START_DESCRIPTORS + LISTENER_DESCRIPTORS + START_TUNNEL_DESCRIPTORS * max_starting
    if tunnels and (allowed := descriptor_limits()[1]) < descriptors:
        yield (f"RLIMIT_NOFILE (ulimit -n, LimitNOFILE) is {allowed}, and {descriptors} open files may be needed with "
               f"--max-starting {max_starting}: raise it, or lower that one")
    # Without tunnels a host to resolve still takes a thread.
    needed = START_TASKS + ADMIN_TASKS * admin + (START_TUNNEL_TASKS * max_starting if tunnels else 1)
    for name, allowed in task_limits(root):
        if allowed < needed:
            yield (f"{name} is {allowed}, and {needed} threads and processes may be needed"
                   + (f" with --max-starting {max_starting}: raise it, or lower that one" if tunnels else ": raise it"))
    if tunnels and (memory := memory_allowed(root)) < TUNNEL_MEMORY:
        yield (f"the memory of this host, or of its cgroup (memory.max, MemoryMax), is {memory // MIB} MiB: a router "
               f"and a tunnel may take {TUNNEL_MEMORY // MIB}")
    if tunnels and not has_temporary_folder():
        size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        why = "TMPDIR, /tmp, /var/tmp" if size else "RLIMIT_FSIZE is 0 (ulimit -f, LimitFSIZE)"
        yield f"no folder for temporary files can be written ({why}): tunnel programs get no home"


def has_temporary_folder() -> bool:
    """Whether there is a folder for the home of tunnel programs: systemd's, or that for temporary files."""
    import tempfile  # imported late: `check` and the carrier can do without
    try:
        return bool(os.environ.get("RUNTIME_DIRECTORY") or tempfile.gettempdir())
    except OSError:
        return False


def shortage(error: BaseException, root: str = "/") -> str:
    """Why a start failed, of the router or of what it starts, in one sentence, where the host allows too little.

    "" where it is anything else.
    """
    number = getattr(error, "errno", None)
    if isinstance(error, TooLittle):
        return str(error)
    if number == errno.EMFILE:
        return few_descriptors(START_DESCRIPTORS + LISTENER_DESCRIPTORS + CLIENT_DESCRIPTORS)
    if number == errno.ENFILE:
        return "this host has no descriptor left (sysctl fs.file-max)"
    limits = [f"{name} is {space // MIB} MiB ({how})" for name, how in MEMORY_LIMITS
              if (space := resource.getrlimit(getattr(resource, name))[0]) != resource.RLIM_INFINITY]
    if isinstance(error, RuntimeError) and SHORT_OF_MEMORY in str(error):  # of `begin_thread`, while we run
        return f"no thread can be started: {SHORT_OF_MEMORY} ({', '.join(limits) or 'the host has none left'})"
    if isinstance(error, RuntimeError) and "new thread" in str(error):
        needed = f"{START_TASKS + 1} threads and processes are needed at least"
        needed += f", and {START_MEMORY // MIB} MiB of address space" if limits else ""
        limits += [f"{name} is {allowed}" for name, allowed in task_limits(root)]
        return f"no thread can be started ({', '.join(limits) or 'the host is full'}): {needed}"
    if number == errno.EAGAIN:
        limits += [f"{name} is {allowed}" for name, allowed in task_limits(root)]
        return f"no process can be started ({', '.join(limits) or 'the host is full'})"
    if ran_out(error) or number == errno.ENOMEM \
            or isinstance(error, ImportError) and "failed to map" in str(error) \
            or isinstance(error, SystemError) and limits:
        # What dlopen(3) says; and where CPython 3.13 finds no memory in compile() it has a SystemError without a reason.
        return (f"{SHORT_OF_MEMORY} ({', '.join(limits) or 'the host, or its cgroup, has none left'}): "
                f"{START_MEMORY // MIB} MiB of address space are needed at least")
    return ""


# -- files -------------------------------------------------------------------------------------


class Stamp(NamedTuple):
    """What tells a file from the one that was there before: another content, another owner or mode, another file."""

    device: int
    inode: int
    size: int
    modified: int  # nanoseconds
    changed: int  # the same, of its state: a clock that is set back, or a copy with its times, does not hide a change


def stamp(path: str) -> Stamp | int:
    """The stamp of the file that a path leads to, through all symlinks; an errno where it leads to none."""
    try:
        state = os.stat(path)
    except OSError as error:
        return error.errno
    return Stamp(state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def interpreter_of(path: str) -> str:
    """The program that runs a script, as its first line names it; "" where it is no script.  Raises OSError."""
    try:
        with open(path, "rb") as file:
            line = file.readline(INTERPRETER_MAX)
    except PermissionError:  # then it is no script: its interpreter has to read it
        return ""
    words = line[2:].split() if line.startswith(b"#!") else []
    return os.fsdecode(words[0]) if words and words[0].startswith(b"/") else ""


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


def make_private(path: str) -> None:
    """Have a database that is this user's alone, before SQLite opens it: it is made, empty, where there is none.

    One that others may change is not used, nor one in a folder of theirs; one that they may only read is theirs to read
    no more.  The same holds for what SQLite has left beside it, and what it makes there gets the database's mode.
    A file that is there is not opened: the end of any descriptor of it gives up the locks that this process has on it
    (fcntl(2)).
    Raises OSError; its `strerror` says what is wrong, and what to do.
    """
    if not os.path.lexists(path):
        if fault := changed_by_others(os.path.dirname(path) or "."):
            raise PermissionError(errno.EPERM, fault)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    for each in (path, f"{path}-wal", f"{path}-journal"):
        if not os.path.lexists(each):
            continue
        if fault := changed_by_others(each):
            raise PermissionError(errno.EPERM, fault)
        mode = os.stat(each).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else f"{each} is no file")
        if mode & 0o077:
            os.chmod(each, 0o600)


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
