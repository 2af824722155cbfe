"""Progressive growth on a memory: the memory alone, then two layers, then four; all of it learns under one schedule."""

from ease import GrowthConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[GrowthConfig]:
    return RunConfig(
        name="growth-memory",
        model=ShapeConfig(dim=128, memory_orders=(2, 3, 4, 6)),
        data=DataConfig(epoch_batches=200, eval_batches=40),
        strategy=GrowthConfig(
            layers=(0, 2, 4),
            shares=(0.05, 0.3, 0.65),
            lr=3e-3,
            schedule="cosine",
            warmup=0.05,
            patience=None,
            max_epochs=100_000,
            max_flops=2e13,
        ),
        compare=("continued", "standard"),
    )
