"""Tests of sniroute_host.py: what this host allows."""

from __future__ import annotations

import os
import pathlib
import resource
import subprocess
import sys

import pytest

import sniroute_host
from sniroute_host import changed_by_others
from conftest import HERE
from testbed.program import namespace


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
