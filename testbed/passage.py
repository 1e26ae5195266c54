"""The Kubernetes program for tests: in a thread, and as a child; a cluster for all tests of a module.

    kube            one cluster for all tests of a module; after each test its faults are healed
    forward           forward(target, CONSTANT=...) -> Local: a program in a thread, which listens for a target
    kubernetes      kubernetes(*words) -> Program: the real program, as a child

Pods and services have names that no other test uses: `app` makes them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from typing import Any, Callable, Iterator

import pytest

import sniroute_api
import sniroute_jumps
import sniroute_links
import sniroute_passage
import sniroute_pods
from conftest import HOST, Address, wait_until
from sniroute_kubernetes import Kubernetes, Settings
from testbed.carrier import Notes, Program, Rows
from testbed.cluster import Cluster
from testbed.standins import Nursery

ROOMS = sniroute_passage, sniroute_jumps, sniroute_links, sniroute_pods, sniroute_api
QUEUES = {  # constants that a program reads once, and where it keeps them
    "START": "starting", "ACCEPT": "accepting", "GRACE": "graced", "HALF_LAST": "halved", "LINGER": "lingering"}
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def module_cluster(tmp_path_factory, certificates, nursery) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"), certificates, nursery)
    made.kubeconfig()
    yield made
    made.stop()


@pytest.fixture
def kube(module_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster of the module."""
    yield module_cluster
    module_cluster.heal()
    module_cluster.set(version="1.36", runtime="cri-o", fragment=0, grace=None)


class App:
    """A service and its pods, of one test."""

    def __init__(self, cluster: Cluster, *addresses: Address, **options: Any):
        self.cluster = cluster
        self.name = f"app-{next(numbers)}"
        self.pods = [f"{self.name}-{number}" for number in range(1, len(addresses) + 1)]
        for pod, address in zip(self.pods, addresses):
            cluster.pod(pod, {8080: address}, labels={"app": self.name}, **options)
        cluster.service(self.name, {80: 8080}, {"app": self.name})
        self.target = f"default/svc/{self.name}:80"

    def sessions(self, **match: Any) -> list[dict[str, Any]]:
        """The sessions to its pods."""
        return [row for pod in self.pods for row in self.cluster.sessions(pod=pod, **match)]

    def streams(self, **match: Any) -> list[dict[str, Any]]:
        """The connections to its pods' ports."""
        return [row for pod in self.pods for row in self.cluster.streams(pod=pod, **match)]

    def upgrades(self, **match: Any) -> list[str]:
        """The kinds of upgrade that were asked for, in this order."""
        rows = [row for pod in self.pods for row in self.cluster.requests(name=pod, **match) if row["transport"]]
        return [row["transport"] for row in sorted(rows, key=lambda row: row["time"])]

    def has_spare(self) -> None:
        """Wait until there are two sessions: one that has served, and one that was made ahead."""
        wait_until(lambda: len(self.sessions(ended=None)) >= 2, what="a spare session")


@pytest.fixture
def app(kube: Cluster) -> Callable[..., App]:
    """app(*addresses of servers, **options of Cluster.pod) -> App."""
    return lambda *addresses, **options: App(kube, *addresses, **options)


class Local(Rows):
    """The program in a thread of the test, with one listener."""

    def __init__(self, cluster: Cluster, target: str, kubeconfig: str = "", ping: float = 15.0,
                 queues: dict[str, float] | None = None):
        self.log = Notes()
        self.program = Kubernetes(self.log, Settings(kubeconfig or str(cluster.directory / "config"), ping=ping),
                                  {"HOME": str(cluster.directory)})
        for name, seconds in (queues or {}).items():
            getattr(self.program, name).seconds = seconds
        listener = self.program.listen(self.program.parse(target), (HOST, 0))
        self.address = listener.sock.getsockname()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, name="kubernetes")
        self.thread.start()

    def run(self) -> None:
        try:
            self.program.run()
        except BaseException as error:
            self.error = error
            raise

    def rows(self, event: str) -> list[dict[str, str]]:
        return [row for row in self.log.rows if row.get("event") == event]

    def states(self) -> list[str]:
        """The state of each client."""
        return sorted(client.state for client in self.program.connections.copy())

    def reaches(self, *states: str) -> None:
        """Wait until the clients are in these states."""
        wait_until(lambda: self.states() == sorted(states), what=f"{states}, not {self.states()}")

    def close(self) -> None:
        self.program.loop.call(self.program.stop)
        self.thread.join(10)
        assert not self.thread.is_alive() and self.error is None
        assert not self.program.connections and not self.program.listeners and not self.program.links.all
        assert not self.rows("fault"), self.rows("fault")


@pytest.fixture
def forward(kube: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Local]]:
    """forward(target, CONSTANT=..., **options of Local) -> Local."""
    with contextlib.ExitStack() as stack:
        def make(target: str, **options: Any) -> Local:
            queues = {"graced": 0.1}
            for constant in [option for option in options if option.isupper()]:
                room = next(room for room in ROOMS if hasattr(room, constant))
                monkeypatch.setattr(room, constant, options[constant])
                value = options.pop(constant)
                if constant in QUEUES:
                    queues[QUEUES[constant]] = value
            made = Local(kube, target, queues=queues, **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def kubernetes(kube: Cluster, carriers: Nursery | None) -> Iterator[Callable[..., Program]]:
    """kubernetes(*words, prepare=statements before main(), **options of Popen) -> Program."""
    with contextlib.ExitStack() as stack:
        def make(*words: str, prepare: str = "", environ: dict[str, str] | None = None, **options: Any) -> Program:
            environ = {"KUBECONFIG": str(kube.directory / "config"), "PATH": os.environ["PATH"], **(environ or {})}
            made = Program(list(words), environ, prepare=prepare, room="sniroute_kubernetes", carriers=carriers,
                           **options)
            stack.callback(made.close)
            return made

        yield make
