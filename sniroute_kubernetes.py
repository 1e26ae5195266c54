"""sniroute_kubernetes: a tunnel program for services of Kubernetes clusters.
"""

__version__ = "0.1.0"
