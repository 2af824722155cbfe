"""Progressive growth: two layers, then four; all layers learn under one schedule."""

from ease import GrowthConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[GrowthConfig]:
    return RunConfig(
        name="growth",
        model=ShapeConfig(dim=128),
        data=DataConfig(epoch_batches=200, eval_batches=40),
        strategy=GrowthConfig(
            layers=(2, 4),
            lr=3e-3,
            schedule="cosine",
            warmup=0.05,
            patience=None,
            max_epochs=100_000,
            max_flops=2e13,
        ),
        compare=("continued", "standard"),
    )
