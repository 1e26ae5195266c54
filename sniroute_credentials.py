"""sniroute_credentials: who we are for an API server: tokens, certificates, plugins.
"""

__version__ = "0.1.0"
