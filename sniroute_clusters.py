"""sniroute_clusters: targets in Kubernetes clusters, as the router sees them: two kinds of target, and their program.

    kubernetes:NAMESPACE/svc/NAME:PORT[@CONTEXT]          a ready pod behind it
    jump:NAMESPACE/svc/NAME/HOST:PORT[@CONTEXT]           HOST:PORT as that pod sees it

        loop                                    reaper                             sniroute_kubernetes.py, one process
        tunnel_ready                            TunnelTable
          Decision.tunnel: a TunnelKey --------->  Launcher.argument: what it is told --->  listen 127.0.0.1:20000 ...
          a TunnelBackend, to that port            reason <------------------------------  failed: one of REASONS

Both kinds are tunnels of the TunnelTable, and one process carries them all.  It finds the pods, and asks the API
server; nothing here does.

What a name may choose.  A field stands for a namespace, a name, the value of a label, a host, a port or a context,
and for no other word: `fits` looks.  A route whose field is the namespace or the context says which there may be
(`misfits`, at the start), and each name is held against that (`told`).

Splits.  Names of ports have dashes, as those of services do: `{service}-{port}` fits `my-api-http-metrics` in several
ways.  Only the cluster knows which one is meant.  So the program is told the first few of them, and takes the first
that is there (`argument_of` of sniroute_objects, Route.decide).

Threads: any; nothing is kept.

Seams: I want to ...
    understand another reason        a row in REASONS; for another kind of refusal one in sniroute_refusals, too
    let a variable through           VARIABLES, PREFIXES
    let a field stand elsewhere      `fits`

This room imports sniroute_objects (`parse_target`, `argument_of`), sniroute_targets, sniroute_launchers,
sniroute_names, sniroute_refusals and the standard library.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from typing import TYPE_CHECKING, Iterable, Iterator, Mapping, Sequence

from sniroute_launchers import (TUNNEL_ENVIRONMENT, TUNNEL_IDENTITY, Launcher, Reason, last_line, last_words, our_words,
                                words_by_hand)
from sniroute_names import OPTIONS, printable
from sniroute_objects import argument_of, parse_target
from sniroute_refusals import Malformed, Refused
from sniroute_targets import Scheme, tunnel_prepare, tunnel_ready

if TYPE_CHECKING:
    from sniroute_routes import Route

__version__ = "0.1.0"

# Limits, each with its reason.
CARRIES = 500  # targets in one process: more than there are ports for by default; each further one costs it 64 KiB
PING_MAX = 9999.0  # seconds that its --ping takes

# -- targets -----------------------------------------------------------------------------------

def check(jump: bool, rest: str) -> str:
    """A target with the shortest word for its kind.  Raises Malformed, `bad_name`."""
    target = parse_target(rest, jump)
    argument_of([target])  # it is not too long
    return target.text


def parts_of(rest: str) -> tuple[str, str, str]:
    """The namespace of a target, what stands between, and its context; "" where it names none."""
    place, _, context = rest.partition("@")
    namespace, _, middle = place.partition("/")
    return namespace, middle, context


def fits(template: str, rest: str) -> None:
    """Check that each field stands where one may.  Raises Malformed.

    No field has one of `/ : @ , =` in it, so none makes another part: it is enough to look at the target as it was
    written.
    """
    _, middle, _ = parts_of(template)
    word, _, name = middle.partition("/")
    keys = [pair.partition("=")[0] for pair in name.split(",") if "=" in pair]
    if "{" in word or any("{" in key for key in keys):
        raise Malformed(f"{printable(template, 80)!r}: a field stands for a namespace, a name, the value of a label, a "
                        "host, a port or a context, and for nothing else", kind="bad_name")


def misfits(route: Route) -> Iterator[str]:
    """What a route to clusters lacks, says in vain, or may not have, a sentence each.

    Whoever reaches the listener may ask for any name, and so may a page in a browser of its user.  So a kubeconfig
    with many clusters in it is not open to all of them by one line.
    """
    for target in route.targets:
        scheme, _, rest = target.partition(":")
        namespace, _, context = parts_of(rest) if scheme in CLUSTER_SCHEMES else ("", "", "")
        for what, text, globs in (("namespace", namespace, route.namespaces), ("context", context, route.contexts)):
            if "{" in text and not globs:
                yield (f"{printable(text, 80)} lets clients choose the {what}: say in the file which they may reach, "
                       f'as {what}s = ["team-*"]')
            names = {text, dict(route.aliases).get(text, text)} if what == "context" else {text}
            if "{" not in text and globs and not allows(globs, names):
                yield (f"its {what} is {printable(text, 80) or 'the current one'}, which {what}s = {', '.join(globs)} "
                       "leaves out: each client would be refused")
        if route.create_pod is not None and scheme == "jump":
            place, _, _ = rest.partition("@")
            namespace, kind, *name = place.split("/")[:3]
            if kind not in ("pod", "po", "pods") or "=" in name[0] or "{" in namespace + name[0]:
                yield (f"create_pod: is for jump:NAMESPACE/pod/NAME/HOST:PORT, without a field in NAMESPACE and NAME; "
                       f"this is {printable(target, 80)}")


def allows(globs: Iterable[str], names: Iterable[str]) -> bool:
    """Whether one of these names of a namespace, or a context, fits what the route allows."""
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)


def told(jump: bool, route: Route, rests: Sequence[str]) -> str:
    """What the program is told: these targets, with the real names of their contexts, and the options of their route.

    Raises Refused where the route does not lead to such a namespace, or context.
    """
    aliases = dict(route.aliases)
    targets = []
    for rest in rests:
        target = parse_target(rest, jump)
        context = aliases.get(target.context, target.context)
        for what, names, globs in (("namespace", (target.namespace,), route.namespaces),
                                   ("context", (target.context, context), route.contexts)):
            if globs and not allows(globs, names):
                raise Refused("forbidden", f"{printable(rest)}: {route.pattern} leads to no such {what}: its {what}s "
                                           f"are {', '.join(globs)}")
        targets.append(target._replace(context=context, container=route.container, balance=route.balance,
                                       create=route.create_pod if jump else None))
    return argument_of(targets)


# -- the program -------------------------------------------------------------------------------

# What it gets of the router's environment, beside the way out and the trust store.  It runs the credential plugins of
# the kubeconfig, which have to find themselves and their own settings.  What else one needs goes into `env` of its
# user in the kubeconfig.
VARIABLES = TUNNEL_ENVIRONMENT - TUNNEL_IDENTITY | {"HOME", "PATH", "USER", "LOGNAME", "TMPDIR", "KUBECONFIG"}
PREFIXES = ("KUBERNETES_", "AWS_", "AZURE_", "AAD_", "GOOGLE_", "CLOUDSDK_", "OCI_", "TELEPORT_", "VAULT_", "XDG_")

# Its reasons: (kind, final).  It has tried other pods, and other ways to them, before it gives one, so most are final.
REASONS = {
    "config": ("config", True),
    "context": ("absent", True),
    "unknown": ("absent", True),
    "port": ("absent", True),
    "container": ("absent", True),
    "elsewhere": ("absent", True),
    "pods": ("not_ready", True),
    "name": ("unreachable", True),
    "resolver": ("unreachable", True),
    "unreachable": ("unreachable", True),
    "proxy": ("unreachable", True),
    "busy": ("unreachable", True),
    "certificate": ("certificate", True),
    "tls": ("certificate", True),
    "plugin": ("plugin", True),
    "login": ("login", True),
    "forbidden": ("forbidden", True),
    "timeout": ("timeout", True),
    "answer": ("failed", True),
    "refused": ("failed", True),
    "tool": ("failed", True),
    "command": ("failed", True),
}  # any other is ("failed", False): a session that was lost, a pod that has just gone


def environment(environ: Mapping[str, str], kubeconfig: str | None) -> dict[str, str]:
    """The environment of the program: without the router's identity for Access."""
    found = {name: value for name, value in environ.items() if name in VARIABLES or name.startswith(PREFIXES)}
    if kubeconfig:
        found["KUBECONFIG"] = kubeconfig
    return {**found, "TUNNEL_LOG_OUTPUT": "json"}


def reason(tail: bytes) -> Reason:
    """The reason in the program's last line, without the target before it: whoever tells the reason names that."""
    fields, words = last_line(tail)[1], last_words(tail)
    kind, final = REASONS.get(str(fields.get("reason")), ("failed", False))
    return Reason(kind, words.partition(": ")[2] or words if "reason" in fields else words, final)


def cluster_launcher(environ: Mapping[str, str], kubeconfig: str | None, exec_path: str | None,
                     ping: float) -> Launcher:
    """The row for sniroute_kubernetes.py; `ping` in seconds, the paths as the settings have them."""
    words = ["--ping", f"{min(ping, PING_MAX):g}", *(("--exec-path", exec_path) if exec_path else ())]
    room = OPTIONS["kubernetes"][0]
    return Launcher(
        sys.executable,
        lambda hostname, port: words_by_hand(room, "port-forward", hostname, "--listen", f"127.0.0.1:{port}", *words),
        environment(environ, kubeconfig), reason, f"{sys.executable} is not there", OPTIONS["kubernetes"], CARRIES,
        tuple(our_words(room, "forwarders", *words)), lambda hostname: our_words(room, "get", hostname, *words[2:]),
        home=False)


# -- the rows -------------------------------------------------------------------------------------

CLUSTER_SCHEMES = {
    scheme: Scheme(functools.partial(check, jump), tunnel_ready, tunnel_prepare, "its tunnel", is_tunnel=True,
                   guard=fits, is_inside=True, is_program=True, told=functools.partial(told, jump), guards_pages=True)
    for scheme, jump in (("kubernetes", False), ("jump", True))
}
