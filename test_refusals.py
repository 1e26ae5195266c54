"""Tests of sniroute_refusals.py: its table has every kind of refusal that the source has, and no other; and how a
client is told.
"""

from __future__ import annotations

import ast
import itertools
import logging
import re

import pytest

import sniroute_clusters
import sniroute_launchers
import sniroute_nat
from sniroute_refusals import (HTTP, INTERNAL_ERROR, NOTHING, POSTGRES, REFUSALS, TELLERS, TLS, Malformed, Refused,
                               postgres_error, tls_alert, told, tunnel_refused)
from conftest import CORE, HERE


def raised_kinds() -> set[str]:
    """Every kind of refusal in the source."""
    kinds = set()
    rooms = [ast.parse((HERE / name).read_text()) for name in (
        *CORE, "sniroute_commands.py", "sniroute_backends.py", "sniroute_book.py", "sniroute_http.py",
        "sniroute_requests.py", "sniroute_web.py", "sniroute_tls.py", "sniroute_gateway.py")]
    for node in itertools.chain.from_iterable(map(ast.walk, rooms)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            words = {keyword.arg: keyword.value for keyword in node.keywords}
            if node.func.id == "Refused":
                kind = words.get("kind", node.args[0])
            elif node.func.id == "Malformed":
                kind = words.get("kind", node.args[2] if len(node.args) > 2 else ast.Constant("malformed"))
            else:
                continue
            if isinstance(kind, ast.Constant):
                kinds.add(kind.value)
            else:
                assert ast.unparse(kind) in ("kind", "self.kind", "'tunnel_' + kind"), "unknown to this test"
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "kind" \
                and isinstance(node.value, ast.IfExp) and isinstance(node.value.body, ast.Constant):
            kinds |= {node.value.body.value, node.value.orelse.value}
    for node in itertools.chain.from_iterable(map(ast.walk, rooms)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "TunnelError" \
                and isinstance(node.args[0], ast.Constant):
            kinds.add("tunnel_" + node.args[0].value)
    kinds |= {"tunnel_" + kind for kind, _ in sniroute_launchers.CARRIER_REASONS.values()}
    kinds |= {"tunnel_" + kind for _, kind, _ in sniroute_launchers.CLOUDFLARED_REASONS}
    kinds |= {"tunnel_" + kind for kind, _ in sniroute_clusters.REASONS.values()}
    kinds |= {"tunnel_" + kind for kind, _ in sniroute_nat.REASONS.values()}
    return kinds


def test_every_kind_of_refusal_is_a_row_and_every_row_is_used():
    kinds = raised_kinds()
    assert kinds == REFUSALS.keys()
    for kind, row in REFUSALS.items():
        assert re.fullmatch("[a-z_]+", kind) and row.meaning
        assert logging.getLevelName(row.level) in ("DEBUG", "INFO", "WARNING", "ERROR")


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_row_says_it_in_every_language(kind):
    row = REFUSALS[kind]
    assert row.alert is None or 0 < row.alert < 256, "RFC 8446 section 6: one byte; 0 is close_notify"
    assert 400 <= row.status <= 599
    for sentence in (row.meaning, row.advice):
        assert re.fullmatch(r"[!-~]+( [!-~]+)+", sentence), "some words in one line, without a stray space"
    refused = Refused(kind, "for the log")
    assert set(TELLERS) - {HTTP} == {NOTHING, TLS, POSTGRES}, "that of HTTP is there where sniroute_web is"
    assert told(refused, NOTHING) == b""
    assert told(refused, TLS, 1) == (b"" if row.alert is None else bytes((21, 3, 1, 0, 2, 2, row.alert)))
    said = told(refused, POSTGRES)
    assert said[:1] == b"E" and int.from_bytes(said[1:5], "big") == len(said) - 1
    assert f"\0M{row.meaning}\0H{row.advice}\0\0".encode() in said and b"for the log" not in said


def test_a_farewell_goes_first():
    """Whatever the client speaks."""
    refused = Refused("no_name", "", farewell=b"OK\n")
    assert {told(refused, speaks, 1) for speaks in TELLERS} == {b"OK\n"}


def test_an_alert_of_its_own_replaces_the_rows():
    assert REFUSALS["malformed"].alert != INTERNAL_ERROR
    assert told(Malformed("", INTERNAL_ERROR), TLS) == tls_alert(INTERNAL_ERROR, 3)
    assert Malformed("").alert == REFUSALS["malformed"].alert and isinstance(Malformed(""), Refused)


def test_a_status_of_its_own_replaces_the_rows():
    assert Malformed("", kind="bad_request").status == REFUSALS["bad_request"].status == 400
    assert Malformed("", kind="bad_request", status=431).status == 431
    assert Refused("no_route", "").status == 404 and Refused("no_route", "", status=421).status == 421


@pytest.mark.parametrize("minor, said", [(0, 0), (1, 1), (3, 3), (4, 3), (255, 3)])
def test_an_alert_never_claims_a_version_that_there_is_not(minor, said):
    assert told(Refused("no_route", ""), TLS, minor) == bytes((21, 3, said, 0, 2, 2, 112))


def test_what_a_client_cannot_show_is_no_fault():
    assert b"Mcaf?\0" in postgres_error("caf\u00e9", "")


def test_the_reason_of_a_tunnel_is_a_row():
    refused = tunnel_refused("denied", "Access wants a login")
    assert (refused.kind, str(refused), refused.alert) == ("tunnel_denied", "Access wants a login", 49)
    with pytest.raises(KeyError):
        tunnel_refused("nothing of ours", "")
