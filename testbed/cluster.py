"""A Kubernetes cluster for tests: an API server and a node that behave as real ones, and do what a test says.

    cluster          a cluster for one test: its API server is a child process (testbed/fake_cluster.py)
    make_cluster     make_cluster(**options) -> Cluster, until the test ends: for several, or for other options
    kubectl          kubectl(*words) -> what a real kubectl has said to `cluster`; skips without one

What a test does with it:

    cluster.pod("web-1", {8080: server.address}, labels={"app": "web"})    # its port 8080 is a server of the test
    cluster.service("web", {80: 8080}, {"app": "web"})
    config = cluster.kubeconfig()                                          # the path of a kubeconfig
    ...
    cluster.fault("status", code=429, retry_after=1, resource="pods", times=1)
    cluster.replace("web-1")                                               # the same name, another uid
    wait_until(lambda: cluster.sessions(pod="web-1", ended=None))

Objects change at once, and watches hear of it.  The child has the records: `requests`, `connections`, `sessions`,
`streams`, `executions` give those whose fields fit.  Nothing of it is imported by the program, and nothing of the
program by it: the SPDY in it is a second one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import threading
from typing import Any, Callable, Iterator

import pytest

from conftest import HOST, Address
from testbed.standins import Nursery
from testbed.streams import kubectl_path

TOKEN = "admin-token"  # of the user "admin", who may do everything
Record = dict[str, Any]


class Cluster:
    """The stand-in, running: the program testbed/fake_cluster.py, and a socket on which it is told what to do.

    Args:
        directory: for its files; the kubeconfigs are there, too.
        certificates: the folder of `make_certificates`.
        nursery: forks it.
        certificate: the server's: "edge" is right for 127.0.0.1, localhost and *.example.test; "untrusted", "expired"
            and "wrong_name" are not.
        h2: choose HTTP/2 where a client offers it, as a real one does; the connection ends there.
    """

    def __init__(self, directory: pathlib.Path, certificates: pathlib.Path, nursery: Nursery, certificate: str = "edge",
                 h2: bool = False):
        self.directory = directory
        self.certificates = certificates
        self.ca = certificates / "ca.pem"
        self.errors = directory / "errors"
        self.frozen = False
        self.lock = threading.Lock()  # guards the socket: an order and its answer
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(20)
        self.answers = self.socket.makefile("rb")
        with theirs, open(self.errors, "wb") as errors:
            self.process = nursery.start("fake_cluster", [str(certificates), certificate, "h2" if h2 else ""],
                                         theirs, errors)
        try:
            self.port: int = self.hear()
        except BaseException:
            self.stop()
            raise
        self.address: Address = HOST, self.port
        self.url = f"https://{HOST}:{self.port}"

    def stop(self) -> None:
        """End it, and every command that still runs in a pod.  Fails if it wrote to stderr."""
        self.thaw_process()
        self.answers.close()
        self.socket.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        assert self.errors.read_text() == ""

    # -- orders --------------------------------------------------------------------------------

    def hear(self) -> Any:
        """Its next line."""
        line = self.answers.readline()
        assert line, f"the cluster has ended: {self.errors.read_text()}"
        return json.loads(line)

    def order(self, order: str, **words: Any) -> Any:
        """Tell it something, and return what it answers.  Raises ValueError where it cannot do that."""
        assert not self.frozen, "a frozen cluster does nothing"
        with self.lock:
            self.socket.sendall(json.dumps([order, words]).encode() + b"\n")
            answer = self.hear()
        if "failed" in answer:
            raise ValueError(answer["failed"])
        return answer["done"]

    # -- objects -------------------------------------------------------------------------------

    def pod(self, name: str, ports: dict[int, Address] | None = None, *, labels: dict[str, str] | None = None,
            names: dict[str, int] | None = None, ready: bool = True, phase: str = "Running",
            namespace: str = "default", node: str | None = None, containers: tuple[str, ...] = ("main",),
            annotations: dict[str, str] | None = None, path: str | None = None, sidecar: bool = False) -> Record:
        """A pod that runs, or with phase "Pending" one that does not (without `node` it has no host, either).

        Args:
            ports: {port in the pod: the address of a server of the test}.  Every other port refuses.
            names: names of its ports, as its container declares them; with `sidecar`, an init container does.
            path: the PATH of its commands; the test's own by default.
        """
        return self.order("pod", name=name, ports=list((ports or {}).items()), names=names or {}, labels=labels or {},
                          namespace=namespace, ready=ready, phase=phase, node=node, containers=containers,
                          annotations=annotations or {}, path=path, sidecar=sidecar)

    def run_pod(self, name: str, ports: dict[int, Address] | None = None, *, path: str | None = None,
                ready: bool = True, namespace: str = "default") -> Record:
        """Let a pod run that is there, but has not started."""
        return self.order("run", name=name, ports=list((ports or {}).items()), path=path, ready=ready,
                          namespace=namespace)

    def service(self, name: str, ports: dict[int, int | str] | list[Record],
                selector: dict[str, str] | None = None, *, namespace: str = "default", **spec: Any) -> Record:
        """A service.  `ports`: {port: targetPort}, or the list of a spec; `spec`: type, clusterIP, ..."""
        if isinstance(ports, dict):
            ports = [{"port": port, "targetPort": target, "protocol": "TCP"} for port, target in ports.items()]
        return self.put("services", name, namespace=namespace, spec={
            "type": "ClusterIP", "clusterIP": "10.96.0.10", "ports": ports,
            **({"selector": selector} if selector else {}), **spec})

    def workload(self, resource: str, name: str, labels: dict[str, str], *, namespace: str = "default") -> Record:
        """A deployment, statefulset, replicaset ... that selects pods with these labels."""
        return self.put(resource, name, namespace=namespace, spec={
            "replicas": 1, "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}}})

    def slice(self, service: str, addresses: dict[str, bool], ports: list[Record], *,
              namespace: str = "default") -> Record:
        """An EndpointSlice of a service.  `addresses`: {address: whether it is ready}."""
        return self.put("endpointslices", f"{service}-abcde", namespace=namespace, addressType="IPv4", ports=ports,
                        metadata={"labels": {"kubernetes.io/service-name": service}},
                        endpoints=[{"addresses": [address], "conditions": {"ready": ready}}
                                   for address, ready in addresses.items()])

    def put(self, resource: str, name: str, *, namespace: str = "default", **thing: Any) -> Record:
        """Create an object, or put another in its place: its spec, status, ..."""
        return self.order("put", resource=resource, name=name, thing=thing, namespace=namespace)

    def change(self, resource: str, name: str, change: Record, *, namespace: str = "default") -> Record:
        """Change an object by a JSON merge patch: None takes a field away."""
        return self.order("change", resource=resource, name=name, change=change, namespace=namespace)

    def get(self, resource: str, name: str, *, namespace: str = "default") -> Record:
        """An object as it is now.  Raises ValueError."""
        return self.order("get", resource=resource, name=name, namespace=namespace)

    def remove(self, resource: str, name: str, *, namespace: str = "default") -> None:
        """An object is gone.  A pod's connections end with "connection reset by peer"; sessions to its node stay."""
        self.order("remove", resource=resource, name=name, namespace=namespace)

    def ready(self, name: str, ready: bool = True, *, namespace: str = "default") -> Record:
        """A pod becomes ready, or is so no more."""
        return self.order("ready", name=name, ready=ready, namespace=namespace)

    def terminate(self, name: str, *, namespace: str = "default") -> Record:
        """A pod begins to end: it has a deletionTimestamp, is still Ready, and its connections go on."""
        return self.order("terminate", name=name, namespace=namespace)

    def replace(self, name: str, ports: dict[int, Address] | None = None, *, namespace: str = "default") -> Record:
        """A pod is gone, and another of its name and labels runs, as a StatefulSet's; by default with its ports."""
        return self.order("replace", name=name, ports=None if ports is None else list(ports.items()),
                          namespace=namespace)

    # -- users and settings --------------------------------------------------------------------

    def user(self, name: str, *, token: str | None = None, password: str | None = None,
             allow: dict[str, str] | None = None, groups: tuple[str, ...] = (), namespace: str | None = None) -> None:
        """A user, or new proof and a new role for one.  A client certificate's CN is a user's name, too.

        Args:
            allow: {resource, or "*": verbs}, as {"services": "get", "pods/portforward": "create get"}; None: all.
            namespace: the role is of this namespace only.
        """
        self.order("user", name=name, token=token, password=password, allow=allow, groups=groups, namespace=namespace)

    def set(self, **settings: Any) -> None:
        """Change settings: version, runtime ("cri-o", "containerd", "resetting"), grace, prefix, pair_timeout,
        starts_pods, fragment, deletion; see SETTINGS in testbed/fake_cluster.py."""
        self.order("set", **settings)

    # -- faults --------------------------------------------------------------------------------

    def fault(self, action: str, at: str | None = None, *, times: int | None = None, after: int = 0,
              seconds: float = 0.0, code: int = 503, message: str | None = None, retry_after: float | None = None,
              **match: Any) -> int:
        """Let something go wrong from now on.  Returns the fault's number, for `hits`.  Raises ValueError.

        Args:
            action, at: a row of ACTIONS and a point of POINTS in testbed/fake_objects.py.
            times: how often it happens; None: until `heal`.
            after: at "open": so many bytes down; at "body" of a watch: so many events.
            match: facts that have to fit: resource, verb, name, namespace, user, transport, port, pod, ...
        """
        return self.order("fault", action=action, at=at, times=times, after=after, seconds=seconds, code=code,
                          message=message, retry_after=retry_after, **match)

    def hits(self, number: int) -> int:
        """How often this fault has happened."""
        return self.order("hits", number=number)

    def heal(self) -> None:
        """No faults from now on.  What hangs already, hangs on."""
        self.order("heal")

    def end_sessions(self, how: str, **match: Any) -> int:
        """Do something to the sessions that fit: "rst", "eof", "end", "close" (a WebSocket's Close first), "goaway",
        "ping", "freeze", "thaw".  Returns how many there were."""
        return self.order("end", how=how, sessions=True, match=match)

    def end_connections(self, how: str) -> int:
        """The same to all connections, watches and idle ones too: "rst", "eof", "end", "freeze", "thaw"."""
        return self.order("end", how=how, sessions=False, match={})

    def compact(self, watches: bool = True) -> None:
        """What is older than now is forgotten: lists and watches from there get 410, and so do open watches."""
        self.order("compact", watches=watches)

    def bookmark(self) -> None:
        """Send a bookmark to the watches that have asked for them."""
        self.order("bookmark")

    def down(self, back_after: float | None = None) -> None:
        """The API server is gone: it resets all, and refuses connections.  It is back after so many seconds."""
        self.order("down", back_after=back_after)

    def up(self) -> None:
        """It is back, on the same port."""
        self.order("up")

    def freeze_process(self) -> None:
        """Stop the process (SIGSTOP): the kernel still takes connections.  No order works until `thaw_process`."""
        self.frozen = True
        self.process.send_signal(signal.SIGSTOP)

    def thaw_process(self) -> None:
        self.frozen = False
        self.process.send_signal(signal.SIGCONT)

    # -- records -------------------------------------------------------------------------------

    def records(self, kind: str, match: Record) -> list[Record]:
        """The records of a kind whose fields fit."""
        return self.order("records", kind=kind, match=match)

    def requests(self, **match: Any) -> list[Record]:
        """One row per request: connection, nth (on it), method, path, query, headers (without Authorization), user,
        verb, resource ("pods/portforward"), namespace, name, transport, status (None: not answered)."""
        return self.records("requests", match)

    def connections(self, **match: Any) -> list[Record]:
        """One row per TCP connection: number, alpn, tls, requests, ended (None: it is open; "client", "rst", ...)."""
        return self.records("connections", match)

    def sessions(self, **match: Any) -> list[Record]:
        """One row per upgrade: connection, kind ("portforward", "exec"), transport, protocol, namespace, pod, uid,
        user, container, streams (pairs so far), live and most_live (streams), pings, pongs, resets and goaway (the
        client's), faulty (streams that broke the rules), bytes_up, ended (None: it is open)."""
        return self.records("sessions", match)

    def streams(self, **match: Any) -> list[Record]:
        """One row per connection to a pod's port: session (its number), transport, pod, uid, port, requestid, up, down
        (bytes), client_fin, ended (None: it is open; "fin", "error", "reset", "lost"), error (the text)."""
        return self.records("streams", match)

    def executions(self, **match: Any) -> list[Record]:
        """One row per command: session, argv, pid, code (None: it runs), stdin_ended."""
        return self.records("executions", match)

    # -- kubeconfigs ---------------------------------------------------------------------------

    def kubeconfig(self, name: str = "config", *, user: Record | None = None, cluster: Record | None = None,
                   context: Record | None = None, context_name: str = "test") -> pathlib.Path:
        """Write a kubeconfig as kubectl writes it.  Returns its path; a file that is there is replaced.

        Args:
            user: the fields of the user; the admin's token by default.
            cluster, context: fields that are added; None takes one away.
        """
        def fields(usual: Record, more: Record | None) -> Record:
            return {key: value for key, value in {**usual, **(more or {})}.items() if value is not None}

        ca = base64.b64encode(self.ca.read_bytes()).decode()
        config = {
            "apiVersion": "v1",
            "clusters": [{"cluster": fields({"certificate-authority-data": ca, "server": self.url}, cluster),
                          "name": "cluster"}],
            "contexts": [{"context": fields({"cluster": "cluster", "user": "user"}, context), "name": context_name}],
            "current-context": context_name, "kind": "Config", "preferences": {},
            "users": [{"name": "user", "user": {"token": TOKEN} if user is None else user}]}
        path = self.directory / name
        new = self.directory / f"{name}.new"
        new.write_text(as_yaml(config))
        new.chmod(0o600)
        return new.replace(path)

    def client_certificate(self, user: str, groups: tuple[str, ...] = ()) -> tuple[pathlib.Path, pathlib.Path]:
        """The certificate and the key of a client, signed by the test's CA: CN is the user, each O a group."""
        paths = tuple(self.certificates / f"client-{'-'.join([user, *groups])}.{end}" for end in ("pem", "key"))
        if not paths[0].exists():
            subject = "".join([*(f"/O={group}" for group in groups), f"/CN={user}"])
            extensions = self.directory / "client.cnf"
            extensions.write_text("extendedKeyUsage = clientAuth\nkeyUsage = digitalSignature\n"
                                  "basicConstraints = critical, CA:FALSE\n")
            key = "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", paths[1]
            request = subprocess.run(["openssl", "req", *key, "-subj", subject], capture_output=True, check=True)
            issuer = "-CA", self.ca, "-CAkey", self.certificates / "ca.key", "-extfile", extensions
            subprocess.run(["openssl", "x509", "-req", *issuer, "-days", "2", "-out", paths[0],
                            "-set_serial", str(int.from_bytes(os.urandom(8), "big"))],
                           input=request.stdout, capture_output=True, check=True)
        return paths


def as_yaml(value: Any, indent: str = "") -> str:
    """YAML as kubectl writes it: two spaces, lists at the indent of their key, quotes where they are needed."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines.append(f"{indent}{key}:\n{as_yaml(item, indent + '  ')}")
        elif isinstance(item, (list, tuple)) and item:
            lines.append(f"{indent}{key}:\n")
            for part in item:
                text = as_yaml(part, indent + "  ") if isinstance(part, dict) else f"{indent}  {scalar(part)}\n"
                lines.append(f"{indent}- {text[len(indent) + 2:]}")
        else:
            lines.append(f"{indent}{key}: {scalar(item)}\n")
    return "".join(lines)


def scalar(value: Any) -> str:
    """One value of YAML."""
    if not isinstance(value, str):
        return json.dumps(value)
    plain = value and value[0].isalpha() and not set(value) & set("#{}[],&*!|>'\"%@`\n") and ": " not in value
    return value if plain and value.lower() not in ("true", "false", "null", "yes", "no", "on", "off") \
        and not value.endswith((":", " ")) else json.dumps(value)


# -- fixtures ----------------------------------------------------------------------------------


@pytest.fixture
def make_cluster(tmp_path: pathlib.Path, certificates: pathlib.Path,
                 nursery: Nursery) -> Iterator[Callable[..., Cluster]]:
    """make_cluster(certificate=..., h2=...) -> Cluster, until the test ends."""
    with contextlib.ExitStack() as stack:
        def make(**options: Any) -> Cluster:
            directory = tmp_path / f"cluster-{len(os.listdir(tmp_path))}"
            directory.mkdir()
            made = Cluster(directory, certificates, nursery, **options)
            stack.callback(made.stop)
            return made

        yield make


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A cluster for this test alone."""
    return make_cluster()


class Kubectl:
    """A real kubectl, with a home of its own, that speaks to a cluster."""

    def __init__(self, path: str, cluster: Cluster):
        self.command = [path, "--cache-dir", str(cluster.directory / "cache")]
        self.environ = {"HOME": str(cluster.directory), "KUBECONFIG": str(cluster.kubeconfig("kubectl-config")),
                        "PATH": os.environ.get("PATH", os.defpath)}

    def __call__(self, *words: str, said: str = "", code: int = 0, **environ: str) -> str:
        """Run it to its end.  Returns its stdout and stderr."""
        done = subprocess.run([*self.command, *words], input=said, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, timeout=30, env={**self.environ, **environ})
        assert done.returncode == code, done.stdout
        return done.stdout

    @contextlib.contextmanager
    def start(self, *words: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
        """Run it until the block ends; its stdout is a pipe, with stderr in it."""
        process = subprocess.Popen([*self.command, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, env={**self.environ, **environ})
        with process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def kubectl(cluster: Cluster) -> Kubectl:
    """A real kubectl: kubectl(*words) runs it to its end, kubectl.start(*words) for a block."""
    return Kubectl(kubectl_path(), cluster)
