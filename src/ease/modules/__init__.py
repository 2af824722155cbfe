"""The parts of a transformer layer, one idea a file."""

from torch.nn import RMSNorm

from ease.modules.adapter import Adapter
from ease.modules.attention import Attention
from ease.modules.block import TransformerBlock, light_layer
from ease.modules.cache import Cache, CachedPlan
from ease.modules.ffn import FFN
from ease.modules.packed import packed
from ease.modules.plan import Plan
from ease.modules.rope import rotary

__all__ = [
    "FFN",
    "Adapter",
    "Attention",
    "Cache",
    "CachedPlan",
    "Plan",
    "RMSNorm",
    "TransformerBlock",
    "light_layer",
    "packed",
    "rotary",
]
