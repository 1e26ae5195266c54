"""sniroute_browsers: a page for a browser that is refused over TLS.
"""

__version__ = "0.1.0"
