"""Causal grouped-query attention with rotary positions, in which only active tokens ask.

- What a run's layers share (rotary factors, who sees whom, which tokens ask) is worked out once, in a `Plan`.
- Every token gives keys and values; queries, mixing and the output projection are done for asking tokens only.
- Rotary embedding (Su et al. 2021, arXiv:2104.09864) in the half-split convention of Llama checkpoints, with
  Llama 3.1's scaling by choice. Biases on queries, keys and values are Qwen2's, norms on queries and keys Qwen3's.
"""

from __future__ import annotations

from torch import Tensor, nn

from ease.modules.plan import Plan
from ease.modules.rope import rotate


def heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * head_dim) -> (B, H, T, head_dim)."""
    return x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim).transpose(1, 2)


class Attention(nn.Module):
    """h (B, T, dim) -> (B, T, dim), or (N, dim) for the N asking tokens of the plan."""

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
        q = rotate(self.q_norm(heads(plan.pad(self.q_proj(plan.gather(h))), d)), plan.query_rope)
        k = rotate(self.k_norm(heads(self.k_proj(h), d)), plan.rope)
        mixed = plan.attend(q, k, heads(self.v_proj(h), d))
        out: Tensor = self.o_proj(plan.unpad(mixed.transpose(1, 2).flatten(2)))
        return out
