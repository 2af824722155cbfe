"""Perplexity of every exit and its agreement with the last one, before `ease tune` and after.

    python benchmarks/exits.py CHECKPOINT RUN

RUN is what `ease tune CHECKPOINT` wrote. Both models are scored at the exits that were tuned and at the last one, on
the test sequences of the run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ease
from ease.data.batches import TokenBatches
from ease.evaluation.scoring import perplexity
from ease.evaluation.sequences import Sequences
from ease.runs.reopen import open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    tuned, _, corpus, data = open_run(given.run)
    batches = TokenBatches(corpus.test, data.seq_len, data.batch_size, max_batches=data.eval_batches)
    policy = ease.Policy(tuned.early_exits, (1.0,) * len(tuned.early_exits))
    print("| | exit | perplexity | agreement |\n|---|---|---|---|")
    for name, model in (("before", ease.from_pretrained(given.checkpoint)), ("after", tuned)):
        views = Sequences(model, batches, policy).views
        agreement = [*views.agrees.double().mean(1).tolist(), 1.0]
        for exit, losses, agrees in zip((*policy.exits, model.num_layers), views.losses, agreement, strict=True):
            print(f"| {name} | {exit} | {perplexity(losses):.4g} | {agrees:.1%} |", flush=True)


if __name__ == "__main__":
    main()
