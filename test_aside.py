"""Tests of testbed/aside.py: what comes of a run is the same, whichever process a test ran in."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from conftest import HERE

CONFTEST = """
import sys
sys.path.insert(0, {here!r})
lasting = set()
import testbed.aside as aside
aside.MANY, aside.ASIDE = 3, (frozenset(("test_b.py",)), frozenset(("test_c.py",)))
from testbed.aside import pytest_runtestloop
"""
FIRST = "import pytest\ndef test_one(): pass\ndef test_two(): assert 0, 'here'\n@pytest.mark.skip\ndef test_three(): pass\n"


@pytest.fixture
def run(tmp_path):
    """run(text of the file that is aside, *words) -> (exit code, what it prints)."""
    def run(text: str, *words: str, first: str = FIRST) -> tuple[int, str]:
        (tmp_path / "conftest.py").write_text(CONFTEST.format(here=str(HERE)))
        (tmp_path / "test_a.py").write_text(first)
        (tmp_path / "test_b.py").write_text(text)
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "COV_"))}
        ended = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words], cwd=tmp_path,
                               env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return ended.returncode, ended.stdout
    return run


PID = "import os\ndef test_where():\n    print('said in', os.getpid(), os.getppid())\n    assert {}\n"


def test_what_is_aside_runs_in_a_child_and_counts(run):
    code, text = run(PID.format("0, 'there'") + "def test_b(): pass\ndef test_c(): pass\n"
                     "import pytest\ndef test_d(): pytest.skip('a reason')\n", "-rs")
    assert code == 1 and "2 failed, 3 passed, 2 skipped" in text and "a reason" in text
    assert "here" in text and "there" in text and re.search(r"said in \d+ \d+", text)


def test_where_all_is_well_the_run_is(run):
    code, text = run("def test_b(): pass\ndef test_c(): pass\n", first="def test_a(): pass\ndef test_d(): pass\n")
    assert code == 0 and "4 passed" in text


def test_a_child_that_breaks_off_fails_the_run(run):
    code, text = run("import os\ndef test_b(): pass\ndef test_c(): os._exit(0)\ndef test_d(): pass\n")
    assert code != 0 and "broke off" in text and "here" in text


@pytest.mark.parametrize("words", [["test_b.py"], ["-x"], ["--pdb"], ["-k", "where"]])
def test_who_wants_to_see_single_tests_has_one_process(run, words):
    _, text = run("import os\ndef test_where(): os._exit(7)\ndef test_z(): pass\n",
                  *words, first="def test_a(): pass\ndef test_c(): pass\n")
    assert "passed" not in text, "the process has ended with the test"
