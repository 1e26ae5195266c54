"""sniroute_ends: the two ends of a tunnel, server and client: from start to start again."""

from __future__ import annotations

__version__ = "0.1.0"
