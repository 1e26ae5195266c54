"""endure_far: far ends of tunnels as processes, for testbed/endure.py.

    make_certificate   what both of the next two show, in a file; it is its own authority
    edge               the stand-in for Cloudflare's edge (fake_edge): names that lead to ports
    cluster            the stand-in for a Kubernetes cluster (fake_cluster): one pod, and its kubeconfig
    plugin_that_hangs  a credential plugin that waits for a login

Each is used with `with`, and ends with its block.  The standard library only, and openssl.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import socket
import subprocess
import sys
from typing import Any, Iterator, Mapping, Sequence

from testbed.endure_router import HOST, TESTBED, Folder, Problem, wait_for

TOKEN = "admin-token"  # of the user of fake_cluster who may do everything
LOGS_IN = "client.authentication.k8s.io/v1"


def make_certificate(place: pathlib.Path) -> None:
    """Make ca.pem, and edge.pem with the key.  Raises Problem without openssl."""
    if shutil.which("openssl") is None:
        raise Problem("openssl is not here (Debian package openssl)")
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=edge", "-addext", f"subjectAltName=DNS:*.example.test,IP:{HOST}", "-addext",
         "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,digitalSignature",
         "-keyout", place / "key.pem", "-out", place / "ca.pem"], capture_output=True, text=True)
    if made.returncode:
        raise Problem(f"openssl: {made.stderr}")
    (place / "edge.pem").write_text((place / "ca.pem").read_text() + (place / "key.pem").read_text())


@contextlib.contextmanager
def edge(folder: Folder, names: Sequence[str], ports: Sequence[int]) -> Iterator[dict[str, str]]:
    """The stand-in for the edge; `names` lead to `ports`.  Yields the variables that a router needs for it."""
    place = folder.path / "edge"
    place.mkdir()
    (place / "far.json").write_text(json.dumps({name: [HOST, port] for name, port in zip(names, ports)}))
    make_certificate(place)
    process = subprocess.Popen([sys.executable, "-I", "-S", str(TESTBED / "fake_edge.py"), str(place)],
                               stdin=subprocess.PIPE)
    try:
        wait_for((place / "edge.json").exists, "the edge")
        proxy = json.loads((place / "edge.json").read_text())["proxy"]
        yield {"HTTPS_PROXY": f"http://{HOST}:{proxy}", "NO_PROXY": HOST, "SSL_CERT_FILE": str(place / "ca.pem")}
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


@contextlib.contextmanager
def cluster(folder: Folder, ports: Mapping[int, int]) -> Iterator[pathlib.Path]:
    """The stand-in for a cluster, with the pod `web`: its ports lead to ours.  Yields a kubeconfig.

    The context `login` is the same cluster for a user whose credential plugin hangs.
    """
    place = folder.path / "cluster"
    place.mkdir()
    make_certificate(place)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = [sys.executable, str(TESTBED / "fake_cluster.py"), str(place), "edge", ""]
        process = subprocess.Popen(words, stdin=theirs)
        theirs.close()
        try:
            with ours.makefile("rb") as answers:
                port = json.loads(answers.readline())
                pod = {"name": "web", "ports": [(number, (HOST, far)) for number, far in ports.items()], "names": {},
                       "labels": {}, "namespace": "default", "ready": True, "phase": "Running", "node": None,
                       "containers": ["main"], "annotations": {}, "path": None, "sidecar": False}
                ours.sendall(json.dumps(["pod", pod]).encode() + b"\n")
                if "failed" in (answer := json.loads(answers.readline())):
                    raise Problem(f"the cluster: {answer['failed']}")
                yield kubeconfig(place, port)
        finally:
            ours.close()
            process.kill()
            process.wait()


def kubeconfig(place: pathlib.Path, port: int) -> pathlib.Path:
    """Write one for both users."""
    users: dict[str, dict[str, Any]] = {
        "admin": {"token": TOKEN},
        "login": {"exec": {"apiVersion": LOGS_IN, "command": str(plugin_that_hangs(place)),
                           "interactiveMode": "Never"}}}
    path = place / "config"
    path.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "admin",
        "clusters": [{"name": "test", "cluster": {"server": f"https://{HOST}:{port}",
                                                  "certificate-authority": str(place / "ca.pem")}}],
        "users": [{"name": name, "user": user} for name, user in users.items()],
        "contexts": [{"name": name, "context": {"cluster": "test", "user": name}} for name in users]}))
    path.chmod(0o600)
    return path


def plugin_that_hangs(place: pathlib.Path) -> pathlib.Path:
    """A plugin that waits for a login, for an hour."""
    path = place / "log-in"
    path.write_text("#!/bin/sh\nexec sleep 3600\n")
    path.chmod(0o700)
    return path
