"""Tests of sniroute_objects.py, in its order: targets as people write them, and objects as a cluster tells them."""

from __future__ import annotations

import random
from typing import Any

import pytest

import sniroute_objects
from sniroute_forwarder import COMMAND_MAX
from sniroute_objects import (ALTERNATIVES_MAX, ARGUMENT_MAX, BALANCES, KINDS, LABELS_MAX, OWNER, READY, RUNNING, TTL,
                              Choice, KubeTarget, NewPod, argument_of, choice_of, lacking, manifest, none_ready,
                              object_path, parse_argument, parse_new_pod, parse_target, with_option)
from sniroute_refusals import Failed, Malformed
from testbed.objects import endpoint, endpoints, pod, service, workload

WEB = parse_target("prod/svc/web:80")
EKS = "arn:aws:eks:eu-west-1:123:cluster/x"


# -- targets, as people write them -------------------------------------------------------------


@pytest.mark.parametrize("text, target", [
    pytest.param("prod/svc/web:80", KubeTarget("service", "prod", "web", 80), id="a service"),
    pytest.param("prod/svc/web:http", KubeTarget("service", "prod", "web", "http"), id="a port's name"),
    pytest.param("prod/svc/web:80@main", KubeTarget("service", "prod", "web", 80, "main"), id="a context"),
    pytest.param(f"prod/svc/web:80@{EKS}", KubeTarget("service", "prod", "web", 80, EKS), id="a context of EKS"),
    pytest.param("prod/svc/web:80@ns/host:6443/user@x Y",
                 KubeTarget("service", "prod", "web", 80, "ns/host:6443/user@x Y"), id="a context has all to the end"),
    pytest.param("prod/deploy/web:8080", KubeTarget("deployment", "prod", "web", 8080), id="a deployment"),
    pytest.param("prod/sts/db:5432", KubeTarget("statefulset", "prod", "db", 5432), id="a statefulset"),
    pytest.param("prod/pod/db-0.x:5432", KubeTarget("pod", "prod", "db-0.x", 5432), id="a pod with a dot"),
    pytest.param("prod/pods/app=web:80", KubeTarget("pods", "prod", "", 80, labels=(("app", "web"),)), id="a label"),
    pytest.param("prod/po/app.kubernetes.io/name=web,Tier=A_b,x=:80", KubeTarget(
        "pods", "prod", "", 80, labels=(("app.kubernetes.io/name", "web"), ("Tier", "A_b"), ("x", ""))), id="labels"),
    pytest.param(f"{'a' * 63}/svc/{'b' * 63}:{'c' * 63}", KubeTarget("service", "a" * 63, "b" * 63, "c" * 63),
                 id="63 characters"),
    pytest.param("prod/svc/a--b:65535", KubeTarget("service", "prod", "a--b", 65535), id="two dashes"),
])
def test_a_target_is_read_and_written(text, target):
    assert parse_target(text) == target
    assert parse_target(target.text) == target
    assert not target.host and target.pod_port == target.port


@pytest.mark.parametrize("kind", KINDS)
def test_long_and_short_words_mean_the_same(kind):
    for word in KINDS[kind].words:
        name = "app=web" if kind == "pods" else "web"
        target = parse_target(f"prod/{word}/{name}:80")
        assert target.kind == kind and target.text == f"prod/{KINDS[kind].words[0]}/{name}:80"


def test_pods_with_a_name_is_a_pod_as_for_kubectl():
    assert parse_target("prod/pods/web-1:80").kind == "pod"


@pytest.mark.parametrize("text, why", [
    ("", "needs a namespace"), ("web:80", "needs a namespace"), ("svc/web:80", "needs a namespace"),
    ("prod/svc/web", "no :PORT"), ("prod/svc/web:", "is no port"), ("prod/svc/:80", "no :PORT"),
    ("prod/svc/:", "no :PORT"),
    ("prod/svc/web:0", "is no port"), ("prod/svc/web:65536", "is no port"), ("prod/svc/web:080", "is no port"),
    ("prod/svc/web:+80", "is no port"), ("prod/svc/web:8_0", "is no port"), ("prod/svc/web:\u0668\u0660", "is no port"),
    ("prod/svc/web:-x", "is no port"), ("prod/svc/web:x_y", "is no port"), ("prod/svc/web:HTTP", "is no port"),
    ("prod/svc/web:" + "p" * 64, "is no port"), ("prod/svc/web:80 ", "is no port"), ("prod/svc/web:80\n", "is no port"),
    ("Prod/svc/web:80", "no namespace"), ("../svc/web:80", "no namespace"), ("/svc/web:80", "no namespace"),
    ("prod%2f/svc/web:80", "no namespace"), ("kube.system/svc/web:80", "no namespace"),
    ("-a/svc/web:80", "no namespace"),
    (f"{'a' * 64}/svc/web:80", "no namespace"), ("prod\n/svc/web:80", "no namespace"),
    ("prod/ingress/web:80", "is no kind; there are svc, deploy, sts, rs, ds, job, pod, pods"),
    ("prod/SVC/web:80", "is no kind"), ("prod//web:80", "is no kind"), ("prod/svc/a=b:80", "no name of a service"),
    ("prod/svc/..:80", "no name"), ("prod/svc/.:80", "no name"), ("prod/svc/a/b:80", "no name"),
    ("prod/svc/web/../x:80", "no name"), ("prod/svc/-x:80", "no name"), ("prod/svc/x_y:80", "no name"),
    ("prod/svc/Web:80", "no name"), ("prod/svc/a.b:80", "no name"), ("prod/svc/web?x:80", "no name"),
    ("prod/svc/w%2e:80", "no name"), ("prod/svc/w eb:80", "no name"), ("prod/svc/w\u00e9b:80", "no name"),
    ("prod/pod/a..b:80", "no name"), ("prod/pod/..:80", "no name"), (f"prod/pod/{'a.' * 127}a:80", "no name"),
    (f"prod/svc/{'b' * 64}:80", "no name"), ("prod/svc/web-:80", "no name"),
    ("prod/pods/=x:80", "no LABEL=VALUE"), ("prod/pods/app=web,:80", "no LABEL=VALUE"),
    ("prod/pods/app==web:80", "no LABEL=VALUE"), ("prod/pods/app!=web:80", "no LABEL=VALUE"),
    ("prod/pods/a=b,a=c:80", "the second of its name"), ("prod/pods/a/b/c=d:80", "no LABEL=VALUE"),
    ("prod/pods/A.b/c=d:80", "no LABEL=VALUE"), ("prod/pods/app=w&b:80", "no LABEL=VALUE"),
    (f"prod/pods/app={'x' * 64}:80", "no LABEL=VALUE"),
    ("prod/pods/" + ",".join(f"a{n}=b" for n in range(LABELS_MAX + 1)) + ":80", f"more than {LABELS_MAX} labels"),
    ("prod/svc/web:80@", "behind @"), ("prod/svc/web:80@a\nb", "behind @"), ("prod/svc/web:80@a\0", "behind @"),
])
def test_what_is_no_target_is_refused_in_words(text, why):
    with pytest.raises(Malformed, match=why) as caught:
        parse_target(text)
    assert caught.value.kind == "bad_name" and "\n" not in str(caught.value) and str(caught.value).isascii()


@pytest.mark.parametrize("text, host, port", [
    ("prod/svc/web/db.internal:5432", "db.internal", 5432), ("prod/pod/web-1/DB.Internal.:5432@x", "db.internal", 5432),
    ("prod/deploy/web/192.0.2.1:1", "192.0.2.1", 1), ("prod/pods/a.b/c=d/[2001:db8::1]:65535", "2001:db8::1", 65535),
    ("prod/svc/web/localhost:80", "localhost", 80)])
def test_a_jump_names_the_far_host(text, host, port):
    target = parse_target(text, jump=True)
    assert (target.host, target.port, target.pod_port) == (host, port, 0)
    assert parse_target(target.text, jump=True) == target


@pytest.mark.parametrize("text", [
    "prod/svc/web:80", "prod/svc/web/:80", "prod/svc/web/db", "prod/svc/web/db:http", "prod/svc/web/db:0",
    "prod/svc/web/-x:80", "prod/svc/web/--help:80", "prod/svc/web/-:80", "prod/svc/web/::1:80",
    "prod/svc/web/[fe80::1%1]:80", "prod/svc/web/0x7f.1:80", "prod/svc/web/2130706433:80", "prod/svc/web/a b:80",
    "prod/svc/web/a;b:80", "prod/svc/web/$x:80", "prod/svc/web/a,b:80", "prod/svc/web/a!!b:80", "prod/svc/web/db:80\n",
    "prod/svc/web/\u00e9:80", "prod/svc//db:80"])
def test_a_jump_that_is_none_is_refused(text):
    """A host becomes a word of a command: it is never an option, nor more than one word."""
    with pytest.raises(Malformed) as caught:
        parse_target(text, jump=True)
    assert caught.value.kind == "bad_name"


def test_no_text_does_anything_else():
    dice = random.Random(19)
    parts = [*"/////::@@.-,=%\n?[]", "prod", "svc", "pods", "web", "a=b", "80", "x", ".."]
    for _ in range(5000):
        text = "".join(dice.choice(parts) for _ in range(dice.randrange(12)))
        for jump in (False, True):
            try:
                target = parse_target(text, jump)
            except Malformed:
                continue
            assert parse_target(target.text, jump) == target
            assert ".." not in object_path(target) and object_path(target).count("/") in (0, 6, 7)


# -- arguments ---------------------------------------------------------------------------------


def test_an_argument_is_one_word_with_its_options_and_its_context():
    target = with_option(parse_target(f"prod/svc/web/db:5432@{EKS} |%\u00e9", jump=True), "container", "tools")
    target = with_option(target, "balance", "first")
    text = argument_of([target])
    assert text == f"jump:prod/svc/web/db:5432?container=tools&balance=first@{EKS}%20%7C%25%C3%A9"
    assert parse_argument(text) == (target,)
    assert argument_of([WEB]) == "prod/svc/web:80" and parse_argument("prod/svc/web:80") == (WEB,)


def test_an_argument_names_what_is_tried_next():
    targets = tuple(parse_target(f"prod/svc/{name}@main") for name in ("my-api-http:metrics", "my-api:http-metrics"))
    assert argument_of(targets) == "prod/svc/my-api-http:metrics@main|prod/svc/my-api:http-metrics@main"
    assert parse_argument(argument_of(targets)) == targets
    assert argument_of([*targets, *targets]) == argument_of(targets)


def test_an_argument_fits_in_a_line_and_costs_few_requests():
    short = [WEB._replace(port=port) for port in range(1, 99)]
    assert len(parse_argument(argument_of(short))) == ALTERNATIVES_MAX
    assert len(parse_argument("|".join(["prod/svc/web:80"] * 99))) == ALTERNATIVES_MAX
    long = [WEB._replace(port=port, context="c" * 500) for port in (1, 2, 3)]
    assert parse_argument(argument_of(long)) == (long[0],)
    with pytest.raises(Malformed, match="longer than"):
        argument_of([WEB._replace(context="c" * ARGUMENT_MAX)])
    assert len("listen [2001:db8:1111:2222:3333:4444:5555:6666]:65535 ") + ARGUMENT_MAX < COMMAND_MAX


@pytest.mark.parametrize("text, why", [
    ("prod/svc/web:80?tty=1", "is no option"), ("prod/svc/web:80?container=", "the name of one"),
    ("prod/svc/web:80?container=-x", "the name of one"),
    ("prod/svc/web:80?balance=hash", f"one of {', '.join(BALANCES)}"),
    ("prod/svc/web:80|", "needs a namespace"), ("", "needs a namespace"), ("prod/svc/web:80@%0a", "behind @")])
def test_an_argument_that_is_none_is_refused(text, why):
    with pytest.raises(Malformed, match=why):
        parse_argument(text)


# -- pods that are made ------------------------------------------------------------------------

SHELL = parse_target("prod/pod/shell/db:5432", jump=True)
DIGEST = "registry.example.com:5000/tools/socat@sha256:" + "0" * 64


@pytest.mark.parametrize("value, new", [
    (True, NewPod()), ({}, NewPod()), ({"image": DIGEST}, NewPod(DIGEST)), ({"ttl": 90.5}, NewPod(ttl=90)),
    ({"labels": {"example.com/team": "Edge_1", "x": ""}}, NewPod(labels=(("example.com/team", "Edge_1"), ("x", "")))),
    ({"limits": {"cpu": "0.5", "memory": "1Gi"}}, NewPod(limits=(("cpu", "0.5"), ("memory", "1Gi")))),
    ({"limits": {}}, NewPod(limits=())),
])
def test_what_a_pod_that_is_made_may_be(value, new):
    assert parse_new_pod(value) == new
    target = SHELL._replace(create=new, context="a@b/c", container="tools")
    assert parse_argument(argument_of([target])) == (target,)
    assert " " not in argument_of([target])


@pytest.mark.parametrize("value, sentence", [
    ("yes", "it is true, false, or a table"), (1, "it is true, false, or a table"), ([], "it is true, false, or"),
    ({"imgae": "x"}, "'imgae' is none of image, labels, limits, ttl"), ({"image": ""}, "image: '' is no name of an"),
    ({"image": "-x"}, "image: '-x' is no name"), ({"image": "a b"}, "image: 'a b' is no name"), ({"image": 1}, "image:"),
    ({"ttl": 59}, "ttl: it is 60 seconds or more"), ({"ttl": 366 * 86400}, "ttl: it is 60"), ({"ttl": "8h"}, "ttl:"),
    ({"labels": {"a b": "c"}}, "labels: 'a b = c' is none of a pod"), ({"labels": {"a": "b c"}}, "labels: 'a = b c' is"),
    ({"labels": {"a": 1}}, "labels: 'a = 1' is none"), ({"labels": "a=b"}, "labels: it is a table"),
    ({"labels": {OWNER: "x"}}, "labels: there are"), ({"labels": {"app.kubernetes.io/managed-by": "x"}}, "are ours"),
    ({"labels": {f"x{number}": "" for number in range(LABELS_MAX + 1)}}, "labels: there are 16 at most"),
    ({"limits": {"gpu": "1"}}, "limits: 'gpu = 1' is none"), ({"limits": {"cpu": "-1"}}, "limits: 'cpu = -1' is none"),
    ({"limits": {"memory": "64 MB"}}, "limits: 'memory = 64 MB' is none"),
])
def test_what_it_may_not_be(value, sentence):
    with pytest.raises(ValueError) as caught:
        parse_new_pod(value)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 5000, "nonsense", "1", "{\"image\":1}"])
def test_an_argument_with_another_pod_is_refused(text):
    with pytest.raises(Malformed):
        with_option(SHELL, "create", text)


@pytest.mark.parametrize("text, jump", [("prod/svc/web/db:1", True), ("prod/pods/a=b/db:1", True), ("prod/pod/x:1", False)])
def test_only_the_pod_of_a_jump_is_made(text, jump):
    with pytest.raises(Malformed):
        with_option(parse_target(text, jump), "create", "true")


def test_a_pod_that_is_made_may_do_nothing_but_connect():
    """It is what the strictest of the Pod Security Standards allows, and it ends by itself."""
    thing = manifest(SHELL._replace(create=NewPod(DIGEST, (("team", "edge"),), ttl=TTL[0])), "me")
    spec, (container,) = thing["spec"], thing["spec"]["containers"]
    assert thing["metadata"] == {"name": "shell", "namespace": "prod", "labels": {
        "team": "edge", "app.kubernetes.io/managed-by": "sniroute", OWNER: "me"}}
    assert (spec["activeDeadlineSeconds"], spec["restartPolicy"], spec["automountServiceAccountToken"]) == (
        60, "Never", False)
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                            "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["limits"] == container["resources"]["requests"] == dict(NewPod().limits)
    assert (container["name"], container["image"], container["command"]) == ("jump", DIGEST, ["sleep", "60"])
    assert manifest(SHELL._replace(create=NewPod(), container="tools"), "me")["spec"]["containers"][0]["name"] == "tools"


# -- plans -------------------------------------------------------------------------------------


def plan(text: str, thing: Any = None) -> sniroute_objects.Plan:
    target = parse_target(text)
    return KINDS[target.kind].plan(target, thing or {})


def refused(text: str, thing: Any) -> Failed:
    with pytest.raises(Failed) as caught:
        plan(text, thing)
    return caught.value


def test_paths_are_those_of_the_api():
    path = {kind: object_path(WEB._replace(kind=kind)) for kind in KINDS}
    assert path == {
        "service": "/api/v1/namespaces/prod/services/web",
        "deployment": "/apis/apps/v1/namespaces/prod/deployments/web",
        "statefulset": "/apis/apps/v1/namespaces/prod/statefulsets/web",
        "replicaset": "/apis/apps/v1/namespaces/prod/replicasets/web",
        "daemonset": "/apis/apps/v1/namespaces/prod/daemonsets/web", "job": "/apis/batch/v1/namespaces/prod/jobs/web",
        "pod": "", "pods": ""}


def test_a_service_leads_to_the_pods_of_its_whole_selector():
    made = plan("prod/svc/web:80", service(selector={"tier": "a", "app.kubernetes.io/name": "web"}))
    assert made.list_path() == ("/api/v1/namespaces/prod/pods?labelSelector="
                                "app.kubernetes.io%2Fname%3Dweb%2Ctier%3Da&limit=100")
    assert made.list_path("a+b=").endswith("&limit=100&continue=a%2Bb%3D")
    assert made.watch_path("12", 240) == (
        "/api/v1/namespaces/prod/pods?labelSelector=app.kubernetes.io%2Fname%3Dweb%2Ctier%3Da&watch=true"
        "&allowWatchBookmarks=true&timeoutSeconds=240&resourceVersion=12")
    assert (made.port, made.admits) == (8080, READY)


@pytest.mark.parametrize("port, ports, inside", [
    pytest.param(80, [(80, 8080)], 8080, id="a number"),
    pytest.param(80, [(80, None)], 80, id="no targetPort"),
    pytest.param(80, [(80, 0)], 80, id="a targetPort of 0, as Go leaves it out"),
    pytest.param(80, [(80, "web-http")], "web-http", id="a name in the pod"),
    pytest.param("http", [(443, 1, "https"), (80, 2, "http")], 2, id="by name"),
    pytest.param(53, [(53, 1, "dns", "UDP"), (53, 2, "dns-tcp", "TCP")], 2, id="UDP is no TCP"),
])
def test_which_port_of_the_pods_it_is(port, ports, inside):
    assert plan(f"prod/svc/web:{port}", service(ports)).port == inside
    assert plan(f"prod/svc/web:{port}", service(ports, clusterIP="None")).port == inside, "headless"


@pytest.mark.parametrize("port, ports, said", [
    (81, [(80, 1, "http"), (53, 1, "dns", "UDP")], "no port 81 of TCP; it has 80 http, 53 dns (UDP)"),
    (53, [(53, 1, "dns", "UDP")], "no port 53 of TCP"),
    ("htt", [(80, 1, "http")], "no port htt of TCP; it has 80 http"),
    ("http", [], "it has none")])
def test_a_port_that_a_service_has_not_is_told_with_those_it_has(port, ports, said):
    failed = refused(f"prod/svc/web:{port}", service(ports))
    assert failed.reason == "port" and said in str(failed)


def test_a_headless_service_without_ports_has_all_of_them():
    assert plan("prod/svc/web:9042", service((), clusterIP="None")).port == 9042


def test_a_jump_needs_no_port_of_the_service():
    target = parse_target("prod/svc/web/db:5432", jump=True)
    assert KINDS["service"].plan(target, service()).port == 0


def test_pods_that_are_not_ready_are_wanted_where_the_service_says_so():
    assert plan("prod/svc/web:80", service(publishNotReadyAddresses=True)).admits == RUNNING


def test_an_external_name_has_no_pods():
    failed = refused("prod/svc/web:80", service(type="ExternalName", externalName="db.example.com"))
    assert failed.reason == "elsewhere" and "tcp:db.example.com:PORT" in str(failed)


def test_a_workload_selects_by_labels_and_expressions():
    thing = workload({"app": "web"}, ({"key": "tier", "operator": "In", "values": ["a", "b"]},
                                      {"key": "x", "operator": "NotIn", "values": ["c"]},
                                      {"key": "y", "operator": "Exists"}, {"key": "z", "operator": "DoesNotExist"}))
    made = plan("prod/deploy/web:http", thing)
    assert made.selects == "app=web,tier in (a,b),x notin (c),y,!z" and made.port == "http"
    assert refused("prod/deploy/web:80", workload({})).reason == "answer", "it would mean all pods"
    assert "Like" in str(refused("prod/deploy/web:80", workload({}, ({"key": "a", "operator": "Like"},))))


def test_labels_and_a_pod_need_no_object():
    assert plan("prod/pods/app=web,x=y:80").query == "labelSelector=app%3Dweb%2Cx%3Dy"
    one = plan("prod/pod/web-1:80")
    assert one.list_path() == "/api/v1/namespaces/prod/pods/web-1" and one.admits == RUNNING
    assert one.watch_path("", 240).startswith(
        "/api/v1/namespaces/prod/pods?fieldSelector=metadata.name%3Dweb-1&watch=true")
    assert "resourceVersion" not in one.watch_path("", 240)


# -- pods --------------------------------------------------------------------------------------


def read(thing: Any) -> sniroute_objects.Pod:
    (made,) = sniroute_objects.read_pod(thing)
    return made


@pytest.mark.parametrize("thing, said", [
    pytest.param(pod("a"), "a ready", id="ready"),
    pytest.param(pod("a", terminating=True), "a terminating", id="terminating, though Ready"),
    pytest.param(pod("a", phase="Succeeded"), "a ended", id="ended"),
    pytest.param(pod("a", phase="Pending", node=""), "a without a node (Unschedulable)", id="no node"),
    pytest.param(pod("a", phase="Pending", waiting="ImagePullBackOff"), "a starting (ImagePullBackOff)", id="starting"),
    pytest.param(pod("a", ready=False), "a not ready", id="not ready"),
    pytest.param(pod("a", ready=False, waiting="CrashLoopBackOff"), "a not ready (CrashLoopBackOff)", id="crashing"),
    pytest.param({"metadata": {"name": "a"}, "spec": {"nodeName": "n"}}, "a starting", id="no status yet"),
])
def test_what_a_pod_does(thing, said):
    assert str(read(thing)) == said


def test_ports_have_names_in_containers_and_sidecars():
    made = read(pod("a", ports={"http": 8080}, sidecar_ports={"mesh": 15000, "http": 1}, init_ports={"setup": 2}))
    assert made.ports == {"http": 8080, "mesh": 15000}


def test_a_pod_in_the_network_of_its_node_is_as_any_other():
    """The node connects to localhost there, too."""
    made = pod("a", ports={"http": 8080})
    made["spec"]["hostNetwork"] = True
    made["spec"]["containers"][0]["ports"][0]["hostPort"] = 8080
    assert read(made) == read(pod("a", ports={"http": 8080}))


@pytest.mark.parametrize("port", [0, -1, 65536, 10 ** 30, "80", 8.5, None])
def test_what_is_no_port_is_none(port):
    """Users write slices, and the API server does not look at all that is in them."""
    assert read(pod("a", ports={"http": port, "other": 1})).ports == {"other": 1}
    made = KINDS["service"].plan(WEB, service([(80, 1)], {}))
    found = list(made.read(endpoints(endpoint("192.0.2.1", "a"), ports={"": port})))
    assert choice_of(WEB, made, found[0]) is None


@pytest.mark.parametrize("value", [1, {}, [[["x"]]], True])
def test_what_should_be_a_text_and_is_none_is_told(value):
    assert refused("prod/svc/web:80", service(selector={"app": value})).reason == "answer"
    assert refused("prod/svc/web:81", service([(80, 1, value)])).reason == "answer"
    assert refused("prod/deploy/web:80", workload({"app": value})).reason == "answer"
    made = KINDS["service"].plan(WEB, service([(80, 1)], {}))
    with pytest.raises(Failed):
        list(made.read(endpoints({"addresses": [value]})))


def test_half_a_character_is_a_part_of_a_query():
    made = plan("prod/svc/web:80", service(selector={"app": "\ud800"}))
    assert made.query == "labelSelector=app%3D%3F"
    assert made.list_path("\udfff").endswith("&continue=%3F")
    assert made.watch_path("\udfff", 240).endswith("&resourceVersion=%3F")


def test_a_command_runs_in_the_default_container():
    assert read(pod("a", containers=("one", "two"))).container == "one"
    assert read(pod("a", containers=("one", "two"), default="two")).container == "two"
    assert read(pod("a", containers=("one", "two"), default="three")).container == "one"
    assert read(pod("a", containers=("one", "two"))).containers == {"one": "sha256:abc", "two": "two:1"}


def test_an_endpoint_slice_names_its_pods():
    target = parse_target("prod/svc/db:5432")
    made = KINDS["service"].plan(target, service([(5432, 1, "pg")], {}))
    assert made.base == "/apis/discovery.k8s.io/v1/namespaces/prod/endpointslices"
    assert made.query == "labelSelector=kubernetes.io%2Fservice-name%3Ddb"
    found = list(made.read(endpoints(
        endpoint("192.0.2.1", "db-0"), endpoint("192.0.2.2", "db-1", ready=False), endpoint("192.0.2.3"),
        endpoint("192.0.2.4", "db-2", terminating=True), endpoint("192.0.2.5", "other", namespace="kube-system"),
        ports={"pg": 5433})))
    assert list(map(str, found)) == [
        "db-0 ready", "db-1 not ready", "192.0.2.3 no pod", "db-2 terminating", "192.0.2.5 no pod"]
    assert [each.pod for each in (choice_of(target, made, pod) for pod in found) if each] == ["db-0"]
    assert choice_of(target, made, found[0]).port == 5433


@pytest.mark.parametrize("name", ["../../kube-system/pods/x", "..", "a/b", "a?b", "a%2fb", "A", "a b", "x" * 254])
def test_a_slice_that_names_another_path_leads_nowhere(name):
    made = KINDS["service"].plan(WEB, service([(80, 1)], {}))
    assert [each.state for each in made.read(endpoints(endpoint("192.0.2.1", name)))] == ["no pod"]
    with pytest.raises(Failed):
        read(pod(name))


def test_addresses_without_pods_are_told():
    target = parse_target("prod/svc/db:5432")
    made = KINDS["service"].plan(target, service([(5432, None)], {}))
    failed = lacking(target, made, list(made.read(endpoints(endpoint("192.0.2.3"), endpoint("192.0.2.4")))))
    assert failed.reason == "elsewhere" and "no pods but 192.0.2.3, 192.0.2.4" in str(failed)


@pytest.mark.parametrize("thing", [
    {"metadata": 1}, {"spec": []}, {"status": {"conditions": {}}}, {"status": {"conditions": [1]}},
    {"metadata": {"name": 1}}, {"spec": {"containers": [{"ports": "x"}]}}, {"spec": {"nodeName": {}}},
    {"status": {"phase": []}}])
def test_garbage_of_a_cluster_is_an_answer_that_helps_nobody(thing):
    with pytest.raises(Failed) as caught:
        read(thing)
    assert caught.value.reason == "answer"


def spoiled(thing: Any, dice: random.Random, inside: bool = False) -> Any:
    """A copy in which one value, anywhere inside, is another."""
    if inside and (not isinstance(thing, (dict, list)) or not thing or dice.random() < 0.15):
        return dice.choice([None, True, 0, -1, "", "x", [], [1], {}, {"x": 1}, [[]], [{}], {"name": []}])
    key = dice.choice(list(thing) if isinstance(thing, dict) else range(len(thing)))
    copy = thing.copy()
    copy[key] = spoiled(thing[key], dice, True)
    return copy


@pytest.mark.parametrize("text, thing", [
    ("prod/svc/web:80", service([(80, "http", "http")])), ("prod/svc/web:http", service([(80, 1, "http")], {})),
    ("prod/deploy/web:80", workload({"app": "web"}, ({"key": "a", "operator": "In", "values": ["b"]},)))])
def test_a_spoiled_answer_raises_nothing_else(text, thing):
    dice = random.Random(19)
    target = parse_target(text)
    pods = [pod("a", ports={"http": 1}, sidecar_ports={"x": 2}), pod("b", phase="Pending", node="", waiting="W")]
    slices = [endpoints(endpoint("192.0.2.1", "db-0"), endpoint("192.0.2.2"))]
    refusals = 0
    for _ in range(1000):
        try:
            made = KINDS[target.kind].plan(target, spoiled(thing, dice) if dice.random() < 0.5 else thing)
            items = slices if "slices" in made.base else pods
            found = [each for item in items for each in made.read(spoiled(item, dice))]
        except Failed as failed:
            assert failed.reason in ("answer", "port", "elsewhere")
            refusals += 1
            continue
        assert made.list_path().isascii() and made.watch_path("1", 1).isascii()
        list(map(str, found))
        assert lacking(target, made, found) or str(none_ready(target, made, found)).isascii()
    assert 100 < refusals < 900


# -- choices -----------------------------------------------------------------------------------


def test_a_named_port_is_looked_up_in_each_pod():
    made = plan("prod/svc/web:80", service([(80, "http")]))
    pods = [read(pod("a", ports={"http": 8080})), read(pod("b", ports={"http": 9090})), read(pod("c"))]
    found = [choice_of(WEB, made, each) for each in pods]
    assert found[:2] == [Choice("prod", "a", "uid-a", 8080, "main", "sha256:abc"),
                         Choice("prod", "b", "uid-b", 9090, "main", "sha256:abc")]
    assert found[2] is None and lacking(WEB, made, pods) is None
    failed = lacking(WEB, made, [read(pod("c", ports={"metrics": 9000}))])
    assert failed.reason == "port" and "'http'; they have metrics 9000" in str(failed)
    assert lacking(WEB, made, [read(pod("c", ready=False))]) is None, "it may get one that has"


def test_a_container_that_no_pod_has_is_told():
    target, made = WEB._replace(container="tools"), plan("prod/svc/web:80", service())
    assert choice_of(target, made, read(pod("a", containers=("main", "tools")))).container == "tools"
    failed = lacking(target, made, [read(pod("a"))])
    assert failed.reason == "container" and "no container tools; they have main" in str(failed)


def test_why_none_is_ready_names_some_pods():
    made = plan("prod/svc/web:80", service())
    pods = [read(pod(f"web-{n}", ready=False)) for n in range(9)]
    assert str(none_ready(WEB, made, pods)) == (
        "service web in prod: none of 9 pods is ready: web-0 not ready, web-1 not ready, web-2 not ready, "
        "web-3 not ready and 5 more")
    assert str(none_ready(WEB, made, [])) == "service web in prod has no pods: nothing there has the labels app=web"
    target = parse_target("prod/pods/app=web:80")
    assert str(none_ready(target, plan(target.text), [])) == "there are no pods in prod that have the labels app=web"
