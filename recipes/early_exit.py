"""An exit after layer 2 trained jointly with the last layer (BranchyNet); --start sets a checkpoint."""

from ease import EarlyExitConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[EarlyExitConfig]:
    return RunConfig(
        name="early-exit",
        model=ShapeConfig(dim=128),
        data=DataConfig(epoch_batches=200, eval_batches=40),
        strategy=EarlyExitConfig(
            num_layers=4,
            exit_layer=2,
            routing_threshold=0.9,
            lr=3e-3,
            schedule="cosine",
            warmup=0.05,
            patience=None,
            max_epochs=100_000,
            max_flops=2e13,
        ),
        compare=("full-depth", "standard", "deep-supervision"),
    )
