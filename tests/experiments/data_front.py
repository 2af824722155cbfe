"""A made-up `test.json` for the tests of tables and of the paper."""

from __future__ import annotations

import math
from typing import Any


def point(cost: float, loss: float, exits: tuple[int, ...] = (), share: float | None = None) -> dict[str, Any]:
    data = {"loss": loss, "ppl": math.exp(loss), "hard_ppl": math.exp(loss + 1), "flops_per_token": cost}
    data |= {"compute_cost": 0.5, "shallow_ratio": 0.5, "acc": 0.5, "easy_ppl": 2.0}
    where = {"exits": list(exits), "share": share, "threshold": None, "thresholds": [0.5] * len(exits)}
    return where | {"val": dict(data), "test": data}


def fake(seeds: int = 3, lift: float = 0.0, budget: float = 1e12) -> dict[str, Any]:
    """Standard models of 1 and 2 layers, and a strategy half-way between them, `lift` above the baseline front."""
    entries = []
    for seed in range(seeds):
        noise = 0.3 * seed  # of the seed, the same for all lines
        half = [point(150.0, 4.5 + lift + noise, (1,), 0.5), point(200.0, 4.4 + noise)]
        for name, points in {
            "base": [point(100.0, 6.0 + noise)],
            "standard 1": [point(100.0, 5.0 + noise)],
            "standard 2": [point(200.0, 4.0 + noise)],
            "exits & more_": half,
        }.items():
            entries.append(
                {
                    "key": f"{name}{seed}",
                    "line": name,
                    "seed": seed,
                    "lr": 0.01,
                    "points": points,
                    "flops": budget,
                    "seconds": 1.0,
                    "memory": 2**20,
                    "strategy": {"kind": "StandardConfig"},
                }
            )
    lab = {"corpus": "text", "tokens": {"train": 10}, "vocab_size": 9, "dim": 8, "heads": 2, "seq": 4, "batch": 2}
    lab |= {"tie_embeddings": True, "dropout": 0.0, "budget": budget, "lrs": [0.01, 0.02], "eval_batches": [2, None]}
    about = {"cpu": "a CPU", "device": "cpu", "torch": "2", "python": "3"}
    data = {"title": "Trial", "command": "ease reproduce 1", "lab": lab, "seeds": list(range(seeds))}
    data |= {
        "machine": about,
        "timed": {"seed": 0, "rounds": 5, "batches": 4},
        "base": "base",
        "compared_with": ["standard 1"],
    }
    data |= {"baselines": ["standard 1", "standard 2"], "partial": ["base"], "ablated": None}
    data |= {"on_validation": [], "in_sample": None}
    return data | {"by_token_group": (), "missing": ["another"], "entries": entries}
