"""Tests of sniroute_channels.py: messages, SPDY in them, channels, and what becomes of a command; and kubectl."""

from __future__ import annotations

import collections
import json
import pathlib
import random
import re
import socket
import struct
import subprocess
from typing import Any, Iterator

import pytest

from conftest import HOST, wait_until
from sniroute_channels import (COMMANDS, MESSAGE_MAX, NO_CODE, NORMAL, PORTS, TUNNEL, V4, V5, WORDS_MAX, Channels,
                               Closed, Command, MessageReader, Messages, Outcome, Piece, Ports, Tunnel, check_protocol,
                               read_outcome)
from sniroute_refusals import Malformed
from sniroute_spdy import REPLIES_MAX, TEXT_MAX, Accepted, Data, Ended, Pong, Reset, Told
from sniroute_upgrade import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, new_key, parse_answer, upgrade_request
from testbed.program import execute
from testbed.streams import (ECHO, REFUSAL, REFUSED, SUCCESS, TALK, TALKER, ClientMessages, Far, StreamServer,
                             data_frame, kubectl_path, server_message, status)

Machine = Tunnel | Channels
WAYS = pytest.mark.parametrize("in_tls", [True, False], ids=["in TLS", "in clear text"])


def joined(events: list) -> list:
    """The events, with neighbouring pieces of one stream as one, in bytes."""
    found: list = []
    for event in events:
        if isinstance(event, Data):
            event = event._replace(data=bytes(event.data))
            if found and isinstance(found[-1], Data) and found[-1][:2] == event[:2]:
                event = event._replace(data=found.pop().data + event.data)
        found.append(event)
    return found


def fed(machine: Any, data: bytes, size: int) -> list:
    """What comes of these bytes in portions of `size`."""
    events = []
    for at in range(0, len(data), size):
        events += joined(machine.receive(data[at:at + size]))
    return joined(events)


def messages(machine: Any) -> list[tuple[int, bytes]]:
    """What it says, as (opcode, payload)."""
    return list(ClientMessages().read(bytes(machine.take())))


def close(code: int = NORMAL, reason: str = "") -> bytes:
    """A server's Close."""
    return server_message(struct.pack(">H", code) + reason.encode(), CLOSE)


SIZES = pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1 << 20])


# -- subprotocols ------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, asked", [(TUNNEL, (TUNNEL,)), (V5, COMMANDS), (V4, COMMANDS), (V4, PORTS)])
def test_a_protocol_that_was_asked_for(answer, asked):
    assert check_protocol(answer, asked) == answer


@pytest.mark.parametrize("answer, asked", [("", PORTS), (V5, PORTS), ("v4.base64.channel.k8s.io", COMMANDS),
                                           ("SPDY/3.1", (TUNNEL,)), (V4 + "\r\nX", COMMANDS)])
def test_a_protocol_that_was_not(answer, asked):
    """An old server takes none of them and says so with an empty header."""
    with pytest.raises(Malformed) as caught:
        check_protocol(answer, asked)
    assert str(caught.value).isprintable() and asked[0] in str(caught.value)


# -- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data, pieces, controls", [
    (server_message(b""), [(b"", True, True)], []),
    (server_message(b"abc"), [(b"abc", True, True)], []),
    (server_message(b"a") + server_message(b""), [(b"a", True, True), (b"", True, True)], []),
    (server_message(bytes(200)), [(bytes(200), True, True)], []),
    (server_message(bytes(70_000)), [(bytes(70_000), True, True)], []),
    (server_message(b"a", final=False) + server_message(b"b", CONTINUATION),
     [(b"a", True, False), (b"b", False, True)], []),
    (server_message(b"", final=False) + server_message(b"", CONTINUATION, False) + server_message(b"b", CONTINUATION),
     [(b"", True, False), (b"", False, False), (b"b", False, True)], []),
    (server_message(b"a", final=False) + server_message(b"?", PING) + server_message(b"b", CONTINUATION),
     [(b"a", True, False), (b"b", False, True)], [(PING, b"?")]),
    (server_message(b"a") + close() + server_message(b"b"), [(b"a", True, True)], [(CLOSE, b"\x03\xe8")]),
    (server_message(b"", PONG), [], [(PONG, b"")]),
], ids=lambda value: value[:12].hex() if isinstance(value, bytes) else "")
def test_where_messages_begin_and_end(data, pieces, controls):
    assert MessageReader().pieces(memoryview(data)) == ([Piece(*piece) for piece in pieces], controls)
    for size in (1, 2, 5, 1000):
        reader, found, heard, whole = MessageReader(), [], [], []
        for at in range(0, len(data), size):
            more, also = reader.pieces(memoryview(data[at:at + size]))
            found += more
            heard += also
        for piece in found:
            whole = [*whole, bytes(piece.data)] if piece.starts else [*whole[:-1], whole[-1] + bytes(piece.data)]
        assert whole == [b"".join(piece[0] for piece in group) for group in grouped(pieces)] and heard == controls
        assert sum(piece.starts for piece in found) == sum(piece.ends for piece in found)


def grouped(pieces: list[tuple[bytes, bool, bool]]) -> Iterator[list]:
    """The pieces of each message."""
    group: list = []
    for piece in pieces:
        group.append(piece)
        if piece[2]:
            yield group
            group = []


@pytest.mark.parametrize("data", [
    server_message(b"a", TEXT), server_message(b"a", CONTINUATION), server_message(b"a", final=False) * 2,
    server_message(b"a", 3), server_message(b"a", 11), server_message(bytes(126), PING),
    server_message(b"", PING, False),
    server_message(b"x", CLOSE), b"\xc2\0", b"\x82\x81\0\0\0\0x", b"\x82\xff" + bytes(12), b"\x82\x7f\x80" + bytes(7),
], ids=lambda data: data[:8].hex())
@pytest.mark.parametrize("make", [lambda: Tunnel(True), lambda: Ports(80, True), lambda: Command(V5, True)],
                         ids=["tunnel", "ports", "command"])
def test_what_is_no_message_of_a_server(data, make):
    for size in (1, len(data)):
        with pytest.raises(Malformed):
            fed(make(), data, size)


@WAYS
@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535])
def test_what_is_said_is_masked(in_tls, size):
    """With the key 0 inside TLS; with a random one where somebody between may read it."""
    socket_ = Messages(in_tls)
    data = random.Random(size).randbytes(size)
    socket_.say(data)
    socket_.say(memoryview(data), PONG)
    out = bytes(socket_.take())
    assert list(ClientMessages().read(out)) == [(BINARY, data), (PONG, data)] and not socket_.take()
    keys = {out[at:at + 4] for at in (2 if size < 126 else 4, len(out) - size - 4)}
    assert (keys == {bytes(4)}) is in_tls and len(keys) == (1 if in_tls else 2)


@pytest.mark.parametrize("make", [lambda: Tunnel(True), lambda: Ports(80, True), lambda: Command(V5, True)],
                         ids=["tunnel", "ports", "command"])
def test_pings_of_the_server_are_answered_within_reason(make):
    machine = make()
    assert machine.receive(server_message(b"12", PING) + server_message(b"", PING)) == []
    assert messages(machine) == [(PONG, b"12"), (PONG, b"")]
    for _ in range(10_000):
        machine.receive(server_message(bytes(125), PING))
        assert machine.pending <= REPLIES_MAX
        machine.take()
    with pytest.raises(Malformed, match="flood"):
        for _ in range(10_000):
            machine.receive(server_message(bytes(125), PING))


def test_our_pings():
    """In channels they are those of WebSocket, in a tunnel those of SPDY."""
    for machine in (Ports(80, True), Command(V4, False)):
        assert [machine.ping(), machine.ping()] == [1, 2]
        assert messages(machine) == [(PING, b"1"), (PING, b"2")]
        strange = b"".join(server_message(payload, PONG) for payload in (b"", b"x", b"-1", b"3", b"01", b"9" * 125))
        assert machine.receive(server_message(b"1", PONG) + strange + server_message(b"2", PONG)) == [Pong(1), Pong(2)]
    tunnel = Tunnel(True)
    assert tunnel.ping() == 1
    ((opcode, payload),) = messages(tunnel)
    assert opcode == BINARY and tunnel.receive(server_message(payload)) == [Pong(1)]


@pytest.mark.parametrize("payload, closed", [
    (b"", Closed(NO_CODE, "")), (b"\x03\xe8", Closed(1000, "")), (b"\x03\xf3why", Closed(1011, "why")),
    (b"\x03\xf3\xff", Closed(1011, "\ufffd")),
])
def test_a_close_is_answered_once(payload, closed):
    for machine in (Tunnel(True), Command(V5, True)):
        call = machine.forward(ECHO) if isinstance(machine, Tunnel) else machine.call
        machine.take()
        assert machine.receive(server_message(payload, CLOSE)) == [closed]
        assert messages(machine) == [(CLOSE, b"\x03\xe8")] and not machine.takes_more
        machine.send(call, b"too late")
        machine.ping()
        machine.leave()
        assert messages(machine) == []
        assert machine.lost() == [Reset(call, 0)] and machine.lost() == [] and machine.calls == []


# -- SPDY in messages --------------------------------------------------------------------------


class Tunnelled:
    """A Tunnel and its far end, whose bytes come in messages of any size."""

    def __init__(self, size: int, in_tls: bool):
        self.tunnel, self.reader, self.size = Tunnel(in_tls), ClientMessages(), size
        self.said = bytearray()
        self.far = Far(self.say)
        self.dice = random.Random(size)

    def say(self, data: bytes) -> None:
        """A frame of SPDY, cut at any place into messages and frames of these."""
        while data:
            piece, data = data[:(at := self.dice.randrange(1, 40_000))], data[at:]
            self.said += server_message(piece[:at // 2], BINARY, False) + server_message(b"", PING)
            self.said += server_message(piece[at // 2:], CONTINUATION)

    def run(self) -> list:
        """What happens until nobody says anything more but Pongs."""
        events: list = []
        while self.tunnel.pending or self.said:
            for opcode, payload in self.reader.read(bytes(self.tunnel.take())):
                assert opcode in (BINARY, PONG) and len(payload) <= MESSAGE_MAX
                if opcode == BINARY:
                    self.far.feed(payload)
            said = bytes(self.said)
            self.said.clear()
            events += fed(self.tunnel, said, self.size)
        return joined(events)


@WAYS
@pytest.mark.parametrize("size", [1, 3, 1000, 1 << 20])
def test_a_tunnel_carries_a_session(size, in_tls):
    wire = Tunnelled(size, in_tls)
    echo, refused, talker = (wire.tunnel.forward(port) for port in (ECHO, REFUSED, TALKER if size > 3 else REFUSED))
    said = random.Random(size).randbytes(100_000 if size > 3 else 500)
    wire.tunnel.send(echo, said)
    wire.tunnel.end(echo)
    found = collections.defaultdict(bytes)
    others = []
    for event in wire.run():
        if isinstance(event, Data):
            found[event.call] += event.data
        else:
            others.append(event)
    assert found[echo] == said and (size <= 3 or found[talker] == bytes(TALK))
    assert Ended(echo, "data") in others and Told(refused, REFUSAL) in others
    assert not wire.tunnel.calls and wire.tunnel.takes_more


def test_heads_that_come_as_messages_of_their_own():
    """So Go's library writes them."""
    tunnel = Tunnel(True)
    call = tunnel.forward(ECHO)
    frame = data_frame(3, b"hello")
    pieces = server_message(frame[:4]) + server_message(frame[4:8]) + server_message(frame[8:])
    assert joined(tunnel.receive(pieces * 3)) == [Data(call, "data", b"hello" * 3)]
    assert joined(tunnel.receive(pieces + close())) == [Data(call, "data", b"hello"), Closed(1000, "")]


# -- port-forwards in channels -----------------------------------------------------------------

PREFACES = server_message(b"\0\x90\x1f") + server_message(b"\1\x90\x1f")  # 8080, the low byte first


@SIZES
def test_a_port_in_channels(size):
    ports = Ports(8080, True)
    call = ports.call
    assert ports.calls == [call] and not ports.takes_more
    said = (PREFACES + server_message(b"\0hello") + server_message(b"\0") + server_message(b"\0 ", final=False)
            + server_message(b"", CONTINUATION, False) + server_message(b"world", CONTINUATION))
    assert fed(ports, said, size) == [Accepted(call), Data(call, "data", b"hello world")]
    ports.send(call, b"abc")
    ports.send(call, memoryview(b"x" * (MESSAGE_MAX + 1)))
    assert messages(ports) == [(BINARY, b"\0abc"), (BINARY, b"\0" + b"x" * MESSAGE_MAX), (BINARY, b"\0x")]
    assert not ports.end(call), "there is no half-close"
    ports.send(call, b"late")
    assert messages(ports) == []
    assert fed(ports, server_message(b"\0end") + close(), size) == [
        Data(call, "data", b"end"), Ended(call, "data"), Closed(1000, "")]
    assert call.is_over and ports.calls == [] == ports.lost()


@SIZES
def test_a_port_on_which_nobody_listens(size):
    ports = Ports(8080, True)
    call = ports.call
    said = PREFACES + server_message(b"\1" + REFUSAL[:9].encode(), final=False) + server_message(b"", PING) + (
        server_message(REFUSAL[9:].encode(), CONTINUATION)) + server_message(b"\0late") + close()
    assert fed(ports, said, size) == [Accepted(call), Told(call, REFUSAL), Closed(1000, "")]
    assert call.is_over and ports.lost() == []


def test_a_preface_in_two_parts_with_data_behind_it():
    """A preface is a message; what else may come in it is data."""
    ports = Ports(0x1234, True)
    assert joined(ports.receive(server_message(b"\0\x34") + server_message(b"\0") + server_message(b"\0\x12abc"))) == [
        Accepted(ports.call), Data(ports.call, "data", b"abc")]


@pytest.mark.parametrize("data", [
    server_message(b"\0\x1f\x90"), server_message(b"\1\x50\0"), server_message(b"\2\x90\x1f"),
    server_message(b"\xff\0"),
    server_message(b""), server_message(b"", final=False) + server_message(b"", CONTINUATION),
], ids=lambda data: data.hex())
def test_what_no_port_says(data):
    for size in (1, len(data)):
        ports = Ports(8080, True)
        with pytest.raises(Malformed):
            fed(ports, data, size)
        assert ports.lost() == [Reset(ports.call, 0)]


@pytest.mark.parametrize("last", [b"", close(1011, "internal error"), server_message(b"", CLOSE)])
def test_a_port_that_is_cut(last):
    """A connection that ends in another way has not ended well."""
    ports = Ports(8080, True)
    ports.receive(PREFACES + server_message(b"\0half") + last)
    assert ports.lost() == [Reset(ports.call, 0)] and ports.call.is_over
    ports = Ports(8080, True)
    ports.receive(PREFACES + server_message(b"\1wh", final=False) + server_message(b"y", CONTINUATION, False) + last)
    assert ports.lost() == [Told(ports.call, "why")]


def test_a_port_that_we_break_off():
    ports = Ports(8080, True)
    ports.reset(ports.call)
    ports.send(ports.call, b"x")
    assert messages(ports) == [(CLOSE, b"\x03\xe8")]
    assert ports.receive(PREFACES + server_message(b"\0x" * 1000) + close()) == [Closed(1000, "")]
    assert ports.lost() == []


# -- commands in channels ----------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("protocol", COMMANDS)
def test_a_command_in_channels(size, protocol):
    command = Command(protocol, True)
    call = command.call
    assert fed(command, server_message(b"\1"), size) == [Accepted(call)]
    command.send(call, b"abc")
    can_end = command.end(call)
    assert can_end is (protocol == V5) and not call.sends
    command.send(call, b"late")
    command.end(call)
    assert messages(command) == [(BINARY, b"\0abc")] + [(BINARY, b"\xff\0")] * can_end
    said = (server_message(b"\1abc") + server_message(b"\2") + server_message(b"\2er", final=False)
            + server_message(b"r", CONTINUATION) + server_message(b"\3" + SUCCESS.encode()) + close())
    assert fed(command, said, size) == [Data(call, "stdout", b"abc"), Data(call, "stderr", b"err"),
                                        Told(call, SUCCESS), Closed(1000, "")]


@SIZES
def test_a_server_that_ends_channels(size):
    """Version 5 allows it.  What ends and is not heard here is no news."""
    command = Command(V5, True)
    call = command.call
    said = server_message(b"\xff\1") + server_message(b"\xff\2") + server_message(b"\xff\0") + server_message(b"\xff\3")
    assert fed(command, said, size) == [Ended(call, "stdout"), Ended(call, "stderr")]
    assert fed(command, server_message(b"\3why"), size) == [Accepted(call), Told(call, "why")]


@pytest.mark.parametrize("protocol, data", [
    (V5, server_message(b"\0x")), (V5, server_message(b"\4x")), (V5, server_message(b"\xff")),
    (V5, server_message(b"\xfe")),
    (V5, server_message(b"\xff\1\1")), (V4, server_message(b"\xff\1")), (V4, server_message(b"")),
    (V5, server_message(b"\xff\1", final=False) + server_message(b"x", CONTINUATION, False) * 9
     + server_message(b"", CONTINUATION)),
], ids=lambda value: value.hex() if isinstance(value, bytes) else value)
def test_what_no_command_says(protocol, data):
    for size in (1, len(data)):
        with pytest.raises(Malformed):
            fed(Command(protocol, True), data, size)


def test_a_status_of_any_size_is_kept_within_reason():
    command = Command(V4, True)
    events = command.receive(server_message(b"\3" + bytes(60_000), final=False) + server_message(b"x", CONTINUATION))
    assert events == [Accepted(command.call), Told(command.call, "\0" * TEXT_MAX)] and not command.call.text


def test_mutations_end_in_events_or_in_malformed():
    """And in nothing else, and what is kept stays small; wherever it is cut, the same comes of it."""
    dice, broken = random.Random(519), 0
    good = {
        lambda: Ports(8080, True): PREFACES + server_message(b"\0hello") + server_message(b"?", PING) + server_message(
            b"\1no", final=False) + server_message(b"body", CONTINUATION) + close(),
        lambda: Command(V5, True): server_message(b"\1") + server_message(b"\1out") + server_message(b"\2err")
        + server_message(b"\xff\1") + server_message(b"\3" + SUCCESS.encode()) + close(),
    }
    for make, said in good.items():
        for _ in range(1500):
            data = bytearray(said)
            for _ in range(dice.choice((1, 1, 2, 5))):
                at = dice.randrange(len(data))
                if dice.random() < 0.6:
                    data[at] ^= 1 << dice.randrange(8)
                else:
                    data[at:at + dice.randrange(4)] = dice.randbytes(dice.randrange(4))
            outcomes = []
            for size in (len(data), dice.randrange(1, 20)):
                machine, heard, fault = make(), [], ""
                try:
                    heard = fed(machine, bytes(data), size)
                except Malformed as error:
                    fault = str(error)
                assert len(machine.messages.reader.part) < 140 and machine.pending <= REPLIES_MAX
                heard += machine.lost()
                assert machine.call.is_over
                outcomes.append(None if fault else [
                    (type(event), *(field for field in event if field is not machine.call)) for event in heard])
            assert outcomes[0] == outcomes[1]
            broken += outcomes[0] is None
    assert 200 < broken < 2900


# -- what becomes of a command -----------------------------------------------------------------


@pytest.mark.parametrize("text, outcome", [
    (SUCCESS, Outcome(0, "")),
    (status(["exit", "127"]), Outcome(127, "command terminated with non-zero exit code 127")),
    (json.dumps({"status": "Failure", "reason": "InternalError", "code": 500, "message":
                 'error executing command: exec: "socat": executable file not found in $PATH: unknown'}),
     Outcome(None, 'error executing command: exec: "socat": executable file not found in $PATH: unknown')),
    (json.dumps({"status": "Failure", "reason": "Timeout"}), Outcome(None, "Timeout")),
    ('{"status": "Failure"}', Outcome(None, "no reason")), ("{}", Outcome(None, "no reason")),
    ("  not found\n", Outcome(None, "not found")), ("", Outcome(None, "")), ("[1]", Outcome(None, "[1]")),
    ("null", Outcome(None, "null")), ("7", Outcome(None, "7")), ("a\x1b[31mb\n\0c", Outcome(None, "a?[31mb??c")),
    ("[" * 16_000, Outcome(None, "[" * (WORDS_MAX - 3) + "...")),
    ("9" * 16_000, Outcome(None, "9" * (WORDS_MAX - 3) + "...")),
    (json.dumps({"message": "x\n" * 1000}), Outcome(None, ("x?" * 1000)[:WORDS_MAX - 3] + "...")),
], ids=lambda value: repr(value)[:40])
def test_what_becomes_of_a_command(text, outcome):
    assert read_outcome(text) == outcome


@pytest.mark.parametrize("details", [
    None, 5, [], {}, {"causes": None}, {"causes": {}}, {"causes": [None, 5, []]}, {"causes": [{"reason": "ExitCode"}]},
    *({"causes": [{"reason": "ExitCode", "message": message}]} for message in
      ("", "-1", "+5", "0x5", " 7", "7 ", "7\n", "1_0", "\u0663", "9" * 10, 7.5, None, ["7"])),
], ids=repr)
def test_an_exit_code_that_is_none(details):
    text = json.dumps({"status": "Failure", "reason": "NonZeroExitCode", "message": "m", "details": details})
    assert read_outcome(text) == Outcome(None, "m")


# -- the whole, over sockets -------------------------------------------------------------------


class Client:
    """A machine on a socket, which has been upgraded."""

    def __init__(self, server: StreamServer, path: str, asked: tuple[str, ...]):
        self.sock = socket.create_connection(server.address, timeout=10)
        host, port = server.address
        path = f"/api/v1/namespaces/default/pods/web/{path}"
        self.sock.sendall(upgrade_request(host, port, path, new_key(), [("Sec-WebSocket-Protocol", ", ".join(asked))]))
        head = b""
        while (answer := parse_answer(head)) is None:
            head += self.sock.recv(65536)
        assert answer.status == 101
        self.rest, self.protocol = head[answer.end:], check_protocol(answer.headers["sec-websocket-protocol"], asked)

    def run(self, machine: Machine, until: type) -> list:
        """The events up to one of this type."""
        events: list = []
        while not any(isinstance(event, until) for event in events):
            self.sock.sendall(machine.take())
            data = self.rest or self.sock.recv(65536)
            assert data, "the end"
            self.rest = b""
            events += joined(machine.receive(data))
        self.sock.sendall(machine.take())
        return joined(events)


def test_a_tunnel_over_a_socket(stream_server):
    client = Client(stream_server, "portforward", (TUNNEL,))
    with client.sock:
        tunnel = Tunnel(False)
        call = tunnel.forward(ECHO)
        tunnel.send(call, b"x" * 200_000)
        tunnel.end(call)
        events = client.run(tunnel, Ended)
        assert sum(len(event.data) for event in events if isinstance(event, Data)) == 200_000
        refused = tunnel.forward(REFUSED)
        assert client.run(tunnel, Told) == [Accepted(refused), Told(refused, REFUSAL)]


def test_a_port_over_a_socket(stream_server):
    for port, until, last in ((ECHO, Closed, Ended), (REFUSED, Closed, Told)):
        client = Client(stream_server, f"portforward?ports={port}", PORTS)
        with client.sock:
            ports = Ports(port, False)
            ports.send(ports.call, b"bye")
            assert isinstance(client.run(ports, until)[-2], last)


@pytest.mark.parametrize("asked, protocol", [(COMMANDS, V5), ((V4,), V4)])
def test_a_command_over_a_socket(stream_server, asked, protocol):
    client = Client(stream_server, "exec?command=exit&command=7&stdin=true&stdout=true&stderr=true", asked)
    with client.sock:
        assert client.protocol == protocol
        command = Command(client.protocol, False)
        command.send(command.call, b"abc")
        assert Data(command.call, "stdout", b"abc") in client.run(command, Data)
        if command.end(command.call):
            events = client.run(command, Closed)
            (told,) = [event for event in events if isinstance(event, Told)]
            assert read_outcome(told.text).code == 7


# -- kubectl -----------------------------------------------------------------------------------


@pytest.fixture
def kubectl(stream_server: StreamServer, tmp_path: pathlib.Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The words of a kubectl that asks our server, over WebSocket; its environment."""
    environ = {"HOME": str(tmp_path), "PATH": "", "KUBECONFIG": "/dev/null", "KUBECTL_PORT_FORWARD_WEBSOCKETS": "true",
               "KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "true"}
    path = kubectl_path()
    version = json.loads(execute(path, "version", "--client", "-o", "json", env=environ).stdout)["clientVersion"]
    if int(re.match(r"\d+", version["minor"])[0]) < 30:
        pytest.skip(f"kubectl {version['gitVersion']} does not speak WebSocket")
    return (path, "--server", "http://{}:{}".format(*stream_server.address), "--namespace", "default"), environ


def test_kubectl_forwards_through_a_tunnel(kubectl, stream_server):
    words, environ = kubectl
    with subprocess.Popen([*words, "port-forward", "pod/web", f":{ECHO}", "--address", HOST], env=environ,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        try:
            port = int(re.search(r":(\d+) -> 7", child.stdout.readline())[1])
            for number in range(5):
                said = random.Random(number).randbytes(50_000)
                with socket.create_connection((HOST, port), timeout=10) as client, client.makefile("rb") as file:
                    client.sendall(said)
                    client.shutdown(socket.SHUT_WR)
                    assert file.read() == said
            ((protocol, far),) = stream_server.upgrades
            assert protocol == TUNNEL
            wait_until(lambda: "data" not in [headers["streamtype"] for headers in list(far.streams.values())],
                       what="the end of the last stream, which kubectl says when its client has gone")
        finally:
            child.kill()


def test_kubectl_runs_a_command_in_channels(kubectl, stream_server):
    """Its end of stdin is the two bytes that we send, too."""
    words, environ = kubectl
    ended = execute(*words, "exec", "-i", "pod/web", "--", "exit", "7", env=environ, said=b"abc" * 10_000)
    assert (ended.returncode, ended.stdout) == (7, b"abc" * 10_000), ended.stderr
    assert [protocol for protocol, _ in stream_server.upgrades] == [V5]
    said = list(ClientMessages().read(bytes(stream_server.said)))
    assert [payload for _, payload in said if payload[:1] == b"\xff"] == [b"\xff\0"]
