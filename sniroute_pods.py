"""sniroute_pods: from a target to a pod and its port.
"""

__version__ = "0.1.0"
