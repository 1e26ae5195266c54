"""sniroute_peering: one link between two ends: its control channel."""

from __future__ import annotations

__version__ = "0.1.0"
