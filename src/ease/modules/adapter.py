"""Adapter: a small residual network between an exit's norm and the shared head, for exits of a frozen model."""

import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """h (..., dim) -> (..., dim) through `hidden_dim` units; the identity until trained."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)
        nn.init.normal_(self.up_proj.weight, std=dim**-0.5)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.down_proj(F.silu(self.up_proj(h)))
        return out
