"""Drafts at an exit: the first layers predict, and the layers above continue from the same states."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ease.errors import EaseError
from ease.generation.request import Request
from ease.generation.sampling import NAN_LOGITS
from ease.generation.sources.base import Chains, Drafts, Source
from ease.interface import Layout
from ease.routing.confidence import at_least_float32, max_probability


class ExitSource(Source):
    """Drafts one token per row and step with layers 1..exit and the head.

    Args:
        exit: the exit that drafts, below the last one.
    """

    def __init__(self, request: Request, exit: int) -> None:
        super().__init__(request)
        self.exit, self.name = exit, f"exit {exit}"
        self.prior = max(exit, 0.5) / request.model.num_layers  # embedding and head of exit 0 are not free

    def offer(self, limits: Tensor, least: NDArray[np.float64]) -> Drafts:
        request, model = self.request, self.request.model
        chains, current = Chains(self, request.running, limits, least), request.current
        seen = None if request.seen is None else request.seen.clone()
        states: list[Tensor] = []
        distributions: list[tuple[Tensor, Tensor]] = []
        while True:
            layout = Layout.of_padding(chains.alive[:, None])
            state = model.embed(current[:, None], layout=layout, cache=request.cache)
            state = model.run(state, 1, self.exit, layout=layout, cache=request.cache)
            states.append(state)
            asked = chains.asked()
            if not bool(asked.any()):
                break
            rows = request.index(asked)
            logits = model.logits(state[rows, 0], self.exit)
            chosen, distribution = request.choose(logits, None if seen is None else seen[rows])
            drafted, confidence = current.clone(), at_least_float32(logits.new_zeros(len(asked)))
            drafted[rows], confidence[rows] = chosen, max_probability(logits)
            said = confidence.cpu().double().numpy()
            if np.isnan(said).any():
                raise EaseError(NAN_LOGITS)
            if not chains.add(drafted, said):
                break
            current = drafted
            if distribution is not None:
                distributions.append((asked, distribution))
            if seen is not None:
                seen = seen.clone()
                seen[rows] = seen[rows].scatter(1, chosen[:, None], True)
        return chains.drafts(exit=self.exit, states=torch.cat(states, 1), distributions=distributions)
