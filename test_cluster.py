"""Tests of the stand-in for a Kubernetes cluster (testbed/cluster.py): what it promises to the tests that use it.

A small client of this file speaks to it; a real kubectl does, where there is one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import ssl
import struct
import threading
import time
import urllib.request
import zlib
from typing import Any, Iterator

import pytest

from conftest import HOST, Server, connect, echo, linux, wait_until
from testbed.cluster import TOKEN, Cluster, as_yaml
from testbed.fake_kubelet import DICTIONARY
from testbed.running import reset

PODS = "/api/v1/namespaces/default/pods"
SERVICES = "/api/v1/namespaces/default/services"
ADMIN = f"Authorization: Bearer {TOKEN}"
SYN_STREAM, SYN_REPLY, RST_STREAM, PING, GOAWAY = 1, 2, 3, 6, 7


class Client:
    """A client of the API server: requests on one connection, and what an upgrade makes of it."""

    def __init__(self, cluster: Cluster, who: str | None = ADMIN, certificate: tuple[Any, Any] | None = None):
        context = ssl.create_default_context(cafile=cluster.ca)
        context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # Debian 12's Python sets it
        if certificate:
            context.load_cert_chain(*certificate)
        self.who = who
        self.sock = context.wrap_socket(connect(cluster.address), server_hostname="localhost",
                                        suppress_ragged_eofs=False)
        self.buffer = b""
        self.deflate, self.inflate = zlib.compressobj(zdict=DICTIONARY), zlib.decompressobj(zdict=DICTIONARY)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def until(self, end: bytes) -> bytes:
        """What comes, up to `end`."""
        while end not in self.buffer:
            self.more()
        data, _, self.buffer = self.buffer.partition(end)
        return data

    def more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError(self.buffer)
        self.buffer += data

    def exactly(self, count: int) -> bytes:
        while len(self.buffer) < count:
            self.more()
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def say(self, method: str, path: str, *lines: str) -> None:
        self.sock.sendall("\r\n".join([f"{method} {path} HTTP/1.1", "Host: cluster", *([self.who] if self.who else []),
                                       *lines, "", ""]).encode())

    def head(self) -> tuple[int, dict[str, str]]:
        first, *lines = self.until(b"\r\n\r\n").decode().split("\r\n")
        return int(first.split(" ")[1]), {name.lower(): value for name, value in (line.split(": ") for line in lines)}

    def chunk(self) -> bytes:
        """A chunk; b"" is the last one."""
        data = self.exactly(int(self.until(b"\r\n"), 16))
        self.exactly(2)
        return data

    def ask(self, path: str, *lines: str, method: str = "GET") -> tuple[int, Any]:
        """The status, and the JSON or the text."""
        self.say(method, path, *lines)
        code, headers = self.head()
        if "content-length" in headers:
            body = self.exactly(int(headers["content-length"]))
        else:
            body = b"".join(iter(self.chunk, b""))
        return code, json.loads(body) if headers.get("content-type") == "application/json" else body.decode()

    def upgrade(self, transport: str, path: str, *protocols: str) -> int:
        """Ask for an upgrade.  Returns the status."""
        if transport == "spdy":
            self.say("POST", path, "Connection: Upgrade", "Upgrade: SPDY/3.1", "Content-Length: 0",
                     *(f"X-Stream-Protocol-Version: {word}" for word in protocols or ["portforward.k8s.io"]))
        else:
            words = protocols or ["SPDY/3.1+portforward.k8s.io"]
            self.say("GET", path, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
                     f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}",
                     f"Sec-WebSocket-Protocol: {', '.join(words)}")
        code, headers = self.head()
        if code != 101:
            self.exactly(int(headers["content-length"]))
        self.protocol = headers.get("sec-websocket-protocol", headers.get("x-stream-protocol-version"))
        self.tunnel = transport == "websocket"
        self.inner = b""
        return code

    # -- WebSocket and SPDY --------------------------------------------------------------------

    def message(self, payload: bytes, opcode: int = 2) -> None:
        """Send a message, with a mask."""
        size = len(payload)
        head = struct.pack("!BBH", 0x80 | opcode, 0xFE, size) if size > 125 else bytes((0x80 | opcode, 0x80 | size))
        mask = b"\1\2\3\4"
        self.sock.sendall(head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload)))

    def heard(self) -> tuple[int, bytes]:
        """The next message: its opcode and payload."""
        first, size = self.exactly(2)
        if size > 125:
            size = int.from_bytes(self.exactly(2 if size == 126 else 8), "big")
        return first & 15, self.exactly(size)

    def send(self, data: bytes) -> None:
        self.message(data) if self.tunnel else self.sock.sendall(data)

    def syn(self, number: int, fin: bool = False, **headers: object) -> None:
        """Open a stream."""
        block = struct.pack("!I", len(headers))
        for word in (word for pair in headers.items() for word in pair):
            block += struct.pack("!I", len(str(word))) + str(word).encode()
        body = struct.pack("!IIH", number, 0, 0) + self.deflate.compress(block) + self.deflate.flush(zlib.Z_SYNC_FLUSH)
        self.send(struct.pack("!HHI", 0x8003, SYN_STREAM, fin << 24 | len(body)) + body)

    def data(self, number: int, data: bytes, fin: bool = False) -> None:
        self.send(struct.pack("!II", number, fin << 24 | len(data)) + data)

    def pair(self, number: int, port: int) -> None:
        """Open the two streams of a connection to a port: `number`, for errors, and the next."""
        self.syn(number, True, streamtype="error", port=port, requestid=number)
        self.syn(number + 2, streamtype="data", port=port, requestid=number)

    def frame(self) -> tuple[Any, int, bytes, bool]:
        """The next frame: its kind ("data", or a number), the stream or the id, what is in it, FIN."""
        def take(count: int) -> bytes:
            while self.tunnel and len(self.inner) < count:
                self.inner += self.heard()[1]
            if not self.tunnel:
                return self.exactly(count)
            data, self.inner = self.inner[:count], self.inner[count:]
            return data

        first, second = struct.unpack("!II", take(8))
        body = take(second & 0xFFFFFF)
        if not first >> 31:
            return "data", first, body, bool(second >> 24)
        kind, (number,) = first & 0xFFFF, struct.unpack_from("!I", body)
        if kind == SYN_REPLY:
            assert self.inflate.decompress(body[4:]) == bytes(4)
            body = body[:4]
        return kind, number, body[4:], bool(second >> 24)

    def frames(self, count: int) -> list[tuple[Any, int, bytes, bool]]:
        return [self.frame() for _ in range(count)]


def upper(sock: socket.socket) -> bytes:
    """A program in a pod: it answers in capitals, and ends when it hears the end.  Returns what it has heard."""
    heard = b""
    while data := sock.recv(65536):
        heard += data
        sock.sendall(data.upper())
    return heard


@pytest.fixture
def pod(cluster: Cluster, serve) -> Iterator[Server]:
    """The program behind port 80 of the pod web-1, and behind the service web."""
    server = serve(upper)
    cluster.pod("web-1", {80: server.address}, labels={"app": "web"}, names={"http": 80})
    cluster.service("web", {80: "http"}, {"app": "web"})
    yield server


TRANSPORTS = pytest.mark.parametrize("transport", ["spdy", "websocket"])
FORWARD = f"{PODS}/web-1/portforward"


# What comes for one word to `upper` and its end: both replies, the answer, and FIN on both streams.
CLEAN = [(SYN_REPLY, 1, b"", False), (SYN_REPLY, 3, b"", False), ("data", 3, b"HELLO", False), ("data", 3, b"", True),
         ("data", 1, b"", True)]


def whole(client: Client, number: int = 1, port: int = 80) -> list[tuple[Any, int, bytes, bool]]:
    """Open a pair, say one word and end; what comes up to both ends."""
    client.pair(number, port)
    client.data(number + 2, b"hello", True)
    found: list[tuple[Any, int, bytes, bool]] = []
    while sum(kind == RST_STREAM or fin for kind, _, _, fin in found) < 2:
        found.append(client.frame())
    return found


def refusal(client: Client, number: int, port: int) -> str:
    """Open a pair that fails; the text.  It is behind the replies, and before RST_STREAM on both."""
    *_, (_, stream, text, fin), first, second = whole(client, number, port)
    assert (stream, fin) == (number, False)
    assert [first, second] == [(RST_STREAM, number + 2, b"\0\0\0\5", False), (RST_STREAM, number, b"\0\0\0\5", False)]
    return text.decode()


# -- the API -----------------------------------------------------------------------------------


def test_one_kept_connection_serves_the_questions_and_the_upgrade(cluster, pod):
    with Client(cluster) as client:
        assert client.ask(f"{SERVICES}/web")[1]["spec"]["selector"] == {"app": "web"}
        code, found = client.ask(f"{PODS}?labelSelector=app%3Dweb")
        assert code == 200 and "kind" not in found["items"][0]
        assert found["items"][0]["spec"]["containers"][0]["ports"][0] == {
            "name": "http", "containerPort": 80, "protocol": "TCP"}
        assert client.upgrade("spdy", FORWARD) == 101
        assert whole(client) == CLEAN
    assert [row["nth"] for row in cluster.requests(connection=1)] == [1, 2, 3]
    assert [row["status"] for row in cluster.requests()] == [200, 200, 101]
    wait_until(lambda: cluster.connections(ended="client"))


def test_refusals_are_in_the_api_servers_words(cluster, pod):
    cluster.user("u", token="u", allow={"pods": "get", "pods/portforward": "get"}, namespace="default")
    with Client(cluster, None) as client:
        code, found = client.ask(f"{SERVICES}/x")
        assert (code, found["message"], found["details"]) == (
            403, 'services "x" is forbidden: User "system:anonymous" cannot get resource "services" in API group "" in '
                 'the namespace "default"', {"name": "x", "kind": "services"})
        client.who = "Authorization: Bearer wrong"
        assert client.ask(PODS) == (401, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                                          "message": "Unauthorized", "reason": "Unauthorized", "code": 401})
        client.who = "Authorization: Bearer u"
        assert client.ask(f"{PODS}/web-2")[1]["message"] == 'pods "web-2" not found'
        assert client.ask(PODS)[1]["message"] == (
            'pods is forbidden: User "u" cannot list resource "pods" in API group "" in the namespace "default"')
        assert client.ask("/apis/apps/v1/namespaces/other/deployments/d")[1]["message"] == (
            'deployments.apps "d" is forbidden: User "u" cannot get resource "deployments" in API group "apps" in the '
            'namespace "other"')
        assert client.upgrade("spdy", FORWARD) == 403
        assert client.upgrade("websocket", FORWARD) == 403  # since 1.35: it has to have create, too
        cluster.set(version="1.34")
        assert client.upgrade("websocket", FORWARD) == 101
    with Client(cluster) as client:
        assert client.ask(FORWARD, method="POST")[1]["message"] == "Upgrade request required"
        cluster.pod("late", phase="Pending")
        assert client.ask(f"{PODS}/late/portforward", "Connection: Upgrade", "Upgrade: SPDY/3.1", method="POST")[1][
            "message"] == "pod late does not have a host assigned"
        assert client.ask(FORWARD, "Connection: Upgrade", "Upgrade: SPDY/3.1", "X-Stream-Protocol-Version: nope",
                          method="POST") == (403, "unable to upgrade: unable to negotiate protocol: client supports "
                                                  "[nope], server accepts [portforward.k8s.io]\n")
        assert client.upgrade("channels", FORWARD, "nope") == 403


def test_users_prove_who_they_are_in_three_ways(cluster):
    cluster.user("carol", password="secret", allow={"pods": "list"})
    proof = base64.b64encode(b"carol:secret").decode()
    for who, certificate in ((f"Authorization: Basic {proof}", None), (None, cluster.client_certificate("carol")),
                             (ADMIN + "\r\nImpersonate-User: carol", None)):
        with Client(cluster, who, certificate) as client:
            assert (client.ask(PODS)[0], client.ask(SERVICES)[0]) == (200, 403)
    assert {row["user"] for row in cluster.requests()} == {"carol"}


def test_lists_are_selected_and_come_in_pages(cluster):
    for number in range(5):
        cluster.pod(f"p{number}", labels={"odd": str(number % 2), **({"big": "yes"} if number > 2 else {})})
    with Client(cluster) as client:
        def names(query: str) -> list[str]:
            return [pod["metadata"]["name"] for pod in client.ask(f"{PODS}?{query}")[1]["items"]]

        assert names("labelSelector=odd%3D1,!big") == ["p1"]
        assert names("labelSelector=odd+notin+(1),big") == ["p4"]
        assert names("fieldSelector=metadata.name%3Dp2") == ["p2"]
        assert client.ask(f"{PODS}?labelSelector=a%3D%3D%3D")[0] == 400
        page = client.ask(f"{PODS}?limit=3")[1]
        assert (len(page["items"]), page["metadata"]["remainingItemCount"]) == (3, 2)
        assert names(f"limit=3&continue={page['metadata']['continue']}") == ["p3", "p4"]
        cluster.ready("p0", False)
        cluster.compact()
        code, found = client.ask(f"{PODS}?limit=3&continue={page['metadata']['continue']}")
        assert (code, found["reason"]) == (410, "Expired")
        assert client.ask("/api/v1/namespaces/nowhere/pods")[1]["items"] == []


def test_a_watch_tells_what_happens(cluster, pod):
    with Client(cluster) as client:
        version = client.ask(PODS)[1]["metadata"]["resourceVersion"]
        query = f"{PODS}?watch=true&labelSelector=app%3Dweb&allowWatchBookmarks=true&resourceVersion="
        client.say("GET", query + version)
        assert client.head()[0] == 200

        def event() -> tuple[str, Any]:
            row = json.loads(client.chunk())
            return row["type"], row["object"]

        cluster.ready("web-1", False)
        kind, found = event()
        assert kind == "MODIFIED" and found["status"]["conditions"][1] == {"type": "Ready", "status": "False"}
        cluster.pod("other")
        cluster.terminate("web-1")
        assert "deletionTimestamp" in event()[1]["metadata"]
        before = cluster.get("pods", "web-1")["metadata"]["uid"]
        cluster.replace("web-1")
        (gone, old), (added, new), (changed, _) = event(), event(), event()
        assert (gone, added, changed) == ("DELETED", "ADDED", "MODIFIED")
        assert old["metadata"]["uid"] == before != new["metadata"]["uid"]
        cluster.change("pods", "web-1", {"metadata": {"labels": {"app": "x"}}})
        assert event()[0] == "DELETED"  # it fits no more
        cluster.bookmark()
        assert event() == ("BOOKMARK", {"kind": "Pod", "apiVersion": "v1", "metadata": {
            "resourceVersion": cluster.get("pods", "web-1")["metadata"]["resourceVersion"]}})
        cluster.compact()
        kind, found = event()
        assert (kind, found["code"], found["reason"], client.chunk()) == ("ERROR", 410, "Expired", b"")
        client.say("GET", query + version)  # the connection is kept
        assert client.head()[0] == 200 and event()[1]["code"] == 410 and client.chunk() == b""
        client.say("GET", f"{PODS}?watch=1&timeoutSeconds=0.01&fieldSelector=metadata.name%3Dother")
        assert client.head()[0] == 200 and event()[0] == "ADDED" and client.chunk() == b""


def test_resources_beside_pods_are_there(cluster):
    cluster.workload("statefulsets", "db", {"app": "db"})
    cluster.slice("outside", {"192.0.2.1": True, "192.0.2.2": False}, [{"port": 5432, "protocol": "TCP"}])
    cluster.service("headless", [{"port": 1, "name": "one"}], clusterIP="None", namespace="prod")
    with Client(cluster) as client:
        assert client.ask("/apis/apps/v1/namespaces/default/statefulsets/db")[1]["spec"]["selector"] == {
            "matchLabels": {"app": "db"}}
        code, found = client.ask("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
                                 "?labelSelector=kubernetes.io/service-name%3Doutside")
        assert found["items"][0]["endpoints"][1] == {"addresses": ["192.0.2.2"], "conditions": {"ready": False}}
        assert client.ask("/api/v1/namespaces/prod/services/headless")[1]["spec"]["clusterIP"] == "None"
        assert len(client.ask("/api/v1/namespaces")[1]["items"]) == 3
    cluster.set(prefix="/k8s/clusters/c-x")
    with Client(cluster) as client:
        assert client.ask(PODS) == (404, "404 page not found\n")
        assert client.ask(f"/k8s/clusters/c-x{PODS}")[0] == 200


# -- port-forward ------------------------------------------------------------------------------


@TRANSPORTS
def test_a_session_goes_on_after_trouble_in_one_stream(cluster, pod, transport):
    with Client(cluster) as client:
        assert client.upgrade(transport, FORWARD) == 101
        assert whole(client) == CLEAN
        sandbox = (cluster.get("pods", "web-1")["metadata"]["uid"].replace("-", "") * 2)[:64]
        text = refusal(client, 5, 81)
        assert text.startswith(f"error forwarding port 81 to pod {sandbox}, uid : failed to execute portforward in "
                               "network namespace \"/var/run/netns/cni-")
        assert f'failed to connect to localhost:81 inside namespace "{sandbox}"' in text
        assert "connection refused" in text
        client.pair(9, 80)
        client.data(11, b"x")
        assert client.frames(3)[2] == ("data", 11, b"X", False)
        cluster.replace("web-1")  # what runs on the old one ends; the session to its node stays
        assert "read: connection reset by peer" in client.frame()[2].decode()
        assert [frame[:2] for frame in client.frames(2)] == [(RST_STREAM, 11), (RST_STREAM, 9)]
        assert refusal(client, 13, 80) == (
            f'error forwarding port 80 to pod {sandbox}, uid : failed to find sandbox "{sandbox}" in store: not found')
        client.send(struct.pack("!HHII", 0x8003, PING, 4, 7))
        assert client.frame() == (PING, 7, b"", False)
        assert cluster.end_sessions("ping") == 1
        assert client.frame() == (PING, 2, b"", False)
        (session,) = cluster.sessions()
        assert (session["transport"], session["streams"], session["live"], session["ended"]) == (transport, 4, 0, None)
    assert [row["ended"] for row in cluster.streams()] == ["fin", "error", "error", "error"]


def test_plain_channels_are_one_connection_to_each_port(cluster, pod):
    with Client(cluster) as client:
        both = "v5.channel.k8s.io", "v4.channel.k8s.io"  # the Python client's words
        assert client.upgrade("channels", f"{FORWARD}?ports=80&ports=81", *both) == 101
        assert client.protocol == "v4.channel.k8s.io"
        assert [client.heard()[1] for _ in range(4)] == [b"\0P\0", b"\1P\0", b"\2Q\0", b"\3Q\0"]
        assert client.heard()[1].startswith(b"\3error forwarding port 81 to pod ")
        client.message(b"\0hello")
        assert client.heard() == (2, b"\0HELLO")
        cluster.remove("pods", "web-1")
        assert client.heard()[1].startswith(b"\1error forwarding port 80 to pod ")
        assert client.heard() == (8, b"\x03\xe8")
    with Client(cluster) as client:
        cluster.pod("web-1")
        assert client.upgrade("channels", FORWARD, "v4.channel.k8s.io") == 400


def test_the_runtime_says_what_a_fin_does(cluster, pod):
    """The usual one passes it on; containerd drops it, and gives the other direction some time."""
    cluster.set(grace=60)
    with Client(cluster) as client:
        client.upgrade("spdy", FORWARD)
        assert whole(client) == CLEAN
        cluster.set(runtime="containerd", grace=1)
        begin = time.monotonic()
        assert [(kind, number - 4, data, fin) for kind, number, data, fin in whole(client, 5)] == CLEAN
        assert time.monotonic() - begin >= 1
        assert (pod.result(), pod.result()) == (b"hello", b"hello")


def test_a_runtime_may_answer_every_end_with_a_reset(cluster, pod):
    cluster.set(runtime="resetting")
    with Client(cluster) as client:
        client.upgrade("spdy", FORWARD)
        for number in (1, 5, 9):
            assert "read: connection reset by peer" in refusal(client, number, 80)


def test_a_program_that_resets_its_connection_is_trouble_after_its_last_bytes(cluster, serve):
    """As PostgreSQL does at the end of every session with TLS."""
    def rude(sock: socket.socket) -> None:
        sock.sendall(sock.recv(100).upper())
        sock.recv(100)
        reset(sock)

    cluster.pod("web-1", {80: serve(rude).address})
    for runtime in ("cri-o", "containerd"):
        cluster.set(runtime=runtime)
        with Client(cluster) as client:
            client.upgrade("spdy", FORWARD)
            for number in (1, 5):
                client.pair(number, 80)
                client.data(number + 2, b"hello")
                assert client.frames(3)[2] == ("data", number + 2, b"HELLO", False)
                client.data(number + 2, b"bye")
                assert b":80: read: connection reset by peer" in client.frame()[2]
                assert [frame[:2] for frame in client.frames(2)] == [(RST_STREAM, number + 2), (RST_STREAM, number)]


def test_all_that_a_program_sent_before_its_reset_arrives(cluster, serve):
    steps = [threading.Event() for _ in range(2)]

    def rude(sock: socket.socket) -> None:
        for word, step in zip((b"a", b"b"), steps):
            sock.sendall(word)
            assert step.wait(10)
        sock.sendall(b"c")
        reset(sock)

    server = serve(rude)
    cluster.pod("web-1", {80: server.address})
    with Client(cluster) as client:
        client.upgrade("websocket", FORWARD)
        client.pair(1, 80)
        assert client.frames(3)[2][2] == b"a"
        cluster.end_sessions("freeze")
        steps[0].set()
        wait_until(lambda: cluster.streams(down=2))
        steps[1].set()
        server.result()
        cluster.end_sessions("thaw")
        assert [frame[:3] for frame in client.frames(2)] == [("data", 3, b"b"), ("data", 3, b"c")]
        assert b"read: connection reset by peer" in client.frame()[2]


def test_streams_that_break_the_rules_are_refused(cluster, pod):
    cluster.set(pair_timeout=0.05)
    with Client(cluster) as client:
        client.upgrade("spdy", FORWARD)
        client.syn(1, streamtype="data", port="x")
        assert client.frame()[:2] == (RST_STREAM, 1)
        client.syn(3, True, streamtype="error", port=80, requestid="a")
        assert client.frame()[:2] == (SYN_REPLY, 3)
        kind, number, text, _ = client.frame()
        assert (kind, number) == ("data", 3) and text.endswith(b"timed out waiting for streams")
        assert client.frame()[:2] == (RST_STREAM, 3)
        client.syn(3, streamtype="data", port=80)
        assert client.frame() == (RST_STREAM, 3, b"\0\0\0\1", False)


def test_there_is_no_flow_control(cluster, serve):
    """A program that does not read stops its whole session, as on a real node; another session does not suffer."""
    with contextlib.ExitStack() as stack:
        release, let_go = (stack.enter_context(sock) for sock in socket.socketpair())
        deaf = serve(lambda sock: release.recv(1))
        cluster.pod("web-1", {80: serve(echo).address, 81: deaf.address})
        client, other = (stack.enter_context(Client(cluster)) for _ in range(2))
        client.upgrade("spdy", FORWARD)
        client.pair(1, 81)
        client.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            while True:
                client.data(3, bytes(1 << 18))
        other.upgrade("spdy", FORWARD)
        other.pair(1, 80)
        other.data(3, b"y")
        assert other.frames(3)[2] == ("data", 3, b"y", False)
        other.send(struct.pack("!HHIII", 0x8003, RST_STREAM, 8, 3, 5))
        wait_until(lambda: cluster.streams(port=80, ended="reset"))
        let_go.send(b"!")


# -- exec --------------------------------------------------------------------------------------


def command(*words: str, more: str = "stdin=true&stdout=true&stderr=true") -> str:
    return f"{PODS}/web-1/exec?" + "&".join(f"command={word}" for word in words) + f"&{more}"


def test_a_command_runs_until_its_stdin_ends(cluster):
    cluster.pod("web-1")
    with Client(cluster) as client:
        client.upgrade("channels", command("cat"), "v5.channel.k8s.io", "v4.channel.k8s.io")
        assert (client.protocol, client.heard()) == ("v5.channel.k8s.io", (2, b"\1"))
        client.message(b"\0hello")
        assert client.heard() == (2, b"\1hello")
        client.message(b"\xff\0")
        assert client.heard() == (2, b'\3{"metadata": {}, "status": "Success"}')
        assert client.heard() == (8, b"\x03\xe8")
    with Client(cluster) as client:
        client.upgrade("channels", command("sh", "-c", "echo%20no%3E%262;exit%203"), "v4.channel.k8s.io")
        (_, first), (_, stderr), (_, status) = client.heard(), client.heard(), client.heard()
        assert (first, stderr) == (b"\1", b"\2no\n")
        assert json.loads(status[1:])["details"] == {"causes": [{"reason": "ExitCode", "message": "3"}]}
    assert [row["code"] for row in cluster.executions()] == [0, 3]


def test_a_command_by_spdy_starts_when_its_streams_are_there(cluster, tmp_path):
    cluster.pod("web-1", path=str(tmp_path), containers=("a", "b"))
    with Client(cluster) as client:
        assert client.ask(command("socat"), method="POST")[1]["message"] == (
            "a container name must be specified for pod web-1, choose one of: [a b]")
        assert client.ask(command("socat", more="stdout=1&container=z"), method="POST")[1]["message"] == (
            "container z is not valid for pod web-1")
        assert client.upgrade("spdy", command("socat", more="stdout=true&container=b"), "v4.channel.k8s.io") == 101
        client.syn(1, streamtype="error")
        client.syn(3, streamtype="stdout")
        assert [frame[:2] for frame in client.frames(2)] == [(SYN_REPLY, 1), (SYN_REPLY, 3)]
        status = json.loads(client.frame()[2])
        assert status["reason"] == "InternalError"
        assert 'exec: "socat": executable file not found in $PATH' in status["message"]


def test_a_command_outlives_its_client_but_not_the_cluster(make_cluster):
    cluster = make_cluster()
    cluster.pod("web-1")
    with Client(cluster) as client:
        client.upgrade("channels", command("sleep", "1000", more="stdin=1&stdout=1"), "v4.channel.k8s.io")
        (row,) = wait_until(lambda: [row for row in cluster.executions() if row["pid"]])
    wait_until(lambda: cluster.executions(stdin_ended=True))
    os.kill(row["pid"], 0)
    cluster.stop()
    wait_until(lambda: not alive(row["pid"]), what="the end of the command")


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second one, where it goes between open() and read()
        return False


# -- faults ------------------------------------------------------------------------------------


ENDS = (ConnectionError, ssl.SSLError, EOFError)  # Python's ssl takes a reset for an end, too
RESET, ENDED = 7, 8  # TCP_CLOSE and TCP_CLOSE_WAIT of Linux's tcp_states.h


@linux
@pytest.mark.parametrize("action", ["rst", "eof", "end"])
def test_a_connection_ends_at_every_point(cluster, pod, action):
    for at in ("accept", "tls", "request", "head", "body", "upgraded", "stream", "open"):
        number = cluster.fault(action, at=at, times=1, after=3 if at == "open" else 0)
        if at == "accept":
            with pytest.raises(ENDS):
                Client(cluster)
            continue
        with Client(cluster) as client:
            with pytest.raises(ENDS) as raised:
                client.ask(PODS)
                client.upgrade("spdy", FORWARD)
                client.pair(1, 80)
                client.data(3, b"hello")
                assert client.frames(3)[2] == ("data", 3, b"HEL", False) and at == "open"
                client.frame()
            state = client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        assert cluster.hits(number) == 1
        if action == "end":  # who sends after it hears of a reset, too
            assert raised.type is EOFError or at in ("upgraded", "stream", "open")
        else:
            assert raised.type is not EOFError and state == (RESET if action == "rst" else ENDED)
    wait_until(lambda: not cluster.connections(ended=None))
    assert {row["ended"] for row in cluster.connections()} == {action}


def test_a_connection_hangs_at_every_point(cluster, pod):
    for at in ("accept", "tls", "request", "head", "body", "upgraded", "stream", "open"):
        number = cluster.fault("hang", at=at, times=1)
        with connect(cluster.address) if at == "accept" else Client(cluster) as client:
            if at in ("tls", "request", "head", "body"):
                client.say("GET", PODS)
            elif at != "accept":
                client.upgrade("spdy", FORWARD)
                client.pair(1, 80)
                client.data(3, b"hello")
            wait_until(lambda: cluster.hits(number) == 1)
            sock = client if at == "accept" else client.sock
            sock.settimeout(0.02)
            with pytest.raises(TimeoutError):
                while sock.recv(65536):
                    pass
    wait_until(lambda: not cluster.connections(ended=None))


def test_faults_are_for_what_fits_and_as_often_as_is_said(cluster, pod):
    cluster.fault("status", code=429, retry_after=2, times=1, resource="pods", verb="list")
    cluster.fault("refuse", transport="websocket")
    cluster.fault("strip", transport="spdy", times=1)
    cluster.fault("node", transport="spdy", times=1)
    cluster.fault("close", resource="services")
    with Client(cluster) as client:
        client.say("GET", PODS)
        code, headers = client.head()
        assert (code, headers["retry-after"]) == (429, "2")
        client.exactly(int(headers["content-length"]))
        assert client.ask(PODS)[0] == 200
        spdy = "Connection: Upgrade", "Upgrade: SPDY/3.1", "X-Stream-Protocol-Version: portforward.k8s.io"
        assert client.upgrade("websocket", FORWARD) == 403
        assert client.ask(FORWARD, *spdy, method="POST")[1]["message"] == "Upgrade request required"
        assert client.ask(FORWARD, *spdy, method="POST")[1]["message"] == (
            "error dialing backend: dial tcp 10.0.0.1:10250: connect: connection refused")
        assert client.ask(SERVICES)[0] == 200
        assert client.sock.recv(1) == b""
    cluster.heal()
    with Client(cluster) as client:
        assert client.upgrade("websocket", FORWARD) == 101
    with pytest.raises(ValueError, match="cannot be at"):
        cluster.fault("goaway", at="tls")


def test_a_stream_has_faults_of_its_own(cluster, pod):
    cluster.fault("error", at="open", after=3, times=1, message="boom")
    cluster.fault("rst_stream", port=81)
    with Client(cluster) as client:
        client.upgrade("spdy", FORWARD)
        client.pair(1, 80)
        client.data(3, b"hello")
        assert client.frames(6)[2:4] == [("data", 3, b"HEL", False), ("data", 1, b"boom", False)]
        client.pair(5, 81)
        assert [frame[:2] for frame in client.frames(3)] == [(SYN_REPLY, 5), (RST_STREAM, 7), (RST_STREAM, 5)]
        assert whole(client, 9)[2] == ("data", 11, b"HELLO", False)


def test_a_session_goes_away_is_deaf_or_freezes(cluster, pod):
    ping = struct.pack("!HHII", 0x8003, PING, 4, 1)
    with Client(cluster) as client:
        client.upgrade("spdy", FORWARD)
        client.pair(1, 80)
        client.data(3, b"a")
        client.frames(3)
        assert cluster.end_sessions("freeze", pod="web-1") == 1
        client.send(ping)
        client.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.frame()
        client.sock.settimeout(20)
        cluster.end_sessions("thaw")
        assert client.frame() == (PING, 1, b"", False)
        cluster.end_sessions("goaway")
        assert client.frame() == (GOAWAY, 3, bytes(4), False)
        client.data(3, b"", True)
        assert client.frames(2) == [("data", 3, b"", True), ("data", 1, b"", True)]
        assert client.sock.recv(1) == b""
    cluster.fault("no_pong")
    with Client(cluster) as client:
        client.upgrade("spdy", FORWARD)
        client.send(ping)
        assert whole(client) == CLEAN


def test_a_session_may_begin_and_go_on_badly(cluster, pod):
    for lacks in ("protocol", "upgrade", "accept"):
        cluster.fault("bad_upgrade", times=1, message=lacks)
        with Client(cluster) as client:
            assert client.upgrade("websocket", FORWARD) == 101
            assert (client.protocol is None) == (lacks == "protocol")
    cluster.set(fragment=5)
    cluster.fault("ping", at="upgraded")
    cluster.fault("raw", at="stream", times=1, message="8003000600000004 00000008")
    with Client(cluster) as client:
        client.upgrade("websocket", FORWARD)
        assert client.heard() == (2, b"\x80\x03\0\6\0")  # 2: more is to come
        assert [client.heard() for _ in range(4)] == [(9, b"p"), (0, b"\0\0\4\0\0"), (9, b"p"), (0, b"\0\2")]
        cluster.set(fragment=0)
        client.pair(1, 80)
        assert sorted(frame[:2] for frame in client.frames(3)) == [(SYN_REPLY, 1), (SYN_REPLY, 3), (PING, 8)]
        assert cluster.end_sessions("close") == 1
        assert client.heard() == (8, b"\x03\xe9")


def test_an_api_server_goes_and_comes_back(cluster, pod):
    with Client(cluster) as client, Client(cluster) as idle:
        client.upgrade("spdy", FORWARD)
        cluster.down()
        for other in client, idle:
            with pytest.raises(ENDS):
                other.sock.recv(1)
        with pytest.raises(ConnectionRefusedError):
            Client(cluster)
    cluster.up()
    cluster.freeze_process()
    with connect(cluster.address, timeout=0.05) as sock, pytest.raises(TimeoutError):
        ssl.create_default_context(cafile=cluster.ca).wrap_socket(sock, server_hostname="localhost")
    cluster.thaw_process()
    with Client(cluster) as client:
        assert client.ask("/version")[1]["gitVersion"] == "v1.36.0"


def test_an_old_api_server_knows_less(cluster, pod):
    cluster.set(version="1.29")
    with Client(cluster) as client:
        assert client.upgrade("websocket", FORWARD) == 403
        assert client.upgrade("channels", command("true"), "v5.channel.k8s.io", "v4.channel.k8s.io") == 101
        assert client.protocol == "v4.channel.k8s.io"


def test_http2_is_chosen_where_a_client_offers_it(make_cluster):
    cluster = make_cluster(h2=True)
    context = ssl.create_default_context(cafile=cluster.ca)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with context.wrap_socket(connect(cluster.address), server_hostname="localhost") as client:
        assert client.selected_alpn_protocol() == "h2"
        assert client.recv(1) == b""


# -- kubeconfigs, and a real kubectl -----------------------------------------------------------


def test_a_kubeconfig_is_written_as_kubectl_writes_it():
    assert as_yaml({"a": {"b": "x", "c": {}}, "d": [{"e": "on: #1", "f": None}, {"g": ["-", "two words"]}], "h": "true",
                    "i": False}) == '''a:
  b: x
  c: {}
d:
- e: "on: #1"
  f: null
- g:
  - "-"
  - two words
h: "true"
i: false
'''


def http(sock: socket.socket) -> None:
    """A program in a pod: one answer, and a clean end."""
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n")


@pytest.mark.parametrize("transport, switch", [("websocket", "true"), ("spdy", "false")])
def test_a_real_kubectl_forwards_and_runs_commands(cluster, serve, kubectl, transport, switch):
    cluster.pod("web-1", {8080: serve(http).address}, labels={"app": "web"}, names={"http": 8080})
    cluster.service("web", {80: "http"}, {"app": "web"})
    with kubectl.start("port-forward", "svc/web", ":80", "--address", HOST,
                       KUBECTL_PORT_FORWARD_WEBSOCKETS=switch) as process:
        port = int(process.stdout.readline().removeprefix(f"Forwarding from {HOST}:").partition(" ")[0])
        for _ in range(3):
            with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=10) as answer:
                assert answer.read() == b"hello\n"
    (session,) = cluster.sessions()
    assert (session["transport"], session["streams"], session["faulty"]) == (transport, 3, 0)
    environ = {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": switch}
    assert kubectl("exec", "-i", "web-1", "--", "cat", said="x" * 100_000, **environ) == "x" * 100_000
    assert "exit code 3" in kubectl("exec", "web-1", "--", "sh", "-c", "exit 3", code=3, **environ)


def test_a_real_kubectl_lists_and_watches(cluster, kubectl):
    cluster.pod("web-1")
    assert kubectl("get", "pods", "-o", "name") == "pod/web-1\n"
    with kubectl.start("get", "pods", "--watch", "-o", "name") as process:
        assert process.stdout.readline() == "pod/web-1\n"
        cluster.pod("web-2")
        assert process.stdout.readline() == "pod/web-2\n"
