"""Discriminative fine-tuning: the learning rate falls by 2.6 per layer (ULMFiT); --start sets the checkpoint."""

from ease import DiscriminativeConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[DiscriminativeConfig]:
    return RunConfig(
        name="discriminative",
        model=ShapeConfig(dim=128),
        data=DataConfig(epoch_batches=200, eval_batches=40),
        strategy=DiscriminativeConfig(
            num_layers=4,
            lr=3e-3,
            schedule="cosine",
            warmup=0.05,
            patience=None,
            max_epochs=100_000,
            max_flops=2e13,
        ),
        compare=("continued", "standard"),
    )
