"""Tests of sniroute_mcp.py: what a client of MCP is answered, by a master with stand-ins."""

from __future__ import annotations

import json
import os
import stat
import urllib.parse

import pytest

from conftest import HOST, wait_until
from sniroute_instances import KEY_ID
from sniroute_mcp import PARAMETERS, TOOLS
from sniroute_nodeurl import PARAMETERS as OF_URLS
from testbed.masters import url

# What docs/mcp.md of NodePass offers.
NAMES = ["list_instances", "get_instance", "create_instance", "update_instance", "control_instance",
         "set_instance_basic", "set_instance_security", "set_instance_connection", "set_instance_network",
         "set_instance_protocol", "set_instance_traffic", "set_instance_advanced", "get_instance_config",
         "delete_instance", "export_instances", "import_instances", "tcping_target", "get_master_info",
         "update_master_info"]


def test_a_client_begins(shared_master):
    said = shared_master.mcp("initialize", {"protocolVersion": "2025-11-25", "capabilities": {}})
    assert said == {"jsonrpc": "2.0", "id": 1, "result": {
        "protocolVersion": "2025-11-25", "capabilities": {"tools": {}},
        "serverInfo": {"name": "NodePass Master", "version": "0.1.0"}}}


def test_the_tools_are_the_originals_and_each_says_what_it_takes(shared_master):
    tools = shared_master.mcp("tools/list")["result"]["tools"]
    assert [tool["name"] for tool in tools] == NAMES
    for tool in tools:
        schema = tool["inputSchema"]
        assert tool["description"] and schema["type"] == "object"
        assert set(schema.get("required", ())) <= schema["properties"].keys()
        assert all(each["description"] and each["type"] in ("string", "boolean", "object")
                   for each in schema["properties"].values()), tool["name"]
    assert OF_URLS.keys() - PARAMETERS.keys() == {"pin"}, "our own, for set_instance_advanced"


@pytest.mark.parametrize("body, code, data", [
    (b"", -32700, "no JSON"), (b"{", -32700, "no JSON"), (b"[]", -32700, "object"), (b"[" * 60000, -32700, "no JSON"),
    ({"id": 1, "method": "initialize"}, -32600, "jsonrpc must be 2.0"),
    ({"jsonrpc": "2.0", "id": 1, "method": "tools/drop"}, -32601, "tools/drop"),
    ({"jsonrpc": "2.0", "id": 1}, -32601, ""), ({"jsonrpc": "2.0", "id": 1, "method": ["x"]}, -32601, ""),
    ({"jsonrpc": "2.0", "id": 1, "method": "tools/call"}, -32602, "params"),
    ({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": []}, -32602, "params"),
    ({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": ["x"]}}, -32602, "unknown tool"),
    ({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "x", "arguments": {}}}, -32602,
     "unknown tool")])
def test_what_cannot_be_done_is_an_error_of_json_rpc(shared_master, body, code, data):
    said = shared_master.ask("POST", "/api/v2", body)
    assert (said.status, said.json["error"]["code"]) == (200, code) and data in said.json["error"]["data"]
    assert said.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("ident, shown", [(0, 0), ("a", "a"), (1.5, 1.5), (None, ...), ([1], ...), (True, ...)])
def test_a_response_has_the_id_of_its_request(shared_master, ident, shown):
    assert shared_master.mcp("initialize", ident=ident).get("id", ...) == shown


def test_a_notification_gets_no_response(shared_master):
    said = shared_master.ask("POST", "/api/v2", {"jsonrpc": "2.0", "method": "notifications/initialized"})
    assert (said.status, said.body) == (202, b"")


def test_an_instance_from_its_beginning_to_its_end(master):
    there = master()
    assert there.tool("list_instances")["instances"] == []
    made = there.tool("create_instance", role="server", tunnel_address=HOST, tunnel_port="10101", target_address=HOST,
                      target_port="10102", password="good", alias="mine", log="warn", type="2", rate="", nonsense="x")
    assert made["content"] == [{"type": "text", "text": f"Created instance {made['instance']['id']}"}]
    ident = made["instance"]["id"]
    assert made["instance"]["url"] == "server://good@127.0.0.1:10101/127.0.0.1:10102?log=warn&type=2"
    shown = there.until(ident, status="running", ping=3)
    assert there.tool("get_instance", id=ident)["content"][0]["text"] == "Instance: mine (running)"
    found = there.tool("list_instances")
    assert (found["content"][0]["text"], [each["id"] for each in found["instances"]]) == ("Found 1 instances", [ident])
    said = there.tool("control_instance", id=ident, action="stop")
    assert said["content"][0]["text"] == f"Controlled instance {ident}: stop"
    assert there.until(ident, status="stopped")["tcprx"] >= shown["tcprx"]
    assert there.tool("control_instance", id=ident, action="reset")["instance"]["tcprx"] == 0
    assert there.tool("delete_instance", id=ident)["content"][0]["text"] == f"Deleted instance {ident}"
    assert there.tool("get_instance", id=ident) == "instance not found"


def test_an_instance_with_several_targets(master):
    said = master().tool("create_instance", role="client", tunnel_port="9", target_port="1",
                         targets="a.example.com:1,b.example.com:2", mode="1")
    assert said["instance"]["url"] == "client://:9/a.example.com:1,b.example.com:2?log=info&mode=1"


@pytest.mark.parametrize("tool, arguments, changes", [
    ("set_instance_basic", {"role": "client", "tunnel_port": "7", "log": ""}, {"scheme": "client", "port": 7}),
    ("set_instance_basic", {"targets": "a.example.com:1,b.example.com:2"}, {
        "path": "/a.example.com:1,b.example.com:2"}),
    ("set_instance_basic", {"target_address": "192.0.2.1"}, {"path": "/192.0.2.1:10102"}),
    ("set_instance_security", {"password": "other", "tls": "1"}, {"username": "other", "tls": "1"}),
    ("set_instance_security", {"password": ""}, {"username": None}),
    ("set_instance_connection", {"type": "2", "max": "9", "mode": ""}, {"scheme": "server", "type": "2", "max": "9"}),
    ("set_instance_network", {"dns": "1h", "rate": ""}, {"dns": "1h", "rate": None}),
    ("set_instance_protocol", {"noudp": "1"}, {"noudp": "1"}),
    ("set_instance_traffic", {"block": "12", "lbs": "2"}, {"block": "12", "lbs": "2"}),
    ("set_instance_advanced", {"parameters": {"min": 8, "type": "3"}}, {"min": "8", "type": "3", "scheme": "server"})])
def test_a_tool_changes_its_part_of_the_url(master, tool, arguments, changes):
    there = master()
    ident = there.create(query="rate=5")
    there.until(ident, status="running", ping=3)
    said = there.tool(tool, id=ident, **arguments)
    assert said["instance"]["status"] == "stopped"
    parts = urllib.parse.urlsplit(said["instance"]["url"])
    query = dict(urllib.parse.parse_qsl(parts.query))
    assert {name: query.get(name) if name in OF_URLS else getattr(parts, name) for name in changes} == changes
    wait_until(lambda: there.show(ident)["status"] in ("running", "error"))


@pytest.mark.parametrize("tool, arguments, data", [
    ("get_instance", {}, "id is required"), ("get_instance", {"id": 5}, "id is required"),
    ("get_instance", {"id": "x"}, "instance not found"), ("update_instance", {"id": KEY_ID}, "forbidden: API Key"),
    ("delete_instance", {"id": KEY_ID}, "forbidden: API Key"),
    ("set_instance_basic", {"id": KEY_ID, "log": "warn"}, "forbidden: API Key"),
    ("get_instance_config", {"id": KEY_ID}, "forbidden: API Key"),
    ("create_instance", {"role": "master"}, "role must be 'server' or 'client'"),
    ("create_instance", {"role": "server", "tunnel_port": "1"}, "Invalid URL format"),
    ("create_instance", {"role": "server", "tunnel_port": "1", "target_port": "2", "type": "1"}, "QUIC"),
    ("control_instance", {"id": "ID"}, "id and action are required"),
    ("control_instance", {"id": "ID", "action": "explode"}, "invalid action"),
    ("set_instance_basic", {"id": "ID"}, "no updates provided"), ("set_instance_connection", {"id": "ID", "min": ""},
                                                                  "no updates provided"),
    ("set_instance_basic", {"id": "ID", "tunnel_port": "10101"}, "no changes detected"),
    ("set_instance_basic", {"id": "ID", "role": "master"}, "Invalid URL scheme"),
    ("set_instance_network", {"id": "ID", "dial": "x"}, "dial"),
    ("set_instance_advanced", {"id": "ID", "parameters": {}}, "parameters object is required"),
    ("set_instance_advanced", {"id": "ID", "parameters": "x"}, "parameters object is required"),
    ("update_instance", {"id": "ID", "alias": "x" * 257}, "maximum length 256"),
    ("update_instance", {"id": "ID", "tags": {"x" * 257: 1}}, "maximum length 256"),
    ("update_instance", {"id": "ID", "peer": {"sid": "x" * 257}}, "maximum length 256"),
    ("update_master_info", {}, "alias is required"), ("update_master_info", {"alias": "x" * 257}, "max length 256"),
    ("tcping_target", {}, "target is required")])
def test_what_a_tool_refuses_changes_nothing(shared_master, tool, arguments, data):
    ident = shared_master.still
    before = shared_master.show(ident)
    said = shared_master.tool(tool, **{name: ident if value == "ID" else value for name, value in arguments.items()})
    assert isinstance(said, str) and data in said
    assert shared_master.show(ident) == before and list(shared_master.master.instances.table) == [ident]


def test_what_is_noted_of_an_instance_is_changed_field_by_field(master):
    there = master()
    ident = there.ended()
    there.tool("update_instance", id=ident, peer={"sid": "1", "alias": "b"}, tags={"n": 1, "t": "x", "o": {"a": None}})
    said = there.tool("update_instance", id=ident, alias="new", restart=False, peer={"sid": "2", "what": "x"})
    shown = said["instance"]
    assert (shown["alias"], shown["restart"]) == ("new", False)
    assert shown["meta"] == {"peer": {"sid": "2", "type": "", "alias": "b"},
                             "tags": {"n": "1", "t": "x", "o": '{"a": null}'}}


@pytest.mark.parametrize("given, wanted", [
    ("server://good@127.0.0.1:10101/127.0.0.1:10102?tls=1", {
        "role": "server", "password": "good", "tunnel_address": HOST, "tunnel_port": "10101", "target_address": HOST,
        "target_port": "10102"}),
    ("client://[2001:db8::1]:1/[::1]:2", {"role": "client", "tunnel_address": "2001:db8::1", "tunnel_port": "1",
                                         "target_address": "::1", "target_port": "2"}),
    ("client://:9/a.example.com:1,b.example.com:2", {"role": "client", "tunnel_address": "", "tunnel_port": "9",
                                                    "targets": "a.example.com:1,b.example.com:2"})])
def test_the_parts_of_a_url_are_shown(master, given, wanted):
    there = master()
    ident = there.ask("POST", "/instances", {"url": given}).json["id"]
    config = there.tool("get_instance_config", id=ident)["config"]
    query = config.pop("parameters")
    assert config == wanted and query["dns"] == "5m0s" and query["log"] == "info"


def test_all_instances_go_to_a_file_and_come_back(master, tmp_path):
    there = master()
    ident = there.create(alias="mine")
    there.ask("PATCH", f"/instances/{ident}", {"meta": {"tags": {"a": "b"}}})
    there.until(ident, ping=3)
    there.ask("PATCH", f"/instances/{ident}", {"action": "stop", "restart": False})
    before = there.until(ident, status="stopped")
    path = tmp_path / "nodepass.json"
    assert there.tool("export_instances")["content"][0]["text"] == f"Exported 1 instances to {path}"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600, "the keys are in it"
    there.ask("DELETE", f"/instances/{ident}")
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, {"url": url("x", "master")}, {"url": 5}, 7, {**rows[0], "alias": "x" * 300}]))
    assert there.tool("import_instances")["content"][0]["text"] == f"Imported 1 instances from {path}"
    (after,) = there.tool("list_instances")["instances"]
    assert after["id"] != ident and {**after, "id": ident, "mode": 2} == {**before, "status": "stopped"}


def test_files_in_a_folder_of_everybodys_are_neither_read_by_others_nor_theirs(master, tmp_path):
    """The folder is as /tmp: there others may make the files first."""
    there = master()
    there.create()
    tmp_path.chmod(0o1777)
    path, early = tmp_path / "nodepass.json", tmp_path / f"nodepass.json.{os.getpid()}"
    early.touch()
    early.chmod(0o666)
    with open(early) as theirs:
        assert "Exported 1" in there.tool("export_instances")["content"][0]["text"]
        assert theirs.read() == "", "keys for whoever has made it"
    path.chmod(0o666)
    said = there.mcp("tools/call", {"name": "import_instances"})
    assert "can be changed by other users: chmod o-w" in said["error"]["data"]
    assert len(there.tool("list_instances")["instances"]) == 1


@pytest.mark.parametrize("text", [None, b"{", b"[" * 100000, b"\xff"])
def test_a_file_that_cannot_be_read_is_an_error(master, tmp_path, text):
    if text is not None:
        (tmp_path / "nodepass.json").write_bytes(text)
    said = master().mcp("tools/call", {"name": "import_instances"})
    assert said["error"]["code"] == -32603 and str(tmp_path / "nodepass.json") in said["error"]["data"]


def test_a_file_that_cannot_be_written_is_an_error(master, tmp_path):
    (tmp_path / "nodepass.json").mkdir()
    said = master().mcp("tools/call", {"name": "export_instances"})
    assert said["error"] == {"code": -32603, "message": "Internal error",
                             "data": f"{tmp_path / 'nodepass.json'}: Is a directory"}


def test_the_master_and_its_targets(master, serve):
    there = master()
    far = serve(lambda sock: None)
    target = f"{HOST}:{far.address[1]}"
    said = there.tool("tcping_target", target=target)
    assert said["result"]["connected"] and said["content"][0]["text"].startswith(f"TCPing {target}: connected in ")
    assert there.tool("tcping_target", target="x")["content"][0]["text"].startswith("TCPing x: failed: ")
    said = there.tool("update_master_info", alias="mine")
    assert (said["content"][0]["text"], said["info"]["alias"]) == ("Master alias updated to: mine", "mine")
    assert there.tool("get_master_info")["info"]["mid"] == there.master.instances.key.config


def test_without_the_key_there_is_nothing(shared_master):
    said = shared_master.ask("POST", "/api/v2", {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, key=None)
    assert said.status == 401 and set(TOOLS) == set(NAMES)
