"""Hard tokens, one by one: how sure a shallow model is of each, where the line is drawn, and who is below it.

Everything here is per token. A sequence of hard and easy tokens has no confidence of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from ease.errors import EaseError, check_seed
from ease.flops import run_flops
from ease.interface import Batch, Batches, ExitModel, Layout, eval_mode, re_iterable
from ease.policy import Policy
from ease.routing.forward import ExitStep, routed_forward

EXACT_QUANTILE = 2**24  # as many values as torch.quantile takes

BINS = 2**20


class Quantile:
    """A quantile of values in [0, 1] that arrive in parts, in bounded memory.

    Exact, with linear interpolation as in `torch.quantile`, up to `exact` values. Beyond that it comes from counts
    in `BINS` equal bins, and lies within one bin (1e-6) of a value next to the exact quantile.
    """

    def __init__(self, exact: int = EXACT_QUANTILE) -> None:
        self.exact, self.count = exact, 0
        self.parts: list[Tensor] = []
        self.bins: Tensor | None = None

    def add(self, values: Tensor) -> None:
        self.parts.append(values.detach().flatten().cpu().double())
        self.count += values.numel()
        if self.count > self.exact:
            added = torch.histc(torch.cat(self.parts), BINS, 0.0, 1.0).long()
            self.bins = added if self.bins is None else self.bins + added
            self.parts = []

    def __call__(self, share: float) -> float:
        if not self.count:
            raise EaseError("there is no token to take a quantile of: give at least one scored token")
        if self.bins is None:
            return float(torch.quantile(torch.cat(self.parts), share))
        rank = math.ceil(share * (self.count - 1) + 1)
        return (int(torch.searchsorted(self.bins.cumsum(0), rank)) + 0.5) / BINS


def check_ratio(ratio: float) -> None:
    """Refuses a share of hard tokens that is none."""
    if not 0 < ratio <= 1:
        raise EaseError(f"the share of hard tokens must lie in (0, 1], got {ratio}")


def read_states(
    model: ExitModel, batches: Any, device: Any, exit: int | None
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Every batch with a token, its states (B, T, D) and confidences (B, T) at `exit`, at full depth up to there."""
    device = device or next(model.parameters()).device
    with eval_mode(model):
        for item in re_iterable(batches):
            batch = Batch(*item).to(device)
            if not bool(batch.running.any()):
                continue
            (stop,) = routed_forward(model, batch.x, Policy(), layout=batch.layout, last=exit)
            yield batch, stop.state, spread(stop)


def spread(stop: ExitStep) -> Tensor:
    """(B, T) the confidences of those that arrived, of a row where one token decides for it; 1 elsewhere."""
    everywhere = torch.ones(stop.queried.shape, dtype=stop.confidence.dtype, device=stop.confidence.device)
    everywhere = everywhere.masked_scatter(stop.queried, stop.confidence)
    return everywhere.amin(1, keepdim=True).expand_as(everywhere) if stop.by_row else everywhere


@torch.no_grad()
def compute_confidence_threshold(
    model: ExitModel,
    batches: Batches,
    target_ratio: float,
    device: torch.device | str | None = None,
    exit: int | None = None,
) -> float:
    """The confidence below which a share `target_ratio` of all scored tokens lies.

    Args:
        batches: re-iterable of (x, y); a target of -100 is not counted.
        exit: the exit asked (the last by default).
    """
    check_ratio(target_ratio)
    quantile = Quantile()
    for batch, _, confidence in read_states(model, batches, device, exit):
        quantile.add(confidence[batch.scored])
    return quantile(target_ratio)


class HardExamples(TypedDict):
    """The N hard tokens, flattened."""

    inputs: Tensor
    """(N,) token ids."""
    hidden_states: Tensor
    """(N, D) their states at the exit."""
    targets: Tensor
    """(N,) the tokens to predict."""
    confidences: Tensor
    """(N,)."""


@torch.no_grad()
def collect_hard_examples(
    model: ExitModel,
    batches: Batches,
    threshold: float,
    device: torch.device | str | None = None,
    exit: int | None = None,
) -> HardExamples:
    """All scored tokens whose confidence at the exit is below the threshold; raises `EaseError` if there are none."""
    parts: list[tuple[Tensor, ...]] = []
    for batch, state, confidence in read_states(model, batches, device, exit):
        hard = (confidence < threshold) & batch.scored
        parts.append((batch.x[hard], state[hard], batch.y[hard], confidence[hard]))
    if not sum(len(part[0]) for part in parts):
        raise EaseError(no_hard_token_message(threshold))
    inputs, states, targets, confidences = (torch.cat(column) for column in zip(*parts, strict=True))
    return HardExamples(inputs=inputs, hidden_states=states, targets=targets, confidences=confidences)


def no_hard_token_message(threshold: float) -> str:
    return f"no token is less confident than the threshold {threshold:.4g}: raise the share of hard tokens"


class MinedBatches:
    """Batches in which only hard tokens are active, with the frozen trunk's state where memory allows.

    Built from `epochs` passes over `batches`, routed by `policy`, which names every exit so far but the one mined: the
    last of the model as it stands. Hard are, of the tokens that still run there, the least confident, as many as
    make up a share `ratio` of all tokens; `threshold` is then the confidence below which they lie.

    Args:
        ratio: in (0, 1], of all scored training tokens; 1 takes every token, and the threshold is then 1.
        epochs: iterations over `batches`; where an epoch is a slice of the text, more of them bring more of it.
        budget: bytes of trunk states to keep; batches beyond that run the trunk again whenever they come up.
        seed: of the order, which is drawn anew for every iteration.
    """

    def __init__(
        self,
        model: ExitModel,
        batches: Batches,
        policy: Policy,
        ratio: float,
        *,
        epochs: int = 1,
        budget: float = 2e9,
        seed: int = 0,
    ) -> None:
        check_ratio(ratio)
        check_seed(seed)
        self.model, self.policy, self.layer = model, policy, model.num_layers
        self.generator = torch.Generator().manual_seed(seed)
        self.flops, kept, total = 0.0, 0, 0
        device = next(model.parameters()).device
        quantile = Quantile()
        found: list[tuple[Batch, Tensor]] = []
        with eval_mode(model):
            for item in itertools.chain.from_iterable(itertools.repeat(re_iterable(batches), epochs)):
                batch = Batch(*item).to(device)
                if not bool(batch.running.any()):
                    continue
                stop, flops = self._mine(batch.x, batch.layout)
                self.flops += flops
                confidence = spread(stop)
                total += int(batch.scored.sum())
                quantile.add(confidence[stop.arrived & batch.scored])
                size = stop.state.numel() * stop.state.element_size()
                state = stop.state if kept + size <= budget else None
                kept += size if state is not None else 0
                found.append((batch._replace(active=stop.arrived, state=state), confidence))
        # The share is of all tokens, the quantile over those still running.
        share = min(1.0, ratio * total / max(1, quantile.count))
        self.threshold = quantile(share) if share < 1 else 1.0
        self.batches = [
            batch if share == 1.0 else batch._replace(active=batch.running & (confidence < self.threshold))
            for batch, confidence in found
        ]
        self.hard = sum(int(batch.scored.sum()) for batch in self.batches)
        self.total = total
        if not self.hard:
            raise EaseError(no_hard_token_message(self.threshold))

    @torch.no_grad()
    def _mine(self, x: Tensor, layout: Layout | None) -> tuple[ExitStep, float]:
        """The stop at the mined exit and the FLOPs to get there; tokens that left before are not in `arrived`."""
        flops = 0.0
        for stop in routed_forward(self.model, x, self.policy, layout=layout, last=self.layer):
            flops += stop.flops
        if stop.layer < self.layer:  # every token of the batch left earlier
            nobody = torch.zeros_like(stop.arrived)
            stop = replace(stop, layer=self.layer, arrived=nobody, queried=nobody, confidence=stop.confidence[:0])
        return stop, flops

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, Tensor]:
        """Of the order of what is to come; what was mined is mined again."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])

    def __iter__(self) -> Iterator[Batch]:
        for i in torch.randperm(len(self.batches), generator=self.generator).tolist():
            batch = self.batches[i]
            if batch.state is None and self.policy.exits:
                stop, flops = self._mine(batch.x, batch.layout)
                batch = batch._replace(state=stop.state, flops=flops)
            elif batch.state is None:  # no token left before, so no head needs to be asked again
                with torch.no_grad():
                    state = self.model.run(self.model.embed(batch.x), 1, self.layer, layout=batch.layout)
                everyone = batch._replace(active=None).running
                flops = run_flops(self.model.config, self.layer, everyone, batch.layout)
                batch = batch._replace(state=state, flops=flops)
            yield batch
