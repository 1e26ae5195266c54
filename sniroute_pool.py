"""sniroute_pool: connections that wait to be used: which, how many, found by id."""

from __future__ import annotations

__version__ = "0.1.0"
