"""sniroute_api: requests to an API server, in a loop: lists, watches, upgrades.
"""

__version__ = "0.1.0"
