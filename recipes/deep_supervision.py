"""Deep supervision: a loss at every layer, so that every layer is an exit; tokens exit after layer 2."""

from ease import DeepSupervisionConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[DeepSupervisionConfig]:
    return RunConfig(
        name="deep-supervision",
        model=ShapeConfig(dim=128),
        data=DataConfig(epoch_batches=200, eval_batches=40),
        strategy=DeepSupervisionConfig(
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
        compare=("standard",),
    )
