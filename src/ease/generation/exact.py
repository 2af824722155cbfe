"""Exact decoding: rounds in which a source drafts tokens and one pass of the model checks them.

The pass reads the last token of each row and its drafts. The leading drafts that full decoding would have chosen are
kept, and after them the token that it chooses itself, so that a round of K accepted drafts appends K + 1 tokens
(speculative decoding, Leviathan et al. 2023, arXiv:2211.17192). With the source "auto", every source is measured on the
request itself, since which one pays depends on the text and the machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ease.generation.request import Request
from ease.generation.sources import LONGEST_DRAFT, Drafts, Pace, Source
from ease.interface import Layout, to_device
from ease.routing.confidence import max_probability

PROBE_ROUNDS = 3  # rounds of each source that are measured before one is chosen

SHARPNESS = 2  # how much the rows that will take most rounds decide about the number of rounds

PROBE_SHARE = 0.02  # share of a request's estimated time that these rounds may waste


@dataclass
class DraftCounts:
    """What exact decoding did, for `Generation.stats`."""

    source: str = "none"  # the one that appended most tokens
    rounds: int = 0
    rows: int = 0  # running rows, summed over the rounds
    drafted: int = 0
    accepted: int = 0


class Drafter:
    """Rounds of one source, with a measured price of its drafts.

    Args:
        least: the chain probability below which a draft is not offered; None: the measured price of a draft.
    """

    def __init__(self, source: Source, counts: DraftCounts, least: float | None) -> None:
        self.source, self.counts, self.least = source, counts, least
        self.pace, self.tokens = Pace(source.prior), 0

    def round(self, *, equal_lengths: bool = False) -> None:
        """Drafts and checks once.

        Args:
            equal_lengths: every row appends as many tokens as the row with the fewest, so that rows of equal length
                stay so. The omitted tokens are decoded again later, with the same result or distribution.
        """
        request = self.source.request
        begin, before, rows = time.perf_counter(), request.num_generated, int(request.running.sum())
        done = np.array([len(answer) for answer in request.answers])
        missing = np.where(request.running.numpy(), request.max_new_tokens - done, 0)
        scaling = request.model.config.rope_scaling
        limit = None if scaling is None else scaling.limit
        # The next pass reads each row's last token and its drafts; a round ends with one token of the model's own.
        room = missing if limit is None else np.minimum(missing, limit - request.cache.length)
        limits = torch.from_numpy((room - 1).clip(0, LONGEST_DRAFT))
        if self.least is None:
            rounds_left = missing / (done + 1)  # in rounds that gave as much as the average so far
            shares = (rounds_left / rounds_left.max()) ** SHARPNESS
            least = self.pace.prices(shares / shares.sum())
        else:
            least = np.full(len(done), self.least)
        start = request.cache.length
        drafts = self.source.offer(limits, least)
        accepted = check(request, drafts, start, equal_lengths=equal_lengths)
        self.source.learn(drafts, accepted)
        drafted, gained = int(drafts.mask.sum()), request.num_generated - before
        possible = rows + int(accepted.sum()) if equal_lengths else gained
        if self.counts.rounds:  # the first round of a request may also allocate and reorder weights
            self.pace.record(rows + drafted, time.perf_counter() - begin, possible)
        self.tokens += gained
        self.counts.rounds += 1
        self.counts.rows += rows
        self.counts.drafted += drafted
        self.counts.accepted += int(accepted.sum())


def decode_exactly(request: Request, sources: Sequence[Source], least: float | None) -> DraftCounts:
    """Drafts and checks until every row is finished.

    Args:
        sources: what drafts; of several the fastest, measured on the request.
        least: as in `Drafter`.
    """
    counts = DraftCounts()
    drafters = [Drafter(source, counts, least) for source in sources]
    if len(drafters) > 1:
        _probe(drafters)
    while request.unfinished:
        min(drafters, key=lambda drafter: drafter.pace.seconds_per_token).round()
    counts.source = max(drafters, key=lambda drafter: drafter.tokens).source.name
    return counts


def _probe(drafters: Sequence[Drafter]) -> None:
    """Measures each source, less often once the search has cost its share of the time."""
    request = drafters[0].source.request
    wasted, fastest = 0.0, float("inf")
    for drafter in drafters:
        begin, before = time.perf_counter(), request.num_generated
        for _ in range(PROBE_ROUNDS):
            if not request.unfinished:
                return
            drafter.round(equal_lengths=True)
            seconds = time.perf_counter() - begin
            lost = seconds - fastest * (request.num_generated - before)  # -inf for the first source
            if lost + wasted > PROBE_SHARE * fastest * request.max_new_tokens * len(request.answers):
                break
        wasted += max(0.0, lost)
        fastest = min(fastest, drafter.pace.seconds_per_token)


def check(request: Request, drafts: Drafts, start: NDArray[np.int64], *, equal_lengths: bool = False) -> Tensor:
    """Runs the model over current tokens and drafts and appends what full decoding confirms, and its next token.

    Args:
        start: (B,) length of each row in the cache before the round.
        equal_lengths: as in `Drafter.round`.

    Returns:
        (B,) leading drafts of each row that were accepted, on the host.
    """
    model, last, device = request.model, request.model.num_layers, request.current.device
    read = torch.cat((request.running[:, None], drafts.mask), 1)  # (B, K + 1) tokens that the pass reads
    if drafts.states is None:
        ids = torch.cat((request.current[:, None], drafts.tokens), 1)
        layout = Layout.of_padding(read)
        states = model.embed(ids, layout=layout, cache=request.cache)
        states = model.run(states, 1, last, layout=layout, cache=request.cache)
    else:
        request.cache.resume(start, read.shape[1])
        states = model.run(drafts.states, drafts.exit + 1, last, active=read, cache=request.cache)
    request.layers_run += last * int(read.sum())
    places = to_device(read.flatten().nonzero().squeeze(1), device)
    logits = model.logits(states.flatten(0, 1)[places], last)
    chosen, right = _accept(request, drafts, read, places, logits)
    found = torch.stack((chosen.float(), right.float(), max_probability(logits).float()))
    result = found.new_zeros(3, read.numel())  # in one tensor, to wait for the device once
    result[:, places] = found
    tokens, accepted, confidences = result.view(3, *read.shape).cpu().unbind()
    leading = accepted.long().cumprod(1).sum(1)
    counts = (leading + 1) * request.running
    if equal_lengths:
        counts = counts.clamp(max=int(counts[request.running].min()))
    # A confirmed draft left at the exit that drafted it; every other token is full decoding's.
    drafted = (torch.arange(read.shape[1]) < leading[:, None]) & (drafts.states is not None)
    exits = torch.where(drafted, drafts.exit, last)
    said = F.pad(torch.from_numpy(drafts.confidences), (0, 1))
    request.cache.cut(start + counts.numpy())
    request.append(tokens.long(), exits, torch.where(drafted, said, confidences), counts)
    return leading


def _accept(request: Request, drafts: Drafts, read: Tensor, places: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the M tokens read, what full decoding has next (M,), and whether the draft there is accepted (M,).

    Args:
        read: (B, K + 1) tokens that were read, on the host.
        places: (M,) their indices in the flattened `read`.
        logits: (M, V) of the last exit.
    """
    seen, device = _seen_before(request, drafts, read, places), request.current.device
    # The draft that follows each token; -1 where there is none.
    following = torch.where(to_device(drafts.mask, device), drafts.tokens, -1)
    drafted = F.pad(following, (0, 1), value=-1).flatten()[places]
    if request.sampling.greedy:
        tokens, _ = request.choose(logits, seen)
        return tokens, tokens == drafted
    target = request.sampling.distribution(logits, seen)
    # A draft is accepted with probability min(1, target / proposal); otherwise a token is drawn from the part of the
    # target that exceeds the proposal. Without a draft the proposal is zero, and the token is drawn from the target.
    by_place = target.new_zeros(*read.shape, target.shape[1])
    for k, (rows, distribution) in enumerate(drafts.distributions):
        by_place[request.index(rows), k] = distribution
    proposal, exists = by_place.flatten(0, 1)[places], drafted >= 0
    if not drafts.distributions:
        proposal.scatter_(1, drafted.clamp(min=0)[:, None], exists[:, None].to(proposal))
    proposal = proposal * exists[:, None]
    p, q = (part.gather(1, drafted.clamp(min=0)[:, None]).squeeze(1) for part in (target, proposal))
    accepted = (torch.rand(p.shape, generator=request.generator, device=p.device, dtype=p.dtype) * q < p) & exists
    excess = (target - proposal).clamp(min=0)
    # Without any excess the two distributions are equal, and the draft is accepted.
    replacement = request.draw(torch.where(excess.sum(1, keepdim=True) > 0, excess, target))
    return torch.where(accepted, drafted, replacement), accepted


def _seen_before(request: Request, drafts: Drafts, read: Tensor, places: Tensor) -> Tensor | None:
    """(M, V) for each of the M tokens read, the tokens seen up to it; None without a repetition penalty."""
    if request.seen is None:
        return None
    seen = request.seen.clone()
    parts = [seen]
    for tokens, mask in zip(drafts.tokens.unbind(1), drafts.mask.unbind(1), strict=True):
        rows, seen = request.index(mask), seen.clone()
        seen[rows] = seen[rows].scatter(1, tokens[rows][:, None], True)
        parts.append(seen)
    return torch.stack(parts, 1).flatten(0, 1)[places]
