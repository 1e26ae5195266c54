"""sniroute_duplex: connections of which each direction ends by itself: TCP, TLS, WebSocket."""

from __future__ import annotations

__version__ = "0.1.0"
