"""Tests of sniroute_refusals.py: its table has every kind of refusal that the source has, and no other."""

from __future__ import annotations

import ast
import itertools
import logging
import re

import sniroute_launchers
from sniroute_refusals import REFUSALS
from conftest import CORE, HERE


def raised_kinds() -> set[str]:
    """Every kind of refusal in the source."""
    kinds = set()
    rooms = [ast.parse((HERE / name).read_text()) for name in CORE]
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
                assert ast.unparse(kind) in ("kind", "'tunnel_' + kind"), "a kind that this test does not know"
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "kind" \
                and isinstance(node.value, ast.IfExp) and isinstance(node.value.body, ast.Constant):
            kinds |= {node.value.body.value, node.value.orelse.value}
    for node in itertools.chain.from_iterable(map(ast.walk, rooms)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "TunnelError" \
                and isinstance(node.args[0], ast.Constant):
            kinds.add("tunnel_" + node.args[0].value)
    kinds |= {"tunnel_" + kind for kind, _ in sniroute_launchers.CARRIER_REASONS.values()}
    kinds |= {"tunnel_" + kind for _, kind, _ in sniroute_launchers.CLOUDFLARED_REASONS}
    return kinds


def test_every_kind_of_refusal_is_a_row_and_every_row_is_used():
    kinds = raised_kinds()
    assert kinds == REFUSALS.keys()
    for kind, row in REFUSALS.items():
        assert re.fullmatch("[a-z_]+", kind) and row.meaning
        assert logging.getLevelName(row.level) in ("DEBUG", "INFO", "WARNING", "ERROR")
