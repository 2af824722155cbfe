"""ASHEM and its baselines on Python's own library, in minutes on two cores."""

from ease import ASHEMConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[ASHEMConfig]:
    return RunConfig(
        name="demo",
        note="Demo budget: less than a minute of training per line. The ranking of the lines changes with the budget.",
        # At equal training FLOPs: phase 1 trained further, standard models of every depth, progressive growth.
        compare=("continued", "standard", "growth"),
        compare_layers=(1, 2, 3),
        # One narrow layer is soon near its limit, so that more depth can help.
        model=ShapeConfig(dim=48),
        data=DataConfig(tokenizer="byte", seq_len=128, batch_size=32, epoch_batches=100, eval_batches=20),
        strategy=ASHEMConfig(
            phase1_layers=1,
            phase1_lr=2e-2,
            phase1_patience=None,
            phase1_max_epochs=100_000,
            phase1_max_flops=0.6e12,
            hard_example_ratio=0.5,
            phase2_layers=3,
            phase2_lr=2e-2,
            phase2_patience=None,
            phase2_max_epochs=100_000,
            phase2_max_flops=0.4e12,
            mine_epochs=4,
            schedule="cosine",
            warmup=0.05,
        ),
    )
