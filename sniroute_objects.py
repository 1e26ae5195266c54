"""sniroute_objects: targets of Kubernetes as people write them, and what a cluster tells of services and pods.

    "prod/svc/web:80@main" --- parse_target ---> KubeTarget --- argument_of, parse_argument --- a word on stdin
                                                     |
    its object in JSON ------- Kind.plan --------> Plan              which pods, by which labels; which port of theirs
    each pod in JSON --------- Plan.read --------> Pod               its state in words, its ports and containers
    all of them -------------- choice_of --------> Choice            a pod, a port, a container; or what it lacks
                               none_ready, lacking -> Failed         why there is none, for people
    create_pod of a route --- parse_new_pod --> NewPod --- manifest ---> the JSON of a pod that is to be made

All of it is pure: texts and JSON in, tuples out.  Who asks, and keeps it fresh, is sniroute_pods.  The router reads
targets by this room, too.

What the API server says is believed, but not its shape: a field of another type than it has to be raises Failed.

Threads: none; nothing here changes after the import.

Seams: I want to ...
    name another kind of object       a row of KINDS, with the words for it
    let other pods take connections   Plan.admits, of the states that `state_of` tells
    tell another reason               a word of REASONS, and a row for it where the router reads them
    have another option of a target   a field of KubeTarget; `argument_of` and `with_option`
    make other pods                   `manifest`, and a field of NewPod

This room imports sniroute_names and sniroute_refusals.

Source: kubernetes.io, "Object Names and IDs", "Service", "EndpointSlices", "Pod Lifecycle"; kubectl, folder
polymorphichelpers, for what a port means.
"""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Any, Callable, Iterator, Mapping, NamedTuple, NoReturn, Sequence
from urllib.parse import quote, unquote

from sniroute_names import HOST, is_number, normalise, parse_host_port, printable, show_address
from sniroute_refusals import Failed, Malformed

__version__ = "0.1.0"

# Limits, each with its reason.
LABELS_MAX = 16  # labels of a target; people write one or two
ALTERNATIVES_MAX = 4  # targets of one argument: each costs a request, and strangers choose names
ARGUMENT_MAX = 900  # characters of an argument: with its address it is a line of COMMAND_MAX (sniroute_forwarder)
PAGE = 100  # pods in one answer: 2 MiB at most, some 20 ms of the loop to read
SHOWN = 4  # pods in a reason: a line that is still read

# Why there is no pod: words beside those of sniroute_api.
REASONS = {
    "pods": "no pod is ready",
    "port": "the service, or its pods, have no such port",
    "container": "the pods have no such container",
    "elsewhere": "the service leads to something else than pods",
}
# How a client's pod is chosen, as a route's `balance` says; sniroute_pods has how it is done.
BALANCES = ("least", "round-robin", "random", "first")


# -- targets, as people write them -------------------------------------------------------------

LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"  # RFC 1123 section 2.1: namespaces, services, containers, ports
NAMESPACE = re.compile(LABEL)
OBJECT = re.compile(rf"(?=.{{1,253}}\Z){LABEL}(?:\.{LABEL})*")  # names of all other objects
PORT_NUMBER = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LABEL_KEY = re.compile(rf"(?:(?=[^/]{{1,253}}/){LABEL}(?:\.{LABEL})*/)?{WORD}")
LABEL_VALUE = re.compile(rf"(?:{WORD})?")
FORM = "NAMESPACE/svc/NAME:PORT[@CONTEXT]"
JUMP_FORM = "NAMESPACE/svc/NAME/HOST:PORT[@CONTEXT]"


class NewPod(NamedTuple):
    """A pod that is made where a jump has none: `create_pod` of its route."""

    image: str = "busybox:stable"  # it has nc, and sleep
    labels: tuple[tuple[str, str], ...] = ()
    limits: tuple[tuple[str, str], ...] = (("cpu", "100m"), ("memory", "64Mi"))  # some hundred connections by nc
    ttl: int = 8 * 3600  # seconds until the cluster ends it, whatever has become of us: a working day


class KubeTarget(NamedTuple):
    """What a target says."""

    kind: str  # a key of KINDS
    namespace: str
    name: str  # "" with labels
    port: int | str  # of the service or the pod, a number or a name; with `host` that of the host
    context: str = ""  # of the kubeconfig; "": the current one
    labels: tuple[tuple[str, str], ...] = ()
    host: str = ""  # that the pod connects to; "": the pod itself
    container: str = ""  # in which a command runs; "": the pod's default
    balance: str = "least"  # a member of BALANCES
    create: NewPod | None = None  # the pod is made where it is not there

    @property
    def text(self) -> str:
        """As it is written, with the shortest word for its kind; without options."""
        what = ",".join(f"{key}={value}" for key, value in self.labels) or self.name
        place = f"/{show_address((self.host, self.port))}" if self.host else f":{self.port}"
        return f"{self.namespace}/{KINDS[self.kind].words[0]}/{what}{place}" + f"@{self.context}" * bool(self.context)

    @property
    def pod_port(self) -> int | str:
        """The port that the pods have to have; 0 for none in particular: they connect to `host`."""
        return 0 if self.host else self.port

    @property
    def said(self) -> str:
        """The object, for people."""
        what = "pods" if self.labels else f"{self.kind} {self.name}"
        return f"{what} in {self.namespace}"


def parse_target(text: str, jump: bool = False) -> KubeTarget:
    """A target of `kubernetes:`, or of `jump:`, in the words of kubectl.  Raises Malformed, of the kind `bad_name`.

    `pods/app=web,tier=api` are pods with these labels.  The context is all behind the first @: nothing before it can
    have one.  Upper case is refused, not lowered: Kubernetes has none.
    """
    def fault(why: str) -> NoReturn:
        raise Malformed(f"{printable(text, 120)!r} is not {JUMP_FORM if jump else FORM}: {why}", kind="bad_name")

    place, at, context = text.partition("@")
    if at and (not context or not context.isprintable()):
        fault("behind @ is no name of a context")
    namespace, slash, rest = place.partition("/")
    word, second, rest = rest.partition("/")
    if not slash or not second:
        fault("it needs a namespace, a kind and a name")
    if not NAMESPACE.fullmatch(namespace):
        fault(f"{printable(namespace, 80)!r} is no namespace: small letters, digits and -, 63 at most")
    what, _, end = rest.rpartition("/" if jump else ":")
    kind = WORDS.get(word, "")
    labels: tuple[tuple[str, str], ...] = ()
    if kind == "pod" and "=" in rest:
        kind, labels, what = "pods", parse_labels(what, fault), ""
    elif not kind:
        fault(f"{printable(word, 40)!r} is no kind; there are {', '.join(row.words[0] for row in KINDS.values())}")
    elif not what:
        fault("it has no /HOST:PORT at its end" if jump else "it has no :PORT at its end")
    elif not (NAMESPACE if kind == "service" else OBJECT).fullmatch(what):
        fault(f"{printable(what, 80)!r} is no name of a {kind}: small letters, digits and -")
    host = ""
    port: int | str
    if jump:
        host, port = parse_far(end, fault)
    elif PORT_NUMBER.fullmatch(end) and int(end) < 65536:
        port = int(end)
    elif NAMESPACE.fullmatch(end) and not end.isdigit():
        port = end
    else:
        fault(f"{printable(end, 40)!r} is no port: a number from 1 to 65535, or a name")
    return KubeTarget(kind, namespace, what, port, context, labels, host)


def parse_labels(text: str, fault: Callable[[str], NoReturn]) -> tuple[tuple[str, str], ...]:
    """`app=web,app.kubernetes.io/part-of=shop`.  Calls `fault` where it is something else."""
    labels: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key in labels or not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
            fault(f"{printable(part, 80)!r} is no LABEL=VALUE, or the second of its name")
        labels[key] = value
    if len(labels) > LABELS_MAX:
        fault(f"it has more than {LABELS_MAX} labels")
    return tuple(labels.items())


def parse_far(text: str, fault: Callable[[str], NoReturn]) -> tuple[str, int]:
    """HOST:PORT that a command in a pod connects to.  A host never begins with -, which would be an option."""
    try:
        host, port = parse_host_port(text)
        if not port or not HOST.fullmatch(host) or is_number(host):
            raise ValueError(f"{printable(text, 80)!r} is not HOST:PORT, with a name or an address as HOST")
        try:
            return str(ipaddress.ip_address(host)), port
        except ValueError:
            return normalise(host.encode()), port
    except (ValueError, Malformed) as error:
        fault(str(error))


def argument_of(targets: Sequence[KubeTarget]) -> str:
    """Targets as one word of ASCII, for a program's stdin: the first, and those to be tried where that is not there.

    `prod/svc/web:80@main`, `jump:prod/pod/shell/db.internal:5432?container=tools@main`; several with | between them.
    The context is percent-encoded.  Those that are too many are left out.  Raises Malformed, `bad_name`.
    """
    words: list[str] = []
    for target in targets[:ALTERNATIVES_MAX]:
        options = [f"{key}={value}" for key, value, default in (
            ("container", target.container, ""), ("balance", target.balance, "least")) if value != default]
        if target.create is not None:
            options += words_of_new_pod(target.create)
        word = ("jump:" if target.host else "") + target._replace(context="").text + "?" * bool(options) \
            + "&".join(options) + (f"@{quote(target.context, safe=':/@')}" if target.context else "")
        if word not in words and len("|".join([*words, word])) <= ARGUMENT_MAX:
            words.append(word)
    if not words:
        raise Malformed(f"{printable(targets[0].text, 120)!r} is longer than {ARGUMENT_MAX} characters",
                        kind="bad_name")
    return "|".join(words)


def parse_argument(text: str) -> tuple[KubeTarget, ...]:
    """What `argument_of` has made.  Raises Malformed, `bad_name`."""
    targets = []
    for word in text.split("|")[:ALTERNATIVES_MAX]:
        place, at, context = word.removeprefix("jump:").partition("@")
        place, _, options = place.partition("?")
        target = parse_target(place + at + unquote(context), word.startswith("jump:"))
        for option in filter(None, options.split("&")):
            key, _, value = option.partition("=")
            target = with_option(target, key, unquote(value))
        targets.append(target)
    return tuple(targets)


def with_option(target: KubeTarget, key: str, value: str) -> KubeTarget:
    """A target with an option of its route: `container`, `balance`, `create`.  Raises Malformed, `bad_name`."""
    if key == "container" and NAMESPACE.fullmatch(value):
        return target._replace(container=value)
    if key == "balance" and value in BALANCES:
        return target._replace(balance=value)
    if key == "create" and target.kind == "pod" and target.host:
        return target._replace(create=read_new_pod(value))
    known = f"one of {', '.join(BALANCES)}" if key == "balance" else "the name of one"
    raise Malformed(f"{printable(key, 20)} = {printable(value, 80)!r}: it has to be {known}"
                    if key in ("container", "balance") else f"{printable(key, 20)!r} is no option of {target.text}",
                    kind="bad_name")


# -- pods that are made ------------------------------------------------------------------------

# Sources: kubernetes.io, "Images" (names), "Resource Management for Pods and Containers", "Quantity".
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,255}")
LIMITS = ("cpu", "memory", "ephemeral-storage")
QUANTITY = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,3})?(?:m|[kKMGT]i?)?", re.ASCII)
TTL = range(60, 366 * 86400)  # seconds.  With less a new pod would be made again and again
OWNER = "sniroute-owner"  # the label that says who has made a pod
FIXED_LABELS = {"app.kubernetes.io/managed-by": "sniroute"}


def parse_new_pod(value: Any) -> NewPod:
    """`true`, or a table of what is to be otherwise: image, labels, limits, ttl in seconds.  Raises ValueError."""
    if value is True:
        return NewPod()
    if not isinstance(value, dict):
        raise ValueError("it is true, false, or a table as { image = \"busybox:stable\", ttl = \"8h\" }")
    for key in value:
        if key not in NewPod._fields:
            raise ValueError(f"{printable(key, 40)!r} is none of {', '.join(NewPod._fields)}")
    default = NewPod()
    image, ttl = value.get("image", default.image), value.get("ttl", default.ttl)
    if not isinstance(image, str) or not IMAGE.fullmatch(image):
        raise ValueError(f"image: {printable(str(image), 80)!r} is no name of an image")
    if not isinstance(ttl, (int, float)) or int(ttl) not in TTL:
        raise ValueError(f"ttl: it is {TTL[0]} seconds or more, and a year at most")
    labels = read_pairs("labels", value.get("labels", {}), LABEL_KEY.fullmatch, LABEL_VALUE)
    if OWNER in labels or not FIXED_LABELS.keys().isdisjoint(labels) or len(labels) > LABELS_MAX:
        raise ValueError(f"labels: there are {LABELS_MAX} at most, and {OWNER} and {', '.join(FIXED_LABELS)} are ours")
    limits = read_pairs("limits", value.get("limits", dict(default.limits)), LIMITS.__contains__, QUANTITY)
    return NewPod(image, tuple(labels.items()), tuple(limits.items()), int(ttl))


def read_pairs(what: str, table: Any, is_key: Callable[[str], Any], values: re.Pattern[str]) -> dict[str, str]:
    """A table of words.  Raises ValueError."""
    if not isinstance(table, dict):
        raise ValueError(f"{what}: it is a table, as {{ NAME = \"VALUE\" }}")
    for key, value in table.items():
        if not is_key(key) or not isinstance(value, str) or not values.fullmatch(value):
            raise ValueError(f"{what}: {printable(f'{key} = {value}', 120)!r} is none of a pod")
    return dict(table)


def words_of_new_pod(new: NewPod) -> list[str]:
    """As an option of an argument; a table in JSON."""
    table = {"image": new.image, "labels": dict(new.labels), "limits": dict(new.limits), "ttl": new.ttl}
    return [f"create={quote(json.dumps(table, separators=(',', ':')), safe='')}"]


def read_new_pod(text: str) -> NewPod:
    """What `words_of_new_pod` has made, or `true`.  Raises Malformed, `bad_name`."""
    try:
        return parse_new_pod(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise Malformed(f"create = {printable(text, 80)!r}: {error}", kind="bad_name") from None


def manifest(target: KubeTarget, owner: str) -> dict[str, Any]:
    """The pod that is made for a target; `owner` goes into its label.

    It may do nothing but to connect: no token, no rights, no files; and it ends by itself.  Where the cluster holds
    pods against the strictest of its standards, this one passes.
    Source: kubernetes.io, "Pod Security Standards", Restricted.
    """
    new = target.create
    assert new is not None
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": target.name, "namespace": target.namespace,
                     "labels": {**dict(new.labels), **FIXED_LABELS, OWNER: owner}},
        "spec": {
            "restartPolicy": "Never", "activeDeadlineSeconds": new.ttl, "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False, "enableServiceLinks": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65534, "runAsGroup": 65534,
                                "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": target.container or "jump", "image": new.image, "command": ["sleep", str(new.ttl)],
                "resources": {"limits": dict(new.limits), "requests": dict(new.limits)},
                "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                    "capabilities": {"drop": ["ALL"]}}}]}}


# -- JSON --------------------------------------------------------------------------------------


def part(thing: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object within an object; {} where it is not there.  Raises Failed, `answer`, where it is something else."""
    value = thing.get(key)
    return typed(value, dict, key) if value is not None else {}


def rows(thing: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects; [] where it is not there.  Raises Failed, `answer`."""
    value = thing.get(key)
    return [typed(row, dict, key) for row in typed(value, list, key)] if value is not None else []


def word(thing: Mapping[str, Any], key: str) -> str:
    """A text; "" where it is not there.  Raises Failed, `answer`."""
    value = thing.get(key)
    return typed(value, str, key) if value is not None else ""


def words(thing: Mapping[str, Any], key: str) -> list[str]:
    """A list of texts; [] where it is not there.  Raises Failed, `answer`."""
    value = thing.get(key)
    return [typed(each, str, key) for each in typed(value, list, key)] if value is not None else []


def terms_of(labels: Mapping[str, Any]) -> list[str]:
    """The terms of a selector for these labels.  Raises Failed, `answer`."""
    return [f"{key}={word(labels, key)}" for key in sorted(labels)]


def number(thing: Mapping[str, Any], key: str) -> int:
    """A port; 0 where there is none that is one."""
    value = thing.get(key)
    return value if isinstance(value, int) and 0 < value < 65536 else 0


def escaped(text: str) -> str:
    """A text of the API server's as a part of a query.  JSON has halves of characters, which UTF-8 has not."""
    return quote(text, safe="", errors="replace")


def typed(value: Any, kind: type, key: str) -> Any:
    """A value that has to be of a kind.  Raises Failed, `answer`."""
    if not isinstance(value, kind):
        raise Failed("answer", f"the API server's answer has a {printable(key, 40)} that is no {kind.__name__}")
    return value


# -- plans: which pods, and which port of theirs -----------------------------------------------


class Pod(NamedTuple):
    """What there is to know of a pod."""

    name: str
    uid: str  # a pod of the same name that comes later has another one; "" where we may not read pods
    state: str  # `ready`, `not ready`, or a word for why it takes no connection
    why: str = ""  # what the cluster says of that, as `CrashLoopBackOff`
    ports: Mapping[str, int] = {}  # by name, TCP only
    containers: Mapping[str, str] = {}  # name -> image; empty where they are not known
    container: str = ""  # in which commands run by default
    owner: str = ""  # of a pod that was made by sniroute: by which process

    def __str__(self) -> str:
        return printable(f"{self.name} {self.state}" + f" ({self.why})" * bool(self.why), 160)


READY = frozenset(("ready",))
RUNNING = frozenset(("ready", "not ready"))


class Plan(NamedTuple):
    """Which pods a target means, and how they are found."""

    base: str  # path of the list: of pods, or of EndpointSlices
    query: str  # its selector, percent-encoded
    port: int | str  # in the pod: a number, or a name to be looked up there
    admits: frozenset[str]  # states of pods that take connections
    read: Callable[[dict[str, Any]], Iterator[Pod]]  # an object of the list -> its pods
    single: str = ""  # path of the one object, which is read instead of a list
    selects: str = ""  # the labels, for people

    def list_path(self, more: str = "") -> str:
        """`more`: the token that the page before has given."""
        page = f"&limit={PAGE}" + f"&continue={escaped(more)}" * bool(more)
        return self.single or f"{self.base}?{self.query}{page}"

    def watch_path(self, version: str, seconds: int) -> str:
        """`version`: what a list, or the last event, was of; "": from now."""
        return (f"{self.base}?{self.query}&watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds}"
                + f"&resourceVersion={escaped(version)}" * bool(version))


class Kind(NamedTuple):
    """A kind of object that leads to pods."""

    words: tuple[str, ...]  # that people write for it, the usual one first
    path: str  # of one such object; "": there is nothing to ask
    plan: Callable[[KubeTarget, dict[str, Any]], Plan]  # of its JSON


def object_path(target: KubeTarget) -> str:
    """Where the object of a target is asked for; "" where there is nothing to ask."""
    return KINDS[target.kind].path.format(target.namespace, target.name)


def selected(target: KubeTarget, selector: str, port: int | str, admits: frozenset[str] = READY) -> Plan:
    """Pods by their labels."""
    query = f"labelSelector={escaped(selector)}"
    return Plan(f"/api/v1/namespaces/{target.namespace}/pods", query, port, admits, read_pod, selects=selector)


def plan_service(target: KubeTarget, service: dict[str, Any]) -> Plan:
    """The pods behind a service.  Raises Failed: `port`, `elsewhere`.

    Without a cluster address, too, a port means its targetPort, as in EndpointSlices and SRV records: nothing listens
    where the two differ, which is what kubectl dials there.
    """
    spec = part(service, "spec")
    if word(spec, "type") == "ExternalName":
        host = printable(word(spec, "externalName"))
        raise Failed("elsewhere", f"{target.said} is another name for {host}, and has no pods: "
                                  f"a target tcp:{host}:PORT leads there")
    port, name = (0, "") if target.host else service_port(target, spec)
    admits = RUNNING if spec.get("publishNotReadyAddresses") is True else READY
    selector = part(spec, "selector")
    if selector:
        return selected(target, ",".join(terms_of(selector)), port, admits)
    namespace = target.namespace
    return Plan(f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices",
                f"labelSelector={quote(f'kubernetes.io/service-name={target.name}', safe='')}",
                0 if target.host else name, admits, lambda thing: read_slice(thing, namespace))


def service_port(target: KubeTarget, spec: dict[str, Any]) -> tuple[int | str, str]:
    """The port in the pod, a number or a name, and the name of the service's port.  Raises Failed, `port`."""
    ports = rows(spec, "ports")
    key = "port" if isinstance(target.port, int) else "name"
    for row in ports:
        if row.get(key) == target.port and row.get("protocol") in (None, "TCP"):
            inside = row.get("targetPort") or row.get("port")
            if isinstance(inside, int) and 0 < inside < 65536 or isinstance(inside, str):
                return inside, word(row, "name")
            raise Failed("answer", f"{target.said} has a targetPort that is no port")
    if not ports and isinstance(target.port, int):  # without a cluster address there may be none: all ports are there
        return target.port, ""
    raise Failed("port", f"{target.said} has no port {target.port} of TCP; it has {ports_said(ports)}")


def ports_said(ports: Sequence[Mapping[str, Any]]) -> str:
    """The ports of a service, for people."""
    said = [" ".join(filter(None, (str(number(row, "port")), word(row, "name"),
                                   "" if row.get("protocol") in (None, "TCP") else f"({word(row, 'protocol')})")))
            for row in ports]
    return printable(", ".join(said), 200) or "none"


def plan_workload(target: KubeTarget, thing: dict[str, Any]) -> Plan:
    """The pods that a deployment, a statefulset ... selects.  Raises Failed, `answer`."""
    selector = part(part(thing, "spec"), "selector")
    terms = terms_of(part(selector, "matchLabels"))
    for row in rows(selector, "matchExpressions"):
        key, values = word(row, "key"), ",".join(words(row, "values"))
        form = EXPRESSIONS.get(word(row, "operator"))
        if form is None:
            raise Failed("answer", f"{target.said} selects pods by {printable(word(row, 'operator'), 40)!r}")
        terms.append(form.format(key, values))
    if not terms:  # it would mean all pods
        raise Failed("answer", f"{target.said} selects no pods")
    return selected(target, ",".join(terms), target.pod_port)


EXPRESSIONS = {"In": "{} in ({})", "NotIn": "{} notin ({})", "Exists": "{}", "DoesNotExist": "!{}"}


def plan_labels(target: KubeTarget, thing: dict[str, Any]) -> Plan:
    """Pods by labels of the target's own."""
    return selected(target, ",".join(f"{key}={value}" for key, value in target.labels), target.pod_port)


def plan_pod(target: KubeTarget, thing: dict[str, Any]) -> Plan:
    """One pod as it stands, ready or not: who names it means it."""
    base = f"/api/v1/namespaces/{target.namespace}/pods"
    return Plan(base, f"fieldSelector={quote(f'metadata.name={target.name}', safe='')}",
                target.pod_port, RUNNING, read_pod, f"{base}/{target.name}")


KINDS = {
    "service": Kind(("svc", "service", "services"), "/api/v1/namespaces/{}/services/{}", plan_service),
    "deployment": Kind(("deploy", "deployment", "deployments"), "/apis/apps/v1/namespaces/{}/deployments/{}",
                       plan_workload),
    "statefulset": Kind(("sts", "statefulset", "statefulsets"), "/apis/apps/v1/namespaces/{}/statefulsets/{}",
                        plan_workload),
    "replicaset": Kind(("rs", "replicaset", "replicasets"), "/apis/apps/v1/namespaces/{}/replicasets/{}",
                       plan_workload),
    "daemonset": Kind(("ds", "daemonset", "daemonsets"), "/apis/apps/v1/namespaces/{}/daemonsets/{}", plan_workload),
    "job": Kind(("job", "jobs"), "/apis/batch/v1/namespaces/{}/jobs/{}", plan_workload),
    "pod": Kind(("pod", "po", "pods"), "", plan_pod),
    "pods": Kind(("pods",), "", plan_labels),
}
WORDS = {word: kind for kind, row in reversed(KINDS.items()) for word in row.words}  # "pods" is "pod" until a = is seen


# -- pods, as the API server tells them --------------------------------------------------------


def read_pod(thing: dict[str, Any]) -> Iterator[Pod]:
    """A pod of its JSON.  Raises Failed, `answer`."""
    metadata, spec = part(thing, "metadata"), part(thing, "spec")
    statuses = {word(row, "name"): word(row, "imageID") for row in rows(part(thing, "status"), "containerStatuses")}
    containers = rows(spec, "containers")
    images = {word(row, "name"): statuses.get(word(row, "name")) or word(row, "image") for row in containers}
    sidecars = [row for row in rows(spec, "initContainers") if row.get("restartPolicy") == "Always"]
    ports: dict[str, int] = {}
    for row in (port for container in [*containers, *sidecars] for port in rows(container, "ports")):
        if row.get("protocol") in (None, "TCP") and number(row, "containerPort"):
            ports.setdefault(word(row, "name"), row["containerPort"])
    ports.pop("", None)
    default = word(part(metadata, "annotations"), "kubectl.kubernetes.io/default-container")
    state, why = state_of(thing)
    if not OBJECT.fullmatch(word(metadata, "name")):
        raise Failed("answer", "the API server's answer has a pod whose name is none")
    yield Pod(word(metadata, "name"), word(metadata, "uid"), state, why, ports, images,
              default if default in images else next(iter(images), ""), word(part(metadata, "labels"), OWNER))


def state_of(thing: dict[str, Any]) -> tuple[str, str]:
    """What a pod does, in a word for people, and what the cluster says of it.

    One that is being deleted often is still Ready: its connections go on, and new ones end soon.
    """
    status = part(thing, "status")
    conditions = {word(row, "type"): row for row in rows(status, "conditions")}
    phase = word(status, "phase")
    if part(thing, "metadata").get("deletionTimestamp"):
        return "terminating", ""
    if phase in ("Succeeded", "Failed"):
        return "ended", word(status, "reason")
    if not word(part(thing, "spec"), "nodeName"):
        return "without a node", word(conditions.get("PodScheduled", {}), "reason")
    if phase == "Running" and conditions.get("Ready", {}).get("status") == "True":
        return "ready", ""
    waiting = [word(part(part(row, "state"), "waiting"), "reason")
               for key in ("initContainerStatuses", "containerStatuses") for row in rows(status, key)]
    why = next(filter(None, waiting), "")
    return ("not ready" if phase == "Running" else "starting"), why


def read_slice(thing: dict[str, Any], namespace: str) -> Iterator[Pod]:
    """The pods of an EndpointSlice; an address without one is a Pod in the state `no pod`.  Raises Failed, `answer`.

    A pod of another namespace is none of ours: the operator has allowed this one.  Users write slices, and the API
    server does not check the names in them: what is no name would be another path.
    """
    ports = {word(row, "name"): row["port"] for row in rows(thing, "ports")
             if row.get("protocol") in (None, "TCP") and number(row, "port")}
    for row in rows(thing, "endpoints"):
        conditions, target = part(row, "conditions"), part(row, "targetRef")
        if word(target, "kind") == "Pod" and OBJECT.fullmatch(word(target, "name")) \
                and word(target, "namespace") in ("", namespace):
            state = ("terminating" if conditions.get("terminating") else
                     "not ready" if conditions.get("ready") is False else "ready")
            yield Pod(word(target, "name"), word(target, "uid"), state, ports=ports)
        else:
            for address in words(row, "addresses"):
                yield Pod(printable(address, 60), address, "no pod")


# -- a choice ----------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Where one client's connection goes."""

    namespace: str
    pod: str
    uid: str  # as Pod has it
    port: int  # in the pod; 0 with a host that the pod connects to
    container: str  # for a command; "" where it is not known
    image: str  # of that container


def choice_of(target: KubeTarget, plan: Plan, pod: Pod) -> Choice | None:
    """A pod as a choice; None where it takes no connection, or has not got the port or the container."""
    port = plan.port if isinstance(plan.port, int) else pod.ports.get(plan.port, -1)
    container = target.container or pod.container
    if pod.state not in plan.admits or port < 0 or container and pod.containers and container not in pod.containers:
        return None
    return Choice(target.namespace, pod.name, pod.uid, port, container, pod.containers.get(container, ""))


def lacking(target: KubeTarget, plan: Plan, pods: Sequence[Pod]) -> Failed | None:
    """Why waiting is in vain: what those lack that would take connections.  None where it is not."""
    outside = [pod.name for pod in pods if pod.state == "no pod"]
    if outside and len(outside) == len(pods):
        return Failed("elsewhere", f"{target.said} has no selector, and behind it are no pods but "
                                   f"{', '.join(outside[:SHOWN])}: a target of the kind tcp: leads there")
    running = [pod for pod in pods if pod.state in plan.admits]
    if not running or any(choice_of(target, plan, pod) for pod in running):
        return None
    if isinstance(plan.port, str) and not any(plan.port in pod.ports for pod in running):
        have = sorted({f"{name} {number}".strip() for pod in running for name, number in pod.ports.items()})
        return Failed("port", f"the pods of {target.said} have no port of the name {printable(plan.port, 80)!r}; "
                              f"they have {printable(', '.join(have), 200) or 'no names for ports'}")
    have = sorted({name for pod in running for name in pod.containers})
    return Failed("container", f"the pods of {target.said} have no container {target.container}; "
                               f"they have {printable(', '.join(have), 200)}")


def none_ready(target: KubeTarget, plan: Plan, pods: Sequence[Pod]) -> Failed:
    """Why there is none: each pod in short."""
    if not pods and target.create is not None:
        return Failed("pods", f"{target.said} is being made")
    if not pods:
        why = f": nothing there has the labels {printable(plan.selects, 160)}" if plan.selects else ""
        return Failed("pods", f"{target.said} has no pods{why}" if not target.labels else
                      f"there are no pods in {target.namespace} that have the labels {printable(plan.selects, 160)}")
    more = f" and {len(pods) - SHOWN} more" * (len(pods) > SHOWN)
    return Failed("pods", f"{target.said}: none of {len(pods)} pods is ready: "
                          f"{', '.join(map(str, pods[:SHOWN]))}{more}")
