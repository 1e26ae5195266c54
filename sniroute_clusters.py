"""sniroute_clusters: targets in Kubernetes clusters, as the router sees them: two kinds of target, and their program.

    kubernetes:NAMESPACE/svc/NAME:PORT[@CONTEXT]          a ready pod behind it
    jump:NAMESPACE/svc/NAME/HOST:PORT[@CONTEXT]           HOST:PORT as that pod sees it

        loop                                    reaper                             sniroute_kubernetes.py, one process
        choose, tunnel_ready                    TunnelTable
          Decision.tunnel: a TunnelKey --------->  Launcher.argument: what it is told --->  listen 127.0.0.1:20000 ...
          a TunnelBackend, to that port            reason <------------------------------  failed: one of REASONS

Both kinds are tunnels of the TunnelTable, and one process carries them all.  It finds the pods, and asks the API server;
nothing here does.

What a name may choose.  A field stands for a namespace, a name, the value of a label, a host, a port or a context,
and for no other word: `fits` looks.  A route whose field is the namespace or the context says which there may be
(`misfits`, at the start), and each name is held against that (`told`).

Splits.  Names of ports have dashes, as those of services do: `{service}-{port}` fits `my-api-http-metrics` in several
ways.  Only the cluster knows which one is meant.  So where it has no such service or port, the next way is tried
(`SplitBackend`); the one that has worked is tried first from then on.

Threads: the loop, and main when settings are read.  `Decision.splits` is the loop's.

Seams: I want to ...
    understand another reason        a row in REASONS; for another kind of refusal one in sniroute_refusals, too
    let a variable through           VARIABLES, PREFIXES
    let a field stand elsewhere      `fits`

This room imports sniroute_pods (`parse_target`), sniroute_targets, sniroute_launchers, sniroute_names, sniroute_refusals
and the standard library.
"""

from __future__ import annotations

import fnmatch
import sys
from typing import TYPE_CHECKING, Iterator, Mapping, Sequence

from sniroute_launchers import (TUNNEL_ENVIRONMENT, TUNNEL_IDENTITY, Launcher, Reason, TunnelKey, last_line,
                                last_words, our_words, words_by_hand)
from sniroute_names import OPTIONS, printable
from sniroute_pods import parse_target
from sniroute_refusals import Malformed, Refused
from sniroute_targets import (Another, Backend, NotYet, Scheme, TunnelBackend, Verdict, lease_of, tunnel_prepare,
                              tunnel_ready)

if TYPE_CHECKING:
    import socket

    from sniroute_connection import Connection
    from sniroute_routes import Decision, Route
    from sniroute_targets import Targets

__version__ = "0.1.0"

# Limits, each with its reason.
CARRIES = 500  # targets in one process: more than there are ports for by default; each further one costs it 64 KiB
TOLD_MAX = 900  # characters: a line of the program's stdin takes 1,024 bytes, with the order and the address

# -- targets -----------------------------------------------------------------------------------

JUMP = "jump"


def check(kind: str, rest: str) -> str:
    """Check a target, and return it unchanged.  Raises Malformed, `bad_name`."""
    if not rest.isascii() or not rest.isprintable() or " " in rest or len(rest) > TOLD_MAX:
        raise Malformed(f"{printable(rest, 80)!r} has blanks, other letters than ASCII, or over {TOLD_MAX} characters: "
                        "rename such a context, or give it a short name in [kubernetes.contexts]", kind="bad_name")
    try:
        parse_target(f"{JUMP}:{rest}" if kind == JUMP else rest)
    except Malformed as error:
        raise Malformed(str(error), kind="bad_name") from None
    return rest


def check_kubernetes(rest: str) -> str:
    """As `check`, for `kubernetes:`."""
    return check("kubernetes", rest)


def check_jump(rest: str) -> str:
    """As `check`, for `jump:`."""
    return check(JUMP, rest)


def parts_of(rest: str) -> tuple[str, str, str]:
    """The namespace of a target, what stands between, and its context; '' where it names none."""
    place, _, context = rest.partition("@")
    namespace, _, middle = place.partition("/")
    return namespace, middle, context


def fits(template: str, rest: str) -> None:
    """Check that each field stands where one may.  Raises Malformed.

    No field has one of `/ : @ , = ?`, so none makes another part: it is enough to look at the target as it was written.
    """
    _, middle, _ = parts_of(template)
    word, _, name = middle.partition("/")
    keys = [pair.partition("=")[0] for pair in name.rpartition(":")[0].split(",") if "=" in pair]
    if "{" in word or any("{" in key for key in keys):
        raise Malformed(f"{printable(template, 80)!r}: a field stands for a namespace, a name, the value of a label, a "
                        "host, a port or a context, and for nothing else", kind="bad_name")


def cluster_targets(route: Route) -> Iterator[tuple[str, str]]:
    """The targets of a route that are in clusters: (kind, rest)."""
    for target in route.targets:
        scheme, _, rest = target.partition(":")
        if scheme in CLUSTER_SCHEMES:
            yield scheme, rest


def misfits(route: Route) -> Iterator[str]:
    """What a route to clusters lacks, a sentence each.

    Whoever reaches the listener may ask for any name, and so may a page in a browser of its user.  So a kubeconfig
    with many clusters in it is not open to all of them by one line.
    """
    for _, rest in cluster_targets(route):
        namespace, _, context = parts_of(rest)
        for what, text, globs in (("namespace", namespace, route.namespaces), ("context", context, route.contexts)):
            if "{" in text and not globs:
                yield (f"{printable(text)} lets clients choose the {what}: say which they may reach, in the file, as "
                       f'{what}s = ["team-*"]')


def told(route: Route, rest: str) -> str:
    """What the program is told of a target: with the real name of its context, and the options of its route.

    Raises Refused where the route does not lead to that namespace, or that context.
    """
    namespace, middle, context = parts_of(rest)
    real = dict(route.aliases).get(context, context)
    for what, names, globs in (("namespace", (namespace,), route.namespaces), ("context", (context, real), route.contexts)):
        if globs and not any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs):
            raise Refused("forbidden", f"{printable(rest)}: {route.pattern} leads to no such {what}")
    options = f"?container={route.container}" if route.container else ""
    return f"{namespace}/{middle}{options}" + (f"@{real}" if real else "")


def argument(key: TunnelKey) -> str:
    """The last word of `listen`."""
    return f"{JUMP}:{key.hostname}" if key.launcher == JUMP else key.hostname


# -- the program -------------------------------------------------------------------------------

# What it gets of the router's environment, beside the way out and the trust store.  It runs the credential plugins of
# the kubeconfig, which have to find themselves and their own settings.  What else one needs goes into `env` of its
# user in the kubeconfig.
VARIABLES = TUNNEL_ENVIRONMENT - TUNNEL_IDENTITY | {"HOME", "PATH", "USER", "LOGNAME", "TMPDIR", "KUBECONFIG"}
PREFIXES = ("KUBERNETES_", "AWS_", "AZURE_", "AAD_", "GOOGLE_", "CLOUDSDK_", "OCI_", "TELEPORT_", "VAULT_", "XDG_")

# Its reasons: (kind, final).  A reason that is not here is ("failed", False): the same may go well a moment later.
REASONS = {
    "config": ("config", True),
    "context": ("absent", True),
    "unknown": ("absent", True),
    "port": ("absent", True),
    "not_ready": ("not_ready", True),
    "name": ("unreachable", True),
    "resolver": ("unreachable", True),
    "refused": ("unreachable", True),
    "unreachable": ("unreachable", True),
    "proxy": ("unreachable", True),
    "busy": ("unreachable", True),
    "certificate": ("certificate", True),
    "tls": ("certificate", True),
    "plugin": ("plugin", True),
    "login": ("login", True),
    "forbidden": ("forbidden", True),
    "timeout": ("timeout", True),
}


def environment(environ: Mapping[str, str], kubeconfig: str | None) -> dict[str, str]:
    """The environment of the program: without the router's identity for Access."""
    found = {name: value for name, value in environ.items() if name in VARIABLES or name.startswith(PREFIXES)}
    if kubeconfig:
        found["KUBECONFIG"] = kubeconfig
    return {**found, "TUNNEL_LOG_OUTPUT": "json"}


def reason(tail: bytes) -> Reason:
    """The reason in the program's last line."""
    kind, final = REASONS.get(str(last_line(tail)[1].get("reason")), ("failed", False))
    return Reason(kind, last_words(tail), final)


def cluster_launcher(environ: Mapping[str, str], kubeconfig: str | None, exec_path: str | None,
                     ping: float) -> Launcher:
    """The row for sniroute_kubernetes.py; `ping` in seconds, the paths as the settings have them."""
    words = ["--ping", f"{ping:g}s", *(("--exec-path", exec_path) if exec_path else ())]
    room = OPTIONS["kubernetes"][0]
    return Launcher(
        sys.executable,
        lambda hostname, port: words_by_hand(room, "port-forward", hostname, "--listen", f"127.0.0.1:{port}", *words),
        environment(environ, kubeconfig), reason, f"{sys.executable} is not there", OPTIONS["kubernetes"], CARRIES,
        tuple(our_words(room, "forwarders", *words)), lambda hostname: our_words(room, "get", hostname, *words[2:]),
        home=False, argument=argument)


# -- several ways to read a name ---------------------------------------------------------------


class SplitBackend(TunnelBackend):
    """A leased tunnel to what one split of a name means; where the cluster has no such thing, the next one is tried.

    Where that tunnel has to be started first, there is no lease yet, and `open` says so.
    """

    __slots__ = ("awaited", "decision", "splits", "at")

    def __init__(self, targets: Targets, decision: Decision, splits: Sequence[Decision], at: int):
        split, tunnels = splits[at], targets.tunnels
        leased = lease_of(tunnels, split)
        self.awaited = split if leased is None else None
        self.decision = decision
        self.splits = splits  # in the order in which this client tries them
        self.at = at
        if leased is not None:
            super().__init__(tunnels, split.target, split.route.idle, *leased)
        else:
            Backend.__init__(self, split.target, (), True)
            self.tunnels, self.lease = tunnels, None

    def open(self, why: str = "") -> socket.SocketType:
        if self.awaited is not None:
            raise NotYet()
        return super().open(why)

    def answered(self) -> None:
        super().answered()
        splits, split = self.decision.splits, self.splits[self.at]
        if splits[0] is not split:
            splits.remove(split)
            splits.insert(0, split)

    def failed(self, why: str, server: socket.SocketType | None, last: bool) -> Verdict:
        verdict = super().failed(why, server, last)
        if last or not isinstance(verdict, Refused) or verdict.kind != "tunnel_absent" \
                or self.at + 1 == len(self.splits):
            return verdict
        self.at += 1
        return Another()


def choose(connection: Connection) -> Backend | None:
    """A lease on the tunnel; where the name may be read in several ways, on that of the way whose turn it is."""
    decision, targets, former = connection.decision, connection.router.targets, connection.backend
    if not decision.splits:
        return tunnel_ready(targets, decision)
    if isinstance(former, SplitBackend):
        return SplitBackend(targets, decision, former.splits, former.at)
    return SplitBackend(targets, decision, tuple(decision.splits), 0)


CLUSTER_SCHEMES = {
    kind: Scheme(look, tunnel_ready, tunnel_prepare, "its tunnel", is_tunnel=True, guard=fits, is_inside=True,
                 is_program=True, choose=choose, told=told, tries_splits=True, guards_pages=True)
    for kind, look in (("kubernetes", check_kubernetes), (JUMP, check_jump))
}
