"""Perplexity, accuracy and agreement with the last exit of every exit, before `ease tune` and after.

    python benchmarks/exits.py CHECKPOINT RUN

RUN is what `ease tune CHECKPOINT` wrote. Both models are scored at the exits that were tuned and at the last one, on
the test sequences of the run.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import ease
from ease.data.batches import TokenBatches
from ease.runs.reopen import open_run


@torch.no_grad()
def rows(model: ease.StandardTransformer, exits: list[int], batches: TokenBatches) -> list[tuple[float, float, float]]:
    """Perplexity, accuracy and agreement with the last of `exits`, of each."""
    totals = torch.zeros(len(exits), 3, dtype=torch.float64)
    count = 0
    for x, y, *_ in batches:
        state, first, predictions = model.embed(x), 1, []
        for number, exit in enumerate(exits):
            state, first = model.run(state, first, exit), exit + 1
            logits = model.logits(state, exit).flatten(0, 1).float()
            predictions.append(logits.argmax(-1))
            totals[number, 0] += F.cross_entropy(logits, y.flatten().long(), reduction="sum")
            totals[number, 1] += (predictions[-1] == y.flatten()).sum()
        totals[:, 2] += torch.stack([(best == predictions[-1]).sum() for best in predictions])
        count += y.numel()
    return [(math.exp(loss / count), right / count, same / count) for loss, right, same in totals.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    tuned, _, corpus, data = open_run(given.run)
    batches = TokenBatches(corpus.test, data.seq_len, data.batch_size, max_batches=data.eval_batches)
    exits = [*tuned.early_exits, tuned.num_layers]
    print("| | exit | perplexity | accuracy | agreement |\n|---|---|---|---|---|")
    for name, model in (("before", ease.from_pretrained(given.checkpoint)), ("after", tuned)):
        for exit, (perplexity, accuracy, agreement) in zip(exits, rows(model.eval(), exits, batches), strict=True):
            print(f"| {name} | {exit} | {perplexity:.4g} | {accuracy:.1%} | {agreement:.1%} |", flush=True)


if __name__ == "__main__":
    main()
