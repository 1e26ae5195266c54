"""Tests of sniroute_host.py: what this host allows."""

from __future__ import annotations

import resource

import sniroute_host


def test_the_limit_of_open_files_is_raised_where_it_may_be(monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10, 20))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    sniroute_host.raise_descriptor_limit()
    assert asked == [(20, 20)]

    def forbid(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "setrlimit", forbid)
    sniroute_host.raise_descriptor_limit()
