"""Causal grouped-query attention with rotary positions, with queries for active tokens only.

- What the layers of a run share (rotary factors, visibility, active tokens) is computed once, in a `Plan`.
- Keys and values are computed for every token; queries, attention and the output projection for active tokens only.
- Biases on queries, keys and values are those of Qwen2, norms on queries and keys those of Qwen3.
"""

from __future__ import annotations

from torch import Tensor, nn

from ease.modules.plan import Plan
from ease.modules.rope import rotate


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * head_dim) -> (B, H, T, head_dim)."""
    return x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim).transpose(1, 2)


class Attention(nn.Module):
    """Attention of one layer: h (B, T, dim) -> (B, T, dim), or (N, dim) for the N active tokens of the plan.

    Args:
        dim: width of the state.
        num_heads, num_kv_heads: heads of queries, and of keys and values.
        head_dim: width of a head.
        qkv_bias: biases on queries, keys and values.
        qk_norm_eps: the epsilon of norms on queries and keys; None for no norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False)
        self.q_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(head_dim, qk_norm_eps)

    def forward(self, h: Tensor, plan: Plan) -> Tensor:
        d = self.head_dim
        q = rotate(self.q_norm(split_heads(plan.pad(self.q_proj(plan.gather(h))), d)), plan.query_rope)
        k = rotate(self.k_norm(split_heads(self.k_proj(h), d)), plan.rope)
        mixed = plan.attend(q, k, split_heads(self.v_proj(h), d))
        out: Tensor = self.o_proj(plan.unpad(mixed.transpose(1, 2).flatten(2)))
        return out
