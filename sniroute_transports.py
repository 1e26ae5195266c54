"""sniroute_transports: what is asked of a pod, and the kinds of upgrade by which it is asked, without I/O.

    PodRef, Errand, Transport --- path, headers_of ---> a request for an upgrade
    a 101 --------------------- protocol_of ----------> the protocol that was chosen, and so the machine that speaks it
    any other answer ---------- is_final, refused ----> why there is no session, and whether another kind may do

    Forward    a connection to a port of the pod
    Run        a command in the pod

An API server may not know a kind, a role may not allow its method, or a proxy on the way may not let it through.  So
there are several for each errand: the rows of TRANSPORTS, the best one first.  Who tries them is sniroute_links.

Threads: none; nothing here changes after the import.

Seams: I want to ...
    speak another kind of upgrade      a row in TRANSPORTS, with its machine
    ask something else of a pod        a class as Forward, and its rows in TRANSPORTS

This room imports sniroute_api (Api, Reply, failure), sniroute_channels and sniroute_spdy (the machines),
sniroute_upgrade (the upgrade to WebSocket), sniroute_dial (Failed) and sniroute_refusals (Malformed).

Source: kubernetes.io, "Kubernetes API", the subresources portforward and exec of pods; RFC 6455 section 4.
"""

from __future__ import annotations

import urllib.parse
from typing import Any, Callable, NamedTuple

from sniroute_api import Api, Reply, failure
from sniroute_channels import COMMANDS, PORTS, TUNNEL, Command, Ports, Tunnel, check_protocol
from sniroute_dial import Failed
from sniroute_refusals import Malformed
from sniroute_spdy import Session
from sniroute_upgrade import Answer, check_upgrade

__version__ = "0.1.0"

PROTOCOL_FORWARD, PROTOCOL_COMMAND = "portforward.k8s.io", "v4.channel.k8s.io"  # over SPDY

Machine = Session | Ports | Command  # a Tunnel is a Session


# -- what is asked of a pod --------------------------------------------------------------------


class PodRef(NamedTuple):
    """A pod.  Its names have passed the rules for names, so they need no escape in a path."""

    api: Api
    namespace: str
    name: str
    uid: str  # as Pod of sniroute_objects has it

    def path(self, resource: str, query: list[tuple[str, str]]) -> str:
        """The path of a subresource of this pod."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{self.name}/{resource}"
        return f"{path}?{urllib.parse.urlencode(query)}" if query else path


class Forward(NamedTuple):
    """A connection to a port of the pod."""

    port: int

    resource = "portforward"
    once = False  # as Run has it: another session does no harm

    def query(self) -> list[tuple[str, str]]:
        """The query of the path: none.  Where the port stands there, Transport.by_query says so."""
        return []


class Run(NamedTuple):
    """A command in a container of the pod, with stdin, stdout and stderr; `words` meet no shell."""

    words: tuple[str, ...]
    container: str  # "" for the pod's own choice
    once: bool = False  # never run it again, where it may have run

    resource = "exec"

    def query(self) -> list[tuple[str, str]]:
        """The query of the path.  Source: the API's PodExecOptions."""
        query = [("command", word) for word in self.words]
        query += [(stream, "true") for stream in ("stdin", "stdout", "stderr")]
        return query + ([("container", self.container)] if self.container else [])


Errand = Forward | Run


# -- kinds of upgrade --------------------------------------------------------------------------


class Transport(NamedTuple):
    """A kind of upgrade."""

    name: str  # for people
    method: str
    protocols: tuple[str, ...]  # what we offer, the best one first
    # A protocol, whether the wire is TLS, and the errand -> what speaks the protocol.
    machine: Callable[[str, bool, Any], Machine]
    by_query: bool = False  # the port stands in the path, and the upgrade connects to it

    @property
    def is_websocket(self) -> bool:
        """Whether it is an upgrade to WebSocket, and not to SPDY."""
        return self.method == "GET"


TRANSPORTS = {
    Forward.resource: (
        # API servers from 1.30 on have the first two, and all have the others.
        Transport("SPDY in WebSocket", "GET", (TUNNEL,), lambda protocol, in_tls, errand: Tunnel(in_tls)),
        Transport("SPDY", "POST", (PROTOCOL_FORWARD,), lambda protocol, in_tls, errand: Session()),
        Transport("channels in WebSocket", "GET", PORTS, lambda protocol, in_tls, errand: Ports(errand.port, in_tls),
                  by_query=True),
    ),
    Run.resource: (
        Transport("channels in WebSocket", "GET", COMMANDS,
                  lambda protocol, in_tls, errand: Command(protocol, in_tls)),
        Transport("SPDY", "POST", (PROTOCOL_COMMAND,), lambda protocol, in_tls, errand: Session()),
    ),
}


def headers_of(transport: Transport, key: str) -> list[tuple[str, str]]:
    """What a request for this upgrade says; `key` is the Sec-WebSocket-Key."""
    if transport.is_websocket:
        return [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
                ("Sec-WebSocket-Key", key), ("Sec-WebSocket-Protocol", ", ".join(transport.protocols))]
    return [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"),
            *(("X-Stream-Protocol-Version", protocol) for protocol in transport.protocols)]


def protocol_of(transport: Transport, key: str, headers: Any) -> str:
    """The protocol that a 101 has chosen.  Raises Malformed where it is none that was asked for."""
    if transport.is_websocket:
        check_upgrade(Answer(101, dict(headers), 0), key)
        return check_protocol(headers.get("sec-websocket-protocol", ""), transport.protocols)
    if headers.get("upgrade", "").lower() != "spdy/3.1":
        raise Malformed("HTTP 101 that is no upgrade to SPDY/3.1")
    return check_protocol(headers.get("x-stream-protocol-version", ""), transport.protocols)


def is_final(reply: Reply) -> bool:
    """Whether every other transport would be answered alike: the refusal is about the object, and not the upgrade.

    What has to do with the object is a Status of the API server; a proxy's answer is none.
    """
    if reply.status == 429:
        return True
    try:
        about_object = reply.json().get("kind") == "Status"
    except Failed:
        return False
    return about_object and (reply.status == 404 or reply.status >= 500)


def refused(reply: Reply, transport: Transport, path: str) -> Failed:
    """Why there is no session: `gone` is a pod that is not there any more, `node` one that cannot be reached."""
    why = failure(reply, transport.method, path)
    if reply.status == 404:
        return Failed("gone", str(why))
    if reply.status == 500 and "dialing backend" in str(why):
        return Failed("node", str(why))
    return why
