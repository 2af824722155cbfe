"""AdamW whose parameters are float32, whatever the dtype of the model.

An update of a parameter in half precision is lost when it is smaller than the spacing of numbers there: an exit's norm
in bfloat16 starts at 1, where the spacing is 2^-7, and AdamW moves it by about the learning rate. The optimizer
therefore updates float32 copies (master weights, Micikevicius et al. 2018, arXiv:1710.03740, section 3.1) and rounds
them into the model after every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

MASTER = "master"  # key of a float32 copy in the optimizer's state

_hooks: Any = WeakTensorKeyDictionary()  # of each half-precision parameter: that of its latest optimizer


def adamw(groups: Sequence[dict[str, Any]], lr: float) -> torch.optim.AdamW:
    """AdamW over parameter groups; gradients of half-precision parameters go to their float32 copies.

    The groups of the optimizer hold the copies. The copies are part of its state, so that a checkpoint restores them.

    Args:
        groups: dictionaries with "params" and options, as for `torch.optim.AdamW`.
        lr: learning rate of groups that have none.
    """
    copies: list[tuple[Tensor, Tensor]] = []  # each float32 copy with the model's parameter

    def learnable(p: Tensor) -> Tensor:
        if (hook := _hooks.pop(p, None)) is not None:  # of an earlier optimizer
            hook.remove()
        if p.dtype.itemsize >= 4:
            return p
        copy = p.detach().float().requires_grad_()
        _hooks[p] = p.register_post_accumulate_grad_hook(lambda p: hand_over(p, copy))
        copies.append((copy, p))
        return copy

    def hand_over(p: Tensor, copy: Tensor) -> None:
        assert p.grad is not None
        gradient = p.grad.float()
        copy.grad = gradient if copy.grad is None else copy.grad + gradient
        p.grad = None

    parts = [{**group, "params": [learnable(p) for p in group["params"]]} for group in groups]
    # Fused: one pass over the memory of each parameter instead of a dozen.
    optimizer = torch.optim.AdamW(parts, lr=lr, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def round_into_model(*_: Any) -> None:
        for copy, p in copies:
            if copy in optimizer.state:  # AdamW has no state of a parameter that never had a gradient
                p.copy_(copy)
                optimizer.state[copy][MASTER] = copy

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for copy, p in copies:
            if copy in optimizer.state:
                copy.copy_(optimizer.state[copy][MASTER])
                optimizer.state[copy][MASTER] = copy
                p.copy_(copy)

    if copies:
        optimizer.register_step_post_hook(round_into_model)
        optimizer.register_load_state_dict_post_hook(restore)
    return optimizer
