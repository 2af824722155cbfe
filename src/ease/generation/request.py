"""ease.generation.request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ease.generation.sampling import Sampling
from ease.interface import Layout
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.routing.confidence import max_probability
from ease.routing.forward import routed_forward


class Token(NamedTuple):
    """What a stream is told of each token as it is decided."""

    row: int
    token: int
    exit: int
    confidence: float


@dataclass(frozen=True)
class Generation:
    """What was generated for B rows, N new tokens at most."""

    tokens: Tensor
    """(B, N) ids; 0 after a row's stop."""
    exits: Tensor
    """(B, N) the exit that each token was predicted at; 0 after a row's stop. In exact mode the exit that drafted, also
    where full decoding said something else."""
    confidences: Tensor
    """(B, N) the confidence of that exit."""
    stats: dict[str, Any]
    """tokens, seconds, prefill_seconds, tokens_per_second, layers_per_token (refused drafts count); exact:
    drafted, accepted, acceptance, draft_exit."""


@dataclass
class Request:
    """A batch of rows on its way."""

    model: StandardTransformer
    sampling: Sampling
    stop: frozenset[int]
    limit: int
    cache: Any
    generator: torch.Generator | None
    stream: Callable[[Token], None] | None
    seen: Tensor | None  # (B, V) tokens of the prompt and the answer so far, where a penalty asks for them
    found: list[list[Token]]
    layers_run: int = 0
    current: Tensor = field(default_factory=lambda: torch.zeros(0))  # (B,) the last token of each row, not yet read
    running: Tensor = field(default_factory=lambda: torch.zeros(0))  # (B,) rows that want more

    def draw(self, logits: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits (n, V) -> ids (n,), and the probabilities (n, V) that they were drawn from; greedy has none."""
        if self.sampling.temperature == 0:
            return self.sampling.penalise(logits, seen).argmax(1), None
        probabilities = self.sampling.distribution(logits, seen)
        return self.pick(probabilities), probabilities

    def pick(self, probabilities: Tensor) -> Tensor:
        """(n, V) -> (n,) ids."""
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)

    def take(self, tokens: Tensor, exits: Tensor, confidences: Tensor, counts: Tensor) -> None:
        """The first counts (B,) of tokens (B, K) belong to the answer; rows that stop are done."""
        columns = (t.tolist() for t in (tokens, exits, confidences, counts))
        running = self.running.tolist()
        for row, (ids, outs, sure, count) in enumerate(zip(*columns, strict=True)):
            for new in (Token(row, *each) for each in list(zip(ids, outs, sure, strict=True))[:count]):
                if not running[row]:
                    break
                self.found[row].append(new)
                if self.stream is not None:
                    self.stream(new)
                running[row] = new.token not in self.stop and len(self.found[row]) < self.limit
        self.running = torch.tensor(running, device=tokens.device)
        last = (counts - 1).clamp(min=0)[:, None]
        self.current = torch.where(counts > 0, tokens.gather(1, last).squeeze(1), self.current)
        if self.seen is not None:
            taken = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
            rows, cols = taken.nonzero(as_tuple=True)
            self.seen[rows, tokens[rows, cols]] = True

    def step(self, ids: Tensor, real: Tensor, policy: Policy) -> None:
        """Reads ids (B, T), routed by the policy, and takes the token that follows in each running row."""
        B, T = ids.shape
        last = real if T == 1 else real & (real.flip(1).cumsum(1).flip(1) == 1)
        logits = self.model.output_head.weight.new_zeros(B, self.model.output_head.weight.shape[0])
        exits, confidences = torch.zeros(B, dtype=torch.long, device=ids.device), logits.new_zeros(B)
        flat = last.flatten()

        def read(chunk: Tensor, places: Tensor) -> Tensor:
            mine = flat[places]
            logits[places[mine] // T] = chunk[mine].to(logits)
            return chunk[:, :0]  # what is wanted has been taken

        layout = Layout(torch.zeros_like(ids), real.long() - 1)
        for at in routed_forward(self.model, ids, policy, layout=layout, read=read, wanted=last, cache=self.cache):
            self.layers_run += (at.layer - at.first + 1) * int(at.arrived.count_nonzero())
            if not at.gone:
                continue
            leaving = at.left & last
            exits[leaving.any(1)] = at.layer
            sure = logits.new_zeros(B, T).masked_scatter(at.asked, at.confidence.to(logits))
            confidences = torch.where(leaving.any(1), (sure * leaving).sum(1), confidences)
        answers = last.any(1)
        seen = None if self.seen is None else self.seen[answers]
        tokens = torch.zeros_like(exits)
        tokens[answers], _ = self.draw(logits[answers], seen)
        self.take(tokens[:, None], exits[:, None], confidences[:, None], answers.long())

    def draft_and_check(
        self, exit: int, length: int, draft_confidence: float, *, together: bool = False
    ) -> tuple[int, int, int]:
        """One round of exact decoding: up to `length` tokens drafted at `exit`, then checked by the layers above.

        A row stops drafting after a token less confident than `draft_confidence`. Returns tokens drafted and accepted,
        and rows of which one was refused. `together`: no row takes more tokens than another, so that all stand in one
        place if they did before.
        """
        model, start = self.model, self.cache.length
        B, last, drafting, tokens = len(start), model.num_layers, self.running.clone(), self.current
        seen = None if self.seen is None else self.seen.clone()
        states, drafts, beliefs, sure, read = [], [], [], [], []
        for _ in range(length):
            # While every row drafts, rows are not picked out: a view costs nothing.
            every = bool(drafting.all())
            rows: Any = slice(None) if every else drafting.nonzero().squeeze(1)
            layout = None if every else Layout(torch.zeros_like(tokens)[:, None], drafting.long()[:, None] - 1)
            state = model.run(model.embed(tokens[:, None]), 1, exit, layout=layout, cache=self.cache)
            logits = model.logits(state[rows, 0], exit)
            offer, belief = self.draw(logits, None if seen is None else seen[rows])
            drafted, confidence = tokens.clone(), logits.new_zeros(B)
            drafted[rows], confidence[rows] = offer, max_probability(logits)
            states.append(state)
            drafts.append(drafted)
            sure.append(confidence)
            read.append(drafting)
            beliefs.append(belief)
            tokens = drafted
            if seen is not None:
                seen = seen.clone()
                seen[drafting, drafted[drafting]] = True
            drafting = drafting & (confidence >= draft_confidence)
            if not bool(drafting.any()):
                break
        K, mine = len(drafts), torch.stack(read, 1)
        self.layers_run += last * int(mine.sum())

        self.cache.resume(start, K)
        deep = model.run(torch.cat(states, 1), exit + 1, last, active=mine, cache=self.cache)
        logits = model.logits(deep[mine], last)
        offered = torch.stack(drafts, 1)
        settled = self._settle(offered, mine, logits, beliefs)
        answer, accepted = offered.clone(), torch.zeros_like(mine)
        answer[mine], accepted[mine] = settled
        # Agreement counts up to the first token that differs, which is replaced by what full decoding says.
        leading = accepted.long().cumprod(1).sum(1)
        counts = torch.minimum(leading + 1, mine.sum(1))
        if together:  # what is left out will be the same, or as likely, when it is decoded again
            counts = counts.clamp(max=int(counts[counts > 0].min()))
        self.cache.cut(start + counts.cpu().numpy())
        self.take(answer, torch.full_like(answer, exit), torch.stack(sure, 1), counts)
        return int(mine.sum()), int(leading.sum()), int((leading < mine.sum(1)).sum())

    def _seen_on_the_way(self, offered: Tensor, mine: Tensor) -> Tensor | None:
        """(M, V) for each drafted token, the tokens seen before it."""
        if self.seen is None:
            return None
        seen, parts = self.seen.clone(), []
        for k in range(offered.shape[1]):
            parts.append(seen.clone())
            seen[mine[:, k], offered[mine[:, k], k]] = True
        return torch.stack(parts, 1)[mine]

    def _settle(
        self, offered: Tensor, mine: Tensor, logits: Tensor, beliefs: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """For the M of offered (B, K) that are drafts, what full decoding says (M,), and where that is the offer.

        Args:
            logits: (M, V) of the last exit.
            beliefs: per place in the draft the probabilities that it was drawn from, of the rows that drafted there.
        """
        seen, offers = self._seen_on_the_way(offered, mine), offered[mine]
        if self.sampling.temperature == 0:
            told, _ = self.draw(logits, seen)
            return told, told == offers
        truth = self.sampling.distribution(logits, seen)
        # An offer is kept with probability min(1, truth / believed), else one is drawn from what truth has more
        # (Leviathan et al. 2023, arXiv:2211.17192).
        believed = truth.new_zeros(*offered.shape, truth.shape[1])
        for k, belief in enumerate(beliefs):
            assert belief is not None
            believed[mine[:, k], k] = belief
        p, q = (t.gather(1, offers[:, None]).squeeze(1) for t in (truth, believed[mine]))
        keep = torch.rand(p.shape, generator=self.generator, device=p.device, dtype=p.dtype) * q < p
        rest = (truth - believed[mine]).clamp(min=0)
        # Where nothing is left the two are equal, and the offer is kept.
        instead = self.pick(torch.where(rest.sum(1, keepdim=True) > 0, rest, truth))
        return torch.where(keep, offers, instead), keep
