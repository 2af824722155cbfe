"""A standard model on a memory: tables of n-grams under the layers, which cost no products."""

from ease import StandardConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[StandardConfig]:
    return RunConfig(
        name="memory",
        model=ShapeConfig(dim=128, memory_orders=(2, 3, 4, 6)),
        data=DataConfig(epoch_batches=200, eval_batches=40),
        strategy=StandardConfig(
            num_layers=4, lr=3e-3, schedule="cosine", warmup=0.05, patience=None, max_epochs=100_000, max_flops=2e13
        ),
        compare=(),
    )
