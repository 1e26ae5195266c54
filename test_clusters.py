"""Tests of sniroute_clusters.py: targets in Kubernetes clusters, as the router sees them.

The program that finds pods is a stand-in here: fake_cloudflared.py in the manner of a shared process.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import Any

import pytest

import sniroute_clusters
import sniroute_doctor
import sniroute_kubernetes
import sniroute_options
import sniroute_routes
import sniroute_settings
from sniroute_deadlines import FIRST_BYTE_TIMEOUT, GREETING_TIMEOUT
from sniroute_launchers import Launcher, TunnelKey, place
from sniroute_names import OPTIONS
from sniroute_objects import ALTERNATIVES_MAX, BALANCES, NewPod, parse_argument, parse_target
from sniroute_refusals import REFUSALS, Refused, SettingsError
from sniroute_settings import load_settings
from conftest import HOST, connect, wait_until
from testbed.clients import program_path, psql
from testbed.hellos import genuine
from testbed.program import execute
from testbed.running import alert, read_all, read_exactly
from testbed.tunnels import events

NAME = "db.prod.example.com"
HELLO = genuine(name=NAME)
DB = "kubernetes:prod/svc/db:5432"


@pytest.fixture
def program(cloudflared, monkeypatch):
    """The stand-in, in the place of sniroute_kubernetes.py: `far` and `fault` take what a target is told as."""
    real = sniroute_clusters.cluster_launcher
    monkeypatch.setattr(sniroute_clusters, "cluster_launcher", lambda *given: real(*given)._replace(
        program=cloudflared.path, shared=("forwarders",), rooms=()))
    return cloudflared


def told(*options: str, name: str = NAME, **environ: str) -> str:
    """What the program is told for a name."""
    return load_settings([*options], environ).routes.decide(name).tunnel.hostname


def faults(*options: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings([*options], {})
    return list(caught.value.lines)


# -- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target, word", [
    ("kubernetes:prod/svc/db:5432", "prod/svc/db:5432"),
    ("kubernetes:prod/service/db:pg@main", "prod/svc/db:pg@main"),
    ("kubernetes:prod/deployment/db:5432@arn:aws:eks:eu-west-1:1:cluster/x",
     "prod/deploy/db:5432@arn:aws:eks:eu-west-1:1:cluster/x"),
    ("kubernetes:prod/pods/app=db,tier=a:5432", "prod/pods/app=db,tier=a:5432"),
    ("kubernetes:prod/svc/db:5432@a b", "prod/svc/db:5432@a%20b"),
    ("jump:prod/pod/shell/db.internal:5432", "jump:prod/pod/shell/db.internal:5432"),
    ("jump:prod/statefulset/shell/[2001:db8::1]:5432@main", "jump:prod/sts/shell/[2001:db8::1]:5432@main"),
    ("kubernetes:prod/svc/{label}:5432", "prod/svc/db:5432"),
    ("jump:prod/pod/shell/{name}:5432", f"jump:prod/pod/shell/{NAME}:5432"),
])
def test_a_target_is_told_to_the_program_as_one_word(target, word):
    assert told(f"--route=**.example.com={target}") == word


def test_two_spellings_of_a_target_share_a_tunnel():
    routes = load_settings(["--route=a.example.com=kubernetes:prod/service/db:1",
                            "--route=b.example.com=kubernetes:prod/svc/db:1"], {}).routes
    assert routes.decide("a.example.com").tunnel == routes.decide("b.example.com").tunnel


@pytest.mark.parametrize("target, sentence", [
    ("kubernetes:prod/db:5432", "is not NAMESPACE/svc/NAME:PORT[@CONTEXT]"),
    ("kubernetes:prod/svc/db", "it has no :PORT at its end"),
    ("kubernetes:prod/svc/db:65536", "is no port"),
    ("kubernetes:Prod/svc/db:1", "is no namespace"),
    ("kubernetes:prod/svc/../x:1", "is no name of a service"),
    ("kubernetes:prod/vm/db:1", "is no kind"),
    ("kubernetes:prod/svc/db:1@", "is no name of a context"),
    ("kubernetes:prod/{label}/db:1", "is no kind"),
    ("kubernetes:prod/pods/{label}=db:1", "and for nothing else"),
    ("kubernetes:prod/pods/app=db,{label}=db:1", "and for nothing else"),
    ("jump:prod/pod/shell:5432", "is not NAMESPACE/svc/NAME/HOST:PORT[@CONTEXT]"),
    ("jump:prod/pod/shell/-x:5432", "not a host name"),
    ("kubernetes:prod/svc/db:1@" + "x" * 900, "longer than 900"),
])
def test_a_target_that_no_name_could_make_good_stops_the_start(target, sentence):
    (line,) = faults(f"--route=*.example.com={target}")
    assert line.startswith("--route: ") and sentence in line


@pytest.mark.parametrize("name", ["-x.prod.example.com", "x_y.prod.example.com", "x-.prod.example.com"])
def test_a_name_that_is_none_in_kubernetes_is_refused(name):
    settings = load_settings(["--route={service}.prod.example.com=kubernetes:prod/svc/{service}:80"], {})
    with pytest.raises(Refused) as caught:
        settings.routes.decide(name)
    assert caught.value.kind == "bad_name"


# -- what clients may choose -------------------------------------------------------------------


@pytest.mark.parametrize("target, wanted", [
    ("kubernetes:{ns}/svc/{a}:80", ["namespace"]),
    ("kubernetes:team-{ns}/svc/{a}:80", ["namespace"]),
    ("kubernetes:x/svc/{a}:80@{ns}", ["context"]),
    ("jump:{ns}/pod/{a}/db:80@{ns}", ["namespace", "context"]),
])
def test_a_route_whose_clients_choose_the_namespace_or_the_context_says_which(target, wanted):
    lines = faults(f"--route={{a}}.{{ns}}.example.com={target}")
    assert [line.partition(" clients choose the ")[2].partition(":")[0] for line in lines] == wanted
    assert all("--route: {a}.{ns}.example.com: " in line for line in lines)


@pytest.mark.parametrize("target, option, said", [
    ("default/svc/web:80", 'namespaces = ["prod", "team-*"]',
     "its namespace is default, which namespaces = prod, team-* leaves out"),
    ("prod/svc/web:80@dev", 'contexts = ["main"]', "its context is dev, which contexts = main leaves out"),
    ("prod/svc/web:80", 'contexts = ["main"]', "its context is the current one, which contexts = main leaves out"),
])
def test_a_route_that_would_refuse_each_client_stops_the_start(settings_file, target, option, said):
    line, = faults("-c", settings_file(f'[routes."web.example.com"]\ntarget = "kubernetes:{target}"\n{option}\n'))
    assert said in line and line.endswith("each client would be refused")


def test_what_a_route_allows_may_be_what_its_target_says(settings_file):
    load_settings(["-c", settings_file("""
[kubernetes.contexts]
main = "arn:aws:eks:eu-west-1:1:cluster/main"
[routes."web.example.com"]
target = "kubernetes:team-a/svc/web:80@main"
namespaces = ["team-*"]
contexts = ["arn:*"]
""")], {})


CHOSEN = """
[kubernetes.contexts]
main = "arn:aws:eks:eu-west-1:1:cluster/main"
secret = "arn:aws:eks:eu-west-1:1:cluster/secret"

[routes."{service}.{namespace}.{context}.k8s.localhost"]
target = "kubernetes:{namespace}/svc/{service}:80@{context}"
contexts = ["main", "dev-*"]
namespaces = ["default", "team-*"]
"""


def test_a_short_name_is_a_context_and_globs_say_which_there_may_be(settings_file):
    settings = load_settings(["-c", settings_file(CHOSEN)], {})
    assert settings.kubernetes_contexts["main"].endswith("/main")

    def word(name: str) -> str:
        return settings.routes.decide(name).tunnel.hostname

    assert word("web.default.main.k8s.localhost") == "default/svc/web:80@arn:aws:eks:eu-west-1:1:cluster/main"
    assert word("web.team-a.dev-1.k8s.localhost") == "team-a/svc/web:80@dev-1"
    for name, what in (("web.default.secret.k8s.localhost", "context"),
                       ("web.kube-system.main.k8s.localhost", "namespace"),
                       ("web.default.xmain.k8s.localhost", "context")):
        with pytest.raises(Refused) as caught:
            word(name)
        assert (caught.value.kind, caught.value.status) == ("forbidden", 403) and f"no such {what}: its {what}s are " in str(caught.value)


def test_a_glob_may_say_the_real_name_of_a_context(settings_file):
    text = CHOSEN.replace('"main", "dev-*"', '"arn:*/main"')
    settings = load_settings(["-c", settings_file(text)], {})
    settings.routes.decide("web.default.main.k8s.localhost")
    with pytest.raises(Refused):
        settings.routes.decide("web.default.secret.k8s.localhost")


def test_short_names_are_for_targets_without_fields_too_and_a_reload_changes_them(settings_file):
    text = '[kubernetes.contexts]\nmain = "{}"\n[ports]\n"127.0.0.1:5433" = "kubernetes:prod/svc/db:5432@main"\n' \
           '[routes]\n"db.example.com" = ["kubernetes:prod/svc/db:5432@main", "tcp:192.0.2.1:5432"]\n'
    running = load_settings(["-c", settings_file(text.format("one"))], {})

    def words(settings: sniroute_settings.Settings) -> list[str]:
        decision = settings.routes.decide("db.example.com")
        return [settings.port[0].decide("x").tunnel.hostname, decision.members[0].tunnel.hostname]

    assert words(running) == ["prod/svc/db:5432@one"] * 2
    settings_file(text.format("two"))
    assert words(running.again(running)) == ["prod/svc/db:5432@two"] * 2


@pytest.mark.parametrize("text, sentence", [
    ("[kubernetes]\nping = 3\n", "kubernetes.ping: there is no such table"),
    ('[kubernetes.contexts]\n"a b" = "x"\n', "kubernetes_contexts: 'a b=x' is not NAME=CONTEXT"),
    ('kubeconfig = ""\n', "kubeconfig: '' names no path"),
    ('kubernetes_ping = "0s"\n', "kubernetes_ping: '0s' is not a duration"),
])
def test_settings_for_clusters_that_are_wrong_stop_the_start(settings_file, text, sentence):
    (line,) = faults("-c", settings_file(f'{text}[routes]\n"a.b" = "tcp:h:1"\n'))
    assert sentence in line


@pytest.mark.parametrize("label, splits", [
    ("api-80", ["prod/svc/api:80"]),
    ("my-api-http-metrics",
     ["prod/svc/my-api-http:metrics", "prod/svc/my-api:http-metrics", "prod/svc/my:api-http-metrics"]),
    ("a--b-80", ["prod/svc/a--b:80"]),
    ("-x-80", None),
])
def test_the_program_is_told_each_way_to_read_a_name_that_makes_a_target(label, splits):
    """Names of ports have dashes, as those of services do: only the cluster knows which one is meant."""
    route = "--route={service}-{port}.prod.example.com=kubernetes:prod/svc/{service}:{port}"
    if splits is None:
        with pytest.raises(Refused) as caught:
            told(route, name=f"{label}.prod.example.com")
        assert caught.value.kind == "bad_name"
        return
    word = told(route, name=f"{label}.prod.example.com")
    assert word == "|".join(splits)
    assert [each.text for each in parse_argument(word)] == splits


def test_a_hostile_name_makes_few_splits():
    word = told("--route={a}-{b}-{c}.example.com=kubernetes:prod/svc/{a}-{b}:{c}", name=f"{'a-' * 30}a.example.com")
    assert 1 <= len(word.split("|")) <= ALTERNATIVES_MAX == sniroute_routes.SPLITS_MAX


# -- options -----------------------------------------------------------------------------------


def test_options_of_the_route_are_told_too(settings_file):
    settings = load_settings(["-c", settings_file("""
[routes."a.example.com"]
target = "jump:prod/pod/shell/db:5432@main"
container = "tools"
[routes."b.example.com"]
target = "kubernetes:prod/svc/db:5432"
balance = "round-robin"
[routes."c.example.com"]
target = "kubernetes:prod/svc/db:5432"
balance = "least"
""")], {})
    words = [settings.routes.decide(f"{label}.example.com").tunnel.hostname for label in "abc"]
    assert words == ["jump:prod/pod/shell/db:5432?container=tools@main", "prod/svc/db:5432?balance=round-robin",
                     "prod/svc/db:5432"]
    assert all(route.several is None for route in settings.routes.routes), "the pods are the program's to balance"


def test_a_route_may_have_a_pod_made(settings_file):
    settings = load_settings(["-c", settings_file("""
[routes."*.db.example.com"]
target = "jump:prod/pod/shell/{name}:5432@main"
create_pod = { image = "registry.example.com/socat:1", labels = { team = "edge" }, ttl = "2h" }
[routes."a.example.com"]
target = "jump:prod/pod/shell/db:5432"
create_pod = true
[routes."b.example.com"]
target = "jump:prod/pod/shell/db:5432"
create_pod = false
""")], {})
    word, plain, none = (settings.routes.decide(name).tunnel.hostname
                         for name in ("x.db.example.com", "a.example.com", "b.example.com"))
    target, = parse_argument(word)
    assert target == parse_target("prod/pod/shell/x.db.example.com:5432@main", jump=True)._replace(
        create=NewPod("registry.example.com/socat:1", (("team", "edge"),), ttl=7200))
    assert parse_argument(plain)[0].create == NewPod() and "create" not in none


@pytest.mark.parametrize("target", ["jump:{a}/pod/x/db:1", "jump:a/pod/{a}/db:1"])
def test_strangers_do_not_name_pods_that_are_made(settings_file, target):
    (line,) = faults("-c", settings_file(f"""
[routes."{{a}}.example.com"]
target = "{target}"
namespaces = ["*"]
create_pod = true
"""))
    assert "create_pod: is for jump:NAMESPACE/pod/NAME/HOST:PORT, without a field in NAMESPACE and NAME" in line


def test_check_shows_what_clients_may_choose_and_how_pods_are_chosen(settings_file, capsys):
    path = settings_file(CHOSEN + 'balance = "random"\n')
    assert sniroute_doctor.check(load_settings(["check", "-c", path], {})) == 0
    assert "(contexts main,dev-*; namespaces default,team-*; balance random)" in capsys.readouterr().out


def test_the_ways_to_balance_pods_are_the_programs():
    for way in BALANCES:
        assert sniroute_options.POD_BALANCE(way) == way
    with pytest.raises(ValueError):
        sniroute_options.POD_BALANCE("hash")


@pytest.mark.parametrize("options, sentence", [
    ('target = "kubernetes:a/svc/b:1"\ncontainer = "x"', "container: is for jump:"),
    ('target = "jump:a/pod/b/c:1"\ncontainer = "X"', "container: 'X' is not a name"),
    ('target = "tcp:h:1"\nnamespaces = ["x"]', "namespaces: is for kubernetes: and jump:"),
    ('target = "kubernetes:a/svc/b:1"\ncontexts = []', "contexts: '' is not a name, or a glob"),
    ('target = "kubernetes:a/svc/b:1"\ncreate_pod = true', "create_pod: is for jump:"),
    ('target = "jump:a/svc/b/c:1"\ncreate_pod = true', "create_pod: is for jump:NAMESPACE/pod/NAME/HOST:PORT, without"),
    ('target = "jump:a/pods/b=c/c:1"\ncreate_pod = true', "create_pod: is for jump:NAMESPACE/pod/NAME/HOST:PORT"),
    ('target = "jump:a/pod/b/c:1"\ncreate_pod = "yes"', "create_pod: it is true, false, or a table as {"),
    ('target = "jump:a/pod/b/c:1"\ncreate_pod = { ttl = "8 h" }', "create_pod: '8 h' is not a duration"),
    ('target = "jump:a/pod/b/c:1"\ncreate_pod = { image = "-" }', "create_pod: image: '-' is no name of an image"),
    ('target = "kubernetes:a/svc/b:1"\nbalance = "hash"', "balance: 'hash' is none of least"),
    ('target = "kubernetes:a/svc/b:1"\nenv = { A = "b" }', "env: is for exec: and command:"),
    ('target = "kubernetes:a/svc/b:1"\nhealth = "connect"', "health: connect is not for"),
])
def test_options_that_do_not_fit_are_told(settings_file, options, sentence):
    (line,) = faults("-c", settings_file(f'[routes."a.example.com"]\n{options}\n'))
    assert sentence in line


# -- the program -------------------------------------------------------------------------------


def test_the_program_gets_what_plugins_need_and_no_secret_of_the_router():
    environ = {"PATH": "/bin", "HOME": "/home/x", "AWS_PROFILE": "dev", "CLOUDSDK_CONFIG": "/c",
               "HTTPS_PROXY": "http://p:1", "KUBERNETES_SERVICE_HOST": "192.0.2.1", "TUNNEL_SERVICE_TOKEN_ID": "id",
               "CF_ACCESS_TOKEN": "t", "SNIROUTE_ADMIN_TOKEN": "0123456789abcdef", "NOTIFY_SOCKET": "/run/n",
               "BASTION_TOKEN": "b", "PYTHONPATH": "/x"}
    row = load_settings([f"--route=a.b={DB}"], environ).launchers["kubernetes"]
    kept = ("PATH", "HOME", "AWS_PROFILE", "CLOUDSDK_CONFIG", "HTTPS_PROXY", "KUBERNETES_SERVICE_HOST")
    assert row.environment == {**{name: environ[name] for name in kept}, "TUNNEL_LOG_OUTPUT": "json"}
    assert not row.home, "its HOME is the router's: a kubeconfig and the plugins' caches are there"


@pytest.mark.parametrize("options, environ, path", [
    ([], {}, None),
    (["--kubeconfig=/a:b"], {}, "/a:{}/b"),
    (["--kubeconfig=~/x"], {}, "{home}/x"),
    ([], {"KUBECONFIG": "c::/d"}, "{}/c:/d"),
    (["--kubeconfig=/a"], {"KUBECONFIG": "/b"}, "/a"),
    ([], {"SNIROUTE_KUBECONFIG": "/a", "KUBECONFIG": "/b"}, "/a"),
])
def test_the_kubeconfig_is_found_from_any_folder(options, environ, path):
    """The program runs in /."""
    row = load_settings([f"--route=a.b={DB}", *options], environ).launchers["kubernetes"]
    assert row.environment.get("KUBECONFIG") == (path and path.format(os.getcwd(), home=os.path.expanduser("~")))


def test_a_kubeconfig_that_others_may_change_stops_the_start_and_one_that_is_missing_is_said(tmp_path, caplog):
    path = tmp_path / "config"
    sniroute_settings.warn(load_settings([f"--route=a.b={DB}", f"--kubeconfig={path}"], {}))
    assert f"there is no kubeconfig at {path}; names that need it" in caplog.text
    caplog.clear()
    sniroute_settings.warn(load_settings([f"--route=a.b={DB}"], {"HOME": str(tmp_path)}))
    assert f"there is no kubeconfig at {tmp_path}/.kube/config; names that need it" in caplog.text
    caplog.clear()
    in_pod = {"HOME": str(tmp_path), "KUBERNETES_SERVICE_HOST": "192.0.2.1"}
    sniroute_settings.warn(load_settings([f"--route=a.b={DB}"], in_pod))
    assert "kubeconfig" not in caplog.text
    path.write_text("{}")
    path.chmod(0o622)
    (line,) = faults(f"--route=a.b={DB}", f"--kubeconfig=/nowhere:{path}")
    assert line.startswith(f"--kubeconfig: '{path}' is not read, since ")
    path.chmod(0o600)
    sniroute_settings.warn(load_settings([f"--route=a.b={DB}", f"--kubeconfig=/nowhere:{path}"], {}))
    assert "kubeconfig" not in caplog.text


def test_one_process_is_told_of_both_kinds_and_has_the_settings():
    options = "--exec-path=/opt/plugins:/x", "--kubernetes-ping=1m30s"
    launchers = load_settings([f"--route=a.b={DB}", *options], {}).launchers
    row = launchers["kubernetes"]
    assert row is launchers["jump"] and row.carries >= 101 and row.rooms == OPTIONS["kubernetes"]
    assert row.shared[-5:] == ("forwarders", "--ping", "90", "--exec-path", "/opt/plugins:/x")
    words = row.argv("prod/svc/db:5432", 20000)
    assert words == [f"{place()}/sniroute_kubernetes.py", "port-forward", "prod/svc/db:5432", "--listen",
                     "127.0.0.1:20000", "--ping", "90", "--exec-path", "/opt/plugins:/x"]
    assert row.trial("prod/svc/db:5432")[-4:] == ["get", "prod/svc/db:5432", "--exec-path", "/opt/plugins:/x"]


def test_a_router_without_clusters_has_no_row_and_no_file_for_them():
    settings = load_settings(["--route=a.b=tcp:h:1", "--kubeconfig=/x"], {})
    assert settings.launchers.keys() == {"cloudflared", "carrier"}


def test_a_reload_may_bring_the_first_cluster(settings_file):
    running = load_settings(["-c", settings_file('[routes]\n"a.b" = "tcp:h:1"\n')], {})
    settings_file(f'[routes]\n"a.b" = "{DB}"\n')
    assert running.again(running).launchers is running.launchers and "kubernetes" in running.launchers


def test_a_file_that_is_missing_is_named(monkeypatch):
    for scheme in sniroute_routes.CLUSTER_KINDS:
        monkeypatch.delitem(sniroute_routes.SCHEMES, scheme, raising=False)
    here = sniroute_routes.is_here
    gone = "sniroute_links", "sniroute_spdy"
    monkeypatch.setattr(sniroute_routes, "is_here", lambda room: room not in gone and here(room))
    (line,) = faults(f"--route=a.b={DB}")
    assert line.endswith("kubernetes: needs sniroute_links.py, sniroute_spdy.py, which are not beside sniroute.py: "
                         "copy them there")


@pytest.mark.parametrize("reason, kind, final", [
    *((word, kind, final) for word, (kind, final) in sniroute_clusters.REASONS.items()),
    ("lost", "failed", False), ("gone", "failed", False),
])
def test_a_reason_of_the_program(reason, kind, final):
    line = json.dumps({"event": "failed", "listener": "127.0.0.1:20000", "reason": reason,
                       "message": "prod/svc/db:1: no", "error": "why"}).encode()
    assert sniroute_clusters.reason(line) == (kind, "no: why", final)
    assert f"tunnel_{kind}" in REFUSALS


def test_a_tunnel_is_named_as_its_target_is():
    assert str(TunnelKey("kubernetes", "prod/svc/db:1")) == "kubernetes:prod/svc/db:1"
    assert str(TunnelKey("jump", "jump:prod/pod/x/db:1")) == "jump:prod/pod/x/db:1"


# -- through the router ------------------------------------------------------------------------


def test_clients_by_tls_by_host_and_by_port_share_one_process(run, program, echo_server, free_ports):
    port = free_ports(1)[0]
    for word in ("prod/svc/db:5432", "jump:prod/pod/shell/db:1", "prod/svc/x:1"):
        program.far(word, echo_server.address)
    running = run(f"--route={NAME}={DB}", "--route=jump.example.com=jump:prod/pod/shell/db:1",
                  f"--port={HOST}:{port}=kubernetes:prod/svc/x:1", "--http=forward")
    jump = genuine(name="jump.example.com")
    for said, address in ((HELLO, running.address), (jump, running.address), (b"anything", (HOST, port))):
        with connect(address, said) as client:
            assert read_exactly(client, len(said)) == said
    assert len({row["pid"] for row in program.starts()}) == 1
    assert {ending.backend for ending in running.endings} <= {DB, "jump:prod/pod/shell/db:1", "kubernetes:prod/svc/x:1"}
    assert {str(view.key) for view in running.tunnels.snapshot()} == {
        DB, "jump:prod/pod/shell/db:1", "kubernetes:prod/svc/x:1"}


def refusal(running, name: str = NAME) -> tuple[bytes, bytes]:
    """What a TLS client gets, and the first line that one in plain HTTP gets."""
    with running.connect(genuine(name=name)) as client:
        by_tls = read_all(client)
    with running.connect(f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode()) as client:
        return by_tls, read_all(client).partition(b"\r\n")[0]


@pytest.mark.parametrize("reason, kind, description, status", [
    ("unknown", "tunnel_absent", 112, 404), ("context", "tunnel_absent", 112, 404),
    ("port", "tunnel_absent", 112, 404), ("pods", "tunnel_not_ready", 80, 503),
    ("login", "tunnel_login", 49, 502), ("forbidden", "tunnel_forbidden", 49, 502),
    ("unreachable", "tunnel_unreachable", 80, 504), ("certificate", "tunnel_certificate", 80, 502),
    ("plugin", "tunnel_plugin", 80, 502), ("config", "tunnel_config", 80, 502), ("timeout", "tunnel_timeout", 80, 504),
    ("refused", "tunnel_failed", 80, 502),
])
def test_each_reason_has_its_own_word_alert_and_status(run, program, reason, kind, description, status):
    program.fault("prod/svc/db:5432", refuse=True, reason=reason, error="the API server's own words")
    running = run(f"--route={NAME}={DB}", "--http=forward")
    by_tls, line = refusal(running)
    assert by_tls == alert(description) and line.startswith(f"HTTP/1.1 {status} ".encode())
    for number in (1, 2):
        ending = running.ending(number)
        assert ending.reason == kind and "the API server's own words" in ending.detail
    assert len(program.clients()) == 2, "it is final: the program has tried all that can be tried"


def test_a_lost_session_is_tried_once_more(run, program, echo_server):
    program.far("prod/svc/db:5432", echo_server.address)
    program.fault("prod/svc/db:5432", refuse=1, reason="lost")
    running = run(f"--route={NAME}={DB}")
    with running.connect(HELLO) as client:
        assert read_exactly(client, len(HELLO)) == HELLO
    assert running.counter("retries") == 1


def test_a_context_that_is_not_allowed_is_refused_before_anything_starts(run, program, settings_file):
    running = run("-c", settings_file("http = 'forward'\n" + CHOSEN))
    by_tls, line = refusal(running, "web.default.secret.k8s.localhost")
    assert by_tls == alert(112) and line.startswith(b"HTTP/1.1 403 ")
    assert running.ending().reason == "forbidden" and program.starts() == []


@pytest.mark.parametrize("reason", ["pods", "unreachable", "unknown", "lost"])
def test_a_cluster_may_be_one_of_several_backends(run, program, settings_file, echo_server, reason):
    program.fault("prod/svc/db:5432@a", refuse=True, reason=reason)
    program.far("prod/svc/db:5432@b", echo_server.address)
    running = run("-c", settings_file(f'[routes]\n"{NAME}" = ["{DB}@a", "{DB}@b"]\n'))
    for _ in range(3):
        with running.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
    assert {ending.reason for ending in running.endings} <= {"client_closed"}


# -- pages of other sites, and other hosts -----------------------------------------------------


@pytest.mark.parametrize("target, listen, option, refused", [
    (DB, HOST, "", True), ("jump:prod/pod/x/db:1", HOST, "", True), (DB, HOST, 'cross_site = "allow"', False),
    (DB, "0.0.0.0", "", False), (DB, "0.0.0.0", 'cross_site = "refuse"', True), ("tcp:{}:{}", HOST, "", False),
])
def test_a_page_of_another_site_gets_nowhere_on_loopback(run, program, echo_server, settings_file, target, listen,
                                                         option, refused):
    target = target.format(*echo_server.address)
    program.far("*", echo_server.address)
    path = settings_file(f'listen = ["{listen}:0"]\n[routes."{NAME}"]\ntarget = "{target}"\nhttp = "forward"\n'
                         f'{option}\n')
    settings = load_settings(["-c", path], {})
    assert settings.on_loopback is (listen == HOST)
    running = run("-c", path)
    done = threading.Event()
    running.router.call(lambda: (running.router.web.adopt(settings), done.set()))  # `run` listens on loopback
    assert done.wait(10)
    with connect(running.address, f"POST / HTTP/1.1\r\nHost: {NAME}\r\nSec-Fetch-Site: cross-site\r\n"
                                  "Content-Length: 0\r\n\r\n".encode()) as client:
        client.settimeout(5)
        said = client.recv(12)
    assert (said == b"HTTP/1.1 403") is refused


def test_a_cluster_that_other_hosts_reach_is_warned_of(caplog, settings_file):
    def warned(listen: str, more: str = "") -> bool:
        caplog.clear()
        sniroute_settings.warn(load_settings(["-c", settings_file(
            f'listen = ["{listen}:1"]\n[routes."{NAME}"]\ntarget = "{DB}"\n{more}\n')], {}))
        return any("everybody who reaches" in record.getMessage() for record in caplog.records)

    assert warned("0.0.0.0") and not warned(HOST) and not warned("0.0.0.0", 'allow = ["192.0.2.0/24"]')


# -- explain -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, code, out", [
    ("print('pod db-1 is ready')\nprint('it would be chosen')", 0,
     ["far end: pod db-1 is ready", "far end: it would be chosen"]),
    ("import sys\nsys.exit('{\"reason\": \"pods\", \"message\": \"none of 2 pods is ready\"}')", 1,
     ["refused: none of 2 pods is ready (tunnel_not_ready, TLS alert 80)",
      f"to do:   {REFUSALS['tunnel_not_ready'].advice}"]),
])
def test_explain_asks_the_program_what_it_would_choose(monkeypatch, capsys, text, code, out):
    real = sniroute_clusters.cluster_launcher
    monkeypatch.setattr(sniroute_clusters, "cluster_launcher", lambda *given: real(*given)._replace(
        trial=lambda word: ["-c", text, word]))
    settings = load_settings(["explain", NAME, f"--route={NAME}={DB}"], {})
    assert sniroute_doctor.explain(settings) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-len(out):] == out
    assert any(line.startswith("runs:    ") and " port-forward prod/svc/db:5432 --listen " in line for line in lines)


# -- with the program itself, and a cluster ----------------------------------------------------


def settings_for(cluster, text: str) -> str:
    """A file of settings for a router in front of the cluster."""
    path = cluster.directory / "sniroute.toml"
    path.write_text(f'kubeconfig = "{cluster.kubeconfig()}"\n{text}')
    return str(path)


ALL_WAYS = """
http = "forward"
[ports]
"127.0.0.1:{port}" = "kubernetes:default/svc/pg:5432"
[routes]
"db.example.com" = "kubernetes:default/svc/pg:5432@test"
"{{port}}.{{service}}.k8s.localhost" = "kubernetes:default/svc/{{service}}:{{port}}"
"{{service}}-{{port}}.dash.k8s.localhost" = "kubernetes:default/svc/{{service}}:{{port}}"
"jump.example.com" = {{ target = "jump:default/pod/web-1/localhost:{far}", http = "forward" }}
"""


@pytest.fixture
def ways(cluster, run, postgres, web, free_ports):
    """A router in front of a cluster with PostgreSQL and a web server: by TLS, by Host, by a port, and by jump."""
    cluster.pod("pg-0", {5432: postgres}, labels={"app": "pg"})
    cluster.service("pg", {5432: 5432}, {"app": "pg"})
    cluster.pod("web-1", {8080: web.address}, labels={"app": "web"}, names={"http": 8080})
    ports = [{"name": "http-main", "port": 80, "targetPort": "http", "protocol": "TCP"}]
    cluster.service("my-web", ports, {"app": "web"})
    port = free_ports(1)[0]
    running = run("-c", settings_for(cluster, ALL_WAYS.format(port=port, far=web.address[1])))
    running.port = HOST, port
    return running


@pytest.fixture
def web(serve):
    """A web server that says which Host it was asked for."""
    def answer(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            host = data.partition(b"Host: ")[2].partition(b"\r\n")[0]
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(host) + host)
    return serve(answer)


def curl(running, name: str) -> tuple[int, str]:
    """What curl is told for a name: the status and the body."""
    done = execute(program_path("curl", "curl"), "-s", "-w", "\n%{http_code}", "-H", f"Host: {name}",
                   f"http://{HOST}:{running.address[1]}/", said="", text=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def test_psql_and_curl_reach_services_by_tls_by_host_and_by_port(ways, cluster):
    for address, mode in ((ways.address, "require"), (ways.port, "require"), (ways.port, "disable")):
        ended = psql(address, ["select repeat('x', 200000)"], f"sslmode={mode}")
        assert (ended.returncode, ended.stderr, len(ended.stdout)) == (0, b"", 200_001)
    for name in ("80.my-web.k8s.localhost", "http-main.my-web.k8s.localhost", "my-web-80.dash.k8s.localhost",
                 "my-web-http-main.dash.k8s.localhost", "jump.example.com"):
        assert curl(ways, name) == (200, name)
    assert len(ways.tunnels.processes.running) == 1, "one process for all of them"
    assert {ending.reason for ending in ways.endings} <= {"client_closed", "client_reset", "backend_closed"}


def test_psql_does_not_notice_that_the_node_resets_each_session_at_its_end(ways, cluster):
    """As containerd does; kubectl ends at the first of these."""
    cluster.set(runtime="resetting")
    for _ in range(15):
        ended = psql(ways.address, ["select 1"], "sslmode=require")
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"1\n", b"")


def test_what_the_cluster_does_not_have_or_not_allow_is_the_reason(ways, cluster):
    cluster.user("nobody", token="nobodys-token", allow={"pods": "get"})
    assert curl(ways, "80.gone.k8s.localhost")[0] == 404
    assert curl(ways, "81.my-web.k8s.localhost")[0] == 404
    wait_until(lambda: [access.reason for access in ways.accesses] == ["tunnel_absent"] * 2)
    cluster.kubeconfig(user={"token": "nobodys-token"})
    wait_until(lambda: curl(ways, "80.other.k8s.localhost")[0] == 502, what="the other kubeconfig")
    wait_until(lambda: "tunnel_forbidden" in [access.reason for access in ways.accesses])  # behind the client's answer
    (access,) = (access for access in ways.accesses if access.reason == "tunnel_forbidden")
    assert "services" in access.detail and "get" in access.detail


def test_the_log_has_one_warning_of_a_cluster_whose_certificate_is_not_checked(ways, cluster, caplog):
    cluster.kubeconfig(cluster={"insecure-skip-tls-verify": True, "certificate-authority-data": None})
    for name in ("80.my-web.k8s.localhost", "my-web-80.dash.k8s.localhost"):
        assert curl(ways, name) == (200, name)

    def warnings() -> list[dict[str, Any]]:
        return [fields for what, fields in events(caplog) if what == "tunnel program warns"]

    wait_until(warnings, what="the program's line")  # by its stderr, beside the answers
    warning, = warnings()
    assert warning["text"].startswith("insecure-skip-tls-verify: the certificate of cluster cluster is not checked")


@pytest.mark.parametrize("name, code, words", [
    ("80.my-web.k8s.localhost", 0, ["pod default/web-1 port 8080", "web-1 ready"]),
    ("80.gone.k8s.localhost", 1, ["tunnel_absent", "gone"]),
])
def test_explain_says_which_pod_would_be_taken(cluster, capsys, name, code, words):
    cluster.pod("web-1", {8080: (HOST, 1)}, labels={"app": "web"})
    cluster.service("my-web", {80: 8080}, {"app": "web"})
    path = settings_for(cluster, ALL_WAYS.format(port=1, far=1))
    assert sniroute_doctor.explain(load_settings(["explain", name, "-c", path], {})) == code
    out = capsys.readouterr().out
    assert [word for word in words if word not in out] == []


def test_a_browser_finds_a_service_by_its_name(ways, browser):
    """`*.localhost` needs no DNS there."""
    name = "80.my-web.k8s.localhost"
    shown = browser.visit(f"http://{name}:{ways.address[1]}/")
    assert name in shown.partition("<body>")[2]


def test_a_pod_that_is_replaced_is_not_noticed(ways, cluster):
    name = "80.my-web.k8s.localhost"
    assert curl(ways, name) == (200, name)
    cluster.replace("web-1")
    assert curl(ways, name) == (200, name)
    assert {access.status for access in ways.accesses} == {200}


def test_clients_wait_for_a_pod_that_becomes_ready(ways, cluster):
    cluster.ready("web-1", False)
    name = "80.my-web.k8s.localhost"
    with connect(ways.address, f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()) as client:
        wait_until(lambda: cluster.requests(method="GET", path="/api/v1/namespaces/default/services/my-web"))
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        cluster.ready("web-1")
        client.settimeout(10)
        assert client.recv(12) == b"HTTP/1.1 200"


@pytest.fixture
def hasty(monkeypatch):
    """The program gives up soon."""
    real = sniroute_clusters.cluster_launcher

    def launcher(*given: Any) -> Launcher:
        row = real(*given)
        hurry = "import sniroute_passage as p; p.START = sniroute_kubernetes.START = 2.0; sys.exit("
        return row._replace(shared=tuple(word.replace("sys.exit(", hurry) for word in row.shared))

    monkeypatch.setattr(sniroute_clusters, "cluster_launcher", launcher)


def test_the_program_gives_up_before_the_router_does():
    """So its words are the reason."""
    assert sniroute_kubernetes.START < min(FIRST_BYTE_TIMEOUT, GREETING_TIMEOUT)


def test_a_service_without_a_ready_pod_is_refused_with_the_state_of_each(hasty, ways, cluster):
    cluster.ready("web-1", False)
    status, _ = curl(ways, "80.my-web.k8s.localhost")
    wait_until(lambda: ways.accesses)  # behind the client's answer
    (access,) = ways.accesses
    assert (status, access.reason) == (503, "tunnel_not_ready") and "web-1 not ready" in access.detail
