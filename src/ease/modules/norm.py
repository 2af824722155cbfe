"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), torch's own or with Gemma's weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ease.model_config import ModelConfig


class OffsetRMSNorm(nn.RMSNorm):
    """RMSNorm whose factor is 1 + weight, computed in at least float32, as in Gemma."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        factor = 1 + self.weight.to(precise)
        return F.rms_norm(x.to(precise), self.normalized_shape, factor, self.eps).to(x.dtype)


def new_norm(config: ModelConfig, width: int) -> nn.RMSNorm:
    """The model's kind of norm over vectors of `width` dimensions."""
    return (OffsetRMSNorm if config.norm_offset else nn.RMSNorm)(width, config.norm_eps)


def factor_of(norm: nn.RMSNorm) -> Tensor:
    """The factor per dimension that a norm multiplies with."""
    return 1 + norm.weight if isinstance(norm, OffsetRMSNorm) else norm.weight


def set_factor(norm: nn.RMSNorm, factor: Tensor) -> None:
    """Gives a norm the weight with which it multiplies by `factor`."""
    norm.weight.copy_(factor - 1 if isinstance(norm, OffsetRMSNorm) else factor)
