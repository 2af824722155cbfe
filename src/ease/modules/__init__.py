"""Parts of a transformer layer, one idea per file."""

from torch.nn import RMSNorm

from ease.modules.adapter import Adapter
from ease.modules.attention import Attention
from ease.modules.block import TransformerBlock
from ease.modules.cache import Cache
from ease.modules.cached_plan import CachedPlan
from ease.modules.decoding import decoding_layer
from ease.modules.draft_brick import DraftBrick
from ease.modules.ffn import FFN
from ease.modules.memory import Memory, with_stored_tokens, with_tokens_before
from ease.modules.norm import new_norm
from ease.modules.plan import Plan
from ease.modules.prefix import Prefix, PrefixPlan

__all__ = [
    "FFN",
    "Adapter",
    "Attention",
    "Cache",
    "CachedPlan",
    "DraftBrick",
    "Memory",
    "Plan",
    "Prefix",
    "PrefixPlan",
    "RMSNorm",
    "TransformerBlock",
    "decoding_layer",
    "new_norm",
    "with_stored_tokens",
    "with_tokens_before",
]
