"""ASHEM: a shallow brick on all tokens, then new layers on the tokens it is unsure of."""

from ease import ASHEMConfig
from ease.runs import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[ASHEMConfig]:
    return RunConfig(
        name="ashem",
        model=ShapeConfig(dim=128),
        data=DataConfig(epoch_batches=200, eval_batches=40),
        strategy=ASHEMConfig(
            phase1_layers=2,
            phase1_lr=3e-3,
            phase1_patience=None,
            phase1_max_epochs=100_000,
            phase1_max_flops=1.2e13,
            hard_example_ratio=0.5,
            phase2_layers=4,
            phase2_lr=3e-3,
            phase2_patience=None,
            phase2_max_epochs=100_000,
            phase2_max_flops=8e12,
            mine_epochs=4,
            schedule="cosine",
            warmup=0.05,
        ),
    )
