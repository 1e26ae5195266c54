"""sniroute_h2: HTTP/2 with flow control, without I/O."""

from __future__ import annotations

__version__ = "0.1.0"
