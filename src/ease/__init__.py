"""LEGO: train a transformer in bricks, and let every token leave at the first brick that is sure of it.

This file is the façade: the names that users import, and the only place that joins core and strategies.
"""

from ease.errors import EaseError

__version__ = "0.1.0"
__all__ = ["EaseError", "__version__"]
