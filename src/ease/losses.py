"""The weighted loss over exits, which never holds the logits of all exits at once.

Each exit's logits live only while that exit's share of the gradient is worked out, and the shared head's
gradients are summed in one buffer as they come: memory is that of one exit, whatever their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.seam import IGNORE

# Logits that exist at a time in PyTorch's fused loss: 8 MiB in float32. Its automatic choice is up to twice slower
# at small widths; on a CPU more logits spill from the cache, and fewer than 128 tokens make slow products.
CHUNK = 2**21


def token_loss_sum(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy (nats) of states (N, D) under head (V, D) against targets (N,)."""
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(128, CHUNK // head.shape[0]))
        return F.linear_cross_entropy(states, head, targets, reduction="sum", options=options)
    return F.cross_entropy(F.linear(states, head), targets, reduction="sum")


class _ExitLosses(torch.autograd.Function):
    """Sum over exits of weight * loss, with the gradients worked out exit by exit in the forward pass."""

    @staticmethod
    def forward(ctx: Any, head: Tensor, targets: Tensor, weights: Sequence[float], *exits: Tensor) -> Tensor:
        head_grad = torch.zeros_like(head) if ctx.needs_input_grad[0] else None
        total, grads = head.new_zeros(()), []
        for states, weight in zip(exits, weights, strict=True):
            with torch.enable_grad():
                h = states.detach().requires_grad_()
                w = head.detach().requires_grad_(head_grad is not None)
                loss = weight * token_loss_sum(h, w, targets)
                grad, *rest = torch.autograd.grad(loss, (h, w) if head_grad is not None else (h,))
            total += loss.detach()
            grads.append(grad)
            if head_grad is not None:
                head_grad += rest[0]
        ctx.grads = (head_grad, grads)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (scale,) = upstream
        head_grad, grads = ctx.grads
        ctx.grads = None
        return None if head_grad is None else head_grad * scale, None, None, *(g * scale for g in grads)


def exit_loss(head: Tensor, targets: Tensor, exits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum over exits of weight * mean cross entropy (nats) over the scored tokens.

    Args:
        head: (V, D), the shared output head.
        targets: (N,) token ids; -100 is not scored. With nothing scored the loss is 0.
        exits: per exit its normed states (N, D).
        weights: per exit the weight of its loss.
    """
    scored = max(1, int((targets != IGNORE).sum()))
    shares = [weight / scored for weight in weights]
    if torch.is_grad_enabled():
        loss: Tensor = _ExitLosses.apply(head, targets, shares, *exits)  # type: ignore[no-untyped-call]
        return loss
    losses = [w * token_loss_sum(h, head, targets) for h, w in zip(exits, shares, strict=True)]
    return torch.stack(losses).sum()
