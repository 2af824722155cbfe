"""The parts of a transformer layer, one idea a file."""

from ease.modules.adapter import Adapter
from ease.modules.attention import Attention, Plan, RopeScaling, rotary
from ease.modules.block import TransformerBlock, light_layer
from ease.modules.cache import Cache, CachedPlan
from ease.modules.ffn import FFN
from ease.modules.packed import packed

__all__ = [
    "FFN",
    "Adapter",
    "Attention",
    "Cache",
    "CachedPlan",
    "Plan",
    "RopeScaling",
    "TransformerBlock",
    "light_layer",
    "packed",
    "rotary",
]
