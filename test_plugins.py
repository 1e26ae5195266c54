"""Tests of sniroute_plugins.py: credential plugins, through requests to the stand-in for a cluster.

What a plugin is told, and each answer that is none, are in test_kubeconfig.py.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest

import sniroute_plugins
from conftest import HERE, linux, wait_until
from sniroute_dial import Failed
from sniroute_kubeconfig import KubeconfigError, Plugin
from sniroute_plugins import PluginRun, Sources, last_line, run_plugin, without_secrets
from testbed.apis import told
from testbed.cluster import TOKEN
from testbed.tunnels import runs

VERSION = "/version"
PODS = "/api/v1/namespaces/default/pods"
V1 = "client.authentication.k8s.io/v1"


class PluginProgram:
    """A credential plugin: a script in Python.  Each run adds a line to `runs`."""

    def __init__(self, folder: pathlib.Path, name: str = "log-in"):
        self.path = folder / name
        self.log = folder / f"{name}.runs"

    def write(self, body: str, mode: int = 0o755) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(f"#!{sys.executable} -IS\nimport json, os, sys, time\nlog = {str(self.log)!r}\n"
                       "open(log, 'a').write(json.dumps([sys.argv[1:], dict(os.environ)]) + '\\n')\n" + body)
        new.chmod(mode)
        new.replace(self.path)

    def answers(self, version: str = V1, before: str = "", **status: str) -> None:
        """It prints a credential; `before` is done before that."""
        answer = {"apiVersion": version, "kind": "ExecCredential", "status": status}
        self.write(f"{before}\nprint({json.dumps(json.dumps(answer))})\n")

    @property
    def runs(self) -> list[tuple[list[str], dict[str, str]]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def user(self, command: str | None = None, version: str = V1, **more: object) -> dict[str, object]:
        """The user of a kubeconfig."""
        return {"exec": {"apiVersion": version, "command": command or str(self.path), "interactiveMode": "Never",
                         **more}}


@pytest.fixture
def plugin(tmp_path_factory):
    return PluginProgram(tmp_path_factory.mktemp("bin"))


def in_future(seconds: float) -> str:
    """A time as a plugin says it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))


@pytest.mark.parametrize("version", [V1, f"{V1}beta1"])
def test_a_plugin_says_who_we_are_and_is_run_once(cluster, call, plugin, version):
    plugin.answers(version, "assert sys.stdin.read() == ''", token=TOKEN, expirationTimestamp=in_future(3600))
    caller = call(cluster.kubeconfig(user=plugin.user(
        version=version, args=["get", "token"], env=[{"name": "PROFILE", "value": "dev"}], provideClusterInfo=True)),
        environ={"HOME": "/nowhere"})
    got = [caller.begin(PODS)[1] for _ in range(50)]
    caller.until(lambda: all(got))
    assert all(reply.status == 200 for [reply] in got)
    (args, environ), = plugin.runs
    info = json.loads(environ["KUBERNETES_EXEC_INFO"])
    assert args == ["get", "token"] and environ["PROFILE"] == "dev" and environ["HOME"] == "/nowhere"
    assert info["apiVersion"] == version and info["spec"]["cluster"]["server"] == cluster.url


def test_a_plugins_answer_is_used_until_it_expires(cluster, call, plugin, soon):
    plugin.answers(token=TOKEN, expirationTimestamp=in_future(3600))
    caller = call(cluster.kubeconfig(user=plugin.user()))
    caller.get(PODS)
    caller.get(PODS)
    assert len(plugin.runs) == 1
    caller.apis.of("").identity.wall = lambda: time.time() + 3595
    assert caller.get(PODS).status == 200 and len(plugin.runs) == 2


def test_a_plugin_is_run_again_where_its_answer_is_refused_once_for_all(cluster, call, plugin):
    plugin.answers(token="old")
    cluster.user("admin", token="old")
    caller = call(cluster.kubeconfig(user=plugin.user()))
    caller.get(PODS)
    cluster.user("admin", token="new")
    plugin.answers(token="new")
    got = [caller.begin(PODS)[1] for _ in range(10)]
    caller.until(lambda: all(got))
    assert [reply.status for [reply] in got] == [200] * 10 and len(plugin.runs) == 2
    cluster.user("admin", token="newer")
    told(caller.get(PODS), "login")
    told(caller.get(PODS), "login")
    assert len(plugin.runs) == 2, "not for each client of a user whom the cluster does not know"


def test_a_plugin_may_answer_with_a_certificate(cluster, call, plugin, soon):
    cluster.user("carol")
    certificate, key = (path.read_text() for path in cluster.client_certificate("carol"))
    plugin.answers(clientCertificateData=certificate, clientKeyData=key)
    caller = call(cluster.kubeconfig(user=plugin.user()))
    assert caller.get(PODS).status == 200
    caller.get(PODS)
    assert cluster.requests()[-1]["user"] == "carol" and len(cluster.connections()) == 1
    certificate, key = (path.read_text() for path in cluster.client_certificate("dave"))
    cluster.user("dave")
    plugin.answers(clientCertificateData=certificate, clientKeyData=key)
    caller.apis.of("").identity.credential = None
    assert caller.get(PODS).status == 200
    assert cluster.requests()[-1]["user"] == "dave" and len(cluster.connections()) == 2, "a new connection"


def test_another_user_of_the_kubeconfig_does_not_get_the_credential_of_the_first(cluster, call, plugin, soon):
    plugin.answers(token=TOKEN)
    caller = call(cluster.kubeconfig(user=plugin.user()))
    caller.get(PODS)
    cluster.user("bob", token="bob-token")
    plugin.answers(token="bob-token")
    cluster.kubeconfig(user=plugin.user(args=["--as=bob"]))
    caller.get(PODS)
    assert [request["user"] for request in cluster.requests()] == ["admin", "bob"]


@pytest.mark.parametrize("body, words", [
    ("print('first', file=sys.stderr); print('  not logged in \\x1b[0m ', file=sys.stderr); sys.exit(7)",
     "ended with 7: not logged in ?[0m"),
    ("sys.exit(1)", "ended with 1, and said nothing"),
    ("os.kill(os.getpid(), 9)", "was killed by signal 9, and said nothing"),
    ("pass", "printed nothing"),
    ("print('x' * (1 << 21))", "printed more than 1 MiB"),
    ("print('{}')", "printed no ExecCredential in JSON"),
    ("sys.stderr.write('a' * (1 << 20) + chr(10) + 'password: hunter2'); sys.exit(1)", "ended with 1: password***"),
])
def test_a_plugin_that_fails_is_a_reason_with_its_last_words(call, cluster, plugin, body, words):
    plugin.write(body)
    caller = call(cluster.kubeconfig(user=plugin.user()))
    said = told(caller.get(PODS), "plugin")
    assert said.startswith(f"the plugin {plugin.path} ") and words in said and "hunter2" not in said


def test_a_plugin_of_a_kubeconfig_that_others_may_change_is_not_run(call, cluster, plugin):
    """They could name any program there."""
    plugin.answers(token=TOKEN)
    path = cluster.kubeconfig(user=plugin.user())
    path.chmod(0o666)
    said = told(call(path).get(PODS), "plugin")
    assert said == f"the plugin {plugin.path} is not run: {path} can be changed by other users: chmod o-w {path}"
    assert not plugin.runs


def test_a_plugin_that_leaves_somebody_behind_who_says_more_and_more(call, cluster, plugin, monkeypatch):
    monkeypatch.setattr(sniroute_plugins, "LEFT", 0.2)
    plugin.answers(before="""
if not os.fork():
    try:
        while True:
            os.write(2, b'x' * 65536)
    finally:
        os._exit(0)
""", token=TOKEN)
    assert call(cluster.kubeconfig(user=plugin.user())).get(PODS, timeout=5).status == 200


def test_a_plugin_that_hangs_is_killed_with_all_that_it_has_started(call, cluster, plugin, monkeypatch, tmp_path):
    """One run for 50 clients, which all hear of it."""
    monkeypatch.setattr(sniroute_plugins, "PLUGIN_TIME", 1.5)  # a start, on a busy host, too
    pids = tmp_path / "pids"
    plugin.write(f"""
child = os.fork()
if child:
    open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child}} ')
sys.stderr.write('x' * (1 << 20) + chr(10) + 'waiting for a browser')
sys.stderr.flush()
time.sleep(60)
""")
    caller = call(cluster.kubeconfig(user=plugin.user()))
    got = [caller.begin(PODS)[1] for _ in range(50)]
    caller.until(lambda: all(got))
    assert {told(result, "plugin") for [result] in got} == {
        f"the plugin {plugin.path} had not ended after 1.5 s, and was killed: waiting for a browser"}
    assert len(plugin.runs) == 1
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda: not os.path.exists(f"/proc/{pid}") or is_zombie(pid), what=f"the end of {pid}")


def is_zombie(pid: int) -> bool:
    """Of a child whose parent was killed: nobody waits for it in a container without an init."""
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_who_cannot_wait_for_a_plugin_hears_so_and_the_next_one_has_its_answer(call, cluster, plugin, tmp_path):
    go = tmp_path / "go"
    plugin.answers(before=f"while not os.path.exists({str(go)!r}): time.sleep(0.01)", token=TOKEN)
    caller = call(cluster.kubeconfig(user=plugin.user()))
    assert told(caller.get(PODS, timeout=1.0), "timeout") == "waiting for the credential plugin"
    go.write_text("")
    assert caller.get(PODS).status == 200 and len(plugin.runs) == 1


def test_a_plugin_may_leave_a_child_that_holds_its_pipes(call, cluster, plugin, tmp_path):
    pid = tmp_path / "pid"
    plugin.answers(before=f"""
child = os.fork()
if not child:
    time.sleep(60)
open({str(pid)!r}, 'w').write(str(child))
""", token=TOKEN)
    assert call(cluster.kubeconfig(user=plugin.user())).get(PODS, timeout=5).status == 200
    os.kill(int(pid.read_text()), 9)


def test_so_many_plugins_run_at_a_time(call, cluster, plugin, tmp_path):
    go = tmp_path / "go"
    plugin.answers(before=f"while not os.path.exists({str(go)!r}): time.sleep(0.01)", token=TOKEN)
    config = {"current-context": "", "clusters": [{"name": "c", "cluster": {
        "server": cluster.url, "certificate-authority": str(cluster.ca)}}],
        "users": [{"name": "u", "user": plugin.user()}],
        "contexts": [{"name": f"c{number}", "context": {"cluster": "c", "user": "u"}} for number in range(4)]}
    path = tmp_path / "config"
    path.write_text(json.dumps(config))
    caller = call(path)
    got = [caller.begin(VERSION, f"c{number}")[1] for number in range(4)]
    caller.until(lambda: len(plugin.runs) == 2)
    caller.until(lambda: len(caller.apis.plugins.waiting) == 2)
    go.write_text("")
    caller.until(lambda: all(got))
    assert [reply.status for [reply] in got] == [200] * 4 and len(plugin.runs) == 4


def test_plugins_that_hang_stop_no_other_cluster(call, cluster, plugin, tmp_path, monkeypatch):
    """As those of clusters behind a VPN that is down."""
    monkeypatch.setattr(sniroute_plugins, "SLOW", 0.2)
    plugin.answers(before="if sys.argv[1] == 'hang': time.sleep(60)", token=TOKEN)
    users = [{"name": name, "user": plugin.user(args=[name])} for name in ("hang", "answer")]
    config = {"current-context": "", "users": users, "clusters": [{"name": "c", "cluster": {
        "server": cluster.url, "certificate-authority": str(cluster.ca)}}],
        "contexts": [{"name": f"{user['name']}-{number}", "context": {"cluster": "c", "user": user["name"]}}
                     for number in range(5) for user in users]}
    path = tmp_path / "config"
    path.write_text(json.dumps(config))
    caller = call(path)
    hanging = [caller.begin(VERSION, f"hang-{number}")[1] for number in range(5)]
    caller.until(lambda: len(plugin.runs) >= 2)  # on a busy host the next ones may be seen with them
    assert caller.get(VERSION, "answer-0", timeout=5).status == 200
    assert not any(hanging)


def test_the_end_of_all_kills_plugins(call, cluster, plugin):
    plugin.write("time.sleep(60)")
    caller = call(cluster.kubeconfig(user=plugin.user()))
    _, got = caller.begin(PODS)
    caller.until(lambda: plugin.runs)
    caller.apis.close()
    caller.until(lambda: not caller.apis.plugins.running)
    assert not got


@pytest.mark.parametrize("place", ["PATH", "exec_path", "home"])
def test_where_a_plugin_is_found(call, cluster, tmp_path, place):
    """A service manager's PATH has neither Homebrew's folder nor one of a home."""
    folder = tmp_path / "google-cloud-sdk" / "bin"
    folder.mkdir(parents=True)
    plugin = PluginProgram(folder, "plugin-of-a-test")
    plugin.answers(token=TOKEN)
    environ = {"PATH": str(folder) if place == "PATH" else "/usr/bin:relative", "HOME": str(tmp_path)}
    exec_path = [str(folder)] if place == "exec_path" else []
    if place != "home":
        environ["HOME"] = "/nowhere"
    path = cluster.kubeconfig(user=plugin.user("plugin-of-a-test"))
    reply = call(path, environ=environ, exec_path=exec_path).get(PODS)
    assert not isinstance(reply, Failed), reply
    assert str(folder) in plugin.runs[0][1]["PATH"].split(":"), "it looks for others there, too"


def test_a_plugin_that_is_not_there_is_told_with_how_to_install_it(call, cluster, plugin):
    path = cluster.kubeconfig(user=plugin.user("no-such-plugin", installHint="Install it:\n  brew install x"))
    assert told(call(path).get(PODS), "plugin") == (
        "the plugin no-such-plugin is not there, neither on PATH nor in --exec-path and the usual folders: "
        "Install it: brew install x")
    path = cluster.kubeconfig(user=plugin.user())
    assert told(call(path).get(PODS), "plugin") == f"the plugin {plugin.path} is not there"


def test_a_plugin_that_others_may_change_is_not_run(call, cluster, plugin):
    plugin.answers(token=TOKEN)
    plugin.path.chmod(0o757)
    said = told(call(cluster.kubeconfig(user=plugin.user())).get(PODS), "plugin")
    assert said.endswith(f"is not run: {plugin.path} can be changed by other users: chmod o-w {plugin.path}")
    assert not plugin.runs


def test_a_kubeconfig_that_is_not_there_is_no_obstacle_for_the_plugin_of_another(cluster, call, plugin, tmp_path):
    plugin.answers(token=TOKEN)
    assert call(tmp_path / "missing", cluster.kubeconfig(user=plugin.user())).get(PODS).status == 200


def test_a_plugin_is_not_begun_when_the_program_ends(cluster, plugin):
    running = PluginRun()
    running.kill()
    sources = Sources((), {}, ())
    plugin.answers(token=TOKEN)
    with pytest.raises(KubeconfigError, match="is not run any more"):
        run_plugin(running, Plugin(V1, str(plugin.path), (), (), False, ""), None, sources)
    assert not plugin.runs


def test_what_goes_wrong_in_a_thread_is_told_without_its_words(call, monkeypatch):
    caller, got = call(), []
    sniroute_plugins.in_thread(caller.loop, "x", lambda: {}["secret"], got.append)
    caller.until(lambda: got)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: exec("raise RuntimeError('no more threads')"))
    sniroute_plugins.in_thread(caller.loop, "x", lambda: 1, got.append)
    caller.until(lambda: got[1:])
    assert [told(failed, "config") for failed in got] == ["x: KeyError", "no more threads"]


def test_a_plugin_that_cannot_be_run(call, cluster, plugin):
    plugin.path.write_text("#!/nowhere/python3\n")
    plugin.path.chmod(0o755)
    said = told(call(cluster.kubeconfig(user=plugin.user())).get(PODS), "plugin")
    assert re.search(r"(cannot be run|ended with 12[67]): .*(not found|No such file)", said), said


PROGRAM = """
import sys
from sniroute_kubeconfig import Plugin
from sniroute_plugins import PluginRun, Sources, run_plugin
run_plugin(PluginRun(), Plugin(sys.argv[1], sys.argv[2], (), (), False, ""), None, Sources((), {}, ()))
"""


@linux
def test_a_plugin_ends_with_its_program_however_that_ends(plugin):
    """One that waits for a login would stay, with the port for its browser, and so would that of each next program."""
    plugin.write("open(log + '.pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    with subprocess.Popen([sys.executable, "-c", PROGRAM, V1, str(plugin.path)], cwd=HERE) as program:
        file = pathlib.Path(f"{plugin.log}.pid")
        pid = int(wait_until(lambda: file.exists() and file.read_text()))
        assert runs(pid)
        program.kill()
    wait_until(lambda: not runs(pid), timeout=2)


@pytest.mark.parametrize("said, shown", [
    (b"", ", and said nothing"), (b"\n \n)\n", ", and said nothing"), (b"one\ntwo\n", ": two"),
    (b"\xff\n", ", and said nothing"),
    (b"F1129 20:41:44.968653   27251 cred.go:145] print credential failed with error: exit status 1 (err: ERROR: no "
     b"account\nPlease run:\n\n  $ gcloud auth login\n\nto obtain new credentials.\n)\n",
     ": print credential failed with error: exit status 1 (err: ERROR: no account"),
    (b"Traceback (most recent call last):\n  File x\nValueError: bad\n", ": ValueError: bad"),
])
def test_the_line_of_a_plugin_that_says_what_is_wrong(said, shown):
    assert last_line(said, Plugin(V1, "x", (), (), False, "")) == shown


@pytest.mark.parametrize("line, shown", [
    ("oauth2: \"invalid_grant\" Token has been expired or revoked.", None),
    ("ERROR: failed to refresh token: invalid_grant", None),
    ("dial tcp: lookup login.example.com on 127.0.0.53:53: no such host", None),
    ("/home/u/.config/gcloud/credentials.db: permission denied", None),
    ("got eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl here", "got *** here"),
    ("Authorization: Bearer abc123def456", "Authorization: Bearer***"),
    ("password=hunter too", "password*** too"),
    ("client_secret: xyz", "client_secret*** "[:-1]),
    ("https://me:word@proxy.example.com:3128 refused", "https://***@proxy.example.com:3128 refused"),
    ("the key 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b", "the key ***"),
    ("PASSCODE_OF_PLUGIN is wrong", "*** is wrong"),
])
def test_a_plugins_last_line_has_no_secret(line, shown):
    plugin = Plugin(V1, "x", (), (("X", "PASSCODE_OF_PLUGIN"), ("Y", "a")), False, "")
    assert without_secrets(line, plugin) == (line if shown is None else shown)


def test_a_refusal_that_comes_when_the_kubeconfig_was_read_anew_has_the_plugin_run(cluster, call, plugin, soon):
    """Another request has found the same proof again meanwhile, in a context of which something else has changed."""
    plugin.answers(token=TOKEN)
    caller = call(cluster.kubeconfig(user=plugin.user()))
    assert caller.get(PODS).status == 200
    identity, answers = caller.apis.of("").identity, []
    refused = identity.found
    cluster.kubeconfig(user=plugin.user(), context={"namespace": "other"})
    assert caller.get(PODS).status == 200 and identity.found is not refused and len(plugin.runs) == 1
    plugin.answers(token="newer")
    identity.refused(refused, answers.append)
    caller.until(lambda: answers)
    assert answers[0] is not None and b"newer" in answers[0].proof
