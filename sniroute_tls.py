"""sniroute_tls: TLS to a backend, in the loop.
"""

__version__ = "0.1.0"
