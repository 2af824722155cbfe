"""A standard model of 12 layers to add exits to with `ease tune runs/deep --exits 4,8`; takes over an hour."""

from ease import StandardConfig
from ease.runs.config import DataConfig, RunConfig, ShapeConfig


def config() -> RunConfig[StandardConfig]:
    return RunConfig(
        name="deep",
        # A head over bytes costs a seventh of a layer, 1% of the model, so that evaluating an exit is cheap.
        model=ShapeConfig(dim=128),
        data=DataConfig(tokenizer="byte", seq_len=256, batch_size=16, epoch_batches=400, eval_batches=20),
        strategy=StandardConfig(
            num_layers=12, lr=3e-3, schedule="cosine", warmup=0.02, patience=None, max_epochs=100_000, max_flops=2.2e14
        ),
        compare=(),
    )
