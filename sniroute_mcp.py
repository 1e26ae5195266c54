"""sniroute_mcp: the master's answers to MCP, without I/O."""

from __future__ import annotations

__version__ = "0.1.0"
