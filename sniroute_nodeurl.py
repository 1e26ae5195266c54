"""sniroute_nodeurl: the URLs and flags of NodePass, without I/O."""

from __future__ import annotations

__version__ = "0.1.0"
