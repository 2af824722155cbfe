"""A draft brick for a trained model whose backbone does not change: `ease tune CHECKPOINT --adapter brick`."""

from ease import BrickConfig
from ease.runs.config import DataConfig, RunConfig


def config() -> RunConfig[BrickConfig]:
    return RunConfig(
        name="brick",
        data=DataConfig(seq_len=256, batch_size=2, epoch_batches=400, eval_batches=40),
        strategy=BrickConfig(lr=1e-3, weight_decay=0.0, schedule="cosine", warmup=0.05, patience=None, max_epochs=5),
        compare=(),
    )
