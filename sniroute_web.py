"""sniroute_web: a client that asks in plain HTTP: its requests, one after another.
"""

__version__ = "0.1.0"
