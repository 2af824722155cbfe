"""Exits for a trained model whose backbone does not change: `ease tune CHECKPOINT` (or --start CHECKPOINT)."""

from ease import TuneConfig
from ease.runs.config import DataConfig, RunConfig


def config() -> RunConfig[TuneConfig]:
    return RunConfig(
        name="tune",
        data=DataConfig(seq_len=256, batch_size=8, epoch_batches=200, eval_batches=40),
        strategy=TuneConfig(lr=3e-3, weight_decay=0.0, schedule="cosine", warmup=0.05, patience=None, max_epochs=5),
        compare=("full-depth",),
    )
