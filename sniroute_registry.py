"""sniroute_registry: names that come and go while the router runs: claimed, leased, shared.

Its rooms are not put together yet.
"""

__version__ = "0.1.0"
