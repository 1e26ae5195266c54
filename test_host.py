"""Tests of sniroute_host.py: what this host allows, and what a start says where it allows too little."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import io
import itertools
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Callable

import pytest

import sniroute_host
from conftest import HERE, HOST, linux, wait_until
from sniroute_host import (MIB, TUNNEL_MEMORY, cgroup_limits, changed_by_others, memory_allowed, shortage, task_limits,
                           too_little)
from sniroute_settings import load_settings
from testbed.hellos import HELLO
from testbed.program import PROGRAM, Program, environment, execute, namespace
from testbed.running import read_exactly, route

root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root may do this")


# -- descriptors -------------------------------------------------------------------------------


def test_the_limit_of_open_files_is_raised_where_it_may_be(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10, 20))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    sniroute_host.raise_descriptor_limit()
    assert asked == [(20, 20)]

    def forbid(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "setrlimit", forbid)
    sniroute_host.raise_descriptor_limit()


# -- cgroups -----------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path) -> Callable[..., str]:
    """host(table, {file: text}) -> the root of a host whose /proc/self/cgroup and /sys/fs/cgroup have these."""
    def make(table: str, files: dict[str, str]) -> str:
        for name, text in {"proc/self/cgroup": table, **{f"sys/fs/cgroup/{name}": text
                                                         for name, text in files.items()}}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(tmp_path)

    return make


@pytest.mark.parametrize("table, files, expected", [
    ("0::/system.slice/sniroute.service\n", {"system.slice/sniroute.service/memory.max": "200000000\n"}, 200_000_000),
    ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "300000000\n"}, 300_000_000),
    ("0::/a/b\n", {"a/b/memory.max": "300000000\n", "a/memory.max": "100000000\n", "memory.max": "max\n"}, 100_000_000),
    ("0::/\n", {"memory.max": "100000000\n"}, 100_000_000),
    ("0::/../../docker/x\n", {"memory.max": "100000000\n"}, 100_000_000),
    ("0::/a:b\n", {"a:b/memory.max": "100000000\n"}, 100_000_000),
    ("4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "100000000\n",
                             "memory/memory.limit_in_bytes": "9223372036854771712\n"}, 100_000_000),
    ("4:memory:/docker/0123\n", {"memory/memory.limit_in_bytes": "100000000\n"}, 100_000_000),
    ("4:memory,hugetlb:/x\n", {"memory,hugetlb/x/memory.limit_in_bytes": "100000000\n"}, 100_000_000),
    ("0::/x\n1:name=systemd:/x\n", {"unified/x/memory.max": "100000000\n"}, 100_000_000),
    ("4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ("0::/a\n", {"a/memory.max": "max\n"}, None), ("0::/a\n", {}, None), ("", {}, None),
    ("no cgroup\n::\n0\n\n", {"memory.max": "1\n"}, None), ("0::/a\n", {"a/memory.max": "\xff"}, None),
], ids=["own", "above", "lowest", "namespace", "outside", "colon", "old", "old-container", "old-joined", "hybrid",
        "old-none", "none", "no-file", "no-cgroup", "garbage", "garbage-limit"])
def test_memory_is_what_the_cgroups_allow(table, files, expected, host):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_allowed(host(table, files)) == (expected or whole)


def test_without_proc_the_memory_is_the_host_s(tmp_path):
    assert memory_allowed(str(tmp_path)) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert list(cgroup_limits("pids", "pids.max", "pids.max", str(tmp_path))) == []


@pytest.mark.parametrize("table, name", [("0::/x\n", "x/pids.max"), ("8:pids:/x\n", "pids/x/pids.max")])
@pytest.mark.parametrize("user, limit, expected", [
    (0, resource.RLIM_INFINITY, [("pids.max of its cgroup (TasksMax)", 9)]),
    (0, 7, [("pids.max of its cgroup (TasksMax)", 9)]),
    (1000, 7, [("pids.max of its cgroup (TasksMax)", 9), ("RLIMIT_NPROC (ulimit -u, LimitNPROC)", 7)]),
], ids=["none", "root-is-exempt", "both"])
def test_tasks_are_limited_by_the_cgroup_and_by_the_user(table, name, user, limit, expected, host, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: user)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert task_limits(host(table, {name: "9\n"})) == expected


def test_the_default_for_tunnels_is_what_the_cgroup_has_room_for(monkeypatch, host, cloudflared):
    root = host("0::/x\n", {"x/memory.max": f"{5 * TUNNEL_MEMORY}\n"})
    monkeypatch.setattr("sniroute_settings.memory_allowed", lambda: memory_allowed(root))
    options = f"--cloudflared={cloudflared.path}", "--route=*.example.com=cloudflared:{name}"
    assert load_settings(options, {}).max_tunnels == 5
    assert load_settings([*options, "--max-tunnels=50"], {}).max_tunnels == 50


@pytest.mark.parametrize("files, tunnels, admin, starting, said", [
    ({}, True, True, 4, []),
    ({"x/pids.max": "12\n"}, True, False, 4, []),
    ({"x/pids.max": "11\n"}, True, False, 4, [
        "pids.max of its cgroup (TasksMax) is 11, and 12 threads and processes may be needed with --max-starting 4: "
        "raise it, or lower that one"]),
    ({"x/pids.max": "11\n"}, True, False, 3, []),
    ({"x/pids.max": "5\n"}, False, False, 4, []),
    ({"x/pids.max": "5\n"}, False, True, 4, [
        "pids.max of its cgroup (TasksMax) is 5, and 7 threads and processes may be needed: raise it"]),
    ({"x/memory.max": f"{TUNNEL_MEMORY - MIB}\n"}, True, False, 4, [
        "the memory of this host, or of its cgroup (memory.max, MemoryMax), is 63 MiB: a router and a tunnel may take 64"]),
    ({"x/memory.max": f"{TUNNEL_MEMORY - MIB}\n"}, False, False, 4, []),
], ids=["enough", "just-enough-tasks", "few-tasks", "fewer-starts", "without-tunnels", "with-the-admin", "little-memory",
        "no-tunnel-needs-it"])
def test_what_is_too_little_is_said_at_the_start(files, tunnels, admin, starting, said, host, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert list(too_little(tunnels, admin, starting, host("0::/x\n", files))) == said


def test_few_descriptors_for_tunnels_are_said_at_the_start(monkeypatch, host):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (41, 41))
    monkeypatch.setattr(os, "getuid", lambda: 0)
    root = host("", {})
    assert list(too_little(False, False, 4, root)) == list(too_little(True, False, 3, root)) == []
    assert list(too_little(True, False, 4, root)) == [
        "RLIMIT_NOFILE (ulimit -n, LimitNOFILE) is 41, and 42 open files may be needed with --max-starting 4: raise it, "
        "or lower that one"]


@root_only
@linux
def test_a_cgroup_with_few_tasks_is_named_at_the_start(launch, tmp_path):
    """A real one, where this machine lets us make one."""
    for mount in ("/sys/fs/cgroup/pids", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        folder = pathlib.Path(mount) / f"sniroute-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            if (folder / "pids.max").exists():
                break
            folder.rmdir()
    else:
        pytest.skip("no cgroup with the controller `pids` can be made here")
    inside = ("/bin/sh", "-c", f'echo $$ >{folder}/cgroup.procs && exec "$@"', "sh", sys.executable)
    try:
        (folder / "pids.max").write_text("3\n")
        ended = execute(*inside, str(PROGRAM), f"--listen={HOST}:0", "--route=*.a.b=cloudflared:{name}",
                        env=environment(), text=True, said="")
        assert ended.returncode == 1 and "Traceback" not in ended.stderr
        assert ended.stderr.count("pids.max of its cgroup (TasksMax) is 3") == 1, ended.stderr
        (folder / "pids.max").write_text("8\n")
        program = launch("--route=*.a.b=cloudflared:{name}", python=inside)
        assert " warning pids.max of its cgroup (TasksMax) is 8, and 12 threads and processes may be" in program.log()
        program.stop()
    finally:
        folder.rmdir()


# -- limits of a process -----------------------------------------------------------------------

# Sets a limit, then becomes the program behind it.
LIMITED = ("import os, resource, sys; "
           "resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]),) * 2); os.execv(sys.argv[3], sys.argv[3:])")


def below(limit: str, number: int, *before: str) -> tuple[str, ...]:
    """Words before a program that let it have so much.  Without site: coverage, too, would meet the limit."""
    return (*before, sys.executable, "-S", "-c", LIMITED, limit, str(number), sys.executable, "-S")


def one_of_root() -> tuple[str, ...]:
    """Words before a program that make it another user's, whom RLIMIT_NPROC holds, and who can read what root can."""
    if os.getuid():
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("needs the Debian package util-linux")
    reads = "+dac_read_search,+dac_override"
    return ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", f"--inh-caps={reads}", f"--ambient-caps={reads}")


def ended(words: tuple[str, ...], *options: str) -> subprocess.CompletedProcess[str]:
    """Run the router, which is expected not to start."""
    return execute(*words, str(PROGRAM), f"--listen={HOST}:0", *options, env=environment(), text=True, said="")


@linux
@pytest.mark.parametrize("limit, number, says", [
    ("RLIMIT_NOFILE", 12, "RLIMIT_NOFILE is 12 (ulimit -n, LimitNOFILE), and 28 open files are needed at least"),
    ("RLIMIT_NOFILE", 16, "RLIMIT_NOFILE is 16 (ulimit -n, LimitNOFILE), and 28 open files are needed at least"),
    ("RLIMIT_NOFILE", 27, "RLIMIT_NOFILE is 27 (ulimit -n, LimitNOFILE), and 28 open files are needed at least"),
    ("RLIMIT_NPROC", 1, "no thread can be started (RLIMIT_NPROC (ulimit -u, LimitNPROC) is 1): 5 threads and processes"),
    ("RLIMIT_NPROC", 2, "no thread can be started (RLIMIT_NPROC (ulimit -u, LimitNPROC) is 2): 5 threads and processes"),
    ("RLIMIT_NPROC", 3, "no thread can be started (RLIMIT_NPROC (ulimit -u, LimitNPROC) is 3): 5 threads and processes"),
], ids=str)
def test_a_host_that_allows_too_little_is_told_in_one_sentence(limit, number, says, two_files):
    done = ended(below(limit, number, *one_of_root() if limit == "RLIMIT_NPROC" else ()), "--log-level=warning")
    lines = [line for line in done.stderr.splitlines() if "no --route" not in line]
    assert done.returncode == 1 and len(lines) == 1 and says in lines[0], done.stderr


@linux
def test_little_address_space_is_told_in_one_sentence():
    """How little is too little depends on the Python: from far too little to enough, each start serves or says it."""
    said = set()
    for mebibytes in (20, 24, 28, 32, 40, 48):
        done = ended(below("RLIMIT_AS", mebibytes * MIB), "--route=a.b=tcp:h:1", "--admin=192.0.2.1:1")
        if "Fatal Python error" in done.stderr or "sniroute" not in done.stderr:
            continue  # not even Python starts with that
        assert "Traceback" not in done.stderr, done.stderr
        said.add(done.returncode)
    assert said <= {1, 2} and said


@linux
def test_files_that_may_have_no_size_are_no_home_for_tunnels():
    done = execute(*below("RLIMIT_FSIZE", 0), str(PROGRAM), "check", "-q", "--route=*.a.b=carrier:{name}",
                   env=environment(), text=True, said="")
    assert done.stderr == ("sniroute: no folder for temporary files can be written "
                           "(RLIMIT_FSIZE is 0 (ulimit -f, LimitFSIZE)): tunnel programs get no home\n")


@linux
@pytest.mark.parametrize("limit, number", [("RLIMIT_NOFILE", 30), ("RLIMIT_NPROC", 5), ("RLIMIT_FSIZE", 0)])
def test_a_host_that_allows_just_enough_serves(launch, single_loop_echo, limit, number, tmp_path):
    """With RLIMIT_FSIZE 0 the log is a file that takes no byte: that stops no traffic."""
    before = one_of_root() if limit == "RLIMIT_NPROC" else ()
    program = launch(route(single_loop_echo), python=below(limit, number, *before))
    with program.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    if limit == "RLIMIT_FSIZE":
        with open(tmp_path / "log", "wb") as log:
            silent = launch(f"--listen={HOST}:{program.address[1]}", route(single_loop_echo), listeners=0, stderr=log,
                            python=below(limit, number))
            assert program.wait() == 0, "it has taken over"
            with silent.connect(HELLO, program.address) as client:
                assert read_exactly(client, len(HELLO)) == HELLO
            silent.stop()
        assert (tmp_path / "log").read_bytes() == b""


def test_a_thread_that_cannot_start_anywhere_in_the_start_is_one_sentence(tmp_path):
    """The first, the second, and so on, until the start succeeds; the listening socket is closed each time."""
    code = """
import sys, threading
sys.path.insert(0, {here!r})
start, left = threading.Thread.start, [int(sys.argv.pop(1))]
def fail(self):
    left[0] -= 1
    if not left[0]:
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = fail
import sniroute
sys.exit(sniroute.main())
"""
    names = []
    for number in range(1, 5):
        done = execute(sys.executable, "-c", code.format(here=str(HERE)), str(number), f"--listen={HOST}:0",
                       "--route=a.b=tcp:h:1", "--admin=127.0.0.1:0", env=environment(), text=True, said="")
        faults = [line for line in done.stderr.splitlines() if "no thread can be started" in line]
        assert done.returncode == 1 and len(faults) == 1 and "Traceback" not in done.stderr, done.stderr
        names.append("--admin" in faults[0])
    assert names == [False, False, False, True], "log, reaper, loop; and the admin's"


@pytest.mark.parametrize("error, says", [
    (OSError(errno.ENFILE, "x"), "this host has no descriptor left (sysctl fs.file-max)"),
    (MemoryError(), "memory is short ("), (OSError(errno.ENOMEM, "x"), "memory is short ("),
    (ImportError("libssl.so: failed to map segment from shared object"), "memory is short ("),
    (OSError(errno.EPERM, "x"), ""), (RuntimeError("x"), ""), (ImportError("no module"), ""), (OSError("x"), ""),
], ids=repr)
def test_what_is_short_is_told_from_other_faults(error, says):
    assert shortage(error).startswith(says) if says else shortage(error) == ""


def test_an_error_without_a_reason_is_a_shortage_where_memory_is_limited(monkeypatch):
    """CPython 3.13 loses a MemoryError of compile()."""
    error = SystemError("error return without exception set")
    limits = dict.fromkeys(("RLIMIT_AS", "RLIMIT_DATA"), resource.RLIM_INFINITY)
    numbers = {getattr(resource, name): name for name in limits}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (limits[numbers[number]],) * 2)
    assert shortage(error) == ""
    limits["RLIMIT_AS"] = 40 << 20
    assert shortage(error).startswith("memory is short (RLIMIT_AS is 40 MiB")


# -- folders -----------------------------------------------------------------------------------

# In a mount namespace of its own, so that nothing changes for anybody else.
NO_TMP = " && ".join(f"mount --bind {each} {each} && mount -o remount,bind,ro {each}" for each in ("/tmp", "/var/tmp"))
READ_ONLY = f"{NO_TMP} && mount --bind / / && cd / && mount -o remount,bind,ro /"
NO_TMP += " && cd /proc"
GONE = "gone=$(mktemp -d -p /dev/shm) && cd $gone && rmdir $gone"


def elsewhere(script: str, *words: str, stop: str | None = None) -> tuple[int, str, str]:
    """Run sniroute behind a script in a mount namespace of its own, without HOME.  Returns its code, stdout and stderr.

    It is told to stop once its log has the text `stop`.
    """
    if shutil.which("unshare") is None:
        pytest.skip("needs the Debian package util-linux")
    if os.getuid():
        pytest.skip("only root may make a mount namespace")
    env = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    program = Program(["unshare", "-m", "--propagation=private", "/bin/sh", "-c", f'{script} || exit 77; exec "$@"',
                       "sh", *words], env=env, stdout=subprocess.PIPE)
    with program.process:
        wait_until(lambda: stop and stop in program.log() or not program.reader.is_alive(), 60, "the end, or its moment")
        if stop:
            program.signal(signal.SIGTERM)
        said, code = program.process.stdout.read().decode(), program.wait()
    if code == 77 or program.log().startswith("unshare: "):
        pytest.skip(f"this machine allows no mounts: {program.log()}")
    return code, said, program.log()


SCRIPTS = {"no-tmp": NO_TMP, "read-only": READ_ONLY, "folder-is-gone": GONE}
COMMANDS = "serve", "check", "selftest"


@pytest.fixture(scope="module")
def starts() -> dict[tuple[str, str], tuple[int, str, str]]:
    """What `elsewhere` returns for each command behind each script.  All at once: they wait most of their time."""
    def start(row: tuple[str, str]) -> tuple[int, str, str]:
        command, script = row
        options = [f"--listen={HOST}:0", "--route=*.example.com=carrier:{name}"] if command != "selftest" else []
        return elsewhere(SCRIPTS[script], sys.executable, str(PROGRAM), command, *options,
                         stop=" listening on " if command == "serve" else None)

    rows = list(itertools.product(COMMANDS, SCRIPTS))
    with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
        return dict(zip(rows, pool.map(start, rows)))


@linux
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_start_without_folders_works_or_says_why(starts, script, command):
    """Without HOME, too."""
    code, stdout, stderr = starts[command, script]
    assert "Traceback" not in stderr + stdout, stderr + stdout
    said = "no folder for temporary files can be written (TMPDIR, /tmp, /var/tmp)" in stderr
    if command == "serve":
        assert code == 0 and " listening on " in stderr and " info stopped" in stderr
    elif command == "check":
        assert code == 0 and stdout == "*.example.com=carrier:{name}\n"
    if script == "folder-is-gone":
        assert not said and code == 0
    else:
        assert said and stderr.count("no folder for temporary files") == 1


# -- journald ----------------------------------------------------------------------------------


def test_a_line_without_a_priority_gets_that_of_an_error():
    written = io.StringIO()
    stream = sniroute_host.ErrorStream(written)
    for text in ("usage: sniroute\n", "sniroute: error: ", "unexpected 'x'\n", "<4>sniroute: a warning\n", "two\nlines\n",
                 "", "<not a priority>\n", "<3"):
        assert stream.write(text) == len(text)
    stream.flush()
    assert written.getvalue() == ("<3>usage: sniroute\n<3>sniroute: error: unexpected 'x'\n<4>sniroute: a warning\n"
                                  "<3>two\n<3>lines\n<3><not a priority>\n<3><3")


# -- files -------------------------------------------------------------------------------------

OTHER = 4321  # a user, and a group, that are neither root nor this one
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who may give files away")


@pytest.fixture
def program(tmp_path) -> pathlib.Path:
    """A file in a folder in a folder, all of them ours alone."""
    path = tmp_path / "outer" / "inner" / "program"
    path.parent.mkdir(parents=True)
    for each in (path.parent.parent, path.parent):
        each.chmod(0o755)
    path.touch(0o755)
    return path


@pytest.fixture
def linked(tmp_path, program) -> str:
    """A symlink to that file, by way of another symlink and of `..`."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o755)
    (tmp_path / "folder").symlink_to("outer/inner")
    (elsewhere / "link").symlink_to("../folder/program")
    return str(elsewhere / "link")


def test_a_file_that_only_we_may_change_is_trusted(program, linked):
    assert changed_by_others(str(program)) == changed_by_others(linked) == ""
    assert changed_by_others("/bin/sh") == ""


@pytest.mark.parametrize("what", ["program", "inner", "outer"])
@pytest.mark.parametrize("way", ["as it is", "by a symlink"])
def test_a_file_that_others_may_change_is_named_with_what_to_do(what, way, program, linked):
    changed = {each.name: each for each in (program, *program.parents)}[what]
    changed.chmod(0o777)
    named = str(program) if way == "as it is" else linked
    assert changed_by_others(named) == f"{changed} can be changed by other users: chmod o-w {changed}"


@root
@pytest.mark.parametrize("what", ["program", "inner", "outer", "link", "elsewhere", "folder"])
def test_a_file_of_another_user_is_named(what, program, linked, tmp_path):
    """Its folder, or a symlink on the way, may be that user's instead."""
    changed = {each.name: each for each in (program, *program.parents, tmp_path / "folder", tmp_path / "elsewhere",
                                            pathlib.Path(linked))}[what]
    os.chown(changed, OTHER, -1, follow_symlinks=False)
    link = "-h " if changed.is_symlink() else ""
    assert changed_by_others(linked) == f"{changed} belongs to another user ({OTHER}): chown {link}root {changed}"


@root
def test_a_user_may_run_what_is_that_user_s_own(program, monkeypatch):
    for each in (program, program.parent):
        os.chown(each, OTHER, OTHER)
        each.chmod(0o775)  # a private group may write, as Debian's and Fedora's users have it
    assert changed_by_others(str(program)).startswith(f"{program.parent} belongs to another user")
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    assert changed_by_others(str(program)) == ""


@root
@pytest.mark.parametrize("group, trusted", [(0, True), (OTHER, False)])
def test_a_group_may_write_where_it_is_root_s(group, trusted, program):
    os.chown(program.parent, -1, group)
    program.parent.chmod(0o775)
    complaint = f"{program.parent} can be changed by a group ({OTHER}): chmod g-w {program.parent}"
    assert changed_by_others(str(program)) == ("" if trusted else complaint)


def test_a_list_of_users_who_may_write_is_seen(program, monkeypatch):
    """setfacl -m u:bob:rwx: the bits of the group then say what the list may allow."""
    os.chown(program.parent, -1, os.geteuid())
    program.parent.chmod(0o775)
    assert changed_by_others(str(program)) == ""
    monkeypatch.setattr(sniroute_host, "has_acl", lambda path: path == str(program.parent))
    assert "can be changed by a group" in changed_by_others(str(program))


def test_nobody_else_can_replace_what_is_in_a_sticky_folder(program):
    program.parent.chmod(0o1777)  # as /tmp
    assert changed_by_others(str(program)) == ""


@root
def test_what_another_user_has_put_into_a_sticky_folder_is_that_user_s(program):
    program.parent.chmod(0o1777)
    os.chown(program, OTHER, -1)
    assert f"{program} belongs to another user" in changed_by_others(str(program))


def test_a_path_is_followed_as_the_kernel_follows_it(program, tmp_path, monkeypatch):
    """`..` behind a symlink is above where that leads; and a path may begin where we are."""
    (tmp_path / "program").touch(0o757)
    named = tmp_path / "here"
    named.symlink_to(program.parent)
    monkeypatch.chdir(tmp_path)
    for path in (f"{named}/../inner/program", "here/program", "./outer//inner/program"):
        assert changed_by_others(path) == ""
    program.parent.parent.chmod(0o757)
    for path in (f"{named}/../inner/program", "here/../../program"):
        assert changed_by_others(path).startswith(f"{program.parent.parent} can be changed")


def test_a_path_that_leads_nowhere_is_an_error(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        changed_by_others(str(tmp_path / "loop"))
    with pytest.raises(FileNotFoundError):
        changed_by_others(str(tmp_path / "none"))


CONTAINER = """
import os, sniroute_host
assert os.getpid() == 1
print([sniroute_host.changed_by_others(path) for path in ("/mnt/volume/file", "/mnt/open/file")])
"""


def test_a_volume_that_a_container_cannot_write_is_trusted():
    """Kubernetes gives the folder of a ConfigMap the mode 0777; here nobody can use that."""
    words = namespace("--mount --pid --fork", "mount -t tmpfs none /mnt && cd /mnt && mkdir -m 777 volume open && "
                      "mount -t tmpfs -o mode=777 none volume && touch volume/file open/file && "
                      f"mount -o remount,ro volume && cd {HERE}")
    done = subprocess.run([*words, sys.executable, "-c", CONTAINER], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "['', '/mnt/open can be changed by other users: chmod o-w /mnt/open']\n"


# -- whether a file has changed ----------------------------------------------------------------


@pytest.mark.parametrize("change", ["in place", "another in its place", "a link", "its mode", "its folder", "gone"])
def test_the_stamp_of_a_file_is_another_when_it_has_changed(change, tmp_path):
    folder, path = tmp_path / "real", tmp_path / "link" / "file"
    folder.mkdir()
    (folder / "file").write_text("before")
    os.symlink("real", tmp_path / "link")
    before = sniroute_host.stamp(str(path))
    assert sniroute_host.stamp(str(path)) == before and before.size == 6
    wait_until(lambda: time.time_ns() - before.changed > 20_000_000, what="the next tick of the clock that files have")
    if change == "in place":
        path.write_text("behind")
    elif change == "its mode":
        path.chmod(0o600)
    elif change == "another in its place":
        shutil.copy2(path, tmp_path / "new")  # with its times
        os.replace(tmp_path / "new", path)
    elif change == "a link":
        shutil.copytree(folder, tmp_path / "other")
        os.symlink("other", tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "link")
    elif change == "its folder":
        folder.rename(tmp_path / "old")
        assert sniroute_host.stamp(str(path)) == errno.ENOENT
        folder.mkdir()
        (folder / "file").write_text("before")
    else:
        path.unlink()
        assert sniroute_host.stamp(str(path)) == errno.ENOENT
    assert sniroute_host.stamp(str(path)) != before
