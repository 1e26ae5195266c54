"""sniroute_kubernetes: services of a cluster by name.
"""

__version__ = "0.1.0"
