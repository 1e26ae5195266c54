"""sniroute_http2: HTTP/2 in plain text, as far as a name can be read from it.
"""

__version__ = "0.1.0"
