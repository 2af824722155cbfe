"""The weighted loss over exits, in the memory of a single exit.

The logits of an exit exist only while its part of the gradient is computed, and the gradients of the shared head are
accumulated in one buffer. Memory therefore does not grow with the number of exits.

The loss of a token is an objective: cross entropy against the text, distillation from the last exit, or both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ease.devices import in_autocast
from ease.errors import EaseError, check_choice
from ease.interface import IGNORE, capped, to_device
from ease.routing.confidence import at_least_float32
from ease.routing.forward import DEVICE_LOGITS
from ease.training.distributed import total

# Logits that exist at a time in PyTorch's fused loss on a CPU: 8 MiB in float32. Its automatic choice is up to twice
# slower at small widths; more logits spill from the cache, and fewer than 128 tokens make slow products.
CHUNK = 2**21


def chunk_rows(head: Tensor) -> int:
    """Tokens whose logits under head (V, D) exist at a time."""
    return max(128, (CHUNK if head.device.type == "cpu" else DEVICE_LOGITS) // head.shape[0])


def token_loss_sum(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy (nats) of states (N, D) under head (V, D) against targets (N,)."""
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows(head))
        return F.linear_cross_entropy(states, head, targets, reduction="sum", options=options)
    return F.cross_entropy(F.linear(states, head), targets, reduction="sum")


class Objective(Protocol):
    """The loss of a token at an exit."""

    @property
    def teacher(self) -> bool:
        """Whether it needs the last exit's distribution, so that all layers run."""

    def parts(
        self, states: Tensor, head: Tensor, targets: Tensor, teacher: Tensor | None, softcap: float | None
    ) -> Iterator[Tensor]:
        """Summed losses (nats) of chunks of the tokens, each small enough for its logits to fit in memory.

        Args:
            states, teacher: (N, D) normalized states at the exit and at the last one.
            head: (V, D).
            targets: (N,), -100 where not scored.
            softcap: soft cap of the logits.
        """


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy against the text."""

    teacher = False

    def parts(
        self, states: Tensor, head: Tensor, targets: Tensor, teacher: Tensor | None, softcap: float | None
    ) -> Iterator[Tensor]:
        # The fused loss has no cap and no autocast, and in half precision it would round the sum to the model's dtype.
        if softcap is None and states.dtype.itemsize >= 4 and not in_autocast(states.device):
            yield token_loss_sum(states, head, targets)
            return
        rows = chunk_rows(head)
        for h, y in zip(states.split(rows), targets.split(rows), strict=True):
            yield F.cross_entropy(capped(at_least_float32(F.linear(h, head)), softcap), y, reduction="sum")


@dataclass(frozen=True)
class Distillation:
    """Distillation from the last exit's distribution (Hinton et al. 2015, arXiv:1503.02531).

    The loss is share * temperature^2 * KL(last exit || exit), both softened, + (1 - share) * cross entropy.
    """

    temperature: float = 1.0
    share: float = 1.0
    teacher = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise EaseError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.share <= 1:
            raise EaseError(f"the share of distillation must lie in (0, 1], got {self.share}: use cross entropy for 0")

    def parts(
        self, states: Tensor, head: Tensor, targets: Tensor, teacher: Tensor | None, softcap: float | None
    ) -> Iterator[Tensor]:
        assert teacher is not None
        tau, rows = self.temperature, chunk_rows(head)
        for h, t, y in zip(states.split(rows), teacher.split(rows), targets.split(rows), strict=True):
            logits = capped(at_least_float32(F.linear(h, head)), softcap)
            with torch.no_grad():
                goal = F.log_softmax(capped(at_least_float32(F.linear(t, head)), softcap) / tau, -1)
            apart = F.kl_div(F.log_softmax(logits / tau, -1), goal, reduction="none", log_target=True).sum(-1)
            loss = self.share * tau**2 * apart.masked_fill(y == IGNORE, 0).sum()
            if self.share < 1:
                loss = loss + (1 - self.share) * F.cross_entropy(logits, y, reduction="sum")
            yield loss


def objective_named(name: str, temperature: float = 1.0) -> Objective:
    """The objective by name: "cross-entropy", "distillation", or "both" in equal parts."""
    check_choice("objective", name, ("cross-entropy", "distillation", "both"))
    if name == "cross-entropy":
        if temperature != 1:
            raise EaseError(
                f"temperature {temperature} belongs to distillation: leave it out, or set another objective"
            )
        return CrossEntropy()
    return Distillation(temperature, 1.0 if name == "distillation" else 0.5)


class Term(NamedTuple):
    """One exit's part of the loss: a weight on the mean over its scored tokens."""

    states: Tensor
    """(N, D) normalized states at the exit."""
    targets: Tensor
    """(N,) token ids; -100 is not scored."""
    weight: float
    objective: Objective = CrossEntropy()
    """The loss of a token."""
    teacher: Tensor | None = None
    """(N, D) normalized states at the last exit, for an objective with a teacher; they receive no gradient."""
    softcap: float | None = None
    """Soft cap of the logits."""
    num_scored: int | None = None
    """Number of targets of this process that are not -100; None counts them."""
    exit: int = 0
    """The exit's layer."""

    def parts(self, states: Tensor, head: Tensor) -> Iterator[Tensor]:
        """Summed losses (nats) of chunks of the tokens, with `states` (N, D) in place of the term's own."""
        return self.objective.parts(states, head, self.targets, self.teacher, self.softcap)

    def taught(self, seen: Tensor, teacher: Tensor) -> list[Term]:
        """The term with a teacher (n, D) for the n tokens with `seen` (N,), and cross entropy for all other tokens."""
        with_teacher, tokens = total(int(seen.sum()), len(seen))
        if with_teacher == tokens:
            return [self._replace(teacher=teacher)]
        share = with_teacher / tokens
        part, rest = (
            self._replace(
                states=self.states[tokens], targets=self.targets[tokens], weight=part * self.weight, num_scored=None
            )
            for mask, part in ((seen, share), (~seen, 1 - share))
            for tokens in [to_device(mask.nonzero().squeeze(1), self.states.device)]
        )
        return [part._replace(teacher=teacher), rest._replace(objective=CrossEntropy())]


class _ExitLosses(torch.autograd.Function):
    """Sum over terms of weight * loss, whose gradients are computed term by term in the forward pass."""

    @staticmethod
    def forward(ctx: Any, head: Tensor, terms: Sequence[Term], sums: dict[int, Tensor], *states: Tensor) -> Tensor:
        loss_sum, grads = at_least_float32(head.new_zeros(())), []
        w = head.detach().requires_grad_(ctx.needs_input_grad[0])
        for term in terms:
            h = term.states.detach().requires_grad_()
            with torch.enable_grad():
                for loss in term.parts(h, w):
                    # Accumulates in .grad over chunks and exits; the logits of a chunk are freed before the next.
                    (term.weight * loss).backward()
                    loss_sum += term.weight * loss.detach()
                    sums[term.exit] = sums[term.exit] + loss.detach() if term.exit in sums else loss.detach()
            grads.append(torch.zeros_like(h) if h.grad is None else h.grad)  # a process may have no token of a term
        ctx.grads = (w.grad, grads)
        return loss_sum

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (scale,) = upstream
        head_grad, grads = ctx.grads
        ctx.grads = None
        return None if head_grad is None else head_grad * scale, None, None, *(g * scale for g in grads)


def exit_loss(head: Tensor, terms: Sequence[Term], exit_losses: dict[int, Tensor] | None = None) -> Tensor:
    """Sum over terms of weight * mean loss (nats) over the term's scored tokens; 0 where a term scores none.

    Args:
        head: (V, D), the shared output head.
        terms: one or more, each with tokens of its own.
        exit_losses: filled, where gradients are enabled, with the mean loss (nats) of the terms of each exit.

    Returns:
        A scalar. Of several processes, each gets its own tokens' part of every mean over the tokens of all.
    """
    counts = total(*(int((t.targets != IGNORE).sum()) if t.num_scored is None else t.num_scored for t in terms))
    terms = [term._replace(weight=term.weight / max(1, count)) for term, count in zip(terms, counts, strict=True)]
    if torch.is_grad_enabled():
        sums: dict[int, Tensor] = {}
        states = (term.states for term in terms)
        loss: Tensor = _ExitLosses.apply(head, terms, sums, *states)  # type: ignore[no-untyped-call]
        if exit_losses is not None:
            scored = {exit: sum(n for n, t in zip(counts, terms, strict=True) if t.exit == exit) for exit in sums}
            exit_losses |= {exit: loss_sum / scored[exit] for exit, loss_sum in sums.items() if scored[exit]}
        return loss
    parts = [t.weight * part for t in terms for part in t.parts(t.states, head)]
    return torch.stack(parts).sum()
