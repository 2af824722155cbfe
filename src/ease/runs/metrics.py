"""What a run measures: its lines on validation and test, the hard set, the sweep, reliability, decoding, the explorer.

Nothing is trained here, and nothing is chosen on the test split.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ease.data.batches import TokenBatches
from ease.evaluation.bounds import auroc
from ease.evaluation.calibration import Sequences
from ease.evaluation.decoding_speed import side_by_side, ways
from ease.evaluation.scoring import Scores, score
from ease.models import StandardTransformer
from ease.policy import Policy
from ease.progress import Progress
from ease.runs.lines import Line
from ease.training.mining import Quantile

SWEEP = (1.0, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1, 0.0)  # shares of tokens that leave at each exit

BATCH, NEW_TOKENS, ROUNDS = 8, 64, 3  # rows that are decoded together beside one alone, tokens a row, rounds of timing


def figures(
    lines: Sequence[Line],
    base: Line,
    final: Line,
    val: TokenBatches,
    test: TokenBatches,
    mined: Sequence[Mapping[str, Any]],
    in_sample: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Everything measured: each line, the hard set as `base` fixes it, the sweep, reliability.

    Args:
        base: the line that the strategy's first later phase built on.
        final: the line that the strategy ended with.
        mined: what the strategy says of each mining; the first one's threshold makes a token hard.
        in_sample: whether training saw the validation tokens.
    """
    depth = final.model.num_layers
    hard: dict[str, Any] = {}
    hard_summary = None
    if mined:
        threshold = mined[0]["threshold"]
        for split, batches in (("val", val), ("test", test)):
            hard[split] = score(base.model, batches).confidences < threshold
        hard_summary = {
            "exits": [final.policy.exits[0]],
            "thresholds": [threshold],
            "train_ratio": mined[0]["count"] / mined[0]["of"],
            "train_count": mined[0]["count"],
            "test_ratio": hard["test"].float().mean().item(),
            "fixed_by": f"{base.name}'s final model",
        }
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        progress.step(number / (len(lines) + 1))
        exits = sorted({*(line.policy.exits or final.policy.exits), line.model.num_layers})
        exits = [e for e in exits if e <= line.model.num_layers and e in line.model.trained_exits]
        rows.append(
            {
                "name": line.name,
                "num_layers": line.model.num_layers,
                "train_flops": line.total,
                "train_seconds": line.seconds,
                "flops_by": dict(line.flops),
                "curve": line.curve,
                "policy": asdict(line.policy) if line.policy.exits else None,
                "val": score(line.model, val, line.policy).figures(hard.get("val"), depth),
                "test": score(line.model, test, line.policy).figures(hard.get("test"), depth),
                "exit_quality": {
                    str(e): {k: v for k, v in score(line.model, test, last=e).figures().items() if k in ("ppl", "acc")}
                    for e in exits
                },
            }
        )
    leaving = final.policy.exits
    points = []
    if leaving:
        confidences = {e: score(final.model, val, everyone(final.policy, e)).confidences for e in leaving}
        for share in SWEEP:
            policy = replace(final.policy, thresholds=tuple(sending(confidences[e], 1 - share) for e in leaving))
            point = score(final.model, test, policy).figures(hard.get("test"), depth)
            points.append({"thresholds": list(policy.thresholds), **point})
    progress.step(1.0)
    seen = Sequences(final.model, test, final.policy)
    in_sample_figures = None
    if in_sample:
        before = next(row["val"]["hard_ppl"] for row in rows if row["name"] == base.name)
        after = next(row["val"] for row in rows if row["name"] == final.name)
        in_sample_figures = {
            "split": "validation",
            "hard_ppl_before": before,
            "hard_ppl_after": after["hard_ppl"],
            "improvement": 1 - after["hard_ppl"] / before,
            **{k: after[k] for k in ("ppl", "acc", "shallow_ratio", "compute_cost")},
        }
    return {
        "lines": rows,
        "hard": hard_summary,
        "in_sample": in_sample_figures,
        "sweep": {"line": final.name, "split": "test", "points": points},
        "reliability": {
            "split": "test",
            "exits": [
                {
                    "layer": e,
                    **score(final.model, test, everyone(final.policy, e)).reliability(),
                    "auroc": auroc(*seen.view(e)) if e in leaving else None,
                }
                for e in (*leaving, final.model.num_layers)
            ],
        },
    }


def everyone(policy: Policy, exit: int) -> Policy:
    """Everyone leaves at the exit, with the confidence that the policy's measure has there; at the last one as ever."""
    if exit not in policy.exits:
        return Policy()
    return Policy((exit,), (sending(None, 0.0),), policy.confidence, policy.patience)


def sending(confidences: Any, share: float) -> float:
    """The threshold that sends a share of tokens on: next to 0 where none shall go, 1 where all shall."""
    if share <= 0:
        return 1e-9
    quantile = Quantile()
    quantile.add(confidences)
    return quantile(share) if share < 1 else 1.0


def matched(model: StandardTransformer, val: TokenBatches, exits: tuple[int, ...], like: Scores) -> tuple[float, ...]:
    """Thresholds under which as many tokens pass each exit as in `like`, exit by exit."""
    thresholds: tuple[float, ...] = ()
    for exit in exits:
        going = float((like.exits > exit).float().mean())
        so_far = score(model, val, Policy(exits[: len(thresholds)], thresholds), last=exit)
        arrived = so_far.confidences[so_far.exits == exit]
        share = going * len(so_far.exits) / max(1, len(arrived))
        thresholds = (*thresholds, max(1e-9, sending(arrived, min(1.0, share))))
    return thresholds


def decoding(line: Line, test: TokenBatches, progress: Callable[[str], Progress]) -> dict[str, Any] | None:
    """The ways to decode side by side on this machine, greedy, from the first halves of held-out sequences.

    None where the line has no exits to leave or to draft at, or writes no text.
    """
    if not line.policy.exits or line.model.config.num_labels is not None:
        return None
    model, watching = copy.copy(line.model), progress("decoding")  # the same weights, with the line's policy as its own
    model.exit_layer, model.routing_threshold = line.policy.exits, line.policy.thresholds
    model.policy_options = line.policy.options
    half = (test.seq_len + 1) // 2
    steps = min(NEW_TOKENS, test.seq_len + 1 - half)  # the last token is not read, so no position lies beyond seq_len
    prompts = test.windows[:BATCH, :half].long()
    batches = sorted({1, len(prompts)})
    rows, start = [], time.perf_counter()
    for at, batch in enumerate(batches):
        told = lambda done, at=at: watching.step((at + done) / len(batches))  # noqa: E731
        rows += side_by_side(ways(model, prompts[:batch], steps), ROUNDS, told)
    return {
        "line": line.name,
        "split": "test",
        "prompt_tokens": half,
        "new_tokens": steps,
        "rounds": ROUNDS,
        "seconds": time.perf_counter() - start,
        "rows": rows,
    }
