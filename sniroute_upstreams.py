"""sniroute_upstreams: several targets of one end: which is next, and where from."""

from __future__ import annotations

__version__ = "0.1.0"
