"""Metrics of a run: every line on validation and test, the hard set, the threshold sweep, reliability and decoding.

Nothing is trained here, and nothing is chosen on the test split.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from ease.data.batches import TokenBatches
from ease.evaluation.bounds import auroc
from ease.evaluation.decoding_speed import side_by_side, ways
from ease.evaluation.drafts import score_drafts
from ease.evaluation.scoring import score
from ease.evaluation.sequences import Sequences
from ease.evaluation.shares import threshold_continuing
from ease.flops import parameters_read
from ease.models import StandardTransformer
from ease.progress import Progress
from ease.runs.lines import TrainedLine

SWEEP = (1.0, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1, 0.0)  # shares of tokens that leave at each exit

BATCH, NEW_TOKENS, ROUNDS = 8, 64, 3  # rows per batch (besides a single row), tokens per row, timed rounds
DECODING_SECONDS = 60.0  # after which no further round of a batch begins, since a large model takes minutes for each


def run_metrics(
    lines: Sequence[TrainedLine],
    base: TrainedLine,
    final: TrainedLine,
    val: TokenBatches,
    test: TokenBatches,
    mined: Sequence[Mapping[str, Any]],
    in_sample: bool,
    progress: Progress,
) -> dict[str, Any]:
    """All quality metrics of a run.

    Args:
        lines: the lines of the strategy and the baselines.
        base: the line that the strategy's first later phase was built on; its final model determines the hard set.
        final: the line that the strategy ended with.
        val: validation batches.
        test: test batches.
        mined: what the strategy recorded of each mining pass; a token is hard below the first one's threshold.
        in_sample: whether training used the validation tokens.
        progress: receives the share that is done.

    Returns:
        The parts "lines", "hard", "in_sample", "sweep" and "reliability" of summary.json.
    """
    hard: dict[str, Tensor] = {}
    hard_summary = None
    if mined:
        threshold = mined[0]["threshold"]
        hard = {
            split: score(base.model, batches).confidences < threshold
            for split, batches in (("val", val), ("test", test))
        }
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
        rows.append(_line_metrics(line, final, val, test, hard))
    points = _sweep(final, val, test, hard.get("test"))
    progress.step(1.0)
    return {
        "lines": rows,
        "hard": hard_summary,
        "in_sample": _in_sample(rows, base.name, final.name) if in_sample else None,
        "sweep": {"line": final.name, "split": "test", "points": points},
        "reliability": {"split": "test", "exits": _reliability(final, test)},
    }


def _line_metrics(
    line: TrainedLine, final: TrainedLine, val: TokenBatches, test: TokenBatches, hard: Mapping[str, Tensor]
) -> dict[str, Any]:
    model, depth = line.model, final.model.num_layers
    exits = sorted({*(line.policy.exits or final.policy.exits), model.num_layers})
    trained = [exit for exit in exits if exit <= model.num_layers and exit in model.trained_exits]
    return {
        "name": line.name,
        "num_layers": model.num_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_per_token": parameters_read(model)["bytes"],
        "train_flops": line.total_flops,
        "train_seconds": line.seconds,
        "flops_by": dict(line.flops),
        "curve": line.curve,
        "policy": asdict(line.policy) if line.policy.exits else None,
        "val": score(model, val, line.policy).metrics(hard.get("val"), depth),
        "test": score(model, test, line.policy).metrics(hard.get("test"), depth),
        "exit_quality": {
            str(exit): {k: v for k, v in score(model, test, last=exit).metrics().items() if k in ("ppl", "acc")}
            for exit in trained
        },
    }


def _sweep(final: TrainedLine, val: TokenBatches, test: TokenBatches, hard: Tensor | None) -> list[dict[str, Any]]:
    """Test metrics at thresholds that, on validation, let a given share of tokens leave at every exit."""
    exits, points = final.policy.exits, []
    if not exits:
        return []
    confidences = {exit: score(final.model, val, final.policy.leaving_at(exit)).confidences for exit in exits}
    for share in SWEEP:
        thresholds = tuple(threshold_continuing(confidences[exit], 1 - share) for exit in exits)
        scores = score(final.model, test, replace(final.policy, thresholds=thresholds))
        points.append({"thresholds": list(thresholds), **scores.metrics(hard, final.model.num_layers)})
    return points


def _in_sample(rows: Sequence[Mapping[str, Any]], base: str, final: str) -> dict[str, Any]:
    """Metrics of the original recipe, which trains and scores on the validation split."""
    before = next(row["val"]["hard_ppl"] for row in rows if row["name"] == base)
    after = next(row["val"] for row in rows if row["name"] == final)
    return {
        "split": "validation",
        "hard_ppl_before": before,
        "hard_ppl_after": after["hard_ppl"],
        "improvement": 1 - after["hard_ppl"] / before,
        **{key: after[key] for key in ("ppl", "acc", "shallow_ratio", "compute_cost")},
    }


def _reliability(final: TrainedLine, test: TokenBatches) -> list[dict[str, Any]]:
    """Calibration of the confidence at every exit, and how well it ranks agreement with the last exit (AUROC)."""
    exits, sequences = final.policy.exits, Sequences(final.model, test, final.policy)
    return [
        {
            "layer": exit,
            **score(final.model, test, final.policy.leaving_at(exit)).reliability(),
            "auroc": auroc(*sequences.view(exit)) if exit in exits else None,
        }
        for exit in (*exits, final.model.num_layers)
    ]


def draft_metrics(model: StandardTransformer, test: TokenBatches) -> dict[str, Any] | None:
    """How often a draft brick predicts what the full model does.

    Returns:
        The part "drafts" of summary.json: tokens scored, the size of the draft vocabulary, and the shares of places
        where the first 1, 2, and 3 drafts of a round agree; None for a model without a brick.
    """
    if model.draft_brick is None:
        return None
    metrics = score_drafts(model, test).metrics()
    shares = {name: value for name, value in metrics.items() if name.startswith("agreement")}
    return {"split": "test", "tokens": metrics["tokens"], "vocabulary": model.config.draft_vocabulary, **shares}


def decoding_metrics(
    line: TrainedLine, test: TokenBatches, progress: Callable[[str], Progress]
) -> dict[str, Any] | None:
    """Speed of greedy decoding in every mode on this machine, prompted with the first halves of test sequences.

    Args:
        line: the line to decode with.
        test: test batches.
        progress: makes the progress named "decoding".

    Returns:
        The part "generation" of summary.json; None if the line has no exits or does not generate text.
    """
    if not line.policy.exits or line.model.config.num_labels is not None:
        return None
    model, decoding = copy.copy(line.model), progress("decoding")  # the same weights under the line's policy
    model.policy = line.policy
    half = (test.seq_len + 1) // 2
    steps = min(NEW_TOKENS, test.seq_len + 1 - half)  # the last token is not read, so no position exceeds seq_len
    prompts = test.windows[:BATCH, :half].long()
    batches = sorted({1, len(prompts)})
    rows, start = [], time.perf_counter()
    for at, batch in enumerate(batches):
        report = lambda done, at=at: decoding.step((at + done) / len(batches))  # noqa: E731
        rows += side_by_side(ways(model, prompts[:batch], steps), ROUNDS, report, DECODING_SECONDS)
    return {
        "line": line.name,
        "split": "test",
        "prompt_tokens": half,
        "new_tokens": steps,
        "rounds": min(row["rounds"] for row in rows),
        "seconds": time.perf_counter() - start,
        "rows": rows,
    }
