"""sniroute_gateway: what a gateway adds to a request, takes away, and refuses.
"""

__version__ = "0.1.0"
