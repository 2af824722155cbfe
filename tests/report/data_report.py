"""A synthetic run for the tests of the report, with the structure of a real one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any


def figures(ppl: float, hard: float, shallow: float, **extra: Any) -> dict[str, Any]:
    return {
        "loss": math.log(ppl),
        "ppl": ppl,
        "acc": 1.2 / math.log(ppl),
        "hard_ppl": hard,
        "hard_acc": 0.2,
        "easy_ppl": 9.0,
        "shallow_ratio": shallow,
        "compute_cost": 0.5 * shallow + (1 - shallow),
        "exit_shares": {"3": shallow, "6": 1 - shallow},
        "flops_per_token": 1.3e6 * (0.5 * shallow + (1 - shallow)),
        "seconds": 4.2,
        "tokens": 48_000,
        **extra,
    }


def curve(phase: str, start: float, losses: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "phase": phase,
            "epoch": i + 1,
            "step": 100 * (i + 1),
            "flops": start + (i + 1) * 2e12,
            "seconds": (start / 2e12 + i + 1) * 5.5,
            "train_loss": loss - 0.12,
            "val_loss": loss,
            "val_acc": 1.2 / loss,
            "lr": 1e-3,
        }
        for i, loss in enumerate(losses)
    ]


EXIT = {"tokens_per_round": 1.4, "draft_source": "exit 3"}


def way(name: str, batch: int, speed: float, ratio: float, layers: float, **extra: Any) -> dict[str, Any]:
    """Metrics of one decoding mode."""
    return {
        "way": name,
        "batch": batch,
        "tokens_per_second": speed,
        "ratio": ratio,
        "low": 0.95 * ratio,
        "high": 1.05 * ratio,
        "same_tokens": 1.0,
        "layers_per_token": layers,
        "acceptance": None,
        "tokens_per_round": None,
        "draft_source": None,
        **extra,
    }


def synthetic_summary(**changes: Any) -> dict[str, Any]:
    first = curve("phase 1", 0, [5.1, 4.5, 4.15, 3.95])
    spent = {"training": 9.1e12, "mining": 0.0, "trunk": 0.0, "validation": 0.9e12}

    def line(
        name: str, layers: int, flops: float, own: list[dict[str, Any]], policy: Any, **figs: Any
    ) -> dict[str, Any]:
        return {
            "name": name,
            "num_layers": layers,
            "train_flops": flops,
            "train_seconds": flops / 4e11,
            "flops_by": spent,
            "curve": own,
            "policy": policy,
            **figs,
        }

    policy = {"exits": [3], "thresholds": [0.3], "confidence": "max probability"}
    summary = {
        "format": 1,
        "ease_version": "0.1.0",
        "name": "synthetic",
        "strategy": "ashem",
        "note": "demo-sized budget: made-up figures",
        "data": {
            "name": "stdlib",
            "tokenizer": "bpe:2048",
            "hash": "f00d",
            "vocab_size": 2048,
            "tokens": {"train": 900_000, "val": 48_000, "test": 48_000},
            "seq_len": 64,
            "batch_size": 64,
        },
        "machine": {
            "device": "cpu",
            "cpu": "Imaginary 9000",
            "cores": 2,
            "threads": 1,
            "torch": "2.13.0",
            "python": "3.11.7",
            "platform": "Linux",
        },
        "model": {"vocab_size": 2048, "dim": 128, "num_layers": 6, "num_heads": 4},
        "parameters": 1_460_000,
        "seed": 0,
        "lines": [
            line(
                "phase 1",
                3,
                8e12,
                first,
                None,
                test=figures(50.2, 181.0, 1.0, exit_shares={"3": 1.0}),
                val=figures(49.1, 178.0, 1.0),
                exit_quality={"3": {"ppl": 50.2, "acc": 0.31}},
            ),
            line(
                "phase 1 continued",
                3,
                14e12,
                first + curve("phase 1 continued", 8e12, [3.86, 3.79, 3.74]),
                None,
                test=figures(42.1, 150.0, 1.0, exit_shares={"3": 1.0}),
                val=figures(41.0, 148.0, 1.0),
                exit_quality={"3": {"ppl": 42.1, "acc": 0.33}},
            ),
            line(
                "phase 2",
                6,
                14.1e12,
                first + curve("phase 2", 8.1e12, [3.9, 3.72, 3.64]),
                policy,
                test=figures(38.4, 128.0, 0.52),
                val=figures(37.5, 126.0, 0.52),
                exit_quality={"3": {"ppl": 50.2, "acc": 0.31}, "6": {"ppl": 37.9, "acc": 0.35}},
            ),
            line(
                "standard",
                6,
                14e12,
                curve("standard", 0, [5.2, 4.6, 4.2, 3.95, 3.8, 3.7, 3.62]),
                None,
                test=figures(37.2, 131.0, 0.0, exit_shares={"6": 1.0}),
                val=figures(36.4, 129.0, 0.0),
                exit_quality={"6": {"ppl": 37.2, "acc": 0.36}},
            ),
        ],
        "hard": {
            "exits": [3],
            "thresholds": [0.3],
            "train_ratio": 0.5,
            "train_count": 450_000,
            "test_ratio": 0.48,
            "fixed_by": "phase 1's final model",
        },
        "in_sample": {
            "split": "validation",
            "hard_ppl_before": 178.0,
            "hard_ppl_after": 99.0,
            "improvement": 0.44,
            "ppl": 31.0,
            "acc": 0.38,
            "shallow_ratio": 0.6,
            "compute_cost": 0.7,
        },
        "sweep": {
            "line": "phase 2",
            "split": "test",
            "points": [
                {
                    "thresholds": [t],
                    "ppl": 37.9 + 12 * (1 - t) ** 3,
                    "acc": 0.3 + 0.05 * t,
                    "compute_cost": 0.5 + 0.5 * t,
                    "flops_per_token": 1.3e6 * (0.5 + 0.5 * t),
                    "seconds": 3 + t,
                    "exit_shares": {"3": 1 - t, "6": t},
                }
                for t in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
            ],
        },
        "generation": {
            "line": "phase 2",
            "split": "test",
            "prompt_tokens": 32,
            "new_tokens": 33,
            "rounds": 3,
            "seconds": 4.2,
            "rows": [
                way("full", 1, 500.0, 1.0, 6.0),
                way("routed, own policy", 1, 605.0, 1.21, 4.5, same_tokens=0.4),
                way("exact, auto", 1, 500.0, 1.01, 6.0, acceptance=0.97, tokens_per_round=1.2, draft_source="lookup"),
                way("exact, exit 3", 1, 450.0, 0.9, 6.0, acceptance=0.91, **EXIT),
                way("full", 8, 3200.0, 1.0, 6.0),
                way("routed, own policy", 8, 2400.0, 0.75, 4.6, same_tokens=0.7),
                way("exact, auto", 8, 3600.0, 1.125, 6.0, acceptance=0.93, **EXIT),
                way("exact, exit 3", 8, 3700.0, 1.16, 6.0, acceptance=0.94, **EXIT),
            ],
        },
        "reliability": {
            "split": "test",
            "exits": [
                {
                    "layer": layer,
                    "ece": 0.03,
                    "bins": [
                        {
                            "low": i / 10,
                            "high": (i + 1) / 10,
                            "confidence": (i + 0.5) / 10,
                            "accuracy": ((i + 0.5) / 10) ** bend,
                            "share": (10 - i) / 55,
                        }
                        for i in range(10)
                    ],
                }
                for layer, bend in ((3, 1.25), (6, 0.9))
            ],
        },
    }
    return {**summary, **changes}


CODE = """def area(radius: float) -> float:
\treturn 3.14159 * radius ** 2


class Circle:
    def __init__(self, radius):
        self.radius = radius
"""


def synthetic_explorer(tokens: list[str] | None = None) -> dict[str, Any]:
    tokens = tokens or re.findall(r" ?\w+|\s+|[^\w\s]", CODE * 4)
    sure = [(7 * i % 19) / 19 for i in range(len(tokens))]
    runs = []
    for t in (0.9, 0.1, 0.3, 0.5, 0.7):  # in no order: the page sorts them
        early = sum(c >= t for c in sure) / len(sure)
        runs.append(
            {
                "thresholds": [t],
                "exits": [3 if c >= t else 6 for c in sure],
                "confidences": sure,
                "top": [[["self", 0.5], [".", 0.2], ["\n", 0.1]] for _ in tokens],
                "totals": {
                    "exit_shares": {"3": early, "6": 1 - early},
                    "compute_cost": 1 - early / 2,
                    "flops_per_token": 1.3e6 * (1 - early / 2),
                    "ppl": 50 - 12 * t,
                    "acc": 0.3 + t / 20,
                },
            }
        )
    return {"split": "test", "tokens": tokens, "exits": [3, 6], "runs": runs}


def run_folder(folder: Path, summary: object, explorer: object = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    if explorer is not None:
        (folder / "explorer.json").write_text(json.dumps(explorer), "utf-8")
    return folder


def with_line(summary: dict[str, Any], name: str, **changes: Any) -> dict[str, Any]:
    """The summary with the test metrics (or the training FLOPs) of one line changed."""
    for line in summary["lines"]:
        if line["name"] == name:
            line["train_flops"] = changes.pop("train_flops", line["train_flops"])
            line["test"].update(changes)
    return summary
