"""sniroute_callers: one caller's connection, from accept to close, on either side."""

from __future__ import annotations

__version__ = "0.1.0"
