"""The whole router while this host gives it too little: testbed/shortage.py, short.

One router meets all shortages, one after the other, as a user of its own and with all on that a user may have on.
"""

from __future__ import annotations

import os
import shutil

import pytest

import sniroute_daemon
import sniroute_door
import sniroute_forwarder
import sniroute_loop
import sniroute_scarcity
import sniroute_tunnels
from conftest import linux
from testbed.endure_router import Problem
from testbed.shortage import SHORTAGES, Stage, Suffered, python, stand, stood, suffer

LASTS = 1.0  # seconds of each
pytestmark = linux


@pytest.fixture(scope="module")
def suffered() -> dict[str, Suffered | Problem]:
    """What came of each shortage; "afterwards": how the router stood after them all."""
    if os.getuid():
        pytest.skip("needs root: RLIMIT_NPROC counts a user's processes, so the router has to be a user of its own")
    if shutil.which("setpriv") is None:
        pytest.skip("needs the Debian package util-linux")
    try:
        python()
    except Problem as problem:
        pytest.skip(str(problem))
    came: dict[str, Suffered | Problem] = {}
    with Stage() as stage:
        before = stand(stage)
        for name in SHORTAGES:
            try:
                came[name] = suffer(stage, name, LASTS)
            except Problem as problem:
                came[name] = problem
                break
        else:
            problems = stood(stage, before)
            busy = stage.router.metrics()['sniroute_connections_total{result="busy"}']
            problems += [] if busy else ["no metric counts who was refused"]
            problems += stage.router.faults
            code = stage.router.end()
            problems += [f"it ended with {code}"] if code else []
            came["afterwards"] = Problem("\n".join(problems)) if problems else came[name]
    return came


@pytest.mark.parametrize("name", SHORTAGES)
def test_the_router_outlives_a_shortage_and_says_what_it_lacks(suffered, name):
    """It takes less than a tenth of a core meanwhile, and everybody is served again afterwards."""
    came = suffered.get(name)
    assert came is not None, "the router has not come so far"
    assert not isinstance(came, Problem), came
    assert not came.problems, (came.problems, came.counts, came.said)
    print(f"{came.cpu:.1%} of a core, served again after {came.again}")


def test_after_all_shortages_the_router_stands_as_before(suffered):
    came = suffered.get("afterwards")
    assert came is not None, "the router has not come so far"
    assert not isinstance(came, Problem), came


def test_every_pause_in_a_shortage_is_a_second_at_most():
    """Where clients come: each is looked at again that soon; a busy host may take longer for it."""
    for pause in (sniroute_daemon.MEMORY_PAUSE, sniroute_scarcity.RESTS, sniroute_loop.CAPACITY_PAUSE,
                  sniroute_door.ACCEPT_PAUSE, sniroute_forwarder.PAUSE, sniroute_tunnels.RETRY,
                  sniroute_tunnels.SHORT_RETRY):
        assert pause <= 1.0
    assert sniroute_scarcity.BEGINS <= 2.0, "the loop waits so long for a thread that never begins"
