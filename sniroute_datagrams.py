"""sniroute_datagrams: UDP: a flow for each caller's address."""

from __future__ import annotations

__version__ = "0.1.0"
