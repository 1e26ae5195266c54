"""sniroute_panel: what a master shows: the description of its API, that as a page, and a page of its instances.

    rows of sniroute_master --> Endpoint --- describe ---> OpenAPI, with SCHEMAS --- docs ---> a page without a script
    PAGE, PAGE_POLICY: SCRIPT asks for the API key, fetches v1/instances every two seconds, and shows them

What comes from instances, an alias among it, may be hostile: SCRIPT writes text with textContent, never as HTML, and
the browser enforces that.  PAGE_POLICY allows this very style and script and no other, and its Trusted Types directives
make every attempt to turn text into HTML fail.  The key of a URL is not shown.

Threads: none; nothing here changes after the import.

Seams: I want to ...
    show another column     COLUMNS in SCRIPT
    describe another field  SCHEMAS
    change how it looks     STYLE of sniroute_page

This room imports sniroute_page (style, cards), sniroute_instances and sniroute_children (words, limits).

Sources: OpenAPI Specification 3.1.1; CSP Level 3; Trusted Types.
"""

from __future__ import annotations

import html
import http
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from sniroute_children import GAUGES, TRAFFIC, VALUE_MAX
from sniroute_instances import ACTIONS
from sniroute_page import ICON, STYLE, card, content_hash, table

__version__ = "0.1.0"

V1 = "/v1"  # the version of the API that is described

# -- the description ---------------------------------------------------------------------------


class Endpoint(NamedTuple):
    """What is answered to a method on a path, as a row."""

    method: str
    path: str  # behind the prefix
    act: Callable[[Any], None]  # is given the request, and answers it, at once or later; may raise Declined, NotDone
    says: str  # what it does, for the description
    statuses: tuple[int, ...]  # beside 401 and 405
    body: str = ""  # a key of SCHEMAS
    gives: str = ""  # the same for the answer
    is_list: bool = False  # of these
    query: str = ""  # the one parameter that it wants
    is_public: bool = False  # no key is wanted


# What bodies and answers look like: JSON Schema.
TEXT, FLAG, NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}
LONG = {**NUMBER, "format": "int64"}


def a(kind: Mapping[str, Any], says: str, **more: Any) -> dict[str, Any]:
    """A field of this kind, in words."""
    return {**kind, "description": says, **more}


def an_object(required: Sequence[str] = (), **fields: Any) -> dict[str, Any]:
    """An object with these fields."""
    return {"type": "object", **({"required": list(required)} if required else {}), "properties": fields}


def ref(name: str) -> dict[str, str]:
    """Another schema."""
    return {"$ref": f"#/components/schemas/{name}"}


ALIAS, URL = a(TEXT, "A name for people", maxLength=VALUE_MAX), a(TEXT, "A URL of NodePass, server:// or client://")
SCHEMAS: dict[str, Any] = {
    "Instance": an_object(
        id=a(TEXT, "Its id"), alias=ALIAS, type=a(TEXT, "Which end it is", enum=["client", "server"]),
        status=a(TEXT, "Its state", enum=["running", "stopped", "error"]), url=a(TEXT, "Its URL, or the API key"),
        config=a(TEXT, "Its URL with all defaults, or the id of the master"),
        restart=a(FLAG, "Whether it is started with the master, and after a failure"), meta=ref("Meta"),
        **{name: a(NUMBER, says) for name, says in zip(GAUGES + TRAFFIC, (
            "1 or 2: which way it works", "Milliseconds to the other end", "Connections that are ready",
            "TCP connections of callers", "UDP flows of callers", "Bytes of TCP received", "Bytes of TCP sent",
            "Bytes of UDP received", "Bytes of UDP sent"))}),
    "CreateInstanceRequest": an_object(["url"], alias=ALIAS, url=URL),
    "UpdateInstanceRequest": an_object(alias=ALIAS, action=a(TEXT, "An order", enum=list(ACTIONS)),
                                       restart=a(FLAG, "Whether it is started with the master"), meta=ref("Meta")),
    "PutInstanceRequest": an_object(["url"], url=URL),
    "Meta": an_object(peer=ref("Peer"), tags={"type": "object", "additionalProperties": TEXT,
                                              "description": "Names and values"}),
    "Peer": an_object(sid=a(TEXT, "The other end's service id"), type=a(TEXT, "Its service type"),
                      alias=a(TEXT, "Its name for people")),
    "MasterInfo": an_object(
        mid=a(TEXT, "The id of the master"), alias=ALIAS, os=a(TEXT, "The system"), arch=a(TEXT, "The processor"),
        noc=a(NUMBER, "How many processors"), cpu=a(NUMBER, "Their use in percent; -1: not known"),
        **{name: a(LONG, f"{says}, in bytes") for name, says in (
            ("mem_total", "Memory"), ("mem_used", "Memory in use"), ("swap_total", "Swap"),
            ("swap_used", "Swap in use"), ("netrx", "Received from networks"), ("nettx", "Sent to networks"),
            ("diskr", "Read from disks"), ("diskw", "Written to disks"))},
        sysup=a(LONG, "Seconds since the host has started"), ver=a(TEXT, "The version"),
        name=a(TEXT, "The host of the master's URL"), uptime=a(LONG, "Seconds since the master has started"),
        log=a(TEXT, "Its log level"), tls=a(TEXT, "Its kind of TLS"), crt=a(TEXT, "Its certificate's file"),
        key=a(TEXT, "Its key's file")),
    "UpdateMasterAliasRequest": an_object(["alias"], alias=ALIAS),
    "TCPingResult": an_object(target=a(TEXT, "What was tried"), connected=a(FLAG, "Whether it took the connection"),
                              latency=a(LONG, "Milliseconds"),
                              error=a({"type": ["string", "null"]}, "Why it did not")),
}


def describe(base: str, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The description of version 1, behind this prefix.  Source: OpenAPI Specification 3.1.1."""
    paths: dict[str, Any] = {}
    for row in endpoints:
        if not row.path.startswith(f"{V1}/"):
            continue
        answers = {str(status): {"description": http.HTTPStatus(status).phrase}
                   for status in sorted({*row.statuses, *(() if row.is_public else (401, 405))})}
        if row.gives:
            schema = ref(row.gives)
            if row.is_list:
                schema = {"type": "array", "items": schema}
            answers[str(row.statuses[0])]["content"] = {"application/json": {"schema": schema}}
        entry: dict[str, Any] = {"summary": row.says, "responses": answers,
                                 "security": [] if row.is_public else [{"ApiKeyAuth": []}]}
        if row.body:
            entry["requestBody"] = {"required": True, "content": {"application/json": {"schema": ref(row.body)}}}
        if row.query:
            entry["parameters"] = [{"name": row.query, "in": "query", "required": True, "schema": TEXT}]
        path = paths.setdefault(row.path.removeprefix(V1), {})
        if row.path.endswith("{id}"):
            path["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": TEXT}]
        path[row.method.lower()] = entry
    return {"openapi": "3.1.1", "info": {"title": "NodePass API", "version": "v1",
                                         "description": "A master of sniroute: its NodePass servers and clients"},
            "servers": [{"url": base + V1}], "security": [{"ApiKeyAuth": []}], "paths": paths,
            "components": {"schemas": SCHEMAS, "securitySchemes": {"ApiKeyAuth": {
                "type": "apiKey", "in": "header", "name": "X-API-Key", "description": "the master prints it"}}}}


# -- pages -------------------------------------------------------------------------------------

SCRIPT = r"""
"use strict";
// What comes from instances is written with textContent, never as HTML.  KEY: the key in sessionStorage.
const EVERY = 2000, PATIENCE = 4000, KEY = "sniroute-nodepass-key";
const $ = (id) => document.getElementById(id);
const KINDS = { running: "good", stopped: "quiet", error: "bad" };
const whole = new Intl.NumberFormat("en-GB");
function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let at = 0;
  while (value >= 999.5 && at < units.length - 1) { value /= 1000; at += 1; }
  return (at === 0 || value >= 99.5 ? Math.round(value) : value.toFixed(1)) + " " + units[at];
}
function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}
const COLUMNS = [
  ["State", "state-cell short", (row, cell) => {
    const state = make("span", "state " + (KINDS[row.status] || "quiet"));
    state.append(make("span", "dot"), make("span", "", row.status));
    cell.append(state);
  }],
  ["Alias", "name", (row) => row.alias || row.id],
  ["URL", "name", (row) => row.url.replace(/\/\/[^\/?#]*@/, "//")],
  ["Ping", "number", (row) => row.ping + " ms"],
  ["Pool", "number", (row) => whole.format(row.pool)],
  ["TCP", "number", (row) => whole.format(row.tcps)],
  ["UDP", "number", (row) => whole.format(row.udps)],
  ["Received", "number", (row) => bytes(row.tcprx + row.udprx)],
  ["Sent", "number", (row) => bytes(row.tcptx + row.udptx)],
];
function showPhase(word, kind, about) {
  $("phase").className = "phase " + kind;
  $("phase").lastChild.textContent = word;
  $("about").textContent = about;
}
let shown = "";
function show(rows) {
  const said = JSON.stringify(rows);
  if (said === shown) return;  // what somebody has selected stays selected
  shown = said;
  $("instances").tBodies[0].replaceChildren(...rows.map((row) => {
    const line = make("tr");
    for (const [title, name, fill] of COLUMNS) {
      const cell = make("td", name), text = fill(row, cell);
      cell.dataset.label = title;
      if (text !== undefined) cell.textContent = text;
      line.append(cell);
    }
    return line;
  }));
  $("instances").parentNode.hidden = !rows.length;
  $("instances-empty").hidden = rows.length > 0;
}
let waiting = 0;
async function refresh() {
  clearTimeout(waiting);
  const key = sessionStorage.getItem(KEY);
  $("login").hidden = key !== null;
  if (key === null) return;
  try {
    const answer = await fetch("v1/instances", { cache: "no-store", headers: { "X-API-Key": key },
      signal: AbortSignal.timeout(PATIENCE) });
    const told = await answer.json();
    if (answer.status === 401) {
      sessionStorage.removeItem(KEY);
      $("login").hidden = false;
      showPhase("asking", "quiet", told.error);
      return;
    }
    if (!answer.ok) throw new Error(told.error);
    const rows = told.filter((row) => row.type);
    show(rows);
    const bad = rows.filter((row) => row.status === "error").length;
    showPhase(bad ? bad + " in error" : "running", bad ? "bad" : "good", rows.length + " instances");
  } catch (error) {
    showPhase("no answer", "bad", error.message);
  }
  waiting = setTimeout(refresh, document.hidden ? 5 * EVERY : EVERY);
}
const line = make("tr");
for (const [title, name] of COLUMNS) {
  const cell = make("th", name, title);
  cell.scope = "col";
  line.append(cell);
}
$("instances").tHead.append(line);
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.replace(/[^!-~]/g, ""));
  $("key").value = "";
  refresh();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
"""
HEAD = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sniroute: NodePass</title>
<link rel="icon" href="{ICON}">
<style>{STYLE}</style>
</head>
<body>
"""
PAGE = f"""{HEAD}<header>
<h1>NodePass</h1>
<span class="phase quiet" id="phase" role="status"><span class="dot"></span><span>asking</span></span>
<span class="about" id="about"></span>
<form id="login" hidden><input type="password" id="key" placeholder="API key" aria-label="API key"
autocomplete="off"> <button>Show</button></form>
</header>
<main>
{card("Instances", table("instances", "There is none."), "all")}
</main>
<script>{SCRIPT}</script>
</body>
</html>
""".encode()
FRAMELESS = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
DOCS_POLICY = f"default-src 'none'; style-src {content_hash(STYLE)}; img-src data:; {FRAMELESS}"
PAGE_POLICY = (f"{DOCS_POLICY}; script-src {content_hash(SCRIPT)}; connect-src 'self'; "
               "require-trusted-types-for 'script'; trusted-types 'none'")


def docs(description: Mapping[str, Any]) -> bytes:
    """The description as a page.  It has no script."""
    esc = html.escape
    parts = []
    for path, methods in description["paths"].items():
        for method in [name for name in methods if name != "parameters"]:
            entry = methods[method]
            lines = [f"<p>{esc(entry['summary'])}.{'' if entry['security'] else ' No key is wanted.'}</p><ul>"]
            lines += [f"<li>{esc(each['name'])}: as ?{esc(each['name'])}=</li>" for each in entry.get("parameters", ())]
            if "requestBody" in entry:
                schema = entry["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                lines.append(f"<li>body: {esc(schema)}</li>")
            lines += [f"<li>{status}: {esc(each['description'])}</li>" for status, each in entry["responses"].items()]
            parts.append(card(f"{method.upper()} {esc(description['servers'][0]['url'] + path)}",
                              "".join(lines) + "</ul>", "all"))
    for name, schema in description["components"]["schemas"].items():
        rows = "".join(f"<tr><td class='name'>{esc(field)}</td><td>{esc(kind_of(each))}</td>"
                       f"<td>{esc(each.get('description', ''))}</td></tr>"
                       for field, each in schema["properties"].items())
        parts.append(card(esc(name), f"<div class='scroll'><table><tbody>{rows}</tbody></table></div>", "all"))
    return f"{HEAD}<header><h1>NodePass API</h1></header><main>{''.join(parts)}</main></body></html>\n".encode()


def kind_of(schema: Mapping[str, Any]) -> str:
    """A field's type, for people."""
    kind = schema.get("type", schema.get("$ref", "").rpartition("/")[2])
    return " or ".join(kind) if isinstance(kind, list) else kind
