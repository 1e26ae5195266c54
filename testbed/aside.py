"""Some tests in two processes beside the others: a whole run takes minutes less on two cores, since many tests wait.

    the run --- fork, before the first test ---> a child for each row of ASIDE: its tests, their reports into a file
        |                                            |
        all other tests                              ends
        |                                            |
        +------ waits, and tells the reports <-------+      as if the tests had run here, behind the others

It is done for a whole run only: not where tests are chosen, not with -x or --pdb, and not where coverage measures, which
would not see the child.  A child that does not come to its end fails the run.
"""

from __future__ import annotations

import json
import os
import select
import tempfile
from typing import Any, Generator

import pytest

# Files whose tests do not care how busy the host is: they compute, or wait for events only.
ASIDE = tuple(frozenset(f"test_{room}.py" for room in rooms) for rooms in ((
    "wire", "http", "yaml", "kubeconfig", "spdy", "channels", "hpack", "certificate", "claims", "owners", "resp", "dns",
    "objects", "patterns", "names", "settings", "upgrade", "launchers", "house", "gateway", "refusals", "doctor",
    "documents", "credentials", "plugins", "layers", "sqlite", "registry", "rest", "door", "claim", "redis", "rfc2136",
    "shared", "api", "pods", "links", "passage", "jumps", "kubernetes", "clusters", "cluster", "any_cluster",
    "web_clients", "host", "scarcity"), (
    "nodeurl", "signals", "guards", "h2", "streams", "lanes", "duplex", "upstreams", "datagrams", "single", "master",
    "mcp", "instances", "nat", "peering", "pool", "callers", "nodepass", "ends", "nodepass_faults", "nodepass_hostile",
    "offload", "behind_nat", "checks", "browsers", "forwarder", "carrier", "edge", "dial", "race", "tls", "routes", "reuse",
    "http2", "hostile_http", "fuzz", "exhaustion")))
END = "end"  # the last line of the file
MANY = 5000  # tests of a run that is worth further processes


class Child:
    """The process that runs some tests, from its fork to its last report."""

    def __init__(self, session: pytest.Session, items: list[pytest.Item], others: list[Child]):
        self.config = session.config
        self.file = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.over, lives = os.pipe()  # it ends with the child
        watched, self.alive = os.pipe()  # it ends with the run
        run = os.fork()
        if run:
            os.close(lives)
            os.close(watched)
            os.waitpid(run, 0)
            return
        # The child is nobody's: what its tests leave without a parent must not become a child of the run, some of whose
        # tests take such processes in (PR_SET_CHILD_SUBREAPER).
        if os.fork():
            os._exit(0)
        code = 1
        try:
            for other in (*others, self):
                os.close(other.alive)
            self._run(session, items, watched)
            code = 0
        finally:  # nothing of the run is the child's to end
            os._exit(code)

    def _run(self, session: pytest.Session, items: list[pytest.Item], watched: int) -> None:
        """The child: run these as long as there is a run, and write down what came of each."""
        manager = self.config.pluginmanager
        capture = manager.getplugin("capturemanager")
        capture.stop_global_capturing()  # its files are the other process's
        capture.start_global_capturing()
        manager.unregister(manager.getplugin("terminalreporter"))
        manager.register(self, "aside")
        session.items = items
        for item, following in zip(items, [*items[1:], None]):
            if select.select([watched], [], [], 0)[0]:
                return
            self.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        self.file.write(json.dumps(END) + "\n")
        self.file.flush()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The child: a report."""
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data) + "\n")

    def end(self) -> None:
        """Wait for the child, and tell its reports.  Raises pytest.UsageError where it has broken off."""
        with open(self.over, "rb") as over:
            over.read()
        os.close(self.alive)
        self.file.seek(0)
        with self.file:
            rows = [json.loads(line) for line in self.file if line.endswith("\n")]
        for data in rows:
            if data != END:
                report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
                if isinstance(report.longrepr, list):  # of a skip: JSON has no tuples
                    report.longrepr = tuple(report.longrepr)
                self.config.hook.pytest_runtest_logreport(report=report)
        if rows[-1:] != [END]:
            raise pytest.UsageError("the tests that run beside the others broke off")


def is_whole(session: pytest.Session) -> bool:
    """Whether this is a run of all tests, of which nobody wants to see single ones."""
    option = session.config.option
    return (len(session.items) > MANY and (os.cpu_count() or 1) > 1 and hasattr(os, "fork") and not option.usepdb
            and not option.maxfail and not option.collectonly
            and not any(name.startswith("COVERAGE") for name in os.environ))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Run the tests of ASIDE beside the others."""
    if not is_whole(session):
        return (yield)
    children: list[Child] = []
    for names in ASIDE:
        items = [item for item in session.items if item.path.name in names]
        session.items = [item for item in session.items if item.path.name not in names]
        if items:
            children.append(Child(session, items, children))
    try:
        return (yield)
    finally:
        for child in children:
            child.end()
