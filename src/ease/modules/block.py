"""One layer: pre-norm attention and feed-forward, each on its own residual branch."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ease.modules.attention import Attention
from ease.modules.cpu import light
from ease.modules.ffn import FFN
from ease.modules.plan import Plan


def _same(x: Tensor) -> Tensor:
    return x


class TransformerBlock(nn.Module):
    """x (B, T, dim) -> (B, T, dim); tokens that do not ask in the plan keep their state bit for bit."""

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
        # The plain function and not a Dropout module: a frozen layer is told apart by its parameters,
        # which a Dropout module does not have.
        drop = partial(F.dropout, p=self.dropout) if self.training and self.dropout else _same
        a = plan.gather(x)
        a = a + drop(self.attention(self.attention_norm(x), plan))
        a = a + drop(self.ffn(self.ffn_norm(a)))
        return plan.scatter(x, a)

    def make_identity(self) -> None:
        """Both branches give zero, so the layer hands its input through until it has learned."""
        nn.init.zeros_(self.attention.o_proj.weight)
        nn.init.zeros_(self.ffn.down_proj.weight)


def light_layer(layer: nn.Module) -> Callable[[Tensor, Plan], Tensor]:
    """What a layer computes in evaluation mode with the weights that it has now, at less cost a call."""
    return light(layer, (TransformerBlock, Attention, FFN))
