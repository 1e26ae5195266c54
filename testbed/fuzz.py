"""fuzz: every parser without I/O, on inputs that nobody has written; any fuzzer may drive it.

    python3 -m testbed.fuzz                                all targets, 1,000 inputs each
    python3 -m testbed.fuzz hello,yaml --runs 1000000 --seed 7   two of them at full length
    python3 -m testbed.fuzz request --input FILE           one input again
    python3 -m testbed.fuzz h2-server --atheris --seconds 60 [--corpus DIR]   guided by coverage

    seeds ---> mutations, in plain Python  --+
    seeds ---> Atheris, or what you have   --+--> TARGETS[name].run(bytes) ---> nothing, or an exception

A target is a function of bytes.  It raises for what the parser must not do: an exception that is not documented,
another answer in pieces, a result out of bounds, what is written and then read as something else, too many lines of
Python for so few bytes.  testbed/fuzz_oracles.py has these questions.  The same bytes give the same result.

Atheris (PyPI) is no dependency: it is imported where it is asked for.  An input that it finds is named in its output.

Seams: a new parser is a row in TARGETS, with seeds that it takes; a room without I/O and without a target is a row in
NO_TARGET, with the reason.  test_fuzz.py holds both to the table in CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import pathlib
import random
import signal
import sys
import tempfile
import time
import traceback
from typing import Any, Callable, Iterator, NamedTuple, Sequence

PARTS = "fuzz_preludes", "fuzz_web", "fuzz_options"
SHOWN = 20  # faults of a target that are told
ENDS = 20.0  # seconds of CPU for one input: the slowest takes a thousandth of it
SIZE_MAX = 4096  # bytes of an input, which most parsers take for far too much


class Row(NamedTuple):
    """A target as the table has it."""

    rooms: str  # whose parsers it runs
    where: str  # PART.FUNCTION, without `fuzz_`
    seeds: str  # a name of the part: inputs, or a function that makes them
    words: str = ""  # a name of the part: what means something there


class Target(NamedTuple):
    """A target, ready to run."""

    name: str
    run: Callable[[bytes], None]
    seeds: list[bytes]
    words: tuple[bytes, ...]


TARGETS = {
    "prelude": Row("wire", "preludes.prelude", "corpus preludes"),
    "hello": Row("wire", "preludes.hello", "corpus hellos"),
    "hello-body": Row("wire", "preludes.hello_body", "corpus bodies"),
    "proxy": Row("wire", "preludes.proxy", "corpus lines blocks"),
    "startup": Row("wire", "preludes.startup", "corpus postgres"),
    "name": Row("names", "preludes.name", "corpus names"),
    "guard": Row("guards", "preludes.guard", "corpus preludes requests"),
    "pattern": Row("patterns", "preludes.pattern", "PATTERNS"),
    "route": Row("routes targets names", "preludes.route", "ROUTES"),
    "settings": Row("settings options values owners", "preludes.settings", "SETTINGS_FILES", "TOML_WORDS"),
    "settings-tree": Row("settings options values owners", "preludes.settings_tree", "settings_trees"),
    "options": Row("settings values", "preludes.options", "option_seeds"),
    "request": Row("http gateway answers", "web.request", "REQUESTS FULL", "HTTP_WORDS"),
    "response": Row("http upgrade", "web.response", "RESPONSES", "HTTP_WORDS"),
    "chunks": Row("http", "web.chunks", "CHUNK_SEEDS", "HTTP_WORDS"),
    "door": Row("door", "web.door_head", "HEAD_SEEDS", "HTTP_WORDS"),
    "frames": Row("upgrade", "web.frames", "FRAME_SEEDS"),
    "masked-frames": Row("upgrade", "web.masked_frames", "CLIENT_FRAMES"),
    "prior-knowledge": Row("http2 hpack", "web.prior_knowledge", "PRIOR_SEEDS"),
    "hpack": Row("hpack", "web.header_blocks", "HPACK_SEEDS"),
    "h2-server": Row("h2 http2 hpack", "web.h2_server", "SERVER_SEEDS"),
    "h2-client": Row("h2 http2 hpack", "web.h2_client", "CLIENT_SEEDS"),
    "h2-pair": Row("h2", "web.h2_pair", "PAIR_SEEDS"),
    "spdy": Row("spdy", "options.spdy_session", "spdy_frames"),
    "tunnel": Row("channels spdy", "options.spdy_tunnel", "tunnel_frames"),
    "ports": Row("channels", "options.port_channels", "PORT_SEEDS"),
    "command": Row("channels", "options.command_channels", "COMMAND_SEEDS"),
    "status": Row("channels", "options.command_status", "STATUS_SEEDS", "JSON_WORDS"),
    "yaml": Row("yaml", "options.yaml_text", "YAML_SEEDS KUBECONFIG_SEEDS", "YAML_WORDS"),
    "kubeconfig": Row("kubeconfig yaml", "options.kubeconfig_file", "KUBECONFIG_SEEDS", "YAML_WORDS"),
    "plugin": Row("plugins", "options.plugin_answer", "PLUGIN_SEEDS", "JSON_WORDS"),
    "kube-target": Row("objects", "options.kube_target", "TARGET_SEEDS"),
    "kube-object": Row("objects", "options.kube_object", "OBJECT_SEEDS", "JSON_WORDS"),
    "redis": Row("resp", "options.redis_answers", "REDIS_SEEDS"),
    "urls": Row("resp dns", "options.urls", "URL_SEEDS"),
    "watched": Row("conversations", "options.watched", "WATCHED_SEEDS"),
    "probes": Row("probes", "options.probed", "PROBE_SEEDS"),
    "proxies": Row("layers", "options.proxies", "PROXY_SEEDS"),
    "dns": Row("dns", "options.dns_message", "dns_seeds"),
    "claim": Row("owners", "options.claim_body", "CLAIM_SEEDS", "JSON_WORDS"),
    "claim-text": Row("registry", "options.claim_text", "CLAIM_TEXTS", "JSON_WORDS"),
    "owners": Row("owners", "options.owner_table", "OWNER_SEEDS", "JSON_WORDS"),
    "signals": Row("signals", "options.signal_lines", "SIGNAL_SEEDS"),
    "signal-json": Row("signals", "options.signal_json", "SIGNAL_JSON", "JSON_WORDS"),
    "handshake": Row("signals", "options.handshake", "HANDSHAKE_SEEDS"),
    "datagrams": Row("signals", "options.datagrams", "DATAGRAM_SEEDS"),
    "node-url": Row("nodeurl", "options.node_url", "NODE_URL_SEEDS"),
    "node-times": Row("nodeurl", "options.node_times", "TIME_SEEDS"),
    "instance": Row("children", "options.instance_record", "record_seeds", "JSON_WORDS"),
    "mcp": Row("mcp", "options.mcp_body", "mcp_seeds", "JSON_WORDS"),
}
NO_TARGET = {  # rooms without I/O that read no bytes of others
    "claims": "a table with a clock; test_claims.py compares it with a model",
    "transports": "what we ask of a pod; its answers are read by `response`, `spdy`, `tunnel`, `ports` and `command`",
}


def load(name: str) -> Target:
    """A target by its name.  Its rooms are imported now."""
    row = TARGETS[name]
    part, _, function = row.where.partition(".")
    module = importlib.import_module(f"testbed.fuzz_{part}")
    seeds: list[bytes] = []
    kinds = row.seeds.split()
    if kinds[0] == "corpus":
        for kind in kinds[1:]:
            seeds += importlib.import_module("testbed.endure_inputs").corpus()[kind]
    else:
        for kind in kinds:
            found = getattr(module, kind)
            seeds += found() if callable(found) else found
    return Target(name, getattr(module, function), seeds, tuple(getattr(module, row.words)) if row.words else ())


# -- mutations in plain Python -----------------------------------------------------------------


def made(target: Target, rng: random.Random) -> bytes:
    """An input: a seed with a few faults; sometimes with a word in it, or a part of it many times."""
    from testbed.endure_inputs import mutated
    data = mutated(target.seeds, rng)
    for _ in range(rng.choice((0, 0, 1, 2)) if target.words else 0):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(target.words) + data[at + rng.choice((0, 0, 0, 1, 4)):]
    if rng.randrange(50) == 0 and data:
        at = rng.randrange(len(data))
        end = at + rng.choice((1, 2, 8, 40))
        data = data[:at] + data[at:end] * rng.choice((10, 100, 1000)) + data[end:]
    return data[:SIZE_MAX]


VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 1, 65536, 1 << 70, 0.5, 1e300, "", "a", "0", "\u00e9", "\x00",
                           "\ud800",
                          "x" * 300, "192.0.2.1", "*", "{name}", [], {}, [[]], {"": None}, ["a", "a"])


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each place in a tree of JSON: what is around it, and its key or number there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def grown(target: Target, rng: random.Random) -> bytes:
    """JSON of a seed with a few other values in it: what reads it does not fail at its commas."""
    trees = [json.loads(seed) for seed in target.seeds]
    tree = copy.deepcopy(rng.choice(trees))
    others = places(rng.choice(trees))
    for _ in range(rng.choice((1, 1, 2, 4))):
        found = places(tree)
        if not found:
            break
        around, key = rng.choice(found)
        what = rng.randrange(6)
        if what == 0:
            del around[key]
        elif what == 1 and isinstance(around, dict):
            around[rng.choice(VALUES[10:18])] = around.pop(key)
        elif what == 2 and others:
            near, there = rng.choice(others)
            around[key] = copy.deepcopy(near[there])
        elif what == 3 and isinstance(around[key], str):
            text = made(target._replace(seeds=[around[key].encode("utf-8", "surrogatepass")], words=()), rng)
            around[key] = text.decode("utf-8", "replace")
        else:
            around[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(tree).encode()


def is_json(data: bytes) -> bool:
    """Whether it is an object."""
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


class Report(NamedTuple):
    """What came of a target."""

    runs: int
    seconds: float
    slowest: tuple[float, bytes]  # for people: a host may be busy
    faults: list[tuple[bytes, str]]


def told(error: Exception) -> str:
    """An exception, for people."""
    return str(error) if type(error).__name__ == "Fault" else traceback.format_exc(limit=-4)


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """What takes more CPU than ENDS is a fault: a regular expression may take for ever.  Main thread only."""
    def over(*_: object) -> None:
        raise TimeoutError(f"it takes more than {ENDS:g} s of CPU")
    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, ENDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def run(target: Target, runs: int, seed: int) -> Report:
    """So many inputs: the seeds, then mutations."""
    trees = target._replace(seeds=[seed for seed in target.seeds if is_json(seed)])
    has_trees = len(trees.seeds) * 2 > len(target.seeds)
    rng = random.Random(f"{seed} {target.name}")
    faults: list[tuple[bytes, str]] = []
    slowest = 0.0, b""
    began = time.monotonic()
    for number in range(runs):
        if number < len(target.seeds):
            data = target.seeds[number]
        else:
            data = grown(trees, rng) if has_trees and rng.randrange(3) else made(target, rng)
        start = time.monotonic()
        try:
            with in_time():
                target.run(data)
        except Exception as error:
            faults.append((data, told(error)))
            if len(faults) >= SHOWN:
                break
        slowest = max(slowest, (time.monotonic() - start, data))
    return Report(number + 1, time.monotonic() - began, slowest, faults)


def smaller(target: Target, data: bytes) -> bytes:
    """An input with the same fault, from which nothing can be left out."""
    def fails(each: bytes) -> str:
        try:
            with in_time():
                target.run(each)
        except Exception as error:
            return type(error).__name__
        return ""
    kind, size = fails(data), max(1, len(data) // 2)
    while kind and size:
        at = 0
        while at < len(data):
            less = data[:at] + data[at + size:]
            if fails(less) == kind:
                data = less
            else:
                at += size
        size //= 2
    return data


# -- a fuzzer that is guided by coverage -------------------------------------------------------


def guided(name: str, runs: int, seconds: int, seed: int, corpus: str | None) -> None:
    """Give a target to Atheris, which ends the process."""
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not here: python3 -m pip install atheris")
    rooms = sorted(path.stem for path in pathlib.Path(__file__).parent.parent.glob("sniroute_*.py"))
    with atheris.instrument_imports(include=rooms, enable_loader_override=False):
        for part in PARTS:
            importlib.import_module(f"testbed.{part}")
    target = load(name)
    folder = pathlib.Path(corpus or tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds):
        (folder / f"seed-{number}").write_bytes(data)
    more = []
    if target.words:
        words = folder.with_name(folder.name + ".dict")
        words.write_text("".join('"%s"\n' % "".join(f"\\x{byte:02x}" for byte in word) for word in target.words))
        more = [f"-dict={words}"]
    atheris.Setup([sys.argv[0], f"-runs={runs}", f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={SIZE_MAX}",
                   f"-artifact_prefix={folder}/",
                   "-timeout=10", *more, str(folder)], target.run)
    atheris.Fuzz()


# -- the command line --------------------------------------------------------------------------


def main(words: Sequence[str]) -> int:
    """The command line; 1 where there was a fault."""
    parser = argparse.ArgumentParser(prog="python3 -m testbed.fuzz", description="Parsers on inputs that nobody wrote.")
    parser.add_argument("names", nargs="?", default=",".join(TARGETS), help="targets, with commas: "
                        + ", ".join(TARGETS))
    parser.add_argument("--runs", type=int, default=0, help="inputs for each (1000; the long form has 1000000)")
    parser.add_argument("--seed", type=int, default=1, help="other inputs")
    parser.add_argument("--input", help="a file: one input, once")
    parser.add_argument("--atheris", action="store_true", help="let Atheris choose the inputs of one target")
    parser.add_argument("--corpus", help="a folder where Atheris keeps what it finds")
    parser.add_argument("--seconds", type=int, default=60, help="how long Atheris takes (60)")
    asked = parser.parse_args(words)
    names = asked.names.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"there is no target {', '.join(unknown)}")
    if asked.atheris:
        if len(names) != 1:
            parser.error("--atheris takes one target")
        guided(names[0], asked.runs or -1, asked.seconds, asked.seed, asked.corpus)
        return 0
    found = 0
    for name in names:
        target = load(name)
        if asked.input:
            target.run(pathlib.Path(asked.input).read_bytes())
            continue
        report = run(target, asked.runs or 1000, asked.seed)
        found += len(report.faults)
        print(f"{name:16} {report.runs:9,} inputs, {report.runs / report.seconds:7,.0f} a second, the slowest "
              f"{report.slowest[0] * 1000:.1f} ms of {len(report.slowest[1]):,} bytes, {len(report.faults)} faults",
              flush=True)
        for data, what in report.faults[:3]:
            print(f"    fault: {what.strip()}\n    input: {smaller(target, data)!r}", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
