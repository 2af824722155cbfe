"""Two layers, then four; the upper two run for half of the tokens, in training and at inference."""

from ease import GatedConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[GatedConfig]:
    return RunConfig(
        name="gated",
        model=ShapeConfig(dim=128),
        data=DataConfig(epoch_batches=200, eval_batches=40),
        strategy=GatedConfig(
            deep_layers=4,
            exit_layer=2,
            keep=0.5,
            lr=3e-3,
            schedule="cosine",
            warmup=0.05,
            patience=None,
            max_epochs=100_000,
            max_flops=2e13,
        ),
        compare=("continued", "standard", "deep-supervision"),
    )
