"""Causal grouped-query attention with rotary positions, with queries for active tokens only.

- What the layers of a run share (rotary factors, visibility, active tokens) is computed once, in a `Plan`.
- Keys and values are computed for every token; queries, attention and the output projection for active tokens only.
- Biases on queries, keys and values are those of Qwen2, norms on queries and keys those of Qwen3 or OLMo 2.
"""

from __future__ import annotations

from torch import Tensor, nn

from ease.model_config import ModelConfig
from ease.modules.norm import new_norm
from ease.modules.plan import Plan
from ease.modules.rope import rotate


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * head_dim) -> (B, H, T, head_dim)."""
    return x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim).transpose(1, 2)


class Attention(nn.Module):
    """Attention of one layer: h (B, T, dim) -> (B, T, dim), or (N, dim) for the N active tokens of the plan.

    Args:
        config: the shape of the model.
        layer: the number of the layer, from 1.
    """

    def __init__(self, config: ModelConfig, layer: int = 1) -> None:
        super().__init__()
        c = config
        self.kind = c.attention_kind(layer)
        self.head_dim = d = c.head_size
        self.q_proj = nn.Linear(c.dim, c.num_heads * d, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.dim, c.kv_heads * d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, c.kv_heads * d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_heads * d, c.dim, bias=c.output_bias)
        heads = (c.num_heads, c.kv_heads) if c.wide_qk_norm else (1, 1)
        self.q_norm, self.k_norm = (new_norm(c, n * d) if c.qk_norm else nn.Identity() for n in heads)
        self.q_groups, self.k_groups = c.num_heads // heads[0], c.kv_heads // heads[1]  # vectors that a norm sees

    def forward(self, h: Tensor, plan: Plan) -> Tensor:
        d, view = self.head_dim, plan.view(self.kind)
        q = self.q_norm(self.q_proj(plan.gather(h)).unflatten(-1, (self.q_groups, -1))).flatten(-2)
        k = self.k_norm(self.k_proj(h).unflatten(-1, (self.k_groups, -1))).flatten(-2)
        q = rotate(split_heads(plan.pad(q), d), view.query_rope)
        mixed = plan.attend(self.kind, q, rotate(split_heads(k, d), view.rope), split_heads(self.v_proj(h), d))
        out: Tensor = self.o_proj(plan.unpad(mixed.transpose(1, 2).flatten(2)))
        return out
