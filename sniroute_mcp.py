"""sniroute_mcp: the master's answers to MCP, without I/O.

    POST {prefix}/v2 --- answer(body, desk, done) ---> METHODS: initialize, tools/list
                                                       tools/call --> TOOLS: a row each --> Instances, by the Desk
    done(response) <------------------------------------------------- at once, or once a process has ended

MCP is JSON-RPC 2.0.  A response has HTTP's status 200, whether it is a result or an error.  A notification, as
`notifications/initialized`, gets no response: `done(None)`.  The original answers it with an error, which clients take
for a broken server.

The names, the parameters and the texts of the tools are the original's.  One thing is not: it takes the pool `type`
that set_instance_connection sets for the scheme of the URL, and refuses it.  Here the scheme is `role`, and only that.

Threads: the master's loop.  All that waits is done by the Desk, which calls back.

Seams: I want to ...
    offer another tool             a row of TOOLS
    let one set another parameter  PARAMETERS, and the row of SETTERS

This room imports sniroute_instances and sniroute_children.

Sources: JSON-RPC 2.0 Specification; Model Context Protocol, revision 2025-11-25; docs/mcp.md of NodePass.
"""

from __future__ import annotations

import functools
import json
from typing import Any, Callable, Mapping, NamedTuple, Protocol, Sequence

from sniroute_children import VALUE_MAX, Change, Instance, NotDone, changed, parameters, parse_change, split
from sniroute_instances import ACTIONS, KEY_ID, Instances, bring_in, export, export_path

__version__ = "0.1.0"

PROTOCOL = "2025-11-25"  # the revision of MCP
PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603
MEANINGS = {PARSE_ERROR: "Parse error", INVALID_REQUEST: "Invalid Request", NO_METHOD: "Method not found",
            INVALID_PARAMS: "Invalid params", INTERNAL: "Internal error"}

Response = dict[str, Any]
Done = Callable[[dict[str, Any]], None]


class Wrong(Exception):
    """A call that is answered with an error; the text is its `data`."""

    def __init__(self, data: str, code: int = INVALID_PARAMS):
        super().__init__(data)
        self.code = code


class Desk(Protocol):
    """What the master does beside its instances."""

    instances: Instances
    version: str

    def info(self) -> dict[str, Any]:
        """The master, and its host."""

    def rename(self, alias: str) -> None:
        """Another alias for the master.  Raises NotDone."""

    def tcping(self, target: str, done: Done) -> None:
        """Try to connect to a target; `done` gets its row."""


# -- JSON-RPC ----------------------------------------------------------------------------------


def result_of(ident: Any, result: Mapping[str, Any]) -> Response:
    """A response with a result."""
    return {"jsonrpc": "2.0", **({} if ident is None else {"id": ident}), "result": result}


def error_of(ident: Any, code: int, data: str) -> Response:
    """A response with an error."""
    return {"jsonrpc": "2.0", **({} if ident is None else {"id": ident}),
            "error": {"code": code, "message": MEANINGS[code], "data": data}}


def answer(body: bytes, desk: Desk, done: Callable[[Response | None], None]) -> None:
    """Do what a body asks for.  `done` is called once with the response, now or later; None: there is none."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        done(error_of(None, PARSE_ERROR, "the body is no JSON"))
        return
    if not isinstance(asked, dict):
        done(error_of(None, PARSE_ERROR, "the body is no JSON object"))
        return
    ident, method, params = asked.get("id"), asked.get("method"), asked.get("params")
    if type(ident) not in (str, int, float, type(None)):
        ident = None  # no other type is an id
    if asked.get("jsonrpc") != "2.0":
        done(error_of(ident, INVALID_REQUEST, "jsonrpc must be 2.0"))
    elif not isinstance(method, str) or method not in METHODS:
        is_notification = ident is None and isinstance(method, str) and method.startswith("notifications/")
        done(None if is_notification else error_of(ident, NO_METHOD, str(method or "")))
    else:
        try:
            METHODS[method](desk, params, lambda result: done(result_of(ident, result)),
                            lambda data: done(error_of(ident, INTERNAL, data)))
        except Wrong as error:
            done(error_of(ident, error.code, str(error)))
        except NotDone as error:
            done(error_of(ident, INVALID_PARAMS, str(error)))


def initialize(desk: Desk, params: Any, done: Done, failed: Callable[[str], None]) -> None:
    """Who we are."""
    done({"protocolVersion": PROTOCOL, "capabilities": {"tools": {}},
          "serverInfo": {"name": "NodePass Master", "version": desk.version}})


def list_tools(desk: Desk, params: Any, done: Done, failed: Callable[[str], None]) -> None:
    """All tools, with the schemas of their arguments."""
    done({"tools": [{"name": name, "description": tool.says, "inputSchema": schema(tool)}
                    for name, tool in TOOLS.items()]})


def call_tool(desk: Desk, params: Any, done: Done, failed: Callable[[str], None]) -> None:
    """One tool.  Raises Wrong, and NotDone."""
    arguments = params.get("arguments") if isinstance(params, dict) else None
    if not isinstance(params, dict) or not isinstance(arguments, dict | None):
        raise Wrong("params must have a name, and arguments that are an object")
    tool = TOOLS.get(params.get("name")) if isinstance(params.get("name"), str) else None
    if tool is None:
        raise Wrong("unknown tool")
    tool.act(Call(desk, arguments or {}, done, failed))


METHODS: dict[str, Callable[[Desk, Any, Done, Callable[[str], None]], None]] = {
    "initialize": initialize, "tools/list": list_tools, "tools/call": call_tool}


# -- tools -------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of a tool."""

    desk: Desk
    arguments: Mapping[str, Any]
    done: Done
    failed: Callable[[str], None]  # with a fault of ours

    def text(self, name: str) -> str:
        """An argument that is a text; "" where there is none, or it is something else."""
        value = self.arguments.get(name)
        return value if isinstance(value, str) else ""

    def say(self, text: str, **more: Any) -> None:
        """The result: a text for people, and fields for programs."""
        self.done({"content": [{"type": "text", "text": text}], **more})

    def instance(self, is_changed: bool = True) -> Instance:
        """The instance that is meant.  Raises Wrong; the API key is none that a tool may change."""
        ident = self.text("id")
        if not ident:
            raise Wrong("id is required")
        if is_changed and ident == KEY_ID:
            raise Wrong("forbidden: API Key")
        found = self.desk.instances.find(ident)
        if found is None:
            raise Wrong("instance not found")
        return found


class Tool(NamedTuple):
    """A tool, as a row."""

    says: str
    act: Callable[[Call], None]
    takes: Mapping[str, Any]  # its arguments, with their schemas
    needs: Sequence[str] = ()


def schema(tool: Tool) -> dict[str, Any]:
    """The JSON Schema of a tool's arguments."""
    return {"type": "object", "properties": dict(tool.takes), **({"required": list(tool.needs)} if tool.needs else {})}


def text(says: str, *words: str) -> dict[str, Any]:
    """The schema of an argument that is a text, or one of these words."""
    return {"type": "string", "description": says, **({"enum": list(words)} if words else {})}


ID, ALIAS = {"id": text("The instance's id")}, {"alias": text("A name for people")}
PARAMETERS: dict[str, dict[str, Any]] = {  # all that makes a URL
    "role": text("Which end it is", "server", "client"),
    "tunnel_address": text("The host of the tunnel"), "tunnel_port": text("The port of the tunnel"),
    "target_address": text("The host of the target"), "target_port": text("The port of the target"),
    "targets": text("Several targets instead of one: host:port,host:port"),
    "password": text("The key that both ends have"),
    "log": text("What is logged", "none", "debug", "info", "warn", "error", "event"),
    "tls": text("TLS: 0 none, 1 a certificate made at the start, 2 one from files", "0", "1", "2"),
    "crt": text("With tls=2, the file of the certificate"), "key": text("With tls=2, the file of its key"),
    "sni": text("The name that the client sends and checks"),
    "dns": text("How long an address is remembered, as 5m"),
    "lbs": text("Of several targets: 0 in turn, 1 the fastest, 2 the first that works", "0", "1", "2"),
    "mode": text("0 as it fits, 1 accepts callers here or forwards alone, 2 the other way round", "0", "1", "2"),
    "type": text("The kind of pool, at the server: 0 TCP, 1 QUIC (not here), 2 WebSocket, 3 HTTP/2",
                 "0", "1", "2", "3"),
    "min": text("Connections that a client keeps ready"), "max": text("Connections that are ready at most"),
    "dial": text("The address from which targets are dialled, or auto"),
    "read": text("How long a connection may be silent, as 1h; 0 for ever"),
    "rate": text("Megabits a second; 0 without limit"), "slot": text("Callers at once; 0 without limit"),
    "proxy": text("A PROXY header for the target: 0 none, 1 version 1", "0", "1"),
    "block": text("What callers may not speak: 1 SOCKS, 2 HTTP, 3 TLS, or several, as 123"),
    "notcp": text("1: no TCP", "0", "1"), "noudp": text("1: no UDP", "0", "1")}


def of(*names: str) -> dict[str, Any]:
    """The schemas of these PARAMETERS, behind an id."""
    return {**ID, **{name: PARAMETERS[name] for name in names}}


def show_all(call: Call) -> None:
    """list_instances"""
    found = [each.show() for each in call.desk.instances.table.values()]
    call.say(f"Found {len(found)} instances", instances=found)


def show_one(call: Call) -> None:
    """get_instance"""
    found = call.instance(is_changed=False)
    call.say(f"Instance: {found.alias} ({found.status})", instance=found.show())


def create(call: Call) -> None:
    """create_instance"""
    role = call.text("role")
    if role not in ("server", "client"):
        raise Wrong("role must be 'server' or 'client'")
    updates = {name: value for name in PARAMETERS if (value := call.text(name)) and name != "role"}
    if "targets" in updates:
        updates.pop("target_address", None)
        updates.pop("target_port", None)
    made = call.desk.instances.create(changed(f"{role}://:/:", updates), call.text("alias"))
    call.say(f"Created instance {made.id}", instance=made.show())


def update(call: Call) -> None:
    """update_instance: a field of `peer` that is missing stays as it is."""
    found = call.instance()
    peer, tags, restart = (call.arguments.get(name) for name in ("peer", "tags", "restart"))
    fields: dict[str, Any] = {"alias": call.text("alias")}
    if isinstance(restart, bool):
        fields["restart"] = restart
    meta: dict[str, Any] = {}
    if isinstance(peer, dict):
        meta["peer"] = {**found.peer, **{name: value for name, value in peer.items() if isinstance(value, str)}}
    if isinstance(tags, dict):
        meta["tags"] = {name: as_text(value) for name, value in tags.items()}
    call.desk.instances.change(found, parse_change({**fields, "meta": meta}))
    call.say(f"Updated instance {found.id}", instance=found.show())


def as_text(value: Any) -> str:
    """A value of JSON as a text."""
    return value if isinstance(value, str) else json.dumps(value)


def control(call: Call) -> None:
    """control_instance"""
    action = call.text("action")
    if not call.text("id") or not action:
        raise Wrong("id and action are required")
    found = call.instance()
    if action not in ACTIONS:
        raise Wrong("invalid action")
    call.desk.instances.change(found, Change(action=action))
    call.say(f"Controlled instance {found.id}: {action}", instance=found.show())


def point(call: Call, what: str, names: Sequence[str], may_be_empty: Sequence[str]) -> None:
    """set_instance_...: other parts of its URL.  An empty one of `may_be_empty` goes; any other is not looked at."""
    found = call.instance()
    updates = {name: value for name in names if isinstance(value := call.arguments.get(name), str)
               and (value or name in may_be_empty)}
    if not updates:
        raise Wrong("no updates provided")
    edit(call, found, updates, f"Set {what} for instance {found.id}")


def advance(call: Call) -> None:
    """set_instance_advanced"""
    found = call.instance()
    given = call.arguments.get("parameters")
    if not isinstance(given, dict) or not given:
        raise Wrong("parameters object is required")
    edit(call, found, {name: as_text(value) for name, value in given.items()},
         f"Set advanced parameters for instance {found.id}")


def edit(call: Call, found: Instance, updates: Mapping[str, str], said: str) -> None:
    """Change the URL, and answer once its process has ended."""
    url = changed(found.url, updates)
    if url == found.url:
        raise Wrong("no changes detected")
    call.desk.instances.set_url(found, url, lambda: call.say(said, instance=found.show()))


def show_config(call: Call) -> None:
    """get_instance_config"""
    found = call.instance()
    parts = split(found.config)
    place, path = parts.netloc.rpartition("@")[2], parts.path.strip("/")
    host, _, port = place.rpartition(":")
    config: dict[str, Any] = {"role": parts.scheme, "tunnel_address": host.strip("[]"), "tunnel_port": port}
    password = parts.password or parts.username
    if password:
        config["password"] = password
    if "," in path:
        config["targets"] = path
    elif path:
        host, _, port = path.rpartition(":")
        config |= {"target_address": host.strip("[]"), "target_port": port}
    config["parameters"] = dict(reversed(parameters(parts)))
    call.say(f"Instance {found.id} configuration retrieved", config=config)


def delete(call: Call) -> None:
    """delete_instance"""
    found = call.instance()
    call.desk.instances.delete(found, lambda: call.say(f"Deleted instance {found.id}"))


def transfer(call: Call, verb: str, preposition: str) -> None:
    """export_instances, import_instances"""
    instances = call.desk.instances

    def done(result: int | str) -> None:
        if isinstance(result, str):
            call.failed(result)
        else:
            call.say(f"{verb} {result} instances {preposition} {export_path(instances)}")

    (export if verb == "Exported" else bring_in)(instances, done)


def ping(call: Call) -> None:
    """tcping_target"""
    target = call.text("target")
    if not target:
        raise Wrong("target is required")

    def done(result: dict[str, Any]) -> None:
        said = f"connected in {result['latency']}ms" if result["connected"] else f"failed: {result['error']}"
        call.say(f"TCPing {target}: {said}", result=result)

    call.desk.tcping(target, done)


def tell_master(call: Call) -> None:
    """get_master_info"""
    call.say("Master information retrieved", info=call.desk.info())


def rename_master(call: Call) -> None:
    """update_master_info"""
    alias = call.text("alias")
    if not alias:
        raise Wrong("alias is required")
    if len(alias) > VALUE_MAX:
        raise Wrong(f"alias exceeds max length {VALUE_MAX}")
    call.desk.rename(alias)
    call.say(f"Master alias updated to: {alias}", info=call.desk.info())


class Setter(NamedTuple):
    """One of the tools that change a URL: what it sets, and which of these may be empty."""

    says: str
    names: Sequence[str]
    may_be_empty: Sequence[str] = ()

    @property
    def tool(self) -> Tool:
        """Its row."""
        return Tool(f"Set {self.says} of an instance, which starts anew",
                    functools.partial(point, what=self.says, names=self.names, may_be_empty=self.may_be_empty),
                    of(*self.names), ("id",))


SETTERS = {
    "set_instance_basic": Setter("basic configuration", (
        "role", "tunnel_address", "tunnel_port", "target_address", "target_port", "targets", "log")),
    "set_instance_security": Setter("security configuration", ("password", "tls", "crt", "key", "sni"),
                                    ("password", "crt", "key", "sni")),
    "set_instance_connection": Setter("connection configuration", ("mode", "type", "min", "max")),
    "set_instance_network": Setter("network tuning", ("dns", "dial", "read", "rate", "slot"),
                                   ("dns", "dial", "read", "rate", "slot")),
    "set_instance_protocol": Setter("protocol control", ("notcp", "noudp", "proxy"), ("notcp", "noudp", "proxy")),
    "set_instance_traffic": Setter("traffic control", ("block", "lbs"), ("block", "lbs")),
}
TOOLS: dict[str, Tool] = {
    "list_instances": Tool("List all instances", show_all, {}),
    "get_instance": Tool("Show one instance", show_one, ID, ("id",)),
    "create_instance": Tool("Create an instance, and start it", create, {**ALIAS, **PARAMETERS},
                            ("role", "tunnel_port", "target_port")),
    "update_instance": Tool("Change what is noted of an instance: alias, restart, peer, tags", update, {
        **ID, **ALIAS, "restart": {"type": "boolean", "description": "Start it with the master, and after a failure"},
        "peer": {"type": "object", "description": "The other end", "properties": {
            "sid": text("Its service id"), "type": text("Its service type"), "alias": text("Its name for people")}},
        "tags": {"type": "object", "description": "Names and values"}}, ("id",)),
    "control_instance": Tool("Start, stop or restart an instance, or reset its counters", control, {
        **ID, "action": text("What is done", *ACTIONS)}, ("id", "action")),
    **{name: setter.tool for name, setter in SETTERS.items()},
    "set_instance_advanced": Tool("Set any parameters of an instance's URL", advance, {
        **ID, "parameters": {"type": "object", "description": "Names and values"}}, ("id", "parameters")),
    "get_instance_config": Tool("Show the parts of an instance's URL, with all defaults", show_config, ID, ("id",)),
    "delete_instance": Tool("Stop an instance, and remove it", delete, ID, ("id",)),
    "export_instances": Tool("Write all instances to nodepass.json, beside the master's state",
                             functools.partial(transfer, verb="Exported", preposition="to"), {}),
    "import_instances": Tool("Create the instances that nodepass.json has",
                             functools.partial(transfer, verb="Imported", preposition="from"), {}),
    "tcping_target": Tool("Try a TCP connection", ping, {"target": text("host:port")}, ("target",)),
    "get_master_info": Tool("Show the master and its host", tell_master, {}),
    "update_master_info": Tool("Give the master another alias", rename_master, ALIAS, ("alias",)),
}
