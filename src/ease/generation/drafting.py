"""How exact decoding drafts: how long a draft is, and which exit drafts, if any.

A round drafts K tokens at one exit and checks them with the layers above (`Request.draft_and_check`). If a draft is
accepted with probability p, the round gives (1 - p^K) / (1 - p) tokens and takes K times the layers up to the exit and
once those above.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ease.policy import Policy

if TYPE_CHECKING:
    from ease.generation.request import Request

LONGEST_DRAFT = 16

DRAFT_CONFIDENCE = 0.15  # measured: higher, and rows of a batch wait for each other; lower, and more is refused

PROBE_SHARE = 0.02  # of a request's estimated time: what finding the fastest draft exit may waste

ROUNDS = 3  # at each exit, to find out


@dataclass
class Drafts:
    """What exact decoding did."""

    exit: int | None = None  # None: full decoding was the fastest, or nothing was left to draft
    drafted: int = 0
    accepted: int = 0


class Drafter:
    """Rounds of drafting at one exit, each as long as pays by what was accepted in the last ones."""

    def __init__(self, request: Request, counts: Drafts, exit: int, draft_confidence: float) -> None:
        self.request, self.counts, self.exit, self.draft_confidence = request, counts, exit, draft_confidence
        self.kept, self.asked = 3.0, 4.0  # before anything is known

    @property
    def length(self) -> int:
        """The K that gives most tokens for its layers, and no more than any row still wants."""
        request = self.request
        left = (request.limit - len(found) for found, on in zip(request.found, request.running.tolist()) if on)
        p, above = min(0.999, self.kept / self.asked), request.model.num_layers - self.exit
        pays = {k: (1 - p**k) / (1 - p) / (k * self.exit + above) for k in range(1, LONGEST_DRAFT + 1)}
        return min(max(left), max(pays, key=lambda k: pays[k]))

    def round(self, *, together: bool = False) -> tuple[float, float]:
        """Drafts and checks once; the tokens that a running row has gained, on average, and that it could have.

        Args:
            together: every row takes as many tokens as the one that takes fewest.
        """
        rows, had = int(self.request.running.sum()), sum(map(len, self.request.found))
        drafted, accepted, refused = self.request.draft_and_check(
            self.exit, self.length, self.draft_confidence, together=together
        )
        self.counts.drafted, self.counts.accepted = self.counts.drafted + drafted, self.counts.accepted + accepted
        # What comes after a refused draft was never asked.
        self.kept, self.asked = 0.8 * self.kept + accepted, 0.8 * self.asked + accepted + refused
        return (sum(map(len, self.request.found)) - had) / rows, (accepted + refused) / rows


def draft(request: Request, draft_exit: int | Literal["auto"], draft_confidence: float) -> Drafts:
    """Drafts and checks until every row is done, or until full decoding is faster."""
    counts = Drafts()
    if draft_exit != "auto":
        drafter, counts.exit = Drafter(request, counts, draft_exit, draft_confidence), draft_exit
        while bool(request.running.any()):
            drafter.round()
        return counts

    full = _pace(request, lambda: request.step(request.current[:, None], request.running[:, None], Policy()))
    allowance, pace = PROBE_SHARE * full * request.limit, {}
    exits = Policy.own(request.model).exits or request.model.early_exits
    drafters = {exit: Drafter(request, counts, exit, draft_confidence) for exit in exits}
    for exit, drafter in drafters.items():
        spent, made, possible = 0.0, 0.0, 0.0
        for _ in range(ROUNDS):
            if not bool(request.running.any()):
                return counts
            at = time.perf_counter()
            # Rows that stand in one place decode faster, should full decoding be what is picked.
            took, could = drafter.round(together=True)
            made, possible = made + took, possible + could
            spent += time.perf_counter() - at
            if spent - full * made > allowance:  # what this exit has cost beyond full decoding
                break
        pace[exit] = spent / max(1e-9, possible)
        allowance -= max(0.0, spent - full * made)
        if allowance <= 0:
            return counts
    best = min(pace, key=lambda e: pace[e], default=None)
    if best is None or pace[best] >= full:
        return counts
    counts.exit = best
    made, at = 0.0, time.perf_counter()
    while bool(request.running.any()):
        made += drafters[best].round()[0]
        if time.perf_counter() - at - full * made > allowance:  # the text has become harder to draft
            counts.exit = None
            break
    return counts


def _pace(request: Request, step: Callable[[], object]) -> float:
    """Seconds of a full step, the middle one of a few."""
    seconds = []
    for _ in range(ROUNDS):
        if bool(request.running.any()):
            at = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - at)
    return statistics.median(seconds) if seconds else 0.0
