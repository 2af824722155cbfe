"""Generation with a cache, in three ways: full, routed and exact.

- full runs every layer for every token.
- routed lets each row of the batch leave on its own; only rows still on their way run the deeper layers.
- exact gives the tokens of full, faster: an exit drafts, then the remaining layers run once over the drafted states and
  keep what they agree with (self-speculative decoding, Zhang et al. 2023, arXiv:2309.08168; the early layers' states
  are shared as in LayerSkip, arXiv:2404.16710). No layer runs twice for a token, and rows accept independently.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ease.confidence import max_probability
from ease.drafting import DRAFT_CONFIDENCE, LONGEST_DRAFT, Drafts, draft
from ease.errors import EaseError, check_choice, check_least, check_seed
from ease.exits import Policy, walk
from ease.models import StandardTransformer
from ease.seam import Layout, eval_mode

Mode = Literal["full", "routed", "exact"]


@dataclass(frozen=True)
class Sampling:
    """How the next token follows from logits.

    Args:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest only.
        top_p: draw among the likeliest that together have this probability (Holtzman et al. 2020).
        repetition_penalty: logits of tokens seen before are divided by it, or multiplied where negative (Keskar
            et al. 2019); 1 changes nothing.
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("temperature", self.temperature == 0 or self.temperature >= 1e-6, "0 or at least 1e-6"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not fine:
                raise EaseError(f"{name} must be {rule}, got {getattr(self, name)}")
        if self.seed is not None:
            check_seed(self.seed)
        if self.temperature == 0 and (self.top_k or self.top_p):
            raise EaseError("top_k and top_p choose what is drawn from, and temperature 0 draws nothing: raise it")

    def penalise(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits (n, V) after the penalty on tokens `seen` (n, V)."""
        if bool(logits.isnan().any()):
            raise EaseError("the model predicts no numbers (NaN): its weights are broken, restore them")
        if seen is None:
            return logits
        penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen, penalised, logits)

    def distribution(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits (n, V) -> the probabilities (n, V) that a token is drawn from, at a temperature above 0."""
        logits = self.penalise(logits, seen) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(descending=True)
            outside = ordered.cumsum(1) - ordered >= self.top_p
            probabilities = probabilities.scatter(1, order, ordered.masked_fill(outside, 0.0))
        return probabilities / probabilities.sum(1, keepdim=True)


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
        for at in walk(self.model, ids, policy, layout=layout, read=read, wanted=last, cache=self.cache):
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


@torch.no_grad()
def generate(
    model: StandardTransformer,
    ids: Tensor,
    max_new_tokens: int,
    mode: Mode = "full",
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: int | Sequence[int] = (),
    seed: int | None = None,
    stream: Callable[[Token], None] | None = None,
    draft_exit: int | Literal["auto"] = "auto",
    draft_confidence: float | None = None,
    max_memory: float | None = None,
) -> Generation:
    """Continues each of B prompts by up to `max_new_tokens` tokens.

    Args:
        ids: (B, T) prompts.
        mode: "full", "routed" by the model's own policy, or "exact".
        attention_mask: (B, T), true (or 1) for real tokens, on either side of the padding.
        temperature, top_k, top_p, repetition_penalty, seed: as in `Sampling`. In exact mode with "auto" the number of
            draws depends on the clock, so that there a seed does not repeat a sample: name the exit.
        stop: ids that end a row; they belong to the answer.
        stream: called with each `Token` as it is decided.
        draft_exit: in exact mode, the exit that drafts; "auto" measures on this request and picks the fastest, full
            decoding included.
        draft_confidence: in exact mode, a row stops drafting after a token less confident than this (0.15 by
            default).
        max_memory: bytes that the cache may take (what is free by default); a request beyond is refused before it
            starts.

    Raises:
        EaseError: for prompts without a token or longer than the model's positions, ids outside the vocabulary,
            settings out of range or without a meaning in this mode, exits that the model does not have, weights that
            are no numbers, or a cache that does not fit.
    """
    check_choice("mode", mode, ("full", "routed", "exact"))
    if model.config.num_labels is not None:
        raise EaseError("a classifier writes no text: use ease.tasks.predict, or a model that predicts tokens")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    check_least(1, max_new_tokens=max_new_tokens)
    if ids.ndim != 2 or ids.is_floating_point():
        raise EaseError(f"prompts are integers (B, T), got {ids.dtype} of shape {tuple(ids.shape)}")
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if real.shape != ids.shape or not len(ids) or not bool(real.any(1).all()):
        raise EaseError("every prompt needs at least one real token, and the mask the shape of the ids")
    policy = Policy.own(model) if mode == "routed" else Policy()
    policy.check(model.num_layers)
    if mode == "routed" and not policy.exits:
        raise EaseError("this model has no exits to route at: set exit_layer and routing_threshold, or use mode full")
    if mode != "exact" and draft_exit != "auto":
        raise EaseError(f"draft_exit is for mode exact, and this is {mode}: leave it out")
    if mode != "exact" and draft_confidence is not None:
        raise EaseError(f"draft_confidence is for mode exact, and this is {mode}: leave it out")
    if draft_confidence is not None and not 0 <= draft_confidence <= 1:
        raise EaseError(f"draft_confidence must lie in [0, 1], got {draft_confidence}")
    if draft_exit != "auto" and not 1 <= draft_exit < model.num_layers:
        raise EaseError(f"draft_exit must lie in 1..{model.num_layers - 1}, got {draft_exit}")
    longest, most = int(real.sum(1).max()), model.config.max_positions
    if most is not None and longest + max_new_tokens - 1 > most:  # the last token is not read
        raise EaseError(
            f"{longest} tokens of a prompt and {max_new_tokens} new ones are more than the {most} positions of the "
            "model: shorten the prompt, or ask for fewer"
        )
    capacity = longest + max_new_tokens + (LONGEST_DRAFT if mode == "exact" else 0)
    needed = bytes_per_token(model) * capacity * len(ids)
    allowed = free_memory(next(model.parameters()).device) if max_memory is None else max_memory
    if needed > allowed:
        raise EaseError(
            f"a cache for {len(ids)} rows of {capacity} tokens takes {needed / 1e6:.0f} MB, more than the "
            f"{allowed / 1e6:.0f} MB there are: use fewer rows, or fewer tokens"
        )
    device = next(model.parameters()).device
    ids, real = ids.to(device), real.to(device)
    model.check_ids(ids, model.config.vocab_size)
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(len(ids), model.config.vocab_size, dtype=torch.bool, device=device)
        rows, cols = real.nonzero(as_tuple=True)
        seen[rows, ids[rows, cols]] = True
    start = time.perf_counter()  # making the cache takes time as well
    request = Request(
        model,
        sampling,
        frozenset([stop] if isinstance(stop, int) else stop),
        max_new_tokens,
        model.new_cache(len(ids), capacity, key=policy),
        None if seed is None else torch.Generator(device).manual_seed(seed),
        stream,
        seen,
        [[] for _ in ids],
    )
    request.running = torch.ones(len(ids), dtype=torch.bool, device=device)
    request.current = ids[:, -1]
    with eval_mode(model):
        request.step(ids, real, policy)
        begun = time.perf_counter()
        drafted = Drafts()
        if mode == "exact":
            confidence = DRAFT_CONFIDENCE if draft_confidence is None else draft_confidence
            drafted = draft(request, draft_exit, confidence)
        while bool(request.running.any()):
            request.step(request.current[:, None], request.running[:, None], policy)
    return finish(request, mode, start, begun, drafted)


def bytes_per_token(model: StandardTransformer) -> int:
    """What a cache takes per token: keys and values of every layer, and the state that the token left with."""
    c = model.config
    return (2 * c.num_layers * c.kv_heads * c.head_size + c.dim) * model.embedding.weight.element_size()


def free_memory(device: torch.device) -> float:
    """Bytes that may still be taken on a device; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if told.exists():  # what counts as free there leaves out what the system would give up for a request
        available = next((line for line in told.read_text().splitlines() if line.startswith("MemAvailable")), "")
        return float(available.split()[1]) * 1024 if available else math.inf
    return math.inf


def finish(request: Request, mode: str, start: float, begun: float, drafted: Drafts) -> Generation:
    """The answers as tensors, with what they took."""
    end, rows = time.perf_counter(), request.found
    width = max(map(len, rows))
    tokens, exits = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    confidences = torch.zeros(len(rows), width)
    for row, found in enumerate(rows):
        for column, token in enumerate(found):
            tokens[row, column], exits[row, column], confidences[row, column] = token[1:]
    made = sum(map(len, rows))
    stats: dict[str, Any] = {
        "tokens": made,
        "seconds": end - start,
        "prefill_seconds": begun - start,
        "tokens_per_second": made / (end - start),
        "layers_per_token": request.layers_run / max(1, int(request.cache.length.sum())),
    }
    if mode == "exact":
        rate = drafted.accepted / drafted.drafted if drafted.drafted else None
        stats |= {"draft_exit": drafted.exit, "drafted": drafted.drafted, "accepted": drafted.accepted}
        stats["acceptance"] = rate
    return Generation(tokens, exits, confidences, stats)
