"""Tests of sniroute_settings.py: single settings, what the host can bear, the file, and the program's own words."""

from __future__ import annotations

import codecs
import contextlib
import ipaddress
import os
import pathlib
import re
import resource
import stat
import sys
import tempfile
import time
from typing import Any, Callable

import pytest

import sniroute
import sniroute_host
import sniroute_launchers
import sniroute_names
import sniroute_options
import sniroute_settings
import sniroute_values
from sniroute_certificate import self_signed
from sniroute_refusals import SettingsError
from sniroute_routes import Route
from sniroute_settings import SETTINGS, load_settings
from conftest import HOST, linux
from testbed.hellos import HELLO, genuine
from testbed.program import PROGRAM, command, environment, execute
from testbed.running import ROUTES_FILE, alert, answer, read_all, route, toml


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, seconds", [
    ("300s", 300), ("5m", 300), ("1h30m", 5400), ("500ms", 0.5), ("1.5s", 1.5), ("1h2m3s4ms", 3723.004),
    ("8784h", 366 * 86400),
    ("", None), ("0s", None), ("5", None), ("-5s", None), ("5 s", None), ("5S", None), ("1m1h", None), ("1e3s", None),
    ("8785h", None), ("9" * 400 + "h", None), ("\u0661s", None), ("5s\n", None), ("nans", None), ("infs", None),
    ("off", None),
])
def test_durations(text, seconds):
    if seconds is None:
        with pytest.raises(ValueError, match="is not a duration"):
            sniroute_values.parse_duration(text)
    else:
        assert sniroute_values.parse_duration(text) == sniroute_values.parse_off_or_duration(text) == pytest.approx(seconds)


PARSERS = {
    "off": (sniroute_values.parse_off_or_duration, "off", 0.0),
    "0s": (sniroute_values.parse_none_or_duration, "0s", 0.0),
    "count-1": (sniroute_values.parse_count, "1", 1),
    "count-a-million": (sniroute_values.parse_count, "1000000", 1_000_000),
    **{f"no-count-{text!r}": (sniroute_values.parse_count, text, ValueError)
       for text in ("0", "-1", "01", "1.0", "1000001", "9999999", "", "x", "\u0661", "1_0", " 1")},
    "listen-everywhere": (sniroute_values.parse_listen, ":19000", ("*", 19000)),
    "listen-on-a-host": (sniroute_values.parse_listen, "127.0.0.1:0", ("127.0.0.1", 0)),
    "listen-on-v6": (sniroute_values.parse_listen, "[::]:443", ("::", 443)),
    **{f"no-listen-{text!r}": (sniroute_values.parse_listen, text, ValueError)
       for text in ("19000", "::1:443", ":", "h:x", "")},
    "ports": (sniroute_values.parse_ports, "20000-20100", (20000, 20100)),
    "one-port": (sniroute_values.parse_ports, "1-1", (1, 1)),
    **{f"no-ports-{text!r}": (sniroute_values.parse_ports, text, ValueError)
       for text in ("20000", "2-1", "0-5", "1-65536", "a-b", "1-2-3", "", "1--2", "\u0661-5")},
    "no-networks": (sniroute_values.parse_networks, "none", ()),
    "networks": (sniroute_values.parse_networks, "10.0.0.0/8, fc00::/7",
                 (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fc00::/7"))),
    "networks-of-ipv4-in-ipv6": (sniroute_values.parse_networks, "::ffff:127.0.0.0/104,::FFFF:c000:207,::/0",
                                 tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "192.0.2.7/32", "::/0")))),
    "listen-on-ipv4-in-ipv6": (sniroute_values.parse_listen, "[::ffff:127.0.0.1]:443", ("127.0.0.1", 443)),
    "an-address-is-a-network": (sniroute_values.parse_networks, "192.0.2.1", (ipaddress.ip_network("192.0.2.1/32"),)),
    **{f"no-networks-{text!r}": (sniroute_values.parse_networks, text, ValueError)
       for text in ("", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.0/8,", "x", "none,10.0.0.0/8")},
    "on": (sniroute_values.parse_switch, "on", True),
    "true": (sniroute_values.parse_switch, "true", True),
    "false": (sniroute_values.parse_switch, "false", False),
    **{f"no-switch-{text!r}": (sniroute_values.parse_switch, text, ValueError) for text in ("", "yes", "1", "ON")},
    "port-65535": (sniroute_values.parse_port, "65535", 65535),
    **{f"no-port-{text!r}": (sniroute_values.parse_port, text, ValueError)
       for text in ("0", "65536", "080", "-1", "", "8443\n", "\u0661")},
    "no-verify": (sniroute_values.parse_verify, "false", False),
    "verify": (sniroute_values.parse_verify, "true", True),
    "host": (sniroute_values.parse_host, "Web.Internal.", "web.internal"),
    "host-of-one-label": (sniroute_values.parse_host, "web", "web"),
    "host-of-the-backend": (sniroute_values.parse_host, "backend", "backend"),
    "host-with-fields": (sniroute_values.parse_host, "{service}-{env}.internal", "{service}-{env}.internal"),
    **{f"no-host-{text!r}": (sniroute_values.parse_host, text, ValueError)
       for text in ("", "192.0.2.1", "h:80", "http://h/", "a b", "h\r\nX: y", "*.internal", "{a.b", "m\u00fcnchen.example")},
    "upgrades": (sniroute_values.parse_upgrades, "Foo/2, websocket,bar", ("websocket", "foo/2", "bar")),
    "no-upgrades": (sniroute_values.parse_upgrades, "none", ()),
    "an-empty-list-of-upgrades": (sniroute_values.parse_upgrades, "", ()),
    **{f"no-upgrades-{text!r}": (sniroute_values.parse_upgrades, text, ValueError)
       for text in ("a b", "a,,b", "h2c", "H2C", "websocket,h2c", "a/b/c", "none,a", "a\r\nb", "\u00e4")},
    "a-word": (sniroute_values.one_of("a", "b"), "b", "b"),
    "no-word": (sniroute_values.one_of("a", "b"), "B", ValueError),
}


@pytest.mark.parametrize("parse, text, expected", PARSERS.values(), ids=PARSERS)
def test_the_text_of_a_setting(parse, text, expected):
    if expected is ValueError:
        with pytest.raises(ValueError) as caught:
            parse(text)
        assert "\n" not in str(caught.value)
    else:
        assert parse(text) == expected


def test_a_network_with_the_prefix_of_ipv4_in_ipv6_is_told_how_to_write_it():
    with pytest.raises(ValueError, match="IPv4 is written without ::ffff:"):
        sniroute_values.parse_networks("::ffff:127.0.0.0/8")


def test_a_network_of_ipv4_in_ipv6_is_ipv4_in_every_setting(settings_file):
    path = settings_file('proxy_from = "::ffff:192.0.2.0/120"\n[routes]\n'
                         '"a.b" = { target = "tcp:h:1", allow = ["::ffff:127.0.0.0/104"] }\n')
    settings = load_settings(["-c", path], {})
    assert settings.proxy_from == (ipaddress.ip_network("192.0.2.0/24"),)
    assert settings.routes.routes[0].allow == (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "\udcff", "\u202e"])
def test_the_path_of_a_file_says_nothing_to_a_terminal(tmp_path, name):
    """Whatever is wrong: that the file is not there, or what is in it."""
    path = tmp_path / name
    for environ, argv in (({}, ["-c", str(path)]), ({"SNIROUTE_CONFIG": str(path)}, [])):
        path.unlink(missing_ok=True)
        for _ in range(2):
            with pytest.raises(SettingsError) as caught:
                load_settings(argv, environ)
            assert all(line.isprintable() and line.isascii() for line in caught.value.lines)
            path.write_text('idle = "x"\nlistne = 1\n')
    path.write_text('listen = "127.0.0.1:1"\n')
    covered = load_settings(["-c", str(path), "--listen", "127.0.0.1:2"], {}).covered
    assert len(covered) == 1 and covered[0].isprintable()


@pytest.mark.parametrize("option, written", [
    ("--listen=m\u00fcnchen.example:443", "xn--mnchen-3ya.example:443"),
    ("--admin=m\u00fcnchen.example:443", "xn--mnchen-3ya.example:443"),
    ("--route=*.m\u00fcnchen.example=tcp:h:1", "*.xn--mnchen-3ya.example"),
    ("--route=a.b=tcp:m\u00fcnchen.example:1", "tcp:xn--mnchen-3ya.example:1"),
])
def test_a_name_with_other_letters_is_told_its_form_for_dns(option, written):
    with pytest.raises(SettingsError) as caught:
        load_settings([option], {})
    [line] = caught.value.lines
    assert line.startswith(option.partition("=")[0]) and f"; write {written}, which is its form in DNS and TLS" in line


def test_the_tunnel_program_is_one_that_strangers_cannot_replace(tmp_path, monkeypatch):
    program = tmp_path / "cloudflared"
    with pytest.raises(ValueError, match="is not a program"):
        sniroute_values.parse_program(str(program))
    program.write_text("")
    program.chmod(0o644)
    monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & stat.S_IXUSR))  # for root
    with pytest.raises(ValueError, match="is not a program"):
        sniroute_values.parse_program(str(program))
    with pytest.raises(ValueError, match="is not a program"):
        sniroute_values.parse_program(str(tmp_path))
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert sniroute_values.parse_program("./cloudflared") == str(program)
    for changed in (program, tmp_path):
        changed.chmod(0o757)
        with pytest.raises(ValueError, match=f"is not run, since {changed} can be changed by other users: chmod o-w"):
            sniroute_values.parse_program(str(program))
        changed.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(program, 4321, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 4322)
    with pytest.raises(ValueError, match="belongs to another user"):
        sniroute_values.parse_program(str(program))


# name -> on the command line, its value; in the environment, its value
SAMPLES: dict[str, tuple[list[str], Any, str, Any]] = {
    "config": ([os.devnull], os.devnull, os.devnull, os.devnull),
    "watch": (["off"], False, "false", False),  # on: it needs a file, below
    "listen": (["127.0.0.1:1", ":2"], [("127.0.0.1", 1), ("*", 2)], "[::1]:3  h:4", [("::1", 3), ("h", 4)]),
    "route": (["a.b=tcp:h:1", "*.c.d=tcp:h:2"], [Route("a.b", "tcp:h:1"), Route("*.c.d", "tcp:h:2")],
              "e.f=tcp:h:3\n*=tcp:h:4", [Route("e.f", "tcp:h:3"), Route("*", "tcp:h:4")]),
    "port": (["127.0.0.1:1=tcp:h:1", ":2=tcp:h:2"],
             [Route("port 127.0.0.1:1", "tcp:h:1"), Route("port :2", "tcp:h:2")],
             "[::1]:3=tcp:h:3", [Route("port [::1]:3", "tcp:h:3")]),
    "proxy-protocol": (["off"], "off", "required", "required"),
    "proxy-from": (["none"], (), "192.0.2.0/24", (ipaddress.ip_network("192.0.2.0/24"),)),
    "ports": (["1-2"], (1, 2), "3-4", (3, 4)),
    "idle": (["1s"], 1.0, "2s", 2.0),
    "start-timeout": (["3s"], 3.0, "4s", 4.0),
    "prelude-timeout": (["5s"], 5.0, "6s", 6.0),
    "connection-idle": (["7s"], 7.0, "off", 0.0),
    "lameduck": (["7s"], 7.0, "0s", 0.0),
    "drain": (["8s"], 8.0, "9s", 9.0),
    "http": (["forward"], "forward", "redirect", "redirect"),
    "forwarded-from": (["none"], (), "192.0.2.0/24", (ipaddress.ip_network("192.0.2.0/24"),)),
    "http-head-timeout": (["1s"], 1.0, "2s", 2.0),
    "http-idle": (["3s"], 3.0, "4s", 4.0),
    "http-response-timeout": (["5s"], 5.0, "off", 0.0),
    "error-pages": (["on"], True, "off", False),
    "max-connections": (["10"], 10, "11", 11),
    "max-per-client": (["12"], 12, "13", 13),
    "max-tunnels": (["14"], 14, "15", 15),
    "max-starting": (["16"], 16, "17", 17),
    "no-name": (["ok"], "ok", "refuse", "refuse"),
    "cloudflared": (["/bin/sh"], "/bin/sh", "/bin/cat", "/bin/cat"),
    "kubeconfig": (["/a:/b"], "/a:/b", "/c", "/c"),
    "exec-path": (["/a:/b"], "/a:/b", "/c", "/c"),
    "kubernetes-ping": (["1s"], 1.0, "2s", 2.0),
    "kubernetes-contexts": (["a=arn:aws:eks:x/a"], {"a": "arn:aws:eks:x/a"}, "b=c,d=ns/h:1/u",
                            {"b": "c", "d": "ns/h:1/u"}),
    "zones": (["a=10.1.0.0/16,b=10.2.0.0/16"], {"a": (ipaddress.ip_network("10.1.0.0/16"),),
                                                "b": (ipaddress.ip_network("10.2.0.0/16"),)},
              "a=192.0.2.0/24,a=198.51.100.0/24", {"a": (ipaddress.ip_network("192.0.2.0/24"),
                                                         ipaddress.ip_network("198.51.100.0/24"))}),
    "zone": (["a"], "a", "b", "b"),
    "own-address": (["192.0.2.1"], "192.0.2.1", "2001:DB8::1", "2001:db8::1"),
    "admin": (["127.0.0.1:1"], ("127.0.0.1", 1), "unix:/run/admin", "/run/admin"),
    "admin-public": (["192.0.2.1:1"], ("192.0.2.1", 1), ":2", ("*", 2)),
    "registry": (["127.0.0.1:1"], ("127.0.0.1", 1), "unix:/run/registry", "/run/registry"),
    "log-level": (["debug"], "debug", "error", "error"),
    "log-format": (["json"], "json", "text", "text"),
}


ALONE = [row.name for row in SETTINGS if row.name != "registry"]  # these need no other one
NAMES = f"""
[registry]
domains = ["tun.example.com"]
targets = ["tcp"]
networks = ["192.0.2.0/24"]
[registry.owners.alice]
token = "sha256:{'0' * 64}"
"""


def variable(name: str) -> str:
    return "SNIROUTE_" + name.upper().replace("-", "_")


@pytest.mark.parametrize("name", ALONE)
def test_a_setting_comes_from_the_command_line_then_the_environment(name):
    given, on_line, text, in_environment = SAMPLES[name]
    attribute = name.replace("-", "_")
    argv = [word for value in given for word in (f"--{name}", value)]
    assert getattr(load_settings(argv, {}), attribute) == on_line
    assert getattr(load_settings([], {variable(name): text}), attribute) == in_environment
    assert getattr(load_settings(argv, {variable(name): text}), attribute) == on_line
    default = getattr(load_settings([], {}), attribute)
    assert getattr(load_settings([], {variable(name): ""}), attribute) == default, "an empty variable is none"
    joined = [f"--{name}={value}" for value in given]
    assert getattr(load_settings(joined, {}), attribute) == on_line


def test_the_settings_without_any():
    settings = load_settings([], {"HOME": "/"})
    assert (settings.command, settings.name, settings.listen) == ("serve", None, [("*", 19000)])
    assert settings.routes.routes == (Route("*", "cloudflared:cft-{name}"),) and settings.open_to_all
    assert (settings.ports, settings.idle, settings.connection_idle) == ((20000, 20100), 300.0, 0.0)
    assert (settings.proxy_protocol, settings.max_per_client, settings.cloudflared) == ("auto", 256, None)
    assert ipaddress.ip_address("127.0.0.1") in settings.proxy_from[0] and len(settings.proxy_from) == 6
    assert not load_settings(["--route", "a.b=tcp:h:1"], {}).open_to_all
    assert not load_settings([], {"SNIROUTE_ROUTE": "a.b=tcp:h:1"}).open_to_all


def test_the_last_of_an_option_that_does_not_repeat_counts():
    assert load_settings(["--idle", "1s", "--idle", "2s"], {}).idle == 2.0


@pytest.mark.parametrize("argv, command, name", [
    ([], "serve", None), (["serve"], "serve", None), (["check"], "check", None),
    (["explain", "a.b"], "explain", "a.b"), (["--idle", "1s", "check"], "check", None),
    (["explain", "--idle", "1s", "a.b"], "explain", "a.b"),
])
def test_the_command(argv, command, name):
    settings = load_settings(argv, {})
    assert (settings.command, settings.name) == (command, name)


def test_everything_that_is_wrong_is_said_at_once_a_line_for_each():
    with pytest.raises(SettingsError) as caught:
        load_settings(["--idle", "soon", "--ports=9-1", "--route", "a.b=tcp:h:1", "--route", "x",
                       "--listen", "here\n"],
                      {"SNIROUTE_MAX_TUNNELS": "many", "SNIROUTE_DRAIN": "\x1b[2J", "SNIROUTE_IDLE": "never"})
    lines = caught.value.lines
    assert [line.partition(":")[0] for line in lines] == \
        ["--listen", "--route", "--ports", "--idle", "SNIROUTE_DRAIN", "SNIROUTE_MAX_TUNNELS"]
    assert all(re.fullmatch("[ -~]+", line) for line in lines) and str(caught.value) == "\n".join(lines)


@pytest.mark.parametrize("argv, environ, line", [
    (["--route", "a.b=tcp:h:1", "--route", "A.b=tcp:h:2"], {}, "--route: a.b is routed twice"),
    ([], {"SNIROUTE_ROUTE": "a.b=tcp:h:1 a.b=tcp:h:2"}, "SNIROUTE_ROUTE: a.b is routed twice"),
    (["--route", "a.b=tcp:127.0.0.1:7", "--listen", "127.0.0.1:7"], {},
     "--route: a.b=tcp:127.0.0.1:7 leads back to --listen 127.0.0.1:7"),
    (["--route", "a.b=tcp:[::1]:7", "--listen", "[::1]:7"], {},
     "--route: a.b=tcp:[::1]:7 leads back to --listen [::1]:7"),
    (["--route", "{a}-{b}.x.y=tcp:h:1", "--route", "{s}-{p}.x.y=tcp:h:2"], {},
     "--route: {s}-{p}.x.y fits the same names as {a}-{b}.x.y: take one of them out"),
], ids=["twice", "twice-in-the-environment", "a-circle", "a-circle-over-v6", "the-same-fields"])
def test_routes_that_contradict_are_refused(argv, environ, line):
    with pytest.raises(SettingsError) as caught:
        load_settings(argv, environ)
    assert caught.value.lines == (line,)


@pytest.mark.parametrize("argv, complaint", [
    (["explain"], "explain takes one NAME"), (["check", "a.b"], "unexpected 'a.b'"),
    (["serve", "a.b"], "unexpected 'a.b'"),
    (["--quiet"], "--quiet goes with check"), (["explain", "a.b", "-q"], "--quiet goes with check"),
    (["route"], "invalid choice"), (["explain", "a.b", "c.d"], "unrecognized"), (["--idl=1s"], "unrecognized"),
    (["--idle"], "expected one argument"), (["--colour=x"], "unrecognized"), (["--colour", "x"], "error: "),
], ids=["explain-nothing", "check-a-name", "serve-a-name", "quiet-serve", "quiet-explain", "no-command", "explain-two", "abbreviation", "no-value",
        "no-option", "no-option-and-a-value"])
def test_a_command_line_that_is_none_ends_with_2(argv, complaint, capsys):
    with pytest.raises(SystemExit) as caught:
        sniroute.main(argv)
    assert caught.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize("command", [["serve"], ["check"], ["explain", "a.b"]], ids=["serve", "check", "explain"])
def test_settings_that_are_wrong_end_with_2_and_a_line_for_each(command, capsys, monkeypatch, no_variables):
    monkeypatch.setenv("SNIROUTE_DRAIN", "never")
    assert sniroute.main([*command, "--idle=soon"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "sniroute: --idle: 'soon' is not a duration such as 300s, 5m, 1h30m or 500ms\n" \
        "sniroute: SNIROUTE_DRAIN: 'never' is not a duration such as 300s, 5m, 1h30m or 500ms\n"


def test_the_help_lists_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"], {})
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert SAMPLES.keys() == {row.name for row in SETTINGS}
    for row in SETTINGS:
        assert f"--{row.name} {row.metavar} " in text
        assert " ".join(row.help.split()) in text or "-" in row.help, row.name  # argparse breaks at hyphens
    assert "explain NAME" in text and "SNIROUTE_MAX_TUNNELS" in text


def test_every_default_is_in_the_help_of_its_setting():
    for row in SETTINGS:
        if row.default is not None and row.name != "proxy-from":
            assert row.default in row.help, row.name


def test_the_version(capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(["-V"], {})
    assert caught.value.code == 0
    assert re.fullmatch(r"sniroute \d+\.\d+\.\d+ \(Python 3\.\d+\.\S+, \w+; with doctor, admin, carrier, commands, backends, web, kubernetes, registry, nodepass\)\n",
                        capsys.readouterr().out)


@pytest.mark.parametrize("words", [["--version", "--bogus"], ["--bogus", "--version"], ["foo", "--version"],
                                   ["--version", "a", "b", "c"]], ids=" ".join)
def test_the_version_goes_before_whatever_else_is_wrong(words, capsys):
    with pytest.raises(SystemExit) as caught:
        load_settings(words, {})
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("sniroute ")


def test_a_route_whose_target_is_wrong_is_not_told_that_it_is_no_tunnel(settings_file):
    path = settings_file('[routes."*.example.com"]\ntarget = "cloudflared:{nme}"\nidle = "5m"\n')
    with pytest.raises(SettingsError) as caught:
        load_settings(["-c", path], {})
    [line] = caught.value.lines
    assert "has a field other than" in line


FIELDS_ROUTE = "{service}--{port}.{env}.example.com", "tcp:{service}.{env}.internal:{port}"


def test_fields_are_read_from_the_file_the_environment_and_the_command_line(settings_file):
    pattern, target = FIELDS_ROUTE
    path = settings_file(f'[routes."{pattern}"]\ntarget = "{target}"\nallow = "192.0.2.0/24"\nmax_connections = 7\n')
    found = load_settings(["-c", path], {})
    assert found.routes.routes == (Route(pattern, target, allow=(ipaddress.ip_network("192.0.2.0/24"),),
                                         max_connections=7),)
    for settings in (found, load_settings([f"--route={pattern}={target}"], {}),
                     load_settings([], {"SNIROUTE_ROUTE": f"{pattern}={target} a.b=tcp:h:1"})):
        assert settings.routes.decide("my-api--80.eu.example.com").target == "tcp:my-api.eu.internal:80"


def test_all_that_is_wrong_with_fields_is_said_at_once_a_line_each(settings_file):
    path = settings_file("""[routes]
"{a}{b}.x.y" = "tcp:h:1"
"{c}{d}.x.y" = { target = "tcp:h:1", allow = ["x"] }
"{a.x.y" = "tcp:h:1"
"{A}.x.y" = "tcp:h:1"
"{name}.x.y" = "tcp:h:1"
"{a}-{a}.x.y" = "tcp:h:1"
"{a}.x.y" = "tcp:{b}:1"
"{b}.x.y" = "cloudflared:{b}"
"{\\u001b}.x.y" = "tcp:h:1"
""")
    with pytest.raises(SettingsError) as caught:
        load_settings(["-c", path], {})
    lines = caught.value.lines
    assert len(lines) == 10 and all(line.startswith(f"{path}: routes.") and line.isprintable() for line in lines)
    for line, words in zip(lines, ("literal text", "literal text", ".allow: ", "is not a name", "{A} is no name",
                                   "{name} is a field of each name", "twice", "{name}, {label}, {domain}, {a}",
                                   "two labels", "is no name of a field"), strict=True):
        assert words in line


@pytest.mark.parametrize("target, warned", [
    ("127.0.0.1:{port}", True), ("localhost:{port}", True), ("[::1]:{port}", True), ("192.0.2.1:{port}", False),
    ("127.0.0.1:80", False),
])
def test_a_warning_where_clients_choose_a_port_of_this_host(target, warned, caplog):
    sniroute_settings.warn(load_settings([f"--route={{a}}-{{port}}.example.com=tcp:{target}"], {}))
    assert any("clients choose among all ports" in record.getMessage() for record in caplog.records) is warned


def test_no_warning_about_ports_where_a_route_says_who_may_come(settings_file, caplog):
    path = settings_file('[routes."{port}.example.com"]\ntarget = "tcp:127.0.0.1:{port}"\nallow = "192.0.2.0/24"\n')
    sniroute_settings.warn(load_settings(["-c", path, "--proxy-protocol=off"], {}))
    assert "clients choose" not in caplog.text


@pytest.mark.parametrize("option, warned", [("", True), (', allow = "10.0.0.0/8"', False)])
def test_a_pattern_with_fields_that_goes_before_a_wildcard_without_its_allow_is_said(option, warned, settings_file, caplog):
    path = settings_file('[routes]\n"*.prod.example.com" = { target = "tcp:192.0.2.1:1", allow = "10.0.0.0/8" }\n'
                         f'"{{s}}.{{e}}.example.com" = {{ target = "tcp:{{s}}.{{e}}.internal:443"{option} }}\n')
    sniroute_settings.warn(load_settings(["-c", path, "--proxy-protocol=off"], {}))
    assert ("goes before *.prod.example.com=tcp:192.0.2.1:1, and has not its `allow`" in caplog.text) is warned


@pytest.mark.parametrize("options, warned", [((), True), (("--max-per-client=5",), False), (("--listen=127.0.0.1:1",), False)])
def test_one_client_that_may_hold_all_programs_is_said(options, warned, caplog):
    sniroute_settings.warn(load_settings(["--route=a.example.com=exec:cat", "--max-tunnels=6", *options], {}))
    assert ("one client address may hold all 6 programs" in caplog.text) is warned


# -- the limits of the host --------------------------------------------------------------------


@pytest.mark.parametrize("limit, fit", [(1024, 272), (256, 64), (2, 1), (1, 1), (1 << 20, (1 << 20) // 2 - 240),
                                        (resource.RLIM_INFINITY, (1 << 20) // 2 - 240)])
def test_the_connections_that_fit_follow_the_limit_of_open_files(limit, fit, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    settings = load_settings([], {})
    assert settings.max_connections == settings.fit == fit
    assert load_settings(["--max-connections", "7"], {}).max_connections == 7


def test_warm_connections_leave_less_room_for_clients(settings_file, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2000, 2000))
    path = settings_file('[routes."a.b"]\ntarget = "tcp:192.0.2.1:1,192.0.2.2:1"\nwarm = 100\n')
    assert load_settings([], {}).fit - load_settings(["-c", path], {}).fit == 50


@pytest.mark.parametrize("scheme, memory, tunnels", [
    ("cloudflared", 1 << 30, 16), ("cloudflared", 1 << 40, 101), ("cloudflared", 1, 1),
    ("carrier", 1 << 28, 64), ("carrier", 1 << 30, 101),
], ids=["1-GiB", "1-TiB", "hardly-any", "carrier-256-MiB", "carrier-1-GiB"])
def test_the_tunnels_that_fit_follow_the_memory_and_the_ports(scheme, memory, tunnels, cloudflared, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}[name])
    argv = [f"--route=*={scheme}:{{name}}", f"--cloudflared={cloudflared.path}"]
    assert load_settings(argv, {}).max_tunnels == tunnels


# -- a file of settings ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALONE if name not in ("config", "route", "port")])
def test_a_setting_in_the_file_is_what_it_is_in_the_environment_which_comes_first(name, settings_file):
    _, _, text, value = SAMPLES[name]
    given, on_line = SAMPLES[name][:2]
    row = next(row for row in SETTINGS if row.name == name)
    path = settings_file(f"{row.field} = {toml(text.split() if row.many else text)}\n")
    assert getattr(load_settings(["--config", path], {}), row.field) == value
    assert getattr(load_settings([], {"SNIROUTE_CONFIG": path}), row.field) == value
    argv = [word for each in given for word in (f"--{name}", each)]
    assert getattr(load_settings(["-c", path, *argv], {}), row.field) == on_line
    other = " ".join(given)
    assert getattr(load_settings(["-c", path], {variable(name): other}), row.field) == on_line


def test_the_file_has_types_of_its_own(settings_file):
    settings = load_settings(["-c", settings_file(
        'listen = ":1"\nmax_tunnels = 7\nproxy_from = ["192.0.2.0/24", "2001:db8::/32"]\n')], {})
    assert (settings.listen, settings.max_tunnels) == ([("*", 1)], 7)
    assert [str(network) for network in settings.proxy_from] == ["192.0.2.0/24", "2001:db8::/32"]


def test_routes_in_the_file_have_options(settings_file):
    path = settings_file(ROUTES_FILE)
    settings = load_settings(["-c", path], {})
    network = ipaddress.ip_network
    assert settings.routes.routes == (
        Route("db.example.com", "tcp:192.0.2.10:5432"),
        Route("*.example.com", "cloudflared:{name}", idle=3600.0,
              allow=(network("192.0.2.0/24"), network("198.51.100.7/32"))),
        Route("**.example.org", "tcp:{label}.internal:443", send_proxy="v2", max_connections=50, connection_idle=0.0))
    assert not settings.open_to_all
    replaced = load_settings(["-c", path, "--route", "a.b=tcp:h:1"], {})
    assert replaced.routes.routes == (Route("a.b", "tcp:h:1"),)


def test_all_that_is_wrong_with_the_file_is_said_at_once(settings_file):
    path = settings_file("""
listen = 19000
max-tunnels = 50
max_starting = true
idel = "10m"
colour = 1
log_level = 3
proxy_from = ["192.0.2.1/24"]
config = "other"
[routes]
db.example.com = "cloudflared:cft-{name}"
"*.example.com" = { target = "cloudflared:{name}", idle = "1", allow = ["x"], sendproxy = "v2" }
"c.example.com" = { target = "tcp:192.0.2.10:5432", send_proxy = "v3", max_connections = 0, idle = "1h" }
"*.*" = "tcp:h:1"
"d.example.com" = 5
"a\\u001bb" = "tcp:h:1"
""")
    with pytest.raises(SettingsError) as caught:
        load_settings(["-c", path, "--drain", "soon"], {})
    lines = [line.removeprefix(f"{path}: ") for line in caught.value.lines]
    assert lines == [
        "listen: '19000' is not HOST:PORT",
        "max-tunnels: there is no such setting; did you mean max_tunnels?",
        "max_starting: 'true' is not a whole number from 1 to 1000000",
        "idel: there is no such setting; did you mean idle?",
        "colour: there is no such setting; there are " + ", ".join(
            [row.file_key for row in SETTINGS if row.name not in ("config", "route", "port")] + ["tunnel_ports", "routes"]),
        "log_level: '3' is none of debug, info, warning, error",
        "proxy_from: 192.0.2.1/24 has host bits set: a network is 192.0.2.0/24, or one address",
        "config: there is no such setting" + lines[7].removeprefix("config: there is no such setting"),
        'routes."db": has no target (a pattern goes in quotes, as "db.example.com" = "tcp:192.0.2.10:5432")',
        "routes.\"*.example.com\".idle: '1' is not a duration such as 300s, 5m, 1h30m or 500ms",
        "routes.\"*.example.com\".allow: 'x' does not appear to be an IPv4 or IPv6 network: "
        "a network is 192.0.2.0/24, or one address",
        "routes.\"*.example.com\".sendproxy: there is no such option; did you mean send_proxy?",
        "routes.\"c.example.com\".send_proxy: 'v3' is none of as-received, none, v1, v2",
        "routes.\"c.example.com\".max_connections: '0' is not a whole number from 1 to 1000000",
        'routes."c.example.com".idle: is for tunnels; here connection_idle resets what is silent',
        "routes.\"*.*\": '*.*' is not a name, *.NAME, **.NAME or * (behind a star, NAME has two labels at least)",
        "routes.\"d.example.com\": 'd.example.com=5' is not PATTERN=TARGET, as db.example.com=tcp:192.0.2.10:5432",
        'routes."a?b": ' + lines[17].partition(": ")[2],
        "--drain: 'soon' is not a duration such as 300s, 5m, 1h30m or 500ms"]
    assert all(re.fullmatch("[ -~]+", line) for line in lines)


@pytest.mark.parametrize("text, complaint", [
    ("a = [", r"sniroute\.toml: Invalid value \(at end of document\)"),
    ("idle = '1s'\nidle = '2s'\n", r"Cannot overwrite a value \(at line 2"),
    ("[routes]\n*.example.com = 'tcp:h:1'\n", r"Invalid .* \(at line 2, column 1\)"),
    ("routes = 3", r"routes: is no table of routes, as "),
    ("[routes]\n", r"routes: is no table of routes, as "),
    ("listen = []", r"listen: '' is not HOST:PORT"),
    ('[routes]\n"a.b" = "tcp:h:1"\n"A.b" = "tcp:h:1"\n', r"sniroute\.toml: routes: a\.b is routed twice"),
    ("x = " + "[" * 5000, r"sniroute\.toml: "),
], ids=["syntax", "twice", "no-quotes", "no-table", "no-routes", "no-address", "one-name-twice", "deep"])
def test_a_file_that_is_none_is_refused(settings_file, text, complaint):
    with pytest.raises(SettingsError, match=complaint) as caught:
        load_settings(["-c", settings_file(text)], {})
    assert len(caught.value.lines) == 1


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    missing, binary, public = (str(tmp_path / name) for name in ("missing", "binary", "public"))
    pathlib.Path(binary).write_bytes(b"\xff\xfe")
    pathlib.Path(public).write_text("")
    os.chmod(public, 0o666)
    for path, complaint in ((missing, "No such file"), (str(tmp_path), "Is a directory"), (binary, "save it as UTF-8"),
                            (public, "can be changed by other users: chmod o-w")):
        with pytest.raises(SettingsError, match=re.escape(path) + ": .*" + complaint):
            load_settings(["-c", path], {})


@pytest.mark.parametrize("what", ["the file", "its folder", "another user", "a group"])
def test_a_file_of_settings_that_others_may_change_is_not_read(what, settings_file, tmp_path):
    path = settings_file(ROUTES_FILE)
    load_settings(["-c", path], {})
    os.chmod(path if what == "the file" else tmp_path, 0o775 if what == "a group" else 0o757)
    if what in ("another user", "a group") and os.geteuid():
        pytest.skip("needs root, who may give files away")
    if what == "another user":
        os.chown(path, 4321, -1)
        os.chmod(tmp_path, 0o700)
    elif what == "a group":
        os.chown(tmp_path, -1, 4321)
    with pytest.raises(SettingsError, match=re.escape(path) + ": is not read, since .*: ch(mod|own) "):
        load_settings(["-c", path], {})


def test_settings_from_a_pipe_or_from_a_shell_s_text_are_read(tmp_path):
    """`-c <(...)`, and `-c /dev/stdin <<EOF`, for which a shell may use a file that has no name any more."""
    reader, writer = os.pipe()
    os.write(writer, ROUTES_FILE.encode())
    os.close(writer)
    with open(reader), tempfile.TemporaryFile() as file:
        file.write(ROUTES_FILE.encode())
        file.flush()
        file.seek(0)
        for fd in (reader, file.fileno()):
            assert len(load_settings(["-c", f"/dev/fd/{fd}"], {}).route) == 3


def test_a_file_with_a_byte_order_mark_is_read(settings_file):
    """As editors of another system write it; also at a reload, and without a newline at the end."""
    for text in (ROUTES_FILE, 'idle = "7m"', ""):
        path = settings_file("\ufeff" + text)
        marked = load_settings(["-c", path], {})
        settings_file(text)
        plain = load_settings(["-c", path], {})
        assert (marked.idle, marked.routes.routes) == (plain.idle, plain.routes.routes)
    settings_file('\ufeffidle = "9m"')
    assert plain.again(plain).idle == 540.0


@pytest.mark.parametrize("mark, codec", [(codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
                                         (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")])
def test_a_file_in_utf_16_is_told_so(tmp_path, mark, codec):
    path = tmp_path / "sniroute.toml"
    path.write_bytes(mark + 'idle = "1s"\n'.encode(codec))
    with pytest.raises(SettingsError, match=r"begins with the mark of UTF-16 or UTF-32: save it as UTF-8$") as caught:
        load_settings(["-c", str(path)], {})
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("data", [b"\xef\xbb", b"\xef\xbb\xbf\xef\xbb\xbfidle = '1s'", b"\xff", b"a = '\xe4'"])
def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "sniroute.toml"
    path.write_bytes(data)
    with pytest.raises(SettingsError) as caught:
        load_settings(["-c", str(path)], {})
    assert len(caught.value.lines) == 1


def test_a_reload_reads_a_file_again_and_nothing_else(settings_file, tmp_path):
    running = load_settings(["-c", settings_file(ROUTES_FILE)], {})
    settings_file("")  # somebody is writing it
    with pytest.raises(SettingsError, match="there are no routes any more: every name would be served"):
        running.again(running)
    os.unlink(running.config)
    os.mkfifo(running.config)
    with pytest.raises(SettingsError, match="is no regular file, and cannot be read again"):
        running.again(running)


@pytest.mark.parametrize("row", [row for row in SETTINGS if row.name in ALONE
                                 and row.name not in ("config", "route", "port")], ids=lambda row: row.name)
def test_a_reload_keeps_what_a_router_that_runs_cannot_change_and_says_so(row, settings_file):
    """All else is as the file says."""
    text, routes = SAMPLES[row.name][2], '[routes]\n"a.b" = "tcp:h:1"\n'
    path = settings_file(routes)
    running = load_settings(["-c", path], {})
    before = getattr(running, row.field)
    settings_file(f"{row.field} = {toml(text.split() if row.many else text)}\n{routes}")
    again = running.again(running)
    if row.fixed:
        assert getattr(again, row.field) == before
        assert again.kept == [f"{path}: {row.file_key}: is for the next start; it stays as it is"] * (
            SAMPLES[row.name][3] != before)
    else:
        assert getattr(again, row.field) == SAMPLES[row.name][3] and again.kept == []
    others = [other.field for other in SETTINGS if other is not row]
    assert [getattr(again, field) for field in others] == [getattr(running, field) for field in others]
    assert again.launchers is running.launchers


def test_where_the_registry_listens_comes_from_an_option_a_variable_or_its_table(settings_file, caplog):
    _, on_line, text, value = SAMPLES["registry"]
    plain, told = settings_file(NAMES), f"registry.listen = {toml(text)}\n"
    assert load_settings(["-c", plain], {}).registry == ("127.0.0.1", 19002)
    assert load_settings(["-c", plain], {"SNIROUTE_REGISTRY": text}).registry == value
    asked = load_settings(["-c", plain, "--registry", "127.0.0.1:1"], {"SNIROUTE_REGISTRY": text})
    assert (asked.registry, asked.claims.address, asked.covered) == (on_line, on_line, [])
    for file in (told + re.sub(r"^(\w+ = )(?=.*\n)", r"registry.\1", NAMES.replace("[registry]\n", ""), count=3,
                               flags=re.MULTILINE),
                 NAMES.replace("domains", f"listen = {toml(text)}\ndomains")):
        path = settings_file(file)
        assert load_settings(["-c", path], {}).registry == value
        assert load_settings(["-c", path, "--registry", "127.0.0.1:1"], {}).covered == [
            f"{path}: registry.listen is not used: --registry goes first"]
    assert load_settings([], {}).claims is None


@pytest.mark.parametrize("words, file, line", [
    (["--registry=127.0.0.1:1"], "", "--registry: which names, and whose, is said in a file of settings: [registry], "
     "and --config FILE"),
    ([], 'registry = "127.0.0.1:1"\n', "{path}: registry: there is no such setting; did you mean registry.listen?"),
    (["--listen=127.0.0.1:1", "--registry=127.0.0.1:1"], NAMES,
     "--registry: 127.0.0.1:1 and --listen 127.0.0.1:1 have an address in common: give it a port of its own"),
    (["--admin=127.0.0.1:19002"], NAMES, "{path}: registry.listen: 127.0.0.1:19002 and --admin 127.0.0.1:19002 have an "
     "address in common: give it a port of its own"),
    (["--admin-public=:19002"], NAMES, "{path}: registry.listen: 127.0.0.1:19002 and --admin-public *:19002 have an "
     "address in common: give it a port of its own"),
    (["--port=127.0.0.1:19002=tcp:192.0.2.1:1"], NAMES, "--port: port 127.0.0.1:19002 is a part of --registry "
     "127.0.0.1:19002, or all of it: give it a port of its own"),
], ids=["no-file", "a-text", "listen", "admin", "admin-public", "port"])
def test_a_registry_without_owners_or_with_an_address_that_is_taken_stops_the_start(words, file, line, settings_file):
    path = settings_file(file)
    with pytest.raises(SettingsError) as caught:
        load_settings([*words, *(["-c", path] if file else [])], {})
    assert caught.value.lines == (line.format(path=path),)


def test_where_names_are_claimed_no_other_name_is_served_unless_a_route_says_so(settings_file):
    settings = load_settings(["-c", settings_file(NAMES)], {})
    assert settings.routes.routes == () and not settings.open_to_all
    assert len(load_settings(["-c", settings_file(NAMES), "--route=a.b=tcp:h:1"], {}).routes.routes) == 1


def test_a_reload_changes_rules_and_owners_of_a_registry_and_keeps_where_it_listens_and_its_store(settings_file, tmp_path):
    path = settings_file(NAMES)
    running = load_settings(["-c", path], {})
    settings_file(NAMES.replace("domains", f'listen = ":1"\nstore = "sqlite:{tmp_path}/x"\nstale_max = "1m"\n'
                                'dns = "rfc2136://192.0.2.1/tun.example.com?key=k"\ndomains').replace("alice", "bob"))
    again = running.again(running)
    assert (again.registry, again.claims.address, again.claims.store, again.claims.dns) == (
        running.registry, running.registry, "memory", "")
    assert list(again.claims.owners) == ["bob"] and again.claims.stale_max == 60.0
    assert again.kept == [f"{path}: registry.{option}: is for the next start; it stays as it is"
                          for option in ("listen", "store", "dns")]
    settings_file("")
    running = load_settings(["-c", path], {})
    settings_file(NAMES)
    again = running.again(running)
    assert again.claims is None and again.kept == [
        f"{path}: registry.listen: is for the next start; it stays as it is"]


@pytest.mark.parametrize("words, change, says", [
    (["--registry=:19002"], None, "registry on *:19002: tokens go there in plain text: listen on 127.0.0.1 or unix:PATH"),
    (["--registry=192.0.2.1:1"], None, "registry on 192.0.2.1:1: tokens go there in plain text"),
    ([], ("192.0.2.0/24", "127.0.0.1/32"), "registry.networks: 127.0.0.1/32 is this host: the owners of names, and all "
     "their clients, reach what listens there from port 1024 to 65535"),
    ([], ("192.0.2.0/24", "::1"), "registry.networks: ::1/128 is this host"),
    (["--route=*=tcp:192.0.2.1:1"], None, "registry.domains: *=tcp:192.0.2.1:1 goes before each claim below "
     "tun.example.com, so all are refused as `configured`"),
    (["--route=**.example.com=tcp:192.0.2.1:1"], None, "registry.domains: **.example.com=tcp"),
    (["--route={a}.tun.example.com=tcp:192.0.2.1:1"], None, "registry.domains: {a}.tun.example.com=tcp"),
    (["--ports=20000-20100"], ("targets", 'ports = "20100-20200"\ntargets'),
     "registry.ports 20100-20200 overlap --ports 20000-20100"),
    ([], None, ""), (["--registry=unix:/run/registry"], None, ""), (["--registry=[::1]:1"], None, ""),
    (["--route=*.example.com=tcp:192.0.2.1:1", "--route=a.tun.example.com=tcp:192.0.2.1:1"], None, ""),
], ids=["everywhere", "beyond-loopback", "loopback", "loopback-6", "star", "wildcard", "fields", "ports", "fine", "unix",
        "ipv6", "one-name"])
def test_what_is_likely_not_meant_of_a_registry_is_said(words, change, says, settings_file, caplog):
    path = settings_file(NAMES.replace(*change) if change else NAMES)
    sniroute_settings.warn(load_settings(["-c", path, *words], {}))
    said = [line for line in caplog.messages if line.startswith("registry")]
    assert [line[:len(says)] for line in said] == [says] * bool(says)


@pytest.mark.parametrize("text", ["[routes\n", "idle = \n", "\udcff", "x = " + "[" * 5000], ids=[
    "table", "value", "encoding", "depth"])
def test_a_reload_of_a_file_that_is_no_toml_has_one_complaint(text, settings_file):
    running = load_settings(["-c", settings_file(ROUTES_FILE)], {})
    pathlib.Path(running.config).write_text(text, errors="surrogateescape")
    with pytest.raises(SettingsError) as caught:
        running.again(running)
    assert len(caught.value.lines) == 1 and caught.value.lines[0].startswith(running.config)


@pytest.mark.parametrize("words, variables, named", [
    (["-c", "sniroute.toml"], {}, "--config"), ([], {"SNIROUTE_CONFIG": "sniroute.toml"}, "SNIROUTE_CONFIG"),
    (["--cloudflared=./cloudflared"], {}, "--cloudflared"), (["--admin=unix:admin.sock"], {}, "--admin"),
], ids=["option", "variable", "program", "admin"])
def test_a_relative_path_from_a_folder_that_is_gone_is_said_in_words(words, variables, named, tmp_path):
    (tmp_path / "gone").mkdir()
    gone = f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec \"$@\""
    done = execute("/bin/sh", "-c", gone, "sh", sys.executable, str(PROGRAM), "check", *words,
                   env=environment(**variables), said="", text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.fullmatch(rf"sniroute: {named}: '\S+' is relative to a folder that cannot be used "
                        r"\(No such file or directory\): give the whole path, from /\n", done.stderr), done.stderr


def test_whole_paths_do_without_a_folder(tmp_path, settings_file):
    (tmp_path / "gone").mkdir()
    gone = f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec \"$@\""
    done = execute("/bin/sh", "-c", gone, "sh", sys.executable, str(PROGRAM), "check", "-c",
                   settings_file('[routes]\n"a.b" = "tcp:h:1"\n'), "--admin=unix:/run/x", env=environment(), said="", text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_goes_before_the_file_goes_before_it_in_a_reload_too(settings_file):
    path = settings_file('idle = "1s"\ndrain = "1s"\n')
    running = load_settings(["-c", path, "--idle=2s"], {"SNIROUTE_DRAIN": "3s"})
    settings_file('idle = "4s"\ndrain = "4s"\nlisten = ":1"\n')
    again = running.again(running)
    assert (again.idle, again.drain, again.listen) == (2.0, 3.0, running.listen)
    assert again.covered == [f"{path}: idle is not used: --idle goes first",
                             f"{path}: drain is not used: SNIROUTE_DRAIN goes first"]
    assert again.kept == [f"{path}: listen: is for the next start; it stays as it is"]
    assert again.again(again).covered == again.covered, "the next reload begins where the first did"


def test_every_beginning_of_a_file_is_settings_or_a_complaint(settings_file):
    whole = 'max_tunnels = 5\nlisten = [":1", "[::1]:2"]\n' + ROUTES_FILE
    good = 0
    for end in range(0, len(whole), 3):
        path = settings_file(whole[:end])
        try:
            load_settings(["-c", path], {})
            good += 1
        except SettingsError as error:
            assert all(line.startswith(path) for line in error.lines)
    assert 3 < good < end / 3


@pytest.mark.parametrize("text, good", [
    ("unix:/run/sniroute/admin.sock", "/run/sniroute/admin.sock"), ("127.0.0.1:1", ("127.0.0.1", 1)),
    ("[::1]:0", ("::1", 0)), ("[::ffff:127.0.0.1]:1", ("127.0.0.1", 1)), ("[::ffff:192.0.2.1]:1", None), ("localhost:1", ("localhost", 1)), ("192.0.2.1:1", None), (":1", None), ("unix:", None),
    ("unix:/" + "x" * 90, None), ("unix:/a\0b", None), ("unix:/a b", None), ("example.com:1", None), ("0.0.0.0:1", None),
])
def test_an_admin_address_is_loopback_or_a_path(text, good):
    if good is None:
        with pytest.raises(ValueError):
            sniroute_values.parse_admin(text)
    else:
        assert sniroute_values.parse_admin(text) == good


def test_an_admin_address_for_others_is_another_setting():
    says = "^--admin: '0.0.0.0:9100' is neither .*; for other hosts there is --admin-public"
    with pytest.raises(SettingsError, match=says):
        load_settings(["--admin=0.0.0.0:9100"], {})


@pytest.mark.parametrize("public, options, part_of", [
    ("127.0.0.1:19000", [], "--listen *:19000"), (":19000", [], "--listen *:19000"),
    ("[::1]:19000", [], "--listen *:19000"), ("name.example.com:19000", [], "--listen *:19000"),
    ("192.0.2.1:1", ["--listen=192.0.2.1:1"], "--listen 192.0.2.1:1"),
    ("0.0.0.0:1", ["--listen=192.0.2.1:1"], "--listen 192.0.2.1:1"),
    ("[::]:1", ["--listen=192.0.2.1:1"], "--listen 192.0.2.1:1"),
    ("192.0.2.1:1", ["--listen=:2", "--listen=0.0.0.0:1"], "--listen 0.0.0.0:1"),
    ("Name.example.com:1", ["--listen=name.example.com:1"], "--listen name.example.com:1"),
    ("127.0.0.1:1", ["--admin=localhost:1"], "--admin localhost:1"), (":1", ["--admin=[::1]:1"], "--admin [::1]:1"),
    (":19001", [], ""), ("192.0.2.1:1", ["--listen=192.0.2.2:1"], ""), ("192.0.2.1:1", ["--admin=127.0.0.1:1"], ""),
    ("0.0.0.0:1", ["--listen=[::1]:1"], ""), (":0", ["--listen=:0", "--admin=127.0.0.1:0"], ""),
    (":1", ["--admin=unix:/run/admin"], ""),
])
def test_the_public_address_is_not_that_of_the_clients_or_of_the_admin(public, options, part_of):
    """One line says so at the start; else it would be whose bind comes first."""
    options = [f"--admin-public={public}", *options]
    if not part_of:
        assert load_settings(options, {}).admin_public
        return
    with pytest.raises(SettingsError) as caught:
        load_settings(options, {})
    (line,) = caught.value.lines
    assert re.fullmatch(r"--admin-public: \S+ and " + re.escape(part_of)
                        + " have an address in common: give it a port of its own", line)


@pytest.mark.parametrize("text", ["unix:/run/public.sock", "9100", "192.0.2.1", "[::1", "::1:9100", "192.0.2.1:99999"])
def test_a_public_address_is_a_host_and_a_port(text):
    with pytest.raises(SettingsError, match="^--admin-public: "):
        load_settings([f"--admin-public={text}"], {})


@pytest.mark.parametrize("listen, taken", [
    (":7", True), ("0.0.0.0:7", True), ("127.0.0.1:7", True), (":8", False), ("127.0.0.2:7", False), ("[::1]:7", False)])
def test_an_admin_address_that_the_router_itself_listens_on_is_refused(listen, taken):
    with pytest.raises(SettingsError, match=r"^--admin: 127.0.0.1:7 and --listen .*:7 have an address in common: ") if taken else contextlib.nullcontext():
        load_settings([f"--listen={listen}", "--admin=127.0.0.1:7"], {})
    load_settings([f"--listen={listen}", "--admin=unix:/run/x"], {})


def test_a_token_for_the_admin_is_no_joke():
    assert load_settings([], {"SNIROUTE_ADMIN_TOKEN": "0123456789abcdef"}).admin_token == "0123456789abcdef"
    assert load_settings([], {}).admin_token is None
    for token in ("short", "with spaces in it, many", "\x1b0123456789abcdef"):
        with pytest.raises(SettingsError) as caught:
            load_settings([], {"SNIROUTE_ADMIN_TOKEN": token})
        assert token not in str(caught.value)


IDENTITY = ("TUNNEL_SERVICE_TOKEN_ID", "TUNNEL_SERVICE_TOKEN_SECRET", "CF_ACCESS_TOKEN")
SPACES = [("s3cret-0123456789\n"), "\ts3cret-0123456789 ", "\r\ns3cret-0123456789\r\n", " \ns3cret-0123456789\n\n"]


@pytest.mark.parametrize("value", SPACES)
def test_white_space_around_a_secret_goes(value):
    """As a Kubernetes secret or `export X=$(cat file)` brings it."""
    environ = dict.fromkeys((*IDENTITY, "SNIROUTE_ADMIN_TOKEN"), value)
    settings = load_settings(["--route=*.example.com=carrier:{name}"], environ)
    assert settings.admin_token == "s3cret-0123456789" and settings.routes.identified
    for launcher in settings.launchers.values():
        assert {launcher.environment[name] for name in IDENTITY} == {"s3cret-0123456789"}


@pytest.mark.parametrize("variable", [*IDENTITY, "SNIROUTE_ADMIN_TOKEN"])
@pytest.mark.parametrize("value", ["s3cret-0123456789\nX: y", "s3cret\0-0123456789", "s3cret-\u00e9-0123456789",
                                   "\ufeffs3cret-0123456789", "s3cret\x7f-0123456789", "s3cret-\udcff-0123456789"])
def test_a_secret_that_no_header_can_have_stops_the_start_and_is_not_shown(variable, value):
    with pytest.raises(SettingsError) as caught:
        load_settings([], {variable: value})
    [line] = caught.value.lines
    assert line.startswith(f"{variable}: ") and "s3cret" not in line and re.fullmatch("[ -~]+", line)


def test_all_secrets_that_are_wrong_are_named_a_line_for_each():
    with pytest.raises(SettingsError) as caught:
        load_settings(["--idle=x"], dict.fromkeys(IDENTITY, "a\nb"))
    assert [line.partition(":")[0] for line in caught.value.lines] == ["--idle", *sorted(IDENTITY)]


def test_check_says_that_a_secret_cannot_be_sent():
    ended = command("check", TUNNEL_SERVICE_TOKEN_ID="s3cret\nX: y")
    assert ended.returncode == 2 and ended.stderr.startswith("sniroute: TUNNEL_SERVICE_TOKEN_ID: ")
    assert "s3cret" not in ended.stderr + ended.stdout and ended.stderr.count("\n") == 1
    ended = command("check", "--route=*.example.com=carrier:{name}", TUNNEL_SERVICE_TOKEN_ID="id\n")
    assert ended.returncode == 0 and "TUNNEL_SERVICE_TOKEN_SECRET is not set" in ended.stderr


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_secret_of_white_space_is_none(blank):
    settings = load_settings([], dict.fromkeys((*IDENTITY, "SNIROUTE_ADMIN_TOKEN"), blank))
    assert settings.admin_token is None and not settings.routes.identified


@pytest.mark.parametrize("set_ones, words, missing", [
    (["TUNNEL_SERVICE_TOKEN_ID"], "carrier:{name}", "TUNNEL_SERVICE_TOKEN_SECRET"),
    (["TUNNEL_SERVICE_TOKEN_SECRET"], "cloudflared:{name}", "TUNNEL_SERVICE_TOKEN_ID"),
    (["TUNNEL_SERVICE_TOKEN_ID", "CF_ACCESS_TOKEN"], "carrier:{name}", "TUNNEL_SERVICE_TOKEN_SECRET"),
    (["TUNNEL_SERVICE_TOKEN_ID"], "tcp:h:1", None), (IDENTITY[:2], "carrier:{name}", None),
    (["CF_ACCESS_TOKEN"], "carrier:{name}", None), ([], "carrier:{name}", None),
])
def test_a_warning_where_half_of_the_service_token_is_missing(set_ones, words, missing, caplog):
    sniroute_settings.warn(load_settings([f"--route=*.example.com={words}"], dict.fromkeys(set_ones, "s3cret")))
    said = [record.getMessage() for record in caplog.records if "service token" in record.getMessage()]
    assert said == ([f"{missing} is not set: the other half of the service token alone opens nothing"] if missing else [])


@pytest.mark.parametrize("text, warned", [
    ("*=tcp:{name}:443", True), ("**.co.uk=tcp:{name}:443", True), ("*.example.com=tcp:{label}-{domain}:443", True),
    ("*.example.com=tcp:{label}:443", True), ("*.example.com=tcp:{name}:443", False), ("*=tcp:10.0.0.1:1", False),
    ("db=tcp:{name}:1", False), ("*.example.com=cloudflared:cft-{label}-{domain}", False),
    ("{a}.example.com=tcp:{a}:1", True), ("{a}.example.com=tcp:{a}.internal:1", False),
])
def test_a_warning_where_private_addresses_are_refused(text, warned, caplog):
    sniroute_settings.warn(load_settings([f"--route={text}"], {}))
    said = [record.getMessage() for record in caplog.records if "private addresses are refused" in record.getMessage()]
    assert len(said) == warned and all(line.startswith(f"{text}: a client may own") for line in said)


def test_a_warning_where_the_allowed_can_be_claimed(settings_file, caplog):
    for option, warned in (("", True), ('proxy_from = "none"\n', False), ('proxy_protocol = "off"\n', False)):
        caplog.clear()
        sniroute_settings.warn(load_settings(["-c", settings_file(option + ROUTES_FILE)], {}))
        assert ("can claim any address in a PROXY header" in caplog.text) is warned


@linux
def test_a_warning_where_the_kernel_may_take_a_tunnels_port(caplog):
    low, high = map(int, pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for first, last, warned in ((low - 9, low - 1, False), (low - 9, low, True), (high, high, True), (low, high, True)):
        caplog.clear()
        sniroute_settings.warn(load_settings([f"--ports={first}-{last}", "--route=a.b=tcp:h:1"], {}))
        assert (f"--ports {first}-{last} overlap the kernel's own ({low}-{high})" in caplog.text) is warned


@pytest.mark.parametrize("ports, warned", [("60999-61005", True), ("32760-32768", True), ("61000-61005", False),
                                           ("20000-20100", False)])
def test_where_proc_is_hidden_the_kernels_ports_are_taken_for_the_default(ports, warned, caplog, monkeypatch, tmp_path):
    """As in the unit, whose ProcSubset hides them.  On another system than Linux nobody knows."""
    monkeypatch.setattr(sniroute_settings, "local_ports", lambda: sniroute_host.local_ports(str(tmp_path)))
    settings = load_settings([f"--ports={ports}", "--route=a.b=tcp:h:1"], {})
    for platform in ("linux", "darwin"):
        monkeypatch.setattr(sys, "platform", platform)
        caplog.clear()
        sniroute_settings.warn(settings)
        said = (f"--ports {ports} overlap the kernel's own (32768-60999, its default: /proc/sys cannot be read here): "
                "a tunnel's port may be taken at any time")
        assert [record.getMessage() for record in caplog.records] == [said] * (warned and platform == "linux")


@pytest.mark.parametrize("words, said", [
    (["--route=*.a.b=cloudflared:{name}"], "cloudflared is not on PATH: the carrier beside sniroute.py does its work"),
    (["--route=*.a.b=carrier:{name}"], ""),
    (["--route=a.b=tcp:h:1"], ""),
], ids=["cloudflared", "carrier", "tcp"])
def test_a_word_where_the_carrier_stands_in_for_cloudflared(words, said, caplog, monkeypatch):
    monkeypatch.setenv("PATH", "")
    caplog.set_level("INFO")
    sniroute_settings.warn(load_settings(words, {}))
    assert [record.getMessage() for record in caplog.records] == [said] * bool(said)


def test_a_warning_where_the_program_is_missing(caplog, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sniroute_launchers, "is_here", lambda room: room != "sniroute_edge")
    sniroute_settings.warn(load_settings(["--route=*.a.b=cloudflared:{name}", "--route=*.c.d=carrier:{name}"], {}))
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "cloudflared is not there: install it, or name it with --cloudflared",
        "sniroute_edge.py is not beside sniroute.py: copy it there"]


def test_an_admin_address_without_its_files_is_refused_a_line_for_each(monkeypatch):
    monkeypatch.setattr(sniroute_settings, "is_here", lambda room: room == "sniroute_metrics")
    with pytest.raises(SettingsError) as caught:
        load_settings(["--admin=127.0.0.1:1"], {})
    assert caught.value.lines == tuple(f"--admin: sniroute_{room}.py is not beside sniroute.py: copy it there"
                                       for room in ("admin", "door", "page"))
    with pytest.raises(SettingsError) as caught:
        load_settings(["--admin-public=:1"], {})
    assert caught.value.lines[0] == "--admin-public: sniroute_admin.py is not beside sniroute.py: copy it there"
    load_settings([], {})  # nobody asks for it


# -- the program's settings --------------------------------------------------------------------


@pytest.mark.parametrize("options, variables, named", [
    (["--idle=soon"], {}, ["--idle"]),
    (["--idle=soon", "--ports=9"], {}, ["--ports", "--idle"]),
    ([], {"SNIROUTE_PORTS": "9"}, ["SNIROUTE_PORTS"]),
    (["--route=*=http:x"], {}, ["--route"]),
    (["--cloudflared=/nonexistent"], {}, ["--cloudflared"]),
    (["--listen=127.0.0.1:9", "--route=*=tcp:127.0.0.1:9"], {}, ["--route"]),
    (["check", "--max-tunnels=none"], {}, ["--max-tunnels"]),
], ids=["no duration", "two at once", "a variable", "no such target", "no such program", "a circle", "check"])
def test_settings_that_are_wrong_are_named_one_a_line(options, variables, named):
    ended = command(*options, **variables)
    assert ended.returncode == 2
    assert [line.split(": ")[:2] for line in ended.stderr.splitlines()] == [["sniroute", name] for name in named]


@pytest.mark.parametrize("options", [["--no-such-option"], ["fly"], ["explain"], ["check", "a.example.com"]],
                         ids=["unknown option", "unknown command", "explain without a name", "check with a name"])
def test_command_line_that_is_none_is_told_how(options):
    ended = command(*options)
    assert ended.returncode == 2
    assert ended.stderr.startswith("usage: sniroute ") and "Traceback" not in ended.stderr


def test_version_and_help():
    version = command("--version")
    assert version.returncode == 0
    assert version.stdout.startswith(f"sniroute {sniroute_names.__version__} (Python {sys.version.split()[0]}, ")
    usage = command("--help")
    assert usage.returncode == 0
    for row in sniroute_settings.SETTINGS:
        assert f"--{row.name} " in usage.stdout


def test_environment_holds_settings_and_the_command_line_comes_first(launch, serve):
    first, second = serve(answer(b"1")).address, serve(answer(b"2")).address
    variables = environment(SNIROUTE_LISTEN=f"{HOST}:0 {HOST}:0",
                            SNIROUTE_ROUTE=" ".join((route(first)[8:], route(second, "web.example.com")[8:])))
    web = genuine(name="web.example.com")
    program = launch(env=variables, listeners=2)
    for address, hello, said in zip(program.addresses, (HELLO, web), (b"1", b"2"), strict=True):
        with program.connect(hello, address) as client:
            assert client.recv(1) == said
    program = launch(f"--listen={HOST}:0", route(second), env=variables)
    with program.connect(HELLO) as client:
        assert client.recv(1) == b"2"
    with program.connect(web) as client:
        assert read_all(client) == alert(112)
    program.stop()
    assert len(program.addresses) == 1


# -- plain HTTP --------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path) -> Callable[[str], str]:
    """certificate(text) -> the path of a file with it, `text` by default a certificate in PEM."""
    def write(text: str = "") -> str:
        (tmp_path / "ca.pem").write_text(text or self_signed("example.com", time.time()).certificate_pem.decode())
        return str(tmp_path / "ca.pem")
    return write


def for_http(route: Route) -> tuple[Any, ...]:
    """What a route says of plain HTTP."""
    return tuple(getattr(route, name) for name in ("http", *sniroute_options.HTTP_OPTIONS))


def test_routes_have_options_for_plain_http(settings_file, certificate):
    path = certificate()
    settings = load_settings(["-c", settings_file(f"""
[routes]
"plain.example.com" = {{ target = "tcp:h:1", http = "forward", host = "Inner.example.com", cross_site = "allow", \
upgrades = ["Chat"], http_reuse = "safe" }}
"tls.example.com" = {{ target = "tcp:h:2", http = "forward-tls", verify = {toml(path)}, host = "backend", upgrades = [] }}
"moved.example.com" = {{ target = "tcp:h:3", http = "redirect", redirect_port = 8443 }}
"open.example.com" = {{ target = "tcp:h:4", http = "forward-tls", verify = false }}
"same.example.com" = "tcp:h:5"
""".replace("\\\n", ""))], {})
    plain, tls, moved, unverified, same = settings.routes.routes
    assert for_http(plain) == ("forward", True, "inner.example.com", "allow", ("websocket", "chat"), "safe", None)
    assert (tls.verify, tls.host, tls.upgrades) == (path, "backend", ())
    assert (moved.http, moved.redirect_port, unverified.verify) == ("redirect", 8443, False)
    assert for_http(same) == (None, True, "", None, ("websocket",), "client", None)
    assert all(route.is_plain for route in settings.routes.routes), "TLS clients pay nothing for them"


@pytest.mark.parametrize("options, line", [
    ('http = "proxy"', "routes.\"a.b\".http: 'proxy' is none of refuse, forward, forward-tls, redirect, pass"),
    ('htp = "forward"', 'routes."a.b".htp: there is no such option; did you mean http?'),
    ('http = "forward", verify = false', "routes: a.b: verify: is for http = forward-tls; here it is forward"),
    ('verify = false', "routes: a.b: verify: is for http = forward-tls; here it is refuse"),
    ('http = "pass", host = "c.d"', "routes: a.b: host: is for http = forward or forward-tls; here it is pass"),
    ('http = "refuse", cross_site = "refuse"',
     "routes: a.b: cross_site: is for http = forward or forward-tls; here it is refuse"),
    ('http = "redirect", upgrades = ["chat"]',
     "routes: a.b: upgrades: is for http = forward or forward-tls; here it is redirect"),
    ('http = "pass", http_reuse = "off"',
     "routes: a.b: http_reuse: is for http = forward or forward-tls; here it is pass"),
    ('http = "forward", redirect_port = 443', "routes: a.b: redirect_port: is for http = redirect; here it is forward"),
    ('http = "forward", upgrades = ["h2c"]', 'routes."a.b".upgrades: h2c is refused: HTTP/2 in plain text goes through '
     "http = pass only, and from its first byte"),
    ('http = "forward", host = "{lable}.c"',
     "routes: a.b: host: '{lable}.c' has a field other than {name}, {label}, {domain}"),
    ('http = "forward", http_reuse = "safe", send_proxy = "v1"',
     "routes: a.b: http_reuse: safe does not go with send_proxy = v1: the header says who the client is"),
])
def test_options_for_plain_http_that_do_not_fit_are_refused(options, line, settings_file):
    path = settings_file(f'[routes]\n"a.b" = {{ target = "tcp:h:1", {options} }}\n')
    with pytest.raises(SettingsError) as caught:
        load_settings(["-c", path], {})
    assert caught.value.lines == (f"{path}: {line}",)


def test_an_option_may_fit_what_the_setting_says_for_all(settings_file):
    text = '[routes]\n"a.b" = { target = "tcp:h:1", verify = false }\n'
    assert load_settings(["-c", settings_file(text), "--http=forward-tls"], {}).routes.routes[0].verify is False
    with pytest.raises(SettingsError, match="^--http: 'x' is none of "):
        load_settings(["-c", settings_file(text), "--http=x"], {})


@pytest.mark.parametrize("option", ['http = "forward"', "verify = false", 'host = "c.d"', 'cross_site = "refuse"',
                                    'upgrades = ["chat"]', 'http_reuse = "off"', "redirect_port = 443"])
def test_a_port_has_no_option_for_plain_http(option, settings_file):
    path = settings_file(f'[ports]\n"127.0.0.1:1" = {{ target = "tcp:h:1", {option} }}\n')
    with pytest.raises(SettingsError, match=r'^\S+: ports."127.0.0.1:1"\.\w+: is for \[routes\]: behind a port nothing is'):
        load_settings(["-c", path], {})
    assert load_settings(["--http=forward", "--port=127.0.0.1:1=tcp:h:1"], {}).port[0].http is None


@pytest.mark.parametrize("text, complaint", [
    (None, "is not read, since .* is no file"), ("\n", "has no certificate in PEM, as -----BEGIN CERTIFICATE-----"),
    ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "has no certificate in PEM"),
    ("-----BEGIN CERTIFICATE-----\n", "has no certificate in PEM"),
], ids=["missing", "empty", "garbage", "cut"])
def test_a_file_to_verify_with_has_certificates(text, complaint, certificate, tmp_path, settings_file):
    path = certificate(text) if text else str(tmp_path / "none.pem")
    where = settings_file('[routes]\n"a.b" = { target = "tcp:h:1", http = "forward-tls", verify = %s }\n' % toml(path))
    with pytest.raises(SettingsError, match=rf'^{where}: routes."a.b".verify: \'{path}\' {complaint}') as caught:
        load_settings(["-c", where], {})
    assert len(caught.value.lines) == 1


def test_a_file_to_verify_with_is_one_that_strangers_cannot_replace(certificate):
    path = certificate()
    assert sniroute_values.parse_verify(path) == path
    os.chmod(path, 0o666)
    with pytest.raises(ValueError, match="is not read, since .* can be changed by other users: chmod o-w"):
        sniroute_values.parse_verify(path)


@pytest.mark.parametrize("argv, needs", [
    ([], False), (["--route=a.b=tcp:h:1"], False), (["--http=forward"], True), (["--error-pages=on"], True),
    (["--http=redirect", "--route=a.b=tcp:h:1"], True),
])
def test_who_needs_the_files_for_http(argv, needs):
    assert load_settings(argv, {}).needs_web is needs


@pytest.mark.parametrize("argv, text, asks", [
    (["--http=pass"], "", "--http"), (["--error-pages=on"], "", "--error-pages"),
    ([], '[routes]\n"a.b" = { target = "tcp:h:1", http = "redirect" }\n', "{path}: routes: http"),
], ids=["http", "error-pages", "a-route"])
def test_a_file_for_http_that_is_missing_stops_the_start_in_one_line(argv, text, asks, settings_file, monkeypatch):
    path = settings_file(text)
    monkeypatch.setattr(sniroute_settings, "is_here", lambda room: room not in ("sniroute_web", "sniroute_hpack"))
    with pytest.raises(SettingsError) as caught:
        load_settings(["-c", path, *argv], {})
    assert caught.value.lines == (f"{asks.format(path=path)}: sniroute_web.py and sniroute_hpack.py are not beside "
                                  "sniroute.py: copy them there",)
    assert not load_settings(["--http=refuse", "--error-pages=off"], {}).needs_web


def test_without_the_files_for_http_a_router_that_serves_none_starts(monkeypatch):
    monkeypatch.setattr(sniroute_settings, "is_here", lambda room: room not in sniroute_names.OPTIONS["web"])
    assert load_settings(["--route=a.b=tcp:h:1"], {}).http == "refuse"


def said(caplog, path: str, *argv: str) -> list[str]:
    """The warnings of `warn` about plain HTTP."""
    caplog.clear()
    sniroute_settings.warn_of_http(load_settings(["-c", path, *argv], {}))
    return caplog.messages


@pytest.mark.parametrize("target, other, is_said", [
    ("tcp:h:1", "tcp:h:1", True), ("tcp:h:1", "tcp:h:2", False), ("tcp:h:1", "tcp:g:2,h:1", True),
    ("tcp:g:1,h:1", "tcp:h:1", True), ("tcp:localhost:1", "tcp:127.0.0.1:1", True), ("tcp:[::1]:1", "tcp:localhost:1", True),
    ("tcp:{label}.c:1", "tcp:a.c:1", True), ("tcp:a.c:1", "tcp:{label}.c:1", True), ("tcp:{label}.c:1", "tcp:a.d:1", False),
    ("tcp:{label}.c:1", "tcp:{name}.c:1", True), ("unix:/run/a", "unix:/run/{label}", True),
    ("unix:/run/a", "unix:/srv/{label}", False), ("cloudflared:x.c", "cloudflared:x.c", True),
    ("cloudflared:x.c", "carrier:x.c", False),
])
def test_passing_past_the_allow_of_another_route_is_warned_about(target, other, is_said, settings_file, caplog):
    text = ('[routes]\n"a.example.com" = {{ target = "{}", http = "{}"{} }}\n'
            '"b.example.com" = {{ target = "{}", allow = "192.0.2.0/24" }}\n')
    words = [f"a.example.com={target}: with http = pass a client may ask that backend for b.example.com, too, past its "
             "`allow`: take forward, or give both the same `allow`"] * is_said
    assert said(caplog, settings_file(text.format(target, "pass", "", other))) == words
    assert said(caplog, settings_file(text.format(target, "forward", "", other))) == []
    assert said(caplog, settings_file(text.format(target, "pass", ', allow = "192.0.2.0/24"', other))) == []
    assert said(caplog, settings_file(text.format(target, "pass", ', allow = "0.0.0.0/0"', other))) == words


def test_a_pass_for_all_warns_of_each_route_once_and_of_thousands_soon(settings_file, caplog):
    routes = "".join(f'"r{number}.example.com" = {{ target = "tcp:h:1", allow = "192.0.2.0/24" }}\n'
                     for number in range(3000))
    path = settings_file("[routes]\n" + routes)
    assert said(caplog, path, "--http=pass") == []
    path = settings_file("[routes]\n" + routes + '"x.example.com" = "tcp:h:1"\n"y.example.com" = "tcp:h:2"\n')
    assert [line.partition("=")[0] for line in said(caplog, path, "--http=pass")] == ["x.example.com"]


def test_what_is_not_verified_is_warned_about(settings_file, caplog):
    path = settings_file('[routes]\n"a.example.com" = { target = "tcp:h:1", http = "forward-tls", verify = false }\n'
                         '"b.example.com" = { target = "tcp:h:1", http = "forward-tls" }\n')
    (line,) = said(caplog, path)
    assert line.startswith("a.example.com=tcp:h:1: verify = false: whoever stands between")


# -- watch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, line", [
    (["--watch=on"], "--watch: there is no file of settings to look at: name one with --config"),
    (["--watch=on", "-c", os.devnull], f"--watch: {os.devnull} is no regular file, and cannot be read again"),
    (["--watch=maybe"], "--watch: 'maybe' is none of on, off, true, false"),
])
def test_watch_needs_a_file_that_can_be_read_again(argv, line):
    with pytest.raises(SettingsError) as caught:
        load_settings(argv, {})
    assert caught.value.lines == (line,)


@pytest.mark.parametrize("text", ['watch = true\n', 'watch = "on"\n'])
def test_the_file_may_ask_to_be_watched(text, settings_file):
    settings = load_settings(["-c", settings_file(text)], {})
    assert settings.watch and settings.stamp == sniroute_host.stamp(settings.config)


def test_a_reload_of_an_empty_file_keeps_the_settings_also_where_the_routes_are_on_the_command_line(settings_file):
    running = load_settings(["-c", settings_file('idle = "7m"\n'), "--route=a.b=tcp:h:1"], {})
    with pytest.raises(SettingsError, match=f"^{running.config}: is empty$"):
        settings_file("")
        running.again(running)
    settings_file("# no settings\n")
    assert running.again(running).idle == 300.0
