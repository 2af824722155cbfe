"""Text generation with a cache in three modes: full, routed, and exact."""

from ease.generation.decode import Generation, generate
from ease.generation.request import Token
from ease.generation.sampling import Sampling

__all__ = ["Generation", "Sampling", "Token", "generate"]
