"""Stands in for a Kubernetes API server, and for a node behind it (testbed/fake_kubelet.py).  A program for tests.

    a test ---- testbed/cluster.py ---- lines of JSON on a socket (stdin) ---- Cluster: its `do_` methods
                                                                                  |  Store, users, Faults, settings
    a client ---- TLS ---- Connection: request, answer, request ... --------------|
                                \\---- 101: a session of the kubelet's

It runs in one asyncio loop and has no threads.  It serves until the test ends its end of the socket.

What it knows: the resources of RESOURCES, with get, list (labelSelector, fieldSelector, limit and continue), watch
(resourceVersion, bookmarks, 410), create, patch, delete; pods/portforward and pods/exec; discovery and /version.
Clients prove who they are by a token, a certificate of the test's CA (CN and O), or a name and password; `allow` of a
user is its role.  Words, statuses and the order of authentication, flow control, authorization and look-up are those
of a real one (1.36).  Departures: a certificate of a strange CA fails in TLS, instead of with 401; there is no HTTP/2
(with `h2` it is chosen where it is offered, and ends there); no Table, so kubectl prints names and ages only.

A fault is an action at a point, for requests that fit: ACTIONS, POINTS and `Faults.find` in testbed/fake_objects.py,
which has the objects and the users, too.
"""

import asyncio
import base64
import collections
import contextlib
import gzip
import hashlib
import json
import logging
import os
import socket
import ssl
import struct
import sys
import time
import traceback
import uuid

import fake_kubelet as kubelet
from fake_objects import (ANONYMOUS, CONNECTION, RESOURCES, Faults, PlainRefused, Refused, Request, Store, User,
                          at_path, conditions, key_of, may_not, merged, now, selected_by, status)

HEAD_MAX = 65536  # bytes of a request's head
RECORDS = 20000  # records of a kind that are kept
CHUNKED = 2048  # an answer that is longer has no Content-Length, as Go's server does it
LINGER = 1.0  # seconds from our FIN to the close
GZIPPED = 128 * 1024  # one that is longer is compressed where the client can read that

PHRASES = {200: "OK", 201: "Created", 302: "Found", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
           404: "Not Found", 405: "Method Not Allowed", 409: "Conflict", 410: "Gone", 422: "Unprocessable Entity",
           429: "Too Many Requests", 500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable",
           504: "Gateway Timeout"}
MESSAGES = {401: "Unauthorized", 429: "The server has received too many requests, please try again later.",
            500: "Internal error occurred: context deadline exceeded",
            503: "the server is currently unable to handle the request",
            504: "the server was unable to return a response in the time allotted, but may still be processing "
                 "the request"}


# -- a client ----------------------------------------------------------------------------------


class Ended(Exception):
    """The connection is over.  Argument: how."""


class Connection:
    """One client, from accept to its end.  Its task owns it."""

    def __init__(self, cluster, number: int, sock):
        self.cluster = cluster
        self.number = number
        self.sock = sock
        self.reader = self.writer = None
        self.closed = False
        self.how = None
        self.user = ANONYMOUS
        self.session = None  # of the kubelet's, after an upgrade
        self.facts = {}
        self.closing = False  # this answer is the last one
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.lacks = None  # what the 101 lacks
        self.held = []  # what has to be sent after a freeze
        self.record = cluster.note("connections", number=number, alpn=None, tls=None, requests=0, ended=None)

    async def run(self) -> None:
        """Serve the connection to its end."""
        try:
            await self.point("accept")
            await self.handshake()
            await self.point("tls")
            while not self.closing:
                await self.exchange()
            raise Ended("close")
        except Ended as ended:
            self.how = self.how or ended.args[0]
        except kubelet.LOST:
            self.how = self.left()
        except asyncio.CancelledError:
            pass
        except Exception:  # a fault of ours: the test fails for what is on stderr
            traceback.print_exc()
        finally:
            self.record["ended"] = self.how or "end"
            self.cut("end")

    def left(self) -> str:
        """How the connection has ended, if not by us."""
        return self.how or "client"

    def cut(self, how: str) -> None:
        """End the connection: "end", "eof" or "rst".  A second call does nothing."""
        if self.closed:
            return
        self.closed = True
        self.how = self.how or how
        self.thawed.set()
        if how == "rst":
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Within the handshake the socket is asyncio's: if it were closed here, its number would be another one's soon.
        close = self.sock.close if self.reader is None else self.break_off if self.writer is None \
            else self.writer.transport.abort
        if how == "rst":
            close()
        elif how == "end" and self.writer is not None:
            self.writer.close()
        else:  # the kernel resets what is closed with unread bytes
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            asyncio.get_running_loop().call_later(LINGER, close)

    def break_off(self) -> None:
        """End the handshake: asyncio closes the socket then."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def write(self, data: bytes) -> None:
        """Send, in a session.  While all is frozen it waits here; what comes too late is dropped."""
        if not self.thawed.is_set():
            self.held.append(data)
        elif data and not self.closed:
            self.writer.write(data)

    def thaw(self) -> None:
        """Go on."""
        self.thawed.set()
        self.write(b"".join(self.held))
        self.held.clear()

    async def handshake(self) -> None:
        """TLS."""
        self.reader = asyncio.StreamReader(limit=HEAD_MAX)
        protocol = asyncio.StreamReaderProtocol(self.reader)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, self.sock, ssl=self.cluster.context,
                                                          ssl_shutdown_timeout=1)
        self.writer = asyncio.StreamWriter(transport, protocol, self.reader, loop)
        tls = transport.get_extra_info("ssl_object")
        self.record["alpn"], self.record["tls"] = tls.selected_alpn_protocol(), tls.version()
        if self.record["alpn"] == "h2":
            raise Ended("HTTP/2")

    # -- faults --------------------------------------------------------------------------------

    def fault(self, point: str, reached: int = 1 << 60, **facts):
        """The fault at this point, if there is one."""
        return self.cluster.faults.find(point, reached, {**self.facts, **facts})

    async def point(self, name: str, reached: int = 1 << 60):
        """Do what a fault at this point says.  Returns one that is the caller's to do, or None."""
        while fault := self.fault(name, reached):
            if fault.action not in CONNECTION:
                return fault
            if fault.action == "hang":
                await self.hang()
            await self.act(fault)
        return None

    async def hang(self) -> None:
        """Say nothing more, until the client leaves."""
        with contextlib.suppress(OSError):
            if self.writer is None:
                while await asyncio.get_running_loop().sock_recv(self.sock, 65536):
                    pass
            else:
                while await self.reader.read(65536):
                    pass
        raise Ended("hang")

    async def act(self, fault, forwarding=None) -> None:
        """Do what a fault says.  `forwarding`: the stream where it happens.  May raise Ended, or what ends a stream."""
        action = fault.action
        if action == "delay":
            await asyncio.sleep(fault.seconds)
        elif action == "freeze":
            self.thawed.clear()
            await self.thawed.wait()
        elif action in ("rst", "eof", "end"):
            self.cut(action)
            raise kubelet.Reset if forwarding else Ended(action)
        elif action == "hang":
            await asyncio.Event().wait()  # the session's end cancels it
        elif action == "error":
            raise kubelet.Trouble(fault.message or forwarding.text(forwarding.inside(
                f"read tcp4 127.0.0.1:40000->127.0.0.1:{forwarding.port}: read: connection reset by peer")))
        elif action == "rst_stream":
            raise kubelet.Trouble
        elif action in ("ping", "goaway"):
            getattr(self.session, action)()
        elif action == "raw":
            self.session.post(bytes.fromhex(fault.message))
        elif action == "no_pong":
            self.session.answers_pings = False

    # -- requests ------------------------------------------------------------------------------

    async def exchange(self) -> None:
        """One request and its answer."""
        await self.thawed.wait()
        request = await self.read_request()
        self.record["requests"] += 1
        self.facts = {"method": request.method, "path": request.path}
        record = self.cluster.note("requests", connection=self.number, nth=self.record["requests"],
                                   method=request.method, path=request.path, query=request.query, status=None,
                                   user=None, verb=None, resource=None, namespace=None, name=None, transport="",
                                   headers=[pair for pair in request.headers if pair[0] != "authorization"])
        try:
            self.closing = request.header("connection").lower() == "close"
            await self.serve(request, record)
        except Refused as refused:
            record["status"] = refused.code
            headers = refused.headers
            if isinstance(refused.body, bytes):
                headers = ("Content-Type: text/plain; charset=utf-8", *headers)
            await self.answer(refused.code, refused.body, *headers)

    async def read_request(self) -> Request:
        """Raises LOST, and Ended where the client has left between two requests."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise Ended("a head that is too long") from None
        except asyncio.IncompleteReadError:
            raise Ended("client") from None
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        headers = [[name.lower(), value.strip()] for name, _, value in (line.partition(":") for line in lines)]
        request = Request(*(first.split(" ") + ["", ""])[:2], headers, b"")
        if "chunked" in request.header("transfer-encoding"):
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                request.body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readuntil(b"\r\n")
        elif length := request.header("content-length"):
            request.body = await self.reader.readexactly(int(length))
        return request

    async def serve(self, request: Request, record: dict) -> None:
        """Who asks, for what, may he, and the answer."""
        self.user = self.authenticate(request)
        prefix = self.cluster.settings["prefix"]
        if not request.path.startswith(f"{prefix}/"):
            raise PlainRefused(404, "404 page not found\n")
        request.path = request.path.removeprefix(prefix)
        request.understand()
        self.facts.update(verb=request.verb, resource=request.resource, namespace=request.namespace,
                          name=request.name, transport=request.transport, user=self.user.name)
        record.update(self.facts)
        if fault := await self.point("request"):
            await self.refuse(fault, request)
        if request.resource is None:
            await self.serve_path(request, record)
            return
        self.authorize(request)
        if request.sub in ("portforward", "exec"):
            await self.upgrade(request, record)
            return
        code, thing = (200, None) if request.verb == "watch" else self.cluster.do(request)
        record["status"] = code
        if thing is None:
            await self.watch(request)
        else:
            await self.answer(code, thing, gzipped="gzip" in request.words("accept-encoding"))

    async def refuse(self, fault, request: Request) -> None:
        """Do what a fault at "request" says beyond what can be at every point."""
        if fault.action == "status":
            late = () if fault.retry_after is None else (f"Retry-After: {fault.retry_after}",)
            raise Refused(fault.code, fault.message or MESSAGES.get(fault.code, "a fault of the test"), *late)
        if fault.action == "text":
            raise PlainRefused(fault.code, fault.message or "")
        if fault.action == "refuse":
            raise Refused(403, may_not(self.user, request.verb, request.resource, request.group, request.namespace,
                                       request.name))
        if fault.action == "node":
            raise Refused(500, "error dialing backend: dial tcp 10.0.0.1:10250: connect: connection refused")
        if fault.action == "strip":
            request.transport = ""
            request.headers = [pair for pair in request.headers if pair[0] not in ("upgrade", "connection")]
        elif fault.action == "close":
            self.closing = True
        elif fault.action == "bad_upgrade":
            self.lacks = fault.message
        elif fault.action == "garbage":
            self.writer.write(b"\x15\x03\x03\x00\x02garbage\r\n\r\n")
            self.cut("end")
            raise Ended("garbage")

    def authenticate(self, request: Request) -> User:
        """Raises Refused for proof that is wrong."""
        users = self.cluster.users
        subject = [pair for rdn in (self.writer.get_extra_info("peercert") or {}).get("subject", ()) for pair in rdn]
        names = [value for key, value in subject if key == "commonName"]
        kind, _, proof = request.header("authorization").partition(" ")
        if names:
            groups = [value for key, value in subject if key == "organizationName"]
            user = users.get(names[0]) or User(names[0], groups, {}, None)
        elif kind.lower() == "bearer" and proof in self.cluster.tokens:
            user = users[self.cluster.tokens[proof]]
        elif kind.lower() == "basic" and proof in self.cluster.passwords:
            user = users[self.cluster.passwords[proof]]
        elif kind:
            raise Refused(401, "Unauthorized")
        else:
            user = ANONYMOUS
        other = request.header("impersonate-user")
        if not other:
            return user
        if not user.may("impersonate", "users", None):
            raise Refused(403, may_not(user, "impersonate", "users", "", None, other))
        return users.get(other) or User(other, request.words("impersonate-group"), {}, None)

    def authorize(self, request: Request) -> None:
        """RBAC.  Raises Refused."""
        plain = request.resource.partition("/")[0]
        if not self.user.may(request.verb, request.resource, request.namespace):
            raise Refused(403, may_not(self.user, request.verb, request.resource, request.group, request.namespace,
                                       request.name))
        if request.sub and request.verb == "get" and self.cluster.minor() >= 35 and not self.user.may(
                "create", request.resource, request.namespace):
            raise Refused(403, status(403, f'{plain} "{request.name}" is forbidden: ', request.name, plain))

    async def serve_path(self, request: Request, record: dict) -> None:
        """A path that is no resource: discovery, health, /version."""
        open_to_all = request.path in ("/version", "/healthz", "/livez", "/readyz")
        if self.user is ANONYMOUS and not open_to_all:
            raise Refused(403, f'forbidden: User "{self.user.name}" cannot get path "{request.path}"')
        found = at_path(request.path, self.cluster.settings["version"])
        if found is None:
            raise Refused(404, "the server could not find the requested resource")
        record["status"] = 200
        await self.answer(200, found)

    # -- answers -------------------------------------------------------------------------------

    async def answer(self, code: int, body, *headers: str, gzipped: bool = False) -> None:
        """Send an answer: a thing as JSON, or bytes as they are."""
        lines = [f"HTTP/1.1 {code} {PHRASES.get(code, 'Status')}", f"Audit-Id: {uuid.uuid4()}",
                 "Cache-Control: no-cache, private", *headers]
        if not isinstance(body, bytes):
            body = json.dumps(body, separators=(",", ":")).encode() + b"\n"
            lines.append("Content-Type: application/json")
        if gzipped and len(body) > GZIPPED:
            body = gzip.compress(body, 1)
            lines.append("Content-Encoding: gzip")
        if self.closing:
            lines.append("Connection: close")
        if len(body) > CHUNKED:
            lines.append("Transfer-Encoding: chunked")
            pieces = [body[at:at + 32768] for at in range(0, len(body), 32768)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        else:
            lines.append(f"Content-Length: {len(body)}")
        await self.send_head(lines)
        half = len(body) // 2
        self.writer.write(body[:half])
        await self.point("body")
        self.writer.write(body[half:])
        await self.writer.drain()

    async def send_head(self, lines: list) -> None:
        """Send the head of an answer."""
        date = time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        head = "\r\n".join([*lines, date, "", ""]).encode("latin-1")
        self.writer.write(head[:len(head) // 2])
        await self.point("head")
        self.writer.write(head[len(head) // 2:])

    async def watch(self, request: Request) -> None:
        """Send what happens, until the client leaves or the time is over."""
        store, fits = self.cluster.store, selected_by(request.query)
        since = int(request.query.get("resourceVersion") or 0)
        wants_bookmarks = request.query.get("allowWatchBookmarks") == "true"
        ends = asyncio.get_running_loop().time() + float(request.query.get("timeoutSeconds") or 3000)
        resource, row = request.resource, RESOURCES[request.resource]
        await self.send_head(["HTTP/1.1 200 OK", "Content-Type: application/json", "Transfer-Encoding: chunked"])
        sent = 0

        async def send(kind: str, thing: dict) -> None:
            nonlocal sent
            sent += 1
            await self.thawed.wait()
            line = json.dumps({"type": kind, "object": thing}, separators=(",", ":")).encode() + b"\n"
            self.writer.write(b"%x\r\n%b\r\n" % (len(line), line))
            await self.writer.drain()
            await self.point("body", sent)

        await self.point("body", 0)
        if since == 0:
            since = store.version
            for thing in store.listed(resource, request.namespace, fits):
                await send("ADDED", thing)
        too_old = since < store.floor
        expired, at, marks = self.cluster.expired, 0, len(store.bookmarks)
        left = asyncio.ensure_future(self.reader.read(65536))
        try:
            while True:
                if too_old or expired != self.cluster.expired:
                    await send("ERROR", status(410, f"too old resource version: {since} ({store.version})"))
                    break
                while at < len(store.history):
                    version, kind, what, new, old = store.history[at]
                    at += 1
                    space = new["metadata"].get("namespace")
                    if version <= since or what != resource or request.namespace not in (None, space):
                        continue
                    was, fits_now = old is not None and fits(old), kind != "DELETED" and fits(new)
                    if was or fits_now:
                        await send("MODIFIED" if was and fits_now else "DELETED" if was else "ADDED", new)
                while marks < len(store.bookmarks):
                    if wants_bookmarks:
                        await send("BOOKMARK", {"kind": row.kind, "apiVersion": row.group_version,
                                                "metadata": {"resourceVersion": str(store.bookmarks[marks])}})
                    marks += 1
                happened = asyncio.ensure_future(store.happened.wait())
                done, _ = await asyncio.wait({happened, left}, return_when=asyncio.FIRST_COMPLETED,
                                             timeout=max(0.0, ends - asyncio.get_running_loop().time()))
                happened.cancel()
                if left in done:
                    raise Ended("client")
                if not done:
                    break
        finally:
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
        self.writer.write(b"0\r\n\r\n")

    # -- upgrades ------------------------------------------------------------------------------

    async def upgrade(self, request: Request, record: dict) -> None:
        """Port-forward or exec: the API server's part, then the node's.  Ends the connection."""
        pod = self.cluster.store.find("pods", request.namespace, request.name)
        container = self.container(request, pod) if request.sub == "exec" else None
        if not request.transport:
            raise Refused(400, "Upgrade request required")
        if not pod["spec"].get("nodeName"):
            raise Refused(400, f"pod {request.name} does not have a host assigned")
        sandbox = self.cluster.sandboxes.get(pod["metadata"]["uid"])
        if sandbox is None:  # it has not started
            raise PlainRefused(404, f"pod not found (\"{request.name}_{request.namespace}\")")
        protocol = self.negotiate(request)
        session = self.cluster.note(
            "sessions", number=len(self.cluster.records["sessions"]) + 1, connection=self.number, kind=request.sub,
            transport=request.transport, protocol=protocol, namespace=request.namespace, pod=request.name,
            uid=pod["metadata"]["uid"], container=container, user=self.user.name, streams=0, live=0, most_live=0,
            pings=0, pongs=0, resets=0, faulty=0, bytes_up=0, goaway=False, ended=None)
        work = getattr(self, request.sub)(request, session, sandbox, protocol)
        if request.transport == "spdy":
            lines = {"upgrade": "Upgrade: SPDY/3.1", "protocol": f"X-Stream-Protocol-Version: {protocol}"}
        else:
            proof = request.header("sec-websocket-key").encode() + kubelet.GUID * (self.lacks != "accept")
            lines = {"upgrade": "Upgrade: websocket", "protocol": f"Sec-WebSocket-Protocol: {protocol}", "proof":
                     f"Sec-WebSocket-Accept: {base64.b64encode(hashlib.sha1(proof).digest()).decode()}"}
        lines.pop(self.lacks, None)
        lines = ["HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", *lines.values()]
        self.session = work
        await self.send_head(lines)
        record["status"] = 101
        self.cluster.sessions[self] = session
        try:
            if fault := await self.point("upgraded"):
                await self.act(fault)
            session["ended"] = await work.run()
        finally:
            del self.cluster.sessions[self]
            session["ended"] = session["ended"] or self.how or "end"
        raise Ended(session["ended"])

    def negotiate(self, request: Request) -> str:
        """The protocol inside the upgrade.  Raises Refused."""
        exec_versions = ["v5.channel.k8s.io", "v4.channel.k8s.io"][self.cluster.minor() < 30:]
        if request.transport == "spdy":
            known = ["portforward.k8s.io"] if request.sub == "portforward" else ["v4.channel.k8s.io"]
            offered = request.words("x-stream-protocol-version")
            for word in offered:
                if word in known:
                    return word
            raise PlainRefused(403, f"unable to upgrade: unable to negotiate protocol: client supports "
                                    f"[{' '.join(offered)}], server accepts [{' '.join(known)}]\n")
        if not request.header("sec-websocket-key") or request.header("sec-websocket-version") != "13":
            raise PlainRefused(400, "Bad Request\n")
        known = exec_versions if request.sub == "exec" else ["v4.channel.k8s.io"]
        if request.sub == "portforward" and self.cluster.minor() >= 31:
            known = ["SPDY/3.1+portforward.k8s.io", *known]
        for word in request.words("sec-websocket-protocol"):
            if word in known:
                request.transport = "channels" if request.sub == "portforward" and word == known[-1] else "websocket"
                return word
        raise PlainRefused(403, "")

    def portforward(self, request: Request, session: dict, sandbox, protocol: str):
        """The session of a port-forward."""
        if request.transport == "channels":
            ports = [int(word) for key, value in request.pairs if key == "ports" for word in value.split(",")]
            if not ports:
                raise PlainRefused(400, 'query parameter "port" is required\n')
            return kubelet.Channels(self, session, sandbox, ports)
        return kubelet.PortForward(self, self.wire(request), session, sandbox)

    def exec(self, request: Request, session: dict, sandbox, protocol: str):
        """The session of a command."""
        argv = [value for key, value in request.pairs if key == "command"]
        if not argv:
            raise Refused(400, "you must specify at least one command for the container")
        wanted = {"error", *(word for word in ("stdin", "stdout", "stderr", "tty")
                             if request.query.get(word) in ("true", "1"))}
        if "tty" in wanted:  # pipes all the same
            wanted = wanted - {"tty"} | {"resize"}
        if not wanted & {"stdin", "stdout", "stderr"}:
            raise Refused(400, "you must specify at least one of stdin, stdout, stderr")
        record = self.cluster.note("executions", session=session["number"], argv=argv, pid=None, code=None,
                                   stdin_ended=False)
        command = kubelet.Command(self.cluster, sandbox, argv, record)
        if request.transport == "spdy":
            return kubelet.CommandStreams(self, self.wire(request), session, command, wanted)
        return kubelet.CommandChannels(self, session, command, wanted, int(protocol[1]))

    def wire(self, request: Request):
        """What carries SPDY: the connection itself, or a WebSocket."""
        if request.transport == "websocket":
            return kubelet.WebSocket(self)
        return Wire(self)

    def container(self, request: Request, pod: dict) -> str:
        """The container of an exec.  Raises Refused."""
        names = [row["name"] for row in pod["spec"]["containers"]]
        name = request.query.get("container", "")
        if not name and len(names) > 1:
            raise Refused(400, f"a container name must be specified for pod {request.name}, "
                               f"choose one of: [{' '.join(names)}]")
        if name and name not in names:
            raise Refused(400, f"container {name} is not valid for pod {request.name}")
        return name or names[0]


class Wire:
    """A connection as the carrier of SPDY."""

    def __init__(self, conn: Connection):
        self.readexactly = conn.reader.readexactly
        self.write = conn.write
        self.writelines = lambda frames: conn.write(b"".join(frames))
        self.drain = conn.writer.drain


# -- the cluster -------------------------------------------------------------------------------

SETTINGS = {
    "version": "1.36",     # of the API server; below 1.31 there is no SPDY in WebSocket, below 1.30 no v5 for exec
    "runtime": "cri-o",    # a row of fake_kubelet.RUNTIMES
    "grace": None,         # seconds that the other direction gets; None: the runtime's own
    "prefix": "",          # before /api, as Rancher has it
    "pair_timeout": 30.0,  # seconds that a stream may stay alone
    "starts_pods": True,   # pods that a client creates run at once
    "fragment": 0,         # bytes of a WebSocket frame at most, with Pings between; 0: each message is one frame
    "deletion": 0.0,       # seconds from a client's DELETE of a pod to its end
}


class Cluster:
    """One run of the program."""

    def __init__(self, folder: str, certificate: str, h2: bool):
        self.store = Store()
        self.faults = Faults()
        self.settings = dict(SETTINGS)
        self.users, self.tokens, self.passwords = {}, {}, {}
        self.records = collections.defaultdict(lambda: collections.deque(maxlen=RECORDS))
        self.connections = {}  # {Connection: its task}
        self.sessions = {}  # {Connection: record}
        self.sandboxes = {}  # {uid of a pod: Sandbox}
        self.commands = set()
        self.tasks = set()
        self.expired = 0  # how often all watches were told 410
        self.accepted = 0
        self.listener = self.accepting = None
        self.address = "127.0.0.1", 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(os.path.join(folder, f"{certificate}.pem"))
        self.context.load_verify_locations(os.path.join(folder, "ca.pem"))
        self.context.verify_mode = ssl.CERT_OPTIONAL
        self.context.set_alpn_protocols(["h2", "http/1.1"] if h2 else ["http/1.1"])
        self.do_user("admin", token="admin-token", allow=None)

    def note(self, kind: str, /, **fields) -> dict:
        """A new record, which its owner keeps up to date."""
        record = {"time": time.monotonic(), **fields}
        self.records[kind].append(record)
        return record

    def note_stream(self, session: dict, port: int, requestid) -> dict:
        """The record of a connection to a port."""
        return self.note("streams", session=session["number"], transport=session["transport"], pod=session["pod"],
                         uid=session["uid"], port=port, requestid=requestid, up=0, down=0, client_fin=False,
                         ended=None, error=None)

    def minor(self) -> int:
        return int(self.settings["version"].partition(".")[2])

    def start(self, coroutine):
        """Run something that outlives a connection."""
        task = asyncio.ensure_future(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    # -- requests ------------------------------------------------------------------------------

    def do(self, request: Request) -> tuple:
        """A request for objects: a status, and what is answered.  Raises Refused."""
        resource, namespace, name = request.resource, request.namespace, request.name
        if resource not in RESOURCES or RESOURCES[resource].namespaced and namespace is None and name is not None:
            raise Refused(404, "the server could not find the requested resource")
        if request.verb == "list":
            return 200, self.listed(request)
        if request.verb == "get":
            return 200, self.store.find(resource, namespace, name)
        if request.verb == "create":
            return 201, self.create(resource, namespace, json.loads(request.body))
        if request.verb in ("patch", "update"):
            old = self.store.find(resource, namespace, name)
            return 200, self.store.put(resource, namespace, name, merged(old, json.loads(request.body)))
        if request.verb == "delete":
            return 200, self.delete(resource, namespace, name)
        raise Refused(405, "the server does not allow this method on the requested resource")

    def listed(self, request: Request) -> dict:
        """A list; with `limit`, a page of it."""
        row = RESOURCES[request.resource]
        found = self.store.listed(request.resource, request.namespace, selected_by(request.query))
        about = {"resourceVersion": str(self.store.version)}
        if token := request.query.get("continue"):
            start = json.loads(base64.b64decode(token))
            if start["rv"] < self.store.floor:
                raise Refused(410, "The provided continue parameter is too old to display a consistent list result.")
            about["resourceVersion"] = str(start["rv"])
            found = [thing for thing in found if key_of(thing) > start["start"]]
        limit = int(request.query.get("limit") or 0)
        if limit and len(found) > limit:
            token = {"v": "meta.k8s.io/v1", "rv": int(about["resourceVersion"]), "start": key_of(found[limit - 1])}
            about["continue"] = base64.b64encode(json.dumps(token).encode()).decode()
            about["remainingItemCount"] = len(found) - limit
            found = found[:limit]
        items = [{key: value for key, value in thing.items() if key not in ("kind", "apiVersion")} for thing in found]
        return {"kind": f"{row.kind}List", "apiVersion": row.group_version, "metadata": about, "items": items}

    def create(self, resource: str, namespace: str, thing: dict) -> dict:
        """A client's new object.  A pod runs at once, if the settings say so."""
        about = thing.setdefault("metadata", {})
        name = about.get("name") or about.get("generateName", "") + uuid.uuid4().hex[:5]
        if (resource, namespace, name) in self.store.objects:
            raise Refused(409, status(409, f'{resource} "{name}" already exists', name, resource))
        if resource == "pods":
            thing["status"] = {"phase": "Pending", "conditions": []}
            new = self.store.put(resource, namespace, name, thing)
            if self.settings["starts_pods"]:
                asyncio.get_running_loop().call_soon(self.run_pod, namespace, name, {}, None)
            return new
        return self.store.put(resource, namespace, name, thing)

    def delete(self, resource: str, namespace, name: str) -> dict:
        """A client's DELETE.  A pod terminates first."""
        if resource != "pods":
            return self.store.remove(resource, namespace, name)
        self.store.find(resource, namespace, name)
        self.do_terminate(name, namespace)
        uid = self.store.find(resource, namespace, name)["metadata"]["uid"]
        asyncio.get_running_loop().call_later(self.settings["deletion"], self.remove_uid, namespace, name, uid)
        return self.store.find(resource, namespace, name)

    def remove_uid(self, namespace: str, name: str, uid: str) -> None:
        """Remove a pod that is still the same one."""
        found = self.store.objects.get(("pods", namespace, name))
        if found is not None and found["metadata"]["uid"] == uid:
            self.do_remove("pods", name, namespace)

    # -- the test's orders: each is a method of testbed/cluster.py's Cluster ---------------------

    def do_user(self, name: str, token=None, password=None, allow=None, groups=(), namespace=None) -> None:
        self.users[name] = User(name, list(groups), allow, namespace)
        for table, proof in ((self.tokens, token), (self.passwords, password)):
            for old in [old for old, owner in table.items() if owner == name]:
                del table[old]
            if proof is not None:
                if table is self.passwords:
                    proof = base64.b64encode(f"{name}:{proof}".encode()).decode()
                table[proof] = name

    def do_set(self, **settings) -> None:
        unknown = settings.keys() - SETTINGS.keys()
        if unknown:
            raise ValueError(f"no such setting: {unknown}")
        self.settings.update(settings)

    def do_put(self, resource: str, name: str, thing: dict, namespace) -> dict:
        return self.store.put(resource, namespace if RESOURCES[resource].namespaced else None, name, thing)

    def do_change(self, resource: str, name: str, change: dict, namespace) -> dict:
        return self.store.put(resource, namespace, name, merged(self.store.find(resource, namespace, name), change))

    def do_get(self, resource: str, name: str, namespace) -> dict:
        return self.store.find(resource, namespace, name)

    def do_remove(self, resource: str, name: str, namespace) -> None:
        gone = self.store.remove(resource, namespace, name)
        sandbox = self.sandboxes.pop(gone["metadata"]["uid"], None) if resource == "pods" else None
        if sandbox is not None:
            sandbox.gone = True
            for forwarding in list(sandbox.forwardings):
                forwarding.killed.set()

    def do_pod(self, name: str, ports: list, names: dict, labels: dict, namespace: str, ready: bool, phase: str,
               node, containers: list, annotations: dict, path, sidecar: bool) -> dict:
        exposed = [{"name": word, "containerPort": port, "protocol": "TCP"} for word, port in names.items()]
        rows = [{"name": word, "image": f"registry.example.com/{word}:1"} for word in containers]
        spec = {"containers": rows}
        if sidecar:
            spec["initContainers"] = [{"name": "sidecar", "image": "registry.example.com/sidecar:1",
                                       "restartPolicy": "Always", "ports": exposed}]
        elif exposed:
            rows[0]["ports"] = exposed
        about = {"labels": labels, **({"annotations": annotations} if annotations else {})}
        thing = {"metadata": about, "spec": spec, "status": {"phase": "Pending", "conditions": []}}
        new = self.store.put("pods", namespace, name, thing) if phase == "Pending" else None
        if phase == "Pending":
            return new if node is None else self.do_change("pods", name, {"spec": {"nodeName": node}}, namespace)
        self.store.put("pods", namespace, name, {**thing, "spec": {**spec, "nodeName": node or "node-1"}})
        return self.run_pod(namespace, name, {port: tuple(address) for port, address in ports}, path, ready, phase)

    def run_pod(self, namespace: str, name: str, ports: dict, path, ready: bool = True, phase: str = "Running") -> dict:
        """The node has started a pod."""
        pod = self.store.find("pods", namespace, name)
        uid = pod["metadata"]["uid"]
        if uid not in self.sandboxes:
            self.sandboxes[uid] = kubelet.Sandbox(uid, name, ports, path or os.environ.get("PATH", os.defpath))
        node = pod["spec"].get("nodeName") or "node-1"
        number = len(self.sandboxes)
        states = [{"name": row["name"], "image": row["image"], "imageID": row["image"], "ready": ready,
                   "restartCount": 0, "state": {"running": {"startedAt": now()}}} for row in pod["spec"]["containers"]]
        return self.do_change("pods", name, {"spec": {"nodeName": node}, "status": {
            "phase": phase, "hostIP": "10.0.0.1", "podIP": f"10.244.{number // 250}.{number % 250 + 1}",
            "containerStatuses": states, "conditions": conditions(ready)}}, namespace)

    def do_run(self, name: str, ports: list, path, ready: bool, namespace: str) -> dict:
        return self.run_pod(namespace, name, {port: tuple(address) for port, address in ports}, path, ready)

    def do_replace(self, name: str, ports, namespace: str) -> dict:
        old = self.store.find("pods", namespace, name)
        sandbox = self.sandboxes.get(old["metadata"]["uid"])
        self.do_remove("pods", name, namespace)
        own = {key: old["metadata"][key] for key in ("labels", "annotations") if key in old["metadata"]}
        self.store.put("pods", namespace, name, {"metadata": own, "spec": old["spec"], "status": {"phase": "Pending"}})
        if ports is None:
            ports = list(sandbox.ports.items()) if sandbox else []
        return self.do_run(name, ports, sandbox and sandbox.path, True, namespace)

    def do_ready(self, name: str, ready: bool, namespace: str) -> dict:
        return self.do_change("pods", name, {"status": {"conditions": conditions(ready)}}, namespace)

    def do_terminate(self, name: str, namespace: str) -> dict:
        return self.do_change("pods", name, {"metadata": {"deletionTimestamp": now(),
                                                          "deletionGracePeriodSeconds": 30}}, namespace)

    def do_compact(self, watches: bool) -> None:
        self.store.floor = self.store.version
        self.expired += watches
        self.store.wake()

    def do_bookmark(self) -> None:
        self.store.bookmarks.append(self.store.version)
        self.store.wake()

    def do_fault(self, **words) -> int:
        return self.faults.add(**words)

    def do_hits(self, number: int) -> int:
        return self.faults.all[number].hits

    def do_heal(self) -> None:
        self.faults.on.clear()

    def do_records(self, kind: str, match: dict) -> list:
        return [record for record in self.records[kind]
                if all(record.get(key) == value for key, value in match.items())]

    def do_open(self) -> int:
        return len(self.connections)

    def do_end(self, how: str, sessions: bool, match: dict) -> int:
        """Do something to all sessions that fit, or to all connections."""
        found = [conn for conn in self.connections
                 if not sessions or conn in self.sessions and all(self.sessions[conn].get(key) == value
                                                                  for key, value in match.items())]
        for conn in found:
            if how == "freeze":
                conn.thawed.clear()
            elif how == "thaw":
                conn.thaw()
            elif how in ("ping", "goaway"):
                getattr(conn.session, how)()
            elif how == "close":
                getattr(conn.session, "socket", conn.session).close(1001)
                conn.cut("end")
            else:
                conn.cut(how)
        return len(found)

    def do_down(self, back_after) -> None:
        """Listen no more, and reset all connections."""
        if self.listener is not None:
            self.accepting.cancel()
            self.listener.close()
            self.listener = None
        for conn in list(self.connections):
            conn.cut("rst")
        if back_after is not None:
            asyncio.get_running_loop().call_later(back_after, self.do_up)

    def do_up(self) -> int:
        """Listen, on the same port as before.  Returns the port."""
        if self.listener is None:
            self.listener = socket.create_server(self.address, backlog=4096)
            self.listener.setblocking(False)
            self.address = self.listener.getsockname()
            self.accepting = asyncio.ensure_future(self.accept(self.listener))
        return self.address[1]

    async def accept(self, listener) -> None:
        """Take clients."""
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.accepted += 1
            conn = Connection(self, self.accepted, sock)
            task = asyncio.ensure_future(conn.run())
            self.connections[conn] = task
            task.add_done_callback(lambda _, conn=conn: self.connections.pop(conn))


async def serve(folder: str, certificate: str, h2: bool) -> None:
    """Do what the test says, line by line, until it ends."""
    orders, answers = await asyncio.open_connection(sock=socket.socket(fileno=0), limit=1 << 26)
    cluster = Cluster(folder, certificate, h2)
    answers.write(json.dumps(cluster.do_up()).encode() + b"\n")
    with contextlib.suppress(OSError):
        while line := await orders.readline():
            order, words = json.loads(line)
            try:
                answer = {"done": getattr(cluster, f"do_{order}")(**words)}
            except Refused as refused:
                answer = {"failed": f"{refused.code} {refused.body['message']}"}
            except Exception as error:
                answer = {"failed": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer, default=str).encode() + b"\n")
            await answers.drain()
    for command in cluster.commands:
        command.kill()


def main() -> None:
    """The command line: the folder with the certificates, the name of the server's, and whether HTTP/2 is chosen."""
    folder, certificate, h2 = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(bounded(folder, certificate, h2 == "h2"))


async def bounded(folder: str, certificate: str, h2: bool) -> None:
    """Serve, and leave without waiting for anybody."""
    logging.getLogger("asyncio").setLevel("ERROR")  # it warns of bytes for a client that has just left
    await serve(folder, certificate, h2)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
