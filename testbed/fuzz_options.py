"""fuzz_options: targets of testbed/fuzz.py for Kubernetes, for the registry with Redis and DNS, and for NodePass.

Messages of errors are read by people, so no byte of a secret may be in them: seeds have SECRET where secrets stand.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from typing import Any, Callable, Iterable

import sniroute_channels as channels
import sniroute_children as children
import sniroute_claims as claims
import sniroute_conversations as conversations
import sniroute_dns as dns
import sniroute_kubeconfig as kubeconfig
import sniroute_layers as layers
import sniroute_mcp as mcp
import sniroute_nodeurl as nodeurl
import sniroute_objects as objects
import sniroute_owners as owners
import sniroute_plugins as plugins
import sniroute_probes as probes
import sniroute_registry as registry
import sniroute_resp as resp
import sniroute_signals as signals
import sniroute_spdy as spdy
import sniroute_upgrade as upgrade
import sniroute_yaml as yaml
from sniroute_names import normalise, parse_network
from sniroute_options import HTTP_MODES
from sniroute_refusals import Failed, Malformed, SettingsError
from sniroute_registrar import Claimed
from testbed import objects as things
from testbed.endure_inputs import pieces, server_frame
from testbed.fuzz_oracles import No, Told, choice_of, dice_of, expect, measured, outcome, prefixes, same, sliced
from testbed.fuzz_preludes import text_of

SECRET = "pa55w0rd-9f8e7d6c5b4a"

# -- SPDY and channels -------------------------------------------------------------------------


def shown(events: Iterable[Any], calls: list[spdy.Call]) -> list[Any]:
    """Events as they are compared: calls by their place, neighbouring data joined."""
    found: list[Any] = []
    for event in events:
        parts = [calls.index(part) if isinstance(part, spdy.Call) else bytes(part) if isinstance(part, memoryview)
                 else part
                 for part in event]
        kind = type(event).__name__
        if kind == "Data" and found and found[-1][:3] == (kind, *parts[:2]):
            parts[2] = found.pop()[3] + parts[2]
        found.append((kind, *parts))
    return found


CONTROLS = (spdy.Pong, channels.Closed)


def hear_machine(machine: Any, calls: list[spdy.Call], parts: Iterable[bytes]) -> Told:
    """Feed a machine of either room; what its control frames mean is told behind the rest, so it is apart."""
    heard: list[Any] = []
    for part in parts:
        found = outcome(machine.receive, part)
        if isinstance(found, No):
            return Told(None, found)
        heard += [event if not isinstance(event, spdy.Data) else event._replace(data=memoryview(bytes(event.data)))
                  for event in found]
        expect(all(len(call.text) <= spdy.TEXT_MAX for call in calls), "a text that is too long")
        kept = getattr(machine, "part", b"")
        expect(len(kept) <= spdy.CONTROL_MAX + spdy.HEADER, f"{len(kept)} bytes are kept")
    is_spdy = type(machine) is spdy.Session
    plain = [event for event in heard if is_spdy or not isinstance(event, CONTROLS)]
    told = shown(plain, calls), [] if is_spdy else shown((event for event in heard if isinstance(event, CONTROLS)),
                                                         calls)
    stands = [sorted((stream.name, stream.state) for stream in call.streams.values()) for call in calls]
    out = bytes(machine.take())
    expect(len(out) <= 2 * spdy.REPLIES_MAX + 4096, f"{len(out)} bytes are to be sent")
    return Told((told, shown(machine.lost(), calls), out if is_spdy or not isinstance(machine, channels.Tunnel)
                 else b""), stands)


def hear_spdy(parts: Iterable[bytes]) -> Told:
    """A session with two forwards and a command: streams 1 and 3, 5 and 7, 9 to 15."""
    session = spdy.Session()
    calls = [session.forward(80), session.forward(81), session.command()]
    session.end(calls[1])
    session.ping()
    session.take()
    return hear_machine(session, calls, parts)


def spdy_session(data: bytes) -> None:
    """What a node says in SPDY."""
    sliced(data, hear_spdy)


def hear_tunnel(parts: Iterable[bytes]) -> Told:
    tunnel = channels.Tunnel(True)
    calls = [tunnel.forward(80), tunnel.command()]
    tunnel.take()
    return hear_machine(tunnel, calls, parts)


def spdy_tunnel(data: bytes) -> None:
    """The same in messages of WebSocket."""
    sliced(data, hear_tunnel)


def hear_ports(parts: Iterable[bytes]) -> Told:
    ports = channels.Ports(8080, True)
    ports.ping()
    ports.take()
    return hear_machine(ports, [ports.call], parts)


def port_channels(data: bytes) -> None:
    """A port in channels."""
    sliced(data, hear_ports)


def command_channels(data: bytes) -> None:
    """A command in channels, of either version."""
    def hear(parts: Iterable[bytes]) -> Told:
        command = channels.Command(channels.COMMANDS[choice_of(data, 2)], True)
        command.end(command.call)
        command.take()
        return hear_machine(command, [command.call], parts)
    sliced(data, hear)


def command_status(data: bytes) -> None:
    """What became of a command: never an exception."""
    found = channels.read_outcome(data.decode("utf-8", "replace"))
    expect((found.code is None or found.code >= 0) and found.words.isprintable(), f"{found!r}")
    expect(len(found.words) <= channels.WORDS_MAX + 3, f"words of {len(found.words)} characters")


# -- YAML and kubeconfigs ----------------------------------------------------------------------


def yaml_text(data: bytes) -> None:
    """A text: JSON of what it says means the same; so it does with other line ends."""
    found = measured(data, lambda: outcome(yaml.parse_yaml, data, allowed=(yaml.YamlError,)))
    if isinstance(found, No):
        expect(SECRET[-12:] not in found.words, f"a message with a secret: {found.words}")
        return
    value = yaml.data(found)
    text = json.dumps(value, allow_nan=False)
    if not any(len(key) > yaml.KEY_MAX - 2 for key in keys_of(value)):
        again = yaml.data(yaml.parse_yaml(text.encode()))
        same(json.dumps(again), json.dumps(value), "written as JSON")
    if b"\r" not in data and not data.startswith(b"\xef\xbb\xbf"):
        lines = yaml.data(yaml.parse_yaml(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")))
        same(json.dumps(lines), text, "with CRLF and a BOM")


def keys_of(value: Any) -> Iterable[str]:
    """All keys of a value."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield json.dumps(key)
            yield from keys_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from keys_of(each)


def no_file(path: str) -> bytes:
    """A folder where nothing is."""
    raise FileNotFoundError(2, "No such file or directory")


SECRETS = re.compile(rb"^ +(?:token: |password: |proxy-url: \w+://u:)%b(?:@|$)" % SECRET.encode(), re.MULTILINE)


def kubeconfig_file(data: bytes) -> None:
    """A kubeconfig, and each of its contexts."""
    def read(path: str) -> bytes:
        return data if path == "/k" else no_file(path)
    is_secret = data.count(SECRET[-12:].encode()) == len(SECRETS.findall(data)) == 1
    config = measured(data, lambda: outcome(kubeconfig.load_kubeconfig, ["/k"], read,
                                            allowed=(kubeconfig.KubeconfigError,)))
    if isinstance(config, No):
        expect(not is_secret or SECRET[-12:] not in config.words, f"a secret: {config.words}")
        return
    for name in ("", *list(config.contexts)[:8]):
        found = outcome(kubeconfig.find_context, config, name, read, allowed=(kubeconfig.KubeconfigError,))
        if not isinstance(found, No):
            expect(0 < found.cluster.port < 65536 and found.cluster.host, f"{found.cluster.host}:{found.cluster.port}")
            expect(SECRET not in repr(found.user) or not is_secret, "a secret in a repr")
        else:
            expect(not is_secret or SECRET[-12:] not in found.words, f"a secret: {found.words}")


def plugin_answer(data: bytes) -> None:
    """What a credential plugin prints."""
    plugin = PLUGIN
    found = outcome(plugins.read_credential, plugin, data, allowed=(kubeconfig.KubeconfigError,))
    expect(isinstance(found, (No, plugins.Credential)), f"{found!r}")


# -- objects of Kubernetes ---------------------------------------------------------------------


def kube_target(data: bytes) -> None:
    """A target as people write it, and as a program is told."""
    text = text_of(data)
    for jump in (False, True):
        found = outcome(objects.parse_target, text, jump)
        if isinstance(found, No):
            continue
        same(objects.parse_target(found.text.removeprefix("jump:"), jump), found, "written again")
        word = outcome(objects.argument_of, [found])
        if not isinstance(word, No):
            same(objects.parse_argument(word), (found,), f"told as {word!r}")
    outcome(objects.parse_argument, text)


TARGETS = tuple(objects.parse_target(text) for text in (
    "prod/svc/web:80", "prod/svc/web:http", "prod/deploy/web:http", "prod/pod/web:80", "prod/pods/app=web:http"))
JUMPS = tuple(objects.parse_target(text, True) for text in ("prod/svc/web/db.internal:5432",
                                                            "prod/pod/web/192.0.2.1:80"))


def kube_object(data: bytes) -> None:
    """An object in the JSON of an API server, whatever it is asked for."""
    try:
        thing = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(thing, dict):
        return
    for target in (*TARGETS, *JUMPS):
        plan = outcome(objects.KINDS[target.kind].plan, target, thing, allowed=(Failed,))
        if isinstance(plan, No):
            continue
        expect(plan.list_path().isascii() and plan.list_path().isprintable(), f"a path {plan.list_path()!r}")
        pods = outcome(lambda: list(plan.read(thing)), allowed=(Failed,))
        if not isinstance(pods, No):
            for pod in pods:
                choice = outcome(objects.choice_of, target, plan, pod, allowed=(Failed,))
                expect(isinstance(choice, (No, objects.Choice, type(None))), f"{choice!r}")
            outcome(objects.lacking, target, plan, pods, allowed=(Failed,))


# -- Redis, and conversations that are watched -------------------------------------------------


def redis_answers(data: bytes) -> None:
    """What a Redis answers; and any words in a command of ours."""
    def hear(parts: Iterable[bytes]) -> Told:
        reader, found = resp.Reader(), []
        for part in parts:
            said = outcome(lambda: found.extend(reader.feed(part)))
            expect(len(reader.groups) <= resp.DEPTH_MAX and reader.size <= resp.SIZE_MAX, "a bound")
            if isinstance(said, No):
                return Told(None, said)
        for each in found:
            if isinstance(each, resp.ErrorReply):
                expect(resp.failure(each).reason in resp.REASONS, f"{each!r} has no reason")
        return Told(repr(found), (reader.kind, reader.need, len(reader.groups)))
    sliced(data, hear)
    words = [data[:7], "é", 12, data]
    same(list(resp.Reader().feed(resp.encode(*words))), [[data[:7], "é".encode(), b"12", data]], "a command of ours")


def urls(data: bytes) -> None:
    """URLs of a Redis and of a zone; their faults repeat no secret."""
    text = text_of(data)
    place = outcome(resp.parse_url, text, allowed=(ValueError,))
    if isinstance(place, No):
        expect(SECRET[-12:] not in place.words or "@" not in text, f"a secret: {place.words}")
    else:
        same((str(place), repr(place.login) in ("None", "<login>")), (str(place._replace(login=None)), True),
             "the login is shown")
    zone = outcome(dns.parse_url, text, allowed=(ValueError,))
    if not isinstance(zone, No):
        expect(1 <= zone.ttl <= dns.TTL_MAX and 0 < zone.port < 65536, f"{zone!r}")
        same(dns.read_name(dns.write_name(zone.name), 0)[0], zone.name, "its name on the wire")
    key = outcome(dns.parse_key, "router", text, allowed=(ValueError,))
    expect(isinstance(key, No) or len(key.secret) >= dns.SECRET_LEAST, "a short secret")


MARKER = b"\0<--\0"  # between what a client says and what a server answers


def watched(data: bytes) -> None:
    """Conversations whose connections may serve another client: in pieces they are as clean as whole."""
    up, _, down = data.partition(MARKER)

    def hear(make: Callable[[], Any], cut: bool) -> Any:
        machine = make()
        for part in pieces(up, dice_of(up)) if cut else [up]:
            machine.client_said(part)
        for part in pieces(down, dice_of(down)) if cut else [down]:
            machine.server_said(part)
        expect(len(machine.up.part) + len(machine.down.part) <= 2 * conversations.LINE_MAX + 8, "what is kept")
        return machine.is_spoilt, machine.clean

    for make in (conversations.Redis, conversations.Http):
        same(hear(make, True), measured(data, hear, make, False), f"{make.__name__} in pieces, and whole")


def probed(data: bytes) -> None:
    """What a backend answers to a check: a verdict, in the end."""
    for kind in ("postgres", "redis", "mysql", "http"):
        dialogue = probes.Dialogue(probes.Question(probes.Health(kind, 0, "/"), "", "192.0.2.1"))
        dialogue.begin()
        for part in pieces(data, dice_of(data)):
            if dialogue.verdict is None:
                dialogue.receive(part)
        if dialogue.verdict is None:
            dialogue.receive(b"")
        expect(dialogue.verdict is not None and dialogue.verdict.why.isprintable(), "no verdict at the end")


def proxies(data: bytes) -> None:
    """What a proxy says on the way to a server."""
    for scheme, login in (("http", None), ("socks5", None), ("socks5", b"user:" + SECRET.encode())):
        proxy = kubeconfig.Proxy(scheme, "192.0.2.1", 1080, login and kubeconfig.Secret(login), kubeconfig.Secret(b""))

        def talk() -> str:
            going = layers.TALKS[scheme](proxy, "db.example.com", 443)
            next(going)
            try:
                for part in pieces(data, dice_of(data)):
                    going.send(part)
            except StopIteration:
                return "through"
            return "waits"
        outcome(talk, allowed=(Failed,))


# -- DNS ---------------------------------------------------------------------------------------

KEY = dns.parse_key("router", base64.b64encode(b"secret" * 6).decode())
ZONE = dns.parse_url("rfc2136://ns.example.com/tun.example.com?key=router&address=192.0.2.1,2001:db8::1")
MARK = dns.Mark("7f", ZONE.addresses)
HERE = "foo.tun.example.com"
ASKED = dns.claim(ZONE, KEY, 77, 1_700_000_000.0, HERE, MARK)


def dns_message(data: bytes) -> None:
    """A message, and whether it is the answer to one of ours; written plainly it says the same."""
    found = measured(data, lambda: outcome(dns.parse, data))
    answer = outcome(dns.read_answer, data, ASKED, KEY)
    if not isinstance(answer, No):
        expect(answer.code or found.signature and found.signature.mac, "success without a proof")
        expect(answer.reason in ("", *dns.REASONS), f"a reason {answer.reason!r}")
    if isinstance(found, dns.Message):
        records = *found.answers, *found.others
        if found.signature is None and not any("\\" in record.name for record in records):
            plain = struct.pack(">6H", found.number, found.flags, 0, len(found.answers), len(found.others),
                                0) + b"".join(
                (dns.write_name(record.name) if record.name else b"\0")
                + struct.pack(">HHIH", record.kind, record.group, record.ttl, len(record.data)) + record.data
                for record in records)
            same(dns.parse(plain), found, "written plainly")
        for record in records:
            mark = dns.read_mark(record.data)
            expect(mark is None or mark.data == record.data, "a mark in another spelling")
    buffer = outcome(dns.unframe, data)
    if isinstance(buffer, bytes):
        same(dns.frame(buffer), data[:len(buffer) + 2], "a frame")
    prefixes(data[:64], dns.unframe)
    mark = dns.read_mark(data)
    expect(mark is None or mark.data == data, "a mark in another spelling")


# -- the registry ------------------------------------------------------------------------------

RULES = owners.Rules(("tun.example.com",), targets=("tcp", "carrier", "cloudflared", "nodepass"),
                     networks=tuple(map(parse_network, ("192.0.2.0/24", "2001:db8::/32"))), ports=(20000, 20010))
ALICE = owners.Owner("alice", (b"a" * 32,))
BOB = ALICE._replace(name="bob", names=("*.bob.tun.example.com",), allow_clients=(parse_network("192.0.2.0/24"),))


def claim_body(data: bytes) -> None:
    """The body of a claim, and of a change."""
    for owner in (ALICE, BOB):
        wish = measured(data, lambda: outcome(owners.parse_wish, data, RULES, owner, allowed=(owners.Unfit,)))
        change = outcome(owners.parse_change, data, owners.CHANGES, RULES, owner, allowed=(owners.Unfit,))
        if isinstance(change, dict):
            expect(change.keys() <= set(owners.CHANGES), f"{change.keys()}")
        if not isinstance(wish, No):
            expect(owners.TTL_MIN <= wish.ttl <= RULES.max_ttl, f"a ttl of {wish.ttl}")
            if wish.key is not None and not wish.is_port:
                same(normalise(wish.key.encode()), wish.key, "the name")
                same(owners.claim_name(wish.key, RULES, owner), wish.key, "claimed again")
            same(owners.check_target(wish.target, RULES, owner), wish.target, "the target")
            json.dumps(wish.meta, allow_nan=False).encode()


def claim_text(data: bytes) -> None:
    """A claim as a store has it."""
    found = outcome(registry.from_text, data, 5.0, allowed=(ValueError,))
    if isinstance(found, No):
        return
    same(registry.from_text(registry.to_text(found), 5.0), found, "kept again")
    table = claims.Table(lambda: 0.0)
    table.put(found)
    expect(table.find(found.key) == found and (not found.key or table.page(found.owner) == [found]),
           "it is not in the table")
    for owner in (ALICE, BOB):
        fault = owners.standing(found, RULES, owner)
        expect(fault.isprintable(), f"words that nobody can print: {fault!r}")
        route = Claimed(table, lambda claim: None if fault else owner, lambda address: True).route_of(found)
        expect(route is None or route.http in (None, *HTTP_MODES), f"a route {route!r}")


def owner_table(data: bytes) -> None:
    """The table of the registry, as JSON says what TOML would."""
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(table, dict):
        outcome(owners.read_registry, table, allowed=(SettingsError, ValueError))


# -- NodePass ----------------------------------------------------------------------------------

SIGNAL_KEY = b"capkey"


def signal_lines(data: bytes) -> None:
    """The control channel; a signal that was read is written and read again."""
    def hear(parts: Iterable[bytes]) -> Told:
        reader, found = signals.SignalReader(SIGNAL_KEY), []
        for part in parts:
            said = outcome(reader.feed, part)
            if isinstance(said, No):
                return Told(None, said)
            expect(len(reader.rest) <= signals.LINE_MAX, "a line that is kept")
            found += [str(each) if isinstance(each, Malformed) else each for each in said]
        return Told(found, bytes(reader.rest))
    told = sliced(data, hear)
    for signal in told.events or ():
        if isinstance(signal, signals.Signal):
            same(signals.decode(signals.encode(signal, SIGNAL_KEY)[:-1], SIGNAL_KEY), signal, "written and read")


def signal_json(data: bytes) -> None:
    """The same, from what is inside the disguise."""
    line = base64.b64encode(signals.disguise(data, SIGNAL_KEY)) + b"\n" if data else b"\n"
    signal_lines(line)


def handshake(data: bytes) -> None:
    """What a client asks, and what a server answers."""
    asked = prefixes(data, signals.parse_ask)
    if isinstance(asked, signals.Ask):
        expect(0 < asked.end <= min(len(data), signals.ASK_MAX), f"an end at {asked.end}")
    terms = prefixes(data, lambda said: signals.parse_terms(said, False))
    ended = outcome(signals.parse_terms, data, True)
    expect(ended is not None, "nothing, at the end")
    if isinstance(terms, signals.Terms):
        same(ended, terms, "at the end, and before")
    if isinstance(ended, signals.Terms):
        expect(1 <= ended.max <= signals.POOL_MAX, f"a pool of {ended.max}")
        same(signals.parse_terms(signals.answer(ended, "Sun, 29 Nov 2026 12:00:00 GMT"), False), ended,
             "answered again")
    line = data.decode("utf-8", "replace")
    point = signals.parse_checkpoint(line)
    if point is not None:
        names = ("mode", "ping", "pool", "tcps", "udps", "tcprx", "tcptx", "udprx", "udptx")
        same(signals.parse_checkpoint(signals.checkpoint(*(point[name] for name in names))), point, "told again")


def datagrams(data: bytes) -> None:
    """Datagrams over a stream."""
    most = (signals.DATAGRAM_MAX, 64)[choice_of(data, 2)]

    def hear(parts: Iterable[bytes]) -> Told:
        reader, found = signals.DatagramReader(most), []
        for part in parts:
            said = outcome(reader.feed, part)
            if isinstance(said, No):
                return Told(None, said)
            found += said
            expect(len(reader.rest) < most + 2, "what is kept")
        return Told(found, bytes(reader.rest))
    told = sliced(data, hear)
    if told.events is not None:
        same(b"".join(map(signals.frame_datagram, told.events)) + told.stands, data, "written again")


def node_url(data: bytes) -> None:
    """A URL, and flags in lines: what is shown means the same, and has no key."""
    text = text_of(data)
    found = measured(data, lambda: outcome(nodeurl.parse_url, text, allowed=(SettingsError,)))
    outcome(nodeurl.parse_flags, ("server", "client", "master")[choice_of(data, 3)], text.split("\n"),
            allowed=(SettingsError,))
    if isinstance(found, No):
        is_key = text.count(SECRET[-12:]) == text.count(f"://{SECRET}@") == 1
        expect(not is_key or SECRET[-12:] not in found.words, f"a secret: {found.words}")
        return
    for full in (False, True):
        again = nodeurl.parse_url(nodeurl.show(found, full, True))
        if full and found.scheme != "master":  # a default that is filled in: the server's name
            again = again._replace(sni=found.sni)
        same(again, found, nodeurl.show(found, full, True))
    if len(found.key) > 12:
        rest = nodeurl.show(found._replace(key=""), True, False)
        expect(found.key not in repr(found) or found.key in rest, "the key in a repr")


def node_times(data: bytes) -> None:
    """Variables: a name of VARIABLES by the first byte, and its value."""
    if data:
        name = list(nodeurl.VARIABLES)[data[0] % len(nodeurl.VARIABLES)]
        times, faults = nodeurl.read_times({name: text_of(data[1:])})
        expect(times.min_interval <= times.max_interval and all(each.isprintable() for each in faults), f"{faults}")
        value = outcome(nodeurl.parse_duration, text_of(data[1:]), allowed=(ValueError,))
        if not isinstance(value, No):
            again = nodeurl.parse_duration(nodeurl.show_duration(value))
            expect(abs(again - value) <= 1e-9 + value * 1e-12, f"{value} is shown as {nodeurl.show_duration(value)}")


def instance_record(data: bytes) -> None:
    """What a master keeps of an instance, and what a client asks to change of one."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        fields = None
    change = outcome(children.parse_change, fields, allowed=(children.NotDone,))
    text = data.decode("utf-8", "replace")
    found = outcome(children.instance_of, "1a2b3c4d", text, allowed=(ValueError, KeyError, TypeError))
    if not isinstance(found, No):
        kept = children.record_of(found)
        same(children.record_of(children.instance_of("1a2b3c4d", kept)), kept, "kept again")
        if not isinstance(change, No):
            outcome(children.apply, found, change, allowed=(children.NotDone,))


class Desk:
    """A master without instances."""

    version = "0.1.0"

    class instances:
        """None."""

        table: dict[str, Any] = {}

        @staticmethod
        def find(ident: str) -> None:
            return None

        @staticmethod
        def create(alias: str, url: str) -> None:
            raise children.NotDone(400, "no instances here")

    def info(self) -> dict[str, Any]:
        return {}

    def rename(self, alias: str) -> None:
        children.check_value("Master alias", alias)

    def tcping(self, target: str, done: Any) -> None:
        done({"connected": False, "error": target})


def mcp_body(data: bytes) -> None:
    """A call of MCP: one answer, or none, which is JSON."""
    if b"port_instances" in data:  # these write and read files
        return
    answers: list[Any] = []
    mcp.answer(data, Desk(), answers.append)  # type: ignore[arg-type]
    expect(len(answers) == 1, f"{len(answers)} answers")
    json.dumps(answers[0]).encode()


# -- seeds -------------------------------------------------------------------------------------

frame = spdy.control_frame


def data_frame(stream: int, data: bytes = b"", flags: int = 0) -> bytes:
    """A data frame of SPDY."""
    return spdy.data_head(stream, len(data), flags) + data


def server_message(data: bytes, opcode: int = upgrade.BINARY, final: bool = True) -> bytes:
    """A message, or a part of one, as a server sends it."""
    return server_frame(0x80 * final | opcode, data)


SUCCESS = b'{"metadata":{},"status":"Success"}'


def spdy_frames() -> list[bytes]:
    """What a node may say."""
    deflater = spdy.Deflater()
    replies = b"".join(frame(spdy.SYN_REPLY, struct.pack(">I", number) + deflater.block([]))
                       for number in (1, 3, 5, 7, 9))
    rst = frame(spdy.RST_STREAM, struct.pack(">II", 3, 5))
    ends = data_frame(1, b"no such port") + data_frame(1, b"", 1) + data_frame(3, b"", 1)
    others = (
        frame(spdy.SETTINGS, struct.pack(">III", 1, 4, 100)) + frame(spdy.PING, struct.pack(">I", 1))
              + frame(spdy.PING, struct.pack(">I", 2)) + frame(spdy.WINDOW_UPDATE, struct.pack(">II", 3, 9))
              + frame(spdy.SYN_STREAM, struct.pack(">IIH", 2, 0, 0) + deflater.block([(b"a", b"b")]))
        + data_frame(2, b"x"))
    return [replies + data_frame(3, b"hello") + ends, replies + data_frame(7, b"a" * 40, 1) + rst
            + data_frame(3, b"late"),
            others + replies + frame(spdy.GOAWAY, struct.pack(">II", 0, 0)) + data_frame(13, b"out")
            + data_frame(15, b"err"),
            replies + data_frame(9, SUCCESS, 1) + data_frame(13, b"", 1) + data_frame(15, b"", 1),
            frame(spdy.HEADERS, struct.pack(">I", 3) + deflater.block([]), 1) + data_frame(99, b"none"), rst]


def tunnel_frames() -> list[bytes]:
    """The same in messages, in ways of cutting."""
    found = [b"".join(server_message(said[at:at + 9]) for at in range(0, len(said), 9)) for said in spdy_frames()]
    return [*found, *(server_message(said) for said in spdy_frames()), server_message(b"ping", upgrade.PING) + found[0],
            found[1] + server_message(b"\3\xe8bye", upgrade.CLOSE)]


PORT_BYTES = (8080).to_bytes(2, "little")
PREFACES = server_message(b"\0" + PORT_BYTES) + server_message(b"\1" + PORT_BYTES)
PORT_SEEDS = [PREFACES + server_message(b"\0hello") + server_message(b"\3\xe8", upgrade.CLOSE),
              PREFACES + server_message(b"\1no such port"), PREFACES + server_message(b"1", upgrade.PONG),
              server_message(b"\0" + PORT_BYTES + b"hello", 2, False) + server_message(b"more", 0)]
COMMAND_SEEDS = [server_message(b"\1") + server_message(b"\1out") + server_message(b"\2err")
                 + server_message(b"\3" + SUCCESS) + server_message(b"\xff\1")
                 + server_message(b"\3\xe8", upgrade.CLOSE),
                 server_message(b"\1a", 2, False) + server_message(b"", upgrade.PING) + server_message(b"b", 0)]
STATUS_SEEDS = [SUCCESS, b"command terminated",
                b'{"status":"Failure","reason":"NonZeroExitCode","message":"m",'
                b'"details":{"causes":[{"reason":"ExitCode",'
                b'"message":"7"}]}}']

YAML_SEEDS = [f"""apiVersion: v1
clusters:
- cluster: {{server: "https://[::1]:6443", a: 'it''s'}}
  name: x # comment
users:
- name: u
  user:
    token: {SECRET}
    n: [1, -2.5e3, 0x1f, ~, yes, 1_000, "a\\tb\\u00e9\\ud83d\\ude00"]
    hint: >-
      folded
      text

      para
    lit: |+
      a
        b

""".encode(), b'{"a": [1, 2, {"b": null}], "c": "d"}', b"- a\n- - b\n  - c: d\n    e:\n    - f\n-\n  g: |2-\n      x\n"
                                                       b"    y\n",
    b'---\n"multi\n  line \\\n  text \\x41"\n...\n', b"a: b c\n  d\n\n  e\nf: 'g\n\n  h'\n? x\n", b"1.5", b"",
    b"a: &x 1\nb: *x\n<<: y\n", b"[a, b: c, {d, e: }, 'f': g]"]
YAML_WORDS = (b": ", b"- ", b"\n", b"\n  ", b"#", b" #", b"'", b'"', b"\\", b"{", b"}", b"[", b"]", b", ", b"|", b">",
              b"|-",
              b"|+\n", b">2\n", b"\t", b"---\n", b"...\n", b"&a ", b"*a", b"!t ", b"? ", b"~", b"\\u0041", b"<<: ",
              b"\r\n",
              b"0x", b"1_0", b".5", b"e9", b"null", b"true", b"\xc2\x85", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"@", b"`",
              b"%")


def one(cluster: str, user: str) -> bytes:
    """A kubeconfig with one context."""
    return (f"apiVersion: v1\nkind: Config\ncurrent-context: x\nclusters:\n- name: c\n  cluster:\n    {cluster}\n"
            f"users:\n- name: u\n  user:\n    {user}\ncontexts:\n- name: x\n  context: {{cluster: c, user: u}}\n"
            ).encode()


def b64(data: bytes) -> str:
    """For `-data` of a kubeconfig."""
    return base64.b64encode(data).decode()


PEM = b64(b"-----BEGIN CERTIFICATE-----\nYWJj\n-----END CERTIFICATE-----\n")
PRIVATE = b64(b"-----BEGIN EC PRIVATE KEY-----\nc2VjcmV0LWtleQ==\n-----END EC PRIVATE KEY-----\n")
KUBECONFIG_SEEDS = [
    one("server: https://192.0.2.1:6443", f"token: {SECRET}"),
    one(f"server: https://api.example.com/k8s/x/\n    certificate-authority-data: {PEM}\n    tls-server-name: "
        f"a.example.com\n"
        f"    proxy-url: socks5://u:{SECRET}@192.0.2.9:1080",
        f"client-certificate-data: {PEM}\n    client-key-data: {PRIVATE}"),
    one("server: http://[::1]:8080\n    insecure-skip-tls-verify: true\n    disable-compression: true",
        f"username: a\n    password: {SECRET}"),
    one("server: https://192.0.2.1", "exec: {apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, "
        "command: aws, args: [a, b], env: [{name: A, value: b}], provideClusterInfo: true}\n    as: me\n    "
        "as-groups: [a]"),
    one("server: https://192.0.2.1", "tokenFile: /t"), b"{}", b""]
PLUGIN = kubeconfig.find_context(kubeconfig.parse_kubeconfig("/k", KUBECONFIG_SEEDS[3]), "", no_file).user.plugin
PLUGIN_SEEDS = [json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
                            "status": each}).encode()
                for each in ({"token": SECRET, "expirationTimestamp": "2026-11-29T12:00:00Z"},
                             {"clientCertificateData": "-----BEGIN CERTIFICATE-----", "clientKeyData": "x"}, {})]

TARGET_SEEDS = [b"prod/svc/web:80", b"prod/pods/app=web,tier=api:http@main", b"prod/pod/shell/db.internal:5432@a@b",
                b"jump:prod/deploy/web/[2001:db8::1]:80?container=tools&balance=least@main", b"a/sts/b.c:65535",
                b"prod/svc/web:80|prod/svc/web:81@arn:aws:eks:eu-west-1:123:cluster/x"]
OBJECT_SEEDS = [json.dumps(each).encode() for each in (
    things.pod("web", ports={"http": 8080}, sidecar_ports={"x": 1}, default="main"),
    things.pod("web", ready=False, waiting="x"),
    things.service(((80, "http", "http", "TCP"), (81, None))),
    things.service(selector={}, type="ExternalName", externalName="x"),
    things.workload({"app": "web"}, ({"key": "a", "operator": "In", "values": ["b"]},)))]
REDIS_SEEDS = [b"+OK\r\n:12\r\n$5\r\nhello\r\n$-1\r\n*-1\r\n*2\r\n:1\r\n$0\r\n\r\n",
               b"-ERR no\r\n-READONLY x\r\n!7\r\nSYN err\r\n",
               b"%1\r\n+a\r\n~2\r\n#t\r\n,1.5\r\n_\r\n(123456789012345678901\r\n=8\r\ntxt:some\r\n>2\r\n+m\r\n+x\r\n",
               b"|1\r\n+ttl\r\n:3\r\n*1\r\n*1\r\n*0\r\n,inf\r\n,nan\r\n", resp.encode("SET", "a", b"\r\n"),
               b"%1\r\n*0\r\n+a\r\n", b"*" + b"9" * 12 + b"\r\n"]
URL_SEEDS = [b"redis://user:" + SECRET.encode() + b"@redis.example.com:6380/3", b"rediss://[2001:db8::1]",
             b"redis://:a%40b@h",
             b"redis+sentinel://:x@a:1,b:2,[::1]:3/main/1", b"rfc2136://ns.example.com:5353/tun.example.com?key=rout"
                                                            b"er&ttl=60",
             b"rfc2136://[::1]/z.example.com?key=k&address=192.0.2.1,2001:db8::1", base64.b64encode(bytes(32))]
WATCHED_SEEDS = [resp.encode("GET", "a") + resp.encode("MGET", "a", "b") + MARKER
                 + b"$1\r\nx\r\n*2\r\n$1\r\na\r\n$-1\r\n",
                 b"PING\r\n" + MARKER + b"+PONG\r\n",
                 b"GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok" + MARKER
                 + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 204 X\r\n\r\n",
                 b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + MARKER
                 + b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nA: b\r\n\r\n"]
PROBE_SEEDS = [b"N", b"S", b"E\0\0\0\x0aSFATAL\0\0", b"+PONG\r\n", b"-NOAUTH x\r\n",
               b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
               b"HTTP/1.0 503 X\r\n\r\n", b"\x4a\0\0\0\x0a8.0.36\0" + bytes(8)
               + b"12345678\0\xff\xff\xff\2\0\xff\xdf\x15"
               + bytes(10) + b"123456789012\0caching_sha2_password\0", b"\x07\0\0\2\0\0\0\2\0\0\0",
               b"\x10\0\0\0\xff\x15\4#08S01too many", b"R\0\0\0\x08\0\0\0\0Z\0\0\0\5I"]
PROXY_SEEDS = [b"HTTP/1.1 200 Connection established\r\n\r\n", b"HTTP/1.0 407 X\r\nA: b\r\n\r\n",
               b"\5\0\5\0\0\1\1\2\3\4\0\x50",
               b"\5\2\1\0\5\0\0\3\4abcd\0\x50", b"\5\xff", b"\5\0\5\5\0\1", b"\5\0\5\0\0\4" + bytes(18)]


def dns_seeds() -> list[bytes]:
    """Requests of ours, and answers to one."""
    def reply(code: int, *records: dns.Record) -> bytes:
        writer = dns.Writer(77, dns.RESPONSE | dns.UPDATE << 11 | code, (1, len(records), 0, 0))
        writer.question("tun.example.com", 6)
        for record in records:
            writer.record(record)
        return bytes(writer.out)
    text = dns.Record(HERE, dns.TXT, dns.IN, 60, MARK.data)
    signed = [dns.sign(reply(code), KEY, 1_700_000_000, asked=ASKED.mac)[0] for code in (0, 6)]
    late = dns.sign(reply(9), KEY, 1_700_000_000, error=18, other=bytes(6), asked=ASKED.mac)[0]
    return [ASKED.wire, dns.frame(ASKED.wire), reply(5), reply(0, text), *signed, late, MARK.data,
            dns.sign(reply(0, text, dns.address_record(HERE, ZONE.addresses[0], 60)), KEY, 1_700_000_000,
                     asked=ASKED.mac)[0],
            dns.look_up(KEY, 7, 1_700_000_000.0, HERE).wire]


CLAIM_SEEDS = [json.dumps(each).encode() for each in (
    {"name": "shop", "target": "tcp:192.0.2.10:8080", "ttl": 60, "allow": ["192.0.2.0/25"], "http": "forward",
     "meta": {"version": "1.2", "a": [1, {"b": None}]}, "while_connected": True, "takeover": False},
    {"port": None, "target": "tcp:[2001:db8::1]:80"}, {"port": 20001, "target": "carrier:x.example.com"}, {"ttl": 30},
    {"name": None, "target": "cloudflared:db.example.com"}, {"name": "x.bob.tun.example.com.", "target": "tcp:db:5432"},
    {"name": "xn--mnchen-3ya", "target": "nodepass:key@192.0.2.1:10101"}, {"name": "shop", "port": 1, "x": 1e5})]
CLAIM_TEXTS = [registry.to_text(registry.Claim(
    key="shop.tun.example.com", id="1", owner="alice", target="tcp:192.0.2.1:80", lease="l", generation=3, ttl=60.0,
    hold=600.0,
    expires=0.0, allow=("192.0.2.0/24",), meta={"a": 1})).encode()]
OWNER_SEEDS = [json.dumps({"domains": ["tun.example.com"], "targets": ["tcp"], "networks": ["192.0.2.0/24"],
                           "ttl": "60s",
                           "ports": "20000-20010", "owners": {"alice": {
                               "token": "sha256:" + "0a" * 32, "names": ["*.alice.tun.example.com"],
                               "max_names": "5"}}}).encode()]

SIGNAL_SEEDS = [signals.encode(signals.Signal("tcp", "192.0.2.1:5000", "0a1b2c3d"), SIGNAL_KEY)
                + signals.encode(signals.Signal("ping"), SIGNAL_KEY), signals.encode(signals.Signal(
                    "verify", "", "0a1b2c3d", "sha256:" + "ab" * 32), SIGNAL_KEY), b"\r\n", b"e30=\n"]
SIGNAL_JSON = [b'{"action":"tcp","remote":"192.0.2.1:5000","id":"0a1b2c3d"}',
               b'{"Action":"udp","ID":"","fp":null,"x":[1]}',
               b'{"action":"verify","action":"ping"}', b"[]", b"null", b'{"action":"\\u0131\\u212a"}']
TERMS = signals.Terms("-", 1024, 1, 0, "0123456789abcdef")
HANDSHAKE_SEEDS = [signals.ask("db.example.com", signals.token_of("key"), True),
                   signals.answer(TERMS, "Sun, 29 Nov 2026 12:00:00 GMT"),
                   b"CONNECT 192.0.2.1:80 HTTP/1.1\r\nHost: a\r\nProxy-Authorization: Basic a2V5Og==\r\n\r\n",
                   *signals.REFUSED.values(), signals.checkpoint(1, 20, 3, 4, 5, 6, 7, 8, 9).encode(),
                   b'HTTP/1.1 200 OK\r\n\r\n{"flow":"+","max":0,"tls":"2","type":"3"}\n',
                   b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2c\r\n"
                   b'{"flow":"+","max":1,"tls":"0","type":"0"}   \r\n0\r\n\r\n']
DATAGRAM_SEEDS = [b"".join(map(signals.frame_datagram, (b"", b"hello", bytes(60)))), b"\0\1", b"\xff\xff" + bytes(100)]
NODE_URL_SEEDS = [b"server://" + SECRET.encode() + b"@:10101/127.0.0.1:8080?max=10&tls=1&log=debug&type=2&proxy=1",
                  b"client://k%40y@nat.example.com:10101/[::1]:8080,192.0.2.1:81?min=4&mode=1&dns=1m30s&read=0&"
                  b"rate=10&slot=5",
                  b"master://0.0.0.0:9090/api?tls=2&crt=/a&key=/b",
                  b"server://[2001:db8::1]:1/x.example.com:2?block=12&notcp=1",
                  b"client://h:1/h:2?pin=sha256:" + b"ab" * 32 + b"&sni=a.example.com&dial=192.0.2.1&lbs=1&type=3",
                  b"--tunnel-addr\n192.0.2.1\n--tunnel-port=1\n--target-addr=::1\n--target-port\n2\n--password="
                  + SECRET.encode()]
TIME_SEEDS = [bytes((number,)) + value for number in range(len(nodeurl.VARIABLES))
              for value in (b"5s", b"1m30.5s", b"100ms", b"8192", b"0", b"1h2m3s4us", "1.5\u00b5s".encode())]


def record_seeds() -> list[bytes]:
    """Instances as a file has them, and changes."""
    made = children.Instance("1a2b3c4d", "server", "server://k@192.0.2.1:1/192.0.2.2:2",
                             "server://k@192.0.2.1:1/192.0.2.2:2?log=info")
    made.alias, made.tags = "a", {"b": "c"}
    return [children.record_of(made).encode(), b'{"alias":"x","action":"start","restart":true,'
                                               b'"meta":{"peer":{"sid":"1","type":"2",'
            b'"alias":"3"},"tags":{"a":"b","c":null}}}', b'{"alias":null}']


def mcp_seeds() -> list[bytes]:
    """Each tool, once."""
    calls = [{"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": {"name": name, "arguments": {
        "id": "1a2b3c4d", "alias": "a", "url": "server://:1/:2", "action": "start", "target": "192.0.2.1:80",
        "tags": {"a": "b"},
        "tunnel_address": "192.0.2.1", "log": "info"}}} for number, name in enumerate(mcp.TOOLS)]
    return [json.dumps(each).encode() for each in (*calls, {"jsonrpc": "2.0", "id": 1, "method": "initialize"},
                                                   {"jsonrpc": "2.0", "method": "notifications/x"},
                                                   {"jsonrpc": "2.0", "id": "a", "method": "tools/list"})]


JSON_WORDS = (b'"', b"{}", b"[]", b"null", b"true", b"1e999", b"-0", b"NaN", b'"\\ud800"', b'"\\u0000"', b": ", b", ",
              b"[[",
              b"1.5", b"99999999999999999999999", b'""', b'{"a":', b'"\\u202e"', b"\xed\xa0\x80", b"0.1e-999")
