"""sniroute_single: a client that forwards by itself, without a server."""

from __future__ import annotations

__version__ = "0.1.0"
