"""sniroute_nodepass: services behind NAT: a tunnel program that speaks NodePass."""

from __future__ import annotations

__version__ = "0.1.0"
def main(argv=None):
    """Not yet."""
    return 2
