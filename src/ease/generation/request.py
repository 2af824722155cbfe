"""The state of one `generate` call, and the step that reads tokens and appends the next one to each row.

The rows of a batch advance independently: each has its own length, its own exits and its own end. Exact decoding
(`drafting.py`) appends several tokens at a time to the same state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ease.generation.sampling import Sampling
from ease.interface import Layout
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.routing.forward import routed_forward


class Token(NamedTuple):
    """One generated token, as passed to `stream`."""

    row: int
    token: int
    exit: int
    confidence: float


class Request:
    """State of one `generate` call: B rows, each at its own length.

    Args:
        ids: (B, T) prompts.
        real: (B, T) true for tokens that are not padding.
        max_new_tokens: the largest number of tokens appended to a row.
        stop: ids that end a row.
        cache: an empty cache of the model, which the steps fill.
        stream: called with each token as it is appended.

    Attributes:
        answers: the tokens appended to each row so far.
        current: (B,) the last token of each row, which the model has not read yet.
        running: (B,) true for rows that are not finished.
        seen: (B, V) tokens of prompt and answer so far, for the repetition penalty; None without one.
        layers_run: layers computed, summed over tokens; rejected drafts count.
    """

    def __init__(
        self,
        model: StandardTransformer,
        ids: Tensor,
        real: Tensor,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop: frozenset[int],
        cache: Any,
        stream: Callable[[Token], None] | None = None,
    ) -> None:
        self.model, self.sampling, self.cache = model, sampling, cache
        self.max_new_tokens, self.stop, self.stream = max_new_tokens, stop, stream
        self.generator = None
        if sampling.seed is not None:
            self.generator = torch.Generator(ids.device).manual_seed(sampling.seed)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(len(ids), model.config.vocab_size, dtype=torch.bool, device=ids.device)
            rows, cols = real.nonzero(as_tuple=True)
            self.seen[rows, ids[rows, cols]] = True
        self.answers: list[list[Token]] = [[] for _ in ids]
        self.current = ids[:, -1]
        self.running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.layers_run = 0

    @property
    def unfinished(self) -> bool:
        """Whether some row is still running."""
        return bool(self.running.any())

    @property
    def num_generated(self) -> int:
        """Tokens appended so far, over all rows."""
        return sum(map(len, self.answers))

    def choose(self, logits: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits (n, V) -> ids (n,), and the probabilities (n, V) they were drawn from; None when greedy."""
        if self.sampling.greedy:
            return self.sampling.penalize(logits, seen).argmax(1), None
        probabilities = self.sampling.distribution(logits, seen)
        return self.draw(probabilities), probabilities

    def draw(self, probabilities: Tensor) -> Tensor:
        """Probabilities (n, V) -> ids (n,)."""
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)

    def step(self, ids: Tensor, real: Tensor, policy: Policy) -> None:
        """Reads ids (B, T) under a policy and appends the next token to each row with a real token."""
        B, T = ids.shape
        last = real if T == 1 else real & (real.flip(1).cumsum(1).flip(1) == 1)
        is_last = last.flatten()
        logits = self.model.new_logits(B)
        exits = torch.zeros(B, dtype=torch.long, device=ids.device)
        confidences = logits.new_zeros(B, dtype=torch.promote_types(logits.dtype, torch.float32))

        def read(chunk: Tensor, places: Tensor) -> Tensor:
            selected = is_last[places]
            logits[places[selected] // T] = chunk[selected].to(logits)
            return chunk[:, :0]  # the logits are stored already: there is nothing to collect

        layout = Layout(torch.zeros_like(ids), real.long() - 1)
        for step in routed_forward(self.model, ids, policy, layout=layout, read=read, required=last, cache=self.cache):
            self.layers_run += (step.layer - step.first + 1) * int(step.arrived.count_nonzero())
            if not step.num_leaving:
                continue
            leaving = step.left & last
            exits[leaving.any(1)] = step.layer
            by_token = confidences.new_zeros(B, T).masked_scatter(step.queried, step.confidence.to(confidences))
            confidences = torch.where(leaving.any(1), (by_token * leaving).sum(1), confidences)
        read_rows = last.any(1)
        seen = None if self.seen is None else self.seen[read_rows]
        tokens = torch.zeros_like(exits)
        tokens[read_rows], _ = self.choose(logits[read_rows], seen)
        self.append(tokens[:, None], exits[:, None], confidences[:, None], read_rows.long())

    def full_step(self) -> None:
        """Reads the current token of each running row at full depth and appends the next one."""
        self.step(self.current[:, None], self.running[:, None], Policy())

    def append(self, tokens: Tensor, exits: Tensor, confidences: Tensor, counts: Tensor) -> None:
        """Appends the first counts[b] of tokens[b] to each running row b, up to its stop or length limit.

        Args:
            tokens, exits, confidences: (B, K).
            counts: (B,) integers.
        """
        running = self.running.tolist()
        columns = (t.tolist() for t in (tokens, exits, confidences, counts))
        for row, (row_tokens, row_exits, row_confidences, count) in enumerate(zip(*columns, strict=True)):
            for values in list(zip(row_tokens, row_exits, row_confidences, strict=True))[:count]:
                if not running[row]:
                    break
                token = Token(row, *values)
                self.answers[row].append(token)
                if self.stream is not None:
                    self.stream(token)
                running[row] = token.token not in self.stop and len(self.answers[row]) < self.max_new_tokens
        self.running = torch.tensor(running, device=tokens.device)
        last = (counts - 1).clamp(min=0)[:, None]
        self.current = torch.where(counts > 0, tokens.gather(1, last).squeeze(1), self.current)
        if self.seen is not None:
            appended = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
            rows, cols = appended.nonzero(as_tuple=True)
            self.seen[rows, tokens[rows, cols]] = True
