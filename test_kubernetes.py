"""Tests of the Kubernetes program as people and sniroute run it (sniroute_kubernetes): its commands and options.

It is a child of the test, before a stand-in for a cluster.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time

import pytest

import sniroute_kubernetes
from conftest import HOST, connect, echo, linux, wait_until
from sniroute_kubernetes import main, parse_words
from sniroute_refusals import SettingsError
from testbed.carrier import parallel, receive, receive_all
from testbed.clients import psql
from testbed.cluster import TOKEN

NOISE = bytes(range(256)) * 4096  # 1 MiB


def ask(address, data: bytes = b"hello") -> bytes:
    with connect(address) as client:
        client.sendall(data)
        return receive(client, len(data))


# -- port-forward ------------------------------------------------------------------------------


def test_port_forward(app, kubernetes, echo_server):
    there = app(echo_server.address)
    run = kubernetes("port-forward", there.target, "--listen", f"{HOST}:0")
    address, = run.listening()
    assert ask(address, NOISE) == NOISE
    assert run.end() == 0


def test_a_port_that_is_taken(app, kubernetes, echo_server):
    run = kubernetes("port-forward", app(echo_server.address).target, "--listen", "{}:{}".format(*echo_server.address))
    assert run.end(None) == 1 and "cannot listen on" in run.all_rows()[0]["message"]


def test_psql_through_a_runtime_that_resets(kube, app, kubernetes, postgres):
    """Each session of PostgreSQL with TLS ends in a reset, which ends its own client only."""
    kube.set(runtime="resetting")
    there = app(postgres)
    run = kubernetes("port-forward", there.target, "--listen", f"{HOST}:0")
    address, = run.listening()
    for _ in range(5):
        answer = psql(address, ["select 1"], "sslmode=require")
        assert (answer.returncode, answer.stdout) == (0, b"1\n"), answer.stderr
    assert len(there.sessions()) <= 3 and not run.rows("failed")


# -- pods that are made ------------------------------------------------------------------------

SHELLS = (f"shell-{number}" for number in range(100))


def made(kube, since: float) -> list[tuple[str, str]]:
    """What was asked for pods: verb and name."""
    return [(row["verb"], row["name"]) for row in kube.requests()
            if row["verb"] in ("create", "delete") and row["resource"] == "pods" and row["time"] >= since]


def test_a_jump_has_its_pod_made_and_removed(kube, kubernetes, echo_server):
    shell, since = next(SHELLS), time.monotonic()
    target = "jump:default/pod/{}/{}:{}?create=true".format(shell, *echo_server.address)
    run = kubernetes("get", target)
    assert run.end(None) == 0 and made(kube, since) == []
    run = kubernetes("forwarders", stdin=subprocess.PIPE)
    run.tell(f"listen {HOST}:0 {target}")
    address, = run.listening()
    assert parallel(address, [b"hello"] * 4) == [b"hello"] * 4
    labels = kube.get("pods", shell)["metadata"]["labels"]
    assert labels["app.kubernetes.io/managed-by"] == "sniroute"
    run.tell(f"close {HOST}:{address[1]}")
    wait_until(lambda: made(kube, since) == [("create", None), ("delete", shell)])
    run.tell(f"listen {HOST}:0 {target}")
    wait_until(lambda: len(run.rows("listening")) == 2)
    assert ask(run.listening(2)[1]) == b"hello"


def test_a_pod_that_was_made_for_several_targets_is_removed_with_the_last_of_them(kube, kubernetes, echo_server, serve):
    shell, since = next(SHELLS), time.monotonic()
    run = kubernetes("forwarders", stdin=subprocess.PIPE)
    for at, far in enumerate((echo_server, serve(echo)), 1):
        run.tell("listen {}:0 jump:default/pod/{}/{}:{}?create=true".format(HOST, shell, *far.address))
        wait_until(lambda: len(run.rows("listening")) == at)
    first, second = run.listening(2)
    assert ask(first) == ask(second) == b"hello"
    with connect(second) as client:
        client.sendall(b"one")
        assert receive(client, 3) == b"one"
        run.tell("close {}:{}".format(*first))
        wait_until(lambda: run.rows("closed"))
        assert ask(second) == b"hello"
        client.sendall(b"two")
        assert receive(client, 3) == b"two"
        assert made(kube, since) == [("create", None)], "the other target uses it"
    run.tell("close {}:{}".format(*second))
    wait_until(lambda: made(kube, since) == [("create", None), ("delete", shell)])


@pytest.mark.parametrize("end", [signal.SIGTERM, None], ids=["SIGTERM", "the end of stdin"])
def test_a_pod_that_was_made_does_not_outlive_the_program(kube, kubernetes, echo_server, end):
    shell = next(SHELLS)
    run = kubernetes("forwarders", stdin=subprocess.PIPE)
    run.tell("listen {}:0 jump:default/pod/{}/{}:{}?create=true".format(HOST, shell, *echo_server.address))
    address, = run.listening()
    assert ask(address) == b"hello"
    if end is None:
        run.process.stdin.close()
    assert run.end(end) == 0
    wait_until(lambda: gone(kube, shell))


def gone(kube, name: str) -> bool:
    try:
        return bool(kube.get("pods", name)["metadata"].get("deletionTimestamp"))
    except ValueError:
        return True


def test_an_api_server_that_does_not_answer_at_the_end_costs_two_seconds_at_most(kube, kubernetes, echo_server):
    shell = next(SHELLS)
    run = kubernetes("forwarders", stdin=subprocess.PIPE, prepare="import sniroute_kubernetes\nsniroute_kubernetes.LEAVE = 0.1")
    run.tell("listen {}:0 jump:default/pod/{}/{}:{}?create=true".format(HOST, shell, *echo_server.address))
    address, = run.listening()
    assert ask(address) == b"hello"
    kube.fault("hang", verb="delete")
    assert run.end(signal.SIGTERM) == 0


def test_who_may_not_make_a_pod_is_told_what_would_grant_it(kube, kubernetes, echo_server):
    kube.user("jumper", token="jumper-token", allow={"pods": "get list watch delete", "pods/exec": "get create"})
    path = kube.kubeconfig("jumper", user={"token": "jumper-token"})
    run = kubernetes("forwarders", "--kubeconfig", str(path), stdin=subprocess.PIPE)
    run.tell("listen {}:0 jump:default/pod/{}/{}:{}?create=true".format(HOST, next(SHELLS), *echo_server.address))
    address, = run.listening()
    with connect(address) as client:
        assert receive_all(client) == (b"", "RST")
    row, = wait_until(lambda: run.rows("failed"))
    assert row["reason"] == "forbidden" and 'resources: ["pods"], verbs: ["create"]' in row["error"]


# -- forwarders, as sniroute starts it ---------------------------------------------------------


def test_listeners_come_and_go_as_stdin_says(app, kubernetes, echo_server):
    first, second = app(echo_server.address), app(echo_server.address)
    run = kubernetes("forwarders", stdin=subprocess.PIPE)
    run.tell(f"listen {HOST}:0 {first.target}", f"listen {HOST}:0 {second.target}", f"listen {HOST}:0 nonsense")
    addresses = run.listening(2)
    assert [ask(address) for address in addresses] == [b"hello"] * 2
    row, = wait_until(lambda: run.rows("closed"))
    assert "'nonsense' is not NAMESPACE/svc/NAME:PORT" in row["error"]
    run.tell(f"close {HOST}:{addresses[0][1]}")
    wait_until(lambda: len(run.rows("closed")) == 2)
    wait_until(lambda: not first.sessions(ended=None))
    with pytest.raises(ConnectionRefusedError):
        connect(addresses[0])
    assert ask(addresses[1]) == b"hello"
    run.process.stdin.close()
    assert run.end(None) == 0


def test_a_failure_is_an_event_with_a_reason(kube, app, kubernetes, echo_server):
    there = app(echo_server.address)
    kube.fault("refuse", resource="pods/portforward", name=there.pods[0])
    run = kubernetes("forwarders", stdin=subprocess.PIPE)
    run.tell(f"listen {HOST}:0 {there.target}")
    address, = run.listening()
    with connect(address) as client:
        assert receive_all(client) == (b"", "RST")
    row = run.failure()
    assert row["reason"] == "forbidden" and row["listener"] == "{}:{}".format(*address)
    assert "portforward" in row["error"] and "admin-token" not in run.errors.decode()


def test_a_cluster_whose_certificate_is_not_checked_is_warned_of_once(kube, app, kubernetes, echo_server):
    unchecked = {"insecure-skip-tls-verify": True, "certificate-authority-data": None}
    there = [app(echo_server.address) for _ in range(2)]
    run = kubernetes("forwarders", "--kubeconfig", str(kube.kubeconfig("unchecked", cluster=unchecked)),
                     stdin=subprocess.PIPE)
    run.tell(*(f"listen {HOST}:0 {each.target}" for each in there))
    for address in run.listening(2):
        assert ask(address) == b"hello"
    assert run.end() == 0  # its last line has been read
    row, = run.rows("warning")
    assert row["level"] == "warn" and "insecure-skip-tls-verify" in row["message"]


def test_a_cluster_that_stands_still_stops_no_client_of_another(kube, make_cluster, app, kubernetes, echo_server):
    """One loop serves all; nothing in it waits for one of them."""
    there, still = app(echo_server.address), make_cluster()
    still.pod("web-1", {8080: echo_server.address})
    config = {"current-context": "", **{f"{what}s": [
        {"name": name, what: value(each)} for name, each in (("kube", kube), ("still", still))]
        for what, value in (("cluster", lambda each: {"server": each.url, "certificate-authority": str(each.ca)}),
                            ("user", lambda each: {"token": TOKEN}))}}
    config["contexts"] = [{"name": name, "context": {"cluster": name, "user": name}} for name in ("kube", "still")]
    path = still.directory / "both"
    path.write_text(json.dumps(config))
    path.chmod(0o600)
    run = kubernetes("forwarders", "--kubeconfig", str(path), stdin=subprocess.PIPE)
    run.tell(f"listen {HOST}:0 {there.target}@kube", f"listen {HOST}:0 default/pod/web-1:8080@still")
    good, bad = run.listening(2)
    assert ask(good) == b"hello"
    still.freeze_process()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(bad)) for _ in range(60)]
        for client in clients:
            client.sendall(b"hello")
        times = []
        for _ in range(40):
            began = time.monotonic()
            assert ask(good) == b"hello"
            times.append(time.monotonic() - began)
        assert sorted(times)[20] < 0.05 and max(times) < 1, times
        still.thaw_process()
        assert [receive(client, 5) for client in clients] == [b"hello"] * 60


@linux
def test_20_targets_fit_into_one_small_process(kube, app, kubernetes, single_loop_echo):
    there = [app(single_loop_echo) for _ in range(20)]
    run = kubernetes("forwarders", stdin=subprocess.PIPE)
    run.tell(*(f"listen {HOST}:0 {each.target}" for each in there))
    for address in run.listening(20):
        assert parallel(address, [b"hello"] * 2) == [b"hello"] * 2
    assert run.memory() < 45 << 10, f"{run.memory()} KiB"


# -- exec --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command, said, out, code", [
    (["cat"], b"hello\n", b"hello\n", 0),
    (["sh", "-c", "echo out; echo err >&2; exit 3"], b"", b"out\n", 3),
    (["no-such-program"], b"", b"", 1),
    (["false"], b"", b"", 1),
])
def test_exec(kube, app, kubernetes, command, said, out, code):
    there = app((HOST, 1))
    run = kubernetes("exec", f"default/pod/{there.pods[0]}", "--", *command, stdin=subprocess.PIPE)
    run.process.stdin.write(said)
    run.process.stdin.close()
    assert run.process.stdout.read() == out
    assert run.process.wait(10) == code
    assert code != 3 or wait_until(lambda: run.errors == b"err\n")


@pytest.mark.parametrize("says, out", [("", b""), ("echo hello;", b"hello\n")])
@pytest.mark.parametrize("broken", [(), ("spdy",)], ids=["spdy", "websocket"])
def test_a_command_whose_session_is_lost_has_failed_and_is_not_run_again(kube, app, kubernetes, tmp_path, says, out,
                                                                         broken):
    for transport in broken:
        kube.fault("refuse", transport=transport)
    there = app((HOST, 1))
    runs = tmp_path / "runs"
    run = kubernetes("exec", f"default/pod/{there.pods[0]}", "--", "sh", "-c", f"echo run >> {runs}; {says} sleep 30")
    wait_until(lambda: runs.exists() and runs.read_text())
    if says:
        assert run.process.stdout.read(len(out)) == out
    kube.end_sessions("rst", pod=there.pods[0])
    assert run.process.wait(10) == 1
    assert runs.read_text() == "run\n"
    assert len(kube.executions(pid=kube.executions()[-1]["pid"])) == 1


def test_a_command_is_asked_for_once_though_nobody_answers(kube, app, kubernetes, tmp_path):
    """By WebSocket it runs as soon as the API server has heard of it."""
    kube.fault("refuse", transport="spdy")
    kube.fault("delay", resource="pods/exec", seconds=0.5, transport="websocket", times=1)
    there = app((HOST, 1))
    runs = tmp_path / "runs"
    run = kubernetes("exec", f"default/pod/{there.pods[0]}", "--", "sh", "-c", f"echo run >> {runs}; cat",
                     prepare="import sniroute_api; sniroute_api.SILENT = 0.1")
    assert run.process.stdout.read() == b""
    run.process.wait(10)
    wait_until(lambda: runs.exists() and kube.executions()[-1]["code"] is not None)
    assert runs.read_text() == "run\n"
    assert len(kube.requests(name=there.pods[0], resource="pods/exec", transport="websocket")) == 1


def test_a_command_of_an_old_cluster_may_be_silent_though_its_input_has_ended(kube, app, kubernetes):
    kube.set(version="1.28")
    there = app((HOST, 1))
    prepare = "carrier.GRACE = 0.1; carrier.HALF_LAST = 0.2"
    words = "exec", f"default/pod/{there.pods[0]}", "--", "sh", "-c", "cat; sleep 0.6; echo done"
    run = kubernetes(*words, prepare=prepare)
    assert run.process.stdout.read() == b"done\n" and run.process.wait(10) == 0
    kube.fault("refuse", transport="spdy")
    run = kubernetes(*words, prepare=prepare)
    assert run.process.stdout.read() == b"" and run.process.wait(10) == 1
    wait_until(lambda: b"cannot tell a command that its input has ended" in run.errors)


def test_exec_in_a_container(kube, app, kubernetes):
    there = app((HOST, 1), containers=("main", "tools"))
    run = kubernetes("exec", f"default/pod/{there.pods[0]}", "--container", "tools", "--", "true")
    assert run.end(None) == 0
    assert there.sessions()[-1]["container"] == "tools"


# -- get ---------------------------------------------------------------------------------------


def got(run) -> tuple[int, list[str]]:
    lines = run.process.stdout.read().decode().splitlines()
    return run.process.wait(10), lines


def test_get_says_what_would_be_chosen(kube, app, kubernetes, echo_server):
    there = app(echo_server.address, echo_server.address)
    kube.ready(there.pods[0], False)
    code, lines = got(kubernetes("get", there.target))
    assert (code, lines[0]) == (0, f"pod default/{there.pods[1]} port 8080")
    assert lines[1:] == [f"  {there.pods[0]} not ready", f"  {there.pods[1]} ready"]


def test_get_says_why_there_is_none(kube, app, kubernetes, echo_server):
    there = app(echo_server.address)
    kube.ready(there.pods[0], False)
    code, lines = got(kubernetes("get", there.target))
    assert code == 1 and lines[0].startswith("no pod is ready: ")
    code, lines = got(kubernetes("get", "default/svc/nobody:80"))
    assert code == 1 and lines == ['the cluster has no such object (404): HTTP 404: services "nobody" not found']


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
    (["port-forward"], "port-forward takes one TARGET, and --listen HOST:PORT"),
    (["port-forward", "x", "--listen", "127.0.0.1:0"], "'x' is not NAMESPACE/svc/NAME:PORT"),
    (["port-forward", "a/svc/b:1", "--listen", "nowhere"], "--listen: 'nowhere' is not HOST:PORT"),
    (["forwarders", "x"], "unexpected 'x'"),
    (["forwarders", "--nonsense", "x"], "unknown option '--nonsense'"),
    (["forwarders", "--ping"], "--ping: it needs a value"),
    (["forwarders", "--ping=0"], "--ping: '0' is no number of seconds"),
    (["forwarders", "--ping", "soon"], "--ping: 'soon' is no number of seconds"),
    (["forwarders", "--loglevel", "loud"], "--loglevel: 'loud' is none of debug, info"),
    (["exec", "default/pod/x"], "exec takes one pod, `--`, and the command"),
    (["exec", "x", "--", "true"], "'x' is not NAMESPACE/pod/NAME[@CONTEXT]: it needs a namespace, a kind and a name"),
    (["exec", "a/pod/b:80", "--", "true"], "'a/pod/b:80' is not NAMESPACE/pod/NAME[@CONTEXT]: 'b:80' is no name of a pod"),
    (["exec", "default/pod/x", "--container", "-x", "--", "true"], "container = '-x'"),
    (["get"], "get takes one TARGET"),
    (["get", "svc/web:80", "-n", "default"], "unknown option '-n'"),
    (["get", "default/svc/-x:1"], "is no name of a service"),
])
def test_wrong_words_stop_the_start(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words, code, said", [
    (["--version"], 0, "sniroute_kubernetes "), (["--help"], 0, "usage: "), (["get", "--help"], 0, "usage: "),
    ([], 2, ""), (["nonsense"], 2, "")])
def test_words_about_the_program(words, code, said, capsys):
    assert main(words) == code
    assert capsys.readouterr().out.startswith(said)


def test_options_may_have_their_value_behind_an_equals_sign():
    arguments, settings, given = parse_words(
        ["a", "--context=main", "--ping", "2.5s", "--exec-path", "/x:/y", "b"], {"TUNNEL_LOG_OUTPUT": "json"})
    assert arguments == ["a", "b"] and given["ping"] == 2.5
    assert settings == ("", "main", "/x:/y", 2.5, "info", "json")
    with pytest.raises(SettingsError):
        parse_words(["--context"], {})


def test_every_option_is_in_the_help():
    for name in sniroute_kubernetes.OPTIONS:
        assert f"--{name} " in sniroute_kubernetes.USAGE
    for name in sniroute_kubernetes.COMMANDS:
        assert f"sniroute_kubernetes.py {name} " in sniroute_kubernetes.USAGE


def test_a_context_for_targets_that_name_none(kube, app, kubernetes, echo_server):
    there = app(echo_server.address)
    config = kube.kubeconfig("other", context_name="arn:aws:eks:eu:1:cluster/x")
    run = kubernetes("port-forward", there.target, "--listen", f"{HOST}:0", "--kubeconfig", str(config),
                     "--context", "arn:aws:eks:eu:1:cluster/x")
    address, = run.listening()
    assert ask(address) == b"hello"
    run = kubernetes("get", f"{there.target}@nobody", "--kubeconfig", str(config))
    code, lines = got(run)
    assert code == 1 and "nobody" in lines[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_resets_its_clients(app, kubernetes, echo_server, number):
    run = kubernetes("port-forward", app(echo_server.address).target, "--listen", f"{HOST}:0")
    address, = run.listening()
    with connect(address) as client:
        client.sendall(b"x")
        assert receive(client, 1) == b"x"
        assert run.end(number) == 0
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""
