"""The state of one `generate` call, and the step that reads tokens and appends the next one to each row.

The rows of a batch advance independently: each has its own length, its own exits and its own end. Exact decoding
(`exact.py`) appends several tokens at a time to the same state.

Which rows run, and which tokens are real, is known on the host. A step reads the appended tokens with their confidences
from the device, and at each early exit which tokens leave; nothing else waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.generation.sampling import NAN_LOGITS, Sampling
from ease.interface import Layout, to_device
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.routing.confidence import at_least_float32
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
        ids: (B, T) prompts, on the model's device.
        real: (B, T) true for tokens that are not padding, on the host.
        texts: the ids of each prompt, on the host.
        max_new_tokens: the largest number of tokens appended to a row.
        stop: ids that end a row.
        cache: an empty cache of the model, which the steps fill.
        stream: called with each token as it is appended.

    Attributes:
        answers: the tokens appended to each row so far.
        texts: the ids of each row, prompt and answer, on the host.
        current: (B,) the last token of each row, which the model has not read yet.
        running: (B,) true for rows that are not finished, on the host.
        seen: (B, V) tokens of prompt and answer so far, for the repetition penalty; None without one.
        layers_run: layers computed, summed over tokens; rejected drafts count.
    """

    def __init__(
        self,
        model: StandardTransformer,
        ids: Tensor,
        real: Tensor,
        texts: list[list[int]],
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
            rows, cols = to_device(real.nonzero(), ids.device).unbind(1)
            self.seen[rows, ids[rows, cols]] = True
        self.answers: list[list[Token]] = [[] for _ in ids]
        self.texts = texts
        self.current = ids[:, -1]
        self.running = torch.ones(len(ids), dtype=torch.bool)
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
        """Logits (n, V) -> ids (n,), and the probabilities (n, V) they were drawn from; None when greedy.

        When greedy, the id is -1 where a logit is NaN; the caller raises the error once the ids are on the host.
        """
        if self.sampling.greedy:
            return self.sampling.most_likely(logits, seen), None
        probabilities = self.sampling.distribution(logits, seen)
        return self.draw(probabilities), probabilities

    def draw(self, probabilities: Tensor) -> Tensor:
        """Probabilities (n, V) -> ids (n,)."""
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)

    def step(self, ids: Tensor, real: Tensor, policy: Policy) -> None:
        """Reads ids (B, T) under a policy and appends the next token to each row with a real token.

        Args:
            ids: (B, T), on the model's device.
            real: (B, T) true for tokens that are not padding, on the host.
        """
        B, T = ids.shape
        last = real if T == 1 else real & (real.flip(1).cumsum(1).flip(1) == 1)
        read_rows = last.any(1)
        # The row of the batch whose next token a token predicts. All others share row B, which is not read.
        row_of = to_device(torch.where(last, torch.arange(B)[:, None], B).flatten(), ids.device)
        logits = self.model.new_logits(B + 1)
        exits = torch.zeros(B + 1, dtype=torch.long, device=ids.device)
        confidences = at_least_float32(logits.new_zeros(B + 1))

        def read(chunk: Tensor, places: Tensor) -> Tensor:
            logits[row_of[places]] = chunk.to(logits)
            return chunk[:, :0]  # the logits are stored already: there is nothing to collect

        layout = Layout.of_padding(real)
        for step in routed_forward(self.model, ids, policy, layout=layout, read=read, required=last, cache=self.cache):
            self.layers_run += (step.layer - step.first + 1) * int(step.arrived.count_nonzero())
            if step.num_leaving:
                rows = row_of[step.leaving]
                exits[rows] = step.layer
                confidences[rows] = step.leaving_confidence.to(confidences)
        rows = self.index(read_rows)
        tokens = torch.zeros_like(exits[:B])
        tokens[rows], _ = self.choose(logits[:B][rows], None if self.seen is None else self.seen[rows])
        tokens, exits = torch.stack((tokens, exits[:B])).cpu()
        self.append(tokens[:, None], exits[:, None], confidences[:B, None].cpu(), read_rows.long())

    def index(self, rows: Tensor) -> Any:
        """An index of the rows that are true in `rows` (B,), on the host; a slice for all, since it copies nothing."""
        return slice(None) if bool(rows.all()) else to_device(rows.nonzero().squeeze(1), self.current.device)

    def append(self, tokens: Tensor, exits: Tensor, confidences: Tensor, counts: Tensor) -> None:
        """Appends the first counts[b] of tokens[b] to each running row b, up to its stop or length limit.

        Args:
            tokens, exits, confidences: (B, K), on the host.
            counts: (B,) integers, on the host.
        """
        if bool((tokens < 0).any()):
            raise EaseError(NAN_LOGITS)
        running = self.running.tolist()
        columns = (t.tolist() for t in (tokens, exits, confidences, counts))
        for row, (row_tokens, row_exits, row_confidences, count) in enumerate(zip(*columns, strict=True)):
            for values in list(zip(row_tokens, row_exits, row_confidences, strict=True))[:count]:
                if not running[row]:
                    break
                token = Token(row, *values)
                self.answers[row].append(token)
                self.texts[row].append(token.token)
                if self.stream is not None:
                    self.stream(token)
                running[row] = token.token not in self.stop and len(self.answers[row]) < self.max_new_tokens
        self.running = torch.tensor(running)
        longer = counts.nonzero().squeeze(1)
        changed = to_device(torch.stack((longer, tokens[longer, counts[longer] - 1])), self.current.device)
        self.current = self.current.index_copy(0, *changed)
        if self.seen is not None:
            appended = torch.arange(tokens.shape[1]) < counts[:, None]
            rows = appended.nonzero()[:, 0]
            rows, new = to_device(torch.stack((rows, tokens[appended])), self.current.device)
            self.seen[rows, new] = True
