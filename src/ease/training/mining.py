"""Mining of hard tokens: per-token confidence, its quantile as the threshold, and the tokens below it.

Everything here is per token. A sequence of hard and easy tokens has no confidence of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from ease.devices import as_device
from ease.errors import EaseError, check_number, check_seed, checked
from ease.flops import exit_flops, run_flops
from ease.interface import Batch, Batches, ExitModel, evaluation_view, re_iterable, running_batches
from ease.policy import Policy
from ease.routing.forward import ExitStep, routed_forward
from ease.training.config import check_budget
from ease.training.distributed import gather, gather_batches, part_of, place, processes, total, total_count

EXACT_QUANTILE = 2**20  # values that are kept: 8 MiB
BINS = 2**20
CHUNK = 2**16  # values that are sorted into bins at a time


class Quantile:
    """A quantile of values in [0, 1] that arrive in parts, in less than 64 MiB whatever their number.

    Up to `exact` values it is exact, with linear interpolation as in `torch.quantile`. Beyond that it is computed from
    the counts, the least and the largest value of `BINS` equal bins, and lies within one bin (1e-6) of a value next to
    the exact quantile.
    """

    def __init__(self, exact: int = EXACT_QUANTILE) -> None:
        self.exact, self.count = exact, 0
        self.parts: list[Tensor] = []
        self.bins: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Adds values.

        Raises:
            EaseError: one is NaN.
        """
        for part in values.detach().flatten().cpu().split(CHUNK):
            if bool(part.isnan().any()):
                raise EaseError("a confidence is NaN: the model's weights are probably corrupt, restore them")
            self.parts.append(part.double())
            self.count += part.numel()
            if self.count > self.exact:
                self._to_bins()

    def _to_bins(self) -> None:
        if self.bins is None:
            self.bins = torch.zeros(BINS, dtype=torch.long)
            self.least, self.most = torch.ones(BINS).double(), torch.zeros(BINS).double()
        for values in self.parts:
            at = (values * BINS).long().clamp_(0, BINS - 1)
            self.bins.scatter_add_(0, at, torch.ones_like(at))
            self.least.scatter_reduce_(0, at, values, "amin")
            self.most.scatter_reduce_(0, at, values, "amax")
        self.parts = []

    def merge(self) -> None:
        """Adds the values of all other processes, with the error that one process would have."""
        if processes() == 1:
            return
        self.count = total_count(self.count)
        if self.count <= self.exact:
            self.parts = [gather(torch.cat([torch.zeros(0).double(), *self.parts]))]
            return
        self._to_bins()
        assert self.bins is not None
        dist.all_reduce(self.bins)
        dist.all_reduce(self.least, dist.ReduceOp.MIN)
        dist.all_reduce(self.most, dist.ReduceOp.MAX)

    def __call__(self, share: float) -> float:
        if not self.count:
            raise EaseError("there is no token to take a quantile of: give at least one scored token")
        if self.bins is None:
            return float(torch.quantile(torch.cat(self.parts), share))
        rank, ends = math.ceil(share * (self.count - 1) + 1), self.bins.cumsum(0)
        at = int(torch.searchsorted(ends, rank))
        inside = int(self.bins[at])
        before = rank - 1 - int(ends[at]) + inside  # values of the bin that come before
        return float(self.least[at].lerp(self.most[at], before / max(1, inside - 1)))


def lowest(
    confidences: Sequence[Tensor], counted: Sequence[Tensor], threshold: float, share: float, *, by_row: bool
) -> list[Tensor]:
    """Selects the tokens with the lowest confidence, a share of the counted tokens.

    These are the tokens below the threshold, unless several tokens have the confidence at which the share ends. Of
    those, the missing number is selected at equal distances in the order of the text, independently of the batch size.
    Several processes select the same number in all, each among its own batches.

    Args:
        confidences: (B, T) per batch.
        counted: (B, T) per batch, true for the tokens that the share refers to.
        threshold: the quantile of the counted confidences.
        share: a number in (0, 1].
        by_row: whether all tokens of a row are selected if one of them is.

    Returns:
        A mask (B, T) per batch, true for the selected tokens.
    """
    below = [confidence < threshold for confidence in confidences]
    values = torch.cat([confidence[mask] for confidence, mask in zip(confidences, counted, strict=True)])
    number = total_count(len(values))
    wanted = max(1, math.ceil(share * (number - 1)))
    found = total_count(sum(int((low & mask).sum()) for low, mask in zip(below, counted, strict=True)))
    if found == wanted or share * number < 0.5:  # the share of a few tokens may round to none
        return below
    highest = gather(values).kthvalue(wanted).values
    missing = wanted - total_count(int((values < highest).sum()))
    seen, ties = place(int((values == highest).sum()))
    chosen = []
    for confidence, mask in zip(confidences, counted, strict=True):
        tied = (confidence == highest) & mask
        order = seen + tied.flatten().cumsum(0).view_as(tied) - 1
        taken = tied & ((order + 1) * missing // ties > order * missing // ties)
        seen += int(tied.sum())
        low = (confidence < highest) | taken
        chosen.append(low.any(1, keepdim=True).expand_as(low) if by_row else low)
    return chosen


def check_ratio(ratio: float) -> None:
    """Raises `EaseError` unless the share of hard tokens lies in (0, 1]."""
    check_number("the share of hard tokens", ratio)
    if not 0 < ratio <= 1:
        raise EaseError(f"the share of hard tokens must lie in (0, 1], got {ratio}")


def read_states(
    model: ExitModel, batches: Any, device: Any, exit: int | None
) -> Iterator[tuple[Batch, ExitStep, Tensor]]:
    """Every batch with a running token, its step at full depth up to `exit`, and the confidences (B, T) there."""
    model = evaluation_view(model)
    device = next(model.parameters()).device if device is None else as_device(device)
    for batch in map(part_of, running_batches(re_iterable(batches), device)):
        (step,) = routed_forward(model, batch.x, Policy(), layout=batch.layout, last=exit)
        yield batch, step, spread(step)


def spread(step: ExitStep) -> Tensor:
    """(B, T) confidences of the tokens that arrived, of the row if one token decides for it; 1 elsewhere."""
    everywhere = step.confidence.new_ones(step.queried.numel())
    everywhere = everywhere.index_copy(0, step.places, step.confidence).view(step.queried.shape)
    return everywhere.amin(1, keepdim=True).expand_as(everywhere) if step.by_row else everywhere


@torch.no_grad()
@checked
def compute_confidence_threshold(
    model: ExitModel,
    batches: Batches,
    target_ratio: float,
    device: torch.device | str | None = None,
    exit: int | None = None,
) -> float:
    """The confidence below which a share of all scored tokens lies.

    Args:
        model: an `ExitModel`.
        batches: re-iterable of (x, y); targets of -100 are not counted.
        target_ratio: the share, in (0, 1].
        device: where the model is (its parameters' device by default).
        exit: the exit that gives the confidence (the last by default).

    Returns:
        A threshold in [0, 1].

    Raises:
        EaseError: the share lies outside (0, 1], or no token is scored.
    """
    check_ratio(target_ratio)
    quantile = Quantile()
    for batch, _, confidence in read_states(model, batches, device, exit):
        quantile.add(confidence[batch.scored])
    quantile.merge()
    return quantile(target_ratio)


class HardExamples(TypedDict):
    """The N hard tokens, flattened."""

    inputs: Tensor
    """(N,) token ids."""
    hidden_states: Tensor
    """(N, D) their states at the exit."""
    targets: Tensor
    """(N,) their targets."""
    confidences: Tensor
    """(N,) their confidences."""


@torch.no_grad()
@checked
def collect_hard_examples(
    model: ExitModel,
    batches: Batches,
    threshold: float,
    device: torch.device | str | None = None,
    exit: int | None = None,
) -> HardExamples:
    """All scored tokens whose confidence at an exit is below a threshold.

    Args:
        model: an `ExitModel`.
        batches: re-iterable of (x, y); targets of -100 are not counted.
        threshold: confidence below which a token is hard.
        device: where the model is (its parameters' device by default).
        exit: the exit that gives the confidence (the last by default).

    Raises:
        EaseError: no token is below the threshold.
    """
    check_number("threshold", threshold)
    parts: list[tuple[Tensor, ...]] = []
    for batch, step, confidence in read_states(model, batches, device, exit):
        hard = (confidence < threshold) & batch.scored
        parts.append((batch.x[hard], step.state[hard], batch.y[hard], confidence[hard]))
    if not total_count(sum(len(part[0]) for part in parts)):
        raise EaseError(no_hard_token_message(threshold))
    inputs, states, targets, confidences = (gather_batches(column) for column in zip(*parts, strict=True))
    return HardExamples(inputs=inputs, hidden_states=states, targets=targets, confidences=confidences)


def no_hard_token_message(threshold: float) -> str:
    return f"no token is less confident than the threshold {threshold:.4g}: raise the share of hard tokens"


class MinedBatches:
    """Batches in which only hard tokens are active, with the frozen trunk's states as far as memory allows.

    Built from `epochs` passes over `batches`, routed by `policy`. Of the tokens that reach the model's last layer,
    those with the lowest confidence are hard, as many as make up a share `ratio` of all tokens. `threshold` is the
    confidence below which they lie, unless confidences are tied (`lowest`).

    Args:
        model: the model before growth; its last layer is mined.
        batches: re-iterable training batches.
        policy: the exits mined before, all below the last layer.
        ratio: share of all scored training tokens, in (0, 1]; with 1 every token is hard and the threshold is 1.
        epochs: passes over `batches`; if an epoch is a slice of the text, more epochs cover more of it.
        budget: maximum bytes of trunk states to keep; the states of other batches are recomputed when they are used.
        max_flops: maximum FLOPs of the phase, which mining must leave something of.
        seed: random seed of the order, which is drawn anew for every iteration.

    Raises:
        EaseError: the ratio lies outside (0, 1], or no token is hard; before mining, if it would take `max_flops`.
    """

    @checked
    def __init__(
        self,
        model: ExitModel,
        batches: Batches,
        policy: Policy,
        ratio: float,
        *,
        epochs: int = 1,
        budget: float = 2e9,
        max_flops: float | None = None,
        seed: int = 0,
    ) -> None:
        check_ratio(ratio)
        check_seed(seed)
        self.model, self.policy, self.layer = model, policy, model.num_layers
        self.generator = torch.Generator().manual_seed(seed)
        flops_here, kept, scored = 0.0, 0, 0
        quantile = Quantile()
        found: list[tuple[Batch, Tensor]] = []
        view = evaluation_view(model)
        passes = itertools.chain.from_iterable(itertools.repeat(re_iterable(batches), epochs))
        # On the host, where a training step reads masks without a wait.
        for whole in running_batches(passes, "cpu"):
            if not found:
                check_budget("mining", epochs * len(batches) * self._least_flops(whole), max_flops)
            batch = part_of(whole)
            step, flops = self._mine(view, batch)
            flops_here += flops
            confidence = spread(step).cpu()
            scored += int(batch.scored.sum())
            quantile.add(confidence[step.arrived & batch.scored])
            size = step.state.numel() * step.state.element_size()
            state = step.state if kept + size <= budget else None
            kept += size if state is not None else 0
            found.append((batch._replace(active=step.arrived, state=state), confidence))
        quantile.merge()
        self.flops, self.total = total(flops_here)[0], total_count(scored)
        # The share is of all tokens, the quantile over those still running.
        share = min(1.0, ratio * self.total / max(1, quantile.count))
        self.threshold = quantile(share) if share < 1 else 1.0
        self.batches = [batch for batch, _ in found]
        if share < 1:
            confidences, counted = [confidence for _, confidence in found], [batch.scored for batch, _ in found]
            by_row = model.config.num_labels is not None
            hard = lowest(confidences, counted, self.threshold, share, by_row=by_row)
            self.batches = [
                batch._replace(active=batch.running & low) for batch, low in zip(self.batches, hard, strict=True)
            ]
        self.hard = total_count(sum(int(batch.scored.sum()) for batch in self.batches))
        if not self.hard:
            raise EaseError(no_hard_token_message(self.threshold))

    def _least_flops(self, batch: Batch) -> float:
        """FLOPs of mining a batch, if every token that can leave does so at the first exit."""
        config, exit = self.model.config, min(self.policy.exits, default=self.layer)
        running = batch._replace(active=None).running
        return run_flops(config, exit, running, batch.layout) + exit_flops(config, int(running.sum()), exit)

    @torch.no_grad()
    def _mine(self, model: ExitModel, batch: Batch) -> tuple[ExitStep, float]:
        """The step at the mined layer and the FLOPs up to there; tokens that left before are not in `arrived`."""
        flops = 0.0
        batch = batch.to(next(model.parameters()).device)
        for step in routed_forward(model, batch.x, self.policy, layout=batch.layout, last=self.layer):
            flops += step.flops
        if step.layer < self.layer:  # every token of the batch left earlier
            none = torch.zeros_like(step.arrived)
            step = replace(step, layer=self.layer, arrived=none, queried=none, confidence=step.confidence[:0])
        return step, flops

    def __len__(self) -> int:
        return len(self.batches)

    def release(self) -> None:
        """Frees the trunk's states; a further iteration computes them again."""
        self.batches = [batch._replace(state=None) for batch in self.batches]

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the order to come; mining itself is repeated on resuming."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])

    def __iter__(self) -> Iterator[Batch]:
        model = evaluation_view(self.model)
        for i in torch.randperm(len(self.batches), generator=self.generator).tolist():
            batch = self.batches[i]
            if batch.state is None and self.policy.exits:
                step, flops = self._mine(model, batch)
                batch = batch._replace(state=step.state, flops=flops)
            elif batch.state is None:  # no token left before, so no head has to be evaluated again
                moved = batch.to(next(model.parameters()).device)
                with torch.no_grad():
                    state = model.run(model.embed(moved.x, layout=moved.layout), 1, self.layer, layout=moved.layout)
                running = batch._replace(active=None).running
                flops = run_flops(model.config, self.layer, running, batch.layout)
                batch = batch._replace(state=state, flops=flops)
            yield batch
