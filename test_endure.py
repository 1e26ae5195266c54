"""The long forms of the tests, short: `python3 -m testbed.endure` as one runs it, with a seed.

Each part says in one line how the router stood before and after it; what is wrong is a line `fault: ...`.
"""

from __future__ import annotations

import concurrent.futures
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest

from conftest import HERE, linux
from testbed import endure_inputs, endure_streams
from testbed.endure import PARTS, fits

SCALES = {  # so that each part takes a few seconds
    "nemesis": "0.006",  # 12 faults
    "inputs": "0.01",  # 10,000 inputs, and 50 for the router
    "data": "0.0015",  # 30 MB
    "carrier": "0.003",  # 6 MB
    "kills": "0.01",  # 1
    "handovers": "0.1",  # 1
    "nodepass": "0.015",  # 4.5 seconds: some 6 faults
    "connections": "0.003",  # 1,500
    "house": "0.0012",  # 4.3 seconds: some 10 faults
}
FAULTS = {  # what a part would find: file, right text, wrong text, part, what the part says then
    "a hello that is not compared": (
        "sniroute_wire.py", "if len(data) >= end and framing_of(data, KEY) == framing:", "if len(data) >= end:",
        "inputs", "with a memory|the memory says"),
    "a byte that is changed": (
        "sniroute_flow.py", "self.total += count\n        try:\n            sent = os.write(self.twin.fd, data)",
        "self.total += count\n        try:\n            sent = os.write(self.twin.fd, data.replace(b'\\0\\1', b'\\0\\2'))",
        "data", "wrong: the backend has|a client of"),
}
pytestmark = linux


def endure(*words: str, folder: pathlib.Path = HERE) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run([sys.executable, "-m", "testbed.endure", *words], cwd=folder, capture_output=True, text=True,
                          timeout=400)


def broken(folder: pathlib.Path, file: str, right: str, wrong: str) -> pathlib.Path:
    """A folder with the program and the testbed, and a fault in one place of the program."""
    for path in HERE.glob("sniroute*.py"):
        shutil.copy(path, folder)
    shutil.copytree(HERE / "testbed", folder / "testbed", ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / file).read_text()
    assert text.count(right) == 1
    (folder / file).write_text(text.replace(right, wrong))
    return folder


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """How each part ended, and each run with a fault in the program.  All run at once, since each waits most of its
    time: that is a quarter of the time that they take one after the other.
    """
    parts = [part for part in PARTS if part != "carrier" or shutil.which("openssl") is not None]
    with concurrent.futures.ThreadPoolExecutor(len(parts) + len(FAULTS)) as pool:
        runs = {part: pool.submit(endure, "--only", part, "--scale", SCALES[part], "--seed", "16") for part in parts}
        for name, (*fault, part, _) in FAULTS.items():
            runs[name] = pool.submit(endure, "--only", part, "--scale", SCALES[part],
                                     folder=broken(tmp_path_factory.mktemp("broken"), *fault))
    return {name: run.result() for name, run in runs.items()}


@pytest.mark.parametrize("part", PARTS)
def test_the_router_stands_after_each_part_as_before(ended, part):
    if part not in ended:
        pytest.skip("openssl is not here (Debian package openssl)")
    ended = ended[part]
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout + ended.stderr
    line, = ended.stdout.splitlines()
    assert line.startswith(part) and line.endswith("ok")
    for what in ("descriptors", "threads", "children"):
        if part == "kills":
            break  # of no router there is a before and an after
        before, after = map(int, re.search(rf"{what} (\d+) -> (\d+)", line).groups())
        assert after <= before if part == "nodepass" else after == before


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_program_is_found(ended, fault):
    """A tool that finds nothing has to show that it can."""
    ended, found = ended[fault], FAULTS[fault][-1]
    assert ended.returncode == 1 and re.search(rf"^    fault: .*({found})", ended.stdout, re.MULTILINE), ended.stdout


def test_a_part_that_is_not_there_is_named():
    ended = endure("--only", "nemesis,sleep")
    assert ended.returncode == 2 and "there is no part sleep" in ended.stderr


def test_mutated_inputs_are_the_same_for_the_same_seed():
    assert endure_inputs.run(500, 3) == endure_inputs.run(500, 3) != endure_inputs.run(500, 4)
    assert sum(row.share for row in endure_inputs.checks()) == 100


def test_pieces_are_the_whole():
    rng = random.Random(5)
    for size in (0, 1, 2, 500, 1000):
        data = rng.randbytes(size)
        assert all(b"".join(endure_inputs.pieces(data, rng)) == data for _ in range(50))


def test_an_opening_has_all_its_fields_on_the_wire():
    opening = endure_streams.Opening(3, 7, 500, 1 << 31, 1 << 30, 1 << 20, 1 << 40, 1 << 19, 1 << 41, 1 << 42)
    packed = opening.packed().removeprefix(endure_streams.MAGIC)
    assert endure_streams.Opening(*endure_streams.OPENING.unpack(packed)) == opening


def test_what_a_client_may_hear():
    assert fits(b"hello", b"") and fits(b"hello", b"hello") and fits(b"\x16hello", b"\x15\3\1\0\2\2\x50")
    assert fits(b"PROXY x\r\n" + b"ask" + b"hello", b"PROXY x\r\n" + b"hello")
    assert not fits(b"hello", b"hellO") and not fits(b"hello", b"hel")
