"""AdamW whose updates are float32, whatever the dtype of the model.

An update of a parameter in half precision is lost if it is smaller than the spacing of numbers there: an exit's norm in
bfloat16 starts at 1, where the spacing is 2^-7, and AdamW moves it by about the learning rate. The optimizer therefore
updates float32 copies (master weights, Micikevicius et al. 2018, arXiv:1710.03740, section 3.1) and rounds them into
the model after every step.

The table of a memory has a sparse gradient: a step updates the rows that it read and no others, each divided by the
root of the mean square of its gradients (Adam's second moment with one number per row, as in Adafactor, Shazeer and
Stern 2018, arXiv:1804.04235), without momentum and weight decay.

With Muon (`torch.optim.Muon`, Jordan et al. 2024) the matrices of layers take orthogonal updates, whose root mean
square is that of AdamW, so that both share a learning rate (Liu et al. 2025, arXiv:2502.16982, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ease.interface import ExitModel
from ease.training.distributed import is_sharded
from ease.training.sharding import local_part, norm_of_parts

MASTER = "master"  # key of a float32 copy in the optimizer's state
ROW_DECAY = 0.95  # of the mean square of a row's gradients, per step that reads the row


class MasterAdamW(torch.optim.AdamW):
    """AdamW over parameter groups, with float32 copies of half-precision parameters.

    `param_groups` holds the copies; gradients stay on the model's parameters, which `sources` lists. The copies are
    part of the state, so that a checkpoint restores them. A parameter that was changed between steps, such as by
    restoring weights, is copied again.

    Args:
        groups: dictionaries with "params" and options, as for `torch.optim.AdamW`; those with "muon" true take updates
            of Muon.
        lr: learning rate of groups that have none.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], lr: float) -> None:
        self.sources: list[Tensor] = [p for group in groups for p in group["params"]]
        self._copies: list[tuple[Tensor, Tensor]] = []  # each copy with its parameter
        parts = [{**group, "params": [self._learnable(p) for p in group["params"]]} for group in groups]
        # Fused: one pass over the memory of each parameter instead of a dozen.
        super().__init__(parts, lr=lr, betas=(0.9, 0.95), fused=True)
        matrices = [{"params": group["params"]} for group in self.param_groups if group.get("muon")]
        self._muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw") if matrices else None

    def _learnable(self, p: Tensor) -> Tensor:
        if p.dtype.itemsize >= 4:
            return p
        copy = p.detach().float().requires_grad_()
        self._copies.append((copy, p))
        return copy

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for copy, p in self._copies:
            copy.data = torch.where(copy.to(p) == p, copy.to(p.device), p.float())
            copy.grad = None if p.grad is None else p.grad.float()
        sparse = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if is_sparse(p.grad)]
        for p, gradient, group in sparse:
            self._step_rows(p, coalesced(gradient), group["lr"], group["eps"])
        matrices = self._step_matrices()
        done = [(p, p.grad) for p in (*matrices, *(p for p, _, _ in sparse))]
        for p, _ in done:
            p.grad = None  # `AdamW.step` passes over parameters without a gradient
        super().step()
        for p, gradient in done:
            p.grad = gradient
        for copy, p in self._copies:
            copy.grad = None
            if copy in self.state:  # AdamW has no state of a parameter that never had a gradient
                p.copy_(copy)
                self.state[copy][MASTER] = copy
        return loss

    def _step_matrices(self) -> list[Tensor]:
        """Updates the matrices that Muon is for, and returns them."""
        if self._muon is None:
            return []
        groups = [group for group in self.param_groups if group.get("muon")]
        for own, group in zip(self._muon.param_groups, groups, strict=True):
            own["lr"], own["weight_decay"] = group["lr"], group["weight_decay"]
        self._muon.state = self.state
        self._muon.step()
        matrices = [p for group in groups for p in group["params"]]
        for p in matrices:
            if p in self.state:
                self.state[p].setdefault("step", torch.zeros(()))  # AdamW reads it when it loads a state
        return matrices

    def _step_rows(self, p: Tensor, gradient: Tensor, lr: float, eps: float) -> None:
        """Updates the rows of p (N, D) that a coalesced sparse gradient names."""
        rows, values, state = gradient.indices()[0], gradient.values(), self.state[p]
        if not state:
            state["square"], state["step"] = p.new_zeros(len(p)), p.new_zeros(len(p))
        square = state["square"][rows].mul_(ROW_DECAY).add_(values.square().mean(1), alpha=1 - ROW_DECAY)
        steps = state["step"][rows] + 1
        state["square"][rows], state["step"][rows] = square, steps
        scale = (square / (1 - ROW_DECAY**steps)).sqrt_().add_(eps)
        p.index_add_(0, rows, values / scale[:, None], alpha=-lr)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for _, p in self._copies:
            p.grad = None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for copy, p in self._copies:
            if copy in self.state:
                copy.copy_(self.state[copy].get(MASTER, p))
                self.state[copy][MASTER] = copy
                p.copy_(copy)


def parameter_groups(
    model: ExitModel, lr: float, weight_decay: float, scales: Mapping[int, float], *, muon: bool = False
) -> list[dict[str, Any]]:
    """The parameters of a model that learn, by rate and decay: matrices are decayed, norms and other vectors are not.

    Args:
        scales: layer -> factor of the learning rate of its parameters.
        muon: whether the matrices of `model.layers` are in groups of their own, for Muon.

    Returns:
        Groups for an optimizer; the first is the decayed one with the highest rate.
    """
    factors = {p: scale for layer, scale in scales.items() for p in model.parameters_of(layer)}
    tables = set(model.memory_tables())
    groups: dict[tuple[bool, float, bool, bool], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed, matrix = p.ndim >= 2 and p not in tables, p.ndim == 2 and name.startswith("layers.")
            # A fused optimizer takes sharded parameters and whole ones one after the other.
            key = decayed, factors.get(p, 1.0), muon and matrix, not is_sharded(p)
            groups.setdefault(key, []).append(p)
    return [
        {"params": params, "lr": lr * factor, "weight_decay": weight_decay if decayed else 0.0, "muon": matrices}
        for (decayed, factor, matrices, _), params in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


def is_sparse(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.is_sparse


def coalesced(gradient: Tensor) -> Tensor:
    """A sparse gradient (N, D) with every row once, in half the time of `Tensor.coalesce`, which sorts the rows."""
    if gradient.is_coalesced():
        return gradient
    rows, values = gradient._indices()[0], gradient._values()
    named = torch.zeros(len(gradient), dtype=torch.bool, device=rows.device)
    named[rows] = True
    once = named.nonzero().squeeze(1)
    place = torch.empty_like(named, dtype=torch.long)
    place[once] = torch.arange(len(once), device=rows.device)
    sums = values.new_zeros(len(once), *values.shape[1:]).index_add_(0, place[rows], values)
    return torch.sparse_coo_tensor(once[None], sums, gradient.shape, is_coalesced=True, check_invariants=False)


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Scales the gradients of `parameters` so that their norm is at most `limit`, and returns the norm before."""
    dense, parts = [], []
    for p in parameters:
        assert p.grad is not None
        if is_sharded(p.grad):
            parts.append(local_part(p.grad))
            continue
        if p.grad.is_sparse:
            p.grad = coalesced(p.grad)
        dense.append(p.grad.values() if p.grad.is_sparse else p.grad)
    norm = torch.nn.utils.get_total_norm(dense)
    if parts:
        norm = norm.hypot(norm_of_parts(parts))
    torch._foreach_mul_(dense + parts, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The model's parameters that an optimizer updates."""
    if isinstance(optimizer, MasterAdamW):
        return optimizer.sources
    return [p for group in optimizer.param_groups for p in group["params"]]
