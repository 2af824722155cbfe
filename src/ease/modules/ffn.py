"""Feed-forward network: SwiGLU (Shazeer 2020, arXiv:2002.05202), with the shapes and parameter names of Llama."""

import torch.nn.functional as F
from torch import Tensor, nn


class FFN(nn.Module):
    """x (..., dim) -> (..., dim) through `hidden_dim` gated units, without biases."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
