"""sniroute_master: `master://`: its REST API, and what else it answers over HTTP."""

from __future__ import annotations

__version__ = "0.1.0"
