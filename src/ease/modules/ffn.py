"""Gated feed-forward network: SwiGLU or GeGLU (Shazeer 2020, arXiv:2002.05202), with the parameter names of Llama."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ease.model_config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class FFN(nn.Module):
    """x (..., dim) -> (..., dim) through `ffn_size` gated units.

    Args:
        config: the shape of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.gate_proj = nn.Linear(c.dim, c.ffn_size, bias=c.ffn_bias)
        self.up_proj = nn.Linear(c.dim, c.ffn_size, bias=c.ffn_bias)
        self.down_proj = nn.Linear(c.ffn_size, c.dim, bias=c.ffn_bias)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return out
