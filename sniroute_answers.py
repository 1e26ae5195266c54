"""sniroute_answers: answers of our own: pages that say why, redirects.
"""

__version__ = "0.1.0"
