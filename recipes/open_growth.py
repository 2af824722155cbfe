"""Two layers, then four without frozen layers; all tokens train the exit, the least confident half the rest."""

from ease import OpenGrowthConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[OpenGrowthConfig]:
    return RunConfig(
        name="open-growth",
        model=ShapeConfig(dim=128),
        data=DataConfig(epoch_batches=200, eval_batches=40),
        strategy=OpenGrowthConfig(
            shallow_layers=2,
            deep_layers=4,
            hard_ratio=0.5,
            lr=3e-3,
            schedule="cosine",
            warmup=0.05,
            patience=None,
            max_epochs=100_000,
            max_flops=2e13,
        ),
        compare=("continued", "standard", "deep-supervision"),
    )
