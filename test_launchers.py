"""Tests of sniroute_launchers.py, in its order."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import sniroute_host
import sniroute_launchers
from sniroute_launchers import TunnelError
from sniroute_names import OPTIONS
from conftest import HERE

# -- words for people --------------------------------------------------------------------------


@pytest.mark.parametrize("tail, words", [
    pytest.param(b"", "", id="nothing"),
    pytest.param(b" \n\t\r\n\n", "", id="only blanks"),
    pytest.param(b"one\ntwo\n\n", "two", id="the last line that says something"),
    pytest.param(b"one\ntwo", "two", id="no newline at the end"),
    pytest.param(b'{"level":"error","message":"failed","error":"refused"}\n', "failed: refused",
                 id="message and error"),
    pytest.param(b'{"message":"failed"}', "failed", id="message alone"),
    pytest.param(b'{"error":"refused"}', "refused", id="error alone"),
    pytest.param(b'{"message":"a\\nb"}', "a?b", id="newline inside JSON"),
    pytest.param(b'{"message":7,"error":null}', "7: None", id="not strings"),
    pytest.param(b'{"level":"info"}', '{"level":"info"}', id="JSON that says nothing"),
    pytest.param(b'{"message":"cut', '{"message":"cut', id="JSON cut short"),
    pytest.param(b'or":"x"}', 'or":"x"}', id="JSON cut at its start"),
    pytest.param(b'["message"]', '["message"]', id="a JSON list"),
    pytest.param(b'"a message"', '"a message"', id="a JSON string"),
    pytest.param(b"17", "17", id="a JSON number"),
    pytest.param(b"9" * 4096, "9" * 197 + "...", id="a number beyond int()"),
    pytest.param(b"[" * 4096, "[" * 197 + "...", id="deep nesting"),
    pytest.param(b"\xff\xfe caf\xc3\xa9\x1b[0m", "?? caf??[0m", id="not UTF-8, and an escape"),
    pytest.param(b"windows\r\n", "windows", id="CR LF"),
])
def test_last_words(tail, words):
    assert sniroute_launchers.last_words(tail) == words


@pytest.mark.parametrize("tail, kind_of, text", [
    pytest.param(b'{"message":"failed to connect to origin","error":"websocket: bad handshake"}', "failed",
                 "the edge refused it: access denied, no such tunnel, or its connector is down"
                 " (failed to connect to origin: websocket: bad handshake)", id="refused"),
    pytest.param(b'{"message":"m","error":"tls: failed to verify certificate: x509: unknown authority"}', "failed",
                 "the edge's certificate is not trusted"
                 " (m: tls: failed to verify certificate: x509: unknown authority)", id="certificate"),
    pytest.param(b"lookup app.example.test: no such host", "unknown",
                 "the name does not resolve (lookup app.example.test: no such host)", id="DNS"),
    pytest.param(b"connect: network is unreachable", "failed",
                 "the network is unreachable (connect: network is unreachable)", id="network"),
    pytest.param(b"connect: connection refused", "failed",
                 "the edge refused the connection (connect: connection refused)", id="connection refused"),
    pytest.param(b"read: connection reset by peer", "failed",
                 "the edge reset the connection (read: connection reset by peer)", id="reset"),
    pytest.param(b"bind: address already in use", "failed",
                 "its local port was taken (bind: address already in use)", id="port"),
    pytest.param(b"Another cloudflared process (pid 7) is already waiting for authentication.", "denied",
                 "Access wants a login: give the router a service token"
                 " (Another cloudflared process (pid 7) is already waiting for authentication.)", id="login lock"),
    pytest.param(b"something new", "failed", "something new", id="unknown words are shown as they came"),
    pytest.param(b"", "failed", "", id="nothing"),
])
def test_cloudflared_reason(tail, kind_of, text):
    assert sniroute_launchers.cloudflared_reason(tail) == (kind_of, text, False)


@pytest.mark.parametrize("prompt", [
    pytest.param("Please open the following URL and log in with your Cloudflare account:\n\n"
                 "https://app.example.test/cdn-cgi/access/cli?token=x\n\n"
                 "Leave cloudflared running to download the token automatically.\n", id="no browser"),
    pytest.param("A browser window should have opened at the following URL:\n\n"
                 "https://app.example.test/cdn-cgi/access/cli?token=x\n\n"
                 "If the browser failed to open, please visit the URL above directly in your browser.\n", id="browser"),
    pytest.param('{"level":"info","message":"Waiting for login..."}\n', id="waiting"),
])
def test_a_login_prompt_is_recognised_by_its_last_line(prompt):
    reason = sniroute_launchers.cloudflared_reason(prompt.encode())
    assert reason.kind == "denied" and reason.text.startswith("Access wants a login")


@pytest.mark.parametrize("fields, reason", [
    ({"reason": "name"}, ("unknown", "m: e", True)),
    ({"reason": "not_found"}, ("unknown", "m: e", True)),
    ({"reason": "login"}, ("denied", "m: e", True)),
    ({"reason": "denied"}, ("denied", "m: e", True)),
    ({"reason": "certificate"}, ("failed", "m: e", True)),
    *[({"reason": word}, ("failed", "m: e", False))
      for word in ("refused", "timeout", "tls", "reset", "proxy", "origin", "down", "other", "new", "", None, 7, [])],
    ({}, ("failed", "m: e", False)),
    ({"message": "a\nb\x1b", "error": "x" * 300}, ("failed", ("a?b?: " + "x" * 300)[:197] + "...", False)),
])
def test_carrier_reason(fields, reason):
    line = json.dumps({"message": "m", "error": "e", **fields}).encode()
    assert sniroute_launchers.carrier_reason(b"before\n" + line + b"\n") == reason


@pytest.mark.parametrize("tail, text", [(b"", ""), (b"{", "{"), (b'["reason"]', '["reason"]'), (b"\xff", "?")])
def test_what_is_no_line_of_the_carrier_is_shown_as_it_came(tail, text):
    assert sniroute_launchers.carrier_reason(tail) == ("failed", text, False)


# -- the launcher ------------------------------------------------------------------------------


def test_argv_names_an_ipv4_listener_and_holds_no_secret():
    assert sniroute_launchers.cloudflared_argv("app.example.test", 20000) == [
        "access", "tcp", "--hostname", "app.example.test", "--url", "127.0.0.1:20000", "--loglevel", "info"]


def test_environment_is_built_from_nothing():
    environ = {name: "x" for name in sniroute_launchers.TUNNEL_ENVIRONMENT}
    more = {"PATH": "/bin", "HOME": "/root", "TUNNEL_SERVICE_HOSTNAME": "evil", "TUNNEL_LOG_OUTPUT": "text",
            "LD_PRELOAD": "x", "HTTP_PROXY": "x"}
    launcher = sniroute_launchers.cloudflared_launcher("cloudflared", {**environ, **more})
    assert launcher.environment == {**environ, "TUNNEL_LOG_OUTPUT": "json"}
    assert sniroute_launchers.cloudflared_launcher("cloudflared", more).environment == {"TUNNEL_LOG_OUTPUT": "json"}


def test_white_space_around_a_variable_goes():
    """A secret from a file ends with a newline, which no header can have."""
    environ = {name: f" \t{name}\r\n" for name in sniroute_launchers.TUNNEL_ENVIRONMENT}
    for launcher in (sniroute_launchers.cloudflared_launcher("x", environ), sniroute_launchers.carrier_launcher(environ)):
        assert launcher.environment == {**{name: name for name in environ}, "TUNNEL_LOG_OUTPUT": "json"}


def test_the_program_is_found_on_path_or_by_its_path(cloudflared, monkeypatch, tmp_path):
    def found(program: str) -> str:
        return sniroute_launchers.cloudflared_launcher(program, {}).find()

    assert found(cloudflared.path) == cloudflared.path
    monkeypatch.setenv("PATH", str(cloudflared.directory))
    assert found("cloudflared") == cloudflared.path
    monkeypatch.chdir(cloudflared.directory)
    assert found("./cloudflared") == cloudflared.path
    (tmp_path / "plain").write_text("no program")
    for missing in ("cloudflared2", str(tmp_path), str(tmp_path / "plain")):
        with pytest.raises(TunnelError, match="is not there: install it") as caught:
            found(missing)
        assert caught.value.kind == "failed"


@pytest.mark.parametrize("way", ["named", "on PATH", "by a symlink"])
@pytest.mark.parametrize("mode, what", [(0o777, "the folder"), (0o757, "the program")])
def test_a_program_that_others_may_change_is_not_run(way, mode, what, cloudflared, monkeypatch, tmp_path):
    changed = cloudflared.directory if what == "the folder" else pathlib.Path(cloudflared.path)
    program = cloudflared.path
    if way == "by a symlink":
        program = str(tmp_path / "link")
        os.symlink(cloudflared.path, program)
    elif way == "on PATH":
        program = "cloudflared"
        monkeypatch.setenv("PATH", str(cloudflared.directory))
    launcher = sniroute_launchers.cloudflared_launcher(program, {})
    assert launcher.obstacle == ""
    changed.chmod(mode)
    with pytest.raises(TunnelError) as caught:
        launcher.find()
    path = cloudflared.path if way == "on PATH" else program
    assert str(caught.value) == launcher.obstacle == (
        f"{path} is not run, since {changed} can be changed by other users: chmod o-w {changed}")
    assert launcher.is_there(), "so that nothing else takes its place"


def test_a_script_is_not_run_by_an_interpreter_that_others_may_change(tmp_path):
    interpreter = tmp_path / "python"
    shutil.copy("/bin/sh", interpreter)
    script = tmp_path / "cloudflared"
    for first in (f"#!{interpreter} -e", f"#! {interpreter}"):
        script.write_text(f"{first}\n:\n")
        script.chmod(0o755)
        interpreter.chmod(0o755)
        launcher = sniroute_launchers.cloudflared_launcher(str(script), {})
        assert launcher.find() == str(script)
        interpreter.chmod(0o757)
        with pytest.raises(TunnelError, match=f"is not run, since {interpreter} can be changed by other users"):
            launcher.find()
    for other in (b"\x7fELF", b"", b"#!", b"#!python"):
        script.write_bytes(other)
        assert sniroute_host.interpreter_of(str(script)) == ""


def test_a_folder_above_a_symlink_is_the_kernel_s(tmp_path, cloudflared):
    """`link/..` is the folder above where the link leads, not the one that it stands in."""
    (tmp_path / "link").symlink_to(cloudflared.directory)
    (cloudflared.directory.parent / "program").symlink_to(cloudflared.path)
    path = f"{tmp_path}/link/../program"
    assert os.path.samefile(sniroute_launchers.cloudflared_launcher(path, {}).find(), cloudflared.path)


def test_the_second_program_on_path_does_not_stand_in_for_one_that_others_may_change(cloudflared, monkeypatch,
                                                                                     tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    shutil.copy(cloudflared.path, first)
    monkeypatch.setenv("PATH", f"{first}:{cloudflared.directory}")
    launcher = sniroute_launchers.cloudflared_launcher("cloudflared", {})
    assert launcher.find() == str(first / "cloudflared")
    first.chmod(0o777)
    with pytest.raises(TunnelError, match=f"^{first}/cloudflared is not run, since {first} can be changed by other"):
        launcher.find()


def test_our_own_files_and_python_are_run_wherever_they_are(monkeypatch):
    """This process runs them already."""
    monkeypatch.setattr(sniroute_launchers, "changed_by_others", lambda path: f"{path} can be changed by other users")
    assert sniroute_launchers.carrier_launcher({}).find() == os.path.abspath(sys.executable)
    assert sniroute_launchers.cloudflared_launcher("/bin/sh", {}).obstacle


def test_a_program_that_is_gone_in_the_instant_of_the_look_is_told_in_words(cloudflared, monkeypatch):
    monkeypatch.setattr(sniroute_launchers.shutil, "which", lambda program: program + "-gone")
    with pytest.raises(TunnelError, match="cloudflared-gone: No such file or directory"):
        sniroute_launchers.cloudflared_launcher(cloudflared.path, {}).find()


def test_the_carrier_can_also_be_run_for_one_tunnel():
    """As `explain` shows it."""
    carrier, script = sniroute_launchers.carrier_launcher({}), str(HERE / "sniroute_carrier.py")
    assert carrier.argv("app.test", 20000) == [script, *sniroute_launchers.cloudflared_argv("app.test", 20000)]
    done = subprocess.run([carrier.find(), script, "access", "tcp"], env={}, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"") and b"--hostname is missing" in done.stderr


def test_the_carrier_is_run_by_this_python_with_nothing_but_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(sniroute_launchers, "__file__", str(tmp_path / "sniroute_launchers.py"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for room in OPTIONS["carrier"]:
        monkeypatch.delitem(sys.modules, room, raising=False)  # another test may have imported it
    environ = {name: "x" for name in sniroute_launchers.TUNNEL_ENVIRONMENT}
    launcher = sniroute_launchers.carrier_launcher({**environ, "PATH": "/bin", "TUNNEL_SERVICE_HOSTNAME": "evil"})
    assert launcher.environment == {**environ, "TUNNEL_LOG_OUTPUT": "json"}
    assert not launcher.is_there()
    with pytest.raises(TunnelError) as caught:
        launcher.find()
    assert caught.value.kind == "failed" and str(caught.value) == (
        "sniroute_carrier.py, sniroute_edge.py, sniroute_forwarder.py, sniroute_dial.py, sniroute_upgrade.py, "
        "sniroute_http.py are not beside sniroute.py: copy them there")
    words = launcher.argv("a.test", 20000)
    assert words[-9:] == [str(tmp_path), *sniroute_launchers.cloudflared_argv("a.test", 20000)], "there is no script"
    (tmp_path / "sniroute_carrier.py").write_text(
        "import sys\ndef main():\n    print(sys.argv, sys.flags.isolated, sys.flags.no_site)\n    return 7\n")
    for room in OPTIONS["carrier"][1:]:
        importlib.invalidate_caches()  # the folder has been looked at in this instant
        assert not launcher.is_there() and f"{room}.py" in launcher.obstacle
        (tmp_path / f"{room}.py").touch()
    importlib.invalidate_caches()
    assert launcher.is_there() and launcher.find() == os.path.abspath(sys.executable)
    assert launcher.argv("a.test", 20000)[0] == str(tmp_path / "sniroute_carrier.py")
    for words, seen in ((launcher.shared, ["forwarders"]),
                        (launcher.trial("a.test"), ["access", "tcp", "--hostname", "a.test"])):
        done = subprocess.run([launcher.find(), *words], cwd="/", env=launcher.environment, capture_output=True)
        assert (done.returncode, done.stdout.decode()) == (7, f"{['sniroute_carrier', *seen]} 1 1\n"), done.stderr


IN_A_ZIP = """
import json, sys
sys.path.insert(0, "our.pyz")  # as in `python our.pyz`: relative to the folder it is started in
import sniroute_launchers
carrier = sniroute_launchers.carrier_launcher({})
words = carrier.shared, carrier.trial("a.test"), carrier.argv("a.test", 20000)
print(json.dumps([sniroute_launchers.place(), carrier.is_there(), words]))
"""


def look_into(folder: pathlib.Path, names: list[str]) -> list:
    """What IN_A_ZIP prints where our.pyz holds these files."""
    with zipfile.ZipFile(folder / "our.pyz", "w") as archive:
        for name in names:
            archive.write(HERE / name, name)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", IN_A_ZIP], cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_carrier_is_started_from_inside_a_zip_file(tmp_path):
    place, there, words = look_into(tmp_path, [path.name for path in HERE.glob("sniroute*.py")])
    assert place == str(tmp_path / "our.pyz") and there
    for each in words:
        assert each[:3] == ["-I", "-S", "-c"] and each[4] == place
    (tmp_path / "our.pyz").rename(tmp_path / "other.pyz")
    for words_after, code, said in ((["--version"], 0, b"sniroute_carrier "), (["access", "tcp"], 2, b"--hostname is")):
        run = [*words[0][:4], str(tmp_path / "other.pyz"), *words_after]  # nothing but its words says where it is
        done = subprocess.run([sys.executable, *run], cwd="/", env={}, capture_output=True)
        assert done.returncode == code and said in done.stdout + done.stderr, done.stderr


def test_a_zip_file_without_the_carrier_has_none(tmp_path):
    place, there, _ = look_into(tmp_path, ["sniroute_launchers.py", "sniroute_host.py", "sniroute_scarcity.py",
                                              "sniroute_names.py", "sniroute_refusals.py"])
    assert place == str(tmp_path / "our.pyz") and not there
