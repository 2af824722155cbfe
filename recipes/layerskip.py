"""LayerSkip: layer dropout and a loss at every exit under a curriculum; --start sets a checkpoint."""

from ease import LayerSkipConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[LayerSkipConfig]:
    return RunConfig(
        name="layerskip",
        model=ShapeConfig(dim=128),
        data=DataConfig(epoch_batches=200, eval_batches=40),
        strategy=LayerSkipConfig(
            num_layers=4,
            exit_layer=2,
            routing_threshold=0.9,
            dropout_schedule="exponential",
            lr=3e-3,
            schedule="cosine",
            warmup=0.05,
            patience=None,
            max_epochs=100_000,
            max_flops=2e13,
        ),
        compare=("full-depth", "standard", "deep-supervision"),
    )
