"""sniroute_page: the page that shows a running sniroute live, as one HTML document and its security policy.

    GET /          --> PAGE, with POLICY in its header: the document, STYLE and SCRIPT are inline
    GET /status    --> SCRIPT fetches it every 2 seconds (10 in a hidden tab); `show` writes it into PAGE's elements
    POST /reload, /tunnels/NAME/start, /tunnels/NAME/stop, /routes/PATTERN/backends/ADDRESS/drain, enable
                   --> `command` sends it when somebody presses a button, with the token that they typed

The page asks for nothing else, and never another host.  It shows names that come from strangers, so SCRIPT writes
all text with textContent, never as HTML.  The browser enforces this: POLICY allows this very style and script
and no other, and its Trusted Types directives make every attempt to turn text into HTML fail.

This room only holds text: sniroute_admin serves it, and `status` in sniroute_metrics has the fields that SCRIPT
reads.  It imports the standard library only.  Threads: none; nothing here changes after the import.

Seams: I want to ...
    show another number as a tile     `tile(...)` in PAGE, and a call of tile() in SCRIPT's `show`
    show another table                `card(..., table(...))` in PAGE, and a row in SCRIPT's TABLES
    warn of another trouble           a line in SCRIPT's `troubles`
    give another order                an endpoint in sniroute_admin, and a call of `command` in SCRIPT
    allow the page something more     POLICY
"""

from __future__ import annotations

import base64
import hashlib

__version__ = "0.1.0"

# -- how it looks ------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ground: #f4f5f7; --card: #fff; --ink: #1c2128; --quiet: #5a6572; --line: #e1e5ea;
  --accent: #2459c4; --good: #17784a; --warn: #8f5b00; --bad: #b3261e; --fill: #2459c41a; --hover: #f0f3f8; }
@media (prefers-color-scheme: dark) { :root { --ground: #101317; --card: #181c22; --ink: #e3e7ec; --quiet: #98a3b0;
  --line: #2a3038; --accent: #82aaff; --good: #56c68f; --warn: #e0b050; --bad: #ff8a7d; --fill: #82aaff1f;
  --hover: #1f252d; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 14px/1.45 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
header { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; align-items: center; gap: 8px 16px;
  padding: 10px 24px; background: var(--card); border-bottom: 1px solid var(--line); }
h1 { margin: 0; font-size: 17px; letter-spacing: -.01em; }
h2 { margin: 0; font-size: 14px; font-weight: 600; }
h2 + span { color: var(--quiet); }
.about { color: var(--quiet); flex: 1 1 240px; overflow-wrap: anywhere; }
.phase { display: inline-flex; align-items: center; gap: 6px; font-weight: 600; }
.dot { flex: none; display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: currentColor; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); } .quiet { color: var(--quiet); }
.warn > .dot { border-radius: 2px; } .bad > .dot { border-radius: 0; transform: rotate(45deg); }
.quiet > .dot { background: none; border: 2px solid currentColor; }
main { max-width: 1480px; margin: 0 auto; padding: 16px 24px 40px; display: grid; gap: 16px;
  grid-template-columns: minmax(0, 7fr) minmax(0, 3fr); align-items: start; }
main > .all { grid-column: 1 / -1; }
.column { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); }
.lost main { opacity: .45; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.head { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 10px; min-height: 30px; margin-bottom: 4px; }
.head form { display: flex; gap: 6px; margin-left: auto; }
ul { list-style: none; margin: 0; padding: 0; }
.troubles li { display: flex; align-items: baseline; gap: 9px; padding: 1px 0; overflow-wrap: anywhere; }
.troubles li > span:last-child { color: var(--ink); min-width: 0; }
.tiles { display: grid; gap: 12px; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); }
.tile { padding: 10px 14px 8px; min-width: 0; }
.tile h2 { font-weight: 400; color: var(--quiet); font-size: 13px; }
.tile .figure { font-size: 24px; font-weight: 600; line-height: 1.25; letter-spacing: -.02em; white-space: nowrap; }
.tile .note { color: var(--quiet); font-size: 12px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.tile svg { display: block; width: 100%; height: 34px; margin-top: 4px; overflow: visible; }
.plot-line { fill: none; stroke: var(--accent); stroke-width: 1.5; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; }
.plot-area { fill: var(--fill); } .plot-base { stroke: var(--line); vector-effect: non-scaling-stroke; }
.scroll { overflow: auto; max-height: 480px; margin: 0 -16px -12px; border-radius: 0 0 8px 8px; }
table { width: 100%; border-collapse: collapse; }
th { position: sticky; top: 0; background: var(--card); color: var(--quiet); font-weight: 400; font-size: 12px;
  text-align: left; white-space: nowrap; box-shadow: inset 0 -1px var(--line); }
th, td { padding: 5px 8px; vertical-align: top; } th:first-child, td:first-child { padding-left: 16px; }
th:last-child, td:last-child { padding-right: 16px; }
td { border-top: 1px solid var(--line); overflow-wrap: anywhere; } tbody tr:first-child td { border-top: 0; }
tbody tr:hover { background: var(--hover); }
.number { text-align: right; white-space: nowrap; } .short { white-space: nowrap; } .act { text-align: right; }
td.act { padding-top: 3px; padding-bottom: 3px; }
.words { display: block; font-size: 13px; } .words:not(.bad) { color: var(--quiet); }
.state { display: inline-flex; align-items: center; gap: 7px; white-space: nowrap; }
.name { width: 34%; min-width: 9em; } #tunnels .name { width: 55%; } #starts .name { width: 100%; }
.state-cell { width: 7em; }
.strip { display: block; width: 120px; height: 14px; }
.strip path { fill: none; stroke: currentColor; stroke-width: 3; }
.inline .words { display: inline; margin-left: 8px; }
.empty { margin: 0; padding: 4px 0 2px; color: var(--quiet); }
.bars li { position: relative; display: flex; gap: 12px; padding: 3px 8px; margin: 2px -8px; overflow-wrap: anywhere; }
.bars li > svg { position: absolute; inset: 0; width: 100%; height: 100%; } .bars rect { fill: var(--fill); }
.bars li > span { position: relative; } .bars li > span:last-child { margin-left: auto; white-space: nowrap; }
button, input { font: inherit; color: inherit; border-radius: 6px; border: 1px solid var(--line); padding: 3px 10px;
  background: var(--card); min-width: 0; }
button { cursor: pointer; white-space: nowrap; } button:hover:enabled { border-color: var(--accent); }
button:disabled { opacity: .5; cursor: default; }
input { background: var(--ground); } input::placeholder { color: var(--quiet); opacity: 1; }
td button { padding: 1px 9px; font-size: 13px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
dialog { border: 1px solid var(--line); border-radius: 10px; background: var(--card); color: var(--ink); padding: 20px;
  width: min(440px, calc(100vw - 32px)); }
dialog::backdrop { background: #0007; }
dialog p { margin: 8px 0 12px; color: var(--quiet); overflow-wrap: anywhere; } dialog label { display: block; }
dialog input { width: 100%; margin-top: 4px; padding: 6px 10px; }
dialog .buttons { display: flex; flex-direction: row-reverse; justify-content: flex-start; gap: 8px; margin-top: 16px; }
.primary { background: var(--accent); border-color: var(--accent); color: var(--card); }
.said { position: fixed; z-index: 2; left: 50%; bottom: 20px; translate: -50% 0; width: max-content;
  max-width: calc(100vw - 32px); padding: 9px 16px; border-radius: 8px; background: var(--ink); color: var(--card);
  overflow-wrap: anywhere; } .said:empty { display: none; }
@media (max-width: 1000px) { main { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-auto-flow: row; grid-template-columns: repeat(3, minmax(0, 1fr)); }
  #tile-requests:not([hidden]) ~ #tile-tunnels { grid-column: 1 / -1; } }
@media (max-width: 620px) { header { position: static; padding: 10px 14px; }
  main { padding: 12px 12px 32px; gap: 12px; }
  .column { gap: 12px; } .card { padding: 10px 14px; } .tiles { gap: 8px; grid-template-columns: repeat(2, 1fr); }
  .about { flex-basis: 100%; } #filter { flex: 1; }
  .head form { margin-left: 0; width: 100%; } .head form input { flex: 1; }
  .scroll { max-height: 70vh; margin: 0 -14px -10px; } thead { display: none; } table, tbody { display: block; }
  tr { display: flex; flex-wrap: wrap; gap: 2px 14px; padding: 8px 14px; border-top: 1px solid var(--line); }
  td, td:first-child, td:last-child { display: block; width: auto; padding: 0; border: 0; text-align: left;
    white-space: normal; }
  td:empty { display: none; } td.name, td.long { flex: 1 1 100%; } td.name { font-weight: 500; }
  td.act { margin-left: auto; }
  td:not(.name, .act, .state-cell, .bare)::before { content: attr(data-label) " "; color: var(--quiet);
    font-size: 12px; } }
@media (prefers-reduced-motion: no-preference) { main { transition: opacity .3s; } }
"""

# -- what it does ------------------------------------------------------------------------------

SCRIPT = r"""
"use strict";
// EVERY: milliseconds between two answers.  PATIENCE: milliseconds until an answer counts as lost.
// TOKEN: the key in sessionStorage.
const EVERY = 2000, PATIENCE = 4000, TOKEN = "sniroute-token";
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
function vector(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// How numbers are written.
const whole = new Intl.NumberFormat("en-GB");
function count(value, one, many) { return whole.format(value) + " " + (value === 1 ? one : many); }
function rate(value) { return value >= 9.95 || value === 0 ? whole.format(Math.round(value)) : value.toFixed(1); }
function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let at = 0;
  while (value >= 999.5 && at < units.length - 1) { value /= 1000; at += 1; }
  return (at === 0 || value >= 99.5 ? Math.round(value) : value.toFixed(1)) + " " + units[at];
}
function span(seconds) {
  if (seconds < 0.9995) return Math.round(seconds * 1000) + " ms";
  if (seconds < 9.95) return seconds.toFixed(1) + " s";
  seconds = Math.round(seconds);
  if (seconds < 60) return seconds + " s";
  for (const [size, unit, next, small] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    if (seconds < size) continue;
    const rest = Math.floor(seconds % size / next);
    return Math.floor(seconds / size) + " " + unit + (rest ? " " + rest + " " + small : "");
  }
}
function clock(when) { return new Date(when * 1000).toLocaleTimeString("en-GB"); }
const plain = (word) => word.replaceAll("_", " ");

// Tables.  Rows are changed in place, so that focus and selection survive.
const KINDS = { ready: "good", starting: "warn", queued: "warn", backoff: "bad", failed: "bad", stopping: "quiet" };
const RANK = ["failed", "backoff", "starting", "queued", "stopping", "ready"];
function showState(cell, word, kind) {
  if (!cell.firstChild) {
    cell.append(make("span", "state"));
    cell.firstChild.append(make("span", "dot"), make("span"));
  }
  cell.firstChild.className = "state " + kind;
  put(cell.firstChild.lastChild, word);
}
function ownWords(row) {  // without the tunnel's name in front: its row shows that already
  const about = row.key + " did not start: ";
  return row.words.startsWith(about) ? row.words.slice(about.length) : row.words;
}
function showWithWords(cell, text, words, kind) {
  if (!cell.firstChild) cell.append(make("span"), make("span"));
  put(cell.firstChild, text);
  put(cell.lastChild, words);
  cell.lastChild.className = "words " + kind;
  cell.lastChild.hidden = !words;
}
function ofLink(row) {  // the far end of a tunnel, where that has to dial in
  if (!row.link) return row.stands ? "no client has dialled in" : "";
  return "client " + row.link.client + ", pool " + whole.format(row.link.pool) + ", ping " + whole.format(row.link.ping)
    + " ms";
}
function whatNext(row) {
  if (row.state === "backoff") return "next try in " + span(row.next);
  if (row.state === "failed") return "refused for " + span(row.next);
  return row.next ? "stops in " + span(row.next) : "";
}
const STANDS = { good: "good", spare: "quiet", unknown: "warn", down: "bad", drained: "quiet" };
const MEANS = { spare: "in another zone: used where none of the own zone will do", unknown: "no check has passed yet",
  drained: "an operator wants no new client led there" };
function ofBackend(row) {  // why it is not good, and what comes next
  const why = row.why && "down for " + span(row.since) + ": " + row.why
    + (row.next ? " (next try in " + span(row.next) + ")" : "");
  return [MEANS[row.state], why].filter(Boolean).join("; ");
}
function showStrip(cell, results) {  // the last 30, the latest at the right: good ones are tall, bad ones short and low
  if (cell.said === results) return;
  cell.said = results;
  const figure = vector("svg", { class: "strip", viewBox: "0 0 120 14", role: "img" });
  const room = 30 - results.length;
  for (const [sign, kind, line] of [["+", "good", "1v12"], ["-", "bad", "9v4"]]) {
    const drawn = Array.from(results, (each, at) => each === sign ? "M" + (4 * (room + at) + 2) + " " + line : "");
    figure.append(vector("path", { class: kind, d: drawn.join("") }));
  }
  const bad = results.split("-").length - 1;
  const told = !results ? "nobody was there yet" : "of the last " + results.length + " " + bad + " failed"
    + (results.endsWith("-") ? ", the latest, too" : "");
  figure.setAttribute("aria-label", told);
  cell.title = told;
  cell.replaceChildren(figure);
}
function showWarm(row) {
  if (!row.warm) return "";
  return whole.format(row.warm.idle) + (row.warm.dialling ? " + " + whole.format(row.warm.dialling) : "");
}
function drain(cell, row) {
  if (!cell.firstChild) {
    cell.append(make("button"));
    cell.firstChild.addEventListener("click", () => cell.act());
  }
  const back = row.state === "drained", button = cell.firstChild, verb = back ? "Enable" : "Drain";
  put(button, verb);
  button.setAttribute("aria-label", verb + " " + row.backend + " of " + row.route);
  allow(button);
  cell.act = () => command("/routes/" + encodeURIComponent(row.route) + "/backends/" + encodeURIComponent(row.backend)
    + (back ? "/enable" : "/drain"), verb + " this backend?", back
    ? "New clients of " + row.route + " are led to " + row.backend + " again."
    : "No new client of " + row.route + " is led to " + row.backend + ". "
      + (row.active ? "Its " + count(row.active, "connection stays.", "connections stay.") : "It has no connection.")
      + " A reload keeps this, a restart does not.", verb);
}
function act(cell, row) {
  if (!cell.firstChild) {
    cell.append(make("button"));
    cell.firstChild.addEventListener("click", () => cell.act());
  }
  const bad = row.state === "failed" || row.state === "backoff";
  const button = cell.firstChild;
  put(button, bad ? "Start" : "Stop");
  button.setAttribute("aria-label", (bad ? "Start " : "Stop ") + row.key);
  allow(button);
  cell.act = () => bad ? command("/tunnels/" + encodeURIComponent(row.key) + "/start", "Start this tunnel?",
      row.key + " is tried again now.", "Start")
    : command("/tunnels/" + encodeURIComponent(row.key) + "/stop", "Stop this tunnel?",
      row.key + (row.leases ? " carries " + count(row.leases, "connection, which ends.", "connections, which end.")
        : " carries no connection.") + (row.stands ? " It is started again at once." : " The next client starts it again."),
    "Stop");
}
function ofRequest(row) { return row.method ? row.method + " " + row.host + row.path : "could not be read"; }
function whyNot(row) { return [plain(row.reason), row.detail].filter(Boolean).join(": "); }
function kindOf(row) {  // of a status, as a colour
  return row.status === null || row.status >= 500 ? "bad" : row.status >= 400 ? "warn" : "";
}
// `key` identifies a row from one answer to the next.  A column is a title, a class, and a function of the row:
// it returns the cell's text, or fills the cell that it is given.
const TABLES = {
  tunnels: { key: (row) => row.key, columns: [
    ["State", "state-cell short", (row, cell) => showState(cell, row.state, KINDS[row.state] || "quiet")],
    ["Tunnel", "name", (row, cell) => {
      const ready = row.state === "ready";
      showWithWords(cell, row.key, ready ? ofLink(row) : ownWords(row), ready ? row.link ? "" : "warn" : KINDS[row.state]);
      cell.title = row.words;
    }],
    ["Clients", "number", (row) => row.state === "failed" ? "" : whole.format(row.leases)],
    ["Port", "number", (row) => row.port ? String(row.port) : ""],
    ["For", "number", (row) => row.age ? span(row.age) : ""],
    ["Next", "short", whatNext],
    ["", "act", (row, cell) => act(cell, row)] ] },
  refusals: { key: (row) => row.id, columns: [
    ["At", "short bare", (row) => clock(row.when)],
    ["Client", "short bare", (row) => row.client],
    ["Name", "name", (row) => row.name || "no name"],
    ["Reason", "long bare inline", (row, cell) => showWithWords(cell, plain(row.reason), row.detail, "")] ] },
  routes: { key: (row) => row.pattern, columns: [
    ["Pattern", "name", (row) => row.pattern],
    ["Target", "long bare", (row) => row.target],
    ["Open", "number", (row) => whole.format(row.active)],
    ["Ended", "number", (row) => whole.format(row.total)],
    ["Refused", "number", (row) => whole.format(row.refused)],
    ["Up", "number", (row) => bytes(row.up)],
    ["Down", "number", (row) => bytes(row.down)] ] },
  backends: { key: (row) => row.route + " " + row.backend, columns: [
    ["State", "state-cell short", (row, cell) => showState(cell, row.state, STANDS[row.state] || "quiet")],
    ["Route", "short", (row) => row.route],
    ["Backend", "name", (row, cell) => showWithWords(cell, row.backend, ofBackend(row), row.why ? "bad" : "")],
    ["Last results", "short", (row, cell) => showStrip(cell, row.results)],
    ["Open", "number", (row) => whole.format(row.active) + (row.limit ? " of " + whole.format(row.limit) : "")],
    ["Warm", "number", showWarm],
    ["Connect", "number", (row) => row.connect_seconds === null || row.why ? "" : span(row.connect_seconds)],
    ["", "act", (row, cell) => drain(cell, row)] ] },
  claims: { key: (row) => row.name, columns: [
    ["State", "state-cell short", (row, cell) => showState(cell, row.suspended ? "suspended" : "claimed",
      row.suspended ? "warn" : "good")],
    ["Name", "name", (row) => row.name],
    ["Owner", "short", (row) => row.owner],
    ["Target", "long bare", (row) => row.target],
    ["Left", "number", (row) => row.while_connected ? "while connected" : span(row.left)] ] },
  requests: { key: (row) => row.id, columns: [
    ["At", "short bare", (row) => clock(row.when)],
    ["Client", "short", (row) => row.client],
    ["Request", "name", (row, cell) => showWithWords(cell, ofRequest(row), whyNot(row), row.reason ? "bad" : "")],
    ["Backend", "long", (row) => row.backend],
    ["Status", "number", (row, cell) => {
      cell.className = "number " + kindOf(row);
      return row.status === null ? "none" : String(row.status);
    }],
    ["First byte", "number", (row) => row.first === null ? "" : span(row.first)],
    ["Took", "number", (row) => span(row.seconds)],
    ["Up", "number", (row) => bytes(row.up)],
    ["Down", "number", (row) => bytes(row.down)] ] },
  connections: { key: (row) => row.client, columns: [
    ["State", "state-cell short", (row, cell) => showState(cell, row.state, row.state === "open" ? "good"
      : row.state === "lingering" ? "quiet" : "warn")],
    ["Client", "short", (row) => row.client],
    ["Name", "name", (row) => row.name || "not known yet"],
    ["Backend", "long", (row) => row.backend],
    ["For", "number", (row) => span(row.seconds)],
    ["Up", "number", (row) => bytes(row.up)],
    ["Down", "number", (row) => bytes(row.down)] ] },
  starts: { key: (row) => row.key + row.when, columns: [
    ["Tunnel", "name", (row, cell) => showWithWords(cell, row.key, "at " + clock(row.when), "")],
    ["Took", "number", (row) => span(row.seconds)] ] },
};
function showTable(id, rows) {
  const { key, columns } = TABLES[id], body = $(id).tBodies[0];
  const known = new Map(Array.from(body.rows, (line) => [line.key, line]));
  rows.forEach((row, at) => {
    let line = known.get(key(row));
    if (line) known.delete(key(row));
    else {
      line = make("tr");
      line.key = key(row);
      for (const [title, name] of columns) line.append(make("td", name));
      columns.forEach(([title], n) => { line.cells[n].dataset.label = title; });
    }
    columns.forEach(([, , show], n) => {
      const text = show(row, line.cells[n]);
      if (text !== undefined) put(line.cells[n], text);
    });
    if (body.rows[at] !== line) body.insertBefore(line, body.rows[at] || null);
  });
  for (const line of known.values()) line.remove();
  sift(body.rows);
  $(id).parentNode.hidden = !rows.length;
  $(id + "-empty").hidden = rows.length > 0;
}
function showBars(id, rows) {
  const most = Math.max(1, ...rows.map((row) => row[1]));
  $(id).replaceChildren(...rows.map(([name, value]) => {
    const line = make("li"), bar = vector("svg", { "aria-hidden": "true" });
    bar.append(vector("rect", { width: 100 * value / most + "%", height: "100%", rx: 4 }));
    line.append(bar, make("span", "", name), make("span", "", whole.format(value)));
    return line;
  }));
  sift($(id).children);
  $(id + "-empty").hidden = rows.length > 0;
}
function sift(lines) {
  const wanted = $("filter").value.trim().toLowerCase();
  for (const line of lines) line.hidden = !line.textContent.toLowerCase().includes(wanted);
}

// Plots.  They show the last two minutes, one sample each second, the newest at the right.
const WIDTH = 119, HEIGHT = 30;
function plot(id, values, unit) {
  const top = Math.max(...values, 1e-9), room = WIDTH + 1 - values.length;
  const points = values.map((value, at) => (room + at) + " " + (HEIGHT - HEIGHT * value / top).toFixed(2));
  let figure = $(id).querySelector("svg");
  if (!figure) {
    figure = vector("svg", { viewBox: "0 0 " + WIDTH + " " + HEIGHT, preserveAspectRatio: "none", role: "img" });
    figure.append(vector("path", { class: "plot-area" }),
      vector("path", { class: "plot-base", d: "M0 " + HEIGHT + "H" + WIDTH }), vector("path", { class: "plot-line" }));
    $(id).append(figure);
  }
  const most = values.length ? unit(Math.max(...values)) : "none yet";
  figure.setAttribute("aria-label", "the last two minutes; most: " + most);
  const drawn = points.length > 1;
  figure.firstChild.setAttribute("d", drawn ? "M" + room + " " + HEIGHT + "L" + points.join("L") + "V" + HEIGHT + "Z"
    : "");
  figure.lastChild.setAttribute("d", drawn ? "M" + points.join("L") : "");
  return most;
}
function tile(id, figure, note) {
  put($(id).querySelector(".figure"), figure);
  put($(id).querySelector(".note"), note);
}

// The list of what fails, and why.
function troubles(now) {
  const found = [], held = now.connections.active;
  if (now.phase === "lameduck")
    found.push(["warn", "It is about to end: new clients are served for a while yet."]);
  else if (now.phase !== "running")
    found.push(["warn", "It is " + now.phase + ": nobody is accepted any more, "
      + count(held, "connection is", "connections are") + " left."]);
  if (now.paused)
    found.push(["bad", "It accepts nobody for now: --max-connections are open, or descriptors are short."]);
  else if (held > 0.9 * now.limits.connections)
    found.push(["warn", "Nine tenths of --max-connections (" + whole.format(now.limits.connections) + ") are open."]);
  if (!now.reloads.last_ok)
    found.push(["bad", "The reload at " + clock(now.reloads.last) + " failed, and nothing changed: the log says why."]);
  const bad = now.tunnels.filter((row) => row.state === "failed" || row.state === "backoff");
  for (const row of bad.slice(0, 4))
    found.push(["bad", row.key + ": " + (ownWords(row) || "it ended") + " (" + whatNext(row) + ")"]);
  if (bad.length > 4) found.push(["bad", "And " + count(bad.length - 4, "tunnel", "tunnels") + " more."]);
  const down = now.backends.filter((row) => row.state === "down");
  for (const row of down.slice(0, 4)) found.push(["bad", row.route + ": " + row.backend + " is " + ofBackend(row)]);
  if (now.backend_states.down > 4)
    found.push(["bad", "And " + count(now.backend_states.down - 4, "backend", "backends") + " more."]);
  return found.length ? found : [["good", "Nothing fails."]];
}
function showTroubles(rows) {
  const said = JSON.stringify(rows.map(([kind, text]) => kind + text.replace(/[\d.]+ (ms|s|min|h)\b/g, "")));
  const list = $("troubles");
  if (list.said !== said) {  // if only a countdown changed, keep the list: a screen reader would read it out again
    list.replaceChildren(...rows.map(([kind]) => {
      const line = make("li", kind);
      line.append(make("span", "dot"), make("span"));
      return line;
    }));
    list.said = said;
  }
  rows.forEach(([, text], at) => put(list.children[at].lastChild, text));
}

// The page as a whole.
function numbered(rows, like) {  // two rows may look the same, but their keys must differ
  const seen = new Map();
  for (const row of rows) {
    const key = like(row);
    seen.set(key, (seen.get(key) || 0) + 1);
    row.id = key + " " + seen.get(key);
  }
}
let control = false;
function allow(button) {
  button.disabled = !control;
  button.title = control ? "" : "SNIROUTE_ADMIN_TOKEN is not set: this router takes no orders";
}
function showPhase(word, kind) {
  $("phase").className = "phase " + kind;
  put($("phase").lastChild, word);
  document.title = (word === "running" ? "" : word + " - ") + "sniroute";
}
function show(now) {
  control = now.control;
  document.body.classList.remove("lost");
  showPhase(now.paused ? "not accepting" : now.phase, now.paused ? "bad" : now.phase === "running" ? "good" : "warn");
  put($("about"), "version " + now.version + ", up for " + span(now.uptime) + ", pid " + now.pid + ", on "
    + now.listening.join(", "));
  showTroubles(troubles(now));
  const rates = now.rates, last = (name) => rates[name].at(-1) || 0, per = (unit) => (value) => unit(value) + "/s";
  const most = Object.fromEntries([["active", whole.format], ["accepted", per(rate)], ["refused", per(rate)],
    ["up", per(bytes)], ["down", per(bytes)]].map(([name, unit]) => [name, plot("tile-" + name, rates[name], unit)]));
  tile("tile-active", whole.format(now.connections.active), "of " + whole.format(now.limits.connections));
  tile("tile-accepted", rate(last("accepted")) + "/s", "most " + most.accepted);
  tile("tile-refused", rate(last("refused")) + "/s", "most " + most.refused);
  tile("tile-up", bytes(last("up")) + "/s", bytes(now.bytes.up) + " in all");
  tile("tile-down", bytes(last("down")) + "/s", bytes(now.bytes.down) + " in all");
  const states = now.tunnel_states, failing = states.failed + states.backoff;
  tile("tile-tunnels", whole.format(states.ready), "of " + whole.format(now.limits.tunnels));
  showSegments([["good", states.ready], ["warn", states.starting + states.queued], ["quiet", states.stopping],
    ["bad", failing]], now.limits.tunnels);
  put($("tunnels-count"), RANK.filter((state) => states[state])
    .map((state) => whole.format(states[state]) + " " + state).join(", "));
  put($("routes-count"), whole.format(now.routes.length));
  put($("connections-count"), now.oldest_connections.length < now.connections.active
    ? "the oldest " + now.oldest_connections.length + " of " + whole.format(now.connections.active)
    : whole.format(now.connections.active));
  showTable("tunnels", now.tunnels.sort((a, b) => RANK.indexOf(a.state) - RANK.indexOf(b.state)
    || a.key.localeCompare(b.key)));
  numbered(now.last_refusals, (row) => row.when + row.client + row.name);
  showTable("refusals", now.last_refusals);
  showTable("routes", now.routes);
  put($("backends-count"), Object.keys(STANDS).filter((state) => now.backend_states[state])
    .map((state) => whole.format(now.backend_states[state]) + " " + state).join(", "));
  showTable("backends", now.backends);
  $("requests-card").hidden = $("tile-requests").hidden = now.http === null;
  if (now.http !== null) {
    plot("tile-requests", rates.requests, per(rate));
    tile("tile-requests", rate(last("requests")) + "/s", whole.format(now.http.requests) + " in all");
    put($("requests-count"), Object.entries(now.http.statuses)
      .map(([status, value]) => whole.format(value) + " " + (status === "none" ? "unanswered" : status)).join(", "));
    numbered(now.last_requests, (row) => row.when + row.client + ofRequest(row));
    showTable("requests", now.last_requests);
  }
  $("claims-card").hidden = now.registry === null;
  if (now.registry !== null) {
    const names = now.registry;
    put($("claims-count"), (now.claims.length < names.claims ? "the first " + now.claims.length + " of " : "")
      + whole.format(names.claims) + ", " + whole.format(names.held) + " held, in " + names.store
      + (names.store_up ? "" : ", which is away"));
    showTable("claims", now.claims);
  }
  showTable("connections", now.oldest_connections);
  showTable("starts", now.slowest_starts);
  showBars("reasons", Object.entries(now.refusals).sort((a, b) => b[1] - a[1])
    .map(([kind, value]) => [plain(kind), value]));
  showBars("names", now.refused_names.map((row) => [row.name, row.count]));
  allow($("reload"));
  allow($("start"));
}
function showSegments(parts, limit) {
  const all = Math.max(limit, parts.reduce((sum, [, value]) => sum + value, 0), 1);
  const figure = vector("svg", { viewBox: "0 0 " + WIDTH + " " + HEIGHT, preserveAspectRatio: "none", role: "img",
    "aria-label": "tunnels by state" });
  figure.append(vector("rect", { y: 22, width: WIDTH, height: 6, fill: "var(--line)" }));
  let at = 0;
  for (const [kind, value] of parts) {
    figure.append(vector("rect", { class: kind, x: at, y: 22, width: WIDTH * value / all, height: 6,
      fill: "currentColor" }));
    at += WIDTH * value / all;
  }
  $("tile-tunnels").querySelector("svg").replaceWith(figure);
}
let since = 0, waiting = 0, asking = false;
async function refresh() {
  clearTimeout(waiting);
  if (asking) return;
  asking = true;
  try {
    const answer = await fetch("/status", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (!answer.ok) throw new Error("it answers " + answer.status);
    show(await answer.json());
    since = 0;
  } catch (error) {
    since ||= Date.now() / 1000;
    document.body.classList.add("lost");
    showPhase("no answer", "bad");
    put($("about"), "since " + clock(since) + ": " + error.message);
  } finally {
    asking = false;
    waiting = setTimeout(refresh, document.hidden ? 5 * EVERY : EVERY);
  }
}

// Orders.  Each is confirmed in a dialog, which also asks for the token when this tab has none.
let saying = 0;
function say(text) {
  clearTimeout(saying);
  put($("said"), text);
  saying = setTimeout(() => put($("said"), ""), 8000);
}
function ask(title, text, verb) {
  put($("ask-title"), title);
  put($("ask-text"), text);
  put($("ask-go"), verb);
  $("ask-label").hidden = sessionStorage.getItem(TOKEN) !== null;
  $("ask-token").value = "";
  $("ask").returnValue = "";
  $("ask").showModal();
  return new Promise((settle) => $("ask").addEventListener("close", () => {
    if ($("ask").returnValue === "go" && $("ask-token").value) sessionStorage.setItem(TOKEN, $("ask-token").value);
    $("ask-token").value = "";
    settle($("ask").returnValue === "go");
  }, { once: true }));
}
async function command(path, title, text, verb) {
  if (!await ask(title, text, verb)) return;
  say(verb + " ...");
  try {
    const token = (sessionStorage.getItem(TOKEN) || "").replace(/[^!-~]/g, "");
    const answer = await fetch(path, { method: "POST", headers: { Authorization: "Bearer " + token } });
    const told = await answer.json();
    if (answer.status === 401) sessionStorage.removeItem(TOKEN);
    say(answer.ok ? told.done : told.error);
  } catch (error) {
    say("There was no answer: " + error.message);
  }
  refresh();
}

for (const [id, { columns }] of Object.entries(TABLES)) {
  const line = make("tr");
  for (const [title, name] of columns) {
    const cell = make("th", name, title);
    cell.scope = "col";
    line.append(cell);
  }
  $(id).tHead.append(line);
}
$("reload").addEventListener("click", () => command("/reload", "Reload the settings?",
  "The file of settings is read again. Where something is wrong with it, nothing changes.", "Reload"));
$("starter").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("start-name").value.trim();
  if (name) command("/tunnels/" + encodeURIComponent(name) + "/start", "Start a tunnel?",
    "The tunnel that " + name + " leads to is started, as by a client.", "Start");
});
$("filter").addEventListener("input", () => {
  for (const list of document.querySelectorAll("tbody, .bars")) sift(list.children);
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
refresh();
"""

# -- the document ------------------------------------------------------------------------------

ICON = ("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath "
        "d='M1 8h5c3 0 3-5 9-5M6 8c3 0 3 5 9 5M6 8h9' fill='none' stroke='%234c7fe0' stroke-width='2'/%3E%3C/svg%3E")


def card(title: str, body: str, mark: str = "", head: str = "", hides: str = "") -> str:
    """A section of the page: a title and a body.

    `mark` is another class of the section, `head` is HTML beside the title.  `hides` is an id by which SCRIPT shows it
    where there is something to show; "": it is always there.
    """
    hidden = f' id="{hides}" hidden' if hides else ""
    return f'<section class="card {mark}"{hidden}><div class="head"><h2>{title}</h2>{head}</div>{body}</section>'


def table(name: str, empty: str) -> str:
    """A table that SCRIPT fills: a row of its TABLES has this `name`.  `empty` is shown when it has no rows."""
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{name}" hidden><table id="{name}">'
            f'<thead></thead><tbody></tbody></table></div><p class="empty" id="{name}-empty">{empty}</p>')


def tile(name: str, title: str, hidden: str = "") -> str:
    """A number with a note and a plot below it; SCRIPT fills all three by this `name`.

    `hidden` is the attribute of that name, where SCRIPT shows it only where there is something to show.
    """
    figure = "<svg></svg>" if name == "tunnels" else ""  # `showSegments` replaces it; `plot` adds its own
    return (f'<section class="card tile" id="tile-{name}" {hidden}><h2>{title}</h2><div class="figure">-</div>'
            f'<div class="note">&nbsp;</div>{figure}</section>')


PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sniroute</title>
<link rel="icon" href="{ICON}">
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>sniroute</h1>
<span class="phase quiet" id="phase" role="status"><span class="dot"></span><span>asking</span></span>
<span class="about" id="about"></span>
<input type="search" id="filter" placeholder="Filter rows" aria-label="Filter rows">
<button id="reload" disabled>Reload settings</button>
</header>
<main>
<section class="card all" aria-label="What fails"><ul class="troubles" id="troubles" aria-live="polite"></ul></section>
<div class="tiles all">
{tile("active", "Connections")}
{tile("accepted", "New")}
{tile("refused", "Refused")}
{tile("requests", "Requests", "hidden")}
{tile("up", "To backends")}
{tile("down", "To clients")}
{tile("tunnels", "Tunnels ready")}
</div>
<div class="column">
{card("Tunnels", table("tunnels", "None is up: the first client of a name starts one."), head='''
<span id="tunnels-count"></span>
<form id="starter"><input id="start-name" placeholder="client's name" aria-label="A client's name" autocomplete="off"
spellcheck="false"><button id="start" disabled>Start</button></form>''')}
{card("Last refusals", table("refusals", "Nobody was refused."))}
{card("Routes", table("routes", "There is none."), head='<span id="routes-count"></span>')}
</div>
<div class="column">
{card("Refusals by reason", '<ul class="bars" id="reasons"></ul><p class="empty" id="reasons-empty">None.</p>')}
{card("Most refused names", '<ul class="bars" id="names"></ul><p class="empty" id="names-empty">None.</p>')}
{card("Slowest starts", table("starts", "No tunnel has started."))}
</div>
{card("Backends", table("backends", "No route has several."), "all", '<span id="backends-count"></span>')}
{card("Requests", table("requests", "Nobody has asked in plain HTTP."), "all", '<span id="requests-count"></span>',
      "requests-card")}
{card("Claimed names", table("claims", "Nobody has claimed one."), "all", '<span id="claims-count"></span>',
      "claims-card")}
{card("Connections", table("connections", "None is open."), "all", '<span id="connections-count"></span>')}
</main>
<dialog id="ask" aria-labelledby="ask-title"><form method="dialog">
<h2 id="ask-title"></h2><p id="ask-text"></p>
<label id="ask-label">Token (SNIROUTE_ADMIN_TOKEN), kept until this tab is closed
<input type="password" id="ask-token" autocomplete="off"></label>
<div class="buttons"><button class="primary" id="ask-go" value="go"></button><button value="no">Cancel</button></div>
</form></dialog>
<div class="said" id="said" role="status"></div>
<script>{SCRIPT}</script>
</body>
</html>
""".encode()


# -- the policy --------------------------------------------------------------------------------


def content_hash(text: str) -> str:
    """The source by which a Content-Security-Policy allows an inline style or script (CSP Level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = "; ".join((
    "default-src 'none'", f"style-src {content_hash(STYLE)}", f"script-src {content_hash(SCRIPT)}",
    "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    "require-trusted-types-for 'script'", "trusted-types 'none'"))
