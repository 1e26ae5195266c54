"""sniroute_lanes: the kinds of pool: from nothing to a connection that may be used."""

from __future__ import annotations

__version__ = "0.1.0"
