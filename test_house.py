"""Tests of the house: how its files hang together, whatever is in them.

The table in CONTRIBUTING.md says which room may import which; the files are read, and compared with it.  A copy of
some of the files is run: each option may be left out, and is not opened where nobody asks for it.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from typing import Any, Iterator, NamedTuple

import pytest

import sniroute
import sniroute_names
from conftest import CORE, DOCTOR, HERE, HOST, OPTIONS
from testbed.hellos import HELLO
from testbed.program import BARE, BARE_PYTHON, execute
from testbed.running import alert, read_all, read_exactly, route

FACE = "sniroute"
SOURCES = {path.stem: path.read_text() for path in sorted(HERE.glob("sniroute*.py"))}
TREES = {room: ast.parse(source) for room, source in SOURCES.items()}
ADMIN = {"sniroute_admin.py", "sniroute_door.py", "sniroute_metrics.py", "sniroute_page.py"}
COMMANDS = {"sniroute_commands.py"}
BACKENDS = {f"sniroute_{room}.py" for room in ("backends", "book", "groups", "balance", "warm", "reuse", "conversations", "checks",
                                                "probes")}
WEB = {f"{room}.py" for room in sniroute_names.OPTIONS["web"]}
PAGES = {"sniroute_browsers.py", "sniroute_answers.py", "sniroute_certificate.py", "sniroute_http.py"}
CARRIER = {f"{room}.py" for room in sniroute_names.OPTIONS["carrier"]}

# What is larger than the house allows, and why.
FILE_MAX, CLASS_MAX = 900, 30  # lines, methods
LARGE_FILES: dict[str, str] = {}
LARGE_CLASSES: dict[str, str] = {}


# -- imports -----------------------------------------------------------------------------------


class Imports(NamedTuple):
    """The names of the modules that a file imports, without what is for type hints only."""

    at_once: set[str]
    when_needed: set[str]  # inside a function


def is_for_hints(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports_of(tree: ast.Module) -> Imports:
    """What a file imports, wherever the statement stands."""
    found = Imports(set(), set())

    def look(node: ast.AST, into: set[str]) -> None:
        if isinstance(node, ast.Import):
            into.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "the files are flat"
            into.add(node.module.partition(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            into = found.when_needed
        for child in node.orelse if is_for_hints(node) else ast.iter_child_nodes(node):
            look(child, into)

    look(tree, found.at_once)
    return found


def table() -> dict[str, tuple[set[str], set[str]]]:
    """The map in CONTRIBUTING.md: room -> (what it may import, what it may import when that is needed), in order."""
    rows = {}
    lines = (HERE / "CONTRIBUTING.md").read_text().partition("| room | what lives there | may import |\n|---|---|---|\n")[2]
    for line in lines.partition("\n\n")[0].split("\n"):
        room, _, allowed = (cell.strip() for cell in line.strip("|").split("|"))
        words = allowed.split(", ") if allowed != "-" else []
        lazy = {full(word.strip("()")) for word in words if word.startswith("(")}
        assert full(room) not in rows
        rows[full(room)] = {full(word) for word in words if not word.startswith("(")}, lazy
    return rows


def full(room: str) -> str:
    """The module of a room as the table names it."""
    return room if room == FACE else f"sniroute_{room}"


IMPORTS = {room: imports_of(tree) for room, tree in TREES.items()}
OPENED = {room for room, _ in (*sniroute.COMMANDS.values(), *sniroute.PROGRAMS.values())}  # by name, with importlib


def test_the_rows_of_the_map_are_the_files():
    assert sorted(table()) == sorted(SOURCES) and len(SOURCES) > 20


@pytest.mark.parametrize("room", SOURCES)
def test_a_room_imports_what_the_map_allows_and_all_of_it(room):
    at_once, when_needed = (names & SOURCES.keys() for names in IMPORTS[room])
    if room == FACE:
        when_needed |= OPENED
    assert (at_once, when_needed) == table()[room]


def test_nothing_but_the_face_imports_by_a_name_in_a_text():
    """An import that `ast` does not see."""
    for room, source in SOURCES.items():
        if room != FACE:
            assert not re.search(r"import_module|__import__", source), room


def test_the_files_of_each_option_are_known_by_name():
    """`bundle` packs them, and --version says which are there."""
    options = {f"{room}.py" for rooms in sniroute_names.OPTIONS.values() for room in rooms}
    assert options == OPTIONS and sorted(f"{room}.py" for room in sniroute_names.CORE) == CORE
    assert all(rooms[0] == full(option) for option, rooms in sniroute_names.OPTIONS.items()
               if full(option) in SOURCES)


def test_imports_run_down_the_map():
    """So there is no circle, and nobody imports the face."""
    order = list(table())
    assert order[0] == FACE
    for room, allowed in table().items():
        below = set(order[order.index(room) + 1:])
        assert set().union(*allowed) <= below, room


def test_a_file_that_serves_imports_an_option_only_when_it_is_asked_for():
    options = {name.removesuffix(".py") for name in OPTIONS}
    assert options <= SOURCES.keys()
    for name in CORE:
        assert not IMPORTS[name.removesuffix(".py")].at_once & options, name


@pytest.mark.parametrize("room", SOURCES)
def test_a_room_imports_nothing_that_has_to_be_installed(room):
    of_versions = {"_sha2", "_sha256"}  # the one is in Python 3.12 and newer, the other in 3.11
    assert set().union(*IMPORTS[room]) <= sys.stdlib_module_names | SOURCES.keys() | of_versions


@pytest.mark.parametrize("room", [room for room, source in SOURCES.items() if "\nThis room imports " in source])
def test_a_docstring_names_what_the_room_imports(room):
    sentence = re.search(r"This room imports (.*?)\.(?:\s|$)", ast.get_docstring(TREES[room]), re.DOTALL)[1]
    assert set(re.findall(r"sniroute_\w+", sentence)) == set().union(*IMPORTS[room]) & SOURCES.keys()


def test_the_face_has_a_map_of_all_rooms_in_the_same_order():
    """The files that serve come first, and the doctor among them; then the other options."""
    parts = [re.findall(r"^    (sniroute\w*) +(\*?)(.*)$", part, re.MULTILINE)
             for part in sniroute.__doc__.split("\n\n")]
    serve, options = (part for part in parts if part)
    named = [[room for room, _, _ in part] for part in (serve, options)]
    assert [f"{room}.py" for room in named[0]] == [
        f"{room}.py" for room in table() if f"{room}.py" in {*CORE, DOCTOR}]
    others = {full(word.removeprefix("sniroute").strip("_")) for part in sniroute.__doc__.split("\n\n") if " *  " in part
              for line in part.split("\n") for word in re.findall(r"\b(?:sniroute)?_\w+", line[28:])}
    assert sorted([*named[0], *named[1], *others]) == sorted(SOURCES)
    starred = {room for room, star, _ in serve + options if star}
    assert {f"{room}.py" for room in starred | others} == OPTIONS


# -- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", SOURCES)
def test_no_room_has_popen_open_dev_null(room):
    """It opens that first, and in CPython up to 3.11.2 leaves it open where it finds no descriptor for a pipe."""
    assert not [node.lineno for node in ast.walk(TREES[room])
                if isinstance(node, ast.Attribute) and node.attr == "DEVNULL"]


# What patterns are held against: each of these 30 times, behind a head, before a tail.
ONES = "aA0.-_*/= :,;\"'{}[]()%@\\\t\n<>?&#+!\u00e9"
PIECES = [*ONES, *("".join(pair) for pair in itertools.permutations("a0.-_*/= :,\"'#\n", 2))]
HEADS, TAILS = ("", "a", "*.", '"'), ("!", "\n!")
MOST = 10.0  # seconds of CPU for one pattern: all of these take a tenth of one


def patterns(room: str) -> Iterator[re.Pattern[Any]]:
    """Each regular expression of a room: those with a name, and those inside a call of `re`."""
    module = importlib.import_module(room)
    for value in vars(module).values():
        rows = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        for row in rows:
            yield from (each for each in (row if isinstance(row, tuple) else [row]) if isinstance(each, re.Pattern))
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.") and node.args:
            with contextlib.suppress(NameError):  # it is made of what a function knows
                text = eval(ast.unparse(node.args[0]), vars(module))
                if ast.unparse(node.func) not in ("re.escape",) and isinstance(text, (str, bytes)):
                    yield re.compile(text)


@pytest.mark.parametrize("room", TREES)
def test_no_regular_expression_takes_for_ever(room, monkeypatch):
    """Where a text can be read in two ways, piece by piece, 30 pieces are a thousand million ways.

    Found by the long form of testbed.fuzz: `names` of an owner, as a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a!
    """
    def over(*_: object) -> None:
        raise TimeoutError
    before = signal.signal(signal.SIGVTALRM, over)
    try:
        for pattern in set(patterns(room)):
            signal.setitimer(signal.ITIMER_VIRTUAL, MOST)
            for head, piece, tail in itertools.product(HEADS, PIECES, TAILS):
                text = head + piece * 30 + tail
                said = text.encode() if isinstance(pattern.pattern, bytes) else text
                try:
                    pattern.fullmatch(said)
                    pattern.search(said)
                except TimeoutError:
                    pytest.fail(f"{pattern.pattern!r} takes for ever with {said!r}")
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_no_file_is_too_long_without_a_reason():
    long = {room for room, source in SOURCES.items() if source.count("\n") > FILE_MAX}
    assert long == LARGE_FILES.keys()


def test_no_class_has_too_many_methods_without_a_reason():
    large = {f"{room}.{node.name}" for room, tree in TREES.items() for node in ast.walk(tree)
             if isinstance(node, ast.ClassDef)
             and sum(isinstance(child, ast.FunctionDef) for child in node.body) > CLASS_MAX}
    assert large == LARGE_CLASSES.keys()


# What the wall clock is for: it may jump, so nothing waits, ends or is decided by it.
WALL_CLOCK = {
    "shown": ("daemon", "registry", "rest", "router", "shared", "tunnels", "web", "metrics"),
    "the log": ("log", "nodepass", "master", "forwarder"), "the Date of an answer": ("dialin", "lanes", "door", "streams"),
    "certificates, tokens and signatures, which others date": ("certificate", "duplex", "credentials", "rfc2136", "master"),
    "how long a claim outlives its process": ("sqlite",),
}


WALL_CLOCK_IS_READ = re.compile(r"\btime\.time(_ns)?\b|\btime\.(gmtime|localtime|ctime|strftime)\((\"[^\"]*\")?\)"
                                r"|\bdatetime\.(\w+\.)?(now|utcnow|today)\(|^\s*from time import (?!monotonic$)", re.MULTILINE)


def test_nothing_is_decided_by_the_wall_clock():
    found = {path.stem.removeprefix("sniroute_") for path in HERE.glob("sniroute*.py")
             if WALL_CLOCK_IS_READ.search(path.read_text())}
    assert found == {room for rooms in WALL_CLOCK.values() for room in rooms}


# -- versions ----------------------------------------------------------------------------------


def version_in(tree: ast.Module) -> str:
    """The text that a file gives to __version__, once."""
    (value,) = [node.value.value for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"]
    return value


def test_all_files_are_of_one_version_and_are_what_is_installed():
    assert {version_in(tree) for tree in TREES.values()} == {sniroute_names.__version__}
    project = tomllib.loads((HERE / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and project["project"]["dependencies"] == []
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sniroute_names.__version__"}
    assert sorted(project["tool"]["setuptools"]["py-modules"]) == sorted(SOURCES)
    assert project["project"]["scripts"] == {"sniroute": "sniroute:main"}


def test_a_folder_of_two_versions_is_explained_in_one_sentence(folder):
    """An update that copied not all of the files."""
    wire = folder / "sniroute_wire.py"
    text = wire.read_text()
    old = re.sub(r"\bPROXY_WRITERS\b", "WRITERS", text.replace(
        f'__version__ = "{sniroute_names.__version__}"', '__version__ = "0.0.9"'))
    assert old.count('"0.0.9"') == 1 and "PROXY_WRITERS" not in old
    wire.write_text(old)
    (folder / "sniroute_upgrade.py").write_text("# somebody's own\n")
    said = one_line(run(folder, "check", "--route=*=tcp:192.0.2.1:1"), 2)
    place = os.path.realpath(folder)
    assert said.startswith(f"sniroute: the files in {place} do not fit together (cannot import name 'PROXY_WRITERS' ")
    assert "): copy all of them again; there are 0.0.9: sniroute_wire.py; " in said
    current, unknown = re.search(
        rf"; {re.escape(sniroute_names.__version__)}: (.*); an unknown version: (.*)$", said).groups()
    assert unknown == "sniroute_upgrade.py"
    assert current.split(", ") == sorted({*CORE, *OPTIONS} - {"sniroute_wire.py", "sniroute_upgrade.py"})


def test_the_versions_in_a_folder_are_listed(tmp_path, monkeypatch):
    for name, text in {"sniroute.py": '__version__ = "2.0"\n', "sniroute_a.py": 'x = 1\n__version__ = "10.0"  # new\n',
                       "sniroute_b.py": '__version__ = "2.0"\n', "sniroute_c.py": "\n", "sniroute_c.pyc": "",
                       "other.py": '__version__ = "3.0"\n'}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "sniroute_d.py").write_bytes(b"\xff\xfe\n")
    (tmp_path / "sniroute_e.py").mkdir()
    monkeypatch.setattr(sniroute, "__file__", str(tmp_path / "sniroute.py"))
    fault = ImportError("cannot import name 'x' from 'sniroute_a'", name="sniroute_a")
    assert sniroute.misfit(fault) == (
        f"the files in {tmp_path} do not fit together (cannot import name 'x' from 'sniroute_a'): copy all of them again; "
        "there are 10.0: sniroute_a.py; 2.0: sniroute.py, sniroute_b.py; an unknown version: sniroute_c.py, sniroute_d.py, "
        "sniroute_e.py")
    fault = ModuleNotFoundError("No module named 'sniroute_a'", name="sniroute_a")
    assert sniroute.misfit(fault) == f"sniroute_a.py is not beside sniroute.py: copy it there ({tmp_path})"


def test_an_import_that_is_none_of_ours_is_not_explained_away(monkeypatch):
    assert sniroute.misfit(ModuleNotFoundError("No module named 'ssl'", name="ssl")) == ""
    assert sniroute.misfit(ImportError("whatever")) == ""
    monkeypatch.setitem(sniroute.PROGRAMS, "carrier", ("no_such_module", "main"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        sniroute.main(["carrier"])


@pytest.mark.parametrize("words, room", [(["carrier", "--version"], "sniroute_carrier"), (["check"], "sniroute_doctor")])
def test_a_room_that_is_not_there_is_one_sentence(words, room, monkeypatch, capsys, no_variables):
    monkeypatch.setitem(sys.modules, room, None)  # an import says that there is none
    assert sniroute.main(words) == 2
    assert capsys.readouterr() == ("", f"{missing(f'{room}.py', HERE)}\n")


# Closes some of its standard streams, and tells what stands there once `open_standard_streams` has run.
CLOSED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import sniroute_host
says = os.open(sys.argv[2], os.O_WRONLY)
before = [os.fstat(fd) for fd in range(3)]
for fd in map(int, sys.argv[3:]):
    os.close(fd)
sniroute_host.open_standard_streams()
null = os.stat(os.devnull)
opened = sum(os.path.samestat(os.fstat(fd), null) and not os.path.samestat(before[fd], null) for fd in range(3))
assert not os.path.exists(f"/dev/fd/{says + 1}"), "and nothing more"
os.write(says, f"{os.devnull} {opened}\\n".encode())
"""


def test_streams_that_are_closed_are_opened_before_anything_else():
    """A client's socket must never become stderr."""
    for closed in ((0,), (1,), (2,), (0, 1, 2)):
        with tempfile.NamedTemporaryFile() as said:
            execute(sys.executable, "-S", "-E", "-c", CLOSED, str(HERE), said.name, *map(str, closed))
            assert said.read().decode() == f"{os.devnull} {len(closed)}\n"


def test_the_face_can_be_read_by_a_python_that_is_too_old():
    """It has to get as far as the sentence that says so."""
    tree = ast.parse(SOURCES[FACE], feature_version=(3, 6))
    check = next(number for number, node in enumerate(tree.body) if isinstance(node, ast.If))
    assert "sys.version_info < (3, 11)" == ast.unparse(tree.body[check].test)
    assert [ast.unparse(node) for node in tree.body[1:check]] == ["import sys"]
    (requires,) = re.findall(r'^requires-python = "(.*)"$', (HERE / "pyproject.toml").read_text(), re.MULTILINE)
    assert requires == ">=3.11"


def old_pythons() -> Iterator[tuple[pathlib.Path, str]]:
    """Those on PATH and in ~/.pyenv/versions that are too old, and their versions."""
    places = [pathlib.Path(place) for place in os.environ.get("PATH", os.defpath).split(os.pathsep)]
    places += sorted(pathlib.Path("~/.pyenv/versions").expanduser().glob("*/bin"))
    seen = set()
    for minor in range(6, 11):
        for place in places:
            python = place / f"python3.{minor}"
            if minor not in seen and os.access(python, os.X_OK):
                version = execute(str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])", text=True,
                                  said="")
                if version.returncode == 0:  # no shim for a Python that is not selected
                    seen.add(minor)
                    yield python, version.stdout.strip()


def test_an_old_python_says_what_is_needed():
    pythons = list(old_pythons())
    if not pythons:
        pytest.skip("no Python from 3.6 to 3.10 is on PATH or in ~/.pyenv/versions")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        all_ended = list(pool.map(
            lambda row: execute(str(row[0]), str(HERE / "sniroute.py"), "check", text=True, said=""), pythons))
    for (_, version), ended in zip(pythons, all_ended, strict=True):
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == f"sniroute needs Python 3.11 or newer; this is Python {version}\n"


# -- a room alone ------------------------------------------------------------------------------

# What some interpreters do not have (PyPy has no sys.getsizeof) is taken away first.  Each room is imported in a fork of
# a Python without any of ours.  What most rooms need of the standard library is there: that takes nine tenths of the
# time.  It must not bring a part of a package that a room has to ask for itself.
ALONE = """
import gc, sys
for module, names in ((sys, ("getsizeof", "getrefcount", "setswitchinterval")), (gc, ("set_threshold", "freeze"))):
    for name in names:
        delattr(module, name)
import importlib, ipaddress, json, logging, os, random, re, socket, ssl, subprocess, tempfile, threading, typing
assert not {"concurrent", "email", "http", "importlib.util", "urllib", "xml"} & sys.modules.keys()
sys.path.insert(0, sys.argv[1])
def alone(room, below):
    before = os.listdir("/dev/fd")
    importlib.import_module(room)
    assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
    assert len(os.listdir("/dev/fd")) == len(before), "an open descriptor"
    others = {name for name in sys.modules if name.startswith("sniroute")} - {room}
    assert others <= set(below), others
running, ended = {}, {}
def wait_for_one():
    pid, status = os.wait()
    room, said = running.pop(pid)
    with said:
        said.seek(0)
        ended[room] = [os.waitstatus_to_exitcode(status), said.read().decode()]
for room, below in json.load(sys.stdin).items():
    if len(running) == os.cpu_count():
        wait_for_one()
    said = tempfile.TemporaryFile()
    pid = os.fork()
    if not pid:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        for file in (said, *(file for _, file in running.values())):
            file.close()
        alone(room, below)
        sys.exit()
    running[pid] = room, said
while running:
    wait_for_one()
json.dump(ended, sys.stdout)
"""


def below(room: str) -> set[str]:
    """All rooms that a room imports at once, and those that these import."""
    direct = IMPORTS[room].at_once & SOURCES.keys()
    return direct.union(*map(below, direct))


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Any]]:
    """The exit code of a Python that has imported one room, and what it said, for each room."""
    ended = execute(sys.executable, "-S", "-E", "-W", "error", "-c", ALONE, str(HERE), text=True,
                    said=json.dumps({room: sorted(below(room)) for room in SOURCES}))
    assert (ended.returncode, ended.stderr) == (0, "")
    return json.loads(ended.stdout)


@pytest.mark.parametrize("room", SOURCES)
def test_a_room_is_imported_alone(room, alone):
    """It starts nothing, keeps nothing open, says nothing, and asks for nothing that only CPython has."""
    assert alone[room] == [0, ""]


# -- options -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with all files, which nobody changes."""
    return copied(tmp_path_factory.mktemp("whole"), {*CORE, *OPTIONS})


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with all files, for one test."""
    (tmp_path / "house").mkdir()
    return copied(tmp_path / "house", {*CORE, *OPTIONS})


def copied(folder: pathlib.Path, names: set[str]) -> pathlib.Path:
    """The folder, with a copy of these files; of what Python has made of them, too, so that each is compiled once."""
    (folder / "__pycache__").mkdir()
    for name in names:
        shutil.copy2(HERE / name, folder)  # with its time, by which Python knows whether that is still right
        made = importlib.util.cache_from_source(str(HERE / name))
        if os.path.exists(made):
            shutil.copy2(made, folder / "__pycache__")
    return folder


def run(folder: pathlib.Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the program that is in a folder to its end, with a bare Python and an empty PATH."""
    return execute(*BARE_PYTHON, str(folder / "sniroute.py"), *words, env=BARE, text=True, said="")


def one_line(ended: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line that it said on stderr, and nothing on stdout."""
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (code, "", 1), ended
    return ended.stderr.rstrip("\n")


# Runs the program, and tells at its end which of its files were opened, be it as source or compiled.
WATCHED = """
import os, sys
folder, opened = os.path.dirname(sys.argv[1]), set()
def hear(event, details):
    if event == "open" and isinstance(details[0], str) and details[0].startswith(folder):
        opened.add(os.path.basename(details[0]).partition(".")[0] + ".py")
sys.addaudithook(hear)
sys.path.insert(0, folder)
del sys.argv[0]
import sniroute
try:
    code = sniroute.main()
finally:
    print("opened:", *sorted(opened), flush=True)
sys.exit(code)
"""
WATCHED_PYTHON = (*BARE_PYTHON, "-c", WATCHED)


def opened(text: str) -> set[str]:
    """The files that WATCHED tells of."""
    (line,) = re.findall(r"^opened: (.*)$", text, re.MULTILINE)
    return set(line.split())


@pytest.mark.parametrize("words, options", [
    ("check --route=*=tcp:192.0.2.1:1", {DOCTOR}),
    ("check --route=*=carrier:{name} --admin=127.0.0.1:0 --admin-public=:0", {DOCTOR}),
    ("explain a.example.com --route=*=tcp:192.0.2.1:1", {DOCTOR}),
    ("check --route=*=unix:/tmp/{label}.sock", {DOCTOR}),
    ("check --route=*=exec:/bin/cat", {DOCTOR, *COMMANDS}),
    ("carrier --version", CARRIER),
], ids=["check", "check of all", "explain", "unix", "exec", "carrier"])
def test_a_command_opens_its_own_option_only(whole, words, options):
    ended = execute(*WATCHED_PYTHON, str(whole / "sniroute.py"), *words.split(), env=BARE, text=True, said="")
    assert ended.returncode == 0, ended.stderr
    found = opened(ended.stdout)
    assert found & OPTIONS == options and found <= {*CORE, *OPTIONS}


@pytest.mark.parametrize("more, options", [
    ((), set()), (("--route=*.example.org=carrier:{name}",), set()), (("--admin=127.0.0.1:0",), ADMIN),
    ((f"--admin-public={HOST}:0",), ADMIN), (("--route=*.example.org=unix:/tmp/{label}.sock",), set()),
    (("--route=*.example.org=command:/bin/cat {address}",), COMMANDS), (("--error-pages=on",), PAGES),
], ids=["tcp", "carrier", "admin", "admin-public", "unix", "command", "pages"])
def test_an_option_that_is_off_is_not_opened(launch, whole, tmp_path, echo_server, more, options):
    """It costs a router no memory and no time.  The carrier is a process of its own, which has not started."""
    with open(tmp_path / "stdout", "w+") as stdout:
        program = launch(route(echo_server.address), *more, program=whole / "sniroute.py", python=WATCHED_PYTHON,
                         env=BARE, stdout=stdout)
        with program.connect(HELLO) as client:
            assert read_exactly(client, len(HELLO)) == HELLO
        program.stop()
        stdout.seek(0)
        found = opened(stdout.read())
    assert found - OPTIONS == {*CORE}, "each of these files is needed to serve"
    assert found & OPTIONS == options


def test_exactly_the_files_that_serve_route_a_byte(launch, tmp_path, echo_server):
    folder = tmp_path / "core"
    folder.mkdir()
    program = launch(route(echo_server.address), program=copied(folder, {*CORE}) / "sniroute.py", python=BARE_PYTHON,
                     env=BARE)
    with program.connect(HELLO + b"!") as client:
        assert read_exactly(client, len(HELLO) + 1) == HELLO + b"!"


def missing(name: str, place: pathlib.Path) -> str:
    """The sentence of the face about a file that is not there."""
    return f"sniroute: {name} is not beside sniroute.py: copy it there ({os.path.realpath(place)})"


@pytest.mark.parametrize("command", ["check", "explain a.example.com", "selftest", "bundle"])
def test_a_command_without_the_doctor_says_so(folder, command):
    (folder / DOCTOR).unlink()
    assert one_line(run(folder, *command.split()), 2) == missing(DOCTOR, folder)


@pytest.mark.parametrize("name, option, command", [
    *((name, "--admin", "serve") for name in sorted(ADMIN)),
    ("sniroute_admin.py", "--admin", "check"), ("sniroute_admin.py", "--admin-public", "serve"),
    ("sniroute_admin.py", "--admin-public", "check"),
])
def test_an_admin_address_without_one_of_its_files_says_so(folder, name, option, command):
    (folder / name).unlink()
    said = one_line(run(folder, command, f"{option}=127.0.0.1:0", f"--listen={HOST}:0"), 2)
    assert said == f"sniroute: {option}: {name} is not beside sniroute.py: copy it there"


@pytest.mark.parametrize("name", sorted(CARRIER))
def test_a_carrier_without_one_of_its_files_says_so(launch, folder, name):
    """Nothing is started that could not run, and cloudflared has no stand-in."""
    (folder / name).unlink()
    sentence = f"{name} is not beside sniroute.py: copy it there"
    assert one_line(run(folder, "carrier", "access", "tcp", "--hostname", "a.example.com"), 2) == missing(name, folder)
    routes = "--route=*.example.com=carrier:{name}", "--route=*.example.org=cloudflared:{name}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        checked, explained = pool.map(lambda words: run(folder, *words, *routes),
                                      (["check"], ["explain", "db.example.com"]))
    assert (checked.returncode, checked.stderr.split("\n")[:2]) == (0, [
        "sniroute: cloudflared is not there: install it, or name it with --cloudflared; "
        "names that need it are refused until then",
        f"sniroute: {sentence}; names that need it are refused until then"])
    assert (explained.returncode, explained.stderr) == (1, "")
    assert f"\nrefused: {sentence} (tunnel_failed, TLS alert 80)\n" in explained.stdout
    program = launch(*routes, program=folder / "sniroute.py", python=BARE_PYTHON, env=BARE)
    program.wait_for(f" warning {sentence}; names that need it are refused until then\n")
    with program.connect(HELLO) as client:
        assert read_all(client) == alert(80)
    program.wait_for(f"{sentence}", 2)
    assert "cloudflared is not on PATH: the carrier" not in program.log()


@pytest.mark.parametrize("command", [*sniroute.COMMANDS, *sniroute.PROGRAMS])
def test_what_a_command_names_is_there(command):
    room, function = {**sniroute.COMMANDS, **sniroute.PROGRAMS}[command]
    assert function in {node.name for node in TREES[room].body if isinstance(node, ast.FunctionDef)}
