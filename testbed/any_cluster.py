"""A cluster that may be a real one: the same tests run before it, and before the stand-in.

    place            a namespace with a pod that echoes, until the module's tests are over
    launched         launched(*words) -> Program: sniroute_kubernetes.py with the kubeconfig of the place

SNIROUTE_TEST_KUBECONFIG names the kubeconfig of a real cluster; its current context is used.  kubectl makes the objects
there, in a namespace of their own, and removes it.  That needs the right to make namespaces, and an image (IMAGE) that
the cluster can pull.  Without the variable the stand-in of testbed/cluster.py is the cluster, and kubectl speaks to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import uuid
from typing import Any, Callable, Iterator

import pytest

from conftest import HOST, Address, Server, wait_until
from testbed.carrier import Program
from testbed.cluster import Cluster
from testbed.standins import Nursery
from testbed.streams import kubectl_path

REAL = os.environ.get("SNIROUTE_TEST_KUBECONFIG", "")
IMAGE = "docker.io/library/busybox:stable"  # it has sh, and nc that listens and runs a program
PORT = 8080
START = 180  # seconds that a real cluster has to pull the image


class Place:
    """A namespace: the pod `echo` with two services, `web` (port 80, by a name) and `empty`, which has no pods."""

    def __init__(self, folder: pathlib.Path, kubeconfig: str, cluster: Cluster | None):
        self.folder = folder
        self.cluster = cluster  # None: it is a real one
        self.namespace = f"sniroute-test-{uuid.uuid4().hex[:8]}"
        self.kubectl = [kubectl_path(), "--cache-dir", str(folder / "cache"), "--kubeconfig", kubeconfig]
        self.config = json.loads(self.run("config", "view", "--raw", "--flatten", "--minify", "-o", "json"))
        self.kubeconfig = self.write("config", {})
        self.far: Address = "localhost", PORT  # where the pod itself reaches what echoes

    def run(self, *words: str, said: str = "") -> str:
        """What kubectl has said."""
        done = subprocess.run([*self.kubectl, *words], input=said, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def write(self, name: str, user: dict[str, Any]) -> str:
        """A kubeconfig with more in its user.  Returns its path."""
        users = [{**each, "user": {**each["user"], **user}} for each in self.config["users"]]
        path = self.folder / name
        path.write_text(json.dumps({**self.config, "users": users}))
        path.chmod(0o600)
        return str(path)

    def make(self) -> None:
        """Make the objects, and wait until the pod is ready."""
        ports = [{"name": "echo", "containerPort": PORT}]
        container = {
            "name": "main", "image": IMAGE, "command": ["nc", "-ll", "-p", str(PORT), "-e", "cat"], "ports": ports,
            "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1}}
        spec = {"containers": [container], "terminationGracePeriodSeconds": 0}
        services = [{"name": "http", "port": 80, "targetPort": "echo"}]
        self.create("Namespace", self.namespace)
        for kind, name, spec in (("Pod", "echo", spec),
                                 ("Service", "web", {"selector": {"app": "echo"}, "ports": services}),
                                 ("Service", "empty", {"selector": {"app": "nobody"}, "ports": services})):
            self.create(kind, name, namespace=self.namespace, spec=spec)
        wait_until(self.is_ready, START, "a pod that is ready")

    def is_ready(self) -> bool:
        """Whether the pod is ready.  `kubectl wait` asks for the end of a list in a watch, which the stand-in lacks."""
        pod = json.loads(self.run("get", "pod", "echo", "-n", self.namespace, "-o", "json"))
        return {"Ready": "True"}.items() <= {row["type"]: row["status"] for row in pod["status"]["conditions"]}.items()

    def create(self, kind: str, name: str, *, spec: dict[str, Any] | None = None, **about: Any) -> None:
        """Make an object."""
        about = {"name": name, "labels": {"app": name}, **about}
        thing: dict[str, Any] = {"apiVersion": "v1", "kind": kind, "metadata": about}
        if spec is not None:
            thing["spec"] = spec
        self.run("create", "--validate=false", "-f", "-", said=json.dumps(thing))

    def target(self, rest: str) -> str:
        """A target in this namespace."""
        return f"{self.namespace}/{rest}"


@pytest.fixture(scope="module")
def made_place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    cluster = None if REAL else request.getfixturevalue("module_cluster")
    made = Place(tmp_path_factory.mktemp("place"), REAL or str(cluster.directory / "config"), cluster)
    try:
        made.make()
        yield made
    finally:
        with contextlib.suppress(AssertionError):  # it was not made
            made.run("delete", "namespace", made.namespace, "--wait=false")


@pytest.fixture
def place(made_place: Place, echo_server: Server) -> Place:
    """The namespace.  In the stand-in the pod echoes by a server of the test."""
    if made_place.cluster is not None:
        made_place.cluster.replace("echo", {PORT: echo_server.address}, namespace=made_place.namespace)
        made_place.far = HOST, echo_server.address[1]
    return made_place


@pytest.fixture
def launched(place: Place, carriers: Nursery | None) -> Iterator[Callable[..., Program]]:
    """launched(*words, kubeconfig=the place's, start=seconds that a client waits, **options of Popen) -> Program."""
    with contextlib.ExitStack() as stack:
        def make(*words: str, kubeconfig: str = "", start: float = 15.0, **options: Any) -> Program:
            prepare = f"import sniroute_passage as p; p.START = carrier.START = {start}"
            environ = {**os.environ, "KUBECONFIG": kubeconfig or place.kubeconfig}
            made = Program(list(words), environ, prepare=prepare, room="sniroute_kubernetes", carriers=carriers,
                           **options)
            stack.callback(made.close)
            return made

        yield make
