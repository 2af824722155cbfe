"""Benchmark of the decoding modes, side by side in one process.

On a machine with other load a single time means little. The calls therefore alternate, round by round, and the result
is the ratio of full decoding's time to that of each other mode within a round: its median over the rounds, and its
range.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ease.data.counts import CountTable
from ease.generation.decode import Generation, generate
from ease.interface import Batch
from ease.models import StandardTransformer

Call = Callable[[], Generation | Tensor]

PROMPTS, NEW_TOKENS, ROUNDS = 2, 32, 3  # of `time_shares`: rows, tokens per row, timed rounds


def time_shares(models: Sequence[StandardTransformer], batches: Iterable[Any]) -> list[float]:
    """The time of routed decoding with each model's policy, as a share of the first model's time at full depth.

    All decode the same prompts, the first halves of the first two sequences, one row at a time and greedily; the calls
    alternate. It is the median over three rounds.

    Args:
        models: views of one model, each with a policy.
        batches: batches of (x, y) or `Batch` without padding.
    """
    if not models:
        return []
    x = Batch.of(next(iter(batches))).x
    half = (x.shape[1] + 1) // 2
    steps = min(NEW_TOKENS, x.shape[1] + 1 - half)  # the last token is not read
    prompts = x[:PROMPTS, :half].split(1)
    calls: dict[int, Callable[[], Any]] = {-1: lambda: [generate(models[0], ids, steps) for ids in prompts]}
    for number, model in enumerate(models):
        calls[number] = lambda model=model: [generate(model, ids, steps, "routed") for ids in prompts]  # type: ignore[misc]
    seconds, _ = in_turns(calls, ROUNDS)
    full = seconds.pop(-1)
    return [statistics.median(a / b for a, b in zip(each, full, strict=True)) for each in seconds.values()]


def ways(model: StandardTransformer, ids: Tensor, steps: int, table: CountTable | None = None) -> dict[str, Call]:
    """Calls that continue prompts (B, T) greedily by `steps` tokens, one per decoding mode; full decoding comes first.

    Routed decoding uses `model.policy` and is left out if that has no exits. Exact decoding is included with
    `draft_source="auto"`, with lookup, with the draft brick if there is one, and with each exit of the policy (without
    one, each trained exit). "auto" and lookup draft from the table as well, if there is one; then lookup without it is
    another call.
    """
    policy = model.policy
    calls: dict[str, Call] = {"full": lambda: generate(model, ids, steps)}
    if policy.exits:
        calls["routed, own policy"] = lambda: generate(model, ids, steps, "routed")
    calls["exact, auto"] = lambda: generate(model, ids, steps, "exact", count_table=table)
    if table is not None:
        calls["exact, lookup and table"] = lambda: generate(
            model, ids, steps, "exact", draft_source="lookup", count_table=table
        )
    calls["exact, lookup"] = lambda: generate(model, ids, steps, "exact", draft_source="lookup")
    if model.draft_brick is not None:
        calls["exact, brick"] = lambda: generate(model, ids, steps, "exact", draft_source="brick")
    for exit in policy.exits or model.early_exits:
        calls[f"exact, exit {exit}"] = lambda e=exit: generate(model, ids, steps, "exact", draft_exit=e)  # type: ignore[misc]
    return calls


def in_turns(
    calls: Mapping[Any, Callable[[], Any]],
    rounds: int,
    progress: Callable[[float], object] = lambda done: None,
    clock: Callable[[Any], float] | None = None,
    limit: float = math.inf,
) -> tuple[dict[Any, list[float]], dict[Any, Any]]:
    """Runs calls alternately and times them.

    Args:
        calls: by name.
        rounds: timed runs of each call, after one that is not timed because it allocates.
        progress: receives the share of the runs done so far.
        clock: returns the seconds of a call from its result; by default its wall-clock time.
        limit: seconds after which no further round begins. At least one timed round is run.

    Returns:
        The seconds of every timed run by name, and the last result by name.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    answers: dict[Any, Any] = {}
    began = time.perf_counter()
    for turn in range(rounds + 1):
        if turn > 1 and time.perf_counter() - began > limit:
            progress(1.0)
            break
        # The order is reversed every other round, so that no call always runs after the same one.
        for place, name in enumerate(list(calls)[:: -1 if turn % 2 else 1], 1):
            start = time.perf_counter()
            answers[name] = calls[name]()
            if turn:
                seconds[name].append(clock(answers[name]) if clock else time.perf_counter() - start)
            progress((turn + place / len(calls)) / (rounds + 1))
    return seconds, answers


def side_by_side(
    calls: Mapping[str, Call],
    rounds: int,
    progress: Callable[[float], object] = lambda done: None,
    limit: float = math.inf,
) -> list[dict[str, Any]]:
    """Compare speed and tokens of every call with those of the first call.

    The speed of a call is the median speed of the first call times the call's ratio, so that both columns come from the
    same rounds and always agree.

    Args:
        calls: name -> call that returns a `Generation`, or the tokens (B, N) if another library generated them.
        rounds, progress, limit: as in `in_turns`.

    Returns:
        One row per call with way, batch, tokens_per_second, ratio (the median over the rounds; above 1 is faster than
        the first call) with low and high (its range), rounds, same_tokens, and for a `Generation` layers_per_token,
        acceptance, tokens_per_round and draft_source of its last round.
    """
    kept = ("layers_per_token", "acceptance", "tokens_per_round", "draft_source")
    seconds, answers = in_turns(calls, rounds, progress, limit=limit)
    first = next(iter(calls))
    tokens = {name: a.tokens if isinstance(a, Generation) else a.cpu() for name, a in answers.items()}
    first_speed = tokens[first].numel() / statistics.median(seconds[first])
    rows = []
    for name, answer in answers.items():
        ratios = [a / b for a, b in zip(seconds[first], seconds[name], strict=True)]
        ratio = statistics.median(ratios)
        stats = answer.stats if isinstance(answer, Generation) else {}
        rows.append(
            {
                "way": name,
                "batch": len(tokens[name]),
                "tokens_per_second": first_speed * ratio,
                "ratio": ratio,
                "low": min(ratios),
                "high": max(ratios),
                "rounds": len(ratios),
                "same_tokens": (tokens[name] == tokens[first]).float().mean().item(),
                **{key: stats.get(key) for key in kept},
            }
        )
    return rows
