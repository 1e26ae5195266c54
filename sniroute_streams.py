"""sniroute_streams: HTTP/2 connections whose streams are connections of a pool."""

from __future__ import annotations

__version__ = "0.1.0"
