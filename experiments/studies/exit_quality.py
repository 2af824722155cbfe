"""Quality of exits on finished models: perplexity, agreement and savings of the given runs on held-out tokens.

    ease run deep
    ease tune runs/deep --exits 4,8 --out runs/deep-tuned                  # or another way to add exits
    python -m experiments.studies.exit_quality runs/deep-tuned [MORE ...] [--out results/exits.json]

For each exit, and for all exits together: perplexity, agreement (the share of tokens for which the exit predicts the
same token as the last exit), and for several targets (agreement, or a bound on the increase of perplexity) the share of
tokens that exit early, inference FLOPs including every head as a share of full depth without exits, and perplexity.
Validation proposes thresholds, a random half of the test split chooses them, and the other half is scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ease
from ease import Policy
from ease.evaluation.scoring import perplexity, score
from ease.evaluation.sequences import Sequences
from ease.runs.reopen import calibration_halves, open_run

TARGETS = {
    "95% agreement": ease.Target("min_agreement", 0.95),
    "99% agreement": ease.Target("min_agreement", 0.99),
    "PPL +1%": ease.Target("max_ppl_increase", 0.01),
}


def study(folder: Path, batches: int | None) -> list[dict[str, Any]]:
    """Rows for every exit of a run's model, for all exits together, and for the last exit.

    Args:
        folder: of the run.
        batches: of validation and of each half of test; as in the run by default.
    """
    model, _, corpus, data = open_run(folder)
    data = replace(data, eval_batches=batches or data.eval_batches)
    exits = model.policy.exits or model.early_exits
    val = ease.TokenBatches(corpus.val, data.seq_len, data.batch_size, max_batches=data.eval_batches)
    decide, held_out = calibration_halves(corpus.test, data)
    sequences = Sequences(model, held_out, Policy(exits, (1.0,) * len(exits)))
    agreement = dict(zip(exits, sequences.views.agrees.double().mean(1).tolist()))
    rows: list[dict[str, Any]] = []
    for some in [*((e,) for e in exits), *([exits] if len(exits) > 1 else [])]:
        row: dict[str, Any] = {"run": folder.name, "exits": some}
        if len(some) == 1:
            row["ppl"] = perplexity(score(model, held_out, last=some[0]).losses)
            row["agreement"] = agreement[some[0]]
        for name, target in TARGETS.items():
            print(f"{folder.name}: exits {some} at {name}", file=sys.stderr, flush=True)
            policy = Policy(some, (1.0,) * len(some))
            row[name] = ease.calibrate(model, policy, target, val, decide, held_out).record["held_out"]
        rows.append(row)
    return [
        *rows,
        {"run": folder.name, "exits": (model.num_layers,), "ppl": perplexity(sequences.full.losses), "agreement": 1},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--batches", type=int, help="of validation and of each half of test (as in the run by default)")
    parser.add_argument("--out", type=Path, default=Path("results/exits.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for folder in args.runs for row in study(folder, args.batches)]
    at = " | ".join(f"at {name}: exit early | FLOPs | PPL" for name in TARGETS)
    print(f"| run | exits | PPL | agreement | {at} |\n|---|---|---|---|{'---|' * 3 * len(TARGETS)}")
    for row in rows:
        cells = [row["run"], ", ".join(map(str, row["exits"]))]
        cells += [f"{row['ppl']:.3f}", f"{row['agreement']:.1%}"] if "ppl" in row else ["", ""]
        for held in (row.get(name) for name in TARGETS):
            cells += (
                [f"{held['shallow_ratio']:.1%}", f"{held['flops_share']:.1%}", f"{held['ppl']:.3f}"]
                if held
                else [""] * 3
            )
        print(f"| {' | '.join(cells)} |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
