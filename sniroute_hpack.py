"""sniroute_hpack: header compression of HTTP/2 (RFC 7541), without I/O.
"""

__version__ = "0.1.0"
