"""Drafts of the model's draft brick, which reads the states that the last layer gave to the tokens before."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ease.generation.request import Request
from ease.generation.sources.base import Chains, Drafts, Source
from ease.interface import Layout, to_device


class BrickSource(Source):
    """Drafts a token per row and step with one layer and the trimmed head.

    The brick has read a place of a row once it has the state of its token and the token after it.
    """

    name = "brick"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.prior = 2 / request.model.num_layers
        self.cache = request.model.new_draft_cache(len(request.texts), request.cache.capacity)

    def offer(self, limits: Tensor, least: NDArray[np.float64]) -> Drafts:
        request, model = self.request, self.request.model
        chains = Chains(self, request.running, limits, least)
        asked = chains.asked()
        if not bool(asked.any()):
            return self.no_drafts()
        states, ids, real = self._unread(asked)
        read = self.cache.length + real.sum(1).numpy()
        last = to_device((real.sum(1) - 1).clamp(min=0), states.device)
        drafted = model.draft(states, ids, layout=Layout.of_padding(real), cache=self.cache)
        drafted = drafted[torch.arange(len(last), device=last.device), last]
        while True:
            chosen, confidence = model.draft_tokens(drafted)
            # A brick may overflow in half precision: a draft of unknown probability is not offered.
            said = np.nan_to_num(confidence.cpu().double().numpy(), nan=0.0)
            if not chains.add(chosen, said) or not bool((asked := chains.asked()).any()):
                break
            layout = Layout.of_padding(asked[:, None])
            drafted = model.draft(drafted[:, None], chosen[:, None], layout=layout, cache=self.cache)[:, 0]
        self.cache.cut(read)
        return chains.drafts()

    def _unread(self, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States (B, M, D), the tokens (B, M) after them, and what of both is real (B, M), of the places to read."""
        known, texts = self.cache.length, self.request.texts
        count = np.where(alive.numpy(), self.request.cache.length - known, 0)
        places = np.minimum(known[:, None] + np.arange(count.max()), self.request.cache.length[:, None] - 1)
        # A row that has ended may have read more than its text; its ids are not real and have no effect.
        following = [
            [text[min(place + 1, len(text) - 1)] for place in row]
            for text, row in zip(texts, places.tolist(), strict=True)
        ]
        ids = to_device(torch.tensor(following), self.request.current.device)
        rows, index = np.arange(len(texts))[:, None], self.cache.tensor
        states = self.request.cache.states[index(rows), index(places)]
        return states, ids, torch.from_numpy(np.arange(count.max()) < count[:, None])
