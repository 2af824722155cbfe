"""How much a memory gains by the number of its rows and by its orders, and whether one formula describes it.

python -m experiments.studies.memory_rows OUT

Standard models of two layers at scale xs, two seeds. The gain in nats is compared with R (1 - s^-0.34), where s is the
number of parameters that the model holds divided by those that it uses for a token. Results are added to
OUT/memory-rows.jsonl, from which a stopped study goes on.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

import ease
from ease.flops import parameters_read
from experiments.analysis.table import Table, write_tables
from experiments.tiers.memory import SHAPE
from experiments.tiers.scales import make_lab
from experiments.utils import set_seed

ORDERS, ROWS = SHAPE["memory_orders"], 2**15
SIZES = [(ORDERS, 2**power) for power in (10, 11, 12, 13, 14, 15, 16, 17)]
CHOICES = [((2,), ROWS), ((3,), ROWS), ((4,), ROWS), ((2, 3), ROWS), ((2, 3, 4), ROWS), ((2, 3, 4, 6, 8), ROWS)]
LR, LAYERS, SEEDS, POWER = 2e-2, 2, (0, 1), 0.34


def train(lab: Any, orders: tuple[int, ...], rows: int, seed: int) -> dict[str, float]:
    """Validation loss of a standard model on such a memory, and s."""
    set_seed(seed)
    model = lab.model(LAYERS, memory_orders=orders, memory_rows=rows)
    config = ease.StandardConfig(
        num_layers=LAYERS, lr=LR, schedule="cosine", warmup=0.05, patience=None, max_epochs=10**6, max_flops=lab.budget
    )
    ((_, history),) = ease.train(model, config.strategy(), ease.Data(lab.train(seed), lab.val))
    held = sum(p.numel() for p in model.parameters())
    return {"loss": history.rows[-1]["val_loss"], "s": held / parameters_read(model)["parameters"]}


def main(out: str) -> None:
    torch.set_num_threads(1)
    file, lab = Path(out) / "memory-rows.jsonl", make_lab("xs", "stdlib")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    done = {(tuple(r["orders"]), r["rows"], r["seed"]): r for r in map(json.loads, lines)}
    for orders, rows in [((), ROWS), *SIZES, *CHOICES]:
        for seed in SEEDS:
            if (orders, rows, seed) not in done:
                found = {"orders": orders, "rows": rows, "seed": seed, **train(lab, orders, rows, seed)}
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(found) + "\n")
                done[orders, rows, seed] = found
                print(orders, rows, seed, f"{math.exp(found['loss']):.3f}", flush=True)
    gains = {
        size: [done[(), ROWS, seed]["loss"] - done[(*size, seed)]["loss"] for seed in SEEDS]
        for size in (*SIZES, *CHOICES)
    }
    mean = {size: sum(values) / len(values) for size, values in gains.items()}
    share = {size: 1 - done[(*size, 0)]["s"] ** -POWER for size in gains}
    scale = sum(mean[z] * share[z] for z in SIZES) / sum(share[z] ** 2 for z in SIZES)  # least squares for R
    rows = [
        [
            ", ".join(map(str, size[0])),
            f"{size[1]:,}",
            f"{done[(*size, 0)]['s']:.1f}",
            ", ".join(f"{math.exp(done[(*size, seed)]['loss']):.3f}" for seed in SEEDS),
            f"{mean[size]:.3f}",
            f"{scale * share[size]:.3f}",
        ]
        for size in gains
    ]
    off = max(abs(mean[z] - scale * share[z]) for z in SIZES)
    without = ", ".join(f"{math.exp(done[(), ROWS, seed]['loss']):.3f}" for seed in SEEDS)
    about = (
        f"{lab.corpus}, scale xs: dim {lab.dim}, {LAYERS} layers, {lab.budget:.3g} training FLOPs, learning rate "
        f"{LR:g}, seeds {', '.join(map(str, SEEDS))}; without a memory the perplexity is {without}. The last column is "
        f"R (1 - s^-{POWER}) with R = {scale:.3f} nats, fitted to the rows of orders {', '.join(map(str, ORDERS))}, "
        f"from which it is at most {off:.3f} nats off. Made by `python -m experiments.studies.memory_rows OUT`."
    )
    header = ["orders", "rows of each", "s", "validation PPL, each seed", "gain in nats", "formula"]
    write_tables(
        [Table("memory-rows", "The gain of a memory by its size", header, rows, [about])], Path(out), "memory-rows"
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
