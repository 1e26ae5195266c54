"""fuzz_preludes: targets of testbed/fuzz.py for what comes first on a connection, and for what operators write.

Preludes have their checks in testbed/endure_inputs.py already: here they are functions of bytes.  Beyond those: what we
write is read again as it was, in PROXY headers, names, patterns, routes and targets.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import functools
import json
import os
import shutil
import tempfile
import tomllib
from typing import Any, Callable

import sniroute_settings
import sniroute_wire as wire
from sniroute_guards import PROTOCOLS, protocol_of
from sniroute_names import parse_host_port, show_address
from sniroute_patterns import Fielded, fields_of, parse_pattern, written
from sniroute_refusals import SettingsError
from sniroute_routes import parse_port_route, parse_route
from sniroute_settings import SETTINGS, Settings, load_settings, parse_command_line
from testbed import endure_inputs
from testbed.fuzz_oracles import No, choice_of, dice_of, expect, measured, outcome, prefixes, same

corpus = functools.cache(endure_inputs.corpus)


def text_of(data: bytes) -> str:
    """The bytes as an argument, a variable or a file name has them in Python."""
    return data.decode("utf-8", "surrogateescape")


# -- preludes ----------------------------------------------------------------------------------

HELLOS = endure_inputs.Hellos()


def of_inputs(check: Callable[[bytes, Any], Any]) -> Callable[[bytes], None]:
    """A check of endure_inputs as a target."""
    def target(data: bytes) -> None:
        measured(data, check, data, dice_of(data))
    return target


hello = of_inputs(HELLOS.check)
hello_body = of_inputs(endure_inputs.check_body)
prelude = of_inputs(HELLOS.check_prelude)
name = of_inputs(endure_inputs.check_name)


def proxy(data: bytes) -> None:
    """A PROXY header of either version; one of ours for the same client says the same."""
    for parse, write in ((wire.parse_proxy_v1, wire.proxy_v1), (wire.parse_proxy_v2, wire.proxy_v2)):
        found = prefixes(data, parse)
        if not isinstance(found, wire.ProxyHeader):
            continue
        expect(0 < found.size <= len(data) and 0 <= found.port < 65536, f"it says {found!r}")
        if found.source is not None and found.destination is not None:
            ours = write((str(found.source), found.port), found.destination)
            again = parse(ours)
            expect(again is not None, "a header of ours is not whole")
            same((again.source, again.port, again.destination, again.size),
                 (found.source, found.port, found.destination, len(ours)), "ours and theirs")


def startup(data: bytes) -> None:
    """The first packet of a PostgreSQL client."""
    prefixes(data, wire.parse_startup)


def guard(data: bytes) -> None:
    """Which blocked protocol a caller of NodePass speaks: once that is known, more bytes change nothing."""
    kinds = frozenset(kind for at, kind in enumerate(PROTOCOLS) if choice_of(data, 7) + 1 >> at & 1)
    found = prefixes(data[:600], lambda said: protocol_of(said, kinds, False))
    whole = protocol_of(data[:600], kinds, True)
    expect(whole is not None and (found is None or whole == found), f"{found!r}, and {whole!r} at the end")


# -- what operators write ----------------------------------------------------------------------


def pattern(data: bytes) -> None:
    """A pattern: its one form means the same, and a name made of it fits it."""
    text = text_of(data)
    found = outcome(parse_pattern.__wrapped__, text, allowed=(ValueError,))
    if isinstance(found, No):
        return
    shown = written(found)
    same(parse_pattern(shown), found, f"{shown!r} and {text!r}")
    same(written(parse_pattern(shown)), shown, "the one form")
    if found.fields:
        sample = found.sample("a")["name"]
        expect(any(True for _ in found.splits(sample)), f"{sample!r} does not fit {shown!r}")
        index = Fielded()
        index.add(shown)
        same(index.find([found.stars], sample), shown, "what is found")
        index.remove(shown)
        expect(not (index.sizes or index.used or index.ends or index.places), "the index keeps something")
        expect(fields_of(sample)["name"] == sample, "the name is another")


def route(data: bytes) -> None:
    """A route or a port of the settings; and HOST:PORT."""
    text = text_of(data)
    found = measured(data, lambda: outcome(parse_route, text, allowed=(ValueError,)))
    outcome(parse_port_route, text, allowed=(ValueError,))
    if not isinstance(found, No) and not found.members and not found.secrets:
        again = parse_route(f"{found.pattern}={found.target}")
        same((again.pattern, again.target), (found.pattern, found.target), "written again")
    place = outcome(parse_host_port, text, allowed=(ValueError,))
    if not isinstance(place, No):
        same(parse_host_port(show_address(place)), place, "the address shown")


@functools.cache
def folder() -> str:
    """Where files of settings are, in memory if there is such a place."""
    made = tempfile.mkdtemp(prefix="sniroute-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@functools.cache
def given(words: tuple[str, ...]) -> argparse.Namespace:
    """A command line as the program understands it."""
    return parse_command_line(words)


def load(*words: str, environ: dict[str, str] | None = None, running: Settings | None = None) -> Settings:
    """Settings as a router has them.  The command line is the same each time, and half of the time: it is kept."""
    sniroute_settings.parse_command_line = lambda argv: copy.copy(given(tuple(argv)))
    try:
        return load_settings(words, environ or {}, running)
    finally:
        sniroute_settings.parse_command_line = parse_command_line


def settings(data: bytes) -> None:
    """A file of settings: all of them, or a line for each fault, which names the file."""
    path = os.path.join(folder(), f"{os.getpid()}.toml")
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)
    found = measured(data, lambda: outcome(load, "-c", path, allowed=(SettingsError,)))
    if isinstance(found, No):
        expect(found.words and all(line.strip() for line in found.words.split("\n")), "a fault without a word")
        return
    if not data:
        return  # an empty file is none of a router that runs
    again = load("-c", path, running=found)
    for row in SETTINGS:
        if row.field != "routes":
            same(getattr(again, row.field, None), getattr(found, row.field, None), f"{row.field}, read again")


def toml(value: Any) -> str:
    """A value of JSON as TOML has it in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return '""' if value is None else json.dumps(value)


def settings_tree(data: bytes) -> None:
    """The same from JSON, so that what is read is TOML more often than not."""
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(table, dict):
        text = "".join(f"{json.dumps(key)} = {toml(value)}\n" for key, value in table.items())
        settings(text.encode("utf-8", "replace"))


def options(data: bytes) -> None:
    """Settings in the environment: the first byte says which, the rest is its value."""
    if not data:
        return
    row = SETTINGS[data[0] % len(SETTINGS)]
    if row.variable:
        text = text_of(data[1:]).replace("\0", "")  # no variable has one
        outcome(functools.partial(load, environ={row.variable: text}), allowed=(SettingsError,))


# -- seeds -------------------------------------------------------------------------------------

ROUTES = (
    b"db.example.com=tcp:192.0.2.10:5432", b"*.example.com=tcp:{label}.internal:80",
    b"**.example.com=cloudflared:{name}",
    b"{shop}--{env}.example.com=tcp:[2001:db8::1]:443", b"*=carrier:{name}", b"a.example.com=unix:/run/{label}.sock",
    b"a.example.com=tcp:192.0.2.1:1,192.0.2.2:2", b"A.Example.com.=kubernetes:prod/svc/web:80@main",
    b"{pod}.k.example.com=jump:prod/pod/{pod}/db.internal:5432", b"x.example.com=nodepass:key@nat.example.com:10101",
    b"192.0.2.1:5432=tcp:[::1]:5432", b"x.example.com=exec:ssh -W {name}:22 jump",
    b"e.example.com=command:nc {address}",
    b"[2001:db8::1]:443", b"*:8080", b"192.0.2.1:65535", b"example.com:0", b"127.0.0.1:5000=cloudflared:db.example.com")
PATTERNS = (b"db.example.com", b"*.example.com", b"**.a.b.example.com.", b"*", b"{a}.example.com",
            b"{service}--{env}.shop-1.example.com", b"x-{a}-y.{b}.example.com", b"**.{a}.example.com", b"A{x}B.c")
SETTINGS_FILES = (
    b'listen = "127.0.0.1:8443"\nidle = "5m"\nmax_connections = 100\n[routes]\n"db.example.com" = '
    b'"tcp:192.0.2.10:5432"\n'
    b'"*.example.com" = { target = "tcp:{label}.internal:80", allow = ["192.0.2.0/24"], http = "forward" }\n',
    b'proxy_from = ["192.0.2.0/24", "::1/128"]\nproxy_protocol = "auto"\ntunnel_ports = "20000-20100"\nlog_format = '
    b'"json"\n[routes]\n'
    b'"a.example.com" = { target = ["tcp:192.0.2.1:80", "tcp:192.0.2.2:80"], balance = "least", health = "tls", warm '
    b'= 2,'
    b' tries = 2, max_lifetime = "1h" }\n[ports]\n"127.0.0.1:5432" = "tcp:192.0.2.10:5432"\n',
    b'admin = "127.0.0.1:9000"\n[registry]\nlisten = "127.0.0.1:7000"\ndomains = ["tun.example.com"]\n'
    b'targets = ["tcp"]\nnetworks = ["192.0.2.0/24"]\nttl = "60s"\n[registry.owners.alice]\n'
    b'token = "sha256:' + b"0a" * 32 + b'"\nnames = ["*.alice.tun.example.com"]\n[routes]\n"a.example.com" = '
                                         b'"tcp:192.0.2.1:1"\n',
    b'[kubernetes.contexts]\nmain = "prod"\n[routes]\n"k.example.com" = "kubernetes:prod/svc/web:80@main"\n'
    b'"n.example.com" = "nodepass:key@192.0.2.9:10101"\n"*" = "cloudflared:{name}"\n',
    b"prelude_timeout = 5\nports = [1, 2]\nquiet = true\nx = 1979-05-27T07:32:00Z\n[[a]]\nb = nan\n")
TOML_WORDS = tuple(row.file_key.encode() + b" = " for row in SETTINGS if row.file_key) + (
    b'""', b"[routes]\n", b"[registry]\n", b"[registry.owners.a]\n", b"true", b"1e999", b"nan", b"{}", b"[]", b"''",
    b'"""',
    b'"\\u0000"', b'"\\ud800"', b"0x", b"-1", b'"off"', b'"\\n"', b'"192.0.2.0/24"', b"99999999999999999999", b"{name}")


def settings_trees() -> list[bytes]:
    """The files as JSON; dates are texts there."""
    return [json.dumps(tomllib.loads(text.decode()), default=str).encode() for text in SETTINGS_FILES]


def option_seeds() -> list[bytes]:
    """A value for each setting in turn."""
    values = (b"5m", b"off", b"127.0.0.1:8443", b"192.0.2.0/24,::1/128", b"20000-20100", b"auto", b"100", b"json", b"1",
              b"a.example.com=tcp:192.0.2.1:80", b"/run/x.sock", b"zone=192.0.2.0/24", b"1G")
    return [bytes((number,)) + value for number in range(len(SETTINGS)) for value in values]
