"""sniroute_guards: what callers may: protocols, rates, how many, without I/O."""

from __future__ import annotations

__version__ = "0.1.0"
