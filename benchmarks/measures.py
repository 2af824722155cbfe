"""Measures of confidence: cost, prediction of agreement with the last exit, and savings of each.

    python benchmarks/measures.py RUN [--agreement 0.99] [--out results/measures.json]

RUN is the folder of a run whose model has trained exits, for example one written by `ease tune`. The classifier is
fitted and thresholds are proposed on validation; a random half of the test split chooses thresholds at which the exit
taken agrees with the last exit for the given share of tokens, and the other half is scored.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import ease
from ease.devices import machine
from ease.flops import head_flops, layer_flops
from ease.routing.confidence import MEASURES, Evidence
from ease.runs.reopen import calibration_halves, open_run

TIMED = 512  # tokens


@torch.no_grad()
def seconds_a_token(model: ease.StandardTransformer, policy: ease.Policy, states: torch.Tensor) -> float:
    """Seconds per token to evaluate an exit for states (n, D), with the head if the measure requires it; best of 50."""
    exit, kind = policy.exits[0], MEASURES[policy.confidence]
    evaluate, places, best = kind.make(model, policy, len(states)), torch.arange(len(states)), float("inf")
    for _ in range(50):
        start = time.perf_counter()
        logits = model.logits(states, exit) if kind.needs_head else None
        evaluate(Evidence(exit, states, states, logits, places))
        best = min(best, time.perf_counter() - start)
    return best / len(states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--agreement", type=float, default=0.99)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, _, corpus, data = open_run(args.run)
    exits = model.policy.exits or model.early_exits
    val = ease.TokenBatches(corpus.val, data.seq_len, data.batch_size, max_batches=data.eval_batches)
    decide, held_out = calibration_halves(corpus.test, data)
    start = time.perf_counter()
    ease.learn_agreement(model, val, exits)
    fit_seconds = time.perf_counter() - start
    states = model.forward_to_layer(held_out[0][0], exits[0]).flatten(0, 1)[:TIMED].detach()
    layer = layer_flops(model.config, 1, 1, (data.seq_len + 1) // 2)
    rows: list[dict[str, Any]] = []
    for name, kind in MEASURES.items():
        policy = ease.Policy(exits, (1.0,) * len(exits), name, patience=2 if name == "patience" else 0)
        # A measure without a head takes one or two dot products with the state.
        flops = head_flops(model.config, 1) if kind.needs_head else 2 * model.config.dim
        row: dict[str, Any] = {
            "measure": name,
            "layers": flops / layer,
            "us": 1e6 * seconds_a_token(model, policy, states),
        }
        target = ease.Target("min_agreement", args.agreement)
        try:
            row |= ease.calibrate(model, policy, target, val, decide, held_out).record["held_out"]
        except ease.EaseError as error:
            print(f"{name}: {error}")
            row |= {"refused": str(error)}
        rows.append(row)
    aurocs = " | ".join(f"AUROC at {e}" for e in exits)
    print(f"| measure | cost, in layers | us per token | {aurocs} | exit early | FLOPs | agreement | PPL (full) |")
    print("|---|---|---|" + "---|" * (len(exits) + 4))
    for r in rows:
        if "refused" in r:
            continue
        quality = " | ".join(f"{r['auroc'][e]:.3f}" for e in exits)
        print(
            f"| {r['measure']} | {r['layers']:.3f} | {r['us']:.2f} | {quality} | {r['shallow_ratio']:.1%} | "
            f"{r['flops_share']:.1%} | {r['agreement']:.2%} | {r['ppl']:.3f} ({r['ppl_full']:.3f}) |"
        )
    about = machine("cpu")
    print(f"\nThe classifiers were fitted in {fit_seconds:.1f} s. {about['cpu']}, one thread, torch {about['torch']}.")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": about, "learned": fit_seconds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
