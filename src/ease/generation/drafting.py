"""Exact decoding: drafts at an exit, verification by the layers above it, and the choice of exit and draft length.

One round drafts up to K tokens at an exit and verifies all of them in one run of the layers above, over the drafted
states. If a draft is accepted with probability p, the round yields (1 - p^K) / (1 - p) tokens and costs K times the
layers up to the exit and once those above; K is chosen to maximize the tokens per layer. With `draft_exit="auto"` the
exit is measured on the request itself, since which exit pays depends on the text and the machine; full decoding is one
of the candidates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ease.errors import EaseError
from ease.generation.request import Request
from ease.generation.sampling import NAN_LOGITS
from ease.interface import Layout, to_device
from ease.routing.confidence import at_least_float32, max_probability

LONGEST_DRAFT = 16  # tokens that a round drafts at most

DRAFT_CONFIDENCE = 0.15  # measured: above it rows of a batch wait for each other, below it more drafts are rejected

PROBE_SHARE = 0.02  # share of a request's estimated time that the search for the fastest draft exit may waste

PROBE_ROUNDS = 3  # rounds at each exit during that search


@dataclass
class DraftCounts:
    """What exact decoding did, for `Generation.stats`."""

    exit: int | None = None  # None: full decoding was the fastest, or no token was left to draft
    drafted: int = 0
    accepted: int = 0


def decode_exactly(request: Request, draft_exit: int | Literal["auto"], draft_confidence: float) -> DraftCounts:
    """Drafts and verifies until every row is finished, or until full decoding is faster.

    Args:
        draft_exit: the exit that drafts; "auto" measures the exits and full decoding, and uses the fastest.
        draft_confidence: a row stops drafting after a token less confident than this.
    """
    counts = DraftCounts()
    if draft_exit == "auto":
        _decode_at_fastest_exit(request, counts, draft_confidence)
        return counts
    counts.exit = draft_exit
    drafter = Drafter(request, counts, draft_exit, draft_confidence)
    while request.unfinished:
        drafter.round()
    return counts


def _decode_at_fastest_exit(request: Request, counts: DraftCounts, draft_confidence: float) -> None:
    """Times a few full steps and a few rounds at every exit, then drafts at the fastest exit while that pays."""
    full = _seconds_per_full_step(request)
    allowance = PROBE_SHARE * full * request.max_new_tokens
    seconds_per_token: dict[int, float] = {}
    exits = request.model.policy.exits or request.model.early_exits
    drafters = {exit: Drafter(request, counts, exit, draft_confidence) for exit in exits}
    for exit, drafter in drafters.items():
        probe = _probe(drafter, full, allowance)
        if probe is None:
            return
        seconds_per_token[exit] = probe.seconds / max(1e-9, probe.possible)
        allowance -= max(0.0, probe.seconds - full * probe.gained)
        if allowance <= 0:
            return
    best = min(seconds_per_token, key=lambda exit: seconds_per_token[exit], default=None)
    if best is None or seconds_per_token[best] >= full:
        return
    counts.exit = best
    gained = 0.0
    start = time.perf_counter()
    while request.unfinished:
        gained += drafters[best].round().gained
        if time.perf_counter() - start - full * gained > allowance:  # the text has become harder to draft
            counts.exit = None
            return


def _seconds_per_full_step(request: Request) -> float:
    """Median time of a few steps at full depth; 0 if every row is finished."""
    seconds = []
    for _ in range(PROBE_ROUNDS):
        if request.unfinished:
            start = time.perf_counter()
            request.full_step()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) if seconds else 0.0


class Probe(NamedTuple):
    """Measurement of a few rounds at one exit; tokens are means over the running rows."""

    seconds: float
    gained: float
    possible: float


def _probe(drafter: Drafter, full: float, allowance: float) -> Probe | None:
    """Measures an exit, less often once it has cost `allowance` seconds more than full decoding at `full` per token.

    Returns None if every row finishes first.
    """
    seconds, gained, possible = 0.0, 0.0, 0.0
    for _ in range(PROBE_ROUNDS):
        if not drafter.request.unfinished:
            return None
        start = time.perf_counter()
        # Rows of equal length decode faster, in case full decoding is chosen.
        result = drafter.round(equal_lengths=True)
        gained += result.gained
        possible += result.possible
        seconds += time.perf_counter() - start
        if seconds - full * gained > allowance:
            break
    return Probe(seconds, gained, possible)


class Round(NamedTuple):
    """Tokens of one round, as means over the rows that were running."""

    gained: float
    """Tokens appended."""
    possible: float
    """Tokens that would have been appended without `equal_lengths`."""


class Drafter:
    """Rounds of drafting at one exit; the draft length follows the acceptance rate of the recent rounds."""

    def __init__(self, request: Request, counts: DraftCounts, exit: int, draft_confidence: float) -> None:
        self.request, self.counts, self.exit, self.draft_confidence = request, counts, exit, draft_confidence
        # Exponentially decayed counts, whose ratio is the acceptance rate; it starts at 3 of 4.
        self.accepted, self.verified = 3.0, 4.0

    @property
    def length(self) -> int:
        """The K with the most expected tokens per layer, at most what the longest running row still needs."""
        request = self.request
        p = min(0.999, self.accepted / self.verified)
        above = request.model.num_layers - self.exit
        tokens_per_layer = {k: (1 - p**k) / (1 - p) / (k * self.exit + above) for k in range(1, LONGEST_DRAFT + 1)}
        best = max(tokens_per_layer, key=lambda k: tokens_per_layer[k])
        running = request.running.tolist()
        missing = (request.max_new_tokens - len(answer) for answer, on in zip(request.answers, running) if on)
        return min(max(missing), best)

    def round(self, *, equal_lengths: bool = False) -> Round:
        """Drafts and verifies once.

        Args:
            equal_lengths: every row appends as many tokens as the row with the fewest.
        """
        rows = int(self.request.running.sum())
        before = self.request.num_generated
        drafts = draft(self.request, self.exit, self.length, self.draft_confidence)
        drafted, accepted, rejected = verify(self.request, drafts, equal_lengths=equal_lengths)
        self.counts.drafted += drafted
        self.counts.accepted += accepted
        # Drafts after a rejected one say nothing about the acceptance rate: they are not counted as verified.
        self.accepted = 0.8 * self.accepted + accepted
        self.verified = 0.8 * self.verified + accepted + rejected
        return Round((self.request.num_generated - before) / rows, (accepted + rejected) / rows)


class Drafts(NamedTuple):
    """Drafted tokens of one round: K places, of which each row uses the first ones."""

    exit: int
    tokens: Tensor
    """(B, K) ids."""
    mask: Tensor
    """(B, K) true where a row has drafted, on the host."""
    places: Tensor
    """(M,) index of each draft in the flattened (B, K)."""
    confidences: Tensor
    """(B, K)."""
    distributions: Sequence[Tensor | None]
    """Per place, the probabilities (n, V) that its n tokens were drawn from; None when greedy."""
    states: Tensor
    """(B, K, D) after layer `exit`."""
    start: Any
    """(B,) length of each row in the cache before the round."""


def draft(request: Request, exit: int, length: int, draft_confidence: float) -> Drafts:
    """Drafts up to `length` tokens per row at an exit; a row stops after a token below `draft_confidence`."""
    model, start = request.model, request.cache.length
    drafting, current = request.running.clone(), request.current
    seen = None if request.seen is None else request.seen.clone()
    states, tokens, distributions, confidences, masks = [], [], [], [], []
    for _ in range(length):
        rows = request.index(drafting)
        layout = Layout(torch.zeros(len(drafting), 1, dtype=torch.long), drafting.long()[:, None] - 1)
        state = model.run(model.embed(current[:, None]), 1, exit, layout=layout, cache=request.cache)
        logits = model.logits(state[rows, 0], exit)
        chosen, distribution = request.choose(logits, None if seen is None else seen[rows])
        drafted, confidence = current.clone(), at_least_float32(logits.new_zeros(len(start)))
        drafted[rows], confidence[rows] = chosen, max_probability(logits)
        states.append(state)
        tokens.append(drafted)
        distributions.append(distribution)
        confidences.append(confidence)
        masks.append(drafting)
        current = drafted
        if seen is not None:
            seen = seen.clone()
            seen[rows] = seen[rows].scatter(1, chosen[:, None], True)
        confident, nan = torch.stack((confidence >= draft_confidence, drafted < 0)).cpu()
        if bool(nan.any()):
            raise EaseError(NAN_LOGITS)
        drafting = drafting & confident
        if not bool(drafting.any()):
            break
    mask = torch.stack(masks, 1)
    return Drafts(
        exit,
        torch.stack(tokens, 1),
        mask,
        to_device(mask.flatten().nonzero().squeeze(1), current.device),
        torch.stack(confidences, 1),
        distributions,
        torch.cat(states, 1),
        start,
    )


def verify(request: Request, drafts: Drafts, *, equal_lengths: bool = False) -> tuple[int, int, int]:
    """Runs the layers above the exit over the drafted states and appends what full decoding confirms or replaces.

    Args:
        equal_lengths: no row appends more tokens than another, so that rows of equal length stay so.

    Returns:
        The number of tokens drafted, of tokens accepted, and of rows with a rejected draft.
    """
    model, mask, last = request.model, drafts.mask, request.model.num_layers
    request.layers_run += last * int(mask.sum())
    request.cache.resume(drafts.start, mask.shape[1])
    deep = model.run(drafts.states, drafts.exit + 1, last, active=mask, cache=request.cache)
    replaced, confirmed = _accept(request, drafts, model.logits(deep.flatten(0, 1)[drafts.places], last))
    tokens = drafts.tokens.flatten().index_copy(0, drafts.places, replaced).view_as(drafts.tokens)
    accepted = torch.zeros_like(mask).masked_scatter(mask, confirmed.cpu())
    # A row appends its accepted drafts up to the first rejected one, which is replaced by full decoding's token.
    leading = accepted.long().cumprod(1).sum(1)
    counts = torch.minimum(leading + 1, mask.sum(1))
    if equal_lengths:  # the omitted tokens are decoded again later, with the same result or distribution
        counts = counts.clamp(max=int(counts[counts > 0].min()))
    request.cache.cut(drafts.start + counts.numpy())
    request.append(tokens, torch.full_like(tokens, drafts.exit), drafts.confidences, counts)
    return int(mask.sum()), int(leading.sum()), int((leading < mask.sum(1)).sum())


def _accept(request: Request, drafts: Drafts, logits: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the M drafts, the token that full decoding gives (M,), and whether the draft is accepted (M,).

    Args:
        logits: (M, V) of the last exit.
    """
    seen, drafted = _seen_before(request, drafts), drafts.tokens.flatten()[drafts.places]
    if request.sampling.greedy:
        tokens, _ = request.choose(logits, seen)
        return tokens, tokens == drafted
    target = request.sampling.distribution(logits, seen)
    # A draft is accepted with probability min(1, target / proposal); otherwise a token is drawn from the part of the
    # target that exceeds the proposal (Leviathan et al. 2023, arXiv:2211.17192).
    by_place = target.new_zeros(*drafts.tokens.shape, target.shape[1])
    for k, distribution in enumerate(drafts.distributions):
        assert distribution is not None
        by_place[request.index(drafts.mask[:, k]), k] = distribution
    proposal = by_place.flatten(0, 1)[drafts.places]
    p, q = (probabilities.gather(1, drafted[:, None]).squeeze(1) for probabilities in (target, proposal))
    accepted = torch.rand(p.shape, generator=request.generator, device=p.device, dtype=p.dtype) * q < p
    excess = (target - proposal).clamp(min=0)
    # Without any excess the two distributions are equal, and the draft is accepted.
    replacement = request.draw(torch.where(excess.sum(1, keepdim=True) > 0, excess, target))
    return torch.where(accepted, drafted, replacement), accepted


def _seen_before(request: Request, drafts: Drafts) -> Tensor | None:
    """(M, V) for each of the M drafts, the tokens seen before it; None without a repetition penalty."""
    if request.seen is None:
        return None
    seen, parts = request.seen.clone(), []
    for tokens, mask in zip(drafts.tokens.unbind(1), drafts.mask.unbind(1), strict=True):
        parts.append(seen.clone())
        rows = request.index(mask)
        seen[rows] = seen[rows].scatter(1, tokens[rows][:, None], True)
    return torch.stack(parts, 1).flatten(0, 1)[drafts.places]
