"""Tests of the documents beside this file: what they promise is what the code does.

Marks in the documents (`<!-- quick start -->` and so on) name the blocks that are read here.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
from typing import Callable, Iterator

import pytest

import sniroute
import sniroute_backends
import sniroute_balance
import sniroute_book
import sniroute_carrier
import sniroute_checks
import sniroute_claim
import sniroute_claims
import sniroute_clusters
import sniroute_deadlines
import sniroute_dialout
import sniroute_dns
import sniroute_door
import sniroute_edge
import sniroute_groups
import sniroute_http
import sniroute_kubernetes
import sniroute_launchers
import sniroute_links
import sniroute_log
import sniroute_loop
import sniroute_metrics
import sniroute_nodeurl
import sniroute_objects
import sniroute_peering
import sniroute_pods
import sniroute_probes
import sniroute_race
import sniroute_redis
import sniroute_refusals
import sniroute_targets
import sniroute_options
import sniroute_owners
import sniroute_registrar
import sniroute_registry
import sniroute_rest
import sniroute_tunnels
import sniroute_values
import sniroute_warm
from sniroute_doctor import sample_hello
from sniroute_groups import Several
from sniroute_names import OPTIONS, parse_host_port
from sniroute_nodeurl import parse_url
from sniroute_settings import SETTINGS, load_settings
from conftest import CORE, DOCTOR, HERE, HOST, Server, exit_code, linux, wait_until
from testbed.clients import namespaces, program_path
from testbed.hellos import genuine
from testbed.ports import free_port
from testbed.running import Running, read_exactly

DOCUMENTS = {name: (HERE / name).read_text() for name in (
    "README.md", "OPERATING.md", "CONTRIBUTING.md", "SECURITY.md", "RELIABILITY.md", "SCALING.md")}
README, OPERATING, CONTRIBUTING, SECURITY, RELIABILITY, SCALING = DOCUMENTS.values()


def marked(document: str, mark: str) -> str:
    """The block behind `<!-- mark -->`; it has to be there once."""
    (block,) = re.findall(rf"^<!-- {mark} -->\n```\w+\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    return block


def section(document: str, heading: str) -> str:
    """What stands below a heading, up to the next one of any level."""
    assert f"\n{heading}\n" in document
    return re.split(r"\n#+ ", document.partition(f"\n{heading}\n")[2])[0]


def blocks(document: str, language: str) -> list[str]:
    """The code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


def code(document: str) -> list[str]:
    """The spans of code in the text, without the blocks."""
    text = re.sub(r"^```.*?^```$", "", document, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


# -- all three ---------------------------------------------------------------------------------


def test_the_readme_can_be_read_at_once():
    assert len(README.encode()) <= 10 * 1024


def anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[name]):
        path, _, fragment = target.partition("#")
        assert (HERE / (path or name)).is_file(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", DOCUMENTS[path or name], re.MULTILINE)
            assert fragment in map(anchor, headings), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_are_there(name):
    files = {file for file in re.findall(r"[\w./-]*\w\.(?:py|md|service|socket)\b", DOCUMENTS[name])
             if not file.startswith("/etc")}
    assert len(files) > 2
    for file in files:
        if re.fullmatch(r"(/opt/sniroute/|DIR/)?sniroute\w*\.(py|service|socket)|\w+\.md|bench/README\.md", file):
            assert (HERE / file.removeprefix("/opt/sniroute/").removeprefix("DIR/")).is_file(), file


def command_lines() -> Iterator[list[str]]:
    """The words behind `sniroute` of each command line in the documents, in blocks and in the text."""
    for document in DOCUMENTS.values():
        text = "\n".join(blocks(document, "sh")).replace("\\\n", " ") + "\n" + "\n".join(code(document))
        for line in text.split("\n"):
            found = re.match(r"(?:python3[\d.]* )(\S*sniroute\w*\.pyz?)( .*)?$", line.strip())
            if found:
                words = shlex.split(re.split(" &&? ", found[2] or "")[0].removesuffix("&"), comments=True)
                yield [found[1].rpartition("/")[2], *(word for word in words if word not in ("...", "&"))]


def test_command_lines_parse(settings_file):
    names = settings_file(marked(OPERATING, "settings file"))
    lines = list(command_lines())
    assert len(lines) > 20
    router = 0
    for program, *words in lines:
        words = [re.sub(r"^/.*\.toml$", "/dev/null", word).replace("names.toml", names) for word in words]
        if words and words[-1] == "--route":
            words.pop()  # `--route ...`
        if program == "sniroute_carrier.py" or words[:1] == ["carrier"]:
            words = words[words[:1] == ["carrier"]:]
            assert words[:2] == ["access", "tcp"]
            sniroute_carrier.parse_words(words[2:], {})
        elif program == "sniroute_kubernetes.py" or words[:1] == ["kubernetes"]:
            assert words[words[:1] == ["kubernetes"]] in sniroute_kubernetes.COMMANDS
        elif program == "sniroute_nodepass.py" or words[:1] == ["nodepass"]:
            assert parse_url(words[words[:1] == ["nodepass"]].replace("$", ""))
        elif words[:1] == ["claim"]:
            arguments, _, _ = sniroute_claim.parse_words(words[1:])
            assert len(arguments) == 2
        elif words[:1] in (["bundle"], ["token"]):
            assert words[0] in sniroute.PROGRAMS
        elif words[:1] in (["--help"], ["--version"]):
            with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(io.StringIO()):
                load_settings(words, {})
            assert ended.value.code == 0
        elif not any("=local:" in word for word in words):  # an example of CONTRIBUTING.md: tried below
            settings = load_settings(words, {})
            assert settings.command in sniroute.COMMANDS
            router += 1
    assert router > 12


def options(program: str, *words: str) -> set[str]:
    """The options that a --help names."""
    done = subprocess.run([sys.executable, str(HERE / program), *words, "--help"], capture_output=True, text=True,
                          timeout=60, check=True)
    return set(re.findall(r"--[a-z][a-z-]+", done.stdout))


def test_options_that_are_named_are_there():
    known = options("sniroute.py") | options("sniroute.py", "claim") | {"--with", "--help", "--version"}
    # What other programs, or an option that CONTRIBUTING.md adds, have; and the one that is not wanted.
    others = {"--app", "--init", "--sni", "--tls", "--hostname", "--url", "--unix-socket", "--quick",
              "--half-closed-idle", "--workers", "--image", "--command", "--state", "--runs", "--atheris"}
    for name, document in DOCUMENTS.items():
        named = {option for span in code(document) for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)}
        assert len(named) > 2 and named <= known | others, (name, named - known - others)
    assert {"--hostname", "--url"} <= options("sniroute_carrier.py", "access", "tcp")


def with_ports(text: str, ports: dict[str, int]) -> str:
    """A text with other ports, all at once: one that is put in may look like the next one (18080, of 8080)."""
    return re.sub("|".join(map(re.escape, ports)), lambda match: str(ports[match[0]]), text)


# -- README.md ---------------------------------------------------------------------------------


def test_the_test_command_of_the_readme_is_where_ci_looks_for_it():
    assert marked(README, "test command").strip().endswith(".venv/bin/python -m pytest")
    assert "/^<!-- test command -->$/" in (HERE / ".ci/run").read_text()


def test_quick_start_of_the_readme_works_as_pasted(tmp_path, free_ports):
    for program in ("openssl", "curl", "bash"):
        if shutil.which(program) is None:
            pytest.skip(f"needs the Debian package {program}")
    block = marked(README, "quick start")
    first, *_ = free_ports(3)
    script = with_ports(block, {"19000": first, "8443": first + 1, "8080": first + 2}).replace(
        "python3 ", f"{sys.executable} ") + "\nwait\n"
    for name in (*CORE, DOCTOR, *(f"{room}.py" for room in OPTIONS["web"]), "README.md"):
        shutil.copy(HERE / name, tmp_path)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "</HTML>" in done.stdout, done.stderr
    assert f"listening on {HOST}:{first}" in done.stderr and "name=web.example.com" in done.stderr
    assert done.stdout.endswith(README) and "host=app.example.com path=/README.md status=200" in done.stderr


def test_the_routes_of_the_readme_are_routes():
    rows = rows_below(README, "| route | what it does |")
    assert len(rows) > 10
    for route, *_ in rows:
        load_settings(["--route", route.strip("`")], {"KEY": "s3cret"})
    for kind in ("exec:ssh ", "command:ssh ", "kubernetes:", "jump:", "nodepass:"):
        assert any(f"={kind}" in route for route, *_ in rows), kind


def test_the_files_of_settings_about_kubernetes_are_some(settings_file):
    (readme,) = blocks(section(README, "## Kubernetes"), "toml")
    for text, name, word in ((readme, "80.web.team-a.k8s.localhost", "team-a/svc/web:80"),
                             (marked(OPERATING, "laptop"), "80.web.default.k8s.localhost", "default/svc/web:80"),
                             (marked(OPERATING, "kubernetes ports"), "db.example.com",
                              "shop/svc/postgres:5432@arn:aws:eks:eu-west-1:1:cluster/prod")):
        settings = load_settings(["-c", settings_file(text)], {})
        assert settings.routes.decide(name).tunnel.hostname == word
    assert len(settings.port) == 2


def test_the_pods_that_the_document_has_made_are_those_that_are_made(settings_file):
    settings = load_settings(["-c", settings_file(marked(OPERATING, "create_pod"))], {})
    plain, whole = (route.create_pod for route in settings.route)
    assert plain == whole._replace(labels=()) == sniroute_objects.NewPod()
    assert settings.routes.decide("orders.db.example.com").tunnel.hostname.startswith(
        "jump:shop/pod/sniroute/orders.internal:5432?create=")


def test_the_environment_of_the_program_for_clusters_is_there():
    text = section(OPERATING, "## Kubernetes")
    assert {name for name in (*sniroute_clusters.PREFIXES, "HOME", "PATH", "KUBECONFIG") if name not in text} == set()
    assert {f"`{word}`" for word in sniroute_objects.BALANCES} <= set(re.findall("`[^`]*`", text))
    words = {word for row in sniroute_objects.KINDS.values() for word in row.words[:1]}
    assert {word for word in words if f"`{word}`" not in text and f"`{word}/" not in text} == set()


def rows_below(document: str, head: str) -> list[list[str]]:
    """The cells of each row of the table with this first line; it has to be there once."""
    (table,) = re.findall(rf"^{re.escape(head)}\n\|[-|]+\|\n((?:\|.*\n)+)", document, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


@pytest.fixture
def pasted(settings_file, run, monkeypatch):
    """pasted(mark, {address of the example: server}) -> a router with that example of a document as its whole file."""
    monkeypatch.setattr(sniroute_checks, "START_WITHIN", 0.1)

    def start(mark: str, servers: dict[str, Server]) -> Running:
        text = marked(README + OPERATING, mark)
        for place, server in servers.items():
            assert place in text
            text = text.replace(place, "%s:%d" % server.address)
        text = text.replace("10.1.0.0/16", "127.0.0.1/32").replace("10.2.0.0/16", "127.0.0.2/32")
        return run("-c", settings_file(text))
    return start


def far_end(answer: bytes) -> Callable[[socket.socket], None]:
    """A handler that answers a hello, or says as PostgreSQL that it has no TLS."""
    def handler(sock: socket.socket) -> None:
        said = sock.recv(8)
        if said == b"\0\0\0\x08\x04\xd2\x16\x2f":
            sock.sendall(b"N")
        elif said:
            sock.sendall(answer)
        while sock.recv(65536):
            pass
    return handler


def answer_to(running: Running, name: str) -> bytes:
    """Who serves a client of this name."""
    with running.connect(genuine(name=name)) as client:
        return read_exactly(client, 1)


def members_of(running: Running) -> list[sniroute_balance.Member]:
    """The backends of the one route."""
    (group,) = running.router.targets.book.groups.values()
    return list(group.members.values())


def test_failover_of_the_readme_works_as_pasted(pasted, serve):
    second = serve(far_end(b"2"))
    with Server(far_end(b"1")) as first:
        running = pasted("failover", {"192.0.2.1:5432": first, "192.0.2.2:5432": second})
        wait_until(lambda: all(member.is_proven for member in members_of(running)), what="a check of each")
        assert [answer_to(running, "db.example.com") for _ in range(3)] == [b"1"] * 3
        running.ending(3)
    assert [answer_to(running, "db.example.com") for _ in range(5)] == [b"2"] * 5
    assert members_of(running)[0].why == "Connection refused"
    assert {running.ending(number + 1).reason for number in range(8)} == {"client_closed"}


def test_warm_connections_of_the_documents_are_ready_as_pasted(pasted, serve):
    servers = [serve(far_end(b"1")), serve(far_end(b"2"))]
    running = pasted("warm", dict(zip(("192.0.2.3:443", "192.0.2.4:443"), servers)))
    wait_until(lambda: [len(member.pool.idle) for member in members_of(running)] == [2, 2])
    assert {answer_to(running, "api.example.com") for _ in range(2)} == {b"1", b"2"}
    assert [member.pool.hit for member in members_of(running)] == [1, 1]
    wait_until(lambda: [server.accepted for server in servers] == [3, 3], what="others in their places")


def test_zones_of_the_documents_work_as_pasted(pasted, serve):
    far = serve(far_end(b"b"), ("127.0.0.2", 0))
    with Server(far_end(b"a")) as near:
        running = pasted("zones", {"10.1.0.5:5432": near, "10.2.0.5:5432": far})
        assert [answer_to(running, "db.example.com") for _ in range(4)] == [b"a"] * 4
    assert [answer_to(running, "db.example.com") for _ in range(4)] == [b"b"] * 4


# -- OPERATING.md ------------------------------------------------------------------------------


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_every_option_is_there_with_its_default(row):
    line = next((line for line in OPERATING.split("\n") if line.startswith(f"| `--{row.name} {row.metavar}`")), "")
    assert line, f"--{row.name} {row.metavar} is not in OPERATING.md"
    if row.default is not None and row.name != "proxy-from":
        assert f"`{row.default}`" in line.split("|")[2]


def test_every_command_is_there():
    table = section(OPERATING, "## Options")
    for command in (*sniroute.COMMANDS, *sniroute.PROGRAMS):
        assert re.search(rf"^\| `{command}\b", table, re.MULTILINE), command


def test_every_kind_of_target_is_there():
    table = section(OPERATING, "## Routes")
    assert {kind for kind in sniroute_targets.SCHEMES if f"\n| `{kind}:" not in table} == set()


def test_the_settings_file_has_every_setting_and_its_default(tmp_path):
    text = marked(OPERATING, "settings file")
    path = tmp_path / "sniroute.toml"
    path.write_text(text)
    settings, default = load_settings(["-c", str(path)], {}), load_settings([], {})
    named = re.findall(r"^#?(\w+) = ", text.partition("\n[ports]")[0], re.MULTILINE)
    named = [name.replace("tunnel_ports", "ports") for name in named]  # its name beside a table of ports
    tables = "config", "route", "port", "registry"
    assert sorted(named) == sorted(row.field for row in SETTINGS if row.name not in tables)
    for attribute in named:
        if f"#{attribute} = " not in text:
            assert getattr(settings, attribute) == getattr(default, attribute), attribute
    assert [str(route) for route in settings.routes.routes] == [
        "db.example.com=tcp:192.0.2.10:5432", "*.example.com=cloudflared:cft-{name}",
        "reports.example.com=cloudflared:reports.example.com",
        "shell.example.com=exec:ssh -W db:22 sniroute@bastion.example.net",
        "{service}.{namespace}.{context}.k8s.example.com=jump:{namespace}/svc/{service}/localhost:8080@{context}",
        "web.example.com=tcp:192.0.2.20:443", "www.example.com=tcp:192.0.2.20:443"]
    assert [str(port) for port in settings.port] == ["port 127.0.0.1:5433=tcp:192.0.2.10:5432"]
    rules, owner = re.search(r"\n\[registry\](.*)\n\[registry\.owners\.alice\](.*?)\n\[", text, re.DOTALL).groups()
    assert set(re.findall(r"^(\w+) = ", rules, re.MULTILINE)) == {
        "listen", *sniroute_owners.WHERE, *sniroute_owners.RULES}
    assert set(re.findall(r"^(\w+) = ", owner, re.MULTILINE)) == set(sniroute_owners.OWNERS)
    where, default = settings.claims, sniroute_owners.Rules(())
    assert (settings.registry, where.store, where.stale_max) == (("127.0.0.1", 19002), "memory", 0.0)
    for option in ("ttl", "max_ttl", "hold", "target_ports"):
        assert getattr(where.rules, option) == getattr(default, option), option
    plain = sniroute_owners.Owner("alice", ())
    assert (where.owners["alice"].max_names, where.owners["alice"].admin) == (plain.max_names, plain.admin)
    assert f"some {len(sniroute_owners.RESERVED) // 10 * 10} such words" in rules
    route_options = text.partition('[routes."reports.example.com"]')[2]
    assert set(re.findall(r"^(\w+) = ", route_options, re.MULTILINE)) == {"target", *sniroute_options.ROUTE_OPTIONS}


# -- names that come and go --------------------------------------------------------------------


class Shell:
    """A block of a document in a shell, with ports of the test's instead of its own, in a folder with the program."""

    def __init__(self, text: str, folder: pathlib.Path, ports: dict[str, int], registry: int):
        assert all(port in text for port in ports)
        text = with_ports(text, ports)
        where = f"{HOST}:{registry}"  # as in all of them where they do not say
        for path in HERE.glob("sniroute*.py"):
            shutil.copy(path, folder)
        self.out, self.err = folder / "out", folder / "err"
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                ["bash", "-c", text.replace("python3 ", f"{sys.executable} ") + "\nwait\n"], cwd=folder, stdout=out,
                stderr=err, start_new_session=True,
                env={**os.environ, "SNIROUTE_REGISTRY": where, "SNIROUTE_REGISTRY_URL": f"http://{where}"})

    def end(self) -> None:
        """Wait for it; what it has started ends with it."""
        try:
            self.process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def paste_names(tmp_path, free_ports):
    """paste_names(document, mark, *ports of the example) -> (Shell, {port: the one instead})."""
    for program in ("curl", "bash"):
        if shutil.which(program) is None:
            pytest.skip(f"needs the Debian package {program}")
    shells: list[Shell] = []

    def start(document: str, mark: str, *ports: str) -> tuple[Shell, dict[str, int]]:
        first, _ = free_ports(len(ports) + 1)
        instead = {port: first + number for number, port in enumerate(ports)}
        shells.append(Shell(marked(document, mark), tmp_path, instead, instead.get("19002", first + len(ports))))
        return shells[-1], instead

    yield start
    for shell in shells:
        if shell.process.poll() is None:
            os.killpg(shell.process.pid, signal.SIGTERM)
        shell.end()


def test_a_name_is_claimed_and_served_as_pasted(paste_names):
    shell, _ = paste_names(OPERATING, "one router", "19000", "19002", "8080")
    shell.end()
    out, said = shell.out.read_text(), shell.err.read_text()
    assert '"name": "shop.tun.localhost"' in out and "Hello\n" in out, said
    assert "host=shop.tun.localhost path=/ status=200" in said and said.count("stopped\n") == 1


def test_two_routers_on_one_redis_share_a_name_as_pasted(paste_names):
    program_path("redis-server", "redis-server")
    shell, ports = paste_names(OPERATING, "two routers", "19000", "19002", "19100", "19102", "6379", "8080")
    shell.end()
    out, said = shell.out.read_text(), shell.err.read_text()
    assert '"name": "shop.tun.localhost"' in out and "Hello\n" in out, said
    assert said.count("registry: shop.tun.localhost: claimed by alice, to tcp:127.0.0.1:") == 2
    assert "path=/ status=200" in said and said.count("stopped\n") == 2


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for network namespaces")
def test_a_service_behind_nat_is_reached_as_pasted(tmp_path):
    """In a network, and with a /run, of its own: two runs do not meet."""
    for program, package in (("curl", "curl"), ("ip", "iproute2")):
        program_path(program, package)
    words = (*namespaces("--net", "--mount"), "bash", "-c")
    for path in (*HERE.glob("sniroute*.py"), HERE / "README.md"):
        shutil.copy(path, tmp_path)
    block = marked(README, "behind nat").replace("python3 ", f"{sys.executable} ")
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        with subprocess.Popen([*words, f"mount -t tmpfs tmpfs /run && ip link set lo up\n{block}\nwait"], cwd=tmp_path,
                              stdout=out, stderr=err) as shell:
            exit_code(shell, 60)
    assert README in (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert "far end has dialled in" in (tmp_path / "err").read_text()


@pytest.mark.parametrize("document, heading, least", [(SECURITY, "## Threats", 51),
                                                      (RELIABILITY, "## What is promised under fault", 60)],
                         ids=["threats", "promises"])
def test_each_threat_and_each_promise_is_held_by_a_test_that_is_there(document, heading, least):
    """Rows of three columns, none of them empty and none twice; the last one is a test, by its file and its name."""
    _, _, *rows = [line for line in section(document, heading).splitlines() if line.startswith("|")]
    found = [re.fullmatch(r"\| (\S[^|]*) \| (\S[^|]*) \| `(test_\w+\.py)::(test_\w+)` \|", row) for row in rows]
    assert len(rows) >= least and [row for row, match in zip(rows, found) if match is None] == []
    whats, _, files, tests = zip(*(match.groups() for match in found))
    assert len(set(whats)) == len(whats)
    there = {file: {node.name for node in ast.parse((HERE / file).read_bytes()).body if isinstance(node, ast.FunctionDef)}
             for file in set(files)}
    assert [test for file, test in zip(files, tests) if test not in there[file]] == []


def test_times_of_what_goes_are_those_of_the_code():
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in
            section(RELIABILITY, "## What happens when something goes").splitlines() if row.startswith("| ")}
    several, rules, times = Several(None, None, []), sniroute_owners.Rules([]), sniroute_nodeurl.Times()
    settings = {setting.name: str(setting.default).replace("s", " s") for setting in SETTINGS}
    idle, interval, count = sniroute_targets.KEEPALIVE
    restart, = re.findall(r"^RestartSec=(.*)$", (HERE / "sniroute.service").read_text(), re.MULTILINE)
    for what, *said in (
            ("a client", f"{idle + interval * count} s"),
            ("a backend", f"{sniroute_race.CONNECT_TIMEOUT:g} s for each", f"{sniroute_race.CONNECT_BUDGET:g} s in all"),
            ("one of several backends", f"after {several.health_fail} failures", f"each {several.health_interval:g} s",
             f"{several.health_timeout:g} s for", f"rests for {several.fallback_interval:g} s",
             f"{several.health_pass} checks pass"),
            ("a tunnel in use", f"after {sniroute_tunnels.BACKOFF_FIRST:g} s;", f"up to {sniroute_tunnels.BACKOFF_LAST:g} s"),
            ("a tunnel that hangs", f"after {sniroute_deadlines.FIRST_BYTE_TIMEOUT:g} s"),
            ("a tunnel's start", f"`--start-timeout`, {settings['start-timeout']}",
             f"after {sniroute_tunnels.FAILURE_FIRST:g} s;", f"up to {sniroute_tunnels.FAILURE_LAST:g} s"),
            ("descriptors, memory", f"each {sniroute_loop.CAPACITY_PAUSE:g} s"),
            ("threads, processes", f"after {sniroute_tunnels.SHORT_RETRY:g} s"),
            ("the router", f"`RestartSec`, {restart} s"),
            ("an owner of a claim", f"`ttl`, {rules.ttl:g} s", f"`hold`, {rules.hold:g} s"),
            ("Redis", f"after {sniroute_redis.IDLE:g} s and {sniroute_redis.ANSWER_MAX:g} s",
             f"after {sniroute_redis.AGAIN_FIRST:g} s", f"up to {sniroute_redis.AGAIN_LAST:g} s"),
            ("an API server", f"each {settings['kubernetes-ping']}", f"after {sniroute_links.MISSES} without",
             f"after {sniroute_pods.RETRY_FIRST:g} s", f"up to {sniroute_pods.RETRY_LAST:g} s"),
            ("a pod", f"for {sniroute_pods.REST:g} s"),
            ("the other end of NodePass", f"after {sniroute_peering.SILENCES * times.report:g} s",
             f"after {sniroute_dialout.FIRST_TRIES[0]:g} s", f"up to {times.cooldown:g} s")):
        assert [word for word in said if word not in rows[what]] == [], rows[what]
    for said in (f"{sniroute_claims.GRACE_MIN:g} s at least", f"beside it after {sniroute_race.STAGGER:g} s"):
        assert said in RELIABILITY


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a network namespace")
def test_users_of_the_host_are_kept_from_tunnels_as_pasted():
    """In a network of its own: root and the router's user connect to a port of a tunnel, and nobody else does."""
    program_path("nft", "nftables")
    router, other = 65_000, 65_534
    block = marked(SECURITY, "local users").replace("$(id -u sniroute)", str(router))
    probe = f"""
import os, socket
with socket.create_server(("127.0.0.1", 20000)), socket.create_server(("127.0.0.1", 19999)):
    for port, user in ((20000, 0), (20000, {router}), (20000, {other}), (19999, {other})):
        if not (child := os.fork()):
            os.setuid(user)
            with socket.socket() as sock:
                os._exit(sock.connect_ex(("127.0.0.1", port)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    if subprocess.run([*namespaces("--net"), "nft", "add", "table", "inet", "x"], capture_output=True).returncode:
        pytest.skip("this kernel has no nftables")
    words = (*namespaces("--net"), "sh", "-c", f'ip link set lo up\n{block}\nexec "$@"', "sh", sys.executable, "-c", probe)
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["0", "0", str(errno.ECONNREFUSED), "0"], ended


@linux
def test_a_name_of_the_readme_is_claimed_and_served_as_pasted(paste_names):
    """Until somebody presses Ctrl-C."""
    shell, ports = paste_names(README, "names", "19000", "8080")
    ask = ["curl", "-sf", f"http://shop.tun.localhost:{ports['19000']}/names.toml"]
    wait_until(lambda: subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.startswith("[registry]"),
               what="the name", timeout=30)
    assert shell.out.read_text().startswith("shop.tun.localhost\n")
    shell_pid = shell.process.pid
    children = pathlib.Path(f"/proc/{shell_pid}/task/{shell_pid}/children").read_text().split()
    (client,) = [pid for pid in children if b"\0claim\0" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(client), signal.SIGINT)
    wait_until(lambda: "shop.tun.localhost: released by me" in shell.err.read_text(), what="the release")


def test_the_requests_of_a_registry_are_there():
    text = section(OPERATING, "### Requests and answers")
    rows = rows_below(OPERATING, "| request | answer |")
    named = {(method, path.replace("KEY", "{key}")) for cell, _ in rows for method, path in
             re.findall(r"(GET|POST|PUT|DELETE) (/[\w/]*)", cell)}
    named |= {("POST", "/routes/{key}/resume"), ("GET", "/openapi.json")}
    assert "`/resume`" in text and "`GET /openapi.json`" in text
    assert named == {(row.method, row.path) for row in sniroute_rest.ENDPOINTS}
    classes = {}
    for statuses, words, _ in rows_below(OPERATING, "| status | `class` | why |"):
        for word in re.findall(r"`(\w+)`", words):
            classes[word] = set(map(int, statuses.split(", ")))
    known = {word: row.status for word, row in sniroute_claims.WORDS.items() if row.status >= 400}
    known |= sniroute_rest.STATUS
    assert classes.keys() == known.keys()
    assert {word for word, status in known.items() if status not in classes[word]} == set()
    told = " ".join(text.split())
    assert f"the last {sniroute_registry.EVENTS_MAX}; else" in told and f"over {sniroute_rest.BODY_MAX >> 10} KiB" in told
    assert (f"Bounds: {sniroute_registrar.CALLERS_MAX} connections at once, {sniroute_rest.STREAMS_MAX} streams of an "
            f"owner, and {sniroute_door.STREAM_MAX >> 10} KiB that one does not read") in told
    assert f"from {sniroute_owners.TTL_MIN:g} to `max_ttl`" in told
    assert f"{sniroute_claims.LINGER:g} seconds after that it is gone" in told
    fields = {*sniroute_owners.FIELDS} - {"name", "port", "target"}
    assert {name for name in fields if f"`{name}`" not in text} == set()
    assert (10 + 3 * 5 / sniroute_owners.TTL_MIN) == sniroute_rest.rate_of(sniroute_owners.Owner("a", (), max_names=5))


def test_what_owners_may_name_is_there():
    text = section(OPERATING, "### Owners, and what they may do")
    for kind in sniroute_owners.KINDS:
        assert f'`{kind}:`' in text or f'`["{kind}"]`' in text, kind
    stores = section(OPERATING, "### Stores")
    for store in sniroute_owners.STORES:
        assert f"`{store.partition(':')[0]}" in stores, store


def test_the_zone_of_the_document_is_one_for_bind(tmp_path):
    check = program_path("named-checkconf", "bind9-utils")
    text = marked(OPERATING, "bind").replace('"..."', '"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="')
    (tmp_path / "named.conf").write_text(text)
    done = subprocess.run([check, str(tmp_path / "named.conf")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    (url,) = re.findall(r'^dns = "(.*?)"', marked(OPERATING, "settings file"), re.MULTILINE)
    zone = sniroute_dns.parse_url(url)
    assert f'key "{zone.key}"' in text and f'zone "{zone.name}"' in text and sniroute_dns.KEY_VARIABLE in OPERATING


def test_what_plain_http_gets_is_there():
    rows = rows_below(OPERATING, "| `http` | what a plain HTTP request gets |")
    assert [mode.strip("`") for mode, _ in rows] == list(sniroute_options.HTTP_MODES)
    text = section(OPERATING, "## HTTP by Host") + section(OPERATING, "#### What is refused")
    assert {name for name in sniroute_options.HTTP_OPTIONS if f"`{name}`" not in text} == set()
    limits = (f"at most {sniroute_http.HEAD_MAX // 1024} KiB and {sniroute_http.FIELDS_MAX} lines, the target in it "
              f"{sniroute_http.TARGET_MAX // 1024} KiB")
    assert limits in " ".join(text.split())


def test_every_status_of_plain_http_is_there():
    named = {int(status) for cell, _ in rows_below(OPERATING, "| status | for |") for status in cell.split(", ")}
    assert named >= {row.status for row in sniroute_refusals.REFUSALS.values()}
    source = (HERE / "sniroute_http.py").read_text()
    raised = {int(status) for status in re.findall(r"raise bad\(.*, (\d{3})\)", source)}
    assert len(raised) > 4 and named >= raised


def test_the_programs_of_the_examples_are_settings(tmp_path):
    path = tmp_path / "sniroute.toml"
    path.write_text(marked(OPERATING, "programs"))
    routes = load_settings(["-c", str(path)], {}).routes
    assert [routes.decide(f"{name}.example.com").scheme.is_tunnel for name in ("a.shell", "a.db", "web")] == [
        False, True, True]


def test_ways_to_balance_and_kinds_of_checks_are_there():
    ways = [word.strip("`") for word, _ in rows_below(OPERATING, "| `balance` | a client gets |")]
    assert ways == list(sniroute_balance.WAYS)
    rows = rows_below(OPERATING, "| `health` | a backend is good if | what its log shows |")
    assert [kind.strip("`").partition(":")[0] for kind, *_ in rows] == list(sniroute_probes.KINDS)
    for kind, *_ in rows:
        sniroute_options.parse_health(kind.strip("`").replace("PORT", "8008"))


def test_warm_connections_are_given_up_before_the_server_gives_them_up():
    longer = 1 + Several._field_defaults["warm_jitter"]
    rows = rows_below(OPERATING, "| server | what it does with a silent session | good `warm_max_idle` |")
    known = 0
    for server, what, good in rows:
        limit, advice = re.search(r"\b(\d+ (?:s|min))\b", what), re.match("`([^`]+)`", good)
        if limit and advice:
            known += 1
            limit = sniroute_values.parse_duration(limit[1].replace(" ", "").replace("min", "m"))
            assert sniroute_values.parse_off_or_duration(advice[1]) * longer < limit, server
    assert known >= 6


def test_figures_of_several_backends_are_the_programs():
    text = " ".join(OPERATING.partition("\n### Several backends\n")[2].partition("\n### Whose domain?\n")[0].split())
    pauses = [f"{pause:g}" for pause in sniroute_warm.PAUSES]
    for said in (f"a failure weighs like a connection for {sniroute_book.PENALTY_FOR:g} s",
                 f"The first checks come within {sniroute_checks.START_WITHIN:g} s of the start",
                 f"{sniroute_checks.AT_ONCE} run at once",
                 f"ends what is silent within {sniroute_warm.PROVEN_AFTER:g} s, one is tried after {pauses[0]} s, "
                 f"then after {', '.join(pauses[1:])} s"):
        assert said in text
    assert sniroute_checks.JITTER == sniroute_backends.LIFETIME_JITTER == 0.1, "`up to a tenth`"


def test_settings_that_a_reload_cannot_change_are_there():
    (listed,) = re.findall(r"wait for the next\s+start \(([^)]*)\)", section(OPERATING, "### Reload"))
    assert set(re.findall(r"`(\w+)`", listed)) == {row.field for row in SETTINGS if row.fixed}


def test_every_refusal_is_there():
    table = section(OPERATING, "## What is refused, and how it looks")
    named = {kind for line in table.split("\n") if line.startswith("| `") for kind in
             re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == set(sniroute_refusals.REFUSALS)


def test_every_ending_is_there():
    table = section(OPERATING, "## The log")
    named = {kind for line in table.split("\n") if line.startswith("| `") for kind in
             re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == set(sniroute_log.ENDINGS)


def test_limits_of_the_log_are_there():
    text = " ".join(section(OPERATING, "## The log").split())
    assert (f"at most {sniroute_log.LOG_REFUSALS} refusals for one reason are logged, {sniroute_log.LOG_EVENTS} "
            f"events of one kind, {sniroute_log.LOG_ENDINGS} connections, and as many requests") in text
    assert sniroute_log.LOG_ACCESSES == sniroute_log.LOG_ENDINGS


def test_every_field_and_ending_of_a_request_is_there(tmp_path):
    text = section(OPERATING, "### The line of a request")
    assert set(re.findall(r"^- `(\w+)`", text, re.MULTILINE)) == set(sniroute_log.REQUEST_ENDINGS)
    assert f"{sniroute_log.VALUE_MAX} characters" in " ".join(text.split())
    (line,) = re.findall(r"^    (client=.*)$", text, re.MULTILINE)
    journal = sniroute_log.Journal(io.StringIO(), "text")
    journal.emit(sniroute_log.Access(0.0, ("192.0.2.7", 51234), "GET", "web.example.com", "/login", 200, 0, 6520,
                                     0.0031, 0.0042, "web.example.com", "tcp:192.0.2.1:80", "", None))
    journal.stop()
    assert journal.stream.getvalue() == f"1970-01-01T00:00:00.000Z info {line}\n"


def test_variables_a_tunnel_may_inherit_are_there():
    names = {name for name in sniroute_launchers.TUNNEL_ENVIRONMENT if name.isupper()}
    assert {name for name in names if f"`{name}`" not in OPERATING} == set()


def test_what_the_carrier_says_is_there():
    table = section(OPERATING, "### What the carrier says")
    words = {word for line in table.split("\n") if line.startswith("| `") for word in
             re.findall(r"`([^`]+)`", line.split("|")[1])} - {"HTTP 301 to ...: a web application?"}
    sentences = set(sniroute_edge.REASONS.values())
    assert {word for word in words if not any(sentence.startswith(word) for sentence in sentences)} == set()
    assert {sentence for sentence in sentences if not sentence.startswith(tuple(words))} == set()


def test_files_that_may_be_left_out_are_the_options():
    table = section(OPERATING, "## Files")
    assert set(re.findall(r"`(sniroute_\w+\.py)`", table.partition("\n\nA file")[0])) == {
        path.name for path in HERE.glob("sniroute*.py")} - set(CORE)


def test_metrics_and_paths_are_there():
    alerts = marked(OPERATING, "alerts")
    asked = {re.sub("_bucket$", "", name) for name in re.findall(r"\bsniroute_\w+", alerts)}
    assert len(asked) > 8 and asked <= {metric.name for metric in sniroute_metrics.METRICS}
    table = section(OPERATING, "## Metrics, status, and a page")
    for word in ("GET /`", "GET /metrics`", "GET /status`", "GET /claims/NAME`", "GET /healthz`", "GET /readyz`", "POST /reload`",
                 "POST /tunnels/NAME/stop`", "/start`", "POST /routes/PATTERN/backends/ADDRESS/drain`", "/enable`"):
        assert f"`{word}" in table
    rows = [line for line in table.split("\n") if line.startswith("| `sniroute_")]
    kinds = "sniroute_backend_", "sniroute_http_", "sniroute_registry_"
    assert {word for row in rows for word in re.findall(r"`(sniroute_\w+)`", row)} == {
        metric.name for metric in sniroute_metrics.METRICS if metric.name.startswith(kinds)}
    events = next(row for row in rows if "registry_events" in row)
    assert re.findall(r"`(\w+)`", events)[2:] == [sniroute_registry.CLAIMED, sniroute_registry.RENEWED,
                                                  sniroute_registry.CHANGED, sniroute_registry.RELEASED,
                                                  sniroute_registry.EXPIRED]
    assert f"the first {sniroute_metrics.CLAIMS_SHOWN} names" in " ".join(table.split())
    told = " ".join(table.split())
    assert f"{sniroute_metrics.REQUEST_ROUTES} routes have rows of their own" in told
    assert f"`last_requests`, {sniroute_metrics.REQUESTS_SHOWN} rows" in told
    shown = table.partition("A row of `backends`")[2]
    states = {"spare", *sniroute_groups.WORDS}
    assert {word for word in states if f"`{word}`" not in shown} == set()


def test_prometheus_asks_where_the_example_serves():
    (target,) = re.findall(r'targets: \["(.*)"\]', marked(OPERATING, "prometheus"))
    assert sniroute_values.parse_admin(target) == parse_host_port(target)
    assert f'admin = "{target}"' in section(OPERATING, "## Under systemd")


SYSTEMCTL = """#!/bin/sh
echo "$*" >>"$SCRATCH/systemctl"
"""


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> pathlib.Path:
    """A root for the recipes: `/opt` and `/etc` of their text lie here, and `systemctl` only notes what it is told."""
    for program in ("openssl", "bash"):
        if shutil.which(program) is None:
            pytest.skip(f"needs the Debian package {program}")
    for folder in ("etc/default", "etc/systemd/system", "opt", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "bin/systemctl").write_text(SYSTEMCTL)
    (tmp_path / "bin/systemctl").chmod(0o755)
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    return tmp_path


def paste(recipe: str, scratch: pathlib.Path, source: pathlib.Path = HERE) -> str:
    """Paste a recipe of OPERATING.md into a shell.  Returns what systemctl was told."""
    told = scratch / "systemctl"
    told.unlink(missing_ok=True)
    text = re.sub(r"(?<![\w.])/(etc|opt)/", rf"{scratch}/\1/", marked(OPERATING, recipe))
    done = subprocess.run(["bash", "-euo", "pipefail"], input=text, cwd=source, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return told.read_text() if told.exists() else ""


def test_the_install_recipe_pasted_twice_keeps_settings_and_secrets(scratch):
    settings, secrets = scratch / "etc/sniroute.toml", scratch / "etc/default/sniroute"
    assert paste("install", scratch) == "daemon-reload\nenable --now sniroute.socket sniroute.service\n"
    assert settings.stat().st_mode & 0o777 == 0o644 and secrets.stat().st_mode & 0o777 == 0o600
    assert re.search("^SNIROUTE_ADMIN_TOKEN=[0-9a-f]{32}$", secrets.read_text(), re.MULTILINE)
    assert f"SNIROUTE_CONFIG={settings}\n" in secrets.read_text()
    for name in ("sniroute.service", "sniroute.socket"):
        assert (scratch / "etc/systemd/system" / name).read_text() == (HERE / name).read_text()
    settings.write_text('[routes]\n"mine.example.com" = "tcp:192.0.2.1:1"\n')
    before = settings.read_text(), secrets.read_text()
    assert "restart" not in paste("install", scratch)
    assert (settings.read_text(), secrets.read_text()) == before


def test_the_upgrade_recipe_changes_the_program_alone_and_restarts_it_once(scratch, tmp_path):
    paste("install", scratch)
    kept = {path: path.read_bytes() for path in (scratch / "etc/sniroute.toml", scratch / "etc/default/sniroute")}
    source = tmp_path / "new"
    source.mkdir()
    for path in (*HERE.glob("sniroute*"), *HERE.glob("*.md")):
        shutil.copy(path, source)
    for path in source.glob("sniroute*"):
        path.write_text(path.read_text() + "# newer\n")
    assert len(marked(OPERATING, "upgrade").splitlines()) == 3
    assert paste("upgrade", scratch, source) == "daemon-reload\nrestart sniroute\n"
    for path in (*(scratch / "opt/sniroute").glob("sniroute*.py"), *(scratch / "etc/systemd/system").glob("sniroute.*")):
        assert path.read_text().endswith("# newer\n"), path
    assert {path: path.read_bytes() for path in kept} == kept


def test_the_upgrade_recipe_does_not_restart_with_settings_that_are_wrong(scratch):
    paste("install", scratch)
    (scratch / "etc/sniroute.toml").write_text("idle = 1\n")
    with pytest.raises(AssertionError, match="is not a duration"):
        paste("upgrade", scratch)
    assert (scratch / "systemctl").read_text() == "daemon-reload\n"


def test_under_systemd_nobody_is_told_to_start_a_second_process():
    text = " ".join(section(OPERATING, "## Restart without a refused connection").split())
    assert "Start no second process by hand there" in text


def test_the_unit_points_to_it():
    unit = (HERE / "sniroute.service").read_text()
    assert "\nDocumentation=file:/opt/sniroute/OPERATING.md\n" in unit and "README.md" not in unit
    assert "OPERATING.md" in next(line for line in OPERATING.split("\n") if line.startswith("install -D"))


# -- the examples of CONTRIBUTING.md -----------------------------------------------------------


def apply_examples(folder: pathlib.Path) -> None:
    """Change the rooms in `folder` as the diffs of CONTRIBUTING.md say: `---` names a file, `@@` begins a hunk."""
    found = blocks(CONTRIBUTING, "diff")
    assert len(found) == 7
    for part in re.split(r"^--- ", "".join(found), flags=re.MULTILINE)[1:]:
        name, *hunks = re.split(r"\n@@\n", part)
        path = folder / name
        text = path.read_text()
        for hunk in hunks:
            lines = [line for line in hunk.split("\n") if line]
            before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
            assert text.count(before) == 1, f"{name} has this {text.count(before)} times:\n{before}"
            text = text.replace(before, after)
        path.write_text(text)
        compile(text, name, "exec")


def changed(folder: pathlib.Path) -> None:
    """Have the program in a folder, with the examples."""
    for name in (*CORE, DOCTOR, *(f"{room}.py" for room in (*OPTIONS["backends"], *OPTIONS["web"]))):
        shutil.copy(HERE / name, folder)
    apply_examples(folder)


def exchange(port: int, *steps: tuple[bytes, bytes]) -> None:
    """Say and hear each step, as a client of the router."""
    with socket.create_connection((HOST, port), timeout=10) as client:
        for said, heard in steps:
            client.sendall(said)
            answer = b""
            while len(answer) < len(heard) and (data := client.recv(len(heard) - len(answer))):
                answer += data
            assert answer == heard


def acme_hello() -> bytes:
    """A hello that offers acme-tls/1: the sample's padding, which is last, becomes an ALPN extension."""
    hello = sample_hello("db.example.com", 200)
    names = b"\x0aacme-tls/1"
    alpn = struct.pack("!HHH", 16, len(names) + 2, len(names)) + names  # RFC 7301 section 3.1
    at = hello.index(struct.pack("!H", 21), hello.index(b"db.example.com"))
    pad = len(hello) - at - len(alpn) - 4
    return hello[:at] + alpn + struct.pack("!HH", 21, pad) + bytes(pad)


def test_the_examples_can_be_followed(tmp_path, echo_server):
    changed(tmp_path)
    port, far = free_port(), echo_server.address[1]
    route = ["--route", f"db.example.com=local:{far}"]
    program = [sys.executable, "-S", "-E", str(tmp_path / "sniroute.py")]

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([*program, *words], capture_output=True, text=True, timeout=60)

    assert run("check", *route).stdout == f"db.example.com=local:{far}\n"
    assert run("explain", "db.example.com", *route).returncode == 0
    assert "is not HOST:PORT" in run("check", "--route", "db.example.com=local:x").stderr
    file = tmp_path / "sniroute.toml"
    file.write_text('half_closed_idle = "2m"\n[routes]\n"a.example.com" = "socat:b.example.com"\n')
    done = run("check", "-c", str(file))
    assert (done.returncode, done.stdout) == (0, "a.example.com=socat:b.example.com\n")
    log = tmp_path / "log"
    with open(log, "wb") as stderr:
        router = subprocess.Popen([*program, "--listen", f"{HOST}:{port}", "--half-closed-idle", "2m", *route],
                                  stderr=stderr)
        try:
            wait_until(lambda: f"listening on {HOST}:{port}\n" in log.read_text())
            hello = sample_hello("db.example.com")
            exchange(port, (hello, hello), (b"more", b"more"))
            exchange(port, (b"CONNECT db.example.com:443 HTTP/1.1\r\nHost: db.example.com:443\r\n\r\n",
                            b"HTTP/1.1 200 OK\r\n\r\n"), (hello, hello))
            exchange(port, (acme_hello(), b"\x15\3\1\0\2\2\x78"))
        finally:
            router.terminate()
            router.wait()
    assert log.read_text().count(f"backend=local:{far} ") == 2 and "reason=acme" in log.read_text()


def test_the_example_for_plain_http_can_be_followed(tmp_path, free_ports):
    changed(tmp_path)
    port, _ = free_ports(1)
    log = tmp_path / "log"
    asked = b"GET / HTTP/1.1\r\nHost: old.example.com\r\n\r\n"
    with open(log, "wb") as stderr:
        router = subprocess.Popen(
            [sys.executable, "-S", "-E", str(tmp_path / "sniroute.py"), "--listen", f"{HOST}:{port}",
             "--http", "gone", "--route", "*=tcp:192.0.2.1:80"], stderr=stderr)
        try:
            wait_until(lambda: f"listening on {HOST}:{port}\n" in log.read_text())
            exchange(port, (asked, b"HTTP/1.1 410 Gone\r\n"))
            wait_until(lambda: "host=old.example.com path=/ status=410 " in log.read_text())
        finally:
            router.terminate()
            router.wait()


def test_the_examples_for_several_backends_can_be_followed(tmp_path, free_ports, serve):
    changed(tmp_path)
    port, _ = free_ports(1)
    servers = [serve(lambda sock, said=said: (sock.sendall(said), sock.recv(1))) for said in (
        b"220 mail.example.com", b"SSH-2.0-one", b"SSH-2.0-two", b"+PONG\r\n")]
    targets = ",".join("%s:%d" % server.address for server in servers)
    file, log = tmp_path / "sniroute.toml", tmp_path / "log"
    file.write_text(f'listen = "{HOST}:0"\n[ports]\n"{HOST}:{port}" = {{ target = "tcp:{targets}", balance = "last", '
                    'health = "ssh", health_interval = "100ms", penalties_max = 5 }\n')
    program = [sys.executable, "-S", "-E", str(tmp_path / "sniroute.py")]
    said = subprocess.run([*program, "check", "-c", str(file)], capture_output=True, text=True, timeout=60).stdout
    assert "balance last; health ssh; health_interval 0.1 s; penalties_max 5" in said
    with open(log, "wb") as stderr:
        router = subprocess.Popen([*program, "-c", str(file)], stderr=stderr)
        try:
            wait_until(lambda: log.read_text().count(" is down: it does not speak SSH: it said ") == 2)
            with socket.create_connection((HOST, port), timeout=10) as client:
                assert client.recv(11) == b"SSH-2.0-two"
        finally:
            router.terminate()
            router.wait()
