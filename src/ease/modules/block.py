"""Transformer block: attention and feed-forward, each on its own residual branch, with norms before, after or both."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ease.model_config import ModelConfig
from ease.modules.attention import Attention
from ease.modules.ffn import FFN
from ease.modules.norm import OffsetRMSNorm, new_norm
from ease.modules.plan import Plan


def _unchanged(x: Tensor) -> Tensor:
    return x


class TransformerBlock(nn.Module):
    """One layer: x (B, T, dim) -> (B, T, dim); tokens that are not active in the plan keep their state bit for bit.

    Args:
        config: the shape of the model.
        layer: the number of the layer, from 1.
    """

    def __init__(self, config: ModelConfig, layer: int = 1) -> None:
        super().__init__()
        c = config
        self.attention_norm = new_norm(c, c.dim) if c.pre_norms else nn.Identity()
        self.attention = Attention(c, layer)
        self.attention_post_norm = new_norm(c, c.dim) if c.post_norms else nn.Identity()
        self.ffn_norm = new_norm(c, c.dim) if c.pre_norms else nn.Identity()
        self.ffn = FFN(c)
        self.ffn_post_norm = new_norm(c, c.dim) if c.post_norms else nn.Identity()
        self.dropout, self.residual_scale = c.dropout, c.residual_scale

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        # The function and not a Dropout module: whether a layer is frozen is read off its parameters, and a Dropout
        # module has none.
        drop = partial(F.dropout, p=self.dropout) if self.training and self.dropout else _unchanged
        a, scale = plan.gather(x), self.residual_scale
        branch = self.attention_post_norm(self.attention(self.attention_norm(x), plan))
        a = torch.add(a, drop(branch), alpha=scale)
        branch = self.ffn_post_norm(self.ffn(self.ffn_norm(a)))
        a = torch.add(a, drop(branch), alpha=scale)
        return plan.scatter(x, a)

    def make_identity(self) -> None:
        """Makes both branches return zero, so that the layer returns its input until trained."""
        for end, norm in ((self.attention.o_proj, self.attention_post_norm), (self.ffn.down_proj, self.ffn_post_norm)):
            if isinstance(norm, nn.RMSNorm):  # and not the projection: a norm's gradient at zero is huge
                nn.init.constant_(norm.weight, -1.0 if isinstance(norm, OffsetRMSNorm) else 0.0)
                continue
            nn.init.zeros_(end.weight)
            if end.bias is not None:
                nn.init.zeros_(end.bias)
