"""referees: programs that read the same language, on the same mutated inputs; where both read, they read the same.

    python3 -m testbed.referees                         all, 20,000 inputs each
    python3 -m testbed.referees hpack,pyyaml --runs 1000000 --seed 7

    hellos       OpenSSL's server, as Python has it: the name that it reads
    http.server  Python's: each request that we pass on, by itself
    nginx        what it hears on a connection on which we pass on
    haproxy      what it passes on of that to an nginx behind it
    pyyaml       PyYAML's BaseLoader: all scalars as they were written
    kubectl      what it reads in a kubeconfig
    hpack        hpack of PyPI
    h2           h2 of PyPI, as a server: requests, data, ends and resets

None is needed by anybody: who is missing is named, and left out (PyPI: PyYAML, hpack, h2; Debian: nginx, haproxy).
A difference that is right is a row of KNOWN, with its reason; any other is a fault, and the exit code 1.

Inputs are those of testbed/fuzz.py.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.server
import io
import json
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import sniroute_h2
import sniroute_hpack
import sniroute_http
import sniroute_yaml
from sniroute_http2 import PREFACE, RST_STREAM
from sniroute_wire import Hello, HelloReader
from testbed import fuzz, fuzz_web
from testbed.fuzz_oracles import No, outcome
from testbed.openssl import blinded, openssl
from testbed.ports import free_port
from testbed.smuggling import Wire

HOST = "127.0.0.1"
TIME = 10.0  # seconds that a program may take for a connection: far more than it needs

# Differences that are right: how they are told, and why.  We are stricter where we refuse what the referee takes.
KNOWN = {
    "hellos: laxer: OpenSSL judges the rest": "cipher suites, versions and other extensions are the backend's to judge",
    "hellos: stricter: ": "test_wire.py has each, in STRICTER",
    "nginx: laxer: HTTP N": "it refuses `*`, targets that leave the root by .., %00, and a % without digits",
    "haproxy: laxer: HTTP N": "it refuses characters that RFC 3986 does not have in a target; and nginx is behind it",
    "http.server: laxer: HTTP N": "it takes no more than 100 lines",
    "hpack: stricter: compressed fields: a change of the table where none belongs":
        "between fields, or more than two of them: RFC 7541 section 4.2 has it at the beginning, twice at most",
    "hpack: stricter: compressed fields: a number that is too large": "28 bits are more than any size here",
    "hpack: stricter: compressed fields: more than N bytes of fields": "they count as we do, and have another limit",
    "hpack: laxer: their list is shorter": "the same",
    "h2: stricter: a stream that we reset": "fields and states of one stream: h2 lets more of them pass",
    "h2: stricter: no SETTINGS at the beginning": "RFC 9113 section 3.4; h2 takes any frame",
    "h2: stricter: a frame of type N on stream N, which is closed":
        "section 5.1; h2 forgets streams that it has refused",
    "h2: stricter: (a push|a reset of stream|more padding)": "section 6.6, 6.4 and 6.2",
    "h2: stricter: a setting N of N": "a value that is none, and then a good one: h2 looks at the last one only",
    "h2: stricter: more than N": "floods: limits of our own",
    "h2: laxer: (FrameDataMissingError|InvalidSettingsValueError)": "frames and settings that are none of RFC 9113",
    "h2: laxer: ProtocolError (Connection-specific|Received header value surr|Invalid content-length|Request header "
    "block)":
        "fields that nobody here asks for, or passes on",
    "h2: laxer: ProtocolError (Stream N may not depend|Received frame with non-compliant)":
        "priorities: they mean nothing",
    "h2: laxer: ProtocolError Received frame with invalid padding":
        "padding that leaves nothing of a block: section 6.2 forbids only more than that",
    "h2: laxer: ProtocolError Invalid input ConnectionInputs.RECV_": "a client may go on behind its own GOAWAY",
    "pyyaml: stricter: ": "sniroute_yaml.py says what is refused on purpose",
    "pyyaml: laxer: found invalid Unicode character escape code": "JSON's pairs of surrogates",
    "pyyaml: laxer: found character ('.*' )?that cannot start any token": "a tab as a blank between words, section 6.1",
    "pyyaml: laxer: did not find expected node content": "nothing before `...` is nothing",
    "pyyaml: laxer: (found unexpected ':'|did not find expected ',')": "a line end before a colon: JSON has it",
    "(pyyaml|kubectl): laxer: found a tab character (where an|that violates) indentation":
        "a line of tabs, or a tab behind the spaces of one, is a blank where nothing depends on it",
    "kubectl: laxer: found character ('.*' )?that cannot start": "a tab as a blank",
    "kubectl: laxer: found invalid Unicode": "JSON's pairs of surrogates",
    "kubectl: laxer: json: unsupported value": "infinities are texts",
    "kubectl: stricter: a number of many digits": "it is a text: no number here has so many",
    "kubectl: laxer: did not find expected ','": "a line end before a colon: JSON has it",
}


class Missing(Exception):
    """A referee is not here.  The message says what to install."""


class Verdict(NamedTuple):
    """What came of one input."""

    kind: str  # "same"; a kind of difference, as in KNOWN; "" where there was nothing to compare
    words: str = ""


SAME, NOTHING = Verdict("same"), Verdict("")
Judge = Callable[[bytes], Verdict]


# -- OpenSSL -----------------------------------------------------------------------------------


@contextlib.contextmanager
def hellos() -> Iterator[Judge]:
    """OpenSSL's server."""
    def judge(data: bytes) -> Verdict:
        found = outcome(HelloReader().read, data)
        if isinstance(found, No):
            if " 112 " in found.kind:
                return NOTHING  # a name that no host has; CPython cannot even tell what OpenSSL reads there
            return Verdict("stricter", found.words) if openssl(data).asked else SAME
        if not isinstance(found, Hello):
            return NOTHING
        answer = openssl(data[:found.end])
        laxer = not answer.asked
        if laxer:
            answer = openssl(blinded(data[:found.end]))
        theirs = answer.name and answer.name.lower().removesuffix(".")
        if not answer.asked or theirs != found.name:
            return Verdict("differs", f"{found.name!r}, and OpenSSL {answer!r}")
        return Verdict("laxer", "OpenSSL judges the rest, too") if laxer else SAME
    yield judge


# -- HTTP --------------------------------------------------------------------------------------


def passed(data: bytes) -> tuple[list[sniroute_http.Request], list[bytes], bytes] | None:
    """The requests of an input, their bodies, and the bytes that pass on; None where none is whole."""
    wire = Wire()
    if outcome(wire.feed, data) is not None or wire.body is not None or wire.data or not wire.heard:
        return None
    if any(not request.name or request.expects_continue for request in wire.heard):
        return None
    return list(wire.heard), [bytes(body) for body in wire.bodies], bytes(wire.out)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request, out of bytes."""

    def __init__(self, data: bytes):
        self.rfile, self.wfile = io.BytesIO(data), io.BytesIO()
        self.code = 0
        self.client_address, self.server = (HOST, 0), None  # type: ignore[assignment]
        self.raw_requestline = self.rfile.readline(65537)
        self.is_read = self.parse_request()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.code = int(code)

    def handle_expect_100(self) -> bool:
        return True


@contextlib.contextmanager
def python_server() -> Iterator[Judge]:
    """http.server."""
    def judge(data: bytes) -> Verdict:
        found = passed(data)
        if found is None:
            return NOTHING
        requests, bodies, out = found
        for request, body in zip(requests, bodies):
            handler = Handler(out)
            if not handler.is_read:
                return Verdict("laxer", f"HTTP {handler.code}")
            path = bytes(request.path).decode("latin-1")
            theirs = handler.command, handler.path, handler.headers.get_all("Host")
            place = f"{request.name}:{request.port}" if request.port else request.name
            hosts = [each.strip(" \t").lower().replace(".:", ":").removesuffix(".") for each in theirs[2] or ()]
            if theirs[0] != request.method or "/" + theirs[1].lstrip("/") != ("/" + path.lstrip("/")) or \
                    hosts not in ([place], [request.name], [f"{request.name}:80"]):
                return Verdict("differs", f"{theirs}, and {request.method, path, place}")
            rest = out[handler.rfile.tell():]
            coding, length = handler.headers.get_all("Transfer-Encoding"), handler.headers.get_all("Content-Length")
            if coding:
                if coding != ["chunked"] or length:
                    return Verdict("differs", f"{coding} and {length}")
                said, rest = dechunked(rest)
            else:
                size = int(length[0]) if length else 0
                said, rest = rest[:size], rest[size:]
            if said != body:
                return Verdict("differs", f"a body {said!r}, and {body!r}")
            out = rest
        return SAME if not out else Verdict("differs", f"{out!r} is left")
    yield judge


def dechunked(data: bytes) -> tuple[bytes, bytes]:
    """A body in chunks, and what is behind it: read in the plainest way."""
    said = b""
    while True:
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        if not size:
            return said, data.partition(b"\r\n")[2]
        said, data = said + data[:size], data[size + 2:]


NGINX = """daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log crit;
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; merge_slashes off; keepalive_requests 10000;
  server {{ listen {host}:{port}; underscores_in_headers on;
    add_header X-Heard "<$request_method $request_uri $http_host>" always;
    location / {{ return 204; }} }} }}
"""
HAPROXY = """global
  maxconn 200
defaults
  mode http
  timeout client 20s
  timeout server 20s
  timeout connect 5s
frontend in
  bind {host}:{port}
  default_backend out
backend out
  server n {host}:{far}
"""
LAST = b"GET /the-last HTTP/1.1\r\nHost: last\r\nConnection: close\r\n\r\n"
HEARD = re.compile(rb"^X-Heard: <(.*)>\r$", re.MULTILINE | re.IGNORECASE)


@contextlib.contextmanager
def started(program: str, config: str, port: int, *words: str) -> Iterator[None]:
    """A server, until it is no longer needed."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if path is None:
        raise Missing(f"Debian package {program}")
    with tempfile.TemporaryDirectory(prefix="referee-") as folder:
        os.chmod(folder, 0o777)  # nginx changes its user
        file = pathlib.Path(folder, "config")
        file.write_text(config.replace("{folder}", folder).replace("{{", "{").replace("}}", "}"))
        process = subprocess.Popen([path, *words, str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
                    break
                if process.poll() is not None:
                    raise Missing(f"{program}: {process.stderr.read().decode()}")
                time.sleep(0.02)
            yield
        finally:
            process.terminate()
            process.wait()
            process.stderr.close()


def of_server(port: int) -> Judge:
    """A judge that passes on to this port, and asks what was heard there."""
    def judge(data: bytes) -> Verdict:
        found = passed(data)
        if found is None:
            return NOTHING
        requests, _, out = found
        answer = b""
        with socket.create_connection((HOST, port), TIME) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(out + LAST)
            with contextlib.suppress(ConnectionError):
                while more := sock.recv(65536):
                    answer += more
        heard = HEARD.findall(answer)
        wanted = [b"%b %b " % (request.method.encode(), bytes(request.path))
                  for request in requests] + [b"GET /the-last "]
        places = [{request.name.encode(), b"%b:%d" % (request.name.encode(), request.port or 80)}
                  for request in requests]
        for said, want, place in zip(heard, wanted, [*places, {b"last"}]):
            if not said.startswith(want):
                break
            if said[len(want):].strip(b" \t").lower().replace(b".:", b":").removesuffix(b".") not in place:
                return Verdict("differs", f"heard {said!r}, and passed on {want!r} {place!r}")
        else:
            if len(heard) == len(wanted):
                return SAME
        refused = re.search(rb"^HTTP/1\.[01] ([45]\d\d)", answer, re.MULTILINE)
        if refused and len(heard) <= len(wanted):
            return Verdict("laxer", f"HTTP {refused[1].decode()}")
        return Verdict("differs", f"heard {heard!r}, and passed on {wanted!r}; {answer[-200:]!r}")
    return judge


@contextlib.contextmanager
def nginx() -> Iterator[Judge]:
    """nginx."""
    port = free_port()
    with started("nginx", NGINX.replace("{host}", HOST).replace("{port}", str(port)), port, "-c"):
        yield of_server(port)


@contextlib.contextmanager
def haproxy() -> Iterator[Judge]:
    """HAProxy, and nginx behind it."""
    far, port = free_port(), free_port()
    with started("nginx", NGINX.replace("{host}", HOST).replace("{port}", str(far)), far, "-c"), \
            started("haproxy", HAPROXY.replace("{host}", HOST).replace("{port}", str(port)).replace("{far}", str(far)),
                    port,
                    "-db", "-f"):
        yield of_server(port)


# -- YAML --------------------------------------------------------------------------------------


def texts(node: sniroute_yaml.Node) -> Any:
    """A node with all scalars as they were written."""
    if isinstance(node.value, dict):
        return {key: texts(each) for key, each in node.value.items()}
    return [texts(each) for each in node.value] if isinstance(node.value, list) else node.text


@contextlib.contextmanager
def pyyaml() -> Iterator[Judge]:
    """PyYAML."""
    try:
        import yaml
    except ImportError:
        raise Missing("PyPI package PyYAML") from None
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

    def judge(data: bytes) -> Verdict:
        ours = outcome(sniroute_yaml.parse_yaml, data, allowed=(sniroute_yaml.YamlError,))
        try:
            theirs = yaml.load(data, loader)
        except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:  # TypeError: a key that is a list
            return SAME if isinstance(ours, No) else Verdict("laxer", getattr(error, "problem", "")
                                                             or type(error).__name__)
        if isinstance(ours, No):
            return Verdict("stricter", ours.words.partition(": ")[2])
        said = texts(ours)
        return SAME if (said or "") == (theirs or "") else Verdict("differs", f"{said!r}, and PyYAML {theirs!r}")
    yield judge


CONFIG = """clusters:
- name: c
  cluster:
    server: https://h
    extensions:
    - name: x
      extension:
        v:
"""


@contextlib.contextmanager
def kubectl() -> Iterator[Judge]:
    """kubectl, which keeps all that an extension says.  Asked for what we read only: it takes 50 ms."""
    program = os.environ.get("SNIROUTE_TEST_KUBECTL") or shutil.which("kubectl")
    if not program:
        raise Missing("kubectl (SNIROUTE_TEST_KUBECTL=/path/to/kubectl)")

    def judge(data: bytes) -> Verdict:
        lines = data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
        text = CONFIG + "".join(f"          {line}\n" if line.strip() else f"{line}\n" for line in lines)
        ours = outcome(lambda: sniroute_yaml.data(sniroute_yaml.parse_yaml(text.encode())),
                       allowed=(sniroute_yaml.YamlError,))
        if isinstance(ours, No):
            return NOTHING
        file.write_text(text)
        ended = subprocess.run([program, "config", "view", "--raw", "-o", "json"], capture_output=True, text=True,
                               env={"KUBECONFIG": str(file), "HOME": str(file.parent)})
        if ended.returncode:
            return Verdict("laxer", ended.stderr.rpartition(": ")[2].strip())
        theirs = json.loads(ended.stdout)
        try:
            said = ours["clusters"][0]["cluster"]["extensions"][0]["extension"]["v"]
            told = theirs["clusters"][0]["cluster"]["extensions"][0]["extension"]["v"]
        except (KeyError, IndexError, TypeError):
            return NOTHING
        if isinstance(said, str) and len(said) > sniroute_yaml.DIGITS_MAX and isinstance(told, (int, float)):
            return Verdict("stricter", "a number of many digits")
        return SAME if said == told else Verdict("differs", f"{said!r}, and kubectl {told!r}")

    with tempfile.TemporaryDirectory(prefix="referee-") as folder:
        file = pathlib.Path(folder, "config")
        yield judge


# -- HPACK and HTTP/2 --------------------------------------------------------------------------


@contextlib.contextmanager
def hpack_of_pypi() -> Iterator[Judge]:
    """hpack."""
    try:
        import hpack
    except ImportError:
        raise Missing("PyPI package hpack") from None

    def judge(data: bytes) -> Verdict:
        ours, theirs = sniroute_hpack.Decoder(), hpack.Decoder(sniroute_hpack.LIST_MAX)
        was = NOTHING
        for block in fuzz_web.blocks_of(data):
            found = outcome(ours.decode, block)
            try:
                said = [(bytes(name), bytes(value)) for name, value in theirs.decode(block, raw=True)]
            except hpack.OversizedHeaderListError:
                return SAME if isinstance(found, No) else Verdict("laxer", "their list is shorter")
            except hpack.HPACKError as error:
                return SAME if isinstance(found, No) else Verdict("laxer", str(error))
            if isinstance(found, No):
                return Verdict("stricter", found.words)
            if found != said:
                return Verdict("differs", f"{found!r}, and hpack {said!r}")
            was = SAME
        return was
    yield judge


def whole_frames(data: bytes) -> bytes:
    """Up to the end of the last frame that is whole: h2 waits for the rest of DATA, and we do not."""
    at = len(PREFACE)
    while at + 9 <= len(data) and (end := at + 9 + int.from_bytes(data[at:at + 3], "big")) <= len(data):
        at = end
    return data[:at]


@contextlib.contextmanager
def h2_of_pypi() -> Iterator[Judge]:
    """h2."""
    try:
        import h2.config
        import h2.connection
        import h2.events
        import h2.exceptions
    except ImportError:
        raise Missing("PyPI package h2") from None

    def told(data: bytes) -> Any:
        server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        server.initiate_connection()
        server.increment_flow_control_window(1 << 20)
        found: list[Any] = []
        try:
            events = server.receive_data(data)
        except (h2.exceptions.H2Error, ValueError, KeyError, IndexError, AssertionError) as error:
            return f"{type(error).__name__} {error}"
        for event in events:
            if isinstance(event, h2.events.RequestReceived):
                found.append(("Opened", event.stream_id, [(bytes(name), bytes(value)) for name,
                                                          value in event.headers]))
            elif isinstance(event, h2.events.DataReceived) and event.data:
                found.append(("Data", event.stream_id, bytes(event.data)))
            elif isinstance(event, h2.events.StreamEnded):
                found.append(("Ended", event.stream_id))
            elif isinstance(event, h2.events.StreamReset):
                found.append(("Reset", event.stream_id, int(event.error_code)))
            elif isinstance(event, h2.events.ConnectionTerminated):
                found.append(("GoneAway", int(event.error_code)))
        return found

    def by_stream(events: list[Any]) -> Any:
        """What was heard of each stream, in its order; data joined."""
        found: dict[int, list[Any]] = collections.defaultdict(list)
        for kind, number, *rest in events:
            if kind == "Data" and found[number] and found[number][-1][0] == "Data":
                found[number][-1] = kind, found[number][-1][1] + rest[0]
            else:
                found[number].append((kind, *rest))
        return dict(found)

    def judge(data: bytes) -> Verdict:
        data = whole_frames(data)
        ours = sniroute_h2.H2(False, 100, clock=lambda: 0.0)
        found = outcome(ours.feed, data)
        theirs = told(data)
        resets = any(said[3] == RST_STREAM for said in fuzz_web.said_frames(ours.data_to_send()))
        if isinstance(found, No) or resets:
            return SAME if isinstance(theirs, str) else \
                Verdict("stricter", found.words if isinstance(found, No) else "a stream that we reset")
        if isinstance(theirs, str):
            return Verdict("laxer", theirs)
        shown = [event[:3] for event in fuzz_web.shown(found) if event[0] in ("Opened", "Data", "Ended", "Reset")]
        theirs = [event for event in theirs if event[0] != "GoneAway"]
        shown = [event for event in shown if event[0] != "Data" or event[2]]
        same = by_stream(shown) == by_stream(theirs)
        return SAME if same else Verdict("differs", f"{by_stream(shown)!r}, and h2 {by_stream(theirs)!r}")
    yield judge


# -- the command line --------------------------------------------------------------------------


class Referee(NamedTuple):
    """One of them, as a row."""

    target: str  # of testbed/fuzz.py: where its inputs are from
    judge: Callable[[], contextlib.AbstractContextManager[Judge]]


REFEREES = {
    "hellos": Referee("hello", hellos),
    "http.server": Referee("request", python_server),
    "nginx": Referee("request", nginx),
    "haproxy": Referee("request", haproxy),
    "pyyaml": Referee("yaml", pyyaml),
    "kubectl": Referee("yaml", kubectl),
    "hpack": Referee("hpack", hpack_of_pypi),
    "h2": Referee("h2-server", h2_of_pypi),
}


def compare(name: str, runs: int, seed: int) -> tuple[collections.Counter[str], list[tuple[bytes, str]]]:
    """So many inputs: how often each kind of verdict came, and the differences that are not known."""
    referee = REFEREES[name]
    target = fuzz.load(referee.target)
    rng = random.Random(f"{seed} {name}")
    kinds: collections.Counter[str] = collections.Counter()
    faults: list[tuple[bytes, str]] = []
    with referee.judge() as judge:
        target = target._replace(seeds=[seed for seed in target.seeds if judge(seed).kind])
        for number in range(runs):
            data = target.seeds[number] if number < len(target.seeds) else fuzz.made(target, rng)
            verdict = judge(data)
            kinds[verdict.kind] += 1
            words = f"{name}: {verdict.kind}: {re.sub('[0-9]+', 'N', verdict.words)}"
            if verdict.kind == "differs" or verdict.kind and verdict != SAME and not any(
                    re.match(row, words) for row in KNOWN):
                faults.append((data, f"{verdict.kind} {verdict.words}"))
                if len(faults) >= fuzz.SHOWN:
                    break
    return kinds, faults


def main(words: Sequence[str]) -> int:
    """The command line; 1 where there was a difference that nobody knows."""
    parser = argparse.ArgumentParser(prog="python3 -m testbed.referees", description="Programs that read the same.")
    parser.add_argument("names", nargs="?", default=",".join(REFEREES), help=", ".join(REFEREES))
    parser.add_argument("--runs", type=int, default=20_000, help="inputs for each (20000)")
    parser.add_argument("--seed", type=int, default=1, help="other inputs")
    asked = parser.parse_args(words)
    names = asked.names.split(",")
    if unknown := [name for name in names if name not in REFEREES]:
        parser.error(f"there is no referee {', '.join(unknown)}")
    found = 0
    for name in names:
        try:
            kinds, faults = compare(name, asked.runs, asked.seed)
        except Missing as error:
            print(f"{name:12} is not here: {error}", flush=True)
            continue
        found += len(faults)
        shown = ", ".join(f"{count:,} {kind or 'not compared'}" for kind, count in sorted(kinds.items()))
        print(f"{name:12} {shown}; {len(faults)} faults", flush=True)
        for data, what in faults[:5]:
            print(f"    fault: {what}\n    input: {data!r}", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
