"""sniroute_instances: a master's servers and clients: child processes, and what is kept of them."""

from __future__ import annotations

__version__ = "0.1.0"
