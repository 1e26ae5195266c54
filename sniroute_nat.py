"""sniroute_nat: its kind of target, as the router sees it; the row of its program."""

from __future__ import annotations

__version__ = "0.1.0"
