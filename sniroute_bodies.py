"""sniroute_bodies: messages of HTTP on their way: the two flows of a client that asks in plain HTTP.
"""

__version__ = "0.1.0"
