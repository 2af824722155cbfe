"""The last-layer path: a training step with loss on the last layer alone, against one that evaluates every head."""

from __future__ import annotations

import gc

import ease
from benchmarks import training
from ease.devices import machine
from experiments.analysis.table import Table
from experiments.harness.lab import Lab


def last_layer(lab: Lab, repeats: int = 5) -> Table:
    """Time both training steps at a lab's sizes, for its depth and twice that.

    Args:
        lab: vocabulary, width and batches.
        repeats: least number of interleaved rounds.
    """
    sizes = {"vocab": lab.vocab_size, "dim": lab.dim, "heads": lab.heads, "seq": lab.seq, "batch": lab.batch}
    rows = []
    gc.freeze()  # garbage collection between the steps skips the objects that exist now
    for layers in sorted({lab.depth, 2 * lab.depth}):
        shape = training.Shape("", layers=layers, **sizes)
        stages = [ease.StageConfig((1, layers - 1), 0.0), ease.StageConfig((layers, layers))]
        config = ease.TrainingConfig(stages=stages)
        last_only, every_head = training.trainer_step(shape, config), training.all_logits_step(shape, config)
        row = training.timed("", shape, 1.0, last_only, every_head, repeats)
        rows.append([str(layers), row.ease, row.other, f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"])
    gc.unfreeze()
    about = machine("cpu")
    return Table(
        "last-layer",
        "A training step with stages of weights 0, ..., 0, 1",
        ["layers", "last head only", "every head", "ratio (range)"],
        rows,
        [
            f"{lab.corpus}: vocabulary {lab.vocab_size:,}, dim {lab.dim}, sequences of {lab.seq}, batches of "
            f"{lab.batch}; random tokens, CPU time of one thread, interleaved steps, the median of the rounds' ratios. "
            f"{about['cpu']}, torch {about['torch']}.",
        ],
    )
