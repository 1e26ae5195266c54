"""endure_house_ends: what stands behind the routers of `house`, and beside them: each a process that can be killed.

    Certificate    one for all of them, in a folder
    Web            endure_house_web.py: pages, downloads, uploads
    Database       a real PostgreSQL, which speaks TLS
    Redis          a real redis-server, which has on its disk what it has acknowledged
    Cluster        fake_cluster.py: an API server and a node
    Edge           fake_edge.py
    Process        any other one, with its log in a file: the NodePass client, what `kubectl port-forward` would be, a claim
    Disk           a small one of its own for a folder, which can be filled; for root

Each Process has `start`, `kill`, and `close`, which leaves nothing behind.  They are asked for by their ports, which they keep.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import Any

from testbed.endure_house_web import OWNERS
from testbed.endure_router import FORBIDDEN, HERE, HOST, TESTBED, Problem, environment, wait_for
from testbed.ports import free_port

NAMES = ("*.example.test", "*.tunnels.example.test", "*.edge.example.test", "*.tun.example.test")


def found(name: str) -> str | None:
    """Where a program is; PostgreSQL's are not on PATH everywhere."""
    places = [os.environ.get("PATH", os.defpath), *map(str, sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin")))]
    return shutil.which(name, path=os.pathsep.join(places))


def run(*words: object, **options: Any) -> str:
    """Run a program to its end, and return what it has said.  Raises Problem."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60, **options)
    if done.returncode:
        raise Problem(f"{words[0]}: {done.stderr or done.stdout}")
    return done.stdout


def make_certificate(folder: pathlib.Path) -> None:
    """ca.pem, and server.pem with its key as well: it vouches for itself."""
    names = ",".join([*(f"DNS:{name}" for name in NAMES), "DNS:localhost", "IP:127.0.0.1"])
    run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3",
        "-subj", "/CN=house", "-addext", f"subjectAltName={names}", "-addext", "basicConstraints=critical,CA:TRUE",
        "-addext", "keyUsage=critical,keyCertSign,digitalSignature", "-keyout", folder / "key.pem",
        "-out", folder / "ca.pem")
    (folder / "server.pem").write_text((folder / "ca.pem").read_text() + (folder / "key.pem").read_text())


def listens(address: tuple[str, int]) -> bool:
    """Whether it takes a connection."""
    with contextlib.suppress(OSError), socket.create_connection(address, 1):
        return True
    return False


class Disk:
    """A small disk for a folder."""

    def __init__(self, folder: pathlib.Path, options: str):
        self.folder = folder
        self.is_there = os.geteuid() == 0 and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "house", folder], capture_output=True).returncode == 0

    def fill(self, is_full: bool) -> None:
        """Leave no room, or room."""
        filler = self.folder / "filler"
        if not is_full:
            shutil.rmtree(filler, ignore_errors=True)
            return
        filler.mkdir()
        with contextlib.suppress(OSError), open(filler / "bytes", "wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        with contextlib.suppress(OSError):
            for number in range(1000):
                (filler / str(number)).touch()

    def close(self) -> None:
        if self.is_there:
            subprocess.run(["umount", "-l", self.folder], capture_output=True)


class Process:
    """A process that is started again and again; what it says goes to a file."""

    def __init__(self, log: pathlib.Path, words: list[str], environ: dict[str, str] | None = None, **options: Any):
        self.log = log
        self.words = words
        self.environ = environment() if environ is None else environ
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.words, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=HERE,
                                            env=self.environ, **self.options)

    def tell(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End it.  Returns its exit code."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        code = self.process.wait(60)
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process = None
        return code

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def must_live(self) -> None:
        """Raises Problem where it has ended by itself."""
        if not self.is_alive():
            raise Problem(f"{self.log.stem} ended by itself, with {self.process and self.process.returncode}: "
                          f"{''.join(self.log.read_text(errors='replace').splitlines(True)[-20:])}")

    def close(self) -> None:
        self.kill()

    def faults(self) -> list[str]:
        """What its log says of a fault of ours."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        bad = [at for at, line in enumerate(lines) if any(word in line for word in FORBIDDEN)]
        return [f"{self.log.name}: " + "\n      ".join(lines[bad[0]:bad[0] + 30])] if bad else []


class Web(Process):
    """Pages, downloads, uploads."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.ports = {name: free_port() for name in ("tls", "plain", *OWNERS)}
        (folder / "ports.json").write_text(json.dumps(self.ports))
        super().__init__(folder / "web.log", [sys.executable, "-m", "testbed.endure_house_web", str(folder)])
        self.start()

    def start(self) -> None:
        super().start()
        wait_for(lambda: all(listens((HOST, port)) for port in self.ports.values()), "the web server")

    def uploads(self) -> list[list[str]]:
        """Rows of ID and SHA-256, as it took them."""
        return [line.split() for line in (self.folder / "uploads").read_text().splitlines()]


class Database(Process):
    """A PostgreSQL that speaks TLS; root lends it a user."""

    def __init__(self, folder: pathlib.Path):
        self.place = pathlib.Path(tempfile.mkdtemp(prefix="endure-pg-"))
        user: dict[str, Any] = {}
        if os.geteuid() == 0:
            names = {entry.pw_name: entry for entry in pwd.getpwall()}
            lent = names.get("postgres") or names["nobody"]
            user = {"user": lent.pw_uid, "group": lent.pw_gid, "extra_groups": []}
        for name in ("ca.pem", "key.pem"):
            shutil.copy(folder / name, self.place)
            (self.place / name).chmod(0o600)
        if user:
            for path in (self.place, *self.place.iterdir()):
                os.chown(path, user["user"], user["group"])
        self.port = free_port()
        self.data = self.place / "data"
        try:
            run(found("initdb"), "-D", self.data, "-U", "postgres", "-A", "trust", "--no-sync", "--no-locale",
                "--wal-segsize=1", "-E", "UTF8", cwd=self.place, **user)
            super().__init__(folder / "postgres.log", [
                found("postgres"), "-D", str(self.data), "-h", HOST, "-p", str(self.port), "-k", str(self.place),
                "-c", "fsync=off", "-c", "ssl=on", "-c", f"ssl_cert_file={self.place}/ca.pem",
                "-c", f"ssl_key_file={self.place}/key.pem"], {"LC_ALL": "C"}, **user)
            self.start()
            self.ask("create table rows (id text primary key, said text not null)")
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        status = self.data / "postmaster.pid"
        super().start()

        def ready() -> bool:  # the eighth line of that file says it
            if not self.is_alive():
                raise Problem(f"PostgreSQL has ended: {self.log.read_text()[-2000:]}")
            with contextlib.suppress(FileNotFoundError):
                return "ready" in "".join(status.read_text().splitlines()[7:])
            return False
        wait_for(ready, "PostgreSQL")

    def ask(self, query: str) -> str:
        """What psql reads, without a router between."""
        return run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", query,
                   f"host={self.place} port={self.port} user=postgres dbname=postgres")

    def close(self) -> None:
        if getattr(self, "process", None) is not None:
            self.kill(signal.SIGINT)
        shutil.rmtree(self.place, ignore_errors=True)


class Redis(Process):
    """A redis-server that keeps what it has acknowledged."""

    def __init__(self, folder: pathlib.Path):
        place = folder / "redis"
        place.mkdir()
        self.disk = Disk(place, "size=32m")
        self.port = free_port()
        super().__init__(folder / "redis.log", [
            found("redis-server"), "--port", str(self.port), "--bind", HOST, "--dir", str(place), "--save", "",
            "--appendonly", "yes", "--appendfsync", "always"])
        self.start()

    def close(self) -> None:
        super().close()
        self.disk.close()

    def start(self) -> None:
        super().start()
        wait_for(lambda: self.ask("PING") == ["PONG"], "redis-server")

    def ask(self, *words: str) -> list[str]:
        """What redis-cli would say, a line for each answer; nothing where it is not there."""
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 5) as sock:
            sock.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word.encode())
                                                             for word in words))
            sock.shutdown(socket.SHUT_WR)
            said = b""
            while data := sock.recv(65536):
                said += data
            return [line.lstrip("+-:") for line in said.decode().splitlines() if not line.startswith(("*", "$"))]
        return []


class Edge(Process):
    """The far end of tunnels of the carrier."""

    def __init__(self, folder: pathlib.Path, far: dict[str, Any]):
        place = folder / "edge"
        place.mkdir()
        shutil.copy(folder / "server.pem", place / "edge.pem")
        (place / "far.json").write_text(json.dumps(far))
        self.ports = {"tls": free_port(), "proxy": free_port()}
        (place / "edge.json").write_text(json.dumps(self.ports))
        super().__init__(folder / "edge.log", [sys.executable, "-I", "-S", str(TESTBED / "fake_edge.py"), str(place)])
        self.start()
        self.variables = {"HTTPS_PROXY": f"http://{HOST}:{self.ports['proxy']}",
                          "SSL_CERT_FILE": str(folder / "ca.pem")}

    def start(self) -> None:
        super().start()
        wait_for(lambda: all(listens((HOST, port)) for port in self.ports.values()), "the edge")


class Cluster(Process):
    """An API server and a node.  `order` is a method of fake_cluster's Cluster, without `do_`."""

    def __init__(self, folder: pathlib.Path, pods: int, port: int, far: tuple[str, int]):
        self.lock = threading.Lock()  # guards the socket: an order and its answer
        self.far = {port: far}
        shutil.copy(folder / "server.pem", folder / "edge.pem")
        self.socket, self.theirs = socket.socketpair()
        self.socket.settimeout(30)
        self.answers = self.socket.makefile("rb")
        super().__init__(folder / "cluster.log", [sys.executable, "-E", "-S", str(TESTBED / "fake_cluster.py"), str(folder),
                                                  "edge", ""])
        self.start()
        self.port = json.loads(self.answers.readline())
        self.pods = [f"web-{number}" for number in range(pods)]
        for pod in self.pods:
            self.run_pod(pod)
        self.kubeconfig = folder / "kubeconfig"
        ca = base64.b64encode((folder / "ca.pem").read_bytes()).decode()
        self.kubeconfig.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "house",
            "clusters": [{"name": "house", "cluster": {"certificate-authority-data": ca,
                                                       "server": f"https://{HOST}:{self.port}"}}],
            "contexts": [{"name": "house", "context": {"cluster": "house", "user": "admin"}}],
            "users": [{"name": "admin", "user": {"token": "admin-token"}}]}))
        self.kubeconfig.chmod(0o600)

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.words, stdin=self.theirs, stdout=log, stderr=log, env=self.environ)
        self.theirs.close()

    def order(self, order: str, **words: Any) -> Any:
        """Tell it something, and return what it answers.  Raises Problem."""
        with self.lock:
            self.socket.sendall(json.dumps([order, words]).encode() + b"\n")
            answer = json.loads(self.answers.readline() or '{"failed": "it has ended"}')
        if "failed" in answer:
            raise Problem(f"the cluster: {order} {words}: {answer['failed']}")
        return answer["done"]

    def run_pod(self, name: str) -> None:
        """A pod runs."""
        self.order("pod", name=name, ports=list(self.far.items()), names={}, labels={"app": "web"}, namespace="default",
                   ready=True, phase="Running", node=None, containers=["main"], annotations={}, path=None, sidecar=False)

    def service(self, name: str) -> None:
        """A service of all pods."""
        port, = self.far
        self.order("put", resource="services", name=name, namespace="default", thing={"spec": {
            "type": "ClusterIP", "clusterIP": "10.96.0.10", "selector": {"app": "web"},
            "ports": [{"port": 80, "targetPort": port, "protocol": "TCP"}]}})

    def kill(self, number: int = signal.SIGKILL) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        code = self.process.wait(60)
        self.process = None
        return code

    def close(self) -> None:
        self.kill()
        self.answers.close()
        self.socket.close()
