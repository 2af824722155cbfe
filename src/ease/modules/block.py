"""Transformer block: pre-norm attention and feed-forward, each on its own residual branch."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ease.modules.attention import Attention
from ease.modules.ffn import FFN
from ease.modules.plan import Plan


def _unchanged(x: Tensor) -> Tensor:
    return x


class TransformerBlock(nn.Module):
    """One layer: x (B, T, dim) -> (B, T, dim); tokens that are not active in the plan keep their state bit for bit.

    Args:
        dim, num_heads, num_kv_heads, head_dim, qkv_bias: as in `Attention`.
        hidden_dim: units of the feed-forward.
        norm_eps: epsilon of the norms.
        dropout: share of a branch's outputs zeroed in training.
        qk_norm: norms on queries and keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_dim: int,
        norm_eps: float,
        dropout: float,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, norm_eps)
        self.attention = Attention(
            dim, num_heads, num_kv_heads, head_dim, qkv_bias=qkv_bias, qk_norm_eps=norm_eps if qk_norm else None
        )
        self.ffn_norm = nn.RMSNorm(dim, norm_eps)
        self.ffn = FFN(dim, hidden_dim)
        self.dropout = dropout

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        # The function and not a Dropout module: whether a layer is frozen is read off its parameters, and a Dropout
        # module has none.
        drop = partial(F.dropout, p=self.dropout) if self.training and self.dropout else _unchanged
        a = plan.gather(x)
        a = a + drop(self.attention(self.attention_norm(x), plan))
        a = a + drop(self.ffn(self.ffn_norm(a)))
        return plan.scatter(x, a)

    def make_identity(self) -> None:
        """Sets the output projections of both branches to zero, so that the layer returns its input until trained."""
        nn.init.zeros_(self.attention.o_proj.weight)
        nn.init.zeros_(self.ffn.down_proj.weight)
