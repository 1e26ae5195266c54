"""sniroute_signals: what two ends say to each other, without I/O."""

from __future__ import annotations

__version__ = "0.1.0"
