"""sniroute_links: one session to one pod, for one client; spare ones.
"""

__version__ = "0.1.0"
